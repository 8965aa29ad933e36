/* The NCCL communicator between processes, on a stand-in for NCCL: collectives and splits, a rank that fails, ranks that do not agree or do not come, one that is killed or stopped; and the end, in order or not.
   The processes are forked here and launched by their environment, as by torchrun; compiled with LLMPAR_USE_MPI they are mpirun's, and meet through MPI. */
#include "collectives.h"
#include "nccl_rig.h"
#define TEST_FORKS 1
#include "timed.h"
#include "ports.h"

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MOST = 4 };

/* Seconds until everybody has heard of it. ThreadSanitizer makes all slower, and allows no watch beside forks. */
#if defined(__SANITIZE_THREAD__)
enum { SOON = 60 };
#else
enum { SOON = 10 };
#endif

/* How it ended for each rank: of another process only where the memory is shared. */
typedef struct outcome { int there; llmpar_status status; llmpar_error error; double seconds; long pid; } outcome;
static outcome *seen;

/* A rank that fails before it comes to the meeting: it gets no device, or no memory at all. */
static int without_device = -1, without_memory = -1;
static llmpar_status no_device(const void *user, llmpar_ctx *ctx, llmpar_device **out) { return (void)user, (void)out, llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "the GPU has fallen off the bus"); }
static void *no_memory(void *user, size_t bytes) { return (void)user, (void)bytes, NULL; }
static void nothing_free(void *user, void *memory, size_t bytes) { (void)user, (void)memory, (void)bytes; }
static const llmpar_allocator poor = { no_memory, nothing_free, NULL };

static void take_part(llmpar_transport transport, int rank, const llmpar_nccl_desc *nccl, llmpar_rank_fn fn, void *user)
{
    llmpar_backend backend;
    outcome *o = &seen[rank];
    llmpar_nccl_desc slower = nccl ? *nccl : (llmpar_nccl_desc) { .deadline = 0 };
    slower.deadline *= test_slow;
    rig_backend(nccl ? &slower : NULL, &backend);
    llmpar_launch_desc desc = { .transport = transport, .backend = &backend, .check = test_no_leak, .log = rig_log, .threads = 1, .deadline = 20 * test_slow };
    double begin = test_clock();
    if (rank == without_device) backend.device_create = no_device;
    if (rank == without_memory) desc.allocator = &poor;
    rig_logged[0] = 0;
    o->status = llmpar_launch(&desc, fn, user, &o->error);
    o->seconds = test_clock() - begin;
    CHECK_INT(fake_nccl.comms, 0);
    CHECK_INT(fake_nccl.blocks, 0);
    CHECK_INT(fake_nccl.overlaps, 0);
    CHECK_INT(fake_nccl.mismatches, 0);
    CHECK_INT(fake_nccl.misuse, 0);
    o->there = 1;
}

#ifdef LLMPAR_USE_MPI

static int world_of(int ranks) { return (void)ranks, test_world; }
static void run(int ranks, const llmpar_nccl_desc *nccl, llmpar_rank_fn fn, void *user)
{
    static outcome own[64];
    (void)ranks;
    seen = own;
    memset(own, 0, sizeof own);
    take_part(LLMPAR_TRANSPORT_MPI, test_rank, nccl, fn, user);
}

#else

static int missing = -1; /* a rank that nobody starts */
static int stray;        /* 1: the last process is rank 1 of another job of this size, whose port is the one before this job's */
static int astray;       /* it is this one */

static int world_of(int ranks) { return ranks; }

static void variable(const char *name, int value)
{
    char text[32];
    snprintf(text, sizeof text, "%d", value);
    setenv(name, text, 1);
}

/* fn on as many processes; who is stopped is killed when the others have ended. */
static void run(int ranks, const llmpar_nccl_desc *nccl, llmpar_rank_fn fn, void *user)
{
    pid_t child[MOST];
    int port = port_free(), running = 0;
    if (!seen) seen = (outcome *)mmap(NULL, MOST * sizeof *seen, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    memset(seen, 0, MOST * sizeof *seen);
    fflush(NULL);
    for (int r = 0; r < ranks; r++) {
        child[r] = r == missing ? -1 : fork();
        running += child[r] > 0;
        seen[r].pid = child[r] > 0 ? (long)child[r] : seen[r].pid;
        if (child[r]) continue;
        alarm((unsigned)(3 * SOON * test_slow)); /* whoever hangs ends */
        astray = stray && r == ranks - 1;
        variable("RANK", astray ? 1 : r);
        variable("WORLD_SIZE", ranks - stray);
        variable("LOCAL_RANK", astray ? 1 : r);
        variable("LOCAL_WORLD_SIZE", ranks - stray);
        setenv("MASTER_ADDR", "127.0.0.1", 1);
        variable("MASTER_PORT", port - astray);
        test_failures = 0;
        take_part(LLMPAR_TRANSPORT_ENVIRONMENT, r, nccl, fn, user);
        fflush(NULL);
        _exit(test_failures != 0);
    }
    while (running > 0) {
        int status = 0, stopped = 0;
        for (int r = 0; r < ranks; r++) {
            if (child[r] <= 0 || waitpid(child[r], &status, WNOHANG | WUNTRACED) != child[r]) continue;
            if (WIFSTOPPED(status)) continue;
            if (seen[r].there > 0 && status) TEST_FAIL("rank %d ended with %d", r, status);
            child[r] = -1;
            running--;
        }
        for (int r = 0; r < ranks; r++) stopped += child[r] > 0 && __atomic_load_n(&seen[r].there, __ATOMIC_SEQ_CST) < 0;
        for (int r = 0; r < ranks; r++)
            if (stopped == running && child[r] > 0) kill(child[r], SIGKILL);
        test_sleep(0.002);
    }
}

#endif

static float floats[4096];
static llmpar_status sum(llmpar_ctx *ctx, const char *tag)
{
    llmpar_collective call = { .send = floats, .recv = floats, .count = 10, .dtype = LLMPAR_F32, .tag = tag };
    return llmpar_all_reduce(ctx->comm, NULL, &call);
}

/* Every rank that could say so says this of the job; culprit -1: all fail, each by itself. */
static void all_say(int ranks, llmpar_status status, int culprit, const char *text)
{
    int said = 0;
    for (int r = 0; r < ranks; r++) {
        const outcome *o = &seen[r];
        if (o->there <= 0) continue;
        said++;
        CHECK_STATUS(o->status, status);
        if (culprit >= 0) CHECK_INT(o->error.rank, culprit);
        if (status) CHECK_TEXT(o->error.text, text);
        if (o->seconds > SOON * test_slow) TEST_FAIL("rank %d heard of it after %g s", r, o->seconds);
    }
    CHECK(said > 0);
#ifndef LLMPAR_USE_MPI
    for (int r = 0; r < ranks; r++)
        if (seen[r].there == 0 && r != culprit && r != missing) TEST_FAIL("rank %d has not come back", r);
#endif
}

/* ---- in order ---- */

static llmpar_status values(llmpar_ctx *ctx, void *user)
{
    (void)user;
#ifdef LLMPAR_USE_MPI
    CHECK(ctx->host_comm != NULL && !ctx->meeting);
#else
    CHECK(ctx->host_comm == NULL && ctx->meeting);
    CHECK_INT(ctx->local_rank, ctx->rank);
#endif
    llmpar_status st = collectives_check(ctx->comm, 64);
    sample large = { 100003, 1, LLMPAR_F32, LLMPAR_SUM, 0, NULL, 0 }; /* more than the processes can have under way */
    if (!st) st = one_sample(ctx->comm, &large);
    return st ? st : collectives_splits(ctx, NULL);
}
TIMED(values_of_processes)
{
    for (int ranks = 2; ranks <= 3; ranks++) {
        run(ranks, NULL, values, NULL);
        all_say(world_of(ranks), LLMPAR_OK, -1, "");
    }
}

/* The last ones are waited for: who is done first does not take the others' connection away. */
static llmpar_status one_after_the_other(llmpar_ctx *ctx, void *user)
{
    llmpar_status st = sum(ctx, "first");
    test_sleep(0.2 * test_slow * (*(int *)user ? ctx->rank : ctx->world - 1 - ctx->rank));
    return st;
}
TIMED(the_end)
{
    for (int upwards = 0; upwards < 2; upwards++) {
        run(3, NULL, one_after_the_other, &upwards);
        all_say(world_of(3), LLMPAR_OK, -1, "");
    }
}

/* ---- failures ---- */

static llmpar_status fails(llmpar_ctx *ctx, void *user)
{
    llmpar_status st = sum(ctx, "first");
    if (ctx->rank == *(int *)user) return st ? st : llmpar_fail(ctx, LLMPAR_ERR_IO, "the disk is full");
    for (int i = 0; i < 50 && !st; i++) st = sum(ctx, "next");
    return st;
}
TIMED(a_rank_fails)
{
    for (int who = 0; who < 2; who++) {
        run(3, NULL, fails, &who);
        all_say(world_of(3), LLMPAR_ERR_IO, who, "the disk is full");
    }
}

static llmpar_status otherwise(const llmpar_nccl_desc *given, llmpar_ctx *ctx, llmpar_device *device, llmpar_comm **out)
{
    llmpar_nccl_desc desc;
    memset(&desc, 0, sizeof desc);
    (void)given;
    if (ctx->rank == 1) desc.slice = 4096;
    return llmpar_nccl_comm_create(ctx, device, &desc, out);
}
TIMED(ranks_that_do_not_agree)
{
    int nobody = -1;
    rig_comm = otherwise;
    run(2, NULL, fails, &nobody);
    rig_comm = NULL;
#ifdef LLMPAR_USE_MPI
    all_say(world_of(2), LLMPAR_ERR_MISMATCH, -1, "slice 4096");
#else
    all_say(2, LLMPAR_ERR_MISMATCH, 1, "slice 4096");
#endif
}

TIMED(a_rank_has_no_device)
{
    for (without_device = 0; without_device < world_of(3); without_device++) {
        run(3, NULL, values, NULL);
        all_say(world_of(3), LLMPAR_ERR_UNSUPPORTED, without_device, "the GPU has fallen off the bus");
    }
    without_device = -1;
}

#ifndef LLMPAR_USE_MPI

/* Rank 0 cannot even listen without: it is missed for the deadline. */
TIMED(a_rank_has_no_memory)
{
    for (without_memory = 1; without_memory < 3; without_memory++) {
        run(3, NULL, values, NULL);
        all_say(3, LLMPAR_ERR_MEMORY, without_memory, "memory");
    }
    without_memory = -1;
}

/* .. and who cannot take part looks for rank 0 no longer than that. */
TIMED(nobody_to_tell)
{
    llmpar_nccl_desc desc = { .deadline = 1 };
    missing = 0;
    without_device = 1;
    run(2, &desc, values, NULL);
    all_say(2, LLMPAR_ERR_UNSUPPORTED, 1, "the GPU has fallen off the bus");
    missing = 1;
    without_device = 0;
    run(2, &desc, values, NULL);
    all_say(2, LLMPAR_ERR_UNSUPPORTED, 0, "the GPU has fallen off the bus");
    missing = without_device = -1;
}

/* Rank 0 waits for rank 2, to tell it too; who has come does not wait with it. */
TIMED(told_at_once)
{
    missing = 2;
    without_device = 1;
    run(4, NULL, values, NULL);
    all_say(4, LLMPAR_ERR_UNSUPPORTED, 1, "the GPU has fallen off the bus");
    if (seen[3].seconds > 3 * test_slow) TEST_FAIL("rank 3 heard of it after %g s", seen[3].seconds);
    missing = without_device = -1;
}

TIMED(a_rank_does_not_come)
{
    llmpar_nccl_desc desc = { .deadline = 1 };
    char waited[60];
    int nobody = -1;
    snprintf(waited, sizeof waited, "rank 0 waited %g s for ranks 2", test_slow);
    missing = 2;
    run(3, &desc, fails, &nobody);
    all_say(3, LLMPAR_ERR_TIMEOUT, 0, waited);
    missing = 0;
    run(2, &desc, fails, &nobody);
    all_say(2, LLMPAR_ERR_TIMEOUT, -1, "rank 0 was not to be found at 127.0.0.1");
    CHECK_TEXT(seen[1].error.text, " s: Connection refused");
    missing = -1;
}

/* Two jobs whose ports are neighbours: who looks for its own rank 0 behind its port does not join the other job. */
static llmpar_status comes_late(const llmpar_nccl_desc *desc, llmpar_ctx *ctx, llmpar_device *device, llmpar_comm **out)
{
    if (ctx->rank == 1 && !astray) test_sleep(test_slow);
    return llmpar_nccl_comm_create(ctx, device, desc, out);
}
TIMED(neighbouring_jobs)
{
    llmpar_nccl_desc desc = { .deadline = 3 };
    stray = 1;
    rig_comm = comes_late;
    run(3, &desc, values, NULL);
    stray = 0;
    rig_comm = NULL;
    CHECK_STATUS(seen[0].status, LLMPAR_OK);
    CHECK_STATUS(seen[1].status, LLMPAR_OK);
    CHECK_STATUS(seen[2].status, LLMPAR_ERR_TIMEOUT);
    CHECK_TEXT(seen[2].error.text, "rank 0 was not to be found");
}

/* Killed while it waits for rank 2. */
static void *kills(void *arg)
{
    (void)arg;
    test_sleep(0.5 * test_slow);
    __atomic_store_n(&seen[1].there, -1, __ATOMIC_SEQ_CST);
    raise(SIGKILL);
    return NULL;
}
static llmpar_status comes_and_dies(const llmpar_nccl_desc *desc, llmpar_ctx *ctx, llmpar_device *device, llmpar_comm **out)
{
    pthread_t thread;
    if (ctx->rank == 1 && pthread_create(&thread, NULL, kills, NULL)) return llmpar_fail(ctx, LLMPAR_ERR_INTERNAL, "no thread");
    return llmpar_nccl_comm_create(ctx, device, desc, out);
}
TIMED(a_process_is_killed_at_the_meeting)
{
    char want[160], host[64];
    missing = 2;
    rig_comm = comes_and_dies;
    run(4, NULL, values, NULL);
    gethostname(host, sizeof host);
    host[63] = 0;
    snprintf(want, sizeof want, "nccl: the meeting: rank 1 (%s, pid %ld) has gone away before all ranks had come", host, seen[1].pid);
    all_say(4, LLMPAR_ERR_TIMEOUT, 1, want);
    missing = -1;
    rig_comm = NULL;
}

/* Rank 0 needs a file for each rank: 67 here. It takes what the system allows, or says at once what is missing. */
static llmpar_status few_files(const llmpar_nccl_desc *desc, llmpar_ctx *ctx, llmpar_device *device, llmpar_comm **out)
{
    struct rlimit files;
    if (ctx->rank == 0 && !getrlimit(RLIMIT_NOFILE, &files)) {
        files.rlim_cur = 66;
        if (desc->silence > 0) files.rlim_max = 66;
        CHECK(!setrlimit(RLIMIT_NOFILE, &files));
    }
    llmpar_status st = llmpar_nccl_comm_create(ctx, device, desc, out);
    CHECK(ctx->rank || (!getrlimit(RLIMIT_NOFILE, &files) && (desc->silence > 0 || files.rlim_cur >= 67)));
    return st;
}
TIMED(few_files_are_allowed)
{
    llmpar_nccl_desc desc = { .deadline = 60 };
    rig_comm = few_files;
    run(3, &desc, values, NULL);
    for (int r = 0; r < 3; r++) CHECK_STATUS(seen[r].status, LLMPAR_OK);
    desc.silence = 9;
    run(3, &desc, values, NULL);
    all_say(3, LLMPAR_ERR_CONFIG, 0, "nccl: rank 0 holds a connection to each of 3 ranks, but may open 66 files, expected at least 67 (ulimit -n)");
    rig_comm = NULL;
}

typedef struct end { int who, by; } end;
static llmpar_status ends(llmpar_ctx *ctx, void *user)
{
    const end *e = (const end *)user;
    llmpar_status st = sum(ctx, "first");
    if (ctx->rank == e->who && !st) {
        __atomic_store_n(&seen[ctx->rank].there, -1, __ATOMIC_SEQ_CST);
        raise(e->by);
    }
    return st ? st : sum(ctx, "second");
}
TIMED(a_process_is_killed)
{
    for (int who = 0; who < 3; who++) {
        end e = { who, SIGKILL };
        char want[160], host[64];
        run(3, NULL, ends, &e);
        gethostname(host, sizeof host);
        host[63] = 0;
        snprintf(want, sizeof want, "rank %d (%s, pid %ld) died: its connection broke without a farewell", who, host, seen[who].pid);
        all_say(3, LLMPAR_ERR_TIMEOUT, who, want);
    }
}
TIMED(a_process_is_stopped)
{
    llmpar_nccl_desc desc = { .silence = 1.5 };
    end e = { 1, SIGSTOP };
    run(3, &desc, ends, &e);
    all_say(3, LLMPAR_ERR_TIMEOUT, 1, "has given no sign of life for 1.5 s");
}

TEST_LIST(T_(values_of_processes), T_(the_end), T_(a_rank_fails), T_(ranks_that_do_not_agree), T_(a_rank_has_no_device), T_(a_rank_has_no_memory), T_(nobody_to_tell), T_(told_at_once), T_(a_rank_does_not_come), T_(neighbouring_jobs), T_(a_process_is_killed_at_the_meeting), T_(few_files_are_allowed), T_(a_process_is_killed), T_(a_process_is_stopped))

#else

TEST_LIST(T_(values_of_processes), T_(the_end), T_(a_rank_fails), T_(ranks_that_do_not_agree), T_(a_rank_has_no_device))

#endif
