#include "fsdp/schedule.h"

#include "base/text_internal.h"

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

static void llmpar__schedule_put_ops(llmpar__text *out, const llmpar_unit_op *ops, int32_t count)
{
    static const char *const kind[] = {"COMPUTE", "TP_GATHER", "TP_REDUCE"};
    for (int32_t i = 0; i < count; i++) {
        llmpar__text_put(out, "          . %2d %-7s %-9s %s", (int)i, ops[i].kind == LLMPAR_COMPUTE ? "compute" : "tp", kind[ops[i].kind], ops[i].name);
        for (int32_t w = 0; w < 2; w++)
            if (ops[i].wait[w]) llmpar__text_put(out, "%s%d", w && ops[i].wait[0] ? "," : "  after .", (int)ops[i].wait[w] - 1);
        llmpar__text_put(out, "\n");
    }
}

/* 1,048,576 B */
static void llmpar__schedule_put_bytes(llmpar__text *out, uint64_t bytes)
{
    uint64_t unit = 1;
    while (bytes / unit >= 1000) unit *= 1000;
    llmpar__text_put(out, "  %u", (unsigned)(bytes / unit));
    while (unit >= 1000) {
        unit /= 1000;
        llmpar__text_put(out, ",%03u", (unsigned)(bytes / unit % 1000));
    }
    llmpar__text_put(out, " B");
}

static void llmpar__schedule_put_operands(llmpar__text *out, const llmpar_unit *units, const llmpar_instruction *in, const llmpar_policy *policy)
{
    static const char *const state[] = {"optimizer", "params", "grads", "activations"};
    const char *kind = in->local ? "local" : "shard", *use = in->use ? ".borrowed" : "";
    int in_place = llmpar_policy_whole_grads(policy), on_host = policy->host_update && (in->op == LLMPAR_OP_OPTIM || in->op == LLMPAR_OP_CAST);
    if (in->unit >= 0) llmpar__text_put(out, " %s", units[in->unit].name);
    switch (in->op) {
    case LLMPAR_OP_FORWARD:
    case LLMPAR_OP_RECOMPUTE: llmpar__text_put(out, " mb%d%s", (int)in->micro_batch, in->again ? " again" : ""); break;
    case LLMPAR_OP_BACKWARD:
        llmpar__text_put(out, " mb%d%s", (int)in->micro_batch, in->again ? " again" : "");
        if (in->slot >= 0) llmpar__text_put(out, " -> %s%d", kind, (int)in->slot);
        if (in->from >= 0) llmpar__text_put(out, "%s %s.borrowed %s%d", in->slot >= 0 ? "," : " ->", units[units[in->unit].borrow - 1].name, kind, (int)in->from);
        break;
    case LLMPAR_OP_SCALAR_REDUCE: llmpar__text_put(out, "%s", in->pass ? " loss, norm" : " tokens"); break;
    case LLMPAR_OP_REDUCE:
        if (in_place) llmpar__text_put(out, "%s shard%d in place", use, (int)in->slot);
        else llmpar__text_put(out, "%s local%d -> shard%d", use, (int)in->from, (int)in->slot);
        break;
    case LLMPAR_OP_ACCUMULATE: llmpar__text_put(out, "%s %s%d += %s%s%d", use, kind, (int)in->slot, in->from_use != in->use ? "borrowed " : "", kind, (int)in->from); break;
    case LLMPAR_OP_FREE:
        if (in->slot >= 0) llmpar__text_put(out, "%s %s%d", use, kind, (int)in->slot);
        else if (in->what == LLMPAR_STATE_PARAMS) llmpar__text_put(out, " fetched shard");
        break;
    case LLMPAR_OP_REDUCE_REPLICA:
    case LLMPAR_OP_NORM:
    case LLMPAR_OP_OPTIM: llmpar__text_put(out, "%s %s%d%s", use, kind, (int)in->slot, on_host ? " on the host" : ""); break;
    case LLMPAR_OP_FETCH:
    case LLMPAR_OP_STORE:
        llmpar__text_put(out, "%s %s", use, state[in->what]);
        if (in->what == LLMPAR_STATE_GRADS) llmpar__text_put(out, " shard%d", (int)in->slot);
        if (in->what == LLMPAR_STATE_ACTIVATIONS) llmpar__text_put(out, " mb%d", (int)in->micro_batch);
        break;
    case LLMPAR_OP_CAST: llmpar__text_put(out, "%s", on_host ? " from the host" : ""); break;
    case LLMPAR_OP_GATHER: break;
    }
    if (in->predicate == LLMPAR_IF_FINITE) llmpar__text_put(out, " if finite");
}

LLMPAR_DEF size_t llmpar_schedule_print(const llmpar_schedule *schedule, const llmpar_unit *units, const uint64_t *bytes, char *text, size_t capacity)
{
    static const char *const stream[] = {"compute", "gather", "reduce", "tp", "offload"};
    llmpar__text out = llmpar__text_begin(text, capacity);
    for (int32_t i = 0; i < schedule->count; i++) {
        const llmpar_instruction *in = &schedule->list[i];
        llmpar__text_put(&out, "%5d  %-7s  %-14s", (int)i, stream[in->stream], llmpar_op_name(in->op));
        llmpar__schedule_put_operands(&out, units, in, &schedule->policy);
        if (bytes && bytes[i]) llmpar__schedule_put_bytes(&out, bytes[i]);
        for (int32_t w = 0; w < in->wait_count; w++) llmpar__text_put(&out, "%s%d", w ? "," : "  after ", (int)in->waits[w]);
        llmpar__text_put(&out, "\n");
        /* A unit's own list: the first time a unit with this list runs. */
        if (in->op != LLMPAR_OP_FORWARD && in->op != LLMPAR_OP_BACKWARD) continue;
        int seen = in->micro_batch > 0 || in->again;
        const llmpar_unit_op *ops = in->op == LLMPAR_OP_FORWARD ? units[in->unit].forward : units[in->unit].backward;
        for (int32_t j = 0; j < i && !seen; j++)
            if (schedule->list[j].op == in->op && (in->op == LLMPAR_OP_FORWARD ? units[schedule->list[j].unit].forward : units[schedule->list[j].unit].backward) == ops) seen = 1;
        if (!seen) llmpar__schedule_put_ops(&out, ops, in->op == LLMPAR_OP_FORWARD ? units[in->unit].forward_count : units[in->unit].backward_count);
    }
    return out.used;
}
