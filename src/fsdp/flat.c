#include "fsdp/fsdp.h"
#include "fsdp/fsdp_internal.h"

#include <string.h>
#include <stdio.h>

#include "base/rng.h"
#include "base/size.h"

/* ---- layout ---- */

LLMPAR_DEF void llmpar_fsdp_dtensor(const llmpar_fsdp *fsdp, int32_t unit, int32_t param, llmpar_dtensor *out)
{
    const llmpar__flat *flat = &fsdp->units[unit];
    const llmpar_param *p = &flat->unit.params[param];
    memset(out, 0, sizeof *out);
    out->name = p->name;
    out->dtype = fsdp->dtype;
    out->dims = p->dims;
    for (int i = 0; i < p->dims; i++) out->shape[i] = p->shape[i];
    if (p->tp.kind == LLMPAR_SHARD) {
        out->placement[out->placements] = p->tp;
        out->placement[out->placements++].axis = LLMPAR_AXIS_TP;
    }
    if (fsdp->unsharded) return;
    llmpar_placement *cut = &out->placement[out->placements++];
    cut->kind = LLMPAR_FLAT;
    cut->axis = LLMPAR_AXIS_DP_SHARD;
    cut->offset = flat->offset ? flat->offset[param] : 0;
    cut->unit_elements = flat->elements;
}

LLMPAR_DEF void *llmpar_fsdp_local(const llmpar_fsdp *fsdp, int32_t unit, int32_t param, void *shard)
{
    if (!fsdp->unsharded) return shard;
    return (char *)shard + (size_t)fsdp->units[unit].offset[param] * llmpar_dtype_size(fsdp->dtype);
}

/* Offsets of the tp-local tensors, the flat buffer's size, and this rank's segments. */
static llmpar_status llmpar__flat_layout(llmpar_fsdp *fsdp, int32_t index)
{
    llmpar_ctx *ctx = fsdp->ctx;
    llmpar__flat *flat = &fsdp->units[index];
    int32_t n = flat->unit.param_count;
    int64_t at = 0, ranks = fsdp->shard_comm ? fsdp->shard_comm->ranks : 1;
    for (int32_t i = 0; i < n; i++) {
        llmpar_dtensor tensor;
        llmpar_local local;
        llmpar_fsdp_dtensor(fsdp, index, i, &tensor);
        if (tensor.placements && tensor.placement[tensor.placements - 1].kind == LLMPAR_FLAT) tensor.placements--; /* the flat cut is what we are laying out */
        llmpar_status status = llmpar_dtensor_check(&tensor, fsdp->mesh->degree, &ctx->error);
        if (status) return status;
        llmpar_dtensor_local(&tensor, fsdp->mesh->degree, fsdp->mesh->coordinate, &local);
        flat->offset[i] = at;
        flat->count[i] = local.elements;
        if (local.elements > ((int64_t)1 << 40)) return llmpar_fail(ctx, LLMPAR_ERR_OVERFLOW, "%s: %lld local elements are more than 2^40", tensor.name, (long long)local.elements);
        at = llmpar_round_up(at + local.elements, LLMPAR_FLAT_ALIGN);
    }
    flat->offset[n] = at;
    flat->elements = llmpar_round_up(at, LLMPAR_FLAT_ALIGN * ranks);
    if (flat->elements == 0) flat->elements = LLMPAR_FLAT_ALIGN * ranks;
    flat->shard_elements = flat->elements / ranks;
    for (int32_t i = 0; i < n; i++) {
        llmpar_dtensor tensor;
        llmpar_local local;
        llmpar_fsdp_dtensor(fsdp, index, i, &tensor);
        llmpar_status status = llmpar_dtensor_check(&tensor, fsdp->mesh->degree, &ctx->error);
        if (status) return status;
        llmpar_dtensor_local(&tensor, fsdp->mesh->degree, fsdp->mesh->coordinate, &local);
        if (local.flat_count == 0) continue;
        llmpar_segment *segment = &flat->segments[flat->segment_count++];
        segment->param = i;
        segment->no_decay = flat->unit.params[i].no_decay;
        segment->owner = fsdp->counts && local.is_owner;
        segment->begin = fsdp->unsharded ? flat->offset[i] : local.shard_begin;
        segment->count = local.flat_count;
    }
    return LLMPAR_OK;
}

/* ---- creation ---- */

static char *llmpar__flat_label(llmpar_heap *heap, const char *unit, const char *what)
{
    size_t bytes = strlen(unit) + strlen(what) + 2;
    char *text = (char *)llmpar_heap_alloc(heap, 1, bytes);
    if (text) snprintf(text, bytes, "%s/%s", unit, what);
    return text;
}

static llmpar_status llmpar__flat_copy(llmpar_fsdp *fsdp, int32_t index, const llmpar_unit *unit)
{
    static const char *const what[] = {"shard", "all_gather", "gradient", "reduce_scatter", "all_reduce", "activations"};
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
    llmpar_param *params = (llmpar_param *)llmpar_heap_zalloc(heap, n + 1, sizeof *params);
    flat->unit.params = params;
    flat->offset = (int64_t *)llmpar_heap_zalloc(heap, n + 1, sizeof(int64_t));
    flat->count = (int64_t *)llmpar_heap_zalloc(heap, n + 1, sizeof(int64_t));
    flat->segments = (llmpar_segment *)llmpar_heap_zalloc(heap, n + 1, sizeof(llmpar_segment));
    flat->params = (void **)llmpar_heap_zalloc(heap, n + 1, sizeof(void *));
    flat->grads = (void **)llmpar_heap_zalloc(heap, 2 * n + 1, sizeof(void *));
    int missing = !flat->unit.name || !params || !flat->offset || !flat->count || !flat->segments || !flat->params || !flat->grads;
    for (int i = 0; i < 6 && !missing; i++) missing = !(flat->label[i] = llmpar__flat_label(heap, flat->unit.name, what[i]));
    for (size_t i = 0; i < n && !missing; i++) {
        params[i] = unit->params[i];
        params[i].name = llmpar_heap_strdup(heap, unit->params[i].name);
        missing = !params[i].name;
    }
    if (missing) return llmpar_fail(fsdp->ctx, LLMPAR_ERR_MEMORY, "unit %s: out of memory for its description", unit->name);
    return llmpar__flat_layout(fsdp, index);
}

/* Elements [first, first + count) of the row-major rectangle, as runs that are contiguous in the global tensor. */
static int64_t llmpar__flat_global(const llmpar_param *param, const llmpar_local *local, int64_t element, int64_t *run)
{
    int64_t index = 0, stride = 1, rest = element;
    *run = param->dims ? local->shape[param->dims - 1] - element % local->shape[param->dims - 1] : 1;
    for (int32_t d = param->dims - 1; d >= 0; d--) {
        index += (rest % local->shape[d] + local->offset[d]) * stride;
        rest /= local->shape[d];
        stride *= param->shape[d];
    }
    return index;
}

/* Initial values: each element from its own counter, so that a rank makes only what it holds. */
static llmpar_status llmpar__flat_initialise(llmpar_fsdp *fsdp, int32_t index)
{
    enum { CHUNK = 2048 };
    llmpar__flat *flat = &fsdp->units[index];
    size_t size = llmpar_dtype_size(fsdp->dtype);
    float values[CHUNK];
    double wide[CHUNK];
    llmpar_status status = fsdp->device->zero(fsdp->device, fsdp->stream[0], flat->shard, (size_t)flat->shard_elements * size);
    for (int32_t s = 0; s < flat->segment_count && !status; s++) {
        const llmpar_segment *segment = &flat->segments[s];
        const llmpar_param *param = &flat->unit.params[segment->param];
        llmpar_rng rng = llmpar_rng_key(fsdp->seed, LLMPAR_RNG_INIT, param->name, 0, 0);
        llmpar_dtensor tensor;
        llmpar_local local;
        llmpar_fsdp_dtensor(fsdp, index, segment->param, &tensor);
        llmpar_dtensor_local(&tensor, fsdp->mesh->degree, fsdp->mesh->coordinate, &local);
        for (int64_t done = 0; done < segment->count && !status;) {
            int64_t run, count = segment->count - done;
            int64_t first = llmpar__flat_global(param, &local, local.flat_begin + done, &run);
            if (count > run) count = run;
            if (count > CHUNK) count = CHUNK;
            if (param->init_std == 0)
                for (int64_t i = 0; i < count; i++) values[i] = (float)param->init_value;
            else
                llmpar_rng_fill_normal_f32(&rng, (uint64_t)first, (size_t)count, 0.0f, (float)param->init_std, values);
            const void *source = values;
            if (fsdp->dtype == LLMPAR_F64) {
                for (int64_t i = 0; i < count; i++) wide[i] = values[i];
                source = wide;
            }
            status = fsdp->device->copy(fsdp->device, fsdp->stream[0], (char *)flat->shard + (size_t)(segment->begin + done) * size, source, (size_t)count * size);
            if (!status) status = fsdp->device->synchronize(fsdp->device, fsdp->stream[0]);
            done += count;
        }
    }
    return status ? status : fsdp->device->synchronize(fsdp->device, fsdp->stream[0]);
}

/* The optimizer's arrays, zeroed. */
static llmpar_status llmpar__fsdp_states(llmpar_fsdp *fsdp)
{
    llmpar_status status = LLMPAR_OK;
    for (int32_t u = 0; u < fsdp->unit_count; u++) {
        llmpar__flat *flat = &fsdp->units[u];
        size_t bytes = (size_t)flat->shard_elements * llmpar_dtype_size(fsdp->dtype);
        for (int32_t i = 0; i < fsdp->optimizer_states && !flat->unit.frozen && !status; i++) {
            status = llmpar_arena_alloc(fsdp->arena, LLMPAR_TAG_OPTIMIZER, bytes, flat->unit.name, &flat->state[i]);
            if (!status) status = fsdp->device->zero(fsdp->device, fsdp->stream[0], flat->state[i], bytes);
        }
    }
    llmpar_status waited = fsdp->device->synchronize(fsdp->device, fsdp->stream[0]);
    return status ? status : waited;
}

static llmpar_status llmpar__fsdp_setup(llmpar_fsdp *fsdp, const llmpar_unit *units)
{
    static const char *const names[] = {"compute", "gather", "reduce", "tp", "offload"};
    llmpar_ctx *ctx = fsdp->ctx;
    llmpar_device *device = fsdp->device;
    llmpar_status status = LLMPAR_OK;
    for (int s = 0; s < LLMPAR_STREAM_COUNT && !status; s++) status = device->stream_create(device, names[s], &fsdp->stream[s]);
    for (int s = 0; s < LLMPAR_STREAM_COUNT && !status; s++) status = device->event_create(device, &fsdp->free_event[s]);
    for (int e = 0; e <= LLMPAR__UNIT_EVENTS && !status; e++) status = device->event_create(device, &fsdp->unit_event[e]);
    for (int32_t u = 0; u < fsdp->unit_count && !status; u++) status = llmpar__flat_copy(fsdp, u, &units[u]);
    /* Names are keys of files and of the random numbers: twice the same would be a silent copy. */
    for (int32_t u = 0; u < fsdp->unit_count && !status; u++)
        for (int32_t i = 0; i < fsdp->units[u].unit.param_count && !status; i++)
            for (int32_t v = 0; v <= u && !status; v++)
                for (int32_t j = 0; j < (v == u ? i : fsdp->units[v].unit.param_count) && !status; j++)
                    if (!strcmp(fsdp->units[u].unit.params[i].name, fsdp->units[v].unit.params[j].name))
                        status = llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "parameter name %s stands in units %s and %s, expected once", fsdp->units[u].unit.params[i].name, fsdp->units[v].unit.name, fsdp->units[u].unit.name);
    void *scalars = NULL;
    if (!status) status = llmpar_arena_alloc(fsdp->arena, LLMPAR_TAG_COMMUNICATION, LLMPAR__SCALARS * sizeof(int64_t), "loss and norm", &scalars);
    fsdp->scalars = (int64_t *)scalars;
    for (int32_t u = 0; u < fsdp->unit_count && !status; u++) {
        llmpar__flat *flat = &fsdp->units[u];
        size_t size = llmpar_dtype_size(fsdp->dtype);
        status = llmpar_arena_alloc(fsdp->arena, LLMPAR_TAG_PARAMETERS, (size_t)flat->shard_elements * size, flat->label[LLMPAR__LABEL_SHARD], &flat->shard);
        if (!status) status = llmpar__flat_initialise(fsdp, u);
        if (!status && fsdp->unsharded) {
            flat->gathered = flat->shard;
            for (int32_t i = 0; i < flat->unit.param_count; i++) flat->params[i] = (char *)flat->shard + (size_t)flat->offset[i] * size;
        }
    }
    return status ? status : llmpar__fsdp_states(fsdp);
}

LLMPAR_DEF llmpar_status llmpar_fsdp_create(llmpar_mesh *mesh, const llmpar_unit *units, int32_t unit_count, const llmpar_fsdp_desc *desc, llmpar_fsdp **out)
{
    llmpar_ctx *ctx = mesh->ctx;
    *out = NULL;
    if (unit_count < 1) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "fsdp: %d units, expected at least 1", (int)unit_count);
    if (desc->zero < LLMPAR_ZERO_DEFAULT || desc->zero > LLMPAR_ZERO_3) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "fsdp: zero = %d, expected LLMPAR_ZERO_0 or LLMPAR_ZERO_3", (int)desc->zero);
    llmpar_dtype dtype = desc->dtype == LLMPAR_DTYPE_DEFAULT ? LLMPAR_F32 : desc->dtype;
    if (dtype != LLMPAR_F32 && dtype != LLMPAR_F64) return llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "fsdp: dtype %s, expected f32 or f64", llmpar_dtype_name(dtype));
    if (desc->optimizer_states < 0 || desc->optimizer_states > LLMPAR_OPTIMIZER_STATES)
        return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "fsdp: optimizer_states = %d, expected 0 .. %d", (int)desc->optimizer_states, LLMPAR_OPTIMIZER_STATES);
    llmpar_fsdp *fsdp = (llmpar_fsdp *)llmpar_heap_zalloc(&ctx->heap, 1, sizeof *fsdp);
    if (!fsdp) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "fsdp: out of memory");
    fsdp->ctx = ctx;
    fsdp->mesh = mesh;
    fsdp->device = ctx->device;
    fsdp->dtype = dtype;
    fsdp->seed = desc->seed;
    fsdp->optimizer_states = desc->optimizer_states;
    fsdp->unsharded = desc->zero == LLMPAR_ZERO_0 || mesh->degree[LLMPAR_AXIS_DP_SHARD] == 1;
    fsdp->shard_comm = fsdp->unsharded ? NULL : mesh->comm[LLMPAR_AXIS_DP_SHARD];
    fsdp->replica_comm = fsdp->unsharded ? mesh->dp : mesh->comm[LLMPAR_AXIS_DP_REPLICATE];
    fsdp->replicas = fsdp->replica_comm->ranks;
    fsdp->counts = fsdp->replica_comm->rank == 0;
    fsdp->unit_count = unit_count;
    fsdp->units = (llmpar__flat *)llmpar_heap_zalloc(&ctx->heap, (size_t)unit_count, sizeof *fsdp->units);
    llmpar_status status = fsdp->units ? llmpar_arena_create(ctx, desc->memory_limit, &fsdp->arena) : llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "fsdp: out of memory for %d units", (int)unit_count);
    if (!status) status = llmpar__fsdp_setup(fsdp, units);
    if (status) {
        llmpar_fsdp_destroy(fsdp);
        return status;
    }
    *out = fsdp;
    return LLMPAR_OK;
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
        for (int i = 0; i < 6; i++) llmpar_heap_free(heap, flat->label[i]);
        llmpar_heap_free(heap, (void *)(uintptr_t)flat->unit.params);
        llmpar_heap_free(heap, (void *)(uintptr_t)flat->unit.name);
        llmpar_heap_free(heap, flat->offset);
        llmpar_heap_free(heap, flat->count);
        llmpar_heap_free(heap, flat->segments);
        llmpar_heap_free(heap, flat->params);
        llmpar_heap_free(heap, flat->grads);
        llmpar_heap_free(heap, flat->output);
        llmpar_heap_free(heap, flat->saved);
        llmpar_heap_free(heap, flat->dinput);
    }
    llmpar_arena_destroy(fsdp->arena);
    for (int32_t e = 0; e < fsdp->event_count; e++)
        if (fsdp->event[e]) fsdp->device->event_destroy(fsdp->device, fsdp->event[e]);
    for (int e = 0; e <= LLMPAR__UNIT_EVENTS; e++)
        if (fsdp->unit_event[e]) fsdp->device->event_destroy(fsdp->device, fsdp->unit_event[e]);
    for (int s = 0; s < LLMPAR_STREAM_COUNT; s++) {
        if (fsdp->free_event[s]) fsdp->device->event_destroy(fsdp->device, fsdp->free_event[s]);
        if (fsdp->stream[s]) fsdp->device->stream_destroy(fsdp->device, fsdp->stream[s]);
    }
    llmpar_heap_free(heap, fsdp->event);
    llmpar_heap_free(heap, fsdp->units);
    llmpar_heap_free(heap, fsdp);
}

/* ---- gathering ---- */

LLMPAR__PRIVATE_DEF llmpar_status llmpar__fsdp_gather(llmpar_fsdp *fsdp, llmpar__flat *flat, llmpar_stream *stream)
{
    size_t size = llmpar_dtype_size(fsdp->dtype);
    if (fsdp->unsharded || flat->gathers++ > 0) return LLMPAR_OK;
    llmpar_status status = llmpar_arena_alloc(fsdp->arena, LLMPAR_TAG_GATHERED, (size_t)flat->elements * size, flat->label[LLMPAR__LABEL_GATHER], &flat->gathered);
    if (status) return status;
    for (int32_t i = 0; i < flat->unit.param_count; i++) flat->params[i] = (char *)flat->gathered + (size_t)flat->offset[i] * size;
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.send = flat->shard;
    call.recv = flat->gathered;
    call.count = (size_t)flat->shard_elements;
    call.dtype = fsdp->dtype;
    call.tag = flat->label[LLMPAR__LABEL_GATHER];
    return llmpar_all_gather(fsdp->shard_comm, stream, &call);
}

LLMPAR__PRIVATE_DEF void llmpar__fsdp_release(llmpar_fsdp *fsdp, llmpar__flat *flat)
{
    if (fsdp->unsharded || flat->gathers == 0 || --flat->gathers > 0) return;
    llmpar_arena_free(fsdp->arena, flat->gathered);
    flat->gathered = NULL;
}

LLMPAR_DEF llmpar_status llmpar_fsdp_unshard(llmpar_fsdp *fsdp, int32_t unit, void *const **params)
{
    llmpar__flat *flat = &fsdp->units[unit];
    llmpar_status status = llmpar__fsdp_gather(fsdp, flat, fsdp->stream[LLMPAR_STREAM_GATHER]);
    llmpar_status waited = fsdp->device->synchronize(fsdp->device, fsdp->stream[LLMPAR_STREAM_GATHER]);
    if (!status) status = waited;
    if (status) llmpar__fsdp_release(fsdp, flat);
    else if (params) *params = flat->params;
    return status;
}

LLMPAR_DEF llmpar_status llmpar_fsdp_reshard(llmpar_fsdp *fsdp, int32_t unit)
{
    llmpar__flat *flat = &fsdp->units[unit];
    if (!fsdp->unsharded && flat->gathers == 0) return llmpar_fail(fsdp->ctx, LLMPAR_ERR_ARGUMENT, "unit %s: reshard without unshard", flat->unit.name);
    llmpar__fsdp_release(fsdp, flat);
    return LLMPAR_OK;
}

/* ---- looking in ---- */

LLMPAR_DEF void llmpar_fsdp_policy(const llmpar_fsdp *fsdp, llmpar_policy *policy)
{
    policy->shards = fsdp->unsharded ? 1 : fsdp->shard_comm->ranks;
    policy->replicas = fsdp->replicas;
}
LLMPAR_DEF int32_t llmpar_fsdp_unit_count(const llmpar_fsdp *fsdp) { return fsdp->unit_count; }
LLMPAR_DEF const llmpar_unit *llmpar_fsdp_unit(const llmpar_fsdp *fsdp, int32_t unit) { return &fsdp->units[unit].unit; }
LLMPAR_DEF llmpar_mesh *llmpar_fsdp_mesh(llmpar_fsdp *fsdp) { return fsdp->mesh; }
LLMPAR_DEF llmpar_arena *llmpar_fsdp_arena(llmpar_fsdp *fsdp) { return fsdp->arena; }
LLMPAR_DEF llmpar_dtype llmpar_fsdp_dtype(const llmpar_fsdp *fsdp) { return fsdp->dtype; }

LLMPAR_DEF int32_t llmpar_fsdp_optimizer_states(const llmpar_fsdp *fsdp) { return fsdp->optimizer_states; }
LLMPAR_DEF void *llmpar_fsdp_optimizer_state(llmpar_fsdp *fsdp, int32_t unit, int32_t index) { return fsdp->units[unit].state[index]; }

LLMPAR_DEF void *llmpar_fsdp_shard(llmpar_fsdp *fsdp, int32_t unit, int64_t *elements, const llmpar_segment **segments, int32_t *segment_count)
{
    llmpar__flat *flat = &fsdp->units[unit];
    if (elements) *elements = flat->shard_elements;
    if (segments) *segments = flat->segments;
    if (segment_count) *segment_count = flat->segment_count;
    return flat->shard;
}

static llmpar_status llmpar__flat_scan(llmpar_fsdp *fsdp, const llmpar__flat *flat, const void *shard, int64_t base, int64_t *best)
{
    int64_t limbs[LLMPAR_EXACT_SUM_LIMBS];
    size_t size = llmpar_dtype_size(fsdp->dtype);
    for (int32_t s = 0; s < flat->segment_count; s++) {
        const llmpar_segment *segment = &flat->segments[s];
        llmpar_square_sum_args args;
        memset(&args, 0, sizeof args);
        args.count = (size_t)segment->count;
        args.x = (const char *)shard + (size_t)segment->begin * size;
        args.accumulator = fsdp->scalars;
        args.dtype = fsdp->dtype;
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
    int64_t best = -1, agreed;
    for (int32_t u = 0; u < fsdp->unit_count && !status; u++) status = llmpar__flat_scan(fsdp, &fsdp->units[u], fsdp->units[u].shard, (int64_t)u << 16, &best);
    for (int32_t u = 0; u < fsdp->unit_count && !status; u++)
        if (fsdp->units[u].grad[0][0][0]) status = llmpar__flat_scan(fsdp, &fsdp->units[u], fsdp->units[u].grad[0][0][0], ((int64_t)1 << 40) + ((int64_t)u << 16), &best);
    if (status) return status;
    /* The smallest index wins: the largest of its negative. */
    agreed = best < 0 ? INT64_MIN / 2 : -best;
    status = fsdp->device->copy(fsdp->device, fsdp->stream[0], fsdp->scalars, &agreed, sizeof agreed);
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.send = call.recv = fsdp->scalars;
    call.count = 1;
    call.dtype = LLMPAR_I64;
    call.op = LLMPAR_MAX;
    call.tag = "first non-finite tensor";
    if (!status) status = llmpar_all_reduce(fsdp->mesh->world, fsdp->stream[0], &call);
    if (!status) status = fsdp->device->copy(fsdp->device, fsdp->stream[0], &agreed, fsdp->scalars, sizeof agreed);
    llmpar_status waited = fsdp->device->synchronize(fsdp->device, fsdp->stream[0]); /* in any case: the stream may read `agreed` */
    if (!status) status = waited;
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
