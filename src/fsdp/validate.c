#include "fsdp/schedule.h"
#include "fsdp/schedule_internal.h"

#include <string.h>

#include "base/bits_internal.h"

/* A list is walked once, in list order, as one rank's memory would see it: what is gathered, fetched, stored, saved. That streams keep to that order is proved with vector clocks (schedule_order.c).
   Gradient buffers carry what is in them: how many (use, micro-batch) gradients, the sum of one random number for each, so that a lost, doubled or foreign one shows, and a hash of the order in which they were added. What looks at an instruction returns why it is wrong, NULL: it is not. */
typedef struct llmpar__buffer {
    int32_t live, stored, writer, consumed, reduced, replica, normed;
    int64_t gradients;
    uint64_t content, order;
} llmpar__buffer;

typedef struct llmpar__unit_state {
    int32_t gathered;                    /* instruction, -1 */
    int32_t has_params, has_state;       /* what is offloaded and on the device now */
    int32_t dirty;                       /* the fetched parameters were changed */
    int32_t forwards, backwards;         /* over all passes */
    int32_t normed, updated, cast, regathered;
    llmpar__buffer buffer[2][2][LLMPAR_GRAD_SLOTS]; /* [use][local][slot] */
} llmpar__unit_state;

enum { LLMPAR__HAS_SAVED = 1, LLMPAR__HAS_INPUT = 2, LLMPAR__HAS_RUN = 4, LLMPAR__IN_STORE = 8 };

typedef struct llmpar__proof {
    const llmpar_instruction *list;
    const llmpar_unit *units;
    int32_t count, unit_count, first, passes, at, scalar[2];
    llmpar_policy policy;
    llmpar__unit_state *state;
    unsigned char *saved;                /* [units][micro_batches] LLMPAR__HAS_SAVED .. */
    llmpar_error *error;
} llmpar__proof;

static llmpar_status llmpar__proof_fail(llmpar__proof *proof, const char *reason)
{
    const llmpar_instruction *in = &proof->list[proof->at];
    const char *unit = in->unit >= 0 && in->unit < proof->unit_count ? proof->units[in->unit].name : "-";
    return llmpar_error_set(proof->error, LLMPAR_ERR_SCHEDULE, "schedule: instruction %d, %s %s: %s", (int)proof->at, llmpar_op_name(in->op), unit, reason);
}

static int llmpar__proof_offloads(const llmpar__proof *proof, llmpar_state what) { return (int)(proof->policy.offload >> (unsigned)what & 1u); }
static int llmpar__proof_borrows(const llmpar__proof *proof, int32_t unit) { return proof->units[unit].borrow && !proof->units[proof->units[unit].borrow - 1].frozen; } /* and hands a gradient back */

/* ---- what a gradient is ---- */

/* A number that stands for one gradient. */
static uint64_t llmpar__proof_token(int32_t unit, int32_t use, int32_t run) { return llmpar__bits_mix(((uint64_t)(uint32_t)unit << 33) + ((uint64_t)(uint32_t)run << 1) + (uint64_t)use); }
static uint64_t llmpar__proof_sum(uint64_t left, uint64_t right) { return llmpar__bits_mix(left * 3 + right); }

static int llmpar__proof_lent(const llmpar__proof *proof, int32_t unit)
{
    for (int32_t i = 0; i < proof->unit_count; i++)
        if (proof->units[i].borrow - 1 == unit) return 1;
    return 0;
}

/* The whole gradient of one use in the order of the policy: a binary counter of micro-batches, or a chain; and its content. `again`: of the second pass. */
static uint64_t llmpar__proof_expected(const llmpar__proof *proof, int32_t unit, int32_t use, int32_t again, uint64_t *content)
{
    uint64_t stack[34];
    int32_t depth = 0, n = proof->policy.micro_batches;
    for (int32_t m = 0; m < n; m++) {
        stack[depth++] = llmpar__proof_token(unit, use, again * n + m);
        *content += stack[depth - 1];
        for (int32_t bits = m + 1; depth > 1 && ((bits & 1) == 0 || m + 1 == n || proof->policy.chain); bits >>= 1, depth--) stack[depth - 2] = llmpar__proof_sum(stack[depth - 2], stack[depth - 1]);
    }
    return stack[0];
}

/* Over all data ranks. */
static int llmpar__proof_reduced(const llmpar__proof *proof, const llmpar__buffer *buffer) { return buffer->reduced && (proof->policy.replicas < 2 || buffer->replica); }

static const char *llmpar__proof_complete(llmpar__proof *proof, int32_t unit, const llmpar__buffer *buffer, int32_t again)
{
    int uses = 1 + llmpar__proof_lent(proof, unit);
    uint64_t content = 0, order = llmpar__proof_expected(proof, unit, 0, again, &content);
    if (uses == 2) order = llmpar__proof_sum(order, llmpar__proof_expected(proof, unit, 1, again, &content));
    if (buffer->gradients != (int64_t)uses * proof->policy.micro_batches || buffer->content != content) return "the gradient does not hold every micro-batch and use exactly once";
    if (buffer->order != order) return "micro-batches were added in another order than the policy's";
    if (!llmpar__proof_reduced(proof, buffer)) return "the gradient is not reduced over all data ranks";
    return NULL;
}

static llmpar__buffer *llmpar__proof_buffer(llmpar__proof *proof, int32_t unit, int32_t use, int32_t local, int32_t slot) { return &proof->state[unit].buffer[use][local][slot]; }

static void llmpar__proof_write(llmpar__proof *proof, llmpar__buffer *buffer)
{
    memset(buffer, 0, sizeof *buffer);
    buffer->live = 1;
    buffer->writer = proof->at;
}

static const char *llmpar__proof_read(const llmpar__buffer *buffer)
{
    if (!buffer->live) return "reads a gradient buffer that nothing has written";
    if (buffer->stored) return "reads a gradient that is in its store";
    return NULL;
}

/* ---- operands ---- */

static const char *llmpar__proof_slots(llmpar__proof *proof, const llmpar_instruction *in)
{
    int grads = (in->op == LLMPAR_OP_FETCH || in->op == LLMPAR_OP_STORE) && in->what == LLMPAR_STATE_GRADS, backward = in->op == LLMPAR_OP_BACKWARD;
    if (in->slot < -1 || in->slot >= LLMPAR_GRAD_SLOTS || in->from < -1 || in->from >= LLMPAR_GRAD_SLOTS) return "no such gradient buffer";
    if (in->op == LLMPAR_OP_SCALAR_REDUCE) return NULL;
    if (backward && proof->policy.forward_only) return "backward in a forward-only schedule";
    if (backward && in->slot >= 0 && proof->units[in->unit].frozen) return "writes the gradient of a frozen unit";
    if (backward && in->from >= 0 && !llmpar__proof_borrows(proof, in->unit)) return "writes the gradient of a unit that it does not borrow, or that is frozen";
    int needs_slot = grads || in->op == LLMPAR_OP_REDUCE || in->op == LLMPAR_OP_REDUCE_REPLICA || in->op == LLMPAR_OP_ACCUMULATE || in->op == LLMPAR_OP_NORM || in->op == LLMPAR_OP_OPTIM || (backward && !proof->units[in->unit].frozen);
    int needs_from = in->op == LLMPAR_OP_REDUCE || in->op == LLMPAR_OP_ACCUMULATE || (backward && llmpar__proof_borrows(proof, in->unit));
    return (needs_slot && in->slot < 0) || (needs_from && in->from < 0) ? "a gradient buffer is missing" : NULL;
}

static const char *llmpar__proof_operands(llmpar__proof *proof, const llmpar_instruction *in)
{
    if ((int)in->op < LLMPAR_OP_GATHER || (int)in->op > LLMPAR_OP_STORE) return "no such op";
    int runs = in->op == LLMPAR_OP_FORWARD || in->op == LLMPAR_OP_RECOMPUTE || in->op == LLMPAR_OP_BACKWARD, moves = in->op == LLMPAR_OP_FETCH || in->op == LLMPAR_OP_STORE;
    if ((int)in->stream < 0 || (int)in->stream >= LLMPAR_STREAM_COUNT) return "no such stream";
    if (in->op != LLMPAR_OP_SCALAR_REDUCE && (in->unit < 0 || in->unit >= proof->unit_count)) return "no such unit";
    if (in->use < 0 || in->use > 1 || in->from_use < 0 || in->from_use > 1 || in->local < 0 || in->local > 1) return "use or local is neither 0 nor 1";
    if (moves && ((int)in->what < 0 || (int)in->what >= LLMPAR_STATE_COUNT)) return "no such state";
    if ((runs || (moves && in->what == LLMPAR_STATE_ACTIVATIONS)) && (in->micro_batch < 0 || in->micro_batch >= proof->policy.micro_batches)) return "no such micro-batch";
    if (runs && (in->again < 0 || in->again >= proof->passes)) return "no such pass over the step";
    if (runs && in->stream != LLMPAR_STREAM_COMPUTE) return "is not on the compute stream, where units run";
    int asks = in->op == LLMPAR_OP_OPTIM || in->op == LLMPAR_OP_CAST || (in->op == LLMPAR_OP_GATHER && llmpar_policy_whole_params(&proof->policy) && !llmpar_policy_whole_state(&proof->policy));
    if (in->predicate != LLMPAR_ALWAYS && !(asks && in->predicate == LLMPAR_IF_FINITE)) return "has a predicate, which only OPTIM and what follows from it ask";
    if (asks && in->predicate == LLMPAR_ALWAYS && proof->policy.update != LLMPAR_UPDATE_INSIDE) return "updates without asking whether the gradient is finite";
    if (asks && in->predicate == LLMPAR_IF_FINITE && proof->policy.update == LLMPAR_UPDATE_INSIDE) return "asks whether gradients are finite before that is known";
    if (in->wait_count < 0 || in->wait_count > LLMPAR_WAITS) return "more waits than an instruction holds";
    for (int32_t w = 0; w < in->wait_count; w++)
        if (in->waits[w] < 0 || in->waits[w] >= proof->at) return "waits for an instruction that does not come before it (streams would deadlock)";
    return llmpar__proof_slots(proof, in);
}

/* ---- units ---- */

static const char *llmpar__proof_params(llmpar__proof *proof, int32_t unit)
{
    const llmpar__unit_state *state = &proof->state[unit];
    if (!llmpar_policy_whole_params(&proof->policy) && state->gathered < 0) return "uses parameters that are not gathered";
    return state->updated ? "uses parameters after their update" : NULL;
}

static const char *llmpar__proof_forward(llmpar__proof *proof, const llmpar_instruction *in, int32_t run, unsigned char *saved)
{
    llmpar__unit_state *state = &proof->state[in->unit];
    int eval = proof->policy.forward_only || in->unit < proof->first;
    if (in->pass != (eval ? LLMPAR_PASS_EVAL : LLMPAR_PASS_FORWARD)) return "its pass does not fit the policy";
    if (state->forwards != run) return "micro-batches are not run once each, in order";
    if (in->unit > 0 && proof->state[in->unit - 1].forwards <= run) return "runs before the unit in front of it";
    if (in->again && proof->scalar[1] < 0) return "begins the second pass before the norm of the first is known";
    state->forwards++;
    if (eval) *saved = 0;
    else *saved |= proof->units[in->unit].recompute == LLMPAR_RECOMPUTE_FULL ? LLMPAR__HAS_RUN : LLMPAR__HAS_RUN | LLMPAR__HAS_SAVED;
    if (in->unit + 1 < proof->unit_count) saved[proof->policy.micro_batches] = LLMPAR__HAS_INPUT; /* of the next unit */
    return NULL;
}

static const char *llmpar__proof_recompute(llmpar__proof *proof, const llmpar_instruction *in, int32_t run, unsigned char *saved)
{
    const llmpar__unit_state *state = &proof->state[in->unit];
    if (in->pass != LLMPAR_PASS_RECOMPUTE) return "its pass does not fit the policy";
    if (proof->units[in->unit].recompute != LLMPAR_RECOMPUTE_FULL || in->unit < proof->first) return "recomputes a unit that keeps what its backward needs";
    if (state->forwards <= run || state->backwards > run) return "recomputes before the forward or after the backward";
    if (in->unit > 0 && !(*saved & LLMPAR__HAS_INPUT)) return "recomputes from an input that is in its store";
    if (*saved & LLMPAR__HAS_SAVED) return "recomputes activations that are there already";
    *saved |= LLMPAR__HAS_SAVED;
    return NULL;
}

static const char *llmpar__proof_backward(llmpar__proof *proof, const llmpar_instruction *in, int32_t run, unsigned char *saved)
{
    llmpar__unit_state *state = &proof->state[in->unit];
    int32_t borrow = proof->units[in->unit].borrow - 1, last = in->unit + 1 == proof->unit_count;
    int whole = llmpar_policy_whole_grads(&proof->policy);
    if (in->unit < proof->first) return "backward of a unit in front of everything that is trained";
    if (state->backwards != run) return "micro-batches are not run once each, in order";
    if ((last ? state->forwards : proof->state[in->unit + 1].backwards) <= run) return "runs before the unit behind it";
    if (in->unit > 0 && !(*saved & LLMPAR__HAS_INPUT)) return "uses activations that are in their store";
    if (!(*saved & LLMPAR__HAS_SAVED)) return *saved & LLMPAR__IN_STORE ? "uses activations that are in their store" : "uses activations that were not recomputed";
    for (int use = 0; use < 2; use++) {
        int32_t unit = use ? borrow : in->unit, slot = use ? in->from : in->slot;
        if (slot < 0) continue;
        llmpar__buffer *buffer = llmpar__proof_buffer(proof, unit, use, in->local, slot);
        if (buffer->live) return "overwrites a gradient buffer that is still needed";
        if (!in->local && !whole) return "writes whole gradients into a shard buffer";
        if (in->local && whole) return "writes local gradients where they are reduced in place";
        llmpar__proof_write(proof, buffer);
        buffer->gradients = 1;
        buffer->content = buffer->order = llmpar__proof_token(unit, use, run);
        buffer->reduced = llmpar_policy_whole_state(&proof->policy);
    }
    *saved = 0;
    state->backwards++;
    return NULL;
}

static const char *llmpar__proof_compute(llmpar__proof *proof, const llmpar_instruction *in)
{
    int32_t borrow = proof->units[in->unit].borrow - 1, run = in->again * proof->policy.micro_batches + in->micro_batch;
    unsigned char *saved = &proof->saved[(size_t)in->unit * (size_t)proof->policy.micro_batches + (size_t)in->micro_batch];
    if (proof->scalar[0] < 0) return "runs before the token count is known";
    const char *wrong = llmpar__proof_params(proof, in->unit);
    if (!wrong && borrow >= 0) wrong = llmpar__proof_params(proof, borrow);
    if (wrong) return wrong;
    if (in->op == LLMPAR_OP_FORWARD) return llmpar__proof_forward(proof, in, run, saved);
    return in->op == LLMPAR_OP_RECOMPUTE ? llmpar__proof_recompute(proof, in, run, saved) : llmpar__proof_backward(proof, in, run, saved);
}

/* ---- gradients ---- */

/* The sum over ranks is taken of single micro-batches, or (no_sync) of their whole local sum: anything else is another sum. */
static int llmpar__proof_reducible(const llmpar__proof *proof, const llmpar__buffer *buffer) { return buffer->gradients == (proof->policy.no_sync ? proof->policy.micro_batches : 1); }

static const char *llmpar__proof_reduce(llmpar__proof *proof, const llmpar_instruction *in)
{
    int in_place = llmpar_policy_whole_grads(&proof->policy);
    llmpar__buffer *to = llmpar__proof_buffer(proof, in->unit, in->use, 0, in->slot), *from = in_place ? to : llmpar__proof_buffer(proof, in->unit, in->use, 1, in->from);
    if (llmpar_policy_whole_state(&proof->policy)) return "reduces into shards where gradients are whole";
    if (in_place && in->from != in->slot) return "reduces from another buffer where gradients are reduced in place";
    const char *wrong = llmpar__proof_read(from);
    if (wrong) return wrong;
    if (from->consumed || from->reduced) return "reduces a gradient twice";
    if (!in_place && to->live) return "overwrites a gradient buffer that is still needed";
    if (!llmpar__proof_reducible(proof, from)) return "reduces another number of micro-batches at once than the policy says";
    from->consumed = !in_place;
    if (!in_place) llmpar__proof_write(proof, to);
    to->gradients = from->gradients;
    to->content = from->content;
    to->order = from->order;
    to->reduced = 1;
    return NULL;
}

static const char *llmpar__proof_replica(llmpar__proof *proof, const llmpar_instruction *in)
{
    llmpar__buffer *buffer = llmpar__proof_buffer(proof, in->unit, in->use, 0, in->slot);
    if (proof->policy.replicas < 2) return "sums over replicas where there are none";
    const char *wrong = llmpar__proof_read(buffer);
    if (wrong) return wrong;
    if (buffer->replica) return "sums a gradient over replicas twice";
    if (!buffer->reduced) return "sums over replicas before the gradient is reduced";
    if (!llmpar__proof_reducible(proof, buffer)) return "reduces another number of micro-batches at once than the policy says";
    buffer->replica = 1;
    buffer->writer = proof->at;
    return NULL;
}

static const char *llmpar__proof_accumulate(llmpar__proof *proof, const llmpar_instruction *in)
{
    llmpar__buffer *to = llmpar__proof_buffer(proof, in->unit, in->use, in->local, in->slot), *from = llmpar__proof_buffer(proof, in->unit, in->from_use, in->local, in->from);
    uint64_t content = 0;
    if (to == from) return "adds a gradient buffer to itself";
    const char *wrong = llmpar__proof_read(to);
    if (!wrong) wrong = llmpar__proof_read(from);
    if (wrong) return wrong;
    if (to->consumed || from->consumed || to->normed || from->normed) return "adds to a gradient that was already reduced or measured";
    if (to->reduced != from->reduced || to->replica != from->replica) return "adds gradients that are not at the same stage of reduction";
    if (in->use != in->from_use) { /* g = own + borrowed, once, of what is complete */
        int32_t again = proof->state[in->unit].backwards > proof->policy.micro_batches;
        int complete = to->order == llmpar__proof_expected(proof, in->unit, 0, again, &content) && from->order == llmpar__proof_expected(proof, in->unit, 1, again, &content);
        if (in->use || !complete || !llmpar__proof_reduced(proof, to)) return "adds the uses of a tied unit otherwise than own + borrowed, once, complete and reduced";
    }
    to->gradients += from->gradients;
    to->content += from->content;
    to->order = llmpar__proof_sum(to->order, from->order);
    to->writer = proof->at;
    from->live = 0;
    return NULL;
}

static const char *llmpar__proof_free(llmpar__proof *proof, const llmpar_instruction *in)
{
    llmpar__unit_state *state = &proof->state[in->unit];
    if (in->slot < 0 && in->what == LLMPAR_STATE_PARAMS) {
        if (!llmpar__proof_offloads(proof, LLMPAR_STATE_PARAMS) || proof->policy.master || !state->has_params) return "frees a shard that was not fetched";
        if (state->dirty) return "frees a changed shard that is not stored";
        state->has_params = 0;
        return NULL;
    }
    if (in->what != LLMPAR_STATE_OPTIMIZER) return "frees what is neither parameters nor a gradient";
    if (in->slot < 0) {
        if (state->gathered < 0) return "frees parameters that are not gathered";
        state->gathered = -1;
        return NULL;
    }
    llmpar__buffer *buffer = llmpar__proof_buffer(proof, in->unit, in->use, in->local, in->slot);
    if (!buffer->live) return "frees a gradient buffer that nothing has written";
    if (buffer->stored) return "frees a gradient that is in its store";
    if (in->local && !buffer->consumed) return "frees a gradient that was not reduced";
    if (!in->local && (proof->policy.update != LLMPAR_UPDATE_TWO_PASSES || !buffer->normed)) return "frees a gradient that nothing was updated from (only a first pass may, after the norm)";
    buffer->live = 0;
    return NULL;
}

/* ---- updates ---- */

static const char *llmpar__proof_scalar(llmpar__proof *proof, const llmpar_instruction *in)
{
    int pass = in->pass != 0;
    if (in->pass < 0 || in->pass > 1) return "its pass does not fit the policy";
    if (proof->scalar[pass] >= 0) return "runs twice";
    if (pass && proof->scalar[0] < 0) return "runs before the token count is known";
    proof->scalar[pass] = proof->at;
    for (int32_t unit = 0; unit < proof->unit_count && pass; unit++) {
        if (proof->state[unit].forwards < proof->policy.micro_batches) return "runs before the loss is complete";
        if (!proof->policy.forward_only && !proof->units[unit].frozen && !proof->state[unit].normed) return "runs before every norm is known";
    }
    return NULL;
}

static const char *llmpar__proof_norm(llmpar__proof *proof, const llmpar_instruction *in)
{
    llmpar__buffer *buffer = llmpar__proof_buffer(proof, in->unit, in->use, 0, in->slot);
    const char *wrong = llmpar__proof_read(buffer);
    if (!wrong && (buffer->normed || proof->state[in->unit].normed)) wrong = "measures a gradient twice";
    if (!wrong) wrong = llmpar__proof_complete(proof, in->unit, buffer, 0);
    if (wrong) return wrong;
    if (proof->scalar[0] < 0) return "runs before the token count is known";
    buffer->normed = proof->state[in->unit].normed = 1;
    return NULL;
}

static const char *llmpar__proof_optim(llmpar__proof *proof, const llmpar_instruction *in)
{
    llmpar__unit_state *state = &proof->state[in->unit];
    llmpar__buffer *buffer = llmpar__proof_buffer(proof, in->unit, in->use, 0, in->slot);
    int two = proof->policy.update == LLMPAR_UPDATE_TWO_PASSES, host = proof->policy.host_update;
    const char *wrong = NULL;
    if (!host || !buffer->live) wrong = llmpar__proof_read(buffer);
    else if (!buffer->stored) wrong = "updates on the host from a gradient that is not in its store";
    if (!wrong) wrong = llmpar__proof_complete(proof, in->unit, buffer, two);
    if (wrong) return wrong;
    if ((!two && !buffer->normed) || (proof->policy.update != LLMPAR_UPDATE_INSIDE && proof->scalar[1] < 0)) return "updates before the norm is known";
    if (state->gathered >= 0) return "updates parameters that are still gathered";
    if (host && (state->has_state || state->has_params)) return "updates on the host what is on the device";
    if (host) {
        buffer->live = buffer->stored = 0;
        state->updated = 1;
        return NULL;
    }
    if (llmpar__proof_offloads(proof, LLMPAR_STATE_OPTIMIZER) && !state->has_state) return "updates with optimizer state that is in its store";
    if (llmpar__proof_offloads(proof, LLMPAR_STATE_PARAMS) && !state->has_params) return "updates parameters that are in their store";
    buffer->live = 0;
    state->updated = state->dirty = 1;
    return NULL;
}

static const char *llmpar__proof_cast(llmpar__proof *proof, const llmpar_instruction *in)
{
    llmpar__unit_state *state = &proof->state[in->unit];
    if (!proof->policy.master) return "casts parameters that have no master copy";
    if (!state->updated) return "casts parameters before their update";
    if (state->cast) return "casts parameters twice";
    if (llmpar__proof_offloads(proof, LLMPAR_STATE_PARAMS) && !proof->policy.host_update && !state->has_params) return "casts parameters that are in their store";
    if (proof->policy.host_update && state->has_params) return "casts on the host what is on the device";
    state->cast = 1;
    return NULL;
}

static const char *llmpar__proof_gather(llmpar__proof *proof, const llmpar_instruction *in)
{
    llmpar__unit_state *state = &proof->state[in->unit];
    if (llmpar_policy_whole_state(&proof->policy)) return "gathers parameters that are not sharded";
    if (llmpar_policy_whole_params(&proof->policy)) {
        if (!state->updated || (proof->policy.master && !state->cast)) return "gathers whole parameters before their update is complete";
        if (state->regathered) return "gathers updated parameters twice";
        state->regathered = 1;
        return NULL;
    }
    if (state->gathered >= 0) return "gathers parameters that are gathered already";
    if (state->updated) return "gathers parameters after their update";
    if (llmpar__proof_offloads(proof, LLMPAR_STATE_PARAMS) && !proof->policy.master && !state->has_params) return "gathers a shard that is in its store";
    state->gathered = proof->at;
    return NULL;
}

/* ---- stores ---- */

static const char *llmpar__proof_move_activations(llmpar__proof *proof, const llmpar_instruction *in)
{
    unsigned char *saved = &proof->saved[(size_t)in->unit * (size_t)proof->policy.micro_batches + (size_t)in->micro_batch];
    int kept = (proof->units[in->unit].recompute == LLMPAR_RECOMPUTE_FULL ? 0 : LLMPAR__HAS_SAVED) | (in->unit > 0 ? LLMPAR__HAS_INPUT : 0);
    if (in->op == LLMPAR_OP_FETCH) {
        if (!(*saved & LLMPAR__IN_STORE)) return "fetches what is not in its store";
        *saved = (unsigned char)(kept | LLMPAR__HAS_RUN);
        return NULL;
    }
    if (in->unit + 1 == proof->unit_count) return "stores activations of the last unit, whose backward follows";
    if (!kept || *saved != (kept | LLMPAR__HAS_RUN)) return "stores what is not on the device";
    *saved = LLMPAR__IN_STORE;
    return NULL;
}

static const char *llmpar__proof_move(llmpar__proof *proof, const llmpar_instruction *in)
{
    llmpar__unit_state *state = &proof->state[in->unit];
    int fetch = in->op == LLMPAR_OP_FETCH, frozen = proof->units[in->unit].frozen;
    if (!llmpar__proof_offloads(proof, in->what)) return "moves what the policy keeps on the device";
    if (in->what == LLMPAR_STATE_ACTIVATIONS) return llmpar__proof_move_activations(proof, in);
    if (in->what == LLMPAR_STATE_GRADS) {
        llmpar__buffer *buffer = llmpar__proof_buffer(proof, in->unit, in->use, 0, in->slot);
        if (!buffer->live || buffer->stored != fetch) return fetch ? "fetches what is not in its store" : "stores what is not on the device";
        if (!llmpar__proof_reduced(proof, buffer)) return "stores a gradient that is not reduced";
        buffer->stored = !fetch;
        return NULL;
    }
    if (frozen && (in->what == LLMPAR_STATE_OPTIMIZER || proof->policy.master)) return "moves what a frozen unit does not have";
    int32_t *has = in->what == LLMPAR_STATE_OPTIMIZER ? &state->has_state : &state->has_params;
    if (*has == fetch) return fetch ? "fetches what is on the device already" : "stores what is not on the device";
    *has = fetch;
    if (in->what == LLMPAR_STATE_PARAMS) state->dirty = 0;
    return NULL;
}

/* ---- the walk ---- */

static const char *llmpar__proof_instruction(llmpar__proof *proof, const llmpar_instruction *in)
{
    switch (in->op) {
    case LLMPAR_OP_GATHER: return llmpar__proof_gather(proof, in);
    case LLMPAR_OP_FREE: return llmpar__proof_free(proof, in);
    case LLMPAR_OP_FORWARD:
    case LLMPAR_OP_RECOMPUTE:
    case LLMPAR_OP_BACKWARD: return llmpar__proof_compute(proof, in);
    case LLMPAR_OP_REDUCE: return llmpar__proof_reduce(proof, in);
    case LLMPAR_OP_REDUCE_REPLICA: return llmpar__proof_replica(proof, in);
    case LLMPAR_OP_ACCUMULATE: return llmpar__proof_accumulate(proof, in);
    case LLMPAR_OP_NORM: return llmpar__proof_norm(proof, in);
    case LLMPAR_OP_SCALAR_REDUCE: return llmpar__proof_scalar(proof, in);
    case LLMPAR_OP_OPTIM: return llmpar__proof_optim(proof, in);
    case LLMPAR_OP_CAST: return llmpar__proof_cast(proof, in);
    case LLMPAR_OP_FETCH:
    case LLMPAR_OP_STORE: return llmpar__proof_move(proof, in);
    }
    return "no such op";
}

/* Why an instruction that another stream's instruction is not ordered before is wrong. */
static const char *llmpar__proof_hazard(llmpar_op op, const llmpar__hazard *hazard)
{
    switch (hazard->access.thing) {
    case LLMPAR__THING_LOSS: return "runs before the loss is complete";
    case LLMPAR__THING_NORMS: return op == LLMPAR_OP_NORM ? "adds to the norm at the same time as another stream" : "does not wait for a norm";
    case LLMPAR__THING_WHOLE: return op == LLMPAR_OP_FREE ? "frees parameters that another stream may still use" : "uses parameters without waiting for their gather";
    case LLMPAR__THING_SHARD:
    case LLMPAR__THING_MASTER:
        if (op == LLMPAR_OP_FREE) return "frees a shard that another stream may still use";
        if (op == LLMPAR_OP_STORE) return "stores parameters that another stream may still use";
        if (op == LLMPAR_OP_GATHER) return "gathers a shard without waiting for its fetch or update";
        if (op == LLMPAR_OP_CAST) return hazard->earlier_wrote ? "casts parameters without waiting for their update" : "updates parameters that another stream may still use";
        return hazard->earlier_wrote ? "updates parameters without waiting for their fetch" : "updates parameters that another stream may still use";
    case LLMPAR__THING_STATE: return op == LLMPAR_OP_STORE ? "stores optimizer state that another stream may still use" : "updates without waiting for the optimizer state";
    case LLMPAR__THING_GRADIENT:
        if (op == LLMPAR_OP_FREE) return "frees a gradient buffer that another stream may still use";
        return hazard->earlier_wrote ? "reads a gradient buffer without waiting for its writer" : "changes a gradient buffer that another stream still reads";
    case LLMPAR__THING_SAVED:
    case LLMPAR__THING_INPUT: return op == LLMPAR_OP_STORE ? "stores activations that another stream may still use" : "uses activations without waiting for them";
    case LLMPAR__THING_STORED_PARAMS:
    case LLMPAR__THING_STORED_STATE:
    case LLMPAR__THING_STORED_GRADIENT:
    case LLMPAR__THING_STORED_ACTIVATIONS: break;
    }
    if (op == LLMPAR_OP_OPTIM) return "updates on the host without waiting for the store";
    if (op == LLMPAR_OP_CAST) return "casts parameters without waiting for their update";
    return "fetches without waiting for the store";
}

#define LLMPAR__PROOF_END(...) llmpar_error_set(proof->error, LLMPAR_ERR_SCHEDULE, "schedule: end: " __VA_ARGS__)
static llmpar_status llmpar__proof_end(llmpar__proof *proof)
{
    int32_t runs = proof->policy.micro_batches * proof->passes;
    for (int32_t unit = 0; unit < proof->unit_count; unit++) {
        const llmpar__unit_state *state = &proof->state[unit];
        const char *name = proof->units[unit].name;
        int trained = !proof->policy.forward_only && !proof->units[unit].frozen;
        if (state->forwards != runs) return LLMPAR__PROOF_END("unit %s ran forward on %d of %d micro-batches", name, (int)state->forwards, (int)runs);
        if (state->gathered >= 0) return LLMPAR__PROOF_END("parameters of unit %s, gathered by instruction %d, are never freed", name, (int)state->gathered);
        for (int use = 0; use < 2; use++)
            for (int local = 0; local < 2; local++)
                for (int slot = 0; slot < LLMPAR_GRAD_SLOTS; slot++)
                    if (state->buffer[use][local][slot].live)
                        return LLMPAR__PROOF_END("gradient of unit %s, written by instruction %d, is never consumed", name, (int)state->buffer[use][local][slot].writer);
        if (!proof->policy.forward_only && unit >= proof->first && (state->backwards != runs || (trained && !state->updated)))
            return LLMPAR__PROOF_END("unit %s ran backward on %d of %d micro-batches and was %supdated", name, (int)state->backwards, (int)runs, state->updated ? "" : "not ");
        if (trained && proof->policy.master && !state->cast) return LLMPAR__PROOF_END("unit %s was updated and its master parameters never cast", name);
        if (trained && llmpar_policy_whole_params(&proof->policy) && !llmpar_policy_whole_state(&proof->policy) && !state->regathered)
            return LLMPAR__PROOF_END("unit %s was updated and its whole parameters never gathered again", name);
        if (state->has_state || state->has_params) return LLMPAR__PROOF_END("%s of unit %s are not in their store", state->has_state ? "optimizer states" : "parameters", name);
    }
    if (proof->scalar[1] < 0) return LLMPAR__PROOF_END("the loss is never reduced");
    return LLMPAR_OK;
}

static llmpar_status llmpar__proof_walk(llmpar__proof *proof, llmpar__order *order)
{
    llmpar__hazard hazard;
    for (proof->at = 0; proof->at < proof->count; proof->at++) {
        const llmpar_instruction *in = &proof->list[proof->at];
        const char *wrong = llmpar__proof_operands(proof, in);
        if (!wrong) llmpar__order_begin(order, proof->at);
        if (!wrong) wrong = llmpar__proof_instruction(proof, in);
        if (!wrong && llmpar__order_hazard(order, proof->at, &hazard)) wrong = llmpar__proof_hazard(in->op, &hazard);
        if (wrong) return llmpar__proof_fail(proof, wrong);
        llmpar__order_end(order, proof->at);
    }
    return llmpar__proof_end(proof);
}

LLMPAR_DEF llmpar_status llmpar_schedule_validate(llmpar_heap *heap, const llmpar_instruction *list, int32_t count, const llmpar_unit *units, int32_t unit_count, const llmpar_policy *policy, llmpar_error *error)
{
    llmpar__order order;
    LLMPAR__ZEROED(llmpar__proof, proof);
    proof.list = list;
    proof.count = count;
    proof.units = units;
    proof.unit_count = unit_count;
    proof.policy = *policy;
    llmpar__policy_resolve(&proof.policy);
    proof.scalar[0] = proof.scalar[1] = -1;
    proof.error = error;
    if (count < 0) return llmpar_error_set(error, LLMPAR_ERR_SCHEDULE, "schedule: %d instructions", (int)count);
    llmpar_status status = llmpar__policy_check(units, unit_count, &proof.policy, error);
    if (status) return status;
    proof.first = proof.policy.forward_only ? unit_count : llmpar_schedule_first_backward(units, unit_count);
    proof.passes = proof.policy.update == LLMPAR_UPDATE_TWO_PASSES && !proof.policy.forward_only ? 2 : 1;
    proof.state = LLMPAR__ZALLOC(llmpar__unit_state, heap, (size_t)unit_count);
    proof.saved = (unsigned char *)llmpar_heap_zalloc(heap, (size_t)unit_count, (size_t)proof.policy.micro_batches);
    status = proof.state && proof.saved ? llmpar__order_create(&order, heap, list, count, units, unit_count, &proof.policy) : LLMPAR_ERR_MEMORY;
    if (status) status = llmpar_error_set(error, LLMPAR_ERR_MEMORY, "schedule: no memory to validate %d instructions", (int)count);
    for (int32_t unit = 0; unit < unit_count && !status; unit++) proof.state[unit].gathered = -1;
    if (!status) {
        status = llmpar__proof_walk(&proof, &order);
        llmpar__order_destroy(&order);
    }
    llmpar_heap_free(heap, proof.saved);
    llmpar_heap_free(heap, proof.state);
    return status;
}

#undef LLMPAR__PROOF_END
