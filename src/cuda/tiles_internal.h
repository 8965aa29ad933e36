/* tiles_internal: what the kernels of the EXACT matrix product share: the list of segments, the walk along it, and the stack of partial tiles.

   A block of threads makes one tile of c at a time, the whole tree of it:

      segments   |  piece 0   |piece 1| piece 2 (two segments)  |piece 3|
      chunks     |..|..|..|. .|..|..  |..|..|.  |..|..|..|..    |..|.   |     chunks of at most a stage's k, from each segment's begin: copied in the background, some stages ahead
      tile       |    push    | merge |          push           | merge, merge: c

   A piece that ends is added to the complete subtrees on its left: a binary counter makes the balanced tree of llmpar_tree_split. A partial tile of 2^h pieces lies in slot h: slot 0 in shared memory where there is room, the others
   in the workspace, one set of slots a block; the grid is no larger than the device runs at once, so that they stay in L2. Each thread writes and reads its own elements there, so no barrier is needed. Copies run ahead into the block's next tile, while this one is stored.

   The order of every sum is that of the chain and the tree alone. Tile sizes, stages, grid and the order of tiles show in no bit. */
#ifndef LLMPAR_CUDA_TILES_INTERNAL_H
#define LLMPAR_CUDA_TILES_INTERNAL_H

#include "cuda/cuda_internal.h"
#include "cuda/launch.h"

enum { LLMPAR__CUDA_GEMM_THREADS = 256, LLMPAR__CUDA_GEMM_RUNS = 64, LLMPAR__CUDA_GEMM_GROUP = 16 };

/* Segments of equal k, one a piece, that lie one behind the other along k: the leaves of a batch, the pieces of a dim. One segment is a run of count 1. */
struct llmpar__cuda_gemm_run {
    const unsigned char *a, *b;
    int64_t lda, ldb;        /* in bytes */
    int32_t k;               /* of each segment, >= 1; below 2^30 in a run */
    int32_t count, piece;    /* piece of the first */
    int32_t loose;           /* not all rows begin at multiples of 16 bytes: of a 1, of b 2 */
};

struct llmpar__cuda_gemm_job {
    llmpar__cuda_gemm_run runs[LLMPAR__CUDA_GEMM_RUNS]; /* unless there are more */
    const llmpar__cuda_gemm_run *list;                  /* then they are here, in the workspace; else NULL */
    unsigned char *slots;    /* [blocks, levels, tile] */
    void *c;
    int64_t m, n, ldc;
    int32_t tiles_m, tiles_n;
    int32_t run_count, pieces;
    int32_t levels;          /* slots a block in the workspace */
    int32_t shared_slot;     /* where slot 0 begins in shared memory; 0: it is in the workspace too */
    int32_t stages;
    int32_t accumulate;
    int32_t narrow;          /* c is stored in the operands' type, not in f32 */
    int32_t aligned;         /* all of c's rows begin at multiples of 16 bytes */
};

/* A copy, of which the compiler loads what is used, every time: a reference would put the kernel's parameters on the stack, and registers are short. */
static __device__ __forceinline__ llmpar__cuda_gemm_run llmpar__cuda_gemm_run_at(const llmpar__cuda_gemm_job &job, int32_t i)
{
    if (job.list) return job.list[i];
    return job.runs[i];
}

/* Tile `index` of c, in groups of GROUP rows of tiles, column by column: what runs at the same time shares rows of a and columns of b in L2. */
static __device__ __forceinline__ void llmpar__cuda_gemm_tile(const llmpar__cuda_gemm_job &job, int32_t index, int32_t *row, int32_t *column)
{
    int32_t first = index / (LLMPAR__CUDA_GEMM_GROUP * job.tiles_n) * LLMPAR__CUDA_GEMM_GROUP, inside = index - first * job.tiles_n;
    int32_t rows = job.tiles_m - first;
    if (rows > LLMPAR__CUDA_GEMM_GROUP) rows = LLMPAR__CUDA_GEMM_GROUP;
    *row = first + inside % rows;
    *column = inside / rows;
}

/* How much of tile `index` there is. */
static __device__ __forceinline__ int llmpar__cuda_gemm_part_of(int64_t extent, int32_t index, int side)
{
    int64_t left = extent - (int64_t)index * side;
    return left < side ? (int)left : side;
}

/* Where the copies are: a chunk of a segment, at a tile's first row of a and first row (column) of b; behind a tile's last chunk comes the block's next tile. The same for all threads of the block. */
struct llmpar__cuda_gemm_source {
    int32_t at, left;   /* in the run: k behind the first segment's begin; k of the segment from here, 0: no more chunks */
    int32_t run;
    int32_t tile, i, j; /* number of the tile, and where: in tiles */

    __device__ __forceinline__ void open(const llmpar__cuda_gemm_job &job)
    {
        at = left = 0;
        if (run == job.run_count) {
            tile += (int32_t)gridDim.x;
            run = 0;
        }
        if (tile >= job.tiles_m * job.tiles_n || !job.run_count) return;
        if (run == 0) llmpar__cuda_gemm_tile(job, tile, &i, &j);
        left = llmpar__cuda_gemm_run_at(job, run).k;
    }
    __device__ __forceinline__ void begin(const llmpar__cuda_gemm_job &job)
    {
        tile = (int32_t)blockIdx.x;
        run = i = j = 0;
        open(job);
    }
    /* k: of a chunk; in: the run. */
    __device__ __forceinline__ void advance(const llmpar__cuda_gemm_job &job, const llmpar__cuda_gemm_run &in, int k)
    {
        at += min(left, k);
        left -= k;
        if (left > 0) return;
        left = in.k;
        if (at < in.count * in.k) return;
        run++;
        open(job);
    }
    /* The chunk's first element of an operand whose tile has `side` rows (columns). */
    template <int Size, int Transposed> __device__ __forceinline__ const unsigned char *first(const unsigned char *operand, int64_t ld, int32_t tile_row, int side) const
    {
        return operand + at * (Transposed ? ld : (int64_t)Size) + (int64_t)tile_row * side * (Transposed ? (int64_t)Size : ld);
    }
};

/* The piece of run's first segment; behind the last run: `pieces`. */
static __device__ __forceinline__ int32_t llmpar__cuda_gemm_first_piece(const llmpar__cuda_gemm_job &job, int32_t run) { return run == job.run_count ? job.pieces : llmpar__cuda_gemm_run_at(job, run).piece; }

/* The piece of the segment behind that of `piece` in *run, which may be the next run's. */
static __device__ __forceinline__ int32_t llmpar__cuda_gemm_next_piece(const llmpar__cuda_gemm_job &job, int32_t *run, int32_t piece)
{
    llmpar__cuda_gemm_run at = llmpar__cuda_gemm_run_at(job, *run);
    return piece + 1 < at.piece + at.count ? piece + 1 : llmpar__cuda_gemm_first_piece(job, ++*run);
}

template <int Floats> static __device__ __forceinline__ llmpar__cuda_16 *llmpar__cuda_gemm_slot(const llmpar__cuda_gemm_job &job, unsigned char *shared, int32_t height)
{
    unsigned char *slot = shared + job.shared_slot;
    if (height || !job.shared_slot) slot = job.slots + ((int64_t)blockIdx.x * job.levels + height - (job.shared_slot ? 1 : 0)) * (int64_t)(Floats * LLMPAR__CUDA_GEMM_THREADS * sizeof(float));
    return (llmpar__cuda_16 *)(void *)slot + threadIdx.x;
}

/* Piece `piece` is complete in `sum`, Floats elements a thread. Behind it `sum` is the total if this was the last one, else +0. */
template <int Floats> static __device__ __forceinline__ void llmpar__cuda_gemm_finish(const llmpar__cuda_gemm_job &job, unsigned char *shared, int32_t piece, float (&sum)[Floats])
{
    int last = piece + 1 == job.pieces;
    int32_t height = 0;
    llmpar__cuda_16 *slot;
#pragma unroll 1
    for (; piece >> height; height++) {
        if (!(piece >> height & 1)) {
            if (last) continue;
            break;
        }
        slot = llmpar__cuda_gemm_slot<Floats>(job, shared, height);
#pragma unroll
        for (int i = 0; i < Floats / 4; i++) {
            llmpar__cuda_16 left = slot[i * LLMPAR__CUDA_GEMM_THREADS];
#pragma unroll
            for (int e = 0; e < 4; e++) sum[4 * i + e] = __fadd_rn(__uint_as_float(left.word[e]), sum[4 * i + e]);
        }
    }
    if (last) return;
    slot = llmpar__cuda_gemm_slot<Floats>(job, shared, height);
#pragma unroll
    for (int i = 0; i < Floats / 4; i++) {
        llmpar__cuda_16 out;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            out.word[e] = __float_as_uint(sum[4 * i + e]);
            sum[4 * i + e] = 0;
        }
        slot[i * LLMPAR__CUDA_GEMM_THREADS] = out;
    }
}

#endif
