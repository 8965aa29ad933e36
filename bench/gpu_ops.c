/* gpu_ops: the CUDA device, operation by operation, at the shapes of Llama-3.2-1B: those that memory limits beside the card's own copy, products in the exact order beside the library's, attention beside the library's square product.

   Bytes are those that have to move: each operand read once, each result written once. A reading is some milliseconds of one operation again and again on a stream, each time on other memory (more of it than the second-level cache
   holds), from the first call to the end of the wait; the bound is read the same way before and after it (bench.h). Copy: device->copy of 256 MB, read and written counted. */
#include "bench.h"
#include "llmpar_cuda.h"

enum { NORM, NORM_RESIDUAL, NORM_BACKWARD, NORM_IN_PLACE, NORM_LONG, NORM_PLAIN, ROPE, SWIGLU, SWIGLU_BACKWARD, EMBEDDING, EMBEDDING_BACKWARD, XENT_MAX, XENT_SUM, XENT_BACKWARD, ADD, SCALE, COPY_ROWS, TO_HALF, FROM_HALF, TREE2, TREE8, MAX2, ADAMW, SGD, SQUARE_SUM, LARGEST, FACTOR_SUM, ADALOMO_SQUARE, ADALOMO, OPERATIONS };
static const struct { const char *name; int f32_only; } operation[OPERATIONS] = {
    {"rmsnorm", 0}, {"rmsnorm, residual", 0}, {"rmsnorm backward", 0}, {"rmsnorm backward, in place", 0}, {"rmsnorm backward, one sequence", 0}, {"rmsnorm backward, fast", 0}, {"rope", 0}, {"swiglu", 0}, {"swiglu backward", 0}, {"embedding", 0}, {"embedding backward", 0}, {"xent max", 0}, {"xent sum", 0},
    {"xent backward", 0}, {"add", 0}, {"scale", 0}, {"copy rows", 0}, {"cast to bf16", 1}, {"cast from bf16", 1}, {"tree sum of 2", 1}, {"tree sum of 8", 1}, {"max of 2", 1}, {"adamw", 1}, {"sgd with momentum", 1}, {"square sum", 1}, {"largest", 1}, {"factor sum", 1}, {"adalomo square", 1}, {"adalomo", 1},
};

typedef struct shape { int64_t batch, t, dim, hidden, vocab, heads, kv_heads, head_dim, head_rows, flat, square; } shape;
static const shape large = { 8, 2048, 2048, 8192, 128256, 32, 8, 64, 4096, (int64_t)1 << 26, 8192 }, tiny = { 4, 8, 64, 128, 256, 4, 2, 16, 8, 1 << 12, 64 };

typedef struct gpu {
    llmpar_ctx ctx;
    llmpar_device *device;
    llmpar_stream *stream;
} gpu;

typedef struct bench_case {
    gpu *gpu;
    shape s;
    char *pool;
    size_t pool_bytes, at, span;    /* of one call */
    char *side;                     /* weights, factors, statistics of rows: f32 */
    size_t side_bytes;
    int32_t *ids;
    char *workspace;
    size_t workspace_bytes;
    int op, repeat;
    double work;                    /* bytes or FLOPs of one call */
    llmpar_dtype dtype;
    double milliseconds;            /* of a reading */
    llmpar_gemm_args gemm;
    llmpar_gemm_segment segments[8];
    llmpar_attention_backward_args attention;
    int backward;
    llmpar_status (*call)(struct bench_case *c, char *base);
} bench_case;

static void must(const gpu *g, llmpar_status status, const char *what)
{
    if (!status) return;
    fprintf(stderr, "gpu_ops: %s: %s\n", what, g->ctx.error.text);
    exit(1);
}
static void *take(gpu *g, size_t bytes)
{
    void *out = NULL;
    must(g, g->device->alloc(g->device, bytes ? bytes : 1, &out), "memory");
    return out;
}

/* ---- one call ---- */

/* x[i]: the i-th array of the call, of elements each */
static llmpar_status call_rows(bench_case *c, char *base)
{
    llmpar_device *d = c->gpu->device;
    llmpar_stream *stream = c->gpu->stream;
    const shape *s = &c->s;
    const int64_t rows = s->batch * s->t, n = rows * s->dim;
    const size_t size = llmpar_dtype_size(c->dtype);
    float *side = (float *)(void *)c->side;
    char *x[8];
    for (int i = 0; i < 8; i++) x[i] = base + (size_t)i * (size_t)n * size;
    if (c->op == NORM || c->op == NORM_RESIDUAL) {
        llmpar_rmsnorm_args a;
        memset(&a, 0, sizeof a);
        a.rows = rows; a.dim = s->dim; a.x = x[0]; a.y = x[1]; a.w = side; a.rstd = side + s->dim; a.eps = 1e-5; a.dtype = c->dtype;
        if (c->op == NORM_RESIDUAL) { a.residual = x[2]; a.sum = x[3]; }
        return d->rmsnorm(d, stream, &a);
    }
    if (c->op == NORM_BACKWARD || c->op == NORM_IN_PLACE || c->op == NORM_LONG || c->op == NORM_PLAIN) {
        llmpar_rmsnorm_backward_args a;
        memset(&a, 0, sizeof a);
        a.tokens.batch = a.tokens.leaves = c->op == NORM_LONG ? 1 : s->batch;
        a.tokens.t = a.tokens.t_total = rows / a.tokens.batch;
        a.tokens.canon = 8;
        if (c->op == NORM_PLAIN) a.tokens.leaves = a.tokens.canon = 1; /* no order asked for, in FAST mode: what bench/gpu_train has */
        a.dim = s->dim; a.dy = x[0]; a.x = x[1]; a.w = side; a.rstd = side + s->dim; a.dw_leaves = side + s->dim + rows; a.dtype = c->dtype;
        if (c->op == NORM_IN_PLACE) a.dx = x[0];
        else { a.dresidual = x[2]; a.dx = x[3]; }
        return d->rmsnorm_backward(d, stream, &a);
    }
    if (c->op == ROPE) {
        llmpar_rope_args a;
        memset(&a, 0, sizeof a);
        a.batch = s->batch; a.t = s->t; a.heads = s->heads; a.head_dim = s->head_dim; a.ld = s->heads * s->head_dim; a.x = x[0]; a.cosine = side; a.sine = side + s->t * s->head_dim / 2; a.dtype = c->dtype;
        return d->rope(d, stream, &a);
    }
    if (c->op == EMBEDDING) {
        llmpar_embedding_args a;
        memset(&a, 0, sizeof a);
        a.rows = a.v_local = rows; a.dim = s->dim; a.ids = c->ids; a.table = x[0]; a.out = x[1]; a.dtype = c->dtype;
        return d->embedding(d, stream, &a);
    }
    if (c->op == EMBEDDING_BACKWARD) {
        llmpar_embedding_backward_args a;
        memset(&a, 0, sizeof a);
        a.tokens.batch = a.tokens.leaves = s->batch; a.tokens.t = a.tokens.t_total = s->t; a.tokens.canon = 8; a.dim = s->dim; a.v_local = s->vocab; a.ids = c->ids; a.dout = x[0]; a.dtable = x[1]; a.dtype = c->dtype;
        a.workspace = c->workspace; a.workspace_bytes = c->workspace_bytes;
        return d->embedding_backward(d, stream, &a);
    }
    if (c->op == ADD) {
        llmpar_add_args a = { (size_t)n, x[0], x[1], x[2], c->dtype };
        return d->add(d, stream, &a);
    }
    if (c->op == SCALE) {
        llmpar_scale_args a = { (size_t)n, x[0], -1, c->dtype };
        return d->scale(d, stream, &a);
    }
    llmpar_copy_rows_args a = { rows, s->dim, s->dim, s->dim, size, x[0], x[1] };
    return d->copy_rows(d, stream, &a);
}

static llmpar_status call_wide(bench_case *c, char *base)
{
    llmpar_device *d = c->gpu->device;
    llmpar_stream *stream = c->gpu->stream;
    const shape *s = &c->s;
    const size_t array = (size_t)(s->batch * s->t * s->hidden) * llmpar_dtype_size(c->dtype);
    float *side = (float *)(void *)c->side;
    if (c->op == SWIGLU) {
        llmpar_swiglu_args a = { s->batch * s->t, s->hidden, s->hidden, s->hidden, base, base + array, base + 2 * array, c->dtype };
        return d->swiglu(d, stream, &a);
    }
    if (c->op == SWIGLU_BACKWARD) { /* as the model does: all in place */
        llmpar_swiglu_backward_args a = { s->batch * s->t, s->hidden, s->hidden, s->hidden, base, base + array, base + 2 * array, base, base + array, base + 2 * array, c->dtype };
        return d->swiglu_backward(d, stream, &a);
    }
    llmpar_xent_backward_args b;
    memset(&b, 0, sizeof b);
    b.forward.rows = s->head_rows; b.forward.ld = b.forward.v_local = b.forward.v_total = s->vocab; b.forward.canon = 8; b.forward.logits = base; b.forward.targets = c->ids; b.forward.dtype = c->dtype;
    b.forward.max = side; b.forward.target_logit = side + s->head_rows; b.forward.sum = side + 2 * s->head_rows;
    b.scale = 1;
    return c->op == XENT_MAX ? d->xent_max(d, stream, &b.forward) : c->op == XENT_SUM ? d->xent_sum(d, stream, &b.forward) : d->xent_backward(d, stream, &b);
}

static llmpar_status call_flat(bench_case *c, char *base)
{
    llmpar_device *d = c->gpu->device;
    llmpar_stream *stream = c->gpu->stream;
    const size_t n = (size_t)c->s.flat;
    const int64_t cols = c->s.dim;
    const void *in[8];
    char *x[9];
    for (int i = 0; i < 9; i++) x[i] = base + (size_t)i * n * sizeof(float);
    for (int i = 0; i < 8; i++) in[i] = x[i];
    int64_t *accumulator = (int64_t *)(void *)c->workspace;
    double *most = (double *)(void *)(c->workspace + 2048);
    if (c->op == TO_HALF || c->op == FROM_HALF) {
        llmpar_cast_args a = { n, x[0], c->op == TO_HALF ? LLMPAR_F32 : LLMPAR_BF16, x[1], c->op == TO_HALF ? LLMPAR_BF16 : LLMPAR_F32 };
        return d->cast(d, stream, &a);
    }
    if (c->op == TREE2 || c->op == TREE8 || c->op == MAX2) {
        llmpar_tree_sum_args a = { in, c->op == TREE8 ? 8 : 2, n, x[c->op == TREE8 ? 8 : 2], LLMPAR_F32 };
        return c->op == MAX2 ? d->max(d, stream, &a) : d->tree_sum(d, stream, &a);
    }
    if (c->op == ADAMW) {
        llmpar_adamw_args a = { n, x[0], x[1], x[2], x[3], 1e-6, 0.9, 0.95, 1e-8, 0, 0.5, 0.5, 1, LLMPAR_F32 };
        return d->adamw(d, stream, &a);
    }
    if (c->op == SGD) {
        llmpar_sgd_args a = { n, x[0], x[1], x[2], 1e-6, 0.9, 0, 0, 1, LLMPAR_F32 };
        return d->sgd(d, stream, &a);
    }
    if (c->op == SQUARE_SUM) {
        llmpar_square_sum_args a = { n, x[0], accumulator, LLMPAR_F32 };
        return d->square_sum(d, stream, &a);
    }
    if (c->op == LARGEST) {
        llmpar_largest_args a = { n, x[0], most, LLMPAR_F32 };
        return d->largest(d, stream, &a);
    }
    if (c->op == FACTOR_SUM) {
        llmpar_factor_sum_args a = { 0, (int64_t)n, cols, x[0], (int64_t *)(void *)(c->workspace + 4096), (int64_t *)(void *)(c->workspace + 4096) + (int64_t)n / cols, 40, 40, most, 1, LLMPAR_F32 };
        return d->factor_sum(d, stream, &a);
    }
    llmpar_adalomo_args a;
    memset(&a, 0, sizeof a);
    a.count = a.elements = (int64_t)n; a.cols = cols; a.p = x[0]; a.g = x[1]; a.row_factor = c->side; a.col_factor = c->side; a.update_squares = accumulator; a.param_squares = accumulator + LLMPAR_EXACT_SUM_LIMBS; a.lr = 1e-6; a.grad_scale = 1; a.beta = 0.9; a.eps = 1e-30; a.dtype = LLMPAR_F32;
    return c->op == ADALOMO ? d->adalomo(d, stream, &a) : d->adalomo_square(d, stream, &a);
}

static llmpar_status call_copy(bench_case *c, char *base) { return c->gpu->device->copy(c->gpu->device, c->gpu->stream, base + c->span / 2, base, c->span / 2); }

static llmpar_status call_gemm(bench_case *c, char *base)
{
    (void)base;
    return c->gpu->device->gemm(c->gpu->device, c->gpu->stream, &c->gemm);
}
static llmpar_status call_attention(bench_case *c, char *base)
{
    llmpar_device *d = c->gpu->device;
    (void)base;
    return c->backward ? d->attention_backward(d, c->gpu->stream, &c->attention) : d->attention(d, c->gpu->stream, &c->attention.forward);
}

/* ---- readings ---- */

static double read_rate(void *user)
{
    bench_case *c = (bench_case *)user;
    llmpar_device *d = c->gpu->device;
    const char *name = c->call == call_gemm ? "product" : c->call == call_attention ? "attention" : c->call == call_copy ? "copy" : operation[c->op].name;
    double start = bench_now();
    for (int i = 0; i < c->repeat; i++) {
        c->at += c->span;
        if (c->at + c->span > c->pool_bytes) c->at = 0;
        must(c->gpu, c->call(c, c->pool + c->at), name);
    }
    must(c->gpu, d->synchronize(d, c->gpu->stream), name);
    return c->work * c->repeat / (bench_now() - start);
}

/* As many calls a reading as take c->milliseconds. */
static void tune(bench_case *c)
{
    c->repeat = 1;
    read_rate(c);
    double seconds = c->work / read_rate(c);
    if (seconds < 1e-6) seconds = 1e-6;
    c->repeat = (int)(1e-3 * c->milliseconds / seconds);
    c->repeat = c->repeat < 1 ? 1 : c->repeat > 1000 ? 1000 : c->repeat;
}

/* Positive numbers below 1, small enough for any operation here. */
static void fill(gpu *g, char *pool, size_t bytes, llmpar_dtype dtype)
{
    size_t size = llmpar_dtype_size(dtype), part = bytes < ((size_t)1 << 24) ? bytes : (size_t)1 << 24, count = part / size;
    char *host = (char *)malloc(part + 8);
    uint32_t state = 1;
    if (!host) { fprintf(stderr, "gpu_ops: no memory\n"); exit(1); }
    for (size_t i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        float x = (float)(state >> 8) / 16777216.0f + 0.001f;
        llmpar_convert(host + i * size, dtype, &x, LLMPAR_F32, 1);
    }
    must(g, g->device->copy(g->device, NULL, pool, host, count * size), "copy");
    for (size_t at = count * size; at < bytes; at += part) must(g, g->device->copy(g->device, NULL, pool + at, pool, at + part < bytes ? part : bytes - at), "copy");
    free(host);
}

/* ---- what memory limits ---- */

static void memory_operation(bench_results *results, bench_case *c, bench_case *copy, int pairs)
{
    const shape *s = &c->s;
    const double size = (double)llmpar_dtype_size(c->dtype), n = (double)(s->batch * s->t * s->dim), wide = (double)(s->batch * s->t * s->hidden), logits = (double)(s->head_rows * s->vocab), flat = 4.0 * (double)s->flat;
    const double arrays[OPERATIONS] = { [NORM] = 2, [NORM_RESIDUAL] = 4, [NORM_BACKWARD] = 4, [NORM_IN_PLACE] = 3, [NORM_LONG] = 4, [NORM_PLAIN] = 4, [ROPE] = 2, [SWIGLU] = 3, [SWIGLU_BACKWARD] = 6, [EMBEDDING] = 2, [XENT_MAX] = 1, [XENT_SUM] = 1, [XENT_BACKWARD] = 2, [ADD] = 3, [SCALE] = 2, [COPY_ROWS] = 2,
                                        [TO_HALF] = 1.5, [FROM_HALF] = 1.5, [TREE2] = 3, [TREE8] = 9, [MAX2] = 3, [ADAMW] = 7, [SGD] = 5, [SQUARE_SUM] = 1, [LARGEST] = 1, [FACTOR_SUM] = 1, [ADALOMO_SQUARE] = 1, [ADALOMO] = 3 };
    const double places[OPERATIONS] = { [SWIGLU] = 3, [SWIGLU_BACKWARD] = 3, [XENT_MAX] = 1, [XENT_SUM] = 1, [XENT_BACKWARD] = 1, [TREE2] = 3, [TREE8] = 9, [MAX2] = 3, [ADAMW] = 4, [SGD] = 3 };
    char line[120];
    if (c->op == SWIGLU || c->op == SWIGLU_BACKWARD) {
        c->call = call_wide;
        c->work = arrays[c->op] * wide * size;
        c->span = (size_t)(places[c->op] * wide * size);
    } else if (c->op == XENT_MAX || c->op == XENT_SUM || c->op == XENT_BACKWARD) {
        c->call = call_wide;
        c->work = arrays[c->op] * logits * size;
        c->span = (size_t)(logits * size);
    } else if (operation[c->op].f32_only) {
        c->call = call_flat;
        c->work = arrays[c->op] * flat;
        c->span = (size_t)((places[c->op] > 0 ? places[c->op] : 2) * flat);
    } else {
        c->call = call_rows;
        c->work = arrays[c->op] * n * size;
        c->span = (size_t)(4 * n * size);
        if (c->op == EMBEDDING_BACKWARD) { /* of f32 */
            c->work = n * size + 4.0 * (double)(s->vocab * s->dim);
            c->span = (size_t)c->work;
        }
    }
    if (c->span > c->pool_bytes) { fprintf(stderr, "gpu_ops: %s: %zu bytes\n", operation[c->op].name, c->span); exit(1); }
    c->at = 0;
    fill(c->gpu, c->pool, c->pool_bytes, operation[c->op].f32_only ? LLMPAR_F32 : c->dtype);
    fill(c->gpu, c->side, c->side_bytes, LLMPAR_F32);
    must(c->gpu, c->gpu->device->zero(c->gpu->device, NULL, c->workspace, c->workspace_bytes), "zero");
    tune(c);
    bench_ratio r = bench_pairs(read_rate, copy, read_rate, c, pairs);
    snprintf(line, sizeof line, "%s %s", llmpar_dtype_name(c->dtype), operation[c->op].name);
    bench_row(results, line, "GB/s", 1e-9, "copy", r, c->milliseconds > 0 ? 0.85 : 0);
}

static void memory_operations(bench_results *results, gpu *g, gpu *fast, const shape *s, const char *type, const char *name, int small, int pairs)
{
    bench_case c, copy;
    llmpar_embedding_backward_args e;
    memset(&c, 0, sizeof c);
    memset(&copy, 0, sizeof copy);
    memset(&e, 0, sizeof e);
    c.gpu = copy.gpu = g;
    c.s = *s;
    c.milliseconds = copy.milliseconds = small ? 0 : 3;
    c.pool_bytes = copy.pool_bytes = small ? (size_t)1 << 20 : (size_t)6 << 30;
    c.pool = copy.pool = (char *)take(g, c.pool_bytes);
    c.side_bytes = (size_t)(s->dim * (s->batch + 2) + 3 * s->batch * s->t + s->t * s->head_dim + 3 * s->head_rows + s->flat / s->dim) * sizeof(float);
    c.side = (char *)take(g, c.side_bytes);
    e.tokens.batch = e.tokens.leaves = s->batch; e.tokens.t = e.tokens.t_total = s->t; e.dim = s->dim; e.v_local = s->vocab; e.dtype = LLMPAR_F32;
    c.workspace_bytes = g->device->embedding_backward_workspace(g->device, &e) + 4096 + (size_t)(s->flat / s->dim + s->dim) * sizeof(int64_t);
    c.workspace = (char *)take(g, c.workspace_bytes);
    int64_t rows = s->batch * s->t;
    int32_t *ids = (int32_t *)malloc((size_t)rows * sizeof *ids);
    /* Frequencies like those of words: the k-th in proportion to 1 / k. */
    const double range = llmpar_log_f64((double)(rows < s->vocab ? rows : s->vocab));
    uint32_t state = 7;
    for (int64_t i = 0; i < rows; i++) {
        state = state * 1664525u + 1013904223u;
        ids[i] = (int32_t)llmpar_exp_f64((double)(state >> 8) / 16777216.0 * range) - 1;
    }
    c.ids = (int32_t *)take(g, (size_t)rows * sizeof *ids);
    must(g, g->device->copy(g->device, NULL, c.ids, ids, (size_t)rows * sizeof *ids), "copy");
    free(ids);
    copy.s = *s;
    copy.op = COPY_ROWS;
    copy.call = call_copy;
    copy.span = small ? (size_t)1 << 18 : (size_t)512 << 20;
    copy.work = (double)copy.span;
    tune(&copy);
    for (int half = 1; half >= 0; half--) {
        c.dtype = half ? LLMPAR_BF16 : LLMPAR_F32;
        if (type && strcmp(type, llmpar_dtype_name(c.dtype))) continue;
        for (c.op = 0; c.op < OPERATIONS; c.op++)
            if (!(half && operation[c.op].f32_only) && !(name && strcmp(name, operation[c.op].name))) {
                c.gpu = c.op == NORM_PLAIN ? fast : g;
                memory_operation(results, &c, &copy, pairs);
            }
    }
    g->device->free(g->device, c.pool, c.pool_bytes);
    g->device->free(g->device, c.side, c.side_bytes);
    g->device->free(g->device, c.workspace, c.workspace_bytes);
    g->device->free(g->device, c.ids, (size_t)rows * sizeof(int32_t));
}

/* ---- products ---- */

typedef struct product { const char *name; llmpar_gemm_kind kind; int64_t m, n, k; int32_t pieces; } product;

/* On one device; operands are those of `like`, where there is one. */
static bench_case product_case(gpu *g, const product *p, llmpar_dtype dtype, const bench_case *like, double milliseconds)
{
    bench_case c;
    size_t size = llmpar_dtype_size(dtype);
    memset(&c, 0, sizeof c);
    c.gpu = g;
    c.call = call_gemm;
    c.milliseconds = milliseconds;
    c.work = 2.0 * (double)p->m * (double)p->n * (double)p->k;
    c.pool_bytes = (size_t)(p->m * p->k + p->n * p->k + p->m * p->n) * size;
    c.pool = like ? like->pool : (char *)take(g, c.pool_bytes);
    if (!like) fill(g, c.pool, c.pool_bytes, dtype);
    char *a = c.pool, *b = a + (size_t)(p->m * p->k) * size;
    c.gemm.m = p->m; c.gemm.n = p->n; c.gemm.kind = p->kind; c.gemm.dtype = dtype; c.gemm.out_dtype = dtype;
    c.gemm.c = b + (size_t)(p->n * p->k) * size;
    c.gemm.ldc = p->n;
    c.gemm.pieces = c.gemm.segment_count = p->pieces;
    for (int32_t i = 0; i < p->pieces; i++) {
        llmpar_gemm_segment *s = &c.segments[i];
        int64_t k0 = llmpar_piece_begin(i, p->k, p->pieces);
        s->piece = i;
        s->k = llmpar_piece_begin(i + 1, p->k, p->pieces) - k0;
        s->lda = p->kind == LLMPAR_GEMM_TN ? p->m : p->k;
        s->ldb = p->kind == LLMPAR_GEMM_NT ? p->k : p->n;
        s->a = a + (size_t)(p->kind == LLMPAR_GEMM_TN ? k0 * p->m : k0) * size;
        s->b = b + (size_t)(p->kind == LLMPAR_GEMM_NT ? k0 : k0 * p->n) * size;
    }
    c.gemm.segments = c.segments;
    c.workspace_bytes = g->device->gemm_workspace(g->device, &c.gemm);
    c.workspace = (char *)take(g, c.workspace_bytes);
    c.gemm.workspace = c.workspace;
    c.gemm.workspace_bytes = c.workspace_bytes;
    return c;
}
static void product_free(bench_case *c, int operands)
{
    c->gpu->device->free(c->gpu->device, c->workspace, c->workspace_bytes);
    if (operands) c->gpu->device->free(c->gpu->device, c->pool, c->pool_bytes);
}

static void products(bench_results *results, gpu *exact, gpu *fast, const shape *s, const char *type, int small, int pairs)
{
    const int64_t rows = s->batch * s->t, heads = (s->heads + 2 * s->kv_heads) * s->head_dim;
    const product list[] = {
        { "qkv", LLMPAR_GEMM_NT, rows, heads, s->dim, 1 }, { "output, 8 pieces", LLMPAR_GEMM_NT, rows, s->dim, s->dim, 8 }, { "up", LLMPAR_GEMM_NT, rows, s->hidden, s->dim, 1 }, { "down, 8 pieces", LLMPAR_GEMM_NT, rows, s->dim, s->hidden, 8 },
        { "up's dx, 8 pieces", LLMPAR_GEMM_NN, rows, s->dim, s->hidden, 8 }, { "up's dw", LLMPAR_GEMM_TN, s->hidden, s->dim, rows, 1 }, { "head", LLMPAR_GEMM_NT, s->head_rows, s->vocab, s->dim, 1 }, { "square", LLMPAR_GEMM_NT, s->square, s->square, s->square, 1 },
    };
    for (int half = 1; half >= 0; half--) {
        const llmpar_dtype dtype = half ? LLMPAR_BF16 : LLMPAR_F32;
        if (type && strcmp(type, llmpar_dtype_name(dtype))) continue;
        for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
            char line[120];
            bench_case library = product_case(fast, &list[i], dtype, NULL, small ? 0 : 10), own = product_case(exact, &list[i], dtype, &library, small ? 0 : 10);
            library.gemm.segments = library.segments;
            own.gemm.segments = own.segments;
            tune(&library);
            tune(&own);
            bench_ratio r = bench_pairs(read_rate, &library, read_rate, &own, pairs);
            snprintf(line, sizeof line, "%s product, %s", llmpar_dtype_name(dtype), list[i].name);
            bench_row(results, line, "TFLOP/s", 1e-12, "the library", r, small ? 0 : 0.5);
            product_free(&own, 0);
            product_free(&library, 1);
        }
    }
}

/* ---- attention ---- */

static bench_case attention_case(gpu *g, const shape *s, int64_t batch, int64_t t, int backward, const bench_case *like, double milliseconds)
{
    bench_case c;
    const int64_t rows = batch * t, q = s->heads * s->head_dim, kv = s->kv_heads * s->head_dim;
    const size_t size = 2;
    memset(&c, 0, sizeof c);
    c.gpu = g;
    c.call = call_attention;
    c.milliseconds = milliseconds;
    c.backward = backward;
    /* causal: half of the scores; forward two products, backward five */
    c.work = (backward ? 10.0 : 4.0) * (double)batch * (double)s->heads * (double)t * (double)t / 2 * (double)s->head_dim;
    c.pool_bytes = (size_t)(rows * (4 * q + 4 * kv)) * size + (size_t)(rows * s->heads) * sizeof(float);
    c.pool = like ? like->pool : (char *)take(g, c.pool_bytes);
    if (!like) fill(g, c.pool, c.pool_bytes, LLMPAR_BF16);
    llmpar_attention_backward_args *b = &c.attention;
    llmpar_attention_args *a = &b->forward;
    char *at = c.pool;
    a->batch = batch; a->tq = a->tk = a->tk_stride = t; a->heads = s->heads; a->kv_heads = s->kv_heads; a->head_dim = s->head_dim;
    a->ldq = a->ldo = q; a->ldk = a->ldv = kv; a->scale = 0.125; a->dtype = b->dkv_dtype = LLMPAR_BF16;
    a->q = at; at += (size_t)(rows * q) * size;
    a->out = at; at += (size_t)(rows * q) * size;
    b->dout = at; at += (size_t)(rows * q) * size;
    b->dq = at; at += (size_t)(rows * q) * size;
    a->k = at; at += (size_t)(rows * kv) * size;
    a->v = at; at += (size_t)(rows * kv) * size;
    b->dk = at; at += (size_t)(rows * kv) * size;
    b->dv = at; at += (size_t)(rows * kv) * size;
    a->lse = at;
    c.workspace_bytes = backward ? g->device->attention_backward_workspace(g->device, b) : g->device->attention_workspace(g->device, a);
    c.workspace = (char *)take(g, c.workspace_bytes);
    a->workspace = c.workspace;
    a->workspace_bytes = c.workspace_bytes;
    return c;
}

static void attentions(bench_results *results, gpu *exact, gpu *fast, const shape *s, int cudnn, int small, int pairs)
{
    const product square = { "square", LLMPAR_GEMM_NT, s->square, s->square, s->square, 1 };
    for (int length = 0; length < 2; length++) {
        const int64_t t = length ? 4 * s->t : s->t, batch = length ? s->batch / 4 : s->batch;
        bench_case bound = product_case(fast, &square, LLMPAR_BF16, NULL, small ? 0 : 10);
        bound.gemm.segments = bound.segments;
        tune(&bound);
        bench_case forward = attention_case(exact, s, batch, t, 0, NULL, small ? 0 : 10), backward = attention_case(exact, s, batch, t, 1, &forward, small ? 0 : 10);
        for (int i = 0; i < 2; i++) {
            bench_case *own = i ? &backward : &forward;
            char line[120];
            tune(own);
            snprintf(line, sizeof line, "bf16 attention%s, T %ld", i ? " backward" : "", (long)t);
            bench_row(results, line, "TFLOP/s", 1e-12, "the library's product", bench_pairs(read_rate, &bound, read_rate, own, pairs), 0);
            if (cudnn) {
                bench_case library = attention_case(fast, s, batch, t, i, &forward, small ? 0 : 10);
                tune(&library);
                bench_row(results, line, "TFLOP/s", 1e-12, "cuDNN", bench_pairs(read_rate, &library, read_rate, own, pairs), length ? 0.85 : 0);
                product_free(&library, 0);
            }
        }
        product_free(&backward, 0);
        product_free(&forward, 1);
        product_free(&bound, 1);
    }
}

/* ---- */

static void gpu_open(gpu *g, llmpar_cuda_mode mode, int cudnn)
{
    llmpar_cuda_desc desc;
    memset(g, 0, sizeof *g);
    memset(&desc, 0, sizeof desc);
    desc.mode = mode;
    desc.cudnn = cudnn;
    g->ctx.world = 1;
    llmpar_heap_init(&g->ctx.heap, NULL);
    llmpar_error_clear(&g->ctx.error);
    must(g, llmpar_cuda_create(&g->ctx, &desc, &g->device), "the device");
    must(g, g->device->stream_create(g->device, "bench", &g->stream), "a stream");
}
static void gpu_close(gpu *g)
{
    g->device->stream_destroy(g->device, g->stream);
    llmpar_cuda_destroy(g->device);
}

static const char usage[] =
    "gpu_ops [--small] [--cudnn] [--json FILE] [bf16|f32] [OPERATION]\n"
    "The CUDA device, operation by operation, at the shapes of Llama-3.2-1B.\n"
    "  --small       a try-out, for the emulated device\n"
    "  --cudnn       the library's attention beside ours (a build with LLMPAR_USE_CUDNN)\n"
    "  --json FILE   the table as JSON, too\n"
    "  OPERATION     product, attention, or one line of the table, as \"rmsnorm backward\"\n";

int main(int argc, char **argv)
{
    bench_results results;
    llmpar_error none;
    gpu exact, fast;
    const char *name = NULL, *type = NULL;
    int small = 0, cudnn = 0;
    bench_open(&results, "gpu_ops", &argc, argv, usage, -1);
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--small")) small = 1;
        else if (!strcmp(argv[i], "--cudnn")) cudnn = 1;
        else if (!strcmp(argv[i], "f32") || !strcmp(argv[i], "bf16")) type = argv[i];
        else {
            int known = !strcmp(argv[i], "product") || !strcmp(argv[i], "attention");
            for (int k = 0; k < OPERATIONS; k++) known |= !strcmp(argv[i], operation[k].name);
            if (!known) bench_refuse("argument", argv[i], "--small, --cudnn, --json, bf16, f32, product, attention or the name of an operation, see --help");
            name = argv[i];
        }
    }
    llmpar_error_clear(&none);
    if (llmpar_cuda_count(&none) < 1) {
        fprintf(stderr, "gpu_ops: %s\n", none.text);
        return 1;
    }
    const shape *s = small ? &tiny : &large;
    gpu_open(&exact, LLMPAR_CUDA_EXACT, 0);
    gpu_open(&fast, LLMPAR_CUDA_FAST, cudnn);
    printf("%s\n", exact.device->name);
    if (!name || (strcmp(name, "product") && strcmp(name, "attention"))) memory_operations(&results, &exact, &fast, s, type, name, small, small ? 1 : 11);
    if (!name || !strcmp(name, "product")) products(&results, &exact, &fast, s, type, small, small ? 1 : 5);
    if ((!name || !strcmp(name, "attention")) && (!type || !strcmp(type, "bf16"))) attentions(&results, &exact, &fast, s, cudnn, small, small ? 1 : 5);
    gpu_close(&fast);
    gpu_close(&exact);
    bench_close(&results);
    return 0;
}
