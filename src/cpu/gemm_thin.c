/* gemm_thin: the product of a few rows with weights that lie as they are stored, c[M,N] = a[M,K] b[N,K]^T, M <= 16. It waits for the weights to come from
   memory, so everything serves one purpose: each byte is read once, in order, without a pause.

     b: 16 rows, four lines of each at a time                                      c[m, n .. n + 16]: chains in registers, lanes are n
        |--####....----------|                                                     x[k][m] * | word of k of 16 rows |
        |--####....----------|   -- 16 x 16 words are transposed in L1 -->                   | ...                  |
        |--####....----------|      while the chains take them, the same rows
        |--####....----------|      are fetched into L2 further on (....)

   Of 9 to 16 rows of x vectors of 16 lanes take a k of all of them at a time, times one weight: then lanes are m and nothing is transposed. A chain may go on from memory anywhere,
   which no bit shows, and the tree over pieces is that of gemm.c: an element has the bits that it gets in a product of many rows. */
#include "cpu/gemm_thin_internal.h"

#include "base/size.h"

#include <string.h>
#if defined(__x86_64__) && !defined(LLMPAR_NO_SIMD)
#include <immintrin.h>
#elif defined(__aarch64__) && !defined(LLMPAR_NO_SIMD)
#include <arm_neon.h>
#endif

#if !defined(LLMPAR_NO_SIMD)

enum { LLMPAR__THIN_WORDS = 16, LLMPAR__THIN_AHEAD = 1024 /* bytes of a row */ };
#define LLMPAR__THIN_FETCH(p) __builtin_prefetch(p, 0, 2) /* into L2: L1 has too few places for lines on their way from memory, and rows a power of two apart share few of its sets */
#define LLMPAR__THIN_K_PER_WORD(form) ((form) == LLMPAR__THIN_KIND_F32 ? 1 : 2)
#define LLMPAR__THIN_LINKS_PER_WORD(form) ((form) == LLMPAR__THIN_KIND_F32 || (form) == LLMPAR__THIN_KIND_PAIRS ? 1 : 2)
enum { LLMPAR__THIN_PARTS = 16, LLMPAR__THIN_SHARES = 8 }; /* tasks of a thread: others may have half of its processor */
#define LLMPAR__THIN_SERIAL (1 << 18) /* bytes and multiplications that one thread is done with before another has woken up */
#if defined(__clang__)
#define LLMPAR__THIN_UNROLL _Pragma("unroll")
#define LLMPAR__THIN_KEEP _Pragma("nounroll") /* four times the code takes compilers longer and is no faster */
#else
#define LLMPAR__THIN_KEEP _Pragma("GCC unroll 1")
#define LLMPAR__THIN_UNROLL _Pragma("GCC unroll 16")
#endif

typedef struct llmpar__gemm_thin_level {
    int64_t columns; /* of a tile */
    int32_t block;   /* rows of x side by side */
    llmpar__gemm_thin_fn span;
    void (*turn_8)(const char *in, int64_t ld, float *out); /* out[8][8] = in[8][8], rows ld bytes apart, and so for 16; NULL: this level has none */
    void (*turn_16)(const char *in, int64_t ld, float *out);
} llmpar__gemm_thin_level;

#if defined(__x86_64__)

/* In each 128-bit lane four rows become four columns. */
#define LLMPAR__THIN_FOUR(unpacklo, unpackhi, shuffle, a, b, c, d, store) do { \
    y0 = unpacklo(a, b); y1 = unpacklo(c, d); y2 = unpackhi(a, b); y3 = unpackhi(c, d); \
    store(0, shuffle(y0, y1, 0x44)); store(1, shuffle(y0, y1, 0xee)); store(2, shuffle(y2, y3, 0x44)); store(3, shuffle(y2, y3, 0xee)); \
} while (0)

#define LLMPAR__THIN_LOAD_8(r) _mm256_loadu_ps((const float *)(const void *)(in + (r) * ld))
#define LLMPAR__THIN_STORE_8(t, v) _mm256_store_ps(out + (j + (t)) * 8, v)
#define LLMPAR__THIN_TRANSPOSE_8() \
    __m256 y0, y1, y2, y3, a0, a1, a2, a3, b0, b1, b2, b3; \
    int j = 0; \
    a0 = LLMPAR__THIN_LOAD_8(0); b0 = LLMPAR__THIN_LOAD_8(4); a1 = LLMPAR__THIN_LOAD_8(1); b1 = LLMPAR__THIN_LOAD_8(5); \
    a2 = LLMPAR__THIN_LOAD_8(2); b2 = LLMPAR__THIN_LOAD_8(6); a3 = LLMPAR__THIN_LOAD_8(3); b3 = LLMPAR__THIN_LOAD_8(7); \
    y0 = _mm256_permute2f128_ps(a0, b0, 0x20); b0 = _mm256_permute2f128_ps(a0, b0, 0x31); a0 = y0; \
    y0 = _mm256_permute2f128_ps(a1, b1, 0x20); b1 = _mm256_permute2f128_ps(a1, b1, 0x31); a1 = y0; \
    y0 = _mm256_permute2f128_ps(a2, b2, 0x20); b2 = _mm256_permute2f128_ps(a2, b2, 0x31); a2 = y0; \
    y0 = _mm256_permute2f128_ps(a3, b3, 0x20); b3 = _mm256_permute2f128_ps(a3, b3, 0x31); a3 = y0; \
    LLMPAR__THIN_FOUR(_mm256_unpacklo_ps, _mm256_unpackhi_ps, _mm256_shuffle_ps, a0, a1, a2, a3, LLMPAR__THIN_STORE_8); \
    j = 4; \
    LLMPAR__THIN_FOUR(_mm256_unpacklo_ps, _mm256_unpackhi_ps, _mm256_shuffle_ps, b0, b1, b2, b3, LLMPAR__THIN_STORE_8)

__attribute__((target("avx"), noinline)) static void llmpar__gemm_thin_avx_transpose(const char *in, int64_t ld, float *out) { LLMPAR__THIN_TRANSPOSE_8(); }
static inline __attribute__((always_inline, target("avx"))) __m256 llmpar__gemm_thin_avx_bf16(__m256 word, const int i)
{
    __m128i low = _mm256_castsi256_si128(_mm256_castps_si256(word)), high = _mm256_extractf128_si256(_mm256_castps_si256(word), 1);
    if (i) return _mm256_and_ps(word, _mm256_castsi256_ps(_mm256_set1_epi32((int)0xffff0000u)));
    return _mm256_castsi256_ps(_mm256_insertf128_si256(_mm256_castsi128_si256(_mm_slli_epi32(low, 16)), _mm_slli_epi32(high, 16), 1));
}
/* First the portable level, with the bits of gemm_portable.inc; it has no conversion of F16. */
#define LLMPAR__THIN_NAME(part) llmpar__gemm_thin_avx_##part
#define LLMPAR__THIN_TARGET __attribute__((target("avx")))
#define LLMPAR__THIN_VECTOR __m256
#define LLMPAR__THIN_LANES 8
#define LLMPAR__THIN_PANELS 2
#define LLMPAR__THIN_MANY 0
#define LLMPAR__THIN_READ(p) _mm256_load_ps(p)
#define LLMPAR__THIN_WRITE(p, v) _mm256_store_ps(p, v)
#define LLMPAR__THIN_WIDE 0
#define LLMPAR__THIN_MULTIPLY_ADD(p, b, sum) __extension__ ({ __m256 t_ = sum, p_; __asm__("vmulps %3, %2, %1\n\tvaddps %0, %1, %0" : "+x"(t_), "=&x"(p_) : "x"(_mm256_broadcast_ss(p)), "x"(b)); t_; })
#define LLMPAR__THIN_BF16(word, i) llmpar__gemm_thin_avx_bf16(word, i)
#define LLMPAR__THIN_F16(word, i) (word)
#include "cpu/gemm_thin.inc"

#define LLMPAR__THIN_AVX2 target("avx2,fma,f16c")
__attribute__((LLMPAR__THIN_AVX2, noinline)) static void llmpar__gemm_thin_avx2_transpose(const char *in, int64_t ld, float *out) { LLMPAR__THIN_TRANSPOSE_8(); }
static inline __attribute__((always_inline, LLMPAR__THIN_AVX2)) __m256 llmpar__gemm_thin_avx2_bf16(__m256 word, const int i)
{
    __m256i bits = _mm256_castps_si256(word);
    return _mm256_castsi256_ps(i ? _mm256_and_si256(bits, _mm256_set1_epi32((int)0xffff0000u)) : _mm256_slli_epi32(bits, 16));
}
static inline __attribute__((always_inline, LLMPAR__THIN_AVX2)) __m256 llmpar__gemm_thin_avx2_f16(__m256 word, const int i)
{
    __m256i bits = _mm256_castps_si256(word);
    bits = i ? _mm256_srli_epi32(bits, 16) : _mm256_and_si256(bits, _mm256_set1_epi32(0xffff));
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
}
#define LLMPAR__THIN_NAME(part) llmpar__gemm_thin_avx2_##part
#define LLMPAR__THIN_TARGET __attribute__((LLMPAR__THIN_AVX2))
#define LLMPAR__THIN_VECTOR __m256
#define LLMPAR__THIN_LANES 8
#define LLMPAR__THIN_PANELS 2
#define LLMPAR__THIN_MANY 0
#define LLMPAR__THIN_READ(p) _mm256_load_ps(p)
#define LLMPAR__THIN_WRITE(p, v) _mm256_store_ps(p, v)
#define LLMPAR__THIN_WIDE 0
#define LLMPAR__THIN_MULTIPLY_ADD(p, b, sum) __extension__ ({ __m256 t_ = sum; __asm__("vfmadd231ps %2, %1, %0" : "+x"(t_) : "x"(_mm256_broadcast_ss(p)), "x"(b)); t_; })
#define LLMPAR__THIN_BF16(word, i) llmpar__gemm_thin_avx2_bf16(word, i)
#define LLMPAR__THIN_F16(word, i) llmpar__gemm_thin_avx2_f16(word, i)
#include "cpu/gemm_thin.inc"

#define LLMPAR__THIN_AVX512 target("avx512f,avx512vl,avx2,fma,f16c")
/* The unmasked forms of these warn of uninitialised values in g++ 12's own header. */
#define LLMPAR__THIN_LOW(a, b) _mm512_maskz_unpacklo_ps(0xffff, a, b)
#define LLMPAR__THIN_HIGH(a, b) _mm512_maskz_unpackhi_ps(0xffff, a, b)
#define LLMPAR__THIN_SHUFFLE(a, b, order) _mm512_maskz_shuffle_ps(0xffff, a, b, order)
#define LLMPAR__THIN_QUARTERS(a, b, order) _mm512_maskz_shuffle_f32x4(0xffff, a, b, order)
#define LLMPAR__THIN_KEPT(v) __extension__ ({ __m512 t_ = v; __asm__("" : "+v"(t_)); t_; }) /* else compilers load it a second time where it is used twice */
#define LLMPAR__THIN_LINE(r) LLMPAR__THIN_KEPT(_mm512_loadu_ps((const void *)(in + (r) * ld)))
/* A transposition has two halves of four steps each, so that it can go on between multiplications. Whole lines are loaded, since rows may lie so that few of their lines fit in L1 together:
   rows 0, 4, 8, 12 from `in` on give four vectors whose quarters are four words of each, 4 * 16 floats apart. */
static inline __attribute__((always_inline, LLMPAR__THIN_AVX512)) void llmpar__gemm_thin_avx512_quarters(const char *in, int64_t ld, float *out)
{
    __m512 a = LLMPAR__THIN_LINE(0), b = LLMPAR__THIN_LINE(4), c = LLMPAR__THIN_LINE(8), d = LLMPAR__THIN_LINE(12);
    __m512 y0 = LLMPAR__THIN_QUARTERS(a, b, 0x44), y1 = LLMPAR__THIN_QUARTERS(c, d, 0x44), y2 = LLMPAR__THIN_QUARTERS(a, b, 0xee), y3 = LLMPAR__THIN_QUARTERS(c, d, 0xee);
    _mm512_store_ps((void *)out, LLMPAR__THIN_QUARTERS(y0, y1, 0x88));
    _mm512_store_ps((void *)(out + 64), LLMPAR__THIN_QUARTERS(y0, y1, 0xdd));
    _mm512_store_ps((void *)(out + 128), LLMPAR__THIN_QUARTERS(y2, y3, 0x88));
    _mm512_store_ps((void *)(out + 192), LLMPAR__THIN_QUARTERS(y2, y3, 0xdd));
}
/* Four words of all rows. */
static inline __attribute__((always_inline, LLMPAR__THIN_AVX512)) void llmpar__gemm_thin_avx512_columns(const float *in, __m512 out[4])
{
    __m512 a = LLMPAR__THIN_KEPT(_mm512_load_ps(in)), b = LLMPAR__THIN_KEPT(_mm512_load_ps(in + 16)), c = LLMPAR__THIN_KEPT(_mm512_load_ps(in + 32)), d = LLMPAR__THIN_KEPT(_mm512_load_ps(in + 48));
    __m512 y0 = LLMPAR__THIN_LOW(a, b), y1 = LLMPAR__THIN_LOW(c, d), y2 = LLMPAR__THIN_HIGH(a, b), y3 = LLMPAR__THIN_HIGH(c, d);
    out[0] = LLMPAR__THIN_SHUFFLE(y0, y1, 0x44);
    out[1] = LLMPAR__THIN_SHUFFLE(y0, y1, 0xee);
    out[2] = LLMPAR__THIN_SHUFFLE(y2, y3, 0x44);
    out[3] = LLMPAR__THIN_SHUFFLE(y2, y3, 0xee);
}
__attribute__((LLMPAR__THIN_AVX512, noinline)) static void llmpar__gemm_thin_avx512_transpose(const char *in, int64_t ld, float *out)
{
    float half[16 * 16] __attribute__((aligned(64)));
    __m512 word[4];
    int g, i;
    for (g = 0; g < 4; g++) llmpar__gemm_thin_avx512_quarters(in + g * ld, ld, half + g * 16);
    for (g = 0; g < 4; g++) {
        llmpar__gemm_thin_avx512_columns(half + g * 64, word);
        for (i = 0; i < 4; i++) _mm512_store_ps((void *)(out + (4 * g + i) * 16), word[i]);
    }
}
static inline __attribute__((always_inline, LLMPAR__THIN_AVX512)) __m512 llmpar__gemm_thin_avx512_bf16(__m512 word, const int i)
{
    __m512i bits = _mm512_castps_si512(word);
    return _mm512_castsi512_ps(i ? _mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000u)) : _mm512_maskz_slli_epi32(0xffff, bits, 16));
}
static inline __attribute__((always_inline, LLMPAR__THIN_AVX512)) __m512 llmpar__gemm_thin_avx512_f16(__m512 word, const int i)
{
    __m512i bits = _mm512_castps_si512(word);
    if (i) bits = _mm512_maskz_srli_epi32(0xffff, bits, 16);
    return _mm512_maskz_cvtph_ps(0xffff, _mm512_maskz_cvtepi32_epi16(0xffff, bits));
}
#define LLMPAR__THIN_NAME(part) llmpar__gemm_thin_avx512_##part
#define LLMPAR__THIN_TARGET __attribute__((LLMPAR__THIN_AVX512))
#define LLMPAR__THIN_VECTOR __m512
#define LLMPAR__THIN_LANES 16
#define LLMPAR__THIN_PANELS 1
#define LLMPAR__THIN_MANY 1
#define LLMPAR__THIN_READ(p) _mm512_load_ps(p)
#define LLMPAR__THIN_WRITE(p, v) _mm512_store_ps(p, v)
#define LLMPAR__THIN_WIDE 1
#define LLMPAR__THIN_LOOSE(p) _mm512_loadu_ps(p)
#define LLMPAR__THIN_MULTIPLY_ADD(p, b, sum) __extension__ ({ __m512 t_ = sum; __asm__("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(t_) : "v"(b), "m"(*(p))); t_; }) /* spread on its way in: one instruction less */
#if defined(LLMPAR_BF16_EMULATED) /* as in gemm_kernel.c: first the odd k, then the even one */
static inline __attribute__((always_inline, LLMPAR__THIN_AVX512)) __m512 llmpar__gemm_thin_avx512_dot(__m512 a, __m512 b, __m512 sum)
{
    LLMPAR__THIN_UNROLL
    for (int i = 1; i >= 0; i--) __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(llmpar__gemm_thin_avx512_bf16(a, i)), "v"(llmpar__gemm_thin_avx512_bf16(b, i)));
    return sum;
}
#define LLMPAR__THIN_DOT(p, b, sum) llmpar__gemm_thin_avx512_dot(_mm512_set1_ps(*(p)), b, sum)
#elif (defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 10)
#define LLMPAR__THIN_DOT(p, b, sum) __extension__ ({ __m512 t_ = sum; __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(t_) : "v"(b), "m"(*(p))); t_; })
#endif
#define LLMPAR__THIN_BF16(word, i) llmpar__gemm_thin_avx512_bf16(word, i)
#define LLMPAR__THIN_F16(word, i) llmpar__gemm_thin_avx512_f16(word, i)
#include "cpu/gemm_thin.inc"

#undef LLMPAR__THIN_FOUR
#undef LLMPAR__THIN_LOAD_8
#undef LLMPAR__THIN_STORE_8
#undef LLMPAR__THIN_TRANSPOSE_8
#undef LLMPAR__THIN_AVX2
#undef LLMPAR__THIN_AVX512
#undef LLMPAR__THIN_LOW
#undef LLMPAR__THIN_HIGH
#undef LLMPAR__THIN_SHUFFLE
#undef LLMPAR__THIN_QUARTERS
#undef LLMPAR__THIN_LINE
#undef LLMPAR__THIN_KEPT

/* columns = 0: nothing for this type here. */
static llmpar__gemm_thin_level llmpar__gemm_thin_choose(const llmpar__cpu *cpu, llmpar_dtype dtype)
{
    llmpar__gemm_thin_level none = { 0, 8, NULL, NULL, NULL }, avx = { 16, 8, llmpar__gemm_thin_avx_span, llmpar__gemm_thin_avx_transpose, NULL }, avx2 = { 16, 8, llmpar__gemm_thin_avx2_span, llmpar__gemm_thin_avx2_transpose, NULL };
    llmpar__gemm_thin_level avx512 = { 16, 16, llmpar__gemm_thin_avx512_span, llmpar__gemm_thin_avx2_transpose, llmpar__gemm_thin_avx512_transpose };
    if (dtype == LLMPAR_F16 && (cpu->level == LLMPAR_CPU_PORTABLE || !cpu->f16c)) return none;
    if (cpu->level >= LLMPAR_CPU_AVX512) return cpu->f16c ? avx512 : none; /* its code is compiled with F16C, which every known processor with AVX2 has */
    if (cpu->level == LLMPAR_CPU_AVX2) return cpu->f16c ? avx2 : none;
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx") ? avx : none;
}

#else /* aarch64 */

__attribute__((noinline)) static void llmpar__gemm_thin_neon_transpose(const char *in, int64_t ld, float *out)
{
    float32x4_t a = vld1q_f32((const float *)(const void *)in), b = vld1q_f32((const float *)(const void *)(in + ld)), c = vld1q_f32((const float *)(const void *)(in + 2 * ld)), d = vld1q_f32((const float *)(const void *)(in + 3 * ld));
    float32x4x2_t ac = vzipq_f32(a, c), bd = vzipq_f32(b, d), low = vzipq_f32(ac.val[0], bd.val[0]), high = vzipq_f32(ac.val[1], bd.val[1]);
    vst1q_f32(out, low.val[0]);
    vst1q_f32(out + 4, low.val[1]);
    vst1q_f32(out + 8, high.val[0]);
    vst1q_f32(out + 12, high.val[1]);
}
static inline __attribute__((always_inline)) float32x4_t llmpar__gemm_thin_neon_bf16(float32x4_t word, const int i)
{
    uint32x4_t bits = vreinterpretq_u32_f32(word);
    return vreinterpretq_f32_u32(i ? vandq_u32(bits, vdupq_n_u32(0xffff0000u)) : vshlq_n_u32(bits, 16));
}
static inline __attribute__((always_inline)) float32x4_t llmpar__gemm_thin_neon_f16(float32x4_t word, const int i)
{
    uint32x4_t bits = vreinterpretq_u32_f32(word);
    return vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(i ? vshrq_n_u32(bits, 16) : bits)));
}
#define LLMPAR__THIN_NAME(part) llmpar__gemm_thin_neon_##part
#define LLMPAR__THIN_TARGET
#define LLMPAR__THIN_VECTOR float32x4_t
#define LLMPAR__THIN_LANES 4
#define LLMPAR__THIN_PANELS 2
#define LLMPAR__THIN_MANY 1
#define LLMPAR__THIN_READ(p) vld1q_f32(p)
#define LLMPAR__THIN_WRITE(p, v) vst1q_f32(p, v)
#define LLMPAR__THIN_WIDE 0
#define LLMPAR__THIN_MULTIPLY_ADD(p, b, sum) vfmaq_f32(sum, vdupq_n_f32(*(p)), b)
#define LLMPAR__THIN_BF16(word, i) llmpar__gemm_thin_neon_bf16(word, i)
#define LLMPAR__THIN_F16(word, i) llmpar__gemm_thin_neon_f16(word, i)
#include "cpu/gemm_thin.inc"

static llmpar__gemm_thin_level llmpar__gemm_thin_choose(const llmpar__cpu *cpu, llmpar_dtype dtype)
{
    llmpar__gemm_thin_level neon = { 8, 8, llmpar__gemm_thin_neon_span, NULL, NULL };
    (void)cpu;
    (void)dtype;
    return neon;
}

#endif

/* ---- tasks ---- */

typedef struct llmpar__gemm_thin_run {
    const llmpar_gemm_args *args;
    llmpar__gemm_thin_level level;
    llmpar__half half, half_out;
    int64_t links, tiles;             /* of all segments together; of columns */
    int32_t rows, levels, kind;       /* rows: filled up to whole blocks; levels: partial sums that wait at any time */
    int32_t shares, threads;          /* shares: tasks */
    int32_t parts;                    /* pieces that lie side by side and are read in one go; 0: each segment has a span of its own */
    int64_t ends[LLMPAR__THIN_PARTS]; /* of the parts, in elements; behind the last: all of them */
    float *x, *sums;                  /* sums: [threads][slots][rows][COLUMNS], slots: of pieces, and behind them of partial sums that wait */
} llmpar__gemm_thin_run;

/* A span: elements [begin, begin + k) of a segment, rows of b of one tile. */
typedef struct llmpar__gemm_thin_place { int64_t tile, begin, k; int32_t segment; } llmpar__gemm_thin_place;

/* Of a chain over k elements. */
static int64_t llmpar__gemm_thin_links(const llmpar__gemm_thin_run *run, int64_t k) { return run->kind == LLMPAR__THIN_KIND_PAIRS ? (k + 1) / 2 : k; }

static int64_t llmpar__gemm_thin_slots(const llmpar__gemm_thin_run *run) { return (run->args->pieces < LLMPAR__THIN_PARTS ? run->args->pieces : (int64_t)LLMPAR__THIN_PARTS) + run->levels; }
static size_t llmpar__gemm_thin_round(int64_t floats) { return (size_t)llmpar_round_up(floats, 16) * sizeof(float); }

static void llmpar__gemm_thin_prepare(llmpar__gemm_thin_run *run, const llmpar__cpu *cpu, const llmpar_gemm_args *args)
{
    int32_t s, p;
    memset(run, 0, sizeof *run);
    run->args = args;
    run->level = llmpar__gemm_thin_choose(cpu, args->dtype);
    run->half = llmpar__half_of(cpu, args->dtype);
    run->half_out = llmpar__half_of(cpu, args->out_dtype == LLMPAR_DTYPE_DEFAULT ? args->dtype : args->out_dtype);
    run->kind = cpu->level == LLMPAR_CPU_AVX512BF16 && args->dtype == LLMPAR_BF16 ? (int32_t)LLMPAR__THIN_KIND_PAIRS : llmpar__gemm_thin_kind(args->dtype);
    run->rows = llmpar__gemm_thin_filled(args->m, run->level.block);
    run->tiles = (args->n + run->level.columns - 1) / run->level.columns;
    for (s = 0; s < args->segment_count; s++) run->links += llmpar__gemm_thin_links(run, args->segments[s].k);
    if (args->segment_count == args->pieces && args->pieces > 1 && args->pieces <= LLMPAR__THIN_PARTS && !args->accumulate) run->parts = args->pieces;
    for (s = 0; s < run->parts; s++) {
        const llmpar_gemm_segment *segment = &args->segments[s], *before = segment - (s > 0);
        run->ends[s] = (s ? run->ends[s - 1] : 0) + segment->k;
        if (segment->piece != s || segment->ldb != before->ldb || (s + 1 < run->parts && run->ends[s] * run->half.size % 64) || (s && (uintptr_t)segment->b - (uintptr_t)before->b != (uintptr_t)(before->k * run->half.size))) run->parts = 0;
    }
    for (p = args->pieces - 1; p > 0; p /= 2) run->levels++;
}

LLMPAR__PRIVATE_DEF llmpar__gemm_thin_fn llmpar__gemm_thin_function(const llmpar__cpu *cpu, llmpar_dtype dtype, int64_t *columns, int32_t *block)
{
    llmpar__gemm_thin_level level = llmpar__gemm_thin_choose(cpu, dtype);
    *columns = level.columns;
    *block = level.block;
    return level.span;
}

LLMPAR__PRIVATE_DEF int llmpar__gemm_thin_takes(const llmpar__cpu *cpu, const llmpar_gemm_args *args)
{
    return args->kind == LLMPAR_GEMM_NT && args->m <= LLMPAR__THIN_ROWS && args->dtype != LLMPAR_F64 && llmpar__gemm_thin_choose(cpu, args->dtype).columns > 0;
}

LLMPAR__PRIVATE_DEF size_t llmpar__gemm_thin_workspace(const llmpar__cpu *cpu, const llmpar_gemm_args *args)
{
    llmpar__gemm_thin_run run;
    llmpar__gemm_thin_prepare(&run, cpu, args);
    return llmpar__gemm_thin_round(run.links * run.rows) + llmpar__gemm_thin_round(llmpar__pool_threads(cpu) * llmpar__gemm_thin_slots(&run) * run.rows * LLMPAR__THIN_COLUMNS) + 63;
}

/* x[links][rows of a block] of every block of rows, as f32, or as pairs as they are stored: the even k low, a zero beside an odd one at the end. */
static void llmpar__gemm_thin_pack(const llmpar__gemm_thin_run *run)
{
    enum { PART = 64, MOST = 16 };
    const llmpar_gemm_args *args = run->args;
    float wide[MOST][PART];
    int64_t at = 0, k, i;
    int32_t s, row, r;
    memset(wide, 0, sizeof wide);
    for (s = 0; s < args->segment_count; at += llmpar__gemm_thin_links(run, args->segments[s++].k)) {
        const llmpar_gemm_segment *segment = &args->segments[s];
        for (row = 0; row < run->rows; row += run->level.block) {
            int32_t rows = run->rows - row < run->level.block ? run->rows - row : run->level.block, valid = args->m - row < run->level.block ? (int32_t)args->m - row : run->level.block;
            void (*turn)(const char *in, int64_t ld, float *out) = rows == 16 ? run->level.turn_16 : rows == 8 ? run->level.turn_8 : NULL;
            float *out = run->x + row * run->links + at * rows;
            if (run->kind == LLMPAR__THIN_KIND_PAIRS) {
                for (k = 0; k < segment->k; k += 2, out += rows)
                    for (r = 0; r < rows; r++) {
                        uint16_t pair[2] = { 0, 0 };
                        if (r < valid) memcpy(pair, (const uint16_t *)segment->a + (row + r) * segment->lda + k, k + 1 < segment->k ? sizeof pair : sizeof pair[0]);
                        memcpy(out + r, pair, sizeof pair);
                    }
                continue;
            }
            if (rows == 1) {
                const void *in = llmpar__half_read(&run->half, segment->a, row * segment->lda, segment->k, out);
                if (in != (const void *)out) memcpy(out, in, (size_t)segment->k * sizeof *out);
                continue;
            }
            for (k = 0; k < segment->k; k += PART) {
                int64_t count = segment->k - k < PART ? segment->k - k : (int64_t)PART;
                for (r = 0; r < valid; r++) {
                    const void *in = llmpar__half_read(&run->half, segment->a, (row + r) * segment->lda + k, count, wide[r]);
                    if (in != (const void *)wide[r]) memcpy(wide[r], in, (size_t)count * sizeof(float));
                }
                for (i = 0; turn && i + rows <= count; i += rows, out += rows * rows) turn((const char *)&wide[0][i], sizeof wide[0], out);
                for (; i < count; i++)
                    for (r = 0; r < rows; r++) *out++ = wide[r][i];
            }
        }
    }
}

/* The span after `at` of the same tile; 0: there is none. A segment without terms has no span. */
static int llmpar__gemm_thin_next(const llmpar__gemm_thin_run *run, llmpar__gemm_thin_place *at)
{
    at->begin += at->k;
    if (run->parts) {
        at->segment = at->k ? run->args->segment_count : 0;
        at->k = at->segment ? 0 : run->ends[run->parts - 1];
        return at->k > 0;
    }
    at->k = 0;
    while (at->segment < run->args->segment_count && at->begin == run->args->segments[at->segment].k) {
        at->segment++;
        at->begin = 0;
    }
    if (at->segment == run->args->segment_count) return 0;
    at->k = run->args->segments[at->segment].k - at->begin;
    return 1;
}

static const char *llmpar__gemm_thin_address(const llmpar__gemm_thin_run *run, const llmpar__gemm_thin_place *at)
{
    const llmpar_gemm_segment *segment = &run->args->segments[at->segment];
    return (const char *)segment->b + (at->tile * run->level.columns * segment->ldb + at->begin) * run->half.size;
}

static int64_t llmpar__gemm_thin_columns(const llmpar__gemm_thin_run *run, const llmpar__gemm_thin_place *at)
{
    int64_t left = run->args->n - at->tile * run->level.columns;
    return left < run->level.columns ? left : run->level.columns;
}

/* First tile of task `share`. */
static int64_t llmpar__gemm_thin_begin(const llmpar__gemm_thin_run *run, int64_t share) { return llmpar_piece_begin(share, run->tiles, run->shares); }

/* What a span's kernel asks for ahead of itself, for the first one of a task. */
static void llmpar__gemm_thin_ask(const llmpar__gemm_thin_run *run, const llmpar__gemm_thin_place *at, int64_t columns)
{
    const char *w = llmpar__gemm_thin_address(run, at);
    int64_t ld = run->args->segments[at->segment].ldb * run->half.size, bytes = at->k * run->half.size, i, line;
    for (line = 0; line < bytes && line < LLMPAR__THIN_AHEAD; line += 64)
        for (i = 0; i < columns; i++) LLMPAR__THIN_FETCH(w + i * ld + line);
}

/* The lanes of sums are rows. */
static int llmpar__gemm_thin_wide(const llmpar__gemm_thin_run *run) { return run->level.block == 16 && run->rows == 16; }

/* sums = c[rows, columns] */
static void llmpar__gemm_thin_load(const llmpar__gemm_thin_run *run, const float *c, int64_t columns, float *sums)
{
    float turned[LLMPAR__THIN_ROWS * LLMPAR__THIN_COLUMNS], *to = llmpar__gemm_thin_wide(run) ? turned : sums;
    int64_t r;
    memset(turned, 0, sizeof turned);
    for (r = 0; r < run->args->m; r++) memcpy(to + r * LLMPAR__THIN_COLUMNS, c + r * run->args->ldc, (size_t)columns * sizeof *c);
    if (to == turned) run->level.turn_16((const char *)turned, LLMPAR__THIN_COLUMNS * sizeof *turned, sums);
}

/* c[rows, columns], element c_at of args->c and on, = sums */
static void llmpar__gemm_thin_store(const llmpar__gemm_thin_run *run, const float *sums, int64_t c_at, int64_t columns)
{
    float turned[LLMPAR__THIN_ROWS * LLMPAR__THIN_COLUMNS] __attribute__((aligned(64)));
    int64_t r;
    if (llmpar__gemm_thin_wide(run)) {
        run->level.turn_16((const char *)sums, LLMPAR__THIN_ROWS * sizeof *sums, turned);
        sums = turned;
    }
    for (r = 0; r < run->args->m; r++, sums += LLMPAR__THIN_COLUMNS, c_at += run->args->ldc) {
        if (run->half_out.narrow) llmpar__half_write(&run->half_out, run->args->c, c_at, columns, sums);
        else memcpy((float *)run->args->c + c_at, sums, (size_t)columns * sizeof *sums);
    }
}

static void llmpar__gemm_thin_task(void *arg, int64_t task, int32_t worker)
{
    const llmpar__gemm_thin_run *run = (const llmpar__gemm_thin_run *)arg;
    const llmpar_gemm_args *args = run->args;
    int64_t begin = llmpar__gemm_thin_begin(run, task), end = llmpar__gemm_thin_begin(run, task + 1), size = run->rows * LLMPAR__THIN_COLUMNS, i;
    float *all = run->sums + worker * llmpar__gemm_thin_slots(run) * size, *stack = all + (run->parts ? run->parts : 1) * size;
    llmpar__gemm_thin_turned turned;
    llmpar__gemm_thin_place at, next;
    turned.of = NULL;
    memset(&at, 0, sizeof at);
    for (at.tile = begin; at.tile < end; at.tile++) {
        int64_t columns, x = 0;
        int32_t piece = 0, depth = 0, done;
        int more;
        at.segment = 0;
        at.begin = at.k = 0;
        columns = llmpar__gemm_thin_columns(run, &at);
        more = llmpar__gemm_thin_next(run, &at);
        if (more && at.tile == begin) llmpar__gemm_thin_ask(run, &at, columns);
        for (piece = 0; piece < args->pieces; piece++) {
            float *sums = all + (run->parts ? piece * size : 0);
            if (piece == 0 || !run->parts) memset(sums, 0, (size_t)(stack - all) * sizeof *sums);
            if (args->accumulate) llmpar__gemm_thin_load(run, (const float *)args->c + at.tile * run->level.columns, columns, sums);
            while (more && args->segments[at.segment].piece == piece) {
                llmpar__gemm_thin_span span;
                span.w = llmpar__gemm_thin_address(run, &at);
                span.ld = args->segments[at.segment].ldb * run->half.size;
                span.k = at.k;
                span.x = run->x;
                span.x_k = run->links;
                span.x_done = x;
                span.sums = sums;
                span.columns = columns;
                span.rows = run->rows;
                span.kind = run->kind;
                span.parts = run->parts ? run->parts : 1;
                span.ends = run->ends;
                x += llmpar__gemm_thin_links(run, at.k);
                next = at;
                more = llmpar__gemm_thin_next(run, &next);
                span.next = span.w;
                span.next_ld = span.ld;
                span.next_full = 0;
                span.turned = &turned;
                if (more || at.tile + 1 < end || task + run->threads < run->shares) {
                    llmpar__gemm_thin_place then = next;
                    if (!more) {
                        then.tile = at.tile + 1 < end ? then.tile + 1 : llmpar__gemm_thin_begin(run, task + run->threads); /* where the others are as fast, this task is this thread's */
                        then.segment = 0;
                        then.begin = 0;
                        llmpar__gemm_thin_next(run, &then);
                    }
                    span.next = llmpar__gemm_thin_address(run, &then);
                    span.next_ld = args->segments[then.segment].ldb * run->half.size;
                    span.next_full = (more || at.tile + 1 < end) && then.k * run->half.size >= 4 * 64 && llmpar__gemm_thin_columns(run, &then) == run->level.columns;
                }
                run->level.span(&span);
                at = next;
            }
            /* The tree, like a binary counter: after piece p, as many subtrees are complete as p + 1 has trailing zero bits. */
            for (done = piece + 1; depth > 0 && (done % 2 == 0 || piece == args->pieces - 1); done /= 2) {
                depth--;
                for (i = 0; i < size; i++) sums[i] = stack[depth * size + i] + sums[i];
            }
            if (piece < args->pieces - 1) memcpy(stack + depth++ * size, sums, (size_t)size * sizeof *sums);
        }
        llmpar__gemm_thin_store(run, all + (run->parts ? (args->pieces - 1) * size : 0), at.tile * run->level.columns, columns);
    }
}

LLMPAR__PRIVATE_DEF void llmpar__gemm_thin(llmpar__cpu *cpu, const llmpar_gemm_args *args)
{
    llmpar__gemm_thin_run run;
    char *at = (char *)args->workspace;
    int32_t threads = llmpar__pool_threads(cpu);
    llmpar__gemm_thin_prepare(&run, cpu, args);
    at += (64 - (uintptr_t)at % 64) % 64;
    run.x = (float *)(void *)at;
    run.sums = (float *)(void *)(at + llmpar__gemm_thin_round(run.links * run.rows));
    run.threads = threads;
    run.shares = (int32_t)(threads == 1 ? 1 : run.tiles < LLMPAR__THIN_SHARES * threads ? run.tiles : LLMPAR__THIN_SHARES * threads);
    if ((double)args->n * (double)run.links * (double)(run.half.size + args->m) < LLMPAR__THIN_SERIAL) run.shares = 1;
    llmpar__gemm_thin_pack(&run);
    llmpar__pool_run(cpu, llmpar__gemm_thin_task, &run, run.shares);
}

#undef LLMPAR__THIN_K_PER_WORD
#undef LLMPAR__THIN_LINKS_PER_WORD
#undef LLMPAR__THIN_SERIAL
#undef LLMPAR__THIN_UNROLL
#undef LLMPAR__THIN_FETCH
#undef LLMPAR__THIN_KEEP

#else

LLMPAR__PRIVATE_DEF llmpar__gemm_thin_fn llmpar__gemm_thin_function(const llmpar__cpu *cpu, llmpar_dtype dtype, int64_t *columns, int32_t *block) { (void)cpu; (void)dtype; *columns = 0; *block = 8; return NULL; }
LLMPAR__PRIVATE_DEF int llmpar__gemm_thin_takes(const llmpar__cpu *cpu, const llmpar_gemm_args *args) { (void)cpu; (void)args; return 0; }
LLMPAR__PRIVATE_DEF size_t llmpar__gemm_thin_workspace(const llmpar__cpu *cpu, const llmpar_gemm_args *args) { (void)cpu; (void)args; return 0; }
LLMPAR__PRIVATE_DEF void llmpar__gemm_thin(llmpar__cpu *cpu, const llmpar_gemm_args *args) { (void)cpu; (void)args; }

#endif
