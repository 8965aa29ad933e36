/* Saving and loading a checkpoint where one call goes wrong: every allocation, every call to the files, every call to the device, one after the other, on one rank or on one of two. An error each time and nothing left; then
   the same object saves, and the same state loads. */
#include "own_net.h"
#include "fake_io.h"

typedef enum what_fails { FAILS_ALLOCATION, FAILS_FILE, FAILS_DEVICE, FAILS } what_fails;
static const char *const what_name[FAILS] = { "allocation", "call to the files", "call to the device" };

static struct sweep {
    what_fails what;
    int n, load, background, ranks, victim; /* the nth call from now on, of the victim's */
    int offload;                            /* parameters (the f32 ones of a model in bf16) and the optimizer's states wait in host memory */
    int over;                               /* out: fewer calls than n were made */
    fake_fs *fs;
    int calls;                              /* of the device */
    llmpar_device own;                      /* as it was */
} sweep;

static int device_fails(void) { return ++sweep.calls == sweep.n; }
#define FAILS_NOW(device) if (device_fails()) return llmpar_error_set((device)->error, LLMPAR_ERR_INTERNAL, "the device has failed")
static llmpar_status bad_alloc(llmpar_device *d, size_t bytes, void **out) { FAILS_NOW(d); return sweep.own.alloc(d, bytes, out); }
static llmpar_status bad_stream(llmpar_device *d, const char *name, llmpar_stream **out) { FAILS_NOW(d); return sweep.own.stream_create(d, name, out); }
static llmpar_status bad_copy(llmpar_device *d, llmpar_stream *s, void *to, const void *from, size_t bytes) { FAILS_NOW(d); return sweep.own.copy(d, s, to, from, bytes); }
static llmpar_status bad_synchronize(llmpar_device *d, llmpar_stream *s) { llmpar_status st = sweep.own.synchronize(d, s); FAILS_NOW(d); return st; }

static void arm(llmpar_ctx *ctx)
{
    if (ctx->rank != sweep.victim) return;
    pthread_mutex_lock(&sweep.fs->lock);
    if (sweep.what == FAILS_FILE) sweep.fs->at = sweep.fs->calls + sweep.n, sweep.fs->error = EIO;
    pthread_mutex_unlock(&sweep.fs->lock);
    if (sweep.what == FAILS_ALLOCATION) ctx->heap.fail_at = ctx->heap.calls + (uint64_t)sweep.n;
    if (sweep.what != FAILS_DEVICE) return;
    sweep.calls = 0;
    sweep.own = *ctx->device;
    ctx->device->alloc = bad_alloc;
    ctx->device->stream_create = bad_stream;
    ctx->device->copy = bad_copy;
    ctx->device->synchronize = bad_synchronize;
}
static void disarm(llmpar_ctx *ctx, llmpar_status status)
{
    if (ctx->rank != sweep.victim) return;
    if (sweep.what == FAILS_ALLOCATION) sweep.over = !status, ctx->heap.fail_at = 0;
    pthread_mutex_lock(&sweep.fs->lock);
    if (sweep.what == FAILS_FILE) sweep.over = sweep.fs->calls < sweep.fs->at, sweep.fs->at = 0;
    pthread_mutex_unlock(&sweep.fs->lock);
    if (sweep.what != FAILS_DEVICE) return;
    sweep.over = sweep.calls < sweep.n;
    ctx->device->alloc = sweep.own.alloc;
    ctx->device->stream_create = sweep.own.stream_create;
    ctx->device->copy = sweep.own.copy;
    ctx->device->synchronize = sweep.own.synchronize;
}

static llmpar_status save(llmpar_checkpoint *c, int64_t step)
{
    llmpar_checkpoint_info info;
    memset(&info, 0, sizeof info);
    info.step = step;
    info.batch = 8;
    llmpar_status status = llmpar_checkpoint_save(c, &info);
    return status || !sweep.background ? status : llmpar_checkpoint_poll(c, 1);
}

static llmpar_status load(llmpar_fsdp *fsdp, llmpar_optim *adamw, const char *path, int64_t step)
{
    llmpar_checkpoint_info info;
    llmpar_status status = llmpar_checkpoint_load(fsdp, adamw, path, NULL, NULL, &info);
    if (!status) CHECK_INT(info.step, step);
    return status;
}

static llmpar_status once(const job *j, llmpar_fsdp *fsdp, llmpar_optim *adamw)
{
    llmpar_ctx *ctx = llmpar_fsdp_mesh(fsdp)->ctx;
    llmpar_checkpoint_desc desc = { .directory = "checkpoints", .config = sweep.n % 2 ? "{}" : NULL, .keep = 2, .background = sweep.background };
    llmpar_checkpoint *c = NULL;
    double before[PARAMS][MOST], after[MOST];
    (void)j;
    ctx->io = &sweep.fs->io;
    for (int k = 0; k < PARAMS && !sweep.offload; k++) whole(fsdp, k, shard_of(fsdp, all[k].unit), before[k]);
    llmpar_status status = LLMPAR_OK, wrong;
    if (sweep.load) {
        status = llmpar_checkpoint_create(fsdp, adamw, &desc, &c);
        if (!status) status = save(c, 1);
        arm(ctx);
        wrong = status ? status : load(fsdp, adamw, "checkpoints/step-1", 1);
    } else {
        arm(ctx);
        wrong = llmpar_checkpoint_create(fsdp, adamw, &desc, &c);
        if (!wrong) wrong = save(c, 1);
    }
    disarm(ctx, wrong);
    const char *said = llmpar_last_error(ctx);
    if (wrong && (!said[0] || said[strlen(said) - 1] == ' ')) TEST_FAIL("rank %d: \"%s\" does not say what was wrong", (int)ctx->rank, said); /* "rank 0: " and no more */
    /* One rank alone can go on at once; where two have to agree, and one cannot, the job ends. */
    if (!status && wrong && sweep.ranks == 1) {
        CHECK(llmpar_last_error(ctx)[0] != 0);
        if (!sweep.over) CHECK_STATUS(wrong, sweep.what == FAILS_ALLOCATION ? LLMPAR_ERR_MEMORY : sweep.what == FAILS_FILE ? LLMPAR_ERR_IO : LLMPAR_ERR_INTERNAL);
        llmpar_error_clear(&ctx->error);
        if (!c) status = llmpar_checkpoint_create(fsdp, adamw, &desc, &c);
        if (!status) status = save(c, 2);
        if (!status) status = load(fsdp, adamw, "checkpoints/step-2", 2);
        for (int k = 0; k < PARAMS && !status && !sweep.load && !sweep.offload; k++) {
            whole(fsdp, k, shard_of(fsdp, all[k].unit), after);
            CHECK_BYTES(after, before[k], (size_t)all[k].count * sizeof *after);
        }
    } else if (!status) status = wrong;
    llmpar_checkpoint_destroy(c);
    ctx->io = NULL;
    return status;
}

static int sweep_all(what_fails what, int ranks, int victim, int load, int background, int offload)
{
    int n = 1;
    for (; n < 3000; n += sweep.ranks > 1 ? 1 + n / 8 : 1) {
        llmpar_error error;
        int before = test_failures;
        job j = { .mesh = { .dp_shard = ranks }, .micro_batches = 1, .body = once };
        if (offload) j.fsdp.dtype = LLMPAR_BF16, j.fsdp.offload[LLMPAR_STATE_PARAMS] = j.fsdp.offload[LLMPAR_STATE_OPTIMIZER] = LLMPAR_TIER_HOST;
        memset(&sweep, 0, sizeof sweep);
        sweep.what = what, sweep.n = n, sweep.load = load, sweep.background = background, sweep.offload = offload, sweep.ranks = ranks, sweep.victim = victim;
        sweep.fs = fake_make();
        llmpar_status status = launch(&j, &error);
        fake_free(sweep.fs);
        if (sweep.over || ranks == 1) { if (status) TEST_FAIL("%s", error.text); }
        else if (status && error.status != LLMPAR_ERR_MEMORY && error.status != LLMPAR_ERR_IO && error.status != LLMPAR_ERR_INTERNAL) TEST_FAIL("%s: %s", llmpar_status_string(status), error.text);
        if (test_failures != before) { fprintf(stderr, "  (%s %d, %d ranks, %s%s)\n", what_name[what], n, ranks, load ? "load" : "save", background ? " in the background" : ""); break; }
        if (sweep.over) break;
    }
    return n;
}

static void all_sweeps(what_fails what, int least)
{
    for (int load = 0; load < 2; load++) {
        CHECK(sweep_all(what, 1, 0, load, 0, 0) > least);
        sweep_all(what, 1, 0, load, 0, 1);
        sweep_all(what, 2, 0, load, 0, 0);
        sweep_all(what, 2, 1, load, 0, 0);
    }
    sweep_all(what, 1, 0, 0, 1, 0);
}

/* A store with names that nobody here has given. */
static int long_names(void *user, const char *path, int (*entry)(void *entry_user, const char *name), void *entry_user)
{
    char name[1200];
    size_t length = strstr(path, ".tmp") ? 1100 : 100;
    memset(name, 'n', length);
    name[length] = 0;
    int number = entry(entry_user, name);
    return number ? number : fake_list_names(user, path, entry, entry_user);
}

static void put_file(const char *path, const void *data, size_t bytes)
{
    int handle;
    size_t written = 0;
    CHECK_INT(sweep.fs->io.open(sweep.fs->io.user, path, LLMPAR_IO_WRITE, &handle), 0);
    CHECK_INT(sweep.fs->io.write(sweep.fs->io.user, handle, data, bytes, &written), 0);
    CHECK_INT(sweep.fs->io.close(sweep.fs->io.user, handle), 0);
    CHECK_INT(written, bytes);
}

/* Between the check and the numbers the file becomes another one, without any tensor. */
static llmpar_status emptied(void *user, const char *path, const llmpar_checkpoint_info *info)
{
    (void)user, (void)path, (void)info;
    put_file("checkpoints/copy/rank-00000.safetensors", "\2\0\0\0\0\0\0\0{}", 10);
    return LLMPAR_OK;
}

/* A save of a step that is there, with a device that fails at the nth call: never OK, whatever the reason that is given. */
static void refused_by_a_failing_device(llmpar_ctx *ctx, llmpar_checkpoint *c, int64_t step)
{
    int n = 1;
    sweep.what = FAILS_DEVICE;
    for (sweep.over = 0; n < 1000; n++) {
        sweep.n = n;
        arm(ctx);
        llmpar_status status = save(c, step);
        disarm(ctx, status);
        CHECK(status == LLMPAR_ERR_IO || (status == LLMPAR_ERR_INTERNAL && !sweep.over));
        llmpar_error_clear(&ctx->error);
        if (sweep.over) break;
    }
    CHECK(n > 10); /* one agreement, and one text */
}

/* An object without an optimizer, begun from another seed, takes the parameters. */
static void parameters_alone(llmpar_fsdp *fsdp)
{
    llmpar_mesh *mesh = llmpar_fsdp_mesh(fsdp);
    llmpar_unit units[UNITS];
    llmpar_fsdp_desc desc = { .seed = 99 };
    llmpar_fsdp *other = NULL;
    double want[MOST], got[MOST];
    llmpar_param renamed[3];
    make_units(units);
    memcpy(renamed, mix_params, sizeof renamed);
    renamed[1].name = "v";
    units[MIX].params = renamed;
    CHECK_OK(llmpar_fsdp_create(mesh, units, UNITS, &desc, &other));
    if (!other) return;
    CHECK_STATUS(load(other, NULL, "checkpoints/copy", 12), LLMPAR_ERR_SHAPE);
    CHECK_TEXT(llmpar_last_error(mesh->ctx), "param/v is missing");
    llmpar_error_clear(&mesh->ctx->error);
    llmpar_fsdp_destroy(other);
    make_units(units);
    CHECK_OK(llmpar_fsdp_create(mesh, units, UNITS, &desc, &other));
    if (!other) return;
    CHECK_OK(load(other, NULL, "checkpoints/copy", 12));
    for (int k = 0; k < PARAMS; k++) {
        whole(fsdp, k, shard_of(fsdp, all[k].unit), want);
        whole(other, k, shard_of(other, all[k].unit), got);
        CHECK_BYTES(got, want, (size_t)all[k].count * sizeof *got);
    }
    llmpar_fsdp_destroy(other);
}

static llmpar_status no_host_alloc(llmpar_device *d, size_t bytes, void **out) { return (void)d, (void)bytes, *out = NULL, LLMPAR_ERR_MEMORY; }
static void no_host_free(llmpar_device *d, void *memory, size_t bytes) { (void)d, (void)memory, (void)bytes; }

/* What is not asked for rightly, names that are no steps, and a save that nobody ends. */
static llmpar_status odd(const job *j, llmpar_fsdp *fsdp, llmpar_optim *adamw)
{
    static const char *const names[] = { "step-", "step-x", "step-07", "step-7x", "step-99999999999999999999", "stop-9", ".tmp", "step-x.tmp", "step-9.part" };
    static char longest[1100];
    llmpar_ctx *ctx = llmpar_fsdp_mesh(fsdp)->ctx;
    llmpar_checkpoint_desc desc = { .keep = 1 };
    llmpar_checkpoint *c = NULL;
    int64_t newest = 7;
    (void)j;
    ctx->io = &sweep.fs->io;
    memset(longest, 'd', sizeof longest - 1);
    for (int i = 0; i < 4; i++) {
        desc.directory = i == 0 ? NULL : i == 1 ? "" : i == 2 ? longest : "checkpoints";
        if (i == 3) desc.keep = -1;
        CHECK_STATUS(llmpar_checkpoint_create(fsdp, adamw, &desc, &c), LLMPAR_ERR_ARGUMENT);
        CHECK_TEXT(llmpar_last_error(ctx), i < 3 ? "expected 1 .. 1000" : "keep = -1");
        llmpar_error_clear(&ctx->error);
        CHECK(!c);
    }
    CHECK_OK(llmpar_checkpoint_newest(ctx, "checkpoints", INT64_MAX, &newest));
    CHECK_INT(newest, -1);
    desc.keep = 1;
    CHECK_OK(llmpar_checkpoint_create(fsdp, adamw, &desc, &c));
    CHECK_OK(save(c, 0));
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char path[200];
        snprintf(path, sizeof path, "checkpoints/%s", names[i]);
        CHECK_INT(sweep.fs->io.make_directory(sweep.fs->io.user, path), 0);
    }
    CHECK_INT(sweep.fs->io.make_directory(sweep.fs->io.user, "checkpoints/step-9.tmp"), 0);
    sweep.fs->io.list = long_names;
    CHECK_STATUS(save(c, 12), LLMPAR_ERR_IO); /* a leftover that cannot be removed */
    CHECK_TEXT(llmpar_last_error(ctx), "step-9.tmp: cannot remove it");
    llmpar_error_clear(&ctx->error);
    sweep.fs->io.list = fake_list_names;
    put_file("checkpoints/step-8.tmp", "x", 1); /* a leftover that is no directory */
    CHECK_OK(save(c, 12));
    CHECK_OK(llmpar_checkpoint_newest(ctx, "checkpoints", INT64_MAX, &newest));
    CHECK_INT(newest, 12);
    CHECK_OK(llmpar_checkpoint_newest(ctx, "checkpoints", 12, &newest));
    CHECK_INT(newest, -1); /* the first went, and the others are no steps */
    sweep.fs->at = sweep.fs->calls + 1;
    sweep.fs->error = EIO;
    CHECK_STATUS(llmpar_checkpoint_newest(ctx, "checkpoints", INT64_MAX, &newest), LLMPAR_ERR_IO);
    llmpar_error_clear(&ctx->error);
    const llmpar_device own = *ctx->device;
    ctx->device->host_alloc = no_host_alloc;
    ctx->device->host_free = no_host_free;
    CHECK_STATUS(load(fsdp, adamw, "checkpoints/step-12", 12), LLMPAR_ERR_MEMORY);
    CHECK_TEXT(llmpar_last_error(ctx), "checkpoints/step-12: out of memory to load it");
    llmpar_error_clear(&ctx->error);
    ctx->device->host_alloc = own.host_alloc;
    ctx->device->host_free = own.host_free;
    refused_by_a_failing_device(ctx, c, 12);
    CHECK_STATUS(save(c, 12), LLMPAR_ERR_IO);
    CHECK_TEXT(llmpar_last_error(ctx), "step-12");
    llmpar_error_clear(&ctx->error);
    CHECK_STATUS(load(fsdp, NULL, "checkpoints/step-12", 12), LLMPAR_ERR_CONFIG);
    CHECK_TEXT(llmpar_last_error(ctx), "optimizer adamw, this run has none");
    llmpar_error_clear(&ctx->error);
    CHECK_INT(sweep.fs->io.rename(sweep.fs->io.user, "checkpoints/step-12", "checkpoints/copy"), 0); /* no name of a step */
    CHECK_OK(load(fsdp, adamw, "checkpoints/copy", 12));
    char deep[3000];
    for (int length = 2047; length <= 2048; length++) {
        memset(deep, 'd', sizeof deep);
        deep[length] = 0;
        CHECK_STATUS(load(fsdp, adamw, deep, 12), length > 2047 ? LLMPAR_ERR_ARGUMENT : LLMPAR_ERR_IO);
        if (length > 2047) CHECK_TEXT(llmpar_last_error(ctx), "a path of more than 2047 bytes");
        llmpar_error_clear(&ctx->error);
    }
    parameters_alone(fsdp);
    llmpar_checkpoint_info info;
    CHECK_STATUS(llmpar_checkpoint_load(fsdp, adamw, "checkpoints/copy", emptied, NULL, &info), LLMPAR_ERR_FORMAT);
    CHECK_TEXT(llmpar_last_error(ctx), "param/table has gone");
    llmpar_error_clear(&ctx->error);
    llmpar_checkpoint_destroy(c);
    desc.directory = "/rooted";
    CHECK_OK(llmpar_checkpoint_create(fsdp, adamw, &desc, &c));
    CHECK_OK(save(c, 1));
    llmpar_checkpoint_destroy(c);
    desc.directory = "checkpoints";
    desc.background = 1;
    CHECK_OK(llmpar_checkpoint_create(fsdp, adamw, &desc, &c));
    CHECK_OK(llmpar_checkpoint_poll(c, 0));
    CHECK_OK(save(c, 13));
    sweep.background = 0;
    CHECK_OK(save(c, 14)); /* not waited for: what goes wrong with it is heard at the next call */
    pthread_mutex_lock(&sweep.fs->lock);
    sweep.fs->dead = 1;
    pthread_mutex_unlock(&sweep.fs->lock);
    CHECK_STATUS(save(c, 15), LLMPAR_ERR_IO);
    sweep.fs->dead = 0; /* its thread has ended */
    llmpar_error_clear(&ctx->error);
    CHECK_OK(save(c, 16));
    sweep.what = FAILS_DEVICE;
    sweep.n = 1;
    arm(ctx);
    CHECK_STATUS(llmpar_checkpoint_poll(c, 0), LLMPAR_ERR_INTERNAL);
    disarm(ctx, LLMPAR_ERR_INTERNAL);
    llmpar_error_clear(&ctx->error);
    llmpar_checkpoint_destroy(c);
    llmpar_checkpoint_destroy(NULL);
    CHECK_OK(llmpar_checkpoint_newest(ctx, "checkpoints", INT64_MAX, &newest));
    CHECK_INT(newest, 13);
    ctx->io = NULL;
    return LLMPAR_OK;
}

TEST(odd_requests)
{
    job j = { .mesh = { .dp_shard = 1 }, .micro_batches = 1, .body = odd };
    memset(&sweep, 0, sizeof sweep);
    sweep.background = 1; /* save() polls */
    sweep.fs = fake_make();
    launch_ok(&j);
    fake_free(sweep.fs);
}

TEST(allocations) { all_sweeps(FAILS_ALLOCATION, 10); }
TEST(files) { all_sweeps(FAILS_FILE, 10); }
TEST(device) { all_sweeps(FAILS_DEVICE, 10); }

TEST_LIST(T_(odd_requests), T_(allocations), T_(files), T_(device))
