/* elementwise: max, add, scale, cast, copy_rows. Nothing here depends on more than one position of its operands, so the
   work is cut into chunks for the workers at will. */
#include "cpu/cpu_internal.h"
#include "cpu/kernels_internal.h"

static const llmpar__kernel llmpar__elementwise_max_kernels[4] = LLMPAR__VKERNELS(elementwise_max);
static const llmpar__kernel llmpar__elementwise_add_kernels[4] = LLMPAR__VKERNELS(elementwise_add);
static const llmpar__kernel llmpar__elementwise_scale_kernels[4] = LLMPAR__VKERNELS(elementwise_scale);
static const llmpar__kernel llmpar__elementwise_cast_kernels[4] = LLMPAR__VKERNELS(elementwise_cast);

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
    llmpar_status status = llmpar__v_check(device, "add", args->dtype);
    (void)stream;
    if (!status) llmpar__elementwise_run(device, llmpar__elementwise_add_kernels, args->dtype, args, args->count);
    return status;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_scale(llmpar_device *device, llmpar_stream *stream, const llmpar_scale_args *args)
{
    llmpar_status status = llmpar__v_check(device, "scale", args->dtype);
    (void)stream;
    if (!status) llmpar__elementwise_run(device, llmpar__elementwise_scale_kernels, args->dtype, args, args->count);
    return status;
}

/* Pairs with F64 are llmpar_convert's own, and so are those of one type. */
static void llmpar__elementwise_convert(void *arg, int64_t task, int32_t worker)
{
    const llmpar_cast_args *a = (const llmpar_cast_args *)arg;
    size_t begin = (size_t)task * LLMPAR__ELEMENTWISE_CHUNK, count = a->count - begin;
    (void)worker;
    if (count > LLMPAR__ELEMENTWISE_CHUNK) count = LLMPAR__ELEMENTWISE_CHUNK;
    llmpar_convert((char *)a->out + begin * llmpar_dtype_size(a->out_dtype), a->out_dtype, (const char *)a->in + begin * llmpar_dtype_size(a->in_dtype), a->in_dtype, count);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_cast(llmpar_device *device, llmpar_stream *stream, const llmpar_cast_args *args)
{
    (void)stream;
    /* A conversion of nothing says whether the pair is known. */
    if (!llmpar_convert(args->out, args->out_dtype, args->in, args->in_dtype, 0))
        return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "cast: from %s to %s, expected floating types", llmpar_dtype_name(args->in_dtype), llmpar_dtype_name(args->out_dtype));
    if (args->in_dtype != args->out_dtype && args->in_dtype != LLMPAR_F64 && args->out_dtype != LLMPAR_F64) llmpar__elementwise_run(device, llmpar__elementwise_cast_kernels, LLMPAR_F32, args, args->count);
    else llmpar__pool_run((llmpar__cpu *)device->state, llmpar__elementwise_convert, (void *)(uintptr_t)args, llmpar__v_blocks((int64_t)args->count, LLMPAR__ELEMENTWISE_CHUNK));
    return LLMPAR_OK;
}

/* memcpy asks for no line that it will write. Rows that lie anywhere are asked for earlier: at each of them the processor's own guesses begin anew. */
LLMPAR__PRIVATE_DEF void llmpar__copy_row(char *out, const char *in, size_t bytes, const char *next_out, const char *next_in)
{
    enum { LINE = 64, AHEAD = 512, FAR = 2048 };
    size_t i = 0, ahead = next_in == in + bytes ? (size_t)AHEAD : bytes < (size_t)FAR ? bytes : (size_t)FAR;
    for (; i + LINE <= bytes; i += LINE) {
        __builtin_prefetch(i + ahead < bytes ? in + i + ahead : next_in + (i + ahead - bytes), 0, 2);
        __builtin_prefetch(i + ahead < bytes ? out + i + ahead : next_out + (i + ahead - bytes), 0, 2);
        memcpy(out + i, in + i, LINE);
    }
    memcpy(out + i, in + i, bytes - i);
}

typedef struct llmpar__elementwise_copy_job { const llmpar_copy_rows_args *args; int64_t step; } llmpar__elementwise_copy_job;

static void llmpar__elementwise_copy(void *arg, int64_t task, int32_t worker)
{
    const llmpar__elementwise_copy_job *job = (const llmpar__elementwise_copy_job *)arg;
    const llmpar_copy_rows_args *a = job->args;
    int64_t end = llmpar__v_min(a->rows, (task + 1) * job->step);
    (void)worker;
    for (int64_t r = task * job->step; r < end; r++) {
        char *out = (char *)a->out + (size_t)(r * a->ld_out) * a->size;
        const char *in = (const char *)a->in + (size_t)(r * a->ld_in) * a->size;
        llmpar__copy_row(out, in, (size_t)a->width * a->size, out + (size_t)a->ld_out * a->size, in + (size_t)a->ld_in * a->size);
    }
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
