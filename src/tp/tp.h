/* tp: tensor parallelism over one mesh axis: column- and row-parallel linear layers, sequence-parallel gather and reduce, vocab-parallel select. Shoeybi et al. 2019 (Megatron), Korthikanti et al. 2022 (sequence parallel).
   Every function enqueues on the stream it is given and works for one rank, where it is plain. Sums follow docs/exact.md: pieces of the sharded dim, balanced tree, collective.

   Shapes: N = B*T rows of all tokens; Ns = B*(T/tp) rows with sequence parallel, else N. G grains (heads, rows of F, vocabulary ids) of `grain` elements are cut over tp by llmpar_piece_begin. */
#ifndef LLMPAR_TP_H
#define LLMPAR_TP_H

#include "tables/comm.h"
#include "tables/ctx.h"

typedef struct llmpar_tp {
    llmpar_ctx *ctx;          /* borrowed */
    llmpar_comm *comm;        /* borrowed; the tp axis */
    llmpar_comm *kv;          /* owned; the ranks that hold the same kv head, NULL if replicas == 1 */
    int32_t rank, ranks;
    int32_t pieces;           /* of every sharded sum over the whole axis: canon where ranks divide it, else ranks */
    int32_t replicas;         /* ranks per kv head: max(1, tp / K) */
    int32_t sequence_parallel;
} llmpar_tp;

/* canon: power of two, 0 = 8. kv_heads K: K % tp == 0 or tp % K == 0, else LLMPAR_ERR_MESH. Collective over comm. */
LLMPAR_API llmpar_status llmpar_tp_init(llmpar_ctx *ctx, llmpar_comm *comm, int32_t canon, int32_t kv_heads, int32_t sequence_parallel, llmpar_tp *out);
LLMPAR_API void llmpar_tp_destroy(llmpar_tp *tp); /* a zeroed struct is fine; local */

/* First grain of this rank, and number of grains it holds. Local. */
LLMPAR_API int64_t llmpar_tp_begin(const llmpar_tp *tp, int64_t grains);
LLMPAR_API int64_t llmpar_tp_count(const llmpar_tp *tp, int64_t grains);

/* One operand pair of a sum over a sharded dim: a[N, *] and b hold `count` grains of `grain` elements beginning at global grain `begin`; b is [D, *] (NT) or [*, D] (NN). stride: elements between rows.
   interleaved: as in llmpar_gemm_segment (NT). owner_of(g): global grain g of this operand belongs to the piece of query grain g * per (kv heads: per = H/K; else 1). */
typedef struct llmpar_tp_operand { const void *a, *b; int64_t lda, ldb, grain, begin, count, per; int32_t interleaved; } llmpar_tp_operand;

/* out[rows, D] = this rank's partial sum: per piece of `grains` (query heads, F, vocabulary) one chain over the operands in order, then the local tree. Combine over tp with llmpar_tp_reduce. kind NT or NN.
   out is of llmpar_tp_partial_dtype: the sum type of dtype where other ranks' parts are still to be added, else dtype, rounded once. */
LLMPAR_API llmpar_status llmpar_tp_partial(const llmpar_tp *tp, llmpar_stream *stream, llmpar_gemm_kind kind, int64_t rows, int64_t dim, int64_t grains, const llmpar_tp_operand *operands, int32_t operand_count, llmpar_dtype dtype, void *out, void *workspace, size_t workspace_bytes);
LLMPAR_API llmpar_dtype llmpar_tp_partial_dtype(const llmpar_tp *tp, llmpar_dtype dtype); /* local */
/* Bytes of a partial sum of batch * t rows that llmpar_tp_reduce is to combine: the rows, and with sequence parallel below the sum type room behind them for this rank's part of the sum. Local. */
LLMPAR_API size_t llmpar_tp_partial_bytes(const llmpar_tp *tp, int64_t batch, int64_t t, int64_t dim, llmpar_dtype dtype);
/* Workspace of llmpar_tp_partial for these extents; pointers in the operands are ignored. Local. */
LLMPAR_API size_t llmpar_tp_partial_workspace(const llmpar_tp *tp, llmpar_gemm_kind kind, int64_t rows, int64_t dim, int64_t grains, const llmpar_tp_operand *operands, int32_t operand_count, llmpar_dtype dtype);

/* Column-parallel forward, and every other product that no mesh splits: out[m,n] = one chain over k. */
LLMPAR_API llmpar_status llmpar_tp_product(const llmpar_tp *tp, llmpar_stream *stream, llmpar_gemm_kind kind, int64_t m, int64_t n, int64_t k, const void *a, int64_t lda, const void *b, int64_t ldb, void *out, int64_t ldo, llmpar_dtype dtype, void *workspace, size_t workspace_bytes);
LLMPAR_API size_t llmpar_tp_product_workspace(const llmpar_tp *tp, llmpar_gemm_kind kind, int64_t m, int64_t n, int64_t k, llmpar_dtype dtype);

/* Weight gradient dw[out_dim, in_dim] (of the sum type) = dy[N,out_dim]^T x[N,in_dim]: a chain per leaf over its tokens, tree over `leaves` leaves (leaves divides the sequences that make up rows). Needs no communication over tp.
   accumulate: dw's one chain goes on with these rows (leaves 1). Workspace SIZE_MAX: LLMPAR_ERR_MEMORY. Cut into parts of a multiple of LLMPAR_TP_PART rows, the last one of any, it has the bits of one call: no device that keeps the order of sums adds more in one go. */
#define LLMPAR_TP_PART 64
LLMPAR_API llmpar_status llmpar_tp_weight_gradient(const llmpar_tp *tp, llmpar_stream *stream, int64_t rows, int64_t leaves, int64_t out_dim, int64_t in_dim, const void *dy, int64_t lddy, const void *x, int64_t ldx, void *dw, int accumulate, llmpar_dtype dtype, void *workspace, size_t workspace_bytes);
LLMPAR_API size_t llmpar_tp_weight_gradient_workspace(const llmpar_tp *tp, int64_t rows, int64_t leaves, int64_t out_dim, int64_t in_dim, llmpar_dtype dtype);

/* Sequence parallel: full[B,T,D] <- local[B,T/tp,D]. Not called without sequence parallel. */
LLMPAR_API llmpar_status llmpar_tp_gather(const llmpar_tp *tp, llmpar_stream *stream, const char *tag, int64_t batch, int64_t t, int64_t dim, const void *local, void *full, llmpar_dtype dtype);
/* Combines partials over tp: with sequence parallel out[B,T/tp,D] (reduce-scatter), else out[B,T,D] (all-reduce; out may equal partial where both are of one type). One rank: copies unless equal.
   partial is of llmpar_tp_partial_dtype and llmpar_tp_partial_bytes, and overwritten where out, of `dtype`, is rounded from the sum type: once, behind the whole tree. */
LLMPAR_API llmpar_status llmpar_tp_reduce(const llmpar_tp *tp, llmpar_stream *stream, const char *tag, int64_t batch, int64_t t, int64_t dim, void *partial, void *out, llmpar_dtype dtype);
/* The same for rows that exactly one rank holds and all others hold as zero bits (vocab-parallel embedding): a select by integer sum, so that -0 survives. More than one rank: dim * size of dtype is a multiple of 8, else LLMPAR_ERR_SHAPE. */
LLMPAR_API llmpar_status llmpar_tp_select(const llmpar_tp *tp, llmpar_stream *stream, const char *tag, int64_t batch, int64_t t, int64_t dim, const void *part, void *out, llmpar_dtype dtype);

#endif
