/* tiles_internal: what the kernels of the EXACT matrix product share: the list of segments, the walk along it, and the stack of partial tiles.

   A block of threads makes one tile of c at a time, the whole tree of it:

      segments   |  piece 0   |piece 1| piece 2 (two segments)  |piece 3|
      chunks     |..|..|..|. .|..|..  |..|..|.  |..|..|..|..    |..|.   |     chunks of at most a stage's k, from each segment's begin: copied in the background, some stages ahead
      tile       |    push    | merge |          push           | merge, merge: c

   A piece that ends is added to the complete subtrees on its left: a binary counter makes the balanced tree of llmpar_tree_split. A partial tile of 2^h pieces lies in slot h: slot 0 in shared memory where there is room, the others
   in the workspace, one set of slots a block; the grid is no larger than the device runs at once, so that they stay in L2. Each thread writes and reads its own elements there, so no barrier is needed.

   The order of every sum is that of the chain and the tree alone. Tile sizes, stages, grid and the order of tiles show in no bit. */
#ifndef LLMPAR_CUDA_TILES_INTERNAL_H
#define LLMPAR_CUDA_TILES_INTERNAL_H

#include "cuda/cuda_internal.h"

enum { LLMPAR__CUDA_GEMM_THREADS = 256, LLMPAR__CUDA_GEMM_RUNS = 64, LLMPAR__CUDA_GEMM_GROUP = 16 };

/* Segments of equal k, one a piece, that lie one behind the other along k: the leaves of a batch, the pieces of a dim. One segment is a run of count 1. */
struct llmpar__cuda_gemm_run {
    const unsigned char *a, *b;
    int64_t lda, ldb;        /* in bytes */
    int64_t k;               /* of each segment, >= 1 */
    int32_t count, piece;    /* piece of the first */
    int32_t loose;           /* not all rows begin at multiples of 16 bytes: of a 1, of b 2 */
};

struct llmpar__cuda_gemm_job {
    llmpar__cuda_gemm_run runs[LLMPAR__CUDA_GEMM_RUNS]; /* unless there are more */
    const llmpar__cuda_gemm_run *list;                  /* then they are here, in the workspace; else NULL */
    unsigned char *slots;    /* [blocks, levels, tile] */
    void *c;
    int64_t m, n, ldc;
    int64_t tiles_m, tiles_n;
    int32_t run_count, pieces;
    int32_t levels;          /* slots a block in the workspace */
    int32_t shared_slot;     /* where slot 0 begins in shared memory; 0: it is in the workspace too */
    int32_t stages;
    int32_t accumulate;
    int32_t narrow;          /* c is stored in the operands' type, not in f32 */
    int32_t aligned;         /* all of c's rows begin at multiples of 16 bytes */
};

/* A copy, of which the compiler loads what is used: no reference, which would put the kernel's parameters on the stack. */
static __device__ __forceinline__ llmpar__cuda_gemm_run llmpar__cuda_gemm_run_at(const llmpar__cuda_gemm_job &job, int32_t i)
{
    if (job.list) return job.list[i];
    return job.runs[i];
}

/* Tile `index` of c, in groups of GROUP rows of tiles, column by column: what runs at the same time shares rows of a and columns of b in L2. */
static __device__ __forceinline__ void llmpar__cuda_gemm_tile(const llmpar__cuda_gemm_job &job, int64_t index, int64_t *row, int64_t *column)
{
    int64_t group = index / (LLMPAR__CUDA_GEMM_GROUP * job.tiles_n), first = group * LLMPAR__CUDA_GEMM_GROUP, inside = index - first * job.tiles_n;
    int64_t rows = job.tiles_m - first;
    if (rows > LLMPAR__CUDA_GEMM_GROUP) rows = LLMPAR__CUDA_GEMM_GROUP;
    *row = first + inside % rows;
    *column = inside / rows;
}

/* Where the copies are: a chunk of a segment, at the tile's first row of a and first row (column) of b. The same for the whole block. */
template <int Size, int TransposedA, int TransposedB> struct llmpar__cuda_gemm_source {
    const unsigned char *a, *b;
    int64_t lda, ldb, left; /* left: k of the segment from here; 0: no more chunks */
    int64_t i, j;           /* the tile's first row and column */
    int32_t run, sub, loose;

    __device__ __forceinline__ void open(const llmpar__cuda_gemm_job &job)
    {
        left = 0;
        if (run == job.run_count) return;
        llmpar__cuda_gemm_run at = llmpar__cuda_gemm_run_at(job, run);
        left = at.k;
        lda = at.lda;
        ldb = at.ldb;
        loose = at.loose;
        a = at.a + sub * left * (TransposedA ? lda : Size) + i * (TransposedA ? Size : lda);
        b = at.b + sub * left * (TransposedB ? ldb : Size) + j * (TransposedB ? Size : ldb);
    }
    __device__ __forceinline__ void begin(const llmpar__cuda_gemm_job &job, int64_t row, int64_t column)
    {
        i = row;
        j = column;
        run = sub = 0;
        open(job);
    }
    __device__ __forceinline__ void advance(const llmpar__cuda_gemm_job &job, int k)
    {
        left -= k;
        a += TransposedA ? k * lda : (int64_t)(k * Size);
        b += TransposedB ? k * ldb : (int64_t)(k * Size);
        if (left > 0) return;
        if (++sub == llmpar__cuda_gemm_run_at(job, run).count) {
            sub = 0;
            run++;
        }
        open(job);
    }
};

/* Which segment the chains are in. */
struct llmpar__cuda_gemm_walk {
    int32_t run, sub;
    __device__ __forceinline__ int32_t piece(const llmpar__cuda_gemm_job &job) const { return run == job.run_count ? job.pieces : llmpar__cuda_gemm_run_at(job, run).piece + sub; }
    __device__ __forceinline__ int64_t k(const llmpar__cuda_gemm_job &job) const { return llmpar__cuda_gemm_run_at(job, run).k; }
    __device__ __forceinline__ void next(const llmpar__cuda_gemm_job &job)
    {
        if (++sub < llmpar__cuda_gemm_run_at(job, run).count) return;
        sub = 0;
        run++;
    }
};

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
