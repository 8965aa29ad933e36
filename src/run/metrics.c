#include "run/trainer.h"
#include "run/trainer_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/math.h"

#if !defined(LLMPAR_NO_LLAMA) && !defined(LLMPAR_NO_IO) && !defined(LLMPAR_NO_TEXT)

LLMPAR__PRIVATE_DEF double llmpar__run_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

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
    fprintf(file, "\"%s\":{", name);
    for (int tag = 0; tag < LLMPAR_TAG_COUNT; tag++) fprintf(file, "\"%s\":%llu,", llmpar_tag_name((llmpar_tag)tag), (unsigned long long)bytes[tag]);
    fprintf(file, "\"total\":%llu}", (unsigned long long)total);
}

/* A resumed run goes on behind its own lines: those of later steps, and one that a crash cut short, go. */
static FILE *llmpar__metrics_resume(const llmpar_trainer *t)
{
    FILE *file = llmpar_is_file(t->desc.log) ? fopen(t->desc.log, "r+") : fopen(t->desc.log, "a");
    long keep = 0, step = -1;
    for (int c = 0, at = 0; file && llmpar_is_file(t->desc.log);) {
        static const char head[] = "{\"step\":";
        long number = 0;
        for (at = 0; head[at] && (c = fgetc(file)) == head[at];) at++;
        while (!head[at] && (c = fgetc(file)) >= '0' && c <= '9' && number < 100000000000000000) number = 10 * number + (c - '0');
        while (c != '\n' && c != EOF) c = fgetc(file);
        if (c == EOF || head[at] || number > t->resumed || number <= step) break;
        step = number;
        keep = ftell(file);
    }
    if (file && llmpar_is_file(t->desc.log) && (fflush(file) || ftruncate(fileno(file), keep) || fseek(file, keep, SEEK_SET))) {
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
    fprintf(file, "{\"step\":%lld,\"loss\":%s,\"grad_norm\":%s,%s\"lr\":%.9g,\"tokens_per_second\":%.6g,\"mfu\":%.6g,", (long long)step->step, loss, norm, scale, step->lr, step->tokens_per_second, step->mfu);
    llmpar__metrics_usage(file, "memory", usage.peak, usage.peak_total);
    fputc(',', file);
    llmpar__metrics_usage(file, "memory_init", t->memory.init.live, t->memory.init.live_total);
    fputc(',', file);
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

/* What MFU is measured against: a square product on every rank at once, the best of a few tries. Its buffers are gone before anything else is taken, and no larger than the limit (then the product is a smaller one), so that a step is all
   that memory is needed for. */
LLMPAR__PRIVATE_DEF llmpar_status llmpar__metrics_peak(llmpar_trainer *t)
{
    enum { SIDE = 256, TRIES = 3 };
    llmpar_ctx *ctx = t->ctx;
    llmpar_device *device = ctx->device;
    llmpar_stream *stream = NULL;
    llmpar_arena *arena = NULL;
    llmpar_gemm_args args;
    llmpar_gemm_segment segment;
    void *data = NULL, *workspace = NULL, *rate = NULL;
    size_t matrix;
    int64_t side = 2 * SIDE;
    memset(&args, 0, sizeof args);
    memset(&segment, 0, sizeof segment);
    args.segments = &segment;
    args.segment_count = args.pieces = 1;
    args.kind = LLMPAR_GEMM_NT;
    args.dtype = t->desc.dtype;
    do {
        side /= 2;
        segment.k = segment.lda = segment.ldb = args.m = args.n = args.ldc = side;
        matrix = (size_t)(side * side) * llmpar_dtype_size(t->desc.dtype);
        args.workspace_bytes = device->gemm_workspace(device, &args);
    } while (side > 8 && t->desc.memory_limit && 3 * matrix + args.workspace_bytes + sizeof(double) + 3 * device->alignment > t->desc.memory_limit);
    llmpar_status status = llmpar_arena_create(ctx, t->desc.memory_limit, &arena);
    if (!status) status = device->stream_create(device, "peak", &stream);
    if (!status) status = llmpar_arena_alloc(arena, LLMPAR_TAG_WORKSPACE, 3 * matrix, "peak", &data);
    if (!status) status = llmpar_arena_alloc(arena, LLMPAR_TAG_WORKSPACE, args.workspace_bytes, "peak", &workspace);
    if (!status) status = llmpar_arena_alloc(arena, LLMPAR_TAG_WORKSPACE, sizeof(double), "peak", &rate);
    if (!status) status = device->zero(device, stream, data, 3 * matrix);
    segment.a = data;
    segment.b = (char *)data + matrix;
    args.c = (char *)data + 2 * matrix;
    args.workspace = workspace;
    double best = 0;
    for (int i = 0; i < TRIES && !status; i++) {
        status = llmpar_comm_barrier(ctx->comm, stream, "peak");
        if (!status) status = device->synchronize(device, stream);
        double begin = llmpar__run_seconds();
        if (!status) status = device->gemm(device, stream, &args);
        if (!status) status = device->synchronize(device, stream);
        double flops = 2.0 * (double)side * (double)side * (double)side / (llmpar__run_seconds() - begin + 1e-9);
        if (i > 0 && flops > best) best = flops; /* the first one warms up */
    }
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.send = call.recv = rate;
    call.count = 1;
    call.dtype = LLMPAR_F64;
    call.tag = "peak";
    if (!status) status = device->copy(device, stream, rate, &best, sizeof best);
    if (!status) status = llmpar_all_reduce(ctx->comm, stream, &call);
    if (!status) status = device->copy(device, stream, &t->peak_flops, rate, sizeof best);
    if (stream) { /* in any case: the stream may use what goes now */
        llmpar_status waited = device->synchronize(device, stream);
        if (!status) status = waited;
        device->stream_destroy(device, stream);
    }
    llmpar_arena_destroy(arena);
    return status;
}

#endif /* LLMPAR_NO_LLAMA, LLMPAR_NO_IO, LLMPAR_NO_TEXT */
