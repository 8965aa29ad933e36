#include "fsdp/schedule.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

LLMPAR_DEF const char *llmpar_op_name(llmpar_op op)
{
    switch (op) {
    case LLMPAR_OP_GATHER: return "GATHER";
    case LLMPAR_OP_FREE: return "FREE";
    case LLMPAR_OP_FORWARD: return "FORWARD";
    case LLMPAR_OP_BACKWARD: return "BACKWARD";
    case LLMPAR_OP_REDUCE: return "REDUCE";
    case LLMPAR_OP_REDUCE_REPLICA: return "REDUCE_REPLICA";
    case LLMPAR_OP_ACCUMULATE: return "ACCUMULATE";
    case LLMPAR_OP_NORM: return "NORM";
    case LLMPAR_OP_SCALAR_REDUCE: return "SCALAR_REDUCE";
    case LLMPAR_OP_OPTIM: return "OPTIM";
    case LLMPAR_OP_RECOMPUTE: return "RECOMPUTE";
    case LLMPAR_OP_CAST: return "CAST";
    case LLMPAR_OP_FETCH: return "FETCH";
    case LLMPAR_OP_STORE: return "STORE";
    }
    return "?";
}

LLMPAR_DEF int llmpar_policy_whole_params(const llmpar_policy *policy) { return policy->shards < 2 || (policy->zero != LLMPAR_ZERO_DEFAULT && policy->zero < LLMPAR_ZERO_3); }
LLMPAR_DEF int llmpar_policy_whole_grads(const llmpar_policy *policy) { return policy->shards < 2 || policy->zero == LLMPAR_ZERO_0 || policy->zero == LLMPAR_ZERO_1; }
LLMPAR_DEF int llmpar_policy_whole_state(const llmpar_policy *policy) { return policy->shards < 2 || policy->zero == LLMPAR_ZERO_0; }

LLMPAR_DEF int32_t llmpar_schedule_first_backward(const llmpar_unit *units, int32_t unit_count)
{
    int32_t first = 0;
    while (first < unit_count && units[first].frozen && (!units[first].borrow || units[units[first].borrow - 1].frozen)) first++;
    return first;
}

/* The compute steps of a step in order: for every micro-batch all forwards, then all backwards.

     step:   F0 F1 F2 B2 B1 B0 | F0 F1 ...
     resident (prefetch 0): unit 2 stays from F2 to B2, unit 0 from B0 to the next F0; all others are freed after a use and gathered again.
     prefetch d: the gather stands d steps before its use; a gather that would stand before the preceding free cancels both. */
typedef struct llmpar__plan {
    llmpar_schedule *schedule;
    const llmpar_unit *units;
    int32_t steps_per_micro, steps;
    unsigned char *flag;      /* [steps][units]: 1 gather before, 2 free after */
    int32_t *last_gather;     /* [units] instruction index, -1 */
    int32_t *depth;           /* [units][2] occupied buffers of the binary counter */
    int32_t last_param_free;  /* instruction index, -1 */
    int32_t last_grad_free;
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

static llmpar_instruction *llmpar__plan_emit(llmpar__plan *plan, llmpar_op op, int32_t unit, int32_t micro, llmpar_stream_id stream)
{
    llmpar_schedule *schedule = plan->schedule;
    static const llmpar_instruction empty = {LLMPAR_OP_GATHER, -1, -1, 0, 0, -1, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_COMPUTE, LLMPAR_ALWAYS, 0, {-1, -1, -1, -1, -1, -1}};
    if (schedule->count == schedule->capacity) {
        int32_t capacity = schedule->capacity ? schedule->capacity * 2 : 64;
        llmpar_instruction *list = (llmpar_instruction *)llmpar_heap_alloc(schedule->heap, (size_t)capacity, sizeof *list);
        if (!list) {
            plan->status = 1;
            schedule->count = 0; /* keep writing into the old list; the caller reports */
            if (!schedule->list) return NULL;
        } else {
            if (schedule->count) memcpy(list, schedule->list, (size_t)schedule->count * sizeof *list);
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

/* Where the gathers and frees stand. */
static void llmpar__plan_residency(llmpar__plan *plan)
{
    const llmpar_policy *policy = &plan->schedule->policy;
    int32_t n = plan->schedule->units;
    for (int32_t unit = 0; unit < n; unit++) {
        int32_t previous = -1;
        for (int32_t step = 0; step < plan->steps; step++) {
            if (!llmpar__plan_uses(plan, step, unit)) continue;
            int32_t gather = step - policy->prefetch < 0 ? 0 : step - policy->prefetch;
            if (previous >= 0 && (step == previous + 1 || policy->reshard == LLMPAR_RESHARD_NEVER || gather <= previous)) {
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

static void llmpar__plan_gathers(llmpar__plan *plan, int32_t step)
{
    int32_t n = plan->schedule->units, last = step + plan->schedule->policy.prefetch;
    /* In order of need, which for a step may be its own unit and the one it borrows. */
    for (int32_t ahead = step; ahead <= last && ahead < plan->steps; ahead++)
        for (int32_t unit = 0; unit < n; unit++) {
            unsigned char *flag = &plan->flag[(size_t)step * (size_t)n + (size_t)unit];
            if (!(*flag & 1u) || !llmpar__plan_uses(plan, ahead, unit)) continue;
            *flag &= (unsigned char)~1u;
            llmpar_instruction *gather = llmpar__plan_emit(plan, LLMPAR_OP_GATHER, unit, -1, LLMPAR_STREAM_GATHER);
            if (!gather) return;
            llmpar__plan_wait(gather, plan->last_param_free);
            plan->last_gather[unit] = plan->schedule->count - 1;
        }
}

/* One more gradient of (unit, use) is in buffer depth-1 of the counter: merge while the number of micro-batches says so.
   Micro-batch m completes as many subtrees as m + 1 has trailing zero bits. `last` folds what is left when M is no power of two. */
static void llmpar__plan_count(llmpar__plan *plan, int32_t unit, int32_t use, int32_t micro, int last, int local, llmpar_stream_id stream)
{
    int32_t *depth = &plan->depth[unit * 2 + use];
    for (int32_t bits = micro + 1; *depth > 1 && ((bits & 1) == 0 || last); bits >>= 1) {
        llmpar_instruction *add = llmpar__plan_emit(plan, LLMPAR_OP_ACCUMULATE, unit, micro, stream);
        if (!add) return;
        add->use = add->from_use = use;
        add->slot = *depth - 2;
        add->from = *depth - 1;
        add->local = local;
        --*depth;
    }
}

/* Local buffer `from` to the shard counter's next buffer, summed over replicas. */
static void llmpar__plan_reduce(llmpar__plan *plan, int32_t unit, int32_t use, int32_t micro, int32_t from, int32_t slot, int32_t after)
{
    const llmpar_policy *policy = &plan->schedule->policy;
    if (!llmpar_policy_whole_params(policy)) {
        llmpar_instruction *reduce = llmpar__plan_emit(plan, LLMPAR_OP_REDUCE, unit, micro, LLMPAR_STREAM_REDUCE);
        if (!reduce) return;
        reduce->use = use;
        reduce->from = from;
        reduce->slot = slot;
        llmpar__plan_wait(reduce, after);
    }
    if (policy->replicas > 1) {
        llmpar_instruction *replica = llmpar__plan_emit(plan, LLMPAR_OP_REDUCE_REPLICA, unit, micro, LLMPAR_STREAM_REDUCE);
        if (!replica) return;
        replica->use = use;
        replica->slot = slot;
        llmpar__plan_wait(replica, after);
    }
}

static void llmpar__plan_free_local(llmpar__plan *plan, int32_t unit, int32_t use, int32_t slot)
{
    llmpar_instruction *release = llmpar__plan_emit(plan, LLMPAR_OP_FREE, unit, -1, LLMPAR_STREAM_REDUCE);
    if (!release) return;
    release->use = use;
    release->slot = slot;
    release->local = 1;
    plan->last_grad_free = plan->schedule->count - 1;
}

/* Everything one (unit, use) gradient goes through after its backward; returns 1 if local buffer `from` is to be freed later. */
static int llmpar__plan_gradient(llmpar__plan *plan, int32_t unit, int32_t use, int32_t micro, int32_t slot, int32_t backward)
{
    const llmpar_policy *policy = &plan->schedule->policy;
    int last = micro + 1 == policy->micro_batches;
    int32_t *depth = &plan->depth[unit * 2 + use];
    if (policy->no_sync) {
        int local = !llmpar_policy_whole_params(policy);
        int32_t before = plan->schedule->count;
        llmpar__plan_count(plan, unit, use, micro, last, local, LLMPAR_STREAM_COMPUTE);
        if (!last) return 0;
        llmpar__plan_reduce(plan, unit, use, micro, 0, 0, plan->schedule->count > before ? plan->schedule->count - 1 : backward);
        return local;
    }
    if (!llmpar_policy_whole_params(policy)) { /* the shard counter grows by what REDUCE writes; an unsharded backward wrote it there itself */
        llmpar__plan_reduce(plan, unit, use, micro, slot, *depth, backward);
        ++*depth;
    } else {
        llmpar__plan_reduce(plan, unit, use, micro, -1, slot, backward);
    }
    int32_t before = plan->schedule->count;
    llmpar__plan_count(plan, unit, use, micro, last, 0, LLMPAR_STREAM_REDUCE);
    if (plan->schedule->list && plan->schedule->count > before) llmpar__plan_wait(&plan->schedule->list[before], backward);
    return !llmpar_policy_whole_params(policy);
}

static void llmpar__plan_backward(llmpar__plan *plan, int32_t unit, int32_t micro, int32_t pending[2])
{
    const llmpar_policy *policy = &plan->schedule->policy;
    int32_t borrow = plan->units[unit].borrow - 1;
    /* Which buffer backward writes: the counter's next one, except where only shards are counted: then local buffer 0. */
    int counted = policy->no_sync || llmpar_policy_whole_params(policy);
    if (pending[0] == unit) { /* a single unit: its own gradient of the micro-batch before is still in the buffer */
        llmpar__plan_free_local(plan, unit, 0, 0);
        pending[0] = -1;
    }
    int32_t slot = counted ? plan->depth[unit * 2]++ : 0;
    int32_t from = borrow < 0 ? -1 : counted ? plan->depth[borrow * 2 + 1]++ : 0;
    llmpar_instruction *backward = llmpar__plan_emit(plan, LLMPAR_OP_BACKWARD, unit, micro, LLMPAR_STREAM_COMPUTE);
    if (!backward) return;
    backward->pass = LLMPAR_PASS_BACKWARD;
    backward->slot = slot;
    backward->from = from;
    backward->local = !llmpar_policy_whole_params(policy);
    int32_t index = plan->schedule->count - 1;
    if (!llmpar_policy_whole_params(policy)) {
        llmpar__plan_wait(backward, plan->last_gather[unit]);
        if (borrow >= 0) llmpar__plan_wait(backward, plan->last_gather[borrow]);
    }
    llmpar__plan_wait(backward, plan->last_grad_free);
    /* The buffer that was reduced one step ago is freed now: this backward did not have to wait for that reduction. Before this step's own reduction, which the next backward then need not wait for either. */
    if (pending[0] >= 0) llmpar__plan_free_local(plan, pending[0], 0, 0);
    if (pending[1] >= 0) llmpar__plan_free_local(plan, pending[1], 1, 0);
    int release = llmpar__plan_gradient(plan, unit, 0, micro, slot, index);
    int release_borrowed = borrow >= 0 ? llmpar__plan_gradient(plan, borrow, 1, micro, from, index) : 0;
    pending[0] = release ? unit : -1;
    pending[1] = release_borrowed ? borrow : -1;
}

static void llmpar__plan_step(llmpar__plan *plan, int32_t step, int32_t pending[2])
{
    int backward;
    int32_t n = plan->schedule->units, unit = llmpar__plan_unit(plan, step, &backward), micro = step / plan->steps_per_micro;
    int32_t borrow = plan->units[unit].borrow - 1;
    if (!llmpar_policy_whole_params(&plan->schedule->policy)) llmpar__plan_gathers(plan, step);
    if (backward) {
        llmpar__plan_backward(plan, unit, micro, pending);
    } else {
        llmpar_instruction *forward = llmpar__plan_emit(plan, LLMPAR_OP_FORWARD, unit, micro, LLMPAR_STREAM_COMPUTE);
        if (!forward) return;
        forward->pass = plan->schedule->policy.forward_only ? LLMPAR_PASS_EVAL : LLMPAR_PASS_FORWARD;
        if (!llmpar_policy_whole_params(&plan->schedule->policy)) {
            llmpar__plan_wait(forward, plan->last_gather[unit]);
            if (borrow >= 0) llmpar__plan_wait(forward, plan->last_gather[borrow]);
        }
    }
    if (llmpar_policy_whole_params(&plan->schedule->policy)) return;
    for (int32_t other = 0; other < n; other++)
        if (plan->flag[(size_t)step * (size_t)n + (size_t)other] & 2u) {
            llmpar__plan_emit(plan, LLMPAR_OP_FREE, other, -1, LLMPAR_STREAM_COMPUTE);
            plan->last_param_free = plan->schedule->count - 1;
        }
}

/* Tied weights: g = g_head + g_embed, once, on the shard. Then norms, the one scalar reduction, the updates. */
static void llmpar__plan_finish(llmpar__plan *plan)
{
    int32_t n = plan->schedule->units;
    if (!plan->schedule->policy.forward_only) {
        for (int32_t unit = 0; unit < n; unit++) {
            int32_t borrow = plan->units[unit].borrow - 1;
            if (borrow < 0) continue;
            llmpar_instruction *add = llmpar__plan_emit(plan, LLMPAR_OP_ACCUMULATE, borrow, -1, LLMPAR_STREAM_REDUCE);
            if (!add) return;
            add->slot = add->from = 0;
            add->from_use = 1;
            if (llmpar_policy_whole_params(&plan->schedule->policy)) llmpar__plan_wait(add, plan->schedule->count - 2);
        }
        for (int32_t unit = 0; unit < n; unit++) {
            llmpar_instruction *norm = llmpar__plan_emit(plan, LLMPAR_OP_NORM, unit, -1, LLMPAR_STREAM_REDUCE);
            if (!norm) return;
            norm->slot = 0;
        }
    }
    /* Behind the last compute instruction: it wrote gradients (unsharded) and the loss. */
    int32_t compute = -1;
    for (int32_t i = 0; i < plan->schedule->count; i++)
        if (plan->schedule->list[i].stream == LLMPAR_STREAM_COMPUTE) compute = i;
    if (!plan->schedule->policy.forward_only && llmpar_policy_whole_params(&plan->schedule->policy))
        for (int32_t i = 0; i < plan->schedule->count; i++)
            if (plan->schedule->list[i].op == LLMPAR_OP_NORM) llmpar__plan_wait(&plan->schedule->list[i], compute);
    llmpar_instruction *reduce = llmpar__plan_emit(plan, LLMPAR_OP_SCALAR_REDUCE, -1, -1, LLMPAR_STREAM_REDUCE);
    if (!reduce) return;
    reduce->pass = 1;
    llmpar__plan_wait(reduce, compute);
    if (plan->schedule->policy.forward_only) return;
    int32_t after = plan->schedule->count - 1;
    for (int32_t unit = 0; unit < n; unit++) {
        llmpar_instruction *optim = llmpar__plan_emit(plan, LLMPAR_OP_OPTIM, unit, -1, LLMPAR_STREAM_COMPUTE);
        if (!optim) return;
        optim->slot = 0;
        optim->predicate = LLMPAR_IF_FINITE;
        llmpar__plan_wait(optim, after);
    }
}

static llmpar_status llmpar__plan_check(const llmpar_unit *units, int32_t unit_count, const llmpar_policy *policy, llmpar_error *error)
{
    if (unit_count < 1) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "schedule: %d units, expected at least 1", (int)unit_count);
    if (policy->micro_batches < 1 || policy->micro_batches > (1 << 20)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "schedule: micro_batches = %d, expected 1 .. %d", (int)policy->micro_batches, 1 << 20);
    if (policy->prefetch < 0 || policy->prefetch > 64) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "schedule: prefetch = %d, expected 0 .. 64", (int)policy->prefetch);
    if (policy->replicas < 1) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "schedule: replicas = %d, expected at least 1", (int)policy->replicas);
    if ((int64_t)unit_count * policy->micro_batches > ((int64_t)1 << 24)) /* a few instructions each, counted in 32 bits */
        return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "schedule: %d units x %d micro-batches, expected at most %d together", (int)unit_count, (int)policy->micro_batches, 1 << 24);
    for (int32_t unit = 0; unit < unit_count; unit++) {
        int32_t borrow = units[unit].borrow - 1;
        if (borrow >= unit_count || borrow < -1 || borrow == unit || (borrow >= 0 && units[borrow].borrow))
            return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "schedule: unit %s borrows unit %d, expected another unit that borrows none", units[unit].name, (int)borrow);
        for (int32_t other = 0; other < unit && borrow >= 0; other++)
            if (units[other].borrow - 1 == borrow) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "schedule: units %s and %s both borrow unit %s, expected one borrower", units[other].name, units[unit].name, units[borrow].name);
    }
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_schedule_create(llmpar_heap *heap, const llmpar_unit *units, int32_t unit_count, const llmpar_policy *policy, llmpar_schedule **out, llmpar_error *error)
{
    llmpar_policy resolved = *policy;
    *out = NULL;
    if (resolved.micro_batches == 0) resolved.micro_batches = 1;
    if (resolved.replicas == 0) resolved.replicas = 1;
    llmpar_status status = llmpar__plan_check(units, unit_count, &resolved, error);
    if (status) return status;
    llmpar__plan plan;
    memset(&plan, 0, sizeof plan);
    llmpar_schedule *schedule = (llmpar_schedule *)llmpar_heap_zalloc(heap, 1, sizeof *schedule);
    if (!schedule) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "schedule: out of memory");
    schedule->heap = heap;
    schedule->units = unit_count;
    schedule->policy = resolved;
    plan.schedule = schedule;
    plan.units = units;
    plan.steps_per_micro = resolved.forward_only ? unit_count : 2 * unit_count;
    plan.steps = plan.steps_per_micro * resolved.micro_batches;
    plan.last_param_free = plan.last_grad_free = -1;
    plan.flag = (unsigned char *)llmpar_heap_zalloc(heap, (size_t)plan.steps, (size_t)unit_count);
    plan.last_gather = (int32_t *)llmpar_heap_zalloc(heap, (size_t)unit_count, sizeof(int32_t));
    plan.depth = (int32_t *)llmpar_heap_zalloc(heap, (size_t)unit_count * 2, sizeof(int32_t));
    if (!plan.flag || !plan.last_gather || !plan.depth) plan.status = 1;
    if (!plan.status) {
        int32_t pending[2] = {-1, -1};
        llmpar__plan_residency(&plan);
        llmpar__plan_emit(&plan, LLMPAR_OP_SCALAR_REDUCE, -1, -1, LLMPAR_STREAM_COMPUTE);
        for (int32_t step = 0; step < plan.steps && !plan.status; step++) llmpar__plan_step(&plan, step, pending);
        if (pending[0] >= 0) llmpar__plan_free_local(&plan, pending[0], 0, 0);
        if (pending[1] >= 0) llmpar__plan_free_local(&plan, pending[1], 1, 0);
        llmpar__plan_finish(&plan);
    }
    llmpar_heap_free(heap, plan.depth);
    llmpar_heap_free(heap, plan.last_gather);
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

/* Text that may be longer than its buffer: counts what it would take. */
typedef struct llmpar__schedule_text { char *text; size_t capacity, length; } llmpar__schedule_text;
static void llmpar__schedule_put(llmpar__schedule_text *out, const char *format, ...) LLMPAR_PRINTF(2, 3);
static void llmpar__schedule_put(llmpar__schedule_text *out, const char *format, ...)
{
    va_list list;
    size_t room = out->length < out->capacity ? out->capacity - out->length : 0;
    va_start(list, format);
    int written = vsnprintf(room ? out->text + out->length : NULL, room, format, list);
    va_end(list);
    if (written > 0) out->length += (size_t)written;
}

static void llmpar__schedule_put_ops(llmpar__schedule_text *out, const llmpar_unit_op *ops, int32_t count)
{
    static const char *const kind[] = {"COMPUTE", "TP_GATHER", "TP_REDUCE"};
    for (int32_t i = 0; i < count; i++) {
        llmpar__schedule_put(out, "          . %2d %-7s %-9s %s", (int)i, ops[i].kind == LLMPAR_COMPUTE ? "compute" : "tp", kind[ops[i].kind], ops[i].name);
        for (int32_t w = 0; w < 2; w++)
            if (ops[i].wait[w]) llmpar__schedule_put(out, "%s%d", w && ops[i].wait[0] ? "," : "  after .", (int)ops[i].wait[w] - 1);
        llmpar__schedule_put(out, "\n");
    }
}

LLMPAR_DEF size_t llmpar_schedule_print(const llmpar_schedule *schedule, const llmpar_unit *units, const uint64_t *bytes, char *text, size_t capacity)
{
    (void)bytes;
    static const char *const stream[] = {"compute", "gather", "reduce", "tp", "offload"};
    llmpar__schedule_text out;
    out.text = text;
    out.capacity = capacity;
    out.length = 0;
    if (capacity) text[0] = 0;
    for (int32_t i = 0; i < schedule->count; i++) {
        const llmpar_instruction *in = &schedule->list[i];
        llmpar__schedule_put(&out, "%5d  %-7s  %-14s", (int)i, stream[in->stream], llmpar_op_name(in->op));
        if (in->unit >= 0) llmpar__schedule_put(&out, " %s", units[in->unit].name);
        if (in->op == LLMPAR_OP_FORWARD || in->op == LLMPAR_OP_BACKWARD) llmpar__schedule_put(&out, " mb%d", (int)in->micro_batch);
        if (in->op == LLMPAR_OP_SCALAR_REDUCE) llmpar__schedule_put(&out, "%s", in->pass ? " loss, norm" : " tokens");
        const char *kind = in->local ? "local" : "shard";
        const char *use = in->use ? ".borrowed" : "";
        if (in->op == LLMPAR_OP_BACKWARD) llmpar__schedule_put(&out, " -> %s%d", kind, (int)in->slot);
        if (in->op == LLMPAR_OP_BACKWARD && in->from >= 0) llmpar__schedule_put(&out, ", %s.borrowed %s%d", units[units[in->unit].borrow - 1].name, kind, (int)in->from);
        if (in->op == LLMPAR_OP_REDUCE) llmpar__schedule_put(&out, "%s local%d -> shard%d", use, (int)in->from, (int)in->slot);
        if (in->op == LLMPAR_OP_ACCUMULATE) llmpar__schedule_put(&out, "%s %s%d += %s%s%d", use, kind, (int)in->slot, in->from_use != in->use ? "borrowed " : "", kind, (int)in->from);
        if ((in->op == LLMPAR_OP_FREE && in->slot >= 0) || in->op == LLMPAR_OP_REDUCE_REPLICA || in->op == LLMPAR_OP_NORM || in->op == LLMPAR_OP_OPTIM) llmpar__schedule_put(&out, "%s %s%d", use, kind, (int)in->slot);
        if (in->predicate == LLMPAR_IF_FINITE) llmpar__schedule_put(&out, " if finite");
        for (int32_t w = 0; w < in->wait_count; w++) llmpar__schedule_put(&out, "%s%d", w ? "," : "  after ", (int)in->waits[w]);
        llmpar__schedule_put(&out, "\n");
        /* A unit's own list: the first time a unit with this list runs. */
        if (in->op != LLMPAR_OP_FORWARD && in->op != LLMPAR_OP_BACKWARD) continue;
        int seen = in->micro_batch > 0;
        const llmpar_unit_op *ops = in->op == LLMPAR_OP_FORWARD ? units[in->unit].forward : units[in->unit].backward;
        for (int32_t j = 0; j < i && !seen; j++)
            if (schedule->list[j].op == in->op && (in->op == LLMPAR_OP_FORWARD ? units[schedule->list[j].unit].forward : units[schedule->list[j].unit].backward) == ops) seen = 1;
        if (!seen) llmpar__schedule_put_ops(&out, ops, in->op == LLMPAR_OP_FORWARD ? units[in->unit].forward_count : units[in->unit].backward_count);
    }
    return out.length;
}
