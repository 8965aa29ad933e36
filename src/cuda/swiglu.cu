/* swiglu: h = gate * sigmoid(gate) * up (Shazeer 2020), forward and backward, element-wise: a thread takes 16 bytes of a row. */
#include "cuda/rows_internal.h"

/* 1/(1 + e^-g) from e = exp(-|g|) <= 1, so nothing overflows: g < 0 has e/(1 + e). */
static __device__ __forceinline__ float llmpar__cuda_sigmoid(float g)
{
    float e = llmpar__cuda_exp(g < 0.0f ? g : -g);
    return __fdiv_rn(g < 0.0f ? e : 1.0f, __fadd_rn(1.0f, e));
}

template <typename T> static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS) llmpar__cuda_swiglu_forward(llmpar_swiglu_args a, int wide)
{
    const int width = llmpar__cuda_vector<T>::count;
    const int64_t parts = (a.dim + width - 1) / width, total = a.rows * parts;
    for (int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; at < total; at += (int64_t)gridDim.x * blockDim.x) {
        const int64_t row = llmpar__cuda_divide(at, parts), i = (at - row * parts) * width, left = a.dim - i, in = row * a.ld_in + i;
        const llmpar__cuda_16 raw_gate = llmpar__cuda_read((const T *)a.gate + in, left, wide), raw_up = llmpar__cuda_read((const T *)a.up + in, left, wide);
        float g[width], u[width];
        llmpar__cuda_unpack<T>(g, raw_gate);
        llmpar__cuda_unpack<T>(u, raw_up);
#pragma unroll
        for (int k = 0; k < width; k++) u[k] = __fmul_rn(__fmul_rn(g[k], llmpar__cuda_sigmoid(g[k])), u[k]);
        llmpar__cuda_write((T *)a.h + row * a.ld_out + i, left, wide, llmpar__cuda_pack<T>(u));
    }
}

/* With s = sigmoid(g), silu = g s: dup = dh silu, dgate = dh up s (1 + g (1 - s)). */
template <typename T> static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS) llmpar__cuda_swiglu_gradient(llmpar_swiglu_backward_args a, int wide)
{
    const int width = llmpar__cuda_vector<T>::count;
    const int64_t parts = (a.dim + width - 1) / width, total = a.rows * parts;
    for (int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; at < total; at += (int64_t)gridDim.x * blockDim.x) {
        const int64_t row = llmpar__cuda_divide(at, parts), i = (at - row * parts) * width, left = a.dim - i, in = row * a.ld_in + i, out = row * a.ld_out + i;
        const llmpar__cuda_16 raw_gate = llmpar__cuda_read((const T *)a.gate + in, left, wide), raw_up = llmpar__cuda_read((const T *)a.up + in, left, wide), raw_dh = llmpar__cuda_read((const T *)a.dh + out, left, wide);
        float g[width], u[width], d[width];
        llmpar__cuda_unpack<T>(g, raw_gate);
        llmpar__cuda_unpack<T>(u, raw_up);
        llmpar__cuda_unpack<T>(d, raw_dh);
#pragma unroll
        for (int k = 0; k < width; k++) {
            const float s = llmpar__cuda_sigmoid(g[k]), silu = __fmul_rn(g[k], s), dh = d[k], up = u[k];
            u[k] = __fmul_rn(dh, silu);
            g[k] = __fmul_rn(__fmul_rn(dh, up), __fmul_rn(s, __fmaf_rn(g[k], __fsub_rn(1.0f, s), 1.0f)));
            d[k] = __fmul_rn(silu, up);
        }
        llmpar__cuda_write((T *)a.dup + in, left, wide, llmpar__cuda_pack<T>(u));
        llmpar__cuda_write((T *)a.dgate + in, left, wide, llmpar__cuda_pack<T>(g));
        if (a.h) llmpar__cuda_write((T *)a.h + out, left, wide, llmpar__cuda_pack<T>(d));
    }
}

template <typename T> static void llmpar__cuda_swiglu_run(llmpar_device *device, llmpar_stream *stream, const llmpar_swiglu_args *args)
{
    const int64_t in = args->ld_in * (int64_t)sizeof(T), out = args->ld_out * (int64_t)sizeof(T), width = llmpar__cuda_vector<T>::count;
    const int wide = llmpar__cuda_wide(args->gate, in) && llmpar__cuda_wide(args->up, in) && llmpar__cuda_wide(args->h, out);
    llmpar__cuda_launch(device, stream, llmpar__cuda_swiglu_forward<T>, dim3(llmpar__cuda_blocks(llmpar__cuda_of(device), args->rows * ((args->dim + width - 1) / width), LLMPAR__CUDA_ROW_THREADS, 4)), dim3(LLMPAR__CUDA_ROW_THREADS), 0, *args, wide);
}
template <typename T> static void llmpar__cuda_swiglu_run_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_swiglu_backward_args *args)
{
    const int64_t in = args->ld_in * (int64_t)sizeof(T), out = args->ld_out * (int64_t)sizeof(T), width = llmpar__cuda_vector<T>::count;
    const int wide = llmpar__cuda_wide(args->gate, in) && llmpar__cuda_wide(args->up, in) && llmpar__cuda_wide(args->dgate, in) && llmpar__cuda_wide(args->dup, in) && llmpar__cuda_wide(args->dh, out) && llmpar__cuda_wide(args->h, out);
    llmpar__cuda_launch(device, stream, llmpar__cuda_swiglu_gradient<T>, dim3(llmpar__cuda_blocks(llmpar__cuda_of(device), args->rows * ((args->dim + width - 1) / width), LLMPAR__CUDA_ROW_THREADS, 4)), dim3(LLMPAR__CUDA_ROW_THREADS), 0, *args, wide);
}

static llmpar_status llmpar__cuda_swiglu(llmpar_device *device, llmpar_stream *stream, const llmpar_swiglu_args *args)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "swiglu", args->dtype, 1);
    if (status || args->rows <= 0 || args->dim <= 0) return status;
    LLMPAR__CUDA_BY_DTYPE(args->dtype, llmpar__cuda_swiglu_run, device, stream, args);
    return llmpar__cuda_end(device, stream, "swiglu");
}

static llmpar_status llmpar__cuda_swiglu_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_swiglu_backward_args *args)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "swiglu_backward", args->dtype, 1);
    if (status || args->rows <= 0 || args->dim <= 0) return status;
    LLMPAR__CUDA_BY_DTYPE(args->dtype, llmpar__cuda_swiglu_run_backward, device, stream, args);
    return llmpar__cuda_end(device, stream, "swiglu_backward");
}
