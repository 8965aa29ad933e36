/* rope: rotary position embedding in place (Su et al. 2021), half-split order: (a, b) = (x[i], x[i + E/2]) becomes (a cos - b sin, b cos + a sin); the inverse has -sin.
   A thread takes 16 bytes of a head's first half and the 16 bytes of its second half that they turn with; where halves are no multiple of that, or memory is not aligned, less, or one by one. */
#include "cuda/rows_internal.h"

template <typename T> static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS) llmpar__cuda_rope_rotate(llmpar_rope_args a, int wide)
{
    const int width = llmpar__cuda_vector<T>::count;
    const int64_t half = a.head_dim / 2, parts = (half + width - 1) / width, total = a.batch * a.t * a.heads * parts;
    const float direction = a.inverse ? -1.0f : 1.0f;
    for (int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; at < total; at += (int64_t)gridDim.x * blockDim.x) {
        const int64_t head_row = llmpar__cuda_divide(at, parts), i = (at - head_row * parts) * width, row = llmpar__cuda_divide(head_row, a.heads), head = head_row - row * a.heads;
        const int64_t position = a.position + row - llmpar__cuda_divide(row, a.t) * a.t, left = half - i;
        const float *cosine = (const float *)a.cosine + position * half + i, *sine = (const float *)a.sine + position * half + i;
        T *x = (T *)a.x + row * a.ld + head * a.head_dim + i;
        float u[width], v[width], c[width], s[width];
        llmpar__cuda_unpack<T>(u, llmpar__cuda_read(x, left, wide));
        llmpar__cuda_unpack<T>(v, llmpar__cuda_read(x + half, left, wide));
#pragma unroll
        for (int k = 0; k < width; k += 4) {
            llmpar__cuda_unpack<float>(c + k, llmpar__cuda_read(cosine + k, left - k, wide));
            llmpar__cuda_unpack<float>(s + k, llmpar__cuda_read(sine + k, left - k, wide));
        }
#pragma unroll
        for (int k = 0; k < width; k++) {
            const float first = u[k], second = v[k], turn = __fmul_rn(s[k], direction);
            u[k] = __fmaf_rn(first, c[k], -__fmul_rn(second, turn));
            v[k] = __fmaf_rn(second, c[k], __fmul_rn(first, turn));
        }
        llmpar__cuda_write(x, left, wide, llmpar__cuda_pack<T>(u));
        llmpar__cuda_write(x + half, left, wide, llmpar__cuda_pack<T>(v));
    }
}

template <typename T> static void llmpar__cuda_rope_run(llmpar_device *device, llmpar_stream *stream, const llmpar_rope_args *args)
{
    const int64_t size = (int64_t)sizeof(T), half = args->head_dim / 2, width = llmpar__cuda_vector<T>::count;
    const int wide = llmpar__cuda_wide(args->x, args->ld * size) && half * size % 16 == 0 && llmpar__cuda_wide(args->cosine, half * 4) && llmpar__cuda_wide(args->sine, half * 4);
    const int64_t total = args->batch * args->t * args->heads * ((half + width - 1) / width);
    llmpar__cuda_launch(device, stream, llmpar__cuda_rope_rotate<T>, dim3(llmpar__cuda_blocks(llmpar__cuda_of(device), total, LLMPAR__CUDA_ROW_THREADS, 4)), dim3(LLMPAR__CUDA_ROW_THREADS), 0, *args, wide);
}

static llmpar_status llmpar__cuda_rope(llmpar_device *device, llmpar_stream *stream, const llmpar_rope_args *args)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "rope", args->dtype, 1);
    if (status || args->batch <= 0 || args->t <= 0 || args->heads <= 0 || args->head_dim <= 0) return status;
    if (args->head_dim % 2) return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "rope: head_dim %lld, expected an even number", (long long)args->head_dim);
    LLMPAR__CUDA_BY_DTYPE(args->dtype, llmpar__cuda_rope_run, device, stream, args);
    return llmpar__cuda_end(device, stream, "rope");
}
