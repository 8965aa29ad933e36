/* vector: short vectors of one level, and the names a kernel template is made from.

   A template (norm.inc, attention.inc, ...) is included once a level, by kernels_*.c, with LLMPAR__VLEVEL set to one of
     portable_f64, portable   plain vector extensions, a*b+c unfused: the readable specification (f32 on aarch64: fused, as its products)
     avx2, avx512             the same text with wider vectors and fused multiply-adds
   Every kernel is a task for llmpar__pool_run, so one table of four pointers dispatches it:
     static const llmpar__kernel llmpar__norm_forward[4] = LLMPAR__VKERNELS(norm_forward);
   NARROW ones wait for memory, not for arithmetic: they have no instance for AVX-512, where AVX2's serves as well.
   Sums along a vector have a fixed lane structure, tails run the same code masked, loads and stores need no alignment: no result
   depends on where an element lies. */
#ifndef LLMPAR_VECTOR_H
#define LLMPAR_VECTOR_H

#include "base/math.h"
#include "base/size.h"
#include "cpu/half_internal.h"
#include <string.h>

#if defined(__x86_64__) && !defined(LLMPAR_NO_SIMD)
#define LLMPAR__VX86 1
#include <immintrin.h>
#else
#define LLMPAR__VX86 0
#if defined(__aarch64__) && !defined(LLMPAR_NO_SIMD)
#include <arm_neon.h>
#endif
#endif

typedef void (*llmpar__kernel)(void *arg, int64_t task, int32_t worker);

#define LLMPAR__VPASTE2(a, b) a##b
#define LLMPAR__VPASTE(a, b) LLMPAR__VPASTE2(a, b)
#define LLMPAR__VFN(name) LLMPAR__VPASTE(llmpar__##name##_, LLMPAR__VLEVEL)   /* a kernel's name at this level */
#define LLMPAR__V(name) LLMPAR__VPASTE(llmpar__v_##name##_, LLMPAR__VLEVEL)   /* a vector function: LLMPAR__V(load)(p) */
#define LLMPAR__VREAL LLMPAR__VPASTE(llmpar__real_, LLMPAR__VLEVEL)           /* float or double */
#define LLMPAR__VEC LLMPAR__VPASTE(llmpar__vec_, LLMPAR__VLEVEL)              /* LLMPAR__VLANES of them */
#define LLMPAR__VWIDE LLMPAR__VPASTE(llmpar__wide_, LLMPAR__VLEVEL)           /* half as many doubles */
#define LLMPAR__VBITS LLMPAR__VPASTE(llmpar__bits_, LLMPAR__VLEVEL)           /* the unsigned integers of the same shape */
#define LLMPAR__VLANES LLMPAR__VPASTE(LLMPAR__VLANES_, LLMPAR__VLEVEL)
#define LLMPAR__VTARGET LLMPAR__VPASTE(LLMPAR__VTARGET_, LLMPAR__VLEVEL)
#define LLMPAR__VBUILT LLMPAR__VPASTE(LLMPAR__VBUILT_, LLMPAR__VLEVEL)        /* for #if: this build has the level */
#define LLMPAR__VHALVES (!LLMPAR__VDOUBLE && (LLMPAR__VLANES > 4 || !LLMPAR__VX86)) /* BF16 beside the own type, else by a call */
#define LLMPAR__VPAIRS (LLMPAR__BF16_UNITS && LLMPAR__VLANES == 16) /* products of pairs of BF16 */
#define LLMPAR__VINLINE static inline __attribute__((always_inline, unused)) LLMPAR__VTARGET
#define LLMPAR__VSHARED static __attribute__((noinline, unused)) LLMPAR__VTARGET /* called rarely: once is enough */
#define LLMPAR__VKERNEL LLMPAR__PRIVATE_DEF LLMPAR__VTARGET
#if defined(__clang__)
#define LLMPAR__VUNROLL _Pragma("clang loop unroll(full)") /* plain "unroll" leaves loops of an inlined function at times, and their arrays in memory */
#define LLMPAR__VUNROLL_TWICE _Pragma("unroll 2")
#else
#define LLMPAR__VUNROLL_TWICE _Pragma("GCC unroll 2")
#define LLMPAR__VUNROLL _Pragma("GCC unroll 16")
#endif

#define LLMPAR__VLANES_portable_f64 2
#define LLMPAR__VLANES_portable 4
#define LLMPAR__VLANES_avx2 8
#define LLMPAR__VLANES_avx512 16
#define LLMPAR__VTARGET_portable_f64
#define LLMPAR__VTARGET_portable
#define LLMPAR__VTARGET_avx2 __attribute__((target("avx2,fma,f16c")))
#define LLMPAR__VTARGET_avx512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define LLMPAR__VBUILT_portable_f64 1
#define LLMPAR__VBUILT_portable 1
#define LLMPAR__VBUILT_avx2 LLMPAR__VX86
#define LLMPAR__VBUILT_avx512 LLMPAR__VX86

#define LLMPAR__VDECLARE_AT(name, level) LLMPAR__PRIVATE LLMPAR__VTARGET_##level void llmpar__##name##_##level(void *arg, int64_t task, int32_t worker);
#if LLMPAR__VX86
#define LLMPAR__VDECLARE(name) LLMPAR__VDECLARE_AT(name, portable_f64) LLMPAR__VDECLARE_AT(name, portable) LLMPAR__VDECLARE_AT(name, avx2) LLMPAR__VDECLARE_AT(name, avx512)
#define LLMPAR__VDECLARE_NARROW(name) LLMPAR__VDECLARE_AT(name, portable_f64) LLMPAR__VDECLARE_AT(name, portable) LLMPAR__VDECLARE_AT(name, avx2)
#define LLMPAR__VKERNELS(name) { llmpar__##name##_portable_f64, llmpar__##name##_portable, llmpar__##name##_avx2, llmpar__##name##_avx512 }
#define LLMPAR__VKERNELS_NARROW(name) { llmpar__##name##_portable_f64, llmpar__##name##_portable, llmpar__##name##_avx2, llmpar__##name##_avx2 }
#else
#define LLMPAR__VDECLARE(name) LLMPAR__VDECLARE_AT(name, portable_f64) LLMPAR__VDECLARE_AT(name, portable)
#define LLMPAR__VDECLARE_NARROW(name) LLMPAR__VDECLARE(name)
#define LLMPAR__VKERNELS(name) { llmpar__##name##_portable_f64, llmpar__##name##_portable, llmpar__##name##_portable, llmpar__##name##_portable }
#define LLMPAR__VKERNELS_NARROW(name) LLMPAR__VKERNELS(name)
#endif

/* How an array lies in memory: as the vectors' own type, or as one of the types that are of storage alone (a vector's get and put: vector_math.inc). */
enum { LLMPAR__AS_OWN, LLMPAR__AS_BF16, LLMPAR__AS_F16 };
enum { LLMPAR__VGROUP = 4, LLMPAR__VAHEAD = 512, LLMPAR__VFAR = 3072 }; /* vectors that a kernel takes at a time; bytes that it asks for ahead, and where it goes back and forth between arrays, row by row */
static inline int llmpar__v_as(llmpar_dtype dtype) { return dtype == LLMPAR_BF16 ? LLMPAR__AS_BF16 : dtype == LLMPAR_F16 ? LLMPAR__AS_F16 : LLMPAR__AS_OWN; }
/* Which of the four a call runs; BF16 and F16 are computed in F32. */
static inline int llmpar__v_index(const llmpar__cpu *cpu, llmpar_dtype dtype)
{
    if (dtype == LLMPAR_F64) return 0;
    return cpu->level >= LLMPAR_CPU_AVX512 ? 3 : cpu->level == LLMPAR_CPU_AVX2 ? 2 : 1;
}
static inline int64_t llmpar__v_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t llmpar__v_max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t llmpar__v_blocks(int64_t count, int64_t block) { return (count + block - 1) / block; }
/* The operations of forward and backward take every floating type, those of the optimizer F32 and F64; anything else is told so. */
static inline llmpar_status llmpar__v_check(llmpar_device *device, const char *name, llmpar_dtype dtype)
{
    if (dtype == LLMPAR_F32 || dtype == LLMPAR_F64 || dtype == LLMPAR_BF16 || dtype == LLMPAR_F16) return LLMPAR_OK;
    return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "%s: dtype %s, expected f32, f64, bf16 or f16", name, llmpar_dtype_name(dtype));
}
static inline llmpar_status llmpar__v_check_wide(llmpar_device *device, const char *name, llmpar_dtype dtype)
{
    if (dtype == LLMPAR_F32 || dtype == LLMPAR_F64) return LLMPAR_OK;
    return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "%s: dtype %s, expected f32 or f64", name, llmpar_dtype_name(dtype));
}

typedef double llmpar__real_portable_f64;
typedef double llmpar__vec_portable_f64 __attribute__((vector_size(16)));
typedef double llmpar__loose_portable_f64 __attribute__((vector_size(16), aligned(8), may_alias));
typedef uint64_t llmpar__bits_portable_f64 __attribute__((vector_size(16)));
typedef uint64_t llmpar__bit_portable_f64;
typedef float llmpar__real_portable;
typedef double llmpar__wide_portable __attribute__((vector_size(16)));
typedef float llmpar__vec_portable __attribute__((vector_size(16)));
typedef float llmpar__loose_portable __attribute__((vector_size(16), aligned(2) /* also pairs of BF16 */, may_alias));
typedef uint32_t llmpar__bits_portable __attribute__((vector_size(16)));
typedef uint32_t llmpar__bit_portable;

#define LLMPAR__VLEVEL portable_f64
#define LLMPAR__VSPREAD(x) { x, x }
#define LLMPAR__VFMA(a, b, c) ((a) * (b) + (c))
#include "cpu/vector_portable.inc"
static inline llmpar__vec_portable_f64 llmpar__v_sqrt_portable_f64(llmpar__vec_portable_f64 x)
{
    llmpar__vec_portable_f64 y = { llmpar_sqrt_f64(x[0]), llmpar_sqrt_f64(x[1]) };
    return y;
}
static inline llmpar__vec_portable_f64 llmpar__v_fma_once_portable_f64(llmpar__vec_portable_f64 a, llmpar__vec_portable_f64 b, llmpar__vec_portable_f64 c) { return a * b + c; } /* no other device has f64 */
#define LLMPAR__VLEVEL portable
#define LLMPAR__VSPREAD(x) { x, x, x, x }
#if defined(__aarch64__) && !defined(LLMPAR_NO_SIMD) /* as in its products, which attention of few queries takes its scores from */
#define LLMPAR__VFMA(a, b, c) (LLMPAR__VEC)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b))
#else
#define LLMPAR__VFMA(a, b, c) ((a) * (b) + (c))
#endif
#include "cpu/vector_portable.inc"
static inline llmpar__wide_portable llmpar__v_load_wide_portable(const float *p)
{
    llmpar__wide_portable y = { (double)p[0], (double)p[1] };
    return y;
}
static inline llmpar__wide_portable llmpar__v_fma_wide_portable(llmpar__wide_portable a, llmpar__wide_portable b, llmpar__wide_portable c) { return a * b + c; }
static inline llmpar__vec_portable llmpar__v_sqrt_portable(llmpar__vec_portable x)
{
    llmpar__vec_portable y = { llmpar_sqrt_f32(x[0]), llmpar_sqrt_f32(x[1]), llmpar_sqrt_f32(x[2]), llmpar_sqrt_f32(x[3]) };
    return y;
}
typedef uint16_t llmpar__words_portable __attribute__((vector_size(8)));
static inline llmpar__bits_portable llmpar__v_load_words_portable(const uint16_t *p, int64_t n)
{
    llmpar__words_portable y = { 0, 0, 0, 0 };
    if (n >= 4) memcpy(&y, p, sizeof y);
    else if (n > 0) memcpy(&y, p, (size_t)n * sizeof *p);
    return __builtin_convertvector(y, llmpar__bits_portable);
}
static inline void llmpar__v_store_words_portable(uint16_t *p, int64_t n, llmpar__bits_portable x)
{
    llmpar__words_portable y = __builtin_convertvector(x, llmpar__words_portable);
    if (n >= 4) memcpy(p, &y, sizeof y);
    else if (n > 0) memcpy(p, &y, (size_t)n * sizeof *p);
}
static inline llmpar__vec_portable llmpar__v_load_f16_portable(const uint16_t *p, int64_t n)
{
    float y[4] = { 0, 0, 0, 0 };
    llmpar_convert(y, LLMPAR_F32, p, LLMPAR_F16, n >= 4 ? 4 : n > 0 ? (size_t)n : 0);
    return llmpar__v_load_portable(y);
}
static inline void llmpar__v_store_f16_portable(uint16_t *p, int64_t n, llmpar__vec_portable x)
{
    float y[4];
    llmpar__v_store_portable(y, x);
    llmpar_convert(p, LLMPAR_F16, y, LLMPAR_F32, n >= 4 ? 4 : n > 0 ? (size_t)n : 0);
}
static inline llmpar__vec_portable llmpar__v_fma_from_portable(llmpar__vec_portable x, llmpar__vec_portable least, llmpar__vec_portable a, llmpar__vec_portable b, llmpar__vec_portable c)
{
    return (llmpar__vec_portable)((llmpar__bits_portable)(a * b + c) & ~(llmpar__bits_portable)(x < least));
}
#define LLMPAR__VROOTS 0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7
static inline llmpar__bits_portable llmpar__v_root_portable(llmpar__bits_portable t)
{
    static const uint32_t root[8] = { LLMPAR__VROOTS };
    llmpar__bits_portable y = { root[t[0] & 7], root[t[1] & 7], root[t[2] & 7], root[t[3] & 7] };
    return y;
}
/* a*b + c rounded once, as hardware's fma: what an optimizer computes has the same bits at every level and on every device. The product is exact in a double; the sum is rounded to odd (with what Knuth's two-sum
   says was lost), and that, once more, to a float: the bits of one rounding (Boldo & Melquiond 2008). */
static inline float llmpar__v_fma_one(float a, float b, float c)
{
#if defined(__aarch64__) || defined(__FMA__)
    return __builtin_fmaf(a, b, c);
#else
    double product = (double)a * (double)b, sum = product + (double)c, part = sum - product, lost = (product - (sum - part)) + ((double)c - part);
    uint64_t bits;
    memcpy(&bits, &sum, sizeof bits);
    if ((lost > 0 || lost < 0) && !(bits & 1)) bits += (lost > 0) == (sum > 0) ? 1 : (uint64_t)-1;
    memcpy(&sum, &bits, sizeof sum);
    return (float)sum;
#endif
}
static inline llmpar__vec_portable llmpar__v_fma_once_portable(llmpar__vec_portable a, llmpar__vec_portable b, llmpar__vec_portable c)
{
    llmpar__vec_portable y = { llmpar__v_fma_one(a[0], b[0], c[0]), llmpar__v_fma_one(a[1], b[1], c[1]), llmpar__v_fma_one(a[2], b[2], c[2]), llmpar__v_fma_one(a[3], b[3], c[3]) };
    return y;
}

#if LLMPAR__VX86
typedef float llmpar__real_avx2;
typedef uint32_t llmpar__bit_avx2;
typedef __m256 llmpar__vec_avx2;
typedef __m256d llmpar__wide_avx2;
typedef uint32_t llmpar__bits_avx2 __attribute__((vector_size(32)));
#define LLMPAR__VLEVEL avx2
LLMPAR__VINLINE __m256 llmpar__v_splat_avx2(float x) { return _mm256_set1_ps(x); }
LLMPAR__VINLINE __m256i llmpar__v_mask_avx2(int64_t n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
LLMPAR__VINLINE __m256 llmpar__v_load_avx2(const float *p) { return _mm256_loadu_ps(p); }
LLMPAR__VINLINE __m256d llmpar__v_load_wide_avx2(const float *p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
LLMPAR__VINLINE __m256d llmpar__v_fma_wide_avx2(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
LLMPAR__VINLINE void llmpar__v_store_avx2(float *p, __m256 x) { _mm256_storeu_ps(p, x); }
LLMPAR__VINLINE __m256 llmpar__v_load_n_avx2(const float *p, int64_t n) { return n >= 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, llmpar__v_mask_avx2(n)); }
LLMPAR__VINLINE void llmpar__v_store_n_avx2(float *p, int64_t n, __m256 x)
{
    if (n >= 8) _mm256_storeu_ps(p, x);
    else _mm256_maskstore_ps(p, llmpar__v_mask_avx2(n), x);
}
LLMPAR__VINLINE __m256 llmpar__v_keep_avx2(__m256 x, int64_t n, __m256 other) { return n >= 8 ? x : _mm256_blendv_ps(other, x, _mm256_castsi256_ps(llmpar__v_mask_avx2(n))); }
LLMPAR__VINLINE __m256 llmpar__v_fma_avx2(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
LLMPAR__VINLINE __m256 llmpar__v_fma_once_avx2(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
LLMPAR__VINLINE __m256 llmpar__v_less_avx2(__m256 a, __m256 b, __m256 yes, __m256 no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
LLMPAR__VINLINE __m256 llmpar__v_nan_avx2(__m256 a, __m256 yes, __m256 no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
LLMPAR__VINLINE __m256 llmpar__v_larger_avx2(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
LLMPAR__VINLINE float llmpar__v_larger_lane_avx2(__m256 x)
{
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
}
LLMPAR__VINLINE llmpar__bits_avx2 llmpar__v_more_bits_avx2(llmpar__bits_avx2 a, llmpar__bits_avx2 b) { return (llmpar__bits_avx2)_mm256_max_epu32((__m256i)a, (__m256i)b); }
LLMPAR__VINLINE llmpar__bits_avx2 llmpar__v_less_bits_avx2(llmpar__bits_avx2 a, llmpar__bits_avx2 b) { return (llmpar__bits_avx2)_mm256_min_epu32((__m256i)a, (__m256i)b); }
LLMPAR__VINLINE __m256 llmpar__v_fma_from_avx2(__m256 x, __m256 least, __m256 a, __m256 b, __m256 c) { return _mm256_and_ps(_mm256_cmp_ps(x, least, _CMP_NLT_UQ), _mm256_fmadd_ps(a, b, c)); }
LLMPAR__VINLINE llmpar__bits_avx2 llmpar__v_root_avx2(llmpar__bits_avx2 t)
{
    const llmpar__bits_avx2 root = { LLMPAR__VROOTS };
    return (llmpar__bits_avx2)_mm256_permutevar8x32_epi32((__m256i)root, (__m256i)t);
}
LLMPAR__VINLINE __m256 llmpar__v_sqrt_avx2(__m256 x) { return _mm256_sqrt_ps(x); }
LLMPAR__VINLINE __m128i llmpar__v_halves_avx2(const uint16_t *p, int64_t n)
{
    uint16_t some[8] = { 0 };
    if (n >= 8) return _mm_loadu_si128((const __m128i *)(const void *)p);
    if (n > 0) memcpy(some, p, (size_t)n * sizeof *p);
    return _mm_loadu_si128((const __m128i *)(const void *)some);
}
LLMPAR__VINLINE void llmpar__v_keep_halves_avx2(uint16_t *p, int64_t n, __m128i x)
{
    uint16_t all[8];
    if (n >= 8) {
        _mm_storeu_si128((__m128i *)(void *)p, x);
        return;
    }
    _mm_storeu_si128((__m128i *)(void *)all, x);
    if (n > 0) memcpy(p, all, (size_t)n * sizeof *p);
}
LLMPAR__VINLINE llmpar__bits_avx2 llmpar__v_load_words_avx2(const uint16_t *p, int64_t n) { return (llmpar__bits_avx2)_mm256_cvtepu16_epi32(llmpar__v_halves_avx2(p, n)); }
LLMPAR__VINLINE void llmpar__v_store_words_avx2(uint16_t *p, int64_t n, llmpar__bits_avx2 x)
{
    llmpar__v_keep_halves_avx2(p, n, _mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1)));
}
LLMPAR__VINLINE __m256 llmpar__v_load_f16_avx2(const uint16_t *p, int64_t n) { return _mm256_cvtph_ps(llmpar__v_halves_avx2(p, n)); }
LLMPAR__VINLINE void llmpar__v_store_f16_avx2(uint16_t *p, int64_t n, __m256 x) { llmpar__v_keep_halves_avx2(p, n, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
/* out[8, 8] = in[8, 8] transposed */
LLMPAR__VINLINE void llmpar__v_transpose_avx2(float *out, int64_t ld_out, const float *in, int64_t ld_in)
{
    __m256 a[8], b[8];
    LLMPAR__VUNROLL
    for (int i = 0; i < 8; i += 2) { /* pairs of rows */
        __m256 x = _mm256_loadu_ps(in + i * ld_in), y = _mm256_loadu_ps(in + (i + 1) * ld_in);
        a[i] = _mm256_unpacklo_ps(x, y);
        a[i + 1] = _mm256_unpackhi_ps(x, y);
    }
    LLMPAR__VUNROLL
    for (int i = 0; i < 8; i += 4) { /* fours */
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    LLMPAR__VUNROLL
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(out + i * ld_out, _mm256_permute2f128_ps(b[i], b[i + 4], 0x20));
        _mm256_storeu_ps(out + (i + 4) * ld_out, _mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
    }
}
#undef LLMPAR__VLEVEL

typedef float llmpar__real_avx512;
typedef uint32_t llmpar__bit_avx512;
typedef __m512 llmpar__vec_avx512;
typedef __m512d llmpar__wide_avx512;
typedef uint32_t llmpar__bits_avx512 __attribute__((vector_size(64)));
#define LLMPAR__VLEVEL avx512
LLMPAR__VINLINE __m512 llmpar__v_splat_avx512(float x) { return _mm512_set1_ps(x); }
LLMPAR__VINLINE __mmask16 llmpar__v_mask_avx512(int64_t n) { return (__mmask16)(n <= 0 ? 0u : n >= 16 ? 0xffffu : (1u << n) - 1u); }
LLMPAR__VINLINE __m512 llmpar__v_load_avx512(const float *p) { return _mm512_loadu_ps(p); }
LLMPAR__VINLINE __m512d llmpar__v_load_wide_avx512(const float *p) { return _mm512_maskz_cvtps_pd((__mmask8)0xff, _mm256_loadu_ps(p)); }
LLMPAR__VINLINE __m512d llmpar__v_fma_wide_avx512(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
LLMPAR__VINLINE void llmpar__v_store_avx512(float *p, __m512 x) { _mm512_storeu_ps(p, x); }
LLMPAR__VINLINE __m512 llmpar__v_load_n_avx512(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(llmpar__v_mask_avx512(n), p); }
LLMPAR__VINLINE void llmpar__v_store_n_avx512(float *p, int64_t n, __m512 x) { _mm512_mask_storeu_ps(p, llmpar__v_mask_avx512(n), x); }
LLMPAR__VINLINE __m512 llmpar__v_keep_avx512(__m512 x, int64_t n, __m512 other) { return _mm512_mask_blend_ps(llmpar__v_mask_avx512(n), other, x); }
LLMPAR__VINLINE __m512 llmpar__v_fma_avx512(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
LLMPAR__VINLINE __m512 llmpar__v_less_avx512(__m512 a, __m512 b, __m512 yes, __m512 no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }
LLMPAR__VINLINE __m512 llmpar__v_nan_avx512(__m512 a, __m512 yes, __m512 no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), no, yes); }
/* The maskz forms only because gcc 12 warns about its own header's plain ones in C++. */
LLMPAR__VINLINE __m512 llmpar__v_larger_avx512(__m512 a, __m512 b) { return _mm512_maskz_max_ps((__mmask16)0xffff, a, b); }
LLMPAR__VINLINE float llmpar__v_larger_lane_avx512(__m512 x)
{
    __m512d y = _mm512_castps_pd(x);
    return llmpar__v_larger_lane_avx2(_mm256_max_ps(_mm256_castpd_ps(_mm512_maskz_extractf64x4_pd((__mmask8)0xff, y, 0)), _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd((__mmask8)0xff, y, 1))));
}
LLMPAR__VINLINE llmpar__bits_avx512 llmpar__v_more_bits_avx512(llmpar__bits_avx512 a, llmpar__bits_avx512 b) { return (llmpar__bits_avx512)_mm512_maskz_max_epu32((__mmask16)0xffff, (__m512i)a, (__m512i)b); }
LLMPAR__VINLINE llmpar__bits_avx512 llmpar__v_less_bits_avx512(llmpar__bits_avx512 a, llmpar__bits_avx512 b) { return (llmpar__bits_avx512)_mm512_maskz_min_epu32((__mmask16)0xffff, (__m512i)a, (__m512i)b); }
LLMPAR__VINLINE __m256i llmpar__v_halves_avx512(const uint16_t *p, int64_t n) { return n >= 16 ? _mm256_loadu_si256((const __m256i *)(const void *)p) : _mm256_maskz_loadu_epi16(llmpar__v_mask_avx512(n), p); }
LLMPAR__VINLINE void llmpar__v_keep_halves_avx512(uint16_t *p, int64_t n, __m256i x)
{
    if (n >= 16) _mm256_storeu_si256((__m256i *)(void *)p, x);
    else _mm256_mask_storeu_epi16(p, llmpar__v_mask_avx512(n), x);
}
LLMPAR__VINLINE llmpar__bits_avx512 llmpar__v_load_words_avx512(const uint16_t *p, int64_t n) { return (llmpar__bits_avx512)_mm512_maskz_cvtepu16_epi32((__mmask16)0xffff, llmpar__v_halves_avx512(p, n)); }
LLMPAR__VINLINE void llmpar__v_store_words_avx512(uint16_t *p, int64_t n, llmpar__bits_avx512 x) { llmpar__v_keep_halves_avx512(p, n, _mm512_maskz_cvtepi32_epi16((__mmask16)0xffff, (__m512i)x)); }
/* As vector_math.inc's, in fewer instructions: the processor looks for NaN and makes it quiet; the upper halves of two vectors are put together. */
LLMPAR__VINLINE llmpar__bits_avx512 llmpar__v_round_words_avx512(__m512 x)
{
    __m512i bits = _mm512_castps_si512(x), up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    up = _mm512_mask_add_epi32(up, _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000)), up, _mm512_set1_epi32(1));
    return (llmpar__bits_avx512)_mm512_fixupimm_ps(_mm512_castsi512_ps(up), x, _mm512_set1_epi32(0x22), 0);
}
LLMPAR__VINLINE void llmpar__v_store_pair_avx512(uint16_t *p, __m512 a, __m512 b)
{
    const __m512i upper = _mm512_set_epi32(0x3f003d, 0x3b0039, 0x370035, 0x330031, 0x2f002d, 0x2b0029, 0x270025, 0x230021, 0x1f001d, 0x1b0019, 0x170015, 0x130011, 0x0f000d, 0x0b0009, 0x070005, 0x030001);
    _mm512_storeu_si512((void *)p, _mm512_permutex2var_epi16(_mm512_castps_si512(a), upper, _mm512_castps_si512(b)));
}
LLMPAR__VINLINE __m512 llmpar__v_load_f16_avx512(const uint16_t *p, int64_t n) { return _mm512_maskz_cvtph_ps((__mmask16)0xffff, llmpar__v_halves_avx512(p, n)); }
LLMPAR__VINLINE void llmpar__v_store_f16_avx512(uint16_t *p, int64_t n, __m512 x) { llmpar__v_keep_halves_avx512(p, n, _mm512_maskz_cvtps_ph((__mmask16)0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
LLMPAR__VINLINE void llmpar__v_transpose_avx512(float *out, int64_t ld_out, const float *in, int64_t ld_in) { llmpar__v_transpose_avx2(out, ld_out, in, ld_in); }
LLMPAR__VINLINE __m512 llmpar__v_fma_from_avx512(__m512 x, __m512 least, __m512 a, __m512 b, __m512 c) { return _mm512_maskz_fmadd_ps(_mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ), a, b, c); }
LLMPAR__VINLINE llmpar__bits_avx512 llmpar__v_root_avx512(llmpar__bits_avx512 t)
{
    const llmpar__bits_avx512 root = { 0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0, 0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6 },
        more = { 0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e, 0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3 };
    return (llmpar__bits_avx512)_mm512_permutex2var_epi32((__m512i)root, (__m512i)t, (__m512i)more);
}
LLMPAR__VINLINE __m512 llmpar__v_sqrt_avx512(__m512 x) { return _mm512_maskz_sqrt_ps((__mmask16)0xffff, x); }
#undef LLMPAR__VLEVEL
#endif
#undef LLMPAR__VROOTS

#endif
