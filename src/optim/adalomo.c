#include "optim/optim_internal.h"

LLMPAR__PRIVATE_DEF llmpar_status llmpar__adalomo_create(llmpar_optim *optim) { return llmpar_fail(llmpar_fsdp_mesh(optim->fsdp)->ctx, LLMPAR_ERR_UNSUPPORTED, "adalomo"); }
LLMPAR__PRIVATE_DEF void llmpar__adalomo_destroy(llmpar_optim *optim) { (void)optim; }
LLMPAR__PRIVATE_DEF llmpar_status llmpar__adalomo_update(void *state, const llmpar_update *update) { (void)state, (void)update; return LLMPAR_ERR_UNSUPPORTED; }
