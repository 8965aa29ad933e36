/* attention_simple: causal attention in plain f32 products, for f32 and for every head_dim that attention.cu has no tiles for; forward and backward. It is also the one to read first.

   A block owns a few rows, four for a warp, in shared memory as f32, and walks the other side 32 rows at a time, which all its warps use. In scores a lane is one of these 32, and sums over head_dim in one chain;
   in the products with the weights a lane is a column, and sums over the 32 in one chain, which goes on with the next 32.
     forward, dq:  rows are (query, head of the group), so that all heads of a group read keys and values once; what is walked are keys, from the document's start.
     dk, dv:       rows are keys, for one head; what is walked are queries, from the diagonal to the document's end.
   Rows of several documents in a block: as in attention.cu. */
#include "cuda/attention_internal.h"
#include "cuda/launch.h"

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
