/* embedding: rows of a vocab-sharded table by id, and its gradient.

   Backward adds nothing atomically. Tokens are sorted by id, stably (radix sort with counts; Knuth vol. 3, section 5.2.5), so that each row of the table finds its tokens in order; then a row's sum is a chain in each leaf and a
   tree over leaves (docs/exact.md):
     1. for each digit of the ids: count digits in tiles of tokens, turn counts into places, move
     2. where each id's tokens begin, by search, and a list of the ids with more than 3 tokens, in any order
     3. all rows of the table but those: most are zeros; up to 3 tokens have few trees
     4. the listed rows: leaves side by side in the warps of a block, 64 columns at a time

   workspace: | keys | tokens | keys | tokens |  the two sides of a pass, a u32 a token each, | counts [digit][tile] | begin [v_local + 1] | listed | list | */
#include "cuda/rows_internal.h"

enum { LLMPAR__CUDA_SORT_TILE = 2048, LLMPAR__CUDA_SORT_DIGITS = 256, LLMPAR__CUDA_SORT_STEPS = LLMPAR__CUDA_SORT_TILE / LLMPAR__CUDA_ROW_THREADS, LLMPAR__CUDA_EMBEDDING_FEW = 3 };

/* ---- forward: a select ---- */

template <typename U> static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS) llmpar__cuda_embedding_rows(llmpar_embedding_args a, int64_t units)
{
    const int64_t total = a.rows * units;
    for (int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; at < total; at += (int64_t)gridDim.x * blockDim.x) {
        const int64_t row = llmpar__cuda_divide(at, units), id = (int64_t)a.ids[row] - a.v_begin;
        U x;
        if (id >= 0 && id < a.v_local) x = ((const U *)a.table)[id * units + at - row * units];
        else memset(&x, 0, sizeof x);
        ((U *)a.out)[at] = x;
    }
}
template <typename U> static void llmpar__cuda_embedding_run(llmpar_device *device, llmpar_stream *stream, const llmpar_embedding_args *args, int64_t bytes)
{
    const int64_t units = bytes / (int64_t)sizeof(U);
    llmpar__cuda_launch(device, stream, llmpar__cuda_embedding_rows<U>, dim3(llmpar__cuda_blocks(llmpar__cuda_of(device), args->rows * units, LLMPAR__CUDA_ROW_THREADS, 4)), dim3(LLMPAR__CUDA_ROW_THREADS), 0, *args, units);
}

static llmpar_status llmpar__cuda_embedding(llmpar_device *device, llmpar_stream *stream, const llmpar_embedding_args *args)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "embedding", args->dtype, 1);
    if (status || args->rows <= 0 || args->dim <= 0) return status;
    const int64_t bytes = args->dim * (int64_t)llmpar_dtype_size(args->dtype);
    const uint64_t places = (uint64_t)(uintptr_t)args->table | (uint64_t)(uintptr_t)args->out | (uint64_t)bytes;
    if (places % 16 == 0) llmpar__cuda_embedding_run<llmpar__cuda_16>(device, stream, args, bytes);
    else if (places % 4 == 0) llmpar__cuda_embedding_run<uint32_t>(device, stream, args, bytes);
    else llmpar__cuda_embedding_run<uint16_t>(device, stream, args, bytes);
    return llmpar__cuda_end(device, stream, "embedding");
}

/* ---- sorting ---- */

/* One pass: sorts by `bits` bits of the key from bit `shift` on. ids: the first pass takes keys from them, and tokens in order; an id of another shard has the key v_local. */
typedef struct llmpar__cuda_sort {
    int64_t count, tiles, v_begin, v_local;
    const int32_t *ids;
    const uint32_t *keys, *tokens;
    uint32_t *keys_out, *tokens_out, *counts, *listed;
    int bits, shift;
} llmpar__cuda_sort;

static __device__ __forceinline__ uint32_t llmpar__cuda_sort_key(const llmpar__cuda_sort &s, int64_t i)
{
    if (!s.ids) return s.keys[i];
    int64_t id = (int64_t)s.ids[i] - s.v_begin;
    return (uint32_t)(id >= 0 && id < s.v_local ? id : s.v_local);
}

static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS) llmpar__cuda_sort_count(llmpar__cuda_sort s)
{
    LLMPAR__CUDA_SHARED(unsigned, counts); /* [digit] */
    const int digits = 1 << s.bits;
    for (int d = (int)threadIdx.x; d < digits; d += LLMPAR__CUDA_ROW_THREADS) counts[d] = 0;
    __syncthreads();
    for (int j = 0; j < LLMPAR__CUDA_SORT_STEPS; j++) {
        int64_t i = (int64_t)blockIdx.x * LLMPAR__CUDA_SORT_TILE + j * LLMPAR__CUDA_ROW_THREADS + (int)threadIdx.x;
        if (i < s.count) atomicAdd(&counts[llmpar__cuda_sort_key(s, i) >> s.shift & (unsigned)(digits - 1)], 1u);
    }
    __syncthreads();
    for (int d = (int)threadIdx.x; d < digits; d += LLMPAR__CUDA_ROW_THREADS) s.counts[(int64_t)d * s.tiles + blockIdx.x] = counts[d];
}

/* counts[i] becomes the sum of those before it. One block. */
static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS) llmpar__cuda_sort_places(llmpar__cuda_sort s)
{
    LLMPAR__CUDA_SHARED(unsigned, warps);
    const int64_t total = s.tiles << s.bits;
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    unsigned before = 0;
    if (threadIdx.x == 0) *s.listed = 0;
    for (int64_t first = 0; first < total; first += LLMPAR__CUDA_SORT_TILE) {
        const int64_t begin = first + (int64_t)threadIdx.x * LLMPAR__CUDA_SORT_STEPS;
        unsigned own[LLMPAR__CUDA_SORT_STEPS], sum = 0, up, all = 0, mine = before;
#pragma unroll
        for (int j = 0; j < LLMPAR__CUDA_SORT_STEPS; j++) {
            own[j] = begin + j < total ? s.counts[begin + j] : 0;
            sum += own[j];
        }
        up = sum;
        for (int o = 1; o < 32; o *= 2) {
            unsigned other = __shfl_up_sync(0xffffffffu, up, (unsigned)o);
            if (lane >= o) up += other;
        }
        if (lane == 31) warps[warp] = up;
        __syncthreads();
        for (int k = 0; k < LLMPAR__CUDA_ROW_WARPS; k++) {
            if (k < warp) mine += warps[k];
            all += warps[k];
        }
        __syncthreads();
        mine += up - sum;
#pragma unroll
        for (int j = 0; j < LLMPAR__CUDA_SORT_STEPS; j++) {
            if (begin + j < total) s.counts[begin + j] = mine;
            mine += own[j];
        }
        before += all;
    }
}

/* Each warp moves a contiguous part of the tile, 32 tokens at a time: of equal digits the lower lane goes first. */
static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS) llmpar__cuda_sort_move(llmpar__cuda_sort s)
{
    LLMPAR__CUDA_SHARED(unsigned, places); /* [warp][digit]: counts, then where the warp's next token with this digit goes */
    const int digits = 1 << s.bits, warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    const int64_t first = (int64_t)blockIdx.x * LLMPAR__CUDA_SORT_TILE + warp * 32 * LLMPAR__CUDA_SORT_STEPS + lane;
    unsigned *own = places + warp * digits;
    for (int d = (int)threadIdx.x; d < LLMPAR__CUDA_ROW_WARPS * digits; d += LLMPAR__CUDA_ROW_THREADS) places[d] = 0;
    __syncthreads();
    for (int j = 0; j < LLMPAR__CUDA_SORT_STEPS; j++)
        if (first + j * 32 < s.count) atomicAdd(&own[llmpar__cuda_sort_key(s, first + j * 32) >> s.shift & (unsigned)(digits - 1)], 1u);
    __syncthreads();
    for (int d = (int)threadIdx.x; d < digits; d += LLMPAR__CUDA_ROW_THREADS) {
        unsigned next = s.counts[(int64_t)d * s.tiles + blockIdx.x];
        for (int k = 0; k < LLMPAR__CUDA_ROW_WARPS; k++) {
            unsigned count = places[k * digits + d];
            places[k * digits + d] = next;
            next += count;
        }
    }
    __syncthreads();
    for (int j = 0; j < LLMPAR__CUDA_SORT_STEPS; j++) {
        const int64_t i = first + j * 32;
        const int valid = i < s.count;
        const uint32_t key = valid ? llmpar__cuda_sort_key(s, i) : 0;
        const unsigned digit = key >> s.shift & (unsigned)(digits - 1);
        unsigned same = __ballot_sync(0xffffffffu, valid), place = 0;
        for (int b = 0; b < s.bits; b++) {
            unsigned set = __ballot_sync(0xffffffffu, (int)(digit >> b & 1u));
            same &= digit >> b & 1u ? set : ~set;
        }
        const unsigned rank = (unsigned)__popc(same & ((1u << lane) - 1u));
        if (valid) place = own[digit] + rank;
        __syncwarp();
        if (valid && rank == 0) own[digit] += (unsigned)__popc(same);
        __syncwarp(); /* no test can tell: the ballots for the next tokens meet here too, but they order no memory */
        if (valid) {
            s.keys_out[place] = key;
            s.tokens_out[place] = s.ids ? (uint32_t)i : s.tokens[i];
        }
    }
}

/* ---- backward ---- */

typedef struct llmpar__cuda_embedding_job {
    const uint32_t *keys, *tokens; /* sorted */
    uint32_t *begin, *listed, *list;
    int64_t leaf_rows;
    int slots, groups, levels, pair; /* leaves side by side; parts of a row's columns; levels of the tree over rounds of leaves; two columns at a time */
    int lanes, wide, four;           /* for rows with few tokens: threads a row of the table; whether its rows are aligned to 16 bytes; whether those of dout to four columns */
} llmpar__cuda_embedding_job;

/* The first i in [low, high) with x[i] >= value, else high. */
static __device__ __forceinline__ int64_t llmpar__cuda_embedding_search(const uint32_t *x, int64_t low, int64_t high, int64_t value)
{
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if ((int64_t)x[middle] < value) low = middle + 1;
        else high = middle;
    }
    return low;
}

static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS) llmpar__cuda_embedding_begins(llmpar_embedding_backward_args a, llmpar__cuda_embedding_job job)
{
    const int64_t count = a.tokens.batch * a.tokens.t;
    for (int64_t v = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; v <= a.v_local; v += (int64_t)gridDim.x * blockDim.x) {
        const int64_t begin = llmpar__cuda_embedding_search(job.keys, 0, count, v);
        job.begin[v] = (uint32_t)begin;
        if (v < a.v_local && begin + LLMPAR__CUDA_EMBEDDING_FEW < count && (int64_t)job.keys[begin + LLMPAR__CUDA_EMBEDDING_FEW] == v) job.list[atomicAdd(job.listed, 1u)] = (uint32_t)v;
    }
}

/* Rows with at most 3 tokens. Two tokens have one sum, whatever their leaves; the third joins the first two, or the second first, where that parts from the first higher up than from the third. */
template <typename T> static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS) llmpar__cuda_embedding_few(llmpar_embedding_backward_args a, llmpar__cuda_embedding_job job)
{
    const int at_once = LLMPAR__CUDA_ROW_THREADS / job.lanes;
    const int64_t dim = a.dim;
    for (int64_t first = (int64_t)blockIdx.x * at_once; first < a.v_local; first += (int64_t)gridDim.x * at_once) {
        const int64_t v = first + (int)threadIdx.x / job.lanes;
        if (v >= a.v_local) continue;
        const int64_t begin = job.begin ? job.begin[v] : 0, count = job.begin ? job.begin[v + 1] - begin : 0;
        const T *in[LLMPAR__CUDA_EMBEDDING_FEW];
        float *out = (float *)a.dtable + v * dim;
        int right = 0; /* the last two first */
        if (count > LLMPAR__CUDA_EMBEDDING_FEW) continue;
        for (int j = 0; j < LLMPAR__CUDA_EMBEDDING_FEW; j++) in[j] = (const T *)a.dout + (j < count ? (int64_t)job.tokens[begin + j] * dim : 0);
        if (count == LLMPAR__CUDA_EMBEDDING_FEW) {
            uint64_t leaf[LLMPAR__CUDA_EMBEDDING_FEW];
            for (int j = 0; j < LLMPAR__CUDA_EMBEDDING_FEW; j++) leaf[j] = (uint64_t)llmpar__cuda_divide(job.tokens[begin + j], job.leaf_rows);
            right = (leaf[0] ^ leaf[1]) > (leaf[1] ^ leaf[2]);
        }
        for (int64_t c = (int64_t)((int)threadIdx.x % job.lanes) * 4; c < dim; c += 4 * job.lanes) {
            float x[LLMPAR__CUDA_EMBEDDING_FEW][4];
#pragma unroll
            for (int j = 0; j < LLMPAR__CUDA_EMBEDDING_FEW; j++) {
                llmpar__cuda_four<T> four;
                if (j < count && job.four) four = *(const llmpar__cuda_four<T> *)(const void *)(in[j] + c);
#pragma unroll
                for (int k = 0; k < 4; k++) x[j][k] = j < count && c + k < dim ? __fadd_rn(0.0f, llmpar__cuda_load(job.four ? four.x[k] : in[j][c + k])) : 0.0f;
            }
#pragma unroll
            for (int k = 0; k < 4; k++) x[0][k] = right ? __fadd_rn(x[0][k], __fadd_rn(x[1][k], x[2][k])) : __fadd_rn(__fadd_rn(x[0][k], x[1][k]), x[2][k]);
            llmpar__cuda_write(out + c, dim - c, job.wide, llmpar__cuda_pack<float>(x[0]));
        }
    }
}

/* The listed rows. Each warp of a block has a leaf (of `slots` side by side) and 64 columns. Rounds of leaves without tokens are passed over. */
template <typename T> static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS, 2) llmpar__cuda_embedding_many(llmpar_embedding_backward_args a, llmpar__cuda_embedding_job job)
{
    LLMPAR__CUDA_SHARED(float, chains); /* [warp][64], then the tree [levels][columns] */
    const int batch = 16, warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, side = LLMPAR__CUDA_ROW_WARPS / job.slots, columns = 64 * side, slot = warp / side;
    const int64_t dim = a.dim, round_rows = job.leaf_rows * job.slots, units = (int64_t)*job.listed * job.groups;
    float *own = chains + warp * 64 + 2 * lane, *stack = chains + 64 * LLMPAR__CUDA_ROW_WARPS + warp * 64 + 2 * lane;
    for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
        const int64_t which = llmpar__cuda_divide(unit, job.groups), column = (unit - which * job.groups) * columns + warp % side * 64 + 2 * lane, v = job.list[which], end = job.begin[v + 1];
        const T *in = (const T *)a.dout + column;
        llmpar__cuda_tree tree = { 0, 0 };
        for (int64_t at = job.begin[v]; at < end;) {
            const int64_t round = llmpar__cuda_divide(job.tokens[at], round_rows), leaf = round * job.slots + slot;
            const int64_t next = llmpar__cuda_embedding_search(job.tokens, at, end, (round + 1) * round_rows);
            const int64_t from = llmpar__cuda_embedding_search(job.tokens, at, next, leaf * job.leaf_rows), to = llmpar__cuda_embedding_search(job.tokens, from, next, (leaf + 1) * job.leaf_rows);
            float low = 0, high = 0;
            for (int64_t i = from; i < to; i += batch) {
                llmpar__cuda_two<T> x[batch];
                const uint32_t token = i + lane < to && lane < batch ? job.tokens[i + lane] : 0;
#pragma unroll
                for (int k = 0; k < batch; k++) {
                    const int64_t row = __shfl_sync(0xffffffffu, token, k);
                    if (i + k < to && column < dim) x[k] = llmpar__cuda_read_two(in + row * dim, dim - column, job.pair);
                }
#pragma unroll
                for (int k = 0; k < batch; k++)
                    if (i + k < to && column < dim) {
                        low = __fadd_rn(low, llmpar__cuda_low<T>(x[k]));
                        high = __fadd_rn(high, llmpar__cuda_high<T>(x[k]));
                    }
            }
            __syncthreads(); /* the last round's chains were read */
            own[0] = low;
            own[1] = high;
            __syncthreads();
            if (slot == 0)
                for (int k = 0; k < 2; k++) llmpar__cuda_tree_push(&tree, stack + k, columns, round, llmpar__cuda_slot_sum(own + k, job.slots, columns));
            llmpar__cuda_tree_pushed(&tree, round);
            at = next;
        }
        if (slot == 0)
            for (int k = 0; k < 2; k++)
                if (column + k < dim) ((float *)a.dtable)[v * dim + column + k] = llmpar__cuda_tree_sum(&tree, stack + k, columns, job.levels);
    }
}

/* ---- slot ---- */

/* Where things lie in the workspace, in u32; returns how many. */
typedef struct llmpar__cuda_embedding_layout { int64_t rows, tiles, v_local, keys[2], tokens[2], counts, begin, listed, list; } llmpar__cuda_embedding_layout;
static int64_t llmpar__cuda_embedding_lay(const llmpar_embedding_backward_args *args, llmpar__cuda_embedding_layout *l)
{
    const int64_t rows = args->tokens.batch * args->tokens.t;
    int64_t at = 0;
    l->rows = rows > 0 ? rows : 0;
    l->v_local = args->v_local > 0 ? args->v_local : 0;
    l->tiles = (l->rows + LLMPAR__CUDA_SORT_TILE - 1) / LLMPAR__CUDA_SORT_TILE;
    for (int i = 0; i < 2; i++) {
        l->keys[i] = at;
        at += l->rows;
        l->tokens[i] = at;
        at += l->rows;
    }
    l->counts = at;
    at += l->tiles * LLMPAR__CUDA_SORT_DIGITS;
    l->begin = at;
    at += l->v_local + 1;
    l->listed = at++;
    l->list = at;
    return at + l->rows / (LLMPAR__CUDA_EMBEDDING_FEW + 1);
}

static size_t llmpar__cuda_embedding_backward_workspace(llmpar_device *device, const llmpar_embedding_backward_args *args)
{
    llmpar__cuda_embedding_layout l;
    (void)device;
    return (size_t)llmpar__cuda_embedding_lay(args, &l) * sizeof(uint32_t) + sizeof(uint32_t);
}

/* Sorts; job->keys and job->tokens name the side with the result. */
static void llmpar__cuda_embedding_sort(llmpar_device *device, llmpar_stream *stream, const llmpar_embedding_backward_args *args, const llmpar__cuda_embedding_layout *l, uint32_t *base, llmpar__cuda_embedding_job *job)
{
    llmpar__cuda_sort s;
    int bits = 1, passes;
    while (l->v_local >> bits) bits++;
    passes = (bits + 7) / 8;
    memset(&s, 0, sizeof s);
    s.count = l->rows;
    s.tiles = l->tiles;
    s.v_begin = args->v_begin;
    s.v_local = l->v_local;
    s.counts = base + l->counts;
    s.listed = base + l->listed;
    s.bits = (bits + passes - 1) / passes;
    for (int pass = 0; pass < passes; pass++) {
        s.ids = pass ? NULL : args->ids;
        s.keys = base + l->keys[(pass + 1) % 2];
        s.tokens = base + l->tokens[(pass + 1) % 2];
        s.keys_out = base + l->keys[pass % 2];
        s.tokens_out = base + l->tokens[pass % 2];
        s.shift = pass * s.bits;
        llmpar__cuda_launch(device, stream, llmpar__cuda_sort_count, dim3((unsigned)s.tiles), dim3(LLMPAR__CUDA_ROW_THREADS), ((size_t)1 << s.bits) * sizeof(unsigned), s);
        llmpar__cuda_launch(device, stream, llmpar__cuda_sort_places, dim3(1), dim3(LLMPAR__CUDA_ROW_THREADS), LLMPAR__CUDA_ROW_WARPS * sizeof(unsigned), s);
        llmpar__cuda_launch(device, stream, llmpar__cuda_sort_move, dim3((unsigned)s.tiles), dim3(LLMPAR__CUDA_ROW_THREADS), (LLMPAR__CUDA_ROW_WARPS * sizeof(unsigned)) << s.bits, s);
    }
    job->keys = s.keys_out;
    job->tokens = s.tokens_out;
}

template <typename T> static void llmpar__cuda_embedding_run_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_embedding_backward_args *args, const llmpar__cuda_embedding_layout *l, uint32_t *base)
{
    const llmpar__cuda *cuda = llmpar__cuda_of(device);
    llmpar__cuda_embedding_job job;
    memset(&job, 0, sizeof job);
    job.lanes = llmpar__cuda_row_lanes(args->dim, 4);
    job.wide = llmpar__cuda_wide(args->dtable, args->dim * 4);
    job.four = args->dim % 4 == 0 && (uintptr_t)args->dout % (4 * sizeof(T)) == 0;
    const int at_once = LLMPAR__CUDA_ROW_THREADS / job.lanes;
    if (l->rows > 0) {
        llmpar__cuda_embedding_sort(device, stream, args, l, base, &job);
        job.begin = base + l->begin;
        job.listed = base + l->listed;
        job.list = base + l->list;
        job.leaf_rows = args->tokens.batch / args->tokens.leaves * args->tokens.t;
        llmpar__cuda_launch(device, stream, llmpar__cuda_embedding_begins, dim3(llmpar__cuda_blocks(cuda, l->v_local + 1, LLMPAR__CUDA_ROW_THREADS, 4)), dim3(LLMPAR__CUDA_ROW_THREADS), 0, *args, job);
    }
    llmpar__cuda_launch(device, stream, llmpar__cuda_embedding_few<T>, dim3(llmpar__cuda_row_blocks(cuda, (l->v_local + at_once - 1) / at_once, 4)), dim3(LLMPAR__CUDA_ROW_THREADS), 0, *args, job);
    if (l->rows <= LLMPAR__CUDA_EMBEDDING_FEW) return;
    job.slots = llmpar__cuda_slots(args->tokens.leaves);
    const int columns = LLMPAR__CUDA_ROW_WARPS / job.slots * 64;
    job.groups = (int)((args->dim + columns - 1) / columns);
    job.levels = llmpar__cuda_tree_levels((args->tokens.leaves - 1) / job.slots);
    job.pair = llmpar__cuda_pair(args->dout, args->dim, (int)sizeof(T));
    llmpar__cuda_launch(device, stream, llmpar__cuda_embedding_many<T>, dim3(llmpar__cuda_row_blocks(cuda, l->rows / (LLMPAR__CUDA_EMBEDDING_FEW + 1) * job.groups, 4)), dim3(LLMPAR__CUDA_ROW_THREADS), (size_t)(64 * LLMPAR__CUDA_ROW_WARPS + job.levels * columns) * sizeof(float), *args, job);
}

static llmpar_status llmpar__cuda_embedding_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_embedding_backward_args *args)
{
    const size_t need = llmpar__cuda_embedding_backward_workspace(device, args);
    llmpar__cuda_embedding_layout l;
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "embedding_backward", args->dtype, 1);
    if (status || args->v_local <= 0 || args->dim <= 0) return status;
    llmpar__cuda_embedding_lay(args, &l);
    if (l.rows > 0 && (args->tokens.leaves < 1 || args->tokens.batch % args->tokens.leaves))
        return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "embedding_backward: %lld leaves for batch %lld, expected leaves that divide the batch", (long long)args->tokens.leaves, (long long)args->tokens.batch);
    if (l.rows > 0x7fffffff || l.v_local > 0x7ffffffe)
        return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "embedding_backward: %lld tokens and %lld rows of the table, expected less than 2^31 each on device %s", (long long)l.rows, (long long)l.v_local, device->name);
    if (!args->workspace || args->workspace_bytes < need)
        return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "embedding_backward: workspace of %llu bytes, expected %llu", (unsigned long long)args->workspace_bytes, (unsigned long long)need);
    uint32_t *base = (uint32_t *)(((uintptr_t)args->workspace + 3u) & ~(uintptr_t)3u);
    LLMPAR__CUDA_BY_DTYPE(args->dtype, llmpar__cuda_embedding_run_backward, device, stream, args, &l, base);
    return llmpar__cuda_end(device, stream, "embedding_backward");
}
