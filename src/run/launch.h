/* launch: makes the ranks (threads of this process), gives each its ctx, and collects the root error. */
#ifndef LLMPAR_LAUNCH_H
#define LLMPAR_LAUNCH_H

#include "tables/comm.h"
#include "tables/ctx.h"

typedef struct llmpar_launch_desc {
    int32_t ranks;                /* 0 = 1 (the MPI world once MPI is there). One rank runs on the caller's thread */
    int32_t threads;              /* workers inside a rank; default 1 */
    int32_t lockstep;             /* 1: one rank at a time, switching only at collectives (gdb) */
    const char *cpu;              /* "portable", "avx2", "avx512"; default: environment LLMPAR_CPU, else the best */
    double deadline;              /* seconds a collective waits for its peers; default 0 = for ever */
    const llmpar_allocator *allocator; /* default malloc/free; its hooks are called from all rank threads */
    llmpar_log_fn log;            /* default: errors and warnings to stderr */
    void *log_user;
    void (*check)(const llmpar_ctx *ctx, void *user); /* test hook: after a rank's clean-up, with its final heap; default none */
} llmpar_launch_desc;

typedef llmpar_status (*llmpar_rank_fn)(llmpar_ctx *ctx, void *user);

/* Runs fn on every rank and returns when all have ended: LLMPAR_OK, or the root error's status with *error filled (rank, coordinate, text; never LLMPAR_ERR_PEER). error may be NULL.
   A rank that returns an error wakes all others. Rank threads are named "r3" (the mesh adds the tp coordinate). The lowest common dispatch level is used on all ranks; a self-test hash
   that differs between ranks is LLMPAR_ERR_MISMATCH. */
LLMPAR_API llmpar_status llmpar_launch(const llmpar_launch_desc *desc, llmpar_rank_fn fn, void *user, llmpar_error *error);

#endif
