/* sim: a device and communicators that only count. The same step runs on them, and the arena says what every buffer would take: there is no second model of memory (docs/architecture.md).

   The device hands out addresses that are no memory and computes nothing; its workspace queries are those of the device it stands for. A copy to the host gives zeros. A communicator keeps the size, the rank and the
   byte counters of the one it stands for and moves nothing; split alone is real, since only the ranks together know the result. */
#ifndef LLMPAR_SIM_H
#define LLMPAR_SIM_H

#include "tables/comm.h"
#include "tables/ctx.h"

/* A device that stands for `of` (borrowed, only asked for workspaces). heap and error are those of the rank's simulated ctx. Local. */
LLMPAR_API llmpar_status llmpar_sim_device_create(llmpar_heap *heap, llmpar_error *error, llmpar_device *of, llmpar_device **out);
LLMPAR_API void llmpar_sim_device_destroy(llmpar_device *device); /* local */
/* A communicator that stands for `of`. own: 1: `of` is destroyed with it. Local. */
LLMPAR_API llmpar_status llmpar_sim_comm_create(llmpar_heap *heap, llmpar_error *error, llmpar_device *device, llmpar_comm *of, int own, llmpar_comm **out);

#endif
