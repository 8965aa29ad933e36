/* collectives: the collectives of comm.h as NCCL operations and device operations on the call's stream.

   Exact reductions go on with the tree over the rank index by halves (tables/halving.h).
   A level is one group of ncclSend and ncclRecv, straight from where the parts are, and a tree_sum of two operands a part. A slice at a time, so scratch is bounded. What is small takes one exchange with everybody
   and one tree_sum of n operands instead: the same tree.
   All-reduce: the same on parts of about equal length, then the parts go to everybody.

   Calls of many blocks are packed rank by rank in scratch, so that NCCL sees a few large messages. All collectives of a rank are chained by an event (nccl.h), so there is one scratch.

   Scratch:   | a: what reductions have (1 part) | b: .. and receive (1 part) | c: packed blocks (1 part) |      a part: one slice, and a little */
#include "nccl/nccl.h"
#include "nccl/nccl_internal.h"

#include <string.h>

#define LLMPAR__NCCL_GROUPED 8                 /* so many blocks go one by one, in a group */
#define LLMPAR__NCCL_DIRECT ((size_t)256 << 10) /* bytes that a rank may get from all others for a reduction in one exchange */
#define LLMPAR__NCCL_GRAIN ((size_t)256)

/* One call under way. */
typedef struct llmpar__nccl_job {
    llmpar__nccl_comm *tc;
    llmpar_device *device;
    llmpar_stream *stream;
    cudaStream_t native;
    llmpar_call call;
    size_t n, r, blocks, count, item, part; /* part: bytes of a block of one rank */
    char *a, *b, *c;
} llmpar__nccl_job;

/* A slice of a reduction: part j of this rank's input. */
typedef struct llmpar__nccl_slice {
    const char *base;
    size_t stride, count; /* stride > 0: part j is `count` elements at j * stride bytes; 0: piece j of `count` elements */
    void *out;            /* this rank's part of the result */
} llmpar__nccl_slice;

static size_t llmpar__nccl_min(size_t a, size_t b) { return a < b ? a : b; }
static size_t llmpar__nccl_round(size_t bytes) { return (bytes + LLMPAR__NCCL_GRAIN - 1) / LLMPAR__NCCL_GRAIN * LLMPAR__NCCL_GRAIN; }

/* Of a slice of n parts a rank keeps at most (n + 1) / 2 + 1 at once; rounding up a part costs less than a grain. All parts of a slice, each rounded, fit too. */
LLMPAR__PRIVATE_DEF size_t llmpar__nccl_part_bytes(size_t slice, int32_t ranks) { return llmpar__nccl_round(slice) + ((size_t)ranks + 2) * LLMPAR__NCCL_GRAIN; }

static size_t llmpar__nccl_piece(const llmpar__nccl_job *job, const llmpar__nccl_slice *s, size_t j, size_t *count)
{
    if (s->stride) {
        *count = s->count;
        return j * s->stride;
    }
    size_t begin = (size_t)llmpar_piece_begin((int64_t)j, (int64_t)s->count, (int64_t)job->n);
    *count = (size_t)llmpar_piece_begin((int64_t)j + 1, (int64_t)s->count, (int64_t)job->n) - begin;
    return begin * job->item;
}

/* ---- NCCL's side ---- */

/* Between these two, calls of NCCL; results are joined by llmpar__nccl_also. */
static llmpar_status llmpar__nccl_group_begin(llmpar__nccl_job *job, ncclResult_t *result)
{
    llmpar_status st = llmpar__nccl_sound(job->tc, &job->call);
    if (st) return st;
    pthread_mutex_lock(&job->tc->world->nccl_lock);
    *result = job->tc->nccl ? ncclGroupStart() : ncclInvalidUsage;
    if (job->tc->nccl) return LLMPAR_OK;
    pthread_mutex_unlock(&job->tc->world->nccl_lock); /* aborted just now */
    return llmpar__nccl_settle(job->tc, &job->call, "ncclGroupStart", ncclInvalidUsage);
}

static void llmpar__nccl_also(ncclResult_t *result, ncclResult_t one)
{
    if (one != ncclSuccess && one != ncclInProgress && *result == ncclSuccess) *result = one;
}

static llmpar_status llmpar__nccl_group_end(llmpar__nccl_job *job, ncclResult_t result, const char *what)
{
    ncclResult_t end = ncclGroupEnd();
    pthread_mutex_unlock(&job->tc->world->nccl_lock);
    return llmpar__nccl_settle(job->tc, &job->call, what, result != ncclSuccess ? result : end);
}

static void llmpar__nccl_send_part(llmpar__nccl_job *job, ncclResult_t *result, const void *from, size_t bytes, size_t to)
{
    if (bytes) llmpar__nccl_also(result, ncclSend(from, bytes, ncclInt8, (int)to, job->tc->nccl, job->native));
}

static void llmpar__nccl_recv_part(llmpar__nccl_job *job, ncclResult_t *result, void *to, size_t bytes, size_t from)
{
    if (bytes) llmpar__nccl_also(result, ncclRecv(to, bytes, ncclInt8, (int)from, job->tc->nccl, job->native));
}

/* Part i of `in` goes to rank i (one part for all: stride_in 0), and its own for this rank to out + i * stride_out; this rank's own too. */
static llmpar_status llmpar__nccl_exchange(llmpar__nccl_job *job, const char *in, size_t stride_in, char *out, size_t stride_out, size_t bytes)
{
    ncclResult_t result;
    llmpar_status st = LLMPAR_OK;
    const char *own = in + job->r * stride_in;
    if (own != out + job->r * stride_out && bytes) st = job->device->copy(job->device, job->stream, out + job->r * stride_out, own, bytes);
    if (!st) st = llmpar__nccl_group_begin(job, &result);
    if (st) return st;
    for (size_t k = 1; k < job->n; k++) {
        size_t to = (job->r + k) % job->n, from = (job->r + job->n - k) % job->n;
        llmpar__nccl_send_part(job, &result, in + to * stride_in, bytes, to);
        llmpar__nccl_recv_part(job, &result, out + from * stride_out, bytes, from);
    }
    return llmpar__nccl_group_end(job, result, "ncclSend, ncclRecv");
}

static llmpar_status llmpar__nccl_gather(llmpar__nccl_job *job, const char *in, char *out, size_t bytes, size_t blocks)
{
    ncclResult_t result;
    llmpar_status st = llmpar__nccl_group_begin(job, &result);
    if (st) return st;
    for (size_t i = 0; i < blocks; i++) llmpar__nccl_also(&result, ncclAllGather(in + i * bytes, out + i * bytes * job->n, bytes, ncclInt8, job->tc->nccl, job->native));
    return llmpar__nccl_group_end(job, result, "ncclAllGather");
}

/* ---- the device's side ---- */

static llmpar_status llmpar__nccl_combine(llmpar__nccl_job *job, const void *const *in, int32_t n, size_t count, void *out)
{
    llmpar_tree_sum_args args;
    if (!count) return LLMPAR_OK;
    memset(&args, 0, sizeof args);
    args.in = in;
    args.n = n;
    args.count = count;
    args.out = out;
    args.dtype = (llmpar_dtype)job->call.dtype;
    return job->call.reduce == LLMPAR_MAX ? job->device->max(job->device, job->stream, &args) : job->device->tree_sum(job->device, job->stream, &args);
}

/* `blocks` blocks of one rank between [blocks][n][count] (at its place) and [blocks][count]. */
static llmpar_status llmpar__nccl_rows(llmpar__nccl_job *job, int packs, char *spread, char *packed, size_t blocks)
{
    llmpar_copy_rows_args args;
    memset(&args, 0, sizeof args);
    args.rows = (int64_t)blocks;
    args.width = (int64_t)job->count;
    args.ld_in = (int64_t)(packs ? job->n * job->count : job->count);
    args.ld_out = (int64_t)(packs ? job->count : job->n * job->count);
    args.size = job->item;
    args.in = packs ? spread : packed;
    args.out = packs ? packed : spread;
    return job->device->copy_rows(job->device, job->stream, &args);
}

/* Blocks that are packed at a time; 0: they go one by one. */
static size_t llmpar__nccl_chunk(const llmpar__nccl_job *job)
{
    size_t fit = job->part ? job->tc->world->desc.slice / (job->part * job->n) : 0;
    return job->blocks <= LLMPAR__NCCL_GROUPED || fit < 2 ? 0 : llmpar__nccl_min(fit, job->blocks);
}

/* ---- reductions ---- */

/* One slice, by exchange with everybody. Fits. */
static llmpar_status llmpar__nccl_at_once(llmpar__nccl_job *job, const llmpar__nccl_slice *s, size_t room)
{
    const void *in[LLMPAR__NCCL_DIRECT / LLMPAR__NCCL_GRAIN];
    ncclResult_t result;
    size_t mine, count, own = llmpar__nccl_piece(job, s, job->r, &mine);
    llmpar_status st = llmpar__nccl_group_begin(job, &result);
    if (st) return st;
    for (size_t k = 1; k < job->n; k++) {
        size_t to = (job->r + k) % job->n, from = (job->r + job->n - k) % job->n, offset = llmpar__nccl_piece(job, s, to, &count);
        llmpar__nccl_send_part(job, &result, s->base + offset, count * job->item, to);
        llmpar__nccl_recv_part(job, &result, job->a + from * room, mine * job->item, from);
    }
    st = llmpar__nccl_group_end(job, result, "ncclSend, ncclRecv");
    for (size_t i = 0; i < job->n; i++) in[i] = i == job->r ? s->base + own : job->a + i * room;
    return st ? st : llmpar__nccl_combine(job, in, (int32_t)job->n, mine, s->out);
}

static llmpar_status llmpar__nccl_halve(llmpar__nccl_job *job, const llmpar__nccl_slice *s)
{
    llmpar__nccl_comm *tc = job->tc;
    size_t n = job->n, room = llmpar__nccl_round((s->stride ? s->count : (s->count + n - 1) / n) * job->item), count;
    ncclResult_t result;
    llmpar_status st = LLMPAR_OK;
    if (n * room <= LLMPAR__NCCL_DIRECT && n * room <= tc->world->part_bytes) return llmpar__nccl_at_once(job, s, room);
    if (n == 1) return s->out == s->base ? LLMPAR_OK : job->device->copy(job->device, job->stream, s->out, s->base, s->count * job->item);
    char *partial = job->a, *incoming = job->b;
    int32_t held = (int32_t)n, levels = tc->halving.levels, *kept = tc->halving.kept;
    for (int32_t i = 0; i < held; i++) kept[i] = i;
    for (int32_t l = 0; l < levels && !st; l++) {
        const llmpar_halving_level *level = &tc->halving.level[l];
        const int32_t *label = tc->halving.label + (size_t)l * n;
        int32_t mine = level->mine, keeps = 0;
        st = llmpar__nccl_group_begin(job, &result);
        if (st) return st;
        for (int32_t i = 0; i < held; i++) {
            size_t offset = llmpar__nccl_piece(job, s, (size_t)kept[i], &count);
            const char *from = l ? partial + (size_t)i * room : s->base + offset;
            int32_t c = label[kept[i]];
            if (c == mine) llmpar__nccl_recv_part(job, &result, incoming + (size_t)keeps++ * room, count * job->item, (size_t)level->partner);
            else llmpar__nccl_send_part(job, &result, from, count * job->item, (size_t)(level->lo + c));
        }
        st = llmpar__nccl_group_end(job, result, "ncclSend, ncclRecv");
        keeps = 0;
        for (int32_t i = 0; i < held && !st; i++) {
            if (label[kept[i]] != mine) continue;
            size_t offset = llmpar__nccl_piece(job, s, (size_t)kept[i], &count);
            const void *own = l ? partial + (size_t)i * room : s->base + offset, *theirs = incoming + (size_t)keeps * room, *in[2];
            in[0] = level->left ? own : theirs;
            in[1] = level->left ? theirs : own;
            st = llmpar__nccl_combine(job, in, 2, count, l + 1 == levels ? s->out : (void *)(partial + (size_t)keeps * room));
            kept[keeps++] = kept[i];
        }
        held = keeps;
    }
    return st;
}

static int llmpar__nccl_is_fast(const llmpar__nccl_job *job) { return job->tc->world->desc.fast && job->call.reduce == LLMPAR_SUM; }

static ncclDataType_t llmpar__nccl_type(const llmpar__nccl_job *job)
{
    switch (job->call.dtype) {
    case LLMPAR_F32: return ncclFloat32;
    case LLMPAR_F64: return ncclFloat64;
    case LLMPAR_I64: return ncclInt64;
    default: return ncclUint64;
    }
}

/* [n][count] at `send` (parts `stride` bytes apart) -> [count] at recv. */
static llmpar_status llmpar__nccl_scatter_block(llmpar__nccl_job *job, const char *send, size_t count, char *recv)
{
    size_t step = job->tc->world->desc.slice / job->item / job->n;
    llmpar__nccl_slice s;
    llmpar_status st = LLMPAR_OK;
    if (!step) step = 1;
    memset(&s, 0, sizeof s);
    s.stride = count * job->item;
    for (size_t at = 0; at < count && !st; at += step) {
        s.base = send + at * job->item;
        s.count = llmpar__nccl_min(step, count - at);
        s.out = recv + at * job->item;
        st = llmpar__nccl_halve(job, &s);
    }
    return st;
}

static llmpar_status llmpar__nccl_fast_scatter(llmpar__nccl_job *job, const char *send, char *recv, size_t count, size_t blocks)
{
    ncclResult_t result;
    llmpar_status st = llmpar__nccl_group_begin(job, &result);
    if (st) return st;
    for (size_t i = 0; i < blocks; i++)
        llmpar__nccl_also(&result, ncclReduceScatter(send + i * job->n * count * job->item, recv + i * count * job->item, count, llmpar__nccl_type(job), ncclSum, job->tc->nccl, job->native));
    return llmpar__nccl_group_end(job, result, "ncclReduceScatter");
}

static llmpar_status llmpar__nccl_do_reduce_scatter(llmpar__nccl_job *job, const char *send, char *recv)
{
    size_t chunk = llmpar__nccl_chunk(job), n = job->n;
    llmpar_status st = LLMPAR_OK;
    if (!chunk && llmpar__nccl_is_fast(job)) {
        for (size_t i = 0; i < job->blocks && !st; i += LLMPAR__NCCL_GROUPED)
            st = llmpar__nccl_fast_scatter(job, send + i * n * job->part, recv + i * job->part, job->count, llmpar__nccl_min(LLMPAR__NCCL_GROUPED, job->blocks - i));
        return st;
    }
    for (size_t i = 0; i < job->blocks && !chunk && !st; i++) st = llmpar__nccl_scatter_block(job, send + i * n * job->part, job->count, recv + i * job->part);
    for (size_t i = 0; i < job->blocks && chunk && !st; i += chunk) {
        size_t now = llmpar__nccl_min(chunk, job->blocks - i), packed = now * job->part;
        for (size_t k = 0; k < n && !st; k++) st = llmpar__nccl_rows(job, 1, (char *)(uintptr_t)send + (i * n + k) * job->part, job->c + k * packed, now);
        if (!st) st = llmpar__nccl_is_fast(job) ? llmpar__nccl_fast_scatter(job, job->c, recv + i * job->part, now * job->count, 1) : llmpar__nccl_scatter_block(job, job->c, now * job->count, recv + i * job->part);
    }
    return st;
}

static llmpar_status llmpar__nccl_do_all_reduce(llmpar__nccl_job *job, const char *send, char *recv)
{
    size_t n = job->n, r = job->r, total = job->count * job->blocks, step = job->tc->world->desc.slice / job->item;
    ncclResult_t result;
    llmpar__nccl_slice s;
    llmpar_status st = LLMPAR_OK;
    if (llmpar__nccl_is_fast(job)) {
        st = llmpar__nccl_group_begin(job, &result);
        if (st) return st;
        llmpar__nccl_also(&result, ncclAllReduce(send, recv, total, llmpar__nccl_type(job), ncclSum, job->tc->nccl, job->native));
        return llmpar__nccl_group_end(job, result, "ncclAllReduce");
    }
    size_t bytes = total * job->item, room = llmpar__nccl_round(bytes);
    if (n * room <= LLMPAR__NCCL_DIRECT && n * room <= job->tc->world->part_bytes) { /* everybody adds everything up */
        const void *in[LLMPAR__NCCL_DIRECT / LLMPAR__NCCL_GRAIN];
        st = llmpar__nccl_gather(job, send, job->a, bytes, 1);
        for (size_t i = 0; i < n; i++) in[i] = job->a + i * bytes;
        return st ? st : llmpar__nccl_combine(job, in, (int32_t)n, total, recv);
    }
    if (step < n) step = n;
    memset(&s, 0, sizeof s);
    for (size_t at = 0; at < total && !st; at += step) {
        size_t mine, theirs;
        s.base = send + at * job->item;
        s.count = llmpar__nccl_min(step, total - at);
        char *out = recv + at * job->item, *own = out + llmpar__nccl_piece(job, &s, r, &mine);
        s.out = own;
        st = llmpar__nccl_halve(job, &s);
        if (!st && s.count % n == 0) {
            st = llmpar__nccl_gather(job, own, out, mine * job->item, 1);
        } else if (!st) {
            st = llmpar__nccl_group_begin(job, &result);
            if (st) return st;
            for (size_t k = 1; k < n; k++) {
                size_t from = (r + n - k) % n, offset = llmpar__nccl_piece(job, &s, from, &theirs);
                llmpar__nccl_send_part(job, &result, own, mine * job->item, (r + k) % n);
                llmpar__nccl_recv_part(job, &result, out + offset, theirs * job->item, from);
            }
            st = llmpar__nccl_group_end(job, result, "ncclSend, ncclRecv");
        }
    }
    return st;
}

/* ---- the others ---- */

static llmpar_status llmpar__nccl_do_all_gather(llmpar__nccl_job *job, const char *send, char *recv)
{
    size_t chunk = llmpar__nccl_chunk(job), n = job->n;
    llmpar_status st = LLMPAR_OK;
    for (size_t i = 0; i < job->blocks && !chunk && !st; i += LLMPAR__NCCL_GROUPED)
        st = llmpar__nccl_gather(job, send + i * job->part, recv + i * n * job->part, job->part, llmpar__nccl_min(LLMPAR__NCCL_GROUPED, job->blocks - i));
    for (size_t i = 0; i < job->blocks && chunk && !st; i += chunk) {
        size_t now = llmpar__nccl_min(chunk, job->blocks - i), packed = now * job->part;
        st = llmpar__nccl_gather(job, send + i * job->part, job->c, packed, 1);
        for (size_t k = 0; k < n && !st; k++) st = llmpar__nccl_rows(job, 0, recv + (i * n + k) * job->part, job->c + k * packed, now);
    }
    return st;
}

static llmpar_status llmpar__nccl_do_all_to_all(llmpar__nccl_job *job, const char *send, char *recv)
{
    size_t chunk = llmpar__nccl_chunk(job), n = job->n;
    llmpar_status st = LLMPAR_OK;
    for (size_t i = 0; i < job->blocks && !chunk && !st; i++) st = llmpar__nccl_exchange(job, send + i * n * job->part, job->part, recv + i * n * job->part, job->part, job->part);
    for (size_t i = 0; i < job->blocks && chunk && !st; i += chunk) {
        size_t now = llmpar__nccl_min(chunk, job->blocks - i), packed = now * job->part;
        for (size_t k = 0; k < n && !st; k++) st = llmpar__nccl_rows(job, 1, (char *)(uintptr_t)send + (i * n + k) * job->part, job->c + k * packed, now);
        if (!st) st = llmpar__nccl_exchange(job, job->c, packed, job->a, packed, packed);
        for (size_t k = 0; k < n && !st; k++) st = llmpar__nccl_rows(job, 0, recv + (i * n + k) * job->part, job->a + k * packed, now);
    }
    return st;
}

static llmpar_status llmpar__nccl_do_broadcast(llmpar__nccl_job *job, const char *send, char *recv)
{
    ncclResult_t result;
    int root = (int)job->r == job->call.root;
    size_t bytes = job->part * job->blocks;
    llmpar_status st = llmpar__nccl_group_begin(job, &result);
    if (st) return st;
    char *buffer = root ? (char *)(uintptr_t)send : recv; /* the root's receive buffer may be none: it is filled below */
    llmpar__nccl_also(&result, ncclBroadcast(buffer, buffer, bytes, ncclInt8, (int)job->call.root, job->tc->nccl, job->native));
    st = llmpar__nccl_group_end(job, result, "ncclBroadcast");
    return st || !root || !recv || recv == send ? st : job->device->copy(job->device, job->stream, recv, send, bytes);
}

static llmpar_status llmpar__nccl_do_message(llmpar__nccl_job *job, const char *send, char *recv)
{
    ncclResult_t result;
    llmpar_status st = llmpar__nccl_group_begin(job, &result);
    if (st) return st;
    if (job->call.op == LLMPAR_CALL_SEND) llmpar__nccl_send_part(job, &result, send, job->part * job->blocks, (size_t)job->call.peer);
    else llmpar__nccl_recv_part(job, &result, recv, job->part * job->blocks, (size_t)job->call.peer);
    return llmpar__nccl_group_end(job, result, job->call.op == LLMPAR_CALL_SEND ? "ncclSend" : "ncclRecv");
}

static llmpar_status llmpar__nccl_do(llmpar__nccl_job *job, const char *send, char *recv)
{
    if (job->call.op == LLMPAR_CALL_BARRIER && job->n > 1) return llmpar__nccl_gather(job, job->a + job->r, job->a, 1, 1);
    if (!job->part) return LLMPAR_OK;
    if (job->n == 1 && !job->tc->nccl) return recv && recv != send ? job->device->copy(job->device, job->stream, recv, send, job->part * job->blocks) : LLMPAR_OK;
    switch (job->call.op) {
    case LLMPAR_CALL_ALL_GATHER: return llmpar__nccl_do_all_gather(job, send, recv);
    case LLMPAR_CALL_REDUCE_SCATTER: return llmpar__nccl_do_reduce_scatter(job, send, recv);
    case LLMPAR_CALL_ALL_REDUCE: return llmpar__nccl_do_all_reduce(job, send, recv);
    case LLMPAR_CALL_BROADCAST: return llmpar__nccl_do_broadcast(job, send, recv);
    case LLMPAR_CALL_ALL_TO_ALL: return llmpar__nccl_do_all_to_all(job, send, recv);
    default: return llmpar__nccl_do_message(job, send, recv);
    }
}

/* ---- in order ---- */

/* The argument of the host call behind a collective. */
typedef struct llmpar__nccl_mark {
    llmpar__nccl_comm *tc;
    llmpar_call call;
} llmpar__nccl_mark;

/* The stream has come past the collective: because it is done, or because it was aborted. */
static llmpar_status llmpar__nccl_after(void *arg)
{
    const llmpar__nccl_mark *mark = (const llmpar__nccl_mark *)arg;
    return llmpar__nccl_sound(mark->tc, &mark->call);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__nccl_enqueue(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *given, int32_t op)
{
    llmpar__nccl_comm *tc = (llmpar__nccl_comm *)comm->state;
    llmpar__nccl_world *world = tc->world;
    llmpar_device *device = comm->device;
    llmpar__nccl_job job;
    memset(&job, 0, sizeof job);
    job.tc = tc;
    job.device = device;
    job.stream = stream;
    llmpar_call_describe(comm, (llmpar_call_op)op, given, &job.call);
    if (job.call.rank < 0) job.call.rank = world->rank;
    if (llmpar_device_thread_error(device, NULL))
        return llmpar__nccl_failed(tc, llmpar_error_set(llmpar__nccl_own_error(tc), LLMPAR_ERR_UNSUPPORTED, "%s \"%s\" on %s: called on the thread of a stream; calls of NCCL belong to the rank's own thread", llmpar_call_op_name((llmpar_call_op)op), job.call.tag, tc->axis));
    job.native = (cudaStream_t)device->native_stream(device, stream);
    job.n = (size_t)comm->ranks;
    job.r = (size_t)comm->rank;
    job.blocks = (size_t)job.call.blocks;
    job.count = (size_t)job.call.count;
    job.item = llmpar_dtype_size((llmpar_dtype)job.call.dtype); /* a barrier has none */
    job.part = job.count * job.item;
    job.a = world->scratch;
    job.b = job.a + world->part_bytes;
    job.c = job.b + world->part_bytes;
    llmpar_status st = llmpar__nccl_sound(tc, &job.call);
    if (!st && comm->ranks > 1) st = llmpar__nccl_ask_hub(tc, &job.call, 0, 0, LLMPAR__NCCL_CALL);
    if (!st && world->pending) st = stream ? device->event_wait(device, stream, world->last) : device->event_synchronize(device, world->last);
    if (!st) st = llmpar__nccl_do(&job, (const char *)given->send, (char *)given->recv);
    if (!st && stream) {
        llmpar__nccl_mark mark;
        mark.tc = tc;
        mark.call = job.call;
        st = device->host_call(device, stream, llmpar__nccl_after, &mark, sizeof mark);
        if (!st) st = device->event_record(device, stream, world->last);
        if (!st) world->pending = 1;
    } else if (!st) {
        st = device->synchronize(device, NULL); /* without a stream: now */
        world->pending = 0;
        if (!st) st = llmpar__nccl_sound(tc, &job.call);
    }
    return st ? llmpar__nccl_failed(tc, st) : LLMPAR_OK;
}

#undef LLMPAR__NCCL_GROUPED
#undef LLMPAR__NCCL_DIRECT
#undef LLMPAR__NCCL_GRAIN
