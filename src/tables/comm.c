/* comm: the wrappers: what is checked before any implementation sees a call, the counters, the record, and the one-rank case. */
#include "tables/comm.h"

#include <string.h>

#include "base/size.h"
#include "tables/tables_internal.h"

/* A slot that lies beyond the table's size is empty. */
#define LLMPAR__COMM_END(slot) (offsetof(llmpar_comm, slot) + sizeof(((llmpar_comm *)0)->slot))

typedef llmpar_status (*llmpar__comm_slot)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);

static llmpar_status llmpar__comm_abi(const llmpar_comm *comm, size_t slot_end)
{
    if (comm->abi == LLMPAR_COMM_ABI && comm->size >= slot_end) return LLMPAR_OK;
    return llmpar_error_set(comm->error, LLMPAR_ERR_ABI, "communicator %s: table with abi %u and %u bytes, expected abi %u and at least %lu bytes",
                            comm->axis ? comm->axis : "?", (unsigned)comm->abi, (unsigned)comm->size, LLMPAR_COMM_ABI, (unsigned long)slot_end);
}

LLMPAR__PRIVATE_DEF int llmpar__comm_overlap(const void *a, size_t a_bytes, const void *b, size_t b_bytes)
{
    return a_bytes && b_bytes && (uintptr_t)a < (uintptr_t)b + b_bytes && (uintptr_t)b < (uintptr_t)a + a_bytes;
}

static int llmpar__comm_reducible(llmpar_reduce_op op, llmpar_dtype dtype)
{
    if (dtype == LLMPAR_F32 || dtype == LLMPAR_F64 || dtype == LLMPAR_I64) return op == LLMPAR_SUM || op == LLMPAR_MAX;
    return dtype == LLMPAR_U64 && op == LLMPAR_SUM;
}

/* One rank: every collective is at most a copy. */
static llmpar_status llmpar__comm_alone(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call, size_t bytes)
{
    if (!bytes || !call->recv || call->recv == call->send) return LLMPAR_OK;
    return comm->device->copy(comm->device, stream, call->recv, call->send, bytes);
}

/* The argument of the host calls that mark an entry of the record when its stream comes there. */
typedef struct llmpar__comm_mark {
    llmpar_record *record;
    uint64_t id;
    int completed;
} llmpar__comm_mark;

static llmpar_status llmpar__comm_marked(void *arg)
{
    const llmpar__comm_mark *mark = (const llmpar__comm_mark *)arg;
    (mark->completed ? llmpar_record_completed : llmpar_record_started)(mark->record, mark->id);
    return LLMPAR_OK;
}

/* Is there a description of the call that the slot was asked for? */
static const llmpar_call *llmpar__comm_shown(const llmpar_comm *comm) { return LLMPAR__HAS(comm, call) ? comm->call : NULL; }

LLMPAR_DEF void llmpar_call_describe(const llmpar_comm *comm, llmpar_call_op op, const llmpar_collective *call, llmpar_call *out)
{
    const llmpar_call *shown = llmpar__comm_shown(comm);
    const char *tag = call->tag ? call->tag : "";
    size_t length = strlen(tag), axis = comm->axis ? strlen(comm->axis) : 0;
    memset(out, 0, sizeof *out);
    out->count = call->count;
    out->blocks = call->count && !call->blocks ? 1 : call->blocks;
    out->op = (int32_t)op;
    out->dtype = (int32_t)call->dtype;
    out->reduce = (int32_t)call->op;
    out->root = call->root;
    out->peer = call->peer;
    out->member = comm->rank;
    out->members = comm->ranks;
    out->number = shown ? shown->number : 0;
    out->rank = shown ? shown->rank : -1;
    if (axis) memcpy(out->axis, comm->axis, axis < sizeof out->axis ? axis : sizeof out->axis - 1);
    if (comm->error) memcpy(out->where, comm->error->where, sizeof out->where);
    memcpy(out->tag, tag, length < sizeof out->tag ? length : sizeof out->tag - 1);
    out->tag_bits = 0xcbf29ce484222325u ^ length;
    for (size_t i = 0; i < length; i += 8) {
        uint64_t word = 0;
        memcpy(&word, tag + i, length - i < 8 ? length - i : 8);
        out->tag_bits = (out->tag_bits ^ word) * 0x9e3779b97f4a7c15u;
        out->tag_bits ^= out->tag_bits >> 32;
    }
}

/* Describes the call in *out (kept by the caller until the slot has returned) and enters it in the record, if there is one; mark->id is 0 otherwise. */
static void llmpar__comm_enter(llmpar_comm *comm, llmpar_call_op op, const llmpar_collective *call, llmpar_call *out, llmpar__comm_mark *mark)
{
    llmpar_call_describe(comm, op, call, out);
    mark->record = comm->size >= LLMPAR__COMM_END(group) ? comm->record : NULL;
    mark->completed = 0;
    mark->id = mark->record && comm->ranks > 1 ? llmpar_record_begin(mark->record, comm->group, out) : 0;
}

/* Shows the description to the slot, unless the table is too old to have a place for it; returns what stood there (a slot may be made of other collectives of the same table). */
static const llmpar_call *llmpar__comm_show(llmpar_comm *comm, const llmpar_call *call)
{
    if (comm->size < LLMPAR__COMM_END(call)) return NULL;
    const llmpar_call *before = comm->call;
    comm->call = call;
    return before;
}

/* The slot between its marks. */
static llmpar_status llmpar__comm_slot_run(llmpar_comm *comm, llmpar_stream *stream, llmpar_call_op op, const llmpar_collective *call, llmpar__comm_slot slot)
{
    llmpar_call described;
    llmpar__comm_mark mark;
    llmpar__comm_enter(comm, op, call, &described, &mark);
    llmpar_status st = mark.id ? comm->device->host_call(comm->device, stream, llmpar__comm_marked, &mark, sizeof mark) : LLMPAR_OK;
    if (st) return st;
    const llmpar_call *before = llmpar__comm_show(comm, &described);
    st = slot ? slot(comm, stream, call) : comm->barrier(comm, stream, call->tag);
    llmpar__comm_show(comm, before);
    mark.completed = 1;
    if (!st && mark.id) st = comm->device->host_call(comm->device, stream, llmpar__comm_marked, &mark, sizeof mark);
    return st;
}

static llmpar_status llmpar__comm_call(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *given, llmpar_call_op kind, llmpar__comm_slot slot, size_t slot_end)
{
    const char *name = llmpar_call_op_name(kind);
    llmpar_status st = llmpar__comm_abi(comm, slot_end);
    if (st) return st;
    llmpar_collective call = *given;
    if (!call.blocks) call.blocks = 1;
    if (!call.tag) call.tag = "";
    size_t item = llmpar_dtype_size(call.dtype), part, all, ranks = (size_t)comm->ranks;
    if (!item) return llmpar_error_set(comm->error, LLMPAR_ERR_ARGUMENT, "%s \"%s\" on %s: dtype %d is not a stored type", name, call.tag, comm->axis, (int)call.dtype);
    if (!llmpar_size_mul(call.count, call.blocks, &part) || !llmpar_size_mul(part, item, &part) || !llmpar_size_mul(part, ranks, &all))
        return llmpar_error_set(comm->error, LLMPAR_ERR_OVERFLOW, "%s \"%s\" on %s: %lu elements in %lu blocks overflow the address space",
                                name, call.tag, comm->axis, (unsigned long)call.count, (unsigned long)call.blocks);
    int reduces = kind == LLMPAR_CALL_REDUCE_SCATTER || kind == LLMPAR_CALL_ALL_REDUCE;
    if (reduces && !llmpar__comm_reducible(call.op, call.dtype))
        return llmpar_error_set(comm->error, LLMPAR_ERR_UNSUPPORTED, "%s \"%s\" on %s: no %s of %s (sum: f32 f64 i64 u64; max: f32 f64 i64)",
                                name, call.tag, comm->axis, call.op == LLMPAR_SUM ? "sum" : call.op == LLMPAR_MAX ? "max" : "such operation", llmpar_dtype_name(call.dtype));
    if (!reduces) call.op = LLMPAR_SUM;
    if (kind != LLMPAR_CALL_BROADCAST) call.root = 0;
    if (call.root < 0 || call.root >= comm->ranks)
        return llmpar_error_set(comm->error, LLMPAR_ERR_ARGUMENT, "%s \"%s\" on %s: root %d, expected 0 to %d", name, call.tag, comm->axis, (int)call.root, (int)comm->ranks - 1);
    int point = kind == LLMPAR_CALL_SEND || kind == LLMPAR_CALL_RECV;
    if (!point) call.peer = 0;
    else if (call.peer < 0 || call.peer >= comm->ranks || call.peer == comm->rank)
        return llmpar_error_set(comm->error, LLMPAR_ERR_ARGUMENT, "%s \"%s\" on %s: peer %d of rank %d, expected another rank from 0 to %d",
                                name, call.tag, comm->axis, (int)call.peer, (int)comm->rank, (int)comm->ranks - 1);
    int needs_send = kind != LLMPAR_CALL_RECV && !(kind == LLMPAR_CALL_BROADCAST && comm->rank != call.root);
    if (!needs_send) call.send = NULL; /* a broadcast in place, send == recv on every rank, is a root's only on the root */
    int needs_recv = kind != LLMPAR_CALL_SEND && !(kind == LLMPAR_CALL_BROADCAST && comm->rank == call.root);
    if (part && ((needs_send && !call.send) || (needs_recv && !call.recv)))
        return llmpar_error_set(comm->error, LLMPAR_ERR_ARGUMENT, "%s \"%s\" on %s: %s is NULL with %lu elements", name, call.tag, comm->axis, needs_send && !call.send ? "send" : "recv", (unsigned long)call.count);

    size_t send_bytes = kind == LLMPAR_CALL_REDUCE_SCATTER || kind == LLMPAR_CALL_ALL_TO_ALL ? all : part;
    size_t recv_bytes = kind == LLMPAR_CALL_ALL_GATHER || kind == LLMPAR_CALL_ALL_TO_ALL ? all : part;
    if (call.send && call.recv && needs_send && !point && llmpar__comm_overlap(call.send, send_bytes, call.recv, recv_bytes)) {
        size_t shift = call.blocks == 1 ? part * (size_t)comm->rank : 0;
        const char *send = (const char *)call.send, *recv = (const char *)call.recv;
        int fine = send == recv && (kind == LLMPAR_CALL_ALL_REDUCE || kind == LLMPAR_CALL_BROADCAST || ranks == 1);
        if (kind == LLMPAR_CALL_ALL_GATHER && call.blocks == 1) fine = send == recv + shift;
        if (kind == LLMPAR_CALL_REDUCE_SCATTER && call.blocks == 1) fine = recv == send + shift;
        if (!fine)
            return llmpar_error_set(comm->error, LLMPAR_ERR_ARGUMENT, "%s \"%s\" on %s: send and recv overlap in a way that is not the in-place form (send %p, recv %p, %lu bytes)",
                                    name, call.tag, comm->axis, call.send, call.recv, (unsigned long)part);
    }

    if (ranks == 1) st = llmpar__comm_alone(comm, stream, &call, part);
    else if (!slot) st = llmpar_error_set(comm->error, LLMPAR_ERR_UNSUPPORTED, "%s on %s: this communicator has no such collective", name, comm->axis);
    else st = llmpar__comm_slot_run(comm, stream, kind, &call, slot);
    if (st) return st;
    comm->sequence++;
    uint64_t moved = part;
    if (kind == LLMPAR_CALL_ALL_REDUCE) moved = (uint64_t)(2 * ((double)(ranks - 1) / (double)ranks) * (double)part + 0.5);
    else if (kind == LLMPAR_CALL_RECV || (kind == LLMPAR_CALL_BROADCAST && comm->rank != call.root)) moved = 0;
    else if (kind != LLMPAR_CALL_SEND) moved = (uint64_t)part * (ranks - 1);
    comm->bytes_sent += moved;
    return LLMPAR_OK;
}

#define LLMPAR__COMM_CALL(slot, kind) llmpar__comm_call(comm, stream, call, kind, comm->slot, LLMPAR__COMM_END(slot))

LLMPAR_DEF llmpar_status llmpar_all_gather(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return LLMPAR__COMM_CALL(all_gather, LLMPAR_CALL_ALL_GATHER); }
LLMPAR_DEF llmpar_status llmpar_reduce_scatter(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return LLMPAR__COMM_CALL(reduce_scatter, LLMPAR_CALL_REDUCE_SCATTER); }
LLMPAR_DEF llmpar_status llmpar_all_reduce(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return LLMPAR__COMM_CALL(all_reduce, LLMPAR_CALL_ALL_REDUCE); }
LLMPAR_DEF llmpar_status llmpar_broadcast(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return LLMPAR__COMM_CALL(broadcast, LLMPAR_CALL_BROADCAST); }
LLMPAR_DEF llmpar_status llmpar_all_to_all(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return LLMPAR__COMM_CALL(all_to_all, LLMPAR_CALL_ALL_TO_ALL); }
LLMPAR_DEF llmpar_status llmpar_send(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return LLMPAR__COMM_CALL(send, LLMPAR_CALL_SEND); }
LLMPAR_DEF llmpar_status llmpar_recv(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return LLMPAR__COMM_CALL(recv, LLMPAR_CALL_RECV); }

LLMPAR__PRIVATE_DEF llmpar_status llmpar__comm_thread_check(const llmpar_comm *comm, const llmpar_call *call)
{
    llmpar_error *error = comm->one_thread ? llmpar_device_thread_error(comm->device, NULL) : NULL;
    return error ? llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "%s \"%s\" on %s: on the thread of a stream: %s", llmpar_call_op_name((llmpar_call_op)call->op), call->tag, comm->axis, comm->one_thread) : LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_collective llmpar__comm_collective(const void *send, void *recv, size_t count, llmpar_dtype dtype, const char *tag)
{
    const llmpar_collective call = {send, recv, count, 0, dtype, LLMPAR_SUM, 0, 0, tag};
    return call;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__comm_talk(llmpar_comm *comm, llmpar_call_op op, const llmpar_collective *host)
{
    llmpar_device *device = comm->device;
    llmpar_collective call = *host;
    llmpar_stream *stream = NULL;
    void *buffer = NULL;
    int gathers = op == LLMPAR_CALL_ALL_GATHER;
    size_t part = call.count * llmpar_dtype_size(call.dtype), whole = gathers ? part * (size_t)comm->ranks : part;
    llmpar_status status = device->alloc(device, whole, &buffer);
    if (status) return status;
    status = device->stream_create(device, call.tag, &stream);
    char *mine = (char *)buffer + (gathers ? part * (size_t)comm->rank : 0);
    call.send = mine;
    call.recv = buffer;
    if (!status) status = device->copy(device, stream, mine, host->send, part);
    if (!status) status = gathers ? llmpar_all_gather(comm, stream, &call) : op == LLMPAR_CALL_BROADCAST ? llmpar_broadcast(comm, stream, &call) : llmpar_all_reduce(comm, stream, &call);
    if (!status) status = device->copy(device, stream, host->recv, buffer, whole);
    if (stream) {
        status = llmpar__device_done(device, stream, status);
        device->stream_destroy(device, stream);
    }
    device->free(device, buffer, whole);
    return status;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__comm_largest(llmpar_comm *comm, int64_t *values, size_t count, const char *tag)
{
    llmpar_collective call = llmpar__comm_collective(values, values, count, LLMPAR_I64, tag);
    call.op = LLMPAR_MAX;
    return llmpar__comm_talk(comm, LLMPAR_CALL_ALL_REDUCE, &call);
}

LLMPAR_DEF llmpar_status llmpar_comm_barrier(llmpar_comm *comm, llmpar_stream *stream, const char *tag)
{
    llmpar_status st = llmpar__comm_abi(comm, LLMPAR__COMM_END(barrier));
    LLMPAR__ZEROED(llmpar_collective, call);
    call.tag = tag ? tag : "";
    if (!st && comm->ranks > 1) st = llmpar__comm_slot_run(comm, stream, LLMPAR_CALL_BARRIER, &call, NULL);
    if (!st) comm->sequence++;
    return st;
}

/* ---- slots that are one function ---- */

#define LLMPAR__COMM_ONE(slot, op) \
    static llmpar_status llmpar__comm_one_##slot(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return comm->collective(comm, stream, call, (int32_t)op); }
LLMPAR__COMM_ONE(all_gather, LLMPAR_CALL_ALL_GATHER)
LLMPAR__COMM_ONE(reduce_scatter, LLMPAR_CALL_REDUCE_SCATTER)
LLMPAR__COMM_ONE(all_reduce, LLMPAR_CALL_ALL_REDUCE)
LLMPAR__COMM_ONE(broadcast, LLMPAR_CALL_BROADCAST)
LLMPAR__COMM_ONE(all_to_all, LLMPAR_CALL_ALL_TO_ALL)
LLMPAR__COMM_ONE(send, LLMPAR_CALL_SEND)
LLMPAR__COMM_ONE(recv, LLMPAR_CALL_RECV)
#undef LLMPAR__COMM_ONE

static llmpar_status llmpar__comm_one_barrier(llmpar_comm *comm, llmpar_stream *stream, const char *tag)
{
    LLMPAR__ZEROED(llmpar_collective, call);
    call.tag = tag;
    return comm->collective(comm, stream, &call, (int32_t)LLMPAR_CALL_BARRIER);
}

LLMPAR_DEF void llmpar_comm_fill(llmpar_comm *comm, llmpar_status (*collective)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call, int32_t op))
{
    comm->collective = collective;
    comm->barrier = llmpar__comm_one_barrier;
    comm->all_gather = llmpar__comm_one_all_gather;
    comm->reduce_scatter = llmpar__comm_one_reduce_scatter;
    comm->all_reduce = llmpar__comm_one_all_reduce;
    comm->broadcast = llmpar__comm_one_broadcast;
    comm->all_to_all = llmpar__comm_one_all_to_all;
    comm->send = llmpar__comm_one_send;
    comm->recv = llmpar__comm_one_recv;
}

LLMPAR_DEF llmpar_status llmpar_comm_split(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out)
{
    *out = NULL;
    llmpar_status st = llmpar__comm_abi(comm, LLMPAR__COMM_END(split));
    if (st) return st;
    llmpar_call described;
    llmpar__comm_mark mark;
    LLMPAR__ZEROED(llmpar_collective, call);
    call.tag = name ? name : "";
    llmpar__comm_enter(comm, LLMPAR_CALL_SPLIT, &call, &described, &mark);
    if (mark.id) llmpar_record_started(mark.record, mark.id);
    const llmpar_call *before = llmpar__comm_show(comm, &described);
    st = comm->split(comm, color, key, call.tag, out);
    llmpar__comm_show(comm, before);
    if (st) return st;
    if (*out && (*out)->size >= LLMPAR__COMM_END(unchecked) && comm->size >= LLMPAR__COMM_END(unchecked)) (*out)->unchecked = comm->unchecked;
    if (mark.id) llmpar_record_completed(mark.record, mark.id);
    comm->sequence++;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_comm_destroy(llmpar_comm *comm)
{
    if (comm) comm->destroy(comm);
}

#undef LLMPAR__COMM_END
#undef LLMPAR__COMM_CALL
