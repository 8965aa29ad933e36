/* nccl_rig: rank threads whose device is the CPU's with stream handles for the stand-in of NCCL (fake_nccl.h), and whose communicator is llmpar_nccl.h's. */
#ifndef NCCL_RIG_H
#define NCCL_RIG_H

#include "llmpar_nccl.h"
#include "fake_nccl.h"
#include "test.h"

enum { RIG_STREAMS = 32 };

typedef struct rig_device {
    llmpar_device table; /* first */
    llmpar_heap *heap;
    llmpar_status (*stream_thread)(llmpar_device *device, llmpar_stream *stream);
    void (*stream_destroy)(llmpar_device *device, llmpar_stream *stream);
    fake_nccl_stream handle[RIG_STREAMS]; /* of streams with threads */
} rig_device;

typedef struct rig_call { void (*fn)(void *arg); void *arg; } rig_call;
static inline llmpar_status rig_run(void *arg)
{
    const rig_call *call = (const rig_call *)arg;
    call->fn(call->arg);
    return LLMPAR_OK;
}
static inline int rig_enqueue(void *device, void *stream, void (*fn)(void *arg), void *arg)
{
    rig_call call = { fn, arg };
    llmpar_device *d = (llmpar_device *)device;
    return (int)d->host_call(d, (llmpar_stream *)stream, rig_run, &call, sizeof call);
}
static inline void *rig_native(llmpar_device *device, llmpar_stream *stream)
{
    rig_device *rig = (rig_device *)device;
    for (int i = 0; stream && i < RIG_STREAMS; i++)
        if (rig->handle[i].stream == stream) return &rig->handle[i];
    return NULL; /* completes inside the call */
}
static inline llmpar_status rig_thread(llmpar_device *device, llmpar_stream *stream)
{
    rig_device *rig = (rig_device *)device;
    llmpar_status st = rig->stream_thread(device, stream);
    for (int i = 0; i < RIG_STREAMS && !st; i++)
        if (!rig->handle[i].stream) {
            rig->handle[i].enqueue = rig_enqueue;
            rig->handle[i].device = device;
            rig->handle[i].stream = stream;
            break;
        }
    return st;
}
static inline void rig_stream_destroy(llmpar_device *device, llmpar_stream *stream)
{
    rig_device *rig = (rig_device *)device;
    rig->stream_destroy(device, stream);
    for (int i = 0; stream && i < RIG_STREAMS; i++)
        if (rig->handle[i].stream == stream) {
            fake_nccl_drop(&rig->handle[i]);
            rig->handle[i].stream = NULL;
        }
}

static inline llmpar_status rig_create(const void *user, llmpar_ctx *ctx, llmpar_device **out)
{
    (void)user;
    rig_device *rig = (rig_device *)llmpar_heap_zalloc(&ctx->heap, 1, sizeof *rig);
    if (!rig) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "out of memory for the rig");
    rig->table = *ctx->host;
    rig->heap = &ctx->heap;
    rig->stream_thread = rig->table.stream_thread;
    rig->stream_destroy = rig->table.stream_destroy;
    rig->table.stream_thread = rig_thread;
    rig->table.stream_destroy = rig_stream_destroy;
    rig->table.native_stream = rig_native;
    *out = &rig->table;
    return LLMPAR_OK;
}
static inline void rig_destroy(const void *user, llmpar_device *device)
{
    (void)user;
    if (device) {
        CHECK(!device->memory_state); /* the allocator is the device's own again */
        llmpar_heap_free(((rig_device *)device)->heap, device);
    }
}

/* What a rank thread does instead of llmpar_nccl_comm_create; NULL: that. */
static llmpar_status (*rig_comm)(const llmpar_nccl_desc *desc, llmpar_ctx *ctx, llmpar_device *device, llmpar_comm **out);
static __thread int rig_rank = -1; /* of the thread */
static inline llmpar_status rig_comm_create(const void *user, llmpar_ctx *ctx, llmpar_device *device, llmpar_comm **out)
{
    rig_rank = ctx->rank;
    return rig_comm ? rig_comm((const llmpar_nccl_desc *)user, ctx, device, out) : llmpar_nccl_comm_create(ctx, device, (const llmpar_nccl_desc *)user, out);
}

static char rig_logged[16384]; /* the lines of all ranks */
static inline void rig_log(void *user, int rank, llmpar_log_level level, const char *line)
{
    static int busy;
    (void)user; (void)level;
    while (__atomic_exchange_n(&busy, 1, __ATOMIC_ACQUIRE)) {}
    size_t used = strlen(rig_logged);
    snprintf(rig_logged + used, sizeof rig_logged - used, "rank %d: %s\n", rank, line);
    __atomic_store_n(&busy, 0, __ATOMIC_RELEASE);
}

static inline void rig_backend(const llmpar_nccl_desc *nccl, llmpar_backend *backend)
{
    memset(backend, 0, sizeof *backend);
    backend->name = "rig";
    backend->device_create = rig_create;
    backend->device_destroy = rig_destroy;
    llmpar_nccl_backend(nccl, backend);
    backend->comm_create = rig_comm_create;
}

/* fn on rank threads with the rig; nothing of it is left afterwards. */
static inline llmpar_status rig_launch(int ranks, const llmpar_nccl_desc *nccl, llmpar_rank_fn fn, void *user, llmpar_error *error)
{
    llmpar_backend backend;
    rig_backend(nccl, &backend);
    llmpar_launch_desc desc = { .ranks = ranks, .backend = &backend, .check = test_no_leak, .transport = LLMPAR_TRANSPORT_THREADS, .log = rig_log, .threads = 1, .deadline = 60 };
    rig_logged[0] = 0;
    llmpar_status st = llmpar_launch(&desc, fn, user, error);
    CHECK_INT(fake_nccl.comms, 0);
    CHECK_INT(fake_nccl.blocks, 0);
    CHECK_INT(fake_nccl.overlaps, 0);
    CHECK_INT(fake_nccl.misuse, 0);
    return st;
}

#endif
