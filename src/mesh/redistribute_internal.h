/* redistribute_internal: what planning (redistribute_plan.c) and moving (redistribute.c) share: who sends what to whom. */
#ifndef LLMPAR_REDISTRIBUTE_INTERNAL_H
#define LLMPAR_REDISTRIBUTE_INTERNAL_H

#include "mesh/mesh_internal.h"
#include "mesh/redistribute.h"

/* The roles of the axes in a request. Ranks of an axis form groups of `group` neighbours that hold the same part; a rank takes what it needs from the rank that has its own place in each group:

     from: Shard(0) x 2 replicas on tp 4    tp 0 | tp 1 | tp 2 | tp 3      group 2: tp 3 takes the first part from tp 1, tp 2 from tp 0
                                            first part  | second part
   An axis to be reduced has groups of one: a rank takes from all its coordinates. */
typedef struct llmpar__redistribute_pair {
    const llmpar_dtensor *from, *to;
    const int32_t *degree;
    int32_t ranks, reductions;
    int32_t reduced[LLMPAR_MESH_AXES];                                     /* placements of `from` to be reduced, in list order */
    int32_t from_group[LLMPAR_MESH_AXES], to_group[LLMPAR_MESH_AXES];      /* by axis */
    int32_t kept[LLMPAR_MESH_AXES], fresh[LLMPAR_MESH_AXES];               /* by axis: Partial stays; Partial(sum) whose value stands at coordinate 0 */
    int64_t contributions;                                                 /* to each element: product of the reduced axes' degrees */
} llmpar__redistribute_pair;

LLMPAR__PRIVATE void llmpar__redistribute_pair_make(const llmpar_dtensor *from, const llmpar_dtensor *to, const int32_t degree[LLMPAR_MESH_AXES], llmpar__redistribute_pair *pair);
/* Does `receiver` take from `sender` what that holds (and it needs)? */
LLMPAR__PRIVATE int llmpar__redistribute_serves(const llmpar__redistribute_pair *pair, const int32_t sender[LLMPAR_MESH_AXES], const int32_t receiver[LLMPAR_MESH_AXES]);
/* Does the rank need its part of `to`? home: is it also the first of the ranks that need the same? */
LLMPAR__PRIVATE int llmpar__redistribute_needs(const llmpar__redistribute_pair *pair, const int32_t coordinate[LLMPAR_MESH_AXES], int home);
/* What a coordinate holds after the first `placements` placements. */
LLMPAR__PRIVATE void llmpar__redistribute_local(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], int32_t placements, const int32_t coordinate[LLMPAR_MESH_AXES], llmpar_local *out);
/* The placements that do something on this mesh: Partial first, then the cuts. The parts are the same, but a Flat over one rank is gone: they begin at 0. */
LLMPAR__PRIVATE void llmpar__redistribute_normal(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], llmpar_dtensor *out);
/* Is the last placement an even cut of what this coordinate's axis held before it, part r at rank r? Then the larger part is [blocks][ranks][count]. */
LLMPAR__PRIVATE int llmpar__redistribute_even(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], const int32_t coordinate[LLMPAR_MESH_AXES], size_t *blocks, size_t *count);

#endif
