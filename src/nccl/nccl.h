/* nccl: the communicator between GPUs on NCCL (2.20 or later), one rank a process (or a thread with a GPU of its own).

   Data travels over NCCL; beside it the ranks of a world hold a small TCP star with rank 0 in its middle, the control plane: there they meet, compare their calls, make splits and learn of failures. A rank that
   dies, fails or stays away is an error on every other rank that names it: a helper thread of each rank watches, and frees a GPU that waits inside NCCL.

   Launch order. NCCL wants the operations of concurrent communicators launched in one order on all ranks, and able to run side by side. Here a rank's collectives run one after the other in the order of the
   calls, on whatever communicators and streams (an event chains them): ranks whose calls would not deadlock one by one do not deadlock on the GPU. Compute on other streams runs beside them. */
#ifndef LLMPAR_NCCL_COMM_H
#define LLMPAR_NCCL_COMM_H

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

#endif
