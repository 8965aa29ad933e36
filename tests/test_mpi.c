/* The MPI communicator, under mpirun with any number of processes: every collective against a plain definition and against rank threads, bit for bit; then the ways in which one can fail that leave
   all processes alive (tests/mpi_fault.c has the others). */
#include "collectives.h"

#include <time.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void nap(double seconds)
{
    struct timespec t = { (time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9) };
    nanosleep(&t, NULL);
}

static void no_leak(const llmpar_ctx *ctx, void *user)
{
    (void)user;
    CHECK_INT(ctx->heap.live, 0);
}

static char logged[4096]; /* the lines of this process, one after the other */
static void keep_line(void *user, int rank, llmpar_log_level level, const char *line)
{
    size_t used = strlen(logged);
    (void)user; (void)rank; (void)level;
    snprintf(logged + used, sizeof logged - used, "%s\n", line);
}

static llmpar_status launch_with(const llmpar_mpi_desc *mpi, double deadline, llmpar_rank_fn fn, void *user, llmpar_error *error)
{
    llmpar_launch_desc desc = { .transport = LLMPAR_TRANSPORT_MPI, .mpi = mpi, .deadline = deadline, .check = no_leak, .log = keep_line };
    logged[0] = 0;
    return llmpar_launch(&desc, fn, user, error);
}
static llmpar_status launch(llmpar_rank_fn fn, void *user, llmpar_error *error) { return launch_with(NULL, 60, fn, user, error); }

/* The same text on all processes? */
static void check_alike(const llmpar_error *error)
{
    llmpar_error first = *error;
    MPI_Bcast(&first, (int)sizeof first, MPI_BYTE, 0, MPI_COMM_WORLD);
    if (first.rank != error->rank || first.status != error->status || strcmp(first.text, error->text)) TEST_FAIL("the root error is \"%s\" here, \"%s\" on rank 0", error->text, first.text);
}

/* ---- values ---- */

static llmpar_status values_here(llmpar_ctx *ctx, void *user)
{
    return collectives_check(ctx->comm, *(size_t *)user);
}
/* On communicators of every size, with the ranks turned round. */
static llmpar_status values_below(llmpar_ctx *ctx, void *user)
{
    llmpar_status st = LLMPAR_OK;
    for (int size = 1; size < ctx->world && !st; size++) {
        llmpar_comm *comm = NULL;
        st = llmpar_comm_split(ctx->comm, ctx->rank < size ? 0 : 1, -ctx->rank, "part", &comm);
        if (!st) CHECK_INT(comm->ranks, ctx->rank < size ? size : ctx->world - size);
        if (!st) st = collectives_check(comm, *(size_t *)user);
        llmpar_comm_destroy(comm);
    }
    return st;
}
TEST(values)
{
    size_t most = 30000;
    CHECK_OK(launch(values_here, &most, NULL));
}
TEST(values_in_parts)
{
    size_t most = 100;
    CHECK_OK(launch(values_below, &most, NULL));
}
TEST(values_in_small_slices)
{
    size_t most = 600;
    llmpar_mpi_desc mpi = { .comm_slice = 200 };
    CHECK_OK(launch_with(&mpi, 60, values_here, &most, NULL));
    mpi.comm_slice = 8 * (size_t)test_world; /* an element of each rank */
    most = 10;
    CHECK_OK(launch_with(&mpi, 60, values_here, &most, NULL));
}
TEST(values_meeting_in_rounds)
{
    size_t most = 100;
    llmpar_mpi_desc mpi = { .direct = 1 };
    CHECK_OK(launch_with(&mpi, 60, values_here, &most, NULL));
    CHECK_OK(launch_with(&mpi, 60, values_below, &most, NULL));
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

static llmpar_status splits(llmpar_ctx *ctx, void *user)
{
    (void)user;
    int r = ctx->rank, n = ctx->world;
    llmpar_comm *rows = NULL, *columns = NULL, *half = NULL;
    CHECK_OK(llmpar_comm_split(ctx->comm, r / 2, -r, "rows", &rows)); /* keys downwards: the order is turned round */
    CHECK_OK(llmpar_comm_split(ctx->comm, r % 2, 0, "columns", &columns));
    CHECK_OK(llmpar_comm_split(ctx->comm, r == 0 ? -1 : 7, 0, "all but the first", &half));
    CHECK(rows && columns);
    CHECK((half == NULL) == (r == 0));
    if (!rows || !columns) return LLMPAR_ERR_INTERNAL;
    int members = r / 2 * 2 + 1 < n ? 2 : 1;
    CHECK_INT(rows->ranks, members);
    CHECK_INT(rows->rank, members == 1 ? 0 : 1 - r % 2);
    CHECK_INT(columns->rank, r / 2);
    CHECK_TEXT(columns->axis, "columns");
    double x = (double)(1 << r), sum = 0, want = 0;
    llmpar_collective call = { .send = &x, .recv = &sum, .count = 1, .dtype = LLMPAR_F64, .tag = "sum" };
    for (int i = r % 2; i < n; i += 2) want += (double)(1 << i);
    for (int round = 0; round < 3; round++) {
        CHECK_OK(llmpar_all_reduce(columns, NULL, &call));
        CHECK_NEAR(sum, want, 0);
        if (half) {
            CHECK_OK(llmpar_all_reduce(half, NULL, &call));
            CHECK_NEAR(sum, (double)((1 << n) - 2), 0);
        }
        CHECK_OK(llmpar_all_reduce(rows, NULL, &call));
    }
    llmpar_comm *again = NULL;
    CHECK_OK(llmpar_comm_split(columns, 0, 0, "again", &again));
    llmpar_comm_destroy(columns);
    CHECK_OK(llmpar_all_reduce(again, NULL, &call));
    CHECK_NEAR(sum, want, 0);
    llmpar_comm_destroy(again);
    llmpar_comm_destroy(rows);
    llmpar_comm_destroy(half);
    return LLMPAR_OK;
}
TEST(split) { CHECK_OK(launch(splits, NULL, NULL)); }

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
static llmpar_status nothing(llmpar_ctx *ctx, void *user)
{
    if (user) ++*(int *)user;
    return llmpar_comm_barrier(ctx->comm, NULL, "nothing");
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
        nap(0.05); /* the others wait by now */
        st = llmpar_fail(ctx, LLMPAR_ERR_NONFINITE, "the loss is nan");
    } else {
        if (!st && ctx->rank == 0) nap(0.15); /* comes to its next collective only afterwards, and on another communicator */
        double start = now();
        if (!st) st = llmpar_all_reduce(ctx->rank == 0 && ctx->world > 2 ? pair : ctx->comm, NULL, &call);
        CHECK_INT(st, LLMPAR_ERR_PEER);
        CHECK(now() - start < 10);
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
TEST(peer_failure_wakes_everybody)
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
        nap(*(double *)user);
        return LLMPAR_OK;
    }
    return llmpar_all_reduce(ctx->comm, NULL, &call);
}
TEST(a_rank_that_returns_while_others_wait)
{
    if (test_world < 2) return;
    for (int late = 0; late < 2; late++) {
        llmpar_error error;
        double delay = 0.05 * late, start = now();
        CHECK_STATUS(launch(returns_early, &delay, &error), LLMPAR_ERR_MISMATCH);
        CHECK_TEXT(error.text, "has returned without it");
        CHECK_TEXT(error.text, "step/x");
        CHECK(now() - start < 20);
        check_alike(&error);
    }
}

static llmpar_status late(llmpar_ctx *ctx, void *user)
{
    llmpar_status st = llmpar_comm_barrier(ctx->comm, NULL, "first");
    if (ctx->rank == ctx->world - 1) nap(*(double *)user);
    if (!st) st = llmpar_comm_barrier(ctx->comm, NULL, "second");
    return st;
}
TEST(deadline)
{
    llmpar_error error;
    if (test_world < 2) return;
    double delay = 5;
    CHECK_STATUS(launch_with(NULL, 2.5, late, &delay, &error), LLMPAR_ERR_TIMEOUT);
    CHECK_TEXT(error.text, "barrier \"second\"");
    CHECK_TEXT(error.text, "waited 2.5 s");
    CHECK_TEXT(error.text, "last completed barrier \"first\"");
    check_alike(&error);
    delay = 0.5;
    CHECK_OK(launch_with(NULL, 60, late, &delay, &error));
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
TEST(beside_own_calls_of_mpi)
{
    llmpar_mpi_desc mpi = { .unattended = 1 };
    CHECK_OK(launch_with(&mpi, 60, own_calls, NULL, NULL));
    llmpar_error error;
    double delay = 4;
    if (test_world > 1) CHECK_STATUS(launch_with(&mpi, 2, late, &delay, &error), LLMPAR_ERR_TIMEOUT);
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
    if (ctx->rank == 1) {
        struct timespec t = { 1, 500000000 };
        nanosleep(&t, NULL);
    }
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

TEST_LIST(T_(values), T_(values_in_parts), T_(values_in_small_slices), T_(values_meeting_in_rounds), T_(values_without_checks), T_(like_threads), T_(large_buffers), T_(above_2_gib), T_(counts_bytes), T_(split),
          T_(split_without_memory), T_(set_up_without_memory), T_(mismatch), T_(mismatch_in_rounds), T_(mismatch_of_a_message), T_(peer_failure_wakes_everybody), T_(a_renamed_failure_keeps_its_root), T_(a_rank_that_returns_while_others_wait),
          T_(deadline), T_(abort_by_hand), T_(a_rank_without_scratch), T_(a_mismatch_ends_the_others), T_(random_failures), T_(other_numbers_of_ranks), T_(lowest_common_level), T_(own_communicator), T_(beside_own_calls_of_mpi), T_(threads_inside), T_(streams_with_threads))
