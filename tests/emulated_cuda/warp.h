/* warp: what a kernel says to its machine, on the CPU. Each CUDA thread is a fiber (emulated_cuda.cc); it runs until it has to wait for others: at a barrier, or in an operation of its warp, which the lane that comes
   last does for all. Which fiber goes on is random, so a kernel that relies on an order that nothing guarantees gives wrong numbers here, soon. */
#ifndef EMULATED_CUDA_WARP_H
#define EMULATED_CUDA_WARP_H

#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

/* The running fiber. */
struct emulated_cuda_thread {
    dim3 thread, block, block_dim, grid_dim;
    unsigned char *shared; /* the block's */
    unsigned char *stack, *stack_end;
};
extern __thread const emulated_cuda_thread *emulated_cuda_now;
#define threadIdx (emulated_cuda_now->thread)
#define blockIdx (emulated_cuda_now->block)
#define blockDim (emulated_cuda_now->block_dim)
#define gridDim (emulated_cuda_now->grid_dim)
#define warpSize 32
#define LLMPAR__CUDA_SHARED(type, name) type *name = (type *)(void *)emulated_cuda_now->shared

/* All lanes of `mask` meet; the last calls run(lanes, mask), where lanes[i] is what lane i passed, and NULL where lane i is not in it. */
typedef void (*emulated_cuda_warp_run)(void **lanes, unsigned mask);
void emulated_cuda_warp(const char *name, emulated_cuda_warp_run run, unsigned mask, void *lane);
void emulated_cuda_barrier();
[[noreturn]] void emulated_cuda_wrong(const char *format, ...) __attribute__((format(printf, 1, 2))); /* says which thread of which kernel, and ends the program */
void emulated_cuda_copy(void *shared, const void *global, int bytes, int size);
void emulated_cuda_copy_commit();
void emulated_cuda_copy_wait(int groups);
/* 16-byte rows of shared memory that lanes of ldmatrix name: checked. */
void emulated_cuda_matrix_check(const char *name, const void *row);

/* Who counts accesses to memory (memory.cc) is told when a kernel begins and ends, when threads [first, first + count) of a block stand at one place, and what is done for them. NULL: nobody does. */
struct emulated_cuda_watch {
    void (*begin)(size_t threads, const void *shared, size_t shared_bytes);
    void (*met)(unsigned first, unsigned count);
    void (*end)(const void *kernel);
    void (*copied)(const void *pc, const void *shared, const void *global, int bytes, int size);
    void (*matrix)(const void *pc, const void *row);
};
extern const emulated_cuda_watch *emulated_cuda_watching;
/* Is the address in memory that cudaMalloc, cudaMallocHost or cudaHostRegister knows? The range that it is in, of the memory or between two. */
bool emulated_cuda_range(const void *at, uintptr_t *begin, uintptr_t *end);

/* EMULATED_CUDA_SKIP=norm.cu:175 leaves out the barrier or wait on that line: a fault that tests have to see (plant.sh). */
extern int emulated_cuda_skip_line; /* 0: none */
bool emulated_cuda_skip_file(const char *file);
static inline bool emulated_cuda_skips(const char *file, int line) { return line == emulated_cuda_skip_line && emulated_cuda_skip_file(file); }

static inline void __syncthreads(const char *file = __builtin_FILE(), int line = __builtin_LINE())
{
    if (!emulated_cuda_skips(file, line)) emulated_cuda_barrier();
}
static inline void emulated_cuda_nothing(void **, unsigned) {}
static inline void __syncwarp(unsigned mask = 0xffffffffu, const char *file = __builtin_FILE(), int line = __builtin_LINE())
{
    int none = 0;
    if (!emulated_cuda_skips(file, line)) emulated_cuda_warp("__syncwarp", emulated_cuda_nothing, mask, &none);
}
static inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

/* ---- shuffles and votes ---- */

enum emulated_cuda_shuffle_kind { EMULATED_CUDA_IDX, EMULATED_CUDA_UP, EMULATED_CUDA_DOWN, EMULATED_CUDA_XOR };
template <typename T> struct emulated_cuda_shuffle { T value, out; int kind, by, width; };
template <typename T> static void emulated_cuda_shuffle_run(void **lanes, unsigned mask)
{
    for (int i = 0; i < 32; i++) {
        if (!lanes[i]) continue;
        emulated_cuda_shuffle<T> *own = (emulated_cuda_shuffle<T> *)lanes[i];
        int begin = i / own->width * own->width, end = begin + own->width, from = i;
        switch (own->kind) {
        case EMULATED_CUDA_IDX: from = begin + (own->by & (own->width - 1)); break;
        case EMULATED_CUDA_UP: from = i - own->by; if (from < begin) from = i; break;
        case EMULATED_CUDA_DOWN: from = i + own->by; if (from >= end) from = i; break;
        default: from = i ^ own->by; if (from >= end) from = i; break;
        }
        if (from < 0 || from > 31 || !(mask >> from & 1u)) emulated_cuda_wrong("a shuffle: lane %d reads lane %d, which does not take part", i, from);
        const emulated_cuda_shuffle<T> *other = (const emulated_cuda_shuffle<T> *)lanes[from];
        if (other->kind != own->kind || other->width != own->width) emulated_cuda_wrong("a shuffle: lanes %d and %d are in different kinds of it", i, from);
        own->out = other->value;
    }
}
template <typename T> static inline T emulated_cuda_shuffle_sync(const char *name, unsigned mask, T value, int kind, int by, int width)
{
    emulated_cuda_shuffle<T> own = {value, value, kind, by, width};
    if (width < 1 || width > 32 || (width & (width - 1))) emulated_cuda_wrong("%s: width %d", name, width);
    emulated_cuda_warp(name, emulated_cuda_shuffle_run<T>, mask, &own);
    return own.out;
}
#define EMULATED_CUDA_SHUFFLE(T) \
    static inline T __shfl_sync(unsigned mask, T x, int from, int width = 32) { return emulated_cuda_shuffle_sync<T>("__shfl_sync", mask, x, EMULATED_CUDA_IDX, from, width); } \
    static inline T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32) { return emulated_cuda_shuffle_sync<T>("__shfl_up_sync", mask, x, EMULATED_CUDA_UP, (int)by, width); } \
    static inline T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32) { return emulated_cuda_shuffle_sync<T>("__shfl_down_sync", mask, x, EMULATED_CUDA_DOWN, (int)by, width); } \
    static inline T __shfl_xor_sync(unsigned mask, T x, int by, int width = 32) { return emulated_cuda_shuffle_sync<T>("__shfl_xor_sync", mask, x, EMULATED_CUDA_XOR, by, width); }
EMULATED_CUDA_SHUFFLE(int)
EMULATED_CUDA_SHUFFLE(unsigned)
EMULATED_CUDA_SHUFFLE(long)
EMULATED_CUDA_SHUFFLE(unsigned long)
EMULATED_CUDA_SHUFFLE(long long)
EMULATED_CUDA_SHUFFLE(unsigned long long)
EMULATED_CUDA_SHUFFLE(float)
EMULATED_CUDA_SHUFFLE(double)
#undef EMULATED_CUDA_SHUFFLE

struct emulated_cuda_vote { int yes; unsigned out; };
static inline void emulated_cuda_vote_run(void **lanes, unsigned)
{
    unsigned all = 0;
    for (int i = 0; i < 32; i++) if (lanes[i] && ((emulated_cuda_vote *)lanes[i])->yes) all |= 1u << i;
    for (int i = 0; i < 32; i++) if (lanes[i]) ((emulated_cuda_vote *)lanes[i])->out = all;
}
static inline unsigned __ballot_sync(unsigned mask, int yes)
{
    emulated_cuda_vote own = {yes, 0};
    emulated_cuda_warp("__ballot_sync", emulated_cuda_vote_run, mask, &own);
    return own.out;
}
static inline int __any_sync(unsigned mask, int yes) { return __ballot_sync(mask, yes) != 0; }
static inline int __all_sync(unsigned mask, int yes) { return __ballot_sync(mask, !yes) == 0; }

/* ---- atomics: of integers alone, since sums of floats would depend on their order ---- */

#define EMULATED_CUDA_ATOMIC(T) \
    static inline T atomicAdd(T *at, T x) { return __atomic_fetch_add(at, x, __ATOMIC_RELAXED); } \
    static inline T atomicExch(T *at, T x) { return __atomic_exchange_n(at, x, __ATOMIC_RELAXED); } \
    static inline T atomicCAS(T *at, T is, T x) { __atomic_compare_exchange_n(at, &is, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED); return is; } \
    static inline T atomicMax(T *at, T x) { T old = __atomic_load_n(at, __ATOMIC_RELAXED); while (old < x && !__atomic_compare_exchange_n(at, &old, x, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {} return old; } \
    static inline T atomicMin(T *at, T x) { T old = __atomic_load_n(at, __ATOMIC_RELAXED); while (x < old && !__atomic_compare_exchange_n(at, &old, x, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {} return old; } \
    static inline T atomicOr(T *at, T x) { return __atomic_fetch_or(at, x, __ATOMIC_RELAXED); } \
    static inline T atomicAnd(T *at, T x) { return __atomic_fetch_and(at, x, __ATOMIC_RELAXED); }
EMULATED_CUDA_ATOMIC(int)
EMULATED_CUDA_ATOMIC(unsigned)
EMULATED_CUDA_ATOMIC(unsigned long long)
#undef EMULATED_CUDA_ATOMIC
static inline long long atomicMax(long long *at, long long x) { long long old = __atomic_load_n(at, __ATOMIC_RELAXED); while (old < x && !__atomic_compare_exchange_n(at, &old, x, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {} return old; }
static inline long long atomicMin(long long *at, long long x) { long long old = __atomic_load_n(at, __ATOMIC_RELAXED); while (x < old && !__atomic_compare_exchange_n(at, &old, x, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {} return old; }

/* ---- arithmetic ---- */

template <typename T> static inline T __ldg(const T *at) { return *at; }
template <typename T> static inline T __ldcs(const T *at) { return *at; }
template <typename T> static inline T __ldcg(const T *at) { return *at; }
template <typename T> static inline void __stcs(T *at, T x) { *at = x; }

static inline float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }
static inline unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
static inline float __int_as_float(int u) { float x; memcpy(&x, &u, 4); return x; }
static inline int __float_as_int(float x) { int u; memcpy(&u, &x, 4); return u; }
static inline double __longlong_as_double(long long u) { double x; memcpy(&x, &u, 8); return x; }
static inline long long __double_as_longlong(double x) { long long u; memcpy(&u, &x, 8); return u; }

/* Compiled with -ffp-contract=off: each of these rounds once. */
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline float __frcp_rn(float a) { return 1.0f / a; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dsub_rn(double a, double b) { return a - b; }
static inline double __ddiv_rn(double a, double b) { return a / b; }
static inline double __dsqrt_rn(double a) { return sqrt(a); }
static inline double __drcp_rn(double a) { return 1.0 / a; }
static inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
static inline float __double2float_rn(double x) { return (float)x; }
static inline double __ll2double_rn(long long x) { return (double)x; }
static inline double __ull2double_rn(unsigned long long x) { return (double)x; }
static inline float __int2float_rn(int x) { return (float)x; }
static inline float __uint2float_rn(unsigned x) { return (float)x; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline double rsqrt(double x) { return 1.0 / sqrt(x); }

static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned long long)((unsigned __int128)a * b >> 64); }

#define EMULATED_CUDA_MIN_MAX(T) \
    static inline T min(T a, T b) { return b < a ? b : a; } \
    static inline T max(T a, T b) { return a < b ? b : a; }
EMULATED_CUDA_MIN_MAX(int)
EMULATED_CUDA_MIN_MAX(unsigned)
EMULATED_CUDA_MIN_MAX(long)
EMULATED_CUDA_MIN_MAX(unsigned long)
EMULATED_CUDA_MIN_MAX(long long)
EMULATED_CUDA_MIN_MAX(unsigned long long)
#undef EMULATED_CUDA_MIN_MAX
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }

/* ---- the functions of intrinsics.h ---- */

static inline int llmpar__cu_again(int x) { return x; }

struct emulated_cuda_mma { float *d; const uint32_t *a, *b; };
void emulated_cuda_mma_bf16_run(void **lanes, unsigned mask);
void emulated_cuda_mma_f16_run(void **lanes, unsigned mask);
static inline void llmpar__cu_mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) { emulated_cuda_mma own = {d, a, b}; emulated_cuda_warp("mma_bf16", emulated_cuda_mma_bf16_run, 0xffffffffu, &own); }
static inline void llmpar__cu_mma_f16(float d[4], const uint32_t a[4], const uint32_t b[2]) { emulated_cuda_mma own = {d, a, b}; emulated_cuda_warp("mma_f16", emulated_cuda_mma_f16_run, 0xffffffffu, &own); }

struct emulated_cuda_ldmatrix { uint32_t *out; const void *row; };
void emulated_cuda_ldmatrix_run(void **lanes, unsigned mask);
void emulated_cuda_ldmatrix_trans_run(void **lanes, unsigned mask);
static __forceinline__ void llmpar__cu_ldmatrix_x4(uint32_t out[4], const void *row)
{
    emulated_cuda_ldmatrix own = {out, row};
    emulated_cuda_matrix_check("ldmatrix", row);
    emulated_cuda_warp("ldmatrix", emulated_cuda_ldmatrix_run, 0xffffffffu, &own);
}
static __forceinline__ void llmpar__cu_ldmatrix_x4_trans(uint32_t out[4], const void *row)
{
    emulated_cuda_ldmatrix own = {out, row};
    emulated_cuda_matrix_check("ldmatrix.trans", row);
    emulated_cuda_warp("ldmatrix.trans", emulated_cuda_ldmatrix_trans_run, 0xffffffffu, &own);
}

static __forceinline__ void llmpar__cu_copy_async(void *shared, const void *global, int bytes) { emulated_cuda_copy(shared, global, bytes, 16); }
static __forceinline__ void llmpar__cu_copy_async_4(void *shared, const void *global, int bytes) { emulated_cuda_copy(shared, global, bytes, 4); }
static inline void llmpar__cu_copy_async_commit() { emulated_cuda_copy_commit(); }
template <int Groups> static inline void llmpar__cu_copy_async_wait(const char *file = __builtin_FILE(), int line = __builtin_LINE())
{
    if (!emulated_cuda_skips(file, line)) emulated_cuda_copy_wait(Groups);
}

struct __attribute__((aligned(16))) emulated_cuda_16 { uint32_t word[4]; };
struct __attribute__((aligned(8))) emulated_cuda_8 { uint32_t word[2]; };
static __forceinline__ void llmpar__cu_store_16(void *out, const uint32_t word[4])
{
    emulated_cuda_16 all = {{word[0], word[1], word[2], word[3]}};
    *(emulated_cuda_16 *)out = all;
}
static __forceinline__ void llmpar__cu_store_8(void *out, uint32_t low, uint32_t high)
{
    emulated_cuda_8 all = {{low, high}};
    *(emulated_cuda_8 *)out = all;
}

static inline unsigned llmpar__cu_block() { return blockIdx.x; }

float emulated_cuda_f16_to_f32(uint16_t bits);
uint16_t emulated_cuda_f32_to_f16(float x);
static inline float llmpar__cu_f16_to_f32(uint16_t bits) { return emulated_cuda_f16_to_f32(bits); }
static inline uint16_t llmpar__cu_f32_to_f16(float x) { return emulated_cuda_f32_to_f16(x); }
static inline uint32_t emulated_cuda_bf16(float x)
{
    uint32_t u = __float_as_uint(x);
    return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
}
static inline uint32_t emulated_cuda_f16(float x) { return (__float_as_uint(x) & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : emulated_cuda_f32_to_f16(x); }
static inline uint32_t llmpar__cu_pack_bf16(float low, float high) { return emulated_cuda_bf16(low) | emulated_cuda_bf16(high) << 16; }
static inline uint32_t llmpar__cu_pack_f16(float low, float high) { return emulated_cuda_f16(low) | emulated_cuda_f16(high) << 16; }
/* Subnormals to zero on both sides. */
static inline float llmpar__cu_exp2(float x)
{
    float y = exp2f(fabsf(x) < 1.17549435e-38f ? 0.0f : x);
    return y < 1.17549435e-38f ? 0.0f : y;
}

#endif
