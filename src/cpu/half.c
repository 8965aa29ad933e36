/* half: widening and rounding of BF16 and F16, with the bits of base/dtype.h at every level (but that a signalling NaN may stay one until it is rounded). */
#include "cpu/half_internal.h"

#include "cpu/vector.h"

#if LLMPAR__VX86
#include <cpuid.h>
#endif

static void llmpar__half_widen_bf16(float *out, const void *in, int64_t count) { llmpar_convert(out, LLMPAR_F32, in, LLMPAR_BF16, (size_t)count); }
static void llmpar__half_widen_f16(float *out, const void *in, int64_t count) { llmpar_convert(out, LLMPAR_F32, in, LLMPAR_F16, (size_t)count); }
static void llmpar__half_narrow_bf16(void *out, const float *in, int64_t count) { llmpar_convert(out, LLMPAR_BF16, in, LLMPAR_F32, (size_t)count); }
static void llmpar__half_narrow_f16(void *out, const float *in, int64_t count) { llmpar_convert(out, LLMPAR_F16, in, LLMPAR_F32, (size_t)count); }

#if LLMPAR__VX86

#define LLMPAR__HALF_AVX2 __attribute__((target("avx2,f16c")))

static inline __attribute__((always_inline)) LLMPAR__HALF_AVX2 __m256 llmpar__half_8_from_bf16(__m128i half) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)); }

/* To nearest: half a unit less one, and one more where the unit is odd. A NaN keeps its leading bits and becomes quiet. */
static inline __attribute__((always_inline)) LLMPAR__HALF_AVX2 __m128i llmpar__half_8_to_bf16(__m256 value)
{
    __m256i bits = _mm256_castps_si256(value), high = _mm256_srli_epi32(bits, 16);
    __m256i nan = _mm256_cmpgt_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)), _mm256_set1_epi32(0x7f800000));
    __m256i half = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_and_si256(high, _mm256_set1_epi32(1)))), 16);
    half = _mm256_blendv_epi8(half, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

static inline __attribute__((always_inline)) LLMPAR__HALF_AVX2 __m256 llmpar__half_8_from_f16(__m128i half) { return _mm256_cvtph_ps(half); }
static inline __attribute__((always_inline)) LLMPAR__HALF_AVX2 __m128i llmpar__half_8_to_f16(__m256 value) { return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

/* Eights; what is left over goes through a copy of eight. */
#define LLMPAR__HALF_WIDEN(name, from_half) \
    LLMPAR__HALF_AVX2 static void name(float *out, const void *in, int64_t count) \
    { \
        const uint16_t *from = (const uint16_t *)in; \
        uint16_t last[8] = { 0 }; \
        float wide[8]; \
        int64_t i = 0; \
        for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, from_half(_mm_loadu_si128((const __m128i *)(const void *)(from + i)))); \
        if (i == count) return; \
        memcpy(last, from + i, (size_t)(count - i) * sizeof *last); \
        _mm256_storeu_ps(wide, from_half(_mm_loadu_si128((const __m128i *)(const void *)last))); \
        memcpy(out + i, wide, (size_t)(count - i) * sizeof *wide); \
    }
#define LLMPAR__HALF_NARROW(name, to_half) \
    LLMPAR__HALF_AVX2 static void name(void *out, const float *in, int64_t count) \
    { \
        uint16_t *to = (uint16_t *)out, last[8]; \
        float wide[8] = { 0 }; \
        int64_t i = 0; \
        for (; i + 8 <= count; i += 8) _mm_storeu_si128((__m128i *)(void *)(to + i), to_half(_mm256_loadu_ps(in + i))); \
        if (i == count) return; \
        memcpy(wide, in + i, (size_t)(count - i) * sizeof *wide); \
        _mm_storeu_si128((__m128i *)(void *)last, to_half(_mm256_loadu_ps(wide))); \
        memcpy(to + i, last, (size_t)(count - i) * sizeof *last); \
    }
LLMPAR__HALF_WIDEN(llmpar__half_widen_bf16_avx2, llmpar__half_8_from_bf16)
LLMPAR__HALF_WIDEN(llmpar__half_widen_f16_avx2, llmpar__half_8_from_f16)
LLMPAR__HALF_NARROW(llmpar__half_narrow_bf16_avx2, llmpar__half_8_to_bf16)
LLMPAR__HALF_NARROW(llmpar__half_narrow_f16_avx2, llmpar__half_8_to_f16)

#undef LLMPAR__HALF_WIDEN
#undef LLMPAR__HALF_NARROW
#undef LLMPAR__HALF_AVX2

/* Sixteens; the maskz forms only because gcc 12 warns about its own header's plain ones in C++. */
#define LLMPAR__HALF_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#define LLMPAR__HALF_ALL ((__mmask16)0xffff)

static inline __attribute__((always_inline)) LLMPAR__HALF_AVX512 __m512i llmpar__half_16_from_bf16(__m256i half) { return _mm512_maskz_slli_epi32(LLMPAR__HALF_ALL, _mm512_maskz_cvtepu16_epi32(LLMPAR__HALF_ALL, half), 16); }
static inline __attribute__((always_inline)) LLMPAR__HALF_AVX512 __m256i llmpar__half_16_to_bf16(__m512i bits)
{
    __mmask16 nan = _mm512_cmp_ps_mask(_mm512_castsi512_ps(bits), _mm512_castsi512_ps(bits), _CMP_UNORD_Q);
    __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(LLMPAR__HALF_ALL, bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    up = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x00400000));
    return _mm512_maskz_cvtepi32_epi16(LLMPAR__HALF_ALL, _mm512_maskz_srli_epi32(LLMPAR__HALF_ALL, up, 16));
}
static inline __attribute__((always_inline)) LLMPAR__HALF_AVX512 __m512i llmpar__half_16_from_f16(__m256i half) { return _mm512_castps_si512(_mm512_maskz_cvtph_ps(LLMPAR__HALF_ALL, half)); }
static inline __attribute__((always_inline)) LLMPAR__HALF_AVX512 __m256i llmpar__half_16_to_f16(__m512i bits) { return _mm512_maskz_cvtps_ph(LLMPAR__HALF_ALL, _mm512_castsi512_ps(bits), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

#define LLMPAR__HALF_WIDEN(name, from_half) \
    LLMPAR__HALF_AVX512 static void name(float *out, const void *in, int64_t count) \
    { \
        const uint16_t *from = (const uint16_t *)in; \
        int64_t i = 0; \
        for (; i + 16 <= count; i += 16) _mm512_storeu_si512((void *)(out + i), from_half(_mm256_loadu_si256((const __m256i *)(const void *)(from + i)))); \
        if (i < count) { \
            __mmask16 rest = (__mmask16)((1u << (count - i)) - 1u); \
            _mm512_mask_storeu_epi32((void *)(out + i), rest, from_half(_mm256_maskz_loadu_epi16(rest, from + i))); \
        } \
    }
#define LLMPAR__HALF_NARROW(name, to_half) \
    LLMPAR__HALF_AVX512 static void name(void *out, const float *in, int64_t count) \
    { \
        uint16_t *to = (uint16_t *)out; \
        int64_t i = 0; \
        for (; i + 16 <= count; i += 16) _mm256_storeu_si256((__m256i *)(void *)(to + i), to_half(_mm512_loadu_si512((const void *)(in + i)))); \
        if (i < count) { \
            __mmask16 rest = (__mmask16)((1u << (count - i)) - 1u); \
            _mm256_mask_storeu_epi16(to + i, rest, to_half(_mm512_maskz_loadu_epi32(rest, in + i))); \
        } \
    }
LLMPAR__HALF_WIDEN(llmpar__half_widen_bf16_avx512, llmpar__half_16_from_bf16)
LLMPAR__HALF_WIDEN(llmpar__half_widen_f16_avx512, llmpar__half_16_from_f16)
LLMPAR__HALF_NARROW(llmpar__half_narrow_bf16_avx512, llmpar__half_16_to_bf16)
LLMPAR__HALF_NARROW(llmpar__half_narrow_f16_avx512, llmpar__half_16_to_f16)

#undef LLMPAR__HALF_WIDEN
#undef LLMPAR__HALF_NARROW
#undef LLMPAR__HALF_AVX512
#undef LLMPAR__HALF_ALL
#endif

LLMPAR__PRIVATE_DEF int llmpar__half_has_f16c(void)
{
#if LLMPAR__VX86
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1u);
#else
    return 0;
#endif
}

LLMPAR__PRIVATE_DEF llmpar__half llmpar__half_of(const llmpar__cpu *cpu, llmpar_dtype dtype)
{
    llmpar__half half;
    half.size = (int64_t)llmpar_dtype_size(dtype);
    half.widen = NULL;
    half.narrow = NULL;
    if (dtype == LLMPAR_BF16) {
        half.widen = llmpar__half_widen_bf16;
        half.narrow = llmpar__half_narrow_bf16;
    } else if (dtype == LLMPAR_F16) {
        half.widen = llmpar__half_widen_f16;
        half.narrow = llmpar__half_narrow_f16;
    }
#if LLMPAR__VX86
    if ((int)cpu->level >= (int)LLMPAR_CPU_AVX2 && cpu->f16c) { /* every known processor with AVX2 has F16C */
        int wide = (int)cpu->level >= (int)LLMPAR_CPU_AVX512;
        if (dtype == LLMPAR_BF16) {
            half.widen = wide ? llmpar__half_widen_bf16_avx512 : llmpar__half_widen_bf16_avx2;
            half.narrow = wide ? llmpar__half_narrow_bf16_avx512 : llmpar__half_narrow_bf16_avx2;
        } else if (dtype == LLMPAR_F16) {
            half.widen = wide ? llmpar__half_widen_f16_avx512 : llmpar__half_widen_f16_avx2;
            half.narrow = wide ? llmpar__half_narrow_f16_avx512 : llmpar__half_narrow_f16_avx2;
        }
    }
#endif
    (void)cpu;
    return half;
}
