/* fsdp_internal: the state that flat.c lays out, shard.c looks at and the executor's files run over. */
#ifndef LLMPAR_FSDP_INTERNAL_H
#define LLMPAR_FSDP_INTERNAL_H

#include "fsdp/fsdp.h"
#include "fsdp/store_internal.h"
#include "base/exact_sum.h"
#include "tables/tables_internal.h"

#define LLMPAR__UNIT_EVENTS 160 /* instructions in a unit's forward or backward */
#define LLMPAR__FREE_EVENTS 32u /* releases of a stream that are told apart */
#define LLMPAR__CAST_BUFFERS 2
#define LLMPAR__CAST_PIECE ((int64_t)1 << 20) /* elements */

/* Where a unit's numbers are (Psi elements, N = dp_shard ranks):

              shard (compute dtype)   gradients (sum type)             master, optimizer state (sum type)
     ZeRO-3   Psi/N, gathered         whole, then reduced into Psi/N   Psi/N
     ZeRO-2   whole                   whole, then reduced into Psi/N   Psi/N
     ZeRO-1   whole                   whole, reduced in place          Psi/N
     ZeRO-0   whole                   whole                            whole

   `begin` is where this rank's part lies in a whole buffer; 0 in ZeRO-0. */
typedef struct llmpar__flat {
    llmpar_unit unit;                 /* name and params are copies owned here */
    int64_t elements;                 /* of the whole flat buffer, padding included */
    int64_t shard_elements;           /* of this rank's part of the optimizer state */
    int64_t begin;
    int64_t *layout;                  /* [tp][param_count + 1]: `offset` of each */
    int64_t *offset;                  /* [param_count] in the flat buffer; [param_count] = end of the last parameter */
    int64_t *count;                   /* [param_count] tp-local elements */
    llmpar_segment *segments;
    int32_t segment_count;
    int32_t gathers;                  /* unshard() calls and GATHER not yet undone */
    int32_t held, held_state;         /* fetched or copied by hand */
    void *shard;                      /* parameters; PARAMETERS. NULL while offloaded */
    void *gathered;                   /* whole flat buffer, or NULL; GATHERED. == shard where parameters are whole */
    void *master;                     /* OPTIMIZER; NULL where there is none or while offloaded */
    void *state[LLMPAR_OPTIMIZER_STATES]; /* OPTIMIZER */
    void **params;                    /* [param_count] into gathered */
    void **grads;                     /* [2][param_count] scratch for unit calls */
    void *grad[2][2][LLMPAR_GRAD_SLOTS]; /* [use][local][slot]; GRADIENTS */
    uint32_t reduced[2];              /* [use] bit slot: reduced in place, only this rank's part counts */
    uint32_t grad_stored;             /* bit slot of use 0: in the store */
    void **output, **saved, **dinput; /* [micro_batches] during a run; ACTIVATIONS */
    const llmpar_micro *sized;        /* during a run: .. */
    llmpar_unit_sizes sizes;          /* .. is of these; NULL: none yet */
    llmpar__place params_place, state_place[LLMPAR_OPTIMIZER_STATES], grad_place[2][LLMPAR_GRAD_SLOTS];
    llmpar__place *activation_place;  /* [activation_count][2]: saved, input */
    int32_t activation_count;
    char *label[7];                   /* names of its buffers and collectives for messages */
} llmpar__flat;
enum { LLMPAR__LABEL_SHARD, LLMPAR__LABEL_GATHER, LLMPAR__LABEL_GRADIENT, LLMPAR__LABEL_REDUCE, LLMPAR__LABEL_REPLICA, LLMPAR__LABEL_ACTIVATIONS, LLMPAR__LABEL_OPTIMIZER, LLMPAR__LABEL_COUNT };

struct llmpar_fsdp {
    llmpar_ctx *ctx;
    llmpar_mesh *mesh;
    llmpar_device *device;
    llmpar_arena *arena;
    llmpar_trace *trace;              /* borrowed; NULL: none */
    llmpar_dtype dtype, sum, reduce;  /* compute dtype; its sum type; what gradients travel in */
    llmpar_policy policy;             /* zero, shards, replicas, master, offload */
    int32_t whole_params, whole_grads, whole_state;
    int32_t replicas;
    llmpar_comm *shard_comm;          /* dp_shard; NULL where everything is whole */
    llmpar_comm *replica_comm;        /* dp_replicate, or all of dp where everything is whole */
    llmpar_comm *reduce_comm;         /* the same ranks as shard_comm: two threads never call one communicator */
    int32_t own_comms;                /* 1: with overlap: split off here, of this object alone */
    int32_t first_backward;           /* llmpar_schedule_first_backward */
    int32_t count_only;
    int32_t graphs;                   /* 1: FORWARD, RECOMPUTE, BACKWARD are regions of the device */
    int32_t counts;                   /* 1: this rank's shards count in norms (replica coordinate 0) */
    int32_t optimizer_states;
    llmpar_tier tier[LLMPAR_STATE_COUNT];
    llmpar__store *store;             /* NULL: nothing is offloaded */
    uint64_t seed;
    llmpar__flat *units;
    int32_t unit_count;
    const char *borrower;             /* who has the gathered parameters; NULL: nobody */
    llmpar_stream *stream[LLMPAR_STREAM_COUNT];
    llmpar_event **event;             /* by instruction index, NULL until needed */
    int32_t event_count;
    llmpar_event *unit_event[LLMPAR__UNIT_EVENTS + 1];
    llmpar_event *free_event[LLMPAR_STREAM_COUNT][LLMPAR__FREE_EVENTS]; /* release number n of a stream is behind event n modulo this or a later one */
    uint64_t free_serial[LLMPAR_STREAM_COUNT], free_seen[LLMPAR_STREAM_COUNT][LLMPAR_STREAM_COUNT];
    const void **parts;               /* [ranks] of a sum in another dtype */
    int64_t *scalars;                 /* device: loss limbs, square limbs, loss limbs of a second forward */
    void *host_cast[LLMPAR__CAST_BUFFERS]; /* host_update below f32: [LLMPAR__CAST_PIECE] in the compute dtype, on their way to the device */
    llmpar_event *host_cast_event[LLMPAR__CAST_BUFFERS]; /* behind the last copy from each */
    int32_t host_cast_turn;           /* the one to fill next */
    int64_t *host_scalars;            /* [LLMPAR__SCALARS]: what is copied there and back; read and written behind a wait only */
};
#define LLMPAR__SCALARS (2 * LLMPAR_EXACT_SUM_LIMBS)

/* One buffer that an instruction moves between arena and store. */
typedef struct llmpar__moved {
    void **memory;
    llmpar_tag tag;
    const char *label;
    llmpar__place *place;
} llmpar__moved;

/* One run of a list. */
typedef struct llmpar__exec {
    llmpar_fsdp *fsdp;
    llmpar_run *run;
    llmpar_micro *micro;       /* [2][micro_batches] with grad_scale and loss filled in; the second half for a second forward */
    int32_t micro_batches;
    int32_t inside;            /* updates come before the norm is known */
    int32_t updating;          /* the first OPTIM has been reached */
    int32_t found_inf;
    const llmpar_instruction *now;
    double grad_scale;         /* from the optimizer */
    int64_t nonfinite;         /* index of the first non-finite tensor */
} llmpar__exec;

/* shard.c: memory in stream order. A block that another stream released is waited for. Freeing NULL is fine. */
LLMPAR__PRIVATE llmpar_status llmpar__fsdp_alloc(llmpar_fsdp *fsdp, llmpar_stream_id stream, llmpar_tag tag, size_t bytes, const char *label, void **out);
LLMPAR__PRIVATE llmpar_status llmpar__fsdp_free(llmpar_fsdp *fsdp, llmpar_stream_id stream, void **memory);
/* Allocates and enqueues the all-gather of a unit; where parameters are whole, in place. */
LLMPAR__PRIVATE llmpar_status llmpar__fsdp_gather(llmpar_fsdp *fsdp, llmpar__flat *flat, llmpar_stream_id stream);
LLMPAR__PRIVATE llmpar_status llmpar__fsdp_release(llmpar_fsdp *fsdp, llmpar__flat *flat, llmpar_stream_id stream);
LLMPAR__PRIVATE llmpar_status llmpar__fsdp_not_lent(const llmpar_fsdp *fsdp); /* an error where the parameters are lent */
/* This rank's part of the parameters in the compute dtype, NULL while it is offloaded. */
LLMPAR__PRIVATE void *llmpar__fsdp_own_part(const llmpar_fsdp *fsdp, const llmpar__flat *flat);
/* The compute dtype's copy from the master. */
LLMPAR__PRIVATE llmpar_status llmpar__fsdp_cast(llmpar_fsdp *fsdp, llmpar__flat *flat, llmpar_stream *stream);
/* This rank's part of the parameters that the optimizer works on, NULL while it is offloaded. */
LLMPAR__PRIVATE void *llmpar__fsdp_updated(const llmpar_fsdp *fsdp, const llmpar__flat *flat);
LLMPAR__PRIVATE size_t llmpar__fsdp_shard_bytes(const llmpar_fsdp *fsdp, const llmpar__flat *flat); /* of flat->shard */
LLMPAR__PRIVATE int llmpar__fsdp_has_master(const llmpar_fsdp *fsdp, const llmpar__flat *flat);
/* The buffers of a state: at most 2 (LLMPAR_OPTIMIZER_STATES); their number. */
LLMPAR__PRIVATE int32_t llmpar__fsdp_moved(llmpar_fsdp *fsdp, int32_t unit, llmpar_state what, int32_t use, int32_t slot, int32_t micro_batch, llmpar__moved out[2]);
LLMPAR__PRIVATE llmpar_status llmpar__fsdp_fetch(llmpar_fsdp *fsdp, llmpar_stream_id stream, const llmpar__moved *moved);
/* write: the store gets it before the memory goes. */
LLMPAR__PRIVATE llmpar_status llmpar__fsdp_put(llmpar_fsdp *fsdp, llmpar_stream_id stream, const llmpar__moved *moved, int write);
/* Index of the first tensor over the world with a non-finite element: unit * 65536 + param for parameters, + 2^40 for the gradients in buffer 0; -1: none. Collective. */
LLMPAR__PRIVATE llmpar_status llmpar__fsdp_first_nonfinite(llmpar_fsdp *fsdp, int64_t *index);

/* account.c: what a unit needs for a micro-batch of this shape; does its RECOMPUTE leave its output out? */
LLMPAR__PRIVATE llmpar_status llmpar__fsdp_unit_sizes(const llmpar_fsdp *fsdp, int32_t unit, const llmpar_micro *micro, llmpar_unit_sizes *out);
LLMPAR__PRIVATE int llmpar__fsdp_leaves_output(const llmpar_unit *unit);
/* executor_unit.c: FORWARD and RECOMPUTE; BACKWARD. */
LLMPAR__PRIVATE llmpar_status llmpar__exec_forward(llmpar__exec *exec, const llmpar_instruction *in);
LLMPAR__PRIVATE llmpar_status llmpar__exec_backward(llmpar__exec *exec, const llmpar_instruction *in);
LLMPAR__PRIVATE llmpar_status llmpar__exec_sizes(llmpar__exec *exec, int32_t unit, int32_t m, llmpar_unit_sizes *out);
/* executor_shard.c: what happens to gradients, states and parameters. */
LLMPAR__PRIVATE llmpar_status llmpar__exec_shard(llmpar__exec *exec, const llmpar_instruction *in);
/* Rooms in the store for what this list keeps there and has no room yet. */
LLMPAR__PRIVATE llmpar_status llmpar__exec_places(llmpar__exec *exec, const llmpar_instruction *list, int32_t count);

#endif
