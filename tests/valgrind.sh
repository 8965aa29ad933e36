#!/bin/sh
# Kernels under valgrind, which knows AVX2 but no AVX-512: a processor without it is what the programs see. Reads of what nobody wrote, and reads and writes beside a buffer, which the poison of
# the tests cannot show. tests/valgrind.sh FOLDER: the programs in FOLDER, or tests of them by name; a few of each, because everything takes 30 times as long.
folder=$1
passed=0 failed=0
export LLMPAR_TEST_QUICK=1
for test in "test_kernels" "test_elementwise" "test_half" "test_ops swiglu" "test_ops norm_cut" "test_ops rope" "test_ops embedding" "test_ops xent" "test_gemm special" "test_gemm empty" "test_attention odd_groups" "test_attention refusals"; do
    start=$(date +%s)
    program=${test%% *} name=
    [ "$program" = "$test" ] || name=${test#* }
    valgrind -q --error-exitcode=9 "$folder/$program" $name >"$folder/valgrind.log" 2>&1
    code=$?
    count=$(sed -n 's/^\([0-9]*\) passed, 0 failed.*/\1/p' "$folder/valgrind.log")
    if [ $code -eq 0 ] && [ "${count:-0}" -gt 0 ]; then
        passed=$((passed + count))
        printf '%-28s %s passed, %d s\n' "$test" "$count" $(($(date +%s) - start))
    else
        failed=$((failed + 1))
        echo "$test: exit code $code"
        sed 's/^/    /' "$folder/valgrind.log" | tail -n 40
    fi
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
