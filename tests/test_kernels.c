/* Every fast kernel of the CPU device that is no product and no attention (test_gemm and test_attention draw theirs) beside the portable one: random shapes and strides, operands at odd places, outputs full
   of poison with poison around them, every dispatch level of this processor. What has no sum and no fused product has the same bits at every level, a bound of 0. BF16 and F16: test_half. */
#include "ops.h"

/* What one call wrote, as doubles, and how far a level may be off, in parts of the largest. */
enum { OUTPUTS = 8 };
typedef struct written { int count; const char *name[OUTPUTS]; double *x[OUTPUTS], bound[OUTPUTS]; int64_t n[OUTPUTS]; } written;
static void keep(written *w, const char *name, double bound, llmpar_dtype dtype, const void *base, int64_t rows, int64_t width, int64_t ld)
{
    w->name[w->count] = name;
    w->bound[w->count] = bound;
    w->n[w->count] = rows * width;
    w->x[w->count] = ops_zeros(rows * width);
    ops_get(dtype, w->x[w->count++], base, rows, width, ld);
}

/* Shapes and values come from the round's seed, so all levels draw the same; places do not. */
static uint64_t seed;
static int64_t shape[4];     /* rows, width, and two small ones */
static llmpar_device *device;
static double *draws(int64_t n, double scale)
{
    uint64_t places = ops_state;
    double *x;
    seed = seed * 2862933555777941757u + 3037000493u;
    ops_state = seed;
    x = ops_random(n, scale);
    ops_state = places;
    return x;
}
static void *in(int64_t n, double scale)
{
    double *x = draws(n, scale);
    void *base = ops_in(LLMPAR_F32, x, n);
    free(x);
    return base;
}
static void *in_rows(int64_t rows, int64_t width, int64_t ld, double scale)
{
    double *x = draws(rows * width, scale);
    void *base = ops_put(LLMPAR_F32, x, rows, width, ld);
    free(x);
    return base;
}
static void *positive(int64_t n, double scale)
{
    float *x = (float *)in(n, scale);
    for (int64_t i = 0; i < n; i++) x[i] = x[i] < 0 ? -x[i] : x[i] + 1e-3f;
    return x;
}
static int32_t *indices(int64_t n, int64_t below, int none)
{
    double *x = draws(n, 1);
    int32_t *ids = (int32_t *)ops_put(LLMPAR_I32, NULL, 1, n, n);
    for (int64_t i = 0; i < n; i++) ids[i] = none && x[i] > 0.9 ? -1 : (int32_t)(fabs(x[i]) * (double)below * 0.999);
    free(x);
    return ids;
}
static void *out(int64_t n) { return ops_out(LLMPAR_F32, n); }

static void norm(written *w)
{
    int64_t rows = shape[0], d = shape[1], leaves = 1 + shape[2] % 3, n = rows * leaves * d;
    llmpar_rmsnorm_args a;
    llmpar_rmsnorm_backward_args b;
    memset(&a, 0, sizeof a);
    memset(&b, 0, sizeof b);
    a.rows = rows * leaves; a.dim = d; a.eps = 1e-5; a.dtype = b.dtype = LLMPAR_F32;
    a.x = in(n, 1); a.residual = in(n, 1); a.w = in(d, 1); a.sum = out(n); a.y = out(n); a.rstd = out(rows * leaves);
    CHECK_OK(device->rmsnorm(device, NULL, &a));
    keep(w, "rmsnorm sum", 0, LLMPAR_F32, a.sum, 1, n, n);
    keep(w, "rmsnorm y", 1e-6, LLMPAR_F32, a.y, 1, n, n);
    keep(w, "rmsnorm rstd", 5e-7, LLMPAR_F32, a.rstd, 1, rows * leaves, rows * leaves);
    b.tokens.batch = b.tokens.leaves = leaves; b.tokens.t = rows; b.tokens.t_begin = shape[3]; b.tokens.t_total = rows + shape[3]; b.tokens.canon = 8; b.dim = d;
    b.dy = in(n, 1); b.x = a.sum; b.w = a.w; b.rstd = a.rstd; b.dresidual = in(n, 1); b.dx = out(n); b.dw_leaves = shape[2] % 4 ? out(leaves * d) : NULL;
    CHECK_OK(device->rmsnorm_backward(device, NULL, &b));
    keep(w, "rmsnorm dx", 5e-5, LLMPAR_F32, b.dx, 1, n, n); /* of few columns: all cancels but the residual */
    if (b.dw_leaves) keep(w, "rmsnorm dw", 4e-6, LLMPAR_F32, b.dw_leaves, 1, leaves * d, leaves * d);
}

static void rope(written *w)
{
    int64_t half = 1 + shape[1] % 70, heads = 1 + shape[2], ld = 2 * half * heads + shape[3];
    llmpar_rope_args a;
    memset(&a, 0, sizeof a);
    a.batch = 2; a.t = shape[0]; a.heads = heads; a.head_dim = 2 * half; a.ld = ld; a.position = shape[3]; a.inverse = (int)(shape[3] & 1); a.dtype = LLMPAR_F32;
    a.x = in_rows(2 * a.t, 2 * half * heads, ld, 1); a.cosine = in((a.t + a.position) * half, 1); a.sine = in((a.t + a.position) * half, 1);
    CHECK_OK(device->rope(device, NULL, &a));
    keep(w, "rope", 3e-7, LLMPAR_F32, a.x, 2 * a.t, 2 * half * heads, ld);
}

static void swiglu(written *w)
{
    int64_t rows = shape[0], d = shape[1], ld_in = d + shape[2], ld_out = d + shape[3];
    llmpar_swiglu_args a;
    llmpar_swiglu_backward_args b;
    memset(&a, 0, sizeof a);
    memset(&b, 0, sizeof b);
    a.rows = b.rows = rows; a.dim = b.dim = d; a.ld_in = b.ld_in = ld_in; a.ld_out = b.ld_out = ld_out; a.dtype = b.dtype = LLMPAR_F32;
    a.gate = b.gate = in_rows(rows, d, ld_in, 6); a.up = b.up = in_rows(rows, d, ld_in, 1); a.h = ops_put(LLMPAR_F32, NULL, rows, d, ld_out);
    CHECK_OK(device->swiglu(device, NULL, &a));
    keep(w, "swiglu", 1e-6, LLMPAR_F32, a.h, rows, d, ld_out);
    b.dh = in_rows(rows, d, ld_out, 1); b.dgate = ops_put(LLMPAR_F32, NULL, rows, d, ld_in); b.dup = ops_put(LLMPAR_F32, NULL, rows, d, ld_in); b.h = ops_put(LLMPAR_F32, NULL, rows, d, ld_out);
    CHECK_OK(device->swiglu_backward(device, NULL, &b));
    keep(w, "swiglu dgate", 1e-6, LLMPAR_F32, b.dgate, rows, d, ld_in);
    keep(w, "swiglu dup", 1e-6, LLMPAR_F32, b.dup, rows, d, ld_in);
    keep(w, "swiglu h again", 1e-6, LLMPAR_F32, b.h, rows, d, ld_out);
}

static void embedding(written *w)
{
    int64_t vocab = 1 + shape[3] * 7, leaves = 1 + shape[2] % 3, t = shape[0], d = shape[1], rows = leaves * t;
    llmpar_embedding_args a;
    llmpar_embedding_backward_args b;
    memset(&a, 0, sizeof a);
    memset(&b, 0, sizeof b);
    a.rows = rows; a.dim = b.dim = d; a.v_begin = b.v_begin = vocab / 4; a.v_local = b.v_local = vocab - vocab / 4; a.dtype = b.dtype = LLMPAR_F32;
    a.ids = b.ids = indices(rows, vocab, 0); a.table = in(a.v_local * d, 1); a.out = out(rows * d);
    CHECK_OK(device->embedding(device, NULL, &a));
    keep(w, "embedding", 0, LLMPAR_F32, a.out, 1, rows * d, rows * d);
    b.tokens.batch = b.tokens.leaves = leaves; b.tokens.t = b.tokens.t_total = t; b.tokens.canon = 8;
    b.workspace_bytes = device->embedding_backward_workspace(device, &b);
    b.workspace = ops_out(LLMPAR_U8, (int64_t)b.workspace_bytes);
    b.dout = in(rows * d, 1); b.dtable = out(b.v_local * d);
    CHECK_OK(device->embedding_backward(device, NULL, &b));
    keep(w, "embedding gradient", 0, LLMPAR_F32, b.dtable, 1, b.v_local * d, b.v_local * d);
}

static void xent(written *w)
{
    int64_t rows = shape[0], v = shape[1], ld = v + shape[2];
    int64_t *accumulator = (int64_t *)ops_put(LLMPAR_I64, NULL, 1, LLMPAR_EXACT_SUM_LIMBS, LLMPAR_EXACT_SUM_LIMBS);
    llmpar_xent_backward_args g;
    llmpar_xent_args *a = &g.forward;
    llmpar_xent_loss_args l;
    memset(&g, 0, sizeof g);
    memset(&l, 0, sizeof l);
    memset(accumulator, 0, LLMPAR_EXACT_SUM_LIMBS * sizeof *accumulator);
    a->rows = rows; a->ld = ld; a->v_local = v; a->v_total = v + shape[3] * 3; a->v_begin = shape[3]; a->canon = 8; a->dtype = l.dtype = LLMPAR_F32;
    a->logits = in_rows(rows, v, ld, 12); a->targets = indices(rows, v, 1);
    for (int64_t i = 0; i < rows; i++) if (a->targets[i] >= 0) ((int32_t *)(uintptr_t)a->targets)[i] += (int32_t)a->v_begin;
    a->max = out(rows); a->target_logit = out(rows); a->sum = out(rows);
    CHECK_OK(device->xent_max(device, NULL, a));
    keep(w, "xent max", 0, LLMPAR_F32, a->max, 1, rows, rows);
    CHECK_OK(device->xent_sum(device, NULL, a));
    keep(w, "xent sum", 2e-6, LLMPAR_F32, a->sum, 1, rows, rows);
    l.rows = rows; l.max = a->max; l.target_logit = a->target_logit; l.sum = a->sum; l.targets = a->targets; l.accumulator = accumulator;
    l.token_loss = (double *)ops_out(LLMPAR_F64, rows);
    CHECK_OK(device->xent_loss(device, NULL, &l));
    keep(w, "xent loss", 2e-6, LLMPAR_F64, l.token_loss, 1, rows, rows);
    g.scale = 0.5f;
    CHECK_OK(device->xent_backward(device, NULL, &g));
    keep(w, "xent gradient", 2e-6, LLMPAR_F32, a->logits, rows, v, ld);
}

static void elementwise(written *w)
{
    int64_t n = shape[0] * shape[1];
    llmpar_add_args a;
    llmpar_scale_args s;
    llmpar_cast_args c;
    llmpar_copy_rows_args r;
    llmpar_tree_sum_args t;
    const void *parts[9];
    a.count = s.count = c.count = (size_t)n;
    a.dtype = s.dtype = LLMPAR_F32;
    a.a = in(n, 1); a.b = in(n, 3); a.out = out(n);
    CHECK_OK(device->add(device, NULL, &a));
    keep(w, "add", 0, LLMPAR_F32, a.out, 1, n, n);
    s.x = in(n, 1); s.factor = 0.7;
    CHECK_OK(device->scale(device, NULL, &s));
    keep(w, "scale", 0, LLMPAR_F32, s.x, 1, n, n);
    c.in = a.a; c.in_dtype = LLMPAR_F32; c.out = ops_put(LLMPAR_BF16, NULL, 1, n, n); c.out_dtype = shape[3] % 2 ? LLMPAR_BF16 : LLMPAR_F16;
    CHECK_OK(device->cast(device, NULL, &c));
    c.in = c.out; c.in_dtype = c.out_dtype; c.out = out(n); c.out_dtype = LLMPAR_F32;
    CHECK_OK(device->cast(device, NULL, &c));
    keep(w, "casts", 0, LLMPAR_F32, c.out, 1, n, n);
    memset(&t, 0, sizeof t);
    t.n = (int32_t)(1 + shape[2] + shape[3] % 2); t.count = (size_t)n; t.dtype = LLMPAR_F32; t.in = parts;
    for (int32_t j = 0; j < t.n; j++) parts[j] = in(n, 1);
    t.out = out(n);
    CHECK_OK(device->tree_sum(device, NULL, &t));
    keep(w, "tree sum", 0, LLMPAR_F32, t.out, 1, n, n);
    t.out = out(n);
    CHECK_OK(device->max(device, NULL, &t));
    keep(w, "max", 0, LLMPAR_F32, t.out, 1, n, n);
    r.rows = shape[0]; r.width = shape[1]; r.ld_in = shape[1]; r.ld_out = shape[1] + shape[2]; r.size = 4; r.in = a.b; r.out = ops_put(LLMPAR_F32, NULL, r.rows, r.width, r.ld_out);
    CHECK_OK(device->copy_rows(device, NULL, &r));
    keep(w, "copy of rows", 0, LLMPAR_F32, r.out, r.rows, r.width, r.ld_out);
}

static void optimizers(written *w)
{
    int64_t n = shape[0] * shape[1];
    llmpar_adamw_args a;
    llmpar_sgd_args s;
    memset(&a, 0, sizeof a);
    memset(&s, 0, sizeof s);
    a.count = s.count = (size_t)n; a.dtype = s.dtype = LLMPAR_F32;
    a.lr = s.lr = 1e-2; a.beta1 = 0.9; a.beta2 = 0.95; a.eps = 1e-8; a.decay = s.decay = 0.1; a.correction1 = 0.3; a.correction2 = 0.2; a.grad_scale = s.grad_scale = 0.5; s.momentum = 0.9; s.limit = shape[2] % 2 ? 0.25 : 0;
    a.p = in(n, 1); a.g = s.g = in(n, 1); a.m = in(n, 0.1); a.v = positive(n, 0.1);
    CHECK_OK(device->adamw(device, NULL, &a));
    keep(w, "adamw p", 1e-6, LLMPAR_F32, a.p, 1, n, n);
    keep(w, "adamw m", 3e-7, LLMPAR_F32, a.m, 1, n, n);
    keep(w, "adamw v", 3e-7, LLMPAR_F32, a.v, 1, n, n);
    s.p = in(n, 1); s.m = shape[3] % 3 ? in(n, 1) : NULL;
    CHECK_OK(device->sgd(device, NULL, &s));
    keep(w, "sgd p", 3e-7, LLMPAR_F32, s.p, 1, n, n);
    if (s.m) keep(w, "sgd m", 3e-7, LLMPAR_F32, s.m, 1, n, n);
}

/* AdaLomo's: a part of a matrix, from the middle of a row to the middle of another. */
static void adalomo(written *w)
{
    int64_t cols = shape[1], begin = shape[3] % cols, n = shape[0] * cols - begin, rows = shape[0];
    double largest = 0;
    int64_t *squares = (int64_t *)ops_put(LLMPAR_I64, NULL, 1, LLMPAR_EXACT_SUM_LIMBS, LLMPAR_EXACT_SUM_LIMBS), *sums = (int64_t *)ops_put(LLMPAR_I64, NULL, 1, rows + cols, rows + cols);
    double *numbers = (double *)ops_put(LLMPAR_F64, NULL, 1, rows + cols + 2, rows + cols + 2);
    llmpar_square_sum_args q;
    llmpar_largest_args l;
    llmpar_factor_sum_args f;
    llmpar_factor_moment_args m;
    llmpar_adalomo_args a;
    memset(&f, 0, sizeof f);
    memset(&m, 0, sizeof m);
    memset(&a, 0, sizeof a);
    memset(squares, 0, LLMPAR_EXACT_SUM_LIMBS * sizeof *squares);
    memset(sums, 0, (size_t)(rows + cols) * sizeof *sums);
    q.count = l.count = (size_t)n; q.dtype = l.dtype = f.dtype = m.dtype = a.dtype = LLMPAR_F32;
    q.x = l.x = f.g = a.g = in(n, 1); q.accumulator = squares; l.largest = &largest; f.largest = m.largest = &largest;
    CHECK_OK(device->square_sum(device, NULL, &q));
    CHECK_OK(device->largest(device, NULL, &l));
    f.begin = begin; f.count = n; f.cols = cols; f.row_sums = sums; f.col_sums = sums + rows; f.row_bits = f.col_bits = m.bits = 40; f.grad_scale = m.grad_scale = a.grad_scale = 0.5;
    CHECK_OK(device->factor_sum(device, NULL, &f));
    numbers[0] = llmpar_exact_sum_value((const llmpar_exact_sum *)(const void *)squares);
    numbers[1] = largest;
    for (int64_t i = 0; i < rows + cols; i++) numbers[2 + i] = (double)sums[i];
    keep(w, "square sum, largest, factor sums", 0, LLMPAR_F64, numbers, 1, rows + cols + 2, rows + cols + 2);
    m.count = rows; m.sums = sums; m.terms = cols; m.by_mean = 1; m.beta = 0.9; m.eps = 1e-30; m.moment = positive(rows, 1); m.factor = out(rows);
    CHECK_OK(device->factor_moment(device, NULL, &m));
    keep(w, "factors", 3e-7, LLMPAR_F32, m.factor, 1, rows, rows);
    a.begin = begin; a.count = n; a.cols = cols; a.elements = n; a.p = in(n, 1); a.update_squares = squares; a.param_squares = squares; a.lr = 0.1; a.decay = 0.2; a.beta = 0.9; a.eps = 1e-30;
    if (shape[2] % 2) a.row_factor = m.factor, a.col_factor = positive(cols, 1);
    else a.moment = positive(n, 1);
    CHECK_OK(device->adalomo_square(device, NULL, &a));
    numbers[0] = llmpar_exact_sum_value((const llmpar_exact_sum *)(const void *)squares);
    keep(w, "adalomo squares", 1e-6, LLMPAR_F64, numbers, 1, 1, 1);
    CHECK_OK(device->adalomo(device, NULL, &a));
    keep(w, "adalomo p", 2e-6, LLMPAR_F32, a.p, 1, n, n);
}

static void beside_portable(void (*run)(written *w), int rounds)
{
    for (int round = 0; round < test_rounds(rounds); round++) {
        static const int64_t widths[8] = { 1, 3, 15, 16, 17, 64, 127, 1025 };
        written want;
        uint64_t start;
        shape[0] = 1 + ops_below(round % 5 ? 9 : 60);
        shape[1] = round % 3 ? 1 + ops_below(300) : widths[ops_below(8)];
        shape[2] = ops_below(7);
        shape[3] = 1 + ops_below(9);
        start = seed = (uint64_t)round * 977 + ops_bits();
        for (int level = (int)LLMPAR_CPU_PORTABLE; level <= (int)llmpar_cpu_best_level(); level++) {
            ops_way way;
            written got;
            memset(&got, 0, sizeof got);
            way.level = (llmpar_cpu_level)level;
            way.dtype = LLMPAR_F32;
            seed = start;
            device = ops_device(way.level, 1 + (round + level) % 3);
            run(&got);
            ops_release();
            if (level == (int)LLMPAR_CPU_PORTABLE) {
                want = got;
                continue;
            }
            CHECK_INT(got.count, want.count);
            for (int i = 0; i < got.count; i++) {
                if (want.bound[i] == 0) ops_same(want.name[i], way, got.x[i], want.x[i], want.n[i]);
                else ops_near(want.name[i], way, got.x[i], want.x[i], want.n[i], want.bound[i]);
                free(got.x[i]);
            }
        }
        for (int i = 0; i < want.count; i++) free(want.x[i]);
    }
}

TEST(norms) { beside_portable(norm, 60); }
TEST(ropes) { beside_portable(rope, 40); }
TEST(swiglus) { beside_portable(swiglu, 40); }
TEST(embeddings) { beside_portable(embedding, 40); }
TEST(xents) { beside_portable(xent, 60); }
TEST(elementwise_all) { beside_portable(elementwise, 60); }
TEST(optimizers_all) { beside_portable(optimizers, 40); }
TEST(adalomo_all) { beside_portable(adalomo, 40); }
TEST(devices_close) { ops_close(); }

TEST_LIST(T_(norms), T_(ropes), T_(swiglus), T_(embeddings), T_(xents), T_(elementwise_all), T_(optimizers_all), T_(adalomo_all), T_(devices_close))
