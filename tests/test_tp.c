/* Tensor parallelism piece by piece: every product and collective of tp.h on 1, 2, 4 and 8 ranks gives the same bytes, and these are the sums of docs/exact.md written out in plain loops. */
#include "test.h"
#include <math.h>

enum { BATCH = 4, T = 8, N = BATCH * T, MOST = 2048 };

/* ---- numbers ---- */

static double get(const void *p, int64_t i, llmpar_dtype dtype)
{
    double x = 0;
    CHECK(llmpar_convert(&x, LLMPAR_F64, (const char *)p + (size_t)i * llmpar_dtype_size(dtype), dtype, 1));
    return x;
}
static void put(void *p, int64_t i, llmpar_dtype dtype, double x) { CHECK(llmpar_convert((char *)p + (size_t)i * llmpar_dtype_size(dtype), dtype, &x, LLMPAR_F64, 1)); }
/* What is left of x in this type. */
static double rounded(double x, llmpar_dtype dtype)
{
    char low[8];
    put(low, 0, dtype, x);
    return get(low, 0, dtype);
}

/* Element (row, column) of global matrix `which`: any rank can make its own part. Full significands, so that every order of a sum shows. */
static double value(int which, int64_t row, int64_t column, llmpar_dtype dtype)
{
    llmpar_rng rng = llmpar_rng_key(5, LLMPAR_RNG_USER, NULL, (uint64_t)which, (uint64_t)row);
    double x = llmpar_rng_uniform(&rng, (uint64_t)column) * 2 - 1;
    return rounded(x, dtype);
}

/* rows x columns of matrix `which` from (row, column) on; malloc'ed. */
static void *part(int which, int64_t row, int64_t row_count, int64_t column, int64_t columns, llmpar_dtype dtype)
{
    void *out = malloc((size_t)(row_count * columns + 1) * llmpar_dtype_size(dtype));
    if (!out) exit(1);
    for (int64_t i = 0; i < row_count; i++)
        for (int64_t j = 0; j < columns; j++) put(out, i * columns + j, dtype, value(which, row + i, column + j, dtype));
    return out;
}

static void *fresh(int64_t count, llmpar_dtype dtype)
{
    void *out = malloc((size_t)(count + 1) * llmpar_dtype_size(dtype));
    if (!out) exit(1);
    memset(out, 0x5a, (size_t)(count + 1) * llmpar_dtype_size(dtype)); /* results overwrite everything */
    return out;
}

/* One step of a chain, in the sum type; whether it is fused depends on dtype and dispatch level, never on the mesh: see probe. */
static int fused[LLMPAR_DTYPE_COUNT];
static double step(double a, double b, double sum, llmpar_dtype dtype)
{
    if (dtype == LLMPAR_F64) {
        volatile double product = a * b;
        return fused[dtype] ? fma(a, b, sum) : product + sum;
    }
    volatile float product = (float)a * (float)b;
    return fused[LLMPAR_F32] ? (double)fmaf((float)a, (float)b, (float)sum) : (double)(product + (float)sum);
}
static double add(double a, double b, llmpar_dtype dtype) { return dtype == LLMPAR_F64 ? a + b : (double)((float)a + (float)b); }

static double tree(const double *piece, int64_t n, llmpar_dtype dtype)
{
    if (n == 1) return piece[0];
    int64_t half = llmpar_tree_split(n);
    return add(tree(piece, half, dtype), tree(piece + half, n - half, dtype), dtype);
}

/* ---- ranks ---- */

typedef struct job { int ranks, kv_heads, sp, canon; llmpar_dtype dtype; llmpar_status (*body)(llmpar_tp *tp, const struct job *j); } job;

static llmpar_status run_rank(llmpar_ctx *ctx, void *user)
{
    const job *j = (const job *)user;
    llmpar_tp tp;
    llmpar_status status = llmpar_tp_init(ctx, ctx->comm, j->canon, j->kv_heads, j->sp, &tp);
    if (!status) status = j->body(&tp, j);
    llmpar_tp_destroy(&tp);
    return status;
}

static llmpar_status launch(const job *j, llmpar_error *error)
{
    llmpar_launch_desc desc = { .ranks = j->ranks, .check = test_no_leak };
    if (j->dtype == LLMPAR_BF16 && llmpar_cpu_best_level() == LLMPAR_CPU_AVX512BF16) desc.cpu = "avx512"; /* step() has no pairs; test_gemm has */
    return llmpar_launch(&desc, run_rank, (void *)j, error);
}

static void *workspace_of(size_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 127) / 64 * 64);
    if (!p) exit(1);
    return p;
}

/* -(1 + 2e) + (1 + e)^2 with e^2 below the last bit: e^2 if the chain is fused, else 0. */
static llmpar_status probe(llmpar_tp *tp, const job *j)
{
    double e = j->dtype == LLMPAR_F64 ? ldexp(1, -27) : ldexp(1, -12), a[2], b[2], c[1];
    put(a, 0, j->dtype, -1 - 2 * e), put(b, 0, j->dtype, 1);
    put(a, 1, j->dtype, 1 + e), put(b, 1, j->dtype, 1 + e);
    size_t bytes = llmpar_tp_product_workspace(tp, LLMPAR_GEMM_NT, 1, 1, 2, j->dtype);
    void *workspace = workspace_of(bytes);
    llmpar_status status = llmpar_tp_product(tp, NULL, LLMPAR_GEMM_NT, 1, 1, 2, a, 2, b, 2, c, 1, j->dtype, workspace, bytes);
    fused[j->dtype] = get(c, 0, j->dtype) != 0;
    free(workspace);
    return status;
}

static void launch_ok(const job *j)
{
    llmpar_error error;
    int before = test_failures;
    job first = { 1, 1, 0, 0, LLMPAR_F32, probe };
    for (; (int)first.dtype <= LLMPAR_F64; first.dtype = (llmpar_dtype)(first.dtype + 1)) CHECK_OK(launch(&first, &error));
    if (launch(j, &error)) TEST_FAIL("rank %d: %s", error.rank, error.text);
    if (test_failures != before) fprintf(stderr, "  (tp %d, kv heads %d, sequence parallel %d, canon %d, %s)\n", j->ranks, j->kv_heads, j->sp, j->canon, llmpar_dtype_name(j->dtype));
}

/* 1, 2, 4, 8 ranks x dtypes x sequence parallel. */
static void everywhere(llmpar_status (*body)(llmpar_tp *, const job *), int kv_heads)
{
    static const llmpar_dtype dtypes[] = { LLMPAR_F32, LLMPAR_F64, LLMPAR_BF16, LLMPAR_F16 };
    for (int dtype = 0; dtype < 4; dtype++)
        for (int ranks = 1; ranks <= 8; ranks *= 2)
            for (int sp = 0; sp < 2; sp++) {
                job j = { ranks, kv_heads, sp, 0, dtypes[dtype], body };
                launch_ok(&j);
            }
}

/* out[N, dim] of the whole sum in the order of docs/exact.md; pieces of `grains`, each a chain over operands in order. a of operand o is matrix 10*o, b is 10*o + 1. */
typedef struct operand_shape { int64_t grains, grain, per; } operand_shape;
static double exact_element(llmpar_gemm_kind kind, int64_t row, int64_t column, int64_t grains, const operand_shape *shape, int count, int pieces, llmpar_dtype dtype)
{
    double piece[64];
    for (int p = 0; p < pieces; p++) {
        piece[p] = 0;
        for (int o = 0; o < count; o++)
            for (int64_t g = 0; g < shape[o].grains; g++) {
                int64_t owner = g * shape[o].per;
                if (owner < llmpar_piece_begin(p, grains, pieces) || owner >= llmpar_piece_begin(p + 1, grains, pieces)) continue;
                for (int64_t e = g * shape[o].grain; e < (g + 1) * shape[o].grain; e++) {
                    double b = kind == LLMPAR_GEMM_NT ? value(10 * o + 1, column, e, dtype) : value(10 * o + 1, e, column, dtype);
                    piece[p] = step(value(10 * o, row, e, dtype), b, piece[p], dtype);
                }
            }
    }
    return tree(piece, pieces, dtype);
}

/* llmpar_tp_partial then llmpar_tp_reduce, against the loops above. */
static void check_partial(llmpar_tp *tp, const job *j, llmpar_gemm_kind kind, int64_t dim, int64_t grains, const operand_shape *shape, int count)
{
    llmpar_dtype dtype = j->dtype;
    llmpar_tp_operand operand[3];
    void *memory[6];
    memset(operand, 0, sizeof operand);
    for (int o = 0; o < count; o++) {
        llmpar_tp_operand *p = &operand[o];
        p->grain = shape[o].grain;
        p->per = shape[o].per == 1 ? 0 : shape[o].per;
        p->begin = shape[o].per > 1 && tp->replicas > 1 ? tp->rank / tp->replicas : llmpar_tp_begin(tp, shape[o].grains);
        p->count = shape[o].per > 1 && tp->replicas > 1 ? tp->rank % tp->replicas == 0 : llmpar_tp_count(tp, shape[o].grains);
        int64_t begin = p->begin * p->grain, extent = p->count * p->grain;
        p->lda = extent;
        p->ldb = kind == LLMPAR_GEMM_NT ? extent : dim;
        p->a = memory[2 * o] = part(10 * o, 0, N, begin, extent, dtype);
        p->b = memory[2 * o + 1] = kind == LLMPAR_GEMM_NT ? part(10 * o + 1, 0, dim, begin, extent, dtype) : part(10 * o + 1, begin, extent, 0, dim, dtype);
    }
    size_t bytes = llmpar_tp_partial_workspace(tp, kind, N, dim, grains, operand, count, dtype);
    void *workspace = workspace_of(bytes), *partial = workspace_of(llmpar_tp_partial_bytes(tp, BATCH, T, dim, dtype)), *out = fresh(N * dim, dtype);
    CHECK_OK(llmpar_tp_partial(tp, NULL, kind, N, dim, grains, operand, count, dtype, partial, workspace, bytes));
    CHECK_OK(llmpar_tp_reduce(tp, NULL, "test/reduce", BATCH, T, dim, partial, out, dtype));
    int64_t t = tp->sequence_parallel ? T / tp->ranks : T, bad = 0;
    for (int64_t b = 0; b < BATCH; b++)
        for (int64_t i = 0; i < t; i++)
            for (int64_t d = 0; d < dim; d++) {
                int64_t row = b * T + (tp->sequence_parallel ? tp->rank * t : 0) + i;
                double got = get(out, (b * t + i) * dim + d, dtype), want = rounded(exact_element(kind, row, d, grains, shape, count, tp->pieces, dtype), dtype); /* once, behind the whole tree */
                if ((got != want || signbit(got) != signbit(want)) && bad++ == 0) TEST_FAIL("%s: rank %d, row %d, column %d: got %.17g, want %.17g", kind == LLMPAR_GEMM_NT ? "NT" : "NN", tp->rank, (int)row, (int)d, got, want);
            }
    if (!tp->sequence_parallel && llmpar_tp_partial_dtype(tp, dtype) == dtype) { /* in place */
        CHECK_OK(llmpar_tp_reduce(tp, NULL, "test/reduce", BATCH, T, dim, partial, partial, dtype));
        CHECK_BYTES(partial, out, (size_t)(N * dim) * llmpar_dtype_size(dtype));
    }
    free(out);
    free(partial);
    free(workspace);
    for (int o = 0; o < 2 * count; o++) free(memory[o]);
}

static llmpar_status row_parallel(llmpar_tp *tp, const job *j)
{
    const operand_shape heads = { 8, 6, 1 }, uneven = { 13, 3, 1 }, few = { 5, 4, 1 }, two[2] = { { 24, 1, 1 }, { 24, 1, 1 } };
    check_partial(tp, j, LLMPAR_GEMM_NT, 7, 8, &heads, 1);
    check_partial(tp, j, LLMPAR_GEMM_NT, 5, 13, &uneven, 1); /* ranks with one and with two grains */
    check_partial(tp, j, LLMPAR_GEMM_NT, 6, 5, &few, 1);     /* pieces, on 8 ranks also ranks, without a grain */
    check_partial(tp, j, LLMPAR_GEMM_NN, 9, 24, two, 2);     /* gate and up share their input: one sum */
    return LLMPAR_OK;
}

TEST(partials) { everywhere(row_parallel, 8); }

/* dx = dq Wq + dk Wk + dv Wv with H = 16 query heads and K = 2, 4, 8, 16 kv heads; a kv head shared by ranks carries its segments once. */
static llmpar_status grouped(llmpar_tp *tp, const job *j)
{
    const operand_shape qkv[3] = { { 16, 4, 1 }, { j->kv_heads, 4, 16 / j->kv_heads }, { j->kv_heads, 4, 16 / j->kv_heads } };
    CHECK_INT(tp->replicas, tp->ranks > j->kv_heads ? tp->ranks / j->kv_heads : 1);
    CHECK((tp->kv != NULL) == (tp->replicas > 1));
    if (tp->kv) { /* neighbours share a head */
        CHECK_INT(tp->kv->ranks, tp->replicas);
        CHECK_INT(tp->kv->rank, tp->rank % tp->replicas);
        int64_t mine = tp->rank, sum = 0, want = 0;
        llmpar_collective call;
        memset(&call, 0, sizeof call);
        call.send = &mine;
        call.recv = &sum;
        call.count = 1;
        call.dtype = LLMPAR_I64;
        CHECK_OK(llmpar_all_reduce(tp->kv, NULL, &call));
        for (int r = 0; r < tp->replicas; r++) want += tp->rank / tp->replicas * tp->replicas + r;
        CHECK_INT(sum, want);
    }
    check_partial(tp, j, LLMPAR_GEMM_NN, 5, 16, qkv, 3);
    return LLMPAR_OK;
}

TEST(grouped_queries)
{
    everywhere(grouped, 2);
    everywhere(grouped, 4);
    everywhere(grouped, 16);
}

/* Other numbers of pieces: canon 1, 2 and 64 (more pieces than grains), and ranks that do not divide them. */
static llmpar_status pieces(llmpar_tp *tp, const job *j)
{
    const operand_shape shape = { 20, 2, 1 };
    CHECK_INT(tp->pieces, (j->canon ? j->canon : 8) % j->ranks == 0 ? (j->canon ? j->canon : 8) : j->ranks);
    check_partial(tp, j, LLMPAR_GEMM_NT, 3, 20, &shape, 1);
    return LLMPAR_OK;
}

TEST(pieces_and_ranks)
{
    static const struct { int ranks, canon, kv_heads; } rows[] = { { 1, 1, 1 }, { 1, 2, 1 }, { 2, 2, 4 }, { 1, 64, 1 }, { 4, 64, 4 }, { 8, 16, 8 }, { 4, 1, 4 }, { 3, 0, 3 }, { 5, 0, 1 }, { 8, 4, 8 } };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        for (int dtype = LLMPAR_F32; dtype <= LLMPAR_F64; dtype++) {
            job j = { rows[i].ranks, rows[i].kv_heads, 0, rows[i].canon, (llmpar_dtype)dtype, pieces };
            launch_ok(&j);
        }
}

/* ---- products that nobody splits ---- */

static llmpar_status column_parallel(llmpar_tp *tp, const job *j)
{
    enum { IN = 37, OUT = 21 };
    llmpar_dtype dtype = j->dtype;
    size_t size = llmpar_dtype_size(dtype);
    int64_t begin = llmpar_tp_begin(tp, OUT), count = llmpar_tp_count(tp, OUT), ldo = count + 3;
    void *x = part(0, 0, N, 0, IN, dtype), *w = part(1, begin, count, 0, IN, dtype), *y = fresh(N * ldo, dtype), *before = fresh(N * ldo, dtype);
    size_t bytes = llmpar_tp_product_workspace(tp, LLMPAR_GEMM_NT, N, count, IN, dtype);
    void *workspace = workspace_of(bytes);
    CHECK_OK(llmpar_tp_product(tp, NULL, LLMPAR_GEMM_NT, N, count, IN, x, IN, w, IN, y, ldo, dtype, workspace, bytes));
    for (int64_t n = 0; n < N; n++) {
        for (int64_t i = 0; i < count; i++) {
            double want = 0;
            for (int64_t k = 0; k < IN; k++) want = step(value(0, n, k, dtype), value(1, begin + i, k, dtype), want, dtype);
            if (get(y, n * ldo + i, dtype) != rounded(want, dtype)) { TEST_FAIL("y[%d,%d]: got %.17g, want %.17g", (int)n, (int)(begin + i), get(y, n * ldo + i, dtype), want); break; }
        }
        CHECK_BYTES((char *)y + (size_t)(n * ldo + count) * size, before, 3 * size); /* nothing beside the rows */
    }
    free(workspace);
    /* dh = dy w: a chain over all of dim on every rank, columns of h cut. */
    void *dy = part(2, 0, N, 0, IN, dtype), *down = part(3, 0, IN, begin, count, dtype), *dh = fresh(N * count, dtype);
    bytes = llmpar_tp_product_workspace(tp, LLMPAR_GEMM_NN, N, count, IN, dtype);
    workspace = workspace_of(bytes);
    CHECK_OK(llmpar_tp_product(tp, NULL, LLMPAR_GEMM_NN, N, count, IN, dy, IN, down, count, dh, count, dtype, workspace, bytes));
    for (int64_t n = 0; n < N; n++)
        for (int64_t i = 0; i < count; i++) {
            double want = 0;
            for (int64_t k = 0; k < IN; k++) want = step(value(2, n, k, dtype), value(3, k, begin + i, dtype), want, dtype);
            if (get(dh, n * count + i, dtype) != rounded(want, dtype)) { TEST_FAIL("dh[%d,%d]: got %.17g, want %.17g", (int)n, (int)(begin + i), get(dh, n * count + i, dtype), want); break; }
        }
    free(workspace);
    free(dh), free(down), free(dy), free(before), free(y), free(w), free(x);
    return LLMPAR_OK;
}

TEST(products) { everywhere(column_parallel, 8); }

static llmpar_status weight_gradient(llmpar_tp *tp, const job *j)
{
    enum { IN = 11, OUT = 19 };
    llmpar_dtype dtype = j->dtype, sum = llmpar_dtype_sum(dtype);
    int64_t begin = llmpar_tp_begin(tp, OUT), count = llmpar_tp_count(tp, OUT);
    void *dy = part(0, 0, N, begin, count, dtype), *x = part(1, 0, N, 0, IN, dtype), *dw = fresh(count * IN, sum);
    for (int64_t leaves = 1; leaves <= BATCH; leaves *= 2) {
        size_t bytes = llmpar_tp_weight_gradient_workspace(tp, N, leaves, count, IN, dtype);
        void *workspace = workspace_of(bytes);
        CHECK_OK(llmpar_tp_weight_gradient(tp, NULL, N, leaves, count, IN, dy, count, x, IN, dw, 0, dtype, workspace, bytes));
        for (int64_t o = 0; o < count; o++)
            for (int64_t i = 0; i < IN; i++) {
                double leaf[BATCH] = { 0 };
                for (int64_t n = 0; n < N; n++) leaf[n * leaves / N] = step(value(0, n, begin + o, dtype), value(1, n, i, dtype), leaf[n * leaves / N], dtype);
                double want = tree(leaf, leaves, dtype);
                if (get(dw, o * IN + i, sum) != want) { TEST_FAIL("%d leaves: dw[%d,%d]: got %.17g, want %.17g", (int)leaves, (int)(begin + o), (int)i, get(dw, o * IN + i, sum), want); break; }
            }
        free(workspace);
    }
    free(dw), free(x), free(dy);
    return LLMPAR_OK;
}

TEST(weight_gradients) { everywhere(weight_gradient, 8); }

/* ---- collectives ---- */

static llmpar_status gather_and_select(llmpar_tp *tp, const job *j)
{
    enum { DIM = 8, VOCAB = 29 };
    llmpar_dtype dtype = j->dtype;
    size_t size = llmpar_dtype_size(dtype);
    if (tp->sequence_parallel) {
        int64_t t = T / tp->ranks;
        void *local = fresh(BATCH * t * DIM, dtype), *full = fresh(N * DIM, dtype), *want = part(7, 0, N, 0, DIM, dtype);
        for (int64_t b = 0; b < BATCH; b++)
            for (int64_t i = 0; i < t * DIM; i++) put(local, b * t * DIM + i, dtype, get(want, (b * T + tp->rank * t) * DIM + i, dtype));
        CHECK_OK(llmpar_tp_gather(tp, NULL, "test/all_gather", BATCH, T, DIM, local, full, dtype));
        CHECK_BYTES(full, want, (size_t)(N * DIM) * size);
        free(want), free(full), free(local);
    }
    /* Rows of a table whose rows are spread over the ranks; -0, the smallest subnormal, infinity and a NaN with a payload survive. */
    int64_t begin = llmpar_tp_begin(tp, VOCAB), count = llmpar_tp_count(tp, VOCAB), t = tp->sequence_parallel ? T / tp->ranks : T;
    void *mine = malloc((size_t)(N * DIM) * size), *want = malloc((size_t)(N * DIM) * size), *out = fresh(N * DIM, dtype);
    static const uint32_t odd_f32[] = { 0x80000000u, 1u, 0x7f800000u, 0x7fc01234u, 0xffc00001u, 0x80000001u };
    static const uint16_t odd_half[] = { 0x8000, 1, 0x7f80, 0x7fc1, 0xffc1, 0x8001 };
    static const uint64_t odd_f64[] = { 0x8000000000000000ull, 1ull, 0x7ff0000000000000ull, 0x7ff8000000001234ull, 0xfff8000000000001ull, 0x8000000000000001ull };
    memset(mine, 0, (size_t)(N * DIM) * size);
    for (int64_t n = 0; n < N; n++)
        for (int64_t d = 0; d < DIM; d++) {
            int64_t id = n * 5 % VOCAB, at = n * DIM + d;
            if (id % 3) put(want, at, dtype, value(8, id, d, dtype));
            else if (dtype == LLMPAR_F32) memcpy((char *)want + at * 4, &odd_f32[(id + d) % 6], 4);
            else if (dtype == LLMPAR_F64) memcpy((char *)want + at * 8, &odd_f64[(id + d) % 6], 8);
            else memcpy((char *)want + at * 2, &odd_half[(id + d) % 6], 2);
            if (id >= begin && id < begin + count) memcpy((char *)mine + (size_t)at * size, (char *)want + (size_t)at * size, size);
        }
    CHECK_OK(llmpar_tp_select(tp, NULL, "test/select", BATCH, T, DIM, mine, out, dtype));
    for (int64_t b = 0; b < BATCH; b++) CHECK_BYTES((char *)out + (size_t)(b * t * DIM) * size, (char *)want + (size_t)((b * T + (tp->sequence_parallel ? tp->rank * t : 0)) * DIM) * size, (size_t)(t * DIM) * size);
    free(out), free(want), free(mine);
    return LLMPAR_OK;
}

TEST(gathers_and_selects) { everywhere(gather_and_select, 8); }

/* ---- shapes ---- */

static llmpar_status cuts(llmpar_tp *tp, const job *j)
{
    for (int64_t grains = 0; grains < 40; grains++) {
        int64_t begin = llmpar_tp_begin(tp, grains), count = llmpar_tp_count(tp, grains);
        CHECK_INT(begin, tp->rank * grains / j->ranks);
        CHECK_INT(begin + count, (tp->rank + 1) * grains / j->ranks);
    }
    return LLMPAR_OK;
}

static llmpar_status nothing_at_all(llmpar_tp *tp, const job *j)
{
    llmpar_tp_operand none;
    float out[3] = { 7, 7, 7 };
    memset(&none, 0, sizeof none);
    none.grain = 1;
    none.begin = llmpar_tp_begin(tp, 0);
    CHECK_OK(llmpar_tp_product(tp, NULL, LLMPAR_GEMM_NT, 0, 3, 4, NULL, 4, NULL, 4, NULL, 3, j->dtype, NULL, 0));
    size_t bytes = llmpar_tp_partial_workspace(tp, LLMPAR_GEMM_NT, 1, 3, 0, &none, 1, LLMPAR_F32);
    void *workspace = workspace_of(bytes);
    CHECK_OK(llmpar_tp_partial(tp, NULL, LLMPAR_GEMM_NT, 1, 3, 0, &none, 1, LLMPAR_F32, out, workspace, bytes)); /* a sum of nothing is +0 */
    for (int i = 0; i < 3; i++) CHECK(out[i] == 0 && !signbit(out[i]));
    free(workspace);
    return LLMPAR_OK;
}

TEST(shapes)
{
    for (int ranks = 1; ranks <= 8; ranks++) {
        job j = { ranks, ranks, 0, 0, LLMPAR_F32, cuts };
        launch_ok(&j);
        j.body = nothing_at_all;
        launch_ok(&j);
    }
}

/* ---- what is refused ---- */

static llmpar_status wrong_leaves(llmpar_tp *tp, const job *j)
{
    float x[12] = { 0 }, dw[4];
    return llmpar_tp_weight_gradient(tp, NULL, 6, 4, 2, 2, x, 2, x, 2, dw, 0, j->dtype, NULL, 0);
}

static llmpar_status small_workspace(llmpar_tp *tp, const job *j)
{
    static float x[N * 256], w[256 * 256];
    float *y = (float *)malloc(sizeof(float) * N * 256);
    size_t bytes = llmpar_tp_product_workspace(tp, LLMPAR_GEMM_NT, N, 256, 256, j->dtype);
    void *workspace = workspace_of(bytes);
    llmpar_status status = bytes ? llmpar_tp_product(tp, NULL, LLMPAR_GEMM_NT, N, 256, 256, x, 256, w, 256, y, 256, j->dtype, workspace, bytes - 1) : llmpar_fail(tp->ctx, LLMPAR_ERR_ARGUMENT, "workspace of 0 bytes");
    free(workspace);
    free(y);
    return status;
}

static llmpar_status odd_select(llmpar_tp *tp, const job *j)
{
    float row[5] = { 0 }, out[5];
    return llmpar_tp_select(tp, NULL, "test/select", 1, 1, 5, row, out, j->dtype);
}

static llmpar_status not_reached(llmpar_tp *tp, const job *j)
{
    TEST_FAIL("tp %d with %d kv heads, canon %d was not refused", tp->ranks, j->kv_heads, j->canon);
    return LLMPAR_OK;
}

TEST(refused)
{
    static const struct { job j; llmpar_status status; const char *text; } rows[] = {
        { { 4, 3, 0, 0, LLMPAR_F32, not_reached }, LLMPAR_ERR_MESH, "num_key_value_heads = 3 and tp = 4: one must divide the other" },
        { { 4, 6, 0, 0, LLMPAR_F32, not_reached }, LLMPAR_ERR_MESH, "num_key_value_heads = 6 and tp = 4" },
        { { 2, -1, 0, 0, LLMPAR_F32, not_reached }, LLMPAR_ERR_MESH, "num_key_value_heads = -1 and tp = 2" },
        { { 2, 2, 0, 3, LLMPAR_F32, not_reached }, LLMPAR_ERR_ARGUMENT, "canon = 3 is not a power of two" },
        { { 2, 2, 0, -8, LLMPAR_F32, not_reached }, LLMPAR_ERR_ARGUMENT, "canon = -8 is not a power of two" },
        { { 2, 2, 0, 0, LLMPAR_F32, wrong_leaves }, LLMPAR_ERR_SHAPE, "4 leaves do not divide 6 rows" },
        { { 2, 2, 0, 0, LLMPAR_F32, odd_select }, LLMPAR_ERR_SHAPE, "rows of 5 elements are no multiple of 8 bytes" },
        { { 1, 2, 0, 0, LLMPAR_F32, small_workspace }, LLMPAR_ERR_ARGUMENT, "workspace" },
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        llmpar_error error;
        llmpar_status status = launch(&rows[i].j, &error);
        if (status != rows[i].status || !strstr(error.text, rows[i].text)) TEST_FAIL("row %d: want \"%s\", got %s: \"%s\"", (int)i, rows[i].text, llmpar_status_string(status), error.text);
    }
}

/* A model on ranks that do not divide it. */
typedef struct model_shape { int heads, kv_heads, tp, seq_len, sp; } model_shape;
static llmpar_status model_rank(llmpar_ctx *ctx, void *user)
{
    const model_shape *s = (const model_shape *)user;
    llmpar_llama_config config;
    llmpar_llama_desc desc;
    llmpar_mesh_desc mesh_desc;
    llmpar_trainer_desc trainer_desc;
    llmpar_mesh *mesh = NULL;
    llmpar_llama *model = NULL;
    llmpar_trainer *trainer = NULL;
    memset(&desc, 0, sizeof desc);
    memset(&mesh_desc, 0, sizeof mesh_desc);
    memset(&trainer_desc, 0, sizeof trainer_desc);
    llmpar_status status = llmpar_llama_preset("tiny", &config, &ctx->error);
    config.heads = s->heads;
    config.kv_heads = s->kv_heads;
    desc.config = &config;
    mesh_desc.tp = s->tp;
    trainer_desc.seq_len = s->seq_len;
    trainer_desc.sequence_parallel = s->sp;
    if (!status) status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_llama_create(ctx, &desc, &model);
    if (!status) status = llmpar_parallelize(mesh, model, &trainer_desc, &trainer);
    if (status) CHECK(trainer == NULL);
    llmpar_trainer_destroy(trainer);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    return status;
}

TEST(models_refused)
{
    static const struct { model_shape shape; llmpar_status status; const char *text; } rows[] = {
        { { 6, 2, 4, 16, 0 }, LLMPAR_ERR_MESH, "num_attention_heads = 6" },
        { { 6, 6, 4, 16, 0 }, LLMPAR_ERR_MESH, "tp = 4" },
        { { 12, 6, 4, 16, 0 }, LLMPAR_ERR_MESH, "num_key_value_heads = 6" },
        { { 12, 3, 2, 16, 0 }, LLMPAR_ERR_MESH, "num_key_value_heads = 3" },
        { { 8, 2, 4, 18, 1 }, LLMPAR_ERR_MESH, "18" }, /* sequence parallel cuts T */
        { { 8, 2, 4, 16, 1 }, LLMPAR_OK, "" },
        { { 8, 1, 8, 18, 0 }, LLMPAR_OK, "" },
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        llmpar_launch_desc desc = { .ranks = rows[i].shape.tp, .check = test_no_leak };
        llmpar_error error;
        llmpar_status status = llmpar_launch(&desc, model_rank, (void *)&rows[i].shape, &error);
        if (status != rows[i].status || !strstr(error.text, rows[i].text)) TEST_FAIL("row %d: want %s, \"%s\", got %s: \"%s\"", (int)i, llmpar_status_string(rows[i].status), rows[i].text, llmpar_status_string(status), error.text);
    }
}

TEST_LIST(T_(partials), T_(grouped_queries), T_(pieces_and_ranks), T_(products), T_(weight_gradients), T_(gathers_and_selects), T_(shapes), T_(refused), T_(models_refused))
