/* rope_tables: RoPE frequencies and their cosines and sines (Su et al. 2021), stretched as transformers' modeling_rope_utils does, in f64. */
#include "model/config.h"
#include "base/math.h"

#if !defined(LLMPAR_NO_LLAMA)

#define LLMPAR__ROPE_TWO_PI 6.283185307179586476925286766559

/* YaRN (Peng et al. 2023, section 3.2): the pair, counted in pairs and broken, that turns `rotations` times within the original context. */
static double llmpar__rope_pair(const llmpar_llama_config *c, double rotations)
{
    return c->head_dim * llmpar_log_f64(c->rope_scaling.original_max_positions / (rotations * LLMPAR__ROPE_TWO_PI)) / (2 * llmpar_log_f64(c->rope_theta));
}

static double llmpar__rope_floor(double x)
{
    double whole = (double)(int64_t)x;
    return whole > x ? whole - 1 : whole;
}

/* How much of pair i's frequency is kept, 0 to 1. Bounds beyond the dims are clamped as transformers does, to [0, E - 1]; that they are at most 1e9 only keeps them countable. */
static double llmpar__rope_kept(const llmpar_llama_config *c, int32_t i)
{
    const llmpar_rope_scaling *s = &c->rope_scaling;
    double low = llmpar__rope_pair(c, s->beta_fast), high = llmpar__rope_pair(c, s->beta_slow), ramp;
    low = low < 0 ? 0 : low > 1e9 ? 1e9 : low;
    high = high < -1e9 ? -1e9 : high > c->head_dim - 1 ? c->head_dim - 1 : high;
    if (s->truncate) {
        low = llmpar__rope_floor(low);
        high = -llmpar__rope_floor(-high);
    }
    if (low == high) high += 0.001;
    ramp = (i - low) / (high - low);
    return 1 - (ramp < 0 ? 0 : ramp > 1 ? 1 : ramp);
}

LLMPAR_DEF void llmpar_rope_inv_freq(const llmpar_llama_config *config, int64_t positions, double *out)
{
    const llmpar_rope_scaling *s = &config->rope_scaling;
    int32_t i, pairs = config->head_dim / 2;
    double base = config->rope_theta, e = config->head_dim;
    if (s->kind == LLMPAR_ROPE_DYNAMIC && positions > config->max_positions)
        base *= llmpar_pow_f64(s->factor * (double)positions / config->max_positions - (s->factor - 1), e / (e - 2));
    for (i = 0; i < pairs; i++) {
        double f = 1 / llmpar_pow_f64(base, 2.0 * i / e);
        if (s->kind == LLMPAR_ROPE_LINEAR) f /= s->factor;
        if (s->kind == LLMPAR_ROPE_LLAMA3) {
            /* Rotations within the original context: many are kept, few are slowed down by `factor`, between them a linear blend. */
            double wavelength = LLMPAR__ROPE_TWO_PI / f, original = s->original_max_positions;
            if (wavelength > original / s->low_freq_factor) f /= s->factor;
            else if (!(wavelength < original / s->high_freq_factor)) {
                double smooth = (original / wavelength - s->low_freq_factor) / (s->high_freq_factor - s->low_freq_factor);
                f = (1 - smooth) * f / s->factor + smooth * f;
            }
        }
        if (s->kind == LLMPAR_ROPE_YARN) {
            double kept = llmpar__rope_kept(config, i);
            f = f / s->factor * (1 - kept) + f * kept;
        }
        out[i] = f;
    }
}

LLMPAR_DEF llmpar_status llmpar_rope_tables(llmpar_heap *heap, const llmpar_llama_config *config, int64_t positions, llmpar_dtype dtype, void *cosine, void *sine, llmpar_error *error)
{
    LLMPAR__NEED(heap && config, error);
    int32_t i, pairs = config->head_dim / 2;
    double *inv_freq, c, s, factor = config->rope_scaling.kind == LLMPAR_ROPE_YARN ? config->rope_scaling.attention_factor : 1;
    if (dtype != LLMPAR_F32 && dtype != LLMPAR_F64)
        return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "rope tables: dtype = %s, expected f32 or f64", llmpar_dtype_name(dtype));
    /* No frequency exceeds 1, so this also bounds the angle that sincos has to reduce. */
    if (positions < 0 || positions > 1000000000)
        return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "rope tables: positions = %lld, expected 0 to 1000000000", (long long)positions);
    inv_freq = LLMPAR__ALLOC(double, heap, (size_t)pairs);
    if (!inv_freq) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "rope tables: out of memory for %d frequencies", (int)pairs);
    llmpar_rope_inv_freq(config, positions, inv_freq);
    for (int64_t p = 0; p < positions; p++)
        for (i = 0; i < pairs; i++) {
            int64_t at = p * pairs + i;
            llmpar_sincos_f64((double)p * inv_freq[i], &s, &c);
            c *= factor;
            s *= factor;
            if (dtype == LLMPAR_F64) {
                ((double *)cosine)[at] = c;
                ((double *)sine)[at] = s;
            }
            else {
                ((float *)cosine)[at] = (float)c;
                ((float *)sine)[at] = (float)s;
            }
        }
    llmpar_heap_free(heap, inv_freq);
    return LLMPAR_OK;
}

#undef LLMPAR__ROPE_TWO_PI

#endif /* LLMPAR_NO_LLAMA */
