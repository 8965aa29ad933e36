/* cast: out[i] = in[i] in another type, with the bits of llmpar_convert (base/dtype.h), NaNs included: what moves between the host and the device must not show where it was rounded.

   A thread takes four elements and four a block further on, where both pointers are 16-byte aligned, and one at a time where they are not and at the end: so neighbours' bytes touch, of the narrow type and of the wide one. Narrowing from f64 goes through f32 bits
   rounded to odd, whose second rounding gives what one rounding from f64 gives (Boldo & Melquiond 2008). */
#include "cuda/launch.h"

/* ---- one element ---- */

/* f32 bits; a bf16 NaN becomes quiet, as in llmpar_bf16_to_f32. */
static __device__ __forceinline__ uint32_t llmpar__cuda_cast_bits(float x) { return __float_as_uint(x); }
static __device__ __forceinline__ uint32_t llmpar__cuda_cast_bits(llmpar__cuda_bf16 x)
{
    uint32_t bits = (uint32_t)x.bits << 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x00400000u : bits;
}
static __device__ __forceinline__ uint32_t llmpar__cuda_cast_bits(llmpar__cuda_f16 x) { return __float_as_uint(llmpar__cu_f16_to_f32(x.bits)); }

/* f64 as f32 bits rounded to odd: of the two neighbours the one whose last bit is 1, unless exact. */
static __device__ __forceinline__ uint32_t llmpar__cuda_cast_bits(double x)
{
    uint64_t bits = (uint64_t)__double_as_longlong(x), magnitude = bits & 0x7fffffffffffffffu, fraction;
    uint32_t sign = (uint32_t)(bits >> 32) & 0x80000000u;
    if (magnitude > 0x7ff0000000000000u) return sign | 0x7fc00000u | ((uint32_t)(magnitude >> 29) & 0x003fffffu);
    if (magnitude == 0x7ff0000000000000u) return sign | 0x7f800000u;
    if (magnitude >= 0x47f0000000000000u) return sign | 0x7f7fffffu; /* 2^128 and up: the largest float is odd */
    if (magnitude >= 0x3810000000000000u) return sign | (uint32_t)((magnitude - 0x3800000000000000u) >> 29) | (uint32_t)((magnitude & 0x1fffffffu) != 0);
    if (magnitude < 0x3690000000000000u) return sign | (uint32_t)(magnitude != 0); /* below 2^-150 */
    int shift = 926 - (int)(magnitude >> 52); /* to units of 2^-149 */
    fraction = (magnitude & 0x000fffffffffffffu) | 0x0010000000000000u;
    return sign | (uint32_t)(fraction >> shift) | (uint32_t)((fraction & (((uint64_t)1 << shift) - 1)) != 0);
}

/* Hardware's conversions between f32 and f64 lose a NaN's bits: these keep its sign and leading ones, as the CPU's. */
static __device__ __forceinline__ double llmpar__cuda_cast_widen(uint32_t bits)
{
    if ((bits & 0x7fffffffu) <= 0x7f800000u) return (double)__uint_as_float(bits);
    return __longlong_as_double((long long)((uint64_t)(bits & 0x80000000u) << 32 | 0x7ff8000000000000u | (uint64_t)(bits & 0x003fffffu) << 29));
}

template <typename Out, typename In> static __device__ __forceinline__ void llmpar__cuda_cast_one(Out *out, In x) { llmpar__cuda_store(out, __uint_as_float(llmpar__cuda_cast_bits(x))); }
template <typename In> static __device__ __forceinline__ void llmpar__cuda_cast_one(double *out, In x) { *out = llmpar__cuda_cast_widen(llmpar__cuda_cast_bits(x)); }
static __device__ __forceinline__ void llmpar__cuda_cast_one(float *out, double x)
{
    uint64_t magnitude = (uint64_t)__double_as_longlong(x) & 0x7fffffffffffffffu;
    *out = magnitude > 0x7ff0000000000000u ? __uint_as_float(llmpar__cuda_cast_bits(x)) : (float)x;
}

/* ---- the kernel ---- */

/* groups: of four elements; 0 where a pointer is not aligned. */
template <typename In, typename Out> __global__ void __launch_bounds__(256) llmpar__cuda_cast_kernel(Out *out, const In *in, int64_t count, int64_t groups)
{
    int64_t first = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = first + (int64_t)blockIdx.x * blockDim.x; i < groups; i += 2 * step) {
        llmpar__cuda_four<In> from[2];
        llmpar__cuda_four<Out> to;
#pragma unroll
        for (int j = 0; j < 2; j++)
            if (i + j * blockDim.x < groups) from[j] = ((const llmpar__cuda_four<In> *)(const void *)in)[i + j * blockDim.x];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            if (i + j * blockDim.x >= groups) continue;
#pragma unroll
            for (int k = 0; k < 4; k++) llmpar__cuda_cast_one(&to.x[k], from[j].x[k]);
            ((llmpar__cuda_four<Out> *)(void *)out)[i + j * blockDim.x] = to;
        }
    }
    for (int64_t i = 4 * groups + first; i < count; i += step) llmpar__cuda_cast_one(out + i, in[i]);
}

/* The null pointers name the types. */
template <typename In, typename Out> static llmpar_status llmpar__cuda_cast_launch(llmpar_device *device, llmpar_stream *stream, const llmpar_cast_args *args, const In *, const Out *)
{
    int64_t count = (int64_t)args->count, groups = (((uintptr_t)args->in | (uintptr_t)args->out) & 15) ? 0 : count / 4;
    unsigned blocks = llmpar__cuda_blocks(llmpar__cuda_of(device), groups ? (count + 7) / 8 : count, 256, 8);
    llmpar__cuda_launch(device, stream, llmpar__cuda_cast_kernel<In, Out>, dim3(blocks), dim3(256), 0, (Out *)args->out, (const In *)args->in, count, groups);
    return llmpar__cuda_end(device, stream, "cast");
}
/* One type: a copy, which is no kernel. */
template <typename T> static llmpar_status llmpar__cuda_cast_launch(llmpar_device *device, llmpar_stream *stream, const llmpar_cast_args *args, const T *, const T *)
{
    return args->out == args->in ? LLMPAR_OK : device->copy(device, stream, args->out, args->in, args->count * sizeof(T));
}

template <typename In> static llmpar_status llmpar__cuda_cast_from(llmpar_device *device, llmpar_stream *stream, const llmpar_cast_args *args, const In *in)
{
    if (args->out_dtype == LLMPAR_F32) return llmpar__cuda_cast_launch(device, stream, args, in, (const float *)NULL);
    if (args->out_dtype == LLMPAR_BF16) return llmpar__cuda_cast_launch(device, stream, args, in, (const llmpar__cuda_bf16 *)NULL);
    if (args->out_dtype == LLMPAR_F16) return llmpar__cuda_cast_launch(device, stream, args, in, (const llmpar__cuda_f16 *)NULL);
    return llmpar__cuda_cast_launch(device, stream, args, in, (const double *)NULL);
}

static int llmpar__cuda_cast_floating(llmpar_dtype dtype) { return dtype == LLMPAR_F32 || dtype == LLMPAR_F64 || dtype == LLMPAR_BF16 || dtype == LLMPAR_F16; }

static llmpar_status llmpar__cuda_cast(llmpar_device *device, llmpar_stream *stream, const llmpar_cast_args *args)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (status) return status;
    if (!llmpar__cuda_cast_floating(args->in_dtype) || !llmpar__cuda_cast_floating(args->out_dtype))
        return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "cast: from %s to %s, expected floating types", llmpar_dtype_name(args->in_dtype), llmpar_dtype_name(args->out_dtype));
    if (!args->count) return LLMPAR_OK;
    if (args->in_dtype == LLMPAR_F32) return llmpar__cuda_cast_from(device, stream, args, (const float *)NULL);
    if (args->in_dtype == LLMPAR_BF16) return llmpar__cuda_cast_from(device, stream, args, (const llmpar__cuda_bf16 *)NULL);
    if (args->in_dtype == LLMPAR_F16) return llmpar__cuda_cast_from(device, stream, args, (const llmpar__cuda_f16 *)NULL);
    return llmpar__cuda_cast_from(device, stream, args, (const double *)NULL);
}
