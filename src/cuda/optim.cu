/* optim: AdamW (Loshchilov & Hutter 2019), SGD and the largest absolute value, element by element, with the bits of the CPU device: an optimizer step may run on the host (offload) and must not show it.

     g' = g * grad_scale
     m  = fma(beta1, m, (1 - beta1) * g')
     v  = fma(beta2, v, ((1 - beta2) * g') * g')
     p  = fma(-lr, (m / c1) / (sqrt(v / c2) + eps), p * (1 - lr * decay))
   and for SGD
     g' = g * grad_scale, no larger than limit;  m = fma(momentum, m, g');  p = fma(-lr, m, p * (1 - lr * decay))
   The scalars are computed in f64 and rounded once; square root and division are IEEE's. Every operation is one of the _rn family, which a compiler neither fuses nor replaces.

   Callers hold parameters, gradients and moments in flat buffers (fsdp/flat.c), so one call is one launch for many tensors. A thread takes four elements of each buffer, 16 bytes, where all are 16-byte aligned. */
#include "cuda/launch.h"

/* 1 - a * b in two roundings: the host's compiler may have fused multiply-adds. */
static double llmpar__cuda_rest_of_product(double a, double b)
{
    volatile double product = a * b;
    return 1 - product;
}

struct llmpar__cuda_adamw_scalars { float scale, beta1, beta2, rest1, rest2, c1, c2, eps, keep, minus_lr; };

static __device__ __forceinline__ void llmpar__cuda_adamw_one(const llmpar__cuda_adamw_scalars &s, float *p, float g, float *m, float *v)
{
    g = __fmul_rn(g, s.scale);
    float m1 = __fmaf_rn(s.beta1, *m, __fmul_rn(s.rest1, g));
    float v1 = __fmaf_rn(s.beta2, *v, __fmul_rn(__fmul_rn(s.rest2, g), g));
    float step = __fdiv_rn(__fdiv_rn(m1, s.c1), __fadd_rn(__fsqrt_rn(__fdiv_rn(v1, s.c2)), s.eps));
    *m = m1;
    *v = v1;
    *p = __fmaf_rn(s.minus_lr, step, __fmul_rn(*p, s.keep));
}

__global__ void __launch_bounds__(256) llmpar__cuda_adamw_kernel(const llmpar__cuda_adamw_scalars s, float *p, const float *g, float *m, float *v, int64_t count, int64_t groups)
{
    int64_t first = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = first; i < groups; i += step) {
        llmpar__cuda_four<float> p4 = ((const llmpar__cuda_four<float> *)(const void *)p)[i], g4 = ((const llmpar__cuda_four<float> *)(const void *)g)[i];
        llmpar__cuda_four<float> m4 = ((const llmpar__cuda_four<float> *)(const void *)m)[i], v4 = ((const llmpar__cuda_four<float> *)(const void *)v)[i];
#pragma unroll
        for (int k = 0; k < 4; k++) llmpar__cuda_adamw_one(s, &p4.x[k], g4.x[k], &m4.x[k], &v4.x[k]);
        ((llmpar__cuda_four<float> *)(void *)p)[i] = p4;
        ((llmpar__cuda_four<float> *)(void *)m)[i] = m4;
        ((llmpar__cuda_four<float> *)(void *)v)[i] = v4;
    }
    for (int64_t i = 4 * groups + first; i < count; i += step) llmpar__cuda_adamw_one(s, p + i, g[i], m + i, v + i);
}

static llmpar_status llmpar__cuda_adamw(llmpar_device *device, llmpar_stream *stream, const llmpar_adamw_args *a)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "adamw", a->dtype, 0);
    if (status || !a->count) return status;
    llmpar__cuda_adamw_scalars s;
    s.scale = (float)a->grad_scale;
    s.beta1 = (float)a->beta1;
    s.beta2 = (float)a->beta2;
    s.rest1 = (float)(1 - a->beta1);
    s.rest2 = (float)(1 - a->beta2);
    s.c1 = (float)a->correction1;
    s.c2 = (float)a->correction2;
    s.eps = (float)a->eps;
    s.keep = (float)llmpar__cuda_rest_of_product(a->lr, a->decay);
    s.minus_lr = (float)-a->lr;
    int64_t count = (int64_t)a->count, groups = (((uintptr_t)a->p | (uintptr_t)a->g | (uintptr_t)a->m | (uintptr_t)a->v) & 15) ? 0 : count / 4;
    unsigned blocks = llmpar__cuda_blocks(llmpar__cuda_of(device), groups ? (count + 3) / 4 : count, 256, 8);
    llmpar__cuda_launch(device, stream, llmpar__cuda_adamw_kernel, dim3(blocks), dim3(256), 0, s, (float *)a->p, (const float *)a->g, (float *)a->m, (float *)a->v, count, groups);
    return llmpar__cuda_end(device, stream, "adamw");
}

/* ---- SGD ---- */

struct llmpar__cuda_sgd_scalars { float scale, momentum, limit, keep, minus_lr; int cut; };

/* m: NULL without momentum. The comparisons let a NaN through. */
static __device__ __forceinline__ void llmpar__cuda_sgd_one(const llmpar__cuda_sgd_scalars &s, float *p, float g, float *m)
{
    g = __fmul_rn(g, s.scale);
    if (s.cut) {
        g = s.limit < g ? s.limit : g;
        g = g < -s.limit ? -s.limit : g;
    }
    if (m) *m = g = __fmaf_rn(s.momentum, *m, g);
    *p = __fmaf_rn(s.minus_lr, g, __fmul_rn(*p, s.keep));
}

__global__ void __launch_bounds__(256) llmpar__cuda_sgd_kernel(const llmpar__cuda_sgd_scalars s, float *p, const float *g, float *m, int64_t count, int64_t groups)
{
    int64_t first = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = first; i < groups; i += step) {
        llmpar__cuda_four<float> p4 = ((const llmpar__cuda_four<float> *)(const void *)p)[i], g4 = ((const llmpar__cuda_four<float> *)(const void *)g)[i], m4 = g4;
        if (m) m4 = ((const llmpar__cuda_four<float> *)(const void *)m)[i];
#pragma unroll
        for (int k = 0; k < 4; k++) llmpar__cuda_sgd_one(s, &p4.x[k], g4.x[k], m ? &m4.x[k] : NULL);
        ((llmpar__cuda_four<float> *)(void *)p)[i] = p4;
        if (m) ((llmpar__cuda_four<float> *)(void *)m)[i] = m4;
    }
    for (int64_t i = 4 * groups + first; i < count; i += step) llmpar__cuda_sgd_one(s, p + i, g[i], m ? m + i : NULL);
}

static llmpar_status llmpar__cuda_sgd(llmpar_device *device, llmpar_stream *stream, const llmpar_sgd_args *a)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "sgd", a->dtype, 0);
    if (status || !a->count) return status;
    llmpar__cuda_sgd_scalars s;
    s.scale = (float)a->grad_scale;
    s.momentum = (float)a->momentum;
    s.limit = (float)a->limit;
    s.cut = a->limit > 0;
    s.keep = (float)llmpar__cuda_rest_of_product(a->lr, a->decay);
    s.minus_lr = (float)-a->lr;
    int64_t count = (int64_t)a->count, groups = (((uintptr_t)a->p | (uintptr_t)a->g | (uintptr_t)a->m) & 15) ? 0 : count / 4;
    unsigned blocks = llmpar__cuda_blocks(llmpar__cuda_of(device), groups ? (count + 3) / 4 : count, 256, 8);
    llmpar__cuda_launch(device, stream, llmpar__cuda_sgd_kernel, dim3(blocks), dim3(256), 0, s, (float *)a->p, (const float *)a->g, (float *)a->m, count, groups);
    return llmpar__cuda_end(device, stream, "sgd");
}

/* ---- the largest ---- */

/* As integers the absolute values are in order, infinity above all numbers and NaN above infinity; a largest one has no order of arrival. One exchange a block. */
__global__ void __launch_bounds__(256) llmpar__cuda_largest_kernel(const float *x, int64_t count, unsigned long long *largest)
{
    LLMPAR__CUDA_SHARED(unsigned, part);
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    unsigned most = 0;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        unsigned bits = __float_as_uint(x[i]) & 0x7fffffffu;
        most = bits > most ? bits : most;
    }
    for (int k = 16; k; k /= 2) {
        unsigned other = __shfl_xor_sync(0xffffffffu, most, k);
        most = other > most ? other : most;
    }
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = most;
    __syncthreads();
    if (threadIdx.x) return;
    for (unsigned k = 1; k < blockDim.x / 32; k++) most = part[k] > most ? part[k] : most;
    double value = (double)__uint_as_float(most);
    unsigned long long bits = (unsigned long long)__double_as_longlong(value), seen = *(volatile unsigned long long *)largest;
    for (;;) {
        double old = __longlong_as_double((long long)seen);
        if (old >= value || old != old) return;
        unsigned long long before = atomicCAS(largest, seen, bits);
        if (before == seen) return;
        seen = before;
    }
}

static llmpar_status llmpar__cuda_largest(llmpar_device *device, llmpar_stream *stream, const llmpar_largest_args *args)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "largest", args->dtype, 0);
    if (status || !args->count) return status;
    int64_t count = (int64_t)args->count;
    unsigned blocks = llmpar__cuda_blocks(llmpar__cuda_of(device), (count + 3) / 4, 256, 1);
    llmpar__cuda_launch(device, stream, llmpar__cuda_largest_kernel, dim3(blocks), dim3(256), 8 * sizeof(unsigned), (const float *)args->x, count, (unsigned long long *)(void *)args->largest);
    return llmpar__cuda_end(device, stream, "largest");
}
