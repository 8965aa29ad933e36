/* parity_run: a model run once as a configuration says: its logits, what stands behind every layer, loss and gradients, into files of a folder that goes at the end.
   Activations are seen by wrapping every unit's callbacks between llmpar_llama_apply, which sets them, and llmpar_parallelize, which takes them: the model, the recipe and the policies know nothing of it. */
#ifndef EXAMPLES_PARITY_RUN_H
#define EXAMPLES_PARITY_RUN_H

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include "options.h"
#include "parity.h"

/* ---- what is run ---- */

/* One side: how to run it. */
typedef struct configuration {
    const char *name, *text; /* "a"; as on the command line */
    char *words;             /* a copy, cut into options */
    const char *model, *cpu;
    long dp_replicate, dp_shard, tp, threads, grad_accum;
    llmpar_trainer_desc policy;
    llmpar_llama_desc shape;
    llmpar_llama_config config;
} configuration;

/* One side's numbers: of a run, in files of a folder that goes at the end; or of --reference. Activations have a place for each half of a block: 0 behind the embedding, 2l+1 behind layer l's attention, 2l+2 behind layer l. */
typedef struct outcome {
    const char *name, *text;
    llmpar_file activation_file, logit_file;
    llmpar_safetensors *saved_activations, *saved_logits, *gradients; /* NULL: not there */
    source *activation;            /* [2L + 1], each [B,T,D] */
    source logits;                 /* [B,T,V] */
    llmpar_dtype computed;         /* of --reference, DEFAULT: as its tensors are stored */
    int saved, has_loss, exact;    /* saved: --reference; exact: every sum is in the order that no mesh changes */
    double loss, gradient_scale;
    int64_t tokens;
} outcome;

typedef struct job {
    int64_t sequences, length, points;  /* B, T, 2L + 1 */
    int64_t hidden, vocab;
    const unsigned char *ids;           /* [B][T + 1] u32 */
    const configuration *how;
    outcome *out;
    int activation_handle, logit_handle;
    const char *gradient_path;
    llmpar_dtype dtype;
} job;

static char folder[4096]; /* of everything that is written on the way; "" while there is none */
static const char *const parts_of_folder[] = {"a.activations", "a.logits", "a.gradients", "a.gradients.tmp", "b.activations", "b.logits", "b.gradients", "b.gradients.tmp"};

static void folder_path(char *out, size_t bytes, const char *name) { snprintf(out, bytes, "%s/%s", folder, name); }
static void folder_remove(void)
{
    char path[4200];
    if (!folder[0]) return;
    for (size_t i = 0; i < sizeof parts_of_folder / sizeof parts_of_folder[0]; i++) {
        folder_path(path, sizeof path, parts_of_folder[i]);
        unlink(path);
    }
    rmdir(folder);
    folder[0] = 0;
}
static void folder_signal(int number)
{
    folder_remove();
    signal(number, SIG_DFL);
    raise(number);
}

static uint32_t id_at(const unsigned char *ids, int64_t i)
{
    const unsigned char *p = ids + 4 * i;
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* ---- looking at activations: every unit's callbacks are wrapped, and its forward gets one more instruction, which copies the output ---- */

typedef struct watch watch;
typedef struct watched {
    watch *all;
    llmpar_unit inner;
    llmpar_unit_op *forward, *backward;
    int64_t point;
} watched;

/* One rank's. */
struct watch {
    job *j;
    llmpar_ctx *ctx;
    const llmpar_tp *tp;
    watched *units;
    int32_t count;
    int64_t *order, fetched, local; /* order[micro-batch * local + i]: which sequence that is on this rank */
    char *staging;                  /* [local, T, D], host */
};

/* The model's own callbacks see the unit as it was. */
static llmpar_status as_before(llmpar_unit_call *call, const llmpar_unit_op *ops)
{
    watched *w = (watched *)call->user;
    int32_t index = call->index;
    call->user = w->inner.user;
    call->index = ops[index].index;
    llmpar_status status = ops[index].run(call);
    call->user = w;
    call->index = index;
    return status;
}
static llmpar_status run_forward(llmpar_unit_call *call) { return as_before(call, ((watched *)call->user)->inner.forward); }
static llmpar_status run_backward(llmpar_unit_call *call) { return as_before(call, ((watched *)call->user)->inner.backward); }
static llmpar_status sizes(void *user, const llmpar_micro *micro, llmpar_dtype dtype, llmpar_unit_sizes *out)
{
    const watched *w = (const watched *)user;
    return w->inner.sizes(w->inner.user, micro, dtype, out);
}

static llmpar_status put(llmpar_ctx *ctx, int handle, const void *data, size_t bytes, int64_t at)
{
    const char *next = (const char *)data;
    while (bytes) {
        ssize_t done = pwrite(handle, next, bytes, (off_t)at);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) return llmpar_fail(ctx, LLMPAR_ERR_IO, "%s: cannot write: %s", folder, strerror(done ? errno : ENOSPC));
        next += done;
        at += done;
        bytes -= (size_t)done;
    }
    return LLMPAR_OK;
}

typedef struct keep_args { watched *w; int64_t first, batch, begin, count; } keep_args; /* sequences order[first..], tokens [begin, begin + count) of each */
static llmpar_status keep(void *arg)
{
    const keep_args *k = (const keep_args *)arg;
    const watch *all = k->w->all;
    const job *j = all->j;
    int64_t row = j->hidden * (int64_t)llmpar_dtype_size(j->dtype);
    llmpar_status status = LLMPAR_OK;
    for (int64_t i = 0; i < k->batch && !status; i++) {
        int64_t to = (k->w->point * j->sequences + all->order[k->first + i]) * j->length + k->begin;
        status = put(all->ctx, j->activation_handle, all->staging + i * k->count * row, (size_t)(k->count * row), to * row);
    }
    return status;
}

/* The unit's output: [batch, T, D], the same on every tp rank; with sequence parallel [batch, T/tp, D], this rank's part. */
static llmpar_status look(llmpar_unit_call *call)
{
    watched *w = (watched *)call->user;
    const watch *all = w->all;
    int parts = all->tp->sequence_parallel;
    keep_args k = {w, call->micro->index * all->local, call->micro->batch, parts ? llmpar_tp_begin(all->tp, all->j->length) : 0, parts ? llmpar_tp_count(all->tp, all->j->length) : all->j->length};
    if ((call->pass != LLMPAR_PASS_FORWARD && call->pass != LLMPAR_PASS_EVAL) || (all->tp->rank && !parts)) return LLMPAR_OK; /* frozen units pass as in an evaluation */
    llmpar_status status = call->device->copy(call->device, call->stream, all->staging, call->output, (size_t)(k.batch * k.count * all->j->hidden) * llmpar_dtype_size(call->dtype));
    return status ? status : call->device->host_call(call->device, call->stream, keep, &k, sizeof k);
}

/* After llmpar_llama_apply, which sets the callbacks, and before llmpar_parallelize, which takes them. */
static llmpar_status watch_units(watch *all, llmpar_llama *model, int32_t wrap)
{
    llmpar_unit *units = llmpar_llama_units(model, &all->count);
    int64_t halves = wrap == LLMPAR_WRAP_HALF ? 1 : wrap ? 2 * wrap : 2;
    all->units = (watched *)llmpar_heap_zalloc(&all->ctx->heap, (size_t)all->count, sizeof *all->units);
    if (!all->units) return llmpar_fail(all->ctx, LLMPAR_ERR_MEMORY, "out of memory");
    for (int32_t u = 0; u < all->count; u++) {
        watched *w = &all->units[u];
        llmpar_unit *unit = &units[u];
        int last = u + 1 == all->count; /* its output is the loss */
        w->all = all;
        w->inner = *unit;
        w->point = u * halves < all->j->points ? u * halves : all->j->points - 1;
        w->forward = (llmpar_unit_op *)llmpar_heap_zalloc(&all->ctx->heap, (size_t)unit->forward_count + 1, sizeof *w->forward);
        w->backward = (llmpar_unit_op *)llmpar_heap_zalloc(&all->ctx->heap, (size_t)unit->backward_count + 1, sizeof *w->backward);
        if (!w->forward || !w->backward) return llmpar_fail(all->ctx, LLMPAR_ERR_MEMORY, "out of memory");
        for (int way = 0; way < 2; way++) {
            llmpar_unit_op *ops = way ? w->backward : w->forward;
            int32_t count = way ? unit->backward_count : unit->forward_count;
            memcpy(ops, way ? unit->backward : unit->forward, (size_t)count * sizeof *ops);
            for (int32_t i = 0; i < count; i++) {
                ops[i].run = way ? run_backward : run_forward;
                ops[i].index = i;
            }
        }
        if (!last) {
            llmpar_unit_op *op = &w->forward[unit->forward_count];
            op->name = "look at the output";
            op->run = look;
            op->kind = LLMPAR_COMPUTE;
            op->wait[0] = unit->forward_count; /* the one before */
        }
        unit->forward = w->forward;
        unit->backward = w->backward;
        unit->forward_count += !last;
        unit->sizes = sizes;
        unit->user = w;
    }
    return LLMPAR_OK;
}

static void watch_end(watch *all)
{
    for (int32_t u = 0; all->units && u < all->count; u++) {
        llmpar_heap_free(&all->ctx->heap, all->units[u].forward);
        llmpar_heap_free(&all->ctx->heap, all->units[u].backward);
    }
    llmpar_heap_free(&all->ctx->heap, all->units);
    llmpar_heap_free(&all->ctx->heap, all->order);
    llmpar_heap_free(&all->ctx->heap, all->staging);
}

/* ---- a run ---- */

/* The step's i-th sequence is the file's; each rank asks for its own, micro-batch by micro-batch. */
static llmpar_status sequence(void *user, int64_t index, int32_t *tokens)
{
    watch *all = (watch *)user;
    const job *j = all->j;
    int64_t s = index % j->sequences;
    all->order[all->fetched++] = s;
    for (int64_t i = 0; i <= j->length; i++) tokens[i] = (int32_t)id_at(j->ids, s * (j->length + 1) + i);
    return LLMPAR_OK;
}

static void describe(const configuration *c, const job *j, llmpar_trainer_desc *desc)
{
    *desc = c->policy;
    desc->seq_len = j->length;
    desc->batch = j->sequences;
    desc->grad_accum = (int32_t)c->grad_accum;
    desc->log_every = -1;
}

static llmpar_status run_logits(watch *all, llmpar_llama *model, llmpar_fsdp *fsdp)
{
    const job *j = all->j;
    size_t row = (size_t)(j->length * j->vocab) * sizeof(float);
    float *logits = (float *)llmpar_heap_alloc(&all->ctx->heap, 1, row);
    int32_t *ids = (int32_t *)llmpar_heap_alloc(&all->ctx->heap, (size_t)j->length, sizeof *ids);
    llmpar_status status = logits && ids ? LLMPAR_OK : llmpar_fail(all->ctx, LLMPAR_ERR_MEMORY, "out of memory for the logits of %lld tokens", (long long)j->length);
    for (int64_t s = 0; s < j->sequences && !status; s++) {
        for (int64_t i = 0; i < j->length; i++) ids[i] = (int32_t)id_at(j->ids, s * (j->length + 1) + i);
        status = llmpar_llama_logits(model, fsdp, ids, (int32_t)j->length, logits);
        if (!status && !all->ctx->rank) status = put(all->ctx, j->logit_handle, logits, row, s * (int64_t)row);
    }
    llmpar_heap_free(&all->ctx->heap, ids);
    llmpar_heap_free(&all->ctx->heap, logits);
    return status;
}

/* Forward and backward over all sequences. A loss scale of f16 that is too large is halved by the trainer: then again. */
static llmpar_status run_step(watch *all, llmpar_trainer *trainer)
{
    llmpar_step step;
    llmpar_status status;
    do {
        all->fetched = 0;
        status = llmpar_trainer_save_gradients(trainer, all->j->gradient_path);
        if (!status) status = llmpar_trainer_step(trainer, &step);
    } while (!status && step.found_inf);
    if (status || all->ctx->rank) return status;
    outcome *out = all->j->out;
    out->has_loss = 1;
    out->loss = step.loss;
    out->tokens = step.tokens;
    out->gradient_scale = 1 / step.loss_scale;
    return LLMPAR_OK;
}

static llmpar_status compute(llmpar_ctx *ctx, void *user)
{
    job *j = (job *)user;
    const configuration *c = j->how;
    llmpar_mesh_desc mesh_desc = {(int32_t)c->dp_replicate, (int32_t)c->dp_shard, 0, 0, (int32_t)c->tp};
    llmpar_llama_desc model_desc = c->shape;
    llmpar_llama_apply_desc apply = {0};
    llmpar_trainer_desc desc, resolved;
    llmpar_mesh *mesh = NULL;
    llmpar_llama *model = NULL;
    llmpar_trainer *trainer = NULL;
    watch all = {.j = j, .ctx = ctx};
    model_desc.config = &c->config;
    describe(c, j, &desc);
    desc.sequence = sequence;
    desc.sequence_user = &all;
    resolved = desc;
    llmpar_status status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_trainer_desc_resolve(&resolved, mesh, &c->config, &ctx->error);
    if (!status) status = llmpar_llama_create(ctx, &model_desc, &model);
    apply.canon = resolved.canon;
    apply.sequence_parallel = resolved.sequence_parallel;
    apply.dtype = resolved.dtype;
    apply.positions = j->length;
    if (!status) status = llmpar_llama_apply(model, mesh->comm[LLMPAR_AXIS_TP], &apply);
    if (!status) {
        all.tp = llmpar_llama_tp(model);
        all.local = j->sequences / ((int64_t)mesh->dp_ranks * resolved.grad_accum);
        all.order = (int64_t *)llmpar_heap_alloc(&ctx->heap, (size_t)(all.local * resolved.grad_accum), sizeof *all.order);
        all.staging = (char *)llmpar_heap_alloc(&ctx->heap, (size_t)(all.local * j->length * j->hidden), llmpar_dtype_size(resolved.dtype));
        status = all.order && all.staging ? watch_units(&all, model, c->shape.wrap) : llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "out of memory for the activations of %lld sequences", (long long)all.local);
    }
    if (!status) status = llmpar_parallelize(mesh, model, &desc, &trainer);
    if (!status) status = llmpar_load_hf(trainer, c->model);
    if (!status) status = run_logits(&all, model, llmpar_trainer_fsdp(trainer));
    if (!status) status = run_step(&all, trainer);
    llmpar_trainer_destroy(trainer);
    watch_end(&all);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    return status;
}

static int fail(const char *who, const llmpar_error *error)
{
    if (error->rank >= 0 && error->where[0]) fprintf(stderr, "verify_parity: %s: rank %d (%s): %s\n", who, (int)error->rank, error->where, error->text);
    else fprintf(stderr, "verify_parity: %s: %s\n", who, error->text);
    return 2;
}

static void progress(const char *text)
{
    if (isatty(STDERR_FILENO)) fprintf(stderr, "\r\033[K%s", text);
}

/* A new file of the folder, open for writing, and for reading what was written. */
static int folder_file(const configuration *c, const char *what, llmpar_file *out)
{
    char name[40], path[4200];
    snprintf(name, sizeof name, "%s.%s", c->name, what);
    folder_path(path, sizeof path, name);
    int handle = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (handle < 0) return option_error("verify_parity: %s: cannot create: %s", path, strerror(errno));
    out->io = llmpar_io_system();
    out->handle = handle;
    out->bytes = UINT64_MAX / 2; /* it grows */
    out->path = folder;
    return 0;
}

/* Runs a configuration. 0, or 2 with the line printed. */
static int run(const configuration *c, job *j, outcome *out, llmpar_heap *heap)
{
    static const char *const doing[] = {"running a ..", "running b .."};
    llmpar_launch_desc launch = {0};
    llmpar_error error;
    char name[40], path[4200];
    out->name = c->name;
    out->text = c->text;
    snprintf(name, sizeof name, "%s.gradients", c->name);
    folder_path(path, sizeof path, name);
    if (folder_file(c, "activations", &out->activation_file) || folder_file(c, "logits", &out->logit_file)) return 2;
    j->how = c;
    j->out = out;
    j->activation_handle = out->activation_file.handle;
    j->logit_handle = out->logit_file.handle;
    j->gradient_path = path;
    j->dtype = c->policy.dtype;
    launch.ranks = (int32_t)(c->dp_replicate * c->dp_shard * c->tp);
    launch.threads = (int32_t)c->threads;
    launch.transport = LLMPAR_TRANSPORT_THREADS;
    launch.cpu = c->cpu;
    launch.log = quiet_log;
    progress(doing[c->name[0] == 'b']);
    llmpar_status status = llmpar_launch(&launch, compute, j, &error);
    progress("");
    if (status) return fail(c->name, &error);
    int64_t halves = c->shape.wrap == LLMPAR_WRAP_HALF ? 1 : c->shape.wrap ? 2 * c->shape.wrap : 2, each = j->sequences * j->length * j->hidden;
    out->activation = (source *)calloc((size_t)j->points, sizeof *out->activation);
    if (!out->activation) return option_error("verify_parity: out of memory");
    for (int64_t point = 0, last = 0; !last; point += halves) {
        last = point >= j->points - 1;
        source *s = &out->activation[last ? j->points - 1 : point];
        s->file = &out->activation_file;
        s->begin = (uint64_t)((s - out->activation) * each) * llmpar_dtype_size(j->dtype);
        s->dtype = j->dtype;
        s->count = each;
    }
    out->logits.file = &out->logit_file;
    out->logits.dtype = LLMPAR_F32;
    out->logits.count = j->sequences * j->length * j->vocab;
    llmpar_error_clear(&error);
    return llmpar_safetensors_open(heap, NULL, path, &out->gradients, &error) ? fail(c->name, &error) : 0;
}

static void outcome_end(outcome *o)
{
    free(o->activation);
    llmpar_safetensors_close(o->gradients);
    llmpar_safetensors_close(o->saved_activations);
    llmpar_safetensors_close(o->saved_logits);
    llmpar_file_close(&o->activation_file);
    llmpar_file_close(&o->logit_file);
}

static void point_name(int64_t point, char *out, size_t bytes)
{
    if (point == 0) snprintf(out, bytes, "embed");
    else snprintf(out, bytes, "layers.%lld%s", (long long)((point - 1) / 2), point & 1 ? ".attention" : "");
}

#endif
