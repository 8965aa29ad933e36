/* The NCCL communicator where things go wrong, on a stand-in for NCCL: ranks that disagree, fail, stay away, fall silent or die; NCCL's own errors; strangers on the port; ranks that do not belong together. Every rank
   hears of it, the text names who and what, and nothing is left. */
#include "nccl_rig.h"
#include "timed.h"
#include "ports.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MOST = 8 };

/* ---- the connection of each rank to rank 0: the program's own connect and send come before the C library's ---- */

static int fd_of[MOST], muted = -1; /* muted: a rank whose bytes go nowhere */

int connect(int fd, const struct sockaddr *address, socklen_t length)
{
    if (rig_rank > 0 && rig_rank < MOST) __atomic_store_n(&fd_of[rig_rank], fd, __ATOMIC_SEQ_CST);
    return (int)syscall(SYS_connect, fd, address, length);
}
ssize_t send(int fd, const void *bytes, size_t count, int flags)
{
    int mute = __atomic_load_n(&muted, __ATOMIC_SEQ_CST);
    if (mute >= 0 && __atomic_load_n(&fd_of[mute], __ATOMIC_SEQ_CST) == fd) return (ssize_t)count;
    return syscall(SYS_sendto, fd, bytes, count, flags, NULL, 0);
}

static int elsewhere; /* 1: every rank is on a machine of its own, of one name */
int open(const char *path, int flags, ...)
{
    va_list more;
    va_start(more, flags);
    int mode = flags & O_CREAT ? va_arg(more, int) : 0;
    va_end(more);
    if (elsewhere && !strcmp(path, "/proc/sys/kernel/random/boot_id")) path = "/proc/sys/kernel/random/uuid";
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

static int deaf; /* 1: nobody can listen */
int listen(int fd, int backlog)
{
    if (!deaf) return (int)syscall(SYS_listen, fd, backlog);
    errno = EMFILE;
    return -1;
}

static int dry; /* 1: no rank gets a pipe */
int pipe(int fds[2])
{
    if (!dry) return (int)syscall(SYS_pipe2, fds, 0);
    errno = EMFILE;
    return -1;
}

static int full; /* so many times rank 0 is out of files when somebody comes */
int accept(int fd, struct sockaddr *address, socklen_t *length)
{
    if (__atomic_load_n(&full, __ATOMIC_SEQ_CST) <= 0) return (int)syscall(SYS_accept4, fd, address, length, 0);
    __atomic_sub_fetch(&full, 1, __ATOMIC_SEQ_CST);
    errno = EMFILE;
    return -1;
}

/* ---- running ---- */

typedef struct outcome { llmpar_status job, status[MOST]; llmpar_error error; char text[MOST][1600]; double seconds[MOST]; } outcome;
static outcome seen;

typedef struct script { llmpar_status (*fn)(llmpar_ctx *ctx, void *user); void *user; } script;
static llmpar_status noted(llmpar_ctx *ctx, void *user)
{
    script *s = (script *)user;
    double begin = test_clock();
    llmpar_status st = s->fn(ctx, s->user);
    seen.status[ctx->rank] = st;
    seen.seconds[ctx->rank] = test_clock() - begin;
    snprintf(seen.text[ctx->rank], sizeof seen.text[0], "%s", llmpar_last_error(ctx));
    return st;
}

/* After a reset, so that the faults can be set before. */
static void run(int ranks, const llmpar_nccl_desc *desc, llmpar_rank_fn fn, void *user)
{
    script s = { fn, user };
    memset(&seen, 0, sizeof seen);
    for (int i = 0; i < MOST; i++) seen.status[i] = (llmpar_status)-1;
    llmpar_nccl_desc slower = desc ? *desc : (llmpar_nccl_desc) { .deadline = 0 };
    slower.deadline *= test_slow;
    seen.job = rig_launch(ranks, desc ? &slower : NULL, noted, &s, &seen.error);
    __atomic_store_n(&muted, -1, __ATOMIC_SEQ_CST);
}

/* All ranks but `culprit` returned PEER with this text; -1: all. */
static void all_say(int ranks, int culprit, const char *text)
{
    for (int r = 0; r < ranks; r++) {
        if (r == culprit) continue;
        if (seen.status[r] != LLMPAR_ERR_PEER || !strstr(seen.text[r], text)) TEST_FAIL("rank %d: %s: %s; expected another rank's failure with: %s", r, llmpar_status_string(seen.status[r]), seen.text[r], text);
    }
}

static float floats[MOST][4096];
static llmpar_status sum(llmpar_ctx *ctx, const char *tag)
{
    float *x = floats[ctx->rank];
    llmpar_collective call = { .send = x, .recv = x, .count = 10, .dtype = LLMPAR_F32, .tag = tag };
    return llmpar_all_reduce(ctx->comm, NULL, &call);
}

/* ---- ranks that disagree ---- */

typedef struct deviation { const char *name, *field; } deviation;
static const deviation deviations[] = { {"op", "op"}, {"dtype", "dtype"}, {"count", "count"}, {"root", "root"}, {"reduce op", "reduce op"}, {"tag", "tag"}, {"blocks", "count, blocks"}, {"order", "count, tag"}, {"split", "op"} };

static llmpar_status deviates(llmpar_ctx *ctx, void *user)
{
    int how = *(int *)user, odd = ctx->rank == ctx->world - 1;
    float *x = floats[ctx->rank];
    llmpar_collective call = { .send = x, .recv = x + 512, .count = 40, .dtype = LLMPAR_F32, .tag = "layers.3.wo/x" };
    llmpar_status st = sum(ctx, "before");
    if (st) return st;
    if (how == 3) {
        call.root = odd;
        call.send = call.recv = x;
        st = llmpar_broadcast(ctx->comm, NULL, &call);
    } else if (odd) {
        if (how == 1) call.dtype = LLMPAR_I64;
        if (how == 2) call.count = 41;
        if (how == 4) call.op = LLMPAR_MAX;
        if (how == 5) call.tag = "layers.4.wo/x";
        if (how == 6) { call.blocks = 2; call.count = 20; }
        if (how == 7) st = sum(ctx, "after");
        else if (how == 0) st = llmpar_all_gather(ctx->comm, NULL, &call);
        else if (how == 8) st = llmpar_comm_barrier(ctx->comm, NULL, "layers.3.wo/x");
        else st = llmpar_all_reduce(ctx->comm, NULL, &call);
    } else if (how == 8) {
        llmpar_comm *part = NULL;
        st = llmpar_comm_split(ctx->comm, 0, 0, "layers.3.wo/x", &part);
        llmpar_comm_destroy(part);
    } else {
        st = llmpar_all_reduce(ctx->comm, NULL, &call);
    }
    if (!st) st = sum(ctx, "after");
    /* Where the bytes fit each other, data moves before rank 0 has compared: a helper that gets no processor for long is late. */
    for (double until = test_clock() + 30; !st && test_clock() < until;) st = sum(ctx, "end");
    return st;
}
TEST(mismatches)
{
    for (int how = 0; how < (int)(sizeof deviations / sizeof deviations[0]); how++)
        for (int ranks = 2; ranks <= 4; ranks += 2) {
            char want[200];
            fake_nccl_reset();
            fake_nccl.quiet = 1;
            run(ranks, NULL, deviates, &how);
            snprintf(want, sizeof want, "the ranks of world disagree in %s", deviations[how].field);
            CHECK_STATUS(seen.job, LLMPAR_ERR_MISMATCH);
            CHECK_TEXT(seen.error.text, want);
            int both = 0;
            for (int r = 0; r < ranks; r++) {
                both += seen.status[r] == LLMPAR_ERR_MISMATCH;
                CHECK(seen.status[r] == LLMPAR_ERR_MISMATCH || seen.status[r] == LLMPAR_ERR_PEER);
                CHECK_TEXT(seen.text[r], want);
            }
            if (both != 2) TEST_FAIL("%s, %d ranks: %d of them report the mismatch as theirs, expected both sides", deviations[how].name, ranks, both);
        }
}

static llmpar_status goes_early(llmpar_ctx *ctx, void *user)
{
    llmpar_status st = sum(ctx, "first");
    if (ctx->rank == *(int *)user) return st;
    return st ? st : sum(ctx, "second");
}
TEST(a_rank_returns_without_it)
{
    for (int who = 0; who < 3; who++) {
        char want[80];
        fake_nccl_reset();
        run(3, NULL, goes_early, &who);
        snprintf(want, sizeof want, "rank %d has returned without it", who);
        CHECK_STATUS(seen.job, LLMPAR_ERR_MISMATCH);
        for (int r = 0; r < 3; r++)
            if (r != who) CHECK_TEXT(seen.text[r], want);
        CHECK_OK(seen.status[who]);
    }
}

static llmpar_status message_sizes(llmpar_ctx *ctx, void *user)
{
    llmpar_collective call = { .send = floats[0], .recv = floats[1], .count = ctx->rank ? 40 : 30, .dtype = LLMPAR_F32, .tag = "message", .peer = 1 - ctx->rank };
    (void)user;
    return ctx->rank ? llmpar_recv(ctx->comm, NULL, &call) : llmpar_send(ctx->comm, NULL, &call);
}
TEST(a_message_of_another_size)
{
    fake_nccl_reset();
    fake_nccl.quiet = 1;
    run(2, NULL, message_sizes, NULL);
    CHECK_STATUS(seen.job, LLMPAR_ERR_MISMATCH);
    CHECK_TEXT(seen.error.text, "send f32[30] to 1 \"message\"");
    CHECK_TEXT(seen.error.text, "recv f32[40] from 0 \"message\"");
}

/* ---- ranks that fail, or stay away ---- */

static int past_first; /* a rank may be through with a sum while others still wait for their parts of it */
static llmpar_status fails(llmpar_ctx *ctx, void *user)
{
    llmpar_status st = sum(ctx, "first");
    __atomic_add_fetch(&past_first, 1, __ATOMIC_SEQ_CST);
    while (ctx->rank == *(int *)user && __atomic_load_n(&past_first, __ATOMIC_SEQ_CST) < ctx->world) usleep(1000);
    if (ctx->rank == *(int *)user) return st ? st : llmpar_fail(ctx, LLMPAR_ERR_IO, "the disk is full");
    for (int i = 0; i < 50 && !st; i++) st = sum(ctx, "next");
    return st;
}
TIMED(a_rank_fails)
{
    for (int who = 0; who < 4; who++) {
        fake_nccl_reset();
        past_first = 0;
        run(4, NULL, fails, &who);
        CHECK_STATUS(seen.job, LLMPAR_ERR_IO);
        CHECK_TEXT(seen.error.text, "the disk is full");
        CHECK_INT(seen.error.rank, who);
        all_say(4, who, "the disk is full");
        all_say(4, who, "last completed all_reduce sum f32[10] \"first\"");
        for (int r = 0; r < 4; r++) CHECK(seen.seconds[r] < 5 * test_slow);
    }
}

static llmpar_status late(llmpar_ctx *ctx, void *user)
{
    llmpar_status st = sum(ctx, "first");
    if (ctx->rank == 2) test_sleep(*(double *)user);
    return st ? st : sum(ctx, "second");
}
TIMED(a_rank_is_late)
{
    char waited[200];
    double delay = 4.5 * test_slow;
    llmpar_nccl_desc desc = { .deadline = 2 };
    fake_nccl_reset();
    run(3, &desc, late, &delay);
    CHECK_STATUS(seen.job, LLMPAR_ERR_TIMEOUT);
    snprintf(waited, sizeof waited, "all_reduce sum f32[10] \"second\" (call 5 on world): waited %g s for the other ranks; rank 2: outside, last completed all_reduce sum f32[10] \"first\"", 2 * test_slow);
    CHECK_TEXT(seen.error.text, waited);
    CHECK_STATUS(seen.status[2], LLMPAR_ERR_PEER);
    delay = 0.3;
    desc.deadline = 30;
    fake_nccl_reset();
    run(3, &desc, late, &delay);
    CHECK_OK(seen.job);
}

/* ---- connections ---- */

static llmpar_status loses(llmpar_ctx *ctx, void *user)
{
    int who = *(int *)user, rest = 0;
    llmpar_status st = sum(ctx, "first");
    if (ctx->rank == (who > 0 ? who : 1)) {
        test_sleep(0.2 * test_slow);
        for (int i = 1; i < ctx->world; i++)
            if (!who || i == who) shutdown(__atomic_load_n(&fd_of[i], __ATOMIC_SEQ_CST), SHUT_RDWR);
        test_sleep(test_slow);
    }
    for (rest = 0; rest < 3 && !st; rest++) st = sum(ctx, "next");
    return st;
}
TIMED(a_connection_breaks)
{
    for (int who = 0; who < 4; who++) {
        char want[100], host[64];
        fake_nccl_reset();
        run(4, NULL, loses, &who);
        gethostname(host, sizeof host);
        host[63] = 0;
        snprintf(want, sizeof want, "rank %d (%s, pid %ld) died", who, host, (long)getpid());
        if (who) CHECK_TEXT(seen.text[0], want);
        if (who) CHECK_TEXT(seen.text[who == 1 ? 2 : 1], want);
        for (int r = 0; r < 4; r++) CHECK_TEXT(seen.text[r], "died: its connection broke without a farewell");
        for (int r = 0; r < 4; r++) CHECK(seen.status[r] != LLMPAR_OK);
    }
}

static llmpar_status falls_silent(llmpar_ctx *ctx, void *user)
{
    llmpar_status st = sum(ctx, "first");
    (void)user;
    if (ctx->rank == 1) {
        __atomic_store_n(&muted, 2, __ATOMIC_SEQ_CST);
        test_sleep(2.6 * test_slow); /* the same silence: looks are counted, and there may be few */
    }
    return st ? st : sum(ctx, "second");
}
TIMED(a_rank_falls_silent)
{
    llmpar_nccl_desc desc = { .silence = 1.5 };
    fake_nccl_reset();
    run(3, &desc, falls_silent, NULL);
    CHECK_TEXT(seen.text[0], "has given no sign of life for 1.5 s");
    CHECK_TEXT(seen.text[0], "rank 2 (");
    CHECK_TEXT(seen.text[1], "rank 2 (");
}

static llmpar_status talks_nonsense(llmpar_ctx *ctx, void *user)
{
    llmpar_status st = sum(ctx, "first");
    char nonsense[512];
    memset(nonsense, *(int *)user, sizeof nonsense);
    if (ctx->rank == 1) {
        syscall(SYS_sendto, __atomic_load_n(&fd_of[2], __ATOMIC_SEQ_CST), nonsense, sizeof nonsense, 0, NULL, 0);
        test_sleep(0.5 * test_slow);
    }
    return st ? st : sum(ctx, "second");
}
TIMED(nonsense_on_a_connection)
{
    for (int byte = 0; byte < 256; byte += 85) {
        fake_nccl_reset();
        run(3, NULL, talks_nonsense, &byte);
        CHECK_TEXT(seen.text[0], "has sent what is no message of this library");
        CHECK_TEXT(seen.text[0], "rank 2 (");
        CHECK_TEXT(seen.text[1], "rank 2 (");
    }
}

/* A sound message that is not the rank's to send: it lets go of a communicator that it has no part in. */
static llmpar_status drops_another(llmpar_ctx *ctx, void *user)
{
    llmpar_comm *part = NULL;
    struct { uint32_t word, kind; uint64_t bytes, id; } m = { 0x4c4c4e31u, 4, sizeof m.id, *(uint64_t *)user };
    llmpar_status st = llmpar_comm_split(ctx->comm, ctx->rank < 2 ? 0 : -1, 0, "part", &part);
    if (!st && ctx->rank == 1) {
        syscall(SYS_sendto, __atomic_load_n(&fd_of[2], __ATOMIC_SEQ_CST), &m, sizeof m, MSG_NOSIGNAL, NULL, 0);
        test_sleep(0.3 * test_slow);
    }
    if (!st) st = sum(ctx, "second");
    llmpar_comm_destroy(part);
    return st;
}
TIMED(drops_of_what_is_not_its_own)
{
    for (uint64_t id = 1; id < 3; id++) { /* that of the others; one that nobody has */
        fake_nccl_reset();
        run(3, NULL, drops_another, &id);
        CHECK_TEXT(seen.text[0], "has sent what is no message of this library");
        CHECK_TEXT(seen.text[0], "rank 2 (");
    }
}

/* Messages that rank 0 reads (kinds 1 to 7), with sound heads and random bodies: whatever they say, nobody crashes and everybody ends. Seeds below 8: of that kind alone. */
static llmpar_status talks_lies(llmpar_ctx *ctx, void *user)
{
    unsigned seed = *(unsigned *)user, only = seed < 8 ? seed : 0;
    llmpar_status st = sum(ctx, "first");
    struct { uint32_t word, kind; uint64_t bytes; unsigned char body[2048]; } m;
    static const size_t sizes[] = { 0, sizeof(llmpar_position), 40 + sizeof(llmpar_call), 40 + sizeof(llmpar_call), 8, sizeof(llmpar_error), sizeof(llmpar_position), 0 };
    if (ctx->rank == 1) {
        for (int i = 0; i < 40; i++) {
            seed = seed * 1664525u + 1013904223u;
            m.word = 0x4c4c4e31u;
            m.kind = only ? only : 1 + (seed >> 8) % 7;
            m.bytes = sizes[m.kind];
            for (size_t k = 0; k < sizeof m.body; k++) {
                seed = seed * 1664525u + 1013904223u;
                m.body[k] = only == 5 ? (unsigned char)(1 + k % 31) : (unsigned char)(seed >> (seed & 3 << 8 ? 24 : 31)); /* a failure's text: control characters */
            }
            if (syscall(SYS_sendto, __atomic_load_n(&fd_of[2], __ATOMIC_SEQ_CST), &m, 16 + m.bytes, MSG_NOSIGNAL, NULL, 0) < 0) break;
        }
        test_sleep(0.2 * test_slow);
    }
    for (int i = 0; i < 3 && !st; i++) st = sum(ctx, "next");
    return st;
}
TIMED(lies_on_a_connection)
{
    llmpar_nccl_desc desc = { .deadline = 3 };
    for (unsigned seed = 1; seed < 8 + (unsigned)test_rounds(12); seed++) {
        fake_nccl_reset();
        fake_nccl.quiet = 1;
        run(3, &desc, talks_lies, &seed);
        for (int r = 0; r < 3; r++) {
            CHECK(seen.seconds[r] < 20 * test_slow);
            for (const char *c = seen.text[r]; *c; c++) CHECK((unsigned char)*c >= 32 && *c != 127);
        }
        if (seed == 5 || seed == 7) CHECK(!strstr(seen.text[0], "what is no message of this library")); /* whose bodies may be anything: so heads are sound */
    }
}

/* ---- NCCL's own errors ---- */

static llmpar_status several(llmpar_ctx *ctx, void *user)
{
    llmpar_status st = LLMPAR_OK;
    (void)user;
    for (int i = 0; i < 6 && !st; i++) st = sum(ctx, "several");
    return st;
}
TIMED(nccl_fails)
{
    char waited[40];
    snprintf(waited, sizeof waited, "waited %g s", test_slow);
    static const fake_nccl_kind kinds[] = { FAKE_NCCL_REFUSES, FAKE_NCCL_BREAKS, FAKE_NCCL_HANGS };
    const char *const texts[] = { "unhandled system error: the group was refused", "remote process exited", waited };
    for (int k = 0; k < 3; k++)
        for (int at = 1; at <= 3; at += 2) {
            llmpar_nccl_desc desc = { .deadline = k == 2 ? 1 : 30 };
            fake_nccl_reset();
            fake_nccl.kind = kinds[k];
            fake_nccl.rank = 1;
            fake_nccl.at = at + 1; /* the first one is launch's own */
            run(3, &desc, several, NULL);
            CHECK_TEXT(seen.error.text, texts[k]);
            for (int r = 0; r < 3; r++) {
                CHECK(seen.status[r] != LLMPAR_OK);
                CHECK_TEXT(seen.text[r], texts[k]);
            }
        }
}
TIMED(nccl_init_fails)
{
    char within[80];
    fake_nccl_reset();
    fake_nccl.kind = FAKE_NCCL_INIT_REFUSES;
    fake_nccl.rank = 2;
    run(3, NULL, several, NULL);
    CHECK_STATUS(seen.job, LLMPAR_ERR_IO);
    CHECK_TEXT(seen.error.text, "communicator world: ncclCommInitRankConfig: unhandled system error");
    CHECK_INT(seen.error.rank, 2);
    llmpar_nccl_desc desc = { .deadline = 1 };
    fake_nccl_reset();
    fake_nccl.kind = FAKE_NCCL_INIT_HANGS;
    fake_nccl.rank = 2;
    run(3, &desc, several, NULL);
    CHECK_STATUS(seen.job, LLMPAR_ERR_TIMEOUT);
    snprintf(within, sizeof within, "ncclCommInitRankConfig has not ended within %g s", test_slow);
    CHECK_TEXT(seen.error.text, within);
}
TEST(an_old_nccl)
{
    fake_nccl_reset();
    fake_nccl.version = 21903;
    run(2, NULL, several, NULL);
    CHECK_STATUS(seen.job, LLMPAR_ERR_UNSUPPORTED);
    CHECK_TEXT(seen.error.text, "NCCL 21903 is too old, expected at least 22000 (2.20)");
}

/* ---- on streams with threads: a rank waits for its device while the GPU hangs in NCCL ---- */

static llmpar_status hangs_on_stream(llmpar_ctx *ctx, void *user)
{
    float *x = floats[ctx->rank];
    llmpar_collective call = { .send = x, .recv = x, .count = 10, .dtype = LLMPAR_F32, .tag = "streamed" };
    llmpar_stream *stream = NULL;
    llmpar_device *device = ctx->device;
    (void)user;
    llmpar_status st = device->stream_create(device, "comm", &stream);
    if (!st) st = llmpar_device_stream_thread(device, stream);
    for (int i = 0; i < 5 && !st; i++) st = llmpar_all_reduce(ctx->comm, stream, &call);
    llmpar_status waited = stream ? device->synchronize(device, stream) : LLMPAR_OK;
    if (!st) st = waited;
    CHECK(waited != LLMPAR_OK);
    if (!st) st = sum(ctx, "afterwards");
    if (stream) device->stream_destroy(device, stream);
    return st;
}
TIMED(a_gpu_hangs)
{
    char waited[60];
    snprintf(waited, sizeof waited, "waited %g s for the other ranks", 2 * test_slow);
    llmpar_nccl_desc desc = { .deadline = 2 };
    for (int at = 1; at <= 4; at += 3) {
        fake_nccl_reset();
        fake_nccl.kind = FAKE_NCCL_HANGS;
        fake_nccl.rank = 1;
        fake_nccl.at = at + 1;
        run(3, &desc, hangs_on_stream, NULL);
        CHECK_STATUS(seen.job, LLMPAR_ERR_TIMEOUT);
        for (int r = 0; r < 3; r++) CHECK_TEXT(seen.text[r], "\"streamed\"");
        CHECK_TEXT(seen.error.text, waited);
    }
}

/* The world's sum waits for rank 1, which fails; behind it, on another stream, a sum on another communicator. NCCL's abort of a communicator waits for its kernels, so both have to be aborted at once. */
static llmpar_status queues_behind(llmpar_ctx *ctx, void *user)
{
    float *x = floats[ctx->rank];
    llmpar_collective call = { .send = x, .recv = x, .count = 10, .dtype = LLMPAR_F32, .tag = "queued" };
    llmpar_stream *stream[2] = { NULL, NULL };
    llmpar_device *device = ctx->device;
    llmpar_comm *others = NULL;
    (void)user;
    llmpar_status st = llmpar_comm_split(ctx->comm, 0, 0, "others", &others);
    if (!st && ctx->rank == 1) {
        test_sleep(0.5);
        st = llmpar_fail(ctx, LLMPAR_ERR_IO, "the disk is full");
        ctx->comm->abort(ctx->comm, &ctx->error);
        llmpar_comm_destroy(others);
        return st;
    }
    for (int i = 0; i < 2 && !st; i++) {
        st = device->stream_create(device, "comm", &stream[i]);
        if (!st) st = llmpar_device_stream_thread(device, stream[i]);
    }
    for (int i = 0; i < 6 && !st; i++) st = llmpar_all_reduce(i % 2 ? others : ctx->comm, stream[i % 2], &call);
    for (int i = 0; i < 2; i++) {
        llmpar_status waited = stream[i] ? device->synchronize(device, stream[i]) : LLMPAR_OK;
        CHECK(waited != LLMPAR_OK);
        if (!st) st = waited;
    }
    llmpar_comm_destroy(others);
    for (int i = 0; i < 2; i++) device->stream_destroy(device, stream[i]);
    return st;
}
TEST(several_communicators_wait)
{
    fake_nccl_reset();
    run(3, NULL, queues_behind, NULL);
    CHECK_STATUS(seen.job, LLMPAR_ERR_IO);
    CHECK_INT(seen.error.rank, 1);
    all_say(3, 1, "the disk is full");
    for (int r = 0; r < 3; r++) CHECK(seen.seconds[r] < 8);
}

/* The end of an NCCL communicator waits for the peers' of one machine; llmpar_comm_destroy is local, so its order is each rank's own. */
static llmpar_status destroys(llmpar_ctx *ctx, void *user)
{
    llmpar_comm *part[2] = { NULL, NULL };
    llmpar_status st = llmpar_comm_split(ctx->comm, 0, 0, "one", &part[0]);
    (void)user;
    if (!st) st = llmpar_comm_split(ctx->comm, 0, 0, "two", &part[1]);
    llmpar_comm_destroy(part[ctx->rank % 2]);
    llmpar_comm_destroy(part[1 - ctx->rank % 2]);
    return st ? st : sum(ctx, "after");
}
TEST(destroyed_in_any_order)
{
    fake_nccl_reset();
    run(2, NULL, destroys, NULL);
    CHECK_STATUS(seen.job, LLMPAR_OK);
    for (int r = 0; r < 2; r++) CHECK(seen.seconds[r] < 10);
}

/* ---- ranks that do not belong together ---- */

static int odd_rank, odd_world;
static llmpar_status odd_comm(const llmpar_nccl_desc *desc, llmpar_ctx *ctx, llmpar_device *device, llmpar_comm **out)
{
    llmpar_ctx other = *ctx;
    if (ctx->rank == 2) {
        other.rank = odd_rank ? odd_rank : ctx->rank;
        other.world = odd_world ? odd_world : ctx->world;
    }
    if (ctx->rank == 1 && odd_world < 0) other.world = ctx->world; /* unchanged */
    llmpar_status st = llmpar_nccl_comm_create(&other, device, desc, out);
    ctx->heap = other.heap;
    ctx->error = other.error;
    if (!st) {
        TEST_FAIL("a communicator of ranks that do not belong together");
        llmpar_comm_destroy(*out);
        *out = NULL;
        return llmpar_fail(ctx, LLMPAR_ERR_INTERNAL, "it was made");
    }
    return st;
}
TEST(wrong_ranks)
{
    rig_comm = odd_comm;
    odd_rank = 1;
    odd_world = 0;
    fake_nccl_reset();
    run(3, NULL, several, NULL);
    CHECK_STATUS(seen.job, LLMPAR_ERR_MISMATCH);
    CHECK_TEXT(seen.error.text, "two processes are rank 1: rank 1 (");
    odd_rank = 0;
    odd_world = 5;
    fake_nccl_reset();
    run(3, NULL, several, NULL);
    CHECK_STATUS(seen.job, LLMPAR_ERR_MISMATCH);
    CHECK_TEXT(seen.error.text, "was started in a world of 5 ranks");
    CHECK_TEXT(seen.error.text, "in one of 3");
    rig_comm = NULL;
}

static int odd_how;
static llmpar_status odd_desc(const llmpar_nccl_desc *given, llmpar_ctx *ctx, llmpar_device *device, llmpar_comm **out)
{
    llmpar_nccl_desc desc;
    memset(&desc, 0, sizeof desc);
    if (given) desc = *given;
    const char *name = device->name;
    if (odd_how == 0 && ctx->rank == 1) desc.slice = 4096;
    if (odd_how == 1 && ctx->rank == 2) desc.fast = 1;
    if (odd_how == 2 && ctx->rank == 1) device->name = "cuda sm_70";
    if (odd_how == 3) device->place = ctx->rank == 1 ? "0000:3b:00.0" : "0000:5e:00.0";
    if (odd_how == 9) device->place = "0000:3b:00.0";
    if (odd_how == 4) { device->place = "0000:3b:00.0"; desc.one_device = 1; }
    if (odd_how == 5 && ctx->rank == 2) device->native_stream = NULL;
    if (odd_how == 6 && ctx->rank == 0) device->native_stream = NULL;
    if (odd_how == 7) desc.slice = 2;
    if (odd_how == 8) desc.silence = 0.2;
    llmpar_status st = llmpar_nccl_comm_create(ctx, device, &desc, out);
    device->name = name;
    return st;
}
TEST(wrong_descriptions)
{
    static const struct { llmpar_status status; const char *text; } want[] = {
        { LLMPAR_ERR_MISMATCH, "slice 4096" }, { LLMPAR_ERR_MISMATCH, "fast 1" }, { LLMPAR_ERR_MISMATCH, "has device cuda sm_70, rank 0" }, { LLMPAR_ERR_CONFIG, "have the same GPU, 0000:5e:00.0" }, { LLMPAR_OK, "" },
        { LLMPAR_ERR_UNSUPPORTED, "has no streams that NCCL could use" }, { LLMPAR_ERR_UNSUPPORTED, "has no streams that NCCL could use" }, { LLMPAR_ERR_ARGUMENT, "slice = 2 bytes" }, { LLMPAR_ERR_ARGUMENT, "silence = 0.2" }, { LLMPAR_OK, "" },
    };
    rig_comm = odd_desc;
    for (odd_how = 0; odd_how < (int)(sizeof want / sizeof want[0]); odd_how++) {
        fake_nccl_reset();
        elsewhere = odd_how == 9;
        run(3, NULL, several, NULL);
        elsewhere = 0;
        CHECK_STATUS(seen.job, want[odd_how].status);
        if (want[odd_how].text[0]) CHECK_TEXT(seen.error.text, want[odd_how].text);
    }
    rig_comm = NULL;
}

/* Rank 0 says why there is nowhere to meet, in the way in which it would have said where. */
TIMED(rank_0_cannot_listen)
{
    char directory[] = "/tmp/llmpar_nccl_XXXXXX", path[100];
    CHECK(mkdtemp(directory) != NULL);
    snprintf(path, sizeof path, "%s/meeting", directory);
    for (int by_file = 0; by_file < 2; by_file++) {
        llmpar_nccl_desc desc = { .file = by_file ? path : NULL, .deadline = 30 };
        double begin = test_clock();
        fake_nccl_reset();
        deaf = 1;
        run(3, &desc, several, NULL);
        deaf = 0;
        CHECK_STATUS(seen.job, LLMPAR_ERR_IO);
        CHECK_TEXT(seen.error.text, "rank 0 cannot listen for the others: Too many open files");
        CHECK_INT(seen.error.rank, 0);
        CHECK(test_clock() - begin < 15 * test_slow);
        CHECK(access(path, F_OK) != 0);
    }
    CHECK(rmdir(directory) == 0);
}

TIMED(rank_0_has_no_more_files)
{
    llmpar_nccl_desc desc = { .deadline = 60 };
    double begin = test_clock();
    fake_nccl_reset();
    full = 1;
    run(3, &desc, several, NULL);
    full = 0;
    CHECK_STATUS(seen.job, LLMPAR_ERR_IO);
    CHECK_TEXT(seen.error.text, "nccl: the meeting: rank 0 cannot take the connections of 3 ranks: Too many open files");
    CHECK(test_clock() - begin < 30 * test_slow);
    dry = 1;
    run(3, &desc, several, NULL);
    dry = 0;
    CHECK_TEXT(seen.error.text, "nccl: the system gives no pipe: Too many open files");
}

/* ---- strangers ---- */

typedef struct stranger { int port, how, stop; } stranger;
static void *knocks(void *arg)
{
    stranger *s = (stranger *)arg;
    char bytes[5000];
    int open_fd[8] = { -1, -1, -1, -1, -1, -1, -1, -1 }, next = 0;
    while (!__atomic_load_n(&s->stop, __ATOMIC_SEQ_CST)) {
        struct sockaddr_in a;
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        memset(&a, 0, sizeof a);
        a.sin_family = AF_INET;
        a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        a.sin_port = htons((uint16_t)s->port);
        memset(bytes, s->how == 2 ? 'l' : 0x5a, sizeof bytes);
        if (s->how == 2 || s->how == 4) memcpy(bytes, "llmparN1", 8); /* the right first word */
        if (s->how == 4) { /* of a hello without size and version; the key is the port */
            uint64_t key = (uint64_t)s->port;
            memset(bytes + 8, 0, 92);
            memcpy(bytes + 16, &key, sizeof key);
        }
        if (!connect(fd, (struct sockaddr *)&a, sizeof a) && s->how) send(fd, bytes, s->how == 3 ? 20 : s->how == 4 ? 100 : sizeof bytes, MSG_NOSIGNAL);
        if (open_fd[next] >= 0) close(open_fd[next]);
        open_fd[next] = fd;
        next = (next + 1) % 8;
        test_sleep(0.002 * test_slow);
    }
    for (int i = 0; i < 8; i++)
        if (open_fd[i] >= 0) close(open_fd[i]);
    return NULL;
}
TIMED(strangers_on_the_port)
{
    for (int how = 0; how < 4; how++) {
        stranger s = { port_free(), how, 0 };
        char address[64];
        pthread_t thread;
        snprintf(address, sizeof address, "127.0.0.1:%d", s.port);
        llmpar_nccl_desc desc = { .address = address, .deadline = 60 };
        fake_nccl_reset();
        pthread_create(&thread, NULL, knocks, &s);
        run(4, &desc, several, NULL);
        __atomic_store_n(&s.stop, 1, __ATOMIC_SEQ_CST);
        pthread_join(thread, NULL);
        if (seen.job) TEST_FAIL("kind %d: %s", how, seen.error.text);
    }
}

static llmpar_status late_comm(const llmpar_nccl_desc *desc, llmpar_ctx *ctx, llmpar_device *device, llmpar_comm **out)
{
    if (ctx->rank == 2) test_sleep(0.5 * test_slow);
    return llmpar_nccl_comm_create(ctx, device, desc, out);
}
TIMED(a_rank_of_another_build)
{
    stranger s = { port_free(), 4, 0 };
    char address[64];
    pthread_t thread;
    snprintf(address, sizeof address, "127.0.0.1:%d", s.port);
    llmpar_nccl_desc desc = { .address = address, .deadline = 60 };
    rig_comm = late_comm;
    fake_nccl_reset();
    pthread_create(&thread, NULL, knocks, &s);
    run(3, &desc, several, NULL);
    __atomic_store_n(&s.stop, 1, __ATOMIC_SEQ_CST);
    pthread_join(thread, NULL);
    rig_comm = NULL;
    CHECK_STATUS(seen.job, LLMPAR_ERR_MISMATCH);
    CHECK_TEXT(seen.error.text, "a rank of another build has come to rank 0: version 0 and a hello of 0 bytes");
}

/* ---- without memory ---- */

static int starved, starve_at;
static llmpar_status hungry(const llmpar_nccl_desc *desc, llmpar_ctx *ctx, llmpar_device *device, llmpar_comm **out)
{
    if (ctx->rank == starved) ctx->heap.fail_at = ctx->heap.calls + (uint64_t)starve_at;
    llmpar_status st = llmpar_nccl_comm_create(ctx, device, desc, out);
    ctx->heap.fail_at = 0;
    return st;
}
TIMED(set_up_without_memory)
{
    llmpar_nccl_desc desc = { .deadline = 20 };
    int in = open("/dev/null", O_RDONLY), stdin_was = dup(0);
    rig_comm = hungry;
    dup2(in, 0); /* what is zeroed is no connection: nobody closes descriptor 0 */
    for (starved = 0; starved < 2; starved++)
        for (starve_at = 1; starve_at < 60; starve_at++) {
            double begin = test_clock();
            fake_nccl_reset();
            run(2, &desc, several, NULL);
            if (test_clock() - begin > 4 * test_slow) TEST_FAIL("allocation %d of rank %d: the job took %g s to end", starve_at, starved, test_clock() - begin);
            if (fcntl(0, F_GETFD) < 0) TEST_FAIL("allocation %d of rank %d: descriptor 0 is closed", starve_at, starved);
            if (!seen.job) break;
            if (seen.job != LLMPAR_ERR_MEMORY) TEST_FAIL("allocation %d of rank %d: %s", starve_at, starved, seen.error.text);
        }
    CHECK(starve_at > 12 && starve_at < 60);
    rig_comm = NULL;
    if (stdin_was >= 0) dup2(stdin_was, 0);
    close(stdin_was);
    close(in);
}

static llmpar_status split_hungry(llmpar_ctx *ctx, void *user)
{
    llmpar_comm *part = NULL;
    if (ctx->rank == 1) ctx->heap.fail_at = ctx->heap.calls + (uint64_t)*(int *)user;
    llmpar_status st = llmpar_comm_split(ctx->comm, 0, 0, "all", &part);
    ctx->heap.fail_at = 0;
    if (!st) st = sum(ctx, "after");
    llmpar_comm_destroy(part);
    return st;
}
TEST(split_without_memory)
{
    int k = 1;
    for (; k < 20; k++) {
        fake_nccl_reset();
        run(3, NULL, split_hungry, &k);
        if (!seen.job) break;
        CHECK_STATUS(seen.job, LLMPAR_ERR_MEMORY);
        all_say(3, 1, "out of memory");
    }
    CHECK(k > 5 && k < 20);
}

TEST_LIST(T_(several_communicators_wait), T_(destroyed_in_any_order), T_(mismatches), T_(a_rank_returns_without_it), T_(a_message_of_another_size), T_(a_rank_fails), T_(a_rank_is_late), T_(a_connection_breaks), T_(a_rank_falls_silent), T_(nonsense_on_a_connection), T_(drops_of_what_is_not_its_own), T_(lies_on_a_connection),
          T_(nccl_fails), T_(nccl_init_fails), T_(an_old_nccl), T_(a_gpu_hangs), T_(wrong_ranks), T_(wrong_descriptions), T_(rank_0_cannot_listen), T_(rank_0_has_no_more_files), T_(strangers_on_the_port), T_(a_rank_of_another_build), T_(set_up_without_memory), T_(split_without_memory))
