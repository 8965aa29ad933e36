/* Checkpoints of a trainer: what a run has to agree on to go on, and which checkpoint it goes on from. */
#include "run/trainer.h"
#include "run/trainer_internal.h"

#include <stdio.h>
#include <string.h>

#include "model_io/checkpoint_internal.h"

#if !defined(LLMPAR_NO_LLAMA) && !defined(LLMPAR_NO_IO) && !defined(LLMPAR_NO_TEXT)

static void llmpar__resume_info(const llmpar_trainer *t, llmpar_checkpoint_info *out)
{
    memset(out, 0, sizeof *out);
    out->step = t->steps;
    out->batch = t->desc.batch;
    out->seq_len = t->desc.seq_len;
    out->seed = llmpar_llama_seed(t->model);
    out->data_tokens = t->desc.data ? t->data.train_count : 0;
    out->canon = t->desc.canon;
    if (t->desc.dtype == LLMPAR_F16) out->scale = t->scale;
}

/* config.json's text on the heap. */
static char *llmpar__resume_config(llmpar_ctx *ctx, const llmpar_llama_config *config)
{
    size_t bytes = llmpar_llama_config_write(config, NULL, 0) + 1;
    char *text = LLMPAR__ALLOC(char, &ctx->heap, bytes);
    if (text) llmpar_llama_config_write(config, text, bytes);
    else llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "trainer: out of memory for config.json");
    return text;
}

/* An error that the caller has lived with must not stand for this call's. */
static llmpar_status llmpar__resume_report(llmpar_trainer *t, const llmpar_error *earlier, llmpar_status status)
{
    if (!status) t->ctx->error = *earlier;
    return status;
}

LLMPAR_DEF llmpar_status llmpar_trainer_checkpoint(llmpar_trainer *t)
{
    llmpar_checkpoint_info info;
    LLMPAR__NEED(t, NULL);
    llmpar_error earlier = t->ctx->error;
    if (!t->checkpoint) return llmpar_fail(t->ctx, LLMPAR_ERR_ARGUMENT, "trainer: no directory of checkpoints was given");
    llmpar__trainer_forget(&t->ctx->error);
    llmpar__resume_info(t, &info);
    return llmpar__resume_report(t, &earlier, llmpar_checkpoint_save(t->checkpoint, &info));
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__trainer_poll(llmpar_trainer *t, int wait)
{
    llmpar_error earlier = t->ctx->error;
    if (!t->checkpoint || t->count_only) return LLMPAR_OK;
    llmpar__trainer_forget(&t->ctx->error);
    return llmpar__resume_report(t, &earlier, llmpar_checkpoint_poll(t->checkpoint, wait));
}

LLMPAR_DEF llmpar_status llmpar_trainer_finish(llmpar_trainer *t) { return t ? llmpar__trainer_poll(t, 1) : LLMPAR_ERR_ARGUMENT; }

/* Is a whole checkpoint of this run? */
static llmpar_status llmpar__resume_accept(void *user, const char *path, const llmpar_checkpoint_info *info)
{
    llmpar_trainer *t = (llmpar_trainer *)user;
    llmpar_ctx *ctx = t->ctx;
    llmpar_llama_config config;
    llmpar_checkpoint_info own;
    llmpar__resume_info(t, &own);
    if (t->train && (info->batch != own.batch || info->seq_len != own.seq_len || info->seed != own.seed || info->data_tokens != own.data_tokens))
        return llmpar_fail(ctx, LLMPAR_ERR_CONFIG, "%s: batch %lld, seq_len %lld, seed %llu, %lld tokens of text; this run has %lld, %lld, %llu, %lld: its data would come in another order", path, (long long)info->batch,
                           (long long)info->seq_len, (unsigned long long)info->seed, (long long)info->data_tokens, (long long)own.batch, (long long)own.seq_len, (unsigned long long)own.seed, (long long)own.data_tokens);
    llmpar_status status = llmpar_hf_config(ctx, path, &config);
    if (status) return status;
    char *theirs = llmpar__resume_config(ctx, &config), *ours = theirs ? llmpar__resume_config(ctx, llmpar_llama_get_config(t->model)) : NULL;
    if (!ours) status = LLMPAR_ERR_MEMORY;
    else if (strcmp(theirs, ours)) status = llmpar_fail(ctx, LLMPAR_ERR_CONFIG, "%s/config.json: it is of another model than this run's", path);
    llmpar_heap_free(&ctx->heap, ours);
    llmpar_heap_free(&ctx->heap, theirs);
    return status;
}

static llmpar_status llmpar__resume_load(llmpar_trainer *t, const char *path)
{
    llmpar_checkpoint_info info;
    char line[LLMPAR__CHECKPOINT_PATH + 200];
    llmpar_status status = llmpar_checkpoint_load(t->fsdp, t->optim, path, llmpar__resume_accept, t, &info);
    if (status) return status;
    t->steps = t->resumed = info.step;
    if (t->desc.dtype == LLMPAR_F16 && info.scale.scale > 0) t->scale = info.scale;
    if (t->train && info.canon != t->desc.canon) llmpar_log(t->ctx, LLMPAR_LOG_WARNING, "%s: sums were made of %d canonical pieces, here of %d: the bits will not be those of one run", path, (int)info.canon, (int)t->desc.canon);
    snprintf(line, sizeof line, "resumed: %s, written on dp_replicate %d x dp_shard %d x tp %d", path, (int)info.degree[LLMPAR_AXIS_DP_REPLICATE], (int)info.degree[LLMPAR_AXIS_DP_SHARD], (int)info.degree[LLMPAR_AXIS_TP]);
    if (t->ctx->rank == 0) t->desc.sink(t->desc.sink_user, LLMPAR_SINK_METRICS, line);
    return LLMPAR_OK;
}

/* step-N, which is damaged, becomes step-N.damaged, so that the run can write that step again. Rank 0. */
static llmpar_status llmpar__resume_set_aside(llmpar_trainer *t, int64_t step, llmpar_error *error)
{
    char from[LLMPAR__CHECKPOINT_PATH], to[LLMPAR__CHECKPOINT_PATH];
    llmpar_status status = llmpar__checkpoint_path(from, error, "%s/step-%lld", t->desc.checkpoint, (long long)step);
    if (!status) status = llmpar__checkpoint_path(to, error, "%s.damaged", from);
    for (int n = 2; !status && llmpar_file_kind(t->ctx->io, to) != LLMPAR_IO_NONE; n++) status = llmpar__checkpoint_path(to, error, "%s.damaged.%d", from, n);
    if (!status) status = llmpar_file_rename(t->ctx->io, from, to, error);
    return status ? status : llmpar_directory_sync(t->ctx->io, t->desc.checkpoint, error);
}

static llmpar_status llmpar__resume_auto(llmpar_trainer *t)
{
    llmpar_ctx *ctx = t->ctx;
    char path[LLMPAR__CHECKPOINT_PATH];
    int64_t step = INT64_MAX, newest = -1;
    llmpar_error earlier = ctx->error;
    LLMPAR__NO_ERROR(error);
    llmpar_status status;
    for (;;) {
        llmpar__trainer_forget(&ctx->error);
        status = llmpar_checkpoint_newest(ctx, t->desc.checkpoint, step, &step);
        if (status) return status;
        if (newest < 0) newest = step;
        if (step < 0 && newest >= 0) return llmpar_fail(ctx, LLMPAR_ERR_FORMAT, "%s: no checkpoint is whole (the warnings say why)", t->desc.checkpoint);
        if (step < 0) break; /* a new run */
        status = llmpar__checkpoint_path(path, &ctx->error, "%s/step-%lld", t->desc.checkpoint, (long long)step);
        if (!status) status = llmpar__resume_load(t, path);
        if (!status) break;
        if (status != LLMPAR_ERR_FORMAT && status != LLMPAR_ERR_IO) return status;
        llmpar_log(ctx, LLMPAR_LOG_WARNING, "step-%lld is damaged, the one before is tried: %s", (long long)step, ctx->error.text);
    }
    while (newest > step && !status) {
        if (ctx->rank == 0) status = llmpar__resume_set_aside(t, newest, &error);
        status = llmpar__checkpoint_agree(ctx, status, &error, "damaged checkpoint set aside");
        if (!status) status = llmpar_checkpoint_newest(ctx, t->desc.checkpoint, INT64_MAX, &newest);
    }
    return llmpar__resume_report(t, &earlier, status);
}

/* DIR itself, or what DIR/latest names. */
static llmpar_status llmpar__resume_named(llmpar_trainer *t, const char *directory, char path[LLMPAR__CHECKPOINT_PATH], llmpar_error *error)
{
    char *text = NULL;
    size_t bytes;
    llmpar_status status = llmpar__checkpoint_path(path, error, "%s/manifest.json", directory);
    if (!status && llmpar_file_kind(t->ctx->io, path) == LLMPAR_IO_FILE) return llmpar__checkpoint_path(path, error, "%s", directory);
    if (!status) status = llmpar__checkpoint_path(path, error, "%s/latest", directory);
    if (!status && llmpar_file_kind(t->ctx->io, path) != LLMPAR_IO_FILE) status = llmpar_error_set(error, LLMPAR_ERR_IO, "%s: no checkpoint: neither manifest.json nor latest is there", directory);
    if (!status) status = llmpar_file_load(&t->ctx->heap, t->ctx->io, path, 64, &text, &bytes, error);
    if (!status && bytes && text[bytes - 1] == '\n') text[bytes - 1] = 0;
    if (!status && llmpar__checkpoint_step(text) < 0) status = llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: expected one line \"step-N\"", path);
    if (!status) status = llmpar__checkpoint_path(path, error, "%s/%s", directory, text);
    llmpar_heap_free(&t->ctx->heap, text);
    return status;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__trainer_resume(llmpar_trainer *t)
{
    llmpar_ctx *ctx = t->ctx;
    LLMPAR__ZEROED(llmpar_checkpoint_desc, desc);
    llmpar_status status = LLMPAR_OK;
    const char *resume = t->desc.resume;
    char path[LLMPAR__CHECKPOINT_PATH], own[LLMPAR__CHECKPOINT_PATH];
    desc.directory = t->desc.checkpoint;
    desc.keep = t->desc.keep;
    desc.background = t->desc.checkpoint_background;
    if (t->desc.checkpoint) {
        char *config = llmpar__resume_config(ctx, llmpar_llama_get_config(t->model));
        desc.config = config;
        status = config ? llmpar_checkpoint_create(t->fsdp, t->optim, &desc, &t->checkpoint) : LLMPAR_ERR_MEMORY;
        llmpar_heap_free(&ctx->heap, config);
    }
    if (status) return status;
    if (resume && !strcmp(resume, "auto")) return llmpar__resume_auto(t);
    if (resume) {
        LLMPAR__NO_ERROR(error);
        if (llmpar__checkpoint_step(resume) >= 0 && t->desc.checkpoint) status = llmpar__checkpoint_path(path, &error, "%s/%s", t->desc.checkpoint, resume);
        else status = llmpar__resume_named(t, resume, path, &error);
        status = llmpar__checkpoint_agree(ctx, status, &error, "checkpoint named");
        if (!status) status = llmpar__resume_load(t, path);
    }
    /* Nothing is overwritten: a step that this run will come to must not be there. Found now rather than then. */
    int64_t newest = -1;
    if (!status && t->desc.checkpoint) status = llmpar_checkpoint_newest(ctx, t->desc.checkpoint, INT64_MAX, &newest);
    if (status || newest < 0 || (resume && newest <= t->steps)) return status;
    snprintf(own, sizeof own, "%s/step-%lld", t->desc.checkpoint, (long long)newest);
    if (!resume) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "%.1000s: it is there already: expected resume, or a directory without checkpoints", own);
    return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "%.1000s: newer than step %lld, from which this run goes on: expected it moved away, or another directory to write to", own, (long long)t->steps);
}

#endif /* LLMPAR_NO_LLAMA, LLMPAR_NO_IO, LLMPAR_NO_TEXT */
