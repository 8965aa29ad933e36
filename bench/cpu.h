/* cpu: words of the command line that name what llmpar has: dispatch levels and types. */
#ifndef BENCH_CPU_H
#define BENCH_CPU_H

#include "llmpar.h"

#include "bench.h"

/* A level that this processor has. */
static inline llmpar_cpu_level bench_level(const char *name, const char *text)
{
    llmpar_cpu_level level = LLMPAR_CPU_DEFAULT;
    char expected[120] = "";
    for (int i = (int)LLMPAR_CPU_PORTABLE; i <= (int)llmpar_cpu_best_level(); i++)
        snprintf(expected + strlen(expected), sizeof expected - strlen(expected), "%s%s", expected[0] ? ", " : "one of ", llmpar_cpu_level_name((llmpar_cpu_level)i));
    if (!llmpar_cpu_level_parse(text, &level) || level > llmpar_cpu_best_level()) bench_refuse(name, text, expected);
    return level;
}

/* f32, bf16 or f16. */
static inline llmpar_dtype bench_dtype(const char *name, const char *text)
{
    static const llmpar_dtype all[] = { LLMPAR_F32, LLMPAR_BF16, LLMPAR_F16 };
    int i = 0;
    while (i < 3 && strcmp(text, llmpar_dtype_name(all[i]))) i++;
    if (i == 3) bench_refuse(name, text, "f32, bf16 or f16");
    return all[i % 3];
}

#endif
