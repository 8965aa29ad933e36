/* The MPI communicator, under mpirun with any number of processes: the ways in which ranks can fail or disagree that leave all processes alive (test_mpi_fault.c has the others). */
#include "mpi_launch.h"
#include "timed.h"

/* ---- without memory ---- */

static llmpar_status split_out_of_memory(llmpar_ctx *ctx, void *user)
{
    llmpar_comm *comm = NULL, *other = NULL;
    if (ctx->rank == ctx->world - 1) ctx->heap.fail_at = ctx->heap.calls + (uint64_t)*(int *)user;
    llmpar_status st = llmpar_comm_split(ctx->comm, ctx->rank / 2, 0, "pair", &comm);
    if (!st) st = llmpar_comm_split(ctx->comm, 0, -ctx->rank, "all", &other);
    if (!st) st = llmpar_comm_barrier(other, NULL, "end");
    llmpar_comm_destroy(other);
    llmpar_comm_destroy(comm);
    return st;
}
TEST(split_without_memory)
{
    int failed = 0;
    for (int k = 1; k < 40; k++) {
        llmpar_error error;
        llmpar_status st = launch(split_out_of_memory, &k, &error);
        if (!st) { CHECK(failed >= 6); return; }
        failed++;
        CHECK_INT(st, LLMPAR_ERR_MEMORY);
        CHECK_INT(error.rank, test_world - 1);
        CHECK_TEXT(error.text, "out of memory");
        check_alike(&error);
    }
    CHECK(!"memory never sufficed");
}

/* Set-up, too, fails on all ranks alike. */
typedef struct failing { int64_t live, calls, fail_at; } failing;
static void *failing_alloc(void *user, size_t bytes)
{
    failing *f = (failing *)user;
    if (f->fail_at && ++f->calls >= f->fail_at) return NULL;
    void *memory = malloc(bytes);
    if (memory) f->live += (int64_t)bytes;
    return memory;
}
static void failing_free(void *user, void *memory, size_t bytes)
{
    ((failing *)user)->live -= (int64_t)bytes;
    free(memory);
}
TEST(set_up_without_memory)
{
    for (int k = 1; k < 60; k += 2) {
        failing f = { 0, 0, test_rank == test_world - 1 ? k : 0 };
        llmpar_allocator allocator = { failing_alloc, failing_free, &f };
        llmpar_launch_desc desc = { .transport = LLMPAR_TRANSPORT_MPI, .allocator = &allocator, .log = keep_line };
        llmpar_error error;
        llmpar_status st = llmpar_launch(&desc, nothing, NULL, &error);
        CHECK_INT(f.live, 0);
        if (!st) { CHECK(k > 10); return; }
        CHECK_INT(st, LLMPAR_ERR_MEMORY);
        CHECK_INT(error.rank, test_world - 1);
        check_alike(&error);
    }
    CHECK(!"memory never sufficed");
}

/* ---- errors ---- */

/* What one rank (the last) does otherwise, and what all then say. */
typedef struct deviation { const char *name, *field; } deviation;
static const deviation deviations[] = {
    {"none", ""}, {"op", "op"}, {"dtype", "dtype"}, {"count", "count"}, {"root", "root"}, {"reduce op", "reduce op"}, {"tag", "tag"}, {"blocks", "blocks"}, {"order", "tag"}, {"axis", "axis"}, {"missing", "tag"},
    {"extra", "tag"},
};
enum { DEVIATIONS = sizeof deviations / sizeof deviations[0] };
typedef struct mutation { int how, size; llmpar_status status; char text[1700]; } mutation;

static llmpar_status mutated(llmpar_ctx *ctx, void *user)
{
    mutation *m = (mutation *)user;
    int odd = ctx->rank == ctx->world - 1;
    size_t count = m->size ? 3000 : 20, room = 3 * count * (size_t)ctx->world;
    double *x = (double *)calloc(room, sizeof *x), *y = (double *)calloc(room, sizeof *y);
    for (size_t i = 0; i < room; i++) x[i] = 1;
    llmpar_collective call = { .send = x, .recv = y, .count = count, .dtype = LLMPAR_F64, .tag = "layers.1/x" };
    llmpar_comm *other = NULL, *comm = ctx->comm;
    llmpar_status st = llmpar_comm_split(ctx->comm, 0, 0, "other", &other);
    int broadcasts = m->how == 4;
    if (odd && m->how == 2) call.dtype = LLMPAR_I64;
    if (odd && m->how == 3) call.count--;
    if (odd && m->how == 4) call.root = 1;
    if (odd && m->how == 5) call.op = LLMPAR_MAX;
    if (odd && m->how == 6) call.tag = "layers.2/x";
    if (odd && m->how == 7) call.blocks = 2;
    if (odd && m->how == 8) call.tag = "layers.2/x"; /* the next one first */
    if (odd && m->how == 9) comm = other;
    if (odd && m->how == 10) call.tag = "layers.2/x"; /* the first one left out */
    if (odd && m->how == 11 && !st) call.tag = "extra"; /* before the first one */
    if (!st) st = broadcasts ? llmpar_broadcast(comm, NULL, &call) : odd && m->how == 1 ? llmpar_all_gather(comm, NULL, &call) : llmpar_all_reduce(comm, NULL, &call);
    m->status = st;
    snprintf(m->text, sizeof m->text, "%s", llmpar_last_error(ctx));
    size_t touched = 0;
    for (size_t i = 0; i < room; i++) touched += y[i] != 0;
    if (m->how) CHECK_INT(touched, 0);
    free(x);
    free(y);
    llmpar_comm_destroy(other);
    return st;
}
static void mismatch_by(const llmpar_mpi_desc *mpi)
{
    for (int size = 0; size < 2; size++)
        for (int how = 0; how < DEVIATIONS; how++) {
            mutation m = { how, size, LLMPAR_OK, "" };
            llmpar_error error;
            llmpar_status st = launch_with(mpi, 60, mutated, &m, &error);
            if (!how) { CHECK_OK(st); continue; }
            check_alike(&error);
            CHECK_INT(st, LLMPAR_ERR_MISMATCH);
            char side[32];
            snprintf(side, sizeof side, "rank %d: ", test_world - 1);
            int apart = how == 9; /* who waits in one communicator names itself and whom it met from the other; who is still in the call before hears of it; in rounds not all meet */
            int heard = m.status == LLMPAR_ERR_PEER && apart && (mpi || test_rank < test_world - 1);
            if (!heard) CHECK_INT(m.status, LLMPAR_ERR_MISMATCH);
            int sides = test_sum(m.status == LLMPAR_ERR_MISMATCH);
            if (!mpi) CHECK(sides >= 2);
            if ((!apart && !strstr(m.text, "rank 0: ")) || !strstr(m.text, side) || !strstr(m.text, "\"layers.1/x\"") || !strstr(m.text, deviations[how].field))
                TEST_FAIL("%s: \"%s\" lacks a side or \"%s\"", deviations[how].name, m.text, deviations[how].field);
            if (test_sum(test_failures)) return;
        }
}
TEST(mismatch)
{
    if (test_world < 2) return;
    mismatch_by(NULL);
}
TEST(mismatch_in_rounds)
{
    llmpar_mpi_desc mpi = { .direct = 1 };
    if (test_world < 2) return;
    mismatch_by(&mpi);
}

static llmpar_status disagree_message(llmpar_ctx *ctx, void *user)
{
    float x[8] = { 1, 1, 1, 1, 1, 1, 1, 1 }, y[8] = { 0 };
    (void)user;
    if (ctx->rank > 1) return llmpar_comm_barrier(ctx->comm, NULL, "aside");
    llmpar_collective call = { .send = x, .recv = y, .count = ctx->rank ? 4u : 5u, .dtype = LLMPAR_F32, .tag = "m", .peer = 1 - ctx->rank };
    llmpar_status st = ctx->rank ? llmpar_recv(ctx->comm, NULL, &call) : llmpar_send(ctx->comm, NULL, &call);
    CHECK_INT(st, LLMPAR_ERR_MISMATCH);
    CHECK_TEXT(llmpar_last_error(ctx), "send f32[5]");
    CHECK_TEXT(llmpar_last_error(ctx), "recv f32[4]");
    CHECK(y[0] == 0);
    return st;
}
TEST(mismatch_of_a_message)
{
    llmpar_error error;
    if (test_world < 2) return;
    CHECK_STATUS(launch(disagree_message, NULL, &error), LLMPAR_ERR_MISMATCH);
    check_alike(&error);
}

static llmpar_status peer_fails(llmpar_ctx *ctx, void *user)
{
    size_t count = *(size_t *)user;
    float *x = (float *)calloc(count, sizeof *x), *y = (float *)calloc(count, sizeof *y);
    llmpar_collective call = { .send = x, .recv = y, .count = count, .dtype = LLMPAR_F32, .tag = "step/x" };
    llmpar_comm *pair = NULL;
    llmpar_status st = llmpar_comm_split(ctx->comm, ctx->rank / 2, 0, "pair", &pair);
    if (!st) st = llmpar_all_reduce(ctx->comm, NULL, &call);
    if (!st && ctx->rank == ctx->world - 1) {
        test_sleep(0.05 * test_slow); /* the others wait by now */
        st = llmpar_fail(ctx, LLMPAR_ERR_NONFINITE, "the loss is nan");
    } else {
        if (!st && ctx->rank == 0) test_sleep(0.15 * test_slow); /* comes to its next collective only afterwards, and on another communicator */
        double start = test_clock();
        if (!st) st = llmpar_all_reduce(ctx->rank == 0 && ctx->world > 2 ? pair : ctx->comm, NULL, &call);
        CHECK_INT(st, LLMPAR_ERR_PEER);
        CHECK(test_clock() - start < 10 * test_slow);
        CHECK_TEXT(llmpar_last_error(ctx), "non-finite value: the loss is nan");
        CHECK_TEXT(llmpar_last_error(ctx), "all_reduce sum f32");
        CHECK_TEXT(llmpar_last_error(ctx), "last completed all_reduce");
        CHECK_STATUS(llmpar_comm_barrier(ctx->comm, NULL, "later"), LLMPAR_ERR_PEER);
    }
    llmpar_comm_destroy(pair);
    free(x);
    free(y);
    return st;
}
TIMED(peer_failure_wakes_everybody)
{
    if (test_world < 2) return;
    for (int i = 0; i < 2; i++) {
        llmpar_error error;
        size_t count = i ? 300000 : 4;
        CHECK_STATUS(launch(peer_fails, &count, &error), LLMPAR_ERR_NONFINITE);
        CHECK_INT(error.rank, test_world - 1);
        check_alike(&error);
        if (test_rank < test_world - 1) CHECK_TEXT(logged, "the loss is nan");
    }
}

/* A rank that makes an error of its own of another one's failure does not become the root of it. */
static llmpar_status renames_the_failure(llmpar_ctx *ctx, void *user)
{
    (void)user;
    if (ctx->rank == ctx->world - 1) return llmpar_fail(ctx, LLMPAR_ERR_IO, "the disk is full");
    CHECK_STATUS(llmpar_comm_barrier(ctx->comm, NULL, "later"), LLMPAR_ERR_PEER);
    return LLMPAR_ERR_INTERNAL;
}
TEST(a_renamed_failure_keeps_its_root)
{
    llmpar_error error;
    if (test_world < 2) return;
    CHECK_STATUS(launch(renames_the_failure, NULL, &error), LLMPAR_ERR_IO);
    CHECK_INT(error.rank, test_world - 1);
    CHECK_TEXT(error.text, "the disk is full");
    check_alike(&error);
}

static llmpar_status returns_early(llmpar_ctx *ctx, void *user)
{
    float x = 1, y;
    llmpar_collective call = { .send = &x, .recv = &y, .count = 1, .dtype = LLMPAR_F32, .tag = "step/x" };
    if (ctx->rank == ctx->world - 1) {
        test_sleep(*(double *)user);
        return LLMPAR_OK;
    }
    return llmpar_all_reduce(ctx->comm, NULL, &call);
}
TIMED(a_rank_that_returns_while_others_wait)
{
    if (test_world < 2) return;
    for (int late = 0; late < 2; late++) {
        llmpar_error error;
        double delay = 0.05 * late * test_slow, start = test_clock();
        CHECK_STATUS(launch(returns_early, &delay, &error), LLMPAR_ERR_MISMATCH);
        CHECK_TEXT(error.text, "has returned without it");
        CHECK_TEXT(error.text, "step/x");
        CHECK(test_clock() - start < 20 * test_slow);
        check_alike(&error);
    }
}

TIMED(deadline)
{
    llmpar_error error;
    char waited[40];
    if (test_world < 2) return;
    double delay = 5 * test_slow;
    snprintf(waited, sizeof waited, "waited %g s", 2.5 * test_slow);
    CHECK_STATUS(launch_with(NULL, 2.5 * test_slow, late, &delay, &error), LLMPAR_ERR_TIMEOUT);
    CHECK_TEXT(error.text, "barrier \"second\"");
    CHECK_TEXT(error.text, waited);
    CHECK_TEXT(error.text, "last completed barrier \"first\"");
    check_alike(&error);
    delay = 0.5;
    CHECK_OK(launch_with(NULL, 60 * test_slow, late, &delay, &error));
}

static llmpar_status aborts(llmpar_ctx *ctx, void *user)
{
    (void)user;
    if (ctx->rank == ctx->world - 1) {
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
    if (test_world < 2) return;
    CHECK_STATUS(launch(aborts, NULL, &error), LLMPAR_ERR_IO);
    CHECK_INT(error.rank, test_world - 1);
    CHECK_TEXT(error.text, "the disk is full");
    check_alike(&error);
}

/* Ranks fail at random moments in the middle of large exchanges, and whoever gets an error frees its buffers at once. */
static llmpar_status bad_sum(llmpar_device *device, llmpar_stream *stream, const llmpar_tree_sum_args *args)
{
    (void)stream;
    (void)args;
    return llmpar_error_set(device->error, LLMPAR_ERR_INTERNAL, "no sums today");
}
static llmpar_status storm(llmpar_ctx *ctx, void *user)
{
    uint64_t seed = *(uint64_t *)user;
    llmpar_comm *half = NULL;
    llmpar_device bad = *ctx->device, *before = ctx->comm->device;
    llmpar_status st = llmpar_comm_split(ctx->comm, ctx->rank % 2, 0, "half", &half);
    int victim = (int)(mix(seed) % (uint64_t)ctx->world), when = (int)(mix(seed + 1) % 12), inside = (int)(mix(seed + 2) & 1);
    bad.tree_sum = bad_sum;
    for (int i = 0; i < 12 && !st; i++) {
        size_t count = mix(seed + 3 + (uint64_t)i) % 60000 + 1000;
        if (ctx->rank == victim && i == when && inside) ctx->comm->device = half->device = &bad;
        if (ctx->rank == victim && i == when && !inside) {
            st = llmpar_fail(ctx, LLMPAR_ERR_INTERNAL, "victim");
            break;
        }
        float *x = (float *)malloc((count + 1) * sizeof *x), *y = (float *)malloc((count + 1) * sizeof *y);
        for (size_t e = 0; e < count; e++) x[e] = (float)ctx->rank;
        llmpar_collective call = { .send = x, .recv = y, .count = count, .dtype = LLMPAR_F32, .tag = "storm" };
        st = llmpar_all_reduce(mix(seed + 100 + (uint64_t)i) & 1 && ctx->world > 3 ? half : ctx->comm, NULL, &call);
        memset(x, 0xff, (count + 1) * sizeof *x);
        free(x);
        free(y);
    }
    ctx->comm->device = before;
    if (half) half->device = before;
    llmpar_comm_destroy(half);
    return st;
}
TEST(random_failures)
{
    if (test_world < 2) return;
    for (uint64_t i = 0; i < 12; i++) {
        llmpar_error error;
        uint64_t seed = i * 1000 + (uint64_t)test_world;
        CHECK_STATUS(launch(storm, &seed, &error), LLMPAR_ERR_INTERNAL);
        check_alike(&error);
    }
}

/* A rank that fails after the ranks have met, and then is busy: the large messages for it are taken off its peers' hands, who may free their buffers. */
static llmpar_status fails_after_the_meeting(llmpar_ctx *ctx, void *user)
{
    size_t count = (size_t)1 << 20, ranks = (size_t)ctx->world;
    float *x = (float *)malloc(ranks * count * sizeof *x), *y = (float *)malloc(count * sizeof *y);
    (void)user;
    memset(x, 0, ranks * count * sizeof *x);
    llmpar_collective call = { .send = x, .recv = y, .count = count, .dtype = LLMPAR_F32, .tag = "rs" };
    if (ctx->rank == 1) ctx->heap.fail_at = ctx->heap.calls + 1; /* the scratch */
    llmpar_status st = llmpar_reduce_scatter(ctx->comm, NULL, &call);
    CHECK_STATUS(st, ctx->rank == 1 ? LLMPAR_ERR_MEMORY : LLMPAR_ERR_PEER);
    memset(x, 255, ranks * count * sizeof *x);
    free(x);
    free(y);
    ctx->heap.fail_at = 0;
    if (ctx->rank == 1) test_sleep(1.5);
    CHECK_STATUS(llmpar_comm_barrier(ctx->comm, NULL, "later"), LLMPAR_ERR_PEER);
    return st;
}
TEST(a_rank_without_scratch)
{
    if (test_world < 2) return;
    llmpar_error error;
    CHECK_STATUS(launch(fails_after_the_meeting, NULL, &error), LLMPAR_ERR_MEMORY);
    CHECK_INT(error.rank, 1);
    check_alike(&error);
}

/* Two ranks disagree; others that have a communicator of their own hear of it within seconds, and the two get no further. */
static llmpar_status two_disagree(llmpar_ctx *ctx, void *user)
{
    llmpar_comm *pair = NULL;
    (void)user;
    llmpar_status st = llmpar_comm_split(ctx->comm, ctx->rank / 2, 0, "pair", &pair);
    if (st) return st;
    if (ctx->rank < 2) {
        st = llmpar_comm_barrier(pair, NULL, ctx->rank ? "a" : "b");
        CHECK_STATUS(st, LLMPAR_ERR_MISMATCH);
        CHECK_STATUS(llmpar_comm_barrier(pair, NULL, "again"), LLMPAR_ERR_PEER);
    } else {
        while (!(st = llmpar_comm_barrier(pair, NULL, "loop"))) { }
        CHECK_STATUS(st, LLMPAR_ERR_PEER);
    }
    llmpar_comm_destroy(pair);
    return st;
}
TEST(a_mismatch_ends_the_others)
{
    if (test_world < 4 || test_world % 2) return;
    llmpar_error error;
    CHECK_STATUS(launch(two_disagree, NULL, &error), LLMPAR_ERR_MISMATCH);
}

TEST_LIST(T_(split_without_memory), T_(set_up_without_memory), T_(mismatch), T_(mismatch_in_rounds), T_(mismatch_of_a_message), T_(peer_failure_wakes_everybody),
          T_(a_renamed_failure_keeps_its_root), T_(a_rank_that_returns_while_others_wait), T_(deadline), T_(abort_by_hand), T_(random_failures), T_(a_rank_without_scratch),
          T_(a_mismatch_ends_the_others))
