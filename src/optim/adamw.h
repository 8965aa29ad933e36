/* adamw: AdamW (Loshchilov & Hutter 2019) on this rank's shards, behind fsdp's optimizer table; with the learning rate schedule and gradient clipping that go with it. */
#ifndef LLMPAR_ADAMW_H
#define LLMPAR_ADAMW_H

#include "fsdp/fsdp.h"

/* Linear warm-up from 0 over `warmup` steps, then half a cosine from lr to lr_min at step `total` (Loshchilov & Hutter 2017), then lr_min. total 0: constant after warm-up.
   step counts from 1. Pure. */
LLMPAR_API double llmpar_lr_cosine(double lr, double lr_min, int64_t warmup, int64_t total, int64_t step);
/* Factor that brings a gradient of this norm down to max_norm: min(1, max_norm / norm); max_norm <= 0: 1. Pure. */
LLMPAR_API double llmpar_clip_scale(double norm, double max_norm);

typedef struct llmpar_adamw_desc {
    double beta1, beta2;   /* default 0.9, 0.95 */
    double eps;            /* default 1e-8 */
    double decay;          /* weight decay, not on parameters with no_decay; default 0.1; negative: none */
    double clip;           /* global gradient norm; default 1.0; negative: off */
} llmpar_adamw_desc;

typedef struct llmpar_adamw llmpar_adamw;

LLMPAR_API void llmpar_adamw_desc_resolve(llmpar_adamw_desc *desc); /* fills in the defaults; local */
/* LLMPAR_ERR_ARGUMENT for a resolved value out of range. Local. */
LLMPAR_API llmpar_status llmpar_adamw_desc_check(const llmpar_adamw_desc *desc, llmpar_error *error);
/* Zeroed moments for every shard, in the arena of fsdp (OPTIMIZER). Borrows fsdp. LLMPAR_ERR_ARGUMENT for values out of range. Local. */
LLMPAR_API llmpar_status llmpar_adamw_create(llmpar_fsdp *fsdp, const llmpar_adamw_desc *desc, llmpar_adamw **out);
LLMPAR_API void llmpar_adamw_destroy(llmpar_adamw *adamw); /* NULL is fine; before the fsdp object; local */
/* The table for llmpar_run; valid as long as adamw. Local. */
LLMPAR_API const llmpar_optimizer *llmpar_adamw_optimizer(const llmpar_adamw *adamw);
/* Learning rate of the coming update; its number is one more than updates so far. Local. */
LLMPAR_API void llmpar_adamw_set_lr(llmpar_adamw *adamw, double lr);
LLMPAR_API int64_t llmpar_adamw_steps(const llmpar_adamw *adamw);
/* Shard-sized first and second moments of a unit, for checkpoints. Local. */
LLMPAR_API void llmpar_adamw_moments(llmpar_adamw *adamw, int32_t unit, void **first, void **second);

#endif
