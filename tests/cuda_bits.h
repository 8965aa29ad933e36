/* cuda_bits: operations whose bits are the CPU's: any floats as operands, one call on the GPU and on the CPU at its portable and its best level, and bytes compared. Includes cuda.h.

   The sign and the payload of a NaN that arithmetic makes are the processor's own: with `nans`, results are compared with every NaN replaced by one. */
#ifndef CUDA_BITS_H
#define CUDA_BITS_H

#include "cuda.h"

enum { BITS_GPU = 0, BITS_PORTABLE = 1, BITS_BEST = 2, BITS_DEVICES = 3 };
static llmpar_device *bits_best;

static inline llmpar_device *bits_device(int which)
{
    if (which == BITS_GPU) return cuda_gpu;
    if (which == BITS_PORTABLE) return cuda_cpu;
    if (!bits_best) {
        llmpar_cpu_desc desc;
        memset(&desc, 0, sizeof desc);
        desc.threads = 2;
        CHECK_OK(llmpar_cpu_create(&cuda_ctx.heap, &cuda_ctx.error, &desc, &bits_best));
    }
    return bits_best;
}
/* Before cuda_end. */
static inline void bits_close(void)
{
    llmpar_cpu_destroy(bits_best);
    bits_best = NULL;
}

/* What to draw: of like size; of any exponent; the corners of the format among others. */
typedef enum bits_kind { BITS_LIKE, BITS_ANY, BITS_SPECIAL, BITS_KINDS } bits_kind;

static inline uint32_t bits_draw(bits_kind kind)
{
    static const uint32_t corners[] = { 0, 0x80000000u, 1, 0x80000001u, 0x007fffffu, 0x00800000u, 0x80800000u, 0x7f7fffffu, 0xff7fffffu, 0x7f800000u, 0xff800000u, 0x7fc00000u, 0xffc12345u, 0x7f812345u, 0xffbfffffu,
        0x3f800000u, 0xbf800000u, 0x33000000u, 0x38800000u, 0x387fffffu, 0x38000000u, 0x477fefffu, 0x477ff000u, 0x477fffffu, 0x47800000u, 0x3f80ffffu, 0x3f808000u, 0x3f818000u, 0x3f801000u, 0x3f803000u, 0x0d000000u, 0x71000000u };
    uint32_t bits = ops_bits() << 1 ^ ops_bits() >> 7;
    if (kind == BITS_SPECIAL && ops_below(2)) return corners[ops_below((int64_t)(sizeof corners / sizeof corners[0]))];
    if (kind == BITS_LIKE) bits = (bits & 0x81ffffffu) | 0x3c000000u;
    else if ((bits & 0x7f800000u) == 0x7f800000u) bits ^= 0x20000000u;
    return bits;
}
static inline float *bits_floats(int64_t n, bits_kind kind)
{
    uint32_t *x = (uint32_t *)malloc((size_t)n * sizeof *x + 1);
    for (int64_t i = 0; i < n; i++) x[i] = bits_draw(kind);
    return (float *)(void *)x;
}
static inline double *bits_doubles(int64_t n, bits_kind kind)
{
    double *x = (double *)malloc((size_t)n * sizeof *x + 1);
    for (int64_t i = 0; i < n; i++) {
        uint64_t low = (uint64_t)ops_bits() << 20 ^ ops_bits(), bits;
        uint32_t f = bits_draw(kind);
        float single;
        memcpy(&single, &f, 4);
        x[i] = (double)single; /* near the floats' own corners, */
        memcpy(&bits, &x[i], 8);
        if (ops_below(2)) bits += low % 3 - 1; /* and half way between two */
        else if (ops_below(2)) bits ^= low & 0x1fffffffu;
        else if (kind != BITS_LIKE && ops_below(2)) bits = (uint64_t)f << 32 | low;
        memcpy(&x[i], &bits, 8);
    }
    return x;
}

static inline void bits_one_nan(void *values, llmpar_dtype dtype, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        if (dtype == LLMPAR_F32) {
            float *x = (float *)values + i;
            if (*x != *x) memset(x, 0xff, 4);
        } else if (dtype == LLMPAR_F64) {
            double *x = (double *)values + i;
            if (*x != *x) memset(x, 0xff, 8);
        }
    }
}

/* got of the GPU, want of a CPU level. */
static inline void bits_equal(const char *what, int against, void *got, void *want, llmpar_dtype dtype, int64_t n, int nans)
{
    size_t size = llmpar_dtype_size(dtype);
    if (nans) {
        bits_one_nan(got, dtype, n);
        bits_one_nan(want, dtype, n);
    }
    for (int64_t i = 0; i < n; i++)
        if (memcmp((const char *)got + (size_t)i * size, (const char *)want + (size_t)i * size, size)) {
            uint64_t g = 0, w = 0;
            memcpy(&g, (const char *)got + (size_t)i * size, size);
            memcpy(&w, (const char *)want + (size_t)i * size, size);
            TEST_FAIL("%s, %s: element %lld of %lld is %0*llx, want %0*llx as on %s", what, llmpar_dtype_name(dtype), (long long)i, (long long)n, (int)size * 2, (unsigned long long)g, (int)size * 2, (unsigned long long)w, bits_device(against)->name);
            return;
        }
}

/* A buffer of every device with the same bytes, `off` elements behind its alignment. bytes NULL: an output. */
typedef struct bits_buffer { void *at[BITS_DEVICES]; llmpar_dtype dtype; int64_t n; } bits_buffer;
static inline bits_buffer bits_put(llmpar_dtype dtype, const void *bytes, int64_t n, int64_t off)
{
    bits_buffer b;
    b.dtype = dtype;
    b.n = n;
    for (int d = 0; d < BITS_DEVICES; d++) b.at[d] = cuda_put_bytes(bits_device(d), llmpar_dtype_size(dtype), bytes, 1, n, n, off);
    return b;
}
/* All devices hold the same now. */
static inline void bits_check(const char *what, const bits_buffer *b, int nans)
{
    size_t bytes = (size_t)b->n * llmpar_dtype_size(b->dtype);
    void *got = malloc(bytes + 1), *want = malloc(bytes + 1);
    for (int d = BITS_PORTABLE; d < BITS_DEVICES; d++) {
        cuda_get_bytes(b->at[BITS_GPU], got);
        cuda_get_bytes(b->at[d], want);
        bits_equal(what, d, got, want, b->dtype, b->n, nans);
    }
    free(got);
    free(want);
}

#endif
