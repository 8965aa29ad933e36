#!/bin/sh
# A part of the suite in a configuration for another C library or processor, and the same bits on three meshes: tests/ported.sh build/aarch64 test_gemm test_ops ...
# LLMPAR_TEST_RUNNER is what runs the programs (an emulator). The last line is "N passed, N failed".
folder=$1
shift
unset LLMPAR_TEST_DATA # the readers of large files run elsewhere
passed=0 failed=0
# Two at a time: an emulator is slow, and no test here looks at the clock.
first='' second=''
while [ $# -gt 0 ]; do
    first="$first $1" second="$second $2"
    shift
    [ $# -gt 0 ] && shift
done
# shellcheck disable=SC2086
tests/run.sh "$folder" $first >"$folder/first.log" 2>&1 &
running=$!
# shellcheck disable=SC2086
tests/run.sh "$folder" $second >"$folder/second.log" 2>&1
wait $running
for log in "$folder/first.log" "$folder/second.log"; do
    sed '/^[0-9]* skipped: /d; $d' "$log"
    sum=$(tail -n 1 "$log")
    passed=$((passed + ${sum%% passed*})) sum=${sum#*passed, }
    failed=$((failed + ${sum%% failed*}))
done
if [ -x "$folder/train_llama" ]; then
    bits=
    for mesh in '--tp 1' '--dp-shard 2 --tp 2' '--tp 4 --sp on --grad-accum 2'; do
        # shellcheck disable=SC2086
        if ! $LLMPAR_TEST_RUNNER "$folder/train_llama" --model tiny --data README.md --seq-len 16 --batch 4 --steps 2 --save "$folder/trained" $mesh >"$folder/train.log" 2>&1; then
            echo "FAILED train_llama $mesh"
            sed 's/^/    /' "$folder/train.log"
            failed=$((failed + 1))
            continue
        fi
        sum=$(cksum <"$folder/trained/model.safetensors")
        if [ "${bits:=$sum}" = "$sum" ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAILED train_llama $mesh: other bits than on one rank"; fi
    done
    [ -n "$bits" ] && echo "train_llama on 1 rank, 2x2 and tp 4: compared"
fi
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
