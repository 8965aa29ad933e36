/* backend: what ranks compute and communicate with where that is not the CPU and the launch's own transport. A launch desc names one; llmpar_cuda_backend and llmpar_nccl_backend fill one, or a user does. */
#ifndef LLMPAR_BACKEND_H
#define LLMPAR_BACKEND_H

#include "tables/comm.h"
#include "tables/ctx.h"
#include "tables/device.h"

#define LLMPAR_BACKEND_ABI 1u

/* Called by launch on every rank's own thread; ctx has rank, world, local_rank, heap, host and host_comm. Plain data that is copied; what `user` pointers point to is borrowed until launch returns. */
typedef struct llmpar_backend {
    uint32_t abi, size;        /* LLMPAR_BACKEND_ABI, sizeof(llmpar_backend) */
    const char *name;          /* "cuda": for messages */
    const void *device_user, *comm_user;
    /* The rank's device. A failure leaves its text in ctx->error. Empty: the CPU's. */
    llmpar_status (*device_create)(const void *device_user, llmpar_ctx *ctx, llmpar_device **out);
    void (*device_destroy)(const void *device_user, llmpar_device *device); /* NULL is fine; after every communicator on it */
    /* The world's communicator on the rank's device (`device`, which may be ctx->host). Collective. Empty: the launch's transport makes it, which needs a device whose memory is the host's. */
    llmpar_status (*comm_create)(const void *comm_user, llmpar_ctx *ctx, llmpar_device *device, llmpar_comm **out);
    /* This rank's function has returned (its failure, if any, was told by comm->abort). Waits until every rank's has, or it is known who has failed; *root: the job's failure, the same on all ranks that can be reached, status OK
       if none. Called by launches whose ranks have no other way to tell each other, and by any of a rank that hears of another's failure through the communicator. Empty: there is none. Not collective after a failure. */
    void (*comm_finish)(const void *comm_user, llmpar_comm *comm, llmpar_error *root);
    /* This rank has failed before it could come to comm_create (no device), and ctx->error says why: tells those who wait for it there. Called by launches whose ranks have no other way to tell each other. Empty: it is missed there. */
    void (*comm_absent)(const void *comm_user, llmpar_ctx *ctx);
} llmpar_backend;

#endif
