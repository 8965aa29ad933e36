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
    int32_t chain;                /* 1: micro-batches are added in sequence into one gradient buffer; same bits on every mesh at the same grad_accum */
    int32_t zero;                 /* LLMPAR_ZERO_3 (default) .. LLMPAR_ZERO_0 */
    llmpar_reshard reshard;       /* default: parameters are freed between forward and backward, but for the last unit's */
    int32_t reshard_every;        /* with EVERY; default 2 */
    int32_t prefetch, prefetch_backward; /* units gathered ahead, 0 .. 4; default 0; in backward default as in forward, negative: none */
    llmpar_recompute recompute;   /* what blocks keep for backward; AUTO needs memory_limit */
    int32_t recompute_every;      /* only every n-th block recomputes; default 1 */
    int32_t freeze;               /* the first n units (embedding, blocks ..) are frozen */
    llmpar_tier offload[LLMPAR_STATE_COUNT]; /* by llmpar_state */
    const char *offload_dir;      /* of the FILE tier; default (NULL or "") "." */
    llmpar_tier offload_update;   /* DEVICE (default), or HOST: the optimizer works on the host's processors, where its state, the parameters and the gradients are all offloaded to host memory (ZeRO-Offload); AdamW and SGD, same bits */
    int32_t overlap;              /* 1: collectives and files move on threads of their own during compute; same bits */
    int32_t graphs;               /* 1: the units' instructions are replayed as CUDA graphs; same bits, less of the host's time. Needs a CUDA device in mode FAST, tp = 1, and no dtype F16: its loss scale changes what is replayed */
    int32_t sequence_parallel;    /* 1: on (where tp > 1) */
    llmpar_exact exact;           /* ON (default): same bits wherever the mesh allows; REQUIRE: refuse meshes that do not; OFF: plain order, deterministic for one mesh */
    int32_t canon;                /* pieces of sums that tp may split; power of two, default 8; OFF uses 1 */
    llmpar_dtype dtype;           /* of compute: F32 (default), F64, BF16, F16 (with dynamic loss scaling); below F32 the optimizer works on f32 master parameters */
    llmpar_dtype reduce_dtype;    /* of gradients between ranks; default: that of sums. BF16, F16: outside the guarantee */
    double lr;                    /* peak learning rate; default 1e-3 */
    double lr_min;                /* at the end of the schedule; default lr / 10 */
    int64_t warmup;               /* steps; default 0 */
    int64_t total_steps;          /* of the schedule; default 0: constant */
    llmpar_lr_kind lr_schedule;   /* default COSINE, from lr to lr_min */
    int64_t decay_steps;          /* of the WSD schedules; default a tenth of total_steps */
    llmpar_optim_desc optim;      /* default AdamW */
    llmpar_loss_scale loss_scale; /* with dtype F16; its begin */
    uint64_t memory_limit;        /* arena bytes a rank; default none. A step that would not fit is refused before anything is allocated, with what other policies would take */
    const char *trace;            /* path of a Chrome trace (Perfetto loads it): recorded from the first step on, written by llmpar_trainer_save_trace; default none */
    const char *log;              /* path of a JSON-lines file, one object a step; default none. A resumed run keeps its lines up to the step it goes on from */
    const char *checkpoint;       /* directory of checkpoints (model_io/checkpoint.h; docs/checkpoints.md); default none. Without resume it must not hold any yet */
    int32_t checkpoint_every;     /* steps between saves; default 0: only llmpar_trainer_checkpoint saves */
    int32_t checkpoint_background;/* 1: written by a thread while the next steps run; the first step that finds it written commits it, or returns its error */
    int32_t keep;                 /* newest checkpoints that are kept; default 0: all */
    const char *resume;           /* "auto": the newest whole one of `checkpoint`, from the beginning where there is none yet, damaged ones set aside; "step-N" of it; or a path: a step-N, or a directory whose `latest` is taken. Default: a new run */
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
    int32_t skipped;              /* 1: no token counted, or found_inf: nothing was updated */
    int32_t found_inf;            /* 1: the loss scale was too large for this step; it is halved for the next */
    double loss_scale;            /* of this step; 1 without loss scaling */
} llmpar_step;

/* Arena bytes of one rank at three marks: when everything is set up; when the first update of a step begins (the largest of all steps); the peak of all steps. */
typedef struct llmpar_memory { llmpar_arena_usage init, before_optimizer, step; } llmpar_memory;

typedef struct llmpar_trainer llmpar_trainer;

/* Checks and fills in defaults. LLMPAR_ERR_ARGUMENT / LLMPAR_ERR_MESH with the numbers: batch not divisible by data ranks x grad_accum; REQUIRE outside the guarantee. Local. */
LLMPAR_API llmpar_status llmpar_trainer_desc_resolve(llmpar_trainer_desc *desc, const llmpar_mesh *mesh, const llmpar_llama_config *config, llmpar_error *error);
/* The recipe. Applies tp to the model, shards its units, makes optimizer and schedules. Borrows mesh and model. Everything that can be wrong with desc and data is found before memory is taken.
   With desc.resume it comes back as the checkpoint was; LLMPAR_ERR_CONFIG, LLMPAR_ERR_SHAPE: that is of another run (model, optimizer, batch, seq_len, seed, length of the text; learning rate, mesh and policies may differ). Collective. */
LLMPAR_API llmpar_status llmpar_parallelize(llmpar_mesh *mesh, llmpar_llama *model, const llmpar_trainer_desc *desc, llmpar_trainer **out);
LLMPAR_API void llmpar_trainer_destroy(llmpar_trainer *trainer); /* local */
/* One optimizer step. LLMPAR_ERR_NONFINITE names the step and the first non-finite tensor; parameters are then those before the step (not with updates inside backward, which have begun by then). Collective. */
LLMPAR_API llmpar_status llmpar_trainer_step(llmpar_trainer *trainer, llmpar_step *out);
/* Steps made so far, those before a resume too. Local. */
LLMPAR_API int64_t llmpar_trainer_steps(const llmpar_trainer *trainer);
/* Saves a checkpoint now, in the background where desc says so. After an error (the same on all ranks) training can go on. llmpar_trainer_step does so every checkpoint_every steps, and then returns that error though its step is
   made and *out filled in. Collective. */
LLMPAR_API llmpar_status llmpar_trainer_checkpoint(llmpar_trainer *trainer);
/* Ends a save in the background, if one is under way: without it, destroy leaves that one uncommitted. Collective. */
LLMPAR_API llmpar_status llmpar_trainer_finish(llmpar_trainer *trainer);
/* Mean loss over the held-out sequences (all, or the first max_sequences if > 0). The same bits on every mesh. Collective. */
LLMPAR_API llmpar_status llmpar_trainer_eval(llmpar_trainer *trainer, int64_t max_sequences, double *loss);
/* The next step also writes its gradients (before clipping, with dtype F16 times the step's loss_scale; HF names) to a safetensors file. path is copied. Collective. */
LLMPAR_API llmpar_status llmpar_trainer_save_gradients(llmpar_trainer *trainer, const char *path);
/* This rank's memory at the three marks. Local. */
LLMPAR_API void llmpar_trainer_memory(const llmpar_trainer *trainer, llmpar_memory *out);
/* The same of every rank as a table, a line a tag, the smallest and the largest rank of each mark; written (cut at capacity; 2,000 bytes hold it) on world rank 0, "" elsewhere. ctx NULL: of this rank alone, as after an error; then local, else collective. */
LLMPAR_API llmpar_status llmpar_memory_print(llmpar_ctx *ctx, const llmpar_memory *memory, char *text, size_t capacity);
/* Writes the trace of all ranks so far to desc.trace. LLMPAR_ERR_ARGUMENT where none was asked for. Collective. */
LLMPAR_API llmpar_status llmpar_trainer_save_trace(llmpar_trainer *trainer);
LLMPAR_API llmpar_fsdp *llmpar_trainer_fsdp(llmpar_trainer *trainer);                      /* local */
LLMPAR_API const llmpar_schedule *llmpar_trainer_schedule(const llmpar_trainer *trainer);  /* of a training step; local */
LLMPAR_API llmpar_status llmpar_trainer_schedule_bytes(const llmpar_trainer *trainer, uint64_t *bytes); /* [its count], see llmpar_fsdp_bytes; local */
LLMPAR_API const llmpar_data *llmpar_trainer_data(const llmpar_trainer *trainer);          /* NULL with own data; local */
/* Whole directory in, whole directory out. Collective. */
LLMPAR_API llmpar_status llmpar_load_hf(llmpar_trainer *trainer, const char *directory);
LLMPAR_API llmpar_status llmpar_save_hf(llmpar_trainer *trainer, const char *directory);

#endif
