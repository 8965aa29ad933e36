/* peak: what the processor can do at best, as bounds for bench_pairs(): multiply-adds in registers alone, and bytes from memory. Each call measures for
   about a millisecond, on one thread or on several at once.

     bench_fma_of peak = { BENCH_AVX512, 1 };        bench_fma(&peak) is FLOPs a second
     bench_memory_of memory = bench_memory(512, 1);  bench_read(&memory), bench_triad(&memory), bench_memcpy(&memory) are bytes a second */
#ifndef PEAK_H
#define PEAK_H

#include "bench.h"

#include <pthread.h>
#include <stdint.h>
#if defined(__linux__)
#include <sched.h>
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define BENCH_SLICE 1e-3
enum { BENCH_MOST_THREADS = 64 };

/* ---- several threads at once: each on a core of its own, all begin together, and their rates are added ---- */

typedef struct bench_crew { bench_rate rate; void *user; double result; int *waiting, index; } bench_crew;

#if defined(__linux__)
static cpu_set_t bench_processors; /* what the program was started on: rank threads may have pinned themselves since */
__attribute__((constructor)) static void bench_processors_note(void) { sched_getaffinity(0, sizeof bench_processors, &bench_processors); }
#endif

/* How many processors the program may use. */
static inline int bench_cores(void)
{
#if defined(__linux__)
    return CPU_COUNT(&bench_processors);
#else
    return (int)sysconf(_SC_NPROCESSORS_ONLN);
#endif
}

/* For llmpar_cpu_desc.processors: a core for each thread, as a launch has it (left alone, the system may keep a worker on its creator's core for seconds); the caller moves to its own, the last. NULL for one thread. */
static inline const int32_t *bench_places(int threads)
{
#if defined(__linux__)
    static int32_t places[BENCH_MOST_THREADS];
    cpu_set_t own;
    int seen = 0;
    CPU_ZERO(&own);
    for (int i = CPU_SETSIZE - 1; i >= 0 && seen < threads && threads <= BENCH_MOST_THREADS; i--)
        if (CPU_ISSET(i, &bench_processors)) places[seen++] = i;
    if (threads < 2 || seen < threads) return NULL;
    CPU_SET(places[0], &own);
    pthread_setaffinity_np(pthread_self(), sizeof own, &own);
    return places;
#else
    (void)threads;
    return NULL;
#endif
}

static inline void *bench_crew_main(void *user)
{
    bench_crew *c = (bench_crew *)user;
#if defined(__linux__)
    cpu_set_t own;
    CPU_ZERO(&own);
    for (int i = 0, seen = 0; i < CPU_SETSIZE; i++)
        if (CPU_ISSET(i, &bench_processors) && seen++ == c->index % CPU_COUNT(&bench_processors)) CPU_SET(i, &own);
    pthread_setaffinity_np(pthread_self(), sizeof own, &own);
#endif
    __atomic_sub_fetch(c->waiting, 1, __ATOMIC_ACQ_REL);
    while (__atomic_load_n(c->waiting, __ATOMIC_ACQUIRE) > 0) { }
    c->result = c->rate(c->user);
    return NULL;
}

/* Sum of rate(users + i * size) on `threads` threads. */
static inline double bench_together(int threads, bench_rate rate, void *users, size_t size)
{
    bench_crew crew[BENCH_MOST_THREADS];
    pthread_t thread[BENCH_MOST_THREADS];
    int waiting = threads;
    double sum = 0;
    if (threads < 1 || threads > BENCH_MOST_THREADS) { fprintf(stderr, "bench: %d threads, expected 1 to %d\n", threads, (int)BENCH_MOST_THREADS); exit(2); }
    if (threads == 1) return rate(users);
    for (int i = 0; i < threads; i++) {
        crew[i].rate = rate;
        crew[i].user = (char *)users + (size_t)i * size;
        crew[i].waiting = &waiting;
        crew[i].index = i;
        if (pthread_create(&thread[i], NULL, bench_crew_main, &crew[i])) { fprintf(stderr, "bench: no thread\n"); exit(1); }
    }
    for (int i = 0; i < threads; i++) {
        pthread_join(thread[i], NULL);
        sum += crew[i].result;
    }
    return sum;
}

/* ---- multiply-adds: twelve independent chains hide the latency, written one by one because an array of them may end up in memory ---- */

enum bench_kind {
    BENCH_MULTIPLY_ADD, /* what portable C reaches: a multiplication and an addition, 8 wide where the processor has AVX, else 4 */
    BENCH_AVX2, BENCH_AVX512, BENCH_AVX512_BF16, BENCH_NEON
};
typedef struct bench_fma_of { enum bench_kind kind; int threads; } bench_fma_of;

#define BENCH_CHAINS(x) s0 = x, s1 = s0 + x, s2 = s1 + x, s3 = s2 + x, s4 = s3 + x, s5 = s4 + x, s6 = s5 + x, s7 = s6 + x, s8 = s7 + x, s9 = s8 + x, s10 = s9 + x, s11 = s10 + x
#define BENCH_STEPS(step) \
    s0 = step(x, s0, y); s1 = step(x, s1, y); s2 = step(x, s2, y); s3 = step(x, s3, y); s4 = step(x, s4, y); s5 = step(x, s5, y); \
    s6 = step(x, s6, y); s7 = step(x, s7, y); s8 = step(x, s8, y); s9 = step(x, s9, y); s10 = step(x, s10, y); s11 = step(x, s11, y);
/* flops: of one step. The chains meet in one value that the compiler believes to be used. */
#define BENCH_FMA(name, target, vector, operand, value_x, value_y, value_s, step, flops) \
    target static double name(void *user) \
    { \
        operand x = value_x, y = value_y; \
        vector BENCH_CHAINS(value_s); \
        double start = bench_now(), seconds; \
        long rounds = 0; \
        (void)user; \
        do { \
            for (long end = rounds + 4000; rounds < end; rounds++) { BENCH_STEPS(step) } \
            seconds = bench_now() - start; \
        } while (seconds < BENCH_SLICE); \
        s0 = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)) + ((s8 + s9) + (s10 + s11)); \
        __asm__ __volatile__("" : : "m"(s0)); \
        return 12.0 * (flops) * (double)rounds / seconds; \
    }
#if defined(__x86_64__)
#define BENCH_STEP_4(x, s, y) _mm_add_ps(_mm_mul_ps(x, s), y)
#define BENCH_STEP_8(x, s, y) _mm256_add_ps(_mm256_mul_ps(x, s), y)
#define BENCH_STEP_BF16(x, s, y) _mm512_dpbf16_ps(s, x, y)
BENCH_FMA(bench_fma_sse2, , __m128, __m128, _mm_set1_ps(0.999f), _mm_set1_ps(1e-3f), _mm_set1_ps(1), BENCH_STEP_4, 2 * 4)
BENCH_FMA(bench_fma_avx, __attribute__((target("avx"))), __m256, __m256, _mm256_set1_ps(0.999f), _mm256_set1_ps(1e-3f), _mm256_set1_ps(1), BENCH_STEP_8, 2 * 8)
BENCH_FMA(bench_fma_avx2, __attribute__((target("avx2,fma"))), __m256, __m256, _mm256_set1_ps(0.999f), _mm256_set1_ps(1e-3f), _mm256_set1_ps(1), _mm256_fmadd_ps, 2 * 8)
BENCH_FMA(bench_fma_avx512, __attribute__((target("avx512f"))), __m512, __m512, _mm512_set1_ps(0.999f), _mm512_set1_ps(1e-3f), _mm512_set1_ps(1), _mm512_fmadd_ps, 2 * 16)
#if defined(__clang__) || __GNUC__ >= 10
#define BENCH_HAS_BF16 1
#else
#define BENCH_HAS_BF16 0
#endif
#if BENCH_HAS_BF16
BENCH_FMA(bench_fma_bf16, __attribute__((target("avx512f,avx512bf16"))), __m512, __m512bh, (__m512bh)_mm512_set1_epi32(0x3a003a00), (__m512bh)_mm512_set1_epi32(0x3a003a00), _mm512_set1_ps(1), BENCH_STEP_BF16, 2 * 32)
#endif
#elif defined(__aarch64__)
#define BENCH_STEP_NEON(x, s, y) vfmaq_f32(y, x, s)
BENCH_FMA(bench_fma_neon, , float32x4_t, float32x4_t, vdupq_n_f32(0.999f), vdupq_n_f32(1e-3f), vdupq_n_f32(1), BENCH_STEP_NEON, 2 * 4)
#endif

/* Does the processor have it? */
static inline int bench_fma_has(enum bench_kind kind)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (kind == BENCH_AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (kind == BENCH_AVX512) return __builtin_cpu_supports("avx512f");
#if BENCH_HAS_BF16
    if (kind == BENCH_AVX512_BF16) return __builtin_cpu_supports("avx512bf16");
#endif
    return kind == BENCH_MULTIPLY_ADD;
#elif defined(__aarch64__)
    return kind == BENCH_NEON;
#else
    return 0;
#endif
}

static inline const char *bench_fma_name(enum bench_kind kind)
{
    static const char *const names[] = { "mul+add", "avx2", "avx512", "avx512bf16", "neon" };
    return names[kind];
}

/* The peak that a dispatch level of the library stands beside, by the level's name; bf16: of a product of BF16 operands, where there are such units. */
static inline enum bench_kind bench_fma_kind(const char *level, int bf16)
{
#if defined(__aarch64__)
    (void)level;
    (void)bf16;
    return BENCH_NEON;
#else
    if (!strncmp(level, "avx512", 6)) return bf16 && strcmp(level, "avx512") && bench_fma_has(BENCH_AVX512_BF16) ? BENCH_AVX512_BF16 : BENCH_AVX512;
    return strcmp(level, "avx2") ? BENCH_MULTIPLY_ADD : BENCH_AVX2;
#endif
}

/* user: bench_fma_of. FLOPs a second, of all threads together. */
static inline double bench_fma(void *user)
{
    const bench_fma_of *of = (const bench_fma_of *)user;
    bench_rate rate = NULL;
    if (bench_fma_has(of->kind)) {
#if defined(__x86_64__)
        if (of->kind == BENCH_MULTIPLY_ADD) rate = __builtin_cpu_supports("avx") ? bench_fma_avx : bench_fma_sse2;
        if (of->kind == BENCH_AVX2) rate = bench_fma_avx2;
        if (of->kind == BENCH_AVX512) rate = bench_fma_avx512;
#if BENCH_HAS_BF16
        if (of->kind == BENCH_AVX512_BF16) rate = bench_fma_bf16;
#endif
#elif defined(__aarch64__)
        rate = bench_fma_neon;
#endif
    }
    if (!rate) { fprintf(stderr, "bench: this processor has no %s\n", bench_fma_name(of->kind)); exit(2); }
    return bench_together(of->threads, rate, user, 0);
}

/* ---- memory: a buffer of far more than the caches, walked slice by slice (8 MB a thread), from where the last call stopped ---- */

typedef struct bench_memory_of { char *base; size_t bytes, slice, at; int threads; } bench_memory_of;
typedef struct bench_walk { char *base; size_t bytes; } bench_walk; /* one thread's slice */

/* megabytes >= 32. Never freed by the measurements; free(m.base). In huge pages where the system has them, as the library's own large blocks: small ones read a fifth slower, a bound of them flatters. */
static inline bench_memory_of bench_memory(size_t megabytes, int threads)
{
    bench_memory_of m;
    memset(&m, 0, sizeof m);
    m.bytes = megabytes << 20;
    m.slice = 8u << 20;
    m.threads = threads;
    if (posix_memalign((void **)&m.base, 1 << 21, m.bytes) || m.slice * (size_t)threads > m.bytes) { fprintf(stderr, "bench: no %zu MB for %d threads\n", megabytes, threads); exit(1); }
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    (void)madvise(m.base, m.bytes, MADV_HUGEPAGE); /* advice: a system without them says no */
#endif
    memset(m.base, 1, m.bytes);
    return m;
}

#if defined(__x86_64__)
#define BENCH_WIDE __attribute__((target("avx2")))
#else
#define BENCH_WIDE
#endif
typedef uint64_t bench_lanes __attribute__((vector_size(32), may_alias));
typedef float bench_floats __attribute__((vector_size(32), may_alias));

/* Four streams a quarter apart: more misses in flight than one stream has. */
#define BENCH_READ_BODY \
    const bench_walk *w = (const bench_walk *)user; \
    const bench_lanes *a = (const bench_lanes *)(const void *)w->base, *end = a + w->bytes / 32 / 4; \
    size_t q = w->bytes / 32 / 4; \
    bench_lanes s0 = { 0 }, s1 = s0, s2 = s0, s3 = s0; \
    double start = bench_now(); \
    for (; a < end; a += 2) { \
        s0 |= a[0] | a[1]; \
        s1 |= a[q] | a[q + 1]; \
        s2 |= a[2 * q] | a[2 * q + 1]; \
        s3 |= a[3 * q] | a[3 * q + 1]; \
    } \
    s0 |= s1 | s2 | s3; \
    __asm__ __volatile__("" : : "m"(s0)); \
    return (double)w->bytes / (bench_now() - start);
/* a = b + s c, a third of the slice each; 3 * the bytes of a count, the line that a store fetches does not. */
#define BENCH_TRIAD_BODY \
    const bench_walk *w = (const bench_walk *)user; \
    size_t n = w->bytes / 3 / 64 * 2; \
    bench_floats *a = (bench_floats *)(void *)w->base; \
    const bench_floats *b = a + n, *c = b + n; \
    double start = bench_now(); \
    for (size_t i = 0; i < n; i += 2) { \
        a[i] = b[i] + c[i] * 3.0f; \
        a[i + 1] = b[i + 1] + c[i + 1] * 3.0f; \
    } \
    __asm__ __volatile__("" : : : "memory"); \
    return 96.0 * (double)n / (bench_now() - start);
static double bench_read_plain(void *user) { BENCH_READ_BODY }
static double bench_triad_plain(void *user) { BENCH_TRIAD_BODY }
#if defined(__x86_64__)
BENCH_WIDE static double bench_read_wide(void *user) { BENCH_READ_BODY }
BENCH_WIDE static double bench_triad_wide(void *user) { BENCH_TRIAD_BODY }
#endif
/* 2 * the bytes copied. */
static double bench_memcpy_plain(void *user)
{
    const bench_walk *w = (const bench_walk *)user;
    double start = bench_now();
    memcpy(w->base, w->base + w->bytes / 2, w->bytes / 2);
    __asm__ __volatile__("" : : : "memory");
    return (double)w->bytes / (bench_now() - start);
}

static inline double bench_memory_walk(void *user, bench_rate rate)
{
    bench_memory_of *m = (bench_memory_of *)user;
    bench_walk walk[BENCH_MOST_THREADS];
    for (int i = 0; i < m->threads && i < BENCH_MOST_THREADS; i++) {
        if (m->at + m->slice > m->bytes) m->at = 0;
        walk[i].base = m->base + m->at;
        walk[i].bytes = m->slice;
        m->at += m->slice;
    }
    return bench_together(m->threads, rate, walk, sizeof walk[0]);
}
static inline int bench_memory_wide(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2");
#else
    return 0;
#endif
}
/* user: bench_memory_of. Bytes a second, of all threads together. */
#if defined(__x86_64__)
static inline double bench_read(void *user) { return bench_memory_walk(user, bench_memory_wide() ? bench_read_wide : bench_read_plain); }
static inline double bench_triad(void *user) { return bench_memory_walk(user, bench_memory_wide() ? bench_triad_wide : bench_triad_plain); }
#else
static inline double bench_read(void *user) { return bench_memory_walk(user, bench_read_plain); }
static inline double bench_triad(void *user) { return bench_memory_walk(user, bench_triad_plain); }
#endif
static inline double bench_memcpy(void *user) { return bench_memory_walk(user, bench_memcpy_plain); }

#endif
