/* trainer_internal: the trainer's state, made by parallelize.c, driven by trainer.c, reported by metrics.c. */
#ifndef LLMPAR_TRAINER_INTERNAL_H
#define LLMPAR_TRAINER_INTERNAL_H

#include "base/clock_internal.h"
#include "io/file.h"
#include "model_io/checkpoint.h"
#include "run/trainer.h"
#include "tables/tables_internal.h"

#if !defined(LLMPAR_NO_LLAMA) && !defined(LLMPAR_NO_IO) && !defined(LLMPAR_NO_TEXT)

/* Which block units recompute: of those with index i % every == every - 1, the first `full` fully, then up to number `selective` selectively. */
typedef struct llmpar__recipe_blocks { int32_t every, full, selective; } llmpar__recipe_blocks;

struct llmpar_trainer {
    llmpar_ctx *ctx;
    llmpar_mesh *mesh;
    llmpar_llama *model;
    llmpar_trainer_desc desc;       /* resolved; strings are copies */
    llmpar_fsdp *fsdp;
    llmpar_optim *optim;
    llmpar_lr_desc lr;              /* resolved */
    llmpar_loss_scale scale;        /* of the coming step; with F16 */
    llmpar_schedule *train, *eval;
    llmpar_mapped file;
    llmpar_data data;
    int64_t local;                  /* sequences of this rank in one micro-batch */
    int32_t *ids, *targets;         /* device [grad_accum * local, T] */
    int32_t *staging;               /* host [T + 1], then [2][local * T]; for copies */
    size_t staging_bytes;
    llmpar_micro *micro;            /* [grad_accum] */
    llmpar_stream *stream;
    int64_t steps, resumed;         /* made; of these before this run */
    llmpar_checkpoint *checkpoint;  /* NULL: none */
    char *gradients;                /* path of the next step's gradients, or NULL */
    llmpar_tensor_file *gradient_file;
    void *log;                      /* FILE of the JSON lines, world rank 0 */
    double peak_flops;              /* all ranks' own matrix products at once, FLOP/s */
    int progress;                   /* a progress line is on the terminal */
    llmpar_trace *trace;            /* NULL: none */
    llmpar_writer *trace_file;      /* world rank 0, while it is written */
    int count_only;                 /* made by plan.c: no data, no files, no metrics */
    uint64_t reserve;               /* of the arena */
    llmpar_memory memory;
};

LLMPAR__PRIVATE llmpar_status llmpar__metrics_open(llmpar_trainer *trainer);
LLMPAR__PRIVATE void llmpar__metrics_close(llmpar_trainer *trainer);
/* Console line, progress line and log line of a step; world rank 0. */
LLMPAR__PRIVATE llmpar_status llmpar__metrics_step(llmpar_trainer *trainer, const llmpar_step *step);
/* Sets trainer->peak_flops. Collective. */
LLMPAR__PRIVATE llmpar_status llmpar__metrics_peak(llmpar_trainer *trainer);

LLMPAR__PRIVATE void llmpar__trainer_forget(llmpar_error *error); /* as it was before any error: the rank's place stays */
/* trainer_checkpoint.c: the directory, and where desc.resume says so the state from there. Collective. */
LLMPAR__PRIVATE llmpar_status llmpar__trainer_resume(llmpar_trainer *trainer);
LLMPAR__PRIVATE llmpar_status llmpar__trainer_poll(llmpar_trainer *trainer, int wait);

/* parallelize.c: a resolved desc as it stands; count_only: on a device that only counts; reserve: of the arena (llmpar_arena_reserve). Collective. */
LLMPAR__PRIVATE llmpar_status llmpar__trainer_create(llmpar_mesh *mesh, llmpar_llama *model, const llmpar_trainer_desc *desc, const llmpar__recipe_blocks *blocks, int count_only, uint64_t reserve, llmpar_trainer **out);
LLMPAR__PRIVATE void llmpar__recipe_blocks_of(const llmpar_trainer_desc *desc, llmpar_llama *model, llmpar__recipe_blocks *out); /* all but AUTO */
LLMPAR__PRIVATE int32_t llmpar__recipe_block_units(llmpar_llama *model);
/* plan.c: what a step takes; all zero where the recipe is not allowed (by its desc, so on all ranks). Collective. */
LLMPAR__PRIVATE llmpar_status llmpar__plan_needs(llmpar_mesh *mesh, llmpar_llama *model, const llmpar_trainer_desc *desc, const llmpar__recipe_blocks *blocks, llmpar_memory *out);
/* plan.c: finds the blocks of AUTO; LLMPAR_ERR_MEMORY on every rank where a step would not fit desc->memory_limit, with what other policies would take. Collective. */
LLMPAR__PRIVATE llmpar_status llmpar__plan_fit(llmpar_mesh *mesh, llmpar_llama *model, const llmpar_trainer_desc *desc, llmpar__recipe_blocks *blocks);

#endif /* LLMPAR_NO_LLAMA, LLMPAR_NO_IO, LLMPAR_NO_TEXT */

#endif
