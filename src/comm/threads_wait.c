/* threads_wait: how rank threads wait for each other, and every way in which such a wait ends.

   A communicator has one word: completed barriers in the upper half, ranks that have arrived in the lower half. The last rank to arrive moves the upper half on, in one step.
   A rank that gives up (another rank failed, finished, or is late) takes its arrival back, also in one step, and only while the barrier is not complete. So either all ranks pass
   a barrier or none does, and whoever passed it may touch its peers' memory until the next one: they cannot have walked away.

   A wait looks at the word a few times, gives its processor away a few times (the rank it waits for may want it: that is four times faster than sleeping), and then sleeps on the
   communicator's condition variable: there may be many more ranks than processors. Everything slow (sleeping, failing,
   the report of who is where, splits) is under one lock of the world; a barrier that completes without a sleeper takes no lock at all.

   Lockstep: the ranks hand on a turn, 0, 1, .., n-1, 0, ..; a waiting rank looks once, and if it cannot go on it passes the turn. When the turn has gone round twice and nobody got
   further, nobody ever will: that is reported as what each rank waits for. */
#include "comm/threads_internal.h"

#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define LLMPAR__THREADS_YIELDS 4

static double llmpar__threads_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void llmpar__threads_pause(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    __asm__ __volatile__("yield");
#endif
}

LLMPAR__PRIVATE_DEF const char *llmpar__threads_kind_name(llmpar__threads_kind kind)
{
    static const char *const names[] = { "barrier", "all_gather", "reduce_scatter", "all_reduce", "broadcast", "all_to_all", "send", "recv", "split", "split" };
    return names[kind];
}

/* World. */

static void llmpar__threads_broadcast_all(llmpar_threads_world *world)
{
    for (llmpar__threads_group *g = world->groups; g; g = g->next) pthread_cond_broadcast(&g->wake);
}

static int llmpar__threads_cond_init(pthread_cond_t *cond)
{
    pthread_condattr_t attributes;
    if (pthread_condattr_init(&attributes)) return 0;
#if !defined(__APPLE__)
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
#endif
    int failed = pthread_cond_init(cond, &attributes);
    pthread_condattr_destroy(&attributes);
    return !failed;
}

LLMPAR_DEF llmpar_status llmpar_threads_world_create(llmpar_heap *heap, const llmpar_threads_desc *desc, llmpar_threads_world **out, llmpar_error *error)
{
    *out = NULL;
    if (desc->ranks < 1) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "threads: ranks = %d, expected at least 1", (int)desc->ranks);
    if (!(desc->deadline >= 0)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "threads: deadline = %g seconds, expected 0 (none) or more", desc->deadline);
    llmpar_threads_world *world = (llmpar_threads_world *)llmpar_heap_zalloc(heap, 1, sizeof *world);
    if (!world) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "threads: out of memory for %d ranks", (int)desc->ranks);
    world->heap = heap;
    world->desc = *desc;
    llmpar_error_clear(&world->failure);
    pthread_mutex_init(&world->lock, NULL);
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    world->spins = processors >= desc->ranks ? 30 : 4;
    world->rank = (llmpar__threads_rank *)llmpar_heap_zalloc(heap, (size_t)desc->ranks, sizeof *world->rank);
    int32_t *all = (int32_t *)llmpar_heap_alloc(heap, (size_t)desc->ranks, sizeof *all);
    if (world->rank)
        for (int32_t i = 0; i < desc->ranks; i++) llmpar__threads_cond_init(&world->rank[i].turn);
    if (world->rank && all) {
        for (int32_t i = 0; i < desc->ranks; i++) all[i] = i;
        world->world_group = llmpar__threads_group_create(world, desc->ranks, all, "world");
    }
    llmpar_heap_free(heap, all);
    if (!world->world_group) {
        llmpar_threads_world_destroy(world);
        return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "threads: out of memory for %d ranks", (int)desc->ranks);
    }
    *out = world;
    return LLMPAR_OK;
}

static void llmpar__threads_group_free(llmpar__threads_group *group)
{
    llmpar_heap *heap = group->world->heap;
    *group->link = group->next;
    if (group->next) group->next->link = group->link;
    pthread_cond_destroy(&group->wake);
    llmpar_heap_free(heap, group->world_rank);
    llmpar_heap_free(heap, group->arrived);
    llmpar_heap_free(heap, group->slots);
    llmpar_heap_free(heap, group->channels);
    llmpar_heap_free(heap, group);
}

LLMPAR_DEF void llmpar_threads_world_destroy(llmpar_threads_world *world)
{
    if (!world) return;
    while (world->groups) llmpar__threads_group_free(world->groups);
    if (world->rank)
        for (int32_t i = 0; i < world->desc.ranks; i++) pthread_cond_destroy(&world->rank[i].turn);
    pthread_mutex_destroy(&world->lock);
    llmpar_heap_free(world->heap, world->rank);
    llmpar_heap_free(world->heap, world);
}

LLMPAR_DEF void llmpar_threads_world_error(llmpar_threads_world *world, llmpar_error *out)
{
    pthread_mutex_lock(&world->lock);
    *out = world->failure;
    pthread_mutex_unlock(&world->lock);
}

/* Under the lock. */
static void llmpar__threads_record(llmpar_threads_world *world, const llmpar_error *error)
{
    if (world->failure.status == LLMPAR_OK) {
        world->failure = *error;
        if (error->status == LLMPAR_OK || error->status == LLMPAR_ERR_PEER) world->failure.status = LLMPAR_ERR_INTERNAL; /* a root error is neither */
    }
    __atomic_store_n(&world->aborted, 1, __ATOMIC_SEQ_CST);
    llmpar__threads_broadcast_all(world);
}

LLMPAR_DEF void llmpar_threads_world_fail(llmpar_threads_world *world, const llmpar_error *error)
{
    pthread_mutex_lock(&world->lock);
    llmpar__threads_record(world, error);
    pthread_mutex_unlock(&world->lock);
}

/* Groups. */

LLMPAR__PRIVATE_DEF llmpar__threads_group *llmpar__threads_group_create(llmpar_threads_world *world, int32_t ranks, const int32_t *world_rank, const char *axis)
{
    pthread_mutex_lock(&world->lock);
    llmpar_heap *heap = world->heap;
    llmpar__threads_group *group = (llmpar__threads_group *)llmpar_heap_zalloc(heap, 1, sizeof *group);
    if (group) {
        group->world = world;
        group->ranks = group->references = ranks;
        group->next = world->groups;
        group->link = &world->groups;
        if (group->next) group->next->link = &group->next;
        world->groups = group;
        snprintf(group->axis, sizeof group->axis, "%.23s", axis);
        llmpar__threads_cond_init(&group->wake);
        group->world_rank = (int32_t *)llmpar_heap_alloc(heap, (size_t)ranks, sizeof *group->world_rank);
        group->arrived = (uint32_t *)llmpar_heap_zalloc(heap, (size_t)ranks, sizeof *group->arrived);
        group->slots = (llmpar__threads_slot *)llmpar_heap_zalloc(heap, 2 * (size_t)ranks, sizeof *group->slots);
        if (group->world_rank && group->arrived && group->slots) {
            memcpy(group->world_rank, world_rank, (size_t)ranks * sizeof *world_rank);
        } else {
            llmpar__threads_group_free(group);
            group = NULL;
        }
    }
    pthread_mutex_unlock(&world->lock);
    return group;
}

LLMPAR__PRIVATE_DEF void llmpar__threads_group_release(llmpar__threads_group *group)
{
    llmpar_threads_world *world = group->world;
    pthread_mutex_lock(&world->lock);
    if (--group->references == 0) llmpar__threads_group_free(group);
    pthread_mutex_unlock(&world->lock);
}

/* Failing. */

LLMPAR__PRIVATE_DEF llmpar_status llmpar__threads_failed(llmpar__threads_comm *tc, llmpar_status status)
{
    if (tc->comm.error->rank < 0) tc->comm.error->rank = tc->world_rank;
    if (status != LLMPAR_ERR_PEER) {
        llmpar_error error = *tc->comm.error;
        error.status = status;
        error.rank = tc->world_rank;
        llmpar_threads_world_fail(tc->world, &error);
    }
    return status;
}

/* "all_reduce "layers.1/x" (call 12 on tp)"; number 0: send or recv. */
static void llmpar__threads_describe(char *text, size_t capacity, const llmpar__threads_group *group, const llmpar__threads_call *call, uint32_t number)
{
    const char *name = llmpar__threads_kind_name(call->kind);
    if (number) snprintf(text, capacity, "%s \"%s\" (call %u on %s)", name, call->tag, (unsigned)number, group->axis);
    else snprintf(text, capacity, "%s \"%s\" (%s rank %d of %s)", name, call->tag, call->kind == LLMPAR__THREADS_SEND ? "to" : "from", (int)call->peer, group->axis);
}

/* Under the lock: "rank 0: in all_reduce .., rank 1: not in a collective, ..": all ranks of the world, as far as the text holds. */
static void llmpar__threads_who(char *text, size_t capacity, const llmpar_threads_world *world, const llmpar__threads_group *group)
{
    size_t used = 0;
    text[0] = 0;
    for (int32_t i = 0; i < world->desc.ranks && used + 24 < capacity; i++) {
        const llmpar__threads_rank *r = &world->rank[i];
        char where[160];
        if (r->group) {
            llmpar__threads_describe(where, sizeof where, r->group, r->call, r->number);
        } else {
            int32_t member = 0;
            while (member < group->ranks && group->world_rank[member] != i) member++;
            if (__atomic_load_n(&r->finished, __ATOMIC_SEQ_CST)) snprintf(where, sizeof where, "has returned");
            else if (member < group->ranks) snprintf(where, sizeof where, "outside, has begun %u calls on %s", (unsigned)__atomic_load_n(&group->arrived[member], __ATOMIC_SEQ_CST), group->axis);
            else snprintf(where, sizeof where, "outside");
        }
        int n = snprintf(text + used, capacity - used, "%srank %d: %s", i ? "; " : "", (int)i, where);
        used += n > 0 ? (size_t)n : 0;
    }
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__threads_check(llmpar__threads_comm *tc, const llmpar__threads_call *call)
{
    if (!__atomic_load_n(&tc->world->aborted, __ATOMIC_SEQ_CST)) return LLMPAR_OK;
    llmpar_error failure;
    llmpar_threads_world_error(tc->world, &failure);
    return llmpar_error_set(tc->comm.error, LLMPAR_ERR_PEER, "%s \"%s\" on %s: rank %d%s%s%s failed: %s: %s", llmpar__threads_kind_name(call->kind), call->tag, tc->group->axis, (int)failure.rank,
                            failure.where[0] ? " (" : "", failure.where, failure.where[0] ? ")" : "", llmpar_status_string(failure.status), failure.text);
}

/* The general wait. */

typedef struct llmpar__threads_wait {
    uint64_t *word;                    /* atomic */
    uint32_t high;                     /* the wait is for the upper half of *word to become another */
    uint32_t number;                   /* of the collective; 0 for send and recv */
    int32_t peer;                      /* index in the group, -1: all that have not come to call `number` */
    int32_t abortable;
    const llmpar__threads_call *call;
} llmpar__threads_wait;

typedef enum llmpar__threads_outcome { LLMPAR__THREADS_READY, LLMPAR__THREADS_ABORTED, LLMPAR__THREADS_GONE, LLMPAR__THREADS_LATE, LLMPAR__THREADS_STUCK } llmpar__threads_outcome;

static int llmpar__threads_ready(const llmpar__threads_wait *wait)
{
    return (uint32_t)(__atomic_load_n(wait->word, __ATOMIC_SEQ_CST) >> 32) != wait->high;
}

/* A peer that returned from its function without coming to this call, or -1. */
static int32_t llmpar__threads_gone(const llmpar__threads_comm *tc, const llmpar__threads_wait *wait)
{
    const llmpar__threads_group *group = tc->group;
    for (int32_t i = 0; i < group->ranks; i++) {
        if (wait->peer >= 0 && i != wait->peer) continue;
        if (!__atomic_load_n(&tc->world->rank[group->world_rank[i]].finished, __ATOMIC_SEQ_CST)) continue;
        /* It finished: whether it came to this call before is settled now. */
        if (wait->peer >= 0 ? !llmpar__threads_ready(wait) : (int32_t)(wait->number - __atomic_load_n(&group->arrived[i], __ATOMIC_SEQ_CST)) > 0) return i;
    }
    return -1;
}

/* Hands the turn to the next rank that still runs. Under the lock. */
static void llmpar__threads_pass_turn(llmpar_threads_world *world)
{
    for (int32_t i = 0; i < world->desc.ranks; i++) {
        world->turn = world->turn + 1 == world->desc.ranks ? 0 : world->turn + 1;
        if (!__atomic_load_n(&world->rank[world->turn].finished, __ATOMIC_SEQ_CST)) break;
    }
    pthread_cond_signal(&world->rank[world->turn].turn);
}

static void llmpar__threads_take_turn(llmpar_threads_world *world, int32_t rank)
{
    while (world->turn != rank) pthread_cond_wait(&world->rank[rank].turn, &world->lock);
}

/* Under the lock, one look a turn. */
static llmpar__threads_outcome llmpar__threads_wait_lockstep(llmpar__threads_comm *tc, const llmpar__threads_wait *wait)
{
    llmpar_threads_world *world = tc->world;
    for (;;) {
        if (llmpar__threads_ready(wait)) {
            world->idle_turns = 0;
            return LLMPAR__THREADS_READY;
        }
        if (wait->abortable) {
            if (__atomic_load_n(&world->aborted, __ATOMIC_SEQ_CST)) return LLMPAR__THREADS_ABORTED;
            if (llmpar__threads_gone(tc, wait) >= 0) return LLMPAR__THREADS_GONE;
            if (world->idle_turns > 2 * world->desc.ranks) return LLMPAR__THREADS_STUCK;
        }
        world->idle_turns++;
        llmpar__threads_pass_turn(world);
        llmpar__threads_take_turn(world, tc->world_rank);
    }
}

/* Under the lock. */
static llmpar__threads_outcome llmpar__threads_wait_asleep(llmpar__threads_comm *tc, const llmpar__threads_wait *wait)
{
    llmpar_threads_world *world = tc->world;
    llmpar__threads_group *group = tc->group;
    double limit = wait->abortable && world->desc.deadline > 0 ? llmpar__threads_now() + world->desc.deadline : 0;
    for (;;) {
        if (llmpar__threads_ready(wait)) return LLMPAR__THREADS_READY;
        if (wait->abortable) {
            if (__atomic_load_n(&world->aborted, __ATOMIC_SEQ_CST)) return LLMPAR__THREADS_ABORTED;
            if (llmpar__threads_gone(tc, wait) >= 0) return LLMPAR__THREADS_GONE;
            if (limit > 0 && llmpar__threads_now() >= limit) return LLMPAR__THREADS_LATE;
        }
        if (limit > 0) {
            struct timespec until;
#if defined(__APPLE__)
            clock_gettime(CLOCK_REALTIME, &until);
#else
            clock_gettime(CLOCK_MONOTONIC, &until);
#endif
            double rest = limit - llmpar__threads_now();
            if (rest < 0) rest = 0;
            if (rest > 3600) rest = 3600; /* wakes up once an hour for nothing: no overflow of time_t */
            long nanoseconds = until.tv_nsec + (long)((rest - (double)(long)rest) * 1e9);
            until.tv_sec += (time_t)rest + nanoseconds / 1000000000;
            until.tv_nsec = nanoseconds % 1000000000;
            pthread_cond_timedwait(&group->wake, &world->lock, &until);
        } else {
            pthread_cond_wait(&group->wake, &world->lock);
        }
    }
}

/* Waits; the text of a failed wait goes to `text` while the lock still holds everybody in place. */
static llmpar__threads_outcome llmpar__threads_wait_for(llmpar__threads_comm *tc, const llmpar__threads_wait *wait, char *text, size_t capacity)
{
    llmpar_threads_world *world = tc->world;
    llmpar__threads_group *group = tc->group;
    if (!world->desc.lockstep)
        for (int32_t i = 0; i < world->spins + LLMPAR__THREADS_YIELDS; i++) {
            if (llmpar__threads_ready(wait)) return LLMPAR__THREADS_READY;
            if (i < world->spins) llmpar__threads_pause();
            else sched_yield();
        }
    pthread_mutex_lock(&world->lock);
    llmpar__threads_rank *self = &world->rank[tc->world_rank];
    self->group = group;
    self->call = wait->call;
    self->number = wait->number;
    __atomic_add_fetch(&group->sleepers, 1, __ATOMIC_SEQ_CST);
    llmpar__threads_outcome outcome = world->desc.lockstep ? llmpar__threads_wait_lockstep(tc, wait) : llmpar__threads_wait_asleep(tc, wait);
    __atomic_sub_fetch(&group->sleepers, 1, __ATOMIC_SEQ_CST);
    if (outcome != LLMPAR__THREADS_READY && outcome != LLMPAR__THREADS_ABORTED) {
        char what[192], who[448];
        llmpar__threads_describe(what, sizeof what, group, wait->call, wait->number);
        llmpar__threads_who(who, sizeof who, world, group);
        int32_t gone = outcome == LLMPAR__THREADS_GONE ? llmpar__threads_gone(tc, wait) : -1;
        if (gone >= 0) snprintf(text, capacity, "%s: rank %d has returned without it (%s)", what, (int)group->world_rank[gone], who);
        else if (outcome == LLMPAR__THREADS_STUCK) snprintf(text, capacity, "%s: nobody can go on (%s)", what, who);
        else snprintf(text, capacity, "%s: waited %g s for the other ranks (%s)", what, world->desc.deadline, who);
    }
    self->group = NULL;
    self->call = NULL;
    pthread_mutex_unlock(&world->lock);
    return outcome;
}

/* Wakes whoever sleeps on the group's words, after one of them was changed. */
static void llmpar__threads_wake(llmpar__threads_group *group)
{
    if (!__atomic_load_n(&group->sleepers, __ATOMIC_SEQ_CST)) return;
    pthread_mutex_lock(&group->world->lock);
    pthread_cond_broadcast(&group->wake);
    pthread_mutex_unlock(&group->world->lock);
}

/* The error of a wait that did not end well. */
static llmpar_status llmpar__threads_outcome_error(llmpar__threads_comm *tc, const llmpar__threads_wait *wait, llmpar__threads_outcome outcome, const char *text)
{
    if (outcome == LLMPAR__THREADS_ABORTED) return llmpar__threads_failed(tc, llmpar__threads_check(tc, wait->call));
    llmpar_status status = outcome == LLMPAR__THREADS_LATE ? LLMPAR_ERR_TIMEOUT : LLMPAR_ERR_MISMATCH;
    return llmpar__threads_failed(tc, llmpar_error_set(tc->comm.error, status, "%s", text));
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__threads_barrier(llmpar__threads_comm *tc, const llmpar__threads_call *call, int abortable)
{
    llmpar__threads_group *group = tc->group;
    uint64_t old = __atomic_load_n(&group->barrier, __ATOMIC_SEQ_CST);
    for (;;) {
        int last = (uint32_t)old + 1 == (uint32_t)group->ranks;
        uint64_t next = last ? ((old >> 32) + 1) << 32 : old + 1;
        if (!__atomic_compare_exchange_n(&group->barrier, &old, next, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) continue;
        if (!last) break;
        llmpar__threads_wake(group);
        return LLMPAR_OK;
    }
    llmpar__threads_wait wait;
    char text[700];
    wait.word = &group->barrier;
    wait.high = (uint32_t)(old >> 32);
    wait.number = tc->number;
    wait.peer = -1;
    wait.abortable = abortable;
    wait.call = call;
    llmpar__threads_outcome outcome = llmpar__threads_wait_for(tc, &wait, text, sizeof text);
    if (outcome == LLMPAR__THREADS_READY) return LLMPAR_OK;
    old = __atomic_load_n(&group->barrier, __ATOMIC_SEQ_CST);
    while ((uint32_t)(old >> 32) == wait.high)
        if (__atomic_compare_exchange_n(&group->barrier, &old, old - 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            return llmpar__threads_outcome_error(tc, &wait, outcome, text);
    return LLMPAR_OK; /* completed in the meantime after all */
}

LLMPAR__PRIVATE_DEF int llmpar__threads_step(llmpar__threads_comm *tc, llmpar__threads_channel *channel, uint32_t from, uint32_t to)
{
    uint64_t old = (uint64_t)from << 32;
    if (!__atomic_compare_exchange_n(&channel->phase, &old, (uint64_t)to << 32, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) return 0;
    llmpar__threads_wake(tc->group);
    return 1;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__threads_await(llmpar__threads_comm *tc, const llmpar__threads_call *call, llmpar__threads_channel *channel, uint32_t step, int32_t peer, int abortable)
{
    llmpar__threads_wait wait;
    char text[700];
    wait.word = &channel->phase;
    wait.high = step;
    wait.number = 0;
    wait.peer = peer;
    wait.abortable = abortable;
    wait.call = call;
    llmpar__threads_outcome outcome = llmpar__threads_wait_for(tc, &wait, text, sizeof text);
    if (outcome == LLMPAR__THREADS_READY) return LLMPAR_OK;
    if (!llmpar__threads_step(tc, channel, step, 0xffffffffu)) return LLMPAR_OK; /* moved on in the meantime after all */
    return llmpar__threads_outcome_error(tc, &wait, outcome, text);
}

/* The rank's life. */

LLMPAR__PRIVATE_DEF void llmpar__threads_first_turn(llmpar_threads_world *world, int32_t rank)
{
    if (!world->desc.lockstep) return;
    pthread_mutex_lock(&world->lock);
    llmpar__threads_take_turn(world, rank);
    world->idle_turns = 0;
    pthread_mutex_unlock(&world->lock);
}

LLMPAR_DEF void llmpar_threads_rank_finished(llmpar_threads_world *world, int32_t rank)
{
    pthread_mutex_lock(&world->lock);
    __atomic_store_n(&world->rank[rank].finished, 1, __ATOMIC_SEQ_CST);
    world->idle_turns = 0;
    if (world->desc.lockstep && world->turn == rank) llmpar__threads_pass_turn(world);
    llmpar__threads_broadcast_all(world);
    pthread_mutex_unlock(&world->lock);
}

#undef LLMPAR__THREADS_YIELDS
