#include "fsdp/schedule.h"

#include <string.h>

/* A list is walked once. Order between streams is proved with vector clocks: clock[i][s] is the last instruction of stream s that is complete before
   instruction i starts. Gradient buffers carry what is in them: how many (use, micro-batch) gradients, and the sum of one random number for each, so that a lost, doubled or foreign one shows. */
typedef struct llmpar__buffer {
    int32_t live, writer, consumed, reduced, replica, normed;
    int32_t reader[LLMPAR_STREAM_COUNT]; /* last reading instruction of each stream, -1 */
    int64_t gradients;
    uint64_t content;
} llmpar__buffer;

typedef struct llmpar__unit_state {
    int32_t gathered;                    /* instruction, -1 */
    int32_t reader[LLMPAR_STREAM_COUNT];
    int32_t last_gather;                 /* also after its FREE: it read the shard */
    int32_t forwards, backwards, last_forward, last_backward, updated;
    llmpar__buffer buffer[2][2][LLMPAR_GRAD_SLOTS]; /* [use][local][slot] */
} llmpar__unit_state;

typedef struct llmpar__proof {
    const llmpar_instruction *list;
    const llmpar_unit *units;
    int32_t count, unit_count, at, scalar[2];
    int32_t norm[LLMPAR_STREAM_COUNT]; /* last NORM of each stream, -1: they add into one accumulator */
    llmpar_policy policy;
    llmpar__unit_state *state;
    int32_t (*clock)[LLMPAR_STREAM_COUNT];
    llmpar_error *error;
} llmpar__proof;

static llmpar_status llmpar__proof_fail(llmpar__proof *proof, const char *reason)
{
    const llmpar_instruction *in = &proof->list[proof->at];
    const char *unit = in->unit >= 0 && in->unit < proof->unit_count ? proof->units[in->unit].name : "-";
    return llmpar_error_set(proof->error, LLMPAR_ERR_SCHEDULE, "schedule: instruction %d, %s %s: %s", (int)proof->at, llmpar_op_name(in->op), unit, reason);
}

/* Is instruction `earlier` complete before the one at hand starts? */
static int llmpar__proof_after(const llmpar__proof *proof, int32_t earlier)
{
    return earlier < 0 || proof->clock[proof->at][proof->list[earlier].stream] >= earlier;
}

static int llmpar__proof_after_readers(const llmpar__proof *proof, const int32_t reader[LLMPAR_STREAM_COUNT])
{
    for (int s = 0; s < LLMPAR_STREAM_COUNT; s++)
        if (!llmpar__proof_after(proof, reader[s])) return 0;
    return 1;
}

static void llmpar__proof_no_readers(int32_t reader[LLMPAR_STREAM_COUNT])
{
    for (int s = 0; s < LLMPAR_STREAM_COUNT; s++) reader[s] = -1;
}

/* A number that stands for one gradient (splitmix64). */
static uint64_t llmpar__proof_token(int32_t unit, int32_t use, int32_t micro)
{
    uint64_t x = ((uint64_t)(uint32_t)unit << 33) + ((uint64_t)(uint32_t)micro << 1) + (uint64_t)use + 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static int llmpar__proof_borrowed(const llmpar__proof *proof, int32_t unit)
{
    for (int32_t i = 0; i < proof->unit_count; i++)
        if (proof->units[i].borrow - 1 == unit) return 1;
    return 0;
}

static int llmpar__proof_complete(const llmpar__proof *proof, int32_t unit, const llmpar__buffer *buffer)
{
    int uses = 1 + llmpar__proof_borrowed(proof, unit);
    uint64_t content = 0;
    for (int use = 0; use < uses; use++)
        for (int32_t m = 0; m < proof->policy.micro_batches; m++) content += llmpar__proof_token(unit, use, m);
    return buffer->gradients == (int64_t)uses * proof->policy.micro_batches && buffer->content == content;
}

static llmpar__buffer *llmpar__proof_buffer(llmpar__proof *proof, int32_t unit, int32_t use, int32_t local, int32_t slot)
{
    return &proof->state[unit].buffer[use][local][slot];
}

static void llmpar__proof_write(llmpar__proof *proof, llmpar__buffer *buffer)
{
    memset(buffer, 0, sizeof *buffer);
    buffer->live = 1;
    buffer->writer = proof->at;
    llmpar__proof_no_readers(buffer->reader);
}

static llmpar_status llmpar__proof_read(llmpar__proof *proof, llmpar__buffer *buffer)
{
    if (!buffer->live) return llmpar__proof_fail(proof, "reads a gradient buffer that nothing has written");
    if (!llmpar__proof_after(proof, buffer->writer)) return llmpar__proof_fail(proof, "reads a gradient buffer without waiting for its writer");
    buffer->reader[proof->list[proof->at].stream] = proof->at;
    return LLMPAR_OK;
}

static llmpar_status llmpar__proof_operands(llmpar__proof *proof, const llmpar_instruction *in)
{
    if ((int)in->op < LLMPAR_OP_GATHER || (int)in->op > LLMPAR_OP_OPTIM) return llmpar__proof_fail(proof, "no such op");
    if ((int)in->stream < 0 || (int)in->stream >= LLMPAR_STREAM_COUNT) return llmpar__proof_fail(proof, "no such stream");
    if (in->op != LLMPAR_OP_SCALAR_REDUCE && (in->unit < 0 || in->unit >= proof->unit_count)) return llmpar__proof_fail(proof, "no such unit");
    if (in->use < 0 || in->use > 1 || in->from_use < 0 || in->from_use > 1 || in->local < 0 || in->local > 1) return llmpar__proof_fail(proof, "use or local is neither 0 nor 1");
    if (in->slot < -1 || in->slot >= LLMPAR_GRAD_SLOTS || in->from < -1 || in->from >= LLMPAR_GRAD_SLOTS) return llmpar__proof_fail(proof, "no such gradient buffer");
    if ((in->op == LLMPAR_OP_FORWARD || in->op == LLMPAR_OP_BACKWARD) && (in->micro_batch < 0 || in->micro_batch >= proof->policy.micro_batches)) return llmpar__proof_fail(proof, "no such micro-batch");
    if ((in->op == LLMPAR_OP_FORWARD || in->op == LLMPAR_OP_BACKWARD) && in->stream != LLMPAR_STREAM_COMPUTE) return llmpar__proof_fail(proof, "is not on the compute stream, where units run");
    if (in->predicate != LLMPAR_ALWAYS && in->op != LLMPAR_OP_OPTIM) return llmpar__proof_fail(proof, "has a predicate, which only OPTIM asks");
    if (in->wait_count < 0 || in->wait_count > LLMPAR_WAITS) return llmpar__proof_fail(proof, "more waits than an instruction holds");
    for (int32_t w = 0; w < in->wait_count; w++)
        if (in->waits[w] < 0 || in->waits[w] >= proof->at) return llmpar__proof_fail(proof, "waits for an instruction that does not come before it (streams would deadlock)");
    int needs_slot = in->op == LLMPAR_OP_BACKWARD || in->op == LLMPAR_OP_REDUCE || in->op == LLMPAR_OP_REDUCE_REPLICA || in->op == LLMPAR_OP_ACCUMULATE || in->op == LLMPAR_OP_NORM || in->op == LLMPAR_OP_OPTIM;
    int needs_from = in->op == LLMPAR_OP_REDUCE || in->op == LLMPAR_OP_ACCUMULATE || (in->op == LLMPAR_OP_BACKWARD && proof->units[in->unit].borrow);
    if ((needs_slot && in->slot < 0) || (needs_from && in->from < 0)) return llmpar__proof_fail(proof, "a gradient buffer is missing");
    return LLMPAR_OK;
}

static void llmpar__proof_clock(llmpar__proof *proof, const llmpar_instruction *in, int32_t last[LLMPAR_STREAM_COUNT], int32_t host[LLMPAR_STREAM_COUNT])
{
    int32_t *clock = proof->clock[proof->at];
    for (int s = 0; s < LLMPAR_STREAM_COUNT; s++) clock[s] = host[s];
    for (int32_t w = -1; w < in->wait_count; w++) {
        int32_t earlier = w < 0 ? last[in->stream] : in->waits[w];
        if (earlier < 0) continue;
        for (int s = 0; s < LLMPAR_STREAM_COUNT; s++)
            if (proof->clock[earlier][s] > clock[s]) clock[s] = proof->clock[earlier][s];
        if (earlier > clock[proof->list[earlier].stream]) clock[proof->list[earlier].stream] = earlier;
    }
    last[in->stream] = proof->at;
    if (in->op == LLMPAR_OP_SCALAR_REDUCE) { /* the host waits for it: whatever comes later comes after it */
        for (int s = 0; s < LLMPAR_STREAM_COUNT; s++)
            if (clock[s] > host[s]) host[s] = clock[s];
        if (proof->at > host[in->stream]) host[in->stream] = proof->at;
    }
}

static llmpar_status llmpar__proof_params(llmpar__proof *proof, int32_t unit)
{
    llmpar__unit_state *state = &proof->state[unit];
    if (llmpar_policy_whole_params(&proof->policy)) return LLMPAR_OK;
    if (state->gathered < 0) return llmpar__proof_fail(proof, "uses parameters that are not gathered");
    if (!llmpar__proof_after(proof, state->gathered)) return llmpar__proof_fail(proof, "uses parameters without waiting for their gather");
    state->reader[proof->list[proof->at].stream] = proof->at;
    return LLMPAR_OK;
}

static llmpar_status llmpar__proof_compute(llmpar__proof *proof, const llmpar_instruction *in)
{
    llmpar__unit_state *state = &proof->state[in->unit];
    int32_t borrow = proof->units[in->unit].borrow - 1, n = proof->unit_count;
    if (proof->scalar[0] < 0) return llmpar__proof_fail(proof, "runs before the token count is known");
    llmpar_status status = llmpar__proof_params(proof, in->unit);
    if (!status && borrow >= 0) status = llmpar__proof_params(proof, borrow);
    if (status) return status;
    if (in->op == LLMPAR_OP_FORWARD) {
        if ((in->pass == LLMPAR_PASS_EVAL) != (proof->policy.forward_only != 0) || in->pass == LLMPAR_PASS_BACKWARD) return llmpar__proof_fail(proof, "its pass does not fit the policy");
        if (state->forwards != in->micro_batch) return llmpar__proof_fail(proof, "micro-batches are not run once each, in order");
        if (in->unit > 0 && (proof->state[in->unit - 1].forwards <= in->micro_batch || !llmpar__proof_after(proof, proof->state[in->unit - 1].last_forward))) return llmpar__proof_fail(proof, "runs before the unit in front of it");
        state->forwards++;
        state->last_forward = proof->at;
        return LLMPAR_OK;
    }
    if (proof->policy.forward_only) return llmpar__proof_fail(proof, "backward in a forward-only schedule");
    if (state->backwards != in->micro_batch) return llmpar__proof_fail(proof, "micro-batches are not run once each, in order");
    const llmpar__unit_state *behind = &proof->state[in->unit + 1 < n ? in->unit + 1 : in->unit];
    int32_t needed = in->unit + 1 < n ? behind->last_backward : state->last_forward;
    if ((in->unit + 1 < n ? behind->backwards : state->forwards) <= in->micro_batch || !llmpar__proof_after(proof, needed)) return llmpar__proof_fail(proof, "runs before the unit behind it");
    for (int use = 0; use < (borrow >= 0 ? 2 : 1); use++) {
        int32_t unit = use ? borrow : in->unit;
        llmpar__buffer *buffer = llmpar__proof_buffer(proof, unit, use, in->local, use ? in->from : in->slot);
        if (buffer->live) return llmpar__proof_fail(proof, "overwrites a gradient buffer that is still needed");
        llmpar__proof_write(proof, buffer);
        buffer->gradients = 1;
        buffer->content = llmpar__proof_token(unit, use, in->micro_batch);
        if (!in->local && !llmpar_policy_whole_params(&proof->policy)) return llmpar__proof_fail(proof, "writes whole gradients into a shard buffer");
        buffer->reduced = !in->local;
    }
    state->backwards++;
    state->last_backward = proof->at;
    return LLMPAR_OK;
}

static llmpar_status llmpar__proof_reduce(llmpar__proof *proof, const llmpar_instruction *in)
{
    llmpar__buffer *from = llmpar__proof_buffer(proof, in->unit, in->use, 1, in->from), *to = llmpar__proof_buffer(proof, in->unit, in->use, 0, in->slot);
    if (llmpar_policy_whole_params(&proof->policy)) return llmpar__proof_fail(proof, "reduces into shards where gradients are whole");
    llmpar_status status = llmpar__proof_read(proof, from);
    if (status) return status;
    if (from->consumed) return llmpar__proof_fail(proof, "reduces a gradient twice");
    if (to->live) return llmpar__proof_fail(proof, "overwrites a gradient buffer that is still needed");
    from->consumed = 1;
    llmpar__proof_write(proof, to);
    to->gradients = from->gradients;
    to->content = from->content;
    to->reduced = 1;
    return LLMPAR_OK;
}

static llmpar_status llmpar__proof_accumulate(llmpar__proof *proof, const llmpar_instruction *in)
{
    llmpar__buffer *to = llmpar__proof_buffer(proof, in->unit, in->use, in->local, in->slot), *from = llmpar__proof_buffer(proof, in->unit, in->from_use, in->local, in->from);
    if (to == from) return llmpar__proof_fail(proof, "adds a gradient buffer to itself");
    int ordered = llmpar__proof_after_readers(proof, to->reader);
    llmpar_status status = llmpar__proof_read(proof, to);
    if (!status) status = llmpar__proof_read(proof, from);
    if (status) return status;
    if (!ordered) return llmpar__proof_fail(proof, "changes a gradient buffer that another stream still reads");
    if (to->consumed || from->consumed || to->normed || from->normed) return llmpar__proof_fail(proof, "adds to a gradient that was already reduced or measured");
    if (to->reduced != from->reduced || to->replica != from->replica) return llmpar__proof_fail(proof, "adds gradients that are not at the same stage of reduction");
    to->gradients += from->gradients;
    to->content += from->content;
    to->writer = proof->at;
    from->live = 0;
    return LLMPAR_OK;
}

static llmpar_status llmpar__proof_free(llmpar__proof *proof, const llmpar_instruction *in)
{
    llmpar__unit_state *state = &proof->state[in->unit];
    if (in->slot < 0) {
        if (state->gathered < 0) return llmpar__proof_fail(proof, "frees parameters that are not gathered");
        if (!llmpar__proof_after(proof, state->gathered) || !llmpar__proof_after_readers(proof, state->reader)) return llmpar__proof_fail(proof, "frees parameters that another stream may still use");
        state->gathered = -1;
        return LLMPAR_OK;
    }
    llmpar__buffer *buffer = llmpar__proof_buffer(proof, in->unit, in->use, in->local, in->slot);
    if (!buffer->live) return llmpar__proof_fail(proof, "frees a gradient buffer that nothing has written");
    if (!buffer->consumed) return llmpar__proof_fail(proof, "frees a gradient that was not reduced");
    if (!llmpar__proof_after(proof, buffer->writer) || !llmpar__proof_after_readers(proof, buffer->reader)) return llmpar__proof_fail(proof, "frees a gradient buffer that another stream may still use");
    buffer->live = 0;
    return LLMPAR_OK;
}

static llmpar_status llmpar__proof_final(llmpar__proof *proof, const llmpar_instruction *in)
{
    if (in->op == LLMPAR_OP_SCALAR_REDUCE) {
        int pass = in->pass != 0;
        if (proof->scalar[pass] >= 0) return llmpar__proof_fail(proof, "runs twice");
        proof->scalar[pass] = proof->at;
        for (int32_t unit = 0; unit < proof->unit_count && pass; unit++) {
            const llmpar__unit_state *state = &proof->state[unit];
            if (state->forwards != proof->policy.micro_batches || !llmpar__proof_after(proof, state->last_forward)) return llmpar__proof_fail(proof, "runs before the loss is complete");
            if (!proof->policy.forward_only && state->updated != 1) return llmpar__proof_fail(proof, "runs before every norm is known");
        }
        return pass && !llmpar__proof_after_readers(proof, proof->norm) ? llmpar__proof_fail(proof, "does not wait for a norm") : LLMPAR_OK;
    }
    llmpar__buffer *buffer = llmpar__proof_buffer(proof, in->unit, in->use, 0, in->slot);
    llmpar_status status = llmpar__proof_read(proof, buffer);
    if (status) return status;
    if (!llmpar__proof_complete(proof, in->unit, buffer)) return llmpar__proof_fail(proof, "the gradient does not hold every micro-batch and use exactly once");
    if (!buffer->reduced || (proof->policy.replicas > 1 && !buffer->replica)) return llmpar__proof_fail(proof, "the gradient is not reduced over all data ranks");
    if (in->op == LLMPAR_OP_NORM) {
        if (buffer->normed) return llmpar__proof_fail(proof, "measures a gradient twice");
        if (!llmpar__proof_after_readers(proof, proof->norm)) return llmpar__proof_fail(proof, "adds to the norm at the same time as another stream");
        proof->norm[in->stream] = proof->at;
        buffer->normed = 1;
        proof->state[in->unit].updated = 1;
        return LLMPAR_OK;
    }
    if (!buffer->normed || proof->scalar[1] < 0) return llmpar__proof_fail(proof, "updates before the norm is known");
    if (in->predicate != LLMPAR_IF_FINITE) return llmpar__proof_fail(proof, "updates without asking whether the gradient is finite");
    if (!llmpar__proof_after(proof, proof->state[in->unit].last_gather)) return llmpar__proof_fail(proof, "updates parameters while they are gathered");
    buffer->live = 0;
    proof->state[in->unit].updated = 2;
    return LLMPAR_OK;
}

static llmpar_status llmpar__proof_instruction(llmpar__proof *proof, const llmpar_instruction *in)
{
    switch (in->op) {
    case LLMPAR_OP_GATHER:
        if (llmpar_policy_whole_params(&proof->policy)) return llmpar__proof_fail(proof, "gathers parameters that are not sharded");
        if (proof->state[in->unit].gathered >= 0) return llmpar__proof_fail(proof, "gathers parameters that are gathered already");
        if (proof->state[in->unit].updated == 2) return llmpar__proof_fail(proof, "gathers parameters after their update");
        proof->state[in->unit].gathered = proof->state[in->unit].last_gather = proof->at;
        llmpar__proof_no_readers(proof->state[in->unit].reader);
        return LLMPAR_OK;
    case LLMPAR_OP_FREE: return llmpar__proof_free(proof, in);
    case LLMPAR_OP_FORWARD:
    case LLMPAR_OP_BACKWARD: return llmpar__proof_compute(proof, in);
    case LLMPAR_OP_REDUCE: return llmpar__proof_reduce(proof, in);
    case LLMPAR_OP_REDUCE_REPLICA: {
        llmpar__buffer *buffer = llmpar__proof_buffer(proof, in->unit, in->use, 0, in->slot);
        int ordered = llmpar__proof_after_readers(proof, buffer->reader);
        llmpar_status status = llmpar__proof_read(proof, buffer);
        if (status) return status;
        if (!ordered) return llmpar__proof_fail(proof, "changes a gradient buffer that another stream still reads");
        if (buffer->replica) return llmpar__proof_fail(proof, "sums a gradient over replicas twice");
        buffer->replica = 1;
        buffer->writer = proof->at;
        return LLMPAR_OK;
    }
    case LLMPAR_OP_ACCUMULATE: return llmpar__proof_accumulate(proof, in);
    case LLMPAR_OP_NORM:
    case LLMPAR_OP_SCALAR_REDUCE:
    case LLMPAR_OP_OPTIM: return llmpar__proof_final(proof, in);
    case LLMPAR_OP_RECOMPUTE:
    case LLMPAR_OP_CAST:
    case LLMPAR_OP_FETCH:
    case LLMPAR_OP_STORE: break;
    }
    return llmpar__proof_fail(proof, "no such op");
}

static llmpar_status llmpar__proof_end(llmpar__proof *proof)
{
    for (int32_t unit = 0; unit < proof->unit_count; unit++) {
        const llmpar__unit_state *state = &proof->state[unit];
        const char *name = proof->units[unit].name;
        if (state->forwards != proof->policy.micro_batches) return llmpar_error_set(proof->error, LLMPAR_ERR_SCHEDULE, "schedule: end: unit %s ran forward on %d of %d micro-batches", name, (int)state->forwards, (int)proof->policy.micro_batches);
        if (state->gathered >= 0) return llmpar_error_set(proof->error, LLMPAR_ERR_SCHEDULE, "schedule: end: parameters of unit %s, gathered by instruction %d, are never freed", name, (int)state->gathered);
        for (int use = 0; use < 2; use++)
            for (int local = 0; local < 2; local++)
                for (int slot = 0; slot < LLMPAR_GRAD_SLOTS; slot++)
                    if (state->buffer[use][local][slot].live)
                        return llmpar_error_set(proof->error, LLMPAR_ERR_SCHEDULE, "schedule: end: gradient of unit %s, written by instruction %d, is never consumed", name, (int)state->buffer[use][local][slot].writer);
        if (!proof->policy.forward_only && (state->backwards != proof->policy.micro_batches || state->updated != 2))
            return llmpar_error_set(proof->error, LLMPAR_ERR_SCHEDULE, "schedule: end: unit %s ran backward on %d of %d micro-batches and was %supdated", name, (int)state->backwards, (int)proof->policy.micro_batches, state->updated == 2 ? "" : "not ");
    }
    if (proof->scalar[1] < 0) return llmpar_error_set(proof->error, LLMPAR_ERR_SCHEDULE, "schedule: end: the loss is never reduced");
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_schedule_validate(llmpar_heap *heap, const llmpar_instruction *list, int32_t count, const llmpar_unit *units, int32_t unit_count, const llmpar_policy *policy, llmpar_error *error)
{
    llmpar__proof proof;
    llmpar_status status = LLMPAR_OK;
    int32_t last[LLMPAR_STREAM_COUNT], host[LLMPAR_STREAM_COUNT];
    memset(&proof, 0, sizeof proof);
    proof.list = list;
    proof.count = count;
    proof.units = units;
    proof.unit_count = unit_count;
    proof.policy = *policy;
    if (!proof.policy.micro_batches) proof.policy.micro_batches = 1;
    proof.scalar[0] = proof.scalar[1] = -1;
    proof.error = error;
    if (count < 0 || unit_count < 1) return llmpar_error_set(error, LLMPAR_ERR_SCHEDULE, "schedule: %d instructions for %d units", (int)count, (int)unit_count);
    proof.state = (llmpar__unit_state *)llmpar_heap_zalloc(heap, (size_t)unit_count, sizeof *proof.state);
    proof.clock = (int32_t(*)[LLMPAR_STREAM_COUNT])llmpar_heap_alloc(heap, (size_t)count, sizeof *proof.clock);
    if (!proof.state || !proof.clock) status = llmpar_error_set(error, LLMPAR_ERR_MEMORY, "schedule: no memory to validate %d instructions", (int)count);
    for (int32_t unit = 0; unit < unit_count && !status; unit++) {
        proof.state[unit].gathered = proof.state[unit].last_gather = proof.state[unit].last_forward = proof.state[unit].last_backward = -1;
        llmpar__proof_no_readers(proof.state[unit].reader);
    }
    for (int s = 0; s < LLMPAR_STREAM_COUNT; s++) last[s] = host[s] = proof.norm[s] = -1;
    for (proof.at = 0; proof.at < count && !status; proof.at++) {
        const llmpar_instruction *in = &list[proof.at];
        status = llmpar__proof_operands(&proof, in);
        if (status) break;
        llmpar__proof_clock(&proof, in, last, host);
        status = llmpar__proof_instruction(&proof, in);
    }
    if (!status) status = llmpar__proof_end(&proof);
    llmpar_heap_free(heap, proof.clock);
    llmpar_heap_free(heap, proof.state);
    return status;
}
