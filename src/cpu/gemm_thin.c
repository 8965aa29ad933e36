/* gemm_thin: the product of a few rows with weights, c[M,N] = a[M,K] b[N,K]^T, M <= 16. It waits for the weights to come from memory, so everything serves one purpose: each byte is read once, in order,
   without a pause. Where the rows of b are interleaved (llmpar_interleave_args) they are one stream, and a vector of it is what the chains of 16 outputs take next; four such tiles go side by side. Rows as they lie
   become such a stream 16 words at a time, in L1.

   A chain may go on from memory anywhere, which no bit shows, and the tree over pieces is that of gemm.c: an element has the bits that it gets in a product of many rows. */
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
enum { LLMPAR__THIN_PARTS = 16, LLMPAR__THIN_HELD = 32 };
#define LLMPAR__THIN_SERIAL (1 << 18) /* bytes and multiplications that one thread is done with before another has woken up */
#if defined(__clang__)
#define LLMPAR__THIN_UNROLL _Pragma("unroll")
#else
#define LLMPAR__THIN_UNROLL _Pragma("GCC unroll 16")
#endif

static const float llmpar__gemm_thin_zeros[LLMPAR__THIN_COLUMNS] = { 0 };

typedef struct llmpar__gemm_thin_level {
    int64_t columns; /* of a tile */
    int32_t most;    /* rows of x whose chains fit the registers, of one tile: LLMPAR__THIN_MOST */
    llmpar__gemm_thin_fn span;
    void (*turn)(const char *in, int64_t ld, float *out, int64_t step); /* out[8][8], rows `step` floats apart, = in[8][8], rows ld bytes apart; NULL: this level has none */
} llmpar__gemm_thin_level;

#if defined(__x86_64__)

/* In each 128-bit lane four rows become four columns. */
#define LLMPAR__THIN_FOUR(unpacklo, unpackhi, shuffle, a, b, c, d, store) do { \
    y0 = unpacklo(a, b); y1 = unpacklo(c, d); y2 = unpackhi(a, b); y3 = unpackhi(c, d); \
    store(0, shuffle(y0, y1, 0x44)); store(1, shuffle(y0, y1, 0xee)); store(2, shuffle(y2, y3, 0x44)); store(3, shuffle(y2, y3, 0xee)); \
} while (0)

#define LLMPAR__THIN_LOAD_8(r) _mm256_loadu_ps((const float *)(const void *)(in + (r) * ld))
#define LLMPAR__THIN_STORE_8(t, v) _mm256_store_ps(out + (j + (t)) * step, v)
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

__attribute__((target("avx"), noinline)) static void llmpar__gemm_thin_avx_transpose(const char *in, int64_t ld, float *out, int64_t step) { LLMPAR__THIN_TRANSPOSE_8(); }
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
#define LLMPAR__THIN_MOST 4
#define LLMPAR__THIN_READ(p) _mm256_loadu_ps((const float *)(p))
#define LLMPAR__THIN_WRITE(p, v) _mm256_store_ps(p, v)
#define LLMPAR__THIN_MULTIPLY_ADD(p, b, sum) __extension__ ({ __m256 t_ = sum, p_; __asm__("vmulps %3, %2, %1\n\tvaddps %0, %1, %0" : "+x"(t_), "=&x"(p_) : "x"(_mm256_broadcast_ss(p)), "x"(b)); t_; })
#define LLMPAR__THIN_BF16(word, i) llmpar__gemm_thin_avx_bf16(word, i)
#define LLMPAR__THIN_F16(word, i) (word)
#include "cpu/gemm_thin.inc"

#define LLMPAR__THIN_AVX2 target("avx2,fma,f16c")
__attribute__((LLMPAR__THIN_AVX2, noinline)) static void llmpar__gemm_thin_avx2_transpose(const char *in, int64_t ld, float *out, int64_t step) { LLMPAR__THIN_TRANSPOSE_8(); }
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
#define LLMPAR__THIN_MULTIPLY_ADD(p, b, sum) __extension__ ({ __m256 t_ = sum; __asm__("vfmadd231ps %2, %1, %0" : "+x"(t_) : "x"(_mm256_broadcast_ss(p)), "x"(b)); t_; })
#define LLMPAR__THIN_BF16(word, i) llmpar__gemm_thin_avx2_bf16(word, i)
#define LLMPAR__THIN_F16(word, i) llmpar__gemm_thin_avx2_f16(word, i)
#include "cpu/gemm_thin.inc"

#undef LLMPAR__THIN_VECTOR
#undef LLMPAR__THIN_LANES
#undef LLMPAR__THIN_PANELS
#undef LLMPAR__THIN_MOST
#undef LLMPAR__THIN_READ
#undef LLMPAR__THIN_WRITE

#define LLMPAR__THIN_AVX512 target("avx512f,avx512vl,avx2,fma,f16c")
/* The unmasked forms of these warn of uninitialised values in g++ 12's own header. */
#define LLMPAR__THIN_LOW(a, b) _mm512_maskz_unpacklo_ps(0xffff, a, b)
#define LLMPAR__THIN_HIGH(a, b) _mm512_maskz_unpackhi_ps(0xffff, a, b)
#define LLMPAR__THIN_SHUFFLE(a, b, order) _mm512_maskz_shuffle_ps(0xffff, a, b, order)
#define LLMPAR__THIN_QUARTERS(a, b, order) _mm512_maskz_shuffle_f32x4(0xffff, a, b, order)
#define LLMPAR__THIN_LINE(p) __extension__ ({ __m512 t_ = _mm512_loadu_ps((const void *)(p)); __asm__("" : "+v"(t_)); t_; }) /* else compilers load it a second time where it is used twice */
#define LLMPAR__THIN_STORE_16(t, v) _mm512_store_ps((void *)(out + (t) * step), v)
LLMPAR__PRIVATE_DEF __attribute__((LLMPAR__THIN_AVX512, noinline)) void llmpar__gemm_thin_avx512_transpose(const char *in, int64_t ld, float *out, int64_t step)
{
    float half[16 * 16] __attribute__((aligned(64))), *at = half;
    __m512 a, b, c, d, y0, y1, y2, y3;
    int g;
    for (g = 0; g < 4; g++, in += ld, at += 16) { /* rows g, 4 + g, 8 + g, 12 + g: four vectors whose quarters are four words of each */
        a = LLMPAR__THIN_LINE(in), b = LLMPAR__THIN_LINE(in + 4 * ld), c = LLMPAR__THIN_LINE(in + 8 * ld), d = LLMPAR__THIN_LINE(in + 12 * ld);
        y0 = LLMPAR__THIN_QUARTERS(a, b, 0x44), y1 = LLMPAR__THIN_QUARTERS(c, d, 0x44), y2 = LLMPAR__THIN_QUARTERS(a, b, 0xee), y3 = LLMPAR__THIN_QUARTERS(c, d, 0xee);
        _mm512_store_ps((void *)at, LLMPAR__THIN_QUARTERS(y0, y1, 0x88));
        _mm512_store_ps((void *)(at + 64), LLMPAR__THIN_QUARTERS(y0, y1, 0xdd));
        _mm512_store_ps((void *)(at + 128), LLMPAR__THIN_QUARTERS(y2, y3, 0x88));
        _mm512_store_ps((void *)(at + 192), LLMPAR__THIN_QUARTERS(y2, y3, 0xdd));
    }
    for (g = 0, at = half; g < 4; g++, out += 4 * step, at += 64) { /* four words of all rows */
        a = LLMPAR__THIN_LINE(at), b = LLMPAR__THIN_LINE(at + 16), c = LLMPAR__THIN_LINE(at + 32), d = LLMPAR__THIN_LINE(at + 48);
        LLMPAR__THIN_FOUR(LLMPAR__THIN_LOW, LLMPAR__THIN_HIGH, LLMPAR__THIN_SHUFFLE, a, b, c, d, LLMPAR__THIN_STORE_16);
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
#define LLMPAR__THIN_MOST 16
#define LLMPAR__THIN_READ(p) _mm512_loadu_ps(p)
#define LLMPAR__THIN_WRITE(p, v) _mm512_store_ps(p, v)
#define LLMPAR__THIN_MULTIPLY_ADD(p, b, sum) __extension__ ({ __m512 t_ = sum; __asm__("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(t_) : "v"(b), "m"(*(p))); t_; }) /* spread on its way in: one instruction less */
#if defined(LLMPAR_BF16_EMULATED) /* as in gemm_kernel.c: first the odd k, then the even one */
static inline __attribute__((always_inline, LLMPAR__THIN_AVX512)) __m512 llmpar__gemm_thin_avx512_dot(__m512 a, __m512 b, __m512 sum)
{
    LLMPAR__THIN_UNROLL
    for (int i = 1; i >= 0; i--) __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(llmpar__gemm_thin_avx512_bf16(a, i)), "v"(llmpar__gemm_thin_avx512_bf16(b, i)));
    return sum;
}
#define LLMPAR__THIN_DOT(p, b, sum) llmpar__gemm_thin_avx512_dot(_mm512_set1_ps(*(p)), b, sum)
#elif LLMPAR__BF16_UNITS
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
#undef LLMPAR__THIN_STORE_16

/* columns = 0: nothing for this type here. */
static llmpar__gemm_thin_level llmpar__gemm_thin_choose(const llmpar__cpu *cpu, llmpar_dtype dtype)
{
    llmpar__gemm_thin_level none = { 0, 1, NULL, NULL }, avx = { llmpar__gemm_thin_avx_columns, llmpar__gemm_thin_avx_most, llmpar__gemm_thin_avx_span, llmpar__gemm_thin_avx_transpose }, avx2 = { llmpar__gemm_thin_avx2_columns, llmpar__gemm_thin_avx2_most, llmpar__gemm_thin_avx2_span, llmpar__gemm_thin_avx2_transpose };
    llmpar__gemm_thin_level avx512 = { llmpar__gemm_thin_avx512_columns, llmpar__gemm_thin_avx512_most, llmpar__gemm_thin_avx512_span, llmpar__gemm_thin_avx2_transpose };
    if (dtype == LLMPAR_F16 && (cpu->level == LLMPAR_CPU_PORTABLE || !cpu->f16c)) return none;
    if (cpu->level >= LLMPAR_CPU_AVX512) return cpu->f16c ? avx512 : none; /* its code is compiled with F16C, which every known processor with AVX2 has */
    if (cpu->level == LLMPAR_CPU_AVX2) return cpu->f16c ? avx2 : none;
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx") ? avx : none;
}

#else /* aarch64 */

__attribute__((noinline)) static void llmpar__gemm_thin_neon_transpose(const char *in, int64_t ld, float *out, int64_t step)
{
    float32x4_t a = vld1q_f32((const float *)(const void *)in), b = vld1q_f32((const float *)(const void *)(in + ld)), c = vld1q_f32((const float *)(const void *)(in + 2 * ld)), d = vld1q_f32((const float *)(const void *)(in + 3 * ld));
    float32x4x2_t ac = vzipq_f32(a, c), bd = vzipq_f32(b, d), low = vzipq_f32(ac.val[0], bd.val[0]), high = vzipq_f32(ac.val[1], bd.val[1]);
    vst1q_f32(out, low.val[0]);
    vst1q_f32(out + step, low.val[1]);
    vst1q_f32(out + 2 * step, high.val[0]);
    vst1q_f32(out + 3 * step, high.val[1]);
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
#define LLMPAR__THIN_MOST 8
#define LLMPAR__THIN_READ(p) vreinterpretq_f32_u8(vld1q_u8((const uint8_t *)(p)))
#define LLMPAR__THIN_WRITE(p, v) vst1q_f32(p, v)
#define LLMPAR__THIN_MULTIPLY_ADD(p, b, sum) vfmaq_f32(sum, vdupq_n_f32(*(p)), b)
#define LLMPAR__THIN_BF16(word, i) llmpar__gemm_thin_neon_bf16(word, i)
#define LLMPAR__THIN_F16(word, i) llmpar__gemm_thin_neon_f16(word, i)
#include "cpu/gemm_thin.inc"

static llmpar__gemm_thin_level llmpar__gemm_thin_choose(const llmpar__cpu *cpu, llmpar_dtype dtype)
{
    llmpar__gemm_thin_level neon = { llmpar__gemm_thin_neon_columns, llmpar__gemm_thin_neon_most, llmpar__gemm_thin_neon_span, NULL };
    (void)cpu;
    (void)dtype;
    return neon;
}

#endif

/* ---- tasks ---- */

/* The tiles of a thread: `apart` units of `group` tiles that are `apart` tiles from each other, so that each unit goes on with the streams of the one before; behind them single tiles. The thread takes
   units from the front, and who has none left takes others' from the back: so all end at the same time, also where somebody else has half of a processor. */
typedef struct llmpar__gemm_thin_range {
    int64_t begin, apart, units;
    uint64_t taken; /* atomic: from the front, and 2^32 times as many from the back */
    char line[32]; /* of 64 bytes: threads write to theirs */
} llmpar__gemm_thin_range;

typedef struct llmpar__gemm_thin_run {
    const llmpar_gemm_args *args;
    llmpar__gemm_thin_level level;
    llmpar__half half, half_out;
    int64_t first, m;                 /* rows of a and c: at most 16 */
    char *c;                          /* the first of these */
    int64_t links, tiles;             /* of all segments together; of columns */
    int32_t group;                    /* interleaved tiles that go together */
    int32_t rows, levels, kind;       /* rows: with those that fill up the last block of 8; levels: partial sums that wait at any time */
    int32_t threads;
    llmpar__gemm_thin_range *ranges;  /* [threads] */
    int32_t parts;                    /* pieces that lie side by side and are read in one go; 0: each segment has a span of its own */
    int64_t ends[LLMPAR__THIN_PARTS]; /* of the parts, in elements; behind the last: all of them */
    float *x, *sums;                  /* sums: [threads][slots][group][rows][COLUMNS], slots: of pieces, and behind them of partial sums that wait */
    char *held;                       /* [threads][HELD][group][rows][COLUMNS] results as c has them */
    int64_t out_size;                 /* bytes of one */
} llmpar__gemm_thin_run;

/* A span: elements [begin, begin + k) of a segment, rows of b of one tile. */
typedef struct llmpar__gemm_thin_place { int64_t tile, begin, k; int32_t segment; } llmpar__gemm_thin_place;

/* Of a chain over k elements. */
static int64_t llmpar__gemm_thin_links(const llmpar__gemm_thin_run *run, int64_t k) { return run->kind == LLMPAR__THIN_KIND_PAIRS ? (k + 1) / 2 : k; }

static int64_t llmpar__gemm_thin_slots(const llmpar__gemm_thin_run *run) { return (run->args->pieces < LLMPAR__THIN_PARTS ? run->args->pieces : (int64_t)LLMPAR__THIN_PARTS) + run->levels; }
static size_t llmpar__gemm_thin_round(int64_t floats) { return (size_t)llmpar_round_up(floats, 16) * sizeof(float); }

/* Of rows `first` and on. */
static void llmpar__gemm_thin_prepare(llmpar__gemm_thin_run *run, const llmpar__cpu *cpu, const llmpar_gemm_args *args, int64_t first)
{
    int32_t s, p;
    memset(run, 0, sizeof *run);
    run->args = args;
    run->first = first;
    run->m = args->m - first < LLMPAR__THIN_ROWS ? args->m - first : (int64_t)LLMPAR__THIN_ROWS;
    run->level = llmpar__gemm_thin_choose(cpu, args->dtype);
    run->half = llmpar__half_of(cpu, args->dtype);
    run->half_out = llmpar__half_of(cpu, args->out_dtype == LLMPAR_DTYPE_DEFAULT ? args->dtype : args->out_dtype);
    run->out_size = run->half_out.narrow ? 2 : 4;
    run->c = (char *)args->c + first * args->ldc * run->out_size;
    run->kind = cpu->level == LLMPAR_CPU_AVX512BF16 && args->dtype == LLMPAR_BF16 ? (int32_t)LLMPAR__THIN_KIND_PAIRS : llmpar__gemm_thin_kind(args->dtype);
    run->rows = llmpar__gemm_thin_filled(run->m);
    run->group = llmpar__gemm_thin_group(run->rows, run->level.most);
    run->tiles = (args->n + run->level.columns - 1) / run->level.columns;
    for (s = 0; s < args->segment_count; s++) run->links += llmpar__gemm_thin_links(run, args->segments[s].k);
    if (args->segment_count == args->pieces && args->pieces > 1 && args->pieces <= LLMPAR__THIN_PARTS && !args->accumulate) run->parts = args->pieces;
    for (s = 0; s < run->parts; s++) {
        const llmpar_gemm_segment *segment = &args->segments[s], *before = segment - (s > 0);
        run->ends[s] = (s ? run->ends[s - 1] : 0) + segment->k;
        if (segment->piece != s || segment->ldb != before->ldb || segment->interleaved != before->interleaved || (segment->interleaved && segment->b != before->b) || (s + 1 < run->parts && run->ends[s] * run->half.size % 64)
            || (s && (segment->interleaved ? (segment->begin - before->begin) * run->half.size : (int64_t)((uintptr_t)segment->b - (uintptr_t)before->b)) != before->k * run->half.size)) run->parts = 0;
    }
    for (p = args->pieces - 1; p > 0; p /= 2) run->levels++;
}

LLMPAR__PRIVATE_DEF llmpar__gemm_thin_fn llmpar__gemm_thin_function(const llmpar__cpu *cpu, llmpar_dtype dtype, int64_t *columns)
{
    llmpar__gemm_thin_level level = llmpar__gemm_thin_choose(cpu, dtype);
    *columns = level.columns;
    return level.span;
}

LLMPAR__PRIVATE_DEF int llmpar__gemm_thin_takes(const llmpar__cpu *cpu, const llmpar_gemm_args *args)
{
    return args->kind == LLMPAR_GEMM_NT && args->m <= LLMPAR__THIN_ROWS && args->dtype != LLMPAR_F64 && llmpar__gemm_thin_choose(cpu, args->dtype).columns > 0;
}

LLMPAR__PRIVATE_DEF size_t llmpar__gemm_thin_workspace(const llmpar__cpu *cpu, const llmpar_gemm_args *args)
{
    llmpar__gemm_thin_run run;
    int64_t chains;
    llmpar__gemm_thin_prepare(&run, cpu, args, 0);
    chains = run.group * run.rows > run.level.most ? run.group * run.rows : run.level.most; /* as fewer rows may have */
    return llmpar__gemm_thin_round(run.links * run.rows) + llmpar__gemm_thin_round(llmpar__pool_threads(cpu) * (llmpar__gemm_thin_slots(&run) + LLMPAR__THIN_HELD) * chains * LLMPAR__THIN_COLUMNS) + (size_t)llmpar__pool_threads(cpu) * sizeof(llmpar__gemm_thin_range) + 63;
}

/* x[links][rows of a block] of every block of 8 rows, as f32, or as pairs as they are stored: the even k low, a zero beside an odd one at the end. */
static void llmpar__gemm_thin_pack(const llmpar__gemm_thin_run *run)
{
    enum { PART = 64, BLOCK = 8 };
    const llmpar_gemm_args *args = run->args;
    float wide[BLOCK][PART];
    int64_t at = 0, k, i;
    int32_t s, row, r;
    memset(wide, 0, sizeof wide);
    for (s = 0; s < args->segment_count; at += llmpar__gemm_thin_links(run, args->segments[s++].k)) {
        const llmpar_gemm_segment *segment = &args->segments[s];
        for (row = 0; row < run->rows; row += BLOCK) {
            int32_t rows = run->rows - row < BLOCK ? run->rows - row : (int32_t)BLOCK, valid = run->m - row < BLOCK ? (int32_t)run->m - row : (int32_t)BLOCK;
            void (*turn)(const char *in, int64_t ld, float *out, int64_t step) = rows == BLOCK ? run->level.turn : NULL;
            float *out = run->x + row * run->links + at * rows;
            int64_t begin = (run->first + row) * segment->lda;
            if (run->kind == LLMPAR__THIN_KIND_PAIRS) {
                const uint16_t *in = (const uint16_t *)segment->a + begin;
                k = rows == 1 ? segment->k / 2 * 2 : 0;
                if (k) memcpy(out, in, (size_t)k * sizeof *in);
                for (out += k / 2; turn && valid == rows && k + 2 * rows <= segment->k; k += 2 * rows, out += rows * rows) turn((const char *)(in + k), segment->lda * (int64_t)sizeof *in, out, BLOCK);
                for (; k < segment->k; k += 2, out += rows)
                    for (r = 0; r < rows; r++) {
                        uint16_t pair[2] = { 0, 0 };
                        if (r < valid && k + 1 < segment->k) memcpy(pair, in + r * segment->lda + k, sizeof pair);
                        else if (r < valid) memcpy(pair, in + r * segment->lda + k, sizeof pair[0]);
                        memcpy(out + r, pair, sizeof pair);
                    }
                continue;
            }
            if (rows == 1) {
                const void *in = llmpar__half_read(&run->half, segment->a, begin, segment->k, out);
                if (in != (const void *)out) memcpy(out, in, (size_t)segment->k * sizeof *out);
                continue;
            }
            for (k = 0; k < segment->k; k += PART) {
                int64_t count = segment->k - k < PART ? segment->k - k : (int64_t)PART;
                for (r = 0; r < valid; r++) {
                    const void *in = llmpar__half_read(&run->half, segment->a, begin + r * segment->lda + k, count, wide[r]);
                    if (in != (const void *)wide[r]) memcpy(wide[r], in, (size_t)count * sizeof(float));
                }
                for (i = 0; turn && i + rows <= count; i += rows, out += rows * rows) turn((const char *)&wide[0][i], sizeof wide[0], out, BLOCK);
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

static int64_t llmpar__gemm_thin_columns(const llmpar__gemm_thin_run *run, const llmpar__gemm_thin_place *at)
{
    int64_t left = run->args->n - at->tile * run->level.columns;
    return left < run->level.columns ? left : run->level.columns;
}

/* Rows of b that are too few for a tile lie as rows in any case. */
static int llmpar__gemm_thin_interleaved(const llmpar__gemm_thin_run *run, const llmpar__gemm_thin_place *at)
{
    return run->args->segments[at->segment].interleaved && llmpar__gemm_thin_columns(run, at) == run->level.columns;
}

static const char *llmpar__gemm_thin_address(const llmpar__gemm_thin_run *run, const llmpar__gemm_thin_place *at)
{
    const llmpar_gemm_segment *segment = &run->args->segments[at->segment];
    int64_t k = at->begin + (segment->interleaved ? segment->begin : 0);
    return (const char *)segment->b + (at->tile * run->level.columns * segment->ldb + k * (llmpar__gemm_thin_interleaved(run, at) ? run->level.columns : 1)) * run->half.size;
}

/* sums = c[rows, columns], from element c_at of the first row on */
static void llmpar__gemm_thin_load(const llmpar__gemm_thin_run *run, int64_t c_at, int64_t columns, float *sums)
{
    int64_t r;
    for (r = 0; r < run->m; r++, c_at += run->args->ldc) memcpy(sums + r * LLMPAR__THIN_COLUMNS, (const float *)(const void *)run->c + c_at, (size_t)columns * sizeof *sums);
}

/* c[rows, columns], element c_at of the first row and on, = sums */
static void llmpar__gemm_thin_store(const llmpar__gemm_thin_run *run, const float *sums, int64_t c_at, int64_t columns)
{
    int64_t r;
    for (r = 0; r < run->m; r++, sums += LLMPAR__THIN_COLUMNS, c_at += run->args->ldc) {
        if (run->half_out.narrow) llmpar__half_write(&run->half_out, run->c, c_at, columns, sums);
        else if (columns == LLMPAR__THIN_COLUMNS) memcpy((float *)(void *)run->c + c_at, sums, LLMPAR__THIN_COLUMNS * sizeof *sums); /* without a call */
        else memcpy((float *)(void *)run->c + c_at, sums, (size_t)columns * sizeof *sums);
    }
}

/* The chains of `tiles` tiles, `apart` from each other, go on over the span at `at`; then `next` is read. */
static void llmpar__gemm_thin_run_span(const llmpar__gemm_thin_run *run, llmpar__gemm_thin_place at, int32_t tiles, int64_t apart, int64_t x, float *sums, int fresh, const llmpar__gemm_thin_place *next)
{
    const llmpar_gemm_args *args = run->args;
    llmpar__gemm_thin_span span;
    int32_t t;
    memset(&span, 0, sizeof span);
    span.k = at.k;
    span.x = run->x;
    span.x_k = run->links;
    span.x_done = x;
    span.sums = sums;
    span.rows = run->rows;
    span.kind = run->kind;
    span.fresh = fresh;
    span.parts = run->parts ? run->parts : 1;
    span.ends = run->ends;
    span.part_step = tiles * run->rows * LLMPAR__THIN_COLUMNS;
    span.ld = args->segments[at.segment].ldb * run->half.size;
    span.tile = apart * run->level.columns * span.ld;
    span.ahead_step = run->level.columns * 4;
    span.interleaved = llmpar__gemm_thin_interleaved(run, &at);
    span.tiles = span.interleaved ? tiles : 1;
    for (t = 0; t < tiles; t += span.tiles, at.tile += apart, span.sums += run->rows * LLMPAR__THIN_COLUMNS) {
        llmpar__gemm_thin_place then = at;
        then.tile += apart;
        if (t + span.tiles == tiles) then = *next;
        span.w = llmpar__gemm_thin_address(run, &at);
        span.columns = llmpar__gemm_thin_columns(run, &at);
        span.ahead = span.w + (tiles == 4 ? LLMPAR__THIN_AHEAD : 4 * LLMPAR__THIN_AHEAD);
        span.next = llmpar__gemm_thin_address(run, &then);
        span.next_ld = args->segments[then.segment].ldb * run->half.size;
        run->level.span(&span);
    }
}

static char *llmpar__gemm_thin_held(const llmpar__gemm_thin_run *run, int64_t unit, int32_t worker)
{
    return run->held + (worker * LLMPAR__THIN_HELD + unit % LLMPAR__THIN_HELD) * run->group * run->rows * LLMPAR__THIN_COLUMNS * run->out_size;
}

/* c = the results of units [first, end) of a range. Stores of every unit to its place, 16 lines far from each other, made processors lose the streams of weights that they were following (4 rows: 5 to 10 %). */
static void llmpar__gemm_thin_release(const llmpar__gemm_thin_run *run, const llmpar__gemm_thin_range *range, int64_t first, int64_t end, int32_t worker)
{
    int64_t bytes = run->level.columns * run->out_size, t, r, unit;
    for (t = 0; t < run->group; t++)
        for (r = 0; r < run->m; r++) {
            char *to = run->c + r * run->args->ldc * run->out_size + (range->begin + first + t * range->apart) * bytes;
            for (unit = first; unit < end; unit++, to += bytes) {
                const char *from = llmpar__gemm_thin_held(run, unit, worker) + (t * run->rows + r) * LLMPAR__THIN_COLUMNS * run->out_size;
                if (bytes == 32) memcpy(to, from, 32); /* without a call */
                else if (bytes == 64) memcpy(to, from, 64);
                else memcpy(to, from, (size_t)bytes);
            }
        }
}

/* held: results wait for llmpar__gemm_thin_release. */
static void llmpar__gemm_thin_unit(const llmpar__gemm_thin_run *run, const llmpar__gemm_thin_range *range, int64_t unit, int32_t worker, int held)
{
    const llmpar_gemm_args *args = run->args;
    int64_t apart = range->apart, tile = range->begin + unit + (unit < apart ? 0 : apart * (run->group - 1));
    int32_t tiles = unit < apart ? run->group : 1, piece, depth = 0, done, t;
    int64_t tile_size = run->rows * LLMPAR__THIN_COLUMNS, size = tiles * tile_size, i, x = 0;
    float *all = run->sums + worker * llmpar__gemm_thin_slots(run) * run->group * tile_size, *stack = all + (run->parts ? run->parts : 1) * size;
    llmpar__gemm_thin_place at, next;
    const float *results = all + (run->parts ? (args->pieces - 1) * size : 0);
    int more;
    memset(&at, 0, sizeof at);
    at.tile = tile;
    more = llmpar__gemm_thin_next(run, &at);
    for (t = 0; t < tiles && !held; t++) /* lines that are written last: else each store waits for its own */
        for (i = 0; i < run->m; i++) __builtin_prefetch(run->c + (i * args->ldc + (tile + t * apart) * run->level.columns) * run->out_size, 1, 2);
    for (piece = 0; piece < args->pieces; piece++) {
        float *sums = all + (run->parts ? piece * size : 0);
        int fresh = !args->accumulate && more && args->segments[at.segment].piece == piece;
        if (!fresh && (piece == 0 || !run->parts)) memset(sums, 0, (size_t)(stack - all) * sizeof *sums);
        for (t = 0; t < tiles && args->accumulate; t++) llmpar__gemm_thin_load(run, (tile + t * apart) * run->level.columns, llmpar__gemm_thin_columns(run, &at), sums + t * tile_size);
        while (more && args->segments[at.segment].piece == piece) {
            llmpar__gemm_thin_place then;
            next = at;
            more = llmpar__gemm_thin_next(run, &next);
            then = next;
            if (!more) { /* the next unit's first */
                memset(&then, 0, sizeof then);
                then.tile = unit + 1 < range->units ? tile + 1 : tile;
                llmpar__gemm_thin_next(run, &then);
            }
            llmpar__gemm_thin_run_span(run, at, tiles, apart, x, sums, fresh, &then);
            fresh = 0;
            x += llmpar__gemm_thin_links(run, at.k);
            at = next;
        }
        /* The tree, like a binary counter: after piece p, as many subtrees are complete as p + 1 has trailing zero bits. */
        for (done = piece + 1; depth > 0 && (done % 2 == 0 || piece == args->pieces - 1); done /= 2) {
            depth--;
            for (i = 0; i < size; i++) sums[i] = stack[depth * size + i] + sums[i];
        }
        if (piece < args->pieces - 1) memcpy(stack + depth++ * size, sums, (size_t)size * sizeof *sums);
    }
    if (held) {
        char *to = llmpar__gemm_thin_held(run, unit, worker);
        if (run->half_out.narrow) run->half_out.narrow(to, results, size);
        else memcpy(to, results, (size_t)size * sizeof *results);
        return;
    }
    for (t = 0; t < tiles; t++) {
        at.tile = tile + t * apart;
        llmpar__gemm_thin_store(run, results + t * tile_size, at.tile * run->level.columns, llmpar__gemm_thin_columns(run, &at));
    }
}

static void llmpar__gemm_thin_task(void *arg, int64_t task, int32_t worker)
{
    const llmpar__gemm_thin_run *run = (const llmpar__gemm_thin_run *)arg;
    int32_t r;
    for (r = 0; r < run->threads; r++) { /* its own first */
        llmpar__gemm_thin_range *range = &run->ranges[(task + r) % run->threads];
        int64_t first = 0, end = 0; /* whose results are held */
        for (;;) {
            uint64_t taken = __atomic_fetch_add(&range->taken, r ? (uint64_t)1 << 32 : (uint64_t)1, __ATOMIC_RELAXED);
            int64_t front = (int64_t)(taken & 0xffffffffu), back = (int64_t)(taken >> 32);
            if (front + back >= range->units) break;
            if (r == 0 && front < range->apart) {
                if (front - first == LLMPAR__THIN_HELD) {
                    llmpar__gemm_thin_release(run, range, first, front, worker);
                    first = front;
                }
                end = front + 1;
            }
            llmpar__gemm_thin_unit(run, range, r ? range->units - 1 - back : front, worker, end == front + 1);
        }
        llmpar__gemm_thin_release(run, range, first, end, worker);
    }
}

static void llmpar__gemm_thin_rows(llmpar__cpu *cpu, const llmpar_gemm_args *args, int64_t first)
{
    llmpar__gemm_thin_run run;
    char *at = (char *)args->workspace;
    int32_t s;
    llmpar__gemm_thin_prepare(&run, cpu, args, first);
    if (!llmpar__gemm_has_interleaved(args)) run.group = 1;
    at += (64 - (uintptr_t)at % 64) % 64;
    run.x = (float *)(void *)at;
    at += llmpar__gemm_thin_round(run.links * run.rows);
    run.threads = (double)args->n * (double)run.links * (double)(run.half.size + run.m) < LLMPAR__THIN_SERIAL ? 1 : llmpar__pool_threads(cpu);
    run.ranges = (llmpar__gemm_thin_range *)(void *)at;
    run.sums = (float *)(void *)(run.ranges + run.threads);
    run.held = (char *)(run.sums + run.threads * llmpar__gemm_thin_slots(&run) * run.group * run.rows * LLMPAR__THIN_COLUMNS);
    for (s = 0; s < run.threads; s++) {
        llmpar__gemm_thin_range *range = &run.ranges[s];
        int64_t end = llmpar_piece_begin(s + 1, run.tiles, run.threads), whole = args->n / run.level.columns < end ? args->n / run.level.columns : end;
        memset(range, 0, sizeof *range);
        range->begin = llmpar_piece_begin(s, run.tiles, run.threads);
        if (run.group > 1 && whole > range->begin) range->apart = (whole - range->begin) / run.group;
        range->units = end - range->begin - range->apart * (run.group - 1);
    }
    llmpar__gemm_thin_pack(&run);
    llmpar__pool_run(cpu, llmpar__gemm_thin_task, &run, run.threads);
}

LLMPAR__PRIVATE_DEF void llmpar__gemm_thin(llmpar__cpu *cpu, const llmpar_gemm_args *args)
{
    int64_t first;
    for (first = 0; first < args->m; first += LLMPAR__THIN_ROWS) llmpar__gemm_thin_rows(cpu, args, first);
}

#undef LLMPAR__THIN_VECTOR
#undef LLMPAR__THIN_LANES
#undef LLMPAR__THIN_PANELS
#undef LLMPAR__THIN_MOST
#undef LLMPAR__THIN_READ
#undef LLMPAR__THIN_WRITE
#undef LLMPAR__THIN_K_PER_WORD
#undef LLMPAR__THIN_LINKS_PER_WORD
#undef LLMPAR__THIN_SERIAL
#undef LLMPAR__THIN_UNROLL
#undef LLMPAR__THIN_FETCH

#else

LLMPAR__PRIVATE_DEF llmpar__gemm_thin_fn llmpar__gemm_thin_function(const llmpar__cpu *cpu, llmpar_dtype dtype, int64_t *columns) { (void)cpu; (void)dtype; *columns = 0; return NULL; }
LLMPAR__PRIVATE_DEF int llmpar__gemm_thin_takes(const llmpar__cpu *cpu, const llmpar_gemm_args *args) { (void)cpu; (void)args; return 0; }
LLMPAR__PRIVATE_DEF size_t llmpar__gemm_thin_workspace(const llmpar__cpu *cpu, const llmpar_gemm_args *args) { (void)cpu; (void)args; return 0; }
LLMPAR__PRIVATE_DEF void llmpar__gemm_thin(llmpar__cpu *cpu, const llmpar_gemm_args *args) { (void)cpu; (void)args; }

#endif
