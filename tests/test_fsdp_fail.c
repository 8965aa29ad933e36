/* FSDP with somebody's own network: what goes wrong in a step, what is refused, and every allocation that fails. */
#include "own_net.h"
#include <math.h>

/* An infinite element of "position" (row 7, on the last of two shards): the step says so by name, and nothing changes. */
static llmpar_status infinite(const job *j, llmpar_fsdp *fsdp, llmpar_optim *adamw)
{
    llmpar_mesh *mesh = llmpar_fsdp_mesh(fsdp);
    llmpar_schedule *schedule = NULL;
    llmpar_run run;
    char name[64];
    double before[PARAMS][MOST], after[MOST];
    memset(&run, 0, sizeof run);
    run.optimizer = llmpar_optim_table(adamw);
    llmpar_optim_set_lr(adamw, 0.1);
    CHECK_OK(llmpar_fsdp_find_nonfinite(fsdp, name, sizeof name));
    CHECK(!strcmp(name, ""));
    int64_t elements;
    int32_t count;
    const llmpar_segment *segment;
    void *shard = llmpar_fsdp_shard(fsdp, MIX, &elements, &segment, &count);
    if (mesh->dp_rank == 1 && count && segment[count - 1].param == 2) put(shard, segment[count - 1].begin + segment[count - 1].count - 1, LLMPAR_F32, HUGE_VAL);
    CHECK_OK(llmpar_fsdp_find_nonfinite(fsdp, name, sizeof name));
    CHECK(!strcmp(name, "position"));
    for (int k = 0; k < PARAMS; k++) whole(fsdp, k, shard_of(fsdp, all[k].unit), before[k]);
    llmpar_status status = make_schedule(j, fsdp, &schedule);
    if (!status) status = one_step(j, fsdp, 0, schedule, &run);
    CHECK_INT(status, LLMPAR_ERR_NONFINITE);
    CHECK_TEXT(llmpar_last_error(mesh->ctx), "first non-finite tensor: position");
    CHECK_INT(llmpar_optim_steps(adamw), 0);
    for (int k = 0; k < PARAMS; k++) {
        whole(fsdp, k, shard_of(fsdp, all[k].unit), after);
        CHECK_BYTES(after, before[k], (size_t)all[k].count * sizeof *after);
    }
    llmpar_arena_usage usage;
    llmpar_arena_get_usage(llmpar_fsdp_arena(fsdp), &usage);
    CHECK_INT(usage.live[LLMPAR_TAG_GATHERED] + usage.live[LLMPAR_TAG_GRADIENTS] + usage.live[LLMPAR_TAG_ACTIVATIONS], 0);
    llmpar_schedule_destroy(schedule);
    return status;
}

TEST(infinite_parameter)
{
    llmpar_error error;
    job j = { .mesh = { .dp_shard = 2 }, .micro_batches = 1, .body = infinite };
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_NONFINITE);
    CHECK_TEXT(error.text, "first non-finite tensor: position");
}

/* ---- failures ---- */

static llmpar_status some_steps(const job *j, llmpar_fsdp *fsdp, llmpar_optim *adamw)
{
    llmpar_schedule *schedule = NULL;
    llmpar_status status = make_schedule(j, fsdp, &schedule);
    for (int i = 0; !status && i < 2; i++) {
        llmpar_run run;
        memset(&run, 0, sizeof run);
        run.optimizer = llmpar_optim_table(adamw);
        llmpar_optim_set_lr(adamw, 0.01);
        status = one_step(j, fsdp, i, schedule, &run);
    }
    llmpar_arena_usage usage;
    llmpar_arena_get_usage(llmpar_fsdp_arena(fsdp), &usage);
    CHECK_INT(usage.live[LLMPAR_TAG_GATHERED] + usage.live[LLMPAR_TAG_GRADIENTS] + usage.live[LLMPAR_TAG_ACTIVATIONS], 0);
    llmpar_schedule_destroy(schedule);
    return status;
}

TEST(a_rank_fails_in_a_step)
{
    for (int zero = LLMPAR_ZERO_0; zero <= LLMPAR_ZERO_3; zero += 3)
        for (int rank = 0; rank < 4; rank++) {
            llmpar_error error;
            job j = { .mesh = { .dp_shard = 4 }, .micro_batches = 2, .prefetch = 1, .body = some_steps };
            j.fsdp.zero = zero;
            fail_in_backward = rank + 1;
            CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_IO);
            CHECK_INT(error.rank, rank);
            CHECK_TEXT(error.text, "embed: planned failure");
            fail_in_backward = 0;
        }
}

static llmpar_status by_hand_errors(const job *j, llmpar_fsdp *fsdp, llmpar_optim *adamw)
{
    llmpar_schedule *schedule = NULL;
    llmpar_run run;
    memset(&run, 0, sizeof run);
    (void)adamw;
    if (j->steps == 0) return llmpar_fsdp_reshard(fsdp, SCORE);
    llmpar_status status = llmpar_fsdp_unshard(fsdp, MIX, NULL);
    if (!status) status = make_schedule(j, fsdp, &schedule);
    if (!status) status = one_step(j, fsdp, 0, schedule, &run);
    llmpar_schedule_destroy(schedule);
    return status;
}

static llmpar_status nobody(const job *j, llmpar_fsdp *fsdp, llmpar_optim *adamw)
{
    (void)j, (void)fsdp, (void)adamw;
    TEST_FAIL("was not refused");
    return LLMPAR_OK;
}

TEST(refused)
{
    llmpar_error error;
    job j = { .mesh = { .dp_shard = 2 }, .micro_batches = 1, .body = by_hand_errors };
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "unit score: reshard without unshard");
    j.steps = 1;
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "unit mix: still unsharded by hand");
    j.body = nobody;
    j.fsdp.zero = 5;
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "zero = 5");
    j.fsdp.zero = 0;
    j.fsdp.dtype = LLMPAR_I32;
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_UNSUPPORTED);
    CHECK_TEXT(error.text, "dtype i32");
    j.fsdp.dtype = LLMPAR_F64;
    j.fsdp.reduce_dtype = LLMPAR_BF16;
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_UNSUPPORTED);
    CHECK_TEXT(error.text, "reduce_dtype bf16 with dtype f64");
    j.fsdp.dtype = j.fsdp.reduce_dtype = LLMPAR_DTYPE_DEFAULT;
    j.fsdp.offload[LLMPAR_STATE_GRADS] = (llmpar_tier)3;
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "offload of grads to tier 3");
    j.fsdp.offload[LLMPAR_STATE_GRADS] = LLMPAR_TIER_DEVICE;
    j.fsdp.memory_limit = 3000; /* 256 + 768 + 256 elements over two ranks are 2560 bytes; the moments do not fit */
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_MEMORY);
    CHECK_TEXT(error.text, "optimizer");
    j.fsdp.memory_limit = 1500;
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_MEMORY);
    CHECK_TEXT(error.text, "parameters");
    j.fsdp.memory_limit = 0;
    j.fsdp.optimizer_states = -1;
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "optimizer_states = -1");
}

/* create alone, with wrong units. */
static int wrong_units;
static llmpar_status create_wrong(llmpar_ctx *ctx, void *user)
{
    llmpar_mesh *mesh = NULL;
    llmpar_mesh_desc mesh_desc;
    llmpar_fsdp_desc desc;
    llmpar_fsdp *fsdp = (llmpar_fsdp *)user;
    llmpar_unit units[UNITS];
    llmpar_param twice[2];
    memset(&mesh_desc, 0, sizeof mesh_desc);
    memset(&desc, 0, sizeof desc);
    mesh_desc.dp_shard = 2;
    make_units(units);
    twice[0] = score_params[0];
    twice[1] = score_params[1];
    if (wrong_units == 1) twice[1].name = "table";
    if (wrong_units == 2) twice[1].name = "head";
    if (wrong_units == 3) twice[0].shape[0] = -5;
    if (wrong_units == 4) twice[0].dims = 5;
    if (wrong_units == 5) twice[0].tp.kind = LLMPAR_SHARD, twice[0].tp.axis = LLMPAR_AXIS_TP, twice[0].tp.dim = 1;
    units[SCORE].params = twice;
    if (wrong_units == 6) units[MIX].forward_count = 161;
    if (wrong_units == 7) units[MIX].backward_count = 161;
    llmpar_status status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_fsdp_create(mesh, units, wrong_units == 0 ? 0 : UNITS, &desc, &fsdp);
    if (status) CHECK(fsdp == NULL);
    llmpar_fsdp_destroy(fsdp);
    llmpar_mesh_destroy(mesh);
    return status;
}

TEST(wrong_units_refused)
{
    static const struct { llmpar_status status; const char *text; } rows[] = {
        { LLMPAR_ERR_ARGUMENT, "0 units" }, { LLMPAR_ERR_ARGUMENT, "table stands in units embed and score" }, { LLMPAR_ERR_ARGUMENT, "head stands in units score and score" }, { LLMPAR_ERR_SHAPE, "head" },
        { LLMPAR_ERR_SHAPE, "head" }, { LLMPAR_ERR_SHAPE, "head" }, { LLMPAR_ERR_ARGUMENT, "unit mix" }, { LLMPAR_ERR_ARGUMENT, "unit mix" },
    };
    llmpar_launch_desc desc = { .ranks = 2, .check = test_no_leak };
    for (wrong_units = 0; wrong_units < 8; wrong_units++) {
        llmpar_error error;
        CHECK_STATUS(llmpar_launch(&desc, create_wrong, &error, &error), rows[wrong_units].status);
        CHECK_TEXT(error.text, rows[wrong_units].text);
    }
}

/* The nth allocation of one rank fails, for every n: an error on every rank, nothing left. */
static int failing_rank;
static uint64_t failing_call;
static int reached_end;
static llmpar_status poor_rank(llmpar_ctx *ctx, void *user)
{
    if (ctx->rank == failing_rank) ctx->heap.fail_at = ctx->heap.calls + failing_call;
    llmpar_status status = run_rank(ctx, user);
    if (!status) __atomic_add_fetch(&reached_end, 1, __ATOMIC_SEQ_CST);
    return status;
}

TEST(out_of_memory)
{
    job j = { .mesh = { .dp_shard = 2 }, .micro_batches = 2, .body = some_steps };
    int failed = 0;
    failing_rank = 1;
    for (failing_call = 1; failing_call < 2000; failing_call += failing_call < 40 ? 1 : 7) {
        llmpar_launch_desc desc = { .ranks = 2, .check = test_no_leak };
        llmpar_error error;
        reached_end = 0;
        llmpar_status status = llmpar_launch(&desc, poor_rank, &j, &error);
        if (!status) break;
        if (status != LLMPAR_ERR_MEMORY) TEST_FAIL("allocation %d: %s: %s", (int)failing_call, llmpar_status_string(status), error.text);
        CHECK_INT(error.rank, 1);
        CHECK_INT(reached_end, 0);
        failed++;
    }
    CHECK(failed > 40);
    CHECK_INT(reached_end, 2);
}

TEST_LIST(T_(infinite_parameter), T_(a_rank_fails_in_a_step), T_(refused), T_(wrong_units_refused), T_(out_of_memory))
