/* cpu: the CPU device. Portable kernels are the readable specification (also in f64); faster levels are chosen at run time. */
#ifndef LLMPAR_CPU_H
#define LLMPAR_CPU_H

#include "base/heap.h"
#include "tables/device.h"

typedef enum llmpar_cpu_level { LLMPAR_CPU_DEFAULT = 0, LLMPAR_CPU_PORTABLE = 1, LLMPAR_CPU_AVX2 = 2, LLMPAR_CPU_AVX512 = 3,
    LLMPAR_CPU_AVX512BF16 = 4 /* AVX-512, whose products of BF16 (attention: with BF16) take two k at a time (vdpbf16ps) */ } llmpar_cpu_level;

/* Best level of this processor. Local, thread-safe. */
LLMPAR_API llmpar_cpu_level llmpar_cpu_best_level(void);
/* "portable", "avx2", "avx512", "avx512bf16"; "?" otherwise. */
LLMPAR_API const char *llmpar_cpu_level_name(llmpar_cpu_level level);
/* Parses a name as LLMPAR_CPU has it; 0 if unknown. */
LLMPAR_API int llmpar_cpu_level_parse(const char *text, llmpar_cpu_level *out);

typedef struct llmpar_cpu_desc {
    int32_t threads;          /* workers of this rank, the caller's thread included; default 1; results do not depend on it */
    llmpar_cpu_level level;   /* default: best */
    const int32_t *processors; /* [threads] borrowed: worker i stays on processor i of these, and what streams have of threads of their own on any of them; the caller's thread stays where it is. Default none: the
                                 system puts them where it likes */
    int32_t crowded;          /* 1: there are more threads than processors, so who waits gives its processor away at once; default: it looks for some microseconds first */
} llmpar_cpu_desc;

/* heap and error are borrowed and belong to the rank. LLMPAR_ERR_UNSUPPORTED if the processor lacks the level. Worker threads are named as the caller's thread with "w1" .. appended.
   Sets flush-to-zero state off on the workers. Local. */
LLMPAR_API llmpar_status llmpar_cpu_create(llmpar_heap *heap, llmpar_error *error, const llmpar_cpu_desc *desc, llmpar_device **out);
LLMPAR_API void llmpar_cpu_destroy(llmpar_device *device); /* waits for streams with threads, joins these and the workers */

#endif
