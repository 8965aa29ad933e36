#include "fsdp/fsdp.h"
#include "fsdp/fsdp_internal.h"

#include <stdio.h>
#include <string.h>

#include "base/math.h"

/* One host thread walks the list: it allocates, enqueues and frees in list order; data order between streams is in the list's waits. */

/* ---- scalars ---- */

/* fsdp->host_scalars[count] become the sums over all ranks. */
static llmpar_status llmpar__exec_scalars(llmpar__exec *exec, const llmpar_instruction *in, size_t count, const char *tag)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar_stream *stream = fsdp->stream[in->stream];
    const llmpar_collective call = llmpar__comm_collective(fsdp->scalars, fsdp->scalars, count, LLMPAR_I64, tag);
    llmpar_status status = fsdp->device->copy(fsdp->device, stream, fsdp->scalars, fsdp->host_scalars, count * sizeof(int64_t));
    if (!status) status = llmpar_all_reduce(fsdp->mesh->world, stream, &call);
    if (!status) status = fsdp->device->copy(fsdp->device, stream, fsdp->host_scalars, fsdp->scalars, count * sizeof(int64_t));
    return llmpar__device_done(fsdp->device, stream, status);
}

static llmpar_status llmpar__exec_begin(llmpar__exec *exec, double norm)
{
    llmpar_run *run = exec->run;
    llmpar_status status = LLMPAR_OK;
    exec->grad_scale = 1;
    if (run->optimizer && run->optimizer->begin_step) status = run->optimizer->begin_step(run->optimizer->state, norm, &exec->grad_scale);
    exec->grad_scale /= run->loss_scale;
    return status;
}

static llmpar_status llmpar__exec_tokens(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    /* Every rank of a tp group holds the same sequences: they count once. */
    fsdp->host_scalars[0] = fsdp->mesh->coordinate[LLMPAR_AXIS_TP] == 0 ? exec->run->tokens : 0;
    llmpar_status status = llmpar__exec_scalars(exec, in, 1, "tokens");
    if (status) return status;
    int64_t tokens = fsdp->host_scalars[0];
    exec->run->global_tokens = tokens;
    for (int32_t m = 0; m < 2 * exec->micro_batches; m++) exec->micro[m].grad_scale = tokens ? (float)(exec->run->loss_scale / (double)tokens) : 0.0f;
    /* Loss and norm start from zero before any stream adds to them. */
    status = fsdp->device->zero(fsdp->device, fsdp->stream[in->stream], fsdp->scalars, (LLMPAR__SCALARS + LLMPAR_EXACT_SUM_LIMBS) * sizeof(int64_t));
    status = llmpar__device_done(fsdp->device, fsdp->stream[in->stream], status);
    if (!status && exec->inside && tokens) status = llmpar__exec_begin(exec, -1);
    return status;
}

static llmpar_status llmpar__exec_loss(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar_run *run = exec->run;
    llmpar_exact_sum sum[2];
    llmpar_status status = fsdp->device->copy(fsdp->device, fsdp->stream[in->stream], fsdp->host_scalars, fsdp->scalars, sizeof sum);
    if (!status) status = fsdp->device->synchronize(fsdp->device, fsdp->stream[in->stream]);
    if (status) return status;
    memcpy(sum, fsdp->host_scalars, sizeof sum);
    if (fsdp->mesh->coordinate[LLMPAR_AXIS_TP] != 0) memset(&sum[0], 0, sizeof sum[0]); /* all of a tp group computed the same loss */
    llmpar_exact_sum_carry(&sum[0]);
    llmpar_exact_sum_carry(&sum[1]);
    memcpy(fsdp->host_scalars, sum, sizeof sum);
    status = llmpar__exec_scalars(exec, in, LLMPAR__SCALARS, "loss, norm");
    if (status) return status;
    memcpy(sum, fsdp->host_scalars, sizeof sum);
    run->loss = run->global_tokens ? llmpar_exact_sum_value(&sum[0]) / (double)run->global_tokens : 0;
    run->grad_norm = llmpar_sqrt_f64(llmpar_exact_sum_value(&sum[1])) / run->loss_scale;
    run->skipped = run->global_tokens == 0;
    exec->found_inf = !llmpar_isfinite_f64(run->loss) || !llmpar_isfinite_f64(run->grad_norm);
    if (exec->found_inf && run->skip_nonfinite) return LLMPAR_OK;
    if (exec->found_inf) return llmpar__fsdp_first_nonfinite(fsdp, &exec->nonfinite);
    return exec->inside || run->skipped ? LLMPAR_OK : llmpar__exec_begin(exec, run->grad_norm);
}

/* ---- the walk ---- */

static llmpar_status llmpar__exec_instruction(llmpar__exec *exec, const llmpar_instruction *in)
{
    switch (in->op) {
    case LLMPAR_OP_FORWARD:
    case LLMPAR_OP_RECOMPUTE: return llmpar__exec_forward(exec, in);
    case LLMPAR_OP_BACKWARD: return llmpar__exec_backward(exec, in);
    case LLMPAR_OP_SCALAR_REDUCE: return in->pass ? llmpar__exec_loss(exec, in) : llmpar__exec_tokens(exec, in);
    default: return llmpar__exec_shard(exec, in);
    }
}

LLMPAR_DEF void llmpar_fsdp_set_trace(llmpar_fsdp *fsdp, llmpar_trace *trace)
{
    static const char *const name[LLMPAR_STREAM_COUNT] = {"compute", "gather", "reduce", "tp", "offload"};
    fsdp->trace = trace;
    for (int32_t s = 0; s < (int32_t)LLMPAR_STREAM_COUNT; s++) llmpar_trace_lane(trace, s, name[s]);
}

static const char *llmpar__exec_category(llmpar_op op)
{
    switch (op) {
    case LLMPAR_OP_GATHER:
    case LLMPAR_OP_REDUCE:
    case LLMPAR_OP_REDUCE_REPLICA:
    case LLMPAR_OP_SCALAR_REDUCE: return "communication";
    case LLMPAR_OP_FETCH:
    case LLMPAR_OP_STORE: return "offload";
    case LLMPAR_OP_FORWARD:
    case LLMPAR_OP_RECOMPUTE:
    case LLMPAR_OP_BACKWARD: return "compute";
    default: return "update";
    }
}

/* A FREE takes no time: it shows in the bytes. */
static llmpar_status llmpar__exec_trace(llmpar__exec *exec, const llmpar_instruction *in, uint64_t *id)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    *id = 0;
    if (!fsdp->trace || in->op == LLMPAR_OP_FREE) return LLMPAR_OK;
    LLMPAR__ZEROED(llmpar_schedule, one);
    LLMPAR__ZEROED(llmpar_trace_span, span);
    one.list = (llmpar_instruction *)(uintptr_t)in;
    one.count = 1;
    span.lane = (int32_t)in->stream;
    span.micro_batch = in->micro_batch;
    span.name = llmpar_op_name(in->op);
    span.unit = in->unit >= 0 ? fsdp->units[in->unit].unit.name : NULL;
    span.category = llmpar__exec_category(in->op);
    llmpar_status status = llmpar_fsdp_bytes(fsdp, &one, &exec->micro[in->micro_batch >= 0 ? in->micro_batch : 0], &span.bytes);
    return status ? status : llmpar_trace_begin(fsdp->trace, fsdp->stream[in->stream], &span, id);
}

static void llmpar__exec_trace_memory(llmpar_fsdp *fsdp)
{
    llmpar_arena_usage usage;
    if (!fsdp->trace) return;
    llmpar_arena_get_usage(fsdp->arena, &usage);
    llmpar_trace_memory(fsdp->trace, &usage);
}

static llmpar_status llmpar__exec_walk(llmpar__exec *exec, const llmpar_instruction *list, int32_t count, const unsigned char *awaited)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar_status status = LLMPAR_OK;
    for (int32_t i = 0; i < count && !status; i++) {
        const llmpar_instruction *in = exec->now = &list[i];
        uint64_t span = 0;
        for (int32_t w = 0; w < in->wait_count && !status; w++)
            if (list[in->waits[w]].stream != in->stream) status = fsdp->device->event_wait(fsdp->device, fsdp->stream[in->stream], fsdp->event[in->waits[w]]);
        if (!status) status = llmpar__exec_trace(exec, in, &span);
        if (!status) status = llmpar__exec_instruction(exec, in);
        if (!status) status = llmpar_trace_end(fsdp->trace, fsdp->stream[in->stream], span);
        llmpar__exec_trace_memory(fsdp);
        if (!status && awaited[i]) status = fsdp->device->event_record(fsdp->device, fsdp->stream[in->stream], fsdp->event[i]);
    }
    for (int s = 0; s < LLMPAR_STREAM_COUNT; s++) status = llmpar__device_done(fsdp->device, fsdp->stream[s], status);
    return llmpar__store_failed(fsdp->store, status);
}

/* Events for the instructions that somebody waits for; they stay for the next step. */
static llmpar_status llmpar__exec_events(llmpar_fsdp *fsdp, const llmpar_instruction *list, int32_t count, unsigned char *awaited)
{
    llmpar_heap *heap = &fsdp->ctx->heap;
    if (count > fsdp->event_count) {
        llmpar_event **event = LLMPAR__ZALLOC(llmpar_event *, heap, (size_t)count);
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
        while (!fsdp->whole_params && flat->gathers > 0) llmpar__fsdp_release(fsdp, flat, LLMPAR_STREAM_COMPUTE);
        for (int what = LLMPAR_STATE_OPTIMIZER; what <= LLMPAR_STATE_PARAMS; what++) {
            llmpar__moved moved[2];
            int32_t count = fsdp->tier[what] == LLMPAR_TIER_DEVICE ? 0 : llmpar__fsdp_moved(fsdp, u, (llmpar_state)what, 0, 0, 0, moved);
            for (int32_t i = 0; i < count; i++) llmpar__fsdp_put(fsdp, LLMPAR_STREAM_COMPUTE, &moved[i], 0);
        }
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
    LLMPAR__ZEROED(llmpar__exec, exec);
    if (llmpar__fsdp_not_lent(fsdp)) return LLMPAR_ERR_ARGUMENT;
    exec.fsdp = fsdp;
    exec.run = run;
    exec.grad_scale = 1;
    exec.nonfinite = -1;
    if (run->loss_scale == 0) run->loss_scale = 1;
    run->loss = run->grad_norm = 0;
    run->global_tokens = 0;
    run->skipped = 0;
    run->found_inf = 0;
    memset(&run->before_optimizer, 0, sizeof run->before_optimizer);
    int known = 0; /* the norm, at the first update */
    for (int32_t i = 0; i < count; i++) {
        if (list[i].micro_batch >= exec.micro_batches) exec.micro_batches = list[i].micro_batch + 1;
        known |= list[i].op == LLMPAR_OP_SCALAR_REDUCE && list[i].pass;
        exec.inside |= list[i].op == LLMPAR_OP_OPTIM && !known;
    }
    if (exec.inside && run->skip_nonfinite) return llmpar_fail(fsdp->ctx, LLMPAR_ERR_ARGUMENT, "fsdp: updates inside backward cannot be taken back where a gradient is not finite; expected a list of two passes");
    for (int32_t u = 0; u < fsdp->unit_count; u++) {
        if (fsdp->units[u].held || fsdp->units[u].held_state) return llmpar_fail(fsdp->ctx, LLMPAR_ERR_ARGUMENT, "unit %s: its shard or state is still fetched by hand, expected shard_done and optimizer_done before a step", fsdp->units[u].unit.name);
        if (fsdp->units[u].gathers && !fsdp->whole_params) return llmpar_fail(fsdp->ctx, LLMPAR_ERR_ARGUMENT, "unit %s: still unsharded by hand, expected reshard before a step", fsdp->units[u].unit.name);
    }
    unsigned char *awaited = LLMPAR__ZALLOC(unsigned char, heap, (size_t)count + 1);
    exec.micro = LLMPAR__ALLOC(llmpar_micro, heap, 2 * (size_t)exec.micro_batches + 1);
    llmpar_status status = LLMPAR_OK;
    if (!awaited || !exec.micro) status = llmpar_fail(fsdp->ctx, LLMPAR_ERR_MEMORY, "no memory for a step of %d instructions", (int)count);
    for (int32_t m = 0; m < exec.micro_batches && !status; m++) {
        exec.micro[m] = run->micro[m];
        exec.micro[m].index = m;
        exec.micro[m].loss = fsdp->scalars;
        llmpar_micro *second = &exec.micro[exec.micro_batches + m];
        *second = exec.micro[m];
        second->loss = fsdp->scalars + LLMPAR__SCALARS; /* the second pass of a step: its loss was counted in the first */
        second->token_loss = NULL;
    }
    for (int32_t u = 0; u < fsdp->unit_count && !status; u++) {
        llmpar__flat *flat = &fsdp->units[u];
        flat->sized = NULL;
        flat->output = LLMPAR__ZALLOC(void *, heap, (size_t)exec.micro_batches);
        flat->saved = LLMPAR__ZALLOC(void *, heap, (size_t)exec.micro_batches);
        flat->dinput = LLMPAR__ZALLOC(void *, heap, (size_t)exec.micro_batches);
        if (!flat->output || !flat->saved || !flat->dinput) status = llmpar_fail(fsdp->ctx, LLMPAR_ERR_MEMORY, "no memory for %d micro-batches", (int)exec.micro_batches);
    }
    if (!status) status = llmpar__exec_events(fsdp, list, count, awaited);
    if (!status) status = llmpar__exec_places(&exec, list, count);
    if (!status) status = llmpar__exec_walk(&exec, list, count, awaited);
    llmpar__exec_clean(&exec);
    llmpar_heap_free(heap, exec.micro);
    llmpar_heap_free(heap, awaited);
    run->found_inf = exec.found_inf && run->skip_nonfinite;
    if (!status && exec.found_inf && !run->found_inf) status = llmpar__exec_report(&exec);
    return status;
}
