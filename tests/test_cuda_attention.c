/* attention on the CUDA device: against the CPU's, and cut in every way: the bits of a row depend on its document only. */
#include "attention_sizes.h"
#include "cuda.h"

typedef struct problem {
    int64_t b, tq, tk, stride, h, kv, e;
    double *q, *k, *v, *dout;     /* [b,tq,h,e], [b,stride,kv,e], [b,tq,h,e] */
    int32_t *doc;                 /* [b,tk] or NULL */
    double *out, *lse, *dq, *dk, *dv;
    int64_t gap, off;             /* of rows; of the first element from its alignment */
    double scale;
} problem;

static problem problem_make(llmpar_dtype dtype, const int64_t d[7])
{
    problem p;
    int64_t nq, nk;
    memset(&p, 0, sizeof p);
    p.b = d[0]; p.tq = d[1]; p.tk = d[2]; p.stride = d[3]; p.h = d[4]; p.kv = d[5]; p.e = d[6];
    nq = p.b * p.tq * p.h * p.e;
    nk = p.b * p.stride * p.kv * p.e;
    p.q = ops_random(nq, 2);
    p.k = ops_random(nk, 2);
    p.v = ops_random(nk, 2);
    p.dout = ops_random(nq, 1);
    cuda_round(dtype, p.q, nq);
    cuda_round(dtype, p.k, nk);
    cuda_round(dtype, p.v, nk);
    cuda_round(dtype, p.dout, nq);
    p.out = ops_zeros(nq);
    p.lse = ops_zeros(p.b * p.h * p.tq);
    p.dq = ops_zeros(nq);
    p.dk = ops_zeros(nk);
    p.dv = ops_zeros(nk);
    p.scale = 1 / sqrt((double)p.e);
    return p;
}
static void problem_free(problem *p)
{
    free(p->q); free(p->k); free(p->v); free(p->dout); free(p->doc); free(p->out); free(p->lse); free(p->dq); free(p->dk); free(p->dv);
}

/* Lengths of documents, in order, for every sequence; the last one over and over. */
static void documents(problem *p, const int64_t *lengths, int count)
{
    p->doc = (int32_t *)malloc((size_t)(p->b * p->tk) * sizeof *p->doc);
    for (int64_t b = 0; b < p->b; b++)
        for (int64_t at = 0, d = 0; at < p->tk; d++) {
            int64_t begin = at;
            for (int64_t i = 0; i < lengths[d < count ? d : count - 1] && at < p->tk; i++) p->doc[b * p->tk + at++] = (int32_t)begin;
        }
}

static void fill(const problem *p, llmpar_device *device, llmpar_dtype dtype, llmpar_attention_args *a)
{
    memset(a, 0, sizeof *a);
    a->batch = p->b; a->tq = p->tq; a->tk = p->tk; a->tk_stride = p->stride; a->heads = p->h; a->kv_heads = p->kv; a->head_dim = p->e;
    a->ldq = p->h * p->e + p->gap; a->ldk = p->kv * p->e + 2 * p->gap; a->ldv = p->kv * p->e + p->gap; a->ldo = p->h * p->e + 3 * p->gap;
    a->dtype = dtype;
    a->scale = p->scale;
    a->q = cuda_put(device, dtype, p->q, p->b * p->tq, p->h * p->e, a->ldq, p->off);
    a->k = cuda_put(device, dtype, p->k, p->b * p->stride, p->kv * p->e, a->ldk, p->off);
    a->v = cuda_put(device, dtype, p->v, p->b * p->stride, p->kv * p->e, a->ldv, p->off);
    a->doc_start = p->doc ? (const int32_t *)cuda_put_vector(device, LLMPAR_I32, p->doc, p->b * p->tk) : NULL;
}

static void forward(problem *p, llmpar_device *device, llmpar_dtype dtype, int with_lse)
{
    llmpar_attention_args a;
    fill(p, device, dtype, &a);
    a.out = cuda_put(device, dtype, NULL, p->b * p->tq, p->h * p->e, a.ldo, p->off);
    a.lse = with_lse ? cuda_put_vector(device, LLMPAR_F32, NULL, p->b * p->h * p->tq) : NULL;
    a.workspace_bytes = device->attention_workspace(device, &a);
    a.workspace = cuda_put_vector(device, LLMPAR_U8, NULL, (int64_t)a.workspace_bytes);
    CUDA_OK(device->attention(device, NULL, &a));
    cuda_get(a.out, p->out);
    if (with_lse) cuda_get(a.lse, p->lse);
    cuda_done();
}

static void backward(problem *p, llmpar_device *device, llmpar_dtype dtype, llmpar_dtype dkv)
{
    llmpar_attention_backward_args g;
    int64_t ld = 0;
    memset(&g, 0, sizeof g);
    fill(p, device, dtype, &g.forward);
    g.forward.out = cuda_put(device, dtype, p->out, p->b * p->tq, p->h * p->e, g.forward.ldo, p->off);
    g.forward.lse = cuda_put_vector(device, LLMPAR_F32, p->lse, p->b * p->h * p->tq);
    g.dout = cuda_put(device, dtype, p->dout, p->b * p->tq, p->h * p->e, g.forward.ldo, p->off);
    g.dq = cuda_put(device, dtype, NULL, p->b * p->tq, p->h * p->e, g.forward.ldq, p->off);
    if (dkv != LLMPAR_DTYPE_DEFAULT) ld = g.ld_dkv = p->kv * p->e + p->gap;
    g.dkv_dtype = dkv;
    if (dkv == LLMPAR_DTYPE_DEFAULT) dkv = dtype;
    g.dk = cuda_put(device, dkv, NULL, p->b * p->tk, p->kv * p->e, ld ? ld : g.forward.ldk, p->off);
    g.dv = cuda_put(device, dkv, NULL, p->b * p->tk, p->kv * p->e, ld ? ld : g.forward.ldv, p->off);
    g.forward.workspace_bytes = device->attention_backward_workspace(device, &g);
    g.forward.workspace = cuda_put_vector(device, LLMPAR_U8, NULL, (int64_t)g.forward.workspace_bytes);
    CUDA_OK(device->attention_backward(device, NULL, &g));
    cuda_get(g.dq, p->dq);
    cuda_get(g.dk, p->dk);
    cuda_get(g.dv, p->dv);
    cuda_done();
}

/* ---- against the CPU ----

   u: half a unit in the last place of the dtype (0 for f32), tiny: half the distance of its subnormals. Both devices round what they store: 2 u |want|. What goes into mma.sync is rounded to the dtype before: weights p, where
   an output is a mean of values with weights p / sum p, so u max|v|; in dv: u sum_i p |dout|; dS in dq: u scale sum_j |dS| |k|, in dk likewise; elements below the normal numbers err by tiny instead. The rest is f32: scores are
   sums of head_dim products below 4 times the scale, and wrong by at most 2^-22 of that (a tensor core cuts off what it adds), exponents by 2^-21, sums over t by t 2^-23, which all together stay below `slack` times the sums
   of absolute values. */
static double slack_of(const problem *p)
{
    return 2.4e-7 * (4.0 * (double)p->e * p->scale * 1.5 + 8.0) + 1.2e-7 * (double)p->tk;
}
static double unit_of(llmpar_dtype dtype) { return dtype == LLMPAR_F32 ? 0 : cuda_epsilon(dtype); }
static double tiny_of(llmpar_dtype dtype) { return dtype == LLMPAR_F16 ? 2.98023223876953125e-8 : 0; }

static void near_each(const char *what, const problem *p, llmpar_dtype dtype, const double *got, const double *want, const double *bound, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        if (!(fabs(got[i] - want[i]) <= bound[i])) {
            TEST_FAIL("%s %s [%lld %lld %lld %lld, heads %lld %lld, dim %lld]: element %lld of %lld: got %.9g, want %.9g within %.3g", what, llmpar_dtype_name(dtype), (long long)p->b, (long long)p->tq, (long long)p->tk, (long long)p->stride, (long long)p->h,
                      (long long)p->kv, (long long)p->e, (long long)i, (long long)count, got[i], want[i], bound[i]);
            return;
        }
}

static const int64_t shapes[][7] = { /* b, tq, tk, stride, h, kv, e */
    { 2, 70, 70, 70, 4, 2, 64 }, { 1, 130, 130, 130, 3, 1, 64 }, { 1, 1, 67, 90, 4, 4, 64 }, { 2, 5, 129, 140, 2, 1, 64 }, { 1, 6, 6, 6, 3, 1, 64 }, { 1, 20, 150, 160, 2, 2, 128 }, { 1, 33, 33, 33, 8, 1, 128 }, { 1, 1, 70, 70, 8, 1, 128 },
    { 2, 70, 70, 70, 4, 2, 8 }, { 1, 130, 130, 130, 3, 1, 20 }, { 1, 1, 67, 90, 4, 4, 16 }, { 2, 5, 129, 140, 2, 1, 32 }, { 1, 40, 40, 40, 2, 1, 256 }, { 1, 3, 3, 3, 6, 1, 5 }, { 1, 45, 45, 45, 4, 1, 96 }
};
static const llmpar_dtype dtypes[3] = { LLMPAR_BF16, LLMPAR_F16, LLMPAR_F32 };

static void check_forward(const int64_t *d, llmpar_dtype dtype, const int64_t *lengths, int64_t gap, int64_t off)
{
    problem p = problem_make(dtype, d);
    int64_t nq = p.b * p.tq * p.h * p.e, nl = p.b * p.h * p.tq;
    double *out = ops_zeros(nq), *lse = ops_zeros(nl), *bound = ops_zeros(nq), u = unit_of(dtype), slack = slack_of(&p);
    if (lengths) documents(&p, lengths, 4);
    p.gap = gap;
    p.off = off;
    forward(&p, cuda_cpu, dtype, 1);
    memcpy(out, p.out, (size_t)nq * sizeof *out);
    memcpy(lse, p.lse, (size_t)nl * sizeof *lse);
    forward(&p, cuda_gpu, dtype, 1);
    for (int64_t i = 0; i < nq; i++) bound[i] = 2.01 * u * fabs(out[i]) + 2 * (1.01 * u + (double)p.tk * tiny_of(dtype) + slack);
    near_each("out", &p, dtype, p.out, out, bound, nq);
    for (int64_t i = 0; i < nl; i++) bound[i] = slack + 2.4e-7 * fabs(lse[i]);
    near_each("lse", &p, dtype, p.lse, lse, bound, nl);
    memcpy(out, p.out, (size_t)nq * sizeof *out);
    forward(&p, cuda_gpu, dtype, 0);
    cuda_same("without lse", p.out, out, nq);
    p.gap = gap ? 0 : 3;
    p.off = off ? 0 : 1;
    forward(&p, cuda_gpu, dtype, 1);
    cuda_same("other strides and places", p.out, out, nq);
    free(out); free(lse); free(bound);
    problem_free(&p);
}

TEST(forward_is_the_cpus)
{
    const int64_t lengths[4] = { 3, 65, 1, 500 }, ones[4] = { 1, 1, 1, 2 };
    CUDA_OPEN();
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
        llmpar_dtype dtype = dtypes[s % 3];
        if (shapes[s][6] % 64 == 0 && dtype == LLMPAR_F32) dtype = s % 2 ? LLMPAR_BF16 : LLMPAR_F16;
        check_forward(shapes[s], dtype, NULL, 0, 0);
        check_forward(shapes[s], dtype, s % 4 == 3 ? ones : lengths, s % 2 ? 8 : 0, 0);
        if (!cuda_small()) for (int t = 0; t < 3; t++) check_forward(shapes[s], dtypes[t], lengths, 8 * (t % 2), t / 2);
    }
    if (!cuda_small()) {
        const int64_t large[4][7] = { { 2, 2048, 2048, 2048, 32, 8, 64 }, { 1, 1500, 3000, 4000, 8, 2, 128 }, { 3, 1, 5000, 6000, 32, 8, 128 }, { 1, 700, 700, 700, 6, 2, 80 } }, long_lengths[4] = { 700, 1, 130, 64 };
        for (int s = 0; s < 4; s++) for (int t = 0; t < 3; t++) check_forward(large[s], dtypes[t], t == 1 ? long_lengths : NULL, 0, 0);
    }
}

/* Sums of absolute values in doubles: m[0]: scale * sum_j |dS| |k| of dq; m[1]: the same with |p| (|dp| + |delta|) for |dS|; m[2], m[3]: of dk; m[4]: sum_i p |dout| of dv. */
static void magnitudes(const problem *p, double *m[5])
{
    int64_t group = p->h / p->kv, e = p->e, t = p->tk, nq = p->b * t * p->h * e, nk = p->b * t * p->kv * e;
    for (int i = 0; i < 5; i++) m[i] = ops_zeros(i < 2 ? nq : nk);
    for (int64_t b = 0; b < p->b; b++) for (int64_t h = 0; h < p->h; h++) for (int64_t i = 0; i < t; i++) {
        int64_t row = ((b * t + i) * p->h + h) * e;
        double delta = ops_dot(p->dout + row, p->out + row, e), lse = p->lse[(b * p->h + h) * t + i], size = 0;
        for (int64_t x = 0; x < e; x++) size += fabs(p->dout[row + x] * p->out[row + x]);
        for (int64_t j = p->doc ? p->doc[b * t + i] : 0; j <= i; j++) {
            int64_t key = ((b * t + j) * p->kv + h / group) * e;
            double w = exp(p->scale * ops_dot(p->q + row, p->k + key, e) - lse), dp = ops_dot(p->dout + row, p->v + key, e), ds = fabs(w * (dp - delta)) * p->scale, all = size;
            for (int64_t x = 0; x < e; x++) all += fabs(p->dout[row + x] * p->v[key + x]);
            all *= w * p->scale;
            for (int64_t x = 0; x < e; x++) {
                m[0][row + x] += ds * fabs(p->k[key + x]);
                m[1][row + x] += all * fabs(p->k[key + x]);
                m[2][key + x] += ds * fabs(p->q[row + x]);
                m[3][key + x] += all * fabs(p->q[row + x]);
                m[4][key + x] += w * fabs(p->dout[row + x]);
            }
        }
    }
}

static void check_backward(const int64_t *d, llmpar_dtype dtype, llmpar_dtype dkv, const int64_t *lengths, int64_t gap, int64_t off)
{
    problem p = problem_make(dtype, d);
    int64_t nq = p.b * p.tq * p.h * p.e, nk = p.b * p.tk * p.kv * p.e;
    double *dq = ops_zeros(nq), *dk = ops_zeros(nk), *dv = ops_zeros(nk), *bound = ops_zeros(nq > nk ? nq : nk), *m[5], u = unit_of(dtype), slack = slack_of(&p), tiny = tiny_of(dtype) * (double)p.tk * 2;
    double stored = dkv == LLMPAR_F32 ? 0 : u;
    if (lengths) documents(&p, lengths, 4);
    p.gap = gap;
    p.off = off;
    forward(&p, cuda_cpu, dtype, 1);
    backward(&p, cuda_cpu, dtype, dkv);
    memcpy(dq, p.dq, (size_t)nq * sizeof *dq);
    memcpy(dk, p.dk, (size_t)nk * sizeof *dk);
    memcpy(dv, p.dv, (size_t)nk * sizeof *dv);
    backward(&p, cuda_gpu, dtype, dkv);
    magnitudes(&p, m);
    for (int64_t i = 0; i < nq; i++) bound[i] = 2.01 * u * fabs(dq[i]) + 1.01 * u * m[0][i] + tiny + slack * m[1][i];
    near_each("dq", &p, dtype, p.dq, dq, bound, nq);
    for (int64_t i = 0; i < nk; i++) bound[i] = 2.01 * stored * fabs(dk[i]) + 1.01 * u * m[2][i] + tiny + slack * m[3][i];
    near_each("dk", &p, dtype, p.dk, dk, bound, nk);
    for (int64_t i = 0; i < nk; i++) bound[i] = 2.01 * stored * fabs(dv[i]) + 1.01 * u * m[4][i] + tiny + slack * m[4][i];
    near_each("dv", &p, dtype, p.dv, dv, bound, nk);
    memcpy(dq, p.dq, (size_t)nq * sizeof *dq);
    memcpy(dk, p.dk, (size_t)nk * sizeof *dk);
    memcpy(dv, p.dv, (size_t)nk * sizeof *dv);
    p.gap = gap ? 0 : 3;
    p.off = off ? 0 : 1;
    backward(&p, cuda_gpu, dtype, dkv);
    cuda_same("dq with other strides and places", p.dq, dq, nq);
    cuda_same("dk with other strides and places", p.dk, dk, nk);
    cuda_same("dv with other strides and places", p.dv, dv, nk);
    for (int i = 0; i < 5; i++) free(m[i]);
    free(dq); free(dk); free(dv); free(bound);
    problem_free(&p);
}

TEST(backward_is_the_cpus)
{
    const int64_t lengths[4] = { 3, 65, 1, 500 };
    CUDA_OPEN();
    for (size_t s = 0, n = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
        llmpar_dtype dtype = dtypes[n % 3];
        if (shapes[s][1] != shapes[s][2] || shapes[s][2] != shapes[s][3]) continue;
        n++;
        if (shapes[s][6] % 64 == 0 && dtype == LLMPAR_F32) dtype = s % 2 ? LLMPAR_BF16 : LLMPAR_F16;
        check_backward(shapes[s], dtype, s % 2 ? LLMPAR_F32 : LLMPAR_DTYPE_DEFAULT, n % 2 ? lengths : NULL, s % 2 ? 8 : 0, 0);
        if (!cuda_small()) for (int t = 0; t < 3; t++) check_backward(shapes[s], dtypes[t], LLMPAR_DTYPE_DEFAULT, lengths, 8 * (t % 2), t / 2);
    }
    if (!cuda_small()) {
        const int64_t large[3][7] = { { 3, 500, 500, 500, 32, 8, 64 }, { 1, 1030, 1030, 1030, 8, 8, 128 }, { 1, 300, 300, 300, 6, 2, 80 } }, long_lengths[4] = { 200, 1, 130, 64 };
        for (int s = 0; s < 3; s++) for (int t = 0; t < 3; t++) check_backward(large[s], dtypes[t], LLMPAR_DTYPE_DEFAULT, t == 1 ? long_lengths : NULL, 0, 0);
    }
}

/* ---- cuts ---- */

/* rows [t0, t1) of sequences [b0, b1), heads [h0, h1) of x[b, t, h, e] */
static double *cut(const double *x, int64_t t, int64_t h, int64_t e, int64_t b0, int64_t b1, int64_t t0, int64_t t1, int64_t h0, int64_t h1)
{
    double *out = ops_zeros((b1 - b0) * (t1 - t0) * (h1 - h0) * e), *at = out;
    for (int64_t b = b0; b < b1; b++) for (int64_t i = t0; i < t1; i++, at += (h1 - h0) * e) memcpy(at, x + ((b * t + i) * h + h0) * e, (size_t)((h1 - h0) * e) * sizeof *at);
    return out;
}

/* A part of p: sequences, positions (its own documents), query heads; kv heads follow. */
static problem part_of(const problem *p, int64_t b0, int64_t b1, int64_t t0, int64_t t1, int64_t h0, int64_t h1)
{
    int64_t group = p->h / p->kv, k0 = h0 / group, k1 = (h1 + group - 1) / group;
    problem s;
    memset(&s, 0, sizeof s);
    s.b = b1 - b0; s.tq = s.tk = s.stride = t1 - t0; s.h = h1 - h0; s.kv = k1 - k0; s.e = p->e; s.scale = p->scale;
    s.q = cut(p->q, p->tq, p->h, p->e, b0, b1, t0, t1, h0, h1);
    s.dout = cut(p->dout, p->tq, p->h, p->e, b0, b1, t0, t1, h0, h1);
    s.k = cut(p->k, p->tk, p->kv, p->e, b0, b1, t0, t1, k0, k1);
    s.v = cut(p->v, p->tk, p->kv, p->e, b0, b1, t0, t1, k0, k1);
    s.out = ops_zeros(s.b * s.tq * s.h * s.e);
    s.lse = ops_zeros(s.b * s.tq * s.h);
    s.dq = ops_zeros(s.b * s.tq * s.h * s.e);
    s.dk = ops_zeros(s.b * s.tk * s.kv * s.e);
    s.dv = ops_zeros(s.b * s.tk * s.kv * s.e);
    return s;
}

static void compare_part(const char *what, const problem *p, const problem *s, int64_t b0, int64_t t0, int64_t h0, int with_kv)
{
    int64_t group = p->h / p->kv, nq = s->b * s->tq * s->h * s->e, nk = s->b * s->tk * s->kv * s->e;
    double *out = cut(p->out, p->tq, p->h, p->e, b0, b0 + s->b, t0, t0 + s->tq, h0, h0 + s->h), *dq = cut(p->dq, p->tq, p->h, p->e, b0, b0 + s->b, t0, t0 + s->tq, h0, h0 + s->h);
    double *dk = cut(p->dk, p->tk, p->kv, p->e, b0, b0 + s->b, t0, t0 + s->tk, h0 / group, h0 / group + s->kv), *dv = cut(p->dv, p->tk, p->kv, p->e, b0, b0 + s->b, t0, t0 + s->tk, h0 / group, h0 / group + s->kv);
    cuda_same(what, s->out, out, nq);
    cuda_same(what, s->dq, dq, nq);
    if (with_kv) { cuda_same(what, s->dk, dk, nk); cuda_same(what, s->dv, dv, nk); }
    free(out); free(dq); free(dk); free(dv);
}

/* The balanced tree of `n` parts in f32, as llmpar_tree_split cuts it. */
static double *tree(double *const *parts, int64_t n, int64_t count)
{
    double *out = ops_zeros(count), *left, *right;
    if (n == 1) { memcpy(out, parts[0], (size_t)count * sizeof *out); return out; }
    left = tree(parts, llmpar_tree_split(n), count);
    right = tree(parts + llmpar_tree_split(n), n - llmpar_tree_split(n), count);
    for (int64_t i = 0; i < count; i++) out[i] = (double)((float)left[i] + (float)right[i]);
    free(left); free(right);
    return out;
}

static void parts(llmpar_dtype dtype, int64_t e)
{
    const int64_t lengths[5] = { 1, 70, 17, 3, 500 }, starts[6] = { 0, 1, 71, 88, 91, 120 }, d[7] = { 2, 120, 120, 120, 4, 1, e };
    problem p = problem_make(dtype, d), s[4];
    double *dk[4], *dv[4], *sum_k, *sum_v;
    int64_t nk = 2 * 120 * e;
    documents(&p, lengths, 5);
    forward(&p, cuda_gpu, dtype, 1);
    backward(&p, cuda_gpu, dtype, LLMPAR_F32);
    /* each document of a sequence alone */
    for (int i = 0; i < 5; i++) {
        problem one = part_of(&p, 1, 2, starts[i], starts[i + 1], 0, 4);
        forward(&one, cuda_gpu, dtype, 1);
        backward(&one, cuda_gpu, dtype, LLMPAR_F32);
        compare_part("a document alone", &p, &one, 1, starts[i], 0, 1);
        problem_free(&one);
    }
    /* each head alone: dk and dv combined by the tree */
    for (int i = 0; i < 4; i++) {
        s[i] = part_of(&p, 0, 2, 0, 120, i, i + 1);
        documents(&s[i], lengths, 5);
        forward(&s[i], cuda_gpu, dtype, 1);
        backward(&s[i], cuda_gpu, dtype, LLMPAR_F32);
        compare_part("a head alone", &p, &s[i], 0, 0, i, 0);
        dk[i] = s[i].dk;
        dv[i] = s[i].dv;
    }
    sum_k = tree(dk, 4, nk);
    sum_v = tree(dv, 4, nk);
    cuda_same("dk of the group", p.dk, sum_k, nk);
    cuda_same("dv of the group", p.dv, sum_v, nk);
    /* rounded once */
    backward(&p, cuda_gpu, dtype, LLMPAR_DTYPE_DEFAULT);
    cuda_round(dtype, sum_k, nk);
    cuda_same("dk, rounded", p.dk, sum_k, nk);
    free(sum_k); free(sum_v);
    for (int i = 0; i < 4; i++) problem_free(&s[i]);
    problem_free(&p);
}
TEST(parts_have_the_same_bits_64) { CUDA_OPEN(); parts(LLMPAR_BF16, 64); }
TEST(parts_have_the_same_bits_128) { CUDA_OPEN(); parts(LLMPAR_F16, 128); }
TEST(parts_have_the_same_bits_f32) { CUDA_OPEN(); parts(LLMPAR_F32, 12); if (!cuda_small()) parts(LLMPAR_BF16, 80); }

/* Groups that are no power of two: 6 = (2 + 1) + (2 + 1). */
TEST(odd_groups)
{
    const int64_t d[7] = { 1, 20, 20, 20, 6, 1, 8 };
    problem p, s[6];
    double *half[2], *sum, *dk[6];
    CUDA_OPEN();
    p = problem_make(LLMPAR_F32, d);
    forward(&p, cuda_gpu, LLMPAR_F32, 1);
    backward(&p, cuda_gpu, LLMPAR_F32, LLMPAR_DTYPE_DEFAULT);
    for (int64_t h = 0; h < 6; h++) {
        s[h] = part_of(&p, 0, 1, 0, 20, h, h + 1);
        forward(&s[h], cuda_gpu, LLMPAR_F32, 1);
        backward(&s[h], cuda_gpu, LLMPAR_F32, LLMPAR_DTYPE_DEFAULT);
        dk[h] = s[h].dk;
    }
    half[0] = tree(dk, 3, 160);
    half[1] = tree(dk + 3, 3, 160);
    sum = tree(half, 2, 160);
    cuda_same("group of 6", p.dk, sum, 160);
    for (int h = 0; h < 6; h++) problem_free(&s[h]);
    free(half[0]); free(half[1]); free(sum);
    problem_free(&p);
}

/* Query rows in calls of 1, 2, 7 and 40 rows on a growing cache give the rows of one call. packed: documents end inside calls of 40 rows; 2: inside one of 7 too, behind several tiles of keys. */
static void decoding(llmpar_dtype dtype, int64_t e, int packed)
{
    const int64_t steps[4] = { 1, 2, 7, 40 }, lengths[2][3] = { { 66, 3, 500 }, { 40, 65, 500 } }, d[7] = { 2, 110, 110, 110, 4, 2, e };
    problem p = problem_make(dtype, d);
    if (packed) documents(&p, lengths[packed - 1], 3);
    forward(&p, cuda_gpu, dtype, 1);
    for (int64_t at = 0, i = 0; at < 110; i++) {
        int64_t rows = at + steps[i % 4] > 110 ? 110 - at : steps[i % 4];
        problem s = p;
        double *want = cut(p.out, 110, 4, e, 0, 2, at, at + rows, 0, 4);
        s.tq = rows;
        s.tk = at + rows;
        s.q = cut(p.q, 110, 4, e, 0, 2, at, at + rows, 0, 4);
        s.out = ops_zeros(2 * rows * 4 * e);
        s.lse = ops_zeros(2 * rows * 4);
        if (packed) {
            s.doc = (int32_t *)malloc((size_t)(2 * s.tk) * sizeof *s.doc);
            for (int64_t b = 0; b < 2; b++) memcpy(s.doc + b * s.tk, p.doc + b * 110, (size_t)s.tk * sizeof *s.doc);
        }
        forward(&s, cuda_gpu, dtype, 1);
        cuda_same("decode", s.out, want, 2 * rows * 4 * e);
        for (int64_t b = 0; b < 2; b++) for (int64_t h = 0; h < 4; h++) cuda_same("decode, lse", s.lse + (b * 4 + h) * rows, p.lse + (b * 4 + h) * 110 + at, rows);
        free(s.q); free(s.out); free(s.lse); free(want);
        if (packed) free(s.doc);
        at += rows;
    }
    problem_free(&p);
}
TEST(decoding_has_the_same_bits)
{
    CUDA_OPEN();
    decoding(LLMPAR_BF16, 64, 0);
    decoding(LLMPAR_F16, 128, 1);
    decoding(LLMPAR_BF16, 64, 2);
    decoding(LLMPAR_F32, 16, 1);
}

TEST(fewer_need_no_more)
{
    CUDA_OPEN();
    attention_fewer(cuda_gpu);
}

/* Two blocks of 128 rows of head_dim 128 have all of what one block may have there. */
TEST(less_shared_memory)
{
    CUDA_OPEN();
    cuda_again("EMULATED_CUDA_CAPABILITY", "86", "parts_have_the_same_bits_128");
}

TEST(refusals)
{
    llmpar_attention_args a;
    llmpar_attention_backward_args g;
    CUDA_OPEN();
    memset(&a, 0, sizeof a);
    a.batch = 1; a.tq = a.tk = a.tk_stride = 4; a.heads = 3; a.kv_heads = 2; a.head_dim = 64;
    a.ldq = a.ldk = a.ldv = a.ldo = 192; a.dtype = LLMPAR_BF16; a.scale = 1;
    CUDA_REFUSED(cuda_gpu->attention(cuda_gpu, NULL, &a), LLMPAR_ERR_SHAPE, "3 heads, 2 kv heads");
    a.heads = 2;
    CUDA_REFUSED(cuda_gpu->attention(cuda_gpu, NULL, &a), LLMPAR_ERR_ARGUMENT, "workspace of 0 bytes");
    a.tq = 5;
    CUDA_REFUSED(cuda_gpu->attention(cuda_gpu, NULL, &a), LLMPAR_ERR_SHAPE, "tq 5, tk 4");
    a.tq = 4;
    a.dtype = LLMPAR_F64;
    CUDA_REFUSED(cuda_gpu->attention(cuda_gpu, NULL, &a), LLMPAR_ERR_UNSUPPORTED, "f64");
    a.dtype = LLMPAR_F32;
    a.head_dim = 4000;
    CUDA_REFUSED(cuda_gpu->attention(cuda_gpu, NULL, &a), LLMPAR_ERR_UNSUPPORTED, "head_dim 4000 needs");
    a.head_dim = 64;
    memset(&g, 0, sizeof g);
    g.forward = a;
    g.forward.tk = 6;
    g.forward.tk_stride = 6;
    CUDA_REFUSED(cuda_gpu->attention_backward(cuda_gpu, NULL, &g), LLMPAR_ERR_SHAPE, "expected three equal numbers");
    g.forward = a;
    CUDA_REFUSED(cuda_gpu->attention_backward(cuda_gpu, NULL, &g), LLMPAR_ERR_ARGUMENT, "workspace of 0 bytes");
    g.forward.workspace = cuda_put_vector(cuda_gpu, LLMPAR_U8, NULL, 1 << 16);
    g.forward.workspace_bytes = 1 << 16;
    g.dkv_dtype = LLMPAR_F16;
    CUDA_REFUSED(cuda_gpu->attention_backward(cuda_gpu, NULL, &g), LLMPAR_ERR_ARGUMENT, "dkv_dtype f16 for dtype f32");
    a.tq = 0;
    CUDA_OK(cuda_gpu->attention(cuda_gpu, NULL, &a));
    g.forward.batch = 0;
    CUDA_OK(cuda_gpu->attention_backward(cuda_gpu, NULL, &g));
    cuda_done();
}

TEST_LIST(T_(forward_is_the_cpus), T_(backward_is_the_cpus), T_(parts_have_the_same_bits_64), T_(parts_have_the_same_bits_128), T_(parts_have_the_same_bits_f32), T_(odd_groups), T_(decoding_has_the_same_bits), T_(fewer_need_no_more), T_(less_shared_memory), T_(refusals), T_(cuda_end))
