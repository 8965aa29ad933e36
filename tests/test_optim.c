/* The optimizers against plain doubles, on one rank and cut over a mesh; learning-rate schedules against their definitions; the loss scale. */
#include "test.h"
#include <math.h>

/* ---- descriptions ---- */

TEST(names_and_defaults)
{
    for (int k = 0; k < LLMPAR_OPTIM_COUNT; k++) {
        llmpar_optim_kind kind = LLMPAR_OPTIM_COUNT;
        CHECK(llmpar_optim_parse(llmpar_optim_name((llmpar_optim_kind)k), &kind) && (int)kind == k);
    }
    llmpar_optim_kind kind = LLMPAR_OPTIM_SGD;
    CHECK(!llmpar_optim_parse("adam", &kind) && kind == LLMPAR_OPTIM_SGD);
    llmpar_optim_desc d;
    memset(&d, 0, sizeof d);
    llmpar_optim_desc_resolve(&d);
    CHECK(d.beta1 == 0.9 && d.beta2 == 0.95 && d.eps == 1e-8 && d.decay == 0.1 && d.clip == 1.0 && d.momentum == 0);
    CHECK_INT(llmpar_optim_states(&d), 2);
    CHECK_INT(llmpar_optim_update_when(&d, 0), LLMPAR_UPDATE_AFTER);
    CHECK_INT(llmpar_optim_update_when(&d, 1), LLMPAR_UPDATE_AFTER);
    memset(&d, 0, sizeof d);
    d.kind = LLMPAR_OPTIM_SGD;
    llmpar_optim_desc_resolve(&d);
    CHECK(d.momentum == 0.9 && d.clip == 1.0 && d.decay < 0 && d.beta1 == 0 && d.beta2 == 0 && d.eps == 0);
    CHECK_INT(llmpar_optim_states(&d), 1);
    d.momentum = -1;
    CHECK_INT(llmpar_optim_states(&d), 0);
    CHECK_INT(llmpar_optim_update_when(&d, 1), LLMPAR_UPDATE_AFTER);
    for (int k = LLMPAR_OPTIM_LOMO; k <= LLMPAR_OPTIM_ADALOMO; k++) {
        memset(&d, 0, sizeof d);
        d.kind = (llmpar_optim_kind)k;
        llmpar_optim_desc_resolve(&d);
        CHECK(d.clip < 0 && d.decay < 0);
        CHECK_INT(llmpar_optim_states(&d), 0);
        CHECK_INT(llmpar_optim_update_when(&d, 0), LLMPAR_UPDATE_INSIDE);
        CHECK_INT(llmpar_optim_update_when(&d, 1), LLMPAR_UPDATE_TWO_PASSES);
        d.clip = 1;
        CHECK_INT(llmpar_optim_update_when(&d, 0), LLMPAR_UPDATE_TWO_PASSES);
    }
    CHECK(llmpar_clip_scale(0.5, 1.0) == 1.0 && llmpar_clip_scale(1.0, 1.0) == 1.0 && llmpar_clip_scale(4.0, 1.0) == 0.25 && llmpar_clip_scale(4.0, 3.0) == 0.75);
    CHECK(llmpar_clip_scale(100, 0) == 1.0 && llmpar_clip_scale(100, -1) == 1.0 && llmpar_clip_scale(0, 1) == 1.0 && llmpar_clip_scale(-1, 1) == 1.0);
}

TEST(wrong_descriptions)
{
    static const double nan = (double)NAN;
    static const struct { llmpar_optim_desc desc; const char *text; } rows[] = {
        { { 1.0, 0, 0, 0, 0, 0, 0, LLMPAR_OPTIM_ADAMW }, "adamw: beta1 = 1" }, { { -0.1, 0, 0, 0, 0, 0, 0, LLMPAR_OPTIM_ADAMW }, "beta1" }, { { 0, 1.5, 0, 0, 0, 0, 0, LLMPAR_OPTIM_ADAMW }, "beta2 = 1.5" },
        { { 0, 0, -1e-8, 0, 0, 0, 0, LLMPAR_OPTIM_ADAMW }, "eps = -1e-08" }, { { 0, nan, 0, 0, 0, 0, 0, LLMPAR_OPTIM_ADAMW }, "beta2" }, { { 0, 0, nan, 0, 0, 0, 0, LLMPAR_OPTIM_ADAMW }, "eps" },
        { { 0, 0, 0, 1.5, 0, 0, 0, LLMPAR_OPTIM_SGD }, "sgd: decay = 1.5" }, { { 0, 0, 0, nan, 0, 0, 0, LLMPAR_OPTIM_ADALOMO }, "adalomo: decay" }, { { 0, 0, 0, 0, nan, 0, 0, LLMPAR_OPTIM_SGD }, "clip" },
        { { 0, 0, 0, 0, 0, -0.5, 0, LLMPAR_OPTIM_LOMO }, "lomo: clip_value = -0.5" }, { { 0, 0, 0, 0, 0, nan, 0, LLMPAR_OPTIM_SGD }, "clip_value" },
        { { 0, 0, 0, 0, 0, 0, 1, LLMPAR_OPTIM_SGD }, "sgd: momentum = 1, expected below 1" }, { { 0, 0, 0, 0, 0, 0, nan, LLMPAR_OPTIM_SGD }, "momentum" },
        { { 0, 1, 0, 0, 0, 0, 0, LLMPAR_OPTIM_ADALOMO }, "adalomo: beta2 = 1" }, { { 0, 0, 1, 0, 0, 0, 0, LLMPAR_OPTIM_ADALOMO }, "adalomo: eps = 1" },
        /* what an optimizer does not have */
        { { 0, 0, 0, 0, 0, 0, 0.9, LLMPAR_OPTIM_ADAMW }, "adamw: momentum = 0.9, expected 0" }, { { 0, 0, 0, 0, 0, 1, 0, LLMPAR_OPTIM_ADAMW }, "adamw: clip_value" }, { { 0.9, 0, 0, 0, 0, 0, 0, LLMPAR_OPTIM_SGD }, "sgd: beta1" },
        { { 0, 0.9, 0, 0, 0, 0, 0, LLMPAR_OPTIM_LOMO }, "lomo: beta2" }, { { 0, 0, 1e-8, 0, 0, 0, 0, LLMPAR_OPTIM_LOMO }, "lomo: eps" }, { { 0, 0, 0, 0, 0, 0, 0.9, LLMPAR_OPTIM_LOMO }, "lomo: momentum" },
        { { 0.9, 0, 0, 0, 0, 0, 0, LLMPAR_OPTIM_ADALOMO }, "adalomo: beta1" }, { { 0, 0, 0, 0, 0, 0, 0, (llmpar_optim_kind)LLMPAR_OPTIM_COUNT }, "kind = 4" },
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        llmpar_error error;
        llmpar_optim_desc desc = rows[i].desc;
        llmpar_error_clear(&error);
        llmpar_optim_desc_resolve(&desc);
        CHECK_STATUS(llmpar_optim_desc_check(&desc, &error), LLMPAR_ERR_ARGUMENT);
        CHECK_TEXT(error.text, rows[i].text);
    }
    for (int k = 0; k < LLMPAR_OPTIM_COUNT; k++) {
        llmpar_error error;
        llmpar_optim_desc desc;
        memset(&desc, 0, sizeof desc);
        desc.kind = (llmpar_optim_kind)k;
        llmpar_optim_desc_resolve(&desc);
        CHECK_OK(llmpar_optim_desc_check(&desc, &error));
    }
}

/* ---- learning rate ---- */

static double rate(llmpar_lr_kind kind, double lr, double lr_min, int64_t warmup, int64_t total, int64_t decay_steps, int64_t step)
{
    llmpar_lr_desc d = { lr, lr_min, warmup, total, decay_steps, kind };
    llmpar_error error;
    llmpar_lr_desc_resolve(&d);
    CHECK_OK(llmpar_lr_desc_check(&d, &error));
    return llmpar_lr(&d, step);
}

TEST(cosine)
{
    const double pi = 3.14159265358979323846;
    CHECK(llmpar_lr_cosine(1e-3, 1e-4, 0, 0, 1) == 1e-3 && llmpar_lr_cosine(1e-3, 1e-4, 0, 0, 1000000) == 1e-3); /* constant */
    for (int i = 1; i <= 10; i++) CHECK_NEAR(llmpar_lr_cosine(2.0, 0.5, 10, 0, i), 0.2 * i, 1e-15);
    CHECK(llmpar_lr_cosine(2.0, 0.5, 10, 0, 11) == 2.0);
    for (int i = 1; i <= 130; i++) {
        double want = i <= 20 ? 3.0 * i / 20 : i >= 120 ? 0.25 : 0.25 + 0.5 * 2.75 * (1 + cos(pi * (i - 20) / 100));
        CHECK_NEAR(llmpar_lr_cosine(3.0, 0.25, 20, 120, i), want, 1e-14);
        CHECK(rate(LLMPAR_LR_COSINE, 3.0, 0.25, 20, 120, 0, i) == llmpar_lr_cosine(3.0, 0.25, 20, 120, i));
    }
    CHECK(llmpar_lr_cosine(3.0, 0.25, 20, 120, 20) == 3.0 && llmpar_lr_cosine(3.0, 0.25, 20, 120, 120) == 0.25 && llmpar_lr_cosine(3.0, 0.25, 20, 120, 121) == 0.25);
    CHECK_NEAR(llmpar_lr_cosine(3.0, 0.25, 20, 120, 70), 1.625, 1e-15); /* half way */
}

TEST(schedules)
{
    for (int64_t i = 1; i <= 220; i++) {
        double up = 2.0 * (double)i / 20, x = i >= 200 ? 1 : i <= 160 ? 0 : ((double)i - 160) / 40;
        CHECK_NEAR(rate(LLMPAR_LR_CONSTANT, 2.0, 0.5, 20, 200, 0, i), i < 20 ? up : 2.0, 1e-15);
        CHECK_NEAR(rate(LLMPAR_LR_LINEAR, 2.0, 0.5, 20, 200, 0, i), i < 20 ? up : i >= 200 ? 0.5 : 2.0 - 1.5 * ((double)i - 20) / 180, 1e-14);
        CHECK_NEAR(rate(LLMPAR_LR_WSD, 2.0, 0.5, 20, 200, 40, i), i < 20 ? up : 0.5 + 1.5 * (1 - x), 1e-14);
        CHECK_NEAR(rate(LLMPAR_LR_WSD_SQRT, 2.0, 0.5, 20, 200, 40, i), i < 20 ? up : 0.5 + 1.5 * (1 - sqrt(x)), 1e-14);
        CHECK_NEAR(rate(LLMPAR_LR_ONE_CYCLE, 2.0, 0.5, 0, 200, 0, i), i < 100 ? 2.0 * (double)i / 100 : i >= 200 ? 0.5 : 0.5 + 1.5 * (2 - (double)i / 100), 1e-14);
        CHECK_NEAR(rate(LLMPAR_LR_ONE_CYCLE, 2.0, 0, 0, 7, 0, i), i >= 7 ? 0 : 2.0 * ((double)i < 3.5 ? (double)i / 3.5 : 2 - (double)i / 3.5), 1e-14);
        /* without an end: constant after the warm-up */
        CHECK_NEAR(rate(LLMPAR_LR_LINEAR, 2.0, 0.5, 20, 0, 0, i), i < 20 ? up : 2.0, 1e-15);
        CHECK_NEAR(rate(LLMPAR_LR_WSD, 2.0, 0.5, 20, 0, 0, i), i < 20 ? up : 2.0, 1e-15);
    }
    /* ends, to the bit */
    for (int k = 0; k < LLMPAR_LR_COUNT; k++) {
        int64_t warmup = k == LLMPAR_LR_ONE_CYCLE ? 0 : 3;
        llmpar_lr_kind kind = (llmpar_lr_kind)k;
        double floor = k == LLMPAR_LR_CONSTANT ? 2.0 : 0.5, last = rate(kind, 2.0, 0.5, warmup, 40, 0, 1);
        CHECK(rate(kind, 2.0, 0.5, warmup, 40, 0, 40) == floor && rate(kind, 2.0, 0.5, warmup, 40, 0, 41) == floor && rate(kind, 2.0, 0.5, warmup, 40, 0, INT64_C(1) << 40) == floor);
        CHECK(rate(kind, 2.0, 0.5, warmup, 40, 0, warmup ? warmup : 20) == 2.0);
        /* no jump: at most the warm-up's rise, and sqrt's first step down */
        for (int64_t i = 2; i < 4000; i++) {
            double now = rate(kind, 2.0, 0.5, warmup * 100, 4000, 0, i);
            if (i > 2 && fabs(now - last) > (k == LLMPAR_LR_WSD_SQRT ? 1.5 * sqrt(1.0 / 400) + 1e-12 : 2.0 / 300 + 1e-12)) TEST_FAIL("%s jumps from %g to %g at step %lld", llmpar_lr_name(kind), last, now, (long long)i);
            last = now;
        }
        llmpar_lr_kind parsed = LLMPAR_LR_COUNT;
        CHECK(llmpar_lr_parse(llmpar_lr_name(kind), &parsed) && parsed == kind);
    }
    llmpar_lr_desc d = { 1, 0, 0, 200, 0, LLMPAR_LR_WSD };
    llmpar_lr_desc_resolve(&d);
    CHECK_INT(d.decay_steps, 20);
    d.decay_steps = 0, d.total = 5;
    llmpar_lr_desc_resolve(&d);
    CHECK_INT(d.decay_steps, 1);
    llmpar_lr_kind kind = LLMPAR_LR_WSD;
    CHECK(!llmpar_lr_parse("cos", &kind) && kind == LLMPAR_LR_WSD);
}

TEST(wrong_schedules)
{
    static const struct { llmpar_lr_desc desc; const char *text; } rows[] = {
        { { 0, 0, 0, 0, 0, LLMPAR_LR_COSINE }, "lr = 0" }, { { -1e-3, 0, 0, 0, 0, LLMPAR_LR_COSINE }, "lr = -0.001" }, { { (double)INFINITY, 0, 0, 0, 0, LLMPAR_LR_CONSTANT }, "lr = inf" }, { { (double)NAN, 0, 0, 0, 0, LLMPAR_LR_LINEAR }, "lr = " },
        { { 1, -0.1, 0, 0, 0, LLMPAR_LR_COSINE }, "lr_min = -0.1" }, { { 1, 1.5, 0, 0, 0, LLMPAR_LR_COSINE }, "lr_min = 1.5" }, { { 1, 0, -1, 0, 0, LLMPAR_LR_COSINE }, "warmup = -1" }, { { 1, 0, 0, -2, 0, LLMPAR_LR_COSINE }, "total = -2" },
        { { 1, 0, 11, 10, 0, LLMPAR_LR_LINEAR }, "warmup = 11, expected at most total = 10" }, { { 1, 0, 0, 10, 3, LLMPAR_LR_COSINE }, "decay_steps = 3, expected 0: cosine" }, { { 1, 0, 4, 10, 7, LLMPAR_LR_WSD }, "decay_steps = 7, expected at most total - warmup = 10 - 4" },
        { { 1, 0, 0, 0, 5, LLMPAR_LR_WSD_SQRT }, "decay_steps = 5" }, { { 1, 0, 0, 10, -1, LLMPAR_LR_WSD }, "decay_steps = -1" }, { { 1, 0, 0, 0, 0, LLMPAR_LR_ONE_CYCLE }, "total = 0" }, { { 1, 0, 2, 10, 0, LLMPAR_LR_ONE_CYCLE }, "warmup = 2, expected 0" },
        { { 1, 0, 0, 0, 0, (llmpar_lr_kind)-1 }, "kind = -1" },
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        llmpar_error error;
        llmpar_lr_desc d = rows[i].desc;
        llmpar_error_clear(&error);
        llmpar_lr_desc_resolve(&d);
        CHECK_STATUS(llmpar_lr_desc_check(&d, &error), LLMPAR_ERR_ARGUMENT);
        CHECK_TEXT(error.text, rows[i].text);
    }
}

/* ---- loss scale ---- */

TEST(loss_scale)
{
    llmpar_loss_scale s;
    llmpar_error error;
    llmpar_error_clear(&error);
    memset(&s, 0, sizeof s);
    llmpar_loss_scale_resolve(&s);
    CHECK_OK(llmpar_loss_scale_check(&s, &error));
    CHECK(s.scale == 65536 && s.least == ldexp(1, -14) && s.most == ldexp(1, 24) && s.interval == 2000);
    for (int i = 0; i < 1999; i++) CHECK_OK(llmpar_loss_scale_update(&s, 0, &error));
    CHECK(s.scale == 65536);
    CHECK_OK(llmpar_loss_scale_update(&s, 1, &error)); /* the count starts again */
    CHECK(s.scale == 32768);
    for (int i = 0; i < 1999; i++) CHECK_OK(llmpar_loss_scale_update(&s, 0, &error));
    CHECK(s.scale == 32768);
    CHECK_OK(llmpar_loss_scale_update(&s, 0, &error));
    CHECK(s.scale == 65536 && s.finite_steps == 0);
    /* the ceiling, then down to the floor and no further */
    s.interval = 1;
    for (int i = 0; i < 12; i++) CHECK_OK(llmpar_loss_scale_update(&s, 0, &error));
    CHECK(s.scale == ldexp(1, 24));
    int halved = 0;
    while (!llmpar_loss_scale_update(&s, 1, &error)) halved++;
    CHECK_INT(halved, 38);
    CHECK(s.scale == ldexp(1, -14));
    CHECK_STATUS(llmpar_loss_scale_update(&s, 1, &error), LLMPAR_ERR_NONFINITE);
    CHECK_TEXT(error.text, "not finite at the least scale, 6.10352e-05");
    CHECK_OK(llmpar_loss_scale_update(&s, 0, &error));
    CHECK(s.scale == ldexp(1, -13));
    static const struct { llmpar_loss_scale state; const char *text; } rows[] = {
        { { 3, 0, 0, 0, 0 }, "scale = 3" }, { { -2, 0, 0, 0, 0 }, "scale = -2" }, { { 0, 0.3, 0, 0, 0 }, "least = 0.3" }, { { 0, 0, (double)INFINITY, 0, 0 }, "most = inf" }, { { 16, 32, 0, 0, 0 }, "scale = 16, expected 32" }, { { 16, 0, 8, 0, 0 }, "scale = 16" },
        { { 0, 0, 0, -1, 0 }, "interval = -1" }, { { 0, 0, 0, 0, -1 }, "finite_steps = -1" }, { { (double)NAN, 0, 0, 0, 0 }, "scale = " },
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        llmpar_loss_scale state = rows[i].state;
        llmpar_error_clear(&error);
        llmpar_loss_scale_resolve(&state);
        CHECK_STATUS(llmpar_loss_scale_check(&state, &error), LLMPAR_ERR_ARGUMENT);
        CHECK_TEXT(error.text, rows[i].text);
    }
}

/* ---- updates: gradients from a formula, cut as the parameters are, against plain doubles ---- */

/* Two units. w: rows over tp; v: columns over tp; kv: rows over tp in grains of 3, two ranks a copy where tp = 4; norm: whole everywhere; cube: of three dims; bias: cut over tp; one column, one row. */
#define WHOLE { LLMPAR_REPLICATE, LLMPAR_AXIS_DP_REPLICATE, 0, 0, 0, 0, 0 }
#define CUT(dim, grain) { LLMPAR_SHARD, LLMPAR_AXIS_TP, dim, 0, grain, 0, 0 }
static const llmpar_param first_params[] = {
    { "w", 2, 0, { 32, 19 }, CUT(0, 0), 0.5, 0 }, { "norm", 1, 1, { 37 }, WHOLE, 0.5, 0 }, { "v", 2, 0, { 11, 24 }, CUT(1, 0), 0.01, 0 }, { "kv", 2, 0, { 6, 13 }, CUT(0, 3), 0.2, 0 },
};
static const llmpar_param second_params[] = {
    { "cube", 3, 0, { 3, 5, 7 }, WHOLE, 0.3, 0 }, { "bias", 1, 1, { 28 }, CUT(0, 0), 0, 0 }, { "column", 2, 0, { 40, 1 }, WHOLE, 0.1, 0 }, { "row", 2, 0, { 1, 200 }, CUT(1, 0), 0.1, 0 },
};
enum { TENSORS = 8, LARGEST = 640, UPDATES = 5, RANKS = 8 };
static const llmpar_param *param_of(int k) { return k < 4 ? &first_params[k] : &second_params[k - 4]; }
static int64_t rows_of(int k) { return param_of(k)->dims > 1 ? param_of(k)->shape[0] : 1; }
static int64_t count_of(int k)
{
    int64_t n = 1;
    for (int d = 0; d < param_of(k)->dims; d++) n *= param_of(k)->shape[d];
    return n;
}

/* Exact in f32. Rows differ by up to a factor of a thousand; one row is zero; steps differ, too. */
static double gradient(int k, int64_t i, int step)
{
    int64_t row = i / (count_of(k) / rows_of(k));
    double x = sin(0.37 * (double)(i * (k + 3)) + 1.7 * step + k);
    if (k == 0 && row == 5) return 0;
    return (double)(float)(x * exp2(-(double)(row % 10) - (double)(step % 3)));
}

typedef struct rank_job {
    llmpar_mesh_desc mesh;
    int zero, steps, tiny;
    llmpar_dtype dtype;
    llmpar_optim_desc desc;
    double lr, scale;
    double (*values)[LARGEST]; /* out: [RANKS][TENSORS], the parameters in the end, as each rank has them */
    double (*before)[LARGEST];
    uint64_t state;            /* out: OPTIMIZER bytes of rank 0 */
} rank_job;

static void put_reals(void *out, const double *in, int64_t n, llmpar_dtype dtype) { CHECK(llmpar_convert(out, dtype, in, LLMPAR_F64, (size_t)n)); }

/* Tensor k whole on every rank. Collective. */
static llmpar_status look(llmpar_fsdp *fsdp, llmpar_stream *stream, int k, double *out)
{
    const llmpar_mesh *mesh = llmpar_fsdp_mesh(fsdp);
    int32_t unit = k / 4, p = k % 4;
    llmpar_dtensor tensor;
    llmpar_fsdp_dtensor(fsdp, unit, p, &tensor);
    double full[LARGEST];
    void *scratch = malloc((size_t)llmpar_dtensor_full_scratch(&tensor, mesh) * sizeof(double) + 1);
    llmpar_status status = llmpar_dtensor_full(&tensor, mesh, stream, llmpar_fsdp_local(fsdp, unit, p, llmpar_fsdp_shard(fsdp, unit, NULL, NULL, NULL)), scratch, full);
    if (!status) status = mesh->ctx->device->synchronize(mesh->ctx->device, stream);
    if (!status) CHECK(llmpar_convert(out, LLMPAR_F64, full, tensor.dtype, (size_t)count_of(k)));
    free(scratch);
    return status;
}

static llmpar_status updates_rank(llmpar_ctx *ctx, void *user)
{
    rank_job *j = (rank_job *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_fsdp *fsdp = NULL;
    llmpar_optim *optim = NULL;
    llmpar_stream *stream = NULL;
    llmpar_unit units[2];
    llmpar_fsdp_desc desc;
    memset(units, 0, sizeof units);
    memset(&desc, 0, sizeof desc);
    llmpar_param first[4];
    memcpy(first, first_params, sizeof first);
    if (j->mesh.tp == 4) first[3].tp.replicas = 2;
    units[0].name = "first", units[0].params = first, units[0].param_count = 4;
    units[1].name = "second", units[1].params = second_params, units[1].param_count = 4;
    llmpar_optim_desc resolved = j->desc;
    llmpar_optim_desc_resolve(&resolved);
    desc.zero = j->zero;
    desc.dtype = j->dtype;
    desc.seed = 5;
    desc.optimizer_states = llmpar_optim_states(&resolved);
    llmpar_status status = llmpar_mesh_create(ctx, &j->mesh, &mesh);
    if (!status) status = llmpar_fsdp_create(mesh, units, 2, &desc, &fsdp);
    if (!status) status = ctx->device->stream_create(ctx->device, "test", &stream);
    if (!status) status = llmpar_optim_create(fsdp, &j->desc, &optim);
    if (!status && ctx->rank == 0) {
        llmpar_arena_usage usage;
        llmpar_arena_get_usage(llmpar_fsdp_arena(fsdp), &usage);
        j->state = usage.live[LLMPAR_TAG_OPTIMIZER];
        if (!desc.optimizer_states) CHECK_INT(llmpar_optim_bytes(optim), j->state);
    }
    double value[LARGEST];
    for (int k = 0; !status && k < TENSORS && j->before; k++) {
        status = look(fsdp, stream, k, value);
        if (!status && ctx->rank == 0) memcpy(j->before[k], value, sizeof value);
    }
    for (int step = 1; !status && step <= j->steps; step++) {
        const llmpar_optimizer *table = llmpar_optim_table(optim);
        double factor = 0;
        llmpar_optim_set_lr(optim, j->lr / step);
        status = table->begin_step(table->state, resolved.clip > 0 ? 1.0 : -1, &factor);
        CHECK(factor == (resolved.clip > 0 ? llmpar_clip_scale(1.0, resolved.clip) : 1.0));
        for (int32_t u = 1; u >= 0 && !status; u--) {
            llmpar_update update;
            memset(&update, 0, sizeof update);
            update.unit = u;
            update.dtype = j->dtype;
            update.param = llmpar_fsdp_shard(fsdp, u, &update.elements, &update.segments, &update.segment_count);
            void *grad = calloc((size_t)update.elements, sizeof(double));
            for (int p = 0; p < 4; p++) {
                llmpar_dtensor tensor;
                double full[LARGEST], typed[LARGEST];
                for (int64_t i = 0; i < count_of(4 * u + p); i++) full[i] = gradient(4 * u + p, i, step) * (j->tiny && i % 3 ? ldexp(1, -40) : 1);
                put_reals(typed, full, count_of(4 * u + p), j->dtype);
                llmpar_fsdp_dtensor(fsdp, u, p, &tensor);
                llmpar_dtensor_cut(&tensor, mesh, typed, llmpar_fsdp_local(fsdp, u, p, grad));
            }
            update.grad = grad;
            for (int i = 0; i < desc.optimizer_states; i++) update.state[i] = llmpar_fsdp_optimizer_state(fsdp, u, i);
            update.grad_scale = factor * j->scale;
            update.stream = stream;
            status = table->update(table->state, &update);
            if (!status) status = ctx->device->synchronize(ctx->device, stream);
            free(grad);
        }
    }
    if (!status) CHECK_INT(llmpar_optim_steps(optim), j->steps);
    for (int k = 0; !status && k < TENSORS; k++) {
        status = look(fsdp, stream, k, value);
        if (!status) memcpy(j->values[ctx->rank * TENSORS + k], value, sizeof value);
    }
    for (int32_t u = 0; !status && u < 2; u++) { /* padding stays zero */
        int64_t elements, at = 0;
        const llmpar_segment *segments;
        int32_t count;
        const char *shard = (const char *)llmpar_fsdp_shard(fsdp, u, &elements, &segments, &count);
        size_t size = llmpar_dtype_size(j->dtype);
        for (int32_t s = 0; s <= count; s++) {
            int64_t end = s < count ? segments[s].begin : elements;
            for (size_t b = (size_t)at * size; b < (size_t)end * size; b++)
                if (shard[b]) { TEST_FAIL("padding of unit %d was updated", u); break; }
            if (s < count) at = segments[s].begin + segments[s].count;
        }
    }
    if (stream) ctx->device->stream_destroy(ctx->device, stream);
    llmpar_optim_destroy(optim);
    llmpar_fsdp_destroy(fsdp);
    llmpar_mesh_destroy(mesh);
    return status;
}

static llmpar_status updates(rank_job *j, llmpar_error *error)
{
    llmpar_launch_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.ranks = j->mesh.dp_replicate * j->mesh.dp_shard * j->mesh.tp;
    desc.check = test_no_leak;
    return llmpar_launch(&desc, updates_rank, j, error);
}

/* The same in doubles. */
typedef struct plain { double p[TENSORS][LARGEST], m[TENSORS][LARGEST], v[TENSORS][LARGEST], rows[TENSORS][64], cols[TENSORS][256]; } plain;

static void plain_adalomo(plain *q, int k, const double *g, const llmpar_optim_desc *d, double lr, double decay, int step)
{
    int64_t n = count_of(k), rows = rows_of(k), cols = n / rows;
    double beta = d->beta2 > 0 ? d->beta2 : 1 - pow(step, -0.8), mean = 0, u[LARGEST], squares = 0, size = 0;
    if (param_of(k)->dims == 2) {
        for (int64_t r = 0; r < rows; r++) {
            double sum = 0;
            for (int64_t c = 0; c < cols; c++) sum += g[r * cols + c] * g[r * cols + c] + d->eps;
            q->rows[k][r] = beta * q->rows[k][r] + (1 - beta) * sum / (double)cols;
            mean += q->rows[k][r] / (double)rows;
        }
        for (int64_t c = 0; c < cols; c++) {
            double sum = 0;
            for (int64_t r = 0; r < rows; r++) sum += g[r * cols + c] * g[r * cols + c] + d->eps;
            q->cols[k][c] = beta * q->cols[k][c] + (1 - beta) * sum / (double)rows;
        }
        for (int64_t i = 0; i < n; i++) u[i] = g[i] / sqrt(q->rows[k][i / cols] * q->cols[k][i % cols] / mean);
    } else {
        for (int64_t i = 0; i < n; i++) {
            q->v[k][i] = beta * q->v[k][i] + (1 - beta) * (g[i] * g[i] + d->eps);
            u[i] = g[i] / sqrt(q->v[k][i]);
        }
    }
    for (int64_t i = 0; i < n; i++) squares += u[i] * u[i], size += q->p[k][i] * q->p[k][i];
    double rate = lr * fmax(1e-3, sqrt(size / (double)n)), norm = fmax(1, sqrt(squares / (double)n));
    for (int64_t i = 0; i < n; i++) q->p[k][i] -= rate * (decay * q->p[k][i] + u[i] / norm);
}

static void plain_update(plain *q, const rank_job *j, int step)
{
    llmpar_optim_desc d = j->desc;
    llmpar_optim_desc_resolve(&d);
    double lr = j->lr / step, clip = d.clip > 0 ? fmin(1, d.clip) : 1;
    for (int k = 0; k < TENSORS; k++) {
        double g[LARGEST], decay = param_of(k)->no_decay || d.decay < 0 ? 0 : d.decay;
        for (int64_t i = 0; i < count_of(k); i++) {
            g[i] = gradient(k, i, step) * clip * j->scale;
            if (d.clip_value > 0) g[i] = fmax(-d.clip_value, fmin(d.clip_value, g[i]));
        }
        if (d.kind == LLMPAR_OPTIM_ADALOMO) { plain_adalomo(q, k, g, &d, lr, decay, step); continue; }
        for (int64_t i = 0; i < count_of(k); i++) {
            double *m = &q->m[k][i], *v = &q->v[k][i], keep = 1 - lr * decay;
            if (d.kind == LLMPAR_OPTIM_ADAMW) {
                *m = d.beta1 * *m + (1 - d.beta1) * g[i];
                *v = d.beta2 * *v + (1 - d.beta2) * g[i] * g[i];
                q->p[k][i] = q->p[k][i] * keep - lr * (*m / (1 - pow(d.beta1, step))) / (sqrt(*v / (1 - pow(d.beta2, step))) + d.eps);
            } else {
                *m = d.kind == LLMPAR_OPTIM_SGD && d.momentum > 0 ? (step == 1 ? g[i] : d.momentum * *m + g[i]) : g[i];
                q->p[k][i] = q->p[k][i] * keep - lr * *m;
            }
        }
    }
}

static const llmpar_optim_desc kinds[] = {
    { 0, 0, 0, 0, 0, 0, 0, LLMPAR_OPTIM_ADAMW }, { 0.8, 0.99, 1e-6, 0.3, -1, 0, 0, LLMPAR_OPTIM_ADAMW },
    { 0, 0, 0, 0, 0, 0, 0, LLMPAR_OPTIM_SGD }, { 0, 0, 0, 0.2, 0.5, 0.3, 0.7, LLMPAR_OPTIM_SGD }, { 0, 0, 0, 0, -1, 0, -1, LLMPAR_OPTIM_SGD },
    { 0, 0, 0, 0, 0, 0, 0, LLMPAR_OPTIM_LOMO }, { 0, 0, 0, 0.1, 0.25, 0.1, 0, LLMPAR_OPTIM_LOMO },
    { 0, 0, 0, 0, 0, 0, 0, LLMPAR_OPTIM_ADALOMO }, { 0, 0.97, 1e-12, 0.2, 0.5, 0, 0, LLMPAR_OPTIM_ADALOMO },
};
enum { KINDS = sizeof kinds / sizeof kinds[0] };

TEST(plain_doubles)
{
    static double values[RANKS * TENSORS][LARGEST], before[TENSORS][LARGEST];
    static plain q;
    for (int kind = 0; kind < KINDS; kind++)
        for (int dtype = LLMPAR_F32; dtype <= LLMPAR_F64; dtype++) {
            rank_job j = { { 1, 2, 1, 1, 2 }, LLMPAR_ZERO_3, UPDATES, 0, (llmpar_dtype)dtype, kinds[kind], 0.05, 0.5, values, before, 0 };
            llmpar_error error;
            if (updates(&j, &error)) { TEST_FAIL("optimizer %d: %s", kind, error.text); continue; }
            memset(&q, 0, sizeof q);
            memcpy(q.p, before, sizeof q.p);
            for (int step = 1; step <= UPDATES; step++) plain_update(&q, &j, step);
            for (int k = 0; k < TENSORS; k++)
                for (int64_t i = 0; i < count_of(k); i++)
                    if (!(fabs(values[k][i] - q.p[k][i]) <= (dtype == LLMPAR_F64 ? 1e-12 : 1e-6))) {
                        TEST_FAIL("optimizer %d (%s, %s): %s[%lld] is %.17g, want %.17g", kind, llmpar_optim_name(kinds[kind].kind), llmpar_dtype_name((llmpar_dtype)dtype), param_of(k)->name, (long long)i, values[k][i], q.p[k][i]);
                        break;
                    }
        }
}

TEST(same_bits)
{
    static const struct { llmpar_mesh_desc mesh; int zero; } rows[] = {
        { { 1, 1, 1, 1, 1 }, 0 }, { { 1, 2, 1, 1, 1 }, LLMPAR_ZERO_3 }, { { 1, 4, 1, 1, 1 }, LLMPAR_ZERO_3 }, { { 1, 1, 1, 1, 2 }, LLMPAR_ZERO_3 }, { { 1, 2, 1, 1, 2 }, LLMPAR_ZERO_3 }, { { 1, 1, 1, 1, 4 }, LLMPAR_ZERO_3 },
        { { 2, 2, 1, 1, 1 }, LLMPAR_ZERO_3 }, { { 1, 2, 1, 1, 1 }, LLMPAR_ZERO_0 }, { { 1, 2, 1, 1, 2 }, LLMPAR_ZERO_0 }, { { 1, 4, 1, 1, 1 }, LLMPAR_ZERO_1 }, { { 2, 2, 1, 1, 2 }, LLMPAR_ZERO_2 }, { { 1, 3, 1, 1, 1 }, LLMPAR_ZERO_3 },
    };
    static double values[RANKS * TENSORS][LARGEST], one[TENSORS][LARGEST];
    for (int kind = 0; kind < KINDS; kind++)
        for (int dtype = LLMPAR_F32; dtype <= LLMPAR_F64; dtype++)
            for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
                rank_job j = { rows[i].mesh, rows[i].zero, UPDATES, kind == 7, (llmpar_dtype)dtype, kinds[kind], 0.05, 0.3, values, NULL, 0 };
                llmpar_error error;
                if (updates(&j, &error)) { TEST_FAIL("optimizer %d, mesh %d: %s", kind, (int)i, error.text); continue; }
                if (i == 0) memcpy(one, values, sizeof one);
                for (int r = 0, ranks = rows[i].mesh.dp_replicate * rows[i].mesh.dp_shard * rows[i].mesh.tp; r < ranks; r++)
                    for (int k = 0; k < TENSORS; k++)
                        if (memcmp(values[r * TENSORS + k], one[k], (size_t)count_of(k) * sizeof(double)))
                            TEST_FAIL("optimizer %d (%s, %s), mesh %d: %s of rank %d differs from one rank's", kind, llmpar_optim_name(kinds[kind].kind), llmpar_dtype_name((llmpar_dtype)dtype), (int)i, param_of(k)->name, r);
            }
}

/* Gradients of which two in three are a trillionth of the others, in v and row whole columns: no sum loses them, so their updates do not explode and take everything from the others. */
TEST(adalomo_tiny_gradients)
{
    static double values[RANKS * TENSORS][LARGEST], before[TENSORS][LARGEST];
    llmpar_error error;
    rank_job j = { { 1, 2, 1, 1, 1 }, LLMPAR_ZERO_3, 1, 1, LLMPAR_F32, kinds[7], 0.1, 1, values, before, 0 };
    CHECK_OK(updates(&j, &error));
    for (int k = 0; k < TENSORS; k++) {
        double size = 0, moved = 0;
        if (param_of(k)->dims != 2) continue; /* elsewhere every element has a moment of its own */
        for (int64_t i = 0; i < count_of(k); i++) size += before[k][i] * before[k][i];
        size = fmax(1e-3, sqrt(size / (double)count_of(k)));
        for (int64_t i = 0; i < count_of(k); i += 3) moved += fabs(values[k][i] - before[k][i]) / (double)(count_of(k) / 3);
        if (!(moved > 0.1 * size * 0.3)) TEST_FAIL("%s: the large ones moved by %g on average, want about %g", param_of(k)->name, moved, 0.1 * size);
    }
}

/* Bytes as the head of adalomo.c has them. */
TEST(adalomo_bytes)
{
    static double values[RANKS * TENSORS][LARGEST];
    llmpar_error error;
    rank_job j = { { 1, 1, 1, 1, 1 }, 0, 1, 0, LLMPAR_F32, kinds[7], 0.1, 1, values, NULL, 0 };
    CHECK_OK(updates(&j, &error));
    uint64_t first = 4 * (32 + 19 + 11 + 24 + 6 + 13 + 37), second = 4 * (40 + 1 + 1 + 200 + 3 * 5 * 7 + 28), once = 12 * (40 + 1 + 1 + 200) + 1160 * 4;
    CHECK_INT(j.state, llmpar_round_up((int64_t)first, 64) + llmpar_round_up((int64_t)second, 64) + llmpar_round_up((int64_t)once, 64));
    j.desc = kinds[5];
    CHECK_OK(updates(&j, &error));
    CHECK_INT(j.state, 0);
}

/* ---- going down: w[24,18] and b[18] to a target, the gradient is the distance ---- */

static const llmpar_param bowl_params[] = { { "w", 2, 0, { 24, 18 }, CUT(0, 0), 0.5, 0 }, { "b", 1, 1, { 18 }, WHOLE, 0.5, 0 } };

static llmpar_status bowl_rank(llmpar_ctx *ctx, void *user)
{
    const llmpar_optim_desc *optim_desc = (const llmpar_optim_desc *)user;
    llmpar_optim_desc resolved = *optim_desc;
    llmpar_mesh_desc mesh_desc = { 1, 2, 1, 1, 1 };
    llmpar_mesh *mesh = NULL;
    llmpar_fsdp *fsdp = NULL;
    llmpar_optim *optim = NULL;
    llmpar_stream *stream = NULL;
    llmpar_unit unit;
    llmpar_fsdp_desc desc;
    memset(&unit, 0, sizeof unit);
    memset(&desc, 0, sizeof desc);
    unit.name = "bowl", unit.params = bowl_params, unit.param_count = 2;
    llmpar_optim_desc_resolve(&resolved);
    desc.optimizer_states = llmpar_optim_states(&resolved);
    llmpar_status status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_fsdp_create(mesh, &unit, 1, &desc, &fsdp);
    if (!status) status = ctx->device->stream_create(ctx->device, "test", &stream);
    if (!status) status = llmpar_optim_create(fsdp, optim_desc, &optim);
    double first = 0, last = 0;
    llmpar_lr_desc lr = { resolved.kind == LLMPAR_OPTIM_SGD ? 0.05 : resolved.kind == LLMPAR_OPTIM_LOMO ? 0.2 : 0.1, 1e-4, 0, 150, 0, LLMPAR_LR_COSINE };
    for (int step = 1; !status && step <= 150; step++) {
        llmpar_update update;
        double distance = 0;
        memset(&update, 0, sizeof update);
        update.dtype = LLMPAR_F32;
        update.param = llmpar_fsdp_shard(fsdp, 0, &update.elements, &update.segments, &update.segment_count);
        float *grad = (float *)calloc((size_t)update.elements, sizeof *grad);
        for (int32_t s = 0; s < update.segment_count; s++)
            for (int64_t i = update.segments[s].begin; i < update.segments[s].begin + update.segments[s].count; i++) {
                grad[i] = ((const float *)update.param)[i] - (float)sin((double)i);
                distance += (double)grad[i] * (double)grad[i];
            }
        if (step == 1) first = distance;
        last = distance;
        update.grad = grad;
        for (int i = 0; i < desc.optimizer_states; i++) update.state[i] = llmpar_fsdp_optimizer_state(fsdp, 0, i);
        update.stream = stream;
        llmpar_optim_set_lr(optim, llmpar_lr(&lr, step));
        status = llmpar_optim_table(optim)->begin_step(llmpar_optim_table(optim)->state, 1, &update.grad_scale);
        if (!status) status = llmpar_optim_table(optim)->update(llmpar_optim_table(optim)->state, &update);
        free(grad);
    }
    if (!status && !(last < 0.01 * first)) TEST_FAIL("%s: %g after 150 steps from %g", llmpar_optim_name(resolved.kind), last, first);
    if (stream) ctx->device->stream_destroy(ctx->device, stream);
    llmpar_optim_destroy(optim);
    llmpar_fsdp_destroy(fsdp);
    llmpar_mesh_destroy(mesh);
    return status;
}

TEST(descent)
{
    for (int k = 0; k < LLMPAR_OPTIM_COUNT; k++) {
        llmpar_optim_desc desc;
        llmpar_launch_desc launch;
        llmpar_error error;
        memset(&desc, 0, sizeof desc);
        memset(&launch, 0, sizeof launch);
        desc.kind = (llmpar_optim_kind)k;
        desc.decay = -1;
        launch.ranks = 2;
        launch.check = test_no_leak;
        if (llmpar_launch(&launch, bowl_rank, &desc, &error)) TEST_FAIL("%s", error.text);
    }
}

/* ---- refused ---- */

static llmpar_status refused_rank(llmpar_ctx *ctx, void *user)
{
    int what = *(const int *)user;
    llmpar_mesh_desc mesh_desc = { 1, 1, 1, 1, 1 };
    llmpar_mesh *mesh = NULL;
    llmpar_fsdp *fsdp = NULL;
    llmpar_optim *optim = NULL;
    llmpar_unit unit;
    llmpar_fsdp_desc desc;
    llmpar_optim_desc optim_desc;
    memset(&unit, 0, sizeof unit);
    memset(&desc, 0, sizeof desc);
    memset(&optim_desc, 0, sizeof optim_desc);
    unit.name = "bowl", unit.params = bowl_params, unit.param_count = 2;
    desc.optimizer_states = what == 0 ? 1 : what == 1 ? 0 : 2;
    optim_desc.kind = what == 0 ? LLMPAR_OPTIM_ADAMW : what == 1 ? LLMPAR_OPTIM_SGD : what < 4 ? LLMPAR_OPTIM_LOMO : LLMPAR_OPTIM_ADALOMO;
    optim_desc.clip = what == 5 ? 1 : 0;
    if (what == 6) desc.memory_limit = 5000;
    llmpar_status status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_fsdp_create(mesh, &unit, 1, &desc, &fsdp);
    llmpar_device table = *ctx->device; /* an older one */
    if (what == 2) table.sgd = NULL;
    if (what == 3 || what == 4) table.size = (uint32_t)offsetof(llmpar_device, sgd);
    llmpar_device *device = ctx->device;
    if (what >= 2 && what <= 4) ctx->device = &table;
    if (!status) status = llmpar_optim_create(fsdp, &optim_desc, &optim);
    if (status) CHECK(optim == NULL);
    double scale;
    if (!status && what == 5) status = llmpar_optim_table(optim)->begin_step(llmpar_optim_table(optim)->state, -1, &scale);
    ctx->device = device;
    llmpar_optim_destroy(optim);
    llmpar_fsdp_destroy(fsdp);
    llmpar_mesh_destroy(mesh);
    return status;
}

TEST(refused)
{
    static const struct { llmpar_status status; const char *text; } rows[] = {
        { LLMPAR_ERR_ARGUMENT, "adamw: works on 2 numbers of state an element, llmpar_fsdp_desc.optimizer_states = 1" }, { LLMPAR_ERR_ARGUMENT, "sgd: works on 1 numbers" }, { LLMPAR_ERR_UNSUPPORTED, "lomo: device" },
        { LLMPAR_ERR_UNSUPPORTED, "lomo: device" }, { LLMPAR_ERR_UNSUPPORTED, "adalomo: device" }, { LLMPAR_ERR_ARGUMENT, "adalomo: clip = 1 needs the norm" }, { LLMPAR_ERR_MEMORY, "optimizer" },
    };
    for (int what = 0; what < (int)(sizeof rows / sizeof rows[0]); what++) {
        llmpar_launch_desc desc;
        llmpar_error error;
        memset(&desc, 0, sizeof desc);
        desc.ranks = 1;
        desc.check = test_no_leak;
        CHECK_STATUS(llmpar_launch(&desc, refused_rank, &what, &error), rows[what].status);
        CHECK_TEXT(error.text, rows[what].text);
    }
}

/* The nth allocation of one rank fails, for every n: an error on every rank, nothing left. */
static uint64_t failing_call;
static llmpar_status poor_rank(llmpar_ctx *ctx, void *user)
{
    if (ctx->rank == 1) ctx->heap.fail_at = ctx->heap.calls + failing_call;
    return updates_rank(ctx, user);
}

TEST(out_of_memory)
{
    static double values[RANKS * TENSORS][LARGEST];
    int failed = 0;
    for (failing_call = 1; failing_call < 4000; failing_call += failing_call < 40 ? 1 : 7) {
        rank_job j = { { 1, 2, 1, 1, 1 }, LLMPAR_ZERO_3, 1, 0, LLMPAR_F32, kinds[7], 0.1, 1, values, NULL, 0 };
        llmpar_launch_desc desc;
        llmpar_error error;
        memset(&desc, 0, sizeof desc);
        desc.ranks = 2;
        desc.check = test_no_leak;
        llmpar_status status = llmpar_launch(&desc, poor_rank, &j, &error);
        if (!status) break;
        CHECK_STATUS(status, LLMPAR_ERR_MEMORY);
        failed++;
    }
    CHECK(failed > 40 && failing_call < 4000);
}

/* ---- levels ---- */

static float any_float(uint64_t *state)
{
    uint32_t bits;
    float x;
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    bits = (uint32_t)(*state >> 32);
    if (bits % 3) bits = (bits & 0x80ffffffu) | 0x3a000000u; /* two of three of like size: cancellation */
    if ((bits & 0x7f800000u) == 0x7f800000u) bits ^= 0x40000000u;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* AdamW and SGD have the same bits at every level: a master copy may be updated elsewhere. */
TEST(same_bits_at_every_level)
{
    enum { COUNT = 4099 };
    static float start[4][COUNT], now[4][COUNT], first[2][3][COUNT];
    uint64_t state = 5;
    for (int b = 0; b < 4; b++)
        for (int i = 0; i < COUNT; i++) start[b][i] = any_float(&state);
    for (int i = 0; i < COUNT; i++) start[3][i] = fabsf(start[3][i]);
    for (int level = (int)LLMPAR_CPU_PORTABLE; level <= (int)llmpar_cpu_best_level(); level++)
        for (int kind = 0; kind < 2; kind++) {
            llmpar_heap heap;
            llmpar_error error;
            llmpar_device *device = NULL;
            llmpar_cpu_desc desc;
            llmpar_heap_init(&heap, NULL);
            llmpar_error_clear(&error);
            memset(&desc, 0, sizeof desc);
            desc.level = (llmpar_cpu_level)level;
            CHECK_OK(llmpar_cpu_create(&heap, &error, &desc, &device));
            memcpy(now, start, sizeof now);
            llmpar_adamw_args adamw = { COUNT, now[0], now[1], now[2], now[3], 3e-4, 0.9, 0.95, 1e-8, 0.1, 0.271, 0.142625, 0.37, LLMPAR_F32 };
            llmpar_sgd_args sgd = { COUNT, now[0], now[1], now[2], 0.01, 0.9, 0.1, 1e3, 0.37, LLMPAR_F32 };
            CHECK_OK(kind ? device->sgd(device, NULL, &sgd) : device->adamw(device, NULL, &adamw));
            for (int b = 0; b < 3; b++) {
                float *x = now[b + (b > 0)];
                for (int i = 0; i < COUNT; i++) if (x[i] != x[i]) x[i] = NAN;
                if (level == (int)LLMPAR_CPU_PORTABLE) memcpy(first[kind][b], x, sizeof first[kind][b]);
                else CHECK_BYTES(x, first[kind][b], sizeof first[kind][b]);
            }
            llmpar_cpu_destroy(device);
        }
}

TEST_LIST(T_(same_bits_at_every_level), T_(names_and_defaults), T_(wrong_descriptions), T_(cosine), T_(schedules), T_(wrong_schedules), T_(loss_scale), T_(plain_doubles), T_(same_bits), T_(adalomo_tiny_gradients), T_(adalomo_bytes), T_(descent), T_(refused), T_(out_of_memory))
