#include "fsdp/fsdp.h"
#include "fsdp/fsdp_internal.h"

#include <string.h>
#include <stdio.h>

#include "base/math.h"

/* One host thread walks the list. Data order between streams is in the list's waits; that freed memory may be handed to another stream
   is the executor's own concern: who allocates waits for the last release on every other stream. */
typedef struct llmpar__exec {
    llmpar_fsdp *fsdp;
    llmpar_run *run;
    llmpar_micro *micro;       /* [micro_batches] with grad_scale and loss filled in */
    int32_t micro_batches;
    int32_t found_inf;
    double grad_scale;         /* from the optimizer */
    int64_t nonfinite;         /* index of the first non-finite tensor */
} llmpar__exec;

/* ---- memory in stream order ---- */

static llmpar_status llmpar__exec_reuse(llmpar_fsdp *fsdp, llmpar_stream_id stream)
{
    for (int other = 0; other < LLMPAR_STREAM_COUNT; other++) {
        if (other == (int)stream || fsdp->free_seen[stream][other] == fsdp->free_serial[other]) continue;
        llmpar_status status = fsdp->device->event_wait(fsdp->device, fsdp->stream[stream], fsdp->free_event[other]);
        if (status) return status;
        fsdp->free_seen[stream][other] = fsdp->free_serial[other];
    }
    return LLMPAR_OK;
}

static llmpar_status llmpar__exec_alloc(llmpar_fsdp *fsdp, llmpar_stream_id stream, llmpar_tag tag, size_t bytes, const char *label, void **out)
{
    llmpar_status status = llmpar__exec_reuse(fsdp, stream);
    return status ? status : llmpar_arena_alloc(fsdp->arena, tag, bytes, label, out);
}

static llmpar_status llmpar__exec_freed(llmpar_fsdp *fsdp, llmpar_stream_id stream)
{
    fsdp->free_serial[stream]++;
    return fsdp->device->event_record(fsdp->device, fsdp->stream[stream], fsdp->free_event[stream]);
}

static llmpar_status llmpar__exec_free(llmpar_fsdp *fsdp, llmpar_stream_id stream, void **memory)
{
    if (!*memory) return LLMPAR_OK;
    llmpar_arena_free(fsdp->arena, *memory);
    *memory = NULL;
    return llmpar__exec_freed(fsdp, stream);
}

/* ---- a unit's own instructions ---- */

static llmpar_status llmpar__exec_ops(llmpar__exec *exec, const llmpar_unit_op *ops, int32_t count, llmpar_unit_call *call)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar_device *device = fsdp->device;
    llmpar_stream *compute = fsdp->stream[LLMPAR_STREAM_COMPUTE], *tp = fsdp->stream[LLMPAR_STREAM_TP];
    llmpar_status status = LLMPAR_OK;
    int used_tp = 0;
    for (int32_t i = 0; i < count && !status; i++) {
        int on_tp = ops[i].kind != LLMPAR_COMPUTE;
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
        call->index = ops[i].index;
        if (!status) status = ops[i].run(call);
        if (!status) status = device->event_record(device, call->stream, fsdp->unit_event[i]);
    }
    /* The call's memory is released on the compute stream, so nothing of it may still run on the other. */
    if (used_tp && !status) status = device->event_record(device, tp, fsdp->unit_event[LLMPAR__UNIT_EVENTS]);
    if (used_tp && !status) status = device->event_wait(device, compute, fsdp->unit_event[LLMPAR__UNIT_EVENTS]);
    return status;
}

static llmpar_status llmpar__exec_sizes(llmpar__exec *exec, int32_t unit, int32_t m, llmpar_unit_sizes *out)
{
    const llmpar_unit *u = &exec->fsdp->units[unit].unit;
    memset(out, 0, sizeof *out);
    out->recompute = (int32_t)u->recompute;
    return u->sizes(u->user, &exec->micro[m], exec->fsdp->dtype, out);
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
    call->micro = &exec->micro[in->micro_batch];
    call->pass = in->op == LLMPAR_OP_BACKWARD ? LLMPAR_PASS_BACKWARD : (llmpar_pass)in->pass;
    call->dtype = fsdp->dtype;
    call->recompute = flat->unit.recompute;
    call->params = flat->params;
    if (borrow >= 0) call->borrowed = fsdp->units[borrow].params;
    call->input = in->unit > 0 ? fsdp->units[in->unit - 1].output[in->micro_batch] : NULL;
}

static llmpar_status llmpar__exec_scratch(llmpar__exec *exec, llmpar__flat *flat, const llmpar_unit_sizes *sizes, llmpar_unit_call *call)
{
    llmpar_status status = llmpar__exec_alloc(exec->fsdp, LLMPAR_STREAM_COMPUTE, LLMPAR_TAG_ACTIVATIONS, sizes->scratch, flat->label[LLMPAR__LABEL_ACTIVATIONS], &call->scratch);
    if (!status) status = llmpar__exec_alloc(exec->fsdp, LLMPAR_STREAM_COMPUTE, LLMPAR_TAG_WORKSPACE, sizes->workspace, flat->label[LLMPAR__LABEL_ACTIVATIONS], &call->workspace);
    call->workspace_bytes = sizes->workspace;
    return status;
}

static llmpar_status llmpar__exec_release_scratch(llmpar__exec *exec, llmpar_unit_call *call, llmpar_status status)
{
    llmpar_status a = llmpar__exec_free(exec->fsdp, LLMPAR_STREAM_COMPUTE, &call->workspace);
    llmpar_status b = llmpar__exec_free(exec->fsdp, LLMPAR_STREAM_COMPUTE, &call->scratch);
    return status ? status : a ? a : b;
}

static llmpar_status llmpar__exec_forward(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar__flat *flat = &fsdp->units[in->unit];
    int32_t m = in->micro_batch;
    llmpar_unit_sizes sizes;
    llmpar_unit_call call;
    llmpar__exec_call(exec, in, &call);
    llmpar_status status = llmpar__exec_sizes(exec, in->unit, m, &sizes);
    if (!status && sizes.output) status = llmpar__exec_alloc(fsdp, LLMPAR_STREAM_COMPUTE, LLMPAR_TAG_ACTIVATIONS, sizes.output, flat->label[LLMPAR__LABEL_ACTIVATIONS], &flat->output[m]);
    if (!status) status = llmpar__exec_alloc(fsdp, LLMPAR_STREAM_COMPUTE, LLMPAR_TAG_ACTIVATIONS, sizes.saved, flat->label[LLMPAR__LABEL_ACTIVATIONS], &flat->saved[m]);
    if (!status) status = llmpar__exec_scratch(exec, flat, &sizes, &call);
    call.output = flat->output[m];
    call.saved = flat->saved[m];
    if (!status) status = llmpar__exec_ops(exec, flat->unit.forward, flat->unit.forward_count, &call);
    status = llmpar__exec_release_scratch(exec, &call, status);
    if (status || in->pass != LLMPAR_PASS_EVAL) return status;
    status = llmpar__exec_free(fsdp, LLMPAR_STREAM_COMPUTE, &flat->saved[m]);
    if (!status && in->unit > 0) status = llmpar__exec_free(fsdp, LLMPAR_STREAM_COMPUTE, &fsdp->units[in->unit - 1].output[m]);
    return status;
}

/* A buffer for the whole gradient of a unit; its padding is zeroed, the rest is written by backward. */
static llmpar_status llmpar__exec_gradient(llmpar__exec *exec, int32_t unit, int32_t use, int32_t local, int32_t slot)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar__flat *flat = &fsdp->units[unit];
    size_t size = llmpar_dtype_size(fsdp->dtype);
    void **buffer = &flat->grad[use][local][slot];
    int32_t n = flat->unit.param_count;
    llmpar_status status = llmpar__exec_alloc(fsdp, LLMPAR_STREAM_COMPUTE, LLMPAR_TAG_GRADIENTS, (size_t)flat->elements * size, flat->label[LLMPAR__LABEL_GRADIENT], buffer);
    for (int32_t i = 0; i < n && !status; i++) {
        int64_t end = flat->offset[i] + flat->count[i], next = i + 1 < n ? flat->offset[i + 1] : flat->elements;
        flat->grads[use * n + i] = (char *)*buffer + (size_t)flat->offset[i] * size;
        if (next > end) status = fsdp->device->zero(fsdp->device, fsdp->stream[LLMPAR_STREAM_COMPUTE], (char *)*buffer + (size_t)end * size, (size_t)(next - end) * size);
    }
    if (n == 0 && !status) status = fsdp->device->zero(fsdp->device, fsdp->stream[LLMPAR_STREAM_COMPUTE], *buffer, (size_t)flat->elements * size);
    return status;
}

static llmpar_status llmpar__exec_backward(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar__flat *flat = &fsdp->units[in->unit], *before = in->unit > 0 ? flat - 1 : NULL, *behind = in->unit + 1 < fsdp->unit_count ? flat + 1 : NULL;
    int32_t m = in->micro_batch, borrow = flat->unit.borrow - 1;
    llmpar_unit_sizes sizes, input;
    llmpar_unit_call call;
    llmpar__exec_call(exec, in, &call);
    llmpar_status status = llmpar__exec_sizes(exec, in->unit, m, &sizes);
    if (!status) status = llmpar__exec_gradient(exec, in->unit, 0, in->local, in->slot);
    if (!status && borrow >= 0) status = llmpar__exec_gradient(exec, borrow, 1, in->local, in->from);
    if (!status && before) {
        status = llmpar__exec_sizes(exec, in->unit - 1, m, &input);
        if (!status) status = llmpar__exec_alloc(fsdp, LLMPAR_STREAM_COMPUTE, LLMPAR_TAG_ACTIVATIONS, input.output, before->label[LLMPAR__LABEL_ACTIVATIONS], &flat->dinput[m]);
    }
    if (!status) status = llmpar__exec_scratch(exec, flat, &sizes, &call);
    call.grads = flat->grads;
    if (borrow >= 0) call.borrowed_grads = fsdp->units[borrow].grads + fsdp->units[borrow].unit.param_count;
    call.saved = flat->saved[m];
    call.doutput = behind ? behind->dinput[m] : NULL;
    call.dinput = flat->dinput[m];
    if (!status) status = llmpar__exec_ops(exec, flat->unit.backward, flat->unit.backward_count, &call);
    status = llmpar__exec_release_scratch(exec, &call, status);
    if (!status) status = llmpar__exec_free(fsdp, LLMPAR_STREAM_COMPUTE, &flat->saved[m]);
    if (!status && before) status = llmpar__exec_free(fsdp, LLMPAR_STREAM_COMPUTE, &before->output[m]);
    if (!status && behind) status = llmpar__exec_free(fsdp, LLMPAR_STREAM_COMPUTE, &behind->dinput[m]);
    return status;
}

/* ---- gradients ---- */

static llmpar_status llmpar__exec_reduce(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar__flat *flat = &fsdp->units[in->unit];
    void **shard = &flat->grad[in->use][0][in->slot];
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.dtype = fsdp->dtype;
    call.count = (size_t)flat->shard_elements;
    if (in->op == LLMPAR_OP_REDUCE) {
        llmpar_status status = llmpar__exec_alloc(fsdp, in->stream, LLMPAR_TAG_GRADIENTS, call.count * llmpar_dtype_size(fsdp->dtype), flat->label[LLMPAR__LABEL_GRADIENT], shard);
        if (status) return status;
        call.send = flat->grad[in->use][1][in->from];
        call.recv = *shard;
        call.tag = flat->label[LLMPAR__LABEL_REDUCE];
        return llmpar_reduce_scatter(fsdp->shard_comm, fsdp->stream[in->stream], &call);
    }
    call.send = call.recv = *shard;
    call.tag = flat->label[LLMPAR__LABEL_REPLICA];
    return llmpar_all_reduce(fsdp->replica_comm, fsdp->stream[in->stream], &call);
}

static llmpar_status llmpar__exec_accumulate(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar__flat *flat = &fsdp->units[in->unit];
    void **to = &flat->grad[in->use][in->local][in->slot], **from = &flat->grad[in->from_use][in->local][in->from];
    llmpar_add_args args;
    memset(&args, 0, sizeof args);
    args.count = (size_t)(in->local ? flat->elements : flat->shard_elements);
    args.a = *to; /* the lower micro-batch, on the left */
    args.b = *from;
    args.out = *to;
    args.dtype = fsdp->dtype;
    llmpar_status status = fsdp->device->add(fsdp->device, fsdp->stream[in->stream], &args);
    return status ? status : llmpar__exec_free(fsdp, in->stream, from);
}

static llmpar_status llmpar__exec_norm(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar__flat *flat = &fsdp->units[in->unit];
    llmpar_status status = LLMPAR_OK;
    for (int32_t s = 0; s < flat->segment_count && !status; s++) {
        const llmpar_segment *segment = &flat->segments[s];
        if (!segment->owner) continue;
        llmpar_square_sum_args args;
        memset(&args, 0, sizeof args);
        args.count = (size_t)segment->count;
        args.x = (const char *)flat->grad[in->use][0][in->slot] + (size_t)segment->begin * llmpar_dtype_size(fsdp->dtype);
        args.accumulator = fsdp->scalars + LLMPAR_EXACT_SUM_LIMBS;
        args.dtype = fsdp->dtype;
        status = fsdp->device->square_sum(fsdp->device, fsdp->stream[in->stream], &args);
    }
    return status;
}

/* ---- scalars ---- */

static llmpar_status llmpar__exec_scalars(llmpar__exec *exec, const llmpar_instruction *in, int64_t *values, size_t count, const char *tag)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar_stream *stream = fsdp->stream[in->stream];
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.send = call.recv = fsdp->scalars;
    call.count = count;
    call.dtype = LLMPAR_I64;
    call.tag = tag;
    llmpar_status status = fsdp->device->copy(fsdp->device, stream, fsdp->scalars, values, count * sizeof *values);
    if (!status) status = llmpar_all_reduce(fsdp->mesh->world, stream, &call);
    if (!status) status = fsdp->device->copy(fsdp->device, stream, values, fsdp->scalars, count * sizeof *values);
    llmpar_status waited = fsdp->device->synchronize(fsdp->device, stream); /* in any case: the stream may read the caller's values */
    return status ? status : waited;
}

static llmpar_status llmpar__exec_tokens(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    /* Every rank of a tp group holds the same sequences: they count once. */
    int64_t tokens = fsdp->mesh->coordinate[LLMPAR_AXIS_TP] == 0 ? exec->run->tokens : 0;
    llmpar_status status = llmpar__exec_scalars(exec, in, &tokens, 1, "tokens");
    if (status) return status;
    exec->run->global_tokens = tokens;
    for (int32_t m = 0; m < exec->micro_batches; m++) exec->micro[m].grad_scale = tokens ? (float)(exec->run->loss_scale / (double)tokens) : 0.0f;
    /* Loss and norm start from zero before any stream adds to them. */
    status = fsdp->device->zero(fsdp->device, fsdp->stream[in->stream], fsdp->scalars, LLMPAR__SCALARS * sizeof(int64_t));
    return status ? status : fsdp->device->synchronize(fsdp->device, fsdp->stream[in->stream]);
}

static llmpar_status llmpar__exec_loss(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar_run *run = exec->run;
    llmpar_exact_sum sum[2];
    llmpar_status status = fsdp->device->copy(fsdp->device, fsdp->stream[in->stream], sum, fsdp->scalars, sizeof sum);
    if (!status) status = fsdp->device->synchronize(fsdp->device, fsdp->stream[in->stream]);
    if (status) return status;
    if (fsdp->mesh->coordinate[LLMPAR_AXIS_TP] != 0) memset(&sum[0], 0, sizeof sum[0]); /* all of a tp group computed the same loss */
    llmpar_exact_sum_carry(&sum[0]);
    llmpar_exact_sum_carry(&sum[1]);
    status = llmpar__exec_scalars(exec, in, sum[0].limb, LLMPAR__SCALARS, "loss, norm");
    if (status) return status;
    run->loss = run->global_tokens ? llmpar_exact_sum_value(&sum[0]) / (double)run->global_tokens : 0;
    run->grad_norm = llmpar_sqrt_f64(llmpar_exact_sum_value(&sum[1])) / run->loss_scale;
    run->skipped = run->global_tokens == 0;
    exec->found_inf = !llmpar_isfinite_f64(run->loss) || !llmpar_isfinite_f64(run->grad_norm);
    if (exec->found_inf) return llmpar__fsdp_first_nonfinite(fsdp, &exec->nonfinite);
    if (run->optimizer && run->optimizer->begin_step && !run->skipped) status = run->optimizer->begin_step(run->optimizer->state, run->grad_norm, &exec->grad_scale);
    exec->grad_scale /= run->loss_scale;
    return status;
}

static llmpar_status llmpar__exec_optim(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar_run *run = exec->run;
    llmpar__flat *flat = &fsdp->units[in->unit];
    void **grad = &flat->grad[in->use][0][in->slot];
    llmpar_status status = LLMPAR_OK;
    if (run->on_gradient) {
        status = fsdp->device->synchronize(fsdp->device, fsdp->stream[in->stream]);
        if (!status) status = run->on_gradient(run->on_gradient_user, fsdp, in->unit, *grad);
    }
    if (!status && run->optimizer && !exec->found_inf && !run->skipped) {
        llmpar_update update;
        memset(&update, 0, sizeof update);
        update.unit = in->unit;
        update.dtype = fsdp->dtype;
        update.elements = flat->shard_elements;
        update.param = flat->shard;
        update.grad = *grad;
        for (int i = 0; i < LLMPAR_OPTIMIZER_STATES; i++) update.state[i] = flat->state[i];
        update.segments = flat->segments;
        update.segment_count = flat->segment_count;
        update.grad_scale = exec->grad_scale;
        update.stream = fsdp->stream[in->stream];
        status = run->optimizer->update(run->optimizer->state, &update);
    }
    return status ? status : llmpar__exec_free(fsdp, in->stream, grad);
}

/* ---- the walk ---- */

static llmpar_status llmpar__exec_instruction(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar_status status;
    switch (in->op) {
    case LLMPAR_OP_GATHER:
        status = llmpar__exec_reuse(fsdp, in->stream);
        return status ? status : llmpar__fsdp_gather(fsdp, &fsdp->units[in->unit], fsdp->stream[in->stream]);
    case LLMPAR_OP_FREE:
        if (in->slot >= 0) return llmpar__exec_free(fsdp, in->stream, &fsdp->units[in->unit].grad[in->use][in->local][in->slot]);
        llmpar__fsdp_release(fsdp, &fsdp->units[in->unit]);
        return llmpar__exec_freed(fsdp, in->stream);
    case LLMPAR_OP_FORWARD: return llmpar__exec_forward(exec, in);
    case LLMPAR_OP_BACKWARD: return llmpar__exec_backward(exec, in);
    case LLMPAR_OP_REDUCE:
    case LLMPAR_OP_REDUCE_REPLICA: return llmpar__exec_reduce(exec, in);
    case LLMPAR_OP_ACCUMULATE: return llmpar__exec_accumulate(exec, in);
    case LLMPAR_OP_NORM: return llmpar__exec_norm(exec, in);
    case LLMPAR_OP_SCALAR_REDUCE: return in->pass ? llmpar__exec_loss(exec, in) : llmpar__exec_tokens(exec, in);
    case LLMPAR_OP_OPTIM: return llmpar__exec_optim(exec, in);
    case LLMPAR_OP_RECOMPUTE:
    case LLMPAR_OP_CAST:
    case LLMPAR_OP_FETCH:
    case LLMPAR_OP_STORE: break;
    }
    return llmpar_fail(fsdp->ctx, LLMPAR_ERR_SCHEDULE, "no op %d", (int)in->op);
}

static llmpar_status llmpar__exec_walk(llmpar__exec *exec, const llmpar_instruction *list, int32_t count, const unsigned char *awaited)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar_status status = LLMPAR_OK;
    for (int32_t i = 0; i < count && !status; i++) {
        const llmpar_instruction *in = &list[i];
        for (int32_t w = 0; w < in->wait_count && !status; w++)
            if (list[in->waits[w]].stream != in->stream) status = fsdp->device->event_wait(fsdp->device, fsdp->stream[in->stream], fsdp->event[in->waits[w]]);
        if (!status) status = llmpar__exec_instruction(exec, in);
        if (!status && awaited[i]) status = fsdp->device->event_record(fsdp->device, fsdp->stream[in->stream], fsdp->event[i]);
    }
    for (int s = 0; s < LLMPAR_STREAM_COUNT; s++) {
        llmpar_status sync = fsdp->device->synchronize(fsdp->device, fsdp->stream[s]);
        if (!status) status = sync;
    }
    return status;
}

/* Events for the instructions that somebody waits for; they stay for the next step. */
static llmpar_status llmpar__exec_events(llmpar_fsdp *fsdp, const llmpar_instruction *list, int32_t count, unsigned char *awaited)
{
    llmpar_heap *heap = &fsdp->ctx->heap;
    if (count > fsdp->event_count) {
        llmpar_event **event = (llmpar_event **)llmpar_heap_zalloc(heap, (size_t)count, sizeof *event);
        if (!event) return llmpar_fail(fsdp->ctx, LLMPAR_ERR_MEMORY, "no memory for %d events", (int)count);
        if (fsdp->event_count) memcpy(event, fsdp->event, (size_t)fsdp->event_count * sizeof *event);
        llmpar_heap_free(heap, fsdp->event);
        fsdp->event = event;
        fsdp->event_count = count;
    }
    for (int32_t i = 0; i < count; i++)
        for (int32_t w = 0; w < list[i].wait_count; w++)
            if (list[list[i].waits[w]].stream != list[i].stream) awaited[list[i].waits[w]] = 1;
    for (int32_t i = 0; i < count; i++)
        if (awaited[i] && !fsdp->event[i]) {
            llmpar_status status = fsdp->device->event_create(fsdp->device, &fsdp->event[i]);
            if (status) return status;
        }
    return LLMPAR_OK;
}

/* Whatever an interrupted step left behind. */
static void llmpar__exec_clean(llmpar__exec *exec)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    for (int32_t u = 0; u < fsdp->unit_count; u++) {
        llmpar__flat *flat = &fsdp->units[u];
        for (int i = 0; i < 4 * LLMPAR_GRAD_SLOTS; i++) {
            void **grad = &flat->grad[i / (2 * LLMPAR_GRAD_SLOTS)][i / LLMPAR_GRAD_SLOTS % 2][i % LLMPAR_GRAD_SLOTS];
            llmpar_arena_free(fsdp->arena, *grad);
            *grad = NULL;
        }
        void ***lists[3] = {&flat->output, &flat->saved, &flat->dinput};
        for (int k = 0; k < 3; k++) {
            for (int32_t m = 0; m < exec->micro_batches && *lists[k]; m++) llmpar_arena_free(fsdp->arena, (*lists[k])[m]);
            llmpar_heap_free(&fsdp->ctx->heap, *lists[k]);
            *lists[k] = NULL;
        }
        while (!fsdp->unsharded && flat->gathers > 0) llmpar__fsdp_release(fsdp, flat);
    }
}

static llmpar_status llmpar__exec_report(llmpar__exec *exec)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    int64_t index = exec->nonfinite;
    const char *what = index >= ((int64_t)1 << 40) ? "the gradient of " : "", *name = "no parameter or gradient (an activation)";
    if (index >= 0) name = fsdp->units[(index >> 16) & 0xffffff].unit.params[index & 0xffff].name;
    return llmpar_fail(fsdp->ctx, LLMPAR_ERR_NONFINITE, "loss %g, gradient norm %g: expected finite values; first non-finite tensor: %s%s", exec->run->loss, exec->run->grad_norm, what, name);
}

LLMPAR_DEF llmpar_status llmpar_fsdp_run(llmpar_fsdp *fsdp, const llmpar_instruction *list, int32_t count, llmpar_run *run)
{
    llmpar_heap *heap = &fsdp->ctx->heap;
    llmpar__exec exec;
    memset(&exec, 0, sizeof exec);
    exec.fsdp = fsdp;
    exec.run = run;
    exec.grad_scale = 1;
    exec.nonfinite = -1;
    if (run->loss_scale == 0) run->loss_scale = 1;
    run->loss = run->grad_norm = 0;
    run->global_tokens = 0;
    run->skipped = 0;
    for (int32_t i = 0; i < count; i++)
        if (list[i].micro_batch >= exec.micro_batches) exec.micro_batches = list[i].micro_batch + 1;
    for (int32_t u = 0; u < fsdp->unit_count; u++)
        if (fsdp->units[u].gathers) return llmpar_fail(fsdp->ctx, LLMPAR_ERR_ARGUMENT, "unit %s: still unsharded by hand, expected reshard before a step", fsdp->units[u].unit.name);
    unsigned char *awaited = (unsigned char *)llmpar_heap_zalloc(heap, (size_t)count + 1, 1);
    exec.micro = (llmpar_micro *)llmpar_heap_alloc(heap, (size_t)exec.micro_batches + 1, sizeof *exec.micro);
    llmpar_status status = LLMPAR_OK;
    if (!awaited || !exec.micro) status = llmpar_fail(fsdp->ctx, LLMPAR_ERR_MEMORY, "no memory for a step of %d instructions", (int)count);
    for (int32_t m = 0; m < exec.micro_batches && !status; m++) {
        exec.micro[m] = run->micro[m];
        exec.micro[m].index = m;
        exec.micro[m].loss = fsdp->scalars;
    }
    for (int32_t u = 0; u < fsdp->unit_count && !status; u++) {
        llmpar__flat *flat = &fsdp->units[u];
        flat->output = (void **)llmpar_heap_zalloc(heap, (size_t)exec.micro_batches, sizeof(void *));
        flat->saved = (void **)llmpar_heap_zalloc(heap, (size_t)exec.micro_batches, sizeof(void *));
        flat->dinput = (void **)llmpar_heap_zalloc(heap, (size_t)exec.micro_batches, sizeof(void *));
        if (!flat->output || !flat->saved || !flat->dinput) status = llmpar_fail(fsdp->ctx, LLMPAR_ERR_MEMORY, "no memory for %d micro-batches", (int)exec.micro_batches);
    }
    if (!status) status = llmpar__exec_events(fsdp, list, count, awaited);
    if (!status) status = llmpar__exec_walk(&exec, list, count, awaited);
    llmpar__exec_clean(&exec);
    llmpar_heap_free(heap, exec.micro);
    llmpar_heap_free(heap, awaited);
    if (!status && exec.found_inf) status = llmpar__exec_report(&exec);
    return status;
}
