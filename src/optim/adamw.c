#include "optim/adamw.h"

#include <string.h>

#include "base/math.h"

struct llmpar_adamw {
    llmpar_fsdp *fsdp;
    llmpar_heap *heap;
    llmpar_adamw_desc desc;
    llmpar_optimizer table;
    void **first, **second;   /* [units] */
    double lr, power1, power2; /* beta^step */
    int64_t steps;
};

LLMPAR_DEF double llmpar_lr_cosine(double lr, double lr_min, int64_t warmup, int64_t total, int64_t step)
{
    const double pi = 3.14159265358979323846;
    double sine, cosine;
    if (step <= warmup) return warmup > 0 ? lr * (double)step / (double)warmup : lr;
    if (total <= warmup) return lr;
    if (step >= total) return lr_min;
    llmpar_sincos_f64(pi * (double)(step - warmup) / (double)(total - warmup), &sine, &cosine);
    return lr_min + 0.5 * (lr - lr_min) * (1.0 + cosine);
}

LLMPAR_DEF double llmpar_clip_scale(double norm, double max_norm)
{
    return max_norm > 0 && norm > max_norm ? max_norm / norm : 1.0;
}

LLMPAR_DEF void llmpar_adamw_desc_resolve(llmpar_adamw_desc *desc)
{
    if (desc->beta1 == 0) desc->beta1 = 0.9;
    if (desc->beta2 == 0) desc->beta2 = 0.95;
    if (desc->eps == 0) desc->eps = 1e-8;
    if (desc->decay == 0) desc->decay = 0.1;
    if (desc->clip == 0) desc->clip = 1.0;
}

static llmpar_status llmpar__adamw_begin(void *state, double grad_norm, double *grad_scale)
{
    llmpar_adamw *adamw = (llmpar_adamw *)state;
    *grad_scale = llmpar_clip_scale(grad_norm, adamw->desc.clip);
    adamw->steps++;
    adamw->power1 *= adamw->desc.beta1;
    adamw->power2 *= adamw->desc.beta2;
    return LLMPAR_OK;
}

static llmpar_status llmpar__adamw_update(void *state, const llmpar_update *update)
{
    llmpar_adamw *adamw = (llmpar_adamw *)state;
    llmpar_device *device = llmpar_fsdp_mesh(adamw->fsdp)->ctx->device;
    size_t size = llmpar_dtype_size(update->dtype);
    llmpar_status status = LLMPAR_OK;
    /* Segment by segment: decay differs, and padding between them must stay zero. */
    for (int32_t s = 0; s < update->segment_count && !status; s++) {
        const llmpar_segment *segment = &update->segments[s];
        size_t begin = (size_t)segment->begin * size;
        llmpar_adamw_args args;
        memset(&args, 0, sizeof args);
        args.count = (size_t)segment->count;
        args.p = (char *)update->param + begin;
        args.g = (const char *)update->grad + begin;
        args.m = (char *)adamw->first[update->unit] + begin;
        args.v = (char *)adamw->second[update->unit] + begin;
        args.lr = adamw->lr;
        args.beta1 = adamw->desc.beta1;
        args.beta2 = adamw->desc.beta2;
        args.eps = adamw->desc.eps;
        args.decay = segment->no_decay || adamw->desc.decay < 0 ? 0 : adamw->desc.decay;
        args.correction1 = 1 - adamw->power1;
        args.correction2 = 1 - adamw->power2;
        args.grad_scale = update->grad_scale;
        args.dtype = update->dtype;
        status = device->adamw(device, update->stream, &args);
    }
    return status;
}

LLMPAR_DEF llmpar_status llmpar_adamw_desc_check(const llmpar_adamw_desc *desc, llmpar_error *error)
{
    if (!(desc->beta1 > 0 && desc->beta1 < 1) || !(desc->beta2 > 0 && desc->beta2 < 1)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "adamw: beta1 = %g, beta2 = %g, expected between 0 and 1", desc->beta1, desc->beta2);
    if (!(desc->eps > 0 && desc->eps < 1)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "adamw: eps = %g, expected between 0 and 1", desc->eps);
    if (!(desc->decay <= 1)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "adamw: decay = %g, expected at most 1", desc->decay);
    if (desc->clip != desc->clip) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "adamw: clip = %g, expected a number", desc->clip);
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_adamw_create(llmpar_fsdp *fsdp, const llmpar_adamw_desc *desc, llmpar_adamw **out)
{
    llmpar_ctx *ctx = llmpar_fsdp_mesh(fsdp)->ctx;
    llmpar_arena *arena = llmpar_fsdp_arena(fsdp);
    int32_t units = llmpar_fsdp_unit_count(fsdp);
    size_t size = llmpar_dtype_size(llmpar_fsdp_dtype(fsdp));
    llmpar_adamw_desc resolved = *desc;
    *out = NULL;
    llmpar_adamw_desc_resolve(&resolved);
    llmpar_error error;
    llmpar_error_clear(&error);
    llmpar_status status = llmpar_adamw_desc_check(&resolved, &error);
    if (status) return llmpar_fail(ctx, status, "%s", error.text);
    llmpar_adamw *adamw = (llmpar_adamw *)llmpar_heap_zalloc(&ctx->heap, 1, sizeof *adamw);
    if (!adamw) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "adamw: out of memory");
    adamw->fsdp = fsdp;
    adamw->heap = &ctx->heap;
    adamw->desc = resolved;
    adamw->power1 = adamw->power2 = 1;
    adamw->table.state = adamw;
    adamw->table.begin_step = llmpar__adamw_begin;
    adamw->table.update = llmpar__adamw_update;
    adamw->first = (void **)llmpar_heap_zalloc(&ctx->heap, (size_t)units, sizeof(void *));
    adamw->second = (void **)llmpar_heap_zalloc(&ctx->heap, (size_t)units, sizeof(void *));
    if (!adamw->first || !adamw->second) status = llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "adamw: out of memory for %d units", (int)units);
    llmpar_stream *stream = NULL;
    if (!status) status = ctx->device->stream_create(ctx->device, "set-up", &stream);
    for (int32_t u = 0; u < units && !status; u++) {
        int64_t elements;
        const char *name = llmpar_fsdp_unit(fsdp, u)->name;
        llmpar_fsdp_shard(fsdp, u, &elements, NULL, NULL);
        void **moment[2] = {&adamw->first[u], &adamw->second[u]};
        for (int i = 0; i < 2 && !status; i++) {
            status = llmpar_arena_alloc(arena, LLMPAR_TAG_OPTIMIZER, (size_t)elements * size, name, moment[i]);
            if (!status) status = ctx->device->zero(ctx->device, stream, *moment[i], (size_t)elements * size);
        }
    }
    if (!status) status = ctx->device->synchronize(ctx->device, stream);
    if (stream) ctx->device->stream_destroy(ctx->device, stream);
    if (status) {
        llmpar_adamw_destroy(adamw);
        return status;
    }
    *out = adamw;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_adamw_destroy(llmpar_adamw *adamw)
{
    if (!adamw) return;
    llmpar_arena *arena = llmpar_fsdp_arena(adamw->fsdp);
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(adamw->fsdp); u++) {
        if (adamw->first) llmpar_arena_free(arena, adamw->first[u]);
        if (adamw->second) llmpar_arena_free(arena, adamw->second[u]);
    }
    llmpar_heap_free(adamw->heap, adamw->first);
    llmpar_heap_free(adamw->heap, adamw->second);
    llmpar_heap_free(adamw->heap, adamw);
}

LLMPAR_DEF const llmpar_optimizer *llmpar_adamw_optimizer(const llmpar_adamw *adamw) { return &adamw->table; }
LLMPAR_DEF void llmpar_adamw_set_lr(llmpar_adamw *adamw, double lr) { adamw->lr = lr; }
LLMPAR_DEF int64_t llmpar_adamw_steps(const llmpar_adamw *adamw) { return adamw->steps; }
LLMPAR_DEF void llmpar_adamw_moments(llmpar_adamw *adamw, int32_t unit, void **first, void **second)
{
    *first = adamw->first[unit];
    *second = adamw->second[unit];
}
