/* mesh: ranks on named axes, tp innermost, and a communicator for every axis and for the flattened data axes. */
#ifndef LLMPAR_MESH_H
#define LLMPAR_MESH_H

#include "tables/comm.h"
#include "tables/ctx.h"

#define LLMPAR_MESH_AXES 5
typedef enum llmpar_axis { LLMPAR_AXIS_DP_REPLICATE = 0, LLMPAR_AXIS_DP_SHARD = 1, LLMPAR_AXIS_CP = 2, LLMPAR_AXIS_PP = 3, LLMPAR_AXIS_TP = 4 } llmpar_axis;

/* Degrees, torchtitan's names; 0 means 1. Their product must be the world size. cp and pp above 1 are refused by name. */
typedef struct llmpar_mesh_desc { int32_t dp_replicate, dp_shard, cp, pp, tp; } llmpar_mesh_desc;

typedef struct llmpar_mesh {
    llmpar_ctx *ctx;                          /* borrowed */
    int32_t degree[LLMPAR_MESH_AXES];         /* by llmpar_axis */
    int32_t coordinate[LLMPAR_MESH_AXES];     /* this rank's */
    llmpar_comm *comm[LLMPAR_MESH_AXES];      /* owned; one rank for axes of degree 1 */
    llmpar_comm *dp;                          /* owned; dp_replicate x dp_shard flattened, dp_shard fastest */
    llmpar_comm *world;                       /* ctx->comm, borrowed */
    int32_t dp_rank, dp_ranks;                /* flattened data coordinate */
    char where[48];                           /* "dp_shard=1 tp=0": axes with degree > 1, "" on one rank */
} llmpar_mesh;

LLMPAR_API const char *llmpar_axis_name(llmpar_axis axis); /* "dp_replicate", "dp_shard", "cp", "pp", "tp" */
/* Sets zero degrees to 1 and checks: LLMPAR_ERR_MESH with the degrees, their product and world if these differ; LLMPAR_ERR_UNSUPPORTED for cp, pp. Local. */
LLMPAR_API llmpar_status llmpar_mesh_desc_resolve(llmpar_mesh_desc *desc, int32_t world, llmpar_error *error);
/* Collective over the world. Also fills ctx->error.where for later errors of this rank. */
LLMPAR_API llmpar_status llmpar_mesh_create(llmpar_ctx *ctx, const llmpar_mesh_desc *desc, llmpar_mesh **out);
LLMPAR_API void llmpar_mesh_destroy(llmpar_mesh *mesh); /* local */
/* World rank of a coordinate. Local. */
LLMPAR_API int32_t llmpar_mesh_rank_at(const llmpar_mesh *mesh, const int32_t coordinate[LLMPAR_MESH_AXES]);
/* Writes a picture of the mesh (rows: data coordinates, columns: tp) into text, cut at capacity; returns bytes needed without the NUL. Local. */
LLMPAR_API size_t llmpar_mesh_print(const llmpar_mesh *mesh, char *text, size_t capacity);

#endif
