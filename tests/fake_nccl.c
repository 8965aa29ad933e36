/* fake_nccl: a CPU stand-in for NCCL: its functions (fake_nccl/nccl.h) between threads of one process. Data really moves, at the right place of the stream (fake_nccl.h says which handles it takes); communicators are
   non-blocking; calls that do not fit together (operation, count, type, root, size of a message) are refused with an error on all ranks and a line on stderr.

   As strict as NCCL where that can be told without a GPU (state.misuse): a communicator is let alone while a call on it is under way; buffers of a group are apart, or in place by the rules; no rank without color in a
   split, whose failure NCCL does not survive; the end of a communicator, in good order or not, waits for what its streams still hold of it, and for the other ranks' end of it.

   A group of operations is a batch. A communicator's batches run in order on each rank; an operation happens when its partners' are in batches that run too: the k-th collective of every rank, the next message of a
   pair. What real NCCL may or may not survive is an error here: two communicators' batches at once on one rank (launch order), groups on two streams. */
#include "fake_nccl.h"

#include <nccl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { OPS_MOST = 4096, RANKS_MOST = 512 };

typedef enum op_kind { OP_SEND, OP_RECV, OP_GATHER, OP_SCATTER, OP_REDUCE, OP_BROADCAST } op_kind;
static const char *const op_names[] = { "send", "recv", "all_gather", "reduce_scatter", "all_reduce", "broadcast" };

typedef struct op {
    op_kind kind;
    const void *send;
    void *recv;
    size_t count, item;
    ncclDataType_t type;
    ncclRedOp_t op;
    int peer, done; /* peer, or root */
    uint64_t index; /* of a collective on its communicator */
} op;

typedef struct batch {
    struct batch *next, *waiting; /* waiting: of those that their streams have not come to */
    const fake_nccl_stream *stream;
    struct ncclComm *comm;
    op *ops;
    int count, left, ended, started, hangs, detached; /* detached: nobody waits for it */
} batch;

/* The ranks of one communicator. */
typedef struct clique {
    struct clique *next;
    uint64_t id;
    int ranks, joined, holders;
    struct ncclComm *comm[RANKS_MOST];
    struct { int called, color, key; ncclComm_t *out; } split[RANKS_MOST];
    int split_called;
} clique;

struct ncclComm {
    clique *of;
    int rank, world_rank, aborted, dead, in_flight, finalized, asked, looks; /* asked: a split under way; looks: for so many questions the last call is under way */
    ncclResult_t async;
    batch *first, *last; /* running */
    uint64_t collectives;
    char error[256];
};

fake_nccl_state fake_nccl;
int (*fake_nccl_await)(void *stream, int (*ready)(void *arg), void (*done)(void *arg), void *arg);
void (*fake_nccl_moved)(void);
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t moved = PTHREAD_COND_INITIALIZER;
static clique *cliques;
static batch *enqueued;
static uint64_t next_id = 1;
static int groups_of[RANKS_MOST], running[RANKS_MOST]; /* by rank of the world */
static const void *running_on[RANKS_MOST];

static __thread int depth;
static __thread op *queued;
static __thread int queued_count;
static __thread ncclComm_t queued_comm;
static __thread cudaStream_t queued_stream;
static __thread ncclResult_t queued_error;

void fake_nccl_reset(void)
{
    pthread_mutex_lock(&lock);
    memset(&fake_nccl, 0, sizeof fake_nccl);
    memset(groups_of, 0, sizeof groups_of);
    pthread_mutex_unlock(&lock);
}

static size_t type_size(ncclDataType_t type)
{
    switch (type) {
    case ncclInt8: case ncclUint8: return 1;
    case ncclFloat16: case ncclBfloat16: return 2;
    case ncclInt32: case ncclUint32: case ncclFloat32: return 4;
    default: return 8;
    }
}

static void fail_clique(clique *c, ncclResult_t result, const char *text)
{
    for (int i = 0; i < c->ranks; i++)
        if (c->comm[i] && c->comm[i]->async == ncclSuccess) {
            c->comm[i]->async = result;
            snprintf(c->comm[i]->error, sizeof c->comm[i]->error, "%s", text);
        }
    pthread_cond_broadcast(&moved);
}

static void mismatch(clique *c, const char *text)
{
    fake_nccl.mismatches++;
    if (!fake_nccl.quiet) fprintf(stderr, "fake_nccl: %s\n", text);
    fail_clique(c, ncclInvalidUsage, text);
}

/* What NCCL refuses, or does not survive. */
static ncclResult_t misuse(ncclComm_t comm, const char *text)
{
    fake_nccl.misuse++;
    fprintf(stderr, "fake_nccl: rank %d: %s\n", comm->world_rank, text);
    return ncclInvalidArgument;
}

static int busy(ncclComm_t comm) { return comm->async == ncclSuccess && (comm->looks > 0 || comm->of->joined < comm->of->ranks || comm->asked); }

/* ---- data ---- */

static void add_up(const op *o, void *out, const void *const *in, int n)
{
    for (size_t i = 0; i < o->count; i++)
        for (int r = 0; r < n; r++) { /* NCCL's own order: here one after the other */
            if (o->type == ncclFloat32) {
                float *y = (float *)out + i, x = ((const float *)in[r])[i];
                *y = !r ? x : o->op == ncclMax ? (x > *y ? x : *y) : *y + x;
            } else if (o->type == ncclFloat64) {
                double *y = (double *)out + i, x = ((const double *)in[r])[i];
                *y = !r ? x : o->op == ncclMax ? (x > *y ? x : *y) : *y + x;
            } else {
                uint64_t *y = (uint64_t *)out + i, x = ((const uint64_t *)in[r])[i];
                *y = !r ? x : *y + x;
            }
        }
}

/* The same collective of all ranks. */
static void run_collective(clique *c, op **o)
{
    int n = c->ranks;
    size_t bytes = o[0]->count * o[0]->item;
    const void *in[RANKS_MOST];
    fake_nccl.bytes += bytes;
    switch (o[0]->kind) {
    case OP_GATHER:
        for (int r = 0; r < n; r++)
            for (int i = 0; i < n; i++) memmove((char *)o[r]->recv + (size_t)i * bytes, o[i]->send, bytes);
        break;
    case OP_BROADCAST:
        for (int r = 0; r < n; r++)
            if (o[r]->recv != o[o[0]->peer]->send) memmove(o[r]->recv, o[o[0]->peer]->send, bytes);
        break;
    default: { /* all results first: they may go where operands are */
        char *all = (char *)malloc((size_t)n * bytes + 1);
        for (int r = 0; r < n && (o[0]->kind == OP_SCATTER || !r); r++) {
            for (int i = 0; i < n; i++) in[i] = (const char *)o[i]->send + (o[0]->kind == OP_SCATTER ? (size_t)r * bytes : 0);
            add_up(o[0], all + (size_t)r * bytes, in, n);
        }
        for (int r = 0; r < n; r++) memcpy(o[r]->recv, all + (o[0]->kind == OP_SCATTER ? (size_t)r * bytes : 0), bytes);
        free(all);
    }
    }
}

/* ---- matching; all under the lock ---- */

static int is_message(const op *o) { return o->kind == OP_SEND || o->kind == OP_RECV; }

static void op_done(batch *b, op *o)
{
    o->done = 1;
    b->left--;
}

static int try_collective(clique *c, batch *b, op *o)
{
    op *all[RANKS_MOST];
    batch *of[RANKS_MOST];
    for (int r = 0; r < c->ranks; r++) {
        ncclComm_t comm = c->comm[r];
        all[r] = NULL;
        if (!comm || comm->aborted || !comm->first) return 0;
        of[r] = comm->first;
        if (of[r]->hangs) return 0;
        for (int i = 0; i < of[r]->count && !all[r]; i++)
            if (!is_message(&of[r]->ops[i]) && of[r]->ops[i].index == o->index) all[r] = &of[r]->ops[i];
        if (!all[r]) return 0;
    }
    (void)b;
    for (int r = 1; r < c->ranks; r++)
        if (all[r]->kind != all[0]->kind || all[r]->count != all[0]->count || all[r]->type != all[0]->type || all[r]->op != all[0]->op || all[r]->peer != all[0]->peer) {
            char text[240];
            snprintf(text, sizeof text, "collective %llu: rank 0: %s of %zu (type %d, op %d, root %d), rank %d: %s of %zu (type %d, op %d, root %d)", (unsigned long long)o->index, op_names[all[0]->kind], all[0]->count,
                     (int)all[0]->type, (int)all[0]->op, all[0]->peer, r, op_names[all[r]->kind], all[r]->count, (int)all[r]->type, (int)all[r]->op, all[r]->peer);
            mismatch(c, text);
            return 0;
        }
    run_collective(c, all);
    for (int r = 0; r < c->ranks; r++) op_done(of[r], all[r]);
    return 1;
}

static int try_message(clique *c, batch *b, op *o)
{
    ncclComm_t peer = c->comm[o->peer];
    op *other = NULL;
    if (!peer || peer->aborted || !peer->first || peer->first->hangs) return 0;
    for (int i = 0; i < peer->first->count && !other; i++) {
        op *p = &peer->first->ops[i];
        if (p->kind == OP_RECV && p->peer == b->comm->rank && !p->done) other = p;
    }
    if (!other) return 0;
    if (other->count * other->item != o->count * o->item) {
        char text[200];
        snprintf(text, sizeof text, "message from %d to %d: %zu bytes sent, %zu expected", b->comm->rank, o->peer, o->count * o->item, other->count * other->item);
        mismatch(c, text);
        return 0;
    }
    memcpy(other->recv, o->send, o->count * o->item);
    fake_nccl.bytes += o->count * o->item;
    op_done(peer->first, other);
    op_done(b, o);
    return 1;
}

static void start(batch *b)
{
    ncclComm_t comm = b->comm;
    if (!comm->first) {
        if (running[comm->world_rank]++ && running_on[comm->world_rank] != comm) {
            fake_nccl.overlaps++;
            fprintf(stderr, "fake_nccl: rank %d has groups of two communicators running at once\n", comm->world_rank);
        }
        running_on[comm->world_rank] = comm;
        comm->first = comm->last = b;
    } else {
        comm->last->next = b;
        comm->last = b;
    }
}

static void batch_free(batch *b)
{
    free(b->ops);
    free(b);
}

static void end_first(ncclComm_t comm)
{
    batch *b = comm->first;
    comm->first = b->next;
    b->ended = 1;
    if (!comm->first) {
        comm->last = NULL;
        running[comm->world_rank]--;
    }
    if (b->detached) batch_free(b);
    pthread_cond_broadcast(&moved);
}

static void progress(clique *c)
{
    for (int more = 1; more;) {
        more = 0;
        for (int r = 0; r < c->ranks; r++) {
            ncclComm_t comm = c->comm[r];
            if (!comm || comm->aborted || comm->async != ncclSuccess) continue;
            batch *b = comm->first;
            if (!b || b->hangs) continue;
            for (int i = 0; i < b->count && comm->async == ncclSuccess; i++) {
                op *o = &b->ops[i];
                if (o->done || o->kind == OP_RECV) continue;
                /* messages of a pair in order: the first that is not done */
                more |= is_message(o) ? try_message(c, b, o) : try_collective(c, b, o);
            }
        }
        for (int r = 0; r < c->ranks; r++)
            while (c->comm[r] && c->comm[r]->first && !c->comm[r]->first->left && !c->comm[r]->first->hangs) {
                end_first(c->comm[r]);
                more = 1;
            }
    }
}

static void comm_free(ncclComm_t comm)
{
    if (!comm->dead || comm->in_flight) return;
    clique *c = comm->of;
    c->comm[comm->rank] = NULL;
    free(comm);
    fake_nccl.comms--;
    if (--c->holders) return;
    for (clique **at = &cliques; *at; at = &(*at)->next)
        if (*at == c) {
            *at = c->next;
            break;
        }
    free(c);
}

static void unqueue(batch *b)
{
    for (batch **at = &enqueued; *at; at = &(*at)->waiting)
        if (*at == b) {
            *at = b->waiting;
            return;
        }
}

void fake_nccl_drop(const fake_nccl_stream *stream)
{
    pthread_mutex_lock(&lock);
    for (batch *b = enqueued, *next; b; b = next) {
        next = b->waiting;
        if (b->stream != stream) continue;
        unqueue(b);
        b->comm->in_flight--;
        comm_free(b->comm);
        batch_free(b);
    }
    pthread_cond_broadcast(&moved);
    pthread_mutex_unlock(&lock);
}

/* A batch whose stream has come to it. */
static void run_batch(void *arg)
{
    batch *b = (batch *)arg;
    ncclComm_t comm = b->comm;
    pthread_mutex_lock(&lock);
    unqueue(b);
    if (!comm->aborted) start(b);
    progress(comm->of);
    while (!b->ended && !comm->aborted) pthread_cond_wait(&moved, &lock); /* an error of its own does not end a kernel: that takes an abort */
    batch_free(b);
    comm->in_flight--;
    comm_free(comm);
    pthread_cond_broadcast(&moved);
    pthread_mutex_unlock(&lock);
}

/* The same on a stream that asks. */
static int batch_ready(void *arg)
{
    batch *b = (batch *)arg;
    pthread_mutex_lock(&lock);
    if (!b->started) {
        b->started = 1;
        if (!b->comm->aborted) start(b);
        progress(b->comm->of);
    }
    int ready = b->ended || b->comm->aborted;
    pthread_mutex_unlock(&lock);
    if (ready) fake_nccl_moved(); /* so may others be */
    return ready;
}

static void batch_done(void *arg)
{
    batch *b = (batch *)arg;
    pthread_mutex_lock(&lock);
    ncclComm_t comm = b->comm;
    batch_free(b);
    comm->in_flight--;
    comm_free(comm);
    pthread_cond_broadcast(&moved);
    pthread_mutex_unlock(&lock);
}

/* ---- groups ---- */

static int overlap(const void *a, size_t a_bytes, const void *b, size_t b_bytes)
{
    uintptr_t x = (uintptr_t)a, y = (uintptr_t)b;
    return a_bytes && b_bytes && x < y + b_bytes && y < x + a_bytes;
}

static size_t reads(const op *o, ncclComm_t comm)
{
    size_t bytes = o->count * o->item;
    return o->kind == OP_RECV || (o->kind == OP_BROADCAST && o->peer != comm->rank) ? 0 : o->kind == OP_SCATTER ? bytes * (size_t)comm->of->ranks : bytes;
}
static size_t writes(const op *o, ncclComm_t comm) { return o->kind == OP_SEND ? 0 : o->kind == OP_GATHER ? o->count * o->item * (size_t)comm->of->ranks : o->count * o->item; }

/* The operations of a group run side by side. */
static int apart(ncclComm_t comm, const op *ops, int count)
{
    for (int i = 0; i < count; i++) {
        const op *o = &ops[i];
        size_t own = (size_t)comm->rank * o->count * o->item;
        const char *in_place = (const char *)(o->kind == OP_SCATTER ? o->send : o->recv) + (o->kind == OP_GATHER || o->kind == OP_SCATTER ? own : 0);
        if (overlap(o->recv, writes(o, comm), o->send, reads(o, comm)) && in_place != (const char *)(o->kind == OP_SCATTER ? o->recv : o->send)) return 0;
        for (int k = 0; k < count && count <= 256; k++)
            if (k != i && (overlap(o->recv, writes(o, comm), ops[k].recv, writes(&ops[k], comm)) || overlap(o->recv, writes(o, comm), ops[k].send, reads(&ops[k], comm)))) return 0;
    }
    return 1;
}

ncclResult_t ncclGroupStart(void)
{
    depth++;
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd(void)
{
    if (--depth > 0) return ncclSuccess;
    ncclComm_t comm = queued_comm;
    ncclResult_t result = queued_error;
    op *ops = queued;
    int count = queued_count;
    const fake_nccl_stream *stream = fake_nccl_await ? NULL : (const fake_nccl_stream *)(const void *)queued_stream;
    int later = fake_nccl_await || (stream && stream->enqueue);
    queued = NULL;
    queued_comm = NULL;
    queued_count = 0;
    queued_error = ncclSuccess;
    if (!count || result) {
        free(ops);
        return result;
    }
    pthread_mutex_lock(&lock);
    batch *b = (batch *)calloc(1, sizeof *b);
    b->comm = comm;
    b->ops = ops;
    b->count = b->left = count;
    for (int i = 0; i < count; i++)
        if (!is_message(&ops[i])) ops[i].index = ++comm->collectives;
    fake_nccl.groups++;
    int number = ++groups_of[comm->world_rank];
    fake_nccl_kind kind = fake_nccl.rank == comm->world_rank && fake_nccl.at == number ? fake_nccl.kind : FAKE_NCCL_NOTHING;
    if (comm->async != ncclSuccess) result = comm->async;
    else if (busy(comm)) result = misuse(comm, "a group on a communicator whose last call is under way");
    else if (!apart(comm, ops, count)) result = misuse(comm, "buffers of a group overlap");
    else if (comm->first && !later) result = ncclInvalidUsage; /* used again while under way */
    else if (kind == FAKE_NCCL_REFUSES) result = ncclSystemError;
    b->hangs = kind == FAKE_NCCL_HANGS || kind == FAKE_NCCL_BREAKS;
    if (result) {
        snprintf(comm->error, sizeof comm->error, "the group was refused");
        batch_free(b);
    } else if (fake_nccl_await) {
        comm->in_flight++;
        comm->looks = 1 + number % 3;
        if (kind == FAKE_NCCL_BREAKS) comm->async = ncclRemoteError;
        pthread_mutex_unlock(&lock);
        return fake_nccl_await(queued_stream, batch_ready, batch_done, b) ? ncclUnhandledCudaError : ncclInProgress;
    } else if (later) {
        comm->in_flight++;
        comm->looks = 1 + number % 3;
        b->stream = stream;
        b->waiting = enqueued;
        enqueued = b;
        if (kind == FAKE_NCCL_BREAKS) comm->async = ncclRemoteError;
        pthread_mutex_unlock(&lock);
        return stream->enqueue(stream->device, stream->stream, run_batch, b) ? ncclUnhandledCudaError : ncclInProgress;
    } else {
        start(b);
        progress(comm->of);
        if (kind == FAKE_NCCL_BREAKS) comm->async = ncclRemoteError;
        result = b->ended ? ncclSuccess : ncclInProgress;
        if (b->ended) batch_free(b);
        else b->detached = 1;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

static ncclResult_t enqueue(ncclComm_t comm, cudaStream_t stream, op o)
{
    int alone = depth == 0;
    if (alone) depth = 1; /* a group of its own */
    if (!queued) queued = (op *)calloc(OPS_MOST, sizeof *queued);
    if (queued_count == OPS_MOST) queued_error = ncclInternalError;
    else if (!comm || (queued_comm && (queued_comm != comm || queued_stream != stream)) || o.peer < 0 || o.peer >= comm->of->ranks) queued_error = ncclInvalidArgument;
    else {
        queued_comm = comm;
        queued_stream = stream;
        o.item = type_size(o.type);
        queued[queued_count++] = o;
    }
    return alone ? ncclGroupEnd() : ncclSuccess;
}

static op make(op_kind kind, const void *send, void *recv, size_t count, ncclDataType_t type, ncclRedOp_t reduce, int peer)
{
    op o;
    memset(&o, 0, sizeof o);
    o.kind = kind;
    o.send = send;
    o.recv = recv;
    o.count = count;
    o.type = type;
    o.op = reduce;
    o.peer = peer;
    return o;
}

ncclResult_t ncclSend(const void *send, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) { return enqueue(comm, stream, make(OP_SEND, send, NULL, count, type, ncclSum, peer)); }
ncclResult_t ncclRecv(void *recv, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) { return enqueue(comm, stream, make(OP_RECV, NULL, recv, count, type, ncclSum, peer)); }
ncclResult_t ncclAllGather(const void *send, void *recv, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream) { return enqueue(comm, stream, make(OP_GATHER, send, recv, count, type, ncclSum, 0)); }
ncclResult_t ncclReduceScatter(const void *send, void *recv, size_t count, ncclDataType_t type, ncclRedOp_t reduce, ncclComm_t comm, cudaStream_t stream) { return enqueue(comm, stream, make(OP_SCATTER, send, recv, count, type, reduce, 0)); }
ncclResult_t ncclAllReduce(const void *send, void *recv, size_t count, ncclDataType_t type, ncclRedOp_t reduce, ncclComm_t comm, cudaStream_t stream) { return enqueue(comm, stream, make(OP_REDUCE, send, recv, count, type, reduce, 0)); }
ncclResult_t ncclBroadcast(const void *send, void *recv, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream) { return enqueue(comm, stream, make(OP_BROADCAST, send, recv, count, type, ncclSum, root)); }

/* ---- communicators ---- */

ncclResult_t ncclGetVersion(int *version)
{
    *version = fake_nccl.version ? fake_nccl.version : NCCL_VERSION_CODE;
    return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id)
{
    memset(id, 0, sizeof *id);
    pthread_mutex_lock(&lock);
    uint64_t number = next_id++;
    pthread_mutex_unlock(&lock);
    memcpy(id->internal, &number, sizeof number);
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t result)
{
    static const char *const names[] = { "no error", "unhandled cuda error", "unhandled system error", "internal error", "invalid argument", "invalid usage", "remote process exited or there was a network error", "NCCL operation in progress" };
    return (unsigned)result < 8 ? names[result] : "unknown result code";
}

const char *ncclGetLastError(ncclComm_t comm) { return comm ? comm->error : ""; }

static ncclComm_t comm_make(clique *c, int rank, int world_rank)
{
    ncclComm_t comm = (ncclComm_t)calloc(1, sizeof *comm);
    comm->of = c;
    comm->rank = rank;
    comm->world_rank = world_rank;
    c->comm[rank] = comm;
    c->holders++;
    c->joined++;
    fake_nccl.comms++;
    return comm;
}

static clique *clique_make(uint64_t id, int ranks)
{
    clique *c = (clique *)calloc(1, sizeof *c);
    c->id = id;
    c->ranks = ranks;
    c->next = cliques;
    cliques = c;
    return c;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *out, int ranks, ncclUniqueId id, int rank, ncclConfig_t *config)
{
    uint64_t number;
    clique *c;
    memcpy(&number, id.internal, sizeof number);
    *out = NULL;
    if (ranks < 1 || ranks > RANKS_MOST || rank < 0 || rank >= ranks || config->size != sizeof *config || config->magic != 0xcafebeefu || config->blocking != 0) return ncclInvalidArgument;
    pthread_mutex_lock(&lock);
    int faulty = fake_nccl.rank == rank;
    if (faulty && fake_nccl.kind == FAKE_NCCL_INIT_REFUSES) {
        pthread_mutex_unlock(&lock);
        return ncclSystemError;
    }
    for (c = cliques; c && c->id != number; c = c->next) {}
    if (!c) c = clique_make(number, ranks);
    ncclResult_t result = c->ranks != ranks || c->comm[rank] ? ncclInvalidUsage : ncclInProgress;
    if (result == ncclInProgress) {
        *out = comm_make(c, rank, rank);
        if (faulty && fake_nccl.kind == FAKE_NCCL_INIT_HANGS) c->joined -= RANKS_MOST;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

/* All have called: the new communicators. */
static void split_all(clique *c)
{
    for (int i = 0; i < c->ranks; i++) {
        int member[RANKS_MOST], n = 0;
        if (!c->split[i].called || c->split[i].color < 0) continue;
        for (int j = 0; j < c->ranks; j++) {
            if (c->split[j].color != c->split[i].color) continue;
            int at = n++;
            for (; at > 0 && c->split[member[at - 1]].key > c->split[j].key; at--) member[at] = member[at - 1];
            member[at] = j;
        }
        clique *made = clique_make(next_id++, n);
        for (int k = 0; k < n; k++) {
            *c->split[member[k]].out = comm_make(made, k, c->comm[member[k]]->world_rank);
            c->split[member[k]].called = 0;
        }
    }
    for (int i = 0; i < c->ranks; i++) {
        c->split[i].called = 0;
        c->comm[i]->asked = 0;
    }
    c->split_called = 0;
}

ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t *out, ncclConfig_t *config)
{
    ncclResult_t result = ncclInProgress;
    *out = NULL;
    if (color < NCCL_SPLIT_NOCOLOR || config->size != sizeof *config) return ncclInvalidArgument;
    pthread_mutex_lock(&lock);
    clique *c = comm->of;
    if (comm->async != ncclSuccess) result = comm->async;
    else if (busy(comm)) result = misuse(comm, "ncclCommSplit of a communicator whose last call is under way");
    else if (color == NCCL_SPLIT_NOCOLOR) result = misuse(comm, "no color: NCCL 2.20 to 2.30 crash where such a split fails");
    else if (comm->first || comm->in_flight) result = ncclInvalidUsage; /* something is under way */
    else {
        comm->asked = 1;
        c->split[comm->rank].called = 1;
        c->split[comm->rank].color = color;
        c->split[comm->rank].key = key;
        c->split[comm->rank].out = out;
        if (++c->split_called == c->ranks) split_all(c);
    }
    pthread_mutex_unlock(&lock);
    return result;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *state)
{
    pthread_mutex_lock(&lock);
    *state = comm->async;
    if (comm->async == ncclSuccess && comm->looks > 0) comm->looks--, *state = ncclInProgress;
    else if (comm->async == ncclSuccess && (comm->of->joined < comm->of->ranks || comm->asked || (comm->first && !comm->in_flight))) *state = ncclInProgress;
    pthread_mutex_unlock(&lock);
    return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t comm)
{
    pthread_mutex_lock(&lock);
    ncclResult_t result = comm->async != ncclSuccess ? comm->async : busy(comm) ? ncclInvalidArgument : ncclInProgress;
    if (result == ncclInProgress) comm->finalized = comm->looks = 1;
    else comm->async = result;
    pthread_cond_broadcast(&moved);
    pthread_mutex_unlock(&lock);
    return result;
}

/* A communicator ends when its streams have come past it, and no peer is connected any more. */
static int held(ncclComm_t comm)
{
    const clique *c = comm->of;
    if (comm->in_flight && running[comm->world_rank]) return 1; /* behind another communicator's, which waits for a partner */
    for (int i = 0; i < c->ranks && c->joined >= c->ranks; i++)
        if (c->comm[i] && !c->comm[i]->finalized && !c->comm[i]->aborted) return 1;
    return 0;
}

static ncclResult_t end_comm(ncclComm_t comm, int aborts)
{
    pthread_mutex_lock(&lock);
    ncclResult_t result = !aborts && (!comm->finalized || comm->first || busy(comm)) ? misuse(comm, "ncclCommDestroy before ncclCommFinalize is done") : ncclSuccess;
    struct timespec limit;
    int late = 0;
    clock_gettime(CLOCK_REALTIME, &limit);
    limit.tv_sec += 15;
    comm->aborted = 1;
    if (comm->asked) {
        comm->of->split[comm->rank].called = 0;
        comm->of->split_called -= RANKS_MOST; /* it will never take place */
    }
    while (comm->first) end_first(comm);
    pthread_cond_broadcast(&moved);
    if (fake_nccl_moved) {
        pthread_mutex_unlock(&lock);
        fake_nccl_moved();
        pthread_mutex_lock(&lock);
    }
    while (!late && held(comm)) late = pthread_cond_timedwait(&moved, &lock, &limit) != 0;
    if (late) (void)misuse(comm, "the end of a communicator would last for ever");
    comm->dead = 1;
    comm_free(comm);
    pthread_mutex_unlock(&lock);
    return result;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) { return end_comm(comm, 0); }
ncclResult_t ncclCommAbort(ncclComm_t comm) { return end_comm(comm, 1); }

/* ---- memory ---- */

ncclResult_t ncclMemAlloc(void **out, size_t bytes)
{
    if (fake_nccl.kind == FAKE_NCCL_NO_MEMORY || posix_memalign(out, 4096, bytes)) return ncclUnhandledCudaError;
    memset(*out, 0xff, bytes);
    __atomic_add_fetch(&fake_nccl.blocks, 1, __ATOMIC_SEQ_CST);
    return ncclSuccess;
}

ncclResult_t ncclMemFree(void *memory)
{
    free(memory);
    if (memory) __atomic_sub_fetch(&fake_nccl.blocks, 1, __ATOMIC_SEQ_CST);
    return ncclSuccess;
}
