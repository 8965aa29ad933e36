/* intrinsics: what kernels ask of a warp and of the machine, as functions: PTX here, the same functions by tests/emulated_cuda/warp.h on the CPU (LLMPAR_CUDA_EMULATED).

   Fragments of mma.sync as in the PTX manual (section "Matrix multiply-accumulate operation using mma instruction", m16n8k16): with g = lane/4 and t = lane%4 a thread has
     a[0] row g, k 2t..2t+1;  a[1] row g+8, the same k;  a[2] row g, k 2t+8..2t+9;  a[3] row g+8, those k;   b[0] column g, k 2t..2t+1;  b[1] column g, k 2t+8..2t+9;
     d[0..1] row g, columns 2t..2t+1;  d[2..3] row g+8, the same columns.    The lower k is in the lower half of a register. */
#ifndef LLMPAR_CUDA_INTRINSICS_H
#define LLMPAR_CUDA_INTRINSICS_H

#ifdef LLMPAR_CUDA_EMULATED
#include <warp.h>
#else
#include <cuda_runtime.h>
#include <stdint.h>

/* `type *name` points to the block's dynamic shared memory, aligned to 128 bytes. In the body of a kernel. */
#define LLMPAR__CUDA_SHARED(type, name) extern __shared__ __align__(128) unsigned char llmpar__cuda_shared_bytes[]; type *name = (type *)(void *)llmpar__cuda_shared_bytes

/* d += a b, 16 x 8 x 16, f32 sums. */
static __device__ __forceinline__ void llmpar__cu_mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
static __device__ __forceinline__ void llmpar__cu_mma_f16(float d[4], const uint32_t a[4], const uint32_t b[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* Four 8 x 8 matrices of 16-bit elements from shared memory; lane 8i + r names the 16 bytes of row r of matrix i (16-byte aligned). Register i: row lane/4, columns 2(lane%4) and the next; trans: of the transposed matrix. */
static __device__ __forceinline__ void llmpar__cu_ldmatrix_x4(uint32_t out[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n" : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"((uint32_t)__cvta_generic_to_shared(row)) : "memory");
}
static __device__ __forceinline__ void llmpar__cu_ldmatrix_x4_trans(uint32_t out[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n" : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"((uint32_t)__cvta_generic_to_shared(row)) : "memory");
}

/* Copies `bytes` (0 .. 16) from global to shared memory in the background and fills up to 16 with zeros; both 16-byte aligned. bytes = 0 reads nothing. commit closes a group of copies, wait<n> waits until at most
   the last n groups of this thread are under way; what other threads copied needs a __syncthreads behind it. */
static __device__ __forceinline__ void llmpar__cu_copy_async(void *shared, const void *global, int bytes)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" : : "r"((uint32_t)__cvta_generic_to_shared(shared)), "l"(global), "r"(bytes) : "memory");
}
/* The same for 4 bytes, 4-byte aligned; bytes 0 or 4. */
static __device__ __forceinline__ void llmpar__cu_copy_async_4(void *shared, const void *global, int bytes)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" : : "r"((uint32_t)__cvta_generic_to_shared(shared)), "l"(global), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void llmpar__cu_copy_async_commit() { asm volatile("cp.async.commit_group;\n" : : : "memory"); }
template <int Groups> static __device__ __forceinline__ void llmpar__cu_copy_async_wait() { asm volatile("cp.async.wait_group %0;\n" : : "n"(Groups) : "memory"); }

/* To global memory at once, aligned to the bytes. Where a store of the elements one by one is near, the compiler may take that of a struct apart and join parts of the two: then a warp's 16 bytes a lane become four stores. */
static __device__ __forceinline__ void llmpar__cu_store_16(void *out, const uint32_t word[4])
{
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};\n" : : "l"(__cvta_generic_to_global(out)), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]) : "memory");
}
static __device__ __forceinline__ void llmpar__cu_store_8(void *out, uint32_t low, uint32_t high)
{
    asm volatile("st.global.v2.u32 [%0], {%1, %2};\n" : : "l"(__cvta_generic_to_global(out)), "r"(low), "r"(high) : "memory");
}

/* Two floats rounded to nearest even, `low` in the lower half. Hardware's NaN (0x7fff): for products inside kernels; what is stored for others goes through llmpar__cuda_store. */
static __device__ __forceinline__ uint32_t llmpar__cu_pack_bf16(float low, float high)
{
    uint32_t out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(out) : "f"(high), "f"(low));
    return out;
}
static __device__ __forceinline__ uint32_t llmpar__cu_pack_f16(float low, float high)
{
    uint32_t out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(out) : "f"(high), "f"(low));
    return out;
}
/* x: the compiler takes it for a new value each time, so what is computed from it inside a long loop is not kept in registers around it. */
static __device__ __forceinline__ int llmpar__cu_again(int x)
{
    asm volatile("" : "+r"(x));
    return x;
}
/* 2^x to about 2 ulp, subnormals to zero: for what stays inside a kernel. */
static __device__ __forceinline__ float llmpar__cu_exp2(float x)
{
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(out) : "f"(x));
    return out;
}

/* blockIdx.x, read anew wherever it is asked for: what follows from it need not stay in registers meanwhile. */
static __device__ __forceinline__ unsigned llmpar__cu_block()
{
    unsigned out;
    asm volatile("mov.u32 %0, %%ctaid.x;\n" : "=r"(out));
    return out;
}

/* The bits of base/dtype.h, NaNs included. */
static __device__ __forceinline__ float llmpar__cu_f16_to_f32(uint16_t bits)
{
    float out;
    asm("cvt.f32.f16 %0, %1;\n" : "=f"(out) : "h"(bits));
    return (bits & 0x7fffu) > 0x7c00u ? __uint_as_float(((uint32_t)bits & 0x8000u) << 16 | 0x7fc00000u | ((uint32_t)bits & 0x3ffu) << 13) : out;
}
static __device__ __forceinline__ uint16_t llmpar__cu_f32_to_f16(float x)
{
    uint16_t out;
    uint32_t u = __float_as_uint(x);
    asm("cvt.rn.f16.f32 %0, %1;\n" : "=h"(out) : "f"(x));
    return (u & 0x7fffffffu) > 0x7f800000u ? (uint16_t)((u >> 16 & 0x8000u) | 0x7e00u | (u >> 13 & 0x3ffu)) : out;
}
#endif

#endif
