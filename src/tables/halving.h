/* halving: how ranks that exchange messages go on with the tree over the rank index (docs/exact.md): a reduce-scatter in which each step halves what a rank holds. Arithmetic only; for whoever writes a communicator.

   A node of the tree covers ranks [lo, lo+m) and has two parts: `left` of p ranks, the largest power of two below m, and `right` of q = m - p. The sum over a node is spread over its ranks: part j of the result (one a rank
   of the communicator) lies with rank lo + label(j). At the root label(j) = j, so that part j ends where it belongs; going down,
     label in the left part    c < p ? c : c - p
     label in the right part   c < p ? c mod q : c - p        (c: the label at the node)
   Going up, rank a of the left part keeps the parts with c = a and gives those with c = a + p to rank a of the right part; rank a of the right part keeps c = p + a and gives c = a, a + q, .. < p to those ranks of the left
   part. For powers of two that is recursive halving with the partners r^1, r^2, r^4 ..: log2 n exchanges, and (n-1)/n of the data.
       n = 4, rank 1 (parts 0 1 2 3):   0 2 -> rank 0, keeps 1 3 of (x0+x1)     1 keeps, 3 -> rank 3: part 1 of (x0+x1)+(x2+x3) */
#ifndef LLMPAR_HALVING_H
#define LLMPAR_HALVING_H

#include "base/heap.h"

/* A node above this rank. The parts with label c at it: c == mine are kept, and their other operand comes from `partner`; the others go to rank lo + c. */
typedef struct llmpar_halving_level {
    int32_t lo, p, q;
    int32_t left;         /* 1: this rank is in the left part, so its operand comes first */
    int32_t mine, partner;
} llmpar_halving_level;

/* One rank's way up. One block of the heap. */
typedef struct llmpar_halving {
    int32_t levels;
    int32_t most_kept, most_given; /* parts that this rank keeps and gives at a level, at most */
    llmpar_halving_level *level;   /* [levels], from the leaf up */
    int32_t *label;                /* [levels][ranks] of the parts */
    int32_t *kept;                 /* [ranks] scratch of the caller's: the parts that it still holds */
} llmpar_halving;

/* 1; 0: no memory, and nothing is held. 0 <= rank < ranks. Local. */
LLMPAR_API int llmpar_halving_make(llmpar_heap *heap, int32_t ranks, int32_t rank, llmpar_halving *out);
LLMPAR_API void llmpar_halving_free(llmpar_heap *heap, llmpar_halving *halving); /* a zeroed one is fine; local */

#endif
