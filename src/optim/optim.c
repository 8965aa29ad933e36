#include "optim/optim.h"
#include "optim/optim_internal.h"

#include <string.h>

#include "base/math.h"
#include "tables/tables_internal.h"

static const char *const llmpar__optim_names[LLMPAR_OPTIM_COUNT] = {"adamw", "sgd", "lomo", "adalomo"};

LLMPAR_DEF const char *llmpar_optim_name(llmpar_optim_kind kind) { return (unsigned)kind < LLMPAR_OPTIM_COUNT ? llmpar__optim_names[kind] : "?"; }

LLMPAR_DEF int llmpar_optim_parse(const char *name, llmpar_optim_kind *out)
{
    for (int k = 0; k < LLMPAR_OPTIM_COUNT; k++)
        if (!strcmp(name, llmpar__optim_names[k])) {
            *out = (llmpar_optim_kind)k;
            return 1;
        }
    return 0;
}

LLMPAR_DEF double llmpar_clip_scale(double norm, double max_norm)
{
    return max_norm > 0 && norm > max_norm ? max_norm / norm : 1.0;
}

/* ---- description ---- */

LLMPAR_DEF void llmpar_optim_desc_resolve(llmpar_optim_desc *desc)
{
    int adamw = desc->kind == LLMPAR_OPTIM_ADAMW, sgd = desc->kind == LLMPAR_OPTIM_SGD;
    if (adamw && desc->beta1 == 0) desc->beta1 = 0.9;
    if (adamw && desc->beta2 == 0) desc->beta2 = 0.95;
    if (adamw && desc->eps == 0) desc->eps = 1e-8;
    if (desc->kind == LLMPAR_OPTIM_ADALOMO && desc->eps == 0) desc->eps = 1e-30;
    if (desc->decay == 0) desc->decay = adamw ? 0.1 : -1;
    if (desc->clip == 0) desc->clip = adamw || sgd ? 1.0 : -1;
    if (sgd && desc->momentum == 0) desc->momentum = 0.9;
}

/* A field that this optimizer does not have. */
static llmpar_status llmpar__optim_foreign(const llmpar_optim_desc *desc, const char *field, double value, llmpar_error *error)
{
    if (value == 0) return LLMPAR_OK;
    if (value < 0) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: %s is switched off, expected it not to be set: it has none", llmpar_optim_name(desc->kind), field);
    return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: %s = %g, expected 0: it has none", llmpar_optim_name(desc->kind), field, value);
}

LLMPAR_DEF llmpar_status llmpar_optim_desc_check(const llmpar_optim_desc *desc, llmpar_error *error)
{
    const char *name = llmpar_optim_name(desc->kind);
    int adamw = desc->kind == LLMPAR_OPTIM_ADAMW, sgd = desc->kind == LLMPAR_OPTIM_SGD, adalomo = desc->kind == LLMPAR_OPTIM_ADALOMO;
    llmpar_status status = LLMPAR_OK;
    if ((unsigned)desc->kind >= LLMPAR_OPTIM_COUNT) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "optimizer: kind = %d, expected one of llmpar_optim_kind", (int)desc->kind);
    if (!adamw) status = llmpar__optim_foreign(desc, "beta1", desc->beta1, error);
    if (!status && !adamw && !adalomo) status = llmpar__optim_foreign(desc, "beta2", desc->beta2, error);
    if (!status && !adamw && !adalomo) status = llmpar__optim_foreign(desc, "eps", desc->eps, error);
    if (!status && !sgd) status = llmpar__optim_foreign(desc, "momentum", desc->momentum, error);
    if (!status && (adamw || adalomo)) status = llmpar__optim_foreign(desc, "clip_value", desc->clip_value, error);
    if (status) return status;
    if (adamw && (!(desc->beta1 > 0 && desc->beta1 < 1) || !(desc->beta2 > 0 && desc->beta2 < 1)))
        return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: beta1 = %g, beta2 = %g, expected between 0 and 1", name, desc->beta1, desc->beta2);
    if (adalomo && !(desc->beta2 >= 0 && desc->beta2 < 1)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: beta2 = %g, expected between 0 and 1", name, desc->beta2);
    if ((adamw || adalomo) && !(desc->eps > 0 && desc->eps < 1)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: eps = %g, expected between 0 and 1", name, desc->eps);
    if (!(desc->decay <= 1)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: decay = %g, expected at most 1", name, desc->decay);
    if (desc->clip != desc->clip) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: clip = %g, expected a number", name, desc->clip);
    if (!(desc->clip_value >= 0)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: clip_value = %g, expected 0 (off) or more", name, desc->clip_value);
    if (!(desc->momentum < 1)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: momentum = %g, expected below 1", name, desc->momentum);
    return LLMPAR_OK;
}

LLMPAR_DEF int32_t llmpar_optim_states(const llmpar_optim_desc *desc)
{
    return desc->kind == LLMPAR_OPTIM_ADAMW ? 2 : desc->kind == LLMPAR_OPTIM_SGD && desc->momentum > 0 ? 1 : 0;
}

LLMPAR_DEF llmpar_update_when llmpar_optim_update_when(const llmpar_optim_desc *desc, int32_t loss_scaling)
{
    if (desc->kind != LLMPAR_OPTIM_LOMO && desc->kind != LLMPAR_OPTIM_ADALOMO) return LLMPAR_UPDATE_AFTER;
    return desc->clip > 0 || loss_scaling ? LLMPAR_UPDATE_TWO_PASSES : LLMPAR_UPDATE_INSIDE;
}

/* ---- the table ---- */

static llmpar_status llmpar__optim_begin(void *state, double grad_norm, double *grad_scale)
{
    llmpar_optim *optim = (llmpar_optim *)state;
    const llmpar_optim_desc *desc = &optim->desc;
    if (grad_norm < 0 && desc->clip > 0)
        return llmpar_fail(llmpar_fsdp_mesh(optim->fsdp)->ctx, LLMPAR_ERR_ARGUMENT, "%s: clip = %g needs the norm, which updates inside backward do not know: expected a schedule in two passes, or clip off", llmpar_optim_name(desc->kind), desc->clip);
    *grad_scale = llmpar_clip_scale(grad_norm, desc->clip);
    optim->steps++;
    optim->power1 *= desc->beta1;
    optim->power2 *= desc->beta2;
    return LLMPAR_OK;
}

/* AdamW, SGD, LOMO. Segment by segment: decay differs, and padding between them must stay zero. */
static llmpar_status llmpar__optim_update(void *state, const llmpar_update *update)
{
    llmpar_optim *optim = (llmpar_optim *)state;
    const llmpar_optim_desc *desc = &optim->desc;
    llmpar_device *device = update->device ? update->device : llmpar_fsdp_mesh(optim->fsdp)->ctx->device;
    int32_t states = llmpar_optim_states(desc);
    llmpar_status status = LLMPAR_OK;
    LLMPAR__ZEROED(llmpar_adamw_args, adamw);
    adamw.lr = optim->lr;
    adamw.beta1 = desc->beta1;
    adamw.beta2 = desc->beta2;
    adamw.eps = desc->eps;
    adamw.correction1 = 1 - optim->power1;
    adamw.correction2 = 1 - optim->power2;
    adamw.grad_scale = update->grad_scale;
    adamw.dtype = update->dtype;
    LLMPAR__ZEROED(llmpar_sgd_args, sgd);
    sgd.lr = optim->lr;
    sgd.momentum = desc->momentum;
    sgd.limit = desc->clip_value;
    sgd.grad_scale = update->grad_scale;
    sgd.dtype = update->dtype;
    for (int32_t s = 0; s < update->segment_count && !status; s++) {
        const llmpar_segment *segment = &update->segments[s];
        size_t begin = (size_t)segment->begin * llmpar_dtype_size(update->dtype);
        adamw.count = sgd.count = (size_t)segment->count;
        adamw.p = sgd.p = (char *)update->param + begin;
        adamw.g = sgd.g = (const char *)update->grad + begin;
        adamw.m = sgd.m = states > 0 ? (char *)update->state[0] + begin : NULL;
        adamw.v = states > 1 ? (char *)update->state[1] + begin : NULL;
        adamw.decay = sgd.decay = segment->no_decay || desc->decay < 0 ? 0 : desc->decay;
        status = desc->kind == LLMPAR_OPTIM_ADAMW ? device->adamw(device, update->stream, &adamw) : device->sgd(device, update->stream, &sgd);
    }
    return status;
}

/* ---- life ---- */

LLMPAR_DEF llmpar_status llmpar_optim_create(llmpar_fsdp *fsdp, const llmpar_optim_desc *desc, llmpar_optim **out)
{
    llmpar_ctx *ctx = llmpar_fsdp_mesh(fsdp)->ctx;
    *out = NULL;
    if (!desc) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "optim: no desc");
    llmpar_optim_desc resolved = *desc;
    llmpar_optim_desc_resolve(&resolved);
    LLMPAR__NO_ERROR(error);
    llmpar_status status = llmpar_optim_desc_check(&resolved, &error);
    if (status) return llmpar_fail(ctx, status, "%s", error.text);
    int32_t states = llmpar_optim_states(&resolved), given = llmpar_fsdp_optimizer_states(fsdp);
    if (given < states)
        return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "%s: works on %d numbers of state an element, llmpar_fsdp_desc.optimizer_states = %d", llmpar_optim_name(resolved.kind), (int)states, (int)given);
    if (resolved.kind == LLMPAR_OPTIM_SGD || resolved.kind == LLMPAR_OPTIM_LOMO) {
        llmpar_device *device = ctx->device;
        if (!LLMPAR__HAS(device, sgd))
            return llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "%s: device %s has no sgd", llmpar_optim_name(resolved.kind), device->name);
    }
    llmpar_optim *optim = LLMPAR__ZALLOC(llmpar_optim, &ctx->heap, 1);
    if (!optim) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "%s: out of memory", llmpar_optim_name(resolved.kind));
    optim->fsdp = fsdp;
    optim->heap = &ctx->heap;
    optim->desc = resolved;
    optim->power1 = optim->power2 = 1;
    optim->table.state = optim;
    optim->table.begin_step = llmpar__optim_begin;
    optim->table.update = resolved.kind == LLMPAR_OPTIM_ADALOMO ? llmpar__adalomo_update : llmpar__optim_update;
    if (resolved.kind == LLMPAR_OPTIM_ADALOMO) status = llmpar__adalomo_create(optim);
    if (status) llmpar_optim_destroy(optim);
    else *out = optim;
    return status;
}

LLMPAR_DEF void llmpar_optim_destroy(llmpar_optim *optim)
{
    if (!optim) return;
    llmpar__adalomo_destroy(optim);
    llmpar_heap_free(optim->heap, optim);
}

LLMPAR_DEF const llmpar_optimizer *llmpar_optim_table(const llmpar_optim *optim) { return &optim->table; }
LLMPAR_DEF void llmpar_optim_set_lr(llmpar_optim *optim, double lr) { optim->lr = lr; }
LLMPAR_DEF int64_t llmpar_optim_bytes(const llmpar_optim *optim) { return optim->adalomo ? llmpar__adalomo_bytes(optim) : 0; }
LLMPAR_DEF int64_t llmpar_optim_steps(const llmpar_optim *optim) { return optim->steps; }
LLMPAR_DEF llmpar_optim_kind llmpar_optim_get_kind(const llmpar_optim *optim) { return optim->desc.kind; }

LLMPAR_DEF void llmpar_optim_set_steps(llmpar_optim *optim, int64_t steps)
{
    optim->steps = steps;
    optim->power1 = optim->power2 = 1;
    /* The same products as update by update, until they are zero and stay so. */
    for (int64_t i = 0; i < steps && (optim->power1 > 0 || optim->power2 > 0); i++) {
        optim->power1 *= optim->desc.beta1;
        optim->power2 *= optim->desc.beta2;
    }
}

LLMPAR_DEF void llmpar_optim_get_factors(const llmpar_optim *optim, int32_t unit, int32_t segment, llmpar_optim_factors *out)
{
    memset(out, 0, sizeof *out);
    if (optim->adalomo) llmpar__adalomo_factors(optim, unit, segment, out);
}
