/* launch: rank threads, their contexts, and the root error.

   One rank's life, on its own thread (on the caller's for a world of one rank):
     name, floating-point state -> heap, CPU device, communicator of the threads -> what the backend makes (launch_furnish.c) -> agreement with the others -> fn -> failure told to all, record written -> all destroyed
   The check hook runs when all ranks have ended, on the caller's thread, rank by rank.

   A rank that never comes back cannot be joined and must not lose its memory. So what the ranks share belongs to all of them and to the caller, and whoever leaves last frees it: if a rank is stuck
   the caller leaves first, with the error. */
#include "run/launch_internal.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#if defined(__linux__)
#include <sys/prctl.h>
#endif

#include "base/processors_internal.h"
#include "base/text_internal.h"
#include "comm/threads.h"
#include "cpu/cpu.h"
#include "tables/device.h"

#define LLMPAR__LAUNCH_STACK ((size_t)8 << 20) /* of a rank thread: musl's default is 128 KiB */
#define LLMPAR__LAUNCH_MAX_RANKS 4096
#define LLMPAR__LAUNCH_DEADLINE 600.0
#define LLMPAR__LAUNCH_PATH 999

typedef struct llmpar__launch_rank {
    llmpar_ctx ctx;
    struct llmpar__launch_job *job;
    pthread_t thread;
    int32_t stuck;  /* left running */
    char *returned; /* malloc: the record of a rank that returned, in case another one fails after it */
} llmpar__launch_rank;

/* What all ranks of one launch share; read-only while they run, but for `references`. */
typedef struct llmpar__launch_job {
    llmpar_launch_desc desc;
    llmpar_backend backend; /* desc.backend's */
    llmpar_cpu_level level;
    llmpar_rank_fn fn;
    void *user;
    llmpar_heap heap; /* of the launching thread; the ranks' splits use it under the world's lock, and whoever frees the job */
    llmpar_threads_world *world;
    llmpar__launch_rank *rank;
    char record[LLMPAR__LAUNCH_PATH + 1]; /* directory, "" = none */
    int32_t *processors;  /* [ranks][threads] where each thread stays; NULL: where it likes. Owned */
    int32_t crowded;      /* more threads than processors */
    int32_t references; /* atomic: the rank threads and the caller */
} llmpar__launch_job;

static void llmpar__launch_log(void *user, int rank, llmpar_log_level level, const char *line)
{
    (void)user;
    if (level == LLMPAR_LOG_INFO) return;
    fprintf(stderr, "llmpar: rank %d: %s%s\n", rank, level == LLMPAR_LOG_WARNING ? "warning: " : "", line);
}

/* text == NULL: there was no memory for it. */
static void llmpar__launch_write(const char *directory, const llmpar_ctx *ctx, const char *text)
{
    char path[1100], line[1280];
    snprintf(path, sizeof path, "%s/llmpar_rank_%d.json", directory, (int)ctx->rank);
    if (text) mkdir(directory, 0777); /* may be there */
    FILE *file = text ? fopen(path, "w") : NULL;
    int failed = !file || fputs(text, file) < 0;
    if (file && fclose(file)) failed = 1;
    snprintf(line, sizeof line, "the record could not be written to %s: %s", path, text ? strerror(errno) : "out of memory");
    if (failed && ctx->log) ctx->log(ctx->log_user, (int)ctx->rank, LLMPAR_LOG_WARNING, line);
}

/* malloc; NULL: no memory. */
static char *llmpar__launch_json(llmpar_record *record)
{
    size_t bytes = llmpar_record_json(record, NULL, 0) + 1;
    char *text = (char *)malloc(bytes);
    if (text) llmpar_record_json(record, text, bytes);
    return text;
}

LLMPAR__PRIVATE_DEF void llmpar__launch_dump(const char *directory, const llmpar_ctx *ctx)
{
    llmpar_record *record = llmpar__launch_record(ctx);
    if (!directory || !directory[0] || !record) return;
    char *text = llmpar__launch_json(record);
    llmpar__launch_write(directory, ctx, text);
    free(text);
}

/* The same for a rank that is stuck: its record belongs to its thread, which may yet go on. */
static void llmpar__launch_dump_stuck(const char *directory, const llmpar_ctx *ctx, llmpar_threads_world *world)
{
    if (!directory[0]) return;
    size_t bytes = llmpar_threads_rank_json(world, ctx->rank, NULL, 0) + 4096;
    char *text = (char *)malloc(bytes);
    if (!text || llmpar_threads_rank_json(world, ctx->rank, text, bytes)) llmpar__launch_write(directory, ctx, text);
    free(text);
}

/* What a rank that did not fail first has to say: whom it waited for, in which collective. A user's error needs no such lines: it says itself what was wrong. */
static void llmpar__launch_report(llmpar__launch_job *job, llmpar_ctx *ctx)
{
    llmpar_error root;
    char line[sizeof root.text + sizeof root.where + 4];
    llmpar_threads_world_error(job->world, &root);
    int plain = root.status != LLMPAR_ERR_TIMEOUT && root.status != LLMPAR_ERR_MISMATCH;
    snprintf(line, sizeof line, "%s%s%s%s", ctx->error.where[0] ? "(" : "", ctx->error.where, ctx->error.where[0] ? ") " : "", ctx->error.text);
    if (root.rank != ctx->rank && ctx->error.text[0]) llmpar_log(ctx, plain ? LLMPAR_LOG_INFO : LLMPAR_LOG_ERROR, "%s", line);
}

static void llmpar__launch_run(llmpar__launch_rank *self)
{
    llmpar__launch_job *job = self->job;
    llmpar_ctx *ctx = &self->ctx;
    LLMPAR__ZEROED(llmpar_cpu_desc, cpu);
    cpu.threads = job->desc.threads;
    cpu.level = job->level;
    cpu.crowded = job->crowded;
    if (job->processors) {
        cpu.processors = job->processors + (size_t)ctx->rank * (size_t)job->desc.threads;
        llmpar__processors_stay_on(cpu.processors[0]);
    }
    llmpar_status st = llmpar_cpu_create(&ctx->heap, &ctx->error, &cpu, &ctx->host);
    if (!st) st = llmpar_threads_comm_create(job->world, ctx->rank, &ctx->heap, ctx->host, &ctx->error, &ctx->host_comm);
    if (!st) st = llmpar__launch_furnish(ctx, job->desc.backend);
    if (!st) llmpar_threads_rank_device(job->world, ctx->rank, ctx->device);
    if (!st) st = llmpar__launch_agree(ctx);
    if (!st) st = job->fn(ctx, job->user);
    if (st) {
        llmpar_error error;
        llmpar__launch_failure(ctx, st, &error);
        int root = llmpar__launch_root(ctx, job->desc.backend, &error);
        llmpar_threads_world_fail(job->world, &error);
        if (!root) llmpar__launch_abort(ctx, &error);
        llmpar__launch_report(job, ctx);
        llmpar__launch_dump(job->record, ctx);
    } else if (job->record[0] && llmpar__launch_record(ctx)) {
        self->returned = llmpar__launch_json(llmpar__launch_record(ctx));
    }
    llmpar_threads_rank_finished(job->world, ctx->rank);
    if (ctx->host_comm) llmpar_threads_rank_device(job->world, ctx->rank, ctx->host);
    llmpar__launch_clear(ctx, job->desc.backend);
}

/* The last one out frees what all share. */
static void llmpar__launch_leave(llmpar__launch_job *job)
{
    if (__atomic_sub_fetch(&job->references, 1, __ATOMIC_ACQ_REL)) return;
    llmpar_heap heap = job->heap;
    for (int32_t i = 0; i < job->desc.ranks; i++) free(job->rank[i].returned);
    llmpar_threads_world_destroy(job->world); /* gives back to job->heap: its count is no longer looked at */
    llmpar_heap_free(&heap, job->rank);
    llmpar_heap_free(&heap, job->processors);
    llmpar_heap_free(&heap, job);
}

/* How many threads a rank has where the desc does not say, and where each of the job's stays. */
static llmpar_status llmpar__launch_places(llmpar__launch_job *job, llmpar_error *error)
{
    llmpar_launch_desc *desc = &job->desc;
    llmpar__processors allowed;
    llmpar__processors_allowed(&allowed);
    int32_t *order = LLMPAR__ALLOC(int32_t, &job->heap, (size_t)allowed.count);
    if (!order) return LLMPAR__LAUNCH_NO(LLMPAR_ERR_MEMORY, "out of memory for the list of processors");
    int32_t cores = llmpar__processors_cores(&allowed, order);
    if (!desc->threads) desc->threads = desc->lockstep ? 1 : llmpar__processors_share(cores, desc->ranks);
    int64_t all = (int64_t)desc->threads * desc->ranks;
    job->crowded = all > allowed.count;
    if (job->crowded || desc->lockstep || desc->pin == LLMPAR_PIN_OFF || !allowed.mask_known || (desc->pin == LLMPAR_PIN_DEFAULT && all != cores && all != allowed.count)) llmpar_heap_free(&job->heap, order);
    else job->processors = order;
    if (desc->pin == LLMPAR_PIN_ON && !job->processors)
        return LLMPAR__LAUNCH_NO(LLMPAR_ERR_CONFIG, "pin = on: %s, %d ranks x %d threads, %d processors: expected no more threads than processors, no lockstep, and a system that keeps threads where they are put",
                                desc->lockstep ? "in lockstep" : job->crowded ? "too many threads" : "the system does not say where threads may run", (int)desc->ranks, (int)desc->threads, (int)allowed.count);
    return LLMPAR_OK;
}

static void *llmpar__launch_thread(void *arg)
{
    llmpar__launch_rank *self = (llmpar__launch_rank *)arg;
    char name[16];
    snprintf(name, sizeof name, "r%d", (int)self->ctx.rank);
#if defined(__linux__)
    prctl(PR_SET_NAME, name, 0, 0, 0);
#elif defined(__APPLE__)
    pthread_setname_np(name);
#endif
    llmpar__float_state(LLMPAR__FLOAT_STATE); /* the thread ends with it */
    llmpar__launch_run(self);
    llmpar__launch_leave(self->job);
    return NULL;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__launch_resolve(llmpar_launch_desc *desc, llmpar_cpu_level *level, llmpar_error *error)
{
    if (desc->ranks < 0 || desc->ranks > LLMPAR__LAUNCH_MAX_RANKS)
        return LLMPAR__LAUNCH_NO(LLMPAR_ERR_ARGUMENT, "ranks = %d, expected 0 (all there are) to %d", (int)desc->ranks, LLMPAR__LAUNCH_MAX_RANKS);
    if (desc->threads < 0 || desc->threads > 1024) return LLMPAR__LAUNCH_NO(LLMPAR_ERR_ARGUMENT, "threads = %d inside a rank, expected 0 (cores / ranks) to 1024", (int)desc->threads);
    if (desc->deadline != desc->deadline) return LLMPAR__LAUNCH_NO(LLMPAR_ERR_ARGUMENT, "the deadline is not a number, expected seconds, 0 (%g) or negative (none)", LLMPAR__LAUNCH_DEADLINE);
    if (desc->deadline <= 0) desc->deadline = desc->deadline < 0 ? 0 : LLMPAR__LAUNCH_DEADLINE; /* from here on 0 is none */
    if (!desc->record || !desc->record[0]) desc->record = getenv("LLMPAR_RECORD");
    if (desc->record && !desc->record[0]) desc->record = NULL;
    if (desc->record && strlen(desc->record) > LLMPAR__LAUNCH_PATH) return LLMPAR__LAUNCH_NO(LLMPAR_ERR_ARGUMENT, "record: a path of %lu bytes, expected at most %d", (unsigned long)strlen(desc->record), LLMPAR__LAUNCH_PATH);
    if ((int)desc->transport < (int)LLMPAR_TRANSPORT_DEFAULT || (int)desc->transport > (int)LLMPAR_TRANSPORT_ENVIRONMENT)
        return LLMPAR__LAUNCH_NO(LLMPAR_ERR_ARGUMENT, "transport = %d, expected 0 (default), 1 (threads), 2 (MPI) or 3 (environment)", (int)desc->transport);
    if ((int)desc->pin < (int)LLMPAR_PIN_DEFAULT || (int)desc->pin > (int)LLMPAR_PIN_OFF) return LLMPAR__LAUNCH_NO(LLMPAR_ERR_ARGUMENT, "pin = %d, expected 0 (default), 1 (on) or 2 (off)", (int)desc->pin);
    if (!desc->log) desc->log = llmpar__launch_log;
    llmpar_status st = llmpar__launch_backend_check(desc->backend, error);
    if (st) return st;
    const char *variable = getenv("LLMPAR_CPU"), *text = desc->cpu && desc->cpu[0] ? desc->cpu : variable && variable[0] ? variable : NULL;
    *level = llmpar_cpu_best_level();
    if (text && !llmpar_cpu_level_parse(text, level)) {
        char choices[128];
        llmpar__text out = llmpar__text_begin(choices, sizeof choices);
        for (int i = LLMPAR_CPU_PORTABLE; strcmp(llmpar_cpu_level_name((llmpar_cpu_level)i), "?"); i++) llmpar__text_put(&out, "%s%s", out.used ? ", " : "", llmpar_cpu_level_name((llmpar_cpu_level)i));
        return LLMPAR__LAUNCH_NO(LLMPAR_ERR_CONFIG, "%s \"%s\" is not a dispatch level (%s)", text == variable ? "LLMPAR_CPU" : "cpu", text, choices);
    }
    return LLMPAR_OK;
}

/* Adds to the error which ranks are left running; the end of a long text makes room. */
static void llmpar__launch_stuck(const llmpar__launch_job *job, llmpar_error *error, int32_t started)
{
    char note[240] = "; stuck and left running, with their memory: ";
    size_t used = strlen(note), length = strlen(error->text);
    for (int32_t i = 0; i < started && used < sizeof note - 16; i++)
        if (job->rank[i].stuck) used += (size_t)snprintf(note + used, sizeof note - used, "rank %d ", (int)i);
    note[--used] = 0;
    if (length > sizeof error->text - 1 - used) length = sizeof error->text - 1 - used;
    memcpy(error->text + length, note, used + 1);
}

LLMPAR_DEF llmpar_status llmpar_launch(const llmpar_launch_desc *given, llmpar_rank_fn fn, void *user, llmpar_error *error)
{
    llmpar_error local;
    if (!error) error = &local;
    llmpar_error_clear(error);
    if (!fn) return LLMPAR__LAUNCH_NO(LLMPAR_ERR_ARGUMENT, "no rank function");
    if (given && given->transport == LLMPAR_TRANSPORT_ENVIRONMENT) return llmpar__launch_environment(given, fn, user, error);
    if (llmpar__launch_mpi(given, fn, user, error)) return error->status;
    llmpar_cpu_level level;
    LLMPAR__ZEROED(llmpar_launch_desc, desc);
    if (given) desc = *given;
    llmpar_status st = llmpar__launch_resolve(&desc, &level, error);
    if (st) return st;

    int32_t ranks = desc.ranks ? desc.ranks : 1, started = 0, stuck = 0;
    desc.ranks = ranks;
    llmpar_heap heap;
    llmpar_heap_init(&heap, desc.allocator);
    llmpar__launch_job *job = LLMPAR__ZALLOC(llmpar__launch_job, &heap, 1);
    llmpar__launch_rank *rank = LLMPAR__ZALLOC(llmpar__launch_rank, &heap, (size_t)ranks);
    if (!job || !rank) {
        llmpar_heap_free(&heap, rank);
        llmpar_heap_free(&heap, job);
        return LLMPAR__LAUNCH_NO(LLMPAR_ERR_MEMORY, "out of memory for %d ranks", (int)ranks);
    }
    job->desc = desc;
    if (desc.backend) {
        job->backend = *desc.backend;
        job->desc.backend = &job->backend;
    }
    job->level = level;
    job->fn = fn;
    job->user = user;
    job->heap = heap;
    job->rank = rank;
    job->references = 1;
    snprintf(job->record, sizeof job->record, "%s", desc.record ? desc.record : "");
    st = llmpar__launch_places(job, error);
    LLMPAR__ZEROED(llmpar_threads_desc, threads);
    threads.ranks = ranks;
    threads.lockstep = desc.lockstep;
    threads.deadline = desc.deadline;
    threads.unchecked = desc.unchecked;
    threads.crowded = job->crowded;
    if (!st) st = llmpar_threads_world_create(&job->heap, &threads, &job->world, error);
    if (st) {
        llmpar__launch_leave(job);
        return st;
    }
    for (int32_t i = 0; i < ranks; i++) {
        llmpar_ctx *ctx = &rank[i].ctx;
        rank[i].job = job;
        ctx->rank = i;
        ctx->world = ranks;
        ctx->local_rank = i;
        llmpar_heap_init(&ctx->heap, desc.allocator);
        llmpar_error_clear(&ctx->error);
        ctx->error.rank = i;
        ctx->log = desc.log;
        ctx->log_user = desc.log_user;
        ctx->io = desc.io;
    }

    if (ranks == 1) {
        uint64_t state = llmpar__float_state(LLMPAR__FLOAT_STATE);
        llmpar__processors before;
        if (job->processors) llmpar__processors_allowed(&before);
        llmpar__launch_run(&rank[0]);
        if (job->processors) llmpar__processors_stay(&before);
        llmpar__float_state(state);
        started = 1;
    } else {
        pthread_attr_t attributes;
        int failed = pthread_attr_init(&attributes);
        if (!failed) {
            pthread_attr_setstacksize(&attributes, LLMPAR__LAUNCH_STACK);
            while (started < ranks && !failed) {
                __atomic_add_fetch(&job->references, 1, __ATOMIC_ACQ_REL);
                failed = pthread_create(&rank[started].thread, &attributes, llmpar__launch_thread, &rank[started]);
                if (failed) __atomic_sub_fetch(&job->references, 1, __ATOMIC_ACQ_REL);
                else started++;
            }
            pthread_attr_destroy(&attributes);
        }
        if (failed) {
            LLMPAR__NO_ERROR(broken);
            llmpar_error_set(&broken, LLMPAR_ERR_INTERNAL, "launch: thread %d of %d could not be started: %s", (int)started, (int)ranks, strerror(failed));
            broken.rank = started;
            llmpar_threads_world_fail(job->world, &broken);
            for (int32_t i = started; i < ranks; i++) llmpar_threads_rank_finished(job->world, i);
        }
        for (int32_t i = 0; i < started; i++) {
            rank[i].stuck = !llmpar_threads_rank_wait(job->world, i);
            stuck += rank[i].stuck;
            if (!rank[i].stuck) pthread_join(rank[i].thread, NULL);
        }
        for (int32_t i = 0; i < started && stuck; i++)
            if (rank[i].stuck) {
                llmpar__launch_dump_stuck(job->record, &rank[i].ctx, job->world);
                pthread_detach(rank[i].thread);
            }
    }
    for (int32_t i = 0; i < started && desc.check; i++)
        if (!rank[i].stuck) desc.check(&rank[i].ctx, user);
    llmpar_threads_world_error(job->world, error);
    for (int32_t i = 0; i < started && error->status; i++)
        if (!rank[i].stuck && rank[i].returned) llmpar__launch_write(job->record, &rank[i].ctx, rank[i].returned);
    if (stuck) llmpar__launch_stuck(job, error, started);
    llmpar__launch_leave(job);
    return error->status;
}

#undef LLMPAR__LAUNCH_STACK
#undef LLMPAR__LAUNCH_MAX_RANKS
#undef LLMPAR__LAUNCH_DEADLINE
#undef LLMPAR__LAUNCH_PATH
