/* device: the table of everything that touches tensor memory. A user may bring another implementation, or replace one slot.

   Lifecycle. Whoever runs the ranks (llmpar_launch) makes one device a rank. Every operation is an enqueue on a stream: it returns when accepted; argument structs
   and the arrays they point to (gemm segments, tree_sum inputs) are copied before it returns, tensor buffers belong to the stream until an event
   recorded behind it completes. A failure sticks to the stream and returns from the next call or wait. The CPU device completes inside the call, until
   the stream gets a thread of its own (stream_thread).
   Operations never allocate: where one needs scratch, a `_workspace` slot tells how many bytes the caller passes.

   Conventions. All tensors are row-major. `ld` = distance of rows in elements. dtype is the type of all floating buffers of the call unless said
   otherwise: F32, F64 (runs the portable code), and for the operations of forward and backward (gemm .. xent, add, scale, copy_rows) BF16 and F16: these compute in F32 and round once at each store; what is summed stays in llmpar_dtype_sum(dtype),
   called the sum type below: rstd, lse, softmax statistics, RoPE tables and the gradients of parameters. N = rows = batch * t tokens. Results never depend on alignment or on what stands beside an element (docs/exact.md).
   Every chain starts from +0, so a chain of additions is never -0 and absent terms may be left out; a chain of fused products can underflow to -0, so the product adds the +0 of an empty piece. Zero-size calls are fine and do nothing (a gemm with k = 0 stores +0 unless accumulate). */
#ifndef LLMPAR_DEVICE_H
#define LLMPAR_DEVICE_H

#include "base/dtype.h"
#include "base/heap.h"
#include "base/status.h"

#define LLMPAR_DEVICE_ABI 1u

typedef struct llmpar_device llmpar_device;
typedef struct llmpar_stream llmpar_stream;
typedef struct llmpar_event llmpar_event;

/* One piece-part of a product: a and b already point at the part's first element. The parts of one piece are chained in list order.
   Rows of one element may have stride 0: the same element in every row. */
typedef struct llmpar_gemm_segment {
    const void *a, *b;
    int64_t lda, ldb;
    int64_t k;        /* extent of the summed dim in this part, >= 0 */
    int32_t piece;    /* 0 <= piece < pieces, non-decreasing along the list */
    int32_t interleaved; /* 1: b is the first element of whole weights whose rows are interleaved (llmpar_interleave_args), ldb their k, and the part is columns [begin, begin + k) of them; args.n is all their rows, or a multiple of r. NT alone; 0: rows */
    int64_t begin;
} llmpar_gemm_segment;

typedef enum llmpar_gemm_kind { LLMPAR_GEMM_DEFAULT = 0, LLMPAR_GEMM_NT = 1, LLMPAR_GEMM_NN = 2, LLMPAR_GEMM_TN = 3 } llmpar_gemm_kind;

/* c[m,n] = tree over pieces of (chain over the piece's segments of sum_k a*b).
   NT: a[m,k] b[n,k] (y = x w^T);  NN: a[m,k] b[k,n] (dx = dy w);  TN: a[k,m] b[k,n] (dw = dy^T x). DEFAULT is an error.
   A piece without segments counts as +0. The tree over `pieces` leaves is the balanced tree of llmpar_tree_split.
   accumulate: the chain starts from c instead of +0; requires pieces == 1. c must not overlap a or b. */
typedef struct llmpar_gemm_args {
    int64_t m, n;
    void *c;
    int64_t ldc;
    const llmpar_gemm_segment *segments;
    int32_t segment_count, pieces;
    llmpar_gemm_kind kind;
    llmpar_dtype dtype;      /* of a and b */
    llmpar_dtype out_dtype;  /* of c: dtype (default) or llmpar_dtype_sum(dtype); sums are kept in the latter, c is rounded once. accumulate needs the latter */
    int accumulate;
    void *workspace; size_t workspace_bytes;
} llmpar_gemm_args;

/* Weights w[n,k] with their rows interleaved, as products of few rows read them: one stream, and nothing to transpose. A word is 4 bytes: an element of F32, two neighbours of BF16 or F16. Of the first r rows (r is the device's interleaved_rows) come
   word 0 of each, word 1 of each, and so on, then the next r rows; rows that are left when fewer than r are lie as ever. In place, bits of elements stay. k * size of the type is a multiple of 4, else LLMPAR_ERR_SHAPE, and w an address that is one, else LLMPAR_ERR_ARGUMENT; types without r: LLMPAR_ERR_UNSUPPORTED. */
typedef struct llmpar_interleave_args { int64_t n, k; void *w; llmpar_dtype dtype; int back; /* 1: become rows again */ void *workspace; size_t workspace_bytes; } llmpar_interleave_args;

/* How the token rows of a call are laid out for sums over tokens. `batch` sequences of `t` rows each; a sequence's rows are positions [t_begin, t_begin + t) of t_total (sequence parallel: a part).
   `leaves` divides batch: leaf i owns sequences [i*batch/leaves, (i+1)*batch/leaves). */
typedef struct llmpar_tokens {
    int64_t batch, t, t_begin, t_total;
    int64_t leaves;
    int32_t canon;   /* pieces of t_total; t_begin and t_begin + t are piece boundaries when the guarantee holds */
} llmpar_tokens;

/* y[N,D] = x * rstd * w, rstd[N] (sum type) = 1/sqrt(mean(x^2) + eps) (Zhang & Sennrich 2019). If `residual` is not NULL: sum[N,D] = x + residual is stored
   first (sum may equal x or residual) and normalised instead of x. */
typedef struct llmpar_rmsnorm_args {
    int64_t rows, dim;
    const void *x, *residual, *w;
    void *sum, *y, *rstd;
    double eps;
    llmpar_dtype dtype;
} llmpar_rmsnorm_args;

/* dx[N,D] = dresidual (NULL = 0) + gradient through the norm; dx may equal dresidual or dy. dw_leaves[leaves, D] (sum type): per leaf the balanced tree over this call's T-pieces
   (boundaries llmpar_piece_begin(i, t_total, canon) inside [t_begin, t_begin+t); a part-piece counts as its own piece) of the token chain (sequences of the leaf in order, positions of the piece in order) of dy * x * rstd.
   NULL dw_leaves: not computed. With t = t_total there are canon pieces; with a part, its subtree. */
typedef struct llmpar_rmsnorm_backward_args {
    llmpar_tokens tokens; /* rows = batch * t */
    int64_t dim;
    const void *dy, *x, *w, *rstd, *dresidual;
    void *dx, *dw_leaves;
    llmpar_dtype dtype;
} llmpar_rmsnorm_backward_args;

/* In place on x[N, heads, E] with row stride ld: half-split rotation (x[i], x[i+E/2]) by the angles of tables cos/sin[positions, E/2] (sum type), row r of a
   sequence at position position + (r mod t). Su et al. 2021 (RoFormer), eq. 34 in Hugging Face's half-split order. inverse != 0 rotates back (backward). */
typedef struct llmpar_rope_args {
    int64_t batch, t, heads, head_dim, ld, position;
    void *x;
    const void *cosine, *sine;
    llmpar_dtype dtype;
    int inverse;
} llmpar_rope_args;

/* out[b,i,h,:] = softmax_j(scale * q[b,i,h,:] . k[b,j,h*kv_heads/heads,:]) v over j <= i + (tk - tq), j >= doc_start[b*tk + i + (tk - tq)]. lse[b,h,i] = log sum exp (natural), sum type.
   Row i of sequence b of q is q + (b*tq + i)*ldq, head h at + h*E; k, v: row (b*tk_stride + j)*ldk. tk_stride >= tk (a KV cache longer than its fill). doc_start NULL: 0.
   Key tiles are taken at absolute positions counted from the document's start, sequentially. lse may be NULL. Dao et al. 2022. */
typedef struct llmpar_attention_args {
    int64_t batch, tq, tk, tk_stride, heads, kv_heads, head_dim;
    const void *q, *k, *v;
    int64_t ldq, ldk, ldv, ldo;
    const int32_t *doc_start;
    void *out, *lse;
    double scale;
    llmpar_dtype dtype;
    void *workspace; size_t workspace_bytes;
} llmpar_attention_args;

/* Several such calls, as of texts that are generated at once, each with the bits that it has alone. `workspace` of all is the same: as much as attention_workspace says for the largest of each number, batch being the batches of all together; less, or one of its own: LLMPAR_ERR_ARGUMENT. `each` is the caller's, and copied. */
typedef struct llmpar_attention_each_args { const llmpar_attention_args *each; int32_t count; } llmpar_attention_each_args;

/* Gradients; tq == tk == tk_stride. dk, dv[b,j,kv,:] = balanced tree over the heads/kv_heads query heads of the group held in this call (split in half while the count is even, else at
   the largest power of two below) of each query head's own sum. dq, dk, dv have the row strides ldq, ldk, ldv. */
typedef struct llmpar_attention_backward_args {
    llmpar_attention_args forward; /* q, k, v, out, lse as forward left them */
    const void *dout;              /* row stride ldo */
    void *dq, *dk, *dv;
    llmpar_dtype dkv_dtype;        /* of dk, dv: dtype (default), or the sum type where ranks that share a kv head still add theirs */
    int64_t ld_dkv;                /* row stride of dk and dv; 0: ldk, ldv */
} llmpar_attention_backward_args;

/* h[N,F] = gate * sigmoid(gate) * up (Shazeer 2020), row strides ld_in (gate, up) and ld_out (h). h may equal gate or up when the strides are equal. */
typedef struct llmpar_swiglu_args { int64_t rows, dim, ld_in, ld_out; const void *gate, *up; void *h; llmpar_dtype dtype; } llmpar_swiglu_args;
/* dgate, dup (stride ld_in, may equal gate, up) from dh (stride ld_out). h (stride ld_out; may equal dh) is recomputed unless NULL. */
typedef struct llmpar_swiglu_backward_args { int64_t rows, dim, ld_in, ld_out; const void *gate, *up, *dh; void *dgate, *dup, *h; llmpar_dtype dtype; } llmpar_swiglu_backward_args;

/* out[N,D]: row of table[V_local,D] where v_begin <= id < v_begin + v_local, else all-zero bits. ids outside the whole vocabulary were refused earlier. */
typedef struct llmpar_embedding_args { int64_t rows, dim, v_begin, v_local; const int32_t *ids; const void *table; void *out; llmpar_dtype dtype; } llmpar_embedding_args;
/* dtable[V_local,D] (sum type), fully overwritten: balanced tree over leaves of the token chain of dout rows with that id. tokens.t == t_total here. */
typedef struct llmpar_embedding_backward_args {
    llmpar_tokens tokens;
    int64_t dim, v_begin, v_local;
    const int32_t *ids; const void *dout; void *dtable;
    llmpar_dtype dtype;
    void *workspace; size_t workspace_bytes;
} llmpar_embedding_backward_args;

/* Vocab-parallel softmax cross-entropy in steps, so that the caller combines over "tp" between them (Shoeybi et al. 2019, section 3).
   max, target_logit and sum are of the sum type. logits[N, v_local] with row stride ld; columns are vocabulary ids [v_begin, v_begin + v_local) of v_total; target < 0 = not counted. Pieces: llmpar_piece_begin(i, v_total, canon). */
typedef struct llmpar_xent_args {
    int64_t rows, ld, v_begin, v_local, v_total;
    int32_t canon;
    void *logits;
    const int32_t *targets; /* [N] */
    void *max;              /* [N] row maximum; -inf if v_local = 0 */
    void *target_logit;     /* [N] the target's logit if it is in this shard, else -inf */
    void *sum;              /* [N] balanced tree over this shard's pieces of sum exp(logit - max) */
    llmpar_dtype dtype;
} llmpar_xent_args;
/* xent_max: writes max, target_logit. xent_sum: reads the global max, writes sum. xent_backward: logits <- (exp(logit - max)/sum - [id == target]) * scale in place,
   zero rows where target < 0. */
typedef struct llmpar_xent_backward_args { llmpar_xent_args forward; float scale; } llmpar_xent_backward_args;
/* accumulator[0..71] (int64, base/exact_sum.h) += f64 token losses log(sum) + max - target_logit of rows with target >= 0; token_loss[N] (f64, may be NULL) gets each (0 if not counted). */
typedef struct llmpar_xent_loss_args { int64_t rows; const void *max, *target_logit, *sum; const int32_t *targets; int64_t *accumulator; double *token_loss; llmpar_dtype dtype; } llmpar_xent_loss_args;

/* out[i] = balanced tree over j < n of in[j][i], i < count. out may equal any one in[j]. dtypes F32, F64, I64, U64; n >= 1. */
typedef struct llmpar_tree_sum_args { const void *const *in; int32_t n; size_t count; void *out; llmpar_dtype dtype; } llmpar_tree_sum_args;
/* out[0..outs-1][i] = the same; every out may equal one in[j], no two are the same. n = 1 is a copy, of any dtype. */
typedef struct llmpar_tree_sum_to_args { const void *const *in; int32_t n, outs; size_t count; void *const *out; llmpar_dtype dtype; } llmpar_tree_sum_to_args;
/* out[i] = max over j of in[j][i]; F32, F64, I64. NaN wins. */
typedef struct llmpar_tree_sum_args llmpar_max_args;
/* out = a + b; out may equal a or b. */
typedef struct llmpar_add_args { size_t count; const void *a, *b; void *out; llmpar_dtype dtype; } llmpar_add_args;
/* x *= factor */
typedef struct llmpar_scale_args { size_t count; void *x; double factor; llmpar_dtype dtype; } llmpar_scale_args;
typedef struct llmpar_cast_args { size_t count; const void *in; llmpar_dtype in_dtype; void *out; llmpar_dtype out_dtype; } llmpar_cast_args;
/* rows x width elements of `size` bytes each between strided matrices (strides in elements); no overlap. */
typedef struct llmpar_copy_rows_args { int64_t rows, width, ld_in, ld_out; size_t size; const void *in; void *out; } llmpar_copy_rows_args;

/* AdamW with decoupled decay (Loshchilov & Hutter 2019), element-wise, fma order written out in the portable kernel:
   g' = g*grad_scale; m = b1*m + (1-b1)*g'; v = b2*v + (1-b2)*g'^2; p = p*(1 - lr*decay) - lr * (m/c1) / (sqrt(v/c2) + eps). c1 = 1-b1^step, c2 = 1-b2^step. */
typedef struct llmpar_adamw_args { size_t count; void *p; const void *g; void *m, *v; double lr, beta1, beta2, eps, decay, correction1, correction2, grad_scale; llmpar_dtype dtype; } llmpar_adamw_args;
/* SGD with momentum and decoupled decay: g' = g*grad_scale, cut to [-limit, limit] where limit > 0; m = momentum*m + g'; p = p*(1 - lr*decay) - lr*m. m NULL: none, p takes g' itself.
   limit <= 0: off. A NaN in g stays one. */
typedef struct llmpar_sgd_args { size_t count; void *p; const void *g; void *m; double lr, momentum, decay, limit, grad_scale; llmpar_dtype dtype; } llmpar_sgd_args;
/* *largest = max(*largest, largest |x|); NaN wins. */
typedef struct llmpar_largest_args { size_t count; const void *x; double *largest; llmpar_dtype dtype; } llmpar_largest_args;

/* AdaLomo (Lv et al. 2023, arXiv 2310.10195), whose second moments are factored by row and column as Adafactor's (Shazeer & Stern 2018). g' = g*grad_scale. A call works on a part of a matrix: elements [begin, begin + count) of
   a row-major rectangle of `cols` columns; p and g point at the first of these, rows and columns count from the rectangle's first.
   Sums over ranks have no order, since they are integers: with 2^e the smallest power of two above *largest * grad_scale (*largest: of |g| of the whole tensor, e >= -1000), the square of an element counts floor((g'/2^e)^2 2^bits),
   and one more unless it is 0, so that no small one is lost. bits = 62 - log2 of the terms of a sum, rounded up.
   factor_sum: row_sums[r] += over the part's columns of row r, with row_bits; col_sums[c] += over its rows, with col_bits. Nothing if *largest * grad_scale is not below 2^1000. */
typedef struct llmpar_factor_sum_args { int64_t begin, count, cols; const void *g; int64_t *row_sums, *col_sums; int32_t row_bits, col_bits; const double *largest; double grad_scale; llmpar_dtype dtype; } llmpar_factor_sum_args;
/* moment[i] = beta*moment[i] + (1-beta) * (sums[i] as a number / terms + eps), in f64, rounded once; NaN if *largest * grad_scale is not below 2^1000. factor[i] = 1/sqrt(moment[i]), or, by_mean, sqrt(mean / moment[i]) with mean that of
   all moments (chain in f64). */
typedef struct llmpar_factor_moment_args { int64_t count; const int64_t *sums; int64_t terms; int32_t bits, by_mean; const double *largest; void *moment, *factor; double grad_scale, beta, eps; llmpar_dtype dtype; } llmpar_factor_moment_args;
/* u = (g' * row_factor[r]) * col_factor[c], or with row_factor NULL: u = g' / sqrt(moment), moment[count].
   adalomo_square: first moment = beta*moment + (1-beta) * (g'^2 + eps) where there are no factors; then update_squares[0..71] += exact squares of u, unless NULL. p is not looked at.
   adalomo: p = p*(1 - rate*decay) - rate / max(1, rms of u) * u, rate = lr * max(1e-3, rms of p); the rms of u and p over the `elements` of the whole tensor, from the squares in update_squares and param_squares. */
typedef struct llmpar_adalomo_args {
    int64_t begin, count, cols, elements;
    void *p; const void *g;
    const void *row_factor, *col_factor;
    void *moment;
    int64_t *update_squares; const int64_t *param_squares;
    double lr, decay, grad_scale, beta, eps;
    llmpar_dtype dtype;
} llmpar_adalomo_args;
/* accumulator[0..71] += exact squares of x (F32; F64 squares are rounded once). Infinities and NaNs are counted in the accumulator. */
typedef struct llmpar_square_sum_args { size_t count; const void *x; int64_t *accumulator; llmpar_dtype dtype; } llmpar_square_sum_args;

struct llmpar_device {
    uint32_t abi, size;       /* LLMPAR_DEVICE_ABI, sizeof(llmpar_device): a slot beyond `size` is empty */
    const char *name;         /* "cpu avx512": device type and dispatch level; ranks must agree */
    llmpar_error *error;      /* where failures leave their text; the rank's */
    void *state;              /* the implementation's own */
    size_t alignment;         /* every alloc is aligned to it; a power of two >= 64 */

    /* memory; bytes may be 0. free takes NULL, and waits for what was enqueued before it on any stream: the arena, which gives idle blocks back when memory is short, knows no streams. */
    llmpar_status (*alloc)(llmpar_device *device, size_t bytes, void **out);
    void (*free)(llmpar_device *device, void *memory, size_t bytes);
    llmpar_status (*copy)(llmpar_device *device, llmpar_stream *stream, void *out, const void *in, size_t bytes);
    llmpar_status (*zero)(llmpar_device *device, llmpar_stream *stream, void *out, size_t bytes);

    /* streams and events. An event may be recorded again; waiting on one never recorded is no wait. synchronize waits for one stream on the host and
       returns its sticky failure. event_synchronize waits on the host. host_call runs fn(arg) in stream order (the thread and MPI communicators use it). */
    llmpar_status (*stream_create)(llmpar_device *device, const char *name, llmpar_stream **out);
    void (*stream_destroy)(llmpar_device *device, llmpar_stream *stream);
    llmpar_status (*synchronize)(llmpar_device *device, llmpar_stream *stream);
    llmpar_status (*event_create)(llmpar_device *device, llmpar_event **out);
    void (*event_destroy)(llmpar_device *device, llmpar_event *event);
    llmpar_status (*event_record)(llmpar_device *device, llmpar_stream *stream, llmpar_event *event);
    llmpar_status (*event_wait)(llmpar_device *device, llmpar_stream *stream, llmpar_event *event);
    llmpar_status (*event_synchronize)(llmpar_device *device, llmpar_event *event);
    llmpar_status (*host_call)(llmpar_device *device, llmpar_stream *stream, llmpar_status (*fn)(void *arg), const void *arg, size_t arg_bytes); /* arg is copied, arg_bytes <= 256 */

    /* operations */
    llmpar_status (*gemm)(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args);
    size_t (*gemm_workspace)(llmpar_device *device, const llmpar_gemm_args *args); /* pointers may be NULL in queries; reads m, n, kind, dtype, out_dtype, pieces and the segments' k. Enough for a smaller m too, as chunks' ends have it */
    llmpar_status (*rmsnorm)(llmpar_device *device, llmpar_stream *stream, const llmpar_rmsnorm_args *args);
    llmpar_status (*rmsnorm_backward)(llmpar_device *device, llmpar_stream *stream, const llmpar_rmsnorm_backward_args *args);
    llmpar_status (*rope)(llmpar_device *device, llmpar_stream *stream, const llmpar_rope_args *args);
    llmpar_status (*attention)(llmpar_device *device, llmpar_stream *stream, const llmpar_attention_args *args);
    size_t (*attention_workspace)(llmpar_device *device, const llmpar_attention_args *args); /* enough for smaller tq and tk too */
    llmpar_status (*attention_backward)(llmpar_device *device, llmpar_stream *stream, const llmpar_attention_backward_args *args);
    size_t (*attention_backward_workspace)(llmpar_device *device, const llmpar_attention_backward_args *args);
    llmpar_status (*swiglu)(llmpar_device *device, llmpar_stream *stream, const llmpar_swiglu_args *args);
    llmpar_status (*swiglu_backward)(llmpar_device *device, llmpar_stream *stream, const llmpar_swiglu_backward_args *args);
    llmpar_status (*embedding)(llmpar_device *device, llmpar_stream *stream, const llmpar_embedding_args *args);
    llmpar_status (*embedding_backward)(llmpar_device *device, llmpar_stream *stream, const llmpar_embedding_backward_args *args);
    size_t (*embedding_backward_workspace)(llmpar_device *device, const llmpar_embedding_backward_args *args);
    llmpar_status (*xent_max)(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_args *args);
    llmpar_status (*xent_sum)(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_args *args);
    llmpar_status (*xent_loss)(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_loss_args *args);
    llmpar_status (*xent_backward)(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_backward_args *args);
    llmpar_status (*tree_sum)(llmpar_device *device, llmpar_stream *stream, const llmpar_tree_sum_args *args);
    llmpar_status (*max)(llmpar_device *device, llmpar_stream *stream, const llmpar_max_args *args);
    llmpar_status (*add)(llmpar_device *device, llmpar_stream *stream, const llmpar_add_args *args);
    llmpar_status (*scale)(llmpar_device *device, llmpar_stream *stream, const llmpar_scale_args *args);
    llmpar_status (*cast)(llmpar_device *device, llmpar_stream *stream, const llmpar_cast_args *args);
    llmpar_status (*copy_rows)(llmpar_device *device, llmpar_stream *stream, const llmpar_copy_rows_args *args);
    llmpar_status (*adamw)(llmpar_device *device, llmpar_stream *stream, const llmpar_adamw_args *args);
    llmpar_status (*square_sum)(llmpar_device *device, llmpar_stream *stream, const llmpar_square_sum_args *args);

    /* optional: without them the optimizers that need them are refused */
    llmpar_status (*sgd)(llmpar_device *device, llmpar_stream *stream, const llmpar_sgd_args *args);
    llmpar_status (*largest)(llmpar_device *device, llmpar_stream *stream, const llmpar_largest_args *args);
    llmpar_status (*factor_sum)(llmpar_device *device, llmpar_stream *stream, const llmpar_factor_sum_args *args);
    llmpar_status (*factor_moment)(llmpar_device *device, llmpar_stream *stream, const llmpar_factor_moment_args *args);
    llmpar_status (*adalomo_square)(llmpar_device *device, llmpar_stream *stream, const llmpar_adalomo_args *args);
    llmpar_status (*adalomo)(llmpar_device *device, llmpar_stream *stream, const llmpar_adalomo_args *args);

    /* Threads. From now on the stream runs on a thread of its own, in order, beside the rank's thread and the other streams; with the same bits. Only the rank's own thread enqueues, waits, allocates and frees.
       What runs on a stream's thread (host calls) may use operations with stream NULL, which means: now, on this thread; it must not use the rank's heap, nor write the rank's error but through thread_error.
       Empty slot: the device has no such threads (llmpar_device_stream_thread says so). */
    llmpar_status (*stream_thread)(llmpar_device *device, llmpar_stream *stream);
    /* Where failures on the calling thread leave their text, to be taken over by who waits for the stream; NULL: this is the thread of no stream. Empty: no thread is one. */
    llmpar_error *(*thread_error)(llmpar_device *device);
    /* How many of the rank's threads, its own included, are not waiting in the device for another one. Empty: 1. From any thread. */
    int32_t (*threads_running)(llmpar_device *device);
    /* tree_sum with several results, at once and on the calling thread, done on return: every operand is read once and every line is written while it is at hand. Empty: tree_sum with stream NULL, and copies of
       its result. Whoever replaces tree_sum in a table replaces or empties this one too. */
    llmpar_status (*tree_sum_to)(llmpar_device *device, const llmpar_tree_sum_to_args *args);

    /* Devices with memory of their own. */
    int32_t apart;            /* 1: the host cannot read or write what alloc gives; copy, zero, operations and communicators made for the device can, and copy takes host memory on either side. 0: it is the host's own */
    /* Host memory for copies that run beside other work (pinned). Empty: any host memory serves. free takes NULL, after what uses the memory is done. */
    llmpar_status (*host_alloc)(llmpar_device *device, size_t bytes, void **out);
    void (*host_free)(llmpar_device *device, void *memory, size_t bytes);
    /* The platform's own handle of a stream (cudaStream_t), for libraries that enqueue on it; NULL stream: the one that operations without a stream use. Empty: there is none. Local. */
    void *(*native_stream)(llmpar_device *device, llmpar_stream *stream);
    const char *place;        /* which unit of its machine the device is: "0000:3b:00.0", for errors of ranks that should not share one; NULL: it is not said */
    void *memory_state;       /* of whoever replaces alloc and free in the table, as a communicator does whose transport has memory of its own; NULL: nobody has. An implementation that calls itself goes through the table */

    /* Regions that come again. Between begin and end, operations on the stream may be noted instead of enqueued: at the end, or before anything that is none (copies, events, waits, host calls, collectives, native_stream,
       free), they are enqueued in their order, or, where a region with this key had the same arguments before, launched as one. Results are the same bits; a refusal of an operation may come from region_end, and sticks to the
       stream. One region at a time, no stream NULL; end is due after a failure too. Whoever replaces an operation and enqueues by native_stream asks for that in every call. Both empty: no effect, LLMPAR_ERR_UNSUPPORTED is
       the caller's to say. Local. */
    llmpar_status (*region_begin)(llmpar_device *device, llmpar_stream *stream, uint64_t key);
    llmpar_status (*region_end)(llmpar_device *device, llmpar_stream *stream);

    /* Weights with interleaved rows. How many are taken together, for weights of this type; 0: there is no such product. All three empty: 0. Whoever replaces gemm in a table replaces or empties these. Local. */
    int32_t (*interleaved_rows)(llmpar_device *device, llmpar_dtype dtype);
    llmpar_status (*interleave)(llmpar_device *device, llmpar_stream *stream, const llmpar_interleave_args *args);
    size_t (*interleave_workspace)(llmpar_device *device, const llmpar_interleave_args *args); /* reads k and dtype */
    /* NULL: `attention` one by one. Whoever replaces attention in a table replaces or empties this. */
    llmpar_status (*attention_each)(llmpar_device *device, llmpar_stream *stream, const llmpar_attention_each_args *args);
};

/* stream_thread, LLMPAR_ERR_UNSUPPORTED where the slot is empty. Local. */
LLMPAR_API llmpar_status llmpar_device_stream_thread(llmpar_device *device, llmpar_stream *stream);
/* Where a failure of the calling thread leaves its text: own, the rank's error, unless this is a stream's thread. device may be NULL. Local. */
LLMPAR_API llmpar_error *llmpar_device_thread_error(llmpar_device *device, llmpar_error *own);
/* threads_running with its fallback. Local. */
LLMPAR_API int32_t llmpar_device_threads_running(llmpar_device *device);

/* interleaved_rows with its fallback. Local. */
LLMPAR_API int32_t llmpar_device_interleaved_rows(llmpar_device *device, llmpar_dtype dtype);
/* attention_each with its fallback. Local. */
LLMPAR_API llmpar_status llmpar_device_attention_each(llmpar_device *device, llmpar_stream *stream, const llmpar_attention_each_args *args);
/* tree_sum_to with its fallback. Local. */
LLMPAR_API llmpar_status llmpar_device_tree_sum_to(llmpar_device *device, const llmpar_tree_sum_to_args *args);

/* Host memory for copies: host_alloc's, or the heap's where the slot is empty; uninitialised. LLMPAR_ERR_MEMORY, whose text is the caller's where it is the heap's. Local; free takes NULL and the size that was asked for. */
LLMPAR_API llmpar_status llmpar_device_host_alloc(llmpar_device *device, llmpar_heap *heap, size_t bytes, void **out);
LLMPAR_API void llmpar_device_host_free(llmpar_device *device, llmpar_heap *heap, void *memory, size_t bytes);
/* Is what alloc gives out of the host's reach? `apart` with its fallback: 0. Local. */
LLMPAR_API int llmpar_device_apart(const llmpar_device *device);

/* Host calls that run one after the other, in the order in which they were made, whatever their streams: what a communicator's calls have to do where streams have threads. Zero-initialised; belongs to the
   rank's own thread. Where no stream can have a thread it is a plain host_call. */
typedef struct llmpar_order {
    llmpar_device *device; /* of the event */
    llmpar_event *event;   /* behind the last call; owned */
} llmpar_order;
LLMPAR_API llmpar_status llmpar_order_call(llmpar_order *order, llmpar_device *device, llmpar_stream *stream, llmpar_status (*fn)(void *arg), const void *arg, size_t arg_bytes);
/* Waits on the host until the last call is done. */
LLMPAR_API llmpar_status llmpar_order_wait(llmpar_order *order);
LLMPAR_API void llmpar_order_destroy(llmpar_order *order);

#endif
