/* gemm: the slot of the matrix product, and EXACT products on their way to the kernels of gemm_half.cu and gemm_f32.cu: checks, the list of segments, the workspace, the launch.

   The bits of an element depend on its segments, their pieces and the type alone: not on m, n, ld, alignment, kind (NT, NN and TN multiply the same links), on the device's size or on which pieces a rank holds. So the grid is free to
   follow the device: one block a multiprocessor, each with its own slots for partial tiles. */
#include "cuda/tiles_internal.h"
#include "cuda/launch.h"
#include "cuda/gemm_f32.cu"
#include "cuda/gemm_half.cu"

static llmpar_dtype llmpar__cuda_gemm_out(const llmpar_gemm_args *args) { return args->out_dtype == LLMPAR_DTYPE_DEFAULT ? args->dtype : args->out_dtype; }

/* As the CPU's slot has it. */
static llmpar_status llmpar__cuda_gemm_check(llmpar_device *device, const llmpar_gemm_args *args)
{
    llmpar_dtype sum = llmpar_dtype_sum(args->dtype), out = llmpar__cuda_gemm_out(args);
    int32_t previous = 0;
    if (args->kind != LLMPAR_GEMM_NT && args->kind != LLMPAR_GEMM_NN && args->kind != LLMPAR_GEMM_TN)
        return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "gemm: kind %d is none of NT, NN, TN", (int)args->kind);
    llmpar_status status = llmpar__cuda_dtype(device, "gemm", args->dtype, 1);
    if (status) return status;
    if (out != args->dtype && out != sum)
        return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "gemm: expected out_dtype %s%s%s for dtype %s, got %s", llmpar_dtype_name(args->dtype), sum != args->dtype ? " or " : "", sum != args->dtype ? llmpar_dtype_name(sum) : "", llmpar_dtype_name(args->dtype), llmpar_dtype_name(out));
    if (args->accumulate && out != sum)
        return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "gemm: accumulate needs out_dtype %s, got %s", llmpar_dtype_name(sum), llmpar_dtype_name(out));
    if (args->m < 0 || args->n < 0) return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "gemm: negative shape m = %lld, n = %lld", (long long)args->m, (long long)args->n);
    if (args->m > 1 && args->ldc < args->n) return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "gemm: ldc = %lld is less than n = %lld", (long long)args->ldc, (long long)args->n);
    if (args->pieces < 1) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "gemm: expected at least 1 piece, got %d", (int)args->pieces);
    if (args->accumulate && args->pieces != 1) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "gemm: accumulate needs exactly 1 piece, got %d", (int)args->pieces);
    for (int32_t s = 0; s < args->segment_count; s++) {
        const llmpar_gemm_segment *segment = &args->segments[s];
        int64_t a_width = args->kind == LLMPAR_GEMM_TN ? args->m : segment->k, b_width = args->kind == LLMPAR_GEMM_NT ? segment->k : args->n;
        int64_t a_rows = args->kind == LLMPAR_GEMM_TN ? segment->k : args->m, b_rows = args->kind == LLMPAR_GEMM_NT ? args->n : segment->k;
        if (segment->k < 0) return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "gemm: segment %d has k = %lld", (int)s, (long long)segment->k);
        if (segment->piece < previous || segment->piece >= args->pieces)
            return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "gemm: segment %d is of piece %d, expected %d to %d", (int)s, (int)segment->piece, (int)previous, (int)(args->pieces - 1));
        previous = segment->piece;
        if (a_rows > 1 && segment->lda < (a_width > 1 ? a_width : 0))
            return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "gemm: segment %d: lda = %lld is less than the row of %lld", (int)s, (long long)segment->lda, (long long)a_width);
        if (b_rows > 1 && segment->ldb < (b_width > 1 ? b_width : 0))
            return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "gemm: segment %d: ldb = %lld is less than the row of %lld", (int)s, (long long)segment->ldb, (long long)b_width);
        if (segment->interleaved) return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "gemm: segment %d is interleaved, which this device has no product for", (int)s);
    }
    return LLMPAR_OK;
}

/* ---- what a product needs ---- */

struct llmpar__cuda_gemm_plan {
    int64_t tiles_m, tiles_n;
    unsigned blocks;
    int32_t levels, stages, shared_slot; /* as in the job */
    size_t shared, slot_bytes, list_bytes;
};

static llmpar__cuda_gemm_plan llmpar__cuda_gemm_plan_of(const llmpar__cuda *cuda, const llmpar_gemm_args *args)
{
    llmpar__cuda_gemm_plan plan;
    int half = args->dtype != LLMPAR_F32;
    int64_t rows = half ? (int)LLMPAR__CUDA_GEMM_HALF_M : (int)LLMPAR__CUDA_GEMM_F32_SIDE, columns = half ? (int)LLMPAR__CUDA_GEMM_HALF_N : (int)LLMPAR__CUDA_GEMM_F32_SIDE, tiles;
    size_t tile = (size_t)(rows * columns) * sizeof(float), stage = half ? (size_t)LLMPAR__CUDA_GEMM_HALF_STAGE : (size_t)LLMPAR__CUDA_GEMM_F32_STAGE;
    memset(&plan, 0, sizeof plan);
    plan.tiles_m = (args->m + rows - 1) / rows;
    plan.tiles_n = (args->n + columns - 1) / columns;
    tiles = plan.tiles_m * plan.tiles_n;
    plan.blocks = (unsigned)(tiles < cuda->multiprocessors ? tiles : cuda->multiprocessors);
    for (int32_t p = args->pieces - 1; p > 0; p /= 2) plan.levels++;
    plan.stages = half ? (int)LLMPAR__CUDA_GEMM_HALF_STAGES : (int)LLMPAR__CUDA_GEMM_F32_STAGES;
    if (plan.levels && plan.stages * stage + tile <= cuda->shared_limit) {
        plan.shared_slot = (int32_t)(plan.stages * stage);
        plan.levels--;
    } else if (half && LLMPAR__CUDA_GEMM_HALF_STAGES_DEEP * stage <= cuda->shared_limit) plan.stages = LLMPAR__CUDA_GEMM_HALF_STAGES_DEEP;
    plan.shared = plan.stages * stage + (plan.shared_slot ? tile : 0);
    plan.slot_bytes = (size_t)plan.blocks * (size_t)plan.levels * tile;
    if (args->segment_count > LLMPAR__CUDA_GEMM_RUNS) plan.list_bytes = (size_t)args->segment_count * sizeof(llmpar__cuda_gemm_run);
    return plan;
}

/* With room to align. */
static size_t llmpar__cuda_gemm_bytes(const llmpar__cuda_gemm_plan *plan) { return plan->slot_bytes + plan->list_bytes ? plan->slot_bytes + plan->list_bytes + 15 : 0; }

static size_t llmpar__cuda_gemm_exact_workspace(llmpar_device *device, const llmpar_gemm_args *args)
{
    llmpar__cuda_gemm_plan plan;
    if (args->m <= 0 || args->n <= 0) return 0;
    plan = llmpar__cuda_gemm_plan_of(llmpar__cuda_of(device), args);
    return llmpar__cuda_gemm_bytes(&plan);
}

/* ---- the list of segments ---- */

/* Where the next segment of the call begins, and the run that it and its neighbours make. */
struct llmpar__cuda_gemm_reader { const llmpar_gemm_args *args; int32_t segment; };

static int llmpar__cuda_gemm_loose(const unsigned char *begin, int64_t ld, int64_t step) { return (uintptr_t)begin % 16 || ld % 16 || step % 16; }

/* 0 at the end. Empty segments are left out. */
static int llmpar__cuda_gemm_next_run(llmpar__cuda_gemm_reader *reader, llmpar__cuda_gemm_run *run)
{
    const llmpar_gemm_args *args = reader->args;
    int64_t size = (int64_t)llmpar_dtype_size(args->dtype), step_a = 0, step_b = 0;
    memset(run, 0, sizeof *run);
    while (reader->segment < args->segment_count && args->segments[reader->segment].k == 0) reader->segment++;
    if (reader->segment == args->segment_count) return 0;
    for (; reader->segment < args->segment_count; reader->segment++) {
        const llmpar_gemm_segment *segment = &args->segments[reader->segment];
        if (!run->count) {
            run->a = (const unsigned char *)segment->a;
            run->b = (const unsigned char *)segment->b;
            run->lda = segment->lda * size;
            run->ldb = segment->ldb * size;
            run->k = (int32_t)segment->k;
            run->piece = segment->piece;
            step_a = segment->k * (args->kind == LLMPAR_GEMM_TN ? run->lda : size);
            step_b = segment->k * (args->kind == LLMPAR_GEMM_NT ? size : run->ldb);
        } else if (segment->k != run->k || (run->count + 1) * segment->k > INT32_MAX / 2 || segment->piece != run->piece + run->count || segment->lda * size != run->lda || segment->ldb * size != run->ldb || (const unsigned char *)segment->a != run->a + run->count * step_a
                   || (const unsigned char *)segment->b != run->b + run->count * step_b)
            break;
        run->count++;
    }
    /* the distance to rows that do not exist */
    if (run->count == 1 && (args->kind == LLMPAR_GEMM_TN ? run->k : args->m) == 1) run->lda = 0;
    if (run->count == 1 && (args->kind == LLMPAR_GEMM_NT ? args->n : run->k) == 1) run->ldb = 0;
    run->loose = llmpar__cuda_gemm_loose(run->a, run->lda, run->count > 1 ? step_a : 0);
    if (llmpar__cuda_gemm_loose(run->b, run->ldb, run->count > 1 ? step_b : 0)) run->loose |= 2;
    return 1;
}

/* Writes a list that does not fit a launch's parameters into the workspace, a part a launch. */
struct llmpar__cuda_gemm_part { llmpar__cuda_gemm_run runs[LLMPAR__CUDA_GEMM_RUNS]; llmpar__cuda_gemm_run *out; int32_t count; };

static __global__ void llmpar__cuda_gemm_write_list(const llmpar__cuda_gemm_part part)
{
    if ((int32_t)threadIdx.x < part.count) part.out[threadIdx.x] = part.runs[threadIdx.x];
}

/* Fills job.runs, or the list in the workspace. */
static void llmpar__cuda_gemm_list(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args, llmpar__cuda_gemm_job *job, llmpar__cuda_gemm_run *out)
{
    llmpar__cuda_gemm_reader reader = { args, 0 };
    llmpar__cuda_gemm_part part;
    llmpar__cuda_gemm_run run;
    while (job->run_count < LLMPAR__CUDA_GEMM_RUNS && llmpar__cuda_gemm_next_run(&reader, &run)) job->runs[job->run_count++] = run;
    if (!llmpar__cuda_gemm_next_run(&reader, &run)) return;
    memcpy(part.runs, job->runs, sizeof part.runs);
    part.count = job->run_count;
    part.out = out;
    job->list = out;
    do {
        if (part.count == LLMPAR__CUDA_GEMM_RUNS) {
            llmpar__cuda_launch(device, stream, llmpar__cuda_gemm_write_list, dim3(1), dim3(LLMPAR__CUDA_GEMM_RUNS), 0, part);
            part.out += part.count;
            part.count = 0;
        }
        part.runs[part.count++] = run;
        job->run_count++;
    } while (llmpar__cuda_gemm_next_run(&reader, &run));
    llmpar__cuda_launch(device, stream, llmpar__cuda_gemm_write_list, dim3(1), dim3(LLMPAR__CUDA_GEMM_RUNS), 0, part);
}

/* ---- the launch ---- */

/* Arguments are checked, m and n not 0. */
static llmpar_status llmpar__cuda_gemm_exact(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args)
{
    llmpar__cuda_gemm_plan plan = llmpar__cuda_gemm_plan_of(llmpar__cuda_of(device), args);
    llmpar__cuda_gemm_job job;
    size_t need = llmpar__cuda_gemm_bytes(&plan), bytes = args->workspace ? args->workspace_bytes : 0, size = llmpar_dtype_size(llmpar__cuda_gemm_out(args));
    unsigned char *at = (unsigned char *)args->workspace;
    void (*kernel)(llmpar__cuda_gemm_job);
    if (plan.tiles_m > INT32_MAX / (2 * LLMPAR__CUDA_GEMM_GROUP) / plan.tiles_n) /* times GROUP it is an int32_t in kernels */
        return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "gemm: m = %lld, n = %lld on device %s: expected fewer than 2^26 tiles", (long long)args->m, (long long)args->n, device->name);
    for (int32_t s = 0; s < args->segment_count; s++)
        if (args->segments[s].k >= INT32_MAX / 2) return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "gemm: segment %d has k = %lld on device %s, expected less than 2^30", (int)s, (long long)args->segments[s].k, device->name);
    if (bytes < need) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "gemm: expected a workspace of %llu bytes, got %llu", (unsigned long long)need, (unsigned long long)bytes);
    if (need) at += (16 - (uintptr_t)at % 16) % 16;
    memset(&job, 0, sizeof job);
    job.slots = at;
    llmpar__cuda_gemm_list(device, stream, args, &job, (llmpar__cuda_gemm_run *)(void *)(at + plan.slot_bytes));
    job.c = args->c;
    job.m = args->m;
    job.n = args->n;
    job.ldc = args->ldc;
    job.tiles_m = (int32_t)plan.tiles_m;
    job.tiles_n = (int32_t)plan.tiles_n;
    job.pieces = args->pieces;
    job.levels = plan.levels;
    job.shared_slot = plan.shared_slot;
    job.stages = plan.stages;
    job.accumulate = args->accumulate != 0;
    job.narrow = size == 2;
    job.aligned = (uintptr_t)args->c % 16 == 0 && (args->m == 1 || args->ldc * (int64_t)size % 16 == 0);
#define LLMPAR__CUDA_GEMM_KINDS(...) (args->kind == LLMPAR_GEMM_NT ? __VA_ARGS__ 0, 0> : args->kind == LLMPAR_GEMM_NN ? __VA_ARGS__ 0, 1> : __VA_ARGS__ 1, 1>)
    if (args->dtype == LLMPAR_BF16) kernel = LLMPAR__CUDA_GEMM_KINDS(llmpar__cuda_gemm_half<0,);
    else if (args->dtype == LLMPAR_F16) kernel = LLMPAR__CUDA_GEMM_KINDS(llmpar__cuda_gemm_half<1,);
    else kernel = LLMPAR__CUDA_GEMM_KINDS(llmpar__cuda_gemm_f32<);
#undef LLMPAR__CUDA_GEMM_KINDS
    llmpar__cuda_launch(device, stream, kernel, dim3(plan.blocks), dim3(LLMPAR__CUDA_GEMM_THREADS), plan.shared, job);
    return llmpar__cuda_end(device, stream, "gemm");
}

/* ---- the slot ---- */

static size_t llmpar__cuda_gemm_workspace(llmpar_device *device, const llmpar_gemm_args *args)
{
    if (args->m <= 0 || args->n <= 0) return 0;
    return llmpar__cuda_of(device)->desc.mode == LLMPAR_CUDA_FAST ? llmpar__cuda_gemm_library_workspace(device, args) : llmpar__cuda_gemm_exact_workspace(device, args);
}

static llmpar_status llmpar__cuda_gemm(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_gemm_check(device, args);
    if (status || args->m == 0 || args->n == 0) return status;
    return llmpar__cuda_of(device)->desc.mode == LLMPAR_CUDA_FAST ? llmpar__cuda_gemm_library(device, stream, args) : llmpar__cuda_gemm_exact(device, stream, args);
}
