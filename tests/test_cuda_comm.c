/* The communicator of rank threads that share a GPU: the suite of collectives on 1 to 8 ranks, splits, streams that run late and buffers that are used again at once; then every way to fail. */
#include "collectives.h"
#include "cuda.h"
#include "timed.h"

static void quiet(void *user, int rank, llmpar_log_level level, const char *line) { (void)user; (void)rank; (void)level; (void)line; }

static llmpar_status launch(int ranks, llmpar_rank_fn fn, void *user, llmpar_error *error)
{
    llmpar_backend gpu;
    llmpar_launch_desc desc;
    memset(&desc, 0, sizeof desc);
    llmpar_cuda_backend(NULL, &gpu);
    desc.ranks = ranks;
    desc.threads = 1;
    desc.deadline = 60;
    desc.backend = &gpu;
    desc.log = quiet;
    desc.check = test_no_leak;
    return llmpar_launch(&desc, fn, user, error);
}
static void launch_ok(int ranks, llmpar_rank_fn fn, void *user)
{
    llmpar_error error;
    CHECK_OK(launch(ranks, fn, user, &error));
    if (error.status) TEST_FAIL("%d ranks: %s", ranks, error.text);
}
/* Skips the test where there is no device. */
#define COMM_OPEN() do { llmpar_error_clear(&cuda_none); if (llmpar_cuda_count(&cuda_none) < 1) TEST_SKIP(cuda_none.text); } while (0)

/* ---- values ---- */

TEST(values)
{
    COMM_OPEN();
    for (int ranks = 1; ranks <= 8; ranks += ranks == 5 && cuda_small() ? 3 : 1) {
        size_t most = !cuda_small() || ranks <= 2 ? 20011 : ranks == 3 ? 513 : 64;
        launch_ok(ranks, collectives_here, &most);
    }
}

TEST(values_lockstep)
{
    COMM_OPEN();
    llmpar_backend gpu;
    size_t most = 64;
    llmpar_launch_desc desc = { .ranks = 3, .lockstep = 1, .check = test_no_leak, .backend = &gpu };
    llmpar_cuda_backend(NULL, &gpu);
    CHECK_OK(llmpar_launch(&desc, collectives_here, &most, NULL));
}

TEST(splits)
{
    COMM_OPEN();
    for (int ranks = 1; ranks <= 7; ranks++) launch_ok(ranks, collectives_splits, NULL);
}

/* ---- order ---- */

/* Rounds without a wait of the host: x is written, sent around in several ways on two streams and two communicators, and overwritten at once. What arrives was in x when the call was made, and all of it. */
static llmpar_status in_order(llmpar_ctx *ctx, void *user)
{
    enum { COUNT = 96, ROUNDS = 6 };
    llmpar_device *d = ctx->device;
    llmpar_comm *turned = NULL, *comms[2];
    llmpar_stream *streams[2] = { NULL, NULL };
    size_t n = (size_t)ctx->world, r = (size_t)ctx->rank;
    float *pattern = (float *)malloc(ROUNDS * n * COUNT * sizeof *pattern), *got = (float *)malloc(4 * n * COUNT * sizeof *got);
    char *x[2] = { NULL, NULL }, *poison = NULL, *gathered[2][ROUNDS], *summed[2][ROUNDS], *patterns = NULL;
    (void)user;
    CHECK_OK(llmpar_comm_split(ctx->comm, 0, -ctx->rank, "turned", &turned));
    comms[0] = ctx->comm;
    comms[1] = turned;
    for (size_t i = 0; i < ROUNDS * n * COUNT; i++) pattern[i] = (float)((i * 37 + r * 11 + (i / (n * COUNT)) * 5) % 251) - 125.0f;
    CHECK_OK(d->alloc(d, ROUNDS * n * COUNT * 4, (void **)&patterns));
    CHECK_OK(d->copy(d, NULL, patterns, pattern, ROUNDS * n * COUNT * 4));
    CHECK_OK(d->alloc(d, n * COUNT * 4, (void **)&poison));
    CHECK_OK(d->zero(d, NULL, poison, n * COUNT * 4));
    for (int s = 0; s < 2; s++) {
        CHECK_OK(d->stream_create(d, s ? "two" : "one", &streams[s]));
        CHECK_OK(d->alloc(d, n * COUNT * 4, (void **)&x[s]));
        for (int k = 0; k < ROUNDS; k++) {
            CHECK_OK(d->alloc(d, n * COUNT * 4, (void **)&gathered[s][k]));
            CHECK_OK(d->alloc(d, n * COUNT * 4, (void **)&summed[s][k]));
        }
    }
    for (int k = 0; k < ROUNDS; k++)
        for (int s = 0; s < 2; s++) {
            llmpar_collective call = { .send = x[s], .recv = gathered[s][k], .count = COUNT, .dtype = LLMPAR_F32, .tag = "round" };
            llmpar_comm *comm = comms[(k + s) % 2];
            CHECK_OK(d->copy(d, streams[s], x[s], patterns + (size_t)k * n * COUNT * 4, n * COUNT * 4));
            CHECK_OK(k % 2 ? llmpar_all_to_all(comm, streams[s], &call) : llmpar_all_gather(comm, streams[s], &call));
            call.recv = summed[s][k];
            CHECK_OK(k % 3 == 2 ? llmpar_reduce_scatter(comm, streams[s], &call) : llmpar_all_reduce(comm, streams[s], &call));
            CHECK_OK(d->copy(d, streams[s], x[s], poison, n * COUNT * 4)); /* at once */
            if (k % 2) { /* in place, of what just came; then overwritten */
                call.send = call.recv = gathered[s][k];
                call.count = n * COUNT;
                call.op = LLMPAR_MAX;
                CHECK_OK(llmpar_all_reduce(comm, streams[s], &call));
            }
        }
    for (int s = 0; s < 2; s++) CHECK_OK(d->synchronize(d, streams[s]));
    for (int k = 0; k < ROUNDS; k++)
        for (int s = 0; s < 2; s++) {
            int reverse = (k + s) % 2;
            size_t me = reverse ? n - 1 - r : r, base = (size_t)k * n * COUNT;
            CHECK_OK(d->copy(d, NULL, got, gathered[s][k], n * COUNT * 4));
            for (size_t i = 0; i < n * COUNT; i++) {
                size_t from = reverse ? n - 1 - i / COUNT : i / COUNT;
                float want;
#define VALUE(rank, at) ((float)(((base + (at)) * 37 + (rank) * 11 + (size_t)k * 5) % 251) - 125.0f)
                if (k % 2 == 0) want = VALUE(from, i % COUNT);
                else { /* the largest over ranks `to` of what rank `from` sent them */
                    want = -1000;
                    for (size_t to = 0; to < n; to++) if (VALUE(from, to * COUNT + i % COUNT) > want) want = VALUE(from, to * COUNT + i % COUNT);
                }
                if (got[i] != want) { TEST_FAIL("rank %d, round %d, stream %d: element %d is %g, want %g", ctx->rank, k, s, (int)i, (double)got[i], (double)want); break; }
            }
            CHECK_OK(d->copy(d, NULL, got, summed[s][k], COUNT * 4));
            for (size_t i = 0; i < COUNT; i++) {
                float want = 0; /* small whole numbers: any order */
                for (size_t from = 0; from < n; from++) want += VALUE(from, (k % 3 == 2 ? me * COUNT : 0) + i);
                if (got[i] != want) { TEST_FAIL("rank %d, round %d, stream %d: sum %d is %g, want %g", ctx->rank, k, s, (int)i, (double)got[i], (double)want); break; }
            }
        }
    for (int s = 0; s < 2; s++) {
        d->free(d, x[s], n * COUNT * 4);
        for (int k = 0; k < ROUNDS; k++) {
            d->free(d, gathered[s][k], n * COUNT * 4);
            d->free(d, summed[s][k], n * COUNT * 4);
        }
        d->stream_destroy(d, streams[s]);
    }
    d->free(d, patterns, ROUNDS * n * COUNT * 4);
    d->free(d, poison, n * COUNT * 4);
    llmpar_comm_destroy(turned);
    free(pattern);
    free(got);
    return LLMPAR_OK;
}
TEST(buffers_are_used_again_at_once)
{
    COMM_OPEN();
    for (int round = 0; round < (cuda_small() ? 4 : 20); round++)
        for (int ranks = 2; ranks <= 5; ranks++) launch_ok(ranks, in_order, NULL);
}

/* Messages along a line of ranks: one gives to the next what it got, and overwrites it. */
static llmpar_status line_of_messages(llmpar_ctx *ctx, void *user)
{
    enum { COUNT = 1000, ROUNDS = 5 };
    llmpar_device *d = ctx->device;
    llmpar_stream *stream = NULL;
    int32_t *host = (int32_t *)malloc(COUNT * 4);
    void *x = NULL, *kept = NULL;
    (void)user;
    CHECK_OK(d->stream_create(d, "line", &stream));
    CHECK_OK(d->alloc(d, COUNT * 4, &x));
    CHECK_OK(d->alloc(d, ROUNDS * COUNT * 4, &kept));
    CHECK_OK(d->zero(d, NULL, x, COUNT * 4));
    for (int k = 0; k < ROUNDS; k++) {
        llmpar_collective call = { .send = x, .recv = x, .count = COUNT, .dtype = LLMPAR_I32, .tag = "line" };
        if (ctx->rank == 0) {
            for (int i = 0; i < COUNT; i++) host[i] = k * 1000 + i;
            CHECK_OK(d->copy(d, NULL, kept, host, COUNT * 4));
            CHECK_OK(d->copy(d, stream, x, kept, COUNT * 4));
        } else {
            call.peer = ctx->rank - 1;
            CHECK_OK(llmpar_recv(ctx->comm, stream, &call));
            CHECK_OK(d->copy(d, stream, (char *)kept + (size_t)k * COUNT * 4, x, COUNT * 4));
        }
        call.peer = ctx->rank + 1;
        if (ctx->rank + 1 < ctx->world) CHECK_OK(llmpar_send(ctx->comm, stream, &call));
        CHECK_OK(d->zero(d, stream, x, COUNT * 4));
        if (ctx->rank == 0) CHECK_OK(d->synchronize(d, stream));
    }
    CHECK_OK(d->synchronize(d, stream));
    for (int k = 0; k < ROUNDS && ctx->rank; k++) {
        CHECK_OK(d->copy(d, NULL, host, (char *)kept + (size_t)k * COUNT * 4, COUNT * 4));
        for (int i = 0; i < COUNT; i++) if (host[i] != k * 1000 + i) { TEST_FAIL("rank %d, message %d: element %d is %d", ctx->rank, k, i, (int)host[i]); break; }
    }
    d->stream_destroy(d, stream);
    d->free(d, x, COUNT * 4);
    d->free(d, kept, ROUNDS * COUNT * 4);
    free(host);
    return LLMPAR_OK;
}
TEST(messages)
{
    COMM_OPEN();
    for (int ranks = 2; ranks <= 4; ranks++) launch_ok(ranks, line_of_messages, NULL);
}

/* Ranks with a GPU each, and three ranks on two: each reads and writes the others' memory. */
TEST(several_gpus)
{
    COMM_OPEN();
    cuda_again("EMULATED_CUDA_DEVICES", "2", "messages");
    cuda_again("EMULATED_CUDA_DEVICES", "2", "values_lockstep");
    cuda_again("EMULATED_CUDA_DEVICES", "3", "splits");
}

/* ---- failures ---- */

typedef struct report { int how; llmpar_status status[8]; char text[8][1600]; } report;
static llmpar_status note(llmpar_ctx *ctx, report *out, llmpar_status status)
{
    out->status[ctx->rank] = status;
    snprintf(out->text[ctx->rank], sizeof out->text[0], "%s", llmpar_last_error(ctx));
    return status;
}

static llmpar_status disagree(llmpar_ctx *ctx, void *user)
{
    report *out = (report *)user;
    int odd = ctx->rank == 2;
    mirror x = mirror_create(ctx->comm, 2400, 0), y = mirror_create(ctx->comm, 2400, 0);
    llmpar_collective call = { .send = x.device, .recv = y.device, .count = 50, .dtype = LLMPAR_F32, .tag = "layers.1/x" };
    llmpar_status st;
    memset(x.host, 1, 2400);
    memset(y.host, 0, 2400);
    mirror_put(ctx->comm, NULL, &x, 2400);
    mirror_put(ctx->comm, NULL, &y, 2400);
    if (odd && out->how == 1) call.count = 49;
    if (odd && out->how == 2) call.op = LLMPAR_MAX;
    if (odd && out->how == 3) call.tag = "layers.2/x";
    if (odd && out->how == 4) call.dtype = LLMPAR_F64, call.count /= 2;
    if (odd && out->how == 5) call.root = 1;
    if (odd && out->how == 6) st = llmpar_comm_barrier(ctx->comm, NULL, "layers.1/x");
    else if (odd && out->how == 7) { llmpar_comm *part = NULL; st = llmpar_comm_split(ctx->comm, 0, 0, "layers.1/x", &part); CHECK(!part); }
    else if (out->how == 5) st = llmpar_broadcast(ctx->comm, NULL, &call);
    else st = llmpar_all_reduce(ctx->comm, NULL, &call);
    note(ctx, out, st);
    CHECK_STATUS(llmpar_comm_barrier(ctx->comm, NULL, "later"), LLMPAR_ERR_PEER);
    mirror_get(ctx->comm, NULL, &y, 2400);
    for (int i = 0; i < 2400; i++) CHECK(y.host[i] == 0); /* nothing moved */
    mirror_destroy(ctx->comm, &x);
    mirror_destroy(ctx->comm, &y);
    return st;
}
TEST(mismatch)
{
    COMM_OPEN();
    static const char *const other[] = { "", "f32[49]", "all_reduce max", "\"layers.2/x\"", "f64", "root 1", "rank 2: barrier", "rank 2: split" };
    for (int how = 1; how <= 7; how++) {
        static report out;
        llmpar_error error;
        memset(&out, 0, sizeof out);
        out.how = how;
        CHECK_STATUS(launch(4, disagree, &out, &error), LLMPAR_ERR_MISMATCH);
        for (int r = 0; r < 4; r++) {
            CHECK_INT(out.status[r], LLMPAR_ERR_MISMATCH);
            CHECK_TEXT(out.text[r], "the ranks of world disagree in");
            CHECK_TEXT(out.text[r], "rank 0: ");
            CHECK_TEXT(out.text[r], "rank 2: ");
            CHECK_TEXT(out.text[r], other[how]);
            CHECK_TEXT(out.text[r], "\"layers.1/x\"");
        }
        CHECK_TEXT(error.text, other[how]);
    }
}

static llmpar_status disagree_message(llmpar_ctx *ctx, void *user)
{
    mirror x = mirror_create(ctx->comm, 32, 0);
    memset(x.host, 0, 32);
    mirror_put(ctx->comm, NULL, &x, 32);
    llmpar_collective call = { .send = x.device, .recv = x.device, .count = ctx->rank ? 4u : 5u, .dtype = LLMPAR_F32, .tag = "m", .peer = 1 - ctx->rank };
    llmpar_status st = note(ctx, (report *)user, ctx->rank ? llmpar_recv(ctx->comm, NULL, &call) : llmpar_send(ctx->comm, NULL, &call));
    mirror_destroy(ctx->comm, &x);
    return st;
}
TEST(mismatch_of_a_message)
{
    COMM_OPEN();
    static report out;
    llmpar_error error;
    CHECK_STATUS(launch(2, disagree_message, &out, &error), LLMPAR_ERR_MISMATCH);
    for (int r = 0; r < 2; r++) {
        CHECK_INT(out.status[r], LLMPAR_ERR_MISMATCH);
        CHECK_TEXT(out.text[r], "disagree in count: rank 0: send f32[5] to 1 \"m\" (message 1 on world); rank 1: recv f32[4] from 0 \"m\" (message 1 on world)");
    }
}

/* how 0: rank 3 fails by itself; 1: it returns; 2: it stays away for longer than the deadline; 3: it aborts by hand. The others wait in a collective, or have work in their streams. */
static llmpar_status one_goes(llmpar_ctx *ctx, void *user)
{
    report *out = (report *)user;
    llmpar_device *d = ctx->device;
    llmpar_comm *pair = NULL;
    llmpar_stream *stream = NULL;
    mirror x = mirror_create(ctx->comm, 4000, 0), y = mirror_create(ctx->comm, 4000, 0);
    llmpar_collective call = { .send = x.device, .recv = y.device, .count = 1000, .dtype = LLMPAR_F32, .tag = "step/x" };
    memset(x.host, 0, 4000);
    mirror_put(ctx->comm, NULL, &x, 4000);
    CHECK_OK(d->stream_create(d, "work", &stream));
    llmpar_status st = llmpar_comm_split(ctx->comm, ctx->rank / 2, 0, "pair", &pair);
    if (!st) st = llmpar_all_reduce(ctx->comm, stream, &call);
    if (!st && ctx->rank == 3) {
        if (out->how == 0) st = llmpar_fail(ctx, LLMPAR_ERR_NONFINITE, "the loss is nan");
        if (out->how == 2) test_sleep(5 * test_slow);
        if (out->how == 3) {
            llmpar_error error;
            llmpar_error_clear(&error);
            llmpar_error_set(&error, LLMPAR_ERR_IO, "the disk is full");
            ctx->comm->abort(ctx->comm, &error);
        }
    } else if (!st) {
        st = llmpar_all_reduce(ctx->rank == 0 ? pair : ctx->comm, stream, &call); /* rank 0 waits for rank 1, which waits for rank 3 */
        note(ctx, out, st);
        CHECK_STATUS(llmpar_comm_barrier(ctx->comm, NULL, "later"), LLMPAR_ERR_PEER);
    }
    d->stream_destroy(d, stream);
    mirror_destroy(ctx->comm, &x);
    mirror_destroy(ctx->comm, &y);
    llmpar_comm_destroy(pair);
    return st;
}
TIMED(a_rank_goes)
{
    COMM_OPEN();
    static const llmpar_status want[] = { LLMPAR_ERR_NONFINITE, LLMPAR_ERR_MISMATCH, LLMPAR_ERR_TIMEOUT, LLMPAR_ERR_IO };
    char waited[40];
    const char *const says[] = { "rank 3 failed: non-finite value: the loss is nan", "has returned", waited, "the disk is full" };
    snprintf(waited, sizeof waited, "waited %g s", 2 * test_slow);
    for (int how = 0; how < 4; how++) {
        static report out;
        llmpar_error error;
        llmpar_backend gpu;
        llmpar_launch_desc desc = { .ranks = 5, .threads = 1, .deadline = (how == 2 ? 2 : 30) * test_slow, .backend = &gpu, .log = quiet, .check = test_no_leak };
        double start = test_clock();
        llmpar_cuda_backend(NULL, &gpu);
        memset(&out, 0, sizeof out);
        out.how = how;
        CHECK_STATUS(llmpar_launch(&desc, one_goes, &out, &error), want[how]);
        for (int r = 0; r < 5; r++) {
            if (r == 3) continue;
            CHECK(out.status[r] == LLMPAR_ERR_PEER || out.status[r] == want[how]);
            CHECK_TEXT(out.text[r], says[how]);
            CHECK_TEXT(out.text[r], "\"step/x\"");
        }
        CHECK(test_clock() - start < 15 * test_slow);
    }
}

/* A kernel that cannot be launched on one rank is everybody's failure. */
static int refused_call;
static llmpar_status refused_launch(llmpar_ctx *ctx, void *user)
{
    mirror x = mirror_create(ctx->comm, 4000, 0);
    llmpar_collective call = { .send = x.device, .recv = x.device, .count = 1000, .dtype = LLMPAR_F32, .tag = "broken" };
    llmpar_status st = LLMPAR_OK;
    memset(x.host, 0, 4000);
    mirror_put(ctx->comm, NULL, &x, 4000);
    st = llmpar_comm_barrier(ctx->comm, NULL, "before");
    if (!st && ctx->rank == 0) emulated_cuda_fail_launch(98, refused_call); /* cudaErrorInvalidDeviceFunction, of whichever rank */
    if (!st) st = llmpar_comm_barrier(ctx->comm, NULL, "set");
    if (!st) st = llmpar_all_reduce(ctx->comm, NULL, &call);
    note(ctx, (report *)user, st);
    mirror_destroy(ctx->comm, &x);
    return st;
}
TEST(a_launch_is_refused)
{
    COMM_OPEN();
    if (!cuda_emulated()) TEST_SKIP("failures are made by the emulation");
    for (refused_call = 1; refused_call <= 3; refused_call++) {
        static report out;
        llmpar_error error;
        int own = 0;
        CHECK_STATUS(launch(3, refused_launch, &out, &error), LLMPAR_ERR_INTERNAL);
        CHECK_TEXT(error.text, "all_reduce: device cuda");
        for (int r = 0; r < 3; r++) {
            CHECK(out.status[r] == LLMPAR_ERR_PEER || out.status[r] == LLMPAR_ERR_INTERNAL);
            own += out.status[r] == LLMPAR_ERR_INTERNAL;
        }
        CHECK_INT(own, 1);
    }
    emulated_cuda_fail_launch(0, 0);
}

/* Host memory runs out on rank 1 at every place of a split. */
static llmpar_status poor_split(llmpar_ctx *ctx, void *user)
{
    llmpar_comm *part = NULL;
    if (ctx->rank == 1) ctx->heap.fail_at = ctx->heap.calls + (uint64_t)*(int *)user;
    llmpar_status st = llmpar_comm_split(ctx->comm, ctx->rank % 2, 0, "part", &part);
    if (ctx->rank == 1) ctx->heap.fail_at = 0;
    if (!st) st = llmpar_comm_barrier(ctx->comm, NULL, "after");
    llmpar_comm_destroy(part);
    return st;
}
TEST(split_without_memory)
{
    COMM_OPEN();
    int failed = 0;
    for (int call = 1; call < 60; call++) {
        llmpar_error error;
        llmpar_status st = launch(4, poor_split, &call, &error);
        if (!st) break;
        failed++;
        CHECK_STATUS(st, LLMPAR_ERR_MEMORY);
        CHECK(error.rank == 1 || error.rank == 3); /* whose group it makes */
    }
    CHECK(failed >= 3 && failed < 50);
}

/* Check level 0 compares nothing. */
static llmpar_status other_tags(llmpar_ctx *ctx, void *user)
{
    llmpar_comm *all = NULL;
    (void)user;
    llmpar_status st = llmpar_comm_barrier(ctx->comm, NULL, ctx->rank ? "a" : "b");
    if (!st) st = llmpar_comm_split(ctx->comm, 0, 0, "all", &all);
    if (!st) st = llmpar_comm_barrier(all, NULL, ctx->rank ? "a" : "b");
    llmpar_comm_destroy(all);
    return st;
}
TEST(unchecked)
{
    COMM_OPEN();
    llmpar_backend gpu;
    llmpar_launch_desc desc = { .ranks = 3, .unchecked = 1, .backend = &gpu, .log = quiet, .check = test_no_leak };
    llmpar_cuda_backend(NULL, &gpu);
    CHECK_OK(llmpar_launch(&desc, other_tags, NULL, NULL));
    desc.unchecked = 0;
    CHECK_STATUS(llmpar_launch(&desc, other_tags, NULL, NULL), LLMPAR_ERR_MISMATCH);
}

TEST(nothing_is_left)
{
    if (cuda_emulated()) CHECK_INT(emulated_cuda_live(), 0);
}

TEST_LIST(T_(values), T_(values_lockstep), T_(splits), T_(buffers_are_used_again_at_once), T_(messages), T_(several_gpus), T_(mismatch), T_(mismatch_of_a_message), T_(a_rank_goes), T_(a_launch_is_refused), T_(split_without_memory), T_(unchecked), T_(nothing_is_left))
