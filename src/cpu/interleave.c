/* interleave: weights become a stream for products of few rows (gemm_thin.c), and rows again. As many rows as are taken together are turned in a worker's scratch and put back where they were. */
#include "cpu/gemm_internal.h"
#include "cpu/gemm_thin_internal.h"

#include "base/size.h"

#include <string.h>

LLMPAR__PRIVATE_DEF int32_t llmpar__cpu_interleaved_rows(llmpar_device *device, llmpar_dtype dtype)
{
    int64_t rows = 0;
    if (dtype == LLMPAR_F32 || dtype == LLMPAR_BF16 || dtype == LLMPAR_F16) llmpar__gemm_thin_function((const llmpar__cpu *)device->state, dtype, &rows);
    return (int32_t)rows;
}

#if !defined(LLMPAR_NO_SIMD)

typedef struct llmpar__interleave_job { float *w, *scratch; int64_t rows, words; int back; } llmpar__interleave_job;

static void llmpar__interleave_task(void *arg, int64_t task, int32_t worker)
{
    const llmpar__interleave_job *job = (const llmpar__interleave_job *)arg;
    size_t bytes = (size_t)(job->rows * job->words) * sizeof(float);
    float *w = job->w + task * job->rows * job->words, *scratch = job->scratch + worker * llmpar_round_up(job->rows * job->words, 16);
    if (job->back) {
        memcpy(scratch, w, bytes);
        llmpar__gemm_turn(scratch, 4 * job->rows, job->words, job->rows, w, job->words);
    } else {
        llmpar__gemm_turn(w, 4 * job->words, job->rows, job->words, scratch, job->rows);
        memcpy(w, scratch, bytes);
    }
}

#endif

LLMPAR__PRIVATE_DEF size_t llmpar__cpu_interleave_workspace(llmpar_device *device, const llmpar_interleave_args *args)
{
    int64_t words = args->k * (int64_t)llmpar_dtype_size(args->dtype) / 4;
    return (size_t)(llmpar__pool_threads((const llmpar__cpu *)device->state) * llmpar_round_up(llmpar__cpu_interleaved_rows(device, args->dtype) * words, 16)) * sizeof(float) + 63;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_interleave(llmpar_device *device, llmpar_stream *stream, const llmpar_interleave_args *args)
{
    int32_t rows = llmpar__cpu_interleaved_rows(device, args->dtype);
    int64_t bytes = args->k * (int64_t)llmpar_dtype_size(args->dtype);
    size_t need;
    (void)stream;
    if (!rows) return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "interleave: none for %s on %s", llmpar_dtype_name(args->dtype), device->name);
    if (args->n < 0 || args->k < 0 || bytes % 4) return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "interleave: weights of %lld rows of %lld %s, expected rows of whole words of 4 bytes", (long long)args->n, (long long)args->k, llmpar_dtype_name(args->dtype));
    if ((uintptr_t)args->w % 4) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "interleave: weights at an address that is no multiple of 4");
    need = llmpar__cpu_interleave_workspace(device, args);
    if (!args->workspace || args->workspace_bytes < need)
        return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "interleave: expected a workspace of %llu bytes, got %llu", (unsigned long long)need, (unsigned long long)(args->workspace ? args->workspace_bytes : 0));
#if !defined(LLMPAR_NO_SIMD)
    {
        llmpar__interleave_job job;
        job.w = (float *)args->w;
        job.scratch = (float *)(void *)((char *)args->workspace + (64 - (uintptr_t)args->workspace % 64) % 64);
        job.rows = rows;
        job.words = bytes / 4;
        job.back = args->back;
        llmpar__pool_run((llmpar__cpu *)device->state, llmpar__interleave_task, &job, bytes ? args->n / rows : 0);
    }
#endif
    return LLMPAR_OK;
}
