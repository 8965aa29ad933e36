/* mpi_internal: what the files of the MPI communicator share: mpi_world.c (set-up, control messages, failing), mpi_wait.c (messages under way, and how ranks meet before data moves),
   mpi.c (the collectives). */
#ifndef LLMPAR_COMM_MPI_INTERNAL_H
#define LLMPAR_COMM_MPI_INTERNAL_H

#include "base/clock_internal.h"
#include "comm/mpi.h"
#include "tables/halving.h"
#include "tables/record.h"

#ifdef LLMPAR_USE_MPI

#include <mpi.h>
#include <pthread.h>

#define LLMPAR__MPI_INLINE 2048u /* bytes a rank can send beside its header */
#define LLMPAR__MPI_BATCH 64     /* data messages under way */

/* What every collective begins with. Only `bytes` of the payload travel. */
typedef struct llmpar__mpi_header {
    uint64_t fingerprint, context, bytes;
    llmpar_call call;                          /* op NONE: nothing has come */
    unsigned char payload[LLMPAR__MPI_INLINE]; /* aligned to 8 */
} llmpar__mpi_header;

typedef enum llmpar__mpi_note_kind { LLMPAR__MPI_BEAT = 1, LLMPAR__MPI_ASKED = 2, LLMPAR__MPI_FAILED = 3, LLMPAR__MPI_FINISHED = 4, LLMPAR__MPI_BYE = 5 } llmpar__mpi_note_kind;

/* A control message. Plain bytes. */
typedef struct llmpar__mpi_note {
    int32_t kind, rank;
    llmpar_position position; /* of the sender */
    llmpar_error error;       /* the failure that the sender knows; status OK: none */
} llmpar__mpi_note;

/* One note to all other ranks, sent at most once. */
typedef struct llmpar__mpi_cast {
    llmpar__mpi_note note;
    MPI_Request *request;    /* [ranks]; of `bye` [2][ranks]: the last messages on `data` too */
    int sent;
} llmpar__mpi_cast;

typedef struct llmpar__mpi_peer {
    llmpar_position position;
    double silent;           /* seconds of this rank's own attention without a sign of life; watched peers only */
    double finished_for;     /* .. since it finished */
    int32_t watched, finished, bye, dead, told; /* told: has said where it is since the failure, or since somebody asked */
    int32_t flushed;         /* its last message on `data` has come */
} llmpar__mpi_peer;

/* A peer that gets this rank's heartbeats. */
typedef struct llmpar__mpi_beat {
    llmpar__mpi_note note;
    MPI_Request request;
    int32_t to;
} llmpar__mpi_beat;

struct llmpar_mpi_world {
    llmpar_heap *heap;
    llmpar_mpi_desc desc;            /* resolved */
    MPI_Comm data, control;
    int32_t rank, ranks, serialized, attended, crowded, threads; /* attended: all ranks have helpers; crowded: more ranks than processors on this node; threads: this rank's share of its cores */
    uint64_t next_context;
    llmpar_record *record;           /* of this rank's collectives */
    pthread_mutex_t lock;            /* around every MPI call and everything below up to `inbox` */
    pthread_cond_t wake;
    pthread_t helper;
    int32_t helping, stop;
    int32_t aborted;                 /* atomic */
    int32_t draining;                /* no receive is wanted any more: whatever arrives is dropped, so that its sender is done */
    int32_t orderly;                 /* all ranks have ended in order */
    llmpar_error failure;            /* the root error as far as this rank knows */
    double failed_at;
    llmpar__mpi_peer *peer;          /* [ranks] */
    llmpar__mpi_note incoming;       /* the standing receive */
    MPI_Request standing;
    MPI_Request *casting;            /* of the casts: [5 * ranks] */
    llmpar__mpi_cast asked, failed, finished, bye;
    llmpar__mpi_beat *beat;          /* [beats] ranks + 1, + 2, + 4, .. */
    int32_t beats;
    double last_beat, last_look;
    MPI_Request dropped;             /* the message that is being dropped */
    unsigned char *bucket;           /* .. into this, of malloc: the helper's thread may not use the rank's heap */
    size_t bucket_bytes;
    llmpar_order order;              /* of all calls on all communicators: one at a time, in the order in which they were made */
    int32_t comms;                   /* that there are; the last one takes `order` with it */
    /* of the call that runs */
    llmpar__mpi_header outbox, *inbox;  /* [inboxes] */
    int32_t inboxes, met;               /* met: headers of the present call that are, or come, in inbox[0, met) */
    MPI_Request *meeting;               /* [2 * inboxes] receives, then sends */
    MPI_Request request[LLMPAR__MPI_BATCH];
    int32_t from[LLMPAR__MPI_BATCH];    /* a receive's source, a world rank; -1: a send */
    int32_t posted;
    char *scratch;                   /* large enough for every call that is enqueued */
    size_t scratch_bytes;
};

/* One rank's half of a communicator; llmpar_comm's `state`. */
typedef struct llmpar__mpi_comm {
    llmpar_comm comm; /* first: the table itself */
    llmpar_mpi_world *world;
    uint64_t context;
    int32_t *member;        /* [ranks] world ranks */
    llmpar_halving halving;
    char axis[24];
} llmpar__mpi_comm;

/* World and control (mpi_world.c). */

/* Under the lock: receives control messages, sends heartbeats, notices silence. */
LLMPAR__PRIVATE void llmpar__mpi_look(llmpar_mpi_world *world);
/* Under the lock: what the calls of inbox[0, count) say about their ranks: inside their call, or out of it. */
LLMPAR__PRIVATE void llmpar__mpi_seen(llmpar_mpi_world *world, int32_t count, int completed);
/* Under the lock: llmpar_mpi_world_fail. */
LLMPAR__PRIVATE void llmpar__mpi_fail_locked(llmpar_mpi_world *world, const llmpar_error *error);
/* Under the lock, which it gives away meanwhile: who is where, by what the ranks themselves say; it asks them, and waits up to a second for those that have not said it yet. */
LLMPAR__PRIVATE void llmpar__mpi_who(llmpar_mpi_world *world, char *text, size_t capacity);
/* Where a call leaves its text: in the rank's error, or on the thread of a stream in the stream's. */
LLMPAR__PRIVATE llmpar_error *llmpar__mpi_own_error(llmpar__mpi_comm *tc);
/* An MPI function's complaint as LLMPAR_ERR_INTERNAL. */
LLMPAR__PRIVATE llmpar_status llmpar__mpi_error(llmpar_error *error, const char *function, int code);

/* Waiting (mpi_wait.c). All run inside a call, on the rank's thread or that of a stream, and leave their text in llmpar__mpi_own_error. */

/* Sends or receives `bytes` to or from the member with index `peer`, in messages of at most comm_slice; waits for room among the messages under way. */
LLMPAR__PRIVATE llmpar_status llmpar__mpi_post(llmpar__mpi_comm *tc, const llmpar_call *call, int receives, int32_t peer, void *memory, size_t bytes);
/* Waits until all posted messages are through. On an error none is left that this rank could end. */
LLMPAR__PRIVATE llmpar_status llmpar__mpi_complete(llmpar__mpi_comm *tc, const llmpar_call *call);
/* After a failure `st` of this rank's own with messages under way: tells the job and ends them. Returns st. */
LLMPAR__PRIVATE llmpar_status llmpar__mpi_abandon(llmpar__mpi_comm *tc, const llmpar_call *call, llmpar_status st);
/* All members come to the same call, or all report both sides and nothing has moved. Up to desc.direct members: member i's payload is then in inbox[i], this rank's own too. More: bytes is 0. */
LLMPAR__PRIVATE llmpar_status llmpar__mpi_meet(llmpar__mpi_comm *tc, const llmpar_call *call, const void *payload, size_t bytes);
/* Both ends of a message meet; the sender's payload is then in inbox[0] of the receiver. */
LLMPAR__PRIVATE llmpar_status llmpar__mpi_meet_one(llmpar__mpi_comm *tc, const llmpar_call *call, const void *payload, size_t bytes);
/* Makes the error of this rank (already in comm->error) the job's, if it is the first. Returns status. */
LLMPAR__PRIVATE llmpar_status llmpar__mpi_failed(llmpar__mpi_comm *tc, llmpar_status status);

#endif /* LLMPAR_USE_MPI */

#endif
