/* parity: how far two tensors are apart, how far rounding alone can bring them, and where their numbers lie.

   Distance of b from a, over all elements:   relative = |b - a| / |a|  (Euclidean norms)        largest = max|b - a| / max|a|
   Both have to stay below one bound. Its reason, and what was measured, is in docs/parity.md:

       bound = c * u * sqrt(1 + h)        u = store + sqrt(K) * sum / 2        c = 8 for activations, logits and loss, 16 for gradients

   store: the unit roundoff of the narrower of the two types (f64 2^-53, f32 2^-24, f16 2^-11, bf16 2^-8): everything that is handed on is rounded to it. sum: that of the type sums are kept in (f32 below f32); in a sum of K
   terms rounding errors of random sign, on average less than half of the unit roundoff each, grow like sqrt(K). h: halves of blocks (attention or MLP) that the number has come through, forward and backward: each adds an error of its own to the residual stream, of random sign again. */
#ifndef EXAMPLES_PARITY_H
#define EXAMPLES_PARITY_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PARITY_CHUNK = 1 << 15, PARITY_TOP = 10, PARITY_DIMS = 8 };
#define PARITY_FORWARD 8.0
#define PARITY_BACKWARD 16.0

/* Where a tensor lies: in a plain file from byte `begin` on, or in a safetensors file; neither: not there. */
typedef struct source {
    llmpar_file *file;
    uint64_t begin;
    const llmpar_safetensors *tensors;
    const llmpar_safetensor *tensor;
    llmpar_dtype dtype;
    int64_t count;
} source;
static int source_is(const source *s) { return s->file || s->tensors; }

typedef struct measure {
    double difference2, reference2, difference_most, reference_most, absolute; /* sums of squares, maxima, sum of |b - a| */
    int64_t count;
    int same, finite; /* every bit; every number of both */
} measure;

/* Numbers [first, first + count) of a tensor as they stand in the file. */
static llmpar_status source_raw(const source *s, int64_t first, int64_t count, void *raw, llmpar_error *error)
{
    size_t size = llmpar_dtype_size(s->dtype);
    if (s->tensors) return llmpar_safetensors_read(s->tensors, s->tensor, (size_t)first * size, (size_t)count * size, raw, error);
    return llmpar_file_read(s->file, s->begin + (uint64_t)first * size, raw, (size_t)count * size, error);
}

/* And as doubles. */
static llmpar_status source_read(const source *s, int64_t first, int64_t count, void *raw, double *out, llmpar_error *error)
{
    llmpar_status status = source_raw(s, first, count, raw, error);
    if (!status) llmpar_convert(out, LLMPAR_F64, raw, s->dtype, (size_t)count);
    return status;
}

/* Two buffers for a and two for b. NULL: out of memory. */
static double *parity_buffers(void) { return (double *)malloc(4 * (size_t)PARITY_CHUNK * sizeof(double)); }

/* a is multiplied with scale_a, b with scale_b: the loss scales of f16, powers of two. */
static llmpar_status parity_measure(const source *a, double scale_a, const source *b, double scale_b, measure *out, llmpar_error *error)
{
    double *buffer = parity_buffers(), *x = buffer, *y = buffer + PARITY_CHUNK, *raw_x = buffer + 2 * PARITY_CHUNK, *raw_y = buffer + 3 * PARITY_CHUNK;
    llmpar_status status = buffer ? LLMPAR_OK : llmpar_error_set(error, LLMPAR_ERR_MEMORY, "out of memory");
    memset(out, 0, sizeof *out);
    out->count = a->count;
    out->same = 1;
    int raw = a->dtype == b->dtype && scale_a == scale_b; /* else the numbers are compared, not their bits */
    out->finite = 1;
    for (int64_t first = 0; first < a->count && !status; first += PARITY_CHUNK) {
        int64_t count = a->count - first < PARITY_CHUNK ? a->count - first : PARITY_CHUNK;
        status = source_read(a, first, count, raw_x, x, error);
        if (!status) status = source_read(b, first, count, raw_y, y, error);
        if (status) break;
        if (raw && memcmp(raw_x, raw_y, (size_t)count * llmpar_dtype_size(a->dtype))) out->same = 0;
        for (int64_t i = 0; i < count; i++) {
            double reference = x[i] * scale_a, difference = fabs(y[i] * scale_b - reference);
            if (!isfinite(x[i]) || !isfinite(y[i])) out->finite = 0;
            if (!raw && x[i] * scale_a != y[i] * scale_b) out->same = 0;
            out->difference2 += difference * difference;
            out->reference2 += reference * reference;
            out->absolute += difference;
            if (difference > out->difference_most) out->difference_most = difference;
            if (fabs(reference) > out->reference_most) out->reference_most = fabs(reference);
        }
    }
    free(buffer);
    return status;
}

static double parity_ratio(double difference, double reference) { return difference == 0 ? 0 : reference > 0 ? difference / reference : INFINITY; }

static double parity_roundoff(llmpar_dtype dtype) { return dtype == LLMPAR_F64 ? 0x1p-53 : dtype == LLMPAR_F16 ? 0x1p-11 : dtype == LLMPAR_BF16 ? 0x1p-8 : 0x1p-24; }
static llmpar_dtype parity_narrower(llmpar_dtype a, llmpar_dtype b) { return parity_roundoff(a) > parity_roundoff(b) ? a : b; }

/* u of the text above. */
static double parity_unit(llmpar_dtype narrower, int64_t terms) { return parity_roundoff(narrower) + 0.5 * sqrt((double)terms) * parity_roundoff(llmpar_dtype_sum(narrower)); }
static double parity_bound(double factor, double unit, int64_t halves) { return factor * unit * sqrt(1 + (double)halves); }

/* The ids of the PARITY_TOP largest logits of a row, the largest first, the lower id first among equals; vocab may be less: then that many. */
static int parity_top(const float *logits, int64_t vocab, int32_t *top)
{
    int kept = 0;
    for (int64_t id = 0; id < vocab; id++) {
        int at = kept;
        while (at > 0 && logits[id] > logits[top[at - 1]]) at--;
        if (at == PARITY_TOP) continue;
        if (kept < PARITY_TOP) kept++;
        for (int i = kept - 1; i > at; i--) top[i] = top[i - 1];
        top[at] = (int32_t)id;
    }
    return kept;
}

/* Share of the `most` likeliest tokens of a that are among the `most` likeliest of b. */
static double parity_overlap(const int32_t *a, const int32_t *b, int kept, int most)
{
    int n = kept < most ? kept : most, common = 0;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) common += a[i] == b[j];
    return (double)common / n;
}

/* Where backward comes to a parameter, by its name: the output side first. */
static long parity_backward_place(const char *name)
{
    static const char *const parts[] = {"down_proj", "up_proj", "gate_proj", "post_attention_layernorm", "o_proj", "v_proj", "k_norm", "q_norm", "k_proj", "q_proj", "input_layernorm"};
    const char *layers = strstr(name, "layers.");
    long place = 0;
    if (!layers) return !strncmp(name, "lm_head", 7) ? 0 : strstr(name, "embed") ? 1000001000 : 1;
    while (place < (long)(sizeof parts / sizeof parts[0]) && !strstr(name, parts[place])) place++;
    return 1000000000 - 100 * strtol(layers + 7, NULL, 10) + place; /* L is far below 10^7 */
}

#endif
