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
                CHECK_NEAR(value, (double)plain, (double)plain * 1e-14);
            }
            ops_same("square_sum", ways[w], &value, &whole, 1);
        }
    }
    free(x);
}

TEST(devices_close) { ops_close(); }

TEST_LIST(T_(tree_sum_and_max), T_(add_scale_cast_copy), T_(adamw), T_(square_sum), T_(devices_close))
