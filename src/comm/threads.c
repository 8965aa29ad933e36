/* threads: collectives between the rank threads of one process.

   A collective, on every rank (n ranks, this one is r):
     publish   what I am about to do, and where my buffers are, in my slot of the communicator
     barrier   from here on all slots are complete; compare them: all ranks do the same thing, or all report both sides and nothing has moved
     work      read and write the peers' buffers directly; nobody leaves the collective meanwhile, so they stay where they are
     barrier   buffers belong to their owners again
   Up to LLMPAR__THREADS_INLINE bytes travel inside the slot: then the second barrier is not needed, because a rank has two slots and uses them in turns.

   All-reduce: rank r alone reads slice r of all inputs, and writes its sum to slice r of everybody's output. So in place (recv == send) is safe: what is overwritten
   was read by nobody else. The sum goes to all outputs in one pass (tree_sum_to): every line of memory moves once.
       send 0  |s0|s1|s2|s3|     rank 2 reads s2 of all,  recv 0 |  |  |S2|  |
       send 1  |s0|s1|s2|s3|  -> S2 = (s2+s2)+(s2+s2)  -> recv 1 |  |  |S2|  |
       ..                        and writes it to all     ..

   All-gather in the same way: a rank writes its part to everybody's output, and reads nobody's. A line that a peer has just written is the dearest to read, one's own the cheapest. Broadcast: rank r hands
   slice r of the root's buffer to everybody. Reduce-scatter and all-to-all have one reader a result: it reads.

   Order of sums: element by element, the device's tree_sum over the contributions in rank order. That is the whole contract; slices and pieces cut elements, never sums.

   Device and streams: the whole collective is one host call on the stream (device->host_call), so it takes its place among the stream's operations on a device
   that runs late as well as on one that runs inside the call, as the CPU does. Inside the host function the arithmetic and the copies are the device's tree_sum_to, tree_sum, max and copy with stream NULL,
   which for every device that this communicator is used with means: now, on this thread, done on return. Its memory must be readable by all rank threads. Calls on one communicator but on different
   streams wait for each other (llmpar_order), so they run in the order in which they were issued; those on different communicators may run at the same time, where streams have threads. send and recv wait for each other: a send is complete when its data has been taken. split waits on the host and belongs to no stream. */
#include "comm/threads_internal.h"

#include <stdio.h>
#include <string.h>

#include "tables/tables_internal.h"

#define LLMPAR__THREADS_PIECE 32768u /* bytes of a slice of a maximum that are found and passed on at a time */
#define LLMPAR__THREADS_GRAIN 256u /* bytes: slices begin at whole cache lines of aligned buffers */

/* The argument of the host call. */
typedef struct llmpar__threads_job {
    llmpar__threads_comm *tc;
    llmpar__threads_call call;
} llmpar__threads_job;

static llmpar_status llmpar__threads_mismatch(llmpar__threads_comm *tc, const llmpar_call *a, const llmpar_call *b)
{
    char text[700];
    int swapped = a->rank > b->rank;
    llmpar_call_mismatch(swapped ? b : a, swapped ? a : b, text, sizeof text);
    return llmpar__threads_failed(tc, llmpar_error_set(llmpar__threads_error(tc), LLMPAR_ERR_MISMATCH, "%s", text));
}

/* Publishes this rank's call and payload, waits for all others, and compares. *slots is then the array of all ranks' slots, valid until the next-but-one call.
   The payload (bytes may be 0) must fit the slot. */
static llmpar_status llmpar__threads_meet(llmpar__threads_comm *tc, const llmpar__threads_call *call, const void *payload, size_t bytes, llmpar__threads_slot **slots)
{
    llmpar__threads_group *group = tc->group;
    int32_t rank = tc->comm.rank;
    llmpar_status st = llmpar__threads_check(tc, &call->what);
    if (st) return llmpar__threads_failed(tc, st);
    uint32_t number = ++tc->number;
    llmpar__threads_slot *all = group->slots + (number & 1) * (size_t)group->ranks;
    all[rank].call = *call;
    all[rank].fingerprint = tc->comm.unchecked ? 0 : llmpar_call_fingerprint(&call->what);
    if (bytes) memcpy(all[rank].payload, payload, bytes);
    __atomic_store_n(&group->arrived[rank], number, __ATOMIC_RELAXED); /* read behind `finished` only */
    st = llmpar__threads_barrier(tc, &all[rank].call.what, 1);
    if (st) return st;
    for (int32_t i = 1; i < group->ranks; i++)
        if (all[0].fingerprint != all[i].fingerprint) return llmpar__threads_mismatch(tc, &all[0].call.what, &all[i].call.what);
    *slots = all;
    return LLMPAR_OK;
}

/* out[count] = sum or max over the ranks of tc->inputs, in tree order. */
static llmpar_status llmpar__threads_reduce(llmpar__threads_comm *tc, const llmpar__threads_call *call, size_t count, void *out)
{
    return llmpar__device_reduce(tc->comm.device, NULL, (llmpar_reduce_op)call->what.reduce, tc->inputs, tc->comm.ranks, count, out, (llmpar_dtype)call->what.dtype);
}

/* The sum of n inputs, in tree order, to `outs` places. */
static llmpar_status llmpar__threads_sum_to(llmpar__threads_comm *tc, const void *const *in, int32_t n, void *const *out, int32_t outs, size_t count, llmpar_dtype dtype)
{
    llmpar_tree_sum_to_args args;
    args.in = in;
    args.n = n;
    args.out = out;
    args.outs = outs;
    args.count = count;
    args.dtype = dtype;
    return outs && count ? llmpar_device_tree_sum_to(tc->comm.device, &args) : LLMPAR_OK;
}

static llmpar_status llmpar__threads_copy(llmpar__threads_comm *tc, void *out, const void *in, size_t bytes)
{
    if (!bytes || out == in) return LLMPAR_OK;
    return bytes <= LLMPAR__THREADS_INLINE ? tc->comm.device->copy(tc->comm.device, NULL, out, in, bytes) : llmpar__threads_sum_to(tc, &in, 1, &out, 1, bytes, LLMPAR_U8);
}

/* This rank's slice [begin, end) of `total` things of `item` bytes. */
static void llmpar__threads_share(const llmpar__threads_comm *tc, size_t total, size_t item, size_t *begin, size_t *end)
{
    size_t n = (size_t)tc->comm.ranks, r = (size_t)tc->comm.rank, grain = LLMPAR__THREADS_GRAIN / item, grains = (total + grain - 1) / grain;
    *begin = llmpar__least(total, grains / n * r * grain + llmpar__least(r, grains % n) * grain);
    *end = llmpar__least(total, grains / n * (r + 1) * grain + llmpar__least(r + 1, grains % n) * grain);
}

/* The data of rank i: in its slot, or where its send pointer says. */
static const char *llmpar__threads_source(const llmpar__threads_slot *slots, int32_t i, int in_slot)
{
    return in_slot ? (const char *)slots[i].payload : (const char *)slots[i].call.send;
}

/* All-reduce of large buffers: my slice of all, to all. */
static llmpar_status llmpar__threads_slice(llmpar__threads_comm *tc, const llmpar__threads_call *call, const llmpar__threads_slot *slots)
{
    size_t item = llmpar_dtype_size((llmpar_dtype)call->what.dtype), begin, end, n = (size_t)tc->comm.ranks, r = (size_t)tc->comm.rank;
    llmpar_status st = LLMPAR_OK;
    llmpar__threads_share(tc, call->what.count * call->what.blocks, item, &begin, &end);
    if (call->what.reduce != LLMPAR_MAX) {
        for (size_t i = 0; i < n; i++) {
            tc->inputs[i] = (const char *)slots[i].call.send + begin * item;
            tc->outputs[i] = (char *)slots[(r + i) % n].call.recv + begin * item; /* mine first: what the others are copied from where the device sums to one place only */
        }
        return llmpar__threads_sum_to(tc, tc->inputs, (int32_t)n, tc->outputs, (int32_t)n, end - begin, (llmpar_dtype)call->what.dtype);
    }
    for (size_t at = begin; at < end && !st; at += LLMPAR__THREADS_PIECE / item) {
        size_t count = llmpar__least(LLMPAR__THREADS_PIECE / item, end - at);
        char *mine = (char *)call->recv + at * item;
        for (size_t i = 0; i < n; i++) tc->inputs[i] = (const char *)slots[i].call.send + at * item;
        st = llmpar__threads_reduce(tc, call, count, mine);
        for (size_t i = 0; i < n && !st; i++)
            if (i != r) st = llmpar__threads_copy(tc, (char *)slots[i].call.recv + at * item, mine, count * item);
    }
    return st;
}

/* `bytes` from here go to `offset` in everybody's output, mine first, wherever there is one and they do not stand there already. */
static llmpar_status llmpar__threads_hand_out(llmpar__threads_comm *tc, const llmpar__threads_slot *slots, const void *from, size_t offset, size_t bytes)
{
    size_t n = (size_t)tc->comm.ranks, r = (size_t)tc->comm.rank;
    int32_t outs = 0;
    for (size_t i = 0; i < n; i++) {
        char *to = (char *)slots[(r + i) % n].call.recv;
        if (to && to + offset != from) tc->outputs[outs++] = to + offset;
    }
    return llmpar__threads_sum_to(tc, &from, 1, tc->outputs, outs, bytes, LLMPAR_U8);
}

/* What this rank does between the barriers. part = bytes of one rank's part of one block. */
static llmpar_status llmpar__threads_work(llmpar__threads_comm *tc, const llmpar__threads_call *call, const llmpar__threads_slot *slots, int in_slot)
{
    size_t part = call->what.count * llmpar_dtype_size((llmpar_dtype)call->what.dtype), n = (size_t)tc->comm.ranks, r = (size_t)tc->comm.rank;
    char *recv = (char *)call->recv;
    llmpar_status st = LLMPAR_OK;
    if (!part) return LLMPAR_OK;
    switch (call->what.op) {
    case LLMPAR_CALL_ALL_REDUCE:
        if (!in_slot) return llmpar__threads_slice(tc, call, slots);
        for (size_t i = 0; i < n; i++) tc->inputs[i] = slots[i].payload;
        return llmpar__threads_reduce(tc, call, call->what.count * call->what.blocks, recv);
    case LLMPAR_CALL_REDUCE_SCATTER:
        for (size_t b = 0; b < call->what.blocks && !st; b++) {
            for (size_t i = 0; i < n; i++) tc->inputs[i] = llmpar__threads_source(slots, (int32_t)i, in_slot) + (b * n + r) * part;
            st = llmpar__threads_reduce(tc, call, call->what.count, recv + b * part);
        }
        return st;
    case LLMPAR_CALL_ALL_GATHER:
        for (size_t b = 0; b < call->what.blocks && !st && !in_slot; b++) st = llmpar__threads_hand_out(tc, slots, (const char *)call->send + b * part, (b * n + r) * part, part);
        for (size_t k = 0; k < n && in_slot; k++) {
            size_t i = (r + k) % n;
            const char *from = (const char *)slots[i].payload;
            for (size_t b = 0; b < call->what.blocks && !st; b++) {
                char *to = recv + (b * n + i) * part;
                if (i != r || to != (const char *)call->send + b * part) st = llmpar__threads_copy(tc, to, from + b * part, part);
            }
        }
        return st;
    case LLMPAR_CALL_BROADCAST:
        if (!in_slot) {
            size_t begin, end;
            llmpar__threads_share(tc, part * call->what.blocks, 1, &begin, &end);
            return llmpar__threads_hand_out(tc, slots, (const char *)slots[call->what.root].call.send + begin, begin, end - begin);
        }
        if (!recv || recv == call->send) return LLMPAR_OK;
        return llmpar__threads_copy(tc, recv, slots[call->what.root].payload, part * call->what.blocks);
    case LLMPAR_CALL_ALL_TO_ALL:
        for (size_t k = 0; k < n; k++) {
            size_t i = (r + k) % n;
            const char *from = llmpar__threads_source(slots, (int32_t)i, in_slot);
            for (size_t b = 0; b < call->what.blocks && !st; b++) st = llmpar__threads_copy(tc, recv + (b * n + i) * part, from + (b * n + r) * part, part);
        }
        return st;
    default: return LLMPAR_OK;
    }
}

/* The other end has failed and taken its side back: it held the lock until the failure was there for all to see. */
static llmpar_status llmpar__threads_withdrawn(llmpar__threads_comm *tc, const llmpar_call *call)
{
    pthread_mutex_lock(&tc->world->lock);
    pthread_mutex_unlock(&tc->world->lock);
    return llmpar__threads_failed(tc, llmpar__threads_check(tc, call));
}

/* One direction between two ranks; see the phases at llmpar__threads_channel. Runs as a host call. */
static llmpar_status llmpar__threads_point(llmpar__threads_comm *tc, const llmpar__threads_call *call)
{
    llmpar__threads_group *group = tc->group;
    size_t n = (size_t)group->ranks, me = (size_t)tc->comm.rank, peer = (size_t)call->what.peer;
    llmpar_status st = llmpar__threads_check(tc, &call->what);
    if (st) return llmpar__threads_failed(tc, st);
    llmpar__threads_channel *channels = __atomic_load_n(&group->channels, __ATOMIC_SEQ_CST);
    if (!channels) {
        pthread_mutex_lock(&tc->world->lock);
        channels = group->channels;
        if (!channels) channels = LLMPAR__ZALLOC(llmpar__threads_channel, tc->world->heap, n * n);
        __atomic_store_n(&group->channels, channels, __ATOMIC_SEQ_CST);
        pthread_mutex_unlock(&tc->world->lock);
        if (!channels) return llmpar__threads_failed(tc, llmpar_error_set(llmpar__threads_error(tc), LLMPAR_ERR_MEMORY, "%s \"%s\": out of memory for the channels of %d ranks", llmpar_call_op_name((llmpar_call_op)call->what.op), call->what.tag, (int)n));
    }
    int sends = call->what.op == LLMPAR_CALL_SEND;
    llmpar__threads_channel *channel = &channels[sends ? me * n + peer : peer * n + me];
    uint32_t step = (uint32_t)(__atomic_load_n(&channel->phase, __ATOMIC_SEQ_CST) >> 32) / 3 * 3; /* "empty" of this message */
    if (sends) {
        channel->sender = *call;
        channel->mismatch = 0;
        llmpar__threads_step(tc, channel, step, step + 1);
        st = llmpar__threads_await(tc, &call->what, channel, step + 1, call->what.peer, 1);
        if (!st && (uint32_t)(__atomic_load_n(&channel->phase, __ATOMIC_SEQ_CST) >> 32) == 0xffffffffu) return llmpar__threads_withdrawn(tc, &call->what);
        if (!st && (uint32_t)(__atomic_load_n(&channel->phase, __ATOMIC_SEQ_CST) >> 32) == step + 2) st = llmpar__threads_await(tc, &call->what, channel, step + 2, call->what.peer, 0);
    } else {
        st = llmpar__threads_await(tc, &call->what, channel, step, call->what.peer, 1);
        if (!st && !llmpar__threads_step(tc, channel, step + 1, step + 2)) return llmpar__threads_withdrawn(tc, &call->what);
        if (!st) {
            const llmpar__threads_call *from = &channel->sender;
            channel->receiver = *call;
            channel->mismatch = !tc->comm.unchecked && llmpar_call_fingerprint(&from->what) != llmpar_call_fingerprint(&call->what);
            llmpar_status copied = channel->mismatch ? LLMPAR_OK : llmpar__threads_copy(tc, call->recv, from->send, call->what.count * call->what.blocks * llmpar_dtype_size((llmpar_dtype)call->what.dtype));
            int mismatch = channel->mismatch;
            llmpar__threads_call other = *from;
            llmpar__threads_step(tc, channel, step + 2, step + 3 == 0xffffffffu ? 0 : step + 3); /* that number means "withdrawn" */
            if (copied) return llmpar__threads_failed(tc, copied);
            if (mismatch) return llmpar__threads_mismatch(tc, &other.what, &call->what);
        }
    }
    if (st) return st;
    if (sends && channel->mismatch) return llmpar__threads_mismatch(tc, &call->what, &channel->receiver.what);
    return LLMPAR_OK;
}

/* The host function of every collective. */
static llmpar_status llmpar__threads_run(void *arg)
{
    llmpar__threads_job *job = (llmpar__threads_job *)arg;
    llmpar__threads_comm *tc = job->tc;
    llmpar__threads_call *call = &job->call;
    llmpar_status st = llmpar__comm_thread_check(&tc->comm, &call->what);
    if (st) return llmpar__threads_failed(tc, st);
    if (call->what.op == LLMPAR_CALL_SEND || call->what.op == LLMPAR_CALL_RECV) return llmpar__threads_point(tc, call);
    /* A barrier has count 0. */
    size_t bytes = call->what.count * call->what.blocks * llmpar_dtype_size((llmpar_dtype)call->what.dtype);
    if (call->what.op == LLMPAR_CALL_REDUCE_SCATTER || call->what.op == LLMPAR_CALL_ALL_TO_ALL) bytes *= (size_t)tc->comm.ranks;
    int in_slot = bytes <= LLMPAR__THREADS_INLINE;
    size_t payload = in_slot && !(call->what.op == LLMPAR_CALL_BROADCAST && call->what.root != tc->comm.rank) ? bytes : 0;
    llmpar__threads_slot *slots = NULL;
    st = llmpar__threads_meet(tc, call, call->send, payload, &slots);
    if (st) return st;
    st = llmpar__threads_work(tc, call, slots, in_slot);
    if (!in_slot) llmpar__threads_barrier(tc, &call->what, 0); /* always: peers may still read my buffers, whatever became of my own work */
    return st ? llmpar__threads_failed(tc, st) : LLMPAR_OK;
}

static llmpar_status llmpar__threads_enqueue(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *given, int32_t op)
{
    LLMPAR__ZEROED(llmpar__threads_job, job);
    job.tc = (llmpar__threads_comm *)comm->state;
    llmpar_call_describe(comm, (llmpar_call_op)op, given, &job.call.what);
    if (job.call.what.rank < 0) job.call.what.rank = job.tc->world_rank;
    job.call.send = given->send;
    job.call.recv = given->recv;
    return llmpar_order_call(&job.tc->order, comm->device, stream, llmpar__threads_run, &job, sizeof job);
}

static void llmpar__threads_abort(llmpar_comm *comm, const llmpar_error *error)
{
    llmpar__threads_comm *tc = (llmpar__threads_comm *)comm->state;
    llmpar_error mine = *error;
    if (mine.rank < 0) mine.rank = tc->world_rank;
    llmpar_threads_world_fail(tc->world, &mine);
}

static void llmpar__threads_destroy(llmpar_comm *comm)
{
    llmpar__threads_comm *tc = (llmpar__threads_comm *)comm->state;
    llmpar_heap *heap = tc->heap;
    if (tc->record) llmpar__threads_show(tc->world, tc->world_rank, NULL, NULL);
    llmpar_order_destroy(&tc->order);
    llmpar__threads_group_release(tc->group);
    llmpar_record_destroy(tc->record);
    llmpar_heap_free(heap, tc->inputs);
    llmpar_heap_free(heap, tc->outputs);
    llmpar_heap_free(heap, tc);
}

static llmpar_status llmpar__threads_split(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out);

/* This rank's half of `group`. On failure the reference to the group is given back. */
static llmpar_status llmpar__threads_half(llmpar__threads_group *group, int32_t rank, llmpar_record *record, llmpar_heap *heap, llmpar_device *device, llmpar_error *error, llmpar_comm **out)
{
    llmpar__threads_comm *tc = LLMPAR__ZALLOC(llmpar__threads_comm, heap, 1);
    const void **inputs = LLMPAR__ALLOC(const void *, heap, (size_t)group->ranks);
    void **outputs = LLMPAR__ALLOC(void *, heap, (size_t)group->ranks);
    if (tc) {
        tc->comm.axis = group->axis;
        tc->comm.ranks = group->ranks;
    }
    if (!tc || !inputs || !outputs || (group->ranks > 1 && llmpar_record_attach(record, &tc->comm, group->world_rank))) {
        llmpar_error_set(error, LLMPAR_ERR_MEMORY, "communicator %s: out of memory", group->axis);
        llmpar_heap_free(heap, tc);
        llmpar_heap_free(heap, inputs);
        llmpar_heap_free(heap, outputs);
        llmpar__threads_group_release(group);
        return LLMPAR_ERR_MEMORY;
    }
    tc->heap = heap;
    tc->world = group->world;
    tc->group = group;
    tc->world_rank = group->world_rank[rank];
    tc->inputs = inputs;
    tc->outputs = outputs;
    llmpar_comm *comm = &tc->comm;
    comm->abi = LLMPAR_COMM_ABI;
    comm->size = (uint32_t)sizeof *comm;
    comm->rank = rank;
    comm->unchecked = tc->world->desc.unchecked;
    comm->one_thread = tc->world->desc.lockstep ? "lockstep runs one thread at a time" : NULL;
    comm->device = device;
    comm->error = error;
    comm->state = tc;
    comm->split = llmpar__threads_split;
    comm->destroy = llmpar__threads_destroy;
    llmpar_comm_fill(comm, llmpar__threads_enqueue);
    comm->abort = llmpar__threads_abort;
    *out = comm;
    return LLMPAR_OK;
}

/* The ranks show (color, key); the first of each color makes the group and shows it; the others of that color take it. */
static llmpar_status llmpar__threads_split(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out)
{
    llmpar__threads_comm *tc = (llmpar__threads_comm *)comm->state;
    *out = NULL;
    LLMPAR__ZEROED(llmpar__threads_call, call);
    const llmpar_collective given = llmpar__comm_collective(NULL, NULL, 0, LLMPAR_DTYPE_DEFAULT, name);
    llmpar_call_describe(comm, LLMPAR_CALL_SPLIT, &given, &call.what);
    if (call.what.rank < 0) call.what.rank = tc->world_rank;
    int32_t mine[2] = {color, key}, theirs[2], n = comm->ranks, rank = 0, ranks = 0, leader = -1, leader_key = 0;
    llmpar_status st = llmpar_order_wait(&tc->order);
    if (st) return st;
    llmpar__threads_slot *slots = NULL;
    st = llmpar__threads_meet(tc, &call, mine, sizeof mine, &slots);
    if (st) return st;
    for (int32_t i = 0; i < n && color >= 0; i++) {
        memcpy(theirs, slots[i].payload, sizeof theirs);
        if (theirs[0] != color) continue;
        ranks++;
        if (theirs[1] < key || (theirs[1] == key && i < comm->rank)) rank++;
        if (leader < 0 || theirs[1] < leader_key) {
            leader = i;
            leader_key = theirs[1];
        }
    }
    llmpar__threads_group *group = NULL;
    if (leader == comm->rank) {
        int32_t *members = LLMPAR__ALLOC(int32_t, tc->heap, (size_t)ranks);
        if (members) {
            for (int32_t i = 0; i < n; i++) {
                int32_t place = 0, other[2];
                memcpy(theirs, slots[i].payload, sizeof theirs);
                if (theirs[0] != color) continue;
                for (int32_t j = 0; j < n; j++) {
                    memcpy(other, slots[j].payload, sizeof other);
                    if (other[0] == color && (other[1] < theirs[1] || (other[1] == theirs[1] && j < i))) place++;
                }
                members[place] = tc->group->world_rank[i];
            }
            group = llmpar__threads_group_create(tc->world, ranks, members, name);
        }
        llmpar_heap_free(tc->heap, members);
    }
    call.what.root = 1; /* not to be taken for the first half */
    st = llmpar__threads_meet(tc, &call, &group, sizeof group, &slots);
    if (st || color < 0) return st;
    memcpy(&group, slots[leader].payload, sizeof group);
    if (!group) return llmpar__threads_failed(tc, llmpar_error_set(comm->error, LLMPAR_ERR_MEMORY, "split \"%s\" of %s: out of memory for %d ranks", name, comm->axis, (int)ranks));
    st = llmpar__threads_half(group, rank, comm->record, tc->heap, comm->device, comm->error, out);
    return st ? llmpar__threads_failed(tc, st) : LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_threads_comm_create(llmpar_threads_world *world, int32_t rank, llmpar_heap *heap, llmpar_device *device, llmpar_error *error, llmpar_comm **out)
{
    *out = NULL;
    if (rank < 0 || rank >= world->desc.ranks) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "threads: rank %d, expected 0 to %d", (int)rank, (int)world->desc.ranks - 1);
    llmpar__threads_first_turn(world, rank);
    llmpar_record *record = NULL;
    uint64_t deadline_ms = world->desc.lockstep || world->desc.deadline > 1e12 ? 0 : (uint64_t)(world->desc.deadline * 1e3);
    if (world->desc.ranks > 1 && llmpar_record_create(heap, rank, deadline_ms, &record)) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "threads: out of memory for the record of rank %d", (int)rank);
    llmpar_status st = llmpar__threads_half(world->world_group, rank, record, heap, device, error, out);
    if (st) {
        llmpar_record_destroy(record);
        return st;
    }
    ((llmpar__threads_comm *)(*out)->state)->record = record;
    if (record) llmpar__threads_show(world, rank, record, device);
    return LLMPAR_OK;
}

#undef LLMPAR__THREADS_PIECE
#undef LLMPAR__THREADS_GRAIN
