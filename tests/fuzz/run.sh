#!/bin/sh
# tests/fuzz/run.sh SECONDS NAME...: each fuzzer runs its committed corpus (and LLMPAR_TEST_DATA/NAME/parsing where that exists), then mutates it. As many at a time as there are processors, at most four (LLMPAR_TEST_JOBS). Always the same mutations, as many as there is time for; LLMPAR_FUZZ_SEED=0: others each time.
if [ "$1" = --one ]; then # SECONDS NAME
    seconds=$2 name=$3
    corpus=tests/fuzz/$name
    [ ! -d "$LLMPAR_TEST_DATA/$name/parsing" ] || corpus="$corpus $LLMPAR_TEST_DATA/$name/parsing"
    mkdir -p "build/fuzz/corpus_$name"
    "build/fuzz/fuzz_$name" -max_total_time="$seconds" -seed="${LLMPAR_FUZZ_SEED:-1}" -timeout=60 -rss_limit_mb=2048 -artifact_prefix=build/fuzz/ "build/fuzz/corpus_$name" $corpus >"build/fuzz/$name.log" 2>&1
    echo $? >"build/fuzz/$name.code"
    exit 0
fi
seconds=$1
shift
jobs=${LLMPAR_TEST_JOBS:-$(nproc 2>/dev/null || echo 1)}
[ "$jobs" -le 4 ] || jobs=4
for name in "$@"; do rm -f "build/fuzz/$name.code"; done
printf '%s\n' "$@" | xargs -P "$jobs" -n 1 "$0" --one "$seconds"
passed=0 failed=0
for name in "$@"; do
    code=1
    [ ! -f "build/fuzz/$name.code" ] || read -r code <"build/fuzz/$name.code"
    if [ "$code" -eq 0 ]; then
        passed=$((passed + 1))
        echo "fuzz_$name: $(grep -E '^Done|stat::number_of_executed' "build/fuzz/$name.log" | tail -n 1)"
    else
        failed=$((failed + 1))
        echo "FAILED fuzz_$name"
        tail -n 40 "build/fuzz/$name.log" | sed 's/^/    /'
    fi
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
