/* The control plane with more connections than a handful: rank 0 waits for every one of them, in every sweep, and reads those that have something to say, and no others. Sweeps and reads are counted; nothing is timed. */
#include "nccl_rig.h"

#include <poll.h>
#include <pthread.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { RANKS = 80, CALLS = 4, FILES = 6 * RANKS };

/* ---- the program's own poll and recv come before the C library's ---- */

static int counting;                                          /* 1: all are there, and none has gone */
static int sweeps, short_sweeps, found, reads, vain_reads;    /* of rank 0's helper: links that a sweep has found ready; reads that brought nothing */
static __thread int sweeping;                                 /* this is that thread */

int poll(struct pollfd *fds, nfds_t count, int milliseconds)
{
    struct timespec t = { milliseconds / 1000, milliseconds % 1000 * 1000000 };
    int ready = (int)syscall(SYS_ppoll, fds, count, milliseconds < 0 ? NULL : &t, NULL, (size_t)8);
    sweeping = count > 2 && __atomic_load_n(&counting, __ATOMIC_SEQ_CST);
    if (!sweeping) return ready;
    sweeps++;
    short_sweeps += count != RANKS; /* the pipe and RANKS - 1 links */
    for (nfds_t i = 1; i < count && ready > 0; i++) found += fds[i].revents != 0;
    return ready;
}
ssize_t recv(int fd, void *bytes, size_t count, int flags)
{
    ssize_t got = syscall(SYS_recvfrom, fd, bytes, count, flags, NULL, NULL);
    if (sweeping) {
        reads++;
        vain_reads += got < 0;
    }
    return got;
}

/* ---- a world ---- */

static llmpar_status talk(llmpar_ctx *ctx, void *user)
{
    int64_t *sum = (int64_t *)user + ctx->rank, one = 1;
    llmpar_comm *half = NULL;
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.send = &one;
    call.recv = sum;
    call.count = 1;
    call.dtype = LLMPAR_I64;
    llmpar_status status = llmpar_comm_barrier(ctx->comm, NULL, "all are there");
    if (ctx->rank == 0) __atomic_store_n(&counting, 1, __ATOMIC_SEQ_CST);
    for (int i = 0; i < CALLS && !status; i++) status = llmpar_all_reduce(ctx->comm, NULL, &call);
    if (!status) status = llmpar_comm_split(ctx->comm, ctx->rank % 2, ctx->rank, "half", &half);
    if (!status) status = llmpar_all_reduce(half, NULL, &call);
    if (!status) status = llmpar_comm_barrier(ctx->comm, NULL, "all have done");
    if (ctx->rank == 0) __atomic_store_n(&counting, 0, __ATOMIC_SEQ_CST);
    if (!status) status = llmpar_comm_barrier(ctx->comm, NULL, "and may go");
    llmpar_comm_destroy(half);
    return status;
}

TEST(rank_0_waits_for_all)
{
    static int64_t sum[RANKS];
    llmpar_nccl_desc desc = { .deadline = 120, .silence = 60 };
    llmpar_error error;
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files)) TEST_SKIP("the system does not say how many files may be open");
    if (files.rlim_cur < FILES) {
        files.rlim_cur = files.rlim_max < FILES ? files.rlim_max : FILES;
        if (files.rlim_cur < FILES || setrlimit(RLIMIT_NOFILE, &files)) TEST_SKIP("too few files may be open (ulimit -n)");
    }
    llmpar_error_clear(&error);
    fake_nccl_reset();
    if (rig_launch(RANKS, &desc, talk, sum, &error)) TEST_FAIL("%s", error.text);
    for (int i = 0; i < RANKS; i++) CHECK_INT(sum[i], RANKS / 2);
    printf("  %d sweeps, %d links found ready, %d reads, %d of them in vain\n", sweeps, found, reads, vain_reads);
    CHECK(sweeps > 0);
    CHECK_INT(short_sweeps, 0);
    CHECK(reads <= found + 2 * RANKS); /* a message may come in parts, and stay where it is while others are behind */
    CHECK(vain_reads <= RANKS);
}

TEST_LIST(T_(rank_0_waits_for_all))
