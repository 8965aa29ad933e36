/* bench_ops: the CPU operations beside gemm on one core, level by level, in CPU seconds (best of several). Attention in GFLOP/s, counted causally
   (2 T^2 E a head forward, 2.5 times that backward), beside the gemm of the same run; the others in elements a nanosecond.

     bench_ops [level] */
#include "llmpar.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}
static float *numbers(size_t n)
{
    float *x = (float *)malloc(n * sizeof *x);
    uint32_t state = 1;
    for (size_t i = 0; i < n; i++) {
        state = state * 1664525u + 1013904223u;
        x[i] = (float)(state >> 8) / 16777216.0f - 0.5f;
    }
    return x;
}
/* best of 5 runs of `repeat` calls: seconds a call */
#define TIME(seconds_a_call, repeat, call) do { \
        seconds_a_call = 1e9; \
        for (int run_ = 0; run_ < 5; run_++) { \
            double start_ = seconds(); \
            for (int i_ = 0; i_ < (repeat); i_++) if (call) { fprintf(stderr, "bench_ops: %s\n", device->error->text); exit(1); } \
            start_ = (seconds() - start_) / (repeat); \
            if (start_ < seconds_a_call) seconds_a_call = start_; \
        } } while (0)

static void bench_attention(llmpar_device *device, int64_t t, int64_t heads, int64_t kv_heads, int64_t e)
{
    size_t nq = (size_t)(t * heads * e), nk = (size_t)(t * kv_heads * e);
    float *q = numbers(nq), *k = numbers(nk), *v = numbers(nk), *out = numbers(nq), *lse = numbers((size_t)(t * heads)), *dout = numbers(nq), *dq = numbers(nq), *dk = numbers(nk), *dv = numbers(nk);
    double forward, backward, decode, flops = 2.0 * (double)t * (double)t * (double)e * (double)heads;
    llmpar_attention_backward_args g;
    llmpar_attention_args *a = &g.forward;
    memset(&g, 0, sizeof g);
    a->batch = 1; a->tq = a->tk = a->tk_stride = t; a->heads = heads; a->kv_heads = kv_heads; a->head_dim = e;
    a->q = q; a->k = k; a->v = v; a->out = out; a->lse = lse;
    a->ldq = a->ldo = heads * e; a->ldk = a->ldv = kv_heads * e; a->scale = 0.125; a->dtype = LLMPAR_F32;
    g.dout = dout; g.dq = dq; g.dk = dk; g.dv = dv;
    a->workspace_bytes = device->attention_backward_workspace(device, &g);
    if (a->workspace_bytes < device->attention_workspace(device, a)) a->workspace_bytes = device->attention_workspace(device, a);
    a->workspace = malloc(a->workspace_bytes);
    TIME(forward, 1, device->attention(device, NULL, a));
    TIME(backward, 1, device->attention_backward(device, NULL, &g));
    a->tq = 1;
    TIME(decode, 10, device->attention(device, NULL, a));
    printf("  attention T %3ld, %ld/%ld heads of %3ld: forward %6.1f  backward %6.1f GFLOP/s, one query row %5.0f us\n", (long)t, (long)heads, (long)kv_heads, (long)e, flops / forward * 1e-9, 2.5 * flops / backward * 1e-9, decode * 1e6);
    free(a->workspace); free(q); free(k); free(v); free(out); free(lse); free(dout); free(dq); free(dk); free(dv);
}

static void bench_gemm(llmpar_device *device)
{
    int64_t m = 384;
    float *a = numbers((size_t)(m * m)), *b = numbers((size_t)(m * m)), *c = numbers((size_t)(m * m));
    llmpar_gemm_segment segment;
    llmpar_gemm_args g;
    double s;
    memset(&segment, 0, sizeof segment);
    memset(&g, 0, sizeof g);
    segment.a = a; segment.b = b; segment.lda = segment.ldb = segment.k = m;
    g.m = g.n = g.ldc = m; g.c = c; g.segments = &segment; g.segment_count = g.pieces = 1; g.kind = LLMPAR_GEMM_NN; g.dtype = LLMPAR_F32;
    g.workspace_bytes = device->gemm_workspace(device, &g);
    g.workspace = malloc(g.workspace_bytes + 1);
    TIME(s, 1, device->gemm(device, NULL, &g));
    printf("%s: gemm %.1f GFLOP/s\n", device->name, 2.0 * (double)m * (double)m * (double)m / s * 1e-9);
    free(g.workspace); free(a); free(b); free(c);
}

static void bench_rows(llmpar_device *device)
{
    enum { ROWS = 512, DIM = 512, N = ROWS * DIM };
    float *x = numbers(4 * N), *y = numbers(4 * N), *z = numbers(4 * N), *w = numbers(4 * N);
    double s;
    {
        llmpar_rmsnorm_args a;
        llmpar_rmsnorm_backward_args b;
        memset(&a, 0, sizeof a);
        memset(&b, 0, sizeof b);
        a.rows = ROWS; a.dim = DIM; a.x = x; a.w = w; a.y = y; a.rstd = z; a.eps = 1e-5; a.dtype = LLMPAR_F32;
        b.tokens.batch = b.tokens.leaves = 4; b.tokens.t = b.tokens.t_total = ROWS / 4; b.tokens.canon = 8; b.dim = DIM;
        b.dy = y; b.x = x; b.w = w; b.rstd = z; b.dx = x + N; b.dw_leaves = y + N; b.dtype = LLMPAR_F32;
        TIME(s, 8, device->rmsnorm(device, NULL, &a));
        printf("  rmsnorm %.2f", N / s * 1e-9);
        TIME(s, 8, device->rmsnorm_backward(device, NULL, &b));
        printf(" backward %.2f", N / s * 1e-9);
    }
    {
        llmpar_rope_args a;
        memset(&a, 0, sizeof a);
        a.batch = 1; a.t = ROWS; a.heads = 8; a.ld = DIM; a.head_dim = DIM / 8; a.x = x; a.cosine = z; a.sine = w; a.dtype = LLMPAR_F32;
        TIME(s, 8, device->rope(device, NULL, &a));
        printf("  rope %.2f", N / s * 1e-9);
    }
    {
        llmpar_swiglu_args a;
        llmpar_swiglu_backward_args b;
        memset(&a, 0, sizeof a);
        memset(&b, 0, sizeof b);
        a.rows = b.rows = ROWS; a.dim = a.ld_in = a.ld_out = b.dim = b.ld_in = b.ld_out = DIM; a.dtype = b.dtype = LLMPAR_F32;
        a.gate = z; a.up = w; a.h = y;
        b.gate = z; b.up = w; b.dh = y; b.dgate = x; b.dup = x + N; b.h = y + N;
        TIME(s, 8, device->swiglu(device, NULL, &a));
        printf("  swiglu %.2f", N / s * 1e-9);
        TIME(s, 8, device->swiglu_backward(device, NULL, &b));
        printf(" backward %.2f\n", N / s * 1e-9);
    }
    {
        llmpar_xent_backward_args g;
        llmpar_xent_args *a = &g.forward;
        int32_t targets[N / 4096];
        memset(&g, 0, sizeof g);
        for (int i = 0; i < N / 4096; i++) targets[i] = i;
        a->rows = N / 4096; a->ld = a->v_local = a->v_total = 4096; a->canon = 8; a->logits = z; a->targets = targets; a->max = x; a->target_logit = x + 64; a->sum = x + 128; a->dtype = LLMPAR_F32;
        g.scale = 1;
        TIME(s, 8, device->xent_max(device, NULL, a));
        printf("  xent max %.2f", N / s * 1e-9);
        TIME(s, 8, device->xent_sum(device, NULL, a));
        printf(" sum %.2f", N / s * 1e-9);
        TIME(s, 8, device->xent_backward(device, NULL, &g));
        printf(" backward %.2f", N / s * 1e-9);
    }
    {
        llmpar_embedding_backward_args a;
        int32_t ids[ROWS];
        memset(&a, 0, sizeof a);
        for (int i = 0; i < ROWS; i++) ids[i] = (int32_t)((uint32_t)i * 2654435761u >> 24);
        a.tokens.batch = a.tokens.leaves = 4; a.tokens.t = a.tokens.t_total = ROWS / 4; a.tokens.canon = 8; a.dim = DIM; a.v_local = 256; a.ids = ids; a.dout = x; a.dtable = y; a.dtype = LLMPAR_F32;
        a.workspace_bytes = device->embedding_backward_workspace(device, &a);
        a.workspace = malloc(a.workspace_bytes);
        TIME(s, 8, device->embedding_backward(device, NULL, &a));
        printf("  embedding backward %.2f\n", N / s * 1e-9);
        free(a.workspace);
    }
    {
        const void *in[8];
        llmpar_tree_sum_args a;
        memset(&a, 0, sizeof a);
        for (int i = 0; i < 8; i++) in[i] = (i < 4 ? x : y) + i % 4 * N;
        a.in = in; a.count = N; a.out = z; a.dtype = LLMPAR_F32;
        for (a.n = 2; a.n <= 8; a.n *= 2) {
            TIME(s, 4, device->tree_sum(device, NULL, &a));
            printf("  tree_sum of %d: %.2f", (int)a.n, N / s * 1e-9);
        }
    }
    {
        llmpar_cast_args a;
        llmpar_square_sum_args q;
        int64_t accumulator[72] = { 0 };
        a.count = q.count = N; a.in = x; a.in_dtype = LLMPAR_F32; a.out = y; a.out_dtype = LLMPAR_BF16;
        TIME(s, 4, device->cast(device, NULL, &a));
        printf("  cast to bf16 %.2f", N / s * 1e-9);
        q.x = x; q.accumulator = accumulator; q.dtype = LLMPAR_F32;
        TIME(s, 4, device->square_sum(device, NULL, &q));
        printf("  square_sum %.2f", N / s * 1e-9);
    }
    {
        llmpar_adamw_args a;
        float *m = numbers(N), *v = (float *)calloc(N, sizeof *v), *g = numbers(N);
        memset(&a, 0, sizeof a);
        a.count = N; a.p = x; a.g = g; a.m = m; a.v = v; a.lr = 1e-3; a.beta1 = 0.9; a.beta2 = 0.95; a.eps = 1e-8; a.correction1 = a.correction2 = 0.5; a.grad_scale = 1; a.dtype = LLMPAR_F32;
        TIME(s, 4, device->adamw(device, NULL, &a));
        printf("  adamw %.2f\n", N / s * 1e-9);
        free(m); free(v); free(g);
    }
    free(x); free(y); free(z); free(w);
}

int main(int argc, char **argv)
{
    llmpar_cpu_level only = LLMPAR_CPU_DEFAULT;
    if (argc > 1 && !llmpar_cpu_level_parse(argv[1], &only)) { fprintf(stderr, "bench_ops: no level \"%s\": portable, avx2, avx512\n", argv[1]); return 2; }
    for (int level = (int)LLMPAR_CPU_PORTABLE; level <= (int)llmpar_cpu_best_level(); level++) {
        llmpar_heap heap;
        llmpar_error error;
        llmpar_cpu_desc desc;
        llmpar_device *device = NULL;
        if (only != LLMPAR_CPU_DEFAULT && level != (int)only) continue;
        llmpar_heap_init(&heap, NULL);
        llmpar_error_clear(&error);
        memset(&desc, 0, sizeof desc);
        desc.level = (llmpar_cpu_level)level;
        if (llmpar_cpu_create(&heap, &error, &desc, &device)) { fprintf(stderr, "bench_ops: %s\n", error.text); return 1; }
        bench_gemm(device);
        bench_attention(device, 512, 8, 2, 64);
        bench_attention(device, 512, 4, 2, 128);
        bench_attention(device, 256, 8, 4, 32);
        bench_rows(device);
        llmpar_cpu_destroy(device);
    }
    return 0;
}
