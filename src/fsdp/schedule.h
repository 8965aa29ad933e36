/* schedule: what a step does, as data. A pure function turns (units, policy) into a list of instructions; validate.h proves it; the executor runs it. */
#ifndef LLMPAR_SCHEDULE_H
#define LLMPAR_SCHEDULE_H

#include "base/heap.h"
#include "fsdp/unit.h"

/* GATHER u            whole parameters of unit u from the shards (all-gather over dp_shard)
   FREE u              the gathered parameters, or gradient buffer `slot` where slot >= 0
   FORWARD u m         unit u on micro-batch m
   BACKWARD u m        its gradients into buffer `slot`, and for a borrowed unit into buffer `from` of that unit's use 1 (local buffers; shard buffers where parameters are unsharded)
   REDUCE u            local buffer `from` -> shard buffer `slot` (reduce-scatter over dp_shard); use: 0 own, 1 borrowed
   REDUCE_REPLICA u    shard buffer `slot` summed over dp_replicate (all of dp in ZeRO-0)
   ACCUMULATE u        buffer slot <- slot + from; from is released. `local`: local buffers, else shards; from_use: the use `from` belongs to
   NORM u              exact square sum of shard buffer `slot`
   SCALAR_REDUCE       pass 0: counted tokens of the step; pass 1: loss and norm over the world, then the host decides found_inf
   OPTIM u             update from shard buffer `slot`, which is released; only if found_inf == 0 */
typedef enum llmpar_op { LLMPAR_OP_GATHER = 1, LLMPAR_OP_FREE, LLMPAR_OP_FORWARD, LLMPAR_OP_BACKWARD, LLMPAR_OP_REDUCE, LLMPAR_OP_REDUCE_REPLICA, LLMPAR_OP_ACCUMULATE, LLMPAR_OP_NORM, LLMPAR_OP_SCALAR_REDUCE, LLMPAR_OP_OPTIM } llmpar_op;
typedef enum llmpar_stream_id { LLMPAR_STREAM_COMPUTE = 0, LLMPAR_STREAM_GATHER = 1, LLMPAR_STREAM_REDUCE = 2, LLMPAR_STREAM_TP = 3, LLMPAR_STREAM_COUNT = 4 } llmpar_stream_id;
typedef enum llmpar_predicate { LLMPAR_ALWAYS = 0, LLMPAR_IF_FINITE = 1 } llmpar_predicate; /* IF_FINITE: found_inf == 0 */

#define LLMPAR_WAITS 4
#define LLMPAR_GRAD_SLOTS 24 /* log2(micro-batches) + 2 at most */

typedef struct llmpar_instruction {
    llmpar_op op;
    int32_t unit, micro_batch;       /* -1 where it does not apply */
    int32_t pass;                    /* llmpar_pass for FORWARD; 0/1 for SCALAR_REDUCE */
    int32_t use;                     /* 0: the unit's own gradient; 1: gradient of the unit from the unit that borrows it */
    int32_t slot, from, from_use;    /* gradient buffers; -1 none */
    int32_t local;                   /* FREE, ACCUMULATE: the slots are local (whole) gradients, else shards */
    llmpar_stream_id stream;
    llmpar_predicate predicate;
    int32_t wait_count, waits[LLMPAR_WAITS]; /* indices of earlier instructions on other streams that must be complete */
} llmpar_instruction;

/* What a schedule is made from. Zero is the default everywhere. */
typedef struct llmpar_policy {
    int32_t micro_batches;        /* default 1; a power of two for equal bits */
    int32_t no_sync;              /* 0: reduce every micro-batch; 1: keep local gradients, reduce after the last */
    int32_t prefetch;             /* units gathered ahead of their use; default 0 */
    int32_t unsharded;            /* 1: parameters are whole on every rank (ZeRO-0, or dp_shard = 1): no GATHER, no FREE */
    int32_t replicas;             /* ranks that hold the same shard; default 1: no REDUCE_REPLICA */
    int32_t keep_after_forward;   /* 1: parameters stay gathered from first to last use of the step */
    int32_t forward_only;         /* 1: evaluation */
} llmpar_policy;

typedef struct llmpar_schedule {
    llmpar_instruction *list;     /* owned */
    int32_t count, capacity, units;
    llmpar_policy policy;
    llmpar_heap *heap;            /* borrowed */
} llmpar_schedule;

/* Pure: depends on units' borrow fields, their number and the policy alone. LLMPAR_ERR_ARGUMENT for a policy out of range. Owned by the caller. Local. */
LLMPAR_API llmpar_status llmpar_schedule_create(llmpar_heap *heap, const llmpar_unit *units, int32_t unit_count, const llmpar_policy *policy, llmpar_schedule **out, llmpar_error *error);
LLMPAR_API void llmpar_schedule_destroy(llmpar_schedule *schedule); /* NULL is fine */
/* One instruction a line: index, stream, op, operands, waits; a unit's own instructions once, where it first runs. Returns bytes needed without the NUL. Local. */
LLMPAR_API size_t llmpar_schedule_print(const llmpar_schedule *schedule, const llmpar_unit *units, char *text, size_t capacity);
LLMPAR_API const char *llmpar_op_name(llmpar_op op);

/* Proves a list, whoever wrote it: operands in range; waits point back; nothing is used before it is gathered or after it is freed; every buffer that is read was written and every one written is consumed; every
   unit runs forward before backward, each (unit, use, micro-batch) gradient reaches exactly one OPTIM through exactly one REDUCE; what another stream wrote or still reads is waited for.
   LLMPAR_ERR_SCHEDULE names the instruction and the reason. heap: scratch. Local. */
LLMPAR_API llmpar_status llmpar_schedule_validate(llmpar_heap *heap, const llmpar_instruction *list, int32_t count, const llmpar_unit *units, int32_t unit_count, const llmpar_policy *policy, llmpar_error *error);

#endif
