/* elementwise: add, scale, copy_rows. A thread takes 16 bytes; nothing depends on more than one position. */
#include "cuda/rows_internal.h"

template <typename T> static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS) llmpar__cuda_add_kernel(const T *a, const T *b, T *out, int64_t count, int wide)
{
    const int width = llmpar__cuda_vector<T>::count;
    for (int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * width; i < count; i += (int64_t)gridDim.x * blockDim.x * width) {
        const llmpar__cuda_16 raw_a = llmpar__cuda_read(a + i, count - i, wide), raw_b = llmpar__cuda_read(b + i, count - i, wide);
        float u[width], v[width];
        llmpar__cuda_unpack<T>(u, raw_a);
        llmpar__cuda_unpack<T>(v, raw_b);
#pragma unroll
        for (int k = 0; k < width; k++) u[k] = __fadd_rn(u[k], v[k]);
        llmpar__cuda_write(out + i, count - i, wide, llmpar__cuda_pack<T>(u));
    }
}

template <typename T> static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS) llmpar__cuda_scale_kernel(T *x, float factor, int64_t count, int wide)
{
    const int width = llmpar__cuda_vector<T>::count;
    for (int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * width; i < count; i += (int64_t)gridDim.x * blockDim.x * width) {
        float v[width];
        llmpar__cuda_unpack<T>(v, llmpar__cuda_read(x + i, count - i, wide));
#pragma unroll
        for (int k = 0; k < width; k++) v[k] = __fmul_rn(v[k], factor);
        llmpar__cuda_write(x + i, count - i, wide, llmpar__cuda_pack<T>(v));
    }
}

/* In units of U: the widest that base addresses, strides and width are multiples of. */
template <typename U> static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS) llmpar__cuda_copy_rows_kernel(U *out, const U *in, int64_t rows, int64_t width, int64_t ld_out, int64_t ld_in)
{
    const int64_t total = rows * width;
    for (int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; at < total; at += (int64_t)gridDim.x * blockDim.x) {
        const int64_t row = llmpar__cuda_divide(at, width), i = at - row * width;
        out[row * ld_out + i] = in[row * ld_in + i];
    }
}

template <typename T> static void llmpar__cuda_add_run(llmpar_device *device, llmpar_stream *stream, const llmpar_add_args *args)
{
    const int64_t count = (int64_t)args->count, width = llmpar__cuda_vector<T>::count;
    const int wide = llmpar__cuda_wide(args->a, 0) && llmpar__cuda_wide(args->b, 0) && llmpar__cuda_wide(args->out, 0);
    llmpar__cuda_launch(device, stream, llmpar__cuda_add_kernel<T>, dim3(llmpar__cuda_blocks(llmpar__cuda_of(device), (count + width - 1) / width, LLMPAR__CUDA_ROW_THREADS, 4)), dim3(LLMPAR__CUDA_ROW_THREADS), 0, (const T *)args->a, (const T *)args->b, (T *)args->out, count, wide);
}

static llmpar_status llmpar__cuda_add(llmpar_device *device, llmpar_stream *stream, const llmpar_add_args *args)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "add", args->dtype, 1);
    if (status || !args->count) return status;
    LLMPAR__CUDA_BY_DTYPE(args->dtype, llmpar__cuda_add_run, device, stream, args);
    return llmpar__cuda_end(device, stream, "add");
}

template <typename T> static void llmpar__cuda_scale_run(llmpar_device *device, llmpar_stream *stream, const llmpar_scale_args *args)
{
    const int64_t count = (int64_t)args->count, width = llmpar__cuda_vector<T>::count;
    llmpar__cuda_launch(device, stream, llmpar__cuda_scale_kernel<T>, dim3(llmpar__cuda_blocks(llmpar__cuda_of(device), (count + width - 1) / width, LLMPAR__CUDA_ROW_THREADS, 4)), dim3(LLMPAR__CUDA_ROW_THREADS), 0, (T *)args->x, (float)args->factor, count, llmpar__cuda_wide(args->x, 0));
}

static llmpar_status llmpar__cuda_scale(llmpar_device *device, llmpar_stream *stream, const llmpar_scale_args *args)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "scale", args->dtype, 1);
    if (status || !args->count) return status;
    LLMPAR__CUDA_BY_DTYPE(args->dtype, llmpar__cuda_scale_run, device, stream, args);
    return llmpar__cuda_end(device, stream, "scale");
}

template <typename U> static void llmpar__cuda_copy_rows_run(llmpar_device *device, llmpar_stream *stream, const llmpar_copy_rows_args *args)
{
    const int64_t size = (int64_t)args->size, unit = (int64_t)sizeof(U), width = args->width * size / unit;
    llmpar__cuda_launch(device, stream, llmpar__cuda_copy_rows_kernel<U>, dim3(llmpar__cuda_blocks(llmpar__cuda_of(device), args->rows * width, LLMPAR__CUDA_ROW_THREADS, 4)), dim3(LLMPAR__CUDA_ROW_THREADS), 0, (U *)args->out, (const U *)args->in, args->rows, width,
                        args->ld_out * size / unit, args->ld_in * size / unit);
}

static llmpar_status llmpar__cuda_copy_rows(llmpar_device *device, llmpar_stream *stream, const llmpar_copy_rows_args *args)
{
    const uint64_t size = args->size, places = (uint64_t)(uintptr_t)args->in | (uint64_t)(uintptr_t)args->out | (uint64_t)args->width * size | (uint64_t)args->ld_in * size | (uint64_t)args->ld_out * size;
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (status || args->rows <= 0 || args->width <= 0 || !args->size) return status;
    if (places % 16 == 0) llmpar__cuda_copy_rows_run<llmpar__cuda_16>(device, stream, args);
    else if (places % 4 == 0) llmpar__cuda_copy_rows_run<uint32_t>(device, stream, args);
    else if (places % 2 == 0) llmpar__cuda_copy_rows_run<uint16_t>(device, stream, args);
    else llmpar__cuda_copy_rows_run<uint8_t>(device, stream, args);
    return llmpar__cuda_end(device, stream, "copy_rows");
}
