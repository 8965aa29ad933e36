/* Training on a device whose memory the host cannot touch gives the bytes of the CPU device: no code above the tables reads or writes tensor memory but through copies, operations and collectives, and none of these is handed
   host memory but copy. What does otherwise ends in a SIGSEGV or in an error that names the slot. */
#include "apart_device.h"
#include "debug_device.h"
#include "train.h"

#include <sys/stat.h>

/* Under a sanitizer every second job or so. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { STRIDE = 2 };
#else
enum { STRIDE = 1 };
#endif

/* ---- the debug device in between: apart, and late ---- */

static debug_order late_order;
static llmpar_device *late(llmpar_device *host)
{
    debug_device *d = (debug_device *)calloc(1, sizeof *d);
    if (d) debug_device_init(d, host, late_order);
    return d ? &d->table : NULL;
}
static void late_end(llmpar_device *inner)
{
    debug_device *d = (debug_device *)(void *)inner;
    CHECK_INT(d->pending, 0);
    CHECK_INT(d->early_free, 0);
    free(d);
}

static int strict_pinned = 1; /* steps must not copy to or from memory that host_alloc did not give */

/* ---- what a job does beside its steps ---- */

enum { PROMPT = 5, GENERATED = 12, VOCAB = 509 };
typedef struct extra { float logits[PROMPT * VOCAB]; int32_t id[2][GENERATED]; uint64_t memory[3]; uint64_t unpinned; } extra;
static extra seen[TRAIN_RANKS];

static llmpar_status talk(train_job *job, llmpar_ctx *ctx, llmpar_llama *model, llmpar_trainer *trainer)
{
    static const int32_t prompt[PROMPT] = { 5, 300, 77, 1, 508 };
    extra *e = &seen[ctx->rank];
    llmpar_status status = llmpar_llama_logits(model, llmpar_trainer_fsdp(trainer), prompt, PROMPT, e->logits);
    (void)job;
    return status ? status : train_generate(model, trainer, prompt, PROMPT, GENERATED, e->id[0]);
}

static llmpar_status before_step(train_job *job, llmpar_ctx *ctx, llmpar_trainer *trainer, int step)
{
    (void)job;
    (void)trainer;
    if (step == 1 && ctx->device->apart) seen[ctx->rank].unpinned = APART_OF(ctx->device)->unpinned;
    return LLMPAR_OK;
}

static llmpar_status finish(train_job *job, llmpar_ctx *ctx, llmpar_trainer *trainer)
{
    llmpar_memory memory;
    llmpar_trainer_memory(trainer, &memory);
    seen[ctx->rank].memory[0] = memory.init.peak_total;
    seen[ctx->rank].memory[1] = memory.before_optimizer.peak_total;
    seen[ctx->rank].memory[2] = memory.step.peak_total;
    if (ctx->device->apart && strict_pinned) {
        uint64_t now = APART_OF(ctx->device)->unpinned;
        if (now != seen[ctx->rank].unpinned) TEST_FAIL("%s: rank %d: %llu copies with host memory that is not pinned in %d steps", (const char *)job->user, (int)ctx->rank, (unsigned long long)(now - seen[ctx->rank].unpinned), job->steps - 1);
    }
    return LLMPAR_OK;
}

/* Runs the job on the CPU device and on the one apart, and compares. */
static void both_on(train_job *given, const char *name, int order, int talks)
{
    static extra want_seen[TRAIN_RANKS];
    train_result want, got;
    apart_report report;
    llmpar_backend backend;
    memset(&report, 0, sizeof report);
    memset(seen, 0, sizeof seen);
    train_job job = *given;
    job.threads = 1;
    job.ready = talks ? talk : NULL;
    job.finish = finish;
    job.user = (void *)(uintptr_t)name;
    train_run(&job, &want);
    if (want.status) TEST_FAIL("%s on the CPU: %s", name, want.error.text);
    if (job.policy.loss_scale.scale > 0) CHECK(want.step[0][0].skipped && !want.step[0][job.steps - 1].skipped);
    memcpy(want_seen, seen, sizeof seen);
    memset(seen, 0, sizeof seen);
    apart_backend(&report, &backend);
    if (order >= 0) {
        late_order = (debug_order)order;
        report.inner = late;
        report.inner_end = late_end;
    }
    job.backend = &backend;
    job.before_step = before_step;
    train_run(&job, &got);
    train_same(name, &got, &want);
    for (int r = 0; r < got.ranks; r++) seen[r].unpinned = 0;
    for (int r = 0; r < got.ranks && !got.status; r++)
        if (memcmp(&seen[r], &want_seen[r], sizeof seen[r])) TEST_FAIL("%s: rank %d: logits, generated ids or memory differ", name, r);
    CHECK_INT(report.leaked, 0);
    CHECK_INT(report.host_leaked, 0);
    CHECK(report.copies > 0);
    train_result_free(&want);
    train_result_free(&got);
}
static void both(train_job *job, const char *name) { both_on(job, name, -1, STRIDE == 1); }

static train_job job_of(const llmpar_llama_config *config, int32_t shard, int32_t tp) { return train_job_of(config, 1, shard, tp); }

TEST(meshes)
{
    for (int tied = 0; tied < 2; tied += STRIDE) {
        llmpar_llama_config config = train_config(tied);
        train_job job = job_of(&config, 1, 1);
        both(&job, "1");
        job = job_of(&config, 1, 4);
        job.sp = 1;
        both(&job, "tp4 sp");
        job = job_of(&config, 2, 2);
        job.prefetch = 1;
        job.accum = 2;
        both(&job, "2x2 prefetch accum 2");
        job = job_of(&config, 4, 1);
        job.zero = tied;
        job.accum = 4;
        job.no_sync = 1;
        both(&job, "dp4 accum 4 no_sync");
        job = job_of(&config, 2, 1);
        job.dp_replicate = 2;
        job.policy.chain = 1;
        job.accum = 2;
        both(&job, "hsdp 2x2 chain");
    }
}

TEST(precision)
{
    llmpar_llama_config config = train_config(1);
    static const llmpar_dtype dtypes[] = { LLMPAR_BF16, LLMPAR_F16, LLMPAR_F64 };
    for (int d = 0; d < 3; d += STRIDE) {
        train_job job = job_of(&config, 2, 2);
        job.dtype = dtypes[d];
        job.sp = d == 0;
        job.steps = 3;
        if (dtypes[d] == LLMPAR_F16) job.policy.loss_scale.scale = 2097152.0; /* too large at first: a step is skipped */
        both(&job, llmpar_dtype_name(dtypes[d]));
        if (dtypes[d] == LLMPAR_F64) continue;
        job = job_of(&config, 1, 1);
        job.dtype = dtypes[d];
        job.policy.reduce_dtype = LLMPAR_BF16;
        job.dp_shard = 2;
        job.dp_replicate = 2;
        both(&job, "narrow gradients");
    }
}

TEST(optimizers)
{
    static const llmpar_optim_kind kinds[] = { LLMPAR_OPTIM_ADAMW, LLMPAR_OPTIM_SGD, LLMPAR_OPTIM_LOMO, LLMPAR_OPTIM_ADALOMO };
    llmpar_llama_config config = train_config(0);
    for (int k = 0; k < 4; k++)
        for (int mesh = STRIDE - 1; mesh < 2; mesh++) {
            char name[64];
            train_job job = job_of(&config, mesh ? 2 : 1, mesh ? 2 : 1);
            job.policy.optim.kind = kinds[k];
            job.dtype = mesh && k ? LLMPAR_F16 : LLMPAR_F32;
            snprintf(name, sizeof name, "%s, mesh %d", llmpar_optim_name(kinds[k]), mesh);
            both(&job, name);
        }
}

TEST(memory_policies)
{
    enum { ON_HOST = 2 }; /* with overlap */
    static const struct { const char *name; llmpar_tier tier[LLMPAR_STATE_COUNT]; llmpar_recompute recompute; int32_t overlap, freeze; llmpar_dtype dtype; } cases[] = {
        { "optimizer in host memory", { LLMPAR_TIER_HOST, 0, 0, 0 }, LLMPAR_RECOMPUTE_NONE, 0, 0, LLMPAR_F32 },
        { "everything in host memory", { LLMPAR_TIER_HOST, LLMPAR_TIER_HOST, LLMPAR_TIER_HOST, LLMPAR_TIER_HOST }, LLMPAR_RECOMPUTE_SELECTIVE, 0, 0, LLMPAR_BF16 },
        { "updated on the host", { LLMPAR_TIER_HOST, LLMPAR_TIER_HOST, LLMPAR_TIER_HOST, 0 }, LLMPAR_RECOMPUTE_NONE, ON_HOST, 0, LLMPAR_BF16 },
        { "updated on the host, f16, overlap", { LLMPAR_TIER_HOST, LLMPAR_TIER_HOST, LLMPAR_TIER_HOST, LLMPAR_TIER_HOST }, LLMPAR_RECOMPUTE_SELECTIVE, ON_HOST + 1, 0, LLMPAR_F16 },
        { "everything in files", { LLMPAR_TIER_FILE, LLMPAR_TIER_FILE, LLMPAR_TIER_FILE, LLMPAR_TIER_FILE }, LLMPAR_RECOMPUTE_FULL, 0, 0, LLMPAR_F32 },
        { "recompute", { 0, 0, 0, 0 }, LLMPAR_RECOMPUTE_FULL, 0, 0, LLMPAR_F32 },
        { "frozen units", { 0, 0, 0, 0 }, LLMPAR_RECOMPUTE_SELECTIVE, 0, 2, LLMPAR_F32 },
        { "overlap", { LLMPAR_TIER_HOST, 0, LLMPAR_TIER_FILE, 0 }, LLMPAR_RECOMPUTE_NONE, 1, 0, LLMPAR_F16 },
    };
    llmpar_llama_config config = train_config(1);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i += STRIDE)
        for (int mesh = STRIDE - 1; mesh < 2; mesh++) {
            train_job job = job_of(&config, mesh ? 2 : 1, mesh ? 2 : 1);
            memcpy(job.policy.offload, cases[i].tier, sizeof cases[i].tier);
            if (mesh == 0 && cases[i].dtype == LLMPAR_F32) job.policy.offload[LLMPAR_STATE_PARAMS] = LLMPAR_TIER_DEVICE; /* the parameters are whole there */
            job.policy.recompute = cases[i].recompute;
            job.policy.overlap = cases[i].overlap % ON_HOST;
            if (cases[i].overlap >= ON_HOST) job.policy.offload_update = LLMPAR_TIER_HOST;
            job.policy.freeze = cases[i].freeze;
            job.dtype = cases[i].dtype;
            job.accum = mesh ? 2 : 1;
            both(&job, cases[i].name);
        }
}

/* Late as well as apart. */
TEST(late_too)
{
    llmpar_llama_config config = train_config(1);
    for (int order = DEBUG_FIFO; order <= DEBUG_OTHERS; order++) {
        train_job job = job_of(&config, 2, 2);
        job.sp = job.prefetch = 1;
        job.accum = 2;
        job.dtype = order == DEBUG_LAZY ? LLMPAR_BF16 : LLMPAR_F32;
        job.steps = 3; /* nobody looks at the gradients of the second */
        if (order != DEBUG_FIFO) job.policy.offload[LLMPAR_STATE_OPTIMIZER] = LLMPAR_TIER_HOST;
        if (order == DEBUG_LAZY) {
            job.policy.offload[LLMPAR_STATE_PARAMS] = job.policy.offload[LLMPAR_STATE_GRADS] = LLMPAR_TIER_HOST;
            job.policy.offload_update = LLMPAR_TIER_HOST;
        }
        both_on(&job, "late", order, 1);
    }
}

/* ---- the life of a run: text, evaluation, checkpoints, models, the plan, measurements ---- */

typedef struct life { char directory[300]; double value[TRAIN_RANKS][8]; uint64_t planned[TRAIN_RANKS]; } life;

static llmpar_status live(llmpar_ctx *ctx, void *user)
{
    life *l = (life *)user;
    llmpar_llama_config config = train_config(0);
    llmpar_mesh *mesh = NULL;
    llmpar_llama *model = NULL;
    llmpar_trainer *trainer = NULL;
    llmpar_mesh_desc mesh_desc;
    llmpar_llama_desc model_desc;
    llmpar_trainer_desc desc;
    llmpar_memory plan, reality;
    llmpar_step step;
    char data[340], checkpoints[340], out[340], trace[340], log[340], text[8192];
    double *value = l->value[ctx->rank];
    snprintf(data, sizeof data, "%s/text", l->directory);
    snprintf(checkpoints, sizeof checkpoints, "%s/checkpoints", l->directory);
    snprintf(out, sizeof out, "%s/model", l->directory);
    snprintf(trace, sizeof trace, "%s/trace", l->directory);
    snprintf(log, sizeof log, "%s/log", l->directory);
    memset(&mesh_desc, 0, sizeof mesh_desc);
    memset(&model_desc, 0, sizeof model_desc);
    memset(&desc, 0, sizeof desc);
    if (ctx->world == 4) mesh_desc.dp_shard = mesh_desc.tp = 2;
    model_desc.config = &config;
    model_desc.seed = 7;
    desc.data = data;
    desc.seq_len = 24;
    desc.batch = 8;
    desc.lr = 1e-2;
    desc.optim.kind = LLMPAR_OPTIM_ADAMW;
    desc.checkpoint = checkpoints;
    desc.checkpoint_background = 1;
    desc.trace = trace;
    desc.log = log;
    desc.log_every = 1;
    desc.sink = train_sink;
    llmpar_status status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_llama_create(ctx, &model_desc, &model);
    if (!status) status = llmpar_plan_memory(mesh, model, &desc, &plan, NULL);
    if (!status) status = llmpar_parallelize(mesh, model, &desc, &trainer);
    for (int i = 0; i < 2 && !status; i++) {
        status = llmpar_trainer_step(trainer, &step);
        value[i] = step.loss;
    }
    if (!status) CHECK(step.mfu > 0 && step.tflops > 0);
    llmpar_trainer_memory(trainer, &reality);
    CHECK_INT(plan.step.peak_total, reality.step.peak_total);
    CHECK_INT(plan.init.peak_total, reality.init.peak_total);
    l->planned[ctx->rank] = plan.step.peak_total;
    if (!status) status = llmpar_memory_print(ctx, &reality, text, sizeof text);
    if (!status) status = llmpar_trainer_eval(trainer, 4, &value[2]);
    if (!status) status = llmpar_trainer_checkpoint(trainer);
    if (!status) status = llmpar_trainer_step(trainer, &step);
    value[3] = step.loss;
    if (!status) status = llmpar_trainer_finish(trainer);
    if (!status) status = llmpar_trainer_save_trace(trainer);
    if (!status) status = llmpar_save_hf(trainer, out);
    if (!status) status = llmpar_trainer_eval(trainer, 4, &value[4]);
    llmpar_trainer_destroy(trainer);
    trainer = NULL;
    desc.resume = "auto";
    desc.trace = NULL;
    if (!status) status = llmpar_parallelize(mesh, model, &desc, &trainer);
    if (!status) status = llmpar_trainer_step(trainer, &step);
    value[5] = step.loss;
    if (!status) CHECK(value[5] == value[3]);
    if (!status) status = llmpar_load_hf(trainer, out);
    if (!status) status = llmpar_trainer_eval(trainer, 4, &value[6]);
    if (!status) CHECK(value[6] == value[4]);
    if (!status) status = llmpar_trainer_step(trainer, &step);
    value[7] = step.loss;
    llmpar_trainer_destroy(trainer);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    return status;
}

static void live_on(life *l, int ranks, const llmpar_backend *backend)
{
    llmpar_launch_desc launch = { .ranks = ranks, .threads = 1, .transport = LLMPAR_TRANSPORT_THREADS, .backend = backend, .check = test_no_leak };
    llmpar_error error;
    char text[400];
    memset(l, 0, sizeof *l);
    snprintf(l->directory, sizeof l->directory, "%.200s/llmpar-apart-XXXXXX", getenv("TMPDIR") && getenv("TMPDIR")[0] ? getenv("TMPDIR") : "/tmp");
    if (!mkdtemp(l->directory)) { TEST_FAIL("cannot make %s", l->directory); return; }
    snprintf(text, sizeof text, "%s/text", l->directory);
    FILE *f = fopen(text, "w");
    for (int i = 0; f && i < 8000; i++) fputc('a' + (int)(train_mix((uint64_t)i) % 26), f);
    if (f) fclose(f);
    if (llmpar_launch(&launch, live, l, &error)) TEST_FAIL("rank %d: %s", (int)error.rank, error.text);
    snprintf(text, sizeof text, "rm -rf '%s'", l->directory);
    if (system(text)) TEST_FAIL("cannot remove %s", l->directory);
}

TEST(life_of_a_run)
{
    static life want, got;
    for (int ranks = 1; ranks <= 4; ranks += 3) {
        apart_report report;
        llmpar_backend backend;
        memset(&report, 0, sizeof report);
        apart_backend(&report, &backend);
        live_on(&want, ranks, NULL);
        live_on(&got, ranks, &backend);
        CHECK_BYTES(got.value, want.value, sizeof want.value);
        CHECK_BYTES(got.planned, want.planned, sizeof want.planned);
        CHECK_INT(report.leaked, 0);
        CHECK_INT(report.host_leaked, 0);
    }
}

/* ---- redistribution, from everything to everything ---- */

enum { WAYS = 6, ROWS = 37, COLUMNS = 22 };
static void way(int i, llmpar_dtensor *t)
{
    memset(t, 0, sizeof *t);
    t->name = "way";
    t->dtype = LLMPAR_F32;
    t->dims = 2;
    t->shape[0] = ROWS;
    t->shape[1] = COLUMNS;
    if (i == 1 || i == 2 || i == 4) { /* Shard(0), Shard(1) over tp; 4: and over dp_shard too */
        llmpar_placement *p = &t->placement[t->placements++];
        p->kind = LLMPAR_SHARD;
        p->axis = LLMPAR_AXIS_TP;
        p->dim = i == 2;
    }
    if (i == 3 || i == 4) {
        llmpar_placement *p = &t->placement[t->placements++];
        p->kind = LLMPAR_SHARD;
        p->axis = LLMPAR_AXIS_DP_SHARD;
        p->dim = 1;
    }
    if (i == 5) {
        llmpar_placement *p = &t->placement[t->placements++];
        p->kind = LLMPAR_FLAT;
        p->axis = LLMPAR_AXIS_DP_SHARD;
        p->offset = 128;
        p->unit_elements = 2048;
    }
}
static llmpar_status redistribute(llmpar_ctx *ctx, void *user)
{
    enum { MOST = 2048 };
    float whole[ROWS * COLUMNS], host[MOST], want[MOST], *memory = NULL;
    llmpar_device *device = ctx->device;
    llmpar_mesh *mesh = NULL;
    llmpar_mesh_desc desc;
    llmpar_stream *stream = NULL;
    (void)user;
    memset(&desc, 0, sizeof desc);
    desc.dp_shard = desc.tp = 2;
    for (int i = 0; i < ROWS * COLUMNS; i++) whole[i] = (float)i;
    llmpar_status status = llmpar_mesh_create(ctx, &desc, &mesh);
    if (!status) status = device->stream_create(device, "redistribute", &stream);
    if (!status) status = device->alloc(device, 6 * MOST * sizeof *memory, (void **)&memory);
    for (int i = 0; i < WAYS * WAYS && !status; i++) {
        llmpar_dtensor from, to;
        llmpar_redistribute_plan plan;
        way(i / WAYS, &from);
        way(i % WAYS, &to);
        status = llmpar_redistribute_plan_make(&from, &to, mesh->degree, &plan, &ctx->error);
        if (status) break;
        CHECK(llmpar_redistribute_scratch(&plan, mesh->coordinate) <= 4 * MOST);
        memset(host, 0, sizeof host);
        memset(want, 0, sizeof want);
        llmpar_dtensor_cut(&to, mesh, whole, want);
        llmpar_dtensor_cut(&from, mesh, whole, host);
        status = device->copy(device, stream, memory, host, sizeof host);
        if (!status) status = device->zero(device, stream, memory + MOST, sizeof host);
        if (!status) status = llmpar_redistribute(&plan, mesh, stream, memory, memory + 2 * MOST, memory + MOST);
        if (!status) status = device->copy(device, stream, host, memory + MOST, sizeof host);
        if (!status) status = device->synchronize(device, stream);
        if (!status) CHECK_BYTES(host, want, sizeof want);
    }
    if (stream) device->stream_destroy(device, stream);
    device->free(device, memory, 6 * MOST * sizeof *memory);
    llmpar_mesh_destroy(mesh);
    return status;
}
TEST(redistribution)
{
    apart_report report;
    llmpar_backend backend;
    llmpar_error error;
    memset(&report, 0, sizeof report);
    apart_backend(&report, &backend);
    llmpar_launch_desc launch = { .ranks = 4, .transport = LLMPAR_TRANSPORT_THREADS, .backend = &backend, .check = test_no_leak };
    if (llmpar_launch(&launch, redistribute, NULL, &error)) TEST_FAIL("rank %d: %s", (int)error.rank, error.text);
    CHECK_INT(report.leaked, 0);
}

/* ---- the device itself ---- */

static llmpar_status misuse(llmpar_ctx *ctx, void *user)
{
    llmpar_device *device = ctx->device;
    float host[4] = { 1, 2, 3, 4 }, *memory = NULL;
    llmpar_scale_args scale = { .count = 4, .x = host, .factor = 2, .dtype = LLMPAR_F32 };
    (void)user;
    CHECK_STATUS(device->scale(device, NULL, &scale), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(ctx->error.text, "scale: x is not this device's memory");
    llmpar_error_clear(&ctx->error);
    llmpar_gemm_segment segment = { .a = host, .b = host, .lda = 2, .ldb = 2, .k = 2 };
    CHECK_OK(device->alloc(device, sizeof host, (void **)&memory));
    llmpar_gemm_args gemm = { .m = 2, .n = 2, .c = memory, .ldc = 2, .segments = &segment, .segment_count = 1, .pieces = 1, .kind = LLMPAR_GEMM_NN, .dtype = LLMPAR_F32 };
    CHECK_STATUS(device->gemm(device, NULL, &gemm), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(ctx->error.text, "gemm: a is not this device's memory");
    llmpar_error_clear(&ctx->error);
    llmpar_collective call = { .send = memory, .recv = host, .count = 4, .dtype = LLMPAR_F32, .tag = "misuse" };
    CHECK_STATUS(ctx->comm->all_reduce(ctx->comm, NULL, &call), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(ctx->error.text, "all_reduce: recv is not this device's memory");
    llmpar_error_clear(&ctx->error);
    device->free(device, memory, sizeof host);
    return LLMPAR_OK;
}
TEST(the_device_names_what_is_not_its_memory)
{
    apart_report report;
    llmpar_backend backend;
    memset(&report, 0, sizeof report);
    apart_backend(&report, &backend);
    llmpar_launch_desc launch = { .ranks = 2, .transport = LLMPAR_TRANSPORT_THREADS, .backend = &backend, .check = test_no_leak };
    CHECK_OK(llmpar_launch(&launch, misuse, NULL, NULL));
}

TEST_LIST(T_(the_device_names_what_is_not_its_memory), T_(meshes), T_(precision), T_(optimizers), T_(memory_policies), T_(late_too), T_(life_of_a_run), T_(redistribution))
