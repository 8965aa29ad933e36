/* mesh: world ranks on five named axes, and the communicators along them. */
#include "mesh/mesh_internal.h"

#include <stdio.h>
#include <string.h>
#if defined(__linux__)
#include <sys/prctl.h>
#endif

LLMPAR_DEF const char *llmpar_axis_name(llmpar_axis axis)
{
    static const char *const names[] = { "dp_replicate", "dp_shard", "cp", "pp", "tp" };
    return (unsigned)axis < LLMPAR_MESH_AXES ? names[axis] : "?";
}

LLMPAR_DEF llmpar_status llmpar_mesh_desc_resolve(llmpar_mesh_desc *desc, int32_t world, llmpar_error *error)
{
    int32_t *const degree[LLMPAR_MESH_AXES] = { &desc->dp_replicate, &desc->dp_shard, &desc->cp, &desc->pp, &desc->tp };
    int64_t product = 1;
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) {
        if (*degree[a] == 0) *degree[a] = 1;
        if (*degree[a] < 0) return llmpar_error_set(error, LLMPAR_ERR_MESH, "mesh: %s = %d, expected a degree of at least 1", llmpar_axis_name((llmpar_axis)a), (int)*degree[a]);
    }
    for (int a = LLMPAR_AXIS_CP; a <= LLMPAR_AXIS_PP; a++)
        if (*degree[a] > 1) return llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "mesh: %s = %d: this axis is reserved and not built yet, expected 1", llmpar_axis_name((llmpar_axis)a), (int)*degree[a]);
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) product *= product > INT32_MAX ? 1 : *degree[a]; /* too large already: no overflow */
    if (product != world)
        return llmpar_error_set(error, LLMPAR_ERR_MESH, "mesh: dp_replicate %d x dp_shard %d x cp %d x pp %d x tp %d = %s%lld ranks, but the world has %d", (int)desc->dp_replicate,
                                (int)desc->dp_shard, (int)desc->cp, (int)desc->pp, (int)desc->tp, product > INT32_MAX ? "more than " : "", (long long)(product > INT32_MAX ? INT32_MAX : product), (int)world);
    return LLMPAR_OK;
}

LLMPAR_DEF int32_t llmpar_mesh_rank_at(const llmpar_mesh *mesh, const int32_t coordinate[LLMPAR_MESH_AXES])
{
    int32_t rank = 0;
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) rank = rank * mesh->degree[a] + coordinate[a];
    return rank;
}

LLMPAR__PRIVATE_DEF void llmpar__mesh_put_coordinate(llmpar__text *out, const int32_t degree[LLMPAR_MESH_AXES], const int32_t coordinate[LLMPAR_MESH_AXES])
{
    for (int a = 0; a < LLMPAR_MESH_AXES; a++)
        if (degree[a] > 1) llmpar__text_put(out, " %s=%d", llmpar_axis_name((llmpar_axis)a), (int)coordinate[a]);
}

LLMPAR__PRIVATE_DEF void llmpar__mesh_coordinate(const int32_t degree[LLMPAR_MESH_AXES], int32_t rank, int32_t coordinate[LLMPAR_MESH_AXES])
{
    for (int a = LLMPAR_MESH_AXES - 1; a >= 0; a--) {
        coordinate[a] = rank % degree[a];
        rank /= degree[a];
    }
}

/* Thread names are for debuggers: "r3" becomes "r3 tp1", and only where launch has given that name. */
static void llmpar__mesh_name_thread(const llmpar_mesh *mesh)
{
#if defined(__linux__)
    char now[16], plain[16], full[32];
    memset(now, 0, sizeof now);
    snprintf(plain, sizeof plain, "r%d", (int)mesh->ctx->rank);
    if (mesh->degree[LLMPAR_AXIS_TP] == 1 || prctl(PR_GET_NAME, now, 0, 0, 0) || strcmp(now, plain)) return;
    snprintf(full, sizeof full, "r%d tp%d", (int)mesh->ctx->rank, (int)mesh->coordinate[LLMPAR_AXIS_TP]);
    prctl(PR_SET_NAME, full, 0, 0, 0); /* the kernel cuts at 15 characters */
#else
    (void)mesh;
#endif
}

LLMPAR_DEF llmpar_status llmpar_mesh_create(llmpar_ctx *ctx, const llmpar_mesh_desc *given, llmpar_mesh **out)
{
    *out = NULL;
    if (!given) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "mesh: no desc, expected degrees (0: 1)");
    llmpar_mesh_desc desc = *given;
    LLMPAR__NO_ERROR(error);
    llmpar_status st = llmpar_mesh_desc_resolve(&desc, ctx->world, &error);
    if (st) return llmpar_fail(ctx, st, "%s", error.text);
    const llmpar_device *device = ctx->device; /* whoever brings an own one is told here, before anything is called */
    if (device->abi != LLMPAR_DEVICE_ABI || device->size < sizeof *device)
        return llmpar_fail(ctx, LLMPAR_ERR_ABI, "mesh: device table with abi %u and %u bytes, expected abi %u and at least %lu bytes", (unsigned)device->abi, (unsigned)device->size, LLMPAR_DEVICE_ABI, (unsigned long)sizeof *device);
    llmpar_mesh *mesh = LLMPAR__ZALLOC(llmpar_mesh, &ctx->heap, 1);
    if (!mesh) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "mesh: out of memory");
    mesh->ctx = ctx;
    mesh->world = ctx->comm;
    int32_t *const degree = mesh->degree;
    degree[LLMPAR_AXIS_DP_REPLICATE] = desc.dp_replicate;
    degree[LLMPAR_AXIS_DP_SHARD] = desc.dp_shard;
    degree[LLMPAR_AXIS_CP] = desc.cp;
    degree[LLMPAR_AXIS_PP] = desc.pp;
    degree[LLMPAR_AXIS_TP] = desc.tp;
    llmpar__mesh_coordinate(degree, ctx->rank, mesh->coordinate);
    mesh->dp_ranks = degree[LLMPAR_AXIS_DP_REPLICATE] * degree[LLMPAR_AXIS_DP_SHARD];
    mesh->dp_rank = mesh->coordinate[LLMPAR_AXIS_DP_REPLICATE] * degree[LLMPAR_AXIS_DP_SHARD] + mesh->coordinate[LLMPAR_AXIS_DP_SHARD];
    char where[sizeof mesh->where + 1] = "";
    llmpar__text place = llmpar__text_begin(where, sizeof where);
    llmpar__mesh_put_coordinate(&place, degree, mesh->coordinate);
    if (place.used) memcpy(mesh->where, where + 1, sizeof mesh->where); /* without the blank before it */
    if (ctx->error.status == LLMPAR_OK) memcpy(ctx->error.where, mesh->where, sizeof mesh->where);
    llmpar__mesh_name_thread(mesh);

    /* The ranks of an axis share all other coordinates: the color is the world rank at coordinate 0. */
    for (int a = 0; a <= LLMPAR_MESH_AXES && !st; a++) {
        int32_t first[LLMPAR_MESH_AXES];
        memcpy(first, mesh->coordinate, sizeof first);
        int flat = a == LLMPAR_MESH_AXES;
        if (flat) first[LLMPAR_AXIS_DP_REPLICATE] = first[LLMPAR_AXIS_DP_SHARD] = 0;
        else first[a] = 0;
        st = llmpar_comm_split(ctx->comm, llmpar_mesh_rank_at(mesh, first), flat ? mesh->dp_rank : mesh->coordinate[a], flat ? "dp" : llmpar_axis_name((llmpar_axis)a), flat ? &mesh->dp : &mesh->comm[a]);
    }
    if (st) llmpar_mesh_destroy(mesh);
    else *out = mesh;
    return st;
}

LLMPAR_DEF void llmpar_mesh_destroy(llmpar_mesh *mesh)
{
    if (!mesh) return;
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) llmpar_comm_destroy(mesh->comm[a]);
    llmpar_comm_destroy(mesh->dp);
    llmpar_heap_free(&mesh->ctx->heap, mesh);
}

/* mesh: dp_replicate 1 x dp_shard 2 x tp 2 = 4 ranks

                         tp 0   tp 1
      dp_shard 0       |    0 |    1 |
      dp_shard 1       |    2 |   [3]|   <- this rank                                             */
LLMPAR_DEF size_t llmpar_mesh_print(const llmpar_mesh *mesh, char *text, size_t capacity)
{
    llmpar__text out = llmpar__text_begin(text, capacity);
    const int32_t *degree = mesh->degree;
    llmpar__text_put(&out, "mesh: dp_replicate %d x dp_shard %d x tp %d = %d ranks, this is rank %d\n\n%26s", (int)degree[LLMPAR_AXIS_DP_REPLICATE], (int)degree[LLMPAR_AXIS_DP_SHARD],
                        (int)degree[LLMPAR_AXIS_TP], (int)mesh->ctx->world, (int)mesh->ctx->rank, "");
    for (int32_t t = 0; t < degree[LLMPAR_AXIS_TP]; t++) llmpar__text_put(&out, "  tp %-3d", (int)t);
    llmpar__text_put(&out, "\n");
    int32_t at[LLMPAR_MESH_AXES] = { 0, 0, 0, 0, 0 };
    for (at[0] = 0; at[0] < degree[0]; at[0]++)
        for (at[1] = 0; at[1] < degree[1]; at[1]++) {
            char row[64];
            if (degree[0] > 1) snprintf(row, sizeof row, "dp_replicate %d dp_shard %d", (int)at[0], (int)at[1]);
            else snprintf(row, sizeof row, "dp_shard %d", (int)at[1]);
            llmpar__text_put(&out, "  %-24s|", row);
            for (at[4] = 0; at[4] < degree[4]; at[4]++) {
                int32_t rank = llmpar_mesh_rank_at(mesh, at);
                char cell[16];
                snprintf(cell, sizeof cell, rank == mesh->ctx->rank ? "[%d]" : " %d ", (int)rank);
                llmpar__text_put(&out, "%6s|", cell);
            }
            llmpar__text_put(&out, "\n");
        }
    return out.used;
}
