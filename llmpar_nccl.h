/* GENERATED from src/: edit there, then run make gen */
#ifndef LLMPAR__TEMPLATE
/*
llmpar_nccl.h - the NCCL communicator for llmpar

DO THIS

    In ONE .c file (plain C, no nvcc needed):

        #define LLMPAR_NCCL_IMPLEMENTATION
        #include "llmpar_nccl.h"

    and LLMPAR_IMPLEMENTATION as for llmpar.h. Everywhere else include "llmpar_nccl.h" alone: its declarations need no
    NCCL header.

    MIT licence, as llmpar.h.
*/

/* Feature-test macros have to precede the first system header. */
#if defined(LLMPAR_NCCL_IMPLEMENTATION) && !defined(LLMPAR__NCCL_IMPLEMENTED)
#if defined(__STRICT_ANSI__) && (defined(_FEATURES_H) || defined(_SYS_CDEFS_H_)) && !defined(_GNU_SOURCE) && !defined(_DEFAULT_SOURCE) && !defined(_DARWIN_C_SOURCE)
#error "llmpar: in strict mode (-std=c99) llmpar_nccl.h must come before every system header in the file that defines LLMPAR_NCCL_IMPLEMENTATION; or compile that file with -std=gnu99 or -D_DEFAULT_SOURCE"
#endif
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#if defined(__APPLE__) && !defined(_DARWIN_C_SOURCE)
#define _DARWIN_C_SOURCE 1
#endif
#endif

#include "llmpar.h"

#ifndef LLMPAR_NCCL_H
#define LLMPAR_NCCL_H

LLMPAR_EXTERN_C_BEGIN
/* ==== src/nccl/nccl.h ==== */
/* nccl: the communicator between GPUs on NCCL (2.20 or later), one rank a process (or a thread with a GPU of its own).

   Data travels over NCCL; beside it the ranks of a world hold a small TCP star with rank 0 in its middle, the control plane: there they meet, compare their calls, make splits and learn of failures. A rank that
   dies, fails or stays away is an error on every other rank that names it: a helper thread of each rank watches, and frees a GPU that waits inside NCCL.

   Launch order. NCCL wants the operations of concurrent communicators launched in one order on all ranks, and able to run side by side. Here a rank's collectives run one after the other in the order of the
   calls, on whatever communicators and streams (an event chains them): ranks whose calls would not deadlock one by one do not deadlock on the GPU. Compute on other streams runs beside them. */

#include "llmpar.h"

/* Alike on all ranks, but for file and address of ranks that reach the same place by other names. Zero is a default. */
typedef struct llmpar_nccl_desc {
    int32_t fast;              /* 1: sums by ncclReduceScatter and ncclAllReduce in NCCL's own order; default 0: recursive halving and the tree of docs/exact.md, the same bits as every communicator. Maxima are exact either way */
    double deadline;           /* seconds that a collective, and the meeting at the start, may take before it is an error that names who is missing; default 0 = 600; negative = for ever */
    double silence;            /* seconds without a sign of life after which a rank is given up (stopped, unreachable; a process that ends is noticed at once); default 0 = 10; negative = for ever */
    int32_t unchecked;         /* 1: the ranks do not compare their calls; default 0: they do, beside the data */
    size_t slice;              /* bytes that a reduction handles at a time, which bounds scratch (about three times as much device memory, taken at creation); default 0 = 16 MiB */
    int32_t own_memory;        /* 1: the device keeps its own allocator; default 0: while the communicator lives, device->alloc takes blocks of 1 MiB and more from ncclMemAlloc, as NCCL wants it where it is to reach memory without copies */
    int32_t one_device;        /* 1: several ranks may share a GPU, each taken for a machine of its own by NCCL (NCCL_HOSTID in its environment): for tests; default 0: two ranks on one GPU are refused by name */
    /* Where the ranks meet: the first of these that is given; default: ctx->host_comm (rank threads, MPI), else ctx->meeting (MASTER_ADDR and MASTER_PORT). */
    const char *file;          /* a path that all ranks see and nobody else uses: rank 0 writes its address there, and removes it when all have come, or it gives up */
    const char *address;       /* "host:port" or "[address]:port" of rank 0. Where another program listens there (torchrun's store), one of the 15 ports behind it serves */
} llmpar_nccl_desc;

/* The world's communicator of ctx->rank of ctx->world on `device`, whose native_stream gives cudaStream_t and whose memory NCCL can reach; on the rank's own thread, as everything below. desc NULL: defaults.
   Borrows ctx and device. Destroy it after its splits; rank 0's destroy waits until all ranks have ended theirs, or failed. Errors, with the text in ctx->error, the same on all ranks that have met: LLMPAR_ERR_ARGUMENT (the
   desc), LLMPAR_ERR_CONFIG (nowhere to meet, or two ranks on one GPU), LLMPAR_ERR_MISMATCH (ranks that do not belong together), LLMPAR_ERR_TIMEOUT (who has not come within the deadline), LLMPAR_ERR_UNSUPPORTED (device or
   NCCL), LLMPAR_ERR_IO, _MEMORY, _INTERNAL, _PEER. Collective. */
LLMPAR_API llmpar_status llmpar_nccl_comm_create(llmpar_ctx *ctx, llmpar_device *device, const llmpar_nccl_desc *desc, llmpar_comm **out);
/* This rank's work on `comm`, a world, is done (a failure of its own was told by comm->abort): waits until all ranks' is, or it is known who has failed; *root: the job's failure, status OK: none. Collective. */
LLMPAR_API void llmpar_nccl_comm_finish(llmpar_comm *comm, llmpar_error *root);
/* For a launch desc, beside what llmpar_cuda_backend has filled in: comm_create, comm_finish, comm_absent. desc (borrowed until launch returns, NULL: defaults). Local. */
LLMPAR_API void llmpar_nccl_backend(const llmpar_nccl_desc *desc, llmpar_backend *out);

LLMPAR_EXTERN_C_END

#endif /* LLMPAR_NCCL_H */

#ifdef LLMPAR_NCCL_IMPLEMENTATION
#ifndef LLMPAR__NCCL_IMPLEMENTED
#define LLMPAR__NCCL_IMPLEMENTED

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsign-conversion"
#ifdef __cplusplus
#pragma GCC diagnostic ignored "-Wold-style-cast"
#endif
/* ==== src/nccl/socket.c ==== */
/* socket: TCP between the ranks of a world: addresses, connections that time out, and transfers that never raise a signal. */
/* ==== src/nccl/nccl_internal.h ==== */
/* nccl_internal: what the files of the NCCL communicator share: socket.c (addresses, TCP), meet.c (how the ranks come together), control.c (messages between them), hub.c (what rank 0 does for all),
   watch.c (the helper thread; failures), memory.c (registered memory), collectives.c, world.c (communicators). */

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
/* ---- src/nccl/socket.c goes on ---- */
#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifdef MSG_NOSIGNAL
#define LLMPAR__NCCL_SEND_FLAGS MSG_NOSIGNAL
#else
#define LLMPAR__NCCL_SEND_FLAGS 0 /* macOS: SO_NOSIGPIPE */
#endif

LLMPAR__PRIVATE_DEF double llmpar__nccl_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_nap(double seconds)
{
    struct timespec t;
    t.tv_sec = (time_t)seconds;
    t.tv_nsec = (long)((seconds - (double)t.tv_sec) * 1e9);
    nanosleep(&t, NULL);
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_close(int *fd)
{
    if (*fd >= 0) close(*fd);
    *fd = -1;
}

LLMPAR__PRIVATE_DEF uint64_t llmpar__nccl_random(void)
{
    uint64_t bits = 0;
    int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
    ssize_t got = fd >= 0 ? read(fd, &bits, sizeof bits) : 0;
    if (fd >= 0) close(fd);
    if (got != (ssize_t)sizeof bits) bits = (uint64_t)(llmpar__nccl_now() * 1e9) ^ (uint64_t)getpid() << 40; /* it only has to tell jobs apart */
    return bits ? bits : 1;
}

static int llmpar__nccl_prepare(int fd)
{
    int one = 1, flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) || fcntl(fd, F_SETFD, FD_CLOEXEC)) return 0;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
#ifdef SO_NOSIGPIPE
    setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &one, sizeof one);
#endif
    return 1;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_readable(int fd, double seconds)
{
    struct pollfd p;
    p.fd = fd;
    p.events = POLLIN;
    p.revents = 0;
    return poll(&p, 1, seconds > 0 ? (int)(seconds * 1000) + 1 : 0) > 0;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_gone(int fd)
{
    char byte;
    if (!llmpar__nccl_readable(fd, 0)) return 0;
    ssize_t got = recv(fd, &byte, 1, MSG_PEEK);
    return got == 0 || (got < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR);
}

static int llmpar__nccl_bind(int family, int port, int loopback, int *bound, int *failure)
{
    struct sockaddr_storage address;
    socklen_t length;
    int one = 1, zero = 0, fd = socket(family, SOCK_STREAM, 0);
    memset(&address, 0, sizeof address);
    if (fd < 0) {
        *failure = errno;
        return -1;
    }
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (family == AF_INET6) {
        struct sockaddr_in6 *six = (struct sockaddr_in6 *)(void *)&address;
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof zero); /* IPv4 comes in here too */
        six->sin6_family = AF_INET6;
        six->sin6_port = htons((uint16_t)port);
        six->sin6_addr = loopback ? in6addr_loopback : in6addr_any;
        length = sizeof *six;
    } else {
        struct sockaddr_in *four = (struct sockaddr_in *)(void *)&address;
        four->sin_family = AF_INET;
        four->sin_port = htons((uint16_t)port);
        four->sin_addr.s_addr = htonl(loopback ? INADDR_LOOPBACK : INADDR_ANY);
        length = sizeof *four;
    }
    if (bind(fd, (struct sockaddr *)(void *)&address, length) || listen(fd, 4096) || getsockname(fd, (struct sockaddr *)(void *)&address, &length) || !llmpar__nccl_prepare(fd)) {
        *failure = errno;
        close(fd);
        return -1;
    }
    *bound = (int)ntohs(family == AF_INET6 ? ((struct sockaddr_in6 *)(void *)&address)->sin6_port : ((struct sockaddr_in *)(void *)&address)->sin_port);
    return fd;
}

/* A name of this machine alone is listened on alone; any other may be one of several, or of a router in front of it. */
LLMPAR__PRIVATE_DEF int llmpar__nccl_listen(const char *host, int port, int *bound, int *failure)
{
    int loopback4 = host && (!strcmp(host, "127.0.0.1") || !strcmp(host, "localhost")), loopback6 = host && !strcmp(host, "::1"), fd = -1;
    if (!loopback4) fd = llmpar__nccl_bind(AF_INET6, port, loopback6, bound, failure);
    if (fd >= 0 || loopback6 || (!loopback4 && *failure == EADDRINUSE)) return fd;
    return llmpar__nccl_bind(AF_INET, port, loopback4, bound, failure);
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_connect(const char *host, int port, double limit, const char **why)
{
    struct addrinfo hints, *all = NULL;
    char service[16];
    int fd = -1;
    memset(&hints, 0, sizeof hints);
    hints.ai_family = AF_UNSPEC;
    hints.ai_socktype = SOCK_STREAM;
    snprintf(service, sizeof service, "%d", port);
    int unknown = getaddrinfo(host, service, &hints, &all);
    if (unknown) {
        *why = gai_strerror(unknown);
        return -1;
    }
    for (struct addrinfo *a = all; a && fd < 0; a = a->ai_next) {
        double until = llmpar__nccl_now() + 2;
        if (until > limit) until = limit;
        fd = socket(a->ai_family, SOCK_STREAM, 0);
        int connected = fd >= 0 && llmpar__nccl_prepare(fd) && (!connect(fd, a->ai_addr, a->ai_addrlen) || errno == EINPROGRESS), broken = errno;
        if (connected) {
            struct pollfd p;
            socklen_t length = sizeof broken;
            p.fd = fd;
            p.events = POLLOUT;
            p.revents = 0;
            double left = until - llmpar__nccl_now();
            broken = ETIMEDOUT;
            connected = poll(&p, 1, left > 0 ? (int)(left * 1000) : 0) > 0 && !getsockopt(fd, SOL_SOCKET, SO_ERROR, &broken, &length) && !broken;
        }
        if (!connected) {
            *why = strerror(broken);
            llmpar__nccl_close(&fd);
        }
    }
    freeaddrinfo(all);
    return fd;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_accept_one(int listener)
{
    int fd = accept(listener, NULL, NULL);
    if (fd >= 0 && !llmpar__nccl_prepare(fd)) llmpar__nccl_close(&fd);
    return fd;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_send_all(int fd, const void *bytes, size_t count, double limit)
{
    const char *at = (const char *)bytes;
    while (count) {
        ssize_t sent = send(fd, at, count, LLMPAR__NCCL_SEND_FLAGS);
        if (sent > 0) {
            at += sent;
            count -= (size_t)sent;
            continue;
        }
        if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) return 0;
        if (llmpar__nccl_now() >= limit) return 0;
        llmpar__nccl_nap(0.001);
    }
    return 1;
}

LLMPAR__PRIVATE_DEF long llmpar__nccl_receive_some(int fd, void *bytes, size_t count)
{
    ssize_t got = recv(fd, bytes, count, 0);
    if (got > 0) return (long)got;
    return got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) ? 0 : -1;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_receive_all(int fd, void *bytes, size_t count, double limit)
{
    char *at = (char *)bytes;
    while (count) {
        ssize_t got = recv(fd, at, count, 0);
        if (got > 0) {
            at += got;
            count -= (size_t)got;
            continue;
        }
        if (got == 0 || (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)) return 0;
        double left = limit - llmpar__nccl_now();
        if (left <= 0) return -1;
        llmpar__nccl_readable(fd, left < 0.1 ? left : 0.1);
    }
    return 1;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_split_address(const char *address, char host[256], int *port)
{
    const char *colon = strrchr(address, ':'), *begin = address, *end = colon;
    char *rest;
    if (!colon || colon == address) return 0;
    if (*begin == '[') { /* an IPv6 address has colons of its own */
        if (colon[-1] != ']') return 0;
        begin++;
        end--;
    }
    if (end <= begin || end - begin > 255) return 0;
    memcpy(host, begin, (size_t)(end - begin));
    host[end - begin] = 0;
    long number = strtol(colon + 1, &rest, 10);
    if (colon[1] < '0' || colon[1] > '9' || *rest || number > 65535) return 0;
    *port = (int)number;
    return 1;
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_own_host(char *host, size_t capacity)
{
    if (gethostname(host, capacity)) snprintf(host, capacity, "?");
    host[capacity - 1] = 0;
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_own_boot(char *boot, size_t capacity)
{
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    ssize_t got = fd >= 0 ? read(fd, boot, capacity - 1) : 0;
    if (fd >= 0) close(fd);
    boot[got > 0 ? got : 0] = 0;
    boot[strcspn(boot, "\n")] = 0;
}

LLMPAR__PRIVATE_DEF size_t llmpar__nccl_own_addresses(char *text, size_t capacity)
{
    struct ifaddrs *all = NULL;
    size_t used = 0;
    text[0] = 0;
    if (getifaddrs(&all)) all = NULL;
    for (int loopback = 0; loopback < 2; loopback++)
        for (struct ifaddrs *i = all; i; i = i->ifa_next) {
            char name[256];
            if (!i->ifa_addr || !(i->ifa_flags & IFF_UP) || ((i->ifa_flags & IFF_LOOPBACK) != 0) != loopback) continue;
            int family = i->ifa_addr->sa_family;
            if (family != AF_INET && family != AF_INET6) continue;
            if (getnameinfo(i->ifa_addr, (socklen_t)(family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6)), name, sizeof name, NULL, 0, NI_NUMERICHOST)) continue;
            if (strchr(name, '%')) continue; /* a link's own address says nothing on another machine */
            size_t length = strlen(name);
            if (used + length + 2 > capacity) break;
            if (used) text[used++] = ' ';
            memcpy(text + used, name, length + 1);
            used += length;
        }
    if (all) freeifaddrs(all);
    if (!used) used = (size_t)snprintf(text, capacity, "127.0.0.1");
    return used;
}

/* ---- messages ---- */

LLMPAR__PRIVATE_DEF int llmpar__nccl_link_make(llmpar_heap *heap, llmpar__nccl_link *link, size_t in, size_t out)
{
    link->fd = -1;
    link->in = (unsigned char *)llmpar_heap_alloc(heap, in, 1);
    link->out = (unsigned char *)llmpar_heap_alloc(heap, out, 1);
    link->in_room = in;
    link->out_room = out;
    return link->in && link->out;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_link_put(llmpar__nccl_link *link, llmpar__nccl_kind kind, const void *a, size_t a_bytes, const void *b, size_t b_bytes)
{
    llmpar__nccl_head head;
    if (link->fd < 0 || link->out_room - link->out_used < sizeof head + a_bytes + b_bytes) return 0;
    head.word = LLMPAR__NCCL_WORD;
    head.kind = (uint32_t)kind;
    head.bytes = a_bytes + b_bytes;
    unsigned char *at = link->out + link->out_used;
    memcpy(at, &head, sizeof head);
    if (a_bytes) memcpy(at + sizeof head, a, a_bytes);
    if (b_bytes) memcpy(at + sizeof head + a_bytes, b, b_bytes);
    link->out_used += sizeof head + a_bytes + b_bytes;
    return 1;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_link_flush(llmpar__nccl_link *link)
{
    size_t done = 0;
    while (link->fd >= 0 && done < link->out_used) {
        ssize_t sent = send(link->fd, link->out + done, link->out_used - done, LLMPAR__NCCL_SEND_FLAGS);
        if (sent > 0) {
            done += (size_t)sent;
            continue;
        }
        if (errno == EINTR) continue;
        if (errno != EAGAIN && errno != EWOULDBLOCK) return 0;
        break;
    }
    link->out_used -= done;
    if (done && link->out_used) memmove(link->out, link->out + done, link->out_used);
    return 1;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_link_fill(llmpar__nccl_link *link)
{
    while (link->fd >= 0 && link->in_used < link->in_room) {
        size_t room = link->in_room - link->in_used;
        ssize_t got = recv(link->fd, link->in + link->in_used, room, 0);
        if (got > 0) {
            link->in_used += (size_t)got;
            if ((size_t)got < room) break; /* it is empty for now; its end would be the next wait's to find */
            continue;
        }
        if (got < 0 && errno == EINTR) continue;
        return got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
    }
    return 1;
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_wait_links(llmpar__nccl_world *world, double seconds)
{
    struct pollfd *p = world->polled;
    int32_t count = 1, peers = world->rank ? 1 : world->ranks;
    p[0].fd = world->pipe[0];
    p[0].events = POLLIN;
    pthread_mutex_lock(&world->lock);
    for (int32_t i = 0; i < peers; i++) {
        const llmpar__nccl_link *link = &world->peer[i].link;
        if (link->fd < 0) continue;
        world->polled_peer[count] = i;
        p[count].fd = link->fd;
        p[count++].events = (short)((link->in_used < link->in_room ? POLLIN : 0) | (link->out_used ? POLLOUT : 0));
    }
    pthread_mutex_unlock(&world->lock);
    if (poll(p, (nfds_t)count, (int)(seconds * 1000) + 1) <= 0) return;
    if (p[0].revents) {
        char drop[64];
        while (read(world->pipe[0], drop, sizeof drop) > 0) {}
    }
    pthread_mutex_lock(&world->lock);
    for (int32_t i = 1; i < count; i++) world->peer[world->polled_peer[i]].link.ready = (p[i].revents & ~POLLOUT) != 0;
    pthread_mutex_unlock(&world->lock);
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_poke(const llmpar__nccl_world *world)
{
    char one = 1;
    ssize_t ignored = write(world->pipe[1], &one, 1); /* full: it is awake anyway */
    (void)ignored;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_pipe(int fds[2])
{
    if (pipe(fds)) {
        fds[0] = fds[1] = -1;
        return 0;
    }
    for (int i = 0; i < 2; i++)
        if (fcntl(fds[i], F_SETFL, O_NONBLOCK) || fcntl(fds[i], F_SETFD, FD_CLOEXEC)) return 0;
    return 1;
}

#undef LLMPAR__NCCL_SEND_FLAGS
/* ==== src/nccl/meet.c ==== */
/* meet: how the ranks of a world find rank 0, who they say they are, and what they have to agree in.

     rank 0   listens -> says where (a file, a broadcast of the transport; an address is known) -> takes hellos until every rank has sent one -> welcome, with NCCL's id, or with the error, to all
     others   look up where -> connect, hello, accept -> wait for the welcome

   Whoever connects without the hello of this build, or with another key, is a stranger and dropped; the meeting goes on. A rank that cannot take part comes all the same and says why, so that all fail alike; once there
   is an error, everybody who is there gets it at once and goes. A rank whose accept has come in time stays on its connection: if that breaks, the rank is gone. */

#include <sys/resource.h>

#define LLMPAR__NCCL_PLACE 1024   /* bytes of the text that says where rank 0 is */
#define LLMPAR__NCCL_STRANGERS 64 /* connections that have not said hello yet, at most */
#define LLMPAR__NCCL_PORTS 16
#define LLMPAR__NCCL_PATIENCE 3.0 /* seconds for which a rank waits for the answer to its hello, before it tries another way */
#define LLMPAR__NCCL_AFTER 5.0    /* seconds for which rank 0 tells those who come late of an error */
#define LLMPAR__NCCL_EXCUSE 30.0  /* .. and for which a rank that cannot take part looks for the others to say so */

/* Where rank 0 is. */
typedef struct llmpar__nccl_place {
    uint64_t key;
    int port, ports;
    char hosts[LLMPAR__NCCL_PLACE]; /* blanks between them */
} llmpar__nccl_place;

typedef struct llmpar__nccl_stranger {
    int fd;
    double since;              /* it has not been here for longer */
    size_t got;
    llmpar__nccl_hello hello;
} llmpar__nccl_stranger;

/* "llmpar KEY PORT HOST HOST ..", or "!" and why there will be none. */
static int llmpar__nccl_place_read(const char *text, llmpar__nccl_place *place, char why[512])
{
    char *rest;
    if (text[0] == '!') {
        snprintf(why, 512, "%.500s", text + 1);
        return 0;
    }
    memset(place, 0, sizeof *place);
    if (strncmp(text, "llmpar ", 7)) return 0;
    place->key = strtoull(text + 7, &rest, 16);
    if (*rest != ' ') return 0;
    place->port = (int)strtol(rest + 1, &rest, 10);
    if (*rest != ' ' || place->port < 1 || place->port > 65535) return 0;
    place->ports = 1;
    size_t length = strlen(rest + 1);
    if (length < 2 || length >= sizeof place->hosts || rest[length] != '\n') return 0; /* cut: it is being written */
    memcpy(place->hosts, rest + 1, length - 1);
    return 1;
}

/* At once or not at all: to a name beside it, then renamed. */
static int llmpar__nccl_place_write(const char *path, const char *text)
{
    char beside[1100];
    size_t length = strlen(text);
    if (snprintf(beside, sizeof beside, "%s.%ld", path, (long)getpid()) >= (int)sizeof beside) {
        errno = ENAMETOOLONG;
        return 0;
    }
    int fd = open(beside, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0) return 0;
    errno = ENOSPC; /* what a part of it means */
    int written = write(fd, text, length) == (ssize_t)length;
    if (close(fd)) written = 0;
    if (written && !rename(beside, path)) return 1;
    int failure = errno;
    unlink(beside);
    errno = failure;
    return 0;
}

static llmpar_status llmpar__nccl_address(llmpar__nccl_world *world, const char *address, llmpar__nccl_place *place)
{
    memset(place, 0, sizeof *place);
    if (!llmpar__nccl_split_address(address, place->hosts, &place->port) || !place->port)
        return llmpar_error_set(world->error, LLMPAR_ERR_CONFIG, "nccl: \"%.200s\" is not an address, expected host:port or [address]:port with a port from 1 to 65535", address);
    place->key = (uint64_t)place->port; /* of two jobs with neighbouring ports one looks at the other's, too */
    place->ports = LLMPAR__NCCL_PORTS;
    if (place->port + place->ports > 65536) place->ports = 65536 - place->port;
    return LLMPAR_OK;
}

/* ---- rank 0 ---- */

/* A connection to every rank is a file, and what else a rank opens: as many as the system allows, as NCCL itself asks of it. */
static llmpar_status llmpar__nccl_files(const llmpar__nccl_world *world)
{
    struct rlimit files;
    rlim_t need = (rlim_t)world->ranks + 64;
    if (getrlimit(RLIMIT_NOFILE, &files) || files.rlim_cur >= need) return LLMPAR_OK;
    files.rlim_cur = files.rlim_max;
    if (files.rlim_max >= need && !setrlimit(RLIMIT_NOFILE, &files)) return LLMPAR_OK;
    return llmpar_error_set(world->error, LLMPAR_ERR_CONFIG, "nccl: rank 0 holds a connection to each of %d ranks, but may open %llu files, expected at least %llu (ulimit -n)", (int)world->ranks, (unsigned long long)files.rlim_max,
                            (unsigned long long)need);
}

/* Listens, and says where. host_comm's broadcast takes place on every path. */
static llmpar_status llmpar__nccl_open(llmpar__nccl_world *world, llmpar_ctx *ctx, llmpar_status st, int *listener, uint64_t *key)
{
    const llmpar_nccl_desc *desc = &world->desc;
    const char *address = desc->address ? desc->address : ctx->host_comm || desc->file ? NULL : ctx->meeting;
    llmpar__nccl_place place;
    char text[LLMPAR__NCCL_PLACE], hosts[LLMPAR__NCCL_PLACE - 64];
    int failure = 0, port = 0;
    *key = 0;
    if (desc->file) address = NULL;
    if (address) {
        llmpar_status read = llmpar__nccl_address(world, address, &place);
        if (read) return st ? st : read;
        *key = place.key;
        for (int i = 0; i < place.ports && *listener < 0; i++) {
            *listener = llmpar__nccl_listen(place.hosts, place.port + i, &port, &failure);
            if (*listener < 0 && failure != EADDRINUSE) break;
        }
        if (*listener >= 0) return st;
        llmpar_status none = llmpar_error_set(world->error, LLMPAR_ERR_IO, "nccl: rank 0 cannot listen at %.200s (ports %d to %d): %s", address, place.port, place.port + place.ports - 1, strerror(failure));
        return st ? st : none;
    }
    *key = llmpar__nccl_random();
    *listener = llmpar__nccl_listen(NULL, 0, &port, &failure);
    if (*listener < 0 && !st) st = llmpar_error_set(world->error, LLMPAR_ERR_IO, "nccl: rank 0 cannot listen for the others: %s", strerror(failure));
    memset(text, 0, sizeof text);
    if (*listener >= 0) {
        llmpar__nccl_own_addresses(hosts, sizeof hosts);
        snprintf(text, sizeof text, "llmpar %llx %d %s\n", (unsigned long long)*key, port, hosts);
    } else {
        snprintf(text, sizeof text, "!%.500s", world->error->text);
    }
    if (desc->file) {
        if (!llmpar__nccl_place_write(desc->file, text) && !st) st = llmpar_error_set(world->error, LLMPAR_ERR_IO, "nccl: rank 0 cannot write its address to %.300s: %s", desc->file, strerror(errno));
        return st;
    }
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.send = call.recv = text;
    call.count = sizeof text;
    call.dtype = LLMPAR_U8;
    call.tag = "nccl/meeting";
    llmpar_status sent = llmpar_broadcast(ctx->host_comm, NULL, &call);
    return st ? st : sent;
}

static void llmpar__nccl_hello_fill(const llmpar__nccl_world *world, llmpar_status st, int32_t nccl, uint64_t key, llmpar__nccl_hello *hello)
{
    memset(hello, 0, sizeof *hello);
    memcpy(hello->magic, LLMPAR__NCCL_MAGIC, sizeof hello->magic);
    hello->bytes = (uint32_t)sizeof *hello;
    hello->version = LLMPAR_VERSION_NUMBER;
    hello->key = key;
    hello->slice = world->desc.slice;
    hello->pid = (int64_t)getpid();
    hello->world = world->ranks;
    hello->rank = world->rank;
    hello->nccl = nccl;
    hello->fast = world->desc.fast;
    hello->unchecked = world->desc.unchecked;
    hello->one_device = world->desc.one_device;
    snprintf(hello->host, sizeof hello->host, "%.63s", world->host);
    llmpar__nccl_own_boot(hello->boot, sizeof hello->boot);
    if (world->device && world->device->name) snprintf(hello->device, sizeof hello->device, "%s", world->device->name);
    if (world->device && world->device->size >= offsetof(llmpar_device, place) + sizeof world->device->place && world->device->place) snprintf(hello->place, sizeof hello->place, "%s", world->device->place);
    if (st) hello->error = *world->error;
    else llmpar_error_clear(&hello->error);
    if (st) hello->error.status = st;
    hello->error.rank = world->rank;
}

/* A name for messages: "rank 3 (node1, pid 77)". */
static const char *llmpar__nccl_name(const llmpar__nccl_hello *hello, char text[120])
{
    snprintf(text, 120, "rank %d (%s, pid %lld)", (int)hello->rank, hello->host, (long long)hello->pid);
    return text;
}

/* In what a rank differs from rank 0. */
static llmpar_status llmpar__nccl_compare(const llmpar__nccl_hello *mine, const llmpar__nccl_hello *theirs, llmpar_error *error)
{
    char a[120], b[120];
    llmpar__nccl_name(theirs, a);
    llmpar__nccl_name(mine, b);
    if (theirs->world != mine->world) return llmpar_error_set(error, LLMPAR_ERR_MISMATCH, "nccl: %s was started in a world of %d ranks, %s in one of %d", a, (int)theirs->world, b, (int)mine->world);
    if (theirs->rank <= 0 || theirs->rank >= mine->world) return llmpar_error_set(error, LLMPAR_ERR_MISMATCH, "nccl: %s has come to %s of a world of %d ranks", a, b, (int)mine->world);
    if (theirs->nccl != mine->nccl) return llmpar_error_set(error, LLMPAR_ERR_MISMATCH, "nccl: %s has NCCL %d, %s NCCL %d", a, (int)theirs->nccl, b, (int)mine->nccl);
    if (strcmp(theirs->device, mine->device)) return llmpar_error_set(error, LLMPAR_ERR_MISMATCH, "nccl: %s has device %s, %s %s", a, theirs->device, b, mine->device);
    if (theirs->fast != mine->fast || theirs->unchecked != mine->unchecked || theirs->slice != mine->slice || theirs->one_device != mine->one_device)
        return llmpar_error_set(error, LLMPAR_ERR_MISMATCH, "nccl: the ranks are described differently: %s: fast %d, unchecked %d, slice %llu, one_device %d; %s: fast %d, unchecked %d, slice %llu, one_device %d", a,
                                (int)theirs->fast, (int)theirs->unchecked, (unsigned long long)theirs->slice, (int)theirs->one_device, b, (int)mine->fast, (int)mine->unchecked, (unsigned long long)mine->slice, (int)mine->one_device);
    return LLMPAR_OK;
}

/* A rank of this meeting, built from another version: as far as every version begins its hello. It could not read an answer. */
static int llmpar__nccl_foreign(const llmpar__nccl_stranger *s, uint64_t key, llmpar_error *error)
{
    const llmpar__nccl_hello *hello = &s->hello;
    if (s->got < offsetof(llmpar__nccl_hello, slice) || memcmp(hello->magic, LLMPAR__NCCL_MAGIC, sizeof hello->magic) || hello->key != key || (hello->bytes == sizeof *hello && hello->version == LLMPAR_VERSION_NUMBER)) return 0;
    llmpar_error_set(error, LLMPAR_ERR_MISMATCH, "nccl: the meeting: a rank of another build has come to rank 0: version %u and a hello of %u bytes, expected version %u and %u bytes", (unsigned)hello->version, (unsigned)hello->bytes, LLMPAR_VERSION_NUMBER,
                     (unsigned)sizeof *hello);
    if (error->rank < 0) error->rank = 0;
    return 1;
}

/* Does it speak this build's language, and mean this meeting? */
static int llmpar__nccl_ours(llmpar__nccl_hello *hello, uint64_t key)
{
    if (memcmp(hello->magic, LLMPAR__NCCL_MAGIC, sizeof hello->magic) || hello->bytes != sizeof *hello || hello->version != LLMPAR_VERSION_NUMBER || hello->key != key) return 0;
    hello->device[sizeof hello->device - 1] = hello->place[sizeof hello->place - 1] = hello->host[sizeof hello->host - 1] = hello->boot[sizeof hello->boot - 1] = 0;
    llmpar__nccl_mend_error(&hello->error);
    return 1;
}

static void llmpar__nccl_welcome_one(const llmpar__nccl_world *world, int fd, const llmpar_error *error, const ncclUniqueId *id)
{
    llmpar__nccl_welcome welcome;
    memset(&welcome, 0, sizeof welcome);
    welcome.error = *error;
    welcome.pid = (int64_t)getpid();
    snprintf(welcome.host, sizeof welcome.host, "%.63s", world->host);
    welcome.id = *id;
    llmpar__nccl_send_all(fd, &welcome, sizeof welcome, llmpar__nccl_now() + 5); /* who does not take it is missed soon enough */
}

/* A hello has come over fd, connected since then, which is kept (1), or not. */
static int llmpar__nccl_take_hello(llmpar__nccl_world *world, llmpar__nccl_hello *all, llmpar__nccl_hello *hello, uint64_t key, int fd, double since, llmpar_error *error)
{
    llmpar__nccl_accept accept;
    char a[120], b[120];
    if (!llmpar__nccl_ours(hello, key)) return 0;
    memset(&accept, 0, sizeof accept);
    memcpy(accept.magic, LLMPAR__NCCL_MAGIC, sizeof accept.magic);
    accept.key = key;
    if (!llmpar__nccl_send_all(fd, &accept, sizeof accept, llmpar__nccl_now() + 5)) return 0;
    if (hello->rank > 0 && hello->rank < world->ranks) {
        world->peer[hello->rank].told = 1; /* heard of */
        if (hello->error.status && error->status == LLMPAR_OK) { /* before it is compared: it may have no device */
            *error = hello->error;
            error->rank = hello->rank;
        }
    }
    if (llmpar__nccl_compare(&all[0], hello, error)) {
        if (error->rank < 0) error->rank = hello->rank;
        return 0;
    }
    llmpar__nccl_peer *peer = &world->peer[hello->rank];
    if (peer->there && llmpar__nccl_gone(peer->link.fd)) { /* it has tried another way */
        llmpar__nccl_close(&peer->link.fd);
        peer->there = 0;
    }
    if (peer->there) {
        llmpar_error_set(error, LLMPAR_ERR_MISMATCH, "nccl: two processes are rank %d: %s and %s", (int)hello->rank, llmpar__nccl_name(&all[hello->rank], a), llmpar__nccl_name(hello, b));
        if (error->rank < 0) error->rank = hello->rank;
        return 0;
    }
    all[hello->rank] = *hello;
    peer->there = llmpar__nccl_now() < since + LLMPAR__NCCL_PATIENCE / 2 ? 2 : 1; /* 2: it knows for certain that it has been heard */
    peer->link.fd = fd;
    peer->pid = hello->pid;
    snprintf(peer->host, sizeof peer->host, "%.63s", hello->host);
    return 1;
}

/* As NCCL itself tells GPUs and machines apart; of one GPU by rank. */
static int llmpar__nccl_by_place(const void *x, const void *y)
{
    const llmpar__nccl_hello *a = *(const llmpar__nccl_hello *const *)x, *b = *(const llmpar__nccl_hello *const *)y;
    int order = strcmp(a->place, b->place);
    if (!order) order = strcmp(a->host, b->host);
    if (!order) order = strcmp(a->boot, b->boot);
    return order ? order : a->rank - b->rank;
}

static void llmpar__nccl_neighbours(const llmpar__nccl_world *world, const llmpar__nccl_hello *all, llmpar_error *error)
{
    size_t n = (size_t)world->ranks;
    char a[120], b[120];
    if (world->desc.one_device) return;
    const llmpar__nccl_hello **by = (const llmpar__nccl_hello **)malloc(n * sizeof *by), *first = NULL, *second = NULL;
    if (!by) {
        llmpar_error_set(error, LLMPAR_ERR_MEMORY, "nccl: out of memory for the meeting of %d ranks", (int)world->ranks);
        return;
    }
    for (size_t i = 0; i < n; i++) by[i] = &all[i];
    qsort((void *)by, n, sizeof *by, llmpar__nccl_by_place);
    for (size_t i = 1; i < n; i++) { /* the lowest rank that comes second */
        if (!by[i]->place[0] || strcmp(by[i]->place, by[i - 1]->place) || strcmp(by[i]->host, by[i - 1]->host) || strcmp(by[i]->boot, by[i - 1]->boot) || (second && second->rank < by[i]->rank)) continue;
        first = by[i - 1];
        second = by[i];
    }
    free((void *)by);
    if (!second) return;
    llmpar_error_set(error, LLMPAR_ERR_CONFIG, "nccl: %s and %s have the same GPU, %s (NCCL needs one a rank)", llmpar__nccl_name(first, a), llmpar__nccl_name(second, b), second->place);
    if (error->rank < 0) error->rank = second->rank;
}

static void llmpar__nccl_missing(const llmpar__nccl_world *world, llmpar_error *error)
{
    char who[200];
    size_t used = 0;
    who[0] = 0;
    for (int32_t i = 1; i < world->ranks && used < sizeof who - 24; i++)
        if (!world->peer[i].there) used += (size_t)snprintf(who + used, sizeof who - used, " %d", (int)i);
    llmpar_error_set(error, LLMPAR_ERR_TIMEOUT, "nccl: the meeting: rank 0 waited %g s for ranks%s", world->desc.deadline, who);
    error->rank = 0;
}

/* Until all are there, the time is up, or an error has been shown to all who came within a while. looked: nobody has connected before. */
static void llmpar__nccl_assemble(llmpar__nccl_world *world, int listener, llmpar__nccl_hello *all, llmpar__nccl_stranger *stranger, uint64_t key, const ncclUniqueId *id, double looked, llmpar_error *error)
{
    double begin = llmpar__nccl_now(), limit = world->desc.deadline > 0 ? begin + world->desc.deadline : 0, failed = 0, after = LLMPAR__NCCL_AFTER;
    int waiting = 0;
    if (error->status) after = limit > 0 && world->desc.deadline < LLMPAR__NCCL_EXCUSE ? world->desc.deadline : LLMPAR__NCCL_EXCUSE;
    for (;;) {
        double now = llmpar__nccl_now();
        int fd, there = 1, heard = 1;
        while (waiting < LLMPAR__NCCL_STRANGERS && (fd = llmpar__nccl_accept_one(listener)) >= 0) {
            stranger[waiting].fd = fd;
            stranger[waiting].since = looked;
            stranger[waiting++].got = 0;
        }
        if (waiting < LLMPAR__NCCL_STRANGERS) { /* else others may be waiting at the door */
            if ((errno == EMFILE || errno == ENFILE) && !error->status) {
                llmpar_error_set(error, LLMPAR_ERR_IO, "nccl: the meeting: rank 0 cannot take the connections of %d ranks: %s", (int)world->ranks, strerror(errno));
                error->rank = 0;
            }
            looked = now;
        }
        for (int i = 0; i < waiting; i++) {
            llmpar__nccl_stranger *s = &stranger[i];
            size_t left = sizeof s->hello - s->got;
            int keep = 0;
            long got = llmpar__nccl_receive_some(s->fd, (char *)&s->hello + s->got, left);
            if (got > 0) s->got += (size_t)got, left -= (size_t)got;
            int known = s->got < sizeof s->hello.magic || (!memcmp(s->hello.magic, LLMPAR__NCCL_MAGIC, sizeof s->hello.magic) && !llmpar__nccl_foreign(s, key, error));
            if (left && got >= 0 && known && now < s->since + 5) continue;
            if (!left) keep = llmpar__nccl_take_hello(world, all, &s->hello, key, s->fd, s->since, error);
            if (!left && !keep && error->status && llmpar__nccl_ours(&s->hello, key)) llmpar__nccl_welcome_one(world, s->fd, error, id);
            if (!keep) llmpar__nccl_close(&s->fd);
            if (i < --waiting) *s = stranger[waiting];
            i--;
        }
        for (int32_t i = 1; i < world->ranks; i++) {
            llmpar__nccl_peer *peer = &world->peer[i];
            if (error->status && peer->link.fd >= 0) {
                llmpar__nccl_welcome_one(world, peer->link.fd, error, id);
                llmpar__nccl_close(&peer->link.fd);
            }
            if (peer->there && peer->link.fd >= 0 && llmpar__nccl_gone(peer->link.fd)) {
                llmpar__nccl_close(&peer->link.fd);
                if (peer->there == 2) {
                    llmpar_error_set(error, LLMPAR_ERR_TIMEOUT, "nccl: the meeting: rank %d (%s, pid %lld) has gone away before all ranks had come", (int)i, peer->host, (long long)peer->pid);
                    error->rank = i;
                }
                peer->there = 0;
            }
            there = there && peer->there;
            heard = heard && peer->told;
        }
        if (there && !error->status) llmpar__nccl_neighbours(world, all, error);
        if (!error->status && !there && limit > 0 && now > limit) llmpar__nccl_missing(world, error);
        if (error->status && failed <= 0) failed = now;
        if (there || (error->status && heard) || (failed > 0 && now > failed + after) || (error->status == LLMPAR_ERR_TIMEOUT && limit > 0 && now > limit)) break;
        llmpar__nccl_nap(0.002);
    }
    while (waiting > 0) llmpar__nccl_close(&stranger[--waiting].fd);
    for (int32_t i = 1; i < world->ranks; i++) world->peer[i].told = 0;
    for (int32_t i = 1; i < world->ranks; i++)
        if (world->peer[i].link.fd >= 0) llmpar__nccl_welcome_one(world, world->peer[i].link.fd, error, id);
}

static llmpar_status llmpar__nccl_host(llmpar__nccl_world *world, llmpar_ctx *ctx, llmpar_status st, int32_t nccl, ncclUniqueId *id)
{
    llmpar__nccl_hello *all = (llmpar__nccl_hello *)llmpar_heap_zalloc(world->heap, (size_t)world->ranks, sizeof *all);
    llmpar__nccl_stranger *stranger = (llmpar__nccl_stranger *)llmpar_heap_zalloc(world->heap, LLMPAR__NCCL_STRANGERS, sizeof *stranger);
    llmpar_error error;
    uint64_t key = 0;
    double listens = llmpar__nccl_now();
    int listener = -1;
    if (!all || !stranger) { /* not even able to say so */
        llmpar_heap_free(world->heap, all);
        llmpar_heap_free(world->heap, stranger);
        return llmpar_error_set(world->error, LLMPAR_ERR_MEMORY, "nccl: out of memory for the meeting of %d ranks", (int)world->ranks);
    }
    if (!st) st = llmpar__nccl_files(world);
    st = llmpar__nccl_open(world, ctx, st, &listener, &key);
    llmpar_error_clear(&error);
    if (st) {
        error = *world->error;
        error.status = st;
        error.rank = 0;
    }
    llmpar__nccl_hello_fill(world, LLMPAR_OK, nccl, key, &all[0]);
    if (listener >= 0) llmpar__nccl_assemble(world, listener, all, stranger, key, id, listens, &error);
    else if (world->desc.file) llmpar__nccl_nap(LLMPAR__NCCL_AFTER); /* the file says why */
    llmpar__nccl_close(&listener);
    if (world->desc.file) unlink(world->desc.file);
    llmpar_heap_free(world->heap, all);
    llmpar_heap_free(world->heap, stranger);
    if (!st && error.status) *world->error = error;
    return error.status;
}

/* ---- the others ---- */

/* One attempt at one place. The connection, or -1. */
static int llmpar__nccl_try(const char *host, int port, const llmpar__nccl_hello *hello, double limit, const char **why)
{
    llmpar__nccl_accept accept;
    int fd = llmpar__nccl_connect(host, port, limit, why);
    if (fd < 0) return -1;
    *why = "nobody there answers as rank 0";
    double now = llmpar__nccl_now();
    if (llmpar__nccl_send_all(fd, hello, sizeof *hello, now + LLMPAR__NCCL_PATIENCE) && llmpar__nccl_receive_all(fd, &accept, sizeof accept, now + LLMPAR__NCCL_PATIENCE) == 1 && !memcmp(accept.magic, LLMPAR__NCCL_MAGIC, sizeof accept.magic) &&
        accept.key == hello->key)
        return fd;
    llmpar__nccl_close(&fd);
    return -1;
}

static int llmpar__nccl_try_all(const llmpar__nccl_place *place, const llmpar__nccl_hello *hello, double limit, const char **why)
{
    const char *at = place->hosts;
    while (*at) {
        char host[256];
        size_t length = strcspn(at, " ");
        if (length < sizeof host) {
            memcpy(host, at, length);
            host[length] = 0;
            for (int i = 0; i < place->ports && llmpar__nccl_now() < limit; i++) {
                int fd = llmpar__nccl_try(host, place->port + i, hello, limit, why);
                if (fd >= 0) return fd;
            }
        }
        at += length;
        while (*at == ' ') at++;
    }
    return -1;
}

static llmpar_status llmpar__nccl_join(llmpar__nccl_world *world, llmpar_ctx *ctx, llmpar_status st, int32_t nccl, ncclUniqueId *id)
{
    const llmpar_nccl_desc *desc = &world->desc;
    const char *address = desc->file ? NULL : desc->address ? desc->address : ctx->host_comm ? NULL : ctx->meeting;
    llmpar__nccl_place place;
    llmpar__nccl_hello hello;
    llmpar__nccl_welcome welcome;
    char text[LLMPAR__NCCL_PLACE + 1], why[512] = "";
    const char *last = "no address"; /* why it was not found, at the last place */
    int known = 0, fd = -1;
    memset(text, 0, sizeof text);
    memset(&place, 0, sizeof place);
    if (address) {
        llmpar_status read = llmpar__nccl_address(world, address, &place);
        if (read) return st ? st : read;
        known = 1;
    } else if (!desc->file) {
        llmpar_collective call;
        memset(&call, 0, sizeof call);
        call.recv = text;
        call.count = LLMPAR__NCCL_PLACE;
        call.dtype = LLMPAR_U8;
        call.tag = "nccl/meeting";
        llmpar_status heard = llmpar_broadcast(ctx->host_comm, NULL, &call);
        if (heard) return st ? st : heard;
        known = llmpar__nccl_place_read(text, &place, why);
        if (!known) return st ? st : llmpar_error_set(world->error, LLMPAR_ERR_PEER, "nccl: the meeting: rank 0: %s", why[0] ? why : "no address");
    }
    double begin = llmpar__nccl_now(), limit = desc->deadline > 0 ? begin + desc->deadline : begin + 1e9;
    if (st && limit > begin + LLMPAR__NCCL_EXCUSE) limit = begin + LLMPAR__NCCL_EXCUSE;
    for (int round = 0; fd < 0 && llmpar__nccl_now() < limit; round++) {
        if (desc->file) {
            int file = open(desc->file, O_RDONLY | O_CLOEXEC);
            ssize_t got = file >= 0 ? read(file, text, LLMPAR__NCCL_PLACE) : -1;
            if (got < 0) last = strerror(errno);
            if (file >= 0) close(file);
            text[got > 0 ? got : 0] = 0;
            known = llmpar__nccl_place_read(text, &place, why);
            if (why[0]) break;
        }
        if (known) {
            llmpar__nccl_hello_fill(world, st, nccl, place.key, &hello);
            fd = llmpar__nccl_try_all(&place, &hello, limit, &last);
        }
        if (fd < 0) llmpar__nccl_nap(round < 20 ? 0.01 : 0.1);
    }
    if (fd < 0) {
        if (st) return st;
        if (why[0]) return llmpar_error_set(world->error, LLMPAR_ERR_PEER, "nccl: the meeting: rank 0: %s", why);
        return llmpar_error_set(world->error, LLMPAR_ERR_TIMEOUT, "nccl: the meeting: rank 0 was not to be found at %s%.300s within %g s: %s", desc->file ? "the address in " : "",
                                desc->file ? desc->file : address ? address : place.hosts, desc->deadline, last);
    }
    int got = llmpar__nccl_receive_all(fd, &welcome, sizeof welcome, limit + 2 * LLMPAR__NCCL_AFTER);
    if (got != 1) {
        llmpar__nccl_close(&fd);
        if (st) return st;
        return llmpar_error_set(world->error, got ? LLMPAR_ERR_TIMEOUT : LLMPAR_ERR_PEER, "nccl: the meeting: rank 0 %s before all ranks had come", got ? "has not answered" : "has gone away");
    }
    llmpar__nccl_mend_error(&welcome.error);
    welcome.host[sizeof welcome.host - 1] = 0;
    if (st || welcome.error.status) {
        llmpar__nccl_close(&fd);
        if (!st) *world->error = welcome.error;
        return st ? st : welcome.error.status;
    }
    *id = welcome.id;
    world->peer[0].link.fd = fd;
    world->peer[0].there = 1;
    world->peer[0].pid = welcome.pid;
    snprintf(world->peer[0].host, sizeof world->peer[0].host, "%.63s", welcome.host);
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__nccl_meet(llmpar__nccl_world *world, llmpar_ctx *ctx, llmpar_status st, int32_t nccl, ncclUniqueId *id)
{
    const llmpar_nccl_desc *desc = &world->desc;
    if (world->ranks == 1) return st;
    if (!desc->file && !desc->address && !ctx->host_comm && !ctx->meeting)
        return st ? st : llmpar_error_set(world->error, LLMPAR_ERR_CONFIG, "nccl: %d ranks have no place to meet: expected a file or an address in the desc, a transport (rank threads, MPI), or MASTER_ADDR and MASTER_PORT", (int)world->ranks);
    return world->rank ? llmpar__nccl_join(world, ctx, st, nccl, id) : llmpar__nccl_host(world, ctx, st, nccl, id);
}

#undef LLMPAR__NCCL_PLACE
#undef LLMPAR__NCCL_STRANGERS
#undef LLMPAR__NCCL_PORTS
#undef LLMPAR__NCCL_PATIENCE
#undef LLMPAR__NCCL_AFTER
#undef LLMPAR__NCCL_EXCUSE
/* ==== src/nccl/control.c ==== */
/* control: the messages between the ranks of a world: how they are read and checked, what a rank does with those of rank 0, signs of life.

     every rank -- one TCP connection --> rank 0 (hub.c), which answers, and passes on what all have to know

   Rank 0's own messages take the same way without a connection. Everything here runs under world->lock, on the helper's thread or on one that has something to say. What comes from the network is checked before
   it is used: a message has the size of its kind, numbers are in range, texts end. A connection that talks nonsense is cut, and its rank counts as dead. */
#define LLMPAR__NCCL_BEATS 0.5      /* seconds between two signs of life */
#define LLMPAR__NCCL_ATTENTION 0.25 /* of silence that one look counts, at most: who was stopped itself does not blame the others */

/* ---- what came from the network ---- */

LLMPAR__PRIVATE_DEF int llmpar__nccl_mend_call(llmpar_call *call)
{
    call->axis[sizeof call->axis - 1] = call->where[sizeof call->where - 1] = call->tag[sizeof call->tag - 1] = 0;
    return call->op >= (int32_t)LLMPAR_CALL_NONE && call->op <= (int32_t)LLMPAR_CALL_SPLIT;
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_mend_error(llmpar_error *error)
{
    error->where[sizeof error->where - 1] = error->text[sizeof error->text - 1] = 0;
    if ((int)error->status < 0 || (int)error->status >= (int)LLMPAR_STATUS_COUNT) error->status = LLMPAR_ERR_INTERNAL;
}

static int llmpar__nccl_mend_position(llmpar_position *position)
{
    position->where[sizeof position->where - 1] = 0;
    return position->state >= (int32_t)LLMPAR_POSITION_OUTSIDE && position->state <= (int32_t)LLMPAR_POSITION_UNKNOWN && llmpar__nccl_mend_call(&position->now) && llmpar__nccl_mend_call(&position->last);
}

/* Bytes of a message of this kind; -1: none such comes to this rank. */
static int64_t llmpar__nccl_size(const llmpar__nccl_world *world, uint32_t kind, uint64_t said)
{
    if (kind == LLMPAR__NCCL_BEAT) return (int64_t)sizeof(llmpar_position);
    if (kind == LLMPAR__NCCL_BYE) return 0;
    if (world->rank == 0) {
        switch (kind) {
        case LLMPAR__NCCL_CALL:
        case LLMPAR__NCCL_SPLIT: return (int64_t)sizeof(llmpar__nccl_ask);
        case LLMPAR__NCCL_DROP: return (int64_t)sizeof(uint64_t);
        case LLMPAR__NCCL_FAIL: return (int64_t)sizeof(llmpar_error);
        case LLMPAR__NCCL_TOLD: return (int64_t)sizeof(llmpar_position);
        case LLMPAR__NCCL_FINISH: return 0;
        default: return -1;
        }
    }
    switch (kind) {
    case LLMPAR__NCCL_FAILED:
    case LLMPAR__NCCL_WHERE: return (int64_t)sizeof(llmpar__nccl_verdict);
    case LLMPAR__NCCL_DONE: return (int64_t)sizeof(llmpar_error);
    case LLMPAR__NCCL_GROUP: /* the only one whose size varies: the group, and a number for each of its ranks */
        if (said < sizeof(llmpar__nccl_group) || said > sizeof(llmpar__nccl_group) + (uint64_t)world->ranks * sizeof(int32_t)) return -1;
        return (int64_t)said;
    default: return -1;
    }
}

LLMPAR__PRIVATE_DEF size_t llmpar__nccl_most_in(const llmpar__nccl_world *world)
{
    size_t most = sizeof(llmpar__nccl_verdict), group = sizeof(llmpar__nccl_group) + (size_t)world->ranks * sizeof(int32_t);
    return sizeof(llmpar__nccl_head) + (world->rank && group > most ? group : most);
}

/* ---- to and from rank 0 ---- */

/* A message of rank 0. 0: nonsense. */
static int llmpar__nccl_deliver(llmpar__nccl_world *world, llmpar__nccl_kind kind, const unsigned char *bytes, size_t count)
{
    llmpar_position position;
    llmpar__nccl_verdict verdict;
    llmpar__nccl_group group;
    switch (kind) {
    case LLMPAR__NCCL_BEAT:
        memcpy(&position, bytes, sizeof position);
        if (!llmpar__nccl_mend_position(&position)) return 0;
        if (world->rank) world->peer[0].position = position;
        break;
    case LLMPAR__NCCL_FAILED:
    case LLMPAR__NCCL_WHERE:
        memcpy(&verdict, bytes, sizeof verdict);
        llmpar__nccl_mend_error(&verdict.error);
        verdict.who[sizeof verdict.who - 1] = 0;
        llmpar__nccl_convicted(world, &verdict, kind == LLMPAR__NCCL_WHERE);
        if (kind == LLMPAR__NCCL_WHERE) break;
        llmpar_record_position(world->record, &position);
        if (world->finished) position.state = (int32_t)LLMPAR_POSITION_RETURNED;
        llmpar__nccl_to_hub(world, LLMPAR__NCCL_TOLD, &position, sizeof position);
        break;
    case LLMPAR__NCCL_GROUP:
        memcpy(&group, bytes, sizeof group);
        if (group.ranks < 0 || count != sizeof group + (size_t)group.ranks * sizeof(int32_t) || group.rank < 0 || (group.ranks && group.rank >= group.ranks)) return 0;
        memcpy(world->group_member, bytes + sizeof group, (size_t)group.ranks * sizeof(int32_t));
        for (int32_t i = 0; i < group.ranks; i++)
            if (world->group_member[i] < 0 || world->group_member[i] >= world->ranks) return 0;
        world->group = group;
        break;
    case LLMPAR__NCCL_DONE: world->done = 1; break;
    case LLMPAR__NCCL_BYE: world->peer[0].bye = 1; break;
    default: return 0;
    }
    pthread_cond_broadcast(&world->wake);
    return 1;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_to_hub(llmpar__nccl_world *world, llmpar__nccl_kind kind, const void *bytes, size_t count)
{
    if (world->rank == 0) return llmpar__nccl_hub_take(world, 0, kind, (const unsigned char *)bytes, count);
    llmpar__nccl_link *link = &world->peer[0].link;
    if (link->fd < 0) return 1; /* rank 0 is gone, which is known by now or will be soon */
    if (kind == LLMPAR__NCCL_CALL && link->out_room - link->out_used < LLMPAR__NCCL_OUT / 2) return 0; /* the rest is for what is more urgent */
    if (!llmpar__nccl_link_put(link, kind, bytes, count, NULL, 0)) return 0;
    llmpar__nccl_link_flush(link); /* what breaks here breaks in the next look too */
    if (link->out_used) llmpar__nccl_poke(world);
    return 1;
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_to_rank(llmpar__nccl_world *world, int32_t rank, llmpar__nccl_kind kind, const void *a, size_t a_bytes, const void *b, size_t b_bytes)
{
    unsigned char whole[sizeof(llmpar__nccl_verdict)];
    if (rank) {
        llmpar__nccl_peer *peer = &world->peer[rank];
        if (peer->dead || peer->link.fd < 0) return;
        llmpar__nccl_link_put(&peer->link, kind, a, a_bytes, b, b_bytes); /* there is room for all that rank 0 ever says to one that reads; who does not is given up by its silence */
        llmpar__nccl_link_flush(&peer->link);
        return;
    }
    if (kind == LLMPAR__NCCL_GROUP) { /* too large for the stack */
        memcpy(&world->group, a, a_bytes);
        if (b_bytes) memcpy(world->group_member, b, b_bytes);
        pthread_cond_broadcast(&world->wake);
        return;
    }
    if (a_bytes) memcpy(whole, a, a_bytes);
    llmpar__nccl_deliver(world, kind, whole, a_bytes);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__nccl_ask_hub(llmpar__nccl_comm *tc, const llmpar_call *call, int32_t color, int32_t key, llmpar__nccl_kind kind)
{
    llmpar__nccl_world *world = tc->world;
    llmpar__nccl_ask ask;
    int message = call->op == LLMPAR_CALL_SEND || call->op == LLMPAR_CALL_RECV;
    memset(&ask, 0, sizeof ask);
    ask.context = tc->context;
    ask.from = ask.to = -1;
    if (call->op == LLMPAR_CALL_SEND) {
        ask.from = call->member;
        ask.to = call->peer;
        ask.index = ++tc->sent[call->peer];
    } else if (message) {
        ask.from = call->peer;
        ask.to = call->member;
        ask.index = ++tc->received[call->peer];
    } else {
        ask.index = ++tc->calls;
    }
    ask.fingerprint = llmpar_call_fingerprint(call);
    ask.color = color;
    ask.key = key;
    ask.call = *call;
    if (tc->comm.unchecked && kind == LLMPAR__NCCL_CALL) return LLMPAR_OK;
    if (tc->comm.unchecked) ask.fingerprint = 0; /* a split is counted, not compared */
    pthread_mutex_lock(&world->lock);
    while (!world->aborted && !llmpar__nccl_to_hub(world, kind, &ask, sizeof ask)) llmpar__nccl_await(world, llmpar__nccl_now() + 0.05); /* this rank is far ahead of the others */
    pthread_mutex_unlock(&world->lock);
    return llmpar__nccl_sound(tc, call);
}

/* ---- looking ---- */

static void llmpar__nccl_beat(llmpar__nccl_world *world, double now)
{
    llmpar_position position;
    if (now - world->last_beat < LLMPAR__NCCL_BEATS) return;
    world->last_beat = now;
    llmpar_record_position(world->record, &position);
    if (world->finished) position.state = (int32_t)LLMPAR_POSITION_RETURNED;
    for (int32_t i = world->rank ? 0 : 1; i < (world->rank ? 1 : world->ranks); i++) {
        llmpar__nccl_link *link = &world->peer[i].link;
        if (link->out_used == 0 && !world->peer[i].bye) llmpar__nccl_link_put(link, LLMPAR__NCCL_BEAT, &position, sizeof position, NULL, 0); /* else what waits there is a sign itself */
    }
}

/* The messages that have come from peer i. 0: nonsense. */
static int llmpar__nccl_read(llmpar__nccl_world *world, int32_t i)
{
    llmpar__nccl_peer *peer = &world->peer[i];
    llmpar__nccl_link *link = &peer->link;
    llmpar__nccl_head head;
    size_t at = 0;
    int sane = 1, taken = 1;
    while (sane && taken && link->in_used - at >= sizeof head) {
        memcpy(&head, link->in + at, sizeof head);
        int64_t bytes = head.word == LLMPAR__NCCL_WORD ? llmpar__nccl_size(world, head.kind, head.bytes) : -1;
        if (bytes < 0 || head.bytes != (uint64_t)bytes) {
            sane = 0;
            break;
        }
        if (link->in_used - at - sizeof head < (size_t)bytes) break;
        const unsigned char *body = link->in + at + sizeof head;
        llmpar_position position;
        if (world->rank) {
            sane = llmpar__nccl_deliver(world, (llmpar__nccl_kind)head.kind, body, (size_t)bytes);
        } else if (head.kind == LLMPAR__NCCL_BEAT || head.kind == LLMPAR__NCCL_TOLD) {
            memcpy(&position, body, sizeof position);
            position.rank = i;
            sane = llmpar__nccl_mend_position(&position);
            if (sane && (!peer->told || head.kind == LLMPAR__NCCL_TOLD)) peer->position = position; /* once the job has failed, where it was then */
            if (head.kind == LLMPAR__NCCL_TOLD) peer->told = 1;
        } else {
            int result = llmpar__nccl_hub_take(world, i, (llmpar__nccl_kind)head.kind, body, (size_t)bytes);
            sane = result >= 0;
            taken = result != 0;
        }
        if (taken) at += sizeof head + (size_t)bytes;
    }
    if (at) memmove(link->in, link->in + at, link->in_used - at);
    link->in_used -= at;
    if (at || !taken) peer->silent = 0; /* one that is not read at the moment is not silent */
    return sane;
}

/* The connection to peer i is over. */
static void llmpar__nccl_lost(llmpar__nccl_world *world, int32_t i, const char *how)
{
    llmpar__nccl_peer *peer = &world->peer[i];
    llmpar__nccl_close(&peer->link.fd);
    peer->link.in_used = peer->link.out_used = 0;
    if (peer->bye || peer->dead) return;
    peer->dead = 1;
    pthread_cond_broadcast(&world->wake);
    if (world->rank == 0) {
        llmpar__nccl_hub_lost(world, i, how);
        return;
    }
    if (world->ending) return;
    world->located = world->done = 1; /* nobody will say more */
    if (world->aborted) return;
    llmpar__nccl_verdict verdict; /* without rank 0 there is nobody to ask: every rank comes to the same */
    memset(&verdict, 0, sizeof verdict);
    verdict.other = -1;
    llmpar_error_clear(&verdict.error);
    llmpar_error_set(&verdict.error, LLMPAR_ERR_TIMEOUT, "rank 0 (%s, pid %lld) %s", peer->host, (long long)peer->pid, how);
    verdict.error.rank = 0;
    memcpy(verdict.error.where, peer->position.where, sizeof verdict.error.where);
    llmpar__nccl_convicted(world, &verdict, 1);
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_look(llmpar__nccl_world *world)
{
    double now = llmpar__nccl_now(), attention = now - world->last_look;
    char how[160];
    world->last_look = now;
    if (attention > LLMPAR__NCCL_ATTENTION) attention = LLMPAR__NCCL_ATTENTION;
    llmpar__nccl_beat(world, now);
    for (int32_t i = world->rank ? 0 : 1; i < (world->rank ? 1 : world->ranks); i++) {
        llmpar__nccl_peer *peer = &world->peer[i];
        if (peer->link.fd < 0) continue;
        int alive = 1, sane = 1;
        for (int more = peer->link.ready || peer->link.in_used; more && alive && sane;) {
            size_t before = peer->link.in_used;
            alive = llmpar__nccl_link_fill(&peer->link);
            more = peer->link.in_used == peer->link.in_room && peer->link.in_used > before;
            sane = llmpar__nccl_read(world, i);
        }
        peer->link.ready = 0;
        size_t waiting = peer->link.out_used;
        if (alive && sane) alive = llmpar__nccl_link_flush(&peer->link);
        if (waiting > peer->link.out_used) pthread_cond_broadcast(&world->wake); /* there is room again */
        peer->silent += attention;
        if (!sane) llmpar__nccl_lost(world, i, "has sent what is no message of this library");
        else if (!alive) llmpar__nccl_lost(world, i, "died: its connection broke without a farewell");
        else if (world->desc.silence > 0 && peer->silent >= world->desc.silence && !peer->bye) {
            snprintf(how, sizeof how, "has given no sign of life for %g s: stopped or unreachable", world->desc.silence);
            llmpar__nccl_lost(world, i, how);
        }
    }
    if (world->rank == 0) llmpar__nccl_hub_look(world);
}

#undef LLMPAR__NCCL_BEATS
#undef LLMPAR__NCCL_ATTENTION
/* ==== src/nccl/hub.c ==== */
/* hub: what rank 0 does for all: compares calls, makes splits, passes failures on, and knows who has finished.

   Calls. Every rank tells rank 0 of each call, as soon as it enqueues it; the first member's stays in a slot until all members have told the same, and the first that tells another is the end of the job, reported by
   both. Nothing waits for the answer: data moves meanwhile, and at worst waits on the GPU for a partner that never comes, until the helpers hear of the mismatch and free it.
   A communicator's collectives are numbered alike on its members; the messages of each pair have numbers of their own. A slot that a rank is still missing from when it has returned is an error too.
   Slots are limited: a rank that is ahead of the others by that many calls is not read until they have followed. A few are each rank's own: so what others have filled stops nobody that they may be waiting for.

   Failures. The first one that rank 0 hears of is the job's. It goes to all, they answer where they are, and when all have, or after a second, everybody gets the whole picture. */
#define LLMPAR__NCCL_SLOTS 4096 /* for all ranks .. */
#define LLMPAR__NCCL_OWN 8      /* .. beside these of each */
#define LLMPAR__NCCL_GONE 1.0 /* seconds after which the call of a rank that has returned would have come */
#define LLMPAR__NCCL_TELL 1.0 /* seconds for which positions are collected */

static void llmpar__nccl_context_free(llmpar__nccl_context *context)
{
    if (context) free(context->member);
    free(context);
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_hub_free(llmpar__nccl_world *world)
{
    while (world->contexts) llmpar__nccl_context_free(world->context[--world->contexts]);
    free(world->context);
    llmpar_heap_free(world->heap, world->slot);
    llmpar_heap_free(world->heap, world->here);
}

/* members NULL: all ranks. The first one, 0, is the world's. */
static llmpar__nccl_context *llmpar__nccl_context_make(llmpar__nccl_world *world, const int32_t *member, int32_t members)
{
    size_t n = (size_t)members;
    uint64_t id = 0;
    llmpar__nccl_context *context = (llmpar__nccl_context *)calloc(1, sizeof *context), **table = world->context;
    int32_t *all = context ? (int32_t *)calloc(4 * n, sizeof *all) : NULL;
    while (id < world->contexts && world->context[id]) id++;
    if (all && id == world->contexts) table = (llmpar__nccl_context **)realloc((void *)world->context, (size_t)(id + 1) * sizeof *table);
    if (!all || !table) {
        free(all);
        free(context);
        return NULL;
    }
    context->member = all;
    context->color = all + n;
    context->key = all + 2 * n;
    context->waits = all + 3 * n;
    for (int32_t i = 0; i < members; i++) all[i] = member ? member[i] : i;
    context->members = members;
    context->oldest = context->newest = -1;
    context->id = id;
    world->context = table;
    world->context[id] = context;
    if (id == world->contexts) world->contexts++;
    return context;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_hub_furnish(llmpar__nccl_world *world)
{
    size_t bytes = ((size_t)world->ranks + 7) / 8;
    world->slots = LLMPAR__NCCL_SLOTS + LLMPAR__NCCL_OWN * world->ranks;
    world->slot = (llmpar__nccl_slot *)llmpar_heap_zalloc(world->heap, (size_t)world->slots, sizeof *world->slot);
    world->here = (unsigned char *)llmpar_heap_zalloc(world->heap, (size_t)world->slots, bytes);
    if (!world->slot || !world->here || !llmpar__nccl_context_make(world, NULL, world->ranks)) return 0;
    for (int32_t i = 0; i < world->slots; i++) {
        world->slot[i].here = world->here + (size_t)i * bytes;
        world->slot[i].next = i + 1 < world->slots ? i + 1 : -1;
    }
    world->free_slot = 0;
    return 1;
}

static llmpar__nccl_context *llmpar__nccl_context_of(llmpar__nccl_world *world, uint64_t id)
{
    return id < world->contexts ? world->context[id] : NULL;
}

/* ---- failures ---- */

LLMPAR__PRIVATE_DEF void llmpar__nccl_hub_fail(llmpar__nccl_world *world, const llmpar_error *error, int32_t other)
{
    llmpar__nccl_verdict verdict;
    if (world->convicted) return;
    world->convicted = world->waiting_for_told = 1;
    memset(&verdict, 0, sizeof verdict);
    verdict.error = *error;
    if (error->status == LLMPAR_OK || error->status == LLMPAR_ERR_PEER) verdict.error.status = LLMPAR_ERR_INTERNAL; /* a root error is neither */
    verdict.other = other;
    for (int32_t i = world->ranks; i-- > 0;) llmpar__nccl_to_rank(world, i, LLMPAR__NCCL_FAILED, &verdict, sizeof verdict, NULL, 0);
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_hub_lost(llmpar__nccl_world *world, int32_t rank, const char *how)
{
    llmpar__nccl_peer *peer = &world->peer[rank];
    llmpar_error error;
    char where[320] = "never heard of";
    if (peer->position.state == LLMPAR_POSITION_INSIDE) llmpar_call_print(&peer->position.now, where, sizeof where);
    else if (peer->position.state != LLMPAR_POSITION_UNKNOWN) snprintf(where, sizeof where, "%s", peer->finished ? "returned" : "outside");
    llmpar_error_clear(&error);
    llmpar_error_set(&error, LLMPAR_ERR_TIMEOUT, "rank %d (%s, pid %lld) %s; it was last seen in: %s", (int)rank, peer->host, (long long)peer->pid, how, where);
    error.rank = rank;
    memcpy(error.where, peer->position.where, sizeof error.where);
    llmpar__nccl_hub_fail(world, &error, -1);
}

static void llmpar__nccl_hub_position(void *user, int32_t rank, llmpar_position *out)
{
    llmpar__nccl_world *world = (llmpar__nccl_world *)user;
    const llmpar__nccl_peer *peer = &world->peer[rank];
    if (rank == 0 && !peer->told) llmpar_record_position(world->record, out);
    else *out = peer->position;
    out->rank = rank;
    if (peer->finished) out->state = (int32_t)LLMPAR_POSITION_RETURNED;
}

static void llmpar__nccl_hub_locate(llmpar__nccl_world *world, double now)
{
    int waiting = now < world->failed_at + LLMPAR__NCCL_TELL;
    if (!world->waiting_for_told) return;
    for (int32_t i = 1; i < world->ranks && waiting; i++)
        if (!world->peer[i].told && !world->peer[i].dead && !world->peer[i].bye) break;
        else if (i + 1 == world->ranks) waiting = 0;
    if (waiting && world->ranks > 1) return;
    world->waiting_for_told = 0;
    llmpar__nccl_verdict verdict = world->verdict;
    llmpar_position_print(llmpar__nccl_hub_position, world, world->ranks, verdict.who, sizeof verdict.who);
    size_t used = strlen(verdict.error.text);
    if (verdict.error.status == LLMPAR_ERR_TIMEOUT && used + 8 < sizeof verdict.error.text)
        snprintf(verdict.error.text + used, sizeof verdict.error.text - used, "; %.*s", (int)(sizeof verdict.error.text - used - 3), verdict.who);
    for (int32_t i = world->ranks; i-- > 0;) llmpar__nccl_to_rank(world, i, LLMPAR__NCCL_WHERE, &verdict, sizeof verdict, NULL, 0);
}

/* ---- calls ---- */

/* The slots of a communicator are a list, the oldest first. */
static void llmpar__nccl_slot_free(llmpar__nccl_world *world, llmpar__nccl_slot *slot)
{
    llmpar__nccl_context *context = slot->context;
    int32_t me = (int32_t)(slot - world->slot), before = -1;
    for (int32_t i = context->oldest; i != me; i = world->slot[i].next) before = i;
    if (before < 0) context->oldest = slot->next;
    else world->slot[before].next = slot->next;
    if (context->newest == me) context->newest = before;
    if (world->peer[slot->first_rank].slots-- > LLMPAR__NCCL_OWN) world->common--;
    slot->next = world->free_slot;
    world->free_slot = me;
}

static llmpar__nccl_slot *llmpar__nccl_slot_of(llmpar__nccl_world *world, llmpar__nccl_context *context, const llmpar__nccl_ask *ask)
{
    if (ask->from < 0 && ask->index > context->highest) { /* the usual case of who comes first */
        context->highest = ask->index;
        return NULL;
    }
    for (int32_t i = context->oldest; i >= 0; i = world->slot[i].next) {
        llmpar__nccl_slot *s = &world->slot[i];
        if (s->first.index == ask->index && s->first.from == ask->from && s->first.to == ask->to) return s;
    }
    return NULL;
}

/* As llmpar__nccl_hub_take: 1, 0 or -1. */
static int llmpar__nccl_hub_call(llmpar__nccl_world *world, int32_t rank, const llmpar__nccl_ask *ask)
{
    llmpar__nccl_context *context = llmpar__nccl_context_of(world, ask->context);
    int32_t member = ask->call.member;
    if (world->convicted) return 1;
    if (!context || member < 0 || member >= context->members || context->member[member] != rank) return -1;
    if (ask->from < 0 ? ask->from != -1 || ask->to != -1 : ask->from >= context->members || ask->to < 0 || ask->to >= context->members || (member != ask->from && member != ask->to)) return -1;
    int room = world->peer[rank].slots < LLMPAR__NCCL_OWN || world->common < LLMPAR__NCCL_SLOTS;
    if (!room && ask->from < 0 && ask->index > context->highest) return 0;
    llmpar__nccl_slot *slot = llmpar__nccl_slot_of(world, context, ask);
    if (!slot) {
        if (!room) return ask->from < 0 ? -1 : 0; /* a call that all had come to before; a message that nobody has */
        int32_t me = world->free_slot;
        if (++world->peer[rank].slots > LLMPAR__NCCL_OWN) world->common++;
        slot = &world->slot[me];
        world->free_slot = slot->next;
        slot->next = -1;
        if (context->newest < 0) context->oldest = me;
        else world->slot[context->newest].next = me;
        context->newest = me;
        slot->first = *ask;
        slot->first_rank = rank;
        slot->context = context;
        slot->arrived = 0;
        slot->expected = ask->from >= 0 ? 2 : context->members;
        slot->since = llmpar__nccl_now();
        memset(slot->here, 0, ((size_t)world->ranks + 7) / 8);
    }
    if (slot->here[member / 8] & 1 << member % 8) return -1; /* twice */
    slot->here[member / 8] |= (unsigned char)(1 << member % 8);
    if (slot->first.fingerprint != ask->fingerprint) {
        llmpar_error error;
        char text[1000];
        int first = slot->first_rank < rank;
        llmpar_call_mismatch(first ? &slot->first.call : &ask->call, first ? &ask->call : &slot->first.call, text, sizeof text);
        llmpar_error_clear(&error);
        llmpar_error_set(&error, LLMPAR_ERR_MISMATCH, "%s", text);
        error.rank = first ? slot->first_rank : rank;
        memcpy(error.where, first ? slot->first.call.where : ask->call.where, sizeof error.where);
        llmpar__nccl_hub_fail(world, &error, first ? rank : slot->first_rank);
        return 1;
    }
    if (++slot->arrived == slot->expected) {
        llmpar__nccl_slot_free(world, slot);
        pthread_cond_broadcast(&world->wake); /* rank 0 itself may wait for one */
    }
    return 1;
}

/* All members have come to the split: each gets its group. */
static void llmpar__nccl_hub_groups(llmpar__nccl_world *world, llmpar__nccl_context *of)
{
    int32_t *member = (int32_t *)malloc((size_t)of->members * sizeof *member);
    int short_of_memory = !member, several = 0;
    for (int32_t i = 0; i < of->members; i++)
        for (int32_t j = 0; j < i && !several; j++) several = of->color[i] >= 0 && of->color[i] == of->color[j];
    for (int32_t i = 0; i < of->members && !short_of_memory; i++) {
        llmpar__nccl_group group;
        memset(&group, 0, sizeof group);
        group.several = several;
        if (!of->waits[i]) continue;
        if (of->color[i] < 0) {
            of->waits[i] = 0;
            llmpar__nccl_to_rank(world, of->member[i], LLMPAR__NCCL_GROUP, &group, sizeof group, NULL, 0);
            continue;
        }
        for (int32_t j = i; j < of->members; j++) { /* those of this color, each at its place by (key, rank) */
            if (!of->waits[j] || of->color[j] != of->color[i]) continue;
            int32_t at = group.ranks++;
            for (; at > 0 && of->key[member[at - 1]] > of->key[j]; at--) member[at] = member[at - 1];
            member[at] = j;
        }
        for (int32_t k = 0; k < group.ranks; k++) {
            of->waits[member[k]] = 0;
            member[k] = of->member[member[k]];
        }
        llmpar__nccl_context *made = group.ranks > 1 ? llmpar__nccl_context_make(world, member, group.ranks) : NULL; /* who is alone asks nobody */
        short_of_memory = group.ranks > 1 && !made;
        if (made) group.context = made->id;
        for (int32_t k = 0; k < group.ranks && !short_of_memory; k++) {
            group.rank = k;
            llmpar__nccl_to_rank(world, member[k], LLMPAR__NCCL_GROUP, &group, sizeof group, member, (size_t)group.ranks * sizeof *member);
        }
    }
    free(member);
    of->asked = 0;
    if (short_of_memory) {
        llmpar_error error;
        llmpar_error_clear(&error);
        llmpar_error_set(&error, LLMPAR_ERR_MEMORY, "nccl: rank 0 is out of memory for a split of %d ranks", (int)of->members);
        error.rank = 0;
        llmpar__nccl_hub_fail(world, &error, -1);
    }
}

static int llmpar__nccl_hub_split(llmpar__nccl_world *world, int32_t rank, const llmpar__nccl_ask *ask)
{
    int taken = llmpar__nccl_hub_call(world, rank, ask);
    llmpar__nccl_context *context = llmpar__nccl_context_of(world, ask->context);
    if (taken <= 0 || world->convicted || !context) return taken;
    int32_t member = ask->call.member;
    if (context->waits[member]) return -1;
    context->waits[member] = 1;
    context->color[member] = ask->color;
    context->key[member] = ask->key;
    if (++context->asked == context->members) llmpar__nccl_hub_groups(world, context);
    return 1;
}

static int llmpar__nccl_hub_drop(llmpar__nccl_world *world, int32_t rank, uint64_t id)
{
    llmpar__nccl_context *context = llmpar__nccl_context_of(world, id);
    int32_t member = 0;
    if (world->convicted) return 1; /* it may come from the midst of anything */
    while (context && member < context->members && context->member[member] != rank) member++;
    if (!context || member == context->members || context->waits[member]) return -1;
    context->waits[member] = 1; /* nothing comes from it any more */
    if (++context->dropped < context->members) return 1;
    while (context->oldest >= 0) llmpar__nccl_slot_free(world, &world->slot[context->oldest]); /* nobody will come to these any more */
    world->context[id] = NULL; /* each member has said that it says no more of it: another may have its number */
    llmpar__nccl_context_free(context);
    return 1;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_hub_take(llmpar__nccl_world *world, int32_t rank, llmpar__nccl_kind kind, const unsigned char *bytes, size_t count)
{
    llmpar__nccl_peer *peer = &world->peer[rank];
    llmpar__nccl_ask ask;
    llmpar_error error;
    uint64_t id;
    (void)count; /* that of the kind: control.c has seen to it */
    switch (kind) {
    case LLMPAR__NCCL_CALL:
    case LLMPAR__NCCL_SPLIT:
        memcpy(&ask, bytes, sizeof ask);
        if (!llmpar__nccl_mend_call(&ask.call)) return -1;
        ask.call.rank = rank;
        return kind == LLMPAR__NCCL_CALL ? llmpar__nccl_hub_call(world, rank, &ask) : llmpar__nccl_hub_split(world, rank, &ask);
    case LLMPAR__NCCL_DROP:
        memcpy(&id, bytes, sizeof id);
        return llmpar__nccl_hub_drop(world, rank, id);
    case LLMPAR__NCCL_FAIL:
        memcpy(&error, bytes, sizeof error);
        llmpar__nccl_mend_error(&error);
        error.rank = rank;
        llmpar__nccl_hub_fail(world, &error, -1);
        return 1;
    case LLMPAR__NCCL_TOLD: /* rank 0's own */
        memcpy(&peer->position, bytes, sizeof peer->position);
        peer->told = 1;
        return 1;
    case LLMPAR__NCCL_FINISH:
        peer->finished = 1;
        return 1;
    case LLMPAR__NCCL_BYE:
        peer->finished = peer->bye = 1;
        if (rank) llmpar__nccl_to_rank(world, rank, LLMPAR__NCCL_BYE, NULL, 0, NULL, 0);
        pthread_cond_broadcast(&world->wake);
        return 1;
    default: return -1;
    }
}

/* ---- the clock ---- */

/* A call that a rank has returned without. */
static void llmpar__nccl_hub_returned(llmpar__nccl_world *world, double now)
{
    for (uint64_t id = 0; id < world->contexts; id++) {
        const llmpar__nccl_context *context = world->context[id];
        for (int32_t i = context ? context->oldest : -1; i >= 0 && now >= world->slot[i].since + LLMPAR__NCCL_GONE; i = world->slot[i].next) {
            const llmpar__nccl_slot *slot = &world->slot[i];
            for (int32_t m = 0; m < context->members; m++) {
                if (slot->first.from >= 0 && m != slot->first.from && m != slot->first.to) continue;
                if ((slot->here[m / 8] & 1 << m % 8) || !world->peer[context->member[m]].finished) continue;
                llmpar_error error;
                char what[320];
                llmpar_call_print(&slot->first.call, what, sizeof what);
                llmpar_error_clear(&error);
                llmpar_error_set(&error, LLMPAR_ERR_MISMATCH, "%s: rank %d has returned without it", what, (int)context->member[m]);
                error.rank = slot->first_rank;
                memcpy(error.where, slot->first.call.where, sizeof error.where);
                llmpar__nccl_hub_fail(world, &error, -1);
                return;
            }
        }
    }
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_hub_look(llmpar__nccl_world *world)
{
    double now = llmpar__nccl_now();
    int all = 1;
    if (!world->convicted) llmpar__nccl_hub_returned(world, now);
    llmpar__nccl_hub_locate(world, now);
    for (int32_t i = 0; i < world->ranks; i++) all = all && (world->peer[i].finished || world->peer[i].dead);
    if (world->closing || !(all || (world->convicted && now > world->failed_at + 5))) return; /* who is stuck after a failure is not waited for longer */
    if (world->waiting_for_told) return;
    world->closing = 1;
    for (int32_t i = world->ranks; i-- > 0;) llmpar__nccl_to_rank(world, i, LLMPAR__NCCL_DONE, &world->verdict.error, sizeof world->verdict.error, NULL, 0);
}

#undef LLMPAR__NCCL_SLOTS
#undef LLMPAR__NCCL_OWN
#undef LLMPAR__NCCL_GONE
#undef LLMPAR__NCCL_TELL
/* ==== src/nccl/watch.c ==== */
/* watch: the helper thread of a rank, and failures.

   The helper serves the control plane, ten times a second and whenever something comes; it asks NCCL for errors of its own threads, and notices a call that has gone on for longer than the deadline. When the job has
   failed it aborts every communicator: kernels that wait for a partner end, the streams go on, and behind each collective a host call finds the failure and makes it the stream's. So a rank that waits for its GPU in
   synchronize gets the job's error from there, whatever it waited for.

   NCCL's end of a communicator waits until this rank's streams have come past its kernels, and until the peers of this machine have let go of theirs. So communicators are aborted all at once, each by a thread of its
   own: one by one, the first would wait for a kernel behind that of another, which waits for a partner that is gone. And nobody waits for these threads without limit: a peer that is stopped never lets go.

   An error that NCCL reports is often the echo of a peer's end: for a while it is kept back, in case the control plane knows better. */

#include <sched.h>

#define LLMPAR__NCCL_LOOK 0.1
#define LLMPAR__NCCL_ECHO 2.0  /* seconds for which an NCCL error waits for a better reason */
#define LLMPAR__NCCL_WAIT 2.5  /* .. and a failed call for who was where */
#define LLMPAR__NCCL_FORCE 5.0 /* .. and the helper for a thread inside an NCCL call */

LLMPAR__PRIVATE_DEF llmpar_error *llmpar__nccl_own_error(llmpar__nccl_comm *tc) { return llmpar_device_thread_error(tc->comm.device, tc->comm.error); }

LLMPAR__PRIVATE_DEF void llmpar__nccl_await(llmpar__nccl_world *world, double until)
{
    struct timespec t;
    double left = until - llmpar__nccl_now();
    if (left < 0.0005) left = 0.0005;
    if (left > 0.1) left = 0.1;
#if defined(__APPLE__)
    clock_gettime(CLOCK_REALTIME, &t);
#else
    clock_gettime(CLOCK_MONOTONIC, &t);
#endif
    t.tv_nsec += (long)(left * 1e9);
    if (t.tv_nsec >= 1000000000) {
        t.tv_nsec -= 1000000000;
        t.tv_sec++;
    }
    pthread_cond_timedwait(&world->wake, &world->lock, &t);
}

/* ---- failures ---- */

LLMPAR__PRIVATE_DEF void llmpar__nccl_convicted(llmpar__nccl_world *world, const llmpar__nccl_verdict *verdict, int final)
{
    world->verdict = *verdict;
    if (!world->aborted) world->failed_at = llmpar__nccl_now();
    if (final) world->located = 1;
    __atomic_store_n(&world->aborted, 1, __ATOMIC_SEQ_CST);
    pthread_cond_broadcast(&world->wake);
    llmpar__nccl_poke(world);
}

static void llmpar__nccl_fail_locked(llmpar__nccl_world *world, const llmpar_error *error)
{
    if (world->aborted) return;
    if (world->rank == 0) {
        llmpar__nccl_hub_fail(world, error, -1);
        return;
    }
    llmpar__nccl_verdict verdict; /* for the time being: rank 0 may have heard of another one first */
    memset(&verdict, 0, sizeof verdict);
    verdict.error = *error;
    verdict.other = -1;
    llmpar__nccl_convicted(world, &verdict, 0);
    llmpar__nccl_to_hub(world, LLMPAR__NCCL_FAIL, error, sizeof *error);
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_fail(llmpar__nccl_world *world, const llmpar_error *error)
{
    llmpar_error mine = *error;
    mine.rank = world->rank;
    pthread_mutex_lock(&world->lock);
    llmpar__nccl_fail_locked(world, &mine);
    pthread_mutex_unlock(&world->lock);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__nccl_failed(llmpar__nccl_comm *tc, llmpar_status st)
{
    llmpar_error *own = llmpar__nccl_own_error(tc);
    if (own->rank < 0) own->rank = tc->world->rank;
    if (st == LLMPAR_OK || st == LLMPAR_ERR_PEER) return st;
    llmpar_error error = *own;
    error.status = st;
    if (!error.text[0]) snprintf(error.text, sizeof error.text, "%s", llmpar_status_string(st));
    llmpar__nccl_fail(tc->world, &error);
    return st;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__nccl_sound(llmpar__nccl_comm *tc, const llmpar_call *call)
{
    llmpar__nccl_world *world = tc->world;
    char what[320];
    if (!__atomic_load_n(&world->aborted, __ATOMIC_SEQ_CST)) return LLMPAR_OK;
    if (call) llmpar_call_print(call, what, sizeof what);
    else snprintf(what, sizeof what, "communicator %s", tc->axis);
    pthread_mutex_lock(&world->lock);
    while (!world->located && llmpar__nccl_now() < world->failed_at + LLMPAR__NCCL_WAIT) llmpar__nccl_await(world, world->failed_at + LLMPAR__NCCL_WAIT);
    llmpar__nccl_verdict verdict = world->verdict;
    pthread_mutex_unlock(&world->lock);
    const llmpar_error *e = &verdict.error;
    llmpar_error *own = llmpar__nccl_own_error(tc);
    if (own->rank < 0) own->rank = world->rank;
    if ((e->rank == world->rank || verdict.other == world->rank) && e->status != LLMPAR_ERR_PEER && e->status != LLMPAR_OK) return llmpar_error_set(own, e->status, "%s", e->text);
    return llmpar_error_set(own, LLMPAR_ERR_PEER, "%s: rank %d%s%s%s failed: %s: %.500s; %s", what, (int)e->rank, e->where[0] ? " (" : "", e->where, e->where[0] ? ")" : "", llmpar_status_string(e->status), e->text,
                            verdict.who);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__nccl_settle(llmpar__nccl_comm *tc, const llmpar_call *call, const char *what, ncclResult_t result)
{
    llmpar__nccl_world *world = tc->world;
    double begin = llmpar__nccl_now();
    char last[400] = "", text[320];
    for (int looks = 0; result == ncclInProgress; looks++) {
        llmpar_status st = llmpar__nccl_sound(tc, call);
        if (st) return st;
        pthread_mutex_lock(&world->nccl_lock);
        ncclResult_t asked = tc->nccl ? ncclCommGetAsyncError(tc->nccl, &result) : ncclInProgress;
        pthread_mutex_unlock(&world->nccl_lock);
        if (asked != ncclSuccess && asked != ncclInProgress) result = asked;
        if (result != ncclInProgress) break;
        if (!call && world->desc.deadline > 0 && llmpar__nccl_now() > begin + world->desc.deadline)
            return llmpar__nccl_failed(tc, llmpar_error_set(llmpar__nccl_own_error(tc), LLMPAR_ERR_TIMEOUT, "communicator %s: %s has not ended within %g s", tc->axis, what, world->desc.deadline));
        if (looks < 20) sched_yield();
        else llmpar__nccl_nap(looks < 200 ? 0.00002 : 0.0002); /* for milliseconds, where connections are made */
    }
    if (result == ncclSuccess) return LLMPAR_OK;
    pthread_mutex_lock(&world->nccl_lock);
    const char *said = tc->nccl ? ncclGetLastError(tc->nccl) : NULL;
    if (said) snprintf(last, sizeof last, "%s%.380s", said[0] ? ": " : "", said);
    pthread_mutex_unlock(&world->nccl_lock);
    for (double until = llmpar__nccl_now() + LLMPAR__NCCL_ECHO; llmpar__nccl_now() < until && !__atomic_load_n(&world->aborted, __ATOMIC_SEQ_CST);) llmpar__nccl_nap(0.002);
    llmpar_status st = llmpar__nccl_sound(tc, call);
    if (st) return st;
    if (call) llmpar_call_print(call, text, sizeof text);
    else snprintf(text, sizeof text, "communicator %s", tc->axis);
    return llmpar__nccl_failed(tc, llmpar_error_set(llmpar__nccl_own_error(tc), result == ncclSystemError ? LLMPAR_ERR_IO : LLMPAR_ERR_INTERNAL, "%s: %s: %s%s", text, what, ncclGetErrorString(result), last));
}

/* ---- the helper ---- */

/* A call that this rank has been in for longer than the deadline. Under the lock. */
static void llmpar__nccl_late(llmpar__nccl_world *world)
{
    llmpar_position position;
    llmpar_error error;
    char what[320];
    double now = llmpar__nccl_now();
    if (world->desc.deadline <= 0 || world->aborted) return;
    llmpar_record_position(world->record, &position);
    if (position.state != LLMPAR_POSITION_INSIDE || position.time_ns != world->seen_ns) {
        world->seen_ns = position.time_ns;
        world->seen_at = now;
        return;
    }
    if (now < world->seen_at + world->desc.deadline) return;
    llmpar_call_print(&position.now, what, sizeof what);
    llmpar_error_clear(&error);
    llmpar_error_set(&error, LLMPAR_ERR_TIMEOUT, "%s: waited %g s for the other ranks", what, world->desc.deadline);
    error.rank = world->rank;
    memcpy(error.where, position.where, sizeof error.where);
    llmpar__nccl_fail_locked(world, &error);
}

/* Errors of NCCL's own threads. */
static void llmpar__nccl_inquire(llmpar__nccl_world *world)
{
    double now = llmpar__nccl_now();
    if (world->nccl_failed_at <= 0) {
        if (pthread_mutex_trylock(&world->nccl_lock)) return; /* its thread looks itself */
        for (llmpar__nccl_comm *tc = world->first; tc && world->nccl_failed_at <= 0; tc = tc->next) {
            ncclResult_t state = ncclSuccess;
            if (!tc->nccl || ncclCommGetAsyncError(tc->nccl, &state) || state == ncclSuccess || state == ncclInProgress) continue;
            const char *said = ncclGetLastError(tc->nccl);
            world->nccl_failed_at = now;
            snprintf(world->nccl_error, sizeof world->nccl_error, "communicator %s: NCCL: %s%s%.200s", tc->axis, ncclGetErrorString(state), said && said[0] ? ": " : "", said ? said : "");
        }
        pthread_mutex_unlock(&world->nccl_lock);
        return;
    }
    if (now < world->nccl_failed_at + LLMPAR__NCCL_ECHO + 1) return; /* a call that found it itself says more */
    llmpar_error error;
    llmpar_error_clear(&error);
    llmpar_error_set(&error, LLMPAR_ERR_INTERNAL, "%s", world->nccl_error);
    llmpar__nccl_fail(world, &error);
}

static void llmpar__nccl_leave(llmpar__nccl_grave *grave)
{
    if (__atomic_sub_fetch(&grave->holders, 1, __ATOMIC_SEQ_CST) == 0) free(grave);
}

static void *llmpar__nccl_dig(void *arg)
{
    llmpar__nccl_grave *grave = (llmpar__nccl_grave *)arg;
    if (grave->aborts) ncclCommAbort(grave->nccl);
    else ncclCommDestroy(grave->nccl);
    __atomic_store_n(&grave->over, 1, __ATOMIC_SEQ_CST);
    llmpar__nccl_leave(grave);
    return NULL;
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_bury(llmpar__nccl_world *world, ncclComm_t nccl, int aborts)
{
    llmpar__nccl_grave alone, *grave = (llmpar__nccl_grave *)malloc(sizeof *grave); /* the heap belongs to the rank's thread */
    pthread_t thread;
    int kept = grave != NULL;
    if (!kept) grave = &alone;
    grave->nccl = nccl;
    grave->aborts = aborts;
    grave->over = 0;
    grave->holders = 2;
    grave->next = world->graves;
    if (kept) world->graves = grave;
    if (!kept || pthread_create(&thread, NULL, llmpar__nccl_dig, grave)) llmpar__nccl_dig(grave);
    else pthread_detach(thread);
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_buried(llmpar__nccl_world *world, double seconds)
{
    for (double limit = llmpar__nccl_now() + seconds;;) {
        pthread_mutex_lock(&world->nccl_lock);
        for (llmpar__nccl_grave **at = &world->graves, *grave; (grave = *at) != NULL;) {
            if (!__atomic_load_n(&grave->over, __ATOMIC_SEQ_CST)) {
                at = &grave->next;
                continue;
            }
            *at = grave->next;
            llmpar__nccl_leave(grave);
        }
        int over = !world->graves;
        pthread_mutex_unlock(&world->nccl_lock);
        if (over || llmpar__nccl_now() > limit) return over;
        llmpar__nccl_nap(0.0002);
    }
}

/* Frees the GPU. A thread inside an NCCL call leaves it soon; but one that launches a kernel may wait for room in a queue that only the abort gets moving. */
static void llmpar__nccl_silence(llmpar__nccl_world *world)
{
    double limit = llmpar__nccl_now() + LLMPAR__NCCL_FORCE;
    int locked = 0;
    while (!locked && llmpar__nccl_now() < limit) {
        locked = !pthread_mutex_trylock(&world->nccl_lock);
        if (!locked) llmpar__nccl_nap(0.0005);
    }
    for (llmpar__nccl_comm *tc = world->first; tc; tc = tc->next) {
        if (tc->nccl) llmpar__nccl_bury(world, tc->nccl, 1);
        tc->nccl = NULL;
    }
    if (locked) pthread_mutex_unlock(&world->nccl_lock);
}

static void *llmpar__nccl_help(void *arg)
{
    llmpar__nccl_world *world = (llmpar__nccl_world *)arg;
    for (;;) {
        pthread_mutex_lock(&world->lock);
        llmpar__nccl_look(world);
        llmpar__nccl_late(world);
        int stop = world->stop, aborted = world->aborted;
        pthread_mutex_unlock(&world->lock);
        if (stop) return NULL;
        if (aborted) llmpar__nccl_silence(world);
        else llmpar__nccl_inquire(world);
        llmpar__nccl_wait_links(world, aborted ? LLMPAR__NCCL_LOOK / 10 : LLMPAR__NCCL_LOOK);
    }
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__nccl_watch_begin(llmpar__nccl_world *world)
{
    world->last_look = world->last_beat = world->seen_at = llmpar__nccl_now();
    int failed = pthread_create(&world->helper, NULL, llmpar__nccl_help, world);
    if (failed) return llmpar_error_set(world->error, LLMPAR_ERR_INTERNAL, "nccl: the helper thread could not be started: %s", strerror(failed));
    world->helping = 1;
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_watch_end(llmpar__nccl_world *world)
{
    if (!world->helping) return;
    pthread_mutex_lock(&world->lock);
    world->stop = 1;
    pthread_mutex_unlock(&world->lock);
    llmpar__nccl_poke(world);
    pthread_join(world->helper, NULL);
    world->helping = 0;
}

#undef LLMPAR__NCCL_LOOK
#undef LLMPAR__NCCL_ECHO
#undef LLMPAR__NCCL_WAIT
#undef LLMPAR__NCCL_FORCE
/* ==== src/nccl/memory.c ==== */
/* memory: device memory as NCCL wants it where it is to reach it without copies of its own: ncclMemAlloc in the place of the device's allocator. (For that it wants it registered with each communicator too,
   ncclCommRegister, which nobody does yet: not without GPUs to see it on.)

   While a world lives, device->alloc and free are the functions below; blocks of 1 MiB and more come from NCCL (which gives whole pages of 2 MiB), smaller ones from the device. Every block of NCCL's is on a list, so
   that free knows whose it is, and blocks may be older than the world or outlive it. When the last world is gone and the last such block is back, the table is as it was. */
#define LLMPAR__NCCL_SMALL ((size_t)1 << 20)
#define LLMPAR__NCCL_TOKEN 256

/* device->memory_state. */
typedef struct llmpar__nccl_memory {
    llmpar_heap *heap;
    llmpar_status (*alloc)(llmpar_device *device, size_t bytes, void **out);
    void (*free)(llmpar_device *device, void *memory, size_t bytes);
    void **block;  /* [count] of NCCL's */
    size_t count, room;
    void *token;   /* a small block of the device's, see llmpar__nccl_free */
    int32_t worlds;
} llmpar__nccl_memory;

static void llmpar__nccl_forget(llmpar_device *device)
{
    llmpar__nccl_memory *memory = (llmpar__nccl_memory *)device->memory_state;
    if (memory->worlds || memory->count) return;
    device->alloc = memory->alloc;
    device->free = memory->free;
    device->memory_state = NULL;
    device->free(device, memory->token, LLMPAR__NCCL_TOKEN);
    llmpar_heap_free(memory->heap, memory->block);
    llmpar_heap_free(memory->heap, memory);
}

static llmpar_status llmpar__nccl_alloc(llmpar_device *device, size_t bytes, void **out)
{
    llmpar__nccl_memory *memory = (llmpar__nccl_memory *)device->memory_state;
    *out = NULL;
    if (bytes < LLMPAR__NCCL_SMALL || !memory->worlds) return memory->alloc(device, bytes, out);
    if (memory->count == memory->room) {
        size_t room = memory->room ? 2 * memory->room : 64;
        void **block = (void **)llmpar_heap_alloc(memory->heap, room, sizeof *block);
        if (!block) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "nccl: out of memory for the list of %llu device blocks", (unsigned long long)room);
        if (memory->count) memcpy(block, memory->block, memory->count * sizeof *block);
        llmpar_heap_free(memory->heap, memory->block);
        memory->block = block;
        memory->room = room;
    }
    if (ncclMemAlloc(out, bytes)) return memory->alloc(device, bytes, out); /* the device says in its own words that there is no more, or finds a place that whole pages do not fit in */
    memory->block[memory->count++] = *out;
    return LLMPAR_OK;
}

static void llmpar__nccl_free(llmpar_device *device, void *block, size_t bytes)
{
    llmpar__nccl_memory *memory = (llmpar__nccl_memory *)device->memory_state;
    size_t i = memory->count;
    while (i > 0 && memory->block[i - 1] != block) i--;
    if (!block || !i) {
        memory->free(device, block, bytes);
        return;
    }
    /* The table's free waits for everything that was enqueued; NCCL's does not. So a small block of the device's own goes first, and comes back. */
    if (!memory->token) memory->alloc(device, LLMPAR__NCCL_TOKEN, &memory->token);
    memory->free(device, memory->token, LLMPAR__NCCL_TOKEN);
    memory->token = NULL;
    if (memory->alloc(device, LLMPAR__NCCL_TOKEN, &memory->token)) memory->token = NULL;
    ncclMemFree(block);
    memory->block[i - 1] = memory->block[--memory->count];
    llmpar__nccl_forget(device);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__nccl_memory_begin(llmpar_heap *heap, llmpar_device *device)
{
    if (device->size < offsetof(llmpar_device, memory_state) + sizeof device->memory_state)
        return llmpar_error_set(device->error, LLMPAR_ERR_ABI, "nccl: the table of device %s has no place for another allocator: own_memory = 1 leaves it its own", device->name);
    llmpar__nccl_memory *memory = (llmpar__nccl_memory *)device->memory_state;
    if (memory && device->alloc != llmpar__nccl_alloc) return llmpar_error_set(device->error, LLMPAR_ERR_CONFIG, "nccl: the allocator of device %s has been replaced already: own_memory = 1 leaves it as it is", device->name);
    if (!memory) {
        memory = (llmpar__nccl_memory *)llmpar_heap_zalloc(heap, 1, sizeof *memory);
        if (!memory) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "nccl: out of memory for the allocator");
        llmpar_status st = device->alloc(device, LLMPAR__NCCL_TOKEN, &memory->token);
        if (st) {
            llmpar_heap_free(heap, memory);
            return st;
        }
        memory->heap = heap;
        memory->alloc = device->alloc;
        memory->free = device->free;
        device->memory_state = memory;
        device->alloc = llmpar__nccl_alloc;
        device->free = llmpar__nccl_free;
    }
    memory->worlds++;
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_memory_end(llmpar_device *device)
{
    llmpar__nccl_memory *memory = (llmpar__nccl_memory *)device->memory_state;
    memory->worlds--;
    llmpar__nccl_forget(device);
}

#undef LLMPAR__NCCL_SMALL
#undef LLMPAR__NCCL_TOKEN
/* ==== src/nccl/collectives.c ==== */
/* collectives: the collectives of comm.h as NCCL operations and device operations on the call's stream.

   Exact reductions go on with the tree over the rank index by halves (tables/halving.h).
   A level is one group of ncclSend and ncclRecv, straight from where the parts are, and a tree_sum of two operands a part. A slice at a time, so scratch is bounded. What is small takes one exchange with everybody
   and one tree_sum of n operands instead: the same tree.
   All-reduce: the same on parts of about equal length, then the parts go to everybody.

   Calls of many blocks are packed rank by rank in scratch, so that NCCL sees a few large messages. All collectives of a rank are chained by an event (nccl.h), so there is one scratch.

   Scratch:   | a: what reductions have (1 part) | b: .. and receive (1 part) | c: packed blocks (1 part) |      a part: one slice, and a little */
#define LLMPAR__NCCL_GROUPED 8                 /* so many blocks go one by one, in a group */
#define LLMPAR__NCCL_DIRECT ((size_t)256 << 10) /* bytes that a rank may get from all others for a reduction in one exchange */
#define LLMPAR__NCCL_GRAIN ((size_t)256)

/* One call under way. */
typedef struct llmpar__nccl_job {
    llmpar__nccl_comm *tc;
    llmpar_device *device;
    llmpar_stream *stream;
    cudaStream_t native;
    llmpar_call call;
    size_t n, r, blocks, count, item, part; /* part: bytes of a block of one rank */
    char *a, *b, *c;
} llmpar__nccl_job;

/* A slice of a reduction: part j of this rank's input. */
typedef struct llmpar__nccl_slice {
    const char *base;
    size_t stride, count; /* stride > 0: part j is `count` elements at j * stride bytes; 0: piece j of `count` elements */
    void *out;            /* this rank's part of the result */
} llmpar__nccl_slice;

static size_t llmpar__nccl_min(size_t a, size_t b) { return a < b ? a : b; }
static size_t llmpar__nccl_round(size_t bytes) { return (bytes + LLMPAR__NCCL_GRAIN - 1) / LLMPAR__NCCL_GRAIN * LLMPAR__NCCL_GRAIN; }

/* Of a slice of n parts a rank keeps at most (n + 1) / 2 + 1 at once; rounding up a part costs less than a grain. All parts of a slice, each rounded, fit too. */
LLMPAR__PRIVATE_DEF size_t llmpar__nccl_part_bytes(size_t slice, int32_t ranks) { return llmpar__nccl_round(slice) + ((size_t)ranks + 2) * LLMPAR__NCCL_GRAIN; }

static size_t llmpar__nccl_piece(const llmpar__nccl_job *job, const llmpar__nccl_slice *s, size_t j, size_t *count)
{
    if (s->stride) {
        *count = s->count;
        return j * s->stride;
    }
    size_t begin = (size_t)llmpar_piece_begin((int64_t)j, (int64_t)s->count, (int64_t)job->n);
    *count = (size_t)llmpar_piece_begin((int64_t)j + 1, (int64_t)s->count, (int64_t)job->n) - begin;
    return begin * job->item;
}

/* ---- NCCL's side ---- */

/* Between these two, calls of NCCL; results are joined by llmpar__nccl_also. */
static llmpar_status llmpar__nccl_group_begin(llmpar__nccl_job *job, ncclResult_t *result)
{
    llmpar_status st = llmpar__nccl_sound(job->tc, &job->call);
    if (st) return st;
    pthread_mutex_lock(&job->tc->world->nccl_lock);
    *result = job->tc->nccl ? ncclGroupStart() : ncclInvalidUsage;
    if (job->tc->nccl) return LLMPAR_OK;
    pthread_mutex_unlock(&job->tc->world->nccl_lock); /* aborted just now */
    return llmpar__nccl_settle(job->tc, &job->call, "ncclGroupStart", ncclInvalidUsage);
}

static void llmpar__nccl_also(ncclResult_t *result, ncclResult_t one)
{
    if (one != ncclSuccess && one != ncclInProgress && *result == ncclSuccess) *result = one;
}

static llmpar_status llmpar__nccl_group_end(llmpar__nccl_job *job, ncclResult_t result, const char *what)
{
    ncclResult_t end = ncclGroupEnd();
    pthread_mutex_unlock(&job->tc->world->nccl_lock);
    return llmpar__nccl_settle(job->tc, &job->call, what, result != ncclSuccess ? result : end);
}

static void llmpar__nccl_send_part(llmpar__nccl_job *job, ncclResult_t *result, const void *from, size_t bytes, size_t to)
{
    if (bytes) llmpar__nccl_also(result, ncclSend(from, bytes, ncclInt8, (int)to, job->tc->nccl, job->native));
}

static void llmpar__nccl_recv_part(llmpar__nccl_job *job, ncclResult_t *result, void *to, size_t bytes, size_t from)
{
    if (bytes) llmpar__nccl_also(result, ncclRecv(to, bytes, ncclInt8, (int)from, job->tc->nccl, job->native));
}

/* Part i of `in` goes to rank i (one part for all: stride_in 0), and its own for this rank to out + i * stride_out; this rank's own too. */
static llmpar_status llmpar__nccl_exchange(llmpar__nccl_job *job, const char *in, size_t stride_in, char *out, size_t stride_out, size_t bytes)
{
    ncclResult_t result;
    llmpar_status st = LLMPAR_OK;
    const char *own = in + job->r * stride_in;
    if (own != out + job->r * stride_out && bytes) st = job->device->copy(job->device, job->stream, out + job->r * stride_out, own, bytes);
    if (!st) st = llmpar__nccl_group_begin(job, &result);
    if (st) return st;
    for (size_t k = 1; k < job->n; k++) {
        size_t to = (job->r + k) % job->n, from = (job->r + job->n - k) % job->n;
        llmpar__nccl_send_part(job, &result, in + to * stride_in, bytes, to);
        llmpar__nccl_recv_part(job, &result, out + from * stride_out, bytes, from);
    }
    return llmpar__nccl_group_end(job, result, "ncclSend, ncclRecv");
}

static llmpar_status llmpar__nccl_gather(llmpar__nccl_job *job, const char *in, char *out, size_t bytes, size_t blocks)
{
    ncclResult_t result;
    llmpar_status st = llmpar__nccl_group_begin(job, &result);
    if (st) return st;
    for (size_t i = 0; i < blocks; i++) llmpar__nccl_also(&result, ncclAllGather(in + i * bytes, out + i * bytes * job->n, bytes, ncclInt8, job->tc->nccl, job->native));
    return llmpar__nccl_group_end(job, result, "ncclAllGather");
}

/* ---- the device's side ---- */

static llmpar_status llmpar__nccl_combine(llmpar__nccl_job *job, const void *const *in, int32_t n, size_t count, void *out)
{
    llmpar_tree_sum_args args;
    if (!count) return LLMPAR_OK;
    memset(&args, 0, sizeof args);
    args.in = in;
    args.n = n;
    args.count = count;
    args.out = out;
    args.dtype = (llmpar_dtype)job->call.dtype;
    return job->call.reduce == LLMPAR_MAX ? job->device->max(job->device, job->stream, &args) : job->device->tree_sum(job->device, job->stream, &args);
}

/* `blocks` blocks of one rank between [blocks][n][count] (at its place) and [blocks][count]. */
static llmpar_status llmpar__nccl_rows(llmpar__nccl_job *job, int packs, char *spread, char *packed, size_t blocks)
{
    llmpar_copy_rows_args args;
    memset(&args, 0, sizeof args);
    args.rows = (int64_t)blocks;
    args.width = (int64_t)job->count;
    args.ld_in = (int64_t)(packs ? job->n * job->count : job->count);
    args.ld_out = (int64_t)(packs ? job->count : job->n * job->count);
    args.size = job->item;
    args.in = packs ? spread : packed;
    args.out = packs ? packed : spread;
    return job->device->copy_rows(job->device, job->stream, &args);
}

/* Blocks that are packed at a time; 0: they go one by one. */
static size_t llmpar__nccl_chunk(const llmpar__nccl_job *job)
{
    size_t fit = job->part ? job->tc->world->desc.slice / (job->part * job->n) : 0;
    return job->blocks <= LLMPAR__NCCL_GROUPED || fit < 2 ? 0 : llmpar__nccl_min(fit, job->blocks);
}

/* ---- reductions ---- */

/* One slice, by exchange with everybody. Fits. */
static llmpar_status llmpar__nccl_at_once(llmpar__nccl_job *job, const llmpar__nccl_slice *s, size_t room)
{
    const void *in[LLMPAR__NCCL_DIRECT / LLMPAR__NCCL_GRAIN];
    ncclResult_t result;
    size_t mine, count, own = llmpar__nccl_piece(job, s, job->r, &mine);
    llmpar_status st = llmpar__nccl_group_begin(job, &result);
    if (st) return st;
    for (size_t k = 1; k < job->n; k++) {
        size_t to = (job->r + k) % job->n, from = (job->r + job->n - k) % job->n, offset = llmpar__nccl_piece(job, s, to, &count);
        llmpar__nccl_send_part(job, &result, s->base + offset, count * job->item, to);
        llmpar__nccl_recv_part(job, &result, job->a + from * room, mine * job->item, from);
    }
    st = llmpar__nccl_group_end(job, result, "ncclSend, ncclRecv");
    for (size_t i = 0; i < job->n; i++) in[i] = i == job->r ? s->base + own : job->a + i * room;
    return st ? st : llmpar__nccl_combine(job, in, (int32_t)job->n, mine, s->out);
}

static llmpar_status llmpar__nccl_halve(llmpar__nccl_job *job, const llmpar__nccl_slice *s)
{
    llmpar__nccl_comm *tc = job->tc;
    size_t n = job->n, room = llmpar__nccl_round((s->stride ? s->count : (s->count + n - 1) / n) * job->item), count;
    ncclResult_t result;
    llmpar_status st = LLMPAR_OK;
    if (n * room <= LLMPAR__NCCL_DIRECT && n * room <= tc->world->part_bytes) return llmpar__nccl_at_once(job, s, room);
    if (n == 1) return s->out == s->base ? LLMPAR_OK : job->device->copy(job->device, job->stream, s->out, s->base, s->count * job->item);
    char *partial = job->a, *incoming = job->b;
    int32_t held = (int32_t)n, levels = tc->halving.levels, *kept = tc->halving.kept;
    for (int32_t i = 0; i < held; i++) kept[i] = i;
    for (int32_t l = 0; l < levels && !st; l++) {
        const llmpar_halving_level *level = &tc->halving.level[l];
        const int32_t *label = tc->halving.label + (size_t)l * n;
        int32_t mine = level->mine, keeps = 0;
        st = llmpar__nccl_group_begin(job, &result);
        if (st) return st;
        for (int32_t i = 0; i < held; i++) {
            size_t offset = llmpar__nccl_piece(job, s, (size_t)kept[i], &count);
            const char *from = l ? partial + (size_t)i * room : s->base + offset;
            int32_t c = label[kept[i]];
            if (c == mine) llmpar__nccl_recv_part(job, &result, incoming + (size_t)keeps++ * room, count * job->item, (size_t)level->partner);
            else llmpar__nccl_send_part(job, &result, from, count * job->item, (size_t)(level->lo + c));
        }
        st = llmpar__nccl_group_end(job, result, "ncclSend, ncclRecv");
        keeps = 0;
        for (int32_t i = 0; i < held && !st; i++) {
            if (label[kept[i]] != mine) continue;
            size_t offset = llmpar__nccl_piece(job, s, (size_t)kept[i], &count);
            const void *own = l ? partial + (size_t)i * room : s->base + offset, *theirs = incoming + (size_t)keeps * room, *in[2];
            in[0] = level->left ? own : theirs;
            in[1] = level->left ? theirs : own;
            st = llmpar__nccl_combine(job, in, 2, count, l + 1 == levels ? s->out : (void *)(partial + (size_t)keeps * room));
            kept[keeps++] = kept[i];
        }
        held = keeps;
    }
    return st;
}

static int llmpar__nccl_is_fast(const llmpar__nccl_job *job) { return job->tc->world->desc.fast && job->call.reduce == LLMPAR_SUM; }

static ncclDataType_t llmpar__nccl_type(const llmpar__nccl_job *job)
{
    switch (job->call.dtype) {
    case LLMPAR_F32: return ncclFloat32;
    case LLMPAR_F64: return ncclFloat64;
    case LLMPAR_I64: return ncclInt64;
    default: return ncclUint64;
    }
}

/* [n][count] at `send` (parts `stride` bytes apart) -> [count] at recv. */
static llmpar_status llmpar__nccl_scatter_block(llmpar__nccl_job *job, const char *send, size_t count, char *recv)
{
    size_t step = job->tc->world->desc.slice / job->item / job->n;
    llmpar__nccl_slice s;
    llmpar_status st = LLMPAR_OK;
    if (!step) step = 1;
    memset(&s, 0, sizeof s);
    s.stride = count * job->item;
    for (size_t at = 0; at < count && !st; at += step) {
        s.base = send + at * job->item;
        s.count = llmpar__nccl_min(step, count - at);
        s.out = recv + at * job->item;
        st = llmpar__nccl_halve(job, &s);
    }
    return st;
}

static llmpar_status llmpar__nccl_fast_scatter(llmpar__nccl_job *job, const char *send, char *recv, size_t count, size_t blocks)
{
    ncclResult_t result;
    llmpar_status st = llmpar__nccl_group_begin(job, &result);
    if (st) return st;
    for (size_t i = 0; i < blocks; i++)
        llmpar__nccl_also(&result, ncclReduceScatter(send + i * job->n * count * job->item, recv + i * count * job->item, count, llmpar__nccl_type(job), ncclSum, job->tc->nccl, job->native));
    return llmpar__nccl_group_end(job, result, "ncclReduceScatter");
}

static llmpar_status llmpar__nccl_do_reduce_scatter(llmpar__nccl_job *job, const char *send, char *recv)
{
    size_t chunk = llmpar__nccl_chunk(job), n = job->n;
    llmpar_status st = LLMPAR_OK;
    if (!chunk && llmpar__nccl_is_fast(job)) {
        for (size_t i = 0; i < job->blocks && !st; i += LLMPAR__NCCL_GROUPED)
            st = llmpar__nccl_fast_scatter(job, send + i * n * job->part, recv + i * job->part, job->count, llmpar__nccl_min(LLMPAR__NCCL_GROUPED, job->blocks - i));
        return st;
    }
    for (size_t i = 0; i < job->blocks && !chunk && !st; i++) st = llmpar__nccl_scatter_block(job, send + i * n * job->part, job->count, recv + i * job->part);
    for (size_t i = 0; i < job->blocks && chunk && !st; i += chunk) {
        size_t now = llmpar__nccl_min(chunk, job->blocks - i), packed = now * job->part;
        for (size_t k = 0; k < n && !st; k++) st = llmpar__nccl_rows(job, 1, (char *)(uintptr_t)send + (i * n + k) * job->part, job->c + k * packed, now);
        if (!st) st = llmpar__nccl_is_fast(job) ? llmpar__nccl_fast_scatter(job, job->c, recv + i * job->part, now * job->count, 1) : llmpar__nccl_scatter_block(job, job->c, now * job->count, recv + i * job->part);
    }
    return st;
}

static llmpar_status llmpar__nccl_do_all_reduce(llmpar__nccl_job *job, const char *send, char *recv)
{
    size_t n = job->n, r = job->r, total = job->count * job->blocks, step = job->tc->world->desc.slice / job->item;
    ncclResult_t result;
    llmpar__nccl_slice s;
    llmpar_status st = LLMPAR_OK;
    if (llmpar__nccl_is_fast(job)) {
        st = llmpar__nccl_group_begin(job, &result);
        if (st) return st;
        llmpar__nccl_also(&result, ncclAllReduce(send, recv, total, llmpar__nccl_type(job), ncclSum, job->tc->nccl, job->native));
        return llmpar__nccl_group_end(job, result, "ncclAllReduce");
    }
    size_t bytes = total * job->item, room = llmpar__nccl_round(bytes);
    if (n * room <= LLMPAR__NCCL_DIRECT && n * room <= job->tc->world->part_bytes) { /* everybody adds everything up */
        const void *in[LLMPAR__NCCL_DIRECT / LLMPAR__NCCL_GRAIN];
        st = llmpar__nccl_gather(job, send, job->a, bytes, 1);
        for (size_t i = 0; i < n; i++) in[i] = job->a + i * bytes;
        return st ? st : llmpar__nccl_combine(job, in, (int32_t)n, total, recv);
    }
    if (step < n) step = n;
    memset(&s, 0, sizeof s);
    for (size_t at = 0; at < total && !st; at += step) {
        size_t mine, theirs;
        s.base = send + at * job->item;
        s.count = llmpar__nccl_min(step, total - at);
        char *out = recv + at * job->item, *own = out + llmpar__nccl_piece(job, &s, r, &mine);
        s.out = own;
        st = llmpar__nccl_halve(job, &s);
        if (!st && s.count % n == 0) {
            st = llmpar__nccl_gather(job, own, out, mine * job->item, 1);
        } else if (!st) {
            st = llmpar__nccl_group_begin(job, &result);
            if (st) return st;
            for (size_t k = 1; k < n; k++) {
                size_t from = (r + n - k) % n, offset = llmpar__nccl_piece(job, &s, from, &theirs);
                llmpar__nccl_send_part(job, &result, own, mine * job->item, (r + k) % n);
                llmpar__nccl_recv_part(job, &result, out + offset, theirs * job->item, from);
            }
            st = llmpar__nccl_group_end(job, result, "ncclSend, ncclRecv");
        }
    }
    return st;
}

/* ---- the others ---- */

static llmpar_status llmpar__nccl_do_all_gather(llmpar__nccl_job *job, const char *send, char *recv)
{
    size_t chunk = llmpar__nccl_chunk(job), n = job->n;
    llmpar_status st = LLMPAR_OK;
    for (size_t i = 0; i < job->blocks && !chunk && !st; i += LLMPAR__NCCL_GROUPED)
        st = llmpar__nccl_gather(job, send + i * job->part, recv + i * n * job->part, job->part, llmpar__nccl_min(LLMPAR__NCCL_GROUPED, job->blocks - i));
    for (size_t i = 0; i < job->blocks && chunk && !st; i += chunk) {
        size_t now = llmpar__nccl_min(chunk, job->blocks - i), packed = now * job->part;
        st = llmpar__nccl_gather(job, send + i * job->part, job->c, packed, 1);
        for (size_t k = 0; k < n && !st; k++) st = llmpar__nccl_rows(job, 0, recv + (i * n + k) * job->part, job->c + k * packed, now);
    }
    return st;
}

static llmpar_status llmpar__nccl_do_all_to_all(llmpar__nccl_job *job, const char *send, char *recv)
{
    size_t chunk = llmpar__nccl_chunk(job), n = job->n;
    llmpar_status st = LLMPAR_OK;
    for (size_t i = 0; i < job->blocks && !chunk && !st; i++) st = llmpar__nccl_exchange(job, send + i * n * job->part, job->part, recv + i * n * job->part, job->part, job->part);
    for (size_t i = 0; i < job->blocks && chunk && !st; i += chunk) {
        size_t now = llmpar__nccl_min(chunk, job->blocks - i), packed = now * job->part;
        for (size_t k = 0; k < n && !st; k++) st = llmpar__nccl_rows(job, 1, (char *)(uintptr_t)send + (i * n + k) * job->part, job->c + k * packed, now);
        if (!st) st = llmpar__nccl_exchange(job, job->c, packed, job->a, packed, packed);
        for (size_t k = 0; k < n && !st; k++) st = llmpar__nccl_rows(job, 0, recv + (i * n + k) * job->part, job->a + k * packed, now);
    }
    return st;
}

static llmpar_status llmpar__nccl_do_broadcast(llmpar__nccl_job *job, const char *send, char *recv)
{
    ncclResult_t result;
    int root = (int)job->r == job->call.root;
    size_t bytes = job->part * job->blocks;
    llmpar_status st = llmpar__nccl_group_begin(job, &result);
    if (st) return st;
    char *buffer = root ? (char *)(uintptr_t)send : recv; /* the root's receive buffer may be none: it is filled below */
    llmpar__nccl_also(&result, ncclBroadcast(buffer, buffer, bytes, ncclInt8, (int)job->call.root, job->tc->nccl, job->native));
    st = llmpar__nccl_group_end(job, result, "ncclBroadcast");
    return st || !root || !recv || recv == send ? st : job->device->copy(job->device, job->stream, recv, send, bytes);
}

static llmpar_status llmpar__nccl_do_message(llmpar__nccl_job *job, const char *send, char *recv)
{
    ncclResult_t result;
    llmpar_status st = llmpar__nccl_group_begin(job, &result);
    if (st) return st;
    if (job->call.op == LLMPAR_CALL_SEND) llmpar__nccl_send_part(job, &result, send, job->part * job->blocks, (size_t)job->call.peer);
    else llmpar__nccl_recv_part(job, &result, recv, job->part * job->blocks, (size_t)job->call.peer);
    return llmpar__nccl_group_end(job, result, job->call.op == LLMPAR_CALL_SEND ? "ncclSend" : "ncclRecv");
}

static llmpar_status llmpar__nccl_do(llmpar__nccl_job *job, const char *send, char *recv)
{
    if (job->call.op == LLMPAR_CALL_BARRIER && job->n > 1) return llmpar__nccl_gather(job, job->a + job->r, job->a, 1, 1);
    if (!job->part) return LLMPAR_OK;
    if (job->n == 1 && !job->tc->nccl) return recv && recv != send ? job->device->copy(job->device, job->stream, recv, send, job->part * job->blocks) : LLMPAR_OK;
    switch (job->call.op) {
    case LLMPAR_CALL_ALL_GATHER: return llmpar__nccl_do_all_gather(job, send, recv);
    case LLMPAR_CALL_REDUCE_SCATTER: return llmpar__nccl_do_reduce_scatter(job, send, recv);
    case LLMPAR_CALL_ALL_REDUCE: return llmpar__nccl_do_all_reduce(job, send, recv);
    case LLMPAR_CALL_BROADCAST: return llmpar__nccl_do_broadcast(job, send, recv);
    case LLMPAR_CALL_ALL_TO_ALL: return llmpar__nccl_do_all_to_all(job, send, recv);
    default: return llmpar__nccl_do_message(job, send, recv);
    }
}

/* ---- in order ---- */

/* The argument of the host call behind a collective. */
typedef struct llmpar__nccl_mark {
    llmpar__nccl_comm *tc;
    llmpar_call call;
} llmpar__nccl_mark;

/* The stream has come past the collective: because it is done, or because it was aborted. */
static llmpar_status llmpar__nccl_after(void *arg)
{
    const llmpar__nccl_mark *mark = (const llmpar__nccl_mark *)arg;
    return llmpar__nccl_sound(mark->tc, &mark->call);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__nccl_enqueue(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *given, int32_t op)
{
    llmpar__nccl_comm *tc = (llmpar__nccl_comm *)comm->state;
    llmpar__nccl_world *world = tc->world;
    llmpar_device *device = comm->device;
    llmpar__nccl_job job;
    memset(&job, 0, sizeof job);
    job.tc = tc;
    job.device = device;
    job.stream = stream;
    llmpar_call_describe(comm, (llmpar_call_op)op, given, &job.call);
    if (job.call.rank < 0) job.call.rank = world->rank;
    if (llmpar_device_thread_error(device, NULL))
        return llmpar__nccl_failed(tc, llmpar_error_set(llmpar__nccl_own_error(tc), LLMPAR_ERR_UNSUPPORTED, "%s \"%s\" on %s: called on the thread of a stream; calls of NCCL belong to the rank's own thread", llmpar_call_op_name((llmpar_call_op)op), job.call.tag, tc->axis));
    job.native = (cudaStream_t)device->native_stream(device, stream);
    job.n = (size_t)comm->ranks;
    job.r = (size_t)comm->rank;
    job.blocks = (size_t)job.call.blocks;
    job.count = (size_t)job.call.count;
    job.item = llmpar_dtype_size((llmpar_dtype)job.call.dtype); /* a barrier has none */
    job.part = job.count * job.item;
    job.a = world->scratch;
    job.b = job.a + world->part_bytes;
    job.c = job.b + world->part_bytes;
    llmpar_status st = llmpar__nccl_sound(tc, &job.call);
    if (!st && comm->ranks > 1) st = llmpar__nccl_ask_hub(tc, &job.call, 0, 0, LLMPAR__NCCL_CALL);
    if (!st && world->pending) st = stream ? device->event_wait(device, stream, world->last) : device->event_synchronize(device, world->last);
    if (!st) st = llmpar__nccl_do(&job, (const char *)given->send, (char *)given->recv);
    if (!st && stream) {
        llmpar__nccl_mark mark;
        mark.tc = tc;
        mark.call = job.call;
        st = device->host_call(device, stream, llmpar__nccl_after, &mark, sizeof mark);
        if (!st) st = device->event_record(device, stream, world->last);
        if (!st) world->pending = 1;
    } else if (!st) {
        st = device->synchronize(device, NULL); /* without a stream: now */
        world->pending = 0;
        if (!st) st = llmpar__nccl_sound(tc, &job.call);
    }
    return st ? llmpar__nccl_failed(tc, st) : LLMPAR_OK;
}

#undef LLMPAR__NCCL_GROUPED
#undef LLMPAR__NCCL_DIRECT
#undef LLMPAR__NCCL_GRAIN
/* ==== src/nccl/world.c ==== */
/* world: communicators on NCCL: the world, its splits, and their end.

     create   checks -> meeting (meet.c) -> helper thread -> ncclCommInitRankConfig -> scratch, allocator
     split    color and key to rank 0 -> group -> ncclCommSplit of all members, unless all end up alone
     destroy  waits for the last collective -> ncclCommFinalize, ncclCommDestroy (beside this thread: it waits for the peers'); with the last communicator: farewell, helper, connections

   All communicators are non-blocking, so that a thread never stays in NCCL while the job fails elsewhere. */
#define LLMPAR__NCCL_FAREWELL 3.0 /* seconds for which goodbyes are exchanged, and after a failure rank 0 waits for the others */

static llmpar_status llmpar__nccl_split(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out);
static void llmpar__nccl_destroy(llmpar_comm *comm);

static void llmpar__nccl_abort(llmpar_comm *comm, const llmpar_error *error)
{
    llmpar__nccl_comm *tc = (llmpar__nccl_comm *)comm->state;
    llmpar__nccl_fail(tc->world, error);
}

static llmpar_status llmpar__nccl_resolve(llmpar__nccl_world *world, const llmpar_nccl_desc *given)
{
    llmpar_nccl_desc *desc = &world->desc;
    if (given) *desc = *given;
    if (desc->deadline != desc->deadline || desc->silence != desc->silence)
        return llmpar_error_set(world->error, LLMPAR_ERR_ARGUMENT, "nccl: deadline or silence is not a number, expected seconds, 0 (600, 10) or negative (none)");
    if (desc->silence > 0 && desc->silence < 1.5) return llmpar_error_set(world->error, LLMPAR_ERR_ARGUMENT, "nccl: silence = %g seconds, expected at least 1.5: a sign of life comes every half second", desc->silence);
    if (desc->slice && (desc->slice < 8 * (size_t)world->ranks || desc->slice > (size_t)1 << 30))
        return llmpar_error_set(world->error, LLMPAR_ERR_ARGUMENT, "nccl: slice = %llu bytes, expected 0 (16 MiB), or 8 bytes a rank to 1 GiB", (unsigned long long)desc->slice);
    if (desc->file && !*desc->file) return llmpar_error_set(world->error, LLMPAR_ERR_ARGUMENT, "nccl: file = \"\", expected a path that all ranks see, or none");
    desc->deadline = desc->deadline < 0 ? 0 : desc->deadline > 0 ? desc->deadline : 600;
    desc->silence = desc->silence < 0 ? 0 : desc->silence > 0 ? desc->silence : 10;
    if (!desc->slice) desc->slice = (size_t)16 << 20;
    return LLMPAR_OK;
}

/* Everything that takes host memory. */
static llmpar_status llmpar__nccl_furnish(llmpar__nccl_world *world)
{
    size_t n = (size_t)world->ranks, links = world->rank ? 1 : n, most = llmpar__nccl_most_in(world);
    int there = 1;
    world->peer = (llmpar__nccl_peer *)llmpar_heap_zalloc(world->heap, links, sizeof *world->peer);
    world->group_member = (int32_t *)llmpar_heap_zalloc(world->heap, n, sizeof *world->group_member);
    world->polled = (struct pollfd *)llmpar_heap_zalloc(world->heap, 1 + links, sizeof *world->polled);
    world->polled_peer = (int32_t *)llmpar_heap_zalloc(world->heap, 1 + links, sizeof *world->polled_peer);
    for (size_t i = 0; world->peer && i < links; i++) world->peer[i].link.fd = -1; /* 0 is somebody's */
    if (!world->peer || !world->group_member || !world->polled || !world->polled_peer) return llmpar_error_set(world->error, LLMPAR_ERR_MEMORY, "nccl: out of memory for %d ranks", (int)world->ranks);
    for (size_t i = 0; i < links; i++) {
        world->peer[i].position.rank = (int32_t)i;
        world->peer[i].position.state = (int32_t)LLMPAR_POSITION_UNKNOWN;
        if (world->rank == 0 && i == 0) continue; /* itself */
        /* Rank 0 says a bounded number of things to each; a rank, whatever there is room for. */
        there = there && llmpar__nccl_link_make(world->heap, &world->peer[i].link, world->rank ? 2 * most : 8192, world->rank ? LLMPAR__NCCL_OUT : 4 * sizeof(llmpar__nccl_verdict) + 8192 + n * sizeof(int32_t));
    }
    if (world->rank == 0) there = there && llmpar__nccl_hub_furnish(world);
    if (there && !world->record) {
        there = !llmpar_record_create(world->heap, world->rank, (uint64_t)(world->desc.deadline < 1e12 ? world->desc.deadline * 1000 : 0), &world->record);
        world->owns_record = there;
    }
    if (!there)
        return llmpar_error_set(world->error, LLMPAR_ERR_MEMORY, "nccl: out of memory for the connections of %d ranks", (int)world->ranks);
    if (!llmpar__nccl_pipe(world->pipe)) return llmpar_error_set(world->error, LLMPAR_ERR_IO, "nccl: the system gives no pipe: %s", strerror(errno));
    return LLMPAR_OK;
}

static int llmpar__nccl_all_said_bye(const llmpar__nccl_world *world)
{
    for (int32_t i = world->rank ? 0 : 1; i < (world->rank ? 1 : world->ranks); i++)
        if (!world->peer[i].bye && !world->peer[i].dead && world->peer[i].link.fd >= 0) return 0;
    return 1;
}

/* The last messages of this rank. Rank 0 stays until all the others have said theirs: it carries what they still have to tell each other. They stay until it has read theirs, which takes long where this rank is far ahead:
   what a closed connection still holds is lost. */
static void llmpar__nccl_farewell(llmpar__nccl_world *world)
{
    double limit = 0;
    if (!world->helping || world->ranks == 1) return;
    pthread_mutex_lock(&world->lock);
    if (!world->finished) llmpar__nccl_to_hub(world, LLMPAR__NCCL_FINISH, NULL, 0);
    world->finished = 1;
    if (world->rank) {
        world->ending = 1;
        llmpar__nccl_to_hub(world, LLMPAR__NCCL_BYE, NULL, 0);
        if (world->desc.deadline > 0) limit = llmpar__nccl_now() + (world->desc.deadline > LLMPAR__NCCL_FAREWELL ? world->desc.deadline : LLMPAR__NCCL_FAREWELL);
    }
    while (!llmpar__nccl_all_said_bye(world)) {
        double now = llmpar__nccl_now();
        if (world->aborted && (limit <= 0 || limit > now + LLMPAR__NCCL_FAREWELL)) limit = now + LLMPAR__NCCL_FAREWELL;
        if (limit > 0 && now > limit) break;
        llmpar__nccl_await(world, now + 0.1);
    }
    pthread_mutex_unlock(&world->lock);
}

/* After all communicators. */
static void llmpar__nccl_world_free(llmpar__nccl_world *world)
{
    llmpar_heap *heap = world->heap;
    llmpar_device *device = world->device;
    llmpar__nccl_farewell(world);
    llmpar__nccl_watch_end(world);
    llmpar__nccl_buried(world, 2 * LLMPAR__NCCL_FAREWELL); /* who is not through by then has a peer that never lets go */
    for (llmpar__nccl_grave *grave = world->graves, *next; grave; grave = next) {
        next = grave->next;
        if (__atomic_sub_fetch(&grave->holders, 1, __ATOMIC_SEQ_CST) == 0) free(grave);
    }
    if (world->last) device->event_destroy(device, world->last);
    if (world->scratch) device->free(device, world->scratch, world->scratch_bytes);
    if (world->remembers) llmpar__nccl_memory_end(device);
    for (int32_t i = 0; world->peer && i < (world->rank ? 1 : world->ranks); i++) {
        llmpar__nccl_close(&world->peer[i].link.fd);
        llmpar_heap_free(heap, world->peer[i].link.in);
        llmpar_heap_free(heap, world->peer[i].link.out);
    }
    llmpar__nccl_close(&world->pipe[0]);
    llmpar__nccl_close(&world->pipe[1]);
    llmpar__nccl_hub_free(world);
    if (world->owns_record) llmpar_record_destroy(world->record);
    llmpar_heap_free(heap, world->peer);
    llmpar_heap_free(heap, world->polled);
    llmpar_heap_free(heap, world->polled_peer);
    llmpar_heap_free(heap, world->group_member);
    pthread_cond_destroy(&world->wake);
    pthread_mutex_destroy(&world->lock);
    pthread_mutex_destroy(&world->nccl_lock);
    llmpar_heap_free(heap, world);
}

/* The last one to hold the world frees it. */
static void llmpar__nccl_release(llmpar__nccl_world *world)
{
    if (--world->comms == 0) llmpar__nccl_world_free(world);
}

static llmpar__nccl_world *llmpar__nccl_world_make(llmpar_ctx *ctx, llmpar_device *device)
{
    llmpar__nccl_world *world = (llmpar__nccl_world *)llmpar_heap_zalloc(&ctx->heap, 1, sizeof *world);
    pthread_condattr_t attributes;
    if (!world) return NULL;
    world->heap = &ctx->heap;
    world->device = device;
    world->error = &ctx->error;
    world->rank = ctx->rank;
    world->ranks = ctx->world;
    world->pipe[0] = world->pipe[1] = -1;
    world->free_slot = -1;
    world->comms = 1; /* whoever makes it */
    if (ctx->host_comm && ctx->host_comm->size >= offsetof(llmpar_comm, record) + sizeof ctx->host_comm->record) world->record = ctx->host_comm->record; /* one of all calls of the rank */
    llmpar__nccl_own_host(world->host, sizeof world->host);
    llmpar_error_clear(&world->verdict.error);
    world->verdict.other = -1;
    pthread_mutex_init(&world->lock, NULL);
    pthread_mutex_init(&world->nccl_lock, NULL);
    pthread_condattr_init(&attributes);
#if !defined(__APPLE__)
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
#endif
    pthread_cond_init(&world->wake, &attributes);
    pthread_condattr_destroy(&attributes);
    return world;
}

/* ---- communicators ---- */

/* A communicator of these world ranks (copied), without its NCCL half. Local. */
static llmpar_status llmpar__nccl_make(llmpar__nccl_world *world, const int32_t *member, int32_t ranks, int32_t rank, uint64_t context, const char *name, llmpar__nccl_comm **out)
{
    llmpar_heap *heap = world->heap;
    llmpar__nccl_comm *tc = (llmpar__nccl_comm *)llmpar_heap_zalloc(heap, 1, sizeof *tc);
    llmpar_error *error = world->error;
    *out = NULL;
    if (!tc) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "communicator %.23s: out of memory", name);
    llmpar_comm *comm = &tc->comm;
    size_t n = (size_t)ranks, length = strlen(name);
    tc->world = world;
    world->comms++;
    tc->context = context;
    tc->member = (int32_t *)llmpar_heap_alloc(heap, n, sizeof *tc->member);
    tc->sent = (uint64_t *)llmpar_heap_zalloc(heap, n, sizeof *tc->sent);
    tc->received = (uint64_t *)llmpar_heap_zalloc(heap, n, sizeof *tc->received);
    comm->state = tc;
    comm->abi = LLMPAR_COMM_ABI;
    comm->size = (uint32_t)sizeof *comm;
    comm->rank = rank;
    comm->ranks = ranks;
    comm->axis = tc->axis;
    comm->device = world->device;
    comm->error = error;
    comm->split = llmpar__nccl_split;
    comm->destroy = llmpar__nccl_destroy;
    comm->abort = llmpar__nccl_abort;
    comm->unchecked = world->desc.unchecked;
    memcpy(tc->axis, name, length < sizeof tc->axis ? length : sizeof tc->axis - 1);
    llmpar_comm_fill(comm, llmpar__nccl_enqueue);
    pthread_mutex_lock(&world->nccl_lock);
    tc->next = world->first;
    tc->previous = &world->first;
    if (world->first) world->first->previous = &tc->next;
    world->first = tc;
    pthread_mutex_unlock(&world->nccl_lock);
    if (!llmpar_halving_make(heap, ranks, rank, &tc->halving) || !tc->member || !tc->sent || !tc->received) {
        llmpar__nccl_destroy(comm);
        return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "communicator %.23s: out of memory for %d ranks", name, (int)ranks);
    }
    memcpy(tc->member, member, n * sizeof *member);
    if (llmpar_record_attach(world->record, comm, member)) {
        llmpar__nccl_destroy(comm);
        return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "communicator %.23s: out of memory for its record", name);
    }
    *out = tc;
    return LLMPAR_OK;
}

/* NCCL's end of a communicator, in good order where the job is sound. */
static void llmpar__nccl_end(llmpar__nccl_comm *tc)
{
    llmpar__nccl_world *world = tc->world;
    double limit = llmpar__nccl_now() + (world->desc.deadline > 0 && world->desc.deadline < 60 ? world->desc.deadline : 60);
    ncclResult_t state = ncclSuccess;
    pthread_mutex_lock(&world->nccl_lock);
    int there = tc->nccl != NULL;
    if (there) ncclCommFinalize(tc->nccl);
    while (tc->nccl) {
        if (ncclCommGetAsyncError(tc->nccl, &state)) state = ncclInternalError;
        if (state != ncclInProgress || llmpar__nccl_now() > limit) break;
        pthread_mutex_unlock(&world->nccl_lock); /* the helper may abort it meanwhile */
        llmpar__nccl_nap(0.0002);
        pthread_mutex_lock(&world->nccl_lock);
    }
    if (tc->nccl) llmpar__nccl_bury(world, tc->nccl, state != ncclSuccess);
    tc->nccl = NULL;
    pthread_mutex_unlock(&world->nccl_lock);
    if (!__atomic_load_n(&world->aborted, __ATOMIC_SEQ_CST)) llmpar__nccl_buried(world, LLMPAR__NCCL_FAREWELL); /* ranks may destroy in different orders: not until all have come */
}

static void llmpar__nccl_destroy(llmpar_comm *comm)
{
    llmpar__nccl_comm *tc = (llmpar__nccl_comm *)comm->state;
    llmpar__nccl_world *world = tc->world;
    llmpar_heap *heap = world->heap;
    if (world->pending) world->device->event_synchronize(world->device, world->last); /* a failure of the stream is its caller's to hear */
    llmpar__nccl_end(tc);
    pthread_mutex_lock(&world->nccl_lock);
    *tc->previous = tc->next;
    if (tc->next) tc->next->previous = tc->previous;
    pthread_mutex_unlock(&world->nccl_lock);
    if (world->helping && comm->ranks > 1) {
        pthread_mutex_lock(&world->lock);
        llmpar__nccl_to_hub(world, LLMPAR__NCCL_DROP, &tc->context, sizeof tc->context);
        pthread_mutex_unlock(&world->lock);
    }
    llmpar_heap_free(heap, tc->member);
    llmpar_heap_free(heap, tc->sent);
    llmpar_heap_free(heap, tc->received);
    llmpar_halving_free(heap, &tc->halving);
    llmpar_heap_free(heap, tc);
    llmpar__nccl_release(world);
}

/* Color and key to rank 0, and the group that comes back, in world->group. */
static llmpar_status llmpar__nccl_ask_group(llmpar__nccl_comm *tc, const llmpar_call *call, int32_t color, int32_t key)
{
    llmpar__nccl_world *world = tc->world;
    pthread_mutex_lock(&world->lock);
    world->group.ranks = -1;
    pthread_mutex_unlock(&world->lock);
    llmpar_status st = llmpar__nccl_ask_hub(tc, call, color, key, LLMPAR__NCCL_SPLIT);
    if (st) return st;
    pthread_mutex_lock(&world->lock);
    while (world->group.ranks < 0 && !world->aborted) llmpar__nccl_await(world, llmpar__nccl_now() + 0.1);
    int there = world->group.ranks >= 0;
    pthread_mutex_unlock(&world->lock);
    return there ? LLMPAR_OK : llmpar__nccl_sound(tc, call);
}

/* A split has failed, and a thread of NCCL may still be at work on it: the abort of the parent waits for that one. 0: still is. */
static int llmpar__nccl_unborn(llmpar__nccl_comm *tc)
{
    llmpar__nccl_world *world = tc->world;
    int there = 1;
    for (double limit = llmpar__nccl_now() + 3 * LLMPAR__NCCL_FAREWELL; there && llmpar__nccl_now() < limit;) {
        pthread_mutex_lock(&world->nccl_lock);
        there = tc->nccl != NULL;
        pthread_mutex_unlock(&world->nccl_lock);
        if (there) llmpar__nccl_nap(0.001);
    }
    if (there || !llmpar__nccl_buried(world, LLMPAR__NCCL_FAREWELL)) return 0;
    pthread_mutex_lock(&world->nccl_lock);
    if (*tc->born) llmpar__nccl_bury(world, *tc->born, 1);
    pthread_mutex_unlock(&world->nccl_lock);
    return 1;
}

/* NCCL's part of a split: made's communicator, if it has several ranks. Everybody has a color, its group's first rank or itself: where such a split fails, NCCL crashes on a rank without (seen in the source of 2.20 to
   2.30). So who is alone gets one too, and lets it go. */
static llmpar_status llmpar__nccl_bear(llmpar__nccl_comm *tc, const llmpar_call *call, const llmpar__nccl_group *group, llmpar__nccl_comm *made)
{
    llmpar__nccl_world *world = tc->world;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    ncclResult_t result = ncclInvalidUsage;
    int over = 1;
    tc->born = (ncclComm_t *)calloc(1, sizeof *tc->born);
    if (!tc->born) return llmpar__nccl_failed(tc, llmpar_error_set(world->error, LLMPAR_ERR_MEMORY, "communicator %.23s: out of memory for a split", tc->axis));
    config.blocking = 0;
    pthread_mutex_lock(&world->nccl_lock);
    if (tc->nccl) result = ncclCommSplit(tc->nccl, group->ranks > 1 ? world->group_member[0] : world->rank, group->rank, tc->born, &config);
    pthread_mutex_unlock(&world->nccl_lock);
    llmpar_status st = llmpar__nccl_settle(tc, call, "ncclCommSplit", result); /* NCCL sets the new handle before it says so of the parent */
    if (st) {
        over = llmpar__nccl_unborn(tc);
    } else {
        pthread_mutex_lock(&world->nccl_lock);
        if (group->ranks > 1) made->nccl = *tc->born;
        else if (*tc->born) llmpar__nccl_bury(world, *tc->born, 1);
        result = group->ranks > 1 && made->nccl ? ncclInProgress : group->ranks > 1 ? ncclInternalError : ncclSuccess;
        pthread_mutex_unlock(&world->nccl_lock);
        if (group->ranks > 1) st = llmpar__nccl_settle(made, call, "ncclCommSplit", result);
    }
    if (over) free(tc->born); /* else NCCL will write there */
    tc->born = NULL;
    return st;
}

static llmpar_status llmpar__nccl_split(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out)
{
    llmpar__nccl_comm *tc = (llmpar__nccl_comm *)comm->state, *made = NULL;
    llmpar__nccl_world *world = tc->world;
    llmpar_collective named;
    llmpar_call call;
    llmpar__nccl_group group;
    llmpar_status st = LLMPAR_OK;
    *out = NULL;
    memset(&named, 0, sizeof named);
    memset(&group, 0, sizeof group);
    named.tag = name;
    llmpar_call_describe(comm, LLMPAR_CALL_SPLIT, &named, &call);
    if (call.rank < 0) call.rank = world->rank;
    if (comm->ranks == 1) { /* nobody to ask */
        group.ranks = color >= 0;
        world->group_member[0] = tc->member[0];
    } else {
        if (world->pending) st = comm->device->event_synchronize(comm->device, world->last); /* NCCL wants nothing under way on the parent */
        if (!st) st = llmpar__nccl_sound(tc, &call);
        if (!st) st = llmpar__nccl_ask_group(tc, &call, color, key);
        if (st) return llmpar__nccl_failed(tc, st);
        group = world->group;
    }
    if (group.ranks) st = llmpar__nccl_make(world, world->group_member, group.ranks, group.rank, group.context, name, &made);
    if (st) return llmpar__nccl_failed(tc, st); /* the others wait in NCCL, and hear of it there */
    if (comm->ranks > 1 && group.several) st = llmpar__nccl_bear(tc, &call, &group, made);
    if (st) {
        if (made) llmpar__nccl_destroy(&made->comm);
        return st;
    }
    if (made) *out = &made->comm;
    return LLMPAR_OK;
}

/* The world's NCCL communicator, scratch and allocator. */
static llmpar_status llmpar__nccl_open_world(llmpar__nccl_comm *tc, ncclUniqueId id)
{
    llmpar__nccl_world *world = tc->world;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    pthread_mutex_lock(&world->nccl_lock);
    ncclResult_t result = ncclCommInitRankConfig(&tc->nccl, (int)world->ranks, id, (int)world->rank, &config);
    pthread_mutex_unlock(&world->nccl_lock);
    llmpar_status st = llmpar__nccl_settle(tc, NULL, "ncclCommInitRankConfig", result);
    if (!st && !world->desc.own_memory) {
        st = llmpar__nccl_memory_begin(world->heap, world->device);
        world->remembers = !st;
    }
    world->part_bytes = llmpar__nccl_part_bytes(world->desc.slice, world->ranks);
    if (!st) {
        void *scratch = NULL;
        st = world->device->alloc(world->device, 3 * world->part_bytes, &scratch);
        world->scratch = (char *)scratch;
        world->scratch_bytes = 3 * world->part_bytes;
    }
    if (!st) st = world->device->event_create(world->device, &world->last);
    return st ? llmpar__nccl_failed(tc, st) : LLMPAR_OK;
}

/* This rank has no part in the world, and ctx->error says why: tells the others where they meet. With as little memory as may be: on other ranks than 0 none. */
static llmpar_status llmpar__nccl_excuse(llmpar_ctx *ctx, const llmpar_nccl_desc *desc)
{
    llmpar__nccl_world world;
    ncclUniqueId id;
    memset(&world, 0, sizeof world);
    memset(&id, 0, sizeof id);
    world.heap = &ctx->heap;
    world.error = &ctx->error;
    world.rank = ctx->rank;
    world.ranks = ctx->world;
    llmpar__nccl_own_host(world.host, sizeof world.host);
    llmpar__nccl_resolve(&world, desc);
    if (world.rank == 0) world.peer = (llmpar__nccl_peer *)llmpar_heap_zalloc(world.heap, (size_t)world.ranks, sizeof *world.peer);
    for (int32_t i = 0; world.peer && i < world.ranks; i++) world.peer[i].link.fd = -1;
    if (world.rank || world.peer) llmpar__nccl_meet(&world, ctx, ctx->error.status, 0, &id);
    llmpar_heap_free(world.heap, world.peer);
    return ctx->error.status;
}

LLMPAR_DEF llmpar_status llmpar_nccl_comm_create(llmpar_ctx *ctx, llmpar_device *device, const llmpar_nccl_desc *desc, llmpar_comm **out)
{
    llmpar__nccl_world *world = llmpar__nccl_world_make(ctx, device);
    llmpar__nccl_comm *tc = NULL;
    ncclUniqueId id;
    int version = 0;
    *out = NULL;
    if (!world) {
        llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "nccl: out of memory");
        return llmpar__nccl_excuse(ctx, desc);
    }
    memset(&id, 0, sizeof id);
    llmpar_status st = llmpar__nccl_resolve(world, desc);
    llmpar_status there = llmpar__nccl_furnish(world);
    if (there) {
        llmpar__nccl_release(world);
        return llmpar__nccl_excuse(ctx, desc);
    }
    if (!st && (device->size < offsetof(llmpar_device, native_stream) + sizeof device->native_stream || !device->native_stream))
        st = llmpar_error_set(world->error, LLMPAR_ERR_UNSUPPORTED, "nccl: device %s has no streams that NCCL could use (native_stream)", device->name);
    ncclResult_t result = ncclGetVersion(&version);
    if (!st && result) st = llmpar_error_set(world->error, LLMPAR_ERR_INTERNAL, "nccl: ncclGetVersion: %s", ncclGetErrorString(result));
    if (!st && version < LLMPAR__NCCL_LEAST) st = llmpar_error_set(world->error, LLMPAR_ERR_UNSUPPORTED, "nccl: NCCL %d is too old, expected at least %d (2.20)", version, LLMPAR__NCCL_LEAST);
    if (!st && world->rank == 0) {
        result = ncclGetUniqueId(&id);
        if (result) st = llmpar_error_set(world->error, LLMPAR_ERR_INTERNAL, "nccl: ncclGetUniqueId: %s: %.300s", ncclGetErrorString(result), ncclGetLastError(NULL));
    }
    st = llmpar__nccl_meet(world, ctx, st, (int32_t)version, &id);
    if (!st) st = llmpar__nccl_watch_begin(world);
    int32_t *all = (int32_t *)llmpar_heap_alloc(world->heap, (size_t)world->ranks, sizeof *all);
    for (int32_t i = 0; all && i < world->ranks; i++) all[i] = i;
    if (!st) st = all ? llmpar__nccl_make(world, all, world->ranks, world->rank, 0, "world", &tc) : llmpar_error_set(world->error, LLMPAR_ERR_MEMORY, "nccl: out of memory for %d ranks", (int)world->ranks);
    llmpar_heap_free(world->heap, all);
    if (!st) st = llmpar__nccl_open_world(tc, id);
    if (st && world->helping) { /* no call of a communicator: nobody else has told the others */
        llmpar_error error = *world->error;
        error.status = st;
        if (st != LLMPAR_ERR_PEER) llmpar__nccl_fail(world, &error);
    }
    if (st && tc) llmpar__nccl_destroy(&tc->comm);
    if (!st) *out = &tc->comm;
    llmpar__nccl_release(world);
    return st;
}

LLMPAR_DEF void llmpar_nccl_comm_finish(llmpar_comm *comm, llmpar_error *root)
{
    llmpar__nccl_comm *tc = (llmpar__nccl_comm *)comm->state;
    llmpar__nccl_world *world = tc->world;
    if (world->pending) world->device->event_synchronize(world->device, world->last);
    pthread_mutex_lock(&world->lock);
    if (!world->finished && world->ranks > 1) llmpar__nccl_to_hub(world, LLMPAR__NCCL_FINISH, NULL, 0);
    world->finished = 1;
    while (world->ranks > 1 && !world->done && !(world->aborted && (world->located || llmpar__nccl_now() > world->failed_at + LLMPAR__NCCL_FAREWELL))) llmpar__nccl_await(world, llmpar__nccl_now() + 0.1);
    if (world->aborted) *root = world->verdict.error;
    else llmpar_error_clear(root);
    pthread_mutex_unlock(&world->lock);
}

static llmpar_status llmpar__nccl_backend_create(const void *user, llmpar_ctx *ctx, llmpar_device *device, llmpar_comm **out) { return llmpar_nccl_comm_create(ctx, device, (const llmpar_nccl_desc *)user, out); }

static void llmpar__nccl_backend_finish(const void *user, llmpar_comm *comm, llmpar_error *root)
{
    (void)user;
    llmpar_nccl_comm_finish(comm, root);
}

static void llmpar__nccl_backend_absent(const void *user, llmpar_ctx *ctx) { llmpar__nccl_excuse(ctx, (const llmpar_nccl_desc *)user); }

LLMPAR_DEF void llmpar_nccl_backend(const llmpar_nccl_desc *desc, llmpar_backend *out)
{
    out->abi = LLMPAR_BACKEND_ABI;
    out->size = (uint32_t)sizeof *out;
    out->comm_user = desc;
    out->comm_create = llmpar__nccl_backend_create;
    out->comm_finish = llmpar__nccl_backend_finish;
    out->comm_absent = llmpar__nccl_backend_absent;
}

#undef LLMPAR__NCCL_FAREWELL

#pragma GCC diagnostic pop

#endif
#endif /* LLMPAR_NCCL_IMPLEMENTATION */
#endif /* LLMPAR__TEMPLATE */
