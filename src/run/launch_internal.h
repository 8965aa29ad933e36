/* launch_internal: what both ways of making ranks share: launch.c (threads), launch_mpi.c (processes). */
#ifndef LLMPAR_LAUNCH_INTERNAL_H
#define LLMPAR_LAUNCH_INTERNAL_H

#include "cpu/cpu.h"
#include "run/launch.h"
#include "tables/record.h"

/* Rounding to nearest and no flush-to-zero: the library's results do not depend on what the application has set. Returns the state to restore. */
LLMPAR__PRIVATE uint64_t llmpar__launch_float_state(void);
LLMPAR__PRIVATE void llmpar__launch_float_restore(uint64_t state);
/* Checks the desc and fills in the defaults; ranks stays as it is where it is 0. */
LLMPAR__PRIVATE llmpar_status llmpar__launch_resolve(llmpar_launch_desc *desc, llmpar_cpu_level *level, llmpar_error *error);
/* All ranks compute alike, or all say who does not. */
LLMPAR__PRIVATE llmpar_status llmpar__launch_agree(llmpar_ctx *ctx);
/* Writes a rank's record, if there is one, to DIRECTORY/llmpar_rank_N.json, unless that is NULL or ""; what goes wrong is a warning. */
LLMPAR__PRIVATE void llmpar__launch_dump(const char *directory, const llmpar_ctx *ctx, llmpar_record *record);
/* Runs this process's rank where the job's ranks are MPI processes: 1, and *error is the result. 0: they are not. */
LLMPAR__PRIVATE int llmpar__launch_mpi(const llmpar_launch_desc *given, llmpar_rank_fn fn, void *user, llmpar_error *error);

#endif
