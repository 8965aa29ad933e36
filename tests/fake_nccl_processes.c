/* fake_nccl_processes: the stand-in for NCCL between processes of one machine; fake_nccl.c is the one between threads, which checks more and breaks on demand. The same functions (fake_nccl/nccl.h), the same handles of
   streams (fake_nccl.h).

   The unique id is the name of a nameless file of rank 0's. All ranks map it: a ring of bytes for each pair of ranks and direction. Everything is messages, and they come as they were sent: the ranks have to make
   the same calls in the same order, whatever the communicator. A message of another size than expected is refused. No reductions of NCCL's own (`fast`). */
#include "fake_nccl.h"

#include <fcntl.h>
#include <nccl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { OPS_MOST = 4096, RANKS_MOST = 8, RING = 1 << 16, HEAD = sizeof(uint64_t) };

/* One writer, one reader; no lock that a killed process could hold. */
typedef struct ring {
    uint64_t written, read;
    unsigned char bytes[RING];
} ring;

typedef struct shared {
    int joined;
    ring ring[RANKS_MOST][RANKS_MOST]; /* from, to */
} shared;

typedef enum op_kind { OP_SEND, OP_RECV, OP_COPY } op_kind;

typedef struct op {
    op_kind kind;
    const unsigned char *from;
    unsigned char *to;
    size_t bytes, moved; /* moved: with the head */
    uint64_t head;       /* the message's bytes, as the sender says */
    int peer;            /* in the communicator */
} op;

typedef struct batch {
    struct batch *waiting; /* of those that their streams have not come to */
    const fake_nccl_stream *stream;
    struct ncclComm *comm;
    op *ops;
    int count, ended;
} batch;

struct ncclComm {
    shared *with;
    int rank, ranks, world[RANKS_MOST]; /* world: ranks there */
    int joins, aborted, dead, in_flight, finalized, looks; /* looks: for so many questions the last call is under way */
    ncclResult_t async;
    batch *now;                         /* of no stream with a thread */
    int asked, answer[RANKS_MOST][2];   /* a split: color and key of all */
    ncclComm_t *out;
    char error[200];
};

fake_nccl_state fake_nccl;
int (*fake_nccl_await)(void *stream, int (*ready)(void *arg), void (*done)(void *arg), void *arg);
void (*fake_nccl_moved)(void);
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static batch *enqueued;
static const batch *running; /* the one that has begun and not ended */

static __thread int depth;
static __thread batch *queued;
static __thread cudaStream_t queued_stream;
static __thread ncclResult_t queued_error;
static __thread int on_no_stream; /* a split */

void fake_nccl_reset(void) { memset(&fake_nccl, 0, sizeof fake_nccl); }

/* What NCCL refuses, or does not survive. */
static ncclResult_t misuse(const char *text)
{
    fake_nccl.misuse++;
    fprintf(stderr, "fake_nccl: %s\n", text);
    return ncclInvalidArgument;
}

/* ---- messages; all under the lock ---- */

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

static size_t put(ring *r, const unsigned char *from, size_t bytes)
{
    uint64_t at = r->written, read = __atomic_load_n(&r->read, __ATOMIC_ACQUIRE);
    size_t n = least(bytes, RING - (size_t)(at - read)), first = least(n, RING - (size_t)(at % RING));
    memcpy(r->bytes + at % RING, from, first);
    memcpy(r->bytes, from + first, n - first);
    __atomic_store_n(&r->written, at + n, __ATOMIC_RELEASE);
    return n;
}

static size_t get(ring *r, unsigned char *to, size_t bytes)
{
    uint64_t at = r->read, written = __atomic_load_n(&r->written, __ATOMIC_ACQUIRE);
    size_t n = least(bytes, (size_t)(written - at)), first = least(n, RING - (size_t)(at % RING));
    memcpy(to, r->bytes + at % RING, first);
    memcpy(to + first, r->bytes, n - first);
    __atomic_store_n(&r->read, at + n, __ATOMIC_RELEASE);
    return n;
}

/* 1: done. */
static int advance(ncclComm_t comm, op *o)
{
    int me = comm->world[comm->rank], peer = comm->world[o->peer];
    if (o->kind == OP_COPY) {
        if (o->to != o->from) memmove(o->to, o->from, o->bytes);
        return 1;
    }
    if (o->kind == OP_SEND) {
        ring *r = &comm->with->ring[me][peer];
        o->head = o->bytes;
        if (o->moved < HEAD) o->moved += put(r, (const unsigned char *)&o->head + o->moved, HEAD - o->moved);
        if (o->moved >= HEAD) o->moved += put(r, o->from + (o->moved - HEAD), o->bytes + HEAD - o->moved);
    } else {
        ring *r = &comm->with->ring[peer][me];
        if (o->moved < HEAD) o->moved += get(r, (unsigned char *)&o->head + o->moved, HEAD - o->moved);
        if (o->moved >= HEAD && o->head != o->bytes) {
            fake_nccl.mismatches++;
            snprintf(comm->error, sizeof comm->error, "message from %d to %d: %llu bytes sent, %zu expected", o->peer, comm->rank, (unsigned long long)o->head, o->bytes);
            if (!fake_nccl.quiet) fprintf(stderr, "fake_nccl: %s\n", comm->error);
            comm->async = ncclInvalidUsage;
            return 0;
        }
        if (o->moved >= HEAD) o->moved += get(r, o->to + (o->moved - HEAD), o->bytes + HEAD - o->moved);
    }
    return o->moved == o->bytes + HEAD;
}

static void progress(batch *b)
{
    unsigned char busy[2][RANKS_MOST]; /* the messages of a pair go one after the other */
    int left = 0;
    memset(busy, 0, sizeof busy);
    if (b->ended || b->comm->async != ncclSuccess) return;
    if (running != b && running) {
        fake_nccl.overlaps++;
        fprintf(stderr, "fake_nccl: two groups of a rank running at once\n");
    }
    running = b;
    for (int i = 0; i < b->count; i++) {
        op *o = &b->ops[i];
        if (o->moved == o->bytes + HEAD) continue;
        int done = !(o->kind != OP_COPY && busy[o->kind][o->peer]) && b->comm->async == ncclSuccess && advance(b->comm, o);
        if (done) o->moved = o->bytes + HEAD;
        else busy[o->kind][o->peer] = 1;
        left += !done;
    }
    b->ended = !left;
    if (b->ended) running = NULL;
}

static void batch_free(batch *b)
{
    if (running == b) running = NULL;
    free(b->ops);
    free(b);
}

static void comm_free(ncclComm_t comm)
{
    if (!comm->dead || comm->in_flight) return;
    if (comm->now) batch_free(comm->now);
    free(comm);
    fake_nccl.comms--;
}

static void unqueue(const batch *b)
{
    for (batch **at = &enqueued; *at; at = &(*at)->waiting)
        if (*at == b) {
            *at = b->waiting;
            return;
        }
}

static void batch_over(batch *b)
{
    ncclComm_t comm = b->comm;
    unqueue(b);
    batch_free(b);
    comm->in_flight--;
    comm_free(comm);
}

void fake_nccl_drop(const fake_nccl_stream *stream)
{
    pthread_mutex_lock(&lock);
    for (batch *b = enqueued, *next; b; b = next) {
        next = b->waiting;
        if (b->stream == stream) batch_over(b);
    }
    pthread_mutex_unlock(&lock);
}

/* ---- on a stream that has come to it ---- */

static int batch_ready(void *arg)
{
    batch *b = (batch *)arg;
    pthread_mutex_lock(&lock);
    if (!b->comm->aborted) progress(b);
    int ready = b->ended || b->comm->aborted;
    pthread_mutex_unlock(&lock);
    return ready;
}

static void batch_done(void *arg)
{
    pthread_mutex_lock(&lock);
    batch_over((batch *)arg);
    pthread_mutex_unlock(&lock);
}

static void nap(void)
{
    struct timespec t = { 0, 50000 };
    nanosleep(&t, NULL);
}

static void run_batch(void *arg)
{
    while (!batch_ready(arg)) nap();
    batch_done(arg);
}

/* Nobody tells a stream that asks of another process. */
static void *ticks(void *arg)
{
    (void)arg;
    for (;;) {
        nap();
        pthread_mutex_lock(&lock);
        int waiting = enqueued != NULL;
        pthread_mutex_unlock(&lock);
        if (waiting) fake_nccl_moved();
    }
    return NULL;
}

static void tick(void)
{
    static int started;
    pthread_t thread;
    if (!started++ && !pthread_create(&thread, NULL, ticks, NULL)) pthread_detach(thread);
}

/* ---- groups ---- */

ncclResult_t ncclGroupStart(void)
{
    depth++;
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd(void)
{
    if (--depth > 0) return ncclSuccess;
    batch *b = queued;
    ncclResult_t result = queued_error;
    const fake_nccl_stream *stream = fake_nccl_await ? NULL : (const fake_nccl_stream *)(const void *)queued_stream;
    queued = NULL;
    queued_error = ncclSuccess;
    if (!b) return result;
    pthread_mutex_lock(&lock);
    ncclComm_t comm = b->comm;
    if (!result) result = comm->async;
    if (!result && comm->now) result = ncclInvalidUsage; /* used again while under way */
    if (!result && comm->looks) result = misuse("a group on a communicator whose last call is under way");
    fake_nccl.groups++;
    if (result) {
        batch_free(b);
    } else if (!on_no_stream && (fake_nccl_await || (stream && stream->enqueue))) {
        comm->in_flight++;
        comm->looks = 1 + fake_nccl.groups % 3;
        b->stream = stream;
        b->waiting = enqueued;
        enqueued = b;
        if (fake_nccl_await) tick();
        pthread_mutex_unlock(&lock);
        int failed = fake_nccl_await ? fake_nccl_await(queued_stream, batch_ready, batch_done, b) : stream->enqueue(stream->device, stream->stream, run_batch, b);
        return failed ? ncclUnhandledCudaError : ncclInProgress;
    } else {
        progress(b);
        if (b->ended) batch_free(b);
        else comm->now = b, result = ncclInProgress;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

static void add(ncclComm_t comm, op_kind kind, const void *from, void *to, size_t bytes, int peer, cudaStream_t stream)
{
    if (!comm || peer < 0 || peer >= comm->ranks || (queued && (queued->comm != comm || queued_stream != stream || queued->count == OPS_MOST))) {
        queued_error = ncclInvalidArgument;
        return;
    }
    if (!queued) {
        queued = (batch *)calloc(1, sizeof *queued);
        queued->ops = (op *)calloc(OPS_MOST, sizeof *queued->ops);
        queued->comm = comm;
        queued_stream = stream;
    }
    op *o = &queued->ops[queued->count++];
    o->kind = kind;
    o->from = (const unsigned char *)from;
    o->to = (unsigned char *)to;
    o->bytes = bytes;
    o->peer = peer;
}

static size_t bytes_of(ncclDataType_t type, size_t count)
{
    static const size_t sizes[] = { 1, 1, 4, 4, 8, 8, 2, 4, 8, 2 };
    return sizes[type] * count;
}

ncclResult_t ncclSend(const void *send, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream)
{
    ncclGroupStart();
    add(comm, OP_SEND, send, NULL, bytes_of(type, count), peer, stream);
    return ncclGroupEnd();
}

ncclResult_t ncclRecv(void *recv, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream)
{
    ncclGroupStart();
    add(comm, OP_RECV, NULL, recv, bytes_of(type, count), peer, stream);
    return ncclGroupEnd();
}

ncclResult_t ncclAllGather(const void *send, void *recv, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream)
{
    size_t bytes = bytes_of(type, count);
    ncclGroupStart();
    for (int i = 0; comm && i < comm->ranks; i++) {
        unsigned char *to = (unsigned char *)recv + (size_t)i * bytes;
        if (i == comm->rank) add(comm, OP_COPY, send, to, bytes, i, stream);
        else {
            add(comm, OP_SEND, send, NULL, bytes, i, stream);
            add(comm, OP_RECV, NULL, to, bytes, i, stream);
        }
    }
    return ncclGroupEnd();
}

ncclResult_t ncclBroadcast(const void *send, void *recv, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream)
{
    size_t bytes = bytes_of(type, count);
    ncclGroupStart();
    for (int i = 0; comm && i < comm->ranks; i++) {
        if (comm->rank == root) add(comm, i == root ? OP_COPY : OP_SEND, send, recv, bytes, i, stream);
        else if (i == root) add(comm, OP_RECV, NULL, recv, bytes, i, stream);
    }
    return ncclGroupEnd();
}

ncclResult_t ncclReduceScatter(const void *send, void *recv, size_t count, ncclDataType_t type, ncclRedOp_t reduce, ncclComm_t comm, cudaStream_t stream)
{
    (void)send, (void)recv, (void)count, (void)type, (void)reduce, (void)comm, (void)stream;
    return ncclInvalidUsage;
}

ncclResult_t ncclAllReduce(const void *send, void *recv, size_t count, ncclDataType_t type, ncclRedOp_t reduce, ncclComm_t comm, cudaStream_t stream)
{
    return ncclReduceScatter(send, recv, count, type, reduce, comm, stream);
}

/* ---- communicators ---- */

ncclResult_t ncclGetVersion(int *version)
{
    *version = fake_nccl.version ? fake_nccl.version : NCCL_VERSION_CODE;
    return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id)
{
    static int file = -1; /* the last one's stays open: others open it by its name here */
    memset(id, 0, sizeof *id);
    if (file >= 0) close(file);
    file = memfd_create("fake_nccl", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, sizeof(shared))) return ncclSystemError;
    snprintf(id->internal, sizeof id->internal, "/proc/%ld/fd/%d", (long)getpid(), file);
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t result)
{
    static const char *const names[] = { "no error", "unhandled cuda error", "unhandled system error", "internal error", "invalid argument", "invalid usage", "remote process exited or there was a network error", "NCCL operation in progress" };
    return (unsigned)result < 8 ? names[result] : "unknown result code";
}

const char *ncclGetLastError(ncclComm_t comm) { return comm ? comm->error : ""; }

ncclResult_t ncclCommInitRankConfig(ncclComm_t *out, int ranks, ncclUniqueId id, int rank, ncclConfig_t *config)
{
    *out = NULL;
    if (ranks < 1 || ranks > RANKS_MOST || rank < 0 || rank >= ranks || config->blocking != 0) return ncclInvalidArgument;
    int file = open(id.internal, O_RDWR | O_CLOEXEC);
    void *map = file >= 0 ? mmap(NULL, sizeof(shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0) : MAP_FAILED; /* stays */
    if (file >= 0) close(file);
    if (map == MAP_FAILED) return ncclSystemError;
    ncclComm_t comm = (ncclComm_t)calloc(1, sizeof *comm);
    comm->with = (shared *)map;
    comm->rank = rank;
    comm->ranks = ranks;
    comm->joins = 1;
    for (int i = 0; i < ranks; i++) comm->world[i] = i;
    __atomic_add_fetch(&comm->with->joined, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_lock(&lock);
    fake_nccl.comms++;
    pthread_mutex_unlock(&lock);
    *out = comm;
    return ncclInProgress;
}

ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t *out, ncclConfig_t *config)
{
    *out = NULL;
    if (color < NCCL_SPLIT_NOCOLOR || config->blocking != 0) return ncclInvalidArgument;
    if (color == NCCL_SPLIT_NOCOLOR) return misuse("no color: NCCL 2.20 to 2.30 crash where such a split fails");
    if (comm->looks) return misuse("ncclCommSplit of a communicator whose last call is under way");
    if (comm->now || comm->in_flight || comm->asked) return ncclInvalidUsage; /* something is under way */
    comm->asked = 1;
    comm->out = out;
    comm->answer[comm->rank][0] = color;
    comm->answer[comm->rank][1] = key;
    on_no_stream = 1;
    ncclResult_t result = ncclAllGather(comm->answer[comm->rank], comm->answer, sizeof comm->answer[0], ncclInt8, comm, NULL);
    on_no_stream = 0;
    return result == ncclSuccess ? ncclInProgress : result;
}

/* All have said color and key. */
static void split(ncclComm_t comm)
{
    ncclComm_t made = (ncclComm_t)calloc(1, sizeof *made);
    int mine = comm->answer[comm->rank][0], member[RANKS_MOST];
    comm->asked = 0;
    for (int i = 0; i < comm->ranks; i++) {
        if (comm->answer[i][0] != mine) continue;
        int at = made->ranks++;
        for (; at > 0 && comm->answer[member[at - 1]][1] > comm->answer[i][1]; at--) member[at] = member[at - 1];
        member[at] = i;
    }
    for (int k = 0; k < made->ranks; k++) {
        made->world[k] = comm->world[member[k]];
        if (member[k] == comm->rank) made->rank = k;
    }
    made->with = comm->with;
    if (mine < 0) free(made);
    else *comm->out = made, fake_nccl.comms++;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *state)
{
    pthread_mutex_lock(&lock);
    if (comm->now) progress(comm->now);
    if (comm->now && comm->now->ended) {
        batch_free(comm->now);
        comm->now = NULL;
    }
    if (comm->asked && !comm->now) split(comm);
    *state = comm->async;
    if (comm->async == ncclSuccess && comm->looks > 0) comm->looks--, *state = ncclInProgress;
    else if (comm->async == ncclSuccess && (comm->now || (comm->joins && __atomic_load_n(&comm->with->joined, __ATOMIC_SEQ_CST) < comm->ranks))) *state = ncclInProgress;
    pthread_mutex_unlock(&lock);
    return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t comm)
{
    pthread_mutex_lock(&lock);
    comm->finalized = comm->looks = 1;
    pthread_mutex_unlock(&lock);
    return ncclInProgress;
}

static ncclResult_t end_comm(ncclComm_t comm, int aborts)
{
    pthread_mutex_lock(&lock);
    ncclResult_t result = !aborts && (!comm->finalized || comm->now) ? ncclInvalidUsage : ncclSuccess;
    comm->aborted = comm->dead = 1;
    comm_free(comm);
    pthread_mutex_unlock(&lock);
    if (fake_nccl_moved) fake_nccl_moved();
    return result;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) { return end_comm(comm, 0); }
ncclResult_t ncclCommAbort(ncclComm_t comm) { return end_comm(comm, 1); }

/* ---- memory ---- */

ncclResult_t ncclMemAlloc(void **out, size_t bytes)
{
    if (posix_memalign(out, 4096, bytes)) return ncclUnhandledCudaError;
    __atomic_add_fetch(&fake_nccl.blocks, 1, __ATOMIC_SEQ_CST);
    return ncclSuccess;
}

ncclResult_t ncclMemFree(void *memory)
{
    free(memory);
    if (memory) __atomic_sub_fetch(&fake_nccl.blocks, 1, __ATOMIC_SEQ_CST);
    return ncclSuccess;
}
