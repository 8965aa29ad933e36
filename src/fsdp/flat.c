#include "fsdp/fsdp.h"
#include "fsdp/fsdp_internal.h"

#include <string.h>
#include <stdio.h>

#include "base/rng.h"
#include "base/size.h"
#include "mesh/mesh_internal.h"

/* ---- layout ---- */

/* As ranks of this tp coordinate have it, whose extents, and so offsets, may differ from ours. */
static void llmpar__flat_dtensor(const llmpar_fsdp *fsdp, int32_t unit, int32_t param, int32_t tp, llmpar_dtensor *out)
{
    const llmpar_unit *u = &fsdp->units[unit].unit;
    const llmpar_param *p = &u->params[param];
    const int64_t *offset = fsdp->units[unit].layout + (size_t)tp * (size_t)(u->param_count + 1);
    memset(out, 0, sizeof *out);
    out->name = p->name;
    out->dtype = fsdp->sum;
    out->dims = p->dims;
    for (int i = 0; i < p->dims; i++) out->shape[i] = p->shape[i];
    if (p->tp.kind == LLMPAR_SHARD) {
        out->placement[out->placements] = p->tp;
        out->placement[out->placements++].axis = LLMPAR_AXIS_TP;
    }
    if (fsdp->whole_state) return;
    llmpar_placement *cut = &out->placement[out->placements++];
    cut->kind = LLMPAR_FLAT;
    cut->axis = LLMPAR_AXIS_DP_SHARD;
    cut->offset = offset[param];
    cut->unit_elements = llmpar_round_up(offset[u->param_count], LLMPAR_FLAT_ALIGN * (int64_t)fsdp->mesh->degree[LLMPAR_AXIS_DP_SHARD]);
}

LLMPAR_DEF void llmpar_fsdp_dtensor(const llmpar_fsdp *fsdp, int32_t unit, int32_t param, llmpar_dtensor *out) { llmpar__flat_dtensor(fsdp, unit, param, fsdp->mesh->coordinate[LLMPAR_AXIS_TP], out); }

LLMPAR_DEF void llmpar_fsdp_part(const llmpar_fsdp *fsdp, int32_t rank, int32_t unit, int32_t param, llmpar_local *out)
{
    int32_t coordinate[LLMPAR_MESH_AXES];
    llmpar_dtensor tensor;
    llmpar__mesh_coordinate(fsdp->mesh->degree, rank, coordinate);
    llmpar__flat_dtensor(fsdp, unit, param, coordinate[LLMPAR_AXIS_TP], &tensor);
    llmpar_dtensor_local(&tensor, fsdp->mesh->degree, coordinate, out);
}

LLMPAR_DEF void *llmpar_fsdp_local(const llmpar_fsdp *fsdp, int32_t unit, int32_t param, void *shard)
{
    if (!fsdp->whole_state) return shard;
    return (char *)shard + (size_t)fsdp->units[unit].offset[param] * llmpar_dtype_size(fsdp->sum);
}

/* Offsets of the tp-local tensors, the flat buffer's size, and this rank's segments. */
static llmpar_status llmpar__flat_layout(llmpar_fsdp *fsdp, int32_t index)
{
    llmpar_ctx *ctx = fsdp->ctx;
    llmpar__flat *flat = &fsdp->units[index];
    int32_t n = flat->unit.param_count, coordinate[LLMPAR_MESH_AXES] = { 0 }, *tp = &coordinate[LLMPAR_AXIS_TP];
    int64_t ranks = fsdp->shard_comm ? fsdp->shard_comm->ranks : 1;
    for (int32_t i = 0; i < n; i++) {
        llmpar_dtensor tensor;
        llmpar_local local;
        llmpar_fsdp_dtensor(fsdp, index, i, &tensor);
        if (tensor.placements && tensor.placement[tensor.placements - 1].kind == LLMPAR_FLAT) tensor.placements--; /* the flat cut is what we are laying out */
        llmpar_status status = llmpar_dtensor_check(&tensor, fsdp->mesh->degree, &ctx->error);
        if (status) return status;
        for (*tp = 0; *tp < fsdp->mesh->degree[LLMPAR_AXIS_TP]; ++*tp) {
            int64_t *offset = flat->layout + (size_t)*tp * (size_t)(n + 1) + i;
            llmpar_dtensor_local(&tensor, fsdp->mesh->degree, coordinate, &local);
            if (local.elements > ((int64_t)1 << 40)) return llmpar_fail(ctx, LLMPAR_ERR_OVERFLOW, "%s: %lld local elements are more than 2^40", tensor.name, (long long)local.elements);
            offset[1] = llmpar_round_up(offset[0] + local.elements, LLMPAR_FLAT_ALIGN);
            if (offset == &flat->offset[i]) flat->count[i] = local.elements;
        }
    }
    flat->elements = llmpar_round_up(flat->offset[n], LLMPAR_FLAT_ALIGN * ranks);
    if (flat->elements == 0) flat->elements = LLMPAR_FLAT_ALIGN * ranks;
    flat->shard_elements = flat->elements / ranks;
    flat->begin = fsdp->shard_comm ? fsdp->shard_comm->rank * flat->shard_elements : 0;
    for (int32_t i = 0; i < n; i++) {
        llmpar_dtensor tensor;
        llmpar_local local;
        llmpar_fsdp_dtensor(fsdp, index, i, &tensor);
        llmpar_status status = llmpar_dtensor_check(&tensor, fsdp->mesh->degree, &ctx->error);
        if (status) return status;
        llmpar__mesh_local(fsdp->mesh, &tensor, &local);
        if (local.flat_count == 0) continue;
        llmpar_segment *segment = &flat->segments[flat->segment_count++];
        segment->param = i;
        segment->no_decay = flat->unit.params[i].no_decay;
        segment->owner = fsdp->counts && local.is_owner;
        segment->begin = fsdp->whole_state ? flat->offset[i] : local.shard_begin;
        segment->count = local.flat_count;
    }
    return LLMPAR_OK;
}

/* ---- creation ---- */

#define LLMPAR__FLAT_CHUNK ((int64_t)1 << 16) /* elements of initial values that are made and copied at a time */

static char *llmpar__flat_label(llmpar_heap *heap, const char *unit, const char *what)
{
    size_t bytes = strlen(unit) + strlen(what) + 2;
    char *text = LLMPAR__ALLOC(char, heap, bytes);
    if (text) snprintf(text, bytes, "%s/%s", unit, what);
    return text;
}

static llmpar_status llmpar__flat_copy(llmpar_fsdp *fsdp, int32_t index, const llmpar_unit *unit)
{
    static const char *const what[] = {"shard", "all_gather", "gradient", "reduce_scatter", "all_reduce", "activations", "optimizer"};
    llmpar_heap *heap = &fsdp->ctx->heap;
    llmpar__flat *flat = &fsdp->units[index];
    size_t n = (size_t)unit->param_count;
    flat->unit = *unit;
    flat->unit.params = NULL;
    flat->unit.name = NULL;
    if (unit->param_count < 0 || unit->forward_count > LLMPAR__UNIT_EVENTS || unit->backward_count > LLMPAR__UNIT_EVENTS)
        return llmpar_fail(fsdp->ctx, LLMPAR_ERR_ARGUMENT, "unit %s: %d parameters, %d + %d instructions; expected >= 0 and at most %d a pass", unit->name, (int)unit->param_count, (int)unit->forward_count,
                           (int)unit->backward_count, LLMPAR__UNIT_EVENTS);
    for (size_t i = 0; i < n; i++)
        if (unit->params[i].dims < 0 || unit->params[i].dims > LLMPAR_MAX_DIMS) return llmpar_fail(fsdp->ctx, LLMPAR_ERR_SHAPE, "%s: %d dims, expected 0 .. %d", unit->params[i].name, (int)unit->params[i].dims, LLMPAR_MAX_DIMS);
    flat->unit.name = llmpar_heap_strdup(heap, unit->name);
    llmpar_param *params = LLMPAR__ZALLOC(llmpar_param, heap, n + 1);
    flat->unit.params = params;
    flat->layout = LLMPAR__ZALLOC(int64_t, heap, (n + 1) * (size_t)fsdp->mesh->degree[LLMPAR_AXIS_TP]);
    flat->count = LLMPAR__ZALLOC(int64_t, heap, n + 1);
    flat->segments = LLMPAR__ZALLOC(llmpar_segment, heap, n + 1);
    flat->params = LLMPAR__ZALLOC(void *, heap, n + 1);
    flat->grads = LLMPAR__ZALLOC(void *, heap, 2 * n + 1);
    int missing = !flat->unit.name || !params || !flat->layout || !flat->count || !flat->segments || !flat->params || !flat->grads;
    for (int i = 0; i < LLMPAR__LABEL_COUNT && !missing; i++) missing = !(flat->label[i] = llmpar__flat_label(heap, flat->unit.name, what[i]));
    for (size_t i = 0; i < n && !missing; i++) {
        params[i] = unit->params[i];
        params[i].name = llmpar_heap_strdup(heap, unit->params[i].name);
        missing = !params[i].name;
    }
    if (missing) return llmpar_fail(fsdp->ctx, LLMPAR_ERR_MEMORY, "unit %s: out of memory for its description", unit->name);
    flat->offset = flat->layout + (size_t)fsdp->mesh->coordinate[LLMPAR_AXIS_TP] * (n + 1);
    return llmpar__flat_layout(fsdp, index);
}

/* Initial values: each element from its own counter, so that a rank makes only what it holds. staging[LLMPAR__FLAT_CHUNK] in the sum type: on its way to the device. */
static llmpar_status llmpar__flat_initialise(llmpar_fsdp *fsdp, int32_t index, void *staging)
{
    enum { PART = 1024 };
    llmpar__flat *flat = &fsdp->units[index];
    size_t size = llmpar_dtype_size(fsdp->sum);
    float *values = (float *)staging, part[PART];
    double *wide = (double *)staging;
    char *shard = (char *)llmpar_fsdp_shard(fsdp, index, NULL, NULL, NULL);
    if (!shard) return fsdp->ctx->error.status;
    llmpar_status status = fsdp->device->zero(fsdp->device, fsdp->stream[0], shard, (size_t)flat->shard_elements * size);
    for (int32_t s = 0; s < flat->segment_count && !status && !fsdp->count_only; s++) {
        const llmpar_segment *segment = &flat->segments[s];
        const llmpar_param *param = &flat->unit.params[segment->param];
        llmpar_rng rng = llmpar_rng_key(fsdp->seed, LLMPAR_RNG_INIT, param->name, 0, 0);
        llmpar_dtensor tensor;
        llmpar_local local;
        llmpar_fsdp_dtensor(fsdp, index, segment->param, &tensor);
        llmpar__mesh_local(fsdp->mesh, &tensor, &local);
        for (int64_t done = 0; done < segment->count && !status;) {
            int64_t run, count = segment->count - done;
            int64_t first = llmpar_dtensor_run(&tensor, &local, local.flat_begin + done, &run);
            if (count > run) count = run;
            if (count > LLMPAR__FLAT_CHUNK) count = LLMPAR__FLAT_CHUNK;
            for (int64_t at = 0, n; at < count; at += n) {
                float *to = fsdp->sum == LLMPAR_F64 ? part : values + at;
                n = fsdp->sum == LLMPAR_F64 && count - at > PART ? (int64_t)PART : count - at;
                if (param->init_std == 0)
                    for (int64_t i = 0; i < n; i++) to[i] = (float)param->init_value;
                else
                    llmpar_rng_fill_normal_f32(&rng, (uint64_t)(first + at), (size_t)n, 0.0f, (float)param->init_std, to);
                for (int64_t i = 0; i < n && fsdp->sum == LLMPAR_F64; i++) wide[at + i] = part[i];
            }
            status = fsdp->device->copy(fsdp->device, fsdp->stream[0], shard + (size_t)(segment->begin + done) * size, staging, (size_t)count * size);
            if (!status) status = fsdp->device->synchronize(fsdp->device, fsdp->stream[0]);
            done += count;
        }
    }
    status = llmpar__device_done(fsdp->device, fsdp->stream[0], status);
    return status ? status : llmpar_fsdp_shard_done(fsdp, index, 1);
}

/* What stays in the arena, and places in the store for what does not. */
static llmpar_status llmpar__flat_memory(llmpar_fsdp *fsdp, int32_t index)
{
    llmpar__flat *flat = &fsdp->units[index];
    llmpar_device *device = fsdp->device;
    size_t bytes = (size_t)flat->shard_elements * llmpar_dtype_size(fsdp->sum);
    int away = fsdp->tier[LLMPAR_STATE_PARAMS] != LLMPAR_TIER_DEVICE, master = llmpar__fsdp_has_master(fsdp, flat);
    llmpar_status status = LLMPAR_OK;
    if (away && (master || !fsdp->policy.master)) status = llmpar__store_place(fsdp->store, fsdp->tier[LLMPAR_STATE_PARAMS], bytes, &flat->params_place);
    if (!status && (fsdp->policy.master || !away)) {
        status = llmpar_arena_alloc(fsdp->arena, LLMPAR_TAG_PARAMETERS, llmpar__fsdp_shard_bytes(fsdp, flat), flat->label[LLMPAR__LABEL_SHARD], &flat->shard);
        if (!status) status = device->zero(device, fsdp->stream[0], flat->shard, llmpar__fsdp_shard_bytes(fsdp, flat));
    }
    if (!status && master && !away) status = llmpar_arena_alloc(fsdp->arena, LLMPAR_TAG_OPTIMIZER, bytes, flat->label[LLMPAR__LABEL_OPTIMIZER], &flat->master);
    for (int32_t i = 0; i < fsdp->optimizer_states && !flat->unit.frozen && !status; i++) {
        if (fsdp->tier[LLMPAR_STATE_OPTIMIZER] != LLMPAR_TIER_DEVICE) { /* places begin as zeros */
            status = llmpar__store_place(fsdp->store, fsdp->tier[LLMPAR_STATE_OPTIMIZER], bytes, &flat->state_place[i]);
        } else {
            status = llmpar_arena_alloc(fsdp->arena, LLMPAR_TAG_OPTIMIZER, bytes, flat->label[LLMPAR__LABEL_OPTIMIZER], &flat->state[i]);
            if (!status) status = device->zero(device, fsdp->stream[0], flat->state[i], bytes);
        }
    }
    if (fsdp->whole_params) flat->gathered = flat->shard;
    for (int32_t i = 0; i < flat->unit.param_count && fsdp->whole_params && !status; i++) flat->params[i] = (char *)flat->shard + (size_t)flat->offset[i] * llmpar_dtype_size(fsdp->dtype);
    return status;
}

/* Streams, each with a thread of its own where that was asked for (file: something is offloaded to one); then no communicator serves two of them. */
static llmpar_status llmpar__fsdp_streams(llmpar_fsdp *fsdp, int overlap, int file)
{
    static const char *const names[] = {"compute", "gather", "reduce", "tp", "offload"};
    llmpar_device *device = fsdp->device;
    llmpar_status status = LLMPAR_OK;
    for (int s = 0; s < LLMPAR_STREAM_COUNT && !status; s++) status = device->stream_create(device, names[s], &fsdp->stream[s]);
    const llmpar_comm *world = fsdp->mesh->world;
    const char *alone = LLMPAR__HAS(world, one_thread) ? world->one_thread : NULL;
    if (!status && overlap && alone) return llmpar_fail(fsdp->ctx, LLMPAR_ERR_UNSUPPORTED, "fsdp: overlap: %s, expected collectives that run on any thread", alone);
    /* The compute stream first: the first one keeps the device's workers. A file is slow enough for a thread even where nothing else has one; on a device without threads it moves inside the call. */
    int threads = LLMPAR__HAS(device, stream_thread);
    for (int s = 0; s < LLMPAR_STREAM_COUNT && overlap && !status; s++) status = llmpar_device_stream_thread(device, fsdp->stream[s]);
    if (!status && !overlap && file && threads && !alone && !fsdp->count_only) status = device->stream_thread(device, fsdp->stream[LLMPAR_STREAM_OFFLOAD]);
    for (int s = 0; s < LLMPAR_STREAM_COUNT && !status; s++)
        for (unsigned e = 0; e < LLMPAR__FREE_EVENTS && !status; e++) status = device->event_create(device, &fsdp->free_event[s][e]);
    for (int e = 0; e <= LLMPAR__UNIT_EVENTS && !status; e++) status = device->event_create(device, &fsdp->unit_event[e]);
    if (status || !overlap) return status;
    llmpar_comm *shard = fsdp->shard_comm, *replica = fsdp->replica_comm;
    fsdp->shard_comm = fsdp->reduce_comm = fsdp->replica_comm = NULL;
    fsdp->own_comms = 1;
    if (shard) status = llmpar_comm_split(shard, 0, shard->rank, "dp_shard gather", &fsdp->shard_comm);
    if (shard && !status) status = llmpar_comm_split(shard, 0, shard->rank, "dp_shard reduce", &fsdp->reduce_comm);
    return status ? status : llmpar_comm_split(replica, 0, replica->rank, "dp_replicate reduce", &fsdp->replica_comm);
}

static llmpar_status llmpar__fsdp_setup(llmpar_fsdp *fsdp, const llmpar_unit *units, const llmpar_fsdp_desc *desc)
{
    llmpar_ctx *ctx = fsdp->ctx;
    int file = 0;
    llmpar_status status = LLMPAR_OK;
    for (int i = 0; i < LLMPAR_STATE_COUNT; i++) file |= fsdp->tier[i] == LLMPAR_TIER_FILE;
    if (fsdp->policy.offload) status = llmpar__store_create(ctx, desc->offload_dir, file, desc->count_only, &fsdp->store);
    if (!status) status = llmpar__fsdp_streams(fsdp, desc->overlap, file);
    for (int32_t u = 0; u < fsdp->unit_count && !status; u++) status = llmpar__flat_copy(fsdp, u, &units[u]);
    /* Names are keys of files and of the random numbers: twice the same would be a silent copy. */
    for (int32_t u = 0; u < fsdp->unit_count && !status; u++)
        for (int32_t i = 0; i < fsdp->units[u].unit.param_count && !status; i++)
            for (int32_t v = 0; v <= u && !status; v++)
                for (int32_t j = 0; j < (v == u ? i : fsdp->units[v].unit.param_count) && !status; j++)
                    if (!strcmp(fsdp->units[u].unit.params[i].name, fsdp->units[v].unit.params[j].name))
                        status = llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "parameter name %s stands in units %s and %s, expected once", fsdp->units[u].unit.params[i].name, fsdp->units[v].unit.name, fsdp->units[u].unit.name);
    int32_t ranks = fsdp->shard_comm ? fsdp->shard_comm->ranks : 1;
    fsdp->parts = LLMPAR__ZALLOC(const void *, &ctx->heap, (size_t)(ranks > fsdp->replicas ? ranks : fsdp->replicas));
    if (!status && !fsdp->parts) status = llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "fsdp: out of memory for %d ranks", (int)ranks);
    void *scalars = NULL;
    if (!status) status = llmpar_arena_alloc(fsdp->arena, LLMPAR_TAG_COMMUNICATION, (LLMPAR__SCALARS + LLMPAR_EXACT_SUM_LIMBS) * sizeof(int64_t), "loss and norm", &scalars);
    fsdp->scalars = (int64_t *)scalars;
    if (!status && llmpar_device_host_alloc(fsdp->device, &ctx->heap, LLMPAR__SCALARS * sizeof(int64_t), &scalars)) status = llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "fsdp: no host memory for loss and norm");
    if (!status) fsdp->host_scalars = (int64_t *)scalars;
    if (!status) memset(fsdp->host_scalars, 0, LLMPAR__SCALARS * sizeof(int64_t));
    for (int32_t u = 0; u < fsdp->unit_count && !status; u++) status = llmpar__flat_memory(fsdp, u);
    for (int i = 0; i < LLMPAR__CAST_BUFFERS && fsdp->policy.host_update && fsdp->policy.master && !desc->count_only && !status; i++) {
        if (llmpar_device_host_alloc(fsdp->device, &ctx->heap, (size_t)LLMPAR__CAST_PIECE * llmpar_dtype_size(fsdp->dtype), &fsdp->host_cast[i])) status = llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "fsdp: no host memory for updated parameters on their way");
        if (!status) status = fsdp->device->event_create(fsdp->device, &fsdp->host_cast_event[i]);
    }
    if (!status && fsdp->store) status = llmpar__store_fix(fsdp->store);
    size_t bytes = (size_t)LLMPAR__FLAT_CHUNK * llmpar_dtype_size(fsdp->sum);
    void *staging = NULL;
    if (!status && !desc->count_only && llmpar_device_host_alloc(fsdp->device, &ctx->heap, bytes, &staging)) status = llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "fsdp: no host memory for initial values");
    for (int32_t u = 0; u < fsdp->unit_count && !status; u++) status = llmpar__flat_initialise(fsdp, u, staging);
    llmpar_device_host_free(fsdp->device, &ctx->heap, staging, bytes);
    return status;
}

static llmpar_status llmpar__fsdp_resolve(llmpar_fsdp *fsdp, const llmpar_fsdp_desc *desc)
{
    llmpar_ctx *ctx = fsdp->ctx;
    const llmpar_mesh *mesh = fsdp->mesh;
    llmpar_policy *policy = &fsdp->policy;
    if (desc->zero < LLMPAR_ZERO_DEFAULT || desc->zero > LLMPAR_ZERO_3) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "fsdp: zero = %d, expected LLMPAR_ZERO_0 .. LLMPAR_ZERO_3", (int)desc->zero);
    fsdp->dtype = desc->dtype == LLMPAR_DTYPE_DEFAULT ? LLMPAR_F32 : desc->dtype;
    if (!llmpar__dtype_floats(fsdp->dtype))
        return llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "fsdp: dtype %s, expected f32, f64, bf16 or f16", llmpar_dtype_name(fsdp->dtype));
    fsdp->sum = llmpar_dtype_sum(fsdp->dtype);
    fsdp->reduce = desc->reduce_dtype == LLMPAR_DTYPE_DEFAULT ? fsdp->sum : desc->reduce_dtype;
    if (fsdp->reduce != fsdp->sum && (fsdp->sum != LLMPAR_F32 || (fsdp->reduce != LLMPAR_BF16 && fsdp->reduce != LLMPAR_F16)))
        return llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "fsdp: reduce_dtype %s with dtype %s, expected %s%s", llmpar_dtype_name(fsdp->reduce), llmpar_dtype_name(fsdp->dtype), llmpar_dtype_name(fsdp->sum), fsdp->sum == LLMPAR_F32 ? ", bf16 or f16" : "");
    if (desc->optimizer_states < 0 || desc->optimizer_states > LLMPAR_OPTIMIZER_STATES)
        return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "fsdp: optimizer_states = %d, expected 0 .. %d", (int)desc->optimizer_states, LLMPAR_OPTIMIZER_STATES);
    fsdp->optimizer_states = desc->optimizer_states;
    llmpar_fsdp_desc_policy(desc, mesh, policy);
    for (int i = 0; i < LLMPAR_STATE_COUNT; i++) {
        static const char *const names[] = {"optimizer", "params", "grads", "activations"};
        if ((int)desc->offload[i] < LLMPAR_TIER_DEVICE || (int)desc->offload[i] > LLMPAR_TIER_FILE) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "fsdp: offload of %s to tier %d, expected LLMPAR_TIER_DEVICE, _HOST or _FILE", names[i], (int)desc->offload[i]);
        fsdp->tier[i] = desc->offload[i];
    }
    if (desc->offload_update != LLMPAR_TIER_DEVICE && desc->offload_update != LLMPAR_TIER_HOST)
        return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "fsdp: offload_update = %d, expected LLMPAR_TIER_DEVICE or _HOST", (int)desc->offload_update);
    for (int i = LLMPAR_STATE_OPTIMIZER; i <= LLMPAR_STATE_GRADS && desc->offload_update == LLMPAR_TIER_HOST; i++) {
        static const char *const tiers[] = {"device", "host", "file"};
        if (desc->offload[i] != LLMPAR_TIER_HOST)
            return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "fsdp: updates on the host with optimizer=%s, params=%s, grads=%s, expected all three offloaded to host", tiers[desc->offload[LLMPAR_STATE_OPTIMIZER]], tiers[desc->offload[LLMPAR_STATE_PARAMS]],
                               tiers[desc->offload[LLMPAR_STATE_GRADS]]);
    }
    fsdp->whole_params = llmpar_policy_whole_params(policy);
    fsdp->whole_grads = llmpar_policy_whole_grads(policy);
    fsdp->whole_state = llmpar_policy_whole_state(policy);
    if (fsdp->tier[LLMPAR_STATE_PARAMS] != LLMPAR_TIER_DEVICE && fsdp->whole_params && !policy->master)
        return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "fsdp: offload of params, dtype %s, ZeRO-%d on %d ranks: the whole parameters are in use all the time; expected ZeRO-3 on several ranks, or a dtype below f32, which has f32 master parameters to offload",
                           llmpar_dtype_name(fsdp->dtype), (int)policy->zero - LLMPAR_ZERO_0, (int)mesh->degree[LLMPAR_AXIS_DP_SHARD]);
    fsdp->shard_comm = fsdp->reduce_comm = fsdp->whole_state ? NULL : mesh->comm[LLMPAR_AXIS_DP_SHARD];
    fsdp->replica_comm = fsdp->whole_state ? mesh->dp : mesh->comm[LLMPAR_AXIS_DP_REPLICATE];
    fsdp->replicas = fsdp->replica_comm->ranks;
    fsdp->counts = fsdp->replica_comm->rank == 0;
    return LLMPAR_OK;
}

/* A region is of one stream. */
static llmpar_status llmpar__fsdp_graphs(llmpar_fsdp *fsdp, const llmpar_unit *units, int32_t unit_count)
{
    const llmpar_device *device = fsdp->device;
    if (!LLMPAR__HAS(device, region_end) || !device->region_begin)
        return llmpar_fail(fsdp->ctx, LLMPAR_ERR_UNSUPPORTED, "fsdp: graphs on device %s, which has none; expected a CUDA device in mode fast", device->name);
    for (int32_t u = 0; u < unit_count; u++)
        for (int32_t i = 0; i < units[u].forward_count + units[u].backward_count; i++) {
            const llmpar_unit_op *op = i < units[u].forward_count ? &units[u].forward[i] : &units[u].backward[i - units[u].forward_count];
            if (op->kind != LLMPAR_COMPUTE) return llmpar_fail(fsdp->ctx, LLMPAR_ERR_UNSUPPORTED, "fsdp: graphs with unit %s, whose instruction \"%s\" is a collective; expected tp = 1", units[u].name, op->name);
        }
    fsdp->graphs = 1;
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_fsdp_create(llmpar_mesh *mesh, const llmpar_unit *units, int32_t unit_count, const llmpar_fsdp_desc *desc, llmpar_fsdp **out)
{
    llmpar_ctx *ctx = mesh->ctx;
    *out = NULL;
    if (!desc) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "fsdp: no desc");
    if (unit_count < 1 || !units) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "fsdp: %d units%s, expected at least 1", (int)unit_count, units ? "" : " at NULL");
    llmpar_fsdp *fsdp = LLMPAR__ZALLOC(llmpar_fsdp, &ctx->heap, 1);
    if (!fsdp) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "fsdp: out of memory");
    fsdp->ctx = ctx;
    fsdp->mesh = mesh;
    fsdp->device = ctx->device;
    fsdp->seed = desc->seed;
    fsdp->count_only = desc->count_only;
    fsdp->first_backward = llmpar_schedule_first_backward(units, unit_count);
    llmpar_status status = llmpar__fsdp_resolve(fsdp, desc);
    if (!status && desc->graphs) status = llmpar__fsdp_graphs(fsdp, units, unit_count);
    if (!status) {
        fsdp->unit_count = unit_count;
        fsdp->units = LLMPAR__ZALLOC(llmpar__flat, &ctx->heap, (size_t)unit_count);
        status = fsdp->units ? llmpar_arena_create(ctx, desc->memory_limit, &fsdp->arena) : llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "fsdp: out of memory for %d units", (int)unit_count);
    }
    if (!status) status = llmpar_arena_reserve(fsdp->arena, desc->memory_reserve);
    if (!status) status = llmpar__fsdp_setup(fsdp, units, desc);
    if (status) llmpar_fsdp_destroy(fsdp);
    else *out = fsdp;
    return status;
}

LLMPAR_DEF void llmpar_fsdp_destroy(llmpar_fsdp *fsdp)
{
    if (!fsdp) return;
    llmpar_heap *heap = &fsdp->ctx->heap;
    for (int s = 0; s < LLMPAR_STREAM_COUNT; s++)
        if (fsdp->stream[s]) fsdp->device->synchronize(fsdp->device, fsdp->stream[s]); /* its failure was reported where it happened */
    for (int32_t u = 0; u < fsdp->unit_count && fsdp->units; u++) {
        llmpar__flat *flat = &fsdp->units[u];
        for (int32_t i = 0; i < flat->unit.param_count && flat->unit.params; i++) llmpar_heap_free(heap, (void *)(uintptr_t)flat->unit.params[i].name);
        for (int i = 0; i < LLMPAR__LABEL_COUNT; i++) llmpar_heap_free(heap, flat->label[i]);
        llmpar_heap_free(heap, (void *)(uintptr_t)flat->unit.params);
        llmpar_heap_free(heap, (void *)(uintptr_t)flat->unit.name);
        llmpar_heap_free(heap, flat->layout);
        llmpar_heap_free(heap, flat->count);
        llmpar_heap_free(heap, flat->segments);
        llmpar_heap_free(heap, flat->params);
        llmpar_heap_free(heap, flat->grads);
        llmpar_heap_free(heap, flat->output);
        llmpar_heap_free(heap, flat->saved);
        llmpar_heap_free(heap, flat->dinput);
        if (fsdp->store) { /* without one there is no place */
            llmpar__store_drop(fsdp->store, &flat->params_place);
            for (int i = 0; i < LLMPAR_OPTIMIZER_STATES; i++) llmpar__store_drop(fsdp->store, &flat->state_place[i]);
            for (int i = 0; i < 2 * LLMPAR_GRAD_SLOTS; i++) llmpar__store_drop(fsdp->store, &flat->grad_place[i / LLMPAR_GRAD_SLOTS][i % LLMPAR_GRAD_SLOTS]);
            for (int32_t i = 0; i < 2 * flat->activation_count; i++) llmpar__store_drop(fsdp->store, &flat->activation_place[i]);
        }
        llmpar_heap_free(heap, flat->activation_place);
    }
    llmpar_arena_destroy(fsdp->arena);
    llmpar__store_destroy(fsdp->store);
    if (fsdp->own_comms) {
        llmpar_comm_destroy(fsdp->shard_comm);
        llmpar_comm_destroy(fsdp->reduce_comm);
        llmpar_comm_destroy(fsdp->replica_comm);
    }
    for (int32_t e = 0; e < fsdp->event_count; e++)
        if (fsdp->event[e]) fsdp->device->event_destroy(fsdp->device, fsdp->event[e]);
    for (int e = 0; e <= LLMPAR__UNIT_EVENTS; e++)
        if (fsdp->unit_event[e]) fsdp->device->event_destroy(fsdp->device, fsdp->unit_event[e]);
    for (int s = 0; s < LLMPAR_STREAM_COUNT; s++) {
        for (unsigned e = 0; e < LLMPAR__FREE_EVENTS; e++)
            if (fsdp->free_event[s][e]) fsdp->device->event_destroy(fsdp->device, fsdp->free_event[s][e]);
        if (fsdp->stream[s]) fsdp->device->stream_destroy(fsdp->device, fsdp->stream[s]);
    }
    for (int i = 0; i < LLMPAR__CAST_BUFFERS; i++) {
        if (fsdp->host_cast_event[i]) fsdp->device->event_destroy(fsdp->device, fsdp->host_cast_event[i]);
        llmpar_device_host_free(fsdp->device, heap, fsdp->host_cast[i], (size_t)LLMPAR__CAST_PIECE * llmpar_dtype_size(fsdp->dtype));
    }
    llmpar_device_host_free(fsdp->device, heap, fsdp->host_scalars, LLMPAR__SCALARS * sizeof(int64_t));
    llmpar_heap_free(heap, (void *)fsdp->parts);
    llmpar_heap_free(heap, fsdp->event);
    llmpar_heap_free(heap, fsdp->units);
    llmpar_heap_free(heap, fsdp);
}

#undef LLMPAR__FLAT_CHUNK
