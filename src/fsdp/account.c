#include "fsdp/fsdp_internal.h"

#include <string.h>

/* ---- what each instruction moves or takes ---- */

static uint64_t llmpar__account_sent(const llmpar_comm *comm, uint64_t part) { return comm ? (uint64_t)(comm->ranks - 1) * part : 0; }

static uint64_t llmpar__account_all_reduce(const llmpar_comm *comm, uint64_t bytes) { return (uint64_t)(2 * ((double)(comm->ranks - 1) / (double)comm->ranks) * (double)bytes + 0.5); }

LLMPAR__PRIVATE_DEF llmpar_status llmpar__fsdp_unit_sizes(const llmpar_fsdp *fsdp, int32_t unit, const llmpar_micro *micro, llmpar_unit_sizes *out)
{
    const llmpar_unit *u = &fsdp->units[unit].unit;
    memset(out, 0, sizeof *out);
    out->recompute = (int32_t)u->recompute;
    return u->sizes(u->user, micro, fsdp->dtype, out);
}

LLMPAR__PRIVATE_DEF int llmpar__fsdp_leaves_output(const llmpar_unit *unit)
{
    for (int32_t i = 0; i < unit->forward_count; i++)
        if (unit->forward[i].output_only) return 1;
    return 0;
}

/* Memory of a unit's pass, beside what it was handed. */
static llmpar_status llmpar__account_unit(const llmpar_fsdp *fsdp, const llmpar_instruction *in, const llmpar_micro *micro, uint64_t *bytes)
{
    const llmpar__flat *flat = &fsdp->units[in->unit];
    uint64_t sum = llmpar_dtype_size(fsdp->sum);
    llmpar_unit_sizes sizes, input;
    llmpar_status status = llmpar__fsdp_unit_sizes(fsdp, in->unit, micro, &sizes);
    if (status) return status;
    *bytes = sizes.scratch + sizes.workspace;
    if (in->op != LLMPAR_OP_BACKWARD) {
        *bytes += sizes.saved + (in->op == LLMPAR_OP_RECOMPUTE && llmpar__fsdp_leaves_output(&flat->unit) ? 0 : sizes.output);
        return LLMPAR_OK;
    }
    if (in->slot >= 0) *bytes += (uint64_t)flat->elements * sum;
    if (in->from >= 0) *bytes += (uint64_t)fsdp->units[flat->unit.borrow - 1].elements * sum;
    if (in->unit <= fsdp->first_backward) return LLMPAR_OK;
    status = llmpar__fsdp_unit_sizes(fsdp, in->unit - 1, micro, &input);
    *bytes += input.output;
    return status;
}

static llmpar_status llmpar__account_moved(const llmpar_fsdp *fsdp, const llmpar_instruction *in, const llmpar_micro *micro, uint64_t *bytes)
{
    const llmpar__flat *flat = &fsdp->units[in->unit];
    uint64_t shard = (uint64_t)flat->shard_elements * llmpar_dtype_size(fsdp->sum);
    llmpar_unit_sizes sizes;
    llmpar_status status = LLMPAR_OK;
    switch (in->what) {
    case LLMPAR_STATE_OPTIMIZER: *bytes = flat->unit.frozen ? 0 : shard * (uint64_t)fsdp->optimizer_states; break;
    case LLMPAR_STATE_PARAMS: *bytes = fsdp->policy.master && flat->unit.frozen ? 0 : shard; break;
    case LLMPAR_STATE_GRADS: *bytes = fsdp->whole_grads ? (uint64_t)flat->elements * llmpar_dtype_size(fsdp->sum) : shard; break;
    default:
        status = llmpar__fsdp_unit_sizes(fsdp, in->unit, micro, &sizes);
        *bytes = flat->unit.recompute == LLMPAR_RECOMPUTE_FULL ? 0 : sizes.saved;
        if (!status && in->unit > 0) {
            status = llmpar__fsdp_unit_sizes(fsdp, in->unit - 1, micro, &sizes);
            *bytes += sizes.output;
        }
        break;
    }
    return status;
}

LLMPAR_DEF llmpar_status llmpar_fsdp_bytes(const llmpar_fsdp *fsdp, const llmpar_schedule *schedule, const llmpar_micro *micro, uint64_t *bytes)
{
    uint64_t dtype = llmpar_dtype_size(fsdp->dtype), sum = llmpar_dtype_size(fsdp->sum), reduce = llmpar_dtype_size(fsdp->reduce);
    llmpar_status status = LLMPAR_OK;
    for (int32_t i = 0; i < schedule->count && !status; i++) {
        const llmpar_instruction *in = &schedule->list[i];
        const llmpar__flat *flat = &fsdp->units[in->unit < 0 ? 0 : in->unit];
        uint64_t shard = (uint64_t)flat->shard_elements;
        bytes[i] = 0;
        switch (in->op) {
        case LLMPAR_OP_GATHER: bytes[i] = llmpar__account_sent(fsdp->shard_comm, shard * dtype); break;
        case LLMPAR_OP_REDUCE: bytes[i] = llmpar__account_sent(fsdp->shard_comm, shard * reduce); break;
        case LLMPAR_OP_REDUCE_REPLICA: /* in a narrower type by slices that all ranks have alike */
            bytes[i] = reduce == sum ? llmpar__account_all_reduce(fsdp->replica_comm, shard * sum) : 2 * llmpar__account_sent(fsdp->replica_comm, (shard + (uint64_t)fsdp->replicas - 1) / (uint64_t)fsdp->replicas * reduce);
            break;
        case LLMPAR_OP_SCALAR_REDUCE: bytes[i] = llmpar__account_all_reduce(fsdp->mesh->world, (in->pass ? LLMPAR__SCALARS : 1) * sizeof(int64_t)); break;
        case LLMPAR_OP_ACCUMULATE: bytes[i] = 3 * sum * (uint64_t)(in->local || fsdp->whole_grads ? flat->elements : flat->shard_elements); break;
        case LLMPAR_OP_NORM: bytes[i] = shard * sum; break;
        case LLMPAR_OP_OPTIM: bytes[i] = shard * sum * (uint64_t)(3 + 2 * fsdp->optimizer_states); break; /* parameters and states there and back, the gradient once */
        case LLMPAR_OP_CAST: bytes[i] = shard * (sum + dtype); break;
        case LLMPAR_OP_FORWARD:
        case LLMPAR_OP_RECOMPUTE:
        case LLMPAR_OP_BACKWARD: status = llmpar__account_unit(fsdp, in, micro, &bytes[i]); break;
        case LLMPAR_OP_FETCH:
        case LLMPAR_OP_STORE: status = llmpar__account_moved(fsdp, in, micro, &bytes[i]); break;
        case LLMPAR_OP_FREE: break;
        }
    }
    return status;
}

/* ---- where the bytes are ---- */

enum { LLMPAR__ACCOUNT_PARAMETERS, LLMPAR__ACCOUNT_PARAMETERS_PAD, LLMPAR__ACCOUNT_GATHERED, LLMPAR__ACCOUNT_GATHERED_PAD, LLMPAR__ACCOUNT_GRADIENTS, LLMPAR__ACCOUNT_LOCAL, LLMPAR__ACCOUNT_COUNTERS, LLMPAR__ACCOUNT_TIED, LLMPAR__ACCOUNT_GRADIENTS_PAD,
       LLMPAR__ACCOUNT_OPTIMIZER, LLMPAR__ACCOUNT_MASTER, LLMPAR__ACCOUNT_OPTIMIZER_PAD, LLMPAR__ACCOUNT_LINES };

/* The lines as a list is walked, and for PEAK those of each tag where it was highest. */
typedef struct llmpar__account {
    const llmpar_fsdp *fsdp;
    uint64_t now[LLMPAR__ACCOUNT_LINES], peak[LLMPAR__ACCOUNT_LINES];
} llmpar__account;

static const struct { llmpar_tag tag; const char *name; } llmpar__account_names[LLMPAR__ACCOUNT_LINES] = {
    {LLMPAR_TAG_PARAMETERS, "parameters"}, {LLMPAR_TAG_PARAMETERS, "padding"}, {LLMPAR_TAG_GATHERED, "gathered parameters"}, {LLMPAR_TAG_GATHERED, "padding"}, {LLMPAR_TAG_GRADIENTS, "gradients"}, {LLMPAR_TAG_GRADIENTS, "local gradients"},
    {LLMPAR_TAG_GRADIENTS, "micro-batch counters"}, {LLMPAR_TAG_GRADIENTS, "second slot of a tied weight"}, {LLMPAR_TAG_GRADIENTS, "padding"}, {LLMPAR_TAG_OPTIMIZER, "optimizer"}, {LLMPAR_TAG_OPTIMIZER, "master parameters"}, {LLMPAR_TAG_OPTIMIZER, "padding"},
};

/* A buffer of the unit, on its line and on its tag's last one, which is padding. sign: it comes (1) or goes (-1). */
static void llmpar__account_add(llmpar__account *account, const llmpar__flat *flat, int whole, llmpar_dtype dtype, int line, int sign)
{
    int padding = line + 1;
    while (padding + 1 < LLMPAR__ACCOUNT_LINES && llmpar__account_names[padding + 1].tag == llmpar__account_names[line].tag) padding++;
    uint64_t size = llmpar_dtype_size(dtype), alignment = account->fsdp->device->alignment, numbers = 0;
    uint64_t bytes = ((uint64_t)(whole ? flat->elements : flat->shard_elements) * size + alignment - 1) / alignment * alignment;
    for (int32_t i = 0; i < (whole ? flat->unit.param_count : flat->segment_count); i++) numbers += (uint64_t)(whole ? flat->count[i] : flat->segments[i].count) * size;
    account->now[line] += (uint64_t)sign * numbers; /* modulo 2^64: -1 takes away */
    account->now[padding] += (uint64_t)sign * (bytes - numbers);
}

static void llmpar__account_gradient(llmpar__account *account, int32_t unit, int32_t use, int32_t local, int32_t slot, int sign)
{
    const llmpar_fsdp *fsdp = account->fsdp;
    int line = local ? LLMPAR__ACCOUNT_LOCAL : use ? LLMPAR__ACCOUNT_TIED : slot ? LLMPAR__ACCOUNT_COUNTERS : LLMPAR__ACCOUNT_GRADIENTS;
    llmpar__account_add(account, &fsdp->units[unit], local || fsdp->whole_grads, fsdp->sum, line, sign);
}

static void llmpar__account_optimizer(llmpar__account *account, const llmpar__flat *flat, int sign)
{
    for (int32_t i = 0; i < account->fsdp->optimizer_states && !flat->unit.frozen; i++) llmpar__account_add(account, flat, account->fsdp->whole_state, account->fsdp->sum, LLMPAR__ACCOUNT_OPTIMIZER, sign);
}

static void llmpar__account_params(llmpar__account *account, const llmpar__flat *flat, int sign)
{
    const llmpar_fsdp *fsdp = account->fsdp;
    if (!fsdp->policy.master) llmpar__account_add(account, flat, fsdp->whole_params, fsdp->dtype, LLMPAR__ACCOUNT_PARAMETERS, sign);
    else if (!flat->unit.frozen) llmpar__account_add(account, flat, fsdp->whole_state, fsdp->sum, LLMPAR__ACCOUNT_MASTER, sign);
}

static void llmpar__account_step(llmpar__account *account, const llmpar_instruction *in)
{
    const llmpar_fsdp *fsdp = account->fsdp;
    const llmpar__flat *flat = &fsdp->units[in->unit < 0 ? 0 : in->unit];
    int sign = in->op == LLMPAR_OP_FETCH ? 1 : -1;
    switch (in->op) {
    case LLMPAR_OP_GATHER:
        if (!fsdp->whole_params) llmpar__account_add(account, flat, 1, fsdp->dtype, LLMPAR__ACCOUNT_GATHERED, 1);
        break;
    case LLMPAR_OP_FREE:
        if (in->slot >= 0) llmpar__account_gradient(account, in->unit, in->use, in->local, in->slot, -1);
        else if (in->what == LLMPAR_STATE_PARAMS) llmpar__account_params(account, flat, -1);
        else if (!fsdp->whole_params) llmpar__account_add(account, flat, 1, fsdp->dtype, LLMPAR__ACCOUNT_GATHERED, -1);
        break;
    case LLMPAR_OP_BACKWARD:
        if (in->slot >= 0) llmpar__account_gradient(account, in->unit, 0, in->local, in->slot, 1);
        if (in->from >= 0) llmpar__account_gradient(account, flat->unit.borrow - 1, 1, in->local, in->from, 1);
        break;
    case LLMPAR_OP_REDUCE:
        if (!fsdp->whole_grads) llmpar__account_gradient(account, in->unit, in->use, 0, in->slot, 1);
        break;
    case LLMPAR_OP_ACCUMULATE: llmpar__account_gradient(account, in->unit, in->from_use, in->local, in->from, -1); break;
    case LLMPAR_OP_OPTIM:
        if (!fsdp->policy.host_update) llmpar__account_gradient(account, in->unit, in->use, 0, in->slot, -1);
        break;
    case LLMPAR_OP_FETCH:
    case LLMPAR_OP_STORE:
        if (in->what == LLMPAR_STATE_OPTIMIZER) llmpar__account_optimizer(account, flat, sign);
        if (in->what == LLMPAR_STATE_PARAMS) llmpar__account_params(account, flat, sign);
        if (in->what == LLMPAR_STATE_GRADS) llmpar__account_gradient(account, in->unit, in->use, 0, in->slot, sign);
        break;
    default: break;
    }
}

/* Every tag on its own: at its peak so far its lines are kept. */
static void llmpar__account_peaks(llmpar__account *account)
{
    for (int first = 0, end; first < LLMPAR__ACCOUNT_LINES; first = end) {
        uint64_t now = 0, peak = 0;
        for (end = first; end < LLMPAR__ACCOUNT_LINES && llmpar__account_names[end].tag == llmpar__account_names[first].tag; end++) {
            now += account->now[end];
            peak += account->peak[end];
        }
        if (now > peak) memcpy(account->peak + first, account->now + first, (size_t)(end - first) * sizeof *account->now);
    }
}

LLMPAR_DEF int32_t llmpar_fsdp_account(const llmpar_fsdp *fsdp, const llmpar_schedule *schedule, llmpar_mark mark, llmpar_account_line *lines, int32_t capacity)
{
    LLMPAR__ZEROED(llmpar__account, account);
    int32_t count = 0;
    account.fsdp = fsdp;
    for (int32_t u = 0; u < fsdp->unit_count; u++) {
        const llmpar__flat *flat = &fsdp->units[u];
        if (fsdp->tier[LLMPAR_STATE_OPTIMIZER] == LLMPAR_TIER_DEVICE) llmpar__account_optimizer(&account, flat, 1);
        if (fsdp->tier[LLMPAR_STATE_PARAMS] == LLMPAR_TIER_DEVICE) llmpar__account_params(&account, flat, 1);
        if (fsdp->policy.master) llmpar__account_add(&account, flat, fsdp->whole_params, fsdp->dtype, LLMPAR__ACCOUNT_PARAMETERS, 1);
    }
    memcpy(account.peak, account.now, sizeof account.peak);
    for (int32_t i = 0; i < (mark == LLMPAR_MARK_REST ? 0 : schedule->count); i++) {
        if (mark == LLMPAR_MARK_BEFORE_OPTIMIZER && schedule->list[i].op == LLMPAR_OP_OPTIM) break;
        llmpar__account_step(&account, &schedule->list[i]);
        llmpar__account_peaks(&account);
    }
    const uint64_t *from = mark == LLMPAR_MARK_PEAK ? account.peak : account.now;
    for (int line = 0; line < LLMPAR__ACCOUNT_LINES; line++) {
        if (!from[line]) continue;
        if (count < capacity) {
            lines[count].tag = llmpar__account_names[line].tag;
            lines[count].name = llmpar__account_names[line].name;
            lines[count].bytes = from[line];
        }
        count++;
    }
    return count;
}
