/* backend: what llmpar_launch makes of one: its device and communicator on every rank, in order and back again; what it refuses; which of its accelerators a rank takes; ranks by the environment. */
#define _GNU_SOURCE 1
#include "debug_device.h"
#include "test.h"

#include <sys/wait.h>
#include <unistd.h>

/* Counts what is made and destroyed; the device is the debug device over ctx->host. */
typedef struct rig {
    int32_t devices, comms;     /* there now, of all ranks */
    int32_t most;
    int32_t fail_device, fail_comm; /* rank + 1 whose step fails */
    int32_t apart, alone;       /* alone: comm_create splits the host's world; without host_comm it makes one of threads */
    int32_t local[4];
} rig;

static void enter(int32_t *count, int32_t *most)
{
    int32_t now = __atomic_add_fetch(count, 1, __ATOMIC_SEQ_CST), before = most ? __atomic_load_n(most, __ATOMIC_SEQ_CST) : now;
    while (now > before && !__atomic_compare_exchange_n(most, &before, now, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) continue;
}

static llmpar_status device_create(const void *user, llmpar_ctx *ctx, llmpar_device **out)
{
    rig *r = (rig *)(uintptr_t)user;
    CHECK(ctx->host != NULL && ctx->device == NULL && ctx->comm == NULL);
    r->local[ctx->rank & 3] = ctx->local_rank;
    if (r->fail_device == ctx->rank + 1) return llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "no accelerator here");
    debug_device *d = (debug_device *)llmpar_heap_zalloc(&ctx->heap, 1, sizeof *d);
    if (!d) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "out of memory");
    debug_device_init(d, ctx->host, DEBUG_FIFO);
    d->table.state = &ctx->heap;
    d->table.apart = r->apart;
    *out = &d->table;
    enter(&r->devices, &r->most);
    return LLMPAR_OK;
}
static void device_destroy(const void *user, llmpar_device *device)
{
    if (!device) return;
    __atomic_sub_fetch(&((rig *)(uintptr_t)user)->devices, 1, __ATOMIC_SEQ_CST);
    llmpar_heap_free((llmpar_heap *)device->state, device);
}

static void (*real_destroy)(llmpar_comm *comm);
static rig *destroying;
static void comm_destroy(llmpar_comm *comm)
{
    CHECK(__atomic_load_n(&destroying->devices, __ATOMIC_SEQ_CST) > 0); /* the device goes after it */
    __atomic_sub_fetch(&destroying->comms, 1, __ATOMIC_SEQ_CST);
    real_destroy(comm);
}
static llmpar_status comm_create(const void *user, llmpar_ctx *ctx, llmpar_device *device, llmpar_comm **out)
{
    rig *r = (rig *)(uintptr_t)user;
    CHECK(ctx->device == device && ctx->host_comm != NULL);
    if (r->fail_comm == ctx->rank + 1) return llmpar_fail(ctx, LLMPAR_ERR_TIMEOUT, "no network here");
    llmpar_status status = llmpar_comm_split(ctx->host_comm, 0, ctx->rank, "own", out);
    if (status) return status;
    (*out)->device = device;
    __atomic_store_n(&real_destroy, (*out)->destroy, __ATOMIC_SEQ_CST);
    __atomic_store_n(&destroying, r, __ATOMIC_SEQ_CST);
    (*out)->destroy = comm_destroy;
    enter(&r->comms, NULL);
    return LLMPAR_OK;
}

static llmpar_backend backend_of(rig *r, int with_comm)
{
    llmpar_backend backend = { LLMPAR_BACKEND_ABI, sizeof backend, "rig", r, r, device_create, device_destroy, with_comm ? comm_create : NULL, NULL, NULL };
    return backend;
}

/* A sum over the ranks, through ctx->comm on ctx->device. */
static llmpar_status sum(llmpar_ctx *ctx, void *user)
{
    int64_t *in = NULL, back = 0, mine = ctx->rank + 1;
    llmpar_stream *stream = NULL;
    llmpar_device *device = ctx->device;
    (void)user;
    CHECK(ctx->host && ctx->host_comm && ctx->host_comm->device == ctx->host && ctx->comm->device == device);
    llmpar_status status = device->alloc(device, sizeof mine, (void **)&in);
    if (!status) status = device->stream_create(device, "sum", &stream);
    if (!status) status = device->copy(device, stream, in, &mine, sizeof mine);
    llmpar_collective call = { .send = in, .recv = in, .count = 1, .dtype = LLMPAR_I64, .tag = "sum" };
    if (!status) status = llmpar_all_reduce(ctx->comm, stream, &call);
    if (!status) status = device->copy(device, stream, &back, in, sizeof back);
    if (stream) {
        llmpar_status synchronized = device->synchronize(device, stream);
        if (!status) status = synchronized;
        device->stream_destroy(device, stream);
    }
    device->free(device, in, sizeof mine);
    if (!status) CHECK_INT(back, ctx->world * (ctx->world + 1) / 2);
    return status;
}

static llmpar_status launch(rig *r, int with_comm, int ranks, llmpar_error *error)
{
    llmpar_backend backend = backend_of(r, with_comm);
    llmpar_launch_desc desc = { .ranks = ranks, .backend = &backend, .check = test_no_leak, .transport = LLMPAR_TRANSPORT_THREADS };
    llmpar_status status = llmpar_launch(&desc, sum, r, error);
    CHECK_INT(r->devices, 0);
    CHECK_INT(r->comms, 0);
    return status;
}

TEST(device_and_comm_on_every_rank)
{
    for (int with_comm = 0; with_comm < 2; with_comm++)
        for (int ranks = 1; ranks <= 4; ranks += ranks) {
            rig r = {0};
            llmpar_error error;
            if (launch(&r, with_comm, ranks, &error)) TEST_FAIL("%d ranks: %s", ranks, error.text);
            CHECK_INT(r.most, ranks);
            for (int i = 0; i < ranks; i++) CHECK_INT(r.local[i], i);
        }
}

static llmpar_status host_is_device(llmpar_ctx *ctx, void *user)
{
    (void)user;
    CHECK(ctx->host == ctx->device && ctx->host_comm == ctx->comm);
    CHECK_INT(ctx->local_rank, ctx->rank);
    return LLMPAR_OK;
}

TEST(without_a_backend_the_device_is_the_host)
{
    llmpar_backend empty = { .abi = LLMPAR_BACKEND_ABI, .size = sizeof empty };
    for (int i = 0; i < 2; i++) {
        llmpar_launch_desc desc = { .ranks = 2, .backend = i ? &empty : NULL, .transport = LLMPAR_TRANSPORT_THREADS, .check = test_no_leak };
        CHECK_OK(llmpar_launch(&desc, host_is_device, NULL, NULL));
    }
}

TEST(failures_reach_all_ranks)
{
    llmpar_error error;
    rig device = { .fail_device = 3 }, comm = { .fail_comm = 2 };
    CHECK_STATUS(launch(&device, 1, 4, &error), LLMPAR_ERR_UNSUPPORTED);
    CHECK_TEXT(error.text, "no accelerator here");
    CHECK_INT(error.rank, 2);
    device.most = 0;
    CHECK_STATUS(launch(&device, 0, 4, &error), LLMPAR_ERR_UNSUPPORTED);
    CHECK_STATUS(launch(&comm, 1, 4, &error), LLMPAR_ERR_TIMEOUT);
    CHECK_TEXT(error.text, "no network here");
    CHECK_INT(error.rank, 1);
}

TEST(memory_apart_needs_a_communicator)
{
    llmpar_error error;
    rig r = { .apart = 1 };
    CHECK_STATUS(launch(&r, 0, 2, &error), LLMPAR_ERR_CONFIG);
    CHECK_TEXT(error.text, "backend rig: 2 ranks on device debug, whose memory is not the host's, and no comm_create");
    CHECK_OK(launch(&r, 0, 1, &error));
    CHECK_OK(launch(&r, 1, 2, &error));
}

TEST(a_backend_that_is_none)
{
    rig r = {0};
    llmpar_error error;
    llmpar_backend backend = backend_of(&r, 0);
    llmpar_launch_desc desc = { .ranks = 1, .backend = &backend, .transport = LLMPAR_TRANSPORT_THREADS };
    backend.abi = 7;
    CHECK_STATUS(llmpar_launch(&desc, sum, &r, &error), LLMPAR_ERR_ABI);
    CHECK_TEXT(error.text, "abi 7");
    backend = backend_of(&r, 0);
    backend.size = 8;
    CHECK_STATUS(llmpar_launch(&desc, sum, &r, &error), LLMPAR_ERR_ABI);
    backend = backend_of(&r, 0);
    backend.device_destroy = NULL;
    CHECK_STATUS(llmpar_launch(&desc, sum, &r, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "device_destroy is empty");
}

/* ---- ranks by the environment ---- */

typedef struct place { int32_t rank, world, local; char meeting[32]; } place;

/* Communicators of one rank, whatever the world is said to be: what the environment says is all that is looked at here. */
static llmpar_status place_comm(const void *user, llmpar_ctx *ctx, llmpar_device *device, llmpar_comm **out)
{
    place *p = (place *)(uintptr_t)user;
    (void)device;
    (void)out;
    CHECK(ctx->host_comm == NULL && ctx->device == ctx->host);
    p->rank = ctx->rank;
    p->world = ctx->world;
    p->local = ctx->local_rank;
    snprintf(p->meeting, sizeof p->meeting, "%s", ctx->meeting ? ctx->meeting : "");
    return llmpar_fail(ctx, LLMPAR_ERR_NONFINITE, "seen");
}

static const char *const VARIABLES[] = { "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID", "MASTER_ADDR", "MASTER_PORT" };
enum { VARIABLE_COUNT = sizeof VARIABLES / sizeof VARIABLES[0] };

TEST(places_by_the_environment)
{
    static const struct { const char *value[VARIABLE_COUNT]; place want; const char *text; } cases[] = {
        { { "0", "1" }, { 0, 1, 0, "" }, NULL },
        { { "5", "8", "1" }, { 5, 8, 1, "" }, NULL },
        { { "5", "8", "1", "4" }, { 5, 8, 1, "" }, NULL },
        { { "6", "8", NULL, "4" }, { 6, 8, 2, "" }, NULL },
        { { "6", "8" }, { 6, 8, 6, "" }, NULL },
        { { "6", "8", NULL, NULL, "3", "2", "1" }, { 6, 8, 3, "" }, NULL },
        { { "6", "8", NULL, NULL, NULL, "2", "1" }, { 6, 8, 2, "" }, NULL },
        { { "6", "8", NULL, NULL, NULL, NULL, "1" }, { 6, 8, 1, "" }, NULL },
        { { "1", "2", NULL, NULL, NULL, NULL, NULL, "10.0.0.1", "29500" }, { 1, 2, 1, "10.0.0.1:29500" }, NULL },
        { { "0" }, {0}, "WORLD_SIZE is not there" },
        { { NULL, "2" }, {0}, "RANK is not there" },
        { { "2", "2" }, {0}, "RANK = \"2\", expected a number from 0 to 1" },
        { { "-1", "2" }, {0}, "RANK = \"-1\"" },
        { { "", "2" }, {0}, "RANK = \"\"" },
        { { "0", "0" }, {0}, "WORLD_SIZE = \"0\"" },
        { { "0", "2x" }, {0}, "WORLD_SIZE = \"2x\"" },
        { { "0", "99999999999999999999" }, {0}, "WORLD_SIZE = \"99999999999999999999\"" },
        { { "0", "2", " 1" }, {0}, "LOCAL_RANK = \" 1\"" },
        { { "0", "2", "1", "3" }, {0}, "LOCAL_WORLD_SIZE = \"3\", expected a number from 1 to 2" },
        { { "1", "2", "1", "1" }, {0}, "LOCAL_RANK = 1, expected a number below LOCAL_WORLD_SIZE = 1" },
        { { "1", "2", NULL, NULL, NULL, NULL, NULL, "10.0.0.1" }, {0}, "MASTER_ADDR without MASTER_PORT" },
        { { "1", "2", NULL, NULL, NULL, NULL, NULL, NULL, "29500" }, {0}, "MASTER_PORT without MASTER_ADDR" },
        { { "1", "2", NULL, NULL, NULL, NULL, NULL, "", "29500" }, {0}, "MASTER_PORT without MASTER_ADDR" },
        { { "1", "2", NULL, NULL, NULL, NULL, NULL, "a", "65536" }, {0}, "MASTER_PORT = \"65536\"" },
        { { "0", "2", NULL, NULL, NULL, NULL, "one" }, {0}, "SLURM_LOCALID = \"one\"" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        for (int v = 0; v < VARIABLE_COUNT; v++) {
            if (cases[i].value[v]) setenv(VARIABLES[v], cases[i].value[v], 1);
            else unsetenv(VARIABLES[v]);
        }
        place seen;
        memset(&seen, 0, sizeof seen);
        seen.rank = -1;
        llmpar_backend backend = { .abi = LLMPAR_BACKEND_ABI, .size = sizeof backend, .name = "place", .comm_user = &seen, .comm_create = place_comm };
        llmpar_launch_desc desc = { .transport = LLMPAR_TRANSPORT_ENVIRONMENT, .backend = &backend, .check = test_no_leak };
        llmpar_error error;
        llmpar_status status = llmpar_launch(&desc, sum, NULL, &error);
        if (cases[i].text) {
            CHECK_STATUS(status, LLMPAR_ERR_CONFIG);
            CHECK_TEXT(error.text, cases[i].text);
            CHECK_INT(seen.rank, -1);
        } else {
            CHECK_STATUS(status, LLMPAR_ERR_NONFINITE);
            CHECK_INT(error.rank, cases[i].want.rank);
            CHECK_BYTES(&seen, &cases[i].want, sizeof seen);
        }
    }
    for (int v = 0; v < VARIABLE_COUNT; v++) unsetenv(VARIABLES[v]);
}

TEST(the_environment_needs_a_communicator)
{
    llmpar_error error;
    rig r = {0};
    llmpar_backend backend = backend_of(&r, 0);
    llmpar_launch_desc desc = { .transport = LLMPAR_TRANSPORT_ENVIRONMENT };
    setenv("RANK", "0", 1);
    setenv("WORLD_SIZE", "2", 1);
    CHECK_STATUS(llmpar_launch(&desc, sum, NULL, &error), LLMPAR_ERR_CONFIG);
    CHECK_TEXT(error.text, "there is no backend");
    desc.backend = &backend;
    CHECK_STATUS(llmpar_launch(&desc, sum, NULL, &error), LLMPAR_ERR_CONFIG);
    CHECK_TEXT(error.text, "this backend has none");
    backend = backend_of(&r, 1);
    desc.ranks = 3;
    CHECK_STATUS(llmpar_launch(&desc, sum, NULL, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "WORLD_SIZE = 2");
    desc.ranks = 0;
    desc.lockstep = 1;
    CHECK_STATUS(llmpar_launch(&desc, sum, NULL, &error), LLMPAR_ERR_UNSUPPORTED);
    unsetenv("RANK");
    unsetenv("WORLD_SIZE");
}

/* One rank, with a communicator that a world of threads lends it. */
typedef struct lent { llmpar_heap heap; llmpar_threads_world *world; } lent;
static llmpar_status lend(const void *user, llmpar_ctx *ctx, llmpar_device *device, llmpar_comm **out)
{
    lent *l = (lent *)(uintptr_t)user;
    return llmpar_threads_comm_create(l->world, ctx->rank, &ctx->heap, device, &ctx->error, out);
}
static int finished;
static void finish(const void *user, llmpar_comm *comm, llmpar_error *root)
{
    (void)user;
    CHECK(comm->ranks == 1);
    finished++;
    if (finished == 3) { /* as if another rank had failed meanwhile */
        llmpar_error_set(root, LLMPAR_ERR_IO, "the other rank's disk is full");
        root->rank = 1;
    }
}
static llmpar_status alone(llmpar_ctx *ctx, void *user)
{
    CHECK(ctx->host_comm == NULL && ctx->comm && ctx->device == ctx->host);
    if (*(int *)user) return llmpar_fail(ctx, LLMPAR_ERR_NONFINITE, "as asked");
    return llmpar_comm_barrier(ctx->comm, NULL, "here");
}
TEST(a_rank_of_the_environment)
{
    for (int round = 0; round < 3; round++) {
        int fails = round == 1;
        lent l;
        llmpar_error error;
        llmpar_threads_desc threads = { .ranks = 1 };
        llmpar_heap_init(&l.heap, NULL);
        CHECK_OK(llmpar_threads_world_create(&l.heap, &threads, &l.world, &error));
        llmpar_backend backend = { .abi = LLMPAR_BACKEND_ABI, .size = sizeof backend, .comm_user = &l, .comm_create = lend, .comm_finish = finish };
        llmpar_launch_desc desc = { .transport = LLMPAR_TRANSPORT_ENVIRONMENT, .backend = &backend, .check = test_no_leak };
        setenv("RANK", "0", 1);
        setenv("WORLD_SIZE", "1", 1);
        CHECK_STATUS(llmpar_launch(&desc, alone, &fails, &error), fails ? LLMPAR_ERR_NONFINITE : round == 2 ? LLMPAR_ERR_IO : LLMPAR_OK);
        if (fails) CHECK_TEXT(error.text, "as asked");
        CHECK_INT(finished, round + 1);
        if (round == 2) CHECK_INT(error.rank, 1);
        unsetenv("RANK");
        unsetenv("WORLD_SIZE");
        llmpar_threads_world_destroy(l.world);
        CHECK_INT(l.heap.live, 0);
    }
}

/* A rank that does not come to comm_create has its backend say so; the others' comm_create is not this rank's to call. */
static char said[256];
static void absent(const void *user, llmpar_ctx *ctx)
{
    CHECK(user == said && ctx->rank == 1 && ctx->world == 2 && !ctx->comm);
    snprintf(said, sizeof said, "%.200s", ctx->error.text);
}
static llmpar_status no_device(const void *user, llmpar_ctx *ctx, llmpar_device **out) { return (void)user, (void)out, llmpar_fail(ctx, LLMPAR_ERR_IO, "rank %d's GPU is gone", (int)ctx->rank); }
static void no_destroy(const void *user, llmpar_device *device) { (void)user, (void)device; }
TEST(a_rank_of_the_environment_fails_early)
{
    setenv("RANK", "1", 1);
    setenv("WORLD_SIZE", "2", 1);
    for (int says = 0; says < 2; says++) {
        llmpar_error error;
        llmpar_backend backend = { .abi = LLMPAR_BACKEND_ABI, .size = sizeof backend, .comm_user = said, .device_create = no_device, .device_destroy = no_destroy, .comm_create = lend, .comm_absent = says ? absent : NULL };
        llmpar_launch_desc desc = { .transport = LLMPAR_TRANSPORT_ENVIRONMENT, .backend = &backend, .check = test_no_leak };
        CHECK_STATUS(llmpar_launch(&desc, alone, NULL, &error), LLMPAR_ERR_IO);
        CHECK_INT(error.rank, 1);
        CHECK(!strcmp(error.text, "rank 1's GPU is gone") && !strcmp(said, says ? error.text : ""));
    }
    unsetenv("RANK");
    unsetenv("WORLD_SIZE");
}

TEST_LIST(T_(device_and_comm_on_every_rank), T_(without_a_backend_the_device_is_the_host), T_(failures_reach_all_ranks), T_(memory_apart_needs_a_communicator), T_(a_backend_that_is_none),
          T_(places_by_the_environment), T_(the_environment_needs_a_communicator), T_(a_rank_of_the_environment), T_(a_rank_of_the_environment_fails_early))
