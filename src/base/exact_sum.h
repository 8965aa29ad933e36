/* exact_sum: an order-free, exact sum of doubles (Kulisch's long accumulator in 32-bit limbs held in int64).
   Adding limbs of two accumulators as integers merges them, so ranks combine by an i64 sum all-reduce in any order and every mesh gets the same bits. */
#ifndef LLMPAR_EXACT_SUM_H
#define LLMPAR_EXACT_SUM_H

#include "base/platform.h"

/* limb[i] has weight 2^(32*i - 1088), i < 67; the last three count +inf, -inf and NaN terms. All zero = empty sum. At most 2^30 additions
   (merged ones counted) before llmpar_exact_sum_carry. */
#define LLMPAR_EXACT_SUM_LIMBS 72
typedef struct llmpar_exact_sum { int64_t limb[LLMPAR_EXACT_SUM_LIMBS]; } llmpar_exact_sum;

LLMPAR_API void llmpar_exact_sum_add(llmpar_exact_sum *sum, double value);
/* Adds value[i]^2, i < count, each square exact (a product of two floats fits a double). Carries by itself. */
LLMPAR_API void llmpar_exact_sum_add_squares_f32(llmpar_exact_sum *sum, const float *value, size_t count);
LLMPAR_API void llmpar_exact_sum_merge(llmpar_exact_sum *sum, const llmpar_exact_sum *other);
/* Normalises limbs to 32 bits; the value is unchanged. */
LLMPAR_API void llmpar_exact_sum_carry(llmpar_exact_sum *sum);
/* The sum rounded once to the nearest double, ties to even; inf/NaN as IEEE addition would give; an empty or zero sum is +0. Does not change *sum. */
LLMPAR_API double llmpar_exact_sum_value(const llmpar_exact_sum *sum);

#endif
