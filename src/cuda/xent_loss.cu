/* xent_loss: the last step of the cross-entropy: f64 losses log(sum) + max - target_logit of the rows, one thread each, into the exact accumulator. The logarithm has the bits of llmpar_log_f64 (base/math.h):
   its own operations, none fused. */
#include "cuda/exact_internal.h"

/* llmpar_log_f64 of a float's value, which is never a subnormal double. x = 2^k (1 + f), 1 + f in [sqrt(1/2), sqrt(2)); with s = f / (2 + f), log (1 + f) = 2 atanh s. */
static __device__ __forceinline__ double llmpar__cuda_log_f64(double x)
{
    if (!(x > 0.0)) return __longlong_as_double(x == 0.0 ? (long long)0xfff0000000000000u : 0x7ff8000000000000);
    uint64_t bits = (uint64_t)__double_as_longlong(x), moved;
    if (bits >= 0x7ff0000000000000u) return x;
    moved = bits + (0x3ff0000000000000u - 0x3fe6a09e667f3bcdu);
    double f = __dadd_rn(__longlong_as_double((long long)((moved & 0x000fffffffffffffu) + 0x3fe6a09e667f3bcdu)), -1.0), k = (double)((int)(moved >> 52) - 1023);
    double s = __ddiv_rn(f, __dadd_rn(2.0, f)), z = __dmul_rn(s, s), square = __dmul_rn(__dmul_rn(0.5, f), f);
    double p = 0.13088034850927555;
    p = __dadd_rn(__dmul_rn(p, z), 0.13268638369266825);
    p = __dadd_rn(__dmul_rn(p, z), 0.15386244737621665);
    p = __dadd_rn(__dmul_rn(p, z), 0.18181795547521137);
    p = __dadd_rn(__dmul_rn(p, z), 0.22222222392581045);
    p = __dadd_rn(__dmul_rn(p, z), 0.28571428570799784);
    p = __dadd_rn(__dmul_rn(p, z), 0.40000000000000885);
    p = __dadd_rn(__dmul_rn(p, z), 0.66666666666666663);
    double tail = __dadd_rn(__dmul_rn(s, __dadd_rn(square, __dmul_rn(z, p))), __dmul_rn(k, 1.9082149292705877e-10));
    return __dadd_rn(__dmul_rn(k, 0.69314718036912382), __dadd_rn(f, -__dadd_rn(square, -tail)));
}

/* One double a lane (0: none) into the limbs. Lanes whose numbers begin in the same limb, most of the time all, add up first. All lanes of the warp. */
static __device__ __forceinline__ void llmpar__cuda_exact_add(unsigned long long *limbs, double value)
{
    uint64_t bits = (uint64_t)__double_as_longlong(value), fraction = bits & 0x000fffffffffffffu;
    int exponent = (int)(bits >> 52) & 0x7ff, negative = (int)(bits >> 63), limb = -1;
    long long piece[3] = { 0, 0, 0 };
    if (exponent == 0x7ff) {
        atomicAdd(limbs + (fraction ? LLMPAR__CUDA_EXACT_NAN : negative ? LLMPAR__CUDA_EXACT_NEGATIVE_INFINITY : LLMPAR__CUDA_EXACT_INFINITY), 1ull);
    } else if (exponent || fraction) {
        if (exponent) fraction |= 0x0010000000000000u;
        else exponent = 1;
        int shift = (exponent + 13) & 31;
        uint64_t low = (fraction & 0xffffffffu) << shift, high = ((fraction >> 32) << shift) + (low >> 32);
        limb = (exponent + 13) >> 5;
        piece[0] = (long long)(low & 0xffffffffu);
        piece[1] = (long long)(high & 0xffffffffu);
        piece[2] = (long long)(high >> 32);
    }
    for (;;) {
        int first = llmpar__cuda_warp_max(limb);
        if (first < 0) return;
#pragma unroll
        for (int k = 0; k < 3; k++) {
            long long sum = llmpar__cuda_warp_sum(limb == first ? (negative ? -piece[k] : piece[k]) : 0);
            if (threadIdx.x % 32 == 0 && sum) atomicAdd(limbs + first + k, (unsigned long long)sum);
        }
        if (limb == first) limb = -1;
    }
}

__global__ void __launch_bounds__(128) llmpar__cuda_xent_loss_kernel(const float *most, const float *target_logit, const float *sum, const int32_t *targets, int64_t rows, int64_t *accumulator, double *token_loss)
{
    LLMPAR__CUDA_SHARED(unsigned long long, limbs);
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    llmpar__cuda_exact_begin(limbs);
    for (int64_t begin = (int64_t)blockIdx.x * blockDim.x + threadIdx.x / 32 * 32; begin < rows; begin += step) {
        int64_t row = begin + threadIdx.x % 32;
        double loss = 0;
        if (row < rows && targets[row] >= 0) loss = __dadd_rn(__dadd_rn(llmpar__cuda_log_f64((double)sum[row]), (double)most[row]), -(double)target_logit[row]);
        if (row < rows && token_loss) token_loss[row] = loss;
        llmpar__cuda_exact_add(limbs, loss);
    }
    llmpar__cuda_exact_end(limbs, accumulator);
}

static llmpar_status llmpar__cuda_xent_loss(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_loss_args *args)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "xent_loss", args->dtype, 1);
    if (status || args->rows <= 0) return status;
    unsigned blocks = llmpar__cuda_blocks(llmpar__cuda_of(device), args->rows, 128, 4);
    llmpar__cuda_launch(device, stream, llmpar__cuda_xent_loss_kernel, dim3(blocks), dim3(128), LLMPAR__CUDA_EXACT_BYTES, (const float *)args->max, (const float *)args->target_logit, (const float *)args->sum, args->targets, args->rows,
                        args->accumulator, args->token_loss);
    llmpar__cuda_exact_carry(device, stream, args->accumulator);
    return llmpar__cuda_end(device, stream, "xent_loss");
}
