/* optim_internal: what optim.c and adalomo.c share. */
#ifndef LLMPAR_OPTIM_INTERNAL_H
#define LLMPAR_OPTIM_INTERNAL_H

#include "optim/optim.h"

struct llmpar__adalomo;

struct llmpar_optim {
    llmpar_fsdp *fsdp;
    llmpar_heap *heap;
    llmpar_optim_desc desc;
    llmpar_optimizer table;
    double lr, power1, power2; /* beta^step */
    int64_t steps;
    struct llmpar__adalomo *adalomo;
};

/* adalomo.c: creation (collective) and the table's update. */
LLMPAR__PRIVATE llmpar_status llmpar__adalomo_create(llmpar_optim *optim);
LLMPAR__PRIVATE void llmpar__adalomo_destroy(llmpar_optim *optim); /* half-built is fine */
LLMPAR__PRIVATE int64_t llmpar__adalomo_bytes(const llmpar_optim *optim);
LLMPAR__PRIVATE int llmpar__adalomo_factored(const llmpar_param *param); /* or has the whole second moment */
LLMPAR__PRIVATE void llmpar__adalomo_factors(const llmpar_optim *optim, int32_t unit, int32_t segment, llmpar_optim_factors *out);
LLMPAR__PRIVATE llmpar_status llmpar__adalomo_update(void *state, const llmpar_update *update);

#endif
