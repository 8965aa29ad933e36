/* attention_backward: dq, dk, dv of causal attention (Dao 2023, "FlashAttention-2", algorithm 2, cut in two so that no sum is shared between blocks).

     delta[b,h,i] = sum_e dout * out                          one warp a row, or eight rows of 16-bit elements
     P = 2^(scale s - lse), dS = P * (dout v^T - delta)       computed again by whoever needs them, from lse
     dv = P^T dout, dk = scale dS^T q                         a block owns keys of one head and walks the queries below the diagonal
     dq = scale dS k                                          a block owns queries of one head and walks the keys left of the diagonal

   Each gradient is one chain of products over queries or keys in steps of 16 that are counted from the document's start; there are no atomics. dk and dv are of each query head alone, in f32, then added over
   the group in the tree of the contract and rounded once; to hold these, some sequences are taken at a time (a number that follows from their length alone).
   Scores of dk and dv are computed transposed (keys are rows), so that what they leave in registers is the left side of the next products. */
#include "cuda/attention_internal.h"
#include "cuda/attention.cu"
#include "cuda/launch.h"

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
