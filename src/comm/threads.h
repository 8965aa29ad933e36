/* threads: the communicator between rank threads of one process: collectives straight through shared memory in tree order. */
#ifndef LLMPAR_COMM_THREADS_H
#define LLMPAR_COMM_THREADS_H

#include "base/heap.h"
#include "tables/record.h"

/* What the rank threads of a job share: barriers, published pointers, the first failure. */
typedef struct llmpar_threads_world llmpar_threads_world;

typedef struct llmpar_threads_desc {
    int32_t ranks;
    int32_t lockstep;      /* 1: one rank runs at a time, switching only at collectives */
    double deadline;       /* seconds a collective may wait for its peers before it reports LLMPAR_ERR_TIMEOUT with who is where; default 0 = none. Not in lockstep, where a debugger may stop the clock */
    int32_t unchecked;     /* 1: the ranks do not compare their calls */
    int32_t crowded;       /* 1: there are more threads than processors, so a rank that waits gives its processor away at once; default: it looks for some microseconds first */
} llmpar_threads_desc;

/* heap: of the launching thread, used only in create and destroy (and for splits under a lock). Local. */
LLMPAR_API llmpar_status llmpar_threads_world_create(llmpar_heap *heap, const llmpar_threads_desc *desc, llmpar_threads_world **out, llmpar_error *error);
LLMPAR_API void llmpar_threads_world_destroy(llmpar_threads_world *world); /* after all rank threads ended */
/* The first failure of any rank (root cause, never LLMPAR_ERR_PEER), status OK if none. */
LLMPAR_API void llmpar_threads_world_error(llmpar_threads_world *world, llmpar_error *out);
/* The world communicator of one rank; called once by each rank thread. The rank's memory comes from its own heap; device and error are the rank's. Local. */
LLMPAR_API llmpar_status llmpar_threads_comm_create(llmpar_threads_world *world, int32_t rank, llmpar_heap *heap, llmpar_device *device, llmpar_error *error, llmpar_comm **out);
/* The rank's calls come from threads of this device from now on (of its streams), not of the one that its world communicator was created with. Local. */
LLMPAR_API void llmpar_threads_rank_device(llmpar_threads_world *world, int32_t rank, llmpar_device *device);
/* Makes *error the job's failure, if it is the first, and wakes every rank: what comm->abort does, for a rank that has no communicator yet. error->status is not OK. Local. */
LLMPAR_API void llmpar_threads_world_fail(llmpar_threads_world *world, const llmpar_error *error);
/* Rank `rank` is done (returned from its function): a peer that still waits for it in a collective gets an error naming it instead of hanging. Local. */
LLMPAR_API void llmpar_threads_rank_finished(llmpar_threads_world *world, int32_t rank);
/* Waits for that, on the launching thread: 1. Or 0 if the rank is stuck: the job has failed, which wakes every rank that waits in a collective, and this one has shown no sign of life (a collective
   begun or ended) for `deadline` seconds and for 5 seconds after the failure; its memory must then stay. Never 0 without a deadline, or in lockstep. */
LLMPAR_API int llmpar_threads_rank_wait(llmpar_threads_world *world, int32_t rank);
/* llmpar_record_json of a rank that need not be this thread's; 0 and "" if the rank has no record any more. */
LLMPAR_API size_t llmpar_threads_rank_json(llmpar_threads_world *world, int32_t rank, char *text, size_t capacity);

#endif
