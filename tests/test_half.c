/* BF16 and F16 on the CPU device, row by row and element by element: conversions, norms, rope, swiglu, embedding, add, scale; what is refused. See half_cases.h for how a case is checked. */
#include "half_cases.h"
#include "debug_device.h"

/* ---- conversions ---- */

static void check_cast(llmpar_cpu_level level, const void *in, llmpar_dtype in_dtype, llmpar_dtype out_dtype, size_t count)
{
    size_t size = llmpar_dtype_size(out_dtype), in_size = llmpar_dtype_size(in_dtype);
    char *want = (char *)malloc(count * size), *got = (char *)malloc(count * size + 1);
    llmpar_device *d = ops_device(level, 2);
    llmpar_cast_args a;
    CHECK(llmpar_convert(want, out_dtype, in, in_dtype, count));
    memset(&a, 0, sizeof a);
    a.in_dtype = in_dtype; a.out_dtype = out_dtype;
    for (size_t begin = 0, end; begin <= count; begin = end + 1) { /* whole, then from the second element on in growing parts */
        size_t first = begin ? begin - 1 : 0;
        end = begin == 0 ? count : first + 1 + first % 67 < count ? first + 1 + first % 67 : count;
        if (begin > 4000) break;
        memset(got, 0x5a, count * size + 1);
        a.in = (const char *)in + first * in_size; a.out = got + first * size; a.count = end - first;
        CHECK_OK(d->cast(d, NULL, &a));
        if (memcmp(got + first * size, want + first * size, (end - first) * size) || got[end * size] != 0x5a) {
            TEST_FAIL("cast %s to %s at %s: elements %ld to %ld", llmpar_dtype_name(in_dtype), llmpar_dtype_name(out_dtype), llmpar_cpu_level_name(level), (long)first, (long)end);
            break;
        }
        if (begin == 0) end = 0;
    }
    free(want); free(got);
}

TEST(casts_have_the_bits_of_dtype)
{
    static const llmpar_dtype types[4] = { LLMPAR_F32, LLMPAR_F64, LLMPAR_BF16, LLMPAR_F16 };
    size_t count = (size_t)1 << 20;
    uint16_t *all = (uint16_t *)malloc(65536 * sizeof *all);
    float *x = (float *)malloc(count * sizeof *x);
    double *y = (double *)malloc(count * sizeof *y);
    draw_state = 3;
    for (uint32_t i = 0; i < 65536; i++) all[i] = (uint16_t)i;
    for (uint32_t i = 0; i < count; i++) {
        /* random bits; around every F16 number and every BF16 number that is exact in few bits: itself, the tie behind it, and the neighbours of both */
        uint32_t bits = draw() * 2u + draw() % 2u, near = draw() % 6;
        if (i % 4 == 1) bits = bits_of(llmpar_f16_to_f32((uint16_t)(i >> 2))) + (near < 3 ? 0u : 0x1000u) + near % 3 - 1;
        if (i % 4 == 2) bits = ((i >> 2) << 16) + (near < 3 ? 0u : 0x8000u) + near % 3 - 1;
        if (i % 4 == 3) bits = (bits & 0x80000000u) | (0x32000000u + bits % 0x07000000u); /* 2^-27 to 2^-13: F16 subnormals and their ties */
        x[i] = float_of(bits);
        y[i] = (double)x[i] * (i % 3 == 0 ? 1.0 : 1.0 + ldexp(1.0, -40));
    }
    for (int level = (int)LLMPAR_CPU_PORTABLE; level <= (int)llmpar_cpu_best_level(); level++) {
        for (int to = 0; to < 4; to++) {
            check_cast((llmpar_cpu_level)level, all, LLMPAR_BF16, types[to], 65536);
            check_cast((llmpar_cpu_level)level, all, LLMPAR_F16, types[to], 65536);
            check_cast((llmpar_cpu_level)level, x, LLMPAR_F32, types[to], count);
            check_cast((llmpar_cpu_level)level, y, LLMPAR_F64, types[to], count / 8);
        }
    }
    free(all); free(x); free(y);
}

/* There and back, all 65,536: nothing changes but that NaNs become quiet. And what the widened bits mean, from their fields. */
TEST(casts_there_and_back)
{
    for (int level = (int)LLMPAR_CPU_PORTABLE; level <= (int)llmpar_cpu_best_level(); level++) for (int type = 0; type < 2; type++) {
        llmpar_dtype dtype = type ? LLMPAR_F16 : LLMPAR_BF16;
        int bits = type ? 10 : 7, bias = type ? 15 : 127;
        llmpar_device *d = ops_device((llmpar_cpu_level)level, 1);
        uint16_t *in = (uint16_t *)malloc(65536 * 2), *back = (uint16_t *)malloc(65536 * 2);
        float *wide = (float *)malloc(65536 * 4);
        llmpar_cast_args a;
        int bad = 0;
        for (uint32_t i = 0; i < 65536; i++) in[i] = (uint16_t)i;
        memset(&a, 0, sizeof a);
        a.count = 65536; a.in = in; a.in_dtype = dtype; a.out = wide; a.out_dtype = LLMPAR_F32;
        CHECK_OK(d->cast(d, NULL, &a));
        a.in = wide; a.in_dtype = LLMPAR_F32; a.out = back; a.out_dtype = dtype;
        CHECK_OK(d->cast(d, NULL, &a));
        for (int i = 0; i < 65536; i++) {
            int exponent = (i & 0x7fff) >> bits, fraction = i & ((1 << bits) - 1), top = (0x7fff >> bits);
            double want = exponent == 0 ? ldexp(fraction, 1 - bias - bits) : ldexp(fraction + (1 << bits), exponent - bias - bits);
            if (exponent == top && fraction) bad += !(wide[i] != wide[i]) || back[i] != (i | 1 << (bits - 1)) || (bits_of(wide[i]) >> 31) != (uint32_t)i >> 15;
            else if (exponent == top) bad += !isinf(wide[i]) || back[i] != i;
            else bad += (double)wide[i] != (i & 0x8000 ? -want : want) || back[i] != i;
        }
        if (bad) TEST_FAIL("%s at %s: %d of 65536 patterns", llmpar_dtype_name(dtype), llmpar_cpu_level_name((llmpar_cpu_level)level), bad);
        free(in); free(back); free(wide);
    }
}

/* ---- rows ---- */

static void run_norm(int shape)
{
    int64_t d = dims[shape], rows = 5, size = rows * d;
    float *x = values(size, 2), *residual = values(size, 1), *w = values(d, 1.5), *dy = values(size, 1), *dresidual = values(size, 0.1), *rstd = values(rows, 1);
    llmpar_rmsnorm_args f;
    llmpar_rmsnorm_backward_args b;
    for (int with = 0; with < 3; with++) { /* without a residual; with one; with the sum in its place */
        memset(&f, 0, sizeof f);
        f.rows = rows; f.dim = d; f.eps = 1e-5; f.dtype = stored;
        f.x = put(stored, x, 1, size, size); f.w = put(stored, w, 1, d, d); f.y = put(stored, NULL, 1, size, size); f.rstd = put_sum(NULL, rows);
        if (with) {
            void *in = put(stored, residual, 1, size, size);
            f.residual = in; f.sum = with == 2 ? in : put(stored, NULL, 1, size, size);
            if (stored == LLMPAR_F32) { /* the sum is normalised as it is stored */
                for (int64_t i = 0; i < size; i++) ((float *)f.sum)[i] = widened(rounded(x[i] + residual[i], half), half);
                f.x = f.sum; f.residual = NULL;
            }
        }
        CHECK_OK(device->rmsnorm(device, NULL, &f));
        take(f.y, 1, size, size); take_sum(f.rstd, rows);
        if (with) take(f.sum, 1, size, size);
        ops_release();
    }
    for (int with = 0; with < 4; with++) { /* dresidual NULL; apart; dx in its place; dx in dy's */
        void *dx;
        memset(&b, 0, sizeof b);
        b.tokens.batch = 5; b.tokens.t = b.tokens.t_total = 1; b.tokens.leaves = 5; b.tokens.canon = 4; b.dim = d; b.dtype = stored;
        if (with == 1) { b.tokens.batch = 1; b.tokens.t = 4; b.tokens.t_begin = 3; b.tokens.t_total = 40; b.tokens.leaves = 1; }
        if (with == 2) { b.tokens.batch = 1; b.tokens.t = b.tokens.t_total = 5; b.tokens.leaves = 1; b.tokens.canon = 1; }
        dx = with == 3 ? put(stored, dy, 1, size, size) : with == 2 ? put(stored, dresidual, 1, size, size) : put(stored, NULL, 1, size, size);
        b.dy = with == 3 ? dx : put(stored, dy, 1, size, size); b.x = put(stored, x, 1, size, size); b.w = put(stored, w, 1, d, d); b.rstd = put_sum(rstd, rows);
        b.dresidual = with == 0 ? NULL : with == 2 ? dx : put(stored, dresidual, 1, size, size);
        b.dx = dx; b.dw_leaves = put_sum(NULL, b.tokens.leaves * d);
        CHECK_OK(device->rmsnorm_backward(device, NULL, &b));
        take(b.dx, 1, b.tokens.batch * b.tokens.t * d, size); take_sum(b.dw_leaves, b.tokens.leaves * d);
        ops_release();
    }
    free(x); free(residual); free(w); free(dy); free(dresidual); free(rstd);
}
TEST(norm) { everywhere("rmsnorm", run_norm, DIMS); }

/* The token sums at a length that takes several parts of rows, with leaves and pieces. */
static void run_norm_tokens(int shape)
{
    int64_t d = dims[shape], batch = 4, t = 45, size = batch * t * d;
    float *x = values(size, 2), *w = values(d, 1), *dy = values(size, 1), *rstd = values(batch * t, 1);
    llmpar_rmsnorm_backward_args b;
    memset(&b, 0, sizeof b);
    b.tokens.batch = batch; b.tokens.t = b.tokens.t_total = t; b.tokens.leaves = 2; b.tokens.canon = shape % 2 ? 8 : 1; b.dim = d; b.dtype = stored;
    b.dy = put(stored, dy, 1, size, size); b.x = put(stored, x, 1, size, size); b.w = put(stored, w, 1, d, d); b.rstd = put_sum(rstd, batch * t);
    b.dx = put(stored, NULL, 1, size, size); b.dw_leaves = put_sum(NULL, 2 * d);
    CHECK_OK(device->rmsnorm_backward(device, NULL, &b));
    take(b.dx, 1, size, size); take_sum(b.dw_leaves, 2 * d);
    ops_release();
    free(x); free(w); free(dy); free(rstd);
}
TEST(norm_tokens) { everywhere("rmsnorm over tokens", run_norm_tokens, 5); }

static void run_rope(int shape)
{
    static const int64_t halves[6] = { 1, 3, 8, 17, 64, 1100 };
    int64_t e = 2 * halves[shape], heads = 3, batch = 2, t = 4, rows = batch * t, ld = heads * e + 3;
    float *x = values(rows * heads * e, 1), *cosine = values((t + 2) * e / 2, 1), *sine = values((t + 2) * e / 2, 1);
    for (int inverse = 0; inverse < 2; inverse++) {
        llmpar_rope_args a;
        memset(&a, 0, sizeof a);
        a.batch = batch; a.t = t; a.heads = heads; a.head_dim = e; a.ld = ld; a.position = 2; a.dtype = stored; a.inverse = inverse;
        a.x = put(stored, x, rows, heads * e, ld); a.cosine = put_sum(cosine, (t + 2) * e / 2); a.sine = put_sum(sine, (t + 2) * e / 2);
        CHECK_OK(device->rope(device, NULL, &a));
        take(a.x, rows, heads * e, ld);
        ops_release();
    }
    free(x); free(cosine); free(sine);
}
TEST(rope) { everywhere("rope", run_rope, 6); }

static void run_swiglu(int shape)
{
    int64_t d = dims[shape], rows = 3, ld_in = d + 4, ld_out = d + 1, size = rows * d;
    float *gate, *up, *dh;
    wild = shape % 2;
    gate = values(size, 6); up = values(size, 2); dh = values(size, 1);
    for (int place = 0; place < 3; place++) { /* results apart; in the place of gate, up and dh; h not wanted */
        llmpar_swiglu_args f;
        llmpar_swiglu_backward_args b;
        memset(&f, 0, sizeof f);
        f.rows = rows; f.dim = d; f.ld_in = ld_in; f.ld_out = place == 1 ? ld_in : ld_out; f.dtype = stored;
        f.gate = put(stored, gate, rows, d, ld_in); f.up = put(stored, up, rows, d, ld_in);
        f.h = place == 1 ? (void *)(uintptr_t)f.gate : put(stored, NULL, rows, d, ld_out);
        CHECK_OK(device->swiglu(device, NULL, &f));
        take(f.h, rows, d, f.ld_out);
        ops_release();
        memset(&b, 0, sizeof b);
        b.rows = rows; b.dim = d; b.ld_in = ld_in; b.ld_out = ld_out; b.dtype = stored;
        b.gate = put(stored, gate, rows, d, ld_in); b.up = put(stored, up, rows, d, ld_in); b.dh = put(stored, dh, rows, d, ld_out);
        b.dgate = place == 1 ? (void *)(uintptr_t)b.gate : put(stored, NULL, rows, d, ld_in);
        b.dup = place == 1 ? (void *)(uintptr_t)b.up : put(stored, NULL, rows, d, ld_in);
        b.h = place == 1 ? (void *)(uintptr_t)b.dh : place == 2 ? NULL : put(stored, NULL, rows, d, ld_out);
        CHECK_OK(device->swiglu_backward(device, NULL, &b));
        take(b.dgate, rows, d, ld_in); take(b.dup, rows, d, ld_in);
        if (b.h) take(b.h, rows, d, ld_out);
        ops_release();
    }
    wild = 0;
    free(gate); free(up); free(dh);
}
TEST(swiglu) { everywhere("swiglu", run_swiglu, DIMS); }

static void run_embedding(int shape)
{
    int64_t d = dims[shape], vocabulary = 11, v_begin = 3, v_local = 6, batch = 4, t = 7, rows = batch * t;
    float *table = values(v_local * d, 1), *dout = values(rows * d, 1);
    int32_t ids[28];
    llmpar_embedding_args f;
    llmpar_embedding_backward_args b;
    char *memory;
    for (int i = 0; i < 28; i++) ids[i] = (int32_t)(draw() % (uint32_t)vocabulary);
    memset(&f, 0, sizeof f);
    f.rows = rows; f.dim = d; f.v_begin = v_begin; f.v_local = v_local; f.ids = ids; f.dtype = stored;
    f.table = put(stored, table, 1, v_local * d, v_local * d); f.out = put(stored, NULL, 1, rows * d, rows * d);
    CHECK_OK(device->embedding(device, NULL, &f));
    take(f.out, 1, rows * d, rows * d);
    ops_release();
    memset(&b, 0, sizeof b);
    b.tokens.batch = batch; b.tokens.t = b.tokens.t_total = t; b.tokens.leaves = 2; b.tokens.canon = 8;
    b.dim = d; b.v_begin = v_begin; b.v_local = v_local; b.ids = ids; b.dtype = stored;
    b.dout = put(stored, dout, 1, rows * d, rows * d); b.dtable = put_sum(NULL, v_local * d);
    b.workspace_bytes = device->embedding_backward_workspace(device, &b);
    b.workspace = workspace_of(b.workspace_bytes, &memory);
    CHECK_OK(device->embedding_backward(device, NULL, &b));
    take_sum(b.dtable, v_local * d);
    workspace_done(memory, b.workspace_bytes);
    ops_release();
    free(table); free(dout);
}
TEST(embedding) { everywhere("embedding", run_embedding, DIMS); }

/* ---- element by element ---- */

static void run_add_scale(int shape)
{
    static const int64_t counts[4] = { 1, 515, 16384, 40001 };
    int64_t n = counts[shape];
    float *x, *y;
    llmpar_add_args a;
    llmpar_scale_args s;
    wild = 1;
    x = values(n, 3); y = values(n, 1);
    for (int place = 0; place < 2; place++) {
        memset(&a, 0, sizeof a);
        a.count = (size_t)n; a.dtype = stored;
        a.a = put(stored, x, 1, n, n); a.b = put(stored, y, 1, n, n); a.out = place ? (void *)(uintptr_t)a.b : put(stored, NULL, 1, n, n);
        CHECK_OK(device->add(device, NULL, &a));
        take(a.out, 1, n, n);
        ops_release();
    }
    memset(&s, 0, sizeof s);
    s.count = (size_t)n; s.dtype = stored; s.factor = 1.0 / 3.0; s.x = put(stored, x, 1, n, n);
    CHECK_OK(device->scale(device, NULL, &s));
    take(s.x, 1, n, n);
    ops_release();
    wild = 0;
    free(x); free(y);
}
TEST(add_and_scale) { everywhere("add, scale", run_add_scale, 4); }

/* Rows cut in two at any column or row: swiglu, add, scale, rope, rmsnorm. */
TEST(rows_cut)
{
    enum { ROWS = 6, D = 700 };
    for (int type = 0; type < 2; type++) for (int level = (int)LLMPAR_CPU_PORTABLE; level <= (int)llmpar_cpu_best_level(); level++) for (int round = 0; round < 6; round++) {
        int64_t cut = 1 + ops_below(D - 1), row = 1 + ops_below(ROWS - 1), size = ROWS * D;
        float *x, *y, *w, *angles;
        llmpar_device *d = ops_device((llmpar_cpu_level)level, 1);
        uint16_t *whole, *parts;
        llmpar_swiglu_args s;
        llmpar_add_args a;
        llmpar_scale_args f;
        llmpar_rmsnorm_args n;
        llmpar_rope_args p;
        half = stored = type ? LLMPAR_F16 : LLMPAR_BF16;
        draw_state = (uint64_t)round;
        x = values(size, 3); y = values(size, 1); w = values(D, 1); angles = values(ROWS * D / 4, 1);
        whole = (uint16_t *)put(stored, NULL, 1, size, size); parts = (uint16_t *)put(stored, NULL, 1, size, size);
        memset(&s, 0, sizeof s);
        s.rows = ROWS; s.dim = s.ld_in = s.ld_out = D; s.dtype = stored; s.gate = put(stored, x, 1, size, size); s.up = put(stored, y, 1, size, size); s.h = whole;
        CHECK_OK(d->swiglu(d, NULL, &s));
        s.dim = cut; s.h = parts;
        CHECK_OK(d->swiglu(d, NULL, &s));
        s.dim = D - cut; s.h = parts + cut; s.gate = (const uint16_t *)s.gate + cut; s.up = (const uint16_t *)s.up + cut;
        CHECK_OK(d->swiglu(d, NULL, &s));
        CHECK_BYTES(parts, whole, (size_t)size * 2);
        memset(&a, 0, sizeof a);
        a.count = size; a.dtype = stored; a.a = put(stored, x, 1, size, size); a.b = put(stored, y, 1, size, size); a.out = whole;
        CHECK_OK(d->add(d, NULL, &a));
        a.count = (size_t)cut; a.out = parts;
        CHECK_OK(d->add(d, NULL, &a));
        a.count = (size_t)(size - cut); a.a = (const uint16_t *)a.a + cut; a.b = (const uint16_t *)a.b + cut; a.out = parts + cut;
        CHECK_OK(d->add(d, NULL, &a));
        CHECK_BYTES(parts, whole, (size_t)size * 2);
        memset(&f, 0, sizeof f);
        f.dtype = stored; f.factor = 0.7; f.count = size; f.x = whole;
        CHECK_OK(d->scale(d, NULL, &f));
        f.count = (size_t)cut; f.x = parts;
        CHECK_OK(d->scale(d, NULL, &f));
        f.count = (size_t)(size - cut); f.x = parts + cut;
        CHECK_OK(d->scale(d, NULL, &f));
        CHECK_BYTES(parts, whole, (size_t)size * 2);
        memset(&p, 0, sizeof p);
        p.batch = 1; p.t = ROWS; p.heads = 2; p.head_dim = D / 2; p.ld = D; p.dtype = stored; p.cosine = put_sum(angles, ROWS * D / 4); p.sine = put_sum(angles, ROWS * D / 4); p.x = whole;
        CHECK_OK(d->rope(d, NULL, &p));
        p.heads = 1; p.t = row; p.x = parts; /* the first head's first rows, its other rows, the second head */
        CHECK_OK(d->rope(d, NULL, &p));
        p.t = ROWS - row; p.position = row; p.x = parts + row * D;
        CHECK_OK(d->rope(d, NULL, &p));
        p.t = ROWS; p.position = 0; p.x = parts + D / 2;
        CHECK_OK(d->rope(d, NULL, &p));
        CHECK_BYTES(parts, whole, (size_t)size * 2);
        memset(&n, 0, sizeof n);
        n.rows = ROWS; n.dim = D; n.dtype = stored; n.eps = 1e-6; n.x = put(stored, x, 1, size, size); n.w = put(stored, w, 1, D, D); n.y = whole;
        CHECK_OK(d->rmsnorm(d, NULL, &n));
        n.rows = row; n.y = parts;
        CHECK_OK(d->rmsnorm(d, NULL, &n));
        n.rows = ROWS - row; n.y = parts + row * D; n.x = (const uint16_t *)n.x + row * D;
        CHECK_OK(d->rmsnorm(d, NULL, &n));
        CHECK_BYTES(parts, whole, (size_t)size * 2);
        ops_release();
        free(x); free(y); free(w); free(angles);
    }
}

/* Operations that run later: the arguments of a call are all it needs. */
TEST(deferred)
{
    debug_device later;
    llmpar_stream *stream;
    llmpar_device *d = ops_device(llmpar_cpu_best_level(), 1);
    uint16_t in[2][700], out[2][700];
    llmpar_add_args a;
    llmpar_cast_args c;
    float wide[700];
    draw_state = 1;
    for (int i = 0; i < 700; i++) { in[0][i] = llmpar_f32_to_bf16((float)(draw() % 1000) * 0.01f); in[1][i] = llmpar_f32_to_bf16((float)(draw() % 1000) * 0.3f); }
    debug_device_init(&later, d, DEBUG_LAZY);
    CHECK_OK(later.table.stream_create(&later.table, "s", &stream));
    memset(&a, 0, sizeof a);
    a.count = 700; a.a = in[0]; a.b = in[1]; a.out = out[0]; a.dtype = LLMPAR_BF16;
    CHECK_OK(later.table.add(&later.table, stream, &a));
    memset(&c, 0, sizeof c);
    c.count = 700; c.in = out[0]; c.in_dtype = LLMPAR_BF16; c.out = wide; c.out_dtype = LLMPAR_F32;
    CHECK_OK(later.table.cast(&later.table, stream, &c));
    memset(&a, 0x77, sizeof a);
    memset(&c, 0x77, sizeof c);
    CHECK_OK(later.table.synchronize(&later.table, stream));
    for (int i = 0; i < 700; i++) CHECK(bits_of(wide[i]) == (uint32_t)llmpar_f32_to_bf16(llmpar_bf16_to_f32(in[0][i]) + llmpar_bf16_to_f32(in[1][i])) << 16);
    later.table.stream_destroy(&later.table, stream);
}

/* ---- what is refused ---- */

static void refused(llmpar_status got, llmpar_status want, const char *text)
{
    CHECK_STATUS(got, want);
    CHECK_TEXT(ops_error.text, text);
    llmpar_error_clear(&ops_error);
}

TEST(refused_types)
{
    llmpar_device *d = ops_device(llmpar_cpu_best_level(), 1);
    float x[64];
    char memory[65536];
    llmpar_gemm_segment segment;
    llmpar_gemm_args g;
    memset(x, 0, sizeof x);
    memset(&segment, 0, sizeof segment);
    segment.a = segment.b = x; segment.lda = segment.ldb = segment.k = 2;
    memset(&g, 0, sizeof g);
    g.m = g.n = g.ldc = 2; g.c = x + 32; g.segments = &segment; g.segment_count = g.pieces = 1; g.kind = LLMPAR_GEMM_NT; g.workspace = memory; g.workspace_bytes = sizeof memory;
    g.dtype = LLMPAR_F32; g.out_dtype = LLMPAR_BF16;
    refused(d->gemm(d, NULL, &g), LLMPAR_ERR_UNSUPPORTED, "expected out_dtype f32 for dtype f32, got bf16");
    g.dtype = LLMPAR_BF16; g.out_dtype = LLMPAR_F16;
    refused(d->gemm(d, NULL, &g), LLMPAR_ERR_UNSUPPORTED, "expected out_dtype bf16 or f32 for dtype bf16, got f16");
    g.dtype = LLMPAR_F64; g.out_dtype = LLMPAR_F32;
    refused(d->gemm(d, NULL, &g), LLMPAR_ERR_UNSUPPORTED, "expected out_dtype f64 for dtype f64, got f32");
    g.dtype = LLMPAR_F16; g.out_dtype = LLMPAR_DTYPE_DEFAULT; g.accumulate = 1;
    refused(d->gemm(d, NULL, &g), LLMPAR_ERR_ARGUMENT, "accumulate needs out_dtype f32, got f16");
    g.accumulate = 0; g.dtype = LLMPAR_U8;
    refused(d->gemm(d, NULL, &g), LLMPAR_ERR_UNSUPPORTED, "got u8");
    g.dtype = LLMPAR_BF16; g.workspace_bytes = d->gemm_workspace(d, &g);
    CHECK_OK(d->gemm(d, NULL, &g));
    if (g.workspace_bytes) {
        g.workspace_bytes--;
        refused(d->gemm(d, NULL, &g), LLMPAR_ERR_ARGUMENT, "expected a workspace of");
    }
    g.dtype = LLMPAR_F32; g.out_dtype = LLMPAR_F32; g.workspace_bytes = sizeof memory; /* the type itself may be named */
    CHECK_OK(d->gemm(d, NULL, &g));
    for (int type = 0; type < 2; type++) {
        llmpar_dtype dtype = type ? LLMPAR_F16 : LLMPAR_BF16;
        llmpar_adamw_args a;
        llmpar_square_sum_args s;
        llmpar_tree_sum_args t;
        memset(&a, 0, sizeof a);
        a.dtype = dtype;
        refused(d->adamw(d, NULL, &a), LLMPAR_ERR_UNSUPPORTED, "expected f32 or f64");
        memset(&s, 0, sizeof s);
        s.dtype = dtype;
        refused(d->square_sum(d, NULL, &s), LLMPAR_ERR_UNSUPPORTED, "expected f32 or f64");
        memset(&t, 0, sizeof t);
        t.dtype = dtype; t.n = 1;
        refused(d->tree_sum(d, NULL, &t), LLMPAR_ERR_UNSUPPORTED, llmpar_dtype_name(dtype));
        refused(d->max(d, NULL, &t), LLMPAR_ERR_UNSUPPORTED, llmpar_dtype_name(dtype));
    }
}

TEST(refused_attention)
{
    llmpar_device *d = ops_device(llmpar_cpu_best_level(), 1);
    uint16_t x[64];
    float lse[4];
    char *memory = (char *)malloc(1 << 20);
    llmpar_attention_backward_args b;
    memset(x, 0, sizeof x);
    memset(lse, 0, sizeof lse);
    memset(&b, 0, sizeof b);
    b.forward.batch = 1; b.forward.tq = b.forward.tk = b.forward.tk_stride = 2; b.forward.heads = b.forward.kv_heads = 1; b.forward.head_dim = 4; b.forward.scale = 1; b.forward.dtype = LLMPAR_BF16;
    b.forward.ldq = b.forward.ldk = b.forward.ldv = b.forward.ldo = 4;
    b.forward.q = b.forward.k = b.forward.v = b.dout = x; b.forward.out = x; b.forward.lse = lse; b.dq = x + 16; b.dk = x + 24; b.dv = x + 32;
    b.forward.workspace = memory;
    b.forward.workspace_bytes = d->attention_backward_workspace(d, &b);
    CHECK(b.forward.workspace_bytes <= 1 << 20);
    CHECK_OK(d->attention_backward(d, NULL, &b));
    b.dkv_dtype = LLMPAR_F16;
    refused(d->attention_backward(d, NULL, &b), LLMPAR_ERR_ARGUMENT, "dkv_dtype f16 for dtype bf16, expected the same or f32");
    b.dkv_dtype = LLMPAR_F64;
    refused(d->attention_backward(d, NULL, &b), LLMPAR_ERR_ARGUMENT, "dkv_dtype f64");
    b.dkv_dtype = LLMPAR_BF16; b.forward.workspace_bytes--;
    refused(d->attention_backward(d, NULL, &b), LLMPAR_ERR_ARGUMENT, "attention_backward: workspace of");
    b.forward.workspace_bytes = d->attention_workspace(d, &b.forward) - 1;
    refused(d->attention(d, NULL, &b.forward), LLMPAR_ERR_ARGUMENT, "attention: workspace of");
    b.forward.workspace_bytes++;
    CHECK_OK(d->attention(d, NULL, &b.forward));
    b.forward.dtype = LLMPAR_I32;
    refused(d->attention(d, NULL, &b.forward), LLMPAR_ERR_UNSUPPORTED, "attention: dtype i32, expected f32, f64, bf16 or f16");
    free(memory);
}

TEST(all_given_back) { ops_close(); }

TEST_LIST(T_(casts_have_the_bits_of_dtype), T_(casts_there_and_back), T_(norm), T_(norm_tokens), T_(rope), T_(swiglu), T_(embedding), T_(add_and_scale), T_(rows_cut), T_(deferred),
          T_(refused_types), T_(refused_attention), T_(all_given_back))
