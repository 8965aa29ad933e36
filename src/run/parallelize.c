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
    return LLMPAR_OK;
}

static llmpar_status llmpar__recipe_numbers(const llmpar_trainer_desc *d, llmpar_error *error)
{
    if (d->data && d->sequence) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "trainer: data and sequence are both set, expected one");
    if (d->seq_len < 1 || d->seq_len > ((int64_t)1 << 24)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "trainer: seq_len = %lld, expected 1 .. %d", (long long)d->seq_len, 1 << 24);
    if (d->grad_accum < 1 || d->grad_accum > (1 << 16)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "trainer: grad_accum = %d, expected 1 .. %d", (int)d->grad_accum, 1 << 16);
    if (d->batch < 1 || d->batch > ((int64_t)1 << 30)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "trainer: batch = %lld, expected 1 .. %d", (long long)d->batch, 1 << 30);
    if (d->prefetch < 0 || d->prefetch > 64) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "trainer: prefetch = %d, expected 0 .. 64", (int)d->prefetch);
    if (!(d->lr > 0) || !llmpar_isfinite_f64(d->lr)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "trainer: lr = %g, expected a positive number", d->lr);
    if (!(d->lr_min >= 0 && d->lr_min <= d->lr)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "trainer: lr_min = %g, expected 0 .. lr = %g", d->lr_min, d->lr);
    if (d->warmup < 0 || d->total_steps < 0) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "trainer: warmup = %lld, total_steps = %lld, expected 0 or more", (long long)d->warmup, (long long)d->total_steps);
    if ((int)d->exact < 0 || (int)d->exact > LLMPAR_EXACT_REQUIRE) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "trainer: exact = %d, expected one of llmpar_exact", (int)d->exact);
    if (!llmpar_is_pow2(d->canon) || d->canon > 64) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "trainer: canon = %d, expected a power of two up to 64", (int)d->canon);
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_trainer_desc_resolve(llmpar_trainer_desc *d, const llmpar_mesh *mesh, const llmpar_llama_config *config, llmpar_error *error)
{
    if (d->grad_accum == 0) d->grad_accum = 1;
    if (d->batch == 0 && d->grad_accum > 0) d->batch = (int64_t)mesh->dp_ranks * d->grad_accum;
    if (d->exact == LLMPAR_EXACT_DEFAULT) d->exact = LLMPAR_EXACT_ON;
    if (d->exact == LLMPAR_EXACT_OFF) d->canon = 1;
    if (d->canon == 0) d->canon = 8;
    if (d->zero == LLMPAR_ZERO_DEFAULT) d->zero = LLMPAR_ZERO_3;
    if (d->dtype == LLMPAR_DTYPE_DEFAULT) d->dtype = LLMPAR_F32;
    if (d->lr == 0) d->lr = 1e-3;
    if (d->lr_min == 0) d->lr_min = d->lr / 10;
    if (d->held_out == 0) d->held_out = 0.05;
    if (d->log_every == 0) d->log_every = 10;
    llmpar_optim_desc_resolve(&d->optim);
    llmpar_status status = llmpar__recipe_numbers(d, error);
    if (!status) status = llmpar_optim_desc_check(&d->optim, error);
    if (status) return status;
    int64_t cuts = (int64_t)mesh->dp_ranks * d->grad_accum;
    if (d->batch % cuts)
        return llmpar_error_set(error, LLMPAR_ERR_MESH, "trainer: batch = %lld is not divisible by %d data ranks (dp_replicate %d x dp_shard %d) x grad_accum %d = %lld", (long long)d->batch, (int)mesh->dp_ranks,
                                (int)mesh->degree[LLMPAR_AXIS_DP_REPLICATE], (int)mesh->degree[LLMPAR_AXIS_DP_SHARD], (int)d->grad_accum, (long long)cuts);
    if (d->seq_len > config->max_positions)
        return llmpar_error_set(error, LLMPAR_ERR_CONFIG, "trainer: seq_len = %lld, expected at most the model's max_position_embeddings = %d", (long long)d->seq_len, (int)config->max_positions);
    if (d->data && config->vocab < 256) return llmpar_error_set(error, LLMPAR_ERR_CONFIG, "trainer: bytes as tokens need a vocabulary of at least 256, the model has %d", (int)config->vocab);
    return d->exact == LLMPAR_EXACT_REQUIRE ? llmpar__recipe_exact(d, mesh, error) : LLMPAR_OK;
}

/* ---- the steps of the recipe ---- */

static llmpar_status llmpar__recipe_data(llmpar_trainer *t)
{
    llmpar_data_desc desc;
    llmpar_error error;
    if (!t->desc.data) return LLMPAR_OK;
    llmpar_error_clear(&error);
    llmpar_status status = llmpar_file_map(t->desc.data, &t->file, &error);
    memset(&desc, 0, sizeof desc);
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

static llmpar_status llmpar__recipe_schedule(llmpar_trainer *t, int32_t forward_only, llmpar_schedule **out)
{
    int32_t count;
    llmpar_unit *units = llmpar_llama_units(t->model, &count);
    llmpar_policy policy;
    memset(&policy, 0, sizeof policy);
    llmpar_fsdp_policy(t->fsdp, &policy);
    policy.micro_batches = t->desc.grad_accum;
    policy.no_sync = t->desc.no_sync;
    policy.prefetch = policy.prefetch_backward = t->desc.prefetch;
    policy.forward_only = forward_only;
    llmpar_status status = llmpar_schedule_create(&t->ctx->heap, units, count, &policy, out, &t->ctx->error);
    if (!status) status = llmpar_schedule_validate(&t->ctx->heap, (*out)->list, (*out)->count, units, count, &(*out)->policy, &t->ctx->error);
    return status;
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
    t->staging = (int32_t *)llmpar_heap_alloc(heap, (size_t)(2 * rows + t->desc.seq_len + 1), sizeof(int32_t));
    t->micro = (llmpar_micro *)llmpar_heap_zalloc(heap, (size_t)t->desc.grad_accum, sizeof *t->micro);
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

static llmpar_status llmpar__recipe(llmpar_trainer *t)
{
    llmpar_llama_apply_desc apply;
    llmpar_fsdp_desc fsdp;
    int32_t count;
    memset(&apply, 0, sizeof apply);
    memset(&fsdp, 0, sizeof fsdp);
    /* Files first: data missing or short, or a log that cannot be written, is found before memory is taken. */
    llmpar_status status = llmpar__recipe_data(t);
    if (!status) status = llmpar__metrics_open(t);
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
    fsdp.zero = t->desc.zero;
    fsdp.dtype = t->desc.dtype;
    fsdp.memory_limit = t->desc.memory_limit;
    fsdp.seed = llmpar_llama_seed(t->model);
    if (t->desc.sequence) fsdp.optimizer_states = llmpar_optim_states(&t->desc.optim);
    status = llmpar_fsdp_create(t->mesh, units, count, &fsdp, &t->fsdp);
    if (status || !t->desc.sequence) return status; /* without data: load, save, generate */
    /* What a step does, as a list, proved before it ever runs. */
    status = llmpar__recipe_schedule(t, 0, &t->train);
    if (!status) status = llmpar__recipe_schedule(t, 1, &t->eval);
    /* The optimizer on the shards, the step's tokens, the metrics. */
    if (!status) status = llmpar_optim_create(t->fsdp, &t->desc.optim, &t->optim);
    if (!status) status = llmpar__recipe_buffers(t);
    return status ? status : llmpar__metrics_peak(t);
}

LLMPAR_DEF llmpar_status llmpar_parallelize(llmpar_mesh *mesh, llmpar_llama *model, const llmpar_trainer_desc *desc, llmpar_trainer **out)
{
    llmpar_ctx *ctx = mesh->ctx;
    llmpar_trainer_desc resolved = *desc;
    llmpar_error error;
    *out = NULL;
    llmpar_error_clear(&error);
    llmpar_status status = llmpar_trainer_desc_resolve(&resolved, mesh, llmpar_llama_get_config(model), &error);
    if (status) return llmpar_fail(ctx, status, "%s", error.text);
    llmpar_trainer *t = (llmpar_trainer *)llmpar_heap_zalloc(&ctx->heap, 1, sizeof *t);
    if (!t) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "trainer: out of memory");
    t->ctx = ctx;
    t->mesh = mesh;
    t->model = model;
    t->desc = resolved;
    t->desc.data = desc->data ? llmpar_heap_strdup(&ctx->heap, desc->data) : NULL;
    t->desc.log = desc->log ? llmpar_heap_strdup(&ctx->heap, desc->log) : NULL;
    t->local = t->desc.batch / ((int64_t)mesh->dp_ranks * t->desc.grad_accum);
    if ((desc->data && !t->desc.data) || (desc->log && !t->desc.log)) status = llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "trainer: out of memory");
    if (!status) status = llmpar__recipe(t);
    if (status) {
        llmpar_trainer_destroy(t);
        return status;
    }
    *out = t;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_trainer_destroy(llmpar_trainer *t)
{
    if (!t) return;
    llmpar_heap *heap = &t->ctx->heap;
    llmpar__metrics_close(t);
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
    llmpar_file_unmap(&t->file);
    llmpar_heap_free(heap, t->staging);
    llmpar_heap_free(heap, t->micro);
    llmpar_heap_free(heap, t->gradients);
    llmpar_heap_free(heap, (void *)(uintptr_t)t->desc.data);
    llmpar_heap_free(heap, (void *)(uintptr_t)t->desc.log);
    llmpar_heap_free(heap, t);
}

LLMPAR_DEF llmpar_fsdp *llmpar_trainer_fsdp(llmpar_trainer *t) { return t->fsdp; }
LLMPAR_DEF const llmpar_schedule *llmpar_trainer_schedule(const llmpar_trainer *t) { return t->train; }
LLMPAR_DEF const llmpar_data *llmpar_trainer_data(const llmpar_trainer *t) { return t->desc.data ? &t->data : NULL; }
LLMPAR_DEF llmpar_status llmpar_load_hf(llmpar_trainer *t, const char *directory) { return llmpar_hf_load(t->fsdp, directory); }
LLMPAR_DEF llmpar_status llmpar_save_hf(llmpar_trainer *t, const char *directory) { return llmpar_hf_save(t->fsdp, llmpar_llama_get_config(t->model), directory); }

#endif /* LLMPAR_NO_LLAMA, LLMPAR_NO_IO, LLMPAR_NO_TEXT */
