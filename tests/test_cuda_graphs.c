/* Regions of the CUDA device (tables/device.h: region_begin, region_end): what is replayed gives what it would give operation by operation, whatever changes between two regions of a key; and training with graphs gives
   the bits that it gives without. */
#include "cuda.h"
#include "train.h"

static int fast_open(void)
{
    cuda_desc.mode = LLMPAR_CUDA_FAST;
    return cuda_open();
}
#define FAST_OPEN() do { if (!fast_open()) TEST_SKIP(cuda_none.text); llmpar_error_clear(&cuda_ctx.error); } while (0)

static llmpar_cuda_graph_counts before;
static void count(void) { llmpar_cuda_graphs(cuda_gpu, &before); }
/* Since count(). */
static void counted(const char *what, uint64_t replayed, uint64_t captured, uint64_t plain)
{
    llmpar_cuda_graph_counts now;
    llmpar_cuda_graphs(cuda_gpu, &now);
    if (now.replayed - before.replayed == replayed && now.captured - before.captured == captured && now.plain - before.plain == plain) return;
    TEST_FAIL("%s: replayed %llu, captured %llu, plain %llu, expected %llu, %llu, %llu", what, (unsigned long long)(now.replayed - before.replayed), (unsigned long long)(now.captured - before.captured),
              (unsigned long long)(now.plain - before.plain), (unsigned long long)replayed, (unsigned long long)captured, (unsigned long long)plain);
}

enum { N = 300 };
typedef struct four { void *a, *b, *c, *sum, *out; double *x, *y; } four;

/* out = factor * (a + b + c) with b summed by the tree, through a product with the 1 x 1 matrix 1 and some zeroing: every kind of note. Arguments are scribbled over before the region ends. */
static llmpar_status enqueue(four *f, llmpar_stream *stream, double factor)
{
    const void *in[3];
    llmpar_tree_sum_args sum;
    llmpar_scale_args scale;
    llmpar_add_args add;
    llmpar_gemm_args gemm;
    llmpar_gemm_segment segment[2];
    llmpar_status status = cuda_gpu->zero(cuda_gpu, stream, f->out, N * sizeof(float));
    memset(&sum, (int)ops_below(256), sizeof sum);
    in[0] = f->a;
    in[1] = f->b;
    in[2] = f->c;
    sum.in = in;
    sum.n = 3;
    sum.count = N;
    sum.out = f->sum;
    sum.dtype = LLMPAR_F32;
    if (!status) status = cuda_gpu->tree_sum(cuda_gpu, stream, &sum);
    memset(in, 0x5a, sizeof in);
    memset(&scale, (int)ops_below(256), sizeof scale); /* what lies between members is not compared, nor what lies behind */
    scale.count = N;
    scale.x = f->sum;
    scale.factor = factor;
    scale.dtype = LLMPAR_F32;
    if (!status) status = cuda_gpu->scale(cuda_gpu, stream, &scale);
    memset(&scale, 0x5a, sizeof scale);
    memset(&add, (int)ops_below(256), sizeof add);
    add.count = N;
    add.a = f->out;
    add.b = f->sum;
    add.out = f->out;
    add.dtype = LLMPAR_F32;
    if (!status) status = cuda_gpu->add(cuda_gpu, stream, &add);
    memset(&add, 0x5a, sizeof add);
    memset(&gemm, 0, sizeof gemm);
    memset(segment, (int)ops_below(256), sizeof segment);
    gemm.m = N;
    gemm.n = 1;
    gemm.c = f->sum;
    gemm.ldc = 1;
    gemm.segments = segment;
    gemm.segment_count = 1;
    gemm.pieces = 1;
    gemm.kind = LLMPAR_GEMM_NN;
    gemm.dtype = LLMPAR_F32;
    segment[0].a = f->out;
    segment[0].b = f->c; /* its first element */
    segment[0].lda = segment[0].ldb = segment[0].k = 1;
    segment[0].piece = segment[0].interleaved = 0;
    segment[0].begin = 0;
    if (!status) status = cuda_gpu->gemm(cuda_gpu, stream, &gemm);
    memset(segment, 0x5a, sizeof segment);
    return status;
}

static void fill(four *f, void *at, double *x)
{
    for (int i = 0; i < N; i++) x[i] = (double)(int)(ops_below(17) - 8); /* so that every order of sums gives the same */
    cuda_set(at, x);
    (void)f;
}

static void four_open(four *f, double *x[3])
{
    for (int i = 0; i < 3; i++) x[i] = ops_zeros(N);
    f->a = cuda_put_vector(cuda_gpu, LLMPAR_F32, x[0], N);
    f->b = cuda_put_vector(cuda_gpu, LLMPAR_F32, x[1], N);
    f->c = cuda_put_vector(cuda_gpu, LLMPAR_F32, x[2], N);
    f->sum = cuda_put_vector(cuda_gpu, LLMPAR_F32, NULL, N);
    f->out = cuda_put_vector(cuda_gpu, LLMPAR_F32, NULL, N);
    f->x = ops_zeros(N);
    f->y = ops_zeros(N);
}

static void four_close(four *f, double *x[3])
{
    for (int i = 0; i < 3; i++) free(x[i]);
    free(f->x);
    free(f->y);
    cuda_done();
}

static void four_check(four *f, const char *what, const double *a, const double *b, const double *c, double factor)
{
    for (int i = 0; i < N; i++) f->y[i] = factor * (a[i] + b[i] + c[i]) * c[0];
    cuda_get(f->sum, f->x);
    for (int i = 0; i < N; i++) if (f->y[i] == 0) f->y[i] = f->x[i] == 0 ? f->x[i] : 0;
    cuda_same(what, f->x, f->y, N);
}

static void region(four *f, llmpar_stream *stream, uint64_t key, double factor)
{
    CUDA_OK(cuda_gpu->region_begin(cuda_gpu, stream, key));
    CUDA_OK(enqueue(f, stream, factor));
    CUDA_OK(cuda_gpu->region_end(cuda_gpu, stream));
    CUDA_OK(cuda_gpu->synchronize(cuda_gpu, stream));
}

TEST(replays)
{
    four f;
    double *x[3];
    llmpar_stream *stream;
    FAST_OPEN();
    CUDA_OK(cuda_gpu->stream_create(cuda_gpu, "compute", &stream));
    four_open(&f, x);
    for (int i = 0; i < 6; i++) { /* other values, same arguments */
        fill(&f, f.a, x[0]);
        fill(&f, f.b, x[1]);
        fill(&f, f.c, x[2]);
        count();
        region(&f, stream, 7, 0.5);
        counted("the same again", i > 1, i == 1, i == 0);
        four_check(&f, "the same again", x[0], x[1], x[2], 0.5);
    }
    count();
    region(&f, stream, 8, 0.5); /* another key */
    counted("another key", 0, 0, 1);
    /* another pointer, then that one for good */
    void *b = f.b;
    double *other = ops_zeros(N);
    f.b = cuda_put_vector(cuda_gpu, LLMPAR_F32, other, N);
    fill(&f, f.b, other);
    for (int i = 0; i < 3; i++) {
        count();
        region(&f, stream, 7, 0.5);
        counted("another pointer", i > 1, i == 1, i == 0);
        four_check(&f, "another pointer", x[0], other, x[2], 0.5);
    }
    f.b = b;
    /* a number that changes every time is never captured, and soon not looked at any more */
    for (int i = 0; i < 6; i++) {
        count();
        region(&f, stream, 9, 1.0 + i);
        counted("a number that changes", 0, 0, 1);
        four_check(&f, "a number that changes", x[0], x[1], x[2], 1.0 + i);
    }
    count();
    region(&f, stream, 9, 6.0);
    region(&f, stream, 9, 6.0);
    counted("given up", 0, 0, 2);
    four_check(&f, "given up", x[0], x[1], x[2], 6.0);
    /* nothing at all */
    count();
    CUDA_OK(cuda_gpu->region_begin(cuda_gpu, stream, 10));
    CUDA_OK(cuda_gpu->region_end(cuda_gpu, stream));
    counted("empty", 0, 0, 0);
    cuda_gpu->stream_destroy(cuda_gpu, stream);
    llmpar_cuda_graph_counts now;
    llmpar_cuda_graphs(cuda_gpu, &now);
    CHECK_INT(now.kept, 0);
    free(other);
    four_close(&f, x);
}

static int called;
static llmpar_status call(void *arg)
{
    (void)arg;
    called++;
    return LLMPAR_OK;
}

/* What cannot be in a region ends it, behind what was noted. */
TEST(ends_early)
{
    four f;
    double *x[3];
    llmpar_stream *stream, *aside;
    llmpar_event *event;
    FAST_OPEN();
    CUDA_OK(cuda_gpu->stream_create(cuda_gpu, "compute", &stream));
    CUDA_OK(cuda_gpu->stream_create(cuda_gpu, "aside", &aside));
    CUDA_OK(cuda_gpu->event_create(cuda_gpu, &event));
    four_open(&f, x);
    fill(&f, f.a, x[0]);
    fill(&f, f.b, x[1]);
    fill(&f, f.c, x[2]);
    for (int what = 0; what < 7; what++)
        for (int i = 0; i < 4; i++) {
            float *copy = (float *)calloc(N, sizeof *copy);
            void *memory = NULL;
            int seen = called;
            CUDA_OK(cuda_gpu->alloc(cuda_gpu, 100, &memory));
            count();
            CUDA_OK(cuda_gpu->region_begin(cuda_gpu, stream, 100 + (uint64_t)what));
            CUDA_OK(enqueue(&f, stream, 2.0));
            switch (what) {
            case 0: CUDA_OK(cuda_gpu->copy(cuda_gpu, stream, copy, f.sum, N * sizeof *copy)); break;
            case 1: CUDA_OK(cuda_gpu->event_record(cuda_gpu, stream, event)); break;
            case 2: CUDA_OK(cuda_gpu->event_wait(cuda_gpu, stream, event)); break;
            case 3: CUDA_OK(cuda_gpu->host_call(cuda_gpu, stream, call, NULL, 0)); break;
            case 4: CUDA_OK(cuda_gpu->synchronize(cuda_gpu, stream)); break;
            case 5: CHECK(cuda_gpu->native_stream(cuda_gpu, stream) != NULL); break;
            case 6: cuda_gpu->free(cuda_gpu, memory, 100); memory = NULL; break;
            default: break;
            }
            if (what == 1) { /* the event is behind what was noted */
                CUDA_OK(cuda_gpu->event_wait(cuda_gpu, aside, event));
                CUDA_OK(cuda_gpu->copy(cuda_gpu, aside, copy, f.sum, N * sizeof *copy));
                CUDA_OK(cuda_gpu->synchronize(cuda_gpu, aside));
            }
            CUDA_OK(cuda_gpu->zero(cuda_gpu, stream, f.out, N * sizeof(float))); /* as it comes */
            CUDA_OK(cuda_gpu->region_end(cuda_gpu, stream));
            CUDA_OK(cuda_gpu->synchronize(cuda_gpu, stream));
            counted("ended early", 0, 0, 1);
            four_check(&f, "ended early", x[0], x[1], x[2], 2.0);
            for (int k = 0; k < N && what < 2; k++) if ((double)copy[k] != f.x[k]) { TEST_FAIL("copy %d of %d", k, what); break; }
            CHECK_INT(called - seen, what == 3);
            cuda_get(f.out, f.y);
            for (int k = 0; k < N; k++) if (f.y[k] != 0) { TEST_FAIL("not zeroed"); break; }
            free(copy);
            cuda_gpu->free(cuda_gpu, memory, 100);
        }
    /* what another stream does does not */
    for (int i = 0; i < 3; i++) {
        count();
        CUDA_OK(cuda_gpu->region_begin(cuda_gpu, stream, 200));
        CUDA_OK(enqueue(&f, stream, 2.0));
        CUDA_OK(cuda_gpu->event_record(cuda_gpu, aside, event));
        CUDA_OK(cuda_gpu->synchronize(cuda_gpu, aside));
        CUDA_OK(cuda_gpu->region_end(cuda_gpu, stream));
        CUDA_OK(cuda_gpu->synchronize(cuda_gpu, stream));
        counted("beside others", i > 1, i == 1, i == 0);
    }
    cuda_gpu->event_destroy(cuda_gpu, event);
    cuda_gpu->stream_destroy(cuda_gpu, aside);
    /* a region left open goes with its stream */
    CUDA_OK(cuda_gpu->region_begin(cuda_gpu, stream, 1));
    CUDA_OK(enqueue(&f, stream, 3.0));
    cuda_gpu->stream_destroy(cuda_gpu, stream);
    four_check(&f, "left open", x[0], x[1], x[2], 3.0);
    four_close(&f, x);
}

/* More keys than places: the oldest go, the results stay. */
TEST(many_keys)
{
    llmpar_stream *stream;
    llmpar_cuda_graph_counts now;
    int keys = 2500;
    FAST_OPEN();
    CUDA_OK(cuda_gpu->stream_create(cuda_gpu, "compute", &stream));
    int *x = (int *)calloc((size_t)keys, sizeof *x);
    void *memory = NULL;
    CUDA_OK(cuda_gpu->alloc(cuda_gpu, (size_t)keys * sizeof *x, &memory));
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < keys; i++) x[i] = i;
        CUDA_OK(cuda_gpu->copy(cuda_gpu, stream, memory, x, (size_t)keys * sizeof *x));
        for (int i = 0; i < keys && !test_failures; i++)
            for (int twice = 0; twice < 2; twice++) {
                CUDA_OK(cuda_gpu->region_begin(cuda_gpu, stream, (uint64_t)i << 32 | 5));
                CUDA_OK(cuda_gpu->zero(cuda_gpu, stream, (int *)memory + i, sizeof(int)));
                CUDA_OK(cuda_gpu->region_end(cuda_gpu, stream));
            }
        CUDA_OK(cuda_gpu->copy(cuda_gpu, stream, x, memory, (size_t)keys * sizeof *x));
        CUDA_OK(cuda_gpu->synchronize(cuda_gpu, stream));
        for (int i = 0; i < keys; i++) if (x[i]) { TEST_FAIL("round %d: %d was not zeroed", round, i); break; }
    }
    llmpar_cuda_graphs(cuda_gpu, &now);
    printf("  %d keys: %llu graphs kept\n", keys, (unsigned long long)now.kept);
    CHECK(now.kept > 500 && now.kept <= 2048);
    if (cuda_emulated()) CHECK_INT(emulated_cuda_graphs(), now.kept);
    cuda_gpu->free(cuda_gpu, memory, (size_t)keys * sizeof *x);
    cuda_gpu->stream_destroy(cuda_gpu, stream);
    free(x);
    cuda_done();
}

TEST(refuses)
{
    llmpar_stream *stream, *other;
    llmpar_device *exact;
    FAST_OPEN();
    CUDA_OK(llmpar_cuda_create(&cuda_ctx, NULL, &exact));
    CHECK(!exact->region_begin && !exact->region_end);
    llmpar_cuda_destroy(exact);
    CUDA_OK(cuda_gpu->stream_create(cuda_gpu, "compute", &stream));
    CUDA_OK(cuda_gpu->stream_create(cuda_gpu, "other", &other));
    CUDA_REFUSED(cuda_gpu->region_begin(cuda_gpu, NULL, 1), LLMPAR_ERR_ARGUMENT, "region_begin: no stream");
    CUDA_REFUSED(cuda_gpu->region_end(cuda_gpu, stream), LLMPAR_ERR_ARGUMENT, "region_end: no region is open");
    CUDA_OK(cuda_gpu->region_begin(cuda_gpu, stream, 1));
    CUDA_REFUSED(cuda_gpu->region_begin(cuda_gpu, stream, 1), LLMPAR_ERR_ARGUMENT, "a region is open on stream compute");
    CUDA_REFUSED(cuda_gpu->region_begin(cuda_gpu, other, 1), LLMPAR_ERR_ARGUMENT, "a region is open on stream compute");
    CUDA_REFUSED(cuda_gpu->region_end(cuda_gpu, other), LLMPAR_ERR_ARGUMENT, "region_end: no region is open");
    CUDA_OK(cuda_gpu->region_end(cuda_gpu, stream));
    cuda_gpu->stream_destroy(cuda_gpu, stream);
    cuda_gpu->stream_destroy(cuda_gpu, other);
}

/* What fails inside a region comes from its end, and stays with the stream; later regions and other streams see it or not as with any operation. how: 0 an operation that is refused, 1 a launch, 2 a capture. at: the region that fails. */
static void failing(int how, int at)
{
    llmpar_stream *stream;
    four f;
    double *x[3];
    llmpar_status want = how == 0 ? LLMPAR_ERR_ARGUMENT : LLMPAR_ERR_INTERNAL;
    const char *part = how == 0 ? "gemm: " : how == 2 ? "cudaStreamEndCapture" : at == 2 ? "cudaGraphLaunch" : "cudaErrorLaunchOutOfResources";
    CUDA_OK(cuda_gpu->stream_create(cuda_gpu, "compute", &stream));
    four_open(&f, x);
    for (int i = 0; i < at; i++) region(&f, stream, 1, 2.0);
    CUDA_OK(cuda_gpu->region_begin(cuda_gpu, stream, 1));
    if (how == 0) {
        llmpar_gemm_args wrong;
        memset(&wrong, 0, sizeof wrong);
        wrong.m = wrong.n = 1;
        wrong.dtype = LLMPAR_F32;
        CUDA_OK(cuda_gpu->gemm(cuda_gpu, stream, &wrong)); /* no kind */
    }
    CUDA_OK(enqueue(&f, stream, 2.0));
    if (how == 1) emulated_cuda_fail_launch(701, 1);
    if (how == 2) emulated_cuda_fail_capture(1);
    CUDA_REFUSED(cuda_gpu->region_end(cuda_gpu, stream), want, part);
    CUDA_REFUSED(cuda_gpu->synchronize(cuda_gpu, stream), want, "");
    CUDA_REFUSED(cuda_gpu->region_begin(cuda_gpu, stream, 1), want, "");
    CUDA_REFUSED(cuda_gpu->zero(cuda_gpu, stream, f.out, 4), want, "");
    cuda_gpu->stream_destroy(cuda_gpu, stream);
    CUDA_OK(cuda_gpu->stream_create(cuda_gpu, "compute", &stream));
    for (int i = 0; i < 3; i++) region(&f, stream, 1, 2.0);
    four_check(&f, "afterwards", x[0], x[1], x[2], 2.0);
    cuda_gpu->stream_destroy(cuda_gpu, stream);
    four_close(&f, x);
}

TEST(fails)
{
    FAST_OPEN();
    failing(0, 0);
    failing(0, 1);
    if (!cuda_emulated()) return;
    for (int at = 0; at < 3; at++) failing(1, at);
    failing(2, 1);
}

/* ---- training ---- */

static llmpar_backend backend;
static llmpar_cuda_desc fast;

/* Every target counts, or those of train_sequence: then the number of counted tokens, and with it a factor of backward, is another in every step. */
static llmpar_status sequence(void *user, int64_t index, int32_t *tokens)
{
    llmpar_status status = train_sequence(NULL, index, tokens);
    for (int i = 0; i <= 24; i++) tokens[i] = tokens[i] < 0 ? (user ? tokens[i] : 3) : tokens[i] % 131;
    return status;
}

typedef struct watch { llmpar_cuda_graph_counts at[8][TRAIN_STEPS + 1]; } watch;
static llmpar_status look(train_job *job, llmpar_ctx *ctx, llmpar_trainer *trainer, int step)
{
    (void)trainer;
    if (job->policy.graphs) llmpar_cuda_graphs(ctx->device, &((watch *)job->user)->at[ctx->rank][step]);
    return LLMPAR_OK;
}
static llmpar_status look_last(train_job *job, llmpar_ctx *ctx, llmpar_trainer *trainer) { return look(job, ctx, trainer, job->steps); }

static train_job job_of(const llmpar_llama_config *config, llmpar_dtype dtype, int masks)
{
    static int yes;
    train_job job;
    memset(&job, 0, sizeof job);
    memset(&fast, 0, sizeof fast);
    fast.mode = LLMPAR_CUDA_FAST;
    llmpar_cuda_backend(&fast, &backend);
    job.backend = &backend;
    job.config = config;
    job.dtype = dtype;
    job.sequence = sequence;
    job.sequence_user = masks ? &yes : NULL;
    job.zero = 3;
    job.keep_files = 1;
    job.batch = 2;
    job.canon = 4;
    job.steps = 4;
    return job;
}

static llmpar_llama_config config_of(int tied)
{
    llmpar_llama_config config = train_config(tied);
    config.vocab = 131;
    config.layers = 2;
    return config;
}

/* The same bits with and without; from the third step on all regions of every rank are replayed but for `plain` of each micro-batch. plain -1: some, since saving the gradients of the first and the last step takes memory in between, and blocks lie elsewhere. */
static void trains(const char *name, train_job job, int plain)
{
    train_result *want = (train_result *)malloc(sizeof *want), *got = (train_result *)malloc(sizeof *got);
    watch w;
    memset(&w, 0, sizeof w);
    job.user = &w;
    job.before_step = look;
    job.finish = look_last;
    job.keep_files = plain < 0;
    train_run(&job, want);
    if (want->status) TEST_FAIL("%s: without graphs: %s", name, want->error.text);
    job.policy.graphs = 1;
    train_run(&job, got);
    (void)train_same(name, got, want);
    for (int r = 0; r < got->ranks && !got->status; r++) {
        llmpar_cuda_graph_counts *at = w.at[r];
        uint64_t regions = at[1].plain + at[1].captured + at[1].replayed, expected = (uint64_t)(plain * job.accum);
        if (!r) printf("  %s: %llu regions a step; captured %llu, replayed %llu in the last of %d\n", name, (unsigned long long)regions, (unsigned long long)at[job.steps].captured,
                       (unsigned long long)(at[job.steps].replayed - at[job.steps - 1].replayed), job.steps);
        CHECK(regions > 0 && at[1].plain == regions);
        if (plain < 0) {
            CHECK(at[job.steps].replayed > 0);
            continue;
        }
        for (int step = 2; step < job.steps; step++) {
            if (at[step + 1].replayed - at[step].replayed == regions - expected && at[step + 1].plain - at[step].plain == expected) continue;
            TEST_FAIL("%s: rank %d, step %d: %llu of %llu regions replayed, expected all but %llu", name, r, step + 1, (unsigned long long)(at[step + 1].replayed - at[step].replayed), (unsigned long long)regions, (unsigned long long)expected);
        }
    }
    train_result_free(got);
    train_result_free(want);
    free(got);
    free(want);
}

TEST(trains_alone)
{
    FAST_OPEN();
    llmpar_llama_config config = config_of(0);
    train_job job = job_of(&config, LLMPAR_F32, 0);
    job.accum = 2;
    trains("f32, 2 micro-batches", job, 0);
}

TEST(trains_changing)
{
    FAST_OPEN();
    llmpar_llama_config config = config_of(1);
    train_job job = job_of(&config, LLMPAR_BF16, 1);
    job.accum = 2;
    trains("bf16, tied, other numbers of tokens", job, 1); /* the head's backward takes 1 / tokens */
}

TEST(trains_sharded)
{
    FAST_OPEN();
    llmpar_llama_config config = config_of(0);
    train_job job = job_of(&config, LLMPAR_BF16, 0);
    job.dp_shard = 2;
    job.prefetch = 1;
    job.policy.recompute = LLMPAR_RECOMPUTE_FULL;
    trains("bf16, dp 2, recompute", job, 0);
    job.dp_shard = 1;
    job.steps = TRAIN_STEPS;
    trains("with gradients and the model", job, -1);
}

static void refused(train_job job, llmpar_status want, const char *part)
{
    train_result *got = (train_result *)malloc(sizeof *got);
    job.policy.graphs = 1;
    job.keep_files = 0;
    train_run(&job, got);
    CHECK_STATUS(got->status, want);
    CHECK_TEXT(got->error.text, part);
    for (int r = 0; r < got->ranks; r++) CHECK_INT(got->live[r], 0);
    train_result_free(got);
    free(got);
}

TEST(trainer_refuses)
{
    FAST_OPEN();
    llmpar_llama_config config = config_of(0);
    llmpar_cuda_desc exact;
    train_job job = job_of(&config, LLMPAR_F16, 0);
    refused(job, LLMPAR_ERR_UNSUPPORTED, "trainer: graphs with dtype f16");
    job.dtype = LLMPAR_F32;
    job.tp = 2;
    refused(job, LLMPAR_ERR_UNSUPPORTED, "trainer: graphs with tp = 2, expected 1");
    job.tp = 1;
    memset(&exact, 0, sizeof exact);
    llmpar_cuda_backend(&exact, &backend);
    refused(job, LLMPAR_ERR_UNSUPPORTED, "fsdp: graphs on device cuda sm_");
    refused(job, LLMPAR_ERR_UNSUPPORTED, "which has none; expected a CUDA device in mode fast");
    job.backend = NULL;
    refused(job, LLMPAR_ERR_UNSUPPORTED, "fsdp: graphs on device cpu");
}

TEST_LIST(T_(replays), T_(ends_early), T_(many_keys), T_(refuses), T_(fails), T_(trains_alone), T_(trains_changing), T_(trains_sharded), T_(trainer_refuses), T_(cuda_end))
