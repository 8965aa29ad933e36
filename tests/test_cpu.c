/* cpu: the device without its operations: levels, creation, memory, streams, events, host calls, workers. */
#include "test.h"

#include <pthread.h>
#if defined(__linux__)
#include <dirent.h>
#include <sys/prctl.h>
#endif

typedef struct machine { llmpar_heap heap; llmpar_error error; llmpar_device *device; } machine;

static void machine_begin(machine *w, int threads)
{
    llmpar_cpu_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.threads = threads;
    llmpar_heap_init(&w->heap, NULL);
    llmpar_error_clear(&w->error);
    CHECK_OK(llmpar_cpu_create(&w->heap, &w->error, &desc, &w->device));
}
static void machine_end(machine *w)
{
    llmpar_cpu_destroy(w->device);
    CHECK_INT(w->heap.live, 0);
}

TEST(levels)
{
    llmpar_cpu_level level = LLMPAR_CPU_DEFAULT;
    for (int i = (int)LLMPAR_CPU_PORTABLE; i <= (int)LLMPAR_CPU_AVX512BF16; i++) {
        CHECK(llmpar_cpu_level_parse(llmpar_cpu_level_name((llmpar_cpu_level)i), &level));
        CHECK_INT(level, i);
    }
    CHECK(!llmpar_cpu_level_parse("avx", &level));
    CHECK(!llmpar_cpu_level_parse("", &level));
    CHECK(!llmpar_cpu_level_parse("?", &level));
    CHECK_INT(level, LLMPAR_CPU_AVX512BF16);
    CHECK(llmpar_cpu_best_level() >= LLMPAR_CPU_PORTABLE && llmpar_cpu_best_level() <= LLMPAR_CPU_AVX512BF16);
    CHECK(strcmp(llmpar_cpu_level_name(LLMPAR_CPU_DEFAULT), "?") == 0);
}

static void refuse(llmpar_cpu_level level, int threads, llmpar_status want, const char *text)
{
    llmpar_heap heap;
    llmpar_error error;
    llmpar_cpu_desc desc;
    llmpar_device *device = (llmpar_device *)(void *)&heap;
    memset(&desc, 0, sizeof desc);
    desc.level = level;
    desc.threads = threads;
    llmpar_heap_init(&heap, NULL);
    llmpar_error_clear(&error);
    CHECK_STATUS(llmpar_cpu_create(&heap, &error, &desc, &device), want);
    CHECK(device == NULL);
    CHECK_TEXT(error.text, text);
    CHECK_INT(heap.live, 0);
}

TEST(creation)
{
    llmpar_heap heap;
    llmpar_error error;
    llmpar_device *device;
    llmpar_heap_init(&heap, NULL);
    llmpar_error_clear(&error);
    CHECK_OK(llmpar_cpu_create(&heap, &error, NULL, &device));
    CHECK_INT(device->abi, LLMPAR_DEVICE_ABI);
    CHECK_INT(device->size, sizeof(llmpar_device));
    CHECK_TEXT(device->name, "cpu ");
    CHECK_TEXT(device->name, llmpar_cpu_level_name(llmpar_cpu_best_level()));
    CHECK(device->alignment >= 64 && llmpar_is_pow2((int64_t)device->alignment));
    {   /* every slot is there: the table from `alloc` to `apart` is function pointers only; what follows is for devices with memory of their own */
        void *slot, *const *slots = (void *const *)(void *)((char *)device + offsetof(llmpar_device, alloc));
        for (size_t i = 0; i < (offsetof(llmpar_device, apart) - offsetof(llmpar_device, alloc)) / sizeof slot; i++) {
            slot = slots[i];
            if (!slot) TEST_FAIL("slot %d of the table is empty", (int)i);
        }
        CHECK(!device->apart && !device->host_alloc && !device->host_free && !device->native_stream && !device->place && !device->region_begin && !device->region_end);
    }
    llmpar_cpu_destroy(device);
    llmpar_cpu_destroy(NULL);
    CHECK_INT(heap.live, 0);
    refuse(LLMPAR_CPU_DEFAULT, -1, LLMPAR_ERR_ARGUMENT, "got -1");
    refuse(LLMPAR_CPU_DEFAULT, 100000, LLMPAR_ERR_ARGUMENT, "got 100000");
    refuse((llmpar_cpu_level)77, 1, LLMPAR_ERR_ARGUMENT, "77");
    if (llmpar_cpu_best_level() < LLMPAR_CPU_AVX512) refuse(LLMPAR_CPU_AVX512, 1, LLMPAR_ERR_UNSUPPORTED, "avx512");
    if (llmpar_cpu_best_level() < LLMPAR_CPU_AVX512BF16) refuse(LLMPAR_CPU_AVX512BF16, 1, LLMPAR_ERR_UNSUPPORTED, "avx512bf16");
}

TEST(out_of_memory)
{
    for (uint64_t n = 1; n < 20; n++) {
        llmpar_heap heap;
        llmpar_error error;
        llmpar_cpu_desc desc;
        llmpar_device *device;
        llmpar_stream *stream = NULL;
        llmpar_event *event = NULL;
        void *memory = NULL;
        llmpar_status status;
        memset(&desc, 0, sizeof desc);
        desc.threads = 2;
        llmpar_heap_init(&heap, NULL);
        llmpar_error_clear(&error);
        heap.fail_at = n;
        status = llmpar_cpu_create(&heap, &error, &desc, &device);
        if (status) CHECK(device == NULL);
        else {
            if (!status) status = device->stream_create(device, "main", &stream);
            if (!status) status = device->event_create(device, &event);
            if (!status) status = device->alloc(device, 1000, &memory);
            device->free(device, memory, 1000);
            if (event) device->event_destroy(device, event);
            if (stream) device->stream_destroy(device, stream);
            llmpar_cpu_destroy(device);
        }
        CHECK_INT(heap.live, 0);
        if (!status) {
            CHECK(n > 5);
            return;
        }
        CHECK_STATUS(status, LLMPAR_ERR_MEMORY);
        CHECK_TEXT(error.text, "cpu: no memory");
    }
    TEST_FAIL("still failing at allocation 20");
}

TEST(memory)
{
    machine w;
    unsigned char *a, *b, *empty;
    void *memory;
    machine_begin(&w, 1);
    CHECK_OK(w.device->alloc(w.device, 1000, &memory));
    a = (unsigned char *)memory;
    CHECK_OK(w.device->alloc(w.device, 1000, &memory));
    b = (unsigned char *)memory;
    CHECK_OK(w.device->alloc(w.device, 0, &memory));
    empty = (unsigned char *)memory;
    CHECK(empty != NULL);
    CHECK_INT((uintptr_t)a % w.device->alignment, 0);
    CHECK_INT((uintptr_t)b % w.device->alignment, 0);
    for (int i = 0; i < 1000; i++) a[i] = (unsigned char)i;
    CHECK_OK(w.device->copy(w.device, NULL, b, a, 1000));
    CHECK_BYTES(b, a, 1000);
    CHECK_OK(w.device->zero(w.device, NULL, b + 1, 998));
    for (int i = 0; i < 1000; i++) CHECK_INT(b[i], i == 0 || i == 999 ? a[i] : 0);
    CHECK_OK(w.device->copy(w.device, NULL, NULL, NULL, 0));
    CHECK_OK(w.device->zero(w.device, NULL, NULL, 0));
    w.device->free(w.device, a, 1000);
    w.device->free(w.device, b, 1000);
    w.device->free(w.device, empty, 0);
    w.device->free(w.device, NULL, 0);
    machine_end(&w);
}

typedef struct call { int *count; llmpar_status answer; char text[200]; } call;
static llmpar_status count_call(void *arg)
{
    call *c = (call *)arg;
    ++*c->count;
    memset(c->text, 0, sizeof c->text); /* the copy belongs to the call */
    return c->answer;
}

/* A failure sticks to its stream, and reaches another stream only through an event. */
TEST(streams)
{
    machine w;
    llmpar_stream *bad, *good;
    llmpar_event *event, *never;
    int count = 0;
    char byte = 1, zero = 0;
    char large[300] = { 0 };
    call c;
    llmpar_gemm_args gemm;
    machine_begin(&w, 1);
    CHECK_OK(w.device->stream_create(w.device, "bad", &bad));
    CHECK_OK(w.device->stream_create(w.device, NULL, &good));
    CHECK_OK(w.device->event_create(w.device, &event));
    CHECK_OK(w.device->event_create(w.device, &never));
    memset(&c, 0, sizeof c);
    c.count = &count;
    c.text[0] = 'x';
    CHECK_OK(w.device->host_call(w.device, bad, count_call, &c, sizeof c));
    CHECK_INT(count, 1);
    CHECK_INT(c.text[0], 'x');
    CHECK_OK(w.device->event_wait(w.device, bad, never));
    CHECK_OK(w.device->event_synchronize(w.device, never));
    CHECK_OK(w.device->event_record(w.device, bad, event));
    CHECK_OK(w.device->event_synchronize(w.device, event));
    CHECK_OK(w.device->event_wait(w.device, good, event));

    c.answer = LLMPAR_ERR_PEER;
    CHECK_STATUS(w.device->host_call(w.device, bad, count_call, &c, sizeof c), LLMPAR_ERR_PEER);
    CHECK_INT(count, 2);
    CHECK_STATUS(w.device->synchronize(w.device, bad), LLMPAR_ERR_PEER);
    CHECK_STATUS(w.device->host_call(w.device, bad, count_call, &c, sizeof c), LLMPAR_ERR_PEER);
    CHECK_INT(count, 2); /* not called any more */
    CHECK_STATUS(w.device->copy(w.device, bad, &byte, &zero, 1), LLMPAR_ERR_PEER);
    CHECK_STATUS(w.device->zero(w.device, bad, &byte, 1), LLMPAR_ERR_PEER);
    CHECK_INT(byte, 1);
    memset(&gemm, 0, sizeof gemm); /* refused by its own checks if it came that far */
    CHECK_STATUS(w.device->gemm(w.device, bad, &gemm), LLMPAR_ERR_PEER);
    CHECK_OK(w.device->synchronize(w.device, good));
    CHECK_STATUS(w.device->event_record(w.device, bad, event), LLMPAR_ERR_PEER);
    CHECK_STATUS(w.device->event_synchronize(w.device, event), LLMPAR_ERR_PEER);
    CHECK_STATUS(w.device->event_wait(w.device, good, event), LLMPAR_ERR_PEER);
    CHECK_STATUS(w.device->synchronize(w.device, good), LLMPAR_ERR_PEER);
    w.device->stream_destroy(w.device, good);

    CHECK_OK(w.device->stream_create(w.device, "fresh", &good));
    CHECK_STATUS(w.device->host_call(w.device, good, count_call, large, sizeof large), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(w.error.text, "got 300");
    CHECK_STATUS(w.device->gemm(w.device, good, &gemm), LLMPAR_ERR_ARGUMENT);
    w.device->event_destroy(w.device, never);
    w.device->event_destroy(w.device, event);
    w.device->stream_destroy(w.device, good);
    w.device->stream_destroy(w.device, bad);
    machine_end(&w);
}

/* ---- workers, through the product of matrices ---- */

typedef struct product { llmpar_gemm_args args; llmpar_gemm_segment segment; float *a, *b, *c; void *workspace; } product;

static void product_begin(product *p, llmpar_device *device, int64_t m, int64_t n, int64_t k, float a, float b)
{
    memset(p, 0, sizeof *p);
    p->a = (float *)malloc((size_t)(m * k) * sizeof(float));
    p->b = (float *)malloc((size_t)(n * k) * sizeof(float));
    p->c = (float *)malloc((size_t)(m * n) * sizeof(float));
    for (int64_t i = 0; i < m * k; i++) p->a[i] = a;
    for (int64_t i = 0; i < n * k; i++) p->b[i] = b;
    p->segment.a = p->a;
    p->segment.b = p->b;
    p->segment.k = p->segment.lda = p->segment.ldb = k;
    p->args.m = m;
    p->args.n = p->args.ldc = n;
    p->args.c = p->c;
    p->args.segments = &p->segment;
    p->args.segment_count = p->args.pieces = 1;
    p->args.kind = LLMPAR_GEMM_NT;
    p->args.dtype = LLMPAR_F32;
    p->args.workspace_bytes = device->gemm_workspace(device, &p->args);
    p->args.workspace = p->workspace = malloc(p->args.workspace_bytes + 1);
}
static void product_end(product *p)
{
    free(p->a);
    free(p->b);
    free(p->c);
    free(p->workspace);
}

/* Thousands of short runs on more threads than cores: a lost wake-up would hang here, a task done twice or never would show. */
TEST(many_runs)
{
    for (int threads = 2; threads <= 5; threads++) {
        machine w;
        product p;
        machine_begin(&w, threads);
        product_begin(&p, w.device, 120, 100, 100, 0.5f, 2.0f);
        for (int round = 0; round < 300; round++) {
            memset(p.c, 0xff, 120 * 100 * sizeof(float));
            CHECK_OK(w.device->gemm(w.device, NULL, &p.args));
            for (int i = 0; i < 120 * 100; i++)
                if (p.c[i] != 100) { TEST_FAIL("%d threads, round %d: element %d is %g", threads, round, i, (double)p.c[i]); break; }
        }
        product_end(&p);
        machine_end(&w);
    }
}

static void *one_rank(void *arg)
{
    (void)arg;
    for (int i = 0; i < 20; i++) {
        machine w;
        product p;
        machine_begin(&w, 3);
        product_begin(&p, w.device, 120, 100, 100, 0.5f, 2.0f);
        CHECK_OK(w.device->gemm(w.device, NULL, &p.args));
        for (int j = 0; j < 120 * 100; j++) if (p.c[j] != 100) { TEST_FAIL("element %d is %g", j, (double)p.c[j]); break; }
        product_end(&p);
        machine_end(&w);
    }
    return NULL;
}

/* Several ranks, each with its own device and workers, created and destroyed at the same time. */
TEST(several_devices)
{
    pthread_t ranks[4];
    for (int i = 0; i < 4; i++) CHECK_INT(pthread_create(&ranks[i], NULL, one_rank, NULL), 0);
    for (int i = 0; i < 4; i++) pthread_join(ranks[i], NULL);
}

/* A caller with flush-to-zero must not pass it on: every task that a worker takes keeps its denormals, and the caller's own setting is put back before the run. */
TEST(denormals)
{
#if defined(__x86_64__)
    machine w;
    product p;
    unsigned before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(before | 0x8040u);
    machine_begin(&w, 4);
    __builtin_ia32_ldmxcsr(before);
    product_begin(&p, w.device, 300, 100, 64, 1e-20f, 1e-20f);
    for (int round = 0; round < 20; round++) {
        CHECK_OK(w.device->gemm(w.device, NULL, &p.args));
        for (int i = 0; i < 300 * 100; i++)
            if (!(p.c[i] > 0 && p.c[i] < 1e-37f)) { TEST_FAIL("element %d was flushed: %g", i, (double)p.c[i]); break; }
    }
    product_end(&p);
    machine_end(&w);
#else
    TEST_SKIP("sets the x86-64 control register");
#endif
}

TEST(worker_names)
{
#if defined(__linux__)
    char before[16], seen[3][16] = { "r3 tp1 w1", "r3 tp1 w2", "r3 tp1 w3" };
    machine w;
    DIR *tasks;
    struct dirent *entry;
    int found = 0;
    prctl(PR_GET_NAME, before, 0, 0, 0);
    prctl(PR_SET_NAME, "r3 tp1", 0, 0, 0);
    machine_begin(&w, 4);
    {
        product p; /* a run passes only when every worker has started */
        product_begin(&p, w.device, 200, 100, 100, 1, 1);
        CHECK_OK(w.device->gemm(w.device, NULL, &p.args));
        product_end(&p);
    }
    tasks = opendir("/proc/self/task");
    while (tasks && (entry = readdir(tasks)) != NULL) {
        char path[300], name[32] = { 0 };
        FILE *file;
        snprintf(path, sizeof path, "/proc/self/task/%s/comm", entry->d_name);
        file = fopen(path, "r");
        if (!file) continue;
        if (fgets(name, sizeof name, file)) name[strcspn(name, "\n")] = 0;
        fclose(file);
        for (int i = 0; i < 3; i++) found += strcmp(name, seen[i]) == 0;
    }
    if (tasks) closedir(tasks);
    CHECK_INT(found, 3);
    machine_end(&w);
    prctl(PR_SET_NAME, before, 0, 0, 0);
#else
    TEST_SKIP("reads /proc");
#endif
}

TEST_LIST(T_(levels), T_(creation), T_(out_of_memory), T_(memory), T_(streams), T_(many_runs), T_(several_devices), T_(denormals), T_(worker_names))
