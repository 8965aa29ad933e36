/* redistribute: undoing the cuts, the last one first, one axis at a time.

     local --(last cut's axis)--> larger part --(..)--> full
   On each axis every owner broadcasts its part to the axis, and the receivers put it into its place in the next larger rectangle. A range (FLAT) and a cut of the outermost
   dim have one place, so the data is received where it belongs; other rectangles come by way of scratch. Empty parts are known to be empty on every rank and are not sent. */
#include "mesh/redistribute.h"

#include <string.h>

#include "base/size.h"

/* The cuts of a tensor on axes with more than one rank, in their order. */
typedef struct llmpar__redistribute_plan {
    int32_t cuts;
    int32_t placement[LLMPAR_MESH_AXES];
    llmpar_local rect[LLMPAR_MESH_AXES + 1]; /* rect[i]: this rank's rectangle after i cuts; rect[0] is the whole tensor */
} llmpar__redistribute_plan;

static void llmpar__redistribute_local(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, int32_t placements, const int32_t coordinate[LLMPAR_MESH_AXES], llmpar_local *out)
{
    llmpar_dtensor prefix = *tensor;
    prefix.placements = placements;
    llmpar_dtensor_local(&prefix, mesh->degree, coordinate, out);
}

static void llmpar__redistribute_make(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, llmpar__redistribute_plan *plan)
{
    plan->cuts = 0;
    llmpar__redistribute_local(tensor, mesh, 0, mesh->coordinate, &plan->rect[0]);
    for (int32_t i = 0; i < tensor->placements; i++) {
        const llmpar_placement *p = &tensor->placement[i];
        /* A Flat over one rank still moves the data to its offset in the shard, so it counts as a cut. */
        if (p->kind == LLMPAR_FLAT || (p->kind == LLMPAR_SHARD && mesh->degree[p->axis] > 1)) {
            plan->placement[plan->cuts++] = i;
            llmpar__redistribute_local(tensor, mesh, i + 1, mesh->coordinate, &plan->rect[plan->cuts]);
        }
    }
}

/* What `coordinate` holds after the cut of placement `index`. */
static void llmpar__redistribute_part(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, int32_t index, int32_t rank_on_axis, llmpar_local *out)
{
    int32_t coordinate[LLMPAR_MESH_AXES];
    memcpy(coordinate, mesh->coordinate, sizeof coordinate);
    coordinate[tensor->placement[index].axis] = rank_on_axis;
    llmpar__redistribute_local(tensor, mesh, index + 1, coordinate, out);
}

/* Does a part along `dim` lie in one piece in the larger rectangle? */
static int llmpar__redistribute_contiguous(const llmpar_local *whole, int32_t dim)
{
    for (int32_t d = 0; d < dim; d++)
        if (whole->shape[d] != 1) return 0;
    return 1;
}

/* Elements of the largest part that comes by way of scratch when cut `i` is undone. */
static int64_t llmpar__redistribute_staging(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, const llmpar__redistribute_plan *plan, int32_t i)
{
    const llmpar_placement *p = &tensor->placement[plan->placement[i]];
    int64_t most = 0;
    if (p->kind == LLMPAR_FLAT || llmpar__redistribute_contiguous(&plan->rect[i], p->dim)) return 0;
    for (int32_t r = 0; r < mesh->degree[p->axis]; r++) {
        llmpar_local part;
        llmpar__redistribute_part(tensor, mesh, plan->placement[i], r, &part);
        if (part.elements > most) most = part.elements;
    }
    return most;
}

/* Scratch: the rectangles between the first cut and the last, each in its own place, then the largest staging area. */
LLMPAR_DEF int64_t llmpar_dtensor_full_scratch(const llmpar_dtensor *tensor, const llmpar_mesh *mesh)
{
    llmpar__redistribute_plan plan;
    int64_t elements = 0, staging = 0;
    llmpar__redistribute_make(tensor, mesh, &plan);
    for (int32_t i = 0; i < plan.cuts; i++) {
        int64_t need = llmpar__redistribute_staging(tensor, mesh, &plan, i);
        if (i) elements += plan.rect[i].elements;
        if (need > staging) staging = need;
    }
    return elements + staging;
}

/* One owner's part to all ranks of its axis, into its place in `out`, the rectangle `whole`. `mine`: this rank's part, read where this rank is that owner. */
static llmpar_status llmpar__redistribute_send(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, llmpar_stream *stream, const llmpar_placement *p, const llmpar_local *whole, const llmpar_local *part,
                                               int32_t owner, const char *mine, char *staging, char *out)
{
    llmpar_device *device = mesh->ctx->device;
    llmpar_comm *comm = mesh->comm[p->axis];
    size_t item = llmpar_dtype_size(tensor->dtype);
    int64_t count = p->kind == LLMPAR_FLAT ? part->flat_count : part->elements, inner = 1, outer = 1, first = 0;
    if (!count) return LLMPAR_OK;
    int direct = p->kind == LLMPAR_FLAT || llmpar__redistribute_contiguous(whole, p->dim);
    if (p->kind == LLMPAR_SHARD) {
        for (int32_t d = 0; d < p->dim; d++) outer *= whole->shape[d];
        for (int32_t d = p->dim + 1; d < tensor->dims; d++) inner *= whole->shape[d];
        first = (part->offset[p->dim] - whole->offset[p->dim]) * inner;
    } else {
        first = part->flat_begin;
    }
    char *place = out + (size_t)first * item;
    int is_owner = comm->rank == owner;
    const char *from = is_owner ? mine : direct ? place : staging;
    if (comm->ranks > 1) {
        llmpar_collective call;
        memset(&call, 0, sizeof call);
        call.send = is_owner ? mine : NULL;
        call.recv = is_owner ? NULL : direct ? place : staging;
        call.count = (size_t)count;
        call.dtype = tensor->dtype;
        call.root = owner;
        call.tag = tensor->name;
        llmpar_status st = llmpar_broadcast(comm, stream, &call);
        if (st) return st;
    }
    if (direct) return is_owner ? device->copy(device, stream, place, from, (size_t)count * item) : LLMPAR_OK;
    llmpar_copy_rows_args rows;
    memset(&rows, 0, sizeof rows);
    rows.rows = outer;
    rows.width = rows.ld_in = part->shape[p->dim] * inner;
    rows.ld_out = whole->shape[p->dim] * inner;
    rows.size = item;
    rows.in = from;
    rows.out = place;
    return device->copy_rows(device, stream, &rows);
}

LLMPAR_DEF llmpar_status llmpar_dtensor_full(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, llmpar_stream *stream, const void *local, void *scratch, void *full)
{
    llmpar_device *device = mesh->ctx->device;
    size_t item = llmpar_dtype_size(tensor->dtype);
    const char *name = tensor->name ? tensor->name : "tensor";
    llmpar__redistribute_plan plan;
    llmpar_error error;
    llmpar_error_clear(&error);
    llmpar_status st = llmpar_dtensor_check(tensor, mesh->degree, &error);
    if (st) return llmpar_fail(mesh->ctx, st, "%s", error.text);
    for (int32_t i = 0; i < tensor->placements; i++) {
        const llmpar_placement *p = &tensor->placement[i];
        int partial = p->kind == LLMPAR_PARTIAL_SUM || p->kind == LLMPAR_PARTIAL_MAX, elsewhere = p->kind != LLMPAR_REPLICATE && p->axis != LLMPAR_AXIS_DP_SHARD && p->axis != LLMPAR_AXIS_TP;
        if ((partial || elsewhere) && mesh->degree[p->axis] > 1) {
            char placements[256];
            llmpar_dtensor_placements(tensor, placements, sizeof placements);
            return llmpar_fail(mesh->ctx, LLMPAR_ERR_UNSUPPORTED, "%s: %s cannot be made whole: expected Shard or Flat on dp_shard and tp only", name, placements);
        }
    }
    llmpar__redistribute_make(tensor, mesh, &plan);
    for (int32_t i = 0; i < tensor->placements; i++) { /* the check knows the smallest part only */
        const llmpar_placement *p = &tensor->placement[i];
        if (p->kind == LLMPAR_FLAT && plan.rect[plan.cuts].elements > p->unit_elements - p->offset)
            return llmpar_fail(mesh->ctx, LLMPAR_ERR_SHAPE, "%s: Flat on %s: %lld elements at offset %lld do not fit a unit of %lld", name, llmpar_axis_name(p->axis), (long long)plan.rect[plan.cuts].elements,
                               (long long)p->offset, (long long)p->unit_elements);
    }
    if (!plan.cuts) {
        if (plan.rect[0].elements && local != full) return device->copy(device, stream, full, local, (size_t)plan.rect[0].elements * item);
        return LLMPAR_OK;
    }
    char *staging = (char *)scratch;
    for (int32_t i = 1; i < plan.cuts; i++) staging += (size_t)plan.rect[i].elements * item;
    char *area = staging; /* the rectangles lie before it, the last cut's first */
    const char *mine = (const char *)local;
    for (int32_t i = plan.cuts - 1; i >= 0 && !st; i--) {
        const llmpar_placement *p = &tensor->placement[plan.placement[i]];
        if (i) area -= (size_t)plan.rect[i].elements * item;
        char *out = i ? area : (char *)full;
        int32_t replicas = p->kind == LLMPAR_SHARD && p->replicas > 1 ? p->replicas : 1;
        for (int32_t owner = 0; owner < mesh->degree[p->axis] && !st; owner += replicas) {
            llmpar_local part;
            llmpar__redistribute_part(tensor, mesh, plan.placement[i], owner, &part);
            const char *from = p->kind == LLMPAR_FLAT && owner == mesh->coordinate[p->axis] ? mine + (size_t)part.shard_begin * item : mine;
            st = llmpar__redistribute_send(tensor, mesh, stream, p, &plan.rect[i], &part, owner, from, staging, out);
        }
        mine = out;
    }
    return st;
}

LLMPAR_DEF void llmpar_dtensor_cut(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, const void *full, void *local)
{
    llmpar_local part;
    size_t item = llmpar_dtype_size(tensor->dtype);
    llmpar_dtensor_local(tensor, mesh->degree, mesh->coordinate, &part);
    char *out = (char *)local + (size_t)part.shard_begin * item;
    int64_t run = tensor->dims ? part.shape[tensor->dims - 1] : 1, at = part.flat_begin, end = part.flat_begin + part.flat_count;
    while (at < end) { /* a run of the rectangle's innermost dim at a time */
        int64_t length = run - at % run, rest = at / run, from = tensor->dims ? part.offset[tensor->dims - 1] + at % run : 0, stride = tensor->dims ? tensor->shape[tensor->dims - 1] : 1;
        if (length > end - at) length = end - at;
        for (int32_t d = tensor->dims - 2; d >= 0; d--) {
            from += (part.offset[d] + rest % part.shape[d]) * stride;
            rest /= part.shape[d];
            stride *= tensor->shape[d];
        }
        memcpy(out, (const char *)full + (size_t)from * item, (size_t)length * item);
        out += (size_t)length * item;
        at += length;
    }
}
