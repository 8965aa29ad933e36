/* record: what a collective is, said the same way by every rank and every transport: a fingerprint to compare before data moves, a text to report, and a ring of each
   rank's last collectives (all of its communicators) that can be dumped as JSON with the field names of PyTorch's Flight Recorder.

   The wrappers of comm.h describe each call (comm->call), enter it in the record and mark it, on its stream, as started and as completed. A communicator
   attaches itself to its rank's record, compares fingerprints when its ranks meet, and reports with the functions below. One rank alone is not recorded: it waits for nobody. */
#ifndef LLMPAR_RECORD_H
#define LLMPAR_RECORD_H

#include "base/heap.h"
#include "tables/comm.h"

#define LLMPAR_RECORD_ENTRIES 256

typedef enum llmpar_call_op {
    LLMPAR_CALL_NONE = 0,
    LLMPAR_CALL_BARRIER,
    LLMPAR_CALL_ALL_GATHER,
    LLMPAR_CALL_REDUCE_SCATTER,
    LLMPAR_CALL_ALL_REDUCE,
    LLMPAR_CALL_BROADCAST,
    LLMPAR_CALL_ALL_TO_ALL,
    LLMPAR_CALL_SEND,
    LLMPAR_CALL_RECV,
    LLMPAR_CALL_SPLIT
} llmpar_call_op;

/* One rank's side of one collective. No pointers and no gaps: ranks of one build may send it as bytes. Unused fields and the ends of texts are zero. */
typedef struct llmpar_call {
    uint64_t count, blocks;      /* as in llmpar_collective, blocks >= 1; both 0 for barrier and split */
    uint64_t number;             /* 1, 2, ..: of the collectives on this communicator, alike on its ranks; of send and recv: of this rank's messages there; 0 without a record */
    uint64_t tag_bits;           /* of the whole tag */
    int32_t op, dtype, reduce;   /* llmpar_call_op, llmpar_dtype, llmpar_reduce_op */
    int32_t root, peer;          /* as in llmpar_collective */
    int32_t member, members;     /* this rank's index in the communicator, and their number */
    int32_t rank;                /* this rank in the world; -1 without a record */
    char axis[24], where[48];    /* of the communicator; of the rank: "dp_shard=1 tp=0" */
    char tag[64];                /* cut */
} llmpar_call;

/* Where a rank is. Plain data like llmpar_call. */
typedef enum llmpar_position_state { LLMPAR_POSITION_OUTSIDE = 0, LLMPAR_POSITION_INSIDE, LLMPAR_POSITION_RETURNED, LLMPAR_POSITION_UNKNOWN } llmpar_position_state;
typedef struct llmpar_position {
    int32_t rank, state;         /* of the world; llmpar_position_state */
    uint64_t time_ns;            /* when its record last changed, since 1970; 0: never */
    char where[48];
    llmpar_call now, last;       /* the collective it is in, and the last one it completed; op NONE: none */
} llmpar_position;
typedef void (*llmpar_position_fn)(void *user, int32_t rank, llmpar_position *out);

typedef struct llmpar_record llmpar_record; /* one rank's; written by its thread, read by any (a short lock) */

/* "all_gather" and so on. */
LLMPAR_API const char *llmpar_call_op_name(llmpar_call_op op);
/* For slots: what this one is asked for. Its arguments, with number and rank of the call that the wrapper shows in comm->call: a slot may be called by another slot, with arguments of its own. Local. */
LLMPAR_API void llmpar_call_describe(const llmpar_comm *comm, llmpar_call_op op, const llmpar_collective *call, llmpar_call *out);
/* Equal if and only if (up to chance) the calls belong together: op, dtype, count, blocks, root, reduce, axis, tag, number; of a message both ends instead of op, peer and number. Local. */
LLMPAR_API uint64_t llmpar_call_fingerprint(const llmpar_call *call);
/* `all_reduce sum f32[2 x 100] "layers.1/x" (call 17 on tp)`. Cut at capacity; returns the bytes needed without the NUL, as all printing functions here. Local. */
LLMPAR_API size_t llmpar_call_print(const llmpar_call *call, char *text, size_t capacity);
/* `the ranks of tp disagree in op and count: rank 0 (tp=0): all_gather ..; rank 1 (tp=1): reduce_scatter ..`. Both sides say the same when both pass (lower rank, higher rank). Local. */
LLMPAR_API size_t llmpar_call_mismatch(const llmpar_call *a, const llmpar_call *b, char *text, size_t capacity);
/* `rank 1 (tp=1): outside, last completed ..; ranks 0 2: in all_reduce .., last completed ..`: every rank once, ranks of equal state together, who is in no collective first. Local. */
LLMPAR_API size_t llmpar_position_print(llmpar_position_fn get, void *user, int32_t ranks, char *text, size_t capacity);

/* timeout_ms: the deadline, for the dump; 0 none. The rank's heap; LLMPAR_ERR_MEMORY. Local, as all of these. */
LLMPAR_API llmpar_status llmpar_record_create(llmpar_heap *heap, int32_t rank, uint64_t timeout_ms, llmpar_record **out);
LLMPAR_API void llmpar_record_destroy(llmpar_record *record); /* after the communicators attached to it */
/* From now on the wrappers enter comm's calls. world_rank[comm->ranks] (copied): its members. Communicators of equal axis and members are one group with one count of calls. LLMPAR_ERR_MEMORY. */
LLMPAR_API llmpar_status llmpar_record_attach(llmpar_record *record, llmpar_comm *comm, const int32_t *world_rank);
/* For the wrappers: enters *call (sets number and rank), state "scheduled"; returns its id for the marks. group: comm->group. */
LLMPAR_API uint64_t llmpar_record_begin(llmpar_record *record, int32_t group, llmpar_call *call);
LLMPAR_API void llmpar_record_started(llmpar_record *record, uint64_t id);
LLMPAR_API void llmpar_record_completed(llmpar_record *record, uint64_t id);
/* From any thread. Never LLMPAR_POSITION_RETURNED: that the communicator knows. */
LLMPAR_API void llmpar_record_position(llmpar_record *record, llmpar_position *out);
/* The dump: version, pg_config, pg_status, entries (oldest first; the tag stands in `frames`), and this rank with its mesh coordinate. From any thread. */
LLMPAR_API size_t llmpar_record_json(llmpar_record *record, char *text, size_t capacity);

#endif
