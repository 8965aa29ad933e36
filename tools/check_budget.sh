#!/bin/sh
# The header's budget: prints what llmpar.h costs, and fails beyond the limits. make check-budget has made build/gen/llmpar.h.
header=build/gen/llmpar.h
lines=$(wc -l <$header)
bytes=$(wc -c <$header)
declarations=$(awk '/^#ifndef LLMPAR_H$/ { on = 1 } on { n++ } /^#endif \/\* LLMPAR_H \*\// { on = 0 } END { print n }' $header)
mkdir -p build/budget
start=$(date +%s%N)
${CC:-cc} -O2 -x c -DLLMPAR_IMPLEMENTATION -c $header -o build/budget/llmpar.o || exit 1
tenths=$((($(date +%s%N) - start) / 100000000))
failed=0

line()
{
    if [ "$2" -le "$3" ]; then verdict=ok; else verdict="OVER THE BUDGET"; failed=1; fi
    printf '%-36s %9s of %9s  %s\n' "$1" "$2" "$3" "$verdict"
}

line "llmpar.h, lines" "$lines" 20000
line "llmpar.h, bytes" "$bytes" 1048576
line "declarations, lines" "$declarations" 1800
line "implementation at -O2, 0.1 s" "$tenths" 100
exit $failed
