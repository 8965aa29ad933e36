/* threads_wait: how rank threads wait for each other, and every way in which such a wait ends.

   A communicator has one word: completed barriers in the upper half, ranks that have arrived in the lower half. The last rank to arrive moves the upper half on, in one step.
   A rank that gives up (another rank failed, finished, or is late) takes its arrival back, also in one step, and only while the barrier is not complete. So either all ranks pass
   a barrier or none does, and whoever passed it may touch its peers' memory until the next one: they cannot have walked away.

   A wait looks at the word a few times, gives its processor away a few times (the rank it waits for may want it: that is four times faster than sleeping), and then sleeps on the
   communicator's condition variable: there may be many more ranks than processors. Everything slow (sleeping, failing,
   the report of who is where, splits) is under one lock of the world; a barrier that completes without a sleeper takes no lock at all.

   Nobody can go on: when every rank that has not finished is asleep and none of their words has moved, nothing ever will (only ranks move them). So calls on crossed communicators are
   reported at once by all, with what each waits for, and need no deadline. A rank whose streams have threads is asleep when each of its threads is, here or in its device. Nobody tells when the last one
   falls asleep in a device, so there the sleepers look once a second.

   Lockstep: the ranks hand on a turn, 0, 1, .., n-1, 0, ..; a waiting rank looks once, and if it cannot go on it passes the turn. When the turn has gone round twice and nobody got
   further, nobody ever will. */
#include "comm/threads_internal.h"

#include "base/clock_internal.h"

#include <sched.h>
#include <stdio.h>
#include <string.h>

#define LLMPAR__THREADS_YIELDS 4
#define LLMPAR__THREADS_SPINS 1000 /* 15 to 60 us: waking a thread takes as long */
#define LLMPAR__THREADS_GRACE 5.0 /* seconds after a failure in which no rank is given up */

LLMPAR__PRIVATE_DEF llmpar_error *llmpar__threads_error(llmpar__threads_comm *tc) { return llmpar_device_thread_error(tc->comm.device, tc->comm.error); }

/* World. */

static void llmpar__threads_broadcast_all(llmpar_threads_world *world)
{
    for (llmpar__threads_group *g = world->groups; g; g = g->next) pthread_cond_broadcast(&g->wake);
}

LLMPAR_DEF llmpar_status llmpar_threads_world_create(llmpar_heap *heap, const llmpar_threads_desc *desc, llmpar_threads_world **out, llmpar_error *error)
{
    *out = NULL;
    if (!desc) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "threads: no desc");
    if (desc->ranks < 1) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "threads: ranks = %d, expected at least 1", (int)desc->ranks);
    if (!(desc->deadline >= 0)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "threads: deadline = %g seconds, expected 0 (none) or more", desc->deadline);
    llmpar_threads_world *world = LLMPAR__ZALLOC(llmpar_threads_world, heap, 1);
    if (!world) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "threads: out of memory for %d ranks", (int)desc->ranks);
    world->heap = heap;
    world->desc = *desc;
    llmpar_error_clear(&world->failure);
    pthread_mutex_init(&world->lock, NULL);
    world->spins = desc->crowded ? 4 : LLMPAR__THREADS_SPINS;
    world->rank = LLMPAR__ZALLOC(llmpar__threads_rank, heap, (size_t)desc->ranks);
    int32_t *all = LLMPAR__ALLOC(int32_t, heap, (size_t)desc->ranks);
    if (world->rank)
        for (int32_t i = 0; i < desc->ranks; i++) llmpar__clock_cond_init(&world->rank[i].turn);
    llmpar__clock_cond_init(&world->ended);
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
    pthread_cond_destroy(&world->ended);
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

/* Groups. */

LLMPAR__PRIVATE_DEF llmpar__threads_group *llmpar__threads_group_create(llmpar_threads_world *world, int32_t ranks, const int32_t *world_rank, const char *axis)
{
    pthread_mutex_lock(&world->lock);
    llmpar_heap *heap = world->heap;
    llmpar__threads_group *group = LLMPAR__ZALLOC(llmpar__threads_group, heap, 1);
    if (group) {
        group->world = world;
        group->ranks = group->references = ranks;
        group->next = world->groups;
        group->link = &world->groups;
        if (group->next) group->next->link = &group->next;
        world->groups = group;
        snprintf(group->axis, sizeof group->axis, "%.23s", axis);
        llmpar__clock_cond_init(&group->wake);
        group->world_rank = LLMPAR__ALLOC(int32_t, heap, (size_t)ranks);
        group->arrived = LLMPAR__ZALLOC(uint32_t, heap, (size_t)ranks);
        group->slots = LLMPAR__ZALLOC(llmpar__threads_slot, heap, 2 * (size_t)ranks);
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

/* Failing. All of it under the lock. */

static void llmpar__threads_position(void *user, int32_t rank, llmpar_position *out)
{
    llmpar_threads_world *world = (llmpar_threads_world *)user;
    const llmpar__threads_rank *r = &world->rank[rank];
    if (r->record) llmpar_record_position(r->record, out);
    else *out = r->position;
    out->rank = rank;
    if (__atomic_load_n(&r->finished, __ATOMIC_SEQ_CST)) out->state = LLMPAR_POSITION_RETURNED;
}

/* The first failure stays. own_report: its text says who was where. */
static void llmpar__threads_fail(llmpar_threads_world *world, const llmpar_error *error, int own_report)
{
    int first = world->failure.status == LLMPAR_OK;
    if (!first && (!world->hearsay || error->status == LLMPAR_OK || error->status == LLMPAR_ERR_PEER)) return;
    world->hearsay = error->status == LLMPAR_ERR_PEER;
    world->failure = *error;
    if (error->status == LLMPAR_OK || error->status == LLMPAR_ERR_PEER) world->failure.status = LLMPAR_ERR_INTERNAL; /* a root error is neither */
    if (!first) return;
    world->failed_at = llmpar__clock_seconds();
    if (!own_report) llmpar_position_print(llmpar__threads_position, world, world->desc.ranks, world->report, sizeof world->report);
    __atomic_store_n(&world->aborted, 1, __ATOMIC_SEQ_CST);
    llmpar__threads_broadcast_all(world);
    pthread_cond_broadcast(&world->ended);
}

/* This rank's error because another one failed. */
static llmpar_status llmpar__threads_peer(llmpar__threads_comm *tc, const llmpar_call *call)
{
    const llmpar_threads_world *world = tc->world;
    const llmpar_error *f = &world->failure;
    char mine[256];
    llmpar_call_print(call, mine, sizeof mine);
    llmpar_error_set(llmpar__threads_error(tc), LLMPAR_ERR_PEER, "%s: rank %d%s%s%s failed: %s: %.*s%s%s", mine, (int)f->rank, f->where[0] ? " (" : "", f->where, f->where[0] ? ")" : "",
                            llmpar_status_string(f->status), world->report[0] ? 500 : (int)sizeof f->text, f->text, world->report[0] ? "; " : "", world->report);
    if (llmpar__threads_error(tc)->rank < 0) llmpar__threads_error(tc)->rank = tc->world_rank;
    return LLMPAR_ERR_PEER;
}

LLMPAR_DEF void llmpar_threads_world_fail(llmpar_threads_world *world, const llmpar_error *error)
{
    pthread_mutex_lock(&world->lock);
    llmpar__threads_fail(world, error, 0);
    pthread_mutex_unlock(&world->lock);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__threads_failed(llmpar__threads_comm *tc, llmpar_status status)
{
    llmpar_threads_world *world = tc->world;
    if (llmpar__threads_error(tc)->rank < 0) llmpar__threads_error(tc)->rank = tc->world_rank;
    pthread_mutex_lock(&world->lock);
    if (status != LLMPAR_ERR_PEER) {
        llmpar_error error = *llmpar__threads_error(tc);
        error.status = status;
        error.rank = tc->world_rank;
        llmpar__threads_fail(world, &error, 0);
    }
    world->rank[tc->world_rank].seen = llmpar__clock_seconds();
    pthread_mutex_unlock(&world->lock);
    return status;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__threads_check(llmpar__threads_comm *tc, const llmpar_call *call)
{
    if (!__atomic_load_n(&tc->world->aborted, __ATOMIC_SEQ_CST)) return LLMPAR_OK;
    pthread_mutex_lock(&tc->world->lock);
    llmpar_status status = llmpar__threads_peer(tc, call);
    pthread_mutex_unlock(&tc->world->lock);
    return status;
}

/* The general wait. */

typedef enum llmpar__threads_outcome { LLMPAR__THREADS_READY, LLMPAR__THREADS_ABORTED, LLMPAR__THREADS_GONE, LLMPAR__THREADS_LATE, LLMPAR__THREADS_STUCK } llmpar__threads_outcome;

static int llmpar__threads_ready(const llmpar__threads_wait *wait)
{
    return (uint32_t)(__atomic_load_n(wait->word, __ATOMIC_SEQ_CST) >> 32) != wait->high;
}

/* A peer that returned from its function without coming to this call, or -1. */
static int32_t llmpar__threads_gone(const llmpar__threads_comm *tc, const llmpar__threads_wait *wait)
{
    const llmpar__threads_group *group = wait->group;
    for (int32_t i = 0; i < group->ranks; i++) {
        if (wait->peer >= 0 && i != wait->peer) continue;
        if (!__atomic_load_n(&tc->world->rank[group->world_rank[i]].finished, __ATOMIC_SEQ_CST)) continue;
        /* It finished: whether it came to this call before is settled now. */
        if (wait->peer >= 0 ? !llmpar__threads_ready(wait) : (int32_t)(wait->number - __atomic_load_n(&group->arrived[i], __ATOMIC_SEQ_CST)) > 0) return i;
    }
    return -1;
}

/* Under the lock, so that nobody falls asleep here meanwhile: nobody runs who could move the word of anybody. Then all say so. The words are looked at behind the threads: one that has just moved a word may
   have fallen asleep in its device since. */
static int llmpar__threads_is_stuck(llmpar_threads_world *world)
{
    if (world->stuck) return 1;
    if (world->asleep + world->finished < world->desc.ranks) return 0;
    for (int32_t i = 0; i < world->desc.ranks; i++) {
        const llmpar__threads_rank *r = &world->rank[i];
        int32_t waits = 0;
        if (__atomic_load_n(&r->finished, __ATOMIC_SEQ_CST)) continue;
        for (const llmpar__threads_wait *wait = r->wait; wait; wait = wait->next) waits++;
        if (waits < (r->device ? llmpar_device_threads_running(r->device) : 1)) return 0;
    }
    for (int32_t i = 0; i < world->desc.ranks; i++)
        for (const llmpar__threads_wait *wait = world->rank[i].wait; wait; wait = wait->next)
            if (!wait->abortable || llmpar__threads_ready(wait)) return 0;
    return 1;
}

/* Takes this rank's arrival or message back; 0 if the word has moved on after all. Under the lock, so that nothing changes between this and the report. */
static int llmpar__threads_withdraw(const llmpar__threads_wait *wait)
{
    uint64_t old = __atomic_load_n(wait->word, __ATOMIC_SEQ_CST);
    while ((uint32_t)(old >> 32) == wait->high) {
        uint64_t next = wait->peer < 0 ? old - 1 : (uint64_t)0xffffffffu << 32;
        if (!__atomic_compare_exchange_n(wait->word, &old, next, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) continue;
        if (wait->peer >= 0) pthread_cond_broadcast(&wait->group->wake);
        return 1;
    }
    return 0;
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
            if (__atomic_load_n(&world->aborted, __ATOMIC_SEQ_CST)) return world->stuck ? LLMPAR__THREADS_STUCK : LLMPAR__THREADS_ABORTED;
            if (llmpar__threads_gone(tc, wait) >= 0) return LLMPAR__THREADS_GONE;
            if (world->idle_turns > 2 * world->desc.ranks) return LLMPAR__THREADS_STUCK;
        }
        world->idle_turns++;
        llmpar__threads_pass_turn(world);
        llmpar__threads_take_turn(world, tc->world_rank);
    }
}

/* Under the lock: until `cond` is signalled, or until llmpar__clock_seconds() is `limit` (0: for ever), or for nothing. */
static void llmpar__threads_sleep(llmpar_threads_world *world, pthread_cond_t *cond, double limit)
{
    if (limit > 0) llmpar__clock_cond_wait(cond, &world->lock, limit - llmpar__clock_seconds());
    else pthread_cond_wait(cond, &world->lock);
}

/* Under the lock. */
static llmpar__threads_outcome llmpar__threads_wait_asleep(llmpar__threads_comm *tc, const llmpar__threads_wait *wait)
{
    llmpar_threads_world *world = tc->world;
    llmpar__threads_group *group = tc->group;
    double limit = wait->abortable && world->desc.deadline > 0 ? llmpar__clock_seconds() + world->desc.deadline : 0;
    for (;;) {
        if (llmpar__threads_ready(wait)) return LLMPAR__THREADS_READY;
        if (wait->abortable) {
            if (__atomic_load_n(&world->aborted, __ATOMIC_SEQ_CST)) return world->stuck ? LLMPAR__THREADS_STUCK : LLMPAR__THREADS_ABORTED;
            if (llmpar__threads_gone(tc, wait) >= 0) return LLMPAR__THREADS_GONE;
            if (llmpar__threads_is_stuck(world)) return LLMPAR__THREADS_STUCK;
            if (limit > 0 && llmpar__clock_seconds() >= limit) return LLMPAR__THREADS_LATE;
        }
        double look = world->threaded ? llmpar__clock_seconds() + 1 : limit;
        llmpar__threads_sleep(world, &group->wake, limit > 0 && limit < look ? limit : look);
    }
}

/* What this rank reports when its wait did not end well; everybody is held in place by the lock. */
static llmpar_status llmpar__threads_report(llmpar__threads_comm *tc, const llmpar__threads_wait *wait, llmpar__threads_outcome outcome, int32_t gone)
{
    llmpar_threads_world *world = tc->world;
    llmpar_status status = outcome == LLMPAR__THREADS_LATE ? LLMPAR_ERR_TIMEOUT : LLMPAR_ERR_MISMATCH;
    world->rank[tc->world_rank].seen = llmpar__clock_seconds();
    if (outcome == LLMPAR__THREADS_ABORTED) return llmpar__threads_peer(tc, wait->call);
    char what[256], why[64], *who = world->report;
    llmpar_call_print(wait->call, what, sizeof what);
    if (gone >= 0) snprintf(why, sizeof why, "rank %d has returned without it", (int)wait->group->world_rank[gone]);
    else if (outcome == LLMPAR__THREADS_STUCK) snprintf(why, sizeof why, "nobody can go on");
    else snprintf(why, sizeof why, "waited %g s for the other ranks", world->desc.deadline);
    if (world->failure.status == LLMPAR_OK) llmpar_position_print(llmpar__threads_position, world, world->desc.ranks, who, sizeof world->report);
    llmpar_error_set(llmpar__threads_error(tc), status, "%s: %s (%s)", what, why, who);
    if (llmpar__threads_error(tc)->rank < 0) llmpar__threads_error(tc)->rank = tc->world_rank;
    if (world->failure.status != LLMPAR_OK) return status;
    llmpar_error error = *llmpar__threads_error(tc);
    error.status = status;
    error.rank = tc->world_rank;
    if (outcome == LLMPAR__THREADS_STUCK) world->stuck = 1; /* the report stays for the others */
    else who[0] = 0;
    llmpar__threads_fail(world, &error, 1);
    return status;
}

/* Waits. After an error the rank's arrival or message has been taken back. */
static llmpar_status llmpar__threads_wait_for(llmpar__threads_comm *tc, llmpar__threads_wait *wait)
{
    llmpar_threads_world *world = tc->world;
    llmpar__threads_group *group = wait->group;
    if (!world->desc.lockstep)
        for (int32_t i = 0; i < world->spins + LLMPAR__THREADS_YIELDS; i++) {
            if (llmpar__threads_ready(wait)) return LLMPAR_OK;
            if (i < world->spins) llmpar__clock_pause();
            else sched_yield();
        }
    pthread_mutex_lock(&world->lock);
    llmpar__threads_rank *self = &world->rank[tc->world_rank];
    if (!self->wait) world->asleep++;
    wait->next = self->wait;
    self->wait = wait;
    if (llmpar_device_threads_running(tc->comm.device) > 1) world->threaded = 1;
    __atomic_add_fetch(&group->sleepers, 1, __ATOMIC_SEQ_CST);
    llmpar__threads_outcome outcome = world->desc.lockstep ? llmpar__threads_wait_lockstep(tc, wait) : llmpar__threads_wait_asleep(tc, wait);
    __atomic_sub_fetch(&group->sleepers, 1, __ATOMIC_SEQ_CST);
    int32_t gone = outcome == LLMPAR__THREADS_GONE ? llmpar__threads_gone(tc, wait) : -1;
    llmpar_status status = outcome != LLMPAR__THREADS_READY && llmpar__threads_withdraw(wait) ? llmpar__threads_report(tc, wait, outcome, gone) : LLMPAR_OK;
    llmpar__threads_wait **link = &self->wait;
    while (*link != wait) link = &(*link)->next;
    *link = wait->next;
    if (!self->wait) world->asleep--;
    pthread_mutex_unlock(&world->lock);
    return status;
}

/* Wakes whoever sleeps on the group's words, after one of them was changed. I change the word, then look for sleepers; a sleeper announces itself, then looks at the word: all four are sequentially consistent,
   or both could see what was before and sleep for ever. No x86 shows it. */
static void llmpar__threads_wake(llmpar__threads_group *group)
{
    if (!__atomic_load_n(&group->sleepers, __ATOMIC_SEQ_CST)) return;
    pthread_mutex_lock(&group->world->lock);
    pthread_cond_broadcast(&group->wake);
    pthread_mutex_unlock(&group->world->lock);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__threads_barrier(llmpar__threads_comm *tc, const llmpar_call *call, int abortable)
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
    llmpar__threads_wait wait = {NULL, &group->barrier, (uint32_t)(old >> 32), tc->number, -1, abortable, group, call};
    return llmpar__threads_wait_for(tc, &wait);
}

LLMPAR__PRIVATE_DEF int llmpar__threads_step(llmpar__threads_comm *tc, llmpar__threads_channel *channel, uint32_t from, uint32_t to)
{
    uint64_t old = (uint64_t)from << 32;
    if (!__atomic_compare_exchange_n(&channel->phase, &old, (uint64_t)to << 32, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) return 0;
    llmpar__threads_wake(tc->group);
    return 1;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__threads_await(llmpar__threads_comm *tc, const llmpar_call *call, llmpar__threads_channel *channel, uint32_t step, int32_t peer, int abortable)
{
    llmpar__threads_wait wait = {NULL, &channel->phase, step, 0, peer, abortable, tc->group, call};
    return llmpar__threads_wait_for(tc, &wait);
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
    if (!world->rank[rank].finished) world->finished++;
    __atomic_store_n(&world->rank[rank].finished, 1, __ATOMIC_SEQ_CST);
    world->idle_turns = 0;
    pthread_cond_broadcast(&world->ended);
    if (world->desc.lockstep && world->turn == rank) llmpar__threads_pass_turn(world);
    llmpar__threads_broadcast_all(world);
    pthread_mutex_unlock(&world->lock);
}

LLMPAR__PRIVATE_DEF void llmpar__threads_show(llmpar_threads_world *world, int32_t rank, llmpar_record *record, llmpar_device *device)
{
    llmpar__threads_rank *r = &world->rank[rank];
    pthread_mutex_lock(&world->lock);
    if (r->record && !record) llmpar_record_position(r->record, &r->position);
    r->record = record;
    r->device = device;
    pthread_mutex_unlock(&world->lock);
}

LLMPAR_DEF void llmpar_threads_rank_device(llmpar_threads_world *world, int32_t rank, llmpar_device *device)
{
    pthread_mutex_lock(&world->lock);
    if (world->rank[rank].device) world->rank[rank].device = device;
    pthread_mutex_unlock(&world->lock);
}

LLMPAR_DEF size_t llmpar_threads_rank_json(llmpar_threads_world *world, int32_t rank, char *text, size_t capacity)
{
    if (capacity) text[0] = 0;
    pthread_mutex_lock(&world->lock); /* which the rank needs to take its record away */
    llmpar_record *record = world->rank[rank].record;
    size_t bytes = record ? llmpar_record_json(record, text, capacity) : 0;
    pthread_mutex_unlock(&world->lock);
    return bytes;
}

/* When the rank last gave a sign of life. Its record has the time of day: taken as an age. */
static double llmpar__threads_seen(llmpar_threads_world *world, int32_t rank)
{
    llmpar_position p;
    llmpar__threads_position(world, rank, &p);
    int64_t age = (int64_t)(llmpar__clock_ns(CLOCK_REALTIME) - p.time_ns);
    double seen = llmpar__clock_seconds() - (p.time_ns && age > 0 ? 1e-9 * (double)age : 0);
    return seen > world->rank[rank].seen ? seen : world->rank[rank].seen;
}

LLMPAR_DEF int llmpar_threads_rank_wait(llmpar_threads_world *world, int32_t rank)
{
    int finished;
    pthread_mutex_lock(&world->lock);
    while (!(finished = __atomic_load_n(&world->rank[rank].finished, __ATOMIC_SEQ_CST))) {
        double limit = 0;
        if (__atomic_load_n(&world->aborted, __ATOMIC_SEQ_CST) && world->desc.deadline > 0 && !world->desc.lockstep) {
            double seen = llmpar__threads_seen(world, rank) + world->desc.deadline;
            limit = world->failed_at + LLMPAR__THREADS_GRACE;
            if (seen > limit) limit = seen;
            if (llmpar__clock_seconds() >= limit) break;
        }
        llmpar__threads_sleep(world, &world->ended, limit);
    }
    pthread_mutex_unlock(&world->lock);
    return finished;
}

#undef LLMPAR__THREADS_YIELDS
#undef LLMPAR__THREADS_SPINS
#undef LLMPAR__THREADS_GRACE
