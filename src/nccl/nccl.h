/* nccl: the communicator between GPUs on NCCL, one rank a process (or a thread with a GPU of its own). */
#ifndef LLMPAR_NCCL_COMM_H
#define LLMPAR_NCCL_COMM_H

#include "llmpar.h"

typedef struct llmpar_nccl_desc {
    int32_t fast;              /* 1: ncclReduceScatter and ncclAllReduce in NCCL's own order; default 0: recursive halving and the tree of docs/exact.md, the same bits as every communicator */
    double deadline;           /* seconds that a collective, and the meeting at the start, may take before it is an error that names who is missing; default 0 = 600; negative = for ever */
    int32_t unchecked;         /* 1: the ranks do not compare their calls; default 0: they do, beside the data */
    size_t slice;              /* most bytes of a reduction's message at a time, which bounds scratch; default 0 = 16 MiB */
    /* Where the ranks meet: the first of these that is given; default: ctx->host_comm (rank threads, MPI), else the environment's address. */
    const char *file;          /* a path that all ranks see and nobody else uses: rank 0 writes its address there */
    const char *address;       /* "host:port" of rank 0 (MASTER_ADDR, MASTER_PORT); port 0 only with file or host_comm */
} llmpar_nccl_desc;

/* The world's communicator of ctx->rank of ctx->world on `device`, whose native_stream gives cudaStream_t and whose memory NCCL can reach. desc NULL: defaults. ctx->error has the text of a failure. Collective. */
LLMPAR_API llmpar_status llmpar_nccl_comm_create(llmpar_ctx *ctx, llmpar_device *device, const llmpar_nccl_desc *desc, llmpar_comm **out);
/* For a launch desc, beside what llmpar_cuda_backend has filled in: comm_create. desc (borrowed until launch returns, NULL: defaults). Local. */
LLMPAR_API void llmpar_nccl_backend(const llmpar_nccl_desc *desc, llmpar_backend *out);

#endif
