/* trainer: the recipe (mesh + model + placements + units + optimizer) and the training loop with its metrics. */
#ifndef LLMPAR_TRAINER_H
#define LLMPAR_TRAINER_H

#include "fsdp/fsdp.h"
#include "model/llama.h"
#include "model_io/hf.h"
#include "optim/lr.h"
#include "optim/optim.h"
#include "text/data.h"

typedef enum llmpar_exact { LLMPAR_EXACT_DEFAULT = 0, LLMPAR_EXACT_OFF = 1, LLMPAR_EXACT_ON = 2, LLMPAR_EXACT_REQUIRE = 3 } llmpar_exact;

typedef enum llmpar_sink_kind { LLMPAR_SINK_METRICS = 1, LLMPAR_SINK_PROGRESS = 2 } llmpar_sink_kind;
/* One line without its newline, from world rank 0. */
typedef void (*llmpar_sink_fn)(void *user, llmpar_sink_kind kind, const char *line);

/* Zero is a default everywhere. */
typedef struct llmpar_trainer_desc {
    const char *data;             /* path of a text; its bytes are the tokens (vocabulary >= 256) */
    llmpar_sequence_fn sequence;  /* or own data: tokens[seq_len + 1] of a global index; a token < 0 as target is not counted. Exactly one of data and sequence (neither: no training, only load, save, generate) */
    void *sequence_user;
    double held_out;              /* share of data kept for evaluation; default 0.05 */
    int64_t seq_len;              /* T; required */
    int64_t batch;                /* global sequences a step, over all ranks and micro-batches; default: one a data rank and micro-batch */
    int32_t grad_accum;           /* micro-batches a step; default 1 */
    int32_t no_sync;              /* 1: gradients stay local until the last micro-batch; same bits, more memory, fewer bytes */
    int32_t zero;                 /* LLMPAR_ZERO_0 or LLMPAR_ZERO_3 (default) */
    int32_t prefetch;             /* units gathered ahead; default 0 */
    int32_t sequence_parallel;    /* 1: on (where tp > 1) */
    llmpar_exact exact;           /* ON (default): same bits wherever the mesh allows; REQUIRE: refuse meshes that do not; OFF: plain order, deterministic for one mesh */
    int32_t canon;                /* pieces of sums that tp may split; power of two, default 8; OFF uses 1 */
    llmpar_dtype dtype;           /* F32 (default) or F64 */
    double lr;                    /* peak learning rate; default 1e-3 */
    double lr_min;                /* after the cosine; default lr / 10 */
    int64_t warmup;               /* steps; default 0 */
    int64_t total_steps;          /* of the cosine; default 0: constant */
    llmpar_optim_desc optim;      /* default AdamW */
    uint64_t memory_limit;        /* arena bytes a rank; default none */
    const char *log;              /* path of a JSON-lines file, one object a step; default none */
    int32_t log_every;            /* console line every n steps; default 10; negative: none */
    llmpar_sink_fn sink;          /* default: metrics to stdout, progress to stderr if it is a terminal */
    void *sink_user;
} llmpar_trainer_desc;

/* What a step did. */
typedef struct llmpar_step {
    int64_t step;                 /* 1, 2, .. */
    int64_t tokens;               /* counted tokens of the step, all ranks */
    double loss;                  /* mean over them */
    double grad_norm;             /* before clipping */
    double lr;
    double seconds;               /* of this rank */
    double tokens_per_second;     /* all ranks */
    double tflops;                /* all ranks, by llmpar_llama_flops_per_token */
    double mfu;                   /* share of what the ranks' own matrix product reached at start, all running at once */
    uint64_t memory;              /* peak arena bytes of this rank so far */
    int32_t skipped;              /* 1: no token counted, nothing was updated */
} llmpar_step;

typedef struct llmpar_trainer llmpar_trainer;

/* Checks and fills in defaults. LLMPAR_ERR_ARGUMENT / LLMPAR_ERR_MESH with the numbers: batch not divisible by data ranks x grad_accum; REQUIRE outside the guarantee. Local. */
LLMPAR_API llmpar_status llmpar_trainer_desc_resolve(llmpar_trainer_desc *desc, const llmpar_mesh *mesh, const llmpar_llama_config *config, llmpar_error *error);
/* The recipe. Applies tp to the model, shards its units, makes optimizer and schedules. Borrows mesh and model. Everything that can be wrong with desc and data is found before memory is taken. Collective. */
LLMPAR_API llmpar_status llmpar_parallelize(llmpar_mesh *mesh, llmpar_llama *model, const llmpar_trainer_desc *desc, llmpar_trainer **out);
LLMPAR_API void llmpar_trainer_destroy(llmpar_trainer *trainer); /* NULL is fine; local */
/* One optimizer step. LLMPAR_ERR_NONFINITE names the step and the first non-finite tensor; parameters are then those before the step. Collective. */
LLMPAR_API llmpar_status llmpar_trainer_step(llmpar_trainer *trainer, llmpar_step *out);
/* Mean loss over the held-out sequences (all, or the first max_sequences if > 0). The same bits on every mesh. Collective. */
LLMPAR_API llmpar_status llmpar_trainer_eval(llmpar_trainer *trainer, int64_t max_sequences, double *loss);
/* The next step also writes its gradients (before clipping; HF names) to a safetensors file. path is copied. Collective. */
LLMPAR_API llmpar_status llmpar_trainer_save_gradients(llmpar_trainer *trainer, const char *path);
LLMPAR_API llmpar_fsdp *llmpar_trainer_fsdp(llmpar_trainer *trainer);                      /* local */
LLMPAR_API const llmpar_schedule *llmpar_trainer_schedule(const llmpar_trainer *trainer);  /* of a training step; local */
LLMPAR_API const llmpar_data *llmpar_trainer_data(const llmpar_trainer *trainer);          /* NULL with own data; local */
/* Whole directory in, whole directory out. Collective. */
LLMPAR_API llmpar_status llmpar_load_hf(llmpar_trainer *trainer, const char *directory);
LLMPAR_API llmpar_status llmpar_save_hf(llmpar_trainer *trainer, const char *directory);

#endif
