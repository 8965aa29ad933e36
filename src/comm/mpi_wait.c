/* mpi_wait: messages under way, and how the members of a communicator meet before data moves.

   Meeting. A rank that comes to a collective tells the other members what it is about to do, and waits until it has heard the same from all of them. So nobody moves a byte before everybody is there and
   agrees; whoever differs is reported by all sides. Up to desc.direct members each tells each, and small data travels along. Beyond, in round k (1, 2, 4, ..) rank r tells r+k the call of the
   lowest rank that it has heard of and the lowest call that differs from it; after log2 n rounds everybody has heard of everybody.
   Headers of all communicators have one tag: messages of a pair arrive in order, so a header of another communicator than the awaited one means that the two ranks make their calls in different orders,
   or on different axes: reported at once instead of a deadlock.

   Waiting looks a few times, then gives the processor away (there may be more ranks than processors), then sleeps for ever longer moments. It ends with an error when another rank fails, when a rank
   that has not come has returned from its function, and at the deadline. */
#include "comm/mpi_internal.h"
#include "tables/tables_internal.h"

#include <stdio.h>
#include <string.h>

#ifdef LLMPAR_USE_MPI

#include <sched.h>
#include <time.h>

#define LLMPAR__MPI_HEADER_TAG 1
#define LLMPAR__MPI_DATA_TAG 2
#define LLMPAR__MPI_HEADER_BYTES(more) ((int)(offsetof(llmpar__mpi_header, payload) + (more)))
#define LLMPAR__MPI_SETTLE 1.0 /* seconds that a failing rank waits for its own messages */
#define LLMPAR__MPI_GONE 1.0   /* seconds after which the message of a rank that has finished would have come */

LLMPAR__PRIVATE_DEF llmpar_error *llmpar__mpi_own_error(llmpar__mpi_comm *tc) { return llmpar_device_thread_error(tc->comm.device, tc->comm.error); }

typedef struct llmpar__mpi_wait {
    double begin, limit; /* limit 0: none */
    int looks;
} llmpar__mpi_wait;

static void llmpar__mpi_wait_begin(llmpar__mpi_wait *wait, const llmpar_mpi_world *world)
{
    wait->begin = llmpar__clock_seconds();
    wait->limit = world->desc.deadline > 0 ? wait->begin + world->desc.deadline : 0;
    wait->looks = 0;
}

/* Whether this look is one for failures and the deadline too: reading clocks and messages of control takes longer than looking for what is awaited, which is mostly there within a microsecond. */
static int llmpar__mpi_due(const llmpar_mpi_world *world, const llmpar__mpi_wait *wait) { return world->crowded || wait->looks % 8 == 7 || wait->looks >= 2000; }

/* Between two looks, without the lock. */
static void llmpar__mpi_pause(const llmpar_mpi_world *world, llmpar__mpi_wait *wait)
{
    int looks = wait->looks;
    if (looks < 2100) wait->looks++; /* no further: a wait may last for days */
    if (looks < (world->crowded ? 4 : 2000)) {
        if (world->crowded || looks % 16 == 15) sched_yield();
        return;
    }
    struct timespec t;
    t.tv_sec = 0;
    t.tv_nsec = looks < 2100 ? 20000 : 200000;
    nanosleep(&t, NULL);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__mpi_failed(llmpar__mpi_comm *tc, llmpar_status status)
{
    if (llmpar__mpi_own_error(tc)->rank < 0) llmpar__mpi_own_error(tc)->rank = tc->world->rank;
    if (status != LLMPAR_ERR_PEER) {
        llmpar_error error = *llmpar__mpi_own_error(tc);
        error.status = status;
        error.rank = tc->world->rank;
        llmpar_mpi_world_fail(tc->world, &error);
    }
    pthread_mutex_lock(&tc->world->lock); /* what is still on its way to this rank keeps its sender, and the sender's buffers, waiting */
    tc->world->draining = 1;
    pthread_mutex_unlock(&tc->world->lock);
    return status;
}

/* Under the lock. */
static llmpar_status llmpar__mpi_peer_error(llmpar__mpi_comm *tc, const llmpar_call *call)
{
    llmpar_mpi_world *world = tc->world;
    char what[320], who[1100];
    llmpar__mpi_seen(world, world->met, 0);
    llmpar__mpi_who(world, who, sizeof who); /* first: it gives the lock away, and a failure may become another */
    llmpar_call_print(call, what, sizeof what);
    const llmpar_error *f = &world->failure;
    return llmpar_error_set(llmpar__mpi_own_error(tc), LLMPAR_ERR_PEER, "%s: rank %d%s%s%s failed: %s: %.500s; %s", what, (int)f->rank, f->where[0] ? " (" : "", f->where, f->where[0] ? ")" : "", llmpar_status_string(f->status), f->text, who);
}

/* LLMPAR_ERR_PEER in the rank's error if some rank has failed, else LLMPAR_OK. Where ranks disagree, one that comes late meets them all the same: perhaps it is the other side of it. */
static llmpar_status llmpar__mpi_check(llmpar__mpi_comm *tc, const llmpar_call *call)
{
    llmpar_mpi_world *world = tc->world;
    if (!__atomic_load_n(&world->aborted, __ATOMIC_SEQ_CST)) return LLMPAR_OK;
    llmpar_status st = LLMPAR_OK;
    pthread_mutex_lock(&world->lock);
    if (world->failure.status != LLMPAR_ERR_MISMATCH || world->draining || llmpar__clock_seconds() > world->failed_at + 1) st = llmpar__mpi_peer_error(tc, call);
    pthread_mutex_unlock(&world->lock);
    return st ? llmpar__mpi_failed(tc, st) : LLMPAR_OK;
}

/* Under the lock: is the wait over for another reason than success? missing: world rank that has not come, -1: not known. */
static llmpar_status llmpar__mpi_hopeless(llmpar__mpi_comm *tc, const llmpar_call *call, const llmpar__mpi_wait *wait, int32_t missing)
{
    llmpar_mpi_world *world = tc->world;
    if (world->aborted) return LLMPAR_ERR_PEER; /* its text comes when the messages are settled */
    int gone = missing >= 0 && world->peer[missing].finished && world->peer[missing].finished_for > LLMPAR__MPI_GONE;
    int late = wait->limit > 0 && llmpar__clock_seconds() >= wait->limit;
    if (!gone && !late) return LLMPAR_OK;
    char what[320], who[1100];
    llmpar__mpi_seen(world, world->met, 0);
    llmpar_call_print(call, what, sizeof what);
    llmpar__mpi_who(world, who, sizeof who);
    if (world->aborted) return LLMPAR_ERR_PEER; /* heard of meanwhile: that came first */
    if (gone) llmpar_error_set(llmpar__mpi_own_error(tc), LLMPAR_ERR_MISMATCH, "%s: rank %d has returned without it; %s", what, (int)missing, who);
    else llmpar_error_set(llmpar__mpi_own_error(tc), LLMPAR_ERR_TIMEOUT, "%s: waited %g s for the other ranks; %s", what, world->desc.deadline, who);
    return gone ? LLMPAR_ERR_MISMATCH : LLMPAR_ERR_TIMEOUT;
}

/* Ends a failed call: tells the job, and ends its messages: receives are cancelled, sends are waited for, since their receivers drop what they no longer want. from: as in the world; NULL: the first half
   of the requests are receives. Returns st. */
static llmpar_status llmpar__mpi_settle(llmpar__mpi_comm *tc, const llmpar_call *call, llmpar_status st, MPI_Request *request, const int32_t *from, int32_t count)
{
    llmpar_mpi_world *world = tc->world;
    if (st != LLMPAR_ERR_PEER) llmpar__mpi_failed(tc, st);
    double limit = llmpar__clock_seconds() + LLMPAR__MPI_SETTLE;
    int done = 0;
    pthread_mutex_lock(&world->lock);
    for (int32_t i = 0; i < count; i++)
        if (request[i] != MPI_REQUEST_NULL && (from ? from[i] >= 0 : i < count / 2)) MPI_Cancel(&request[i]);
    world->draining = 1;
    while (!done && llmpar__clock_seconds() < limit) {
        llmpar__mpi_look(world);
        done = 1;
        for (int32_t i = 0; i < count; i++) {
            int one = 1;
            if (request[i] != MPI_REQUEST_NULL && !MPI_Test(&request[i], &one, MPI_STATUS_IGNORE)) done = done && one;
        }
        if (done) break;
        pthread_mutex_unlock(&world->lock);
        sched_yield();
        pthread_mutex_lock(&world->lock);
    }
    for (int32_t i = 0; i < count; i++)
        if (request[i] != MPI_REQUEST_NULL) { /* to a dead rank */
            MPI_Request_free(&request[i]);
            request[i] = MPI_REQUEST_NULL;
        }
    if (st == LLMPAR_ERR_PEER) llmpar__mpi_peer_error(tc, call);
    pthread_mutex_unlock(&world->lock);
    return st == LLMPAR_ERR_PEER ? llmpar__mpi_failed(tc, st) : st;
}

/* ---- data ---- */

LLMPAR__PRIVATE_DEF llmpar_status llmpar__mpi_abandon(llmpar__mpi_comm *tc, const llmpar_call *call, llmpar_status st)
{
    st = llmpar__mpi_settle(tc, call, st, tc->world->request, tc->world->from, tc->world->posted);
    tc->world->posted = 0;
    return st;
}

/* Waits until at most `most` messages are under way. */
static llmpar_status llmpar__mpi_until(llmpar__mpi_comm *tc, const llmpar_call *call, int32_t most)
{
    llmpar_mpi_world *world = tc->world;
    llmpar__mpi_wait wait;
    llmpar_status st = LLMPAR_OK;
    MPI_Status status[LLMPAR__MPI_BATCH];
    int finished[LLMPAR__MPI_BATCH], count;
    if (world->posted > most) llmpar__mpi_wait_begin(&wait, world);
    while (world->posted > most && !st) {
        pthread_mutex_lock(&world->lock);
        int code = MPI_Testsome((int)world->posted, world->request, &count, finished, status);
        if (code) st = llmpar__mpi_error(llmpar__mpi_own_error(tc), "MPI_Testsome", code);
        int32_t left = 0, missing = -1;
        for (int32_t i = 0; i < world->posted && !st; i++) {
            if (world->request[i] == MPI_REQUEST_NULL) continue;
            world->request[left] = world->request[i];
            world->from[left++] = world->from[i];
        }
        if (!st) world->posted = left;
        if (left > most && !st && llmpar__mpi_due(world, &wait)) {
            llmpar__mpi_look(world);
            for (int32_t i = 0; i < left && missing < 0; i++)
                if (world->from[i] >= 0 && world->peer[world->from[i]].finished) missing = world->from[i];
            st = llmpar__mpi_hopeless(tc, call, &wait, missing);
        }
        pthread_mutex_unlock(&world->lock);
        if (world->posted > most && !st) llmpar__mpi_pause(world, &wait);
    }
    return st ? llmpar__mpi_abandon(tc, call, st) : LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__mpi_complete(llmpar__mpi_comm *tc, const llmpar_call *call) { return llmpar__mpi_until(tc, call, 0); }

LLMPAR__PRIVATE_DEF llmpar_status llmpar__mpi_post(llmpar__mpi_comm *tc, const llmpar_call *call, int receives, int32_t peer, void *memory, size_t bytes)
{
    llmpar_mpi_world *world = tc->world;
    while (bytes) {
        size_t now = llmpar__least(bytes, world->desc.comm_slice);
        if (world->posted == LLMPAR__MPI_BATCH) {
            llmpar_status st = llmpar__mpi_until(tc, call, LLMPAR__MPI_BATCH - 1);
            if (st) return st;
        }
        MPI_Request *request = &world->request[world->posted];
        pthread_mutex_lock(&world->lock);
        int code = receives ? MPI_Irecv(memory, (int)now, MPI_BYTE, (int)tc->member[peer], LLMPAR__MPI_DATA_TAG, world->data, request)
                            : MPI_Isend(memory, (int)now, MPI_BYTE, (int)tc->member[peer], LLMPAR__MPI_DATA_TAG, world->data, request);
        pthread_mutex_unlock(&world->lock);
        if (code) {
            *request = MPI_REQUEST_NULL;
            return llmpar__mpi_abandon(tc, call, llmpar__mpi_error(llmpar__mpi_own_error(tc), receives ? "MPI_Irecv" : "MPI_Isend", code));
        }
        world->from[world->posted++] = receives ? tc->member[peer] : -1;
        memory = (char *)memory + now;
        bytes -= now;
    }
    return LLMPAR_OK;
}

/* ---- meeting ---- */

static llmpar_status llmpar__mpi_mismatch(llmpar__mpi_comm *tc, const llmpar_call *a, const llmpar_call *b)
{
    char text[1000];
    llmpar_call_mismatch(a->rank <= b->rank ? a : b, a->rank <= b->rank ? b : a, text, sizeof text);
    return llmpar_error_set(llmpar__mpi_own_error(tc), LLMPAR_ERR_MISMATCH, "%s", text);
}

/* Waits for world->meeting[0, count) receives into inbox[i] from the members `from[i]`, and count sends behind them. Whoever comes with another communicator's call ends it at once; other differences are
   left to the caller. */
static llmpar_status llmpar__mpi_await(llmpar__mpi_comm *tc, const llmpar_call *call, int32_t count)
{
    llmpar_mpi_world *world = tc->world;
    llmpar__mpi_wait wait;
    llmpar_status st = LLMPAR_OK;
    double differs = 0; /* when a difference was seen: those who have not come by then are not waited for much longer */
    llmpar__mpi_wait_begin(&wait, world);
    for (int left = 1; left && !st;) {
        const llmpar_call *other = NULL, *odd = NULL;
        int32_t missing = -1;
        left = 0;
        pthread_mutex_lock(&world->lock);
        for (int32_t i = 0; i < 2 * count && !st; i++) {
            if (world->meeting[i] == MPI_REQUEST_NULL) continue;
            int done = 0, code = MPI_Test(&world->meeting[i], &done, MPI_STATUS_IGNORE);
            if (code) st = llmpar__mpi_error(llmpar__mpi_own_error(tc), "MPI_Test", code);
            if (done) continue;
            left = 1;
            if (i < count) missing = i;
        }
        for (int32_t i = 0; i < count; i++) {
            const llmpar__mpi_header *in = &world->inbox[i];
            if (world->meeting[i] != MPI_REQUEST_NULL || in->call.op == LLMPAR_CALL_NONE) continue;
            if (in->context != world->outbox.context && !other) other = &in->call;
            else if (in->context == world->outbox.context && !tc->comm.unchecked && in->fingerprint != world->outbox.fingerprint && !odd) odd = &in->call;
        }
        if (!st && other) st = llmpar__mpi_mismatch(tc, call, other);
        if (!st && left && llmpar__mpi_due(world, &wait)) {
            llmpar__mpi_look(world);
            double now = llmpar__clock_seconds();
            if (differs == 0 && (odd || (world->aborted && world->failure.status == LLMPAR_ERR_MISMATCH))) differs = now; /* perhaps the other side of it is on its way here */
            if (differs == 0 || now > differs + 0.5) {
                if (odd) st = llmpar__mpi_mismatch(tc, call, odd);
                else st = llmpar__mpi_hopeless(tc, call, &wait, missing >= 0 ? world->inbox[missing].call.rank : -1);
            }
        }
        pthread_mutex_unlock(&world->lock);
        if (left && !st) llmpar__mpi_pause(world, &wait);
    }
    return st ? llmpar__mpi_settle(tc, call, st, world->meeting, NULL, 2 * count) : LLMPAR_OK;
}

/* Posts the i-th receive of a header, and the send of the outbox to the same or another member. */
static llmpar_status llmpar__mpi_post_header(llmpar__mpi_comm *tc, const llmpar_call *call, int32_t i, int32_t count, int32_t from, int32_t to)
{
    llmpar_mpi_world *world = tc->world;
    llmpar__mpi_header *in = &world->inbox[i];
    in->call.op = (int32_t)LLMPAR_CALL_NONE;
    in->call.rank = tc->member[from];
    pthread_mutex_lock(&world->lock);
    int code = MPI_Irecv(in, (int)sizeof *in, MPI_BYTE, (int)tc->member[from], LLMPAR__MPI_HEADER_TAG, world->data, &world->meeting[i]);
    if (!code) code = MPI_Isend(&world->outbox, LLMPAR__MPI_HEADER_BYTES(world->outbox.bytes), MPI_BYTE, (int)tc->member[to], LLMPAR__MPI_HEADER_TAG, world->data, &world->meeting[count + i]);
    pthread_mutex_unlock(&world->lock);
    if (!code) return LLMPAR_OK;
    return llmpar__mpi_settle(tc, call, llmpar__mpi_error(llmpar__mpi_own_error(tc), "MPI_Isend", code), world->meeting, NULL, 2 * count);
}

static void llmpar__mpi_pack(llmpar__mpi_comm *tc, const llmpar_call *call, const void *payload, size_t bytes)
{
    llmpar__mpi_header *out = &tc->world->outbox;
    out->fingerprint = llmpar_call_fingerprint(call);
    out->context = tc->context;
    out->call = *call;
    out->bytes = bytes;
    if (bytes) memcpy(out->payload, payload, bytes);
}

/* Each tells each. inbox[i] is member i's, this rank's own included. */
static llmpar_status llmpar__mpi_meet_direct(llmpar__mpi_comm *tc, const llmpar_call *call, const void *payload, size_t bytes)
{
    llmpar_mpi_world *world = tc->world;
    int32_t n = tc->comm.ranks, r = tc->comm.rank;
    llmpar__mpi_pack(tc, call, payload, bytes);
    memcpy(&world->inbox[r], &world->outbox, (size_t)LLMPAR__MPI_HEADER_BYTES(bytes));
    llmpar_status st = LLMPAR_OK;
    for (int32_t i = 0; i < 2 * n; i++) world->meeting[i] = MPI_REQUEST_NULL;
    world->met = n;
    for (int32_t k = 1; k < n && !st; k++) st = llmpar__mpi_post_header(tc, call, (r + k) % n, n, (r + k) % n, (r + k) % n);
    if (!st) st = llmpar__mpi_await(tc, call, n);
    for (int32_t i = 1; i < n && !st && !tc->comm.unchecked; i++)
        if (world->inbox[0].fingerprint != world->inbox[i].fingerprint) st = llmpar__mpi_failed(tc, llmpar__mpi_mismatch(tc, &world->inbox[0].call, &world->inbox[i].call));
    return st;
}

/* What has been heard so far: the lowest rank's call, and the lowest one that differs (op NONE: none). */
static void llmpar__mpi_merge(llmpar_call best[2], const llmpar_call *heard)
{
    llmpar_call later = *heard;
    if (heard->op == LLMPAR_CALL_NONE) return;
    if (heard->rank < best[0].rank) {
        later = best[0];
        best[0] = *heard;
    }
    uint64_t fingerprint = llmpar_call_fingerprint(&best[0]);
    if (best[1].op != LLMPAR_CALL_NONE && llmpar_call_fingerprint(&best[1]) == fingerprint) best[1].op = (int32_t)LLMPAR_CALL_NONE;
    if (llmpar_call_fingerprint(&later) != fingerprint && (best[1].op == LLMPAR_CALL_NONE || later.rank < best[1].rank)) best[1] = later;
}

/* log2 n rounds. */
static llmpar_status llmpar__mpi_meet_rounds(llmpar__mpi_comm *tc, const llmpar_call *call)
{
    llmpar_mpi_world *world = tc->world;
    int32_t n = tc->comm.ranks, r = tc->comm.rank;
    llmpar_call best[2], told;
    best[0] = best[1] = *call;
    best[1].op = (int32_t)LLMPAR_CALL_NONE;
    for (int32_t k = 1; k < n; k *= 2) {
        llmpar__mpi_pack(tc, &best[0], &best[1], sizeof best[1]);
        llmpar_status st = llmpar__mpi_post_header(tc, call, 0, 1, (r - k + n) % n, (r + k) % n);
        if (!st) st = llmpar__mpi_await(tc, call, 1);
        if (st) return st;
        memcpy(&told, world->inbox[0].payload, sizeof told);
        llmpar__mpi_merge(best, &world->inbox[0].call);
        llmpar__mpi_merge(best, &told);
    }
    if (best[1].op != LLMPAR_CALL_NONE && !tc->comm.unchecked) return llmpar__mpi_failed(tc, llmpar__mpi_mismatch(tc, &best[0], &best[1]));
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__mpi_meet(llmpar__mpi_comm *tc, const llmpar_call *call, const void *payload, size_t bytes)
{
    llmpar_status st = llmpar__mpi_check(tc, call);
    tc->world->met = 0;
    if (st) return st;
    return tc->comm.ranks <= tc->world->desc.direct ? llmpar__mpi_meet_direct(tc, call, payload, bytes) : llmpar__mpi_meet_rounds(tc, call);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__mpi_meet_one(llmpar__mpi_comm *tc, const llmpar_call *call, const void *payload, size_t bytes)
{
    llmpar_mpi_world *world = tc->world;
    llmpar_status st = llmpar__mpi_check(tc, call);
    if (st) return st;
    world->met = 1;
    llmpar__mpi_pack(tc, call, payload, bytes);
    st = llmpar__mpi_post_header(tc, call, 0, 1, call->peer, call->peer);
    if (!st) st = llmpar__mpi_await(tc, call, 1);
    if (!st && !tc->comm.unchecked && world->inbox[0].fingerprint != world->outbox.fingerprint) st = llmpar__mpi_failed(tc, llmpar__mpi_mismatch(tc, call, &world->inbox[0].call));
    return st;
}

#undef LLMPAR__MPI_HEADER_TAG
#undef LLMPAR__MPI_DATA_TAG
#undef LLMPAR__MPI_HEADER_BYTES
#undef LLMPAR__MPI_SETTLE
#undef LLMPAR__MPI_GONE

#endif /* LLMPAR_USE_MPI */
