/* gemm: the slot of the matrix product: checks of its arguments, and the choice of the code that runs. */
#include "cpu/cpu_internal.h"

#include "base/size.h"

/* One step of a chain. Two roundings on x86-64, where not every processor has fma; one where fma is part of the architecture. */
#if defined(__aarch64__)
#define LLMPAR__GEMM_FMA_F32(a, b, sum) __builtin_fmaf(a, b, sum)
#define LLMPAR__GEMM_FMA_F64(a, b, sum) __builtin_fma(a, b, sum)
#else
#define LLMPAR__GEMM_FMA_F32(a, b, sum) ((a) * (b) + (sum))
#define LLMPAR__GEMM_FMA_F64(a, b, sum) ((a) * (b) + (sum))
#endif

#define LLMPAR__GEMM_REAL float
#define LLMPAR__GEMM_ROW llmpar__gemm_row_f32
#define LLMPAR__GEMM_MULTIPLY_ADD LLMPAR__GEMM_FMA_F32
#include "cpu/gemm_portable.inc"

#define LLMPAR__GEMM_REAL double
#define LLMPAR__GEMM_ROW llmpar__gemm_row_f64
#define LLMPAR__GEMM_MULTIPLY_ADD LLMPAR__GEMM_FMA_F64
#include "cpu/gemm_portable.inc"

static llmpar_status llmpar__gemm_check(llmpar_device *device, const llmpar_gemm_args *args)
{
    int32_t s, previous = 0;
    if (args->kind != LLMPAR_GEMM_NT && args->kind != LLMPAR_GEMM_NN && args->kind != LLMPAR_GEMM_TN)
        return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "gemm: kind %d is none of NT, NN, TN", (int)args->kind);
    if (args->dtype != LLMPAR_F32 && args->dtype != LLMPAR_F64)
        return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "gemm: expected dtype f32 or f64, got %s", llmpar_dtype_name(args->dtype));
    if (args->m < 0 || args->n < 0) return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "gemm: negative shape m = %lld, n = %lld", (long long)args->m, (long long)args->n);
    if (args->m > 1 && args->ldc < args->n) return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "gemm: ldc = %lld is less than n = %lld", (long long)args->ldc, (long long)args->n);
    if (args->pieces < 1) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "gemm: expected at least 1 piece, got %d", (int)args->pieces);
    if (args->accumulate && args->pieces != 1) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "gemm: accumulate needs exactly 1 piece, got %d", (int)args->pieces);
    for (s = 0; s < args->segment_count; s++) {
        const llmpar_gemm_segment *segment = &args->segments[s];
        int64_t a_width = args->kind == LLMPAR_GEMM_TN ? args->m : segment->k, b_width = args->kind == LLMPAR_GEMM_NT ? segment->k : args->n;
        int64_t a_rows = args->kind == LLMPAR_GEMM_TN ? segment->k : args->m, b_rows = args->kind == LLMPAR_GEMM_NT ? args->n : segment->k;
        if (segment->k < 0) return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "gemm: segment %d has k = %lld", (int)s, (long long)segment->k);
        if (segment->piece < previous || segment->piece >= args->pieces)
            return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "gemm: segment %d is of piece %d, expected %d to %d", (int)s, (int)segment->piece, (int)previous, (int)(args->pieces - 1));
        previous = segment->piece;
        if (a_rows > 1 && segment->lda < a_width)
            return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "gemm: segment %d: lda = %lld is less than the row of %lld", (int)s, (long long)segment->lda, (long long)a_width);
        if (b_rows > 1 && segment->ldb < b_width)
            return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "gemm: segment %d: ldb = %lld is less than the row of %lld", (int)s, (long long)segment->ldb, (long long)b_width);
    }
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF size_t llmpar__cpu_gemm_workspace(llmpar_device *device, const llmpar_gemm_args *args)
{
    (void)device;
    (void)args;
    return 0;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_gemm(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar_gemm_args copy = *args;
    llmpar_status status = llmpar__gemm_check(device, args);
    (void)stream;
    if (status || args->m == 0 || args->n == 0) return status;
    llmpar__pool_run(cpu, args->dtype == LLMPAR_F32 ? llmpar__gemm_row_f32 : llmpar__gemm_row_f64, &copy, args->m);
    return LLMPAR_OK;
}

#undef LLMPAR__GEMM_FMA_F32
#undef LLMPAR__GEMM_FMA_F64
