/* mpi: collectives between processes.

   Every collective: meet (mpi_wait.c: everybody is there and agrees), then move data; what is small has already moved with the meeting. The arithmetic is the device's tree_sum and max, on the rank's own
   thread or that of the call's stream, with stream NULL, as in threads.c; the whole collective is one host call on the stream. The headers of all communicators travel in one order, so calls on
   different streams run one after the other even where these have threads (llmpar_order): compute overlaps with them, they do not with each other.

   Reductions go on with the tree over the rank index by halves (tables/halving.h), a slice of at most comm_slice bytes at a time, so scratch is bounded. All-reduce: the same on parts of about equal
   length, then the parts go to everybody. */
#include "comm/mpi_internal.h"

#include <string.h>

#include "base/size.h"
#include "tables/tables_internal.h"

#ifdef LLMPAR_USE_MPI

/* The argument of the host call. */
typedef struct llmpar__mpi_job {
    llmpar__mpi_comm *tc;
    const void *send;
    void *recv;
    llmpar_call call;
} llmpar__mpi_job;

/* A slice of a reduction: part j is `bytes(j)` at base + offset(j) of this rank's input. */
typedef struct llmpar__mpi_slice {
    const char *base;
    size_t stride, count; /* stride > 0: part j is `count` elements at j * stride bytes; 0: part j is piece j of `count` elements */
    size_t item, parts;
    void *out;            /* this rank's part of the result */
} llmpar__mpi_slice;

static size_t llmpar__mpi_part(const llmpar__mpi_slice *s, size_t j, size_t *count)
{
    if (s->stride) {
        *count = s->count;
        return j * s->stride;
    }
    size_t begin = (size_t)llmpar_piece_begin((int64_t)j, (int64_t)s->count, (int64_t)s->parts);
    *count = (size_t)llmpar_piece_begin((int64_t)j + 1, (int64_t)s->count, (int64_t)s->parts) - begin;
    return begin * s->item;
}

static llmpar_status llmpar__mpi_copy(llmpar__mpi_comm *tc, void *out, const void *in, size_t bytes)
{
    if (!bytes || out == in) return LLMPAR_OK;
    return tc->comm.device->copy(tc->comm.device, NULL, out, in, bytes);
}

static llmpar_status llmpar__mpi_combine(llmpar__mpi_comm *tc, const llmpar_call *call, const void *const *in, int32_t n, size_t count, void *out)
{
    return count ? llmpar__device_reduce(tc->comm.device, NULL, (llmpar_reduce_op)call->reduce, in, n, count, out, (llmpar_dtype)call->dtype) : LLMPAR_OK;
}

static int llmpar__mpi_is_small(const llmpar__mpi_comm *tc, size_t bytes) { return bytes <= LLMPAR__MPI_INLINE && tc->comm.ranks <= tc->world->desc.direct; }

/* Elements of one part of a slice, at most. */
static size_t llmpar__mpi_step(const llmpar__mpi_comm *tc, size_t item, int scatter)
{
    size_t n = (size_t)tc->comm.ranks, step = tc->world->desc.comm_slice / item;
    if (scatter) return step / n ? step / n : 1;
    return step < n ? n : step;
}

/* Scratch for a call that is going to be enqueued, on the rank's own thread. What is under way uses the old one. */
static llmpar_status llmpar__mpi_reserve(llmpar__mpi_comm *tc, const llmpar_call *call)
{
    llmpar_mpi_world *world = tc->world;
    int scatter = call->op == LLMPAR_CALL_REDUCE_SCATTER;
    if (!scatter && call->op != LLMPAR_CALL_ALL_REDUCE) return LLMPAR_OK;
    size_t n = (size_t)tc->comm.ranks, item = llmpar_dtype_size((llmpar_dtype)call->dtype), total = (size_t)(call->count * call->blocks), step = llmpar__mpi_step(tc, item, scatter);
    if (llmpar__mpi_is_small(tc, total * item * (scatter ? n : 1))) return LLMPAR_OK;
    size_t room = scatter ? llmpar__least(step, (size_t)call->count) : (llmpar__least(step, total) + n - 1) / n, bytes = (2 * (size_t)tc->halving.most_kept + (size_t)tc->halving.most_given) * room * item;
    if (world->scratch_bytes >= bytes) return LLMPAR_OK;
    llmpar_status st = llmpar_order_wait(&world->order);
    if (st) return st;
    llmpar_heap_free(world->heap, world->scratch);
    world->scratch_bytes = 0;
    world->scratch = LLMPAR__ALLOC(char, world->heap, bytes);
    if (!world->scratch) return llmpar_error_set(llmpar__mpi_own_error(tc), LLMPAR_ERR_MEMORY, "%s \"%s\" on %s: out of memory for %llu bytes of scratch", llmpar_call_op_name((llmpar_call_op)call->op), call->tag, tc->axis, (unsigned long long)bytes);
    world->scratch_bytes = bytes;
    return LLMPAR_OK;
}

/* Gives the held parts with label c at this level to the member `to`. A single part of the input goes from where it is; else they are packed behind `pack`. */
static llmpar_status llmpar__mpi_give(llmpar__mpi_comm *tc, const llmpar_call *call, const llmpar__mpi_slice *s, int32_t l, int32_t held, int32_t c, int32_t to, size_t room, const char *partial, char **pack)
{
    const int32_t *label = tc->halving.label + (size_t)l * s->parts, *kept = tc->halving.kept;
    char *begin = *pack, *only = NULL;
    size_t bytes = 0, parts = 0, count;
    llmpar_status st = LLMPAR_OK;
    for (int32_t i = 0; i < held && !st; i++) {
        if (label[kept[i]] != c) continue;
        size_t offset = llmpar__mpi_part(s, (size_t)kept[i], &count);
        const char *from = partial ? partial + (size_t)i * room : s->base + offset;
        if (parts == 1) { /* not the only one after all */
            st = llmpar__mpi_copy(tc, begin, only, bytes);
            *pack += room;
        }
        if (parts) {
            if (!st) st = llmpar__mpi_copy(tc, *pack, from, count * s->item);
            *pack += room;
        }
        only = (char *)(uintptr_t)from;
        bytes = count * s->item;
        parts++;
    }
    if (st || !parts) return st;
    return llmpar__mpi_post(tc, call, 0, to, parts == 1 ? only : begin, parts == 1 ? bytes : (parts - 1) * room + bytes);
}

/* Reduces one slice. */
static llmpar_status llmpar__mpi_halve(llmpar__mpi_comm *tc, const llmpar_call *call, const llmpar__mpi_slice *s)
{
    size_t n = s->parts, room = (s->stride ? s->count : (s->count + n - 1) / n) * s->item, count;
    size_t keep = (size_t)tc->halving.most_kept * room, give = (size_t)tc->halving.most_given * room;
    llmpar_status st = LLMPAR_OK;
    if (tc->world->scratch_bytes < 2 * keep + give)
        return llmpar_error_set(llmpar__mpi_own_error(tc), LLMPAR_ERR_INTERNAL, "%s \"%s\" on %s: %llu bytes of scratch, expected %llu", llmpar_call_op_name((llmpar_call_op)call->op), call->tag, tc->axis,
                                (unsigned long long)tc->world->scratch_bytes, (unsigned long long)(2 * keep + give));
    char *partial = tc->world->scratch, *incoming = partial + keep, *pack;
    int32_t held = (int32_t)n, levels = tc->halving.levels, *kept = tc->halving.kept;
    for (int32_t i = 0; i < held; i++) kept[i] = i;
    for (int32_t l = 0; l < levels && !st; l++) {
        const llmpar_halving_level *level = &tc->halving.level[l];
        const int32_t *label = tc->halving.label + (size_t)l * n;
        int32_t mine = level->mine, keeps = 0;
        const char *held_partial = l ? partial : NULL;
        size_t expected = 0;
        pack = incoming + keep;
        for (int32_t i = 0; i < held; i++)
            if (label[kept[i]] == mine) {
                llmpar__mpi_part(s, (size_t)kept[i], &count);
                expected = (size_t)keeps++ * room + count * s->item;
            }
        st = llmpar__mpi_post(tc, call, 1, level->partner, incoming, expected);
        if (level->left) {
            if (mine < level->q && !st) st = llmpar__mpi_give(tc, call, s, l, held, level->p + mine, level->lo + level->p + mine, room, held_partial, &pack);
        } else {
            for (int32_t c = mine - level->p; c < level->p && !st; c += level->q) st = llmpar__mpi_give(tc, call, s, l, held, c, level->lo + c, room, held_partial, &pack);
        }
        if (!st) st = llmpar__mpi_complete(tc, call);
        keeps = 0;
        for (int32_t i = 0; i < held && !st; i++) {
            if (label[kept[i]] != mine) continue;
            size_t offset = llmpar__mpi_part(s, (size_t)kept[i], &count);
            const void *own = l ? partial + (size_t)i * room : s->base + offset, *theirs = incoming + (size_t)keeps * room, *in[2] = { level->left ? own : theirs, level->left ? theirs : own };
            st = llmpar__mpi_combine(tc, call, in, 2, count, l + 1 == levels ? s->out : (void *)(partial + (size_t)keeps * room));
            kept[keeps++] = kept[i];
        }
        held = keeps;
    }
    return st;
}

/* Parts that go from rank to rank: part i of the receiver comes from rank i. Own parts are copied while those of the others are under way. Receives and sends take turns, and all ranks are of one
   size: so the rank that is furthest behind never waits for a message that is not yet on its way, however few may be under way. */
static llmpar_status llmpar__mpi_exchange(llmpar__mpi_comm *tc, const llmpar_call *call, size_t blocks, const char *send, char *recv, size_t part, int all_to_all)
{
    size_t n = (size_t)tc->comm.ranks, r = (size_t)tc->comm.rank;
    llmpar_status st = LLMPAR_OK;
    for (size_t k = 1; k < n && !st; k++) {
        size_t to = (r + k) % n, from = (r + n - k) % n;
        for (size_t b = 0; b < blocks && !st; b++) {
            char *in = recv + (b * n + from) * part, *out = (char *)(uintptr_t)send + (all_to_all ? b * n + to : b) * part;
            for (size_t at = 0; at < part && !st; at += tc->world->desc.comm_slice) {
                size_t now = llmpar__least(tc->world->desc.comm_slice, part - at);
                st = llmpar__mpi_post(tc, call, 1, (int32_t)from, in + at, now);
                if (!st) st = llmpar__mpi_post(tc, call, 0, (int32_t)to, out + at, now);
            }
        }
    }
    for (size_t b = 0; b < blocks && !st; b++) st = llmpar__mpi_copy(tc, recv + (b * n + r) * part, send + (all_to_all ? b * n + r : b) * part, part);
    return st ? st : llmpar__mpi_complete(tc, call);
}

static llmpar_status llmpar__mpi_reduce_scatter_large(llmpar__mpi_comm *tc, const llmpar_call *call, const char *send, char *recv, size_t item)
{
    size_t n = (size_t)tc->comm.ranks, part = (size_t)call->count * item, step = llmpar__mpi_step(tc, item, 1);
    llmpar__mpi_slice s = {NULL, part, 0, item, n, NULL};
    llmpar_status st = LLMPAR_OK;
    for (size_t b = 0; b < call->blocks; b++)
        for (size_t at = 0; at < call->count && !st; at += step) {
            s.base = send + b * n * part + at * item;
            s.count = llmpar__least(step, (size_t)call->count - at);
            s.out = recv + b * part + at * item;
            st = llmpar__mpi_halve(tc, call, &s);
        }
    return st;
}

static llmpar_status llmpar__mpi_all_reduce_large(llmpar__mpi_comm *tc, const llmpar_call *call, const char *send, char *recv, size_t item)
{
    size_t n = (size_t)tc->comm.ranks, r = (size_t)tc->comm.rank, total = (size_t)(call->count * call->blocks), step = llmpar__mpi_step(tc, item, 0);
    llmpar__mpi_slice s = {NULL, 0, 0, item, n, NULL};
    llmpar_status st = LLMPAR_OK;
    for (size_t at = 0; at < total && !st; at += step) {
        size_t mine, theirs;
        s.base = send + at * item;
        s.count = llmpar__least(step, total - at);
        char *out = recv + at * item, *own = out + llmpar__mpi_part(&s, r, &mine);
        s.out = own;
        st = llmpar__mpi_halve(tc, call, &s);
        for (size_t k = 1; k < n && !st; k++) {
            size_t from = (r + n - k) % n, offset = llmpar__mpi_part(&s, from, &theirs);
            st = llmpar__mpi_post(tc, call, 1, (int32_t)from, out + offset, theirs * item);
            if (!st) st = llmpar__mpi_post(tc, call, 0, (int32_t)((r + k) % n), own, mine * item);
        }
        if (!st) st = llmpar__mpi_complete(tc, call);
    }
    return st;
}

/* A binomial tree below the root, slice by slice. */
static llmpar_status llmpar__mpi_broadcast_large(llmpar__mpi_comm *tc, const llmpar_call *call, char *buffer, size_t bytes)
{
    int32_t n = tc->comm.ranks, v = (tc->comm.rank - call->root + n) % n, mask = 1;
    llmpar_status st = LLMPAR_OK;
    while (mask < n && !(v & mask)) mask *= 2;
    for (size_t at = 0; at < bytes && !st; at += tc->world->desc.comm_slice) {
        size_t now = llmpar__least(tc->world->desc.comm_slice, bytes - at);
        if (v) {
            st = llmpar__mpi_post(tc, call, 1, (v - mask + call->root) % n, buffer + at, now);
            if (!st) st = llmpar__mpi_complete(tc, call);
        }
        for (int32_t child = mask / 2; child >= 1 && !st; child /= 2)
            if (v + child < n) st = llmpar__mpi_post(tc, call, 0, (v + child + call->root) % n, buffer + at, now);
    }
    return st ? st : llmpar__mpi_complete(tc, call);
}

/* Everything that fits beside the headers: the payloads of all ranks are here. */
static llmpar_status llmpar__mpi_small(llmpar__mpi_comm *tc, const llmpar_call *call, char *recv, size_t part)
{
    llmpar_mpi_world *world = tc->world;
    const void *in[256];
    size_t n = (size_t)tc->comm.ranks, r = (size_t)tc->comm.rank;
    llmpar_status st = LLMPAR_OK;
    switch (call->op) {
    case LLMPAR_CALL_ALL_REDUCE:
        for (size_t i = 0; i < n; i++) in[i] = world->inbox[i].payload;
        return llmpar__mpi_combine(tc, call, in, (int32_t)n, (size_t)(call->count * call->blocks), recv);
    case LLMPAR_CALL_REDUCE_SCATTER:
        for (size_t b = 0; b < call->blocks && !st; b++) {
            for (size_t i = 0; i < n; i++) in[i] = world->inbox[i].payload + (b * n + r) * part;
            st = llmpar__mpi_combine(tc, call, in, (int32_t)n, (size_t)call->count, recv + b * part);
        }
        return st;
    case LLMPAR_CALL_BROADCAST: return recv ? llmpar__mpi_copy(tc, recv, world->inbox[call->root].payload, part * (size_t)call->blocks) : LLMPAR_OK;
    default: /* all_gather, all_to_all */
        for (size_t i = 0; i < n; i++)
            for (size_t b = 0; b < call->blocks && !st; b++)
                st = llmpar__mpi_copy(tc, recv + (b * n + i) * part, world->inbox[i].payload + (call->op == LLMPAR_CALL_ALL_TO_ALL ? b * n + r : b) * part, part);
        return st;
    }
}

static llmpar_status llmpar__mpi_large(llmpar__mpi_comm *tc, const llmpar_call *call, const char *send, char *recv, size_t part, size_t item)
{
    size_t r = (size_t)tc->comm.rank, blocks = (size_t)call->blocks;
    llmpar_status st = LLMPAR_OK;
    switch (call->op) {
    case LLMPAR_CALL_ALL_GATHER: case LLMPAR_CALL_ALL_TO_ALL: return llmpar__mpi_exchange(tc, call, blocks, send, recv, part, call->op == LLMPAR_CALL_ALL_TO_ALL);
    case LLMPAR_CALL_REDUCE_SCATTER: return llmpar__mpi_reduce_scatter_large(tc, call, send, recv, item);
    case LLMPAR_CALL_ALL_REDUCE: return llmpar__mpi_all_reduce_large(tc, call, send, recv, item);
    case LLMPAR_CALL_BROADCAST:
        st = llmpar__mpi_broadcast_large(tc, call, (int32_t)r == call->root ? (char *)(uintptr_t)send : recv, part * blocks);
        return st || (int32_t)r != call->root || !recv ? st : llmpar__mpi_copy(tc, recv, send, part * blocks);
    default: return LLMPAR_OK;
    }
}

/* The host function of every collective. */
static llmpar_status llmpar__mpi_run(void *arg)
{
    const llmpar__mpi_job *job = (const llmpar__mpi_job *)arg;
    const llmpar_call *call = &job->call;
    llmpar__mpi_comm *tc = job->tc;
    size_t n = (size_t)tc->comm.ranks, item = llmpar_dtype_size((llmpar_dtype)call->dtype), part = (size_t)call->count * item, bytes = part * (size_t)call->blocks; /* a barrier has none */
    int sends = call->op == LLMPAR_CALL_SEND;
    llmpar_status st;
    st = llmpar__comm_thread_check(&tc->comm, call);
    if (st) return llmpar__mpi_failed(tc, st);
    if (sends || call->op == LLMPAR_CALL_RECV) {
        int small = bytes <= LLMPAR__MPI_INLINE;
        st = llmpar__mpi_meet_one(tc, call, job->send, sends && small ? bytes : 0);
        if (!st && small && !sends) st = llmpar__mpi_copy(tc, job->recv, tc->world->inbox[0].payload, bytes);
        if (!st && !small) st = llmpar__mpi_post(tc, call, !sends, call->peer, sends ? (void *)(uintptr_t)job->send : job->recv, bytes);
        if (!st) st = llmpar__mpi_complete(tc, call);
    } else {
        if (call->op == LLMPAR_CALL_REDUCE_SCATTER || call->op == LLMPAR_CALL_ALL_TO_ALL) bytes *= n;
        int small = llmpar__mpi_is_small(tc, bytes), silent = call->op == LLMPAR_CALL_BROADCAST && call->root != tc->comm.rank;
        st = llmpar__mpi_meet(tc, call, job->send, small && !silent ? bytes : 0);
        if (!st && bytes) st = small ? llmpar__mpi_small(tc, call, (char *)job->recv, part) : llmpar__mpi_large(tc, call, (const char *)job->send, (char *)job->recv, part, item);
    }
    if (st) return tc->world->posted ? llmpar__mpi_abandon(tc, call, st) : llmpar__mpi_failed(tc, st); /* the device's; or told already */
    pthread_mutex_lock(&tc->world->lock);
    llmpar__mpi_seen(tc->world, tc->world->met, 1);
    tc->world->met = 0;
    pthread_mutex_unlock(&tc->world->lock);
    return LLMPAR_OK;
}

static llmpar_status llmpar__mpi_enqueue(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *given, int32_t op)
{
    LLMPAR__ZEROED(llmpar__mpi_job, job);
    job.tc = (llmpar__mpi_comm *)comm->state;
    job.send = given->send;
    job.recv = given->recv;
    llmpar_call_describe(comm, (llmpar_call_op)op, given, &job.call);
    if (job.call.rank < 0) job.call.rank = job.tc->world->rank;
    llmpar_status st = llmpar__mpi_reserve(job.tc, &job.call);
    return st ? llmpar__mpi_failed(job.tc, st) : llmpar_order_call(&job.tc->world->order, comm->device, stream, llmpar__mpi_run, &job, sizeof job);
}

static void llmpar__mpi_abort(llmpar_comm *comm, const llmpar_error *error)
{
    llmpar__mpi_comm *tc = (llmpar__mpi_comm *)comm->state;
    llmpar_error mine = *error;
    if (mine.rank < 0) mine.rank = tc->world->rank;
    llmpar_mpi_world_fail(tc->world, &mine);
}

/* ---- communicators ---- */

static void llmpar__mpi_destroy(llmpar_comm *comm)
{
    llmpar__mpi_comm *tc = (llmpar__mpi_comm *)comm->state;
    llmpar_heap *heap = tc->world->heap;
    if (--tc->world->comms == 0) llmpar_order_destroy(&tc->world->order);
    llmpar_heap_free(heap, tc->member);
    llmpar_halving_free(heap, &tc->halving);
    llmpar_heap_free(heap, tc);
}

static llmpar_status llmpar__mpi_split(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out);

/* A communicator of these world ranks (copied). Local. */
static llmpar_status llmpar__mpi_make(llmpar_mpi_world *world, const int32_t *member, int32_t ranks, int32_t rank, uint64_t context, const char *name, llmpar_device *device, llmpar_error *error, llmpar_comm **out)
{
    llmpar_heap *heap = world->heap;
    llmpar__mpi_comm *tc = LLMPAR__ZALLOC(llmpar__mpi_comm, heap, 1);
    if (!tc) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "communicator %.23s: out of memory", name);
    llmpar_comm *comm = &tc->comm;
    tc->world = world;
    world->comms++;
    tc->context = context;
    tc->member = LLMPAR__ALLOC(int32_t, heap, (size_t)ranks);
    comm->state = tc;
    if (!llmpar_halving_make(heap, ranks, rank, &tc->halving) || !tc->member) {
        llmpar__mpi_destroy(comm);
        return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "communicator %.23s: out of memory for %d ranks", name, (int)ranks);
    }
    memcpy(tc->member, member, (size_t)ranks * sizeof *member);
    memcpy(tc->axis, name, llmpar__least(strlen(name), sizeof tc->axis - 1));
    comm->abi = LLMPAR_COMM_ABI;
    comm->size = (uint32_t)sizeof *comm;
    comm->rank = rank;
    comm->ranks = ranks;
    comm->axis = tc->axis;
    comm->device = device;
    comm->error = error;
    comm->split = llmpar__mpi_split;
    comm->destroy = llmpar__mpi_destroy;
    llmpar_comm_fill(comm, llmpar__mpi_enqueue);
    comm->abort = llmpar__mpi_abort;
    comm->unchecked = world->desc.unchecked;
    comm->one_thread = world->serialized ? NULL : "MPI was initialised with less than MPI_THREAD_SERIALIZED";
    if (llmpar_record_attach(world->record, comm, member)) {
        llmpar__mpi_destroy(comm);
        return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "communicator %.23s: out of memory for its record", name);
    }
    *out = comm;
    return LLMPAR_OK;
}

/* What the ranks show each other at a split. Plain bytes. */
typedef struct llmpar__mpi_place {
    int32_t color, key;
    uint64_t next_context;
} llmpar__mpi_place;

/* Every rank sees all places and works out its own communicator from them: no further message. Contexts: one above all that a member has been part of. */
static llmpar_status llmpar__mpi_split_places(llmpar__mpi_comm *tc, int32_t color, int32_t key, const char *name, llmpar__mpi_place *place, int32_t *member, llmpar_comm **out)
{
    llmpar_mpi_world *world = tc->world;
    llmpar_call call;
    const llmpar_collective named = llmpar__comm_collective(NULL, NULL, 0, LLMPAR_DTYPE_DEFAULT, name);
    int32_t n = tc->comm.ranks, r = tc->comm.rank, ranks = 0, rank = 0;
    llmpar_call_describe(&tc->comm, LLMPAR_CALL_SPLIT, &named, &call);
    if (call.rank < 0) call.rank = tc->world->rank;
    place[r].color = color;
    place[r].key = key;
    place[r].next_context = world->next_context;
    llmpar_status st = llmpar__mpi_meet(tc, &call, NULL, 0);
    if (!st) st = llmpar__mpi_exchange(tc, &call, 1, (const char *)&place[r], (char *)place, sizeof *place, 0);
    if (st) return st;
    uint64_t context = 0;
    for (int32_t i = 0; i < n; i++)
        if (place[i].next_context > context) context = place[i].next_context;
    world->next_context = context + 1;
    for (int32_t i = 0; i < n && color >= 0; i++) {
        int32_t at = 0;
        if (place[i].color != color) continue;
        for (int32_t j = 0; j < n; j++)
            if (place[j].color == color && (place[j].key < place[i].key || (place[j].key == place[i].key && j < i))) at++;
        member[at] = tc->member[i];
        if (i == r) rank = at;
        ranks++;
    }
    if (color < 0) return LLMPAR_OK;
    return llmpar__mpi_make(world, member, ranks, rank, context, name, tc->comm.device, llmpar__mpi_own_error(tc), out);
}

static llmpar_status llmpar__mpi_split(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out)
{
    llmpar__mpi_comm *tc = (llmpar__mpi_comm *)comm->state;
    llmpar_heap *heap = tc->world->heap;
    llmpar__mpi_place *place = LLMPAR__ZALLOC(llmpar__mpi_place, heap, (size_t)comm->ranks);
    int32_t *member = LLMPAR__ALLOC(int32_t, heap, (size_t)comm->ranks);
    *out = NULL;
    llmpar_status st = llmpar_order_wait(&tc->world->order);
    if (!st) st = place && member ? llmpar__mpi_split_places(tc, color, key, name, place, member, out)
                                  : llmpar_error_set(comm->error, LLMPAR_ERR_MEMORY, "split \"%s\" of %s: out of memory for %d ranks", name, comm->axis, (int)comm->ranks);
    llmpar_heap_free(heap, place);
    llmpar_heap_free(heap, member);
    return st ? llmpar__mpi_failed(tc, st) : LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_mpi_comm_create(llmpar_mpi_world *world, llmpar_device *device, llmpar_error *error, llmpar_comm **out)
{
    *out = NULL;
    int32_t *all = LLMPAR__ALLOC(int32_t, world->heap, (size_t)world->ranks);
    if (!all) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "communicator world: out of memory for %d ranks", (int)world->ranks);
    for (int32_t i = 0; i < world->ranks; i++) all[i] = i;
    llmpar_status st = llmpar__mpi_make(world, all, world->ranks, world->rank, 0, "world", device, error, out);
    llmpar_heap_free(world->heap, all);
    return st;
}

#endif /* LLMPAR_USE_MPI */
