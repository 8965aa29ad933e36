#include "base/exact_sum.h"
#include "base/bits_internal.h"
#include "base/math_internal.h"

#include <string.h>

/* limb i of the number    ... | 66 | 65 | ... | 1 | 0 |   weight 2^(32 i - 1088)
   A finite double is a 53-bit integer at bit position max(exponent, 1) + 13 of this register, so it touches three limbs, each
   by less than 2^32. Limbs are signed and hold 2^30 such terms without a carry. */
#define LLMPAR__EXACT_NUMBER 67 /* limbs of the number */
#define LLMPAR__EXACT_INFINITY 69
#define LLMPAR__EXACT_NEGATIVE_INFINITY 70
#define LLMPAR__EXACT_NAN 71

/* limbs += (or -=) value * 2^(position - 1088), value < 2^64, 0 <= position < 32 * 64 */
static inline void llmpar__exact_place(int64_t *limbs, uint64_t value, int position, int negative)
{
    int64_t *limb = limbs + (position >> 5);
    int shift = position & 31;
    uint64_t low = (value & 0xFFFFFFFFu) << shift, high = (value >> 32) << shift; /* each < 2^63 */
    high += low >> 32;
    int64_t first = (int64_t)(low & 0xFFFFFFFFu);
    int64_t second = (int64_t)(high & 0xFFFFFFFFu);
    int64_t third = (int64_t)(high >> 32);
    limb[0] += negative ? -first : first;
    limb[1] += negative ? -second : second;
    limb[2] += negative ? -third : third;
}

LLMPAR_DEF void llmpar_exact_sum_add(llmpar_exact_sum *sum, double value)
{
    uint64_t bits = llmpar__bits_f64(value), fraction = bits & 0x000FFFFFFFFFFFFFu;
    int exponent = (int)(bits >> 52) & 0x7FF;
    int negative = (int)(bits >> 63);
    if (exponent == 0x7FF) {
        sum->limb[fraction ? LLMPAR__EXACT_NAN : negative ? LLMPAR__EXACT_NEGATIVE_INFINITY : LLMPAR__EXACT_INFINITY]++;
        return;
    }
    if (exponent) fraction |= 0x0010000000000000u;
    else exponent = 1;
    llmpar__exact_place(sum->limb, fraction, exponent + 13, negative);
}

/* A finite float is an integer below 2^24 times 2^(max(exponent, 1) - 150); its square is an integer below 2^48 at bit
   position 2 max(exponent, 1) + 788. */
static inline void llmpar__exact_square(llmpar_exact_sum *sum, uint32_t bits)
{
    uint32_t exponent = (bits >> 23) & 0xFFu, fraction = bits & 0x007FFFFFu;
    if (exponent == 0xFFu) {
        sum->limb[fraction ? LLMPAR__EXACT_NAN : LLMPAR__EXACT_INFINITY]++;
        return;
    }
    if (exponent) fraction |= 0x00800000u;
    else exponent = 1;
    llmpar__exact_place(sum->limb, (uint64_t)fraction * fraction, 2 * (int)exponent + 788, 0);
}

/* Terms with the same exponent share a 64-bit bucket, which 2^16 squares cannot overflow; buckets go to the limbs at the end of
   a block. Two sets of buckets, used in turn, hide the latency of adding to the same bucket again. */
static void llmpar__exact_squares_block(llmpar_exact_sum *sum, const float *value, size_t count)
{
    uint64_t bucket[2][256];
    memset(bucket, 0, sizeof bucket);
    for (size_t i = 0; i < count; i++) {
        uint32_t bits = llmpar__bits_f32(value[i]), exponent = (bits >> 23) & 0xFFu, fraction = (bits & 0x007FFFFFu) | (uint32_t)(exponent != 0) << 23;
        if (exponent == 0xFFu) llmpar__exact_square(sum, bits);
        else bucket[i & 1][exponent] += (uint64_t)fraction * fraction;
    }
    for (int e = 0; e < 255; e++) {
        int position = 2 * (e ? e : 1) + 788;
        if (bucket[0][e]) llmpar__exact_place(sum->limb, bucket[0][e], position, 0);
        if (bucket[1][e]) llmpar__exact_place(sum->limb, bucket[1][e], position, 0);
    }
}

LLMPAR_DEF void llmpar_exact_sum_add_squares_f32(llmpar_exact_sum *sum, const float *value, size_t count)
{
    const size_t block = 65536;
    llmpar_exact_sum_carry(sum);
    while (count >= 512) { /* below this the buckets cost more than they save; the value is the same */
        size_t now = count < block ? count : block;
        llmpar__exact_squares_block(sum, value, now);
        llmpar_exact_sum_carry(sum);
        value += now;
        count -= now;
    }
    for (size_t i = 0; i < count; i++) llmpar__exact_square(sum, llmpar__bits_f32(value[i]));
    llmpar_exact_sum_carry(sum);
}

LLMPAR_DEF void llmpar_exact_sum_merge(llmpar_exact_sum *sum, const llmpar_exact_sum *other)
{
    for (int i = 0; i < LLMPAR_EXACT_SUM_LIMBS; i++) sum->limb[i] += other->limb[i];
}

/* Limbs below the top one become [0, 2^32); the top one keeps the sign. */
LLMPAR_DEF void llmpar_exact_sum_carry(llmpar_exact_sum *sum)
{
    for (int i = 0; i < LLMPAR__EXACT_NUMBER - 1; i++) {
        sum->limb[i + 1] += sum->limb[i] >> 32; /* rounds down, on negatives too */
        sum->limb[i] &= 0xFFFFFFFF;
    }
}

LLMPAR_DEF double llmpar_exact_sum_value(const llmpar_exact_sum *sum)
{
    llmpar_exact_sum digits = *sum;
    const int64_t *special = sum->limb;
    double value;
    int top, i, shift, sticky, negative;

    if (special[LLMPAR__EXACT_NAN] || (special[LLMPAR__EXACT_INFINITY] && special[LLMPAR__EXACT_NEGATIVE_INFINITY])) return llmpar__from_bits_f64(0x7FF8000000000000u);
    if (special[LLMPAR__EXACT_INFINITY] || special[LLMPAR__EXACT_NEGATIVE_INFINITY]) return llmpar__from_bits_f64(special[LLMPAR__EXACT_INFINITY] ? 0x7FF0000000000000u : 0xFFF0000000000000u);

    llmpar_exact_sum_carry(&digits);
    negative = digits.limb[LLMPAR__EXACT_NUMBER - 1] < 0;
    if (negative) {
        for (i = 0; i < LLMPAR__EXACT_NUMBER; i++) digits.limb[i] = -digits.limb[i];
        llmpar_exact_sum_carry(&digits);
    }
    for (top = LLMPAR__EXACT_NUMBER - 1; top > 0 && digits.limb[top] == 0; top--) { }
    if (digits.limb[top] > 0xFFFFFFFF) return llmpar__from_bits_f64(negative ? 0xFFF0000000000000u : 0x7FF0000000000000u); /* only the top limb can: 2^1056 and up */
    /* 64 bits from the highest bit down, and whether anything lies below */
    uint64_t significand = (uint64_t)digits.limb[top] << 32;
    if (top > 0) significand |= (uint64_t)digits.limb[top - 1];
    sticky = 0;
    if (top > 1) {
        shift = __builtin_clzll(significand); /* 0..31: limb[top] is not zero */
        if (shift) significand = significand << shift | (uint64_t)digits.limb[top - 2] >> (32 - shift);
        sticky = ((uint64_t)digits.limb[top - 2] & ((((uint64_t)1 << 32) - 1) >> shift)) != 0;
        for (i = 0; i < top - 2; i++) sticky |= digits.limb[i] != 0;
        value = llmpar__math_round_scaled(significand, sticky, 32 * (top - 1) - 1088 - shift);
    } else {
        value = llmpar__math_round_scaled(significand, 0, 32 * (top - 1) - 1088);
    }
    return negative ? -value : value;
}

#undef LLMPAR__EXACT_NUMBER
#undef LLMPAR__EXACT_INFINITY
#undef LLMPAR__EXACT_NEGATIVE_INFINITY
#undef LLMPAR__EXACT_NAN
