/* launch: the ranks' surroundings, which error is the root, and that nothing is left behind. */
#define _GNU_SOURCE 1
#include "test.h"

#include <pthread.h>
#if defined(__linux__)
#include <dirent.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

static int checked;
static void no_leak(const llmpar_ctx *ctx, void *user)
{
    (void)user;
    CHECK_INT(ctx->heap.live, 0);
    CHECK_INT(ctx->rank, checked); /* one after the other, on the launching thread */
    checked++;
}

typedef struct seen { pthread_t thread[8]; char name[8][16]; int ranks; } seen;

static llmpar_status look(llmpar_ctx *ctx, void *user)
{
    seen *out = (seen *)user;
    CHECK_INT(ctx->world, out->ranks);
    CHECK(ctx->rank >= 0 && ctx->rank < ctx->world);
    CHECK(ctx->device && ctx->comm);
    CHECK_INT(ctx->comm->rank, ctx->rank);
    CHECK_INT(ctx->comm->ranks, ctx->world);
    CHECK(ctx->device->error == &ctx->error && ctx->comm->error == &ctx->error);
    out->thread[ctx->rank] = pthread_self();
#if defined(__linux__)
    prctl(PR_GET_NAME, out->name[ctx->rank], 0, 0, 0);
#endif
    return LLMPAR_OK;
}

TEST(ranks_and_names)
{
    static seen out;
    llmpar_error error;
    char before[16] = "", name[16];
    llmpar_launch_desc desc = { .ranks = 3, .check = no_leak };
#if defined(__linux__)
    prctl(PR_GET_NAME, before, 0, 0, 0);
#endif
    out.ranks = 3;
    checked = 0;
    CHECK_OK(llmpar_launch(&desc, look, &out, &error));
    CHECK_INT(error.status, LLMPAR_OK);
    CHECK_INT(checked, 3);
    for (int r = 0; r < 3; r++) {
        CHECK(!pthread_equal(out.thread[r], pthread_self()));
        snprintf(name, sizeof name, "r%d", r);
#if defined(__linux__)
        CHECK(!strcmp(out.name[r], name));
#endif
    }
    memset(&desc, 0, sizeof desc); /* a zero desc is one rank, on this thread, whose name stays */
    out.ranks = 1;
    CHECK_OK(llmpar_launch(&desc, look, &out, NULL));
    CHECK(pthread_equal(out.thread[0], pthread_self()));
    CHECK(!strcmp(out.name[0], before));
    CHECK_OK(llmpar_launch(NULL, look, &out, NULL));
}

/* Where threads run, and how many there are. */
#if defined(__linux__)
typedef struct places { cpu_set_t self[16], worker[16]; int workers[16], threads; } places;

/* A worker names and places itself first of all, and no run ends without every worker. */
static void workers_are_there(llmpar_device *device)
{
    enum { MANY = 1 << 17 };
    float *x = (float *)calloc(MANY, sizeof *x);
    llmpar_add_args args = { MANY, x, x, x, LLMPAR_F32 };
    CHECK_OK(device->add(device, NULL, &args));
    free(x);
}

static llmpar_status where(llmpar_ctx *ctx, void *user)
{
    places *out = (places *)user;
    char prefix[32], path[300], name[32];
    int length = snprintf(prefix, sizeof prefix, "%s", ""), r = ctx->rank;
    prctl(PR_GET_NAME, prefix, 0, 0, 0);
    length = (int)strlen(prefix);
    snprintf(prefix + length, sizeof prefix - (size_t)length, " w");
    sched_getaffinity(0, sizeof out->self[r], &out->self[r]);
    DIR *tasks = opendir("/proc/self/task");
    out->workers[r] = 0;
    workers_are_there(ctx->device);
    CHECK_OK(llmpar_comm_barrier(ctx->comm, NULL, "all are there"));
    for (struct dirent *entry; tasks && (entry = readdir(tasks));) {
        snprintf(path, sizeof path, "/proc/self/task/%s/comm", entry->d_name);
        FILE *file = fopen(path, "r");
        if (file && fgets(name, sizeof name, file) && !strncmp(name, prefix, (size_t)length + 2) && atoi(name + length + 2) == 1) sched_getaffinity(atoi(entry->d_name), sizeof out->worker[r], &out->worker[r]);
        if (file && !strncmp(name, prefix, (size_t)length + 2)) out->workers[r]++;
        if (file) fclose(file);
    }
    if (tasks) closedir(tasks);
    return llmpar_comm_barrier(ctx->comm, NULL, "all have looked");
}

TEST(threads_and_places)
{
    static places out;
    cpu_set_t mine, now;
    CHECK_INT(sched_getaffinity(0, sizeof mine, &mine), 0);
    int processors = CPU_COUNT(&mine);
    for (int ranks = 1; ranks <= 3; ranks++)
        for (int pin = LLMPAR_PIN_DEFAULT; pin <= LLMPAR_PIN_OFF; pin++)
            for (int threads = 0; threads <= 2; threads++) {
                llmpar_launch_desc desc = { .ranks = ranks, .threads = threads, .pin = (llmpar_pin)pin };
                llmpar_error error;
                memset(&out, 0, sizeof out);
                if (pin == LLMPAR_PIN_ON && (threads ? threads : 1) * ranks > processors) { /* there is no place for each */
                    CHECK_INT(llmpar_launch(&desc, where, &out, &error), LLMPAR_ERR_CONFIG);
                    CHECK(strstr(error.text, "too many threads"));
                    continue;
                }
                CHECK_OK(llmpar_launch(&desc, where, &out, &error));
                CHECK_INT(sched_getaffinity(0, sizeof now, &now), 0);
                CHECK(CPU_EQUAL(&mine, &now)); /* the caller's thread is where it was */
                int workers = out.workers[0];
                CHECK(threads ? workers == threads - 1 : workers + 1 <= (processors > ranks ? processors / ranks : 1));
                if (!threads && processors == 2) CHECK_INT(workers, ranks == 1 ? 1 : 0);
                int all = (workers + 1) * ranks, pinned = CPU_COUNT(&out.self[0]) == 1 && processors > 1;
                if (pin == LLMPAR_PIN_OFF || all > processors) CHECK(processors == 1 || !pinned);
                if (processors > 1 && all <= processors && pin == LLMPAR_PIN_ON) CHECK(pinned);
                if (processors > 1 && all == processors && pin == LLMPAR_PIN_DEFAULT) CHECK(pinned);
                cpu_set_t taken;
                CPU_ZERO(&taken);
                for (int r = 0; r < ranks; r++) {
                    CHECK_INT(out.workers[r], workers);
                    if (!pinned) {
                        CHECK(CPU_EQUAL(&out.self[r], &mine));
                        if (workers) CHECK(CPU_EQUAL(&out.worker[r], &mine));
                        continue;
                    }
                    CPU_AND(&now, &taken, &out.self[r]);
                    CHECK(CPU_COUNT(&out.self[r]) == 1 && !CPU_COUNT(&now)); /* one of its own */
                    CPU_OR(&taken, &taken, &out.self[r]);
                    if (!workers) continue;
                    CPU_AND(&now, &taken, &out.worker[r]);
                    CHECK(CPU_COUNT(&out.worker[r]) == 1 && !CPU_COUNT(&now));
                    CPU_OR(&taken, &taken, &out.worker[r]);
                }
            }
    CPU_ZERO(&now); /* what the process may use, not what the machine has */
    for (int i = 0; i < CPU_SETSIZE && !CPU_COUNT(&now); i++)
        if (CPU_ISSET(i, &mine)) CPU_SET(i, &now);
    CHECK_INT(sched_setaffinity(0, sizeof now, &now), 0);
    llmpar_launch_desc one = { .ranks = 1 };
    memset(&out, 0, sizeof out);
    CHECK_OK(llmpar_launch(&one, where, &out, NULL));
    CHECK_INT(out.workers[0], 0);
    llmpar_launch_desc lockstep = { .ranks = 1, .lockstep = 1 };
    CHECK_INT(sched_setaffinity(0, sizeof mine, &mine), 0);
    CHECK_OK(llmpar_launch(&lockstep, where, &out, NULL));
    CHECK_INT(out.workers[0], 0);
    CHECK(CPU_EQUAL(&out.self[0], &mine));
}
#else
TEST(threads_and_places) { TEST_SKIP("Linux only"); }
#endif

static llmpar_status fails(llmpar_ctx *ctx, void *user)
{
    int how = *(int *)user;
    llmpar_status st;
    llmpar_mesh *mesh = NULL;
    llmpar_mesh_desc desc = { .tp = ctx->world };
    if (how == 4) return LLMPAR_ERR_PEER; /* nobody has failed before: no such thing */
    if (how == 3) CHECK_OK(llmpar_mesh_create(ctx, &desc, &mesh));
    if (ctx->rank == ctx->world - 1) {
        llmpar_mesh_destroy(mesh);
        if (how == 1) return LLMPAR_ERR_FORMAT;
        return llmpar_fail(ctx, LLMPAR_ERR_IO, "cannot read %s", "x.bin");
    }
    st = llmpar_comm_barrier(ctx->comm, NULL, "wait");
    if (ctx->world > 1) CHECK_INT(st, LLMPAR_ERR_PEER);
    CHECK_TEXT(llmpar_last_error(ctx), "barrier \"wait\" (call ");
    CHECK_TEXT(llmpar_last_error(ctx), " on world): rank");
    if (how == 3) CHECK_TEXT(llmpar_last_error(ctx), "(tp=2)");
    if (how == 3) CHECK(strstr(ctx->error.where, "tp=") != NULL);
    CHECK_INT(ctx->error.rank, ctx->rank);
    llmpar_mesh_destroy(mesh);
    return how == 2 ? LLMPAR_OK : st; /* 2: it does not care */
}

TEST(root_error)
{
    llmpar_error error;
    int how;
    for (int ranks = 1; ranks <= 3; ranks += 2)
        for (how = 0; how < 4; how++) {
            llmpar_launch_desc desc = { .ranks = ranks, .check = no_leak };
            checked = 0;
            memset(&error, 0x5a, sizeof error); /* need not be initialised */
            CHECK_STATUS(llmpar_launch(&desc, fails, &how, &error), how == 1 ? LLMPAR_ERR_FORMAT : LLMPAR_ERR_IO);
            CHECK_INT(checked, ranks);
            CHECK_INT(error.rank, ranks - 1);
            CHECK_TEXT(error.text, how == 1 ? "malformed input" : "cannot read x.bin");
            CHECK(!strcmp(error.where, how == 3 && ranks == 3 ? "tp=2" : ""));
        }
    how = 4;
    llmpar_launch_desc desc = { .ranks = 2 };
    CHECK_STATUS(llmpar_launch(&desc, fails, &how, &error), LLMPAR_ERR_INTERNAL);
    CHECK_TEXT(error.text, "without a text");
}

static llmpar_status nothing(llmpar_ctx *ctx, void *user)
{
    (void)ctx;
    if (user) ++*(int *)user;
    return LLMPAR_OK;
}

TEST(bad_descs)
{
    llmpar_error error;
    int called = 0;
    llmpar_launch_desc desc = { .ranks = -1 };
    CHECK_STATUS(llmpar_launch(&desc, nothing, &called, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "ranks = -1");
    desc.ranks = 1 << 30;
    CHECK_STATUS(llmpar_launch(&desc, nothing, &called, &error), LLMPAR_ERR_ARGUMENT);
    desc.ranks = 2;
    desc.threads = -3;
    CHECK_STATUS(llmpar_launch(&desc, nothing, &called, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "threads = -3");
    desc.threads = 0;
    desc.pin = (llmpar_pin)3;
    CHECK_STATUS(llmpar_launch(&desc, nothing, &called, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "pin = 3");
    desc.pin = LLMPAR_PIN_DEFAULT;
    desc.transport = (llmpar_transport)4;
    CHECK_STATUS(llmpar_launch(&desc, nothing, &called, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "transport = 4");
    desc.transport = LLMPAR_TRANSPORT_THREADS;
    desc.deadline = 0.0 / (desc.threads * 1.0);
    CHECK_STATUS(llmpar_launch(&desc, nothing, &called, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "the deadline is not a number");
    desc.deadline = 0;
    char path[1200];
    memset(path, 'x', sizeof path);
    path[sizeof path - 1] = 0;
    desc.record = path;
    CHECK_STATUS(llmpar_launch(&desc, nothing, &called, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "record: a path of 1199 bytes");
    desc.record = NULL;
    desc.cpu = "avx3";
    CHECK_STATUS(llmpar_launch(&desc, nothing, &called, &error), LLMPAR_ERR_CONFIG);
    CHECK_TEXT(error.text, "cpu \"avx3\" is not a dispatch level (portable, avx2, avx512, avx512bf16");
    CHECK_STATUS(llmpar_launch(&desc, NULL, &called, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_INT(called, 0);
    desc.cpu = NULL;
    char before[64] = "";
    if (getenv("LLMPAR_CPU")) snprintf(before, sizeof before, "%s", getenv("LLMPAR_CPU"));
    setenv("LLMPAR_CPU", "fast", 1);
    CHECK_STATUS(llmpar_launch(&desc, nothing, &called, &error), LLMPAR_ERR_CONFIG);
    CHECK_TEXT(error.text, "LLMPAR_CPU \"fast\"");
    desc.ranks = 1;
    desc.cpu = "portable"; /* the desc wins */
    CHECK_OK(llmpar_launch(&desc, nothing, &called, &error));
    CHECK_INT(called, 1);
    if (before[0]) setenv("LLMPAR_CPU", before, 1);
    else unsetenv("LLMPAR_CPU");
}

/* Hooks that count, and that give out at a chosen allocation of the whole job. */
typedef struct counting { int64_t live, calls, fail_at; } counting;
static void *counting_alloc(void *user, size_t bytes)
{
    counting *c = (counting *)user;
    int64_t call = __atomic_add_fetch(&c->calls, 1, __ATOMIC_SEQ_CST);
    if (c->fail_at && call >= c->fail_at) return NULL;
    void *memory = malloc(bytes);
    if (memory) __atomic_add_fetch(&c->live, (int64_t)bytes, __ATOMIC_SEQ_CST);
    return memory;
}
static void counting_free(void *user, void *memory, size_t bytes)
{
    __atomic_sub_fetch(&((counting *)user)->live, (int64_t)bytes, __ATOMIC_SEQ_CST);
    free(memory);
}

static llmpar_status meshes(llmpar_ctx *ctx, void *user)
{
    llmpar_mesh *mesh = NULL;
    llmpar_mesh_desc desc = { .dp_shard = ctx->world / 2, .tp = 2 };
    (void)user;
    llmpar_status st = llmpar_mesh_create(ctx, &desc, &mesh);
    if (!st) st = llmpar_comm_barrier(mesh->dp, NULL, "b");
    llmpar_mesh_destroy(mesh);
    return st;
}

TEST(allocator_hooks)
{
    counting c = { 0, 0, 0 };
    llmpar_allocator allocator = { counting_alloc, counting_free, &c };
    llmpar_launch_desc desc = { .ranks = 4, .allocator = &allocator };
    llmpar_error error;
    CHECK_OK(llmpar_launch(&desc, meshes, NULL, &error));
    CHECK(c.calls > 20);
    CHECK_INT(c.live, 0);
    int64_t needed = c.calls;
    for (int64_t fail_at = 1; fail_at < needed; fail_at += 1 + fail_at / 12) {
        c.calls = 0;
        c.fail_at = fail_at;
        llmpar_status st = llmpar_launch(&desc, meshes, NULL, &error);
        CHECK_INT(st, LLMPAR_ERR_MEMORY);
        CHECK(error.text[0] != 0);
        CHECK_INT(c.live, 0);
    }
}

/* Who may have no more threads is told so, in the system's words. In a process of its own, of nobody: the limit does not hold for root. */
#if defined(__linux__) && !defined(__SANITIZE_THREAD__)
TEST(no_more_threads)
{
    int status = 0;
    fflush(NULL);
    pid_t child = fork();
    if (!child) {
        struct rlimit none = { 0, 0 };
        llmpar_error error;
        test_failures = 0;
        CHECK_INT(setrlimit(RLIMIT_NPROC, &none), 0);
        if (!geteuid()) CHECK_INT(setuid(65534), 0);
        llmpar_launch_desc desc = { .ranks = 2, .threads = 1 }, workers = { .ranks = 1, .threads = 2 };
        CHECK_STATUS(llmpar_launch(&desc, meshes, NULL, &error), LLMPAR_ERR_INTERNAL);
        CHECK_TEXT(error.text, "launch: thread 0 of 2 could not be started: Resource temporarily unavailable");
        CHECK_STATUS(llmpar_launch(&workers, meshes, NULL, &error), LLMPAR_ERR_MEMORY);
        CHECK_TEXT(error.text, "cpu: the system refused worker thread 1 of 1: Resource temporarily unavailable");
        fflush(NULL);
        _exit(test_failures != 0);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
}
#define ONE_MORE T_(no_more_threads),
#else
#define ONE_MORE
#endif

#if defined(__x86_64__)
static llmpar_status denormals(llmpar_ctx *ctx, void *user)
{
    volatile float tiny = 1e-39f, half = 0.5f;
    (void)user;
    CHECK(tiny * half > 0);
    CHECK_INT(__builtin_ia32_stmxcsr() & 0xffc0u, 0x1f80u);
    float x = 1e-39f, y = 0;
    llmpar_collective call = { .send = &x, .recv = &y, .count = 1, .dtype = LLMPAR_F32, .tag = "tiny" };
    CHECK_OK(llmpar_all_reduce(ctx->comm, NULL, &call));
    CHECK(y > 0);
    return LLMPAR_OK;
}
TEST(float_state)
{
    unsigned before = __builtin_ia32_stmxcsr(), odd = (before | 0x8040u | 0x4000u) & ~0x0680u; /* flush to zero, denormals are zero, round up, invalid, zero divide and overflow trap */
    for (int ranks = 1; ranks <= 2; ranks++) {
        llmpar_launch_desc desc = { .ranks = ranks };
        __builtin_ia32_ldmxcsr(odd);
        CHECK_OK(llmpar_launch(&desc, denormals, NULL, NULL));
        CHECK_INT(__builtin_ia32_stmxcsr() & 0xffc0u, odd & 0xffc0u);
        __builtin_ia32_ldmxcsr(before);
    }
}
#else
TEST(float_state) { TEST_SKIP("x86-64 only"); }
#endif

static void keep_line(void *user, int rank, llmpar_log_level level, const char *line)
{
    snprintf((char *)user, 256, "%d %d %s", rank, (int)level, line);
}
static llmpar_status logs(llmpar_ctx *ctx, void *user)
{
    (void)user;
    llmpar_log(ctx, LLMPAR_LOG_WARNING, "x = %d", 5);
    return LLMPAR_OK;
}
TEST(log_sink)
{
    char line[256] = "";
    llmpar_launch_desc desc = { .log = keep_line, .log_user = line };
    CHECK_OK(llmpar_launch(&desc, logs, NULL, NULL));
    CHECK(!strcmp(line, "0 2 x = 5"));
}

/* A rank starts ranks of its own. */
static llmpar_status nested(llmpar_ctx *ctx, void *user)
{
    llmpar_launch_desc desc = { .ranks = 2 };
    llmpar_error error;
    CHECK_OK(llmpar_launch(&desc, nothing, NULL, &error));
    (void)user;
    return llmpar_comm_barrier(ctx->comm, NULL, "after");
}
TEST(nested_launch)
{
    llmpar_launch_desc desc = { .ranks = 2 };
    CHECK_OK(llmpar_launch(&desc, nested, NULL, NULL));
}

/* Who makes something without a desc is told so, and gets nothing. */
#define REFUSED(call, object, says) do { llmpar_error_clear(&ctx->error); CHECK_STATUS(call, LLMPAR_ERR_ARGUMENT); CHECK_TEXT(ctx->error.text, says); CHECK(!(object)); } while (0)
static llmpar_status without_descs(llmpar_ctx *ctx, void *user)
{
    llmpar_mesh_desc mesh_desc = { .tp = 1 };
    llmpar_llama_desc model_desc = { .preset = "tiny" };
    llmpar_trainer_desc trainer_desc = { .seq_len = 8 };
    llmpar_mesh *mesh = NULL, *no_mesh = (llmpar_mesh *)ctx;
    llmpar_llama *model = NULL, *no_model = (llmpar_llama *)ctx;
    llmpar_trainer *trainer = NULL, *no_trainer = (llmpar_trainer *)ctx;
    llmpar_fsdp *fsdp, *no_fsdp = (llmpar_fsdp *)ctx;
    llmpar_optim *no_optim = (llmpar_optim *)ctx;
    llmpar_checkpoint *no_checkpoint = (llmpar_checkpoint *)ctx;
    llmpar_schedule *no_schedule = (llmpar_schedule *)ctx;
    llmpar_threads_world *no_world = (llmpar_threads_world *)ctx;
    llmpar_memory memory;
    llmpar_data data;
    llmpar_llama_config config;
    int32_t units, ids[4], count = 1;
    (void)user;
    CHECK_OK(llmpar_mesh_create(ctx, &mesh_desc, &mesh));
    CHECK_OK(llmpar_llama_create(ctx, &model_desc, &model));
    CHECK_OK(llmpar_parallelize(mesh, model, &trainer_desc, &trainer));
    if (!trainer) return ctx->error.status;
    fsdp = llmpar_trainer_fsdp(trainer);
    const llmpar_unit *unit = llmpar_llama_units(model, &units);
    REFUSED(llmpar_mesh_create(ctx, NULL, &no_mesh), no_mesh, "mesh: no desc");
    REFUSED(llmpar_llama_create(ctx, NULL, &no_model), no_model, "llama: expected exactly one of preset and config");
    REFUSED(llmpar_llama_apply(model, ctx->comm, NULL), 0, "llama: no desc");
    REFUSED(llmpar_parallelize(mesh, model, NULL, &no_trainer), no_trainer, "trainer: no desc");
    REFUSED(llmpar_plan_memory(mesh, model, NULL, &memory, NULL), memory.step.peak_total, "plan: no desc");
    REFUSED(llmpar_fsdp_create(mesh, unit, units, NULL, &no_fsdp), no_fsdp, "fsdp: no desc");
    REFUSED(llmpar_optim_create(fsdp, NULL, &no_optim), no_optim, "optim: no desc");
    REFUSED(llmpar_checkpoint_create(fsdp, NULL, NULL, &no_checkpoint), no_checkpoint, "checkpoint: no desc");
    REFUSED(llmpar_llama_generate(model, fsdp, NULL, ids, &count), count, "generation: no desc");
    REFUSED(llmpar_schedule_create(&ctx->heap, unit, units, NULL, &no_schedule, &ctx->error), no_schedule, "schedule: no policy");
    REFUSED(llmpar_threads_world_create(&ctx->heap, NULL, &no_world, &ctx->error), no_world, "threads: no desc");
    REFUSED(llmpar_load_hf(trainer, NULL), 0, "load: no directory");
    REFUSED(llmpar_save_hf(trainer, NULL), 0, "save: no path");
    REFUSED(llmpar_hf_config(ctx, NULL, &config), 0, "config.json: no directory");
    REFUSED(llmpar_trainer_save_gradients(trainer, NULL), 0, "trainer: no path for gradients");
    REFUSED(llmpar_data_init(NULL, &data, &ctx->error), data.windows, "data: no desc");
    llmpar_error_clear(&ctx->error);
    llmpar_trainer_destroy(trainer);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    return LLMPAR_OK;
}
TEST(no_descs)
{
    llmpar_launch_desc desc = { .check = test_no_leak };
    CHECK_OK(llmpar_launch(&desc, without_descs, NULL, NULL));
}

/* Who goes on with what could not be made hears of the first error, whatever is called then. */
static llmpar_status unchecked(llmpar_ctx *ctx, void *user)
{
    llmpar_mesh_desc mesh_desc = { .tp = 3 };
    llmpar_llama_desc model_desc = { .preset = "tiny" };
    llmpar_trainer_desc trainer_desc = { .seq_len = 8 };
    llmpar_mesh *mesh = NULL;
    llmpar_llama *model = NULL;
    llmpar_trainer *trainer = (llmpar_trainer *)ctx;
    (void)user;
    CHECK_STATUS(llmpar_mesh_create(ctx, &mesh_desc, &mesh), LLMPAR_ERR_MESH);
    CHECK_OK(llmpar_llama_create(ctx, &model_desc, &model));
    CHECK_STATUS(llmpar_parallelize(mesh, model, &trainer_desc, &trainer), LLMPAR_ERR_ARGUMENT);
    CHECK(!trainer);
    CHECK_STATUS(llmpar_load_hf(trainer, "nowhere"), LLMPAR_ERR_ARGUMENT);
    CHECK_STATUS(llmpar_save_hf(trainer, "nowhere"), LLMPAR_ERR_ARGUMENT);
    CHECK_STATUS(llmpar_trainer_checkpoint(trainer), LLMPAR_ERR_ARGUMENT);
    CHECK_STATUS(llmpar_trainer_finish(trainer), LLMPAR_ERR_ARGUMENT);
    CHECK_STATUS(llmpar_trainer_save_trace(trainer), LLMPAR_ERR_ARGUMENT);
    CHECK_STATUS(llmpar_trainer_save_gradients(trainer, "nowhere"), LLMPAR_ERR_ARGUMENT);
    double loss;
    llmpar_memory memory;
    int32_t id = 1, count;
    float logit;
    llmpar_generate_desc generate = { .prompt = &id, .prompt_count = 1, .tokens = 1 };
    CHECK_STATUS(llmpar_trainer_eval(trainer, 0, &loss), LLMPAR_ERR_ARGUMENT);
    CHECK_STATUS(llmpar_plan_memory(mesh, model, &trainer_desc, &memory, NULL), LLMPAR_ERR_ARGUMENT);
    CHECK_STATUS(llmpar_llama_generate(model, llmpar_trainer_fsdp(trainer), &generate, &id, &count), LLMPAR_ERR_ARGUMENT);
    CHECK_STATUS(llmpar_llama_logits(model, llmpar_trainer_fsdp(trainer), &id, 1, &logit), LLMPAR_ERR_ARGUMENT);
    CHECK_INT(llmpar_trainer_steps(trainer), 0);
    llmpar_status status = llmpar_trainer_step(trainer, NULL);
    llmpar_trainer_destroy(trainer);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    return status;
}
TEST(unchecked_failures)
{
    llmpar_launch_desc desc = { .ranks = 2, .check = test_no_leak };
    llmpar_error error;
    CHECK(llmpar_launch(&desc, unchecked, NULL, &error) != LLMPAR_OK);
    CHECK_TEXT(error.text, "tp 3 = 3 ranks, but the world has 2");
}

/* threads_and_places first: what it calls the processors of this thread no launch has touched. */
TEST_LIST(T_(threads_and_places), T_(no_descs), T_(unchecked_failures), T_(ranks_and_names), T_(root_error), T_(bad_descs), T_(allocator_hooks), ONE_MORE T_(float_state), T_(log_sink), T_(nested_launch))
