/* tree_sum: the balanced tree over whole buffers, and the largest element of several. The bits of the CPU device: additions alone have one rounding each, in the order of docs/exact.md.

   A thread takes 16 bytes of every operand where all pointers are 16-byte aligned, else one element. It reads all operands before it writes, so the result may lie on any of them. */
#include "cuda/launch.h"
#include "cuda/tree_internal.h"

#define LLMPAR__CUDA_TREE_MOST 448 /* operands of a call: their addresses are a kernel's arguments, of which there are 4 KiB */

struct llmpar__cuda_operands { const void *in[LLMPAR__CUDA_TREE_MOST]; };

/* A tree of 2, 4 or 8 operands, all of them asked for before the first is needed; Count 0: n of them, one after the other. */
template <typename Group, int Count> struct llmpar__cuda_tree_of {
    static __device__ __forceinline__ Group at(const llmpar__cuda_operands &operands, int32_t, int64_t i)
    {
        Group x[Count];
#pragma unroll
        for (int j = 0; j < Count; j++) x[j] = ((const Group *)operands.in[j])[i];
#pragma unroll
        for (int width = 1; width < Count; width *= 2)
#pragma unroll
            for (int j = 0; j < Count; j += 2 * width) x[j] = llmpar__cuda_tree_sum_groups(x[j], x[j + width]);
        return x[0];
    }
};
template <typename Group> struct llmpar__cuda_tree_of<Group, 0> {
    static __device__ __forceinline__ Group at(const llmpar__cuda_operands &operands, int32_t n, int64_t i) { return llmpar__cuda_tree_at<Group>(operands, n, i); }
};

/* groups: of 16 bytes; 0 where a pointer is not aligned. */
template <typename T, int Count> __global__ void __launch_bounds__(256) llmpar__cuda_tree_kernel(const llmpar__cuda_operands operands, int32_t n, T *out, int64_t count, int64_t groups)
{
    typedef llmpar__cuda_tree_group<T, 16 / sizeof(T)> wide;
    typedef llmpar__cuda_tree_group<T, 1> one;
    int64_t first = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = first; i < groups; i += step) ((wide *)(void *)out)[i] = llmpar__cuda_tree_of<wide, Count>::at(operands, n, i);
    for (int64_t i = groups * (int64_t)(16 / sizeof(T)) + first; i < count; i += step) ((one *)(void *)out)[i] = llmpar__cuda_tree_of<one, Count>::at(operands, n, i);
}

template <typename T> __global__ void __launch_bounds__(256) llmpar__cuda_max_kernel(const llmpar__cuda_operands operands, int32_t n, T *out, int64_t count)
{
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        T most = ((const T *)operands.in[0])[i];
        for (int32_t j = 1; j < n; j++) most = llmpar__cuda_larger(most, ((const T *)operands.in[j])[i]);
        out[i] = most;
    }
}

template <typename T> static void llmpar__cuda_tree_launch(llmpar_device *device, llmpar_stream *stream, const llmpar_tree_sum_args *args, const llmpar__cuda_operands &operands)
{
    uintptr_t all = (uintptr_t)args->out;
    for (int32_t j = 0; j < args->n; j++) all |= (uintptr_t)args->in[j];
    int64_t count = (int64_t)args->count, items = (int64_t)(16 / sizeof(T)), groups = (all & 15) ? 0 : count / items;
    unsigned blocks = llmpar__cuda_blocks(llmpar__cuda_of(device), groups ? (count + items - 1) / items : count, 256, 8);
    void (*kernel)(const llmpar__cuda_operands operands, int32_t n, T *out, int64_t count, int64_t groups) = llmpar__cuda_tree_kernel<T, 0>;
    if (args->n == 2) kernel = llmpar__cuda_tree_kernel<T, 2>;
    if (args->n == 4) kernel = llmpar__cuda_tree_kernel<T, 4>;
    if (args->n == 8) kernel = llmpar__cuda_tree_kernel<T, 8>;
    llmpar__cuda_launch(device, stream, kernel, dim3(blocks), dim3(256), 0, operands, args->n, (T *)args->out, count, groups);
}

/* Copies the addresses: the caller's array is its own again when the call returns. */
static llmpar_status llmpar__cuda_operands_of(llmpar_device *device, const char *what, const llmpar_tree_sum_args *args, llmpar__cuda_operands *out)
{
    if (args->n < 1) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "%s: n = %d, expected at least 1", what, (int)args->n);
    if (args->n > LLMPAR__CUDA_TREE_MOST) return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "%s: n = %d on device %s, expected at most %d", what, (int)args->n, device->name, LLMPAR__CUDA_TREE_MOST);
    memset(out, 0, sizeof *out);
    memcpy(out->in, args->in, (size_t)args->n * sizeof *out->in);
    return LLMPAR_OK;
}

static llmpar_status llmpar__cuda_tree_sum(llmpar_device *device, llmpar_stream *stream, const llmpar_tree_sum_args *args)
{
    llmpar__cuda_operands operands;
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_operands_of(device, "tree_sum", args, &operands);
    if (status) return status;
    if (args->dtype != LLMPAR_F32 && args->dtype != LLMPAR_F64 && args->dtype != LLMPAR_I64 && args->dtype != LLMPAR_U64)
        return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "tree_sum: dtype %s, expected f32, f64, i64 or u64", llmpar_dtype_name(args->dtype));
    if (!args->count) return LLMPAR_OK;
    if (args->n == 1) return args->out == args->in[0] ? LLMPAR_OK : device->copy(device, stream, args->out, args->in[0], args->count * llmpar_dtype_size(args->dtype));
    if (args->dtype == LLMPAR_F32) llmpar__cuda_tree_launch<float>(device, stream, args, operands);
    else if (args->dtype == LLMPAR_F64) llmpar__cuda_tree_launch<double>(device, stream, args, operands);
    else llmpar__cuda_tree_launch<uint64_t>(device, stream, args, operands); /* overflow wraps, signed or not */
    return llmpar__cuda_end(device, stream, "tree_sum");
}

static llmpar_status llmpar__cuda_max(llmpar_device *device, llmpar_stream *stream, const llmpar_max_args *args)
{
    llmpar__cuda_operands operands;
    int64_t count = (int64_t)args->count;
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_operands_of(device, "max", args, &operands);
    if (status) return status;
    if (args->dtype != LLMPAR_F32 && args->dtype != LLMPAR_F64 && args->dtype != LLMPAR_I64)
        return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "max: dtype %s, expected f32, f64 or i64", llmpar_dtype_name(args->dtype));
    if (!count) return LLMPAR_OK;
    dim3 blocks(llmpar__cuda_blocks(llmpar__cuda_of(device), count, 256, 8)), threads(256);
    if (args->dtype == LLMPAR_F32) llmpar__cuda_launch(device, stream, llmpar__cuda_max_kernel<float>, blocks, threads, 0, operands, args->n, (float *)args->out, count);
    else if (args->dtype == LLMPAR_F64) llmpar__cuda_launch(device, stream, llmpar__cuda_max_kernel<double>, blocks, threads, 0, operands, args->n, (double *)args->out, count);
    else llmpar__cuda_launch(device, stream, llmpar__cuda_max_kernel<int64_t>, blocks, threads, 0, operands, args->n, (int64_t *)args->out, count);
    return llmpar__cuda_end(device, stream, "max");
}

#undef LLMPAR__CUDA_TREE_MOST
