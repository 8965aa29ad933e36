#include "fsdp/fsdp_internal.h"

#include <string.h>

/* ---- a unit's own instructions ---- */

static llmpar_status llmpar__exec_trace_op(llmpar__exec *exec, const llmpar_unit_op *op, llmpar_stream *stream, uint64_t *id)
{
    LLMPAR__ZEROED(llmpar_trace_span, span);
    span.lane = (int32_t)LLMPAR_STREAM_TP;
    span.micro_batch = exec->now->micro_batch;
    span.name = op->name;
    span.unit = exec->fsdp->units[exec->now->unit].unit.name;
    span.category = "communication";
    return llmpar_trace_begin(exec->fsdp->trace, stream, &span, id);
}

static int llmpar__exec_on_tp(const llmpar_unit_op *ops, int32_t count)
{
    int on_tp = 0;
    for (int32_t i = 0; i < count; i++) on_tp |= ops[i].kind != LLMPAR_COMPUTE;
    return on_tp;
}

/* What only makes the output is left out of a RECOMPUTE; a wait for it is then a wait for the forward that ran it. */
static llmpar_status llmpar__exec_list(llmpar__exec *exec, const llmpar_unit_op *ops, int32_t count, llmpar_unit_call *call)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar_device *device = fsdp->device;
    llmpar_stream *compute = fsdp->stream[LLMPAR_STREAM_COMPUTE], *tp = fsdp->stream[LLMPAR_STREAM_TP];
    llmpar_status status = LLMPAR_OK;
    int used_tp = 0, streams = llmpar__exec_on_tp(ops, count) ? 2 : 1; /* on one nobody waits */
    for (int32_t i = 0; i < count && !status; i++) {
        int on_tp = ops[i].kind != LLMPAR_COMPUTE;
        if (call->pass == LLMPAR_PASS_RECOMPUTE && ops[i].output_only) continue;
        call->stream = on_tp ? tp : compute;
        if (on_tp && !used_tp) { /* whatever the unit reads was written on the compute stream before */
            status = device->event_record(device, compute, fsdp->unit_event[LLMPAR__UNIT_EVENTS]);
            if (!status) status = device->event_wait(device, tp, fsdp->unit_event[LLMPAR__UNIT_EVENTS]);
        }
        used_tp |= on_tp;
        for (int w = 0; w < 2 && !status; w++) {
            int32_t wait = ops[i].wait[w] - 1;
            if (wait < 0) continue;
            if (wait >= i) return llmpar_fail(fsdp->ctx, LLMPAR_ERR_SCHEDULE, "unit instruction %d (%s) waits for %d, expected an earlier one", (int)i, ops[i].name, (int)wait);
            if ((ops[wait].kind != LLMPAR_COMPUTE) != on_tp) status = device->event_wait(device, call->stream, fsdp->unit_event[wait]);
        }
        uint64_t span = 0;
        call->index = ops[i].index;
        if (!status && on_tp) status = llmpar__exec_trace_op(exec, &ops[i], call->stream, &span);
        if (!status) status = ops[i].run(call);
        if (!status) status = llmpar_trace_end(fsdp->trace, call->stream, span);
        if (!status && streams > 1) status = device->event_record(device, call->stream, fsdp->unit_event[i]);
    }
    /* The call's memory is released on the compute stream, so nothing of it may still run on the other. */
    if (used_tp && !status) status = device->event_record(device, tp, fsdp->unit_event[LLMPAR__UNIT_EVENTS]);
    if (used_tp && !status) status = device->event_wait(device, compute, fsdp->unit_event[LLMPAR__UNIT_EVENTS]);
    return status;
}

/* The same, where graphs were asked for as a region of the device: a unit's instructions come again with every step, with the same buffers mostly. */
static llmpar_status llmpar__exec_ops(llmpar__exec *exec, const llmpar_unit_op *ops, int32_t count, llmpar_unit_call *call)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar_device *device = fsdp->device;
    llmpar_stream *compute = fsdp->stream[LLMPAR_STREAM_COMPUTE];
    const llmpar_instruction *in = exec->now;
    if (!fsdp->graphs) return llmpar__exec_list(exec, ops, count, call);
    uint64_t key = (uint64_t)in->unit << 32 | (uint64_t)in->micro_batch << 3 | (uint64_t)call->pass << 1 | (in->again != 0);
    llmpar_status status = device->region_begin(device, compute, key);
    if (status) return status;
    status = llmpar__exec_list(exec, ops, count, call);
    llmpar_status ended = device->region_end(device, compute);
    return status ? status : ended;
}

/* Again where the shape is the one before's: to work them out asks the device about each product. */
LLMPAR__PRIVATE_DEF llmpar_status llmpar__exec_sizes(llmpar__exec *exec, int32_t unit, int32_t m, llmpar_unit_sizes *out)
{
    llmpar__flat *flat = &exec->fsdp->units[unit];
    const llmpar_micro *micro = &exec->micro[m], *like = flat->sized;
    llmpar_status status = LLMPAR_OK;
    if (!like || like->batch != micro->batch || like->t != micro->t || like->leaves != micro->leaves) status = llmpar__fsdp_unit_sizes(exec->fsdp, unit, flat->sized = micro, &flat->sizes);
    *out = flat->sizes;
    return status;
}

static void llmpar__exec_call(llmpar__exec *exec, const llmpar_instruction *in, llmpar_unit_call *call)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar__flat *flat = &fsdp->units[in->unit];
    int32_t borrow = flat->unit.borrow - 1;
    memset(call, 0, sizeof *call);
    call->ctx = fsdp->ctx;
    call->device = fsdp->device;
    call->user = flat->unit.user;
    call->micro = &exec->micro[in->micro_batch + (in->again ? exec->micro_batches : 0)];
    call->pass = in->op == LLMPAR_OP_BACKWARD ? LLMPAR_PASS_BACKWARD : in->op == LLMPAR_OP_RECOMPUTE ? LLMPAR_PASS_RECOMPUTE : (llmpar_pass)in->pass;
    call->dtype = fsdp->dtype;
    call->recompute = flat->unit.recompute;
    call->params = flat->params;
    if (borrow >= 0) call->borrowed = fsdp->units[borrow].params;
    call->input = in->unit > 0 ? fsdp->units[in->unit - 1].output[in->micro_batch] : NULL;
}

static llmpar_status llmpar__exec_activations(llmpar_fsdp *fsdp, const llmpar__flat *flat, size_t bytes, void **out)
{
    return llmpar__fsdp_alloc(fsdp, LLMPAR_STREAM_COMPUTE, LLMPAR_TAG_ACTIVATIONS, bytes, flat->label[LLMPAR__LABEL_ACTIVATIONS], out);
}

static llmpar_status llmpar__exec_scratch(llmpar__exec *exec, llmpar__flat *flat, const llmpar_unit_sizes *sizes, llmpar_unit_call *call)
{
    llmpar_status status = llmpar__exec_activations(exec->fsdp, flat, sizes->scratch, &call->scratch);
    if (!status) status = llmpar__fsdp_alloc(exec->fsdp, LLMPAR_STREAM_COMPUTE, LLMPAR_TAG_WORKSPACE, sizes->workspace, flat->label[LLMPAR__LABEL_ACTIVATIONS], &call->workspace);
    call->workspace_bytes = sizes->workspace;
    return status;
}

static llmpar_status llmpar__exec_release_scratch(llmpar__exec *exec, llmpar_unit_call *call, llmpar_status status)
{
    llmpar_status a = llmpar__fsdp_free(exec->fsdp, LLMPAR_STREAM_COMPUTE, &call->workspace);
    llmpar_status b = llmpar__fsdp_free(exec->fsdp, LLMPAR_STREAM_COMPUTE, &call->scratch);
    return status ? status : a ? a : b;
}

/* RECOMPUTE hands nothing on: its output, where the unit cannot leave it out, goes at once. */
LLMPAR__PRIVATE_DEF llmpar_status llmpar__exec_forward(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar__flat *flat = &fsdp->units[in->unit];
    int32_t m = in->micro_batch;
    int again = in->op == LLMPAR_OP_RECOMPUTE, eval = !again && in->pass == LLMPAR_PASS_EVAL;
    llmpar_unit_sizes sizes;
    llmpar_unit_call call;
    void *unused = NULL, **output = again ? &unused : &flat->output[m];
    llmpar__exec_call(exec, in, &call);
    llmpar_status status = llmpar__exec_sizes(exec, in->unit, m, &sizes);
    if (!status && sizes.output && !(again && llmpar__fsdp_leaves_output(&flat->unit))) status = llmpar__exec_activations(fsdp, flat, sizes.output, output);
    if (!status) status = llmpar__exec_activations(fsdp, flat, sizes.saved, &flat->saved[m]);
    if (!status) status = llmpar__exec_scratch(exec, flat, &sizes, &call);
    call.output = *output;
    call.saved = flat->saved[m];
    if (!status) status = llmpar__exec_ops(exec, flat->unit.forward, flat->unit.forward_count, &call);
    status = llmpar__exec_release_scratch(exec, &call, status);
    llmpar_status freed = llmpar__fsdp_free(fsdp, LLMPAR_STREAM_COMPUTE, &unused);
    if (!status) status = freed;
    if (!status && !again && (eval || flat->unit.recompute == LLMPAR_RECOMPUTE_FULL)) status = llmpar__fsdp_free(fsdp, LLMPAR_STREAM_COMPUTE, &flat->saved[m]);
    if (!status && eval && in->unit > 0) status = llmpar__fsdp_free(fsdp, LLMPAR_STREAM_COMPUTE, &fsdp->units[in->unit - 1].output[m]);
    return status;
}

/* A buffer for the whole gradient of a unit; its padding is zeroed, the rest is written by backward. */
static llmpar_status llmpar__exec_gradient(llmpar__exec *exec, int32_t unit, int32_t use, int32_t local, int32_t slot)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar__flat *flat = &fsdp->units[unit];
    size_t size = llmpar_dtype_size(fsdp->sum);
    void **buffer = &flat->grad[use][local][slot];
    int32_t n = flat->unit.param_count;
    if (!local) flat->reduced[use] &= ~(1u << slot);
    llmpar_status status = llmpar__fsdp_alloc(fsdp, LLMPAR_STREAM_COMPUTE, LLMPAR_TAG_GRADIENTS, (size_t)flat->elements * size, flat->label[LLMPAR__LABEL_GRADIENT], buffer);
    for (int32_t i = 0; i < n && !status; i++) {
        int64_t end = flat->offset[i] + flat->count[i], next = i + 1 < n ? flat->offset[i + 1] : flat->elements;
        flat->grads[use * n + i] = (char *)*buffer + (size_t)flat->offset[i] * size;
        if (next > end) status = fsdp->device->zero(fsdp->device, fsdp->stream[LLMPAR_STREAM_COMPUTE], (char *)*buffer + (size_t)end * size, (size_t)(next - end) * size);
    }
    if (n == 0 && !status) status = fsdp->device->zero(fsdp->device, fsdp->stream[LLMPAR_STREAM_COMPUTE], *buffer, (size_t)flat->elements * size);
    return status;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__exec_backward(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar__flat *flat = &fsdp->units[in->unit], *before = in->unit > 0 ? flat - 1 : NULL, *behind = in->unit + 1 < fsdp->unit_count ? flat + 1 : NULL;
    int32_t m = in->micro_batch, borrow = flat->unit.borrow - 1;
    llmpar_unit_sizes sizes, input;
    llmpar_unit_call call;
    llmpar__exec_call(exec, in, &call);
    llmpar_status status = llmpar__exec_sizes(exec, in->unit, m, &sizes);
    if (!status && in->slot >= 0) status = llmpar__exec_gradient(exec, in->unit, 0, in->local, in->slot);
    if (!status && borrow >= 0 && in->from >= 0) status = llmpar__exec_gradient(exec, borrow, 1, in->local, in->from);
    if (!status && in->unit > fsdp->first_backward) {
        status = llmpar__exec_sizes(exec, in->unit - 1, m, &input);
        if (!status) status = llmpar__exec_activations(fsdp, before, input.output, &flat->dinput[m]);
    }
    if (!status) status = llmpar__exec_scratch(exec, flat, &sizes, &call);
    if (in->slot >= 0) call.grads = flat->grads;
    if (borrow >= 0 && in->from >= 0) call.borrowed_grads = fsdp->units[borrow].grads + fsdp->units[borrow].unit.param_count;
    call.saved = flat->saved[m];
    call.doutput = behind ? behind->dinput[m] : NULL;
    call.dinput = flat->dinput[m];
    if (!status) status = llmpar__exec_ops(exec, flat->unit.backward, flat->unit.backward_count, &call);
    status = llmpar__exec_release_scratch(exec, &call, status);
    if (!status) status = llmpar__fsdp_free(fsdp, LLMPAR_STREAM_COMPUTE, &flat->saved[m]);
    if (!status && before) status = llmpar__fsdp_free(fsdp, LLMPAR_STREAM_COMPUTE, &before->output[m]);
    if (!status && behind) status = llmpar__fsdp_free(fsdp, LLMPAR_STREAM_COMPUTE, &behind->dinput[m]);
    return status;
}
