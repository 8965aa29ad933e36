/* attention_internal: what the attention files share: the arguments as kernels take them, documents, tiles of 16-bit elements in shared memory as mma.sync reads them, and one step of the running softmax.

   Which kernel: bf16 and f16 with head_dim 64 or 128 go through mma.sync (attention.cu, attention_decode.cu, attention_backward.cu); everything else through plain f32 products (attention_simple.cu). The choice follows from dtype, head_dim and scale, which all cuts of one call have in common.

   Order. Along the keys (or, in dk and dv, the queries) everything goes in steps of 16 or in tiles of 64 that are counted from the document's start. Along the rows that a block owns nothing is
   summed, so those blocks lie anywhere, may hold rows of several documents and go through these one after the other; what a row may not see has weight +0, which leaves its sums as they are. */
#ifndef LLMPAR_CUDA_ATTENTION_INTERNAL_H
#define LLMPAR_CUDA_ATTENTION_INTERNAL_H

#include "cuda/cuda_internal.h"

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

#endif
