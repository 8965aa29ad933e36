/* trainer_internal: the trainer's state, made by parallelize.c, driven by trainer.c, reported by metrics.c. */
#ifndef LLMPAR_TRAINER_INTERNAL_H
#define LLMPAR_TRAINER_INTERNAL_H

#include "io/file.h"
#include "run/trainer.h"

#if !defined(LLMPAR_NO_LLAMA) && !defined(LLMPAR_NO_IO) && !defined(LLMPAR_NO_TEXT)

struct llmpar_trainer {
    llmpar_ctx *ctx;
    llmpar_mesh *mesh;
    llmpar_llama *model;
    llmpar_trainer_desc desc;       /* resolved; strings are copies */
    llmpar_fsdp *fsdp;
    llmpar_optim *optim;
    llmpar_schedule *train, *eval;
    llmpar_mapped file;
    llmpar_data data;
    int64_t local;                  /* sequences of this rank in one micro-batch */
    int32_t *ids, *targets;         /* device [grad_accum * local, T] */
    int32_t *staging;               /* host [T + 1], then [2][local * T] */
    llmpar_micro *micro;            /* [grad_accum] */
    llmpar_stream *stream;
    int64_t steps;
    char *gradients;                /* path of the next step's gradients, or NULL */
    llmpar_tensor_file *gradient_file;
    void *log;                      /* FILE of the JSON lines, world rank 0 */
    double peak_flops;              /* all ranks' own matrix products at once, FLOP/s */
    int progress;                   /* a progress line is on the terminal */
};

LLMPAR__PRIVATE double llmpar__run_seconds(void); /* monotonic */
LLMPAR__PRIVATE llmpar_status llmpar__metrics_open(llmpar_trainer *trainer);
LLMPAR__PRIVATE void llmpar__metrics_close(llmpar_trainer *trainer);
/* Console line, progress line and log line of a step; world rank 0. */
LLMPAR__PRIVATE llmpar_status llmpar__metrics_step(llmpar_trainer *trainer, const llmpar_step *step);
/* Sets trainer->peak_flops. Collective. */
LLMPAR__PRIVATE llmpar_status llmpar__metrics_peak(llmpar_trainer *trainer);

#endif /* LLMPAR_NO_LLAMA, LLMPAR_NO_IO, LLMPAR_NO_TEXT */

#endif
