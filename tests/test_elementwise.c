/* Element-wise CPU operations: trees over operands, add, scale, cast, copies, AdamW, and the exact sum of squares; every cut and alias, every level. */
#include "ops.h"

TEST(tree_sum_and_max)
{
    ops_way ways[4];
    int count = ops_ways(ways);
    for (int w = 0; w < count; w++) for (int32_t n = 1; n <= 17; n++) {
        int64_t size = 133;
        double *parts[17], *sum, *most = ops_zeros(size), *got = ops_zeros(size);
        for (int32_t j = 0; j < n; j++) parts[j] = ops_random(size, 1);
        parts[n / 2][7] = NAN;
        memcpy(most, parts[0], (size_t)size * 8);
        for (int32_t j = 1; j < n; j++) for (int64_t i = 0; i < size; i++) most[i] = isnan(most[i]) ? most[i] : isnan(parts[j][i]) || parts[j][i] > most[i] ? parts[j][i] : most[i];
        sum = ops_tree(ways[w].dtype, parts, n, size);
        for (int threads = 1; threads <= 3; threads++) for (int32_t alias = -1; alias < n; alias++) for (int op = 0; op < 2; op++) {
            llmpar_device *d = ops_device(ways[w].level, threads);
            const void *in[17];
            llmpar_tree_sum_args a;
            memset(&a, 0, sizeof a);
            a.n = n; a.count = (size_t)size; a.dtype = ways[w].dtype; a.in = in;
            for (int32_t j = 0; j < n; j++) in[j] = ops_in(a.dtype, parts[j], size);
            a.out = alias < 0 ? ops_out(a.dtype, size) : (void *)(uintptr_t)in[alias];
            CHECK_OK(op ? d->max(d, NULL, &a) : d->tree_sum(d, NULL, &a));
            ops_take(a.dtype, got, a.out, size);
            ops_release();
            CHECK(isnan(got[7]));
            got[7] = 0; sum[7] = 0; most[7] = 0;
            ops_same(op ? "max" : "tree_sum", ways[w], got, op ? most : sum, size);
        }
        for (int32_t j = 0; j < n; j++) free(parts[j]);
        free(sum); free(most); free(got);
    }
    {
        llmpar_device *d = ops_device(LLMPAR_CPU_PORTABLE, 2);
        int64_t x[3] = { INT64_MAX, -5, 3 }, y[3] = { 1, -7, 2 }, out[3];
        const void *in[2];
        llmpar_tree_sum_args a;
        memset(&a, 0, sizeof a);
        in[0] = x; in[1] = y;
        a.n = 2; a.count = 3; a.in = in; a.out = out; a.dtype = LLMPAR_I64;
        CHECK_OK(d->tree_sum(d, NULL, &a));
        CHECK(out[0] == INT64_MIN && out[1] == -12 && out[2] == 5);
        CHECK_OK(d->max(d, NULL, &a));
        CHECK(out[0] == INT64_MAX && out[1] == -5 && out[2] == 3);
        a.dtype = LLMPAR_BF16;
        llmpar_error_clear(&ops_error);
        CHECK_STATUS(d->tree_sum(d, NULL, &a), LLMPAR_ERR_UNSUPPORTED);
        CHECK_TEXT(ops_error.text, "dtype bf16");
        llmpar_error_clear(&ops_error);
    }
}

/* One tree to several places: over every tail, at odd addresses, in place, of one operand a copy of bytes; and what the table does without the slot. */
TEST(tree_sum_to_several)
{
    static const size_t counts[] = { 0, 1, 3, 15, 16, 17, 133, 16384, 16384 + 5, 3 * 16384 + 1021 }; /* 16,384 floats are a task */
    enum { MOST = 3 * 16384 + 1021, OPERANDS = 5 };
    static float at[2 * OPERANDS][MOST + 40], want[MOST];
    for (int threads = 1; threads <= 3; threads++) for (int n = 1; n <= OPERANDS; n++) for (int outs = 1; outs <= OPERANDS; outs++) for (int in_place = 0; in_place < 2; in_place++)
        for (size_t c = 0; c < sizeof counts / sizeof counts[0]; c++) {
            llmpar_device table = *ops_device(LLMPAR_CPU_PORTABLE, threads);
            size_t count = counts[c];
            const void *in[OPERANDS];
            void *out[OPERANDS];
            llmpar_tree_sum_args sum;
            llmpar_tree_sum_to_args to;
            if (count > 1000 && (n + outs) % 3) continue;
            for (int j = 0; j < 2 * OPERANDS; j++)
                for (size_t i = 0; i < count + 40; i++) at[j][i] = (float)((i * 7919 + (size_t)j * 104729) % 10007) * (j % 2 ? 1e-3f : 10.0f);
            for (int j = 0; j < n; j++) in[j] = at[j] + 7 + 3 * j;
            for (int j = 0; j < outs; j++) out[j] = in_place && j < n ? (void *)(uintptr_t)in[j] : at[OPERANDS + j] + 5 + j;
            memset(&sum, 0, sizeof sum);
            sum.in = in; sum.n = n; sum.count = count; sum.out = want; sum.dtype = LLMPAR_F32;
            CHECK_OK(table.tree_sum(&table, NULL, &sum));
            to.in = in; to.n = n; to.outs = outs; to.count = count; to.out = out; to.dtype = LLMPAR_F32;
            if (n > 1 && c % 2 && !in_place) table.tree_sum_to = NULL;
            if (n > 1 && c % 4 == 2 && !in_place) table.size = (uint32_t)offsetof(llmpar_device, tree_sum_to);
            CHECK_OK(llmpar_device_tree_sum_to(&table, &to));
            for (int j = 0; j < outs; j++) {
                int own = in_place && j < n;
                const float *got = (const float *)out[j];
                CHECK_BYTES(got, want, count * sizeof *got);
                float before = own ? at[j][6 + 3 * j] : at[OPERANDS + j][4 + j], after = got[count];
                int row = own ? j : OPERANDS + j;
                size_t first = own ? 6 + 3 * (size_t)j : 4 + (size_t)j;
                CHECK_NEAR(before, (float)((first * 7919 + (size_t)row * 104729) % 10007) * (row % 2 ? 1e-3f : 10.0f), 0);
                CHECK_NEAR(after, (float)(((first + 1 + count) * 7919 + (size_t)row * 104729) % 10007) * (row % 2 ? 1e-3f : 10.0f), 0);
            }
        }
    for (int outs = 1; outs <= 3; outs++) for (size_t bytes = 0; bytes < 70000; bytes = bytes * 3 + 1) for (int empty = 0; empty < 2; empty++) {
        static unsigned char from[70007], to_bytes[3][70010];
        llmpar_device table = *ops_device(LLMPAR_CPU_PORTABLE, 2);
        const void *in = from + 3;
        void *out[3];
        llmpar_tree_sum_to_args to;
        for (size_t i = 0; i < sizeof from; i++) from[i] = (unsigned char)(i * 31 >> 2);
        memset(to_bytes, 0xee, sizeof to_bytes);
        for (int j = 0; j < outs; j++) out[j] = to_bytes[j] + j + 1;
        to.in = &in; to.n = 1; to.outs = outs; to.count = bytes; to.out = out; to.dtype = LLMPAR_U8;
        if (empty) table.tree_sum_to = NULL;
        CHECK_OK(llmpar_device_tree_sum_to(&table, &to));
        for (int j = 0; j < outs; j++) {
            CHECK_BYTES(out[j], in, bytes);
            CHECK(to_bytes[j][j] == 0xee && to_bytes[j][(size_t)j + 1 + bytes] == 0xee);
        }
    }
}

static float large_value(int j, size_t i) { return (float)((i * 31 + (size_t)j * 104729) & 4095) * (j % 2 ? 1e-3f : 10.0f); }

/* Results larger than a cache: whole lines and a tail, at addresses that vectors are written to whole and others, in place, and a copy. */
TEST(tree_sum_to_large)
{
    enum { COUNT = 2 * 1024 * 1024 + 21, OPERANDS = 3 };
    float *at[2 * OPERANDS], *want = (float *)malloc(COUNT * sizeof *want);
    for (int j = 0; j < 2 * OPERANDS; j++) at[j] = (float *)aligned_alloc(64, ((COUNT + 64) * sizeof **at + 63) / 64 * 64);
    for (int n = 1; n <= OPERANDS; n++) for (int offset = 0; offset < 3; offset++) for (int in_place = 0; in_place < 2; in_place++) {
        llmpar_device *d = ops_device(LLMPAR_CPU_PORTABLE, 2);
        const void *in[OPERANDS];
        void *out[OPERANDS];
        llmpar_tree_sum_to_args to;
        for (int j = 0; j < 2 * OPERANDS; j++) for (size_t i = 0; i < COUNT + 64; i++) at[j][i] = large_value(j, i);
        for (size_t i = 0; i < COUNT; i++) want[i] = n == 1 ? at[0][i + 8] : n == 2 ? at[0][i + 8] + at[1][i + 8] : (at[0][i + 8] + at[1][i + 8]) + at[2][i + 8];
        for (int j = 0; j < OPERANDS; j++) {
            in[j] = at[j] + 8;
            out[j] = in_place && j == 1 ? (void *)(at[1] + 8) : (void *)(at[OPERANDS + j] + 8 * (offset < 2) + 4 * offset + (offset == 2)); /* 32, 48 and 36 bytes behind a line's beginning */
        }
        to.in = in; to.n = n; to.outs = OPERANDS; to.count = COUNT; to.out = out; to.dtype = LLMPAR_F32;
        CHECK_OK(llmpar_device_tree_sum_to(d, &to));
        for (int j = 0; j < OPERANDS; j++) {
            CHECK_BYTES(out[j], want, COUNT * sizeof *want);
            const float *got = (const float *)out[j], *row = at[in_place && j == 1 ? 1 : OPERANDS + j];
            size_t first = (size_t)(got - row);
            int own = in_place && j == 1 ? 1 : OPERANDS + j;
            CHECK(got[-1] == large_value(own, first - 1) && got[COUNT] == large_value(own, first + COUNT));
        }
    }
    for (int j = 0; j < 2 * OPERANDS; j++) free(at[j]);
    free(want);
}

TEST(add_scale_cast_copy)
{
    ops_way ways[4];
    int count = ops_ways(ways);
    int64_t n = 40001; /* more than two chunks */
    double *x = ops_random(n, 3), *y = ops_random(n, 1), *want = ops_zeros(n), *got = ops_zeros(n);
    for (int w = 0; w < count; w++) for (int threads = 1; threads <= 3; threads += 2) {
        llmpar_device *d = ops_device(ways[w].level, threads);
        llmpar_dtype dtype = ways[w].dtype;
        llmpar_add_args a;
        llmpar_scale_args s;
        llmpar_cast_args c;
        a.count = s.count = c.count = (size_t)n;
        a.dtype = s.dtype = dtype;
        a.a = ops_in(dtype, x, n); a.b = ops_in(dtype, y, n); a.out = threads == 1 ? ops_out(dtype, n) : (void *)(uintptr_t)a.b;
        CHECK_OK(d->add(d, NULL, &a));
        ops_take(dtype, got, a.out, n);
        for (int64_t i = 0; i < n; i++) want[i] = dtype == LLMPAR_F64 ? x[i] + y[i] : (double)((float)x[i] + (float)y[i]);
        ops_same("add", ways[w], got, want, n);
        s.x = ops_in(dtype, x, n); s.factor = 0.3;
        CHECK_OK(d->scale(d, NULL, &s));
        ops_take(dtype, got, s.x, n);
        for (int64_t i = 0; i < n; i++) want[i] = dtype == LLMPAR_F64 ? x[i] * 0.3 : (double)((float)x[i] * 0.3f);
        ops_same("scale", ways[w], got, want, n);
        c.in = ops_in(LLMPAR_F32, x, n); c.in_dtype = LLMPAR_F32; c.out_dtype = LLMPAR_BF16; c.out = ops_put(LLMPAR_BF16, NULL, 1, n, n);
        CHECK_OK(d->cast(d, NULL, &c));
        for (int64_t i = 0; i < n; i++) if (((uint16_t *)c.out)[i] != llmpar_f32_to_bf16((float)x[i])) { TEST_FAIL("cast to bf16, element %ld", (long)i); break; }
        c.in = c.out; c.in_dtype = LLMPAR_BF16; c.out = ops_out(LLMPAR_F32, n); c.out_dtype = LLMPAR_F32;
        CHECK_OK(d->cast(d, NULL, &c));
        for (int64_t i = 0; i < n; i++) if (((float *)c.out)[i] != llmpar_bf16_to_f32(((const uint16_t *)c.in)[i])) { TEST_FAIL("cast from bf16, element %ld", (long)i); break; }
        c.out_dtype = LLMPAR_I32;
        CHECK_STATUS(d->cast(d, NULL, &c), LLMPAR_ERR_UNSUPPORTED);
        llmpar_error_clear(&ops_error);
        ops_release();
        {
            llmpar_copy_rows_args r;
            r.rows = 31; r.width = 1200; r.ld_in = 1201; r.ld_out = 1290; r.size = llmpar_dtype_size(dtype);
            r.in = ops_put(dtype, x, 31, 1200, 1201);
            r.out = ops_put(dtype, NULL, 31, 1200, 1290);
            CHECK_OK(d->copy_rows(d, NULL, &r));
            ops_get(dtype, got, r.out, 31, 1200, 1290);
            ops_same("copy_rows", ways[w], got, x, 31 * 1200);
            ops_release();
        }
    }
    free(x); free(y); free(want); free(got);
}

/* ---- optimizer ---- */

static void adamw_run(ops_way way, int threads, int64_t n, double *p, const double *g, double *m, double *v)
{
    llmpar_device *d = ops_device(way.level, threads);
    llmpar_adamw_args a;
    memset(&a, 0, sizeof a);
    a.count = (size_t)n; a.dtype = way.dtype;
    a.lr = 1e-2; a.beta1 = 0.9; a.beta2 = 0.95; a.eps = 1e-8; a.decay = 0.1; a.correction1 = 1 - 0.9 * 0.9 * 0.9; a.correction2 = 1 - 0.95 * 0.95 * 0.95; a.grad_scale = 0.5;
    a.p = ops_in(way.dtype, p, n); a.g = ops_in(way.dtype, g, n); a.m = ops_in(way.dtype, m, n); a.v = ops_in(way.dtype, v, n);
    CHECK_OK(d->adamw(d, NULL, &a));
    ops_take(way.dtype, p, a.p, n); ops_take(way.dtype, m, a.m, n); ops_take(way.dtype, v, a.v, n);
    ops_release();
}

TEST(adamw)
{
    enum { N = 20011 };
    ops_way ways[4];
    int count = ops_ways(ways);
    double *p0 = ops_random(N, 1), *g = ops_random(N, 0.1), *m0 = ops_random(N, 0.05), *v0 = ops_random(N, 0.01), *want = ops_zeros(N);
    for (int i = 0; i < N; i++) {
        double gg, m, v;
        v0[i] = fabs(v0[i]);
        if (i % 50 == 0) v0[i] = m0[i] = g[i] = 0; /* 0/(0 + eps) */
        gg = g[i] * 0.5;
        m = 0.9 * m0[i] + (1 - 0.9) * gg;
        v = 0.95 * v0[i] + (1 - 0.95) * gg * gg;
        want[i] = p0[i] * (1 - 1e-2 * 0.1) - 1e-2 * (m / (1 - 0.9 * 0.9 * 0.9)) / (sqrt(v / (1 - 0.95 * 0.95 * 0.95)) + 1e-8);
    }
    for (int w = 0; w < count; w++) {
        double *p = ops_zeros(3 * N), *first = ops_zeros(3 * N);
        for (int threads = 1; threads <= 3; threads++) {
            memcpy(p, p0, N * 8); memcpy(p + N, m0, N * 8); memcpy(p + 2 * N, v0, N * 8);
            adamw_run(ways[w], threads, N, p, g, p + N, p + 2 * N);
            ops_near("adamw", ways[w], p, want, N, ops_bound(ways[w], 3e-7));
            if (threads == 1) memcpy(first, p, 3 * N * 8);
            else ops_same("adamw threads", ways[w], p, first, 3 * N);
        }
        for (int64_t at = 1; at < 40; at++) { /* cut anywhere */
            double q[3][64];
            memcpy(q[0], p0 + at, 64 * 8); memcpy(q[1], m0 + at, 64 * 8); memcpy(q[2], v0 + at, 64 * 8);
            adamw_run(ways[w], 1, 64 - at, q[0], g + at, q[1], q[2]);
            for (int k = 0; k < 3; k++) ops_same("adamw cut", ways[w], q[k], first + k * N + at, 64 - at);
        }
        free(p); free(first);
    }
    free(p0); free(g); free(m0); free(v0); free(want);
}

static void sgd_run(ops_way way, int threads, int64_t n, double limit, double *p, const double *g, double *m)
{
    llmpar_device *d = ops_device(way.level, threads);
    llmpar_sgd_args a;
    memset(&a, 0, sizeof a);
    a.count = (size_t)n; a.dtype = way.dtype;
    a.lr = 1e-2; a.momentum = 0.75; a.decay = 0.1; a.limit = limit; a.grad_scale = 0.5;
    a.p = ops_in(way.dtype, p, n); a.g = ops_in(way.dtype, g, n); a.m = ops_in(way.dtype, m, n);
    CHECK_OK(d->sgd(d, NULL, &a));
    ops_take(way.dtype, p, a.p, n);
    if (m) ops_take(way.dtype, m, a.m, n);
    ops_release();
}

TEST(sgd)
{
    enum { N = 20011 };
    ops_way ways[4];
    int count = ops_ways(ways);
    double *p0 = ops_random(N, 1), *g = ops_random(N, 0.1), *m0 = ops_random(N, 0.05), *want = ops_zeros(2 * N), *p = ops_zeros(2 * N), *first = ops_zeros(2 * N);
    for (int k = 0; k < 4; k++) { /* with and without momentum, a limit */
        double limit = k & 1 ? 0.02 : 0, *m = k & 2 ? p + N : NULL;
        for (int i = 0; i < N; i++) {
            double x = g[i] * 0.5;
            if (limit > 0) x = fmin((double)(float)limit, fmax(-(double)(float)limit, x));
            want[N + i] = m ? 0.75 * m0[i] + x : 0;
            want[i] = p0[i] * (1 - 1e-2 * 0.1) - 1e-2 * (m ? want[N + i] : x);
        }
        for (int w = 0; w < count; w++) {
            for (int threads = 1; threads <= 3; threads++) {
                memcpy(p, p0, N * 8); memcpy(p + N, m0, N * 8);
                sgd_run(ways[w], threads, N, limit, p, g, m);
                ops_near("sgd", ways[w], p, want, N, limit > 0 ? 1e-7 : ops_bound(ways[w], 3e-7)); /* the limit is rounded to f32 above */
                if (m) ops_near("sgd m", ways[w], m, want + N, N, limit > 0 ? 1e-7 : ops_bound(ways[w], 3e-7));
                if (threads == 1) memcpy(first, p, 2 * N * 8);
                else ops_same("sgd threads", ways[w], p, first, 2 * N);
            }
            for (int64_t at = 1; at < 40; at++) { /* cut anywhere */
                double q[2][64];
                memcpy(q[0], p0 + at, 64 * 8); memcpy(q[1], m0 + at, 64 * 8);
                sgd_run(ways[w], 1, 64 - at, limit, q[0], g + at, m ? q[1] : NULL);
                ops_same("sgd cut", ways[w], q[0], first + at, 64 - at);
                if (m) ops_same("sgd cut m", ways[w], q[1], first + N + at, 64 - at);
            }
            double special[3] = { (double)NAN, (double)INFINITY, 1 }, q[3] = { 0, 0, 0 };
            sgd_run(ways[w], 1, 3, limit, q, special, NULL);
            CHECK(isnan(q[0]) && (limit > 0 ? fabs(q[1] + 1e-2 * limit) < 1e-9 : isinf(q[1])) && isfinite(q[2]));
        }
    }
    free(p0); free(g); free(m0); free(want); free(p); free(first);
}

/* ---- AdaLomo: a matrix of R x C, whole and as parts that begin and end anywhere ---- */

enum { R = 37, C = 1100 };
static int col_bits;

/* rows[R], cols[C] of elements [begin, end), added to what is there. */
static void factor_run(ops_way way, int threads, const double *g, int64_t begin, int64_t end, double largest, double scale, int64_t *rows, int64_t *cols)
{
    llmpar_device *d = ops_device(way.level, threads);
    llmpar_factor_sum_args a;
    memset(&a, 0, sizeof a);
    a.begin = begin; a.count = end - begin; a.cols = C; a.dtype = way.dtype;
    a.row_bits = 62 - 11; a.col_bits = col_bits;
    a.largest = &largest; a.grad_scale = scale;
    a.row_sums = rows; a.col_sums = cols;
    a.g = ops_in(way.dtype, g + begin, end - begin);
    CHECK_OK(d->factor_sum(d, NULL, &a));
    ops_release();
}

static double largest_run(ops_way way, int threads, const double *x, int64_t n, double from)
{
    llmpar_device *d = ops_device(way.level, threads);
    llmpar_largest_args a;
    double largest = from;
    memset(&a, 0, sizeof a);
    a.count = (size_t)n; a.dtype = way.dtype; a.largest = &largest;
    a.x = ops_in(way.dtype, x, n);
    CHECK_OK(d->largest(d, NULL, &a));
    ops_release();
    return largest;
}

TEST(factor_sums)
{
    ops_way ways[4];
    int count = ops_ways(ways);
    double *g = ops_random(R * C, 3);
    static int64_t rows[R], cols[C], first_rows[R], first_cols[C], part_rows[R], part_cols[C];
    double top = 0;
    for (int i = 0; i < R * C; i++) {
        if (i / C == 4) g[i] = 0;
        else if (i / C == 6) g[i] *= ldexp(1, -100);
        top = fmax(top, fabs(g[i]));
    }
    for (int both = 0; both < 2 * count; both++) {
        int w = both / 2;
        col_bits = both % 2 ? 49 : 56; /* 52 and less take another way than more */
        for (int threads = 1; threads <= 3; threads++) {
            CHECK(largest_run(ways[w], threads, g, R * C, 0) == top);
            CHECK(largest_run(ways[w], threads, g, R * C, 2 * top) == 2 * top);
            memset(rows, 0, sizeof rows);
            memset(cols, 0, sizeof cols);
            factor_run(ways[w], threads, g, 0, R * C, top, 0.25, rows, cols);
            if (threads == 1) memcpy(first_rows, rows, sizeof rows), memcpy(first_cols, cols, sizeof cols);
            CHECK_BYTES(rows, first_rows, sizeof rows);
            CHECK_BYTES(cols, first_cols, sizeof cols);
        }
        /* 3 * 0.25 < 2^0 */
        for (int r = 0; r < R; r++) {
            double sum = 0;
            for (int c = 0; c < C; c++) sum += g[r * C + c] * g[r * C + c] / 16;
            CHECK_NEAR(ldexp((double)rows[r], -51), sum, 1e-13 * sum + C * ldexp(1, -51));
            if (r == 4) CHECK_INT(rows[r], 0);
            if (r == 6) CHECK_INT(rows[r], C); /* the least there is, each */
        }
        for (int c = 0; c < C; c++) {
            double sum = 0;
            for (int r = 0; r < R; r++) sum += g[r * C + c] * g[r * C + c] / 16;
            CHECK_NEAR(ldexp((double)cols[c], -col_bits), sum, 1e-13 * sum + R * ldexp(1, -col_bits));
        }
        for (int64_t cut = 1; cut < R * C; cut += 1 + ops_below(4000)) { /* two parts */
            memset(part_rows, 0, sizeof rows);
            memset(part_cols, 0, sizeof cols);
            factor_run(ways[w], 1, g, 0, cut, top, 0.25, part_rows, part_cols);
            factor_run(ways[w], 1, g, cut, R * C, top, 0.25, part_rows, part_cols);
            CHECK_BYTES(part_rows, rows, sizeof rows);
            CHECK_BYTES(part_cols, cols, sizeof cols);
        }
        /* not finite: largest says so, the sums take nothing, the moments are NaN */
        double bad[3] = { 1, (double)INFINITY, -2 }, moment[2] = { 0, 0 }, factor[2];
        CHECK(isinf(largest_run(ways[w], 1, bad, 3, 5)));
        bad[0] = -(double)NAN;
        double nan = largest_run(ways[w], 1, bad, 3, 5), again = largest_run(ways[w], 1, bad + 1, 2, nan);
        CHECK(isnan(nan) && isnan(again));
        factor_run(ways[w], 1, g, 0, R * C, (double)INFINITY, 0.25, part_rows, part_cols);
        CHECK_BYTES(part_rows, rows, sizeof rows);
        llmpar_device *d = ops_device(ways[w].level, 1);
        for (int k = 0; k < 3; k++) {
            double largest = k == 0 ? nan : k == 1 ? (double)INFINITY : 3;
            llmpar_factor_moment_args a;
            memset(&a, 0, sizeof a);
            a.count = 2; a.sums = rows; a.terms = C; a.bits = 51; a.by_mean = 1; a.largest = &largest; a.grad_scale = 0.25; a.beta = 0.5; a.eps = 1e-30; a.dtype = ways[w].dtype;
            a.moment = ops_in(ways[w].dtype, moment, 2);
            a.factor = ops_out(ways[w].dtype, 2);
            CHECK_OK(d->factor_moment(d, NULL, &a));
            ops_take(ways[w].dtype, moment, a.moment, 2);
            ops_take(ways[w].dtype, factor, a.factor, 2);
            ops_release();
            if (k < 2) CHECK(isnan(moment[0]) && isnan(moment[1]) && isnan(factor[0]));
            else {
                double want = ldexp((double)rows[1], -51) / C / 2;
                CHECK_NEAR(moment[1], want, want * 1e-7);
                CHECK_NEAR(factor[1], sqrt((moment[0] + moment[1]) / 2 / moment[1]), 1e-7);
            }
            moment[0] = moment[1] = 0;
        }
    }
    free(g);
}

static void adalomo_run(ops_way way, int threads, int64_t begin, int64_t end, double *p, const double *g, const double *rows, const double *cols, double *moment, llmpar_exact_sum *squares, const llmpar_exact_sum *size, int apply)
{
    llmpar_device *d = ops_device(way.level, threads);
    llmpar_adalomo_args a;
    int64_t n = end - begin;
    memset(&a, 0, sizeof a);
    a.begin = begin; a.count = n; a.cols = C; a.elements = R * C; a.dtype = way.dtype;
    a.lr = 0.1; a.decay = 0.2; a.grad_scale = 0.5; a.beta = 0.75; a.eps = 1e-30;
    a.p = ops_in(way.dtype, p + begin, n); a.g = ops_in(way.dtype, g + begin, n);
    if (rows) a.row_factor = ops_in(way.dtype, rows, R), a.col_factor = ops_in(way.dtype, cols, C);
    else a.moment = ops_in(way.dtype, moment + begin, n);
    a.update_squares = squares ? squares->limb : NULL;
    a.param_squares = size->limb;
    CHECK_OK(apply ? d->adalomo(d, NULL, &a) : d->adalomo_square(d, NULL, &a));
    ops_take(way.dtype, p + begin, a.p, n);
    if (!rows) ops_take(way.dtype, moment + begin, a.moment, n);
    ops_release();
}

TEST(adalomo)
{
    ops_way ways[4];
    int count = ops_ways(ways);
    enum { N = R * C };
    double *p0 = ops_random(N, 2), *g = ops_random(N, 3), *m0 = ops_random(N, 1), *rows = ops_random(R, 1), *cols = ops_random(C, 1), *want = ops_zeros(N), *p = ops_zeros(N), *m = ops_zeros(N), *first = ops_zeros(2 * N);
    llmpar_exact_sum size, squares, first_squares;
    memset(&size, 0, sizeof size);
    for (int i = 0; i < N; i++) llmpar_exact_sum_add(&size, p0[i] * p0[i]), m0[i] = fabs(m0[i]) + 0.01;
    for (int i = 0; i < R; i++) rows[i] = fabs(rows[i]) + 0.1;
    for (int i = 0; i < C; i++) cols[i] = fabs(cols[i]) + 0.1;
    for (int factored = 0; factored < 2; factored++) {
        double sum = 0, rate = 0.1 * sqrt(llmpar_exact_sum_value(&size) / N);
        for (int i = 0; i < N; i++) {
            double x = g[i] * 0.5, u = factored ? x * rows[i / C] * cols[i % C] : x / sqrt(0.75 * m0[i] + 0.25 * (x * x + 1e-30));
            want[i] = u;
            sum += u * u;
        }
        for (int i = 0; i < N; i++) want[i] = p0[i] * (1 - rate * 0.2) - rate / fmax(1, sqrt(sum / N)) * want[i];
        for (int w = 0; w < count; w++) {
            for (int threads = 1; threads <= 3; threads++)
                for (int part = 0; part < 4; part++) { /* whole, then cut in two */
                    int64_t cut = part ? 1 + ops_below(N - 1) : N;
                    const double *r = factored ? rows : NULL;
                    memset(&squares, 0, sizeof squares);
                    memcpy(p, p0, N * 8); memcpy(m, m0, N * 8);
                    adalomo_run(ways[w], threads, 0, cut, p, g, r, cols, m, &squares, &size, 0);
                    adalomo_run(ways[w], threads, cut, N, p, g, r, cols, m, &squares, &size, 0);
                    ops_same("adalomo_square leaves p", ways[w], p, p0, N);
                    adalomo_run(ways[w], threads, 0, cut, p, g, r, cols, m, &squares, &size, 1);
                    adalomo_run(ways[w], threads, cut, N, p, g, r, cols, m, &squares, &size, 1);
                    ops_near("adalomo", ways[w], p, want, N, ops_bound(ways[w], 6e-7));
                    CHECK_NEAR(llmpar_exact_sum_value(&squares), sum, sum * (ways[w].dtype == LLMPAR_F64 ? 1e-12 : 1e-6));
                    if (threads == 1 && part == 0) memcpy(first, p, N * 8), memcpy(first + N, m, N * 8), first_squares = squares;
                    ops_same("adalomo p", ways[w], p, first, N);
                    ops_same("adalomo moment", ways[w], m, first + N, N);
                    CHECK_BYTES(&squares, &first_squares, sizeof squares);
                }
            memcpy(m, m0, N * 8);
            adalomo_run(ways[w], 1, 0, N, p, g, factored ? rows : NULL, cols, m, NULL, &size, 0); /* a copy that does not count */
            ops_same("adalomo moment of a copy", ways[w], m, first + N, N);
        }
    }
    free(p0); free(g); free(m0); free(rows); free(cols); free(want); free(p); free(m); free(first);
}

TEST(square_sum)
{
    enum { N = 70001 };
    ops_way ways[4];
    int count = ops_ways(ways);
    double *x = ops_random(N, 1e3);
    for (int w = 0; w < count; w++) {
        double whole = 0;
        long double plain = 0;
        for (int i = 0; i < N; i++) plain += (long double)x[i] * (long double)x[i];
        for (int cuts = 1; cuts <= 64; cuts *= 4) for (int threads = 1; threads <= 3; threads++) {
            llmpar_device *d = ops_device(ways[w].level, threads);
            int64_t accumulator[LLMPAR_EXACT_SUM_LIMBS] = { 0 };
            double value;
            for (int c = cuts - 1; c >= 0; c--) {
                llmpar_square_sum_args a;
                int64_t from = llmpar_piece_begin(c, N, cuts), to = llmpar_piece_begin(c + 1, N, cuts);
                a.count = (size_t)(to - from); a.x = ops_in(ways[w].dtype, x + from, to - from); a.accumulator = accumulator; a.dtype = ways[w].dtype;
                CHECK_OK(d->square_sum(d, NULL, &a));
                ops_release();
            }
            value = llmpar_exact_sum_value((const llmpar_exact_sum *)(const void *)accumulator);
            if (cuts == 1 && threads == 1) {
                whole = value;
                CHECK_NEAR(value, (double)plain, (double)plain * 1e-12); /* where long double is no longer than double, too */
            }
            ops_same("square_sum", ways[w], &value, &whole, 1);
        }
    }
    free(x);
}

/* The fast sums of squares against one addition a number, limb by limb: exponents as near and as far as they get, blocks of one value (what is rounded off has one sign then), the largest number a block can be made of, zeros,
   denormal numbers, and what is not finite. */
TEST(square_sum_exact)
{
    enum { N = 3 * 4096 + 77 };
    static const int spreads[14] = { 0, 1, 5, 17, 18, 19, 20, 21, 38, 39, 40, 41, 60, 254 };
    float *x = (float *)malloc((N + 16) * sizeof *x);
    for (int round = 0; round < test_rounds(600); round++) {
        llmpar_exact_sum want;
        int64_t at = ops_below(16), n = round % 3 ? 1 + ops_below(N) : 4096 * (1 + ops_below(3));
        uint32_t spread = (uint32_t)spreads[ops_below(14)], top = spread + (uint32_t)ops_below(255 - (int64_t)spread), same = ops_bits() & 0x807fffffu;
        int kind = (int)ops_below(6); /* 0: one fraction; 1: only the largest; 2: zeros between; 3: another top half-way; 4: one number that is not finite */
        memset(&want, 0, sizeof want);
        for (int64_t i = 0; i < n; i++) {
            uint32_t exponent = top - (uint32_t)(kind < 2 ? 0 : ops_below((int64_t)spread + 1)), bits;
            if (kind == 3 && i > n / 2) exponent = spread + (top + 7) % (255 - spread) - (uint32_t)ops_below((int64_t)spread + 1);
            bits = exponent << 23 | (kind == 0 ? same : kind == 1 ? 0x7fffffu : ops_bits() & 0x807fffffu);
            if (kind == 0 && i % 5 == 0) bits -= spread << 23;
            if (kind == 2 && i % 3) bits = 0;
            if (kind == 4 && i == n / 2) bits = 0x7f800000u | (ops_bits() & 0x80000001u);
            memcpy(x + at + i, &bits, sizeof bits);
            llmpar_exact_sum_add(&want, (double)x[at + i] * (double)x[at + i]);
        }
        /* Squares of infinities are +inf, and a NaN's is one. */
        llmpar_exact_sum_carry(&want);
        for (int level = (int)LLMPAR_CPU_PORTABLE; level <= (int)llmpar_cpu_best_level(); level++) {
            llmpar_device *d = ops_device((llmpar_cpu_level)level, 1 + round % 3);
            int64_t accumulator[LLMPAR_EXACT_SUM_LIMBS] = { 0 };
            llmpar_square_sum_args a;
            a.count = (size_t)n; a.x = x + at; a.accumulator = accumulator; a.dtype = LLMPAR_F32;
            CHECK_OK(d->square_sum(d, NULL, &a));
            if (memcmp(accumulator, &want, sizeof want)) TEST_FAIL("square_sum at %s: round %d, %ld numbers, spread %u below %u, kind %d", llmpar_cpu_level_name((llmpar_cpu_level)level), round, (long)n, spread, top, kind);
        }
    }
    free(x);
}

TEST(devices_close) { ops_close(); }

TEST_LIST(T_(tree_sum_and_max), T_(tree_sum_to_several), T_(tree_sum_to_large), T_(add_scale_cast_copy), T_(adamw), T_(sgd), T_(factor_sums), T_(adalomo), T_(square_sum), T_(square_sum_exact), T_(devices_close))
