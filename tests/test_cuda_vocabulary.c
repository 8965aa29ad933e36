/* The CUDA device's operations on the vocabulary: embedding and its gradient (exactly in the order of docs/exact.md), the steps of the cross-entropy (against f64; shards, places and row strides with the same bits). */
#include "cuda.h"

static const double U = 5.9604644775390625e-8; /* half a unit of f32 */
static const double EXP = 6.2e-7;              /* relative error of e^x: 2^-21.5 and a half */
static const llmpar_dtype dtypes[3] = { LLMPAR_F32, LLMPAR_BF16, LLMPAR_F16 };

static double *values(llmpar_dtype dtype, int64_t n, double scale)
{
    double *x = ops_random(n, scale);
    cuda_round(dtype, x, n);
    return x;
}
static float tree_of(const float *leaves, int64_t n)
{
    if (n == 1) return leaves[0];
    int64_t split = llmpar_tree_split(n);
    return tree_of(leaves, split) + tree_of(leaves + split, n - split);
}

/* ---- embedding ---- */

TEST(embedding)
{
    CUDA_OPEN();
    for (int round = 0; round < 18; round++) {
        llmpar_dtype dtype = dtypes[round % 3];
        int64_t rows = 1 + ops_below(30), dim = round % 2 ? 8 * (1 + ops_below(9)) : 1 + ops_below(70), vocab = 50, v_begin = ops_below(20), v_local = ops_below(30), odd = round / 3 % 2;
        double *table = values(dtype, v_local * dim, 1), *got = ops_zeros(rows * dim), *want = ops_zeros(rows * dim);
        int32_t ids[30];
        for (int64_t i = 0; i < v_local * dim; i += 3) table[i] = -0.0;
        for (int64_t r = 0; r < rows; r++) {
            ids[r] = (int32_t)ops_below(vocab);
            int64_t id = ids[r] - v_begin;
            if (id >= 0 && id < v_local) memcpy(want + r * dim, table + id * dim, (size_t)dim * sizeof *want);
        }
        llmpar_embedding_args a = { rows, dim, v_begin, v_local, (const int32_t *)cuda_put(cuda_gpu, LLMPAR_I32, ids, 1, rows, rows, odd), cuda_put(cuda_gpu, dtype, table, 1, v_local * dim, v_local * dim, odd), cuda_put(cuda_gpu, dtype, NULL, 1, rows * dim, rows * dim, odd), dtype };
        CUDA_OK(cuda_gpu->embedding(cuda_gpu, NULL, &a));
        cuda_get(a.out, got);
        cuda_same("embedding", got, want, rows * dim);
        cuda_done();
        free(table); free(got); free(want);
    }
}

/* kind: 0 any ids, 1 all the same, 2 few ids, 3 rare ids (each at most some times) */
static void gradient_case(llmpar_dtype dtype, int64_t batch, int64_t t, int64_t leaves, int64_t dim, int64_t vocab, int64_t v_begin, int64_t v_local, int kind, int64_t odd)
{
    int64_t rows = batch * t, n = v_local * dim, leaf_rows = leaves > 0 ? batch / leaves * t : 1;
    double *dout = values(dtype, rows * dim, 1), *got = ops_zeros(n), *want = ops_zeros(n);
    int32_t *ids = (int32_t *)calloc((size_t)rows + 1, sizeof *ids);
    float *sums = (float *)calloc((size_t)(leaves + 1), sizeof *sums);
    for (int64_t i = 0; i < rows * dim; i += 5) dout[i] = -0.0;
    for (int64_t r = 0; r < rows; r++) ids[r] = (int32_t)(kind == 1 ? v_begin + v_local / 2 : kind == 2 ? v_begin + ops_below(5) * (v_local / 7) : kind == 3 ? ops_below(vocab < rows ? vocab : rows) : ops_below(vocab));
    llmpar_embedding_backward_args a;
    memset(&a, 0, sizeof a);
    a.tokens.batch = batch; a.tokens.t = a.tokens.t_total = t; a.tokens.leaves = leaves; a.tokens.canon = 8;
    a.dim = dim; a.v_begin = v_begin; a.v_local = v_local; a.dtype = dtype;
    a.workspace_bytes = cuda_gpu->embedding_backward_workspace(cuda_gpu, &a);
    a.ids = (const int32_t *)cuda_put(cuda_gpu, LLMPAR_I32, ids, 1, rows, rows, odd);
    a.dout = cuda_put(cuda_gpu, dtype, dout, 1, rows * dim, rows * dim, odd);
    a.dtable = cuda_put(cuda_gpu, LLMPAR_F32, NULL, 1, n, n, odd);
    a.workspace = cuda_put_bytes(cuda_gpu, 1, NULL, 1, (int64_t)a.workspace_bytes, (int64_t)a.workspace_bytes, odd);
    CUDA_OK(cuda_gpu->embedding_backward(cuda_gpu, NULL, &a));
    cuda_get(a.dtable, got);
    cuda_done();
    /* where each id's tokens are, in order */
    int64_t *next = (int64_t *)malloc(((size_t)rows + 1) * sizeof *next), *first = (int64_t *)malloc((size_t)v_local * sizeof *first);
    for (int64_t v = 0; v < v_local; v++) first[v] = -1;
    for (int64_t r = rows - 1; r >= 0; r--) {
        int64_t id = ids[r] - v_begin;
        if (id < 0 || id >= v_local) continue;
        next[r] = first[id];
        first[id] = r;
    }
    for (int64_t v = 0; v < v_local; v++)
        for (int64_t c = 0; first[v] >= 0 && c < dim; c++) {
            memset(sums, 0, (size_t)leaves * sizeof *sums);
            for (int64_t r = first[v]; r >= 0; r = next[r]) sums[r / leaf_rows] += (float)dout[r * dim + c];
            want[v * dim + c] = (double)tree_of(sums, leaves);
        }
    cuda_same("embedding gradient", got, want, n);
    free(dout); free(got); free(want); free(ids); free(sums); free(next); free(first);
}

TEST(embedding_gradient)
{
    CUDA_OPEN();
    for (int round = 0; round < 24; round++) {
        int64_t leaves = (int64_t)1 << ops_below(6), batch = leaves * (1 + ops_below(2)), vocab = 20 + ops_below(60), begin = ops_below(10);
        gradient_case(dtypes[round % 3], batch, 1 + ops_below(5), leaves, round % 2 ? 1 + ops_below(90) : 16, vocab, begin, 1 + ops_below(vocab - begin), round / 3 % 4, round / 6 % 2);
    }
    gradient_case(LLMPAR_BF16, 8, 300, 8, 8, 70000, 100, 69000, 0, 0);  /* several tiles, three passes */
    gradient_case(LLMPAR_F32, 8, 2310, 8, 4, 250, 0, 250, 0, 0);        /* more counts than the scan takes at a time */
    gradient_case(LLMPAR_F32, 3, 1000, 3, 3, 300, 0, 300, 3, 1);        /* two passes; leaves no power of two */
    gradient_case(LLMPAR_BF16, 64, 40, 64, 8, 40, 0, 40, 2, 0);         /* rounds of leaves */
    gradient_case(LLMPAR_F32, 1, 2100, 1, 70, 9, 0, 9, 1, 0);           /* one chain */
    gradient_case(LLMPAR_F16, 0, 7, 0, 5, 9, 0, 9, 0, 0);               /* no tokens: zeros */
    gradient_case(LLMPAR_F32, 37, 1, 37, 4, 3, 0, 3, 0, 0);
    if (!cuda_small()) {
        gradient_case(LLMPAR_BF16, 8, 2048, 8, 256, 128256, 0, 128256, 0, 0);
        gradient_case(LLMPAR_BF16, 8, 2048, 8, 256, 128256, 0, 128256, 2, 0);
        gradient_case(LLMPAR_F32, 64, 512, 64, 64, 500, 0, 500, 0, 1);
    }
}

/* ---- cross-entropy ---- */

typedef struct xent { int64_t rows, vocab; int32_t canon; llmpar_dtype dtype; double *logits; int32_t *targets; } xent;
/* Columns [begin, begin + local) of rows [row, row + rows). Results may be NULL; most and sum go in where they are needed. */
typedef struct xent_part { int64_t row, rows, begin, local, gap, odd; } xent_part;
static void xent_run(const xent *x, xent_part p, double *most, double *target, double *sum, double *gradient, float scale)
{
    llmpar_xent_backward_args b;
    llmpar_xent_args *a = &b.forward;
    double *part = ops_zeros(p.rows * p.local);
    memset(&b, 0, sizeof b);
    for (int64_t r = 0; r < p.rows; r++) memcpy(part + r * p.local, x->logits + (p.row + r) * x->vocab + p.begin, (size_t)p.local * sizeof *part);
    a->rows = p.rows; a->ld = p.local + p.gap; a->v_begin = p.begin; a->v_local = p.local; a->v_total = x->vocab; a->canon = x->canon; a->dtype = x->dtype;
    a->logits = cuda_put(cuda_gpu, x->dtype, part, p.rows, p.local, a->ld, p.odd);
    a->targets = (const int32_t *)cuda_put(cuda_gpu, LLMPAR_I32, x->targets + p.row, 1, p.rows, p.rows, 0);
    a->max = cuda_put(cuda_gpu, LLMPAR_F32, target ? NULL : most, 1, p.rows, p.rows, p.odd);
    a->target_logit = cuda_put(cuda_gpu, LLMPAR_F32, NULL, 1, p.rows, p.rows, 0);
    a->sum = cuda_put(cuda_gpu, LLMPAR_F32, gradient ? sum : NULL, 1, p.rows, p.rows, p.odd);
    b.scale = scale;
    if (target) {
        CUDA_OK(cuda_gpu->xent_max(cuda_gpu, NULL, a));
        cuda_get(a->max, most);
        cuda_get(a->target_logit, target);
    } else if (!gradient) {
        CUDA_OK(cuda_gpu->xent_sum(cuda_gpu, NULL, a));
        cuda_get(a->sum, sum);
    } else {
        CUDA_OK(cuda_gpu->xent_backward(cuda_gpu, NULL, &b));
        cuda_get(a->logits, gradient);
    }
    cuda_done();
    free(part);
}

static void xent_case(llmpar_dtype dtype, int64_t rows, int64_t vocab, int32_t canon, int64_t odd)
{
    const double infinity = INFINITY;
    xent x = { rows, vocab, canon, dtype, values(dtype, rows * vocab, 9), (int32_t *)calloc((size_t)rows, sizeof(int32_t)) };
    double *most = ops_zeros(rows), *target = ops_zeros(rows), *sum = ops_zeros(rows), *got = ops_zeros(rows), *other = ops_zeros(rows), *gradient = ops_zeros(rows * vocab), *part = ops_zeros(rows * vocab);
    float *sums = (float *)calloc((size_t)(rows * canon), sizeof *sums), scale = 0.037f;
    xent_part whole = { 0, rows, 0, vocab, odd ? 3 : 0, odd };
    /* lanes of a warp, 16 bytes each; 8 or 4 elements as a tree */
    double parts = (double)vocab / canon / (double)(32 * (16 / llmpar_dtype_size(dtype))) + 12;
    for (int64_t r = 0; r < rows; r++) x.targets[r] = (int32_t)(r % 5 == 3 ? -1 : ops_below(vocab));
    for (int64_t i = 0; i < rows * vocab; i += 37) x.logits[i] = -infinity;
    x.logits[ops_below(vocab)] = 9.5;
    xent_run(&x, whole, most, target, NULL, NULL, 0);
    for (int64_t r = 0; r < rows; r++) {
        double want = -infinity;
        for (int64_t i = 0; i < vocab; i++) want = x.logits[r * vocab + i] > want ? x.logits[r * vocab + i] : want;
        cuda_same("max", most + r, &want, 1);
        want = x.targets[r] >= 0 ? x.logits[r * vocab + x.targets[r]] : -infinity;
        cuda_same("target", target + r, &want, 1);
    }
    for (int64_t r = 0; r < rows; r++) if (most[r] == -infinity) most[r] = x.logits[r * vocab] = 1; /* a row of one or two masked columns */
    xent_run(&x, whole, most, NULL, sum, NULL, 0);
    for (int64_t r = 0; r < rows; r++) {
        double want = 0;
        for (int64_t i = 0; i < vocab; i++) want += exp(x.logits[r * vocab + i] - most[r]);
        cuda_near("sum", sum + r, &want, 1, 0, EXP + (parts + 20) * U); /* logit - max, below 20 and rounded once: 20 u of its exp */
    }
    xent_run(&x, whole, most, NULL, sum, gradient, scale);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < vocab; i++) {
            double p = exp(x.logits[r * vocab + i] - most[r]) / sum[r], want = x.targets[r] < 0 ? 0 : (p - (i == x.targets[r])) * (double)scale;
            cuda_near("gradient", gradient + r * vocab + i, &want, 1, p * (double)scale * (EXP + 24 * U) + 1e-37 + (dtype == LLMPAR_F16 ? 3e-8 : 0), cuda_epsilon(dtype) + U);
            if (x.targets[r] < 0 && (gradient[r * vocab + i] != 0 || signbit(gradient[r * vocab + i]))) TEST_FAIL("a row that does not count: %g", gradient[r * vocab + i]);
        }
    /* On ranks, each with rows of another stride at another place, and rows cut in two. */
    for (int32_t ranks = 1; ranks <= canon; ranks *= 2) {
        if (canon % ranks || vocab < ranks) break;
        for (int32_t k = 0; k < ranks; k++) {
            int64_t begin = llmpar_piece_begin(k, vocab, ranks), end = llmpar_piece_begin(k + 1, vocab, ranks), cut = ops_below(rows + 1);
            xent_part shard = { 0, rows, begin, end - begin, ops_below(3), ops_below(8) };
            xent_part upper = shard, lower = shard;
            upper.rows = cut;
            lower.row = cut;
            lower.rows = rows - cut;
            lower.odd = ops_below(8);
            xent_run(&x, upper, most, NULL, got, NULL, 0);
            xent_run(&x, lower, most + cut, NULL, got + cut, NULL, 0);
            for (int64_t r = 0; r < rows; r++) sums[r * ranks + k] = (float)got[r];
            xent_run(&x, shard, got, other, NULL, NULL, 0);
            for (int64_t r = 0; r < rows; r++) {
                int in = x.targets[r] >= begin && x.targets[r] < end;
                if (other[r] != (in ? x.logits[r * vocab + x.targets[r]] : -infinity)) TEST_FAIL("target of a shard");
            }
            xent_run(&x, shard, most, NULL, sum, part, scale);
            for (int64_t r = 0; r < rows; r++) cuda_same("gradient of a shard", part + r * (end - begin), gradient + r * vocab + begin, end - begin);
        }
        for (int64_t r = 0; r < rows; r++) got[r] = (double)tree_of(sums + r * ranks, ranks);
        cuda_same("sum in shards", got, sum, rows);
    }
    free(x.logits); free(x.targets); free(most); free(target); free(sum); free(got); free(other); free(gradient); free(part); free(sums);
}

TEST(cross_entropy)
{
    const int64_t vocabularies[] = { 1, 7, 64, 100, 333, 1024, 2600 };
    CUDA_OPEN();
    for (int i = 0; i < 7; i++)
        for (int j = 0; j < 3; j++) xent_case(dtypes[j], 1 + ops_below(vocabularies[i] > 300 ? 3 : 11), vocabularies[i], 8, (i + j) % 2);
    xent_case(LLMPAR_F32, 300, 300, 8, 0); /* more rows than blocks */
    xent_case(LLMPAR_BF16, 1100, 20, 2, 0);
    xent_case(LLMPAR_BF16, 3, 700, 32, 0); /* rounds of pieces */
    xent_case(LLMPAR_F32, 3, 50, 43, 1);
    xent_case(LLMPAR_BF16, 5, 900, 1, 1);
    xent_case(LLMPAR_F32, 2, 9000, 2, 0);
    if (!cuda_small()) for (int j = 0; j < 3; j++) xent_case(dtypes[j], 37, 128256, 8, j % 2);
}

TEST(cross_entropy_oddities)
{
    const double infinity = INFINITY, nan = NAN;
    CUDA_OPEN();
    for (int j = 0; j < 3; j++) {
        xent x = { 4, 300, 8, dtypes[j], values(dtypes[j], 4 * 300, 9), NULL };
        int32_t targets[4] = { 5, 5, 5, 5 };
        double most[4], target[4], sum[4];
        xent_part whole = { 0, 4, 0, 300, 0, 0 }, none = { 0, 4, 0, 0, 0, 0 };
        x.targets = targets;
        x.logits[0 * 300 + 211] = nan;
        x.logits[1 * 300 + 17] = infinity;
        for (int i = 0; i < 300; i++) x.logits[2 * 300 + i] = -infinity;
        xent_run(&x, whole, most, target, NULL, NULL, 0);
        CHECK(most[0] != most[0]);
        CHECK(most[1] == infinity);
        CHECK(most[2] == -infinity);
        xent_run(&x, whole, most, NULL, sum, NULL, 0);
        CHECK(sum[0] != sum[0] && sum[1] != sum[1] && sum[2] != sum[2] && sum[3] >= 1);
        xent_run(&x, none, most, target, NULL, NULL, 0); /* a shard without columns */
        CHECK(most[0] == -infinity && target[3] == -infinity);
        xent_run(&x, none, most, NULL, sum, NULL, 0);
        CHECK(sum[0] == 0 && sum[3] == 0);
        free(x.logits);
    }
}

/* ---- what is refused, and what does nothing ---- */

TEST(refusals)
{
    llmpar_embedding_args embedding;
    llmpar_embedding_backward_args gradient;
    llmpar_xent_backward_args xent;
    int32_t memory[8];
    CUDA_OPEN();
    memset(&embedding, 0, sizeof embedding); memset(&gradient, 0, sizeof gradient); memset(&xent, 0, sizeof xent);
    embedding.dtype = gradient.dtype = xent.forward.dtype = LLMPAR_F64;
    CUDA_REFUSED(cuda_gpu->embedding(cuda_gpu, NULL, &embedding), LLMPAR_ERR_UNSUPPORTED, "embedding: dtype f64");
    CUDA_REFUSED(cuda_gpu->embedding_backward(cuda_gpu, NULL, &gradient), LLMPAR_ERR_UNSUPPORTED, "embedding_backward: dtype f64");
    CUDA_REFUSED(cuda_gpu->xent_max(cuda_gpu, NULL, &xent.forward), LLMPAR_ERR_UNSUPPORTED, "xent_max: dtype f64");
    CUDA_REFUSED(cuda_gpu->xent_sum(cuda_gpu, NULL, &xent.forward), LLMPAR_ERR_UNSUPPORTED, "xent_sum: dtype f64");
    CUDA_REFUSED(cuda_gpu->xent_backward(cuda_gpu, NULL, &xent), LLMPAR_ERR_UNSUPPORTED, "xent_backward: dtype f64");
    embedding.dtype = gradient.dtype = xent.forward.dtype = LLMPAR_BF16;
    CUDA_OK(cuda_gpu->embedding(cuda_gpu, NULL, &embedding));
    CUDA_OK(cuda_gpu->embedding_backward(cuda_gpu, NULL, &gradient));
    CUDA_OK(cuda_gpu->xent_max(cuda_gpu, NULL, &xent.forward));
    CUDA_OK(cuda_gpu->xent_sum(cuda_gpu, NULL, &xent.forward));
    CUDA_OK(cuda_gpu->xent_backward(cuda_gpu, NULL, &xent));
    xent.forward.rows = 1;
    CUDA_REFUSED(cuda_gpu->xent_max(cuda_gpu, NULL, &xent.forward), LLMPAR_ERR_ARGUMENT, "xent_max: canon 0, expected at least 1");
    CUDA_REFUSED(cuda_gpu->xent_sum(cuda_gpu, NULL, &xent.forward), LLMPAR_ERR_ARGUMENT, "xent_sum: canon 0, expected at least 1");
    CUDA_REFUSED(cuda_gpu->xent_backward(cuda_gpu, NULL, &xent), LLMPAR_ERR_ARGUMENT, "xent_backward: canon 0, expected at least 1");
    gradient.dim = gradient.v_local = 4;
    gradient.tokens.batch = 3;
    gradient.tokens.t = gradient.tokens.t_total = 1;
    gradient.tokens.leaves = 2;
    CUDA_REFUSED(cuda_gpu->embedding_backward(cuda_gpu, NULL, &gradient), LLMPAR_ERR_ARGUMENT, "2 leaves for batch 3");
    gradient.tokens.leaves = 3;
    gradient.workspace = memory;
    gradient.workspace_bytes = 16;
    CUDA_REFUSED(cuda_gpu->embedding_backward(cuda_gpu, NULL, &gradient), LLMPAR_ERR_ARGUMENT, "workspace of 16 bytes");
    gradient.v_local = (int64_t)1 << 31;
    CUDA_REFUSED(cuda_gpu->embedding_backward(cuda_gpu, NULL, &gradient), LLMPAR_ERR_UNSUPPORTED, "2147483648 rows of the table");
}

TEST_LIST(T_(embedding), T_(embedding_gradient), T_(cross_entropy), T_(cross_entropy_oddities), T_(refusals), T_(cuda_end))
