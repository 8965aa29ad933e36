/* watch: the helper thread of a rank, and failures.

   The helper serves the control plane, ten times a second and whenever something comes; it asks NCCL for errors of its own threads, and notices a call that has gone on for longer than the deadline. When the job has
   failed it aborts every communicator: kernels that wait for a partner end, the streams go on, and behind each collective a host call finds the failure and makes it the stream's. So a rank that waits for its GPU in
   synchronize gets the job's error from there, whatever it waited for.

   NCCL's end of a communicator waits until this rank's streams have come past its kernels, and until the peers of this machine have let go of theirs. So communicators are aborted all at once, each by a thread of its
   own: one by one, the first would wait for a kernel behind that of another, which waits for a partner that is gone. And nobody waits for these threads without limit: a peer that is stopped never lets go.

   An error that NCCL reports is often the echo of a peer's end: for a while it is kept back, in case the control plane knows better. */
#include "nccl/nccl.h"
#include "nccl/nccl_internal.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define LLMPAR__NCCL_LOOK 0.1
#define LLMPAR__NCCL_ECHO 2.0  /* seconds for which an NCCL error waits for a better reason */
#define LLMPAR__NCCL_WAIT 2.5  /* .. and a failed call for who was where */
#define LLMPAR__NCCL_FORCE 5.0 /* .. and the helper for a thread inside an NCCL call */

LLMPAR__PRIVATE_DEF llmpar_error *llmpar__nccl_own_error(llmpar__nccl_comm *tc) { return llmpar_device_thread_error(tc->comm.device, tc->comm.error); }

LLMPAR__PRIVATE_DEF void llmpar__nccl_await(llmpar__nccl_world *world, double until)
{
    struct timespec t;
    double left = until - llmpar__nccl_now();
    if (left < 0.0005) left = 0.0005;
    if (left > 0.1) left = 0.1;
#if defined(__APPLE__)
    clock_gettime(CLOCK_REALTIME, &t);
#else
    clock_gettime(CLOCK_MONOTONIC, &t);
#endif
    t.tv_nsec += (long)(left * 1e9);
    if (t.tv_nsec >= 1000000000) {
        t.tv_nsec -= 1000000000;
        t.tv_sec++;
    }
    pthread_cond_timedwait(&world->wake, &world->lock, &t);
}

/* ---- failures ---- */

LLMPAR__PRIVATE_DEF void llmpar__nccl_convicted(llmpar__nccl_world *world, const llmpar__nccl_verdict *verdict, int final)
{
    world->verdict = *verdict;
    if (!world->aborted) world->failed_at = llmpar__nccl_now();
    if (final) world->located = 1;
    __atomic_store_n(&world->aborted, 1, __ATOMIC_SEQ_CST);
    pthread_cond_broadcast(&world->wake);
    llmpar__nccl_poke(world);
}

static void llmpar__nccl_fail_locked(llmpar__nccl_world *world, const llmpar_error *error)
{
    if (world->aborted) return;
    if (world->rank == 0) {
        llmpar__nccl_hub_fail(world, error, -1);
        return;
    }
    llmpar__nccl_verdict verdict; /* for the time being: rank 0 may have heard of another one first */
    memset(&verdict, 0, sizeof verdict);
    verdict.error = *error;
    verdict.other = -1;
    llmpar__nccl_convicted(world, &verdict, 0);
    llmpar__nccl_to_hub(world, LLMPAR__NCCL_FAIL, error, sizeof *error);
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_fail(llmpar__nccl_world *world, const llmpar_error *error)
{
    llmpar_error mine = *error;
    mine.rank = world->rank;
    pthread_mutex_lock(&world->lock);
    llmpar__nccl_fail_locked(world, &mine);
    pthread_mutex_unlock(&world->lock);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__nccl_failed(llmpar__nccl_comm *tc, llmpar_status st)
{
    llmpar_error *own = llmpar__nccl_own_error(tc);
    if (own->rank < 0) own->rank = tc->world->rank;
    if (st == LLMPAR_OK || st == LLMPAR_ERR_PEER) return st;
    llmpar_error error = *own;
    error.status = st;
    if (!error.text[0]) snprintf(error.text, sizeof error.text, "%s", llmpar_status_string(st));
    llmpar__nccl_fail(tc->world, &error);
    return st;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__nccl_sound(llmpar__nccl_comm *tc, const llmpar_call *call)
{
    llmpar__nccl_world *world = tc->world;
    char what[320];
    if (!__atomic_load_n(&world->aborted, __ATOMIC_SEQ_CST)) return LLMPAR_OK;
    if (call) llmpar_call_print(call, what, sizeof what);
    else snprintf(what, sizeof what, "communicator %s", tc->axis);
    pthread_mutex_lock(&world->lock);
    while (!world->located && llmpar__nccl_now() < world->failed_at + LLMPAR__NCCL_WAIT) llmpar__nccl_await(world, world->failed_at + LLMPAR__NCCL_WAIT);
    llmpar__nccl_verdict verdict = world->verdict;
    pthread_mutex_unlock(&world->lock);
    const llmpar_error *e = &verdict.error;
    llmpar_error *own = llmpar__nccl_own_error(tc);
    if (own->rank < 0) own->rank = world->rank;
    if ((e->rank == world->rank || verdict.other == world->rank) && e->status != LLMPAR_ERR_PEER && e->status != LLMPAR_OK) return llmpar_error_set(own, e->status, "%s", e->text);
    return llmpar_error_set(own, LLMPAR_ERR_PEER, "%s: rank %d%s%s%s failed: %s: %.500s; %s", what, (int)e->rank, e->where[0] ? " (" : "", e->where, e->where[0] ? ")" : "", llmpar_status_string(e->status), e->text,
                            verdict.who);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__nccl_settle(llmpar__nccl_comm *tc, const llmpar_call *call, const char *what, ncclResult_t result)
{
    llmpar__nccl_world *world = tc->world;
    double begin = llmpar__nccl_now();
    char last[400] = "", text[320];
    for (int looks = 0; result == ncclInProgress; looks++) {
        llmpar_status st = llmpar__nccl_sound(tc, call);
        if (st) return st;
        pthread_mutex_lock(&world->nccl_lock);
        ncclResult_t asked = tc->nccl ? ncclCommGetAsyncError(tc->nccl, &result) : ncclInProgress;
        pthread_mutex_unlock(&world->nccl_lock);
        if (asked != ncclSuccess && asked != ncclInProgress) result = asked;
        if (result != ncclInProgress) break;
        if (!call && world->desc.deadline > 0 && llmpar__nccl_now() > begin + world->desc.deadline)
            return llmpar__nccl_failed(tc, llmpar_error_set(llmpar__nccl_own_error(tc), LLMPAR_ERR_TIMEOUT, "communicator %s: %s has not ended within %g s", tc->axis, what, world->desc.deadline));
        if (looks < 20) sched_yield();
        else llmpar__nccl_nap(looks < 200 ? 0.00002 : 0.0002); /* for milliseconds, where connections are made */
    }
    if (result == ncclSuccess) return LLMPAR_OK;
    pthread_mutex_lock(&world->nccl_lock);
    const char *said = tc->nccl ? ncclGetLastError(tc->nccl) : NULL;
    if (said) snprintf(last, sizeof last, "%s%.380s", said[0] ? ": " : "", said);
    pthread_mutex_unlock(&world->nccl_lock);
    for (double until = llmpar__nccl_now() + LLMPAR__NCCL_ECHO; llmpar__nccl_now() < until && !__atomic_load_n(&world->aborted, __ATOMIC_SEQ_CST);) llmpar__nccl_nap(0.002);
    llmpar_status st = llmpar__nccl_sound(tc, call);
    if (st) return st;
    if (call) llmpar_call_print(call, text, sizeof text);
    else snprintf(text, sizeof text, "communicator %s", tc->axis);
    return llmpar__nccl_failed(tc, llmpar_error_set(llmpar__nccl_own_error(tc), result == ncclSystemError ? LLMPAR_ERR_IO : LLMPAR_ERR_INTERNAL, "%s: %s: %s%s", text, what, ncclGetErrorString(result), last));
}

/* ---- the helper ---- */

/* A call that this rank has been in for longer than the deadline. Under the lock. */
static void llmpar__nccl_late(llmpar__nccl_world *world)
{
    llmpar_position position;
    llmpar_error error;
    char what[320];
    double now = llmpar__nccl_now();
    if (world->desc.deadline <= 0 || world->aborted) return;
    llmpar_record_position(world->record, &position);
    if (position.state != LLMPAR_POSITION_INSIDE || position.time_ns != world->seen_ns) {
        world->seen_ns = position.time_ns;
        world->seen_at = now;
        return;
    }
    if (now < world->seen_at + world->desc.deadline) return;
    llmpar_call_print(&position.now, what, sizeof what);
    llmpar_error_clear(&error);
    llmpar_error_set(&error, LLMPAR_ERR_TIMEOUT, "%s: waited %g s for the other ranks", what, world->desc.deadline);
    error.rank = world->rank;
    memcpy(error.where, position.where, sizeof error.where);
    llmpar__nccl_fail_locked(world, &error);
}

/* Errors of NCCL's own threads. */
static void llmpar__nccl_inquire(llmpar__nccl_world *world)
{
    double now = llmpar__nccl_now();
    if (world->nccl_failed_at <= 0) {
        if (pthread_mutex_trylock(&world->nccl_lock)) return; /* its thread looks itself */
        for (llmpar__nccl_comm *tc = world->first; tc && world->nccl_failed_at <= 0; tc = tc->next) {
            ncclResult_t state = ncclSuccess;
            if (!tc->nccl || ncclCommGetAsyncError(tc->nccl, &state) || state == ncclSuccess || state == ncclInProgress) continue;
            const char *said = ncclGetLastError(tc->nccl);
            world->nccl_failed_at = now;
            snprintf(world->nccl_error, sizeof world->nccl_error, "communicator %s: NCCL: %s%s%.200s", tc->axis, ncclGetErrorString(state), said && said[0] ? ": " : "", said ? said : "");
        }
        pthread_mutex_unlock(&world->nccl_lock);
        return;
    }
    if (now < world->nccl_failed_at + LLMPAR__NCCL_ECHO + 1) return; /* a call that found it itself says more */
    llmpar_error error;
    llmpar_error_clear(&error);
    llmpar_error_set(&error, LLMPAR_ERR_INTERNAL, "%s", world->nccl_error);
    llmpar__nccl_fail(world, &error);
}

static void llmpar__nccl_leave(llmpar__nccl_grave *grave)
{
    if (__atomic_sub_fetch(&grave->holders, 1, __ATOMIC_SEQ_CST) == 0) free(grave);
}

static void *llmpar__nccl_dig(void *arg)
{
    llmpar__nccl_grave *grave = (llmpar__nccl_grave *)arg;
    if (grave->aborts) ncclCommAbort(grave->nccl);
    else ncclCommDestroy(grave->nccl);
    __atomic_store_n(&grave->over, 1, __ATOMIC_SEQ_CST);
    llmpar__nccl_leave(grave);
    return NULL;
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_bury(llmpar__nccl_world *world, ncclComm_t nccl, int aborts)
{
    llmpar__nccl_grave alone, *grave = (llmpar__nccl_grave *)malloc(sizeof *grave); /* the heap belongs to the rank's thread */
    pthread_t thread;
    int kept = grave != NULL;
    if (!kept) grave = &alone;
    grave->nccl = nccl;
    grave->aborts = aborts;
    grave->over = 0;
    grave->holders = 2;
    grave->next = world->graves;
    if (kept) world->graves = grave;
    if (!kept || pthread_create(&thread, NULL, llmpar__nccl_dig, grave)) llmpar__nccl_dig(grave);
    else pthread_detach(thread);
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_buried(llmpar__nccl_world *world, double seconds)
{
    for (double limit = llmpar__nccl_now() + seconds;;) {
        pthread_mutex_lock(&world->nccl_lock);
        for (llmpar__nccl_grave **at = &world->graves, *grave; (grave = *at) != NULL;) {
            if (!__atomic_load_n(&grave->over, __ATOMIC_SEQ_CST)) {
                at = &grave->next;
                continue;
            }
            *at = grave->next;
            llmpar__nccl_leave(grave);
        }
        int over = !world->graves;
        pthread_mutex_unlock(&world->nccl_lock);
        if (over || llmpar__nccl_now() > limit) return over;
        llmpar__nccl_nap(0.0002);
    }
}

/* Frees the GPU. A thread inside an NCCL call leaves it soon; but one that launches a kernel may wait for room in a queue that only the abort gets moving. */
static void llmpar__nccl_silence(llmpar__nccl_world *world)
{
    double limit = llmpar__nccl_now() + LLMPAR__NCCL_FORCE;
    int locked = 0;
    while (!locked && llmpar__nccl_now() < limit) {
        locked = !pthread_mutex_trylock(&world->nccl_lock);
        if (!locked) llmpar__nccl_nap(0.0005);
    }
    for (llmpar__nccl_comm *tc = world->first; tc; tc = tc->next) {
        if (tc->nccl) llmpar__nccl_bury(world, tc->nccl, 1);
        tc->nccl = NULL;
    }
    if (locked) pthread_mutex_unlock(&world->nccl_lock);
}

static void *llmpar__nccl_help(void *arg)
{
    llmpar__nccl_world *world = (llmpar__nccl_world *)arg;
    for (;;) {
        pthread_mutex_lock(&world->lock);
        llmpar__nccl_look(world);
        llmpar__nccl_late(world);
        int stop = world->stop, aborted = world->aborted;
        pthread_mutex_unlock(&world->lock);
        if (stop) return NULL;
        if (aborted) llmpar__nccl_silence(world);
        else llmpar__nccl_inquire(world);
        llmpar__nccl_wait_links(world, aborted ? LLMPAR__NCCL_LOOK / 10 : LLMPAR__NCCL_LOOK);
    }
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__nccl_watch_begin(llmpar__nccl_world *world)
{
    world->last_look = world->last_beat = world->seen_at = llmpar__nccl_now();
    int failed = pthread_create(&world->helper, NULL, llmpar__nccl_help, world);
    if (failed) return llmpar_error_set(world->error, LLMPAR_ERR_INTERNAL, "nccl: the helper thread could not be started: %s", strerror(failed));
    world->helping = 1;
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_watch_end(llmpar__nccl_world *world)
{
    if (!world->helping) return;
    pthread_mutex_lock(&world->lock);
    world->stop = 1;
    pthread_mutex_unlock(&world->lock);
    llmpar__nccl_poke(world);
    pthread_join(world->helper, NULL);
    world->helping = 0;
}

#undef LLMPAR__NCCL_LOOK
#undef LLMPAR__NCCL_ECHO
#undef LLMPAR__NCCL_WAIT
#undef LLMPAR__NCCL_FORCE
