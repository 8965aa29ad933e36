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
        if (d->most_pending < 20 || d->executed < 1000) TEST_FAIL("%s: rank %d: %llu operations, %llu at once waiting: nothing was delayed", text, r, (unsigned long long)d->executed, (unsigned long long)d->most_pending);
        if (d->pending) TEST_FAIL("%s: rank %d: %llu operations were never waited for", text, r, (unsigned long long)d->pending);
        if (d->early_free) TEST_FAIL("%s: rank %d: memory or a stream was given back %llu times while operations were waiting", text, r, (unsigned long long)d->early_free);
    }
    train_result_free(got);
    free(got);
    free(ranks);
}

static train_job job_of(const llmpar_llama_config *config, int32_t shard, int32_t tp)
{
    train_job job;
    memset(&job, 0, sizeof job);
    job.config = config;
    job.dp_shard = shard;
    job.tp = tp;
    job.zero = 3;
    job.steps = 2;
    job.keep_files = 1;
    return job;
}

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

TEST_LIST(T_(tied), T_(untied))
