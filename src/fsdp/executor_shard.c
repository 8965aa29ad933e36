#include "fsdp/fsdp_internal.h"

#include <string.h>

/* ---- gradients in a narrower type on their way ----
   reduce-scatter:  round | all-to-all | widen the n parts | tree sum
   all-reduce:      the same on n slices (the last ones may be filled up), then round | all-gather | widen */

#define LLMPAR__REDUCE_PIECE ((size_t)32768) /* elements of each part that are widened at a time */

/* out[count] (f32) = tree over ranks of the narrow parts[ranks][count]. wide[ranks][LLMPAR__REDUCE_PIECE]: scratch. */
static llmpar_status llmpar__reduce_parts(llmpar_fsdp *fsdp, llmpar_stream *stream, int32_t ranks, const char *parts, size_t count, float *wide, float *out)
{
    llmpar_status status = LLMPAR_OK;
    size_t size = llmpar_dtype_size(fsdp->reduce);
    for (size_t at = 0; at < count && !status; at += LLMPAR__REDUCE_PIECE) {
        size_t piece = llmpar__least(count - at, LLMPAR__REDUCE_PIECE);
        for (int32_t r = 0; r < ranks && !status; r++) {
            fsdp->parts[r] = wide + (size_t)r * LLMPAR__REDUCE_PIECE;
            status = llmpar__device_cast(fsdp->device, stream, parts + ((size_t)r * count + at) * size, fsdp->reduce, wide + (size_t)r * LLMPAR__REDUCE_PIECE, LLMPAR_F32, piece);
        }
        if (!status) status = llmpar__device_reduce(fsdp->device, stream, LLMPAR_SUM, fsdp->parts, ranks, piece, out + at, LLMPAR_F32);
    }
    return status;
}

/* count: of the result. in: [ranks * count], or with `all` [count], summed to the same on every rank. */
static llmpar_status llmpar__reduce_narrow(llmpar_fsdp *fsdp, llmpar_stream_id id, llmpar_comm *comm, const void *in, void *out, size_t count, int all, const char *tag)
{
    llmpar_stream *stream = fsdp->stream[id];
    llmpar_device *device = fsdp->device;
    size_t ranks = (size_t)comm->ranks, size = llmpar_dtype_size(fsdp->reduce), slice = all ? (count + ranks - 1) / ranks : count, total = slice * ranks, given = all ? count : total;
    void *send = NULL, *recv = NULL, *wide = NULL, *sum = NULL;
    llmpar_status status = llmpar__fsdp_alloc(fsdp, id, LLMPAR_TAG_COMMUNICATION, total * size, tag, &send);
    if (!status) status = llmpar__fsdp_alloc(fsdp, id, LLMPAR_TAG_COMMUNICATION, total * size, tag, &recv);
    if (!status) status = llmpar__fsdp_alloc(fsdp, id, LLMPAR_TAG_COMMUNICATION, ranks * LLMPAR__REDUCE_PIECE * sizeof(float), tag, &wide);
    if (!status && all) status = llmpar__fsdp_alloc(fsdp, id, LLMPAR_TAG_COMMUNICATION, slice * sizeof(float), tag, &sum);
    if (!status) status = llmpar__device_cast(fsdp->device, stream, in, LLMPAR_F32, send, fsdp->reduce, given);
    if (!status && total > given) status = device->zero(device, stream, (char *)send + given * size, (total - given) * size);
    const llmpar_collective call = llmpar__comm_collective(send, recv, slice, fsdp->reduce, tag);
    if (!status) status = llmpar_all_to_all(comm, stream, &call);
    if (!status) status = llmpar__reduce_parts(fsdp, stream, comm->ranks, (const char *)recv, slice, (float *)wide, (float *)(all ? sum : out));
    if (all) {
        if (!status) status = llmpar__device_cast(fsdp->device, stream, sum, LLMPAR_F32, send, fsdp->reduce, slice);
        if (!status) status = llmpar_all_gather(comm, stream, &call);
        if (!status) status = llmpar__device_cast(fsdp->device, stream, recv, fsdp->reduce, out, LLMPAR_F32, count);
    }
    void **scratch[4] = {&sum, &wide, &recv, &send};
    for (int i = 0; i < 4; i++) {
        llmpar_status freed = llmpar__fsdp_free(fsdp, id, scratch[i]);
        if (!status) status = freed;
    }
    return status;
}

/* ---- gradients ---- */

/* This rank's part of a gradient buffer that is not local. */
static char *llmpar__exec_part(const llmpar_fsdp *fsdp, const llmpar__flat *flat, void *buffer)
{
    return buffer && fsdp->whole_grads ? (char *)buffer + (size_t)flat->begin * llmpar_dtype_size(fsdp->sum) : (char *)buffer;
}

static llmpar_status llmpar__exec_reduce(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar__flat *flat = &fsdp->units[in->unit];
    llmpar_stream *stream = fsdp->stream[in->stream];
    void **shard = &flat->grad[in->use][0][in->slot];
    LLMPAR__ZEROED(llmpar_collective, call);
    call.dtype = fsdp->sum;
    call.count = (size_t)flat->shard_elements;
    if (in->op == LLMPAR_OP_REDUCE) {
        call.tag = flat->label[LLMPAR__LABEL_REDUCE];
        if (fsdp->whole_grads) {
            flat->reduced[in->use] |= 1u << in->slot;
            call.send = *shard;
        } else {
            llmpar_status status = llmpar__fsdp_alloc(fsdp, in->stream, LLMPAR_TAG_GRADIENTS, call.count * llmpar_dtype_size(fsdp->sum), flat->label[LLMPAR__LABEL_GRADIENT], shard);
            if (status) return status;
            call.send = flat->grad[in->use][1][in->from];
        }
        call.recv = llmpar__exec_part(fsdp, flat, *shard);
        if (fsdp->reduce != fsdp->sum) return llmpar__reduce_narrow(fsdp, in->stream, fsdp->reduce_comm, call.send, call.recv, call.count, 0, call.tag);
        return llmpar_reduce_scatter(fsdp->reduce_comm, stream, &call);
    }
    call.tag = flat->label[LLMPAR__LABEL_REPLICA];
    call.send = call.recv = llmpar__exec_part(fsdp, flat, *shard);
    if (fsdp->reduce != fsdp->sum && fsdp->replicas > 1) return llmpar__reduce_narrow(fsdp, in->stream, fsdp->replica_comm, call.send, call.recv, call.count, 1, call.tag);
    return llmpar_all_reduce(fsdp->replica_comm, stream, &call);
}

static llmpar_status llmpar__exec_accumulate(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar__flat *flat = &fsdp->units[in->unit];
    void **to = &flat->grad[in->use][in->local][in->slot], **from = &flat->grad[in->from_use][in->local][in->from];
    int part = !in->local && (!fsdp->whole_grads || flat->reduced[in->use] >> in->slot & 1u);
    LLMPAR__ZEROED(llmpar_add_args, args);
    args.count = (size_t)(part ? flat->shard_elements : flat->elements);
    args.a = part ? llmpar__exec_part(fsdp, flat, *to) : *to; /* the lower micro-batch, on the left */
    args.b = part ? llmpar__exec_part(fsdp, flat, *from) : *from;
    args.out = (void *)(uintptr_t)args.a;
    args.dtype = fsdp->sum;
    llmpar_status status = fsdp->device->add(fsdp->device, fsdp->stream[in->stream], &args);
    return status ? status : llmpar__fsdp_free(fsdp, in->stream, from);
}

static llmpar_status llmpar__exec_norm(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar__flat *flat = &fsdp->units[in->unit];
    llmpar_status status = LLMPAR_OK;
    for (int32_t s = 0; s < flat->segment_count && !status; s++) {
        const llmpar_segment *segment = &flat->segments[s];
        if (!segment->owner) continue;
        LLMPAR__ZEROED(llmpar_square_sum_args, args);
        args.count = (size_t)segment->count;
        args.x = llmpar__exec_part(fsdp, flat, flat->grad[in->use][0][in->slot]) + (size_t)segment->begin * llmpar_dtype_size(fsdp->sum);
        args.accumulator = fsdp->scalars + LLMPAR_EXACT_SUM_LIMBS;
        args.dtype = fsdp->sum;
        status = fsdp->device->square_sum(fsdp->device, fsdp->stream[in->stream], &args);
    }
    return status;
}

/* ---- updates ---- */

/* Neither was the step found to be one to skip, nor did no token of it count. */
static int llmpar__exec_counts(const llmpar__exec *exec) { return !exec->found_inf && exec->run->global_tokens; }

/* Hands a unit's shards to the optimizer. */
static llmpar_status llmpar__exec_update(llmpar__exec *exec, int32_t unit, void *param, const void *grad, void *const *state, llmpar_device *device, llmpar_stream *stream)
{
    llmpar_run *run = exec->run;
    const llmpar__flat *flat = &exec->fsdp->units[unit];
    if (!run->optimizer || !llmpar__exec_counts(exec)) return LLMPAR_OK;
    LLMPAR__ZEROED(llmpar_update, update);
    update.unit = unit;
    update.dtype = exec->fsdp->sum;
    update.elements = flat->shard_elements;
    update.param = param;
    update.grad = grad;
    memcpy(update.state, state, sizeof update.state);
    update.segments = flat->segments;
    update.segment_count = flat->segment_count;
    update.grad_scale = exec->grad_scale;
    update.stream = stream;
    update.device = device;
    return run->optimizer->update(run->optimizer->state, &update);
}

/* ZeRO-Offload: the host has the gradient once the stream has come here, and works on the stores' memory itself. */
static llmpar_status llmpar__exec_optim_host(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar_run *run = exec->run;
    llmpar__flat *flat = &fsdp->units[in->unit];
    void *state[LLMPAR_OPTIMIZER_STATES];
    llmpar_status status = fsdp->device->synchronize(fsdp->device, fsdp->stream[in->stream]);
    if (!status && run->on_gradient) { /* who looks at it does so on the device */
        llmpar__moved moved[2];
        llmpar__fsdp_moved(fsdp, in->unit, LLMPAR_STATE_GRADS, in->use, in->slot, 0, moved);
        status = llmpar__fsdp_fetch(fsdp, in->stream, moved);
        if (!status) status = fsdp->device->synchronize(fsdp->device, fsdp->stream[in->stream]);
        if (!status) status = run->on_gradient(run->on_gradient_user, fsdp, in->unit, llmpar__exec_part(fsdp, flat, *moved->memory));
        llmpar_status freed = llmpar__fsdp_put(fsdp, in->stream, moved, 0);
        if (!status) status = freed;
    }
    for (int i = 0; i < LLMPAR_OPTIMIZER_STATES; i++) state[i] = flat->state_place[i].host;
    if (!status && !fsdp->count_only) status = llmpar__exec_update(exec, in->unit, flat->params_place.host, llmpar__exec_part(fsdp, flat, flat->grad_place[in->use][in->slot].host), state, fsdp->ctx->host, NULL);
    flat->grad_stored &= ~(1u << in->slot);
    return status;
}

/* The compute dtype's copy of what the host has updated: rounded there, piece by piece, each on its way while the next is made. */
static llmpar_status llmpar__exec_cast_host(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar_device *device = fsdp->device, *host = fsdp->ctx->host;
    llmpar__flat *flat = &fsdp->units[in->unit];
    size_t wide = llmpar_dtype_size(fsdp->sum), narrow = llmpar_dtype_size(fsdp->dtype);
    llmpar_status status = LLMPAR_OK;
    for (int64_t at = 0; at < flat->shard_elements && !fsdp->count_only && !status; at += LLMPAR__CAST_PIECE) {
        int32_t turn = fsdp->host_cast_turn;
        fsdp->host_cast_turn = (turn + 1) % LLMPAR__CAST_BUFFERS;
        size_t count = (size_t)(flat->shard_elements - at < LLMPAR__CAST_PIECE ? flat->shard_elements - at : LLMPAR__CAST_PIECE);
        status = device->event_synchronize(device, fsdp->host_cast_event[turn]);
        if (!status) status = llmpar__device_cast(host, NULL, (const char *)flat->params_place.host + (size_t)at * wide, fsdp->sum, fsdp->host_cast[turn], fsdp->dtype, count);
        if (!status) status = device->copy(device, fsdp->stream[in->stream], (char *)llmpar__fsdp_own_part(fsdp, flat) + (size_t)at * narrow, fsdp->host_cast[turn], count * narrow);
        if (!status) status = device->event_record(device, fsdp->stream[in->stream], fsdp->host_cast_event[turn]);
    }
    return status;
}

static llmpar_status llmpar__exec_optim(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar_run *run = exec->run;
    llmpar__flat *flat = &fsdp->units[in->unit];
    void **grad = &flat->grad[in->use][0][in->slot];
    const char *part = llmpar__exec_part(fsdp, flat, *grad);
    llmpar_status status = LLMPAR_OK;
    if (!exec->updating) llmpar_arena_get_usage(fsdp->arena, &run->before_optimizer);
    exec->updating = 1;
    if (fsdp->policy.host_update) return llmpar__exec_optim_host(exec, in);
    if (run->on_gradient) {
        status = fsdp->device->synchronize(fsdp->device, fsdp->stream[in->stream]);
        if (!status) status = run->on_gradient(run->on_gradient_user, fsdp, in->unit, part);
    }
    if (!status) status = llmpar__exec_update(exec, in->unit, llmpar__fsdp_updated(fsdp, flat), part, flat->state, fsdp->device, fsdp->stream[in->stream]);
    return status ? status : llmpar__fsdp_free(fsdp, in->stream, grad);
}

/* ---- states outside the arena ---- */

static llmpar_status llmpar__exec_move(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar__flat *flat = &fsdp->units[in->unit];
    llmpar__moved moved[2];
    llmpar_status status = LLMPAR_OK;
    int store = in->op == LLMPAR_OP_STORE;
    if (fsdp->tier[in->what] == LLMPAR_TIER_DEVICE) return llmpar_fail(fsdp->ctx, LLMPAR_ERR_SCHEDULE, "unit %s: fetched or stored what this object keeps on the device", flat->unit.name);
    if (in->stream != LLMPAR_STREAM_OFFLOAD) return llmpar_fail(fsdp->ctx, LLMPAR_ERR_SCHEDULE, "unit %s: fetched or stored on another stream than offload", flat->unit.name);
    int32_t count = llmpar__fsdp_moved(fsdp, in->unit, in->what, in->use, in->slot, in->micro_batch, moved);
    for (int32_t i = 0; i < count && !status; i++) {
        if (!moved[i].place->bytes) continue; /* nothing of this kind: no saved activations where all are recomputed */
        status = store ? llmpar__fsdp_put(fsdp, in->stream, &moved[i], 1) : llmpar__fsdp_fetch(fsdp, in->stream, &moved[i]);
    }
    if (in->what == LLMPAR_STATE_GRADS && in->use == 0) flat->grad_stored = store ? flat->grad_stored | 1u << in->slot : flat->grad_stored & ~(1u << in->slot);
    return status;
}

/* Bytes that a STORE of gradients or activations moves. */
static llmpar_status llmpar__exec_used(llmpar__exec *exec, const llmpar_instruction *in, uint64_t used[2])
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar__flat *flat = &fsdp->units[in->unit];
    llmpar_unit_sizes sizes;
    used[0] = (uint64_t)(fsdp->whole_grads ? flat->elements : flat->shard_elements) * llmpar_dtype_size(fsdp->sum);
    used[1] = 0;
    if (in->what == LLMPAR_STATE_GRADS) return LLMPAR_OK;
    llmpar_status status = llmpar__exec_sizes(exec, in->unit, in->micro_batch, &sizes);
    used[0] = flat->unit.recompute == LLMPAR_RECOMPUTE_FULL ? 0 : sizes.saved ? sizes.saved : 1;
    if (!status && in->unit > 0) status = llmpar__exec_sizes(exec, in->unit - 1, in->micro_batch, &sizes);
    if (in->unit > 0) used[1] = sizes.output ? sizes.output : 1;
    return status;
}

/* Everything that has its place only while a step runs, again: each as large as it was or is now. */
static llmpar_status llmpar__exec_relay(llmpar_fsdp *fsdp, llmpar__place *place, llmpar_state what)
{
    uint64_t bytes = place->bytes > place->used ? place->bytes : place->used, used = place->used;
    if (!bytes) return LLMPAR_OK;
    llmpar__store_drop(fsdp->store, place);
    llmpar_status status = llmpar__store_place(fsdp->store, fsdp->tier[what], bytes, place);
    place->used = used;
    return status;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__exec_places(llmpar__exec *exec, const llmpar_instruction *list, int32_t count)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar_heap *heap = &fsdp->ctx->heap;
    llmpar_status status = LLMPAR_OK;
    int grow = 0;
    if (!(fsdp->policy.offload & (1u << LLMPAR_STATE_GRADS | 1u << LLMPAR_STATE_ACTIVATIONS))) return LLMPAR_OK;
    for (int32_t u = 0; u < fsdp->unit_count; u++) {
        llmpar__flat *flat = &fsdp->units[u];
        flat->grad_stored = 0;
        if (flat->activation_count >= exec->micro_batches) continue;
        llmpar__place *place = LLMPAR__ZALLOC(llmpar__place, heap, 2 * (size_t)exec->micro_batches);
        if (!place) return llmpar_fail(fsdp->ctx, LLMPAR_ERR_MEMORY, "offload: no memory for %d micro-batches", (int)exec->micro_batches);
        if (flat->activation_count) memcpy(place, flat->activation_place, 2 * (size_t)flat->activation_count * sizeof *place);
        llmpar_heap_free(heap, flat->activation_place);
        flat->activation_place = place;
        flat->activation_count = exec->micro_batches;
    }
    for (int32_t i = 0; i < count && !status; i++) {
        llmpar__moved moved[2];
        uint64_t used[2];
        if (list[i].op != LLMPAR_OP_STORE || (list[i].what != LLMPAR_STATE_GRADS && list[i].what != LLMPAR_STATE_ACTIVATIONS)) continue;
        status = llmpar__exec_used(exec, &list[i], used);
        int32_t n = llmpar__fsdp_moved(fsdp, list[i].unit, list[i].what, list[i].use, list[i].slot, list[i].micro_batch, moved);
        for (int32_t k = 0; k < n && !status; k++) {
            moved[k].place->used = used[k];
            grow |= used[k] > moved[k].place->bytes;
        }
    }
    if (status || !grow) return status;
    llmpar__store_rewind(fsdp->store);
    for (int32_t u = 0; u < fsdp->unit_count && !status; u++) {
        llmpar__flat *flat = &fsdp->units[u];
        for (int i = 0; i < 2 * LLMPAR_GRAD_SLOTS && !status; i++) status = llmpar__exec_relay(fsdp, &flat->grad_place[i / LLMPAR_GRAD_SLOTS][i % LLMPAR_GRAD_SLOTS], LLMPAR_STATE_GRADS);
        for (int32_t i = 0; i < 2 * flat->activation_count && !status; i++) status = llmpar__exec_relay(fsdp, &flat->activation_place[i], LLMPAR_STATE_ACTIVATIONS);
    }
    return status ? status : llmpar__store_reserve(fsdp->store);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__exec_shard(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar__flat *flat = &fsdp->units[in->unit];
    int skip = in->predicate == LLMPAR_IF_FINITE && !llmpar__exec_counts(exec);
    llmpar__moved moved[2];
    switch (in->op) {
    case LLMPAR_OP_GATHER: return skip ? LLMPAR_OK : llmpar__fsdp_gather(fsdp, flat, in->stream);
    case LLMPAR_OP_CAST:
        if (fsdp->policy.host_update) return skip ? LLMPAR_OK : llmpar__exec_cast_host(exec, in);
        return skip ? LLMPAR_OK : llmpar__fsdp_cast(fsdp, flat, fsdp->stream[in->stream]);
    case LLMPAR_OP_FREE:
        if (in->slot >= 0) return llmpar__fsdp_free(fsdp, in->stream, &flat->grad[in->use][in->local][in->slot]);
        if (in->what != LLMPAR_STATE_PARAMS) return llmpar__fsdp_release(fsdp, flat, in->stream);
        return llmpar__fsdp_moved(fsdp, in->unit, LLMPAR_STATE_PARAMS, 0, 0, 0, moved) ? llmpar__fsdp_put(fsdp, in->stream, moved, 0) : LLMPAR_OK;
    case LLMPAR_OP_REDUCE:
    case LLMPAR_OP_REDUCE_REPLICA: return llmpar__exec_reduce(exec, in);
    case LLMPAR_OP_ACCUMULATE: return llmpar__exec_accumulate(exec, in);
    case LLMPAR_OP_NORM: return llmpar__exec_norm(exec, in);
    case LLMPAR_OP_OPTIM: return llmpar__exec_optim(exec, in);
    case LLMPAR_OP_FETCH:
    case LLMPAR_OP_STORE: return llmpar__exec_move(exec, in);
    default: return llmpar_fail(fsdp->ctx, LLMPAR_ERR_SCHEDULE, "no op %d", (int)in->op);
    }
}

#undef LLMPAR__REDUCE_PIECE
