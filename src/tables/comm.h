/* comm: the communicator table: collectives between the ranks of one mesh axis. A user may bring another implementation, or replace one slot.

   Every collective is an enqueue on a stream of the communicator's device: it returns when accepted; buffers belong to the stream until an event behind it completes; all ranks of the communicator make the
   same calls in the same order. Reductions combine the ranks' contributions in the balanced binary tree over the rank index (llmpar_tree_split), lower index on the left, in the dtype given: the
   same bits on every implementation. When a rank fails, every other rank's pending and next collective returns LLMPAR_ERR_PEER; nothing hangs. */
#ifndef LLMPAR_COMM_H
#define LLMPAR_COMM_H

#include "base/dtype.h"
#include "base/status.h"
#include "tables/device.h"

#define LLMPAR_COMM_ABI 1u

typedef struct llmpar_comm llmpar_comm;

typedef enum llmpar_reduce_op { LLMPAR_SUM = 0, LLMPAR_MAX = 1 } llmpar_reduce_op; /* SUM: F32 F64 I64 U64; MAX: F32 F64 I64 */

/* One call. `count` elements per rank and block; `blocks` (0 means 1) repeats the collective over consecutive blocks of the buffers:
     all_gather      send[blocks][count]           recv[blocks][ranks][count]
     reduce_scatter  send[blocks][ranks][count]    recv[blocks][count]
     all_reduce      send[blocks][count]           recv[blocks][count]
     broadcast       send on root, recv elsewhere: [blocks][count]   (root's recv may be NULL or send; elsewhere send is not looked at)
     all_to_all      send[blocks][ranks][count]    recv[blocks][ranks][count]
     send / recv     [blocks][count] to / from rank `peer`
   In place: all_gather with send == recv + rank*count (blocks 1); reduce_scatter with recv == send + rank*count (blocks 1); all_reduce and broadcast with recv == send. Other overlaps are errors of the caller. */
typedef struct llmpar_collective {
    const void *send;
    void *recv;
    size_t count, blocks;
    llmpar_dtype dtype;
    llmpar_reduce_op op;
    int32_t root, peer;
    const char *tag;      /* "layers.7.wo/reduce_scatter"; borrowed until the call returns, kept as a copy for messages; NULL = "" */
} llmpar_collective;

struct llmpar_comm {
    uint32_t abi, size;      /* LLMPAR_COMM_ABI, sizeof(llmpar_comm) */
    int32_t rank, ranks;     /* this rank's index in the communicator and their number */
    const char *axis;        /* "tp", "dp", "world": for messages; owned by the communicator */
    llmpar_device *device;   /* does the arithmetic; the creating rank's */
    llmpar_error *error;     /* where failures leave their text; the rank's */
    void *state;
    uint64_t sequence;       /* collectives accepted so far */
    uint64_t bytes_sent;     /* by the formula of the algorithm: all_gather (n-1)*count, reduce_scatter (n-1)*count, all_reduce 2(n-1)/n*count ... elements of this rank, in bytes */

    /* Ranks with the same color (>= 0) form a new communicator, ordered by (key, rank); color < 0: *out = NULL. name is copied. Collective. */
    llmpar_status (*split)(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out);
    void (*destroy)(llmpar_comm *comm); /* local; NULL is refused by the wrapper */
    llmpar_status (*barrier)(llmpar_comm *comm, llmpar_stream *stream, const char *tag);
    llmpar_status (*all_gather)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
    llmpar_status (*reduce_scatter)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
    llmpar_status (*all_reduce)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
    llmpar_status (*broadcast)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
    llmpar_status (*all_to_all)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
    llmpar_status (*send)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
    llmpar_status (*recv)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
    /* Local, from any rank: every rank's pending and next collective on any communicator of the job returns LLMPAR_ERR_PEER with this error's rank and text. */
    void (*abort)(llmpar_comm *comm, const llmpar_error *error);
    /* Kept by the wrappers (record.h). A table that ends before `group`, or has no record, works without being recorded. */
    const struct llmpar_call *call;  /* during a slot: the call of the wrapper, for messages (llmpar_call_describe) */
    struct llmpar_record *record;    /* the rank's; set by llmpar_record_attach, NULL: none */
    int32_t group;                   /* this communicator's number there */
    int32_t unchecked;               /* 1: the ranks' fingerprints are not compared (check level 0); inherited by split */
    const char *one_thread;          /* not NULL: collectives run on the rank's own thread only, so not on a stream that has a thread of its own (device.h), and why. NULL: on any; those on one communicator
                                        run in the order of the calls, whatever their streams */
    /* What the slots that llmpar_comm_fill has filled in call; else empty. op: llmpar_call_op (record.h). */
    llmpar_status (*collective)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call, int32_t op);
};

/* For implementations whose collectives are one function: fills barrier, all_gather .. send, recv with functions that call it. A barrier's call has a tag alone. Local. */
LLMPAR_API void llmpar_comm_fill(llmpar_comm *comm, llmpar_status (*collective)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call, int32_t op));

/* Wrappers with checks common to all implementations (abi, sizes, dtype and op allowed, root and peer in range, NULL buffers with a count). With ranks == 1 they copy
   send to recv on the stream where these differ and call no slot. They keep `sequence` and `bytes_sent`. Collective. */
LLMPAR_API llmpar_status llmpar_comm_barrier(llmpar_comm *comm, llmpar_stream *stream, const char *tag);
LLMPAR_API llmpar_status llmpar_all_gather(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
LLMPAR_API llmpar_status llmpar_reduce_scatter(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
LLMPAR_API llmpar_status llmpar_all_reduce(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
LLMPAR_API llmpar_status llmpar_broadcast(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
LLMPAR_API llmpar_status llmpar_all_to_all(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
LLMPAR_API llmpar_status llmpar_send(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
LLMPAR_API llmpar_status llmpar_recv(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
LLMPAR_API llmpar_status llmpar_comm_split(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out);
LLMPAR_API void llmpar_comm_destroy(llmpar_comm *comm); /* local */

#endif
