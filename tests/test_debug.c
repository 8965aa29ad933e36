/* Training on a device that delays everything to the wait gives the bytes of the device that works at once: no code relies on an operation being
   complete when its call returns, on arguments being read later, or on streams running in the order of the calls. */
#include "debug_device.h"
#include "train.h"

typedef struct debug_ranks { debug_device device[TRAIN_RANKS]; debug_order order; } debug_ranks;

/* Puts the debug device in place of the rank's own, also under the world communicator. */
static llmpar_status begin(train_job *job, llmpar_ctx *ctx)
{
    debug_ranks *ranks = (debug_ranks *)job->user;
    debug_device *d = &ranks->device[ctx->rank];
    debug_device_init(d, ctx->device, ranks->order);
    ctx->device = &d->table;
    ctx->comm->device = &d->table;
    return LLMPAR_OK;
}

static void end(train_job *job, llmpar_ctx *ctx)
{
    debug_ranks *ranks = (debug_ranks *)job->user;
    ctx->device = ctx->comm->device = ranks->device[ctx->rank].inner;
}

static void compare(train_job *job, const char *name, debug_order order, const train_result *want)
{
    static const char *const order_name[] = {"fifo", "lazy", "others"};
    char text[160];
    debug_ranks *ranks = (debug_ranks *)calloc(1, sizeof *ranks);
    train_result *got = (train_result *)malloc(sizeof *got);
    ranks->order = order;
    job->begin = begin;
    job->end = end;
    job->user = ranks;
    snprintf(text, sizeof text, "%s %s", name, order_name[order]);
    train_run(job, got);
    train_same(text, got, want);
    for (int r = 0; r < got->ranks; r++) {
        const debug_device *d = &ranks->device[r];
        /* 642 and more, of which a hundred or so are saving; weights are initialised in runs of whole rows, which makes few copies. */
        if (d->most_pending < 20 || d->executed < 500) TEST_FAIL("%s: rank %d: %llu operations, %llu at once waiting: nothing was delayed", text, r, (unsigned long long)d->executed, (unsigned long long)d->most_pending);
        if (d->pending) TEST_FAIL("%s: rank %d: %llu operations were never waited for", text, r, (unsigned long long)d->pending);
        if (d->early_free) TEST_FAIL("%s: rank %d: memory or a stream was given back %llu times while operations were waiting", text, r, (unsigned long long)d->early_free);
    }
    train_result_free(got);
    free(got);
    free(ranks);
}

static train_job job_of(const llmpar_llama_config *config, int32_t shard, int32_t tp) { return train_job_of(config, 1, shard, tp); }

/* Under a sanitizer the two jobs with most streams and most releases. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { FEW = 1 };
#else
enum { FEW = 0 };
#endif

static void orders(int tied)
{
    train_result want;
    llmpar_llama_config config = train_config(tied);
    train_job job = job_of(&config, 1, 1);
    train_run(&job, &want);
    CHECK_OK(want.status);
    for (int i = DEBUG_FIFO; i <= DEBUG_OTHERS; i++) {
        job = job_of(&config, 2, 2);
        job.sp = job.prefetch = 1;
        job.accum = 4;
        compare(&job, "2x2 sp prefetch accum 4", (debug_order)i, &want);
        job = job_of(&config, 1, 1);
        compare(&job, "1", (debug_order)i, &want);
        if (FEW) continue;
        job = job_of(&config, 2, 2);
        compare(&job, "2x2", (debug_order)i, &want);
        job = job_of(&config, 2, 2);
        job.dp_replicate = 2;
        job.prefetch = job.no_sync = 1;
        job.accum = 2;
        compare(&job, "2x2x2 prefetch no_sync", (debug_order)i, &want);
        job = job_of(&config, 4, 1);
        job.zero = 0;
        job.accum = 2;
        compare(&job, "dp4 zero 0", (debug_order)i, &want);
    }
    train_result_free(&want);
}

TEST(tied) { orders(1); }
TEST(untied)
{
    if (!FEW) orders(0);
}

/* Where memory is short, idle blocks go back to the device in the middle of a step: free waits for the work that still uses them. In one queue only: ranks give back at different
   moments, and what free executes would be in another order than on other ranks. */
TEST(memory_is_short)
{
    train_result want;
    llmpar_llama_config config = train_config(1);
    debug_ranks *ranks = (debug_ranks *)calloc(1, sizeof *ranks);
    train_result *got = (train_result *)malloc(sizeof *got);
    train_job job = job_of(&config, 2, 2);
    job.batch = 64;
    job.prefetch = 1;
    train_run(&job, &want);
    CHECK_OK(want.status);
    job = job_of(&config, 2, 2);
    job.batch = 64;
    job.prefetch = 1;
    for (int r = 0; r < want.ranks; r++)
        if (want.step[r][1].memory > job.memory_limit) job.memory_limit = want.step[r][1].memory;
    job.memory_limit += 1 << 17; /* what saving takes */
    job.begin = begin;
    job.end = end;
    job.user = ranks;
    train_run(&job, got);
    train_same("memory is short", got, &want);
    CHECK(ranks->device[0].early_free > 0);
    for (int r = 0; r < got->ranks; r++) CHECK_INT(ranks->device[r].pending, 0);
    train_result_free(&want);
    train_result_free(got);
    free(got);
    free(ranks);
}

/* ---- failures come out of the wait ---- */

static __thread int64_t gemms_left;
static __thread llmpar_status (*whole_gemm)(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args);
static int64_t gemm_that_fails; /* written between jobs only */

static llmpar_status failing_gemm(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args)
{
    return --gemms_left == 0 ? llmpar_error_set(device->error, LLMPAR_ERR_INTERNAL, "planted: a product") : whole_gemm(device, stream, args);
}

static llmpar_status begin_failing(train_job *job, llmpar_ctx *ctx)
{
    if (ctx->rank == 1) {
        gemms_left = gemm_that_fails;
        whole_gemm = ctx->device->gemm;
        ctx->device->gemm = failing_gemm;
    }
    return begin(job, ctx);
}

TEST(failure)
{
    llmpar_llama_config config = train_config(1);
    for (int order = DEBUG_FIFO; order <= DEBUG_OTHERS; order++)
        for (int64_t n = 1; n < 100; n += n < 3 ? 1 : 40) {
            debug_ranks *ranks = (debug_ranks *)calloc(1, sizeof *ranks);
            train_result *got = (train_result *)malloc(sizeof *got);
            train_job job = job_of(&config, 2, 2);
            job.keep_files = 0;
            job.prefetch = job.sp = 1;
            job.accum = 2;
            job.begin = begin_failing;
            job.end = end;
            job.user = ranks;
            ranks->order = (debug_order)order;
            gemm_that_fails = n;
            train_run(&job, got);
            CHECK_STATUS(got->status, LLMPAR_ERR_INTERNAL);
            CHECK_INT(got->error.rank, 1);
            CHECK_TEXT(got->error.text, "planted: a product");
            for (int r = 0; r < got->ranks; r++) {
                CHECK_STATUS(got->rank_status[r], r == 1 ? LLMPAR_ERR_INTERNAL : LLMPAR_ERR_PEER);
                CHECK_INT(got->live[r], 0);
                CHECK_INT(ranks->device[r].pending, 0);
            }
            train_result_free(got);
            free(got);
            free(ranks);
        }
}

/* ---- generation ---- */

enum { PROMPT = 3, GENERATED = 16 };
static int32_t generated[TRAIN_RANKS][2][GENERATED]; /* by rank; greedy, sampled */

static llmpar_status generate(train_job *job, llmpar_ctx *ctx, llmpar_llama *model, llmpar_trainer *trainer)
{
    static const int32_t prompt[PROMPT] = {5, 300, 77};
    (void)job;
    return train_generate(model, trainer, prompt, PROMPT, GENERATED, generated[ctx->rank][0]);
}

TEST(generation)
{
    static int32_t want[2][GENERATED];
    llmpar_llama_config config = train_config(0);
    for (int i = -1; i < 6; i++) {
        debug_ranks *ranks = (debug_ranks *)calloc(1, sizeof *ranks);
        train_result *got = (train_result *)malloc(sizeof *got);
        train_job job = job_of(&config, i % 2 ? 2 : 1, i < 0 ? 1 : 4 - i % 2 * 2);
        if (i < 0) job.dp_shard = 1;
        job.keep_files = 0;
        job.steps = 1;
        job.ready = generate;
        job.user = ranks;
        ranks->order = (debug_order)(i < 0 ? 0 : i / 2);
        if (i >= 0) job.begin = begin;
        if (i >= 0) job.end = end;
        train_run(&job, got);
        if (got->status) TEST_FAIL("generation: %s", got->error.text);
        if (i < 0) memcpy(want, generated[0], sizeof want);
        for (int r = 0; r < got->ranks; r++) {
            CHECK_BYTES(generated[r], want, sizeof want);
            CHECK_INT(got->live[r], 0);
            CHECK_INT(ranks->device[r].early_free, 0);
        }
        train_result_free(got);
        free(got);
        free(ranks);
    }
    CHECK(memcmp(want[0], want[1], sizeof want[0]));
}

TEST_LIST(T_(tied), T_(untied), T_(memory_is_short), T_(failure), T_(generation))
