/* The CPU operations with sums, other than gemm and attention: derivatives against finite differences in f64, every level against f64, and the same bits however
   a call is cut, wherever its buffers lie, with any number of threads. */
#include "ops.h"

static ops_way f64_way(void) { ops_way w; w.level = LLMPAR_CPU_PORTABLE; w.dtype = LLMPAR_F64; return w; }

/* ---- rmsnorm ---- */

typedef struct norm { llmpar_tokens tokens; int64_t dim; double *x, *residual, *w, *dy, *dresidual, *sum, *y, *rstd, *dx, *dw; } norm;

static llmpar_tokens tokens_of(int64_t batch, int64_t t, int64_t leaves, int32_t canon)
{
    llmpar_tokens k;
    k.batch = batch; k.t = k.t_total = t; k.t_begin = 0; k.leaves = leaves; k.canon = canon;
    return k;
}
static norm norm_make(int64_t batch, int64_t t, int64_t leaves, int32_t canon, int64_t dim)
{
    norm n;
    int64_t size = batch * t * dim;
    n.tokens = tokens_of(batch, t, leaves, canon);
    n.dim = dim;
    n.x = ops_random(size, 2); n.residual = ops_random(size, 1); n.w = ops_random(dim, 1.5); n.dy = ops_random(size, 1); n.dresidual = ops_random(size, 0.1);
    n.sum = ops_zeros(size); n.y = ops_zeros(size); n.rstd = ops_zeros(batch * t); n.dx = ops_zeros(size); n.dw = ops_zeros(leaves * dim);
    return n;
}
static void norm_free(norm *n)
{
    free(n->x); free(n->residual); free(n->w); free(n->dy); free(n->dresidual); free(n->sum); free(n->y); free(n->rstd); free(n->dx); free(n->dw);
}
static void norm_forward(norm *n, ops_way way, int threads, int residual)
{
    llmpar_device *d = ops_device(way.level, threads);
    int64_t rows = n->tokens.batch * n->tokens.t, size = rows * n->dim;
    llmpar_rmsnorm_args a;
    memset(&a, 0, sizeof a);
    a.rows = rows; a.dim = n->dim; a.eps = 1e-5; a.dtype = way.dtype;
    a.x = ops_in(way.dtype, n->x, size);
    a.residual = residual ? ops_in(way.dtype, n->residual, size) : NULL;
    a.w = ops_in(way.dtype, n->w, n->dim);
    a.sum = residual == 2 ? (void *)(uintptr_t)a.residual : residual ? ops_out(way.dtype, size) : NULL;
    a.y = ops_out(way.dtype, size);
    a.rstd = ops_out(way.dtype, rows);
    CHECK_OK(d->rmsnorm(d, NULL, &a));
    ops_take(way.dtype, n->y, a.y, size);
    ops_take(way.dtype, n->rstd, a.rstd, rows);
    ops_take(way.dtype, n->sum, residual ? a.sum : a.x, size);
    ops_release();
}
static void norm_backward(norm *n, ops_way way, int threads, int residual)
{
    llmpar_device *d = ops_device(way.level, threads);
    int64_t rows = n->tokens.batch * n->tokens.t, size = rows * n->dim;
    llmpar_rmsnorm_backward_args a;
    memset(&a, 0, sizeof a);
    a.tokens = n->tokens; a.dim = n->dim; a.dtype = way.dtype;
    a.dy = ops_in(way.dtype, n->dy, size);
    a.x = ops_in(way.dtype, n->sum, size);
    a.w = ops_in(way.dtype, n->w, n->dim);
    a.rstd = ops_in(way.dtype, n->rstd, rows);
    a.dresidual = residual ? ops_in(way.dtype, n->dresidual, size) : NULL;
    a.dx = residual == 2 ? (void *)(uintptr_t)a.dresidual : residual == 3 ? (void *)(uintptr_t)a.dy : ops_out(way.dtype, size);
    a.dw_leaves = ops_out(way.dtype, n->tokens.leaves * n->dim);
    CHECK_OK(d->rmsnorm_backward(d, NULL, &a));
    ops_take(way.dtype, n->dx, a.dx, size);
    ops_take(way.dtype, n->dw, a.dw_leaves, n->tokens.leaves * n->dim);
    ops_release();
}
static double norm_value(void *user)
{
    norm *n = (norm *)user;
    int64_t size = n->tokens.batch * n->tokens.t * n->dim;
    norm_forward(n, f64_way(), 1, 1);
    return ops_dot(n->y, n->dy, size) + ops_dot(n->sum, n->dresidual, size);
}

TEST(norm_derivatives)
{
    norm n = norm_make(2, 5, 1, 8, 19);
    double *dw;
    norm_value(&n);
    norm_backward(&n, f64_way(), 1, 1);
    dw = ops_zeros(n.dim);
    memcpy(dw, n.dw, (size_t)n.dim * sizeof *dw);
    ops_differences("rmsnorm dx", norm_value, &n, n.x, 10 * n.dim, n.dx);
    ops_differences("rmsnorm dw", norm_value, &n, n.w, n.dim, dw);
    free(dw);
    norm_free(&n);
}

/* Rows of a norm problem: sequences [b0, b1), positions [t0, t1). */
static norm norm_part(const norm *n, int64_t b0, int64_t b1, int64_t t0, int64_t t1, int64_t leaves)
{
    norm s = norm_make(b1 - b0, t1 - t0, leaves, n->tokens.canon, n->dim);
    s.tokens.t_begin = t0;
    s.tokens.t_total = n->tokens.t;
    for (int64_t b = b0; b < b1; b++) {
        int64_t from = (b * n->tokens.t + t0) * n->dim, to = (b - b0) * (t1 - t0) * n->dim;
        size_t bytes = (size_t)((t1 - t0) * n->dim) * sizeof(double);
        memcpy(s.x + to, n->x + from, bytes); memcpy(s.residual + to, n->residual + from, bytes); memcpy(s.dy + to, n->dy + from, bytes); memcpy(s.dresidual + to, n->dresidual + from, bytes);
    }
    memcpy(s.w, n->w, (size_t)n->dim * sizeof(double));
    return s;
}

TEST(norm_levels_threads_and_aliases)
{
    static const int64_t dims[6] = { 1, 16, 33, 130, 517, 4133 }; /* the last: more columns than chains find room for at a time */
    ops_way ways[4];
    int count = ops_ways(ways);
    for (int i = 0; i < 6; i++) {
        norm n = norm_make(4, 9, 2, 8, dims[i]), r = norm_make(4, 9, 2, 8, dims[i]);
        int64_t size = 36 * dims[i];
        for (int w = 0; w < count; w++) for (int threads = 1; threads <= 3; threads++) for (int residual = 0; residual < 4; residual++) {
            if (dims[i] > 1000 && (threads == 2 || residual % 2 == 0)) continue;
            norm_forward(&n, ways[w], threads, residual == 3 ? 2 : residual);
            norm_backward(&n, ways[w], threads, residual);
            if (residual == 0) continue;
            if (w == 0 && threads == 1 && residual == 1) { memcpy(r.y, n.y, (size_t)size * 8); memcpy(r.rstd, n.rstd, 36 * 8); memcpy(r.dx, n.dx, (size_t)size * 8); memcpy(r.dw, n.dw, (size_t)dims[i] * 16); }
            ops_near("rmsnorm y", ways[w], n.y, r.y, size, ops_bound(ways[w], 5e-7));
            ops_near("rmsnorm rstd", ways[w], n.rstd, r.rstd, 36, ops_bound(ways[w], 3e-7));
            ops_near("rmsnorm dx", ways[w], n.dx, r.dx, size, ops_bound(ways[w], dims[i] == 1 ? 2e-5 : 1e-6)); /* one dim: all cancels but the residual */
            ops_near("rmsnorm dw", ways[w], n.dw, r.dw, 2 * dims[i], ops_bound(ways[w], 2e-6));
            if (threads > 1 || residual > 1) { /* the same bits as one thread with separate buffers */
                norm s = norm_part(&n, 0, 4, 0, 9, 2);
                norm_forward(&s, ways[w], 1, 1);
                norm_backward(&s, ways[w], 1, 1);
                ops_same("rmsnorm y threads", ways[w], n.y, s.y, size);
                ops_same("rmsnorm dx threads", ways[w], n.dx, s.dx, size);
                ops_same("rmsnorm dw threads", ways[w], n.dw, s.dw, 2 * dims[i]);
                norm_free(&s);
            }
        }
        norm_free(&n);
        norm_free(&r);
    }
}

TEST(norm_cut)
{
    static const int64_t lengths[4] = { 24, 13, 3, 8 };
    ops_way ways[4];
    int count = ops_ways(ways);
    for (int w = 0; w < count; w++) for (int i = 0; i < 4; i++) {
        int64_t t = lengths[i], dim = 37;
        norm n = norm_make(4, t, 4, 8, dim);
        norm_forward(&n, ways[w], 1, 1);
        norm_backward(&n, ways[w], 1, 1);
        /* at every position: rows do not know each other */
        for (int64_t at = 1; at < t; at++) {
            norm s = norm_part(&n, 1, 2, at, t, 1);
            norm_forward(&s, ways[w], 1, 1);
            norm_backward(&s, ways[w], 1, 1);
            ops_same("rmsnorm y cut", ways[w], s.y, n.y + (t + at) * dim, (t - at) * dim);
            ops_same("rmsnorm dx cut", ways[w], s.dx, n.dx + (t + at) * dim, (t - at) * dim);
            norm_free(&s);
        }
        /* leaves alone, and T over 2, 4, 8 ranks combined by the tree */
        for (int64_t b = 0; b < 4; b++) for (int64_t ranks = 1; ranks <= 8; ranks *= 2) {
            double *parts[8], *sum;
            for (int64_t r = 0; r < ranks; r++) {
                norm s = norm_part(&n, b, b + 1, llmpar_piece_begin(r, t, ranks), llmpar_piece_begin(r + 1, t, ranks), 1);
                norm_forward(&s, ways[w], 1, 1);
                norm_backward(&s, ways[w], 1, 1);
                parts[r] = s.dw;
                s.dw = NULL;
                norm_free(&s);
            }
            sum = ops_tree(ways[w].dtype, parts, ranks, dim);
            ops_same("rmsnorm dw over T", ways[w], sum, n.dw + b * dim, dim);
            free(sum);
            for (int64_t r = 0; r < ranks; r++) free(parts[r]);
        }
        norm_free(&n);
    }
}

/* ---- rope ---- */

typedef struct rope { int64_t batch, t, heads, e, position; double *x, *cosine, *sine, *y, *c; int inverse; } rope;

static void rope_run(rope *p, ops_way way, int threads, int64_t b0, int64_t b1, int64_t t0, int64_t t1, int64_t h0, int64_t h1, double *out)
{
    llmpar_device *d = ops_device(way.level, threads);
    int64_t rows = (b1 - b0) * (t1 - t0), width = (h1 - h0) * p->e, at = 0;
    double *x = ops_zeros(rows * width);
    llmpar_rope_args a;
    memset(&a, 0, sizeof a);
    for (int64_t b = b0; b < b1; b++) for (int64_t i = t0; i < t1; i++, at += width) memcpy(x + at, p->x + (b * p->t + i) * p->heads * p->e + h0 * p->e, (size_t)width * sizeof *x);
    a.batch = b1 - b0; a.t = t1 - t0; a.heads = h1 - h0; a.head_dim = p->e; a.ld = width + 3; a.position = p->position + t0; a.inverse = p->inverse; a.dtype = way.dtype;
    a.x = ops_put(way.dtype, x, rows, width, a.ld);
    a.cosine = ops_in(way.dtype, p->cosine, (p->position + p->t) * (p->e / 2));
    a.sine = ops_in(way.dtype, p->sine, (p->position + p->t) * (p->e / 2));
    CHECK_OK(d->rope(d, NULL, &a));
    ops_get(way.dtype, out, a.x, rows, width, a.ld);
    ops_release();
    free(x);
}
static double rope_value(void *user)
{
    rope *p = (rope *)user;
    rope_run(p, f64_way(), 1, 0, p->batch, 0, p->t, 0, p->heads, p->y);
    return ops_dot(p->y, p->c, p->batch * p->t * p->heads * p->e);
}

TEST(rope_all)
{
    static const int64_t dims[4] = { 2, 8, 38, 64 };
    ops_way ways[4];
    int count = ops_ways(ways);
    for (int i = 0; i < 4; i++) {
        rope p;
        int64_t e = dims[i], size = 2 * 7 * 3 * e, half = e / 2;
        double *back = ops_zeros(size), *want, *cut = ops_zeros(size);
        p.batch = 2; p.t = 7; p.heads = 3; p.e = e; p.position = 5; p.inverse = 0;
        p.x = ops_random(size, 1); p.c = ops_random(size, 1); p.y = ops_zeros(size); p.cosine = ops_zeros(12 * half); p.sine = ops_zeros(12 * half);
        for (int64_t t = 0; t < 12; t++) for (int64_t j = 0; j < half; j++) {
            double angle = (double)t / pow(10000.0, 2.0 * (double)j / (double)e);
            p.cosine[t * half + j] = (double)(float)cos(angle);
            p.sine[t * half + j] = (double)(float)sin(angle);
        }
        want = ops_zeros(size);
        for (int64_t r = 0; r < 14; r++) for (int64_t h = 0; h < 3; h++) for (int64_t j = 0; j < half; j++) {
            const double *x = p.x + (r * 3 + h) * e;
            double c = p.cosine[(5 + r % 7) * half + j], s = p.sine[(5 + r % 7) * half + j];
            want[(r * 3 + h) * e + j] = x[j] * c - x[j + half] * s;
            want[(r * 3 + h) * e + j + half] = x[j + half] * c + x[j] * s;
        }
        /* The derivative is the inverse applied to c. */
        {
            double *x = p.x, *gradient = ops_zeros(size);
            p.x = p.c;
            p.inverse = 1;
            rope_run(&p, f64_way(), 1, 0, 2, 0, 7, 0, 3, gradient);
            p.x = x;
            p.inverse = 0;
            ops_differences("rope", rope_value, &p, p.x, size, gradient);
            free(gradient);
        }
        for (int w = 0; w < count; w++) {
            for (int threads = 1; threads <= 3; threads++) {
                double *x = p.x;
                rope_run(&p, ways[w], threads, 0, 2, 0, 7, 0, 3, p.y);
                ops_near("rope", ways[w], p.y, want, size, ops_bound(ways[w], 2e-7));
                p.x = p.y;
                p.inverse = 1;
                rope_run(&p, ways[w], threads, 0, 2, 0, 7, 0, 3, back);
                p.x = x;
                p.inverse = 0;
                ops_near("rope and back", ways[w], back, p.x, size, 3e-7);
            }
            for (int64_t b = 0; b < 2; b++) for (int64_t t = 0; t < 7; t++) for (int64_t h = 0; h < 3; h++) {
                rope_run(&p, ways[w], 1, b, b + 1, t, t + 1, h, h + 1, cut);
                ops_same("rope cut", ways[w], cut, p.y + ((b * 7 + t) * 3 + h) * e, e);
            }
        }
        free(back); free(want); free(cut); free(p.x); free(p.c); free(p.y); free(p.cosine); free(p.sine);
    }
}

/* ---- swiglu ---- */

typedef struct swiglu { int64_t rows, dim; double *gate, *up, *h, *dh, *dgate, *dup, *again; } swiglu;

static void swiglu_forward(swiglu *p, ops_way way, int threads, int alias)
{
    llmpar_device *d = ops_device(way.level, threads);
    llmpar_swiglu_args a;
    memset(&a, 0, sizeof a);
    a.rows = p->rows; a.dim = p->dim; a.ld_in = p->dim + 2; a.ld_out = alias ? a.ld_in : p->dim + 5; a.dtype = way.dtype;
    a.gate = ops_put(way.dtype, p->gate, a.rows, a.dim, a.ld_in);
    a.up = ops_put(way.dtype, p->up, a.rows, a.dim, a.ld_in);
    a.h = alias == 1 ? (void *)(uintptr_t)a.gate : alias == 2 ? (void *)(uintptr_t)a.up : ops_put(way.dtype, NULL, a.rows, a.dim, a.ld_out);
    CHECK_OK(d->swiglu(d, NULL, &a));
    ops_get(way.dtype, p->h, a.h, a.rows, a.dim, a.ld_out);
    ops_release();
}
static void swiglu_backward(swiglu *p, ops_way way, int threads, int alias)
{
    llmpar_device *d = ops_device(way.level, threads);
    llmpar_swiglu_backward_args a;
    memset(&a, 0, sizeof a);
    a.rows = p->rows; a.dim = p->dim; a.ld_in = p->dim + 2; a.ld_out = p->dim; a.dtype = way.dtype;
    a.gate = ops_put(way.dtype, p->gate, a.rows, a.dim, a.ld_in);
    a.up = ops_put(way.dtype, p->up, a.rows, a.dim, a.ld_in);
    a.dh = ops_put(way.dtype, p->dh, a.rows, a.dim, a.ld_out);
    a.dgate = alias ? (void *)(uintptr_t)a.gate : ops_put(way.dtype, NULL, a.rows, a.dim, a.ld_in);
    a.dup = alias ? (void *)(uintptr_t)a.up : ops_put(way.dtype, NULL, a.rows, a.dim, a.ld_in);
    a.h = alias == 1 ? (void *)(uintptr_t)a.dh : alias == 2 ? NULL : ops_put(way.dtype, NULL, a.rows, a.dim, a.ld_out);
    CHECK_OK(d->swiglu_backward(d, NULL, &a));
    ops_get(way.dtype, p->dgate, a.dgate, a.rows, a.dim, a.ld_in);
    ops_get(way.dtype, p->dup, a.dup, a.rows, a.dim, a.ld_in);
    if (a.h) ops_get(way.dtype, p->again, a.h, a.rows, a.dim, a.ld_out);
    ops_release();
}
static double swiglu_value(void *user)
{
    swiglu *p = (swiglu *)user;
    swiglu_forward(p, f64_way(), 1, 0);
    return ops_dot(p->h, p->dh, p->rows * p->dim);
}

TEST(swiglu_all)
{
    static const int64_t dims[3] = { 1, 16, 53 };
    ops_way ways[4];
    int count = ops_ways(ways);
    for (int i = 0; i < 3; i++) {
        swiglu p;
        int64_t n = 5 * dims[i];
        double *want = ops_zeros(n), *dgate = ops_zeros(n), *dup = ops_zeros(n), *first = ops_zeros(3 * n);
        p.rows = 5; p.dim = dims[i];
        p.gate = ops_random(n, 4); p.up = ops_random(n, 1); p.dh = ops_random(n, 1); p.h = ops_zeros(n); p.dgate = ops_zeros(n); p.dup = ops_zeros(n); p.again = ops_zeros(n);
        for (int64_t j = 0; j < n; j++) want[j] = p.gate[j] / (1 + exp(-p.gate[j])) * p.up[j];
        swiglu_backward(&p, f64_way(), 1, 0);
        memcpy(dgate, p.dgate, (size_t)n * 8);
        memcpy(dup, p.dup, (size_t)n * 8);
        ops_differences("swiglu dgate", swiglu_value, &p, p.gate, n, dgate);
        ops_differences("swiglu dup", swiglu_value, &p, p.up, n, dup);
        for (int w = 0; w < count; w++) for (int threads = 1; threads <= 3; threads++) for (int alias = 0; alias < 3; alias++) {
            swiglu_forward(&p, ways[w], threads, alias);
            swiglu_backward(&p, ways[w], threads, alias);
            ops_near("swiglu", ways[w], p.h, want, n, ops_bound(ways[w], 4e-7));
            ops_near("swiglu dgate", ways[w], p.dgate, dgate, n, ops_bound(ways[w], 6e-7));
            ops_near("swiglu dup", ways[w], p.dup, dup, n, ops_bound(ways[w], 6e-7));
            if (alias < 2) ops_same("swiglu h again", ways[w], p.again, p.h, n);
            if (threads == 1 && alias == 0) { memcpy(first, p.h, (size_t)n * 8); memcpy(first + n, p.dgate, (size_t)n * 8); memcpy(first + 2 * n, p.dup, (size_t)n * 8); }
            ops_same("swiglu threads", ways[w], p.h, first, n);
            ops_same("swiglu dgate threads", ways[w], p.dgate, first + n, n);
            ops_same("swiglu dup threads", ways[w], p.dup, first + 2 * n, n);
            /* one column alone */
            for (int64_t j = 0; alias == 0 && threads == 1 && j < p.dim; j++) {
                swiglu s = p;
                double h, dg, du;
                s.rows = s.dim = 1; s.gate = p.gate + 3 * p.dim + j; s.up = p.up + 3 * p.dim + j; s.dh = p.dh + 3 * p.dim + j; s.h = &h; s.dgate = &dg; s.dup = &du;
                swiglu_forward(&s, ways[w], 1, 0);
                swiglu_backward(&s, ways[w], 1, 2);
                ops_same("swiglu column", ways[w], &h, p.h + 3 * p.dim + j, 1);
                ops_same("swiglu dgate column", ways[w], &dg, p.dgate + 3 * p.dim + j, 1);
                ops_same("swiglu dup column", ways[w], &du, p.dup + 3 * p.dim + j, 1);
            }
        }
        free(want); free(dgate); free(dup); free(first); free(p.gate); free(p.up); free(p.dh); free(p.h); free(p.dgate); free(p.dup); free(p.again);
    }
}

/* Far out: no overflow, no NaN. */
TEST(swiglu_extremes)
{
    static double gate[8] = { 1e30, -1e30, 90, -90, 200, -200, 0, -0.0 }, up[8] = { 1, 1, 1, 1, 1, 1, 1, 1 };
    ops_way ways[4];
    int count = ops_ways(ways);
    for (int w = 0; w < count; w++) {
        double h[8], dg[8], du[8], again[8];
        swiglu p;
        p.rows = 1; p.dim = 8; p.gate = gate; p.up = up; p.dh = up; p.h = h; p.dgate = dg; p.dup = du; p.again = again;
        swiglu_forward(&p, ways[w], 1, 0);
        swiglu_backward(&p, ways[w], 1, 0);
        for (int i = 0; i < 8; i += 2) {
            CHECK(i == 6 || h[i] == gate[i] || fabs(h[i] / gate[i] - 1) < 1e-6);
            CHECK(fabs(h[i + 1]) < 1e-30);
            CHECK(isfinite(dg[i]) && isfinite(dg[i + 1]) && isfinite(du[i]) && isfinite(du[i + 1]));
        }
    }
}

/* ---- embedding ---- */

static void embedding_forward(ops_way way, int threads, int64_t rows, int64_t dim, int64_t v0, int64_t v1, const int32_t *ids, const double *table, double *out)
{
    llmpar_device *d = ops_device(way.level, threads);
    llmpar_embedding_args a;
    memset(&a, 0, sizeof a);
    a.rows = rows; a.dim = dim; a.v_begin = v0; a.v_local = v1 - v0; a.dtype = way.dtype;
    a.ids = (const int32_t *)ops_in(LLMPAR_I32, ids, rows);
    a.table = ops_in(way.dtype, table + v0 * dim, (v1 - v0) * dim);
    a.out = ops_out(way.dtype, rows * dim);
    CHECK_OK(d->embedding(d, NULL, &a));
    ops_take(way.dtype, out, a.out, rows * dim);
    ops_release();
}
static void embedding_backward(ops_way way, int threads, llmpar_tokens tokens, int64_t dim, int64_t v0, int64_t v1, const int32_t *ids, const double *dout, double *dtable)
{
    llmpar_device *d = ops_device(way.level, threads);
    int64_t rows = tokens.batch * tokens.t;
    llmpar_embedding_backward_args a;
    memset(&a, 0, sizeof a);
    a.tokens = tokens; a.dim = dim; a.v_begin = v0; a.v_local = v1 - v0; a.dtype = way.dtype;
    a.workspace_bytes = d->embedding_backward_workspace(d, &a);
    a.workspace = ops_out(LLMPAR_U8, (int64_t)a.workspace_bytes);
    a.ids = (const int32_t *)ops_in(LLMPAR_I32, ids, rows);
    a.dout = ops_in(way.dtype, dout, rows * dim);
    a.dtable = ops_out(way.dtype, (v1 - v0) * dim);
    CHECK_OK(d->embedding_backward(d, NULL, &a));
    ops_take(way.dtype, dtable, a.dtable, (v1 - v0) * dim);
    ops_release();
}

TEST(embedding_all)
{
    static const int64_t dims[3] = { 3, 32, 70 };
    ops_way ways[4];
    int count = ops_ways(ways);
    for (int i = 0; i < 3; i++) {
        enum { V = 37, B = 12, T = 11 };
        int64_t dim = dims[i], n = B * T * dim;
        int32_t ids[B * T];
        double *table = ops_random(V * dim, 1), *out = ops_zeros(n), *dout = ops_random(n, 1), *want = ops_zeros(n), *dtable = ops_zeros(V * dim), *part = ops_zeros(V * dim), *plain = ops_zeros(V * dim);
        table[5] = -0.0;
        for (int r = 0; r < B * T; r++) {
            ids[r] = (int32_t)(ops_below(3) ? ops_below(V - 1) : 4);
            memcpy(want + r * dim, table + ids[r] * dim, (size_t)dim * 8);
            for (int64_t j = 0; j < dim; j++) plain[ids[r] * dim + j] += dout[r * dim + j];
        }
        for (int w = 0; w < count; w++) {
            for (int64_t ranks = 1; ranks <= 4; ranks *= 2) {
                for (int64_t r = 0; r < ranks; r++) {
                    int64_t v0 = llmpar_piece_begin(r, V, ranks), v1 = llmpar_piece_begin(r + 1, V, ranks);
                    embedding_forward(ways[w], (int)(1 + r % 3), B * T, dim, v0, v1, ids, table, out);
                    for (int t = 0; t < B * T; t++) for (int64_t j = 0; j < dim; j++) {
                        double zero = 0;
                        ops_same("embedding", ways[w], &out[t * dim + j], ids[t] >= v0 && ids[t] < v1 ? &want[t * dim + j] : &zero, 1);
                    }
                }
            }
            for (int64_t leaves = 1; leaves <= 12; leaves += leaves == 1 ? 1 : leaves == 2 ? 1 : leaves == 3 ? 1 : 8) {
                /* the definition: per leaf a dense chain, then the tree */
                double *dense[12], *sum;
                for (int64_t l = 0; l < leaves; l++) {
                    dense[l] = ops_zeros(V * dim);
                    for (int64_t r = l * B * T / leaves; r < (l + 1) * B * T / leaves; r++) for (int64_t j = 0; j < dim; j++) {
                        double *at = &dense[l][ids[r] * dim + j];
                        *at = ways[w].dtype == LLMPAR_F64 ? *at + dout[r * dim + j] : (double)((float)*at + (float)dout[r * dim + j]);
                    }
                }
                sum = ops_tree(ways[w].dtype, dense, leaves, V * dim);
                for (int threads = 1; threads <= 3; threads++) {
                    embedding_backward(ways[w], threads, tokens_of(B, T, leaves, 8), dim, 0, V, ids, dout, dtable);
                    ops_same("embedding gradient", ways[w], dtable, sum, V * dim);
                    ops_near("embedding gradient", ways[w], dtable, plain, V * dim, ops_bound(ways[w], 1e-6));
                }
                for (int64_t ranks = 2; ranks <= 4; ranks *= 2) for (int64_t r = 0; r < ranks; r++) { /* vocab shards */
                    int64_t v0 = llmpar_piece_begin(r, V, ranks), v1 = llmpar_piece_begin(r + 1, V, ranks);
                    embedding_backward(ways[w], 1, tokens_of(B, T, leaves, 8), dim, v0, v1, ids, dout, part);
                    ops_same("embedding gradient shard", ways[w], part, dtable + v0 * dim, (v1 - v0) * dim);
                }
                if (leaves == 4) { /* the batch over 2 ranks */
                    double *half[2], *whole;
                    for (int r = 0; r < 2; r++) {
                        half[r] = ops_zeros(V * dim);
                        embedding_backward(ways[w], 1, tokens_of(B / 2, T, 2, 8), dim, 0, V, ids + r * B / 2 * T, dout + r * B / 2 * T * dim, half[r]);
                    }
                    whole = ops_tree(ways[w].dtype, half, 2, V * dim);
                    ops_same("embedding gradient over the batch", ways[w], whole, dtable, V * dim);
                    free(half[0]); free(half[1]); free(whole);
                }
                for (int64_t l = 0; l < leaves; l++) free(dense[l]);
                free(sum);
            }
        }
        free(table); free(out); free(dout); free(want); free(dtable); free(part); free(plain);
    }
}

/* ---- cross-entropy ---- */

enum { XENT_ROWS = 9 };
typedef struct xent { int64_t v; int32_t canon; int32_t targets[XENT_ROWS]; double *logits, max[XENT_ROWS], target[XENT_ROWS], sum[XENT_ROWS], loss[XENT_ROWS], *dlogits, total; } xent;

/* All steps with the vocabulary over `ranks`, combined as a mesh does. scale is the gradient's. */
static void xent_run(xent *p, ops_way way, int threads, int64_t ranks, float scale)
{
    llmpar_device *d = ops_device(way.level, threads);
    llmpar_xent_args a[8];
    void *max[8], *sum[8], *target[8];
    int64_t accumulator[LLMPAR_EXACT_SUM_LIMBS] = { 0 };
    llmpar_tree_sum_args t;
    llmpar_xent_loss_args l;
    void *all_max = ops_out(way.dtype, XENT_ROWS), *all_sum = ops_out(way.dtype, XENT_ROWS), *all_target = ops_out(way.dtype, XENT_ROWS);
    int32_t *targets = (int32_t *)ops_in(LLMPAR_I32, p->targets, XENT_ROWS);
    for (int64_t r = 0; r < ranks; r++) {
        int64_t v0 = llmpar_piece_begin(r, p->v, ranks), v1 = llmpar_piece_begin(r + 1, p->v, ranks);
        double *part = ops_zeros(XENT_ROWS * (v1 - v0));
        for (int64_t i = 0; i < XENT_ROWS; i++) memcpy(part + i * (v1 - v0), p->logits + i * p->v + v0, (size_t)(v1 - v0) * sizeof *part);
        memset(&a[r], 0, sizeof a[r]);
        a[r].rows = XENT_ROWS; a[r].v_begin = v0; a[r].v_local = v1 - v0; a[r].v_total = p->v; a[r].ld = v1 - v0 + 1; a[r].canon = p->canon; a[r].targets = targets; a[r].dtype = way.dtype;
        a[r].logits = ops_put(way.dtype, part, XENT_ROWS, v1 - v0, a[r].ld);
        max[r] = a[r].max = ops_out(way.dtype, XENT_ROWS);
        sum[r] = a[r].sum = ops_out(way.dtype, XENT_ROWS);
        target[r] = a[r].target_logit = ops_out(way.dtype, XENT_ROWS);
        CHECK_OK(d->xent_max(d, NULL, &a[r]));
        free(part);
    }
    memset(&t, 0, sizeof t);
    t.n = (int32_t)ranks; t.count = XENT_ROWS; t.dtype = way.dtype;
    t.in = (const void *const *)max; t.out = all_max;
    CHECK_OK(d->max(d, NULL, &t));
    t.in = (const void *const *)target; t.out = all_target;
    CHECK_OK(d->max(d, NULL, &t));
    for (int64_t r = 0; r < ranks; r++) {
        a[r].max = all_max;
        CHECK_OK(d->xent_sum(d, NULL, &a[r]));
    }
    t.in = (const void *const *)sum; t.out = all_sum;
    CHECK_OK(d->tree_sum(d, NULL, &t));
    memset(&l, 0, sizeof l);
    l.rows = XENT_ROWS; l.max = all_max; l.target_logit = all_target; l.sum = all_sum; l.targets = targets; l.accumulator = accumulator; l.dtype = way.dtype;
    l.token_loss = (double *)ops_out(LLMPAR_F64, XENT_ROWS);
    CHECK_OK(d->xent_loss(d, NULL, &l));
    ops_take(way.dtype, p->max, all_max, XENT_ROWS);
    ops_take(way.dtype, p->sum, all_sum, XENT_ROWS);
    ops_take(way.dtype, p->target, all_target, XENT_ROWS);
    ops_take(LLMPAR_F64, p->loss, l.token_loss, XENT_ROWS);
    p->total = llmpar_exact_sum_value((const llmpar_exact_sum *)(const void *)accumulator);
    for (int64_t r = 0; r < ranks; r++) {
        llmpar_xent_backward_args g;
        double *part = ops_zeros(XENT_ROWS * a[r].v_local);
        g.forward = a[r];
        g.forward.sum = all_sum;
        g.scale = scale;
        CHECK_OK(d->xent_backward(d, NULL, &g));
        ops_get(way.dtype, part, a[r].logits, XENT_ROWS, a[r].v_local, a[r].ld);
        for (int64_t i = 0; i < XENT_ROWS; i++) memcpy(p->dlogits + i * p->v + a[r].v_begin, part + i * a[r].v_local, (size_t)a[r].v_local * sizeof *part);
        free(part);
    }
    ops_release();
}
static double xent_value(void *user)
{
    xent_run((xent *)user, f64_way(), 1, 1, 1);
    return ((xent *)user)->total;
}

TEST(xent_all)
{
    static const int64_t sizes[4] = { 509, 5, 64, 1 };
    ops_way ways[4];
    int count = ops_ways(ways);
    for (int i = 0; i < 4; i++) {
        xent p, r;
        int64_t n = XENT_ROWS * sizes[i];
        double *gradient = ops_zeros(n), total = 0;
        p.v = sizes[i]; p.canon = 8; p.logits = ops_random(n, 10); p.dlogits = ops_zeros(n);
        for (int t = 0; t < XENT_ROWS; t++) p.targets[t] = t == 3 ? -1 : (int32_t)ops_below(p.v);
        xent_run(&p, f64_way(), 1, 1, 1);
        memcpy(gradient, p.dlogits, (size_t)n * 8);
        if (p.v > 1) ops_differences("xent", xent_value, &p, p.logits, n, gradient);
        xent_run(&p, f64_way(), 1, 1, 1);
        for (int t = 0; t < XENT_ROWS; t++) {
            double sum = 0;
            for (int64_t j = 0; j < p.v; j++) sum += exp(p.logits[t * p.v + j] - p.max[t]);
            CHECK_NEAR(p.loss[t], t == 3 ? 0 : log(sum) + p.max[t] - p.logits[t * p.v + p.targets[t]], 1e-13 * 30);
            total += p.loss[t];
        }
        CHECK_NEAR(p.total, total, 1e-12);
        r = p;
        r.dlogits = gradient;
        for (int w = 0; w < count; w++) {
            xent first;
            double *dfirst = ops_zeros(n);
            memset(&first, 0, sizeof first);
            for (int64_t ranks = 1; ranks <= 8; ranks *= 2) for (int threads = 1; threads <= 3; threads++) {
                xent_run(&p, ways[w], threads, ranks, 1);
                ops_near("xent loss", ways[w], p.loss, r.loss, XENT_ROWS, ops_bound(ways[w], 1e-6));
                ops_near("xent gradient", ways[w], p.dlogits, gradient, n, ops_bound(ways[w], 1e-6));
                if (ranks == 1 && threads == 1) { first = p; memcpy(dfirst, p.dlogits, (size_t)n * 8); }
                ops_same("xent max over ranks", ways[w], p.max, first.max, XENT_ROWS);
                ops_same("xent sum over ranks", ways[w], p.sum, first.sum, XENT_ROWS);
                ops_same("xent loss over ranks", ways[w], p.loss, first.loss, XENT_ROWS);
                ops_same("xent total over ranks", ways[w], &p.total, &first.total, 1);
                ops_same("xent gradient over ranks", ways[w], p.dlogits, dfirst, n);
            }
            for (int64_t j = 0; j < p.v; j++) CHECK(p.dlogits[3 * p.v + j] == 0);
            xent_run(&p, ways[w], 1, 2, 0.25f);
            for (int64_t j = 0; j < n; j++) if (p.dlogits[j] != dfirst[j] * 0.25) { TEST_FAIL("xent scale"); break; }
            free(dfirst);
        }
        free(p.logits); free(p.dlogits); free(gradient);
    }
}

/* A NaN or +inf among the logits makes the loss NaN or inf, at every place; -inf is a probability of 0. */
TEST(xent_non_finite)
{
    ops_way ways[4];
    int count = ops_ways(ways);
    for (int w = 0; w < count; w++) for (int place = 0; place < 40; place++) {
        xent p;
        p.v = 40; p.canon = 8; p.logits = ops_random(XENT_ROWS * 40, 3); p.dlogits = ops_zeros(XENT_ROWS * 40);
        for (int t = 0; t < XENT_ROWS; t++) p.targets[t] = 7;
        p.logits[place] = NAN;
        p.logits[40 + place] = INFINITY;
        p.logits[80 + place] = place == 7 ? 0 : -INFINITY;
        xent_run(&p, ways[w], 1, 4, 1);
        CHECK(isnan(p.loss[0]) && isnan(p.max[0]));
        CHECK(!isfinite(p.loss[1]));
        CHECK(isfinite(p.loss[2]) && (place == 7 || p.dlogits[80 + place] == 0));
        CHECK(isfinite(p.loss[3]));
        free(p.logits); free(p.dlogits);
    }
}

/* exp inside the kernels, seen through xent_sum with one column and maximum 0: at most 2 ulp, +0 below the normal numbers. */
TEST(exp_error)
{
    enum { ROWS = 4000 };
    ops_way ways[4];
    int count = ops_ways(ways);
    for (int w = 0; w < count; w++) {
        llmpar_device *d = ops_device(ways[w].level, 1);
        int f64 = ways[w].dtype == LLMPAR_F64;
        double *x = ops_zeros(ROWS), *got = ops_zeros(ROWS), *zero = ops_zeros(ROWS), worst = 0;
        int32_t *targets = (int32_t *)calloc(ROWS, sizeof *targets);
        llmpar_xent_args a;
        for (int i = 0; i < ROWS; i++) x[i] = (double)(float)(-(f64 ? 750.0 : 95.0) * (double)i / ROWS * (i % 3 == 0 ? 0.01 : 1)) ;
        memset(&a, 0, sizeof a);
        a.rows = ROWS; a.ld = a.v_local = a.v_total = 1; a.canon = 1; a.dtype = ways[w].dtype;
        a.logits = ops_in(a.dtype, x, ROWS);
        a.max = ops_in(a.dtype, zero, ROWS);
        a.sum = ops_out(a.dtype, ROWS);
        a.targets = (const int32_t *)ops_in(LLMPAR_I32, targets, ROWS);
        CHECK_OK(d->xent_sum(d, NULL, &a));
        ops_take(a.dtype, got, a.sum, ROWS);
        ops_release();
        CHECK(got[0] == 1);
        for (int i = 0; i < ROWS; i++) {
            long double want = expl((long double)x[i]);
            double off;
            if (want < (f64 ? 2.3e-308L : 1.18e-38L)) { CHECK(got[i] == 0 || fabs(got[i] - (double)want) < (f64 ? 1e-322 : 1e-44)); continue; }
            off = (double)fabsl((long double)got[i] - want) / ldexp(1, ilogb((double)want) - (f64 ? 52 : 23));
            worst = off > worst ? off : worst;
        }
        if (!(worst <= 2)) TEST_FAIL("exp at %s %s: %.3f ulp", llmpar_cpu_level_name(ways[w].level), llmpar_dtype_name(ways[w].dtype), worst);
        free(x); free(got); free(zero); free(targets);
    }
}

TEST(nothing_to_do)
{
    llmpar_device *d = ops_device(LLMPAR_CPU_PORTABLE, 1);
    llmpar_rmsnorm_args n;
    llmpar_xent_args x;
    llmpar_add_args a;
    llmpar_embedding_backward_args e;
    memset(&n, 0, sizeof n); memset(&x, 0, sizeof x); memset(&a, 0, sizeof a); memset(&e, 0, sizeof e);
    n.dtype = x.dtype = a.dtype = e.dtype = LLMPAR_F32;
    CHECK_OK(d->rmsnorm(d, NULL, &n));
    CHECK_OK(d->xent_max(d, NULL, &x));
    CHECK_OK(d->add(d, NULL, &a));
    CHECK_OK(d->embedding_backward(d, NULL, &e));
}

TEST(devices_close) { ops_close(); }

TEST_LIST(T_(norm_derivatives), T_(norm_levels_threads_and_aliases), T_(norm_cut), T_(rope_all), T_(swiglu_all), T_(swiglu_extremes), T_(embedding_all), T_(xent_all), T_(xent_non_finite), T_(exp_error), T_(nothing_to_do), T_(devices_close))
