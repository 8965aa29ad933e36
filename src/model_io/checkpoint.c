/* Saving. A save in the background is the same with a copy between: everything that talks or takes memory happens on the rank's thread.

     rank 0   step-N.tmp made |                                              | manifest, sync, rename, sync, latest, pruning |
     all          agree       | [copy |] write, sync, checksum | agree, sums |                   agree                        |       */
#include "model_io/checkpoint.h"
#include "model_io/checkpoint_internal.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "optim/optim_internal.h"

#if !defined(LLMPAR_NO_IO)

#define LLMPAR__CHECKPOINT_STAGING ((size_t)512 << 10) /* stays in a cache between copy, checksum and write */

struct llmpar_checkpoint {
    llmpar_fsdp *fsdp;
    llmpar_optim *optim;
    llmpar_ctx *ctx;
    char *directory, *config;
    int32_t keep, background, fits;       /* fits: load would take the manifest */
    /* The save under way. */
    int busy;                             /* parts are written, or being written */
    llmpar_checkpoint_info info;
    llmpar_safetensors_writer *writer;    /* NULL: this rank owns nothing */
    unsigned char *copy;                  /* in the background: of `bytes` bytes */
    size_t bytes;                         /* of data */
    pthread_t thread;
    int running;                          /* the thread has to be joined */
    int done;                             /* atomic: the part is written, or has failed */
    llmpar_status status;                 /* of that; with `error` the thread's until done */
    llmpar_error error;
};

/* ---- arrays ---- */

LLMPAR__PRIVATE_DEF const char *llmpar__array_name(int32_t kind)
{
    static const char *const names[LLMPAR__ARRAY_KINDS] = {"param", "state0", "state1", "moment", "row", "col"};
    return names[kind];
}

LLMPAR__PRIVATE_DEF int32_t llmpar__arrays(const llmpar_fsdp *fsdp, const llmpar_optim *optim, int32_t unit, int32_t param, llmpar__array out[LLMPAR__ARRAYS])
{
    const llmpar_unit *u = llmpar_fsdp_unit(fsdp, unit);
    const llmpar_param *p = &u->params[param];
    int32_t count = 1;
    memset(out, 0, LLMPAR__ARRAYS * sizeof *out);
    if (!u->frozen)
        for (int32_t i = 0; i < llmpar_fsdp_optimizer_states(fsdp); i++) out[count++].kind = LLMPAR__ARRAY_STATE0 + i;
    int own = !u->frozen && optim && llmpar_optim_get_kind(optim) == LLMPAR_OPTIM_ADALOMO, factored = own && llmpar__adalomo_factored(p);
    if (own && !factored) out[count++].kind = LLMPAR__ARRAY_MOMENT;
    for (int32_t i = 0; i < count; i++) {
        out[i].dims = p->dims;
        for (int32_t d = 0; d < p->dims; d++) out[i].shape[d] = p->shape[d];
    }
    for (int32_t i = 0; i < 2 && factored; i++, count++) {
        out[count].kind = LLMPAR__ARRAY_ROW + i;
        out[count].dims = 1;
        out[count].shape[0] = p->shape[i];
    }
    return count;
}

LLMPAR__PRIVATE_DEF void llmpar__array_part(const llmpar_fsdp *fsdp, int32_t rank, int32_t unit, int32_t param, const llmpar__array *array, llmpar_local *out)
{
    llmpar_fsdp_part(fsdp, rank, unit, param, out);
    if (array->kind != LLMPAR__ARRAY_ROW && array->kind != LLMPAR__ARRAY_COL) return;
    /* Whole wherever there is a part of the matrix; the rank that writes element 0 writes them. */
    int has = out->flat_count > 0, first = out->is_owner && out->flat_begin == 0 && out->offset[0] == 0 && out->offset[1] == 0;
    memset(out, 0, sizeof *out);
    out->shape[0] = out->elements = array->shape[0];
    out->flat_count = has ? out->elements : 0;
    out->is_owner = has && first;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__array_fetch(llmpar_fsdp *fsdp, int32_t unit, llmpar__array_unit *out)
{
    llmpar_ctx *ctx = llmpar_fsdp_mesh(fsdp)->ctx;
    memset(out, 0, sizeof *out);
    out->base[0] = (char *)llmpar_fsdp_shard(fsdp, unit, NULL, &out->segments, &out->count);
    if (!out->base[0]) return ctx->error.status;
    for (int32_t i = 0; i < llmpar_fsdp_optimizer_states(fsdp) && !llmpar_fsdp_unit(fsdp, unit)->frozen; i++) {
        out->base[1 + i] = (char *)llmpar_fsdp_optimizer_state(fsdp, unit, i);
        if (out->base[1 + i]) continue;
        llmpar_fsdp_shard_done(fsdp, unit, 0);
        return ctx->error.status;
    }
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__array_done(llmpar_fsdp *fsdp, int32_t unit, int32_t changed)
{
    llmpar_status status = llmpar_fsdp_shard_done(fsdp, unit, changed), states = llmpar_fsdp_optimizer_done(fsdp, unit, changed);
    return status ? status : states;
}

LLMPAR__PRIVATE_DEF char *llmpar__array_memory(const llmpar_fsdp *fsdp, const llmpar_optim *optim, int32_t unit, int32_t param, const llmpar__array *array, const llmpar__array_unit *memory)
{
    llmpar_optim_factors factors;
    int32_t s = 0;
    while (s < memory->count && memory->segments[s].param != param) s++;
    if (s == memory->count) return NULL;
    if (array->kind <= LLMPAR__ARRAY_STATE1) return memory->base[array->kind] + (size_t)memory->segments[s].begin * llmpar_dtype_size(llmpar_dtype_sum(llmpar_fsdp_dtype(fsdp)));
    llmpar_optim_get_factors(optim, unit, s, &factors);
    return (char *)(array->kind == LLMPAR__ARRAY_MOMENT ? factors.moment : array->kind == LLMPAR__ARRAY_ROW ? factors.row : factors.col);
}

/* ---- agreement ---- */

LLMPAR__PRIVATE_DEF llmpar_status llmpar__checkpoint_agree(llmpar_ctx *ctx, llmpar_status status, const llmpar_error *error, const char *tag)
{
    int64_t worst = status ? ctx->world - ctx->rank : 0;
    LLMPAR__ZEROED(llmpar_error, shared);
    llmpar_status talk = llmpar__comm_largest(ctx->comm, &worst, 1, tag);
    if (talk) return status ? status : talk;
    if (!worst) return LLMPAR_OK;
    int32_t root = (int32_t)(ctx->world - worst);
    if (root == ctx->rank) snprintf(shared.text, sizeof shared.text, "%s", error ? error->text : ctx->error.text);
    shared.status = status;
    llmpar_collective call = llmpar__comm_collective(&shared, &shared, sizeof shared, LLMPAR_U8, tag);
    call.root = root;
    talk = llmpar__comm_talk(ctx->comm, LLMPAR_CALL_BROADCAST, &call);
    if (talk) return talk;
    return ctx->world > 1 ? llmpar_fail(ctx, shared.status, "rank %d: %s", (int)root, shared.text) : llmpar_fail(ctx, shared.status, "%s", shared.text);
}

/* ---- this rank's part ---- */

/* What this rank writes, in the file's order; tensors NULL: only counted, and the names' lengths checked. names[count][LLMPAR__CHECKPOINT_NAME]. */
static llmpar_status llmpar__checkpoint_declare(llmpar_checkpoint *c, llmpar_safetensor *tensors, char *names, int32_t *count)
{
    llmpar__array array[LLMPAR__ARRAYS];
    llmpar_dtype dtype = llmpar_dtype_sum(llmpar_fsdp_dtype(c->fsdp));
    *count = 0;
    c->bytes = 0;
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(c->fsdp); u++)
        for (int32_t p = 0; p < llmpar_fsdp_unit(c->fsdp, u)->param_count; p++) {
            const char *name = llmpar_fsdp_unit(c->fsdp, u)->params[p].name;
            int32_t arrays = llmpar__arrays(c->fsdp, c->optim, u, p, array);
            if (strlen(name) >= LLMPAR__CHECKPOINT_NAME - 8)
                return llmpar_error_set(&c->error, LLMPAR_ERR_ARGUMENT, "checkpoint: tensor name %.100s..: expected less than %d bytes", name, LLMPAR__CHECKPOINT_NAME - 8);
            for (int32_t a = 0; a < arrays; a++) {
                llmpar_local local;
                llmpar__array_part(c->fsdp, c->ctx->rank, u, p, &array[a], &local);
                if (!local.is_owner || !local.flat_count) continue;
                c->bytes += (size_t)local.flat_count * llmpar_dtype_size(dtype);
                if (tensors) {
                    llmpar_safetensor *tensor = &tensors[*count];
                    char *text = names + (size_t)*count * LLMPAR__CHECKPOINT_NAME;
                    snprintf(text, LLMPAR__CHECKPOINT_NAME, "%s/%s", llmpar__array_name(array[a].kind), name);
                    tensor->name = text;
                    tensor->dtype = dtype;
                    tensor->dims = 1;
                    tensor->shape[0] = local.flat_count;
                }
                ++*count;
            }
        }
    return LLMPAR_OK;
}

static llmpar_status llmpar__checkpoint_open(llmpar_checkpoint *c)
{
    llmpar_heap *heap = &c->ctx->heap;
    char path[LLMPAR__CHECKPOINT_PATH];
    int32_t count;
    llmpar_status status = llmpar__checkpoint_declare(c, NULL, NULL, &count);
    if (status || !count) return status;
    llmpar_safetensor *tensors = LLMPAR__ZALLOC(llmpar_safetensor, heap, (size_t)count);
    char *names = (char *)llmpar_heap_alloc(heap, (size_t)count, LLMPAR__CHECKPOINT_NAME);
    if (!tensors || !names) status = llmpar_error_set(&c->error, LLMPAR_ERR_MEMORY, "checkpoint: out of memory for %d tensor names", (int)count);
    if (!status) status = llmpar__checkpoint_declare(c, tensors, names, &count);
    snprintf(path, sizeof path, "%s/step-%lld.tmp/rank-%05d.safetensors", c->directory, (long long)c->info.step, (int)c->ctx->rank);
    if (!status) status = llmpar_safetensors_writer_open(heap, c->ctx->io, path, tensors, count, &c->writer, &c->error);
    llmpar_heap_free(heap, names);
    llmpar_heap_free(heap, tensors);
    return status;
}

/* This rank's arrays in the file's order: in the background into c->copy, else piece by piece into the file. */
static llmpar_status llmpar__checkpoint_take(llmpar_checkpoint *c)
{
    llmpar_ctx *ctx = c->ctx;
    llmpar_device *device = ctx->device;
    llmpar_stream *stream = NULL;
    llmpar__array array[LLMPAR__ARRAYS];
    llmpar__array_unit memory;
    size_t size = llmpar_dtype_size(llmpar_dtype_sum(llmpar_fsdp_dtype(c->fsdp))), at = 0;
    void *piece = NULL;
    if (!c->copy && llmpar_device_host_alloc(device, &ctx->heap, LLMPAR__CHECKPOINT_STAGING, &piece)) return llmpar_error_set(&c->error, LLMPAR_ERR_MEMORY, "checkpoint: out of memory for %zu bytes", LLMPAR__CHECKPOINT_STAGING);
    unsigned char *staging = (unsigned char *)piece;
    llmpar_status status = device->stream_create(device, "checkpoint", &stream);
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(c->fsdp) && !status; u++) {
        status = llmpar__array_fetch(c->fsdp, u, &memory);
        if (status) break;
        for (int32_t p = 0; p < llmpar_fsdp_unit(c->fsdp, u)->param_count && !status; p++) {
            int32_t arrays = llmpar__arrays(c->fsdp, c->optim, u, p, array);
            for (int32_t a = 0; a < arrays && !status; a++) {
                llmpar_local local;
                llmpar__array_part(c->fsdp, ctx->rank, u, p, &array[a], &local);
                if (!local.is_owner || !local.flat_count) continue;
                const char *from = llmpar__array_memory(c->fsdp, c->optim, u, p, &array[a], &memory);
                size_t bytes = (size_t)local.flat_count * size;
                if (c->copy) status = device->copy(device, stream, c->copy + at, from, bytes);
                at += bytes;
                for (size_t done = 0, part; staging && done < bytes; done += part) {
                    part = llmpar__least(bytes - done, LLMPAR__CHECKPOINT_STAGING);
                    status = device->copy(device, stream, staging, from + done, part);
                    if (!status) status = device->synchronize(device, stream);
                    if (!status) status = llmpar_safetensors_writer_write(c->writer, staging, part, &c->error);
                    if (status) break;
                }
            }
        }
        status = llmpar__device_done(device, stream, status);
        llmpar_status put = llmpar__array_done(c->fsdp, u, 0);
        if (!status) status = put;
    }
    if (stream) device->stream_destroy(device, stream);
    llmpar_device_host_free(device, &ctx->heap, staging, LLMPAR__CHECKPOINT_STAGING);
    if (status && !c->error.status) llmpar_error_set(&c->error, status, "%s", ctx->error.text);
    return status;
}

static void *llmpar__checkpoint_thread(void *user)
{
    llmpar_checkpoint *c = (llmpar_checkpoint *)user;
    c->status = llmpar_safetensors_writer_write(c->writer, c->copy, c->bytes, &c->error);
    if (!c->status) c->status = llmpar_safetensors_writer_settle(c->writer, &c->error);
    __atomic_store_n(&c->done, 1, __ATOMIC_RELEASE);
    return NULL;
}

static void llmpar__checkpoint_write(llmpar_checkpoint *c)
{
    c->status = llmpar__checkpoint_open(c);
    if (!c->status && c->writer && c->background) {
        void *copy = NULL;
        if (!llmpar_device_host_alloc(c->ctx->device, &c->ctx->heap, c->bytes, &copy)) c->copy = (unsigned char *)copy;
        else c->status = llmpar_error_set(&c->error, LLMPAR_ERR_MEMORY, "checkpoint: out of memory for a copy of %zu bytes", c->bytes);
    }
    if (!c->status && c->writer) c->status = llmpar__checkpoint_take(c);
    if (!c->status && c->copy) {
        c->done = 0;
        int number = pthread_create(&c->thread, NULL, llmpar__checkpoint_thread, c);
        c->running = number == 0;
        if (number) c->status = llmpar_error_set(&c->error, LLMPAR_ERR_MEMORY, "checkpoint: cannot start a thread: %s", strerror(number)); /* no memory for its stack, or too many */
    }
    if (c->running) return;
    if (!c->status && c->writer) c->status = llmpar_safetensors_writer_settle(c->writer, &c->error);
    c->done = 1;
}

/* This rank's part of a save that is over, or is given up. */
static void llmpar__checkpoint_drop(llmpar_checkpoint *c)
{
    if (c->running) pthread_join(c->thread, NULL);
    llmpar_safetensors_writer_abandon(c->writer);
    llmpar_device_host_free(c->ctx->device, &c->ctx->heap, c->copy, c->copy ? c->bytes : 0);
    c->running = c->busy = 0;
    c->writer = NULL;
    c->copy = NULL;
}

/* ---- the whole ---- */

static llmpar_status llmpar__checkpoint_config(llmpar_checkpoint *c, llmpar__checkpoint_file *out)
{
    char path[LLMPAR__CHECKPOINT_PATH];
    llmpar_writer *writer = NULL;
    snprintf(path, sizeof path, "%s/step-%lld.tmp/config.json", c->directory, (long long)c->info.step);
    snprintf(out->name, sizeof out->name, "config.json");
    llmpar_status status = llmpar_writer_open(&c->ctx->heap, c->ctx->io, path, &writer, &c->error);
    if (!status) status = llmpar_writer_write(writer, c->config, strlen(c->config), &c->error);
    if (!status) status = llmpar_writer_settle(writer, &c->error);
    if (!status) llmpar_writer_sum(writer, &out->bytes, &out->xxh64);
    llmpar_writer_abandon(writer);
    return status;
}

/* Rank 0, with every rank's bytes and sum: sums[world][2]. */
static llmpar_status llmpar__checkpoint_commit(llmpar_checkpoint *c, const int64_t *sums)
{
    llmpar_heap *heap = &c->ctx->heap;
    char path[LLMPAR__CHECKPOINT_PATH];
    llmpar__checkpoint_file config, *files = LLMPAR__ZALLOC(llmpar__checkpoint_file, heap, (size_t)c->ctx->world);
    llmpar_status status = files ? LLMPAR_OK : llmpar_error_set(&c->error, LLMPAR_ERR_MEMORY, "checkpoint: out of memory");
    for (int32_t r = 0; r < c->ctx->world && !status; r++) {
        snprintf(files[r].name, sizeof files[r].name, "rank-%05d.safetensors", (int)r);
        files[r].bytes = (uint64_t)sums[2 * r];
        files[r].xxh64 = (uint64_t)sums[2 * r + 1];
    }
    if (!status && c->config) status = llmpar__checkpoint_config(c, &config);
    snprintf(path, sizeof path, "%s/step-%lld.tmp/manifest.json", c->directory, (long long)c->info.step);
    if (!status) status = llmpar__manifest_write(c->fsdp, c->optim, &c->info, c->config ? &config : NULL, files, path, &c->error);
    llmpar_heap_free(heap, files);
    return status ? status : llmpar__checkpoint_publish(heap, c->ctx->io, c->directory, c->info.step, c->keep, &c->error);
}

/* All ranks have written, or failed to. */
static llmpar_status llmpar__checkpoint_end(llmpar_checkpoint *c)
{
    llmpar_ctx *ctx = c->ctx;
    char path[LLMPAR__CHECKPOINT_PATH];
    uint64_t bytes = 0, sum = 0;
    int64_t mine[2];
    if (c->running) pthread_join(c->thread, NULL);
    c->running = 0;
    llmpar_status status = c->status;
    if (!status && c->writer) llmpar_safetensors_writer_sum(c->writer, &bytes, &sum);
    llmpar__checkpoint_drop(c);
    mine[0] = (int64_t)bytes;
    mine[1] = (int64_t)sum;
    int64_t *sums = LLMPAR__ALLOC(int64_t, &ctx->heap, 2 * (size_t)ctx->world);
    if (!sums && !status) status = llmpar_error_set(&c->error, LLMPAR_ERR_MEMORY, "checkpoint: out of memory");
    status = llmpar__checkpoint_agree(ctx, status, &c->error, "checkpoint written");
    const llmpar_collective call = llmpar__comm_collective(mine, sums, 2, LLMPAR_I64, "checkpoint sums");
    if (!status) status = llmpar__comm_talk(ctx->comm, LLMPAR_CALL_ALL_GATHER, &call);
    int written = !status;
    if (written && ctx->rank == 0) status = llmpar__checkpoint_commit(c, sums);
    /* Nobody has a file open any more. */
    snprintf(path, sizeof path, "%s/step-%lld.tmp", c->directory, (long long)c->info.step);
    if (status && ctx->rank == 0) llmpar__checkpoint_remove(ctx->io, path, NULL);
    llmpar_heap_free(&ctx->heap, sums);
    return written ? llmpar__checkpoint_agree(ctx, status, &c->error, "checkpoint committed") : status;
}

LLMPAR_DEF llmpar_status llmpar_checkpoint_poll(llmpar_checkpoint *c, int wait)
{
    LLMPAR__NEED(c, NULL);
    if (!c->busy) return LLMPAR_OK;
    if (!wait) {
        int64_t unfinished = !__atomic_load_n(&c->done, __ATOMIC_ACQUIRE);
        llmpar_status status = llmpar__comm_largest(c->ctx->comm, &unfinished, 1, "checkpoint done");
        if (status || unfinished) return status;
    }
    return llmpar__checkpoint_end(c);
}

static void llmpar__checkpoint_fill(llmpar_checkpoint *c, const llmpar_checkpoint_info *info)
{
    const llmpar_mesh *mesh = llmpar_fsdp_mesh(c->fsdp);
    LLMPAR__ZEROED(llmpar_policy, policy);
    llmpar_fsdp_policy(c->fsdp, &policy);
    c->info = *info;
    c->info.updates = c->optim ? llmpar_optim_steps(c->optim) : 0;
    c->info.dtype = llmpar_fsdp_dtype(c->fsdp);
    memcpy(c->info.degree, mesh->degree, sizeof c->info.degree);
    c->info.zero = policy.zero;
    snprintf(c->info.optimizer, sizeof c->info.optimizer, "%s", c->optim ? llmpar_optim_name(llmpar_optim_get_kind(c->optim)) : "none");
}

LLMPAR_DEF llmpar_status llmpar_checkpoint_save(llmpar_checkpoint *c, const llmpar_checkpoint_info *info)
{
    LLMPAR__NEED(c && info, NULL);
    llmpar_status status = llmpar_checkpoint_poll(c, 1);
    if (status) return status;
    llmpar_error_clear(&c->error);
    llmpar__checkpoint_fill(c, info);
    if (c->ctx->rank == 0 && !c->fits) status = llmpar__manifest_write(c->fsdp, c->optim, &c->info, NULL, NULL, NULL, &c->error);
    c->fits = !status;
    if (c->ctx->rank == 0 && !status) status = llmpar__checkpoint_begin(c->ctx->io, c->directory, c->info.step, &c->error);
    status = llmpar__checkpoint_agree(c->ctx, status, &c->error, "checkpoint begun");
    if (status) return status;
    c->busy = 1;
    llmpar__checkpoint_write(c);
    return c->background ? LLMPAR_OK : llmpar__checkpoint_end(c);
}

LLMPAR_DEF llmpar_status llmpar_checkpoint_create(llmpar_fsdp *fsdp, llmpar_optim *optim, const llmpar_checkpoint_desc *desc, llmpar_checkpoint **out)
{
    LLMPAR__NEED(fsdp, NULL);
    llmpar_ctx *ctx = llmpar_fsdp_mesh(fsdp)->ctx;
    *out = NULL;
    if (!desc) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "checkpoint: no desc");
    if (LLMPAR__NO_PATH(desc->directory) || strlen(desc->directory) > 1000) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "checkpoint: directory of %zu bytes, expected 1 .. 1000", desc->directory ? strlen(desc->directory) : 0);
    if (desc->keep < 0) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "checkpoint: keep = %d, expected 0 (all) or more", (int)desc->keep);
    llmpar_checkpoint *c = LLMPAR__ZALLOC(llmpar_checkpoint, &ctx->heap, 1);
    if (!c) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "checkpoint: out of memory");
    c->fsdp = fsdp;
    c->optim = optim;
    c->ctx = ctx;
    c->keep = desc->keep;
    c->background = desc->background;
    c->directory = llmpar_heap_strdup(&ctx->heap, desc->directory);
    c->config = desc->config ? llmpar_heap_strdup(&ctx->heap, desc->config) : NULL;
    if (!c->directory || (desc->config && !c->config)) {
        llmpar_checkpoint_destroy(c);
        return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "checkpoint: out of memory");
    }
    *out = c;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_checkpoint_destroy(llmpar_checkpoint *c)
{
    if (!c) return;
    if (c->busy) llmpar_log(c->ctx, LLMPAR_LOG_WARNING, "checkpoint: %s/step-%lld was begun and never ended", c->directory, (long long)c->info.step);
    llmpar__checkpoint_drop(c);
    llmpar_heap_free(&c->ctx->heap, c->directory);
    llmpar_heap_free(&c->ctx->heap, c->config);
    llmpar_heap_free(&c->ctx->heap, c);
}

#undef LLMPAR__CHECKPOINT_STAGING

#endif /* LLMPAR_NO_IO */
