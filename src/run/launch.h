/* launch: makes the ranks (threads of this process), gives each its ctx, and collects the root error. */
#ifndef LLMPAR_LAUNCH_H
#define LLMPAR_LAUNCH_H

#include "comm/mpi.h"
#include "tables/backend.h"
#include "tables/comm.h"
#include "tables/ctx.h"
#include "tables/io.h"

/* What ranks are. Default: MPI processes where LLMPAR_USE_MPI is defined and MPI is initialised or mpirun has started the process, else threads.
   ENVIRONMENT: processes that torchrun or a like launcher has started: this one is rank RANK of WORLD_SIZE, with LOCAL_RANK and LOCAL_WORLD_SIZE on its machine, and meets the others at MASTER_ADDR:MASTER_PORT. It has no communicator of its own (ctx->host_comm is
   NULL): a backend makes the only one. A rank that fails tells the others through that; one that fails before it has it, where they meet (comm_absent). */
typedef enum llmpar_transport { LLMPAR_TRANSPORT_DEFAULT = 0, LLMPAR_TRANSPORT_THREADS = 1, LLMPAR_TRANSPORT_MPI = 2, LLMPAR_TRANSPORT_ENVIRONMENT = 3 } llmpar_transport;

/* Threads that stay where they are find their caches warm. DEFAULT: yes where ranks x threads are all cores, or all processors, that the process may use: then nobody else has a claim to choose between them.
   ON: wherever ranks x threads are not more than these; two such jobs on one machine get in each other's way. Not with more threads than processors, in lockstep, where the system has no such call (macOS), or
   in MPI processes, which mpirun binds: ON is refused there. The caller's thread, where it runs a rank, goes back to where it was. */
typedef enum llmpar_pin { LLMPAR_PIN_DEFAULT = 0, LLMPAR_PIN_ON = 1, LLMPAR_PIN_OFF = 2 } llmpar_pin;

typedef struct llmpar_launch_desc {
    int32_t ranks;                /* 0 = the processes there are, or 1. One rank, and a process of MPI or the environment, runs on the caller's thread */
    llmpar_transport transport;
    const llmpar_mpi_desc *mpi;   /* own communicator and more; its deadline and unchecked are those below. Not NULL: ranks are MPI processes */
    const llmpar_backend *backend; /* what ranks compute and communicate with; default: the CPU and the transport's communicator. Which accelerator of its machine a rank takes goes by ctx->local_rank: of a rank thread its
                                     rank; of a process the first there is of LOCAL_RANK, OMPI_COMM_WORLD_LOCAL_RANK, MPI_LOCALRANKID, SLURM_LOCALID, else the number of lower MPI ranks on machines of this name, or of the
                                     environment's ranks RANK modulo LOCAL_WORLD_SIZE (where that is not given: RANK) */
    int32_t threads;              /* workers inside a rank; default 0 = the cores this process may use / the ranks of this machine, at least 1 (1 in lockstep). Results do not depend on it */
    llmpar_pin pin;               /* does each thread stay on a processor of its own; default: where the job's threads fill the machine */
    int32_t lockstep;             /* 1: one rank at a time, switching only at collectives (gdb) */
    const char *cpu;              /* "portable", "avx2", "avx512", "avx512bf16"; default: environment LLMPAR_CPU, else the best */
    double deadline;              /* seconds a collective waits for its peers before it reports who is where; default 0 = 600 (a rank may be late: it writes a file); negative = for ever */
    int32_t unchecked;            /* 1 (check level 0): the ranks do not compare what they call; default 0: every mismatch is reported by both sides before data moves */
    const char *record;           /* directory: when the job fails, every rank's last collectives are written to DIR/llmpar_rank_N.json; default (NULL or ""): environment LLMPAR_RECORD, else none */
    const llmpar_allocator *allocator; /* default malloc/free; its hooks are called from all rank threads */
    const llmpar_io *io;          /* files of models and checkpoints, borrowed; default the system's */
    llmpar_log_fn log;            /* default: errors and warnings to stderr */
    void *log_user;
    void (*check)(const llmpar_ctx *ctx, void *user); /* test hook: after a rank's clean-up, with its final heap; default none */
} llmpar_launch_desc;

typedef llmpar_status (*llmpar_rank_fn)(llmpar_ctx *ctx, void *user);

/* Runs fn on every rank and returns when all have ended: LLMPAR_OK, or the root error's status with *error filled (rank, coordinate, text; never LLMPAR_ERR_PEER). error may be NULL.
   A rank that returns an error wakes all others. A rank that stays away for ever cannot be ended: once the job has failed and the rank has neither begun nor ended a collective for `deadline` seconds
   (at least 5 after the failure), launch returns without it; the error says so, and the rank keeps running on memory that stays (fn, user, allocator and log must stay valid too: best end the process). Rank threads are named "r3" (the mesh adds the tp coordinate). The lowest common dispatch level is used on all ranks; a self-test hash
   that differs between ranks is LLMPAR_ERR_MISMATCH.
   MPI: every process calls it and gets the same error. MPI is initialised (MPI_THREAD_SERIALIZED) and finalised here unless the caller has initialised it; a caller that launches more than once must, since
   MPI starts only once. A failure of which this rank is not the root goes to the log too: its own collective, and who was where. When a rank is dead or stuck, MPI cannot be finalised: where it was
   initialised here the root error is logged and MPI_Abort ends all processes with exit code 1; else the error is returned, and the caller has to.
   Environment: every process calls it and gets the same error, as far as the backend's communicator tells (comm_finish); else its own, which is LLMPAR_ERR_PEER with the other rank's text where another one has failed. */
LLMPAR_API llmpar_status llmpar_launch(const llmpar_launch_desc *desc, llmpar_rank_fn fn, void *user, llmpar_error *error);

#endif
