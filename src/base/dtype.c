#include "base/dtype.h"
#include "base/bits_internal.h"

#include <string.h>

/* All conversions work on bit patterns or on normal numbers only, so their results do not depend on the thread's
   flush-to-zero state (but for f64 -> f32, a plain cast). They select instead of branching: the loops of llmpar_convert vectorise. */

LLMPAR_DEF size_t llmpar_dtype_size(llmpar_dtype dtype)
{
    switch ((int)dtype) {
    case LLMPAR_F32: case LLMPAR_I32: return 4;
    case LLMPAR_F64: case LLMPAR_I64: case LLMPAR_U64: return 8;
    case LLMPAR_BF16: case LLMPAR_F16: return 2;
    case LLMPAR_U8: return 1;
    default: return 0;
    }
}

LLMPAR_DEF llmpar_dtype llmpar_dtype_sum(llmpar_dtype dtype) { return dtype == LLMPAR_BF16 || dtype == LLMPAR_F16 ? LLMPAR_F32 : dtype; }

LLMPAR_DEF const char *llmpar_dtype_name(llmpar_dtype dtype)
{
    switch ((int)dtype) {
    case LLMPAR_DTYPE_DEFAULT: return "default";
    case LLMPAR_F32: return "f32";
    case LLMPAR_F64: return "f64";
    case LLMPAR_BF16: return "bf16";
    case LLMPAR_F16: return "f16";
    case LLMPAR_I32: return "i32";
    case LLMPAR_I64: return "i64";
    case LLMPAR_U64: return "u64";
    case LLMPAR_U8: return "u8";
    default: return "?";
    }
}

/* condition (0 or 1) ? yes : no, with both computed: as a branch around a float operation gcc would keep the loop scalar. */
static inline uint32_t llmpar__dtype_select(int condition, uint32_t yes, uint32_t no)
{
    return no ^ ((yes ^ no) & (0u - (uint32_t)condition));
}

/* The inline bodies work on f32 bits: the 32-bit step of f64 -> 16 bit never exists as a float, whose subnormals could be flushed. */
static inline uint16_t llmpar__dtype_to_bf16(uint32_t bits)
{
    uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    uint32_t nan = (bits >> 16) | 0x40u;
    return (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded);
}

static inline uint32_t llmpar__dtype_from_bf16(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? bits | 0x00400000u : bits;
}

static inline uint16_t llmpar__dtype_to_f16(uint32_t bits)
{
    uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    /* 2^-14 and up: move the exponent bias from 127 to 15, round off 13 bits; a carry may give infinity (0x7C00) */
    uint32_t normal = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
    /* below: adding 0.5 puts the last bit of the f16 subnormal at the last bit of the sum, so the addition rounds */
    uint32_t subnormal = llmpar__bits_f32(llmpar__from_bits_f32(magnitude) + 0.5f) - 0x3F000000u;
    uint32_t nan = 0x7E00u | ((magnitude >> 13) & 0x3FFu);
    uint32_t half = llmpar__dtype_select(magnitude < 0x38800000u, subnormal, normal);
    half = llmpar__dtype_select(magnitude >= 0x47800000u, 0x7C00u, half); /* 65536 and up; [65520, 65536) became infinity by the carry */
    half = llmpar__dtype_select(magnitude > 0x7F800000u, nan, half);
    return (uint16_t)(sign | half);
}

static inline uint32_t llmpar__dtype_from_f16(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, magnitude = half & 0x7FFFu;
    uint32_t normal = (magnitude << 13) + 0x38000000u;
    /* the 10 bits as the fraction of a number in [2^-14, 2^-13), less 2^-14: exact, and never an f32 subnormal */
    uint32_t subnormal = llmpar__bits_f32(llmpar__from_bits_f32(0x38800000u + (magnitude << 13)) - 6.103515625e-05f);
    uint32_t special = 0x7F800000u | (magnitude << 13) | (magnitude > 0x7C00u ? 0x00400000u : 0u);
    uint32_t bits = llmpar__dtype_select(magnitude < 0x0400u, subnormal, normal);
    return sign | llmpar__dtype_select(magnitude >= 0x7C00u, special, bits);
}

/* f64 -> f32 bits rounded to odd: of the two neighbours the one whose last bit is 1, unless exact. Rounding that once
   more to at most 22 bits gives what one rounding from f64 gives (Boldo and Melquiond 2008). NaN keeps its leading payload. */
static inline uint32_t llmpar__dtype_f64_to_odd(double value)
{
    uint64_t bits = llmpar__bits_f64(value), magnitude, fraction;
    uint32_t sign, result;
    sign = (uint32_t)(bits >> 32) & 0x80000000u;
    magnitude = bits & 0x7FFFFFFFFFFFFFFFu;
    if (magnitude > 0x7FF0000000000000u) return sign | 0x7FC00000u | ((uint32_t)(magnitude >> 29) & 0x003FFFFFu);
    if (magnitude == 0x7FF0000000000000u) return sign | 0x7F800000u;
    if (magnitude >= 0x47F0000000000000u) return sign | 0x7F7FFFFFu; /* 2^128 and up: the largest float is odd */
    if (magnitude >= 0x3810000000000000u) {                          /* 2^-126 and up: normal */
        result = (uint32_t)((magnitude - 0x3800000000000000u) >> 29);
        return sign | result | ((magnitude & 0x1FFFFFFFu) != 0);
    }
    if (magnitude < 0x3690000000000000u) return sign | (magnitude != 0); /* below 2^-150 */
    fraction = (magnitude & 0x000FFFFFFFFFFFFFu) | 0x0010000000000000u;
    int shift = 926 - (int)(magnitude >> 52); /* to units of 2^-149: fraction * 2^(exponent - 1075 + 149) */
    result = (uint32_t)(fraction >> shift);
    return sign | result | ((fraction & (((uint64_t)1 << shift) - 1)) != 0);
}

LLMPAR_DEF uint16_t llmpar_f32_to_bf16(float value) { return llmpar__dtype_to_bf16(llmpar__bits_f32(value)); }
LLMPAR_DEF float llmpar_bf16_to_f32(uint16_t bits) { return llmpar__from_bits_f32(llmpar__dtype_from_bf16(bits)); }
LLMPAR_DEF uint16_t llmpar_f32_to_f16(float value) { return llmpar__dtype_to_f16(llmpar__bits_f32(value)); }
LLMPAR_DEF float llmpar_f16_to_f32(uint16_t bits) { return llmpar__from_bits_f32(llmpar__dtype_from_f16(bits)); }

/* One loop for a pair of types: `expression` turns from[i] into to[i]. */
#define LLMPAR__DTYPE_LOOP(in_type, out_type, expression) do { \
        const in_type *from = (const in_type *)in; \
        out_type *to = (out_type *)out; \
        size_t i; \
        for (i = 0; i < count; i++) to[i] = (expression); \
        return 1; \
    } while (0)
#define LLMPAR__DTYPE_PAIR(a, b) ((int)(a) * (int)LLMPAR_DTYPE_COUNT + (int)(b))

LLMPAR_DEF int llmpar_convert(void *out, llmpar_dtype out_dtype, const void *in, llmpar_dtype in_dtype, size_t count)
{
    if (in_dtype == out_dtype) {
        if (in_dtype != LLMPAR_F32 && in_dtype != LLMPAR_F64 && in_dtype != LLMPAR_BF16 && in_dtype != LLMPAR_F16) return 0;
        if (count && out != in) memmove(out, in, count * llmpar_dtype_size(in_dtype));
        return 1;
    }
    switch (LLMPAR__DTYPE_PAIR(in_dtype, out_dtype)) {
    case LLMPAR__DTYPE_PAIR(LLMPAR_F32, LLMPAR_F64): LLMPAR__DTYPE_LOOP(float, double, (double)from[i]);
    case LLMPAR__DTYPE_PAIR(LLMPAR_F64, LLMPAR_F32): LLMPAR__DTYPE_LOOP(double, float, (float)from[i]);
    case LLMPAR__DTYPE_PAIR(LLMPAR_F32, LLMPAR_BF16): LLMPAR__DTYPE_LOOP(float, uint16_t, llmpar__dtype_to_bf16(llmpar__bits_f32(from[i])));
    case LLMPAR__DTYPE_PAIR(LLMPAR_F32, LLMPAR_F16): LLMPAR__DTYPE_LOOP(float, uint16_t, llmpar__dtype_to_f16(llmpar__bits_f32(from[i])));
    case LLMPAR__DTYPE_PAIR(LLMPAR_BF16, LLMPAR_F32): LLMPAR__DTYPE_LOOP(uint16_t, float, llmpar__from_bits_f32(llmpar__dtype_from_bf16(from[i])));
    case LLMPAR__DTYPE_PAIR(LLMPAR_F16, LLMPAR_F32): LLMPAR__DTYPE_LOOP(uint16_t, float, llmpar__from_bits_f32(llmpar__dtype_from_f16(from[i])));
    case LLMPAR__DTYPE_PAIR(LLMPAR_BF16, LLMPAR_F64): LLMPAR__DTYPE_LOOP(uint16_t, double, (double)llmpar__from_bits_f32(llmpar__dtype_from_bf16(from[i])));
    case LLMPAR__DTYPE_PAIR(LLMPAR_F16, LLMPAR_F64): LLMPAR__DTYPE_LOOP(uint16_t, double, (double)llmpar__from_bits_f32(llmpar__dtype_from_f16(from[i])));
    case LLMPAR__DTYPE_PAIR(LLMPAR_F64, LLMPAR_BF16): LLMPAR__DTYPE_LOOP(double, uint16_t, llmpar__dtype_to_bf16(llmpar__dtype_f64_to_odd(from[i])));
    case LLMPAR__DTYPE_PAIR(LLMPAR_F64, LLMPAR_F16): LLMPAR__DTYPE_LOOP(double, uint16_t, llmpar__dtype_to_f16(llmpar__dtype_f64_to_odd(from[i])));
    case LLMPAR__DTYPE_PAIR(LLMPAR_BF16, LLMPAR_F16): LLMPAR__DTYPE_LOOP(uint16_t, uint16_t, llmpar__dtype_to_f16(llmpar__dtype_from_bf16(from[i])));
    case LLMPAR__DTYPE_PAIR(LLMPAR_F16, LLMPAR_BF16): LLMPAR__DTYPE_LOOP(uint16_t, uint16_t, llmpar__dtype_to_bf16(llmpar__dtype_from_f16(from[i])));
    default: return 0;
    }
}

#undef LLMPAR__DTYPE_LOOP
#undef LLMPAR__DTYPE_PAIR
