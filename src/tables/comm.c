/* comm: the wrappers: what is checked before any implementation sees a call, the counters, and the one-rank case. */
#include "tables/comm.h"

#include <string.h>

#include "base/size.h"

typedef llmpar_status (*llmpar__comm_slot)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);

/* Which of a call's buffers hold `ranks` parts a block, and who needs them. */
typedef enum llmpar__comm_kind {
    LLMPAR__COMM_ALL_GATHER,
    LLMPAR__COMM_REDUCE_SCATTER,
    LLMPAR__COMM_ALL_REDUCE,
    LLMPAR__COMM_BROADCAST,
    LLMPAR__COMM_ALL_TO_ALL,
    LLMPAR__COMM_SEND,
    LLMPAR__COMM_RECV
} llmpar__comm_kind;

static const char *llmpar__comm_name(llmpar__comm_kind kind)
{
    static const char *const names[] = { "all_gather", "reduce_scatter", "all_reduce", "broadcast", "all_to_all", "send", "recv" };
    return names[kind];
}

static llmpar_status llmpar__comm_abi(const llmpar_comm *comm, size_t slot_end)
{
    if (comm->abi == LLMPAR_COMM_ABI && comm->size >= slot_end) return LLMPAR_OK;
    return llmpar_error_set(comm->error, LLMPAR_ERR_ABI, "communicator %s: table with abi %u and %u bytes, expected abi %u and at least %lu bytes",
                            comm->axis ? comm->axis : "?", (unsigned)comm->abi, (unsigned)comm->size, LLMPAR_COMM_ABI, (unsigned long)slot_end);
}

static int llmpar__comm_overlap(const void *a, size_t a_bytes, const void *b, size_t b_bytes)
{
    uintptr_t a0 = (uintptr_t)a, b0 = (uintptr_t)b;
    return a_bytes && b_bytes && a0 < b0 + b_bytes && b0 < a0 + a_bytes;
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

static llmpar_status llmpar__comm_call(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *given, llmpar__comm_kind kind, llmpar__comm_slot slot, size_t slot_end)
{
    const char *name = llmpar__comm_name(kind);
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
    int reduces = kind == LLMPAR__COMM_REDUCE_SCATTER || kind == LLMPAR__COMM_ALL_REDUCE;
    if (reduces && !llmpar__comm_reducible(call.op, call.dtype))
        return llmpar_error_set(comm->error, LLMPAR_ERR_UNSUPPORTED, "%s \"%s\" on %s: no %s of %s (sum: f32 f64 i64 u64; max: f32 f64 i64)",
                                name, call.tag, comm->axis, call.op == LLMPAR_SUM ? "sum" : call.op == LLMPAR_MAX ? "max" : "such operation", llmpar_dtype_name(call.dtype));
    if (!reduces) call.op = LLMPAR_SUM;
    if (kind != LLMPAR__COMM_BROADCAST) call.root = 0;
    if (call.root < 0 || call.root >= comm->ranks)
        return llmpar_error_set(comm->error, LLMPAR_ERR_ARGUMENT, "%s \"%s\" on %s: root %d, expected 0 to %d", name, call.tag, comm->axis, (int)call.root, (int)comm->ranks - 1);
    int point = kind == LLMPAR__COMM_SEND || kind == LLMPAR__COMM_RECV;
    if (!point) call.peer = 0;
    else if (call.peer < 0 || call.peer >= comm->ranks || call.peer == comm->rank)
        return llmpar_error_set(comm->error, LLMPAR_ERR_ARGUMENT, "%s \"%s\" on %s: peer %d of rank %d, expected another rank from 0 to %d",
                                name, call.tag, comm->axis, (int)call.peer, (int)comm->rank, (int)comm->ranks - 1);
    int needs_send = kind != LLMPAR__COMM_RECV && !(kind == LLMPAR__COMM_BROADCAST && comm->rank != call.root);
    int needs_recv = kind != LLMPAR__COMM_SEND && !(kind == LLMPAR__COMM_BROADCAST && comm->rank == call.root);
    if (part && ((needs_send && !call.send) || (needs_recv && !call.recv)))
        return llmpar_error_set(comm->error, LLMPAR_ERR_ARGUMENT, "%s \"%s\" on %s: %s is NULL with %lu elements", name, call.tag, comm->axis, needs_send && !call.send ? "send" : "recv", (unsigned long)call.count);

    size_t send_bytes = kind == LLMPAR__COMM_REDUCE_SCATTER || kind == LLMPAR__COMM_ALL_TO_ALL ? all : part;
    size_t recv_bytes = kind == LLMPAR__COMM_ALL_GATHER || kind == LLMPAR__COMM_ALL_TO_ALL ? all : part;
    if (call.send && call.recv && needs_send && !point && llmpar__comm_overlap(call.send, send_bytes, call.recv, recv_bytes)) {
        size_t shift = call.blocks == 1 ? part * (size_t)comm->rank : 0;
        const char *send = (const char *)call.send, *recv = (const char *)call.recv;
        int fine = send == recv && (kind == LLMPAR__COMM_ALL_REDUCE || kind == LLMPAR__COMM_BROADCAST || ranks == 1);
        if (kind == LLMPAR__COMM_ALL_GATHER && call.blocks == 1) fine = send == recv + shift;
        if (kind == LLMPAR__COMM_REDUCE_SCATTER && call.blocks == 1) fine = recv == send + shift;
        if (!fine)
            return llmpar_error_set(comm->error, LLMPAR_ERR_ARGUMENT, "%s \"%s\" on %s: send and recv overlap in a way that is not the in-place form (send %p, recv %p, %lu bytes)",
                                    name, call.tag, comm->axis, call.send, call.recv, (unsigned long)part);
    }

    if (ranks == 1) st = llmpar__comm_alone(comm, stream, &call, part);
    else if (!slot) st = llmpar_error_set(comm->error, LLMPAR_ERR_UNSUPPORTED, "%s on %s: this communicator has no such collective", name, comm->axis);
    else st = slot(comm, stream, &call);
    if (st) return st;
    comm->sequence++;
    uint64_t moved = part;
    if (kind == LLMPAR__COMM_ALL_REDUCE) moved = (uint64_t)(2 * ((double)(ranks - 1) / (double)ranks) * (double)part + 0.5);
    else if (kind == LLMPAR__COMM_RECV || (kind == LLMPAR__COMM_BROADCAST && comm->rank != call.root)) moved = 0;
    else if (kind != LLMPAR__COMM_SEND) moved = (uint64_t)part * (ranks - 1);
    comm->bytes_sent += moved;
    return LLMPAR_OK;
}

/* A slot that lies beyond the table's size is empty. */
#define LLMPAR__COMM_END(slot) (offsetof(llmpar_comm, slot) + sizeof(((llmpar_comm *)0)->slot))
#define LLMPAR__COMM_CALL(slot, kind) llmpar__comm_call(comm, stream, call, kind, comm->slot, LLMPAR__COMM_END(slot))

LLMPAR_DEF llmpar_status llmpar_all_gather(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return LLMPAR__COMM_CALL(all_gather, LLMPAR__COMM_ALL_GATHER); }
LLMPAR_DEF llmpar_status llmpar_reduce_scatter(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return LLMPAR__COMM_CALL(reduce_scatter, LLMPAR__COMM_REDUCE_SCATTER); }
LLMPAR_DEF llmpar_status llmpar_all_reduce(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return LLMPAR__COMM_CALL(all_reduce, LLMPAR__COMM_ALL_REDUCE); }
LLMPAR_DEF llmpar_status llmpar_broadcast(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return LLMPAR__COMM_CALL(broadcast, LLMPAR__COMM_BROADCAST); }
LLMPAR_DEF llmpar_status llmpar_all_to_all(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return LLMPAR__COMM_CALL(all_to_all, LLMPAR__COMM_ALL_TO_ALL); }
LLMPAR_DEF llmpar_status llmpar_send(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return LLMPAR__COMM_CALL(send, LLMPAR__COMM_SEND); }
LLMPAR_DEF llmpar_status llmpar_recv(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return LLMPAR__COMM_CALL(recv, LLMPAR__COMM_RECV); }

LLMPAR_DEF llmpar_status llmpar_comm_barrier(llmpar_comm *comm, llmpar_stream *stream, const char *tag)
{
    llmpar_status st = llmpar__comm_abi(comm, LLMPAR__COMM_END(barrier));
    if (!st && comm->ranks > 1) st = comm->barrier(comm, stream, tag ? tag : "");
    if (!st) comm->sequence++;
    return st;
}

LLMPAR_DEF llmpar_status llmpar_comm_split(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out)
{
    *out = NULL;
    llmpar_status st = llmpar__comm_abi(comm, LLMPAR__COMM_END(split));
    if (!st) st = comm->split(comm, color, key, name ? name : "", out);
    if (!st) comm->sequence++;
    return st;
}

LLMPAR_DEF void llmpar_comm_destroy(llmpar_comm *comm)
{
    if (comm) comm->destroy(comm);
}

#undef LLMPAR__COMM_END
#undef LLMPAR__COMM_CALL
