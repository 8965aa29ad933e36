/* fsdp: flat shards of units, and the executor that runs a schedule over them. It knows no model and no policy.

    unit u, 3 parameters, dp_shard = 4:   | w_q ........ | w_k .. | w_o ...... |0|
    flat shards:                          |  rank 0  |  rank 1  |  rank 2  |  rank 3  |

   A unit's tp-local parameters lie one after the other in one flat buffer, each beginning at a multiple of 128 elements, cut evenly over dp_shard (shards are multiples of 128; padding is zero, in
   no file and no norm). Rajbhandari et al. 2020 (ZeRO), Zhao et al. 2023 (FSDP). */
#ifndef LLMPAR_FSDP_H
#define LLMPAR_FSDP_H

#include "fsdp/schedule.h"
#include "fsdp/unit.h"
#include "tables/trace.h"

#define LLMPAR_FLAT_ALIGN 128

typedef struct llmpar_fsdp llmpar_fsdp;

/* Where a state stays between its uses: in device memory (the arena), in host memory (pinned on a GPU), in a file. */
typedef enum llmpar_tier { LLMPAR_TIER_DEVICE = 0, LLMPAR_TIER_HOST = 1, LLMPAR_TIER_FILE = 2 } llmpar_tier;

#define LLMPAR_OPTIMIZER_STATES 2

/* Zero is a default everywhere. */
typedef struct llmpar_fsdp_desc {
    int32_t zero;              /* LLMPAR_ZERO_3 (default) .. LLMPAR_ZERO_0 */
    llmpar_dtype dtype;        /* compute dtype of parameters and activations: F32 (default), F64, BF16, F16. Below F32 the optimizer works on f32 master parameters; gradients are of the sum type */
    llmpar_dtype reduce_dtype; /* gradients are rounded to it on their way between ranks; default: the sum type. BF16, F16: half the bytes, and no longer the same bits on every mesh (docs/exact.md) */
    uint64_t memory_limit;     /* arena limit in bytes, 0 = none */
    uint64_t memory_reserve;   /* bytes that the arena takes at once (llmpar_arena_reserve), 0 = as requests come */
    uint64_t seed;             /* initialisation */
    int32_t optimizer_states;  /* arrays of the sum type, one number an element of the shard, zeroed, that the optimizer gets with each update (AdamW 2, momentum 1); 0 .. LLMPAR_OPTIMIZER_STATES */
    llmpar_tier offload[LLMPAR_STATE_COUNT]; /* by llmpar_state */
    const char *offload_dir;   /* of the FILE tier's one file a rank, removed when it is open, so that nothing stays whatever happens; default (NULL or "") "." */
    int32_t count_only;        /* 1: nothing is initialised and no file is made: for a device that only counts */
    llmpar_tier offload_update;/* where the optimizer works. DEVICE (default); HOST (ZeRO-Offload, Ren et al. 2021): on the host's processors, in the host memory that optimizer state, parameters and gradients are all offloaded to;
                                  only gradients and parameters in the compute dtype travel. Same bits with AdamW and SGD; needs UPDATE_AFTER */
    int32_t overlap;           /* 1: each stream gets a thread of its own where the device can (CPU), so that collectives and files move during compute; same bits. Refused in lockstep */
    int32_t graphs;            /* 1: a unit's FORWARD, RECOMPUTE and BACKWARD are regions (region_begin, tables/device.h), so that a device which can (CUDA in mode FAST) replays them as graphs; same bits. LLMPAR_ERR_UNSUPPORTED on
                                  other devices, and where units have instructions between tensor-parallel ranks */
} llmpar_fsdp_desc;

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
    llmpar_dtype dtype;    /* the sum type */
    int64_t elements;
    void *param;           /* master parameters where there are any */
    const void *grad;
    void *state[LLMPAR_OPTIMIZER_STATES]; /* [optimizer_states], else NULL */
    const llmpar_segment *segments;
    int32_t segment_count;
    double grad_scale;     /* from begin_step */
    llmpar_stream *stream;
    llmpar_device *device; /* does the update: the rank's device on its stream; or (offload_update) the host's, with stream NULL: done on return. All buffers are its memory */
} llmpar_update;

/* The executor calls the optimizer through this table. */
typedef struct llmpar_optimizer {
    void *state;
    /* Before the first update of a step: after SCALAR_REDUCE 1, finite values only, norm is the global gradient norm; updates inside backward (LLMPAR_UPDATE_INSIDE): at the step's begin, norm -1. Sets the factor for gradients
       (clipping; 1 at the call). NULL: 1. Local. */
    llmpar_status (*begin_step)(void *state, double grad_norm, double *grad_scale);
    /* Enqueues the update of one unit's shard on update->stream. Every rank updates the same units in the same order; collective if the optimizer communicates. */
    llmpar_status (*update)(void *state, const llmpar_update *update);
} llmpar_optimizer;

/* One step's input and result. */
typedef struct llmpar_run {
    const llmpar_micro *micro;        /* [policy.micro_batches]; grad_scale and loss are filled in by the executor */
    int64_t tokens;                   /* in: counted tokens of this rank (all its micro-batches) */
    double loss_scale;                /* default 1; a power of two keeps the bits */
    int32_t skip_nonfinite;           /* 1: a gradient that is not finite makes the step a skipped one (found_inf) instead of an error: dynamic loss scaling */
    const llmpar_optimizer *optimizer;/* NULL: OPTIM only releases the gradient after on_gradient */
    /* Called before OPTIM of each unit with its gradient shard (saving gradients in tests, looking); may be NULL. Collective. */
    llmpar_status (*on_gradient)(void *user, llmpar_fsdp *fsdp, int32_t unit, const void *shard);
    void *on_gradient_user;
    /* out */
    int64_t global_tokens;
    double loss;                      /* mean over counted tokens of the step */
    double grad_norm;                 /* 0 for forward-only */
    int32_t skipped;                  /* 1: no token of the step counts (N = 0), so nothing was updated */
    int32_t found_inf;                /* 1: with skip_nonfinite: loss or norm was not finite on some rank, so nothing was updated */
    llmpar_arena_usage before_optimizer; /* usage when the first update of the step begins */
} llmpar_run;

/* Allocates the shards (initialised by seed and name; no rank ever holds a whole tensor) and streams. Borrows mesh; copies units' names and params; borrows their callbacks. Collective. */
LLMPAR_API llmpar_status llmpar_fsdp_create(llmpar_mesh *mesh, const llmpar_unit *units, int32_t unit_count, const llmpar_fsdp_desc *desc, llmpar_fsdp **out);
LLMPAR_API void llmpar_fsdp_destroy(llmpar_fsdp *fsdp); /* local */
/* Runs a list over this step's data. The list must be valid (llmpar_schedule_validate) and the same on all ranks. LLMPAR_ERR_NONFINITE when loss or norm is not finite: names the first non-finite tensor,
   and parameters are unchanged, except in UPDATE_INSIDE, where updates have begun by then. Collective. */
LLMPAR_API llmpar_status llmpar_fsdp_run(llmpar_fsdp *fsdp, const llmpar_instruction *list, int32_t count, llmpar_run *run);
/* From now on every run records when its instructions, and the units' instructions between tensor-parallel ranks, are worked on, and the arena's bytes behind each. Borrowed; NULL: no more. Its lanes are the streams. Local. */
LLMPAR_API void llmpar_fsdp_set_trace(llmpar_fsdp *fsdp, llmpar_trace *trace);

/* zero, shards, replicas, master, offload and host_update of a policy as this object needs them. Local. */
LLMPAR_API void llmpar_fsdp_policy(const llmpar_fsdp *fsdp, llmpar_policy *policy);
/* The same of an object that llmpar_fsdp_create would make, so that a schedule can be made and proved before memory is taken. Local. */
LLMPAR_API void llmpar_fsdp_desc_policy(const llmpar_fsdp_desc *desc, const llmpar_mesh *mesh, llmpar_policy *policy);
/* The units as copied by create; what the object borrows or owns. Local. */
LLMPAR_API int32_t llmpar_fsdp_unit_count(const llmpar_fsdp *fsdp);
LLMPAR_API const llmpar_unit *llmpar_fsdp_unit(const llmpar_fsdp *fsdp, int32_t unit);
LLMPAR_API llmpar_mesh *llmpar_fsdp_mesh(llmpar_fsdp *fsdp);
LLMPAR_API llmpar_arena *llmpar_fsdp_arena(llmpar_fsdp *fsdp);
LLMPAR_API llmpar_dtype llmpar_fsdp_dtype(const llmpar_fsdp *fsdp);
/* This rank's part of a unit: elements of its shard, and the segments in it. Local. */
LLMPAR_API void llmpar_fsdp_layout(const llmpar_fsdp *fsdp, int32_t unit, int64_t *elements, const llmpar_segment **segments, int32_t *segment_count);
/* This rank's shard of the (master) parameters in the sum type, and the segments in it; where it is offloaded, fetched; of a frozen unit below f32, which has no master, a copy. After a change, and where it was fetched or copied,
   llmpar_fsdp_shard_done is due before the next step. NULL: it failed, and the rank's error says why. Local. */
LLMPAR_API void *llmpar_fsdp_shard(llmpar_fsdp *fsdp, int32_t unit, int64_t *elements, const llmpar_segment **segments, int32_t *segment_count);
/* changed: the shard was written, so the store, the compute dtype's copy and (ZeRO-1, 2) the whole parameters are made from it again: then collective, else local. */
LLMPAR_API llmpar_status llmpar_fsdp_shard_done(llmpar_fsdp *fsdp, int32_t unit, int32_t changed);
/* llmpar_fsdp_desc.optimizer_states, and one of these arrays of a unit, shard-sized (0 <= index < that), for checkpoints; NULL for a frozen unit. Where they are offloaded, fetched (NULL: that failed, and the rank's error says
   why), and then llmpar_fsdp_optimizer_done is due before the next step; changed: the store gets them. Local. */
LLMPAR_API int32_t llmpar_fsdp_optimizer_states(const llmpar_fsdp *fsdp);
LLMPAR_API void *llmpar_fsdp_optimizer_state(llmpar_fsdp *fsdp, int32_t unit, int32_t index);
LLMPAR_API llmpar_status llmpar_fsdp_optimizer_done(llmpar_fsdp *fsdp, int32_t unit, int32_t changed);
/* bytes[i] of instruction i for micro-batches of this shape: what a collective or a store moves on this rank, what FORWARD, RECOMPUTE and BACKWARD take while they run, what OPTIM and CAST read and write. Local. */
LLMPAR_API llmpar_status llmpar_fsdp_bytes(const llmpar_fsdp *fsdp, const llmpar_schedule *schedule, const llmpar_micro *micro, uint64_t *bytes);
/* Where the bytes of a tag are at one moment of a step, name by name. The lines of a tag add up to the arena's live bytes there (PEAK: to its peak, if peaks were reset before the step), but for what the optimizer took of
   OPTIMIZER on its own (llmpar_optim_bytes). */
typedef enum llmpar_mark { LLMPAR_MARK_REST = 0, LLMPAR_MARK_BEFORE_OPTIMIZER = 1, LLMPAR_MARK_PEAK = 2 } llmpar_mark;
typedef struct llmpar_account_line {
    llmpar_tag tag;
    const char *name;   /* "parameters", "padding", ..; static text */
    uint64_t bytes;
} llmpar_account_line;
/* Lines of the tags PARAMETERS, GATHERED, GRADIENTS and OPTIMIZER: what this rank's part of the numbers themselves takes (parameters p, gradients g, optimizer and master K bytes each), and apart from it the buffers of micro-batch
   counters, the second slot of a tied weight, local gradients on their way into shards, and padding. schedule may be NULL for REST. Lines of 0 bytes are left out. Returns their number; writes at most capacity. Local. */
LLMPAR_API int32_t llmpar_fsdp_account(const llmpar_fsdp *fsdp, const llmpar_schedule *schedule, llmpar_mark mark, llmpar_account_line *lines, int32_t capacity);
/* Parameter as a descriptor over the mesh, and the local buffer that goes with it inside a shard-sized buffer (parameters, gradients, optimizer state). Local. */
LLMPAR_API void llmpar_fsdp_dtensor(const llmpar_fsdp *fsdp, int32_t unit, int32_t param, llmpar_dtensor *out);
/* What world rank `rank` holds of a parameter (and of its gradient and optimizer state); is_owner: its copy is the one that goes into files. Local. */
LLMPAR_API void llmpar_fsdp_part(const llmpar_fsdp *fsdp, int32_t rank, int32_t unit, int32_t param, llmpar_local *out);
LLMPAR_API void *llmpar_fsdp_local(const llmpar_fsdp *fsdp, int32_t unit, int32_t param, void *shard);
/* Gathers a unit by hand to look or generate; params[param_count] point at tp-local tensors until reshard. Counted: every unshard that succeeds needs a reshard. Collective over dp_shard. */
LLMPAR_API llmpar_status llmpar_fsdp_unshard(llmpar_fsdp *fsdp, int32_t unit, void *const **params);
LLMPAR_API llmpar_status llmpar_fsdp_reshard(llmpar_fsdp *fsdp, int32_t unit);
/* Lends the gathered parameters to `borrower` (static text), who may change how they lie and mends that before giving them back (NULL). Until then unshard, shard, shard_done of a change, find_nonfinite and run, and so saving, loading and steps, are refused
   with its name, and so is another borrower: LLMPAR_ERR_ARGUMENT. What was unsharded before stays. Local. */
LLMPAR_API llmpar_status llmpar_fsdp_lend(llmpar_fsdp *fsdp, const char *borrower);
/* Writes into text the first parameter with a non-finite element over the world, "" if none. Collective. */
LLMPAR_API llmpar_status llmpar_fsdp_find_nonfinite(llmpar_fsdp *fsdp, char *text, size_t capacity);

#endif
