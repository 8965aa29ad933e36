/* Saves that die at every call of the file table, lose power, fail once, or are killed at a random moment: the newest complete checkpoint is always whole, and the next save succeeds. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#include "test.h"

#include <signal.h>
#include <sys/wait.h>
#include <time.h>

#include "checkpoints.h"
#include "fake_io.h"

/* ---- a state that a seed describes ---- */

static llmpar_unit crash_units[2];
static llmpar_param crash_params[3];

static void crash_model(int64_t rows)
{
    memset(crash_units, 0, sizeof crash_units);
    memset(crash_params, 0, sizeof crash_params);
    static const char *const names[] = {"a.weight", "a.norm", "b.weight"};
    for (int i = 0; i < 3; i++) {
        crash_params[i].name = names[i];
        crash_params[i].dims = i == 1 ? 1 : 2;
        crash_params[i].shape[0] = i == 1 ? 7 : i ? 33 : rows;
        crash_params[i].shape[1] = i ? 9 : 12;
        crash_params[i].tp.kind = i == 1 ? LLMPAR_REPLICATE : LLMPAR_SHARD;
        crash_params[i].tp.axis = LLMPAR_AXIS_TP;
        crash_params[i].tp.dim = i ? 0 : 1;
        crash_params[i].init_value = 1;
    }
    crash_params[1].shape[1] = 0;
    crash_units[0].name = "a";
    crash_units[0].params = crash_params;
    crash_units[0].param_count = 2;
    crash_units[1].name = "b";
    crash_units[1].params = crash_params + 2;
    crash_units[1].param_count = 1;
}

static float crash_value(int64_t seed, int kind, int param, int64_t index)
{
    uint64_t r = (uint64_t)seed * 1000003u + (uint64_t)(kind * 31 + param) * 7919u;
    fake_random(&r);
    r += (uint64_t)index;
    return (float)(fake_random(&r) >> 40);
}

/* check 0: sets everything; 1: returns how many numbers are others. */
static int64_t crash_state(llmpar_ctx *ctx, llmpar_fsdp *fsdp, int64_t seed, int check)
{
    int64_t wrong = 0;
    for (int32_t u = 0; u < 2; u++) {
        const llmpar_segment *segments;
        int32_t count;
        float *base[3];
        base[0] = (float *)llmpar_fsdp_shard(fsdp, u, NULL, &segments, &count);
        for (int s = 0; s < 2; s++) base[1 + s] = (float *)llmpar_fsdp_optimizer_state(fsdp, u, s);
        for (int32_t s = 0; s < count; s++) {
            llmpar_local local;
            const llmpar_param *param = &llmpar_fsdp_unit(fsdp, u)->params[segments[s].param];
            llmpar_fsdp_part(fsdp, ctx->rank, u, segments[s].param, &local);
            for (int64_t i = 0; i < local.flat_count; i++)
                for (int kind = 0; kind < 3; kind++) {
                    float *at = base[kind] + segments[s].begin + i, want = crash_value(seed, kind, u * 2 + segments[s].param, cp_global(&local, param, i));
                    if (check) wrong += memcmp(at, &want, sizeof want) != 0;
                    else *at = want;
                }
        }
        if (llmpar_fsdp_shard_done(fsdp, u, !check) || llmpar_fsdp_optimizer_done(fsdp, u, !check)) wrong++;
    }
    return wrong;
}

/* ---- saves with something going wrong ---- */

enum { CRASH_RANKS = 4 };
typedef enum crash_mode { CRASH_KILL, CRASH_POWER, CRASH_ONCE, CRASH_LOAD } crash_mode;
typedef struct crash_job {
    int32_t shard, tp, background, keep;
    int errors[4], error_count;       /* ONCE */
    int seeds, stride;                /* POWER: how often each death; every stride-th call */
    crash_mode mode;
    fake_fs *fs, *base;
    pthread_mutex_t lock;
    /* of the iteration, by rank 0 */
    int64_t safe;                     /* the step that was reported as saved */
    llmpar_status status[CRASH_RANKS];
    char text[CRASH_RANKS][1700];
    long calls, iterations, complete, failed, torn;
} crash_job;

static void crash_meet(llmpar_ctx *ctx)
{
    llmpar_stream *stream = NULL;
    if (ctx->device->stream_create(ctx->device, "meet", &stream) || llmpar_comm_barrier(ctx->comm, stream, "meet") || ctx->device->synchronize(ctx->device, stream)) TEST_FAIL("a barrier failed");
    if (stream) ctx->device->stream_destroy(ctx->device, stream);
}

static void crash_forget(llmpar_ctx *ctx)
{
    ctx->error.status = LLMPAR_OK;
    ctx->error.text[0] = 0;
}

static llmpar_status crash_save(llmpar_ctx *ctx, const crash_job *job, llmpar_fsdp *fsdp, int64_t step)
{
    llmpar_checkpoint_desc desc = {"ck", "{\"a\": 1}\n", job->keep, job->background};
    llmpar_checkpoint_info info;
    llmpar_checkpoint *cp = NULL;
    memset(&info, 0, sizeof info);
    info.step = step;
    info.batch = info.seq_len = 1;
    crash_forget(ctx);
    llmpar_status status = llmpar_checkpoint_create(fsdp, NULL, &desc, &cp);
    if (!status) status = llmpar_checkpoint_save(cp, &info);
    if (!status) status = llmpar_checkpoint_poll(cp, 1);
    llmpar_checkpoint_destroy(cp);
    return status;
}

static llmpar_status crash_load(llmpar_ctx *ctx, llmpar_fsdp *fsdp, const char *directory, int64_t step)
{
    char path[600];
    llmpar_checkpoint_info info;
    snprintf(path, sizeof path, "%s/step-%lld", directory, (long long)step);
    crash_forget(ctx);
    crash_state(ctx, fsdp, -1, 0);
    llmpar_status status = llmpar_checkpoint_load(fsdp, NULL, path, NULL, NULL, &info);
    if (!status && info.step != step) TEST_FAIL("%s is of step %lld", path, (long long)info.step);
    return status;
}

/* Every step that is there must be whole; what was reported as saved must be there, and `latest` name what is. */
static void crash_look(llmpar_ctx *ctx, crash_job *job, llmpar_fsdp *fsdp, const char *what)
{
    int64_t step = INT64_MAX, newest = -1;
    for (;;) {
        if (llmpar_checkpoint_newest(ctx, "ck", step, &step)) { TEST_FAIL("%s: %s", what, ctx->error.text); return; }
        if (step < 0) break;
        if (newest < 0) newest = step;
        llmpar_status status = crash_load(ctx, fsdp, "ck", step);
        if (status) TEST_FAIL("%s: rank %d: step-%lld: %s", what, (int)ctx->rank, (long long)step, ctx->error.text);
        else if (crash_state(ctx, fsdp, step, 1)) TEST_FAIL("%s: rank %d: step-%lld has other numbers", what, (int)ctx->rank, (long long)step);
    }
    if (newest < job->safe) TEST_FAIL("%s: step-%lld was saved, the newest is %lld", what, (long long)job->safe, (long long)newest);
    if (ctx->rank) return;
    llmpar_heap heap;
    llmpar_error error;
    char *text;
    size_t bytes;
    llmpar_heap_init(&heap, NULL);
    llmpar_error_clear(&error);
    if (llmpar_file_kind(ctx->io, "ck/latest") != LLMPAR_IO_FILE) { if (job->safe > 0) TEST_FAIL("%s: no latest", what); return; }
    if (llmpar_file_load(&heap, ctx->io, "ck/latest", 100, &text, &bytes, &error)) { TEST_FAIL("%s: %s", what, error.text); return; }
    char path[200];
    snprintf(path, sizeof path, "ck/%.*s", (int)bytes - 1, text);
    if (bytes < 7 || text[bytes - 1] != '\n' || llmpar_file_kind(ctx->io, path) != LLMPAR_IO_FOLDER) TEST_FAIL("%s: latest says \"%s\", which is not there", what, text);
    if (bytes > 6 && job->safe > 0 && atol(text + 5) < job->safe) TEST_FAIL("%s: latest says \"%s\", step-%lld was saved", what, text, (long long)job->safe);
    llmpar_heap_free(&heap, text);
}

/* One save of step 2 over a committed step 1 with call `k` going wrong, and what comes after. */
static void crash_once(llmpar_ctx *ctx, crash_job *job, llmpar_fsdp *fsdp, long k, int error, uint64_t seed)
{
    char what[300];
    crash_meet(ctx);
    if (!ctx->rank) {
        fake_copy(job->fs, job->base);
        job->fs->at = k;
        job->fs->error = error;
        job->safe = 1;
        job->iterations++;
    }
    crash_meet(ctx);
    crash_state(ctx, fsdp, 2, 0);
    llmpar_status status = crash_save(ctx, job, fsdp, 2);
    job->status[ctx->rank] = status;
    snprintf(job->text[ctx->rank], sizeof job->text[0], "%s", ctx->error.text);
    if (crash_state(ctx, fsdp, 2, 1)) TEST_FAIL("a save has changed the state");
    crash_meet(ctx);
    snprintf(what, sizeof what, "%d x %d ranks, %s, keep %d, call %ld (%s %s), error %d, seed %llu", (int)job->shard, (int)job->tp, job->background ? "background" : "foreground", (int)job->keep, k, fake_op_name[job->fs->failed], job->fs->failed_path, error, (unsigned long long)seed);
    if (!ctx->rank) {
        int dead = job->fs->dead;
        if (!status) job->safe = 2;
        for (int r = 1; r < ctx->world; r++)
            if (job->status[r] != status && !dead) TEST_FAIL("%s: rank %d: %s, rank 0: %s", what, r, llmpar_status_string(job->status[r]), llmpar_status_string(status));
        if (status) job->failed++;
        if (job->mode == CRASH_ONCE && (error == EINTR || error == -1) && status) TEST_FAIL("%s: %s", what, job->text[0]);
        if (job->mode == CRASH_ONCE && status) {
            int complete = strstr(job->text[0], "step-2 is complete, but") != NULL, there = llmpar_file_kind(&job->fs->io, "ck/step-2") == LLMPAR_IO_FOLDER;
            if (complete != there) TEST_FAIL("%s: step-2 is %sthere: %s", what, there ? "" : "not ", job->text[0]);
            if (llmpar_file_kind(&job->fs->io, "ck/step-2.tmp") != LLMPAR_IO_NONE) TEST_FAIL("%s: step-2.tmp was left", what);
            if (!strstr(job->text[0], "ck") || (ctx->world > 1 && strncmp(job->text[0], "rank ", 5))) TEST_FAIL("%s: the error names no rank or file: %s", what, job->text[0]);
        }
        if (job->mode == CRASH_POWER) fake_power_loss(job->fs, seed);
        else fake_revive(job->fs);
        job->complete += llmpar_file_kind(&job->fs->io, "ck/step-2") == LLMPAR_IO_FOLDER;
        job->torn += llmpar_file_kind(&job->fs->io, "ck/step-2.tmp") != LLMPAR_IO_NONE;
    }
    crash_meet(ctx);
    crash_look(ctx, job, fsdp, what);
    /* The run goes on: the next save succeeds, and lasts. */
    crash_meet(ctx);
    crash_state(ctx, fsdp, 3, 0);
    status = crash_save(ctx, job, fsdp, 3);
    if (status) TEST_FAIL("%s: the next save: %s", what, ctx->error.text);
    crash_meet(ctx);
    if (!ctx->rank) {
        job->safe = 3;
        if (job->mode == CRASH_POWER) fake_power_loss(job->fs, seed ? seed * 31 : 0);
    }
    crash_meet(ctx);
    crash_look(ctx, job, fsdp, what);
}

/* Loading with call `k` failing: an error on all ranks that names a file, or the numbers; and again, with nothing failing, the numbers. k 0: counts the calls. */
static void crash_load_once(llmpar_ctx *ctx, crash_job *job, llmpar_fsdp *fsdp, long k, int error)
{
    crash_meet(ctx);
    if (!ctx->rank) {
        fake_copy(job->fs, job->base);
        job->fs->at = k;
        job->fs->error = error;
        job->iterations++;
    }
    crash_meet(ctx);
    llmpar_status status = crash_load(ctx, fsdp, "ck", 1);
    job->status[ctx->rank] = status;
    crash_meet(ctx);
    if (job->status[0] != status) TEST_FAIL("load, call %ld, error %d: rank %d: %s, rank 0: %s", k, error, (int)ctx->rank, llmpar_status_string(status), llmpar_status_string(job->status[0]));
    if (status && (k == 0 || error == EINTR || error == -1)) TEST_FAIL("load, call %ld (%s %s), error %d: %s", k, fake_op_name[job->fs->failed], job->fs->failed_path, error, ctx->error.text);
    if (status && !strstr(ctx->error.text, "ck/step-1")) TEST_FAIL("load, call %ld: %s", k, ctx->error.text);
    if (!status && crash_state(ctx, fsdp, 1, 1)) TEST_FAIL("load, call %ld (%s): other numbers, and no word about it", k, fake_op_name[job->fs->failed]);
    crash_meet(ctx);
    if (!ctx->rank) {
        if (!k) job->calls = job->fs->calls;
        job->failed += status != LLMPAR_OK;
        fake_revive(job->fs);
    }
    crash_meet(ctx);
    if (crash_load(ctx, fsdp, "ck", 1) || crash_state(ctx, fsdp, 1, 1)) TEST_FAIL("after call %ld failed: %s", k, ctx->error.text);
}

static llmpar_status crash_rank(llmpar_ctx *ctx, void *user)
{
    crash_job *job = (crash_job *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_fsdp *fsdp = NULL;
    llmpar_mesh_desc mesh_desc = {0, job->shard, 0, 0, job->tp};
    llmpar_fsdp_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.optimizer_states = 2;
    llmpar_status status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_fsdp_create(mesh, crash_units, 2, &desc, &fsdp);
    if (!status) {
        crash_state(ctx, fsdp, 1, 0);
        status = crash_save(ctx, job, fsdp, 1);
    }
    crash_meet(ctx);
    if (!status && !ctx->rank) {
        fake_copy(job->base, job->fs);
        fake_copy(job->fs, job->base);
    }
    crash_meet(ctx);
    if (!status) { /* how many calls is a save? */
        crash_state(ctx, fsdp, 2, 0);
        status = crash_save(ctx, job, fsdp, 2);
        crash_meet(ctx);
        if (!ctx->rank) job->calls = job->fs->calls;
        crash_meet(ctx);
    }
    if (!status && job->mode == CRASH_LOAD) crash_load_once(ctx, job, fsdp, 0, EIO);
    int before = test_failures;
    for (long k = 1; k <= job->calls && !status && test_failures - before < 6; k += job->stride) {
        if (job->mode == CRASH_ONCE)
            for (int e = 0; e < job->error_count; e++) crash_once(ctx, job, fsdp, k, job->errors[e], 0);
        else if (job->mode == CRASH_LOAD)
            for (int e = 0; e < 3; e++) crash_load_once(ctx, job, fsdp, k, job->errors[e]);
        else if (job->mode == CRASH_KILL) crash_once(ctx, job, fsdp, k, 0, 0);
        else
            for (int s = 0; s < job->seeds; s++) crash_once(ctx, job, fsdp, k, 0, s ? (uint64_t)(k * 100 + s) : 0);
        crash_meet(ctx); /* all have seen the same count of failures */
    }
    llmpar_fsdp_destroy(fsdp);
    llmpar_mesh_destroy(mesh);
    return status;
}

static int crash_rows = 10; /* of the first parameter */

static void crash_run(crash_mode mode, int shard, int tp, int background, int keep, int seeds, int stride)
{
    crash_job *job = (crash_job *)calloc(1, sizeof *job);
    llmpar_launch_desc launch;
    llmpar_error error;
    memset(&launch, 0, sizeof launch);
    crash_model(crash_rows);
    job->mode = mode;
    job->shard = shard;
    job->tp = tp;
    job->background = background;
    job->keep = keep;
    job->seeds = seeds;
    job->stride = stride;
    job->errors[0] = EIO;
    job->errors[1] = EINTR;
    job->errors[2] = -1;
    job->errors[3] = ENOSPC;
    job->error_count = crash_rows > 10 ? 1 : 4;
    job->fs = fake_make();
    job->base = fake_make();
    launch.ranks = shard * tp;
    launch.transport = LLMPAR_TRANSPORT_THREADS;
    launch.io = &job->fs->io;
    launch.log = NULL;
    launch.deadline = 300;
    launch.check = cp_check;
    if (llmpar_launch(&launch, crash_rank, job, &error)) TEST_FAIL("%s", error.text);
    if (getenv("LLMPAR_TEST_FULL")) printf("  %d x %d ranks, %s, keep %d: it is %ld calls; %ld crashes or errors, %ld saves failed, %ld left step-2, %ld a step-2.tmp\n", shard, tp, background ? "background" : "foreground", keep, job->calls, job->iterations, job->failed, job->complete, job->torn);
    CHECK(job->calls > 20 && job->iterations > 0);
    fake_free(job->fs);
    fake_free(job->base);
    free(job);
}

static int crash_full(void) { const char *full = getenv("LLMPAR_TEST_FULL"); return full && full[0]; }

static void crash_all(crash_mode mode, int seeds)
{
    int quick = !crash_full() && test_rounds(8) < 8, stride = quick ? 9 : 1;
    if (!crash_full() && mode != CRASH_KILL && stride == 1) stride = 2;
    for (int background = 0; background < 2; background++) {
        crash_run(mode, 1, 1, background, 1, background || quick || seeds < 2 ? seeds : 3 * seeds, crash_full() ? 1 : quick ? 4 : background ? 3 : 1);
        crash_run(mode, 2, 1, background, 0, seeds, stride + 2 * background);
        crash_run(mode, 2, 2, background, 1, seeds, stride + 2 * background);
    }
}

/* ---- SIGKILL at a random moment ---- */

typedef struct kill_job { int32_t shard, tp, background; int out; int64_t safe; const char *directory; } kill_job;

/* The newest one must be whole and not older than what was reported; then one save after the other until the end comes. */
static llmpar_status kill_rank(llmpar_ctx *ctx, void *user)
{
    const kill_job *job = (const kill_job *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_fsdp *fsdp = NULL;
    llmpar_checkpoint *cp = NULL;
    llmpar_mesh_desc mesh_desc = {0, job->shard, 0, 0, job->tp};
    llmpar_fsdp_desc desc;
    llmpar_checkpoint_desc cp_desc = {job->directory, NULL, 2, job->background};
    llmpar_checkpoint_info info;
    int64_t newest = -1;
    memset(&desc, 0, sizeof desc);
    memset(&info, 0, sizeof info);
    desc.optimizer_states = 2;
    llmpar_status status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_fsdp_create(mesh, crash_units, 2, &desc, &fsdp);
    if (!status) status = llmpar_checkpoint_newest(ctx, job->directory, INT64_MAX, &newest);
    if (!status && newest < job->safe) status = llmpar_fail(ctx, LLMPAR_ERR_INTERNAL, "step-%lld was saved, the newest is %lld", (long long)job->safe, (long long)newest);
    if (!status && newest >= 0) status = crash_load(ctx, fsdp, job->directory, newest);
    if (!status && newest >= 0 && crash_state(ctx, fsdp, newest, 1)) status = llmpar_fail(ctx, LLMPAR_ERR_INTERNAL, "step-%lld has other numbers", (long long)newest);
    if (!status) status = llmpar_checkpoint_create(fsdp, NULL, &cp_desc, &cp);
    if (!status && !ctx->rank && write(job->out, &newest, sizeof newest) != sizeof newest) status = LLMPAR_ERR_IO; /* verified */
    for (info.step = newest < 0 ? 0 : newest + 1; !status && job->out >= 0; info.step++) {
        crash_state(ctx, fsdp, info.step, 0);
        status = llmpar_checkpoint_save(cp, &info);
        if (job->background) crash_state(ctx, fsdp, -2, 0); /* the copy is what is written */
        if (!status) status = llmpar_checkpoint_poll(cp, 1);
        if (!status && !ctx->rank && write(job->out, &info.step, sizeof info.step) != sizeof info.step) status = LLMPAR_ERR_IO;
    }
    llmpar_checkpoint_destroy(cp);
    llmpar_fsdp_destroy(fsdp);
    llmpar_mesh_destroy(mesh);
    return status;
}

static void kill_many(int32_t shard, int32_t tp, int kills)
{
    char directory[600];
    uint64_t r = (uint64_t)(shard * 10 + tp);
    int64_t saved = 0, safe = -1;
    int verified = 0;
    snprintf(directory, sizeof directory, "%s", cp_path("kill-%d-%d", shard, tp));
    crash_model(8000);
    for (int i = 0; i <= kills; i++) {
        int pipes[2];
        fflush(NULL);
        if (pipe(pipes)) { TEST_FAIL("no pipe"); return; }
        pid_t child = fork();
        if (child < 0) { TEST_FAIL("no process"); return; }
        if (child == 0) {
            kill_job job = {shard, tp, i % 2, pipes[1], safe, directory};
            llmpar_launch_desc launch;
            llmpar_error error;
            memset(&launch, 0, sizeof launch);
            launch.ranks = shard * tp;
            launch.transport = LLMPAR_TRANSPORT_THREADS;
            close(pipes[0]);
            if (llmpar_launch(&launch, kill_rank, &job, &error)) fprintf(stderr, "kill %d: %s\n", i, error.text);
            _exit(3);
        }
        close(pipes[1]);
        int64_t step;
        /* The first number says that what was there is whole. */
        if (read(pipes[0], &step, sizeof step) == sizeof step) {
            verified++;
            struct timespec nap = {0, (long)(fake_random(&r) % (crash_full() ? 250000000 : 120000000))};
            nanosleep(&nap, NULL);
        } else TEST_FAIL("after %d kills on %d x %d ranks the newest checkpoint was not whole", i, shard, tp);
        kill(child, SIGKILL);
        while (read(pipes[0], &step, sizeof step) == sizeof step) {
            safe = step;
            saved++;
        }
        close(pipes[0]);
        int how;
        waitpid(child, &how, 0);
    }
    if (getenv("LLMPAR_TEST_FULL")) printf("  %d x %d ranks: %d kills, %lld saves, each time the newest was whole (%d)\n", shard, tp, kills, (long long)saved, verified);
    cp_clear(directory);
}

TEST(killed_at_any_moment)
{
    int kills = crash_full() ? 40 : test_rounds(4);
    kill_many(1, 1, kills);
    kill_many(2, 1, kills);
    kill_many(2, 2, kills);
}

TEST(killed_at_every_call) { crash_all(CRASH_KILL, 1); }
TEST(power_lost_at_every_call) { crash_all(CRASH_POWER, crash_full() ? 16 : 3); }
TEST(one_call_fails) { crash_all(CRASH_ONCE, 1); }

/* Arrays that are larger than what a writer waits for: they are written, and fail to be, while they are taken; and are read in one run. */
TEST(one_call_fails_with_large_arrays)
{
    crash_rows = 2400;
    for (int background = 0; background < 2; background++) crash_run(CRASH_ONCE, 1, 1, background, 1, 1, background && !crash_full() ? 2 : 1);
    crash_run(CRASH_LOAD, 1, 1, 0, 0, 1, crash_full() ? 1 : 5);
    crash_rows = 10;
}

/* In the system's files: a name that has no place in a file's header ends the save, and nothing is left. */
static llmpar_status name_rank(llmpar_ctx *ctx, void *user)
{
    const char *directory = (const char *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_fsdp *fsdp = NULL;
    llmpar_mesh_desc mesh_desc = {0, 1, 0, 0, 1};
    llmpar_fsdp_desc desc;
    llmpar_checkpoint_desc cp_desc = {directory, NULL, 0, 0};
    llmpar_checkpoint_info info;
    llmpar_checkpoint *cp = NULL;
    memset(&desc, 0, sizeof desc);
    memset(&info, 0, sizeof info);
    llmpar_status status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_fsdp_create(mesh, crash_units, 2, &desc, &fsdp);
    if (!status) status = llmpar_checkpoint_create(fsdp, NULL, &cp_desc, &cp);
    info.step = (int64_t)strlen(crash_params[2].name);
    info.batch = info.seq_len = 1;
    if (!status) status = llmpar_checkpoint_save(cp, &info);
    if (!status) {
        char path[900];
        snprintf(path, sizeof path, "%s/step-%d", directory, (int)info.step);
        status = llmpar_checkpoint_load(fsdp, NULL, path, NULL, NULL, &info);
    }
    llmpar_checkpoint_destroy(cp);
    llmpar_fsdp_destroy(fsdp);
    llmpar_mesh_destroy(mesh);
    return status;
}

TEST(a_name_too_long)
{
    char name[1100];
    const char *directory = cp_path("name");
    for (int length = 1015; length <= 1016; length++) {
        llmpar_launch_desc launch;
        llmpar_error error;
        memset(&launch, 0, sizeof launch);
        launch.ranks = 1;
        launch.check = cp_check;
        crash_model(10);
        memset(name, 'n', (size_t)length);
        name[length] = 0;
        crash_params[2].name = name;
        llmpar_status status = llmpar_launch(&launch, name_rank, (void *)directory, &error);
        if (length < 1016 && status) TEST_FAIL("%s", error.text);
        if (length == 1016 && (status != LLMPAR_ERR_ARGUMENT || !strstr(error.text, "expected less than 1016 bytes"))) TEST_FAIL("%s: %s", llmpar_status_string(status), error.text);
    }
    CHECK(llmpar_file_kind(NULL, directory) == LLMPAR_IO_FOLDER);
    char path[900];
    snprintf(path, sizeof path, "%s/step-1016.tmp", directory);
    CHECK(!cp_exists(path));
}

TEST(one_call_of_a_load_fails)
{
    crash_run(CRASH_LOAD, 1, 1, 0, 0, 1, 1);
    crash_run(CRASH_LOAD, 2, 2, 0, 0, 1, test_rounds(4) < 4 ? 3 : 1);
}

TEST_LIST(T_(killed_at_every_call), T_(power_lost_at_every_call), T_(one_call_fails), T_(one_call_fails_with_large_arrays), T_(a_name_too_long), T_(one_call_of_a_load_fails), T_(killed_at_any_moment))
