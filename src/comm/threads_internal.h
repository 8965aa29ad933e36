/* threads_internal: what the two files of the threads communicator share: threads.c (the collectives) stands on
   threads_wait.c (who waits for whom, and how a wait ends). */
#ifndef LLMPAR_COMM_THREADS_INTERNAL_H
#define LLMPAR_COMM_THREADS_INTERNAL_H

#include "comm/threads.h"

#include <pthread.h>

#define LLMPAR__THREADS_INLINE 2048u /* bytes a rank can send inside its slot */

/* One rank's side of one call. */
typedef struct llmpar__threads_call {
    llmpar_call what;
    const void *send;
    void *recv;
} llmpar__threads_call;

/* What a rank shows to its peers. Two per rank, used in turns, so that a slot is rewritten only after every peer has come to the next call. */
typedef struct llmpar__threads_slot {
    unsigned char payload[LLMPAR__THREADS_INLINE]; /* aligned to 64 */
    llmpar__threads_call call;
    uint64_t fingerprint;
    uint64_t pad[8 - (sizeof(llmpar__threads_call) / 8 + 1) % 8];
} llmpar__threads_slot;

/* One direction between two ranks. The upper half of `phase` counts 3 steps a message: 3k empty, 3k+1 posted, 3k+2 taken, 3(k+1) done = empty. */
typedef struct llmpar__threads_channel {
    uint64_t phase;              /* atomic; upper half as above, all ones once withdrawn */
    llmpar__threads_call sender; /* written before "posted" */
    llmpar__threads_call receiver; /* written before "done" */
    int32_t mismatch;
} llmpar__threads_channel;

/* The shared half of a communicator. Owned by the world, freed when the last rank's half is destroyed. */
typedef struct llmpar__threads_group {
    struct llmpar__threads_group *next, **link; /* the world's list */
    llmpar_threads_world *world;
    int32_t ranks, references;                  /* references: under the world's lock */
    int32_t *world_rank;                        /* [ranks] */
    uint32_t *arrived;                          /* [ranks] atomic: number of each rank's latest call */
    llmpar__threads_slot *slots;                /* [2][ranks] */
    llmpar__threads_channel *channels;          /* [ranks sender][ranks receiver], atomic pointer, made by the first send or recv */
    char axis[24];
    pthread_cond_t wake;                        /* with the world's lock */
    int32_t sleepers;                           /* atomic */
    uint64_t barrier;                           /* atomic: upper half completed barriers, lower half ranks that have arrived */
} llmpar__threads_group;

/* A wait for *word to change its upper half; on the stack of the thread that waits. */
typedef struct llmpar__threads_wait {
    struct llmpar__threads_wait *next; /* of this rank: its streams may have threads, and each may wait on another communicator */
    uint64_t *word;                    /* atomic: a group's barrier or a channel's phase */
    uint32_t high;
    uint32_t number;                   /* of the collective on its group; 0 for send and recv */
    int32_t peer;                      /* index in the group, -1: all that have not come to call `number` */
    int32_t abortable;
    llmpar__threads_group *group;
    const llmpar_call *call;
} llmpar__threads_wait;

/* What a rank shows of itself to the others; under the world's lock except `finished`. */
typedef struct llmpar__threads_rank {
    llmpar__threads_wait *wait;       /* the list of those its threads are asleep in; NULL: none */
    llmpar_device *device;            /* NULL: no communicator, it runs */
    llmpar_record *record;            /* NULL: no communicator yet, or no more; then `position` is its last one */
    llmpar_position position;
    double seen;                      /* when it last came back from a collective with an error */
    int32_t finished;                 /* atomic */
    pthread_cond_t turn;              /* lockstep: signalled when it gets the turn */
} llmpar__threads_rank;

struct llmpar_threads_world {
    llmpar_heap *heap;
    llmpar_threads_desc desc;
    pthread_mutex_t lock;
    int32_t aborted;              /* atomic */
    int32_t spins;                /* how often a wait looks before it sleeps */
    int32_t turn, idle_turns;     /* lockstep: the rank that runs; turns passed on since somebody got further */
    int32_t asleep, finished;     /* ranks with a `wait`, ranks that have finished */
    int32_t threaded;             /* some rank has waited while another thread of it ran */
    int32_t stuck;                /* the failure is that nobody could go on: every rank that waits reports it as its own */
    int32_t hearsay;              /* the failure is another rank's, heard through another communicator: that rank's own word takes its place */
    double failed_at;
    llmpar_error failure;         /* the root error */
    char report[1100];            /* who was where then; "" if failure.text says so itself */
    pthread_cond_t ended;         /* signalled when a rank finishes and at the failure */
    llmpar__threads_group *groups, *world_group; /* all of them; the first one, of all ranks */
    llmpar__threads_rank *rank;   /* [ranks] */
};

/* One rank's half of a communicator; llmpar_comm's `state`. Owned by the rank's heap. */
typedef struct llmpar__threads_comm {
    llmpar_comm comm; /* first: the table itself */
    llmpar_heap *heap;
    llmpar_threads_world *world;
    llmpar__threads_group *group;
    int32_t world_rank;
    uint32_t number;       /* meetings begun: the parity picks the slot */
    llmpar_record *record; /* owned by the world communicator, NULL in others */
    const void **inputs;   /* [ranks] scratch */
    void **outputs;        /* [ranks] scratch */
    llmpar_order order;    /* calls on different streams run in the order in which they were issued, as on every other rank */
} llmpar__threads_comm;

/* Waiting (threads_wait.c). */

/* A group of `ranks` members with these world ranks (copied), holding `ranks` references; NULL: out of memory. */
LLMPAR__PRIVATE llmpar__threads_group *llmpar__threads_group_create(llmpar_threads_world *world, int32_t ranks, const int32_t *world_rank, const char *axis);
LLMPAR__PRIVATE void llmpar__threads_group_release(llmpar__threads_group *group);
/* Arrives at the group's next barrier and waits until all have. abortable: the wait may end with an error (another rank failed, finished, or is late), and the arrival is then
   taken back, so that nobody can pass a barrier from which a rank has walked away. Otherwise the barrier always completes: only for peers that are known to come. */
LLMPAR__PRIVATE llmpar_status llmpar__threads_barrier(llmpar__threads_comm *tc, const llmpar_call *call, int abortable);
/* Waits until the upper half of channel->phase is no longer `step`, which the rank with index `peer` will bring about; on an error it has been set to "withdrawn". */
LLMPAR__PRIVATE llmpar_status llmpar__threads_await(llmpar__threads_comm *tc, const llmpar_call *call, llmpar__threads_channel *channel, uint32_t step, int32_t peer, int abortable);
/* Moves a channel from one step to another and wakes who waits for it; 0 if it was not at `from`. */
LLMPAR__PRIVATE int llmpar__threads_step(llmpar__threads_comm *tc, llmpar__threads_channel *channel, uint32_t from, uint32_t to);
/* LLMPAR_ERR_PEER in the rank's error if some rank has failed, else LLMPAR_OK. */
LLMPAR__PRIVATE llmpar_status llmpar__threads_check(llmpar__threads_comm *tc, const llmpar_call *call);
/* Shows the rank's record and device to the others; NULL: no more, their memory goes. */
LLMPAR__PRIVATE void llmpar__threads_show(llmpar_threads_world *world, int32_t rank, llmpar_record *record, llmpar_device *device);
/* Makes the error of this rank (already in comm->error) the job's, if it is the first, and wakes everybody. Returns status. */
LLMPAR__PRIVATE llmpar_status llmpar__threads_failed(llmpar__threads_comm *tc, llmpar_status status);
/* Where this call leaves its text: in the rank's error, or on the thread of a stream in the stream's. */
LLMPAR__PRIVATE llmpar_error *llmpar__threads_error(llmpar__threads_comm *tc);
/* Lockstep: waits for the rank's first turn. Nothing otherwise. */
LLMPAR__PRIVATE void llmpar__threads_first_turn(llmpar_threads_world *world, int32_t rank);

#endif
