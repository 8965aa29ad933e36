#include "fsdp/schedule.h"
#include "fsdp/schedule_internal.h"

#include <string.h>

LLMPAR_DEF int llmpar_policy_whole_params(const llmpar_policy *policy) { return policy->shards < 2 || (policy->zero != LLMPAR_ZERO_DEFAULT && policy->zero < LLMPAR_ZERO_3); }
LLMPAR_DEF int llmpar_policy_whole_grads(const llmpar_policy *policy) { return policy->shards < 2 || policy->zero == LLMPAR_ZERO_0 || policy->zero == LLMPAR_ZERO_1; }
LLMPAR_DEF int llmpar_policy_whole_state(const llmpar_policy *policy) { return policy->shards < 2 || policy->zero == LLMPAR_ZERO_0; }

LLMPAR_DEF int32_t llmpar_schedule_first_backward(const llmpar_unit *units, int32_t unit_count)
{
    int32_t first = 0;
    while (first < unit_count && units[first].frozen && (!units[first].borrow || units[units[first].borrow - 1].frozen)) first++;
    return first;
}

LLMPAR__PRIVATE_DEF void llmpar__policy_resolve(llmpar_policy *policy)
{
    if (policy->micro_batches == 0) policy->micro_batches = 1;
    if (policy->shards == 0) policy->shards = 1;
    if (policy->replicas == 0) policy->replicas = 1;
    if (policy->zero == LLMPAR_ZERO_DEFAULT) policy->zero = LLMPAR_ZERO_3;
    if (policy->reshard == LLMPAR_RESHARD_DEFAULT) policy->reshard = LLMPAR_RESHARD_NOT_LAST;
    if (policy->reshard_every == 0) policy->reshard_every = 2;
}

/* The compute steps of a step in order: for every micro-batch all forwards, then all backwards; in two passes the whole again.

     step:   F0 F1 F2 B2 B1 B0 | F0 F1 ...
     resident (prefetch 0): unit 2 stays from F2 to B2, unit 0 from B0 to the next F0; all others are freed after a use and gathered again.
     prefetch d: the gather stands d steps before its use; a gather that would stand before the preceding free cancels both.

   Waits that bound memory are placed here; those that data needs, where they are not implied, by llmpar__plan_order at the end. */
typedef struct llmpar__plan {
    llmpar_schedule *schedule;
    const llmpar_unit *units;
    int32_t first;            /* the first unit with a backward */
    int32_t steps_per_micro, steps;
    unsigned char *flag;      /* [steps][units]: 1 gather before, 2 free after */
    int32_t *last_gather;     /* [units] instruction index, -1 */
    int32_t *depth;           /* [units][2] occupied buffers of the binary counter */
    int32_t *uses_left;       /* [units] gradients (own, borrowed) that this pass still adds to */
    int32_t *update;          /* [updates] units in the order of their updates */
    int32_t updates, updated, fetched;
    int32_t last_param_free;  /* instruction index, -1 */
    int32_t last_grad_free;
    int32_t pending[2];       /* units whose own, borrowed local buffer 0 is reduced and not yet freed, -1 */
    int32_t status;           /* 1: out of memory */
} llmpar__plan;

static int32_t llmpar__plan_unit(const llmpar__plan *plan, int32_t step, int *backward)
{
    int32_t n = plan->schedule->units, k = step % plan->steps_per_micro;
    *backward = k >= n;
    return k < n ? k : 2 * n - 1 - k;
}

static int llmpar__plan_uses(const llmpar__plan *plan, int32_t step, int32_t unit)
{
    int backward;
    int32_t own = llmpar__plan_unit(plan, step, &backward);
    return own == unit || plan->units[own].borrow - 1 == unit;
}

/* The unit that borrows this one, -1. */
static int32_t llmpar__plan_borrower(const llmpar__plan *plan, int32_t unit)
{
    for (int32_t other = 0; other < plan->schedule->units; other++)
        if (plan->units[other].borrow - 1 == unit) return other;
    return -1;
}

static int llmpar__plan_offloads(const llmpar__plan *plan, llmpar_state what) { return (int)(plan->schedule->policy.offload >> (unsigned)what & 1u); }

/* A unit's reduced gradient goes on as soon as it is complete, instead of at the end of the step. */
static int llmpar__plan_eager(const llmpar__plan *plan) { return plan->schedule->policy.update != LLMPAR_UPDATE_AFTER || llmpar__plan_offloads(plan, LLMPAR_STATE_GRADS); }

static llmpar_instruction *llmpar__plan_emit(llmpar__plan *plan, llmpar_op op, int32_t unit, int32_t micro, llmpar_stream_id stream)
{
    llmpar_schedule *schedule = plan->schedule;
    static const llmpar_instruction empty = {LLMPAR_OP_GATHER, -1, -1, 0, 0, -1, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_COMPUTE, LLMPAR_ALWAYS, 0, {-1, -1, -1, -1, -1, -1}};
    if (schedule->count == schedule->capacity) {
        int32_t capacity = schedule->capacity * 2;
        llmpar_instruction *list = LLMPAR__ALLOC(llmpar_instruction, schedule->heap, (size_t)capacity);
        if (!list) {
            plan->status = 1;
            schedule->count = 0; /* keep writing into the old list; the caller reports */
        } else {
            memcpy(list, schedule->list, (size_t)schedule->count * sizeof *list);
            llmpar_heap_free(schedule->heap, schedule->list);
            schedule->list = list;
            schedule->capacity = capacity;
        }
    }
    llmpar_instruction *instruction = &schedule->list[schedule->count++];
    *instruction = empty;
    instruction->op = op;
    instruction->unit = unit;
    instruction->micro_batch = micro;
    instruction->stream = stream;
    return instruction;
}

static void llmpar__plan_wait(llmpar_instruction *instruction, int32_t index)
{
    if (index < 0) return;
    for (int32_t i = 0; i < instruction->wait_count; i++)
        if (instruction->waits[i] == index) return;
    if (instruction->wait_count < LLMPAR_WAITS) instruction->waits[instruction->wait_count++] = index;
}

static llmpar_instruction *llmpar__plan_move(llmpar__plan *plan, llmpar_op op, llmpar_state what, int32_t unit)
{
    llmpar_instruction *move = llmpar__plan_emit(plan, op, unit, -1, LLMPAR_STREAM_OFFLOAD);
    move->what = what;
    return move;
}

static void llmpar__plan_move_gradient(llmpar__plan *plan, llmpar_op op, int32_t unit, int32_t use, int32_t slot)
{
    llmpar_instruction *move = llmpar__plan_move(plan, op, LLMPAR_STATE_GRADS, unit);
    move->use = use;
    move->slot = slot;
}

/* ---- parameters ---- */

/* Where the gathers and frees stand. */
static void llmpar__plan_residency(llmpar__plan *plan)
{
    const llmpar_policy *policy = &plan->schedule->policy;
    int32_t n = plan->schedule->units;
    for (int32_t unit = 0; unit < n; unit++) {
        int32_t previous = -1;
        int backward, was_backward = 0, stays = policy->reshard == LLMPAR_RESHARD_NEVER || (policy->reshard == LLMPAR_RESHARD_EVERY && (unit + 1) % policy->reshard_every);
        for (int32_t step = 0; step < plan->steps; step++) {
            if (!llmpar__plan_uses(plan, step, unit)) continue;
            llmpar__plan_unit(plan, step, &backward);
            int32_t ahead = backward ? policy->prefetch_backward : policy->prefetch, gather = step - ahead < 0 ? 0 : step - ahead;
            int turn = policy->reshard == LLMPAR_RESHARD_ALWAYS && backward && !was_backward;
            if (turn && gather <= previous) gather = previous + 1;
            was_backward = backward;
            if (previous >= 0 && !turn && (step == previous + 1 || stays || gather <= previous)) {
                previous = step;
                continue;
            }
            if (previous >= 0) plan->flag[(size_t)previous * (size_t)n + (size_t)unit] |= 2u;
            plan->flag[(size_t)gather * (size_t)n + (size_t)unit] |= 1u;
            previous = step;
        }
        if (previous >= 0) plan->flag[(size_t)previous * (size_t)n + (size_t)unit] |= 2u;
    }
}

/* A shard that is in a store is fetched for the gather alone. */
static void llmpar__plan_gather(llmpar__plan *plan, int32_t unit)
{
    int fetched = llmpar__plan_offloads(plan, LLMPAR_STATE_PARAMS) && !plan->schedule->policy.master;
    if (fetched) llmpar__plan_move(plan, LLMPAR_OP_FETCH, LLMPAR_STATE_PARAMS, unit);
    llmpar__plan_wait(llmpar__plan_emit(plan, LLMPAR_OP_GATHER, unit, -1, LLMPAR_STREAM_GATHER), plan->last_param_free);
    plan->last_gather[unit] = plan->schedule->count - 1;
    if (fetched) llmpar__plan_emit(plan, LLMPAR_OP_FREE, unit, -1, LLMPAR_STREAM_GATHER)->what = LLMPAR_STATE_PARAMS;
}

static void llmpar__plan_gathers(llmpar__plan *plan, int32_t step)
{
    const llmpar_policy *policy = &plan->schedule->policy;
    int32_t n = plan->schedule->units, last = step + (policy->prefetch > policy->prefetch_backward ? policy->prefetch : policy->prefetch_backward);
    /* In order of need, which for a step may be its own unit and the one it borrows. */
    for (int32_t ahead = step; ahead <= last && ahead < plan->steps; ahead++)
        for (int32_t unit = 0; unit < n; unit++) {
            unsigned char *flag = &plan->flag[(size_t)step * (size_t)n + (size_t)unit];
            if (!(*flag & 1u) || !llmpar__plan_uses(plan, ahead, unit)) continue;
            *flag &= (unsigned char)~1u;
            llmpar__plan_gather(plan, unit);
        }
}

/* ---- gradients ---- */

/* One more gradient of (unit, use) is in buffer depth-1 of the counter: merge while the number of micro-batches says so.
   Micro-batch m completes as many subtrees as m + 1 has trailing zero bits. `last` folds what is left when M is no power of two; a chain folds at once. */
static void llmpar__plan_count(llmpar__plan *plan, int32_t unit, int32_t use, int32_t micro, int last, int local, int stored, llmpar_stream_id stream)
{
    int32_t *depth = &plan->depth[unit * 2 + use];
    for (int32_t bits = micro + 1; *depth > 1 && ((bits & 1) == 0 || last || plan->schedule->policy.chain); bits >>= 1) {
        if (stored) llmpar__plan_move_gradient(plan, LLMPAR_OP_FETCH, unit, use, *depth - 2);
        llmpar_instruction *add = llmpar__plan_emit(plan, LLMPAR_OP_ACCUMULATE, unit, micro, stream);
        add->use = add->from_use = use;
        add->slot = *depth - 2;
        add->from = *depth - 1;
        add->local = local;
        --*depth;
    }
}

/* Buffer `from` (local, or the one that is reduced in place) to shard buffer `slot`, summed over replicas. */
static void llmpar__plan_reduce(llmpar__plan *plan, int32_t unit, int32_t use, int32_t micro, int32_t from, int32_t slot, int32_t after)
{
    const llmpar_policy *policy = &plan->schedule->policy;
    if (!llmpar_policy_whole_state(policy)) {
        llmpar_instruction *reduce = llmpar__plan_emit(plan, LLMPAR_OP_REDUCE, unit, micro, LLMPAR_STREAM_REDUCE);
        reduce->use = use;
        reduce->from = from;
        reduce->slot = slot;
        llmpar__plan_wait(reduce, after);
    }
    if (policy->replicas > 1) {
        llmpar_instruction *replica = llmpar__plan_emit(plan, LLMPAR_OP_REDUCE_REPLICA, unit, micro, LLMPAR_STREAM_REDUCE);
        replica->use = use;
        replica->slot = slot;
        llmpar__plan_wait(replica, after);
    }
}

static void llmpar__plan_free_gradient(llmpar__plan *plan, int32_t unit, int32_t use, int32_t local)
{
    llmpar_instruction *release = llmpar__plan_emit(plan, LLMPAR_OP_FREE, unit, -1, LLMPAR_STREAM_REDUCE);
    release->use = use;
    release->slot = 0;
    release->local = local;
    plan->last_grad_free = plan->schedule->count - 1;
}

/* The buffer that was reduced one step ago is freed after the next backward, which so did not have to wait for that reduction. */
static void llmpar__plan_free_pending(llmpar__plan *plan)
{
    for (int use = 0; use < 2; use++) {
        if (plan->pending[use] >= 0) llmpar__plan_free_gradient(plan, plan->pending[use], use, 1);
        plan->pending[use] = -1;
    }
}

/* Everything one (unit, use) gradient goes through after its backward. */
static void llmpar__plan_gradient(llmpar__plan *plan, int32_t unit, int32_t use, int32_t micro, int32_t slot, int32_t backward)
{
    const llmpar_policy *policy = &plan->schedule->policy;
    int last = micro + 1 == policy->micro_batches, whole = llmpar_policy_whole_grads(policy), stored = llmpar__plan_offloads(plan, LLMPAR_STATE_GRADS);
    int32_t *depth = &plan->depth[unit * 2 + use], before = plan->schedule->count;
    if (policy->no_sync) {
        llmpar__plan_count(plan, unit, use, micro, last, !whole, 0, LLMPAR_STREAM_COMPUTE);
        if (!last) return;
        llmpar__plan_reduce(plan, unit, use, micro, 0, 0, plan->schedule->count > before ? plan->schedule->count - 1 : backward);
    } else {
        llmpar__plan_reduce(plan, unit, use, micro, slot, whole ? slot : *depth, backward);
        if (!whole) ++*depth; /* the shard counter grows by what REDUCE writes; a backward that is reduced in place wrote it there itself */
        before = plan->schedule->count;
        llmpar__plan_count(plan, unit, use, micro, last, 0, stored, LLMPAR_STREAM_REDUCE);
        if (plan->schedule->count > before) llmpar__plan_wait(&plan->schedule->list[before + stored], backward); /* the first ACCUMULATE */
    }
    if (last) plan->uses_left[unit]--;
    if (stored && !(last && plan->uses_left[unit] == 0)) llmpar__plan_move_gradient(plan, LLMPAR_OP_STORE, unit, use, *depth - 1);
    if (whole) return;
    plan->pending[use] = unit;
    if (policy->update != LLMPAR_UPDATE_AFTER) llmpar__plan_free_pending(plan);
}

/* ---- updates ---- */

/* The states of the k-th update that are kept in stores. */
static void llmpar__plan_fetch(llmpar__plan *plan, int32_t k)
{
    const llmpar_policy *policy = &plan->schedule->policy;
    if (policy->host_update || k < plan->fetched || k >= plan->updates) return;
    plan->fetched = k + 1;
    if (llmpar__plan_offloads(plan, LLMPAR_STATE_OPTIMIZER)) llmpar__plan_move(plan, LLMPAR_OP_FETCH, LLMPAR_STATE_OPTIMIZER, plan->update[k]);
    if (llmpar__plan_offloads(plan, LLMPAR_STATE_PARAMS) && (policy->master || policy->update == LLMPAR_UPDATE_AFTER)) llmpar__plan_move(plan, LLMPAR_OP_FETCH, LLMPAR_STATE_PARAMS, plan->update[k]);
    if (llmpar__plan_offloads(plan, LLMPAR_STATE_GRADS)) llmpar__plan_move_gradient(plan, LLMPAR_OP_FETCH, plan->update[k], 0, 0);
}

/* The next unit's update, with the states of the one behind it on their way. A shard without master that a later gather of this step needs cannot be fetched ahead.
   On the host: what goes back to the device moves on another stream than gradients came by, so that the host waits for those alone and goes on with the next unit meanwhile. */
static void llmpar__plan_update(llmpar__plan *plan, int32_t after)
{
    const llmpar_policy *policy = &plan->schedule->policy;
    int32_t unit = plan->update[plan->updated];
    int host = policy->host_update, params = llmpar__plan_offloads(plan, LLMPAR_STATE_PARAMS) && !host;
    llmpar_predicate predicate = policy->update == LLMPAR_UPDATE_INSIDE ? LLMPAR_ALWAYS : LLMPAR_IF_FINITE;
    llmpar__plan_fetch(plan, plan->updated);
    llmpar__plan_fetch(plan, plan->updated + 1);
    plan->updated++;
    if (params && !policy->master && policy->update != LLMPAR_UPDATE_AFTER) llmpar__plan_move(plan, LLMPAR_OP_FETCH, LLMPAR_STATE_PARAMS, unit);
    llmpar_instruction *optim = llmpar__plan_emit(plan, LLMPAR_OP_OPTIM, unit, -1, host ? LLMPAR_STREAM_OFFLOAD : LLMPAR_STREAM_COMPUTE);
    optim->slot = 0;
    optim->predicate = predicate;
    llmpar__plan_wait(optim, after);
    if (policy->master) llmpar__plan_emit(plan, LLMPAR_OP_CAST, unit, -1, host ? LLMPAR_STREAM_GATHER : LLMPAR_STREAM_COMPUTE)->predicate = predicate;
    if (!host && llmpar__plan_offloads(plan, LLMPAR_STATE_OPTIMIZER)) llmpar__plan_move(plan, LLMPAR_OP_STORE, LLMPAR_STATE_OPTIMIZER, unit);
    if (params) llmpar__plan_move(plan, LLMPAR_OP_STORE, LLMPAR_STATE_PARAMS, unit);
    if (llmpar_policy_whole_params(policy) && !llmpar_policy_whole_state(policy)) llmpar__plan_emit(plan, LLMPAR_OP_GATHER, unit, -1, LLMPAR_STREAM_GATHER)->predicate = predicate;
}

/* Tied weights: g = g_head + g_embed, once, on the shard. */
static llmpar_instruction *llmpar__plan_tie(llmpar__plan *plan, int32_t lender)
{
    llmpar_instruction *add = llmpar__plan_emit(plan, LLMPAR_OP_ACCUMULATE, lender, -1, LLMPAR_STREAM_REDUCE);
    add->slot = add->from = 0;
    add->from_use = 1;
    return add;
}

/* Where gradients do not wait for the end of the step: the last use of `unit` may be reduced now. */
static void llmpar__plan_complete(llmpar__plan *plan, int32_t unit, int32_t now, int32_t micro, int32_t again)
{
    const llmpar_policy *policy = &plan->schedule->policy;
    if (unit < 0 || plan->units[unit].frozen || plan->uses_left[unit] || micro + 1 != policy->micro_batches) return;
    int stored = llmpar__plan_offloads(plan, LLMPAR_STATE_GRADS);
    if (llmpar__plan_borrower(plan, unit) >= 0) {
        if (stored) llmpar__plan_move_gradient(plan, LLMPAR_OP_FETCH, unit, unit == now, 0); /* the other use */
        llmpar__plan_tie(plan, unit);
    }
    int norm_only = policy->update == LLMPAR_UPDATE_TWO_PASSES && !again;
    if (policy->update != LLMPAR_UPDATE_TWO_PASSES || norm_only) llmpar__plan_emit(plan, LLMPAR_OP_NORM, unit, -1, LLMPAR_STREAM_REDUCE)->slot = 0;
    if (stored) llmpar__plan_move_gradient(plan, LLMPAR_OP_STORE, unit, 0, 0);
    if (norm_only) {
        llmpar__plan_free_gradient(plan, unit, 0, 0);
        plan->depth[unit * 2] = plan->depth[unit * 2 + 1] = 0;
        plan->uses_left[unit] = llmpar__plan_borrower(plan, unit) >= 0 ? 2 : 1;
    } else if (policy->update != LLMPAR_UPDATE_AFTER) {
        llmpar__plan_update(plan, -1);
    }
}

/* ---- steps ---- */

static int llmpar__plan_stores_activations(const llmpar__plan *plan, int32_t unit)
{
    if (plan->schedule->policy.forward_only || !llmpar__plan_offloads(plan, LLMPAR_STATE_ACTIVATIONS)) return 0;
    return unit >= plan->first && unit + 1 < plan->schedule->units && (unit > 0 || plan->units[unit].recompute != LLMPAR_RECOMPUTE_FULL); /* the first unit's input are the token ids */
}

static void llmpar__plan_wait_params(llmpar__plan *plan, llmpar_instruction *in)
{
    int32_t borrow = plan->units[in->unit].borrow - 1;
    if (llmpar_policy_whole_params(&plan->schedule->policy)) return;
    llmpar__plan_wait(in, plan->last_gather[in->unit]);
    if (borrow >= 0) llmpar__plan_wait(in, plan->last_gather[borrow]);
}

static void llmpar__plan_forward(llmpar__plan *plan, int32_t unit, int32_t micro, int32_t again)
{
    llmpar_instruction *forward = llmpar__plan_emit(plan, LLMPAR_OP_FORWARD, unit, micro, LLMPAR_STREAM_COMPUTE);
    forward->pass = plan->schedule->policy.forward_only || unit < plan->first ? LLMPAR_PASS_EVAL : LLMPAR_PASS_FORWARD;
    forward->again = again;
    llmpar__plan_wait_params(plan, forward);
    if (llmpar__plan_stores_activations(plan, unit)) llmpar__plan_move(plan, LLMPAR_OP_STORE, LLMPAR_STATE_ACTIVATIONS, unit)->micro_batch = micro;
}

static void llmpar__plan_backward(llmpar__plan *plan, int32_t unit, int32_t micro, int32_t again)
{
    const llmpar_policy *policy = &plan->schedule->policy;
    const llmpar_unit *u = &plan->units[unit];
    int32_t borrow = u->borrow - 1, lender = borrow >= 0 && !plan->units[borrow].frozen ? borrow : -1;
    int whole = llmpar_policy_whole_grads(policy);
    /* Which buffer backward writes: the counter's next one, except where only shards are counted: then local buffer 0. */
    int counted = policy->no_sync || whole;
    if (plan->pending[0] == unit) llmpar__plan_free_pending(plan); /* the only unit with a gradient: that of the micro-batch before is still in the buffer */
    if (unit > 0 && llmpar__plan_stores_activations(plan, unit - 1)) llmpar__plan_move(plan, LLMPAR_OP_FETCH, LLMPAR_STATE_ACTIVATIONS, unit - 1)->micro_batch = micro;
    if (u->recompute == LLMPAR_RECOMPUTE_FULL) {
        llmpar_instruction *recompute = llmpar__plan_emit(plan, LLMPAR_OP_RECOMPUTE, unit, micro, LLMPAR_STREAM_COMPUTE);
        recompute->pass = LLMPAR_PASS_RECOMPUTE;
        recompute->again = again;
        llmpar__plan_wait_params(plan, recompute);
    }
    llmpar_instruction *backward = llmpar__plan_emit(plan, LLMPAR_OP_BACKWARD, unit, micro, LLMPAR_STREAM_COMPUTE);
    int32_t slot = u->frozen ? -1 : counted ? plan->depth[unit * 2]++ : 0, from = lender < 0 ? -1 : counted ? plan->depth[lender * 2 + 1]++ : 0, index = plan->schedule->count - 1;
    backward->pass = LLMPAR_PASS_BACKWARD;
    backward->slot = slot;
    backward->from = from;
    backward->local = !whole;
    backward->again = again;
    if (u->recompute != LLMPAR_RECOMPUTE_FULL) llmpar__plan_wait_params(plan, backward);
    if (slot >= 0 || from >= 0) llmpar__plan_wait(backward, plan->last_grad_free);
    llmpar__plan_free_pending(plan); /* before this step's own reduction, which the next backward then need not wait for either */
    if (slot >= 0) llmpar__plan_gradient(plan, unit, 0, micro, slot, index);
    if (from >= 0) llmpar__plan_gradient(plan, lender, 1, micro, from, index);
}

static int32_t llmpar__plan_last_compute(const llmpar__plan *plan)
{
    int32_t compute = plan->schedule->count - 1;
    while (compute >= 0 && plan->schedule->list[compute].stream != LLMPAR_STREAM_COMPUTE) compute--;
    return compute;
}

static void llmpar__plan_scalar(llmpar__plan *plan)
{
    int32_t compute = llmpar__plan_last_compute(plan);
    llmpar_instruction *reduce = llmpar__plan_emit(plan, LLMPAR_OP_SCALAR_REDUCE, -1, -1, LLMPAR_STREAM_REDUCE);
    reduce->pass = 1;
    llmpar__plan_wait(reduce, compute); /* it wrote gradients (whole) and the loss */
}

static void llmpar__plan_list_step(llmpar__plan *plan, int32_t step)
{
    const llmpar_policy *policy = &plan->schedule->policy;
    int backward;
    int32_t n = plan->schedule->units, unit = llmpar__plan_unit(plan, step, &backward), pass = step / plan->steps_per_micro, micro = pass % policy->micro_batches, again = pass / policy->micro_batches;
    if (again && step % plan->steps_per_micro == 0) llmpar__plan_scalar(plan);
    if (!llmpar_policy_whole_params(policy)) llmpar__plan_gathers(plan, step);
    if (backward) llmpar__plan_backward(plan, unit, micro, again);
    else llmpar__plan_forward(plan, unit, micro, again);
    if (!llmpar_policy_whole_params(policy))
        for (int32_t other = 0; other < n; other++)
            if (plan->flag[(size_t)step * (size_t)n + (size_t)other] & 2u) {
                llmpar__plan_emit(plan, LLMPAR_OP_FREE, other, -1, LLMPAR_STREAM_COMPUTE);
                plan->last_param_free = plan->schedule->count - 1;
            }
    if (!backward || !llmpar__plan_eager(plan)) return;
    llmpar__plan_complete(plan, unit, unit, micro, again);
    llmpar__plan_complete(plan, plan->units[unit].borrow - 1, unit, micro, again);
}

/* Norms, the one scalar reduction, the updates. */
static void llmpar__plan_finish(llmpar__plan *plan)
{
    const llmpar_policy *policy = &plan->schedule->policy;
    int32_t n = plan->schedule->units, compute = llmpar__plan_last_compute(plan);
    if (policy->update == LLMPAR_UPDATE_TWO_PASSES && !policy->forward_only) return;
    if (!policy->forward_only && !llmpar__plan_eager(plan)) {
        for (int32_t unit = 0; unit < n; unit++) {
            int32_t lender = plan->units[unit].borrow - 1;
            if (lender < 0 || plan->units[lender].frozen) continue;
            llmpar_instruction *add = llmpar__plan_tie(plan, lender);
            if (llmpar_policy_whole_state(policy)) llmpar__plan_wait(add, plan->schedule->count - 2);
        }
        for (int32_t unit = 0; unit < n; unit++) {
            if (plan->units[unit].frozen) continue;
            llmpar_instruction *norm = llmpar__plan_emit(plan, LLMPAR_OP_NORM, unit, -1, LLMPAR_STREAM_REDUCE);
            norm->slot = 0;
            if (llmpar_policy_whole_state(policy)) llmpar__plan_wait(norm, compute);
        }
    }
    llmpar__plan_scalar(plan);
    int32_t after = plan->schedule->count - 1;
    while (!policy->forward_only && plan->updated < plan->updates) llmpar__plan_update(plan, after);
}

/* The order of updates: as gradients become complete in backward, or by unit at the end. */
static void llmpar__plan_update_order(llmpar__plan *plan)
{
    int32_t n = plan->schedule->units;
    if (plan->schedule->policy.forward_only) return;
    for (int32_t unit = 0; unit < n; unit++) plan->uses_left[unit] = plan->units[unit].frozen ? 0 : llmpar__plan_borrower(plan, unit) >= 0 ? 2 : 1;
    if (plan->schedule->policy.update == LLMPAR_UPDATE_AFTER) {
        for (int32_t unit = 0; unit < n; unit++)
            if (!plan->units[unit].frozen) plan->update[plan->updates++] = unit;
        return;
    }
    for (int32_t unit = n - 1; unit >= plan->first; unit--) {
        int32_t lender = plan->units[unit].borrow - 1;
        if (!plan->units[unit].frozen && llmpar__plan_borrower(plan, unit) < 0) plan->update[plan->updates++] = unit;
        if (!plan->units[unit].frozen && llmpar__plan_borrower(plan, unit) > unit) plan->update[plan->updates++] = unit;
        if (lender > unit && !plan->units[lender].frozen) plan->update[plan->updates++] = lender;
    }
}

/* Adds the waits that data needs: what another stream wrote, or still reads, is complete first. */
static void llmpar__plan_order(llmpar__plan *plan)
{
    llmpar_schedule *schedule = plan->schedule;
    llmpar__order order;
    llmpar__hazard hazard;
    if (llmpar__order_create(&order, schedule->heap, schedule->list, schedule->count, plan->units, schedule->units, &schedule->policy)) {
        plan->status = 1;
        return;
    }
    for (int32_t at = 0; at < schedule->count; at++) {
        llmpar__order_begin(&order, at);
        while (llmpar__order_hazard(&order, at, &hazard)) {
            llmpar__plan_wait(&schedule->list[at], hazard.earlier);
            llmpar__order_wait(&order, at, hazard.earlier);
        }
        llmpar__order_end(&order, at);
    }
    llmpar__order_destroy(&order);
}

/* ---- policies ---- */

#define LLMPAR__PLAN_NO(...) llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "schedule: " __VA_ARGS__)
static llmpar_status llmpar__plan_check_units(const llmpar_unit *units, int32_t unit_count, const llmpar_policy *policy, llmpar_error *error)
{
    for (int32_t unit = 0; unit < unit_count; unit++) {
        int32_t borrow = units[unit].borrow - 1;
        if (borrow >= unit_count || borrow < -1 || borrow == unit || (borrow >= 0 && units[borrow].borrow))
            return LLMPAR__PLAN_NO("unit %s borrows unit %d, expected another unit that borrows none", units[unit].name, (int)borrow);
        for (int32_t other = 0; other < unit && borrow >= 0; other++)
            if (units[other].borrow - 1 == borrow) return LLMPAR__PLAN_NO("units %s and %s both borrow unit %s, expected one borrower", units[other].name, units[unit].name, units[borrow].name);
        if ((int)units[unit].recompute < 0 || units[unit].recompute > LLMPAR_RECOMPUTE_FULL)
            return LLMPAR__PLAN_NO("unit %s: recompute = %d, expected 0 .. %d", units[unit].name, (int)units[unit].recompute, (int)LLMPAR_RECOMPUTE_FULL);
    }
    if (units[unit_count - 1].recompute == LLMPAR_RECOMPUTE_FULL)
        return LLMPAR__PLAN_NO("unit %s: full recomputation of the last unit, expected none or selective: its backward follows its forward at once", units[unit_count - 1].name);
    if (!policy->forward_only && llmpar_schedule_first_backward(units, unit_count) == unit_count)
        return LLMPAR__PLAN_NO("all %d units are frozen, expected one to train (or a forward-only schedule)", (int)unit_count);
    return LLMPAR_OK;
}

/* Pairs that exclude each other. */
static llmpar_status llmpar__plan_check_pairs(const llmpar_policy *policy, llmpar_error *error)
{
    int inside = policy->update != LLMPAR_UPDATE_AFTER && !policy->forward_only;
    if (policy->chain && policy->no_sync) return LLMPAR__PLAN_NO("chain with no_sync, expected one of them: a chain adds micro-batches after each is reduced, no_sync reduces only their sum");
    if (inside && policy->micro_batches > 1) return LLMPAR__PLAN_NO("updates inside backward with %d micro-batches, expected 1: a gradient does not outlive its unit, so there is nothing to accumulate into", (int)policy->micro_batches);
    if (inside && (policy->offload >> (unsigned)LLMPAR_STATE_GRADS & 1u)) return LLMPAR__PLAN_NO("gradients offloaded with updates inside backward, expected one of them: no gradient is kept that could be stored");
    unsigned on_host = 1u << LLMPAR_STATE_OPTIMIZER | 1u << LLMPAR_STATE_PARAMS | 1u << LLMPAR_STATE_GRADS;
    if (policy->host_update && (policy->offload & on_host) != on_host)
        return LLMPAR__PLAN_NO("updates on the host without%s%s%s offloaded, expected optimizer, params and grads in host memory", policy->offload >> (unsigned)LLMPAR_STATE_OPTIMIZER & 1u ? "" : " optimizer",
                                policy->offload >> (unsigned)LLMPAR_STATE_PARAMS & 1u ? "" : " params", policy->offload >> (unsigned)LLMPAR_STATE_GRADS & 1u ? "" : " grads");
    if ((policy->offload >> (unsigned)LLMPAR_STATE_PARAMS & 1u) && !policy->master && llmpar_policy_whole_params(policy))
        return LLMPAR__PLAN_NO("parameters offloaded that are whole at rest (one shard, or ZeRO 0 to 2) and have no f32 master copy: the whole parameters are in use all the time");
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__policy_check(const llmpar_unit *units, int32_t unit_count, const llmpar_policy *policy, llmpar_error *error)
{
    const struct { const char *name; int32_t value, low, high; } range[] = {
        {"micro_batches", policy->micro_batches, 1, 1 << 20}, {"prefetch", policy->prefetch, 0, 4}, {"prefetch_backward", policy->prefetch_backward, 0, 4}, {"replicas", policy->replicas, 1, INT32_MAX}, {"shards", policy->shards, 1, INT32_MAX},
        {"zero", policy->zero, LLMPAR_ZERO_0, LLMPAR_ZERO_3}, {"reshard", (int32_t)policy->reshard, LLMPAR_RESHARD_NOT_LAST, LLMPAR_RESHARD_EVERY}, {"reshard_every", policy->reshard_every, 1, INT32_MAX},
        {"update", (int32_t)policy->update, LLMPAR_UPDATE_AFTER, LLMPAR_UPDATE_TWO_PASSES}, {"offload", (int32_t)policy->offload, 0, (1 << LLMPAR_STATE_COUNT) - 1},
        {"host_update", policy->host_update, 0, 1},
    };
    if (unit_count < 1) return LLMPAR__PLAN_NO("%d units, expected at least 1", (int)unit_count);
    for (size_t i = 0; i < sizeof range / sizeof range[0]; i++)
        if (range[i].value < range[i].low || range[i].value > range[i].high)
            return LLMPAR__PLAN_NO("%s = %d, expected %d .. %d", range[i].name, (int)range[i].value, (int)range[i].low, (int)range[i].high);
    if ((int64_t)unit_count * policy->micro_batches > ((int64_t)1 << 24)) /* a few instructions each, counted in 32 bits */
        return LLMPAR__PLAN_NO("%d units x %d micro-batches, expected at most %d together", (int)unit_count, (int)policy->micro_batches, 1 << 24);
    llmpar_status status = llmpar__plan_check_units(units, unit_count, policy, error);
    return status ? status : llmpar__plan_check_pairs(policy, error);
}

LLMPAR_DEF llmpar_status llmpar_schedule_create(llmpar_heap *heap, const llmpar_unit *units, int32_t unit_count, const llmpar_policy *policy, llmpar_schedule **out, llmpar_error *error)
{
    *out = NULL;
    if (!policy) return LLMPAR__PLAN_NO("no policy");
    llmpar_policy resolved = *policy;
    llmpar__policy_resolve(&resolved);
    llmpar_status status = llmpar__policy_check(units, unit_count, &resolved, error);
    if (status) return status;
    LLMPAR__ZEROED(llmpar__plan, plan);
    llmpar_schedule *schedule = LLMPAR__ZALLOC(llmpar_schedule, heap, 1);
    if (!schedule) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "schedule: out of memory");
    schedule->heap = heap;
    schedule->units = unit_count;
    schedule->policy = resolved;
    schedule->capacity = 64;
    schedule->list = LLMPAR__ALLOC(llmpar_instruction, heap, (size_t)schedule->capacity);
    plan.schedule = schedule;
    plan.units = units;
    plan.first = resolved.forward_only ? unit_count : llmpar_schedule_first_backward(units, unit_count);
    plan.steps_per_micro = 2 * unit_count - plan.first;
    plan.steps = plan.steps_per_micro * resolved.micro_batches * (resolved.update == LLMPAR_UPDATE_TWO_PASSES && !resolved.forward_only ? 2 : 1);
    plan.last_param_free = plan.last_grad_free = plan.pending[0] = plan.pending[1] = -1;
    plan.flag = (unsigned char *)llmpar_heap_zalloc(heap, (size_t)plan.steps, (size_t)unit_count);
    int32_t *per_unit = LLMPAR__ZALLOC(int32_t, heap, (size_t)unit_count * 5);
    plan.last_gather = per_unit;
    plan.uses_left = per_unit + unit_count;
    plan.update = per_unit + 2 * unit_count;
    plan.depth = per_unit + 3 * unit_count;
    if (!schedule->list || !plan.flag || !per_unit) plan.status = 1;
    if (!plan.status) {
        llmpar__plan_residency(&plan);
        llmpar__plan_update_order(&plan);
        llmpar__plan_emit(&plan, LLMPAR_OP_SCALAR_REDUCE, -1, -1, LLMPAR_STREAM_COMPUTE);
        for (int32_t step = 0; step < plan.steps && !plan.status; step++) llmpar__plan_list_step(&plan, step);
        llmpar__plan_free_pending(&plan);
        llmpar__plan_finish(&plan);
    }
    if (!plan.status) llmpar__plan_order(&plan);
    llmpar_heap_free(heap, per_unit);
    llmpar_heap_free(heap, plan.flag);
    if (plan.status) {
        llmpar_schedule_destroy(schedule);
        return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "schedule: out of memory for %d units, %d micro-batches", (int)unit_count, (int)resolved.micro_batches);
    }
    *out = schedule;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_schedule_destroy(llmpar_schedule *schedule)
{
    if (!schedule) return;
    llmpar_heap *heap = schedule->heap;
    llmpar_heap_free(heap, schedule->list);
    llmpar_heap_free(heap, schedule);
}

#undef LLMPAR__PLAN_NO
