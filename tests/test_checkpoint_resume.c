/* Checkpoints that are damaged, of another run, or in the way: refused by name, and `auto` takes the one before; saves in the background and their failures; the log of a resumed run. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#include "test.h"

#include <errno.h>
#include <time.h>

#include "checkpoints.h"

/* ---- a directory with step-2 and step-4, and the numbers of step 2 ---- */

static char damage_base[600];
static cp_snapshot damage_two;

static cp_run damage_run(const char *directory, const char *resume)
{
    cp_run run = cp_make(1, 2, 1, 3);
    run.policy.checkpoint = directory;
    run.policy.resume = resume;
    return run;
}

static void damage_copy(const char *to)
{
    char command[1600];
    cp_clear(to);
    snprintf(command, sizeof command, "cp -r '%s' '%s'", damage_base, to);
    if (system(command)) TEST_FAIL("cannot copy %s", damage_base);
}

static void damage_begin(void)
{
    if (damage_base[0]) return;
    snprintf(damage_base, sizeof damage_base, "%s", cp_path("base"));
    cp_run run = damage_run(damage_base, NULL);
    run.policy.checkpoint_every = 2;
    run.steps = 2;
    run.take = &damage_two;
    CP_GOES(&run);
    run = damage_run(damage_base, "auto");
    run.policy.checkpoint_every = 2;
    run.steps = 4;
    CP_GOES(&run);
    CHECK_INT(run.resumed, 2);
}

/* What is in `directory` is refused with `text` when asked for by name; auto says so, takes step 2 and sets step 4 aside. */
static void damage_refused(const char *what, const char *directory, const char *text)
{
    cp_run run = damage_run(directory, "step-4");
    if (!cp_go(&run)) TEST_FAIL("%s: it was loaded", what);
    else if (!strstr(run.error.text, text) || (run.status != LLMPAR_ERR_FORMAT && run.status != LLMPAR_ERR_IO)) TEST_FAIL("%s: expected \"%s\", got %s: %s", what, text, llmpar_status_string(run.status), run.error.text);
    run = damage_run(directory, "auto");
    run.expect = &damage_two;
    if (cp_go(&run)) TEST_FAIL("%s: auto: %s", what, run.error.text);
    else if (run.resumed != 2 || run.lines < 2 || !strstr(run.said[0], text) || !strstr(run.said[0], "step-4 is damaged") || !strstr(run.said[1], "step-2")) TEST_FAIL("%s: auto resumed %lld: \"%s\", \"%s\"", what, (long long)run.resumed, run.said[0], run.said[1]);
    char path[900];
    snprintf(path, sizeof path, "%s/step-4.damaged", directory);
    if (!cp_exists(path)) TEST_FAIL("%s: step-4 was not set aside", what);
}

/* position < 0: from the end. */
static void damage_flip(const char *path, long position, int bit)
{
    size_t bytes;
    char *data = cp_read(path, &bytes);
    if (!data) { TEST_FAIL("cannot read %s", path); return; }
    data[position < 0 ? (long)bytes + position : position] ^= (char)(1 << bit);
    cp_write(path, data, bytes);
    free(data);
}

static void damage_cut(const char *path, long change)
{
    size_t bytes;
    char *data = cp_read(path, &bytes);
    if (!data) { TEST_FAIL("cannot read %s", path); return; }
    data = (char *)realloc(data, bytes + 100);
    memset(data + bytes, 0, 100);
    cp_write(path, data, change == 0 ? 0 : (size_t)((long)bytes + change));
    free(data);
}

static const char *damaged(const char *name) { return cp_path("damaged/step-4/%s", name); }

TEST(damaged_files)
{
    static const char *const files[] = {"rank-00000.safetensors", "rank-00001.safetensors", "config.json", "manifest.json"};
    char directory[600];
    damage_begin();
    snprintf(directory, sizeof directory, "%s", cp_path("damaged"));
    for (int f = 0; f < 4; f += test_rounds(4) < 4 ? 3 : 1) {
        const char *text = f == 3 ? "manifest.json" : files[f];
        static const struct { const char *what; long position; int bit; } flips[] = {{"first bit", 0, 0}, {"in the middle of the header", 40, 3}, {"last byte", -1, 7}, {"before the end", -30, 2}, {"in the data", -200, 5}};
        for (int i = 0; i < test_rounds(5); i++) {
            damage_copy(directory);
            damage_flip(damaged(files[f]), flips[i].position, flips[i].bit);
            damage_refused(flips[i].what, directory, text);
        }
        static const long cuts[] = {-1, 0, 1, 100};
        for (int i = 0; i < test_rounds(4); i++) {
            damage_copy(directory);
            damage_cut(damaged(files[f]), cuts[i]);
            damage_refused("cut or longer", directory, text);
        }
        damage_copy(directory);
        CHECK(!remove(damaged(files[f])));
        damage_refused("missing", directory, text);
    }
    damage_copy(directory);
    CHECK(!rename(damaged(files[0]), damaged("x")) && !rename(damaged(files[1]), damaged(files[0])) && !rename(damaged("x"), damaged(files[1])));
    damage_refused("swapped", directory, "rank-0000");
    damage_copy(directory);
    cp_write(damaged("rank-00002.safetensors"), "x", 1);
    damage_refused("one too many", directory, "rank-00002.safetensors: a file that the manifest does not name");
    damage_copy(directory);
    cp_clear(directory);
    damage_copy(directory);
    CHECK(!rename(cp_path("damaged/step-4"), cp_path("damaged/x")) && !rename(cp_path("damaged/step-2"), cp_path("damaged/step-4")) && !rename(cp_path("damaged/x"), cp_path("damaged/step-2")));
    cp_run run = damage_run(directory, "auto");
    CHECK_STATUS(cp_go(&run), LLMPAR_ERR_FORMAT);
    CHECK_TEXT(run.error.text, "no checkpoint is whole");
    CHECK_TEXT(run.said[0], "it is of step 2, not of the step in its directory's name");
}

TEST(any_bit_of_the_manifest)
{
    char directory[600];
    size_t bytes;
    damage_begin();
    snprintf(directory, sizeof directory, "%s", cp_path("manifest"));
    damage_copy(directory);
    char *text = cp_read(cp_path("manifest/step-4/manifest.json"), &bytes);
    for (size_t at = 0; at < bytes; at += (size_t)(getenv("LLMPAR_TEST_FULL") ? 17 : 397 * (test_rounds(4) < 4 ? 8 : 1))) {
        text[at] ^= (char)(1 << at % 8);
        cp_write(cp_path("manifest/step-4/manifest.json"), text, bytes);
        text[at] ^= (char)(1 << at % 8);
        cp_run run = damage_run(directory, "step-4");
        if (!cp_go(&run)) TEST_FAIL("byte %zu changed, and it was loaded", at);
        else if (!strstr(run.error.text, "manifest.json")) TEST_FAIL("byte %zu: %s", at, run.error.text);
    }
    free(text);
}

TEST(latest)
{
    static const struct { const char *text, *expected; } wrong[] = {{"step-5\n", "step-5"}, {"", "expected one line"}, {"step-x\n", "expected one line"}, {"../step-4\n", "expected one line"}, {"step-4 \n", "expected one line"}, {"step-04\n", "expected one line"}};
    char directory[600];
    damage_begin();
    snprintf(directory, sizeof directory, "%s", cp_path("latest"));
    damage_copy(directory);
    cp_run run = damage_run(NULL, directory);
    CP_GOES(&run);
    CHECK_INT(run.resumed, 4);
    for (int i = 0; i < 6; i++) {
        cp_write(cp_path("latest/latest"), wrong[i].text, strlen(wrong[i].text));
        run = damage_run(NULL, directory);
        CHECK(cp_go(&run) != LLMPAR_OK);
        CHECK_TEXT(run.error.text, wrong[i].expected);
        run = damage_run(directory, "auto"); /* goes by what is there */
        CP_GOES(&run);
        CHECK_INT(run.resumed, 4);
    }
    remove(cp_path("latest/latest"));
    run = damage_run(NULL, directory);
    CHECK_STATUS(cp_go(&run), LLMPAR_ERR_IO);
    CHECK_TEXT(run.error.text, "neither manifest.json nor latest");
    run = damage_run(NULL, cp_path("latest/step-2")); /* a checkpoint itself */
    run.expect = &damage_two;
    CP_GOES(&run);
    CHECK(!rename(cp_path("latest/step-2"), cp_path("latest/any name")));
    run = damage_run(NULL, cp_path("latest/any name"));
    run.expect = &damage_two;
    CP_GOES(&run);
}

/* Whole, and of another run: that is no damage, so auto takes nothing older. */
static void other_run(const char *what, cp_run run, llmpar_status status, const char *text)
{
    char directory[600];
    snprintf(directory, sizeof directory, "%s", cp_path("other"));
    damage_copy(directory);
    run.policy.checkpoint = directory;
    run.policy.resume = "auto";
    if (cp_go(&run) != status || !strstr(run.error.text, text)) TEST_FAIL("%s: expected %s: %s, got %s: %s", what, llmpar_status_string(status), text, llmpar_status_string(run.status), run.error.text);
    CHECK(cp_exists(cp_path("other/step-4")));
}

TEST(of_another_run)
{
    damage_begin();
    cp_run plain = damage_run(NULL, NULL), run = plain;
    run.policy.batch = 4;
    other_run("batch", run, LLMPAR_ERR_CONFIG, "its data would come in another order");
    run = plain;
    run.policy.seq_len = 5;
    other_run("seq_len", run, LLMPAR_ERR_CONFIG, "its data would come in another order");
    run = plain;
    run.seed = 12;
    other_run("seed", run, LLMPAR_ERR_CONFIG, "its data would come in another order");
    run = plain;
    run.tied = 1;
    other_run("model", run, LLMPAR_ERR_SHAPE, "lm_head.weight");
    run = plain;
    run.policy.optim.kind = LLMPAR_OPTIM_SGD;
    other_run("optimizer", run, LLMPAR_ERR_CONFIG, "optimizer adamw, this run has sgd");
    run = plain;
    run.policy.dtype = LLMPAR_F64;
    other_run("f64", run, LLMPAR_ERR_CONFIG, "numbers of type f32, this run has f64");
    run = plain;
    run.policy.freeze = 1;
    other_run("frozen", run, LLMPAR_ERR_SHAPE, "state0/model.embed_tokens.weight is not part of this run");
    /* What may change. */
    run = plain;
    run.policy.lr = 3e-3;
    run.policy.dtype = LLMPAR_BF16;
    run.policy.grad_accum = 2;
    run.policy.canon = 4;
    run.steps = 5;
    other_run("learning rate, dtype, accumulation", run, LLMPAR_OK, "");
}

TEST(in_the_way)
{
    damage_begin();
    cp_run run = damage_run(damage_base, NULL);
    CHECK_STATUS(cp_go(&run), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(run.error.text, "step-4: it is there already: expected resume, or a directory without checkpoints");
    run = damage_run(damage_base, "step-2");
    CHECK_STATUS(cp_go(&run), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(run.error.text, "step-4: newer than step 2, from which this run goes on");
    run = damage_run(damage_base, "step-4");
    run.save = 1;
    CHECK_STATUS(cp_go(&run), LLMPAR_ERR_IO);
    CHECK_TEXT(run.error.text, "step-4: it is there already, and nothing is overwritten");
    run = damage_run(damage_base, "step-3");
    CHECK_STATUS(cp_go(&run), LLMPAR_ERR_IO);
    CHECK_TEXT(run.error.text, "step-3/manifest.json");
    run = damage_run(cp_path("new"), "auto"); /* nothing there yet */
    run.steps = run.save = 1;
    CP_GOES(&run);
    CHECK_INT(run.resumed, 0);
    CHECK(cp_exists(cp_path("new/step-1/manifest.json")) && cp_exists(cp_path("new/latest")));
    run = cp_make(1, 1, 1, 3);
    run.policy.keep = 2;
    CHECK_STATUS(cp_go(&run), LLMPAR_ERR_ARGUMENT);
    run = cp_make(1, 1, 1, 3);
    run.policy.resume = "auto";
    CHECK_STATUS(cp_go(&run), LLMPAR_ERR_ARGUMENT);
    run = damage_run(cp_path("no parent/there"), "auto");
    run.steps = run.save = 1;
    CHECK_STATUS(cp_go(&run), LLMPAR_ERR_IO);
    CHECK_TEXT(run.error.text, "cannot create the directory");
}

/* A directory that cannot be looked at is not one without checkpoints, in which a new run would begin. */
static const char *unseen;
static int unseen_look(void *user, const char *path, llmpar_io_kind *kind, uint64_t *bytes) { return strcmp(path, unseen) ? llmpar_io_system()->look(user, path, kind, bytes) : EIO; }
TEST(looked_at_in_vain)
{
    llmpar_io io = *llmpar_io_system();
    io.look = unseen_look;
    damage_begin();
    unseen = damage_base;
    cp_run run = damage_run(damage_base, "auto");
    run.io = &io;
    CP_GOES(&run);
    CHECK_INT(run.resumed, 4);
}

/* ---- keep, log ---- */

/* The program's own fgetc and ferror come before the C library's: a disk that gives back so many characters of the log, and no more. 0: all. */
static long readable;
static int unreadable;
int fgetc(FILE *file)
{
    unreadable |= readable && !--readable;
    if (!unreadable) return getc(file);
    errno = EIO;
    return EOF;
}
int ferror(FILE *file) { return unreadable || ferror_unlocked(file); }

TEST(keep_and_log)
{
    char log[600], directory[600];
    size_t bytes;
    snprintf(log, sizeof log, "%s", cp_path("run.jsonl"));
    snprintf(directory, sizeof directory, "%s", cp_path("kept"));
    cp_run run = damage_run(directory, "auto");
    run.policy.checkpoint_every = 1;
    run.policy.keep = 2;
    run.policy.log = log;
    run.steps = 5;
    CP_GOES(&run);
    for (int i = 1; i <= 5; i++) CHECK_INT(cp_exists(cp_path("kept/step-%d", i)), i >= 4);
    /* A crash behind step 7 cut a line short; the newest checkpoint is of step 5. */
    char *text = cp_read(log, &bytes);
    text = (char *)realloc(text, bytes + 200);
    strcpy(text + bytes, "{\"step\":6,\"loss\":1}\n{\"step\":7,\"lo");
    cp_write(log, text, strlen(text));
    free(text);
    run.steps = 8;
    CP_GOES(&run);
    CHECK_INT(run.resumed, 5);
    text = cp_read(log, &bytes);
    char *at = text;
    for (int i = 1; i <= 8; i++) {
        char head[40];
        snprintf(head, sizeof head, "{\"step\":%d,\"loss\":", i);
        if (!at || strncmp(at, head, strlen(head))) TEST_FAIL("line %d of the log is %.40s", i, at ? at : "missing");
        at = at ? strchr(at, '\n') : NULL;
        at = at ? at + 1 : NULL;
    }
    CHECK(at && !*at);
    free(text);
    /* A log that cannot be read to its end is not cut where reading ended. */
    run.steps = 9;
    readable = 100;
    CHECK_STATUS(cp_go(&run), LLMPAR_ERR_IO);
    CHECK(unreadable);
    unreadable = 0;
    CHECK_TEXT(run.error.text, "run.jsonl: cannot open for writing: Input/output error");
    size_t before = bytes;
    free(cp_read(log, &bytes));
    CHECK_INT(bytes, before);
    /* A new run begins a new log. */
    run = damage_run(NULL, NULL);
    run.policy.log = log;
    run.steps = 1;
    CP_GOES(&run);
    text = cp_read(log, &bytes);
    CHECK(strchr(text, '\n') == text + bytes - 1);
    free(text);
}

/* ---- in the background ---- */

typedef struct slow_io { llmpar_io io; const llmpar_io *system; int open; int fail; long waited; } slow_io;

static int slow_write(void *user, int handle, const void *data, size_t bytes, size_t *written)
{
    slow_io *slow = (slow_io *)user;
    struct timespec nap = {0, 2000000};
    *written = 0;
    while (!__atomic_load_n(&slow->open, __ATOMIC_ACQUIRE)) {
        __atomic_add_fetch(&slow->waited, 1, __ATOMIC_RELAXED);
        nanosleep(&nap, NULL);
    }
    if (__atomic_load_n(&slow->fail, __ATOMIC_ACQUIRE) && bytes > 2000) return ENOSPC;
    return slow->system->write(slow->system->user, handle, data, bytes, written);
}
/* Names and handles are the system's. */
static int slow_open(void *user, const char *path, llmpar_io_mode mode, int *handle) { const llmpar_io *s = ((slow_io *)user)->system; return s->open(s->user, path, mode, handle); }
static int slow_close(void *user, int handle) { const llmpar_io *s = ((slow_io *)user)->system; return s->close(s->user, handle); }
static int slow_read(void *user, int handle, void *data, size_t bytes, uint64_t offset, size_t *got) { const llmpar_io *s = ((slow_io *)user)->system; return s->read(s->user, handle, data, bytes, offset, got); }
static int slow_sync(void *user, int handle) { const llmpar_io *s = ((slow_io *)user)->system; return s->sync(s->user, handle); }
static int slow_rename(void *user, const char *from, const char *to) { const llmpar_io *s = ((slow_io *)user)->system; return s->rename(s->user, from, to); }
static int slow_remove(void *user, const char *path) { const llmpar_io *s = ((slow_io *)user)->system; return s->remove(s->user, path); }
static int slow_mkdir(void *user, const char *path) { const llmpar_io *s = ((slow_io *)user)->system; return s->make_directory(s->user, path); }
static int slow_look(void *user, const char *path, llmpar_io_kind *kind, uint64_t *bytes) { const llmpar_io *s = ((slow_io *)user)->system; return s->look(s->user, path, kind, bytes); }
static int slow_list(void *user, const char *path, int (*entry)(void *, const char *), void *entry_user) { const llmpar_io *s = ((slow_io *)user)->system; return s->list(s->user, path, entry, entry_user); }

static void slow_make(slow_io *slow)
{
    llmpar_io io = {LLMPAR_IO_ABI, sizeof(llmpar_io), slow, slow_open, slow_close, slow_read, slow_write, slow_sync, slow_rename, slow_remove, slow_mkdir, slow_look, slow_list};
    memset(slow, 0, sizeof *slow);
    slow->io = io;
    slow->system = llmpar_io_system();
}

/* Steps go on while no byte can be written; then the save is committed, and holds the numbers of its own step, not of those since. */
static llmpar_status slow_steps(cp_run *run, llmpar_ctx *ctx, llmpar_trainer *trainer)
{
    slow_io *slow = (slow_io *)run->user;
    llmpar_step step;
    memset(&step, 0, sizeof step);
    llmpar_status status = llmpar_trainer_checkpoint(trainer); /* of step 2 */
    for (int i = 0; i < 3 && !status; i++) status = llmpar_trainer_step(trainer, &step);
    if (!status && step.step != 5) TEST_FAIL("step %lld", (long long)step.step);
    /* Three small steps may be over before the thread that writes has begun. */
    struct timespec nap = {0, 1000000};
    for (int i = 0; i < 120000 && !__atomic_load_n(&slow->waited, __ATOMIC_RELAXED); i++) nanosleep(&nap, NULL);
    if (cp_exists(cp_path("slow/step-2")) || !cp_exists(cp_path("slow/step-2.tmp"))) TEST_FAIL("committed before it was written");
    if (!status) status = llmpar_comm_barrier(ctx->comm, NULL, "all have looked");
    __atomic_store_n(&slow->open, 1, __ATOMIC_RELEASE);
    if (!status) status = llmpar_trainer_finish(trainer);
    if (!status && !cp_exists(cp_path("slow/step-2"))) TEST_FAIL("finish has not committed");
    return status;
}

TEST(in_the_background)
{
    slow_io slow;
    slow_make(&slow);
    cp_run run = damage_run(cp_path("slow"), NULL);
    damage_begin();
    run.policy.checkpoint_background = 1;
    run.io = &slow.io;
    run.user = &slow;
    run.steps = 2;
    run.at_end = slow_steps;
    CP_GOES(&run);
    CHECK(slow.waited > 0);
    run = damage_run(cp_path("slow"), "auto");
    run.expect = &damage_two;
    CP_GOES(&run);
    CHECK_INT(run.resumed, 2);
}

/* A failure that nobody waits for comes out of a later step, on every rank, and training goes on. */
static llmpar_status fail_steps(cp_run *run, llmpar_ctx *ctx, llmpar_trainer *trainer)
{
    slow_io *slow = (slow_io *)run->user;
    llmpar_step step;
    llmpar_status status = LLMPAR_OK;
    for (int turn = 0; turn < 2; turn++) { /* found by a step; by finish */
        if (ctx->rank == 0) __atomic_store_n(&slow->fail, 1, __ATOMIC_RELEASE);
        if (turn) status = llmpar_trainer_step(trainer, &step);
        int64_t before = llmpar_trainer_steps(trainer);
        if (!status) status = llmpar_trainer_checkpoint(trainer);
        if (run->policy.checkpoint_background && status) TEST_FAIL("%s", ctx->error.text);
        if (run->policy.checkpoint_background && turn) status = llmpar_trainer_finish(trainer);
        else if (run->policy.checkpoint_background)
            for (int i = 0; i < 100000 && !status; i++) {
                struct timespec nap = {0, i < 100 ? 0 : 1000000}; /* the threads that write may have to wait for a processor */
                status = llmpar_trainer_step(trainer, &step);
                nanosleep(&nap, NULL);
            }
        if (status != LLMPAR_ERR_IO || !strstr(ctx->error.text, "No space left on device") || !strstr(ctx->error.text, "rank ") || !strstr(ctx->error.text, ".safetensors")) TEST_FAIL("rank %d: %s: %s", (int)ctx->rank, llmpar_status_string(status), ctx->error.text);
        if (llmpar_trainer_steps(trainer) < before) TEST_FAIL("steps went back");
        if (ctx->rank == 0 && cp_exists(cp_path("full/step-%lld.tmp", (long long)before))) TEST_FAIL("step-%lld.tmp was left", (long long)before);
        __atomic_store_n(&slow->fail, 0, __ATOMIC_RELEASE); /* by both: all have failed */
        status = llmpar_trainer_step(trainer, &step);
        if (!status) status = llmpar_trainer_checkpoint(trainer);
        if (!status) status = llmpar_trainer_finish(trainer);
        if (!status && !cp_exists(cp_path("full/step-%lld", (long long)step.step))) TEST_FAIL("step-%lld was not saved", (long long)step.step);
        if (status) return status;
    }
    return LLMPAR_OK;
}

TEST(a_full_disk)
{
    for (int background = 0; background < 2; background++) {
        slow_io slow;
        slow_make(&slow);
        slow.open = 1;
        cp_clear(cp_path("full"));
        cp_run run = damage_run(cp_path("full"), NULL);
        run.policy.checkpoint_background = background;
        run.io = &slow.io;
        run.user = &slow;
        run.steps = 1;
        run.at_end = fail_steps;
        CP_GOES(&run);
    }
}

TEST_LIST(T_(damaged_files), T_(any_bit_of_the_manifest), T_(latest), T_(of_another_run), T_(in_the_way), T_(looked_at_in_vain), T_(keep_and_log), T_(in_the_background), T_(a_full_disk))
