/* half: BF16 and F16 in memory. They are types of storage alone: a kernel computes in f32 on parts that are widened into scratch on its stack, and each store rounds once.
   So a kernel is written once, with the bits of its f32 self, and takes one part, the whole row where it lies, when nothing is to be widened:

     for (i0 = 0; i0 < d; i0 += part)  { x = read(x0 + i0, n, scratch);  out = target(y0 + i0, scratch2);  out[..] = f(x[..]);  write(y0 + i0, n, scratch2); }

   A part is whole groups of vectors, so that the lanes of a sum that goes on from part to part fall where they fall without parts. */
#ifndef LLMPAR_HALF_INTERNAL_H
#define LLMPAR_HALF_INTERNAL_H

#include "cpu/cpu_internal.h"

enum { LLMPAR__HALF_PART = 1024, LLMPAR__HALF_ROOM = 1024 + 80 }; /* scratch for a part; several at a distance of 4 KiB would wait for each other (loads and stores are told apart by 12 bits of the address first) */

/* How one type is stored. Neither function needs alignment; both have the bits of base/dtype.h at every level. */
typedef struct llmpar__half {
    int64_t size;                                               /* bytes of an element in memory */
    void (*widen)(float *out, const void *in, int64_t count);   /* NULL, as is narrow: F32 or F64, which kernels use where they lie */
    void (*narrow)(void *out, const float *in, int64_t count);
    void (*widen_factors)(float *out, const void *in, int64_t count); /* widen, but a signalling NaN may stay one: arithmetic, or narrow, makes it quiet */
} llmpar__half;

LLMPAR__PRIVATE llmpar__half llmpar__half_of(const llmpar__cpu *cpu, llmpar_dtype dtype);
/* Whether this processor has F16C; asked once, by the device's creation. */
LLMPAR__PRIVATE int llmpar__half_has_f16c(void);

static inline int64_t llmpar__half_part(const llmpar__half *half, int64_t count) { return half->widen ? (int64_t)LLMPAR__HALF_PART : count > 0 ? count : 1; }
/* Elements [index, index + count) of base, widened into scratch if need be. Called once a part: a copy in every kernel would only cost compilers time. */
static __attribute__((noinline, unused)) const void *llmpar__half_read(const llmpar__half *half, const void *base, int64_t index, int64_t count, float *scratch)
{
    const char *at = (const char *)base + index * half->size;
    if (!half->widen) return at;
    half->widen_factors(scratch, at, count);
    return scratch;
}
/* Where a kernel puts what goes to element `index` of base and on; write takes it there. */
static inline void *llmpar__half_target(const llmpar__half *half, void *base, int64_t index, float *scratch)
{
    return half->widen ? (void *)scratch : (void *)((char *)base + index * half->size);
}
static __attribute__((noinline, unused)) void llmpar__half_write(const llmpar__half *half, void *base, int64_t index, int64_t count, const float *scratch)
{
    if (half->narrow) half->narrow((char *)base + index * half->size, scratch, count);
}

#endif
