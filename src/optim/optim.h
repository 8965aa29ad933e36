/* optim: the optimizers behind fsdp's table: AdamW, SGD with momentum, LOMO and AdaLomo. Each updates this rank's shards of the (master) parameters and nothing else.

   g' = g * grad_scale (clipping and loss scale), lr from llmpar_optim_set_lr; decay is decoupled (Loshchilov & Hutter 2019): p loses lr * decay of itself, not on parameters with no_decay.
     ADAMW    m = b1 m + (1-b1) g';  v = b2 v + (1-b2) g'^2;  p -= lr (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)                                 two numbers of state an element
     SGD      m = momentum m + g';  p -= lr m  (PyTorch's, without dampening; m is g' in the first step)                                        one; none without momentum
     LOMO     p -= lr g', inside backward, so that no gradient outlives its unit (Lv et al. 2023, arXiv 2306.09782)                              none
     ADALOMO  adalomo.c: factored second moments and an update normalised tensor by tensor, inside backward (Lv et al. 2023, arXiv 2310.10195)   a row and a column of each matrix
   All are element-wise but AdaLomo, whose sums are order-free: the same bits on every mesh. */
#ifndef LLMPAR_OPTIM_H
#define LLMPAR_OPTIM_H

#include "fsdp/fsdp.h"

typedef enum llmpar_optim_kind { LLMPAR_OPTIM_ADAMW = 0, LLMPAR_OPTIM_SGD = 1, LLMPAR_OPTIM_LOMO = 2, LLMPAR_OPTIM_ADALOMO = 3, LLMPAR_OPTIM_COUNT = 4 } llmpar_optim_kind;

/* Zero is the default everywhere. What an optimizer does not have must stay zero. */
typedef struct llmpar_optim_desc {
    double beta1;          /* ADAMW: default 0.9 */
    double beta2;          /* ADAMW: default 0.95. ADALOMO: default (0) 1 - t^-0.8 in step t, as its authors' code has it (Shazeer & Stern 2018) */
    double eps;            /* ADAMW: default 1e-8. ADALOMO: what every squared gradient counts at least, default 1e-30 */
    double decay;          /* default 0.1 for ADAMW, else none; negative: none */
    double clip;           /* global gradient norm; default 1.0 for ADAMW and SGD, else off; negative: off. LOMO and ADALOMO then run forward and backward twice */
    double clip_value;     /* SGD, LOMO: largest absolute value of an element of g'; default off */
    double momentum;       /* SGD: default 0.9; negative: none */
    llmpar_optim_kind kind;/* default ADAMW */
} llmpar_optim_desc;

typedef struct llmpar_optim llmpar_optim;

LLMPAR_API const char *llmpar_optim_name(llmpar_optim_kind kind);                       /* "adamw", "sgd", "lomo", "adalomo" */
LLMPAR_API int llmpar_optim_parse(const char *name, llmpar_optim_kind *out);            /* 0: no such name */
LLMPAR_API void llmpar_optim_desc_resolve(llmpar_optim_desc *desc);                     /* fills in the defaults; local */
/* LLMPAR_ERR_ARGUMENT for a resolved value out of range, or set where the optimizer has none. Local. */
LLMPAR_API llmpar_status llmpar_optim_desc_check(const llmpar_optim_desc *desc, llmpar_error *error);
/* llmpar_fsdp_desc.optimizer_states that this (resolved) optimizer wants. Pure. */
LLMPAR_API int32_t llmpar_optim_states(const llmpar_optim_desc *desc);
/* llmpar_policy.update: AFTER; for LOMO and ADALOMO INSIDE, or TWO_PASSES where the norm has to be known before: with clip, or where a loss scale may turn out too large. Pure. */
LLMPAR_API llmpar_update_when llmpar_optim_update_when(const llmpar_optim_desc *desc, int32_t loss_scaling);
/* Borrows fsdp, whose desc asked for llmpar_optim_states. ADALOMO takes its state from fsdp's arena (OPTIMIZER) and, where parameters are cut, a communicator of the ranks that share them.
   LLMPAR_ERR_ARGUMENT for values out of range or missing states. Collective. */
LLMPAR_API llmpar_status llmpar_optim_create(llmpar_fsdp *fsdp, const llmpar_optim_desc *desc, llmpar_optim **out);
LLMPAR_API void llmpar_optim_destroy(llmpar_optim *optim); /* before the fsdp object; local */
/* The table for llmpar_run; valid as long as optim. Local. */
LLMPAR_API const llmpar_optimizer *llmpar_optim_table(const llmpar_optim *optim);
/* Learning rate of the coming update; its number is one more than updates so far. Local. */
LLMPAR_API void llmpar_optim_set_lr(llmpar_optim *optim, double lr);
LLMPAR_API int64_t llmpar_optim_steps(const llmpar_optim *optim);
/* As if it had made so many updates: with its state, what a checkpoint brings back. Local. */
LLMPAR_API void llmpar_optim_set_steps(llmpar_optim *optim, int64_t steps);
LLMPAR_API llmpar_optim_kind llmpar_optim_get_kind(const llmpar_optim *optim); /* local */
/* ADALOMO's state of one segment of a unit (llmpar_fsdp_layout), device memory of the sum type: of a matrix row[rows] and col[cols], whole on every rank that has a segment of it, equal copies; else
   moment, one a number of the segment. NULL what there is not. Local. */
typedef struct llmpar_optim_factors { void *row, *col, *moment; int64_t rows, cols; } llmpar_optim_factors;
LLMPAR_API void llmpar_optim_get_factors(const llmpar_optim *optim, int32_t unit, int32_t segment, llmpar_optim_factors *out);
/* Bytes of OPTIMIZER in fsdp's arena that are the optimizer's own, beside fsdp's arrays: ADALOMO's. Local. */
LLMPAR_API int64_t llmpar_optim_bytes(const llmpar_optim *optim);
/* Factor that brings a gradient of this norm down to max_norm: min(1, max_norm / norm); max_norm <= 0: 1. Pure. */
LLMPAR_API double llmpar_clip_scale(double norm, double max_norm);

#endif
