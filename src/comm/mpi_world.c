/* mpi_world: the processes of a job: set-up, control messages, and how a failure reaches everybody.

   Two duplicated communicators. `data` carries collectives (mpi_wait.c). `control` carries notes, and one receive is always posted for them:
     BEAT       every desc.heartbeat seconds to the ranks r+1, r+2, r+4, ..: the sender lives, and this is where it is
     ASKED      once, to all, from a rank that has waited in vain and from every one that hears it: where the sender is
     FAILED     once, to all, from every rank that has heard of a failure: the failure, and where the sender is
     FINISHED   once, to all: the sender's rank function has returned
     BYE        once, to all, when all have finished: the last note of the sender. With it an empty last message on `data`, up to which everybody drops what a failure has left there
   So a failure floods the job even where its first witness dies, every survivor can say who was where, and nothing is left in flight when communicators are freed.

   Who looks at `control`: the rank's thread while it waits in a collective, and else a helper thread, ten times a second; both under world->lock, which is around every MPI call.
   A computing rank therefore beats as well as a waiting one; a stopped or killed process does not. Silence is counted in this rank's own attention (at most a quarter second a look),
   so that a rank which was itself stopped does not blame the others when it goes on. Where MPI provides less than MPI_THREAD_SERIALIZED there is no helper and silence says nothing. */
#include "comm/mpi_internal.h"

#include "base/processors_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"

#ifdef LLMPAR_USE_MPI

#include <time.h>
#include <unistd.h>

#define LLMPAR__MPI_NOTE_TAG 1    /* on control */
#define LLMPAR__MPI_LAST_TAG 3    /* on data, above those of mpi_wait.c */
#define LLMPAR__MPI_LOOK 0.1      /* seconds between two looks of the helper */
#define LLMPAR__MPI_ATTENTION 0.25
#define LLMPAR__MPI_NO(status, ...) llmpar_error_set(error, status, "mpi: " __VA_ARGS__)

static void llmpar__mpi_nap(double seconds)
{
    struct timespec t;
    t.tv_sec = (time_t)seconds;
    t.tv_nsec = (long)((seconds - (double)t.tv_sec) * 1e9);
    nanosleep(&t, NULL);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__mpi_error(llmpar_error *error, const char *function, int code)
{
    char text[MPI_MAX_ERROR_STRING + 1];
    int length = 0;
    text[0] = 0;
    MPI_Error_string(code, text, &length);
    return llmpar_error_set(error, LLMPAR_ERR_INTERNAL, "mpi: %s: %.400s", function, text);
}

/* ---- notes ---- */

static void llmpar__mpi_note_of(const llmpar_mpi_world *world, llmpar__mpi_note_kind kind, llmpar__mpi_note *out)
{
    out->kind = (int32_t)kind;
    out->rank = world->rank;
    llmpar_record_position(world->record, &out->position);
    if (world->finished.sent && !world->aborted) out->position.state = (int32_t)LLMPAR_POSITION_RETURNED;
    out->error = world->failure;
}

/* To all other ranks, once. */
static void llmpar__mpi_tell(llmpar_mpi_world *world, llmpar__mpi_cast *cast, llmpar__mpi_note_kind kind)
{
    if (cast->sent) return;
    cast->sent = 1;
    llmpar__mpi_note_of(world, kind, &cast->note);
    for (int32_t k = 1; k < world->ranks; k++) {
        int32_t to = (world->rank + k) % world->ranks;
        if (MPI_Isend(&cast->note, (int)sizeof cast->note, MPI_BYTE, to, LLMPAR__MPI_NOTE_TAG, world->control, &cast->request[to])) cast->request[to] = MPI_REQUEST_NULL;
    }
}

/* Which of two failures is the job's: a rule that all ranks share, whatever they hear first. */
static int llmpar__mpi_precedes(const llmpar_error *a, const llmpar_error *b)
{
    if (a->rank != b->rank) return a->rank < b->rank;
    return strcmp(a->text, b->text) < 0;
}

LLMPAR__PRIVATE_DEF void llmpar__mpi_fail_locked(llmpar_mpi_world *world, const llmpar_error *error)
{
    int first = !world->aborted;
    if (first || llmpar__mpi_precedes(error, &world->failure)) {
        world->failure = *error;
        if (error->status == LLMPAR_OK || error->status == LLMPAR_ERR_PEER) world->failure.status = LLMPAR_ERR_INTERNAL; /* a root error is neither */
    }
    if (!first) return;
    world->failed_at = llmpar__clock_seconds();
    __atomic_store_n(&world->aborted, 1, __ATOMIC_SEQ_CST);
    llmpar__mpi_tell(world, &world->failed, LLMPAR__MPI_FAILED);
}

LLMPAR_DEF void llmpar_mpi_world_fail(llmpar_mpi_world *world, const llmpar_error *error)
{
    pthread_mutex_lock(&world->lock);
    llmpar__mpi_fail_locked(world, error);
    pthread_mutex_unlock(&world->lock);
}

LLMPAR_DEF void llmpar_mpi_world_error(llmpar_mpi_world *world, llmpar_error *out)
{
    pthread_mutex_lock(&world->lock);
    *out = world->failure;
    pthread_mutex_unlock(&world->lock);
}

static void llmpar__mpi_heard(llmpar_mpi_world *world, const llmpar__mpi_note *note)
{
    if (note->rank < 0 || note->rank >= world->ranks) return;
    llmpar__mpi_peer *peer = &world->peer[note->rank];
    if (!peer->told || note->position.state == LLMPAR_POSITION_INSIDE) peer->position = note->position; /* once the job has failed, where it was then */
    peer->silent = 0;
    if (note->kind == LLMPAR__MPI_FINISHED) peer->finished = 1;
    if (note->kind == LLMPAR__MPI_BYE) peer->finished = peer->bye = 1;
    if (note->kind == LLMPAR__MPI_ASKED) llmpar__mpi_tell(world, &world->asked, LLMPAR__MPI_ASKED);
    if (note->kind == LLMPAR__MPI_ASKED || note->error.status) peer->told = 1;
    if (note->error.status == LLMPAR_OK) return;
    llmpar__mpi_fail_locked(world, &note->error);
}

LLMPAR__PRIVATE_DEF void llmpar__mpi_seen(llmpar_mpi_world *world, int32_t count, int completed)
{
    for (int32_t i = 0; i < count; i++) {
        const llmpar_call *call = &world->inbox[i].call;
        if (world->meeting[i] != MPI_REQUEST_NULL || call->op == LLMPAR_CALL_NONE || call->rank < 0 || call->rank >= world->ranks) continue;
        llmpar__mpi_peer *peer = &world->peer[call->rank];
        if (peer->told || peer->finished) continue; /* it knows better */
        llmpar_position *position = &peer->position;
        position->state = (int32_t)(completed ? LLMPAR_POSITION_OUTSIDE : LLMPAR_POSITION_INSIDE);
        *(completed ? &position->last : &position->now) = *call;
        if (completed) position->now.op = (int32_t)LLMPAR_CALL_NONE;
        memcpy(position->where, call->where, sizeof position->where);
    }
}

static void llmpar__mpi_listen(llmpar_mpi_world *world)
{
    if (MPI_Irecv(&world->incoming, (int)sizeof world->incoming, MPI_BYTE, MPI_ANY_SOURCE, LLMPAR__MPI_NOTE_TAG, world->control, &world->standing)) world->standing = MPI_REQUEST_NULL;
}

static void llmpar__mpi_beats(llmpar_mpi_world *world, double now)
{
    if (now - world->last_beat < world->desc.heartbeat || world->bye.sent) return;
    world->last_beat = now;
    for (int32_t i = 0; i < world->beats; i++) {
        llmpar__mpi_beat *beat = &world->beat[i];
        int done = 1;
        if (beat->request != MPI_REQUEST_NULL && (MPI_Test(&beat->request, &done, MPI_STATUS_IGNORE) || !done)) continue; /* it does not take the last one either */
        llmpar__mpi_note_of(world, LLMPAR__MPI_BEAT, &beat->note);
        if (MPI_Isend(&beat->note, (int)sizeof beat->note, MPI_BYTE, beat->to, LLMPAR__MPI_NOTE_TAG, world->control, &beat->request)) beat->request = MPI_REQUEST_NULL;
    }
}

static void llmpar__mpi_silence(llmpar_mpi_world *world, double attention)
{
    for (int32_t i = 0; i < world->ranks; i++) {
        llmpar__mpi_peer *peer = &world->peer[i];
        if (peer->finished) peer->finished_for += attention;
        if (!peer->watched || peer->bye || peer->dead) continue;
        peer->silent += attention;
        if (peer->silent < world->desc.silence) continue;
        peer->dead = 1;
        if (world->aborted) continue;
        LLMPAR__NO_ERROR(error);
        char where[320] = "never heard of";
        if (peer->position.state == LLMPAR_POSITION_INSIDE) llmpar_call_print(&peer->position.now, where, sizeof where);
        else if (peer->position.state != LLMPAR_POSITION_UNKNOWN) snprintf(where, sizeof where, "%s", peer->finished ? "returned" : "outside");
        llmpar_error_set(&error, LLMPAR_ERR_TIMEOUT, "no sign of life from rank %d for %g s: killed, stopped or unreachable; it was last seen in: %s", (int)i, world->desc.silence, where);
        error.rank = i;
        memcpy(error.where, peer->position.where, sizeof error.where);
        llmpar__mpi_fail_locked(world, &error);
    }
}

/* Takes what nobody will receive any more, whole: MPI libraries are not to be trusted with a receive that is too short. */
static void llmpar__mpi_drain(llmpar_mpi_world *world)
{
    for (int i = 0; i < 16; i++) {
        int there = 0, done = 1, bytes = 0;
        MPI_Status status;
        if (world->dropped != MPI_REQUEST_NULL && MPI_Test(&world->dropped, &done, MPI_STATUS_IGNORE)) return;
        if (!done || MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, world->data, &there, &status) || !there || MPI_Get_count(&status, MPI_BYTE, &bytes)) return;
        if ((size_t)bytes > world->bucket_bytes) {
            unsigned char *larger = (unsigned char *)malloc((size_t)bytes); /* not the rank's heap: this may be the helper's thread. At most comm_slice, and only after a failure */
            if (!larger) return; /* its sender gives up after a while, and the job cannot end in order */
            free(world->bucket);
            world->bucket = larger;
            world->bucket_bytes = (size_t)bytes;
        }
        if (status.MPI_TAG == LLMPAR__MPI_LAST_TAG) world->peer[status.MPI_SOURCE].flushed = 1;
        if (MPI_Irecv(world->bucket, bytes, MPI_BYTE, status.MPI_SOURCE, status.MPI_TAG, world->data, &world->dropped)) world->dropped = MPI_REQUEST_NULL;
    }
}

LLMPAR__PRIVATE_DEF void llmpar__mpi_look(llmpar_mpi_world *world)
{
    double now = llmpar__clock_seconds(), attention = now - world->last_look;
    world->last_look = now;
    for (int i = 0; i < 1024; i++) {
        int done = 0;
        if (world->standing == MPI_REQUEST_NULL) llmpar__mpi_listen(world);
        if (MPI_Test(&world->standing, &done, MPI_STATUS_IGNORE)) {
            world->standing = MPI_REQUEST_NULL;
            break;
        }
        if (!done) break;
        llmpar__mpi_heard(world, &world->incoming);
        llmpar__mpi_listen(world);
    }
    llmpar__mpi_beats(world, now);
    if (world->attended) llmpar__mpi_silence(world, attention < LLMPAR__MPI_ATTENTION ? attention : LLMPAR__MPI_ATTENTION);
    if (world->draining) llmpar__mpi_drain(world);
}

static void *llmpar__mpi_help(void *arg)
{
    llmpar_mpi_world *world = (llmpar_mpi_world *)arg;
    pthread_mutex_lock(&world->lock);
    while (!world->stop) {
        llmpar__mpi_look(world);
        llmpar__clock_cond_wait(&world->wake, &world->lock, (world->aborted ? 0.1 : 1) * LLMPAR__MPI_LOOK);
    }
    pthread_mutex_unlock(&world->lock);
    return NULL;
}

/* ---- set-up ---- */

/* What the ranks show each other at set-up. Plain bytes. */
typedef struct llmpar__mpi_hello {
    int32_t level, direct;
    uint64_t comm_slice;
    llmpar_error error;
} llmpar__mpi_hello;

static llmpar_status llmpar__mpi_resolve(llmpar_mpi_desc *desc, int ranks, llmpar_error *error)
{
    if (desc->comm_slice && (desc->comm_slice > (size_t)1 << 30 || desc->comm_slice < 8 * (size_t)ranks))
        return LLMPAR__MPI_NO(LLMPAR_ERR_ARGUMENT, "comm_slice = %llu bytes, expected 0 (16 MiB), or 8 bytes a rank to 1 GiB", (unsigned long long)desc->comm_slice);
    if (!(desc->deadline >= 0)) return LLMPAR__MPI_NO(LLMPAR_ERR_ARGUMENT, "deadline = %g seconds, expected 0 (none) or more", desc->deadline);
    if (!(desc->heartbeat >= 0) || !(desc->silence >= 0)) return LLMPAR__MPI_NO(LLMPAR_ERR_ARGUMENT, "heartbeat = %g and silence = %g seconds, expected 0 (0.5, 5) or more", desc->heartbeat, desc->silence);
    if (desc->direct < 0 || desc->direct > 256) return LLMPAR__MPI_NO(LLMPAR_ERR_ARGUMENT, "direct = %d ranks, expected 0 (16) to 256", (int)desc->direct);
    if (!desc->comm_slice) desc->comm_slice = (size_t)16 << 20;
    if (desc->heartbeat == 0) desc->heartbeat = 0.5;
    if (desc->silence == 0) desc->silence = 5;
    if (!desc->direct) desc->direct = 16;
    if (desc->silence < 3 * desc->heartbeat) return LLMPAR__MPI_NO(LLMPAR_ERR_ARGUMENT, "silence = %g seconds, expected at least three heartbeats of %g", desc->silence, desc->heartbeat);
    return LLMPAR_OK;
}

static MPI_Request *llmpar__mpi_requests(llmpar_heap *heap, size_t count)
{
    MPI_Request *request = LLMPAR__ALLOC(MPI_Request, heap, count);
    for (size_t i = 0; request && i < count; i++) request[i] = MPI_REQUEST_NULL;
    return request;
}

/* Everything that may fail on one rank alone. */
static llmpar_status llmpar__mpi_furnish(llmpar_mpi_world *world, int level, llmpar_error *error)
{
    size_t n = (size_t)world->ranks;
    llmpar_status st = llmpar__mpi_resolve(&world->desc, (int)world->ranks, error);
    if (st) return st;
    for (int32_t k = 1; k < world->ranks; k *= 2) world->beats++;
    world->inboxes = world->desc.direct < world->ranks ? world->desc.direct : world->ranks;
    if (world->inboxes < 2) world->inboxes = 2;
    world->peer = LLMPAR__ZALLOC(llmpar__mpi_peer, world->heap, n);
    world->beat = LLMPAR__ZALLOC(llmpar__mpi_beat, world->heap, (size_t)world->beats);
    world->inbox = LLMPAR__ZALLOC(llmpar__mpi_header, world->heap, (size_t)world->inboxes);
    world->meeting = llmpar__mpi_requests(world->heap, 2 * (size_t)world->inboxes);
    world->casting = llmpar__mpi_requests(world->heap, 5 * n);
    world->bucket_bytes = sizeof *world->inbox; /* headers can be dropped even without memory */
    world->bucket = (unsigned char *)malloc(world->bucket_bytes);
    if (!world->bucket || !world->peer || !world->beat || !world->inbox || !world->meeting || !world->casting)
        return LLMPAR__MPI_NO(LLMPAR_ERR_MEMORY, "out of memory for %d ranks", (int)world->ranks);
    if (llmpar_record_create(world->heap, world->rank, world->desc.deadline < 1e12 ? (uint64_t)(world->desc.deadline * 1000) : 0, &world->record)) return LLMPAR__MPI_NO(LLMPAR_ERR_MEMORY, "out of memory for the record");
    world->asked.request = world->casting;
    world->failed.request = world->casting + n;
    world->finished.request = world->casting + 2 * n;
    world->bye.request = world->casting + 3 * n;
    for (int32_t i = 0; i < world->ranks; i++) {
        world->peer[i].position.rank = i;
        world->peer[i].position.state = (int32_t)LLMPAR_POSITION_UNKNOWN;
    }
    for (int32_t i = 0, k = 1; i < world->beats; i++, k *= 2) {
        world->beat[i].to = (world->rank + k) % world->ranks;
        world->beat[i].request = MPI_REQUEST_NULL;
        world->peer[(world->rank - k + world->ranks) % world->ranks].watched = 1;
    }
    if (level < MPI_THREAD_SERIALIZED || world->desc.unattended || world->ranks == 1) return LLMPAR_OK;
    int failed = pthread_create(&world->helper, NULL, llmpar__mpi_help, world); /* it waits for the lock */
    if (failed) return LLMPAR__MPI_NO(LLMPAR_ERR_INTERNAL, "the helper thread could not be started: %s", strerror(failed));
    world->helping = 1;
    return LLMPAR_OK;
}

/* Ends the helper, and waits for it. Without the lock. */
static void llmpar__mpi_dismiss(llmpar_mpi_world *world)
{
    if (!world->helping) return;
    pthread_mutex_lock(&world->lock);
    world->stop = 1;
    pthread_cond_signal(&world->wake);
    pthread_mutex_unlock(&world->lock);
    pthread_join(world->helper, NULL);
    world->helping = 0;
}

/* All ranks are well and alike, or all say who is not. */
static llmpar_status llmpar__mpi_agree(llmpar_mpi_world *world, int level, llmpar_status st, llmpar_error *error)
{
    llmpar__mpi_hello mine, first, lowest;
    int32_t sick = st ? world->rank : world->ranks, sickest = 0;
    memset(&mine, 0, sizeof mine);
    mine.level = level;
    mine.direct = world->desc.direct;
    mine.comm_slice = world->desc.comm_slice;
    if (st) mine.error = *error;
    else llmpar_error_clear(&mine.error);
    mine.error.rank = world->rank;
    lowest = mine;
    /* The lowest rank with an error shows it to all. Set-up may use blocking collectives. */
    int code = MPI_Allreduce(&sick, &sickest, 1, MPI_INT32_T, MPI_MIN, world->data);
    if (code) return llmpar__mpi_error(error, "MPI_Allreduce", code);
    if (sickest < world->ranks) {
        code = MPI_Bcast(&lowest, (int)sizeof lowest, MPI_BYTE, sickest, world->data);
        if (code) return llmpar__mpi_error(error, "MPI_Bcast", code);
        if (st) return st;
        *error = lowest.error;
        return error->status;
    }
    first = mine;
    code = MPI_Bcast(&first, (int)sizeof first, MPI_BYTE, 0, world->data);
    if (code) return llmpar__mpi_error(error, "MPI_Bcast", code);
    int32_t differs = first.direct != mine.direct || first.comm_slice != mine.comm_slice ? world->rank : world->ranks, other = 0, levels[2], least[2];
    levels[0] = level;
    levels[1] = !world->desc.unattended;
    code = MPI_Allreduce(&differs, &other, 1, MPI_INT32_T, MPI_MIN, world->data);
    if (!code) code = MPI_Allreduce(levels, least, 2, MPI_INT32_T, MPI_MIN, world->data);
    if (code) return llmpar__mpi_error(error, "MPI_Allreduce", code);
    world->serialized = least[0] >= MPI_THREAD_SERIALIZED;
    world->attended = world->serialized && least[1];
    if (other == world->ranks) return LLMPAR_OK;
    lowest = mine;
    code = MPI_Bcast(&lowest, (int)sizeof lowest, MPI_BYTE, other, world->data);
    if (code) return llmpar__mpi_error(error, "MPI_Bcast", code);
    LLMPAR__MPI_NO(LLMPAR_ERR_MISMATCH, "the ranks are described differently: rank 0: comm_slice %llu, direct %d; rank %d: comm_slice %llu, direct %d", (unsigned long long)first.comm_slice,
                     (int)first.direct, (int)other, (unsigned long long)lowest.comm_slice, (int)lowest.direct);
    error->rank = other;
    return LLMPAR_ERR_MISMATCH;
}

/* Are there more ranks on this node than processors? Then a waiting rank gives its processor away at once. */
static void llmpar__mpi_neighbours(llmpar_mpi_world *world)
{
    MPI_Comm node = MPI_COMM_NULL;
    int here = world->ranks;
    llmpar__processors mine, all;
    llmpar__processors_allowed(&mine);
    all = mine;
    if (!MPI_Comm_split_type(world->data, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node) && node != MPI_COMM_NULL) {
        MPI_Comm_size(node, &here);
        if (MPI_Allreduce(mine.mask, all.mask, LLMPAR__PROCESSORS_WORDS, MPI_UINT64_T, MPI_BOR, node)) all = mine;
        MPI_Comm_free(&node);
    }
    /* Processes that mpirun has bound have their processors to themselves; others share them. */
    int32_t cores = llmpar__processors_cores(&mine, NULL), processors = mine.count;
    if (mine.mask_known) {
        processors = 0;
        for (int32_t i = 0; i < LLMPAR__PROCESSORS_WORDS; i++) processors += __builtin_popcountll((unsigned long long)all.mask[i]);
    }
    world->crowded = here > processors;
    world->threads = llmpar__processors_share(cores, memcmp(mine.mask, all.mask, sizeof mine.mask) ? 1 : here);
}

static void llmpar__mpi_free(llmpar_mpi_world *world)
{
    llmpar_heap *heap = world->heap;
    llmpar_record_destroy(world->record);
    llmpar_heap_free(heap, world->peer);
    llmpar_heap_free(heap, world->beat);
    llmpar_heap_free(heap, world->inbox);
    llmpar_heap_free(heap, world->meeting);
    llmpar_heap_free(heap, world->casting);
    llmpar_heap_free(heap, world->scratch);
    free(world->bucket);
    pthread_cond_destroy(&world->wake);
    pthread_mutex_destroy(&world->lock);
    llmpar_heap_free(heap, world);
}

LLMPAR_DEF llmpar_status llmpar_mpi_world_create(llmpar_heap *heap, const llmpar_mpi_desc *desc, llmpar_mpi_world **out, llmpar_error *error)
{
    *out = NULL;
    int there = 0, over = 0, inter = 0, level = 0, main_thread = 1, rank = 0, ranks = 0;
    LLMPAR__NO_ERROR(unheard);
    if (!error) error = &unheard;
    MPI_Initialized(&there);
    if (!there) return LLMPAR__MPI_NO(LLMPAR_ERR_CONFIG, "MPI is not initialised: call MPI_Init_thread before, with MPI_THREAD_SERIALIZED");
    MPI_Finalized(&over);
    if (over) return LLMPAR__MPI_NO(LLMPAR_ERR_CONFIG, "MPI is already finalised, and cannot be initialised again in this process");
    MPI_Comm from = desc && desc->comm ? *(const MPI_Comm *)desc->comm : MPI_COMM_WORLD;
    if (from == MPI_COMM_NULL) return LLMPAR__MPI_NO(LLMPAR_ERR_CONFIG, "the communicator is MPI_COMM_NULL");
    int code = MPI_Comm_test_inter(from, &inter);
    if (!code && inter) return LLMPAR__MPI_NO(LLMPAR_ERR_CONFIG, "the communicator is an intercommunicator, expected an intracommunicator");
    MPI_Query_thread(&level);
    if (level < MPI_THREAD_SERIALIZED) MPI_Is_thread_main(&main_thread);
    if (!main_thread) return LLMPAR__MPI_NO(LLMPAR_ERR_CONFIG, "called on another thread than MPI was initialised on, and MPI provides less than MPI_THREAD_SERIALIZED");
    if (!code) code = MPI_Comm_rank(from, &rank);
    if (!code) code = MPI_Comm_size(from, &ranks);
    if (code) return llmpar__mpi_error(error, "MPI_Comm_size", code);

    llmpar_mpi_world spare, *world = LLMPAR__ZALLOC(llmpar_mpi_world, heap, 1);
    int alone = !world; /* out of memory: takes part in the agreement all the same */
    if (alone) {
        world = &spare;
        memset(world, 0, sizeof *world);
    }
    world->heap = heap;
    if (desc) world->desc = *desc;
    world->rank = (int32_t)rank;
    world->ranks = (int32_t)ranks;
    world->standing = world->dropped = MPI_REQUEST_NULL;
    world->last_look = world->last_beat = llmpar__clock_seconds();
    world->next_context = 1;
    for (int i = 0; i < LLMPAR__MPI_BATCH; i++) world->request[i] = MPI_REQUEST_NULL;
    llmpar_error_clear(&world->failure);
    code = MPI_Comm_dup(from, &world->data);
    if (!code) code = MPI_Comm_dup(from, &world->control);
    if (code) {
        if (!alone) llmpar_heap_free(heap, world);
        return llmpar__mpi_error(error, "MPI_Comm_dup", code);
    }
    MPI_Comm_set_errhandler(world->data, MPI_ERRORS_RETURN);
    MPI_Comm_set_errhandler(world->control, MPI_ERRORS_RETURN);
    pthread_mutex_init(&world->lock, NULL);
    llmpar__clock_cond_init(&world->wake);
    pthread_mutex_lock(&world->lock);
    llmpar_status st = alone ? LLMPAR__MPI_NO(LLMPAR_ERR_MEMORY, "out of memory") : llmpar__mpi_furnish(world, level, error);
    if (st && error->rank < 0) error->rank = world->rank;
    st = llmpar__mpi_agree(world, level, st, error);
    if (!st) llmpar__mpi_neighbours(world);
    if (!st) llmpar__mpi_listen(world);
    world->last_look = world->last_beat = llmpar__clock_seconds();
    if (st || !world->attended) world->stop = 1;
    pthread_mutex_unlock(&world->lock);
    if (st || world->stop) llmpar__mpi_dismiss(world);
    if (!st) {
        *out = world;
        return LLMPAR_OK;
    }
    MPI_Comm_free(&world->data);
    MPI_Comm_free(&world->control);
    if (alone) {
        pthread_cond_destroy(&world->wake);
        pthread_mutex_destroy(&world->lock);
    } else {
        llmpar__mpi_free(world);
    }
    return st;
}

LLMPAR_DEF int32_t llmpar_mpi_world_rank(const llmpar_mpi_world *world) { return world->rank; }
LLMPAR_DEF int32_t llmpar_mpi_world_ranks(const llmpar_mpi_world *world) { return world->ranks; }
LLMPAR_DEF int32_t llmpar_mpi_world_threads(const llmpar_mpi_world *world) { return world->serialized ? world->threads : 1; }
LLMPAR_DEF int llmpar_mpi_world_serialized(const llmpar_mpi_world *world) { return world->serialized; }

/* ---- who is where ---- */

/* Looks, and then sleeps a little without the lock. */
static void llmpar__mpi_idle(llmpar_mpi_world *world)
{
    llmpar__mpi_look(world);
    pthread_mutex_unlock(&world->lock);
    llmpar__mpi_nap(0.0005);
    pthread_mutex_lock(&world->lock);
}

static void llmpar__mpi_position(void *user, int32_t rank, llmpar_position *out)
{
    llmpar_mpi_world *world = (llmpar_mpi_world *)user;
    if (rank == world->rank) llmpar_record_position(world->record, out);
    else *out = world->peer[rank].position;
}

LLMPAR__PRIVATE_DEF void llmpar__mpi_who(llmpar_mpi_world *world, char *text, size_t capacity)
{
    double limit = llmpar__clock_seconds() + 1;
    if (!world->aborted) llmpar__mpi_tell(world, &world->asked, LLMPAR__MPI_ASKED); /* what it has seen of them is a guess */
    for (int waiting = 1; waiting && llmpar__clock_seconds() < limit;) {
        waiting = 0;
        for (int32_t i = 0; i < world->ranks; i++)
            if (i != world->rank && !world->peer[i].told && !world->peer[i].dead && !world->peer[i].finished) waiting = 1;
        if (waiting) llmpar__mpi_idle(world);
    }
    llmpar_position_print(llmpar__mpi_position, world, world->ranks, text, capacity);
}

/* ---- the end ---- */

static int llmpar__mpi_all(const llmpar_mpi_world *world, int bye)
{
    for (int32_t i = 0; i < world->ranks; i++)
        if (i != world->rank && !(bye ? world->peer[i].bye && world->peer[i].flushed : world->peer[i].finished)) return 0;
    return 1;
}

static void llmpar__mpi_flush(llmpar_mpi_world *world)
{
    for (int32_t i = 0; i < world->ranks; i++)
        if (i != world->rank && MPI_Isend(world->outbox.payload, 0, MPI_BYTE, (int)i, LLMPAR__MPI_LAST_TAG, world->data, &world->bye.request[world->ranks + i])) world->bye.request[world->ranks + i] = MPI_REQUEST_NULL;
}

static int llmpar__mpi_sent(llmpar_mpi_world *world)
{
    int done = 1, all = 1;
    for (int32_t i = 0; i < 5 * world->ranks; i++)
        if (world->casting[i] != MPI_REQUEST_NULL && !MPI_Test(&world->casting[i], &done, MPI_STATUS_IGNORE)) all = all && done;
    for (int32_t i = 0; i < world->beats; i++)
        if (world->beat[i].request != MPI_REQUEST_NULL && !MPI_Test(&world->beat[i].request, &done, MPI_STATUS_IGNORE)) all = all && done;
    return all;
}

LLMPAR_DEF int llmpar_mpi_world_finish(llmpar_mpi_world *world, double grace, llmpar_error *root)
{
    pthread_mutex_lock(&world->lock);
    double called = llmpar__clock_seconds();
    if (!(grace > 0)) grace = 3;
    llmpar__mpi_tell(world, &world->finished, LLMPAR__MPI_FINISHED);
    while (!llmpar__mpi_all(world, 0)) {
        if (world->aborted && llmpar__clock_seconds() - (called > world->failed_at ? called : world->failed_at) > grace) break;
        if (world->aborted) world->draining = 1;
        llmpar__mpi_idle(world);
    }
    if (llmpar__mpi_all(world, 0)) {
        world->draining = 1;
        llmpar__mpi_tell(world, &world->bye, LLMPAR__MPI_BYE);
        llmpar__mpi_flush(world);
        double limit = llmpar__clock_seconds() + 10;
        int done = 0;
        while (!done && llmpar__clock_seconds() < limit) {
            llmpar__mpi_idle(world);
            done = llmpar__mpi_all(world, 1) && llmpar__mpi_sent(world) && world->dropped == MPI_REQUEST_NULL;
        }
        world->orderly = done;
        if (!done && !world->aborted) {
            int32_t late = 0;
            LLMPAR__NO_ERROR(error);
            while (late < world->ranks - 1 && (late == world->rank || (world->peer[late].bye && world->peer[late].flushed))) late++;
            llmpar_error_set(&error, LLMPAR_ERR_TIMEOUT, "mpi: rank %d has not confirmed the end of the job within 10 s", (int)late);
            error.rank = late;
            llmpar__mpi_fail_locked(world, &error);
        }
    }
    if (root) {
        if (world->aborted) *root = world->failure;
        else llmpar_error_clear(root);
    }
    pthread_mutex_unlock(&world->lock);
    llmpar__mpi_dismiss(world);
    for (int k = 0; k < 2; k++) {
        MPI_Request *receive = k ? &world->dropped : &world->standing;
        int done = 0;
        if (*receive == MPI_REQUEST_NULL) continue;
        MPI_Cancel(receive);
        for (int i = 0; i < 1000 && !done; i++)
            if (MPI_Test(receive, &done, MPI_STATUS_IGNORE)) break;
    }
    return world->orderly;
}

LLMPAR_DEF void llmpar_mpi_world_destroy(llmpar_mpi_world *world)
{
    if (!world) return;
    llmpar__mpi_dismiss(world);
    if (world->orderly) { /* else messages to the dead are still under way, and freeing may wait for them */
        MPI_Comm_free(&world->data);
        MPI_Comm_free(&world->control);
    }
    llmpar__mpi_free(world);
}

#undef LLMPAR__MPI_NOTE_TAG
#undef LLMPAR__MPI_LAST_TAG
#undef LLMPAR__MPI_LOOK
#undef LLMPAR__MPI_ATTENTION
#undef LLMPAR__MPI_NO

#endif /* LLMPAR_USE_MPI */
