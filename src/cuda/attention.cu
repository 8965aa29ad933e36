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
#include "cuda/attention_internal.h"
#include "cuda/launch.h"

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
