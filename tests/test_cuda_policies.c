/* What a training step may be told, on CUDA devices: recomputation, offload to host memory and files, updates on the host, overlap, micro-batches, optimizers, loss scaling, frozen units, logits in parts. Whatever changes no bit on the CPU changes
   none here: losses, norms, gradients and the saved model are those of one rank without any of it. Losses are near the CPU's. Generation says the same on every number of tp ranks. */
#include "cuda.h"
#include "train.h"

enum { VOCAB = 67, LENGTH = 12, PROMPT = 5, GENERATED = 3 }; /* what takes seconds where every thread of a block is a fiber */

static llmpar_backend backend;

static llmpar_llama_config config_of(int tied)
{
    llmpar_llama_config config = train_config(tied);
    config.vocab = VOCAB;
    config.layers = 2;
    config.hidden = 32;
    config.intermediate = tied ? 44 : 40;
    config.heads = 4;
    config.kv_heads = 2;
    return config;
}

static llmpar_status sequence(void *user, int64_t index, int32_t *tokens)
{
    static const int64_t length = LENGTH;
    llmpar_status status = train_sequence((void *)(uintptr_t)&length, index, tokens);
    for (int i = 0; i <= LENGTH; i++)
        if (tokens[i] >= VOCAB) tokens[i] %= VOCAB;
    (void)user;
    return status;
}

static train_job job_of(const llmpar_llama_config *config, llmpar_dtype dtype, llmpar_optim_kind optim)
{
    train_job job;
    memset(&job, 0, sizeof job);
    llmpar_cuda_backend(&cuda_desc, &backend);
    job.backend = &backend;
    job.config = config;
    job.dtype = dtype;
    job.policy.optim.kind = optim;
    job.sequence = sequence;
    job.zero = 3;
    job.keep_files = 1;
    job.exact = LLMPAR_EXACT_REQUIRE;
    job.batch = 4;
    job.seq_len = LENGTH;
    job.canon = 4;
    job.steps = 2;
    return job;
}

typedef struct row {
    const char *name;
    int32_t replicate, shard, tp, sp, accum, prefetch, wrap;
    llmpar_recompute recompute;
    int32_t overlap, host_update;
    const char *tier; /* of each state: d, h, f */
} row;

static void run_row(const llmpar_llama_config *config, llmpar_dtype dtype, llmpar_optim_kind optim, const row *r, const train_result *want)
{
    train_result *got = (train_result *)malloc(sizeof *got);
    train_job job = job_of(config, dtype, optim);
    char name[160];
    job.dp_replicate = r->replicate;
    job.dp_shard = r->shard;
    job.tp = r->tp;
    job.sp = r->sp;
    job.accum = r->accum;
    job.prefetch = r->prefetch;
    job.wrap = r->wrap;
    job.policy.recompute = r->recompute;
    job.policy.overlap = r->overlap;
    job.policy.offload_update = r->host_update ? LLMPAR_TIER_HOST : LLMPAR_TIER_DEVICE;
    for (int i = 0; i < LLMPAR_STATE_COUNT; i++) job.policy.offload[i] = r->tier[i] == 'f' ? LLMPAR_TIER_FILE : r->tier[i] == 'h' ? LLMPAR_TIER_HOST : LLMPAR_TIER_DEVICE;
    snprintf(name, sizeof name, "%s %s %s", llmpar_dtype_name(dtype), llmpar_optim_name(optim), r->name);
    train_run(&job, got);
    (void)train_same(name, got, want);
    train_result_free(got);
    free(got);
}

/* One rank on the device, whose losses are near those of the CPU: in f32 as near as two orders of sums are, below f32 as near as its numbers. */
static train_result *one_rank(const llmpar_llama_config *config, llmpar_dtype dtype, llmpar_optim_kind optim)
{
    train_result *want = (train_result *)malloc(sizeof *want), cpu;
    train_job job = job_of(config, dtype, optim);
    double bound = dtype == LLMPAR_F32 ? 1e-4 : 2e-2;
    train_run(&job, want);
    if (want->status) TEST_FAIL("one rank: %s", want->error.text);
    job = job_of(config, dtype, optim);
    job.backend = NULL;
    job.keep_files = 0;
    train_run(&job, &cpu);
    if (cpu.status) TEST_FAIL("on the CPU: %s", cpu.error.text);
    for (int i = 0; i < job.steps && !want->status && !cpu.status; i++) {
        CHECK_NEAR(want->step[0][i].loss, cpu.step[0][i].loss, bound * cpu.step[0][i].loss);
        CHECK_NEAR(want->step[0][i].grad_norm, cpu.step[0][i].grad_norm, 10 * bound * cpu.step[0][i].grad_norm);
        CHECK_INT(want->step[0][i].tokens, cpu.step[0][i].tokens);
        CHECK_INT(want->step[0][i].skipped, cpu.step[0][i].skipped);
    }
    CHECK(!want->step[0][job.steps - 1].skipped); /* or there is no update to compare */
    return want;
}

static void rows(llmpar_dtype dtype, llmpar_optim_kind optim, const row *list, int count)
{
    llmpar_llama_config config = config_of(1);
    train_result *want = one_rank(&config, dtype, optim);
    int before = test_failures;
    for (int i = 0; i < count && test_failures == before; i++) run_row(&config, dtype, optim, &list[i], want);
    train_result_free(want);
    free(want);
}

TEST(recomputation_and_batches)
{
    static const row list[] = {
        { "full, 2x2 sp, accum 2, prefetch", 1, 2, 2, 1, 2, 1, 0, LLMPAR_RECOMPUTE_FULL, 0, 0, "dddd" },
        { "hsdp 2x2, half blocks, selective, overlap", 2, 2, 1, 0, 1, 1, LLMPAR_WRAP_HALF, LLMPAR_RECOMPUTE_SELECTIVE, 1, 0, "dddd" },
        { "accum 4", 1, 1, 1, 0, 4, 0, 0, LLMPAR_RECOMPUTE_NONE, 0, 0, "dddd" },
        { "tp4 sp, full", 1, 1, 4, 1, 1, 0, 0, LLMPAR_RECOMPUTE_FULL, 0, 0, "dddd" },
    };
    CUDA_OPEN();
    rows(LLMPAR_F32, LLMPAR_OPTIM_ADAMW, list, cuda_small() ? 2 : 4);
}

TEST(offload)
{
    static const row list[] = {
        { "everything in files, overlap", 1, 2, 1, 0, 1, 1, 0, LLMPAR_RECOMPUTE_FULL, 1, 0, "ffff" },
        { "updated on the host, one rank", 1, 1, 1, 0, 1, 0, 0, LLMPAR_RECOMPUTE_NONE, 0, 1, "hhhd" },
        { "updated on the host, 2x2 sp, accum 2", 1, 2, 2, 1, 2, 1, 0, LLMPAR_RECOMPUTE_SELECTIVE, 1, 1, "hhhh" },
        { "everything in host memory", 1, 2, 1, 0, 2, 0, 0, LLMPAR_RECOMPUTE_NONE, 0, 0, "hhhh" },
    };
    CUDA_OPEN();
    rows(LLMPAR_BF16, LLMPAR_OPTIM_ADAMW, list, cuda_small() ? 3 : 4);
    rows(LLMPAR_F16, LLMPAR_OPTIM_SGD, list + 1, 1);
}

TEST(optimizers)
{
    static const row list[] = { { "2x2", 1, 2, 2, 0, 1, 0, 0, LLMPAR_RECOMPUTE_NONE, 0, 0, "dddd" } };
    static const llmpar_optim_kind kinds[] = { LLMPAR_OPTIM_SGD, LLMPAR_OPTIM_LOMO, LLMPAR_OPTIM_ADALOMO };
    CUDA_OPEN();
    for (int k = cuda_small(); k < 3; k++) rows(k == 1 ? LLMPAR_BF16 : LLMPAR_F32, kinds[k], list, 1);
}

/* A loss scale that is too large at first: steps are skipped, on the CPU the same ones, and later ones are not. */
TEST(loss_scale)
{
    llmpar_llama_config config = config_of(0);
    train_result *got = (train_result *)malloc(sizeof *got), *cpu = (train_result *)malloc(sizeof *cpu);
    int skipped[2] = {0, 0};
    CUDA_OPEN();
    for (int k = 0; k < 2; k++) {
        train_job job = job_of(&config, LLMPAR_F16, LLMPAR_OPTIM_ADAMW);
        if (k) job.backend = NULL;
        job.keep_files = 0;
        job.steps = 4;
        job.policy.loss_scale.scale = 1048576.0;
        train_run(&job, k ? cpu : got);
        const train_result *r = k ? cpu : got;
        if (r->status) TEST_FAIL("%s: %s", k ? "cpu" : "cuda", r->error.text);
        for (int i = 0; i < job.steps; i++) skipped[k] += r->step[0][i].found_inf;
    }
    CHECK_INT(skipped[0], skipped[1]);
    CHECK(skipped[1] > 0 && skipped[1] < 4);
    free(got);
    free(cpu);
}

/* ---- generation ---- */

static int32_t generated[TRAIN_RANKS][2][GENERATED];
static float logits[TRAIN_RANKS][PROMPT * VOCAB];

static llmpar_status generate(train_job *job, llmpar_ctx *ctx, llmpar_llama *model, llmpar_trainer *trainer)
{
    static const int32_t prompt[PROMPT] = { 5, 60, 7, 1, VOCAB - 1 };
    llmpar_status status = llmpar_llama_logits(model, llmpar_trainer_fsdp(trainer), prompt, PROMPT, logits[ctx->rank]);
    (void)job;
    return status ? status : train_generate(model, trainer, prompt, PROMPT, GENERATED, generated[ctx->rank][0]);
}

TEST(generation)
{
    static const llmpar_dtype dtypes[] = { LLMPAR_F32, LLMPAR_BF16 };
    static int32_t want[2][GENERATED];
    static float want_logits[PROMPT * VOCAB];
    llmpar_llama_config config = config_of(0);
    CUDA_OPEN();
    for (int d = 0; d < 2; d++)
        for (int k = 0; k < 4; k++) { /* the CPU, then 1, 2, 4 ranks */
            if (cuda_small() && k == 3 - d) continue;
            train_result *got = (train_result *)malloc(sizeof *got);
            train_job job = job_of(&config, dtypes[d], LLMPAR_OPTIM_ADAMW);
            if (k == 0) job.backend = NULL;
            job.tp = k < 2 ? 1 : k == 2 ? 2 : 4;
            job.keep_files = 0;
            job.steps = 1;
            job.ready = generate;
            train_run(&job, got);
            if (got->status) TEST_FAIL("generation: %s", got->error.text);
            for (int i = 0; i < PROMPT * VOCAB && k == 1; i++)
                if (!(logits[0][i] - want_logits[i] < (d ? 0.05f : 1e-4f) && want_logits[i] - logits[0][i] < (d ? 0.05f : 1e-4f))) { TEST_FAIL("logit %d: %g, the CPU's is %g", i, (double)logits[0][i], (double)want_logits[i]); break; }
            if (k < 2) {
                memcpy(want, generated[0], sizeof want);
                memcpy(want_logits, logits[0], sizeof want_logits);
            }
            for (int r = 0; r < got->ranks && k; r++) {
                CHECK_BYTES(generated[r], want, sizeof want);
                CHECK_BYTES(logits[r], want_logits, sizeof want_logits);
                CHECK_INT(got->live[r], 0);
            }
            train_result_free(got);
            free(got);
        }
}

TEST_LIST(T_(recomputation_and_batches), T_(offload), T_(optimizers), T_(loss_scale), T_(generation), T_(cuda_end))
