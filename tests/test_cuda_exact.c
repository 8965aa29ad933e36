/* The same bits on every mesh, on GPUs (docs/exact.md): what tests/test_exact.c asks of CPU ranks, of rank threads that share a CUDA device: losses, gradient norms, gradients and saved weights of a few steps on a mesh
   are those of one rank. Emulated, a sample on a small model; on a GPU more of it, in F32 and BF16. */
#include "cuda.h"
#include "train.h"

typedef struct shape { const char *name; int32_t replicate, shard, tp; } shape;
static const shape shapes[] = {{"tp2", 1, 1, 2}, {"dp2", 1, 2, 1}, {"2x2", 1, 2, 2}, {"tp4", 1, 1, 4}, {"dp4", 1, 4, 1}, {"hsdp 2x2", 2, 2, 1}};

static llmpar_backend backend;

static llmpar_llama_config config_of(int tied)
{
    llmpar_llama_config config = train_config(tied);
    if (!cuda_small()) {
        config.hidden = 512;
        config.heads = 8;
        config.head_dim = 64;
        config.intermediate = tied ? 1000 : 1040;
    } else {
        config.vocab = 131;
        config.layers = 2;
    }
    return config;
}

static llmpar_status sequence(void *user, int64_t index, int32_t *tokens)
{
    llmpar_status status = train_sequence(NULL, index, tokens);
    for (int i = 0; i <= 24; i++) if (tokens[i] > 130) tokens[i] %= 131;
    (void)user;
    return status;
}

static train_job job_of(const llmpar_llama_config *config, llmpar_dtype dtype)
{
    train_job job;
    memset(&job, 0, sizeof job);
    llmpar_cuda_backend(&cuda_desc, &backend);
    job.backend = &backend;
    job.config = config;
    job.dtype = dtype;
    job.sequence = sequence;
    job.zero = 3;
    job.keep_files = 1;
    if (cuda_small()) {
        job.batch = 4;
        job.canon = 4;
        job.steps = 2;
    }
    return job;
}

static void compare(train_job *job, const char *name, const train_result *want)
{
    train_result *got = (train_result *)malloc(sizeof *got);
    train_run(job, got);
    (void)train_same(name, got, want);
    train_result_free(got);
    free(got);
}

static void meshes(int tied, llmpar_dtype dtype, int first, int count)
{
    llmpar_llama_config config = config_of(tied);
    train_result *want = (train_result *)malloc(sizeof *want);
    train_job one = job_of(&config, dtype);
    train_run(&one, want);
    if (want->status) TEST_FAIL("one rank: %s", want->error.text);
    else if (!(want->step[0][0].loss > 2 && want->step[0][0].loss < 9)) TEST_FAIL("loss %g", want->step[0][0].loss);
    for (int i = first; i < first + count && !test_failures; i++) {
        const shape *s = &shapes[i % (int)(sizeof shapes / sizeof shapes[0])];
        char name[100];
        train_job job = job_of(&config, dtype);
        job.dp_replicate = s->replicate;
        job.dp_shard = s->shard;
        job.tp = s->tp;
        job.sp = i & 1;
        job.zero = i % 3 == 1 ? 0 : 3;
        job.prefetch = i & 1;
        job.accum = i % 3 == 2 ? 2 : 1;
        job.exact = LLMPAR_EXACT_REQUIRE;
        snprintf(name, sizeof name, "%s %s %s", llmpar_dtype_name(dtype), tied ? "tied" : "untied", s->name);
        compare(&job, name, want);
    }
    train_result_free(want);
    free(want);
}

TEST(f32) { CUDA_OPEN(); meshes(1, LLMPAR_F32, 0, cuda_small() ? 3 : 6); }
TEST(f32_untied) { CUDA_OPEN(); meshes(0, LLMPAR_F32, cuda_small() ? 3 : 0, cuda_small() ? 1 : 6); }
TEST(bf16) { CUDA_OPEN(); meshes(0, LLMPAR_BF16, 2, cuda_small() ? 1 : 6); }

/* Masters and moments in host memory: the same bits in less of the device's memory, and with a limit of that much; without it the limit is too low, which is said. */
TEST(offload)
{
    CUDA_OPEN();
    llmpar_llama_config config = config_of(1);
    train_result *want = (train_result *)malloc(sizeof *want), *got = (train_result *)malloc(sizeof *got);
    train_job job = job_of(&config, LLMPAR_BF16);
    uint64_t least;
    job.dp_shard = 2;
    train_run(&job, want);
    if (want->status) TEST_FAIL("on the device: %s", want->error.text);
    job.policy.offload[LLMPAR_STATE_OPTIMIZER] = LLMPAR_TIER_HOST;
    job.policy.offload[LLMPAR_STATE_PARAMS] = LLMPAR_TIER_HOST;
    train_run(&job, got);
    (void)train_same("offloaded", got, want);
    least = got->step[0][got->steps - 1].memory;
    printf("  peak of the device: %llu bytes, offloaded %llu\n", (unsigned long long)want->step[0][want->steps - 1].memory, (unsigned long long)least);
    CHECK(least < want->step[0][want->steps - 1].memory);
    train_result_free(got);
    job.memory_limit = least;
    train_run(&job, got);
    (void)train_same("offloaded under a limit", got, want);
    for (int r = 0; r < got->ranks; r++) CHECK(got->step[r][got->steps - 1].memory <= least);
    train_result_free(got);
    memset(job.policy.offload, 0, sizeof job.policy.offload);
    train_run(&job, got);
    CHECK_STATUS(got->status, LLMPAR_ERR_MEMORY);
    train_result_free(got);
    train_result_free(want);
    free(got);
    free(want);
}

TEST_LIST(T_(f32), T_(f32_untied), T_(bf16), T_(offload), T_(cuda_end))
