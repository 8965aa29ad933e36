/* dtensor: which part of a global tensor a rank holds. Local arithmetic only: no communication, no allocation. */
#ifndef LLMPAR_DTENSOR_H
#define LLMPAR_DTENSOR_H

#include "base/dtype.h"
#include "mesh/mesh.h"

#define LLMPAR_MAX_DIMS 4

typedef enum llmpar_placement_kind { LLMPAR_REPLICATE = 0, LLMPAR_SHARD = 1, LLMPAR_PARTIAL_SUM = 2, LLMPAR_PARTIAL_MAX = 3, LLMPAR_FLAT = 4 } llmpar_placement_kind;

/* How one mesh axis treats a tensor.
   SHARD: dim `dim` is cut in grains of `grain` elements (0 = 1; a head for q, k, v) by llmpar_piece_begin over parts = degree / replicas; rank r holds part r / replicas (replicas 0 = 1; above 1 for
   kv heads where tp > kv heads).
   PARTIAL: every coordinate holds a contribution of the whole (of what other cuts leave); the tensor is their sum or max, in the balanced tree over the coordinate. Several are undone like cuts, the last listed first.
   FLAT: the row-major local tensor left by the earlier cuts is a slice [offset, offset + elements) of a unit's flat buffer of `unit_elements`, cut evenly over the axis. */
typedef struct llmpar_placement {
    llmpar_placement_kind kind;
    llmpar_axis axis;
    int32_t dim, replicas;
    int64_t grain;
    int64_t offset, unit_elements;
} llmpar_placement;

/* Placements in the order of cutting: tp first, then Flat over dp_shard. Axes not named replicate. Plain data; name is borrowed. */
typedef struct llmpar_dtensor {
    const char *name;
    llmpar_dtype dtype;
    int32_t dims, placements;
    int64_t shape[LLMPAR_MAX_DIMS];          /* global */
    llmpar_placement placement[LLMPAR_MESH_AXES];
} llmpar_dtensor;

/* The rectangular part (all SHARD placements applied) a coordinate holds, and within its row-major elements the FLAT range. Extents may be 0. */
typedef struct llmpar_local {
    int64_t shape[LLMPAR_MAX_DIMS], offset[LLMPAR_MAX_DIMS]; /* rectangle in the global tensor */
    int64_t elements;                                        /* of the rectangle */
    int64_t flat_begin, flat_count;                          /* part of the rectangle's elements held after FLAT (all of it without FLAT) */
    int64_t shard_begin;                                     /* where that part begins in the rank's flat shard (0 without FLAT) */
    int is_owner;                                            /* coordinate 0 of every axis that replicates (parts): counts once in norms and files */
} llmpar_local;

/* Checks shape, dims, axes named twice, grain dividing the dim, replicas dividing the degree, flat bounds. LLMPAR_ERR_SHAPE. Local. */
LLMPAR_API llmpar_status llmpar_dtensor_check(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], llmpar_error *error);
/* What `coordinate` holds of a checked tensor. Local. */
LLMPAR_API void llmpar_dtensor_local(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], const int32_t coordinate[LLMPAR_MESH_AXES], llmpar_local *out);
/* Where element `element` of a rectangle (row-major) stands in the whole tensor, and how many from it on follow one another in both. Local. */
LLMPAR_API int64_t llmpar_dtensor_run(const llmpar_dtensor *tensor, const llmpar_local *local, int64_t element, int64_t *run);
/* "[Shard(0) on tp, Flat(128) on dp_shard]" into text; returns bytes needed. Local. */
LLMPAR_API size_t llmpar_dtensor_placements(const llmpar_dtensor *tensor, char *text, size_t capacity);
/* Picture of a checked tensor: a line per rank with its rectangle, flat range and bytes, and for 1-D/2-D a table of ranks whose rows and columns are labelled with their elements and the coordinates that
   hold them (as torch's and jax's visualize_sharding do). Cut at capacity; returns bytes needed without the NUL. Local. */
LLMPAR_API size_t llmpar_dtensor_print(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, char *text, size_t capacity);
/* The same picture as an SVG document; each cell has the id "cell-ROW-COLUMN" and data-ranks, each legend line "rank-N". A tensor of other dims, or without elements, has the legend only. Local. */
LLMPAR_API size_t llmpar_dtensor_svg(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, char *text, size_t capacity);

#endif
