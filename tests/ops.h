/* ops: what the tests of the CPU operations share. Values live as doubles; each call copies them into typed buffers at odd places, surrounded
   by poison that must stay, into outputs full of NaN; results come back as doubles, which hold an f32 exactly, so memcmp compares bits. */
#ifndef TESTS_OPS_H
#define TESTS_OPS_H

#include "test.h"
#include <math.h>

static uint64_t ops_state = 7;
static inline uint32_t ops_bits(void)
{
    ops_state = ops_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(ops_state >> 33);
}
static inline int64_t ops_below(int64_t n) { return (int64_t)(ops_bits() % (uint32_t)n); }
static inline double *ops_zeros(int64_t n) { return (double *)calloc((size_t)(n > 0 ? n : 1), sizeof(double)); }
/* n values in (-scale, scale), each exact in f32 */
static inline double *ops_random(int64_t n, double scale)
{
    double *x = ops_zeros(n);
    for (int64_t i = 0; i < n; i++) x[i] = (double)(float)(((double)ops_bits() / 1073741824.0 - 1.0) * scale);
    return x;
}

/* ---- devices: one a level and number of threads, made when first asked for ---- */

static llmpar_heap ops_heap;
static llmpar_error ops_error;
static llmpar_device *ops_devices[5][4];

static inline llmpar_device *ops_device(llmpar_cpu_level level, int threads)
{
    llmpar_device **d = &ops_devices[(int)level][threads];
    if (!*d) {
        llmpar_cpu_desc desc;
        memset(&desc, 0, sizeof desc);
        desc.level = level;
        desc.threads = threads;
        if (!ops_heap.calls) llmpar_heap_init(&ops_heap, NULL);
        CHECK_OK(llmpar_cpu_create(&ops_heap, &ops_error, &desc, d));
    }
    return *d;
}
static inline void ops_close(void)
{
    for (int i = 0; i < 5; i++) for (int j = 0; j < 4; j++) llmpar_cpu_destroy(ops_devices[i][j]);
    CHECK_INT(ops_heap.live, 0);
}

/* Which code a case runs: f64, then f32 at every level of this machine. */
typedef struct ops_way { llmpar_cpu_level level; llmpar_dtype dtype; } ops_way;
static inline int ops_ways(ops_way ways[4])
{
    int n = 0;
    ways[n].level = LLMPAR_CPU_PORTABLE;
    ways[n++].dtype = LLMPAR_F64;
    for (int level = (int)LLMPAR_CPU_PORTABLE; level <= (int)llmpar_cpu_best_level() && level <= (int)LLMPAR_CPU_AVX512; level++) { /* what is above differs in products of BF16 alone */
        ways[n].level = (llmpar_cpu_level)level;
        ways[n++].dtype = LLMPAR_F32;
    }
    return n;
}

/* ---- typed buffers ---- */

enum { OPS_MARGIN = 40, OPS_BUFFERS = 128 };
typedef struct ops_buffer { unsigned char *memory; size_t bytes; void *base; int64_t rows, width, ld; size_t size; } ops_buffer;
static ops_buffer ops_buffers[OPS_BUFFERS];
static int ops_buffer_count;

/* rows x width elements, row stride ld, at an odd place; values NULL: poison (an output). dtype I32 takes int32_t values. */
static inline void *ops_put(llmpar_dtype dtype, const void *values, int64_t rows, int64_t width, int64_t ld)
{
    ops_buffer *b = &ops_buffers[ops_buffer_count];
    if (ops_buffer_count == OPS_BUFFERS) { TEST_FAIL("too many buffers"); return NULL; }
    ops_buffer_count++;
    b->size = llmpar_dtype_size(dtype);
    b->rows = rows;
    b->width = width;
    b->ld = ld;
    b->bytes = (size_t)(rows * ld + OPS_MARGIN) * b->size;
    b->memory = (unsigned char *)malloc(b->bytes);
    memset(b->memory, 0xff, b->bytes);
    b->base = b->memory + b->size * (size_t)ops_below(OPS_MARGIN / 2);
    for (int64_t r = 0; values && r < rows; r++)
        for (int64_t j = 0; j < width; j++) {
            if (dtype == LLMPAR_F64) ((double *)b->base)[r * ld + j] = ((const double *)values)[r * width + j];
            else if (dtype == LLMPAR_F32) ((float *)b->base)[r * ld + j] = (float)((const double *)values)[r * width + j];
            else if (dtype == LLMPAR_BF16) llmpar_convert((char *)b->base + (size_t)(r * ld + j) * b->size, dtype, (const double *)values + r * width + j, LLMPAR_F64, 1);
            else memcpy((char *)b->base + (size_t)(r * ld + j) * b->size, (const char *)values + (size_t)(r * width + j) * b->size, b->size);
        }
    return b->base;
}
static inline void *ops_in(llmpar_dtype dtype, const void *values, int64_t n) { return values ? ops_put(dtype, values, 1, n, n) : NULL; }
static inline void *ops_out(llmpar_dtype dtype, int64_t n) { return ops_put(dtype, NULL, 1, n, n); }
static inline void ops_get(llmpar_dtype dtype, double *out, const void *base, int64_t rows, int64_t width, int64_t ld)
{
    for (int64_t r = 0; out && r < rows; r++)
        for (int64_t j = 0; j < width; j++)
            if (dtype == LLMPAR_BF16) llmpar_convert(out + r * width + j, LLMPAR_F64, (const char *)base + (size_t)(r * ld + j) * 2, dtype, 1);
            else out[r * width + j] = dtype == LLMPAR_F64 ? ((const double *)base)[r * ld + j] : (double)((const float *)base)[r * ld + j];
}
static inline void ops_take(llmpar_dtype dtype, double *out, const void *base, int64_t n) { ops_get(dtype, out, base, 1, n, n); }
/* Checks the poison around every buffer and frees them all. Call after each operation. */
static inline void ops_release(void)
{
    while (ops_buffer_count) {
        ops_buffer *b = &ops_buffers[--ops_buffer_count];
        for (int64_t r = 0; r < b->rows; r++) memset((char *)b->base + (size_t)(r * b->ld) * b->size, 0xff, (size_t)b->width * b->size);
        /* all bytes 0xff: the first is, and each is the one before */
        if (b->memory[0] != 0xff || memcmp(b->memory, b->memory + 1, b->bytes - 1)) for (size_t i = 0; i < b->bytes; i++)
            if (b->memory[i] != 0xff) { TEST_FAIL("byte %ld beside a buffer of %ld x %ld was written", (long)(b->memory + i - (unsigned char *)b->base), (long)b->rows, (long)b->width); break; }
        free(b->memory);
    }
}

/* ---- comparisons ---- */

static inline void ops_same(const char *what, ops_way way, const double *got, const double *want, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (memcmp(&got[i], &want[i], sizeof *got)) { TEST_FAIL("%s, %s %s: element %ld of %ld is %.17g, want the bits of %.17g", what, llmpar_cpu_level_name(way.level), llmpar_dtype_name(way.dtype), (long)i, (long)n, got[i], want[i]); return; }
}
/* f32 is the bound of f32 levels; f64 has its own. */
static inline double ops_bound(ops_way way, double f32) { return way.dtype == LLMPAR_F64 ? 1e-13 : f32; }
/* |got - want| <= bound * max|want| */
static inline void ops_near(const char *what, ops_way way, const double *got, const double *want, int64_t n, double bound)
{
    double top = 0, worst = 0;
    for (int64_t i = 0; i < n; i++) top = fabs(want[i]) > top ? fabs(want[i]) : top;
    for (int64_t i = 0; i < n; i++) {
        double d = fabs(got[i] - want[i]);
        if (!(d <= worst)) worst = d;
    }
    if (!(worst <= bound * top)) TEST_FAIL("%s, %s %s: off by %.3g of %.3g, bound %.3g", what, llmpar_cpu_level_name(way.level), llmpar_dtype_name(way.dtype), worst, top, bound * top);
}
static inline double ops_dot(const double *a, const double *b, int64_t n)
{
    double s = 0;
    for (int64_t i = 0; i < n; i++) s += a[i] * b[i];
    return s;
}
/* Central differences of f over x[0..n) against gradient, 1e-6 of its largest element. At most 40 elements, spread over x. */
static inline void ops_differences(const char *what, double (*f)(void *), void *user, double *x, int64_t n, const double *gradient)
{
    int64_t step = n > 40 ? n / 37 : 1;
    double top = 0, h = 1e-4;
    for (int64_t i = 0; i < n; i++) top = fabs(gradient[i]) > top ? fabs(gradient[i]) : top;
    for (int64_t i = 0; i < n; i += step) {
        double keep = x[i], d[4], slope;
        for (int k = 0; k < 4; k++) {
            x[i] = keep + h * (k == 0 ? 1 : k == 1 ? -1 : k == 2 ? 2 : -2);
            d[k] = f(user);
        }
        x[i] = keep;
        slope = (8 * (d[0] - d[1]) - (d[2] - d[3])) / (12 * h); /* error h^4 */
        if (!(fabs(slope - gradient[i]) <= 1e-6 * top)) { TEST_FAIL("%s: derivative %ld is %.12g, differences say %.12g (largest %.3g)", what, (long)i, gradient[i], slope, top); return; }
    }
}

/* The reference of every tree: split at the largest power of two below n. parts[j] has n elements each. */
static inline double *ops_tree(llmpar_dtype dtype, double **parts, int64_t count, int64_t n)
{
    double *sum = ops_zeros(n);
    if (count == 1) memcpy(sum, parts[0], (size_t)n * sizeof *sum);
    else {
        int64_t split = llmpar_tree_split(count);
        double *a = ops_tree(dtype, parts, split, n), *b = ops_tree(dtype, parts + split, count - split, n);
        for (int64_t i = 0; i < n; i++) sum[i] = dtype == LLMPAR_F64 ? a[i] + b[i] : (double)((float)a[i] + (float)b[i]);
        free(a);
        free(b);
    }
    return sum;
}

#endif
