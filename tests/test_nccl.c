/* The NCCL communicator on a stand-in for NCCL: every collective against a plain definition, bit for bit, with 1 to 8 rank threads; splits, streams with threads of their own, ways to meet. */
#include "collectives.h"
#include "nccl_rig.h"
#include "ports.h"

#include <unistd.h>

/* Under a sanitizer not every number of ranks. */
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
enum { STEP = 3 }; /* 2 5 8 */
#else
enum { STEP = 1 };
#endif

static void run(int ranks, const llmpar_nccl_desc *desc, llmpar_rank_fn fn, void *user)
{
    llmpar_error error;
    fake_nccl_reset();
    if (rig_launch(ranks, desc, fn, user, &error)) TEST_FAIL("%d ranks: %s", ranks, error.text);
    CHECK_INT(fake_nccl.mismatches, 0);
}

TEST(values)
{
    for (int ranks = STEP > 1 ? 2 : 1; ranks <= 8; ranks += STEP) {
        size_t most = ranks < 5 ? 30000 : STEP > 1 ? 64 : 600;
        run(ranks, NULL, collectives_here, &most);
    }
}
TEST(values_in_parts)
{
    size_t most = 100;
    run(5, NULL, collectives_below, &most);
    if (STEP == 1) run(8, NULL, collectives_below, &most);
}
TEST(values_in_small_slices)
{
    for (int ranks = 2; ranks <= 8; ranks += STEP) {
        size_t most = STEP > 1 ? 64 : 600;
        llmpar_nccl_desc desc = { .slice = 200 };
        run(ranks, &desc, collectives_here, &most);
        desc.slice = 8 * (size_t)ranks; /* an element of each rank */
        most = 10;
        run(ranks, &desc, collectives_here, &most);
    }
}
TEST(splits)
{
    for (int ranks = 1; ranks <= 8; ranks++) run(ranks, NULL, collectives_splits, NULL);
}

/* ---- streams: two of them with threads, two communicators, data that one hands to the other ---- */

static llmpar_status two_streams(llmpar_ctx *ctx, void *user)
{
    enum { N = 600 };
    llmpar_device *device = ctx->device;
    llmpar_comm *pair = NULL;
    llmpar_stream *stream[2] = { NULL, NULL };
    llmpar_event *event = NULL;
    int64_t *x = NULL, *y = NULL, sum = 0;
    int threads = *(int *)user;
    llmpar_status st = llmpar_comm_split(ctx->comm, ctx->rank / 2, 0, "pair", &pair);
    for (int i = 0; i < 2 && !st; i++) st = device->stream_create(device, i ? "gather" : "compute", &stream[i]);
    for (int i = 0; i < 2 && threads && !st; i++) st = llmpar_device_stream_thread(device, stream[i]);
    if (!st) st = device->event_create(device, &event);
    if (!st) st = device->alloc(device, N * 8 * sizeof *x, (void **)&x);
    if (!st) st = device->alloc(device, N * 8 * sizeof *y, (void **)&y);
    for (int i = 0; i < N && !st; i++) x[i] = ctx->rank + 1 + i;
    for (int round = 0; round < 12 && !st; round++) {
        llmpar_collective call = { .send = x, .recv = y, .count = N, .dtype = LLMPAR_I64, .tag = "round" };
        st = llmpar_all_reduce(ctx->comm, stream[0], &call); /* y = sum of all */
        if (!st) st = device->event_record(device, stream[0], event);
        if (!st) st = device->event_wait(device, stream[1], event);
        call.send = call.recv = y;
        call.op = LLMPAR_MAX;
        if (!st && pair) st = llmpar_all_reduce(pair, stream[1], &call); /* the same: the maximum of equals */
        call.op = LLMPAR_SUM;
        call.send = call.recv = y + N;
        if (!st && round % 3 == 0) st = llmpar_all_reduce(ctx->comm, round % 2 ? stream[0] : NULL, &call);
        if (!st) st = device->event_record(device, stream[1], event);
        if (!st) st = device->event_wait(device, stream[0], event);
    }
    for (int i = 0; i < 2; i++) {
        llmpar_status waited = stream[i] ? device->synchronize(device, stream[i]) : LLMPAR_OK;
        if (!st) st = waited;
    }
    for (int r = 0; r < ctx->world; r++) sum += r + 1;
    for (int i = 0; i < N && !st; i++)
        if (y[i] != sum + (int64_t)i * ctx->world) {
            TEST_FAIL("element %d: %lld, want %lld", i, (long long)y[i], (long long)(sum + (int64_t)i * ctx->world));
            break;
        }
    llmpar_comm_destroy(pair);
    device->free(device, x, N * 8 * sizeof *x);
    device->free(device, y, N * 8 * sizeof *y);
    if (event) device->event_destroy(device, event);
    for (int i = 0; i < 2; i++)
        if (stream[i]) device->stream_destroy(device, stream[i]);
    return st;
}
TEST(streams)
{
    for (int threads = 0; threads < 2; threads++)
        for (int ranks = 2; ranks <= 6; ranks += 2) run(ranks, NULL, two_streams, &threads);
}

/* ---- a rank that is thousands of calls ahead holds up nobody: the one it waits for, and calls of others with each other, go through ---- */

static int ahead;
static llmpar_status far_ahead(llmpar_ctx *ctx, void *user)
{
    enum { N = 5000 };
    int from = *(int *)user ? 1 : 0, to = from + 1;
    llmpar_collective call = { .dtype = LLMPAR_I64, .peer = to, .tag = "ahead" }; /* nothing in it: no data holds the sender back */
    llmpar_status st = LLMPAR_OK;
    for (int i = 0; i < N && ctx->rank == from && !st; i++) {
        st = llmpar_send(ctx->comm, NULL, &call);
        if (i == 4090) __atomic_store_n(&ahead, 1, __ATOMIC_SEQ_CST);
    }
    if (ctx->rank == from) return st;
    for (double until = test_clock() + 40; !__atomic_load_n(&ahead, __ATOMIC_SEQ_CST) && test_clock() < until;) test_sleep(0.01);
    test_sleep(*(int *)user == 2 ? 4 : 0.3); /* 4: who is ahead has returned, and is waited for with what it still has to say */
    if (from && (ctx->rank == to || ctx->rank == 0)) { /* one that rank 0 has not heard of */
        call.peer = ctx->rank ? 0 : to;
        st = ctx->rank ? llmpar_send(ctx->comm, NULL, &call) : llmpar_recv(ctx->comm, NULL, &call);
    }
    call.peer = from;
    for (int i = 0; i < N && ctx->rank == to && !st; i++) st = llmpar_recv(ctx->comm, NULL, &call);
    return st;
}
TEST(a_rank_is_far_ahead)
{
    llmpar_nccl_desc desc = { .deadline = 60 };
    for (int how = 0; how < 3; how++) {
        ahead = 0;
        run(3, &desc, far_ahead, &how);
    }
}

/* ---- options ---- */

static llmpar_status sums(llmpar_ctx *ctx, void *user)
{
    enum { N = 1000 };
    static float in[8][8 * N], out[8][N];
    size_t n = (size_t)ctx->world, r = (size_t)ctx->rank;
    llmpar_collective call = { .send = in[r], .recv = out[r], .count = N / 20, .blocks = 20, .dtype = LLMPAR_F32, .tag = "sums" };
    (void)user;
    fill(in[r], LLMPAR_F32, (int)r, 8 * N);
    llmpar_status st = llmpar_reduce_scatter(ctx->comm, NULL, &call);
    for (size_t i = 0; i < N && !st; i++) {
        double want = 0, magnitude = 0;
        for (size_t k = 0; k < n; k++) {
            float x;
            element(&x, LLMPAR_F32, (int)k, (i / 50 * n + r) * 50 + i % 50);
            want += (double)x;
            magnitude += x < 0 ? -(double)x : (double)x;
        }
        CHECK_NEAR(out[r][i], want, magnitude * 1e-6);
    }
    call.count = N;
    call.blocks = 1;
    call.op = LLMPAR_MAX;
    if (r == 1) memcpy(&in[r][7], "\0\0\xc0\x7f", 4); /* a NaN: it wins */
    if (!st) st = llmpar_all_reduce(ctx->comm, NULL, &call);
    CHECK(out[r][7] != out[r][7]);
    return st;
}
TEST(in_the_order_of_nccl)
{
    llmpar_nccl_desc desc = { .fast = 1 };
    run(2, &desc, sums, NULL);
    run(5, &desc, sums, NULL);
}
TEST(values_without_checks)
{
    size_t most = 64;
    llmpar_nccl_desc desc = { .unchecked = 1, .deadline = -1, .silence = -1 };
    run(3, &desc, collectives_here, &most);
    run(3, &desc, collectives_splits, NULL);
}

static llmpar_status blocks_of_memory(llmpar_ctx *ctx, void *user)
{
    const llmpar_nccl_desc *desc = (const llmpar_nccl_desc *)user;
    void *block[80];
    llmpar_device *device = ctx->device;
    llmpar_status st = LLMPAR_OK;
    int before = __atomic_load_n(&fake_nccl.blocks, __ATOMIC_SEQ_CST);
    for (int i = 0; i < 80 && !st; i++) {
        st = device->alloc(device, i % 2 ? (size_t)1 << 20 : 4096, &block[i]);
        if (!st) memset(block[i], i, i % 2 ? (size_t)1 << 20 : 4096);
    }
    CHECK_INT(__atomic_load_n(&fake_nccl.blocks, __ATOMIC_SEQ_CST) - before, desc->own_memory || fake_nccl.kind == FAKE_NCCL_NO_MEMORY ? 0 : 40);
    for (int i = 0; i < 80 && !st; i++) device->free(device, block[i * 37 % 80], i * 37 % 80 % 2 ? (size_t)1 << 20 : 4096);
    CHECK_INT(__atomic_load_n(&fake_nccl.blocks, __ATOMIC_SEQ_CST), before);
    return st;
}
/* Blocks that are older than the communicator, and that outlive it. */
static void *kept;
static llmpar_status older_and_younger(const llmpar_nccl_desc *desc, llmpar_ctx *ctx, llmpar_device *device, llmpar_comm **out)
{
    void *old = NULL, *again = NULL;
    size_t bytes = (size_t)3 << 20;
    llmpar_comm *comm = NULL;
    llmpar_status st = device->alloc(device, bytes, &old);
    if (!st) st = llmpar_nccl_comm_create(ctx, device, desc, &comm);
    if (!st) st = device->alloc(device, bytes, &kept);
    device->free(device, old, bytes);
    llmpar_comm_destroy(comm);
    CHECK(device->memory_state != NULL);
    if (!st) st = device->alloc(device, bytes, &again);
    device->free(device, again, bytes);
    if (!st) device->free(device, kept, bytes);
    CHECK(device->memory_state == NULL);
    return st ? st : llmpar_nccl_comm_create(ctx, device, desc, out);
}
TEST(memory)
{
    llmpar_nccl_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.slice = 65536;
    run(1, &desc, blocks_of_memory, &desc);
    desc.own_memory = 1;
    run(1, &desc, blocks_of_memory, &desc);
    desc.own_memory = 0;
    fake_nccl_reset();
    fake_nccl.kind = FAKE_NCCL_NO_MEMORY;
    fake_nccl.rank = -1;
    CHECK_OK(rig_launch(1, &desc, blocks_of_memory, &desc, NULL));
    rig_comm = older_and_younger;
    run(1, &desc, blocks_of_memory, &desc);
    rig_comm = NULL;
}

/* ---- where ranks meet ---- */

static const char *meeting;
static int through_ctx; /* ctx->meeting; else the desc */
static llmpar_status meets(const llmpar_nccl_desc *desc, llmpar_ctx *ctx, llmpar_device *device, llmpar_comm **out)
{
    llmpar_comm *host = ctx->host_comm;
    ctx->host_comm = NULL;
    if (through_ctx) ctx->meeting = meeting;
    if (ctx->rank == 0) test_sleep(0.1);
    llmpar_status st = llmpar_nccl_comm_create(ctx, device, desc, out);
    ctx->host_comm = host;
    ctx->meeting = NULL;
    return st;
}
static llmpar_status barrier(llmpar_ctx *ctx, void *user)
{
    (void)user;
    return llmpar_comm_barrier(ctx->comm, NULL, "here");
}
TEST(by_address)
{
    static const char *const hosts[] = { "127.0.0.1", "localhost", "[::1]" };
    rig_comm = meets;
    for (int h = 0; h < 3; h++)
        for (through_ctx = 0; through_ctx < 2; through_ctx++) {
            char address[80];
            int fd, port = port_listen(0, &fd), six = socket(AF_INET6, SOCK_STREAM, 0);
            struct sockaddr_in6 a;
            memset(&a, 0, sizeof a);
            a.sin6_family = AF_INET6;
            a.sin6_addr = in6addr_loopback;
            int has_six = six >= 0 && !bind(six, (struct sockaddr *)&a, sizeof a);
            close(six);
            if (h == 2 && !has_six) {
                close(fd);
                continue;
            }
            if (h < 2 && !through_ctx) snprintf(address, sizeof address, "%s:%d", hosts[h], port); /* taken by somebody who says nothing: the next one */
            else snprintf(address, sizeof address, "%s:%d", hosts[h], port + 20);
            meeting = address;
            llmpar_nccl_desc desc = { .address = through_ctx ? NULL : address };
            run(3, &desc, barrier, NULL);
            close(fd);
        }
    rig_comm = NULL;
}
TEST(by_file)
{
    char directory[] = "/tmp/llmpar_nccl_XXXXXX", path[100];
    CHECK(mkdtemp(directory) != NULL);
    snprintf(path, sizeof path, "%s/meeting", directory);
    rig_comm = meets;
    static const char *const stale[] = { NULL, "", "llmpar", "llmpar 1234 99999 127.0.0.1\n", "llmpar 1234 1 127.0.0.1\n", "llmpar zz", "\xff\xff\xff\n", "llmpar 1 22 " };
    for (int i = 0; i < (int)(sizeof stale / sizeof stale[0]); i++) { /* of an earlier job, or of anybody */
        FILE *f = stale[i] ? fopen(path, "w") : NULL;
        if (f) {
            fputs(stale[i], f);
            fclose(f);
        }
        llmpar_nccl_desc desc = { .file = path };
        run(3, &desc, barrier, NULL);
        CHECK(access(path, F_OK) != 0);
    }
    rig_comm = NULL;
    CHECK(rmdir(directory) == 0);
}
TEST(nowhere_to_meet)
{
    static const struct { const char *address, *text; llmpar_status status; } want[] = {
        { NULL, "2 ranks have no place to meet", LLMPAR_ERR_CONFIG }, { "nowhere", "\"nowhere\" is not an address", LLMPAR_ERR_CONFIG }, { "host:", "is not an address", LLMPAR_ERR_CONFIG }, { ":1", "is not an address", LLMPAR_ERR_CONFIG },
        { "host:0", "is not an address", LLMPAR_ERR_CONFIG }, { "host:70000", "is not an address", LLMPAR_ERR_CONFIG }, { "host:1x", "is not an address", LLMPAR_ERR_CONFIG }, { "[::1:4", "is not an address", LLMPAR_ERR_CONFIG },
    };
    rig_comm = meets;
    through_ctx = 0;
    for (int i = 0; i < (int)(sizeof want / sizeof want[0]); i++) {
        llmpar_error error;
        llmpar_nccl_desc desc = { .address = want[i].address, .deadline = 1 };
        fake_nccl_reset();
        CHECK_STATUS(rig_launch(2, &desc, barrier, NULL, &error), want[i].status);
        CHECK_TEXT(error.text, want[i].text);
    }
    llmpar_error error;
    llmpar_nccl_desc desc = { .file = "/nonexistent/folder/file", .deadline = 1 };
    CHECK_STATUS(rig_launch(1, &desc, barrier, NULL, &error), LLMPAR_OK);
    CHECK(rig_launch(2, &desc, barrier, NULL, &error) != LLMPAR_OK);
    desc.file = ""; /* would be looked for until the deadline */
    desc.deadline = 0;
    CHECK_STATUS(rig_launch(2, &desc, barrier, NULL, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "nccl: file = \"\", expected a path");
    rig_comm = NULL;
}

static llmpar_status finishes(llmpar_ctx *ctx, void *user)
{
    llmpar_error root;
    int fails = *(int *)user;
    llmpar_status st = barrier(ctx, NULL);
    if (fails && ctx->rank == 1) {
        llmpar_error error;
        llmpar_error_clear(&error);
        llmpar_error_set(&error, LLMPAR_ERR_IO, "the disk is full");
        ctx->comm->abort(ctx->comm, &error);
    }
    llmpar_nccl_comm_finish(ctx->comm, &root);
    CHECK_STATUS(root.status, fails ? LLMPAR_ERR_IO : LLMPAR_OK);
    if (fails) CHECK_TEXT(root.text, "the disk is full");
    if (fails) CHECK_INT(root.rank, 1);
    return fails && st == LLMPAR_ERR_PEER ? LLMPAR_OK : st; /* who was still in the barrier hears of it there */
}
TEST(the_end)
{
    for (int fails = 0; fails < 2; fails++) run(4, NULL, finishes, &fails);
}

TEST_LIST(T_(values), T_(values_in_parts), T_(values_in_small_slices), T_(splits), T_(streams), T_(a_rank_is_far_ahead), T_(in_the_order_of_nccl), T_(values_without_checks), T_(memory), T_(by_address), T_(by_file), T_(nowhere_to_meet), T_(the_end))
