#include "fsdp/schedule_internal.h"

#include <string.h>

/* Order between streams by vector clocks: an instruction starts after the one in front of it on its stream, after what it waits for, and after every SCALAR_REDUCE before it in the list (the host waits for those). */

enum { LLMPAR__TRACK_UNIT = 2, LLMPAR__TRACK_GRADIENTS = 6, LLMPAR__TRACK_STORED_GRADIENTS = LLMPAR__TRACK_GRADIENTS + 4 * LLMPAR_GRAD_SLOTS, LLMPAR__TRACKS_UNIT = LLMPAR__TRACK_STORED_GRADIENTS + 2 * LLMPAR_GRAD_SLOTS };

LLMPAR__PRIVATE_DEF llmpar_status llmpar__order_create(llmpar__order *order, llmpar_heap *heap, const llmpar_instruction *list, int32_t count, const llmpar_unit *units, int32_t unit_count, const llmpar_policy *policy)
{
    size_t tracks = LLMPAR__TRACK_UNIT + (size_t)unit_count * (LLMPAR__TRACKS_UNIT + 3 * (size_t)policy->micro_batches);
    memset(order, 0, sizeof *order);
    order->list = list;
    order->units = units;
    order->unit_count = unit_count;
    order->micro_batches = policy->micro_batches;
    order->whole_params = llmpar_policy_whole_params(policy);
    order->whole_grads = llmpar_policy_whole_grads(policy);
    order->master = policy->master;
    order->host_update = policy->host_update;
    order->heap = heap;
    order->clock = (int32_t(*)[LLMPAR_STREAM_COUNT])llmpar_heap_alloc(heap, (size_t)count + 1, sizeof *order->clock);
    order->track = LLMPAR__ALLOC(llmpar__track, heap, tracks);
    if (!order->clock || !order->track) {
        llmpar__order_destroy(order);
        return LLMPAR_ERR_MEMORY;
    }
    memset(order->track, -1, tracks * sizeof *order->track);
    memset(order->last, -1, sizeof order->last);
    memset(order->host, -1, sizeof order->host);
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF void llmpar__order_destroy(llmpar__order *order)
{
    llmpar_heap_free(order->heap, order->clock);
    llmpar_heap_free(order->heap, order->track);
    order->clock = NULL;
    order->track = NULL;
}

/* ---- what an instruction touches ---- */

typedef struct llmpar__access_list { llmpar__access access[LLMPAR__ACCESSES]; int count; } llmpar__access_list;

static void llmpar__order_touch(llmpar__access_list *list, llmpar__thing thing, llmpar__access_kind kind, size_t track)
{
    llmpar__access *access = &list->access[list->count++];
    access->thing = thing;
    access->kind = kind;
    access->track = track;
}

static void llmpar__order_touch_unit(llmpar__access_list *list, llmpar__thing thing, llmpar__access_kind kind, int32_t unit)
{
    llmpar__order_touch(list, thing, kind, LLMPAR__TRACK_UNIT + (size_t)unit * LLMPAR__TRACKS_UNIT + (size_t)thing - LLMPAR__THING_SHARD);
}

static void llmpar__order_touch_gradient(llmpar__access_list *list, llmpar__access_kind kind, int32_t unit, int32_t use, int32_t local, int32_t slot)
{
    llmpar__order_touch(list, LLMPAR__THING_GRADIENT, kind, LLMPAR__TRACK_UNIT + (size_t)unit * LLMPAR__TRACKS_UNIT + LLMPAR__TRACK_GRADIENTS + (size_t)((use * 2 + local) * LLMPAR_GRAD_SLOTS + slot));
}

static void llmpar__order_touch_micro(const llmpar__order *order, llmpar__access_list *list, llmpar__thing thing, llmpar__access_kind kind, int32_t unit, int32_t micro)
{
    size_t first = LLMPAR__TRACK_UNIT + (size_t)order->unit_count * LLMPAR__TRACKS_UNIT;
    llmpar__order_touch(list, thing, kind, first + ((size_t)unit * (size_t)order->micro_batches + (size_t)micro) * 3 + (size_t)thing - LLMPAR__THING_SAVED);
}

static void llmpar__order_touch_stored_gradient(llmpar__access_list *list, llmpar__access_kind kind, int32_t unit, int32_t use, int32_t slot)
{
    llmpar__order_touch(list, LLMPAR__THING_STORED_GRADIENT, kind, LLMPAR__TRACK_UNIT + (size_t)unit * LLMPAR__TRACKS_UNIT + LLMPAR__TRACK_STORED_GRADIENTS + (size_t)(use * LLMPAR_GRAD_SLOTS + slot));
}

static void llmpar__order_move(const llmpar__order *order, const llmpar_instruction *in, llmpar__access_list *list)
{
    int fetch = in->op == LLMPAR_OP_FETCH;
    llmpar__access_kind device = fetch ? LLMPAR__ACCESS_FRESH : LLMPAR__ACCESS_WRITE, store = fetch ? LLMPAR__ACCESS_READ : LLMPAR__ACCESS_WRITE;
    switch (in->what) {
    case LLMPAR_STATE_OPTIMIZER:
        llmpar__order_touch_unit(list, LLMPAR__THING_STATE, device, in->unit);
        llmpar__order_touch_unit(list, LLMPAR__THING_STORED_STATE, store, in->unit);
        break;
    case LLMPAR_STATE_PARAMS:
        llmpar__order_touch_unit(list, order->master ? LLMPAR__THING_MASTER : LLMPAR__THING_SHARD, device, in->unit);
        llmpar__order_touch_unit(list, LLMPAR__THING_STORED_PARAMS, store, in->unit);
        break;
    case LLMPAR_STATE_GRADS:
        llmpar__order_touch_gradient(list, device, in->unit, in->use, 0, in->slot);
        llmpar__order_touch_stored_gradient(list, store, in->unit, in->use, in->slot);
        break;
    case LLMPAR_STATE_ACTIVATIONS:
        llmpar__order_touch_micro(order, list, LLMPAR__THING_SAVED, device, in->unit, in->micro_batch);
        llmpar__order_touch_micro(order, list, LLMPAR__THING_INPUT, device, in->unit, in->micro_batch);
        llmpar__order_touch_micro(order, list, LLMPAR__THING_STORED_ACTIVATIONS, store, in->unit, in->micro_batch);
        break;
    case LLMPAR_STATE_COUNT: break;
    }
}

static void llmpar__order_compute(const llmpar__order *order, const llmpar_instruction *in, llmpar__access_list *list)
{
    int32_t unit = in->unit, m = in->micro_batch, borrow = order->units[unit].borrow - 1;
    llmpar__thing params = order->whole_params ? LLMPAR__THING_SHARD : LLMPAR__THING_WHOLE;
    llmpar__order_touch_unit(list, params, LLMPAR__ACCESS_READ, unit);
    if (borrow >= 0) llmpar__order_touch_unit(list, params, LLMPAR__ACCESS_READ, borrow);
    if (in->op == LLMPAR_OP_BACKWARD) { /* releases what the forward left for it */
        llmpar__order_touch_micro(order, list, LLMPAR__THING_SAVED, LLMPAR__ACCESS_WRITE, unit, m);
        llmpar__order_touch_micro(order, list, LLMPAR__THING_INPUT, LLMPAR__ACCESS_WRITE, unit, m);
        if (in->slot >= 0) llmpar__order_touch_gradient(list, LLMPAR__ACCESS_FRESH, unit, 0, in->local, in->slot);
        if (in->from >= 0 && borrow >= 0) llmpar__order_touch_gradient(list, LLMPAR__ACCESS_FRESH, borrow, 1, in->local, in->from);
        if (unit + 1 == order->unit_count && !in->again) llmpar__order_touch(list, LLMPAR__THING_LOSS, LLMPAR__ACCESS_WRITE, 0);
        return;
    }
    llmpar__order_touch_micro(order, list, LLMPAR__THING_INPUT, LLMPAR__ACCESS_READ, unit, m);
    llmpar__order_touch_micro(order, list, LLMPAR__THING_SAVED, LLMPAR__ACCESS_FRESH, unit, m);
    if (in->op == LLMPAR_OP_RECOMPUTE) return;
    if (unit + 1 < order->unit_count) llmpar__order_touch_micro(order, list, LLMPAR__THING_INPUT, LLMPAR__ACCESS_FRESH, unit + 1, m);
    else if (!in->again) llmpar__order_touch(list, LLMPAR__THING_LOSS, LLMPAR__ACCESS_WRITE, 0);
}

static void llmpar__order_accesses(const llmpar__order *order, const llmpar_instruction *in, llmpar__access_list *list)
{
    int32_t unit = in->unit;
    list->count = 0;
    switch (in->op) {
    case LLMPAR_OP_GATHER:
        llmpar__order_touch_unit(list, LLMPAR__THING_SHARD, order->whole_params ? LLMPAR__ACCESS_WRITE : LLMPAR__ACCESS_READ, unit);
        if (!order->whole_params) llmpar__order_touch_unit(list, LLMPAR__THING_WHOLE, LLMPAR__ACCESS_FRESH, unit);
        break;
    case LLMPAR_OP_FREE:
        if (in->slot >= 0) llmpar__order_touch_gradient(list, LLMPAR__ACCESS_WRITE, unit, in->use, in->local, in->slot);
        else llmpar__order_touch_unit(list, in->what == LLMPAR_STATE_PARAMS ? LLMPAR__THING_SHARD : LLMPAR__THING_WHOLE, LLMPAR__ACCESS_WRITE, unit);
        break;
    case LLMPAR_OP_FORWARD:
    case LLMPAR_OP_RECOMPUTE:
    case LLMPAR_OP_BACKWARD: llmpar__order_compute(order, in, list); break;
    case LLMPAR_OP_REDUCE: {
        int in_place = order->whole_grads;
        llmpar__order_touch_gradient(list, in_place ? LLMPAR__ACCESS_WRITE : LLMPAR__ACCESS_FRESH, unit, in->use, 0, in->slot);
        if (!in_place) llmpar__order_touch_gradient(list, LLMPAR__ACCESS_READ, unit, in->use, 1, in->from);
        break;
    }
    case LLMPAR_OP_REDUCE_REPLICA: llmpar__order_touch_gradient(list, LLMPAR__ACCESS_WRITE, unit, in->use, 0, in->slot); break;
    case LLMPAR_OP_ACCUMULATE:
        llmpar__order_touch_gradient(list, LLMPAR__ACCESS_WRITE, unit, in->use, in->local, in->slot);
        llmpar__order_touch_gradient(list, LLMPAR__ACCESS_WRITE, unit, in->from_use, in->local, in->from);
        break;
    case LLMPAR_OP_NORM:
        llmpar__order_touch_gradient(list, LLMPAR__ACCESS_READ, unit, in->use, 0, in->slot);
        llmpar__order_touch(list, LLMPAR__THING_NORMS, LLMPAR__ACCESS_WRITE, 1);
        break;
    case LLMPAR_OP_SCALAR_REDUCE:
        llmpar__order_touch(list, LLMPAR__THING_LOSS, LLMPAR__ACCESS_WRITE, 0);
        llmpar__order_touch(list, LLMPAR__THING_NORMS, LLMPAR__ACCESS_WRITE, 1);
        break;
    case LLMPAR_OP_OPTIM:
        if (order->host_update) {
            llmpar__order_touch_stored_gradient(list, LLMPAR__ACCESS_WRITE, unit, in->use, in->slot);
            llmpar__order_touch_unit(list, LLMPAR__THING_STORED_STATE, LLMPAR__ACCESS_WRITE, unit);
            llmpar__order_touch_unit(list, LLMPAR__THING_STORED_PARAMS, LLMPAR__ACCESS_WRITE, unit);
            break;
        }
        llmpar__order_touch_gradient(list, LLMPAR__ACCESS_WRITE, unit, in->use, 0, in->slot);
        llmpar__order_touch_unit(list, LLMPAR__THING_STATE, LLMPAR__ACCESS_WRITE, unit);
        llmpar__order_touch_unit(list, order->master ? LLMPAR__THING_MASTER : LLMPAR__THING_SHARD, LLMPAR__ACCESS_WRITE, unit);
        break;
    case LLMPAR_OP_CAST:
        llmpar__order_touch_unit(list, order->host_update ? LLMPAR__THING_STORED_PARAMS : LLMPAR__THING_MASTER, LLMPAR__ACCESS_READ, unit);
        llmpar__order_touch_unit(list, LLMPAR__THING_SHARD, LLMPAR__ACCESS_WRITE, unit);
        break;
    case LLMPAR_OP_FETCH:
    case LLMPAR_OP_STORE: llmpar__order_move(order, in, list); break;
    }
}

/* ---- clocks ---- */

LLMPAR__PRIVATE_DEF void llmpar__order_wait(llmpar__order *order, int32_t at, int32_t earlier)
{
    int32_t *clock = order->clock[at];
    if (earlier < 0) return;
    for (int s = 0; s < LLMPAR_STREAM_COUNT; s++)
        if (order->clock[earlier][s] > clock[s]) clock[s] = order->clock[earlier][s];
    if (earlier > clock[order->list[earlier].stream]) clock[order->list[earlier].stream] = earlier;
}

LLMPAR__PRIVATE_DEF void llmpar__order_begin(llmpar__order *order, int32_t at)
{
    const llmpar_instruction *in = &order->list[at];
    memcpy(order->clock[at], order->host, sizeof order->host);
    llmpar__order_wait(order, at, order->last[in->stream]);
    for (int32_t w = 0; w < in->wait_count; w++) llmpar__order_wait(order, at, in->waits[w]);
}

LLMPAR__PRIVATE_DEF int llmpar__order_hazard(const llmpar__order *order, int32_t at, llmpar__hazard *out)
{
    llmpar__access_list list;
    const int32_t *clock = order->clock[at];
    llmpar__order_accesses(order, &order->list[at], &list);
    out->earlier = -1;
    for (int i = 0; i < list.count; i++) {
        const llmpar__access *access = &list.access[i];
        const llmpar__track *track = &order->track[access->track];
        if (access->kind == LLMPAR__ACCESS_FRESH) continue;
        for (int s = access->kind == LLMPAR__ACCESS_READ ? LLMPAR_STREAM_COUNT : 0; s <= LLMPAR_STREAM_COUNT; s++) {
            int32_t earlier = s < LLMPAR_STREAM_COUNT ? track->reader[s] : track->writer;
            if (earlier <= out->earlier || clock[order->list[earlier].stream] >= earlier) continue;
            out->earlier = earlier;
            out->access = *access;
            out->earlier_wrote = s == LLMPAR_STREAM_COUNT;
        }
    }
    return out->earlier >= 0;
}

LLMPAR__PRIVATE_DEF void llmpar__order_end(llmpar__order *order, int32_t at)
{
    const llmpar_instruction *in = &order->list[at];
    llmpar__access_list list;
    llmpar__order_accesses(order, in, &list);
    for (int i = 0; i < list.count; i++) {
        llmpar__track *track = &order->track[list.access[i].track];
        if (list.access[i].kind == LLMPAR__ACCESS_READ) {
            track->reader[in->stream] = at;
        } else {
            memset(track, -1, sizeof *track);
            track->writer = at;
        }
    }
    order->last[in->stream] = at;
    if (in->op != LLMPAR_OP_SCALAR_REDUCE) return;
    for (int s = 0; s < LLMPAR_STREAM_COUNT; s++)
        if (order->clock[at][s] > order->host[s]) order->host[s] = order->clock[at][s];
    if (at > order->host[in->stream]) order->host[in->stream] = at;
}
