/* mesh_internal: what the files of this room share. */
#ifndef LLMPAR_MESH_INTERNAL_H
#define LLMPAR_MESH_INTERNAL_H

#include "base/text_internal.h"
#include "mesh/dtensor.h"
#include "mesh/mesh.h"

/* The coordinate of a world rank. */
LLMPAR__PRIVATE void llmpar__mesh_coordinate(const int32_t degree[LLMPAR_MESH_AXES], int32_t rank, int32_t coordinate[LLMPAR_MESH_AXES]);
/* "wq f32[8,6]" */
LLMPAR__PRIVATE void llmpar__mesh_put_tensor(llmpar__text *out, const llmpar_dtensor *tensor);
/* " dp_shard=1 tp=0": the axes of more than one rank. */
LLMPAR__PRIVATE void llmpar__mesh_put_coordinate(llmpar__text *out, const int32_t degree[LLMPAR_MESH_AXES], const int32_t coordinate[LLMPAR_MESH_AXES]);

/* A box of the global tensor, dim d from begin[d] to end[d]. What a rank holds (a range of a rectangle's row-major elements) is a few of them, in row-major order:

     . . # #    the range [2, 11) of a rectangle of 4 x 4: the rest of a row, whole rows, the start of a row
     # # # #
     # # # .
     . . . .                                                                                               */
typedef struct llmpar__box { int64_t begin[LLMPAR_MAX_DIMS], end[LLMPAR_MAX_DIMS]; } llmpar__box;
#define LLMPAR__BOXES (2 * LLMPAR_MAX_DIMS - 1)
/* The non-empty boxes of `part`; returns how many. */
LLMPAR__PRIVATE int32_t llmpar__mesh_boxes(const llmpar_local *part, int32_t dims, llmpar__box box[LLMPAR__BOXES]);
/* The common boxes of two parts; returns how many, *volume = their elements together. Two parts that meet in the same boxes on two ranks list them in the same order. */
LLMPAR__PRIVATE int32_t llmpar__mesh_common(const llmpar_local *a, const llmpar_local *b, int32_t dims, llmpar__box box[LLMPAR__BOXES * LLMPAR__BOXES], int64_t *volume);

/* What this rank holds. */
static inline void llmpar__mesh_local(const llmpar_mesh *mesh, const llmpar_dtensor *tensor, llmpar_local *out) { llmpar_dtensor_local(tensor, mesh->degree, mesh->coordinate, out); }

#endif
