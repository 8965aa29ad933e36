/* GENERATED from src/: edit there, then run make gen */
#ifndef LLMPAR__TEMPLATE
/*
llmpar_cuda.h - the CUDA device for llmpar

DO THIS

    In ONE .cu file:

        #define LLMPAR_CUDA_IMPLEMENTATION
        #include "llmpar_cuda.h"

    and LLMPAR_IMPLEMENTATION in a .c or .cc file as for llmpar.h. Everywhere else include "llmpar_cuda.h" alone: its
    declarations need no CUDA header.

    Then name the backend in the launch desc, and the same program runs on GPUs:

        llmpar_backend gpu = {0};
        llmpar_cuda_backend(NULL, &gpu);
        launch.backend = &gpu;

    Ranks that are threads of one process share a GPU, or take one each; processes with a GPU each talk through llmpar_nccl.h.

    MIT licence, as llmpar.h.
*/
#include "llmpar.h"

#ifndef LLMPAR_CUDA_H
#define LLMPAR_CUDA_H

LLMPAR_EXTERN_C_BEGIN
/* ==== src/cuda/cuda.h ==== */
/* cuda: the CUDA device: the table of tables/device.h on an NVIDIA GPU, and the communicator of rank threads that share one. */

#include "llmpar.h"

/* EXACT: own kernels with one order for every sum: the same bits on every mesh of one device type (docs/exact.md). FAST: products and attention of the vendor's libraries, in their order; with canon 1 (exact off) sums for norm weights in parts. */
typedef enum llmpar_cuda_mode { LLMPAR_CUDA_DEFAULT = 0 /* EXACT */, LLMPAR_CUDA_EXACT = 1, LLMPAR_CUDA_FAST = 2 } llmpar_cuda_mode;

typedef struct llmpar_cuda_desc {
    llmpar_cuda_mode mode;     /* default: exact */
    int32_t tf32;              /* 1: f32 products in TF32 (FAST only, refused otherwise); default 0: f32 */
    int32_t cudnn;             /* 1: attention of cuDNN (FAST only, built with LLMPAR_USE_CUDNN; refused otherwise); default 0: own kernels */
    size_t library_workspace;  /* bytes that a stream's products may use inside the vendor's library; default 0: 32 MiB. Part of `outside` in memory reports */
} llmpar_cuda_desc;

/* How many devices the driver shows (CUDA_VISIBLE_DEVICES chooses); 0 with the reason in *error (NULL is fine) where there is no driver or no device. Never fails otherwise. Local, thread-safe. */
LLMPAR_API int32_t llmpar_cuda_count(llmpar_error *error);
/* The device of a rank: number ctx->local_rank modulo the devices shown. desc NULL: defaults; it is copied. ctx is borrowed, for its heap and its error, until llmpar_cuda_destroy. The device belongs to the rank's thread: no other
   one calls it (but for thread_error), and host calls, which the driver's threads run, do not call CUDA; devices of several ranks are apart, also on one GPU. Text of failures in ctx->error: LLMPAR_ERR_ARGUMENT for the desc,
   LLMPAR_ERR_UNSUPPORTED without a driver, a device, or a kernel image for it, LLMPAR_ERR_MEMORY. Local. */
LLMPAR_API llmpar_status llmpar_cuda_create(llmpar_ctx *ctx, const llmpar_cuda_desc *desc, llmpar_device **out);
/* NULL is fine. Waits for what is enqueued, and takes streams that are left along; memory and events are given back before, by who asked for them. On the rank's thread. */
LLMPAR_API void llmpar_cuda_destroy(llmpar_device *device);
/* What became of the regions of a device (region_begin, tables/device.h), which mode FAST alone has: replayed with one launch; captured, which runs them too; issued operation by operation (the first time, with arguments that
   changed, and what ended early). kept: graphs it holds now. Local; device is one of llmpar_cuda_create. */
typedef struct llmpar_cuda_graph_counts { uint64_t replayed, captured, plain, kept; } llmpar_cuda_graph_counts;
LLMPAR_API void llmpar_cuda_graphs(llmpar_device *device, llmpar_cuda_graph_counts *out);
/* The communicator of rank threads on one device: each collective is a kernel over the peers' memory. host: the world of rank threads (ctx->host_comm), borrowed; through it the ranks meet, compare calls, time out and
   learn of failures. All ranks' devices are the same GPU, or GPUs that reach each other's memory (LLMPAR_ERR_UNSUPPORTED names the two otherwise). The same bits as every communicator. At most 128 ranks.
   device is borrowed until llmpar_comm_destroy, which goes before llmpar_cuda_destroy. Failures are everybody's: LLMPAR_ERR_ARGUMENT without host, LLMPAR_ERR_MEMORY, LLMPAR_ERR_PEER where another rank's is the root. Collective. */
LLMPAR_API llmpar_status llmpar_cuda_shared_comm_create(llmpar_ctx *ctx, llmpar_device *device, llmpar_comm *host, llmpar_comm **out);
/* Fills *out for a launch desc: device_create and, for rank threads, comm_create. desc: borrowed until the launch returns; NULL: defaults. Local, thread-safe. */
LLMPAR_API void llmpar_cuda_backend(const llmpar_cuda_desc *desc, llmpar_backend *out);

LLMPAR_EXTERN_C_END

#endif /* LLMPAR_CUDA_H */

#ifdef LLMPAR_CUDA_IMPLEMENTATION
#ifndef LLMPAR__CUDA_IMPLEMENTED
#define LLMPAR__CUDA_IMPLEMENTED

#if !defined(__CUDACC__) && !defined(LLMPAR_CUDA_EMULATED)
#error "llmpar_cuda.h: LLMPAR_CUDA_IMPLEMENTATION belongs in a .cu file that nvcc compiles"
#else
/* ==== src/cuda/probe.cu ==== */
/* probe: a kernel of which the device asks whether the program holds code for the GPU; and which cannot be compiled with flags that change what the other kernels compute.
   nvcc defines no macro for --use_fast_math and its parts, but the compiler behind it answers __nvvm_reflect (NVVM IR specification, "Reflection parameters"); a call that stays after that names what is wrong, since nobody defines it. */
/* ==== src/cuda/cuda_internal.h ==== */
/* cuda_internal: what the operation files of the CUDA device share: its state, launches, memory types on the device, and one function a slot.

   Kernels are plain CUDA C++ in the subset that tests/emulated_cuda runs on the CPU as well: one fiber a thread, in random order. So
     - a kernel is launched by llmpar__cuda_launch, never by <<< >>>;
     - shared memory is dynamic, asked for at the launch, and reached through LLMPAR__CUDA_SHARED: never a static __shared__ variable;
     - what a warp does together goes through intrinsics.h (matrix products, ldmatrix, cp.async, shuffles);
     - every thread of a warp takes part in a shuffle or a matrix product, all of a block in __syncthreads.
   No sum depends on block size, grid size or timing: the order of docs/exact.md, or integers. Where bits must be the CPU's too, products and sums are written with the
   __fmul_rn family: compilers contract a*b + c otherwise. */
/* ==== src/cuda/intrinsics.h ==== */
/* intrinsics: what kernels ask of a warp and of the machine, as functions: PTX here, the same functions by tests/emulated_cuda/warp.h on the CPU (LLMPAR_CUDA_EMULATED).

   Fragments of mma.sync as in the PTX manual (section "Matrix multiply-accumulate operation using mma instruction", m16n8k16): with g = lane/4 and t = lane%4 a thread has
     a[0] row g, k 2t..2t+1;  a[1] row g+8, the same k;  a[2] row g, k 2t+8..2t+9;  a[3] row g+8, those k;   b[0] column g, k 2t..2t+1;  b[1] column g, k 2t+8..2t+9;
     d[0..1] row g, columns 2t..2t+1;  d[2..3] row g+8, the same columns.    The lower k is in the lower half of a register. */

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
/* ---- src/cuda/cuda_internal.h goes on ---- */
#include <cublasLt.h>
#include <cuda_runtime.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

/* Stays with the device when the stream is destroyed, and serves the next one: events name it. */
typedef struct llmpar__cuda_stream {
    struct llmpar__cuda_stream *next; /* of the device's list */
    cudaStream_t handle;       /* NULL: not in use */
    llmpar_status status;      /* sticks; the first failure of what was enqueued here. Atomic: host calls set it from the driver's thread */
    llmpar_error error;        /* what a host call said that failed */
    llmpar_error refused;      /* what else failed first; the rank's thread alone looks at it */
    int told;                  /* atomic: that is complete. The rank's thread may set status while a host call still speaks */
    void *library;             /* desc.library_workspace bytes for products, made with the stream in FAST mode; else NULL */
    char name[24];
} llmpar__cuda_stream;

/* A host call under way. Reused when done. */
typedef struct llmpar__cuda_call {
    struct llmpar__cuda_call *next; /* of the device's list, which only grows */
    llmpar__cuda_stream *stream;
    llmpar_status (*fn)(void *arg);
    pthread_t thread;          /* that runs fn, while `state` says so. Another one may write it while it is read: what the reader cannot find there is itself */
    int state;                 /* atomic: free, enqueued, running */
    union { unsigned char bytes[256]; long double align; void *pointer; } arg;
} llmpar__cuda_call;

typedef struct llmpar__cuda_regions llmpar__cuda_regions; /* graphs.cu */

typedef struct llmpar__cuda {
    llmpar_heap *heap;         /* the rank's */
    llmpar_cuda_desc desc;     /* resolved */
    int index;                 /* of the driver */
    int capability;            /* 80, 90, 100 .. */
    int multiprocessors, threads_resident; /* the latter of each */
    size_t shared_limit;       /* dynamic shared memory that a block may ask for */
    cublasLtHandle_t lt;       /* FAST mode; else NULL */
    void *products;            /* FAST mode: the algorithms chosen, by shape (gemm_library.cu); else NULL */
    void *attention;           /* desc.cudnn: its handle and graphs (attention_cudnn.cu); else NULL */
    llmpar__cuda_stream now;   /* what stream NULL means: the operation is done when its call returns */
    llmpar__cuda_stream *streams;
    llmpar__cuda_call *calls;
    llmpar__cuda_regions *regions; /* NULL until region_begin is called */
    char place[32];            /* PCI address */
    char name[128];            /* the device's name: "cuda sm_90 exact NVIDIA H200": type, code, mode; ranks must agree */
} llmpar__cuda;

static inline llmpar__cuda *llmpar__cuda_of(llmpar_device *device) { return (llmpar__cuda *)device->state; }

/* ---- device.cu ---- */

/* The stream's state; stream NULL gives `now`. */
static llmpar__cuda_stream *llmpar__cuda_stream_of(llmpar_device *device, llmpar_stream *stream);
/* Every slot begins with it: makes the rank's device current on the calling thread and returns the failure that sticks to the stream, if there is one. A region that is open on the stream ends. */
static llmpar_status llmpar__cuda_begin(llmpar_device *device, llmpar_stream *stream);
/* Every slot ends with it: takes over the launch error (cudaGetLastError), which then sticks, with the text `what` (the slot's name); waits where stream is NULL. */
static llmpar_status llmpar__cuda_end(llmpar_device *device, llmpar_stream *stream, const char *what);
/* The failure that sticks to a stream, if there is one; and a failure that shall. */
static llmpar_status llmpar__cuda_stuck(llmpar_device *device, llmpar__cuda_stream *own);
static llmpar_status llmpar__cuda_stick(llmpar_device *device, llmpar_stream *stream, llmpar_status status);
static llmpar_status llmpar__cuda_zero(llmpar_device *device, llmpar_stream *stream, void *out, size_t bytes);
/* A call of the CUDA runtime: LLMPAR_OK, LLMPAR_ERR_MEMORY, or LLMPAR_ERR_INTERNAL with what, cudaGetErrorName and its text. */
static llmpar_status llmpar__cuda_check(llmpar_device *device, cudaError_t code, const char *what);
/* dtype is one of F32, BF16, F16 (half != 0) or F32 alone; else LLMPAR_ERR_UNSUPPORTED naming slot and dtype ("rmsnorm: dtype f64 on device cuda .., expected f32, bf16 or f16"). */
static llmpar_status llmpar__cuda_dtype(llmpar_device *device, const char *what, llmpar_dtype dtype, int half);
/* Blocks of `threads` for `count` items, at most `waves` times what the device runs at once: for grid-stride loops. At least 1. */
static unsigned llmpar__cuda_blocks(const llmpar__cuda *cuda, int64_t count, unsigned threads, unsigned waves);

/* llmpar__cuda_launch(device, stream, kernel, dim3 grid, dim3 block, size_t shared, args...) enqueues kernel(args...) with `shared` bytes of dynamic shared memory (raises the kernel's limit where it is above
   48 KiB). Arguments are converted to the kernel's parameter types. Errors: llmpar__cuda_end. In launch.h. */

/* ---- graphs.cu ---- */

static void llmpar__cuda_regions_fill(llmpar_device *d); /* its slots, and slots of operations that can be noted */
static int llmpar__cuda_notes(llmpar_device *device, llmpar_stream *stream); /* is a region open on it? */
static void llmpar__cuda_region_break(llmpar_device *device); /* what was noted is issued, now */
static void llmpar__cuda_regions_forget(llmpar_device *device, llmpar__cuda_stream *stream); /* NULL: all */

/* ---- slots, one file an operation ---- */

#define LLMPAR__CUDA_SLOT(name, type) static llmpar_status llmpar__cuda_##name(llmpar_device *device, llmpar_stream *stream, const type *args)
/* gemm.cu: the slot and EXACT; gemm_library.cu: FAST */
LLMPAR__CUDA_SLOT(gemm, llmpar_gemm_args);
static size_t llmpar__cuda_gemm_workspace(llmpar_device *device, const llmpar_gemm_args *args);
static llmpar_status llmpar__cuda_gemm_library(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args);
static size_t llmpar__cuda_gemm_library_workspace(llmpar_device *device, const llmpar_gemm_args *args);
static llmpar_status llmpar__cuda_library_create(llmpar_device *device);  /* sets cuda->lt and cuda->products */
static void llmpar__cuda_library_destroy(llmpar_device *device);
/* attention.cu, attention_backward.cu, attention_simple.cu; attention_cudnn.cu: desc.cudnn */
#ifdef LLMPAR_USE_CUDNN
static llmpar_status llmpar__cuda_cudnn_create(llmpar_device *device);
static void llmpar__cuda_cudnn_destroy(llmpar_device *device);
static llmpar_status llmpar__cuda_attention_cudnn(llmpar_device *device, llmpar_stream *stream, const llmpar_attention_args *a, const llmpar_attention_backward_args *backward);
static size_t llmpar__cuda_attention_cudnn_workspace(llmpar_device *device, const llmpar_attention_args *a, const llmpar_attention_backward_args *backward);
#endif
LLMPAR__CUDA_SLOT(attention, llmpar_attention_args);
static size_t llmpar__cuda_attention_workspace(llmpar_device *device, const llmpar_attention_args *args);
LLMPAR__CUDA_SLOT(attention_backward, llmpar_attention_backward_args);
static size_t llmpar__cuda_attention_backward_workspace(llmpar_device *device, const llmpar_attention_backward_args *args);
/* norm.cu */
LLMPAR__CUDA_SLOT(rmsnorm, llmpar_rmsnorm_args);
LLMPAR__CUDA_SLOT(rmsnorm_backward, llmpar_rmsnorm_backward_args);
/* rope.cu */
LLMPAR__CUDA_SLOT(rope, llmpar_rope_args);
/* swiglu.cu */
LLMPAR__CUDA_SLOT(swiglu, llmpar_swiglu_args);
LLMPAR__CUDA_SLOT(swiglu_backward, llmpar_swiglu_backward_args);
/* embedding.cu */
LLMPAR__CUDA_SLOT(embedding, llmpar_embedding_args);
LLMPAR__CUDA_SLOT(embedding_backward, llmpar_embedding_backward_args);
static size_t llmpar__cuda_embedding_backward_workspace(llmpar_device *device, const llmpar_embedding_backward_args *args);
/* xent.cu; xent_loss.cu: xent_loss */
LLMPAR__CUDA_SLOT(xent_max, llmpar_xent_args);
LLMPAR__CUDA_SLOT(xent_sum, llmpar_xent_args);
LLMPAR__CUDA_SLOT(xent_loss, llmpar_xent_loss_args);
LLMPAR__CUDA_SLOT(xent_backward, llmpar_xent_backward_args);
/* elementwise.cu: add, scale, copy_rows; cast.cu; tree_sum.cu: tree_sum, max */
LLMPAR__CUDA_SLOT(tree_sum, llmpar_tree_sum_args);
LLMPAR__CUDA_SLOT(max, llmpar_max_args);
LLMPAR__CUDA_SLOT(add, llmpar_add_args);
LLMPAR__CUDA_SLOT(scale, llmpar_scale_args);
LLMPAR__CUDA_SLOT(cast, llmpar_cast_args);
LLMPAR__CUDA_SLOT(copy_rows, llmpar_copy_rows_args);
/* optim.cu: adamw, sgd, largest; squares.cu: square_sum; adalomo.cu */
LLMPAR__CUDA_SLOT(adamw, llmpar_adamw_args);
LLMPAR__CUDA_SLOT(sgd, llmpar_sgd_args);
LLMPAR__CUDA_SLOT(largest, llmpar_largest_args);
LLMPAR__CUDA_SLOT(square_sum, llmpar_square_sum_args);
LLMPAR__CUDA_SLOT(factor_sum, llmpar_factor_sum_args);
LLMPAR__CUDA_SLOT(factor_moment, llmpar_factor_moment_args);
LLMPAR__CUDA_SLOT(adalomo_square, llmpar_adalomo_args);
LLMPAR__CUDA_SLOT(adalomo, llmpar_adalomo_args);

/* ---- element types in kernels ---- */

/* What is stored; computing is in float. */
struct llmpar__cuda_bf16 { uint16_t bits; };
struct llmpar__cuda_f16 { uint16_t bits; };

/* 16 bytes, as kernels move them where pointers and strides allow. */
struct __align__(16) llmpar__cuda_16 { uint32_t word[4]; };
/* Four elements at once: neighbours' bytes touch, of f32 and of a 16-bit type. */
template <typename T> struct __align__((sizeof(T) < 4 ? 8 : 16)) llmpar__cuda_four { T x[4]; };
/* Two neighbouring sums of mma.sync, likewise. */
struct __align__(8) llmpar__cuda_pair_of_floats { float x[2]; };

static __device__ __forceinline__ float llmpar__cuda_load(float x) { return x; }
static __device__ __forceinline__ float llmpar__cuda_load(llmpar__cuda_bf16 x) { return __uint_as_float((uint32_t)x.bits << 16); }
static __device__ __forceinline__ float llmpar__cuda_load(llmpar__cuda_f16 x) { return llmpar__cu_f16_to_f32(x.bits); }

/* Rounds to nearest even; NaNs as llmpar_f32_to_bf16 and llmpar_f32_to_f16 (base/dtype.h): the same bits as on the CPU. */
static __device__ __forceinline__ void llmpar__cuda_store(float *out, float x) { *out = x; }
static __device__ __forceinline__ void llmpar__cuda_store(llmpar__cuda_bf16 *out, float x)
{
    uint32_t u = __float_as_uint(x);
    out->bits = (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
static __device__ __forceinline__ void llmpar__cuda_store(llmpar__cuda_f16 *out, float x) { out->bits = llmpar__cu_f32_to_f16(x); }

static __device__ __forceinline__ float llmpar__cuda_minus_infinity() { return __uint_as_float(0xff800000u); }

/* NaN wins, the first one; of equal zeros the later one. By comparisons and choices alone: bits are kept. */
template <typename T> static __device__ __forceinline__ T llmpar__cuda_larger(T a, T b) { return a != a || a > b ? a : b; }

/* a / b for a >= 0, b > 0. Most fit 32 bits, where the division is much shorter. */
static __device__ __forceinline__ int64_t llmpar__cuda_divide(int64_t a, int64_t b)
{
    if (((uint64_t)(a | b) >> 32) == 0) return (int64_t)((uint32_t)a / (uint32_t)b);
    return a / b;
}

/* The same cuts as base/size.h, on the device. */
static __host__ __device__ __forceinline__ int64_t llmpar__cuda_piece_begin(int64_t i, int64_t grains, int64_t pieces) { return i * grains / pieces; }
/* ---- src/cuda/probe.cu goes on ---- */
#if defined(__USE_FAST_MATH__) || defined(__FAST_MATH__)
#error "llmpar_cuda.h: --use_fast_math changes what is computed, and differently in every kernel: compile without it"
#endif

#if !defined(LLMPAR_CUDA_EMULATED)
extern "C" __device__ int __nvvm_reflect(const char *what);
extern __device__ void llmpar_cuda_h_has_to_be_compiled_without_use_fast_math_and_its_parts();
#endif

static __global__ void llmpar__cuda_probe(int *out)
{
#if !defined(LLMPAR_CUDA_EMULATED)
    if (__nvvm_reflect("__CUDA_FTZ")) llmpar_cuda_h_has_to_be_compiled_without_use_fast_math_and_its_parts();
#if __CUDACC_VER_MAJOR__ >= 13
    if (!__nvvm_reflect("__CUDA_PREC_DIV") || !__nvvm_reflect("__CUDA_PREC_SQRT")) llmpar_cuda_h_has_to_be_compiled_without_use_fast_math_and_its_parts();
#endif
#endif
    *out = 1;
}
/* ==== src/cuda/norm.cu ==== */
/* norm: RMSNorm (Zhang & Sennrich 2019), forward and backward.

   A row's sum over D has the shape of rows_internal.h. The weight's gradient is, for each leaf and T-piece and column, one chain over tokens (docs/exact.md), and there is no scratch to put chains in. So a block takes
   a leaf and some columns, all pieces side by side, and keeps the chains in registers and their tree in shared memory:

        warps of a block, 8 pieces            1 piece (sequence parallel)
        piece 0 | 128 bytes of columns |      piece 0 | 128 bytes | 128 bytes | .. 8 times |
        piece 1 | 128 bytes            |
        ..            tokens of all pieces advance together, 8 at a time, and come through a ring of stages in shared memory, copied while earlier ones are summed

   dx needs whole rows. Read for themselves, dy and x would come from memory twice. So the blocks of a leaf share out the rows that their chains have just passed, and compute dx for them in between: they all pass them at about the
   same time, so the second reading comes from the L2 cache. Nothing but speed depends on that. Where dx takes the place of dy, or where there are too few chains to keep the device busy, dx has a launch of its own behind the chains. */
/* ==== src/cuda/rows_internal.h ==== */
/* rows_internal: what the kernels that walk over rows share: 16 bytes of elements at a time, sums over a row in one fixed shape, the balanced tree of docs/exact.md, and the exponential.

   A row that one thread group sums up has the shape that its length and dtype give, and nothing else: `lanes` threads (a power of two, at most LLMPAR__CUDA_ROW_THREADS) take 16 bytes
   of columns each, and again `lanes` x 16 bytes further on; each thread adds in column order; then a tree over the threads, halves folded onto each other.
   Where memory is not aligned, the same elements come one by one: the same bits. */
/* ==== src/cuda/launch.h ==== */
/* launch: how a kernel gets onto a stream. */
/* Above 48 KiB a kernel has to be told. It is told the device's limit, not this launch's need: another rank's thread may be about to launch the same kernel with more. */
static inline cudaError_t llmpar__cuda_raise(llmpar_device *device, const void *kernel, size_t shared)
{
    return shared > 48 * 1024 ? cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)llmpar__cuda_of(device)->shared_limit) : cudaSuccess;
}

#ifdef LLMPAR_CUDA_EMULATED
template <typename... Parameters, typename... Arguments>
static void llmpar__cuda_launch_text(const char *text, const char *caller, llmpar_device *device, llmpar_stream *stream, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Arguments... args)
{
    cudaError_t code = llmpar__cuda_raise(device, (const void *)kernel, shared);
    if (code == cudaSuccess) (void)emulated_cuda_launch<Parameters...>(text, caller, kernel, grid, block, shared, llmpar__cuda_stream_of(device, stream)->handle, (Parameters)args...);
}
/* The text is for messages: which kernel. */
#define llmpar__cuda_launch(...) llmpar__cuda_launch_text(#__VA_ARGS__, __func__, __VA_ARGS__)
#else
/* The values have the kernel's own types here, so that their addresses are what a launch takes. */
template <typename... Parameters> static void llmpar__cuda_launch_values(cudaStream_t stream, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Parameters... values)
{
    void *pointers[] = {(void *)&values..., NULL};
    (void)cudaLaunchKernel((const void *)kernel, grid, block, pointers, shared, stream);
}
template <typename... Parameters, typename... Arguments>
static void llmpar__cuda_launch(llmpar_device *device, llmpar_stream *stream, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Arguments... args)
{
    cudaError_t code = llmpar__cuda_raise(device, (const void *)kernel, shared);
    if (code == cudaSuccess) llmpar__cuda_launch_values<Parameters...>(llmpar__cuda_stream_of(device, stream)->handle, kernel, grid, block, shared, (Parameters)args...);
}
#endif
/* ---- src/cuda/rows_internal.h goes on ---- */
enum { LLMPAR__CUDA_ROW_THREADS = 256, LLMPAR__CUDA_ROW_WARPS = LLMPAR__CUDA_ROW_THREADS / 32 };

/* name<element type>(...) for a dtype that llmpar__cuda_dtype has let pass */
#define LLMPAR__CUDA_BY_DTYPE(dtype, name, ...) \
    do { \
        if ((dtype) == LLMPAR_BF16) name<llmpar__cuda_bf16>(__VA_ARGS__); \
        else if ((dtype) == LLMPAR_F16) name<llmpar__cuda_f16>(__VA_ARGS__); \
        else name<float>(__VA_ARGS__); \
    } while (0)

/* ---- 16 bytes of elements ---- */

template <typename T> struct llmpar__cuda_vector { enum { count = 16 / (int)sizeof(T) }; };

static __device__ __forceinline__ uint32_t llmpar__cuda_bits(float x) { return __float_as_uint(x); }
static __device__ __forceinline__ uint32_t llmpar__cuda_bits(llmpar__cuda_bf16 x) { return x.bits; }
static __device__ __forceinline__ uint32_t llmpar__cuda_bits(llmpar__cuda_f16 x) { return x.bits; }
static __device__ __forceinline__ void llmpar__cuda_set_bits(float *x, uint32_t bits) { *x = __uint_as_float(bits); }
static __device__ __forceinline__ void llmpar__cuda_set_bits(llmpar__cuda_bf16 *x, uint32_t bits) { x->bits = (uint16_t)bits; }
static __device__ __forceinline__ void llmpar__cuda_set_bits(llmpar__cuda_f16 *x, uint32_t bits) { x->bits = (uint16_t)bits; }

/* The first `count` elements at `at`, zeros behind them; count may exceed what 16 bytes hold. wide: `at` is aligned to 16 bytes. */
template <typename T> static __device__ __forceinline__ llmpar__cuda_16 llmpar__cuda_read(const T *at, int64_t count, int wide)
{
    const int width = llmpar__cuda_vector<T>::count, bits = 8 * (int)sizeof(T), each = 4 / (int)sizeof(T);
    llmpar__cuda_16 out;
    if (wide && count >= width) return *(const llmpar__cuda_16 *)(const void *)at;
#pragma unroll
    for (int w = 0; w < 4; w++) {
        out.word[w] = 0;
#pragma unroll
        for (int k = 0; k < each; k++)
            if (w * each + k < count) out.word[w] |= llmpar__cuda_bits(at[w * each + k]) << (k * bits % 32);
    }
    return out;
}
template <typename T> static __device__ __forceinline__ void llmpar__cuda_write(T *at, int64_t count, int wide, const llmpar__cuda_16 &in)
{
    const int width = llmpar__cuda_vector<T>::count, bits = 8 * (int)sizeof(T), each = 4 / (int)sizeof(T);
    if (wide && count >= width) {
        *(llmpar__cuda_16 *)(void *)at = in;
        return;
    }
#pragma unroll
    for (int k = 0; k < width; k++)
        if (k < count) llmpar__cuda_set_bits(&at[k], in.word[k / each] >> (k % each * bits % 32));
}

template <typename T> static __device__ __forceinline__ void llmpar__cuda_unpack(float *out, const llmpar__cuda_16 &in)
{
    const int width = llmpar__cuda_vector<T>::count, bits = 8 * (int)sizeof(T), each = 4 / (int)sizeof(T);
#pragma unroll
    for (int k = 0; k < width; k++) {
        T x;
        llmpar__cuda_set_bits(&x, in.word[k / each] >> (k % each * bits % 32));
        out[k] = llmpar__cuda_load(x);
    }
}
/* Rounds each once. */
template <typename T> static __device__ __forceinline__ llmpar__cuda_16 llmpar__cuda_pack(const float *in)
{
    const int bits = 8 * (int)sizeof(T), each = 4 / (int)sizeof(T);
    llmpar__cuda_16 out;
#pragma unroll
    for (int w = 0; w < 4; w++) {
        out.word[w] = 0;
#pragma unroll
        for (int k = 0; k < each; k++) {
            T x;
            llmpar__cuda_store(&x, in[w * each + k]);
            out.word[w] |= llmpar__cuda_bits(x) << (k * bits % 32);
        }
    }
    return out;
}

/* Whether rows at this place, so many bytes apart, can be moved 16 bytes at a time; NULL can. */
static inline int llmpar__cuda_wide(const void *base, int64_t row_bytes) { return !base || (((uint64_t)(uintptr_t)base | (uint64_t)row_bytes) & 15u) == 0; }

/* ---- walking ---- */

/* Threads that share a row of `dim` columns of `size` bytes. */
static inline int llmpar__cuda_row_lanes(int64_t dim, int size)
{
    int64_t vectors = (dim * size + 15) / 16;
    int lanes = 1;
    while (lanes < LLMPAR__CUDA_ROW_THREADS && lanes < vectors) lanes *= 2;
    return lanes;
}
static inline unsigned llmpar__cuda_row_blocks(const llmpar__cuda *cuda, int64_t blocks, unsigned waves) { return llmpar__cuda_blocks(cuda, blocks * LLMPAR__CUDA_ROW_THREADS, LLMPAR__CUDA_ROW_THREADS, waves); }

/* ---- over the threads of a row; every thread gets the results. For more than 32 lanes all threads of the block take part, and `partial` (a float a warp for each sum) is not the one of the call before. ---- */

template <int Sums> static __device__ __forceinline__ void llmpar__cuda_row_sums(float *x, int lanes, float *partial)
{
    for (int o = (lanes < 32 ? lanes : 32) / 2; o > 0; o /= 2) {
#pragma unroll
        for (int n = 0; n < Sums; n++) x[n] = __fadd_rn(x[n], __shfl_xor_sync(0xffffffffu, x[n], o));
    }
    if (lanes > 32) {
        const int warps = lanes / 32, warp = (int)threadIdx.x / 32, first = warp - warp % warps;
#pragma unroll
        for (int n = 0; n < Sums; n++)
            if (threadIdx.x % 32 == 0) partial[n * LLMPAR__CUDA_ROW_WARPS + warp] = x[n];
        __syncthreads();
#pragma unroll
        for (int n = 0; n < Sums; n++) {
            float p[LLMPAR__CUDA_ROW_WARPS];
#pragma unroll
            for (int k = 0; k < LLMPAR__CUDA_ROW_WARPS; k++) p[k] = k < warps ? partial[n * LLMPAR__CUDA_ROW_WARPS + first + k] : 0.0f;
#pragma unroll
            for (int half = LLMPAR__CUDA_ROW_WARPS / 2; half > 0; half /= 2) {
#pragma unroll
                for (int k = 0; k < half; k++) p[k] = __fadd_rn(p[k], p[k + half]);
            }
            x[n] = p[0];
        }
    }
}
static __device__ __forceinline__ float llmpar__cuda_row_sum(float x, int lanes, float *partial)
{
    llmpar__cuda_row_sums<1>(&x, lanes, partial);
    return x;
}

/* ---- the balanced tree over leaves that come in index order ----
   Leaves that do not come count as +0 and are skipped: no sum is -0. Two leaves part at the highest bit in which their indices differ. What is complete below a parting at bit h waits at level h + 1, a leaf
   at level 0. Several sums go the same way side by side: stack[level * stride]. mask and last belong to them together. */
typedef struct llmpar__cuda_tree { uint64_t mask; int64_t last; } llmpar__cuda_tree;

/* Levels for indices up to `last`. */
static inline int llmpar__cuda_tree_levels(int64_t last)
{
    int levels = 2;
    for (; last > 0; last /= 2) levels++;
    return levels;
}
/* The sum of what waits at the levels below `end`, which are empty then. At least one is not. */
static __device__ __forceinline__ float llmpar__cuda_tree_fold(uint64_t mask, const float *stack, int stride, int end)
{
    int level = 0;
    while (!(mask >> level & 1)) level++;
    float sum = stack[level * stride];
    for (level++; level < end; level++)
        if (mask >> level & 1) sum = __fadd_rn(stack[level * stride], sum);
    return sum;
}
/* Makes room for leaf `index` in one of the sums; llmpar__cuda_tree_pushed follows when all have done so. */
static __device__ __forceinline__ void llmpar__cuda_tree_push(const llmpar__cuda_tree *tree, float *stack, int stride, int64_t index, float leaf)
{
    if (tree->mask) {
        int end = 64 - __clzll((long long)(index ^ tree->last));
        stack[end * stride] = llmpar__cuda_tree_fold(tree->mask, stack, stride, end);
    }
    stack[0] = leaf;
}
static __device__ __forceinline__ void llmpar__cuda_tree_pushed(llmpar__cuda_tree *tree, int64_t index)
{
    if (tree->mask) {
        int end = 64 - __clzll((long long)(index ^ tree->last));
        tree->mask = (tree->mask >> end | 1) << end;
    }
    tree->mask |= 1;
    tree->last = index;
}
static __device__ __forceinline__ float llmpar__cuda_tree_sum(const llmpar__cuda_tree *tree, const float *stack, int stride, int levels) { return tree->mask ? llmpar__cuda_tree_fold(tree->mask, stack, stride, levels) : 0.0f; }

/* The tree over the leaves that the slots of a block hold, in[slot * stride]: a power of two, at most 8. */
static __device__ __forceinline__ float llmpar__cuda_slot_sum(const float *in, int slots, int stride)
{
    float s[LLMPAR__CUDA_ROW_WARPS];
#pragma unroll
    for (int k = 0; k < LLMPAR__CUDA_ROW_WARPS; k++) s[k] = k < slots ? in[k * stride] : 0.0f;
    return __fadd_rn(__fadd_rn(__fadd_rn(s[0], s[1]), __fadd_rn(s[2], s[3])), __fadd_rn(__fadd_rn(s[4], s[5]), __fadd_rn(s[6], s[7])));
}
/* How many leaves of `count` a block takes side by side. */
static inline int llmpar__cuda_slots(int64_t count)
{
    int slots = 1;
    while (slots < LLMPAR__CUDA_ROW_WARPS && slots < count) slots *= 2;
    return slots;
}

/* ---- two neighbouring columns of a thread, as they are stored ---- */

template <typename T> struct __align__(2 * sizeof(T)) llmpar__cuda_two { uint32_t word[sizeof(T) / 2]; };

/* left: columns that there are at `at`, at least 1; pair: aligned for two. */
template <typename T> static __device__ __forceinline__ llmpar__cuda_two<T> llmpar__cuda_read_two(const T *at, int64_t left, int pair)
{
    const int words = (int)sizeof(T) / 2;
    llmpar__cuda_two<T> out;
    if (pair) return *(const llmpar__cuda_two<T> *)(const void *)at;
    uint32_t low = llmpar__cuda_bits(at[0]), high = left > 1 ? llmpar__cuda_bits(at[1]) : 0;
    out.word[0] = words == 1 ? low | high << 16 : low;
    if (words == 2) out.word[words - 1] = high;
    return out;
}
template <typename T> static __device__ __forceinline__ float llmpar__cuda_low(const llmpar__cuda_two<T> &x)
{
    T low;
    llmpar__cuda_set_bits(&low, x.word[0]);
    return llmpar__cuda_load(low);
}
template <typename T> static __device__ __forceinline__ float llmpar__cuda_high(const llmpar__cuda_two<T> &x)
{
    const int words = (int)sizeof(T) / 2;
    T high;
    llmpar__cuda_set_bits(&high, words == 1 ? x.word[0] >> 16 : x.word[words - 1]);
    return llmpar__cuda_load(high);
}
static inline int llmpar__cuda_pair(const void *base, int64_t dim, int size) { return dim % 2 == 0 && (uintptr_t)base % (uintptr_t)(2 * size) == 0; }

/* ---- e^x for x <= 0: NaN for NaN, exactly 1 for 0, +0 under about -87.3. Relative error <= 2^-21.5: that of the machine's 2^t (2^-22), a rounding, and x log2(e) - t made up for. ---- */
static __device__ __forceinline__ float llmpar__cuda_exp(float x)
{
    const float log2e = 1.44269502f, rest = 1.92596303e-8f, ln2 = 0.693147181f;
    float y = x < -104.0f ? -104.0f : x, t = __fmul_rn(y, log2e), d = __fmaf_rn(y, rest, __fmaf_rn(y, log2e, -t)), e = llmpar__cu_exp2(t);
    return __fmaf_rn(__fmul_rn(e, ln2), d, e);
}
/* ---- src/cuda/norm.cu goes on ---- */
/* Shared memory in front of everything else: two turns of partial sums for two rows each. */
enum { LLMPAR__CUDA_NORM_PARTIAL = 2 * LLMPAR__CUDA_ROW_WARPS, LLMPAR__CUDA_NORM_HEAD = 128 };

template <typename T> static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS, 5) llmpar__cuda_norm_forward(llmpar_rmsnorm_args a, int lanes, int kept, int wide)
{
    LLMPAR__CUDA_SHARED(unsigned char, shared);
    const int width = llmpar__cuda_vector<T>::count, threads = LLMPAR__CUDA_ROW_THREADS, lane = (int)threadIdx.x % lanes, at_once = threads / lanes;
    const int64_t dim = a.dim, step = (int64_t)lanes * width;
    float *partial = (float *)(void *)shared;
    llmpar__cuda_16 *keep = (llmpar__cuda_16 *)(void *)(shared + LLMPAR__CUDA_NORM_HEAD) + threadIdx.x;
    int turn = 0;
    for (int64_t first = (int64_t)blockIdx.x * at_once; first < a.rows; first += (int64_t)gridDim.x * at_once, turn ^= 1) {
        const int64_t row = first + (int)threadIdx.x / lanes, end = row < a.rows ? dim : 0;
        const T *x = (const T *)a.x + row * dim, *residual = (const T *)a.residual + row * dim, *w = (const T *)a.w;
        T *sum = (T *)a.sum + row * dim, *y = (T *)a.y + row * dim;
        float s = 0, rstd;
        int slot = 0;
        for (int64_t c = (int64_t)lane * width; c < end; c += step, slot += threads) {
            float v[width], r[width];
            llmpar__cuda_16 raw = llmpar__cuda_read(x + c, end - c, wide);
            if (a.residual) { /* what is normalised is the sum as it is stored */
                llmpar__cuda_16 other = llmpar__cuda_read(residual + c, end - c, wide);
                llmpar__cuda_unpack<T>(v, raw);
                llmpar__cuda_unpack<T>(r, other);
#pragma unroll
                for (int k = 0; k < width; k++) v[k] = __fadd_rn(v[k], r[k]);
                raw = llmpar__cuda_pack<T>(v);
                llmpar__cuda_write(sum + c, end - c, wide, raw);
            }
            if (kept) keep[slot] = raw;
            llmpar__cuda_unpack<T>(v, raw);
#pragma unroll
            for (int k = 0; k < width; k++) s = __fmaf_rn(v[k], v[k], s);
        }
        s = llmpar__cuda_row_sum(s, lanes, partial + turn * LLMPAR__CUDA_NORM_PARTIAL);
        rstd = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(s, (float)dim), (float)a.eps)));
        if (a.rstd && lane == 0 && end) ((float *)a.rstd)[row] = rstd;
        slot = 0;
        for (int64_t c = (int64_t)lane * width; c < end; c += step, slot += threads) {
            float v[width], g[width];
            llmpar__cuda_16 factor = llmpar__cuda_read(w + c, end - c, wide), raw;
            if (kept) raw = keep[slot];
            else raw = llmpar__cuda_read(a.residual ? sum + c : x + c, end - c, wide);
            llmpar__cuda_unpack<T>(v, raw);
            llmpar__cuda_unpack<T>(g, factor);
#pragma unroll
            for (int k = 0; k < width; k++) v[k] = __fmul_rn(__fmul_rn(v[k], rstd), g[k]);
            llmpar__cuda_write(y + c, end - c, wide, llmpar__cuda_pack<T>(v));
        }
    }
}

/* How backward is cut. */
typedef struct llmpar__cuda_norm_cut {
    int64_t first, last, share;               /* pieces that have tokens here; sequences a leaf */
    int slots, groups, levels, stages, async; /* pieces side by side; blocks a leaf; levels of the tree over rounds of pieces; stages of the ring; whether copies to it are 16 bytes in the background */
    int lanes, kept, wide, with_dx;           /* rows, for dx */
} llmpar__cuda_norm_cut;

/* dx of two rows: with a = dy w and xhat = x rstd it is dresidual + rstd (a - xhat mean(a xhat)). Every thread of the block calls; a row < 0: none, for its group. */
enum { LLMPAR__CUDA_NORM_ROWS = 2 };
template <typename T> static __device__ __forceinline__ void llmpar__cuda_norm_dx_rows(const llmpar_rmsnorm_backward_args &a, const llmpar__cuda_norm_cut &cut, const int *rows, float *partial, llmpar__cuda_16 *keep)
{
    const int width = llmpar__cuda_vector<T>::count, threads = LLMPAR__CUDA_ROW_THREADS, wide = cut.wide, copies = a.dresidual ? 3 : 2, several = LLMPAR__CUDA_NORM_ROWS;
    const int64_t dim = a.dim, step = (int64_t)cut.lanes * width, begin = (int64_t)((int)threadIdx.x % cut.lanes) * width;
    const T *w = (const T *)a.w;
    float rstd[several], s[several];
    llmpar__cuda_16 *mine = keep;
#pragma unroll
    for (int r = 0; r < several; r++) {
        rstd[r] = rows[r] < 0 ? 0.0f : ((const float *)a.rstd)[rows[r]];
        s[r] = 0;
    }
    for (int64_t c = begin; c < dim; c += step, mine += several * copies * threads) {
        llmpar__cuda_16 raw_x[several], raw_g[several], raw_w = llmpar__cuda_read(w + c, dim - c, wide);
#pragma unroll
        for (int r = 0; r < several; r++) {
            const int64_t at = (int64_t)rows[r] * dim + c;
            if (rows[r] < 0) continue;
            raw_x[r] = llmpar__cuda_read((const T *)a.x + at, dim - c, wide);
            raw_g[r] = llmpar__cuda_read((const T *)a.dy + at, dim - c, wide);
            if (cut.kept && a.dresidual) mine[(r * copies + 2) * threads] = llmpar__cuda_read((const T *)a.dresidual + at, dim - c, wide);
        }
#pragma unroll
        for (int r = 0; r < several; r++) {
            float v[width], g[width], f[width];
            if (rows[r] < 0) continue;
            if (cut.kept) {
                mine[r * copies * threads] = raw_x[r];
                mine[(r * copies + 1) * threads] = raw_g[r];
            }
            llmpar__cuda_unpack<T>(v, raw_x[r]);
            llmpar__cuda_unpack<T>(g, raw_g[r]);
            llmpar__cuda_unpack<T>(f, raw_w);
#pragma unroll
            for (int k = 0; k < width; k++) s[r] = __fmaf_rn(__fmul_rn(g[k], f[k]), __fmul_rn(v[k], rstd[r]), s[r]);
        }
    }
    llmpar__cuda_row_sums<several>(s, cut.lanes, partial);
    mine = keep;
    for (int64_t c = begin; c < dim; c += step, mine += several * copies * threads) {
        llmpar__cuda_16 raw_w = llmpar__cuda_read(w + c, dim - c, wide);
#pragma unroll
        for (int r = 0; r < several; r++) {
            const int64_t at = (int64_t)rows[r] * dim + c;
            const float mean = __fdiv_rn(s[r], (float)dim);
            llmpar__cuda_16 raw_x, raw_g, raw_d = { { 0, 0, 0, 0 } };
            float v[width], g[width], d[width], f[width];
            if (rows[r] < 0) continue;
            if (cut.kept) {
                raw_x = mine[r * copies * threads];
                raw_g = mine[(r * copies + 1) * threads];
                if (a.dresidual) raw_d = mine[(r * copies + 2) * threads];
            } else {
                raw_x = llmpar__cuda_read((const T *)a.x + at, dim - c, wide);
                raw_g = llmpar__cuda_read((const T *)a.dy + at, dim - c, wide);
                if (a.dresidual) raw_d = llmpar__cuda_read((const T *)a.dresidual + at, dim - c, wide);
            }
            llmpar__cuda_unpack<T>(v, raw_x);
            llmpar__cuda_unpack<T>(g, raw_g);
            llmpar__cuda_unpack<T>(d, raw_d);
            llmpar__cuda_unpack<T>(f, raw_w);
#pragma unroll
            for (int k = 0; k < width; k++) {
                float away = __fmaf_rn(__fmul_rn(v[k], rstd[r]), -mean, __fmul_rn(g[k], f[k]));
                d[k] = __fadd_rn(d[k], __fmul_rn(away, rstd[r]));
            }
            llmpar__cuda_write((T *)a.dx + at, dim - c, wide, llmpar__cuda_pack<T>(d));
        }
    }
}

/* dx alone */
template <typename T> static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS, 2) llmpar__cuda_norm_dx(llmpar_rmsnorm_backward_args a, llmpar__cuda_norm_cut cut)
{
    LLMPAR__CUDA_SHARED(unsigned char, shared);
    const int all = (int)(a.tokens.batch * a.tokens.t), at_once = LLMPAR__CUDA_ROW_THREADS / cut.lanes, stride = (int)gridDim.x * at_once * LLMPAR__CUDA_NORM_ROWS;
    float *partial = (float *)(void *)shared;
    llmpar__cuda_16 *keep = (llmpar__cuda_16 *)(void *)(shared + LLMPAR__CUDA_NORM_HEAD) + threadIdx.x;
    int turn = 0;
    for (int first = (int)blockIdx.x * at_once * LLMPAR__CUDA_NORM_ROWS; first < all; first += stride, turn ^= 1) {
        int rows[LLMPAR__CUDA_NORM_ROWS];
#pragma unroll
        for (int r = 0; r < LLMPAR__CUDA_NORM_ROWS; r++) {
            rows[r] = first + r * at_once + (int)threadIdx.x / cut.lanes;
            if (rows[r] >= all) rows[r] = -1;
        }
        llmpar__cuda_norm_dx_rows<T>(a, cut, rows, partial + turn * LLMPAR__CUDA_NORM_PARTIAL, keep);
    }
}

/* The tokens of a piece in a leaf, counted from the leaf's first row: token i lies in sequence i / length. Rows are less than 2^30. */
typedef struct llmpar__cuda_norm_piece { int begin, length; } llmpar__cuda_norm_piece;
static __device__ __forceinline__ int llmpar__cuda_norm_token(const llmpar__cuda_norm_piece &piece, int t, int i)
{
    int sequence = (int)((unsigned)i / (unsigned)piece.length);
    return sequence * t + piece.begin + (i - sequence * piece.length);
}

/* A warp's part of a stage: 128 bytes of each token's x, then of dy, then rstd. The ring is [stage][warp]. */
enum { LLMPAR__CUDA_NORM_TOKENS = 8, LLMPAR__CUDA_NORM_LINE = 128, LLMPAR__CUDA_NORM_DY = LLMPAR__CUDA_NORM_TOKENS * LLMPAR__CUDA_NORM_LINE, LLMPAR__CUDA_NORM_RSTD = 2 * LLMPAR__CUDA_NORM_DY, LLMPAR__CUDA_NORM_STAGE = LLMPAR__CUDA_NORM_RSTD + 4 * LLMPAR__CUDA_NORM_TOKENS };

/* Asks for tokens [i, i + 8) of a piece with `count`; what lies beyond does not come. x, dy: of the leaf's first row at the warp's first column, of which `left` are there. */
template <typename T> static __device__ __forceinline__ void llmpar__cuda_norm_fetch(unsigned char *stage, const T *x, const T *dy, const float *rstd, int64_t dim, int64_t left, const llmpar__cuda_norm_piece &piece, int t, int i, int count, int async)
{
    const int width = llmpar__cuda_vector<T>::count, lane = (int)threadIdx.x % 32, part = lane % 8;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int k = half * 4 + lane / 8;
        unsigned char *to = stage + k * LLMPAR__CUDA_NORM_LINE + part * 16;
        if (i + k >= count || part * width >= left) continue;
        const int64_t from = (int64_t)llmpar__cuda_norm_token(piece, t, i + k) * dim + part * width;
        if (async) {
            llmpar__cu_copy_async(to, x + from, 16);
            llmpar__cu_copy_async(to + LLMPAR__CUDA_NORM_DY, dy + from, 16);
        } else {
            *(llmpar__cuda_16 *)(void *)to = llmpar__cuda_read(x + from, left - part * width, 0);
            *(llmpar__cuda_16 *)(void *)(to + LLMPAR__CUDA_NORM_DY) = llmpar__cuda_read(dy + from, left - part * width, 0);
        }
    }
    if (lane < LLMPAR__CUDA_NORM_TOKENS && i + lane < count) llmpar__cu_copy_async_4(stage + LLMPAR__CUDA_NORM_RSTD + 4 * lane, rstd + llmpar__cuda_norm_token(piece, t, i + lane), 4);
    llmpar__cu_copy_async_commit();
}

/* Shared memory: partial sums of rows, the round's pieces, the chains [warp][columns of a warp], the tree [levels][columns of the block], rows kept, the ring. */
enum { LLMPAR__CUDA_NORM_PIECES = 128 };

template <typename T> static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS, 2) llmpar__cuda_norm_chains(llmpar_rmsnorm_backward_args a, llmpar__cuda_norm_cut cut, int ring_at)
{
    LLMPAR__CUDA_SHARED(unsigned char, shared);
    const int own = 4 / (int)sizeof(T), warp_columns = 32 * own, warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, side = LLMPAR__CUDA_ROW_WARPS / cut.slots, columns = warp_columns * side, slot = warp / side;
    const int group = (int)(blockIdx.x % (unsigned)cut.groups), at_once = LLMPAR__CUDA_ROW_THREADS / cut.lanes, units = (cut.slots * LLMPAR__CUDA_NORM_TOKENS + at_once * LLMPAR__CUDA_NORM_ROWS - 1) / (at_once * LLMPAR__CUDA_NORM_ROWS);
    const int t = (int)a.tokens.t, share = (int)cut.share;
    const int64_t dim = a.dim, leaf = blockIdx.x / (unsigned)cut.groups, row0 = leaf * share * t, first_column = (int64_t)group * columns + warp % side * warp_columns, column = first_column + own * lane;
    float *partial = (float *)(void *)shared, *chains = (float *)(void *)(shared + LLMPAR__CUDA_NORM_HEAD + LLMPAR__CUDA_NORM_PIECES), *own_chains = chains + warp * warp_columns + own * lane, *stack = chains + LLMPAR__CUDA_ROW_WARPS * warp_columns + warp * warp_columns + own * lane;
    llmpar__cuda_norm_piece *pieces = (llmpar__cuda_norm_piece *)(void *)(shared + LLMPAR__CUDA_NORM_HEAD);
    llmpar__cuda_16 *keep = (llmpar__cuda_16 *)(void *)(chains + LLMPAR__CUDA_ROW_WARPS * warp_columns + cut.levels * columns) + threadIdx.x;
    unsigned char *ring = shared + ring_at + warp * LLMPAR__CUDA_NORM_STAGE;
    const T *x = (const T *)a.x + row0 * dim + first_column, *dy = (const T *)a.dy + row0 * dim + first_column;
    const float *rstd = (const float *)a.rstd + row0;
    llmpar__cuda_tree tree = { 0, 0 };
    int turn = 0, passed = 0; /* units of rows, modulo groups */
    for (int64_t round = cut.first / cut.slots; round <= cut.last / cut.slots; round++) {
        llmpar__cuda_norm_piece piece;
        int longest = 0, count, stage = 0, next = cut.stages - 1;
        float sum[own];
        if ((int)threadIdx.x < cut.slots) { /* who read the last round's met at its chains */
            int64_t p = round * cut.slots + (int)threadIdx.x, t0, t1;
            t0 = p < a.tokens.canon ? max(llmpar__cuda_piece_begin(p, a.tokens.t_total, a.tokens.canon), a.tokens.t_begin) - a.tokens.t_begin : 0;
            t1 = p < a.tokens.canon ? min(llmpar__cuda_piece_begin(p + 1, a.tokens.t_total, a.tokens.canon), a.tokens.t_begin + t) - a.tokens.t_begin : 0;
            pieces[threadIdx.x].begin = (int)t0;
            pieces[threadIdx.x].length = (int)max(t1 - t0, (int64_t)0);
        }
        __syncthreads();
        for (int k = 0; k < cut.slots; k++) longest = max(longest, pieces[k].length);
        longest *= share;
        piece = pieces[slot];
        count = piece.length * share;
#pragma unroll
        for (int e = 0; e < own; e++) sum[e] = 0;
        for (int k = 0; k < cut.stages - 1; k++) llmpar__cuda_norm_fetch<T>(ring + k * LLMPAR__CUDA_ROW_WARPS * LLMPAR__CUDA_NORM_STAGE, x, dy, rstd, dim, dim - first_column, piece, t, k * LLMPAR__CUDA_NORM_TOKENS, count, cut.async);
        for (int i = 0; i < longest; i += LLMPAR__CUDA_NORM_TOKENS) {
            const unsigned char *here = ring + stage * LLMPAR__CUDA_ROW_WARPS * LLMPAR__CUDA_NORM_STAGE;
            if (cut.stages == 8) llmpar__cu_copy_async_wait<6>();
            else if (cut.stages == 4) llmpar__cu_copy_async_wait<2>();
            else llmpar__cu_copy_async_wait<0>();
            __syncwarp(); /* all lanes' copies are there; and all have read the stage before, over which the next copies go */
#pragma unroll 4
            for (int k = 0; k < LLMPAR__CUDA_NORM_TOKENS; k++)
                if (i + k < count && column < dim) {
                    const uint32_t word_x = *(const uint32_t *)(const void *)(here + k * LLMPAR__CUDA_NORM_LINE + 4 * lane), word_g = *(const uint32_t *)(const void *)(here + LLMPAR__CUDA_NORM_DY + k * LLMPAR__CUDA_NORM_LINE + 4 * lane);
                    const float r = *(const float *)(const void *)(here + LLMPAR__CUDA_NORM_RSTD + 4 * k);
#pragma unroll
                    for (int e = 0; e < own; e++) {
                        T v, g;
                        llmpar__cuda_set_bits(&v, word_x >> (16 * e));
                        llmpar__cuda_set_bits(&g, word_g >> (16 * e));
                        sum[e] = __fmaf_rn(llmpar__cuda_load(g), __fmul_rn(llmpar__cuda_load(v), r), sum[e]);
                    }
                }
            llmpar__cuda_norm_fetch<T>(ring + next * LLMPAR__CUDA_ROW_WARPS * LLMPAR__CUDA_NORM_STAGE, x, dy, rstd, dim, dim - first_column, piece, t, i + (cut.stages - 1) * LLMPAR__CUDA_NORM_TOKENS, count, cut.async);
            stage = stage + 1 == cut.stages ? 0 : stage + 1;
            next = next + 1 == cut.stages ? 0 : next + 1;
            if (cut.with_dx) { /* the leaf's rows that its blocks have just passed, turn by turn */
                for (int unit = (group - passed + cut.groups) % cut.groups; unit < units; unit += cut.groups, turn ^= 1) {
                    int rows[LLMPAR__CUDA_NORM_ROWS];
#pragma unroll
                    for (int r = 0; r < LLMPAR__CUDA_NORM_ROWS; r++) {
                        const int at = (unit * LLMPAR__CUDA_NORM_ROWS + r) * at_once + (int)threadIdx.x / cut.lanes, k = at / LLMPAR__CUDA_NORM_TOKENS, token = i + at % LLMPAR__CUDA_NORM_TOKENS;
                        rows[r] = -1;
                        if (k < cut.slots && token < pieces[k].length * share) rows[r] = (int)row0 + llmpar__cuda_norm_token(pieces[k], t, token);
                    }
                    llmpar__cuda_norm_dx_rows<T>(a, cut, rows, partial + turn * LLMPAR__CUDA_NORM_PARTIAL, keep);
                }
                passed = (passed + units) % cut.groups;
            }
        }
        /* A fused chain can underflow to -0; as a leaf of the tree it is +0. */
#pragma unroll
        for (int e = 0; e < own; e++) own_chains[e] = __fadd_rn(sum[e], 0.0f);
        __syncthreads();
        if (slot == 0)
            for (int e = 0; e < own; e++) llmpar__cuda_tree_push(&tree, stack + e, columns, round, llmpar__cuda_slot_sum(own_chains + e, cut.slots, columns));
        llmpar__cuda_tree_pushed(&tree, round);
    }
    if (slot == 0)
        for (int e = 0; e < own; e++)
            if (column + e < dim) ((float *)a.dw_leaves)[leaf * dim + column + e] = llmpar__cuda_tree_sum(&tree, stack + e, columns, cut.levels);
}

/* ---- slots ---- */

/* Whether `copies` rows fit beside `used` bytes of shared memory, and how many bytes that makes. */
static int llmpar__cuda_norm_keep(const llmpar__cuda *cuda, int64_t dim, int size, int lanes, int copies, size_t used, size_t *shared)
{
    int64_t vectors = (dim * size + 15) / 16, chunks = (vectors + lanes - 1) / lanes;
    *shared = used;
    if (chunks > (int64_t)(cuda->shared_limit / (16 * LLMPAR__CUDA_ROW_THREADS))) return 0;
    size_t all = used + (size_t)chunks * 16 * LLMPAR__CUDA_ROW_THREADS * (size_t)copies;
    if (all > cuda->shared_limit) return 0;
    *shared = all;
    return 1;
}

template <typename T> static void llmpar__cuda_norm_run_forward(llmpar_device *device, llmpar_stream *stream, const llmpar_rmsnorm_args *args)
{
    const llmpar__cuda *cuda = llmpar__cuda_of(device);
    const int64_t bytes = args->dim * (int64_t)sizeof(T);
    const int lanes = llmpar__cuda_row_lanes(args->dim, (int)sizeof(T)), at_once = LLMPAR__CUDA_ROW_THREADS / lanes;
    const int wide = llmpar__cuda_wide(args->x, bytes) && llmpar__cuda_wide(args->residual, bytes) && llmpar__cuda_wide(args->w, bytes) && llmpar__cuda_wide(args->y, bytes) && (!args->residual || llmpar__cuda_wide(args->sum, bytes));
    size_t shared;
    const int kept = llmpar__cuda_norm_keep(cuda, args->dim, (int)sizeof(T), lanes, 1, LLMPAR__CUDA_NORM_HEAD, &shared);
    llmpar__cuda_launch(device, stream, llmpar__cuda_norm_forward<T>, dim3(llmpar__cuda_row_blocks(cuda, (args->rows + at_once - 1) / at_once, 4)), dim3(LLMPAR__CUDA_ROW_THREADS), shared, *args, lanes, kept, wide);
}

static llmpar_status llmpar__cuda_rmsnorm(llmpar_device *device, llmpar_stream *stream, const llmpar_rmsnorm_args *args)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "rmsnorm", args->dtype, 1);
    if (status || args->rows <= 0 || args->dim <= 0) return status;
    LLMPAR__CUDA_BY_DTYPE(args->dtype, llmpar__cuda_norm_run_forward, device, stream, args);
    return llmpar__cuda_end(device, stream, "rmsnorm");
}

/* First grain of a piece, cut to this call's positions. */
static int64_t llmpar__cuda_norm_position(const llmpar_tokens *tokens, int64_t piece)
{
    int64_t at = llmpar__cuda_piece_begin(piece, tokens->t_total, tokens->canon) - tokens->t_begin;
    return at < 0 ? 0 : at > tokens->t ? tokens->t : at;
}

template <typename T> static void llmpar__cuda_norm_run_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_rmsnorm_backward_args *args)
{
    const llmpar__cuda *cuda = llmpar__cuda_of(device);
    const llmpar_tokens *tokens = &args->tokens;
    const int64_t bytes = args->dim * (int64_t)sizeof(T), rows = tokens->batch * tokens->t;
    const int copies = LLMPAR__CUDA_NORM_ROWS * (args->dresidual ? 3 : 2);
    llmpar__cuda_norm_cut cut;
    size_t shared;
    int done = 0;
    memset(&cut, 0, sizeof cut);
    cut.lanes = llmpar__cuda_row_lanes(args->dim, (int)sizeof(T));
    cut.wide = llmpar__cuda_wide(args->dy, bytes) && llmpar__cuda_wide(args->x, bytes) && llmpar__cuda_wide(args->w, bytes) && llmpar__cuda_wide(args->dresidual, bytes) && llmpar__cuda_wide(args->dx, bytes);
    if (args->dw_leaves && tokens->leaves > 0) {
        const size_t stage = (size_t)LLMPAR__CUDA_ROW_WARPS * LLMPAR__CUDA_NORM_STAGE, half = (cuda->shared_limit + 1024) / 2 - 1024; /* two blocks a multiprocessor; the driver takes 1 KiB of each */
        const int warp_columns = LLMPAR__CUDA_NORM_LINE / (int)sizeof(T);
        int64_t blocks;
        int columns;
        size_t head;
        cut.last = tokens->canon - 1;
        while (cut.first < cut.last && llmpar__cuda_norm_position(tokens, cut.first) >= llmpar__cuda_norm_position(tokens, cut.first + 1)) cut.first++;
        while (cut.last > cut.first && llmpar__cuda_norm_position(tokens, cut.last) >= llmpar__cuda_norm_position(tokens, cut.last + 1)) cut.last--;
        cut.share = tokens->batch / tokens->leaves;
        cut.slots = llmpar__cuda_slots(cut.last + 1 - cut.first);
        columns = LLMPAR__CUDA_ROW_WARPS / cut.slots * warp_columns;
        cut.groups = (int)((args->dim + columns - 1) / columns);
        cut.levels = llmpar__cuda_tree_levels(cut.last / cut.slots);
        cut.async = llmpar__cuda_wide(args->x, bytes) && llmpar__cuda_wide(args->dy, bytes);
        blocks = tokens->leaves * cut.groups;
        cut.with_dx = done = args->dx != args->dy && blocks >= cuda->multiprocessors;
        head = shared = LLMPAR__CUDA_NORM_HEAD + LLMPAR__CUDA_NORM_PIECES + (size_t)(LLMPAR__CUDA_ROW_WARPS * warp_columns + cut.levels * columns) * sizeof(float);
        cut.stages = blocks > cuda->multiprocessors ? 4 : 8;
        if (done) cut.kept = llmpar__cuda_norm_keep(cuda, args->dim, (int)sizeof(T), cut.lanes, copies, head, &shared);
        if (cut.stages == 4 && shared + 4 * stage > half && shared + 2 * stage <= half) cut.stages = 2;
        if (shared + (size_t)cut.stages * stage > cuda->shared_limit) cut.stages = 2;
        if (shared + (size_t)cut.stages * stage > cuda->shared_limit) {
            cut.kept = 0;
            shared = head;
        }
        llmpar__cuda_launch(device, stream, llmpar__cuda_norm_chains<T>, dim3((unsigned)blocks), dim3(LLMPAR__CUDA_ROW_THREADS), shared + (size_t)cut.stages * stage, *args, cut, (int)shared);
    }
    if (done || rows <= 0) return;
    cut.kept = llmpar__cuda_norm_keep(cuda, args->dim, (int)sizeof(T), cut.lanes, copies, LLMPAR__CUDA_NORM_HEAD, &shared);
    const int64_t at_once = LLMPAR__CUDA_ROW_THREADS / cut.lanes * LLMPAR__CUDA_NORM_ROWS;
    llmpar__cuda_launch(device, stream, llmpar__cuda_norm_dx<T>, dim3(llmpar__cuda_row_blocks(cuda, (rows + at_once - 1) / at_once, 4)), dim3(LLMPAR__CUDA_ROW_THREADS), shared, *args, cut);
}

/* FAST, and the plain order that nothing guarantees (one leaf, canon 1; exact = off): one chain over all tokens, which a handful of blocks would walk. Instead as many parts of the tokens as give every multiprocessor
   a block, in eight pieces each; their sums meet in the workspace of the stream's products. 0: the order of the call. */
enum { LLMPAR__CUDA_NORM_PARTS = 64 };
static int64_t llmpar__cuda_norm_parts(llmpar_device *device, const llmpar_rmsnorm_backward_args *args)
{
    const llmpar__cuda *cuda = llmpar__cuda_of(device);
    const int64_t rows = args->tokens.batch * args->tokens.t, groups = (args->dim * (int64_t)llmpar_dtype_size(args->dtype) + LLMPAR__CUDA_NORM_LINE - 1) / LLMPAR__CUDA_NORM_LINE;
    int64_t parts = 1;
    if (cuda->desc.mode != LLMPAR_CUDA_FAST || args->tokens.leaves != 1 || args->tokens.canon != 1 || !args->dw_leaves) return 0;
    while (parts < LLMPAR__CUDA_NORM_PARTS && parts * groups < cuda->multiprocessors && rows % (2 * parts) == 0 && rows / (2 * parts) >= 64 && (size_t)(2 * parts * args->dim) * sizeof(float) <= cuda->desc.library_workspace) parts *= 2;
    return parts;
}

static llmpar_status llmpar__cuda_rmsnorm_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_rmsnorm_backward_args *args)
{
    const llmpar_tokens *tokens = &args->tokens;
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "rmsnorm_backward", args->dtype, 1);
    if (status || args->dim <= 0) return status;
    if (args->dw_leaves && tokens->leaves > 0 && (tokens->canon < 1 || tokens->batch % tokens->leaves))
        return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "rmsnorm_backward: %lld leaves for batch %lld, canon %d: expected leaves that divide the batch, canon >= 1", (long long)tokens->leaves, (long long)tokens->batch, (int)tokens->canon);
    if (tokens->batch > 0 && tokens->t > ((int64_t)1 << 30) / tokens->batch - 1)
        return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "rmsnorm_backward: %lld sequences of %lld rows, expected less than 2^30 rows in all on device %s", (long long)tokens->batch, (long long)tokens->t, device->name);
    llmpar_rmsnorm_backward_args own = *args;
    const int64_t parts = llmpar__cuda_norm_parts(device, args);
    void *sums = llmpar__cuda_stream_of(device, stream)->library;
    if (parts) {
        own.tokens.batch = own.tokens.leaves = parts;
        own.tokens.t = own.tokens.t_total = tokens->batch * tokens->t / parts;
        own.tokens.t_begin = 0;
        own.tokens.canon = LLMPAR__CUDA_ROW_WARPS;
        if (parts > 1) own.dw_leaves = sums;
    }
    LLMPAR__CUDA_BY_DTYPE(args->dtype, llmpar__cuda_norm_run_backward, device, stream, &own);
    if (parts > 1) {
        const void *in[LLMPAR__CUDA_NORM_PARTS];
        llmpar_tree_sum_args sum = { in, (int32_t)parts, (size_t)args->dim, args->dw_leaves, LLMPAR_F32 };
        for (int64_t i = 0; i < parts; i++) in[i] = (const float *)sums + i * args->dim;
        return llmpar__cuda_tree_sum(device, stream, &sum);
    }
    return llmpar__cuda_end(device, stream, "rmsnorm_backward");
}
/* ==== src/cuda/rope.cu ==== */
/* rope: rotary position embedding in place (Su et al. 2021), half-split order: (a, b) = (x[i], x[i + E/2]) becomes (a cos - b sin, b cos + a sin); the inverse has -sin.
   A thread takes 16 bytes of a head's first half and the 16 bytes of its second half that they turn with; where halves are no multiple of that, or memory is not aligned, less, or one by one. */

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
/* ==== src/cuda/swiglu.cu ==== */
/* swiglu: h = gate * sigmoid(gate) * up (Shazeer 2020), forward and backward, element-wise: a thread takes 16 bytes of a row. */

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
/* ==== src/cuda/embedding.cu ==== */
/* embedding: rows of a vocab-sharded table by id, and its gradient.

   Backward adds nothing atomically. Tokens are sorted by id, stably (radix sort with counts; Knuth vol. 3, section 5.2.5), so that each row of the table finds its tokens in order; then a row's sum is a chain in each leaf and a
   tree over leaves (docs/exact.md):
     1. for each digit of the ids: count digits in tiles of tokens, turn counts into places, move
     2. where each id's tokens begin, by search, and a list of the ids with more than 3 tokens, in any order
     3. all rows of the table but those: most are zeros; up to 3 tokens have few trees
     4. the listed rows: leaves side by side in the warps of a block, 64 columns at a time

   workspace: | keys | tokens | keys | tokens |  the two sides of a pass, a u32 a token each, | counts [digit][tile] | begin [v_local + 1] | listed | list | */

enum { LLMPAR__CUDA_SORT_TILE = 2048, LLMPAR__CUDA_SORT_DIGITS = 256, LLMPAR__CUDA_SORT_STEPS = LLMPAR__CUDA_SORT_TILE / LLMPAR__CUDA_ROW_THREADS, LLMPAR__CUDA_EMBEDDING_FEW = 3 };

/* ---- forward: a select ---- */

template <typename U> static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS) llmpar__cuda_embedding_rows(llmpar_embedding_args a, int64_t units)
{
    const int64_t total = a.rows * units;
    for (int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; at < total; at += (int64_t)gridDim.x * blockDim.x) {
        const int64_t row = llmpar__cuda_divide(at, units), id = (int64_t)a.ids[row] - a.v_begin;
        U x;
        if (id >= 0 && id < a.v_local) x = ((const U *)a.table)[id * units + at - row * units];
        else memset(&x, 0, sizeof x);
        ((U *)a.out)[at] = x;
    }
}
template <typename U> static void llmpar__cuda_embedding_run(llmpar_device *device, llmpar_stream *stream, const llmpar_embedding_args *args, int64_t bytes)
{
    const int64_t units = bytes / (int64_t)sizeof(U);
    llmpar__cuda_launch(device, stream, llmpar__cuda_embedding_rows<U>, dim3(llmpar__cuda_blocks(llmpar__cuda_of(device), args->rows * units, LLMPAR__CUDA_ROW_THREADS, 4)), dim3(LLMPAR__CUDA_ROW_THREADS), 0, *args, units);
}

static llmpar_status llmpar__cuda_embedding(llmpar_device *device, llmpar_stream *stream, const llmpar_embedding_args *args)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "embedding", args->dtype, 1);
    if (status || args->rows <= 0 || args->dim <= 0) return status;
    const int64_t bytes = args->dim * (int64_t)llmpar_dtype_size(args->dtype);
    const uint64_t places = (uint64_t)(uintptr_t)args->table | (uint64_t)(uintptr_t)args->out | (uint64_t)bytes;
    if (places % 16 == 0) llmpar__cuda_embedding_run<llmpar__cuda_16>(device, stream, args, bytes);
    else if (places % 4 == 0) llmpar__cuda_embedding_run<uint32_t>(device, stream, args, bytes);
    else llmpar__cuda_embedding_run<uint16_t>(device, stream, args, bytes);
    return llmpar__cuda_end(device, stream, "embedding");
}

/* ---- sorting ---- */

/* One pass: sorts by `bits` bits of the key from bit `shift` on. ids: the first pass takes keys from them, and tokens in order; an id of another shard has the key v_local. */
typedef struct llmpar__cuda_sort {
    int64_t count, tiles, v_begin, v_local;
    const int32_t *ids;
    const uint32_t *keys, *tokens;
    uint32_t *keys_out, *tokens_out, *counts, *listed;
    int bits, shift;
} llmpar__cuda_sort;

static __device__ __forceinline__ uint32_t llmpar__cuda_sort_key(const llmpar__cuda_sort &s, int64_t i)
{
    if (!s.ids) return s.keys[i];
    int64_t id = (int64_t)s.ids[i] - s.v_begin;
    return (uint32_t)(id >= 0 && id < s.v_local ? id : s.v_local);
}

static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS) llmpar__cuda_sort_count(llmpar__cuda_sort s)
{
    LLMPAR__CUDA_SHARED(unsigned, counts); /* [digit] */
    const int digits = 1 << s.bits;
    for (int d = (int)threadIdx.x; d < digits; d += LLMPAR__CUDA_ROW_THREADS) counts[d] = 0;
    __syncthreads();
    for (int j = 0; j < LLMPAR__CUDA_SORT_STEPS; j++) {
        int64_t i = (int64_t)blockIdx.x * LLMPAR__CUDA_SORT_TILE + j * LLMPAR__CUDA_ROW_THREADS + (int)threadIdx.x;
        if (i < s.count) atomicAdd(&counts[llmpar__cuda_sort_key(s, i) >> s.shift & (unsigned)(digits - 1)], 1u);
    }
    __syncthreads();
    for (int d = (int)threadIdx.x; d < digits; d += LLMPAR__CUDA_ROW_THREADS) s.counts[(int64_t)d * s.tiles + blockIdx.x] = counts[d];
}

/* counts[i] becomes the sum of those before it. One block. */
static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS) llmpar__cuda_sort_places(llmpar__cuda_sort s)
{
    LLMPAR__CUDA_SHARED(unsigned, warps);
    const int64_t total = s.tiles << s.bits;
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    unsigned before = 0;
    if (threadIdx.x == 0) *s.listed = 0;
    for (int64_t first = 0; first < total; first += LLMPAR__CUDA_SORT_TILE) {
        const int64_t begin = first + (int64_t)threadIdx.x * LLMPAR__CUDA_SORT_STEPS;
        unsigned own[LLMPAR__CUDA_SORT_STEPS], sum = 0, up, all = 0, mine = before;
#pragma unroll
        for (int j = 0; j < LLMPAR__CUDA_SORT_STEPS; j++) {
            own[j] = begin + j < total ? s.counts[begin + j] : 0;
            sum += own[j];
        }
        up = sum;
        for (int o = 1; o < 32; o *= 2) {
            unsigned other = __shfl_up_sync(0xffffffffu, up, (unsigned)o);
            if (lane >= o) up += other;
        }
        if (lane == 31) warps[warp] = up;
        __syncthreads();
        for (int k = 0; k < LLMPAR__CUDA_ROW_WARPS; k++) {
            if (k < warp) mine += warps[k];
            all += warps[k];
        }
        __syncthreads();
        mine += up - sum;
#pragma unroll
        for (int j = 0; j < LLMPAR__CUDA_SORT_STEPS; j++) {
            if (begin + j < total) s.counts[begin + j] = mine;
            mine += own[j];
        }
        before += all;
    }
}

/* Each warp moves a contiguous part of the tile, 32 tokens at a time: of equal digits the lower lane goes first. */
static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS) llmpar__cuda_sort_move(llmpar__cuda_sort s)
{
    LLMPAR__CUDA_SHARED(unsigned, places); /* [warp][digit]: counts, then where the warp's next token with this digit goes */
    const int digits = 1 << s.bits, warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    const int64_t first = (int64_t)blockIdx.x * LLMPAR__CUDA_SORT_TILE + warp * 32 * LLMPAR__CUDA_SORT_STEPS + lane;
    unsigned *own = places + warp * digits;
    for (int d = (int)threadIdx.x; d < LLMPAR__CUDA_ROW_WARPS * digits; d += LLMPAR__CUDA_ROW_THREADS) places[d] = 0;
    __syncthreads();
    for (int j = 0; j < LLMPAR__CUDA_SORT_STEPS; j++)
        if (first + j * 32 < s.count) atomicAdd(&own[llmpar__cuda_sort_key(s, first + j * 32) >> s.shift & (unsigned)(digits - 1)], 1u);
    __syncthreads();
    for (int d = (int)threadIdx.x; d < digits; d += LLMPAR__CUDA_ROW_THREADS) {
        unsigned next = s.counts[(int64_t)d * s.tiles + blockIdx.x];
        for (int k = 0; k < LLMPAR__CUDA_ROW_WARPS; k++) {
            unsigned count = places[k * digits + d];
            places[k * digits + d] = next;
            next += count;
        }
    }
    __syncthreads();
    for (int j = 0; j < LLMPAR__CUDA_SORT_STEPS; j++) {
        const int64_t i = first + j * 32;
        const int valid = i < s.count;
        const uint32_t key = valid ? llmpar__cuda_sort_key(s, i) : 0;
        const unsigned digit = key >> s.shift & (unsigned)(digits - 1);
        unsigned same = __ballot_sync(0xffffffffu, valid), place = 0;
        for (int b = 0; b < s.bits; b++) {
            unsigned set = __ballot_sync(0xffffffffu, (int)(digit >> b & 1u));
            same &= digit >> b & 1u ? set : ~set;
        }
        const unsigned rank = (unsigned)__popc(same & ((1u << lane) - 1u));
        if (valid) place = own[digit] + rank;
        __syncwarp();
        if (valid && rank == 0) own[digit] += (unsigned)__popc(same);
        __syncwarp(); /* no test can tell: the ballots for the next tokens meet here too, but they order no memory */
        if (valid) {
            s.keys_out[place] = key;
            s.tokens_out[place] = s.ids ? (uint32_t)i : s.tokens[i];
        }
    }
}

/* ---- backward ---- */

typedef struct llmpar__cuda_embedding_job {
    const uint32_t *keys, *tokens; /* sorted */
    uint32_t *begin, *listed, *list;
    int64_t leaf_rows;
    int slots, groups, levels, pair; /* leaves side by side; parts of a row's columns; levels of the tree over rounds of leaves; two columns at a time */
    int lanes, wide, four;           /* for rows with few tokens: threads a row of the table; whether its rows are aligned to 16 bytes; whether those of dout to four columns */
} llmpar__cuda_embedding_job;

/* The first i in [low, high) with x[i] >= value, else high. */
static __device__ __forceinline__ int64_t llmpar__cuda_embedding_search(const uint32_t *x, int64_t low, int64_t high, int64_t value)
{
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if ((int64_t)x[middle] < value) low = middle + 1;
        else high = middle;
    }
    return low;
}

static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS) llmpar__cuda_embedding_begins(llmpar_embedding_backward_args a, llmpar__cuda_embedding_job job)
{
    const int64_t count = a.tokens.batch * a.tokens.t;
    for (int64_t v = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; v <= a.v_local; v += (int64_t)gridDim.x * blockDim.x) {
        const int64_t begin = llmpar__cuda_embedding_search(job.keys, 0, count, v);
        job.begin[v] = (uint32_t)begin;
        if (v < a.v_local && begin + LLMPAR__CUDA_EMBEDDING_FEW < count && (int64_t)job.keys[begin + LLMPAR__CUDA_EMBEDDING_FEW] == v) job.list[atomicAdd(job.listed, 1u)] = (uint32_t)v;
    }
}

/* Rows with at most 3 tokens. Two tokens have one sum, whatever their leaves; the third joins the first two, or the second first, where that parts from the first higher up than from the third. */
template <typename T> static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS) llmpar__cuda_embedding_few(llmpar_embedding_backward_args a, llmpar__cuda_embedding_job job)
{
    const int at_once = LLMPAR__CUDA_ROW_THREADS / job.lanes;
    const int64_t dim = a.dim;
    for (int64_t first = (int64_t)blockIdx.x * at_once; first < a.v_local; first += (int64_t)gridDim.x * at_once) {
        const int64_t v = first + (int)threadIdx.x / job.lanes;
        if (v >= a.v_local) continue;
        const int64_t begin = job.begin ? job.begin[v] : 0, count = job.begin ? job.begin[v + 1] - begin : 0;
        const T *in[LLMPAR__CUDA_EMBEDDING_FEW];
        float *out = (float *)a.dtable + v * dim;
        int right = 0; /* the last two first */
        if (count > LLMPAR__CUDA_EMBEDDING_FEW) continue;
        for (int j = 0; j < LLMPAR__CUDA_EMBEDDING_FEW; j++) in[j] = (const T *)a.dout + (j < count ? (int64_t)job.tokens[begin + j] * dim : 0);
        if (count == LLMPAR__CUDA_EMBEDDING_FEW) {
            uint64_t leaf[LLMPAR__CUDA_EMBEDDING_FEW];
            for (int j = 0; j < LLMPAR__CUDA_EMBEDDING_FEW; j++) leaf[j] = (uint64_t)llmpar__cuda_divide(job.tokens[begin + j], job.leaf_rows);
            right = (leaf[0] ^ leaf[1]) > (leaf[1] ^ leaf[2]);
        }
        for (int64_t c = (int64_t)((int)threadIdx.x % job.lanes) * 4; c < dim; c += 4 * job.lanes) {
            float x[LLMPAR__CUDA_EMBEDDING_FEW][4];
#pragma unroll
            for (int j = 0; j < LLMPAR__CUDA_EMBEDDING_FEW; j++) {
                llmpar__cuda_four<T> four;
                if (j < count && job.four) four = *(const llmpar__cuda_four<T> *)(const void *)(in[j] + c);
#pragma unroll
                for (int k = 0; k < 4; k++) x[j][k] = j < count && c + k < dim ? __fadd_rn(0.0f, llmpar__cuda_load(job.four ? four.x[k] : in[j][c + k])) : 0.0f;
            }
#pragma unroll
            for (int k = 0; k < 4; k++) x[0][k] = right ? __fadd_rn(x[0][k], __fadd_rn(x[1][k], x[2][k])) : __fadd_rn(__fadd_rn(x[0][k], x[1][k]), x[2][k]);
            llmpar__cuda_write(out + c, dim - c, job.wide, llmpar__cuda_pack<float>(x[0]));
        }
    }
}

/* The listed rows. Each warp of a block has a leaf (of `slots` side by side) and 64 columns. Rounds of leaves without tokens are passed over. */
template <typename T> static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS, 2) llmpar__cuda_embedding_many(llmpar_embedding_backward_args a, llmpar__cuda_embedding_job job)
{
    LLMPAR__CUDA_SHARED(float, chains); /* [warp][64], then the tree [levels][columns] */
    const int batch = 16, warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, side = LLMPAR__CUDA_ROW_WARPS / job.slots, columns = 64 * side, slot = warp / side;
    const int64_t dim = a.dim, round_rows = job.leaf_rows * job.slots, units = (int64_t)*job.listed * job.groups;
    float *own = chains + warp * 64 + 2 * lane, *stack = chains + 64 * LLMPAR__CUDA_ROW_WARPS + warp * 64 + 2 * lane;
    for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
        const int64_t which = llmpar__cuda_divide(unit, job.groups), column = (unit - which * job.groups) * columns + warp % side * 64 + 2 * lane, v = job.list[which], end = job.begin[v + 1];
        const T *in = (const T *)a.dout + column;
        llmpar__cuda_tree tree = { 0, 0 };
        for (int64_t at = job.begin[v]; at < end;) {
            const int64_t round = llmpar__cuda_divide(job.tokens[at], round_rows), leaf = round * job.slots + slot;
            const int64_t next = llmpar__cuda_embedding_search(job.tokens, at, end, (round + 1) * round_rows);
            const int64_t from = llmpar__cuda_embedding_search(job.tokens, at, next, leaf * job.leaf_rows), to = llmpar__cuda_embedding_search(job.tokens, from, next, (leaf + 1) * job.leaf_rows);
            float low = 0, high = 0;
            for (int64_t i = from; i < to; i += batch) {
                llmpar__cuda_two<T> x[batch];
                const uint32_t token = i + lane < to && lane < batch ? job.tokens[i + lane] : 0;
#pragma unroll
                for (int k = 0; k < batch; k++) {
                    const int64_t row = __shfl_sync(0xffffffffu, token, k);
                    if (i + k < to && column < dim) x[k] = llmpar__cuda_read_two(in + row * dim, dim - column, job.pair);
                }
#pragma unroll
                for (int k = 0; k < batch; k++)
                    if (i + k < to && column < dim) {
                        low = __fadd_rn(low, llmpar__cuda_low<T>(x[k]));
                        high = __fadd_rn(high, llmpar__cuda_high<T>(x[k]));
                    }
            }
            __syncthreads(); /* the last round's chains were read */
            own[0] = low;
            own[1] = high;
            __syncthreads();
            if (slot == 0)
                for (int k = 0; k < 2; k++) llmpar__cuda_tree_push(&tree, stack + k, columns, round, llmpar__cuda_slot_sum(own + k, job.slots, columns));
            llmpar__cuda_tree_pushed(&tree, round);
            at = next;
        }
        if (slot == 0)
            for (int k = 0; k < 2; k++)
                if (column + k < dim) ((float *)a.dtable)[v * dim + column + k] = llmpar__cuda_tree_sum(&tree, stack + k, columns, job.levels);
    }
}

/* ---- slot ---- */

/* Where things lie in the workspace, in u32; returns how many. */
typedef struct llmpar__cuda_embedding_layout { int64_t rows, tiles, v_local, keys[2], tokens[2], counts, begin, listed, list; } llmpar__cuda_embedding_layout;
static int64_t llmpar__cuda_embedding_lay(const llmpar_embedding_backward_args *args, llmpar__cuda_embedding_layout *l)
{
    const int64_t rows = args->tokens.batch * args->tokens.t;
    int64_t at = 0;
    l->rows = rows > 0 ? rows : 0;
    l->v_local = args->v_local > 0 ? args->v_local : 0;
    l->tiles = (l->rows + LLMPAR__CUDA_SORT_TILE - 1) / LLMPAR__CUDA_SORT_TILE;
    for (int i = 0; i < 2; i++) {
        l->keys[i] = at;
        at += l->rows;
        l->tokens[i] = at;
        at += l->rows;
    }
    l->counts = at;
    at += l->tiles * LLMPAR__CUDA_SORT_DIGITS;
    l->begin = at;
    at += l->v_local + 1;
    l->listed = at++;
    l->list = at;
    return at + l->rows / (LLMPAR__CUDA_EMBEDDING_FEW + 1);
}

static size_t llmpar__cuda_embedding_backward_workspace(llmpar_device *device, const llmpar_embedding_backward_args *args)
{
    llmpar__cuda_embedding_layout l;
    (void)device;
    return (size_t)llmpar__cuda_embedding_lay(args, &l) * sizeof(uint32_t) + sizeof(uint32_t);
}

/* Sorts; job->keys and job->tokens name the side with the result. */
static void llmpar__cuda_embedding_sort(llmpar_device *device, llmpar_stream *stream, const llmpar_embedding_backward_args *args, const llmpar__cuda_embedding_layout *l, uint32_t *base, llmpar__cuda_embedding_job *job)
{
    llmpar__cuda_sort s;
    int bits = 1, passes;
    while (l->v_local >> bits) bits++;
    passes = (bits + 7) / 8;
    memset(&s, 0, sizeof s);
    s.count = l->rows;
    s.tiles = l->tiles;
    s.v_begin = args->v_begin;
    s.v_local = l->v_local;
    s.counts = base + l->counts;
    s.listed = base + l->listed;
    s.bits = (bits + passes - 1) / passes;
    for (int pass = 0; pass < passes; pass++) {
        s.ids = pass ? NULL : args->ids;
        s.keys = base + l->keys[(pass + 1) % 2];
        s.tokens = base + l->tokens[(pass + 1) % 2];
        s.keys_out = base + l->keys[pass % 2];
        s.tokens_out = base + l->tokens[pass % 2];
        s.shift = pass * s.bits;
        llmpar__cuda_launch(device, stream, llmpar__cuda_sort_count, dim3((unsigned)s.tiles), dim3(LLMPAR__CUDA_ROW_THREADS), ((size_t)1 << s.bits) * sizeof(unsigned), s);
        llmpar__cuda_launch(device, stream, llmpar__cuda_sort_places, dim3(1), dim3(LLMPAR__CUDA_ROW_THREADS), LLMPAR__CUDA_ROW_WARPS * sizeof(unsigned), s);
        llmpar__cuda_launch(device, stream, llmpar__cuda_sort_move, dim3((unsigned)s.tiles), dim3(LLMPAR__CUDA_ROW_THREADS), (LLMPAR__CUDA_ROW_WARPS * sizeof(unsigned)) << s.bits, s);
    }
    job->keys = s.keys_out;
    job->tokens = s.tokens_out;
}

template <typename T> static void llmpar__cuda_embedding_run_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_embedding_backward_args *args, const llmpar__cuda_embedding_layout *l, uint32_t *base)
{
    const llmpar__cuda *cuda = llmpar__cuda_of(device);
    llmpar__cuda_embedding_job job;
    memset(&job, 0, sizeof job);
    job.lanes = llmpar__cuda_row_lanes(args->dim, 4);
    job.wide = llmpar__cuda_wide(args->dtable, args->dim * 4);
    job.four = args->dim % 4 == 0 && (uintptr_t)args->dout % (4 * sizeof(T)) == 0;
    const int at_once = LLMPAR__CUDA_ROW_THREADS / job.lanes;
    if (l->rows > 0) {
        llmpar__cuda_embedding_sort(device, stream, args, l, base, &job);
        job.begin = base + l->begin;
        job.listed = base + l->listed;
        job.list = base + l->list;
        job.leaf_rows = args->tokens.batch / args->tokens.leaves * args->tokens.t;
        llmpar__cuda_launch(device, stream, llmpar__cuda_embedding_begins, dim3(llmpar__cuda_blocks(cuda, l->v_local + 1, LLMPAR__CUDA_ROW_THREADS, 4)), dim3(LLMPAR__CUDA_ROW_THREADS), 0, *args, job);
    }
    llmpar__cuda_launch(device, stream, llmpar__cuda_embedding_few<T>, dim3(llmpar__cuda_row_blocks(cuda, (l->v_local + at_once - 1) / at_once, 4)), dim3(LLMPAR__CUDA_ROW_THREADS), 0, *args, job);
    if (l->rows <= LLMPAR__CUDA_EMBEDDING_FEW) return;
    job.slots = llmpar__cuda_slots(args->tokens.leaves);
    const int columns = LLMPAR__CUDA_ROW_WARPS / job.slots * 64;
    job.groups = (int)((args->dim + columns - 1) / columns);
    job.levels = llmpar__cuda_tree_levels((args->tokens.leaves - 1) / job.slots);
    job.pair = llmpar__cuda_pair(args->dout, args->dim, (int)sizeof(T));
    llmpar__cuda_launch(device, stream, llmpar__cuda_embedding_many<T>, dim3(llmpar__cuda_row_blocks(cuda, l->rows / (LLMPAR__CUDA_EMBEDDING_FEW + 1) * job.groups, 4)), dim3(LLMPAR__CUDA_ROW_THREADS), (size_t)(64 * LLMPAR__CUDA_ROW_WARPS + job.levels * columns) * sizeof(float), *args, job);
}

static llmpar_status llmpar__cuda_embedding_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_embedding_backward_args *args)
{
    const size_t need = llmpar__cuda_embedding_backward_workspace(device, args);
    llmpar__cuda_embedding_layout l;
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "embedding_backward", args->dtype, 1);
    if (status || args->v_local <= 0 || args->dim <= 0) return status;
    llmpar__cuda_embedding_lay(args, &l);
    if (l.rows > 0 && (args->tokens.leaves < 1 || args->tokens.batch % args->tokens.leaves))
        return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "embedding_backward: %lld leaves for batch %lld, expected leaves that divide the batch", (long long)args->tokens.leaves, (long long)args->tokens.batch);
    if (l.rows > 0x7fffffff || l.v_local > 0x7ffffffe)
        return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "embedding_backward: %lld tokens and %lld rows of the table, expected less than 2^31 each on device %s", (long long)l.rows, (long long)l.v_local, device->name);
    if (!args->workspace || args->workspace_bytes < need)
        return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "embedding_backward: workspace of %llu bytes, expected %llu", (unsigned long long)args->workspace_bytes, (unsigned long long)need);
    uint32_t *base = (uint32_t *)(((uintptr_t)args->workspace + 3u) & ~(uintptr_t)3u);
    LLMPAR__CUDA_BY_DTYPE(args->dtype, llmpar__cuda_embedding_run_backward, device, stream, args, &l, base);
    return llmpar__cuda_end(device, stream, "embedding_backward");
}
/* ==== src/cuda/xent.cu ==== */
/* xent: vocab-parallel softmax cross-entropy in steps (Shoeybi et al. 2019, section 3): row maximum, sum of exp in vocabulary pieces, gradient in place. (The loss, which adds into the exact accumulator: xent_loss.cu.)
   The maximum has no order, and the gradient is element-wise. A piece's sum belongs to one warp, whose lanes count from the piece's begin: each lane takes 16 bytes of columns, again and again 512 bytes further on, adds the 16 bytes up as a tree
   and these in a chain; then a tree over the lanes. So a shard's border at a piece's border changes nothing. The warps of a block are pieces of a row, side by side, and rows where a shard has few pieces. */

/* The largest over the lanes of a row, as llmpar__cuda_row_sum; NaN if one is. */
static __device__ __forceinline__ float llmpar__cuda_row_max(float x, int lanes, float *partial)
{
    for (int o = (lanes < 32 ? lanes : 32) / 2; o > 0; o /= 2) x = llmpar__cuda_larger(x, __shfl_xor_sync(0xffffffffu, x, o));
    if (lanes > 32) {
        const int warps = lanes / 32, warp = (int)threadIdx.x / 32, first = warp - warp % warps;
        if (threadIdx.x % 32 == 0) partial[warp] = x;
        __syncthreads();
        for (int k = 0; k < warps; k++) x = llmpar__cuda_larger(x, partial[first + k]);
    }
    return x;
}

/* Columns are counted from 16 bytes of aligned memory, `shift` elements before the row's first: what lies before the row or behind it is masked. */
template <typename T> static __device__ __forceinline__ int llmpar__cuda_xent_shift(const T *row) { return (int)((uintptr_t)row % 16 / sizeof(T)); }

template <typename T> static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS) llmpar__cuda_xent_rows_max(llmpar_xent_args a, int lanes)
{
    LLMPAR__CUDA_SHARED(float, partial);
    const int width = llmpar__cuda_vector<T>::count, lane = (int)threadIdx.x % lanes, at_once = LLMPAR__CUDA_ROW_THREADS / lanes, together = 4;
    const int64_t step = (int64_t)lanes * width;
    int turn = 0;
    for (int64_t first = (int64_t)blockIdx.x * at_once; first < a.rows; first += (int64_t)gridDim.x * at_once, turn ^= 1) {
        const int64_t row = first + (int)threadIdx.x / lanes, end = row < a.rows ? a.v_local : 0;
        const T *x = (const T *)a.logits + (end ? row * a.ld : 0);
        const int shift = llmpar__cuda_xent_shift(x);
        float most = llmpar__cuda_minus_infinity();
        for (int64_t c = (int64_t)lane * width - shift; c < end; c += together * step) {
            llmpar__cuda_16 raw[together];
#pragma unroll
            for (int j = 0; j < together; j++) {
                const int64_t at = c + j * step;
                if (at >= 0 && at + width <= end) raw[j] = *(const llmpar__cuda_16 *)(const void *)(x + at);
            }
#pragma unroll
            for (int j = 0; j < together; j++) {
                const int64_t at = c + j * step;
                float v[width];
                if (at >= 0 && at + width <= end) {
                    llmpar__cuda_unpack<T>(v, raw[j]);
#pragma unroll
                    for (int k = 0; k < width; k++) most = llmpar__cuda_larger(most, v[k]);
                } else {
                    for (int k = 0; k < width; k++)
                        if (at + k >= 0 && at + k < end) most = llmpar__cuda_larger(most, llmpar__cuda_load(x[at + k]));
                }
            }
        }
        most = llmpar__cuda_row_max(most, lanes, partial + turn * LLMPAR__CUDA_ROW_WARPS);
        if (row < a.rows && lane == 0) {
            const int64_t target = (int64_t)a.targets[row] - a.v_begin;
            ((float *)a.max)[row] = most;
            ((float *)a.target_logit)[row] = a.targets[row] >= 0 && target >= 0 && target < a.v_local ? llmpar__cuda_load(x[target]) : llmpar__cuda_minus_infinity();
        }
    }
}

/* How the pieces are cut: those in this shard, how many side by side, levels of the tree over rounds of them. */
typedef struct llmpar__cuda_xent_cut { int64_t first, last; int slots, levels; } llmpar__cuda_xent_cut;

template <typename T> static __device__ __forceinline__ float llmpar__cuda_xent_piece(const T *x, int64_t count, float most, int lane)
{
    const int width = llmpar__cuda_vector<T>::count, together = 4;
    const int64_t step = 32 * width;
    const int wide = (uintptr_t)x % 16 == 0;
    float s = 0;
    for (int64_t c = (int64_t)lane * width; c < count; c += together * step) {
        llmpar__cuda_16 raw[together];
#pragma unroll
        for (int j = 0; j < together; j++) raw[j] = llmpar__cuda_read(x + c + j * step, count - c - j * step, wide);
#pragma unroll
        for (int j = 0; j < together; j++) {
            float v[width];
            const int64_t left = count - c - j * step;
            llmpar__cuda_unpack<T>(v, raw[j]);
#pragma unroll
            for (int k = 0; k < width; k++) v[k] = llmpar__cuda_exp(__fsub_rn(v[k], most));
            if (left < width) { /* behind the numbers: a question for each of them would be a branch for each */
#pragma unroll
                for (int k = 0; k < width; k++)
                    if (k >= left) v[k] = 0;
            }
#pragma unroll
            for (int half = width / 2; half > 0; half /= 2) {
#pragma unroll
                for (int k = 0; k < half; k++) v[k] = __fadd_rn(v[2 * k], v[2 * k + 1]);
            }
            s = __fadd_rn(s, v[0]);
        }
    }
    return llmpar__cuda_row_sum(s, 32, NULL);
}

template <typename T> static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS, 3) llmpar__cuda_xent_rows_sum(llmpar_xent_args a, llmpar__cuda_xent_cut cut)
{
    LLMPAR__CUDA_SHARED(float, sums); /* of the round's pieces; [warp] */
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, slot = warp % cut.slots, at_once = LLMPAR__CUDA_ROW_WARPS / cut.slots;
    float *stack = sums + LLMPAR__CUDA_ROW_WARPS + warp;
    for (int64_t first = (int64_t)blockIdx.x * at_once; first < a.rows; first += (int64_t)gridDim.x * at_once) {
        const int64_t row = first + warp / cut.slots;
        const int first_of_row = slot == 0 && lane == 0 && row < a.rows;
        const float most = row < a.rows ? ((const float *)a.max)[row] : 0.0f;
        llmpar__cuda_tree tree = { 0, 0 };
        for (int64_t round = cut.first / cut.slots; round <= cut.last / cut.slots; round++) {
            const int64_t piece = round * cut.slots + slot;
            float s = 0;
            if (row < a.rows && piece < a.canon) {
                const int64_t begin = max(llmpar__cuda_piece_begin(piece, a.v_total, a.canon) - a.v_begin, (int64_t)0), end = min(llmpar__cuda_piece_begin(piece + 1, a.v_total, a.canon) - a.v_begin, a.v_local);
                if (begin < end) s = llmpar__cuda_xent_piece((const T *)a.logits + row * a.ld + begin, end - begin, most, lane);
            }
            __syncthreads(); /* the last round's sums were read */
            if (lane == 0) sums[warp] = s;
            __syncthreads();
            if (first_of_row) llmpar__cuda_tree_push(&tree, stack, LLMPAR__CUDA_ROW_WARPS, round, llmpar__cuda_slot_sum(sums + warp, cut.slots, 1));
            llmpar__cuda_tree_pushed(&tree, round);
        }
        if (first_of_row) ((float *)a.sum)[row] = llmpar__cuda_tree_sum(&tree, stack, LLMPAR__CUDA_ROW_WARPS, cut.levels);
    }
}

/* logits <- (exp(logit - max) / sum - [target]) scale. A block takes LLMPAR__CUDA_XENT_PART x 16 bytes of a row for each thread. */
enum { LLMPAR__CUDA_XENT_PART = 4 };
template <typename T> static __device__ __forceinline__ float llmpar__cuda_xent_gradient(float x, float most, float inverse, float scale, int hit)
{
    float p = __fmul_rn(llmpar__cuda_exp(__fsub_rn(x, most)), inverse);
    return __fmul_rn(hit ? __fsub_rn(p, 1.0f) : p, scale);
}
template <typename T> static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS) llmpar__cuda_xent_rows_backward(llmpar_xent_args a, float scale, int64_t parts)
{
    const int width = llmpar__cuda_vector<T>::count, together = LLMPAR__CUDA_XENT_PART;
    const int64_t step = LLMPAR__CUDA_ROW_THREADS * width, total = a.rows * parts;
    for (int64_t part = blockIdx.x; part < total; part += gridDim.x) {
        const int64_t row = llmpar__cuda_divide(part, parts), end = a.v_local;
        T *x = (T *)a.logits + row * a.ld;
        const int counted = a.targets[row] >= 0;
        const int64_t target = (int64_t)a.targets[row] - a.v_begin, c = (part - row * parts) * together * step + (int64_t)threadIdx.x * width - llmpar__cuda_xent_shift(x);
        const float most = ((const float *)a.max)[row], inverse = __fdiv_rn(1.0f, ((const float *)a.sum)[row]);
        llmpar__cuda_16 raw[together];
#pragma unroll
        for (int j = 0; j < together; j++) {
            const int64_t at = c + j * step;
            if (counted && at >= 0 && at + width <= end) raw[j] = *(const llmpar__cuda_16 *)(const void *)(x + at);
            else raw[j].word[0] = raw[j].word[1] = raw[j].word[2] = raw[j].word[3] = 0;
        }
#pragma unroll
        for (int j = 0; j < together; j++) {
            const int64_t at = c + j * step;
            float v[width];
            if (at >= 0 && at + width <= end) {
                if (counted) {
                    const int hit = target - at >= 0 && target - at < width ? (int)(target - at) : -1; /* one comparison of 64 bits, not one a number */
                    llmpar__cuda_unpack<T>(v, raw[j]);
#pragma unroll
                    for (int k = 0; k < width; k++) v[k] = llmpar__cuda_xent_gradient<T>(v[k], most, inverse, scale, k == hit);
                    raw[j] = llmpar__cuda_pack<T>(v);
                }
                *(llmpar__cuda_16 *)(void *)(x + at) = raw[j];
            } else {
                for (int k = 0; k < width; k++)
                    if (at + k >= 0 && at + k < end) {
                        if (counted) llmpar__cuda_store(&x[at + k], llmpar__cuda_xent_gradient<T>(llmpar__cuda_load(x[at + k]), most, inverse, scale, at + k == target));
                        else llmpar__cuda_set_bits(&x[at + k], 0);
                    }
            }
        }
    }
}

template <typename T> static void llmpar__cuda_xent_run_max(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_args *args)
{
    const int lanes = args->v_local < 64 * (int64_t)(16 / sizeof(T)) ? 32 : LLMPAR__CUDA_ROW_THREADS, at_once = LLMPAR__CUDA_ROW_THREADS / lanes;
    llmpar__cuda_launch(device, stream, llmpar__cuda_xent_rows_max<T>, dim3(llmpar__cuda_row_blocks(llmpar__cuda_of(device), (args->rows + at_once - 1) / at_once, 4)), dim3(LLMPAR__CUDA_ROW_THREADS), 2 * LLMPAR__CUDA_ROW_WARPS * sizeof(float), *args, lanes);
}

template <typename T> static void llmpar__cuda_xent_run_sum(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_args *args)
{
    const int64_t local = args->v_local > 0 ? args->v_local : 0;
    llmpar__cuda_xent_cut cut;
    cut.first = 0;
    cut.last = args->canon - 1;
    while (cut.first < cut.last && llmpar__cuda_piece_begin(cut.first + 1, args->v_total, args->canon) <= args->v_begin) cut.first++;
    while (cut.last > cut.first && llmpar__cuda_piece_begin(cut.last, args->v_total, args->canon) >= args->v_begin + local) cut.last--;
    cut.slots = llmpar__cuda_slots(cut.last + 1 - cut.first);
    cut.levels = llmpar__cuda_tree_levels(cut.last / cut.slots);
    const int at_once = LLMPAR__CUDA_ROW_WARPS / cut.slots;
    llmpar__cuda_launch(device, stream, llmpar__cuda_xent_rows_sum<T>, dim3(llmpar__cuda_row_blocks(llmpar__cuda_of(device), (args->rows + at_once - 1) / at_once, 4)), dim3(LLMPAR__CUDA_ROW_THREADS), (size_t)(LLMPAR__CUDA_ROW_WARPS * (1 + cut.levels)) * sizeof(float), *args, cut);
}

template <typename T> static void llmpar__cuda_xent_run_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_backward_args *args)
{
    const int64_t width = llmpar__cuda_vector<T>::count, columns = args->forward.v_local + width - 1, part = LLMPAR__CUDA_XENT_PART * LLMPAR__CUDA_ROW_THREADS * width, parts = (columns + part - 1) / part;
    if (args->forward.v_local <= 0) return;
    llmpar__cuda_launch(device, stream, llmpar__cuda_xent_rows_backward<T>, dim3(llmpar__cuda_row_blocks(llmpar__cuda_of(device), args->forward.rows * parts, 8)), dim3(LLMPAR__CUDA_ROW_THREADS), 0, args->forward, args->scale, parts);
}

static llmpar_status llmpar__cuda_xent_check(llmpar_device *device, llmpar_stream *stream, const char *name, const llmpar_xent_args *args)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, name, args->dtype, 1);
    if (!status && args->rows > 0 && args->canon < 1) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "%s: canon %d, expected at least 1", name, (int)args->canon);
    return status;
}

static llmpar_status llmpar__cuda_xent_max(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_args *args)
{
    llmpar_status status = llmpar__cuda_xent_check(device, stream, "xent_max", args);
    if (status || args->rows <= 0) return status;
    LLMPAR__CUDA_BY_DTYPE(args->dtype, llmpar__cuda_xent_run_max, device, stream, args);
    return llmpar__cuda_end(device, stream, "xent_max");
}

static llmpar_status llmpar__cuda_xent_sum(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_args *args)
{
    llmpar_status status = llmpar__cuda_xent_check(device, stream, "xent_sum", args);
    if (status || args->rows <= 0) return status;
    LLMPAR__CUDA_BY_DTYPE(args->dtype, llmpar__cuda_xent_run_sum, device, stream, args);
    return llmpar__cuda_end(device, stream, "xent_sum");
}

static llmpar_status llmpar__cuda_xent_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_backward_args *args)
{
    llmpar_status status = llmpar__cuda_xent_check(device, stream, "xent_backward", &args->forward);
    if (status || args->forward.rows <= 0) return status;
    LLMPAR__CUDA_BY_DTYPE(args->forward.dtype, llmpar__cuda_xent_run_backward, device, stream, args);
    return llmpar__cuda_end(device, stream, "xent_backward");
}
/* ==== src/cuda/elementwise.cu ==== */
/* elementwise: add, scale, copy_rows. A thread takes 16 bytes; nothing depends on more than one position. */

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
/* ==== src/cuda/gemm_half.cu ==== */
/* gemm_half: tiles of the EXACT matrix product for BF16 and F16: mma.sync m16n8k16 with f32 sums.

   A link of a chain is 16 k, counted from each segment's begin; the last one of a segment is filled with zeros. Inside a link the order is the tensor core's, the same for every element. So a product that goes on from c (accumulate)
   has the bits of the whole where it was cut at a multiple of 16.

   A tile of 128 x 256 is made by 8 warps of 64 x 64. A stage holds 32 k of a and b, as they lie in memory: rows of 32 k, or, of a transposed operand, 32 rows of the tile's whole width; ldmatrix transposes the latter. Units of 16 bytes
   are exchanged inside a row by its number, so that the 8 rows that ldmatrix reads at once are in different banks:

      [row][unit ^ (row / 2) % 4]   rows of 64 bytes        [row][unit ^ row % 8]   rows of 256 or 512 bytes

   The fragments of a link are read while the link before it is multiplied, also across the barrier between two stages. */
/* ==== src/cuda/tiles_internal.h ==== */
/* tiles_internal: what the kernels of the EXACT matrix product share: the list of segments, the walk along it, and the stack of partial tiles.

   A block of threads makes one tile of c at a time, the whole tree of it:

      segments   |  piece 0   |piece 1| piece 2 (two segments)  |piece 3|
      chunks     |..|..|..|. .|..|..  |..|..|.  |..|..|..|..    |..|.   |     chunks of at most a stage's k, from each segment's begin: copied in the background, some stages ahead
      tile       |    push    | merge |          push           | merge, merge: c

   A piece that ends is added to the complete subtrees on its left: a binary counter makes the balanced tree of llmpar_tree_split. A partial tile of 2^h pieces lies in slot h: slot 0 in shared memory where there is room, the others
   in the workspace, one set of slots a block; the grid is no larger than the device runs at once, so that they stay in L2. Each thread writes and reads its own elements there, so no barrier is needed. Copies run ahead into the block's next tile, while this one is stored.

   The order of every sum is that of the chain and the tree alone. Tile sizes, stages, grid and the order of tiles show in no bit. */
enum { LLMPAR__CUDA_GEMM_THREADS = 256, LLMPAR__CUDA_GEMM_RUNS = 64, LLMPAR__CUDA_GEMM_GROUP = 16 };

/* Segments of equal k, one a piece, that lie one behind the other along k: the leaves of a batch, the pieces of a dim. One segment is a run of count 1. */
struct llmpar__cuda_gemm_run {
    const unsigned char *a, *b;
    int64_t lda, ldb;        /* in bytes */
    int32_t k;               /* of each segment, >= 1; below 2^30 in a run */
    int32_t count, piece;    /* piece of the first */
    int32_t loose;           /* not all rows begin at multiples of 16 bytes: of a 1, of b 2 */
};

struct llmpar__cuda_gemm_job {
    llmpar__cuda_gemm_run runs[LLMPAR__CUDA_GEMM_RUNS]; /* unless there are more */
    const llmpar__cuda_gemm_run *list;                  /* then they are here, in the workspace; else NULL */
    unsigned char *slots;    /* [blocks, levels, tile] */
    void *c;
    int64_t m, n, ldc;
    int32_t tiles_m, tiles_n;
    int32_t run_count, pieces;
    int32_t levels;          /* slots a block in the workspace */
    int32_t shared_slot;     /* where slot 0 begins in shared memory; 0: it is in the workspace too */
    int32_t stages;
    int32_t accumulate;
    int32_t narrow;          /* c is stored in the operands' type, not in f32 */
    int32_t aligned;         /* all of c's rows begin at multiples of 16 bytes */
};

/* A copy, of which the compiler loads what is used, every time: a reference would put the kernel's parameters on the stack, and registers are short. */
static __device__ __forceinline__ llmpar__cuda_gemm_run llmpar__cuda_gemm_run_at(const llmpar__cuda_gemm_job &job, int32_t i)
{
    if (job.list) return job.list[i];
    return job.runs[i];
}

/* Tile `index` of c, in groups of GROUP rows of tiles, column by column: what runs at the same time shares rows of a and columns of b in L2. */
static __device__ __forceinline__ void llmpar__cuda_gemm_tile(const llmpar__cuda_gemm_job &job, int32_t index, int32_t *row, int32_t *column)
{
    int32_t first = index / (LLMPAR__CUDA_GEMM_GROUP * job.tiles_n) * LLMPAR__CUDA_GEMM_GROUP, inside = index - first * job.tiles_n;
    int32_t rows = job.tiles_m - first;
    if (rows > LLMPAR__CUDA_GEMM_GROUP) rows = LLMPAR__CUDA_GEMM_GROUP;
    *row = first + inside % rows;
    *column = inside / rows;
}

/* How much of tile `index` there is. */
static __device__ __forceinline__ int llmpar__cuda_gemm_part_of(int64_t extent, int32_t index, int side)
{
    int64_t left = extent - (int64_t)index * side;
    return left < side ? (int)left : side;
}

/* Where the copies are: a chunk of a segment, at a tile's first row of a and first row (column) of b; behind a tile's last chunk comes the block's next tile. The same for all threads of the block. */
struct llmpar__cuda_gemm_source {
    int32_t at, left;   /* in the run: k behind the first segment's begin; k of the segment from here, 0: no more chunks */
    int32_t run;
    int32_t tile, i, j; /* number of the tile, and where: in tiles */

    __device__ __forceinline__ void open(const llmpar__cuda_gemm_job &job)
    {
        at = left = 0;
        if (run == job.run_count) {
            tile += (int32_t)gridDim.x;
            run = 0;
        }
        if (tile >= job.tiles_m * job.tiles_n || !job.run_count) return;
        if (run == 0) llmpar__cuda_gemm_tile(job, tile, &i, &j);
        left = llmpar__cuda_gemm_run_at(job, run).k;
    }
    __device__ __forceinline__ void begin(const llmpar__cuda_gemm_job &job)
    {
        tile = (int32_t)blockIdx.x;
        run = i = j = 0;
        open(job);
    }
    /* k: of a chunk; in: the run. */
    __device__ __forceinline__ void advance(const llmpar__cuda_gemm_job &job, const llmpar__cuda_gemm_run &in, int k)
    {
        at += min(left, k);
        left -= k;
        if (left > 0) return;
        left = in.k;
        if (at < in.count * in.k) return;
        run++;
        open(job);
    }
    /* The chunk's first element of an operand whose tile has `side` rows (columns). */
    template <int Size, int Transposed> __device__ __forceinline__ const unsigned char *first(const unsigned char *operand, int64_t ld, int32_t tile_row, int side) const
    {
        return operand + at * (Transposed ? ld : (int64_t)Size) + (int64_t)tile_row * side * (Transposed ? (int64_t)Size : ld);
    }
};

/* The piece of run's first segment; behind the last run: `pieces`. */
static __device__ __forceinline__ int32_t llmpar__cuda_gemm_first_piece(const llmpar__cuda_gemm_job &job, int32_t run) { return run == job.run_count ? job.pieces : llmpar__cuda_gemm_run_at(job, run).piece; }

/* The piece of the segment behind that of `piece` in *run, which may be the next run's. */
static __device__ __forceinline__ int32_t llmpar__cuda_gemm_next_piece(const llmpar__cuda_gemm_job &job, int32_t *run, int32_t piece)
{
    llmpar__cuda_gemm_run at = llmpar__cuda_gemm_run_at(job, *run);
    return piece + 1 < at.piece + at.count ? piece + 1 : llmpar__cuda_gemm_first_piece(job, ++*run);
}

template <int Floats> static __device__ __forceinline__ llmpar__cuda_16 *llmpar__cuda_gemm_slot(const llmpar__cuda_gemm_job &job, unsigned char *shared, int32_t height)
{
    unsigned char *slot = shared + job.shared_slot;
    if (height || !job.shared_slot) slot = job.slots + ((int64_t)blockIdx.x * job.levels + height - (job.shared_slot ? 1 : 0)) * (int64_t)(Floats * LLMPAR__CUDA_GEMM_THREADS * sizeof(float));
    return (llmpar__cuda_16 *)(void *)slot + threadIdx.x;
}

/* Piece `piece` is complete in `sum`, Floats elements a thread. Behind it `sum` is the total if this was the last one, else +0. */
template <int Floats> static __device__ __forceinline__ void llmpar__cuda_gemm_finish(const llmpar__cuda_gemm_job &job, unsigned char *shared, int32_t piece, float (&sum)[Floats])
{
    int last = piece + 1 == job.pieces;
    int32_t height = 0;
    llmpar__cuda_16 *slot;
#pragma unroll 1
    for (; piece >> height; height++) {
        if (!(piece >> height & 1)) {
            if (last) continue;
            break;
        }
        slot = llmpar__cuda_gemm_slot<Floats>(job, shared, height);
#pragma unroll
        for (int i = 0; i < Floats / 4; i++) {
            llmpar__cuda_16 left = slot[i * LLMPAR__CUDA_GEMM_THREADS];
#pragma unroll
            for (int e = 0; e < 4; e++) sum[4 * i + e] = __fadd_rn(__uint_as_float(left.word[e]), sum[4 * i + e]);
        }
    }
    if (last) return;
    slot = llmpar__cuda_gemm_slot<Floats>(job, shared, height);
#pragma unroll
    for (int i = 0; i < Floats / 4; i++) {
        llmpar__cuda_16 out;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            out.word[e] = __float_as_uint(sum[4 * i + e]);
            sum[4 * i + e] = 0;
        }
        slot[i * LLMPAR__CUDA_GEMM_THREADS] = out;
    }
}
/* ---- src/cuda/gemm_half.cu goes on ---- */
enum {
    LLMPAR__CUDA_GEMM_HALF_M = 128, LLMPAR__CUDA_GEMM_HALF_N = 256, LLMPAR__CUDA_GEMM_HALF_K = 32,
    LLMPAR__CUDA_GEMM_HALF_A_BYTES = LLMPAR__CUDA_GEMM_HALF_M * LLMPAR__CUDA_GEMM_HALF_K * 2,
    LLMPAR__CUDA_GEMM_HALF_B_BYTES = LLMPAR__CUDA_GEMM_HALF_N * LLMPAR__CUDA_GEMM_HALF_K * 2,
    LLMPAR__CUDA_GEMM_HALF_STAGE = LLMPAR__CUDA_GEMM_HALF_A_BYTES + LLMPAR__CUDA_GEMM_HALF_B_BYTES,
    LLMPAR__CUDA_GEMM_HALF_FLOATS = LLMPAR__CUDA_GEMM_HALF_M * LLMPAR__CUDA_GEMM_HALF_N / LLMPAR__CUDA_GEMM_THREADS,
    LLMPAR__CUDA_GEMM_HALF_STAGES = 4, LLMPAR__CUDA_GEMM_HALF_STAGES_DEEP = 6 /* where shared memory has room for them */
};

/* Asks for 32 k of an operand: Extent rows of the tile (columns of b), of which `extent` exist, and `k` of the 32; what does not exist is zero. `in`: the first element. */
template <int Extent, int Transposed> static __device__ __forceinline__ void llmpar__cuda_gemm_half_copy(unsigned char *out, const unsigned char *in, int64_t ld, int extent, int k, int loose)
{
    constexpr int units = Transposed ? Extent / 8 : LLMPAR__CUDA_GEMM_HALF_K / 8, step = LLMPAR__CUDA_GEMM_THREADS / units, passes = (Transposed ? LLMPAR__CUDA_GEMM_HALF_K : Extent) / step;
    int thread = llmpar__cu_again((int)threadIdx.x), unit = thread % units, row = thread / units;
    int rows = (Transposed ? k : extent) - row, bytes = min(max(2 * (Transposed ? extent : k) - 16 * unit, 0), 16);
    in += row * ld + 16 * unit;
    out += row * (16 * units) + 16 * (unit ^ (Transposed ? row & 7 : row >> 1 & 3));
    if (!loose) {
#pragma unroll
        for (int i = 0; i < passes; i++) {
            llmpar__cu_copy_async(out + i * step * (16 * units), in, i * step < rows ? bytes : 0);
            in += step * ld;
        }
        return;
    }
#pragma unroll 1
    for (int i = 0; i < passes; i++) { /* element by element */
        llmpar__cuda_16 unit_of_8;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            uint32_t low = i * step < rows && 4 * e < bytes ? *(const uint16_t *)(const void *)(in + 4 * e) : 0u;
            uint32_t high = i * step < rows && 4 * e + 2 < bytes ? *(const uint16_t *)(const void *)(in + 4 * e + 2) : 0u;
            unit_of_8.word[e] = low | high << 16;
        }
        *(llmpar__cuda_16 *)(void *)(out + i * step * (16 * units)) = unit_of_8;
        in += step * ld;
    }
}

template <int F16> struct llmpar__cuda_gemm_half_type { typedef llmpar__cuda_bf16 type; };
template <> struct llmpar__cuda_gemm_half_type<1> { typedef llmpar__cuda_f16 type; };

/* A warp's fragments of one link. */
struct llmpar__cuda_gemm_half_fragments { uint32_t a[4][4], b[4][4]; };

/* Where a lane reads them: `row` bytes into the operand's part of a stage, and the unit in that row, exchanged. */
struct llmpar__cuda_gemm_half_lane { int row, unit; };

/* warp: its first row (column) in the tile. near: of the lane's 8 x 8 matrix among the four: does it lie 8 further along the rows (columns), along k? */
template <int Extent, int Transposed> static __device__ __forceinline__ llmpar__cuda_gemm_half_lane llmpar__cuda_gemm_half_lane_of(int warp, int further, int further_k)
{
    int r = (int)threadIdx.x & 7;
    llmpar__cuda_gemm_half_lane lane;
    lane.row = Transposed ? (8 * further_k + r) * (2 * Extent) + 2 * warp : (warp + 8 * further + r) * (2 * LLMPAR__CUDA_GEMM_HALF_K);
    lane.unit = Transposed ? 16 * (further ^ r) : 16 * (further_k ^ r >> 1);
    return lane;
}

/* 16 rows (columns) x 16 k: number `i` of the warp's four, of link `link` of the stage. */
template <int Extent, int Transposed> static __device__ __forceinline__ void llmpar__cuda_gemm_half_read(uint32_t out[4], const unsigned char *stage, llmpar__cuda_gemm_half_lane lane, int i, int link)
{
    if (Transposed) llmpar__cu_ldmatrix_x4_trans(out, stage + lane.row + link * 16 * (2 * Extent) + (llmpar__cu_again(lane.unit) ^ 32 * i));
    else llmpar__cu_ldmatrix_x4(out, stage + lane.row + i * 16 * (2 * LLMPAR__CUDA_GEMM_HALF_K) + (lane.unit ^ 32 * link));
}

template <int F16> static __device__ __forceinline__ void llmpar__cuda_gemm_half_multiply(float (&sum)[LLMPAR__CUDA_GEMM_HALF_FLOATS], const llmpar__cuda_gemm_half_fragments &in)
{
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (F16) llmpar__cu_mma_f16(sum + 32 * i + 4 * j, in.a[i], in.b[j >> 1] + 2 * (j & 1));
            else llmpar__cu_mma_bf16(sum + 32 * i + 4 * j, in.a[i], in.b[j >> 1] + 2 * (j & 1));
        }
}

static __device__ __forceinline__ void llmpar__cuda_gemm_half_wait(int stages)
{
    if (stages == LLMPAR__CUDA_GEMM_HALF_STAGES) llmpar__cu_copy_async_wait<LLMPAR__CUDA_GEMM_HALF_STAGES - 2>();
    else llmpar__cu_copy_async_wait<LLMPAR__CUDA_GEMM_HALF_STAGES_DEEP - 2>();
    __syncthreads();
}

/* Stores a tile in the operands' type. Of each 8 neighbours in a row four lanes have 2; they exchange four such, so that each has all of one: 16 bytes. */
template <int F16> static __device__ __forceinline__ void llmpar__cuda_gemm_half_store(const llmpar__cuda_gemm_job &job, int64_t i0, int64_t j0, const float (&sum)[LLMPAR__CUDA_GEMM_HALF_FLOATS])
{
    typedef typename llmpar__cuda_gemm_half_type<F16>::type half;
    int thread = llmpar__cu_again((int)threadIdx.x), lane = thread & 31, warp = thread >> 5;
    int64_t row = i0 + (warp >> 2) * 64 + (lane >> 2), column = j0 + (warp & 3) * 64 + 8 * (lane & 3);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        half *c = (half *)job.c + (row + 8 * i) * job.ldc + column;
#pragma unroll
        for (int b = 0; b < 8; b += 4) {
            llmpar__cuda_16 out;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                half low, high;
                int at = 32 * (i >> 1) + 4 * (b + e) + 2 * (i & 1);
                llmpar__cuda_store(&low, sum[at]);
                llmpar__cuda_store(&high, sum[at + 1]);
                out.word[e] = (uint32_t)low.bits | (uint32_t)high.bits << 16;
            }
#pragma unroll
            for (int bit = 1; bit <= 2; bit *= 2) /* word e of lane l becomes word l of lane e */
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    if (e & bit) continue;
                    uint32_t given = lane & bit ? out.word[e] : out.word[e | bit], taken = __shfl_xor_sync(0xffffffffu, given, bit);
                    if (lane & bit) out.word[e] = taken;
                    else out.word[e | bit] = taken;
                }
            if (row + 8 * i >= job.m) continue;
            if (job.aligned && column + 8 * b + 8 <= job.n) llmpar__cu_store_16(c + 8 * b, out.word);
            else {
#pragma unroll
                for (int e = 0; e < 8; e++)
                    if (column + 8 * b + e < job.n) c[8 * b + e].bits = (uint16_t)(out.word[e >> 1] >> 16 * (e & 1));
            }
        }
    }
}

/* The tile from or to f32. */
template <int Load> static __device__ __forceinline__ void llmpar__cuda_gemm_half_f32(const llmpar__cuda_gemm_job &job, int64_t i0, int64_t j0, float (&sum)[LLMPAR__CUDA_GEMM_HALF_FLOATS])
{
    int thread = llmpar__cu_again((int)threadIdx.x), lane = thread & 31, warp = thread >> 5;
    int64_t row = i0 + (warp >> 2) * 64 + (lane >> 2), column = j0 + (warp & 3) * 64 + 2 * (lane & 3);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float *c = (float *)job.c + (row + 8 * i) * job.ldc + column;
#pragma unroll
        for (int b = 0; b < 8; b++) {
            int at = 32 * (i >> 1) + 4 * b + 2 * (i & 1);
            if (row + 8 * i >= job.m || column + 8 * b >= job.n) continue;
            if (job.aligned && column + 8 * b + 1 < job.n) {
                llmpar__cuda_pair_of_floats pair = { { sum[at], sum[at + 1] } };
                if (!Load) *(llmpar__cuda_pair_of_floats *)(void *)(c + 8 * b) = pair;
                else {
                    pair = *(const llmpar__cuda_pair_of_floats *)(const void *)(c + 8 * b);
                    sum[at] = pair.x[0];
                    sum[at + 1] = pair.x[1];
                }
            } else if (Load) {
                sum[at] = c[8 * b];
                if (column + 8 * b + 1 < job.n) sum[at + 1] = c[8 * b + 1];
            } else {
                c[8 * b] = sum[at];
                if (column + 8 * b + 1 < job.n) c[8 * b + 1] = sum[at + 1];
            }
        }
    }
}

template <int F16, int TransposedA, int TransposedB> __global__ void __launch_bounds__(LLMPAR__CUDA_GEMM_THREADS, 1) llmpar__cuda_gemm_half(const llmpar__cuda_gemm_job job)
{
    enum { M = LLMPAR__CUDA_GEMM_HALF_M, N = LLMPAR__CUDA_GEMM_HALF_N, K = LLMPAR__CUDA_GEMM_HALF_K };
    LLMPAR__CUDA_SHARED(unsigned char, shared);
    int matrix = (int)threadIdx.x >> 3 & 3, warp_m = ((int)threadIdx.x >> 7) * 64, warp_n = ((int)threadIdx.x >> 5 & 3) * 64;
    llmpar__cuda_gemm_half_lane lane_a = llmpar__cuda_gemm_half_lane_of<M, TransposedA>(warp_m, matrix & 1, matrix >> 1);
    llmpar__cuda_gemm_half_lane lane_b = llmpar__cuda_gemm_half_lane_of<N, TransposedB>(warp_n, matrix >> 1, matrix & 1);
    llmpar__cuda_gemm_half_fragments fragments[2];
    float sum[LLMPAR__CUDA_GEMM_HALF_FLOATS];

    lane_b.row += LLMPAR__CUDA_GEMM_HALF_A_BYTES;
    llmpar__cuda_gemm_source source;
    int stage = 0; /* that is multiplied */
    source.begin(job);

    auto fill = [&](int ahead) {
        unsigned char *out = shared + ahead * LLMPAR__CUDA_GEMM_HALF_STAGE;
        if (source.left > 0) {
            llmpar__cuda_gemm_run run = llmpar__cuda_gemm_run_at(job, source.run);
            int k = min(source.left, (int)K);
            llmpar__cuda_gemm_half_copy<M, TransposedA>(out, source.first<2, TransposedA>(run.a, run.lda, source.i, M), run.lda, llmpar__cuda_gemm_part_of(job.m, source.i, M), k, run.loose & 1);
            llmpar__cuda_gemm_half_copy<N, TransposedB>(out + LLMPAR__CUDA_GEMM_HALF_A_BYTES, source.first<2, TransposedB>(run.b, run.ldb, source.j, N), run.ldb, llmpar__cuda_gemm_part_of(job.n, source.j, N), k, run.loose & 2);
            source.advance(job, run, K);
        }
        llmpar__cu_copy_async_commit();
    };
    auto read = [&](int link) {
        const unsigned char *in = shared + stage * LLMPAR__CUDA_GEMM_HALF_STAGE;
#pragma unroll
        for (int i = 0; i < 4; i++) llmpar__cuda_gemm_half_read<M, TransposedA>(fragments[link].a[i], in, lane_a, i, link);
#pragma unroll
        for (int i = 0; i < 4; i++) llmpar__cuda_gemm_half_read<N, TransposedB>(fragments[link].b[i], in, lane_b, i, link);
    };

#pragma unroll 1
    for (int i = 0; i < job.stages - 1; i++) fill(i);
    llmpar__cuda_gemm_half_wait(job.stages);
#pragma unroll 1
    for (int32_t tile = (int32_t)blockIdx.x; tile < job.tiles_m * job.tiles_n; tile += (int32_t)gridDim.x) {
        int32_t i0, j0, run = 0, piece = 0, next = llmpar__cuda_gemm_first_piece(job, 0); /* piece: that the chains are in; next: that of the next segment */
        llmpar__cuda_gemm_tile(job, tile, &i0, &j0);
        int active = (int64_t)i0 * M + warp_m < job.m && (int64_t)j0 * N + warp_n < job.n;
#pragma unroll
        for (int i = 0; i < LLMPAR__CUDA_GEMM_HALF_FLOATS; i++) sum[i] = 0;
        if (job.accumulate) llmpar__cuda_gemm_half_f32<1>(job, (int64_t)i0 * M, (int64_t)j0 * N, sum);
        for (;;) {
#pragma unroll 1
            for (; piece < next; piece++) llmpar__cuda_gemm_finish(job, shared, piece, sum);
            if (piece == job.pieces) break;
            if (active) read(0);
#pragma unroll 1
            for (int32_t k = llmpar__cuda_gemm_run_at(job, run).k; k > 0; k -= K) {
                /* Into the stage that everybody left at the last barrier; half of the warps before they multiply, half behind it: so one of the two of a scheduler multiplies while the other one computes addresses. */
#pragma unroll 1
                for (int turn = 0; turn < 2; turn++) {
                    if (turn == (warp_m == 0)) {
                        if (!active) continue;
                        read(1);
                        llmpar__cuda_gemm_half_multiply<F16>(sum, fragments[0]);
                    } else fill((stage ? stage : job.stages) - 1);
                }
                if (++stage == job.stages) stage = 0;
                llmpar__cuda_gemm_half_wait(job.stages);
                if (active) {
                    read(0); /* behind a segment's last chunk: for nothing */
                    if (k > K / 2) llmpar__cuda_gemm_half_multiply<F16>(sum, fragments[1]);
                }
            }
            next = llmpar__cuda_gemm_next_piece(job, &run, piece);
        }
        llmpar__cuda_gemm_tile(job, llmpar__cu_again(tile), &i0, &j0);
        if (job.narrow) llmpar__cuda_gemm_half_store<F16>(job, (int64_t)i0 * M, (int64_t)j0 * N, sum);
        else llmpar__cuda_gemm_half_f32<0>(job, (int64_t)i0 * M, (int64_t)j0 * N, sum);
    }
}
/* ==== src/cuda/gemm_f32.cu ==== */
/* gemm_f32: tiles of the EXACT matrix product for F32: fused multiply-adds in k order, one chain an element.

   A tile of 128 x 128 is made by 256 threads of 8 x 8 elements: 4 rows here and 4 rows 64 below, columns alike. A stage holds 16 k of a and b with the tile's rows (columns) side by side for each k, 132 floats apart, so that a thread
   reads 4 at once; an operand whose k is contiguous is turned on its way into shared memory, in units of one float, which also serve any alignment. */

enum {
    LLMPAR__CUDA_GEMM_F32_SIDE = 128, LLMPAR__CUDA_GEMM_F32_K = 16, LLMPAR__CUDA_GEMM_F32_ROW = 132 /* floats */,
    LLMPAR__CUDA_GEMM_F32_OPERAND = LLMPAR__CUDA_GEMM_F32_K * LLMPAR__CUDA_GEMM_F32_ROW * 4, LLMPAR__CUDA_GEMM_F32_STAGE = 2 * LLMPAR__CUDA_GEMM_F32_OPERAND,
    LLMPAR__CUDA_GEMM_F32_STAGES = 3, LLMPAR__CUDA_GEMM_F32_FLOATS = 64
};

/* Asks for 16 k of an operand: 128 rows of the tile (columns of b), of which `extent` exist, and `k` of the 16; what does not exist is zero. */
template <int Transposed> static __device__ __forceinline__ void llmpar__cuda_gemm_f32_copy(unsigned char *out, const unsigned char *in, int64_t ld, int extent, int k)
{
    enum { SIDE = LLMPAR__CUDA_GEMM_F32_SIDE, K = LLMPAR__CUDA_GEMM_F32_K, WIDTH = Transposed ? SIDE : K, STEP = LLMPAR__CUDA_GEMM_THREADS / WIDTH, PASSES = (Transposed ? K : SIDE) / STEP };
    /* Where it is turned, a warp takes 8 k of 4 rows: so it writes to all banks. */
    int thread = (int)threadIdx.x, at = Transposed ? thread % WIDTH : (thread & 7) | (thread >> 2 & 8), row = Transposed ? thread / WIDTH : (thread >> 3 & 3) | (thread >> 4 & 12);
    int rows = at < (Transposed ? extent : k) ? (Transposed ? k : extent) - row : 0;
    in += row * ld + 4 * at;
    out += 4 * (Transposed ? row * LLMPAR__CUDA_GEMM_F32_ROW + at : at * LLMPAR__CUDA_GEMM_F32_ROW + row);
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
        llmpar__cu_copy_async_4(out + i * STEP * 4 * (Transposed ? LLMPAR__CUDA_GEMM_F32_ROW : 1), in, i * STEP < rows ? 4 : 0);
        in += STEP * ld;
    }
}

/* One k. a, b: where the thread's first 4 rows and columns are. */
static __device__ __forceinline__ void llmpar__cuda_gemm_f32_step(float (&sum)[LLMPAR__CUDA_GEMM_F32_FLOATS], const unsigned char *a, const unsigned char *b)
{
    float x[8], y[8];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        llmpar__cuda_16 in_a = *(const llmpar__cuda_16 *)(const void *)(a + 256 * h), in_b = *(const llmpar__cuda_16 *)(const void *)(b + 256 * h);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            x[4 * h + e] = __uint_as_float(in_a.word[e]);
            y[4 * h + e] = __uint_as_float(in_b.word[e]);
        }
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) sum[8 * i + j] = __fmaf_rn(x[i], y[j], sum[8 * i + j]);
}

/* The tile from or to c. */
template <int Load> static __device__ __forceinline__ void llmpar__cuda_gemm_f32_c(const llmpar__cuda_gemm_job &job, int64_t row, int64_t column, float (&sum)[LLMPAR__CUDA_GEMM_F32_FLOATS])
{
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int64_t r = row + (i >> 2) * 64 + (i & 3), j = column + 64 * h;
            float *c = (float *)job.c + r * job.ldc + j;
            if (r >= job.m) continue;
            if (job.aligned && j + 4 <= job.n) {
                llmpar__cuda_16 four;
                if (Load) four = *(const llmpar__cuda_16 *)(const void *)c;
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    if (Load) sum[8 * i + 4 * h + e] = __uint_as_float(four.word[e]);
                    else four.word[e] = __float_as_uint(sum[8 * i + 4 * h + e]);
                }
                if (!Load) llmpar__cu_store_16(c, four.word);
                continue;
            }
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (j + e < job.n) {
                    if (Load) sum[8 * i + 4 * h + e] = c[e];
                    else c[e] = sum[8 * i + 4 * h + e];
                }
        }
}

template <int TransposedA, int TransposedB> __global__ void __launch_bounds__(LLMPAR__CUDA_GEMM_THREADS, 1) llmpar__cuda_gemm_f32(const llmpar__cuda_gemm_job job)
{
    enum { SIDE = LLMPAR__CUDA_GEMM_F32_SIDE, K = LLMPAR__CUDA_GEMM_F32_K, STAGES = LLMPAR__CUDA_GEMM_F32_STAGES, ROW = 4 * LLMPAR__CUDA_GEMM_F32_ROW };
    LLMPAR__CUDA_SHARED(unsigned char, shared);
    int y = 4 * ((int)threadIdx.x >> 4), x = 4 * ((int)threadIdx.x & 15);
    float sum[LLMPAR__CUDA_GEMM_F32_FLOATS];

    llmpar__cuda_gemm_source source;
    int stage = 0, ahead = 0; /* that is multiplied; that is filled next */
    source.begin(job);

    auto fill = [&]() {
        unsigned char *out = shared + ahead * LLMPAR__CUDA_GEMM_F32_STAGE;
        if (source.left > 0) {
            llmpar__cuda_gemm_run run = llmpar__cuda_gemm_run_at(job, source.run);
            int k = min(source.left, (int)K);
            llmpar__cuda_gemm_f32_copy<TransposedA>(out, source.first<4, TransposedA>(run.a, run.lda, source.i, SIDE), run.lda, llmpar__cuda_gemm_part_of(job.m, source.i, SIDE), k);
            llmpar__cuda_gemm_f32_copy<TransposedB>(out + LLMPAR__CUDA_GEMM_F32_OPERAND, source.first<4, TransposedB>(run.b, run.ldb, source.j, SIDE), run.ldb, llmpar__cuda_gemm_part_of(job.n, source.j, SIDE), k);
            source.advance(job, run, K);
        }
        llmpar__cu_copy_async_commit();
        if (++ahead == STAGES) ahead = 0;
    };

#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) fill();
#pragma unroll 1
    for (int32_t tile = (int32_t)blockIdx.x; tile < job.tiles_m * job.tiles_n; tile += (int32_t)gridDim.x) {
        int32_t i0, j0, run = 0, piece = 0, next = llmpar__cuda_gemm_first_piece(job, 0); /* piece: that the chains are in; next: that of the next segment */
        llmpar__cuda_gemm_tile(job, tile, &i0, &j0);
#pragma unroll
        for (int i = 0; i < LLMPAR__CUDA_GEMM_F32_FLOATS; i++) sum[i] = 0;
        if (job.accumulate) llmpar__cuda_gemm_f32_c<1>(job, (int64_t)i0 * SIDE + y, (int64_t)j0 * SIDE + x, sum);
        for (;;) {
#pragma unroll 1
            for (; piece < next; piece++) llmpar__cuda_gemm_finish(job, shared, piece, sum);
            if (piece == job.pieces) break;
#pragma unroll 1
            for (int32_t k = llmpar__cuda_gemm_run_at(job, run).k; k > 0; k -= K) {
                const unsigned char *a = shared + stage * LLMPAR__CUDA_GEMM_F32_STAGE + 4 * y, *b = shared + stage * LLMPAR__CUDA_GEMM_F32_STAGE + LLMPAR__CUDA_GEMM_F32_OPERAND + 4 * x;
                llmpar__cu_copy_async_wait<STAGES - 2>();
                __syncthreads();
                fill(); /* into the stage that everybody has left at this barrier */
                if (k >= K) {
#pragma unroll
                    for (int s = 0; s < K; s++) llmpar__cuda_gemm_f32_step(sum, a + s * ROW, b + s * ROW);
                } else {
#pragma unroll 1
                    for (int s = 0; s < k; s++) llmpar__cuda_gemm_f32_step(sum, a + s * ROW, b + s * ROW);
                }
                if (++stage == STAGES) stage = 0;
            }
            next = llmpar__cuda_gemm_next_piece(job, &run, piece);
        }
        llmpar__cuda_gemm_f32_c<0>(job, (int64_t)i0 * SIDE + y, (int64_t)j0 * SIDE + x, sum);
    }
}
/* ==== src/cuda/gemm.cu ==== */
/* gemm: the slot of the matrix product, and EXACT products on their way to the kernels of gemm_half.cu and gemm_f32.cu: checks, the list of segments, the workspace, the launch.

   The bits of an element depend on its segments, their pieces and the type alone: not on m, n, ld, alignment, kind (NT, NN and TN multiply the same links), on the device's size or on which pieces a rank holds. So the grid is free to
   follow the device: one block a multiprocessor, each with its own slots for partial tiles. */

static llmpar_dtype llmpar__cuda_gemm_out(const llmpar_gemm_args *args) { return args->out_dtype == LLMPAR_DTYPE_DEFAULT ? args->dtype : args->out_dtype; }

/* As the CPU's slot has it. */
static llmpar_status llmpar__cuda_gemm_check(llmpar_device *device, const llmpar_gemm_args *args)
{
    llmpar_dtype sum = llmpar_dtype_sum(args->dtype), out = llmpar__cuda_gemm_out(args);
    int32_t previous = 0;
    if (args->kind != LLMPAR_GEMM_NT && args->kind != LLMPAR_GEMM_NN && args->kind != LLMPAR_GEMM_TN)
        return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "gemm: kind %d is none of NT, NN, TN", (int)args->kind);
    llmpar_status status = llmpar__cuda_dtype(device, "gemm", args->dtype, 1);
    if (status) return status;
    if (out != args->dtype && out != sum)
        return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "gemm: expected out_dtype %s%s%s for dtype %s, got %s", llmpar_dtype_name(args->dtype), sum != args->dtype ? " or " : "", sum != args->dtype ? llmpar_dtype_name(sum) : "", llmpar_dtype_name(args->dtype), llmpar_dtype_name(out));
    if (args->accumulate && out != sum)
        return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "gemm: accumulate needs out_dtype %s, got %s", llmpar_dtype_name(sum), llmpar_dtype_name(out));
    if (args->m < 0 || args->n < 0) return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "gemm: negative shape m = %lld, n = %lld", (long long)args->m, (long long)args->n);
    if (args->m > 1 && args->ldc < args->n) return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "gemm: ldc = %lld is less than n = %lld", (long long)args->ldc, (long long)args->n);
    if (args->pieces < 1) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "gemm: expected at least 1 piece, got %d", (int)args->pieces);
    if (args->accumulate && args->pieces != 1) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "gemm: accumulate needs exactly 1 piece, got %d", (int)args->pieces);
    for (int32_t s = 0; s < args->segment_count; s++) {
        const llmpar_gemm_segment *segment = &args->segments[s];
        int64_t a_width = args->kind == LLMPAR_GEMM_TN ? args->m : segment->k, b_width = args->kind == LLMPAR_GEMM_NT ? segment->k : args->n;
        int64_t a_rows = args->kind == LLMPAR_GEMM_TN ? segment->k : args->m, b_rows = args->kind == LLMPAR_GEMM_NT ? args->n : segment->k;
        if (segment->k < 0) return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "gemm: segment %d has k = %lld", (int)s, (long long)segment->k);
        if (segment->piece < previous || segment->piece >= args->pieces)
            return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "gemm: segment %d is of piece %d, expected %d to %d", (int)s, (int)segment->piece, (int)previous, (int)(args->pieces - 1));
        previous = segment->piece;
        if (a_rows > 1 && segment->lda < (a_width > 1 ? a_width : 0))
            return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "gemm: segment %d: lda = %lld is less than the row of %lld", (int)s, (long long)segment->lda, (long long)a_width);
        if (b_rows > 1 && segment->ldb < (b_width > 1 ? b_width : 0))
            return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "gemm: segment %d: ldb = %lld is less than the row of %lld", (int)s, (long long)segment->ldb, (long long)b_width);
        if (segment->interleaved) return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "gemm: segment %d is interleaved, which this device has no product for", (int)s);
    }
    return LLMPAR_OK;
}

/* ---- what a product needs ---- */

struct llmpar__cuda_gemm_plan {
    int64_t tiles_m, tiles_n;
    unsigned blocks;
    int32_t levels, stages, shared_slot; /* as in the job */
    size_t shared, slot_bytes, list_bytes;
};

static llmpar__cuda_gemm_plan llmpar__cuda_gemm_plan_of(const llmpar__cuda *cuda, const llmpar_gemm_args *args)
{
    llmpar__cuda_gemm_plan plan;
    int half = args->dtype != LLMPAR_F32;
    int64_t rows = half ? (int)LLMPAR__CUDA_GEMM_HALF_M : (int)LLMPAR__CUDA_GEMM_F32_SIDE, columns = half ? (int)LLMPAR__CUDA_GEMM_HALF_N : (int)LLMPAR__CUDA_GEMM_F32_SIDE, tiles;
    size_t tile = (size_t)(rows * columns) * sizeof(float), stage = half ? (size_t)LLMPAR__CUDA_GEMM_HALF_STAGE : (size_t)LLMPAR__CUDA_GEMM_F32_STAGE;
    memset(&plan, 0, sizeof plan);
    plan.tiles_m = (args->m + rows - 1) / rows;
    plan.tiles_n = (args->n + columns - 1) / columns;
    tiles = plan.tiles_m * plan.tiles_n;
    plan.blocks = (unsigned)(tiles < cuda->multiprocessors ? tiles : cuda->multiprocessors);
    for (int32_t p = args->pieces - 1; p > 0; p /= 2) plan.levels++;
    plan.stages = half ? (int)LLMPAR__CUDA_GEMM_HALF_STAGES : (int)LLMPAR__CUDA_GEMM_F32_STAGES;
    if (plan.levels && plan.stages * stage + tile <= cuda->shared_limit) {
        plan.shared_slot = (int32_t)(plan.stages * stage);
        plan.levels--;
    } else if (half && LLMPAR__CUDA_GEMM_HALF_STAGES_DEEP * stage <= cuda->shared_limit) plan.stages = LLMPAR__CUDA_GEMM_HALF_STAGES_DEEP;
    plan.shared = plan.stages * stage + (plan.shared_slot ? tile : 0);
    plan.slot_bytes = (size_t)plan.blocks * (size_t)plan.levels * tile;
    if (args->segment_count > LLMPAR__CUDA_GEMM_RUNS) plan.list_bytes = (size_t)args->segment_count * sizeof(llmpar__cuda_gemm_run);
    return plan;
}

/* With room to align. */
static size_t llmpar__cuda_gemm_bytes(const llmpar__cuda_gemm_plan *plan) { return plan->slot_bytes + plan->list_bytes ? plan->slot_bytes + plan->list_bytes + 15 : 0; }

static size_t llmpar__cuda_gemm_exact_workspace(llmpar_device *device, const llmpar_gemm_args *args)
{
    llmpar__cuda_gemm_plan plan;
    if (args->m <= 0 || args->n <= 0) return 0;
    plan = llmpar__cuda_gemm_plan_of(llmpar__cuda_of(device), args);
    return llmpar__cuda_gemm_bytes(&plan);
}

/* ---- the list of segments ---- */

/* Where the next segment of the call begins, and the run that it and its neighbours make. */
struct llmpar__cuda_gemm_reader { const llmpar_gemm_args *args; int32_t segment; };

static int llmpar__cuda_gemm_loose(const unsigned char *begin, int64_t ld, int64_t step) { return (uintptr_t)begin % 16 || ld % 16 || step % 16; }

/* 0 at the end. Empty segments are left out. */
static int llmpar__cuda_gemm_next_run(llmpar__cuda_gemm_reader *reader, llmpar__cuda_gemm_run *run)
{
    const llmpar_gemm_args *args = reader->args;
    int64_t size = (int64_t)llmpar_dtype_size(args->dtype), step_a = 0, step_b = 0;
    memset(run, 0, sizeof *run);
    while (reader->segment < args->segment_count && args->segments[reader->segment].k == 0) reader->segment++;
    if (reader->segment == args->segment_count) return 0;
    for (; reader->segment < args->segment_count; reader->segment++) {
        const llmpar_gemm_segment *segment = &args->segments[reader->segment];
        if (!run->count) {
            run->a = (const unsigned char *)segment->a;
            run->b = (const unsigned char *)segment->b;
            run->lda = segment->lda * size;
            run->ldb = segment->ldb * size;
            run->k = (int32_t)segment->k;
            run->piece = segment->piece;
            step_a = segment->k * (args->kind == LLMPAR_GEMM_TN ? run->lda : size);
            step_b = segment->k * (args->kind == LLMPAR_GEMM_NT ? size : run->ldb);
        } else if (segment->k != run->k || (run->count + 1) * segment->k > INT32_MAX / 2 || segment->piece != run->piece + run->count || segment->lda * size != run->lda || segment->ldb * size != run->ldb || (const unsigned char *)segment->a != run->a + run->count * step_a
                   || (const unsigned char *)segment->b != run->b + run->count * step_b)
            break;
        run->count++;
    }
    /* the distance to rows that do not exist */
    if (run->count == 1 && (args->kind == LLMPAR_GEMM_TN ? run->k : args->m) == 1) run->lda = 0;
    if (run->count == 1 && (args->kind == LLMPAR_GEMM_NT ? args->n : run->k) == 1) run->ldb = 0;
    run->loose = llmpar__cuda_gemm_loose(run->a, run->lda, run->count > 1 ? step_a : 0);
    if (llmpar__cuda_gemm_loose(run->b, run->ldb, run->count > 1 ? step_b : 0)) run->loose |= 2;
    return 1;
}

/* Writes a list that does not fit a launch's parameters into the workspace, a part a launch. */
struct llmpar__cuda_gemm_part { llmpar__cuda_gemm_run runs[LLMPAR__CUDA_GEMM_RUNS]; llmpar__cuda_gemm_run *out; int32_t count; };

static __global__ void llmpar__cuda_gemm_write_list(const llmpar__cuda_gemm_part part)
{
    if ((int32_t)threadIdx.x < part.count) part.out[threadIdx.x] = part.runs[threadIdx.x];
}

/* Fills job.runs, or the list in the workspace. */
static void llmpar__cuda_gemm_list(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args, llmpar__cuda_gemm_job *job, llmpar__cuda_gemm_run *out)
{
    llmpar__cuda_gemm_reader reader = { args, 0 };
    llmpar__cuda_gemm_part part;
    llmpar__cuda_gemm_run run;
    while (job->run_count < LLMPAR__CUDA_GEMM_RUNS && llmpar__cuda_gemm_next_run(&reader, &run)) job->runs[job->run_count++] = run;
    if (!llmpar__cuda_gemm_next_run(&reader, &run)) return;
    memcpy(part.runs, job->runs, sizeof part.runs);
    part.count = job->run_count;
    part.out = out;
    job->list = out;
    do {
        if (part.count == LLMPAR__CUDA_GEMM_RUNS) {
            llmpar__cuda_launch(device, stream, llmpar__cuda_gemm_write_list, dim3(1), dim3(LLMPAR__CUDA_GEMM_RUNS), 0, part);
            part.out += part.count;
            part.count = 0;
        }
        part.runs[part.count++] = run;
        job->run_count++;
    } while (llmpar__cuda_gemm_next_run(&reader, &run));
    llmpar__cuda_launch(device, stream, llmpar__cuda_gemm_write_list, dim3(1), dim3(LLMPAR__CUDA_GEMM_RUNS), 0, part);
}

/* ---- the launch ---- */

/* Arguments are checked, m and n not 0. */
static llmpar_status llmpar__cuda_gemm_exact(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args)
{
    llmpar__cuda_gemm_plan plan = llmpar__cuda_gemm_plan_of(llmpar__cuda_of(device), args);
    llmpar__cuda_gemm_job job;
    size_t need = llmpar__cuda_gemm_bytes(&plan), bytes = args->workspace ? args->workspace_bytes : 0, size = llmpar_dtype_size(llmpar__cuda_gemm_out(args));
    unsigned char *at = (unsigned char *)args->workspace;
    void (*kernel)(llmpar__cuda_gemm_job);
    if (plan.tiles_m > INT32_MAX / (2 * LLMPAR__CUDA_GEMM_GROUP) / plan.tiles_n) /* times GROUP it is an int32_t in kernels */
        return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "gemm: m = %lld, n = %lld on device %s: expected fewer than 2^26 tiles", (long long)args->m, (long long)args->n, device->name);
    for (int32_t s = 0; s < args->segment_count; s++)
        if (args->segments[s].k >= INT32_MAX / 2) return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "gemm: segment %d has k = %lld on device %s, expected less than 2^30", (int)s, (long long)args->segments[s].k, device->name);
    if (bytes < need) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "gemm: expected a workspace of %llu bytes, got %llu", (unsigned long long)need, (unsigned long long)bytes);
    if (need) at += (16 - (uintptr_t)at % 16) % 16;
    memset(&job, 0, sizeof job);
    job.slots = at;
    llmpar__cuda_gemm_list(device, stream, args, &job, (llmpar__cuda_gemm_run *)(void *)(at + plan.slot_bytes));
    job.c = args->c;
    job.m = args->m;
    job.n = args->n;
    job.ldc = args->ldc;
    job.tiles_m = (int32_t)plan.tiles_m;
    job.tiles_n = (int32_t)plan.tiles_n;
    job.pieces = args->pieces;
    job.levels = plan.levels;
    job.shared_slot = plan.shared_slot;
    job.stages = plan.stages;
    job.accumulate = args->accumulate != 0;
    job.narrow = size == 2;
    job.aligned = (uintptr_t)args->c % 16 == 0 && (args->m == 1 || args->ldc * (int64_t)size % 16 == 0);
#define LLMPAR__CUDA_GEMM_KINDS(...) (args->kind == LLMPAR_GEMM_NT ? __VA_ARGS__ 0, 0> : args->kind == LLMPAR_GEMM_NN ? __VA_ARGS__ 0, 1> : __VA_ARGS__ 1, 1>)
    if (args->dtype == LLMPAR_BF16) kernel = LLMPAR__CUDA_GEMM_KINDS(llmpar__cuda_gemm_half<0,);
    else if (args->dtype == LLMPAR_F16) kernel = LLMPAR__CUDA_GEMM_KINDS(llmpar__cuda_gemm_half<1,);
    else kernel = LLMPAR__CUDA_GEMM_KINDS(llmpar__cuda_gemm_f32<);
#undef LLMPAR__CUDA_GEMM_KINDS
    llmpar__cuda_launch(device, stream, kernel, dim3(plan.blocks), dim3(LLMPAR__CUDA_GEMM_THREADS), plan.shared, job);
    return llmpar__cuda_end(device, stream, "gemm");
}

/* ---- the slot ---- */

static size_t llmpar__cuda_gemm_workspace(llmpar_device *device, const llmpar_gemm_args *args)
{
    if (args->m <= 0 || args->n <= 0) return 0;
    return llmpar__cuda_of(device)->desc.mode == LLMPAR_CUDA_FAST ? llmpar__cuda_gemm_library_workspace(device, args) : llmpar__cuda_gemm_exact_workspace(device, args);
}

static llmpar_status llmpar__cuda_gemm(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_gemm_check(device, args);
    if (status || args->m == 0 || args->n == 0) return status;
    return llmpar__cuda_of(device)->desc.mode == LLMPAR_CUDA_FAST ? llmpar__cuda_gemm_library(device, stream, args) : llmpar__cuda_gemm_exact(device, stream, args);
}
/* ==== src/cuda/gemm_library.cu ==== */
/* gemm_library: FAST matrix products: cuBLASLt in its own order (cuBLAS library manual, "Using the cuBLASLt API").

   The library's matrices are column-major, so it is asked for c^T = b^T a^T. Segments that go on along k where another one ended, whatever their pieces, are one product: all pieces of a dim, all leaves of a batch. Several products
   are added up by beta = 1: in c where that is f32, else in f32 in the workspace, from where the sum is rounded into c once.

   Segments whose rows are one element (stride 0), and products that the library has no algorithm for, go to the EXACT kernels, which need no workspace for one piece. They come first. Where c is below f32 and only one product
   follows a stride-0 segment with k = 1, a bias, the latter is stored in c and the product is added there: no rounding is added where the one element is 1.

   The algorithm that the library chose is kept for the shape, in a table of the device: of bounded size, the shape that came last drives out an older one. */

enum { LLMPAR__CUDA_PRODUCTS = 512, LLMPAR__CUDA_PRODUCT_PLACES = 8, LLMPAR__CUDA_GROUPS = 24 };

/* What an algorithm is chosen for. No padding: compared as bytes. */
struct llmpar__cuda_product_shape {
    int64_t m, n, k, lda, ldb, ldc;
    uint64_t workspace;
    int32_t kind, dtype, out_dtype, add; /* add: c is added to */
    int32_t align_a, align_b, align_c, tf32;
};

struct llmpar__cuda_product {
    llmpar__cuda_product_shape shape;
    int32_t known, own;      /* own: the library has none; an EXACT kernel does it */
    cublasLtMatmulAlgo_t algorithm;
    size_t workspace;        /* that it uses */
};

struct llmpar__cuda_products { llmpar__cuda_product table[LLMPAR__CUDA_PRODUCTS]; uint32_t turn; };

/* Segments that lie one behind the other along k. */
struct llmpar__cuda_gemm_group { const unsigned char *a, *b; int64_t lda, ldb, k; };

static llmpar_status llmpar__cuda_library_check(llmpar_device *device, llmpar_stream *stream, cublasStatus_t code, const char *what)
{
    if (code == CUBLAS_STATUS_SUCCESS) return LLMPAR_OK;
    return llmpar__cuda_stick(device, stream, llmpar_error_set(device->error, LLMPAR_ERR_INTERNAL, "gemm: %s: %s: %s", what, cublasLtGetStatusName(code), cublasLtGetStatusString(code)));
}

static llmpar_status llmpar__cuda_library_create(llmpar_device *device)
{
    llmpar__cuda *cuda = llmpar__cuda_of(device);
    cublasStatus_t code;
    cuda->products = llmpar_heap_zalloc(cuda->heap, 1, sizeof(llmpar__cuda_products));
    if (!cuda->products) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "cuda: no memory for the table of products");
    code = cublasLtCreate(&cuda->lt);
    if (code == CUBLAS_STATUS_SUCCESS) return LLMPAR_OK;
    cuda->lt = NULL;
    return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "cuda: cublasLtCreate: %s: %s", cublasLtGetStatusName(code), cublasLtGetStatusString(code));
}

static void llmpar__cuda_library_destroy(llmpar_device *device)
{
    llmpar__cuda *cuda = llmpar__cuda_of(device);
    if (cuda->lt) cublasLtDestroy(cuda->lt);
    cuda->lt = NULL;
    llmpar_heap_free(cuda->heap, cuda->products);
    cuda->products = NULL;
}

/* ---- one product ---- */

static cudaDataType_t llmpar__cuda_library_type(llmpar_dtype dtype) { return dtype == LLMPAR_BF16 ? CUDA_R_16BF : dtype == LLMPAR_F16 ? CUDA_R_16F : CUDA_R_32F; }

static int32_t llmpar__cuda_pointer_alignment(const void *pointer) { return (int32_t)((uintptr_t)pointer % 256 ? (uintptr_t)pointer & (~(uintptr_t)pointer + 1) : 256); }

/* What the library calls a, b, c: b, a and c transposed. */
struct llmpar__cuda_library_call { cublasLtMatmulDescOpaque_t product; cublasLtMatrixLayoutOpaque_t a, b, c; };

static cublasStatus_t llmpar__cuda_library_describe(const llmpar__cuda_product_shape *shape, llmpar__cuda_library_call *call)
{
    cudaDataType_t type = llmpar__cuda_library_type((llmpar_dtype)shape->dtype);
    cublasOperation_t turn = CUBLAS_OP_T;
    int nt = shape->kind == LLMPAR_GEMM_NT, tn = shape->kind == LLMPAR_GEMM_TN;
    cublasStatus_t code = cublasLtMatmulDescInit(&call->product, shape->tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (code == CUBLAS_STATUS_SUCCESS && nt) code = cublasLtMatmulDescSetAttribute(&call->product, CUBLASLT_MATMUL_DESC_TRANSA, &turn, sizeof turn);
    if (code == CUBLAS_STATUS_SUCCESS && tn) code = cublasLtMatmulDescSetAttribute(&call->product, CUBLASLT_MATMUL_DESC_TRANSB, &turn, sizeof turn);
    if (code == CUBLAS_STATUS_SUCCESS) code = cublasLtMatrixLayoutInit(&call->a, type, (uint64_t)(nt ? shape->k : shape->n), (uint64_t)(nt ? shape->n : shape->k), shape->ldb);
    if (code == CUBLAS_STATUS_SUCCESS) code = cublasLtMatrixLayoutInit(&call->b, type, (uint64_t)(tn ? shape->m : shape->k), (uint64_t)(tn ? shape->k : shape->m), shape->lda);
    if (code == CUBLAS_STATUS_SUCCESS) code = cublasLtMatrixLayoutInit(&call->c, llmpar__cuda_library_type((llmpar_dtype)shape->out_dtype), (uint64_t)shape->n, (uint64_t)shape->m, shape->ldc);
    return code;
}

static cublasStatus_t llmpar__cuda_library_choose(const llmpar__cuda *cuda, llmpar__cuda_library_call *call, llmpar__cuda_product *product)
{
    cublasLtMatmulPreferenceOpaque_t preference;
    cublasLtMatmulHeuristicResult_t result;
    const llmpar__cuda_product_shape *shape = &product->shape;
    uint32_t align_a = (uint32_t)shape->align_b, align_b = (uint32_t)shape->align_a, align_c = (uint32_t)shape->align_c, reduction = CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    int found = 0;
    cublasStatus_t code = cublasLtMatmulPreferenceInit(&preference);
    memset(&result, 0, sizeof result);
    if (code == CUBLAS_STATUS_SUCCESS) code = cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &shape->workspace, sizeof shape->workspace);
    if (code == CUBLAS_STATUS_SUCCESS) code = cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &align_a, sizeof align_a);
    if (code == CUBLAS_STATUS_SUCCESS) code = cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &align_b, sizeof align_b);
    if (code == CUBLAS_STATUS_SUCCESS) code = cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &align_c, sizeof align_c);
    if (code == CUBLAS_STATUS_SUCCESS) code = cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &align_c, sizeof align_c);
    /* Parts of a sum over k are added in f32, also where c is below it: it is rounded once. */
    if (code == CUBLAS_STATUS_SUCCESS && shape->out_dtype != LLMPAR_F32) code = cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction, sizeof reduction);
    if (code != CUBLAS_STATUS_SUCCESS) return code;
    code = cublasLtMatmulAlgoGetHeuristic(cuda->lt, &call->product, &call->a, &call->b, &call->c, &call->c, &preference, 1, &result, &found);
    product->own = code == CUBLAS_STATUS_NOT_SUPPORTED || (code == CUBLAS_STATUS_SUCCESS && (!found || result.state != CUBLAS_STATUS_SUCCESS));
    if (product->own) return CUBLAS_STATUS_SUCCESS;
    product->algorithm = result.algo;
    product->workspace = result.workspaceSize;
    return code;
}

/* The shape's place in the table: its own, or one that is free or given up. */
static llmpar__cuda_product *llmpar__cuda_library_place(llmpar__cuda_products *products, const llmpar__cuda_product_shape *shape)
{
    const unsigned char *bytes = (const unsigned char *)shape;
    uint32_t hash = 2166136261u;
    for (size_t i = 0; i < sizeof *shape; i++) hash = (hash ^ bytes[i]) * 16777619u; /* FNV-1a */
    for (uint32_t i = 0; i < LLMPAR__CUDA_PRODUCT_PLACES; i++) {
        llmpar__cuda_product *place = &products->table[(hash + i) % LLMPAR__CUDA_PRODUCTS];
        if (!place->known || !memcmp(&place->shape, shape, sizeof *shape)) return place;
    }
    llmpar__cuda_product *place = &products->table[(hash + products->turn++ % LLMPAR__CUDA_PRODUCT_PLACES) % LLMPAR__CUDA_PRODUCTS];
    place->known = 0;
    return place;
}

/* out (f32 or the operands' type) = the segments, or out += them, by an EXACT kernel as one piece. */
static llmpar_status llmpar__cuda_library_own(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args, const llmpar_gemm_segment *segments, int32_t count, void *out, int64_t ldc, llmpar_dtype out_dtype, int add)
{
    llmpar_gemm_args own = *args;
    own.c = out;
    own.ldc = ldc;
    own.out_dtype = out_dtype;
    own.segments = segments;
    own.segment_count = count;
    own.pieces = 1;
    own.accumulate = add;
    return llmpar__cuda_gemm_exact(device, stream, &own);
}

/* The whole call by an EXACT kernel, as one piece. */
static llmpar_status llmpar__cuda_library_flat(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args)
{
    llmpar_gemm_segment few[LLMPAR__CUDA_GEMM_RUNS], *segments = few;
    llmpar_heap *heap = llmpar__cuda_of(device)->heap;
    if (args->segment_count > LLMPAR__CUDA_GEMM_RUNS) segments = (llmpar_gemm_segment *)llmpar_heap_alloc(heap, (size_t)args->segment_count, sizeof *segments);
    if (!segments) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "gemm: no memory for %d segments", (int)args->segment_count);
    for (int32_t s = 0; s < args->segment_count; s++) {
        segments[s] = args->segments[s];
        segments[s].piece = 0;
    }
    llmpar_status status = llmpar__cuda_library_own(device, stream, args, segments, args->segment_count, args->c, args->ldc, llmpar__cuda_gemm_out(args), args->accumulate != 0);
    if (segments != few) llmpar_heap_free(heap, segments);
    return status;
}

/* out = the group's product, or out += it. */
static llmpar_status llmpar__cuda_library_product(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args, const llmpar__cuda_gemm_group *group, void *out, int64_t ldc, llmpar_dtype out_dtype, int add)
{
    llmpar__cuda *cuda = llmpar__cuda_of(device);
    llmpar__cuda_stream *state = llmpar__cuda_stream_of(device, stream);
    llmpar__cuda_product_shape shape;
    llmpar__cuda_library_call call;
    int64_t size = (int64_t)llmpar_dtype_size(args->dtype), width_a, width_b;
    const float one = 1, beta = add ? 1.0f : 0.0f;
    memset(&shape, 0, sizeof shape);
    shape.m = args->m;
    shape.n = args->n;
    shape.k = group->k;
    shape.kind = (int32_t)args->kind;
    shape.dtype = (int32_t)args->dtype;
    shape.out_dtype = (int32_t)out_dtype;
    shape.add = add;
    shape.tf32 = args->dtype == LLMPAR_F32 && cuda->desc.tf32;
    shape.workspace = state->library ? cuda->desc.library_workspace : 0;
    /* one row may have any stride; the library wants its width at least */
    width_a = args->kind == LLMPAR_GEMM_TN ? args->m : group->k;
    width_b = args->kind == LLMPAR_GEMM_NT ? group->k : args->n;
    shape.lda = group->lda / size > width_a ? group->lda / size : width_a;
    shape.ldb = group->ldb / size > width_b ? group->ldb / size : width_b;
    shape.ldc = ldc > args->n ? ldc : args->n;
    shape.align_a = llmpar__cuda_pointer_alignment(group->a);
    shape.align_b = llmpar__cuda_pointer_alignment(group->b);
    shape.align_c = llmpar__cuda_pointer_alignment(out);
    llmpar__cuda_product *product = llmpar__cuda_library_place((llmpar__cuda_products *)cuda->products, &shape);
    llmpar_status status = llmpar__cuda_library_check(device, stream, llmpar__cuda_library_describe(&shape, &call), "the description of a product");
    if (status) return status;
    if (!product->known) {
        memset(product, 0, sizeof *product);
        product->shape = shape;
        status = llmpar__cuda_library_check(device, stream, llmpar__cuda_library_choose(cuda, &call, product), "cublasLtMatmulAlgoGetHeuristic");
        if (status) return status;
        product->known = 1;
    }
    if (product->own) {
        llmpar_gemm_segment segment = { group->a, group->b, group->lda / size, group->ldb / size, group->k, 0, 0, 0 };
        if (!add || out_dtype == llmpar_dtype_sum(args->dtype)) return llmpar__cuda_library_own(device, stream, args, &segment, 1, out, ldc, out_dtype, add);
        return llmpar__cuda_library_flat(device, stream, args); /* a product behind a bias, the only one: both again */
    }
    return llmpar__cuda_library_check(device, stream,
        cublasLtMatmul(cuda->lt, &call.product, &one, group->b, &call.a, group->a, &call.b, &beta, out, &call.c, out, &call.c, &product->algorithm, state->library, product->workspace, state->handle), "cublasLtMatmul");
}

/* ---- several ---- */

struct llmpar__cuda_gemm_groups {
    llmpar__cuda_gemm_group group[LLMPAR__CUDA_GROUPS];
    llmpar_gemm_segment own[LLMPAR__CUDA_GEMM_RUNS]; /* for an EXACT kernel */
    int32_t count, own_count;
    int64_t own_k;
};

/* 0 where they do not fit. */
static int llmpar__cuda_library_group(const llmpar_gemm_args *args, llmpar__cuda_gemm_groups *groups)
{
    int64_t size = (int64_t)llmpar_dtype_size(args->dtype);
    groups->count = groups->own_count = 0;
    groups->own_k = 0;
    for (int32_t s = 0; s < args->segment_count; s++) {
        const llmpar_gemm_segment *segment = &args->segments[s];
        int64_t a_rows = args->kind == LLMPAR_GEMM_TN ? segment->k : args->m, b_rows = args->kind == LLMPAR_GEMM_NT ? args->n : segment->k;
        int32_t g = 0;
        if (!segment->k) continue;
        if ((segment->lda == 0 && a_rows > 1) || (segment->ldb == 0 && b_rows > 1)) {
            if (groups->own_count == LLMPAR__CUDA_GEMM_RUNS) return 0;
            groups->own[groups->own_count] = *segment;
            groups->own[groups->own_count++].piece = 0;
            groups->own_k += segment->k;
            continue;
        }
        for (; g < groups->count; g++) {
            llmpar__cuda_gemm_group *group = &groups->group[g];
            if (group->lda == segment->lda * size && group->ldb == segment->ldb * size && (const unsigned char *)segment->a == group->a + group->k * (args->kind == LLMPAR_GEMM_TN ? group->lda : size)
                && (const unsigned char *)segment->b == group->b + group->k * (args->kind == LLMPAR_GEMM_NT ? size : group->ldb)) {
                group->k += segment->k;
                break;
            }
        }
        if (g < groups->count) continue;
        if (g == LLMPAR__CUDA_GROUPS) return 0;
        groups->group[g].a = (const unsigned char *)segment->a;
        groups->group[g].b = (const unsigned char *)segment->b;
        groups->group[g].lda = segment->lda * size;
        groups->group[g].ldb = segment->ldb * size;
        groups->group[g].k = segment->k;
        groups->count++;
    }
    return 1;
}

/* c = in, rounded: rows of n, 8 elements a thread. */
template <typename Half> static __global__ void llmpar__cuda_gemm_narrow(const float *in, Half *c, int64_t m, int64_t n, int64_t ldc, int aligned)
{
    int64_t units = (n + 7) / 8, count = m * units;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x) {
        int64_t row = llmpar__cuda_divide(i, units), j = (i - row * units) * 8;
        const float *from = in + row * n + j;
        Half *to = c + row * ldc + j;
        if (aligned && j + 8 <= n) {
            llmpar__cuda_16 low = ((const llmpar__cuda_16 *)(const void *)from)[0], high = ((const llmpar__cuda_16 *)(const void *)from)[1], out;
            for (int e = 0; e < 4; e++) {
                Half first, second;
                llmpar__cuda_store(&first, __uint_as_float(e < 2 ? low.word[2 * e] : high.word[2 * e - 4]));
                llmpar__cuda_store(&second, __uint_as_float(e < 2 ? low.word[2 * e + 1] : high.word[2 * e - 3]));
                out.word[e] = (uint32_t)first.bits | (uint32_t)second.bits << 16;
            }
            *(llmpar__cuda_16 *)(void *)to = out;
        } else
            for (int e = 0; e < 8 && j + e < n; e++) llmpar__cuda_store(&to[e], from[e]);
    }
}

static int llmpar__cuda_gemm_is_narrow(const llmpar_gemm_args *args) { return llmpar__cuda_gemm_out(args) != llmpar_dtype_sum(args->dtype); }

/* f32 sums where c is below f32 and a piece has several segments, which are of several matrices then; pointers, which would tell, may be NULL in a query. A call without them is done by an EXACT kernel. */
static size_t llmpar__cuda_gemm_library_workspace(llmpar_device *device, const llmpar_gemm_args *args)
{
    size_t list = args->segment_count > LLMPAR__CUDA_GEMM_RUNS ? (size_t)args->segment_count * sizeof(llmpar__cuda_gemm_run) + 15 : 0, sums = (size_t)args->m * (size_t)args->n * sizeof(float) + 255;
    int several = 0;
    (void)device;
    for (int32_t s = 1; s < args->segment_count; s++) several |= args->segments[s].piece == args->segments[s - 1].piece;
    if (!several || !llmpar__cuda_gemm_is_narrow(args) || sums < list) return list;
    return sums;
}

/* Arguments are checked, m and n not 0. */
static llmpar_status llmpar__cuda_gemm_library(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args)
{
    llmpar__cuda_gemm_groups groups;
    llmpar_dtype out_dtype = llmpar__cuda_gemm_out(args), sum_dtype = llmpar_dtype_sum(args->dtype);
    int narrow = llmpar__cuda_gemm_is_narrow(args), fits = llmpar__cuda_library_group(args, &groups), add = args->accumulate != 0, wide = 0;
    void *out = args->c;
    int64_t ldc = args->ldc;
    llmpar_status status = LLMPAR_OK;
    if (narrow && fits && groups.count + (groups.own_count > 0) > 1 && !(groups.count == 1 && groups.own_k == 1)) {
        unsigned char *at = (unsigned char *)args->workspace;
        if (at) at += (256 - (uintptr_t)at % 256) % 256;
        if (at && (size_t)(at - (unsigned char *)args->workspace) + (size_t)args->m * (size_t)args->n * sizeof(float) <= args->workspace_bytes) {
            out = at;
            ldc = args->n;
            out_dtype = sum_dtype;
            wide = 1;
        } else fits = 0;
    }
    if (!fits || groups.count == 0) return llmpar__cuda_library_flat(device, stream, args); /* no group: +0, or c as it is, or what has stride 0 */
    if (groups.own_count) {
        status = llmpar__cuda_library_own(device, stream, args, groups.own, groups.own_count, out, ldc, out_dtype, add);
        add = 1;
    }
    for (int32_t g = 0; g < groups.count && !status; g++) {
        status = llmpar__cuda_library_product(device, stream, args, &groups.group[g], out, ldc, out_dtype, add);
        add = 1;
    }
    if (status) return status;
    if (wide) {
        int aligned = args->n % 8 == 0 && (uintptr_t)args->c % 16 == 0 && (args->m == 1 || args->ldc % 8 == 0);
        unsigned blocks = llmpar__cuda_blocks(llmpar__cuda_of(device), args->m * ((args->n + 7) / 8), 256, 8);
        if (args->dtype == LLMPAR_BF16) llmpar__cuda_launch(device, stream, llmpar__cuda_gemm_narrow<llmpar__cuda_bf16>, dim3(blocks), dim3(256), 0, (const float *)out, (llmpar__cuda_bf16 *)args->c, args->m, args->n, args->ldc, aligned);
        else llmpar__cuda_launch(device, stream, llmpar__cuda_gemm_narrow<llmpar__cuda_f16>, dim3(blocks), dim3(256), 0, (const float *)out, (llmpar__cuda_f16 *)args->c, args->m, args->n, args->ldc, aligned);
    }
    return llmpar__cuda_end(device, stream, "gemm");
}
/* ==== src/cuda/attention_internal.h ==== */
/* attention_internal: what the attention files share: the arguments as kernels take them, documents, tiles of 16-bit elements in shared memory as mma.sync reads them, and one step of the running softmax.

   Which kernel: bf16 and f16 with head_dim 64 or 128 go through mma.sync (attention.cu, attention_decode.cu, attention_backward.cu); everything else through plain f32 products (attention_simple.cu). The choice follows from dtype, head_dim and scale, which all cuts of one call have in common.

   Order. Along the keys (or, in dk and dv, the queries) everything goes in steps of 16 or in tiles of 64 that are counted from the document's start. Along the rows that a block owns nothing is
   summed, so those blocks lie anywhere, may hold rows of several documents and go through these one after the other; what a row may not see has weight +0, which leaves its sums as they are. */
#define LLMPAR__CUDA_ATTENTION_LOG2E 1.4426950408889634f
#define LLMPAR__CUDA_ATTENTION_LN2 0.6931471805599453f
#define LLMPAR__CUDA_ATTENTION_THREADS 128 /* of a block on mma.sync: four warps */
#define LLMPAR__CUDA_ATTENTION_TILE 64     /* keys between two looks at the maximum */
#define LLMPAR__CUDA_ATTENTION_FEW 16      /* rows (heads of a group times queries) that decoding takes at once */

/* Of one call, or of some sequences of it: pointers are at the first one's. */
typedef struct llmpar__cuda_attention_call {
    const void *q, *k, *v, *dout;
    void *out, *dq, *dk, *dv;
    float *lse, *scores;       /* scores: attention_decode.cu */
    float *delta;              /* [batch, heads, t] rows' sums of dout * out */
    float *dk_heads, *dv_heads;/* [batch, t, heads, head_dim], or NULL: groups of one, stored at once */
    const int32_t *doc_start;  /* or NULL */
    int32_t *doc_end;          /* [batch, t] at a document's start: where it ends; NULL without doc_start */
    int64_t batch, ldq, ldk, ldv, ldo, ld_dk, ld_dv, ld_scores;
    int32_t tq, tk, tk_stride, heads, kv_heads, group, head_dim;
    int32_t wide;              /* rows of everything that is read start at multiples of 16 bytes */
    int32_t pairs;             /* and what is written may be stored two elements at a time */
    int32_t dkv_float;         /* dk and dv are f32 */
    int32_t dtype;
    float scale, scale_log2;   /* scale_log2 = scale / ln 2 */
} llmpar__cuda_attention_call;

static void llmpar__cuda_attention_decode(llmpar_device *device, llmpar_stream *stream, llmpar__cuda_attention_call a);
static size_t llmpar__cuda_attention_decode_workspace(const llmpar_attention_args *args);
static llmpar_status llmpar__cuda_attention_simple(llmpar_device *device, llmpar_stream *stream, llmpar__cuda_attention_call a);
static llmpar_status llmpar__cuda_attention_simple_backward(llmpar_device *device, llmpar_stream *stream, llmpar__cuda_attention_call a);
/* What both slots refuse, and the arguments as kernels take them. */
static llmpar_status llmpar__cuda_attention_check(llmpar_device *device, const char *what, const llmpar_attention_args *args, size_t need, int backward);
static void llmpar__cuda_attention_take(const llmpar_attention_args *args, llmpar__cuda_attention_call *out);
/* Does mma.sync take the call? */
static int llmpar__cuda_attention_by_mma(const llmpar_attention_args *args);

/* Sequences that one launch takes: its grid has one dimension. */
static int64_t llmpar__cuda_attention_sequences(int64_t blocks_each, int64_t batch)
{
    int64_t most = blocks_each > 0 ? 0x7fffffff / blocks_each : batch;
    return most < 1 ? 1 : most < batch ? most : batch;
}

/* What a block owns: rows [first, first + rows) of a head and sequence. The heads of a group are neighbours, and long rows come before short ones: queries from the last, keys from the first. Asked for again
   where it is needed, since the products need the registers. */
typedef struct llmpar__cuda_attention_place {
    int64_t b;
    int kv, h, first;
} llmpar__cuda_attention_place;

static __device__ __forceinline__ llmpar__cuda_attention_place llmpar__cuda_attention_own(const llmpar__cuda_attention_call &a, int t, int rows, int from_last)
{
    unsigned block = llmpar__cu_block(), group = (unsigned)a.group, blocks = (unsigned)(t + rows - 1) / (unsigned)rows, tile = block / group % blocks, task = block / group / blocks;
    llmpar__cuda_attention_place p;
    p.b = task / (unsigned)a.kv_heads;
    p.kv = (int)(task % (unsigned)a.kv_heads);
    p.h = p.kv * a.group + (int)(block % group);
    p.first = (int)(from_last ? blocks - 1 - tile : tile) * rows;
    return p;
}

/* ---- documents ---- */

/* Where the document of an absolute position begins. Values that no document has are cut to what the memory allows: the host cannot look at them. */
static __device__ __forceinline__ int llmpar__cuda_document(const int32_t *start, int position)
{
    int begin = start ? start[position] : 0;
    return min(max(begin, 0), position);
}
/* The end of the run of positions from `position` on, below `limit`, that have its document. Starts do not fall, so it can be bisected. */
static __device__ __forceinline__ int llmpar__cuda_document_run(const int32_t *start, int position, int limit)
{
    int same = position, end = limit;
    if (!start) return limit;
    if (start[limit - 1] == start[position]) return limit;
    while (end - same > 1) {
        int middle = (same + end) / 2;
        if (start[middle] == start[position]) same = middle;
        else end = middle;
    }
    return end;
}

/* The logarithm, to about 1e-7 of it or absolutely: x = 2^e m with m between sqrt(1/2) and sqrt(2), log m = 2 artanh((m - 1) / (m + 1)). x is positive and normal, or infinite or NaN and stays so. */
static __device__ __forceinline__ float llmpar__cuda_attention_log(float x)
{
    uint32_t bits = __float_as_uint(x), up = bits - 0x3f3504f3u;
    int exponent = (int)(up & 0xff800000u) >> 23;
    float m = __uint_as_float(bits - (up & 0xff800000u)), z = __fdiv_rn(__fsub_rn(m, 1.0f), __fadd_rn(m, 1.0f)), w = __fmul_rn(z, z);
    float series = __fmaf_rn(__fmaf_rn(__fmaf_rn(__fmaf_rn(w, 1.0f / 9, 1.0f / 7), w, 1.0f / 5), w, 1.0f / 3), __fmul_rn(__fmul_rn(w, z), 2.0f), __fmul_rn(z, 2.0f));
    if (!(x < 3.0e38f)) return x;
    return __fmaf_rn((float)exponent, LLMPAR__CUDA_ATTENTION_LN2, series);
}

/* The sum over the lanes of a warp, as a tree; every lane gets it. */
static __device__ __forceinline__ float llmpar__cuda_attention_sum(float x)
{
    for (int step = 16; step > 0; step /= 2) x = __fadd_rn(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

/* ---- 16-bit elements: tiles and fragments ---- */

static __device__ __forceinline__ void llmpar__cuda_attention_mma(llmpar__cuda_bf16, float d[4], const uint32_t a[4], const uint32_t b[2]) { llmpar__cu_mma_bf16(d, a, b); }
static __device__ __forceinline__ void llmpar__cuda_attention_mma(llmpar__cuda_f16, float d[4], const uint32_t a[4], const uint32_t b[2]) { llmpar__cu_mma_f16(d, a, b); }
static __device__ __forceinline__ uint32_t llmpar__cuda_attention_pack(llmpar__cuda_bf16, float low, float high) { return llmpar__cu_pack_bf16(low, high); }
static __device__ __forceinline__ uint32_t llmpar__cuda_attention_pack(llmpar__cuda_f16, float low, float high) { return llmpar__cu_pack_f16(low, high); }

/* A tile lies in rows of E elements, its 16-byte parts exchanged by row, so that eight rows at one place of the row lie in different banks. */
template <int E> static __device__ __forceinline__ uint16_t *llmpar__cuda_tile_at(uint16_t *tile, int row, int part) { return tile + row * E + (part ^ (row & 7)) * 8; }

/* A thread brings 16 bytes of every STEP-th row of a tile: where its part of a matrix's row 0 begins. */
template <int E> static __device__ __forceinline__ const uint16_t *llmpar__cuda_tile_mine(const uint16_t *matrix, int64_t ld) { return matrix + (int)threadIdx.x / (E / 8) * ld + (int)threadIdx.x % (E / 8) * 8; }

/* Rows [first, first + Rows) of a matrix of `ld` elements a row into a tile; those from limit on become zero and are not read. In the background where rows are aligned; commit and wait are the caller's. */
template <int E, int Rows> static __device__ __forceinline__ void llmpar__cuda_tile_load(uint16_t *tile, const uint16_t *mine, int64_t ld, int first, int limit, int wide, int thread = (int)threadIdx.x)
{
    enum { STEP = LLMPAR__CUDA_ATTENTION_THREADS * 8 / E };
    int row = thread / (E / 8);
    uint16_t *to = llmpar__cuda_tile_at<E>(tile, row, thread % (E / 8));
    const uint16_t *at = mine + first * ld;
    if (wide) {
#pragma unroll
        for (int i = 0; i < Rows; i += STEP, at += STEP * ld) llmpar__cu_copy_async(to + i * E, at, first + row + i < limit ? 16 : 0); /* 0: `at` is not looked at */
    } else {
#pragma unroll 1
        for (int i = 0; i < Rows; i += STEP, at += STEP * ld)
            for (int x = 0; x < 8; x++) to[i * E + x] = first + row + i < limit ? at[x] : (uint16_t)0;
    }
}

/* Where a lane's 16 bytes of a fragment begin in rows 0 .. 15 and columns 0 .. 15 of a tile; columns further on by 16 k differ in the bits of 16 k alone. `across`: lanes 8 .. 15 name the other half of the columns,
   else the other half of the rows. */
template <int E> static __device__ __forceinline__ int llmpar__cuda_tile_lane(int across, int thread = (int)threadIdx.x)
{
    int lane = thread & 31, row = across ? (lane >> 4) * 8 + (lane & 7) : lane & 15, part = across ? lane >> 3 & 1 : lane >> 4;
    return row * E + (part ^ (row & 7)) * 8;
}
/* a: rows row .. row+15, columns 16k .. 16k+15; lane: not across. */
template <int E> static __device__ __forceinline__ void llmpar__cuda_tile_a(uint32_t a[4], const uint16_t *tile, int lane, int row, int k) { llmpar__cu_ldmatrix_x4(a, tile + row * E + (lane ^ 16 * k)); }
/* b of a product with the tile's transpose: its rows row .. row+15 are 16 columns of the product (b[0..1], b[2..3]), its columns 16k .. 16k+15 are summed; lane: across. */
template <int E> static __device__ __forceinline__ void llmpar__cuda_tile_b(uint32_t b[4], const uint16_t *tile, int lane, int row, int k) { llmpar__cu_ldmatrix_x4(b, tile + row * E + (lane ^ 16 * k)); }
/* b of a product with the tile: its rows row .. row+15 are summed, its columns 16n .. 16n+15 are those of the product; lane: not across. */
template <int E> static __device__ __forceinline__ void llmpar__cuda_tile_b_rows(uint32_t b[4], const uint16_t *tile, int lane, int row, int n) { llmpar__cu_ldmatrix_x4_trans(b, tile + row * E + (lane ^ 16 * n)); }

/* One step of the running softmax over 64 scores of 16 rows, a thread's part as mma.sync leaves it: s becomes the weights, 2^(s scale_log2 - top). top: of the scores times scale_log2, so far; total: of the
   weights in this thread's columns; factor: what the sums so far shrink by. Scores that are -inf weigh +0, and a step of nothing else changes nothing. */
static __device__ __forceinline__ void llmpar__cuda_attention_softmax(float s[8][4], float top[2], float total[2], float factor[2], float scale_log2)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float most = s[0][2 * r], now, base, sum;
#pragma unroll
        for (int n = 0; n < 8; n++) most = fmaxf(most, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        now = fmaxf(top[r], __fmul_rn(most, scale_log2));
        base = now == llmpar__cuda_minus_infinity() ? 0.0f : now;
        factor[r] = llmpar__cu_exp2(__fsub_rn(top[r], base));
        sum = __fmul_rn(total[r], factor[r]);
#pragma unroll
        for (int n = 0; n < 8; n++) {
            s[n][2 * r] = llmpar__cu_exp2(__fmaf_rn(s[n][2 * r], scale_log2, -base));
            s[n][2 * r + 1] = llmpar__cu_exp2(__fmaf_rn(s[n][2 * r + 1], scale_log2, -base));
            sum = __fadd_rn(__fadd_rn(sum, s[n][2 * r]), s[n][2 * r + 1]);
        }
        top[r] = now;
        total[r] = sum;
    }
}

/* Two neighbours of a row, rounded; -0 becomes +0, since a chain of products can underflow to it. */
template <typename Type> static __device__ __forceinline__ void llmpar__cuda_attention_store(Type *out, float low, float high, int pair)
{
    Type two[2];
    llmpar__cuda_store(&two[0], __fadd_rn(low, 0.0f));
    llmpar__cuda_store(&two[1], __fadd_rn(high, 0.0f));
    if (pair) *(uint32_t *)(void *)out = (uint32_t)two[0].bits | (uint32_t)two[1].bits << 16;
    else { out[0] = two[0]; out[1] = two[1]; }
}
/* ==== src/cuda/attention.cu ==== */
/* attention: causal softmax attention with grouped queries and packed documents, forward (Dao et al. 2022, "FlashAttention"; Dao 2023, "FlashAttention-2"), on mma.sync: bf16 and f16, head_dim 64 and 128.

        keys of one document, tiles of 64 counted from its start
        | tile 0 | tile 1 | tile 2 |
     q  |XXXXXXXX|XXXXX   |        |   a block of four warps owns 128 query rows of one head, a warp 32 of them, and walks the key tiles from left to right with a running
     q  |XXXXXXXX|XXXXXX  |        |   maximum. Scores and weights stay in registers: what one product leaves is what the next one takes.
     q  |XXXXXXXX|XXXXXXX |        |

   A row's bits depend on its query and on the keys of its document up to itself: scores are chains over head_dim, maxima have no order, and weights, sums and outputs go tile by tile from the document's start.
   Where a block holds rows of several documents it walks each one's tiles in turn. So a decode step (attention_decode.cu) has the bits of the whole sequence, a document those that it has alone, a head those
   that it has among others.
   While scores are computed the tile's values arrive, while values are multiplied the next tile's keys do (cp.async). */

/* Rows of a block. */
#define LLMPAR__CUDA_ATTENTION_ROWS 128

template <typename Type, int E> static __global__ void __launch_bounds__(LLMPAR__CUDA_ATTENTION_THREADS, 2) llmpar__cuda_attention_forward(llmpar__cuda_attention_call a)
{
    enum { ROWS = LLMPAR__CUDA_ATTENTION_ROWS, TILE = LLMPAR__CUDA_ATTENTION_TILE };
    LLMPAR__CUDA_SHARED(uint16_t, queries);
    uint16_t *keys = queries + ROWS * E, *values = keys + TILE * E;
    const llmpar__cuda_attention_place p = llmpar__cuda_attention_own(a, a.tq, ROWS, 1);
    const int offset = a.tk - a.tq, lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, down = llmpar__cuda_tile_lane<E>(0), across = llmpar__cuda_tile_lane<E>(1);
    const uint16_t *k = (const uint16_t *)a.k + p.b * a.tk_stride * a.ldk + (int64_t)p.kv * E, *v = (const uint16_t *)a.v + p.b * a.tk_stride * a.ldv + (int64_t)p.kv * E;
    const uint16_t **mine = (const uint16_t **)(void *)(values + TILE * E) + threadIdx.x; /* of keys, then of values: sums take all registers */
    const float least = llmpar__cuda_minus_infinity();
    const int position = offset + p.first + warp * 32, limit = offset + min(p.first + ROWS, a.tq); /* of the warp's first row; the end of the block's */
    uint32_t own[2][E / 16][4]; /* the warp's queries, where registers have room for them: reading shared memory takes about as long as the products */
    float out[2][E / 8][4], top[2][2], total[2][2];
    mine[0] = llmpar__cuda_tile_mine<E>(k, a.ldk);
    mine[LLMPAR__CUDA_ATTENTION_THREADS] = llmpar__cuda_tile_mine<E>(v, a.ldv);
    llmpar__cuda_tile_load<E, ROWS>(queries, llmpar__cuda_tile_mine<E>((const uint16_t *)a.q + p.b * a.tq * a.ldq + (int64_t)p.h * E, a.ldq), a.ldq, p.first, a.tq, a.wide);
    llmpar__cu_copy_async_commit();
#pragma unroll
    for (int m = 0; m < 2; m++) {
        top[m][0] = top[m][1] = least;
        total[m][0] = total[m][1] = 0;
#pragma unroll
        for (int n = 0; n < E / 8; n++) out[m][n][0] = out[m][n][1] = out[m][n][2] = out[m][n][3] = 0;
    }
#pragma unroll 1
    for (int low = offset + p.first, high; low < limit; low = high) {
        const int32_t *start = a.doc_start ? a.doc_start + llmpar__cuda_attention_own(a, a.tq, ROWS, 1).b * a.tk : NULL;
        const int begin = llmpar__cuda_document(start, low);
        high = llmpar__cuda_document_run(start, low, limit);
        llmpar__cuda_tile_load<E, TILE>(keys, mine[0], a.ldk, begin, high, a.wide);
        llmpar__cu_copy_async_commit();
        if (E == 64) {
            llmpar__cu_copy_async_wait<1>();
            __syncthreads();
#pragma unroll
            for (int x = 0; x < 2 * E / 16; x++) llmpar__cuda_tile_a<E>(own[x % 2][x / 2], queries, down, warp * 32 + 16 * (x % 2), x / 2);
        }
#pragma unroll 1
        for (int first = begin; first < high; first += TILE) {
            /* rows above the diagonal and those of other documents take no part; both are whole warps most of the time */
            int active = low < position + 32 && high > position && first < position + 32, partly = low > position || high < position + 32 || first + TILE - 1 > position;
            float s[2][8][4];
            llmpar__cu_copy_async_wait<0>();
            __syncthreads();
            llmpar__cuda_tile_load<E, TILE>(values, mine[LLMPAR__CUDA_ATTENTION_THREADS], a.ldv, first, high, a.wide);
            llmpar__cu_copy_async_commit();
            if (active) {
#pragma unroll
                for (int m = 0; m < 2; m++)
#pragma unroll
                    for (int n = 0; n < 8; n++) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0;
#pragma unroll 4
                for (int x = 0; x < E / 16; x++) {
                    uint32_t left[2][4], right[4];
#pragma unroll
                    for (int m = 0; m < 2; m++)
                        if (E > 64) llmpar__cuda_tile_a<E>(left[m], queries, down, warp * 32 + 16 * m, x);
#pragma unroll
                    for (int n = 0; n < 4; n++) {
                        llmpar__cuda_tile_b<E>(right, keys, across, 16 * n, x);
#pragma unroll
                        for (int m = 0; m < 2; m++) {
                            llmpar__cuda_attention_mma(Type(), s[m][2 * n], E > 64 ? left[m] : own[m][x], right);
                            llmpar__cuda_attention_mma(Type(), s[m][2 * n + 1], E > 64 ? left[m] : own[m][x], right + 2);
                        }
                    }
                }
            }
            llmpar__cu_copy_async_wait<0>();
            __syncthreads();
            if (first + TILE < high) {
                llmpar__cuda_tile_load<E, TILE>(keys, mine[0], a.ldk, first + TILE, high, a.wide);
                llmpar__cu_copy_async_commit();
            }
            if (!active) continue;
            if (partly) {
                int row = position + (lane >> 2), column = first + 2 * (lane & 3);
#pragma unroll
                for (int m = 0; m < 2; m++)
#pragma unroll
                    for (int n = 0; n < 8; n++)
#pragma unroll
                        for (int i = 0; i < 4; i++)
                            if (row + (16 * m + 8 * (i >> 1)) < low || row + (16 * m + 8 * (i >> 1)) >= high || 8 * n + (i & 1) - (16 * m + 8 * (i >> 1)) > row - column) s[m][n][i] = least;
            }
#pragma unroll
            for (int m = 0; m < 2; m++) {
                float factor[2];
                llmpar__cuda_attention_softmax(s[m], top[m], total[m], factor, a.scale_log2);
                if (__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
                    for (int n = 0; n < E / 8; n++) {
                        out[m][n][0] = __fmul_rn(out[m][n][0], factor[0]);
                        out[m][n][1] = __fmul_rn(out[m][n][1], factor[0]);
                        out[m][n][2] = __fmul_rn(out[m][n][2], factor[1]);
                        out[m][n][3] = __fmul_rn(out[m][n][3], factor[1]);
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < TILE / 16; j++) {
                uint32_t left[2][4], right[4];
#pragma unroll
                for (int m = 0; m < 2; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++) left[m][i] = llmpar__cuda_attention_pack(Type(), s[m][2 * j + (i >> 1)][2 * (i & 1)], s[m][2 * j + (i >> 1)][2 * (i & 1) + 1]);
#pragma unroll
                for (int n = 0; n < E / 16; n++) {
                    llmpar__cuda_tile_b_rows<E>(right, values, down, 16 * j, n);
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        llmpar__cuda_attention_mma(Type(), out[m][2 * n], left[m], right);
                        llmpar__cuda_attention_mma(Type(), out[m][2 * n + 1], left[m], right + 2);
                    }
                }
            }
        }
    }
    const llmpar__cuda_attention_place o = llmpar__cuda_attention_own(a, a.tq, ROWS, 1);
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float sum = total[m][r], inverse;
            int row = o.first + warp * 32 + 16 * m + 8 * r + (lane >> 2);
            sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 1));
            sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 2));
            inverse = __fdiv_rn(1.0f, sum);
            if (row >= a.tq) continue;
            if (a.lse && (lane & 3) == 0) a.lse[(o.b * a.heads + o.h) * a.tq + row] = __fmaf_rn(top[m][r], LLMPAR__CUDA_ATTENTION_LN2, llmpar__cuda_attention_log(sum));
            Type *to = (Type *)a.out + (o.b * a.tq + row) * a.ldo + (int64_t)o.h * E + 2 * (lane & 3);
#pragma unroll
            for (int n = 0; n < E / 8; n++) llmpar__cuda_attention_store(to + 8 * n, __fmul_rn(out[m][n][2 * r], inverse), __fmul_rn(out[m][n][2 * r + 1], inverse), a.pairs);
        }
}

/* ---- host ---- */

static int llmpar__cuda_attention_by_mma(const llmpar_attention_args *args)
{
    double scale = args->scale * 1.4426950408889634;
    return (args->dtype == LLMPAR_BF16 || args->dtype == LLMPAR_F16) && (args->head_dim == 64 || args->head_dim == 128) && scale > 1e-20 && scale < 1e20; /* the maximum is taken before scaling */
}

static void llmpar__cuda_attention_take(const llmpar_attention_args *args, llmpar__cuda_attention_call *out)
{
    size_t size = llmpar_dtype_size(args->dtype);
    memset(out, 0, sizeof *out);
    out->q = args->q; out->k = args->k; out->v = args->v; out->out = args->out; out->lse = (float *)args->lse;
    out->doc_start = args->doc_start;
    out->batch = args->batch; out->ldq = args->ldq; out->ldk = args->ldk; out->ldv = args->ldv; out->ldo = args->ldo;
    out->tq = (int32_t)args->tq; out->tk = (int32_t)args->tk; out->tk_stride = (int32_t)args->tk_stride;
    out->heads = (int32_t)args->heads; out->kv_heads = (int32_t)args->kv_heads; out->group = (int32_t)(args->heads / args->kv_heads); out->head_dim = (int32_t)args->head_dim;
    out->wide = (((uintptr_t)args->q | (uintptr_t)args->k | (uintptr_t)args->v | (size_t)(args->ldq | args->ldk | args->ldv) * size) & 15u) == 0;
    out->pairs = (((uintptr_t)args->out | (size_t)args->ldo * size) & (2 * size - 1)) == 0;
    out->dtype = (int32_t)args->dtype;
    out->scale = (float)args->scale;
    out->scale_log2 = (float)(args->scale * 1.4426950408889634);
}

static llmpar_status llmpar__cuda_attention_check(llmpar_device *device, const char *what, const llmpar_attention_args *args, size_t need, int backward)
{
    llmpar_status status = llmpar__cuda_dtype(device, what, args->dtype, 1);
    if (status) return status;
    if (args->kv_heads < 1 || args->heads % args->kv_heads || args->head_dim < 1)
        return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "%s: %lld heads, %lld kv heads, head_dim %lld: expected heads to be a multiple of kv heads", what, (long long)args->heads, (long long)args->kv_heads, (long long)args->head_dim);
    if (args->tq > args->tk || args->tk > args->tk_stride || (backward && (args->tq != args->tk || args->tk != args->tk_stride)))
        return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "%s: tq %lld, tk %lld, tk_stride %lld: expected %s", what, (long long)args->tq, (long long)args->tk, (long long)args->tk_stride, backward ? "three equal numbers" : "tq <= tk <= tk_stride");
    if (args->tk_stride >= 1 << 24 || args->heads >= 1 << 16 || args->head_dim >= 1 << 16 || args->heads / args->kv_heads > 128)
        return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "%s: tk_stride %lld, %lld heads, %lld kv heads, head_dim %lld on device %s: expected less than 2^24, 2^16, 2^16 and 2^16, and at most 128 heads for a kv head", what, (long long)args->tk_stride, (long long)args->heads,
                                (long long)args->kv_heads, (long long)args->head_dim, device->name);
    if (need > 0 && (!args->workspace || args->workspace_bytes < need))
        return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "%s: workspace of %llu bytes, expected %llu", what, (unsigned long long)args->workspace_bytes, (unsigned long long)need);
    return LLMPAR_OK;
}

static size_t llmpar__cuda_attention_workspace(llmpar_device *device, const llmpar_attention_args *args)
{
    (void)device;
#ifdef LLMPAR_USE_CUDNN
    if (llmpar__cuda_of(device)->desc.cudnn) return llmpar__cuda_attention_cudnn_workspace(device, args, NULL);
#endif
    if (args->batch < 1 || args->tq < 1 || args->tk < 1 || args->heads < 1 || args->kv_heads < 1 || args->heads % args->kv_heads || !llmpar__cuda_attention_by_mma(args)) return 0;
    return llmpar__cuda_attention_decode_workspace(args);
}

template <typename Type, int E> static void llmpar__cuda_attention_forward_launch(llmpar_device *device, llmpar_stream *stream, const llmpar__cuda_attention_call *a, int64_t blocks)
{
    llmpar__cuda_launch(device, stream, llmpar__cuda_attention_forward<Type, E>, dim3((unsigned)blocks), dim3(LLMPAR__CUDA_ATTENTION_THREADS), (size_t)(LLMPAR__CUDA_ATTENTION_ROWS + 2 * LLMPAR__CUDA_ATTENTION_TILE) * E * 2 + 2 * LLMPAR__CUDA_ATTENTION_THREADS * sizeof(void *), *a);
}

/* Some sequences. */
static llmpar_status llmpar__cuda_attention_part(llmpar_device *device, llmpar_stream *stream, const llmpar__cuda_attention_call *a, int by_mma)
{
    int64_t blocks = (a->tq + LLMPAR__CUDA_ATTENTION_ROWS - 1) / LLMPAR__CUDA_ATTENTION_ROWS * (int64_t)a->heads * a->batch;
    if (!by_mma) return llmpar__cuda_attention_simple(device, stream, *a);
    if ((int64_t)a->group * a->tq <= LLMPAR__CUDA_ATTENTION_FEW) llmpar__cuda_attention_decode(device, stream, *a);
    else if (a->dtype == LLMPAR_BF16 && a->head_dim == 64) llmpar__cuda_attention_forward_launch<llmpar__cuda_bf16, 64>(device, stream, a, blocks);
    else if (a->dtype == LLMPAR_BF16) llmpar__cuda_attention_forward_launch<llmpar__cuda_bf16, 128>(device, stream, a, blocks);
    else if (a->head_dim == 64) llmpar__cuda_attention_forward_launch<llmpar__cuda_f16, 64>(device, stream, a, blocks);
    else llmpar__cuda_attention_forward_launch<llmpar__cuda_f16, 128>(device, stream, a, blocks);
    return LLMPAR_OK;
}

LLMPAR__CUDA_SLOT(attention, llmpar_attention_args)
{
    llmpar__cuda_attention_call all, a;
    int64_t step;
    size_t size = llmpar_dtype_size(args->dtype);
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (status || args->batch <= 0 || args->tq <= 0 || args->heads <= 0) return status;
#ifdef LLMPAR_USE_CUDNN
    if (llmpar__cuda_of(device)->desc.cudnn) return llmpar__cuda_attention_cudnn(device, stream, args, NULL);
#endif
    status = llmpar__cuda_attention_check(device, "attention", args, llmpar__cuda_attention_workspace(device, args), 0);
    if (status) return status;
    llmpar__cuda_attention_take(args, &all);
    all.scores = (float *)(void *)(((uintptr_t)args->workspace + 7u) & ~(uintptr_t)7u);
    step = llmpar__cuda_attention_sequences((args->tk + 15) / 16 * args->heads * 8, args->batch); /* more blocks a sequence than any kernel has */
    for (int64_t b = 0; !status && b < args->batch; b += step) {
        a = all;
        a.batch = args->batch - b < step ? args->batch - b : step;
        a.q = (const char *)all.q + (size_t)(b * all.tq * all.ldq) * size;
        a.k = (const char *)all.k + (size_t)(b * all.tk_stride * all.ldk) * size;
        a.v = (const char *)all.v + (size_t)(b * all.tk_stride * all.ldv) * size;
        a.out = (char *)all.out + (size_t)(b * all.tq * all.ldo) * size;
        if (a.lse) a.lse += b * all.heads * all.tq;
        if (a.doc_start) a.doc_start += b * all.tk;
        status = llmpar__cuda_attention_part(device, stream, &a, llmpar__cuda_attention_by_mma(args));
    }
    return status ? status : llmpar__cuda_end(device, stream, "attention");
}

#undef LLMPAR__CUDA_ATTENTION_ROWS
/* ==== src/cuda/attention_decode.cu ==== */
/* attention_decode: forward for few rows, as a decode step has them: no more than 16 (heads of a group times queries), with the bits of attention.cu. Keys and values are read once.

     scores:   a block owns 64 keys of one KV head and leaves its 16 rows of scores in the workspace: all keys at once.
     outputs:  a warp owns 16 columns of the output and walks the keys from the document's start: maximum, weights and sums have the order of the contract, columns of the output have nothing in common.

   Row r of the 16 is query r / group, head r % group of the group. A score is the same chain over head_dim wherever it stands in its fragment, and the walk is that of attention.cu. */

#define LLMPAR__CUDA_DECODE_STAGES 4   /* tiles of values under way */
#define LLMPAR__CUDA_DECODE_COLUMNS 16 /* of the output, for a warp */

template <typename Type, int E> static __global__ void __launch_bounds__(LLMPAR__CUDA_ATTENTION_THREADS) llmpar__cuda_decode_scores(llmpar__cuda_attention_call a)
{
    enum { ROWS = LLMPAR__CUDA_ATTENTION_FEW, TILE = LLMPAR__CUDA_ATTENTION_TILE };
    LLMPAR__CUDA_SHARED(uint16_t, queries);
    uint16_t *keys = queries + ROWS * E;
    int tiles = (a.tk + TILE - 1) / TILE, first = (int)(blockIdx.x % (unsigned)tiles) * TILE, offset = a.tk - a.tq, rows = a.group * a.tq, lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, down = llmpar__cuda_tile_lane<E>(0), across = llmpar__cuda_tile_lane<E>(1);
    int64_t task = blockIdx.x / (unsigned)tiles, b = task / a.kv_heads;
    int kv = (int)(task % a.kv_heads);
    const uint16_t *q = (const uint16_t *)a.q + b * a.tq * a.ldq + (int64_t)kv * a.group * E;
    float s[2][4] = { { 0, 0, 0, 0 }, { 0, 0, 0, 0 } };
    /* no row sees keys before the first query's document */
    if (a.doc_start && first + TILE <= llmpar__cuda_document(a.doc_start + b * a.tk, offset)) return;
    llmpar__cuda_tile_load<E, TILE>(keys, llmpar__cuda_tile_mine<E>((const uint16_t *)a.k + b * a.tk_stride * a.ldk + (int64_t)kv * E, a.ldk), a.ldk, first, a.tk, a.wide);
    llmpar__cu_copy_async_commit();
    for (int at = (int)threadIdx.x; at < ROWS * E / 8; at += LLMPAR__CUDA_ATTENTION_THREADS) {
        int row = at / (E / 8), part = at % (E / 8);
        uint16_t *to = llmpar__cuda_tile_at<E>(queries, row, part);
        const uint16_t *from = q + row / a.group * a.ldq + row % a.group * E + part * 8;
        if (a.wide) llmpar__cu_copy_async(to, from, row < rows ? 16 : 0);
        else
            for (int x = 0; x < 8; x++) to[x] = row < rows ? from[x] : (uint16_t)0;
    }
    llmpar__cu_copy_async_commit();
    llmpar__cu_copy_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int x = 0; x < E / 16; x++) {
        uint32_t left[4], right[4];
        llmpar__cuda_tile_a<E>(left, queries, down, 0, x);
        llmpar__cuda_tile_b<E>(right, keys, across, 16 * warp, x);
        llmpar__cuda_attention_mma(Type(), s[0], left, right);
        llmpar__cuda_attention_mma(Type(), s[1], left, right + 2);
    }
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = (lane >> 2) + 8 * r, key = first + 16 * warp + 8 * n + 2 * (lane & 3);
            llmpar__cuda_pair_of_floats two = { { s[n][2 * r], s[n][2 * r + 1] } };
            if (row < rows && key < a.tk) *(llmpar__cuda_pair_of_floats *)(void *)(a.scores + (task * rows + row) * a.ld_scores + key) = two;
        }
}

/* 64 rows of 32 bytes of a tile of values; their halves are exchanged so that eight rows lie in different banks. */
static __device__ __forceinline__ uint16_t *llmpar__cuda_decode_at(uint16_t *tile, int row, int part) { return tile + row * LLMPAR__CUDA_DECODE_COLUMNS + (part ^ (row >> 2 & 1)) * 8; }

static __device__ __forceinline__ void llmpar__cuda_decode_load(uint16_t *tile, const uint16_t *v, int64_t ld, int first, int limit, int wide)
{
    int lane = (int)threadIdx.x;
    if (wide)
        for (int i = lane; i < 2 * LLMPAR__CUDA_ATTENTION_TILE; i += 32) {
            int row = i / 2, there = first + row < limit;
            llmpar__cu_copy_async(llmpar__cuda_decode_at(tile, row, i % 2), there ? v + (first + row) * ld + i % 2 * 8 : v, there ? 16 : 0);
        }
    else
        for (int i = lane; i < LLMPAR__CUDA_DECODE_COLUMNS * LLMPAR__CUDA_ATTENTION_TILE; i += 32) {
            int row = i / LLMPAR__CUDA_DECODE_COLUMNS, x = i % LLMPAR__CUDA_DECODE_COLUMNS;
            llmpar__cuda_decode_at(tile, row, x / 8)[x % 8] = first + row < limit ? v[(first + row) * ld + x] : (uint16_t)0;
        }
}

template <typename Type> static __global__ void __launch_bounds__(32) llmpar__cuda_decode_outputs(llmpar__cuda_attention_call a)
{
    enum { TILE = LLMPAR__CUDA_ATTENTION_TILE, COLUMNS = LLMPAR__CUDA_DECODE_COLUMNS, STAGES = LLMPAR__CUDA_DECODE_STAGES };
    LLMPAR__CUDA_SHARED(uint16_t, tiles);
    int slices = a.head_dim / COLUMNS, slice = (int)(blockIdx.x % (unsigned)slices), offset = a.tk - a.tq, rows = a.group * a.tq, lane = (int)threadIdx.x;
    int64_t task = blockIdx.x / (unsigned)slices, b = task / a.kv_heads;
    int kv = (int)(task % a.kv_heads);
    const uint16_t *v = (const uint16_t *)a.v + b * a.tk_stride * a.ldv + (int64_t)kv * a.head_dim + slice * COLUMNS;
    const int32_t *start = a.doc_start ? a.doc_start + b * a.tk : NULL;
    const float least = llmpar__cuda_minus_infinity();
    float out[2][4] = { { 0, 0, 0, 0 }, { 0, 0, 0, 0 } }, top[2] = { least, least }, total[2] = { 0, 0 };
    int position[2] = { offset + (lane >> 2) / a.group, offset + ((lane >> 2) + 8) / a.group }; /* of this thread's rows; behind the last query: none */
    const float *scores = a.scores + (task * rows + (lane >> 2)) * a.ld_scores;
    for (int low = offset, high; low < a.tk; low = high) {
        int begin = llmpar__cuda_document(start, low), even = (begin & 1) == 0;
        high = llmpar__cuda_document_run(start, low, a.tk);
        for (int i = 0; i < STAGES - 1; i++) {
            llmpar__cuda_decode_load(tiles + i * TILE * COLUMNS, v, a.ldv, begin + i * TILE, high, a.wide);
            llmpar__cu_copy_async_commit();
        }
        for (int first = begin, tile = 0; first < high; first += TILE, tile++) {
            uint16_t *values = tiles + tile % STAGES * (TILE * COLUMNS);
            float s[8][4], factor[2];
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    int at = position[r], key = first + 8 * n + 2 * (lane & 3), there = at >= low && at < high;
                    const float *score = scores + r * 8 * a.ld_scores + key;
                    llmpar__cuda_pair_of_floats two = { { least, least } };
                    if (there && key <= at && even) two = *(const llmpar__cuda_pair_of_floats *)(const void *)score;
                    else if (there && key <= at) {
                        two.x[0] = score[0];
                        if (key < at) two.x[1] = score[1];
                    }
                    s[n][2 * r] = two.x[0];
                    s[n][2 * r + 1] = key < at ? two.x[1] : least;
                }
            llmpar__cu_copy_async_wait<STAGES - 2>();
            __syncwarp(); /* no test can tell: the products of the tile before meet here too, but order no memory */
            llmpar__cuda_decode_load(tiles + (tile + STAGES - 1) % STAGES * (TILE * COLUMNS), v, a.ldv, first + (STAGES - 1) * TILE, high, a.wide);
            llmpar__cu_copy_async_commit();
            llmpar__cuda_attention_softmax(s, top, total, factor, a.scale_log2);
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) out[n][i] = __fmul_rn(out[n][i], factor[i >> 1]);
#pragma unroll
            for (int j = 0; j < TILE / 16; j++) {
                uint32_t left[4], right[4];
#pragma unroll
                for (int i = 0; i < 4; i++) left[i] = llmpar__cuda_attention_pack(Type(), s[2 * j + (i >> 1)][2 * (i & 1)], s[2 * j + (i >> 1)][2 * (i & 1) + 1]);
                llmpar__cu_ldmatrix_x4_trans(right, llmpar__cuda_decode_at(values, 16 * j + (lane & 15), lane >> 4));
                llmpar__cuda_attention_mma(Type(), out[0], left, right);
                llmpar__cuda_attention_mma(Type(), out[1], left, right + 2);
            }
        }
        llmpar__cu_copy_async_wait<0>(); /* zeros behind this document's end, too: they would come over what the next one asks for */
        __syncwarp(); /* no test can tell: as above */
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = (lane >> 2) + 8 * r, query = row / a.group, h = kv * a.group + row % a.group;
        float sum = total[r], inverse;
        sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 1));
        sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 2));
        inverse = __fdiv_rn(1.0f, sum);
        if (row >= rows) continue;
        if (a.lse && slice == 0 && (lane & 3) == 0) a.lse[(b * a.heads + h) * a.tq + query] = __fmaf_rn(top[r], LLMPAR__CUDA_ATTENTION_LN2, llmpar__cuda_attention_log(sum));
        Type *to = (Type *)a.out + (b * a.tq + query) * a.ldo + (int64_t)h * a.head_dim + slice * COLUMNS + 2 * (lane & 3);
#pragma unroll
        for (int n = 0; n < 2; n++) llmpar__cuda_attention_store(to + 8 * n, __fmul_rn(out[n][2 * r], inverse), __fmul_rn(out[n][2 * r + 1], inverse), a.pairs);
    }
}

/* Scores of the most rows that queries up to args->tq can have here, so that what serves many queries serves few; with room to align. */
static size_t llmpar__cuda_attention_decode_workspace(const llmpar_attention_args *args)
{
    int64_t group = args->heads / args->kv_heads, queries = LLMPAR__CUDA_ATTENTION_FEW / group;
    if (queries > args->tq) queries = args->tq;
    return queries > 0 ? (size_t)(args->batch * args->heads * queries * ((args->tk + 1) & ~(int64_t)1)) * sizeof(float) + 7 : 0;
}

template <typename Type> static void llmpar__cuda_decode_launch(llmpar_device *device, llmpar_stream *stream, const llmpar__cuda_attention_call *a)
{
    enum { TILE = LLMPAR__CUDA_ATTENTION_TILE, ROWS = LLMPAR__CUDA_ATTENTION_FEW, COLUMNS = LLMPAR__CUDA_DECODE_COLUMNS };
    int64_t tasks = a->batch * a->kv_heads;
    dim3 scores((unsigned)(tasks * ((a->tk + TILE - 1) / TILE))), outputs((unsigned)(tasks * (a->head_dim / COLUMNS)));
    if (a->head_dim == 64) llmpar__cuda_launch(device, stream, llmpar__cuda_decode_scores<Type, 64>, scores, dim3(LLMPAR__CUDA_ATTENTION_THREADS), (size_t)(TILE + ROWS) * 64 * 2, *a);
    else llmpar__cuda_launch(device, stream, llmpar__cuda_decode_scores<Type, 128>, scores, dim3(LLMPAR__CUDA_ATTENTION_THREADS), (size_t)(TILE + ROWS) * 128 * 2, *a);
    llmpar__cuda_launch(device, stream, llmpar__cuda_decode_outputs<Type>, outputs, dim3(32), (size_t)(LLMPAR__CUDA_DECODE_STAGES * TILE * COLUMNS) * 2, *a);
}

static void llmpar__cuda_attention_decode(llmpar_device *device, llmpar_stream *stream, llmpar__cuda_attention_call a)
{
    a.ld_scores = (a.tk + 1) & ~1; /* scores come and go in pairs */
    if (a.dtype == LLMPAR_BF16) llmpar__cuda_decode_launch<llmpar__cuda_bf16>(device, stream, &a);
    else llmpar__cuda_decode_launch<llmpar__cuda_f16>(device, stream, &a);
}

#undef LLMPAR__CUDA_DECODE_STAGES
#undef LLMPAR__CUDA_DECODE_COLUMNS
/* ==== src/cuda/attention_backward.cu ==== */
/* attention_backward: dq, dk, dv of causal attention (Dao 2023, "FlashAttention-2", algorithm 2, cut in two so that no sum is shared between blocks).

     delta[b,h,i] = sum_e dout * out                          one warp a row, or eight rows of 16-bit elements
     P = 2^(scale s - lse), dS = P * (dout v^T - delta)       computed again by whoever needs them, from lse
     dv = P^T dout, dk = scale dS^T q                         a block owns keys of one head and walks the queries below the diagonal
     dq = scale dS k                                          a block owns queries of one head and walks the keys left of the diagonal

   Each gradient is one chain of products over queries or keys in steps of 16 that are counted from the document's start; there are no atomics. dk and dv are of each query head alone, in f32, then added over
   the group in the tree of the contract and rounded once; to hold these, some sequences are taken at a time (a number that follows from their length alone).
   Scores of dk and dv are computed transposed (keys are rows), so that what they leave in registers is the left side of the next products. */

/* Queries or keys that arrive at a time, two buffers of them. */
#define LLMPAR__CUDA_ATTENTION_STEP 32
/* Rows of a block: in dq a warp owns 32, in dk and dv as many as have 128 sums a thread. */
#define LLMPAR__CUDA_ATTENTION_DQ_ROWS 128
#define LLMPAR__CUDA_ATTENTION_DKV_ROWS(e) (8192 / (e))
/* Bytes of dk and dv of single heads beyond which sequences are taken in several goes. They stay in the cache. */
#define LLMPAR__CUDA_ATTENTION_HEADS_BYTES ((int64_t)32 << 20)

/* ---- rows ---- */

/* Elements l, l + 32, .. of a row are one sum, and those 32 are added in a tree: l and l ^ 16, .., l and l ^ 1. Lanes threads (32, or 4 that read 16 bytes) have a row, each of them neighbouring sums, as many as there are to each.
   Of its document's last row the first head's thread notes the end. */
template <typename Type, int Lanes> static __global__ void llmpar__cuda_attention_delta(llmpar__cuda_attention_call a, int64_t rows)
{
    enum { EACH = 32 / Lanes };
    struct __align__(EACH * sizeof(Type)) part { Type x[EACH]; };
    int64_t row = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / Lanes, token = row / a.heads, b = token / a.tq;
    int lane = (int)threadIdx.x % Lanes, h = (int)(row % a.heads), i = (int)(token % a.tq), end = row < rows ? a.head_dim : 0;
    const Type *out = (const Type *)a.out + token * a.ldo + (int64_t)h * a.head_dim, *dout = (const Type *)a.dout + token * a.ldo + (int64_t)h * a.head_dim;
    float sum[EACH];
#pragma unroll
    for (int k = 0; k < EACH; k++) sum[k] = 0;
    for (int x = lane * EACH; x < end; x += 32) {
        const part left = *(const part *)(const void *)(out + x), right = *(const part *)(const void *)(dout + x);
#pragma unroll
        for (int k = 0; k < EACH; k++) sum[k] = __fmaf_rn(llmpar__cuda_load(left.x[k]), llmpar__cuda_load(right.x[k]), sum[k]);
    }
#pragma unroll
    for (int step = Lanes / 2; step > 0; step /= 2)
#pragma unroll
        for (int k = 0; k < EACH; k++) sum[k] = __fadd_rn(sum[k], __shfl_xor_sync(0xffffffffu, sum[k], step));
#pragma unroll
    for (int half = EACH / 2; half > 0; half /= 2)
#pragma unroll
        for (int k = 0; k < half; k++) sum[k] = __fadd_rn(sum[k], sum[k + half]);
    if (lane || row >= rows) return;
    a.delta[(b * a.heads + h) * a.tq + i] = sum[0];
    if (h == 0 && a.doc_start) {
        const int32_t *start = a.doc_start + b * a.tk;
        if (i + 1 == a.tk || start[i + 1] != start[i]) a.doc_end[b * a.tk + llmpar__cuda_document(start, i)] = i + 1;
    }
}

/* ---- dk, dv ---- */

/* Queries and dout of a tile, lse and delta. */
template <int E> static __device__ __forceinline__ void llmpar__cuda_attention_down_load(const llmpar__cuda_attention_call &a, uint16_t *tile, float *row, const uint16_t *q, const uint16_t *dout, const float *row_of, int first, int end)
{
    enum { STEP = LLMPAR__CUDA_ATTENTION_STEP };
    const int thread = llmpar__cu_again((int)threadIdx.x);
    llmpar__cuda_tile_load<E, STEP>(tile, q, a.ldq, first, end, a.wide, llmpar__cu_again((int)threadIdx.x));
    llmpar__cuda_tile_load<E, STEP>(tile + STEP * E, dout, a.ldo, first, end, a.wide, llmpar__cu_again((int)threadIdx.x));
    if (thread < 2 * STEP) {
        int i = thread % STEP, there = first + i < end;
        llmpar__cu_copy_async_4(row + thread, row_of + (there ? first + i : 0), there ? 4 : 0);
    }
    llmpar__cu_copy_async_commit();
}

/* What one warp's rows of dk or dv become: each head's own in f32, or at once what the caller gets. */
template <typename Type, int E> static __device__ __forceinline__ void llmpar__cuda_attention_dkv_store(const llmpar__cuda_attention_call &a, const float sum[E / 8][4], float factor, float *heads, void *out, int64_t ld, int64_t token, int limit, int h, int kv)
{
    int lane = (int)threadIdx.x & 31;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int64_t row = token + 8 * r;
        if (8 * r >= limit) continue;
#pragma unroll
        for (int n = 0; n < E / 8; n++) {
            int x = 8 * n + 2 * (lane & 3);
            float low = __fadd_rn(__fmul_rn(sum[n][2 * r], factor), 0.0f), high = __fadd_rn(__fmul_rn(sum[n][2 * r + 1], factor), 0.0f);
            if (heads) {
                llmpar__cu_store_8(heads + (row * a.heads + h) * E + x, __float_as_uint(low), __float_as_uint(high));
            } else if (a.dkv_float) {
                float *to = (float *)out + row * ld + (int64_t)kv * E + x;
                to[0] = low;
                to[1] = high;
            } else llmpar__cuda_attention_store((Type *)out + row * ld + (int64_t)kv * E + x, low, high, a.pairs);
        }
    }
}

/* Two warps own the same keys: one multiplies k with queries, makes the weights and sums dv, the other v with dout and sums dk; P goes from the first to the second in f32, PART queries at a time. So a warp has twice the keys for
   what it reads of queries and dout, and room for its rows of k or v but the first 16 columns. Registers are short: what follows from the thread's number is computed again. */
template <typename Type, int E> static __global__ void __launch_bounds__(LLMPAR__CUDA_ATTENTION_THREADS, 2) llmpar__cuda_attention_dkv(llmpar__cuda_attention_call a)
{
    enum { ROWS = LLMPAR__CUDA_ATTENTION_DKV_ROWS(E), OWN = ROWS / 2, M = OWN / 16, STEP = LLMPAR__CUDA_ATTENTION_STEP, PART = 1024 / OWN, N = PART / 8 };
    LLMPAR__CUDA_SHARED(uint16_t, keys); /* then values */
    uint16_t *tiles = keys + 2 * ROWS * E;
    llmpar__cuda_16 *weights = (llmpar__cuda_16 *)(void *)(tiles + 4 * STEP * E); /* [pair of warps][part][M * N][lane] */
    float *statistics = (float *)(void *)(weights + ROWS * STEP / 4); /* [2][lse, delta][STEP] */
    const llmpar__cuda_attention_place p0 = llmpar__cuda_attention_own(a, a.tk, ROWS, 0);
    const uint16_t **mine = (const uint16_t **)(void *)(statistics + 4 * STEP) + threadIdx.x; /* of queries, then of dout: sums take all registers */
    const float **row_of = (const float **)(void *)(mine + 2 * LLMPAR__CUDA_ATTENTION_THREADS); /* of lse or of delta: what this thread brings */
    int stage = 0;
    uint32_t own[M][E / 16][4]; /* the warp's keys or values, from the second 16 columns on */
    float sum[M][E / 8][4];
    mine[0] = llmpar__cuda_tile_mine<E>((const uint16_t *)a.q + p0.b * a.tq * a.ldq + (int64_t)p0.h * E, a.ldq);
    row_of[0] = (threadIdx.x < STEP ? a.lse : a.delta) + (p0.b * a.heads + p0.h) * a.tq;
    mine[LLMPAR__CUDA_ATTENTION_THREADS] = llmpar__cuda_tile_mine<E>((const uint16_t *)a.dout + p0.b * a.tq * a.ldo + (int64_t)p0.h * E, a.ldo);
    llmpar__cuda_tile_load<E, ROWS>(keys, llmpar__cuda_tile_mine<E>((const uint16_t *)a.k + p0.b * a.tk * a.ldk + (int64_t)p0.kv * E, a.ldk), a.ldk, p0.first, a.tk, a.wide);
    llmpar__cuda_tile_load<E, ROWS>(keys + ROWS * E, llmpar__cuda_tile_mine<E>((const uint16_t *)a.v + p0.b * a.tk * a.ldv + (int64_t)p0.kv * E, a.ldv), a.ldv, p0.first, a.tk, a.wide);
    llmpar__cu_copy_async_commit();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < E / 8; n++) sum[m][n][0] = sum[m][n][1] = sum[m][n][2] = sum[m][n][3] = 0;
#pragma unroll 1
    for (int low = p0.first, high; low < min(llmpar__cu_again(p0.first) + ROWS, a.tk); low = high) {
        const int64_t at = llmpar__cuda_attention_own(a, llmpar__cu_again(a.tk), ROWS, 0).b * llmpar__cu_again(a.tk);
        const int32_t *start = a.doc_start ? a.doc_start + at : NULL;
        const int begin = llmpar__cuda_document(start, low), end = start ? max(min(a.doc_end[at + begin], a.tk), low + 1) : a.tk, top = begin + (low - begin) / STEP * STEP;
        high = llmpar__cuda_document_run(start, low, min(llmpar__cu_again(p0.first) + ROWS, a.tk));
        llmpar__cuda_attention_down_load<E>(a, tiles + stage * 2 * STEP * E, statistics + stage * 2 * STEP, mine[0], mine[LLMPAR__CUDA_ATTENTION_THREADS], row_of[0], top, end);
        llmpar__cu_copy_async_wait<1>();
        __syncthreads();
        const int here = llmpar__cu_again((int)threadIdx.x), lane = llmpar__cuda_tile_lane<E>(0, here);
#pragma unroll
        for (int x = M; x < M * E / 16; x++) llmpar__cuda_tile_a<E>(own[x % M][x / M], keys + (here >> 5 & 1) * ROWS * E, lane, here / 64 * OWN + 16 * (x % M), x / M);
#pragma unroll 1
        for (int first = top; first < end; first += STEP) {
            const int position = llmpar__cu_again(p0.first) + llmpar__cu_again((int)threadIdx.x) / 64 * OWN; /* of the warp's first key */
            int active = low < position + OWN && high > position && first + STEP > position;
            int partly = low > position || high < position + OWN || first < position + OWN - 1 || first + STEP > end;
            llmpar__cu_copy_async_wait<0>();
            __syncthreads();
            stage ^= 1;
            if (first + STEP < end) llmpar__cuda_attention_down_load<E>(a, tiles + stage * 2 * STEP * E, statistics + stage * 2 * STEP, mine[0], mine[LLMPAR__CUDA_ATTENTION_THREADS], row_of[0], first + STEP, end);
#pragma unroll 1
            for (int part = 0; part < STEP; part += PART) {
                const int thread = llmpar__cu_again((int)threadIdx.x), lane = thread & 31, side = thread >> 5 & 1 /* 0: dv, 1: dk */, tile = 2 * (llmpar__cu_again(stage) ^ 1) + side;
                const uint16_t *near = tiles + (tile * STEP + part) * E; /* queries, or dout */
                const llmpar__cuda_pair_of_floats *row = (const llmpar__cuda_pair_of_floats *)(const void *)(statistics + tile * STEP + part) + (lane & 3);
                llmpar__cuda_16 *hand = weights + (thread / 64 * (STEP / PART) + part / PART) * (M * N * 32) + lane;
                float s[M][N][4]; /* scores, then P; or dout v^T, then dS */
                if (active) {
                    const int across = llmpar__cuda_tile_lane<E>(1, llmpar__cu_again((int)threadIdx.x)), down = llmpar__cuda_tile_lane<E>(0, llmpar__cu_again((int)threadIdx.x));
#pragma unroll
                    for (int m = 0; m < M; m++)
#pragma unroll
                        for (int n = 0; n < N; n++) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0;
#pragma unroll
                    for (int x = 0; x < E / 16; x++) {
                        uint32_t left[4], right[N / 2][4];
#pragma unroll
                        for (int n = 0; n < N / 2; n++) llmpar__cuda_tile_b<E>(right[n], near, across, 16 * n, x);
#pragma unroll
                        for (int m = 0; m < M; m++) {
                            if (!x) llmpar__cuda_tile_a<E>(left, keys + side * ROWS * E, down, thread / 64 * OWN + 16 * m, 0);
#pragma unroll
                            for (int n = 0; n < N; n++) llmpar__cuda_attention_mma(Type(), s[m][n], x ? own[m][x] : left, right[n / 2] + n % 2 * 2);
                        }
                    }
                    if (side) {
#pragma unroll
                        for (int n = 0; n < N; n++) {
                            const llmpar__cuda_pair_of_floats mean = row[4 * n];
#pragma unroll
                            for (int m = 0; m < M; m++)
#pragma unroll
                                for (int i = 0; i < 4; i++) s[m][n][i] = __fsub_rn(s[m][n][i], mean.x[i & 1]);
                        }
                    } else {
                        if (partly) {
                            int query = first + part + 2 * (lane & 3), key = llmpar__cu_again(p0.first) + thread / 64 * OWN + (lane >> 2);
#pragma unroll
                            for (int x = 0; x < 2 * M; x++) {
                                int from = key + 8 * x < low || key + 8 * x >= high ? end : key + 8 * x; /* the first query that sees it */
#pragma unroll
                                for (int n = 0; n < N; n++)
#pragma unroll
                                    for (int j = 0; j < 2; j++)
                                        if (8 * n + j < from - query || 8 * n + j >= end - query) s[x / 2][n][x % 2 * 2 + j] = llmpar__cuda_minus_infinity();
                            }
                        }
#pragma unroll
                        for (int n = 0; n < N; n++) {
                            const llmpar__cuda_pair_of_floats lse = row[4 * n];
                            const float shift[2] = { __fmul_rn(lse.x[0], -LLMPAR__CUDA_ATTENTION_LOG2E), __fmul_rn(lse.x[1], -LLMPAR__CUDA_ATTENTION_LOG2E) };
#pragma unroll
                            for (int m = 0; m < M; m++) {
                                llmpar__cuda_16 p;
#pragma unroll
                                for (int i = 0; i < 4; i++) {
                                    s[m][n][i] = llmpar__cu_exp2(__fmaf_rn(s[m][n][i], a.scale_log2, shift[i & 1]));
                                    p.word[i] = __float_as_uint(s[m][n][i]);
                                }
                                hand[(m * N + n) * 32] = p;
                            }
                        }
                    }
                }
                __syncthreads();
                if (!active) continue;
                const int again = llmpar__cu_again((int)threadIdx.x), down = llmpar__cuda_tile_lane<E>(0, again);
                const uint16_t *far = tiles + ((2 * (llmpar__cu_again(stage) ^ 1) + (~again >> 5 & 1)) * STEP + part) * E; /* dout, or queries */
#pragma unroll
                for (int j = 0; j < N / 2; j++) {
                    uint32_t left[M][4], right[4];
                    if (side) {
#pragma unroll
                        for (int x = 0; x < 2 * M; x++) {
                            const llmpar__cuda_16 p = hand[(x / 2 * N + 2 * j + x % 2) * 32];
#pragma unroll
                            for (int i = 0; i < 4; i++) s[x / 2][2 * j + x % 2][i] = __fmul_rn(__uint_as_float(p.word[i]), s[x / 2][2 * j + x % 2][i]);
                        }
                    }
#pragma unroll
                    for (int m = 0; m < M; m++)
#pragma unroll
                        for (int i = 0; i < 4; i++) left[m][i] = llmpar__cuda_attention_pack(Type(), s[m][2 * j + (i >> 1)][2 * (i & 1)], s[m][2 * j + (i >> 1)][2 * (i & 1) + 1]);
#pragma unroll
                    for (int n = 0; n < E / 16; n++) {
                        llmpar__cuda_tile_b_rows<E>(right, far, down, 16 * j, n);
#pragma unroll
                        for (int m = 0; m < M; m++) {
                            llmpar__cuda_attention_mma(Type(), sum[m][2 * n], left[m], right);
                            llmpar__cuda_attention_mma(Type(), sum[m][2 * n + 1], left[m], right + 2);
                        }
                    }
                }
            }
        }
    }
    const llmpar__cuda_attention_place o = llmpar__cuda_attention_own(a, a.tk, ROWS, 0);
#pragma unroll
    for (int m = 0; m < M; m++) {
        int key = o.first + (int)threadIdx.x / 64 * OWN + 16 * m + ((int)threadIdx.x >> 2 & 7);
        if (threadIdx.x & 32) llmpar__cuda_attention_dkv_store<Type, E>(a, sum[m], a.scale, a.dk_heads, a.dk, a.ld_dk, o.b * a.tk + key, a.tk - key, o.h, o.kv);
        else llmpar__cuda_attention_dkv_store<Type, E>(a, sum[m], 1.0f, a.dv_heads, a.dv, a.ld_dv, o.b * a.tk + key, a.tk - key, o.h, o.kv);
    }
}

/* Width sums, 1 or 4, rounded. */
template <int Width, typename Half> static __device__ __forceinline__ void llmpar__cuda_attention_tree_store(Half *out, const float *sum)
{
    uint32_t word[2] = { 0, 0 };
#pragma unroll
    for (int k = 0; k < Width; k++) {
        Half x;
        llmpar__cuda_store(&x, sum[k]);
        word[k / 2] |= (uint32_t)x.bits << 16 * (k % 2);
    }
    if (Width == 4) llmpar__cu_store_8(out, word[0], word[1]);
    else out->bits = (uint16_t)word[0];
}
template <int Width> static __device__ __forceinline__ void llmpar__cuda_attention_tree_store(float *out, const float *sum)
{
    uint32_t word[4];
#pragma unroll
    for (int k = 0; k < Width; k++) word[k] = __float_as_uint(sum[k]);
    if (Width == 4) llmpar__cu_store_16(out, word);
    else *out = sum[0];
}

/* out[token, kv, :] = tree over the group's heads: groups of `odd` heads, cut at the largest power of two below, and 2^n of these cut in halves. Both are the binary tree over places of which those behind the
   odd heads are empty: +0, which changes no sum, since none is -0. A thread takes Width neighbours, 4 where they can be stored at once; count: of such, in dk. */
template <int Width> static __global__ void llmpar__cuda_attention_tree(llmpar__cuda_attention_call a, int64_t count, int odd, int places)
{
    int64_t e = a.head_dim, stride = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < 2 * count; i += stride) {
        int64_t at = i < count ? i : i - count, row = llmpar__cuda_divide(at, e / Width), x = (at - row * (e / Width)) * Width, token = llmpar__cuda_divide(row, a.kv_heads), kv = row - token * a.kv_heads;
        const float *in = (i < count ? a.dk_heads : a.dv_heads) + (token * a.heads + kv * a.group) * e + x;
        void *out = i < count ? a.dk : a.dv;
        int64_t to = token * (i < count ? a.ld_dk : a.ld_dv) + kv * e + x;
        float level[8][Width], sum[Width];
        int s = 0;
#pragma unroll
        for (int l = 0; l < 8; l++)
#pragma unroll
            for (int k = 0; k < Width; k++) level[l][k] = sum[k] = 0;
        for (int first = 0; first < a.group; first += odd)
            for (int place = 0; place < places; place++, s++) {
                int done = 0;
                llmpar__cuda_16 four = { { 0, 0, 0, 0 } };
                if (place < odd && Width == 4) four = *(const llmpar__cuda_16 *)(const void *)(in + (first + place) * e);
                else if (place < odd) four.word[0] = __float_as_uint(in[(first + place) * e]);
#pragma unroll
                for (int k = 0; k < Width; k++) sum[k] = __uint_as_float(four.word[k]);
#pragma unroll
                for (int l = 0; l < 8; l++) {
                    if (done) continue;
                    done = !(s >> l & 1);
#pragma unroll
                    for (int k = 0; k < Width; k++) {
                        if (done) level[l][k] = sum[k];
                        else sum[k] = __fadd_rn(level[l][k], sum[k]);
                    }
                }
            }
        if (a.dkv_float) llmpar__cuda_attention_tree_store<Width>((float *)out + to, sum);
        else if (a.dtype == LLMPAR_BF16) llmpar__cuda_attention_tree_store<Width>((llmpar__cuda_bf16 *)out + to, sum);
        else llmpar__cuda_attention_tree_store<Width>((llmpar__cuda_f16 *)out + to, sum);
    }
}

/* ---- dq ---- */

/* Keys and values of a tile. */
template <int E> static __device__ __forceinline__ void llmpar__cuda_attention_across_load(const llmpar__cuda_attention_call &a, uint16_t *tile, const uint16_t *k, const uint16_t *v, int first, int limit)
{
    enum { STEP = LLMPAR__CUDA_ATTENTION_STEP };
    llmpar__cuda_tile_load<E, STEP>(tile, k, a.ldk, first, limit, a.wide);
    llmpar__cuda_tile_load<E, STEP>(tile + STEP * E, v, a.ldv, first, limit, a.wide);
    llmpar__cu_copy_async_commit();
}

template <typename Type, int E> static __global__ void __launch_bounds__(LLMPAR__CUDA_ATTENTION_THREADS, 2) llmpar__cuda_attention_dq(llmpar__cuda_attention_call a)
{
    enum { ROWS = LLMPAR__CUDA_ATTENTION_DQ_ROWS, STEP = LLMPAR__CUDA_ATTENTION_STEP };
    LLMPAR__CUDA_SHARED(uint16_t, queries);
    uint16_t *douts = queries + ROWS * E, *tiles = douts + ROWS * E;
    const llmpar__cuda_attention_place p0 = llmpar__cuda_attention_own(a, a.tq, ROWS, 1);
    const int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, down = llmpar__cuda_tile_lane<E>(0), across = llmpar__cuda_tile_lane<E>(1), position = p0.first + warp * 32, limit = min(p0.first + ROWS, a.tq);
    const uint16_t **mine = (const uint16_t **)(void *)(tiles + 4 * STEP * E) + threadIdx.x; /* of keys, then of values */
    int stage = 0;
    uint32_t own[2][E / 16][4]; /* the warp's queries, as in attention.cu */
    float dq[2][E / 8][4], shift[2][2], mean[2][2];
    mine[0] = llmpar__cuda_tile_mine<E>((const uint16_t *)a.k + p0.b * a.tk * a.ldk + (int64_t)p0.kv * E, a.ldk);
    mine[LLMPAR__CUDA_ATTENTION_THREADS] = llmpar__cuda_tile_mine<E>((const uint16_t *)a.v + p0.b * a.tk * a.ldv + (int64_t)p0.kv * E, a.ldv);
    llmpar__cuda_tile_load<E, ROWS>(queries, llmpar__cuda_tile_mine<E>((const uint16_t *)a.q + p0.b * a.tq * a.ldq + (int64_t)p0.h * E, a.ldq), a.ldq, p0.first, a.tq, a.wide);
    llmpar__cuda_tile_load<E, ROWS>(douts, llmpar__cuda_tile_mine<E>((const uint16_t *)a.dout + p0.b * a.tq * a.ldo + (int64_t)p0.h * E, a.ldo), a.ldo, p0.first, a.tq, a.wide);
    llmpar__cu_copy_async_commit();
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int n = 0; n < E / 8; n++) dq[m][n][0] = dq[m][n][1] = dq[m][n][2] = dq[m][n][3] = 0;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = position + 16 * m + 8 * r + (lane >> 2);
            int64_t at = (p0.b * a.heads + p0.h) * a.tq + min(row, a.tq - 1);
            shift[m][r] = __fmul_rn(a.lse[at], -LLMPAR__CUDA_ATTENTION_LOG2E);
            mean[m][r] = a.delta[at];
        }
    }
#pragma unroll 1
    for (int low = p0.first, high; low < limit; low = high) {
        const int32_t *start = a.doc_start ? a.doc_start + llmpar__cuda_attention_own(a, a.tq, ROWS, 1).b * a.tk : NULL;
        const int begin = llmpar__cuda_document(start, low);
        high = llmpar__cuda_document_run(start, low, limit);
        llmpar__cuda_attention_across_load<E>(a, tiles + stage * 2 * STEP * E, mine[0], mine[LLMPAR__CUDA_ATTENTION_THREADS], begin, high);
        if (E == 64) {
            llmpar__cu_copy_async_wait<1>();
            __syncthreads();
#pragma unroll
            for (int x = 0; x < 2 * E / 16; x++) llmpar__cuda_tile_a<E>(own[x % 2][x / 2], queries, down, warp * 32 + 16 * (x % 2), x / 2);
        }
#pragma unroll 1
        for (int first = begin; first < high; first += STEP) {
            uint16_t *keys = tiles + stage * 2 * STEP * E, *values = keys + STEP * E;
            int active = low < position + 32 && high > position && first < position + 32;
            int partly = low > position || high < position + 32 || first + STEP - 1 > position;
            llmpar__cu_copy_async_wait<0>();
            __syncthreads();
            stage ^= 1;
            if (first + STEP < high) llmpar__cuda_attention_across_load<E>(a, tiles + stage * 2 * STEP * E, mine[0], mine[LLMPAR__CUDA_ATTENTION_THREADS], first + STEP, high);
            if (!active) continue;
            float p[2][STEP / 8][4], ds[2][STEP / 8][4];
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int n = 0; n < STEP / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) p[m][n][i] = ds[m][n][i] = 0;
#pragma unroll(E > 64 ? 2 : 4)
            for (int x = 0; x < E / 16; x++) {
                uint32_t left[2][4], right[4];
#pragma unroll
                for (int m = 0; m < 2; m++)
                    if (E > 64) llmpar__cuda_tile_a<E>(left[m], queries, down, warp * 32 + 16 * m, x);
#pragma unroll
                for (int n = 0; n < STEP / 16; n++) {
                    llmpar__cuda_tile_b<E>(right, keys, across, 16 * n, x);
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        llmpar__cuda_attention_mma(Type(), p[m][2 * n], E > 64 ? left[m] : own[m][x], right);
                        llmpar__cuda_attention_mma(Type(), p[m][2 * n + 1], E > 64 ? left[m] : own[m][x], right + 2);
                    }
                }
#pragma unroll
                for (int m = 0; m < 2; m++) llmpar__cuda_tile_a<E>(left[m], douts, down, warp * 32 + 16 * m, x);
#pragma unroll
                for (int n = 0; n < STEP / 16; n++) {
                    llmpar__cuda_tile_b<E>(right, values, across, 16 * n, x);
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        llmpar__cuda_attention_mma(Type(), ds[m][2 * n], left[m], right);
                        llmpar__cuda_attention_mma(Type(), ds[m][2 * n + 1], left[m], right + 2);
                    }
                }
            }
            if (partly) {
                int row = position + (lane >> 2), key = first + 2 * (lane & 3);
#pragma unroll
                for (int m = 0; m < 2; m++)
#pragma unroll
                    for (int n = 0; n < STEP / 8; n++)
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const int down_by = 16 * m + 8 * (i >> 1), right_by = 8 * n + (i & 1);
                            if (row + down_by < low || row + down_by >= high || right_by - down_by > row - key) p[m][n][i] = llmpar__cuda_minus_infinity();
                        }
            }
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int n = 0; n < STEP / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        ds[m][n][i] = __fmul_rn(llmpar__cu_exp2(__fmaf_rn(p[m][n][i], a.scale_log2, shift[m][i >> 1])), __fsub_rn(ds[m][n][i], mean[m][i >> 1]));
#pragma unroll
            for (int j = 0; j < STEP / 16; j++) {
                uint32_t left[2][4], right[4];
#pragma unroll
                for (int m = 0; m < 2; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++) left[m][i] = llmpar__cuda_attention_pack(Type(), ds[m][2 * j + (i >> 1)][2 * (i & 1)], ds[m][2 * j + (i >> 1)][2 * (i & 1) + 1]);
#pragma unroll
                for (int n = 0; n < E / 16; n++) {
                    llmpar__cuda_tile_b_rows<E>(right, keys, down, 16 * j, n);
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        llmpar__cuda_attention_mma(Type(), dq[m][2 * n], left[m], right);
                        llmpar__cuda_attention_mma(Type(), dq[m][2 * n + 1], left[m], right + 2);
                    }
                }
            }
        }
    }
    const llmpar__cuda_attention_place o = llmpar__cuda_attention_own(a, a.tq, ROWS, 1);
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = position + 16 * m + 8 * r + (lane >> 2);
            if (row >= a.tq) continue;
            Type *to = (Type *)a.dq + (o.b * a.tq + row) * a.ldq + (int64_t)o.h * E + 2 * (lane & 3);
#pragma unroll
            for (int n = 0; n < E / 8; n++) llmpar__cuda_attention_store(to + 8 * n, __fmul_rn(dq[m][n][2 * r], a.scale), __fmul_rn(dq[m][n][2 * r + 1], a.scale), a.pairs);
        }
}

/* ---- host ---- */

/* What one go holds in the workspace: of `sequences` sequences. */
typedef struct llmpar__cuda_attention_plan {
    int64_t sequences;
    size_t delta, ends, heads; /* bytes; heads: of dk, and as many of dv */
} llmpar__cuda_attention_plan;

static llmpar__cuda_attention_plan llmpar__cuda_attention_plan_of(const llmpar_attention_args *a)
{
    llmpar__cuda_attention_plan plan;
    int64_t each = a->heads > a->kv_heads ? a->tk * a->heads * a->head_dim * 4 : 0;
    plan.sequences = a->batch;
    if (each > 0 && plan.sequences > LLMPAR__CUDA_ATTENTION_HEADS_BYTES / (2 * each)) plan.sequences = LLMPAR__CUDA_ATTENTION_HEADS_BYTES / (2 * each);
    if (plan.sequences < 1) plan.sequences = 1;
    plan.sequences = llmpar__cuda_attention_sequences((a->tk + 15) / 16 * a->heads * 8, plan.sequences); /* more blocks a sequence than any kernel here has */
    plan.delta = ((size_t)(plan.sequences * a->heads * a->tk) * 4 + 15) / 16 * 16;
    plan.ends = ((size_t)(plan.sequences * a->tk) * 4 + 15) / 16 * 16;
    plan.heads = ((size_t)(plan.sequences * each) + 15) / 16 * 16;
    return plan;
}

static size_t llmpar__cuda_attention_backward_workspace(llmpar_device *device, const llmpar_attention_backward_args *args)
{
    const llmpar_attention_args *a = &args->forward;
    llmpar__cuda_attention_plan plan;
    (void)device;
#ifdef LLMPAR_USE_CUDNN
    if (llmpar__cuda_of(device)->desc.cudnn) return llmpar__cuda_attention_cudnn_workspace(device, a, args);
#endif
    if (a->batch < 1 || a->tk < 1 || a->heads < 1 || a->kv_heads < 1 || a->heads % a->kv_heads || a->head_dim < 1) return 0;
    plan = llmpar__cuda_attention_plan_of(a);
    return plan.delta + plan.ends + 2 * plan.heads + 15;
}

template <typename Type, int E> static void llmpar__cuda_attention_backward_launch(llmpar_device *device, llmpar_stream *stream, const llmpar__cuda_attention_call *a)
{
    enum { DKV = LLMPAR__CUDA_ATTENTION_DKV_ROWS(E), DQ = LLMPAR__CUDA_ATTENTION_DQ_ROWS, STEP = LLMPAR__CUDA_ATTENTION_STEP };
    int64_t tasks = a->batch * a->heads;
    size_t pointers = 3 * LLMPAR__CUDA_ATTENTION_THREADS * sizeof(void *);
    dim3 block(LLMPAR__CUDA_ATTENTION_THREADS);
    llmpar__cuda_launch(device, stream, llmpar__cuda_attention_dkv<Type, E>, dim3((unsigned)(tasks * ((a->tk + DKV - 1) / DKV))), block, (size_t)(2 * DKV + 4 * STEP) * E * 2 + (DKV + 4) * STEP * sizeof(float) + pointers, *a);
    llmpar__cuda_launch(device, stream, llmpar__cuda_attention_dq<Type, E>, dim3((unsigned)(tasks * ((a->tq + DQ - 1) / DQ))), block, (size_t)(2 * DQ + 4 * STEP) * E * 2 + pointers, *a);
}

template <typename Type, int Lanes> static void llmpar__cuda_attention_delta_launch(llmpar_device *device, llmpar_stream *stream, const llmpar__cuda_attention_call *a)
{
    int64_t rows = a->batch * a->heads * a->tq;
    llmpar__cuda_launch(device, stream, llmpar__cuda_attention_delta<Type, Lanes>, dim3((unsigned)((rows * Lanes + 255) / 256)), dim3(256), 0, *a, rows);
}

/* Some sequences. */
static llmpar_status llmpar__cuda_attention_backward_part(llmpar_device *device, llmpar_stream *stream, const llmpar__cuda_attention_call *a, int by_mma)
{
    llmpar__cuda *cuda = llmpar__cuda_of(device);
    int64_t count = a->batch * a->tk * a->kv_heads * a->head_dim;
    int narrow = !a->wide || (uintptr_t)a->out % 16 || a->head_dim % 32;
    llmpar_status status = LLMPAR_OK;
    if (a->dtype == LLMPAR_F32) llmpar__cuda_attention_delta_launch<float, 32>(device, stream, a);
    else if (a->dtype == LLMPAR_BF16 && narrow) llmpar__cuda_attention_delta_launch<llmpar__cuda_bf16, 32>(device, stream, a);
    else if (a->dtype == LLMPAR_BF16) llmpar__cuda_attention_delta_launch<llmpar__cuda_bf16, 4>(device, stream, a);
    else if (narrow) llmpar__cuda_attention_delta_launch<llmpar__cuda_f16, 32>(device, stream, a);
    else llmpar__cuda_attention_delta_launch<llmpar__cuda_f16, 4>(device, stream, a);
    if (!by_mma) status = llmpar__cuda_attention_simple_backward(device, stream, *a);
    else if (a->dtype == LLMPAR_BF16 && a->head_dim == 64) llmpar__cuda_attention_backward_launch<llmpar__cuda_bf16, 64>(device, stream, a);
    else if (a->dtype == LLMPAR_BF16) llmpar__cuda_attention_backward_launch<llmpar__cuda_bf16, 128>(device, stream, a);
    else if (a->head_dim == 64) llmpar__cuda_attention_backward_launch<llmpar__cuda_f16, 64>(device, stream, a);
    else llmpar__cuda_attention_backward_launch<llmpar__cuda_f16, 128>(device, stream, a);
    if (!status && a->dk_heads) {
        int odd = a->group, places = 1, size = a->dkv_float ? 4 : 2;
        while (odd % 2 == 0) odd /= 2;
        while (places < odd) places *= 2;
        if (a->head_dim % 4 == 0 && (((uintptr_t)a->dk | (uintptr_t)a->dv | (uintptr_t)((a->ld_dk | a->ld_dv) * size)) & (uintptr_t)(4 * size - 1)) == 0) llmpar__cuda_launch(device, stream, llmpar__cuda_attention_tree<4>, dim3(llmpar__cuda_blocks(cuda, count / 2, 256, 8)), dim3(256), 0, *a, count / 4, odd, places);
        else llmpar__cuda_launch(device, stream, llmpar__cuda_attention_tree<1>, dim3(llmpar__cuda_blocks(cuda, 2 * count, 256, 8)), dim3(256), 0, *a, count, odd, places);
    }
    return status;
}

LLMPAR__CUDA_SLOT(attention_backward, llmpar_attention_backward_args)
{
    const llmpar_attention_args *f = &args->forward;
    llmpar__cuda_attention_call all, a;
    llmpar__cuda_attention_plan plan;
    unsigned char *workspace;
    size_t size, dkv_size;
    llmpar_dtype dkv = args->dkv_dtype == LLMPAR_DTYPE_DEFAULT ? f->dtype : args->dkv_dtype;
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (status || f->batch <= 0 || f->tq <= 0 || f->heads <= 0) return status;
#ifdef LLMPAR_USE_CUDNN
    if (llmpar__cuda_of(device)->desc.cudnn) return llmpar__cuda_attention_cudnn(device, stream, f, args);
#endif
    status = llmpar__cuda_attention_check(device, "attention_backward", f, llmpar__cuda_attention_backward_workspace(device, args), 1);
    if (!status && dkv != f->dtype && dkv != llmpar_dtype_sum(f->dtype))
        return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "attention_backward: dkv_dtype %s for dtype %s, expected the same or %s", llmpar_dtype_name(args->dkv_dtype), llmpar_dtype_name(f->dtype), llmpar_dtype_name(llmpar_dtype_sum(f->dtype)));
    if (!status && args->ld_dkv < 0) return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "attention_backward: ld_dkv %lld, expected 0 or the distance of two rows", (long long)args->ld_dkv);
    if (status) return status;
    plan = llmpar__cuda_attention_plan_of(f);
    size = llmpar_dtype_size(f->dtype);
    dkv_size = llmpar_dtype_size(dkv);
    llmpar__cuda_attention_take(f, &all);
    all.dout = args->dout; all.dq = args->dq; all.dk = args->dk; all.dv = args->dv;
    all.ld_dk = args->ld_dkv ? args->ld_dkv : f->ldk;
    all.ld_dv = args->ld_dkv ? args->ld_dkv : f->ldv;
    all.dkv_float = dkv == LLMPAR_F32;
    all.wide = all.wide && (((uintptr_t)args->dout | (size_t)f->ldo * size) & 15u) == 0;
    all.pairs = (((uintptr_t)args->dq | (uintptr_t)args->dk | (uintptr_t)args->dv | (size_t)(f->ldq | all.ld_dk | all.ld_dv) * size) & (2 * size - 1)) == 0;
    workspace = (unsigned char *)(((uintptr_t)f->workspace + 15u) & ~(uintptr_t)15u);
    all.delta = (float *)(void *)workspace;
    all.doc_end = (int32_t *)(void *)(workspace + plan.delta);
    if (all.group > 1) {
        all.dk_heads = (float *)(void *)(workspace + plan.delta + plan.ends);
        all.dv_heads = (float *)(void *)(workspace + plan.delta + plan.ends + plan.heads);
    }
    for (int64_t b = 0; !status && b < f->batch; b += plan.sequences) {
        int64_t row = b * all.tk;
        a = all;
        a.batch = f->batch - b < plan.sequences ? f->batch - b : plan.sequences;
        a.q = (const char *)all.q + (size_t)(row * all.ldq) * size;
        a.k = (const char *)all.k + (size_t)(row * all.ldk) * size;
        a.v = (const char *)all.v + (size_t)(row * all.ldv) * size;
        a.out = (char *)all.out + (size_t)(row * all.ldo) * size;
        a.dout = (const char *)all.dout + (size_t)(row * all.ldo) * size;
        a.dq = (char *)all.dq + (size_t)(row * all.ldq) * size;
        a.dk = (char *)all.dk + (size_t)(row * all.ld_dk) * dkv_size;
        a.dv = (char *)all.dv + (size_t)(row * all.ld_dv) * dkv_size;
        a.lse += row * all.heads;
        if (a.doc_start) a.doc_start += row;
        status = llmpar__cuda_attention_backward_part(device, stream, &a, llmpar__cuda_attention_by_mma(f));
    }
    return status ? status : llmpar__cuda_end(device, stream, "attention_backward");
}

#undef LLMPAR__CUDA_ATTENTION_STEP
#undef LLMPAR__CUDA_ATTENTION_DQ_ROWS
#undef LLMPAR__CUDA_ATTENTION_DKV_ROWS
#undef LLMPAR__CUDA_ATTENTION_HEADS_BYTES
/* ==== src/cuda/attention_simple.cu ==== */
/* attention_simple: causal attention in plain f32 products, for f32 and for every head_dim that attention.cu has no tiles for; forward and backward. It is also the one to read first.

   A block owns a few rows, four for a warp, in shared memory as f32, and walks the other side 32 rows at a time, which all its warps use. In scores a lane is one of these 32, and sums over head_dim in one chain;
   in the products with the weights a lane is a column, and sums over the 32 in one chain, which goes on with the next 32.
     forward, dq:  rows are (query, head of the group), so that all heads of a group read keys and values once; what is walked are keys, from the document's start.
     dk, dv:       rows are keys, for one head; what is walked are queries, from the diagonal to the document's end.
   Rows of several documents in a block: as in attention.cu. */

#define LLMPAR__CUDA_SIMPLE_OWN 4   /* rows of a warp */
#define LLMPAR__CUDA_SIMPLE_STEP 32 /* rows of the other side; lanes of a warp */

static __device__ __forceinline__ float llmpar__cuda_simple_read(const void *from, int64_t i, int dtype)
{
    if (dtype == LLMPAR_F32) return ((const float *)from)[i];
    return dtype == LLMPAR_BF16 ? llmpar__cuda_load(((const llmpar__cuda_bf16 *)from)[i]) : llmpar__cuda_load(((const llmpar__cuda_f16 *)from)[i]);
}
static __device__ __forceinline__ void llmpar__cuda_simple_write(void *to, int64_t i, float x, int dtype)
{
    x = __fadd_rn(x, 0.0f); /* no -0 */
    if (dtype == LLMPAR_F32) ((float *)to)[i] = x;
    else if (dtype == LLMPAR_BF16) llmpar__cuda_store((llmpar__cuda_bf16 *)to + i, x);
    else llmpar__cuda_store((llmpar__cuda_f16 *)to + i, x);
}

/* One row into shared memory by a warp, times factor; zeros behind it up to `width`, or everywhere. */
static __device__ __forceinline__ void llmpar__cuda_simple_row(float *to, const void *from, int64_t at, int e, int width, int there, float factor, int dtype)
{
    for (int x = (int)threadIdx.x & 31; x < width; x += 32) to[x] = there && x < e ? __fmul_rn(llmpar__cuda_simple_read(from, at + x, dtype), factor) : 0.0f;
}

/* Rows [first, limit) of a matrix, 32 of them, by the block. */
static __device__ __forceinline__ void llmpar__cuda_simple_tile(float *to, int ld_to, const void *from, int64_t at, int64_t ld, int first, int limit, int e, int width, int dtype)
{
    for (int row = (int)threadIdx.x >> 5; row < LLMPAR__CUDA_SIMPLE_STEP; row += (int)blockDim.x >> 5) llmpar__cuda_simple_row(to + row * ld_to, from, at + (first + row) * ld, e, width, first + row < limit, 1.0f, dtype);
}

/* sum[i] = chain over the width of own[i] * other[lane]: the width is a multiple of four, rows of `own` are `warps` rows apart. */
static __device__ __forceinline__ void llmpar__cuda_simple_scores(float sum[LLMPAR__CUDA_SIMPLE_OWN], const float *own, int own_step, const float *other, int ld, int width)
{
    other += ((int)threadIdx.x & 31) * ld;
#pragma unroll
    for (int i = 0; i < LLMPAR__CUDA_SIMPLE_OWN; i++) sum[i] = 0;
    for (int x = 0; x < width; x += 4) {
        float y[4] = { other[x], other[x + 1], other[x + 2], other[x + 3] };
#pragma unroll
        for (int i = 0; i < LLMPAR__CUDA_SIMPLE_OWN; i++) {
            llmpar__cuda_16 four = *(const llmpar__cuda_16 *)(const void *)(own + i * own_step + x);
#pragma unroll
            for (int j = 0; j < 4; j++) sum[i] = __fmaf_rn(__uint_as_float(four.word[j]), y[j], sum[i]);
        }
    }
}

/* sums[i][:] = sums[i][:] * factor[i] + chain over the 32 rows of other of weights[i][j] * other[j][:]. A column of sums is one lane's from the first zero to the last store, and the weights are written again behind the
   block's next barrier: so nobody has to wait behind this. */
static __device__ __forceinline__ void llmpar__cuda_simple_sums(float *sums, int step, const float factor[LLMPAR__CUDA_SIMPLE_OWN], const float *weights, int weights_step, const float *other, int ld, int e)
{
    for (int x = (int)threadIdx.x & 31; x < e; x += 32) {
        float sum[LLMPAR__CUDA_SIMPLE_OWN];
#pragma unroll
        for (int i = 0; i < LLMPAR__CUDA_SIMPLE_OWN; i++) sum[i] = __fmul_rn(sums[i * step + x], factor[i]);
#pragma unroll 4
        for (int j = 0; j < LLMPAR__CUDA_SIMPLE_STEP; j += 4) {
            float y[4] = { other[j * ld + x], other[(j + 1) * ld + x], other[(j + 2) * ld + x], other[(j + 3) * ld + x] };
#pragma unroll
            for (int i = 0; i < LLMPAR__CUDA_SIMPLE_OWN; i++) {
                llmpar__cuda_16 four = *(const llmpar__cuda_16 *)(const void *)(weights + i * weights_step + j);
#pragma unroll
                for (int n = 0; n < 4; n++) sum[i] = __fmaf_rn(__uint_as_float(four.word[n]), y[n], sum[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < LLMPAR__CUDA_SIMPLE_OWN; i++) sums[i * step + x] = sum[i];
    }
}

static __device__ __forceinline__ float llmpar__cuda_simple_most(float x)
{
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

/* Rows of queries in a block of forward and dq. */
typedef struct llmpar__cuda_simple_rows {
    int64_t b;
    int kv, warp, lane, warps, low, limit;     /* low, limit: absolute positions of the block's queries */
    int first;                                 /* the block's first row: query * group + head of the group */
} llmpar__cuda_simple_rows;

static __device__ __forceinline__ llmpar__cuda_simple_rows llmpar__cuda_simple_place(const llmpar__cuda_attention_call &a)
{
    llmpar__cuda_simple_rows p;
    int64_t rows = (int64_t)a.tq * a.group, own = blockDim.x / 32 * LLMPAR__CUDA_SIMPLE_OWN, blocks = (rows + own - 1) / own, task = blockIdx.x / blocks, first = (blocks - 1 - blockIdx.x % blocks) * own, end = first + own < rows ? first + own : rows;
    p.b = task / a.kv_heads;
    p.kv = (int)(task % a.kv_heads);
    p.lane = (int)threadIdx.x & 31;
    p.warp = (int)threadIdx.x >> 5;
    p.warps = (int)blockDim.x >> 5;
    p.first = (int)first;
    p.low = a.tk - a.tq + (int)(first / a.group);
    p.limit = a.tk - a.tq + (int)((end - 1) / a.group) + 1;
    return p;
}

/* dq NULL: forward. */
static __global__ void __launch_bounds__(256) llmpar__cuda_simple_queries(llmpar__cuda_attention_call a)
{
    enum { OWN = LLMPAR__CUDA_SIMPLE_OWN, STEP = LLMPAR__CUDA_SIMPLE_STEP };
    LLMPAR__CUDA_SHARED(float, memory);
    llmpar__cuda_simple_rows p = llmpar__cuda_simple_place(a);
    int e = a.head_dim, width = (e + 3) / 4 * 4, ld = width + 1, rows = OWN * p.warps, offset = a.tk - a.tq, backward = a.dq != NULL;
    float *queries = memory, *sums = queries + rows * width, *weights = sums + rows * width, *douts = weights + rows * STEP, *keys = douts + (backward ? rows * width : 0), *values = keys + STEP * ld;
    const int32_t *start = a.doc_start ? a.doc_start + p.b * a.tk : NULL;
    const float least = llmpar__cuda_minus_infinity();
    int64_t k = p.b * a.tk_stride * a.ldk + (int64_t)p.kv * e, v = p.b * a.tk_stride * a.ldv + (int64_t)p.kv * e;
    float top[OWN], total[OWN], factor[OWN];
    int position[OWN]; /* -1: no row */
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        int row = p.warp + i * p.warps, at = p.first + row, query = at / a.group, h = p.kv * a.group + at % a.group, there = query < a.tq;
        int64_t token = p.b * a.tq + query, statistic = (p.b * a.heads + h) * a.tq + query;
        position[i] = there ? offset + query : -1;
        llmpar__cuda_simple_row(queries + row * width, a.q, token * a.ldq + (int64_t)h * e, e, width, there, a.scale_log2, a.dtype);
        for (int x = p.lane; x < width; x += 32) sums[row * width + x] = 0;
        top[i] = least;
        total[i] = 0;
        factor[i] = 1;
        if (!backward) continue;
        llmpar__cuda_simple_row(douts + row * width, a.dout, token * a.ldo + (int64_t)h * e, e, width, there, 1.0f, a.dtype);
        top[i] = there ? __fmul_rn(a.lse[statistic], LLMPAR__CUDA_ATTENTION_LOG2E) : 0.0f;
        total[i] = there ? a.delta[statistic] : 0.0f;
    }
    for (int low = p.low, high; low < p.limit; low = high) {
        int begin = llmpar__cuda_document(start, low);
        high = llmpar__cuda_document_run(start, low, p.limit);
        for (int first = begin; first < high; first += STEP) {
            float s[OWN], slope[OWN];
            int active = 0;
            __syncthreads();
            llmpar__cuda_simple_tile(keys, ld, a.k, k, a.ldk, first, high, e, width, a.dtype);
            llmpar__cuda_simple_tile(values, ld, a.v, v, a.ldv, first, high, e, width, a.dtype);
            __syncthreads();
#pragma unroll
            for (int i = 0; i < OWN; i++) active |= position[i] >= low && position[i] < high && position[i] >= first;
            if (!active) continue;
            llmpar__cuda_simple_scores(s, queries + p.warp * width, p.warps * width, keys, ld, width);
            if (backward) llmpar__cuda_simple_scores(slope, douts + p.warp * width, p.warps * width, values, ld, width);
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                int seen = position[i] >= low && position[i] < high && first + p.lane <= position[i];
                float weight;
                if (backward) weight = seen ? __fmul_rn(llmpar__cu_exp2(__fsub_rn(s[i], top[i])), __fsub_rn(slope[i], total[i])) : 0.0f;
                else {
                    float now = fmaxf(top[i], llmpar__cuda_simple_most(seen ? s[i] : least)), base = now == least ? 0.0f : now;
                    weight = seen ? llmpar__cu_exp2(__fsub_rn(s[i], base)) : 0.0f;
                    factor[i] = llmpar__cu_exp2(__fsub_rn(top[i], base));
                    total[i] = __fadd_rn(__fmul_rn(total[i], factor[i]), llmpar__cuda_attention_sum(weight));
                    top[i] = now;
                }
                weights[(p.warp + i * p.warps) * STEP + p.lane] = weight;
            }
            __syncwarp();
            llmpar__cuda_simple_sums(sums + p.warp * width, p.warps * width, factor, weights + p.warp * STEP, p.warps * STEP, backward ? keys : values, ld, e);
        }
    }
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        int row = p.warp + i * p.warps, at = p.first + row, query = at / a.group, h = p.kv * a.group + at % a.group;
        int64_t token = p.b * a.tq + query;
        float by = backward ? a.scale : __fdiv_rn(1.0f, total[i]);
        if (position[i] < 0) continue;
        for (int x = p.lane; x < e; x += 32) llmpar__cuda_simple_write(backward ? a.dq : a.out, token * (backward ? a.ldq : a.ldo) + (int64_t)h * e + x, __fmul_rn(sums[row * width + x], by), a.dtype);
        if (!backward && a.lse && p.lane == 0) a.lse[(p.b * a.heads + h) * a.tq + query] = __fmaf_rn(top[i], LLMPAR__CUDA_ATTENTION_LN2, llmpar__cuda_attention_log(total[i]));
    }
}

/* dk and dv of one head: what becomes of them is said in attention_backward.cu. */
static __global__ void __launch_bounds__(256) llmpar__cuda_simple_keys(llmpar__cuda_attention_call a)
{
    enum { OWN = LLMPAR__CUDA_SIMPLE_OWN, STEP = LLMPAR__CUDA_SIMPLE_STEP };
    LLMPAR__CUDA_SHARED(float, memory);
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, warps = (int)blockDim.x >> 5, rows = OWN * warps, blocks = (a.tk + rows - 1) / rows, member = (int)(blockIdx.x % (unsigned)a.group);
    int key0 = (int)(blockIdx.x / (unsigned)a.group % (unsigned)blocks) * rows, limit = min(key0 + rows, a.tk);
    int64_t task = blockIdx.x / ((unsigned)a.group * (unsigned)blocks), b = task / a.kv_heads;
    int kv = (int)(task % a.kv_heads), h = kv * a.group + member, e = a.head_dim, width = (e + 3) / 4 * 4, ld = width + 1;
    float *keys = memory, *values = keys + rows * width, *dk = values + rows * width, *dv = dk + rows * width, *weights = dv + rows * width, *slopes = weights + rows * STEP, *queries = slopes + rows * STEP, *douts = queries + STEP * ld;
    const int32_t *start = a.doc_start ? a.doc_start + b * a.tk : NULL;
    const float factor[OWN] = { 1, 1, 1, 1 };
    int64_t head = (b * a.heads + h) * a.tq;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        int row = warp + i * warps, key = key0 + row;
        llmpar__cuda_simple_row(keys + row * width, a.k, (b * a.tk + key) * a.ldk + (int64_t)kv * e, e, width, key < a.tk, a.scale_log2, a.dtype);
        llmpar__cuda_simple_row(values + row * width, a.v, (b * a.tk + key) * a.ldv + (int64_t)kv * e, e, width, key < a.tk, 1.0f, a.dtype);
        for (int x = lane; x < width; x += 32) dk[row * width + x] = dv[row * width + x] = 0;
    }
    for (int low = key0, high; low < limit; low = high) {
        int begin = llmpar__cuda_document(start, low), end;
        high = llmpar__cuda_document_run(start, low, limit);
        end = start ? min(max(a.doc_end[b * a.tk + begin], high), a.tk) : a.tk;
        for (int first = low; first < end; first += STEP) {
            float s[OWN], slope[OWN], shift, mean;
            int query = first + lane, active = 0;
            __syncthreads();
            llmpar__cuda_simple_tile(queries, ld, a.q, b * a.tq * a.ldq + (int64_t)h * e, a.ldq, first, end, e, width, a.dtype);
            llmpar__cuda_simple_tile(douts, ld, a.dout, b * a.tq * a.ldo + (int64_t)h * e, a.ldo, first, end, e, width, a.dtype);
            __syncthreads();
#pragma unroll
            for (int i = 0; i < OWN; i++) active |= key0 + warp + i * warps >= low && key0 + warp + i * warps < high && key0 + warp + i * warps < first + STEP;
            if (!active) continue;
            shift = query < end ? __fmul_rn(a.lse[head + query], LLMPAR__CUDA_ATTENTION_LOG2E) : 0.0f;
            mean = query < end ? a.delta[head + query] : 0.0f;
            llmpar__cuda_simple_scores(s, keys + warp * width, warps * width, queries, ld, width);
            llmpar__cuda_simple_scores(slope, values + warp * width, warps * width, douts, ld, width);
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                int key = key0 + warp + i * warps, seen = key >= low && key < high && key <= query && query < end;
                float weight = seen ? llmpar__cu_exp2(__fsub_rn(s[i], shift)) : 0.0f;
                weights[(warp + i * warps) * STEP + lane] = weight;
                slopes[(warp + i * warps) * STEP + lane] = seen ? __fmul_rn(weight, __fsub_rn(slope[i], mean)) : 0.0f;
            }
            __syncwarp();
            llmpar__cuda_simple_sums(dk + warp * width, warps * width, factor, slopes + warp * STEP, warps * STEP, queries, ld, e);
            llmpar__cuda_simple_sums(dv + warp * width, warps * width, factor, weights + warp * STEP, warps * STEP, douts, ld, e);
        }
    }
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        int row = warp + i * warps, key = key0 + row, dtype = a.dk_heads || a.dkv_float ? (int)LLMPAR_F32 : a.dtype;
        int64_t token = b * a.tk + key, of_head = (token * a.heads + h) * e;
        if (key >= a.tk) continue;
        for (int x = lane; x < e; x += 32) {
            llmpar__cuda_simple_write(a.dk_heads ? (void *)a.dk_heads : a.dk, (a.dk_heads ? of_head : token * a.ld_dk + (int64_t)kv * e) + x, __fmul_rn(dk[row * width + x], a.scale), dtype);
            llmpar__cuda_simple_write(a.dv_heads ? (void *)a.dv_heads : a.dv, (a.dv_heads ? of_head : token * a.ld_dv + (int64_t)kv * e) + x, dv[row * width + x], dtype);
        }
    }
}

/* ---- host ---- */

/* Bytes of shared memory for `warps` warps that hold `kept` matrices of rows and `weights` of weights. */
static size_t llmpar__cuda_simple_shared(int warps, int e, int kept, int weights)
{
    size_t rows = (size_t)(warps * LLMPAR__CUDA_SIMPLE_OWN), width = (size_t)((e + 3) / 4 * 4);
    return (rows * width * (size_t)kept + rows * LLMPAR__CUDA_SIMPLE_STEP * (size_t)weights + 2 * LLMPAR__CUDA_SIMPLE_STEP * (width + 1)) * sizeof(float);
}
/* The most warps for which there is room; rows are the same whoever owns them. 0 with an error: not even one. */
static int llmpar__cuda_simple_warps(llmpar_device *device, const char *what, int e, int kept, int weights)
{
    size_t limit = llmpar__cuda_of(device)->shared_limit;
    int warps = 8;
    while (warps > 0 && llmpar__cuda_simple_shared(warps, e, kept, weights) > limit) warps /= 2;
    if (warps == 0)
        (void)llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "%s: head_dim %d needs %llu bytes of shared memory, device %s has %llu for a block", what, e, (unsigned long long)llmpar__cuda_simple_shared(1, e, kept, weights), device->name, (unsigned long long)limit);
    return warps;
}

static llmpar_status llmpar__cuda_attention_simple(llmpar_device *device, llmpar_stream *stream, llmpar__cuda_attention_call a)
{
    int warps = llmpar__cuda_simple_warps(device, "attention", a.head_dim, 2, 1);
    int64_t own = warps * LLMPAR__CUDA_SIMPLE_OWN;
    if (warps == 0) return LLMPAR_ERR_UNSUPPORTED;
    llmpar__cuda_launch(device, stream, llmpar__cuda_simple_queries, dim3((unsigned)(a.batch * a.kv_heads * (((int64_t)a.tq * a.group + own - 1) / own))), dim3((unsigned)(32 * warps)), llmpar__cuda_simple_shared(warps, a.head_dim, 2, 1), a);
    return LLMPAR_OK;
}

static llmpar_status llmpar__cuda_attention_simple_backward(llmpar_device *device, llmpar_stream *stream, llmpar__cuda_attention_call a)
{
    int keys = llmpar__cuda_simple_warps(device, "attention_backward", a.head_dim, 4, 2), queries = keys ? llmpar__cuda_simple_warps(device, "attention_backward", a.head_dim, 3, 1) : 0;
    int64_t own = keys * LLMPAR__CUDA_SIMPLE_OWN;
    if (queries == 0) return LLMPAR_ERR_UNSUPPORTED;
    llmpar__cuda_launch(device, stream, llmpar__cuda_simple_keys, dim3((unsigned)(a.batch * a.heads * ((a.tk + own - 1) / own))), dim3((unsigned)(32 * keys)), llmpar__cuda_simple_shared(keys, a.head_dim, 4, 2), a);
    own = queries * LLMPAR__CUDA_SIMPLE_OWN;
    llmpar__cuda_launch(device, stream, llmpar__cuda_simple_queries, dim3((unsigned)(a.batch * a.kv_heads * (((int64_t)a.tq * a.group + own - 1) / own))), dim3((unsigned)(32 * queries)), llmpar__cuda_simple_shared(queries, a.head_dim, 3, 1), a);
    return LLMPAR_OK;
}

#undef LLMPAR__CUDA_SIMPLE_OWN
#undef LLMPAR__CUDA_SIMPLE_STEP
/* ==== src/cuda/attention_cudnn.cu ==== */
/* attention_cudnn: attention by cuDNN's graphs (desc.cudnn, mode FAST), in a program built with LLMPAR_USE_CUDNN and cudnn_frontend. Backward is asked for deterministic.

   One graph a form of call (sizes, strides, dtype, scale), built when its workspace is first asked for and kept. What cuDNN is not asked for here is refused by name, so that no model runs half on one and half on the other:
   f32, head_dim other than 64 and 128, packed documents, fewer queries than keys, and partial sums of dk and dv in f32. */

#ifdef LLMPAR_USE_CUDNN
#if defined(__CUDACC__)
#pragma nv_diagnostic push
#pragma nv_diag_suppress 128, 2810
#endif
#include <cudnn_frontend.h>
#if defined(__CUDACC__)
#pragma nv_diagnostic pop
#endif
#include <memory>
#include <new>
#include <string>
#include <unordered_map>
#include <vector>

typedef struct llmpar__cuda_cudnn_key {
    int64_t batch, t, stride, heads, kv_heads, head_dim, ldq, ldk, ldv, ldo, ld_dk, ld_dv;
    double scale;
    int64_t dtype, backward, statistics;
} llmpar__cuda_cudnn_key;

typedef struct llmpar__cuda_cudnn_graph {
    llmpar__cuda_cudnn_key key;
    std::shared_ptr<cudnn_frontend::graph::Graph> graph; /* empty: refused, with the reason */
    std::string reason;
    int64_t workspace;
} llmpar__cuda_cudnn_graph;

typedef struct llmpar__cuda_cudnn {
    cudnnHandle_t handle;
    std::vector<llmpar__cuda_cudnn_graph> graphs;
} llmpar__cuda_cudnn;

enum { LLMPAR__CUDNN_Q = 1, LLMPAR__CUDNN_K, LLMPAR__CUDNN_V, LLMPAR__CUDNN_O, LLMPAR__CUDNN_LSE, LLMPAR__CUDNN_DO, LLMPAR__CUDNN_DQ, LLMPAR__CUDNN_DK, LLMPAR__CUDNN_DV };

static llmpar_status llmpar__cuda_cudnn_create(llmpar_device *device)
{
    llmpar__cuda_cudnn *own = new (std::nothrow) llmpar__cuda_cudnn();
    cudnnStatus_t code;
    if (!own) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "cudnn: no memory for device %s", device->name);
    code = cudnnCreate(&own->handle);
    if (code != CUDNN_STATUS_SUCCESS) {
        delete own;
        return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "cudnn: device %s cannot be used: %s", device->name, cudnnGetErrorString(code));
    }
    llmpar__cuda_of(device)->attention = own;
    return LLMPAR_OK;
}

static void llmpar__cuda_cudnn_destroy(llmpar_device *device)
{
    llmpar__cuda_cudnn *own = (llmpar__cuda_cudnn *)llmpar__cuda_of(device)->attention;
    if (!own) return;
    own->graphs.clear();
    (void)cudnnDestroy(own->handle);
    delete own;
    llmpar__cuda_of(device)->attention = NULL;
}

/* [batch, heads, rows, e] in rows of ld elements. */
static cudnn_frontend::graph::Tensor_attributes llmpar__cuda_cudnn_tensor(int64_t uid, int64_t batch, int64_t heads, int64_t rows, int64_t stride, int64_t e, int64_t ld)
{
    return cudnn_frontend::graph::Tensor_attributes().set_uid(uid).set_dim({batch, heads, rows, e}).set_stride({stride * ld, e, ld, 1});
}
static void llmpar__cuda_cudnn_output(const std::shared_ptr<cudnn_frontend::graph::Tensor_attributes> &tensor, int64_t uid, int64_t batch, int64_t heads, int64_t rows, int64_t e, int64_t ld)
{
    tensor->set_output(true).set_uid(uid).set_dim({batch, heads, rows, e}).set_stride({rows * ld, e, ld, 1});
}

static void llmpar__cuda_cudnn_build(llmpar__cuda_cudnn *own, llmpar__cuda_cudnn_graph *g)
{
    namespace fe = cudnn_frontend;
    const llmpar__cuda_cudnn_key *k = &g->key;
    std::shared_ptr<fe::graph::Graph> graph = std::make_shared<fe::graph::Graph>();
    graph->set_io_data_type(k->dtype == LLMPAR_BF16 ? fe::DataType_t::BFLOAT16 : fe::DataType_t::HALF).set_intermediate_data_type(fe::DataType_t::FLOAT).set_compute_data_type(fe::DataType_t::FLOAT);
    auto q = graph->tensor(llmpar__cuda_cudnn_tensor(LLMPAR__CUDNN_Q, k->batch, k->heads, k->t, k->t, k->head_dim, k->ldq));
    auto keys = graph->tensor(llmpar__cuda_cudnn_tensor(LLMPAR__CUDNN_K, k->batch, k->kv_heads, k->t, k->stride, k->head_dim, k->ldk));
    auto values = graph->tensor(llmpar__cuda_cudnn_tensor(LLMPAR__CUDNN_V, k->batch, k->kv_heads, k->t, k->stride, k->head_dim, k->ldv));
    if (!k->backward) {
        auto options = fe::graph::SDPA_attributes().set_name("attention").set_generate_stats(k->statistics != 0).set_attn_scale((float)k->scale);
        options.set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT).set_diagonal_band_right_bound(0);
        auto made = graph->sdpa(q, keys, values, options);
        llmpar__cuda_cudnn_output(made[0], LLMPAR__CUDNN_O, k->batch, k->heads, k->t, k->head_dim, k->ldo);
        if (k->statistics) made[1]->set_output(true).set_uid(LLMPAR__CUDNN_LSE).set_data_type(fe::DataType_t::FLOAT).set_dim({k->batch, k->heads, k->t, 1}).set_stride({k->heads * k->t, k->t, 1, 1});
    } else {
        auto o = graph->tensor(llmpar__cuda_cudnn_tensor(LLMPAR__CUDNN_O, k->batch, k->heads, k->t, k->t, k->head_dim, k->ldo));
        auto dout = graph->tensor(llmpar__cuda_cudnn_tensor(LLMPAR__CUDNN_DO, k->batch, k->heads, k->t, k->t, k->head_dim, k->ldo));
        auto lse = graph->tensor(fe::graph::Tensor_attributes().set_uid(LLMPAR__CUDNN_LSE).set_data_type(fe::DataType_t::FLOAT).set_dim({k->batch, k->heads, k->t, 1}).set_stride({k->heads * k->t, k->t, 1, 1}));
        auto options = fe::graph::SDPA_backward_attributes().set_name("attention_backward").set_attn_scale((float)k->scale).set_deterministic_algorithm(true);
        options.set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT).set_diagonal_band_right_bound(0);
        auto made = graph->sdpa_backward(q, keys, values, o, dout, lse, options);
        llmpar__cuda_cudnn_output(made[0], LLMPAR__CUDNN_DQ, k->batch, k->heads, k->t, k->head_dim, k->ldq);
        llmpar__cuda_cudnn_output(made[1], LLMPAR__CUDNN_DK, k->batch, k->kv_heads, k->t, k->head_dim, k->ld_dk);
        llmpar__cuda_cudnn_output(made[2], LLMPAR__CUDNN_DV, k->batch, k->kv_heads, k->t, k->head_dim, k->ld_dv);
    }
    auto code = graph->build(own->handle, {fe::HeurMode_t::A});
    if (code.is_bad()) g->reason = code.get_message();
    else {
        g->graph = graph;
        g->workspace = graph->get_workspace_size();
    }
}

/* The form's graph, built if it is new; NULL with an error where cuDNN, or this file, does not take it. `error` NULL: none is wanted. */
static llmpar__cuda_cudnn_graph *llmpar__cuda_cudnn_find(llmpar_device *device, const char *what, const llmpar_attention_args *a, const llmpar_attention_backward_args *backward, llmpar_error *error)
{
    llmpar__cuda_cudnn *own = (llmpar__cuda_cudnn *)llmpar__cuda_of(device)->attention;
    llmpar__cuda_cudnn_graph made;
    const char *refused = a->dtype != LLMPAR_BF16 && a->dtype != LLMPAR_F16 ? "a dtype other than bf16 and f16" : a->head_dim != 64 && a->head_dim != 128 ? "a head_dim other than 64 and 128" : a->doc_start ? "packed documents" : a->tq != a->tk ? "fewer queries than keys"
        : backward && backward->dkv_dtype != LLMPAR_DTYPE_DEFAULT && backward->dkv_dtype != a->dtype ? "parts of dk and dv in f32 (ranks that share a kv head)" : NULL;
    if (refused) {
        (void)llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "%s: %s with cudnn on device %s: expected a device without cudnn", what, refused, device->name);
        return NULL;
    }
    memset(&made.key, 0, sizeof made.key);
    made.key.batch = a->batch; made.key.t = a->tk; made.key.stride = a->tk_stride; made.key.heads = a->heads; made.key.kv_heads = a->kv_heads; made.key.head_dim = a->head_dim;
    made.key.ldq = a->ldq; made.key.ldk = a->ldk; made.key.ldv = a->ldv; made.key.ldo = a->ldo;
    made.key.scale = a->scale;
    made.key.dtype = (int64_t)a->dtype;
    made.key.statistics = 1;
    if (backward) {
        made.key.backward = 1;
        made.key.ld_dk = backward->ld_dkv ? backward->ld_dkv : a->ldk;
        made.key.ld_dv = backward->ld_dkv ? backward->ld_dkv : a->ldv;
    }
    made.workspace = 0;
    try {
        size_t at = 0;
        while (at < own->graphs.size() && memcmp(&own->graphs[at].key, &made.key, sizeof made.key) != 0) at++;
        if (at == own->graphs.size()) {
            llmpar__cuda_cudnn_build(own, &made);
            own->graphs.push_back(made);
        }
        if (own->graphs[at].graph) return &own->graphs[at];
        (void)llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "%s: cudnn on device %s takes no such call: %.200s", what, device->name, own->graphs[at].reason.c_str());
    } catch (const std::exception &thrown) {
        (void)llmpar_error_set(error, LLMPAR_ERR_INTERNAL, "%s: cudnn on device %s: %.200s", what, device->name, thrown.what());
    }
    return NULL;
}

/* lse that nobody asked for is written behind cuDNN's own workspace: its attention that leaves none out is one graph less. */
static size_t llmpar__cuda_cudnn_bytes(const llmpar__cuda_cudnn_graph *g) { return ((size_t)g->workspace + 255) / 256 * 256 + (g->key.backward ? 0 : (size_t)(g->key.batch * g->key.heads * g->key.t) * sizeof(float)) + 255; }

static size_t llmpar__cuda_attention_cudnn_workspace(llmpar_device *device, const llmpar_attention_args *a, const llmpar_attention_backward_args *backward)
{
    llmpar__cuda_cudnn_graph *g;
    if (a->batch < 1 || a->tk < 1 || a->heads < 1 || a->kv_heads < 1 || a->heads % a->kv_heads || cudaSetDevice(llmpar__cuda_of(device)->index) != cudaSuccess) return 0;
    g = llmpar__cuda_cudnn_find(device, "attention", a, backward, NULL);
    return g ? llmpar__cuda_cudnn_bytes(g) : 0;
}

/* Behind the slot's llmpar__cuda_begin. */
static llmpar_status llmpar__cuda_attention_cudnn(llmpar_device *device, llmpar_stream *stream, const llmpar_attention_args *a, const llmpar_attention_backward_args *backward)
{
    const char *what = backward ? "attention_backward" : "attention";
    llmpar__cuda_cudnn *own = (llmpar__cuda_cudnn *)llmpar__cuda_of(device)->attention;
    llmpar_status status = llmpar__cuda_attention_check(device, what, a, 0, backward != NULL);
    llmpar__cuda_cudnn_graph *g;
    unsigned char *workspace;
    uintptr_t places;
    size_t need;
    if (status) return status;
    g = llmpar__cuda_cudnn_find(device, what, a, backward, device->error);
    if (!g) return device->error && device->error->status ? device->error->status : LLMPAR_ERR_UNSUPPORTED;
    need = llmpar__cuda_cudnn_bytes(g);
    if (!a->workspace || a->workspace_bytes < need) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "%s: workspace of %llu bytes, expected %llu", what, (unsigned long long)a->workspace_bytes, (unsigned long long)need);
    places = (uintptr_t)a->q | (uintptr_t)a->k | (uintptr_t)a->v | (uintptr_t)a->out | (uintptr_t)((a->ldq | a->ldk | a->ldv | a->ldo) * 2);
    if (backward) places |= (uintptr_t)backward->dout | (uintptr_t)backward->dq | (uintptr_t)backward->dk | (uintptr_t)backward->dv | (uintptr_t)((g->key.ld_dk | g->key.ld_dv) * 2);
    if (places & 15u) return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "%s: rows that do not start at multiples of 16 bytes with cudnn on device %s: expected a device without cudnn", what, device->name);
    workspace = (unsigned char *)(((uintptr_t)a->workspace + 255u) & ~(uintptr_t)255u);
    try {
        std::unordered_map<int64_t, void *> tensors;
        tensors[LLMPAR__CUDNN_Q] = (void *)(uintptr_t)a->q;
        tensors[LLMPAR__CUDNN_K] = (void *)(uintptr_t)a->k;
        tensors[LLMPAR__CUDNN_V] = (void *)(uintptr_t)a->v;
        tensors[LLMPAR__CUDNN_O] = a->out;
        tensors[LLMPAR__CUDNN_LSE] = a->lse ? a->lse : (void *)(workspace + ((size_t)g->workspace + 255) / 256 * 256);
        if (backward) {
            tensors[LLMPAR__CUDNN_DO] = (void *)(uintptr_t)backward->dout;
            tensors[LLMPAR__CUDNN_DQ] = backward->dq;
            tensors[LLMPAR__CUDNN_DK] = backward->dk;
            tensors[LLMPAR__CUDNN_DV] = backward->dv;
        }
        cudnnStatus_t code = cudnnSetStream(own->handle, llmpar__cuda_stream_of(device, stream)->handle);
        if (code != CUDNN_STATUS_SUCCESS) return llmpar_error_set(device->error, LLMPAR_ERR_INTERNAL, "%s: cudnn on device %s: %s", what, device->name, cudnnGetErrorString(code));
        auto done = g->graph->execute(own->handle, tensors, workspace);
        if (done.is_bad()) return llmpar_error_set(device->error, LLMPAR_ERR_INTERNAL, "%s: cudnn on device %s: %.200s", what, device->name, done.get_message().c_str());
    } catch (const std::exception &thrown) {
        return llmpar_error_set(device->error, LLMPAR_ERR_INTERNAL, "%s: cudnn on device %s: %.200s", what, device->name, thrown.what());
    }
    return llmpar__cuda_end(device, stream, what);
}
#endif
/* ==== src/cuda/cast.cu ==== */
/* cast: out[i] = in[i] in another type, with the bits of llmpar_convert (base/dtype.h), NaNs included: what moves between the host and the device must not show where it was rounded.

   A thread takes four elements and four a block further on, where both pointers are 16-byte aligned, and one at a time where they are not and at the end: so neighbours' bytes touch, of the narrow type and of the wide one. Narrowing from f64 goes through f32 bits
   rounded to odd, whose second rounding gives what one rounding from f64 gives (Boldo & Melquiond 2008). */

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
/* ==== src/cuda/tree_sum.cu ==== */
/* tree_sum: the balanced tree over whole buffers, and the largest element of several. The bits of the CPU device: additions alone have one rounding each, in the order of docs/exact.md.

   A thread takes 16 bytes of every operand where all pointers are 16-byte aligned, else one element. It reads all operands before it writes, so the result may lie on any of them. */
/* ==== src/cuda/tree_internal.h ==== */
/* tree_internal: the balanced tree over operands in memory, in a thread's registers: for tree_sum and for the communicator of ranks that share a GPU.

   The tree is walked as a binary counter: after operand j as many subtrees are closed as j has trailing ones; subtrees wait in registers, one a level. */
enum { LLMPAR__CUDA_TREE_LEVELS = 9 }; /* less than 2^9 operands */

template <typename T, int Count> struct __align__(sizeof(T) * Count) llmpar__cuda_tree_group { T x[Count]; };

static __device__ __forceinline__ float llmpar__cuda_tree_add(float a, float b) { return __fadd_rn(a, b); }
static __device__ __forceinline__ double llmpar__cuda_tree_add(double a, double b) { return __dadd_rn(a, b); }
static __device__ __forceinline__ uint64_t llmpar__cuda_tree_add(uint64_t a, uint64_t b) { return a + b; }

template <typename Group> static __device__ __forceinline__ Group llmpar__cuda_tree_sum_groups(Group a, const Group &b)
{
#pragma unroll
    for (unsigned k = 0; k < sizeof a.x / sizeof a.x[0]; k++) a.x[k] = llmpar__cuda_tree_add(a.x[k], b.x[k]);
    return a;
}

/* Operands: a kernel's argument with an array `in` of addresses. */
template <typename Group, typename Operands> static __device__ __forceinline__ Group llmpar__cuda_tree_at(const Operands &operands, int32_t n, int64_t i)
{
    Group level[LLMPAR__CUDA_TREE_LEVELS], sum = ((const Group *)operands.in[0])[i];
#pragma unroll
    for (int l = 0; l < LLMPAR__CUDA_TREE_LEVELS; l++) level[l] = sum; /* read only where the counter says so, which a compiler cannot see */
    for (int32_t j = 1; j < n; j++) {
        Group next = ((const Group *)operands.in[j])[i];
        int open = 1;
#pragma unroll
        for (int l = 0; l < LLMPAR__CUDA_TREE_LEVELS; l++) {
            if (!open) continue;
            if (j >> l & 1) next = llmpar__cuda_tree_sum_groups(level[l], next);
            else {
                level[l] = next;
                open = 0;
            }
        }
    }
    /* What is open closes from the right: the split at the largest power of two below n. */
    int found = 0;
#pragma unroll
    for (int l = 0; l < LLMPAR__CUDA_TREE_LEVELS; l++) {
        if (!(n >> l & 1)) continue;
        sum = found ? llmpar__cuda_tree_sum_groups(level[l], sum) : level[l];
        found = 1;
    }
    return sum;
}
/* ---- src/cuda/tree_sum.cu goes on ---- */
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
/* ==== src/cuda/optim.cu ==== */
/* optim: AdamW (Loshchilov & Hutter 2019), SGD and the largest absolute value, element by element, with the bits of the CPU device: an optimizer step may run on the host (offload) and must not show it.

     g' = g * grad_scale
     m  = fma(beta1, m, (1 - beta1) * g')
     v  = fma(beta2, v, ((1 - beta2) * g') * g')
     p  = fma(-lr, (m / c1) / (sqrt(v / c2) + eps), p * (1 - lr * decay))
   and for SGD
     g' = g * grad_scale, no larger than limit;  m = fma(momentum, m, g');  p = fma(-lr, m, p * (1 - lr * decay))
   The scalars are computed in f64 and rounded once; square root and division are IEEE's. Every operation is one of the _rn family, which a compiler neither fuses nor replaces.

   Callers hold parameters, gradients and moments in flat buffers (fsdp/flat.c), so one call is one launch for many tensors. A thread takes four elements of each buffer, 16 bytes, where all are 16-byte aligned. */

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
/* ==== src/cuda/squares.cu ==== */
/* squares: the order-free, exact sum of squares that gradient norms and AdaLomo need, at the speed of memory: see exact_internal.h for how a warp adds 256 of them. */
/* ==== src/cuda/exact_internal.h ==== */
/* exact_internal: the order-free, exact sum of base/exact_sum.h in a kernel: integers, so neither threads nor blocks have an order.

   A block keeps the 72 limbs in shared memory (llmpar__cuda_exact_begin .. _end) and adds to them with integer atomics; at its end they go to the accumulator in device memory, which
   llmpar__cuda_exact_carry normalises behind the kernel: the same limbs as the CPU leaves.

   Squares of floats. With the fraction f (24 bits) of a float of exponent e, x^2 = f^2 2^(2 e - 300), and shifting before squaring puts a range of exponents on one scale:
     F = f << (e - base), 0 <= e - base < 32:   F = high 2^28 + low (27 and 28 bits),   F^2 = low^2 + 2^29 low high + 2^56 high^2
   Each product is less than 2^56 and is added to a 64-bit register of its own, one multiply-add each; 256 of them fit. Then the warp adds its registers up and puts them into the limbs. A warp takes 256
   numbers at a time. One above the range moves it (a tensor's largest is soon found); those below it, zeros left out, are rare and are added in further rounds with lower ranges. */
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
/* ---- src/cuda/squares.cu goes on ---- */
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
/* ==== src/cuda/xent_loss.cu ==== */
/* xent_loss: the last step of the cross-entropy: f64 losses log(sum) + max - target_logit of the rows, one thread each, into the exact accumulator. The logarithm has the bits of llmpar_log_f64 (base/math.h):
   its own operations, none fused. */

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
/* ==== src/cuda/adalomo.cu ==== */
/* adalomo: the operations of AdaLomo (tables/device.h), with the bits of the CPU device: products and sums one by one in its order, sums over rows and columns in integers, squares in the exact accumulator.

   What a sum depends on (the largest gradient, the root mean squares) lies in device memory: each block's first thread reads it and does the few scalar operations itself. */

/* 2^e, -1022 <= e <= 1023. */
static __device__ __forceinline__ double llmpar__cuda_power(int e) { return __longlong_as_double((long long)(e + 1023) << 52); }

/* The exponent e of factor_sum: 2^e is the smallest power of two above largest * grad_scale, e >= -1000; 0: that is too large, or no number. */
static __device__ __forceinline__ int llmpar__cuda_factor_exponent(double largest, double grad_scale, int *e)
{
    double x = (double)__fmul_rn((float)largest, (float)grad_scale);
    if (x < 0) x = -x;
    if (!(x < llmpar__cuda_power(1000))) return 0;
    *e = (int)(__double_as_longlong(x) >> 52) - 1022;
    if (*e < -1000) *e = -1000;
    return 1;
}

/* ---- rows and columns ---- */

enum { LLMPAR__CUDA_FACTOR_COLUMNS = 256, LLMPAR__CUDA_FACTOR_ROWS = 32 };

/* A warp takes a tile of 256 columns and 32 rows, eight columns a lane. A column's sum stays in its lane to the end of the tile, a row's is added up over the lanes; both go to memory by integer additions. */
__global__ void __launch_bounds__(256) llmpar__cuda_factor_sum_kernel(llmpar_factor_sum_args a)
{
    const float *g = (const float *)a.g;
    float scale = (float)a.grad_scale;
    int64_t end = a.begin + a.count, first_row = a.begin / a.cols, rows = (end - 1) / a.cols + 1 - first_row, lane = threadIdx.x % 32;
    int64_t across = (a.cols + LLMPAR__CUDA_FACTOR_COLUMNS - 1) / LLMPAR__CUDA_FACTOR_COLUMNS, tiles = across * ((rows + LLMPAR__CUDA_FACTOR_ROWS - 1) / LLMPAR__CUDA_FACTOR_ROWS);
    int e;
    if (!llmpar__cuda_factor_exponent(*a.largest, a.grad_scale, &e)) return;
    double down = llmpar__cuda_power(-e), by_row = llmpar__cuda_power(a.row_bits), by_col = llmpar__cuda_power(a.col_bits);
    for (int64_t tile = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; tile < tiles; tile += (int64_t)gridDim.x * (blockDim.x / 32)) {
        int64_t row = first_row + tile / across * LLMPAR__CUDA_FACTOR_ROWS, last = row + LLMPAR__CUDA_FACTOR_ROWS, column = tile % across * LLMPAR__CUDA_FACTOR_COLUMNS + lane;
        long long down_sum[8] = { 0, 0, 0, 0, 0, 0, 0, 0 };
        if (last > first_row + rows) last = first_row + rows;
        for (; row < last; row++) {
            long long row_sum = 0;
#pragma unroll
            for (int k = 0; k < 8; k++) {
                int64_t c = column + 32 * k, i = row * a.cols + c;
                if (c >= a.cols || i < a.begin || i >= end) continue;
                double y = __dmul_rn((double)__fmul_rn(g[i - a.begin], scale), down), square = __dmul_rn(y, y);
                long long some = y != 0;
                row_sum += (long long)__dmul_rn(square, by_row) + some;
                down_sum[k] += (long long)__dmul_rn(square, by_col) + some;
            }
            row_sum = llmpar__cuda_warp_sum(row_sum);
            if (lane == 0 && row_sum) atomicAdd((unsigned long long *)(void *)a.row_sums + row, (unsigned long long)row_sum);
        }
#pragma unroll
        for (int k = 0; k < 8; k++)
            if (down_sum[k]) atomicAdd((unsigned long long *)(void *)a.col_sums + column + 32 * k, (unsigned long long)down_sum[k]);
    }
}

static llmpar_status llmpar__cuda_factor_sum(llmpar_device *device, llmpar_stream *stream, const llmpar_factor_sum_args *args)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "factor_sum", args->dtype, 0);
    if (status || args->count <= 0) return status;
    int64_t per = LLMPAR__CUDA_FACTOR_COLUMNS * LLMPAR__CUDA_FACTOR_ROWS / 32, across = (args->cols + LLMPAR__CUDA_FACTOR_COLUMNS - 1) / LLMPAR__CUDA_FACTOR_COLUMNS * LLMPAR__CUDA_FACTOR_COLUMNS;
    unsigned blocks = llmpar__cuda_blocks(llmpar__cuda_of(device), (args->count / args->cols + 2) * across / per + 1, 256, 4);
    llmpar__cuda_launch(device, stream, llmpar__cuda_factor_sum_kernel, dim3(blocks), dim3(256), 0, *args);
    return llmpar__cuda_end(device, stream, "factor_sum");
}

enum { LLMPAR__CUDA_MOMENT_TILE = 1024 };

/* With by_mean one block alone: the mean is a chain, tile by tile by one thread. Otherwise any number of blocks. */
__global__ void __launch_bounds__(256) llmpar__cuda_factor_moment_kernel(llmpar_factor_moment_args a)
{
    LLMPAR__CUDA_SHARED(double, shared);
    float *moment = (float *)a.moment, *factor = (float *)a.factor;
    double *tile = shared + 1, mean = 0, power = __longlong_as_double(0x7ff8000000000000), rest = __dadd_rn(1, -a.beta);
    int64_t count = a.count;
    int e;
    if (llmpar__cuda_factor_exponent(*a.largest, a.grad_scale, &e)) power = llmpar__cuda_power(e);
    double unit = __ddiv_rn(__dmul_rn(__dmul_rn(llmpar__cuda_power(-a.bits), power), power), (double)a.terms);
    for (int64_t at = (int64_t)blockIdx.x * LLMPAR__CUDA_MOMENT_TILE; at < count; at += (int64_t)gridDim.x * LLMPAR__CUDA_MOMENT_TILE) {
        int64_t n = count - at < LLMPAR__CUDA_MOMENT_TILE ? count - at : (int64_t)LLMPAR__CUDA_MOMENT_TILE;
        for (int64_t k = threadIdx.x; k < n; k += blockDim.x) {
            float m = (float)__dadd_rn(__dmul_rn(a.beta, (double)moment[at + k]), __dmul_rn(rest, __dadd_rn(__dmul_rn((double)a.sums[at + k], unit), a.eps)));
            moment[at + k] = m;
            if (a.by_mean) tile[k] = (double)m;
            else factor[at + k] = (float)__dsqrt_rn(__ddiv_rn(1, (double)m));
        }
        if (!a.by_mean) continue;
        __syncthreads();
        if (threadIdx.x == 0)
            for (int64_t k = 0; k < n; k++) mean = __dadd_rn(mean, tile[k]);
        __syncthreads();
    }
    if (!a.by_mean) return;
    if (threadIdx.x == 0) shared[0] = __ddiv_rn(mean, (double)count);
    __syncthreads();
    mean = shared[0];
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) factor[i] = (float)__dsqrt_rn(__ddiv_rn(mean, (double)moment[i]));
}

static llmpar_status llmpar__cuda_factor_moment(llmpar_device *device, llmpar_stream *stream, const llmpar_factor_moment_args *args)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "factor_moment", args->dtype, 0);
    if (status || args->count <= 0) return status;
    unsigned blocks = args->by_mean ? 1 : llmpar__cuda_blocks(llmpar__cuda_of(device), (args->count + 3) / 4, 256, 8);
    llmpar__cuda_launch(device, stream, llmpar__cuda_factor_moment_kernel, dim3(blocks), dim3(256), (LLMPAR__CUDA_MOMENT_TILE + 1) * sizeof(double), *args);
    return llmpar__cuda_end(device, stream, "factor_moment");
}

/* ---- the update ---- */

/* Where a warp's elements begin: one division for all. */
struct llmpar__cuda_place { int64_t row, column; };
static __device__ __forceinline__ llmpar__cuda_place llmpar__cuda_place_of(const llmpar_adalomo_args &a, int64_t at)
{
    llmpar__cuda_place place = { 0, 0 };
    if (!a.row_factor) return place;
    place.row = (a.begin + at) / a.cols;
    place.column = a.begin + at - place.row * a.cols;
    return place;
}

/* u of element at + o, 0 <= o < 256. */
static __device__ __forceinline__ float llmpar__cuda_direction(const llmpar_adalomo_args &a, const llmpar__cuda_place &place, int64_t at, int o)
{
    float g = __fmul_rn(((const float *)a.g)[at + o], (float)a.grad_scale);
    if (!a.row_factor) return __fdiv_rn(g, __fsqrt_rn(((const float *)a.moment)[at + o]));
    int64_t row = place.row, column = place.column + o;
    if (a.cols < LLMPAR__CUDA_EXACT_BATCH) { /* so both fit 32 bits */
        row += (unsigned)column / (unsigned)a.cols;
        column = (unsigned)column % (unsigned)a.cols;
    } else if (column >= a.cols) {
        row++;
        column -= a.cols;
    }
    return __fmul_rn(__fmul_rn(g, ((const float *)a.row_factor)[row]), ((const float *)a.col_factor)[column]);
}

__global__ void __launch_bounds__(256, 4) llmpar__cuda_adalomo_square_kernel(llmpar_adalomo_args a)
{
    LLMPAR__CUDA_SHARED(unsigned long long, limbs);
    const float *g = (const float *)a.g;
    float *moment = (float *)a.moment, scale = (float)a.grad_scale, beta = (float)a.beta, rest = (float)__dadd_rn(1, -a.beta), eps = (float)a.eps;
    int64_t warps = (int64_t)gridDim.x * (blockDim.x / 32);
    int lane = (int)(threadIdx.x % 32);
    llmpar__cuda_squares squares;
    llmpar__cuda_exact_begin(limbs);
    llmpar__cuda_squares_begin(&squares);
    for (int64_t at = ((int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * LLMPAR__CUDA_EXACT_BATCH; at < a.count; at += warps * LLMPAR__CUDA_EXACT_BATCH) {
        llmpar__cuda_place place = llmpar__cuda_place_of(a, at);
        uint32_t bits[LLMPAR__CUDA_EXACT_LANE];
#pragma unroll
        for (int k = 0; k < LLMPAR__CUDA_EXACT_LANE; k++) {
            int o = k * 32 + lane;
            bits[k] = 0;
            if (at + o >= a.count) continue;
            if (!a.row_factor) {
                float scaled = __fmul_rn(g[at + o], scale);
                moment[at + o] = __fadd_rn(__fmul_rn(beta, moment[at + o]), __fmul_rn(rest, __fadd_rn(__fmul_rn(scaled, scaled), eps)));
            }
            if (a.update_squares) bits[k] = __float_as_uint(llmpar__cuda_direction(a, place, at, o));
        }
        if (a.update_squares) llmpar__cuda_squares_add(&squares, limbs, bits);
    }
    if (!a.update_squares) return;
    llmpar__cuda_squares_end(&squares, limbs);
    llmpar__cuda_exact_end(limbs, a.update_squares);
}

static llmpar_status llmpar__cuda_adalomo_square(llmpar_device *device, llmpar_stream *stream, const llmpar_adalomo_args *args)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "adalomo_square", args->dtype, 0);
    if (status || args->count <= 0) return status;
    unsigned blocks = llmpar__cuda_blocks(llmpar__cuda_of(device), (args->count + 7) / 8, 256, 1);
    llmpar__cuda_launch(device, stream, llmpar__cuda_adalomo_square_kernel, dim3(blocks), dim3(256), LLMPAR__CUDA_EXACT_BYTES, *args);
    if (args->update_squares) llmpar__cuda_exact_carry(device, stream, args->update_squares);
    return llmpar__cuda_end(device, stream, "adalomo_square");
}

/* significand * 2^exponent, and a little more if `sticky`, rounded once to nearest, ties to even; subnormals and infinity as IEEE has them. */
static __device__ double llmpar__cuda_round_scaled(uint64_t significand, int sticky, int exponent)
{
    if (!significand) return 0.0;
    int length = 64 - __clzll((long long)significand), drop = length - 53;
    uint64_t kept;
    if (exponent + length > 1024) return __longlong_as_double(0x7ff0000000000000);
    if (exponent + length < -1074) return 0.0;
    if (exponent + drop < -1074) drop = -1074 - exponent;
    if (drop <= 0) kept = significand << -drop;
    else {
        uint64_t lost = drop < 64 ? significand & (((uint64_t)1 << drop) - 1) : significand, half = (uint64_t)1 << (drop - 1);
        kept = drop < 64 ? significand >> drop : 0;
        if (lost > half || (lost == half && (sticky || (kept & 1)))) kept++;
    }
    if (kept < 0x0010000000000000u) return __longlong_as_double((long long)kept);
    return __longlong_as_double((long long)(kept + ((uint64_t)(exponent + drop + 1074) << 52)));
}

/* The accumulator's value (llmpar_exact_sum_value) for a sum of squares, which is not negative. limbs[72] are the block's own copy, carried in place. */
static __device__ double llmpar__cuda_exact_value(int64_t *limbs)
{
    if (limbs[LLMPAR__CUDA_EXACT_NAN] || (limbs[LLMPAR__CUDA_EXACT_INFINITY] && limbs[LLMPAR__CUDA_EXACT_NEGATIVE_INFINITY])) return __longlong_as_double(0x7ff8000000000000);
    if (limbs[LLMPAR__CUDA_EXACT_INFINITY]) return __longlong_as_double(0x7ff0000000000000);
    int top = 0, sticky = 0;
    for (int i = 0; i < LLMPAR__CUDA_EXACT_NUMBER - 1; i++) {
        limbs[i + 1] += limbs[i] >> 32;
        limbs[i] &= 0xffffffff;
        if (limbs[i]) top = i;
    }
    if (limbs[LLMPAR__CUDA_EXACT_NUMBER - 1]) top = LLMPAR__CUDA_EXACT_NUMBER - 1;
    if (limbs[top] > 0xffffffff) return __longlong_as_double(0x7ff0000000000000);
    uint64_t significand = (uint64_t)limbs[top] << 32;
    if (top > 0) significand |= (uint64_t)limbs[top - 1];
    if (top < 2) return llmpar__cuda_round_scaled(significand, 0, 32 * (top - 1) - 1088);
    int shift = __clzll((long long)significand);
    if (shift) significand = significand << shift | (uint64_t)limbs[top - 2] >> (32 - shift);
    sticky = ((uint64_t)limbs[top - 2] & (0xffffffffu >> shift)) != 0;
    for (int i = 0; i < top - 2; i++) sticky |= limbs[i] != 0;
    return llmpar__cuda_round_scaled(significand, sticky, 32 * (top - 1) - 1088 - shift);
}

__global__ void __launch_bounds__(256) llmpar__cuda_adalomo_kernel(llmpar_adalomo_args a)
{
    LLMPAR__CUDA_SHARED(int64_t, limbs);
    float *p = (float *)a.p, *scalars = (float *)(void *)(limbs + 2 * LLMPAR_EXACT_SUM_LIMBS);
    double *rms = (double *)(void *)(scalars + 2);
    int lane = (int)(threadIdx.x % 32);
    for (unsigned i = threadIdx.x; i < 2 * LLMPAR_EXACT_SUM_LIMBS; i += blockDim.x) limbs[i] = i < LLMPAR_EXACT_SUM_LIMBS ? a.update_squares[i] : a.param_squares[i - LLMPAR_EXACT_SUM_LIMBS];
    __syncthreads();
    if (threadIdx.x == 0 || threadIdx.x == 32) rms[threadIdx.x / 32] = __dsqrt_rn(__ddiv_rn(llmpar__cuda_exact_value(limbs + (threadIdx.x ? LLMPAR_EXACT_SUM_LIMBS : 0)), (double)a.elements));
    __syncthreads();
    if (threadIdx.x == 0) {
        double rate = __dmul_rn(a.lr, rms[1] < 1e-3 ? 1e-3 : rms[1]);
        scalars[0] = (float)__dadd_rn(1, -__dmul_rn(rate, a.decay));
        scalars[1] = (float)__ddiv_rn(-rate, rms[0] < 1 ? 1.0 : rms[0]);
    }
    __syncthreads();
    float keep = scalars[0], minus = scalars[1];
    for (int64_t at = ((int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * LLMPAR__CUDA_EXACT_BATCH; at < a.count; at += (int64_t)gridDim.x * (blockDim.x / 32) * LLMPAR__CUDA_EXACT_BATCH) {
        llmpar__cuda_place place = llmpar__cuda_place_of(a, at);
#pragma unroll
        for (int k = 0; k < LLMPAR__CUDA_EXACT_LANE; k++) {
            int o = k * 32 + lane;
            if (at + o < a.count) p[at + o] = __fadd_rn(__fmul_rn(p[at + o], keep), __fmul_rn(minus, llmpar__cuda_direction(a, place, at, o)));
        }
    }
}

static llmpar_status llmpar__cuda_adalomo(llmpar_device *device, llmpar_stream *stream, const llmpar_adalomo_args *args)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "adalomo", args->dtype, 0);
    if (status || args->count <= 0) return status;
    unsigned blocks = llmpar__cuda_blocks(llmpar__cuda_of(device), (args->count + 7) / 8, 256, 1);
    llmpar__cuda_launch(device, stream, llmpar__cuda_adalomo_kernel, dim3(blocks), dim3(256), 2 * LLMPAR__CUDA_EXACT_BYTES + 2 * sizeof(float) + 2 * sizeof(double), *args);
    return llmpar__cuda_end(device, stream, "adalomo");
}
/* ==== src/cuda/shared_comm.cu ==== */
/* shared_comm: the communicator of rank threads that share a GPU, or have GPUs that reach each other's memory: every collective is a kernel over the peers' buffers.

   A collective, on every rank (n ranks, this one is r), on the rank's stream S:
     record    event ready[r] behind what S holds: my buffers are as the call found them, and free for the result
     publish   what I am about to do and where my buffers are, in my place of the communicator
     meet      on the host, in a barrier of the inner communicator (rank threads): now all places are complete; compare them: all ranks do the same thing, or all report both sides and nothing has moved
     issue     S waits for every ready[p]; one kernel reads the peers' buffers and writes results; event done[r] behind it
     meet      again: now every rank has issued
     wait      S waits for every done[p]: what comes next on S finds the results, and may overwrite what the peers have read
   Nothing waits for the GPU on the host, and no kernel waits for another. A wait names only events that were recorded, on the host, before it was issued: work depends on work issued earlier, so queues that
   the driver shares between streams cannot lock each other out. An event is recorded again only behind the next meeting, when nobody will wait for its last recording any more.

   Who writes what: rank r alone writes what is derived from part r. All-gather, broadcast and all-to-all read into the own buffer; reduce-scatter sums part r; all-reduce sums slice r of all inputs and writes
   it to all outputs, which in place overwrites what nobody else reads. Sums are the tree of docs/exact.md over the ranks, element by element: the bits of every other communicator.

   Failures are the inner communicator's: a rank that fails aborts the job there, and who waits in a meeting returns with LLMPAR_ERR_PEER or LLMPAR_ERR_TIMEOUT. Before a rank goes away from a collective that
   others have begun, it closes the communicator (nobody issues from then on) and waits for what was issued: its buffers are its own again.

   send and recv: the sender's place travels through the inner communicator, the receiver's stream copies, and its answer lets the sender's stream wait for the copy. */

#include <unistd.h>

#define LLMPAR__CUDA_SHARED_MOST 128 /* ranks: addresses are a kernel's arguments, of which there are 4 KiB */
#define LLMPAR__CUDA_SHARED_GRAIN 256u /* bytes: slices of an all-reduce begin at multiples of it */

/* ---- kernels ---- */

struct llmpar__cuda_ends { const void *in[LLMPAR__CUDA_SHARED_MOST]; void *out[LLMPAR__CUDA_SHARED_MOST]; };

/* out[k][b][i] = tree over j < n of in[j][b][i], i < count, b < blocks, for all k < outs; blocks are in_step and out_step elements apart. wide: all of it is 16-byte aligned. */
template <typename T> __global__ void __launch_bounds__(128) llmpar__cuda_shared_sum_kernel(const llmpar__cuda_ends ends, int32_t n, int32_t outs, int64_t count, int64_t blocks, int64_t in_step, int64_t out_step, int wide)
{
    const int64_t items = 16 / sizeof(T);
    typedef llmpar__cuda_tree_group<T, 16 / sizeof(T)> group;
    typedef llmpar__cuda_tree_group<T, 1> one;
    int64_t first = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, step = (int64_t)gridDim.x * blockDim.x, groups = wide ? count / items : 0;
    for (int64_t b = blockIdx.y; b < blocks; b += gridDim.y) {
        for (int64_t i = first; i < groups; i += step) {
            group sum = llmpar__cuda_tree_at<group>(ends, n, b * in_step / items + i);
            for (int32_t k = 0; k < outs; k++) ((group *)ends.out[k])[b * out_step / items + i] = sum;
        }
        for (int64_t i = groups * items + first; i < count; i += step) {
            one sum = llmpar__cuda_tree_at<one>(ends, n, b * in_step + i);
            for (int32_t k = 0; k < outs; k++) ((one *)ends.out[k])[b * out_step + i] = sum;
        }
    }
}

template <typename T> __global__ void __launch_bounds__(128) llmpar__cuda_shared_max_kernel(const llmpar__cuda_ends ends, int32_t n, int32_t outs, int64_t count, int64_t blocks, int64_t in_step, int64_t out_step)
{
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t b = blockIdx.y; b < blocks; b += gridDim.y)
        for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
            T most = ((const T *)ends.in[0])[b * in_step + i];
            for (int32_t j = 1; j < n; j++) most = llmpar__cuda_larger(most, ((const T *)ends.in[j])[b * in_step + i]);
            for (int32_t k = 0; k < outs; k++) ((T *)ends.out[k])[b * out_step + i] = most;
        }
}

/* out[j][b][i] = in[j][b][i], j < n. */
template <typename T> __global__ void __launch_bounds__(128) llmpar__cuda_shared_copy_kernel(const llmpar__cuda_ends ends, int32_t n, int64_t count, int64_t blocks, int64_t in_step, int64_t out_step)
{
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t at = blockIdx.y; at < n * blocks; at += gridDim.y) {
        int64_t j = at % n, b = at / n;
        const T *in = (const T *)ends.in[j] + b * in_step;
        T *out = (T *)ends.out[j] + b * out_step;
        for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) out[i] = in[i];
    }
}

/* ---- state ---- */

/* What a rank shows to the others. The events stay; the rest is of one call, written before its first meeting and read between the two. */
struct llmpar__cuda_shared_place {
    cudaEvent_t ready, done;
    llmpar_call what;
    uint64_t fingerprint;
    const void *send;
    void *recv;
};

/* The half that the ranks share; with the last of them it goes. Its heap is its own, since a rank's belongs to the rank's thread. */
struct llmpar__cuda_shared_group {
    llmpar_heap heap;
    pthread_mutex_t lock;      /* while a rank issues */
    int32_t ranks, references; /* under the lock */
    int32_t closed;            /* under the lock: a rank has gone away; nobody issues any more */
    llmpar__cuda_shared_place *place; /* [ranks] */
    cudaEvent_t *taken;        /* [ranks receiver][ranks sender]: behind the copy of a message; made by the receiver with the first */
};

struct llmpar__cuda_shared {
    llmpar_comm comm;          /* first: the table itself */
    llmpar_heap *heap;         /* the rank's */
    llmpar_comm *inner;        /* the same ranks on host memory; owned */
    llmpar__cuda_shared_group *group;
    int32_t world_rank;
    int32_t broken;            /* this rank's calls touch the group no more */
    char axis[24];
};

/* A message and the answer to it. */
struct llmpar__cuda_shared_message { llmpar_call what; uint64_t fingerprint; const void *send; cudaEvent_t event; };

static llmpar__cuda_shared *llmpar__cuda_shared_of(llmpar_comm *comm) { return (llmpar__cuda_shared *)comm->state; }

static void llmpar__cuda_shared_release(llmpar__cuda_shared_group *group)
{
    pthread_mutex_lock(&group->lock);
    int32_t left = --group->references;
    pthread_mutex_unlock(&group->lock);
    if (left) return;
    for (int32_t i = 0; i < group->ranks; i++) {
        if (group->place[i].ready) cudaEventDestroy(group->place[i].ready);
        if (group->place[i].done) cudaEventDestroy(group->place[i].done);
    }
    for (int32_t i = 0; i < group->ranks * group->ranks; i++)
        if (group->taken[i]) cudaEventDestroy(group->taken[i]);
    pthread_mutex_destroy(&group->lock);
    llmpar_heap heap = group->heap;
    llmpar_heap_free(&heap, group->place);
    llmpar_heap_free(&heap, group->taken);
    llmpar_heap_free(&heap, group);
}

/* For `ranks` ranks, each with a reference; NULL: out of memory. */
static llmpar__cuda_shared_group *llmpar__cuda_shared_group_create(int32_t ranks)
{
    llmpar_heap heap;
    llmpar_heap_init(&heap, NULL);
    llmpar__cuda_shared_group *group = (llmpar__cuda_shared_group *)llmpar_heap_zalloc(&heap, 1, sizeof *group);
    llmpar__cuda_shared_place *place = (llmpar__cuda_shared_place *)llmpar_heap_zalloc(&heap, (size_t)ranks, sizeof *place);
    cudaEvent_t *taken = (cudaEvent_t *)llmpar_heap_zalloc(&heap, (size_t)ranks * (size_t)ranks, sizeof *taken);
    if (!group || !place || !taken || pthread_mutex_init(&group->lock, NULL)) {
        llmpar_heap_free(&heap, group);
        llmpar_heap_free(&heap, place);
        llmpar_heap_free(&heap, taken);
        return NULL;
    }
    group->heap = heap;
    group->ranks = group->references = ranks;
    group->place = place;
    group->taken = taken;
    return group;
}

/* ---- meeting and failing ---- */

/* The inner communicator's slots are called without its wrappers: the record has the calls of this one. What it says of a wait has this call's number and tag. */
static llmpar_status llmpar__cuda_shared_meet(llmpar__cuda_shared *shared, const char *tag)
{
    llmpar_comm *inner = shared->inner;
    if (inner->ranks == 1) return LLMPAR_OK;
    const llmpar_call *before = inner->call;
    inner->call = shared->comm.call;
    llmpar_status status = inner->barrier(inner, NULL, tag);
    inner->call = before;
    return status;
}

/* From here on nobody issues on this communicator; waits for what was. */
static void llmpar__cuda_shared_close(llmpar__cuda_shared *shared)
{
    llmpar__cuda_shared_group *group = shared->group;
    shared->broken = 1;
    pthread_mutex_lock(&group->lock);
    group->closed = 1;
    pthread_mutex_unlock(&group->lock);
    for (int32_t i = 0; i < group->ranks; i++) /* a rank that is only now filling its place has issued nothing; an event was made before all met */
        if (group->place[i].done) cudaEventSynchronize(group->place[i].done);
    for (int32_t i = 0; i < group->ranks * group->ranks; i++)
        if (group->taken[i]) cudaEventSynchronize(group->taken[i]);
}

/* This rank's own failure, whose text is in the rank's error, becomes the job's. */
static llmpar_status llmpar__cuda_shared_fail(llmpar__cuda_shared *shared, llmpar_status status)
{
    llmpar_error error;
    if (shared->comm.error && shared->comm.error->status) error = *shared->comm.error;
    else {
        llmpar_error_clear(&error);
        llmpar_error_set(&error, status, "a collective on %s failed", shared->axis);
    }
    if (error.rank < 0) error.rank = shared->world_rank;
    llmpar__cuda_shared_close(shared);
    shared->inner->abort(shared->inner, &error);
    return status;
}

static llmpar_status llmpar__cuda_shared_mismatch(llmpar__cuda_shared *shared, const llmpar_call *a, const llmpar_call *b)
{
    char text[700];
    int swapped = a->rank > b->rank;
    llmpar_call_mismatch(swapped ? b : a, swapped ? a : b, text, sizeof text);
    return llmpar__cuda_shared_fail(shared, llmpar_error_set(shared->comm.error, LLMPAR_ERR_MISMATCH, "%s", text));
}

/* A call on a communicator that is broken, or closed by a peer: the inner one knows why. */
static llmpar_status llmpar__cuda_shared_refuse(llmpar__cuda_shared *shared, const char *tag)
{
    llmpar_status status = llmpar__cuda_shared_meet(shared, tag);
    return status ? status : llmpar_error_set(shared->comm.error, LLMPAR_ERR_PEER, "\"%s\" on %s: another rank has failed in a collective on it", tag, shared->axis);
}

static void llmpar__cuda_shared_describe(llmpar__cuda_shared *shared, llmpar_call_op op, const llmpar_collective *call, llmpar_call *out)
{
    llmpar_call_describe(&shared->comm, op, call, out);
    if (out->rank < 0) out->rank = shared->world_rank;
}

/* ---- work ---- */

/* Copies of ends.in[j] to ends.out[j], j < n: blocks of `bytes`, in_step and out_step bytes apart. */
static void llmpar__cuda_shared_copy(llmpar_device *device, llmpar_stream *stream, const llmpar__cuda_ends &ends, int32_t n, int64_t bytes, int64_t blocks, int64_t in_step, int64_t out_step)
{
    uintptr_t all = (uintptr_t)bytes | (blocks > 1 ? (uintptr_t)in_step | (uintptr_t)out_step : 0);
    if (!n || !bytes) return;
    for (int32_t j = 0; j < n; j++) all |= (uintptr_t)ends.in[j] | (uintptr_t)ends.out[j];
    int64_t size = !(all & 15) ? 16 : !(all & 3) ? 4 : 1, count = bytes / size;
    dim3 grid(llmpar__cuda_blocks(llmpar__cuda_of(device), count, 128, 8), (unsigned)(n * blocks < 65535 ? n * blocks : 65535)), threads(128);
    if (size == 16) llmpar__cuda_launch(device, stream, llmpar__cuda_shared_copy_kernel<llmpar__cuda_16>, grid, threads, 0, ends, n, count, blocks, in_step / size, out_step / size);
    else if (size == 4) llmpar__cuda_launch(device, stream, llmpar__cuda_shared_copy_kernel<uint32_t>, grid, threads, 0, ends, n, count, blocks, in_step / size, out_step / size);
    else llmpar__cuda_launch(device, stream, llmpar__cuda_shared_copy_kernel<uint8_t>, grid, threads, 0, ends, n, count, blocks, in_step, out_step);
}

/* Steps in elements. */
static void llmpar__cuda_shared_reduce(llmpar_device *device, llmpar_stream *stream, const llmpar__cuda_ends &ends, int32_t n, int32_t outs, const llmpar_call *what, int64_t count, int64_t blocks, int64_t in_step, int64_t out_step)
{
    int64_t item = (int64_t)llmpar_dtype_size((llmpar_dtype)what->dtype);
    uintptr_t all = blocks > 1 ? (uintptr_t)(in_step * item) | (uintptr_t)(out_step * item) : 0;
    if (!count) return;
    for (int32_t j = 0; j < n; j++) all |= (uintptr_t)ends.in[j];
    for (int32_t k = 0; k < outs; k++) all |= (uintptr_t)ends.out[k];
    int wide = !(all & 15);
    dim3 grid(llmpar__cuda_blocks(llmpar__cuda_of(device), wide ? (count * item + 15) / 16 : count, 128, 8), (unsigned)(blocks < 65535 ? blocks : 65535)), threads(128);
    if (what->reduce == LLMPAR_MAX) {
        if (what->dtype == LLMPAR_F32) llmpar__cuda_launch(device, stream, llmpar__cuda_shared_max_kernel<float>, grid, threads, 0, ends, n, outs, count, blocks, in_step, out_step);
        else if (what->dtype == LLMPAR_F64) llmpar__cuda_launch(device, stream, llmpar__cuda_shared_max_kernel<double>, grid, threads, 0, ends, n, outs, count, blocks, in_step, out_step);
        else llmpar__cuda_launch(device, stream, llmpar__cuda_shared_max_kernel<int64_t>, grid, threads, 0, ends, n, outs, count, blocks, in_step, out_step);
    } else if (what->dtype == LLMPAR_F32) llmpar__cuda_launch(device, stream, llmpar__cuda_shared_sum_kernel<float>, grid, threads, 0, ends, n, outs, count, blocks, in_step, out_step, wide);
    else if (what->dtype == LLMPAR_F64) llmpar__cuda_launch(device, stream, llmpar__cuda_shared_sum_kernel<double>, grid, threads, 0, ends, n, outs, count, blocks, in_step, out_step, wide);
    else llmpar__cuda_launch(device, stream, llmpar__cuda_shared_sum_kernel<uint64_t>, grid, threads, 0, ends, n, outs, count, blocks, in_step, out_step, wide);
}

/* This rank's kernel. part: bytes of one rank's part of one block. */
static void llmpar__cuda_shared_work(llmpar__cuda_shared *shared, llmpar_stream *stream, const llmpar__cuda_shared_place *place)
{
    llmpar_device *device = shared->comm.device;
    int32_t n = shared->comm.ranks, r = shared->comm.rank, ends_used = 0;
    const llmpar__cuda_shared_place *mine = &place[r];
    const llmpar_call *what = &mine->what;
    int64_t count = (int64_t)what->count, blocks = (int64_t)what->blocks, item = (int64_t)llmpar_dtype_size((llmpar_dtype)what->dtype), part = count * item;
    llmpar__cuda_ends ends;
    if (!part || !blocks) return;
    memset(&ends, 0, sizeof ends);
    switch (what->op) {
    case LLMPAR_CALL_ALL_GATHER:
    case LLMPAR_CALL_ALL_TO_ALL: {
        int turned = what->op == LLMPAR_CALL_ALL_TO_ALL;
        for (int32_t k = 0; k < n; k++) {
            int32_t i = (r + k) % n;
            ends.in[ends_used] = (const char *)place[i].send + (turned ? r * part : 0);
            ends.out[ends_used] = (char *)mine->recv + i * part;
            if (ends.in[ends_used] != ends.out[ends_used]) ends_used++; /* in place: my part is there */
        }
        llmpar__cuda_shared_copy(device, stream, ends, ends_used, part, blocks, turned ? n * part : part, n * part);
        return;
    }
    case LLMPAR_CALL_BROADCAST:
        ends.in[0] = place[what->root].send;
        ends.out[0] = mine->recv;
        if (mine->recv && mine->recv != place[what->root].send) llmpar__cuda_shared_copy(device, stream, ends, 1, part * blocks, 1, 0, 0);
        return;
    case LLMPAR_CALL_REDUCE_SCATTER:
        for (int32_t i = 0; i < n; i++) ends.in[i] = (const char *)place[i].send + r * part;
        ends.out[0] = mine->recv;
        llmpar__cuda_shared_reduce(device, stream, ends, n, 1, what, count, blocks, n * count, count);
        return;
    case LLMPAR_CALL_ALL_REDUCE: {
        int64_t total = count * blocks, grain = LLMPAR__CUDA_SHARED_GRAIN / item, grains = (total + grain - 1) / grain, begin = llmpar__cuda_piece_begin(r, grains, n) * grain, end = llmpar__cuda_piece_begin(r + 1, grains, n) * grain;
        if (end > total) end = total;
        for (int32_t i = 0; i < n; i++) {
            ends.in[i] = (const char *)place[i].send + begin * item;
            ends.out[i] = (char *)place[(r + i) % n].recv + begin * item;
        }
        if (begin < end) llmpar__cuda_shared_reduce(device, stream, ends, n, n, what, end - begin, 1, 0, 0);
        return;
    }
    default: return; /* a barrier: the events alone */
    }
}

/* ---- collectives ---- */

static llmpar_status llmpar__cuda_shared_wait(llmpar__cuda_shared *shared, cudaStream_t stream, const char *name, int done)
{
    llmpar__cuda_shared_group *group = shared->group;
    llmpar_status status = LLMPAR_OK;
    for (int32_t k = 1; k < group->ranks && !status; k++) {
        const llmpar__cuda_shared_place *peer = &group->place[(shared->comm.rank + k) % group->ranks];
        status = llmpar__cuda_check(shared->comm.device, cudaStreamWaitEvent(stream, done ? peer->done : peer->ready, 0), name);
    }
    return status;
}

static llmpar_status llmpar__cuda_shared_run(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call, int32_t operation)
{
    llmpar__cuda_shared *shared = llmpar__cuda_shared_of(comm);
    llmpar__cuda_shared_group *group = shared->group;
    llmpar__cuda_shared_place *mine = &group->place[comm->rank];
    llmpar_call_op op = (llmpar_call_op)operation;
    const char *name = llmpar_call_op_name(op);
    if (shared->broken) return llmpar__cuda_shared_refuse(shared, call->tag);
    llmpar_status status = llmpar__cuda_begin(comm->device, stream);
    cudaStream_t handle = llmpar__cuda_stream_of(comm->device, stream)->handle;
    if (!status) status = llmpar__cuda_check(comm->device, cudaEventRecord(mine->ready, handle), name);
    if (status) return llmpar__cuda_shared_fail(shared, status);
    llmpar__cuda_shared_describe(shared, op, call, &mine->what);
    mine->fingerprint = comm->unchecked ? 0 : llmpar_call_fingerprint(&mine->what);
    mine->send = call->send;
    mine->recv = call->recv;
    status = llmpar__cuda_shared_meet(shared, call->tag);
    if (status) { /* nobody has passed */
        shared->broken = 1;
        return status;
    }
    for (int32_t i = 1; i < comm->ranks; i++)
        if (group->place[i].fingerprint != group->place[0].fingerprint) return llmpar__cuda_shared_mismatch(shared, &group->place[0].what, &group->place[i].what);

    pthread_mutex_lock(&group->lock);
    int closed = group->closed;
    if (!closed) {
        status = llmpar__cuda_shared_wait(shared, handle, name, 0);
        if (!status) llmpar__cuda_shared_work(shared, stream, group->place);
        if (!status) status = llmpar__cuda_check(comm->device, cudaGetLastError(), name);
        llmpar_status recorded = llmpar__cuda_check(comm->device, cudaEventRecord(mine->done, handle), name);
        if (!status) status = recorded;
    }
    pthread_mutex_unlock(&group->lock);
    if (status) return llmpar__cuda_shared_fail(shared, status);
    if (!closed) status = llmpar__cuda_shared_meet(shared, call->tag);
    if (closed || status) { /* some have issued */
        llmpar__cuda_shared_close(shared);
        return status ? status : llmpar__cuda_shared_refuse(shared, call->tag);
    }
    status = llmpar__cuda_shared_wait(shared, handle, name, 1);
    if (!status) status = llmpar__cuda_end(comm->device, stream, name);
    return status ? llmpar__cuda_shared_fail(shared, status) : LLMPAR_OK;
}

/* ---- messages ---- */

/* A message or an answer to (out) or from (in) the peer, through the inner communicator. */
static llmpar_status llmpar__cuda_shared_pass(llmpar__cuda_shared *shared, int32_t peer, const char *tag, const llmpar__cuda_shared_message *out, llmpar__cuda_shared_message *in)
{
    llmpar_comm *inner = shared->inner;
    const llmpar_call *before = inner->call;
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.send = out;
    call.recv = in;
    call.count = sizeof *out;
    call.blocks = 1;
    call.dtype = LLMPAR_U8;
    call.peer = peer;
    call.tag = tag;
    inner->call = shared->comm.call;
    llmpar_status status = out ? inner->send(inner, NULL, &call) : inner->recv(inner, NULL, &call);
    inner->call = before;
    return status;
}

static llmpar_status llmpar__cuda_shared_point(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call, llmpar_call_op op)
{
    llmpar__cuda_shared *shared = llmpar__cuda_shared_of(comm);
    llmpar__cuda_shared_group *group = shared->group;
    llmpar__cuda_shared_place *mine = &group->place[comm->rank];
    llmpar__cuda_shared_message out, in;
    const char *name = llmpar_call_op_name(op);
    int sends = op == LLMPAR_CALL_SEND;
    if (shared->broken) return llmpar__cuda_shared_refuse(shared, call->tag);
    memset(&in, 0, sizeof in);
    memset(&out, 0, sizeof out);
    llmpar_status status = llmpar__cuda_begin(comm->device, stream);
    cudaStream_t handle = llmpar__cuda_stream_of(comm->device, stream)->handle;
    if (!status && sends) status = llmpar__cuda_check(comm->device, cudaEventRecord(mine->ready, handle), name);
    if (status) return llmpar__cuda_shared_fail(shared, status);
    llmpar__cuda_shared_describe(shared, op, call, &out.what);
    out.fingerprint = comm->unchecked ? 0 : llmpar_call_fingerprint(&out.what);
    out.send = call->send;
    out.event = mine->ready;

    if (sends) {
        status = llmpar__cuda_shared_pass(shared, call->peer, call->tag, &out, NULL);
        if (!status) status = llmpar__cuda_shared_pass(shared, call->peer, call->tag, NULL, &in);
    } else status = llmpar__cuda_shared_pass(shared, call->peer, call->tag, NULL, &in);
    if (status) {
        llmpar__cuda_shared_close(shared);
        return status;
    }
    int same = in.fingerprint == out.fingerprint;
    if (!sends) {
        cudaEvent_t *taken = &group->taken[comm->rank * comm->ranks + call->peer];
        llmpar__cuda_ends ends;
        int closed = 0;
        memset(&ends, 0, sizeof ends);
        ends.in[0] = in.send;
        ends.out[0] = call->recv;
        pthread_mutex_lock(&group->lock);
        closed = group->closed;
        if (same && !closed) {
            if (!*taken) status = llmpar__cuda_check(comm->device, cudaEventCreateWithFlags(taken, cudaEventDisableTiming), name);
            if (!status) status = llmpar__cuda_check(comm->device, cudaStreamWaitEvent(handle, in.event, 0), name);
            if (!status) {
                llmpar__cuda_shared_copy(comm->device, stream, ends, 1, (int64_t)(call->count * call->blocks * llmpar_dtype_size(call->dtype)), 1, 0, 0);
                status = llmpar__cuda_check(comm->device, cudaGetLastError(), name);
                llmpar_status recorded = llmpar__cuda_check(comm->device, cudaEventRecord(*taken, handle), name);
                if (!status) status = recorded;
            }
            out.event = *taken;
        }
        pthread_mutex_unlock(&group->lock);
        if (status) return llmpar__cuda_shared_fail(shared, status);
        if (closed) status = llmpar__cuda_shared_refuse(shared, call->tag);
        else status = llmpar__cuda_shared_pass(shared, call->peer, call->tag, &out, NULL); /* who sent sees what differs, too */
        if (status) {
            llmpar__cuda_shared_close(shared);
            return status;
        }
    }
    if (!same) return llmpar__cuda_shared_mismatch(shared, &out.what, &in.what);
    if (sends) status = llmpar__cuda_check(comm->device, cudaStreamWaitEvent(handle, in.event, 0), name);
    if (!status) status = llmpar__cuda_end(comm->device, stream, name);
    return status ? llmpar__cuda_shared_fail(shared, status) : LLMPAR_OK;
}

static llmpar_status llmpar__cuda_shared_send(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return llmpar__cuda_shared_point(comm, stream, call, LLMPAR_CALL_SEND); }
static llmpar_status llmpar__cuda_shared_recv(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return llmpar__cuda_shared_point(comm, stream, call, LLMPAR_CALL_RECV); }

/* ---- life ---- */

static void llmpar__cuda_shared_abort(llmpar_comm *comm, const llmpar_error *error)
{
    llmpar__cuda_shared *shared = llmpar__cuda_shared_of(comm);
    llmpar_error mine = *error;
    if (mine.rank < 0) mine.rank = shared->world_rank;
    shared->inner->abort(shared->inner, &mine);
}

static void llmpar__cuda_shared_destroy(llmpar_comm *comm)
{
    llmpar__cuda_shared *shared = llmpar__cuda_shared_of(comm);
    llmpar_heap *heap = shared->heap;
    if (shared->group) llmpar__cuda_shared_release(shared->group);
    llmpar_comm_destroy(shared->inner);
    llmpar_heap_free(heap, shared);
}

static llmpar_status llmpar__cuda_shared_split(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out);

/* What the ranks tell each other first. */
struct llmpar__cuda_shared_hello {
    uint64_t process, local;   /* told apart by number and by where its code lies */
    llmpar__cuda_shared_group *group; /* of rank 0 */
    int32_t index, world_rank; /* of the driver; of the job */
};

/* Lets the rank's GPU read and write the memory of the others'. */
static llmpar_status llmpar__cuda_shared_reach(llmpar_device *device, llmpar_error *error, const char *axis, const llmpar__cuda_shared_hello *hello, int32_t ranks, int32_t rank)
{
    int mine = hello[rank].index, can = 0;
    for (int32_t i = 0; i < ranks; i++) {
        if (hello[i].index == mine) continue;
        llmpar_status status = llmpar__cuda_check(device, cudaDeviceCanAccessPeer(&can, mine, hello[i].index), "cudaDeviceCanAccessPeer");
        if (status) return status;
        if (!can)
            return llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "communicator %s: GPU %d of rank %d cannot reach the memory of GPU %d of rank %d: rank threads need one GPU or such that reach each other; processes use NCCL", axis, mine,
                                    (int)hello[rank].world_rank, (int)hello[i].index, (int)hello[i].world_rank);
        cudaError_t code = cudaDeviceEnablePeerAccess(hello[i].index, 0);
        if (code == cudaErrorPeerAccessAlreadyEnabled) cudaGetLastError();
        else if ((status = llmpar__cuda_check(device, code, "cudaDeviceEnablePeerAccess")) != LLMPAR_OK) return status;
    }
    return LLMPAR_OK;
}

/* This rank's half over the ranks of `inner`, which it owns from here on, also when it fails. */
static llmpar_status llmpar__cuda_shared_half(llmpar_comm *inner, llmpar_device *device, llmpar_heap *heap, llmpar_error *error, int32_t world_rank, llmpar_record *record, const char *axis, llmpar_comm **out)
{
    int32_t n = inner->ranks, r = inner->rank, *world_ranks = (int32_t *)llmpar_heap_alloc(heap, (size_t)n, sizeof *world_ranks);
    llmpar__cuda_shared *shared = (llmpar__cuda_shared *)llmpar_heap_zalloc(heap, 1, sizeof *shared);
    llmpar__cuda_shared_hello mine, *hello = (llmpar__cuda_shared_hello *)llmpar_heap_zalloc(heap, (size_t)n, sizeof *hello);
    llmpar__cuda_shared_group *group = r ? NULL : llmpar__cuda_shared_group_create(n);
    llmpar__cuda_shared_place place;
    llmpar_status status = LLMPAR_OK;
    memset(&mine, 0, sizeof mine);
    memset(&place, 0, sizeof place);
    if (!shared || !hello || !world_ranks || (!r && !group)) status = llmpar_error_set(error, LLMPAR_ERR_MEMORY, "communicator %s: out of memory", axis);
    else if (n > LLMPAR__CUDA_SHARED_MOST) status = llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "communicator %s: %d ranks share GPUs, expected at most %d", axis, (int)n, LLMPAR__CUDA_SHARED_MOST);
    if (!status) status = llmpar__cuda_begin(device, NULL);
    if (!status) status = llmpar__cuda_check(device, cudaEventCreateWithFlags(&place.ready, cudaEventDisableTiming), "cudaEventCreate");
    if (!status) status = llmpar__cuda_check(device, cudaEventCreateWithFlags(&place.done, cudaEventDisableTiming), "cudaEventCreate");
    int met = 0;
    if (!status && n > 1) {
        llmpar_collective call;
        memset(&call, 0, sizeof call);
        mine.process = (uint64_t)getpid();
        mine.local = (uint64_t)(uintptr_t)&llmpar__cuda_shared_half;
        mine.group = group;
        mine.index = llmpar__cuda_of(device)->index;
        mine.world_rank = world_rank;
        call.send = &mine;
        call.recv = hello;
        call.count = sizeof mine;
        call.blocks = 1;
        call.dtype = LLMPAR_U8;
        call.tag = "shared memory of GPUs";
        status = inner->all_gather(inner, NULL, &call);
        met = !status;
        for (int32_t i = 0; i < n && !status; i++)
            if (hello[i].process != hello[0].process || hello[i].local != hello[0].local)
                status = llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "communicator %s: ranks %d and %d are different processes: memory of a GPU is shared between rank threads; processes use NCCL", axis, (int)hello[0].world_rank, (int)hello[i].world_rank);
        if (met && status) met = 0; /* whose group it is gives it back */
        if (!status) {
            group = hello[0].group;
            status = llmpar__cuda_shared_reach(device, error, axis, hello, n, r);
        }
    }
    if (shared) { /* as far as destroy needs it */
        shared->heap = heap;
        shared->inner = inner;
        shared->world_rank = world_rank;
        size_t length = strlen(axis);
        memcpy(shared->axis, axis, length < sizeof shared->axis ? length : sizeof shared->axis - 1);
    }
    if (!status) {
        llmpar_comm *comm = &shared->comm;
        shared->group = group;
        group->place[r].ready = place.ready;
        group->place[r].done = place.done;
        comm->abi = LLMPAR_COMM_ABI;
        comm->size = (uint32_t)sizeof *comm;
        comm->rank = r;
        comm->ranks = n;
        comm->axis = shared->axis;
        comm->device = device;
        comm->error = error;
        comm->state = shared;
        comm->unchecked = inner->unchecked;
        comm->split = llmpar__cuda_shared_split;
        comm->destroy = llmpar__cuda_shared_destroy;
        llmpar_comm_fill(comm, llmpar__cuda_shared_run);
        comm->send = llmpar__cuda_shared_send;
        comm->recv = llmpar__cuda_shared_recv;
        comm->abort = llmpar__cuda_shared_abort;
        inner->unchecked = 1; /* calls are compared here */
        for (int32_t i = 0; i < n; i++) world_ranks[i] = n > 1 ? hello[i].world_rank : world_rank;
        if (record && n > 1 && llmpar_record_attach(record, comm, world_ranks)) status = llmpar_error_set(error, LLMPAR_ERR_MEMORY, "communicator %s: out of memory", axis);
        if (!status) *out = comm;
    }
    if (status) {
        llmpar_error failure;
        if (error->status) failure = *error;
        else {
            llmpar_error_clear(&failure);
            llmpar_error_set(&failure, status, "communicator %s could not be made", axis);
        }
        if (failure.rank < 0) failure.rank = world_rank;
        if (status != LLMPAR_ERR_PEER) inner->abort(inner, &failure);
        if (shared && shared->group) llmpar__cuda_shared_release(group); /* with the events */
        else {
            if (place.ready) cudaEventDestroy(place.ready);
            if (place.done) cudaEventDestroy(place.done);
            if (met) llmpar__cuda_shared_release(group);
            else if (group) {
                group->references = 1;
                llmpar__cuda_shared_release(group);
            }
        }
        llmpar_comm_destroy(inner);
        llmpar_heap_free(heap, shared);
    }
    llmpar_heap_free(heap, hello);
    llmpar_heap_free(heap, world_ranks);
    return status;
}

static llmpar_status llmpar__cuda_shared_split(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out)
{
    llmpar__cuda_shared *shared = llmpar__cuda_shared_of(comm);
    llmpar_comm *inner = NULL;
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.tag = name;
    *out = NULL;
    /* Compared as a call of its own kind, so that the inner split finds all ranks in it. */
    llmpar_status status = llmpar__cuda_shared_run(comm, NULL, &call, (int32_t)LLMPAR_CALL_SPLIT);
    if (status) return status;
    status = shared->inner->split(shared->inner, color, key, name, &inner);
    if (status || !inner) return status;
    inner->unchecked = comm->unchecked;
    return llmpar__cuda_shared_half(inner, comm->device, shared->heap, comm->error, shared->world_rank, comm->record, name, out);
}

LLMPAR_DEF llmpar_status llmpar_cuda_shared_comm_create(llmpar_ctx *ctx, llmpar_device *device, llmpar_comm *host, llmpar_comm **out)
{
    llmpar_comm *inner = NULL;
    *out = NULL;
    if (!host) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "cuda: ranks that share a GPU need the communicator of rank threads (ctx->host_comm), which this launch has not; processes use NCCL");
    llmpar_status status = llmpar_comm_split(host, 0, host->rank, host->axis, &inner);
    if (status) return status;
    return llmpar__cuda_shared_half(inner, device, &ctx->heap, &ctx->error, ctx->rank, host->record, host->axis, out);
}

#undef LLMPAR__CUDA_SHARED_MOST
#undef LLMPAR__CUDA_SHARED_GRAIN
/* ==== src/cuda/graphs.cu ==== */
/* graphs: what is enqueued between region_begin and region_end is noted, and replayed as a CUDA graph where it is what it was before: one launch instead of one a kernel.

     noted bytes of a region:  | head, args, array | head, args, array | ..      head: which operation, how many bytes; array: what the struct points to (segments of a product, inputs of a sum)

   For every key the device keeps the bytes of the last time. The first time the operations are issued as they are; with the same bytes again they are issued under stream capture, and the graph is launched; from then on a
   region with these bytes is one cudaGraphLaunch. So a graph runs only where every argument of every operation is what was captured, and nothing needs to stay where it was for the results to be right: other addresses cost
   speed alone. A key whose bytes keep changing is issued as it is from then on.

   Noted are the operations of forward and backward. Whatever else reaches the stream (copies, events, host calls, collectives, optimizers, somebody who asks for its handle) ends the region early: what was noted is issued
   first, in order, and the rest as it comes. There are places for LLMPAR__CUDA_REGIONS keys; the one longest not used makes room for another. */

#include <stddef.h>

#define LLMPAR__CUDA_REGIONS 2048u
#define LLMPAR__CUDA_REGION_PLACES 8u /* that a key may be at */
#define LLMPAR__CUDA_REGION_CHANGES 3 /* in a row, then a key is issued plainly */

/* Every member is compared, so there is no padding. */
typedef struct llmpar__cuda_note {
    llmpar_status (*issue)(llmpar_device *device, llmpar_stream *stream, const void *args, const void *array);
    uint64_t args, array; /* bytes behind the head, each padded to 16 */
} llmpar__cuda_note;

/* What is kept for a key. */
typedef struct llmpar__cuda_region {
    uint64_t key, turn;          /* turn: of its last use */
    llmpar__cuda_stream *stream; /* NULL: the place is free */
    unsigned char *bytes;        /* as noted the last time; NULL: issued plainly for good */
    size_t used;
    cudaGraphExec_t graph;       /* of these bytes; NULL: not captured yet */
    int32_t changes;             /* of the bytes, in a row */
} llmpar__cuda_region;

struct llmpar__cuda_regions {
    llmpar_stream *begun, *open; /* between begin and end; open: and not ended early */
    uint64_t key, turn;
    unsigned char *bytes;        /* noted so far */
    size_t used, capacity;
    llmpar_cuda_graph_counts counts;
    llmpar__cuda_region table[LLMPAR__CUDA_REGIONS];
};

static size_t llmpar__cuda_padded(size_t bytes) { return (bytes + 15) / 16 * 16; }

/* ---- noting ---- */

static int llmpar__cuda_notes(llmpar_device *device, llmpar_stream *stream)
{
    const llmpar__cuda_regions *regions = llmpar__cuda_of(device)->regions;
    return regions && stream && regions->open == stream;
}

static llmpar_status llmpar__cuda_noting(llmpar_device *device, llmpar_stream *stream, llmpar_status (*issue)(llmpar_device *, llmpar_stream *, const void *, const void *), const void *args, size_t args_bytes,
                                           size_t array_bytes, void **array)
{
    llmpar__cuda_regions *regions = llmpar__cuda_of(device)->regions;
    llmpar_heap *heap = llmpar__cuda_of(device)->heap;
    size_t body = llmpar__cuda_padded(sizeof(llmpar__cuda_note)), more = body + llmpar__cuda_padded(args_bytes) + llmpar__cuda_padded(array_bytes);
    llmpar__cuda_note head;
    llmpar_status status = llmpar__cuda_stuck(device, llmpar__cuda_stream_of(device, stream));
    if (status) return status;
    if (regions->used + more > regions->capacity) {
        size_t capacity = 2 * (regions->used + more) + 4096;
        unsigned char *bytes = (unsigned char *)llmpar_heap_alloc(heap, capacity, 1);
        if (!bytes) return llmpar__cuda_stick(device, stream, llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "device %s: no memory for the operations of a region", device->name));
        if (regions->used) memcpy(bytes, regions->bytes, regions->used);
        llmpar_heap_free(heap, regions->bytes);
        regions->bytes = bytes;
        regions->capacity = capacity;
    }
    unsigned char *at = regions->bytes + regions->used;
    memset(at, 0, more);
    memset(&head, 0, sizeof head);
    head.issue = issue;
    head.args = args_bytes;
    head.array = array_bytes;
    memcpy(at, &head, sizeof head);
    memcpy(at + body, args, args_bytes);
    *array = at + body + llmpar__cuda_padded(args_bytes);
    regions->used += more;
    return LLMPAR_OK;
}

/* Everything noted, on the stream. What fails sticks to it: the calls that noted it have returned. */
static llmpar_status llmpar__cuda_issue_noted(llmpar_device *device, llmpar_stream *stream)
{
    const llmpar__cuda_regions *regions = llmpar__cuda_of(device)->regions;
    llmpar_status status = LLMPAR_OK;
    for (size_t at = 0; at < regions->used && !status;) {
        llmpar__cuda_note head;
        const unsigned char *args = regions->bytes + at + llmpar__cuda_padded(sizeof head);
        memcpy(&head, regions->bytes + at, sizeof head);
        status = head.issue(device, stream, args, args + llmpar__cuda_padded((size_t)head.args));
        at += llmpar__cuda_padded(sizeof head) + llmpar__cuda_padded((size_t)head.args) + llmpar__cuda_padded((size_t)head.array);
    }
    return llmpar__cuda_stick(device, stream, status);
}

/* ---- graphs ---- */

/* The graph may still run. */
static void llmpar__cuda_region_drop(llmpar_device *device, llmpar__cuda_region *region)
{
    llmpar_heap *heap = llmpar__cuda_of(device)->heap;
    if (region->graph) {
        if (cudaStreamSynchronize(region->stream->handle) != cudaSuccess) (void)cudaGetLastError();
        if (cudaGraphExecDestroy(region->graph) != cudaSuccess) (void)cudaGetLastError();
        llmpar__cuda_of(device)->regions->counts.kept--;
    }
    llmpar_heap_free(heap, region->bytes);
    region->graph = NULL;
    region->bytes = NULL;
    region->used = 0;
}

/* The key's place: its own, or one that is free, or the one longest not used. */
static llmpar__cuda_region *llmpar__cuda_region_place(llmpar_device *device, llmpar__cuda_stream *stream, uint64_t key)
{
    llmpar__cuda_regions *regions = llmpar__cuda_of(device)->regions;
    llmpar__cuda_region *oldest = NULL;
    uint64_t hash = (key ^ (uint64_t)(uintptr_t)stream) * 0x9e3779b97f4a7c15u; /* Fibonacci hashing */
    hash ^= hash >> 32;
    for (uint32_t i = 0; i < LLMPAR__CUDA_REGION_PLACES; i++) {
        llmpar__cuda_region *place = &regions->table[(hash + i) % LLMPAR__CUDA_REGIONS];
        if (place->stream == stream && place->key == key) return place;
        if (!oldest || (oldest->stream && (!place->stream || place->turn < oldest->turn))) oldest = place;
    }
    llmpar__cuda_region_drop(device, oldest);
    oldest->key = key;
    oldest->stream = stream;
    oldest->changes = -1; /* the first bytes are no change */
    return oldest;
}

static llmpar_status llmpar__cuda_region_launch(llmpar_device *device, llmpar_stream *stream, llmpar__cuda_region *region)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (status) return status;
    (void)cudaGraphLaunch(region->graph, llmpar__cuda_stream_of(device, stream)->handle);
    return llmpar__cuda_end(device, stream, "cudaGraphLaunch");
}

/* What was issued under a capture that fails has not run, and the stream has failed. Other threads of the process may do as they like meanwhile. */
static llmpar_status llmpar__cuda_region_capture(llmpar_device *device, llmpar_stream *stream, llmpar__cuda_region *region)
{
    cudaStream_t handle = llmpar__cuda_stream_of(device, stream)->handle;
    cudaGraph_t graph = NULL;
    cudaError_t code;
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_check(device, cudaStreamBeginCapture(handle, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    if (status) return llmpar__cuda_stick(device, stream, status);
    status = llmpar__cuda_issue_noted(device, stream);
    code = cudaStreamEndCapture(handle, &graph); /* in any case: it would go on */
    if (!status) status = llmpar__cuda_check(device, code, "cudaStreamEndCapture");
    if (!status) status = llmpar__cuda_check(device, cudaGraphInstantiate(&region->graph, graph, 0), "cudaGraphInstantiate");
    if (graph) (void)cudaGraphDestroy(graph);
    (void)cudaGetLastError();
    if (status) {
        region->graph = NULL;
        return llmpar__cuda_stick(device, stream, status);
    }
    llmpar__cuda_of(device)->regions->counts.kept++;
    return llmpar__cuda_region_launch(device, stream, region);
}

/* ---- the slots ---- */

static llmpar_status llmpar__cuda_region_begin(llmpar_device *device, llmpar_stream *stream, uint64_t key)
{
    llmpar__cuda *cuda = llmpar__cuda_of(device);
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (status) return status;
    if (!stream) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "region_begin: no stream, expected one");
    if (!cuda->regions) {
        cuda->regions = (llmpar__cuda_regions *)llmpar_heap_zalloc(cuda->heap, 1, sizeof *cuda->regions);
        if (!cuda->regions) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "device %s: no memory for regions", device->name);
    }
    if (cuda->regions->begun) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "region_begin: a region is open on stream %s, expected region_end before", llmpar__cuda_stream_of(device, cuda->regions->begun)->name);
    cuda->regions->begun = cuda->regions->open = stream;
    cuda->regions->key = key;
    cuda->regions->used = 0;
    return LLMPAR_OK;
}

/* Ends the region that is open, if one is: something comes that cannot be in it. */
static void llmpar__cuda_region_break(llmpar_device *device)
{
    llmpar__cuda_regions *regions = llmpar__cuda_of(device)->regions;
    llmpar_stream *stream = regions ? regions->open : NULL;
    if (!stream) return;
    regions->open = NULL; /* first: what is issued comes this way again */
    (void)llmpar__cuda_issue_noted(device, stream);
}

/* New bytes for a key: another graph, or after too many of them none. */
static llmpar_status llmpar__cuda_region_changed(llmpar_device *device, llmpar__cuda_region *region)
{
    const llmpar__cuda_regions *regions = llmpar__cuda_of(device)->regions;
    int32_t changes = region->changes + 1;
    llmpar__cuda_region_drop(device, region);
    region->changes = changes;
    if (changes >= LLMPAR__CUDA_REGION_CHANGES) return LLMPAR_OK;
    region->bytes = (unsigned char *)llmpar_heap_alloc(llmpar__cuda_of(device)->heap, regions->used + 1, 1);
    if (!region->bytes) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "device %s: no memory for the operations of a region", device->name);
    memcpy(region->bytes, regions->bytes, regions->used);
    region->used = regions->used;
    return LLMPAR_OK;
}

static llmpar_status llmpar__cuda_region_end(llmpar_device *device, llmpar_stream *stream)
{
    llmpar__cuda_regions *regions = llmpar__cuda_of(device)->regions;
    llmpar__cuda_region *region;
    llmpar_status status;
    if (!regions || !stream || regions->begun != stream) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "region_end: no region is open on this stream, expected region_begin before");
    int whole = regions->open == stream;
    regions->begun = regions->open = NULL;
    status = llmpar__cuda_begin(device, stream);
    if (status || (whole && !regions->used)) return status;
    if (!whole) {
        regions->counts.plain++;
        return LLMPAR_OK;
    }
    region = llmpar__cuda_region_place(device, llmpar__cuda_stream_of(device, stream), regions->key);
    region->turn = ++regions->turn;
    if (region->bytes && region->used == regions->used && !memcmp(region->bytes, regions->bytes, regions->used)) {
        region->changes = 0;
        if (region->graph) {
            regions->counts.replayed++;
            return llmpar__cuda_region_launch(device, stream, region);
        }
        regions->counts.captured++;
        return llmpar__cuda_region_capture(device, stream, region);
    }
    if (region->changes < LLMPAR__CUDA_REGION_CHANGES) status = llmpar__cuda_stick(device, stream, llmpar__cuda_region_changed(device, region));
    regions->counts.plain++;
    return status ? status : llmpar__cuda_issue_noted(device, stream);
}

/* stream NULL: of all streams, and the list itself. They are idle, or are waited for. */
static void llmpar__cuda_regions_forget(llmpar_device *device, llmpar__cuda_stream *stream)
{
    llmpar__cuda *cuda = llmpar__cuda_of(device);
    llmpar__cuda_regions *regions = cuda->regions;
    if (!regions) return;
    if (regions->begun && (!stream || llmpar__cuda_stream_of(device, regions->begun) == stream)) regions->begun = regions->open = NULL;
    for (uint32_t i = 0; i < LLMPAR__CUDA_REGIONS; i++) {
        llmpar__cuda_region *region = &regions->table[i];
        if (!region->stream || (stream && region->stream != stream)) continue;
        llmpar__cuda_region_drop(device, region);
        region->stream = NULL;
    }
    if (stream) return;
    llmpar_heap_free(cuda->heap, regions->bytes);
    llmpar_heap_free(cuda->heap, regions);
    cuda->regions = NULL;
}

LLMPAR_DEF void llmpar_cuda_graphs(llmpar_device *device, llmpar_cuda_graph_counts *out)
{
    const llmpar__cuda_regions *regions = llmpar__cuda_of(device)->regions;
    memset(out, 0, sizeof *out);
    if (regions) *out = regions->counts;
}

/* ---- operations that are noted ---- */

/* Where padding begins in a struct: behind a member of 4 bytes, up to a multiple of 8. What callers leave there is not to be compared. */
#define LLMPAR__CUDA_GAP(type, member) (offsetof(type, member) + sizeof(((type *)0)->member))
static void llmpar__cuda_gaps(void *args, const size_t *gaps, size_t count)
{
    for (size_t i = 0; i < count; i++) memset((unsigned char *)args + gaps[i], 0, (8 - gaps[i] % 8) % 8);
}

/* A struct without pointers to host memory, and its gaps. */
#define LLMPAR__CUDA_NOTED(name, type, ...) \
    static llmpar_status llmpar__cuda_issue_##name(llmpar_device *device, llmpar_stream *stream, const void *args, const void *array) \
    { \
        (void)array; \
        return llmpar__cuda_##name(device, stream, (const type *)args); \
    } \
    static llmpar_status llmpar__cuda_note_##name(llmpar_device *device, llmpar_stream *stream, const type *args) \
    { \
        const size_t gaps[] = { __VA_ARGS__ }; \
        type own; \
        void *array; \
        if (!llmpar__cuda_notes(device, stream)) return llmpar__cuda_##name(device, stream, args); \
        memcpy(&own, args, sizeof own); \
        llmpar__cuda_gaps(&own, gaps, sizeof gaps / sizeof *gaps); \
        return llmpar__cuda_noting(device, stream, llmpar__cuda_issue_##name, &own, sizeof own, 0, &array); \
    }
LLMPAR__CUDA_NOTED(rmsnorm, llmpar_rmsnorm_args, LLMPAR__CUDA_GAP(llmpar_rmsnorm_args, dtype))
LLMPAR__CUDA_NOTED(rmsnorm_backward, llmpar_rmsnorm_backward_args, LLMPAR__CUDA_GAP(llmpar_rmsnorm_backward_args, tokens.canon), LLMPAR__CUDA_GAP(llmpar_rmsnorm_backward_args, dtype))
LLMPAR__CUDA_NOTED(rope, llmpar_rope_args, LLMPAR__CUDA_GAP(llmpar_rope_args, inverse))
LLMPAR__CUDA_NOTED(attention, llmpar_attention_args, LLMPAR__CUDA_GAP(llmpar_attention_args, dtype))
LLMPAR__CUDA_NOTED(attention_backward, llmpar_attention_backward_args, LLMPAR__CUDA_GAP(llmpar_attention_backward_args, forward.dtype), LLMPAR__CUDA_GAP(llmpar_attention_backward_args, dkv_dtype))
LLMPAR__CUDA_NOTED(swiglu, llmpar_swiglu_args, LLMPAR__CUDA_GAP(llmpar_swiglu_args, dtype))
LLMPAR__CUDA_NOTED(swiglu_backward, llmpar_swiglu_backward_args, LLMPAR__CUDA_GAP(llmpar_swiglu_backward_args, dtype))
LLMPAR__CUDA_NOTED(embedding, llmpar_embedding_args, LLMPAR__CUDA_GAP(llmpar_embedding_args, dtype))
LLMPAR__CUDA_NOTED(embedding_backward, llmpar_embedding_backward_args, LLMPAR__CUDA_GAP(llmpar_embedding_backward_args, tokens.canon), LLMPAR__CUDA_GAP(llmpar_embedding_backward_args, dtype))
LLMPAR__CUDA_NOTED(xent_max, llmpar_xent_args, LLMPAR__CUDA_GAP(llmpar_xent_args, canon), LLMPAR__CUDA_GAP(llmpar_xent_args, dtype))
LLMPAR__CUDA_NOTED(xent_sum, llmpar_xent_args, LLMPAR__CUDA_GAP(llmpar_xent_args, canon), LLMPAR__CUDA_GAP(llmpar_xent_args, dtype))
LLMPAR__CUDA_NOTED(xent_loss, llmpar_xent_loss_args, LLMPAR__CUDA_GAP(llmpar_xent_loss_args, dtype))
LLMPAR__CUDA_NOTED(xent_backward, llmpar_xent_backward_args, LLMPAR__CUDA_GAP(llmpar_xent_backward_args, forward.canon), LLMPAR__CUDA_GAP(llmpar_xent_backward_args, forward.dtype), LLMPAR__CUDA_GAP(llmpar_xent_backward_args, scale))
LLMPAR__CUDA_NOTED(add, llmpar_add_args, LLMPAR__CUDA_GAP(llmpar_add_args, dtype))
LLMPAR__CUDA_NOTED(scale, llmpar_scale_args, LLMPAR__CUDA_GAP(llmpar_scale_args, dtype))
LLMPAR__CUDA_NOTED(cast, llmpar_cast_args, LLMPAR__CUDA_GAP(llmpar_cast_args, in_dtype), LLMPAR__CUDA_GAP(llmpar_cast_args, out_dtype))
LLMPAR__CUDA_NOTED(copy_rows, llmpar_copy_rows_args, LLMPAR__CUDA_GAP(llmpar_copy_rows_args, out))
#undef LLMPAR__CUDA_NOTED

/* What a list points to is copied, and the pointer to it left out: it differs from call to call. */
static llmpar_status llmpar__cuda_issue_gemm(llmpar_device *device, llmpar_stream *stream, const void *args, const void *array)
{
    llmpar_gemm_args own = *(const llmpar_gemm_args *)args;
    own.segments = (const llmpar_gemm_segment *)array;
    return llmpar__cuda_gemm(device, stream, &own);
}

static llmpar_status llmpar__cuda_note_gemm(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args)
{
    llmpar_gemm_args own = *args;
    void *array;
    llmpar_status status;
    if (!llmpar__cuda_notes(device, stream) || args->segment_count < 0 || (args->segment_count && !args->segments)) return llmpar__cuda_gemm(device, stream, args); /* a wrong one is refused there */
    own.segments = NULL;
    status = llmpar__cuda_noting(device, stream, llmpar__cuda_issue_gemm, &own, sizeof own, (size_t)args->segment_count * sizeof *args->segments, &array);
    for (int32_t s = 0; s < args->segment_count && !status; s++) { /* member by member: so no padding is compared */
        llmpar_gemm_segment *to = (llmpar_gemm_segment *)array + s;
        const llmpar_gemm_segment *from = &args->segments[s];
        to->a = from->a;
        to->b = from->b;
        to->lda = from->lda;
        to->ldb = from->ldb;
        to->k = from->k;
        to->piece = from->piece;
        to->interleaved = from->interleaved;
        to->begin = from->begin;
    }
    return status;
}

#define LLMPAR__CUDA_NOTED(name) \
    static llmpar_status llmpar__cuda_issue_##name(llmpar_device *device, llmpar_stream *stream, const void *args, const void *array) \
    { \
        llmpar_tree_sum_args own = *(const llmpar_tree_sum_args *)args; \
        own.in = (const void *const *)array; \
        return llmpar__cuda_##name(device, stream, &own); \
    } \
    static llmpar_status llmpar__cuda_note_##name(llmpar_device *device, llmpar_stream *stream, const llmpar_tree_sum_args *args) \
    { \
        const size_t gaps[] = { LLMPAR__CUDA_GAP(llmpar_tree_sum_args, n), LLMPAR__CUDA_GAP(llmpar_tree_sum_args, dtype) }; \
        llmpar_tree_sum_args own = *args; \
        void *array; \
        llmpar_status status; \
        if (!llmpar__cuda_notes(device, stream) || args->n < 0 || (args->n && !args->in)) return llmpar__cuda_##name(device, stream, args); \
        own.in = NULL; \
        llmpar__cuda_gaps(&own, gaps, 2); \
        status = llmpar__cuda_noting(device, stream, llmpar__cuda_issue_##name, &own, sizeof own, (size_t)args->n * sizeof *args->in, &array); \
        if (!status && args->n) memcpy(array, args->in, (size_t)args->n * sizeof *args->in); \
        return status; \
    }
LLMPAR__CUDA_NOTED(tree_sum)
LLMPAR__CUDA_NOTED(max)
#undef LLMPAR__CUDA_NOTED

typedef struct llmpar__cuda_zero_args { void *out; size_t bytes; } llmpar__cuda_zero_args;
static llmpar_status llmpar__cuda_issue_zero(llmpar_device *device, llmpar_stream *stream, const void *args, const void *array)
{
    const llmpar__cuda_zero_args *own = (const llmpar__cuda_zero_args *)args;
    (void)array;
    return llmpar__cuda_zero(device, stream, own->out, own->bytes);
}
static llmpar_status llmpar__cuda_note_zero(llmpar_device *device, llmpar_stream *stream, void *out, size_t bytes)
{
    llmpar__cuda_zero_args own = { out, bytes };
    void *array;
    return llmpar__cuda_notes(device, stream) ? llmpar__cuda_noting(device, stream, llmpar__cuda_issue_zero, &own, sizeof own, 0, &array) : llmpar__cuda_zero(device, stream, out, bytes);
}

/* Over the slots that do it at once. */
static void llmpar__cuda_regions_fill(llmpar_device *d)
{
    d->region_begin = llmpar__cuda_region_begin;
    d->region_end = llmpar__cuda_region_end;
    d->zero = llmpar__cuda_note_zero;
    d->gemm = llmpar__cuda_note_gemm;
    d->rmsnorm = llmpar__cuda_note_rmsnorm;
    d->rmsnorm_backward = llmpar__cuda_note_rmsnorm_backward;
    d->rope = llmpar__cuda_note_rope;
    d->attention = llmpar__cuda_note_attention;
    d->attention_backward = llmpar__cuda_note_attention_backward;
    d->swiglu = llmpar__cuda_note_swiglu;
    d->swiglu_backward = llmpar__cuda_note_swiglu_backward;
    d->embedding = llmpar__cuda_note_embedding;
    d->embedding_backward = llmpar__cuda_note_embedding_backward;
    d->xent_max = llmpar__cuda_note_xent_max;
    d->xent_sum = llmpar__cuda_note_xent_sum;
    d->xent_loss = llmpar__cuda_note_xent_loss;
    d->xent_backward = llmpar__cuda_note_xent_backward;
    d->tree_sum = llmpar__cuda_note_tree_sum;
    d->max = llmpar__cuda_note_max;
    d->add = llmpar__cuda_note_add;
    d->scale = llmpar__cuda_note_scale;
    d->cast = llmpar__cuda_note_cast;
    d->copy_rows = llmpar__cuda_note_copy_rows;
}

#undef LLMPAR__CUDA_GAP
#undef LLMPAR__CUDA_REGIONS
#undef LLMPAR__CUDA_REGION_PLACES
#undef LLMPAR__CUDA_REGION_CHANGES
/* ==== src/cuda/device.cu ==== */
/* device: the CUDA device itself: memory, streams, events, host calls, and the table of operations.

   What is enqueued runs later, and a call tells only whether it was accepted: a failure while it runs comes from a later call, and sticks to the stream that it is seen on. An operation with stream NULL runs on a stream of its own
   and has finished when its call returns. Host calls run on the driver's thread, which must not call CUDA; what a failing one said stays with its stream until the rank's thread sees the failure. */

#if defined(__CUDACC_VER_MAJOR__) && (__CUDACC_VER_MAJOR__ < 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ < 4))
#error "llmpar_cuda.h: needs CUDA 12.4 or later"
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "llmpar_cuda.h: needs -arch=sm_80 or later (cp.async, bf16 products)"
#endif

#define LLMPAR__CUDA_WORKSPACE ((size_t)32 << 20)
#define LLMPAR__CUDA_MAX_ARG sizeof(((llmpar__cuda_call *)0)->arg)

enum { LLMPAR__CUDA_CALL_FREE, LLMPAR__CUDA_CALL_ENQUEUED, LLMPAR__CUDA_CALL_RUNNING };

typedef struct llmpar__cuda_event {
    cudaEvent_t handle;
    llmpar__cuda_stream *stream; /* of the last record; NULL: never recorded */
} llmpar__cuda_event;

/* The device and its state in one allocation of the rank's heap. */
typedef struct llmpar__cuda_device {
    llmpar_device table;
    llmpar__cuda state;
} llmpar__cuda_device;

/* ---- failures ---- */

static llmpar_status llmpar__cuda_check(llmpar_device *device, cudaError_t code, const char *what)
{
    const llmpar__cuda *cuda = llmpar__cuda_of(device);
    if (code == cudaSuccess) return LLMPAR_OK;
    (void)cudaGetLastError(); /* it stays with the thread otherwise, and the next operation would take it for its own */
    return llmpar_error_set(device->error, code == cudaErrorMemoryAllocation ? LLMPAR_ERR_MEMORY : LLMPAR_ERR_INTERNAL, "%s: device %s failed: %s (%s)", what, cuda->name, cudaGetErrorString(code), cudaGetErrorName(code));
}

static llmpar__cuda_stream *llmpar__cuda_stream_of(llmpar_device *device, llmpar_stream *stream)
{
    return stream ? (llmpar__cuda_stream *)(void *)stream : &llmpar__cuda_of(device)->now;
}

/* The failure that sticks to a stream; its text becomes the rank's, unless one is there. */
static llmpar_status llmpar__cuda_stuck(llmpar_device *device, llmpar__cuda_stream *own)
{
    llmpar_status status = __atomic_load_n(&own->status, __ATOMIC_ACQUIRE);
    if (status && device->error && device->error->status == LLMPAR_OK) {
        llmpar_error taken = __atomic_load_n(&own->told, __ATOMIC_ACQUIRE) ? own->error : own->refused;
        if (device->error->where[0]) memcpy(taken.where, device->error->where, sizeof taken.where);
        if (device->error->rank >= 0) taken.rank = device->error->rank;
        *device->error = taken;
    }
    return status;
}

/* A stream NULL keeps no failure. */
static llmpar_status llmpar__cuda_stick(llmpar_device *device, llmpar_stream *stream, llmpar_status status)
{
    llmpar__cuda_stream *own = llmpar__cuda_stream_of(device, stream);
    if (stream && status && !__atomic_load_n(&own->status, __ATOMIC_ACQUIRE)) {
        if (device->error) own->refused = *device->error;
        __atomic_store_n(&own->status, status, __ATOMIC_RELEASE);
    }
    return status;
}

static llmpar_status llmpar__cuda_begin(llmpar_device *device, llmpar_stream *stream)
{
    llmpar_status status;
    if (llmpar__cuda_notes(device, stream)) llmpar__cuda_region_break(device);
    status = stream ? llmpar__cuda_stuck(device, llmpar__cuda_stream_of(device, stream)) : LLMPAR_OK;
    if (!status) (void)cudaGetLastError(); /* of other code on this thread: `end` would take it for the operation's */
    return status ? status : llmpar__cuda_stick(device, stream, llmpar__cuda_check(device, cudaSetDevice(llmpar__cuda_of(device)->index), "cudaSetDevice"));
}

static llmpar_status llmpar__cuda_end(llmpar_device *device, llmpar_stream *stream, const char *what)
{
    llmpar_status status = llmpar__cuda_check(device, cudaGetLastError(), what);
    if (!status && !stream) status = llmpar__cuda_check(device, cudaStreamSynchronize(llmpar__cuda_of(device)->now.handle), what);
    return llmpar__cuda_stick(device, stream, status);
}

static llmpar_status llmpar__cuda_dtype(llmpar_device *device, const char *what, llmpar_dtype dtype, int half)
{
    if (dtype == LLMPAR_F32 || (half && (dtype == LLMPAR_BF16 || dtype == LLMPAR_F16))) return LLMPAR_OK;
    return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "%s: dtype %s on device %s, expected %s", what, llmpar_dtype_name(dtype), device->name, half ? "f32, bf16 or f16" : "f32");
}

static unsigned llmpar__cuda_blocks(const llmpar__cuda *cuda, int64_t count, unsigned threads, unsigned waves)
{
    int64_t blocks = (count + (int64_t)threads - 1) / (int64_t)threads, most = (int64_t)cuda->multiprocessors * (cuda->threads_resident / (int)threads) * (int64_t)waves;
    if (most < 1) most = 1;
    return (unsigned)(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

/* ---- memory ---- */

static llmpar_status llmpar__cuda_memory(llmpar_device *device, cudaError_t code, const char *kind, size_t bytes)
{
    size_t left = 0, total = 0;
    if (code != cudaErrorMemoryAllocation && code != cudaErrorInvalidValue) return llmpar__cuda_check(device, code, kind); /* the latter: more than there are addresses for */
    (void)cudaGetLastError();
    if (cudaMemGetInfo(&left, &total) != cudaSuccess) (void)cudaGetLastError();
    return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "device %s: no %s for %llu bytes (%llu of the device's %llu are free)", device->name, kind, (unsigned long long)bytes, (unsigned long long)left, (unsigned long long)total);
}

static llmpar_status llmpar__cuda_alloc(llmpar_device *device, size_t bytes, void **out)
{
    llmpar_status status = llmpar__cuda_begin(device, NULL);
    *out = NULL;
    return status ? status : llmpar__cuda_memory(device, cudaMalloc(out, bytes ? bytes : 1), "memory", bytes);
}

/* Nothing to be told: what fails here fails in the next call too. */
static void llmpar__cuda_wait_all(llmpar_device *device)
{
    llmpar__cuda_region_break(device);
    for (llmpar__cuda_stream *s = llmpar__cuda_of(device)->streams; s; s = s->next)
        if (s->handle && cudaStreamSynchronize(s->handle) != cudaSuccess) (void)cudaGetLastError();
}

static void llmpar__cuda_free(llmpar_device *device, void *memory, size_t bytes)
{
    (void)bytes;
    if (!memory || cudaSetDevice(llmpar__cuda_of(device)->index) != cudaSuccess) return;
    llmpar__cuda_wait_all(device);
    if (cudaFree(memory) != cudaSuccess) (void)cudaGetLastError();
}

static llmpar_status llmpar__cuda_host_alloc(llmpar_device *device, size_t bytes, void **out)
{
    llmpar_status status = llmpar__cuda_begin(device, NULL);
    *out = NULL;
    return status ? status : llmpar__cuda_memory(device, cudaMallocHost(out, bytes ? bytes : 1), "pinned host memory", bytes);
}

static void llmpar__cuda_host_free(llmpar_device *device, void *memory, size_t bytes)
{
    (void)bytes;
    if (!memory || cudaSetDevice(llmpar__cuda_of(device)->index) != cudaSuccess) return;
    if (cudaFreeHost(memory) != cudaSuccess) (void)cudaGetLastError();
}

static llmpar_status llmpar__cuda_copy(llmpar_device *device, llmpar_stream *stream, void *out, const void *in, size_t bytes)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (status || !bytes) return status;
    (void)cudaMemcpyAsync(out, in, bytes, cudaMemcpyDefault, llmpar__cuda_stream_of(device, stream)->handle);
    return llmpar__cuda_end(device, stream, "copy");
}

static llmpar_status llmpar__cuda_zero(llmpar_device *device, llmpar_stream *stream, void *out, size_t bytes)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (status || !bytes) return status;
    (void)cudaMemsetAsync(out, 0, bytes, llmpar__cuda_stream_of(device, stream)->handle);
    return llmpar__cuda_end(device, stream, "zero");
}

/* ---- streams ---- */

/* The handle, and in FAST mode the memory that products on it may use. What was made before a failure is taken back by close. */
static llmpar_status llmpar__cuda_stream_open(llmpar_device *device, llmpar__cuda_stream *own, const char *name)
{
    const llmpar__cuda *cuda = llmpar__cuda_of(device);
    int least = 0, greatest = 0;
    llmpar_status status = llmpar__cuda_begin(device, NULL);
    own->status = LLMPAR_OK;
    own->told = 0;
    llmpar_error_clear(&own->error);
    llmpar_error_clear(&own->refused);
    snprintf(own->name, sizeof own->name, "%.23s", name ? name : "stream");
    /* Communication goes first: others wait for it. */
    if (!status) status = llmpar__cuda_check(device, cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
    if (!status) status = llmpar__cuda_check(device, cudaStreamCreateWithPriority(&own->handle, cudaStreamNonBlocking, strncmp(own->name, "comm", 4) == 0 ? greatest : least), "cudaStreamCreateWithPriority");
    if (!status && cuda->desc.mode == LLMPAR_CUDA_FAST) status = llmpar__cuda_memory(device, cudaMalloc(&own->library, cuda->desc.library_workspace), "workspace of a stream", cuda->desc.library_workspace);
    return status;
}

static void llmpar__cuda_stream_close(llmpar_device *device, llmpar__cuda_stream *own)
{
    if (!own->handle || cudaSetDevice(llmpar__cuda_of(device)->index) != cudaSuccess) return;
    (void)cudaStreamSynchronize(own->handle);
    llmpar__cuda_regions_forget(device, own); /* their products use its workspace */
    (void)cudaFree(own->library);
    (void)cudaStreamDestroy(own->handle);
    (void)cudaGetLastError();
    own->handle = NULL;
    own->library = NULL;
}

static llmpar_status llmpar__cuda_stream_create(llmpar_device *device, const char *name, llmpar_stream **out)
{
    llmpar__cuda *cuda = llmpar__cuda_of(device);
    llmpar__cuda_stream *own = cuda->streams;
    llmpar_status status;
    *out = NULL;
    while (own && own->handle) own = own->next;
    if (!own) {
        own = (llmpar__cuda_stream *)llmpar_heap_zalloc(cuda->heap, 1, sizeof *own);
        if (!own) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "device %s: no memory for stream %s", device->name, name ? name : "?");
        own->next = cuda->streams;
        cuda->streams = own;
    }
    status = llmpar__cuda_stream_open(device, own, name);
    if (status) llmpar__cuda_stream_close(device, own);
    else *out = (llmpar_stream *)(void *)own;
    return status;
}

static void llmpar__cuda_stream_destroy(llmpar_device *device, llmpar_stream *stream)
{
    if (!stream) return;
    if (llmpar__cuda_notes(device, stream)) llmpar__cuda_region_break(device);
    llmpar__cuda_stream_close(device, llmpar__cuda_stream_of(device, stream));
}

static llmpar_status llmpar__cuda_synchronize(llmpar_device *device, llmpar_stream *stream)
{
    llmpar__cuda_stream *own = llmpar__cuda_stream_of(device, stream);
    llmpar_status status = llmpar__cuda_check(device, cudaSetDevice(llmpar__cuda_of(device)->index), "cudaSetDevice");
    if (llmpar__cuda_notes(device, stream)) llmpar__cuda_region_break(device);
    if (!status) status = llmpar__cuda_check(device, cudaStreamSynchronize(own->handle), "synchronize");
    (void)llmpar__cuda_stick(device, stream, status); /* behind what a host call may have stuck there meanwhile */
    return stream && llmpar__cuda_stuck(device, own) ? llmpar__cuda_stuck(device, own) : status;
}

static void *llmpar__cuda_native_stream(llmpar_device *device, llmpar_stream *stream)
{
    if (llmpar__cuda_notes(device, stream)) llmpar__cuda_region_break(device);
    return (void *)llmpar__cuda_stream_of(device, stream)->handle;
}

/* ---- events ---- */

static llmpar_status llmpar__cuda_event_create(llmpar_device *device, llmpar_event **out)
{
    llmpar__cuda *cuda = llmpar__cuda_of(device);
    llmpar_status status = llmpar__cuda_begin(device, NULL);
    llmpar__cuda_event *event;
    *out = NULL;
    if (status) return status;
    event = (llmpar__cuda_event *)llmpar_heap_zalloc(cuda->heap, 1, sizeof *event);
    if (!event) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "device %s: no memory for an event", device->name);
    status = llmpar__cuda_check(device, cudaEventCreateWithFlags(&event->handle, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    if (status) llmpar_heap_free(cuda->heap, event);
    else *out = (llmpar_event *)(void *)event;
    return status;
}

static void llmpar__cuda_event_destroy(llmpar_device *device, llmpar_event *event)
{
    llmpar__cuda_event *own = (llmpar__cuda_event *)(void *)event;
    if (!own) return;
    if (cudaSetDevice(llmpar__cuda_of(device)->index) != cudaSuccess || cudaEventDestroy(own->handle) != cudaSuccess) (void)cudaGetLastError();
    llmpar_heap_free(llmpar__cuda_of(device)->heap, own);
}

static llmpar_status llmpar__cuda_event_record(llmpar_device *device, llmpar_stream *stream, llmpar_event *event)
{
    llmpar__cuda_event *own = (llmpar__cuda_event *)(void *)event;
    llmpar_status status;
    own->stream = llmpar__cuda_stream_of(device, stream);
    status = llmpar__cuda_begin(device, stream);
    if (status) return status;
    (void)cudaEventRecord(own->handle, own->stream->handle);
    return llmpar__cuda_end(device, stream, "event_record");
}

/* What waits for the work of a failed stream has failed too. */
static llmpar_status llmpar__cuda_event_wait(llmpar_device *device, llmpar_stream *stream, llmpar_event *event)
{
    const llmpar__cuda_event *own = (const llmpar__cuda_event *)(const void *)event;
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (status || !own->stream) return status;
    status = llmpar__cuda_stuck(device, own->stream);
    if (status) return llmpar__cuda_stick(device, stream, status);
    (void)cudaStreamWaitEvent(llmpar__cuda_stream_of(device, stream)->handle, own->handle, 0);
    return llmpar__cuda_end(device, stream, "event_wait");
}

static llmpar_status llmpar__cuda_event_synchronize(llmpar_device *device, llmpar_event *event)
{
    const llmpar__cuda_event *own = (const llmpar__cuda_event *)(const void *)event;
    llmpar_status status = llmpar__cuda_begin(device, NULL);
    if (status || !own->stream) return status;
    status = llmpar__cuda_check(device, cudaEventSynchronize(own->handle), "event_synchronize");
    return own->stream != &llmpar__cuda_of(device)->now && llmpar__cuda_stuck(device, own->stream) ? llmpar__cuda_stuck(device, own->stream) : status;
}

/* ---- host calls ---- */

/* On the driver's thread. Nothing is called behind a failure. */
static void CUDART_CB llmpar__cuda_host_run(void *user)
{
    llmpar__cuda_call *call = (llmpar__cuda_call *)user;
    call->thread = pthread_self();
    __atomic_store_n(&call->state, LLMPAR__CUDA_CALL_RUNNING, __ATOMIC_RELEASE);
    if (!__atomic_load_n(&call->stream->status, __ATOMIC_ACQUIRE)) {
        llmpar_status status = call->fn(call->arg.bytes);
        if (status) {
            (void)llmpar_error_set(&call->stream->error, status, "a host call on stream %s failed: %s", call->stream->name, llmpar_status_string(status)); /* unless it said more */
            __atomic_store_n(&call->stream->told, 1, __ATOMIC_RELEASE);
            __atomic_store_n(&call->stream->status, status, __ATOMIC_RELEASE);
        }
    }
    __atomic_store_n(&call->state, LLMPAR__CUDA_CALL_FREE, __ATOMIC_RELEASE);
}

static llmpar_status llmpar__cuda_host_call(llmpar_device *device, llmpar_stream *stream, llmpar_status (*fn)(void *arg), const void *arg, size_t arg_bytes)
{
    llmpar__cuda *cuda = llmpar__cuda_of(device);
    llmpar__cuda_call *call = cuda->calls;
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (status) return status;
    if (arg_bytes > LLMPAR__CUDA_MAX_ARG) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "host_call: %llu bytes of arguments, expected at most %llu", (unsigned long long)arg_bytes, (unsigned long long)LLMPAR__CUDA_MAX_ARG);
    if (!stream) {
        llmpar__cuda_call now;
        if (arg_bytes) memcpy(now.arg.bytes, arg, arg_bytes);
        return fn(now.arg.bytes);
    }
    while (call && __atomic_load_n(&call->state, __ATOMIC_ACQUIRE) != LLMPAR__CUDA_CALL_FREE) call = call->next;
    if (!call) {
        call = (llmpar__cuda_call *)llmpar_heap_zalloc(cuda->heap, 1, sizeof *call);
        if (!call) return llmpar__cuda_stick(device, stream, llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "device %s: no memory for a host call", device->name));
        call->next = cuda->calls;
        __atomic_store_n(&cuda->calls, call, __ATOMIC_RELEASE); /* thread_error reads the list on any thread */
    }
    call->stream = llmpar__cuda_stream_of(device, stream);
    call->fn = fn;
    if (arg_bytes) memcpy(call->arg.bytes, arg, arg_bytes);
    __atomic_store_n(&call->state, LLMPAR__CUDA_CALL_ENQUEUED, __ATOMIC_RELEASE);
    if (cudaLaunchHostFunc(call->stream->handle, llmpar__cuda_host_run, call) != cudaSuccess) __atomic_store_n(&call->state, LLMPAR__CUDA_CALL_FREE, __ATOMIC_RELEASE);
    return llmpar__cuda_end(device, stream, "host_call");
}

static llmpar_error *llmpar__cuda_thread_error(llmpar_device *device)
{
    for (llmpar__cuda_call *c = __atomic_load_n(&llmpar__cuda_of(device)->calls, __ATOMIC_ACQUIRE); c; c = c->next)
        if (__atomic_load_n(&c->state, __ATOMIC_ACQUIRE) == LLMPAR__CUDA_CALL_RUNNING && pthread_equal(c->thread, pthread_self())) return &c->stream->error;
    return NULL;
}

/* A stream runs beside the host and the other streams anyway: nothing is to be done. */
static llmpar_status llmpar__cuda_stream_thread(llmpar_device *device, llmpar_stream *stream)
{
    (void)device;
    (void)stream;
    return LLMPAR_OK;
}

/* ---- the table ---- */

static void llmpar__cuda_fill(llmpar_device *d)
{
    d->abi = LLMPAR_DEVICE_ABI;
    d->size = (uint32_t)sizeof *d;
    d->alignment = 256;
    d->apart = 1;
    d->alloc = llmpar__cuda_alloc;
    d->free = llmpar__cuda_free;
    d->host_alloc = llmpar__cuda_host_alloc;
    d->host_free = llmpar__cuda_host_free;
    d->copy = llmpar__cuda_copy;
    d->zero = llmpar__cuda_zero;
    d->stream_create = llmpar__cuda_stream_create;
    d->stream_destroy = llmpar__cuda_stream_destroy;
    d->synchronize = llmpar__cuda_synchronize;
    d->native_stream = llmpar__cuda_native_stream;
    d->event_create = llmpar__cuda_event_create;
    d->event_destroy = llmpar__cuda_event_destroy;
    d->event_record = llmpar__cuda_event_record;
    d->event_wait = llmpar__cuda_event_wait;
    d->event_synchronize = llmpar__cuda_event_synchronize;
    d->host_call = llmpar__cuda_host_call;
    d->thread_error = llmpar__cuda_thread_error;
    d->stream_thread = llmpar__cuda_stream_thread;
    d->rmsnorm = llmpar__cuda_rmsnorm;
    d->rmsnorm_backward = llmpar__cuda_rmsnorm_backward;
    d->rope = llmpar__cuda_rope;
    d->swiglu = llmpar__cuda_swiglu;
    d->swiglu_backward = llmpar__cuda_swiglu_backward;
    d->embedding = llmpar__cuda_embedding;
    d->embedding_backward = llmpar__cuda_embedding_backward;
    d->embedding_backward_workspace = llmpar__cuda_embedding_backward_workspace;
    d->xent_max = llmpar__cuda_xent_max;
    d->xent_sum = llmpar__cuda_xent_sum;
    d->xent_backward = llmpar__cuda_xent_backward;
    d->add = llmpar__cuda_add;
    d->scale = llmpar__cuda_scale;
    d->copy_rows = llmpar__cuda_copy_rows;
    d->gemm = llmpar__cuda_gemm;
    d->gemm_workspace = llmpar__cuda_gemm_workspace;
    d->attention = llmpar__cuda_attention;
    d->attention_workspace = llmpar__cuda_attention_workspace;
    d->attention_backward = llmpar__cuda_attention_backward;
    d->attention_backward_workspace = llmpar__cuda_attention_backward_workspace;
    d->cast = llmpar__cuda_cast;
    d->tree_sum = llmpar__cuda_tree_sum;
    d->max = llmpar__cuda_max;
    d->xent_loss = llmpar__cuda_xent_loss;
    d->adamw = llmpar__cuda_adamw;
    d->sgd = llmpar__cuda_sgd;
    d->largest = llmpar__cuda_largest;
    d->square_sum = llmpar__cuda_square_sum;
    d->factor_sum = llmpar__cuda_factor_sum;
    d->factor_moment = llmpar__cuda_factor_moment;
    d->adalomo_square = llmpar__cuda_adalomo_square;
    d->adalomo = llmpar__cuda_adalomo;
    if (llmpar__cuda_of(d)->desc.mode == LLMPAR_CUDA_FAST) llmpar__cuda_regions_fill(d);
}

LLMPAR_DEF int32_t llmpar_cuda_count(llmpar_error *error)
{
    int count = 0;
    cudaError_t code = cudaGetDeviceCount(&count);
    if (code == cudaSuccess && count > 0) return (int32_t)count;
    if (code != cudaSuccess) (void)cudaGetLastError();
    (void)llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "cuda: no device: %s (%s)", code == cudaSuccess ? "the driver shows none" : cudaGetErrorString(code), cudaGetErrorName(code));
    return 0;
}

static llmpar_status llmpar__cuda_resolve(llmpar_ctx *ctx, const llmpar_cuda_desc *desc, llmpar_cuda_desc *out)
{
    memset(out, 0, sizeof *out);
    if (desc) *out = *desc;
    if (out->mode == LLMPAR_CUDA_DEFAULT) out->mode = LLMPAR_CUDA_EXACT;
    if (out->mode != LLMPAR_CUDA_EXACT && out->mode != LLMPAR_CUDA_FAST) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "cuda: mode %d, expected LLMPAR_CUDA_EXACT or LLMPAR_CUDA_FAST", (int)out->mode);
    if (out->tf32 && out->mode != LLMPAR_CUDA_FAST) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "cuda: tf32 with mode exact, expected mode fast");
    if (out->cudnn && out->mode != LLMPAR_CUDA_FAST) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "cuda: cudnn with mode exact, expected mode fast");
#ifndef LLMPAR_USE_CUDNN
    if (out->cudnn) return llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "cuda: cudnn in a program built without LLMPAR_USE_CUDNN");
#endif
    if (!out->library_workspace) out->library_workspace = LLMPAR__CUDA_WORKSPACE;
    return LLMPAR_OK;
}

/* What the device is, and whether this program runs there. */
static llmpar_status llmpar__cuda_examine(llmpar_ctx *ctx, llmpar__cuda *cuda)
{
    cudaDeviceProp properties;
    cudaFuncAttributes probe;
    cudaError_t code = cudaSetDevice(cuda->index);
    if (code == cudaSuccess) code = cudaGetDeviceProperties(&properties, cuda->index);
    if (code == cudaSuccess) code = cudaDeviceGetPCIBusId(cuda->place, (int)sizeof cuda->place, cuda->index);
    if (code != cudaSuccess) {
        (void)cudaGetLastError();
        return llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "cuda: device %d cannot be used: %s (%s)", cuda->index, cudaGetErrorString(code), cudaGetErrorName(code));
    }
    cuda->capability = properties.major * 10 + properties.minor;
    cuda->multiprocessors = properties.multiProcessorCount;
    cuda->threads_resident = properties.maxThreadsPerMultiProcessor;
    cuda->shared_limit = properties.sharedMemPerBlockOptin;
    snprintf(cuda->name, sizeof cuda->name, "cuda sm_%d %s%s %.70s", cuda->capability, cuda->desc.mode == LLMPAR_CUDA_FAST ? cuda->desc.tf32 ? "fast tf32" : "fast" : "exact", cuda->desc.cudnn ? " cudnn" : "", properties.name);
    if (cuda->capability < 80) return llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "cuda: device %d (%s) has compute capability %d.%d, expected 8.0 or later", cuda->index, properties.name, properties.major, properties.minor);
    code = cudaFuncGetAttributes(&probe, llmpar__cuda_probe);
    if (code == cudaSuccess) return LLMPAR_OK;
    (void)cudaGetLastError();
    return llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "cuda: this program holds no code for device %d (%s, sm_%d): %s (%s); compile it with -gencode arch=compute_%d,code=sm_%d", cuda->index, properties.name, cuda->capability,
                       cudaGetErrorString(code), cudaGetErrorName(code), cuda->capability, cuda->capability);
}

LLMPAR_DEF llmpar_status llmpar_cuda_create(llmpar_ctx *ctx, const llmpar_cuda_desc *desc, llmpar_device **out)
{
    llmpar_cuda_desc resolved;
    llmpar_error reason;
    llmpar_status status = llmpar__cuda_resolve(ctx, desc, &resolved);
    llmpar__cuda_device *device;
    int32_t count;
    *out = NULL;
    if (status) return status;
    llmpar_error_clear(&reason);
    count = llmpar_cuda_count(&reason);
    if (count < 1) return llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "%s", reason.text);
    device = (llmpar__cuda_device *)llmpar_heap_zalloc(&ctx->heap, 1, sizeof *device);
    if (!device) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "cuda: no memory for the device");
    device->state.heap = &ctx->heap;
    device->state.desc = resolved;
    device->state.index = (int)(ctx->local_rank % count);
    device->table.state = &device->state;
    device->table.error = &ctx->error;
    device->table.name = device->state.name;
    device->table.place = device->state.place;
    llmpar__cuda_fill(&device->table);
    status = llmpar__cuda_examine(ctx, &device->state);
    if (!status) status = llmpar__cuda_stream_open(&device->table, &device->state.now, "now");
    if (!status && resolved.mode == LLMPAR_CUDA_FAST) status = llmpar__cuda_library_create(&device->table);
#ifdef LLMPAR_USE_CUDNN
    if (!status && resolved.cudnn) status = llmpar__cuda_cudnn_create(&device->table);
#endif
    if (status) {
        llmpar_cuda_destroy(&device->table);
        return status;
    }
    *out = &device->table;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_cuda_destroy(llmpar_device *device)
{
    llmpar__cuda *cuda = device ? llmpar__cuda_of(device) : NULL;
    if (!device) return;
    llmpar__cuda_regions_forget(device, NULL);
    while (cuda->streams) {
        llmpar__cuda_stream *s = cuda->streams;
        llmpar__cuda_stream_close(device, s);
        cuda->streams = s->next;
        llmpar_heap_free(cuda->heap, s);
    }
    llmpar__cuda_stream_close(device, &cuda->now);
#ifdef LLMPAR_USE_CUDNN
    llmpar__cuda_cudnn_destroy(device);
#endif
    llmpar__cuda_library_destroy(device);
    while (cuda->calls) {
        llmpar__cuda_call *c = cuda->calls;
        cuda->calls = c->next;
        llmpar_heap_free(cuda->heap, c);
    }
    llmpar_heap_free(cuda->heap, device);
}

static llmpar_status llmpar__cuda_backend_device(const void *user, llmpar_ctx *ctx, llmpar_device **out) { return llmpar_cuda_create(ctx, (const llmpar_cuda_desc *)user, out); }
static void llmpar__cuda_backend_destroy(const void *user, llmpar_device *device)
{
    (void)user;
    llmpar_cuda_destroy(device);
}

static llmpar_status llmpar__cuda_backend_comm(const void *user, llmpar_ctx *ctx, llmpar_device *device, llmpar_comm **out)
{
    (void)user;
    return llmpar_cuda_shared_comm_create(ctx, device, ctx->host_comm, out);
}

LLMPAR_DEF void llmpar_cuda_backend(const llmpar_cuda_desc *desc, llmpar_backend *out)
{
    memset(out, 0, sizeof *out);
    out->abi = LLMPAR_BACKEND_ABI;
    out->size = (uint32_t)sizeof *out;
    out->name = "cuda";
    out->device_user = desc;
    out->device_create = llmpar__cuda_backend_device;
    out->device_destroy = llmpar__cuda_backend_destroy;
    out->comm_create = llmpar__cuda_backend_comm;
}

#undef LLMPAR__CUDA_WORKSPACE
#undef LLMPAR__CUDA_MAX_ARG

#endif
#endif
#endif /* LLMPAR_CUDA_IMPLEMENTATION */
#endif /* LLMPAR__TEMPLATE */
