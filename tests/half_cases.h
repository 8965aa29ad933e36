/* half_cases: what the tests of BF16 and F16 on the CPU device share. Each case is one function that runs twice: with 16-bit buffers, and with f32 ones whose results are rounded here, by
   base/dtype.h. What both store is logged bit by bit, and the logs have to be equal: every operation gives the bits of its f32 self on the widened operands, rounded once where a buffer is
   stored below f32; at every level, at odd shapes and places, with any number of threads. */
#ifndef HALF_CASES_H
#define HALF_CASES_H

#include "bits.h"
#include "ops.h"

/* How a case runs. */
static llmpar_device *device;
static llmpar_dtype half;     /* BF16 or F16: the values of all operands */
static llmpar_dtype stored;   /* of buffers that may be 16 bits wide: half, or F32 in the reference */
static int wild;              /* among the values are infinities, NaNs and numbers that overflow F16 */

static uint32_t *log_bits[2];
static int64_t log_count[2], log_room[2];
static int log_now;
static inline void log_add(uint32_t bits)
{
    if (log_count[log_now] == log_room[log_now]) {
        log_room[log_now] = 2 * log_room[log_now] + 4096;
        log_bits[log_now] = (uint32_t *)realloc(log_bits[log_now], (size_t)log_room[log_now] * sizeof(uint32_t));
    }
    log_bits[log_now][log_count[log_now]++] = bits;
}
static inline uint16_t rounded(float x, llmpar_dtype dtype) { return dtype == LLMPAR_BF16 ? llmpar_f32_to_bf16(x) : llmpar_f32_to_f16(x); }
static inline float widened(uint16_t x, llmpar_dtype dtype) { return dtype == LLMPAR_BF16 ? llmpar_bf16_to_f32(x) : llmpar_f16_to_f32(x); }

/* n values that 16 bits hold exactly; the generator is not that of the places, so both runs draw the same. */
static uint64_t draw_state;
static inline uint32_t draw(void)
{
    draw_state = draw_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(draw_state >> 33);
}
static inline float *values(int64_t n, double scale)
{
    float *x = (float *)malloc((size_t)(n > 0 ? n : 1) * sizeof(float));
    for (int64_t i = 0; i < n; i++) {
        uint32_t kind = draw() % 64;
        x[i] = (float)(((double)draw() / 1073741824.0 - 1.0) * scale);
        if (kind == 0) x[i] = -0.0f;
        if (kind == 1) x[i] *= 1e-6f; /* an F16 subnormal */
        if (wild && kind == 2) x[i] = 6e4f;
        if (wild && kind == 3) x[i] = float_of(draw() % 2 ? 0x7f800000u : 0x7fc12000u);
        x[i] = widened(rounded(x[i], half), half);
    }
    return x;
}

/* A buffer of rows x width, row distance ld, at an odd place between poison; x NULL: an output. */
static inline void *put(llmpar_dtype dtype, const float *x, int64_t rows, int64_t width, int64_t ld)
{
    void *base = ops_put(dtype, NULL, rows, width, ld);
    for (int64_t r = 0; x && r < rows; r++)
        for (int64_t j = 0; j < width; j++) {
            if (dtype == LLMPAR_F32) ((float *)base)[r * ld + j] = x[r * width + j];
            else ((uint16_t *)base)[r * ld + j] = rounded(x[r * width + j], dtype);
            if (dtype != LLMPAR_F32 && x[r * width + j] != x[r * width + j] && j % 2) ((uint16_t *)base)[r * ld + j] &= (uint16_t)(dtype == LLMPAR_BF16 ? 0xffbf : 0xfdff); /* signalling; the reference has the quiet one */
        }
    return base;
}
static inline void *put_sum(const float *x, int64_t n) { return put(LLMPAR_F32, x, 1, n, n); }
static inline void take(const void *base, int64_t rows, int64_t width, int64_t ld)
{
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < width; j++) log_add(stored == LLMPAR_F32 ? rounded(((const float *)base)[r * ld + j], half) : ((const uint16_t *)base)[r * ld + j]);
}
static inline void take_sum(const void *base, int64_t n) { for (int64_t i = 0; i < n; i++) { float x; memcpy(&x, (const char *)base + i * 4, 4); log_add(bits_of(x)); } }

/* The two runs of a case. */
static inline void both(const char *name, void (*run)(int shape), int shape, llmpar_cpu_level level, int threads)
{
    for (log_now = 0; log_now < 2; log_now++) {
        device = ops_device(level, log_now ? threads : 1);
        stored = log_now ? half : LLMPAR_F32;
        log_count[log_now] = 0;
        draw_state = (uint64_t)shape * 77 + 5;
        run(shape);
    }
    if (log_count[0] != log_count[1] || log_count[0] == 0) TEST_FAIL("%s %d: %ld results and %ld", name, shape, (long)log_count[0], (long)log_count[1]);
    else for (int64_t i = 0; i < log_count[0]; i++)
        if (log_bits[0][i] != log_bits[1][i]) { TEST_FAIL("%s %d, %s %s, %d threads: result %ld of %ld is %08x, want %08x", name, shape, llmpar_cpu_level_name(level), llmpar_dtype_name(half), threads, (long)i, (long)log_count[0], log_bits[1][i], log_bits[0][i]); return; }
}
static int pairs_differ; /* the case is a product: BF16 units add in pairs, not as its f32 self does (test_gemm has their order) */
static inline void everywhere(const char *name, void (*run)(int shape), int shapes)
{
    for (int type = 0; type < 2; type++) for (int level = (int)LLMPAR_CPU_PORTABLE; level <= (int)llmpar_cpu_best_level(); level++) for (int shape = 0; shape < shapes; shape++) {
        half = type ? LLMPAR_F16 : LLMPAR_BF16;
        if (pairs_differ && half == LLMPAR_BF16 && level == (int)LLMPAR_CPU_AVX512BF16) continue;
        both(name, run, shape, (llmpar_cpu_level)level, 1 + shape % 3);
    }
    free(log_bits[0]); free(log_bits[1]);
    memset(log_bits, 0, sizeof log_bits);
    memset(log_room, 0, sizeof log_room);
}
static const int64_t dims[8] = { 1, 7, 16, 33, 130, 517, 1030, 2049 }; /* kernels widen 1,024 elements at a time */
enum { DIMS = 8 };
static inline void *workspace_of(size_t bytes, char **memory) /* exactly so many, at an odd place, poison behind them */
{
    *memory = (char *)malloc(bytes + 64);
    memset(*memory, 0xff, bytes + 64);
    return *memory + 5;
}
static inline void workspace_done(char *memory, size_t bytes)
{
    for (size_t i = 5 + bytes; i < bytes + 64; i++) if (memory[i] != (char)0xff) { TEST_FAIL("byte %ld behind a workspace of %ld was written", (long)(i - 5 - bytes), (long)bytes); break; }
    free(memory);
}

#endif
