/* exact_internal: the order-free, exact sum of base/exact_sum.h in a kernel: integers, so neither threads nor blocks have an order.

   A block keeps the 72 limbs in shared memory (llmpar__cuda_exact_begin .. _end) and adds to them with integer atomics; at its end they go to the accumulator in device memory, which
   llmpar__cuda_exact_carry normalises behind the kernel: the same limbs as the CPU leaves.

   Squares of floats. With the fraction f (24 bits) of a float of exponent e, x^2 = f^2 2^(2 e - 300), and shifting before squaring puts a range of exponents on one scale:
     F = f << (e - base), 0 <= e - base < 32:   F = high 2^28 + low (27 and 28 bits),   F^2 = low^2 + 2^29 low high + 2^56 high^2
   Each product is less than 2^56 and is added to a 64-bit register of its own, one multiply-add each; 256 of them fit. Then the warp adds its registers up and puts them into the limbs. A warp takes 256
   numbers at a time. One above the range moves it (a tensor's largest is soon found); those below it, zeros left out, are rare and are added in further rounds with lower ranges. */
#ifndef LLMPAR_CUDA_EXACT_INTERNAL_H
#define LLMPAR_CUDA_EXACT_INTERNAL_H

#include "cuda/launch.h"

#define LLMPAR__CUDA_WARP 0xffffffffu
enum { LLMPAR__CUDA_EXACT_INFINITY = 69, LLMPAR__CUDA_EXACT_NEGATIVE_INFINITY = 70, LLMPAR__CUDA_EXACT_NAN = 71, LLMPAR__CUDA_EXACT_NUMBER = 67 };
enum { LLMPAR__CUDA_EXACT_LANE = 8, LLMPAR__CUDA_EXACT_BATCH = 256 }; /* numbers that a lane and a warp take at a time */
enum { LLMPAR__CUDA_EXACT_BYTES = LLMPAR_EXACT_SUM_LIMBS * 8 }; /* shared memory of a block */

/* All threads of the block; at least one warp. */
static __device__ __forceinline__ void llmpar__cuda_exact_begin(unsigned long long *limbs)
{
    for (unsigned i = threadIdx.x; i < LLMPAR_EXACT_SUM_LIMBS; i += blockDim.x) limbs[i] = 0;
    __syncthreads();
}

static __device__ __forceinline__ void llmpar__cuda_exact_end(const unsigned long long *limbs, int64_t *accumulator)
{
    __syncthreads();
    for (unsigned i = threadIdx.x; i < LLMPAR_EXACT_SUM_LIMBS; i += blockDim.x)
        if (limbs[i]) atomicAdd((unsigned long long *)(void *)accumulator + i, limbs[i]);
}

/* limbs += value * 2^(position - 1088). */
static __device__ __forceinline__ void llmpar__cuda_exact_place(unsigned long long *limbs, unsigned long long value, int position)
{
    unsigned long long *limb = limbs + (position >> 5), low = (value & 0xffffffffu) << (position & 31), high = (value >> 32) << (position & 31);
    high += low >> 32;
    if (low & 0xffffffffu) atomicAdd(limb, low & 0xffffffffu);
    if (high & 0xffffffffu) atomicAdd(limb + 1, high & 0xffffffffu);
    if (high >> 32) atomicAdd(limb + 2, high >> 32);
}

static __device__ __forceinline__ long long llmpar__cuda_warp_sum(long long x)
{
#pragma unroll
    for (int k = 16; k; k /= 2) x += __shfl_xor_sync(LLMPAR__CUDA_WARP, x, k);
    return x;
}
static __device__ __forceinline__ int llmpar__cuda_warp_max(int x)
{
#pragma unroll
    for (int k = 16; k; k /= 2) {
        int other = __shfl_xor_sync(LLMPAR__CUDA_WARP, x, k);
        x = other > x ? other : x;
    }
    return x;
}

/* ---- squares ---- */

struct llmpar__cuda_squares {
    unsigned long long sum[3]; /* of low^2, low high, high^2 */
    int base, batches;         /* the range's least exponent, -32: none yet; batches since the limbs were last added to. The same in all lanes */
};

static __device__ __forceinline__ void llmpar__cuda_squares_begin(llmpar__cuda_squares *s)
{
    s->sum[0] = s->sum[1] = s->sum[2] = 0;
    s->base = -32;
    s->batches = 0;
}

/* F^2 of a fraction that is `shift` above its range's begin. */
static __device__ __forceinline__ void llmpar__cuda_squares_one(unsigned long long sum[3], uint32_t fraction, int shift)
{
    unsigned long long wide = (unsigned long long)fraction << (shift & 31);
    uint32_t low = (uint32_t)wide & 0xfffffffu, high = (uint32_t)(wide >> 28);
    sum[0] += (unsigned long long)low * low;
    sum[1] += (unsigned long long)low * high;
    sum[2] += (unsigned long long)high * high;
}

/* The warp's registers into the limbs: halves, whose sums over the warp fit, one a lane. */
static __device__ __forceinline__ void llmpar__cuda_squares_flush(unsigned long long *limbs, unsigned long long sum[3], int base)
{
    unsigned lane = threadIdx.x % 32;
    unsigned long long mine = 0;
    int position = 0;
#pragma unroll
    for (unsigned w = 0; w < 3; w++) {
        long long low = llmpar__cuda_warp_sum((long long)(sum[w] & 0xffffffffu)), high = llmpar__cuda_warp_sum((long long)(sum[w] >> 32));
        int at = 2 * base + 788 + (w == 0 ? 0 : w == 1 ? 29 : 56);
        if (lane == 2 * w || lane == 2 * w + 1) {
            mine = (unsigned long long)(lane & 1 ? high : low);
            position = lane & 1 ? at + 32 : at;
        }
        sum[w] = 0;
    }
    if (mine) llmpar__cuda_exact_place(limbs, mine, position);
}

static __device__ __forceinline__ void llmpar__cuda_squares_end(llmpar__cuda_squares *s, unsigned long long *limbs)
{
    if (s->batches) llmpar__cuda_squares_flush(limbs, s->sum, s->base);
}

/* What lies below the range, and infinities and NaNs. Rounds with lower and lower ranges, at most eight of them. */
static __device__ __forceinline__ void llmpar__cuda_squares_rest(unsigned long long *limbs, const uint32_t x[LLMPAR__CUDA_EXACT_LANE], int base)
{
    int above = base; /* exponents from here on are done; a subnormal has the exponent 1 and no hidden bit */
#pragma unroll
    for (int i = 0; i < LLMPAR__CUDA_EXACT_LANE; i++)
        if ((x[i] & 0x7f800000u) == 0x7f800000u) atomicAdd(limbs + ((x[i] & 0x007fffffu) ? LLMPAR__CUDA_EXACT_NAN : LLMPAR__CUDA_EXACT_INFINITY), 1ull);
    while (above > 1) {
        unsigned long long sum[3] = { 0, 0, 0 };
        int top = 0;
#pragma unroll
        for (int i = 0; i < LLMPAR__CUDA_EXACT_LANE; i++) {
            uint32_t bits = x[i] & 0x7fffffffu;
            int e = bits ? (bits >> 23 ? (int)(bits >> 23) : 1) : 0;
            if (e < above && e > top) top = e;
        }
        top = llmpar__cuda_warp_max(top);
        if (!top) return;
        int lower = top > 32 ? top - 31 : 1;
#pragma unroll
        for (int i = 0; i < LLMPAR__CUDA_EXACT_LANE; i++) {
            uint32_t bits = x[i] & 0x7fffffffu;
            int e = bits >> 23 ? (int)(bits >> 23) : 1, in = e < above && e >= lower;
            llmpar__cuda_squares_one(sum, in ? (bits & 0x007fffffu) | (bits >> 23 ? 0x00800000u : 0u) : 0u, e - lower);
        }
        llmpar__cuda_squares_flush(limbs, sum, lower);
        above = lower;
    }
}

/* Adds eight numbers a lane, as bits; zeros where there are fewer. All lanes of the warp. */
static __device__ __forceinline__ void llmpar__cuda_squares_add(llmpar__cuda_squares *s, unsigned long long *limbs, const uint32_t x[LLMPAR__CUDA_EXACT_LANE])
{
    uint32_t most = 0, least = 0xffffffffu;
#pragma unroll
    for (int i = 0; i < LLMPAR__CUDA_EXACT_LANE; i++) {
        uint32_t bits = x[i] & 0x7fffffffu;
        most = bits > most ? bits : most;
        least = bits - 1 < least ? bits - 1 : least; /* so that zero does not count */
    }
    int exponent = (int)(most >> 23) < 254 ? (int)(most >> 23) : 254;
    if (__any_sync(LLMPAR__CUDA_WARP, exponent > s->base + 31)) {
        int top = llmpar__cuda_warp_max(exponent) + 2; /* room for somewhat larger ones */
        if (s->batches) llmpar__cuda_squares_flush(limbs, s->sum, s->base);
        s->batches = 0;
        s->base = top < 33 ? 2 : (top < 254 ? top : 254) - 31; /* at least 2: subnormals are below every range */
    }
#pragma unroll
    for (int i = 0; i < LLMPAR__CUDA_EXACT_LANE; i++) {
        int shift = (int)(x[i] >> 23 & 0xffu) - s->base;
        llmpar__cuda_squares_one(s->sum, (unsigned)shift < 32u ? (x[i] & 0x007fffffu) | 0x00800000u : 0u, shift);
    }
    if (__any_sync(LLMPAR__CUDA_WARP, least < ((uint32_t)s->base << 23) - 1 || most >= 0x7f800000u)) llmpar__cuda_squares_rest(limbs, x, s->base);
    if (++s->batches < 256 / LLMPAR__CUDA_EXACT_LANE) return;
    llmpar__cuda_squares_flush(limbs, s->sum, s->base);
    s->batches = 0;
    s->base = -32; /* chosen anew, lower too */
}

/* ---- the accumulator in device memory ---- */

/* Limbs below the top one become [0, 2^32); the top one keeps the sign (llmpar_exact_sum_carry). One warp. */
__global__ void __launch_bounds__(32) llmpar__cuda_exact_carry_kernel(int64_t *accumulator)
{
    LLMPAR__CUDA_SHARED(int64_t, limbs);
    for (unsigned i = threadIdx.x; i < LLMPAR__CUDA_EXACT_NUMBER; i += 32) limbs[i] = accumulator[i];
    __syncthreads();
    if (threadIdx.x == 0)
        for (int i = 0; i < LLMPAR__CUDA_EXACT_NUMBER - 1; i++) {
            limbs[i + 1] += limbs[i] >> 32;
            limbs[i] &= 0xffffffff;
        }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < LLMPAR__CUDA_EXACT_NUMBER; i += 32) accumulator[i] = limbs[i];
}

static void llmpar__cuda_exact_carry(llmpar_device *device, llmpar_stream *stream, int64_t *accumulator)
{
    llmpar__cuda_launch(device, stream, llmpar__cuda_exact_carry_kernel, dim3(1), dim3(32), LLMPAR__CUDA_EXACT_BYTES, accumulator);
}

#endif
