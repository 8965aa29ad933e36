/* Ranks whose streams have threads: collectives from several threads of a rank, one communicator on two streams, failures that reach threads which wait, and threads that cannot go on. */
#include "stream_rig.h"

#include <unistd.h>

typedef struct ranks_job { gate a, b, c; int what; int32_t lockstep; llmpar_status status[8]; char text[8][400]; } ranks_job;

typedef struct rank_streams { llmpar_comm *pair[2]; llmpar_stream *stream[2]; } rank_streams;
static llmpar_status streams_begin(llmpar_ctx *ctx, rank_streams *s)
{
    memset(s, 0, sizeof *s);
    llmpar_status st = LLMPAR_OK;
    for (int i = 0; i < 2 && !st; i++) {
        st = llmpar_comm_split(ctx->comm, 0, i ? -ctx->rank : ctx->rank, i ? "backward" : "forward", &s->pair[i]);
        if (!st) st = ctx->device->stream_create(ctx->device, i ? "reduce" : "gather", &s->stream[i]);
        if (!st) st = llmpar_device_stream_thread(ctx->device, s->stream[i]);
    }
    return st;
}
static llmpar_status streams_end(llmpar_ctx *ctx, rank_streams *s, llmpar_status st)
{
    for (int i = 0; i < 2; i++)
        if (s->stream[i]) {
            llmpar_status waited = ctx->device->synchronize(ctx->device, s->stream[i]);
            if (!st) st = waited;
        }
    for (int i = 0; i < 2; i++) {
        if (s->stream[i]) ctx->device->stream_destroy(ctx->device, s->stream[i]);
        llmpar_comm_destroy(s->pair[i]);
    }
    return st;
}

/* Both communicators, each on its thread, at the same time: the contents of every collective. */
static llmpar_status rank_collectives(llmpar_ctx *ctx, void *user)
{
    enum { N = 3000, ALL = 8 };
    ranks_job *job = (ranks_job *)user;
    rank_streams s;
    int32_t n = ctx->world;
    int64_t *x = (int64_t *)calloc((size_t)(4 + 4 * ALL) * N, sizeof *x), *mine[2], *whole[2];
    llmpar_status st = streams_begin(ctx, &s);
    for (int i = 0; i < 2; i++) {
        mine[i] = x + i * N;
        whole[i] = x + (4 + i * 2 * ALL) * N;
    }
    for (int round = 0; round < ROUNDS && !st; round++) {
        size_t count = round % 3 ? N : 10;
        for (int i = 0; i < 2 && !st; i++) {
            llmpar_comm *comm = s.pair[i];
            llmpar_collective call;
            for (size_t k = 0; k < count; k++) mine[i][k] = (int64_t)k * (comm->rank + 1) + round + i;
            memset(&call, 0, sizeof call);
            call.send = mine[i];
            call.recv = whole[i];
            call.count = count;
            call.dtype = LLMPAR_I64;
            call.tag = i ? "backward" : "forward";
            st = llmpar_all_gather(comm, s.stream[i], &call);
            call.send = whole[i];
            call.recv = mine[i];
            if (!st) st = llmpar_reduce_scatter(comm, s.stream[i], &call);
            call.send = call.recv = mine[i];
            if (!st) st = llmpar_all_reduce(comm, s.stream[i], &call);
            if (!st) st = llmpar_comm_barrier(comm, s.stream[i], "round");
        }
        for (int i = 0; i < 2 && !st; i++) {
            st = ctx->device->synchronize(ctx->device, s.stream[i]);
            for (size_t k = 0; k < count && !st; k++) {
                int64_t sum = 0; /* all ranks' parts of all ranks' gathered copies, which are equal */
                for (int64_t r = 1; r <= n; r++) sum += (int64_t)k * r + round + i;
                if (mine[i][k] == sum * n) continue;
                TEST_FAIL("round %d, communicator %d, element %d: got %lld, want %lld", round, i, (int)k, (long long)mine[i][k], (long long)(sum * n));
                st = LLMPAR_ERR_MISMATCH;
            }
        }
    }
    st = streams_end(ctx, &s, st);
    free(x);
    (void)job;
    return st;
}

/* The call on the first communicator can end only when that on the second has, which every rank issues later: so both are under way at once, on one rank's two threads. */
static llmpar_status rank_both_wait(llmpar_ctx *ctx, void *user)
{
    ranks_job *job = (ranks_job *)user;
    rank_streams s;
    llmpar_status st = streams_begin(ctx, &s);
    if (!st && ctx->rank == 1) st = put_gate(ctx->device, s.stream[0], NULL, &job->a, 1);
    if (!st) st = llmpar_comm_barrier(s.pair[0], s.stream[0], "first");
    if (!st) st = llmpar_comm_barrier(s.pair[1], s.stream[1], "second");
    if (!st && ctx->rank == 0) st = put_gate(ctx->device, s.stream[1], &job->a, NULL, 0);
    return streams_end(ctx, &s, st);
}

/* One communicator on two streams: the calls come in the order in which they were made, on every rank, whatever holds the first stream up. */
static llmpar_status rank_one_communicator(llmpar_ctx *ctx, void *user)
{
    rank_streams s;
    int64_t x[2] = {0, 0};
    (void)user;
    llmpar_status st = streams_begin(ctx, &s);
    for (int round = 0; round < ROUNDS && !st; round++) {
        llmpar_collective call;
        memset(&call, 0, sizeof call);
        call.count = 1;
        call.dtype = LLMPAR_I64;
        for (int i = 0; i < 2 && !st; i++) {
            int first = (round + i) % 2;
            x[first] = round + 1;
            call.send = call.recv = &x[first];
            call.tag = first ? "a" : "b";
            st = llmpar_all_reduce(ctx->comm, s.stream[first], &call);
        }
        for (int i = 0; i < 2 && !st; i++) st = ctx->device->synchronize(ctx->device, s.stream[i]);
        for (int i = 0; i < 2 && !st; i++) CHECK_INT(x[i], (round + 1) * ctx->world);
    }
    return streams_end(ctx, &s, st);
}

/* One rank fails while the threads of the others wait on both communicators. */
static llmpar_status rank_fails(llmpar_ctx *ctx, void *user)
{
    ranks_job *job = (ranks_job *)user;
    rank_streams s;
    llmpar_status st = streams_begin(ctx, &s);
    if (!st && ctx->rank == 1) {
        gate_wait(&job->a, ctx->world - 1);
        st = llmpar_fail(ctx, LLMPAR_ERR_FORMAT, "a file is not what it should be");
        return streams_end(ctx, &s, st);
    }
    if (!st) st = put_gate(ctx->device, s.stream[0], &job->a, NULL, 0);
    for (int i = 0; i < 2 && !st; i++) st = llmpar_comm_barrier(s.pair[i], s.stream[i], "for ever");
    st = streams_end(ctx, &s, st);
    job->status[ctx->rank] = st;
    snprintf(job->text[ctx->rank], sizeof job->text[0], "%.390s", ctx->error.text);
    return st;
}

/* The failure of a thread is the job's: the file that it could not write, not what the others say of it. */
static llmpar_status run_rank_fail(void *arg) { return llmpar_fail(*(llmpar_ctx **)arg, LLMPAR_ERR_IO, "no space for activations"); }
static llmpar_status rank_thread_fails(llmpar_ctx *ctx, void *user)
{
    rank_streams s;
    (void)user;
    llmpar_status st = streams_begin(ctx, &s);
    if (!st && ctx->rank == 1) st = ctx->device->host_call(ctx->device, s.stream[0], run_rank_fail, &ctx, sizeof ctx);
    if (!st && ctx->rank != 1) st = llmpar_comm_barrier(s.pair[1], s.stream[1], "with everybody");
    return streams_end(ctx, &s, st);
}

/* Crossed: nobody can go on. Rank 0's own thread waits in its device, the others' too, and nobody tells. */
static llmpar_status rank_crossed(llmpar_ctx *ctx, void *user)
{
    ranks_job *job = (ranks_job *)user;
    rank_streams s;
    llmpar_status st = streams_begin(ctx, &s);
    if (!st) st = llmpar_comm_barrier(s.pair[ctx->rank == 0], s.stream[0], ctx->rank == 0 ? "this" : "that");
    st = streams_end(ctx, &s, st);
    job->status[ctx->rank] = st;
    return st;
}

/* Crossed too, and everybody waits; but the own thread of rank 0 is awake, and will make the call that the others wait for. */
static llmpar_status rank_slow(llmpar_ctx *ctx, void *user)
{
    ranks_job *job = (ranks_job *)user;
    rank_streams s;
    int late = ctx->rank == 0;
    llmpar_status st = streams_begin(ctx, &s);
    if (!st && !late) st = put_gate(ctx->device, s.stream[1], &job->a, NULL, 0);
    if (!st) st = llmpar_comm_barrier(s.pair[!late], s.stream[!late], late ? "one" : "two");
    if (!st && late) {
        gate_wait(&job->a, ctx->world - 1);
        sleep(3); /* the others look twice meanwhile */
    }
    if (!st && !late) st = ctx->device->synchronize(ctx->device, s.stream[1]);
    if (!st) st = llmpar_comm_barrier(s.pair[late], s.stream[late], late ? "two" : "one");
    return streams_end(ctx, &s, st);
}

static void with_ranks(int32_t ranks, llmpar_rank_fn fn, ranks_job *job, llmpar_error *error)
{
    llmpar_launch_desc desc;
    gate_init(&job->a);
    memset(&desc, 0, sizeof desc);
    memset(job->status, 0, sizeof job->status);
    desc.ranks = ranks;
    desc.lockstep = job->lockstep;
    desc.deadline = PATIENCE;
    desc.log = NULL;
    llmpar_launch(&desc, fn, job, error);
    gate_destroy(&job->a);
}

static ranks_job ranks;
static llmpar_error failure;
static void succeeds(int32_t n, llmpar_rank_fn fn)
{
    memset(&ranks, 0, sizeof ranks);
    with_ranks(n, fn, &ranks, &failure);
    if (failure.status) TEST_FAIL("%d ranks: rank %d: %s", (int)n, (int)failure.rank, failure.text);
}
static void fails(int32_t n, llmpar_rank_fn fn, int32_t lockstep, llmpar_status status, const char *text)
{
    memset(&ranks, 0, sizeof ranks);
    ranks.lockstep = lockstep;
    with_ranks(n, fn, &ranks, &failure);
    CHECK_STATUS(failure.status, status);
    CHECK_TEXT(failure.text, text);
}

TEST(collectives_from_two_threads_of_a_rank)
{
    for (int32_t n = 2; n <= 4; n++) succeeds(n, rank_collectives);
    for (int32_t n = 2; n <= 4; n += 2) succeeds(n, rank_both_wait);
}
TEST(one_communicator_on_two_streams) { for (int32_t n = 2; n <= 4; n++) succeeds(n, rank_one_communicator); }

TEST(a_rank_fails_while_threads_wait)
{
    for (int32_t n = 2; n <= 4; n++) {
        fails(n, rank_fails, 0, LLMPAR_ERR_FORMAT, "not what it should be");
        CHECK_INT(failure.rank, 1);
        for (int32_t i = 0; i < n; i++)
            if (i != 1) {
                CHECK_STATUS(ranks.status[i], LLMPAR_ERR_PEER);
                CHECK_TEXT(ranks.text[i], "rank 1");
            }
        fails(n, rank_thread_fails, 0, LLMPAR_ERR_IO, "no space for activations");
        CHECK_INT(failure.rank, 1);
    }
}

TEST(threads_that_cannot_go_on)
{
    fails(2, rank_crossed, 0, LLMPAR_ERR_MISMATCH, "nobody can go on");
    CHECK_STATUS(ranks.status[0], LLMPAR_ERR_MISMATCH);
    CHECK_STATUS(ranks.status[1], LLMPAR_ERR_MISMATCH);
    succeeds(3, rank_slow);
}

TEST(lockstep_refuses) { fails(2, rank_one_communicator, 1, LLMPAR_ERR_UNSUPPORTED, "lockstep runs one thread at a time"); }

TEST_LIST(T_(collectives_from_two_threads_of_a_rank), T_(one_communicator_on_two_streams), T_(a_rank_fails_while_threads_wait), T_(threads_that_cannot_go_on), T_(lockstep_refuses))
