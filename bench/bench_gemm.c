/* bench_gemm: the matrix product on one core, level by level, beside the arithmetic peak of that level measured in the same run
   (the level's own instructions on registers alone). Prints GFLOP/s and the part of the peak; then what 8 exact pieces cost over one, and what
   the product of BF16 operands into BF16 reaches of the f32 one, which does the same arithmetic.

     bench_gemm [level [kind m n k]]      kinds: nt nn tn */
#include "llmpar.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

static double seconds_of(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}
static double seconds(void) { return seconds_of(CLOCK_MONOTONIC); }

/* ---- peak: independent chains in registers, enough to hide the latency ---- */

/* The chains are written one by one: an array of them may end up in memory. */
#define PEAK(name, target, vector, lanes, spread, step) \
    target static double name(long rounds, volatile float *sink) \
    { \
        vector x = spread(1.0f + 1e-7f * sink[0]), y = spread(1e-7f), CHAINS_OF(x); \
        double start = seconds(); \
        for (long round = 0; round < rounds; round++) { CHAINS_STEP(step) } \
        start = seconds() - start; \
        s0 = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)) + ((s8 + s9) + (s10 + s11)); \
        for (int i = 0; i < lanes; i++) sink[0] += ((float *)&s0)[i]; \
        return 2.0 * lanes * 12 * (double)rounds / start * 1e-9; \
    }
#define CHAINS_OF(x) s0 = x, s1 = s0 + x, s2 = s1 + x, s3 = s2 + x, s4 = s3 + x, s5 = s4 + x, s6 = s5 + x, s7 = s6 + x, s8 = s7 + x, s9 = s8 + x, s10 = s9 + x, s11 = s10 + x
#define CHAINS_STEP(step) \
    s0 = step(x, s0, y); s1 = step(x, s1, y); s2 = step(x, s2, y); s3 = step(x, s3, y); s4 = step(x, s4, y); s5 = step(x, s5, y); \
    s6 = step(x, s6, y); s7 = step(x, s7, y); s8 = step(x, s8, y); s9 = step(x, s9, y); s10 = step(x, s10, y); s11 = step(x, s11, y);
#if defined(__x86_64__)
#define MULTIPLY_ADD_4(a, b, c) _mm_add_ps(_mm_mul_ps(a, b), c)
#define MULTIPLY_ADD_8(a, b, c) _mm256_add_ps(_mm256_mul_ps(a, b), c)
PEAK(peak_sse2, , __m128, 4, _mm_set1_ps, MULTIPLY_ADD_4)
PEAK(peak_avx, __attribute__((target("avx"))), __m256, 8, _mm256_set1_ps, MULTIPLY_ADD_8)
PEAK(peak_avx2, __attribute__((target("avx2,fma"))), __m256, 8, _mm256_set1_ps, _mm256_fmadd_ps)
PEAK(peak_avx512, __attribute__((target("avx512f"))), __m512, 16, _mm512_set1_ps, _mm512_fmadd_ps)
static double peak(llmpar_cpu_level level)
{
    volatile float sink[1] = { 0 };
    if (level == LLMPAR_CPU_AVX512) return peak_avx512(100000, sink);
    if (level == LLMPAR_CPU_AVX2) return peak_avx2(200000, sink);
    return __builtin_cpu_supports("avx") ? peak_avx(100000, sink) : peak_sse2(100000, sink);
}
#else
#define FMA_NEON(a, b, c) vfmaq_f32(c, a, b)
PEAK(peak_neon, , float32x4_t, 4, vdupq_n_f32, FMA_NEON)
static double peak(llmpar_cpu_level level)
{
    volatile float sink[1] = { 0 };
    (void)level;
    return peak_neon(100000, sink);
}
#endif

/* ---- products ---- */

static const char *const kind_names[] = { "?", "nt", "nn", "tn" };

static char *matrix(llmpar_device *device, llmpar_dtype dtype, int64_t count)
{
    void *memory = NULL;
    if (device->alloc(device, (size_t)count * llmpar_dtype_size(dtype), &memory)) exit(1);
    for (int64_t i = 0; i < count; i++) {
        float x = (float)((i * 2654435761u) % 1000) * 1e-3f - 0.5f;
        if (dtype == LLMPAR_F32) ((float *)memory)[i] = x;
        else ((uint16_t *)memory)[i] = llmpar_f32_to_bf16(x);
    }
    return (char *)memory;
}

/* Best of several runs, in GFLOP/s; the summed dim in `pieces` equal pieces. Raises *top to the best peak seen between the runs, because clocks move. */
static double measure(llmpar_device *device, llmpar_cpu_level level, llmpar_gemm_kind kind, llmpar_dtype dtype, int64_t m, int64_t n, int64_t k, int32_t pieces, double budget, double *top)
{
    char *a = matrix(device, dtype, m * k), *b = matrix(device, dtype, n * k), *c = matrix(device, dtype, m * n);
    int64_t size = (int64_t)llmpar_dtype_size(dtype);
    llmpar_gemm_segment *segments = (llmpar_gemm_segment *)calloc((size_t)pieces, sizeof *segments);
    llmpar_gemm_args args;
    double best = 1e30, best_shared = 1e30, begin = seconds();
    memset(&args, 0, sizeof args);
    args.m = m;
    args.n = n;
    args.c = c;
    args.ldc = n;
    args.segments = segments;
    args.segment_count = args.pieces = pieces;
    args.kind = kind;
    args.dtype = dtype;
    for (int32_t i = 0; i < pieces; i++) {
        int64_t first = llmpar_piece_begin(i, k, pieces);
        segments[i].piece = i;
        segments[i].k = llmpar_piece_begin(i + 1, k, pieces) - first;
        segments[i].lda = kind == LLMPAR_GEMM_TN ? m : k;
        segments[i].ldb = kind == LLMPAR_GEMM_NT ? k : n;
        segments[i].a = a + (kind == LLMPAR_GEMM_TN ? first * m : first) * size;
        segments[i].b = b + (kind == LLMPAR_GEMM_NT ? first : first * n) * size;
    }
    args.workspace_bytes = device->gemm_workspace(device, &args);
    if (device->alloc(device, args.workspace_bytes, &args.workspace)) exit(1);
    for (int round = 0; round < 3 || seconds() - begin < budget; round++) {
        double now = peak(level), start = seconds(), own = seconds_of(CLOCK_THREAD_CPUTIME_ID);
        if (now > *top) *top = now;
        if (device->gemm(device, NULL, &args)) { fprintf(stderr, "%s\n", device->error->text); exit(1); }
        own = seconds_of(CLOCK_THREAD_CPUTIME_ID) - own;
        start = seconds() - start;
        if (own > 0.97 * start && start < best) best = start;
        if (own < best_shared) best_shared = own;
    }
    if (best == 1e30) best = best_shared; /* on a busy machine no run had the core for itself: the thread's own time, which is coarser */
    device->free(device, args.workspace, args.workspace_bytes);
    device->free(device, a, (size_t)(m * k * size));
    device->free(device, b, (size_t)(n * k * size));
    device->free(device, c, (size_t)(m * n * size));
    free(segments);
    return 2.0 * (double)m * (double)n * (double)k / best * 1e-9;
}

int main(int argc, char **argv)
{
    static const int64_t shapes[][3] = { { 1536, 1536, 1536 }, { 1024, 1024, 4096 }, { 4096, 512, 512 }, { 256, 256, 256 }, { 12, 2048, 2048 }, { 1, 2048, 2048 } };
    llmpar_cpu_level only = LLMPAR_CPU_DEFAULT;
    if (argc > 1 && !llmpar_cpu_level_parse(argv[1], &only)) { fprintf(stderr, "bench_gemm: expected portable, avx2 or avx512, got %s\n", argv[1]); return 1; }
    for (int level = (int)LLMPAR_CPU_PORTABLE; level <= (int)llmpar_cpu_best_level(); level++) {
        llmpar_heap heap;
        llmpar_error error;
        llmpar_cpu_desc desc;
        llmpar_device *device;
        double top = 0;
        if (only && level != (int)only) continue;
        memset(&desc, 0, sizeof desc);
        desc.level = (llmpar_cpu_level)level;
        llmpar_heap_init(&heap, NULL);
        llmpar_error_clear(&error);
        if (llmpar_cpu_create(&heap, &error, &desc, &device)) { fprintf(stderr, "%s\n", error.text); return 1; }
        printf("%s\n  kind     m     n     k   1 piece      peak  of peak  8 pieces    cost      bf16  of f32\n", device->name);
        for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++)
            for (int kind = 1; kind <= 3; kind++) {
                double one, eight, half;
                int64_t m = argc > 5 ? atoll(argv[3]) : shapes[s][0], n = argc > 5 ? atoll(argv[4]) : shapes[s][1], k = argc > 5 ? atoll(argv[5]) : shapes[s][2];
                if (argc > 5 && (s > 0 || strcmp(argv[2], kind_names[kind]))) continue;
                one = measure(device, desc.level, (llmpar_gemm_kind)kind, LLMPAR_F32, m, n, k, 1, argc > 5 ? 1.0 : 0.1, &top);
                eight = measure(device, desc.level, (llmpar_gemm_kind)kind, LLMPAR_F32, m, n, k, 8, argc > 5 ? 1.0 : 0.1, &top);
                half = measure(device, desc.level, (llmpar_gemm_kind)kind, LLMPAR_BF16, m, n, k, 1, argc > 5 ? 1.0 : 0.1, &top);
                printf("  %4s %5d %5d %5d %9.1f %9.1f %7.1f%% %9.1f %6.1f%% %9.1f %6.1f%%\n", kind_names[kind], (int)m, (int)n, (int)k, one, top, 100 * one / top, eight, 100 * (one / eight - 1), half, 100 * half / one);
            }
        llmpar_cpu_destroy(device);
    }
    return 0;
}
