/* Checkpoints: any mesh reads any other's bit for bit, a resumed run is the run that was never stopped, and what is damaged or of another run is refused by name. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#include "test.h"
#include "checkpoints.h"

/* ---- the checksum ---- */

TEST(xxh64)
{
    llmpar_xxh64 state; /* the values are what `xxhsum -H64` prints */
    unsigned char data[300];
    llmpar_xxh64_begin(&state);
    CHECK(llmpar_xxh64_end(&state) == 0xef46db3751d8e999u);
    llmpar_xxh64_add(&state, "a", 1);
    CHECK(llmpar_xxh64_end(&state) == 0xd24ec4f1a98c6e5bu);
    llmpar_xxh64_add(&state, "bc", 2);
    CHECK(llmpar_xxh64_end(&state) == 0x44bc2cf5ad770999u);
    llmpar_xxh64_begin(&state);
    llmpar_xxh64_add(&state, "Nobody inspects the spammish repetition", 39);
    CHECK(llmpar_xxh64_end(&state) == 0xfbcea83c8a378bf1u);
    for (int i = 0; i < 300; i++) data[i] = (unsigned char)((unsigned)i * 2654435761u >> 24);
    for (int length = 0; length <= 300; length++) { /* in any portions */
        llmpar_xxh64 whole, parts;
        llmpar_xxh64_begin(&whole);
        llmpar_xxh64_add(&whole, data, (size_t)length);
        llmpar_xxh64_begin(&parts);
        for (int at = 0, step = 1; at < length; at += step, step = step * 5 % 37 + 1) {
            if (step > length - at) step = length - at;
            llmpar_xxh64_add(&parts, data + at, (size_t)step);
            step = step < 1 ? 1 : step;
        }
        CHECK(llmpar_xxh64_end(&whole) == llmpar_xxh64_end(&parts));
    }
}

/* ---- any mesh from any other ---- */

typedef struct mesh_case { int replicate, shard, tp, zero, wrap; } mesh_case;
static const mesh_case meshes[] = {
    {1, 1, 1, 3, 1}, {1, 2, 1, 3, 2}, {1, 1, 2, 3, LLMPAR_WRAP_HALF}, {2, 1, 1, 3, 1}, {1, 3, 1, 3, 1}, {1, 3, 1, 1, LLMPAR_WRAP_HALF}, {1, 4, 1, 2, 1}, {1, 2, 2, 3, 1}, {2, 2, 1, 0, 1}, {1, 1, 4, 3, 3},
    {1, 5, 1, 3, 2}, {1, 5, 1, 0, 1}, {1, 6, 1, 1, 1}, {1, 3, 2, 3, LLMPAR_WRAP_HALF}, {3, 1, 2, 3, 1}, {2, 3, 1, 2, 1}, {1, 7, 1, 3, 1}, {7, 1, 1, 3, 2}, {1, 8, 1, 3, 1}, {1, 2, 4, 2, LLMPAR_WRAP_HALF}, {1, 1, 8, 3, 1},
    {2, 2, 2, 3, 1}, {1, 4, 2, 1, 3}, {2, 4, 1, 0, 1}
};
enum { MESHES = sizeof meshes / sizeof meshes[0] };

static cp_run mesh_run(const mesh_case *m, int tied)
{
    cp_run run = cp_make(m->replicate, m->shard, m->tp, m->zero);
    run.wrap = m->wrap;
    run.tied = tied;
    run.policy.batch = 840; /* what 1 .. 8 divide */
    return run;
}

static void all_pairs(int tied)
{
    const char *full = getenv("LLMPAR_TEST_FULL"), *first = strdup(cp_path("first%d", tied));
    cp_snapshot snapshot;
    memset(&snapshot, 0, sizeof snapshot);
    /* The first one's numbers come from a step, so that no state is zero. */
    cp_run run = mesh_run(&meshes[0], tied);
    run.steps = run.save = 1;
    run.take = &snapshot;
    run.policy.checkpoint = first;
    CP_GOES(&run);
    CHECK(snapshot.count > 0);
    int quick = test_rounds(8) < 8;
    for (int from = 0; from < MESHES; from += quick ? 7 : 1) {
        const char *directory = strdup(cp_path("from"));
        cp_clear(directory);
        run = mesh_run(&meshes[from], tied);
        run.expect = &snapshot;
        run.policy.checkpoint = directory;
        run.policy.resume = first;
        run.save = 1;
        CP_GOES(&run);
        CHECK_INT(run.resumed, 1);
        for (int to = 0; to < MESHES; to++) {
            if (!(full && full[0]) && (from * 7 + to * 5 + tied) % (quick ? 24 : 16)) continue;
            run = mesh_run(&meshes[to], tied);
            run.expect = &snapshot;
            run.policy.resume = directory;
            CP_GOES(&run);
        }
        free((void *)(uintptr_t)directory);
    }
    cp_free(&snapshot);
    free((void *)(uintptr_t)first);
}
TEST(any_mesh_from_any_other) { all_pairs(0); }
TEST(any_mesh_tied) { all_pairs(1); }

/* ---- resume is exact ---- */

/* Steps until CP_STEPS in one go, and in three parts on three meshes. */
static void exact_resume(const char *name, llmpar_trainer_desc policy, const mesh_case *a, const mesh_case *b, const mesh_case *c)
{
    if (test_rounds(4) < 4 && strchr(name, '-')) return; /* variants, where everything takes ten times as long */
    const mesh_case *part[3] = {a, b, c};
    static const int until[3] = {3, 4, CP_STEPS};
    const char *directory = strdup(cp_path("exact-%s", name));
    cp_snapshot snapshot;
    memset(&snapshot, 0, sizeof snapshot);
    cp_run whole = cp_make(1, 1, 1, 3), run;
    whole.policy = policy;
    whole.steps = CP_STEPS;
    whole.take = &snapshot;
    CP_GOES(&whole);
    int halved = 0, doubled = 0;
    for (int s = 1; s < CP_STEPS; s++) {
        halved += whole.step[s].loss_scale < whole.step[s - 1].loss_scale;
        doubled += whole.step[s].loss_scale > whole.step[s - 1].loss_scale;
    }
    if (policy.loss_scale.scale > 0 && !(halved && doubled)) TEST_FAIL("%s: the loss scale was halved %d and doubled %d times, expected both", name, halved, doubled);
    for (int i = 0; i < 3; i++) {
        run = cp_make(part[i]->replicate, part[i]->shard, part[i]->tp, part[i]->zero);
        run.wrap = part[i]->wrap;
        run.policy = policy;
        run.policy.checkpoint = directory;
        run.policy.checkpoint_every = i ? 0 : 3;
        run.policy.checkpoint_background = i == 1;
        run.policy.keep = 1;
        run.policy.resume = "auto";
        run.save = i == 1;
        run.steps = until[i];
        if (i == 2) run.expect = &snapshot;
        CP_GOES(&run);
        CHECK_INT(run.resumed, i ? until[i - 1] : 0);
        for (int s = i ? until[i - 1] : 0; s < until[i]; s++)
            if (memcmp(&run.step[s].loss, &whole.step[s].loss, sizeof(double)) || memcmp(&run.step[s].grad_norm, &whole.step[s].grad_norm, sizeof(double)) || run.step[s].lr != whole.step[s].lr || run.step[s].loss_scale != whole.step[s].loss_scale || run.step[s].step != s + 1)
                TEST_FAIL("%s: part %d, step %d: loss %.17g norm %.17g scale %g, expected %.17g, %.17g, %g", name, i, s + 1, run.step[s].loss, run.step[s].grad_norm, run.step[s].loss_scale, whole.step[s].loss, whole.step[s].grad_norm, whole.step[s].loss_scale);
        if (i == 2) CHECK(!cp_exists(cp_path("exact-%s/step-3", name)) && cp_exists(cp_path("exact-%s/step-4", name)));
    }
    cp_free(&snapshot);
    free((void *)(uintptr_t)directory);
}

static const mesh_case one = {1, 1, 1, 3, 1}, shard2 = {1, 2, 1, 3, 2}, square = {1, 2, 2, 3, 1}, zero1 = {1, 4, 1, 1, LLMPAR_WRAP_HALF}, zero0 = {2, 2, 1, 0, 1}, zero2 = {1, 2, 2, 2, 1}, tp4 = {1, 1, 4, 3, 3};

TEST(exact_adamw)
{
    llmpar_trainer_desc d;
    memset(&d, 0, sizeof d);
    exact_resume("adamw", d, &square, &one, &zero1);
    d.dtype = LLMPAR_BF16;
    d.freeze = 1;
    exact_resume("adamw-bf16", d, &zero0, &shard2, &tp4);
    d.dtype = LLMPAR_F64;
    d.freeze = 0;
    exact_resume("adamw-f64", d, &shard2, &zero2, &square);
}

TEST(exact_offloaded)
{
    llmpar_trainer_desc d;
    memset(&d, 0, sizeof d);
    d.offload[LLMPAR_STATE_OPTIMIZER] = LLMPAR_TIER_FILE;
    d.offload[LLMPAR_STATE_PARAMS] = LLMPAR_TIER_HOST;
    d.offload_dir = cp_path(".");
    d.dtype = LLMPAR_BF16;
    exact_resume("offloaded", d, &shard2, &square, &one);
    d.dtype = LLMPAR_F32;
    d.offload[LLMPAR_STATE_PARAMS] = LLMPAR_TIER_DEVICE;
    exact_resume("offloaded-f32", d, &one, &shard2, &tp4);
}

TEST(exact_sgd)
{
    llmpar_trainer_desc d;
    memset(&d, 0, sizeof d);
    d.optim.kind = LLMPAR_OPTIM_SGD;
    exact_resume("sgd", d, &tp4, &zero0, &square);
}

TEST(exact_lomo)
{
    llmpar_trainer_desc d;
    memset(&d, 0, sizeof d);
    d.optim.kind = LLMPAR_OPTIM_LOMO;
    exact_resume("lomo", d, &zero1, &square, &one);
}

TEST(exact_adalomo)
{
    llmpar_trainer_desc d;
    memset(&d, 0, sizeof d);
    d.optim.kind = LLMPAR_OPTIM_ADALOMO;
    exact_resume("adalomo", d, &square, &one, &tp4);
    d.freeze = 1; /* the embedding: what is in a unit depends on wrap */
    exact_resume("adalomo-frozen", d, &shard2, &zero2, &zero0);
}

TEST(exact_f16)
{
    llmpar_trainer_desc d;
    memset(&d, 0, sizeof d);
    d.dtype = LLMPAR_F16;
    d.loss_scale.scale = 2097152.0; /* too large at first, so that steps are skipped and it moves both ways */
    d.loss_scale.interval = 2;
    exact_resume("f16", d, &square, &shard2, &one);
}

TEST_LIST(T_(xxh64), T_(any_mesh_from_any_other), T_(any_mesh_tied), T_(exact_adamw), T_(exact_offloaded), T_(exact_sgd), T_(exact_lomo), T_(exact_adalomo), T_(exact_f16))
