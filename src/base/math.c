#include "base/math.h"
#include "base/bits_internal.h"
#include "base/math_internal.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#else
#include <arm_neon.h>
#endif

/* Polynomial coefficients are Chebyshev fits (near-minimax) made at 200 bits; beside each stands the fit's own error. Comments
   name the reduction, which is the textbook one: Muller, "Elementary Functions", chapters 5, 6 and 11.
   Every scaling is by powers of two made from bits, so nothing depends on tables, on a C library or on fma. */

/* condition (0 or 1) ? yes : no on bit patterns, with both computed: gcc keeps a loop scalar where it may turn a choice between
   floats into a branch. */
static inline uint32_t llmpar__math_select(int condition, uint32_t yes, uint32_t no)
{
    return no ^ ((yes ^ no) & (0u - (uint32_t)condition));
}

/* e^x = 2^n e^r, n = round(x / ln 2), |r| <= 0.347. Selects only, so that a loop over it vectorises; a NaN walks through
   the unsigned arithmetic and comes out of the product. */
LLMPAR_DEF float llmpar_exp_f32(float x)
{
    uint32_t bits = llmpar__bits_f32(x), magnitude = bits & 0x7FFFFFFFu, k, half;
    /* to [-110, 110], which is far enough for 0 and infinity */
    float clamped = llmpar__from_bits_f32(llmpar__math_select(magnitude > 0x42DC0000u && magnitude <= 0x7F800000u, (bits & 0x80000000u) | 0x42DC0000u, bits));
    float shifted = clamped * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the sum's low bits are the rounded integer */
    float n = shifted - 12582912.0f;
    k = llmpar__bits_f32(shifted) - 0x4B400000u;
    float r = clamped - n * 0.693145752f; /* 15 bits of ln 2: the product is exact */
    r = r - n * 1.42860677e-06f;
    float p = 0.00139262135f; /* (e^r - 1 - r) / r^2, relative to e^r within 8e-9 */
    p = p * r + 0.00836320297f;
    p = p * r + 0.0416665544f;
    p = p * r + 0.166665768f;
    p = p * r + 0.5f;
    p = 1.0f + (r + r * r * p);
    half = (k >> 1) | (k & 0x80000000u); /* k / 2 in two's complement */
    /* two factors: 2^128 is no float, and a subnormal result is rounded by the last product alone */
    p = p * llmpar__from_bits_f32((half + 127u) << 23);
    return p * llmpar__from_bits_f32((k - half + 127u) << 23);
}

/* x = 2^k m, m in [sqrt(1/2), sqrt(2)); with f = m - 1 and s = f / (2 + f), log m = 2 atanh s = f - (f^2/2 - s (f^2/2 + R)). */
LLMPAR_DEF float llmpar_log_f32(float x)
{
    uint32_t bits = llmpar__bits_f32(x);
    int tiny = bits < 0x00800000u;
    /* a subnormal is an integer times 2^-149: converted, not multiplied, so that denormals-are-zero cannot touch it */
    uint32_t normal = llmpar__math_select(tiny, llmpar__bits_f32((float)(int32_t)bits), bits);
    uint32_t moved = normal + (0x3F800000u - 0x3F3504F3u);
    float k = (float)((int32_t)(moved >> 23) - (tiny ? 127 + 149 : 127));
    float f = llmpar__from_bits_f32((moved & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
    float s = f / (2.0f + f), z = s * s, square = 0.5f * f * f, p;
    p = 0.233316145f; /* (2 atanh(s) / s - 2) / z within 2e-11 of the logarithm */
    p = p * z + 0.285507786f;
    p = p * z + 0.400001222f;
    p = p * z + 0.666666666f;
    uint32_t result = llmpar__bits_f32(k * 0.693145752f + (f - (square - (s * (square + z * p) + k * 1.42860677e-06f))));
    result = llmpar__math_select(bits >= 0x7F800000u, bits | 0x00400000u, result); /* NaN stays, quiet */
    result = llmpar__math_select(bits == 0x7F800000u, bits, result);
    result = llmpar__math_select(bits > 0x80000000u && bits <= 0xFF800000u, 0x7FC00000u, result);
    return llmpar__from_bits_f32(llmpar__math_select((bits & 0x7FFFFFFFu) == 0, 0xFF800000u, result));
}

/* e^(high + low), |low| <= 2^-40 |high|; high may be NaN or infinite, low may not. */
static double llmpar__math_exp_pair(double high, double low)
{
    if (!(high < 709.79)) return high >= 709.79 ? llmpar__from_bits_f64(0x7FF0000000000000u) : high;
    if (high < -745.2) return 0.0;
    double shifted = high * 1.4426950408889634 + 6755399441055744.0; /* 1.5 * 2^52 */
    double n = shifted - 6755399441055744.0;
    int64_t k = (int64_t)n;
    double r = high - n * 0.69314718036912382; /* 32 bits of ln 2: the product is exact */
    r = r - (n * 1.9082149292705877e-10 - low);
    double p = 2.0914717341716378e-09; /* (e^r - 1 - r) / r^2, relative to e^r within 2e-19 */
    p = p * r + 2.5105259538448494e-08;
    p = p * r + 2.755727357010214e-07;
    p = p * r + 2.7557255297969643e-06;
    p = p * r + 2.4801587325605324e-05;
    p = p * r + 0.00019841269874901259;
    p = p * r + 0.0013888888888883731;
    p = p * r + 0.0083333333333261116;
    p = p * r + 0.041666666666666671;
    p = p * r + 0.16666666666666671;
    p = p * r + 0.5;
    p = 1.0 + (r + r * r * p);
    int64_t half = k / 2;
    p = p * llmpar__from_bits_f64((uint64_t)(half + 1023) << 52);
    return p * llmpar__from_bits_f64((uint64_t)(k - half + 1023) << 52);
}

LLMPAR_DEF double llmpar_exp_f64(double x)
{
    return llmpar__math_exp_pair(x, 0.0);
}

/* x = 2^k (1 + f), 1 + f in [sqrt(1/2), sqrt(2)), for a positive finite x. Returns k. */
static int llmpar__math_split(double x, double *f)
{
    uint64_t bits = llmpar__bits_f64(x), moved;
    int offset = 1023;
    if (bits < 0x0010000000000000u) { /* subnormal: an integer times 2^-1074 */
        bits = llmpar__bits_f64((double)(int64_t)bits);
        offset += 1074;
    }
    moved = bits + (0x3FF0000000000000u - 0x3FE6A09E667F3BCDu);
    *f = llmpar__from_bits_f64((moved & 0x000FFFFFFFFFFFFFu) + 0x3FE6A09E667F3BCDu) - 1.0;
    return (int)(moved >> 52) - offset;
}

/* (2 atanh(s) / s - 2) / z with z = s^2, |s| <= 0.1716; within 3e-20 of the logarithm. */
static double llmpar__math_log_polynomial(double z)
{
    double p = 0.13088034850927555;
    p = p * z + 0.13268638369266825;
    p = p * z + 0.15386244737621665;
    p = p * z + 0.18181795547521137;
    p = p * z + 0.22222222392581045;
    p = p * z + 0.28571428570799784;
    p = p * z + 0.40000000000000885;
    return p * z + 0.66666666666666663;
}

LLMPAR_DEF double llmpar_log_f64(double x)
{
    double f, s, z, square, k;
    if (!(x > 0.0)) return llmpar__from_bits_f64(x == 0.0 ? 0xFFF0000000000000u : 0x7FF8000000000000u);
    if (!llmpar_isfinite_f64(x)) return x;
    k = (double)llmpar__math_split(x, &f);
    s = f / (2.0 + f);
    z = s * s;
    square = 0.5 * f * f;
    return k * 0.69314718036912382 + (f - (square - (s * (square + z * llmpar__math_log_polynomial(z)) + k * 1.9082149292705877e-10)));
}

/* a * b = *high + *low exactly (Dekker 1971), for products well inside the range. */
static void llmpar__math_product(double a, double b, double *high, double *low)
{
    double a1 = a * 134217729.0, b1 = b * 134217729.0, a2, b2; /* 2^27 + 1 */
    a1 = a1 - (a1 - a);
    b1 = b1 - (b1 - b);
    a2 = a - a1;
    b2 = b - b1;
    *high = a * b;
    *low = ((a1 * b1 - *high) + a1 * b2 + a2 * b1) + a2 * b2;
}

/* base^exponent = e^(exponent log base), the logarithm and the product in pairs of doubles: a relative error of 2^-58
   in the logarithm is an absolute one of at most 2^-51.9 in an exponent of 69. */
LLMPAR_DEF double llmpar_pow_f64(double base, double exponent)
{
    const double infinity = llmpar__from_bits_f64(0x7FF0000000000000u);
    double f, k, total, rest, s, s_low, c, product, product_low, high, low, sum;
    if (exponent == 0.0 || base == 1.0) return 1.0;
    if (!(base >= 0.0) || exponent != exponent) return llmpar__from_bits_f64(0x7FF8000000000000u);
    if (base == 0.0 || base == infinity) return (base == 0.0) == (exponent < 0.0) ? infinity : 0.0;
    /* |log base| >= 2^-53, so 2^65 decides as infinity does, and the product below stays in range */
    if (exponent > 36893488147419103232.0) exponent = 36893488147419103232.0;
    if (exponent < -36893488147419103232.0) exponent = -36893488147419103232.0;

    k = (double)llmpar__math_split(base, &f);
    /* s + s_low = f / (2 + f): the quotient's exact remainder gives the second part */
    total = 2.0 + f;
    rest = f - (total - 2.0);
    s = f / total;
    llmpar__math_product(s, total, &product, &product_low);
    s_low = (((f - product) - product_low) - s * rest) / total;
    c = s * (s * s) * llmpar__math_log_polynomial(s * s);
    /* log base = high + low, every sum with its rest */
    sum = k * 0.69314718036912382;
    high = sum + 2.0 * s;
    low = k != 0.0 ? (sum - high) + 2.0 * s : 0.0;
    low = low + (k * 1.9082149292705877e-10 + (2.0 * s_low + c));

    llmpar__math_product(exponent, high, &product, &product_low);
    product_low = product_low + exponent * low;
    sum = product + product_low;
    if (!(sum < 800.0 && sum > -800.0)) return sum > 0.0 ? infinity : 0.0;
    return llmpar__math_exp_pair(sum, (product - sum) + product_low);
}

LLMPAR_DEF void llmpar_sincos_f64(double x, double *sine, double *cosine)
{
    if (!(x >= -1e9 && x <= 1e9)) {
        *sine = *cosine = llmpar__from_bits_f64(0x7FF8000000000000u);
        return;
    }
    double shifted = x * 0.63661977236758138 + 6755399441055744.0;
    double n = shifted - 6755399441055744.0;
    int64_t quadrant = (int64_t)n;
    /* pi/2 in 23 + 23 + 53 bits: n has 30, so the first two products and differences are exact */
    double r = (x - n * 1.5707962512969971) - n * 7.5497894158615964e-08;
    double p = n * 5.390302858158119e-15;
    double high = r - p;
    double low = (r - high) - p;
    double z = high * high;
    p = 1.5917848524808262e-10; /* (sin(r)/r - 1) / r^2, |r| <= pi/4, within 1.3e-17 of sin(r)/r */
    p = p * z - 2.5051127944014188e-08;
    p = p * z + 2.7557316083816358e-06;
    p = p * z - 0.00019841269836722418;
    p = p * z + 0.0083333333333309254;
    p = p * z - 0.16666666666666666;
    double s = high + (high * z * p + low);
    p = -1.1382456778061306e-11; /* (cos(r) - 1 + r^2/2) / r^4 within 5e-19 of cos(r) */
    p = p * z + 2.0876143827993133e-09;
    p = p * z - 2.7557317260008837e-07;
    p = p * z + 2.480158729874307e-05;
    p = p * z - 0.0013888888888887382;
    p = p * z + 0.041666666666666664;
    double c = 1.0 - (0.5 * z - (z * z * p - high * low));
    *sine = quadrant & 1 ? c : s;
    *cosine = quadrant & 1 ? s : c;
    if (quadrant & 2) *sine = -*sine;
    if ((quadrant + 1) & 2) *cosine = -*cosine;
}

/* The instruction, not __builtin_sqrt: that may call libm for negative arguments. */
LLMPAR_DEF double llmpar_sqrt_f64(double x)
{
#if defined(__x86_64__)
    __m128d v = _mm_set_sd(x);
    return _mm_cvtsd_f64(_mm_sqrt_sd(v, v));
#else
    return vget_lane_f64(vsqrt_f64(vdup_n_f64(x)), 0);
#endif
}

LLMPAR_DEF float llmpar_sqrt_f32(float x)
{
#if defined(__x86_64__)
    return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x)));
#else
    return vget_lane_f32(vsqrt_f32(vdup_n_f32(x)), 0);
#endif
}

LLMPAR_DEF int llmpar_isfinite_f32(float x)
{
    return (llmpar__bits_f32(x) & 0x7F800000u) != 0x7F800000u;
}

LLMPAR_DEF int llmpar_isfinite_f64(double x)
{
    return (llmpar__bits_f64(x) & 0x7FF0000000000000u) != 0x7FF0000000000000u;
}

LLMPAR__PRIVATE_DEF double llmpar__math_round_scaled(uint64_t significand, int sticky, int64_t exponent)
{
    uint64_t kept, lost, half;
    if (significand == 0) return 0.0;
    int length = 64 - __builtin_clzll(significand);
    if (exponent + length > 1024) return llmpar__from_bits_f64(0x7FF0000000000000u);
    if (exponent + length < -1074) return 0.0; /* below half of the smallest subnormal, 2^-1075 */
    /* the last bit kept has weight 2^-1074 or is the 53rd */
    int drop = length - 53;
    if (exponent + drop < -1074) drop = (int)(-1074 - exponent);
    if (drop <= 0) {
        kept = significand << -drop;
    } else {
        /* drop <= length <= 64 */
        kept = drop < 64 ? significand >> drop : 0;
        lost = drop < 64 ? significand & (((uint64_t)1 << drop) - 1) : significand;
        half = (uint64_t)1 << (drop - 1);
        if (lost > half || (lost == half && (sticky || (kept & 1)))) kept++;
    }
    /* kept counts units of 2^(exponent + drop): as bits, the subnormals and normals are one line; a carry moves up by itself */
    if (kept < 0x0010000000000000u) return llmpar__from_bits_f64(kept);
    return llmpar__from_bits_f64(kept + ((uint64_t)(exponent + drop + 1074) << 52));
}
