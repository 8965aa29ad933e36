#include "run/trainer.h"
#include "run/trainer_internal.h"

#include <string.h>

#if !defined(LLMPAR_NO_LLAMA) && !defined(LLMPAR_NO_IO) && !defined(LLMPAR_NO_TEXT)

/* Index within the step of sequence j of micro-batch m on this data rank; docs/exact.md, "The batch":
     sync     | m0: r0 r1 | m1: r0 r1 |      every micro-batch is reduced over the ranks
     no_sync  | r0: m0 m1 | r1: m0 m1 |      every rank sums its own first */
static int64_t llmpar__trainer_index(const llmpar_trainer *t, int32_t m, int64_t j)
{
    int64_t ranks = t->mesh->dp_ranks, rank = t->mesh->dp_rank, part = t->desc.no_sync ? rank * t->desc.grad_accum + m : m * ranks + rank;
    return part * t->local + j;
}

/* One sequence into ids and targets of a micro-batch; counts its targets. mask: a sequence that only fills up the batch. */
static llmpar_status llmpar__trainer_sequence(llmpar_trainer *t, int64_t index, int held_out, int mask, int32_t *ids, int32_t *targets, int64_t *counted)
{
    llmpar_ctx *ctx = t->ctx;
    int64_t length = t->desc.seq_len;
    int32_t vocab = llmpar_llama_get_config(t->model)->vocab, *tokens = t->staging;
    llmpar_status status = held_out ? llmpar_data_eval_sequence(&t->data, mask ? 0 : index, tokens) : t->desc.sequence(t->desc.sequence_user, index, tokens);
    if (status) return llmpar_fail(ctx, status, "sequence %lld: the data source failed (%s)", (long long)index, llmpar_status_string(status));
    for (int64_t i = 0; i <= length; i++) {
        /* A negative token is a target that is not counted; as an input it stands for id 0. */
        if (tokens[i] >= vocab) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "sequence %lld: token id %d at position %lld, expected at most %d", (long long)index, (int)tokens[i], (long long)i, (int)vocab - 1);
        if (i < length) ids[i] = tokens[i] < 0 ? 0 : tokens[i];
        if (i > 0) {
            targets[i - 1] = mask || tokens[i] < 0 ? -1 : tokens[i];
            *counted += targets[i - 1] >= 0;
        }
    }
    return LLMPAR_OK;
}

/* All tokens of a step (first = global index of its first sequence), or of a group of held-out sequences below `limit`. */
static llmpar_status llmpar__trainer_tokens(llmpar_trainer *t, int64_t first, int held_out, int64_t limit, int64_t *counted)
{
    llmpar_device *device = t->ctx->device;
    int64_t length = t->desc.seq_len, rows = t->local * length;
    int32_t *ids = t->staging + length + 1, *targets = ids + rows;
    llmpar_status status = LLMPAR_OK;
    *counted = 0;
    if (t->count_only) { /* as if every token counted */
        *counted = rows * t->desc.grad_accum;
        return LLMPAR_OK;
    }
    for (int32_t m = 0; m < t->desc.grad_accum && !status; m++) {
        for (int64_t j = 0; j < t->local && !status; j++) {
            int64_t index = first + llmpar__trainer_index(t, m, j);
            status = llmpar__trainer_sequence(t, index, held_out, held_out && index >= limit, ids + j * length, targets + j * length, counted);
        }
        if (!status) status = device->copy(device, t->stream, t->ids + m * rows, ids, (size_t)rows * sizeof *ids);
        if (!status) status = device->copy(device, t->stream, t->targets + m * rows, targets, (size_t)rows * sizeof *ids);
        if (!status) status = device->synchronize(device, t->stream);
    }
    return status;
}

static llmpar_status llmpar__trainer_gradient(void *user, llmpar_fsdp *fsdp, int32_t unit, const void *shard)
{
    (void)fsdp;
    return llmpar_tensor_file_write(((llmpar_trainer *)user)->gradient_file, unit, shard);
}

/* Gradients come as the schedule updates: in backward's order where that is inside it, and not from frozen units. */
static llmpar_status llmpar__trainer_gradient_file(llmpar_trainer *t)
{
    llmpar_heap *heap = &t->ctx->heap;
    int32_t count = 0, *units = LLMPAR__ALLOC(int32_t, heap, (size_t)t->train->units + 1);
    if (!units) return llmpar_fail(t->ctx, LLMPAR_ERR_MEMORY, "trainer: out of memory");
    for (int32_t i = 0; i < t->train->count && count < t->train->units; i++)
        if (t->train->list[i].op == LLMPAR_OP_OPTIM) units[count++] = t->train->list[i].unit;
    llmpar_status status = llmpar_tensor_file_open(t->fsdp, t->gradients, units, count, &t->gradient_file);
    llmpar_heap_free(heap, units);
    return status;
}

LLMPAR_DEF llmpar_status llmpar_trainer_save_gradients(llmpar_trainer *t, const char *path)
{
    LLMPAR__NEED(t, NULL);
    if (!t->train || LLMPAR__NO_PATH(path)) return llmpar_fail(t->ctx, LLMPAR_ERR_ARGUMENT, "trainer: %s", LLMPAR__NO_PATH(path) ? "no path for gradients, expected one" : "made without data, it cannot step");
    llmpar_heap_free(&t->ctx->heap, t->gradients);
    t->gradients = llmpar_heap_strdup(&t->ctx->heap, path);
    return t->gradients ? LLMPAR_OK : llmpar_fail(t->ctx, LLMPAR_ERR_MEMORY, "trainer: out of memory");
}

LLMPAR__PRIVATE_DEF void llmpar__trainer_forget(llmpar_error *error)
{
    llmpar_error old = *error;
    llmpar_error_clear(error);
    error->rank = old.rank;
    memcpy(error->where, old.where, sizeof old.where);
}

static void llmpar__trainer_rates(const llmpar_trainer *t, llmpar_step *out)
{
    llmpar_arena_usage usage;
    llmpar_arena_get_usage(llmpar_fsdp_arena(t->fsdp), &usage);
    double positions = (double)t->desc.batch * (double)t->desc.seq_len;
    out->tokens_per_second = out->seconds > 0 ? positions / out->seconds : 0;
    out->tflops = out->tokens_per_second * llmpar_llama_flops_per_token(llmpar_llama_get_config(t->model), t->desc.seq_len) * 1e-12;
    out->mfu = t->peak_flops > 0 ? out->tflops * 1e12 / t->peak_flops : 0;
    out->memory = usage.peak_total;
}

LLMPAR_DEF llmpar_status llmpar_trainer_step(llmpar_trainer *t, llmpar_step *out)
{
    LLMPAR__ZEROED(llmpar_step, step);
    LLMPAR__ZEROED(llmpar_run, run);
    LLMPAR__NEED(t, NULL);
    if (!t->train) return llmpar_fail(t->ctx, LLMPAR_ERR_ARGUMENT, "trainer: made without data, it cannot step");
    llmpar_status status = llmpar__trainer_poll(t, 0);
    if (status) return status;
    double begin = llmpar__clock_seconds();
    step.step = t->steps + 1;
    step.lr = llmpar_lr(&t->lr, step.step);
    step.loss_scale = t->desc.dtype == LLMPAR_F16 ? t->scale.scale : 1;
    status = llmpar__trainer_tokens(t, t->steps * t->desc.batch, 0, 0, &run.tokens);
    if (!status && t->gradients) {
        status = llmpar__trainer_gradient_file(t);
        llmpar_heap_free(&t->ctx->heap, t->gradients); /* asked for once, also if it cannot be opened */
        t->gradients = NULL;
    }
    if (status) return status;
    run.micro = t->micro;
    run.loss_scale = step.loss_scale;
    run.skip_nonfinite = t->desc.dtype == LLMPAR_F16;
    run.optimizer = llmpar_optim_table(t->optim);
    if (t->gradient_file) {
        run.on_gradient = llmpar__trainer_gradient;
        run.on_gradient_user = t;
    }
    llmpar_optim_set_lr(t->optim, step.lr);
    /* The first error of a rank stays; one that the caller has lived with must not stand for this step's. */
    llmpar_error earlier = t->ctx->error, *error = &t->ctx->error;
    llmpar__trainer_forget(error);
    status = llmpar_fsdp_run(t->fsdp, t->train->list, t->train->count, &run);
    if (status == LLMPAR_ERR_NONFINITE) { /* the step's number goes in front */
        llmpar_error first = *error;
        llmpar__trainer_forget(error);
        llmpar_fail(t->ctx, status, "step %lld: %s", (long long)step.step, first.text);
    }
    if (!status) *error = earlier;
    if (run.before_optimizer.live_total > t->memory.before_optimizer.live_total) t->memory.before_optimizer = run.before_optimizer;
    llmpar_arena_get_usage(llmpar_fsdp_arena(t->fsdp), &t->memory.step);
    if (t->gradient_file) {
        if (!status) status = llmpar_tensor_file_commit(t->gradient_file);
        else llmpar_tensor_file_abandon(t->gradient_file);
        t->gradient_file = NULL;
    }
    if (!status && t->desc.dtype == LLMPAR_F16 && !t->count_only) {
        LLMPAR__NO_ERROR(why);
        status = llmpar_loss_scale_update(&t->scale, run.found_inf, &why);
        if (status) llmpar_fail(t->ctx, status, "step %lld: %s", (long long)step.step, why.text);
    }
    if (status) return status;
    t->steps++;
    step.tokens = run.global_tokens;
    step.loss = run.loss;
    step.grad_norm = run.grad_norm;
    step.skipped = run.skipped || run.found_inf;
    step.found_inf = run.found_inf;
    step.seconds = llmpar__clock_seconds() - begin;
    llmpar__trainer_rates(t, &step);
    if (t->count_only) return LLMPAR_OK;
    if (step.found_inf) llmpar_log(t->ctx, LLMPAR_LOG_WARNING, "step %lld: the gradient is not finite at loss scale %g, nothing was updated; the next step takes %g", (long long)step.step, step.loss_scale, t->scale.scale);
    else if (step.skipped) llmpar_log(t->ctx, LLMPAR_LOG_WARNING, "step %lld: no token counts, nothing was updated", (long long)step.step);
    if (out) *out = step;
    status = llmpar__metrics_step(t, &step);
    return !status && t->desc.checkpoint_every && t->steps % t->desc.checkpoint_every == 0 ? llmpar_trainer_checkpoint(t) : status;
}

static llmpar_status llmpar__trainer_trace_text(void *user, const char *text, size_t bytes)
{
    llmpar_trainer *t = (llmpar_trainer *)user;
    LLMPAR__NO_ERROR(error);
    llmpar_status status = llmpar_writer_write(t->trace_file, text, bytes, &error);
    return status ? llmpar_fail(t->ctx, status, "%s", error.text) : LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_trainer_save_trace(llmpar_trainer *t)
{
    llmpar_status status = LLMPAR_OK;
    LLMPAR__NO_ERROR(error);
    LLMPAR__NEED(t, NULL);
    if (!t->trace) return llmpar_fail(t->ctx, LLMPAR_ERR_ARGUMENT, "trainer: no trace was asked for");
    if (!t->ctx->rank) status = llmpar_writer_open(&t->ctx->heap, t->ctx->io, t->desc.trace, &t->trace_file, &error);
    if (!status) status = llmpar_trace_write(t->trace, t->ctx->comm, llmpar__trainer_trace_text, t);
    if (!status && t->trace_file) {
        status = llmpar_writer_commit(t->trace_file, &error);
        t->trace_file = NULL;
    }
    llmpar_writer_abandon(t->trace_file);
    t->trace_file = NULL;
    return status && error.status ? llmpar_fail(t->ctx, status, "%s", error.text) : status;
}

LLMPAR_DEF llmpar_status llmpar_trainer_eval(llmpar_trainer *t, int64_t max_sequences, double *loss)
{
    *loss = 0;
    LLMPAR__NEED(t, NULL);
    if (!t->desc.data || !t->data.eval_windows) return llmpar_fail(t->ctx, LLMPAR_ERR_ARGUMENT, "trainer: no held-out sequences to evaluate on");
    int64_t limit = max_sequences > 0 && max_sequences < t->data.eval_windows ? max_sequences : t->data.eval_windows, tokens = 0;
    double sum = 0;
    llmpar_status status = LLMPAR_OK;
    /* Groups as large as a training batch; the last one is filled up with sequences that do not count. */
    for (int64_t first = 0; first < limit && !status; first += t->desc.batch) {
        LLMPAR__ZEROED(llmpar_run, run);
        status = llmpar__trainer_tokens(t, first, 1, limit, &run.tokens);
        run.micro = t->micro;
        if (!status) status = llmpar_fsdp_run(t->fsdp, t->eval->list, t->eval->count, &run);
        sum += run.loss * (double)run.global_tokens;
        tokens += run.global_tokens;
    }
    if (!status) *loss = sum / (double)tokens;
    return status;
}

#endif /* LLMPAR_NO_LLAMA, LLMPAR_NO_IO, LLMPAR_NO_TEXT */
