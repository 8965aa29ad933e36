/* The threads communicator: every collective against a plain reference, bit for bit; then every way in which one can fail. */
#include "collectives.h"
#include "timed.h"

#include <pthread.h>
#include <time.h>

/* ---- what every test needs ---- */

/* What a rank has to say is looked at in its error. */
static void quiet(void *user, int rank, llmpar_log_level level, const char *line) { (void)user; (void)rank; (void)level; (void)line; }

static llmpar_status launch(int ranks, llmpar_rank_fn fn, void *user, llmpar_error *error)
{
    llmpar_launch_desc desc = { .ranks = ranks, .log = quiet, .check = test_no_leak };
    return llmpar_launch(&desc, fn, user, error);
}

/* ---- values ---- */

static size_t most = 20011; /* elements */

TEST(values)
{
    for (int ranks = 1; ranks <= 8; ranks++) CHECK_OK(launch(ranks, collectives_here, &most, NULL));
}

TEST(values_lockstep)
{
    llmpar_launch_desc desc = { .ranks = 3, .lockstep = 1, .check = test_no_leak };
    CHECK_OK(llmpar_launch(&desc, collectives_here, &most, NULL));
}

static llmpar_status counters(llmpar_ctx *ctx, void *user)
{
    float x[4] = { 1, 2, 3, 4 }, y[16];
    llmpar_collective call = { .send = x, .recv = y, .count = 4, .dtype = LLMPAR_F32, .root = 2 };
    llmpar_comm *comm = ctx->comm;
    uint64_t sequence = comm->sequence, bytes = comm->bytes_sent;
    (void)user;
    CHECK_OK(llmpar_all_gather(comm, NULL, &call));
    CHECK_INT(comm->bytes_sent - bytes, 3 * 16);
    bytes = comm->bytes_sent;
    CHECK_OK(llmpar_all_reduce(comm, NULL, &call));
    CHECK_INT(comm->bytes_sent - bytes, 24);
    bytes = comm->bytes_sent;
    CHECK_OK(llmpar_broadcast(comm, NULL, &call));
    CHECK_INT(comm->bytes_sent - bytes, ctx->rank == 2 ? 48 : 0);
    bytes = comm->bytes_sent;
    CHECK_OK(llmpar_comm_barrier(comm, NULL, "b"));
    CHECK_INT(comm->bytes_sent - bytes, 0);
    CHECK_INT(comm->sequence - sequence, 4);
    return LLMPAR_OK;
}
TEST(counts_bytes) { CHECK_OK(launch(4, counters, NULL, NULL)); }

/* ---- split ---- */

TEST(split) { for (int n = 1; n <= 7; n++) CHECK_OK(launch(n, collectives_splits, NULL, NULL)); }

static llmpar_status split_out_of_memory(llmpar_ctx *ctx, void *user)
{
    llmpar_comm *comm = NULL, *other = NULL;
    if (ctx->rank == 1) ctx->heap.fail_at = ctx->heap.calls + (uint64_t)*(int *)user;
    llmpar_status st = llmpar_comm_split(ctx->comm, ctx->rank / 2, 0, "pair", &comm);
    if (!st) st = llmpar_comm_split(ctx->comm, 0, -ctx->rank, "all", &other);
    llmpar_comm_destroy(other);
    llmpar_comm_destroy(comm);
    return st;
}
TEST(split_without_memory)
{
    int failed = 0;
    for (int k = 1; k < 12; k++) {
        llmpar_error error;
        llmpar_status st = launch(3, split_out_of_memory, &k, &error);
        if (!st) { CHECK(failed >= 4); return; }
        failed++;
        CHECK_INT(st, LLMPAR_ERR_MEMORY);
        CHECK_INT(error.rank, 1);
        CHECK_TEXT(error.text, "out of memory");
    }
    CHECK(!"memory never sufficed");
}

/* ---- errors ---- */

typedef struct report { llmpar_status status[8]; char text[8][1600]; double seconds[8]; } report;

static void note(llmpar_ctx *ctx, report *out, llmpar_status st, double start)
{
    out->status[ctx->rank] = st;
    out->seconds[ctx->rank] = test_clock() - start;
    snprintf(out->text[ctx->rank], sizeof out->text[0], "%s", llmpar_last_error(ctx));
}

static llmpar_status disagree(llmpar_ctx *ctx, void *user)
{
    report *out = (report *)user;
    int odd = ctx->rank == 2, how = (int)out->seconds[7];
    float x[600] = { 0 }, y[600] = { 0 };
    llmpar_collective call = { .send = x, .recv = y, .count = how > 9 ? 550u : 50u, .dtype = LLMPAR_F32, .tag = "layers.1/x" };
    llmpar_status st;
    if (odd && how % 10 == 1) call.count = 49;
    if (odd && how % 10 == 2) call.op = LLMPAR_MAX;
    if (odd && how % 10 == 3) call.tag = "layers.2/x";
    if (odd && how % 10 == 4) call.dtype = LLMPAR_F64, call.count /= 2;
    if (odd && how % 10 == 5) call.root = 1;
    if (odd && how % 10 == 6) st = llmpar_comm_barrier(ctx->comm, NULL, "layers.1/x");
    else if (how % 10 == 5) st = llmpar_broadcast(ctx->comm, NULL, &call);
    else st = llmpar_all_reduce(ctx->comm, NULL, &call);
    for (int i = 0; i < 600; i++) CHECK(y[i] == 0); /* nothing moved */
    note(ctx, out, st, test_clock());
    return st;
}
TEST(mismatch)
{
    static const char *const other[] = { "", "f32[49]", "all_reduce max", "\"layers.2/x\"", "f64", "root 1", "rank 2: barrier" };
    for (int size = 0; size < 2; size++)
        for (int how = 1; how <= 6; how++) {
            static report out;
            llmpar_error error;
            memset(&out, 0, sizeof out);
            out.seconds[7] = how + 10 * size;
            CHECK_STATUS(launch(4, disagree, &out, &error), LLMPAR_ERR_MISMATCH);
            for (int r = 0; r < 4; r++) {
                CHECK_INT(out.status[r], LLMPAR_ERR_MISMATCH);
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
    float x[8] = { 1 };
    llmpar_collective call = { .send = x, .recv = x, .count = ctx->rank ? 4u : 5u, .dtype = LLMPAR_F32, .tag = "m", .peer = 1 - ctx->rank };
    llmpar_status st = ctx->rank ? llmpar_recv(ctx->comm, NULL, &call) : llmpar_send(ctx->comm, NULL, &call);
    note(ctx, (report *)user, st, test_clock());
    return st;
}
TEST(mismatch_of_a_message)
{
    static report out;
    llmpar_error error;
    CHECK_STATUS(launch(2, disagree_message, &out, &error), LLMPAR_ERR_MISMATCH);
    for (int r = 0; r < 2; r++) {
        CHECK_INT(out.status[r], LLMPAR_ERR_MISMATCH);
        CHECK_TEXT(out.text[r], "disagree in count: rank 0: send f32[5] to 1 \"m\" (message 1 on world); rank 1: recv f32[4] from 0 \"m\" (message 1 on world)");
    }
}

static llmpar_status peer_fails(llmpar_ctx *ctx, void *user)
{
    report *out = (report *)user;
    float x[4] = { 0 }, y[4];
    llmpar_collective call = { .send = x, .recv = y, .count = 4, .dtype = LLMPAR_F32, .tag = "step/x" };
    llmpar_comm *pair = NULL;
    llmpar_status st = llmpar_comm_split(ctx->comm, ctx->rank / 2, 0, "pair", &pair);
    if (!st) st = llmpar_all_reduce(ctx->comm, NULL, &call);
    if (!st && ctx->rank == 3) {
        test_sleep(0.05 * test_slow); /* the others wait by now */
        llmpar_comm_destroy(pair);
        out->seconds[7] = test_clock();
        return llmpar_fail(ctx, LLMPAR_ERR_NONFINITE, "the loss is nan");
    }
    if (!st && ctx->rank == 0) test_sleep(0.15 * test_slow); /* comes to its next collective only afterwards, and on another communicator */
    if (!st) st = llmpar_all_reduce(ctx->rank == 0 ? pair : ctx->comm, NULL, &call);
    note(ctx, out, st, out->seconds[7]);
    CHECK_STATUS(llmpar_comm_barrier(ctx->comm, NULL, "later"), LLMPAR_ERR_PEER);
    llmpar_comm_destroy(pair);
    return st;
}
TIMED(peer_failure_wakes_everybody)
{
    static report out;
    llmpar_error error;
    CHECK_STATUS(launch(5, peer_fails, &out, &error), LLMPAR_ERR_NONFINITE);
    CHECK_INT(error.rank, 3);
    CHECK_TEXT(error.text, "the loss is nan");
    for (int r = 0; r < 5; r++) {
        if (r == 3) continue;
        CHECK_INT(out.status[r], LLMPAR_ERR_PEER);
        CHECK_TEXT(out.text[r], "rank 3 failed: non-finite value: the loss is nan");
        CHECK_TEXT(out.text[r], r == 0 ? "all_reduce sum f32[4] \"step/x\" (call 1 on pair)" : "all_reduce sum f32[4] \"step/x\" (call 4 on world)");
        CHECK_TEXT(out.text[r], "3: outside, last completed all_reduce sum f32[4] \"step/x\" (call 3 on world)");
        CHECK(out.seconds[r] < 2 * test_slow);
    }
}

static llmpar_status returns_early(llmpar_ctx *ctx, void *user)
{
    float x = 1, y;
    llmpar_collective call = { .send = &x, .recv = &y, .count = 1, .dtype = LLMPAR_F32, .tag = "step/x", .peer = 1 };
    if (ctx->rank == 1) {
        test_sleep(*(double *)user);
        return LLMPAR_OK;
    }
    if (ctx->rank == 2) return llmpar_recv(ctx->comm, NULL, &call);
    return llmpar_all_reduce(ctx->comm, NULL, &call);
}
TIMED(a_rank_that_returns_while_others_wait)
{
    for (int late = 0; late < 2; late++)
        for (int lockstep = 0; lockstep < 2; lockstep++) {
            llmpar_error error;
            double delay = 0.05 * late * test_slow, start = test_clock();
            llmpar_launch_desc desc = { .ranks = 3, .lockstep = lockstep, .deadline = 5 * test_slow, .log = quiet, .check = test_no_leak }; /* the deadline ends a test that fails */
            CHECK_STATUS(llmpar_launch(&desc, returns_early, &delay, &error), LLMPAR_ERR_MISMATCH);
            CHECK_TEXT(error.text, "rank 1 has returned without it");
            CHECK_TEXT(error.text, "step/x");
            CHECK(test_clock() - start < 2 * test_slow);
        }
}

static llmpar_status late(llmpar_ctx *ctx, void *user)
{
    (void)user;
    llmpar_status st = llmpar_comm_barrier(ctx->comm, NULL, "first");
    if (ctx->rank == 1) test_sleep(1.6 * test_slow);
    if (!st) st = llmpar_comm_barrier(ctx->comm, NULL, "second");
    return st;
}
TIMED(deadline)
{
    llmpar_error error;
    char waited[40];
    snprintf(waited, sizeof waited, "waited %g s", 0.4 * test_slow);
    llmpar_launch_desc desc = { .ranks = 3, .deadline = 0.4 * test_slow, .log = quiet, .check = test_no_leak };
    double start = test_clock();
    CHECK_STATUS(llmpar_launch(&desc, late, NULL, &error), LLMPAR_ERR_TIMEOUT);
    CHECK(test_clock() - start < 10 * test_slow);
    CHECK_TEXT(error.text, "barrier \"second\"");
    CHECK_TEXT(error.text, waited);
    CHECK_TEXT(error.text, "rank 1: outside");
    CHECK_TEXT(error.text, "ranks 0 2: in barrier \"second\" (call 3 on world), last completed barrier \"first\" (call 2 on world)");
    desc.deadline = 20 * test_slow;
    CHECK_OK(llmpar_launch(&desc, late, NULL, &error));
}

static llmpar_status crossed(llmpar_ctx *ctx, void *user)
{
    (void)user;
    llmpar_comm *other = NULL;
    llmpar_status st = llmpar_comm_split(ctx->comm, 0, 0, "other", &other);
    if (!st) st = llmpar_comm_barrier(ctx->rank ? other : ctx->comm, NULL, "one"); /* two communicators in different orders */
    if (!st) st = llmpar_comm_barrier(ctx->rank ? ctx->comm : other, NULL, "two");
    llmpar_comm_destroy(other);
    return st;
}
TEST(lockstep_finds_a_deadlock)
{
    llmpar_error error;
    llmpar_launch_desc desc = { .ranks = 2, .lockstep = 1, .log = quiet, .check = test_no_leak };
    CHECK_STATUS(llmpar_launch(&desc, crossed, NULL, &error), LLMPAR_ERR_MISMATCH);
    CHECK_TEXT(error.text, "nobody can go on");
    CHECK_TEXT(error.text, "on other");
    CHECK_TEXT(error.text, "on world");
}

static int running;
static llmpar_status alone(llmpar_ctx *ctx, void *user)
{
    (void)user;
    llmpar_status st = LLMPAR_OK;
    for (int i = 0; i < 20 && !st; i++) {
        CHECK_INT(running, 0); /* no atomics: ThreadSanitizer sees whether one rank at a time runs */
        running = 1;
        if (ctx->rank == i % 3) test_sleep(0.001);
        running = 0;
        st = llmpar_comm_barrier(ctx->comm, NULL, "turn");
    }
    return st;
}
TEST(lockstep_runs_one_rank_at_a_time)
{
    llmpar_launch_desc desc = { .ranks = 4, .lockstep = 1, .check = test_no_leak };
    CHECK_OK(llmpar_launch(&desc, alone, NULL, NULL));
}

static llmpar_status aborts(llmpar_ctx *ctx, void *user)
{
    (void)user;
    if (ctx->rank == 1) {
        llmpar_error error;
        llmpar_error_clear(&error);
        llmpar_error_set(&error, LLMPAR_ERR_IO, "the disk is full");
        ctx->comm->abort(ctx->comm, &error);
    }
    llmpar_status st = llmpar_comm_barrier(ctx->comm, NULL, "b");
    CHECK_INT(st, LLMPAR_ERR_PEER);
    return st;
}
TEST(abort_by_hand)
{
    llmpar_error error;
    CHECK_STATUS(launch(3, aborts, NULL, &error), LLMPAR_ERR_IO);
    CHECK_INT(error.rank, 1);
    CHECK_TEXT(error.text, "the disk is full");
}

/* Ranks fail at random moments, and whoever gets an error frees its buffers at once: nobody may still be reading them. (The sanitizers look.) */
static llmpar_status storm(llmpar_ctx *ctx, void *user)
{
    uint64_t seed = *(uint64_t *)user;
    llmpar_comm *half = NULL;
    llmpar_status st = llmpar_comm_split(ctx->comm, ctx->rank % 2, 0, "half", &half);
    int victim = (int)(mix(seed) % (uint64_t)ctx->world), when = (int)(mix(seed + 1) % 12);
    for (int i = 0; i < 12 && !st; i++) {
        size_t count = mix(seed + 2 + (uint64_t)i) % 5000;
        if (ctx->rank == victim && i == when) {
            st = llmpar_fail(ctx, LLMPAR_ERR_NONFINITE, "victim");
            break;
        }
        float *x = (float *)malloc((count + 1) * sizeof *x), *y = (float *)malloc((count + 1) * sizeof *y);
        for (size_t e = 0; e < count; e++) x[e] = (float)ctx->rank;
        llmpar_collective call = { .send = x, .recv = y, .count = count, .dtype = LLMPAR_F32, .tag = "storm" };
        st = llmpar_all_reduce(mix(seed + 100 + (uint64_t)i) & 1 ? half : ctx->comm, NULL, &call);
        memset(x, 0xff, (count + 1) * sizeof *x);
        free(x);
        free(y);
    }
    llmpar_comm_destroy(half);
    return st;
}
TEST(random_failures)
{
    for (uint64_t i = 0; i < 120; i++) {
        llmpar_error error;
        uint64_t seed = i * 1000;
        CHECK_STATUS(launch(2 + (int)(i % 5), storm, &seed, &error), LLMPAR_ERR_NONFINITE);
        CHECK_TEXT(error.text, "victim");
    }
}

/* ---- what the wrappers refuse ---- */

#define REFUSED(call_expression, want, part) do { CHECK_STATUS(call_expression, want); CHECK_TEXT(ctx->error.text, part); llmpar_error_clear(&ctx->error); } while (0)
static llmpar_status refusals(llmpar_ctx *ctx, void *user)
{
    (void)user;
    float x[64] = { 0 }, y[64];
    llmpar_comm *comm = ctx->comm;
    const llmpar_collective good = { .send = x, .recv = y, .count = 8, .dtype = LLMPAR_F32, .tag = "t" };
    llmpar_collective c = good;
    c.dtype = LLMPAR_DTYPE_DEFAULT;
    REFUSED(llmpar_all_gather(comm, NULL, &c), LLMPAR_ERR_ARGUMENT, "dtype 0");
    c = good; c.dtype = LLMPAR_BF16;
    REFUSED(llmpar_all_reduce(comm, NULL, &c), LLMPAR_ERR_UNSUPPORTED, "no sum of bf16");
    c = good; c.dtype = LLMPAR_U64; c.op = LLMPAR_MAX;
    REFUSED(llmpar_reduce_scatter(comm, NULL, &c), LLMPAR_ERR_UNSUPPORTED, "no max of u64");
    c = good; c.op = (llmpar_reduce_op)5;
    REFUSED(llmpar_all_reduce(comm, NULL, &c), LLMPAR_ERR_UNSUPPORTED, "no such operation");
    c = good; c.send = NULL;
    REFUSED(llmpar_all_reduce(comm, NULL, &c), LLMPAR_ERR_ARGUMENT, "send is NULL");
    c = good; c.recv = NULL;
    REFUSED(llmpar_all_to_all(comm, NULL, &c), LLMPAR_ERR_ARGUMENT, "recv is NULL");
    c = good; c.root = 2;
    REFUSED(llmpar_broadcast(comm, NULL, &c), LLMPAR_ERR_ARGUMENT, "root 2, expected 0 to 1");
    c = good; c.peer = ctx->rank;
    REFUSED(llmpar_send(comm, NULL, &c), LLMPAR_ERR_ARGUMENT, "expected another rank");
    c = good; c.peer = -1;
    REFUSED(llmpar_recv(comm, NULL, &c), LLMPAR_ERR_ARGUMENT, "peer -1");
    c = good; c.count = SIZE_MAX / 4;
    REFUSED(llmpar_all_gather(comm, NULL, &c), LLMPAR_ERR_OVERFLOW, "overflow");
    c = good; c.recv = x + 4;
    REFUSED(llmpar_all_reduce(comm, NULL, &c), LLMPAR_ERR_ARGUMENT, "overlap");
    c = good; c.recv = x; c.send = x + (ctx->rank ? 0 : 8);
    REFUSED(llmpar_all_gather(comm, NULL, &c), LLMPAR_ERR_ARGUMENT, "overlap");
    c = good; c.recv = x;
    REFUSED(llmpar_all_to_all(comm, NULL, &c), LLMPAR_ERR_ARGUMENT, "overlap");
    llmpar_comm broken = *comm;
    broken.abi = 77;
    REFUSED(llmpar_all_reduce(&broken, NULL, &good), LLMPAR_ERR_ABI, "abi 77");
    broken = *comm;
    broken.size = (uint32_t)offsetof(llmpar_comm, all_to_all);
    REFUSED(llmpar_all_to_all(&broken, NULL, &good), LLMPAR_ERR_ABI, "expected abi 1");
    broken = *comm;
    broken.all_gather = NULL;
    REFUSED(llmpar_all_gather(&broken, NULL, &good), LLMPAR_ERR_UNSUPPORTED, "no such collective");
    return llmpar_all_reduce(comm, NULL, &good); /* and all of that has done no harm */
}
TEST(wrappers_refuse) { CHECK_OK(launch(2, refusals, NULL, NULL)); }

/* ---- a device that runs late: everything waits for synchronize ---- */

typedef struct late_call { llmpar_status (*fn)(void *); uint64_t arg[32]; } late_call;
typedef struct late_device { llmpar_device table; llmpar_device *real; late_call queue[64]; int queued; llmpar_status stuck; } late_device;

static llmpar_status late_host_call(llmpar_device *device, llmpar_stream *stream, llmpar_status (*fn)(void *), const void *arg, size_t bytes)
{
    late_device *self = (late_device *)(void *)device;
    (void)stream;
    if (self->stuck) return self->stuck;
    late_call *call = &self->queue[self->queued++];
    call->fn = fn;
    memcpy(call->arg, arg, bytes);
    return LLMPAR_OK;
}
static llmpar_status late_synchronize(llmpar_device *device, llmpar_stream *stream)
{
    late_device *self = (late_device *)(void *)device;
    (void)stream;
    for (int i = 0; i < self->queued && !self->stuck; i++) self->stuck = self->queue[i].fn(self->queue[i].arg);
    self->queued = 0;
    return self->stuck;
}

static llmpar_status on_a_late_device(llmpar_ctx *ctx, void *user)
{
    static late_device devices[3];
    late_device *late = &devices[ctx->rank];
    memset(late, 0, sizeof *late);
    late->table = *ctx->device; /* operations with stream NULL go to the CPU, at once */
    late->table.host_call = late_host_call;
    late->table.synchronize = late_synchronize;
    llmpar_device *before = ctx->comm->device;
    ctx->comm->device = &late->table;
    char tag[32];
    double x[4] = { 1, 2, 3, 4 }, y[4] = { 0 }, z[12] = { 0 };
    llmpar_collective sum = { .send = x, .recv = y, .count = 4, .dtype = LLMPAR_F64, .tag = tag }, gather = { .send = y, .recv = z, .count = 4, .dtype = LLMPAR_F64, .tag = tag };
    snprintf(tag, sizeof tag, "first");
    CHECK_OK(llmpar_all_reduce(ctx->comm, NULL, &sum));
    snprintf(tag, sizeof tag, "second");
    CHECK_OK(llmpar_all_gather(ctx->comm, NULL, &gather));
    snprintf(tag, sizeof tag, "rank %d", (int)ctx->rank); /* borrowed only until the call returns: this must not matter */
    CHECK_NEAR(y[0], 0, 0);
    CHECK_OK(late_synchronize(&late->table, NULL));
    CHECK_NEAR(y[3], 12, 0);
    CHECK_NEAR(z[8], 3, 0);
    llmpar_status st = LLMPAR_OK;
    if (user) { /* a failure sticks and returns from the wait and the next call */
        if (ctx->rank == 2) st = llmpar_fail(ctx, LLMPAR_ERR_NONFINITE, "boom");
        else {
            CHECK_OK(llmpar_all_reduce(ctx->comm, NULL, &sum));
            CHECK_STATUS(late_synchronize(&late->table, NULL), LLMPAR_ERR_PEER);
            CHECK_STATUS(llmpar_all_reduce(ctx->comm, NULL, &sum), LLMPAR_ERR_PEER);
            st = LLMPAR_ERR_PEER;
        }
    }
    ctx->comm->device = before;
    return st;
}
TEST(collectives_on_a_late_device)
{
    CHECK_OK(launch(3, on_a_late_device, NULL, NULL));
    CHECK_STATUS(launch(3, on_a_late_device, "fail", NULL), LLMPAR_ERR_NONFINITE);
}

/* ---- a device whose arithmetic fails in the middle ---- */

static llmpar_status bad_sum(llmpar_device *device, llmpar_stream *stream, const llmpar_tree_sum_args *args)
{
    (void)stream;
    (void)args;
    return llmpar_error_set(device->error, LLMPAR_ERR_INTERNAL, "no sums today");
}
static llmpar_status with_a_bad_device(llmpar_ctx *ctx, void *user)
{
    (void)user;
    llmpar_device bad = *ctx->device;
    if (ctx->rank == 1) {
        bad.tree_sum = bad_sum;
        bad.tree_sum_to = NULL;
    }
    llmpar_device *before = ctx->comm->device;
    ctx->comm->device = &bad;
    float *x = (float *)calloc(3000, sizeof *x);
    llmpar_collective call = { .send = x, .recv = x, .count = 3000, .dtype = LLMPAR_F32, .tag = "t" };
    llmpar_status st = llmpar_all_reduce(ctx->comm, NULL, &call);
    if (!st) st = llmpar_all_reduce(ctx->comm, NULL, &call);
    CHECK_INT(st, ctx->rank == 1 ? LLMPAR_ERR_INTERNAL : LLMPAR_ERR_PEER);
    free(x);
    ctx->comm->device = before;
    return st;
}
TEST(device_failure)
{
    llmpar_error error;
    CHECK_STATUS(launch(3, with_a_bad_device, NULL, &error), LLMPAR_ERR_INTERNAL);
    CHECK_INT(error.rank, 1);
    CHECK_TEXT(error.text, "no sums today");
}

/* Many ranks, few processors, many calls: nobody is forgotten asleep. */
static llmpar_status crowd(llmpar_ctx *ctx, void *user)
{
    llmpar_status st = LLMPAR_OK;
    (void)user;
    for (int64_t i = 0; i < 150 && !st; i++) {
        int64_t x = ctx->rank + i, y = -1;
        llmpar_collective call = { .send = &x, .recv = &y, .count = 1, .dtype = LLMPAR_I64, .tag = "crowd" };
        st = llmpar_all_reduce(ctx->comm, NULL, &call);
        CHECK_INT(y, 24 * 23 / 2 + 24 * i);
    }
    return st;
}
TEST(many_ranks) { CHECK_OK(launch(24, crowd, NULL, NULL)); }

/* A slot made of another slot of its table, called without its wrapper and with arguments of its own. */
static llmpar_status sum_of_all(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call)
{
    int64_t all[8] = { 0 }, sum = 0;
    llmpar_collective gather = { .send = call->send, .recv = all, .count = 1, .dtype = LLMPAR_I64 };
    llmpar_status st = comm->all_gather(comm, stream, &gather);
    for (int r = 0; r < comm->ranks; r++) sum += all[r];
    memcpy(call->recv, &sum, sizeof sum);
    return st;
}
static llmpar_status slot_of_slots(llmpar_ctx *ctx, void *user)
{
    int64_t x = 10 + ctx->rank, y = 0;
    (void)user;
    llmpar_collective call = { .send = &x, .recv = &y, .count = 1, .dtype = LLMPAR_I64, .tag = "slots" };
    ctx->comm->all_reduce = sum_of_all;
    llmpar_status st = llmpar_all_reduce(ctx->comm, NULL, &call);
    CHECK_INT(y, 10 * 5 + 10);
    y = 0;
    if (!st) st = ctx->comm->all_reduce(ctx->comm, NULL, &call); /* no wrapper anywhere */
    CHECK_INT(y, 10 * 5 + 10);
    return st;
}
TEST(a_slot_calls_another) { CHECK_OK(launch(5, slot_of_slots, NULL, NULL)); }

/* ---- for who writes a communicator ---- */

/* Every rank's way up, acted out: each gets its part of the sum, with the bits of the tree, from whom the others think. */
TEST(halving)
{
    enum { MOST = 19 };
    static float value[MOST][MOST], next[MOST][MOST]; /* [rank][part] */
    static int held[MOST][MOST];
    llmpar_heap heap;
    llmpar_heap_init(&heap, NULL);
    for (int n = 1; n <= MOST; n++) {
        llmpar_halving h[MOST];
        int deepest = 0;
        for (int r = 0; r < n; r++) {
            CHECK(llmpar_halving_make(&heap, n, r, &h[r]));
            if (h[r].levels > deepest) deepest = h[r].levels;
            for (int j = 0; j < n; j++) {
                element(&value[r][j], LLMPAR_F32, r, (size_t)j);
                held[r][j] = 1;
            }
        }
        for (int up = deepest; up-- > 0;) { /* the levels of all ranks are counted from the root */
            for (int r = 0; r < n; r++) {
                if (h[r].levels <= up) continue;
                int l = h[r].levels - 1 - up, keeps = 0, gives = 0;
                const llmpar_halving_level *level = &h[r].level[l];
                for (int j = 0; j < n; j++) {
                    int c = h[r].label[l * n + j];
                    if (!held[r][j]) continue;
                    if (c != level->mine) {
                        gives++;
                        continue;
                    }
                    int p = level->partner, theirs = h[p].levels - 1 - up;
                    CHECK(p != r && held[p][j] && h[p].level[theirs].lo == level->lo && h[p].level[theirs].left != level->left);
                    CHECK_INT(h[p].level[theirs].lo + h[p].label[theirs * n + j], r); /* and gives it to this one */
                    next[r][j] = level->left ? value[r][j] + value[p][j] : value[p][j] + value[r][j];
                    keeps++;
                }
                CHECK(keeps <= h[r].most_kept && gives <= h[r].most_given);
            }
            for (int r = 0; r < n; r++)
                for (int j = 0; j < n && h[r].levels > up; j++) {
                    int l = h[r].levels - 1 - up;
                    held[r][j] = held[r][j] && h[r].label[l * n + j] == h[r].level[l].mine;
                    value[r][j] = next[r][j];
                }
        }
        for (int r = 0; r < n; r++) {
            float want;
            reduced(&want, LLMPAR_F32, LLMPAR_SUM, 0, n, (size_t)r);
            CHECK_BYTES(&value[r][r], &want, sizeof want);
            for (int j = 0; j < n; j++) CHECK_INT(held[r][j], j == r);
            llmpar_halving_free(&heap, &h[r]);
        }
    }
    llmpar_halving none;
    heap.fail_at = heap.calls + 1;
    CHECK(!llmpar_halving_make(&heap, 4, 1, &none) && !none.level);
    llmpar_halving_free(&heap, &none);
    CHECK_INT(heap.live, 0);
}

static int32_t last_op;
static const char *last_tag;
static llmpar_status every_collective(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call, int32_t op)
{
    CHECK(!stream && comm->rank == 1);
    last_op = op;
    last_tag = call->tag;
    return op == LLMPAR_CALL_SEND ? LLMPAR_ERR_IO : LLMPAR_OK;
}
TEST(slots_that_are_one_function)
{
    int64_t x[2] = { 0, 0 }, y[2];
    llmpar_error error;
    llmpar_comm comm = { .abi = LLMPAR_COMM_ABI, .size = sizeof comm, .rank = 1, .ranks = 2, .axis = "one", .error = &error };
    llmpar_collective call = { .send = x, .recv = y, .count = 1, .dtype = LLMPAR_I64, .tag = "here" };
    llmpar_error_clear(&error);
    llmpar_comm_fill(&comm, every_collective);
    static const struct { llmpar_status (*call)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call); llmpar_call_op op; llmpar_status status; } calls[] = {
        { llmpar_all_gather, LLMPAR_CALL_ALL_GATHER, LLMPAR_OK }, { llmpar_reduce_scatter, LLMPAR_CALL_REDUCE_SCATTER, LLMPAR_OK }, { llmpar_all_reduce, LLMPAR_CALL_ALL_REDUCE, LLMPAR_OK },
        { llmpar_broadcast, LLMPAR_CALL_BROADCAST, LLMPAR_OK }, { llmpar_all_to_all, LLMPAR_CALL_ALL_TO_ALL, LLMPAR_OK }, { llmpar_send, LLMPAR_CALL_SEND, LLMPAR_ERR_IO }, { llmpar_recv, LLMPAR_CALL_RECV, LLMPAR_OK },
    };
    for (size_t i = 0; i < sizeof calls / sizeof calls[0]; i++) {
        last_tag = "";
        CHECK_STATUS(calls[i].call(&comm, NULL, &call), calls[i].status);
        CHECK_INT(last_op, calls[i].op);
        CHECK_TEXT(last_tag, "here");
    }
    CHECK_OK(llmpar_comm_barrier(&comm, NULL, "all"));
    CHECK_INT(last_op, LLMPAR_CALL_BARRIER);
    CHECK_TEXT(last_tag, "all");
}

TEST_LIST(T_(a_slot_calls_another), T_(halving), T_(slots_that_are_one_function), T_(values), T_(values_lockstep), T_(counts_bytes), T_(split), T_(split_without_memory), T_(mismatch), T_(mismatch_of_a_message), T_(peer_failure_wakes_everybody),
          T_(a_rank_that_returns_while_others_wait), T_(deadline), T_(lockstep_finds_a_deadlock), T_(lockstep_runs_one_rank_at_a_time), T_(abort_by_hand), T_(random_failures), T_(wrappers_refuse),
          T_(collectives_on_a_late_device), T_(device_failure), T_(many_ranks))
