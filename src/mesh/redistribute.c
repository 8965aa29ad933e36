/* redistribute: carrying out a plan, and undoing the cuts of a tensor for who wants it whole.

   Inside, a part is what a rank holds and nothing else: pointers to flat shards are moved to the tensor's range first. Between two steps it lies in scratch. */
#include "mesh/redistribute_internal.h"

#include <string.h>

#include "base/size.h"
#include "tables/tables_internal.h"

/* ---- boxes ---- */

/* Moves a box between two parts. Dims that lie without a gap in both are merged, so that most boxes are one call. */
static llmpar_status llmpar__redistribute_copy(llmpar_device *device, llmpar_stream *stream, size_t item, int32_t dims, const llmpar__box *box, const llmpar_local *from, const char *in, const llmpar_local *to, char *out)
{
    int64_t length[LLMPAR_MAX_DIMS + 1], ld_in[LLMPAR_MAX_DIMS + 1], ld_out[LLMPAR_MAX_DIMS + 1]; /* innermost first */
    int64_t step_in = 1, step_out = 1, at_in = -from->flat_begin, at_out = -to->flat_begin, calls = 1;
    int32_t levels = 1;
    llmpar_status st = LLMPAR_OK;
    length[0] = ld_in[0] = ld_out[0] = 1;
    for (int32_t d = dims - 1; d >= 0; d--) {
        int64_t extent = box->end[d] - box->begin[d];
        at_in += (box->begin[d] - from->offset[d]) * step_in;
        at_out += (box->begin[d] - to->offset[d]) * step_out;
        if (extent != 1 && step_in == length[levels - 1] * ld_in[levels - 1] && step_out == length[levels - 1] * ld_out[levels - 1]) {
            length[levels - 1] *= extent;
        } else if (extent != 1) {
            length[levels] = extent;
            ld_in[levels] = step_in;
            ld_out[levels++] = step_out;
        }
        step_in *= from->shape[d];
        step_out *= to->shape[d];
    }
    LLMPAR__ZEROED(llmpar_copy_rows_args, rows);
    rows.width = length[0];
    rows.rows = levels > 1 ? length[1] : 1;
    rows.ld_in = levels > 1 ? ld_in[1] : length[0];
    rows.ld_out = levels > 1 ? ld_out[1] : length[0];
    rows.size = item;
    for (int32_t i = 2; i < levels; i++) calls *= length[i];
    for (int64_t call = 0; call < calls && !st; call++) {
        int64_t rest = call, i = at_in, o = at_out;
        for (int32_t level = 2; level < levels; level++) {
            i += rest % length[level] * ld_in[level];
            o += rest % length[level] * ld_out[level];
            rest /= length[level];
        }
        rows.in = in + (size_t)i * item;
        rows.out = out + (size_t)o * item;
        st = levels == 1 ? device->copy(device, stream, out + (size_t)o * item, rows.in, (size_t)length[0] * item) : device->copy_rows(device, stream, &rows);
    }
    return st;
}

/* What two parts have in common, box after box: into `packed` (pack), out of it (unpack), or straight across (packed NULL). */
static llmpar_status llmpar__redistribute_boxes(const llmpar_mesh *mesh, llmpar_stream *stream, const llmpar_dtensor *tensor, const llmpar_local *from, const char *in, const llmpar_local *to, char *out, char *packed)
{
    llmpar__box box[LLMPAR__BOXES * LLMPAR__BOXES];
    size_t item = llmpar_dtype_size(tensor->dtype);
    int64_t volume;
    int32_t boxes = llmpar__mesh_common(from, to, tensor->dims, box, &volume);
    llmpar_status st = LLMPAR_OK;
    for (int32_t i = 0; i < boxes && !st; i++) {
        LLMPAR__ZEROED(llmpar_local, piece); /* the box as a part of its own */
        int64_t elements = 1;
        for (int32_t d = 0; d < tensor->dims; d++) {
            piece.offset[d] = box[i].begin[d];
            piece.shape[d] = box[i].end[d] - box[i].begin[d];
            elements *= piece.shape[d];
        }
        st = llmpar__redistribute_copy(mesh->ctx->device, stream, item, tensor->dims, &box[i], packed && !in ? &piece : from, packed && !in ? packed : in, packed && in ? &piece : to, packed && in ? packed : out);
        if (packed) packed += (size_t)elements * item;
    }
    return st;
}

static int64_t llmpar__redistribute_volume(const llmpar_dtensor *tensor, const llmpar_local *a, const llmpar_local *b)
{
    llmpar__box box[LLMPAR__BOXES * LLMPAR__BOXES];
    int64_t volume;
    llmpar__mesh_common(a, b, tensor->dims, box, &volume);
    return volume;
}

/* ---- the table's collectives ---- */

/* What `coordinate` would hold at another place of its axis. */
static void llmpar__redistribute_part(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], const int32_t coordinate[LLMPAR_MESH_AXES], llmpar_axis axis, int32_t place, llmpar_local *out)
{
    int32_t at[LLMPAR_MESH_AXES];
    memcpy(at, coordinate, sizeof at);
    at[axis] = place;
    llmpar_dtensor_local(tensor, degree, at, out);
}

/* Does a part of the last cut lie in one piece in the larger rectangle? */
static int llmpar__redistribute_direct(const llmpar_dtensor *tensor, const llmpar_local *whole)
{
    const llmpar_placement *cut = &tensor->placement[tensor->placements - 1];
    for (int32_t d = 0; cut->kind == LLMPAR_SHARD && d < cut->dim; d++)
        if (whole->shape[d] != 1) return 0;
    return 1;
}

/* Undoes the last cut. A range (FLAT) and a cut of the outermost dim are received where they belong, others by way of `staging`. Empty parts are known to be empty on every rank and are not sent. */
static llmpar_status llmpar__redistribute_broadcasts(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, llmpar_stream *stream, const char *in, char *staging, char *out)
{
    const llmpar_placement *cut = &tensor->placement[tensor->placements - 1];
    llmpar_comm *comm = mesh->comm[cut->axis];
    int32_t replicas = cut->kind == LLMPAR_SHARD && cut->replicas > 1 ? cut->replicas : 1;
    llmpar_local whole, part;
    llmpar_status st = LLMPAR_OK;
    llmpar__redistribute_local(tensor, mesh->degree, tensor->placements - 1, mesh->coordinate, &whole);
    int direct = llmpar__redistribute_direct(tensor, &whole);
    for (int32_t owner = 0; owner < comm->ranks && !st; owner += replicas) {
        llmpar__redistribute_part(tensor, mesh->degree, mesh->coordinate, cut->axis, owner, &part);
        if (!part.flat_count) continue;
        int64_t first = part.flat_begin; /* in the larger rectangle, of a part in one piece */
        if (cut->kind == LLMPAR_SHARD) {
            first = part.offset[cut->dim] - whole.offset[cut->dim];
            for (int32_t d = cut->dim + 1; d < tensor->dims; d++) first *= whole.shape[d];
        }
        char *place = direct ? out + (size_t)first * llmpar_dtype_size(tensor->dtype) : staging;
        int mine = comm->rank == owner;
        llmpar_collective call = llmpar__comm_collective(mine ? in : NULL, mine ? NULL : place, (size_t)part.flat_count, tensor->dtype, tensor->name);
        call.root = owner;
        if (comm->ranks > 1) st = llmpar_broadcast(comm, stream, &call);
        if (!st && (mine || !direct)) st = llmpar__redistribute_boxes(mesh, stream, tensor, &part, mine ? in : place, &whole, out, NULL);
    }
    return st;
}

/* Every rank's piece of `to` from every rank's part of `from` on one axis: [ranks][count] both ways, packed. */
static llmpar_status llmpar__redistribute_pairs(const llmpar_redistribute_plan *plan, const llmpar_mesh *mesh, llmpar_axis axis, llmpar_stream *stream, const char *in, char *scratch, char *out)
{
    llmpar_comm *comm = mesh->comm[axis];
    llmpar_local held, needed, other;
    llmpar_status st = LLMPAR_OK;
    llmpar__mesh_local(mesh, &plan->from, &held);
    llmpar__mesh_local(mesh, &plan->to, &needed);
    size_t count = (size_t)(held.flat_count / comm->ranks), bytes = count * llmpar_dtype_size(plan->from.dtype);
    char *received = scratch + bytes * (size_t)comm->ranks;
    if (!count) return LLMPAR_OK;
    for (int32_t r = 0; r < comm->ranks && !st; r++) {
        llmpar__redistribute_part(&plan->to, mesh->degree, mesh->coordinate, axis, r, &other);
        st = llmpar__redistribute_boxes(mesh, stream, &plan->from, &held, in, &other, NULL, scratch + (size_t)r * bytes);
    }
    const llmpar_collective call = llmpar__comm_collective(scratch, received, count, plan->from.dtype, plan->from.name);
    if (!st) st = llmpar_all_to_all(comm, stream, &call);
    for (int32_t r = 0; r < comm->ranks && !st; r++) {
        llmpar__redistribute_part(&plan->from, mesh->degree, mesh->coordinate, axis, r, &other);
        st = llmpar__redistribute_boxes(mesh, stream, &plan->from, &other, NULL, &needed, out, received + (size_t)r * bytes);
    }
    return st;
}

/* ---- exchange ---- */

/* One rank's view of an exchange. */
typedef struct llmpar__redistribute_exchange {
    llmpar__redistribute_pair pair;
    int32_t me[LLMPAR_MESH_AXES];
    llmpar_local held, needed;
    int64_t most_out, most_in, slots; /* elements of the largest message each way; contributions that this rank adds up (0: none) */
} llmpar__redistribute_exchange;

static void llmpar__redistribute_exchange_make(const llmpar_redistribute_plan *plan, const int32_t coordinate[LLMPAR_MESH_AXES], llmpar__redistribute_exchange *x)
{
    memset(x, 0, sizeof *x);
    llmpar__redistribute_pair_make(&plan->from, &plan->to, plan->degree, &x->pair);
    memcpy(x->me, coordinate, sizeof x->me);
    llmpar_dtensor_local(&plan->from, plan->degree, coordinate, &x->held);
    llmpar_dtensor_local(&plan->to, plan->degree, coordinate, &x->needed);
    int reduces = x->pair.contributions > 1, receives = llmpar__redistribute_needs(&x->pair, coordinate, reduces);
    x->slots = reduces && receives ? x->pair.contributions : 0;
    for (int32_t r = 0; r < x->pair.ranks; r++) {
        int32_t peer[LLMPAR_MESH_AXES];
        llmpar_local other;
        int64_t volume;
        llmpar__mesh_coordinate(plan->degree, r, peer);
        if (!memcmp(peer, coordinate, sizeof peer)) continue;
        if (llmpar__redistribute_serves(&x->pair, coordinate, peer) && llmpar__redistribute_needs(&x->pair, peer, reduces)) {
            llmpar_dtensor_local(&plan->to, plan->degree, peer, &other);
            volume = llmpar__redistribute_volume(&plan->from, &x->held, &other);
            if (volume > x->most_out) x->most_out = volume;
        }
        if (receives && llmpar__redistribute_serves(&x->pair, peer, coordinate)) {
            llmpar_dtensor_local(&plan->from, plan->degree, peer, &other);
            volume = llmpar__redistribute_volume(&plan->from, &other, &x->needed);
            if (volume > x->most_in) x->most_in = volume;
        }
    }
}

/* Slot 0 <- the tree over `n` slots that lie `stride` bytes apart. */
static llmpar_status llmpar__redistribute_tree(llmpar_device *device, llmpar_stream *stream, const llmpar_dtensor *tensor, llmpar_placement_kind kind, char *slot, int64_t n, size_t stride, int64_t count)
{
    if (n < 2) return LLMPAR_OK;
    int64_t left = llmpar_tree_split(n);
    llmpar_status st = llmpar__redistribute_tree(device, stream, tensor, kind, slot, left, stride, count);
    if (!st) st = llmpar__redistribute_tree(device, stream, tensor, kind, slot + (size_t)left * stride, n - left, stride, count);
    if (st) return st;
    const void *in[2] = {slot, slot + (size_t)left * stride};
    return llmpar__device_reduce(device, stream, kind == LLMPAR_PARTIAL_MAX ? LLMPAR_MAX : LLMPAR_SUM, in, 2, (size_t)count, slot, tensor->dtype);
}

/* Where the contribution of a coordinate stands: the last listed axis fastest. */
static int64_t llmpar__redistribute_slot(const llmpar__redistribute_pair *pair, const int32_t coordinate[LLMPAR_MESH_AXES])
{
    int64_t slot = 0;
    for (int32_t i = 0; i < pair->reductions; i++) {
        llmpar_axis axis = pair->from->placement[pair->reduced[i]].axis;
        slot = slot * pair->degree[axis] + coordinate[axis];
    }
    return slot;
}

static llmpar_status llmpar__redistribute_message(const llmpar_mesh *mesh, llmpar_stream *stream, const llmpar_dtensor *tensor, int32_t peer, const void *send, void *recv, int64_t count)
{
    llmpar_collective call = llmpar__comm_collective(send, recv, (size_t)count, tensor->dtype, tensor->name);
    call.peer = peer;
    return send ? llmpar_send(mesh->world, stream, &call) : llmpar_recv(mesh->world, stream, &call);
}

/* Rounds: in round k rank r deals with rank r ^ k, the lower one sends first. So all ranks see the pairs in one order, and nobody waits in a circle.
     scratch: | outgoing message | incoming message | slot 0 | slot 1 | ..                                                                       */
static llmpar_status llmpar__redistribute_exchange_run(const llmpar_redistribute_plan *plan, const llmpar_mesh *mesh, llmpar_stream *stream, const char *in, char *scratch, char *out)
{
    const llmpar_dtensor *tensor = &plan->from;
    llmpar_device *device = mesh->ctx->device;
    size_t item = llmpar_dtype_size(tensor->dtype);
    llmpar__redistribute_exchange x;
    llmpar__redistribute_exchange_make(plan, mesh->coordinate, &x);
    const llmpar__redistribute_pair *pair = &x.pair;
    int32_t me = llmpar_mesh_rank_at(mesh, mesh->coordinate);
    int reduces = pair->contributions > 1, receives = llmpar__redistribute_needs(pair, x.me, reduces);
    size_t part = (size_t)x.needed.flat_count * item;
    char *incoming = scratch + (size_t)x.most_out * item, *slots = incoming + (size_t)x.most_in * item;
    llmpar_status st = LLMPAR_OK;
    if (receives) st = llmpar__redistribute_boxes(mesh, stream, tensor, &x.held, in, &x.needed, reduces ? slots + (size_t)llmpar__redistribute_slot(pair, x.me) * part : out, NULL);
    int32_t rounds = 1;
    while (rounds < pair->ranks) rounds *= 2;
    for (int32_t k = 1; k < rounds && !st; k++) {
        int32_t peer = me ^ k, at[LLMPAR_MESH_AXES];
        llmpar_local other;
        if (peer >= pair->ranks) continue;
        llmpar__mesh_coordinate(plan->degree, peer, at);
        for (int turn = 0; turn < 2 && !st; turn++) {
            if ((me < peer) == (turn == 0)) {
                if (!llmpar__redistribute_serves(pair, x.me, at) || !llmpar__redistribute_needs(pair, at, reduces)) continue;
                llmpar_dtensor_local(&plan->to, plan->degree, at, &other);
                int64_t volume = llmpar__redistribute_volume(tensor, &x.held, &other);
                if (volume) st = llmpar__redistribute_boxes(mesh, stream, tensor, &x.held, in, &other, NULL, scratch);
                if (volume && !st) st = llmpar__redistribute_message(mesh, stream, tensor, peer, scratch, NULL, volume);
            } else {
                if (!receives || !llmpar__redistribute_serves(pair, at, x.me)) continue;
                llmpar_dtensor_local(&plan->from, plan->degree, at, &other);
                int64_t volume = llmpar__redistribute_volume(tensor, &other, &x.needed);
                if (volume) st = llmpar__redistribute_message(mesh, stream, tensor, peer, NULL, incoming, volume);
                if (volume && !st) st = llmpar__redistribute_boxes(mesh, stream, tensor, &other, NULL, &x.needed, reduces ? slots + (size_t)llmpar__redistribute_slot(pair, at) * part : out, incoming);
            }
        }
    }
    if (st || !reduces || !part) return st;

    int64_t stride = 1;
    for (int32_t i = pair->reductions - 1; i >= 0 && receives; i--) {
        const llmpar_placement *p = &plan->from.placement[pair->reduced[i]];
        int64_t n = plan->degree[p->axis];
        for (int64_t base = 0; base < pair->contributions && !st; base += stride * n)
            st = llmpar__redistribute_tree(device, stream, tensor, p->kind, slots + (size_t)base * part, n, (size_t)stride * part, x.needed.flat_count);
        stride *= n;
    }
    if (receives && !st) st = device->copy(device, stream, out, slots, part);
    for (int32_t k = 1; k < rounds && !st; k++) { /* from the first of the ranks that need the same to the others */
        int32_t peer = me ^ k, at[LLMPAR_MESH_AXES];
        int same = 1;
        if (peer >= pair->ranks) continue;
        llmpar__mesh_coordinate(plan->degree, peer, at);
        for (int a = 0; a < LLMPAR_MESH_AXES; a++) same = same && at[a] / pair->to_group[a] == x.me[a] / pair->to_group[a];
        if (!same || !llmpar__redistribute_needs(pair, at, 0)) continue;
        if (receives) st = llmpar__redistribute_message(mesh, stream, tensor, peer, out, NULL, x.needed.flat_count);
        else if (llmpar__redistribute_needs(pair, at, 1)) st = llmpar__redistribute_message(mesh, stream, tensor, peer, NULL, out, x.needed.flat_count);
    }
    return st;
}

/* ---- plans ---- */

/* Step i of a plan undoes a cut of, or reduces, what the step before left: the first one has the request itself, with cuts that do something last. */
static void llmpar__redistribute_before(const llmpar_redistribute_plan *plan, int32_t i, llmpar_dtensor *out)
{
    if (i) *out = plan->step[i - 1].result;
    else llmpar__redistribute_normal(&plan->from, plan->degree, out);
}

static int64_t llmpar__redistribute_staging(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], const int32_t coordinate[LLMPAR_MESH_AXES])
{
    const llmpar_placement *cut = &tensor->placement[tensor->placements - 1];
    int64_t most = 0;
    llmpar_local whole, part;
    llmpar__redistribute_local(tensor, degree, tensor->placements - 1, coordinate, &whole);
    if (llmpar__redistribute_direct(tensor, &whole)) return 0;
    for (int32_t r = 0; r < degree[cut->axis]; r++) {
        llmpar__redistribute_part(tensor, degree, coordinate, cut->axis, r, &part);
        if (part.elements > most) most = part.elements;
    }
    return most;
}

LLMPAR_DEF int64_t llmpar_redistribute_scratch(const llmpar_redistribute_plan *plan, const int32_t coordinate[LLMPAR_MESH_AXES])
{
    int64_t elements = 0, staging = 0; /* the parts between the steps, each in its own place, then the largest staging area */
    for (int32_t i = 0; i < plan->steps; i++) {
        const llmpar_redistribute_step *step = &plan->step[i];
        llmpar_local local;
        llmpar_dtensor_local(&step->result, plan->degree, coordinate, &local);
        if (i + 1 < plan->steps) elements += local.flat_count;
        if (step->op == LLMPAR_REDISTRIBUTE_BROADCAST) {
            llmpar_dtensor before;
            llmpar__redistribute_before(plan, i, &before);
            int64_t need = llmpar__redistribute_staging(&before, plan->degree, coordinate);
            if (need > staging) staging = need;
        } else if (step->op == LLMPAR_REDISTRIBUTE_ALL_TO_ALL) {
            staging = 2 * local.flat_count;
        } else if (step->op == LLMPAR_REDISTRIBUTE_EXCHANGE) {
            llmpar__redistribute_exchange x;
            llmpar__redistribute_exchange_make(plan, coordinate, &x);
            staging = x.most_out + x.most_in + x.slots * x.needed.flat_count;
        }
    }
    return elements + staging;
}

static llmpar_status llmpar__redistribute_step_run(const llmpar_redistribute_plan *plan, int32_t i, const llmpar_mesh *mesh, llmpar_stream *stream, const char *in, char *staging, char *out)
{
    const llmpar_redistribute_step *step = &plan->step[i];
    llmpar_comm *comm = mesh->comm[step->axis];
    llmpar_dtensor before;
    llmpar_local held, result;
    size_t blocks = 1, count = 0;
    llmpar__redistribute_before(plan, i, &before);
    llmpar__mesh_local(mesh, &before, &held);
    llmpar__mesh_local(mesh, &step->result, &result);
    switch (step->op) {
    case LLMPAR_REDISTRIBUTE_LOCAL: return llmpar__redistribute_boxes(mesh, stream, &plan->from, &held, in, &result, out, NULL);
    case LLMPAR_REDISTRIBUTE_BROADCAST: return llmpar__redistribute_broadcasts(&before, mesh, stream, in, staging, out);
    case LLMPAR_REDISTRIBUTE_ALL_TO_ALL: return llmpar__redistribute_pairs(plan, mesh, step->axis, stream, in, staging, out);
    case LLMPAR_REDISTRIBUTE_EXCHANGE: return llmpar__redistribute_exchange_run(plan, mesh, stream, in, staging, out);
    case LLMPAR_REDISTRIBUTE_ALL_GATHER: llmpar__redistribute_even(&before, mesh->degree, mesh->coordinate, &blocks, &count); break;
    case LLMPAR_REDISTRIBUTE_REDUCE_SCATTER: llmpar__redistribute_even(&step->result, mesh->degree, mesh->coordinate, &blocks, &count); break;
    case LLMPAR_REDISTRIBUTE_ALL_REDUCE: count = (size_t)held.flat_count; break;
    }
    if (!count) return LLMPAR_OK;
    llmpar_collective call = llmpar__comm_collective(in, out, count, before.dtype, before.name);
    call.blocks = blocks;
    if (step->op == LLMPAR_REDISTRIBUTE_ALL_GATHER) return llmpar_all_gather(comm, stream, &call);
    for (int32_t p = 0; p < before.placements; p++)
        if (before.placement[p].axis == step->axis && before.placement[p].kind == LLMPAR_PARTIAL_MAX) call.op = LLMPAR_MAX;
    return step->op == LLMPAR_REDISTRIBUTE_ALL_REDUCE ? llmpar_all_reduce(comm, stream, &call) : llmpar_reduce_scatter(comm, stream, &call);
}

static llmpar_status llmpar__redistribute_run(const llmpar_redistribute_plan *plan, const llmpar_mesh *mesh, llmpar_stream *stream, const char *in, char *scratch, char *out)
{
    size_t item = llmpar_dtype_size(plan->from.dtype), between = 0;
    char *area = scratch;
    llmpar_local local;
    llmpar_status st = LLMPAR_OK;
    for (int32_t i = 0; i + 1 < plan->steps; i++) {
        llmpar__mesh_local(mesh, &plan->step[i].result, &local);
        between += (size_t)local.flat_count * item;
    }
    for (int32_t i = 0; i < plan->steps && !st; i++) {
        int last = i + 1 == plan->steps;
        llmpar__mesh_local(mesh, &plan->step[i].result, &local);
        st = llmpar__redistribute_step_run(plan, i, mesh, stream, in, scratch + between, last ? out : area);
        in = area;
        area += last ? 0 : (size_t)local.flat_count * item;
    }
    return st;
}

LLMPAR_DEF llmpar_status llmpar_redistribute(const llmpar_redistribute_plan *plan, const llmpar_mesh *mesh, llmpar_stream *stream, const void *in, void *scratch, void *out)
{
    llmpar_device *device = mesh->ctx->device;
    const llmpar_dtensor *to = &plan->to;
    const char *name = to->name ? to->name : "tensor";
    size_t item = llmpar_dtype_size(to->dtype);
    llmpar_local held, needed;
    if (plan->steps < 1) return llmpar_fail(mesh->ctx, LLMPAR_ERR_ARGUMENT, "redistribute: the plan is empty: expected one that plan_make has made");
    for (int a = 0; a < LLMPAR_MESH_AXES; a++)
        if (plan->degree[a] != mesh->degree[a])
            return llmpar_fail(mesh->ctx, LLMPAR_ERR_MESH, "%s: redistribute: the plan is for a mesh with %s = %d, expected this mesh's %d", name, llmpar_axis_name((llmpar_axis)a), (int)plan->degree[a], (int)mesh->degree[a]);
    llmpar__mesh_local(mesh, &plan->from, &held);
    llmpar__mesh_local(mesh, to, &needed);
    size_t in_bytes = (size_t)held.flat_count * item, out_bytes = (size_t)needed.flat_count * item, scratch_bytes = (size_t)llmpar_redistribute_scratch(plan, mesh->coordinate) * item;
    if ((in_bytes && !in) || (out_bytes && !out) || (scratch_bytes && !scratch))
        return llmpar_fail(mesh->ctx, LLMPAR_ERR_ARGUMENT, "%s: redistribute: %s is NULL, expected room for %lu bytes", name, in_bytes && !in ? "in" : out_bytes && !out ? "out" : "scratch",
                           (unsigned long)(in_bytes && !in ? in_bytes : out_bytes && !out ? out_bytes : scratch_bytes));
    const char *source = in_bytes ? (const char *)in + (size_t)held.shard_begin * item : NULL;
    char *target = out_bytes ? (char *)out + (size_t)needed.shard_begin * item : NULL;
    if (llmpar__comm_overlap(source, in_bytes, target, out_bytes) || llmpar__comm_overlap(scratch, scratch_bytes, source, in_bytes) || llmpar__comm_overlap(scratch, scratch_bytes, target, out_bytes))
        return llmpar_fail(mesh->ctx, LLMPAR_ERR_ARGUMENT, "%s: redistribute: in, scratch and out overlap", name);

    char tag[64], before[64], after[64]; /* the barrier compares tags: the request as a number, and, as far as it fits, in words */
    llmpar__text words = llmpar__text_begin(tag, sizeof tag);
    llmpar_dtensor_placements(&plan->from, before, sizeof before);
    llmpar_dtensor_placements(to, after, sizeof after);
    llmpar__text_put(&words, "redistribute %08x %s %s -> %s", (unsigned)(plan->fingerprint ^ plan->fingerprint >> 32), name, before, after);
    llmpar_status st = llmpar_comm_barrier(mesh->world, stream, tag);
    llmpar__redistribute_pair pair;
    llmpar__redistribute_pair_make(&plan->from, to, plan->degree, &pair);
    if (!st && out_bytes && !llmpar__redistribute_needs(&pair, mesh->coordinate, 0)) { /* Partial(sum) whose value stands at coordinate 0 */
        LLMPAR__ZEROED(llmpar_scale_args, minus);
        minus.count = (size_t)needed.flat_count;
        minus.x = target;
        minus.factor = -1;
        minus.dtype = to->dtype;
        st = device->zero(device, stream, target, out_bytes);
        if (!st && (to->dtype == LLMPAR_F32 || to->dtype == LLMPAR_F64)) st = device->scale(device, stream, &minus);
        if (plan->step[0].op == LLMPAR_REDISTRIBUTE_LOCAL) return st;
    }
    return st ? st : llmpar__redistribute_run(plan, mesh, stream, source, (char *)scratch, target);
}

/* ---- whole tensors ---- */

/* The plan that undoes one cut after the other, as far as this rank's axes go: what the ranks of an axis decide, they decide alike, since only what lies on that axis counts. */
static void llmpar__redistribute_full_plan(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, llmpar_redistribute_plan *plan)
{
    llmpar_dtensor now;
    memset(plan, 0, sizeof *plan);
    plan->from = plan->to = *tensor;
    plan->to.placements = 0;
    memcpy(plan->degree, mesh->degree, sizeof plan->degree);
    llmpar__redistribute_normal(tensor, mesh->degree, &now);
    while (now.placements || !plan->steps) {
        llmpar_redistribute_step *step = &plan->step[plan->steps++];
        size_t blocks, count;
        if (now.placements) {
            step->axis = now.placement[now.placements - 1].axis;
            step->op = llmpar__redistribute_even(&now, mesh->degree, mesh->coordinate, &blocks, &count) ? LLMPAR_REDISTRIBUTE_ALL_GATHER : LLMPAR_REDISTRIBUTE_BROADCAST;
            now.placements--;
        }
        step->result = now;
    }
}

LLMPAR_DEF int64_t llmpar_dtensor_full_scratch(const llmpar_dtensor *tensor, const llmpar_mesh *mesh)
{
    llmpar_redistribute_plan plan;
    llmpar__redistribute_full_plan(tensor, mesh, &plan);
    return llmpar_redistribute_scratch(&plan, mesh->coordinate);
}

LLMPAR_DEF llmpar_status llmpar_dtensor_full(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, llmpar_stream *stream, const void *local, void *scratch, void *full)
{
    const char *name = tensor->name ? tensor->name : "tensor";
    llmpar_redistribute_plan plan;
    llmpar_local part;
    LLMPAR__NO_ERROR(error);
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
    for (int32_t i = 0; i < tensor->placements; i++) { /* the check knows the smallest part only */
        const llmpar_placement *p = &tensor->placement[i];
        llmpar__redistribute_local(tensor, mesh->degree, i, mesh->coordinate, &part);
        if (p->kind == LLMPAR_FLAT && part.elements > p->unit_elements - p->offset)
            return llmpar_fail(mesh->ctx, LLMPAR_ERR_SHAPE, "%s: Flat on %s: %lld elements at offset %lld do not fit a unit of %lld", name, llmpar_axis_name(p->axis), (long long)part.elements,
                               (long long)p->offset, (long long)p->unit_elements);
    }
    llmpar__redistribute_full_plan(tensor, mesh, &plan);
    llmpar__mesh_local(mesh, tensor, &part);
    return llmpar__redistribute_run(&plan, mesh, stream, (const char *)local + (size_t)part.shard_begin * llmpar_dtype_size(tensor->dtype), (char *)scratch, (char *)full);
}

LLMPAR_DEF void llmpar_dtensor_cut(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, const void *full, void *local)
{
    llmpar_local part;
    size_t item = llmpar_dtype_size(tensor->dtype);
    llmpar__mesh_local(mesh, tensor, &part);
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
