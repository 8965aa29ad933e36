#include "fsdp/fsdp.h"
#include "fsdp/fsdp_internal.h"

#include <stdio.h>
#include <string.h>

/* ---- memory in stream order ----
   One host thread allocates and frees in list order, ahead of what the streams have done. A released block carries the number of its release; whoever gets it next on another stream waits for that one. */

typedef char llmpar__fsdp_streams_have_marks[(int)LLMPAR_STREAM_COUNT <= (int)LLMPAR_ARENA_STREAMS ? 1 : -1];

LLMPAR__PRIVATE_DEF llmpar_status llmpar__fsdp_alloc(llmpar_fsdp *fsdp, llmpar_stream_id stream, llmpar_tag tag, size_t bytes, const char *label, void **out)
{
    llmpar_status status = llmpar_arena_alloc(fsdp->arena, tag, bytes, label, out);
    if (status) return status;
    for (int other = 0; other < LLMPAR_STREAM_COUNT && !status; other++) {
        uint64_t serial = llmpar_arena_mark(fsdp->arena, *out, other);
        if (other == (int)stream || fsdp->free_seen[stream][other] >= serial) continue;
        status = fsdp->device->event_wait(fsdp->device, fsdp->stream[stream], fsdp->free_event[other][serial % LLMPAR__FREE_EVENTS]);
        fsdp->free_seen[stream][other] = serial + (fsdp->free_serial[other] - serial) / LLMPAR__FREE_EVENTS * LLMPAR__FREE_EVENTS; /* the event was recorded again by each of these */
    }
    return status;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__fsdp_free(llmpar_fsdp *fsdp, llmpar_stream_id stream, void **memory)
{
    if (!*memory) return LLMPAR_OK;
    uint64_t serial = ++fsdp->free_serial[stream];
    llmpar_arena_free_marked(fsdp->arena, *memory, (int32_t)stream, serial);
    *memory = NULL;
    return fsdp->device->event_record(fsdp->device, fsdp->stream[stream], fsdp->free_event[stream][serial % LLMPAR__FREE_EVENTS]);
}

/* ---- a unit's own memory ---- */

LLMPAR__PRIVATE_DEF size_t llmpar__fsdp_shard_bytes(const llmpar_fsdp *fsdp, const llmpar__flat *flat)
{
    return (size_t)(fsdp->whole_params ? flat->elements : flat->shard_elements) * llmpar_dtype_size(fsdp->dtype);
}

LLMPAR__PRIVATE_DEF int llmpar__fsdp_has_master(const llmpar_fsdp *fsdp, const llmpar__flat *flat) { return fsdp->policy.master && !flat->unit.frozen; }

/* This rank's part of the shard. */
LLMPAR__PRIVATE_DEF void *llmpar__fsdp_own_part(const llmpar_fsdp *fsdp, const llmpar__flat *flat)
{
    if (!flat->shard || !fsdp->whole_params) return flat->shard;
    return (char *)flat->shard + (size_t)flat->begin * llmpar_dtype_size(fsdp->dtype);
}

LLMPAR__PRIVATE_DEF void *llmpar__fsdp_updated(const llmpar_fsdp *fsdp, const llmpar__flat *flat) { return fsdp->policy.master ? flat->master : llmpar__fsdp_own_part(fsdp, flat); }

LLMPAR__PRIVATE_DEF int32_t llmpar__fsdp_moved(llmpar_fsdp *fsdp, int32_t unit, llmpar_state what, int32_t use, int32_t slot, int32_t micro_batch, llmpar__moved out[2])
{
    llmpar__flat *flat = &fsdp->units[unit];
    int32_t count = 1;
    memset(out, 0, 2 * sizeof *out);
    switch (what) {
    case LLMPAR_STATE_OPTIMIZER:
        count = flat->unit.frozen ? 0 : fsdp->optimizer_states;
        for (int32_t i = 0; i < count; i++) {
            out[i].memory = &flat->state[i];
            out[i].tag = LLMPAR_TAG_OPTIMIZER;
            out[i].label = flat->label[LLMPAR__LABEL_OPTIMIZER];
            out[i].place = &flat->state_place[i];
        }
        break;
    case LLMPAR_STATE_PARAMS:
        count = !fsdp->policy.master || llmpar__fsdp_has_master(fsdp, flat);
        out->memory = fsdp->policy.master ? &flat->master : &flat->shard;
        out->tag = fsdp->policy.master ? LLMPAR_TAG_OPTIMIZER : LLMPAR_TAG_PARAMETERS;
        out->label = flat->label[fsdp->policy.master ? LLMPAR__LABEL_OPTIMIZER : LLMPAR__LABEL_SHARD];
        out->place = &flat->params_place;
        break;
    case LLMPAR_STATE_GRADS:
        out->memory = &flat->grad[use][0][slot];
        out->tag = LLMPAR_TAG_GRADIENTS;
        out->label = flat->label[LLMPAR__LABEL_GRADIENT];
        out->place = &flat->grad_place[use][slot];
        break;
    default:
        count = unit > 0 ? 2 : 1;
        out[0].memory = &flat->saved[micro_batch];
        out[1].memory = unit > 0 ? &fsdp->units[unit - 1].output[micro_batch] : NULL;
        for (int32_t i = 0; i < 2; i++) {
            out[i].tag = LLMPAR_TAG_ACTIVATIONS;
            out[i].label = flat->label[LLMPAR__LABEL_ACTIVATIONS];
            out[i].place = &flat->activation_place[2 * micro_batch + i];
        }
        break;
    }
    return count;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__fsdp_fetch(llmpar_fsdp *fsdp, llmpar_stream_id stream, const llmpar__moved *moved)
{
    if (*moved->memory) return llmpar_fail(fsdp->ctx, LLMPAR_ERR_SCHEDULE, "%s: fetched while it is on the device", moved->label);
    llmpar_status status = llmpar__fsdp_alloc(fsdp, stream, moved->tag, (size_t)moved->place->used, moved->label, moved->memory);
    return status ? status : llmpar__store_transfer(fsdp->store, fsdp->stream[stream], moved->place, *moved->memory, moved->label, 0);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__fsdp_put(llmpar_fsdp *fsdp, llmpar_stream_id stream, const llmpar__moved *moved, int write)
{
    if (!*moved->memory) return LLMPAR_OK;
    llmpar_status status = write ? llmpar__store_transfer(fsdp->store, fsdp->stream[stream], moved->place, *moved->memory, moved->label, 1) : LLMPAR_OK;
    llmpar_status freed = llmpar__fsdp_free(fsdp, stream, moved->memory);
    return status ? status : freed;
}

/* ---- gathering ---- */

LLMPAR__PRIVATE_DEF llmpar_status llmpar__fsdp_gather(llmpar_fsdp *fsdp, llmpar__flat *flat, llmpar_stream_id stream)
{
    size_t size = llmpar_dtype_size(fsdp->dtype);
    if (fsdp->whole_state || (!fsdp->whole_params && flat->gathers++ > 0)) return LLMPAR_OK;
    if (!fsdp->whole_params) {
        llmpar_status status = llmpar__fsdp_alloc(fsdp, stream, LLMPAR_TAG_GATHERED, (size_t)flat->elements * size, flat->label[LLMPAR__LABEL_GATHER], &flat->gathered);
        if (status) return status;
        for (int32_t i = 0; i < flat->unit.param_count; i++) flat->params[i] = (char *)flat->gathered + (size_t)flat->offset[i] * size;
    }
    const llmpar_collective call = llmpar__comm_collective(llmpar__fsdp_own_part(fsdp, flat), flat->gathered, (size_t)flat->shard_elements, fsdp->dtype, flat->label[LLMPAR__LABEL_GATHER]);
    return llmpar_all_gather(fsdp->shard_comm, fsdp->stream[stream], &call);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__fsdp_release(llmpar_fsdp *fsdp, llmpar__flat *flat, llmpar_stream_id stream)
{
    if (fsdp->whole_params || flat->gathers == 0 || --flat->gathers > 0) return LLMPAR_OK;
    return llmpar__fsdp_free(fsdp, stream, &flat->gathered);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__fsdp_cast(llmpar_fsdp *fsdp, llmpar__flat *flat, llmpar_stream *stream)
{
    return llmpar__device_cast(fsdp->device, stream, flat->master, fsdp->sum, llmpar__fsdp_own_part(fsdp, flat), fsdp->dtype, (size_t)flat->shard_elements);
}

/* Fetched by hand: on the stream that moves states, which is then waited for. */
static llmpar_status llmpar__shard_fetch(llmpar_fsdp *fsdp, int32_t unit, llmpar_state what)
{
    llmpar__moved moved[2];
    llmpar_status status = LLMPAR_OK;
    int32_t count = llmpar__fsdp_moved(fsdp, unit, what, 0, 0, 0, moved);
    for (int32_t i = 0; i < count && !status; i++)
        if (!*moved[i].memory) status = llmpar__fsdp_fetch(fsdp, LLMPAR_STREAM_OFFLOAD, &moved[i]);
    return llmpar__store_failed(fsdp->store, llmpar__device_done(fsdp->device, fsdp->stream[LLMPAR_STREAM_OFFLOAD], status));
}

static llmpar_status llmpar__shard_put(llmpar_fsdp *fsdp, int32_t unit, llmpar_state what, int write)
{
    llmpar__moved moved[2];
    llmpar_status status = LLMPAR_OK;
    int32_t count = llmpar__fsdp_moved(fsdp, unit, what, 0, 0, 0, moved);
    for (int32_t i = 0; i < count; i++) {
        llmpar_status put = llmpar__fsdp_put(fsdp, LLMPAR_STREAM_OFFLOAD, &moved[i], write);
        if (!status) status = put;
    }
    return llmpar__store_failed(fsdp->store, llmpar__device_done(fsdp->device, fsdp->stream[LLMPAR_STREAM_OFFLOAD], status));
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__fsdp_not_lent(const llmpar_fsdp *fsdp)
{
    return fsdp->borrower ? llmpar_fail(fsdp->ctx, LLMPAR_ERR_ARGUMENT, "fsdp: the parameters are lent to %s, expected after they have come back", fsdp->borrower) : LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_fsdp_lend(llmpar_fsdp *fsdp, const char *borrower)
{
    llmpar_status status = borrower ? llmpar__fsdp_not_lent(fsdp) : LLMPAR_OK;
    if (!status) fsdp->borrower = borrower;
    return status;
}

LLMPAR_DEF llmpar_status llmpar_fsdp_unshard(llmpar_fsdp *fsdp, int32_t unit, void *const **params)
{
    llmpar__flat *flat = &fsdp->units[unit];
    llmpar_status status = llmpar__fsdp_not_lent(fsdp);
    int fetch = !flat->shard && !status;
    if (fetch) status = llmpar__shard_fetch(fsdp, unit, LLMPAR_STATE_PARAMS);
    if (!status && fsdp->whole_params) flat->gathers++;
    else if (!status) {
        status = llmpar__fsdp_gather(fsdp, flat, LLMPAR_STREAM_GATHER);
        status = llmpar__device_done(fsdp->device, fsdp->stream[LLMPAR_STREAM_GATHER], status);
        if (status) llmpar__fsdp_release(fsdp, flat, LLMPAR_STREAM_GATHER);
    }
    if (fetch) {
        llmpar_status put = llmpar__shard_put(fsdp, unit, LLMPAR_STATE_PARAMS, 0);
        if (!status) status = put;
    }
    if (!status && params) *params = flat->params;
    return status;
}

LLMPAR_DEF llmpar_status llmpar_fsdp_reshard(llmpar_fsdp *fsdp, int32_t unit)
{
    llmpar__flat *flat = &fsdp->units[unit];
    if (flat->gathers <= (fsdp->borrower != NULL)) return llmpar_fail(fsdp->ctx, LLMPAR_ERR_ARGUMENT, "unit %s: reshard without unshard", flat->unit.name);
    if (!fsdp->whole_params) return llmpar__fsdp_release(fsdp, flat, LLMPAR_STREAM_GATHER);
    flat->gathers--;
    return LLMPAR_OK;
}

/* ---- looking in ---- */

LLMPAR_DEF void llmpar_fsdp_desc_policy(const llmpar_fsdp_desc *desc, const llmpar_mesh *mesh, llmpar_policy *policy)
{
    policy->zero = desc->zero == LLMPAR_ZERO_DEFAULT ? LLMPAR_ZERO_3 : desc->zero;
    policy->shards = policy->zero == LLMPAR_ZERO_0 ? 1 : mesh->degree[LLMPAR_AXIS_DP_SHARD];
    policy->replicas = policy->shards == 1 ? mesh->dp_ranks : mesh->degree[LLMPAR_AXIS_DP_REPLICATE];
    policy->master = desc->dtype != LLMPAR_DTYPE_DEFAULT && llmpar_dtype_sum(desc->dtype) != desc->dtype;
    policy->offload = 0;
    policy->host_update = desc->offload_update == LLMPAR_TIER_HOST;
    for (int i = 0; i < LLMPAR_STATE_COUNT; i++)
        if (desc->offload[i] != LLMPAR_TIER_DEVICE) policy->offload |= 1u << i;
}

LLMPAR_DEF void llmpar_fsdp_policy(const llmpar_fsdp *fsdp, llmpar_policy *policy)
{
    policy->zero = fsdp->policy.zero;
    policy->shards = fsdp->policy.shards;
    policy->replicas = fsdp->policy.replicas;
    policy->master = fsdp->policy.master;
    policy->offload = fsdp->policy.offload;
    policy->host_update = fsdp->policy.host_update;
}
LLMPAR_DEF int32_t llmpar_fsdp_unit_count(const llmpar_fsdp *fsdp) { return fsdp->unit_count; }
LLMPAR_DEF const llmpar_unit *llmpar_fsdp_unit(const llmpar_fsdp *fsdp, int32_t unit) { return &fsdp->units[unit].unit; }
LLMPAR_DEF llmpar_mesh *llmpar_fsdp_mesh(llmpar_fsdp *fsdp) { return fsdp->mesh; }
LLMPAR_DEF llmpar_arena *llmpar_fsdp_arena(llmpar_fsdp *fsdp) { return fsdp->arena; }
LLMPAR_DEF llmpar_dtype llmpar_fsdp_dtype(const llmpar_fsdp *fsdp) { return fsdp->dtype; }

LLMPAR_DEF void llmpar_fsdp_layout(const llmpar_fsdp *fsdp, int32_t unit, int64_t *elements, const llmpar_segment **segments, int32_t *segment_count)
{
    const llmpar__flat *flat = &fsdp->units[unit];
    if (elements) *elements = flat->shard_elements;
    if (segments) *segments = flat->segments;
    if (segment_count) *segment_count = flat->segment_count;
}

LLMPAR_DEF void *llmpar_fsdp_shard(llmpar_fsdp *fsdp, int32_t unit, int64_t *elements, const llmpar_segment **segments, int32_t *segment_count)
{
    llmpar__flat *flat = &fsdp->units[unit];
    void *now = llmpar__fsdp_updated(fsdp, flat);
    llmpar_status status = LLMPAR_OK;
    llmpar_fsdp_layout(fsdp, unit, elements, segments, segment_count);
    if (llmpar__fsdp_not_lent(fsdp)) return NULL;
    if (now) return now;
    if (!fsdp->policy.master || llmpar__fsdp_has_master(fsdp, flat)) {
        status = llmpar__shard_fetch(fsdp, unit, LLMPAR_STATE_PARAMS);
    } else { /* frozen below f32: a copy in the sum type */
        status = llmpar__fsdp_alloc(fsdp, LLMPAR_STREAM_COMPUTE, LLMPAR_TAG_OPTIMIZER, (size_t)flat->shard_elements * llmpar_dtype_size(fsdp->sum), flat->label[LLMPAR__LABEL_OPTIMIZER], &flat->master);
        if (!status) status = llmpar__device_cast(fsdp->device, fsdp->stream[LLMPAR_STREAM_COMPUTE], llmpar__fsdp_own_part(fsdp, flat), fsdp->dtype, flat->master, fsdp->sum, (size_t)flat->shard_elements);
        status = llmpar__device_done(fsdp->device, fsdp->stream[LLMPAR_STREAM_COMPUTE], status);
    }
    if (status) {
        llmpar_fail(fsdp->ctx, status, "unit %s: its parameters cannot be fetched", flat->unit.name);
        llmpar_fsdp_shard_done(fsdp, unit, 0);
        return NULL;
    }
    flat->held = 1;
    return llmpar__fsdp_updated(fsdp, flat);
}

LLMPAR_DEF llmpar_status llmpar_fsdp_shard_done(llmpar_fsdp *fsdp, int32_t unit, int32_t changed)
{
    llmpar__flat *flat = &fsdp->units[unit];
    llmpar_status status = LLMPAR_OK;
    if (changed && llmpar__fsdp_not_lent(fsdp)) return LLMPAR_ERR_ARGUMENT;
    if (changed && flat->master) status = llmpar__fsdp_cast(fsdp, flat, fsdp->stream[LLMPAR_STREAM_COMPUTE]);
    if (changed && !status && fsdp->whole_params) status = llmpar__fsdp_gather(fsdp, flat, LLMPAR_STREAM_COMPUTE);
    status = llmpar__device_done(fsdp->device, fsdp->stream[LLMPAR_STREAM_COMPUTE], status);
    flat->held = 0;
    llmpar_status put = LLMPAR_OK;
    if (flat->params_place.bytes) put = llmpar__shard_put(fsdp, unit, LLMPAR_STATE_PARAMS, changed);
    else if (flat->master && !llmpar__fsdp_has_master(fsdp, flat)) put = llmpar__fsdp_free(fsdp, LLMPAR_STREAM_COMPUTE, &flat->master);
    return status ? status : put;
}

LLMPAR_DEF int32_t llmpar_fsdp_optimizer_states(const llmpar_fsdp *fsdp) { return fsdp->optimizer_states; }

LLMPAR_DEF void *llmpar_fsdp_optimizer_state(llmpar_fsdp *fsdp, int32_t unit, int32_t index)
{
    llmpar__flat *flat = &fsdp->units[unit];
    if (flat->unit.frozen) return NULL;
    if (flat->state[index]) return flat->state[index];
    llmpar_status status = llmpar__shard_fetch(fsdp, unit, LLMPAR_STATE_OPTIMIZER);
    flat->held_state = 1;
    if (!status) return flat->state[index];
    llmpar_fail(fsdp->ctx, status, "unit %s: its optimizer state cannot be fetched", flat->unit.name);
    llmpar_fsdp_optimizer_done(fsdp, unit, 0);
    return NULL;
}

LLMPAR_DEF llmpar_status llmpar_fsdp_optimizer_done(llmpar_fsdp *fsdp, int32_t unit, int32_t changed)
{
    if (!fsdp->units[unit].held_state) return LLMPAR_OK;
    fsdp->units[unit].held_state = 0;
    return llmpar__shard_put(fsdp, unit, LLMPAR_STATE_OPTIMIZER, changed);
}

static llmpar_status llmpar__shard_scan(llmpar_fsdp *fsdp, const llmpar__flat *flat, const void *shard, int64_t base, int64_t *best)
{
    int64_t limbs[LLMPAR_EXACT_SUM_LIMBS];
    size_t size = llmpar_dtype_size(fsdp->sum);
    for (int32_t s = 0; s < flat->segment_count; s++) {
        const llmpar_segment *segment = &flat->segments[s];
        LLMPAR__ZEROED(llmpar_square_sum_args, args);
        args.count = (size_t)segment->count;
        args.x = (const char *)shard + (size_t)segment->begin * size;
        args.accumulator = fsdp->scalars;
        args.dtype = fsdp->sum;
        llmpar_status status = fsdp->device->zero(fsdp->device, fsdp->stream[0], fsdp->scalars, sizeof limbs);
        if (!status) status = fsdp->device->square_sum(fsdp->device, fsdp->stream[0], &args);
        if (!status) status = fsdp->device->copy(fsdp->device, fsdp->stream[0], limbs, fsdp->scalars, sizeof limbs);
        if (!status) status = fsdp->device->synchronize(fsdp->device, fsdp->stream[0]);
        if (status) return status;
        int special = limbs[LLMPAR_EXACT_SUM_LIMBS - 3] || limbs[LLMPAR_EXACT_SUM_LIMBS - 2] || limbs[LLMPAR_EXACT_SUM_LIMBS - 1];
        if (special && (*best < 0 || base + segment->param < *best)) *best = base + segment->param;
    }
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__fsdp_first_nonfinite(llmpar_fsdp *fsdp, int64_t *index)
{
    llmpar_status status = LLMPAR_OK;
    int64_t best = -1;
    for (int32_t u = 0; u < fsdp->unit_count && !status; u++) {
        int here = llmpar__fsdp_updated(fsdp, &fsdp->units[u]) != NULL;
        const void *shard = llmpar_fsdp_shard(fsdp, u, NULL, NULL, NULL);
        status = shard ? llmpar__shard_scan(fsdp, &fsdp->units[u], shard, (int64_t)u << 16, &best) : fsdp->ctx->error.status;
        llmpar_status done = here || !shard ? LLMPAR_OK : llmpar_fsdp_shard_done(fsdp, u, 0);
        if (!status) status = done;
    }
    for (int32_t u = 0; u < fsdp->unit_count && !status; u++) {
        llmpar__flat *flat = &fsdp->units[u];
        size_t begin = fsdp->whole_grads ? (size_t)flat->begin * llmpar_dtype_size(fsdp->sum) : 0;
        int stored = !flat->grad[0][0][0] && flat->grad_stored & 1u;
        if (stored) status = llmpar__shard_fetch(fsdp, u, LLMPAR_STATE_GRADS);
        if (!status && flat->grad[0][0][0]) status = llmpar__shard_scan(fsdp, flat, (const char *)flat->grad[0][0][0] + begin, ((int64_t)1 << 40) + ((int64_t)u << 16), &best);
        llmpar_status put = stored ? llmpar__shard_put(fsdp, u, LLMPAR_STATE_GRADS, 0) : LLMPAR_OK;
        if (!status) status = put;
    }
    if (status) return status;
    /* The smallest index wins: the largest of its negative. */
    int64_t agreed = best < 0 ? INT64_MIN / 2 : -best;
    status = llmpar__comm_largest(fsdp->mesh->world, &agreed, 1, "first non-finite tensor");
    *index = agreed == INT64_MIN / 2 ? -1 : -agreed;
    return status;
}

LLMPAR_DEF llmpar_status llmpar_fsdp_find_nonfinite(llmpar_fsdp *fsdp, char *text, size_t capacity)
{
    int64_t index;
    llmpar_status status = llmpar__fsdp_first_nonfinite(fsdp, &index);
    if (capacity) text[0] = 0;
    if (!status && index >= 0) snprintf(text, capacity, "%s", fsdp->units[(index >> 16) & 0xffffff].unit.params[index & 0xffff].name);
    return status;
}
