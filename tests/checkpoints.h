/* checkpoints: small runs on rank threads that save and resume, and a snapshot of everything a checkpoint holds, whatever mesh it lies on. For the tests of checkpoints. */
#ifndef CHECKPOINTS_H
#define CHECKPOINTS_H

#include "test.h"

#include <pthread.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <unistd.h>

enum { CP_RANKS = 8, CP_STEPS = 8 };

/* Numbers of one array of one parameter, as a whole. */
typedef struct cp_array { char name[160]; int64_t count; unsigned char *data; } cp_array;
typedef struct cp_snapshot { cp_array *array; int count; size_t size; int64_t updates; llmpar_loss_scale scale; } cp_snapshot;

typedef struct cp_run {
    llmpar_mesh_desc mesh;
    int zero, wrap, tied, steps;          /* steps: in all */
    int save;                             /* 1: at the end too */
    llmpar_trainer_desc policy;           /* the rest */
    const llmpar_io *io;
    const cp_snapshot *expect;            /* every rank's state at the end, copies too */
    cp_snapshot *take;                    /* by the owners */
    uint64_t seed;
    llmpar_status (*at_end)(struct cp_run *run, llmpar_ctx *ctx, llmpar_trainer *trainer);
    void *user;
    /* out */
    llmpar_status status;
    llmpar_error error;
    llmpar_step step[CP_STEPS];           /* of rank 0 */
    int64_t resumed;
    char said[4][600];                    /* warnings of rank 0, and the line that says what it goes on from */
    int lines;
    int differences;                      /* atomic */
} cp_run;

static char cp_root_name[256];
static int cp_owner; /* a fork must not remove its parent's files */
static inline void cp_remove_root(void)
{
    char command[300];
    if (getpid() != cp_owner) return;
    snprintf(command, sizeof command, "rm -rf '%s'", cp_root_name);
    if (system(command)) fprintf(stderr, "cannot remove %s\n", cp_root_name);
}

/* A name in a directory of this process, in one of the thread's eight rotating buffers. The main thread calls it first. */
static inline const char *cp_path(const char *format, ...) LLMPAR_PRINTF(1, 2);
static inline const char *cp_path(const char *format, ...)
{
    static __thread char buffer[8][800];
    static __thread int next;
    char name[500];
    va_list list;
    if (!cp_root_name[0]) {
        const char *tmp = getenv("TMPDIR"); /* else in memory where that can be: a busy disk takes seconds for a sync */
        snprintf(cp_root_name, sizeof cp_root_name, "%.200s/llmpar-test-XXXXXX", tmp && tmp[0] ? tmp : access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
        if (!mkdtemp(cp_root_name)) { fprintf(stderr, "cannot make %s\n", cp_root_name); exit(1); }
        cp_owner = (int)getpid();
        atexit(cp_remove_root);
    }
    va_start(list, format);
    vsnprintf(name, sizeof name, format, list);
    va_end(list);
    next = (next + 1) % 8;
    snprintf(buffer[next], sizeof buffer[next], "%s/%s", cp_root_name, name);
    return buffer[next];
}

static inline void cp_clear(const char *directory)
{
    char command[900];
    snprintf(command, sizeof command, "rm -rf '%s'", directory);
    if (system(command)) TEST_FAIL("cannot remove %s", directory);
}

static inline char *cp_read(const char *path, size_t *bytes)
{
    FILE *f = fopen(path, "rb");
    char *data;
    *bytes = 0;
    if (!f) return NULL;
    fseek(f, 0, SEEK_END);
    *bytes = (size_t)ftell(f);
    rewind(f);
    data = (char *)calloc(1, *bytes + 1);
    if (!data || fread(data, 1, *bytes, f) != *bytes) { fprintf(stderr, "cannot read %s\n", path); exit(1); }
    fclose(f);
    return data;
}

static inline void cp_write(const char *path, const void *data, size_t bytes)
{
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, bytes, f) != bytes) TEST_FAIL("cannot write %s", path);
    if (f) fclose(f);
}

static inline int cp_exists(const char *path) { return access(path, F_OK) == 0; }

static inline llmpar_llama_config cp_config(int tied)
{
    llmpar_llama_config c;
    memset(&c, 0, sizeof c);
    c.vocab = 67;
    c.hidden = 24;
    c.intermediate = 44;
    c.layers = 3;
    c.heads = 8;
    c.kv_heads = 4;
    c.head_dim = 4;
    c.max_positions = 64;
    c.rms_eps = 1e-5;
    c.rope_theta = 10000;
    c.tied = tied;
    c.bos_id = -1;
    c.init_std = 0.2;
    return c;
}

static inline llmpar_status cp_sequence(void *user, int64_t index, int32_t *tokens)
{
    (void)user;
    for (int i = 0; i <= 6; i++) tokens[i] = (int32_t)((index * 31 + i * i * 7 + index * i) % 67);
    return LLMPAR_OK;
}

/* ---- snapshots ---- */

static inline void cp_free(cp_snapshot *s)
{
    for (int i = 0; i < s->count; i++) free(s->array[i].data);
    free(s->array);
    memset(s, 0, sizeof *s);
}

static pthread_mutex_t cp_lock = PTHREAD_MUTEX_INITIALIZER;
static inline cp_array *cp_find(cp_snapshot *s, const char *name, int64_t count)
{
    for (int i = 0; i < s->count; i++)
        if (!strcmp(s->array[i].name, name)) return &s->array[i];
    s->array = (cp_array *)realloc(s->array, (size_t)(s->count + 1) * sizeof *s->array);
    cp_array *a = &s->array[s->count++];
    snprintf(a->name, sizeof a->name, "%s", name);
    a->count = count;
    a->data = (unsigned char *)calloc((size_t)count, s->size);
    return a;
}

/* Element i of a part of a tensor, as an index into the whole. */
static inline int64_t cp_global(const llmpar_local *local, const llmpar_param *param, int64_t i)
{
    int64_t at = local->flat_begin + i, index = 0, stride = 1;
    for (int d = param->dims - 1; d >= 0; d--) {
        index += (at % local->shape[d] + local->offset[d]) * stride;
        at /= local->shape[d];
        stride *= param->shape[d];
    }
    return index;
}

/* data: this rank's part. take: an owner's goes into the snapshot; else every element is compared. */
static inline void cp_look(cp_run *run, int take, const char *kind, const llmpar_param *param, int64_t count, const llmpar_local *local, const unsigned char *data)
{
    cp_snapshot *s = take ? run->take : (cp_snapshot *)(uintptr_t)run->expect;
    char name[160];
    snprintf(name, sizeof name, "%s/%.140s", kind, param->name);
    pthread_mutex_lock(&cp_lock);
    if (take) {
        cp_array *a = cp_find(s, name, count);
        for (int64_t i = 0; local->is_owner && i < local->flat_count; i++) memcpy(a->data + (size_t)cp_global(local, param, i) * s->size, data + (size_t)i * s->size, s->size);
    } else {
        const cp_array *a = NULL;
        for (int i = 0; i < s->count; i++)
            if (!strcmp(s->array[i].name, name)) a = &s->array[i];
        int64_t bad = 0, first = -1;
        for (int64_t i = 0; a && i < local->flat_count; i++)
            if (memcmp(a->data + (size_t)cp_global(local, param, i) * s->size, data + (size_t)i * s->size, s->size)) {
                if (!bad++) first = cp_global(local, param, i);
            }
        if ((!a || bad) && !__atomic_fetch_add(&run->differences, 1, __ATOMIC_SEQ_CST))
            TEST_FAIL("dp %d x %d tp %d zero %d wrap %d: %s: %s %lld of %lld elements differ, first %lld", run->mesh.dp_replicate, run->mesh.dp_shard, run->mesh.tp, run->zero, run->wrap, name, a ? "" : "unknown;", (long long)bad, (long long)local->flat_count, (long long)first);
    }
    pthread_mutex_unlock(&cp_lock);
}

static inline void cp_look_factor(cp_run *run, int take, const char *kind, const llmpar_param *param, int64_t count, const void *data)
{
    llmpar_param line = *param;
    llmpar_local whole;
    memset(&whole, 0, sizeof whole);
    line.dims = 1;
    line.shape[0] = whole.shape[0] = whole.elements = whole.flat_count = count;
    whole.is_owner = 1; /* all that have it have the same */
    cp_look(run, take, kind, &line, count, &whole, (const unsigned char *)data);
}

static inline llmpar_status cp_look_all(cp_run *run, int take, llmpar_ctx *ctx, llmpar_trainer *trainer, const llmpar_optim *optim)
{
    static const char *const states[] = {"state0", "state1"};
    llmpar_fsdp *fsdp = llmpar_trainer_fsdp(trainer);
    size_t size = llmpar_dtype_size(llmpar_dtype_sum(llmpar_fsdp_dtype(fsdp)));
    pthread_mutex_lock(&cp_lock);
    if (take) run->take->size = size;
    pthread_mutex_unlock(&cp_lock);
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(fsdp); u++) {
        const llmpar_segment *segments;
        int32_t count;
        const llmpar_unit *unit = llmpar_fsdp_unit(fsdp, u);
        unsigned char *shard = (unsigned char *)llmpar_fsdp_shard(fsdp, u, NULL, &segments, &count), *state[2] = {NULL, NULL};
        if (!shard) return ctx->error.status;
        for (int32_t i = 0; i < llmpar_fsdp_optimizer_states(fsdp) && !unit->frozen; i++) {
            state[i] = (unsigned char *)llmpar_fsdp_optimizer_state(fsdp, u, i);
            if (!state[i]) return ctx->error.status;
        }
        for (int32_t s = 0; s < count; s++) {
            const llmpar_param *param = &unit->params[segments[s].param];
            llmpar_local local;
            llmpar_optim_factors factors;
            int64_t elements = 1;
            size_t at = (size_t)segments[s].begin * size;
            llmpar_fsdp_part(fsdp, ctx->rank, u, segments[s].param, &local);
            if (local.flat_count != segments[s].count || local.is_owner != segments[s].owner) TEST_FAIL("%s: rank %d: a part of %lld elements, a segment of %lld; owner %d, %d", param->name, (int)ctx->rank, (long long)local.flat_count, (long long)segments[s].count, local.is_owner, (int)segments[s].owner);
            for (int d = 0; d < param->dims; d++) elements *= param->shape[d];
            cp_look(run, take, "param", param, elements, &local, shard + at);
            for (int i = 0; i < 2; i++)
                if (state[i]) cp_look(run, take, states[i], param, elements, &local, state[i] + at);
            if (!optim) continue;
            llmpar_optim_get_factors(optim, u, s, &factors);
            if (factors.moment) cp_look(run, take, "moment", param, elements, &local, (const unsigned char *)factors.moment);
            if (factors.row) cp_look_factor(run, take, "row", param, factors.rows, factors.row);
            if (factors.col) cp_look_factor(run, take, "col", param, factors.cols, factors.col);
        }
        llmpar_status status = llmpar_fsdp_shard_done(fsdp, u, 0), states_done = llmpar_fsdp_optimizer_done(fsdp, u, 0);
        if (status || states_done) return status ? status : states_done;
    }
    return LLMPAR_OK;
}

/* ---- runs ---- */

static inline void cp_say(cp_run *run, const char *line)
{
    if (run->lines < 4) snprintf(run->said[run->lines++], sizeof run->said[0], "%s", line);
}
static inline void cp_log(void *user, int rank, llmpar_log_level level, const char *line)
{
    if (rank == 0 && level == LLMPAR_LOG_WARNING) cp_say((cp_run *)user, line);
}
static inline void cp_sink(void *user, llmpar_sink_kind kind, const char *line)
{
    if (kind == LLMPAR_SINK_METRICS && !strncmp(line, "resumed", 7)) cp_say((cp_run *)user, line);
}
static inline void cp_check(const llmpar_ctx *ctx, void *user)
{
    (void)user;
    if (ctx->heap.live) TEST_FAIL("rank %d: %llu bytes left", (int)ctx->rank, (unsigned long long)ctx->heap.live);
}

static inline llmpar_status cp_rank(llmpar_ctx *ctx, void *user)
{
    cp_run *run = (cp_run *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_llama *model = NULL;
    llmpar_trainer *trainer = NULL;
    llmpar_llama_config config = cp_config(run->tied);
    llmpar_llama_desc model_desc;
    llmpar_trainer_desc desc = run->policy;
    memset(&model_desc, 0, sizeof model_desc);
    model_desc.config = &config;
    model_desc.seed = run->seed ? run->seed : 11;
    model_desc.wrap = run->wrap;
    if (!desc.sequence && !desc.data) desc.sequence = cp_sequence;
    desc.seq_len = desc.seq_len ? desc.seq_len : 6;
    if (!desc.batch) desc.batch = 8;
    desc.zero = LLMPAR_ZERO_0 + run->zero;
    if (!desc.lr) desc.lr = 1e-2;
    desc.warmup = 1;
    desc.total_steps = CP_STEPS;
    desc.log_every = -1;
    desc.sink = cp_sink;
    desc.sink_user = run;
    llmpar_status status = llmpar_mesh_create(ctx, &run->mesh, &mesh);
    if (!status) status = llmpar_llama_create(ctx, &model_desc, &model);
    if (!status) status = llmpar_parallelize(mesh, model, &desc, &trainer);
    if (!status && ctx->rank == 0) run->resumed = llmpar_trainer_steps(trainer);
    for (int64_t i = trainer ? llmpar_trainer_steps(trainer) : 0; i < run->steps && !status; i++) {
        llmpar_step step;
        memset(&step, 0, sizeof step);
        status = llmpar_trainer_step(trainer, &step);
        if (ctx->rank == 0 && i < CP_STEPS) run->step[i] = step;
    }
    if (!status && run->save) status = llmpar_trainer_checkpoint(trainer);
    if (!status) status = llmpar_trainer_finish(trainer);
    if (!status && run->take) status = cp_look_all(run, 1, ctx, trainer, NULL);
    if (!status && run->expect) status = cp_look_all(run, 0, ctx, trainer, NULL);
    if (!status && run->at_end) status = run->at_end(run, ctx, trainer);
    llmpar_trainer_destroy(trainer);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    return status;
}

static inline llmpar_status cp_go(cp_run *run)
{
    llmpar_launch_desc launch;
    memset(&launch, 0, sizeof launch);
    run->lines = run->differences = 0;
    run->resumed = -1;
    launch.ranks = (run->mesh.dp_replicate ? run->mesh.dp_replicate : 1) * (run->mesh.dp_shard ? run->mesh.dp_shard : 1) * (run->mesh.tp ? run->mesh.tp : 1);
    launch.transport = LLMPAR_TRANSPORT_THREADS;
    launch.io = run->io;
    launch.log = cp_log;
    launch.log_user = run;
    launch.check = cp_check;
    launch.deadline = 300;
    return run->status = llmpar_launch(&launch, cp_rank, run, &run->error);
}

static inline cp_run cp_make(int replicate, int shard, int tp, int zero)
{
    cp_run run;
    memset(&run, 0, sizeof run);
    run.mesh.dp_replicate = replicate;
    run.mesh.dp_shard = shard;
    run.mesh.tp = tp;
    run.zero = zero;
    return run;
}

#define CP_GOES(run) do { if (cp_go(run)) TEST_FAIL("%s: %s", llmpar_status_string((run)->status), (run)->error.text); } while (0)

#endif
