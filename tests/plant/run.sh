#!/bin/bash
# Plants faults: applies each tests/plant/*.patch to a copy of the tree and expects the test program that the patch names
# (first line "test: test_name", second "fault: what") to fail there, and to pass without it. A patch that no longer applies is a failure.
# tests/plant/run.sh [NAME...] takes only the patches so named.
tree=build/plant
mkdir -p $tree
rm -rf $tree/src $tree/tests $tree/tools $tree/build
cp -a Makefile src tests tools $tree/
# Module by module, so that a fault costs the compilation of its module alone; what `make test-separate` left is taken along.
mkdir -p $tree/build
[ ! -d build/separate ] || cp -a build/separate $tree/build/
passed=0 failed=0
export LLMPAR_TEST_TIMEOUT=60 LLMPAR_TEST_QUICK=1

bad() { failed=$((failed + 1)); echo "FAILED $1: $2"; [ -z "$3" ] || tail -n 8 "$3" | sed 's/^/    /'; }
build() { make -C $tree --no-print-directory "build/separate/$1" >$tree/build.log 2>&1; }
run() { (cd $tree && timeout $LLMPAR_TEST_TIMEOUT "build/separate/$1" >run.log 2>&1) 2>/dev/null; }

declare -A sound
for patch in tests/plant/*.patch; do
    [ -f "$patch" ] || continue
    name=$(basename "$patch" .patch)
    if [ $# -gt 0 ] && [[ " $* " != *" $name "* ]]; then continue; fi
    test=$(sed -n '1s/^test: //p' "$patch")
    fault=$(sed -n '2s/^fault: //p' "$patch")
    if [ -z "$test" ] || [ ! -f "tests/$test.c" ]; then bad "$name" "line 1 has to be \"test: PROGRAM\", got \"$(head -n 1 "$patch")\""; continue; fi
    if [ -z "${sound[$test]}" ]; then
        build "$test" || { bad "$name" "$test does not build without the fault" $tree/build.log; continue; }
        run "$test" || { bad "$name" "$test fails without the fault" $tree/run.log; continue; }
        sound[$test]=1
    fi
    if ! patch -d $tree -p1 --fuzz=0 -s -f <"$patch" >$tree/patch.log 2>&1; then
        bad "$name" "the patch no longer applies" $tree/patch.log
        rm -rf $tree/src && cp -a src $tree/
        continue
    fi
    if ! build "$test"; then bad "$name" "does not build with the fault" $tree/build.log
    else
        run "$test"
        code=$?
        if [ $code -eq 0 ]; then bad "$name" "$test did not notice: $fault"
        else
            passed=$((passed + 1))
            how="exit code $code"
            [ $code -ne 124 ] || how="it hung"
            printf '%-24s caught by %s (%s): %s\n' "$name" "$test" "$how" "$fault"
        fi
    fi
    patch -d $tree -p1 -R -s -f <"$patch" >/dev/null
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
