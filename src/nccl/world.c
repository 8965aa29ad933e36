/* world: communicators on NCCL: the world, its splits, and their end.

     create   checks -> meeting (meet.c) -> helper thread -> ncclCommInitRankConfig -> scratch, allocator
     split    color and key to rank 0 -> group -> ncclCommSplit of all members, unless all end up alone
     destroy  waits for the last collective -> ncclCommFinalize, ncclCommDestroy (beside this thread: it waits for the peers'); with the last communicator: farewell, helper, connections

   All communicators are non-blocking, so that a thread never stays in NCCL while the job fails elsewhere. */
#include "nccl/nccl.h"
#include "nccl/nccl_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LLMPAR__NCCL_FAREWELL 3.0 /* seconds for which goodbyes are exchanged, and after a failure rank 0 waits for the others */

static llmpar_status llmpar__nccl_split(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out);
static void llmpar__nccl_destroy(llmpar_comm *comm);

static void llmpar__nccl_abort(llmpar_comm *comm, const llmpar_error *error)
{
    llmpar__nccl_comm *tc = (llmpar__nccl_comm *)comm->state;
    llmpar__nccl_fail(tc->world, error);
}

static llmpar_status llmpar__nccl_resolve(llmpar__nccl_world *world, const llmpar_nccl_desc *given)
{
    llmpar_nccl_desc *desc = &world->desc;
    if (given) *desc = *given;
    if (desc->deadline != desc->deadline || desc->silence != desc->silence)
        return llmpar_error_set(world->error, LLMPAR_ERR_ARGUMENT, "nccl: deadline or silence is not a number, expected seconds, 0 (600, 10) or negative (none)");
    if (desc->silence > 0 && desc->silence < 1.5) return llmpar_error_set(world->error, LLMPAR_ERR_ARGUMENT, "nccl: silence = %g seconds, expected at least 1.5: a sign of life comes every half second", desc->silence);
    if (desc->slice && (desc->slice < 8 * (size_t)world->ranks || desc->slice > (size_t)1 << 30))
        return llmpar_error_set(world->error, LLMPAR_ERR_ARGUMENT, "nccl: slice = %llu bytes, expected 0 (16 MiB), or 8 bytes a rank to 1 GiB", (unsigned long long)desc->slice);
    if (desc->file && !*desc->file) return llmpar_error_set(world->error, LLMPAR_ERR_ARGUMENT, "nccl: file = \"\", expected a path that all ranks see, or none");
    desc->deadline = desc->deadline < 0 ? 0 : desc->deadline > 0 ? desc->deadline : 600;
    desc->silence = desc->silence < 0 ? 0 : desc->silence > 0 ? desc->silence : 10;
    if (!desc->slice) desc->slice = (size_t)16 << 20;
    return LLMPAR_OK;
}

/* Everything that takes host memory. */
static llmpar_status llmpar__nccl_furnish(llmpar__nccl_world *world)
{
    size_t n = (size_t)world->ranks, links = world->rank ? 1 : n, most = llmpar__nccl_most_in(world);
    int there = 1;
    world->peer = (llmpar__nccl_peer *)llmpar_heap_zalloc(world->heap, links, sizeof *world->peer);
    world->group_member = (int32_t *)llmpar_heap_zalloc(world->heap, n, sizeof *world->group_member);
    world->polled = (struct pollfd *)llmpar_heap_zalloc(world->heap, 1 + links, sizeof *world->polled);
    world->polled_peer = (int32_t *)llmpar_heap_zalloc(world->heap, 1 + links, sizeof *world->polled_peer);
    for (size_t i = 0; world->peer && i < links; i++) world->peer[i].link.fd = -1; /* 0 is somebody's */
    if (!world->peer || !world->group_member || !world->polled || !world->polled_peer) return llmpar_error_set(world->error, LLMPAR_ERR_MEMORY, "nccl: out of memory for %d ranks", (int)world->ranks);
    for (size_t i = 0; i < links; i++) {
        world->peer[i].position.rank = (int32_t)i;
        world->peer[i].position.state = (int32_t)LLMPAR_POSITION_UNKNOWN;
        if (world->rank == 0 && i == 0) continue; /* itself */
        /* Rank 0 says a bounded number of things to each; a rank, whatever there is room for. */
        there = there && llmpar__nccl_link_make(world->heap, &world->peer[i].link, world->rank ? 2 * most : 8192, world->rank ? LLMPAR__NCCL_OUT : 4 * sizeof(llmpar__nccl_verdict) + 8192 + n * sizeof(int32_t));
    }
    if (world->rank == 0) there = there && llmpar__nccl_hub_furnish(world);
    if (there && !world->record) {
        there = !llmpar_record_create(world->heap, world->rank, (uint64_t)(world->desc.deadline < 1e12 ? world->desc.deadline * 1000 : 0), &world->record);
        world->owns_record = there;
    }
    if (!there)
        return llmpar_error_set(world->error, LLMPAR_ERR_MEMORY, "nccl: out of memory for the connections of %d ranks", (int)world->ranks);
    if (!llmpar__nccl_pipe(world->pipe)) return llmpar_error_set(world->error, LLMPAR_ERR_IO, "nccl: the system gives no pipe: %s", strerror(errno));
    return LLMPAR_OK;
}

static int llmpar__nccl_all_said_bye(const llmpar__nccl_world *world)
{
    for (int32_t i = world->rank ? 0 : 1; i < (world->rank ? 1 : world->ranks); i++)
        if (!world->peer[i].bye && !world->peer[i].dead && world->peer[i].link.fd >= 0) return 0;
    return 1;
}

/* The last messages of this rank. Rank 0 stays until all the others have said theirs: it carries what they still have to tell each other. They stay until it has read theirs, which takes long where this rank is far ahead:
   what a closed connection still holds is lost. */
static void llmpar__nccl_farewell(llmpar__nccl_world *world)
{
    double limit = 0;
    if (!world->helping || world->ranks == 1) return;
    pthread_mutex_lock(&world->lock);
    if (!world->finished) llmpar__nccl_to_hub(world, LLMPAR__NCCL_FINISH, NULL, 0);
    world->finished = 1;
    if (world->rank) {
        world->ending = 1;
        llmpar__nccl_to_hub(world, LLMPAR__NCCL_BYE, NULL, 0);
        if (world->desc.deadline > 0) limit = llmpar__nccl_now() + (world->desc.deadline > LLMPAR__NCCL_FAREWELL ? world->desc.deadline : LLMPAR__NCCL_FAREWELL);
    }
    while (!llmpar__nccl_all_said_bye(world)) {
        double now = llmpar__nccl_now();
        if (world->aborted && (limit <= 0 || limit > now + LLMPAR__NCCL_FAREWELL)) limit = now + LLMPAR__NCCL_FAREWELL;
        if (limit > 0 && now > limit) break;
        llmpar__nccl_await(world, now + 0.1);
    }
    pthread_mutex_unlock(&world->lock);
}

/* After all communicators. */
static void llmpar__nccl_world_free(llmpar__nccl_world *world)
{
    llmpar_heap *heap = world->heap;
    llmpar_device *device = world->device;
    llmpar__nccl_farewell(world);
    llmpar__nccl_watch_end(world);
    llmpar__nccl_buried(world, 2 * LLMPAR__NCCL_FAREWELL); /* who is not through by then has a peer that never lets go */
    for (llmpar__nccl_grave *grave = world->graves, *next; grave; grave = next) {
        next = grave->next;
        if (__atomic_sub_fetch(&grave->holders, 1, __ATOMIC_SEQ_CST) == 0) free(grave);
    }
    if (world->last) device->event_destroy(device, world->last);
    if (world->scratch) device->free(device, world->scratch, world->scratch_bytes);
    if (world->remembers) llmpar__nccl_memory_end(device);
    for (int32_t i = 0; world->peer && i < (world->rank ? 1 : world->ranks); i++) {
        llmpar__nccl_close(&world->peer[i].link.fd);
        llmpar_heap_free(heap, world->peer[i].link.in);
        llmpar_heap_free(heap, world->peer[i].link.out);
    }
    llmpar__nccl_close(&world->pipe[0]);
    llmpar__nccl_close(&world->pipe[1]);
    llmpar__nccl_hub_free(world);
    if (world->owns_record) llmpar_record_destroy(world->record);
    llmpar_heap_free(heap, world->peer);
    llmpar_heap_free(heap, world->polled);
    llmpar_heap_free(heap, world->polled_peer);
    llmpar_heap_free(heap, world->group_member);
    pthread_cond_destroy(&world->wake);
    pthread_mutex_destroy(&world->lock);
    pthread_mutex_destroy(&world->nccl_lock);
    llmpar_heap_free(heap, world);
}

/* The last one to hold the world frees it. */
static void llmpar__nccl_release(llmpar__nccl_world *world)
{
    if (--world->comms == 0) llmpar__nccl_world_free(world);
}

static llmpar__nccl_world *llmpar__nccl_world_make(llmpar_ctx *ctx, llmpar_device *device)
{
    llmpar__nccl_world *world = (llmpar__nccl_world *)llmpar_heap_zalloc(&ctx->heap, 1, sizeof *world);
    pthread_condattr_t attributes;
    if (!world) return NULL;
    world->heap = &ctx->heap;
    world->device = device;
    world->error = &ctx->error;
    world->rank = ctx->rank;
    world->ranks = ctx->world;
    world->pipe[0] = world->pipe[1] = -1;
    world->free_slot = -1;
    world->comms = 1; /* whoever makes it */
    if (ctx->host_comm && ctx->host_comm->size >= offsetof(llmpar_comm, record) + sizeof ctx->host_comm->record) world->record = ctx->host_comm->record; /* one of all calls of the rank */
    llmpar__nccl_own_host(world->host, sizeof world->host);
    llmpar_error_clear(&world->verdict.error);
    world->verdict.other = -1;
    pthread_mutex_init(&world->lock, NULL);
    pthread_mutex_init(&world->nccl_lock, NULL);
    pthread_condattr_init(&attributes);
#if !defined(__APPLE__)
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
#endif
    pthread_cond_init(&world->wake, &attributes);
    pthread_condattr_destroy(&attributes);
    return world;
}

/* ---- communicators ---- */

/* A communicator of these world ranks (copied), without its NCCL half. Local. */
static llmpar_status llmpar__nccl_make(llmpar__nccl_world *world, const int32_t *member, int32_t ranks, int32_t rank, uint64_t context, const char *name, llmpar__nccl_comm **out)
{
    llmpar_heap *heap = world->heap;
    llmpar__nccl_comm *tc = (llmpar__nccl_comm *)llmpar_heap_zalloc(heap, 1, sizeof *tc);
    llmpar_error *error = world->error;
    *out = NULL;
    if (!tc) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "communicator %.23s: out of memory", name);
    llmpar_comm *comm = &tc->comm;
    size_t n = (size_t)ranks, length = strlen(name);
    tc->world = world;
    world->comms++;
    tc->context = context;
    tc->member = (int32_t *)llmpar_heap_alloc(heap, n, sizeof *tc->member);
    tc->sent = (uint64_t *)llmpar_heap_zalloc(heap, n, sizeof *tc->sent);
    tc->received = (uint64_t *)llmpar_heap_zalloc(heap, n, sizeof *tc->received);
    comm->state = tc;
    comm->abi = LLMPAR_COMM_ABI;
    comm->size = (uint32_t)sizeof *comm;
    comm->rank = rank;
    comm->ranks = ranks;
    comm->axis = tc->axis;
    comm->device = world->device;
    comm->error = error;
    comm->split = llmpar__nccl_split;
    comm->destroy = llmpar__nccl_destroy;
    comm->abort = llmpar__nccl_abort;
    comm->unchecked = world->desc.unchecked;
    memcpy(tc->axis, name, length < sizeof tc->axis ? length : sizeof tc->axis - 1);
    llmpar_comm_fill(comm, llmpar__nccl_enqueue);
    pthread_mutex_lock(&world->nccl_lock);
    tc->next = world->first;
    tc->previous = &world->first;
    if (world->first) world->first->previous = &tc->next;
    world->first = tc;
    pthread_mutex_unlock(&world->nccl_lock);
    if (!llmpar_halving_make(heap, ranks, rank, &tc->halving) || !tc->member || !tc->sent || !tc->received) {
        llmpar__nccl_destroy(comm);
        return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "communicator %.23s: out of memory for %d ranks", name, (int)ranks);
    }
    memcpy(tc->member, member, n * sizeof *member);
    if (llmpar_record_attach(world->record, comm, member)) {
        llmpar__nccl_destroy(comm);
        return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "communicator %.23s: out of memory for its record", name);
    }
    *out = tc;
    return LLMPAR_OK;
}

/* NCCL's end of a communicator, in good order where the job is sound. */
static void llmpar__nccl_end(llmpar__nccl_comm *tc)
{
    llmpar__nccl_world *world = tc->world;
    double limit = llmpar__nccl_now() + (world->desc.deadline > 0 && world->desc.deadline < 60 ? world->desc.deadline : 60);
    ncclResult_t state = ncclSuccess;
    pthread_mutex_lock(&world->nccl_lock);
    int there = tc->nccl != NULL;
    if (there) ncclCommFinalize(tc->nccl);
    while (tc->nccl) {
        if (ncclCommGetAsyncError(tc->nccl, &state)) state = ncclInternalError;
        if (state != ncclInProgress || llmpar__nccl_now() > limit) break;
        pthread_mutex_unlock(&world->nccl_lock); /* the helper may abort it meanwhile */
        llmpar__nccl_nap(0.0002);
        pthread_mutex_lock(&world->nccl_lock);
    }
    if (tc->nccl) llmpar__nccl_bury(world, tc->nccl, state != ncclSuccess);
    tc->nccl = NULL;
    pthread_mutex_unlock(&world->nccl_lock);
    if (!__atomic_load_n(&world->aborted, __ATOMIC_SEQ_CST)) llmpar__nccl_buried(world, LLMPAR__NCCL_FAREWELL); /* ranks may destroy in different orders: not until all have come */
}

static void llmpar__nccl_destroy(llmpar_comm *comm)
{
    llmpar__nccl_comm *tc = (llmpar__nccl_comm *)comm->state;
    llmpar__nccl_world *world = tc->world;
    llmpar_heap *heap = world->heap;
    if (world->pending) world->device->event_synchronize(world->device, world->last); /* a failure of the stream is its caller's to hear */
    llmpar__nccl_end(tc);
    pthread_mutex_lock(&world->nccl_lock);
    *tc->previous = tc->next;
    if (tc->next) tc->next->previous = tc->previous;
    pthread_mutex_unlock(&world->nccl_lock);
    if (world->helping && comm->ranks > 1) {
        pthread_mutex_lock(&world->lock);
        llmpar__nccl_to_hub(world, LLMPAR__NCCL_DROP, &tc->context, sizeof tc->context);
        pthread_mutex_unlock(&world->lock);
    }
    llmpar_heap_free(heap, tc->member);
    llmpar_heap_free(heap, tc->sent);
    llmpar_heap_free(heap, tc->received);
    llmpar_halving_free(heap, &tc->halving);
    llmpar_heap_free(heap, tc);
    llmpar__nccl_release(world);
}

/* Color and key to rank 0, and the group that comes back, in world->group. */
static llmpar_status llmpar__nccl_ask_group(llmpar__nccl_comm *tc, const llmpar_call *call, int32_t color, int32_t key)
{
    llmpar__nccl_world *world = tc->world;
    pthread_mutex_lock(&world->lock);
    world->group.ranks = -1;
    pthread_mutex_unlock(&world->lock);
    llmpar_status st = llmpar__nccl_ask_hub(tc, call, color, key, LLMPAR__NCCL_SPLIT);
    if (st) return st;
    pthread_mutex_lock(&world->lock);
    while (world->group.ranks < 0 && !world->aborted) llmpar__nccl_await(world, llmpar__nccl_now() + 0.1);
    int there = world->group.ranks >= 0;
    pthread_mutex_unlock(&world->lock);
    return there ? LLMPAR_OK : llmpar__nccl_sound(tc, call);
}

/* A split has failed, and a thread of NCCL may still be at work on it: the abort of the parent waits for that one. 0: still is. */
static int llmpar__nccl_unborn(llmpar__nccl_comm *tc)
{
    llmpar__nccl_world *world = tc->world;
    int there = 1;
    for (double limit = llmpar__nccl_now() + 3 * LLMPAR__NCCL_FAREWELL; there && llmpar__nccl_now() < limit;) {
        pthread_mutex_lock(&world->nccl_lock);
        there = tc->nccl != NULL;
        pthread_mutex_unlock(&world->nccl_lock);
        if (there) llmpar__nccl_nap(0.001);
    }
    if (there || !llmpar__nccl_buried(world, LLMPAR__NCCL_FAREWELL)) return 0;
    pthread_mutex_lock(&world->nccl_lock);
    if (*tc->born) llmpar__nccl_bury(world, *tc->born, 1);
    pthread_mutex_unlock(&world->nccl_lock);
    return 1;
}

/* NCCL's part of a split: made's communicator, if it has several ranks. Everybody has a color, its group's first rank or itself: where such a split fails, NCCL crashes on a rank without (seen in the source of 2.20 to
   2.30). So who is alone gets one too, and lets it go. */
static llmpar_status llmpar__nccl_bear(llmpar__nccl_comm *tc, const llmpar_call *call, const llmpar__nccl_group *group, llmpar__nccl_comm *made)
{
    llmpar__nccl_world *world = tc->world;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    ncclResult_t result = ncclInvalidUsage;
    int over = 1;
    tc->born = (ncclComm_t *)calloc(1, sizeof *tc->born);
    if (!tc->born) return llmpar__nccl_failed(tc, llmpar_error_set(world->error, LLMPAR_ERR_MEMORY, "communicator %.23s: out of memory for a split", tc->axis));
    config.blocking = 0;
    pthread_mutex_lock(&world->nccl_lock);
    if (tc->nccl) result = ncclCommSplit(tc->nccl, group->ranks > 1 ? world->group_member[0] : world->rank, group->rank, tc->born, &config);
    pthread_mutex_unlock(&world->nccl_lock);
    llmpar_status st = llmpar__nccl_settle(tc, call, "ncclCommSplit", result); /* NCCL sets the new handle before it says so of the parent */
    if (st) {
        over = llmpar__nccl_unborn(tc);
    } else {
        pthread_mutex_lock(&world->nccl_lock);
        if (group->ranks > 1) made->nccl = *tc->born;
        else if (*tc->born) llmpar__nccl_bury(world, *tc->born, 1);
        result = group->ranks > 1 && made->nccl ? ncclInProgress : group->ranks > 1 ? ncclInternalError : ncclSuccess;
        pthread_mutex_unlock(&world->nccl_lock);
        if (group->ranks > 1) st = llmpar__nccl_settle(made, call, "ncclCommSplit", result);
    }
    if (over) free(tc->born); /* else NCCL will write there */
    tc->born = NULL;
    return st;
}

static llmpar_status llmpar__nccl_split(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out)
{
    llmpar__nccl_comm *tc = (llmpar__nccl_comm *)comm->state, *made = NULL;
    llmpar__nccl_world *world = tc->world;
    llmpar_collective named;
    llmpar_call call;
    llmpar__nccl_group group;
    llmpar_status st = LLMPAR_OK;
    *out = NULL;
    memset(&named, 0, sizeof named);
    memset(&group, 0, sizeof group);
    named.tag = name;
    llmpar_call_describe(comm, LLMPAR_CALL_SPLIT, &named, &call);
    if (call.rank < 0) call.rank = world->rank;
    if (comm->ranks == 1) { /* nobody to ask */
        group.ranks = color >= 0;
        world->group_member[0] = tc->member[0];
    } else {
        if (world->pending) st = comm->device->event_synchronize(comm->device, world->last); /* NCCL wants nothing under way on the parent */
        if (!st) st = llmpar__nccl_sound(tc, &call);
        if (!st) st = llmpar__nccl_ask_group(tc, &call, color, key);
        if (st) return llmpar__nccl_failed(tc, st);
        group = world->group;
    }
    if (group.ranks) st = llmpar__nccl_make(world, world->group_member, group.ranks, group.rank, group.context, name, &made);
    if (st) return llmpar__nccl_failed(tc, st); /* the others wait in NCCL, and hear of it there */
    if (comm->ranks > 1 && group.several) st = llmpar__nccl_bear(tc, &call, &group, made);
    if (st) {
        if (made) llmpar__nccl_destroy(&made->comm);
        return st;
    }
    if (made) *out = &made->comm;
    return LLMPAR_OK;
}

/* The world's NCCL communicator, scratch and allocator. */
static llmpar_status llmpar__nccl_open_world(llmpar__nccl_comm *tc, ncclUniqueId id)
{
    llmpar__nccl_world *world = tc->world;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    pthread_mutex_lock(&world->nccl_lock);
    ncclResult_t result = ncclCommInitRankConfig(&tc->nccl, (int)world->ranks, id, (int)world->rank, &config);
    pthread_mutex_unlock(&world->nccl_lock);
    llmpar_status st = llmpar__nccl_settle(tc, NULL, "ncclCommInitRankConfig", result);
    if (!st && !world->desc.own_memory) {
        st = llmpar__nccl_memory_begin(world->heap, world->device);
        world->remembers = !st;
    }
    world->part_bytes = llmpar__nccl_part_bytes(world->desc.slice, world->ranks);
    if (!st) {
        void *scratch = NULL;
        st = world->device->alloc(world->device, 3 * world->part_bytes, &scratch);
        world->scratch = (char *)scratch;
        world->scratch_bytes = 3 * world->part_bytes;
    }
    if (!st) st = world->device->event_create(world->device, &world->last);
    return st ? llmpar__nccl_failed(tc, st) : LLMPAR_OK;
}

/* This rank has no part in the world, and ctx->error says why: tells the others where they meet. With as little memory as may be: on other ranks than 0 none. */
static llmpar_status llmpar__nccl_excuse(llmpar_ctx *ctx, const llmpar_nccl_desc *desc)
{
    llmpar__nccl_world world;
    ncclUniqueId id;
    memset(&world, 0, sizeof world);
    memset(&id, 0, sizeof id);
    world.heap = &ctx->heap;
    world.error = &ctx->error;
    world.rank = ctx->rank;
    world.ranks = ctx->world;
    llmpar__nccl_own_host(world.host, sizeof world.host);
    llmpar__nccl_resolve(&world, desc);
    if (world.rank == 0) world.peer = (llmpar__nccl_peer *)llmpar_heap_zalloc(world.heap, (size_t)world.ranks, sizeof *world.peer);
    for (int32_t i = 0; world.peer && i < world.ranks; i++) world.peer[i].link.fd = -1;
    if (world.rank || world.peer) llmpar__nccl_meet(&world, ctx, ctx->error.status, 0, &id);
    llmpar_heap_free(world.heap, world.peer);
    return ctx->error.status;
}

LLMPAR_DEF llmpar_status llmpar_nccl_comm_create(llmpar_ctx *ctx, llmpar_device *device, const llmpar_nccl_desc *desc, llmpar_comm **out)
{
    llmpar__nccl_world *world = llmpar__nccl_world_make(ctx, device);
    llmpar__nccl_comm *tc = NULL;
    ncclUniqueId id;
    int version = 0;
    *out = NULL;
    if (!world) {
        llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "nccl: out of memory");
        return llmpar__nccl_excuse(ctx, desc);
    }
    memset(&id, 0, sizeof id);
    llmpar_status st = llmpar__nccl_resolve(world, desc);
    llmpar_status there = llmpar__nccl_furnish(world);
    if (there) {
        llmpar__nccl_release(world);
        return llmpar__nccl_excuse(ctx, desc);
    }
    if (!st && (device->size < offsetof(llmpar_device, native_stream) + sizeof device->native_stream || !device->native_stream))
        st = llmpar_error_set(world->error, LLMPAR_ERR_UNSUPPORTED, "nccl: device %s has no streams that NCCL could use (native_stream)", device->name);
    ncclResult_t result = ncclGetVersion(&version);
    if (!st && result) st = llmpar_error_set(world->error, LLMPAR_ERR_INTERNAL, "nccl: ncclGetVersion: %s", ncclGetErrorString(result));
    if (!st && version < LLMPAR__NCCL_LEAST) st = llmpar_error_set(world->error, LLMPAR_ERR_UNSUPPORTED, "nccl: NCCL %d is too old, expected at least %d (2.20)", version, LLMPAR__NCCL_LEAST);
    if (!st && world->rank == 0) {
        result = ncclGetUniqueId(&id);
        if (result) st = llmpar_error_set(world->error, LLMPAR_ERR_INTERNAL, "nccl: ncclGetUniqueId: %s: %.300s", ncclGetErrorString(result), ncclGetLastError(NULL));
    }
    st = llmpar__nccl_meet(world, ctx, st, (int32_t)version, &id);
    if (!st) st = llmpar__nccl_watch_begin(world);
    int32_t *all = (int32_t *)llmpar_heap_alloc(world->heap, (size_t)world->ranks, sizeof *all);
    for (int32_t i = 0; all && i < world->ranks; i++) all[i] = i;
    if (!st) st = all ? llmpar__nccl_make(world, all, world->ranks, world->rank, 0, "world", &tc) : llmpar_error_set(world->error, LLMPAR_ERR_MEMORY, "nccl: out of memory for %d ranks", (int)world->ranks);
    llmpar_heap_free(world->heap, all);
    if (!st) st = llmpar__nccl_open_world(tc, id);
    if (st && world->helping) { /* no call of a communicator: nobody else has told the others */
        llmpar_error error = *world->error;
        error.status = st;
        if (st != LLMPAR_ERR_PEER) llmpar__nccl_fail(world, &error);
    }
    if (st && tc) llmpar__nccl_destroy(&tc->comm);
    if (!st) *out = &tc->comm;
    llmpar__nccl_release(world);
    return st;
}

LLMPAR_DEF void llmpar_nccl_comm_finish(llmpar_comm *comm, llmpar_error *root)
{
    llmpar__nccl_comm *tc = (llmpar__nccl_comm *)comm->state;
    llmpar__nccl_world *world = tc->world;
    if (world->pending) world->device->event_synchronize(world->device, world->last);
    pthread_mutex_lock(&world->lock);
    if (!world->finished && world->ranks > 1) llmpar__nccl_to_hub(world, LLMPAR__NCCL_FINISH, NULL, 0);
    world->finished = 1;
    while (world->ranks > 1 && !world->done && !(world->aborted && (world->located || llmpar__nccl_now() > world->failed_at + LLMPAR__NCCL_FAREWELL))) llmpar__nccl_await(world, llmpar__nccl_now() + 0.1);
    if (world->aborted) *root = world->verdict.error;
    else llmpar_error_clear(root);
    pthread_mutex_unlock(&world->lock);
}

static llmpar_status llmpar__nccl_backend_create(const void *user, llmpar_ctx *ctx, llmpar_device *device, llmpar_comm **out) { return llmpar_nccl_comm_create(ctx, device, (const llmpar_nccl_desc *)user, out); }

static void llmpar__nccl_backend_finish(const void *user, llmpar_comm *comm, llmpar_error *root)
{
    (void)user;
    llmpar_nccl_comm_finish(comm, root);
}

static void llmpar__nccl_backend_absent(const void *user, llmpar_ctx *ctx) { llmpar__nccl_excuse(ctx, (const llmpar_nccl_desc *)user); }

LLMPAR_DEF void llmpar_nccl_backend(const llmpar_nccl_desc *desc, llmpar_backend *out)
{
    out->abi = LLMPAR_BACKEND_ABI;
    out->size = (uint32_t)sizeof *out;
    out->comm_user = desc;
    out->comm_create = llmpar__nccl_backend_create;
    out->comm_finish = llmpar__nccl_backend_finish;
    out->comm_absent = llmpar__nccl_backend_absent;
}

#undef LLMPAR__NCCL_FAREWELL
