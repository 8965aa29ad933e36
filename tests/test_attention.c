/* attention: against finite differences, against plain softmax, and cut in every way: the bits of a row depend on its document only. */
#include "attention_sizes.h"
#include "ops.h"

typedef struct problem {
    int64_t b, tq, tk, stride, h, kv, e;
    double *q, *k, *v, *dout;     /* [b,tq,h,e], [b,stride,kv,e], [b,tq,h,e] */
    int32_t *doc;                 /* [b,tk] or NULL */
    double *out, *lse, *dq, *dk, *dv;
} problem;

/* f64, f32 at every level, and BF16 at the best one, whose scores may be products of pairs; numbers are BF16's, so that all compute the same. */
static int attention_ways(ops_way ways[5])
{
    int n = ops_ways(ways);
    ways[n].level = llmpar_cpu_best_level();
    ways[n++].dtype = LLMPAR_BF16;
    return n;
}
static double *attention_random(int64_t n, double scale)
{
    double *x = ops_random(n, scale);
    for (int64_t i = 0; i < n; i++) {
        uint16_t half;
        llmpar_convert(&half, LLMPAR_BF16, x + i, LLMPAR_F64, 1);
        llmpar_convert(x + i, LLMPAR_F64, &half, LLMPAR_BF16, 1);
    }
    return x;
}

static problem problem_make(int64_t b, int64_t tq, int64_t tk, int64_t stride, int64_t h, int64_t kv, int64_t e)
{
    problem p;
    p.b = b; p.tq = tq; p.tk = tk; p.stride = stride; p.h = h; p.kv = kv; p.e = e;
    p.q = attention_random(b * tq * h * e, 2);
    p.k = attention_random(b * stride * kv * e, 2);
    p.v = attention_random(b * stride * kv * e, 2);
    p.dout = attention_random(b * tq * h * e, 1);
    p.doc = NULL;
    p.out = ops_zeros(b * tq * h * e);
    p.lse = ops_zeros(b * h * tq);
    p.dq = ops_zeros(b * tq * h * e);
    p.dk = ops_zeros(b * stride * kv * e);
    p.dv = ops_zeros(b * stride * kv * e);
    return p;
}
static void problem_free(problem *p)
{
    free(p->q); free(p->k); free(p->v); free(p->dout); free(p->doc); free(p->out); free(p->lse); free(p->dq); free(p->dk); free(p->dv);
}

static void fill(const problem *p, llmpar_device *device, llmpar_dtype dtype, llmpar_attention_args *a)
{
    int64_t pad = ops_below(5);
    memset(a, 0, sizeof *a);
    a->batch = p->b; a->tq = p->tq; a->tk = p->tk; a->tk_stride = p->stride; a->heads = p->h; a->kv_heads = p->kv; a->head_dim = p->e;
    a->ldq = p->h * p->e + pad; a->ldk = p->kv * p->e + pad; a->ldv = p->kv * p->e; a->ldo = p->h * p->e + 1;
    a->dtype = dtype;
    a->scale = 1 / sqrt((double)p->e);
    a->q = ops_put(dtype, p->q, p->b * p->tq, p->h * p->e, a->ldq);
    a->k = ops_put(dtype, p->k, p->b * p->stride, p->kv * p->e, a->ldk);
    a->v = ops_put(dtype, p->v, p->b * p->stride, p->kv * p->e, a->ldv);
    a->doc_start = (const int32_t *)ops_in(LLMPAR_I32, p->doc, p->b * p->tk);
    (void)device;
}

static void forward(problem *p, llmpar_device *device, llmpar_dtype dtype, int with_lse)
{
    llmpar_attention_args a;
    fill(p, device, dtype, &a);
    a.out = ops_put(dtype, NULL, p->b * p->tq, p->h * p->e, a.ldo);
    a.lse = with_lse ? ops_out(llmpar_dtype_sum(dtype), p->b * p->h * p->tq) : NULL;
    a.workspace_bytes = device->attention_workspace(device, &a);
    a.workspace = ops_out(LLMPAR_U8, (int64_t)a.workspace_bytes);
    CHECK_OK(device->attention(device, NULL, &a));
    ops_get(dtype, p->out, a.out, p->b * p->tq, p->h * p->e, a.ldo);
    if (with_lse) ops_take(llmpar_dtype_sum(dtype), p->lse, a.lse, p->b * p->h * p->tq);
    ops_release();
}

static void backward(problem *p, llmpar_device *device, llmpar_dtype dtype)
{
    llmpar_attention_backward_args g;
    memset(&g, 0, sizeof g);
    fill(p, device, dtype, &g.forward);
    g.forward.out = ops_put(dtype, p->out, p->b * p->tq, p->h * p->e, g.forward.ldo);
    g.forward.lse = ops_in(llmpar_dtype_sum(dtype), p->lse, p->b * p->h * p->tq);
    g.dout = ops_put(dtype, p->dout, p->b * p->tq, p->h * p->e, g.forward.ldo);
    g.dq = ops_put(dtype, NULL, p->b * p->tq, p->h * p->e, g.forward.ldq);
    g.dk = ops_put(dtype, NULL, p->b * p->tk, p->kv * p->e, g.forward.ldk);
    g.dv = ops_put(dtype, NULL, p->b * p->tk, p->kv * p->e, g.forward.ldv);
    g.forward.workspace_bytes = device->attention_backward_workspace(device, &g);
    g.forward.workspace = ops_out(LLMPAR_U8, (int64_t)g.forward.workspace_bytes);
    CHECK_OK(device->attention_backward(device, NULL, &g));
    ops_get(dtype, p->dq, g.dq, p->b * p->tq, p->h * p->e, g.forward.ldq);
    ops_get(dtype, p->dk, g.dk, p->b * p->tk, p->kv * p->e, g.forward.ldk);
    ops_get(dtype, p->dv, g.dv, p->b * p->tk, p->kv * p->e, g.forward.ldv);
    ops_release();
}

/* Lengths of documents, in order, for every sequence. */
static void documents(problem *p, const int64_t *lengths, int count)
{
    p->doc = (int32_t *)malloc((size_t)(p->b * p->tk) * sizeof *p->doc);
    for (int64_t b = 0; b < p->b; b++) {
        int64_t at = 0;
        for (int d = 0; d < count; d++) {
            int64_t begin = at;
            for (int64_t i = 0; i < lengths[d] && at < p->tk; i++) p->doc[b * p->tk + at++] = (int32_t)begin;
        }
    }
}

/* The definition, with plain loops. */
static void reference(const problem *p, double *out, double *lse)
{
    for (int64_t b = 0; b < p->b; b++) for (int64_t h = 0; h < p->h; h++) for (int64_t i = 0; i < p->tq; i++) {
        int64_t at = i + p->tk - p->tq, from = p->doc ? p->doc[b * p->tk + at] : 0, g = h * p->kv / p->h;
        const double *q = p->q + ((b * p->tq + i) * p->h + h) * p->e;
        double *o = out + ((b * p->tq + i) * p->h + h) * p->e, top = -INFINITY, sum = 0;
        double *s = ops_zeros(p->tk);
        for (int64_t j = from; j <= at; j++) {
            s[j] = ops_dot(q, p->k + ((b * p->stride + j) * p->kv + g) * p->e, p->e) / sqrt((double)p->e);
            top = s[j] > top ? s[j] : top;
        }
        memset(o, 0, (size_t)p->e * sizeof *o);
        for (int64_t j = from; j <= at; j++) {
            double w = exp(s[j] - top);
            sum += w;
            for (int64_t x = 0; x < p->e; x++) o[x] += w * p->v[((b * p->stride + j) * p->kv + g) * p->e + x];
        }
        for (int64_t x = 0; x < p->e; x++) o[x] /= sum;
        lse[(b * p->h + h) * p->tq + i] = top + log(sum);
        free(s);
    }
}

static const int64_t shapes[][7] = { /* b, tq, tk, stride, h, kv, e */
    { 2, 70, 70, 70, 4, 2, 8 }, { 1, 130, 130, 130, 3, 1, 20 }, { 1, 1, 67, 90, 4, 4, 16 }, { 2, 5, 129, 140, 2, 1, 32 }, { 1, 64, 64, 64, 1, 1, 64 }, { 1, 3, 3, 3, 6, 1, 5 }, { 1, 100, 100, 100, 2, 2, 128 }
};

TEST(forward_is_softmax)
{
    ops_way ways[5];
    int n = attention_ways(ways);
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) for (int packed = 0; packed < 2; packed++) {
        const int64_t *d = shapes[s], lengths[4] = { 3, 65, 1, 500 };
        problem p = problem_make(d[0], d[1], d[2], d[3], d[4], d[5], d[6]);
        double *out = ops_zeros(p.b * p.tq * p.h * p.e), *lse = ops_zeros(p.b * p.h * p.tq), *first = ops_zeros(p.b * p.tq * p.h * p.e);
        if (packed) documents(&p, lengths, 4);
        reference(&p, out, lse);
        for (int w = 0; w < n; w++) {
            double bound = ways[w].dtype == LLMPAR_F64 ? 1e-14 : 1e-6, of_out = ways[w].dtype == LLMPAR_BF16 ? 1.0 / 256 : bound; /* which is rounded */
            for (int threads = 1; threads <= 3; threads += packed ? 2 : 1) {
                forward(&p, ops_device(ways[w].level, threads), ways[w].dtype, 1);
                ops_near("out", ways[w], p.out, out, p.b * p.tq * p.h * p.e, of_out);
                ops_near("lse", ways[w], p.lse, lse, p.b * p.h * p.tq, bound);
                if (threads == 1) memcpy(first, p.out, (size_t)(p.b * p.tq * p.h * p.e) * sizeof *first);
                else ops_same("threads", ways[w], p.out, first, p.b * p.tq * p.h * p.e);
            }
            forward(&p, ops_device(ways[w].level, 1), ways[w].dtype, 0);
            ops_same("without lse", ways[w], p.out, first, p.b * p.tq * p.h * p.e);
        }
        free(out); free(lse); free(first);
        problem_free(&p);
    }
}

static double value(void *user)
{
    problem *p = (problem *)user;
    forward(p, ops_device(LLMPAR_CPU_PORTABLE, 1), LLMPAR_F64, 1);
    return ops_dot(p->out, p->dout, p->b * p->tq * p->h * p->e);
}

TEST(backward_is_derivative)
{
    for (int packed = 0; packed < 2; packed++) for (int shape = 0; shape < 3; shape++) {
        const int64_t lengths[3] = { 5, 66, 500 };
        problem p = shape == 0 ? problem_make(2, 9, 9, 9, 4, 2, 6) : shape == 1 ? problem_make(1, 70, 70, 70, 3, 1, 4) : problem_make(1, 20, 20, 20, 6, 1, 3);
        int64_t nq = p.b * p.tq * p.h * p.e, nk = p.b * p.tk * p.kv * p.e;
        double *dq = ops_zeros(nq), *dk = ops_zeros(nk), *dv = ops_zeros(nk);
        if (packed) documents(&p, lengths, 3);
        value(&p);
        backward(&p, ops_device(LLMPAR_CPU_PORTABLE, 1), LLMPAR_F64);
        memcpy(dq, p.dq, (size_t)nq * sizeof *dq);
        memcpy(dk, p.dk, (size_t)nk * sizeof *dk);
        memcpy(dv, p.dv, (size_t)nk * sizeof *dv);
        ops_differences("dq", value, &p, p.q, nq, dq);
        ops_differences("dk", value, &p, p.k, nk, dk);
        ops_differences("dv", value, &p, p.v, nk, dv);
        free(dq); free(dk); free(dv);
        problem_free(&p);
    }
}

TEST(backward_levels_and_threads)
{
    ops_way ways[5];
    int n = attention_ways(ways);
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) for (int packed = 0; packed < 2; packed++) {
        const int64_t *d = shapes[s], lengths[4] = { 3, 65, 1, 500 };
        problem p, r;
        int64_t nq, nk;
        if (d[1] != d[2]) continue;
        p = problem_make(d[0], d[1], d[2], d[3], d[4], d[5], d[6]);
        nq = p.b * p.tq * p.h * p.e;
        nk = p.b * p.tk * p.kv * p.e;
        if (packed) documents(&p, lengths, 4);
        r = p;
        r.dq = ops_zeros(nq); r.dk = ops_zeros(nk); r.dv = ops_zeros(nk);
        for (int w = 0; w < n; w++)
            for (int threads = 1; threads <= 3; threads += packed ? 2 : 1) {
                forward(&p, ops_device(ways[w].level, threads), ways[w].dtype, 1);
                backward(&p, ops_device(ways[w].level, threads), ways[w].dtype);
                if (w == 0 && threads == 1) { memcpy(r.dq, p.dq, (size_t)nq * 8); memcpy(r.dk, p.dk, (size_t)nk * 8); memcpy(r.dv, p.dv, (size_t)nk * 8); }
                double bound = ways[w].dtype == LLMPAR_BF16 ? 1.0 / 64 : 4e-6;
                ops_near("dq", ways[w], p.dq, r.dq, nq, bound);
                ops_near("dk", ways[w], p.dk, r.dk, nk, bound);
                ops_near("dv", ways[w], p.dv, r.dv, nk, bound);
                if (threads == 1) continue;
                {
                    double *dq = ops_zeros(nq), *dk = ops_zeros(nk), *dv = ops_zeros(nk);
                    memcpy(dq, p.dq, (size_t)nq * 8); memcpy(dk, p.dk, (size_t)nk * 8); memcpy(dv, p.dv, (size_t)nk * 8);
                    backward(&p, ops_device(ways[w].level, 1), ways[w].dtype);
                    ops_same("dq threads", ways[w], dq, p.dq, nq);
                    ops_same("dk threads", ways[w], dk, p.dk, nk);
                    ops_same("dv threads", ways[w], dv, p.dv, nk);
                    free(dq); free(dk); free(dv);
                }
            }
        free(r.dq); free(r.dk); free(r.dv);
        problem_free(&p);
    }
}

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
    s.b = b1 - b0; s.tq = s.tk = s.stride = t1 - t0; s.h = h1 - h0; s.kv = k1 - k0; s.e = p->e;
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

static void compare_part(const char *what, ops_way way, const problem *p, const problem *s, int64_t b0, int64_t t0, int64_t h0, int with_kv)
{
    int64_t group = p->h / p->kv, nq = s->b * s->tq * s->h * s->e, nk = s->b * s->tk * s->kv * s->e;
    double *out = cut(p->out, p->tq, p->h, p->e, b0, b0 + s->b, t0, t0 + s->tq, h0, h0 + s->h), *dq = cut(p->dq, p->tq, p->h, p->e, b0, b0 + s->b, t0, t0 + s->tq, h0, h0 + s->h);
    double *dk = cut(p->dk, p->tk, p->kv, p->e, b0, b0 + s->b, t0, t0 + s->tk, h0 / group, h0 / group + s->kv), *dv = cut(p->dv, p->tk, p->kv, p->e, b0, b0 + s->b, t0, t0 + s->tk, h0 / group, h0 / group + s->kv);
    ops_same(what, way, s->out, out, nq);
    ops_same(what, way, s->dq, dq, nq);
    if (with_kv) { ops_same(what, way, s->dk, dk, nk); ops_same(what, way, s->dv, dv, nk); }
    free(out); free(dq); free(dk); free(dv);
}

TEST(parts_have_the_same_bits)
{
    ops_way ways[5];
    int n = attention_ways(ways);
    for (int w = 0; w < n; w++) {
        llmpar_device *device = ops_device(ways[w].level, 1);
        const int64_t lengths[5] = { 1, 70, 129, 7, 500 }, starts[6] = { 0, 1, 71, 200, 207, 215 };
        problem p = problem_make(2, 215, 215, 215, 8, 2, 12);
        documents(&p, lengths, 5);
        forward(&p, device, ways[w].dtype, 1);
        backward(&p, device, ways[w].dtype);
        /* each document of each sequence alone, and one head alone */
        for (int64_t b = 0; b < 2; b++) for (int d = 0; d < 5; d++) {
            problem s = part_of(&p, b, b + 1, starts[d], starts[d + 1], 0, 8);
            forward(&s, device, ways[w].dtype, 1);
            backward(&s, device, ways[w].dtype);
            compare_part("a document alone", ways[w], &p, &s, b, starts[d], 0, 1);
            problem_free(&s);
        }
        /* heads over 2 and 8 ranks: one kv head each; then part of a group each, dk and dv combined by the tree */
        for (int64_t ranks = 2; ranks <= 8; ranks *= 2) {
            problem s[8];
            double *dk[8], *dv[8];
            for (int64_t r = 0; r < ranks; r++) {
                s[r] = part_of(&p, 0, 2, 0, 215, r * 8 / ranks, (r + 1) * 8 / ranks);
                documents(&s[r], lengths, 5);
                forward(&s[r], device, ways[w].dtype, 1);
                backward(&s[r], device, ways[w].dtype);
                compare_part("heads", ways[w], &p, &s[r], 0, 0, r * 8 / ranks, ranks == 2);
                dk[r] = s[r].dk;
                dv[r] = s[r].dv;
            }
            for (int64_t g = 0; ranks > 2 && g < 2 && ways[w].dtype != LLMPAR_BF16; g++) { /* BF16: rounded before the tree */
                int64_t nk = 2 * 215 * 12;
                double *sum_k = ops_tree(ways[w].dtype, dk + g * ranks / 2, ranks / 2, nk), *sum_v = ops_tree(ways[w].dtype, dv + g * ranks / 2, ranks / 2, nk);
                double *want_k = cut(p.dk, 215, 2, 12, 0, 2, 0, 215, g, g + 1), *want_v = cut(p.dv, 215, 2, 12, 0, 2, 0, 215, g, g + 1);
                ops_same("group dk", ways[w], sum_k, want_k, nk);
                ops_same("group dv", ways[w], sum_v, want_v, nk);
                free(sum_k); free(sum_v); free(want_k); free(want_v);
            }
            for (int64_t r = 0; r < ranks; r++) problem_free(&s[r]);
        }
        problem_free(&p);
    }
}

/* Groups that are no power of two: 6 = (2 + 1) + (2 + 1). */
TEST(odd_groups)
{
    ops_way ways[5];
    int n = attention_ways(ways);
    for (int w = 0; w < n; w++) {
        llmpar_device *device = ops_device(ways[w].level, 1);
        problem p = problem_make(1, 40, 40, 40, 6, 1, 8), s[6];
        double *half[2], *sum, *dk[6];
        forward(&p, device, ways[w].dtype, 1);
        backward(&p, device, ways[w].dtype);
        for (int64_t h = 0; h < 6; h++) {
            s[h] = part_of(&p, 0, 1, 0, 40, h, h + 1);
            forward(&s[h], device, ways[w].dtype, 1);
            backward(&s[h], device, ways[w].dtype);
            dk[h] = s[h].dk;
        }
        half[0] = ops_tree(ways[w].dtype, dk, 3, 320);
        half[1] = ops_tree(ways[w].dtype, dk + 3, 3, 320);
        sum = ops_tree(ways[w].dtype, half, 2, 320);
        if (ways[w].dtype != LLMPAR_BF16) ops_same("group of 6", ways[w], p.dk, sum, 320);
        for (int h = 0; h < 6; h++) problem_free(&s[h]);
        free(half[0]); free(half[1]); free(sum);
        problem_free(&p);
    }
}

/* Where the processor has units for BF16, a score is the product of the odd elements of q and k, then of the even ones, pair by pair, then times the scale, whether few rows are asked for or many. A document of one
   key has it as its lse. */
TEST(scores_of_pairs)
{
    static const int64_t dims[5] = { 2, 6, 64, 96, 130 };
    for (int d = 0; d < 5 && llmpar_cpu_best_level() == LLMPAR_CPU_AVX512BF16; d++) for (int64_t t = 1; t <= 33; t += 32) {
        const int64_t e = dims[d];
        const float scale = (float)(1 / sqrt((double)e) * 1.4426950408889634);
        problem p = problem_make(3, t, t, t, 4, 2, e);
        p.doc = (int32_t *)malloc((size_t)(3 * t) * sizeof *p.doc);
        for (int64_t i = 0; i < 3 * t; i++) p.doc[i] = (int32_t)(i % t);
        forward(&p, ops_device(LLMPAR_CPU_AVX512BF16, 2), LLMPAR_BF16, 1);
        for (int64_t i = 0; i < 3 * t; i++) for (int64_t h = 0; h < 4; h++) {
            const double *q = p.q + (i * 4 + h) * e, *k = p.k + (i * 2 + h / 2) * e;
            float score = 0;
            for (int64_t j = 0; j < e; j += 2) score = fmaf((float)q[j], (float)k[j], fmaf((float)q[j + 1], (float)k[j + 1], score));
            score *= scale;
            score *= 0.6931471805599453f;
            CHECK(p.lse[(i / t * 4 + h) * t + i % t] == (double)score);
        }
        problem_free(&p);
    }
}

/* Query rows in calls of 1, 2, 7 and 64 rows on a growing cache give the rows of one call, whether a task has all KV heads or one. */
TEST(decoding_has_the_same_bits)
{
    enum { H = 6, KV = 3, E = 32 };
    ops_way ways[5];
    const int64_t steps[4] = { 1, 2, 7, 64 };
    int n = attention_ways(ways);
    for (int w = 0; w < n; w++) for (int packed = 0; packed < 2; packed++) {
        llmpar_device *device = ops_device(ways[w].level, 1 + packed);
        const int64_t lengths[3] = { 66, 3, 500 };
        problem p = problem_make(2, 150, 150, 150, H, KV, E);
        if (packed) documents(&p, lengths, 3);
        forward(&p, device, ways[w].dtype, 1);
        for (int64_t at = 0, i = 0; at < 150; i++) {
            int64_t rows = at + steps[i % 4] > 150 ? 150 - at : steps[i % 4];
            problem s = p;
            double *want = cut(p.out, 150, H, E, 0, 2, at, at + rows, 0, H);
            s.tq = rows;
            s.tk = at + rows;
            s.q = cut(p.q, 150, H, E, 0, 2, at, at + rows, 0, H);
            s.out = ops_zeros(2 * rows * H * E);
            s.lse = ops_zeros(2 * rows * H);
            if (packed) {
                s.doc = (int32_t *)malloc((size_t)(2 * s.tk) * sizeof *s.doc);
                for (int64_t b = 0; b < 2; b++) memcpy(s.doc + b * s.tk, p.doc + b * 150, (size_t)s.tk * sizeof *s.doc);
            }
            forward(&s, device, ways[w].dtype, 1);
            ops_same("decode", ways[w], s.out, want, 2 * rows * H * E);
            free(s.q); free(s.out); free(s.lse); free(want);
            if (packed) free(s.doc);
            at += rows;
        }
        problem_free(&p);
    }
}

/* Calls of several texts, of one token and of many, empty ones too, on more threads than calls and on fewer, by the device and one by one, and on a stream with a thread: each has the bits that it has alone. */
enum { EACH = 5 };
static void each_call(llmpar_device *device, llmpar_stream *stream, const llmpar_attention_args *calls, int by_device, int32_t count)
{
    const llmpar_attention_each_args args = { calls, count };
    llmpar_status (*slot)(llmpar_device *, llmpar_stream *, const llmpar_attention_each_args *) = device->attention_each;
    if (!by_device) device->attention_each = NULL;
    CHECK_OK(llmpar_device_attention_each(device, stream, &args));
    device->attention_each = slot;
    CHECK_OK(device->synchronize(device, stream));
}
TEST(each_of_several)
{
    static const int64_t t[EACH][2] = { { 1, 67 }, { 1, 1 }, { 0, 5 }, { 9, 130 }, { 1, 300 } };
    ops_way ways[5];
    int n = attention_ways(ways);
    for (int w = 0; w < n; w++) for (int threads = 1; threads <= 3; threads++) for (int kv = 2; kv <= 4; kv += 2) {
        llmpar_device *device = ops_device(ways[w].level, threads);
        llmpar_attention_args calls[EACH], largest;
        llmpar_stream *stream;
        problem p[EACH];
        void *lse[EACH], *out[EACH];
        CHECK_OK(device->stream_create(device, "each", &stream));
        CHECK_OK(llmpar_device_stream_thread(device, stream));
        for (int c = 0; c < EACH; c++) {
            p[c] = problem_make(1, t[c][0], t[c][1], t[c][1] + c, 4, kv, 32);
            forward(&p[c], device, ways[w].dtype, 1);
        }
        for (int way = 0; way < 4; way++) {
            llmpar_dtype sum = llmpar_dtype_sum(ways[w].dtype);
            for (int c = 0; c < EACH; c++) {
                fill(&p[c], device, ways[w].dtype, &calls[c]);
                calls[c].out = out[c] = ops_put(ways[w].dtype, NULL, p[c].tq, 4 * 32, calls[c].ldo);
                calls[c].lse = lse[c] = ops_out(sum, 4 * p[c].tq);
            }
            largest = calls[4];
            largest.tq = 9;
            largest.batch = EACH;
            size_t bytes = device->attention_workspace(device, &largest);
            void *workspace = ops_out(LLMPAR_U8, (int64_t)bytes);
            for (int c = 0; c < EACH; c++) {
                calls[c].workspace = workspace;
                calls[c].workspace_bytes = bytes;
            }
            int32_t first = way == 3 ? 2 : EACH; /* fewer calls than threads */
            each_call(device, way == 2 ? stream : NULL, calls, way != 1, first);
            each_call(device, NULL, calls + first, 1, EACH - first);
            for (int c = 0; c < EACH; c++) {
                double *got = ops_zeros(p[c].tq * 4 * 32), *got_lse = ops_zeros(4 * p[c].tq);
                ops_get(ways[w].dtype, got, out[c], p[c].tq, 4 * 32, calls[c].ldo);
                ops_take(sum, got_lse, lse[c], 4 * p[c].tq);
                ops_same("of several", ways[w], got, p[c].out, p[c].tq * 4 * 32);
                ops_same("lse of several", ways[w], got_lse, p[c].lse, 4 * p[c].tq);
                free(got); free(got_lse);
            }
            ops_release();
        }
        device->stream_destroy(device, stream);
        for (int c = 0; c < EACH; c++) problem_free(&p[c]);
    }
}

TEST(each_refuses)
{
    llmpar_device *device = ops_device(LLMPAR_CPU_PORTABLE, 3);
    problem p = problem_make(1, 1, 40, 40, 4, 2, 16);
    llmpar_attention_args calls[3];
    llmpar_attention_each_args args = { calls, 3 };
    fill(&p, device, LLMPAR_F32, &calls[0]);
    calls[0].out = ops_put(LLMPAR_F32, NULL, 1, 64, calls[0].ldo);
    calls[0].batch = 3;
    calls[0].workspace_bytes = device->attention_workspace(device, &calls[0]);
    calls[0].workspace = ops_out(LLMPAR_U8, (int64_t)calls[0].workspace_bytes);
    calls[0].batch = 1;
    calls[1] = calls[2] = calls[0];
    CHECK_OK(device->attention_each(device, NULL, &args));
    calls[0].workspace_bytes = device->attention_workspace(device, &calls[0]); /* of one */
    for (int c = 0; c < 3; c++) calls[c].workspace_bytes = calls[0].workspace_bytes;
    llmpar_error_clear(&ops_error);
    CHECK_STATUS(device->attention_each(device, NULL, &args), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(ops_error.text, "attention_each: workspace of");
    calls[1].workspace = (char *)calls[0].workspace + 64;
    llmpar_error_clear(&ops_error);
    CHECK_STATUS(device->attention_each(device, NULL, &args), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(ops_error.text, "call 1 has a workspace of its own");
    calls[2].heads = 3;
    calls[1].workspace = calls[0].workspace;
    llmpar_error_clear(&ops_error);
    CHECK_STATUS(device->attention_each(device, NULL, &args), LLMPAR_ERR_SHAPE);
    CHECK_TEXT(ops_error.text, "3 heads, 2 kv heads");
    llmpar_error_clear(&ops_error);
    ops_release();
    problem_free(&p);
}

TEST(fewer_need_no_more) { attention_fewer(ops_device(LLMPAR_CPU_PORTABLE, 3)); }

TEST(refusals)
{
    llmpar_device *device = ops_device(LLMPAR_CPU_PORTABLE, 1);
    int32_t bad[4] = { 0, 0, 1, 1 };
    char workspace[1 << 18];
    float x[64] = { 0 };
    llmpar_attention_args a;
    memset(&a, 0, sizeof a);
    a.batch = 1; a.tq = a.tk = a.tk_stride = 4; a.heads = 3; a.kv_heads = 2; a.head_dim = 4;
    a.q = a.k = a.v = x; a.out = x; a.ldq = a.ldk = a.ldv = a.ldo = 12; a.dtype = LLMPAR_F32; a.scale = 1;
    a.workspace = workspace; a.workspace_bytes = sizeof workspace;
    llmpar_error_clear(&ops_error);
    CHECK_STATUS(device->attention(device, NULL, &a), LLMPAR_ERR_SHAPE);
    CHECK_TEXT(ops_error.text, "3 heads, 2 kv heads");
    a.heads = 2; a.kv_heads = 1; a.doc_start = bad;
    llmpar_error_clear(&ops_error);
    CHECK_STATUS(device->attention(device, NULL, &a), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(ops_error.text, "position 2 is 1");
    a.doc_start = NULL; a.workspace_bytes = 10;
    llmpar_error_clear(&ops_error);
    CHECK_STATUS(device->attention(device, NULL, &a), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(ops_error.text, "workspace of 10 bytes");
    a.tq = 0;
    CHECK_OK(device->attention(device, NULL, &a));
    llmpar_error_clear(&ops_error);
}

TEST(devices_close) { ops_close(); }

TEST_LIST(T_(forward_is_softmax), T_(backward_is_derivative), T_(backward_levels_and_threads), T_(parts_have_the_same_bits), T_(odd_groups), T_(scores_of_pairs), T_(decoding_has_the_same_bits), T_(each_of_several), T_(each_refuses), T_(fewer_need_no_more), T_(refusals), T_(devices_close))
