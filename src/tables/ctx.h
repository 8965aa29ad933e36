/* ctx: one rank's view of the job: heap, device, world communicator, error text, log. Made and ended by llmpar_launch; never
   shared between ranks. */
#ifndef LLMPAR_CTX_H
#define LLMPAR_CTX_H

#include "base/heap.h"
#include "base/status.h"

struct llmpar_device;
struct llmpar_comm;
struct llmpar_io;

typedef enum llmpar_log_level { LLMPAR_LOG_DEFAULT = 0, LLMPAR_LOG_ERROR = 1, LLMPAR_LOG_WARNING = 2, LLMPAR_LOG_INFO = 3 } llmpar_log_level;
/* Receives one line without its newline. Called on the rank's own thread. */
typedef void (*llmpar_log_fn)(void *user, int rank, llmpar_log_level level, const char *line);

typedef struct llmpar_ctx {
    int32_t rank, world;          /* world rank and number of ranks */
    llmpar_heap heap;             /* host memory of this rank; the CPU device takes its memory here too */
    llmpar_error error;           /* the first error of this rank */
    struct llmpar_device *device; /* owned by launch */
    struct llmpar_comm *comm;     /* the world; owned by launch */
    struct llmpar_device *host;   /* the CPU device, for work on host memory; == device unless the launch desc names a backend. Owned by launch */
    struct llmpar_comm *host_comm; /* the world as the launch's transport reaches it (rank threads, MPI), on host memory; == comm unless a backend made comm; NULL: the transport has none. Owned by launch */
    int32_t local_rank;           /* among the ranks of this machine: which of its accelerators is this rank's */
    const char *meeting;          /* "host:port" of rank 0, where processes without a transport of their own can meet (MASTER_ADDR, MASTER_PORT); NULL: none. Owned by launch */
    const struct llmpar_io *io;   /* files; NULL: the system's; borrowed */
    llmpar_log_fn log;            /* NULL: silent */
    void *log_user;
} llmpar_ctx;

/* Sets ctx->error (the first error stays; on the thread of a stream, the stream's) with ctx->rank and returns status. Local. */
LLMPAR_API llmpar_status llmpar_fail(llmpar_ctx *ctx, llmpar_status status, const char *format, ...) LLMPAR_PRINTF(3, 4);
/* Text of this rank's first error, "" if none. Valid as long as ctx. Local. */
LLMPAR_API const char *llmpar_last_error(const llmpar_ctx *ctx);
/* Sends one line to the log sink, if any. Local. */
LLMPAR_API void llmpar_log(llmpar_ctx *ctx, llmpar_log_level level, const char *format, ...) LLMPAR_PRINTF(3, 4);

#endif
