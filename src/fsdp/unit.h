/* unit: what FSDP gathers at once: named tensors and callbacks. FSDP knows units, never a model, so anybody's network is a first-class client.

   A step runs the units in order: forward 0..n-1, backward n-1..0. Unit u's output is unit u+1's input; the first unit reads the token ids of the micro-batch, the last one
   computes the loss, in forward or backward. A unit's forward and backward are lists of instructions themselves (compute, tensor-parallel gather, tensor-parallel reduce), so that
   tensor-parallel communication is planned, printed and overlapped like the rest. */
#ifndef LLMPAR_UNIT_H
#define LLMPAR_UNIT_H

#include "mesh/dtensor.h"
#include "tables/arena.h"

/* One parameter. name and everything in it are copied by llmpar_fsdp_create. */
typedef struct llmpar_param {
    const char *name;                 /* Hugging Face name, unique over all units */
    int32_t dims;
    int32_t no_decay;                 /* 1: weight decay does not apply (norms, biases) */
    int64_t shape[LLMPAR_MAX_DIMS];   /* global */
    llmpar_placement tp;              /* {0} = Replicate, or Shard(dim) on LLMPAR_AXIS_TP */
    double init_std;                  /* normal(0, init_std), keyed by (seed, name, element); 0: the constant init_value */
    double init_value;
} llmpar_param;

/* The part of the step's data that one micro-batch of this rank works on. B = batch sequences of T = t tokens. */
typedef struct llmpar_micro {
    int32_t index;                /* micro-batch number, 0.. */
    int64_t batch, t;             /* local sequences, tokens each (global T) */
    int64_t leaves;               /* leaves of the batch tree in this micro-batch (docs/exact.md); divides batch */
    const int32_t *ids, *targets; /* [B,T] device memory; target < 0: not counted */
    float grad_scale;             /* what dlogits are multiplied with: loss scale / unmasked tokens of the whole step */
    int64_t *loss;                /* device, 72 limbs (base/exact_sum.h): the unit that has the loss adds its token losses here */
    double *token_loss;           /* device [B,T] or NULL */
} llmpar_micro;

/* Bytes a unit needs for one micro-batch; filled by llmpar_unit.sizes. */
typedef struct llmpar_unit_sizes {
    int32_t recompute; /* in: the unit's llmpar_recompute */
    size_t output;     /* activations handed to the next unit; 0 for the last */
    size_t saved;      /* kept from forward to backward */
    size_t scratch;    /* used inside one forward or backward */
    size_t workspace;  /* passed to operations */
} llmpar_unit_sizes;

/* RECOMPUTE: forward again, for what backward needs of it; instructions marked output_only are left out. */
typedef enum llmpar_pass { LLMPAR_PASS_FORWARD = 0, LLMPAR_PASS_BACKWARD = 1, LLMPAR_PASS_EVAL = 2, LLMPAR_PASS_RECOMPUTE = 3 } llmpar_pass;

/* What a unit keeps from forward to backward. NONE (default): everything it saves. SELECTIVE: the unit itself saves less (what is expensive to compute) and its backward makes the rest again: llmpar_unit_sizes and the
   callbacks look at `recompute`. FULL: only its input; forward runs again (RECOMPUTE) before backward. AUTO: for a recipe, not for a unit: the cheapest of these, unit by unit, that the memory limit allows. Korthikanti et al. 2022; Chen et al. 2016. */
typedef enum llmpar_recompute { LLMPAR_RECOMPUTE_NONE = 0, LLMPAR_RECOMPUTE_SELECTIVE = 1, LLMPAR_RECOMPUTE_FULL = 2, LLMPAR_RECOMPUTE_AUTO = 3 } llmpar_recompute;

/* Everything a callback sees. Pointers are device memory, valid until the last instruction of the pass has run. params[i] is the tp-local tensor i, row-major. */
typedef struct llmpar_unit_call {
    llmpar_ctx *ctx;
    llmpar_device *device;
    llmpar_stream *stream;              /* of the instruction that runs */
    void *user;                         /* llmpar_unit.user */
    const llmpar_micro *micro;
    llmpar_pass pass;
    llmpar_dtype dtype;                 /* of parameters and activations; gradients of parameters are of llmpar_dtype_sum(dtype) */
    llmpar_recompute recompute;         /* of the unit */
    int32_t index;                      /* llmpar_unit_op.index of the instruction that runs */
    void *const *params;                /* [param_count] */
    void *const *grads;                 /* backward: [param_count], each to be fully overwritten; NULL for a frozen unit */
    void *const *borrowed;              /* parameters of the borrowed unit, or NULL */
    void *const *borrowed_grads;        /* backward: its gradients from this use, each to be fully overwritten; NULL where the borrowed unit is frozen */
    const void *input;                  /* previous unit's output; NULL for the first */
    void *output;                       /* forward; NULL in a RECOMPUTE of a unit that has output_only instructions */
    const void *doutput;                /* backward: gradient of output; NULL for the last */
    void *dinput;                       /* backward: gradient of input, to be fully overwritten; NULL for the first, and where all units before are frozen: not wanted */
    void *saved, *scratch, *workspace;
    size_t workspace_bytes;
} llmpar_unit_call;

typedef enum llmpar_unit_op_kind { LLMPAR_COMPUTE = 0, LLMPAR_TP_GATHER = 1, LLMPAR_TP_REDUCE = 2 } llmpar_unit_op_kind;

/* One instruction of a unit's forward or backward. wait = 1 + index of an earlier instruction of the same list that must be complete (0: none); instructions of one stream run in list order anyway. COMPUTE runs on the compute
   stream, TP_* on the tp stream. */
typedef struct llmpar_unit_op {
    const char *name;                              /* "qkv + attention"; static text */
    llmpar_status (*run)(llmpar_unit_call *call);  /* enqueues on call->stream */
    llmpar_unit_op_kind kind;
    int32_t wait[2];
    int32_t index;                                 /* handed to run as call->index: which block of a unit that has several, say */
    int32_t output_only;                           /* forward: 1: backward needs nothing of it, so RECOMPUTE leaves it out */
} llmpar_unit_op;

typedef struct llmpar_unit {
    const char *name;                 /* "layers.3" */
    const llmpar_param *params;       /* borrowed until llmpar_fsdp_create returns */
    int32_t param_count;
    int32_t borrow;                   /* 1 + index of another unit whose parameters this one reads too (tied embeddings); 0: none */
    const llmpar_unit_op *forward, *backward; /* borrowed as long as the fsdp object */
    int32_t forward_count, backward_count;
    /* Sizes for a micro-batch shape (micro's batch, t, leaves) and out->recompute; out is zero otherwise. Local. */
    llmpar_status (*sizes)(void *user, const llmpar_micro *micro, llmpar_dtype dtype, llmpar_unit_sizes *out);
    void *user;
    llmpar_recompute recompute;       /* what is kept for backward; not FULL for the last unit: its backward follows its forward */
    int32_t frozen;                   /* 1: gathered, never reduced and never updated; backward only hands dinput on */
} llmpar_unit;

#endif
