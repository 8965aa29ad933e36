/* norm: RMSNorm (Zhang & Sennrich 2019), forward and backward.

   A row's sum over D has the shape of rows_internal.h. The weight's gradient is, for each leaf and T-piece and column, one chain over tokens (docs/exact.md), and there is no scratch to put chains in. So a block takes
   a leaf and some columns, all pieces side by side, and keeps the chains in registers and their tree in shared memory:

        warps of a block, 8 pieces            1 piece (sequence parallel)
        piece 0 | 128 bytes of columns |      piece 0 | 128 bytes | 128 bytes | .. 8 times |
        piece 1 | 128 bytes            |
        ..            tokens of all pieces advance together, 8 at a time, and come through a ring of stages in shared memory, copied while earlier ones are summed

   dx needs whole rows. Read for themselves, dy and x would come from memory twice. So the blocks of a leaf share out the rows that their chains have just passed, and compute dx for them in between: they all pass them at about the
   same time, so the second reading comes from the L2 cache. Nothing but speed depends on that. Where dx takes the place of dy, or where there are too few chains to keep the device busy, dx has a launch of its own behind the chains. */
#include "cuda/rows_internal.h"

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
