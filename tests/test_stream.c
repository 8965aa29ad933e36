/* Streams with threads of their own: order, events, failures, back pressure, the end of a stream, and the same bytes as the device that works inside the call. */
#include "stream_rig.h"

#include <unistd.h>
#if defined(__linux__)
#include <sys/prctl.h>
#endif

/* ---- the thread ---- */

typedef struct seen { pthread_t self; char name[16]; float tiny; size_t deep; } seen;

static size_t go_deep(size_t bytes)
{
    volatile char page[4096];
    page[0] = page[4095] = (char)bytes;
    return bytes <= sizeof page ? (size_t)(page[0] == page[4095]) : go_deep(bytes - sizeof page);
}
static llmpar_status run_look(void *arg)
{
    seen *s = *(seen **)arg;
    volatile float tiny = 1.2e-38f;
    s->self = pthread_self();
#if defined(__linux__)
    prctl(PR_GET_NAME, s->name, 0, 0, 0);
#endif
    s->tiny = tiny * 0.25f; /* a denormal, or 0 with flush-to-zero */
    s->deep = go_deep((size_t)700 << 10);
    return LLMPAR_OK;
}

TEST(a_thread_of_its_own)
{
    rig r;
    seen s, *at = &s;
    memset(&s, 0, sizeof s);
#if defined(__linux__)
    char before[16];
    prctl(PR_GET_NAME, before, 0, 0, 0);
    prctl(PR_SET_NAME, "r3", 0, 0, 0);
#endif
#if defined(__x86_64__)
    unsigned control = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(control | 0x8040u);
#endif
    rig_begin(&r, 1, 2, 1);
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr(control);
#endif
    CHECK_OK(r.device->host_call(r.device, r.stream[1], run_look, &at, sizeof at));
    CHECK_OK(r.device->synchronize(r.device, r.stream[1]));
    CHECK(!pthread_equal(s.self, pthread_self()));
    CHECK(s.tiny != 0);
    CHECK_INT(s.deep, 1);
#if defined(__linux__)
    if (strcmp(s.name, "r3 gather")) TEST_FAIL("the thread is named \"%s\"", s.name);
    prctl(PR_SET_NAME, before, 0, 0, 0);
#endif
    CHECK_OK(r.device->host_call(r.device, NULL, run_look, &at, sizeof at)); /* no stream: now, here */
    CHECK(pthread_equal(s.self, pthread_self()));
    CHECK_OK(llmpar_device_stream_thread(r.device, r.stream[1])); /* has one */
    CHECK_STATUS(llmpar_device_stream_thread(r.device, NULL), LLMPAR_ERR_ARGUMENT);
    llmpar_error_clear(&r.error);
    llmpar_device old = *r.device; /* a table of before this slot */
    old.size = (uint32_t)offsetof(llmpar_device, stream_thread);
    CHECK_STATUS(llmpar_device_stream_thread(&old, r.stream[1]), LLMPAR_ERR_UNSUPPORTED);
    CHECK_TEXT(r.error.text, "threads of their own");
    CHECK(llmpar_device_thread_error(&old, &r.error) == &r.error);
    CHECK_INT(llmpar_device_threads_running(&old), 1);
    rig_end(&r);
}

/* ---- overlap ---- */

TEST(streams_run_at_the_same_time)
{
    rig r;
    gate a, b;
    gate_init(&a);
    gate_init(&b);
    rig_begin(&r, 1, 2, 1);
    CHECK_OK(put_gate(r.device, r.stream[0], &a, &b, 1)); /* says that it is here, and waits for the other */
    CHECK_OK(put_gate(r.device, r.stream[1], &b, &a, 1));
    CHECK_OK(r.device->synchronize(r.device, r.stream[0]));
    CHECK_OK(r.device->synchronize(r.device, r.stream[1]));
    /* The rank's thread goes on while a stream works. */
    CHECK_OK(put_gate(r.device, r.stream[0], NULL, &a, 2));
    gate_add(&a);
    CHECK_OK(r.device->synchronize(r.device, r.stream[0]));
    rig_end(&r);
    gate_destroy(&a);
    gate_destroy(&b);
}

/* A stream's thread asks the device for its error while the rank's thread begins and ends other streams: under ThreadSanitizer, what both touch must be under the lock. */
typedef struct asks { llmpar_device *device; gate *begun, *end; } asks;
static llmpar_status run_ask(void *arg)
{
    asks *a = (asks *)arg;
    gate_add(a->begun);
    while (!gate_get(a->end))
        if (!llmpar_device_thread_error(a->device, NULL)) return LLMPAR_ERR_INTERNAL;
    return LLMPAR_OK;
}

TEST(streams_begin_and_end_beside_one_that_runs)
{
    rig r;
    gate begun, end;
    gate_init(&begun);
    gate_init(&end);
    rig_begin(&r, 1, 1, 1);
    asks a = {r.device, &begun, &end};
    CHECK_OK(r.device->host_call(r.device, r.stream[0], run_ask, &a, sizeof a));
    CHECK_OK(gate_wait(&begun, 1));
    for (int i = 0; i < 8; i++) {
        llmpar_stream *stream = NULL;
        usleep(2000); /* the other thread looks at all streams that there are, and have been */
        CHECK_OK(r.device->stream_create(r.device, "another", &stream));
        CHECK_OK(llmpar_device_stream_thread(r.device, stream));
        r.device->stream_destroy(r.device, stream);
    }
    gate_add(&end);
    CHECK_OK(r.device->synchronize(r.device, r.stream[0]));
    rig_end(&r);
    gate_destroy(&begun);
    gate_destroy(&end);
}

/* An operation on the rank's thread and one on a stream's both want the workers; one that only the first threaded stream may have. */
TEST(one_pool_and_many_streams)
{
    enum { N = 40000 };
    rig r;
    float *x = (float *)malloc(5 * N * sizeof *x);
    rig_begin(&r, 3, 4, 1);
    for (int i = 0; i < 5 * N; i++) x[i] = (float)(i % 97);
    for (int k = 0; k < 40; k++) {
        llmpar_scale_args args;
        memset(&args, 0, sizeof args);
        args.count = N;
        args.factor = k % 2 ? 0.5 : 2;
        args.dtype = LLMPAR_F32;
        for (int i = 0; i < 5; i++) {
            args.x = x + i * N;
            CHECK_OK(r.device->scale(r.device, i < 4 ? r.stream[i] : NULL, &args));
        }
    }
    for (int i = 0; i < 4; i++) CHECK_OK(r.device->synchronize(r.device, r.stream[i]));
    for (int i = 0; i < 5 * N; i++)
        if (x[i] != (float)(i % 97)) { TEST_FAIL("element %d: %g", i, x[i]); break; }
    rig_end(&r);
    free(x);
}

/* ---- order and back pressure ---- */

typedef struct count_call { int *next, expected; char rest[200]; } count_call;
static llmpar_status run_count(void *arg)
{
    count_call *c = (count_call *)arg;
    for (size_t i = 0; i < sizeof c->rest; i++)
        if (c->rest[i] != (char)c->expected) return LLMPAR_ERR_MISMATCH;
    return (*c->next)++ == c->expected ? LLMPAR_OK : LLMPAR_ERR_MISMATCH;
}
static void put_counts(rig *r, llmpar_stream *stream, int *next, int begin, int end)
{
    for (int i = begin; i < end; i++) {
        count_call c;
        memset(&c, i, sizeof c);
        c.next = next;
        c.expected = i;
        CHECK_OK(r->device->host_call(r->device, stream, run_count, &c, sizeof c));
    }
}

static void *open_later(void *arg)
{
    gate *g = (gate *)arg;
    gate_wait(g, 1); /* the stream stands in its first item */
    usleep(50000);   /* the rank's thread comes to where the ring is full; if not, the test is only weaker */
    gate_add(g);
    return NULL;
}

TEST(a_full_ring_waits)
{
    rig r;
    gate g;
    pthread_t opener;
    int next = 0;
    gate_init(&g);
    rig_begin(&r, 1, 1, 1);
    uint64_t live = r.heap.live;
    pthread_create(&opener, NULL, open_later, &g);
    CHECK_OK(put_gate(r.device, r.stream[0], &g, &g, 2));
    put_counts(&r, r.stream[0], &next, 0, 5000);
    CHECK_OK(r.device->synchronize(r.device, r.stream[0]));
    CHECK_INT(next, 5000);
    CHECK_INT(r.heap.live, live); /* nothing was allocated for 1.2 MB of arguments */
    pthread_join(opener, NULL);
    rig_end(&r);
    gate_destroy(&g);
}

/* A product of so many parts that its arguments fill the ring several times. */
TEST(arguments_larger_than_the_ring)
{
    enum { K = 5000 };
    rig r;
    float *a = (float *)malloc(K * sizeof *a), *b = (float *)malloc(K * sizeof *b), c[2] = {0, 0};
    llmpar_gemm_segment *segment = (llmpar_gemm_segment *)calloc(K, sizeof *segment);
    int next = 0;
    rig_begin(&r, 1, 1, 1);
    for (int i = 0; i < K; i++) {
        a[i] = (float)(i % 13) - 6;
        b[i] = (float)(i % 7) - 3;
        segment[i].a = a + i;
        segment[i].b = b + i;
        segment[i].lda = segment[i].ldb = K;
        segment[i].k = 1;
    }
    for (int threaded = 0; threaded < 2; threaded++) {
        llmpar_gemm_args args;
        memset(&args, 0, sizeof args);
        args.m = args.n = args.ldc = args.pieces = 1;
        args.c = c + threaded;
        args.segments = segment;
        args.segment_count = K;
        args.kind = LLMPAR_GEMM_NT;
        args.dtype = LLMPAR_F32;
        args.workspace_bytes = r.device->gemm_workspace(r.device, &args);
        CHECK_OK(r.device->alloc(r.device, args.workspace_bytes, &args.workspace));
        CHECK_OK(r.device->gemm(r.device, threaded ? r.stream[0] : NULL, &args));
        if (threaded) memset(segment, 0xee, K * sizeof *segment); /* was copied */
        put_counts(&r, r.stream[0], &next, 3 * threaded, 3 * threaded + 3);
        r.device->free(r.device, args.workspace, args.workspace_bytes); /* waits for what is enqueued */
    }
    CHECK_OK(r.device->synchronize(r.device, r.stream[0]));
    CHECK_INT(next, 6);
    CHECK_BYTES(&c[0], &c[1], sizeof c[0]);
    CHECK(c[0] != 0);
    rig_end(&r);
    free(segment);
    free(a);
    free(b);
}

/* ---- events ---- */

TEST(events_between_streams)
{
    rig r;
    gate g;
    llmpar_event *event, *other;
    int64_t x[3] = {1, 0, 0};
    gate_init(&g);
    rig_begin(&r, 1, 3, 1);
    CHECK_OK(r.device->event_create(r.device, &event));
    CHECK_OK(r.device->event_wait(r.device, r.stream[1], event)); /* never recorded: no wait */
    CHECK_OK(r.device->event_synchronize(r.device, event));
    CHECK_OK(put_gate(r.device, r.stream[0], NULL, &g, 1));
    CHECK_OK(r.device->copy(r.device, r.stream[0], &x[1], &x[0], sizeof x[0]));
    CHECK_OK(r.device->event_record(r.device, r.stream[0], event));
    CHECK_OK(r.device->event_wait(r.device, r.stream[0], event)); /* on the same stream: no wait */
    CHECK_OK(r.device->event_wait(r.device, r.stream[1], event));
    CHECK_OK(r.device->copy(r.device, r.stream[1], &x[2], &x[1], sizeof x[0]));
    /* Recorded again, on another stream: who waited before still waits for the first one. And gone before anybody has waited for it. */
    CHECK_OK(r.device->event_record(r.device, r.stream[2], event));
    CHECK_OK(r.device->event_synchronize(r.device, event));
    r.device->event_destroy(r.device, event);
    CHECK_INT(__atomic_load_n(&x[2], __ATOMIC_RELAXED), 0);
    gate_add(&g);
    CHECK_OK(r.device->event_create(r.device, &event));
    CHECK_OK(r.device->event_record(r.device, r.stream[1], event));
    CHECK_OK(r.device->event_synchronize(r.device, event));
    CHECK_INT(x[2], 1);
    /* With a stream that works inside the call: it waits here. */
    llmpar_stream *plain;
    CHECK_OK(r.device->stream_create(r.device, "plain", &plain));
    CHECK_OK(r.device->event_create(r.device, &other));
    CHECK_OK(put_gate(r.device, r.stream[0], NULL, &g, 2));
    CHECK_OK(put_gate(r.device, r.stream[0], &g, NULL, 0));
    CHECK_OK(r.device->event_record(r.device, r.stream[0], event));
    gate_add(&g);
    CHECK_OK(r.device->event_wait(r.device, plain, event));
    CHECK_INT(gate_get(&g), 3);
    CHECK_OK(r.device->event_record(r.device, plain, other));
    CHECK_OK(r.device->event_wait(r.device, r.stream[0], other));
    /* A stream that is gone has done its work; its event still says so, also where another stream has its place. */
    CHECK_OK(put_gate(r.device, r.stream[0], &g, NULL, 0));
    CHECK_OK(r.device->event_record(r.device, r.stream[0], event));
    r.device->stream_destroy(r.device, r.stream[0]);
    CHECK_INT(gate_get(&g), 4);
    CHECK_OK(r.device->stream_create(r.device, "again", &r.stream[0]));
    CHECK_OK(llmpar_device_stream_thread(r.device, r.stream[0]));
    CHECK_OK(put_gate(r.device, r.stream[0], NULL, &g, 5));
    CHECK_OK(r.device->event_wait(r.device, r.stream[1], event));
    CHECK_OK(r.device->event_synchronize(r.device, event));
    CHECK_OK(r.device->synchronize(r.device, r.stream[1]));
    gate_add(&g);
    r.device->event_destroy(r.device, event);
    r.device->event_destroy(r.device, other);
    r.device->stream_destroy(r.device, plain);
    rig_end(&r);
    gate_destroy(&g);
}

/* ---- failures ---- */

typedef struct fail_call { llmpar_device *device; gate *wait; const char *text; } fail_call;
static llmpar_status run_fail(void *arg)
{
    fail_call *c = (fail_call *)arg;
    if (c->wait) gate_wait(c->wait, 1);
    return llmpar_error_set(llmpar_device_thread_error(c->device, NULL), LLMPAR_ERR_IO, "%s", c->text);
}
static llmpar_status put_fail(rig *r, int stream, gate *wait, const char *text)
{
    fail_call c = {r->device, wait, text};
    return r->device->host_call(r->device, r->stream[stream], run_fail, &c, sizeof c);
}

TEST(a_failure_sticks_and_goes_along_events)
{
    rig r;
    gate g;
    llmpar_event *early, *event;
    int next = 0;
    gate_init(&g);
    rig_begin(&r, 1, 4, 1);
    snprintf(r.error.where, sizeof r.error.where, "dp_shard=1");
    r.error.rank = 5;
    CHECK_OK(r.device->event_create(r.device, &event));
    CHECK_OK(r.device->event_create(r.device, &early));
    CHECK_OK(r.device->event_record(r.device, r.stream[0], early));
    CHECK_OK(put_fail(&r, 0, &g, "the disk is full"));
    put_counts(&r, r.stream[0], &next, 7, 9); /* dropped: would be a mismatch */
    CHECK_OK(r.device->event_record(r.device, r.stream[0], event));
    CHECK_OK(r.device->event_wait(r.device, r.stream[1], event));
    put_counts(&r, r.stream[1], &next, 7, 9);
    CHECK_OK(r.device->event_record(r.device, r.stream[1], event));
    CHECK_OK(r.device->event_wait(r.device, r.stream[2], event));
    CHECK_INT(r.error.status, LLMPAR_OK);
    gate_add(&g);
    CHECK_STATUS(r.device->synchronize(r.device, r.stream[2]), LLMPAR_ERR_IO);
    CHECK_TEXT(r.error.text, "the disk is full");
    CHECK_TEXT(r.error.where, "dp_shard=1");
    CHECK_INT(r.error.rank, 5);
    CHECK_INT(next, 0);
    CHECK_STATUS(r.device->event_synchronize(r.device, event), LLMPAR_ERR_IO);
    CHECK_OK(r.device->event_synchronize(r.device, early)); /* was before it */
    CHECK_STATUS(r.device->zero(r.device, r.stream[0], &next, sizeof next), LLMPAR_ERR_IO); /* the next call */
    CHECK_STATUS(r.device->event_record(r.device, r.stream[0], event), LLMPAR_ERR_IO);
    /* The first error stays, and others go on. */
    CHECK_OK(put_fail(&r, 3, NULL, "something else"));
    CHECK_STATUS(r.device->synchronize(r.device, r.stream[3]), LLMPAR_ERR_IO);
    CHECK_TEXT(r.error.text, "the disk is full");
    llmpar_error_clear(&r.error);
    CHECK_STATUS(r.device->synchronize(r.device, r.stream[3]), LLMPAR_ERR_IO);
    CHECK_TEXT(r.error.text, "something else");
    /* A stream made anew is sound, whatever became of the others. */
    for (int i = 0; i < 4; i++) {
        r.device->stream_destroy(r.device, r.stream[i]);
        CHECK_OK(r.device->stream_create(r.device, "new", &r.stream[i]));
        CHECK_OK(llmpar_device_stream_thread(r.device, r.stream[i]));
        next = 0;
        put_counts(&r, r.stream[i], &next, 0, 3);
        CHECK_OK(r.device->synchronize(r.device, r.stream[i]));
    }
    /* Wrong arguments: the operation's own text. */
    llmpar_error_clear(&r.error);
    llmpar_gemm_args args;
    memset(&args, 0, sizeof args);
    args.m = args.n = args.ldc = args.pieces = 1;
    args.dtype = LLMPAR_I32;
    CHECK_OK(r.device->gemm(r.device, r.stream[0], &args));
    CHECK(r.device->synchronize(r.device, r.stream[0]) != LLMPAR_OK);
    CHECK_TEXT(r.error.text, "gemm");
    r.device->event_destroy(r.device, event);
    r.device->event_destroy(r.device, early);
    rig_end(&r);
    gate_destroy(&g);
}

/* ---- the end ---- */

static char region[1 << 20];
static size_t region_used;
static void *region_alloc(void *user, size_t bytes)
{
    (void)user;
    size_t at = (region_used + 15) / 16 * 16;
    if (at + bytes > sizeof region) return NULL;
    region_used = at + bytes;
    return region + at;
}

TEST(an_end_with_work_in_the_queue)
{
    rig r;
    gate g;
    int next = 0, twice = 0;
    gate_init(&g);
    for (int k = 0; k < ROUNDS; k++) {
        rig_begin(&r, 1, 3, 1);
        next = 0;
        put_counts(&r, r.stream[k % 3], &next, 0, k * 7);
        rig_end(&r);
        CHECK_INT(next, k * 7);
    }
    /* A device that goes while its streams are there, one of them failed: what they hold goes with its region. */
    llmpar_allocator allocator = {region_alloc, NULL, NULL};
    llmpar_stream *stream[2];
    memset(&r, 0, sizeof r);
    llmpar_heap_init(&r.heap, &allocator);
    llmpar_error_clear(&r.error);
    CHECK_OK(llmpar_cpu_create(&r.heap, &r.error, NULL, &r.device));
    for (int i = 0; i < 2; i++) {
        CHECK_OK(r.device->stream_create(r.device, "left", &stream[i]));
        CHECK_OK(llmpar_device_stream_thread(r.device, stream[i]));
    }
    r.stream[0] = stream[0];
    next = 0;
    put_counts(&r, stream[0], &next, 0, 50);
    put_counts(&r, stream[1], &twice, 0, 20);
    CHECK_OK(put_fail(&r, 0, &g, "late"));
    for (int i = 0; i < 30; i++) CHECK_OK(put_gate(r.device, stream[0], &g, NULL, 0));
    gate_add(&g);
    llmpar_cpu_destroy(r.device);
    CHECK_INT(next, 50);
    CHECK_INT(twice, 20);
    CHECK_INT(gate_get(&g), 1); /* what came behind the failure was dropped */
    gate_destroy(&g);
}

/* Every allocation of the device and its streams fails once: a clear error, and nothing stays. */
TEST(without_memory)
{
    for (uint64_t n = 1, done = 0; !done; n++) {
        llmpar_heap heap;
        llmpar_error error;
        llmpar_device *device = NULL;
        llmpar_stream *stream[2] = {NULL, NULL};
        int next = 0;
        count_call c;
        memset(&c, 0, sizeof c);
        c.next = &next;
        llmpar_heap_init(&heap, NULL);
        llmpar_error_clear(&error);
        heap.fail_at = n;
        llmpar_status status = llmpar_cpu_create(&heap, &error, NULL, &device);
        for (int i = 0; i < 2 && !status; i++) {
            status = device->stream_create(device, "s", &stream[i]);
            if (!status) status = llmpar_device_stream_thread(device, stream[i]);
        }
        if (!status) status = device->host_call(device, stream[1], run_count, &c, sizeof c);
        for (int i = 0; i < 2; i++)
            if (stream[i]) device->stream_destroy(device, stream[i]);
        llmpar_cpu_destroy(device);
        if (status) CHECK_STATUS(status, LLMPAR_ERR_MEMORY);
        else CHECK_INT(next, 1);
        CHECK_INT(heap.live, 0);
        done = !status;
        if (n > 30) { TEST_FAIL("allocation %d still fails: %s", (int)n, error.text); break; }
    }
}

/* ---- random graphs: the bytes of the device that works inside the call ---- */

enum { BUFFERS = 7, ELEMENTS = 192, OPS = 60 };
typedef struct graph_op { int kind, stream, out, a, b; } graph_op;

static uint32_t dice_state;
static int dice(int n) { dice_state = dice_state * 1664525u + 1013904223u; return (int)((dice_state >> 8) % (uint32_t)n); }

/* One operation, with arguments that are gone when it has been enqueued. */
static llmpar_status enqueue(llmpar_device *device, llmpar_stream *stream, const graph_op *op, float (*x)[ELEMENTS], void *workspace, size_t workspace_bytes)
{
    union { llmpar_add_args add; llmpar_scale_args scale; llmpar_copy_rows_args rows; llmpar_tree_sum_args tree; llmpar_gemm_args gemm; llmpar_rmsnorm_args norm; llmpar_swiglu_args swiglu; } u;
    const void *in[3];
    llmpar_gemm_segment segment[4];
    llmpar_status status = LLMPAR_OK;
    memset(&u, 0, sizeof u);
    memset(segment, 0, sizeof segment);
    switch (op->kind) {
    case 0:
        u.add.count = ELEMENTS;
        u.add.a = x[op->a];
        u.add.b = x[op->b];
        u.add.out = x[op->out];
        u.add.dtype = LLMPAR_F32;
        status = device->add(device, stream, &u.add);
        break;
    case 1:
        u.scale.count = ELEMENTS;
        u.scale.x = x[op->out];
        u.scale.factor = 0.40625;
        u.scale.dtype = LLMPAR_F32;
        status = device->scale(device, stream, &u.scale);
        break;
    case 2: status = device->copy(device, stream, x[op->out], x[op->a], sizeof x[0]); break;
    case 3: status = device->zero(device, stream, x[op->out] + 16, 64); break;
    case 4:
        u.rows.rows = 8;
        u.rows.width = 5;
        u.rows.ld_in = 24;
        u.rows.ld_out = 20;
        u.rows.size = sizeof(float);
        u.rows.in = x[op->a];
        u.rows.out = x[op->out];
        status = device->copy_rows(device, stream, &u.rows);
        break;
    case 5:
    case 6:
        in[0] = x[op->a];
        in[1] = x[op->b];
        in[2] = x[op->out];
        u.tree.in = in;
        u.tree.n = 3;
        u.tree.count = ELEMENTS;
        u.tree.out = x[op->out];
        u.tree.dtype = LLMPAR_F32;
        status = op->kind == 5 ? device->tree_sum(device, stream, &u.tree) : device->max(device, stream, &u.tree);
        break;
    case 7: /* c[12,16] += a[12,6] b[16,6]^T in 4 parts, of which two make a piece */
        for (int i = 0; i < 4; i++) {
            segment[i].a = x[op->a] + i;
            segment[i].b = x[op->b] + 2 * i;
            segment[i].lda = 8;
            segment[i].ldb = 9;
            segment[i].k = 1 + i % 2;
            segment[i].piece = i / 2;
        }
        u.gemm.m = 12;
        u.gemm.n = u.gemm.ldc = 16;
        u.gemm.c = x[op->out];
        u.gemm.segments = segment;
        u.gemm.segment_count = 4;
        u.gemm.pieces = 2;
        u.gemm.kind = LLMPAR_GEMM_NT;
        u.gemm.dtype = LLMPAR_F32;
        u.gemm.workspace = workspace;
        u.gemm.workspace_bytes = workspace_bytes;
        status = device->gemm(device, stream, &u.gemm);
        break;
    case 8:
        u.norm.rows = 10;
        u.norm.dim = 18;
        u.norm.x = x[op->a];
        u.norm.w = x[op->b];
        u.norm.y = x[op->out];
        u.norm.rstd = x[op->out] + 180;
        u.norm.eps = 1e-5;
        u.norm.dtype = LLMPAR_F32;
        status = device->rmsnorm(device, stream, &u.norm);
        break;
    default:
        u.swiglu.rows = 1;
        u.swiglu.dim = u.swiglu.ld_in = u.swiglu.ld_out = ELEMENTS;
        u.swiglu.gate = x[op->a];
        u.swiglu.up = x[op->b];
        u.swiglu.h = x[op->out];
        u.swiglu.dtype = LLMPAR_F32;
        status = device->swiglu(device, stream, &u.swiglu);
        break;
    }
    memset(&u, 0xee, sizeof u);
    memset(in, 0xee, sizeof in);
    memset(segment, 0xee, sizeof segment);
    return status;
}

static void start_values(float (*x)[ELEMENTS])
{
    for (int b = 0; b < BUFFERS; b++)
        for (int i = 0; i < ELEMENTS; i++) x[b][i] = (float)((i * 31 + b * 17) % 64 - 31) * 0.03125f;
}

TEST(random_graphs_have_the_same_bytes)
{
    rig plain, threaded;
    static float want[BUFFERS][ELEMENTS], got[BUFFERS][ELEMENTS];
    static char workspace[STREAMS + 1][1 << 20];
    llmpar_event *event[OPS];
    graph_op op[OPS];
    int waits = 0, across = 0;
    rig_begin(&plain, 1, 1, 0);
    rig_begin(&threaded, 2, STREAMS, 1);
    for (int i = 0; i < OPS; i++) CHECK_OK(threaded.device->event_create(threaded.device, &event[i]));
    for (int g = 0; g < GRAPHS; g++) {
        int streams = 1 + dice(STREAMS), ops = 1 + dice(OPS), before = test_failures;
        int writer[BUFFERS], reader[BUFFERS][STREAMS];
        dice_state = 77u * (uint32_t)g + 5;
        memset(writer, -1, sizeof writer);
        memset(reader, -1, sizeof reader);
        start_values(want);
        start_values(got);
        for (int i = 0; i < ops; i++) {
            graph_op *o = &op[i];
            o->kind = dice(10);
            o->stream = dice(streams);
            o->out = dice(BUFFERS);
            o->a = (o->out + 1 + dice(BUFFERS - 1)) % BUFFERS;
            o->b = (o->out + 1 + dice(BUFFERS - 1)) % BUFFERS;
            CHECK_OK(enqueue(plain.device, plain.stream[0], o, want, workspace[STREAMS], sizeof workspace[0]));
            /* Waits for who wrote what it reads or writes, and for who reads what it writes. */
            int after[3 + STREAMS], n = 0;
            after[n++] = writer[o->out];
            after[n++] = writer[o->a];
            after[n++] = writer[o->b];
            for (int s = 0; s < streams; s++) after[n++] = reader[o->out][s];
            for (int k = 0; k < n; k++) {
                if (after[k] < 0) continue;
                waits++;
                across += op[after[k]].stream != o->stream;
                CHECK_OK(threaded.device->event_wait(threaded.device, threaded.stream[o->stream], event[after[k]]));
            }
            CHECK_OK(enqueue(threaded.device, threaded.stream[o->stream], o, got, workspace[o->stream], sizeof workspace[0]));
            CHECK_OK(threaded.device->event_record(threaded.device, threaded.stream[o->stream], event[i]));
            writer[o->out] = i;
            reader[o->a][o->stream] = reader[o->b][o->stream] = i;
            if (dice(40) == 0) CHECK_OK(threaded.device->event_synchronize(threaded.device, event[dice(i + 1)]));
        }
        for (int s = 0; s < STREAMS; s++) CHECK_OK(threaded.device->synchronize(threaded.device, threaded.stream[s]));
        if (memcmp(got, want, sizeof got)) TEST_FAIL("graph %d of %d operations on %d streams has other bytes", g, ops, streams);
        if (test_failures != before) break;
    }
    CHECK(across > waits / 4);
    for (int i = 0; i < OPS; i++) threaded.device->event_destroy(threaded.device, event[i]);
    rig_end(&threaded);
    rig_end(&plain);
}

TEST_LIST(T_(a_thread_of_its_own), T_(streams_run_at_the_same_time), T_(streams_begin_and_end_beside_one_that_runs), T_(one_pool_and_many_streams), T_(a_full_ring_waits), T_(arguments_larger_than_the_ring), T_(events_between_streams),
          T_(a_failure_sticks_and_goes_along_events), T_(an_end_with_work_in_the_queue), T_(without_memory), T_(random_graphs_have_the_same_bytes))
