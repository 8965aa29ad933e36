/* trial: one call of one device operation: its values, its buffers between guards (grade.h), what is compared afterwards and what must not have changed. */
#ifndef CONFORMANCE_TRIAL_H
#define CONFORMANCE_TRIAL_H

#include "grade.h"

enum { MOST_OUTS = 6 };

typedef struct output { const char *name; const void *at; int64_t rows, width, ld; llmpar_dtype dtype; double *value; } output;
typedef struct input { const void *at; void *copy; size_t bytes; const char *name; } input;

/* One call of one operation on one table. */
typedef struct trial {
    llmpar_device *d;
    llmpar_stream *stream;
    llmpar_dtype dtype;
    int tested;           /* the table under test, not the reference */
    int placement;
    int special;          /* inputs also hold NaN, infinities, -0, the largest and the smallest numbers */
    uint64_t random;
    output out[MOST_OUTS];
    input in[GRADE_PLACES];
    int outs, ins;
    char what[160];       /* sizes of the case */
} trial;

/* ---- values and buffers ---- */

static uint64_t bits(trial *t) { return grade_hash(++t->random); }
static int64_t below(trial *t, int64_t n) { return (int64_t)(bits(t) % (uint64_t)n); }
/* in (-scale, scale), exact in f32 */
static double value(trial *t, double scale) { return (double)(float)(((double)(bits(t) >> 40) / 8388608.0 - 1.0) * scale); }

static void store(void *base, int64_t i, llmpar_dtype dtype, double x)
{
    switch (dtype) {
    case LLMPAR_F32: ((float *)base)[i] = (float)x; break;
    case LLMPAR_F64: ((double *)base)[i] = x; break;
    case LLMPAR_BF16: ((uint16_t *)base)[i] = llmpar_f32_to_bf16((float)x); break;
    case LLMPAR_F16: ((uint16_t *)base)[i] = llmpar_f32_to_f16((float)x); break;
    case LLMPAR_I32: ((int32_t *)base)[i] = (int32_t)x; break;
    case LLMPAR_I64: ((int64_t *)base)[i] = (int64_t)x; break;
    case LLMPAR_U64: ((uint64_t *)base)[i] = (uint64_t)x; break;
    default: ((uint8_t *)base)[i] = (uint8_t)x; break;
    }
}
static double load(const void *base, int64_t i, llmpar_dtype dtype)
{
    switch (dtype) {
    case LLMPAR_F32: return (double)((const float *)base)[i];
    case LLMPAR_F64: return ((const double *)base)[i];
    case LLMPAR_BF16: return (double)llmpar_bf16_to_f32(((const uint16_t *)base)[i]);
    case LLMPAR_F16: return (double)llmpar_f16_to_f32(((const uint16_t *)base)[i]);
    case LLMPAR_I32: return (double)((const int32_t *)base)[i];
    case LLMPAR_I64: return (double)((const int64_t *)base)[i];
    case LLMPAR_U64: return (double)((const uint64_t *)base)[i];
    default: return (double)((const uint8_t *)base)[i];
    }
}
/* The last row ends with its last element: the gap behind it does not belong to the buffer. */
static size_t span(int64_t rows, int64_t width, int64_t ld) { return (size_t)(rows > 0 && width > 0 ? (rows - 1) * ld + width : 0); }

static void *matrix(trial *t, const char *name, llmpar_dtype dtype, int64_t rows, int64_t width, int64_t ld, double scale)
{
    size_t item = llmpar_dtype_size(dtype);
    void *at = grade_put(name, span(rows, width, ld) * item, item, t->placement);
    static const double specials[] = { NAN, HUGE_VAL, -HUGE_VAL, -0.0, 3.4028234663852886e38, 1e-45, 65519.99, 65520, 3.3961514e38, 1.00390625, 1.01171875, 6e-8, 2.9e-8 };
    int whole = dtype == LLMPAR_I64 || dtype == LLMPAR_U64;
    for (int64_t r = 0; r < rows && scale != 0; r++)
        for (int64_t j = 0; j < width; j++) {
            double x = whole ? (double)below(t, 1 << 30) : value(t, scale);
            if (t->special && !whole && below(t, 4) == 0) x = specials[below(t, (int64_t)(sizeof specials / sizeof specials[0]))];
            store(at, r * ld + j, dtype, x);
        }
    return at;
}
/* To be read only: checked afterwards. */
static const void *remember(trial *t, const char *name, const void *at, size_t bytes)
{
    input *i = &t->in[t->ins++];
    i->at = at;
    i->bytes = bytes;
    i->name = name;
    i->copy = malloc(bytes + 1);
    if (bytes) memcpy(i->copy, at, bytes);
    return at;
}
static const void *in2(trial *t, const char *name, int64_t rows, int64_t width, int64_t ld, double scale) { return remember(t, name, matrix(t, name, t->dtype, rows, width, ld, scale), span(rows, width, ld) * llmpar_dtype_size(t->dtype)); }
static const void *in1(trial *t, const char *name, int64_t n, double scale) { return in2(t, name, 1, n, n, scale); }
static const int32_t *ints(trial *t, const char *name, int64_t n, int64_t low, int64_t high)
{
    int32_t *at = (int32_t *)grade_put(name, (size_t)n * 4, 4, t->placement);
    for (int64_t i = 0; i < n; i++) at[i] = (int32_t)(low + below(t, high - low));
    return (const int32_t *)remember(t, name, at, (size_t)n * 4);
}
/* Compared with the reference afterwards; scale 0: full of poison before. */
static void *out_as(trial *t, const char *name, llmpar_dtype dtype, int64_t rows, int64_t width, int64_t ld, double scale)
{
    output *o = &t->out[t->outs++];
    void *at = matrix(t, name, dtype, rows, width, ld, scale);
    o->name = name;
    o->at = at;
    o->rows = rows;
    o->width = width;
    o->ld = ld;
    o->dtype = dtype;
    o->value = NULL;
    return at;
}
static void *out2(trial *t, const char *name, int64_t rows, int64_t width, int64_t ld) { return out_as(t, name, t->dtype, rows, width, ld, 0); }
static void *out1(trial *t, const char *name, int64_t n) { return out_as(t, name, t->dtype, 1, n, n, 0); }
static void *scratch(trial *t, size_t bytes) { return grade_put("workspace", bytes, 1, t->placement); }

static void note(trial *t, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void note(trial *t, const char *format, ...)
{
    va_list list;
    int used = snprintf(t->what, sizeof t->what, "%s ", llmpar_dtype_name(t->dtype));
    va_start(list, format);
    vsnprintf(t->what + used, sizeof t->what - (size_t)used, format, list);
    va_end(list);
    if (t->tested) snprintf(grade->what, sizeof grade->what, "%s", t->what);
}

/* Two results of the table under test that its contract calls equal. */
static void same(trial *t, const char *what, const void *a, const void *b, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        double x = load(a, i, t->dtype), y = load(b, i, t->dtype);
        if (!memcmp(&x, &y, sizeof x) || (isnan(x) && isnan(y))) continue;
        grade_fail(GRADE_VALUE, "%s must have the same bits: element %lld is %.17g, and %.17g otherwise", what, (long long)i, y, x);
        return;
    }
}

#endif
