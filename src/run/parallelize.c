#include "run/trainer.h"
#include "run/trainer_internal.h"

#include <stdio.h>
#include <string.h>

#include "base/math.h"
#include "base/size.h"

#if !defined(LLMPAR_NO_LLAMA) && !defined(LLMPAR_NO_IO) && !defined(LLMPAR_NO_TEXT)

/* ---- what was asked for, checked ---- */

static int64_t llmpar__recipe_leaves(int64_t batch) /* the largest power of two that divides it */
{
    return batch & -batch;
}

/* The guarantee of docs/exact.md, or the numbers that break it. */
static llmpar_status llmpar__recipe_exact(const llmpar_trainer_desc *desc, const llmpar_mesh *mesh, llmpar_error *error)
{
    int32_t tp = mesh->degree[LLMPAR_AXIS_TP];
    int64_t leaves = llmpar__recipe_leaves(desc->batch), cuts = (int64_t)mesh->dp_ranks * desc->grad_accum;
    if (!llmpar_is_pow2(tp) || desc->canon % tp)
        return llmpar_error_set(error, LLMPAR_ERR_MESH, "exact = require: tp = %d is not a power of two that divides the %d canonical pieces, so sums over tp depend on it", (int)tp, (int)desc->canon);
    if (!llmpar_is_pow2(mesh->dp_ranks) || !llmpar_is_pow2(desc->grad_accum) || leaves % cuts)
        return llmpar_error_set(error, LLMPAR_ERR_MESH, "exact = require: %d data ranks x grad_accum %d is not a power of two that divides the %lld leaves of batch %lld (its largest power of two), so sums over the batch depend on it",
                                (int)mesh->dp_ranks, (int)desc->grad_accum, (long long)leaves, (long long)desc->batch);
    if (desc->reduce_dtype != LLMPAR_DTYPE_DEFAULT && desc->reduce_dtype != llmpar_dtype_sum(desc->dtype))
        return llmpar_error_set(error, LLMPAR_ERR_MESH, "exact = require: reduce_dtype %s rounds every rank's gradients before they are added, so sums over the batch depend on the number of ranks; expected %s",
                                llmpar_dtype_name(desc->reduce_dtype), llmpar_dtype_name(llmpar_dtype_sum(desc->dtype)));
    return LLMPAR_OK;
}

#define LLMPAR__DESC_NO(...) llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "trainer: " __VA_ARGS__)
static llmpar_status llmpar__recipe_numbers(const llmpar_trainer_desc *d, llmpar_error *error)
{
    if (d->data && d->sequence) return LLMPAR__DESC_NO("data and sequence are both set, expected one");
    if (d->seq_len < 1 || d->seq_len > ((int64_t)1 << 24)) return LLMPAR__DESC_NO("seq_len = %lld, expected 1 .. %d", (long long)d->seq_len, 1 << 24);
    if (d->grad_accum < 1 || d->grad_accum > (1 << 16)) return LLMPAR__DESC_NO("grad_accum = %d, expected 1 .. %d", (int)d->grad_accum, 1 << 16);
    if (d->batch < 1 || d->batch > ((int64_t)1 << 30)) return LLMPAR__DESC_NO("batch = %lld, expected 1 .. %d", (long long)d->batch, 1 << 30);
    if (d->recompute_every < 1) return LLMPAR__DESC_NO("recompute_every = %d, expected at least 1", (int)d->recompute_every);
    if ((int)d->recompute < 0 || (int)d->recompute > LLMPAR_RECOMPUTE_AUTO) return LLMPAR__DESC_NO("recompute = %d, expected one of llmpar_recompute", (int)d->recompute);
    if (d->recompute == LLMPAR_RECOMPUTE_AUTO && !d->memory_limit) return LLMPAR__DESC_NO("recompute = AUTO needs memory_limit: it takes the cheapest recomputation that fits");
    if (d->freeze < 0) return LLMPAR__DESC_NO("freeze = %d, expected 0 or more units", (int)d->freeze);
    if (!(d->lr > 0) || !llmpar_isfinite_f64(d->lr)) return LLMPAR__DESC_NO("lr = %g, expected a positive number", d->lr);
    if (!(d->lr_min >= 0 && d->lr_min <= d->lr)) return LLMPAR__DESC_NO("lr_min = %g, expected 0 .. lr = %g", d->lr_min, d->lr);
    if (d->warmup < 0 || d->total_steps < 0) return LLMPAR__DESC_NO("warmup = %lld, total_steps = %lld, expected 0 or more", (long long)d->warmup, (long long)d->total_steps);
    if (d->checkpoint_every < 0 || d->keep < 0) return LLMPAR__DESC_NO("checkpoint_every = %d, keep = %d, expected 0 or more", (int)d->checkpoint_every, (int)d->keep);
    if ((int)d->exact < 0 || (int)d->exact > LLMPAR_EXACT_REQUIRE) return LLMPAR__DESC_NO("exact = %d, expected one of llmpar_exact", (int)d->exact);
    if (!llmpar_is_pow2(d->canon) || d->canon > 64) return LLMPAR__DESC_NO("canon = %d, expected a power of two up to 64", (int)d->canon);
    const char *const path[] = { "data", d->data, "log", d->log, "trace", d->trace, "checkpoint", d->checkpoint, "resume", d->resume };
    for (int i = 0; i < 10; i += 2)
        if (path[i + 1] && !*path[i + 1]) return LLMPAR__DESC_NO("%s = \"\", expected a path or none", path[i]);
    return LLMPAR_OK;
}

/* What would change nothing is not taken either: whoever sets it expects something of it. */
static llmpar_status llmpar__recipe_unused(const llmpar_trainer_desc *d, llmpar_error *error)
{
    if (d->dtype != LLMPAR_F16 && (d->loss_scale.scale != 0 || d->loss_scale.least != 0 || d->loss_scale.most != 0 || d->loss_scale.interval))
        return LLMPAR__DESC_NO("loss_scale with dtype %s, expected none: only f16 needs one", llmpar_dtype_name(d->dtype));
    if (d->lr_schedule == LLMPAR_LR_CONSTANT && d->lr_min > 0) return LLMPAR__DESC_NO("lr_min = %g, expected 0: a constant schedule ends where it was", d->lr_min);
    if (!d->checkpoint && (d->checkpoint_every || d->keep || d->checkpoint_background)) return LLMPAR__DESC_NO("checkpoint_every, keep or checkpoint_background without checkpoint, expected a directory");
    if (!d->checkpoint && d->resume && (!strcmp(d->resume, "auto") || !strncmp(d->resume, "step-", 5)))
        return LLMPAR__DESC_NO("resume = %s without checkpoint, expected the directory that it is in", d->resume);
    if (d->offload_update == LLMPAR_TIER_HOST && (d->optim.kind == LLMPAR_OPTIM_LOMO || d->optim.kind == LLMPAR_OPTIM_ADALOMO))
        return LLMPAR__DESC_NO("offload_update = host with %s, expected adamw or sgd: it updates inside backward, where its gradient is", llmpar_optim_name(d->optim.kind));
    if (d->offload[LLMPAR_STATE_OPTIMIZER] != LLMPAR_TIER_DEVICE && (d->dtype == LLMPAR_F32 || d->dtype == LLMPAR_F64) && !llmpar_optim_states(&d->optim))
        return LLMPAR__DESC_NO("optimizer state offloaded with %s in %s, expected not: %s", llmpar_optim_name(d->optim.kind), llmpar_dtype_name(d->dtype),
                                d->optim.kind == LLMPAR_OPTIM_ADALOMO ? "its factors stay on the device" : "it has none");
    return LLMPAR_OK;
}

/* What needs a device that has them is fsdp's to say. */
static llmpar_status llmpar__recipe_graphs(const llmpar_trainer_desc *d, const llmpar_mesh *mesh, llmpar_error *error)
{
    int32_t tp = mesh->degree[LLMPAR_AXIS_TP];
    if (!d->graphs) return LLMPAR_OK;
    if (d->dtype == LLMPAR_F16) return llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "trainer: graphs with dtype f16, expected f32 or bf16: the loss scale changes from step to step, and a graph keeps what it was captured with");
    if (tp > 1) return llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "trainer: graphs with tp = %d, expected 1: tensor-parallel collectives stand between a unit's operations, and a graph holds none", (int)tp);
    return LLMPAR_OK;
}

static void llmpar__recipe_lr(const llmpar_trainer_desc *d, llmpar_lr_desc *out)
{
    memset(out, 0, sizeof *out);
    out->kind = d->lr_schedule;
    out->lr = d->lr;
    out->lr_min = d->lr_min;
    out->warmup = d->warmup;
    out->total = d->total_steps;
    out->decay_steps = d->decay_steps;
    llmpar_lr_desc_resolve(out);
}

LLMPAR_DEF llmpar_status llmpar_trainer_desc_resolve(llmpar_trainer_desc *d, const llmpar_mesh *mesh, const llmpar_llama_config *config, llmpar_error *error)
{
    LLMPAR__NEED(d && mesh && config, error);
    if (d->grad_accum == 0) d->grad_accum = 1;
    if (d->batch == 0 && d->grad_accum > 0) d->batch = (int64_t)mesh->dp_ranks * d->grad_accum;
    if (d->exact == LLMPAR_EXACT_DEFAULT) d->exact = LLMPAR_EXACT_ON;
    if (d->exact == LLMPAR_EXACT_OFF) d->canon = 1;
    if (d->canon == 0) d->canon = 8;
    if (d->recompute_every == 0) d->recompute_every = 1;
    if (d->zero == LLMPAR_ZERO_DEFAULT) d->zero = LLMPAR_ZERO_3;
    if (d->dtype == LLMPAR_DTYPE_DEFAULT) d->dtype = LLMPAR_F32;
    if (d->lr == 0) d->lr = 1e-3;
    if (d->lr_min == 0 && d->lr_schedule != LLMPAR_LR_CONSTANT) d->lr_min = d->lr / 10;
    if (d->held_out == 0) d->held_out = 0.05;
    if (d->log_every == 0) d->log_every = 10;
    llmpar_optim_desc_resolve(&d->optim);
    if (d->dtype == LLMPAR_F16) llmpar_loss_scale_resolve(&d->loss_scale);
    llmpar_lr_desc lr;
    llmpar__recipe_lr(d, &lr);
    llmpar_status status = llmpar__recipe_numbers(d, error);
    if (!status) status = llmpar_optim_desc_check(&d->optim, error);
    if (!status) status = llmpar_lr_desc_check(&lr, error);
    if (!status && d->dtype == LLMPAR_F16) status = llmpar_loss_scale_check(&d->loss_scale, error);
    if (!status) status = llmpar__recipe_unused(d, error);
    if (!status) status = llmpar__recipe_graphs(d, mesh, error);
    if (status) return status;
    int64_t cuts = (int64_t)mesh->dp_ranks * d->grad_accum;
    if (d->batch % cuts)
        return llmpar_error_set(error, LLMPAR_ERR_MESH, "trainer: batch = %lld is not divisible by %d data ranks (dp_replicate %d x dp_shard %d) x grad_accum %d = %lld", (long long)d->batch, (int)mesh->dp_ranks,
                                (int)mesh->degree[LLMPAR_AXIS_DP_REPLICATE], (int)mesh->degree[LLMPAR_AXIS_DP_SHARD], (int)d->grad_accum, (long long)cuts);
    if (d->seq_len > config->max_positions && config->rope_scaling.kind != LLMPAR_ROPE_DYNAMIC) /* which is for longer ones */
        return llmpar_error_set(error, LLMPAR_ERR_CONFIG, "trainer: seq_len = %lld, expected at most the model's max_position_embeddings = %d", (long long)d->seq_len, (int)config->max_positions);
    if (d->data && config->vocab < 256) return llmpar_error_set(error, LLMPAR_ERR_CONFIG, "trainer: bytes as tokens need a vocabulary of at least 256, the model has %d", (int)config->vocab);
    return d->exact == LLMPAR_EXACT_REQUIRE ? llmpar__recipe_exact(d, mesh, error) : LLMPAR_OK;
}

/* ---- the steps of the recipe ---- */

static llmpar_status llmpar__recipe_data(llmpar_trainer *t)
{
    if (!t->desc.data) return LLMPAR_OK;
    LLMPAR__ZEROED(llmpar_data_desc, desc);
    LLMPAR__NO_ERROR(error);
    llmpar_status status = llmpar_file_map(t->desc.data, &t->file, &error);
    desc.bytes = t->file.data;
    desc.count = t->file.bytes;
    desc.seq_len = t->desc.seq_len;
    desc.seed = llmpar_llama_seed(t->model);
    desc.held_out = t->desc.held_out;
    desc.name = t->desc.data;
    if (!status) status = llmpar_data_init(&desc, &t->data, &error);
    if (status) return llmpar_fail(t->ctx, status, "%s", error.text);
    t->desc.sequence = llmpar_data_sequence;
    t->desc.sequence_user = &t->data;
    return LLMPAR_OK;
}

static llmpar_status llmpar__recipe_schedule(llmpar_trainer *t, const llmpar_fsdp_desc *fsdp, int32_t forward_only, llmpar_schedule **out)
{
    int32_t count;
    llmpar_unit *units = llmpar_llama_units(t->model, &count);
    LLMPAR__ZEROED(llmpar_policy, policy);
    llmpar_fsdp_desc_policy(fsdp, t->mesh, &policy);
    policy.micro_batches = t->desc.grad_accum;
    policy.no_sync = t->desc.no_sync;
    policy.chain = t->desc.chain;
    policy.reshard = t->desc.reshard;
    policy.reshard_every = t->desc.reshard_every;
    policy.prefetch = t->desc.prefetch;
    policy.prefetch_backward = t->desc.prefetch_backward ? t->desc.prefetch_backward < 0 ? 0 : t->desc.prefetch_backward : t->desc.prefetch;
    if (!forward_only) policy.update = llmpar_optim_update_when(&t->desc.optim, t->desc.dtype == LLMPAR_F16);
    policy.forward_only = forward_only;
    llmpar_status status = llmpar_schedule_create(&t->ctx->heap, units, count, &policy, out, &t->ctx->error);
    return status ? status : llmpar_schedule_validate(&t->ctx->heap, (*out)->list, (*out)->count, units, count, &(*out)->policy, &t->ctx->error);
}

static llmpar_status llmpar__recipe_buffers(llmpar_trainer *t)
{
    llmpar_heap *heap = &t->ctx->heap;
    int64_t rows = t->local * t->desc.seq_len;
    size_t all = (size_t)(rows * t->desc.grad_accum) * sizeof(int32_t);
    void *ids = NULL, *targets = NULL;
    llmpar_status status = llmpar_arena_alloc(llmpar_fsdp_arena(t->fsdp), LLMPAR_TAG_ACTIVATIONS, all, "token ids", &ids);
    if (!status) status = llmpar_arena_alloc(llmpar_fsdp_arena(t->fsdp), LLMPAR_TAG_ACTIVATIONS, all, "targets", &targets);
    if (!status) status = t->ctx->device->stream_create(t->ctx->device, "data", &t->stream);
    if (status) return status;
    t->ids = (int32_t *)ids;
    t->targets = (int32_t *)targets;
    void *staging = NULL;
    t->staging_bytes = (size_t)(2 * rows + t->desc.seq_len + 1) * sizeof(int32_t);
    if (!llmpar_device_host_alloc(t->ctx->device, heap, t->staging_bytes, &staging)) t->staging = (int32_t *)staging;
    t->micro = LLMPAR__ZALLOC(llmpar_micro, heap, (size_t)t->desc.grad_accum);
    if (!t->staging || !t->micro) return llmpar_fail(t->ctx, LLMPAR_ERR_MEMORY, "trainer: no memory for %lld tokens a micro-batch", (long long)rows);
    for (int32_t m = 0; m < t->desc.grad_accum; m++) {
        t->micro[m].batch = t->local;
        t->micro[m].t = t->desc.seq_len;
        t->micro[m].leaves = t->desc.exact == LLMPAR_EXACT_OFF ? 1 : llmpar__recipe_leaves(t->local);
        t->micro[m].ids = t->ids + m * rows;
        t->micro[m].targets = t->targets + m * rows;
    }
    return LLMPAR_OK;
}

static llmpar_status llmpar__recipe_training(llmpar_trainer *t)
{
    if (t->desc.trace && !t->count_only) {
        llmpar_status status = llmpar_trace_create(t->ctx, 0, &t->trace);
        if (status) return status;
        llmpar_fsdp_set_trace(t->fsdp, t->trace);
    }
    /* The optimizer on the shards, the step's tokens. */
    llmpar_status status = llmpar_optim_create(t->fsdp, &t->desc.optim, &t->optim);
    if (!status) status = llmpar__recipe_buffers(t);
    if (!status) llmpar_arena_get_usage(llmpar_fsdp_arena(t->fsdp), &t->memory.init);
    return status;
}

static llmpar_status llmpar__recipe(llmpar_trainer *t)
{
    int32_t count;
    LLMPAR__ZEROED(llmpar_llama_apply_desc, apply);
    LLMPAR__ZEROED(llmpar_fsdp_desc, fsdp);
    /* Files first: data missing or short, or a log that cannot be written, is found before memory is taken. */
    llmpar_status status = t->count_only ? LLMPAR_OK : llmpar__recipe_data(t);
    if (!status && !t->count_only) status = llmpar__metrics_open(t);
    if (status) return status;
    /* Tensor parallelism: the model gets its axis. */
    apply.canon = t->desc.canon;
    apply.sequence_parallel = t->desc.sequence_parallel;
    apply.dtype = t->desc.dtype;
    apply.positions = t->desc.seq_len;
    status = llmpar_llama_apply(t->model, t->mesh->comm[LLMPAR_AXIS_TP], &apply);
    if (status) return status;
    /* FSDP: the model's units become flat shards. */
    llmpar_unit *units = llmpar_llama_units(t->model, &count);
    for (int32_t i = 0; i < count; i++) units[i].frozen = i < t->desc.freeze;
    fsdp.zero = t->desc.zero;
    fsdp.dtype = t->desc.dtype;
    fsdp.reduce_dtype = t->desc.reduce_dtype;
    fsdp.memory_limit = t->desc.memory_limit;
    fsdp.memory_reserve = t->reserve;
    fsdp.seed = llmpar_llama_seed(t->model);
    memcpy(fsdp.offload, t->desc.offload, sizeof fsdp.offload);
    fsdp.offload_dir = t->desc.offload_dir;
    fsdp.offload_update = t->desc.offload_update;
    fsdp.overlap = t->desc.overlap;
    fsdp.graphs = t->desc.graphs && !t->count_only;
    fsdp.count_only = t->count_only;
    if (t->desc.sequence || t->desc.data) fsdp.optimizer_states = llmpar_optim_states(&t->desc.optim);
    /* What a step does, as a list, proved before memory is taken: policies that contradict each other end here. Without data: load, save, generate. */
    int trains = t->desc.sequence || t->desc.data;
    if (trains) status = llmpar__recipe_schedule(t, &fsdp, 0, &t->train);
    if (trains && !status) status = llmpar__recipe_schedule(t, &fsdp, 1, &t->eval);
    if (trains && !status && !t->count_only) status = llmpar__metrics_peak(t);
    if (!status) status = llmpar_fsdp_create(t->mesh, units, count, &fsdp, &t->fsdp);
    if (status) return status;
    if (trains) status = llmpar__recipe_training(t);
    return status || t->count_only ? status : llmpar__trainer_resume(t);
}

LLMPAR__PRIVATE_DEF int32_t llmpar__recipe_block_units(llmpar_llama *model)
{
    int32_t count;
    llmpar_llama_units(model, &count);
    return count - 2; /* without embedding and head */
}

LLMPAR__PRIVATE_DEF void llmpar__recipe_blocks_of(const llmpar_trainer_desc *desc, llmpar_llama *model, llmpar__recipe_blocks *out)
{
    int32_t all = llmpar__recipe_block_units(model);
    out->every = desc->recompute_every;
    out->full = desc->recompute == LLMPAR_RECOMPUTE_FULL ? all : 0;
    out->selective = desc->recompute == LLMPAR_RECOMPUTE_SELECTIVE ? all : 0;
}

static void llmpar__recipe_recompute(llmpar_llama *model, const llmpar__recipe_blocks *blocks)
{
    int32_t all = llmpar__recipe_block_units(model);
    llmpar_unit *units = llmpar_llama_units(model, NULL);
    for (int32_t i = 0; i < all; i++) {
        int mine = blocks->every < 2 || i % blocks->every == blocks->every - 1;
        units[i + 1].recompute = mine && i < blocks->full ? LLMPAR_RECOMPUTE_FULL : mine && i < blocks->selective ? LLMPAR_RECOMPUTE_SELECTIVE : LLMPAR_RECOMPUTE_NONE;
    }
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__trainer_create(llmpar_mesh *mesh, llmpar_llama *model, const llmpar_trainer_desc *desc, const llmpar__recipe_blocks *blocks, int count_only, uint64_t reserve, llmpar_trainer **out)
{
    llmpar_ctx *ctx = mesh->ctx;
    *out = NULL;
    llmpar_trainer *t = LLMPAR__ZALLOC(llmpar_trainer, &ctx->heap, 1);
    if (!t) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "trainer: out of memory");
    t->ctx = ctx;
    t->mesh = mesh;
    t->model = model;
    t->desc = *desc;
    t->count_only = count_only;
    t->reserve = reserve;
    t->scale = desc->loss_scale;
    llmpar__recipe_lr(desc, &t->lr);
    t->local = t->desc.batch / ((int64_t)mesh->dp_ranks * t->desc.grad_accum);
    const char **const text[] = {&t->desc.data, &t->desc.log, &t->desc.trace, &t->desc.offload_dir, &t->desc.checkpoint, &t->desc.resume};
    int copied = 1;
    for (size_t i = 0; i < sizeof text / sizeof *text; i++) {
        if (!*text[i]) continue;
        *text[i] = llmpar_heap_strdup(&ctx->heap, *text[i]);
        copied &= *text[i] != NULL;
    }
    llmpar_status status = copied ? LLMPAR_OK : llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "trainer: out of memory");
    if (!status) llmpar__recipe_recompute(model, blocks);
    if (!status) status = llmpar__recipe(t);
    if (status) llmpar_trainer_destroy(t);
    else *out = t;
    return status;
}

LLMPAR_DEF llmpar_status llmpar_parallelize(llmpar_mesh *mesh, llmpar_llama *model, const llmpar_trainer_desc *desc, llmpar_trainer **out)
{
    llmpar__recipe_blocks blocks;
    *out = NULL;
    if (!mesh || !model) return LLMPAR_ERR_ARGUMENT; /* its maker said why */
    if (!desc) return llmpar_fail(mesh->ctx, LLMPAR_ERR_ARGUMENT, "trainer: no desc");
    llmpar_trainer_desc resolved = *desc;
    LLMPAR__NO_ERROR(error);
    llmpar_status status = llmpar_trainer_desc_resolve(&resolved, mesh, llmpar_llama_get_config(model), &error);
    if (status) return llmpar_fail(mesh->ctx, status, "%s", error.text);
    llmpar__recipe_blocks_of(&resolved, model, &blocks);
    llmpar_memory memory;
    memory.step.extent = 0;
    if (resolved.data || resolved.sequence) status = resolved.memory_limit ? llmpar__plan_fit(mesh, model, &resolved, &blocks) : llmpar__plan_needs(mesh, model, &resolved, &blocks, &memory);
    return status ? status : llmpar__trainer_create(mesh, model, &resolved, &blocks, 0, memory.step.extent, out);
}

LLMPAR_DEF void llmpar_trainer_destroy(llmpar_trainer *t)
{
    if (!t) return;
    llmpar_heap *heap = &t->ctx->heap;
    llmpar__metrics_close(t);
    llmpar_checkpoint_destroy(t->checkpoint);
    llmpar_tensor_file_abandon(t->gradient_file);
    if (t->stream) t->ctx->device->synchronize(t->ctx->device, t->stream); /* its failure was reported where it happened */
    if (t->fsdp) {
        llmpar_arena_free(llmpar_fsdp_arena(t->fsdp), t->ids);
        llmpar_arena_free(llmpar_fsdp_arena(t->fsdp), t->targets);
    }
    llmpar_optim_destroy(t->optim);
    llmpar_schedule_destroy(t->train);
    llmpar_schedule_destroy(t->eval);
    if (t->stream) t->ctx->device->stream_destroy(t->ctx->device, t->stream);
    llmpar_fsdp_destroy(t->fsdp);
    llmpar_trace_destroy(t->trace);
    llmpar_file_unmap(&t->file);
    llmpar_device_host_free(t->ctx->device, heap, t->staging, t->staging_bytes);
    llmpar_heap_free(heap, t->micro);
    llmpar_heap_free(heap, t->gradients);
    const char *const text[] = {t->desc.data, t->desc.log, t->desc.trace, t->desc.offload_dir, t->desc.checkpoint, t->desc.resume};
    for (size_t i = 0; i < sizeof text / sizeof *text; i++) llmpar_heap_free(heap, (void *)(uintptr_t)text[i]);
    llmpar_heap_free(heap, t);
}

LLMPAR_DEF int64_t llmpar_trainer_steps(const llmpar_trainer *t) { return t ? t->steps : 0; }
LLMPAR_DEF llmpar_fsdp *llmpar_trainer_fsdp(llmpar_trainer *t) { return t ? t->fsdp : NULL; }
LLMPAR_DEF const llmpar_schedule *llmpar_trainer_schedule(const llmpar_trainer *t) { return t ? t->train : NULL; }
LLMPAR_DEF const llmpar_data *llmpar_trainer_data(const llmpar_trainer *t) { return t && t->desc.data ? &t->data : NULL; }
LLMPAR_DEF llmpar_status llmpar_trainer_schedule_bytes(const llmpar_trainer *t, uint64_t *bytes) { return t ? llmpar_fsdp_bytes(t->fsdp, t->train, t->micro, bytes) : LLMPAR_ERR_ARGUMENT; }
LLMPAR_DEF void llmpar_trainer_memory(const llmpar_trainer *t, llmpar_memory *out) { *out = t->memory; }
LLMPAR_DEF llmpar_status llmpar_load_hf(llmpar_trainer *t, const char *directory) { return t ? llmpar_hf_load(t->fsdp, directory) : LLMPAR_ERR_ARGUMENT; }
LLMPAR_DEF llmpar_status llmpar_save_hf(llmpar_trainer *t, const char *directory) { return t ? llmpar_hf_save(t->fsdp, llmpar_llama_get_config(t->model), directory, NULL) : LLMPAR_ERR_ARGUMENT; }

#undef LLMPAR__DESC_NO

#endif /* LLMPAR_NO_LLAMA, LLMPAR_NO_IO, LLMPAR_NO_TEXT */
