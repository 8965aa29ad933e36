/* The CUDA device itself: what it says without a GPU, memory, streams, events, host calls, failures. */
#include "cuda.h"

/* ---- without a device ---- */

/* In a child, since the runtime reads its environment once: 0 if create refuses with LLMPAR_ERR_UNSUPPORTED and says `part`, and count agrees. */
static int refused(const char *name, const char *value, const char *part, int count)
{
    pid_t child;
    int status = -1;
    fflush(NULL);
    child = fork();
    if (child == 0) {
        llmpar_ctx ctx;
        llmpar_device *device = NULL;
        llmpar_error reason;
        int bad = 0;
        memset(&ctx, 0, sizeof ctx);
        llmpar_heap_init(&ctx.heap, NULL);
        llmpar_error_clear(&ctx.error);
        llmpar_error_clear(&reason);
        setenv(name, value, 1);
        if (llmpar_cuda_count(NULL) != count || llmpar_cuda_count(&reason) != count) bad |= 1;
        if (!count && !strstr(reason.text, part)) bad |= 2;
        if (llmpar_cuda_create(&ctx, NULL, &device) != LLMPAR_ERR_UNSUPPORTED || device) bad |= 4;
        if (!strstr(ctx.error.text, part)) bad |= 8;
        if (ctx.heap.live) bad |= 16;
        if (bad) fprintf(stderr, "%s=%s: %d: \"%s\", \"%s\"\n", name, value, bad, reason.text, ctx.error.text);
        _exit(bad);
    }
    waitpid(child, &status, 0);
    return status;
}

/* First, while this process has not called CUDA yet. */
TEST(no_device)
{
    CHECK_INT(refused("CUDA_VISIBLE_DEVICES", "-1", "no device", 0), 0);
    if (!cuda_emulated()) return;
    CHECK_INT(refused("EMULATED_CUDA_DEVICES", "0", "driver version is insufficient", 0), 0);
    CHECK_INT(refused("EMULATED_CUDA_DEVICES", "-1", "no CUDA-capable device is detected", 0), 0);
    CHECK_INT(refused("EMULATED_CUDA_CAPABILITY", "75", "compute capability 7.5, expected 8.0", 1), 0);
    CHECK_INT(refused("EMULATED_CUDA_NO_IMAGE", "1", "no code for device 0 (Emulated, sm_90)", 1), 0);
}

TEST(creates)
{
    llmpar_device *device;
    llmpar_backend backend;
    llmpar_cuda_desc desc;
    CUDA_OPEN();
    CHECK_TEXT(cuda_gpu->name, "cuda sm_");
    CHECK_TEXT(cuda_gpu->name, " exact ");
    CHECK_INT(cuda_gpu->apart, 1);
    CHECK(cuda_gpu->alignment >= 256);
    CHECK(cuda_gpu->place && strchr(cuda_gpu->place, ':'));
    memset(&desc, 0, sizeof desc);
    desc.tf32 = 1;
    CUDA_REFUSED(llmpar_cuda_create(&cuda_ctx, &desc, &device), LLMPAR_ERR_ARGUMENT, "tf32 with mode exact");
    memset(&desc, 0, sizeof desc);
    desc.cudnn = 1;
    CUDA_REFUSED(llmpar_cuda_create(&cuda_ctx, &desc, &device), LLMPAR_ERR_ARGUMENT, "cudnn with mode exact");
    memset(&desc, 0, sizeof desc);
    desc.mode = (llmpar_cuda_mode)3;
    CUDA_REFUSED(llmpar_cuda_create(&cuda_ctx, &desc, &device), LLMPAR_ERR_ARGUMENT, "mode 3");
    llmpar_cuda_destroy(NULL);
    cuda_ctx.local_rank = 5; /* more ranks than GPUs: they share */
    llmpar_cuda_backend(NULL, &backend);
    CHECK_INT(backend.abi, LLMPAR_BACKEND_ABI);
    CHECK_INT(backend.size, sizeof backend);
    CUDA_OK(backend.device_create(backend.device_user, &cuda_ctx, &device));
    CHECK_BYTES(device->name, cuda_gpu->name, strlen(cuda_gpu->name));
    backend.device_destroy(backend.device_user, device);
    backend.device_destroy(backend.device_user, NULL);
    cuda_ctx.local_rank = 0;
}

/* Each allocation of host memory fails once. */
TEST(host_memory_runs_out)
{
    llmpar_ctx ctx;
    int done = 0;
    CUDA_OPEN();
    for (uint64_t n = 1; !done && n < 50; n++) {
        llmpar_device *device = NULL;
        llmpar_stream *stream = NULL;
        llmpar_event *event = NULL;
        llmpar_status status;
        memset(&ctx, 0, sizeof ctx);
        llmpar_heap_init(&ctx.heap, NULL);
        llmpar_error_clear(&ctx.error);
        ctx.heap.fail_at = n;
        status = llmpar_cuda_create(&ctx, NULL, &device);
        if (!status) status = device->stream_create(device, "compute", &stream);
        if (!status) status = device->event_create(device, &event);
        if (!status) done = 1;
        else CHECK_INT(status, LLMPAR_ERR_MEMORY);
        if (device) device->event_destroy(device, event);
        if (device) device->stream_destroy(device, stream);
        llmpar_cuda_destroy(device);
        CHECK_INT(ctx.heap.live, 0);
    }
    CHECK(done);
}

/* ---- memory ---- */

TEST(copies)
{
    int64_t sizes[] = {1, 255, 4096, 100003};
    CUDA_OPEN();
    for (int i = 0; i < 4; i++) {
        int64_t n = sizes[i];
        double *x = ops_random(n, 1.0), *y = ops_zeros(n);
        void *a = cuda_put_vector(cuda_gpu, LLMPAR_F32, x, n), *b = cuda_put(cuda_gpu, LLMPAR_F32, NULL, 1, n, n, 1);
        CHECK_INT((uintptr_t)cuda_find(a)->memory % 256, 0);
        CUDA_OK(cuda_gpu->copy(cuda_gpu, NULL, b, a, (size_t)n * 4));
        cuda_get(b, y);
        cuda_same("copy", y, x, n);
        CUDA_OK(cuda_gpu->zero(cuda_gpu, NULL, b, (size_t)n * 4));
        cuda_get(b, y);
        for (int64_t k = 0; k < n; k++) if (y[k] != 0.0) { TEST_FAIL("zero"); break; }
        cuda_done();
        free(x);
        free(y);
    }
    CUDA_OK(cuda_gpu->copy(cuda_gpu, NULL, NULL, NULL, 0));
    CUDA_OK(cuda_gpu->zero(cuda_gpu, NULL, NULL, 0));
}

TEST(memory)
{
    void *a = NULL, *b = NULL;
    CUDA_OPEN();
    CUDA_OK(cuda_gpu->alloc(cuda_gpu, 0, &a));
    CUDA_OK(cuda_gpu->alloc(cuda_gpu, 0, &b));
    CHECK(a && b && a != b);
    cuda_gpu->free(cuda_gpu, a, 0);
    cuda_gpu->free(cuda_gpu, b, 0);
    cuda_gpu->free(cuda_gpu, NULL, 0);
    CUDA_REFUSED(cuda_gpu->alloc(cuda_gpu, (size_t)1 << 60, &a), LLMPAR_ERR_MEMORY, "no memory for 1152921504606846976 bytes");
    CHECK(!a);
    CUDA_OK(cuda_gpu->alloc(cuda_gpu, 1000, &a)); /* the failure is forgotten */
    CHECK_INT((uintptr_t)a % cuda_gpu->alignment, 0);
    CUDA_OK(cuda_gpu->zero(cuda_gpu, NULL, a, 1000));
    cuda_gpu->free(cuda_gpu, a, 1000);
    CUDA_REFUSED(cuda_gpu->host_alloc(cuda_gpu, (size_t)1 << 60, &a), LLMPAR_ERR_MEMORY, "pinned host memory for 1152921504606846976 bytes");
    cuda_gpu->host_free(cuda_gpu, NULL, 0);
    if (!cuda_emulated()) return;
    emulated_cuda_fail_alloc(1);
    CUDA_REFUSED(cuda_gpu->host_alloc(cuda_gpu, 10, &a), LLMPAR_ERR_MEMORY, "pinned host memory for 10 bytes");
}

/* Through pinned memory on a stream: what the host then sees is what was sent. */
TEST(pinned)
{
    int32_t *host = NULL, *back = NULL, n = 5000;
    void *device = NULL;
    llmpar_stream *stream;
    CUDA_OPEN();
    CUDA_OK(cuda_gpu->host_alloc(cuda_gpu, (size_t)n * 4, (void **)&host));
    CUDA_OK(cuda_gpu->host_alloc(cuda_gpu, (size_t)n * 4, (void **)&back));
    CUDA_OK(cuda_gpu->alloc(cuda_gpu, (size_t)n * 4, &device));
    CUDA_OK(cuda_gpu->stream_create(cuda_gpu, "copy", &stream));
    for (int i = 0; i < n; i++) host[i] = i * 7;
    CUDA_OK(cuda_gpu->copy(cuda_gpu, stream, device, host, (size_t)n * 4));
    CUDA_OK(cuda_gpu->copy(cuda_gpu, stream, back, device, (size_t)n * 4));
    CUDA_OK(cuda_gpu->synchronize(cuda_gpu, stream));
    CHECK_BYTES(back, host, (size_t)n * 4);
    cuda_gpu->stream_destroy(cuda_gpu, stream);
    cuda_gpu->free(cuda_gpu, device, (size_t)n * 4);
    cuda_gpu->host_free(cuda_gpu, host, (size_t)n * 4);
    cuda_gpu->host_free(cuda_gpu, back, (size_t)n * 4);
}

/* Memory that is freed right behind an enqueue has served it. */
TEST(free_waits)
{
    size_t bytes = cuda_small() ? 100000 : (size_t)256 << 20;
    unsigned char *host = (unsigned char *)malloc(bytes);
    CUDA_OPEN();
    for (int round = 0; round < 10; round++) {
        llmpar_stream *stream;
        void *a, *b;
        CUDA_OK(cuda_gpu->stream_create(cuda_gpu, NULL, &stream));
        CUDA_OK(cuda_gpu->alloc(cuda_gpu, bytes, &a));
        CUDA_OK(cuda_gpu->alloc(cuda_gpu, bytes, &b));
        CUDA_OK(cuda_gpu->zero(cuda_gpu, stream, a, bytes));
        CUDA_OK(cuda_gpu->copy(cuda_gpu, stream, b, a, bytes));
        cuda_gpu->free(cuda_gpu, a, bytes);
        CUDA_OK(cuda_gpu->copy(cuda_gpu, NULL, host, b, bytes));
        for (size_t i = 0; i < bytes; i++) if (host[i]) { TEST_FAIL("byte %llu of memory freed too early", (unsigned long long)i); break; }
        cuda_gpu->stream_destroy(cuda_gpu, stream);
        cuda_gpu->free(cuda_gpu, b, bytes);
    }
    free(host);
}

/* ---- streams and events ---- */

/* Numbers go round through buffers of four streams, with events between them, as a random program says; the host does the same with plain copies. */
TEST(events)
{
    enum { STREAMS = 4, BUFFERS = 6, N = 600 };
    llmpar_stream *streams[STREAMS];
    llmpar_event *written[BUFFERS];
    unsigned char *buffers[BUFFERS], host[BUFFERS][N], got[N];
    llmpar_event *never;
    CUDA_OPEN();
    CUDA_OK(cuda_gpu->event_create(cuda_gpu, &never));
    for (int s = 0; s < STREAMS; s++) CUDA_OK(cuda_gpu->stream_create(cuda_gpu, s ? "compute" : "comm", &streams[s]));
    for (int s = 1; s < STREAMS; s++) CHECK(cuda_gpu->native_stream(cuda_gpu, streams[s]) != cuda_gpu->native_stream(cuda_gpu, streams[s - 1]));
    CHECK(cuda_gpu->native_stream(cuda_gpu, NULL) != NULL);
    for (int b = 0; b < BUFFERS; b++) {
        void *memory;
        CUDA_OK(cuda_gpu->event_create(cuda_gpu, &written[b]));
        CUDA_OK(cuda_gpu->alloc(cuda_gpu, N, &memory));
        buffers[b] = (unsigned char *)memory;
        memset(host[b], b + 1, N);
        CUDA_OK(cuda_gpu->copy(cuda_gpu, NULL, buffers[b], host[b], N));
    }
    for (int s = 0; s < STREAMS; s++) CUDA_OK(cuda_gpu->event_wait(cuda_gpu, streams[s], never));
    CUDA_OK(cuda_gpu->event_synchronize(cuda_gpu, never));
    for (int step = 0; step < 300; step++) {
        int s = (int)ops_below(STREAMS), from = (int)ops_below(BUFFERS), to = (int)ops_below(BUFFERS);
        size_t n = 1 + (size_t)ops_below(N / 2), at = (size_t)ops_below(N / 2);
        if (from == to) continue;
        CUDA_OK(cuda_gpu->event_wait(cuda_gpu, streams[s], written[from])); /* what was last read or written there */
        CUDA_OK(cuda_gpu->event_wait(cuda_gpu, streams[s], written[to]));
        CUDA_OK(cuda_gpu->copy(cuda_gpu, streams[s], buffers[to] + at, buffers[from] + at / 2, n));
        CUDA_OK(cuda_gpu->event_record(cuda_gpu, streams[s], written[to]));
        CUDA_OK(cuda_gpu->event_record(cuda_gpu, streams[s], written[from]));
        memcpy(host[to] + at, host[from] + at / 2, n);
        if (step % 40 == 0) CUDA_OK(cuda_gpu->event_synchronize(cuda_gpu, written[to]));
    }
    for (int b = 0; b < BUFFERS; b++) {
        CUDA_OK(cuda_gpu->event_synchronize(cuda_gpu, written[b]));
        CUDA_OK(cuda_gpu->copy(cuda_gpu, NULL, got, buffers[b], N));
        CHECK_BYTES(got, host[b], N);
        cuda_gpu->free(cuda_gpu, buffers[b], N);
        cuda_gpu->event_destroy(cuda_gpu, written[b]);
    }
    cuda_gpu->event_destroy(cuda_gpu, never);
    cuda_gpu->event_destroy(cuda_gpu, NULL);
    for (int s = 0; s < STREAMS; s++) {
        CUDA_OK(cuda_gpu->synchronize(cuda_gpu, streams[s]));
        cuda_gpu->stream_destroy(cuda_gpu, streams[s]);
    }
    cuda_gpu->stream_destroy(cuda_gpu, NULL);
    CUDA_OK(cuda_gpu->synchronize(cuda_gpu, NULL));
}

/* ---- host calls ---- */

typedef struct note { int *list, *count, value; llmpar_status status; llmpar_device *device; unsigned char filler[200]; } note;
static llmpar_status take_note(void *arg)
{
    const note *n = (const note *)arg;
    n->list[(*n->count)++] = n->value;
    for (int i = 0; i < 200; i++) if (n->filler[i] != (unsigned char)n->value) n->list[0] = -1;
    if (n->status == LLMPAR_ERR_PEER) return llmpar_error_set(llmpar_device_thread_error(n->device, NULL), n->status, "the note %d says so", n->value);
    return n->status;
}
static note make_note(int *list, int *count, int value, llmpar_status status)
{
    note n;
    n.list = list;
    n.count = count;
    n.value = value;
    n.status = status;
    n.device = cuda_gpu;
    memset(n.filler, value, sizeof n.filler);
    return n;
}

TEST(host_calls)
{
    int list[200], count = 0;
    unsigned char seen[64];
    void *memory;
    llmpar_stream *stream;
    CUDA_OPEN();
    CUDA_OK(cuda_gpu->stream_create(cuda_gpu, "calls", &stream));
    CUDA_OK(cuda_gpu->alloc(cuda_gpu, 64, &memory));
    for (int i = 0; i < 200; i++) {
        note n = make_note(list, &count, i % 200, LLMPAR_OK);
        CUDA_OK(cuda_gpu->host_call(cuda_gpu, stream, take_note, &n, sizeof n)); /* n is gone at once */
    }
    CUDA_OK(cuda_gpu->synchronize(cuda_gpu, stream));
    CHECK_INT(count, 200);
    for (int i = 0; i < 200 && i < count; i++) if (list[i] != i) { TEST_FAIL("call %d came as number %d", list[i], i); break; }
    CHECK(llmpar_device_thread_error(cuda_gpu, NULL) == NULL);
    { /* stream NULL: now, on this thread */
        note n = make_note(list, &count, 7, LLMPAR_OK);
        count = 0;
        CUDA_OK(cuda_gpu->host_call(cuda_gpu, NULL, take_note, &n, sizeof n));
        CHECK_INT(count, 1);
        n.status = LLMPAR_ERR_SHAPE;
        CHECK_STATUS(cuda_gpu->host_call(cuda_gpu, NULL, take_note, &n, sizeof n), LLMPAR_ERR_SHAPE);
        CUDA_REFUSED(cuda_gpu->host_call(cuda_gpu, stream, take_note, list, 257), LLMPAR_ERR_ARGUMENT, "257 bytes");
    }
    /* in stream order with copies: the call sees what the copy before it has brought */
    CUDA_OK(cuda_gpu->zero(cuda_gpu, stream, memory, 64));
    memset(seen, 1, sizeof seen);
    CUDA_OK(cuda_gpu->copy(cuda_gpu, stream, seen, memory, 64));
    CUDA_OK(cuda_gpu->synchronize(cuda_gpu, stream));
    CHECK_INT(seen[63], 0);
    cuda_gpu->free(cuda_gpu, memory, 64);
    cuda_gpu->stream_destroy(cuda_gpu, stream);
}

/* What fails sticks to its stream, with its text; to those who wait for it; not to others. */
TEST(host_call_fails)
{
    int list[10] = {0}, count = 0, quiet_list[10] = {0}, quiet_count = 0;
    llmpar_stream *bad, *behind, *apart, *quiet;
    llmpar_event *event;
    note n;
    CUDA_OPEN();
    CUDA_OK(cuda_gpu->stream_create(cuda_gpu, "bad", &bad));
    CUDA_OK(cuda_gpu->stream_create(cuda_gpu, "behind", &behind));
    CUDA_OK(cuda_gpu->stream_create(cuda_gpu, "apart", &apart));
    CUDA_OK(cuda_gpu->stream_create(cuda_gpu, "quiet", &quiet));
    CUDA_OK(cuda_gpu->event_create(cuda_gpu, &event));
    n = make_note(list, &count, 1, LLMPAR_OK);
    CUDA_OK(cuda_gpu->host_call(cuda_gpu, bad, take_note, &n, sizeof n));
    n = make_note(list, &count, 2, LLMPAR_ERR_PEER);
    CUDA_OK(cuda_gpu->host_call(cuda_gpu, bad, take_note, &n, sizeof n));
    n = make_note(list, &count, 3, LLMPAR_OK);
    (void)cuda_gpu->host_call(cuda_gpu, bad, take_note, &n, sizeof n); /* the failure may be known by now */
    (void)cuda_gpu->event_record(cuda_gpu, bad, event);
    CUDA_REFUSED(cuda_gpu->synchronize(cuda_gpu, bad), LLMPAR_ERR_PEER, "the note 2 says so");
    CHECK_INT(count, 2);
    CHECK_STATUS(cuda_gpu->event_wait(cuda_gpu, behind, event), LLMPAR_ERR_PEER);
    CHECK_STATUS(cuda_gpu->event_synchronize(cuda_gpu, event), LLMPAR_ERR_PEER);
    CHECK_STATUS(cuda_gpu->synchronize(cuda_gpu, behind), LLMPAR_ERR_PEER);
    CHECK_STATUS(cuda_gpu->host_call(cuda_gpu, bad, take_note, &n, sizeof n), LLMPAR_ERR_PEER);
    CHECK_STATUS(cuda_gpu->zero(cuda_gpu, bad, list, 0), LLMPAR_ERR_PEER);
    llmpar_error_clear(&cuda_ctx.error);
    n = make_note(quiet_list, &quiet_count, 4, LLMPAR_ERR_IO); /* says nothing itself */
    CUDA_OK(cuda_gpu->host_call(cuda_gpu, quiet, take_note, &n, sizeof n));
    CUDA_REFUSED(cuda_gpu->synchronize(cuda_gpu, quiet), LLMPAR_ERR_IO, "a host call on stream quiet failed");
    n = make_note(list, &count, 5, LLMPAR_OK);
    CUDA_OK(cuda_gpu->host_call(cuda_gpu, apart, take_note, &n, sizeof n));
    CUDA_OK(cuda_gpu->synchronize(cuda_gpu, apart));
    CHECK_INT(count, 3);
    cuda_gpu->stream_destroy(cuda_gpu, bad);
    cuda_gpu->stream_destroy(cuda_gpu, behind);
    cuda_gpu->stream_destroy(cuda_gpu, quiet);
    CUDA_OK(cuda_gpu->stream_create(cuda_gpu, "bad", &bad)); /* a new one knows nothing of it */
    CUDA_OK(cuda_gpu->synchronize(cuda_gpu, bad));
    cuda_gpu->stream_destroy(cuda_gpu, bad);
    cuda_gpu->stream_destroy(cuda_gpu, apart);
    cuda_gpu->event_destroy(cuda_gpu, event);
    llmpar_error_clear(&cuda_ctx.error);
}

/* An error that other code left with the thread is not the next operation's. */
int cudaSetDevice(int device);
TEST(errors_of_others)
{
    llmpar_stream *stream;
    void *memory;
    CUDA_OPEN();
    CUDA_OK(cuda_gpu->stream_create(cuda_gpu, "compute", &stream));
    CUDA_OK(cuda_gpu->alloc(cuda_gpu, 64, &memory));
    CHECK(cudaSetDevice(1 << 20) != 0);
    CUDA_OK(cuda_gpu->zero(cuda_gpu, stream, memory, 64));
    CHECK(cudaSetDevice(1 << 20) != 0);
    CUDA_OK(cuda_gpu->zero(cuda_gpu, NULL, memory, 64));
    CUDA_OK(cuda_gpu->synchronize(cuda_gpu, stream));
    cuda_gpu->stream_destroy(cuda_gpu, stream);
    cuda_gpu->free(cuda_gpu, memory, 64);
}

/* ---- failures of launches and kernels, which the emulation can be asked for ---- */

TEST(kernel_fails)
{
    llmpar_stream *stream, *other;
    llmpar_add_args add;
    double x[32] = {0}, y[32];
    CUDA_OPEN();
    if (!cuda_emulated()) TEST_SKIP("a failing kernel takes the process's GPU with it");
    memset(&add, 0, sizeof add);
    add.a = add.b = cuda_put_vector(cuda_gpu, LLMPAR_F32, x, 32);
    add.out = cuda_put_vector(cuda_gpu, LLMPAR_F32, NULL, 32);
    add.count = 32;
    add.dtype = LLMPAR_F32;
    CUDA_OK(cuda_gpu->stream_create(cuda_gpu, "compute", &stream));
    CUDA_OK(cuda_gpu->stream_create(cuda_gpu, "other", &other));
    emulated_cuda_fail_launch(9, 1); /* refused at once: only that stream is done for */
    CUDA_REFUSED(cuda_gpu->add(cuda_gpu, stream, &add), LLMPAR_ERR_INTERNAL, "cudaErrorInvalidConfiguration");
    CUDA_REFUSED(cuda_gpu->add(cuda_gpu, stream, &add), LLMPAR_ERR_INTERNAL, "cudaErrorInvalidConfiguration"); /* with its text, though the rank's was forgotten */
    CHECK_STATUS(cuda_gpu->synchronize(cuda_gpu, stream), LLMPAR_ERR_INTERNAL);
    CUDA_OK(cuda_gpu->add(cuda_gpu, other, &add));
    CUDA_OK(cuda_gpu->synchronize(cuda_gpu, other));
    cuda_get(add.out, y);
    cuda_same("add", y, x, 32);
    emulated_cuda_fail_launch(9, 1); /* stream NULL keeps no failure */
    CUDA_REFUSED(cuda_gpu->add(cuda_gpu, NULL, &add), LLMPAR_ERR_INTERNAL, "add: device cuda sm_90 exact Emulated failed: invalid configuration argument");
    CUDA_OK(cuda_gpu->add(cuda_gpu, NULL, &add));
    emulated_cuda_fail_kernel(700, 1); /* while it runs: accepted, seen by whoever waits, and by everything later */
    (void)cuda_gpu->add(cuda_gpu, other, &add);
    CUDA_REFUSED(cuda_gpu->synchronize(cuda_gpu, other), LLMPAR_ERR_INTERNAL, "cudaErrorIllegalAddress");
    CHECK_STATUS(cuda_gpu->synchronize(cuda_gpu, other), LLMPAR_ERR_INTERNAL);
    CHECK_STATUS(cuda_gpu->copy(cuda_gpu, NULL, y, add.out, 4), LLMPAR_ERR_INTERNAL);
    emulated_cuda_fail_kernel(0, 0);
    llmpar_error_clear(&cuda_ctx.error);
    CHECK_STATUS(cuda_gpu->add(cuda_gpu, other, &add), LLMPAR_ERR_INTERNAL); /* sticks */
    cuda_gpu->stream_destroy(cuda_gpu, stream);
    cuda_gpu->stream_destroy(cuda_gpu, other);
    llmpar_error_clear(&cuda_ctx.error);
    cuda_done();
}

TEST_LIST(T_(no_device), T_(creates), T_(host_memory_runs_out), T_(copies), T_(memory), T_(pinned), T_(free_waits), T_(events), T_(host_calls), T_(host_call_fails), T_(errors_of_others), T_(kernel_fails), T_(cuda_end))
