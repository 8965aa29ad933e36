/* fsdp_internal: the state that flat.c lays out and executor.c runs over. */
#ifndef LLMPAR_FSDP_INTERNAL_H
#define LLMPAR_FSDP_INTERNAL_H

#include "fsdp/fsdp.h"
#include "base/exact_sum.h"

#define LLMPAR__UNIT_EVENTS 64 /* instructions in a unit's forward or backward */

typedef struct llmpar__flat {
    llmpar_unit unit;                 /* name and params are copies owned here */
    int64_t elements;                 /* of the whole flat buffer, padding included */
    int64_t shard_elements;
    int64_t *offset;                  /* [param_count] in the flat buffer; [param_count] = end of the last parameter */
    int64_t *count;                   /* [param_count] tp-local elements */
    llmpar_segment *segments;
    int32_t segment_count;
    int32_t gathers;                  /* unshard() calls and GATHER not yet undone */
    void *shard;                      /* parameters; PARAMETERS */
    void *state[LLMPAR_OPTIMIZER_STATES]; /* of the optimizer, shard-sized; OPTIMIZER; NULL for a frozen unit */
    void *gathered;                   /* whole flat buffer, or NULL; GATHERED. == shard where unsharded */
    void **params;                    /* [param_count] into gathered */
    void **grads;                     /* [2][param_count] scratch for unit calls */
    void *grad[2][2][LLMPAR_GRAD_SLOTS]; /* [use][local][slot]; GRADIENTS */
    void **output, **saved, **dinput; /* [micro_batches] during a run; ACTIVATIONS */
    char *label[6];                   /* names of its buffers and collectives for messages */
} llmpar__flat;
enum { LLMPAR__LABEL_SHARD, LLMPAR__LABEL_GATHER, LLMPAR__LABEL_GRADIENT, LLMPAR__LABEL_REDUCE, LLMPAR__LABEL_REPLICA, LLMPAR__LABEL_ACTIVATIONS };

struct llmpar_fsdp {
    llmpar_ctx *ctx;
    llmpar_mesh *mesh;
    llmpar_device *device;
    llmpar_arena *arena;
    llmpar_dtype dtype;
    int32_t optimizer_states;
    int32_t unsharded, replicas;
    llmpar_comm *shard_comm;          /* dp_shard; one rank where unsharded */
    llmpar_comm *replica_comm;        /* dp_replicate, or all of dp where unsharded */
    int32_t counts;                   /* 1: this rank's shards count in norms (replica coordinate 0) */
    uint64_t seed;
    llmpar__flat *units;
    int32_t unit_count;
    llmpar_stream *stream[LLMPAR_STREAM_COUNT];
    llmpar_event **event;             /* by instruction index, NULL until needed */
    int32_t event_count;
    llmpar_event *unit_event[LLMPAR__UNIT_EVENTS + 1];
    llmpar_event *free_event[LLMPAR_STREAM_COUNT]; /* behind the last release on each stream */
    uint64_t free_serial[LLMPAR_STREAM_COUNT], free_seen[LLMPAR_STREAM_COUNT][LLMPAR_STREAM_COUNT];
    int64_t *scalars;                 /* device: loss limbs, then square limbs */
};
#define LLMPAR__SCALARS (2 * LLMPAR_EXACT_SUM_LIMBS)

/* Allocates and enqueues the all-gather of a unit on `stream`. */
LLMPAR__PRIVATE llmpar_status llmpar__fsdp_gather(llmpar_fsdp *fsdp, llmpar__flat *flat, llmpar_stream *stream);
LLMPAR__PRIVATE void llmpar__fsdp_release(llmpar_fsdp *fsdp, llmpar__flat *flat);
/* Index of the first tensor over the world with a non-finite element: unit * 65536 + param for parameters, + 2^40 for the gradients in buffer 0; -1: none. Collective. */
LLMPAR__PRIVATE llmpar_status llmpar__fsdp_first_nonfinite(llmpar_fsdp *fsdp, int64_t *index);

#endif
