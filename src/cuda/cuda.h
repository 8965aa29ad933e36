/* cuda: the CUDA device: the table of tables/device.h on an NVIDIA GPU, and the communicator of rank threads that share one. */
#ifndef LLMPAR_CUDA_DEVICE_H
#define LLMPAR_CUDA_DEVICE_H

#include "llmpar.h"

/* EXACT: own kernels with one order for every sum: the same bits on every mesh of one device type (docs/exact.md). FAST: products and attention of the vendor's libraries, in their order; with canon 1 (exact off) sums for norm weights in parts. */
typedef enum llmpar_cuda_mode { LLMPAR_CUDA_DEFAULT = 0 /* EXACT */, LLMPAR_CUDA_EXACT = 1, LLMPAR_CUDA_FAST = 2 } llmpar_cuda_mode;

typedef struct llmpar_cuda_desc {
    llmpar_cuda_mode mode;     /* default: exact */
    int32_t tf32;              /* 1: f32 products in TF32 (FAST only, refused otherwise); default 0: f32 */
    int32_t cudnn;             /* 1: attention of cuDNN (FAST only, built with LLMPAR_USE_CUDNN; refused otherwise); default 0: own kernels */
    size_t library_workspace;  /* bytes that a stream's products may use inside the vendor's library; default 0: 32 MiB. Part of `outside` in memory reports */
} llmpar_cuda_desc;

/* How many devices the driver shows (CUDA_VISIBLE_DEVICES chooses); 0 with the reason in *error (NULL is fine) where there is no driver or no device. Never fails otherwise. Local, thread-safe. */
LLMPAR_API int32_t llmpar_cuda_count(llmpar_error *error);
/* The device of a rank: number ctx->local_rank modulo the devices shown. desc NULL: defaults; it is copied. ctx is borrowed, for its heap and its error, until llmpar_cuda_destroy. The device belongs to the rank's thread: no other
   one calls it (but for thread_error), and host calls, which the driver's threads run, do not call CUDA; devices of several ranks are apart, also on one GPU. Text of failures in ctx->error: LLMPAR_ERR_ARGUMENT for the desc,
   LLMPAR_ERR_UNSUPPORTED without a driver, a device, or a kernel image for it, LLMPAR_ERR_MEMORY. Local. */
LLMPAR_API llmpar_status llmpar_cuda_create(llmpar_ctx *ctx, const llmpar_cuda_desc *desc, llmpar_device **out);
/* NULL is fine. Waits for what is enqueued, and takes streams that are left along; memory and events are given back before, by who asked for them. On the rank's thread. */
LLMPAR_API void llmpar_cuda_destroy(llmpar_device *device);
/* What became of the regions of a device (region_begin, tables/device.h), which mode FAST alone has: replayed with one launch; captured, which runs them too; issued operation by operation (the first time, with arguments that
   changed, and what ended early). kept: graphs it holds now. Local; device is one of llmpar_cuda_create. */
typedef struct llmpar_cuda_graph_counts { uint64_t replayed, captured, plain, kept; } llmpar_cuda_graph_counts;
LLMPAR_API void llmpar_cuda_graphs(llmpar_device *device, llmpar_cuda_graph_counts *out);
/* The communicator of rank threads on one device: each collective is a kernel over the peers' memory. host: the world of rank threads (ctx->host_comm), borrowed; through it the ranks meet, compare calls, time out and
   learn of failures. All ranks' devices are the same GPU, or GPUs that reach each other's memory (LLMPAR_ERR_UNSUPPORTED names the two otherwise). The same bits as every communicator. At most 128 ranks.
   device is borrowed until llmpar_comm_destroy, which goes before llmpar_cuda_destroy. Failures are everybody's: LLMPAR_ERR_ARGUMENT without host, LLMPAR_ERR_MEMORY, LLMPAR_ERR_PEER where another rank's is the root. Collective. */
LLMPAR_API llmpar_status llmpar_cuda_shared_comm_create(llmpar_ctx *ctx, llmpar_device *device, llmpar_comm *host, llmpar_comm **out);
/* Fills *out for a launch desc: device_create and, for rank threads, comm_create. desc: borrowed until the launch returns; NULL: defaults. Local, thread-safe. */
LLMPAR_API void llmpar_cuda_backend(const llmpar_cuda_desc *desc, llmpar_backend *out);

#endif
