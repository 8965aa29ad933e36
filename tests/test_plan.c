/* The plan: what llmpar_plan_memory says of a step is what the step takes, byte for byte, on every rank; a memory limit of exactly that is enough and a byte less is refused before anything is taken; recompute = AUTO takes the
   least recomputation that fits and gives the same bits. Policies are written as users type them. */
#include "train.h"
#include "../examples/common/policy.h"

#include <sys/stat.h>

enum { MOST_RANKS = 8, MOST_UNITS = 24, MOST_TEXT = 2000 };

/* One try: every rank plans (plan != 0), then makes a trainer and runs `steps` steps, and writes what it saw. */
typedef struct attempt {
    llmpar_llama_config config;
    int32_t dp_replicate, dp_shard, tp;
    const char *policy;             /* "--zero 1 --dtype bf16 .." */
    int64_t batch, seq_len;
    int plan, steps;
    uint64_t memory_limit;
    const char *offload_dir, *log, *trace;
    int fail_rank;                  /* this rank's heap gives nothing from its fail_at-th allocation on .. */
    uint64_t fail_at;               /* .. in llmpar_parallelize; 0: never */
    int64_t fail_once;              /* or: this one allocation of its thread's there, that of the plan's own heap too */
    /* what came of it */
    int ranks, calls, calls_of_plan;
    llmpar_status status, planned_status[MOST_RANKS], made_status[MOST_RANKS];
    llmpar_error error, too_much[MOST_RANKS];
    char made_text[MOST_RANKS][MOST_TEXT];
    llmpar_memory planned[MOST_RANKS], real[MOST_RANKS];
    llmpar_step step[MOST_RANKS][4];
    llmpar_recompute blocks[MOST_UNITS];
    int units;
    uint64_t left[MOST_RANKS], taken[MOST_RANKS], heap_calls[MOST_RANKS];
} attempt;

static llmpar_status counted_sequence(void *user, int64_t index, int32_t *tokens)
{
    attempt *a = (attempt *)user;
    __atomic_add_fetch(&a->calls, 1, __ATOMIC_SEQ_CST);
    return train_sequence(&a->seq_len, index, tokens);
}

/* The words of a policy, as a program's command line has them. */
static int read_policy(const char *text, llmpar_trainer_desc *desc, llmpar_llama_desc *model, char copy[600])
{
    char *at = copy, *save = NULL;
    snprintf(copy, 600, "%s", text);
    for (char *option; (option = strtok_r(at, " ", &save)) != NULL;) {
        char *value = strtok_r(NULL, " ", &save);
        at = NULL;
        if (!value) { TEST_FAIL("policy \"%s\": no value for %s", text, option); return 1; }
        if (!strcmp(option, "--grad-accum")) desc->grad_accum = atoi(value);
        else if (policy_option(option + 2, value, desc, model)) { TEST_FAIL("policy \"%s\": %s %s", text, option, value); return 1; }
    }
    return 0;
}

/* The allocator of all heaps of a try; 0: nothing fails. */
static __thread int64_t until_failure;
static void *once_alloc(void *user, size_t bytes) { return (void)user, until_failure && !--until_failure ? NULL : malloc(bytes); }
static void once_free(void *user, void *memory, size_t bytes) { (void)user, (void)bytes, free(memory); }
static const llmpar_allocator once = { once_alloc, once_free, NULL };

static llmpar_status attempt_rank(llmpar_ctx *ctx, void *user)
{
    attempt *a = (attempt *)user;
    int r = ctx->rank;
    char words[600];
    llmpar_mesh *mesh = NULL;
    llmpar_llama *model = NULL;
    llmpar_trainer *trainer = NULL;
    llmpar_mesh_desc mesh_desc = { .dp_replicate = a->dp_replicate, .dp_shard = a->dp_shard, .tp = a->tp };
    llmpar_llama_desc model_desc = { .config = &a->config, .seed = 7 };
    llmpar_trainer_desc desc = { .sequence = counted_sequence, .sequence_user = a, .seq_len = a->seq_len, .batch = a->batch, .lr = 1e-2, .total_steps = 4, .log_every = -1 };
    desc.sink = train_sink;
    if (read_policy(a->policy, &desc, &model_desc, words)) return LLMPAR_ERR_INTERNAL;
    if (a->memory_limit) desc.memory_limit = a->memory_limit;
    desc.offload_dir = a->offload_dir ? a->offload_dir : "build";
    desc.log = a->log;
    desc.trace = a->trace;
    llmpar_status status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_llama_create(ctx, &model_desc, &model);
    if (!status && a->plan) { /* once before: the record of communicators keeps the names it has seen */
        status = llmpar_plan_memory(mesh, model, &desc, &a->planned[r], NULL);
        if (status == LLMPAR_ERR_MEMORY) status = LLMPAR_OK;
    }
    uint64_t live = ctx->heap.live;
    ctx->heap.peak = live;
    if (!status && a->plan) {
        llmpar_error_clear(&a->too_much[r]);
        status = a->planned_status[r] = llmpar_plan_memory(mesh, model, &desc, &a->planned[r], &a->too_much[r]);
        CHECK_INT(ctx->heap.live, live);
        CHECK_INT(ctx->error.status == LLMPAR_OK, status == LLMPAR_OK || status == LLMPAR_ERR_MEMORY);
        if (status == LLMPAR_ERR_MEMORY) status = LLMPAR_OK;
        a->taken[r] = ctx->heap.peak - live;
    }
    if (!status && a->plan) status = llmpar_comm_barrier(ctx->comm, NULL, "planned");
    if (r == 0 && a->plan) a->calls_of_plan = __atomic_load_n(&a->calls, __ATOMIC_SEQ_CST);
    if (!status && a->plan) status = llmpar_comm_barrier(ctx->comm, NULL, "looked");
    if (!status && a->steps >= 0) {
        uint64_t calls = ctx->heap.calls;
        if (a->fail_at && r == a->fail_rank) ctx->heap.fail_at = calls + a->fail_at;
        until_failure = r == a->fail_rank ? a->fail_once : 0;
        status = a->made_status[r] = llmpar_parallelize(mesh, model, &desc, &trainer);
        snprintf(a->made_text[r], MOST_TEXT, "%s", llmpar_last_error(ctx));
        ctx->heap.fail_at = 0;
        if (a->fail_once && r == a->fail_rank) a->fail_once = until_failure; /* what is left of it: there are no more */
        until_failure = 0;
        a->heap_calls[r] = ctx->heap.calls - calls;
        a->taken[r] = ctx->heap.peak - live;
        const llmpar_unit *units = llmpar_llama_units(model, r ? NULL : &a->units);
        for (int i = 0; r == 0 && i < a->units && i < MOST_UNITS; i++) a->blocks[i] = (llmpar_recompute)units[i].recompute;
    }
    for (int i = 0; i < a->steps && !status; i++) status = llmpar_trainer_step(trainer, &a->step[r][i]);
    if (trainer) llmpar_trainer_memory(trainer, &a->real[r]);
    llmpar_trainer_destroy(trainer);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    return status;
}

static void attempt_check(const llmpar_ctx *ctx, void *user) { ((attempt *)user)->left[ctx->rank] = ctx->heap.live; }

static attempt attempt_of(int32_t dp_replicate, int32_t dp_shard, int32_t tp, const char *policy)
{
    attempt a;
    memset(&a, 0, sizeof a);
    a.config = train_config(0);
    a.dp_replicate = dp_replicate;
    a.dp_shard = dp_shard;
    a.tp = tp;
    a.policy = policy;
    a.batch = 16;
    a.seq_len = 8;
    a.plan = 1;
    a.steps = 2;
    return a;
}

static llmpar_status attempt_run(attempt *a)
{
    llmpar_launch_desc launch;
    memset(&launch, 0, sizeof launch);
    a->ranks = a->dp_replicate * a->dp_shard * a->tp;
    a->calls = 0;
    launch.ranks = a->ranks;
    launch.transport = LLMPAR_TRANSPORT_THREADS;
    launch.log = train_quiet;
    launch.check = attempt_check;
    launch.allocator = &once;
    a->status = llmpar_launch(&launch, attempt_rank, a, &a->error);
    for (int r = 0; r < a->ranks; r++)
        if (a->left[r]) TEST_FAIL("%s: rank %d: %llu bytes left", a->policy, r, (unsigned long long)a->left[r]);
    return a->status;
}

/* ---- plan and reality ---- */

static void same_usage(const attempt *a, int rank, const char *mark, const llmpar_arena_usage *planned, const llmpar_arena_usage *real)
{
    for (int tag = 0; tag <= LLMPAR_TAG_COUNT; tag++) {
        unsigned long long live[2] = {tag < LLMPAR_TAG_COUNT ? planned->live[tag] : planned->live_total, tag < LLMPAR_TAG_COUNT ? real->live[tag] : real->live_total};
        unsigned long long peak[2] = {tag < LLMPAR_TAG_COUNT ? planned->peak[tag] : planned->peak_total, tag < LLMPAR_TAG_COUNT ? real->peak[tag] : real->peak_total};
        if (live[0] == live[1] && peak[0] == peak[1]) continue;
        TEST_FAIL("%dx%dx%d %s: rank %d %s %s: planned live %llu peak %llu, real live %llu peak %llu", (int)a->dp_replicate, (int)a->dp_shard, (int)a->tp, a->policy, rank, mark,
                  tag < LLMPAR_TAG_COUNT ? llmpar_tag_name((llmpar_tag)tag) : "together", live[0], peak[0], live[1], peak[1]);
    }
    /* Every block lies where it did when it was counted: the device is asked once, for exactly what is used. */
    if (planned->extent != real->extent || planned->reserved != real->reserved || (real->extent && real->reserved != a->real[rank].step.extent))
        TEST_FAIL("%dx%dx%d %s: rank %d %s: planned extent %llu reserved %llu, real extent %llu reserved %llu", (int)a->dp_replicate, (int)a->dp_shard, (int)a->tp, a->policy, rank, mark, (unsigned long long)planned->extent,
                  (unsigned long long)planned->reserved, (unsigned long long)real->extent, (unsigned long long)real->reserved);
}

/* 1: trained. Where the recipe refuses, plan and llmpar_parallelize have to say the same. */
static int plan_is_reality(attempt *a)
{
    attempt_run(a);
    if (a->status) {
        TEST_FAIL("%dx%dx%d %s: %s", (int)a->dp_replicate, (int)a->dp_shard, (int)a->tp, a->policy, a->error.text);
        return 0;
    }
    CHECK_INT(a->calls_of_plan, 0);
    CHECK_INT(a->calls, a->batch * a->steps * a->tp);
    for (int r = 0; r < a->ranks; r++) {
        CHECK(a->real[r].step.peak_total > 0 && a->real[r].step.peak_total >= a->real[r].before_optimizer.live_total);
        CHECK_INT(a->step[r][a->steps - 1].memory, a->real[r].step.peak_total);
        same_usage(a, r, "after init", &a->planned[r].init, &a->real[r].init);
        same_usage(a, r, "before the optimizer", &a->planned[r].before_optimizer, &a->real[r].before_optimizer);
        same_usage(a, r, "step", &a->planned[r].step, &a->real[r].step);
    }
    return 1;
}

static const int32_t meshes[][3] = {{1, 1, 1}, {1, 2, 1}, {1, 1, 2}, {1, 2, 2}, {2, 2, 1}, {2, 1, 1}};
enum { MESHES = sizeof meshes / sizeof meshes[0] };

TEST(one_by_one)
{
    static const char *const policies[] = {
        "", "--zero 0", "--zero 1", "--zero 2", "--zero 0 --grad-accum 4", "--zero 1 --grad-accum 4", "--zero 2 --grad-accum 4 --no-sync on", "--grad-accum 4", "--grad-accum 4 --no-sync on", "--grad-accum 4 --accumulate chain",
        "--recompute selective", "--recompute full", "--recompute full,2", "--recompute selective,2 --wrap half", "--recompute full --wrap 2", "--reshard always", "--reshard never", "--reshard 2 --prefetch 2", "--prefetch 1,0",
        "--prefetch 3,4 --overlap on", "--sp on", "--sp on --recompute selective", "--dtype bf16", "--dtype f16", "--dtype f64", "--dtype bf16 --reduce-dtype bf16 --zero 2", "--dtype bf16 --zero 1 --recompute full", "--logits-bytes 8K",
        "--offload optimizer=file", "--offload params=host --dtype bf16", "--offload optimizer=host,params=host,grads=host --offload-update host --dtype bf16",
        "--offload optimizer=host,params=host,grads=host,activations=host --offload-update host --dtype f16 --grad-accum 2 --prefetch 1", "--offload grads=file", "--offload activations=host", "--offload optimizer=file,params=file,grads=file,activations=file --recompute full --dtype f16",
        "--offload optimizer=host,activations=file --dtype bf16 --grad-accum 2", "--optimizer sgd", "--optimizer sgd --momentum 0", "--optimizer lomo", "--optimizer lomo --clip 1", "--optimizer adalomo", "--optimizer adalomo --clip 0 --zero 2",
        "--optimizer lomo --dtype f16", "--optimizer adalomo --sp on --wrap half --prefetch 1", "--freeze 2", "--freeze 3 --dtype bf16 --offload params=file", "--exact off", "--overlap on --offload optimizer=file --prefetch 2"};
    for (size_t p = 0; p < sizeof policies / sizeof policies[0]; p++)
        for (int m = 0; m < MESHES; m++) {
            if ((p + (size_t)m) % MESHES > (test_rounds(4) < 4 ? 0 : 1)) continue;
            attempt a = attempt_of(meshes[m][0], meshes[m][1], meshes[m][2], policies[p]);
            if (p % 3 == 0) a.config = train_config(1);
            a.config.family = (llmpar_family)(p % 4);
            if (p % 8 > 4) a.config.kv_heads = 1; /* that ranks of tp share */
            plan_is_reality(&a);
        }
}

/* Any mixture: what one room of the program takes may depend on what another does. Mixtures that the recipe refuses are refused by the plan in the same words. */
TEST(mixed)
{
    static const char *const choice[][7] = {
        {"", " --zero 0", " --zero 1", " --zero 2", ""}, {"", " --recompute selective", " --recompute full", " --recompute full,2", " --recompute selective,2"}, {"", " --reshard always", " --reshard never", " --reshard 2"},
        {"", " --prefetch 1", " --prefetch 2,3"}, {"", " --sp on"}, {"", " --grad-accum 2", " --grad-accum 2 --no-sync on", " --grad-accum 2 --accumulate chain"}, {"", "", " --dtype bf16", " --dtype f16", " --dtype f64"},
        {"", " --optimizer sgd", " --optimizer lomo", " --optimizer adalomo", " --optimizer lomo --clip 1", ""}, {"", " --offload optimizer=file", " --offload params=host,optimizer=file", " --offload grads=file,activations=file", " --offload activations=host", ""},
        {"", " --wrap half", " --wrap 2", " --wrap 3"}, {"", " --overlap on"}, {"", " --logits-bytes 16K"}, {"", "", "", " --freeze 1", " --freeze 2"}, {"", "", "", " --exact off"}, {"", "", "", " --reduce-dtype bf16"}};
    int trained = 0, refused = 0, rounds = test_rounds(60);
    for (int i = 0; i < rounds; i++) {
        char policy[600] = "";
        uint64_t r = (uint64_t)i;
        for (size_t c = 0; c < sizeof choice / sizeof choice[0]; c++) {
            int count = 0;
            while (count < 7 && choice[c][count]) count++;
            r = train_mix(r + c);
            strncat(policy, choice[c][r % (unsigned)count], sizeof policy - strlen(policy) - 1);
        }
        const int32_t *m = meshes[train_mix(r) % MESHES];
        attempt a = attempt_of(m[0], m[1], m[2], policy);
        a.config = train_config((int)(train_mix(r + 1) % 2));
        a.config.family = (llmpar_family)(train_mix(r + 2) % 4);
        if (train_mix(r + 3) % 2) a.config.kv_heads = 1;
        a.plan = 0; /* what reality says of it, first */
        a.steps = 0;
        attempt_run(&a);
        attempt b = attempt_of(m[0], m[1], m[2], policy);
        b.config = a.config;
        if (a.status == LLMPAR_OK) {
            trained += plan_is_reality(&b);
            continue;
        }
        refused++;
        b.steps = -1;
        CHECK_STATUS(attempt_run(&b), a.status);
        if (strcmp(a.error.text, b.error.text)) TEST_FAIL("%s: plan: %s; llmpar_parallelize: %s", policy, b.error.text, a.error.text);
    }
    CHECK(trained >= rounds / 4 && refused > 0);
    if (getenv("PLAN_TEST_VERBOSE")) printf("%d trained, %d refused\n", trained, refused);
}

/* ---- limits ---- */

static uint64_t largest_peak(const attempt *a, int real)
{
    uint64_t most = 0;
    for (int r = 0; r < a->ranks; r++) {
        uint64_t peak = real ? a->real[r].step.peak_total : a->planned[r].step.peak_total;
        if (peak > most) most = peak;
    }
    return most;
}

static void same_steps(const char *policy, const attempt *got, const attempt *want)
{
    for (int r = 0; r < got->ranks; r++)
        for (int i = 0; i < got->steps; i++)
            if (memcmp(&got->step[r][i].loss, &want->step[0][i].loss, sizeof(double)) || memcmp(&got->step[r][i].grad_norm, &want->step[0][i].grad_norm, sizeof(double)))
                TEST_FAIL("%s: rank %d step %d: loss %.17g norm %.17g, expected %.17g %.17g", policy, r, i + 1, got->step[r][i].loss, got->step[r][i].grad_norm, want->step[0][i].loss, want->step[0][i].grad_norm);
}

/* Exactly the plan's peak trains, with the same bits; a byte less is refused on every rank. */
TEST(limit)
{
    static const char *const policies[] = {"", "--zero 1 --grad-accum 2", "--recompute full --dtype bf16", "--offload optimizer=file,activations=host --prefetch 2", "--optimizer adalomo --wrap half --sp on", "--dtype f16 --overlap on --zero 2"};
    for (size_t p = 0; p < sizeof policies / sizeof policies[0]; p++)
        for (int m = 0; m < MESHES; m++) {
            if ((p + (size_t)m) % (test_rounds(4) < 4 ? MESHES : 2)) continue;
            attempt free_run = attempt_of(meshes[m][0], meshes[m][1], meshes[m][2], policies[p]);
            plan_is_reality(&free_run);
            attempt fits = attempt_of(meshes[m][0], meshes[m][1], meshes[m][2], policies[p]), refused = fits;
            fits.memory_limit = largest_peak(&free_run, 1);
            if (plan_is_reality(&fits)) same_steps(policies[p], &fits, &free_run);
            CHECK_INT(largest_peak(&fits, 0), fits.memory_limit);
            refused.memory_limit = fits.memory_limit - 1;
            CHECK_STATUS(attempt_run(&refused), LLMPAR_ERR_MEMORY);
            CHECK_INT(refused.calls, 0);
            int over = 0;
            for (int r = 0; r < refused.ranks; r++) {
                char text[80];
                CHECK_STATUS(refused.made_status[r], LLMPAR_ERR_MEMORY);
                snprintf(text, sizeof text, "memory limit %llu bytes a rank: a step takes %llu", (unsigned long long)refused.memory_limit, (unsigned long long)fits.memory_limit);
                CHECK_TEXT(refused.made_text[r], text);
                CHECK_INT(refused.planned_status[r], free_run.real[r].step.peak_total > refused.memory_limit ? LLMPAR_ERR_MEMORY : LLMPAR_OK);
                if (!refused.planned_status[r]) { CHECK_TEXT(refused.made_text[r], "this rank's part would fit"); continue; }
                over++;
                /* tag, label, request and what is held where */
                int named = 0;
                for (int tag = 0; tag < LLMPAR_TAG_COUNT; tag++) {
                    snprintf(text, sizeof text, "arena: %s \"", llmpar_tag_name((llmpar_tag)tag));
                    named += strstr(refused.made_text[r], text) != NULL;
                }
                CHECK_INT(named, 1);
                CHECK_TEXT(refused.made_text[r], "bytes: over the limit (limit ");
                CHECK_TEXT(refused.made_text[r], ": parameters ");
                CHECK_TEXT(refused.too_much[r].text, "over the limit");
            }
            CHECK(over > 0);
        }
}

/* The buffers that measure the processor's speed, a product of 256 x 256, are made smaller where a step takes less than they do. */
TEST(limit_of_a_small_model)
{
    attempt free_run = attempt_of(1, 1, 1, "--optimizer adalomo");
    free_run.config.layers = 1;
    free_run.config.hidden = 16;
    free_run.config.intermediate = 24;
    free_run.batch = 2;
    attempt fits = free_run;
    plan_is_reality(&free_run);
    fits.memory_limit = largest_peak(&free_run, 1);
    CHECK(fits.memory_limit < 3 * 256 * 256 * sizeof(float));
    if (plan_is_reality(&fits)) same_steps(fits.policy, &fits, &free_run);
}

static llmpar_llama_config large_config(void)
{
    llmpar_llama_config c = train_config(0);
    c.vocab = 32000;
    c.hidden = 1024;
    c.intermediate = 2816;
    c.layers = 8;
    c.heads = 16;
    c.kv_heads = 8;
    c.head_dim = 64;
    c.max_positions = 2048;
    return c;
}

/* Gigabytes are refused without taking megabytes: nothing is allocated but descriptions. */
TEST(refused_for_nothing)
{
    for (int m = 0; m < 4; m++) {
        attempt a = attempt_of(meshes[m][0], meshes[m][1], meshes[m][2], "");
        a.config = large_config();
        a.batch = 8;
        a.seq_len = 1024;
        a.steps = -1;
        CHECK_OK(attempt_run(&a));
        CHECK(largest_peak(&a, 0) > (uint64_t)1 << 30);
        for (int r = 0; r < a.ranks; r++)
            if (a.taken[r] > 1 << 20) TEST_FAIL("rank %d: the plan took %llu bytes", r, (unsigned long long)a.taken[r]);
        a.plan = 0;
        a.steps = 1;
        a.memory_limit = largest_peak(&a, 0) - 1;
        CHECK_STATUS(attempt_run(&a), LLMPAR_ERR_MEMORY);
        CHECK_INT(a.calls, 0);
        for (int r = 0; r < a.ranks; r++) {
            if (a.taken[r] > 1 << 20) TEST_FAIL("rank %d: the refusal took %llu bytes", r, (unsigned long long)a.taken[r]);
            CHECK_STATUS(a.made_status[r], LLMPAR_ERR_MEMORY);
            CHECK_TEXT(a.made_text[r], "; with recompute selective: ");
            CHECK_TEXT(a.made_text[r], "recompute full: ");
            CHECK_TEXT(a.made_text[r], "offload optimizer=file: ");
            CHECK_TEXT(a.made_text[r], "offload activations=file: ");
            CHECK_TEXT(a.made_text[r], " less, fits)");
            CHECK_INT(strstr(a.made_text[r], "sp on: ") != NULL, a.tp > 1);
            CHECK_INT(strstr(a.made_text[r], "grad-accum 2: ") != NULL, 1);
        }
    }
    attempt a = attempt_of(1, 2, 1, "--zero 0 --optimizer adamw");
    a.config = large_config();
    a.steps = 1;
    a.memory_limit = (uint64_t)1 << 20;
    CHECK_STATUS(attempt_run(&a), LLMPAR_ERR_MEMORY);
    CHECK_TEXT(a.error.text, "zero 3: ");
    CHECK(!strstr(a.error.text, "fits)")); /* a megabyte is not enough for any of them */
}

/* What the refusal offers takes what it says: each is planned again as if the user had asked for it. */
TEST(offers_are_true)
{
    static const struct { const char *name, *policy; } offers[] = {{"recompute selective: ", "--zero 1 --recompute selective"}, {"recompute full: ", "--zero 1 --recompute full"}, {"zero 3: ", "--zero 3"}, {"sp on: ", "--zero 1 --sp on"},
                                                                   {"offload optimizer=file: ", "--zero 1 --offload optimizer=file"}, {"offload activations=file: ", "--zero 1 --offload activations=file"}, {"grad-accum 2: ", "--zero 1 --grad-accum 2"}};
    attempt a = attempt_of(1, 2, 2, "--zero 1");
    a.memory_limit = 4096;
    a.seq_len = 64;
    CHECK_STATUS(attempt_run(&a), LLMPAR_ERR_MEMORY);
    for (size_t i = 0; i < sizeof offers / sizeof offers[0]; i++) {
        const char *at = strstr(a.made_text[0], offers[i].name);
        if (!at) { TEST_FAIL("no \"%s\" in: %s", offers[i].name, a.made_text[0]); continue; }
        attempt b = attempt_of(1, 2, 2, offers[i].policy);
        b.seq_len = 64;
        plan_is_reality(&b);
        CHECK_INT(strtoull(at + strlen(offers[i].name), NULL, 10), largest_peak(&b, 1));
    }
}

/* ---- recompute = auto ---- */

static void count_blocks(const attempt *a, int *selective, int *full)
{
    *selective = *full = 0;
    for (int i = 1; i + 1 < a->units; i++) {
        *selective += a->blocks[i] == LLMPAR_RECOMPUTE_SELECTIVE;
        *full += a->blocks[i] == LLMPAR_RECOMPUTE_FULL;
    }
}

/* Limits from "everything kept fits" down to "nothing fits". Each time: what was chosen fits and trains with the bits of NONE, in the order none, selective block by block, full block by block; and where it is not NONE, the limit lies
   below what the next lighter choice takes, which is the peak that the search saw there. */
TEST(recompute_auto)
{
    static const char *const base[] = {"", "--zero 2 --dtype bf16", "--wrap half --sp on"};
    for (int p = 0; p < 3; p++)
        for (int m = 0; m < 4; m++) {
            if (p != m && (p || m != 3)) continue; /* one, two shards, tp 2 and both */
            char automatic[200], cheap[200], everything[200];
            int units_before = -1, chosen[3] = {0, 0, 0};
            snprintf(automatic, sizeof automatic, "--recompute auto %s", base[p]);
            snprintf(cheap, sizeof cheap, "--recompute selective %s", base[p]);
            snprintf(everything, sizeof everything, "--recompute full %s", base[p]);
            attempt none = attempt_of(meshes[m][0], meshes[m][1], meshes[m][2], base[p]), some = attempt_of(meshes[m][0], meshes[m][1], meshes[m][2], cheap), all = attempt_of(meshes[m][0], meshes[m][1], meshes[m][2], everything);
            none.config.layers = some.config.layers = all.config.layers = 5;
            none.seq_len = some.seq_len = all.seq_len = 24;
            none.steps = some.steps = all.steps = 1;
            if (!plan_is_reality(&none) || !plan_is_reality(&some) || !plan_is_reality(&all)) continue;
            uint64_t high = largest_peak(&none, 1), middle = largest_peak(&some, 1), low = largest_peak(&all, 1);
            CHECK(low < middle && middle < high);
            int tries = 2 + 2 * test_rounds(2);
            for (int i = 0; i <= tries; i++) {
                int selective, full, weight;
                uint64_t half = (uint64_t)tries / 2, k = (uint64_t)i, limit = k <= half ? high - (high - middle) * k / half : middle - (middle - low) * (k - half) / half;
                attempt a = attempt_of(meshes[m][0], meshes[m][1], meshes[m][2], automatic);
                a.config = none.config;
                a.seq_len = none.seq_len;
                a.memory_limit = limit;
                a.steps = 1;
                if (!plan_is_reality(&a)) break;
                CHECK(largest_peak(&a, 1) <= limit);
                same_steps(automatic, &a, &none);
                count_blocks(&a, &selective, &full);
                weight = full ? 1000 * full + selective : selective;
                if (i == 0) CHECK_INT(weight, 0); /* all fits: nothing is recomputed */
                else if (limit < high) CHECK(weight > 0);
                if (full) CHECK_INT(selective + full, a.units - 2);
                CHECK(weight >= units_before);
                chosen[full ? 2 : selective ? 1 : 0]++;
                units_before = weight;
                /* One byte less than this choice takes: it is no longer taken. At exactly what it takes it is. So no block more than necessary is recomputed. (Where one byte less cannot be had at all, recomputing everything takes no less either.) */
                attempt exact = attempt_of(meshes[m][0], meshes[m][1], meshes[m][2], automatic), less;
                exact.config = none.config;
                exact.seq_len = none.seq_len;
                exact.steps = 0;
                less = exact;
                exact.memory_limit = largest_peak(&a, 1);
                less.memory_limit = exact.memory_limit - 1;
                CHECK_OK(attempt_run(&exact));
                CHECK_BYTES(exact.blocks, a.blocks, sizeof a.blocks);
                if (attempt_run(&less)) { /* the error says what the least is */
                    char takes[80];
                    CHECK_STATUS(less.status, LLMPAR_ERR_MEMORY);
                    CHECK(exact.memory_limit <= low);
                    snprintf(takes, sizeof takes, "a step takes %llu, whatever is recomputed", (unsigned long long)exact.memory_limit);
                    CHECK_TEXT(less.error.text, takes);
                }
                else {
                    int s, f;
                    count_blocks(&less, &s, &f);
                    CHECK((f ? 1000 * f + s : s) > weight);
                }
            }
            CHECK(chosen[0] && chosen[1] && chosen[2]);
        }
    /* Every second block only. */
    attempt all = attempt_of(1, 1, 1, "--recompute full,2"), some = attempt_of(1, 1, 1, "--recompute auto,2");
    plan_is_reality(&all);
    some.memory_limit = largest_peak(&all, 1);
    plan_is_reality(&some);
    for (int i = 1; i + 1 < some.units; i++) CHECK(i % 2 == 0 || some.blocks[i] == LLMPAR_RECOMPUTE_NONE);
    some.memory_limit--;
    CHECK_STATUS(attempt_run(&some), LLMPAR_ERR_MEMORY);
}

/* ---- what a plan leaves alone ---- */

/* No file is made or tried, in whatever directory, there or not: making and removing one would be seen in the directory's time. */
TEST(touches_nothing)
{
    char directory[400], path[500];
    const char *root = getenv("TMPDIR");
    struct stat before, after;
    snprintf(directory, sizeof directory, "%.200s/llmpar-plan-XXXXXX", root && root[0] ? root : "/tmp");
    if (!mkdtemp(directory)) { TEST_FAIL("cannot make %s", directory); return; }
    snprintf(path, sizeof path, "%s/log", directory);
    CHECK_INT(stat(directory, &before), 0);
    for (int there = 1; there >= 0; there--)
        for (int limited = 0; limited < 3; limited++) {
            attempt a = attempt_of(1, 2, 2, limited == 2 ? "--recompute auto --offload optimizer=file,params=file,grads=file" : "--offload optimizer=file,params=file,grads=file,activations=file --dtype bf16");
            a.steps = limited ? 1 : -1; /* a refusal plans too */
            a.offload_dir = there ? directory : "/no/such/directory";
            a.log = a.trace = there ? path : "/no/such/directory/log";
            a.memory_limit = limited ? 4096 : 0;
            CHECK_STATUS(attempt_run(&a), limited ? LLMPAR_ERR_MEMORY : LLMPAR_OK);
            CHECK_INT(a.calls, 0);
        }
    CHECK_INT(stat(directory, &after), 0);
    CHECK(before.st_mtim.tv_sec == after.st_mtim.tv_sec && before.st_mtim.tv_nsec == after.st_mtim.tv_nsec);
    CHECK_INT(rmdir(directory), 0);
}

/* A rank whose heap ends, anywhere in the planning or in what follows: all ranks hear of it, nothing is left. */
TEST(no_memory)
{
    for (int m = 0; m < 4; m += 3) {
        attempt sound = attempt_of(meshes[m][0], meshes[m][1], meshes[m][2], "--recompute auto --memory-limit 1G --wrap half");
        sound.plan = 0;
        sound.steps = 0;
        CHECK_OK(attempt_run(&sound));
        uint64_t all = sound.heap_calls[0];
        CHECK(all > 200);
        for (uint64_t at = 1; at <= all; at += 1 + at / (uint64_t)test_rounds(12)) {
            attempt a = sound;
            a.fail_rank = (int)(at % (uint64_t)a.ranks);
            a.fail_at = at;
            if (at > sound.heap_calls[a.fail_rank]) continue;
            CHECK_STATUS(attempt_run(&a), LLMPAR_ERR_MEMORY);
        }
    }
}

/* One allocation of one rank's that fails, and none after it: that rank says so. It must not go on without its plan, while the others are in the plan's collectives. */
TEST(one_allocation)
{
    for (int64_t at = 1, limited = 0;; at += 1 + at / test_rounds(12)) {
        attempt a = attempt_of(1, 1, 2, limited ? "--wrap half --memory-limit 1G" : "--wrap half");
        a.plan = a.steps = 0;
        a.fail_rank = (int)(at % 2);
        a.fail_once = at;
        attempt_run(&a);
        if (a.fail_once) {
            CHECK(at > 400);
            CHECK_OK(a.status);
            if (limited) break;
            limited = 1;
            at = 0;
            continue;
        }
        if (a.status != LLMPAR_ERR_MEMORY) TEST_FAIL("allocation %lld of rank %d: %s: rank %d: %s", (long long)at, a.fail_rank, llmpar_status_string(a.status), (int)a.error.rank, a.error.text);
    }
}

TEST_LIST(T_(one_by_one), T_(mixed), T_(limit), T_(limit_of_a_small_model), T_(refused_for_nothing), T_(offers_are_true), T_(recompute_auto), T_(touches_nothing), T_(no_memory), T_(one_allocation))
