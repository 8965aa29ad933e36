/* lr: learning-rate schedules, and the dynamic loss scale of f16. Pure functions of the step and plain data: every rank computes the same.

     lr ^                 cosine, linear            wsd                           one-cycle
        |                  /''--..                  /''''''''''\                      /\
        |                 /       ''--..           /            \                    /    \
        |  lr_min -      /              ''----    /              \----              /        \----
        +---------->    | warmup  total         warmup  | decay_steps | total        total/2  total          step */
#ifndef LLMPAR_LR_H
#define LLMPAR_LR_H

#include "base/status.h"

/* After the warm-up, with x from 0 at its end (wsd: where the decay begins) to 1 at step total:
     COSINE     lr_min + (lr - lr_min) (1 + cos(pi x)) / 2                    (Loshchilov & Hutter 2017)
     CONSTANT   lr
     LINEAR     lr + (lr_min - lr) x
     WSD        lr, and the last decay_steps lr + (lr_min - lr) x             (warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395)
     WSD_SQRT   lr, and the last decay_steps lr + (lr_min - lr) sqrt(x)       (Haegele et al. 2024, arXiv 2405.18392: "1-sqrt")
     ONE_CYCLE  linear from 0 to lr at total / 2, then linear to lr_min at total (Geiping & Goldstein 2022, arXiv 2212.14034, get_one_cycle of their code); the rise is its warm-up */
typedef enum llmpar_lr_kind { LLMPAR_LR_COSINE = 0, LLMPAR_LR_CONSTANT = 1, LLMPAR_LR_LINEAR = 2, LLMPAR_LR_WSD = 3, LLMPAR_LR_WSD_SQRT = 4, LLMPAR_LR_ONE_CYCLE = 5, LLMPAR_LR_COUNT = 6 } llmpar_lr_kind;

/* Zero is the default where one is named. */
typedef struct llmpar_lr_desc {
    double lr;             /* the peak; required */
    double lr_min;         /* where the decay ends, and stays; 0 .. lr */
    int64_t warmup;        /* steps of a linear rise from 0: lr * step / warmup; not with ONE_CYCLE */
    int64_t total;         /* step at which lr_min is reached; 0: never (constant after the warm-up; not with ONE_CYCLE) */
    int64_t decay_steps;   /* WSD, WSD_SQRT: default a tenth of total, at least 1 */
    llmpar_lr_kind kind;   /* default COSINE */
} llmpar_lr_desc;

LLMPAR_API const char *llmpar_lr_name(llmpar_lr_kind kind);                 /* "cosine", "constant", "linear", "wsd", "wsd-sqrt", "one-cycle" */
LLMPAR_API int llmpar_lr_parse(const char *name, llmpar_lr_kind *out);      /* 0: no such name */
LLMPAR_API void llmpar_lr_desc_resolve(llmpar_lr_desc *desc);               /* fills in the defaults */
/* LLMPAR_ERR_ARGUMENT for a resolved value out of range, or set where the schedule has none. */
LLMPAR_API llmpar_status llmpar_lr_desc_check(const llmpar_lr_desc *desc, llmpar_error *error);
/* Learning rate of a step, which counts from 1, of a resolved and checked desc. */
LLMPAR_API double llmpar_lr(const llmpar_lr_desc *desc, int64_t step);
/* COSINE by its numbers. */
LLMPAR_API double llmpar_lr_cosine(double lr, double lr_min, int64_t warmup, int64_t total, int64_t step);

/* Dynamic loss scaling (Micikevicius et al. 2018, section 3.2): gradients of f16 are computed times `scale`, a power of two, so that the bits of what does not over- or underflow stay the same. Halved
   after a step whose gradient was not finite (which updates nothing), doubled after `interval` finite steps in a row. Every rank has the same one: found_inf is agreed over the world. Zero is the default. */
typedef struct llmpar_loss_scale {
    double scale;          /* of the coming step; default 2^16 */
    double least, most;    /* powers of two; default 2^-14, 2^24 */
    int64_t interval;      /* default 2000 */
    int64_t finite_steps;  /* in a row, so far */
} llmpar_loss_scale;

LLMPAR_API void llmpar_loss_scale_resolve(llmpar_loss_scale *state); /* fills in the defaults */
/* LLMPAR_ERR_ARGUMENT: not powers of two in order, interval below 1. */
LLMPAR_API llmpar_status llmpar_loss_scale_check(const llmpar_loss_scale *state, llmpar_error *error);
/* After a step. LLMPAR_ERR_NONFINITE: the gradient is not finite at the least scale, so that it is not the scale's fault; the state is unchanged. */
LLMPAR_API llmpar_status llmpar_loss_scale_update(llmpar_loss_scale *state, int32_t found_inf, llmpar_error *error);

#endif
