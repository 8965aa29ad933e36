/* launch_furnish: what a rank computes and communicates with, whatever the ranks are (threads, MPI processes, processes of the environment), and the test that all ranks compute alike.

     host       the CPU device, and host_comm, what the transport makes on it (NULL: nothing): always there first, made by the transport
     device     the backend's, else host
     comm       the backend's; else host_comm where the device is host; else the transport's ranks once more, with collectives that compute on the device and run on its streams, which takes memory that the
                host can touch */
#include "run/launch_internal.h"

#include <string.h>

#include "tables/device.h"

#define LLMPAR__LAUNCH_END(type, slot) (offsetof(type, slot) + sizeof(((type *)0)->slot))

static const char *llmpar__launch_backend_name(const llmpar_backend *backend) { return backend->name ? backend->name : "without a name"; }

LLMPAR__PRIVATE_DEF llmpar_status llmpar__launch_backend_check(const llmpar_backend *backend, llmpar_error *error)
{
    if (!backend) return LLMPAR_OK;
    if (backend->abi != LLMPAR_BACKEND_ABI || backend->size < sizeof *backend)
        return LLMPAR__LAUNCH_NO(LLMPAR_ERR_ABI, "backend with abi %u and %u bytes, expected abi %u and %lu bytes", (unsigned)backend->abi, (unsigned)backend->size, LLMPAR_BACKEND_ABI, (unsigned long)sizeof *backend);
    if (!backend->device_create != !backend->device_destroy)
        return LLMPAR__LAUNCH_NO(LLMPAR_ERR_ARGUMENT, "backend %s: device_%s is empty, expected both of device_create and device_destroy or neither", llmpar__launch_backend_name(backend), backend->device_create ? "destroy" : "create");
    return LLMPAR_OK;
}

/* Waits for all ranks, through the transport: before a collective step that a rank which has failed by now will not come to. */
static llmpar_status llmpar__launch_all_here(llmpar_ctx *ctx)
{
    llmpar_stream *stream = NULL;
    if (!ctx->host_comm || ctx->world == 1) return LLMPAR_OK;
    llmpar_status st = ctx->host->stream_create(ctx->host, "launch", &stream);
    if (st) return st;
    st = llmpar_comm_barrier(ctx->host_comm, stream, "launch/device");
    st = llmpar__device_done(ctx->host, stream, st);
    ctx->host->stream_destroy(ctx->host, stream);
    return st;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__launch_absent(llmpar_ctx *ctx, const llmpar_backend *backend, llmpar_status st)
{
    if (!ctx->host_comm && ctx->world > 1 && backend->comm_absent) backend->comm_absent(backend->comm_user, ctx);
    return st;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__launch_furnish(llmpar_ctx *ctx, const llmpar_backend *backend)
{
    llmpar_status st = LLMPAR_OK;
    const char *name = backend ? llmpar__launch_backend_name(backend) : "";
    llmpar_device *device = ctx->host;
    if (backend && backend->device_create) {
        device = NULL;
        st = backend->device_create(backend->device_user, ctx, &device);
        if (st) return llmpar__launch_absent(ctx, backend, llmpar_fail(ctx, st, "launch: backend %s: no device for rank %d: %s", name, (int)ctx->rank, llmpar_status_string(st))); /* unless it has said more */
        ctx->device = device;
        if (device->abi != LLMPAR_DEVICE_ABI || device->size < LLMPAR__LAUNCH_END(llmpar_device, square_sum))
            return llmpar__launch_absent(ctx, backend, llmpar_fail(ctx, LLMPAR_ERR_ABI, "launch: backend %s: device table with abi %u and %u bytes, expected abi %u and at least %lu bytes", name, (unsigned)device->abi, (unsigned)device->size,
                                                                   LLMPAR_DEVICE_ABI, (unsigned long)LLMPAR__LAUNCH_END(llmpar_device, square_sum)));
    }
    ctx->device = device;
    if (backend && backend->comm_create) {
        st = llmpar__launch_all_here(ctx);
        if (!st) st = backend->comm_create(backend->comm_user, ctx, device, &ctx->comm);
        if (st) return llmpar_fail(ctx, st, "launch: backend %s: no communicator for rank %d of %d: %s", name, (int)ctx->rank, (int)ctx->world, llmpar_status_string(st));
        if (ctx->comm->abi != LLMPAR_COMM_ABI || ctx->comm->size < LLMPAR__LAUNCH_END(llmpar_comm, abort) || ctx->comm->rank != ctx->rank || ctx->comm->ranks != ctx->world)
            return llmpar_fail(ctx, LLMPAR_ERR_ABI, "launch: backend %s: communicator with abi %u and %u bytes, rank %d of %d, expected abi %u and at least %lu bytes, rank %d of %d", name, (unsigned)ctx->comm->abi, (unsigned)ctx->comm->size,
                               (int)ctx->comm->rank, (int)ctx->comm->ranks, LLMPAR_COMM_ABI, (unsigned long)LLMPAR__LAUNCH_END(llmpar_comm, abort), (int)ctx->rank, (int)ctx->world);
        return LLMPAR_OK;
    }
    if (device == ctx->host) {
        ctx->comm = ctx->host_comm;
        return LLMPAR_OK;
    }
    if (ctx->world > 1 && llmpar_device_apart(device))
        return llmpar_fail(ctx, LLMPAR_ERR_CONFIG, "launch: backend %s: %d ranks on device %s, whose memory is not the host's, and no comm_create: the ranks' own transport moves host memory; expected a communicator for this device (CUDA: rank threads share a GPU by llmpar_cuda_backend, processes use llmpar_nccl_backend)",
                           name, (int)ctx->world, device->name);
    st = llmpar_comm_split(ctx->host_comm, 0, ctx->rank, "world", &ctx->comm);
    if (!st) ctx->comm->device = device;
    return st;
}

LLMPAR__PRIVATE_DEF void llmpar__launch_clear(llmpar_ctx *ctx, const llmpar_backend *backend)
{
    if (ctx->comm != ctx->host_comm) llmpar_comm_destroy(ctx->comm);
    if (ctx->device && ctx->device != ctx->host) backend->device_destroy(backend->device_user, ctx->device);
    ctx->device = ctx->host; /* who fails from here on is on the CPU */
    llmpar_comm_destroy(ctx->host_comm);
    llmpar_cpu_destroy(ctx->host);
    ctx->comm = ctx->host_comm = NULL;
    ctx->device = ctx->host = NULL;
}

LLMPAR__PRIVATE_DEF void llmpar__launch_failure(const llmpar_ctx *ctx, llmpar_status st, llmpar_error *error)
{
    *error = ctx->error;
    if (error->status == LLMPAR_OK) llmpar_error_set(error, st, "the rank's function returned \"%s\" without a text", llmpar_status_string(st));
    error->rank = ctx->rank;
    error->status = st;
}

LLMPAR__PRIVATE_DEF void llmpar__launch_abort(llmpar_ctx *ctx, const llmpar_error *error)
{
    if (ctx->comm && ctx->comm != ctx->host_comm && LLMPAR__HAS(ctx->comm, abort)) ctx->comm->abort(ctx->comm, error);
}

LLMPAR__PRIVATE_DEF int llmpar__launch_root(llmpar_ctx *ctx, const llmpar_backend *backend, llmpar_error *error)
{
    if (error->status != LLMPAR_ERR_PEER || !ctx->comm || ctx->comm == ctx->host_comm || !backend || !backend->comm_finish) return 0;
    LLMPAR__NO_ERROR(root);
    backend->comm_finish(backend->comm_user, ctx->comm, &root);
    if (root.status) *error = root;
    return root.status != LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_record *llmpar__launch_record(const llmpar_ctx *ctx)
{
    if (ctx->comm && LLMPAR__HAS(ctx->comm, record)) return ctx->comm->record;
    return ctx->host_comm ? ctx->host_comm->record : NULL;
}

/* ---- do all ranks compute alike? ---- */

/* FNV-1a over the bytes of small results: two ranks whose kernels differ (another level, another compiler, another accelerator) differ here. The operands go to the device's memory and the product comes back. */
static llmpar_status llmpar__launch_self_test(llmpar_ctx *ctx, uint64_t *out)
{
    enum { M = 5, N = 19, K = 67 };
    llmpar_device *device = ctx->device;
    size_t inputs = M * K + N * K, bytes = (inputs + M * N) * sizeof(float), workspace_bytes = 0;
    void *memory = NULL;
    llmpar_stream *stream = NULL;
    llmpar_gemm_segment segment[4];
    LLMPAR__ZEROED(llmpar_gemm_args, args);
    memset(segment, 0, sizeof segment);
    float *host = (float *)llmpar_heap_alloc(&ctx->heap, bytes, 1);
    if (!host) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "launch: out of memory for the self-test");
    for (size_t i = 0; i < inputs; i++) host[i] = (float)((int)(i * 7919 + 13) % 1009 - 504) * (1.0f / 333.0f);
    llmpar_status st = device->alloc(device, bytes, &memory);
    if (!st) st = device->stream_create(device, "launch", &stream);
    const float *a = (const float *)memory;
    if (!st) {
        for (int i = 0; i < 4; i++) {
            int begin = i * K / 4;
            segment[i].a = a + begin;
            segment[i].b = a + M * K + begin;
            segment[i].lda = segment[i].ldb = K;
            segment[i].k = (i + 1) * K / 4 - begin;
            segment[i].piece = i;
        }
        args.m = M;
        args.n = N;
        args.c = (float *)memory + inputs;
        args.ldc = N;
        args.segments = segment;
        args.segment_count = args.pieces = 4;
        args.kind = LLMPAR_GEMM_NT;
        args.dtype = LLMPAR_F32;
        args.workspace_bytes = workspace_bytes = device->gemm_workspace(device, &args);
        st = device->alloc(device, workspace_bytes, &args.workspace);
    }
    if (!st) st = device->copy(device, stream, memory, host, inputs * sizeof *host);
    if (!st) st = device->gemm(device, stream, &args);
    if (!st) st = device->copy(device, stream, host + inputs, args.c, M * N * sizeof *host);
    if (stream) {
        st = llmpar__device_done(device, stream, st);
        device->stream_destroy(device, stream);
    }
    uint64_t hash = 0xcbf29ce484222325u;
    const unsigned char *result = (const unsigned char *)(host + inputs);
    for (size_t i = 0; !st && i < M * N * sizeof *host; i++) hash = (hash ^ result[i]) * 0x100000001b3u;
    for (const char *p = device->name; *p; p++) hash = (hash ^ (unsigned char)*p) * 0x100000001b3u;
    device->free(device, args.workspace, workspace_bytes);
    device->free(device, memory, bytes);
    llmpar_heap_free(&ctx->heap, host);
    *out = hash;
    return st;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__launch_agree(llmpar_ctx *ctx)
{
    if (ctx->world == 1) return LLMPAR_OK;
    uint64_t mine = 0, *all = LLMPAR__ZALLOC(uint64_t, &ctx->heap, (size_t)ctx->world);
    if (!all) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "launch: out of memory for %d ranks", (int)ctx->world);
    llmpar_collective call = llmpar__comm_collective(&mine, all, 1, LLMPAR_U64, "launch/self_test");
    llmpar_status st = llmpar__launch_self_test(ctx, &mine);
    if (!st) st = llmpar__comm_talk(ctx->comm, LLMPAR_CALL_ALL_GATHER, &call);
    for (int32_t i = 1; i < ctx->world && !st; i++)
        if (all[i] != all[0])
            st = llmpar_fail(ctx, LLMPAR_ERR_MISMATCH, "launch: the self-test gives other bits on rank %d (%016llx) than on rank 0 (%016llx); this rank's device is %s", (int)i,
                             (unsigned long long)all[i], (unsigned long long)all[0], ctx->device->name);
    llmpar_heap_free(&ctx->heap, all);
    return st;
}

#undef LLMPAR__LAUNCH_END
