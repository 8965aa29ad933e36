#include "tp/tp.h"

#include <string.h>

#include "base/size.h"
#include "tables/tables_internal.h"

LLMPAR_DEF llmpar_status llmpar_tp_init(llmpar_ctx *ctx, llmpar_comm *comm, int32_t canon, int32_t kv_heads, int32_t sequence_parallel, llmpar_tp *out)
{
    memset(out, 0, sizeof *out);
    out->ctx = ctx;
    out->comm = comm;
    out->rank = comm->rank;
    out->ranks = comm->ranks;
    if (canon == 0) canon = 8;
    if (!llmpar_is_pow2(canon)) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "tp: canon = %d is not a power of two", (int)canon);
    /* Ranks that do not divide the pieces still give a deterministic result, one piece a rank, but one that depends on tp. */
    out->pieces = canon % comm->ranks == 0 ? canon : comm->ranks;
    out->sequence_parallel = sequence_parallel && comm->ranks > 1;
    out->replicas = 1;
    if (kv_heads % comm->ranks != 0) {
        if (kv_heads <= 0 || comm->ranks % kv_heads != 0)
            return llmpar_fail(ctx, LLMPAR_ERR_MESH, "tp: num_key_value_heads = %d and tp = %d: one must divide the other", (int)kv_heads, (int)comm->ranks);
        out->replicas = comm->ranks / kv_heads;
        return llmpar_comm_split(comm, comm->rank / out->replicas, comm->rank, "tp.kv", &out->kv);
    }
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_tp_destroy(llmpar_tp *tp)
{
    if (!tp) return;
    llmpar_comm_destroy(tp->kv);
    tp->kv = NULL;
}

LLMPAR_DEF int64_t llmpar_tp_begin(const llmpar_tp *tp, int64_t grains) { return llmpar_piece_begin(tp->rank, grains, tp->ranks); }

LLMPAR_DEF int64_t llmpar_tp_count(const llmpar_tp *tp, int64_t grains)
{
    return llmpar_piece_begin(tp->rank + 1, grains, tp->ranks) - llmpar_piece_begin(tp->rank, grains, tp->ranks);
}

/* Enough for one piece a query head group: operands (q, k, v) x local pieces. */
#define LLMPAR__TP_SEGMENTS 192

/* First of this operand's own grains whose query grain is >= limit: ceil(limit / per), clamped to what the rank holds. */
static int64_t llmpar__tp_operand_grain(const llmpar_tp_operand *operand, int64_t limit)
{
    int64_t per = operand->per > 0 ? operand->per : 1;
    int64_t grain = (limit + per - 1) / per, end = operand->begin + operand->count;
    return grain < operand->begin ? operand->begin : grain > end ? end : grain;
}

/* The segments of this rank's pieces, in piece order and within a piece in operand order; -1 when they do not fit. With pointers = 0 only extents are filled in. */
static int32_t llmpar__tp_segments(const llmpar_tp *tp, llmpar_gemm_kind kind, int64_t grains, const llmpar_tp_operand *operands, int32_t operand_count, llmpar_dtype dtype, int pointers,
                                   llmpar_gemm_segment *segments)
{
    size_t size = llmpar_dtype_size(dtype);
    int32_t local = tp->pieces / tp->ranks, count = 0;
    for (int32_t piece = 0; piece < local; piece++) {
        int64_t global = (int64_t)tp->rank * local + piece;
        int64_t low = llmpar_piece_begin(global, grains, tp->pieces), high = llmpar_piece_begin(global + 1, grains, tp->pieces);
        for (int32_t o = 0; o < operand_count; o++) {
            const llmpar_tp_operand *operand = &operands[o];
            int64_t first = llmpar__tp_operand_grain(operand, low), last = llmpar__tp_operand_grain(operand, high);
            if (last <= first) continue;
            if (count == LLMPAR__TP_SEGMENTS) return -1;
            llmpar_gemm_segment *segment = &segments[count++];
            memset(segment, 0, sizeof *segment);
            int64_t skip = (first - operand->begin) * operand->grain;
            segment->k = (last - first) * operand->grain;
            segment->piece = piece;
            segment->lda = operand->lda;
            segment->ldb = operand->ldb;
            segment->interleaved = operand->interleaved;
            segment->begin = operand->interleaved ? skip : 0;
            if (pointers) {
                segment->a = (const char *)operand->a + (size_t)skip * size;
                segment->b = (const char *)operand->b + (size_t)(operand->interleaved ? 0 : kind == LLMPAR_GEMM_NT ? skip : skip * operand->ldb) * size;
            }
        }
    }
    return count;
}

LLMPAR_DEF llmpar_dtype llmpar_tp_partial_dtype(const llmpar_tp *tp, llmpar_dtype dtype) { return tp->ranks > 1 ? llmpar_dtype_sum(dtype) : dtype; }

LLMPAR_DEF size_t llmpar_tp_partial_bytes(const llmpar_tp *tp, int64_t batch, int64_t t, int64_t dim, llmpar_dtype dtype)
{
    llmpar_dtype wide = llmpar_tp_partial_dtype(tp, dtype);
    int64_t rows = batch * t + (tp->sequence_parallel && wide != dtype ? batch * (t / tp->ranks) : 0);
    return (size_t)(rows * dim) * llmpar_dtype_size(wide);
}

/* Returns whether the segments fit. */
static int llmpar__tp_partial_args(const llmpar_tp *tp, llmpar_gemm_kind kind, int64_t rows, int64_t dim, int64_t grains, const llmpar_tp_operand *operands, int32_t operand_count, llmpar_dtype dtype, int pointers, llmpar_gemm_args *args, llmpar_gemm_segment *segments)
{
    memset(args, 0, sizeof *args);
    args->segment_count = llmpar__tp_segments(tp, kind, grains, operands, operand_count, dtype, pointers, segments);
    args->m = rows;
    args->n = args->ldc = dim;
    args->segments = segments;
    args->pieces = tp->pieces / tp->ranks;
    args->kind = kind;
    args->dtype = dtype;
    args->out_dtype = llmpar_tp_partial_dtype(tp, dtype);
    return args->segment_count >= 0;
}

LLMPAR_DEF llmpar_status llmpar_tp_partial(const llmpar_tp *tp, llmpar_stream *stream, llmpar_gemm_kind kind, int64_t rows, int64_t dim, int64_t grains, const llmpar_tp_operand *operands, int32_t operand_count,
                                           llmpar_dtype dtype, void *out, void *workspace, size_t workspace_bytes)
{
    llmpar_gemm_segment segments[LLMPAR__TP_SEGMENTS];
    llmpar_gemm_args args;
    if (!llmpar__tp_partial_args(tp, kind, rows, dim, grains, operands, operand_count, dtype, 1, &args, segments))
        return llmpar_fail(tp->ctx, LLMPAR_ERR_SHAPE, "tp: %d local pieces with %d operands need more than %d segments", (int)args.pieces, (int)operand_count, LLMPAR__TP_SEGMENTS);
    args.c = out;
    args.workspace = workspace;
    args.workspace_bytes = workspace_bytes;
    return tp->ctx->device->gemm(tp->ctx->device, stream, &args);
}

LLMPAR_DEF size_t llmpar_tp_partial_workspace(const llmpar_tp *tp, llmpar_gemm_kind kind, int64_t rows, int64_t dim, int64_t grains, const llmpar_tp_operand *operands, int32_t operand_count, llmpar_dtype dtype)
{
    llmpar_gemm_segment segments[LLMPAR__TP_SEGMENTS];
    llmpar_gemm_args args;
    /* the call itself reports what does not fit */
    return llmpar__tp_partial_args(tp, kind, rows, dim, grains, operands, operand_count, dtype, 0, &args, segments) ? tp->ctx->device->gemm_workspace(tp->ctx->device, &args) : 0;
}

static void llmpar__tp_product_args(llmpar_gemm_args *args, llmpar_gemm_segment *segment, llmpar_gemm_kind kind, int64_t m, int64_t n, int64_t k, llmpar_dtype dtype)
{
    memset(args, 0, sizeof *args);
    memset(segment, 0, sizeof *segment);
    segment->k = k;
    args->m = m;
    args->n = args->ldc = n;
    args->segments = segment;
    args->segment_count = args->pieces = 1;
    args->kind = kind;
    args->dtype = dtype;
}

LLMPAR_DEF llmpar_status llmpar_tp_product(const llmpar_tp *tp, llmpar_stream *stream, llmpar_gemm_kind kind, int64_t m, int64_t n, int64_t k, const void *a, int64_t lda, const void *b, int64_t ldb, void *out,
                                           int64_t ldo, llmpar_dtype dtype, void *workspace, size_t workspace_bytes)
{
    llmpar_gemm_args args;
    llmpar_gemm_segment segment;
    llmpar__tp_product_args(&args, &segment, kind, m, n, k, dtype);
    segment.a = a;
    segment.b = b;
    segment.lda = lda;
    segment.ldb = ldb;
    args.c = out;
    args.ldc = ldo;
    args.workspace = workspace;
    args.workspace_bytes = workspace_bytes;
    return tp->ctx->device->gemm(tp->ctx->device, stream, &args);
}

LLMPAR_DEF size_t llmpar_tp_product_workspace(const llmpar_tp *tp, llmpar_gemm_kind kind, int64_t m, int64_t n, int64_t k, llmpar_dtype dtype)
{
    llmpar_gemm_args args;
    llmpar_gemm_segment segment;
    llmpar__tp_product_args(&args, &segment, kind, m, n, k, dtype);
    return tp->ctx->device->gemm_workspace(tp->ctx->device, &args);
}

/* One piece a leaf: rows [i*rows/leaves, (i+1)*rows/leaves). The list lives on the rank's heap since leaves have no cap. */
static llmpar_status llmpar__tp_leaves(const llmpar_tp *tp, int64_t rows, int64_t leaves, const void *dy, int64_t lddy, const void *x, int64_t ldx, llmpar_dtype dtype, llmpar_gemm_args *args)
{
    llmpar_gemm_segment *segments = LLMPAR__ZALLOC(llmpar_gemm_segment, &tp->ctx->heap, (size_t)leaves);
    if (!segments) return llmpar_fail(tp->ctx, LLMPAR_ERR_MEMORY, "tp: no memory for %lld gemm segments", (long long)leaves);
    size_t size = llmpar_dtype_size(dtype);
    int64_t each = rows / leaves;
    for (int64_t i = 0; i < leaves; i++) {
        segments[i].k = each;
        segments[i].piece = (int32_t)i;
        segments[i].lda = lddy;
        segments[i].ldb = ldx;
        if (dy) segments[i].a = (const char *)dy + (size_t)(i * each * lddy) * size;
        if (x) segments[i].b = (const char *)x + (size_t)(i * each * ldx) * size;
    }
    args->segments = segments;
    args->segment_count = args->pieces = (int32_t)leaves;
    args->kind = LLMPAR_GEMM_TN;
    args->dtype = dtype;
    args->out_dtype = llmpar_dtype_sum(dtype);
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_tp_weight_gradient(const llmpar_tp *tp, llmpar_stream *stream, int64_t rows, int64_t leaves, int64_t out_dim, int64_t in_dim, const void *dy, int64_t lddy, const void *x, int64_t ldx, void *dw, int accumulate,
                                                   llmpar_dtype dtype, void *workspace, size_t workspace_bytes)
{
    LLMPAR__ZEROED(llmpar_gemm_args, args);
    if (leaves < 1 || rows % leaves) return llmpar_fail(tp->ctx, LLMPAR_ERR_SHAPE, "tp: %lld leaves do not divide %lld rows", (long long)leaves, (long long)rows);
    llmpar_status status = llmpar__tp_leaves(tp, rows, leaves, dy, lddy, x, ldx, dtype, &args);
    if (status) return status;
    args.m = out_dim;
    args.n = args.ldc = in_dim;
    args.c = dw;
    args.accumulate = accumulate;
    args.workspace = workspace;
    args.workspace_bytes = workspace_bytes;
    status = tp->ctx->device->gemm(tp->ctx->device, stream, &args);
    llmpar_heap_free(&tp->ctx->heap, (void *)(uintptr_t)args.segments);
    return status;
}

LLMPAR_DEF size_t llmpar_tp_weight_gradient_workspace(const llmpar_tp *tp, int64_t rows, int64_t leaves, int64_t out_dim, int64_t in_dim, llmpar_dtype dtype)
{
    LLMPAR__ZEROED(llmpar_gemm_args, args);
    if (llmpar__tp_leaves(tp, rows, leaves, NULL, out_dim, NULL, in_dim, dtype, &args)) return SIZE_MAX;
    args.m = out_dim;
    args.n = args.ldc = in_dim;
    size_t bytes = tp->ctx->device->gemm_workspace(tp->ctx->device, &args);
    llmpar_heap_free(&tp->ctx->heap, (void *)(uintptr_t)args.segments);
    return bytes;
}

LLMPAR_DEF llmpar_status llmpar_tp_gather(const llmpar_tp *tp, llmpar_stream *stream, const char *tag, int64_t batch, int64_t t, int64_t dim, const void *local, void *full, llmpar_dtype dtype)
{
    llmpar_collective call = llmpar__comm_collective(local, full, (size_t)(t / tp->ranks * dim), dtype, tag);
    call.blocks = (size_t)batch;
    return llmpar_all_gather(tp->comm, stream, &call);
}

static llmpar_status llmpar__tp_combine(const llmpar_tp *tp, llmpar_stream *stream, const char *tag, int64_t batch, int64_t t, size_t row, const void *in, void *out, llmpar_dtype dtype)
{
    if (tp->ranks == 1) return in == out ? LLMPAR_OK : tp->ctx->device->copy(tp->ctx->device, stream, out, in, (size_t)(batch * t) * row * llmpar_dtype_size(dtype)); /* of any type and width */
    llmpar_collective call = llmpar__comm_collective(in, out, (size_t)(batch * t) * row, dtype, tag);
    if (tp->sequence_parallel) {
        call.count = (size_t)(t / tp->ranks) * row;
        call.blocks = (size_t)batch;
        return llmpar_reduce_scatter(tp->comm, stream, &call);
    }
    return llmpar_all_reduce(tp->comm, stream, &call);
}

LLMPAR_DEF llmpar_status llmpar_tp_reduce(const llmpar_tp *tp, llmpar_stream *stream, const char *tag, int64_t batch, int64_t t, int64_t dim, void *partial, void *out, llmpar_dtype dtype)
{
    llmpar_dtype wide = llmpar_tp_partial_dtype(tp, dtype);
    if (wide == dtype) return llmpar__tp_combine(tp, stream, tag, batch, t, (size_t)dim, partial, out, dtype);
    void *sum = tp->sequence_parallel ? (char *)partial + (size_t)(batch * t * dim) * llmpar_dtype_size(wide) : partial;
    llmpar_status status = llmpar__tp_combine(tp, stream, tag, batch, t, (size_t)dim, partial, sum, wide);
    return status ? status : llmpar__device_cast(tp->ctx->device, stream, sum, wide, out, dtype, (size_t)(batch * (tp->sequence_parallel ? t / tp->ranks : t) * dim));
}

LLMPAR_DEF llmpar_status llmpar_tp_select(const llmpar_tp *tp, llmpar_stream *stream, const char *tag, int64_t batch, int64_t t, int64_t dim, const void *part, void *out, llmpar_dtype dtype)
{
    size_t bytes = (size_t)dim * llmpar_dtype_size(dtype);
    if (tp->ranks == 1) return llmpar__tp_combine(tp, stream, tag, batch, t, (size_t)dim, part, out, dtype);
    if (bytes % 8) return llmpar_fail(tp->ctx, LLMPAR_ERR_SHAPE, "tp: rows of %lld elements are no multiple of 8 bytes", (long long)dim);
    return llmpar__tp_combine(tp, stream, tag, batch, t, bytes / 8, part, out, LLMPAR_U64);
}

#undef LLMPAR__TP_SEGMENTS
