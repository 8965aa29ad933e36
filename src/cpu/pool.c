/* pool: a few persistent worker threads of one rank. A run is a counter that everybody takes tasks from; the caller's thread is worker 0.
   Waiting spins for some microseconds (a run is often followed by the next) and then sleeps; where there are more threads than processors it sleeps almost at once. */
#include "base/clock_internal.h"
#include "base/float_state_internal.h"
#include "base/processors_internal.h"
#include "cpu/cpu_internal.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#if defined(__linux__)
#include <sys/prctl.h>
#endif

#define LLMPAR__POOL_SPINS 1000 /* 15 to 60 us: most of what a rank does alone between two runs is over by then, and waking a thread takes as long */
#define LLMPAR__POOL_CROWDED_SPINS 20
#define LLMPAR__POOL_STACK ((size_t)2 << 20) /* musl's default of 128 KiB is too little for tiles on the stack */

typedef struct llmpar__pool_worker {
    struct llmpar__pool *pool;
    pthread_t thread;
    int32_t index;  /* 1 .. threads - 1 */
    char name[16];
} llmpar__pool_worker;

struct llmpar__pool {
    const llmpar__cpu *cpu;
    llmpar__pool_worker *workers; /* [threads - 1]; owned */
    int32_t threads, started, spins;
    pthread_mutex_t mutex;
    pthread_cond_t start, done;
    /* the current run: written by the caller before `generation` moves, constant until `active` is 0 again */
    void (*fn)(void *arg, int64_t task, int32_t worker);
    void *arg;
    int64_t tasks;
    int stop;           /* instead of a run */
    /* atomic */
    int64_t next;       /* first task nobody has taken */
    uint32_t generation;
    int32_t active;     /* workers that have not finished the current run */
    int32_t busy;       /* a run is on: the rank's thread and the stream with the pool may come at the same time */
};

LLMPAR__PRIVATE_DEF void llmpar__thread_get_name(char name[16])
{
    name[0] = 0;
#if defined(__linux__)
    prctl(PR_GET_NAME, name, 0, 0, 0);
#else
    pthread_getname_np(pthread_self(), name, 16);
#endif
    name[15] = 0;
}

/* The system keeps 15 characters, so a long base is cut. */
LLMPAR__PRIVATE_DEF void llmpar__thread_make_name(char name[16], const char base[16], const char *suffix)
{
    size_t length = strlen(base), suffix_length = strlen(suffix);
    if (suffix_length > 14) suffix_length = 14;
    if (length > 14 - suffix_length) length = 14 - suffix_length;
    memcpy(name, base, length);
    name[length] = ' ';
    memcpy(name + length + 1, suffix, suffix_length);
    name[length + 1 + suffix_length] = 0;
}

LLMPAR__PRIVATE_DEF void llmpar__thread_begin(const char *name)
{
#if defined(__linux__)
    prctl(PR_SET_NAME, name, 0, 0, 0);
#else
    pthread_setname_np(name);
#endif
    llmpar__float_state(LLMPAR__FLOAT_STATE);
}

LLMPAR__PRIVATE_DEF void llmpar__thread_place(const llmpar__cpu *cpu, int32_t worker)
{
    llmpar__processors all;
    if (!cpu->processors) return;
    if (worker >= 0) {
        llmpar__processors_stay_on(cpu->processors[worker]);
        return;
    }
    memset(&all, 0, sizeof all);
    for (int32_t i = 0; i < cpu->threads; i++) all.mask[cpu->processors[i] / 64] |= (uint64_t)1 << (cpu->processors[i] % 64);
    llmpar__processors_stay(&all);
}

static void llmpar__pool_take(struct llmpar__pool *pool, int32_t worker)
{
    for (;;) {
        int64_t task = __atomic_fetch_add(&pool->next, 1, __ATOMIC_RELAXED);
        if (task >= pool->tasks) return;
        pool->fn(pool->arg, task, worker);
    }
}

static void *llmpar__pool_main(void *arg)
{
    llmpar__pool_worker *self = (llmpar__pool_worker *)arg;
    struct llmpar__pool *pool = self->pool;
    uint32_t seen = 0;
    llmpar__thread_begin(self->name);
    llmpar__thread_place(pool->cpu, self->index);
    for (;;) {
        int spins = 0;
        while (__atomic_load_n(&pool->generation, __ATOMIC_ACQUIRE) == seen && spins++ < pool->spins) llmpar__clock_pause();
        if (__atomic_load_n(&pool->generation, __ATOMIC_ACQUIRE) == seen) {
            pthread_mutex_lock(&pool->mutex);
            while (__atomic_load_n(&pool->generation, __ATOMIC_ACQUIRE) == seen) pthread_cond_wait(&pool->start, &pool->mutex);
            pthread_mutex_unlock(&pool->mutex);
        }
        seen++;
        if (pool->stop) return NULL;
        llmpar__pool_take(pool, self->index);
        if (__atomic_sub_fetch(&pool->active, 1, __ATOMIC_ACQ_REL) == 0) {
            pthread_mutex_lock(&pool->mutex); /* so that the caller is either before its test of `active` or asleep */
            pthread_cond_signal(&pool->done);
            pthread_mutex_unlock(&pool->mutex);
        }
    }
}

/* Everybody leaves the wait for the next generation. */
static void llmpar__pool_release(struct llmpar__pool *pool)
{
    pthread_mutex_lock(&pool->mutex);
    __atomic_add_fetch(&pool->generation, 1u, __ATOMIC_ACQ_REL);
    pthread_cond_broadcast(&pool->start);
    pthread_mutex_unlock(&pool->mutex);
}

LLMPAR__PRIVATE_DEF void llmpar__pool_destroy(struct llmpar__pool *pool)
{
    int32_t i;
    if (!pool) return;
    pool->stop = 1;
    llmpar__pool_release(pool);
    for (i = 0; i < pool->started; i++) pthread_join(pool->workers[i].thread, NULL);
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->start);
    pthread_mutex_destroy(&pool->mutex);
    llmpar_heap_free(pool->cpu->heap, pool->workers);
    llmpar_heap_free(pool->cpu->heap, pool);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__pool_create(llmpar__cpu *cpu, llmpar_error *error, struct llmpar__pool **out)
{
    llmpar_heap *heap = cpu->heap;
    int32_t threads = cpu->threads;
    struct llmpar__pool *pool = LLMPAR__ZALLOC(struct llmpar__pool, heap, 1);
    llmpar__pool_worker *workers = pool ? LLMPAR__ZALLOC(llmpar__pool_worker, heap, (size_t)(threads - 1)) : NULL;
    pthread_attr_t attributes;
    char base[16], suffix[16];
    int32_t i;
    int failed = 0;
    *out = NULL;
    if (!workers) {
        llmpar_heap_free(heap, pool);
        return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "cpu: no memory for a pool of %d threads", (int)threads);
    }
    pool->cpu = cpu;
    pool->spins = cpu->crowded ? LLMPAR__POOL_CROWDED_SPINS : LLMPAR__POOL_SPINS;
    pool->threads = threads;
    pool->workers = workers;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->start, NULL);
    pthread_cond_init(&pool->done, NULL);
    llmpar__thread_get_name(base);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, LLMPAR__POOL_STACK);
    for (i = 0; i < threads - 1 && !failed; i++) {
        llmpar__pool_worker *worker = &pool->workers[i];
        worker->pool = pool;
        worker->index = i + 1;
        snprintf(suffix, sizeof suffix, "w%d", (int)(i + 1));
        llmpar__thread_make_name(worker->name, base, suffix);
        failed = pthread_create(&worker->thread, &attributes, llmpar__pool_main, worker);
        if (!failed) pool->started++;
    }
    pthread_attr_destroy(&attributes);
    if (failed) {
        llmpar_error_set(error, LLMPAR_ERR_MEMORY, "cpu: the system refused worker thread %d of %d: %s", (int)(pool->started + 1), (int)(threads - 1), strerror(failed));
        llmpar__pool_destroy(pool);
        return LLMPAR_ERR_MEMORY;
    }
    *out = pool;
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF void llmpar__pool_run(llmpar__cpu *cpu, void (*fn)(void *arg, int64_t task, int32_t worker), void *arg, int64_t tasks)
{
    struct llmpar__pool *pool = cpu->pool;
    int spins = 0;
    if (!pool || tasks <= 1 || __atomic_exchange_n(&pool->busy, 1, __ATOMIC_ACQUIRE)) {
        int64_t task;
        for (task = 0; task < tasks; task++) fn(arg, task, 0);
        return;
    }
    pool->fn = fn;
    pool->arg = arg;
    pool->tasks = tasks;
    __atomic_store_n(&pool->next, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&pool->active, pool->threads - 1, __ATOMIC_RELAXED);
    llmpar__pool_release(pool);
    llmpar__pool_take(pool, 0);
    while (__atomic_load_n(&pool->active, __ATOMIC_ACQUIRE) && spins++ < pool->spins) llmpar__clock_pause();
    if (__atomic_load_n(&pool->active, __ATOMIC_ACQUIRE)) {
        pthread_mutex_lock(&pool->mutex);
        while (__atomic_load_n(&pool->active, __ATOMIC_ACQUIRE)) pthread_cond_wait(&pool->done, &pool->mutex);
        pthread_mutex_unlock(&pool->mutex);
    }
    __atomic_store_n(&pool->busy, 0, __ATOMIC_RELEASE);
}

LLMPAR__PRIVATE_DEF int32_t llmpar__pool_threads(const llmpar__cpu *cpu)
{
    return cpu->pool ? cpu->pool->threads : 1;
}

#undef LLMPAR__POOL_SPINS
#undef LLMPAR__POOL_CROWDED_SPINS
#undef LLMPAR__POOL_STACK
