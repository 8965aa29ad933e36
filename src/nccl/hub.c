/* hub: what rank 0 does for all: compares calls, makes splits, passes failures on, and knows who has finished.

   Calls. Every rank tells rank 0 of each call, as soon as it enqueues it; the first member's stays in a slot until all members have told the same, and the first that tells another is the end of the job, reported by
   both. Nothing waits for the answer: data moves meanwhile, and at worst waits on the GPU for a partner that never comes, until the helpers hear of the mismatch and free it.
   A communicator's collectives are numbered alike on its members; the messages of each pair have numbers of their own. A slot that a rank is still missing from when it has returned is an error too.
   Slots are limited: a rank that is ahead of the others by that many calls is not read until they have followed. A few are each rank's own: so what others have filled stops nobody that they may be waiting for.

   Failures. The first one that rank 0 hears of is the job's. It goes to all, they answer where they are, and when all have, or after a second, everybody gets the whole picture. */
#include "nccl/nccl.h"
#include "nccl/nccl_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LLMPAR__NCCL_SLOTS 4096 /* for all ranks .. */
#define LLMPAR__NCCL_OWN 8      /* .. beside these of each */
#define LLMPAR__NCCL_GONE 1.0 /* seconds after which the call of a rank that has returned would have come */
#define LLMPAR__NCCL_TELL 1.0 /* seconds for which positions are collected */

static void llmpar__nccl_context_free(llmpar__nccl_context *context)
{
    if (context) free(context->member);
    free(context);
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_hub_free(llmpar__nccl_world *world)
{
    while (world->contexts) llmpar__nccl_context_free(world->context[--world->contexts]);
    free(world->context);
    llmpar_heap_free(world->heap, world->slot);
    llmpar_heap_free(world->heap, world->here);
}

/* members NULL: all ranks. The first one, 0, is the world's. */
static llmpar__nccl_context *llmpar__nccl_context_make(llmpar__nccl_world *world, const int32_t *member, int32_t members)
{
    size_t n = (size_t)members;
    uint64_t id = 0;
    llmpar__nccl_context *context = (llmpar__nccl_context *)calloc(1, sizeof *context), **table = world->context;
    int32_t *all = context ? (int32_t *)calloc(4 * n, sizeof *all) : NULL;
    while (id < world->contexts && world->context[id]) id++;
    if (all && id == world->contexts) table = (llmpar__nccl_context **)realloc((void *)world->context, (size_t)(id + 1) * sizeof *table);
    if (!all || !table) {
        free(all);
        free(context);
        return NULL;
    }
    context->member = all;
    context->color = all + n;
    context->key = all + 2 * n;
    context->waits = all + 3 * n;
    for (int32_t i = 0; i < members; i++) all[i] = member ? member[i] : i;
    context->members = members;
    context->oldest = context->newest = -1;
    context->id = id;
    world->context = table;
    world->context[id] = context;
    if (id == world->contexts) world->contexts++;
    return context;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_hub_furnish(llmpar__nccl_world *world)
{
    size_t bytes = ((size_t)world->ranks + 7) / 8;
    world->slots = LLMPAR__NCCL_SLOTS + LLMPAR__NCCL_OWN * world->ranks;
    world->slot = (llmpar__nccl_slot *)llmpar_heap_zalloc(world->heap, (size_t)world->slots, sizeof *world->slot);
    world->here = (unsigned char *)llmpar_heap_zalloc(world->heap, (size_t)world->slots, bytes);
    if (!world->slot || !world->here || !llmpar__nccl_context_make(world, NULL, world->ranks)) return 0;
    for (int32_t i = 0; i < world->slots; i++) {
        world->slot[i].here = world->here + (size_t)i * bytes;
        world->slot[i].next = i + 1 < world->slots ? i + 1 : -1;
    }
    world->free_slot = 0;
    return 1;
}

static llmpar__nccl_context *llmpar__nccl_context_of(llmpar__nccl_world *world, uint64_t id)
{
    return id < world->contexts ? world->context[id] : NULL;
}

/* ---- failures ---- */

LLMPAR__PRIVATE_DEF void llmpar__nccl_hub_fail(llmpar__nccl_world *world, const llmpar_error *error, int32_t other)
{
    llmpar__nccl_verdict verdict;
    if (world->convicted) return;
    world->convicted = world->waiting_for_told = 1;
    memset(&verdict, 0, sizeof verdict);
    verdict.error = *error;
    if (error->status == LLMPAR_OK || error->status == LLMPAR_ERR_PEER) verdict.error.status = LLMPAR_ERR_INTERNAL; /* a root error is neither */
    verdict.other = other;
    for (int32_t i = world->ranks; i-- > 0;) llmpar__nccl_to_rank(world, i, LLMPAR__NCCL_FAILED, &verdict, sizeof verdict, NULL, 0);
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_hub_lost(llmpar__nccl_world *world, int32_t rank, const char *how)
{
    llmpar__nccl_peer *peer = &world->peer[rank];
    llmpar_error error;
    char where[320] = "never heard of";
    if (peer->position.state == LLMPAR_POSITION_INSIDE) llmpar_call_print(&peer->position.now, where, sizeof where);
    else if (peer->position.state != LLMPAR_POSITION_UNKNOWN) snprintf(where, sizeof where, "%s", peer->finished ? "returned" : "outside");
    llmpar_error_clear(&error);
    llmpar_error_set(&error, LLMPAR_ERR_TIMEOUT, "rank %d (%s, pid %lld) %s; it was last seen in: %s", (int)rank, peer->host, (long long)peer->pid, how, where);
    error.rank = rank;
    memcpy(error.where, peer->position.where, sizeof error.where);
    llmpar__nccl_hub_fail(world, &error, -1);
}

static void llmpar__nccl_hub_position(void *user, int32_t rank, llmpar_position *out)
{
    llmpar__nccl_world *world = (llmpar__nccl_world *)user;
    const llmpar__nccl_peer *peer = &world->peer[rank];
    if (rank == 0 && !peer->told) llmpar_record_position(world->record, out);
    else *out = peer->position;
    out->rank = rank;
    if (peer->finished) out->state = (int32_t)LLMPAR_POSITION_RETURNED;
}

static void llmpar__nccl_hub_locate(llmpar__nccl_world *world, double now)
{
    int waiting = now < world->failed_at + LLMPAR__NCCL_TELL;
    if (!world->waiting_for_told) return;
    for (int32_t i = 1; i < world->ranks && waiting; i++)
        if (!world->peer[i].told && !world->peer[i].dead && !world->peer[i].bye) break;
        else if (i + 1 == world->ranks) waiting = 0;
    if (waiting && world->ranks > 1) return;
    world->waiting_for_told = 0;
    llmpar__nccl_verdict verdict = world->verdict;
    llmpar_position_print(llmpar__nccl_hub_position, world, world->ranks, verdict.who, sizeof verdict.who);
    size_t used = strlen(verdict.error.text);
    if (verdict.error.status == LLMPAR_ERR_TIMEOUT && used + 8 < sizeof verdict.error.text)
        snprintf(verdict.error.text + used, sizeof verdict.error.text - used, "; %.*s", (int)(sizeof verdict.error.text - used - 3), verdict.who);
    for (int32_t i = world->ranks; i-- > 0;) llmpar__nccl_to_rank(world, i, LLMPAR__NCCL_WHERE, &verdict, sizeof verdict, NULL, 0);
}

/* ---- calls ---- */

/* The slots of a communicator are a list, the oldest first. */
static void llmpar__nccl_slot_free(llmpar__nccl_world *world, llmpar__nccl_slot *slot)
{
    llmpar__nccl_context *context = slot->context;
    int32_t me = (int32_t)(slot - world->slot), before = -1;
    for (int32_t i = context->oldest; i != me; i = world->slot[i].next) before = i;
    if (before < 0) context->oldest = slot->next;
    else world->slot[before].next = slot->next;
    if (context->newest == me) context->newest = before;
    if (world->peer[slot->first_rank].slots-- > LLMPAR__NCCL_OWN) world->common--;
    slot->next = world->free_slot;
    world->free_slot = me;
}

static llmpar__nccl_slot *llmpar__nccl_slot_of(llmpar__nccl_world *world, llmpar__nccl_context *context, const llmpar__nccl_ask *ask)
{
    if (ask->from < 0 && ask->index > context->highest) { /* the usual case of who comes first */
        context->highest = ask->index;
        return NULL;
    }
    for (int32_t i = context->oldest; i >= 0; i = world->slot[i].next) {
        llmpar__nccl_slot *s = &world->slot[i];
        if (s->first.index == ask->index && s->first.from == ask->from && s->first.to == ask->to) return s;
    }
    return NULL;
}

/* As llmpar__nccl_hub_take: 1, 0 or -1. */
static int llmpar__nccl_hub_call(llmpar__nccl_world *world, int32_t rank, const llmpar__nccl_ask *ask)
{
    llmpar__nccl_context *context = llmpar__nccl_context_of(world, ask->context);
    int32_t member = ask->call.member;
    if (world->convicted) return 1;
    if (!context || member < 0 || member >= context->members || context->member[member] != rank) return -1;
    if (ask->from < 0 ? ask->from != -1 || ask->to != -1 : ask->from >= context->members || ask->to < 0 || ask->to >= context->members || (member != ask->from && member != ask->to)) return -1;
    int room = world->peer[rank].slots < LLMPAR__NCCL_OWN || world->common < LLMPAR__NCCL_SLOTS;
    if (!room && ask->from < 0 && ask->index > context->highest) return 0;
    llmpar__nccl_slot *slot = llmpar__nccl_slot_of(world, context, ask);
    if (!slot) {
        if (!room) return ask->from < 0 ? -1 : 0; /* a call that all had come to before; a message that nobody has */
        int32_t me = world->free_slot;
        if (++world->peer[rank].slots > LLMPAR__NCCL_OWN) world->common++;
        slot = &world->slot[me];
        world->free_slot = slot->next;
        slot->next = -1;
        if (context->newest < 0) context->oldest = me;
        else world->slot[context->newest].next = me;
        context->newest = me;
        slot->first = *ask;
        slot->first_rank = rank;
        slot->context = context;
        slot->arrived = 0;
        slot->expected = ask->from >= 0 ? 2 : context->members;
        slot->since = llmpar__nccl_now();
        memset(slot->here, 0, ((size_t)world->ranks + 7) / 8);
    }
    if (slot->here[member / 8] & 1 << member % 8) return -1; /* twice */
    slot->here[member / 8] |= (unsigned char)(1 << member % 8);
    if (slot->first.fingerprint != ask->fingerprint) {
        llmpar_error error;
        char text[1000];
        int first = slot->first_rank < rank;
        llmpar_call_mismatch(first ? &slot->first.call : &ask->call, first ? &ask->call : &slot->first.call, text, sizeof text);
        llmpar_error_clear(&error);
        llmpar_error_set(&error, LLMPAR_ERR_MISMATCH, "%s", text);
        error.rank = first ? slot->first_rank : rank;
        memcpy(error.where, first ? slot->first.call.where : ask->call.where, sizeof error.where);
        llmpar__nccl_hub_fail(world, &error, first ? rank : slot->first_rank);
        return 1;
    }
    if (++slot->arrived == slot->expected) {
        llmpar__nccl_slot_free(world, slot);
        pthread_cond_broadcast(&world->wake); /* rank 0 itself may wait for one */
    }
    return 1;
}

/* All members have come to the split: each gets its group. */
static void llmpar__nccl_hub_groups(llmpar__nccl_world *world, llmpar__nccl_context *of)
{
    int32_t *member = (int32_t *)malloc((size_t)of->members * sizeof *member);
    int short_of_memory = !member, several = 0;
    for (int32_t i = 0; i < of->members; i++)
        for (int32_t j = 0; j < i && !several; j++) several = of->color[i] >= 0 && of->color[i] == of->color[j];
    for (int32_t i = 0; i < of->members && !short_of_memory; i++) {
        llmpar__nccl_group group;
        memset(&group, 0, sizeof group);
        group.several = several;
        if (!of->waits[i]) continue;
        if (of->color[i] < 0) {
            of->waits[i] = 0;
            llmpar__nccl_to_rank(world, of->member[i], LLMPAR__NCCL_GROUP, &group, sizeof group, NULL, 0);
            continue;
        }
        for (int32_t j = i; j < of->members; j++) { /* those of this color, each at its place by (key, rank) */
            if (!of->waits[j] || of->color[j] != of->color[i]) continue;
            int32_t at = group.ranks++;
            for (; at > 0 && of->key[member[at - 1]] > of->key[j]; at--) member[at] = member[at - 1];
            member[at] = j;
        }
        for (int32_t k = 0; k < group.ranks; k++) {
            of->waits[member[k]] = 0;
            member[k] = of->member[member[k]];
        }
        llmpar__nccl_context *made = group.ranks > 1 ? llmpar__nccl_context_make(world, member, group.ranks) : NULL; /* who is alone asks nobody */
        short_of_memory = group.ranks > 1 && !made;
        if (made) group.context = made->id;
        for (int32_t k = 0; k < group.ranks && !short_of_memory; k++) {
            group.rank = k;
            llmpar__nccl_to_rank(world, member[k], LLMPAR__NCCL_GROUP, &group, sizeof group, member, (size_t)group.ranks * sizeof *member);
        }
    }
    free(member);
    of->asked = 0;
    if (short_of_memory) {
        llmpar_error error;
        llmpar_error_clear(&error);
        llmpar_error_set(&error, LLMPAR_ERR_MEMORY, "nccl: rank 0 is out of memory for a split of %d ranks", (int)of->members);
        error.rank = 0;
        llmpar__nccl_hub_fail(world, &error, -1);
    }
}

static int llmpar__nccl_hub_split(llmpar__nccl_world *world, int32_t rank, const llmpar__nccl_ask *ask)
{
    int taken = llmpar__nccl_hub_call(world, rank, ask);
    llmpar__nccl_context *context = llmpar__nccl_context_of(world, ask->context);
    if (taken <= 0 || world->convicted || !context) return taken;
    int32_t member = ask->call.member;
    if (context->waits[member]) return -1;
    context->waits[member] = 1;
    context->color[member] = ask->color;
    context->key[member] = ask->key;
    if (++context->asked == context->members) llmpar__nccl_hub_groups(world, context);
    return 1;
}

static int llmpar__nccl_hub_drop(llmpar__nccl_world *world, int32_t rank, uint64_t id)
{
    llmpar__nccl_context *context = llmpar__nccl_context_of(world, id);
    int32_t member = 0;
    if (world->convicted) return 1; /* it may come from the midst of anything */
    while (context && member < context->members && context->member[member] != rank) member++;
    if (!context || member == context->members || context->waits[member]) return -1;
    context->waits[member] = 1; /* nothing comes from it any more */
    if (++context->dropped < context->members) return 1;
    while (context->oldest >= 0) llmpar__nccl_slot_free(world, &world->slot[context->oldest]); /* nobody will come to these any more */
    world->context[id] = NULL; /* each member has said that it says no more of it: another may have its number */
    llmpar__nccl_context_free(context);
    return 1;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_hub_take(llmpar__nccl_world *world, int32_t rank, llmpar__nccl_kind kind, const unsigned char *bytes, size_t count)
{
    llmpar__nccl_peer *peer = &world->peer[rank];
    llmpar__nccl_ask ask;
    llmpar_error error;
    uint64_t id;
    (void)count; /* that of the kind: control.c has seen to it */
    switch (kind) {
    case LLMPAR__NCCL_CALL:
    case LLMPAR__NCCL_SPLIT:
        memcpy(&ask, bytes, sizeof ask);
        if (!llmpar__nccl_mend_call(&ask.call)) return -1;
        ask.call.rank = rank;
        return kind == LLMPAR__NCCL_CALL ? llmpar__nccl_hub_call(world, rank, &ask) : llmpar__nccl_hub_split(world, rank, &ask);
    case LLMPAR__NCCL_DROP:
        memcpy(&id, bytes, sizeof id);
        return llmpar__nccl_hub_drop(world, rank, id);
    case LLMPAR__NCCL_FAIL:
        memcpy(&error, bytes, sizeof error);
        llmpar__nccl_mend_error(&error);
        error.rank = rank;
        llmpar__nccl_hub_fail(world, &error, -1);
        return 1;
    case LLMPAR__NCCL_TOLD: /* rank 0's own */
        memcpy(&peer->position, bytes, sizeof peer->position);
        peer->told = 1;
        return 1;
    case LLMPAR__NCCL_FINISH:
        peer->finished = 1;
        return 1;
    case LLMPAR__NCCL_BYE:
        peer->finished = peer->bye = 1;
        if (rank) llmpar__nccl_to_rank(world, rank, LLMPAR__NCCL_BYE, NULL, 0, NULL, 0);
        pthread_cond_broadcast(&world->wake);
        return 1;
    default: return -1;
    }
}

/* ---- the clock ---- */

/* A call that a rank has returned without. */
static void llmpar__nccl_hub_returned(llmpar__nccl_world *world, double now)
{
    for (uint64_t id = 0; id < world->contexts; id++) {
        const llmpar__nccl_context *context = world->context[id];
        for (int32_t i = context ? context->oldest : -1; i >= 0 && now >= world->slot[i].since + LLMPAR__NCCL_GONE; i = world->slot[i].next) {
            const llmpar__nccl_slot *slot = &world->slot[i];
            for (int32_t m = 0; m < context->members; m++) {
                if (slot->first.from >= 0 && m != slot->first.from && m != slot->first.to) continue;
                if ((slot->here[m / 8] & 1 << m % 8) || !world->peer[context->member[m]].finished) continue;
                llmpar_error error;
                char what[320];
                llmpar_call_print(&slot->first.call, what, sizeof what);
                llmpar_error_clear(&error);
                llmpar_error_set(&error, LLMPAR_ERR_MISMATCH, "%s: rank %d has returned without it", what, (int)context->member[m]);
                error.rank = slot->first_rank;
                memcpy(error.where, slot->first.call.where, sizeof error.where);
                llmpar__nccl_hub_fail(world, &error, -1);
                return;
            }
        }
    }
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_hub_look(llmpar__nccl_world *world)
{
    double now = llmpar__nccl_now();
    int all = 1;
    if (!world->convicted) llmpar__nccl_hub_returned(world, now);
    llmpar__nccl_hub_locate(world, now);
    for (int32_t i = 0; i < world->ranks; i++) all = all && (world->peer[i].finished || world->peer[i].dead);
    if (world->closing || !(all || (world->convicted && now > world->failed_at + 5))) return; /* who is stuck after a failure is not waited for longer */
    if (world->waiting_for_told) return;
    world->closing = 1;
    for (int32_t i = world->ranks; i-- > 0;) llmpar__nccl_to_rank(world, i, LLMPAR__NCCL_DONE, &world->verdict.error, sizeof world->verdict.error, NULL, 0);
}

#undef LLMPAR__NCCL_SLOTS
#undef LLMPAR__NCCL_OWN
#undef LLMPAR__NCCL_GONE
#undef LLMPAR__NCCL_TELL
