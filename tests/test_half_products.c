/* BF16 and F16 on the CPU device, what sums products: gemm, cross-entropy, attention; whole and cut into parts. See half_cases.h for how a case is checked. */
#include "half_cases.h"

/* ---- gemm ---- */

typedef struct product { llmpar_gemm_kind kind; int64_t m, n, k; int32_t pieces, segments; } product; /* segments a piece */
/* One product; out: its dtype; c0: what is there before, if it accumulates. Elements [i0, i1) x [j0, j1), terms [k0, k1) of the only piece if that is not all of them. */
static void multiply(const product *p, const float *a, const float *b, llmpar_dtype out, void *c, int64_t ldc, int accumulate, int64_t i0, int64_t i1, int64_t j0, int64_t j1, int64_t k0, int64_t k1)
{
    llmpar_gemm_segment segments[64];
    int tn = p->kind == LLMPAR_GEMM_TN, nt = p->kind == LLMPAR_GEMM_NT, count = p->pieces * p->segments;
    int64_t a_width = tn ? p->m : p->k, b_width = nt ? p->k : p->n, lda = a_width + 3, ldb = b_width + 2;
    const char *a_at = (const char *)put(stored, a, tn ? p->k : p->m, a_width, lda), *b_at = (const char *)put(stored, b, nt ? p->n : p->k, b_width, ldb);
    size_t size = llmpar_dtype_size(stored);
    char *memory;
    llmpar_gemm_args args;
    memset(&args, 0, sizeof args);
    memset(segments, 0, sizeof segments);
    for (int s = 0; s < count; s++) {
        int64_t first = llmpar_piece_begin(s, p->k, count), end = llmpar_piece_begin(s + 1, p->k, count);
        if (k0 > first) first = k0;
        if (k1 < end) end = k1;
        if (end < first) end = first;
        segments[s].piece = s / p->segments;
        segments[s].k = end - first;
        segments[s].lda = lda;
        segments[s].ldb = ldb;
        segments[s].a = a_at + (size_t)(tn ? first * lda + i0 : i0 * lda + first) * size;
        segments[s].b = b_at + (size_t)(nt ? j0 * ldb + first : first * ldb + j0) * size;
    }
    args.m = i1 - i0; args.n = j1 - j0; args.kind = p->kind; args.dtype = stored; args.out_dtype = out; args.accumulate = accumulate;
    args.segments = segments; args.segment_count = count; args.pieces = p->pieces;
    args.c = (char *)c + (size_t)(i0 * ldc + j0) * llmpar_dtype_size(out == LLMPAR_DTYPE_DEFAULT ? stored : out); args.ldc = ldc;
    args.workspace_bytes = device->gemm_workspace(device, &args);
    args.workspace = workspace_of(args.workspace_bytes, &memory);
    CHECK_OK(device->gemm(device, NULL, &args));
    workspace_done(memory, args.workspace_bytes);
}
static void run_product(const product *p)
{
    float *a = values(p->m * p->k, 1), *b = values(p->n * p->k, 1), *start = values(p->m * p->n, 1);
    int64_t ldc = p->n + 5;
    void *c = put(stored, NULL, p->m, p->n, ldc);
    multiply(p, a, b, LLMPAR_DTYPE_DEFAULT, c, ldc, 0, 0, p->m, 0, p->n, 0, p->k);
    take(c, p->m, p->n, ldc);
    c = put(LLMPAR_F32, NULL, p->m, p->n, ldc); /* the sums themselves */
    multiply(p, a, b, LLMPAR_F32, c, ldc, 0, 0, p->m, 0, p->n, 0, p->k);
    for (int64_t i = 0; i < p->m; i++) take_sum((float *)c + i * ldc, p->n);
    if (p->pieces == 1) {
        c = put(LLMPAR_F32, start, p->m, p->n, ldc);
        multiply(p, a, b, LLMPAR_F32, c, ldc, 1, 0, p->m, 0, p->n, 0, p->k);
        for (int64_t i = 0; i < p->m; i++) take_sum((float *)c + i * ldc, p->n);
    }
    ops_release();
    free(a); free(b); free(start);
}
/* few rows and many; k that fills one part, several, none; columns that are cut into blocks */
static const product products[] = {
    { LLMPAR_GEMM_NT, 1, 1, 1, 1, 1 }, { LLMPAR_GEMM_NN, 3, 17, 40, 1, 1 }, { LLMPAR_GEMM_TN, 13, 33, 19, 1, 2 }, { LLMPAR_GEMM_NT, 25, 70, 131, 4, 1 }, { LLMPAR_GEMM_NN, 25, 70, 131, 8, 2 },
    { LLMPAR_GEMM_TN, 49, 100, 131, 8, 1 }, { LLMPAR_GEMM_NT, 40, 65, 1700, 1, 3 }, { LLMPAR_GEMM_NN, 31, 129, 1700, 8, 1 }, { LLMPAR_GEMM_TN, 50, 66, 1701, 5, 2 }, { LLMPAR_GEMM_NT, 2, 300, 900, 8, 1 },
    { LLMPAR_GEMM_NN, 5, 40, 0, 3, 1 }, { LLMPAR_GEMM_NT, 30, 1600, 800, 1, 1 }, { LLMPAR_GEMM_TN, 800, 40, 790, 2, 1 }, { LLMPAR_GEMM_NT, 97, 97, 97, 1, 1 },
};
static void run_gemm(int shape) { wild = 0; run_product(&products[shape]); }
static void run_gemm_wild(int shape) { wild = 1; run_product(&products[shape]); wild = 0; }
TEST(gemm)
{
    pairs_differ = 1;
    everywhere("gemm", run_gemm, (int)(sizeof products / sizeof products[0]));
    everywhere("gemm with infinities", run_gemm_wild, 5);
    pairs_differ = 0;
}

/* The whole and its parts: rows and columns of c anywhere, and k cut where the sums stay f32. */
TEST(gemm_cut)
{
    for (int type = 0; type < 2; type++) for (int level = (int)LLMPAR_CPU_PORTABLE; level <= (int)llmpar_cpu_best_level(); level++) for (int kind = 1; kind <= 3; kind++) {
        product p = { (llmpar_gemm_kind)kind, 37, 90, 820, 1, 1 };
        uint16_t *whole, *parts;
        float *a, *b, *chain;
        half = stored = type ? LLMPAR_F16 : LLMPAR_BF16;
        device = ops_device((llmpar_cpu_level)level, 1);
        draw_state = 9;
        a = values(p.m * p.k, 1); b = values(p.n * p.k, 1);
        whole = (uint16_t *)put(stored, NULL, p.m, p.n, p.n); parts = (uint16_t *)put(stored, NULL, p.m, p.n, p.n);
        chain = (float *)put(LLMPAR_F32, NULL, p.m, p.n, p.n);
        multiply(&p, a, b, LLMPAR_DTYPE_DEFAULT, whole, p.n, 0, 0, p.m, 0, p.n, 0, p.k);
        for (int64_t i = 0, i1; i < p.m; i = i1) {
            i1 = i + 1 + ops_below(20) < p.m ? i + 1 + (p.m - i) / 2 : p.m;
            for (int64_t j = 0, j1; j < p.n; j = j1) {
                j1 = j + 1 + ops_below(50) < p.n ? j + 1 + (p.n - j) / 2 : p.n;
                multiply(&p, a, b, LLMPAR_DTYPE_DEFAULT, parts, p.n, 0, i, i1, j, j1, 0, p.k);
            }
        }
        CHECK_BYTES(parts, whole, (size_t)(p.m * p.n) * sizeof *whole);
        for (int64_t k = 0, k1; k < p.k; k = k1) {
            k1 = k + 1 + ops_below(400);
            if (level == (int)LLMPAR_CPU_AVX512BF16) k1 += k1 % 2; /* not between the two of a pair */
            if (k1 > p.k) k1 = p.k;
            multiply(&p, a, b, LLMPAR_F32, chain, p.n, k > 0, 0, p.m, 0, p.n, k, k1);
        }
        for (int64_t i = 0; i < p.m * p.n; i++) if (rounded(chain[i], half) != whole[i]) { TEST_FAIL("element %ld of a product cut in k", (long)i); break; }
        ops_release();
        free(a); free(b);
    }
}

/* ---- cross-entropy ---- */

/* The steps on vocabulary [begin, end) of v; maxima and sums come from outside when they are given. */
typedef struct loss { int64_t rows, v; const float *logits; const int32_t *targets; float *max, *sum; } loss;
static void xent(const loss *l, int64_t begin, int64_t end, int64_t ld, float *max, float *target_logit, float *sum, void **gradient)
{
    int64_t width = end - begin, n = l->rows;
    float *shard = (float *)malloc((size_t)(n * width + 1) * sizeof(float));
    llmpar_xent_args a;
    llmpar_xent_backward_args b;
    for (int64_t r = 0; r < n; r++) memcpy(shard + r * width, l->logits + r * l->v + begin, (size_t)width * sizeof(float));
    memset(&a, 0, sizeof a);
    a.rows = n; a.ld = ld; a.v_begin = begin; a.v_local = width; a.v_total = l->v; a.canon = 8; a.targets = l->targets; a.dtype = stored;
    a.logits = put(stored, shard, n, width, ld);
    a.max = put_sum(NULL, n); a.target_logit = put_sum(NULL, n); a.sum = put_sum(NULL, n);
    CHECK_OK(device->xent_max(device, NULL, &a));
    memcpy(max, a.max, (size_t)n * sizeof(float)); memcpy(target_logit, a.target_logit, (size_t)n * sizeof(float));
    if (l->max) memcpy(a.max, l->max, (size_t)n * sizeof(float));
    CHECK_OK(device->xent_sum(device, NULL, &a));
    memcpy(sum, a.sum, (size_t)n * sizeof(float));
    if (l->sum) memcpy(a.sum, l->sum, (size_t)n * sizeof(float));
    memset(&b, 0, sizeof b);
    b.forward = a; b.scale = 0.125f;
    CHECK_OK(device->xent_backward(device, NULL, &b));
    *gradient = a.logits;
    free(shard);
}
static void run_xent(int shape)
{
    int64_t rows = 4, v = dims[shape];
    float max[4], target_logit[4], sum[4];
    int32_t targets[4];
    double each[4];
    llmpar_exact_sum total;
    llmpar_xent_loss_args a;
    loss l;
    void *gradient;
    memset(&l, 0, sizeof l);
    l.rows = rows; l.v = v; l.targets = targets; l.logits = values(rows * v, 8);
    for (int i = 0; i < 4; i++) targets[i] = i == 2 ? -1 : (int32_t)(draw() % (uint32_t)v);
    xent(&l, 0, v, v + 3, max, target_logit, sum, &gradient);
    take_sum(max, rows); take_sum(target_logit, rows); take_sum(sum, rows); take(gradient, rows, v, v + 3);
    memset(&a, 0, sizeof a);
    memset(&total, 0, sizeof total);
    a.rows = rows; a.max = max; a.target_logit = target_logit; a.sum = sum; a.targets = targets; a.token_loss = each; a.accumulator = (int64_t *)(void *)&total; a.dtype = stored;
    CHECK_OK(device->xent_loss(device, NULL, &a));
    for (int i = 0; i < 4; i++) take_sum(&each[i], 2);
    for (int i = 0; i < 72; i++) take_sum(&((int64_t *)(void *)&total)[i], 2);
    ops_release();
    free((void *)(uintptr_t)l.logits);
}
TEST(cross_entropy) { everywhere("xent", run_xent, DIMS); }

/* Every BF16 number x below several maxima, as a row of its own beside one that ends a vocabulary of 70: the sum against e^(x - max) within 2 / 2^23 of it; the gradient within half a unit of BF16 and
   a little; -inf is nothing, NaN and infinities show. */
TEST(exponentials_of_bf16)
{
    static const float maxima[] = { 0, 1.5f, -7.25f, 63, 30000, -1e30f };
    enum { V = 70 };
    for (int level = (int)LLMPAR_CPU_PORTABLE; level <= (int)llmpar_cpu_best_level(); level++) for (int m = 0; m < 6; m++) {
        int64_t rows = 0;
        int place = m % 2 ? 68 : 3;
        double worst = 0, worst_gradient = 0;
        uint16_t *x = (uint16_t *)malloc(65536 * V * 2);
        float *max = (float *)malloc(65536 * sizeof *max), *sum = (float *)malloc(65536 * sizeof *sum), *value = (float *)malloc(65536 * sizeof *value);
        int32_t *targets = (int32_t *)calloc(65536, sizeof *targets);
        llmpar_xent_backward_args b;
        device = ops_device((llmpar_cpu_level)level, 1);
        for (uint32_t i = 0; i < 65536; i++) {
            float one = llmpar_bf16_to_f32((uint16_t)i);
            if (!(one <= maxima[m])) continue;
            for (int j = 0; j < V; j++) x[rows * V + j] = j == place ? (uint16_t)i : 0xff80;
            value[rows] = one;
            targets[rows] = 0;
            max[rows++] = maxima[m];
        }
        memset(&b, 0, sizeof b);
        b.forward.rows = rows; b.forward.ld = b.forward.v_local = b.forward.v_total = V; b.forward.canon = 1; b.forward.dtype = LLMPAR_BF16; b.forward.logits = x; b.forward.targets = targets; b.forward.max = max; b.forward.sum = sum;
        CHECK_OK(device->xent_sum(device, NULL, &b.forward));
        for (int64_t r = 0; r < rows; r++) {
            double d = (double)(value[r] - max[r]), want = exp(d), off = fabs((double)sum[r] - want);
            if (want < 1.2e-38) worst = off < 1.2e-38 ? worst : 1e9; /* cleared, or about that small */
            else off = off / want * 8388608, worst = off > worst ? off : worst;
            sum[r] = 3;
        }
        b.scale = 0.5f;
        CHECK_OK(device->xent_backward(device, NULL, &b));
        for (int64_t r = 0; r < rows; r++) {
            double want = exp((double)(value[r] - max[r])) / 6, got = (double)llmpar_bf16_to_f32(x[r * V + place]), off;
            for (int j = 1; j < V; j++) if (j != place && x[r * V + j]) { TEST_FAIL("a gradient where there is no probability"); break; }
            if (want < 1e-37) worst_gradient = fabs(got - want) < 1e-37 ? worst_gradient : 1e9;
            else off = fabs(got - want) / ldexp(1, ilogb(want) - 7), worst_gradient = off > worst_gradient ? off : worst_gradient;
        }
        if (!(worst <= 2) || !(worst_gradient <= 0.5001)) TEST_FAIL("%s, maximum %g: %.3f / 2^23, gradient %.5f units", llmpar_cpu_level_name((llmpar_cpu_level)level), (double)maxima[m], worst, worst_gradient);
        free(x); free(max); free(sum); free(value); free(targets);
    }
}

/* One that is not finite among finite ones, anywhere in the row, shows in the sum; -inf does not. */
TEST(bf16_not_finite)
{
    for (int level = (int)LLMPAR_CPU_PORTABLE; level <= (int)llmpar_cpu_best_level(); level++) for (int place = 0; place < 150; place++) {
        static const uint16_t odd[4] = { 0x7fc0, 0xffc1, 0x7f80, 0xff80 };
        for (int kind = 0; kind < 4; kind++) {
            uint16_t x[150];
            float max, logit, sum;
            int32_t target = 149;
            llmpar_xent_args a;
            for (int j = 0; j < 150; j++) x[j] = llmpar_f32_to_bf16((float)(j % 7));
            x[place] = odd[kind];
            memset(&a, 0, sizeof a);
            a.rows = 1; a.ld = a.v_local = a.v_total = 150; a.canon = 2; a.dtype = LLMPAR_BF16; a.logits = x; a.targets = &target; a.max = &max; a.target_logit = &logit; a.sum = &sum;
            device = ops_device((llmpar_cpu_level)level, 1);
            CHECK_OK(device->xent_max(device, NULL, &a));
            CHECK_OK(device->xent_sum(device, NULL, &a));
            CHECK(kind == 3 ? sum >= 1 && sum < 150 : !(sum - sum == 0));
        }
    }
}

/* The vocabulary in two shards: the same maxima, the pieces' subtrees, and every gradient with the whole's bits. */
TEST(cross_entropy_cut)
{
    enum { ROWS = 3, V = 3001 };
    for (int type = 0; type < 2; type++) for (int level = (int)LLMPAR_CPU_PORTABLE; level <= (int)llmpar_cpu_best_level(); level++) {
        int32_t targets[ROWS] = { 5, 2999, -1 };
        float max[ROWS], logit[ROWS], sum[ROWS], part_max[2][ROWS], part_logit[2][ROWS], part_sum[2][ROWS];
        int64_t middle = llmpar_piece_begin(4, V, 8);
        void *gradient, *part[2];
        loss l;
        half = stored = type ? LLMPAR_F16 : LLMPAR_BF16;
        device = ops_device((llmpar_cpu_level)level, 1);
        memset(&l, 0, sizeof l);
        draw_state = 4;
        l.rows = ROWS; l.v = V; l.targets = targets; l.logits = values(ROWS * V, 9);
        xent(&l, 0, V, V, max, logit, sum, &gradient);
        l.max = max; l.sum = sum;
        xent(&l, 0, middle, middle + 7, part_max[0], part_logit[0], part_sum[0], &part[0]);
        xent(&l, middle, V, V, part_max[1], part_logit[1], part_sum[1], &part[1]);
        for (int r = 0; r < ROWS; r++) {
            float both_max = part_max[0][r] > part_max[1][r] ? part_max[0][r] : part_max[1][r], both_logit = part_logit[0][r] > part_logit[1][r] ? part_logit[0][r] : part_logit[1][r], both_sum = part_sum[0][r] + part_sum[1][r];
            const uint16_t *row = (const uint16_t *)gradient + r * V;
            CHECK_BYTES(&both_max, &max[r], sizeof(float));
            CHECK_BYTES(&both_logit, &logit[r], sizeof(float));
            CHECK_BYTES(&both_sum, &sum[r], sizeof(float));
            CHECK_BYTES((const uint16_t *)part[0] + r * (middle + 7), row, (size_t)middle * 2);
            CHECK_BYTES((const uint16_t *)part[1] + r * V, row + middle, (size_t)(V - middle) * 2);
        }
        ops_release();
        free((void *)(uintptr_t)l.logits);
    }
}

/* ---- attention ---- */

typedef struct shape_of { int64_t batch, tq, tk, stride, heads, kv_heads, e; int documents; } shape_of;
static const shape_of attentions[] = {
    { 1, 1, 1, 1, 1, 1, 1, 0 }, { 2, 9, 9, 9, 4, 2, 7, 0 }, { 1, 70, 70, 70, 3, 1, 33, 1 }, { 2, 130, 130, 130, 5, 5, 16, 1 }, { 1, 66, 66, 66, 6, 1, 130, 0 }, { 2, 1, 40, 50, 4, 2, 64, 0 }, { 1, 5, 90, 91, 2, 2, 80, 0 },
};
enum { ATTENTIONS = 7 };
static int32_t *documents_of(const shape_of *s)
{
    int32_t *start = (int32_t *)calloc((size_t)(s->batch * s->tk), sizeof *start);
    for (int64_t b = 0; b < s->batch; b++) for (int64_t i = 1; i < s->tk; i++) start[b * s->tk + i] = draw() % 30 == 0 ? (int32_t)i : start[b * s->tk + i - 1];
    return start;
}
/* Forward on query positions [tk - tq, tk) of heads [h0, h1); lse has one number a row. */
static void attend(const shape_of *s, const float *q, const float *k, const float *v, const int32_t *start, int64_t tq, int64_t h0, int64_t h1, int64_t pad, llmpar_attention_args *a)
{
    int64_t group = s->heads / s->kv_heads, wide = s->heads * s->e, narrow = s->kv_heads * s->e;
    size_t size = llmpar_dtype_size(stored);
    char *memory;
    memset(a, 0, sizeof *a);
    a->batch = s->batch; a->tq = tq; a->tk = s->tk; a->tk_stride = s->stride; a->heads = h1 - h0; a->kv_heads = h1 - h0 < group ? 1 : (h1 - h0) / group; a->head_dim = s->e; a->dtype = stored; a->scale = 1 / sqrt((double)s->e);
    a->ldq = wide + pad; a->ldk = narrow + pad; a->ldv = narrow + 2 * pad; a->ldo = (h1 - h0) * s->e + pad; a->doc_start = start;
    a->q = (char *)put(stored, q, s->batch * s->tq, wide, a->ldq) + (size_t)((s->tq - tq) * a->ldq + h0 * s->e) * size;
    a->k = (char *)put(stored, k, s->batch * s->stride, narrow, a->ldk) + (size_t)(h0 / group * s->e) * size;
    a->v = (char *)put(stored, v, s->batch * s->stride, narrow, a->ldv) + (size_t)(h0 / group * s->e) * size;
    a->out = put(stored, NULL, s->batch * tq, a->heads * s->e, a->ldo); a->lse = put_sum(NULL, s->batch * a->heads * tq);
    a->workspace_bytes = device->attention_workspace(device, a);
    a->workspace = workspace_of(a->workspace_bytes, &memory);
    CHECK_OK(device->attention(device, NULL, a));
    workspace_done(memory, a->workspace_bytes);
}
static void run_attention(int shape)
{
    const shape_of *s = &attentions[shape];
    int64_t wide = s->heads * s->e, narrow = s->kv_heads * s->e, rows = s->batch * s->tq;
    float *q = values(rows * wide, 1), *k = values(s->batch * s->stride * narrow, 1), *v = values(s->batch * s->stride * narrow, 1), *out = values(rows * wide, 0.5), *dout = values(rows * wide, 1), *lse = values(s->batch * s->heads * s->tq, 1);
    int32_t *start = s->documents ? documents_of(s) : NULL;
    llmpar_attention_args f;
    llmpar_attention_backward_args b;
    char *memory;
    attend(s, q, k, v, start, s->tq, 0, s->heads, 3, &f);
    take(f.out, rows, wide, f.ldo); take_sum(f.lse, s->batch * s->heads * s->tq);
    for (int i = 0; i < 3 && s->tq == s->stride; i++) { /* dk, dv as they are stored; at a distance of their own; their sums */
        llmpar_dtype dkv = i < 2 ? stored : LLMPAR_F32;
        int64_t ld_dk, ld_dv;
        ops_release();
        memset(&b, 0, sizeof b);
        b.forward = f;
        for (int64_t j = 0; j < s->batch * s->heads * s->tq; j++) lse[j] = (float)(3.0 + fabs((double)lse[j])); /* scores stay below it */
        b.forward.q = put(stored, q, rows, wide, f.ldq); b.forward.k = put(stored, k, rows, narrow, f.ldk); b.forward.v = put(stored, v, rows, narrow, f.ldv);
        b.forward.out = put(stored, out, rows, wide, f.ldo); b.forward.lse = put_sum(lse, s->batch * s->heads * s->tq); b.dout = put(stored, dout, rows, wide, f.ldo);
        b.dkv_dtype = i == 0 ? LLMPAR_DTYPE_DEFAULT : dkv; b.ld_dkv = i ? narrow + 5 : 0;
        ld_dk = i ? b.ld_dkv : f.ldk; ld_dv = i ? b.ld_dkv : f.ldv;
        b.dq = put(stored, NULL, rows, wide, f.ldq); b.dk = put(dkv, NULL, rows, narrow, ld_dk); b.dv = put(dkv, NULL, rows, narrow, ld_dv);
        b.forward.workspace_bytes = device->attention_backward_workspace(device, &b);
        b.forward.workspace = workspace_of(b.forward.workspace_bytes, &memory);
        CHECK_OK(device->attention_backward(device, NULL, &b));
        workspace_done(memory, b.forward.workspace_bytes);
        take(b.dq, rows, wide, f.ldq);
        if (i < 2) { take(b.dk, rows, narrow, ld_dk); take(b.dv, rows, narrow, ld_dv); }
        else for (int64_t r = 0; r < rows; r++) { take_sum((float *)b.dk + r * ld_dk, narrow); take_sum((float *)b.dv + r * ld_dv, narrow); }
    }
    ops_release();
    free(q); free(k); free(v); free(out); free(dout); free(lse); free(start);
}
TEST(attention)
{
    pairs_differ = 1; /* test_attention has the order of its scores */
    everywhere("attention", run_attention, ATTENTIONS);
    pairs_differ = 0;
}

/* The last rows alone, and one KV head's group alone, have the bits of the whole. */
TEST(attention_cut)
{
    for (int type = 0; type < 2; type++) for (int level = (int)LLMPAR_CPU_PORTABLE; level <= (int)llmpar_cpu_best_level(); level++) {
        shape_of s = { 1, 100, 100, 100, 6, 2, 19, 1 };
        int64_t e = s.e, wide = s.heads * e;
        float *q, *k, *v;
        int32_t *start;
        llmpar_attention_args whole, part;
        half = stored = type ? LLMPAR_F16 : LLMPAR_BF16;
        device = ops_device((llmpar_cpu_level)level, 2);
        draw_state = 8;
        q = values(s.tq * wide, 1); k = values(s.tk * 2 * e, 1); v = values(s.tk * 2 * e, 1);
        start = documents_of(&s);
        attend(&s, q, k, v, start, s.tq, 0, s.heads, 1, &whole);
        for (int64_t tq = 1; tq < s.tq; tq += 33) {
            attend(&s, q, k, v, start, tq, 0, s.heads, 2, &part);
            for (int64_t r = 0; r < tq; r++) CHECK_BYTES((uint16_t *)part.out + r * part.ldo, (uint16_t *)whole.out + (s.tq - tq + r) * whole.ldo, (size_t)wide * 2);
        }
        attend(&s, q, k, v, start, s.tq, 3, 6, 0, &part);
        for (int64_t r = 0; r < s.tq; r++) CHECK_BYTES((uint16_t *)part.out + r * part.ldo, (uint16_t *)whole.out + r * whole.ldo + 3 * e, (size_t)(3 * e) * 2);
        CHECK_BYTES(part.lse, (float *)whole.lse + 3 * s.tq, (size_t)(3 * s.tq) * sizeof(float));
        ops_release();
        free(q); free(k); free(v); free(start);
    }
}

TEST(all_given_back) { ops_close(); }

TEST_LIST(T_(gemm), T_(gemm_cut), T_(cross_entropy), T_(exponentials_of_bf16), T_(bf16_not_finite), T_(cross_entropy_cut), T_(attention), T_(attention_cut), T_(all_given_back))
