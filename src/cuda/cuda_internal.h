/* cuda_internal: what the operation files of the CUDA device share: its state, launches, memory types on the device, and one function a slot.

   Kernels are plain CUDA C++ in the subset that tests/emulated_cuda runs on the CPU as well: one fiber a thread, in random order. So
     - a kernel is launched by llmpar__cuda_launch, never by <<< >>>;
     - shared memory is dynamic, asked for at the launch, and reached through LLMPAR__CUDA_SHARED: never a static __shared__ variable;
     - what a warp does together goes through intrinsics.h (matrix products, ldmatrix, cp.async, shuffles);
     - every thread of a warp takes part in a shuffle or a matrix product, all of a block in __syncthreads.
   No sum depends on block size, grid size or timing: the order of docs/exact.md, or integers. Where bits must be the CPU's too, products and sums are written with the
   __fmul_rn family: compilers contract a*b + c otherwise. */
#ifndef LLMPAR_CUDA_INTERNAL_H
#define LLMPAR_CUDA_INTERNAL_H

#include "cuda/cuda.h"
#include "cuda/intrinsics.h"

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

#endif
