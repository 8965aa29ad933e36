/* device: the CUDA device itself: memory, streams, events, host calls, and the table of operations.

   What is enqueued runs later, and a call tells only whether it was accepted: a failure while it runs comes from a later call, and sticks to the stream that it is seen on. An operation with stream NULL runs on a stream of its own
   and has finished when its call returns. Host calls run on the driver's thread, which must not call CUDA; what a failing one said stays with its stream until the rank's thread sees the failure. */
#include "cuda/cuda_internal.h"
#include "cuda/launch.h"
#include "cuda/probe.cu"

#if defined(__CUDACC_VER_MAJOR__) && (__CUDACC_VER_MAJOR__ < 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ < 4))
#error "llmpar_cuda.h: needs CUDA 12.4 or later"
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "llmpar_cuda.h: needs -arch=sm_80 or later (cp.async, bf16 products)"
#endif

#define LLMPAR__CUDA_WORKSPACE ((size_t)32 << 20)
#define LLMPAR__CUDA_MAX_ARG sizeof(((llmpar__cuda_call *)0)->arg)

enum { LLMPAR__CUDA_CALL_FREE, LLMPAR__CUDA_CALL_ENQUEUED, LLMPAR__CUDA_CALL_RUNNING };

typedef struct llmpar__cuda_event {
    cudaEvent_t handle;
    llmpar__cuda_stream *stream; /* of the last record; NULL: never recorded */
} llmpar__cuda_event;

/* The device and its state in one allocation of the rank's heap. */
typedef struct llmpar__cuda_device {
    llmpar_device table;
    llmpar__cuda state;
} llmpar__cuda_device;

/* ---- failures ---- */

static llmpar_status llmpar__cuda_check(llmpar_device *device, cudaError_t code, const char *what)
{
    const llmpar__cuda *cuda = llmpar__cuda_of(device);
    if (code == cudaSuccess) return LLMPAR_OK;
    (void)cudaGetLastError(); /* it stays with the thread otherwise, and the next operation would take it for its own */
    return llmpar_error_set(device->error, code == cudaErrorMemoryAllocation ? LLMPAR_ERR_MEMORY : LLMPAR_ERR_INTERNAL, "%s: device %s failed: %s (%s)", what, cuda->name, cudaGetErrorString(code), cudaGetErrorName(code));
}

static llmpar__cuda_stream *llmpar__cuda_stream_of(llmpar_device *device, llmpar_stream *stream)
{
    return stream ? (llmpar__cuda_stream *)(void *)stream : &llmpar__cuda_of(device)->now;
}

/* The failure that sticks to a stream; its text becomes the rank's, unless one is there. */
static llmpar_status llmpar__cuda_stuck(llmpar_device *device, llmpar__cuda_stream *own)
{
    llmpar_status status = __atomic_load_n(&own->status, __ATOMIC_ACQUIRE);
    if (status && device->error && device->error->status == LLMPAR_OK) {
        llmpar_error taken = __atomic_load_n(&own->told, __ATOMIC_ACQUIRE) ? own->error : own->refused;
        if (device->error->where[0]) memcpy(taken.where, device->error->where, sizeof taken.where);
        if (device->error->rank >= 0) taken.rank = device->error->rank;
        *device->error = taken;
    }
    return status;
}

/* A stream NULL keeps no failure. */
static llmpar_status llmpar__cuda_stick(llmpar_device *device, llmpar_stream *stream, llmpar_status status)
{
    llmpar__cuda_stream *own = llmpar__cuda_stream_of(device, stream);
    if (stream && status && !__atomic_load_n(&own->status, __ATOMIC_ACQUIRE)) {
        if (device->error) own->refused = *device->error;
        __atomic_store_n(&own->status, status, __ATOMIC_RELEASE);
    }
    return status;
}

static llmpar_status llmpar__cuda_begin(llmpar_device *device, llmpar_stream *stream)
{
    llmpar_status status;
    if (llmpar__cuda_notes(device, stream)) llmpar__cuda_region_break(device);
    status = stream ? llmpar__cuda_stuck(device, llmpar__cuda_stream_of(device, stream)) : LLMPAR_OK;
    if (!status) (void)cudaGetLastError(); /* of other code on this thread: `end` would take it for the operation's */
    return status ? status : llmpar__cuda_stick(device, stream, llmpar__cuda_check(device, cudaSetDevice(llmpar__cuda_of(device)->index), "cudaSetDevice"));
}

static llmpar_status llmpar__cuda_end(llmpar_device *device, llmpar_stream *stream, const char *what)
{
    llmpar_status status = llmpar__cuda_check(device, cudaGetLastError(), what);
    if (!status && !stream) status = llmpar__cuda_check(device, cudaStreamSynchronize(llmpar__cuda_of(device)->now.handle), what);
    return llmpar__cuda_stick(device, stream, status);
}

static llmpar_status llmpar__cuda_dtype(llmpar_device *device, const char *what, llmpar_dtype dtype, int half)
{
    if (dtype == LLMPAR_F32 || (half && (dtype == LLMPAR_BF16 || dtype == LLMPAR_F16))) return LLMPAR_OK;
    return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "%s: dtype %s on device %s, expected %s", what, llmpar_dtype_name(dtype), device->name, half ? "f32, bf16 or f16" : "f32");
}

static unsigned llmpar__cuda_blocks(const llmpar__cuda *cuda, int64_t count, unsigned threads, unsigned waves)
{
    int64_t blocks = (count + (int64_t)threads - 1) / (int64_t)threads, most = (int64_t)cuda->multiprocessors * (cuda->threads_resident / (int)threads) * (int64_t)waves;
    if (most < 1) most = 1;
    return (unsigned)(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

/* ---- memory ---- */

static llmpar_status llmpar__cuda_memory(llmpar_device *device, cudaError_t code, const char *kind, size_t bytes)
{
    size_t left = 0, total = 0;
    if (code != cudaErrorMemoryAllocation && code != cudaErrorInvalidValue) return llmpar__cuda_check(device, code, kind); /* the latter: more than there are addresses for */
    (void)cudaGetLastError();
    if (cudaMemGetInfo(&left, &total) != cudaSuccess) (void)cudaGetLastError();
    return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "device %s: no %s for %llu bytes (%llu of the device's %llu are free)", device->name, kind, (unsigned long long)bytes, (unsigned long long)left, (unsigned long long)total);
}

static llmpar_status llmpar__cuda_alloc(llmpar_device *device, size_t bytes, void **out)
{
    llmpar_status status = llmpar__cuda_begin(device, NULL);
    *out = NULL;
    return status ? status : llmpar__cuda_memory(device, cudaMalloc(out, bytes ? bytes : 1), "memory", bytes);
}

/* Nothing to be told: what fails here fails in the next call too. */
static void llmpar__cuda_wait_all(llmpar_device *device)
{
    llmpar__cuda_region_break(device);
    for (llmpar__cuda_stream *s = llmpar__cuda_of(device)->streams; s; s = s->next)
        if (s->handle && cudaStreamSynchronize(s->handle) != cudaSuccess) (void)cudaGetLastError();
}

static void llmpar__cuda_free(llmpar_device *device, void *memory, size_t bytes)
{
    (void)bytes;
    if (!memory || cudaSetDevice(llmpar__cuda_of(device)->index) != cudaSuccess) return;
    llmpar__cuda_wait_all(device);
    if (cudaFree(memory) != cudaSuccess) (void)cudaGetLastError();
}

static llmpar_status llmpar__cuda_host_alloc(llmpar_device *device, size_t bytes, void **out)
{
    llmpar_status status = llmpar__cuda_begin(device, NULL);
    *out = NULL;
    return status ? status : llmpar__cuda_memory(device, cudaMallocHost(out, bytes ? bytes : 1), "pinned host memory", bytes);
}

static void llmpar__cuda_host_free(llmpar_device *device, void *memory, size_t bytes)
{
    (void)bytes;
    if (!memory || cudaSetDevice(llmpar__cuda_of(device)->index) != cudaSuccess) return;
    if (cudaFreeHost(memory) != cudaSuccess) (void)cudaGetLastError();
}

static llmpar_status llmpar__cuda_copy(llmpar_device *device, llmpar_stream *stream, void *out, const void *in, size_t bytes)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (status || !bytes) return status;
    (void)cudaMemcpyAsync(out, in, bytes, cudaMemcpyDefault, llmpar__cuda_stream_of(device, stream)->handle);
    return llmpar__cuda_end(device, stream, "copy");
}

static llmpar_status llmpar__cuda_zero(llmpar_device *device, llmpar_stream *stream, void *out, size_t bytes)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (status || !bytes) return status;
    (void)cudaMemsetAsync(out, 0, bytes, llmpar__cuda_stream_of(device, stream)->handle);
    return llmpar__cuda_end(device, stream, "zero");
}

/* ---- streams ---- */

/* The handle, and in FAST mode the memory that products on it may use. What was made before a failure is taken back by close. */
static llmpar_status llmpar__cuda_stream_open(llmpar_device *device, llmpar__cuda_stream *own, const char *name)
{
    const llmpar__cuda *cuda = llmpar__cuda_of(device);
    int least = 0, greatest = 0;
    llmpar_status status = llmpar__cuda_begin(device, NULL);
    own->status = LLMPAR_OK;
    own->told = 0;
    llmpar_error_clear(&own->error);
    llmpar_error_clear(&own->refused);
    snprintf(own->name, sizeof own->name, "%.23s", name ? name : "stream");
    /* Communication goes first: others wait for it. */
    if (!status) status = llmpar__cuda_check(device, cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
    if (!status) status = llmpar__cuda_check(device, cudaStreamCreateWithPriority(&own->handle, cudaStreamNonBlocking, strncmp(own->name, "comm", 4) == 0 ? greatest : least), "cudaStreamCreateWithPriority");
    if (!status && cuda->desc.mode == LLMPAR_CUDA_FAST) status = llmpar__cuda_memory(device, cudaMalloc(&own->library, cuda->desc.library_workspace), "workspace of a stream", cuda->desc.library_workspace);
    return status;
}

static void llmpar__cuda_stream_close(llmpar_device *device, llmpar__cuda_stream *own)
{
    if (!own->handle || cudaSetDevice(llmpar__cuda_of(device)->index) != cudaSuccess) return;
    (void)cudaStreamSynchronize(own->handle);
    llmpar__cuda_regions_forget(device, own); /* their products use its workspace */
    (void)cudaFree(own->library);
    (void)cudaStreamDestroy(own->handle);
    (void)cudaGetLastError();
    own->handle = NULL;
    own->library = NULL;
}

static llmpar_status llmpar__cuda_stream_create(llmpar_device *device, const char *name, llmpar_stream **out)
{
    llmpar__cuda *cuda = llmpar__cuda_of(device);
    llmpar__cuda_stream *own = cuda->streams;
    llmpar_status status;
    *out = NULL;
    while (own && own->handle) own = own->next;
    if (!own) {
        own = (llmpar__cuda_stream *)llmpar_heap_zalloc(cuda->heap, 1, sizeof *own);
        if (!own) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "device %s: no memory for stream %s", device->name, name ? name : "?");
        own->next = cuda->streams;
        cuda->streams = own;
    }
    status = llmpar__cuda_stream_open(device, own, name);
    if (status) llmpar__cuda_stream_close(device, own);
    else *out = (llmpar_stream *)(void *)own;
    return status;
}

static void llmpar__cuda_stream_destroy(llmpar_device *device, llmpar_stream *stream)
{
    if (!stream) return;
    if (llmpar__cuda_notes(device, stream)) llmpar__cuda_region_break(device);
    llmpar__cuda_stream_close(device, llmpar__cuda_stream_of(device, stream));
}

static llmpar_status llmpar__cuda_synchronize(llmpar_device *device, llmpar_stream *stream)
{
    llmpar__cuda_stream *own = llmpar__cuda_stream_of(device, stream);
    llmpar_status status = llmpar__cuda_check(device, cudaSetDevice(llmpar__cuda_of(device)->index), "cudaSetDevice");
    if (llmpar__cuda_notes(device, stream)) llmpar__cuda_region_break(device);
    if (!status) status = llmpar__cuda_check(device, cudaStreamSynchronize(own->handle), "synchronize");
    (void)llmpar__cuda_stick(device, stream, status); /* behind what a host call may have stuck there meanwhile */
    return stream && llmpar__cuda_stuck(device, own) ? llmpar__cuda_stuck(device, own) : status;
}

static void *llmpar__cuda_native_stream(llmpar_device *device, llmpar_stream *stream)
{
    if (llmpar__cuda_notes(device, stream)) llmpar__cuda_region_break(device);
    return (void *)llmpar__cuda_stream_of(device, stream)->handle;
}

/* ---- events ---- */

static llmpar_status llmpar__cuda_event_create(llmpar_device *device, llmpar_event **out)
{
    llmpar__cuda *cuda = llmpar__cuda_of(device);
    llmpar_status status = llmpar__cuda_begin(device, NULL);
    llmpar__cuda_event *event;
    *out = NULL;
    if (status) return status;
    event = (llmpar__cuda_event *)llmpar_heap_zalloc(cuda->heap, 1, sizeof *event);
    if (!event) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "device %s: no memory for an event", device->name);
    status = llmpar__cuda_check(device, cudaEventCreateWithFlags(&event->handle, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    if (status) llmpar_heap_free(cuda->heap, event);
    else *out = (llmpar_event *)(void *)event;
    return status;
}

static void llmpar__cuda_event_destroy(llmpar_device *device, llmpar_event *event)
{
    llmpar__cuda_event *own = (llmpar__cuda_event *)(void *)event;
    if (!own) return;
    if (cudaSetDevice(llmpar__cuda_of(device)->index) != cudaSuccess || cudaEventDestroy(own->handle) != cudaSuccess) (void)cudaGetLastError();
    llmpar_heap_free(llmpar__cuda_of(device)->heap, own);
}

static llmpar_status llmpar__cuda_event_record(llmpar_device *device, llmpar_stream *stream, llmpar_event *event)
{
    llmpar__cuda_event *own = (llmpar__cuda_event *)(void *)event;
    llmpar_status status;
    own->stream = llmpar__cuda_stream_of(device, stream);
    status = llmpar__cuda_begin(device, stream);
    if (status) return status;
    (void)cudaEventRecord(own->handle, own->stream->handle);
    return llmpar__cuda_end(device, stream, "event_record");
}

/* What waits for the work of a failed stream has failed too. */
static llmpar_status llmpar__cuda_event_wait(llmpar_device *device, llmpar_stream *stream, llmpar_event *event)
{
    const llmpar__cuda_event *own = (const llmpar__cuda_event *)(const void *)event;
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (status || !own->stream) return status;
    status = llmpar__cuda_stuck(device, own->stream);
    if (status) return llmpar__cuda_stick(device, stream, status);
    (void)cudaStreamWaitEvent(llmpar__cuda_stream_of(device, stream)->handle, own->handle, 0);
    return llmpar__cuda_end(device, stream, "event_wait");
}

static llmpar_status llmpar__cuda_event_synchronize(llmpar_device *device, llmpar_event *event)
{
    const llmpar__cuda_event *own = (const llmpar__cuda_event *)(const void *)event;
    llmpar_status status = llmpar__cuda_begin(device, NULL);
    if (status || !own->stream) return status;
    status = llmpar__cuda_check(device, cudaEventSynchronize(own->handle), "event_synchronize");
    return own->stream != &llmpar__cuda_of(device)->now && llmpar__cuda_stuck(device, own->stream) ? llmpar__cuda_stuck(device, own->stream) : status;
}

/* ---- host calls ---- */

/* On the driver's thread. Nothing is called behind a failure. */
static void CUDART_CB llmpar__cuda_host_run(void *user)
{
    llmpar__cuda_call *call = (llmpar__cuda_call *)user;
    call->thread = pthread_self();
    __atomic_store_n(&call->state, LLMPAR__CUDA_CALL_RUNNING, __ATOMIC_RELEASE);
    if (!__atomic_load_n(&call->stream->status, __ATOMIC_ACQUIRE)) {
        llmpar_status status = call->fn(call->arg.bytes);
        if (status) {
            (void)llmpar_error_set(&call->stream->error, status, "a host call on stream %s failed: %s", call->stream->name, llmpar_status_string(status)); /* unless it said more */
            __atomic_store_n(&call->stream->told, 1, __ATOMIC_RELEASE);
            __atomic_store_n(&call->stream->status, status, __ATOMIC_RELEASE);
        }
    }
    __atomic_store_n(&call->state, LLMPAR__CUDA_CALL_FREE, __ATOMIC_RELEASE);
}

static llmpar_status llmpar__cuda_host_call(llmpar_device *device, llmpar_stream *stream, llmpar_status (*fn)(void *arg), const void *arg, size_t arg_bytes)
{
    llmpar__cuda *cuda = llmpar__cuda_of(device);
    llmpar__cuda_call *call = cuda->calls;
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (status) return status;
    if (arg_bytes > LLMPAR__CUDA_MAX_ARG) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "host_call: %llu bytes of arguments, expected at most %llu", (unsigned long long)arg_bytes, (unsigned long long)LLMPAR__CUDA_MAX_ARG);
    if (!stream) {
        llmpar__cuda_call now;
        if (arg_bytes) memcpy(now.arg.bytes, arg, arg_bytes);
        return fn(now.arg.bytes);
    }
    while (call && __atomic_load_n(&call->state, __ATOMIC_ACQUIRE) != LLMPAR__CUDA_CALL_FREE) call = call->next;
    if (!call) {
        call = (llmpar__cuda_call *)llmpar_heap_zalloc(cuda->heap, 1, sizeof *call);
        if (!call) return llmpar__cuda_stick(device, stream, llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "device %s: no memory for a host call", device->name));
        call->next = cuda->calls;
        __atomic_store_n(&cuda->calls, call, __ATOMIC_RELEASE); /* thread_error reads the list on any thread */
    }
    call->stream = llmpar__cuda_stream_of(device, stream);
    call->fn = fn;
    if (arg_bytes) memcpy(call->arg.bytes, arg, arg_bytes);
    __atomic_store_n(&call->state, LLMPAR__CUDA_CALL_ENQUEUED, __ATOMIC_RELEASE);
    if (cudaLaunchHostFunc(call->stream->handle, llmpar__cuda_host_run, call) != cudaSuccess) __atomic_store_n(&call->state, LLMPAR__CUDA_CALL_FREE, __ATOMIC_RELEASE);
    return llmpar__cuda_end(device, stream, "host_call");
}

static llmpar_error *llmpar__cuda_thread_error(llmpar_device *device)
{
    for (llmpar__cuda_call *c = __atomic_load_n(&llmpar__cuda_of(device)->calls, __ATOMIC_ACQUIRE); c; c = c->next)
        if (__atomic_load_n(&c->state, __ATOMIC_ACQUIRE) == LLMPAR__CUDA_CALL_RUNNING && pthread_equal(c->thread, pthread_self())) return &c->stream->error;
    return NULL;
}

/* A stream runs beside the host and the other streams anyway: nothing is to be done. */
static llmpar_status llmpar__cuda_stream_thread(llmpar_device *device, llmpar_stream *stream)
{
    (void)device;
    (void)stream;
    return LLMPAR_OK;
}

/* ---- the table ---- */

static void llmpar__cuda_fill(llmpar_device *d)
{
    d->abi = LLMPAR_DEVICE_ABI;
    d->size = (uint32_t)sizeof *d;
    d->alignment = 256;
    d->apart = 1;
    d->alloc = llmpar__cuda_alloc;
    d->free = llmpar__cuda_free;
    d->host_alloc = llmpar__cuda_host_alloc;
    d->host_free = llmpar__cuda_host_free;
    d->copy = llmpar__cuda_copy;
    d->zero = llmpar__cuda_zero;
    d->stream_create = llmpar__cuda_stream_create;
    d->stream_destroy = llmpar__cuda_stream_destroy;
    d->synchronize = llmpar__cuda_synchronize;
    d->native_stream = llmpar__cuda_native_stream;
    d->event_create = llmpar__cuda_event_create;
    d->event_destroy = llmpar__cuda_event_destroy;
    d->event_record = llmpar__cuda_event_record;
    d->event_wait = llmpar__cuda_event_wait;
    d->event_synchronize = llmpar__cuda_event_synchronize;
    d->host_call = llmpar__cuda_host_call;
    d->thread_error = llmpar__cuda_thread_error;
    d->stream_thread = llmpar__cuda_stream_thread;
    d->rmsnorm = llmpar__cuda_rmsnorm;
    d->rmsnorm_backward = llmpar__cuda_rmsnorm_backward;
    d->rope = llmpar__cuda_rope;
    d->swiglu = llmpar__cuda_swiglu;
    d->swiglu_backward = llmpar__cuda_swiglu_backward;
    d->embedding = llmpar__cuda_embedding;
    d->embedding_backward = llmpar__cuda_embedding_backward;
    d->embedding_backward_workspace = llmpar__cuda_embedding_backward_workspace;
    d->xent_max = llmpar__cuda_xent_max;
    d->xent_sum = llmpar__cuda_xent_sum;
    d->xent_backward = llmpar__cuda_xent_backward;
    d->add = llmpar__cuda_add;
    d->scale = llmpar__cuda_scale;
    d->copy_rows = llmpar__cuda_copy_rows;
    d->gemm = llmpar__cuda_gemm;
    d->gemm_workspace = llmpar__cuda_gemm_workspace;
    d->attention = llmpar__cuda_attention;
    d->attention_workspace = llmpar__cuda_attention_workspace;
    d->attention_backward = llmpar__cuda_attention_backward;
    d->attention_backward_workspace = llmpar__cuda_attention_backward_workspace;
    d->cast = llmpar__cuda_cast;
    d->tree_sum = llmpar__cuda_tree_sum;
    d->max = llmpar__cuda_max;
    d->xent_loss = llmpar__cuda_xent_loss;
    d->adamw = llmpar__cuda_adamw;
    d->sgd = llmpar__cuda_sgd;
    d->largest = llmpar__cuda_largest;
    d->square_sum = llmpar__cuda_square_sum;
    d->factor_sum = llmpar__cuda_factor_sum;
    d->factor_moment = llmpar__cuda_factor_moment;
    d->adalomo_square = llmpar__cuda_adalomo_square;
    d->adalomo = llmpar__cuda_adalomo;
    if (llmpar__cuda_of(d)->desc.mode == LLMPAR_CUDA_FAST) llmpar__cuda_regions_fill(d);
}

LLMPAR_DEF int32_t llmpar_cuda_count(llmpar_error *error)
{
    int count = 0;
    cudaError_t code = cudaGetDeviceCount(&count);
    if (code == cudaSuccess && count > 0) return (int32_t)count;
    if (code != cudaSuccess) (void)cudaGetLastError();
    (void)llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "cuda: no device: %s (%s)", code == cudaSuccess ? "the driver shows none" : cudaGetErrorString(code), cudaGetErrorName(code));
    return 0;
}

static llmpar_status llmpar__cuda_resolve(llmpar_ctx *ctx, const llmpar_cuda_desc *desc, llmpar_cuda_desc *out)
{
    memset(out, 0, sizeof *out);
    if (desc) *out = *desc;
    if (out->mode == LLMPAR_CUDA_DEFAULT) out->mode = LLMPAR_CUDA_EXACT;
    if (out->mode != LLMPAR_CUDA_EXACT && out->mode != LLMPAR_CUDA_FAST) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "cuda: mode %d, expected LLMPAR_CUDA_EXACT or LLMPAR_CUDA_FAST", (int)out->mode);
    if (out->tf32 && out->mode != LLMPAR_CUDA_FAST) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "cuda: tf32 with mode exact, expected mode fast");
    if (out->cudnn && out->mode != LLMPAR_CUDA_FAST) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "cuda: cudnn with mode exact, expected mode fast");
#ifndef LLMPAR_USE_CUDNN
    if (out->cudnn) return llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "cuda: cudnn in a program built without LLMPAR_USE_CUDNN");
#endif
    if (!out->library_workspace) out->library_workspace = LLMPAR__CUDA_WORKSPACE;
    return LLMPAR_OK;
}

/* What the device is, and whether this program runs there. */
static llmpar_status llmpar__cuda_examine(llmpar_ctx *ctx, llmpar__cuda *cuda)
{
    cudaDeviceProp properties;
    cudaFuncAttributes probe;
    cudaError_t code = cudaSetDevice(cuda->index);
    if (code == cudaSuccess) code = cudaGetDeviceProperties(&properties, cuda->index);
    if (code == cudaSuccess) code = cudaDeviceGetPCIBusId(cuda->place, (int)sizeof cuda->place, cuda->index);
    if (code != cudaSuccess) {
        (void)cudaGetLastError();
        return llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "cuda: device %d cannot be used: %s (%s)", cuda->index, cudaGetErrorString(code), cudaGetErrorName(code));
    }
    cuda->capability = properties.major * 10 + properties.minor;
    cuda->multiprocessors = properties.multiProcessorCount;
    cuda->threads_resident = properties.maxThreadsPerMultiProcessor;
    cuda->shared_limit = properties.sharedMemPerBlockOptin;
    snprintf(cuda->name, sizeof cuda->name, "cuda sm_%d %s%s %.70s", cuda->capability, cuda->desc.mode == LLMPAR_CUDA_FAST ? cuda->desc.tf32 ? "fast tf32" : "fast" : "exact", cuda->desc.cudnn ? " cudnn" : "", properties.name);
    if (cuda->capability < 80) return llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "cuda: device %d (%s) has compute capability %d.%d, expected 8.0 or later", cuda->index, properties.name, properties.major, properties.minor);
    code = cudaFuncGetAttributes(&probe, llmpar__cuda_probe);
    if (code == cudaSuccess) return LLMPAR_OK;
    (void)cudaGetLastError();
    return llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "cuda: this program holds no code for device %d (%s, sm_%d): %s (%s); compile it with -gencode arch=compute_%d,code=sm_%d", cuda->index, properties.name, cuda->capability,
                       cudaGetErrorString(code), cudaGetErrorName(code), cuda->capability, cuda->capability);
}

LLMPAR_DEF llmpar_status llmpar_cuda_create(llmpar_ctx *ctx, const llmpar_cuda_desc *desc, llmpar_device **out)
{
    llmpar_cuda_desc resolved;
    llmpar_error reason;
    llmpar_status status = llmpar__cuda_resolve(ctx, desc, &resolved);
    llmpar__cuda_device *device;
    int32_t count;
    *out = NULL;
    if (status) return status;
    llmpar_error_clear(&reason);
    count = llmpar_cuda_count(&reason);
    if (count < 1) return llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "%s", reason.text);
    device = (llmpar__cuda_device *)llmpar_heap_zalloc(&ctx->heap, 1, sizeof *device);
    if (!device) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "cuda: no memory for the device");
    device->state.heap = &ctx->heap;
    device->state.desc = resolved;
    device->state.index = (int)(ctx->local_rank % count);
    device->table.state = &device->state;
    device->table.error = &ctx->error;
    device->table.name = device->state.name;
    device->table.place = device->state.place;
    llmpar__cuda_fill(&device->table);
    status = llmpar__cuda_examine(ctx, &device->state);
    if (!status) status = llmpar__cuda_stream_open(&device->table, &device->state.now, "now");
    if (!status && resolved.mode == LLMPAR_CUDA_FAST) status = llmpar__cuda_library_create(&device->table);
#ifdef LLMPAR_USE_CUDNN
    if (!status && resolved.cudnn) status = llmpar__cuda_cudnn_create(&device->table);
#endif
    if (status) {
        llmpar_cuda_destroy(&device->table);
        return status;
    }
    *out = &device->table;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_cuda_destroy(llmpar_device *device)
{
    llmpar__cuda *cuda = device ? llmpar__cuda_of(device) : NULL;
    if (!device) return;
    llmpar__cuda_regions_forget(device, NULL);
    while (cuda->streams) {
        llmpar__cuda_stream *s = cuda->streams;
        llmpar__cuda_stream_close(device, s);
        cuda->streams = s->next;
        llmpar_heap_free(cuda->heap, s);
    }
    llmpar__cuda_stream_close(device, &cuda->now);
#ifdef LLMPAR_USE_CUDNN
    llmpar__cuda_cudnn_destroy(device);
#endif
    llmpar__cuda_library_destroy(device);
    while (cuda->calls) {
        llmpar__cuda_call *c = cuda->calls;
        cuda->calls = c->next;
        llmpar_heap_free(cuda->heap, c);
    }
    llmpar_heap_free(cuda->heap, device);
}

static llmpar_status llmpar__cuda_backend_device(const void *user, llmpar_ctx *ctx, llmpar_device **out) { return llmpar_cuda_create(ctx, (const llmpar_cuda_desc *)user, out); }
static void llmpar__cuda_backend_destroy(const void *user, llmpar_device *device)
{
    (void)user;
    llmpar_cuda_destroy(device);
}

static llmpar_status llmpar__cuda_backend_comm(const void *user, llmpar_ctx *ctx, llmpar_device *device, llmpar_comm **out)
{
    (void)user;
    return llmpar_cuda_shared_comm_create(ctx, device, ctx->host_comm, out);
}

LLMPAR_DEF void llmpar_cuda_backend(const llmpar_cuda_desc *desc, llmpar_backend *out)
{
    memset(out, 0, sizeof *out);
    out->abi = LLMPAR_BACKEND_ABI;
    out->size = (uint32_t)sizeof *out;
    out->name = "cuda";
    out->device_user = desc;
    out->device_create = llmpar__cuda_backend_device;
    out->device_destroy = llmpar__cuda_backend_destroy;
    out->comm_create = llmpar__cuda_backend_comm;
}

#undef LLMPAR__CUDA_WORKSPACE
#undef LLMPAR__CUDA_MAX_ARG
