#!/bin/bash
# Which branches of the readers of foreign files do their tests take? tools/coverage.sh, behind `make build/separate/llmpar.a`: these modules are compiled with gcc's --coverage, the rest is linked as it is.
# A line a module: branches, those taken. Branches of allocation failures do not count: those on a line that makes, sizes or reports an allocation (LLMPAR_ERR_MEMORY, _alloc(, llmpar_size_).
# All the others have to be taken; what is not is printed, line by line. None of this needs LLMPAR_TEST_DATA.
modules="base/json io/safetensors model_io/hf_files model_io/manifest $(cd src && ls model_io/checkpoint*.c | sed 's/\.c$//')"
out=build/coverage
programs="test_json test_safetensors test_config $(cd tests && ls test_hf*.c test_checkpoint*.c 2>/dev/null | sed 's/\.c$//')"
flags="-std=c99 -g -DLLMPAR__SEPARATE -Isrc"
rm -rf $out
mkdir -p $out
objects=
for module in $modules; do
    object=$out/$(basename "$module").o
    gcc $flags -O0 --coverage -fprofile-update=atomic -ffp-contract=off -c "src/$module.c" -o "$object" || exit 1
    objects="$objects $object"
done
passed=0 failed=0
for program in $programs; do
    gcc $flags -O1 -Ibuild/separate -Itests "tests/$program.c" $objects build/separate/llmpar.a -o "$out/$program" --coverage -fno-profile-arcs -fno-test-coverage -lpthread -lm || exit 1
    if "$out/$program" >"$out/$program.log" 2>&1; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAILED $program"; tail -n 20 "$out/$program.log"; fi
done
cd $out || exit 1
for module in $modules; do
    name=$(basename "$module")
    (cd ../.. && gcov -b -c -o $out "$out/$name.o" >/dev/null 2>&1 && mv "$name.c.gcov" $out/ && rm -f ./*.gcov)
    if awk -v module="src/$module.c" '
        /^(function|call|unconditional)/ { next }
        /^branch/ {
            if (line ~ /LLMPAR_ERR_MEMORY|_alloc\(|llmpar_size_/) next
            count++
            if ($0 ~ /never executed/ || $4 == 0) missing[++n] = line
            next
        }
        { line = $0; sub(/^[^:]*: */, "", line) }
        END {
            printf "%-28s %4d branches, %d taken (%.1f %%)\n", module, count, count - n, 100 * (count - n) / count
            for (i = 1; i <= n; i++) print "    not taken: " substr(missing[i], 1, 200)
            exit n > 0
        }' "$name.c.gcov"; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
