/* squares: the order-free, exact sum of squares that gradient norms and AdaLomo need, at the speed of memory: see exact_internal.h for how a warp adds 256 of them. */
#include "cuda/exact_internal.h"

/* aligned: x is, to 16 bytes. Which lane takes which element does not show. */
__global__ void __launch_bounds__(256, 4) llmpar__cuda_square_sum_kernel(const uint32_t *x, int64_t count, int64_t *accumulator, int aligned)
{
    LLMPAR__CUDA_SHARED(unsigned long long, limbs);
    int64_t warps = (int64_t)gridDim.x * (blockDim.x / 32), lane = threadIdx.x % 32;
    llmpar__cuda_squares squares;
    llmpar__cuda_exact_begin(limbs);
    llmpar__cuda_squares_begin(&squares);
    for (int64_t at = ((int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * LLMPAR__CUDA_EXACT_BATCH; at < count; at += warps * LLMPAR__CUDA_EXACT_BATCH) {
        uint32_t bits[LLMPAR__CUDA_EXACT_LANE];
        if (aligned && at + LLMPAR__CUDA_EXACT_BATCH <= count) {
#pragma unroll
            for (int k = 0; k < LLMPAR__CUDA_EXACT_LANE / 4; k++) {
                llmpar__cuda_16 four = ((const llmpar__cuda_16 *)(const void *)(x + at))[k * 32 + lane];
#pragma unroll
                for (int i = 0; i < 4; i++) bits[4 * k + i] = four.word[i];
            }
        } else {
#pragma unroll
            for (int k = 0; k < LLMPAR__CUDA_EXACT_LANE; k++) bits[k] = at + k * 32 + lane < count ? x[at + k * 32 + lane] : 0;
        }
        llmpar__cuda_squares_add(&squares, limbs, bits);
    }
    llmpar__cuda_squares_end(&squares, limbs);
    llmpar__cuda_exact_end(limbs, accumulator);
}

static llmpar_status llmpar__cuda_square_sum(llmpar_device *device, llmpar_stream *stream, const llmpar_square_sum_args *args)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "square_sum", args->dtype, 0);
    if (status || !args->count) return status;
    int64_t count = (int64_t)args->count;
    unsigned blocks = llmpar__cuda_blocks(llmpar__cuda_of(device), (count + 7) / 8, 256, 1);
    llmpar__cuda_launch(device, stream, llmpar__cuda_square_sum_kernel, dim3(blocks), dim3(256), LLMPAR__CUDA_EXACT_BYTES, (const uint32_t *)args->x, count, args->accumulator, ((uintptr_t)args->x & 15) == 0);
    llmpar__cuda_exact_carry(device, stream, args->accumulator);
    return llmpar__cuda_end(device, stream, "square_sum");
}
