/* One rank calls something else than the others: every way to differ, in every collective, is reported by both sides before data moves. */
#include "faults.h"

/* Under a sanitizer one case in seven. */
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
enum { SAMPLE = 7 };
#else
enum { SAMPLE = 1 };
#endif

/* The script itself is sound. */
TEST(no_mutation)
{
    for (int x = 0; x < X_COUNT; x++)
        for (int axis = 0; axis < 3; axis++)
            for (int large = 0; large < 2; large++) {
                fault_case c = fault_of((fault_x)x, (fault_axis)axis, FAULT_NONE, large, 1);
                fault_run(&c);
                if (c.job) TEST_FAIL("%s: %s", fault_name(&c), c.error.text);
            }
}

/* What the text has to name. */
static const char *difference(const fault_case *c)
{
    switch (c->kind) {
    case FAULT_OP: return c->x == X_MESSAGE ? "nobody can go on" : "disagree in op";
    case FAULT_DTYPE: return "disagree in dtype, count: ";
    case FAULT_SIZE: return "disagree in count: ";
    case FAULT_BLOCKS: return "disagree in count, blocks: ";
    case FAULT_ROOT: return "disagree in root: ";
    case FAULT_REDUCE: return "disagree in reduce op: ";
    case FAULT_TAG: case FAULT_LONG_TAG: return "disagree in tag: ";
    default: return "\"layers.3.wo/x\""; /* which two calls meet depends on the collective */
    }
}

TEST(every_mutation_of_every_collective)
{
    int cases = 0;
    for (int x = 0; x < X_COUNT; x++)
        for (int kind = FAULT_NONE + 1; kind < FAULT_MUTATIONS; kind++)
            for (int axis = 0; axis < 3; axis++)
                for (int large = 0; large < 2; large++)
                    for (int culprit = 0; culprit < FAULTS_RANKS; culprit++) {
                        if (!fault_applies((fault_x)x, (fault_kind)kind)) continue;
                        if ((large + culprit) % 2 && axis == FAULT_WORLD) continue;
                        if (SAMPLE > 1 && (x + kind + axis + 2 * large + culprit) % SAMPLE) continue; /* still every mutation of every collective */
                        fault_case c = fault_of((fault_x)x, (fault_axis)axis, (fault_kind)kind, large, culprit);
                        fault_run(&c);
                        cases++;
                        int reported = 0;
                        if (c.job != LLMPAR_ERR_MISMATCH || !strstr(c.error.text, difference(&c)))
                            TEST_FAIL("%s: got %s: %s; expected it to say: %s", fault_name(&c), llmpar_status_string(c.job), c.error.text, difference(&c));
                        for (int r = 0; r < FAULTS_RANKS; r++) {
                            reported += c.status[r] == LLMPAR_ERR_MISMATCH;
                            if (c.status[r] != LLMPAR_ERR_MISMATCH && c.status[r] != LLMPAR_ERR_PEER)
                                TEST_FAIL("%s: rank %d returned %s (%s)", fault_name(&c), r, llmpar_status_string(c.status[r]), c.text[r]);
                            if (!strstr(c.text[r], difference(&c)) || !strstr(c.text[r], "tp=") || !strstr(c.text[r], "dp_shard="))
                                TEST_FAIL("%s: rank %d says only: %s; expected: %s", fault_name(&c), r, c.text[r], difference(&c));
                            CHECK_INT(c.live[r], 0);
                        }
                        /* Both sides: the culprit, and whoever it was to meet. */
                        if (c.status[culprit] != LLMPAR_ERR_MISMATCH || reported < 2) TEST_FAIL("%s: %d ranks say mismatch, the culprit %s: %s", fault_name(&c), reported, llmpar_status_string(c.status[culprit]), c.error.text);
                    }
    printf("  %d cases\n", cases);
}

/* Both sides of a disagreement in full: rank, coordinate, op, dtype, count, tag, number and axis. */
TEST(text)
{
    fault_case c = fault_of(X_ALL_GATHER, FAULT_TP, FAULT_OP, 0, 3);
    fault_run(&c);
    CHECK_TEXT(c.error.text, "the ranks of tp disagree in op: rank 2 (dp_shard=1 tp=0): all_gather f32[40] \"layers.3.wo/x\" (call 2 on tp); rank 3 (dp_shard=1 tp=1): reduce_scatter sum f32[40] \"layers.3.wo/x\" (call 2 on tp)");
    c = fault_of(X_MESSAGE, FAULT_DP, FAULT_BLOCKS, 0, 2);
    fault_run(&c);
    CHECK_TEXT(c.error.text, "the ranks of dp_shard disagree in count, blocks: rank 0 (dp_shard=0 tp=0): send f32[40] to 1 \"layers.3.wo/x\" (message 1 on dp_shard); "
                             "rank 2 (dp_shard=1 tp=0): recv f32[2 x 20] from 0 \"layers.3.wo/x\" (message 1 on dp_shard)");
}

/* A rank that ends with a call too few: nobody is left to disagree with, so the others say who has gone. */
TEST(missing_at_the_end)
{
    for (int x = 0; x < X_COUNT; x++)
        for (int axis = 0; axis < 3; axis++) {
            fault_case c = fault_of((fault_x)x, (fault_axis)axis, FAULT_RETURNS, x % 2, (x + axis) % 4);
            fault_run(&c);
            CHECK_STATUS(c.job, LLMPAR_ERR_MISMATCH);
            CHECK_STATUS(c.status[c.culprit], LLMPAR_OK);
            char returned[128];
            snprintf(returned, sizeof returned, "rank %d (dp_shard=%d tp=%d): has returned, last completed barrier \"before\"", c.culprit, c.culprit / 2, c.culprit % 2);
            for (int r = 0; r < FAULTS_RANKS; r++) {
                if (r == c.culprit) continue;
                CHECK(c.status[r] == LLMPAR_ERR_MISMATCH || c.status[r] == LLMPAR_ERR_PEER);
                CHECK_TEXT(c.text[r], returned);
                CHECK(c.returned_at[r] - c.failed_at < 2);
            }
        }
}

/* Check level 0: nobody compares. */
TEST(unchecked)
{
    fault_case c = fault_of(X_ALL_REDUCE, FAULT_TP, FAULT_TAG, 0, 1);
    c.unchecked = 1;
    fault_run(&c);
    CHECK_OK(c.job);
    c = fault_of(X_MESSAGE, FAULT_TP, FAULT_TAG, 1, 0);
    c.unchecked = 1;
    fault_run(&c);
    CHECK_OK(c.job);
}

/* ---- what every rank finds for itself ---- */

static llmpar_status told[FAULTS_RANKS];
static char why[FAULTS_RANKS][1600];

/* 0: degrees whose product is not the world; 1, 2: a device table with another abi, too small; 3, 4: a world communicator with another abi, too small; 5: one from before the record */
static llmpar_status bad_start(llmpar_ctx *ctx, void *user)
{
    int how = *(int *)user;
    llmpar_device device = *ctx->device, *sound_device = ctx->device;
    llmpar_comm comm = *ctx->comm, *sound_comm = ctx->comm;
    llmpar_mesh *mesh = NULL;
    llmpar_mesh_desc desc = { .dp_shard = 2, .tp = how ? 2 : 3 };
    if (how == 1) device.abi = 9;
    if (how == 2) device.size = 64;
    if (how == 3) comm.abi = 9;
    if (how == 4) comm.size = 64;
    if (how == 1 || how == 2) ctx->device = &device;
    if (how > 2) ctx->comm = &comm;
    llmpar_status st = llmpar_mesh_create(ctx, &desc, &mesh);
    ctx->device = sound_device;
    ctx->comm = sound_comm;
    CHECK(!mesh);
    told[ctx->rank] = st;
    snprintf(why[ctx->rank], sizeof why[0], "%s", llmpar_last_error(ctx));
    return st;
}

TEST(bad_tables_and_meshes)
{
    static const char *const text[] = {"mesh: dp_replicate 1 x dp_shard 2 x cp 1 x pp 1 x tp 3 = 6 ranks, but the world has 4", "device table with abi 9 and ", "device table with abi 1 and 64 bytes, expected abi 1 and at least ",
                                       "communicator world: table with abi 9 and ", "communicator world: table with abi 1 and 64 bytes, expected abi 1 and at least "};
    for (int how = 0; how < 5; how++) {
        llmpar_launch_desc desc = { .ranks = FAULTS_RANKS, .log = fault_quiet };
        CHECK_STATUS(llmpar_launch(&desc, bad_start, &how, NULL), how ? LLMPAR_ERR_ABI : LLMPAR_ERR_MESH);
        for (int r = 0; r < FAULTS_RANKS; r++) {
            CHECK_STATUS(told[r], how ? LLMPAR_ERR_ABI : LLMPAR_ERR_MESH);
            CHECK_TEXT(why[r], text[how]);
        }
    }
}

TEST_LIST(T_(no_mutation), T_(every_mutation_of_every_collective), T_(text), T_(missing_at_the_end), T_(unchecked), T_(bad_tables_and_meshes))
