/* plan: what a step would hold, before a byte of it is allocated: the recipe runs on a device that only counts (sim/sim.h), so the plan cannot differ from the program. */
#ifndef LLMPAR_PLAN_H
#define LLMPAR_PLAN_H

#include "run/trainer.h"

/* Memory of this rank for one step of the recipe that llmpar_parallelize would make from the same arguments; desc.memory_limit counts: a step that does not fit is LLMPAR_ERR_MEMORY, whose text goes to *error (it may be NULL) and not
   to the ctx. Nothing is read, written or allocated beyond descriptions. Collective. */
LLMPAR_API llmpar_status llmpar_plan_memory(llmpar_mesh *mesh, llmpar_llama *model, const llmpar_trainer_desc *desc, llmpar_memory *out, llmpar_error *error);

#endif
