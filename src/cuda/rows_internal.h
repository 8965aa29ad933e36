/* rows_internal: what the kernels that walk over rows share: 16 bytes of elements at a time, sums over a row in one fixed shape, the balanced tree of docs/exact.md, and the exponential.

   A row that one thread group sums up has the shape that its length and dtype give, and nothing else: `lanes` threads (a power of two, at most LLMPAR__CUDA_ROW_THREADS) take 16 bytes
   of columns each, and again `lanes` x 16 bytes further on; each thread adds in column order; then a tree over the threads, halves folded onto each other.
   Where memory is not aligned, the same elements come one by one: the same bits. */
#ifndef LLMPAR_CUDA_ROWS_INTERNAL_H
#define LLMPAR_CUDA_ROWS_INTERNAL_H

#include "cuda/cuda_internal.h"
#include "cuda/launch.h"

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

#endif
