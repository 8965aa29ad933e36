/* The matrix product of the CUDA device: EXACT against the CPU's in f64 within its bound, and its bits: the same whatever the pieces a rank holds, where an element lies, how the operands lie, and where a chain is cut; FAST likewise within its bound. */
#include "cuda.h"

enum { MAX_SEGMENTS = 256 };

/* A product on the host: operands as [m, k] and [n, k], segment by segment, in doubles that dtype holds exactly. */
typedef struct product {
    int64_t m, n;
    int32_t pieces, count;
    llmpar_dtype dtype;
    int64_t k[MAX_SEGMENTS];
    int32_t piece[MAX_SEGMENTS];
    double *a[MAX_SEGMENTS], *b[MAX_SEGMENTS];
} product;

static void product_begin(product *p, llmpar_dtype dtype, int64_t m, int64_t n, int32_t pieces)
{
    memset(p, 0, sizeof *p);
    p->dtype = dtype;
    p->m = m;
    p->n = n;
    p->pieces = pieces;
}
static void product_segment(product *p, int32_t piece, int64_t k)
{
    p->k[p->count] = k;
    p->piece[p->count] = piece;
    p->a[p->count] = ops_random(p->m * k, 1.0);
    p->b[p->count] = ops_random(p->n * k, 1.0);
    cuda_round(p->dtype, p->a[p->count], p->m * k);
    cuda_round(p->dtype, p->b[p->count], p->n * k);
    p->count++;
}
/* Up to three segments a piece, some of them and some pieces empty. */
static void product_random(product *p, llmpar_dtype dtype, int64_t m, int64_t n, int32_t pieces, int64_t max_k)
{
    product_begin(p, dtype, m, n, pieces);
    for (int32_t piece = 0; piece < pieces; piece++)
        for (int64_t parts = ops_below(4) == 0 ? ops_below(4) : 1; parts > 0; parts--) product_segment(p, piece, ops_below(8) == 0 ? 0 : 1 + ops_below(max_k));
}
static void product_end(product *p)
{
    for (int32_t s = 0; s < p->count; s++) {
        free(p->a[s]);
        free(p->b[s]);
    }
}

static double *turned(const double *x, int64_t rows, int64_t width)
{
    double *y = ops_zeros(rows * width);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < width; j++) y[j * rows + i] = x[i * width + j];
    return y;
}

/* How operands and result lie in memory. */
typedef struct lying { llmpar_gemm_kind kind; int gap, off; } lying; /* gap: random distances behind rows below it; off: so many elements off a 256-byte boundary */

static void *lay(llmpar_dtype dtype, const double *x, int64_t rows, int64_t k, int by_k, const lying *how, int64_t *ld)
{
    double *y = by_k ? turned(x, rows, k) : NULL;
    int64_t width = by_k ? rows : k;
    *ld = width + (how->gap ? ops_below(how->gap) : 0);
    void *out = cuda_put(cuda_gpu, dtype, y ? y : x, by_k ? k : rows, width, *ld, how->off);
    free(y);
    return out;
}

/* So many more rows than a call has its workspace is asked for. */
static int64_t rows_ahead;

/* The call on `device` with rows [i0, i0 + m) of a, [j0, j0 + n) of b and pieces [first, first + pieces); c[m, n] as doubles. start: c before the call, then it accumulates. */
static void run_part(llmpar_device *device, const product *p, const lying *how, llmpar_dtype out_dtype, const double *start, int64_t i0, int64_t m, int64_t j0, int64_t n, int32_t first, int32_t pieces, double *out)
{
    llmpar_gemm_segment segments[MAX_SEGMENTS];
    llmpar_gemm_args args;
    llmpar_device *before = cuda_gpu;
    memset(&args, 0, sizeof args);
    memset(segments, 0, sizeof segments);
    cuda_gpu = device; /* where buffers are put */
    for (int32_t s = 0; s < p->count; s++) {
        llmpar_gemm_segment *to = &segments[args.segment_count];
        if (p->piece[s] < first || p->piece[s] >= first + pieces) continue;
        to->k = p->k[s];
        to->piece = p->piece[s] - first;
        to->a = lay(p->dtype, p->a[s] + i0 * p->k[s], m, p->k[s], how->kind == LLMPAR_GEMM_TN, how, &to->lda);
        to->b = lay(p->dtype, p->b[s] + j0 * p->k[s], n, p->k[s], how->kind != LLMPAR_GEMM_NT, how, &to->ldb);
        args.segment_count++;
    }
    args.segments = segments;
    args.m = m;
    args.n = n;
    args.pieces = pieces;
    args.kind = how->kind;
    args.dtype = p->dtype;
    args.out_dtype = out_dtype;
    args.accumulate = start != NULL;
    args.ldc = n + (how->gap ? ops_below(how->gap) : 0);
    args.c = cuda_put(device, out_dtype, start, m, n, args.ldc, how->off);
    args.m += rows_ahead;
    args.workspace_bytes = device->gemm_workspace(device, &args);
    args.m = m;
    args.workspace = cuda_put_bytes(device, 1, NULL, 1, (int64_t)args.workspace_bytes, (int64_t)args.workspace_bytes, how->off);
    if (!args.workspace_bytes) args.workspace = NULL;
    CUDA_OK(device->gemm(device, NULL, &args));
    cuda_get(args.c, out);
    cuda_done();
    cuda_gpu = before;
}
static void run(llmpar_device *device, const product *p, const lying *how, llmpar_dtype out_dtype, const double *start, double *out) { run_part(device, p, how, out_dtype, start, 0, p->m, 0, p->n, 0, p->pieces, out); }

/* In f64 on the CPU; size: of the absolute values. */
static void specification(const product *p, const double *start, double *want, double *size)
{
    for (int way = 0; way < 2; way++) {
        llmpar_gemm_segment segments[MAX_SEGMENTS];
        llmpar_gemm_args args;
        double *c = way ? size : want, *copies[2 * MAX_SEGMENTS];
        int copy_count = 0;
        memset(&args, 0, sizeof args);
        memset(segments, 0, sizeof segments);
        for (int32_t s = 0; s < p->count; s++) {
            const double *in[2] = {p->a[s], p->b[s]};
            for (int o = 0; o < 2; o++) {
                int64_t count = (o ? p->n : p->m) * p->k[s];
                double *copy = copies[copy_count++] = ops_zeros(count);
                for (int64_t i = 0; i < count; i++) copy[i] = way ? fabs(in[o][i]) : in[o][i];
            }
            segments[s].a = copies[copy_count - 2];
            segments[s].b = copies[copy_count - 1];
            segments[s].lda = segments[s].ldb = segments[s].k = p->k[s];
            segments[s].piece = p->piece[s];
        }
        for (int64_t i = 0; start && i < p->m * p->n; i++) c[i] = way ? fabs(start[i]) : start[i];
        args.m = p->m;
        args.n = args.ldc = p->n;
        args.c = c;
        args.segments = segments;
        args.segment_count = p->count;
        args.pieces = p->pieces;
        args.kind = LLMPAR_GEMM_NT;
        args.dtype = LLMPAR_F64;
        args.accumulate = start != NULL;
        CHECK_OK(cuda_cpu->gemm(cuda_cpu, NULL, &args));
        while (copy_count > 0) free(copies[--copy_count]);
    }
}

/* Each step of a chain is off by at most 2^-24 of what has been summed; inside a link of the tensor core 17 terms are added, each cut off at 2^-23 of the largest. Both are below (17/16 k + 17 links' ends) 2^-23 of the absolute
   sum; the tree adds a rounding a level; c is rounded once. tf32 (FAST) rounds operands to 11 bits. */
static void check_near(const char *what, const product *p, const double *got, const double *want, const double *size, llmpar_dtype out_dtype, int tf32)
{
    double steps = 8;
    for (int32_t s = 0; s < p->count; s++) steps += 17.0 / 16.0 * (double)p->k[s] + 17.0;
    for (int64_t i = 0; i < p->m * p->n; i++) {
        double bound = steps * 1.1920928955078125e-7 * size[i] + (tf32 ? 0.001 * size[i] : 0) + cuda_epsilon(out_dtype) * fabs(want[i]) * 1.01 + 1e-37 + (out_dtype == LLMPAR_F16 ? 3e-8 : 0);
        if (fabs(got[i] - want[i]) <= bound) continue;
        TEST_FAIL("%s: m=%d n=%d pieces=%d segments=%d %s to %s: c[%d, %d] is %.9g, want %.9g within %.3g", what, (int)p->m, (int)p->n, (int)p->pieces, (int)p->count, llmpar_dtype_name(p->dtype), llmpar_dtype_name(out_dtype),
                  (int)(i / p->n), (int)(i % p->n), got[i], want[i], bound);
        return;
    }
}

static const llmpar_dtype dtypes[3] = {LLMPAR_F32, LLMPAR_BF16, LLMPAR_F16};
static const llmpar_gemm_kind kinds[3] = {LLMPAR_GEMM_NT, LLMPAR_GEMM_NN, LLMPAR_GEMM_TN};

static void against_specification(llmpar_device *device, const product *p, const lying *how, llmpar_dtype out_dtype, int accumulate, int tf32)
{
    int64_t count = p->m * p->n;
    double *start = accumulate ? ops_random(count, 1.0) : NULL, *want = ops_zeros(count), *size = ops_zeros(count), *got = ops_zeros(count);
    specification(p, start, want, size);
    run(device, p, how, out_dtype, start, got);
    check_near(device->name, p, got, want, size, out_dtype, tf32);
    free(start);
    free(want);
    free(size);
    free(got);
}

/* Every kind and type; aligned and not, gaps and none, all of a tile and little of it. */
static void random_products(llmpar_device *device, int rounds, int tf32)
{
    for (int round = 0; round < rounds; round++) {
        llmpar_dtype dtype = dtypes[round % 3];
        int large = !cuda_small() && round % 4 == 0, wide = round % 8 == 0, thin = round % 5 == 1;
        int32_t pieces = ops_below(3) ? 1 + (int32_t)ops_below(9) : 1;
        lying how = {kinds[round / 3 % 3], 0, 0};
        product p;
        if (ops_below(2)) how.gap = 9;
        else if (ops_below(2)) how.gap = 0;
        how.off = ops_below(2) ? (int)ops_below(8) : 0;
        product_random(&p, dtype, 1 + ops_below(large ? 700 : thin ? 4 : wide ? 200 : 70), 1 + ops_below(large ? 900 : wide ? 300 : 80), pieces, large ? 400 : 80);
        against_specification(device, &p, &how, dtype != LLMPAR_F32 && ops_below(2) ? LLMPAR_F32 : dtype, 0, tf32);
        if (pieces == 1) against_specification(device, &p, &how, LLMPAR_F32, 1, tf32);
        product_end(&p);
    }
}

TEST(exact_products)
{
    CUDA_OPEN();
    random_products(cuda_gpu, cuda_small() ? test_rounds(27) : 270, 0);
}

/* All sizes around tiles and links, aligned as a model's matrices are. */
TEST(exact_aligned)
{
    CUDA_OPEN();
    for (int d = 0; d < 3; d++)
        for (int kind = 0; kind < 3; kind++) {
            lying how = {kinds[kind], 0, 0};
            product p;
            product_begin(&p, dtypes[d], 136, 264, 3);
            product_segment(&p, 0, 48);
            product_segment(&p, 1, 32);
            product_segment(&p, 1, 64);
            product_segment(&p, 2, 16);
            against_specification(cuda_gpu, &p, &how, dtypes[d], 0, 0);
            product_end(&p);
        }
}

static double tree(const double *leaf, int64_t n, int64_t stride)
{
    if (n == 1) return leaf[0];
    int64_t split = llmpar_tree_split(n);
    return (double)((float)tree(leaf, split, stride) + (float)tree(leaf + split * stride, n - split, stride));
}

/* Ranks with a subtree of the pieces each, and the tree over the ranks: the bits of one rank with all of them. */
TEST(pieces_over_ranks)
{
    CUDA_OPEN();
    for (int d = 0; d < 3; d++) {
        lying how = {kinds[d], 5, d};
        product p;
        int64_t count;
        double *whole, *parts;
        product_random(&p, dtypes[d], 40, 70, 8, 70);
        count = p.m * p.n;
        whole = ops_zeros(count);
        parts = ops_zeros(8 * count);
        run(cuda_gpu, &p, &how, LLMPAR_F32, NULL, whole);
        for (int32_t ranks = 2; ranks <= 8; ranks *= 2) {
            for (int32_t r = 0; r < ranks; r++) run_part(cuda_gpu, &p, &how, LLMPAR_F32, NULL, 0, p.m, 0, p.n, r * 8 / ranks, 8 / ranks, parts + r * count);
            for (int64_t i = 0; i < count; i++) parts[i] = tree(parts + i, ranks, count);
            cuda_same("pieces over ranks", parts, whole, count);
        }
        free(whole);
        free(parts);
        product_end(&p);
    }
}

/* Any number of pieces: the tree of single pieces. */
TEST(trees)
{
    CUDA_OPEN();
    for (int32_t pieces = 2; pieces <= (cuda_small() ? 13 : 40); pieces += cuda_small() ? 1 + (int32_t)ops_below(3) : 1) {
        lying how = {LLMPAR_GEMM_NN, 3, 0};
        product p;
        double whole[9], parts[9 * 40];
        product_random(&p, dtypes[pieces % 3], 3, 3, pieces, 40);
        run(cuda_gpu, &p, &how, LLMPAR_F32, NULL, whole);
        for (int32_t r = 0; r < pieces; r++) run_part(cuda_gpu, &p, &how, LLMPAR_F32, NULL, 0, 3, 0, 3, r, 1, parts + r * 9);
        for (int i = 0; i < 9; i++) parts[i] = tree(parts + i, pieces, 9);
        cuda_same("a tree", parts, whole, 9);
        product_end(&p);
    }
}

/* A part of the rows and columns alone, at other places, other strides, as another kind: the same bits. */
TEST(position)
{
    CUDA_OPEN();
    for (int d = 0; d < 3; d++) {
        product p;
        double *whole, *part, *want;
        product_random(&p, dtypes[d], 150, 280, 3, 60);
        whole = ops_zeros(p.m * p.n);
        part = ops_zeros(p.m * p.n);
        want = ops_zeros(p.m * p.n);
        for (int turn = 0; turn < 3; turn++) {
            lying how = {kinds[turn], turn ? 7 : 0, turn ? turn : 0};
            int64_t i0 = turn ? ops_below(140) : 0, j0 = turn ? ops_below(270) : 0, m = turn ? 1 + ops_below(p.m - i0) : p.m, n = turn ? 1 + ops_below(p.n - j0) : p.n;
            if (!turn) {
                run(cuda_gpu, &p, &how, LLMPAR_F32, NULL, whole);
                continue;
            }
            run_part(cuda_gpu, &p, &how, LLMPAR_F32, NULL, i0, m, j0, n, 0, p.pieces, part);
            for (int64_t i = 0; i < m * n; i++) want[i] = whole[(i0 + i / n) * p.n + j0 + i % n];
            cuda_same("a part", part, want, m * n);
        }
        free(whole);
        free(part);
        free(want);
        product_end(&p);
    }
}

/* A chain that goes on from c where it was cut at a link's end: the bits of the whole. Links are 16 k below f32, 1 in f32. */
TEST(accumulate)
{
    CUDA_OPEN();
    for (int d = 0; d < 3; d++) {
        int64_t cut = d ? 48 : 37, k = 91;
        lying how = {kinds[d], 4, 1};
        product p, first, last;
        double *whole, *half;
        product_begin(&p, dtypes[d], 30, 45, 1);
        product_segment(&p, 0, k);
        product_begin(&first, dtypes[d], 30, 45, 1);
        product_segment(&first, 0, cut);
        product_begin(&last, dtypes[d], 30, 45, 1);
        product_segment(&last, 0, k - cut);
        for (int o = 0; o < 2; o++)
            for (int64_t i = 0; i < (o ? p.n : p.m); i++) {
                memcpy((o ? first.b : first.a)[0] + i * cut, (o ? p.b : p.a)[0] + i * k, (size_t)cut * sizeof(double));
                memcpy((o ? last.b : last.a)[0] + i * (k - cut), (o ? p.b : p.a)[0] + i * k + cut, (size_t)(k - cut) * sizeof(double));
            }
        whole = ops_zeros(p.m * p.n);
        half = ops_zeros(p.m * p.n);
        run(cuda_gpu, &p, &how, LLMPAR_F32, NULL, whole);
        run(cuda_gpu, &first, &how, LLMPAR_F32, NULL, half);
        run(cuda_gpu, &last, &how, LLMPAR_F32, half, half);
        cuda_same("accumulate", half, whole, p.m * p.n);
        free(whole);
        free(half);
        product_end(&p);
        product_end(&first);
        product_end(&last);
    }
}

/* A bias: one element in all rows of a, by stride 0. off: an alignment for which the library may have nothing. */
static void bias(llmpar_device *device)
{
    for (int turn = 0; turn < 6; turn++) {
        enum { M = 9, N = 34, K = 24 };
        int d = turn / 2, off = turn % 2;
        llmpar_gemm_segment segments[2];
        llmpar_gemm_args args;
        llmpar_device *before = cuda_gpu;
        double one = 1.0, *want = ops_zeros(M * N), *size = ops_zeros(M * N), *got = ops_zeros(M * N);
        product p;
        memset(&args, 0, sizeof args);
        memset(segments, 0, sizeof segments);
        product_begin(&p, dtypes[d], M, N, 1);
        product_segment(&p, 0, K);
        product_segment(&p, 0, 1);
        for (int i = 0; i < M; i++) p.a[1][i] = 1.0;
        specification(&p, NULL, want, size);
        cuda_gpu = device;
        segments[0].a = cuda_put(device, dtypes[d], p.a[0], M, K, K, off);
        segments[0].b = cuda_put(device, dtypes[d], p.b[0], N, K, K, 0);
        segments[0].k = segments[0].lda = segments[0].ldb = K;
        segments[1].a = cuda_put(device, dtypes[d], &one, 1, 1, 1, 0);
        segments[1].b = cuda_put(device, dtypes[d], p.b[1], 1, N, N, 0);
        segments[1].k = segments[1].ldb = 1;
        args.m = M;
        args.n = args.ldc = N;
        args.c = cuda_put(device, dtypes[d], NULL, M, N, N, 0);
        args.segments = segments;
        args.segment_count = 2;
        args.pieces = 1;
        args.kind = LLMPAR_GEMM_NT;
        args.dtype = dtypes[d];
        args.workspace_bytes = device->gemm_workspace(device, &args);
        args.workspace = cuda_put_bytes(device, 1, NULL, 1, (int64_t)args.workspace_bytes, (int64_t)args.workspace_bytes, 3);
        CUDA_OK(device->gemm(device, NULL, &args));
        cuda_get(args.c, got);
        check_near("bias", &p, got, want, size, dtypes[d], 0);
        cuda_done();
        cuda_gpu = before;
        product_end(&p);
        free(want);
        free(size);
        free(got);
    }
}

TEST(exact_bias)
{
    CUDA_OPEN();
    bias(cuda_gpu);
}

/* Nothing to add is +0 in every bit; k = 0 with accumulate leaves c. */
static void nothing(llmpar_device *device)
{
    for (int d = 0; d < 3; d++)
        for (int32_t pieces = 1; pieces <= 3; pieces += 2) {
            lying how = {LLMPAR_GEMM_NT, 2, 1};
            double got[35], want[35];
            product p;
            memset(want, 0, sizeof want);
            product_begin(&p, dtypes[d], 5, 7, pieces);
            product_segment(&p, pieces / 2, 0);
            run(device, &p, &how, dtypes[d], NULL, got);
            cuda_same("nothing", got, want, 35);
            if (pieces == 1) {
                double *start = ops_random(35, 1.0);
                run(device, &p, &how, LLMPAR_F32, start, got);
                cuda_same("nothing to accumulate", got, start, 35);
                free(start);
            }
            product_end(&p);
        }
}

/* Underflow leaves -0 in a chain; an empty piece beside it makes +0. */
TEST(zeros)
{
    lying how = {LLMPAR_GEMM_NT, 0, 0};
    double got = 1, want = 0;
    product p;
    CUDA_OPEN();
    nothing(cuda_gpu);
    product_begin(&p, LLMPAR_F32, 1, 1, 2);
    product_segment(&p, 1, 1);
    p.a[0][0] = 1e-30;
    p.b[0][0] = -1e-30;
    cuda_round(LLMPAR_F32, p.a[0], 1);
    cuda_round(LLMPAR_F32, p.b[0], 1);
    run(cuda_gpu, &p, &how, LLMPAR_F32, NULL, &got);
    cuda_same("an empty piece", &got, &want, 1);
    product_end(&p);
}

/* More segments than a launch takes; leaves of one matrix, of which there may be any number. */
static void many(llmpar_device *device)
{
    for (int d = 0; d < 2; d++) {
        lying how = {LLMPAR_GEMM_TN, 0, 0};
        product p;
        product_begin(&p, dtypes[d], 8, 8, 4);
        for (int32_t s = 0; s < 200; s++) product_segment(&p, s / 50, 1 + ops_below(6));
        if (cuda_buffer_count == 0) { /* 400 operands are more than the helper keeps: all in one buffer each */
            double *a = ops_zeros(200 * 6 * 8), *b = ops_zeros(200 * 6 * 8), *want = ops_zeros(64), *size = ops_zeros(64), *got = ops_zeros(64);
            llmpar_gemm_segment segments[200];
            llmpar_gemm_args args;
            size_t element = llmpar_dtype_size(dtypes[d]);
            llmpar_device *before = cuda_gpu;
            memset(&args, 0, sizeof args);
            memset(segments, 0, sizeof segments);
            specification(&p, NULL, want, size);
            for (int32_t s = 0; s < 200; s++)
                for (int64_t k = 0; k < p.k[s]; k++)
                    for (int i = 0; i < 8; i++) {
                        a[(s * 6 + k) * 8 + i] = p.a[s][i * p.k[s] + k];
                        b[(s * 6 + k) * 8 + i] = p.b[s][i * p.k[s] + k];
                    }
            cuda_gpu = device;
            const char *at_a = (const char *)cuda_put(device, dtypes[d], a, 1200, 8, 8, 0), *at_b = (const char *)cuda_put(device, dtypes[d], b, 1200, 8, 8, 0);
            for (int32_t s = 0; s < 200; s++) {
                segments[s].a = at_a + (size_t)s * 48 * element;
                segments[s].b = at_b + (size_t)s * 48 * element;
                segments[s].lda = segments[s].ldb = 8;
                segments[s].k = p.k[s];
                segments[s].piece = p.piece[s];
            }
            args.m = args.n = args.ldc = 8;
            args.c = cuda_put(device, LLMPAR_F32, NULL, 8, 8, 8, 0);
            args.segments = segments;
            args.segment_count = 200;
            args.pieces = 4;
            args.kind = how.kind;
            args.dtype = dtypes[d];
            args.out_dtype = LLMPAR_F32;
            args.workspace_bytes = device->gemm_workspace(device, &args);
            args.workspace = cuda_put_bytes(device, 1, NULL, 1, (int64_t)args.workspace_bytes, (int64_t)args.workspace_bytes, 5);
            CUDA_OK(device->gemm(device, NULL, &args));
            cuda_get(args.c, got);
            check_near("many segments", &p, got, want, size, LLMPAR_F32, 0);
            /* 150 leaves of 8 rows */
            args.segment_count = args.pieces = 150;
            for (int32_t s = 0; s < 150; s++) {
                segments[s].a = at_a + (size_t)s * 64 * element;
                segments[s].b = at_b + (size_t)s * 64 * element;
                segments[s].k = 8;
                segments[s].piece = s;
            }
            args.workspace_bytes = device->gemm_workspace(device, &args);
            args.workspace = cuda_put_bytes(device, 1, NULL, 1, (int64_t)args.workspace_bytes, (int64_t)args.workspace_bytes, 1);
            CUDA_OK(device->gemm(device, NULL, &args));
            cuda_get(args.c, got);
            for (int i = 0; i < 64; i++) {
                want[i] = size[i] = 0;
                for (int k = 0; k < 1200; k++) {
                    want[i] += a[k * 8 + i / 8] * b[k * 8 + i % 8];
                    size[i] += fabs(a[k * 8 + i / 8] * b[k * 8 + i % 8]);
                }
            }
            cuda_near("leaves", got, want, 64, 1e-4, 1e-4);
            cuda_done();
            cuda_gpu = before;
            free(a);
            free(b);
            free(want);
            free(size);
            free(got);
        }
        product_end(&p);
    }
}

TEST(exact_many)
{
    CUDA_OPEN();
    many(cuda_gpu);
}

TEST(refusals)
{
    llmpar_gemm_segment segment;
    llmpar_gemm_args args, ok;
    float *x;
    CUDA_OPEN();
    memset(&segment, 0, sizeof segment);
    memset(&ok, 0, sizeof ok);
    x = (float *)cuda_put(cuda_gpu, LLMPAR_F32, NULL, 16, 16, 16, 0);
    segment.a = segment.b = x;
    segment.k = segment.lda = segment.ldb = 4;
    ok.m = ok.n = ok.ldc = 4;
    ok.c = x + 128;
    ok.segments = &segment;
    ok.segment_count = ok.pieces = 1;
    ok.kind = LLMPAR_GEMM_NT;
    ok.dtype = LLMPAR_F32;
#define REFUSED(change, want, text) do { args = ok; change; CUDA_REFUSED(cuda_gpu->gemm(cuda_gpu, NULL, &args), want, text); } while (0)
    REFUSED(args.kind = LLMPAR_GEMM_DEFAULT, LLMPAR_ERR_ARGUMENT, "kind 0");
    REFUSED(args.dtype = LLMPAR_F64, LLMPAR_ERR_UNSUPPORTED, "f64");
    REFUSED(args.out_dtype = LLMPAR_BF16, LLMPAR_ERR_UNSUPPORTED, "bf16");
    REFUSED(args.m = -1, LLMPAR_ERR_SHAPE, "m = -1");
    REFUSED(args.ldc = 3, LLMPAR_ERR_SHAPE, "ldc = 3");
    REFUSED(args.pieces = 0, LLMPAR_ERR_ARGUMENT, "1 piece");
    REFUSED((args.pieces = 2, args.accumulate = 1), LLMPAR_ERR_ARGUMENT, "exactly 1 piece");
    REFUSED((args.dtype = LLMPAR_BF16, args.accumulate = 1), LLMPAR_ERR_ARGUMENT, "accumulate needs out_dtype f32");
    segment.lda = 3;
    REFUSED((void)0, LLMPAR_ERR_SHAPE, "lda = 3");
    segment.lda = 4;
    segment.piece = 1;
    REFUSED((void)0, LLMPAR_ERR_ARGUMENT, "piece 1");
    REFUSED(args.pieces = 4, LLMPAR_ERR_ARGUMENT, "workspace");
    segment.piece = 0;
    segment.k = -1;
    REFUSED((void)0, LLMPAR_ERR_SHAPE, "k = -1");
#undef REFUSED
    args = ok;
    args.m = 0;
    segment.k = 4;
    CUDA_OK(cuda_gpu->gemm(cuda_gpu, NULL, &args));
    cuda_done();
}

/* Partial tiles all in the workspace, fewer stages. */
TEST(less_shared_memory)
{
    CUDA_OPEN();
    cuda_again("EMULATED_CUDA_CAPABILITY", "80", "exact_aligned");
    cuda_again("EMULATED_CUDA_CAPABILITY", "86", "trees");
}

static llmpar_device *fast_device(int tf32)
{
    llmpar_cuda_desc desc;
    llmpar_device *device = NULL;
    memset(&desc, 0, sizeof desc);
    desc.mode = LLMPAR_CUDA_FAST;
    desc.tf32 = tf32;
    desc.library_workspace = cuda_small() ? 1 << 16 : 0;
    CUDA_OK(llmpar_cuda_create(&cuda_ctx, &desc, &device));
    return device;
}

TEST(fast_products)
{
    CUDA_OPEN();
    for (int tf32 = 0; tf32 < 2; tf32++) {
        llmpar_device *device = fast_device(tf32);
        random_products(device, cuda_small() ? test_rounds(36) : 200, tf32);
        bias(device);
        nothing(device);
        many(device);
        llmpar_cuda_destroy(device);
    }
}

/* Pieces of one matrix are one product for the library; several matrices into c below f32 are rounded once. */
TEST(fast_groups)
{
    llmpar_device *device;
    CUDA_OPEN();
    device = fast_device(0);
    for (int d = 0; d < 3; d++)
        for (int kind = 0; kind < 3; kind++) {
            enum { M = 24, N = 40, K = 32 };
            llmpar_gemm_segment segments[8];
            llmpar_gemm_args args;
            double *want = ops_zeros(M * N), *size = ops_zeros(M * N), *got = ops_zeros(M * N), *x;
            size_t element = llmpar_dtype_size(dtypes[d]);
            llmpar_device *before = cuda_gpu;
            product p;
            lying how = {kinds[kind], 0, 0};
            product_begin(&p, dtypes[d], M, N, 1);
            product_segment(&p, 0, K);
            product_segment(&p, 0, K);
            specification(&p, NULL, want, size);
            memset(&args, 0, sizeof args);
            memset(segments, 0, sizeof segments);
            cuda_gpu = device;
            args.m = M;
            args.n = args.ldc = N;
            args.segments = segments;
            args.segment_count = 8;
            args.pieces = 4;
            args.kind = kinds[kind];
            args.dtype = dtypes[d];
            for (int o = 0; o < 2; o++) {
                int64_t lda, ldb;
                const char *a = (const char *)lay(dtypes[d], p.a[o], M, K, how.kind == LLMPAR_GEMM_TN, &how, &lda), *b = (const char *)lay(dtypes[d], p.b[o], N, K, how.kind != LLMPAR_GEMM_NT, &how, &ldb);
                for (int s = 0; s < 4; s++) { /* piece by piece, both matrices in turns */
                    llmpar_gemm_segment *to = &segments[2 * s + o];
                    int64_t at = s * K / 4;
                    to->a = a + (size_t)(how.kind == LLMPAR_GEMM_TN ? at * lda : at) * element;
                    to->b = b + (size_t)(how.kind == LLMPAR_GEMM_NT ? at : at * ldb) * element;
                    to->lda = lda;
                    to->ldb = ldb;
                    to->k = K / 4;
                    to->piece = s;
                }
            }
            args.c = cuda_put(device, dtypes[d], NULL, M, N, N, 0);
            for (int with = 0; with < 2; with++) { /* without the workspace an EXACT kernel does it */
                args.workspace_bytes = with ? device->gemm_workspace(device, &args) : 0;
                args.workspace = args.workspace_bytes ? cuda_put_bytes(device, 1, NULL, 1, (int64_t)args.workspace_bytes, (int64_t)args.workspace_bytes, 3) : NULL;
                cuda_set(args.c, NULL);
                CUDA_OK(device->gemm(device, NULL, &args));
                cuda_get(args.c, got);
                check_near("groups", &p, got, want, size, dtypes[d], 0);
            }
            x = NULL;
            free(x);
            cuda_done();
            cuda_gpu = before;
            product_end(&p);
            free(want);
            free(size);
            free(got);
        }
    llmpar_cuda_destroy(device);
}

/* What serves a number of rows serves fewer, as the ends of chunks have them: no call is refused, and none writes behind what it was told. */
TEST(fewer_rows_need_no_more)
{
    CUDA_OPEN();
    llmpar_device *devices[2];
    devices[0] = cuda_gpu;
    devices[1] = fast_device(0);
    for (int draw = 0; draw < 72; draw++) {
        llmpar_gemm_segment segments[200];
        llmpar_gemm_args args;
        llmpar_device *device = devices[draw / 36];
        memset(segments, 0, sizeof segments);
        memset(&args, 0, sizeof args);
        args.segments = segments;
        args.pieces = draw / 3 % 2 ? 8 : 1;
        args.segment_count = draw / 6 % 3 == 2 ? 200 : (draw / 6 % 3 + 1) * args.pieces;
        for (int32_t s = 0; s < args.segment_count; s++) {
            segments[s].piece = (int32_t)((int64_t)s * args.pieces / args.segment_count);
            segments[s].k = 96;
        }
        args.n = draw % 5 ? 100 : 5000;
        args.kind = kinds[draw % 3];
        args.dtype = dtypes[draw / 2 % 3];
        args.out_dtype = draw / 18 % 2 ? LLMPAR_F32 : args.dtype;
        for (int64_t most = 16; most <= 4096; most *= 4) {
            args.m = most;
            size_t enough = device->gemm_workspace(device, &args), need = 0;
            for (args.m = 1; args.m < most && need <= enough; args.m++) need = device->gemm_workspace(device, &args);
            if (need > enough) TEST_FAIL("draw %d: %lld rows need %llu bytes, %lld rows %llu", draw, (long long)args.m - 1, (unsigned long long)need, (long long)most, (unsigned long long)enough);
        }
    }
    for (int draw = 0; draw < 12; draw++) {
        lying how = {kinds[draw % 3], 0, 0};
        int64_t m = draw / 3 % 2 ? 1 : 5, n = 40;
        double *want = ops_zeros(m * n), *got = ops_zeros(m * n);
        product p;
        product_begin(&p, dtypes[draw % 3], m, n, 3);
        for (int32_t s = 0; s < (draw / 6 ? 120 : 6); s++) product_segment(&p, s / (draw / 6 ? 40 : 2), 4);
        rows_ahead = 0;
        run(devices[0], &p, &how, p.dtype, NULL, want);
        rows_ahead = 700;
        run(devices[0], &p, &how, p.dtype, NULL, got);
        cuda_same("a larger workspace", got, want, m * n);
        run(devices[1], &p, &how, p.dtype, NULL, got);
        rows_ahead = 0;
        product_end(&p);
        free(want);
        free(got);
    }
    llmpar_cuda_destroy(devices[1]);
}

TEST_LIST(T_(exact_products), T_(exact_aligned), T_(pieces_over_ranks), T_(trees), T_(position), T_(accumulate), T_(exact_bias), T_(zeros), T_(exact_many), T_(refusals), T_(less_shared_memory), T_(fast_products), T_(fast_groups), T_(fewer_rows_need_no_more), T_(cuda_end))
