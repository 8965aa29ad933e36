#!/bin/sh
# tests/fuzz/run.sh SECONDS NAME...: each fuzzer runs its committed corpus (and LLMPAR_TEST_DATA/NAME/parsing where that exists), then mutates it.
seconds=$1
shift
passed=0 failed=0
for name in "$@"; do
    corpus=tests/fuzz/$name
    [ ! -d "$LLMPAR_TEST_DATA/$name/parsing" ] || corpus="$corpus $LLMPAR_TEST_DATA/$name/parsing"
    mkdir -p "build/fuzz/corpus_$name"
    if "build/fuzz/fuzz_$name" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -artifact_prefix=build/fuzz/ \
        "build/fuzz/corpus_$name" $corpus >"build/fuzz/$name.log" 2>&1; then
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
