/* launch_internal: what the ways of making ranks share: launch.c (threads), launch_mpi.c and launch_environment.c (processes); launch_furnish.c gives each rank what its backend makes. */
#ifndef LLMPAR_LAUNCH_INTERNAL_H
#define LLMPAR_LAUNCH_INTERNAL_H

#include "base/float_state_internal.h"
#include "cpu/cpu.h"
#include "run/launch.h"
#include "tables/tables_internal.h"

/* What a launch does not take, said in the caller's `error`. */
#define LLMPAR__LAUNCH_NO(status, ...) llmpar_error_set(error, status, "launch: " __VA_ARGS__)

/* Checks the desc and fills in the defaults; ranks stays as it is where it is 0. */
LLMPAR__PRIVATE llmpar_status llmpar__launch_resolve(llmpar_launch_desc *desc, llmpar_cpu_level *level, llmpar_error *error);
/* Is this a backend that can be used? NULL is. */
LLMPAR__PRIVATE llmpar_status llmpar__launch_backend_check(const llmpar_backend *backend, llmpar_error *error);
/* ctx has host and host_comm (NULL: the transport has none). Makes device and comm: the backend's, or these. Collective. */
LLMPAR__PRIVATE llmpar_status llmpar__launch_furnish(llmpar_ctx *ctx, const llmpar_backend *backend);
/* This rank has failed with st (ctx->error) before it came to where the backend makes the communicator: tells the others there, if the transport cannot. Returns st. */
LLMPAR__PRIVATE llmpar_status llmpar__launch_absent(llmpar_ctx *ctx, const llmpar_backend *backend, llmpar_status st);
/* Destroys what a ctx has of comm, device, host_comm and host, in this order. */
LLMPAR__PRIVATE void llmpar__launch_clear(llmpar_ctx *ctx, const llmpar_backend *backend);
/* All ranks compute alike, or all say who does not. */
LLMPAR__PRIVATE llmpar_status llmpar__launch_agree(llmpar_ctx *ctx);
/* What a rank whose function (or start) has returned st has failed with, as the others are to hear of it. */
LLMPAR__PRIVATE void llmpar__launch_failure(const llmpar_ctx *ctx, llmpar_status st, llmpar_error *error);
/* Tells those who wait in the backend's communicator of this rank's failure. */
LLMPAR__PRIVATE void llmpar__launch_abort(llmpar_ctx *ctx, const llmpar_error *error);
/* *error is LLMPAR_ERR_PEER: becomes the job's failure as the backend's communicator knows it, and 1; 0: it is not, or there is none that would. */
LLMPAR__PRIVATE int llmpar__launch_root(llmpar_ctx *ctx, const llmpar_backend *backend, llmpar_error *error);
/* The rank's record of collectives; NULL: none. */
LLMPAR__PRIVATE llmpar_record *llmpar__launch_record(const llmpar_ctx *ctx);
/* The environment's variable as a number from least to most: 1. 0: it is not there. -1: it is something else, *error says so. */
LLMPAR__PRIVATE int llmpar__launch_variable(const char *name, int32_t least, int32_t most, int32_t *out, llmpar_error *error);
/* The same for the first there is of the launchers' names for the rank among those of this machine. */
LLMPAR__PRIVATE int llmpar__launch_local(int32_t *out, llmpar_error *error);
/* Writes a rank's record, if there is one, to DIRECTORY/llmpar_rank_N.json, unless that is NULL or ""; what goes wrong is a warning. */
LLMPAR__PRIVATE void llmpar__launch_dump(const char *directory, const llmpar_ctx *ctx);
/* Runs this process's rank where the job's ranks are MPI processes: 1, and *error is the result. 0: they are not. */
LLMPAR__PRIVATE int llmpar__launch_mpi(const llmpar_launch_desc *given, llmpar_rank_fn fn, void *user, llmpar_error *error);
/* Runs this process as the rank that its environment says. */
LLMPAR__PRIVATE llmpar_status llmpar__launch_environment(const llmpar_launch_desc *given, llmpar_rank_fn fn, void *user, llmpar_error *error);

#endif
