/* control: the messages between the ranks of a world: how they are read and checked, what a rank does with those of rank 0, signs of life.

     every rank -- one TCP connection --> rank 0 (hub.c), which answers, and passes on what all have to know

   Rank 0's own messages take the same way without a connection. Everything here runs under world->lock, on the helper's thread or on one that has something to say. What comes from the network is checked before
   it is used: a message has the size of its kind, numbers are in range, texts end. A connection that talks nonsense is cut, and its rank counts as dead. */
#include "nccl/nccl.h"
#include "nccl/nccl_internal.h"

#include <stdio.h>
#include <string.h>

#define LLMPAR__NCCL_BEATS 0.5      /* seconds between two signs of life */
#define LLMPAR__NCCL_ATTENTION 0.25 /* of silence that one look counts, at most: who was stopped itself does not blame the others */

/* ---- what came from the network ---- */

LLMPAR__PRIVATE_DEF int llmpar__nccl_mend_call(llmpar_call *call)
{
    call->axis[sizeof call->axis - 1] = call->where[sizeof call->where - 1] = call->tag[sizeof call->tag - 1] = 0;
    return call->op >= (int32_t)LLMPAR_CALL_NONE && call->op <= (int32_t)LLMPAR_CALL_SPLIT;
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_mend_error(llmpar_error *error)
{
    error->where[sizeof error->where - 1] = error->text[sizeof error->text - 1] = 0;
    if ((int)error->status < 0 || (int)error->status >= (int)LLMPAR_STATUS_COUNT) error->status = LLMPAR_ERR_INTERNAL;
}

static int llmpar__nccl_mend_position(llmpar_position *position)
{
    position->where[sizeof position->where - 1] = 0;
    return position->state >= (int32_t)LLMPAR_POSITION_OUTSIDE && position->state <= (int32_t)LLMPAR_POSITION_UNKNOWN && llmpar__nccl_mend_call(&position->now) && llmpar__nccl_mend_call(&position->last);
}

/* Bytes of a message of this kind; -1: none such comes to this rank. */
static int64_t llmpar__nccl_size(const llmpar__nccl_world *world, uint32_t kind, uint64_t said)
{
    if (kind == LLMPAR__NCCL_BEAT) return (int64_t)sizeof(llmpar_position);
    if (kind == LLMPAR__NCCL_BYE) return 0;
    if (world->rank == 0) {
        switch (kind) {
        case LLMPAR__NCCL_CALL:
        case LLMPAR__NCCL_SPLIT: return (int64_t)sizeof(llmpar__nccl_ask);
        case LLMPAR__NCCL_DROP: return (int64_t)sizeof(uint64_t);
        case LLMPAR__NCCL_FAIL: return (int64_t)sizeof(llmpar_error);
        case LLMPAR__NCCL_TOLD: return (int64_t)sizeof(llmpar_position);
        case LLMPAR__NCCL_FINISH: return 0;
        default: return -1;
        }
    }
    switch (kind) {
    case LLMPAR__NCCL_FAILED:
    case LLMPAR__NCCL_WHERE: return (int64_t)sizeof(llmpar__nccl_verdict);
    case LLMPAR__NCCL_DONE: return (int64_t)sizeof(llmpar_error);
    case LLMPAR__NCCL_GROUP: /* the only one whose size varies: the group, and a number for each of its ranks */
        if (said < sizeof(llmpar__nccl_group) || said > sizeof(llmpar__nccl_group) + (uint64_t)world->ranks * sizeof(int32_t)) return -1;
        return (int64_t)said;
    default: return -1;
    }
}

LLMPAR__PRIVATE_DEF size_t llmpar__nccl_most_in(const llmpar__nccl_world *world)
{
    size_t most = sizeof(llmpar__nccl_verdict), group = sizeof(llmpar__nccl_group) + (size_t)world->ranks * sizeof(int32_t);
    return sizeof(llmpar__nccl_head) + (world->rank && group > most ? group : most);
}

/* ---- to and from rank 0 ---- */

/* A message of rank 0. 0: nonsense. */
static int llmpar__nccl_deliver(llmpar__nccl_world *world, llmpar__nccl_kind kind, const unsigned char *bytes, size_t count)
{
    llmpar_position position;
    llmpar__nccl_verdict verdict;
    llmpar__nccl_group group;
    switch (kind) {
    case LLMPAR__NCCL_BEAT:
        memcpy(&position, bytes, sizeof position);
        if (!llmpar__nccl_mend_position(&position)) return 0;
        if (world->rank) world->peer[0].position = position;
        break;
    case LLMPAR__NCCL_FAILED:
    case LLMPAR__NCCL_WHERE:
        memcpy(&verdict, bytes, sizeof verdict);
        llmpar__nccl_mend_error(&verdict.error);
        verdict.who[sizeof verdict.who - 1] = 0;
        llmpar__nccl_convicted(world, &verdict, kind == LLMPAR__NCCL_WHERE);
        if (kind == LLMPAR__NCCL_WHERE) break;
        llmpar_record_position(world->record, &position);
        if (world->finished) position.state = (int32_t)LLMPAR_POSITION_RETURNED;
        llmpar__nccl_to_hub(world, LLMPAR__NCCL_TOLD, &position, sizeof position);
        break;
    case LLMPAR__NCCL_GROUP:
        memcpy(&group, bytes, sizeof group);
        if (group.ranks < 0 || count != sizeof group + (size_t)group.ranks * sizeof(int32_t) || group.rank < 0 || (group.ranks && group.rank >= group.ranks)) return 0;
        memcpy(world->group_member, bytes + sizeof group, (size_t)group.ranks * sizeof(int32_t));
        for (int32_t i = 0; i < group.ranks; i++)
            if (world->group_member[i] < 0 || world->group_member[i] >= world->ranks) return 0;
        world->group = group;
        break;
    case LLMPAR__NCCL_DONE: world->done = 1; break;
    case LLMPAR__NCCL_BYE: world->peer[0].bye = 1; break;
    default: return 0;
    }
    pthread_cond_broadcast(&world->wake);
    return 1;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_to_hub(llmpar__nccl_world *world, llmpar__nccl_kind kind, const void *bytes, size_t count)
{
    if (world->rank == 0) return llmpar__nccl_hub_take(world, 0, kind, (const unsigned char *)bytes, count);
    llmpar__nccl_link *link = &world->peer[0].link;
    if (link->fd < 0) return 1; /* rank 0 is gone, which is known by now or will be soon */
    if (kind == LLMPAR__NCCL_CALL && link->out_room - link->out_used < LLMPAR__NCCL_OUT / 2) return 0; /* the rest is for what is more urgent */
    if (!llmpar__nccl_link_put(link, kind, bytes, count, NULL, 0)) return 0;
    llmpar__nccl_link_flush(link); /* what breaks here breaks in the next look too */
    if (link->out_used) llmpar__nccl_poke(world);
    return 1;
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_to_rank(llmpar__nccl_world *world, int32_t rank, llmpar__nccl_kind kind, const void *a, size_t a_bytes, const void *b, size_t b_bytes)
{
    unsigned char whole[sizeof(llmpar__nccl_verdict)];
    if (rank) {
        llmpar__nccl_peer *peer = &world->peer[rank];
        if (peer->dead || peer->link.fd < 0) return;
        llmpar__nccl_link_put(&peer->link, kind, a, a_bytes, b, b_bytes); /* there is room for all that rank 0 ever says to one that reads; who does not is given up by its silence */
        llmpar__nccl_link_flush(&peer->link);
        return;
    }
    if (kind == LLMPAR__NCCL_GROUP) { /* too large for the stack */
        memcpy(&world->group, a, a_bytes);
        if (b_bytes) memcpy(world->group_member, b, b_bytes);
        pthread_cond_broadcast(&world->wake);
        return;
    }
    if (a_bytes) memcpy(whole, a, a_bytes);
    llmpar__nccl_deliver(world, kind, whole, a_bytes);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__nccl_ask_hub(llmpar__nccl_comm *tc, const llmpar_call *call, int32_t color, int32_t key, llmpar__nccl_kind kind)
{
    llmpar__nccl_world *world = tc->world;
    llmpar__nccl_ask ask;
    int message = call->op == LLMPAR_CALL_SEND || call->op == LLMPAR_CALL_RECV;
    memset(&ask, 0, sizeof ask);
    ask.context = tc->context;
    ask.from = ask.to = -1;
    if (call->op == LLMPAR_CALL_SEND) {
        ask.from = call->member;
        ask.to = call->peer;
        ask.index = ++tc->sent[call->peer];
    } else if (message) {
        ask.from = call->peer;
        ask.to = call->member;
        ask.index = ++tc->received[call->peer];
    } else {
        ask.index = ++tc->calls;
    }
    ask.fingerprint = llmpar_call_fingerprint(call);
    ask.color = color;
    ask.key = key;
    ask.call = *call;
    if (tc->comm.unchecked && kind == LLMPAR__NCCL_CALL) return LLMPAR_OK;
    if (tc->comm.unchecked) ask.fingerprint = 0; /* a split is counted, not compared */
    pthread_mutex_lock(&world->lock);
    while (!world->aborted && !llmpar__nccl_to_hub(world, kind, &ask, sizeof ask)) llmpar__nccl_await(world, llmpar__nccl_now() + 0.05); /* this rank is far ahead of the others */
    pthread_mutex_unlock(&world->lock);
    return llmpar__nccl_sound(tc, call);
}

/* ---- looking ---- */

static void llmpar__nccl_beat(llmpar__nccl_world *world, double now)
{
    llmpar_position position;
    if (now - world->last_beat < LLMPAR__NCCL_BEATS) return;
    world->last_beat = now;
    llmpar_record_position(world->record, &position);
    if (world->finished) position.state = (int32_t)LLMPAR_POSITION_RETURNED;
    for (int32_t i = world->rank ? 0 : 1; i < (world->rank ? 1 : world->ranks); i++) {
        llmpar__nccl_link *link = &world->peer[i].link;
        if (link->out_used == 0 && !world->peer[i].bye) llmpar__nccl_link_put(link, LLMPAR__NCCL_BEAT, &position, sizeof position, NULL, 0); /* else what waits there is a sign itself */
    }
}

/* The messages that have come from peer i. 0: nonsense. */
static int llmpar__nccl_read(llmpar__nccl_world *world, int32_t i)
{
    llmpar__nccl_peer *peer = &world->peer[i];
    llmpar__nccl_link *link = &peer->link;
    llmpar__nccl_head head;
    size_t at = 0;
    int sane = 1, taken = 1;
    while (sane && taken && link->in_used - at >= sizeof head) {
        memcpy(&head, link->in + at, sizeof head);
        int64_t bytes = head.word == LLMPAR__NCCL_WORD ? llmpar__nccl_size(world, head.kind, head.bytes) : -1;
        if (bytes < 0 || head.bytes != (uint64_t)bytes) {
            sane = 0;
            break;
        }
        if (link->in_used - at - sizeof head < (size_t)bytes) break;
        const unsigned char *body = link->in + at + sizeof head;
        llmpar_position position;
        if (world->rank) {
            sane = llmpar__nccl_deliver(world, (llmpar__nccl_kind)head.kind, body, (size_t)bytes);
        } else if (head.kind == LLMPAR__NCCL_BEAT || head.kind == LLMPAR__NCCL_TOLD) {
            memcpy(&position, body, sizeof position);
            position.rank = i;
            sane = llmpar__nccl_mend_position(&position);
            if (sane && (!peer->told || head.kind == LLMPAR__NCCL_TOLD)) peer->position = position; /* once the job has failed, where it was then */
            if (head.kind == LLMPAR__NCCL_TOLD) peer->told = 1;
        } else {
            int result = llmpar__nccl_hub_take(world, i, (llmpar__nccl_kind)head.kind, body, (size_t)bytes);
            sane = result >= 0;
            taken = result != 0;
        }
        if (taken) at += sizeof head + (size_t)bytes;
    }
    if (at) memmove(link->in, link->in + at, link->in_used - at);
    link->in_used -= at;
    if (at || !taken) peer->silent = 0; /* one that is not read at the moment is not silent */
    return sane;
}

/* The connection to peer i is over. */
static void llmpar__nccl_lost(llmpar__nccl_world *world, int32_t i, const char *how)
{
    llmpar__nccl_peer *peer = &world->peer[i];
    llmpar__nccl_close(&peer->link.fd);
    peer->link.in_used = peer->link.out_used = 0;
    if (peer->bye || peer->dead) return;
    peer->dead = 1;
    pthread_cond_broadcast(&world->wake);
    if (world->rank == 0) {
        llmpar__nccl_hub_lost(world, i, how);
        return;
    }
    if (world->ending) return;
    world->located = world->done = 1; /* nobody will say more */
    if (world->aborted) return;
    llmpar__nccl_verdict verdict; /* without rank 0 there is nobody to ask: every rank comes to the same */
    memset(&verdict, 0, sizeof verdict);
    verdict.other = -1;
    llmpar_error_clear(&verdict.error);
    llmpar_error_set(&verdict.error, LLMPAR_ERR_TIMEOUT, "rank 0 (%s, pid %lld) %s", peer->host, (long long)peer->pid, how);
    verdict.error.rank = 0;
    memcpy(verdict.error.where, peer->position.where, sizeof verdict.error.where);
    llmpar__nccl_convicted(world, &verdict, 1);
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_look(llmpar__nccl_world *world)
{
    double now = llmpar__nccl_now(), attention = now - world->last_look;
    char how[160];
    world->last_look = now;
    if (attention > LLMPAR__NCCL_ATTENTION) attention = LLMPAR__NCCL_ATTENTION;
    llmpar__nccl_beat(world, now);
    for (int32_t i = world->rank ? 0 : 1; i < (world->rank ? 1 : world->ranks); i++) {
        llmpar__nccl_peer *peer = &world->peer[i];
        if (peer->link.fd < 0) continue;
        int alive = 1, sane = 1;
        for (int more = peer->link.ready || peer->link.in_used; more && alive && sane;) {
            size_t before = peer->link.in_used;
            alive = llmpar__nccl_link_fill(&peer->link);
            more = peer->link.in_used == peer->link.in_room && peer->link.in_used > before;
            sane = llmpar__nccl_read(world, i);
        }
        peer->link.ready = 0;
        size_t waiting = peer->link.out_used;
        if (alive && sane) alive = llmpar__nccl_link_flush(&peer->link);
        if (waiting > peer->link.out_used) pthread_cond_broadcast(&world->wake); /* there is room again */
        peer->silent += attention;
        if (!sane) llmpar__nccl_lost(world, i, "has sent what is no message of this library");
        else if (!alive) llmpar__nccl_lost(world, i, "died: its connection broke without a farewell");
        else if (world->desc.silence > 0 && peer->silent >= world->desc.silence && !peer->bye) {
            snprintf(how, sizeof how, "has given no sign of life for %g s: stopped or unreachable", world->desc.silence);
            llmpar__nccl_lost(world, i, how);
        }
    }
    if (world->rank == 0) llmpar__nccl_hub_look(world);
}

#undef LLMPAR__NCCL_BEATS
#undef LLMPAR__NCCL_ATTENTION
