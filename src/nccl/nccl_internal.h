/* nccl_internal: what the files of the NCCL communicator share: socket.c (addresses, TCP), meet.c (how the ranks come together), control.c (messages between them), hub.c (what rank 0 does for all),
   watch.c (the helper thread; failures), memory.c (registered memory), collectives.c, world.c (communicators). */
#ifndef LLMPAR_NCCL_INTERNAL_H
#define LLMPAR_NCCL_INTERNAL_H

#include <nccl.h>
#include <poll.h>
#include <pthread.h>

#if NCCL_VERSION_CODE < 22000
#error "llmpar_nccl.h: needs NCCL 2.20 or later"
#endif

#define LLMPAR__NCCL_MAGIC "llmparN1"
#define LLMPAR__NCCL_WORD 0x4c4c4e31u   /* begins every message: a stream out of step is noticed */
#define LLMPAR__NCCL_WHO 1100
#define LLMPAR__NCCL_LEAST 22000        /* NCCL 2.20 */
#define LLMPAR__NCCL_OUT ((size_t)65536) /* bytes that wait to be sent, at most */

/* ---- the wire: plain bytes between ranks of one build (the hello says so) ---- */

typedef struct llmpar__nccl_hello {
    char magic[8];
    uint32_t bytes, version;             /* sizeof(llmpar__nccl_hello), LLMPAR_VERSION_NUMBER */
    uint64_t key;                        /* of the meeting: who does not know it is a stranger */
    uint64_t slice;
    int64_t pid;
    int32_t world, rank, nccl, fast, unchecked, one_device;
    char device[128], place[32], host[64], boot[40]; /* boot: of the machine since it was started; machines may have one name */
    llmpar_error error;                  /* a rank that cannot take part says why */
} llmpar__nccl_hello;

/* The answer to a hello; `key` again. */
typedef struct llmpar__nccl_accept { char magic[8]; uint64_t key; } llmpar__nccl_accept;

/* When all have come. */
typedef struct llmpar__nccl_welcome {
    llmpar_error error;
    int64_t pid;
    char host[64];
    ncclUniqueId id;
} llmpar__nccl_welcome;

typedef enum llmpar__nccl_kind {
    LLMPAR__NCCL_BEAT = 1, /* position: both ways, a sign of life */
    /* to rank 0 */
    LLMPAR__NCCL_CALL,     /* compare this call with the others' */
    LLMPAR__NCCL_SPLIT,    /* the same, with a place; answered by GROUP */
    LLMPAR__NCCL_DROP,     /* the communicator is destroyed here */
    LLMPAR__NCCL_FAIL,     /* this rank has failed */
    LLMPAR__NCCL_TOLD,     /* where this rank was when it heard of the failure */
    LLMPAR__NCCL_FINISH,   /* this rank's function has returned */
    /* from rank 0 */
    LLMPAR__NCCL_GROUP,    /* and ranks x int32_t */
    LLMPAR__NCCL_FAILED,   /* the job's failure */
    LLMPAR__NCCL_WHERE,    /* the failure again, with who was where */
    LLMPAR__NCCL_DONE,     /* all have finished, or will not */
    LLMPAR__NCCL_BYE       /* both ways: the last message */
} llmpar__nccl_kind;

typedef struct llmpar__nccl_head { uint32_t word, kind; uint64_t bytes; } llmpar__nccl_head;

typedef struct llmpar__nccl_ask {
    uint64_t context, index;   /* of a communicator; its index-th collective there, or index-th message of the pair */
    uint64_t fingerprint;
    int32_t from, to;          /* of a message; -1: a collective */
    int32_t color, key;        /* of a split */
    llmpar_call call;
} llmpar__nccl_ask;

typedef struct llmpar__nccl_group { uint64_t context; int32_t ranks, rank, several, reserved; } llmpar__nccl_group; /* several: somebody's group has more ranks than one */

typedef struct llmpar__nccl_verdict {
    llmpar_error error;
    int32_t other;             /* a second rank that reports the failure as its own; -1 */
    char who[LLMPAR__NCCL_WHO];
} llmpar__nccl_verdict;

/* ---- one rank's view ---- */

/* A connection. Its buffers are of the rank's heap and do not grow. */
typedef struct llmpar__nccl_link {
    int fd;                    /* -1: none */
    unsigned char *in, *out;
    size_t in_room, in_used, out_room, out_used;
    int ready;                 /* the last wait has found something on it: to read, or its end */
} llmpar__nccl_link;

/* What rank 0 knows of a rank; the others know rank 0 alone, as peer[0]. */
typedef struct llmpar__nccl_peer {
    llmpar__nccl_link link;
    llmpar_position position;
    int64_t pid;
    char host[64];
    double silent;             /* seconds of this rank's own attention without a sign of life */
    int32_t there, finished, bye, dead, told;
    int32_t slots;             /* of calls that it came to first, and not all have come to */
} llmpar__nccl_peer;

/* A call that some members of a communicator have not come to yet. Rank 0's. */
typedef struct llmpar__nccl_slot {
    llmpar__nccl_ask first;    /* of who came first */
    int32_t first_rank, arrived, expected, next; /* next: of the free ones, or of this communicator's; -1: none */
    double since;
    struct llmpar__nccl_context *context;
    unsigned char *here;       /* a bit a member */
} llmpar__nccl_slot;

/* A communicator as rank 0 knows it; of malloc: it is made by the helper's thread, which may not use the rank's heap. */
typedef struct llmpar__nccl_context {
    uint64_t id;
    int32_t members, dropped, asked; /* asked: members that have come to the present split */
    int32_t oldest, newest;    /* of its slots; -1: none */
    uint64_t highest;          /* index of a collective that somebody has come to */
    int32_t *member;           /* [members] world ranks; behind it color, key and waits, [members] each */
    int32_t *color, *key, *waits;
} llmpar__nccl_context;

typedef struct llmpar__nccl_comm llmpar__nccl_comm;

/* An NCCL communicator on its way out, in the hands of a thread of its own: see llmpar__nccl_bury. Of malloc: that thread may outlive the world. */
typedef struct llmpar__nccl_grave {
    struct llmpar__nccl_grave *next;
    ncclComm_t nccl;
    int aborts, over, holders; /* over, holders: atomic */
} llmpar__nccl_grave;

typedef struct llmpar__nccl_world {
    llmpar_heap *heap;
    llmpar_device *device;
    llmpar_error *error;
    llmpar_nccl_desc desc;     /* resolved; deadline and silence 0: none */
    int32_t rank, ranks, comms;
    llmpar_record *record;
    int32_t owns_record;       /* else it is the transport's */
    char host[64];

    pthread_mutex_t lock;      /* around everything up to `nccl_lock` */
    pthread_cond_t wake;       /* something has come, or room has been made */
    pthread_t helper;
    int32_t helping, stop;
    int pipe[2];               /* wakes the helper */
    llmpar__nccl_peer *peer;   /* [ranks]; not rank 0: [1] */
    struct pollfd *polled;     /* [1 + ranks] of the helper: the pipe, then links; not rank 0: [2] */
    int32_t *polled_peer;      /* whose */
    int32_t aborted;           /* atomic too: the job has failed */
    llmpar__nccl_verdict verdict;
    double failed_at;
    int32_t located;           /* verdict.who is there */
    int32_t finished, done, ending;
    double last_look, last_beat;
    uint64_t seen_ns;          /* of the record, and when it was first seen */
    double seen_at;
    double nccl_failed_at;     /* an NCCL error waits for a better reason */
    char nccl_error[320];
    llmpar__nccl_group group;  /* the answer to a split; ranks -1: none yet */
    int32_t *group_member;     /* [ranks] */
    /* rank 0's */
    llmpar__nccl_slot *slot;   /* [slots] */
    unsigned char *here;
    int32_t slots, free_slot;  /* never without one that a rank may have */
    int32_t common;            /* slots in use that are no rank's own */
    llmpar__nccl_context **context; /* [contexts] by id, of malloc; NULL: nobody's any more, and free for the next */
    uint64_t contexts;
    int32_t convicted, waiting_for_told, closing;

    pthread_mutex_t nccl_lock; /* around NCCL's calls, the list of communicators and their handles */
    llmpar__nccl_comm *first;
    llmpar__nccl_grave *graves;

    /* the rank's own thread */
    llmpar_event *last;        /* behind the last collective on a stream */
    int32_t pending;
    char *scratch;             /* three parts: for reductions (2), for packing (1) */
    size_t scratch_bytes, part_bytes;
    int32_t remembers;         /* device->alloc is memory.c's */
} llmpar__nccl_world;

/* llmpar_comm's state. */
struct llmpar__nccl_comm {
    llmpar_comm comm;          /* first: the table itself */
    llmpar__nccl_world *world;
    llmpar__nccl_comm *next, **previous;
    ncclComm_t nccl;           /* NULL: one rank, or aborted */
    ncclComm_t *born;          /* of malloc: a split of it that NCCL is making */
    uint64_t context, calls;
    uint64_t *sent, *received; /* [ranks] messages to and from each member */
    int32_t *member;           /* [ranks] world ranks */
    llmpar_halving halving;
    char axis[24];
};

/* socket.c. Status without a text where none is asked for. */
LLMPAR__PRIVATE double llmpar__nccl_now(void);
LLMPAR__PRIVATE void llmpar__nccl_nap(double seconds);
LLMPAR__PRIVATE int llmpar__nccl_listen(const char *host, int port, int *bound, int *failure); /* fd or -1; port 0: any; *bound: the port; *failure: errno */
LLMPAR__PRIVATE int llmpar__nccl_connect(const char *host, int port, double limit, const char **why); /* fd; or -1, and *why */
LLMPAR__PRIVATE int llmpar__nccl_accept_one(int listener);                                      /* fd or -1; never waits */
LLMPAR__PRIVATE int llmpar__nccl_split_address(const char *address, char host[256], int *port); /* 0: malformed */
LLMPAR__PRIVATE size_t llmpar__nccl_own_addresses(char *text, size_t capacity);                 /* numeric, blanks between them; the loopback's last */
LLMPAR__PRIVATE void llmpar__nccl_own_host(char *host, size_t capacity);
LLMPAR__PRIVATE void llmpar__nccl_own_boot(char *boot, size_t capacity); /* empty: the system does not say */
LLMPAR__PRIVATE int llmpar__nccl_send_all(int fd, const void *bytes, size_t count, double limit);  /* 1: done */
LLMPAR__PRIVATE int llmpar__nccl_receive_all(int fd, void *bytes, size_t count, double limit);     /* 1: done; 0: over; -1: time is up */
LLMPAR__PRIVATE long llmpar__nccl_receive_some(int fd, void *bytes, size_t count);                 /* as much as is there: bytes, or -1: over */
LLMPAR__PRIVATE int llmpar__nccl_readable(int fd, double seconds);
LLMPAR__PRIVATE int llmpar__nccl_gone(int fd); /* the other side has closed it, and nothing is left to read */
LLMPAR__PRIVATE void llmpar__nccl_close(int *fd);
LLMPAR__PRIVATE uint64_t llmpar__nccl_random(void);
LLMPAR__PRIVATE int llmpar__nccl_link_make(llmpar_heap *heap, llmpar__nccl_link *link, size_t in, size_t out); /* 0: no memory */
/* A message of one or two parts goes into the link's buffer. 0: no room, or no connection. */
LLMPAR__PRIVATE int llmpar__nccl_link_put(llmpar__nccl_link *link, llmpar__nccl_kind kind, const void *a, size_t a_bytes, const void *b, size_t b_bytes);
LLMPAR__PRIVATE int llmpar__nccl_link_flush(llmpar__nccl_link *link);  /* as much as goes; 0: broken */
LLMPAR__PRIVATE int llmpar__nccl_link_fill(llmpar__nccl_link *link);   /* as much as has come; 0: broken or over */
LLMPAR__PRIVATE void llmpar__nccl_wait_links(llmpar__nccl_world *world, double seconds); /* without the lock: until something can be read, or written where it has to be, or poke; says of each link whether it is ready */
LLMPAR__PRIVATE void llmpar__nccl_poke(const llmpar__nccl_world *world);
LLMPAR__PRIVATE int llmpar__nccl_pipe(int fds[2]);

/* meet.c: connects the links of world->peer. st: this rank's own state, with its text in world->error. *id: rank 0's, on return everybody's. The same status on all ranks that have met. */
LLMPAR__PRIVATE llmpar_status llmpar__nccl_meet(llmpar__nccl_world *world, llmpar_ctx *ctx, llmpar_status st, int32_t nccl, ncclUniqueId *id);

/* control.c. All under world->lock unless they say otherwise. */
LLMPAR__PRIVATE int llmpar__nccl_to_hub(llmpar__nccl_world *world, llmpar__nccl_kind kind, const void *bytes, size_t count); /* 0: no room at the moment */
LLMPAR__PRIVATE void llmpar__nccl_to_rank(llmpar__nccl_world *world, int32_t rank, llmpar__nccl_kind kind, const void *a, size_t a_bytes, const void *b, size_t b_bytes);
LLMPAR__PRIVATE void llmpar__nccl_look(llmpar__nccl_world *world); /* reads, writes, beats, notices silence */
LLMPAR__PRIVATE int llmpar__nccl_mend_call(llmpar_call *call);     /* what came from the network: texts end, numbers are in range */
LLMPAR__PRIVATE void llmpar__nccl_mend_error(llmpar_error *error);
LLMPAR__PRIVATE size_t llmpar__nccl_most_in(const llmpar__nccl_world *world); /* bytes of the longest message, with its head */
/* Without the lock. Tells rank 0 of a call (and waits while there is no room for it). */
LLMPAR__PRIVATE llmpar_status llmpar__nccl_ask_hub(llmpar__nccl_comm *tc, const llmpar_call *call, int32_t color, int32_t key, llmpar__nccl_kind kind);

/* hub.c, on rank 0, under world->lock. */
LLMPAR__PRIVATE int llmpar__nccl_hub_furnish(llmpar__nccl_world *world);
LLMPAR__PRIVATE void llmpar__nccl_hub_free(llmpar__nccl_world *world);
LLMPAR__PRIVATE int llmpar__nccl_hub_take(llmpar__nccl_world *world, int32_t rank, llmpar__nccl_kind kind, const unsigned char *bytes, size_t count); /* 1: taken, 0: no room yet, -1: nonsense */
LLMPAR__PRIVATE void llmpar__nccl_hub_fail(llmpar__nccl_world *world, const llmpar_error *error, int32_t other);
LLMPAR__PRIVATE void llmpar__nccl_hub_lost(llmpar__nccl_world *world, int32_t rank, const char *how);
LLMPAR__PRIVATE void llmpar__nccl_hub_look(llmpar__nccl_world *world);

/* watch.c */
LLMPAR__PRIVATE llmpar_status llmpar__nccl_watch_begin(llmpar__nccl_world *world); /* the helper thread */
LLMPAR__PRIVATE void llmpar__nccl_watch_end(llmpar__nccl_world *world);
/* Under nccl_lock: ncclCommAbort or ncclCommDestroy on a thread of its own, to whom the handle belongs from now on. */
LLMPAR__PRIVATE void llmpar__nccl_bury(llmpar__nccl_world *world, ncclComm_t nccl, int aborts);
/* Without: waits for these threads, for so many seconds at most. 0: some are not through. */
LLMPAR__PRIVATE int llmpar__nccl_buried(llmpar__nccl_world *world, double seconds);
/* Under the lock: the job has failed, by rank 0's word. final: it knows who was where. */
LLMPAR__PRIVATE void llmpar__nccl_convicted(llmpar__nccl_world *world, const llmpar__nccl_verdict *verdict, int final);
LLMPAR__PRIVATE void llmpar__nccl_fail(llmpar__nccl_world *world, const llmpar_error *error);                         /* without: this rank has */
LLMPAR__PRIVATE void llmpar__nccl_await(llmpar__nccl_world *world, double until);                                      /* under the lock: waits for something to come */
LLMPAR__PRIVATE llmpar_error *llmpar__nccl_own_error(llmpar__nccl_comm *tc);
/* LLMPAR_OK, or after a failure of the job its text for this call. Any thread, without the lock. */
LLMPAR__PRIVATE llmpar_status llmpar__nccl_sound(llmpar__nccl_comm *tc, const llmpar_call *call);
/* A failure `st` of this rank's own, its text in llmpar__nccl_own_error: tells the job. Returns st. */
LLMPAR__PRIVATE llmpar_status llmpar__nccl_failed(llmpar__nccl_comm *tc, llmpar_status st);
/* What an NCCL function has returned: waits while it is under way; an error becomes the job's, unless a peer's failure explains it. call NULL: `what` says what was going on. */
LLMPAR__PRIVATE llmpar_status llmpar__nccl_settle(llmpar__nccl_comm *tc, const llmpar_call *call, const char *what, ncclResult_t result);

/* memory.c: device->alloc and free over ncclMemAlloc; undone when the last world is gone and the last block is back. */
LLMPAR__PRIVATE llmpar_status llmpar__nccl_memory_begin(llmpar_heap *heap, llmpar_device *device);
LLMPAR__PRIVATE void llmpar__nccl_memory_end(llmpar_device *device);

/* collectives.c */
LLMPAR__PRIVATE size_t llmpar__nccl_part_bytes(size_t slice, int32_t ranks); /* of each of the three parts of scratch */
LLMPAR__PRIVATE llmpar_status llmpar__nccl_enqueue(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *given, int32_t op); /* for llmpar_comm_fill */

#endif
