/* stream: streams with threads of their own. What is enqueued on such a stream waits in a ring, and the stream's thread runs it in order:

     ring   | .. done .. | item | item | wait for (stream, position) | item | .. free .. |
                          ^ head: what the thread is at                       ^ tail: where the rank's thread adds

   Positions count bytes since the ring began and never go back, so an event is a stream and its tail when it was recorded; it has completed when the head is there. An item is a function with a copy of its
   arguments. One lock of the device, and two conditions a stream (there is work; the head has moved to where somebody wants it): nothing polls. Only the rank's thread adds, and it waits where the ring is
   full. An item larger than half of the ring, a product of very many segments, waits for the ring to be empty and then gets a larger one.

   Failure. It sticks to the stream: what comes behind is dropped, so that the head goes on and nobody who waits for it hangs. The text stays in the stream's own error until the rank's thread
   sees the failure, in a call or a wait, and takes it over into the rank's error; whoever waits on another stream takes it over there.

   A thread sees the device through a view: a copy of the table whose error is the stream's and whose worker pool is there for one stream only, the first that got a thread (operations of the others run on their
   thread alone, with the same bits). A stream's struct stays with the device when the stream is destroyed and serves the next one, so what still names it finds a position that has been reached. */
#include "cpu/cpu_internal.h"

#include <pthread.h>
#include <string.h>

#define LLMPAR__STREAM_RING 65536u           /* bytes, a power of two */
#define LLMPAR__STREAM_GRAIN 32u             /* items begin at its multiples: at least a header fits before the ring's end */
#define LLMPAR__STREAM_STACK ((size_t)2 << 20) /* musl's default of 128 KiB is too little for tiles on the stack */
#define LLMPAR__STREAM_NOBODY UINT64_MAX

typedef enum llmpar__stream_kind { LLMPAR__STREAM_RUN, LLMPAR__STREAM_WAIT, LLMPAR__STREAM_REST } llmpar__stream_kind; /* REST: of the ring, nothing to do */

typedef struct llmpar__stream_item {
    llmpar__stream_fn run;
    uint32_t bytes, kind; /* bytes: with this header */
} llmpar__stream_item;    /* the arguments follow */

/* What a WAIT waits for. */
typedef struct llmpar__stream_target {
    struct llmpar__queue *queue;
    uint64_t position;
} llmpar__stream_target;

struct llmpar__queue {
    struct llmpar__queue *next;     /* of the device's list */
    struct llmpar__queues *all;
    llmpar_device *device, view;
    llmpar__cpu cpu;                /* the view's state */
    llmpar_error error;             /* the view's; its thread's while an item runs, under the lock once `status` is set */
    pthread_t thread, self;         /* self: written by the thread */
    char name[16];
    int32_t alive, known;           /* known: self is written */
    /* under the lock */
    pthread_cond_t work, moved;
    unsigned char *ring;
    uint64_t capacity, head, tail;
    uint64_t wanted;                /* the lowest position that somebody waits for */
    uint64_t failed_at;             /* end of the item that failed */
    llmpar_status status;           /* sticks */
    int32_t stop;
};

/* The streams with threads of one device. */
struct llmpar__queues {
    pthread_mutex_t lock;
    struct llmpar__queue *first;
    struct llmpar__queue *pool_owner; /* has the worker pool */
    llmpar__stream_target host;       /* what the rank's own thread waits for; queue NULL: it runs */
};

static uint64_t llmpar__stream_round(uint64_t bytes, uint64_t to) { return (bytes + to - 1) / to * to; }

static llmpar__stream_item *llmpar__stream_at(const struct llmpar__queue *q, uint64_t position)
{
    return (llmpar__stream_item *)(void *)(q->ring + (position & (q->capacity - 1)));
}

/* ---- waiting: under the lock ---- */

static void llmpar__stream_until(struct llmpar__queue *q, uint64_t position)
{
    while (q->head < position) {
        if (position < q->wanted) q->wanted = position;
        pthread_cond_wait(&q->moved, &q->all->lock);
    }
}

/* The same for the rank's own thread. */
static void llmpar__stream_host_until(struct llmpar__queue *q, uint64_t position)
{
    q->all->host.queue = q;
    q->all->host.position = position;
    llmpar__stream_until(q, position);
    q->all->host.queue = NULL;
}

static void llmpar__stream_advance(struct llmpar__queue *q, uint64_t to)
{
    q->head = to;
    if (to < q->wanted) return;
    q->wanted = LLMPAR__STREAM_NOBODY; /* who wants more says so again */
    pthread_cond_broadcast(&q->moved);
}

static llmpar_status llmpar__stream_failed(const struct llmpar__queue *q, uint64_t position) { return q->status && q->failed_at <= position ? q->status : LLMPAR_OK; }

/* The failure of a stream becomes text of `error`, unless one is there; the place of the rank stays. */
static void llmpar__stream_take(const struct llmpar__queue *q, llmpar_error *error)
{
    llmpar_error taken = q->error;
    if (!error || error->status != LLMPAR_OK || taken.status == LLMPAR_OK) return;
    if (error->where[0]) memcpy(taken.where, error->where, sizeof taken.where);
    if (error->rank >= 0) taken.rank = error->rank;
    *error = taken;
}

/* ---- the thread ---- */

static void *llmpar__stream_main(void *arg)
{
    struct llmpar__queue *q = (struct llmpar__queue *)arg;
    llmpar__thread_begin(q->name);
    llmpar__thread_place(&q->cpu, q->cpu.pool ? 0 : -1); /* with the pool comes the place of its first worker */
    pthread_mutex_lock(&q->all->lock);
    q->self = pthread_self();
    q->known = 1;
    for (;;) {
        while (q->head == q->tail && !q->stop) pthread_cond_wait(&q->work, &q->all->lock);
        if (q->head == q->tail) break;
        if (q->status) {
            llmpar__stream_advance(q, q->tail);
            continue;
        }
        llmpar__stream_item *item = llmpar__stream_at(q, q->head);
        uint64_t end = q->head + item->bytes;
        llmpar_status status = LLMPAR_OK;
        if (item->kind == LLMPAR__STREAM_WAIT) {
            const llmpar__stream_target *target = (const llmpar__stream_target *)(const void *)(item + 1);
            llmpar__stream_until(target->queue, target->position);
            status = llmpar__stream_failed(target->queue, target->position);
            if (status) llmpar__stream_take(target->queue, &q->error);
        } else if (item->kind == LLMPAR__STREAM_RUN) {
            pthread_mutex_unlock(&q->all->lock);
            status = item->run(&q->view, item + 1);
            pthread_mutex_lock(&q->all->lock);
        }
        if (status) {
            q->status = status;
            q->failed_at = end;
        }
        llmpar__stream_advance(q, end);
    }
    pthread_mutex_unlock(&q->all->lock);
    return NULL;
}

/* ---- what the rank's thread does ---- */

/* Under the lock: room for `bytes` in a row at the tail. */
static llmpar_status llmpar__stream_room(struct llmpar__queue *q, uint64_t bytes)
{
    if (bytes > q->capacity / 2) {
        uint64_t capacity = q->capacity;
        while (bytes > capacity / 2) capacity *= 2;
        unsigned char *ring = LLMPAR__ALLOC(unsigned char, q->cpu.heap, (size_t)capacity);
        if (!ring) return llmpar_error_set(q->device->error, LLMPAR_ERR_MEMORY, "cpu stream %s: no memory for %llu bytes of arguments", q->name, (unsigned long long)bytes);
        llmpar__stream_host_until(q, q->tail);
        llmpar_heap_free(q->cpu.heap, q->ring);
        q->ring = ring;
        q->capacity = capacity;
    }
    uint64_t rest = q->capacity - (q->tail & (q->capacity - 1)), total = rest < bytes ? rest + bytes : bytes;
    if (q->tail + total > q->capacity) llmpar__stream_host_until(q, q->tail + total - q->capacity);
    if (rest < bytes) {
        llmpar__stream_item *item = llmpar__stream_at(q, q->tail);
        item->run = NULL;
        item->bytes = (uint32_t)rest;
        item->kind = LLMPAR__STREAM_REST;
        q->tail += rest;
    }
    return LLMPAR_OK;
}

/* Under the lock. */
static llmpar_status llmpar__stream_add(struct llmpar__queue *q, llmpar__stream_kind kind, llmpar__stream_fn run, const void *args, size_t bytes, const void *array, size_t array_bytes)
{
    size_t array_at = LLMPAR__STREAM_ARRAY_AT(bytes);
    llmpar_status status = q->status;
    if (status) {
        llmpar__stream_take(q, q->device->error);
        return status;
    }
    uint64_t total = llmpar__stream_round(sizeof(llmpar__stream_item) + array_at + array_bytes, LLMPAR__STREAM_GRAIN);
    status = total > UINT32_MAX / 4 ? llmpar_error_set(q->device->error, LLMPAR_ERR_OVERFLOW, "cpu stream %s: %llu bytes of arguments", q->name, (unsigned long long)total) : llmpar__stream_room(q, total);
    if (status) return status;
    llmpar__stream_item *item = llmpar__stream_at(q, q->tail);
    item->run = run;
    item->bytes = (uint32_t)total;
    item->kind = (uint32_t)kind;
    if (bytes) memcpy(item + 1, args, bytes);
    if (array_bytes) memcpy((unsigned char *)(item + 1) + array_at, array, array_bytes);
    q->tail += total;
    pthread_cond_signal(&q->work);
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__stream_push(struct llmpar__queue *q, llmpar__stream_fn run, const void *args, size_t bytes, const void *array, size_t array_bytes)
{
    pthread_mutex_lock(&q->all->lock);
    llmpar_status status = llmpar__stream_add(q, LLMPAR__STREAM_RUN, run, args, bytes, array, array_bytes);
    pthread_mutex_unlock(&q->all->lock);
    return status;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__stream_push_wait(struct llmpar__queue *q, struct llmpar__queue *other, uint64_t position)
{
    llmpar__stream_target target;
    llmpar_status status = LLMPAR_OK;
    target.queue = other;
    target.position = position;
    pthread_mutex_lock(&q->all->lock);
    if (q->status || (q != other && (other->head < position || llmpar__stream_failed(other, position)))) status = llmpar__stream_add(q, LLMPAR__STREAM_WAIT, NULL, &target, sizeof target, NULL, 0);
    pthread_mutex_unlock(&q->all->lock);
    return status;
}

LLMPAR__PRIVATE_DEF uint64_t llmpar__stream_tail(struct llmpar__queue *q, llmpar_status *status)
{
    uint64_t tail;
    pthread_mutex_lock(&q->all->lock);
    tail = q->tail;
    *status = q->status;
    if (q->status) llmpar__stream_take(q, q->device->error);
    pthread_mutex_unlock(&q->all->lock);
    return tail;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__stream_wait(struct llmpar__queue *q, uint64_t position)
{
    pthread_mutex_lock(&q->all->lock);
    llmpar__stream_host_until(q, position);
    llmpar_status status = llmpar__stream_failed(q, position);
    if (status) llmpar__stream_take(q, q->device->error);
    pthread_mutex_unlock(&q->all->lock);
    return status;
}

LLMPAR__PRIVATE_DEF void llmpar__stream_wait_all(const llmpar__cpu *cpu)
{
    struct llmpar__queue *q;
    if (!cpu->queues) return;
    pthread_mutex_lock(&cpu->queues->lock);
    for (q = cpu->queues->first; q; q = q->next) llmpar__stream_host_until(q, q->tail);
    pthread_mutex_unlock(&cpu->queues->lock);
}

/* ---- who is calling, and who runs ---- */

/* The rank's thread makes them while other ranks may ask who runs. */
static struct llmpar__queues *llmpar__stream_queues(const llmpar__cpu *cpu) { return __atomic_load_n(&cpu->queues, __ATOMIC_ACQUIRE); }

/* The stream whose thread this is; NULL: another one. */
static struct llmpar__queue *llmpar__stream_mine(const llmpar__cpu *cpu)
{
    struct llmpar__queues *all = llmpar__stream_queues(cpu);
    struct llmpar__queue *q;
    if (!all) return NULL;
    pthread_mutex_lock(&all->lock);
    for (q = all->first; q; q = q->next)
        if (q->known && pthread_equal(q->self, pthread_self())) break;
    pthread_mutex_unlock(&all->lock);
    return q;
}

LLMPAR__PRIVATE_DEF llmpar_device *llmpar__stream_view(llmpar_device *device)
{
    struct llmpar__queue *q = llmpar__stream_mine((const llmpar__cpu *)device->state);
    return q ? &q->view : device;
}

LLMPAR__PRIVATE_DEF llmpar_error *llmpar__stream_thread_error(llmpar_device *device)
{
    struct llmpar__queue *q = llmpar__stream_mine((const llmpar__cpu *)device->state);
    return q ? &q->error : NULL;
}

/* By what they wait for, not by whether they sleep: a thread that has been woken may not have come to run yet. */
LLMPAR__PRIVATE_DEF int32_t llmpar__stream_threads_running(llmpar_device *device)
{
    struct llmpar__queues *all = llmpar__stream_queues((const llmpar__cpu *)device->state);
    struct llmpar__queue *q;
    if (!all) return 1;
    pthread_mutex_lock(&all->lock);
    int32_t running = !all->host.queue || all->host.queue->head >= all->host.position;
    for (q = all->first; q; q = q->next) {
        if (q->head == q->tail) continue;
        const llmpar__stream_item *item = llmpar__stream_at(q, q->head);
        const llmpar__stream_target *target = (const llmpar__stream_target *)(const void *)(item + 1);
        if (item->kind != LLMPAR__STREAM_WAIT || target->queue->head >= target->position) running++;
    }
    pthread_mutex_unlock(&all->lock);
    return running;
}

/* ---- life ---- */

/* A struct that nothing uses, or a new one. */
static struct llmpar__queue *llmpar__stream_get(llmpar_heap *heap, struct llmpar__queues *all)
{
    struct llmpar__queue *q;
    for (q = all->first; q; q = q->next)
        if (!q->alive && !q->status) return q;
    q = LLMPAR__ZALLOC(struct llmpar__queue, heap, 1);
    if (!q) return NULL;
    q->ring = LLMPAR__ALLOC(unsigned char, heap, LLMPAR__STREAM_RING);
    if (!q->ring) {
        llmpar_heap_free(heap, q);
        return NULL;
    }
    q->all = all;
    q->capacity = LLMPAR__STREAM_RING;
    q->wanted = LLMPAR__STREAM_NOBODY;
    pthread_cond_init(&q->work, NULL);
    pthread_cond_init(&q->moved, NULL);
    pthread_mutex_lock(&all->lock);
    q->next = all->first;
    all->first = q;
    pthread_mutex_unlock(&all->lock);
    return q;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__stream_begin(llmpar_device *device, const char *name, struct llmpar__queue **out)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    struct llmpar__queue *q;
    pthread_attr_t attributes;
    char base[16];
    *out = NULL;
    if (!cpu->queues) {
        struct llmpar__queues *all = LLMPAR__ZALLOC(struct llmpar__queues, cpu->heap, 1);
        if (all) pthread_mutex_init(&all->lock, NULL);
        __atomic_store_n(&cpu->queues, all, __ATOMIC_RELEASE);
    }
    q = cpu->queues ? llmpar__stream_get(cpu->heap, cpu->queues) : NULL;
    if (!q) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "cpu: no memory for the thread of stream %s", name);
    if (!cpu->queues->pool_owner) cpu->queues->pool_owner = q;
    q->device = device;
    q->view = *device;
    q->view.error = &q->error;
    q->view.state = &q->cpu;
    q->cpu = *cpu;
    if (cpu->queues->pool_owner != q) q->cpu.pool = NULL;
    llmpar_error_clear(&q->error);
    if (device->error) {
        q->error.rank = device->error->rank;
        memcpy(q->error.where, device->error->where, sizeof q->error.where);
    }
    llmpar__thread_get_name(base);
    llmpar__thread_make_name(q->name, base, name);
    q->stop = 0; /* `known` is 0, and others read it */
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, LLMPAR__STREAM_STACK);
    int failed = pthread_create(&q->thread, &attributes, llmpar__stream_main, q);
    pthread_attr_destroy(&attributes);
    if (failed) {
        if (cpu->queues->pool_owner == q) cpu->queues->pool_owner = NULL;
        return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "cpu: the system refused a thread for stream %s: %s", name, strerror(failed));
    }
    q->alive = 1;
    *out = q;
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF void llmpar__stream_end(struct llmpar__queue *q)
{
    if (!q || !q->alive) return;
    pthread_mutex_lock(&q->all->lock);
    llmpar__stream_host_until(q, q->tail);
    q->stop = 1;
    pthread_cond_signal(&q->work);
    pthread_mutex_unlock(&q->all->lock);
    pthread_join(q->thread, NULL);
    pthread_mutex_lock(&q->all->lock);
    q->alive = q->known = 0;
    if (q->all->pool_owner == q) q->all->pool_owner = NULL;
    pthread_mutex_unlock(&q->all->lock);
}

LLMPAR__PRIVATE_DEF void llmpar__stream_end_all(llmpar__cpu *cpu)
{
    struct llmpar__queue *q, *next;
    if (!cpu->queues) return;
    for (q = cpu->queues->first; q; q = q->next) llmpar__stream_end(q);
    for (q = cpu->queues->first; q; q = next) {
        next = q->next;
        pthread_cond_destroy(&q->work);
        pthread_cond_destroy(&q->moved);
        llmpar_heap_free(cpu->heap, q->ring);
        llmpar_heap_free(cpu->heap, q);
    }
    pthread_mutex_destroy(&cpu->queues->lock);
    llmpar_heap_free(cpu->heap, cpu->queues);
    cpu->queues = NULL;
}

#undef LLMPAR__STREAM_RING
#undef LLMPAR__STREAM_GRAIN
#undef LLMPAR__STREAM_STACK
#undef LLMPAR__STREAM_NOBODY
