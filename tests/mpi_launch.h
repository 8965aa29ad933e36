/* mpi_launch: what the tests of the MPI communicator share: launching on all processes of the job, time, and rank functions that do next to nothing. */
#ifndef MPI_LAUNCH_H
#define MPI_LAUNCH_H

#include "collectives.h"

#include <time.h>

static char logged[4096]; /* the lines of this process, one after the other */
static inline void keep_line(void *user, int rank, llmpar_log_level level, const char *line)
{
    size_t used = strlen(logged);
    (void)user; (void)rank; (void)level;
    snprintf(logged + used, sizeof logged - used, "%s\n", line);
}

static inline llmpar_status launch_with(const llmpar_mpi_desc *mpi, double deadline, llmpar_rank_fn fn, void *user, llmpar_error *error)
{
    llmpar_launch_desc desc = { .transport = LLMPAR_TRANSPORT_MPI, .mpi = mpi, .deadline = deadline, .check = test_no_leak, .log = keep_line };
    logged[0] = 0;
    return llmpar_launch(&desc, fn, user, error);
}
static inline llmpar_status launch(llmpar_rank_fn fn, void *user, llmpar_error *error) { return launch_with(NULL, 60, fn, user, error); }

/* The same text on all processes? */
static inline void check_alike(const llmpar_error *error)
{
    llmpar_error first = *error;
    MPI_Bcast(&first, (int)sizeof first, MPI_BYTE, 0, MPI_COMM_WORLD);
    if (first.rank != error->rank || first.status != error->status || strcmp(first.text, error->text)) TEST_FAIL("the root error is \"%s\" here, \"%s\" on rank 0", error->text, first.text);
}

static inline llmpar_status nothing(llmpar_ctx *ctx, void *user)
{
    if (user) ++*(int *)user;
    return llmpar_comm_barrier(ctx->comm, NULL, "nothing");
}
static inline llmpar_status late(llmpar_ctx *ctx, void *user)
{
    llmpar_status st = llmpar_comm_barrier(ctx->comm, NULL, "first");
    if (ctx->rank == ctx->world - 1) test_sleep(*(double *)user);
    if (!st) st = llmpar_comm_barrier(ctx->comm, NULL, "second");
    return st;
}

#endif
