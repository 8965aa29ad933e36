#!/bin/bash
# Plants faults: applies each tests/plant/*.patch to a copy of the tree and expects the test program that the patch names
# (first line "test: test_name", second "fault: what") to fail there; the test of it that fails first has to pass without the fault, or all of them where none is named (a crash, a hang). A patch that no longer applies is a failure.
# tests/plant/run.sh [NAME...] takes only the patches so named; --sample: every sixteenth (a quick look; `make test-plant` takes all). Each processor, at most four, has a tree of its own (LLMPAR_TEST_JOBS).
jobs=${LLMPAR_TEST_JOBS:-$(nproc 2>/dev/null || echo 1)}
[ "$jobs" -le 4 ] || jobs=4
export LLMPAR_TEST_QUICK=1 LLMPAR_TEST_FIRST=1

bad() { failed=$((failed + 1)); echo "FAILED $1: $2"; [ -z "$3" ] || tail -n 8 "$3" | sed 's/^/    /'; }
# Programs of the CUDA device run on its emulation, those of the NCCL communicator on a stand-in for NCCL. memory_kernels: what shows in no result, but in how memory is used.
program() { case $1 in memory_kernels) echo "build/emulated_memory/$1" ;; test_cuda_*) echo "build/emulated/$1" ;; test_nccl*) echo "build/nccl/$1" ;; *) echo "build/separate/$1" ;; esac; }
build() { make -C $tree --no-print-directory CUDA_LIB=build/separate/llmpar.a "$(program "$1")" >$tree/build.log 2>&1; }
run() { (cd $tree && timeout "$@" >run.log 2>&1) 2>/dev/null; } # SECONDS PROGRAM [TEST]

# plant PATCH in $tree, a sound one; leaves it sound.
plant()
{
    local patch=$1 name test fault code first how=
    name=$(basename "$patch" .patch)
    test=$(sed -n '1s/^test: //p' "$patch")
    fault=$(sed -n '2s/^fault: //p' "$patch")
    if [ -z "$test" ] || { [ ! -f "tests/$test.c" ] && [ ! -f "tests/emulated_cuda/$test.c" ]; }; then bad "$name" "line 1 has to be \"test: PROGRAM\", got \"$(head -n 1 "$patch")\""; return; fi
    if [ -z "${sound[$test]}" ]; then
        build "$test" || { bad "$name" "$test does not build without the fault" $tree/build.log; return; }
        cp "$tree/$(program "$test")" "$tree/build/sound/" # under its own name, which threads take theirs from
        sound[$test]=1
    fi
    if ! patch -d $tree -p1 --fuzz=0 -s -f <"$patch" >$tree/patch.log 2>&1; then
        bad "$name" "the patch no longer applies" $tree/patch.log
        rm -rf $tree/src && cp -r src $tree/ # newer than every object
        return
    fi
    if ! build "$test"; then bad "$name" "does not build with the fault" $tree/build.log
    else
        run 150 "$(program "$test")"
        code=$?
        [ $code -ne 124 ] || how=", it hung"
        first=$(sed -n 's/^FAILED //p' $tree/run.log | head -n 1)
        if [ $code -eq 0 ]; then bad "$name" "$test did not notice: $fault"
        elif ! run 900 "build/sound/$test" $first; then bad "$name" "$test $first fails without the fault" $tree/run.log
        else
            passed=$((passed + 1))
            printf '%-24s caught by %s (exit code %s%s): %s\n' "$name" "$test${first:+ $first}" $code "$how" "$fault"
        fi
    fi
    patch -d $tree -p1 -R -s -f <"$patch" >/dev/null
}

# worker K: takes the patches from the list, one after the other, and leaves its counts in a file.
worker()
{
    local index patch
    declare -A sound
    tree=build/plant/$1
    passed=0 failed=0
    mkdir -p $tree/build/sound
    cp -a Makefile src tests tools examples $tree/
    # Module by module, so that a fault costs the compilation of its module alone; what `make test-separate` and `make test-cuda` left is taken along.
    for left in build/separate build/dev build/emulated; do [ ! -d $left ] || cp -a $left $tree/build/; done
    rm -f $tree/build/emulated/test_* # linked with another archive
    while index=$(next); do
        patch=${patches[$index]}
        [ -n "$patch" ] || break
        plant "$patch"
    done
    echo "$passed $failed" >build/plant/$1.count
}

next() { flock build/plant/lock bash -c 'n=$(cat build/plant/next); echo $((n + 1)) >build/plant/next; echo $n'; }

rm -rf build/plant
mkdir -p build/plant
echo 0 >build/plant/next
patches=()
for patch in $(for p in tests/plant/*.patch; do echo "$(head -n 1 "$p" | tr -d ' ') $p"; done | sort | cut -d' ' -f2); do # by test: a worker shows only once that it is sound
    name=$(basename "$patch" .patch)
    if [ "$1" = --sample ]; then
        place=$((place + 1))
        [ $((place % 16)) -eq 1 ] || continue
    elif [ $# -gt 0 ] && [[ " $* " != *" $name "* ]]; then continue; fi
    patches+=("$patch")
done
# Once for all workers; what does not compile is reported where a program is built.
make --no-print-directory -j$jobs build/separate/llmpar.a >build/plant/make.log 2>&1
for ((k = 0; k < jobs; k++)); do worker $k & done
wait
passed=0 failed=0
for ((k = 0; k < jobs; k++)); do
    if read -r p f <build/plant/$k.count; then passed=$((passed + p)) failed=$((failed + f)); else failed=$((failed + 1)); fi
done
[ $((passed + failed)) -ge ${#patches[@]} ] || { echo "FAILED: $((${#patches[@]} - passed - failed)) patches were not tried"; failed=$((failed + 1)); }
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
