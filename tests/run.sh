#!/bin/sh
# Runs the test programs of one configuration: tests/run.sh build/plain test_json test_gemm ...
# As many at a time as there are processors, at most four (LLMPAR_TEST_JOBS). One line a program, the whole log of one that fails, and
# the sum as the last line. With LLMPAR_TEST_DATA set, a skip is a failure. A program may take LLMPAR_TEST_TIMEOUT seconds (600).
# LLMPAR_TEST_RUNNER, if set, is what runs the programs (an emulator).
folder=$1
shift

if [ "$1" = --one ]; then # writes TEST.log, and TEST.end: exit code and seconds
    test=$2
    start=$(date +%s)
    if [ -x "$folder/$test" ]; then
        timeout "${LLMPAR_TEST_TIMEOUT:-600}" $LLMPAR_TEST_RUNNER "$folder/$test" >"$folder/$test.log" 2>&1
        code=$?
    else
        echo "$folder/$test was not built" >"$folder/$test.log"
        code=127
    fi
    echo "$code $(($(date +%s) - start))" >"$folder/$test.end"
    exit 0
fi

jobs=${LLMPAR_TEST_JOBS:-$(nproc 2>/dev/null || echo 1)}
[ "$jobs" -le 4 ] || jobs=4
mkdir -p "$folder"
for test in "$@"; do rm -f "$folder/$test.end"; done
printf '%s\n' "$@" | xargs -P "$jobs" -n 1 "$0" "$folder" --one 2>/dev/null

passed=0 failed=0 skipped=0
for test in "$@"; do
    log=$folder/$test.log
    code=1 seconds=0
    [ ! -f "$folder/$test.end" ] || read -r code seconds <"$folder/$test.end"
    last=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$log" | tail -n 1)
    p=0 f=0 s=0
    eval "$(echo "$last" | sed -n -E 's/^([0-9]+) passed, ([0-9]+) failed(, ([0-9]+) skipped)?$/p=\1 f=\2 s=\4/p')"
    s=${s:-0}
    if [ "$code" -ne 0 ] && [ "$f" -eq 0 ]; then f=1; fi   # crashed, hung, or did not build
    if [ -z "$last" ] && [ "$f" -eq 0 ]; then f=1; fi
    note=
    if [ -n "$LLMPAR_TEST_DATA" ] && [ "$s" -gt 0 ]; then
        f=$((f + s)) s=0
        note=" (skipped although LLMPAR_TEST_DATA is set)"
    fi
    if [ "$f" -gt 0 ]; then
        [ -n "$last" ] || last="exit code $code"
        printf '%-24s FAILED  %s%s\n' "$test" "$last" "$note"
        sed 's/^/    /' "$log" | tail -n 60
    else
        printf '%-24s %s, %d s\n' "$test" "$last" "$seconds"
    fi
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
done
if [ "$skipped" -gt 0 ]; then
    echo "$skipped skipped: set LLMPAR_TEST_DATA to the folder of the test data"
    echo "$passed passed, $failed failed, $skipped skipped"
else
    echo "$passed passed, $failed failed"
fi
[ "$failed" -eq 0 ]
