/* BF16 and F16 on the CPU device: every operation gives the bits of its f32 self on the widened operands, rounded once where a buffer is stored below f32; at every level, at odd shapes
   and places, with any number of threads. Each case is one function that runs twice: with 16-bit buffers, and with f32 ones whose results are rounded here, by base/dtype.h.
   What both store is logged bit by bit, and the logs have to be equal. */
#include "ops.h"
#include "debug_device.h"

/* How a case runs. */
static llmpar_device *device;
static llmpar_dtype half;     /* BF16 or F16: the values of all operands */
static llmpar_dtype stored;   /* of buffers that may be 16 bits wide: half, or F32 in the reference */
static int wild;              /* among the values are infinities, NaNs and numbers that overflow F16 */

static uint32_t *log_bits[2];
static int64_t log_count[2], log_room[2];
static int log_now;
static void log_add(uint32_t bits)
{
    if (log_count[log_now] == log_room[log_now]) {
        log_room[log_now] = 2 * log_room[log_now] + 4096;
        log_bits[log_now] = (uint32_t *)realloc(log_bits[log_now], (size_t)log_room[log_now] * sizeof(uint32_t));
    }
    log_bits[log_now][log_count[log_now]++] = bits;
}
static uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, sizeof bits); return bits; }
static float float_of(uint32_t bits) { float x; memcpy(&x, &bits, sizeof x); return x; }
static uint16_t rounded(float x, llmpar_dtype dtype) { return dtype == LLMPAR_BF16 ? llmpar_f32_to_bf16(x) : llmpar_f32_to_f16(x); }
static float widened(uint16_t x, llmpar_dtype dtype) { return dtype == LLMPAR_BF16 ? llmpar_bf16_to_f32(x) : llmpar_f16_to_f32(x); }

/* n values that 16 bits hold exactly; the generator is not that of the places, so both runs draw the same. */
static uint64_t draw_state;
static uint32_t draw(void)
{
    draw_state = draw_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(draw_state >> 33);
}
static float *values(int64_t n, double scale)
{
    float *x = (float *)malloc((size_t)(n > 0 ? n : 1) * sizeof(float));
    for (int64_t i = 0; i < n; i++) {
        uint32_t kind = draw() % 64;
        x[i] = (float)(((double)draw() / 1073741824.0 - 1.0) * scale);
        if (kind == 0) x[i] = -0.0f;
        if (kind == 1) x[i] *= 1e-6f; /* an F16 subnormal */
        if (wild && kind == 2) x[i] = 6e4f;
        if (wild && kind == 3) x[i] = float_of(draw() % 2 ? 0x7f800000u : 0x7fc12000u);
        x[i] = widened(rounded(x[i], half), half);
    }
    return x;
}

/* A buffer of rows x width, row distance ld, at an odd place between poison; x NULL: an output. */
static void *put(llmpar_dtype dtype, const float *x, int64_t rows, int64_t width, int64_t ld)
{
    void *base = ops_put(dtype, NULL, rows, width, ld);
    for (int64_t r = 0; x && r < rows; r++)
        for (int64_t j = 0; j < width; j++) {
            if (dtype == LLMPAR_F32) ((float *)base)[r * ld + j] = x[r * width + j];
            else ((uint16_t *)base)[r * ld + j] = rounded(x[r * width + j], dtype);
            if (dtype != LLMPAR_F32 && x[r * width + j] != x[r * width + j] && j % 2) ((uint16_t *)base)[r * ld + j] &= (uint16_t)(dtype == LLMPAR_BF16 ? 0xffbf : 0xfdff); /* signalling; the reference has the quiet one */
        }
    return base;
}
static void *put_sum(const float *x, int64_t n) { return put(LLMPAR_F32, x, 1, n, n); }
static void take(const void *base, int64_t rows, int64_t width, int64_t ld)
{
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < width; j++) log_add(stored == LLMPAR_F32 ? rounded(((const float *)base)[r * ld + j], half) : ((const uint16_t *)base)[r * ld + j]);
}
static void take_sum(const void *base, int64_t n) { for (int64_t i = 0; i < n; i++) { float x; memcpy(&x, (const char *)base + i * 4, 4); log_add(bits_of(x)); } }

/* The two runs of a case. */
static void both(const char *name, void (*run)(int shape), int shape, llmpar_cpu_level level, int threads)
{
    for (log_now = 0; log_now < 2; log_now++) {
        device = ops_device(level, log_now ? threads : 1);
        stored = log_now ? half : LLMPAR_F32;
        log_count[log_now] = 0;
        draw_state = (uint64_t)shape * 77 + 5;
        run(shape);
    }
    if (log_count[0] != log_count[1] || log_count[0] == 0) TEST_FAIL("%s %d: %ld results and %ld", name, shape, (long)log_count[0], (long)log_count[1]);
    else for (int64_t i = 0; i < log_count[0]; i++)
        if (log_bits[0][i] != log_bits[1][i]) { TEST_FAIL("%s %d, %s %s, %d threads: result %ld of %ld is %08x, want %08x", name, shape, llmpar_cpu_level_name(level), llmpar_dtype_name(half), threads, (long)i, (long)log_count[0], log_bits[1][i], log_bits[0][i]); return; }
}
static void everywhere(const char *name, void (*run)(int shape), int shapes)
{
    for (int type = 0; type < 2; type++) for (int level = (int)LLMPAR_CPU_PORTABLE; level <= (int)llmpar_cpu_best_level(); level++) for (int shape = 0; shape < shapes; shape++) {
        half = type ? LLMPAR_F16 : LLMPAR_BF16;
        both(name, run, shape, (llmpar_cpu_level)level, 1 + shape % 3);
    }
    free(log_bits[0]); free(log_bits[1]);
    memset(log_bits, 0, sizeof log_bits);
    memset(log_room, 0, sizeof log_room);
}
static const int64_t dims[8] = { 1, 7, 16, 33, 130, 517, 1030, 2049 }; /* kernels widen 512 elements at a time */
enum { DIMS = 8 };

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

/* ---- gemm ---- */

typedef struct product { llmpar_gemm_kind kind; int64_t m, n, k; int32_t pieces, segments; } product; /* segments a piece */
static void *workspace_of(size_t bytes, char **memory) /* exactly so many, at an odd place, poison behind them */
{
    *memory = (char *)malloc(bytes + 64);
    memset(*memory, 0xff, bytes + 64);
    return *memory + 5;
}
static void workspace_done(char *memory, size_t bytes)
{
    for (size_t i = 5 + bytes; i < bytes + 64; i++) if (memory[i] != (char)0xff) { TEST_FAIL("byte %ld behind a workspace of %ld was written", (long)(i - 5 - bytes), (long)bytes); break; }
    free(memory);
}
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
    everywhere("gemm", run_gemm, (int)(sizeof products / sizeof products[0]));
    everywhere("gemm with infinities", run_gemm_wild, 5);
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
            if (k1 > p.k) k1 = p.k;
            multiply(&p, a, b, LLMPAR_F32, chain, p.n, k > 0, 0, p.m, 0, p.n, k, k1);
        }
        for (int64_t i = 0; i < p.m * p.n; i++) if (rounded(chain[i], half) != whole[i]) { TEST_FAIL("element %ld of a product cut in k", (long)i); break; }
        ops_release();
        free(a); free(b);
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
    static const int64_t halves[6] = { 1, 3, 8, 17, 64, 700 };
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
TEST(attention) { everywhere("attention", run_attention, ATTENTIONS); }

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

TEST_LIST(T_(casts_have_the_bits_of_dtype), T_(casts_there_and_back), T_(gemm), T_(gemm_cut), T_(norm), T_(norm_tokens), T_(rope), T_(swiglu), T_(embedding), T_(cross_entropy), T_(cross_entropy_cut), T_(attention), T_(attention_cut),
    T_(add_and_scale), T_(rows_cut), T_(deferred), T_(refused_types), T_(refused_attention), T_(all_given_back))
