#include "run/trainer.h"
#include "run/trainer_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/math.h"

#if !defined(LLMPAR_NO_LLAMA) && !defined(LLMPAR_NO_IO) && !defined(LLMPAR_NO_TEXT)

/* Metrics to stdout; progress in place on stderr, if that is a terminal. */
static void llmpar__metrics_sink(void *user, llmpar_sink_kind kind, const char *line)
{
    (void)user;
    int terminal = isatty(2);
    if (kind == LLMPAR_SINK_METRICS) {
        if (terminal) fputs("\r\033[K", stderr);
        printf("%s\n", line);
        fflush(stdout);
    } else if (terminal) {
        fprintf(stderr, "\r\033[K%s", line);
        fflush(stderr);
    }
}

/* Only tries, before any work, whether rank 0 can write there: a start that fails leaves no file, and an older one as it was. */
static llmpar_status llmpar__metrics_try(const llmpar_trainer *t, const char *path, int replaced)
{
    if (t->ctx->rank || !path) return LLMPAR_OK;
    if (replaced && access(path, F_OK) == 0 && !llmpar_is_file(path)) return llmpar_fail(t->ctx, LLMPAR_ERR_IO, "%s: cannot write: expected a regular file or none", path);
    int file = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666), created = file >= 0;
    if (file < 0 && errno == EEXIST) file = open(path, O_WRONLY | O_CLOEXEC);
    if (file < 0) return llmpar_fail(t->ctx, LLMPAR_ERR_IO, "%s: cannot open for writing: %s", path, strerror(errno));
    close(file);
    if (created) unlink(path);
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__metrics_open(llmpar_trainer *t)
{
    if (!t->desc.sink) t->desc.sink = llmpar__metrics_sink;
    llmpar_status status = llmpar__metrics_try(t, t->desc.log, 0);
    return status ? status : llmpar__metrics_try(t, t->desc.trace, 1);
}

LLMPAR__PRIVATE_DEF void llmpar__metrics_close(llmpar_trainer *t)
{
    if (t->progress) t->desc.sink(t->desc.sink_user, LLMPAR_SINK_PROGRESS, "");
    if (t->log) fclose((FILE *)t->log); /* every line was flushed and checked when written */
    t->log = NULL;
    t->progress = 0;
}

static void llmpar__metrics_usage(FILE *file, const char *name, const uint64_t bytes[LLMPAR_TAG_COUNT], uint64_t total)
{
    fprintf(file, ",\"%s\":{", name);
    for (int tag = 0; tag < LLMPAR_TAG_COUNT; tag++) fprintf(file, "\"%s\":%llu,", llmpar_tag_name((llmpar_tag)tag), (unsigned long long)bytes[tag]);
    fprintf(file, "\"total\":%llu}", (unsigned long long)total);
}

/* A resumed run goes on behind its own lines: those of later steps, and one that a crash cut short, go. */
static FILE *llmpar__metrics_resume(const llmpar_trainer *t)
{
    FILE *file = fopen(t->desc.log, "a");
    long keep = 0, step = -1;
    if (!file || fseek(file, 0, SEEK_END) || ftell(file) <= 0) return file; /* new, no file */
    file = freopen(t->desc.log, "r+", file);
    for (int c = 0, at = 0; file;) {
        static const char head[] = "{\"step\":";
        long number = 0;
        for (at = 0; head[at] && (c = fgetc(file)) == head[at];) at++;
        while (!head[at] && (c = fgetc(file)) >= '0' && c <= '9' && number < 100000000000000000) number = 10 * number + (c - '0');
        while (c != '\n' && c != EOF) c = fgetc(file);
        if (c == EOF || head[at] || number > t->resumed || number <= step) break;
        step = number;
        keep = ftell(file);
    }
    if (file && (ferror(file) || fflush(file) || ftruncate(fileno(file), keep) || fseek(file, keep, SEEK_SET))) {
        fclose(file);
        return NULL;
    }
    return file;
}

static llmpar_status llmpar__metrics_log(llmpar_trainer *t, const llmpar_step *step)
{
    if (!t->log) t->log = t->resumed ? llmpar__metrics_resume(t) : fopen(t->desc.log, "w");
    FILE *file = (FILE *)t->log;
    llmpar_arena_usage usage;
    if (!file) return llmpar_fail(t->ctx, LLMPAR_ERR_IO, "%s: cannot open for writing: %s", t->desc.log, strerror(errno));
    llmpar_arena_get_usage(llmpar_fsdp_arena(t->fsdp), &usage);
    char loss[32] = "null", norm[32] = "null", scale[64] = ""; /* JSON has no NaN: a step that loss scaling skipped */
    if (llmpar_isfinite_f64(step->loss)) snprintf(loss, sizeof loss, "%.9g", step->loss);
    if (llmpar_isfinite_f64(step->grad_norm)) snprintf(norm, sizeof norm, "%.9g", step->grad_norm);
    if (t->desc.dtype == LLMPAR_F16) snprintf(scale, sizeof scale, "\"loss_scale\":%.9g,\"found_inf\":%d,", step->loss_scale, (int)step->found_inf);
    fprintf(file, "{\"step\":%lld,\"loss\":%s,\"grad_norm\":%s,%s\"lr\":%.9g,\"tokens_per_second\":%.6g,\"mfu\":%.6g", (long long)step->step, loss, norm, scale, step->lr, step->tokens_per_second, step->mfu);
    llmpar__metrics_usage(file, "memory", usage.peak, usage.peak_total);
    llmpar__metrics_usage(file, "memory_init", t->memory.init.live, t->memory.init.live_total);
    llmpar__metrics_usage(file, "memory_before_optimizer", t->memory.before_optimizer.live, t->memory.before_optimizer.live_total);
    fputs("}\n", file);
    if (fflush(file) || ferror(file)) return llmpar_fail(t->ctx, LLMPAR_ERR_IO, "%s: cannot write step %lld: %s", t->desc.log, (long long)step->step, strerror(errno));
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__metrics_step(llmpar_trainer *t, const llmpar_step *step)
{
    char line[256];
    if (t->ctx->rank) return LLMPAR_OK;
    double gib = (double)step->memory / (1024.0 * 1024.0 * 1024.0), percent = 100.0 * step->mfu;
    long long tps = (long long)(step->tokens_per_second + 0.5);
    if (t->desc.log_every > 0 && (step->step == t->resumed + 1 || step->step % t->desc.log_every == 0)) {
        snprintf(line, sizeof line, "step: %5lld  loss: %8.5f  grad_norm: %8.4f  memory: %6.3fGiB  tps: %lld  tflops: %.4f  mfu: %.2f%%", (long long)step->step, step->loss, step->grad_norm, gib, tps, step->tflops, percent);
        t->desc.sink(t->desc.sink_user, LLMPAR_SINK_METRICS, line);
    }
    if (t->desc.log_every > 0) {
        if (t->desc.total_steps > 0) {
            int64_t left = t->desc.total_steps - step->step;
            snprintf(line, sizeof line, "step %lld/%lld  loss %.4f  %lld tokens/s  %.0f s left", (long long)step->step, (long long)t->desc.total_steps, step->loss, tps, (double)(left > 0 ? left : 0) * step->seconds);
        } else {
            snprintf(line, sizeof line, "step %lld  loss %.4f  %lld tokens/s", (long long)step->step, step->loss, tps);
        }
        t->desc.sink(t->desc.sink_user, LLMPAR_SINK_PROGRESS, line);
        t->progress = 1;
    }
    return t->desc.log ? llmpar__metrics_log(t, step) : LLMPAR_OK;
}

/* ---- what MFU is measured against ----

   A square product on every rank at once, the best of a few tries. Its buffers are gone before anything else is taken, and no larger than the limit (then the product is a smaller one), so that a step is all that memory is
   needed for. A processor shows its rate at 256; an accelerator needs a larger product, how large is found by doubling. */

typedef struct llmpar__peak {
    llmpar_trainer *t;
    llmpar_stream *stream;
    int64_t side;
    size_t matrix;         /* bytes */
    llmpar_gemm_args args; /* without pointers */
    llmpar_gemm_segment segment;
    double seconds;        /* of one product */
} llmpar__peak;

/* Sets up a product of this side. 1: it fits the limit. */
static int llmpar__peak_of(llmpar__peak *p, int64_t side)
{
    llmpar_trainer *t = p->t;
    llmpar_device *device = t->ctx->device;
    memset(&p->args, 0, sizeof p->args);
    memset(&p->segment, 0, sizeof p->segment);
    p->side = side;
    p->args.segments = &p->segment;
    p->args.segment_count = p->args.pieces = 1;
    p->args.kind = LLMPAR_GEMM_NT;
    p->args.dtype = t->desc.dtype;
    p->segment.k = p->segment.lda = p->segment.ldb = p->args.m = p->args.n = p->args.ldc = side;
    p->matrix = (size_t)(side * side) * llmpar_dtype_size(t->desc.dtype);
    p->args.workspace_bytes = device->gemm_workspace(device, &p->args);
    return !t->desc.memory_limit || 3 * p->matrix + p->args.workspace_bytes + sizeof(double) + 3 * device->alignment <= t->desc.memory_limit;
}

/* Two operands of small numbers, made on the host for a part and doubled: products of zeros are faster than others where power is what limits. */
static llmpar_status llmpar__peak_fill(const llmpar__peak *p, char *data)
{
    enum { COUNT = 1024 };
    llmpar_device *device = p->t->ctx->device;
    float part[COUNT];
    double stored[COUNT]; /* in the dtype */
    size_t bytes = 2 * p->matrix, done = COUNT * llmpar_dtype_size(p->t->desc.dtype);
    for (int i = 0; i < COUNT; i++) part[i] = (float)(i * 7919 % 1009 - 504) * (1.0f / 504);
    llmpar_convert(stored, p->t->desc.dtype, part, LLMPAR_F32, COUNT);
    if (done > bytes) done = bytes;
    llmpar_status status = device->copy(device, p->stream, data, stored, done);
    for (; done < bytes && !status; done *= 2) status = device->copy(device, p->stream, data + done, data, bytes - done < done ? bytes - done : done);
    return llmpar__device_done(device, p->stream, status);
}

/* p->seconds: the best of `tries` behind one that warms up, each of `products` in a row. */
static llmpar_status llmpar__peak_measure(llmpar__peak *p, int tries, int products)
{
    llmpar_ctx *ctx = p->t->ctx;
    llmpar_device *device = ctx->device;
    llmpar_arena *arena = NULL;
    void *data = NULL, *workspace = NULL;
    llmpar_status status = llmpar_arena_create(ctx, p->t->desc.memory_limit, &arena);
    if (!status) status = llmpar_arena_alloc(arena, LLMPAR_TAG_WORKSPACE, 3 * p->matrix, "peak", &data);
    if (!status) status = llmpar_arena_alloc(arena, LLMPAR_TAG_WORKSPACE, p->args.workspace_bytes, "peak", &workspace);
    if (!status) status = llmpar__peak_fill(p, (char *)data);
    p->segment.a = data;
    p->segment.b = (char *)data + p->matrix;
    p->args.c = (char *)data + 2 * p->matrix;
    p->args.workspace = workspace;
    p->seconds = 1e9;
    for (int i = 0; i <= tries && !status; i++) {
        status = llmpar_comm_barrier(ctx->comm, p->stream, "peak");
        if (!status) status = device->synchronize(device, p->stream);
        double begin = llmpar__clock_seconds();
        for (int k = 0; k < products && !status; k++) status = device->gemm(device, p->stream, &p->args);
        if (!status) status = device->synchronize(device, p->stream);
        double seconds = (llmpar__clock_seconds() - begin) / products + 1e-9;
        if (i > 0 && seconds < p->seconds) p->seconds = seconds;
    }
    if (p->stream) status = llmpar__device_done(device, p->stream, status);
    llmpar_arena_destroy(arena);
    return status;
}

/* An accelerator's: from 32 on, as long as the slowest rank takes less than 2 ms. */
static llmpar_status llmpar__peak_grow(llmpar__peak *p)
{
    enum { FIRST = 32, LAST = 4096 };
    int64_t nanoseconds = 0;
    llmpar_status status = LLMPAR_OK;
    for (int64_t side = FIRST; side <= LAST && !status && nanoseconds < 2000000; side *= 2) {
        if (!llmpar__peak_of(p, side)) break;
        status = llmpar__peak_measure(p, 1, 1);
        nanoseconds = (int64_t)(p->seconds * 1e9);
        if (!status) status = llmpar__comm_largest(p->t->ctx->comm, &nanoseconds, 1, "peak/side");
    }
    if (status || nanoseconds >= 2000000 || !nanoseconds) return status;
    int64_t side = p->side > LAST ? (int64_t)LAST : p->side;
    while (side > FIRST && !llmpar__peak_of(p, side)) side /= 2;
    return llmpar__peak_measure(p, 3, 8);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__metrics_peak(llmpar_trainer *t)
{
    enum { SIDE = 256, TRIES = 2 };
    llmpar_ctx *ctx = t->ctx;
    llmpar_device *device = ctx->device;
    LLMPAR__ZEROED(llmpar__peak, p);
    p.t = t;
    p.seconds = 1e9;
    llmpar_status status = device->stream_create(device, "peak", &p.stream);
    if (!status && llmpar_device_apart(device)) {
        status = llmpar__peak_grow(&p);
    } else if (!status) {
        int64_t side = SIDE;
        while (!llmpar__peak_of(&p, side) && side > 8) side /= 2;
        status = llmpar__peak_measure(&p, TRIES, 1);
    }
    double flops = 2.0 * (double)p.side * (double)p.side * (double)p.side / p.seconds;
    llmpar_collective call = llmpar__comm_collective(&flops, &t->peak_flops, 1, LLMPAR_F64, "peak");
    if (!status) status = llmpar__comm_talk(ctx->comm, LLMPAR_CALL_ALL_REDUCE, &call);
    if (p.stream) {
        status = llmpar__device_done(device, p.stream, status);
        device->stream_destroy(device, p.stream);
    }
    return status;
}

#endif /* LLMPAR_NO_LLAMA, LLMPAR_NO_IO, LLMPAR_NO_TEXT */
