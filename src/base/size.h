/* size: checked integer arithmetic, and the two rules of docs/exact.md that cut extents and shape trees. */
#ifndef LLMPAR_SIZE_H
#define LLMPAR_SIZE_H

#include "base/platform.h"

/* Each returns 1 and stores the result, or returns 0 and leaves *out alone when it would overflow. */
LLMPAR_API int llmpar_size_mul(size_t a, size_t b, size_t *out);
LLMPAR_API int llmpar_size_add(size_t a, size_t b, size_t *out);
/* Product of `count` non-negative extents; 0 on a negative extent or on overflow of int64_t. count 0 gives 1. */
LLMPAR_API int llmpar_extent_product(const int64_t *extents, int count, int64_t *out);
/* Smallest multiple of `unit` (> 0) that is >= value. The caller made sure that it fits. */
LLMPAR_API int64_t llmpar_round_up(int64_t value, int64_t unit);
LLMPAR_API int llmpar_is_pow2(int64_t value); /* 1, 2, 4, ...: yes; 0 and negatives: no */

/* First grain of piece i when `grains` are cut into `pieces`: floor(i * grains / pieces), 0 <= i <= pieces. The same rule
   cuts a tensor dim over the ranks of a mesh axis, which is why a rank boundary is a piece boundary whenever ranks divide
   pieces: floor(r*G/n) == floor((r*(C/n))*G/C). No overflow for grains < 2^40, pieces < 2^20. */
LLMPAR_API int64_t llmpar_piece_begin(int64_t i, int64_t grains, int64_t pieces);

/* Where a balanced tree over n >= 2 leaves splits: the largest power of two below n (left part [0, split)). */
LLMPAR_API int64_t llmpar_tree_split(int64_t n);

#endif
