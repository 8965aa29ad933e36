#!/bin/bash
# The header's budget: prints what llmpar.h costs, and fails beyond the limits. make check-budget has made build/gen/llmpar.h.
header=build/gen/llmpar.h
lines=$(wc -l <$header)
bytes=$(wc -c <$header)
declarations=$(awk '/^#ifndef LLMPAR_H$/ { on = 1 } on { n++ } /^#endif \/\* LLMPAR_H \*\// { on = 0 } END { print n }' $header)
mkdir -p build/budget

# Seconds depend on the machine and on what else runs there. So they are counted in those of an idle 2.5 GHz core (Cascade Lake), where
# gcc 12 takes 1.5 s for the reference file; here it is compiled before and after each try, and the best of up to six tries counts.
reference=1.5
awk 'BEGIN {
    print "#include <stddef.h>"
    for (i = 0; i < 120; i++) printf "double f%d(double *a, const double *b, size_t n, int k) { double s = %d; for (size_t i = 0; i < n; i++) { a[i] = b[i] * s + a[(i * %d) %% n]; if (a[i] > s) s += a[i] / (k + 1); else switch (k & 7) { case 0: s -= b[i]; break; case 3: s *= 2; break; case 5: a[i] = s; break; default: k++; } } for (size_t i = 1; i < n; i *= 2) for (size_t j = i; j < n; j += 2 * i) a[j - i] += a[j] * b[j ^ i]; return s; }\n", i, i, 2 * i + 1
}' >build/budget/reference.c
TIMEFORMAT=%U
compile() { { time ${CC:-cc} -O2 "$@" -o build/budget/out.o 2>build/budget/log; } 2>&1; }
tenths=9999
for try in 1 2 3 4 5 6; do
    before=$(compile -c build/budget/reference.c)
    seconds=$(compile -x c -DLLMPAR_IMPLEMENTATION -c $header) || { cat build/budget/log; exit 1; }
    after=$(compile -c build/budget/reference.c)
    now=$(echo "$seconds $before $after $reference" | awk '{ printf "%d", $1 * $4 * 2 / ($2 + $3) * 10 + 0.5 }')
    printf 'implementation at -O2: %s s of processor time, the reference file %s and %s s\n' "$seconds" "$before" "$after"
    [ "$now" -ge "$tenths" ] || tenths=$now
    [ "$tenths" -gt 140 ] || break
done
failed=0

line()
{
    if [ "$2" -le "$3" ]; then verdict=ok; else verdict="OVER THE BUDGET"; failed=1; fi
    printf '%-36s %9s of %9s  %s\n' "$1" "$2" "$3" "$verdict"
}

line "llmpar.h, lines" "$lines" 30800
line "llmpar.h, bytes" "$bytes" 1771000
line "llmpar_cuda.h, lines" "$(wc -l <build/gen/llmpar_cuda.h)" 9000
line "llmpar_nccl.h, lines" "$(wc -l <build/gen/llmpar_nccl.h)" 3500
line "declarations, lines" "$declarations" 2600
# The aim is 10 s. Neighbours in the caches slow the implementation down more than the reference, which is smaller: up to half again was seen. So what is
# over the aim is said, and only what is over that too fails.
if [ "$tenths" -gt 100 ] && [ "$tenths" -le 140 ]; then echo "implementation at -O2: $((tenths / 10)).$((tenths % 10)) s, over the aim of 10 s: is this machine quiet?"; fi
line "implementation at -O2, 0.1 s" "$tenths" 140
exit $failed
