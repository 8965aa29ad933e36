/* attention_decode: forward for few rows, as a decode step has them: no more than 16 (heads of a group times queries), with the bits of attention.cu. Keys and values are read once.

     scores:   a block owns 64 keys of one KV head and leaves its 16 rows of scores in the workspace: all keys at once.
     outputs:  a warp owns 16 columns of the output and walks the keys from the document's start: maximum, weights and sums have the order of the contract, columns of the output have nothing in common.

   Row r of the 16 is query r / group, head r % group of the group. A score is the same chain over head_dim wherever it stands in its fragment, and the walk is that of attention.cu. */
#include "cuda/attention_internal.h"
#include "cuda/launch.h"

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
