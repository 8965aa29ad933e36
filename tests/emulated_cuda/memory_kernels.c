/* memory_kernels: every kernel of the CUDA device once, on the emulated one, to see how it uses memory: memory_kernels [--places], from the project's folder; prints the table of memory.sh. Rows are as long as Llama-3.2-1B's (or long
   enough to be cut alike), and aligned; there are few of them. What is computed is the other tests' matter. */
#include "llmpar_cuda.h"
#include "memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static llmpar_device *d;

static void must(llmpar_status status, const char *what)
{
    if (!status) return;
    fprintf(stderr, "memory_kernels: %s: %s\n", what, d && d->error ? d->error->text : "");
    exit(1);
}
#define RUN(slot, ...) must(d->slot(d, NULL, __VA_ARGS__), #slot)

/* Elements in (0, 1); the host reaches the emulated device's memory. Never freed. */
static void *take(size_t count, llmpar_dtype dtype)
{
    static uint32_t state = 1;
    char *out = NULL;
    size_t size = llmpar_dtype_size(dtype);
    void *memory;
    must(d->alloc(d, count * size, &memory), "memory");
    out = (char *)memory;
    if (dtype == LLMPAR_I64) memset(out, 0, count * size);
    else
        for (size_t i = 0; i < count; i++) {
            state = state * 1664525u + 1013904223u;
            float x = (float)(state >> 8) / 16777216.0f + 0.001f;
            llmpar_convert(out + i * size, dtype, &x, LLMPAR_F32, 1);
        }
    return out;
}
static int32_t *take_ids(int64_t count, int64_t below)
{
    int32_t *out = (int32_t *)take((size_t)count, LLMPAR_F32);
    for (int64_t i = 0; i < count; i++) out[i] = (int32_t)(i % 5 ? (i * 7919 + 13) % below : i % 3); /* some often */
    return out;
}
#define ZERO(type, name) type name; memset(&name, 0, sizeof name)

/* ---- rows ---- */

static void rows(llmpar_dtype dtype)
{
    const int64_t batch = 2, t = 32, n = batch * t, dim = 2048, hidden = 1024, vocab = 16384, heads = 4, e = 64;
    void *x = take((size_t)(n * dim), dtype), *y = take((size_t)(n * dim), dtype), *z = take((size_t)(n * dim), dtype), *w = take((size_t)dim, dtype);
    float *rstd = (float *)take((size_t)n, LLMPAR_F32), *dw = (float *)take((size_t)(batch * dim), LLMPAR_F32);
    ZERO(llmpar_rmsnorm_args, norm);
    norm.rows = n; norm.dim = dim; norm.x = x; norm.w = w; norm.y = y; norm.rstd = rstd; norm.eps = 1e-5; norm.dtype = dtype;
    RUN(rmsnorm, &norm);
    norm.residual = z; norm.sum = z;
    RUN(rmsnorm, &norm);
    ZERO(llmpar_rmsnorm_backward_args, back);
    back.tokens.batch = back.tokens.leaves = batch; back.tokens.t = back.tokens.t_total = t; back.tokens.canon = 8;
    back.dim = dim; back.dy = y; back.x = x; back.w = w; back.rstd = rstd; back.dw_leaves = dw; back.dresidual = z; back.dx = z; back.dtype = dtype;
    RUN(rmsnorm_backward, &back);
    back.dresidual = NULL; back.dx = y; /* in place: dx has a launch of its own */
    RUN(rmsnorm_backward, &back);
    ZERO(llmpar_rope_args, rope);
    rope.batch = batch; rope.t = t; rope.heads = heads; rope.head_dim = e; rope.ld = heads * e; rope.x = x; rope.cosine = take((size_t)(t * e), LLMPAR_F32); rope.sine = (float *)rope.cosine + t * e / 2; rope.dtype = dtype;
    RUN(rope, &rope);
    llmpar_swiglu_args swiglu = { n, hidden, hidden, hidden, x, y, z, dtype };
    RUN(swiglu, &swiglu);
    llmpar_swiglu_backward_args swiglu_back = { n, hidden, hidden, hidden, x, y, z, x, y, z, dtype };
    RUN(swiglu_backward, &swiglu_back);
    llmpar_add_args add = { (size_t)(n * dim), x, y, z, dtype };
    RUN(add, &add);
    llmpar_scale_args scale = { (size_t)(n * dim), x, -1, dtype };
    RUN(scale, &scale);
    llmpar_copy_rows_args copy = { n, dim / 2, dim, dim, llmpar_dtype_size(dtype), x, y };
    RUN(copy_rows, &copy);
    int32_t *ids = take_ids(n, 100);
    ZERO(llmpar_embedding_args, embedding);
    embedding.rows = n; embedding.v_local = n; embedding.dim = dim; embedding.ids = take_ids(n, n); embedding.table = x; embedding.out = y; embedding.dtype = dtype;
    RUN(embedding, &embedding);
    ZERO(llmpar_embedding_backward_args, rest);
    rest.tokens = back.tokens; rest.dim = dim; rest.v_local = 128; rest.ids = ids; rest.dout = x; rest.dtable = take((size_t)(128 * dim), LLMPAR_F32); rest.dtype = dtype;
    rest.workspace_bytes = d->embedding_backward_workspace(d, &rest);
    rest.workspace = take(rest.workspace_bytes / 4 + 1, LLMPAR_F32);
    RUN(embedding_backward, &rest);
    ZERO(llmpar_xent_backward_args, xent);
    xent.forward.rows = 4; xent.forward.ld = xent.forward.v_local = xent.forward.v_total = vocab; xent.forward.canon = 8; xent.forward.logits = take((size_t)(4 * vocab), dtype); xent.forward.targets = take_ids(4, vocab);
    xent.forward.max = take(4, LLMPAR_F32); xent.forward.target_logit = take(4, LLMPAR_F32); xent.forward.sum = take(4, LLMPAR_F32); xent.forward.dtype = dtype; xent.scale = 1;
    RUN(xent_max, &xent.forward);
    RUN(xent_sum, &xent.forward);
    RUN(xent_backward, &xent);
    llmpar_cast_args cast = { (size_t)(n * dim), x, dtype, take((size_t)(n * dim), LLMPAR_F32), dtype == LLMPAR_F32 ? LLMPAR_BF16 : LLMPAR_F32 };
    RUN(cast, &cast);
}

/* ---- flat buffers: f32 ---- */

static void flat(void)
{
    const int64_t n = 1 << 15, cols = 2048;
    float *x[9];
    const void *in[8];
    for (int i = 0; i < 9; i++) x[i] = (float *)take((size_t)n, LLMPAR_F32);
    for (int i = 0; i < 8; i++) in[i] = x[i];
    for (int ranks = 2; ranks <= 8; ranks += ranks == 2 ? 1 : ranks == 3 ? 5 : 8) { /* 2, 3, 8 */
        llmpar_tree_sum_args tree = { in, ranks, (size_t)n, x[8], LLMPAR_F32 };
        RUN(tree_sum, &tree);
    }
    llmpar_max_args max = { in, 2, (size_t)n, x[8], LLMPAR_F32 };
    RUN(max, &max);
    llmpar_adamw_args adamw = { (size_t)n, x[0], x[1], x[2], x[3], 1e-6, 0.9, 0.95, 1e-8, 0, 0.5, 0.5, 1, LLMPAR_F32 };
    RUN(adamw, &adamw);
    llmpar_sgd_args sgd = { (size_t)n, x[0], x[1], x[2], 1e-6, 0.9, 0, 0, 1, LLMPAR_F32 };
    RUN(sgd, &sgd);
    int64_t *sums = (int64_t *)take((size_t)(4 * cols), LLMPAR_I64);
    double *most = (double *)take(1, LLMPAR_F64);
    llmpar_square_sum_args squares = { (size_t)n, x[0], sums, LLMPAR_F32 };
    RUN(square_sum, &squares);
    squares.accumulator = sums + 2 * cols;
    RUN(square_sum, &squares);
    llmpar_largest_args largest = { (size_t)n, x[1], most, LLMPAR_F32 };
    RUN(largest, &largest);
    llmpar_factor_sum_args factor = { 0, n, cols, x[1], sums + 1024, sums + cols, 40, 40, most, 1, LLMPAR_F32 };
    RUN(factor_sum, &factor);
    llmpar_factor_moment_args moment = { cols, sums + cols, n / cols, 40, 0, most, x[3], x[4], 1, 0.9, 1e-30, LLMPAR_F32 };
    RUN(factor_moment, &moment);
    ZERO(llmpar_adalomo_args, adalomo);
    adalomo.count = adalomo.elements = n; adalomo.cols = cols; adalomo.p = x[0]; adalomo.g = x[1]; adalomo.row_factor = x[5]; adalomo.col_factor = x[4];
    adalomo.update_squares = sums; adalomo.param_squares = sums + 2 * cols; adalomo.lr = 1e-6; adalomo.grad_scale = 1; adalomo.beta = 0.9; adalomo.eps = 1e-30; adalomo.dtype = LLMPAR_F32;
    RUN(adalomo_square, &adalomo);
    RUN(adalomo, &adalomo);
    const int64_t tokens = 1024;
    llmpar_xent_loss_args loss = { tokens, x[0], x[1], x[2], take_ids(tokens, 100), sums, NULL, LLMPAR_F32 };
    RUN(xent_loss, &loss);
}

/* ---- products ---- */

static void product(llmpar_gemm_kind kind, llmpar_dtype dtype, int32_t pieces, int accumulate)
{
    const int64_t m = 256, n = 512, k = 512;
    size_t size = llmpar_dtype_size(dtype);
    llmpar_gemm_segment segments[8];
    ZERO(llmpar_gemm_args, a);
    char *left = (char *)take((size_t)(m * k), dtype), *right = (char *)take((size_t)(n * k), dtype);
    memset(segments, 0, sizeof segments);
    a.m = m; a.n = n; a.ldc = n; a.kind = kind; a.dtype = dtype; a.out_dtype = accumulate ? LLMPAR_F32 : dtype; a.accumulate = accumulate; a.pieces = a.segment_count = pieces; a.segments = segments;
    a.c = take((size_t)(m * n), a.out_dtype);
    for (int32_t i = 0; i < pieces; i++) {
        int64_t k0 = k / pieces * i;
        segments[i].piece = i;
        segments[i].k = k / pieces;
        segments[i].lda = kind == LLMPAR_GEMM_TN ? m : k;
        segments[i].ldb = kind == LLMPAR_GEMM_NT ? k : n;
        segments[i].a = left + (size_t)(kind == LLMPAR_GEMM_TN ? k0 * m : k0) * size;
        segments[i].b = right + (size_t)(kind == LLMPAR_GEMM_NT ? k0 : k0 * n) * size;
    }
    a.workspace_bytes = d->gemm_workspace(d, &a);
    a.workspace = take(a.workspace_bytes / 4 + 1, LLMPAR_F32);
    RUN(gemm, &a);
}

/* ---- attention: 4 heads for a KV head ---- */

static void attention(llmpar_dtype dtype, int64_t head_dim, int64_t tq, int64_t tk)
{
    const int64_t heads = 4, q = heads * head_dim;
    ZERO(llmpar_attention_backward_args, b);
    llmpar_attention_args *a = &b.forward;
    a->batch = 1; a->tq = tq; a->tk = a->tk_stride = tk; a->heads = heads; a->kv_heads = 1; a->head_dim = head_dim; a->ldq = a->ldo = q; a->ldk = a->ldv = head_dim; a->scale = 0.125; a->dtype = b.dkv_dtype = dtype;
    a->q = take((size_t)(tq * q), dtype); a->k = take((size_t)(tk * head_dim), dtype); a->v = take((size_t)(tk * head_dim), dtype); a->out = take((size_t)(tq * q), dtype); a->lse = take((size_t)(tq * heads), LLMPAR_F32);
    a->workspace_bytes = d->attention_workspace(d, a);
    a->workspace = take(a->workspace_bytes / 4 + 1, LLMPAR_F32);
    RUN(attention, a);
    if (tq != tk) return;
    b.dout = take((size_t)(tq * q), dtype); b.dq = take((size_t)(tq * q), dtype); b.dk = take((size_t)(tk * head_dim), dtype); b.dv = take((size_t)(tk * head_dim), dtype);
    a->workspace_bytes = d->attention_backward_workspace(d, &b);
    a->workspace = take(a->workspace_bytes / 4 + 1, LLMPAR_F32);
    RUN(attention_backward, &b);
}

/* ---- */

static llmpar_status rank(llmpar_ctx *ctx, void *user)
{
    (void)user;
    llmpar_collective call;
    const size_t n = 1 << 12;
    memset(&call, 0, sizeof call);
    if (ctx->rank == 0) { /* the other one waits */
        d = ctx->device;
        emulated_cuda_forget(); /* what the launch has tried */
        for (int half = 0; half < 2; half++) {
            const llmpar_dtype dtype = half ? LLMPAR_BF16 : LLMPAR_F32;
            rows(dtype);
            product(LLMPAR_GEMM_NT, dtype, 1, 0);
            product(LLMPAR_GEMM_NT, dtype, 8, 0);
            product(LLMPAR_GEMM_NN, dtype, 8, 0);
            product(LLMPAR_GEMM_TN, dtype, 1, 1);
        }
        flat();
        attention(LLMPAR_BF16, 64, 256, 256);
        attention(LLMPAR_BF16, 128, 128, 128);
        attention(LLMPAR_BF16, 64, 1, 512);
        attention(LLMPAR_BF16, 128, 1, 256);
        attention(LLMPAR_F32, 64, 64, 64);
    }
    llmpar_status status = llmpar_comm_barrier(ctx->comm, NULL, "kernels");
    void *send, *recv;
    if (!status) status = ctx->device->alloc(ctx->device, 2 * n * sizeof(float), &send);
    if (!status) status = ctx->device->alloc(ctx->device, 2 * n * sizeof(float), &recv);
    if (status) return status;
    memset(send, 0, 2 * n * sizeof(float));
    call.send = send; call.recv = recv; call.count = n; call.dtype = LLMPAR_F32;
    status = llmpar_all_gather(ctx->comm, NULL, &call);
    if (!status) status = llmpar_reduce_scatter(ctx->comm, NULL, &call);
    if (!status) status = llmpar_all_reduce(ctx->comm, NULL, &call);
    call.op = LLMPAR_MAX;
    if (!status) status = llmpar_all_reduce(ctx->comm, NULL, &call);
    return status;
}

int main(int argc, char **argv)
{
    char counts[4096];
    llmpar_error error;
    llmpar_backend gpu;
    llmpar_launch_desc desc;
    memset(&desc, 0, sizeof desc);
    llmpar_cuda_backend(NULL, &gpu);
    desc.ranks = 2;
    desc.threads = 1;
    desc.deadline = 600;
    desc.backend = &gpu;
    if (llmpar_launch(&desc, rank, NULL, &error)) {
        fprintf(stderr, "memory_kernels: %s\n", error.text);
        return 1;
    }
    snprintf(counts, sizeof counts, "%s.counts", argv[0]);
    if (emulated_cuda_write(counts)) execl("tests/emulated_cuda/memory.sh", "memory.sh", counts, argv[0], argc > 1 ? argv[1] : NULL, NULL);
    perror("memory_kernels");
    return 1;
}
