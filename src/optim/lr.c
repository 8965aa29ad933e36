#include "optim/lr.h"

#include <string.h>

#include "base/bits_internal.h"
#include "base/math.h"

static const char *const llmpar__lr_names[LLMPAR_LR_COUNT] = {"cosine", "constant", "linear", "wsd", "wsd-sqrt", "one-cycle"};

LLMPAR_DEF const char *llmpar_lr_name(llmpar_lr_kind kind) { return (unsigned)kind < LLMPAR_LR_COUNT ? llmpar__lr_names[kind] : "?"; }

LLMPAR_DEF int llmpar_lr_parse(const char *name, llmpar_lr_kind *out)
{
    for (int k = 0; k < LLMPAR_LR_COUNT; k++)
        if (!strcmp(name, llmpar__lr_names[k])) {
            *out = (llmpar_lr_kind)k;
            return 1;
        }
    return 0;
}

static int llmpar__lr_is_wsd(llmpar_lr_kind kind) { return kind == LLMPAR_LR_WSD || kind == LLMPAR_LR_WSD_SQRT; }

LLMPAR_DEF void llmpar_lr_desc_resolve(llmpar_lr_desc *desc)
{
    if (llmpar__lr_is_wsd(desc->kind) && desc->decay_steps == 0 && desc->total > 0) desc->decay_steps = desc->total >= 10 ? desc->total / 10 : 1;
}

#define LLMPAR__LR_NO(...) llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "schedule: " __VA_ARGS__)
LLMPAR_DEF llmpar_status llmpar_lr_desc_check(const llmpar_lr_desc *desc, llmpar_error *error)
{
    const char *name = llmpar_lr_name(desc->kind);
    if ((unsigned)desc->kind >= LLMPAR_LR_COUNT) return LLMPAR__LR_NO("kind = %d, expected one of llmpar_lr_kind", (int)desc->kind);
    if (!(desc->lr > 0) || !llmpar_isfinite_f64(desc->lr)) return LLMPAR__LR_NO("lr = %g, expected a positive number", desc->lr);
    if (!(desc->lr_min >= 0 && desc->lr_min <= desc->lr)) return LLMPAR__LR_NO("lr_min = %g, expected 0 .. lr = %g", desc->lr_min, desc->lr);
    if (desc->warmup < 0 || desc->total < 0 || desc->decay_steps < 0)
        return LLMPAR__LR_NO("warmup = %lld, total = %lld, decay_steps = %lld, expected 0 or more", (long long)desc->warmup, (long long)desc->total, (long long)desc->decay_steps);
    if (desc->total && desc->warmup > desc->total) return LLMPAR__LR_NO("warmup = %lld, expected at most total = %lld", (long long)desc->warmup, (long long)desc->total);
    if (!llmpar__lr_is_wsd(desc->kind) && desc->decay_steps) return LLMPAR__LR_NO("decay_steps = %lld, expected 0: %s has none", (long long)desc->decay_steps, name);
    if (desc->decay_steps > desc->total - desc->warmup && desc->decay_steps)
        return LLMPAR__LR_NO("decay_steps = %lld, expected at most total - warmup = %lld - %lld", (long long)desc->decay_steps, (long long)desc->total, (long long)desc->warmup);
    if (desc->kind == LLMPAR_LR_ONE_CYCLE && desc->total < 2) return LLMPAR__LR_NO("total = %lld, expected at least 2: one-cycle turns half way", (long long)desc->total);
    if (desc->kind == LLMPAR_LR_ONE_CYCLE && desc->warmup) return LLMPAR__LR_NO("warmup = %lld, expected 0: one-cycle rises until half way", (long long)desc->warmup);
    return LLMPAR_OK;
}
#undef LLMPAR__LR_NO

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

LLMPAR_DEF double llmpar_lr(const llmpar_lr_desc *desc, int64_t step)
{
    double fall = desc->lr_min - desc->lr;
    int64_t begin = llmpar__lr_is_wsd(desc->kind) ? desc->total - desc->decay_steps : desc->warmup;
    if (desc->kind == LLMPAR_LR_COSINE) return llmpar_lr_cosine(desc->lr, desc->lr_min, desc->warmup, desc->total, step);
    if (desc->kind == LLMPAR_LR_ONE_CYCLE) {
        double x = 2 * (double)step / (double)desc->total; /* the peak is at 1 */
        return x < 1 ? desc->lr * x : step >= desc->total ? desc->lr_min : desc->lr + fall * (x - 1);
    }
    if (step <= desc->warmup) return desc->warmup > 0 ? desc->lr * (double)step / (double)desc->warmup : desc->lr;
    if (desc->kind == LLMPAR_LR_CONSTANT || desc->total <= desc->warmup || step <= begin) return desc->lr;
    if (step >= desc->total) return desc->lr_min;
    double x = (double)(step - begin) / (double)(desc->total - begin);
    return desc->lr + fall * (desc->kind == LLMPAR_LR_WSD_SQRT ? llmpar_sqrt_f64(x) : x);
}

/* ---- loss scale ---- */

LLMPAR_DEF void llmpar_loss_scale_resolve(llmpar_loss_scale *state)
{
    if (state->scale == 0) state->scale = 65536;
    if (state->least == 0) state->least = 1.0 / 16384;
    if (state->most == 0) state->most = 16777216;
    if (state->interval == 0) state->interval = 2000;
}

/* A normal power of two: no bit of the mantissa. */
static int llmpar__loss_scale_is_power(double x)
{
    return x > 0 && llmpar_isfinite_f64(x) && (llmpar__bits_f64(x) & 0xfffffffffffffu) == 0;
}

LLMPAR_DEF llmpar_status llmpar_loss_scale_check(const llmpar_loss_scale *state, llmpar_error *error)
{
    if (!llmpar__loss_scale_is_power(state->scale) || !llmpar__loss_scale_is_power(state->least) || !llmpar__loss_scale_is_power(state->most))
        return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "loss scale: scale = %g, least = %g, most = %g, expected powers of two", state->scale, state->least, state->most);
    if (!(state->least <= state->scale && state->scale <= state->most)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "loss scale: scale = %g, expected %g .. %g", state->scale, state->least, state->most);
    if (state->interval < 1 || state->finite_steps < 0)
        return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "loss scale: interval = %lld, finite_steps = %lld, expected at least 1 and 0", (long long)state->interval, (long long)state->finite_steps);
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_loss_scale_update(llmpar_loss_scale *state, int32_t found_inf, llmpar_error *error)
{
    if (found_inf) {
        if (state->scale <= state->least)
            return llmpar_error_set(error, LLMPAR_ERR_NONFINITE, "loss scale: the gradient is not finite at the least scale, %g, either: expected it to be finite after halving; the model itself diverges", state->least);
        state->scale *= 0.5;
        state->finite_steps = 0;
    } else if (++state->finite_steps >= state->interval) {
        if (state->scale < state->most) state->scale *= 2;
        state->finite_steps = 0;
    }
    return LLMPAR_OK;
}
