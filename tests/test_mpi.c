/* The MPI communicator, under mpirun with any number of processes: every collective against a plain definition and against rank threads, bit for bit; splits, ways to launch, streams. */
#include "mpi_launch.h"
#include "timed.h"

/* ---- values ---- */

TEST(values)
{
    size_t most = 30000;
    CHECK_OK(launch(collectives_here, &most, NULL));
}
TEST(values_in_parts)
{
    size_t most = 100;
    CHECK_OK(launch(collectives_below, &most, NULL));
}
TEST(values_in_small_slices)
{
    size_t most = 600;
    llmpar_mpi_desc mpi = { .comm_slice = 200 };
    CHECK_OK(launch_with(&mpi, 60, collectives_here, &most, NULL));
    mpi.comm_slice = 8 * (size_t)test_world; /* an element of each rank */
    most = 10;
    CHECK_OK(launch_with(&mpi, 60, collectives_here, &most, NULL));
}
TEST(values_meeting_in_rounds)
{
    size_t most = 100;
    llmpar_mpi_desc mpi = { .direct = 1 };
    CHECK_OK(launch_with(&mpi, 60, collectives_here, &most, NULL));
    CHECK_OK(launch_with(&mpi, 60, collectives_below, &most, NULL));
}
static llmpar_status values_unchecked(llmpar_ctx *ctx, void *user)
{
    ctx->comm->unchecked = 1;
    return collectives_check(ctx->comm, *(size_t *)user);
}
TEST(values_without_checks)
{
    size_t most = 600;
    CHECK_OK(launch(values_unchecked, &most, NULL));
}

/* Against rank threads: NaN, infinities, zeros of both signs, values whose sums depend on the order; sizes around every boundary. */
enum { SPECIAL = 5003 };
typedef struct special { unsigned char out[2][2][2][SPECIAL * 8]; size_t count[2]; } special; /* this rank's [all_reduce, reduce_scatter][sum, max][f32, f64] */
static special *threads_special;

static void special_fill(void *out, int wide, int rank, size_t count)
{
    static const uint32_t odd[] = { 0x7fc00000u, 0xffc00001u, 0x7f800000u, 0xff800000u, 0x00000000u, 0x80000000u, 0x00000001u, 0x7fc12345u };
    for (size_t i = 0; i < count; i++) {
        uint64_t h = mix((uint64_t)rank * 7919 + i + 5);
        float f = ((float)(h >> 44) - 524288.0f) * (float)(1u << (h & 20));
        if ((h >> 20) % 5 == 0) memcpy(&f, &odd[(h >> 10) & 7], 4);
        double d = f;
        if (wide) memcpy((char *)out + 8 * i, &d, 8);
        else memcpy((char *)out + 4 * i, &f, 4);
    }
}
static llmpar_status special_run(llmpar_ctx *ctx, void *user)
{
    special *all = (special *)user, *mine = &all[ctx->rank];
    llmpar_status st = LLMPAR_OK;
    size_t n = (size_t)ctx->world;
    void *send = malloc(SPECIAL * 8 * n);
    for (int op = 0; op < 2; op++)
        for (int wide = 0; wide < 2 && !st; wide++) {
            llmpar_collective call = { .send = send, .recv = mine->out[0][op][wide], .count = SPECIAL, .dtype = wide ? LLMPAR_F64 : LLMPAR_F32, .op = (llmpar_reduce_op)op, .tag = "special" };
            special_fill(send, wide, ctx->rank, SPECIAL * n);
            st = llmpar_all_reduce(ctx->comm, NULL, &call);
            call.recv = mine->out[1][op][wide];
            if (!st) st = llmpar_reduce_scatter(ctx->comm, NULL, &call);
        }
    free(send);
    return st;
}
static int special_nan(const unsigned char *x, int wide)
{
    float f;
    double d;
    memcpy(&f, x, 4);
    memcpy(&d, x, wide ? 8 : 4);
    return wide ? d != d : f != f;
}
static void special_compare(const special *got_all, const special *want_all)
{
    for (int kind = 0; kind < 2; kind++)
        for (int op = 0; op < 2; op++)
            for (int wide = 0; wide < 2; wide++)
                for (size_t i = 0; i < SPECIAL; i++) {
                    size_t item = wide ? 8 : 4;
                    const unsigned char *got = got_all[test_rank].out[kind][op][wide] + i * item, *want = want_all[test_rank].out[kind][op][wide] + i * item;
                    uint64_t g = 0, w = 0;
                    memcpy(&g, got, item);
                    memcpy(&w, want, item);
                    if (g == w || (!op && special_nan(got, wide) && special_nan(want, wide))) continue; /* which of two NaNs a sum keeps is the compiler's choice */
                    TEST_FAIL("%s %s %s, element %zu: %llx, on threads %llx", kind ? "reduce_scatter" : "all_reduce", op ? "max" : "sum", wide ? "f64" : "f32", i, (unsigned long long)g, (unsigned long long)w);
                    break;
                }
}
TEST(like_threads)
{
    threads_special = (special *)calloc((size_t)test_world, sizeof *threads_special);
    special *mpi = (special *)calloc((size_t)test_world, sizeof *mpi);
    llmpar_launch_desc desc = { .ranks = test_world, .transport = LLMPAR_TRANSPORT_THREADS };
    CHECK_OK(llmpar_launch(&desc, special_run, threads_special, NULL));
    CHECK_OK(launch(special_run, mpi, NULL));
    special_compare(mpi, threads_special);
    llmpar_mpi_desc small = { .comm_slice = 4096 };
    memset(mpi, 0, (size_t)test_world * sizeof *mpi);
    CHECK_OK(launch_with(&small, 60, special_run, mpi, NULL));
    special_compare(mpi, threads_special);
    free(mpi);
    free(threads_special);
}

/* Several slices of the default size, on a whole communicator. */
static llmpar_status large(llmpar_ctx *ctx, void *user)
{
    size_t count = *(size_t *)user, n = (size_t)ctx->world;
    float *x = (float *)malloc(count * n * sizeof *x), *y = (float *)malloc(count * n * sizeof *y);
    for (size_t i = 0; i < count; i++) x[i] = (float)((i * 31 + (size_t)ctx->rank * 7) % 1000);
    llmpar_collective call = { .send = x, .recv = y, .count = count, .dtype = LLMPAR_F32, .tag = "large" };
    llmpar_status st = llmpar_all_reduce(ctx->comm, NULL, &call);
    size_t wrong = 0;
    for (size_t i = 0; i < count && !st; i++) {
        float want = 0;
        for (size_t r = 0; r < n; r++) want += (float)((i * 31 + r * 7) % 1000);
        wrong += y[i] != want;
    }
    CHECK_INT(wrong, 0);
    if (!st) st = llmpar_all_gather(ctx->comm, NULL, &call);
    for (size_t r = 0; r < n && !st; r++)
        for (size_t i = 0; i < count; i++) wrong += y[r * count + i] != (float)((i * 31 + r * 7) % 1000);
    CHECK_INT(wrong, 0);
    call.root = ctx->world - 1;
    if (ctx->rank == call.root) call.recv = NULL;
    if (!st) st = llmpar_broadcast(ctx->comm, NULL, &call);
    for (size_t i = 0; i < count && !st && ctx->rank != call.root; i++) wrong += y[i] != (float)((i * 31 + (n - 1) * 7) % 1000);
    CHECK_INT(wrong, 0);
    free(x);
    free(y);
    return st;
}
TEST(large_buffers)
{
    size_t count = 1234567;
    llmpar_mpi_desc mpi = { .comm_slice = 1 << 20 };
    CHECK_OK(launch_with(&mpi, 60, large, &count, NULL));
    count = 4500000; /* 18 MB: above the default slice */
    if (test_world <= 2) CHECK_OK(launch(large, &count, NULL));
}

/* Above 2 GiB in one call: counts of MPI are int. Needs memory, so only in the long runs. */
static llmpar_status huge(llmpar_ctx *ctx, void *user)
{
    size_t count = ((size_t)1 << 31) + 4099;
    unsigned char *x = (unsigned char *)calloc(count, 1);
    (void)user;
    if (!x) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "no memory for the test");
    if (ctx->rank == 0)
        for (size_t i = 0; i < count; i += 4096) x[i] = (unsigned char)(i >> 12);
    if (ctx->rank == 0) x[count - 1] = 77;
    llmpar_collective call = { .send = x, .recv = x, .count = count, .dtype = LLMPAR_U8, .tag = "huge", .peer = 1 - ctx->rank };
    llmpar_status st = ctx->rank ? llmpar_recv(ctx->comm, NULL, &call) : llmpar_send(ctx->comm, NULL, &call);
    size_t wrong = 0;
    for (size_t i = 0; i < count; i += 4096) wrong += x[i] != (unsigned char)(i >> 12);
    CHECK_INT(wrong, 0);
    CHECK_INT(x[count - 1], 77);
    free(x);
    return st;
}
TEST(above_2_gib)
{
    const char *full = getenv("LLMPAR_TEST_FULL");
    if (test_world == 2 && full && full[0]) CHECK_OK(launch(huge, NULL, NULL));
}

/* ---- counters, splits ---- */

static llmpar_status counters(llmpar_ctx *ctx, void *user)
{
    float x[4] = { 1, 2, 3, 4 }, y[64];
    llmpar_collective call = { .send = x, .recv = y, .count = 4, .dtype = LLMPAR_F32, .root = ctx->world - 1 };
    llmpar_comm *comm = ctx->comm;
    uint64_t sequence = comm->sequence, bytes = comm->bytes_sent, others = (uint64_t)ctx->world - 1;
    (void)user;
    CHECK_OK(llmpar_all_gather(comm, NULL, &call));
    CHECK_INT(comm->bytes_sent - bytes, others * 16);
    bytes = comm->bytes_sent;
    CHECK_OK(llmpar_broadcast(comm, NULL, &call));
    CHECK_INT(comm->bytes_sent - bytes, ctx->rank == ctx->world - 1 ? others * 16 : 0);
    CHECK_OK(llmpar_comm_barrier(comm, NULL, "b"));
    CHECK_INT(comm->sequence - sequence, 3);
    return LLMPAR_OK;
}
TEST(counts_bytes) { CHECK_OK(launch(counters, NULL, NULL)); }

TEST(split) { CHECK_OK(launch(collectives_splits, NULL, NULL)); }

/* ---- launching ---- */

TEST(other_numbers_of_ranks)
{
    llmpar_error error;
    int called = 0;
    llmpar_launch_desc desc = { .ranks = test_world, .transport = LLMPAR_TRANSPORT_MPI, .log = keep_line };
    CHECK_OK(llmpar_launch(&desc, nothing, &called, &error));
    CHECK_INT(called, 1);
    desc.ranks = test_world + 1;
    CHECK_STATUS(llmpar_launch(&desc, nothing, &called, &error), LLMPAR_ERR_ARGUMENT);
    char want[80];
    snprintf(want, sizeof want, "ranks = %d, but there are %d MPI processes", test_world + 1, test_world);
    CHECK_TEXT(error.text, want);
    check_alike(&error);
    desc.ranks = 0;
    desc.cpu = test_rank == test_world - 1 ? "avx3" : NULL; /* one rank cannot even start */
    CHECK_STATUS(llmpar_launch(&desc, nothing, &called, &error), LLMPAR_ERR_CONFIG);
    CHECK_TEXT(error.text, "avx3");
    check_alike(&error);
    desc.cpu = NULL;
    desc.lockstep = 1;
    CHECK_STATUS(llmpar_launch(&desc, nothing, &called, &error), test_world > 1 ? LLMPAR_ERR_UNSUPPORTED : LLMPAR_OK);
    CHECK_INT(called, test_world > 1 ? 1 : 2);
}

static llmpar_status same_level(llmpar_ctx *ctx, void *user)
{
    (void)user;
    CHECK_TEXT(ctx->device->name, "portable");
    return LLMPAR_OK;
}
TEST(lowest_common_level)
{
    llmpar_launch_desc desc = { .transport = LLMPAR_TRANSPORT_MPI, .cpu = test_rank == test_world - 1 ? "portable" : NULL };
    CHECK_OK(llmpar_launch(&desc, same_level, NULL, NULL));
}

static llmpar_status in_part(llmpar_ctx *ctx, void *user)
{
    int64_t x = ctx->rank + 1, sum = 0;
    llmpar_collective call = { .send = &x, .recv = &sum, .count = 1, .dtype = LLMPAR_I64, .tag = "sum" };
    llmpar_status st = llmpar_all_reduce(ctx->comm, NULL, &call);
    CHECK_INT(ctx->world, *(int *)user);
    CHECK_INT(sum, (int64_t)ctx->world * (ctx->world + 1) / 2);
    return st;
}
TEST(own_communicator)
{
    MPI_Comm part = MPI_COMM_NULL;
    int size;
    MPI_Comm_split(MPI_COMM_WORLD, test_rank % 2, -test_rank, &part);
    MPI_Comm_size(part, &size);
    llmpar_mpi_desc mpi = { .comm = &part };
    CHECK_OK(launch_with(&mpi, 60, in_part, &size, NULL)); /* both parts at once */
    MPI_Comm_free(&part);
    CHECK_STATUS(launch_with(&mpi, 60, in_part, &size, NULL), LLMPAR_ERR_CONFIG); /* MPI_COMM_NULL now */
    llmpar_error error;
    llmpar_mpi_desc differs = { .comm_slice = test_rank == test_world - 1 ? 4096u : 8192u };
    if (test_world > 1) {
        CHECK_STATUS(launch_with(&differs, 60, nothing, NULL, &error), LLMPAR_ERR_MISMATCH);
        CHECK_TEXT(error.text, "comm_slice 4096");
        CHECK_TEXT(error.text, "comm_slice 8192");
        check_alike(&error);
    }
    llmpar_mpi_desc bad = { .comm_slice = (size_t)2 << 30 };
    CHECK_STATUS(launch_with(&bad, 60, nothing, NULL, &error), LLMPAR_ERR_ARGUMENT);
    llmpar_mpi_desc nervous = { .silence = 0.6 };
    CHECK_STATUS(launch_with(&nervous, 60, nothing, NULL, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "three heartbeats");
}

static llmpar_status own_calls(llmpar_ctx *ctx, void *user)
{
    llmpar_status st = LLMPAR_OK;
    (void)user;
    for (int i = 0; i < 20 && !st; i++) {
        int x = 1, sum = 0;
        MPI_Allreduce(&x, &sum, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
        CHECK_INT(sum, test_world);
        st = llmpar_comm_barrier(ctx->comm, NULL, "own");
    }
    return st;
}
TIMED(beside_own_calls_of_mpi)
{
    llmpar_mpi_desc mpi = { .unattended = 1 };
    CHECK_OK(launch_with(&mpi, 60, own_calls, NULL, NULL));
    llmpar_error error;
    double delay = 4 * test_slow;
    if (test_world > 1) CHECK_STATUS(launch_with(&mpi, 2 * test_slow, late, &delay, &error), LLMPAR_ERR_TIMEOUT);
}

/* Threads inside a rank, and rank threads inside a process, are as they were. */
static llmpar_status inside(llmpar_ctx *ctx, void *user)
{
    llmpar_launch_desc desc = { .ranks = 2, .transport = LLMPAR_TRANSPORT_THREADS };
    (void)user;
    CHECK_OK(llmpar_launch(&desc, nothing, NULL, NULL));
    return llmpar_comm_barrier(ctx->comm, NULL, "after");
}
TEST(threads_inside)
{
    llmpar_launch_desc desc = { .transport = LLMPAR_TRANSPORT_MPI, .threads = 2 };
    CHECK_OK(llmpar_launch(&desc, inside, NULL, NULL));
}

/* ---- streams with threads of their own ---- */

/* Two communicators, whose members stand in opposite orders, from two threads of each rank; the second one's calls are made first in every other round. Large ones need scratch, which grows while others are under way. */
static llmpar_status two_threads(llmpar_ctx *ctx, void *user)
{
    enum { MOST = 20000, ROUNDS = 12 };
    llmpar_comm *comm[2] = { NULL, NULL };
    llmpar_stream *stream[2] = { NULL, NULL };
    double *x = (double *)calloc(2 * MOST, sizeof *x), n = ctx->world;
    llmpar_status st = LLMPAR_OK;
    (void)user;
    for (int i = 0; i < 2 && !st; i++) {
        st = llmpar_comm_split(ctx->comm, 0, i ? -ctx->rank : ctx->rank, i ? "turned" : "straight", &comm[i]);
        if (!st) st = ctx->device->stream_create(ctx->device, i ? "reduce" : "gather", &stream[i]);
        if (!st) st = llmpar_device_stream_thread(ctx->device, stream[i]);
    }
    for (int round = 0; round < ROUNDS && !st; round++) {
        size_t count = round % 3 ? (size_t)(100 + 1500 * round) : 7;
        for (int k = 0; k < 2 && !st; k++) {
            int i = (round + k) % 2;
            llmpar_collective call = { .send = x + i * MOST, .recv = x + i * MOST, .count = count, .dtype = LLMPAR_F64, .tag = i ? "turned" : "straight" };
            for (size_t j = 0; j < count; j++) x[i * MOST + (int)j] = (double)j * (ctx->rank + 1) + i;
            st = llmpar_all_reduce(comm[i], stream[i], &call);
            if (!st) st = llmpar_comm_barrier(comm[i], stream[i], "behind it");
        }
        for (int i = 0; i < 2; i++) {
            llmpar_status waited = stream[i] ? ctx->device->synchronize(ctx->device, stream[i]) : LLMPAR_OK;
            if (!st) st = waited;
            for (size_t j = 0; j < count && !st; j++)
                if (x[i * MOST + (int)j] != (double)j * n * (n + 1) / 2 + i * n) { TEST_FAIL("round %d, communicator %d, element %d: %g", round, i, (int)j, x[i * MOST + (int)j]); break; }
        }
    }
    if (!st && ctx->rank == ctx->world - 1 && *(int *)user) st = llmpar_fail(ctx, LLMPAR_ERR_FORMAT, "this rank gives up");
    for (int i = 0; i < 2 && !st && *(int *)user; i++) st = llmpar_comm_barrier(comm[i], stream[i], "without the last");
    for (int i = 0; i < 2; i++) {
        llmpar_status waited = stream[i] ? ctx->device->synchronize(ctx->device, stream[i]) : LLMPAR_OK;
        if (!st) st = waited;
        if (stream[i]) ctx->device->stream_destroy(ctx->device, stream[i]);
    }
    for (int i = 0; i < 2; i++) llmpar_comm_destroy(comm[i]);
    free(x);
    return st;
}
TEST(streams_with_threads)
{
    llmpar_error error;
    int gives_up = 0;
    if (launch(two_threads, &gives_up, &error)) TEST_FAIL("%s", error.text);
    gives_up = 1;
    CHECK_STATUS(launch(two_threads, &gives_up, &error), LLMPAR_ERR_FORMAT);
    CHECK_TEXT(error.text, "this rank gives up");
    CHECK_INT(error.rank, test_world - 1);
}

TEST_LIST(T_(values), T_(values_in_parts), T_(values_in_small_slices), T_(values_meeting_in_rounds), T_(values_without_checks), T_(like_threads), T_(large_buffers), T_(above_2_gib),
          T_(counts_bytes), T_(split), T_(other_numbers_of_ranks), T_(lowest_common_level), T_(own_communicator), T_(beside_own_calls_of_mpi), T_(threads_inside), T_(streams_with_threads))
