#!/bin/sh
# Kernels under valgrind, which knows AVX2 but no AVX-512: a processor without it is what the programs see. Reads of what nobody wrote, and reads and writes beside a buffer, which the poison of
# the tests cannot show. tests/valgrind.sh FOLDER: the programs in FOLDER, or tests of them by name; a few of each, because everything takes 30 times as long.
folder=$1
export LLMPAR_TEST_QUICK=1

if [ "$2" = --one ]; then # writes valgrind.N.end: passed, failed; and what there is to say
    number=${3%%:*} test=${3#*:}
    start=$(date +%s)
    program=${test%% *} name=
    [ "$program" = "$test" ] || name=${test#* }
    valgrind -q --error-exitcode=9 "$folder/$program" $name >"$folder/valgrind.$number.log" 2>&1
    code=$?
    count=$(sed -n 's/^\([0-9]*\) passed, 0 failed.*/\1/p' "$folder/valgrind.$number.log")
    {
        if [ $code -eq 0 ] && [ "${count:-0}" -gt 0 ]; then
            echo "$count 0"
            printf '%-28s %s passed, %d s\n' "$test" "$count" $(($(date +%s) - start))
        else
            echo "0 1"
            echo "$test: exit code $code"
            sed 's/^/    /' "$folder/valgrind.$number.log" | tail -n 40
        fi
    } >"$folder/valgrind.$number.end"
    exit 0
fi

jobs=${LLMPAR_TEST_JOBS:-$(nproc 2>/dev/null || echo 1)}
passed=0 failed=0
rm -f "$folder"/valgrind.*
tests='test_elementwise
test_half
test_kernels
test_ops swiglu
test_ops norm_cut
test_ops rope
test_ops embedding
test_ops xent
test_gemm special
test_gemm empty
test_interleave layout
test_interleave refusals
test_attention odd_groups
test_attention refusals'
echo "$tests" | awk '{ print NR ":" $0 }' | tr '\n' '\0' | xargs -0 -P "$jobs" -n 1 "$0" "$folder" --one
for number in $(seq "$(echo "$tests" | wc -l)"); do
    p=0 f=1
    [ ! -f "$folder/valgrind.$number.end" ] || read -r p f <"$folder/valgrind.$number.end"
    sed 1d "$folder/valgrind.$number.end"
    passed=$((passed + p)) failed=$((failed + f))
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
