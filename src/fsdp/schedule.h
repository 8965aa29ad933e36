/* schedule: what a step does, as data. A pure function turns (units, policy) into a list of instructions; validate.h proves it; the executor runs it. */
#ifndef LLMPAR_SCHEDULE_H
#define LLMPAR_SCHEDULE_H

#include "base/heap.h"
#include "fsdp/unit.h"

/* GATHER u            whole parameters of unit u from the shards (all-gather over dp_shard); where parameters are whole at rest (ZeRO-1, 2): in place, after the update and with its predicate
   FREE u              the gathered parameters, or gradient buffer `slot` where slot >= 0; slot -1 and what PARAMS: the fetched shard, unchanged. A shard buffer (local 0) is freed only in the first of two passes, after its NORM
   FORWARD u m         unit u on micro-batch m; pass FORWARD or EVAL; again: the second forward or backward of a step in two passes, whose loss does not count. EVAL: nothing is kept, and the input is released: every unit of a forward-only list,
                       and the units without a BACKWARD. A unit with recompute FULL keeps no saved activations, only its input
   RECOMPUTE u m       forward of a unit that kept only its input, into saved activations; pass RECOMPUTE
   BACKWARD u m        its gradients into buffer `slot` (-1: frozen), and for a borrowed unit into buffer `from` of that unit's use 1 (-1: that unit is frozen). `local`: local buffers, else the buffers that are reduced in place.
                       Units in front of the first one whose backward makes a gradient (llmpar_schedule_first_backward) have none
   REDUCE u            local buffer `from` -> shard buffer `slot` (reduce-scatter over dp_shard); use: 0 own, 1 borrowed. Where gradients are whole (ZeRO-1) in place: from == slot, local 0, buffer `slot`, of which only this rank's part
                       counts from then on
   REDUCE_REPLICA u    shard buffer `slot` summed over dp_replicate (all of dp in ZeRO-0), after REDUCE
   ACCUMULATE u        buffer slot <- slot + from; from is released. `local`: local buffers, else shards; from_use: the use `from` belongs to
   NORM u              exact square sum of shard buffer `slot`
   SCALAR_REDUCE       pass 0: counted tokens of the step; pass 1: loss and norm over the world, then the host decides found_inf
   OPTIM u             update from shard buffer `slot`, which is released; only if found_inf == 0 (predicate IF_FINITE), except in UPDATE_INSIDE, where nothing is known yet (ALWAYS). The buffer is released in any case. With host_update
                       the gradient, the parameters and the state are in their stores and stay there: the host's processors work on them
   CAST u              the shard in the compute dtype from the f32 master parameters, after the update and with its predicate; with host_update from the store, on its way to the device
   FETCH u, STORE u    `what` from or to the store of its tier: OPTIMIZER, PARAMS (master parameters, or the f32 shard itself), GRADS (shard buffer `slot` of `use`), ACTIVATIONS (of micro-batch m: what the unit saved, and its input).
                       STORE releases the device's copy, FETCH takes memory for it again; both always, whatever found_inf is. At the begin and at the end of a step everything that `offload` names is in its store alone; a gradient or
                       activation that is fetched is no longer in its store */
typedef enum llmpar_op { LLMPAR_OP_GATHER = 1, LLMPAR_OP_FREE, LLMPAR_OP_FORWARD, LLMPAR_OP_BACKWARD, LLMPAR_OP_REDUCE, LLMPAR_OP_REDUCE_REPLICA, LLMPAR_OP_ACCUMULATE, LLMPAR_OP_NORM, LLMPAR_OP_SCALAR_REDUCE, LLMPAR_OP_OPTIM, LLMPAR_OP_RECOMPUTE, LLMPAR_OP_CAST, LLMPAR_OP_FETCH, LLMPAR_OP_STORE } llmpar_op;
typedef enum llmpar_stream_id { LLMPAR_STREAM_COMPUTE = 0, LLMPAR_STREAM_GATHER = 1, LLMPAR_STREAM_REDUCE = 2, LLMPAR_STREAM_TP = 3, LLMPAR_STREAM_OFFLOAD = 4, LLMPAR_STREAM_COUNT = 5 } llmpar_stream_id;
typedef enum llmpar_predicate { LLMPAR_ALWAYS = 0, LLMPAR_IF_FINITE = 1 } llmpar_predicate; /* IF_FINITE: found_inf == 0 */

/* What can be kept outside device memory between its uses. */
typedef enum llmpar_state { LLMPAR_STATE_OPTIMIZER = 0, LLMPAR_STATE_PARAMS = 1, LLMPAR_STATE_GRADS = 2, LLMPAR_STATE_ACTIVATIONS = 3, LLMPAR_STATE_COUNT = 4 } llmpar_state;

#define LLMPAR_WAITS 6
#define LLMPAR_GRAD_SLOTS 24 /* log2(micro-batches) + 2 at most */

typedef struct llmpar_instruction {
    llmpar_op op;
    int32_t unit, micro_batch;       /* -1 where it does not apply */
    int32_t pass;                    /* llmpar_pass for FORWARD; 0/1 for SCALAR_REDUCE */
    int32_t use;                     /* 0: the unit's own gradient; 1: gradient of the unit from the unit that borrows it */
    int32_t slot, from, from_use;    /* gradient buffers; -1 none */
    int32_t local;                   /* FREE, ACCUMULATE, BACKWARD: the slots are local (whole) gradients, else shards (or, in ZeRO-0 and 1, whole buffers that are reduced in place) */
    llmpar_state what;               /* FETCH, STORE; FREE: PARAMS or 0 */
    int32_t again;                   /* FORWARD, RECOMPUTE, BACKWARD: of the second pass of a step in two */
    llmpar_stream_id stream;
    llmpar_predicate predicate;
    int32_t wait_count, waits[LLMPAR_WAITS]; /* indices of earlier instructions on other streams that must be complete */
} llmpar_instruction;

/* ZeRO stages (Rajbhandari et al. 2020, section 5): what is sharded over dp_shard. 0 is a stage of its own, hence the codes. */
#define LLMPAR_ZERO_DEFAULT 0 /* = LLMPAR_ZERO_3 */
#define LLMPAR_ZERO_0 1 /* nothing (DDP) */
#define LLMPAR_ZERO_1 2 /* optimizer state */
#define LLMPAR_ZERO_2 3 /* and gradients */
#define LLMPAR_ZERO_3 4 /* and parameters */

/* ZeRO-3: which units' parameters are freed between their forward and their backward of a micro-batch. NOT_LAST: all whose backward does not follow at once and is not prefetched already; ALWAYS: all, which delays prefetching where it must. */
typedef enum llmpar_reshard { LLMPAR_RESHARD_DEFAULT = 0, LLMPAR_RESHARD_NOT_LAST = 1, LLMPAR_RESHARD_ALWAYS = 2, LLMPAR_RESHARD_NEVER = 3, LLMPAR_RESHARD_EVERY = 4 } llmpar_reshard;

typedef enum llmpar_update_when { LLMPAR_UPDATE_AFTER = 0, LLMPAR_UPDATE_INSIDE = 1, LLMPAR_UPDATE_TWO_PASSES = 2 } llmpar_update_when;

/* What a schedule is made from. Zero is the default everywhere. */
typedef struct llmpar_policy {
    int32_t micro_batches;        /* default 1; a power of two for equal bits */
    int32_t no_sync;              /* 0: reduce every micro-batch; 1: keep local gradients, reduce after the last */
    int32_t chain;                /* 1: one gradient buffer, to which the micro-batches are added in sequence, instead of a binary counter of them; refused with no_sync */
    int32_t zero;                 /* LLMPAR_ZERO_3 (default) .. LLMPAR_ZERO_0 */
    int32_t shards;               /* ranks that share the parameters; default 1: everything is whole, as in ZeRO-0 */
    int32_t replicas;             /* ranks that hold the same shard (all of dp in ZeRO-0); default 1: no REDUCE_REPLICA */
    llmpar_reshard reshard;       /* default NOT_LAST */
    int32_t reshard_every;        /* EVERY: units n-1, 2n-1, .. are freed as in NOT_LAST, the others kept as in NEVER; default 2 */
    int32_t prefetch, prefetch_backward; /* units gathered ahead of their use, 0 .. 4; default 0 */
    int32_t forward_only;         /* 1: evaluation */
    int32_t master;               /* 1: the optimizer works on f32 master parameters (compute dtype below f32): CAST */
    unsigned offload;             /* bits 1 << llmpar_state: kept in a store between uses */
    llmpar_update_when update;    /* INSIDE (LOMO): each unit right after its reduction, so that no gradient outlives its unit; TWO_PASSES: the same after a first forward and backward for the norm alone. Both with one micro-batch */
    int32_t host_update;          /* 1: OPTIM runs on the host (ZeRO-Offload, Ren et al. 2021, without its delayed update): optimizer, parameters and gradients must be offloaded, to host memory */
} llmpar_policy;

/* Derived. Local. */
LLMPAR_API int llmpar_policy_whole_params(const llmpar_policy *policy); /* parameters are whole at rest: one shard, or ZeRO-0, 1, 2 */
LLMPAR_API int llmpar_policy_whole_grads(const llmpar_policy *policy);  /* gradients are reduced in place: one shard, or ZeRO-0, 1 */
LLMPAR_API int llmpar_policy_whole_state(const llmpar_policy *policy);  /* every rank updates everything: one shard, or ZeRO-0 */
/* The first unit that has a BACKWARD: the first that is not frozen or that borrows from one that is not; unit_count: none (all frozen). Local. */
LLMPAR_API int32_t llmpar_schedule_first_backward(const llmpar_unit *units, int32_t unit_count);

typedef struct llmpar_schedule {
    llmpar_instruction *list;     /* owned */
    int32_t count, capacity, units;
    llmpar_policy policy;
    llmpar_heap *heap;            /* borrowed */
} llmpar_schedule;

/* Pure: depends on the units' number, borrow, recompute and frozen fields and the policy alone. LLMPAR_ERR_ARGUMENT for a policy out of range, and for a pair that excludes each other, with the reason. Owned by the caller. Local. */
LLMPAR_API llmpar_status llmpar_schedule_create(llmpar_heap *heap, const llmpar_unit *units, int32_t unit_count, const llmpar_policy *policy, llmpar_schedule **out, llmpar_error *error);
LLMPAR_API void llmpar_schedule_destroy(llmpar_schedule *schedule); /* NULL is fine */
/* One instruction a line: index, stream, op, operands, bytes, waits; a unit's own instructions once, where it first runs. bytes[count]: what each instruction moves or takes (llmpar_fsdp_bytes), NULL: not printed.
   Returns bytes of text needed without the NUL. Local. */
LLMPAR_API size_t llmpar_schedule_print(const llmpar_schedule *schedule, const llmpar_unit *units, const uint64_t *bytes, char *text, size_t capacity);
LLMPAR_API const char *llmpar_op_name(llmpar_op op);

/* Proves a list, whoever wrote it: operands in range; waits point back, so streams cannot deadlock; nothing is used before it is gathered, fetched, saved or computed again, or after it is freed or stored; every buffer that is
   read was written and every one written is consumed; every unit runs forward before backward; each (unit, use, micro-batch) gradient reaches exactly one OPTIM through exactly one reduction, added in the policy's order (docs/exact.md),
   a frozen unit's none; CAST and the gather of whole parameters follow the update, nothing else does; at the end everything that is offloaded is in its store; what another stream wrote or still reads is waited for.
   LLMPAR_ERR_SCHEDULE names the instruction and the reason; LLMPAR_ERR_ARGUMENT as llmpar_schedule_create. heap: scratch. Local. */
LLMPAR_API llmpar_status llmpar_schedule_validate(llmpar_heap *heap, const llmpar_instruction *list, int32_t count, const llmpar_unit *units, int32_t unit_count, const llmpar_policy *policy, llmpar_error *error);

#endif
