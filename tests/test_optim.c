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

TEST_LIST(T_(names_and_defaults), T_(wrong_descriptions), T_(cosine), T_(schedules), T_(wrong_schedules), T_(loss_scale))
