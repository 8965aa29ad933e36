/* Threads inside a rank: a training step has the same bytes on 1, 2, 3 and 5 of them, whatever the mesh, and so have collectives that are long enough to be shared out among them. */
#include "train.h"
#include "collectives.h"

static void step_on_threads(const char *mesh, int dp_shard, int tp, llmpar_dtype dtype, int32_t overlap)
{
    static const int32_t threads[] = { 1, 3, 2, 5 };
    llmpar_llama_config config = train_config(0);
    train_result want;
    memset(&want, 0, sizeof want);
    for (int i = 0; i < (test_rounds(4) < 4 ? 2 : 4); i++) {
        train_result got;
        char name[80];
        train_job job;
        memset(&job, 0, sizeof job);
        job.config = &config;
        job.dp_shard = dp_shard;
        job.tp = tp;
        job.dtype = dtype;
        job.steps = 2;
        job.threads = threads[i];
        job.policy.overlap = overlap;
        job.keep_files = 1;
        train_run(&job, i ? &got : &want);
        snprintf(name, sizeof name, "%s %s, %d threads", mesh, llmpar_dtype_name(dtype), (int)threads[i]);
        CHECK_OK(i ? got.status : want.status);
        if (!i) continue;
        train_same(name, &got, &want);
        train_result_free(&got);
    }
    train_result_free(&want);
}

TEST(step_has_the_same_bytes)
{
    step_on_threads("1x1", 1, 1, LLMPAR_F32, 0);
    step_on_threads("1x1", 1, 1, LLMPAR_BF16, 0);
    step_on_threads("2x1", 2, 1, LLMPAR_F32, 0);
    step_on_threads("1x2", 1, 2, LLMPAR_BF16, 0);
    step_on_threads("2x1, streams with threads", 2, 1, LLMPAR_F32, 1);
}

/* 16,384 f32 are a task of a sum; the slices of 2 ranks are three tasks and a bit. */
static llmpar_status long_ones(llmpar_ctx *ctx, void *user)
{
    static const llmpar_dtype dtypes[] = { LLMPAR_F32, LLMPAR_I64, LLMPAR_BF16 };
    llmpar_status st = LLMPAR_OK;
    (void)user;
    for (int d = 0; d < 3; d++)
        for (int v = 0; v < 4 && !st; v++) {
            sample s = { (size_t)(v == 2 ? 33331 : 100003), v == 2 ? 3 : 1, dtypes[d], v == 3 ? LLMPAR_MAX : LLMPAR_SUM, v == 1, NULL, 0 };
            st = one_sample(ctx->comm, &s);
        }
    return st;
}

TEST(long_collectives)
{
    for (int ranks = 2; ranks <= 5; ranks += ranks == 3 ? 2 : 1)
        for (int threads = 1; threads <= 3; threads += 2) {
            llmpar_launch_desc desc = { .ranks = ranks, .threads = threads, .deadline = 120, .check = test_no_leak };
            llmpar_error error;
            CHECK_OK(llmpar_launch(&desc, long_ones, NULL, &error));
            if (error.status) TEST_FAIL("%d ranks, %d threads: %s", ranks, threads, error.text);
        }
}

TEST_LIST(T_(step_has_the_same_bytes), T_(long_collectives))
