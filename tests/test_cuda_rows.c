/* The CUDA device's operations on rows, against the CPU device in f64 on the same rounded values: rmsnorm, rope, swiglu, add, scale, copy_rows. Bounds: u = 2^-24, half a unit of f32; e = that of the dtype, for what is stored. Sums over tokens have their exact order here too. */
#include "cuda.h"

static const double U = 5.9604644775390625e-8;
static const double EXP = 6.2e-7; /* relative error of e^x: 2^-21.5 and a half */

/* Where operands lie: on 256 bytes, or one element behind. */
typedef struct way { llmpar_dtype dtype; int odd; } way;
static way way_of(int i)
{
    const llmpar_dtype dtypes[3] = { LLMPAR_F32, LLMPAR_BF16, LLMPAR_F16 };
    way w = { dtypes[i % 3], i / 3 };
    return w;
}
enum { WAYS = 6 };

static double *values(way w, int64_t n, double scale)
{
    double *x = ops_random(n, scale);
    cuda_round(w.dtype, x, n);
    return x;
}
static void *put(way w, const double *x, int64_t n) { return x ? cuda_put(cuda_gpu, w.dtype, x, 1, n, n, w.odd) : NULL; }
static void *out(way w, int64_t n) { return cuda_put(cuda_gpu, w.dtype, NULL, 1, n, n, w.odd); }
static void *put_f32(const double *x, int64_t n, int odd) { return cuda_put(cuda_gpu, LLMPAR_F32, x, 1, n, n, odd); }
static double largest(const double *x, int64_t n)
{
    double most = 0;
    for (int64_t i = 0; i < n; i++) most = fabs(x[i]) > most ? fabs(x[i]) : most;
    return most;
}
/* Threads that share a row, and so the length of a thread's part of its sum. */
static double chain(llmpar_dtype dtype, int64_t dim)
{
    int64_t width = 16 / (int64_t)llmpar_dtype_size(dtype), lanes = 1;
    while (lanes < 256 && lanes * width < dim) lanes *= 2;
    return (double)((dim + lanes * width - 1) / (lanes * width) * width + 16);
}

/* ---- rmsnorm ---- */

/* place: 0 sum apart, 1 in x's place, 2 in the residual's. Results may be NULL. */
static void norm_run(way w, int64_t rows, int64_t dim, const double *x, const double *residual, const double *weight, int place, double *sum, double *y, double *rstd)
{
    llmpar_rmsnorm_args a;
    memset(&a, 0, sizeof a);
    a.rows = rows; a.dim = dim; a.eps = 1e-5; a.dtype = w.dtype;
    void *in = put(w, x, rows * dim), *other = put(w, residual, rows * dim), *stored = place == 1 ? in : place == 2 ? other : residual ? out(w, rows * dim) : NULL;
    a.x = in; a.residual = other; a.sum = stored; a.w = put(w, weight, dim); a.y = out(w, rows * dim); a.rstd = rstd ? cuda_put(cuda_gpu, LLMPAR_F32, NULL, 1, rows, rows, w.odd) : NULL;
    CUDA_OK(cuda_gpu->rmsnorm(cuda_gpu, NULL, &a));
    cuda_get(a.y, y);
    if (rstd) cuda_get(a.rstd, rstd);
    if (residual && sum) cuda_get(stored, sum);
    cuda_done();
}

static void norm_case(way w, int64_t rows, int64_t dim, int with_residual)
{
    int64_t n = rows * dim;
    double *x = values(w, n, 2), *residual = with_residual ? values(w, n, 2) : NULL, *weight = values(w, dim, 1), *y = ops_zeros(n), *sum = ops_zeros(n), *rstd = ops_zeros(rows), *want = ops_zeros(n), *wanted = ops_zeros(n);
    norm_run(w, rows, dim, x, residual, weight, 0, sum, y, rstd);
    for (int64_t i = 0; i < n; i++) wanted[i] = residual ? (double)((float)x[i] + (float)residual[i]) : x[i];
    cuda_round(w.dtype, wanted, n);
    if (residual) cuda_same("sum", sum, wanted, n);
    for (int64_t r = 0; r < rows; r++) {
        double square = 0, scale;
        for (int64_t i = 0; i < dim; i++) square += wanted[r * dim + i] * wanted[r * dim + i];
        scale = 1 / sqrt(square / (double)dim + (double)(float)1e-5);
        cuda_near("rstd", rstd + r, &scale, 1, 0, (chain(w.dtype, dim) / 2 + 3) * U);
        for (int64_t i = 0; i < dim; i++) want[r * dim + i] = wanted[r * dim + i] * scale * weight[i];
    }
    cuda_near("y", y, want, n, w.dtype == LLMPAR_F16 ? 3e-8 : 0, cuda_epsilon(w.dtype) + (chain(w.dtype, dim) / 2 + 6) * U);
    /* In place, elsewhere, in parts: the same bits. */
    memcpy(want, y, (size_t)n * sizeof *y);
    if (residual) for (int place = 1; place <= 2; place++) {
        norm_run(w, rows, dim, x, residual, weight, place, sum, y, NULL);
        cuda_same("sum in place", sum, wanted, n);
        cuda_same("y of a sum in place", y, want, n);
    }
    if (rows > 1) {
        int64_t cut = 1 + ops_below(rows - 1);
        way other = { w.dtype, !w.odd };
        norm_run(other, cut, dim, x, residual, weight, 0, NULL, y, NULL);
        norm_run(other, rows - cut, dim, x + cut * dim, residual ? residual + cut * dim : NULL, weight, 0, NULL, y + cut * dim, NULL);
        cuda_same("y in two parts", y, want, n);
    }
    free(x); free(residual); free(weight); free(y); free(sum); free(rstd); free(want); free(wanted);
}

TEST(norm)
{
    const int64_t dims[] = { 1, 3, 8, 40, 64, 129, 256, 520, 1030, 2056, 4100 };
    CUDA_OPEN();
    for (int i = 0; i < WAYS; i++)
        for (int j = 0; j < (int)(sizeof dims / sizeof *dims); j++) norm_case(way_of(i), 1 + ops_below(dims[j] > 500 ? 3 : 40), dims[j], (i + j) % 2);
    norm_case(way_of(0), 300, 264, 1); /* more rows than blocks */
    norm_case(way_of(1), 700, 136, 0);
    norm_case(way_of(0), 1, 60000, 1); /* a row that shared memory does not hold */
    if (!cuda_small()) for (int i = 0; i < WAYS; i++) norm_case(way_of(i), 3000, 2048, 1);
}

/* ---- rmsnorm backward ---- */

typedef struct back { llmpar_tokens tokens; int64_t dim; double *dy, *x, *w, *rstd, *dresidual, *dx, *dw; } back;
static int64_t back_rows(const back *b) { return b->tokens.batch * b->tokens.t; }
static back back_make(way w, int64_t batch, int64_t t, int64_t leaves, int32_t canon, int64_t dim)
{
    back b;
    memset(&b, 0, sizeof b);
    b.tokens.batch = batch; b.tokens.t = b.tokens.t_total = t; b.tokens.leaves = leaves; b.tokens.canon = canon;
    b.dim = dim;
    int64_t n = batch * t * dim;
    b.dy = values(w, n, 1); b.x = values(w, n, 2); b.w = values(w, dim, 1); b.rstd = ops_random(batch * t, 1); b.dresidual = values(w, n, 1); b.dx = ops_zeros(n); b.dw = ops_zeros(leaves * dim);
    for (int64_t i = 0; i < batch * t; i++) b.rstd[i] = fabs(b.rstd[i]) + 0.125;
    return b;
}
static void back_free(back *b) { free(b->dy); free(b->x); free(b->w); free(b->rstd); free(b->dresidual); free(b->dx); free(b->dw); }
/* place: 0 dx apart, 1 in dy's place, 2 in the residual's; 3: apart, without residual; 4: without dw */
static void back_run(way w, back *b, int place)
{
    llmpar_rmsnorm_backward_args a;
    int64_t n = back_rows(b) * b->dim;
    memset(&a, 0, sizeof a);
    a.tokens = b->tokens; a.dim = b->dim; a.dtype = w.dtype;
    void *dy = put(w, b->dy, n), *dresidual = place == 3 ? NULL : put(w, b->dresidual, n);
    a.dy = dy; a.x = put(w, b->x, n); a.w = put(w, b->w, b->dim); a.rstd = put_f32(b->rstd, back_rows(b), w.odd); a.dresidual = dresidual;
    a.dx = place == 1 ? dy : place == 2 ? dresidual : out(w, n);
    a.dw_leaves = place == 4 ? NULL : cuda_put(cuda_gpu, LLMPAR_F32, NULL, 1, b->tokens.leaves * b->dim, b->tokens.leaves * b->dim, w.odd);
    CUDA_OK(cuda_gpu->rmsnorm_backward(cuda_gpu, NULL, &a));
    cuda_get(a.dx, b->dx);
    if (a.dw_leaves) cuda_get(a.dw_leaves, b->dw);
    cuda_done();
}

/* The tree over leaves[first, first + n) of whole tree of `all`, in which those outside count nothing. */
static float tree_of(const float *leaves, int64_t n)
{
    if (n == 1) return leaves[0];
    int64_t split = llmpar_tree_split(n);
    return tree_of(leaves, split) + tree_of(leaves + split, n - split);
}

/* dw in the order of docs/exact.md */
static void back_order(const back *b, float *dw)
{
    int64_t share = b->tokens.batch / b->tokens.leaves, canon = b->tokens.canon;
    float *pieces = (float *)calloc((size_t)canon, sizeof *pieces);
    for (int64_t leaf = 0; leaf < b->tokens.leaves; leaf++)
        for (int64_t column = 0; column < b->dim; column++) {
            for (int64_t p = 0; p < canon; p++) {
                int64_t t0 = llmpar_piece_begin(p, b->tokens.t_total, canon) - b->tokens.t_begin, t1 = llmpar_piece_begin(p + 1, b->tokens.t_total, canon) - b->tokens.t_begin;
                float s = 0;
                for (int64_t q = leaf * share; q < (leaf + 1) * share; q++)
                    for (int64_t t = t0 < 0 ? 0 : t0; t < t1 && t < b->tokens.t; t++) {
                        int64_t row = q * b->tokens.t + t, at = row * b->dim + column;
                        s = fmaf((float)b->dy[at], (float)b->x[at] * (float)b->rstd[row], s);
                    }
                pieces[p] = s + 0.0f;
            }
            dw[leaf * b->dim + column] = tree_of(pieces, canon);
        }
    free(pieces);
}

static void back_check(way w, const back *b, int with_residual)
{
    int64_t rows = back_rows(b), dim = b->dim;
    double *want = ops_zeros(dim);
    for (int64_t r = 0; r < rows; r++) {
        const double *x = b->x + r * dim, *dy = b->dy + r * dim, rstd = b->rstd[r];
        double mean = 0, most = 0, bound;
        for (int64_t i = 0; i < dim; i++) mean += dy[i] * b->w[i] * x[i] * rstd;
        mean /= (double)dim;
        for (int64_t i = 0; i < dim; i++) most = fabs(dy[i] * b->w[i]) > most ? fabs(dy[i] * b->w[i]) : most;
        /* |mean| <= most * largest xhat, as is the sum of the magnitudes over dim */
        bound = (chain(w.dtype, dim) + 8) * U * rstd * most * (1 + rstd * largest(x, dim) * rstd * largest(x, dim)) + 2 * U + (w.dtype == LLMPAR_F16 ? 3e-8 : 0);
        for (int64_t i = 0; i < dim; i++) want[i] = (with_residual ? b->dresidual[r * dim + i] : 0) + rstd * (dy[i] * b->w[i] - x[i] * rstd * mean);
        cuda_near("dx", b->dx + r * dim, want, dim, bound, cuda_epsilon(w.dtype) + U);
    }
    free(want);
}
static void back_same(const char *what, const back *b, const double *dx, const float *dw)
{
    if (dx) cuda_same(what, b->dx, dx, back_rows(b) * b->dim);
    for (int64_t i = 0; dw && i < b->tokens.leaves * b->dim; i++)
        if (!(b->dw[i] == (double)dw[i] && !signbit(b->dw[i]) == !signbit(dw[i]))) {
            TEST_FAIL("%s: dw[%lld of %lld x %lld] is %.9g, want the bits of %.9g (batch %lld, t %lld, canon %d)", what, (long long)i, (long long)b->tokens.leaves, (long long)b->dim, b->dw[i], (double)dw[i], (long long)b->tokens.batch, (long long)b->tokens.t, (int)b->tokens.canon);
            break;
        }
}

static void back_case(way w, int64_t batch, int64_t t, int64_t leaves, int32_t canon, int64_t dim)
{
    back b = back_make(w, batch, t, leaves, canon, dim);
    int64_t n = back_rows(&b) * dim;
    float *dw = (float *)calloc((size_t)(leaves * dim), sizeof *dw);
    double *dx = ops_zeros(n);
    back_order(&b, dw);
    back_run(w, &b, 0);
    back_check(w, &b, 1);
    back_same("apart", &b, NULL, dw);
    memcpy(dx, b.dx, (size_t)n * sizeof *dx);
    /* With dx beside the chains or behind them, with memory aligned or not: the same bits. */
    w.odd = !w.odd;
    back_run(w, &b, 1);
    back_same("in dy's place", &b, dx, dw);
    back_run(w, &b, 2);
    back_same("in the residual's place", &b, dx, dw);
    back_run(w, &b, 4);
    back_same("without dw", &b, dx, NULL);
    back_run(w, &b, 3);
    back_check(w, &b, 0);
    back_same("without residual", &b, NULL, dw);
    back_free(&b);
    free(dw);
    free(dx);
}

TEST(norm_backward)
{
    CUDA_OPEN();
    for (int i = 0; i < WAYS; i++) {
        way w = way_of(i);
        back_case(w, 2, 21, 2, 8, 136);
        back_case(w, 4, 7, 4, 8, 17);
        back_case(w, 6, 5, 2, 3, 70);
        back_case(w, 1, 40, 1, 1, 600);
        back_case(w, 1 + ops_below(5), 1 + ops_below(9), 1, 1 << ops_below(5), 1 + ops_below(90));
    }
    back_case(way_of(0), 2, 40, 2, 4, 264); /* several rows a block between the chains */
    back_case(way_of(1), 4, 30, 2, 4, 520);
    back_case(way_of(0), 300, 1, 1, 1, 260); /* and behind them */
    back_case(way_of(1), 2, 50, 2, 32, 24); /* rounds of pieces */
    back_case(way_of(0), 1, 45, 1, 43, 10);
    back_case(way_of(1), 1, 3, 1, 2, 4104); /* several parts of a row a thread */
    back_case(way_of(0), 4, 2, 4, 1, 2052);
    back_case(way_of(0), 1, 2, 1, 2, 30000); /* rows that shared memory does not hold */
    if (!cuda_small()) for (int i = 0; i < WAYS; i++) back_case(way_of(i), 8, 300, 8, 8, 2048);
}

/* FAST without an order that is guaranteed (canon 1, one leaf): parts of all tokens, not one chain, the same in every call. With one, its order. */
TEST(norm_plain)
{
    CUDA_OPEN();
    llmpar_device *exact = cuda_gpu, *fast = NULL;
    llmpar_cuda_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.mode = LLMPAR_CUDA_FAST;
    CUDA_OK(llmpar_cuda_create(&cuda_ctx, &desc, &fast));
    for (int i = 0; i < 2 * WAYS; i++) {
        way w = way_of(i % WAYS);
        int plain = i < WAYS;
        const int64_t batch = i % 2 ? 4 : 1 + ops_below(5), t = i % 2 ? 64 : 1 + ops_below(20), dim = i % 3 == 2 ? 136 : 1 + ops_below(90);
        back b = back_make(w, batch, t, 1, plain ? 1 : 2, dim);
        float *dw = (float *)calloc((size_t)dim, sizeof *dw);
        double *dx = ops_zeros(batch * t * dim), *want = ops_zeros(dim), most = 0;
        back_order(&b, dw);
        cuda_gpu = exact;
        back_run(w, &b, 0);
        memcpy(dx, b.dx, (size_t)(batch * t * dim) * sizeof *dx);
        cuda_gpu = fast;
        back_run(w, &b, i % 3);
        back_same("plain order", &b, dx, plain ? NULL : dw);
        for (int64_t k = 0; k < batch * t * dim; k++) {
            double one = b.dy[k] * b.x[k] * b.rstd[k / dim];
            want[k % dim] += one;
            most = fabs(one) > most ? fabs(one) : most;
        }
        cuda_near("plain order, dw", b.dw, want, dim, (double)(batch * t + 8) * (double)(batch * t) * U * most, 0);
        for (int64_t k = 0; k < dim; k++) dw[k] = (float)b.dw[k];
        back_run(w, &b, (i + 1) % 3);
        back_same("plain order again", &b, dx, dw);
        back_free(&b);
        free(dw);
        free(dx);
        free(want);
    }
    cuda_gpu = exact;
    llmpar_cuda_destroy(fast);
}

/* A sequence in parts, as sequence parallelism has it: the tree over the parts' sums is the whole's. */
TEST(norm_pieces)
{
    CUDA_OPEN();
    for (int i = 0; i < WAYS; i++) {
        way w = way_of(i);
        const int64_t batch = 2, t = 33 + ops_below(20), leaves = 2, dim = 30;
        const int32_t canon = 16;
        back b = back_make(w, batch, t, leaves, canon, dim);
        float *whole = (float *)calloc((size_t)(leaves * dim), sizeof *whole);
        back_order(&b, whole);
        for (int64_t ranks = 1; ranks <= 8; ranks *= 2) {
            float *sums = (float *)calloc((size_t)(leaves * dim * ranks), sizeof *sums);
            for (int64_t r = 0; r < ranks; r++) {
                int64_t t0 = llmpar_piece_begin(r, t, ranks), t1 = llmpar_piece_begin(r + 1, t, ranks);
                back part = back_make(w, batch, t1 - t0, leaves, canon, dim);
                part.tokens.t_begin = t0;
                part.tokens.t_total = t;
                memcpy(part.w, b.w, (size_t)dim * sizeof *b.w);
                for (int64_t q = 0; q < batch; q++) {
                    memcpy(part.dy + q * (t1 - t0) * dim, b.dy + (q * t + t0) * dim, (size_t)((t1 - t0) * dim) * sizeof *b.dy);
                    memcpy(part.x + q * (t1 - t0) * dim, b.x + (q * t + t0) * dim, (size_t)((t1 - t0) * dim) * sizeof *b.x);
                    memcpy(part.rstd + q * (t1 - t0), b.rstd + q * t + t0, (size_t)(t1 - t0) * sizeof *b.rstd);
                }
                back_run(w, &part, 0);
                for (int64_t k = 0; k < leaves * dim; k++) sums[k * ranks + r] = (float)part.dw[k];
                back_free(&part);
            }
            for (int64_t k = 0; k < leaves * dim; k++) b.dw[k] = (double)tree_of(sums + k * ranks, ranks);
            back_same("in parts", &b, NULL, whole);
            free(sums);
        }
        back_free(&b);
        free(whole);
    }
}

/* ---- rope ---- */

static void rope_run(way w, llmpar_rope_args a, const double *x, const double *cosine, const double *sine, int64_t positions, double *y)
{
    int64_t width = a.heads * a.head_dim, tables = positions * (a.head_dim / 2);
    a.x = cuda_put(cuda_gpu, w.dtype, x, a.batch * a.t, width, a.ld, w.odd);
    a.cosine = put_f32(cosine, tables, w.odd);
    a.sine = put_f32(sine, tables, w.odd);
    a.dtype = w.dtype;
    CUDA_OK(cuda_gpu->rope(cuda_gpu, NULL, &a));
    cuda_get(a.x, y);
    cuda_done();
}

TEST(rope)
{
    CUDA_OPEN();
    for (int round = 0; round < 4 * WAYS; round++) {
        way w = way_of(round % WAYS);
        llmpar_rope_args a;
        const int64_t dims[] = { 2, 6, 16, 64, 128, 20 };
        memset(&a, 0, sizeof a);
        a.batch = 1 + ops_below(3); a.t = 1 + ops_below(5); a.heads = 1 + ops_below(4); a.head_dim = dims[(round + round / WAYS) % 6]; a.position = ops_below(4); a.inverse = (int)ops_below(2);
        a.ld = a.heads * a.head_dim + (round % 2 ? 16 * ops_below(3) : ops_below(7));
        if (round == 4 * WAYS - 2) { a.batch = 1; a.t = 70; a.heads = 64; a.head_dim = 128; a.ld = 64 * 128; } /* more than one part a thread */
        int64_t rows = a.batch * a.t, width = a.heads * a.head_dim, half = a.head_dim / 2, positions = a.position + a.t, n = rows * width;
        double *x = values(w, n, 2), *y = ops_zeros(n), *want = ops_zeros(n), *cosine = ops_random(positions * half, 1), *sine = ops_random(positions * half, 1), *first = ops_zeros(n);
        rope_run(w, a, x, cosine, sine, positions, y);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t h = 0; h < a.heads; h++)
                for (int64_t i = 0; i < half; i++) {
                    int64_t at = r * width + h * a.head_dim + i, place = (a.position + r % a.t) * half + i;
                    double s = a.inverse ? -sine[place] : sine[place];
                    want[at] = x[at] * cosine[place] - x[at + half] * s;
                    want[at + half] = x[at + half] * cosine[place] + x[at] * s;
                }
        cuda_near("rope", y, want, n, 8 * U + (w.dtype == LLMPAR_F16 ? 3e-8 : 0), cuda_epsilon(w.dtype)); /* operands below 2, factors below 1: two roundings of at most 4 u */
        /* The last sequence for itself, at another place */
        llmpar_rope_args b = a;
        way other = { w.dtype, !w.odd };
        b.batch = 1;
        b.ld += 5;
        rope_run(other, b, x + (a.batch - 1) * a.t * width, cosine, sine, positions, first);
        cuda_same("rope of one sequence", first, y + (a.batch - 1) * a.t * width, a.t * width);
        free(x); free(y); free(want); free(cosine); free(sine); free(first);
    }
}

/* ---- swiglu ---- */

static double sigmoid(double g) { return 1 / (1 + exp(-g)); }

TEST(swiglu)
{
    CUDA_OPEN();
    for (int round = 0; round < 3 * WAYS; round++) {
        way w = way_of(round % WAYS);
        int64_t rows = 1 + ops_below(5), dim = round == 3 * WAYS - 2 ? 60000 : 1 + ops_below(300), gap = round % 2 ? 0 : 8 * ops_below(4), ld_in = (dim + 7) / 8 * 8 + gap + w.odd, ld_out = (dim + 7) / 8 * 8 + w.odd, n = rows * dim;
        double *g = values(w, n, 20), *u = values(w, n, 2), *dh = values(w, n, 2), *h = ops_zeros(n), *want = ops_zeros(n), *got = ops_zeros(n), tiny = w.dtype == LLMPAR_F16 ? 6e-8 : 1e-37;
        g[0] = 0;
        if (n > 3) { g[1] = w.dtype == LLMPAR_F16 ? 60000 : 1e30; g[2] = -g[1]; cuda_round(w.dtype, g, n); }
        void *gate = cuda_put(cuda_gpu, w.dtype, g, rows, dim, ld_in, w.odd), *up = cuda_put(cuda_gpu, w.dtype, u, rows, dim, ld_in, w.odd), *out_h = cuda_put(cuda_gpu, w.dtype, NULL, rows, dim, ld_out, w.odd);
        llmpar_swiglu_args a = { rows, dim, ld_in, ld_out, gate, up, out_h, w.dtype };
        CUDA_OK(cuda_gpu->swiglu(cuda_gpu, NULL, &a));
        cuda_get(out_h, h);
        for (int64_t i = 0; i < n; i++) want[i] = g[i] * sigmoid(g[i]) * u[i];
        if (w.dtype == LLMPAR_F16) cuda_round(w.dtype, want, n); /* infinities */
        cuda_near("swiglu", h, want, n, 2 * tiny, 2 * cuda_epsilon(w.dtype) + EXP + 6 * U);
        /* backward, apart and then as the model does: everything in place */
        memcpy(want, h, (size_t)n * sizeof *h);
        void *dout = cuda_put(cuda_gpu, w.dtype, dh, rows, dim, ld_out, w.odd), *dg = cuda_put(cuda_gpu, w.dtype, NULL, rows, dim, ld_in, w.odd), *du = cuda_put(cuda_gpu, w.dtype, NULL, rows, dim, ld_in, w.odd);
        llmpar_swiglu_backward_args b = { rows, dim, ld_in, ld_out, gate, up, dout, dg, du, round % 3 ? out_h : NULL, w.dtype };
        cuda_set(out_h, NULL);
        CUDA_OK(cuda_gpu->swiglu_backward(cuda_gpu, NULL, &b));
        if (b.h) { cuda_get(out_h, got); cuda_same("h again", got, want, n); }
        double *got_g = ops_zeros(n), *got_u = ops_zeros(n);
        cuda_get(du, got_u);
        cuda_get(dg, got_g);
        for (int64_t i = 0; i < n; i++) {
            double s = sigmoid(g[i]), silu = g[i] * s * dh[i], dgate = dh[i] * u[i] * (s * (1 + g[i] * (1 - s)));
            if (fabs(g[i]) > 1000) silu = g[i] > 0 ? g[i] * dh[i] : 0, dgate = g[i] > 0 ? dh[i] * u[i] : 0;
            if (w.dtype == LLMPAR_F16) cuda_round(w.dtype, &silu, 1);
            cuda_near("dup", got_u + i, &silu, 1, 2 * tiny, 2 * cuda_epsilon(w.dtype) + EXP + 6 * U);
            /* 1 - s: off by the error of s; everything else is relative to s (1 + |g| (1 - s)) */
            cuda_near("dgate", got_g + i, &dgate, 1, tiny + fabs(dh[i] * u[i]) * s * (fabs(g[i]) < 1000 ? 1 + fabs(g[i]) : 1) * (EXP + 8 * U), cuda_epsilon(w.dtype));
        }
        b.dgate = gate; b.dup = up; b.h = dout;
        CUDA_OK(cuda_gpu->swiglu_backward(cuda_gpu, NULL, &b));
        cuda_get(gate, got);
        cuda_same("dgate in place", got, got_g, n);
        cuda_get(up, got);
        cuda_same("dup in place", got, got_u, n);
        cuda_get(dout, got);
        cuda_same("h in place", got, want, n);
        cuda_done();
        /* one by one, elsewhere; h in gate's place */
        w.odd = !w.odd;
        for (int64_t i = 0; i < (n < 6 ? n : 6); i++) {
            llmpar_swiglu_args one = { 1, 1, 1, 1, put(w, g + i, 1), put(w, u + i, 1), NULL, w.dtype };
            one.h = (void *)(uintptr_t)(i % 2 ? one.gate : one.up);
            CUDA_OK(cuda_gpu->swiglu(cuda_gpu, NULL, &one));
            cuda_get(one.h, got);
            cuda_same("swiglu of one", got, want + i, 1);
            cuda_done();
        }
        free(g); free(u); free(dh); free(h); free(want); free(got); free(got_g); free(got_u);
    }
}

/* ---- element by element: the CPU's bits ---- */

TEST(add_and_scale)
{
    CUDA_OPEN();
    for (int round = 0; round < 2 * WAYS; round++) {
        way w = way_of(round % WAYS);
        int64_t n = round < WAYS ? 1 + ops_below(40) : cuda_small() ? round == 2 * WAYS - 1 ? 300000 : 3000 + ops_below(40000) : 30000000 + ops_below(4000);
        double *a = values(w, n, 3), *b = values(w, n, 3), *got = ops_zeros(n), *want = ops_zeros(n), factor = 1.0 / 3;
        a[0] = -0.0; b[0] = -0.0;
        void *x = put(w, a, n), *y = put(w, b, n), *z = round % 3 ? out(w, n) : round % 2 ? x : y;
        llmpar_add_args add = { (size_t)n, x, y, z, w.dtype };
        CUDA_OK(cuda_gpu->add(cuda_gpu, NULL, &add));
        cuda_get(z, got);
        for (int64_t i = 0; i < n; i++) want[i] = (double)((float)a[i] + (float)b[i]);
        cuda_round(w.dtype, want, n);
        cuda_same("add", got, want, n);
        for (int64_t i = 0; i < n; i++) want[i] = (double)((float)want[i] * (float)factor);
        cuda_round(w.dtype, want, n);
        llmpar_scale_args scale = { (size_t)n, z, factor, w.dtype };
        CUDA_OK(cuda_gpu->scale(cuda_gpu, NULL, &scale));
        cuda_get(z, got);
        cuda_same("scale", got, want, n);
        cuda_done();
        free(a); free(b); free(got); free(want);
    }
}

TEST(copy_rows)
{
    CUDA_OPEN();
    for (int round = 0; round < 40; round++) {
        const size_t sizes[] = { 1, 2, 4, 8 };
        size_t size = sizes[ops_below(4)];
        int64_t rows = round == 39 ? 20 : 1 + ops_below(20), width = round == 39 ? 4000 : round % 2 ? 1 + ops_below(50) : 16 * (1 + ops_below(6)), ld_in = width + (round % 2 ? ops_below(9) : 16 * ops_below(3)), ld_out = width + (round % 2 ? ops_below(9) : 16 * ops_below(3)), odd = round % 4 == 3;
        unsigned char *in = (unsigned char *)malloc((size_t)(rows * width) * size), *got = (unsigned char *)malloc((size_t)(rows * width) * size);
        cuda_fill(in, (size_t)(rows * width) * size);
        llmpar_copy_rows_args a = { rows, width, ld_in, ld_out, size, cuda_put_bytes(cuda_gpu, size, in, rows, width, ld_in, odd), cuda_put_bytes(cuda_gpu, size, NULL, rows, width, ld_out, 0) };
        CUDA_OK(cuda_gpu->copy_rows(cuda_gpu, NULL, &a));
        cuda_get_bytes(a.out, got);
        CHECK_BYTES(got, in, (size_t)(rows * width) * size);
        cuda_done();
        free(in);
        free(got);
    }
}

/* ---- what is refused, and what does nothing ---- */

TEST(refusals)
{
    llmpar_rmsnorm_args norm;
    llmpar_rmsnorm_backward_args back;
    llmpar_rope_args rope;
    llmpar_swiglu_args swiglu;
    llmpar_swiglu_backward_args swiglu_back;
    llmpar_add_args add;
    llmpar_scale_args scale;
    llmpar_copy_rows_args copy;
    CUDA_OPEN();
    memset(&norm, 0, sizeof norm); memset(&back, 0, sizeof back); memset(&rope, 0, sizeof rope); memset(&swiglu, 0, sizeof swiglu); memset(&swiglu_back, 0, sizeof swiglu_back); memset(&add, 0, sizeof add); memset(&scale, 0, sizeof scale); memset(&copy, 0, sizeof copy);
    norm.dtype = back.dtype = rope.dtype = swiglu.dtype = swiglu_back.dtype = add.dtype = scale.dtype = LLMPAR_F64;
    CUDA_REFUSED(cuda_gpu->rmsnorm(cuda_gpu, NULL, &norm), LLMPAR_ERR_UNSUPPORTED, "rmsnorm: dtype f64");
    CUDA_REFUSED(cuda_gpu->rmsnorm_backward(cuda_gpu, NULL, &back), LLMPAR_ERR_UNSUPPORTED, "rmsnorm_backward: dtype f64");
    CUDA_REFUSED(cuda_gpu->rope(cuda_gpu, NULL, &rope), LLMPAR_ERR_UNSUPPORTED, "rope: dtype f64");
    CUDA_REFUSED(cuda_gpu->swiglu(cuda_gpu, NULL, &swiglu), LLMPAR_ERR_UNSUPPORTED, "swiglu: dtype f64");
    CUDA_REFUSED(cuda_gpu->swiglu_backward(cuda_gpu, NULL, &swiglu_back), LLMPAR_ERR_UNSUPPORTED, "swiglu_backward: dtype f64");
    CUDA_REFUSED(cuda_gpu->add(cuda_gpu, NULL, &add), LLMPAR_ERR_UNSUPPORTED, "add: dtype f64");
    CUDA_REFUSED(cuda_gpu->scale(cuda_gpu, NULL, &scale), LLMPAR_ERR_UNSUPPORTED, "scale: dtype f64");
    norm.dtype = back.dtype = rope.dtype = swiglu.dtype = swiglu_back.dtype = add.dtype = scale.dtype = LLMPAR_BF16;
    CUDA_OK(cuda_gpu->rmsnorm(cuda_gpu, NULL, &norm));
    CUDA_OK(cuda_gpu->rmsnorm_backward(cuda_gpu, NULL, &back));
    CUDA_OK(cuda_gpu->rope(cuda_gpu, NULL, &rope));
    CUDA_OK(cuda_gpu->swiglu(cuda_gpu, NULL, &swiglu));
    CUDA_OK(cuda_gpu->swiglu_backward(cuda_gpu, NULL, &swiglu_back));
    CUDA_OK(cuda_gpu->add(cuda_gpu, NULL, &add));
    CUDA_OK(cuda_gpu->scale(cuda_gpu, NULL, &scale));
    CUDA_OK(cuda_gpu->copy_rows(cuda_gpu, NULL, &copy));
    rope.batch = rope.t = rope.heads = 1;
    rope.head_dim = 5;
    CUDA_REFUSED(cuda_gpu->rope(cuda_gpu, NULL, &rope), LLMPAR_ERR_SHAPE, "rope: head_dim 5, expected an even number");
    back.dim = 4;
    back.tokens.batch = 3;
    back.tokens.t = back.tokens.t_total = 1;
    back.tokens.leaves = 2;
    back.tokens.canon = 8;
    back.dw_leaves = &back;
    CUDA_REFUSED(cuda_gpu->rmsnorm_backward(cuda_gpu, NULL, &back), LLMPAR_ERR_ARGUMENT, "2 leaves for batch 3");
    back.tokens.leaves = 3;
    back.tokens.canon = 0;
    CUDA_REFUSED(cuda_gpu->rmsnorm_backward(cuda_gpu, NULL, &back), LLMPAR_ERR_ARGUMENT, "canon 0");
    back.tokens.canon = 8;
    back.tokens.t = (int64_t)1 << 29;
    CUDA_REFUSED(cuda_gpu->rmsnorm_backward(cuda_gpu, NULL, &back), LLMPAR_ERR_UNSUPPORTED, "less than 2^30 rows");
    /* No tokens: sums of nothing. */
    float *dw = (float *)cuda_put(cuda_gpu, LLMPAR_F32, NULL, 1, 12, 12, 0);
    double got[12];
    back.tokens.canon = 8;
    back.tokens.t = 0;
    back.dw_leaves = dw;
    CUDA_OK(cuda_gpu->rmsnorm_backward(cuda_gpu, NULL, &back));
    cuda_get(dw, got);
    for (int i = 0; i < 12; i++) CHECK(got[i] == 0 && !signbit(got[i]));
    cuda_done();
}

TEST_LIST(T_(norm), T_(norm_backward), T_(norm_plain), T_(norm_pieces), T_(rope), T_(swiglu), T_(add_and_scale), T_(copy_rows), T_(refusals), T_(cuda_end))
