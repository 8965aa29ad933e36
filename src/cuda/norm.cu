/* norm: RMSNorm (Zhang & Sennrich 2019), forward and backward.

   A row's sum over D has the shape of rows_internal.h. The weight's gradient is, for each leaf and T-piece and column, one chain over tokens (docs/exact.md), and there is no scratch to put chains in. So a block takes
   a leaf and some columns, all pieces side by side, and keeps the chains in registers and their tree in shared memory:

        warps of a block, 8 pieces            1 piece (sequence parallel)
        piece 0 | 64 columns |                piece 0 | 64 columns | 64 columns | .. 8 times |
        piece 1 | 64 columns |
        ..            tokens of all pieces advance together, 16 (f32: 8) at a time, each thread two columns

   dx needs whole rows. Read for themselves, dy and x would come from memory twice. So the blocks of a leaf share out the rows that their chains have just passed, and compute dx for them in between: they all pass them at about the
   same time, so the second reading comes from the L2 cache. Nothing but speed depends on that. Where dx takes the place of dy, or where there are too few chains to keep the device busy, dx has a launch of its own behind the chains. */
#include "cuda/rows_internal.h"

/* Bytes of shared memory in front of the rows that are kept between the two passes over them: two sets of partial sums. */
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
        s = llmpar__cuda_row_sum(s, lanes, partial + turn * LLMPAR__CUDA_ROW_WARPS);
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
    int64_t first, last, share;       /* pieces that have tokens here; sequences a leaf */
    int slots, groups, levels, pair;  /* pieces side by side; blocks a leaf; levels of the tree over rounds of pieces; two columns at a time */
    int lanes, kept, wide, with_dx;   /* rows, for dx */
} llmpar__cuda_norm_cut;

/* dx of one row: with a = dy w and xhat = x rstd it is dresidual + rstd (a - xhat mean(a xhat)). Every thread of the block calls; row < 0: none, for its group. */
template <typename T> static __device__ __forceinline__ void llmpar__cuda_norm_dx_row(const llmpar_rmsnorm_backward_args &a, const llmpar__cuda_norm_cut &cut, int64_t row, float *partial, llmpar__cuda_16 *keep)
{
    const int width = llmpar__cuda_vector<T>::count, threads = LLMPAR__CUDA_ROW_THREADS, lanes = cut.lanes, wide = cut.wide, rows_kept = a.dresidual ? 3 : 2;
    const int64_t dim = a.dim, step = (int64_t)lanes * width, end = row < 0 ? 0 : dim, at = row < 0 ? 0 : row * dim, begin = (int64_t)((int)threadIdx.x % lanes) * width;
    const T *dy = (const T *)a.dy + at, *x = (const T *)a.x + at, *w = (const T *)a.w, *dresidual = (const T *)a.dresidual + at;
    const float rstd = end ? ((const float *)a.rstd)[row] : 0.0f;
    float s = 0, mean;
    llmpar__cuda_16 *mine = keep;
    for (int64_t c = begin; c < end; c += step, mine += rows_kept * threads) {
        float v[width], g[width], f[width];
        llmpar__cuda_16 raw_x = llmpar__cuda_read(x + c, end - c, wide), raw_g = llmpar__cuda_read(dy + c, end - c, wide), raw_w = llmpar__cuda_read(w + c, end - c, wide);
        if (cut.kept) {
            if (a.dresidual) mine[2 * threads] = llmpar__cuda_read(dresidual + c, end - c, wide);
            mine[0] = raw_x;
            mine[threads] = raw_g;
        }
        llmpar__cuda_unpack<T>(v, raw_x);
        llmpar__cuda_unpack<T>(g, raw_g);
        llmpar__cuda_unpack<T>(f, raw_w);
#pragma unroll
        for (int k = 0; k < width; k++) s = __fmaf_rn(__fmul_rn(g[k], f[k]), __fmul_rn(v[k], rstd), s);
    }
    mean = __fdiv_rn(llmpar__cuda_row_sum(s, lanes, partial), (float)dim);
    mine = keep;
    for (int64_t c = begin; c < end; c += step, mine += rows_kept * threads) {
        float v[width], g[width], f[width], r[width];
        llmpar__cuda_16 raw_w = llmpar__cuda_read(w + c, end - c, wide), raw_x, raw_g, raw_r = { { 0, 0, 0, 0 } };
        if (cut.kept) {
            raw_x = mine[0];
            raw_g = mine[threads];
            if (a.dresidual) raw_r = mine[2 * threads];
        } else {
            raw_x = llmpar__cuda_read(x + c, end - c, wide);
            raw_g = llmpar__cuda_read(dy + c, end - c, wide);
            if (a.dresidual) raw_r = llmpar__cuda_read(dresidual + c, end - c, wide);
        }
        llmpar__cuda_unpack<T>(v, raw_x);
        llmpar__cuda_unpack<T>(g, raw_g);
        llmpar__cuda_unpack<T>(f, raw_w);
        llmpar__cuda_unpack<T>(r, raw_r);
#pragma unroll
        for (int k = 0; k < width; k++) {
            float d = __fmaf_rn(__fmul_rn(v[k], rstd), -mean, __fmul_rn(g[k], f[k]));
            r[k] = __fadd_rn(r[k], __fmul_rn(d, rstd));
        }
        llmpar__cuda_write((T *)a.dx + at + c, end - c, wide, llmpar__cuda_pack<T>(r));
    }
}

/* dx alone */
template <typename T> static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS, 4) llmpar__cuda_norm_dx(llmpar_rmsnorm_backward_args a, llmpar__cuda_norm_cut cut)
{
    LLMPAR__CUDA_SHARED(unsigned char, shared);
    const int64_t rows = a.tokens.batch * a.tokens.t;
    const int at_once = LLMPAR__CUDA_ROW_THREADS / cut.lanes;
    float *partial = (float *)(void *)shared;
    llmpar__cuda_16 *keep = (llmpar__cuda_16 *)(void *)(shared + LLMPAR__CUDA_NORM_HEAD) + threadIdx.x;
    int turn = 0;
    for (int64_t first = (int64_t)blockIdx.x * at_once; first < rows; first += (int64_t)gridDim.x * at_once, turn ^= 1) {
        const int64_t row = first + (int)threadIdx.x / cut.lanes;
        llmpar__cuda_norm_dx_row<T>(a, cut, row < rows ? row : -1, partial + turn * LLMPAR__CUDA_ROW_WARPS, keep);
    }
}

/* The tokens of a piece in a leaf, counted from the leaf's first row: token i lies in sequence i / length. */
typedef struct llmpar__cuda_norm_piece { int64_t begin, length; } llmpar__cuda_norm_piece;
static __device__ __forceinline__ int64_t llmpar__cuda_norm_token(const llmpar__cuda_norm_piece &piece, int64_t t, int64_t i)
{
    int64_t sequence = llmpar__cuda_divide(i, piece.length);
    return sequence * t + piece.begin + (i - sequence * piece.length);
}

/* Shared memory: partial sums of rows, the round's pieces, the chains [warp][64], the tree [levels][columns], rows kept. */
enum { LLMPAR__CUDA_NORM_PIECES = 128, LLMPAR__CUDA_NORM_CHAINS = 64 * LLMPAR__CUDA_ROW_WARPS };

template <typename T> static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS, 2) llmpar__cuda_norm_chains(llmpar_rmsnorm_backward_args a, llmpar__cuda_norm_cut cut)
{
    LLMPAR__CUDA_SHARED(unsigned char, shared);
    const int batch = 32 / (int)sizeof(T); /* tokens that are on their way at a time */
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, side = LLMPAR__CUDA_ROW_WARPS / cut.slots, columns = 64 * side, slot = warp / side, group = (int)(blockIdx.x % (unsigned)cut.groups);
    const int64_t dim = a.dim, t = a.tokens.t, leaf = blockIdx.x / (unsigned)cut.groups, row0 = leaf * cut.share * t, column = (int64_t)group * columns + warp % side * 64 + 2 * lane;
    float *partial = (float *)(void *)shared, *chains = (float *)(void *)(shared + LLMPAR__CUDA_NORM_HEAD + LLMPAR__CUDA_NORM_PIECES), *stack = chains + LLMPAR__CUDA_NORM_CHAINS + warp * 64 + 2 * lane;
    llmpar__cuda_norm_piece *pieces = (llmpar__cuda_norm_piece *)(void *)(shared + LLMPAR__CUDA_NORM_HEAD);
    llmpar__cuda_16 *keep = (llmpar__cuda_16 *)(void *)(chains + LLMPAR__CUDA_NORM_CHAINS + cut.levels * columns) + threadIdx.x;
    const T *x = (const T *)a.x + row0 * dim + column, *dy = (const T *)a.dy + row0 * dim + column;
    const float *rstds = (const float *)a.rstd + row0;
    llmpar__cuda_tree tree = { 0, 0 };
    int turn = 0;
    for (int64_t round = cut.first / cut.slots; round <= cut.last / cut.slots; round++) {
        llmpar__cuda_two<T> xs[batch], dys[batch];
        llmpar__cuda_norm_piece piece;
        int64_t longest = 0, tokens, row = 0, left = 0;
        float low = 0, high = 0, rstd = 0;
        if ((int)threadIdx.x < cut.slots) { /* who read the last round's met at its chains */
            int64_t p = round * cut.slots + (int)threadIdx.x, t0, t1;
            t0 = p < a.tokens.canon ? max(llmpar__cuda_piece_begin(p, a.tokens.t_total, a.tokens.canon), a.tokens.t_begin) - a.tokens.t_begin : 0;
            t1 = p < a.tokens.canon ? min(llmpar__cuda_piece_begin(p + 1, a.tokens.t_total, a.tokens.canon), a.tokens.t_begin + t) - a.tokens.t_begin : 0;
            pieces[threadIdx.x].begin = t0;
            pieces[threadIdx.x].length = max(t1 - t0, (int64_t)0);
        }
        __syncthreads();
        for (int k = 0; k < cut.slots; k++) longest = max(longest, pieces[k].length);
        longest *= cut.share;
        piece = pieces[slot];
        tokens = column < dim ? piece.length * cut.share : 0;
        /* Asks for tokens [i, i + batch): lane k for the rstd of the k-th. */
        auto fetch = [&](int64_t i) {
            if (lane < batch && i + lane < piece.length * cut.share) rstd = rstds[llmpar__cuda_norm_token(piece, t, i + lane)];
            if (i < tokens) {
                row = llmpar__cuda_norm_token(piece, t, i);
                left = piece.length - (i - llmpar__cuda_divide(i, piece.length) * piece.length); /* of its sequence */
            }
#pragma unroll
            for (int k = 0; k < batch; k++)
                if (i + k < tokens) {
                    xs[k] = llmpar__cuda_read_two(x + row * dim, dim - column, cut.pair);
                    dys[k] = llmpar__cuda_read_two(dy + row * dim, dim - column, cut.pair);
                    row++;
                    if (--left == 0) {
                        row += t - piece.length;
                        left = piece.length;
                    }
                }
        };
        fetch(0);
        for (int64_t i = 0; i < longest; i += batch) {
#pragma unroll
            for (int k = 0; k < batch; k++) {
                float r = __shfl_sync(0xffffffffu, rstd, k);
                if (i + k < tokens) {
                    low = __fmaf_rn(llmpar__cuda_low<T>(dys[k]), __fmul_rn(llmpar__cuda_low<T>(xs[k]), r), low);
                    high = __fmaf_rn(llmpar__cuda_high<T>(dys[k]), __fmul_rn(llmpar__cuda_high<T>(xs[k]), r), high);
                }
            }
            fetch(i + batch);
            if (cut.with_dx) { /* the leaf's rows that its blocks have just passed, turn by turn */
                const int at_once = LLMPAR__CUDA_ROW_THREADS / cut.lanes, units = (cut.slots * batch + at_once - 1) / at_once;
                for (int unit = group; unit < units; unit += cut.groups, turn ^= 1) {
                    const int at = unit * at_once + (int)threadIdx.x / cut.lanes, k = at / batch;
                    const int64_t token = i + at % batch;
                    int64_t here = -1;
                    if (k < cut.slots && token < pieces[k].length * cut.share) here = row0 + llmpar__cuda_norm_token(pieces[k], t, token);
                    llmpar__cuda_norm_dx_row<T>(a, cut, here, partial + turn * LLMPAR__CUDA_ROW_WARPS, keep);
                }
            }
        }
        /* A fused chain can underflow to -0; as a leaf of the tree it is +0. */
        chains[warp * 64 + 2 * lane] = __fadd_rn(low, 0.0f);
        chains[warp * 64 + 2 * lane + 1] = __fadd_rn(high, 0.0f);
        __syncthreads();
        if (slot == 0)
            for (int k = 0; k < 2; k++) llmpar__cuda_tree_push(&tree, stack + k, columns, round, llmpar__cuda_slot_sum(chains + warp * 64 + 2 * lane + k, cut.slots, columns));
        llmpar__cuda_tree_pushed(&tree, round);
    }
    if (slot == 0)
        for (int k = 0; k < 2; k++)
            if (column + k < dim) ((float *)a.dw_leaves)[leaf * dim + column + k] = llmpar__cuda_tree_sum(&tree, stack + k, columns, cut.levels);
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
    const int copies = args->dresidual ? 3 : 2;
    llmpar__cuda_norm_cut cut;
    size_t shared;
    int done = 0;
    memset(&cut, 0, sizeof cut);
    cut.lanes = llmpar__cuda_row_lanes(args->dim, (int)sizeof(T));
    cut.wide = llmpar__cuda_wide(args->dy, bytes) && llmpar__cuda_wide(args->x, bytes) && llmpar__cuda_wide(args->w, bytes) && llmpar__cuda_wide(args->dresidual, bytes) && llmpar__cuda_wide(args->dx, bytes);
    if (args->dw_leaves && tokens->leaves > 0) {
        int64_t blocks;
        int columns;
        cut.last = tokens->canon - 1;
        while (cut.first < cut.last && llmpar__cuda_norm_position(tokens, cut.first) >= llmpar__cuda_norm_position(tokens, cut.first + 1)) cut.first++;
        while (cut.last > cut.first && llmpar__cuda_norm_position(tokens, cut.last) >= llmpar__cuda_norm_position(tokens, cut.last + 1)) cut.last--;
        cut.share = tokens->batch / tokens->leaves;
        cut.slots = llmpar__cuda_slots(cut.last + 1 - cut.first);
        columns = LLMPAR__CUDA_ROW_WARPS / cut.slots * 64;
        cut.groups = (int)((args->dim + columns - 1) / columns);
        cut.levels = llmpar__cuda_tree_levels(cut.last / cut.slots);
        cut.pair = llmpar__cuda_pair(args->x, args->dim, (int)sizeof(T)) && llmpar__cuda_pair(args->dy, args->dim, (int)sizeof(T));
        shared = LLMPAR__CUDA_NORM_HEAD + LLMPAR__CUDA_NORM_PIECES + (size_t)(LLMPAR__CUDA_NORM_CHAINS + cut.levels * columns) * sizeof(float);
        blocks = tokens->leaves * cut.groups;
        cut.with_dx = done = args->dx != args->dy && blocks >= cuda->multiprocessors;
        if (done) cut.kept = llmpar__cuda_norm_keep(cuda, args->dim, (int)sizeof(T), cut.lanes, copies, shared, &shared);
        llmpar__cuda_launch(device, stream, llmpar__cuda_norm_chains<T>, dim3((unsigned)blocks), dim3(LLMPAR__CUDA_ROW_THREADS), shared, *args, cut);
    }
    if (done || rows <= 0) return;
    cut.kept = llmpar__cuda_norm_keep(cuda, args->dim, (int)sizeof(T), cut.lanes, copies, LLMPAR__CUDA_NORM_HEAD, &shared);
    const int at_once = LLMPAR__CUDA_ROW_THREADS / cut.lanes;
    llmpar__cuda_launch(device, stream, llmpar__cuda_norm_dx<T>, dim3(llmpar__cuda_row_blocks(cuda, (rows + at_once - 1) / at_once, 4)), dim3(LLMPAR__CUDA_ROW_THREADS), shared, *args, cut);
}

static llmpar_status llmpar__cuda_rmsnorm_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_rmsnorm_backward_args *args)
{
    const llmpar_tokens *tokens = &args->tokens;
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "rmsnorm_backward", args->dtype, 1);
    if (status || args->dim <= 0) return status;
    if (args->dw_leaves && tokens->leaves > 0 && (tokens->canon < 1 || tokens->batch % tokens->leaves))
        return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "rmsnorm_backward: %lld leaves for batch %lld, canon %d: expected leaves that divide the batch, canon >= 1", (long long)tokens->leaves, (long long)tokens->batch, (int)tokens->canon);
    LLMPAR__CUDA_BY_DTYPE(args->dtype, llmpar__cuda_norm_run_backward, device, stream, args);
    return llmpar__cuda_end(device, stream, "rmsnorm_backward");
}
