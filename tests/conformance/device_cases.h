/* device_cases: what each operation of a device table is tried with. A case builds its arguments with the buffers of trial.h, so that the same function runs on the table under test and on the reference. */
#ifndef CONFORMANCE_DEVICE_CASES_H
#define CONFORMANCE_DEVICE_CASES_H

#include "trial.h"

/* ---- operations: each makes case number `k` on the trial's table; -1 when there are no more cases ---- */

typedef llmpar_status (*operation)(trial *t, int k);
#define NO_MORE ((llmpar_status)-1)

/* One element in every row, at stride 0: a bias as one more column of the weight, and the sum of columns as a product with 1. */
static llmpar_status gemm_stride_0(trial *t, int columns)
{
    enum { M = 13, N = 17, DEPTH = 70, PIECES = 4 };
    llmpar_gemm_segment list[PIECES];
    llmpar_gemm_args a;
    size_t item = llmpar_dtype_size(t->dtype);
    memset(&a, 0, sizeof a);
    memset(list, 0, sizeof list);
    note(t, "%s", columns ? "tn, b of stride 0" : "nt, the second segment's a of stride 0");
    const char *A = (const char *)(columns ? in2(t, "a", DEPTH, M, M, 1) : in2(t, "a", M, DEPTH, DEPTH, 1)), *one = (const char *)in2(t, "one", 1, 1, 1, 1);
    a.m = M;
    a.n = a.ldc = columns ? 1 : N;
    a.kind = columns ? LLMPAR_GEMM_TN : LLMPAR_GEMM_NT;
    a.dtype = t->dtype;
    a.pieces = columns ? PIECES : 1;
    a.segment_count = columns ? PIECES : 2;
    a.segments = list;
    for (int32_t p = 0; p < PIECES && columns; p++) {
        int64_t begin = llmpar_piece_begin(p, DEPTH, PIECES);
        list[p].a = A + (size_t)(begin * M) * item;
        list[p].b = one;
        list[p].lda = M;
        list[p].k = llmpar_piece_begin(p + 1, DEPTH, PIECES) - begin;
        list[p].piece = p;
    }
    if (!columns) {
        list[0].a = A;
        list[0].b = in2(t, "b", N, DEPTH, DEPTH, 1);
        list[0].k = list[0].lda = list[0].ldb = DEPTH;
        list[1].a = one;
        list[1].b = in2(t, "bias", N, 1, 1, 1);
        list[1].k = list[1].ldb = 1;
    }
    a.c = out_as(t, "c", t->dtype, M, a.n, a.ldc, 0);
    a.workspace_bytes = t->d->gemm_workspace(t->d, &a);
    a.workspace = scratch(t, a.workspace_bytes);
    return t->d->gemm(t->d, t->stream, &a);
}

static llmpar_status op_gemm(trial *t, int k)
{
    static const int64_t sizes[][3] = { { 1, 1, 1 }, { 3, 5, 7 }, { 7, 33, 16 }, { 13, 17, 70 }, { 32, 48, 64 }, { 2, 3, 0 }, { 0, 4, 3 }, { 40, 31, 130 } };
    enum { SIZES = sizeof sizes / sizeof sizes[0] };
    if (k >= SIZES * 3 * 3) return k < SIZES * 3 * 3 + 2 ? gemm_stride_0(t, k - SIZES * 3 * 3) : NO_MORE;
    llmpar_gemm_kind kind = (llmpar_gemm_kind)(LLMPAR_GEMM_NT + k % 3);
    int style = k / 3 % 3; /* one chain; 8 pieces, some of them empty or of two segments; accumulate */
    int64_t m = sizes[k / 9][0], n = sizes[k / 9][1], depth = sizes[k / 9][2];
    static const char *const kinds[] = { "?", "nt", "nn", "tn" };
    llmpar_gemm_segment list[16];
    llmpar_gemm_args a;
    memset(&a, 0, sizeof a);
    memset(list, 0, sizeof list);
    a.m = m;
    a.n = n;
    a.kind = kind;
    a.dtype = t->dtype;
    a.pieces = style == 1 ? 8 : 1;
    a.accumulate = style == 2;
    a.ldc = n + 3;
    note(t, "%s m=%lld n=%lld k=%lld, %s", kinds[kind], (long long)m, (long long)n, (long long)depth, style == 0 ? "1 piece" : style == 1 ? "8 pieces, piece 5 in two segments" : "accumulate");
    int64_t lda = (kind == LLMPAR_GEMM_TN ? m : depth) + 1, ldb = (kind == LLMPAR_GEMM_NT ? depth : n) + 2;
    const char *A = (const char *)(kind == LLMPAR_GEMM_TN ? in2(t, "a", depth, m, lda, 1) : in2(t, "a", m, depth, lda, 1));
    const char *B = (const char *)(kind == LLMPAR_GEMM_NT ? in2(t, "b", n, depth, ldb, 1) : in2(t, "b", depth, n, ldb, 1));
    size_t item = llmpar_dtype_size(t->dtype);
    for (int32_t p = 0; p < a.pieces; p++) {
        int64_t begin = llmpar_piece_begin(p, depth, a.pieces), end = llmpar_piece_begin(p + 1, depth, a.pieces), middle = p == 5 ? (begin + end) / 2 : end;
        if (p == 2 && depth < 10) continue; /* a piece without segments; its rows are left out on both tables */
        for (int part = 0; part < 2; part++) {
            int64_t from = part ? middle : begin, to = part ? end : middle;
            if (part && p != 5) continue;
            llmpar_gemm_segment *s = &list[a.segment_count++];
            s->a = A + (size_t)(kind == LLMPAR_GEMM_TN ? from * lda : from) * item;
            s->b = B + (size_t)(kind == LLMPAR_GEMM_NT ? from : from * ldb) * item;
            s->lda = lda;
            s->ldb = ldb;
            s->k = to - from;
            s->piece = p;
        }
    }
    a.segments = list;
    a.c = out_as(t, "c", t->dtype, m, n, a.ldc, a.accumulate ? 1 : 0);
    a.workspace_bytes = t->d->gemm_workspace(t->d, &a);
    a.workspace = scratch(t, a.workspace_bytes);
    llmpar_status st = t->d->gemm(t->d, t->stream, &a);
    if (st || !t->tested || m * n == 0) return st;
    if (style == 0 && kind != LLMPAR_GEMM_TN) { /* the last row of the product alone */
        llmpar_gemm_args row = a;
        char *alone = (char *)malloc((size_t)n * item);
        llmpar_gemm_segment mine = list[0];
        mine.a = A + (size_t)((m - 1) * lda) * item;
        row.m = 1;
        row.c = alone;
        row.segments = &mine;
        row.workspace_bytes = t->d->gemm_workspace(t->d, &row);
        row.workspace = malloc(row.workspace_bytes + 1);
        if (a.segment_count == 1) {
            st = t->d->gemm(t->d, t->stream, &row);
            if (!st) same(t, "the last row alone and among others", (const char *)a.c + (size_t)((m - 1) * a.ldc) * item, alone, n);
        }
        free(row.workspace);
        free(alone);
    }
    if (st || style != 1) return st;
    /* The pieces computed one by one, as ranks do, and added in the tree: the same bits. */
    int64_t cells = m * n;
    char *parts = (char *)calloc((size_t)(9 * cells), item);
    const void *leaves[8];
    for (int32_t p = 0; p < 8 && !st; p++) {
        llmpar_gemm_args one = a;
        llmpar_gemm_segment mine[2];
        one.c = parts + (size_t)(p * cells) * item;
        one.ldc = n;
        one.pieces = 1;
        one.segment_count = 0;
        for (int32_t s = 0; s < a.segment_count; s++)
            if (list[s].piece == p) mine[one.segment_count] = list[s], mine[one.segment_count++].piece = 0;
        one.segments = mine;
        one.workspace_bytes = t->d->gemm_workspace(t->d, &one);
        one.workspace = malloc(one.workspace_bytes + 1);
        st = t->d->gemm(t->d, t->stream, &one);
        free(one.workspace);
        leaves[p] = one.c;
    }
    llmpar_tree_sum_args sum;
    memset(&sum, 0, sizeof sum);
    sum.in = leaves;
    sum.n = 8;
    sum.count = (size_t)cells;
    sum.out = parts + (size_t)(8 * cells) * item;
    sum.dtype = t->dtype;
    if (!st) st = t->d->tree_sum(t->d, t->stream, &sum);
    for (int64_t i = 0; i < m && !st; i++) same(t, "8 pieces at once and one by one", (const char *)a.c + (size_t)(i * a.ldc) * item, (const char *)sum.out + (size_t)(i * n) * item, n);
    free(parts);
    return st;
}

static const int64_t norm_dims[] = { 2, 16, 33, 130 };

static llmpar_status op_rmsnorm(trial *t, int k)
{
    if (k >= 12) return NO_MORE;
    int64_t rows = 5, dim = norm_dims[k / 3];
    int kind = k % 3; /* alone; with residual; sum in place of the residual */
    llmpar_rmsnorm_args a;
    memset(&a, 0, sizeof a);
    note(t, "rows=%lld dim=%lld, %s", (long long)rows, (long long)dim, kind == 0 ? "no residual" : kind == 1 ? "residual" : "sum == residual");
    a.rows = rows;
    a.dim = dim;
    a.eps = 1e-5;
    a.dtype = t->dtype;
    a.x = in1(t, "x", rows * dim, 2);
    if (kind == 1) a.residual = in1(t, "residual", rows * dim, 1);
    a.w = in1(t, "w", dim, 1.5);
    if (kind == 1) a.sum = out1(t, "sum", rows * dim);
    if (kind == 2) a.residual = a.sum = out_as(t, "sum", t->dtype, 1, rows * dim, rows * dim, 1);
    a.y = out1(t, "y", rows * dim);
    a.rstd = out1(t, "rstd", rows);
    llmpar_status st = t->d->rmsnorm(t->d, t->stream, &a);
    if (st || !t->tested || kind) return st;
    size_t item = llmpar_dtype_size(t->dtype);
    char *alone = (char *)malloc((size_t)(dim + 1) * item);
    llmpar_rmsnorm_args row = a;
    row.rows = 1;
    row.x = (const char *)a.x + (size_t)(3 * dim) * item;
    row.y = alone;
    row.rstd = alone + (size_t)dim * item;
    st = t->d->rmsnorm(t->d, t->stream, &row);
    same(t, "a row alone and among others", (const char *)a.y + (size_t)(3 * dim) * item, alone, dim);
    free(alone);
    return st;
}

static llmpar_tokens tokens(int64_t batch, int64_t t, int64_t leaves)
{
    llmpar_tokens k;
    memset(&k, 0, sizeof k);
    k.batch = batch;
    k.t = k.t_total = t;
    k.leaves = leaves;
    k.canon = 8;
    return k;
}

static llmpar_status op_rmsnorm_backward(trial *t, int k)
{
    if (k >= 16) return NO_MORE;
    int64_t batch = 4, length = 9, rows = batch * length, dim = norm_dims[k / 4];
    int kind = k % 4; /* plain; residual; dx == dresidual; no dw */
    llmpar_rmsnorm_backward_args a;
    memset(&a, 0, sizeof a);
    note(t, "rows=%lld dim=%lld leaves=2, %s", (long long)rows, (long long)dim, kind == 0 ? "no dresidual" : kind == 1 ? "dresidual" : kind == 2 ? "dx == dresidual" : "dw_leaves NULL");
    a.tokens = tokens(batch, length, 2);
    a.dim = dim;
    a.dtype = t->dtype;
    a.dy = in1(t, "dy", rows * dim, 1);
    a.x = in1(t, "x", rows * dim, 2);
    a.w = in1(t, "w", dim, 1.5);
    double *x = (double *)malloc((size_t)(rows * dim) * sizeof *x);
    for (int64_t i = 0; i < rows * dim; i++) x[i] = load(a.x, i, t->dtype);
    void *rstd = grade_put("rstd", (size_t)rows * llmpar_dtype_size(t->dtype), llmpar_dtype_size(t->dtype), t->placement);
    for (int64_t r = 0; r < rows; r++) {
        double s = 0;
        for (int64_t j = 0; j < dim; j++) s += x[r * dim + j] * x[r * dim + j];
        store(rstd, r, t->dtype, (double)(float)(1 / sqrt(s / (double)dim + 1e-5)));
    }
    free(x);
    a.rstd = remember(t, "rstd", rstd, (size_t)rows * llmpar_dtype_size(t->dtype));
    if (kind == 1) a.dresidual = in1(t, "dresidual", rows * dim, 1);
    if (kind == 2) a.dresidual = a.dx = out_as(t, "dx", t->dtype, 1, rows * dim, rows * dim, 1);
    else a.dx = out1(t, "dx", rows * dim);
    if (kind != 3) a.dw_leaves = out2(t, "dw_leaves", 2, dim, dim);
    llmpar_status st = t->d->rmsnorm_backward(t->d, t->stream, &a);
    if (st || !t->tested || kind) return st;
    /* The second leaf alone, and its positions on two ranks: pieces 0 to 3 and 4 to 7, whose sums added are the whole's bits. */
    size_t item = llmpar_dtype_size(t->dtype), row = (size_t)dim * item;
    char *part = (char *)malloc((size_t)(4 * rows + 8) * row);
    char *dy = part, *px = dy + (size_t)rows * row, *dx = px + (size_t)rows * row, *scales = dx + (size_t)rows * row, *dw = scales + (size_t)rows * row;
    for (int cut = 0; cut < 3 && !st; cut++) {
        llmpar_rmsnorm_backward_args b = a;
        int64_t begin = cut == 2 ? llmpar_piece_begin(4, length, 8) : 0, finish = cut == 1 ? llmpar_piece_begin(4, length, 8) : length, at = 0;
        for (int64_t q = 2; q < 4; q++)
            for (int64_t i = begin; i < finish; i++, at++) {
                memcpy(dy + (size_t)at * row, (const char *)a.dy + (size_t)(q * length + i) * row, row);
                memcpy(px + (size_t)at * row, (const char *)a.x + (size_t)(q * length + i) * row, row);
                memcpy(scales + (size_t)at * item, (const char *)a.rstd + (size_t)(q * length + i) * item, item);
            }
        b.tokens = tokens(2, finish - begin, 1);
        b.tokens.t_begin = begin;
        b.tokens.t_total = length;
        b.dy = dy;
        b.x = px;
        b.rstd = scales;
        b.dx = dx;
        b.dw_leaves = dw + (size_t)cut * row;
        st = t->d->rmsnorm_backward(t->d, t->stream, &b);
    }
    for (int64_t j = 0; j < dim && !st; j++) { /* half + half where the second half was */
        double first = load(dw + row, j, t->dtype), second = load(dw + 2 * row, j, t->dtype);
        store(dw + row, j, t->dtype, t->dtype == LLMPAR_F64 ? first + second : (double)((float)first + (float)second));
    }
    if (!st) same(t, "dw of a leaf alone and among others", (const char *)a.dw_leaves + row, dw, dim);
    if (!st) same(t, "dw of all positions and of two halves added", (const char *)a.dw_leaves + row, dw + row, dim);
    free(part);
    return st;
}

static llmpar_status op_rope(trial *t, int k)
{
    static const int64_t dims[] = { 2, 8, 38, 64 };
    if (k >= 8) return NO_MORE;
    int64_t e = dims[k / 2], half = e / 2, positions = 13;
    llmpar_rope_args a;
    memset(&a, 0, sizeof a);
    a.batch = 2;
    a.t = 7;
    a.heads = 3;
    a.head_dim = e;
    a.ld = 3 * e + 2;
    a.position = 5;
    a.inverse = k % 2;
    a.dtype = t->dtype;
    note(t, "batch=2 t=7 heads=3 head_dim=%lld position=5%s", (long long)e, a.inverse ? ", inverse" : "");
    size_t item = llmpar_dtype_size(t->dtype);
    void *c = grade_put("cosine", (size_t)(positions * half) * item, item, t->placement), *s = grade_put("sine", (size_t)(positions * half) * item, item, t->placement);
    for (int64_t p = 0; p < positions; p++)
        for (int64_t j = 0; j < half; j++) {
            double angle = (double)p * pow(10000, -2.0 * (double)j / (double)e);
            store(c, p * half + j, t->dtype, (double)(float)cos(angle));
            store(s, p * half + j, t->dtype, (double)(float)sin(angle));
        }
    a.cosine = remember(t, "cosine", c, (size_t)(positions * half) * item);
    a.sine = remember(t, "sine", s, (size_t)(positions * half) * item);
    a.x = out_as(t, "x", t->dtype, 14, 3 * e, a.ld, 1);
    return t->d->rope(t->d, t->stream, &a);
}

static const int64_t attention_shapes[][7] = { /* batch, tq, tk, tk_stride, heads, kv_heads, head_dim */
    { 2, 9, 9, 9, 4, 2, 8 }, { 1, 70, 70, 70, 3, 1, 20 }, { 1, 130, 130, 130, 2, 2, 16 }, { 1, 5, 5, 5, 6, 1, 5 }, { 1, 1, 67, 90, 4, 4, 16 }, { 2, 5, 69, 80, 2, 1, 32 }
};

static void attention_problem(trial *t, int k, llmpar_attention_args *a)
{
    const int64_t *s = attention_shapes[k / 2];
    int packed = k % 2;
    memset(a, 0, sizeof *a);
    a->batch = s[0];
    a->tq = s[1];
    a->tk = s[2];
    a->tk_stride = s[3];
    a->heads = s[4];
    a->kv_heads = s[5];
    a->head_dim = s[6];
    a->ldq = a->heads * a->head_dim + 3;
    a->ldk = a->kv_heads * a->head_dim + 1;
    a->ldv = a->kv_heads * a->head_dim;
    a->ldo = a->heads * a->head_dim + 2;
    a->scale = 1 / sqrt((double)a->head_dim);
    a->dtype = t->dtype;
    note(t, "batch=%lld tq=%lld tk=%lld heads=%lld kv_heads=%lld head_dim=%lld%s", (long long)s[0], (long long)s[1], (long long)s[2], (long long)s[4], (long long)s[5], (long long)s[6], packed ? ", packed documents" : "");
    a->q = in2(t, "q", a->batch * a->tq, a->heads * a->head_dim, a->ldq, 2);
    a->k = in2(t, "k", (a->batch - 1) * a->tk_stride + a->tk, a->kv_heads * a->head_dim, a->ldk, 2);
    a->v = in2(t, "v", (a->batch - 1) * a->tk_stride + a->tk, a->kv_heads * a->head_dim, a->ldv, 2);
    if (packed) {
        int32_t *doc = (int32_t *)grade_put("doc_start", (size_t)(a->batch * a->tk) * 4, 4, t->placement);
        for (int64_t i = 0; i < a->batch * a->tk; i++) doc[i] = (int32_t)(i % a->tk < 3 ? 0 : i % a->tk < 60 ? 3 : 60);
        a->doc_start = (const int32_t *)remember(t, "doc_start", doc, (size_t)(a->batch * a->tk) * 4);
    }
}

static llmpar_status op_attention(trial *t, int k)
{
    llmpar_attention_args a;
    if (k >= 12) return NO_MORE;
    attention_problem(t, k, &a);
    a.out = out2(t, "out", a.batch * a.tq, a.heads * a.head_dim, a.ldo);
    a.lse = out1(t, "lse", a.batch * a.heads * a.tq);
    a.workspace_bytes = t->d->attention_workspace(t->d, &a);
    a.workspace = scratch(t, a.workspace_bytes);
    llmpar_status st = t->d->attention(t->d, t->stream, &a);
    if (st || !t->tested || a.batch > 1 || a.doc_start) return st;
    /* The last query row alone, as generation asks for it. */
    size_t item = llmpar_dtype_size(t->dtype);
    llmpar_attention_args row = a;
    row.tq = 1;
    row.q = (const char *)a.q + (size_t)((a.tq - 1) * a.ldq) * item;
    row.lse = NULL;
    row.out = malloc((size_t)a.ldo * item);
    row.workspace_bytes = t->d->attention_workspace(t->d, &row);
    row.workspace = malloc(row.workspace_bytes + 1);
    st = t->d->attention(t->d, t->stream, &row);
    same(t, "the last query row alone and among others", (const char *)a.out + (size_t)((a.tq - 1) * a.ldo) * item, row.out, a.heads * a.head_dim);
    free(row.out);
    free(row.workspace);
    return st;
}

static llmpar_status op_attention_backward(trial *t, int k)
{
    llmpar_attention_backward_args a;
    if (k >= 8) return NO_MORE; /* the shapes with tq == tk */
    memset(&a, 0, sizeof a);
    attention_problem(t, k, &a.forward);
    llmpar_attention_args *f = &a.forward;
    int64_t rows = f->batch * f->tq, width = f->heads * f->head_dim;
    size_t item = llmpar_dtype_size(t->dtype);
    /* out and lse by plain loops in double: the same values for both tables */
    void *out = grade_put("out", span(rows, width, f->ldo) * item, item, t->placement), *lse = grade_put("lse", (size_t)(rows * f->heads) * item, item, t->placement);
    double *p = (double *)malloc((size_t)f->tk * sizeof *p);
    for (int64_t b = 0; b < f->batch; b++)
        for (int64_t h = 0; h < f->heads; h++)
            for (int64_t i = 0; i < f->tq; i++) {
                int64_t from = f->doc_start ? f->doc_start[b * f->tk + i] : 0, g = h * f->kv_heads / f->heads, e = f->head_dim;
                double top = -HUGE_VAL, sum = 0;
                for (int64_t j = from; j <= i; j++) {
                    p[j] = 0;
                    for (int64_t x = 0; x < e; x++) p[j] += load(f->q, (b * f->tq + i) * f->ldq + h * e + x, t->dtype) * load(f->k, (b * f->tk + j) * f->ldk + g * e + x, t->dtype);
                    p[j] *= f->scale;
                    top = p[j] > top ? p[j] : top;
                }
                for (int64_t j = from; j <= i; j++) sum += p[j] = exp(p[j] - top);
                for (int64_t x = 0; x < e; x++) {
                    double o = 0;
                    for (int64_t j = from; j <= i; j++) o += p[j] / sum * load(f->v, (b * f->tk + j) * f->ldv + g * e + x, t->dtype);
                    store(out, (b * f->tq + i) * f->ldo + h * e + x, t->dtype, (double)(float)o);
                }
                store(lse, (b * f->heads + h) * f->tq + i, t->dtype, (double)(float)(top + log(sum)));
            }
    free(p);
    f->out = out;
    f->lse = lse;
    a.dout = in2(t, "dout", rows, width, f->ldo, 1);
    a.dq = out2(t, "dq", rows, width, f->ldq);
    a.dk = out2(t, "dk", f->batch * f->tk, f->kv_heads * f->head_dim, f->ldk);
    a.dv = out2(t, "dv", f->batch * f->tk, f->kv_heads * f->head_dim, f->ldv);
    f->workspace_bytes = t->d->attention_backward_workspace(t->d, &a);
    f->workspace = scratch(t, f->workspace_bytes);
    llmpar_status st = t->d->attention_backward(t->d, t->stream, &a);
    if (st || !t->tested || f->batch < 2) return st;
    /* The second sequence alone. */
    llmpar_attention_backward_args b = a;
    size_t q_at = (size_t)(f->tq * f->ldq) * item, k_at = (size_t)(f->tk * f->ldk) * item, v_at = (size_t)(f->tk * f->ldv) * item, o_at = (size_t)(f->tq * f->ldo) * item;
    b.forward.batch = 1;
    b.forward.q = (const char *)f->q + q_at;
    b.forward.k = (const char *)f->k + k_at;
    b.forward.v = (const char *)f->v + v_at;
    b.forward.out = (char *)f->out + o_at;
    b.forward.lse = (char *)f->lse + (size_t)(f->heads * f->tq) * item;
    b.forward.doc_start = f->doc_start ? f->doc_start + f->tk : NULL;
    b.dout = (const char *)a.dout + o_at;
    b.dq = malloc(q_at);
    b.dk = malloc(k_at);
    b.dv = malloc(v_at);
    b.forward.workspace_bytes = t->d->attention_backward_workspace(t->d, &b);
    b.forward.workspace = malloc(b.forward.workspace_bytes + 1);
    st = t->d->attention_backward(t->d, t->stream, &b);
    for (int64_t i = 0; i < f->tq && !st; i++) {
        same(t, "dq of a sequence alone and among others", (const char *)a.dq + q_at + (size_t)(i * f->ldq) * item, (const char *)b.dq + (size_t)(i * f->ldq) * item, f->heads * f->head_dim);
        same(t, "dk of a sequence alone and among others", (const char *)a.dk + k_at + (size_t)(i * f->ldk) * item, (const char *)b.dk + (size_t)(i * f->ldk) * item, f->kv_heads * f->head_dim);
        same(t, "dv of a sequence alone and among others", (const char *)a.dv + v_at + (size_t)(i * f->ldv) * item, (const char *)b.dv + (size_t)(i * f->ldv) * item, f->kv_heads * f->head_dim);
    }
    free(b.dq);
    free(b.dk);
    free(b.dv);
    free(b.forward.workspace);
    return st;
}

static llmpar_status op_swiglu(trial *t, int k)
{
    static const int64_t dims[] = { 1, 16, 53 };
    if (k >= 9) return NO_MORE;
    int64_t rows = 5, dim = dims[k / 3];
    int alias = k % 3;
    llmpar_swiglu_args a;
    memset(&a, 0, sizeof a);
    a.rows = rows;
    a.dim = dim;
    a.ld_in = dim + 2;
    a.ld_out = alias ? a.ld_in : dim + 5;
    a.dtype = t->dtype;
    note(t, "rows=5 dim=%lld%s", (long long)dim, alias == 0 ? "" : alias == 1 ? ", h == gate" : ", h == up");
    a.gate = alias == 1 ? out_as(t, "h (== gate)", t->dtype, rows, dim, a.ld_in, 4) : in2(t, "gate", rows, dim, a.ld_in, 4);
    a.up = alias == 2 ? out_as(t, "h (== up)", t->dtype, rows, dim, a.ld_in, 1) : in2(t, "up", rows, dim, a.ld_in, 1);
    a.h = alias == 1 ? (void *)(uintptr_t)a.gate : alias == 2 ? (void *)(uintptr_t)a.up : out2(t, "h", rows, dim, a.ld_out);
    llmpar_status st = t->d->swiglu(t->d, t->stream, &a);
    if (st || !t->tested || alias) return st;
    llmpar_swiglu_args one = a;
    double h = 0;
    size_t at = (size_t)(3 * a.ld_in + dim / 2) * llmpar_dtype_size(t->dtype);
    one.rows = one.dim = 1;
    one.gate = (const char *)a.gate + at;
    one.up = (const char *)a.up + at;
    one.h = &h;
    st = t->d->swiglu(t->d, t->stream, &one);
    same(t, "an element alone and among others", (const char *)a.h + (size_t)(3 * a.ld_out + dim / 2) * llmpar_dtype_size(t->dtype), &h, 1);
    return st;
}

static llmpar_status op_swiglu_backward(trial *t, int k)
{
    static const int64_t dims[] = { 1, 16, 53 };
    if (k >= 9) return NO_MORE;
    int64_t rows = 5, dim = dims[k / 3];
    int alias = k % 3;
    llmpar_swiglu_backward_args a;
    memset(&a, 0, sizeof a);
    a.rows = rows;
    a.dim = dim;
    a.ld_in = dim + 2;
    a.ld_out = dim + 1;
    a.dtype = t->dtype;
    note(t, "rows=5 dim=%lld%s", (long long)dim, alias == 0 ? "" : alias == 1 ? ", in place" : ", h NULL");
    if (alias == 1) {
        a.gate = a.dgate = out_as(t, "dgate (== gate)", t->dtype, rows, dim, a.ld_in, 4);
        a.up = a.dup = out_as(t, "dup (== up)", t->dtype, rows, dim, a.ld_in, 1);
        a.dh = a.h = out_as(t, "h (== dh)", t->dtype, rows, dim, a.ld_out, 1);
    } else {
        a.gate = in2(t, "gate", rows, dim, a.ld_in, 4);
        a.up = in2(t, "up", rows, dim, a.ld_in, 1);
        a.dh = in2(t, "dh", rows, dim, a.ld_out, 1);
        a.dgate = out2(t, "dgate", rows, dim, a.ld_in);
        a.dup = out2(t, "dup", rows, dim, a.ld_in);
        if (alias == 0) a.h = out2(t, "h", rows, dim, a.ld_out);
    }
    return t->d->swiglu_backward(t->d, t->stream, &a);
}

static llmpar_status op_embedding(trial *t, int k)
{
    static const int64_t dims[] = { 3, 32, 70 };
    if (k >= 6) return NO_MORE;
    int64_t dim = dims[k / 2];
    llmpar_embedding_args a;
    memset(&a, 0, sizeof a);
    a.rows = 40;
    a.dim = dim;
    a.v_begin = k % 2 ? 11 : 0;
    a.v_local = k % 2 ? 13 : 37;
    a.dtype = t->dtype;
    note(t, "rows=40 dim=%lld ids %lld to %lld of 37", (long long)dim, (long long)a.v_begin, (long long)(a.v_begin + a.v_local - 1));
    a.ids = ints(t, "ids", 40, 0, 37);
    a.table = in2(t, "table", a.v_local, dim, dim, 1);
    a.out = out2(t, "out", 40, dim, dim);
    return t->d->embedding(t->d, t->stream, &a);
}

static llmpar_status op_embedding_backward(trial *t, int k)
{
    static const int64_t leaves[] = { 1, 2, 3, 12 };
    if (k >= 8) return NO_MORE;
    llmpar_embedding_backward_args a;
    memset(&a, 0, sizeof a);
    a.tokens = tokens(12, 5, leaves[k / 2]);
    a.dim = 19;
    a.v_begin = k % 2 ? 11 : 0;
    a.v_local = k % 2 ? 13 : 37;
    a.dtype = t->dtype;
    note(t, "batch=12 t=5 dim=19 leaves=%lld ids %lld to %lld of 37", (long long)a.tokens.leaves, (long long)a.v_begin, (long long)(a.v_begin + a.v_local - 1));
    a.ids = ints(t, "ids", 60, 0, 37);
    a.dout = in2(t, "dout", 60, a.dim, a.dim, 1);
    a.dtable = out2(t, "dtable", a.v_local, a.dim, a.dim);
    a.workspace_bytes = t->d->embedding_backward_workspace(t->d, &a);
    a.workspace = scratch(t, a.workspace_bytes);
    return t->d->embedding_backward(t->d, t->stream, &a);
}

enum { XENT_ROWS = 7 };
static const int64_t xent_sizes[][3] = { { 0, 37, 37 }, { 0, 5, 5 }, { 16, 16, 64 }, { 0, 300, 300 }, { 8, 0, 8 } }; /* v_begin, v_local, v_total */

static void xent_problem(trial *t, int k, llmpar_xent_args *a, int backward)
{
    memset(a, 0, sizeof *a);
    a->rows = XENT_ROWS;
    a->v_begin = xent_sizes[k][0];
    a->v_local = xent_sizes[k][1];
    a->v_total = xent_sizes[k][2];
    a->ld = a->v_local + 1;
    a->canon = 8;
    a->dtype = t->dtype;
    note(t, "rows=7 ids %lld to %lld of %lld", (long long)a->v_begin, (long long)(a->v_begin + a->v_local - 1), (long long)a->v_total);
    a->logits = backward ? out_as(t, "logits", t->dtype, XENT_ROWS, a->v_local, a->ld, 5) : (void *)(uintptr_t)in2(t, "logits", XENT_ROWS, a->v_local, a->ld, 5);
    int32_t *targets = (int32_t *)grade_put("targets", XENT_ROWS * 4, 4, t->placement);
    for (int64_t r = 0; r < XENT_ROWS; r++) targets[r] = r == 2 ? -1 : (int32_t)below(t, a->v_total);
    a->targets = (const int32_t *)remember(t, "targets", targets, XENT_ROWS * 4);
}

static llmpar_status op_xent_max(trial *t, int k)
{
    llmpar_xent_args a;
    if (k >= 5) return NO_MORE;
    xent_problem(t, k, &a, 0);
    a.max = out1(t, "max", XENT_ROWS);
    a.target_logit = out1(t, "target_logit", XENT_ROWS);
    return t->d->xent_max(t->d, t->stream, &a);
}

static llmpar_status op_xent_sum(trial *t, int k)
{
    llmpar_xent_args a;
    if (k >= 5) return NO_MORE;
    xent_problem(t, k, &a, 0);
    size_t item = llmpar_dtype_size(t->dtype);
    void *max = grade_put("max", XENT_ROWS * item, item, t->placement);
    for (int64_t r = 0; r < XENT_ROWS; r++) store(max, r, t->dtype, 5);
    a.max = (void *)(uintptr_t)remember(t, "max", max, XENT_ROWS * item);
    a.sum = out1(t, "sum", XENT_ROWS);
    llmpar_status st = t->d->xent_sum(t->d, t->stream, &a);
    if (st || !t->tested || a.v_local != a.v_total || a.v_local < 8) return st;
    /* Half of the vocabulary on each of two ranks: their sums added are the whole one's bits. */
    double half[2][XENT_ROWS], both[XENT_ROWS];
    for (int r = 0; r < 2 && !st; r++) {
        llmpar_xent_args part = a;
        part.v_begin = llmpar_piece_begin(r, a.v_total, 2);
        part.v_local = llmpar_piece_begin(r + 1, a.v_total, 2) - part.v_begin;
        part.logits = (char *)a.logits + (size_t)part.v_begin * item;
        part.sum = half[r];
        st = t->d->xent_sum(t->d, t->stream, &part);
    }
    for (int64_t r = 0; r < XENT_ROWS; r++)
        if (t->dtype == LLMPAR_F64) store(both, r, t->dtype, load(half[0], r, t->dtype) + load(half[1], r, t->dtype));
        else store(both, r, t->dtype, (double)((float)load(half[0], r, t->dtype) + (float)load(half[1], r, t->dtype)));
    same(t, "the whole vocabulary and its two halves added", a.sum, both, XENT_ROWS);
    return st;
}

static llmpar_status op_xent_loss(trial *t, int k)
{
    if (k >= 2) return NO_MORE;
    llmpar_xent_loss_args a;
    int64_t n = k ? 33 : 5;
    size_t item = llmpar_dtype_size(t->dtype);
    memset(&a, 0, sizeof a);
    a.rows = n;
    a.dtype = t->dtype;
    note(t, "rows=%lld", (long long)n);
    a.max = in1(t, "max", n, 5);
    a.target_logit = in1(t, "target_logit", n, 5);
    void *sum = grade_put("sum", (size_t)n * item, item, t->placement);
    for (int64_t i = 0; i < n; i++) store(sum, i, t->dtype, (double)(float)(1.5 + value(t, 1)));
    a.sum = remember(t, "sum", sum, (size_t)n * item);
    a.targets = ints(t, "targets", n, -1, 9);
    a.accumulator = (int64_t *)grade_put("accumulator", LLMPAR_EXACT_SUM_LIMBS * 8, 8, t->placement);
    memset(a.accumulator, 0, LLMPAR_EXACT_SUM_LIMBS * 8);
    a.token_loss = (double *)out_as(t, "token_loss", LLMPAR_F64, 1, n, n, 0);
    double *total = (double *)out_as(t, "value of accumulator", LLMPAR_F64, 1, 1, 1, 0);
    llmpar_exact_sum_add((llmpar_exact_sum *)(void *)a.accumulator, 100.0); /* it adds to what is there */
    llmpar_status st = t->d->xent_loss(t->d, t->stream, &a);
    *total = llmpar_exact_sum_value((const llmpar_exact_sum *)(const void *)a.accumulator);
    return st;
}

static llmpar_status op_xent_backward(trial *t, int k)
{
    llmpar_xent_backward_args a;
    if (k >= 5) return NO_MORE;
    memset(&a, 0, sizeof a);
    xent_problem(t, k, &a.forward, 1);
    size_t item = llmpar_dtype_size(t->dtype);
    void *max = grade_put("max", XENT_ROWS * item, item, t->placement), *sum = grade_put("sum", XENT_ROWS * item, item, t->placement);
    for (int64_t r = 0; r < XENT_ROWS; r++) {
        store(max, r, t->dtype, 5);
        store(sum, r, t->dtype, 3.25 + (double)r);
    }
    a.forward.max = (void *)(uintptr_t)remember(t, "max", max, XENT_ROWS * item);
    a.forward.sum = (void *)(uintptr_t)remember(t, "sum", sum, XENT_ROWS * item);
    a.scale = 0.25f;
    return t->d->xent_backward(t->d, t->stream, &a);
}

static llmpar_status tree_or_max(trial *t, int k, int max)
{
    static const llmpar_dtype dtypes[] = { LLMPAR_F32, LLMPAR_I64, LLMPAR_U64 };
    static const char *const names[] = { "in[0]", "in[1]", "in[2]", "in[3]", "in[4]", "in[5]", "in[6]", "in[7]", "in[8]", "in[9]" };
    if (k >= 60) return NO_MORE;
    int n = 1 + k % 10, alias = k / 10 % 2, which = k / 20;
    llmpar_dtype dtype = which ? dtypes[which] : t->dtype, keep = t->dtype;
    if (max && dtype == LLMPAR_U64) return LLMPAR_OK;
    t->special = max;
    llmpar_tree_sum_args a;
    const void *in[10];
    memset(&a, 0, sizeof a);
    t->dtype = dtype;
    note(t, "of %d, count=45%s", n, alias ? ", out == the last" : "");
    for (int j = 0; j < n; j++) {
        if (alias && j == n - 1) in[j] = a.out = out_as(t, "out", dtype, 1, 45, 45, 1);
        else in[j] = in1(t, names[j], 45, 1);
    }
    if (!alias) a.out = out1(t, "out", 45);
    t->dtype = keep;
    a.in = in;
    a.n = n;
    a.count = 45;
    a.dtype = dtype;
    return max ? t->d->max(t->d, t->stream, &a) : t->d->tree_sum(t->d, t->stream, &a);
}
static llmpar_status op_tree_sum(trial *t, int k) { return tree_or_max(t, k, 0); }
static llmpar_status op_max(trial *t, int k) { return tree_or_max(t, k, 1); }

static const int64_t lengths[] = { 0, 1, 15, 16, 17, 100, 1031 };
enum { LENGTHS = sizeof lengths / sizeof lengths[0] };

static llmpar_status op_add(trial *t, int k)
{
    if (k >= 2 * LENGTHS) return NO_MORE;
    llmpar_add_args a;
    int64_t n = lengths[k / 2];
    memset(&a, 0, sizeof a);
    note(t, "count=%lld%s", (long long)n, k % 2 ? ", out == b" : "");
    a.count = (size_t)n;
    a.dtype = t->dtype;
    a.a = in1(t, "a", n, 3);
    a.b = k % 2 ? out_as(t, "out (== b)", t->dtype, 1, n, n, 1) : in1(t, "b", n, 1);
    a.out = k % 2 ? (void *)(uintptr_t)a.b : out1(t, "out", n);
    return t->d->add(t->d, t->stream, &a);
}

static llmpar_status op_scale(trial *t, int k)
{
    if (k >= LENGTHS) return NO_MORE;
    llmpar_scale_args a;
    memset(&a, 0, sizeof a);
    note(t, "count=%lld factor=0.3", (long long)lengths[k]);
    a.count = (size_t)lengths[k];
    a.factor = 0.3;
    a.dtype = t->dtype;
    a.x = out_as(t, "x", t->dtype, 1, lengths[k], lengths[k], 3);
    return t->d->scale(t->d, t->stream, &a);
}

static llmpar_status op_cast(trial *t, int k)
{
    if (k >= 4 * 4 * LENGTHS) return NO_MORE;
    llmpar_cast_args a;
    int64_t n = lengths[k / 16];
    llmpar_dtype keep = t->dtype;
    memset(&a, 0, sizeof a);
    a.count = (size_t)n;
    a.in_dtype = (llmpar_dtype)(LLMPAR_F32 + k % 4);
    a.out_dtype = (llmpar_dtype)(LLMPAR_F32 + k / 4 % 4);
    t->dtype = a.in_dtype;
    t->special = n > 16;
    note(t, "to %s, count=%lld", llmpar_dtype_name(a.out_dtype), (long long)n);
    a.in = in1(t, "in", n, 3);
    t->dtype = keep;
    a.out = out_as(t, "out", a.out_dtype, 1, n, n, 0);
    return t->d->cast(t->d, t->stream, &a);
}

static llmpar_status op_copy_rows(trial *t, int k)
{
    static const int64_t shapes[][4] = { { 3, 5, 7, 6 }, { 31, 120, 121, 129 }, { 1, 1, 1, 1 }, { 4, 0, 3, 2 }, { 0, 4, 4, 4 } };
    if (k >= 5) return NO_MORE;
    llmpar_copy_rows_args a;
    memset(&a, 0, sizeof a);
    a.rows = shapes[k][0];
    a.width = shapes[k][1];
    a.ld_in = shapes[k][2];
    a.ld_out = shapes[k][3];
    a.size = llmpar_dtype_size(t->dtype);
    note(t, "rows=%lld width=%lld ld_in=%lld ld_out=%lld", (long long)a.rows, (long long)a.width, (long long)a.ld_in, (long long)a.ld_out);
    a.in = in2(t, "in", a.rows, a.width, a.ld_in, 1);
    a.out = out2(t, "out", a.rows, a.width, a.ld_out);
    return t->d->copy_rows(t->d, t->stream, &a);
}

static llmpar_status op_adamw(trial *t, int k)
{
    if (k >= LENGTHS) return NO_MORE;
    llmpar_adamw_args a;
    int64_t n = lengths[k];
    memset(&a, 0, sizeof a);
    note(t, "count=%lld", (long long)n);
    a.count = (size_t)n;
    a.dtype = t->dtype;
    a.lr = 1e-2;
    a.beta1 = 0.9;
    a.beta2 = 0.95;
    a.eps = 1e-8;
    a.decay = 0.1;
    a.correction1 = 1 - 0.9 * 0.9 * 0.9;
    a.correction2 = 1 - 0.95 * 0.95 * 0.95;
    a.grad_scale = 0.5;
    a.g = in1(t, "g", n, 0.1);
    a.p = out_as(t, "p", t->dtype, 1, n, n, 1);
    a.m = out_as(t, "m", t->dtype, 1, n, n, 0.05);
    a.v = out_as(t, "v", t->dtype, 1, n, n, 0.01);
    for (int64_t i = 0; i < n; i++) store(a.v, i, t->dtype, fabs(load(a.v, i, t->dtype)));
    return t->d->adamw(t->d, t->stream, &a);
}

static llmpar_status op_sgd(trial *t, int k)
{
    if (k >= 4 * LENGTHS) return NO_MORE;
    llmpar_sgd_args a;
    int64_t n = lengths[k / 4];
    memset(&a, 0, sizeof a);
    a.count = (size_t)n;
    a.dtype = t->dtype;
    a.lr = 1e-2;
    a.momentum = 0.9;
    a.decay = 0.1;
    a.limit = k & 1 ? 0.02 : 0;
    a.grad_scale = 0.5;
    note(t, "count=%lld limit=%g %s", (long long)n, a.limit, k & 2 ? "with momentum" : "m NULL");
    a.g = in1(t, "g", n, 0.1);
    a.p = out_as(t, "p", t->dtype, 1, n, n, 1);
    if (k & 2) a.m = out_as(t, "m", t->dtype, 1, n, n, 0.05);
    return t->d->sgd(t->d, t->stream, &a);
}

static llmpar_status op_largest(trial *t, int k)
{
    if (k >= LENGTHS) return NO_MORE;
    llmpar_largest_args a;
    memset(&a, 0, sizeof a);
    note(t, "count=%lld", (long long)lengths[k]);
    a.count = (size_t)lengths[k];
    a.dtype = t->dtype;
    a.x = in1(t, "x", lengths[k], 1000);
    a.largest = (double *)out_as(t, "largest", LLMPAR_F64, 1, 1, 1, 0);
    *a.largest = k & 1 ? 900 : 0; /* of another part */
    return t->d->largest(t->d, t->stream, &a);
}

/* Parts of a matrix of 7 rows and 30 columns. */
static const int64_t parts[][2] = { { 0, 210 }, { 0, 1 }, { 29, 2 }, { 5, 22 }, { 17, 130 }, { 209, 1 }, { 60, 30 }, { 40, 0 } };
enum { PARTS = sizeof parts / sizeof parts[0], PART_ROWS = 7, PART_COLS = 30 };

static llmpar_status op_factor_sum(trial *t, int k)
{
    if (k >= PARTS) return NO_MORE;
    llmpar_factor_sum_args a;
    memset(&a, 0, sizeof a);
    note(t, "elements %lld .. %lld of [7,30]", (long long)parts[k][0], (long long)(parts[k][0] + parts[k][1]));
    a.begin = parts[k][0];
    a.count = parts[k][1];
    a.cols = PART_COLS;
    a.dtype = t->dtype;
    a.g = in1(t, "g", a.count, 3);
    a.row_bits = 20; /* so that the sums are exact as doubles */
    a.col_bits = 22;
    a.grad_scale = 0.25;
    double *largest = (double *)out_as(t, "largest", LLMPAR_F64, 1, 1, 1, 0);
    *largest = 3;
    a.largest = largest;
    int64_t *sums = (int64_t *)grade_put("row_sums and col_sums", (PART_ROWS + PART_COLS) * 8, 8, t->placement);
    for (int i = 0; i < PART_ROWS + PART_COLS; i++) sums[i] = i;
    a.row_sums = sums;
    a.col_sums = sums + PART_ROWS;
    double *values = (double *)out_as(t, "row_sums and col_sums", LLMPAR_F64, 1, PART_ROWS + PART_COLS, PART_ROWS + PART_COLS, 0);
    llmpar_status st = t->d->factor_sum(t->d, t->stream, &a);
    if (!st) st = t->d->synchronize(t->d, t->stream);
    for (int i = 0; i < PART_ROWS + PART_COLS; i++) values[i] = (double)sums[i];
    return st;
}

static llmpar_status op_factor_moment(trial *t, int k)
{
    if (k >= 2 * LENGTHS) return NO_MORE;
    llmpar_factor_moment_args a;
    int64_t n = lengths[k / 2];
    memset(&a, 0, sizeof a);
    a.count = n;
    a.dtype = t->dtype;
    a.terms = 30;
    a.bits = 57;
    a.by_mean = k & 1;
    a.grad_scale = 0.25;
    a.beta = 0.9;
    a.eps = 1e-30;
    note(t, "count=%lld by_mean=%d", (long long)n, (int)a.by_mean);
    double *largest = (double *)out_as(t, "largest", LLMPAR_F64, 1, 1, 1, 0);
    *largest = 3;
    a.largest = largest;
    int64_t *sums = (int64_t *)grade_put("sums", (size_t)n * 8, 8, t->placement);
    for (int64_t i = 0; i < n; i++) sums[i] = (i * 7919 % 4096 + 100) * ((int64_t)1 << 48);
    a.sums = sums;
    a.moment = out_as(t, "moment", t->dtype, 1, n, n, 0.5);
    for (int64_t i = 0; i < n; i++) store(a.moment, i, t->dtype, 0.5 + fabs(load(a.moment, i, t->dtype)));
    a.factor = out_as(t, "factor", t->dtype, 1, n, n, 0);
    return t->d->factor_moment(t->d, t->stream, &a);
}

static llmpar_status adalomo_case(trial *t, int k, int apply)
{
    if (k >= 2 * PARTS) return NO_MORE;
    llmpar_adalomo_args a;
    memset(&a, 0, sizeof a);
    a.begin = parts[k / 2][0];
    a.count = parts[k / 2][1];
    a.cols = PART_COLS;
    a.elements = PART_ROWS * PART_COLS;
    a.dtype = t->dtype;
    a.lr = 0.1;
    a.decay = 0.2;
    a.grad_scale = 0.25;
    a.beta = 0.9;
    a.eps = 1e-30;
    note(t, "elements %lld .. %lld of [7,30], %s", (long long)a.begin, (long long)(a.begin + a.count), k & 1 ? "factored" : "with moments");
    a.g = in1(t, "g", a.count, 3);
    a.p = out_as(t, "p", t->dtype, 1, a.count, a.count, 1);
    if (k & 1) {
        a.row_factor = in1(t, "row_factor", PART_ROWS, 1);
        a.col_factor = in1(t, "col_factor", PART_COLS, 1);
    } else {
        a.moment = out_as(t, "moment", t->dtype, 1, a.count, a.count, 0.5);
        for (int64_t i = 0; i < a.count; i++) store(a.moment, i, t->dtype, 0.5 + fabs(load(a.moment, i, t->dtype)));
    }
    int64_t *squares = (int64_t *)grade_put("squares", 2 * LLMPAR_EXACT_SUM_LIMBS * 8, 8, t->placement);
    memset(squares, 0, 2 * LLMPAR_EXACT_SUM_LIMBS * 8);
    llmpar_exact_sum_add((llmpar_exact_sum *)(void *)squares, 700.0);
    llmpar_exact_sum_add((llmpar_exact_sum *)(void *)(squares + LLMPAR_EXACT_SUM_LIMBS), 30.0);
    a.update_squares = squares;
    a.param_squares = squares + LLMPAR_EXACT_SUM_LIMBS;
    double *total = (double *)out_as(t, "value of update_squares", LLMPAR_F64, 1, 1, 1, 0);
    llmpar_status st = apply ? t->d->adalomo(t->d, t->stream, &a) : t->d->adalomo_square(t->d, t->stream, &a);
    if (!st) st = t->d->synchronize(t->d, t->stream);
    *total = llmpar_exact_sum_value((const llmpar_exact_sum *)(const void *)squares);
    return st;
}
static llmpar_status op_adalomo_square(trial *t, int k) { return adalomo_case(t, k, 0); }
static llmpar_status op_adalomo(trial *t, int k) { return adalomo_case(t, k, 1); }

static llmpar_status op_square_sum(trial *t, int k)
{
    if (k >= LENGTHS) return NO_MORE;
    llmpar_square_sum_args a;
    memset(&a, 0, sizeof a);
    note(t, "count=%lld", (long long)lengths[k]);
    a.count = (size_t)lengths[k];
    a.dtype = t->dtype;
    a.x = in1(t, "x", lengths[k], 1000);
    a.accumulator = (int64_t *)grade_put("accumulator", LLMPAR_EXACT_SUM_LIMBS * 8, 8, t->placement);
    memset(a.accumulator, 0, LLMPAR_EXACT_SUM_LIMBS * 8);
    double *total = (double *)out_as(t, "value of accumulator", LLMPAR_F64, 1, 1, 1, 0);
    llmpar_exact_sum_add((llmpar_exact_sum *)(void *)a.accumulator, 7.0);
    llmpar_status st = t->d->square_sum(t->d, t->stream, &a);
    *total = llmpar_exact_sum_value((const llmpar_exact_sum *)(const void *)a.accumulator);
    return st;
}

static llmpar_status op_copy(trial *t, int k)
{
    if (k >= LENGTHS) return NO_MORE;
    note(t, "count=%lld", (long long)lengths[k]);
    const void *in = in1(t, "in", lengths[k], 1);
    return t->d->copy(t->d, t->stream, out1(t, "out", lengths[k]), in, (size_t)lengths[k] * llmpar_dtype_size(t->dtype));
}

static llmpar_status op_zero(trial *t, int k)
{
    if (k >= LENGTHS) return NO_MORE;
    note(t, "count=%lld", (long long)lengths[k]);
    return t->d->zero(t->d, t->stream, out1(t, "out", lengths[k]), (size_t)lengths[k] * llmpar_dtype_size(t->dtype));
}

/* ---- what has no result to compare: memory, streams, events ---- */

static llmpar_status op_alloc(trial *t, int k)
{
    static const size_t sizes[] = { 0, 1, 63, 64, 1000, 1 << 20 };
    if (k >= 6) return NO_MORE;
    void *first = NULL, *second = NULL;
    note(t, "%zu bytes", sizes[k]);
    llmpar_status st = t->d->alloc(t->d, sizes[k], &first);
    if (!st) st = t->d->alloc(t->d, sizes[k], &second);
    if (st) return st;
    if ((!first || !second) && t->tested) grade_fail(GRADE_VALUE, "alloc gave NULL without an error");
    else if (((uintptr_t)first % t->d->alignment || (uintptr_t)second % t->d->alignment) && t->tested) grade_fail(GRADE_VALUE, "alloc gave %p and %p, expected multiples of %zu", first, second, t->d->alignment);
    else if (sizes[k]) {
        memset(first, 1, sizes[k]);
        memset(second, 2, sizes[k]);
        for (size_t i = 0; i < sizes[k]; i++)
            if (((unsigned char *)first)[i] != 1) { grade_fail(GRADE_VALUE, "two blocks overlap"); break; }
    }
    t->d->free(t->d, first, sizes[k]);
    t->d->free(t->d, second, sizes[k]);
    t->d->free(t->d, NULL, 0);
    return LLMPAR_OK;
}

static llmpar_status fail_on_purpose(void *arg) { (void)arg; return LLMPAR_ERR_IO; }
typedef struct letter { char *at; char c; } letter;
static llmpar_status write_letter(void *arg)
{
    *((letter *)arg)->at = ((letter *)arg)->c;
    return LLMPAR_OK;
}

/* Streams run in order, events order streams, and a failure sticks to its stream and to those that wait for it. */
static llmpar_status op_streams(trial *t, int k)
{
    if (k >= 2) return NO_MORE;
    llmpar_device *d = t->d;
    llmpar_stream *a = NULL, *b = NULL;
    llmpar_event *event = NULL;
    note(t, k ? "a failure sticks" : "order");
    llmpar_status st = d->stream_create(d, "a", &a);
    if (!st) st = d->stream_create(d, "b", &b);
    if (!st) st = d->event_create(d, &event);
    if (st) return st;
    if (k == 0) {
        static char text[8]; /* a device that runs late writes later */
        letter call;
        memset(text, 0, sizeof text);
        st = d->event_wait(d, b, event); /* never recorded: no wait */
        for (int i = 0; i < 3 && !st; i++) {
            call.at = text + i;
            call.c = (char)('x' + i);
            st = d->host_call(d, i == 1 ? b : a, write_letter, &call, sizeof call);
            memset(&call, 0, sizeof call); /* the argument was copied */
            if (!st) st = d->event_record(d, i == 1 ? b : a, event);
            if (!st) st = d->event_wait(d, i == 1 ? a : b, event);
        }
        if (!st) st = d->event_synchronize(d, event);
        if (!st) st = d->synchronize(d, a);
        if (!st) st = d->synchronize(d, b);
        if (!st && strcmp(text, "xyz")) grade_fail(GRADE_VALUE, "host calls in order x, y, z over two streams left \"%s\"", text);
    } else {
        llmpar_status accepted = d->host_call(d, a, fail_on_purpose, NULL, 0), waited = d->synchronize(d, a);
        if (accepted != LLMPAR_ERR_IO && waited != LLMPAR_ERR_IO) grade_fail(GRADE_VALUE, "a host call that fails: host_call returned \"%s\", synchronize \"%s\"; one of them must say \"%s\"", llmpar_status_string(accepted), llmpar_status_string(waited), llmpar_status_string(LLMPAR_ERR_IO));
        if (d->synchronize(d, a) != LLMPAR_ERR_IO) grade_fail(GRADE_VALUE, "the failure of a stream must stick: the second synchronize forgot it");
        d->event_record(d, a, event);
        d->event_wait(d, b, event);
        if (d->synchronize(d, b) != LLMPAR_ERR_IO) grade_fail(GRADE_VALUE, "a stream that waited for a failed one must have failed too");
    }
    d->event_destroy(d, event);
    d->stream_destroy(d, b);
    d->stream_destroy(d, a);
    return st;
}

#endif
