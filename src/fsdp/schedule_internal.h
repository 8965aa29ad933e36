/* schedule_internal: what every instruction reads and writes, and which instructions are complete before it starts. The generator places waits with it, the validator proves them with it. */
#ifndef LLMPAR_SCHEDULE_INTERNAL_H
#define LLMPAR_SCHEDULE_INTERNAL_H

#include "fsdp/schedule.h"

/* Things that instructions share. SHARD: the shard in the compute dtype, or the whole parameters where they are whole at rest; WHOLE: gathered parameters; MASTER, STATE: on the device; STORED_*: the copy in a store. */
typedef enum llmpar__thing {
    LLMPAR__THING_LOSS, LLMPAR__THING_NORMS, LLMPAR__THING_SHARD, LLMPAR__THING_WHOLE, LLMPAR__THING_MASTER, LLMPAR__THING_STATE, LLMPAR__THING_STORED_PARAMS, LLMPAR__THING_STORED_STATE,
    LLMPAR__THING_GRADIENT, LLMPAR__THING_STORED_GRADIENT, LLMPAR__THING_SAVED, LLMPAR__THING_INPUT, LLMPAR__THING_STORED_ACTIVATIONS
} llmpar__thing;
/* FRESH: writes memory of its own. That memory may be another's freed one is the executor's concern, so nothing before matters. A release is a write. */
typedef enum llmpar__access_kind { LLMPAR__ACCESS_READ, LLMPAR__ACCESS_WRITE, LLMPAR__ACCESS_FRESH } llmpar__access_kind;
typedef struct llmpar__access { llmpar__thing thing; llmpar__access_kind kind; size_t track; } llmpar__access;
#define LLMPAR__ACCESSES 8

typedef struct llmpar__track { int32_t writer, reader[LLMPAR_STREAM_COUNT]; } llmpar__track; /* last instructions, -1; readers since the writer */

typedef struct llmpar__order {
    const llmpar_instruction *list;      /* borrowed, as units */
    const llmpar_unit *units;
    int32_t unit_count, micro_batches;
    int whole_params, whole_grads, master, host_update;
    int32_t (*clock)[LLMPAR_STREAM_COUNT]; /* owned: [count] last instruction of each stream that is complete before this one starts */
    int32_t last[LLMPAR_STREAM_COUNT], host[LLMPAR_STREAM_COUNT];
    llmpar__track *track;                /* owned */
    llmpar_heap *heap;
} llmpar__order;

/* An access without an order: `earlier` must be complete before and is not. */
typedef struct llmpar__hazard { int32_t earlier; llmpar__access access; int earlier_wrote; } llmpar__hazard;

/* The policy's zeroes are resolved. LLMPAR_ERR_MEMORY without a text. */
LLMPAR__PRIVATE llmpar_status llmpar__order_create(llmpar__order *order, llmpar_heap *heap, const llmpar_instruction *list, int32_t count, const llmpar_unit *units, int32_t unit_count, const llmpar_policy *policy);
LLMPAR__PRIVATE void llmpar__order_destroy(llmpar__order *order);
/* Instruction by instruction in list order: begin, any number of hazard (the latest instruction that is not waited for; 0: none) and wait, end. Operands must be in range. */
LLMPAR__PRIVATE void llmpar__order_begin(llmpar__order *order, int32_t at);
LLMPAR__PRIVATE int llmpar__order_hazard(const llmpar__order *order, int32_t at, llmpar__hazard *out);
LLMPAR__PRIVATE void llmpar__order_wait(llmpar__order *order, int32_t at, int32_t earlier);
LLMPAR__PRIVATE void llmpar__order_end(llmpar__order *order, int32_t at);
/* Zeroes of a policy become their defaults. */
LLMPAR__PRIVATE void llmpar__policy_resolve(llmpar_policy *policy);
/* Units and resolved policy are in range and do not exclude each other: LLMPAR_ERR_ARGUMENT with the reason. */
LLMPAR__PRIVATE llmpar_status llmpar__policy_check(const llmpar_unit *units, int32_t unit_count, const llmpar_policy *policy, llmpar_error *error);

#endif
