/* half: BF16 and F16 in memory, for products and attention, whose kernels compute in f32 on parts that are widened into a scratch, or packed, first; each store rounds once. Kernels that go over rows widen
   and round in registers (vector_math.inc: get and put). */
#ifndef LLMPAR_HALF_INTERNAL_H
#define LLMPAR_HALF_INTERNAL_H

#include "cpu/cpu_internal.h"

/* How one type is stored. Neither function needs alignment; both have the bits of base/dtype.h at every level. */
typedef struct llmpar__half {
    int64_t size;                                               /* bytes of an element in memory */
    void (*widen)(float *out, const void *in, int64_t count);   /* NULL, as is narrow: F32 or F64, which kernels use where they lie. A signalling NaN may stay one: arithmetic, or narrow, makes it quiet */
    void (*narrow)(void *out, const float *in, int64_t count);
} llmpar__half;

LLMPAR__PRIVATE llmpar__half llmpar__half_of(const llmpar__cpu *cpu, llmpar_dtype dtype);
/* Whether this processor has F16C; asked once, by the device's creation. */
LLMPAR__PRIVATE int llmpar__half_has_f16c(void);

/* Elements [index, index + count) of base, widened into scratch if need be. Called once a part: a copy in every kernel would only cost compilers time. */
static __attribute__((noinline, unused)) const void *llmpar__half_read(const llmpar__half *half, const void *base, int64_t index, int64_t count, float *scratch)
{
    const char *at = (const char *)base + index * half->size;
    if (!half->widen) return at;
    half->widen(scratch, at, count);
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
