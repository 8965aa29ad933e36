/* elementwise: max, add, scale, cast, copy_rows. Nothing here depends on more than one position of its operands, so the
   work is cut into chunks for the workers at will. */
#include "cpu/cpu_internal.h"
#include "cpu/kernels_internal.h"

static const llmpar__kernel llmpar__elementwise_max_kernels[4] = LLMPAR__VKERNELS(elementwise_max);
static const llmpar__kernel llmpar__elementwise_add_kernels[4] = LLMPAR__VKERNELS(elementwise_add);
static const llmpar__kernel llmpar__elementwise_scale_kernels[4] = LLMPAR__VKERNELS(elementwise_scale);

static void llmpar__elementwise_run(llmpar_device *device, const llmpar__kernel *kernels, llmpar_dtype dtype, const void *args, size_t count)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar__pool_run(cpu, kernels[llmpar__v_index(cpu, dtype)], (void *)(uintptr_t)args, llmpar__v_blocks((int64_t)count, LLMPAR__ELEMENTWISE_CHUNK));
}

static void llmpar__elementwise_max_i64(void *arg, int64_t task, int32_t worker)
{
    const llmpar_max_args *a = (const llmpar_max_args *)arg;
    size_t begin = (size_t)task * LLMPAR__ELEMENTWISE_CHUNK, end = begin + LLMPAR__ELEMENTWISE_CHUNK;
    int64_t *out = (int64_t *)a->out;
    (void)worker;
    if (end > a->count) end = a->count;
    for (size_t i = begin; i < end; i++) {
        int64_t most = ((const int64_t *)a->in[0])[i];
        for (int32_t j = 1; j < a->n; j++) most = llmpar__v_max(most, ((const int64_t *)a->in[j])[i]);
        out[i] = most;
    }
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_max(llmpar_device *device, llmpar_stream *stream, const llmpar_max_args *args)
{
    (void)stream;
    if (args->n < 1) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "max: n = %d, expected at least 1", (int)args->n);
    if (args->dtype == LLMPAR_I64) {
        llmpar__pool_run((llmpar__cpu *)device->state, llmpar__elementwise_max_i64, (void *)(uintptr_t)args, llmpar__v_blocks((int64_t)args->count, LLMPAR__ELEMENTWISE_CHUNK));
        return LLMPAR_OK;
    }
    if (args->dtype != LLMPAR_F32 && args->dtype != LLMPAR_F64) return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "max: dtype %s, expected f32, f64 or i64", llmpar_dtype_name(args->dtype));
    llmpar__elementwise_run(device, llmpar__elementwise_max_kernels, args->dtype, args, args->count);
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_add(llmpar_device *device, llmpar_stream *stream, const llmpar_add_args *args)
{
    llmpar__elementwise_job job;
    llmpar_status status = llmpar__v_check(device, "add", args->dtype);
    (void)stream;
    if (status) return status;
    job.add = args;
    job.scale = NULL;
    job.half = llmpar__half_of((llmpar__cpu *)device->state, args->dtype);
    llmpar__elementwise_run(device, llmpar__elementwise_add_kernels, args->dtype, &job, args->count);
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_scale(llmpar_device *device, llmpar_stream *stream, const llmpar_scale_args *args)
{
    llmpar__elementwise_job job;
    llmpar_status status = llmpar__v_check(device, "scale", args->dtype);
    (void)stream;
    if (status) return status;
    job.add = NULL;
    job.scale = args;
    job.half = llmpar__half_of((llmpar__cpu *)device->state, args->dtype);
    llmpar__elementwise_run(device, llmpar__elementwise_scale_kernels, args->dtype, &job, args->count);
    return LLMPAR_OK;
}

typedef struct llmpar__elementwise_cast_job { const llmpar_cast_args *args; llmpar__half in, out; } llmpar__elementwise_cast_job;

/* The bits of llmpar_convert. Between BF16 and F16 by way of f32, which holds both; pairs with F64 are llmpar_convert's own. */
static void llmpar__elementwise_cast(void *arg, int64_t task, int32_t worker)
{
    const llmpar__elementwise_cast_job *job = (const llmpar__elementwise_cast_job *)arg;
    const llmpar_cast_args *a = job->args;
    int64_t begin = task * LLMPAR__ELEMENTWISE_CHUNK, end = llmpar__v_min((int64_t)a->count, begin + LLMPAR__ELEMENTWISE_CHUNK);
    const char *in = (const char *)a->in + begin * job->in.size;
    char *out = (char *)a->out + begin * job->out.size;
    (void)worker;
    if (job->in.widen && a->out_dtype == LLMPAR_F32) job->in.widen((float *)(void *)out, in, end - begin);
    else if (job->out.narrow && a->in_dtype == LLMPAR_F32) job->out.narrow(out, (const float *)(const void *)in, end - begin);
    else if (job->in.widen && job->out.narrow && a->in_dtype != a->out_dtype) {
        float scratch[LLMPAR__HALF_ROOM];
        for (; begin < end; begin += LLMPAR__HALF_PART) {
            int64_t n = llmpar__v_min(LLMPAR__HALF_PART, end - begin);
            llmpar__half_read(&job->in, a->in, begin, n, scratch);
            llmpar__half_write(&job->out, a->out, begin, n, scratch);
        }
    } else llmpar_convert(out, a->out_dtype, in, a->in_dtype, (size_t)(end - begin));
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_cast(llmpar_device *device, llmpar_stream *stream, const llmpar_cast_args *args)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar__elementwise_cast_job job;
    (void)stream;
    /* A conversion of nothing says whether the pair is known. */
    if (!llmpar_convert(args->out, args->out_dtype, args->in, args->in_dtype, 0))
        return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "cast: from %s to %s, expected floating types", llmpar_dtype_name(args->in_dtype), llmpar_dtype_name(args->out_dtype));
    job.args = args;
    job.in = llmpar__half_of(cpu, args->in_dtype);
    job.out = llmpar__half_of(cpu, args->out_dtype);
    llmpar__pool_run(cpu, llmpar__elementwise_cast, &job, llmpar__v_blocks((int64_t)args->count, LLMPAR__ELEMENTWISE_CHUNK));
    return LLMPAR_OK;
}

typedef struct llmpar__elementwise_copy_job { const llmpar_copy_rows_args *args; int64_t step; } llmpar__elementwise_copy_job;

static void llmpar__elementwise_copy(void *arg, int64_t task, int32_t worker)
{
    const llmpar__elementwise_copy_job *job = (const llmpar__elementwise_copy_job *)arg;
    const llmpar_copy_rows_args *a = job->args;
    int64_t end = llmpar__v_min(a->rows, (task + 1) * job->step);
    (void)worker;
    for (int64_t r = task * job->step; r < end; r++)
        memcpy((char *)a->out + (size_t)(r * a->ld_out) * a->size, (const char *)a->in + (size_t)(r * a->ld_in) * a->size, (size_t)a->width * a->size);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_copy_rows(llmpar_device *device, llmpar_stream *stream, const llmpar_copy_rows_args *args)
{
    llmpar__elementwise_copy_job job;
    (void)stream;
    if (args->rows <= 0 || args->width <= 0 || !args->size) return LLMPAR_OK;
    job.args = args;
    job.step = llmpar__v_max(1, LLMPAR__ELEMENTWISE_CHUNK / args->width);
    llmpar__pool_run((llmpar__cpu *)device->state, llmpar__elementwise_copy, &job, llmpar__v_blocks(args->rows, job.step));
    (void)device;
    return LLMPAR_OK;
}
