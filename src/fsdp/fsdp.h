/* fsdp: flat shards of units, and the executor that runs a schedule over them. It knows no model and no policy.

    unit u, 3 parameters, dp_shard = 4:   | w_q ........ | w_k .. | w_o ...... |0|
    flat shards:                          |  rank 0  |  rank 1  |  rank 2  |  rank 3  |

   A unit's tp-local parameters lie one after the other in one flat buffer, each beginning at a multiple of 128 elements, cut evenly over dp_shard (shards are multiples of 128; padding is zero, in
   no file and no norm). Rajbhandari et al. 2020 (ZeRO), Zhao et al. 2023 (FSDP). */
#ifndef LLMPAR_FSDP_H
#define LLMPAR_FSDP_H

#include "fsdp/schedule.h"
#include "fsdp/unit.h"

#define LLMPAR_FLAT_ALIGN 128

typedef struct llmpar_fsdp llmpar_fsdp;

typedef struct llmpar_fsdp_desc {
    int32_t zero;              /* 0 is a meaning of its own, so: LLMPAR_ZERO_DEFAULT = ZeRO-3 */
    llmpar_dtype dtype;        /* parameters, activations, gradients: F32 (default) or F64 */
    uint64_t memory_limit;     /* arena limit in bytes, 0 = none */
    uint64_t seed;             /* initialisation */
} llmpar_fsdp_desc;
#define LLMPAR_ZERO_DEFAULT 0
#define LLMPAR_ZERO_0 1 /* DDP: whole parameters, gradients summed over dp */
#define LLMPAR_ZERO_3 2 /* parameters, gradients and optimizer state sharded over dp_shard */

/* The part of one parameter inside this rank's shard. */
typedef struct llmpar_segment {
    int32_t param;        /* index in the unit */
    int32_t no_decay;
    int32_t owner;        /* 1: this rank's copy counts in norms */
    int64_t begin, count; /* elements of the shard */
} llmpar_segment;

/* What an OPTIM instruction hands to the optimizer. Buffers are shards of `elements` elements. */
typedef struct llmpar_update {
    int32_t unit;
    llmpar_dtype dtype;
    int64_t elements;
    void *param;
    const void *grad;
    const llmpar_segment *segments;
    int32_t segment_count;
    double grad_scale;     /* from begin_step */
    llmpar_stream *stream;
} llmpar_update;

/* The executor calls the optimizer through this table. */
typedef struct llmpar_optimizer {
    void *state;
    /* After SCALAR_REDUCE 1, finite values only: norm is the global gradient norm. Sets the factor for gradients (clipping; 1 at the call). NULL: 1. Local. */
    llmpar_status (*begin_step)(void *state, double grad_norm, double *grad_scale);
    /* Enqueues the update of one unit's shard on update->stream. Local. */
    llmpar_status (*update)(void *state, const llmpar_update *update);
} llmpar_optimizer;

/* One step's input and result. */
typedef struct llmpar_run {
    const llmpar_micro *micro;        /* [policy.micro_batches]; grad_scale and loss are filled in by the executor */
    int64_t tokens;                   /* in: counted tokens of this rank (all its micro-batches) */
    double loss_scale;                /* default 1 */
    const llmpar_optimizer *optimizer;/* NULL: OPTIM only releases the gradient after on_gradient */
    /* Called before OPTIM of each unit with its gradient shard (saving gradients in tests, looking); may be NULL. Collective. */
    llmpar_status (*on_gradient)(void *user, llmpar_fsdp *fsdp, int32_t unit, const void *shard);
    void *on_gradient_user;
    /* out */
    int64_t global_tokens;
    double loss;                      /* mean over counted tokens of the step */
    double grad_norm;                 /* 0 for forward-only */
    int32_t skipped;                  /* 1: no token of the step counts (N = 0), so nothing was updated */
} llmpar_run;

/* Allocates the shards (initialised by seed and name; no rank ever holds a whole tensor) and streams. Borrows mesh; copies units' names and params; borrows their callbacks. Collective. */
LLMPAR_API llmpar_status llmpar_fsdp_create(llmpar_mesh *mesh, const llmpar_unit *units, int32_t unit_count, const llmpar_fsdp_desc *desc, llmpar_fsdp **out);
LLMPAR_API void llmpar_fsdp_destroy(llmpar_fsdp *fsdp); /* NULL is fine; local */
/* Runs a list over this step's data. The list must be valid (llmpar_schedule_validate) and the same on all ranks. LLMPAR_ERR_NONFINITE when loss or norm is not finite: names the first non-finite tensor,
   and parameters are unchanged. Collective. */
LLMPAR_API llmpar_status llmpar_fsdp_run(llmpar_fsdp *fsdp, const llmpar_instruction *list, int32_t count, llmpar_run *run);

/* policy.unsharded and replicas as this object needs them. Local. */
LLMPAR_API void llmpar_fsdp_policy(const llmpar_fsdp *fsdp, llmpar_policy *policy);
/* The units as copied by create; what the object borrows or owns. Local. */
LLMPAR_API int32_t llmpar_fsdp_unit_count(const llmpar_fsdp *fsdp);
LLMPAR_API const llmpar_unit *llmpar_fsdp_unit(const llmpar_fsdp *fsdp, int32_t unit);
LLMPAR_API llmpar_mesh *llmpar_fsdp_mesh(llmpar_fsdp *fsdp);
LLMPAR_API llmpar_arena *llmpar_fsdp_arena(llmpar_fsdp *fsdp);
LLMPAR_API llmpar_dtype llmpar_fsdp_dtype(const llmpar_fsdp *fsdp);
/* This rank's shard and the segments in it. Local. */
LLMPAR_API void *llmpar_fsdp_shard(llmpar_fsdp *fsdp, int32_t unit, int64_t *elements, const llmpar_segment **segments, int32_t *segment_count);
/* Parameter as a descriptor over the mesh, and the local buffer that goes with it inside a shard-sized buffer (parameters, gradients, optimizer state). Local. */
LLMPAR_API void llmpar_fsdp_dtensor(const llmpar_fsdp *fsdp, int32_t unit, int32_t param, llmpar_dtensor *out);
LLMPAR_API void *llmpar_fsdp_local(const llmpar_fsdp *fsdp, int32_t unit, int32_t param, void *shard);
/* Gathers a unit by hand to look or generate; params[param_count] point at tp-local tensors until reshard. Counted: every unshard that succeeds needs a reshard. Collective over dp_shard. */
LLMPAR_API llmpar_status llmpar_fsdp_unshard(llmpar_fsdp *fsdp, int32_t unit, void *const **params);
LLMPAR_API llmpar_status llmpar_fsdp_reshard(llmpar_fsdp *fsdp, int32_t unit);
/* Writes into text the first parameter with a non-finite element over the world, "" if none. Collective. */
LLMPAR_API llmpar_status llmpar_fsdp_find_nonfinite(llmpar_fsdp *fsdp, char *text, size_t capacity);

#endif
