/* The own elementary functions against libm: f32 against f64, f64 against long double (80 bits on x86-64, 128 on aarch64). */
#include "test.h"
#include "bits.h"
#include <float.h>
#include <math.h>

static double random_in(double low, double high) { return low + (high - low) * ((double)(random_bits() >> 11) * 0x1p-53); }

/* |got - want| in units in the last place of `want`; 0 if both are the same infinity or both NaN. */
static double ulps_f32(float got, double want)
{
    int exponent;
    if (isnan(want)) return isnan(got) ? 0 : 1e9;
    if (fabs(want) >= 0x1.ffffffp+127) return (double)got == (want > 0 ? (double)INFINITY : (double)-INFINITY) ? 0 : 1e9;
    if (!isfinite(got)) return 1e9;
    frexp(want, &exponent);
    return fabs((double)got - want) / ldexp(1.0, (exponent < -125 ? -125 : exponent) - 24);
}

static double ulps_f64(double got, long double want)
{
    int exponent;
    if (isnan(want)) return isnan(got) ? 0 : 1e9;
    if (fabsl(want) >= 0x1.fffffffffffff8p+1023L) return got == (want > 0 ? (double)INFINITY : (double)-INFINITY) ? 0 : 1e9;
    if (!isfinite(got)) return 1e9;
    frexpl(want, &exponent);
    return (double)(fabsl((long double)got - want) / ldexpl(1.0L, (exponent < -1021 ? -1021 : exponent) - 53));
}

typedef struct worst { double ulps, at; } worst;
static void worse(worst *w, double ulps, double at) { if (!(ulps <= w->ulps)) { w->ulps = ulps; w->at = at; } }
#define CHECK_WORST(w, bound) do { if (!((w).ulps <= (bound))) TEST_FAIL("%s: %.4g at %a, bound %g", #w, (w).ulps, (w).at, (double)(bound)); else if (getenv("TEST_MATH_PRINT")) printf("%s %.4g at %a\n", #w, (w).ulps, (w).at); } while (0)

/* Every `stride`-th float of all signs and magnitudes; TEST_MATH_STRIDE=1 takes all 2^32 (some minutes). */
static uint32_t stride(void)
{
    const char *text = getenv("TEST_MATH_STRIDE");
    return text ? (uint32_t)strtoul(text, NULL, 10) : 509;
}

TEST(exp_f32_bound)
{
    worst normal = { 0, 0 }, subnormal = { 0, 0 };
    for (uint64_t bits = 0; bits < (uint64_t)1 << 32; bits += stride()) {
        float x = float_of((uint32_t)bits), got = llmpar_exp_f32(x);
        if (fabsf(x) > 120.0f) { CHECK(x > 0 ? isinf(got) : got == 0.0f); if (fabsf(x) > 1000.0f) bits += 100000; continue; }
        double want = exp((double)x);
        worse(want < 0x1p-126 ? &subnormal : &normal, ulps_f32(got, want), (double)x);
    }
    for (float x = -104.5f; x < -87.0f; x += 0x1p-14f) worse(exp((double)x) < 0x1p-126 ? &subnormal : &normal, ulps_f32(llmpar_exp_f32(x), exp((double)x)), (double)x);
    for (float x = 88.7f; x < 88.74f; x = nextafterf(x, 100.0f)) worse(&normal, ulps_f32(llmpar_exp_f32(x), exp((double)x)), (double)x);
    CHECK_WORST(normal, 1.25);
    CHECK_WORST(subnormal, 1.0);
    CHECK(llmpar_exp_f32(0.0f) == 1.0f && llmpar_exp_f32(-0.0f) == 1.0f);
    CHECK(llmpar_exp_f32(INFINITY) == INFINITY && llmpar_exp_f32(-INFINITY) == 0.0f && isnan(llmpar_exp_f32(NAN)) && isnan(llmpar_exp_f32(-NAN)));
    CHECK(llmpar_exp_f32(-104.0f) == 0.0f && llmpar_exp_f32(88.73f) == INFINITY && llmpar_exp_f32(FLT_MAX) == INFINITY && llmpar_exp_f32(-FLT_MAX) == 0.0f);
}

TEST(log_f32_bound)
{
    worst all = { 0, 0 };
    for (uint32_t bits = 1; bits < 0x7F800000u; bits += stride()) worse(&all, ulps_f32(llmpar_log_f32(float_of(bits)), log((double)float_of(bits))), (double)float_of(bits));
    for (uint32_t bits = 0x3F700000u; bits < 0x3F900000u; bits++) worse(&all, ulps_f32(llmpar_log_f32(float_of(bits)), log((double)float_of(bits))), (double)float_of(bits));
    for (uint32_t bits = 1; bits < 70000; bits++) worse(&all, ulps_f32(llmpar_log_f32(float_of(bits)), log((double)float_of(bits))), (double)float_of(bits));
    CHECK_WORST(all, 1.5);
    CHECK(llmpar_log_f32(1.0f) == 0.0f && llmpar_log_f32(0.0f) == -INFINITY && llmpar_log_f32(-0.0f) == -INFINITY && llmpar_log_f32(INFINITY) == INFINITY);
    CHECK(isnan(llmpar_log_f32(-1.0f)) && isnan(llmpar_log_f32(-INFINITY)) && isnan(llmpar_log_f32(NAN)) && isnan(llmpar_log_f32(-NAN)) && isnan(llmpar_log_f32(-FLT_MIN / 2)));
}

TEST(exp_f64_bound)
{
    worst normal = { 0, 0 }, subnormal = { 0, 0 }, rest = { 0, 0 };
    for (int i = 0; i < 1000000; i++) {
        double x = i % 4 == 0 ? random_in(-1, 1) : i % 4 == 1 ? random_in(-708, 709.8) : i % 4 == 2 ? random_in(-745.3, -708) : f64_of(random_bits());
        if (i % 4 == 3 && i % 8 == 3) x = ldexp(x == x && isfinite(x) ? 1.0 + fabs(frexp(x, &(int){ 0 })) : 1.0, (int)(random_bits() % 70) - 60) * (i % 16 == 3 ? -1 : 1);
        long double want = expl((long double)x);
        worse(i % 4 == 3 ? &rest : want < 0x1p-1022L ? &subnormal : &normal, ulps_f64(llmpar_exp_f64(x), want), x);
    }
    for (int n = -1074; n <= 1024; n++) { /* beside the seams of the reduction */
        double x = (n + 0.5) * 0.69314718055994530942;
        for (int k = -3; k <= 3; k++, x = nextafter(x, 1e4)) worse(&rest, ulps_f64(llmpar_exp_f64(x), expl((long double)x)), x);
    }
    CHECK_WORST(normal, 1.0);
    CHECK_WORST(subnormal, 1.0);
    CHECK_WORST(rest, 1.0);
    CHECK(llmpar_exp_f64(0.0) == 1.0 && llmpar_exp_f64(INFINITY) == (double)INFINITY && llmpar_exp_f64(-INFINITY) == 0.0 && isnan(llmpar_exp_f64(NAN)));
    CHECK(llmpar_exp_f64(709.782712893384) < (double)INFINITY && llmpar_exp_f64(709.7827128933841) == (double)INFINITY && llmpar_exp_f64(-745.2) == 0.0 && llmpar_exp_f64(-745.1) > 0.0);
}

TEST(log_f64_bound)
{
    worst all = { 0, 0 }, one = { 0, 0 };
    for (int i = 0; i < 1000000; i++) {
        double x = i % 2 ? f64_of(random_bits() % 0x7FF0000000000000u) : random_in(0.5, 2.0);
        if (i % 32 == 1) x = f64_of(random_bits() >> (12 + random_bits() % 52)); /* subnormal */
        if (x > 0) worse(&all, ulps_f64(llmpar_log_f64(x), logl((long double)x)), x);
        x = 1.0 + ldexp((double)(int64_t)(random_bits() | 1), -63 - (int)(random_bits() % 53));
        if (x != 1.0) worse(&one, ulps_f64(llmpar_log_f64(x), logl((long double)x)), x);
    }
    for (int e = -1074; e < 1024; e++) {
        double x = ldexp(e < -1022 ? 1.0 : 0x1.6a09e667f3bcdp+0, e); /* the seams of the reduction */
        for (int k = 0; k < 5; k++, x = nextafter(x, INFINITY)) worse(&all, ulps_f64(llmpar_log_f64(x), logl((long double)x)), x);
    }
    CHECK_WORST(all, 1.0);
    CHECK_WORST(one, 1.0);
    CHECK(llmpar_log_f64(1.0) == 0.0 && llmpar_log_f64(0.0) == (double)-INFINITY && llmpar_log_f64(-0.0) == (double)-INFINITY && llmpar_log_f64(INFINITY) == (double)INFINITY);
    CHECK(isnan(llmpar_log_f64(-1.0)) && isnan(llmpar_log_f64(NAN)) && isnan(llmpar_log_f64(-INFINITY)) && isnan(llmpar_log_f64(-5e-324)));
}

static void pow_error(double base, double exponent, worst *w)
{
    long double want = powl((long double)base, (long double)exponent);
    double got = llmpar_pow_f64(base, exponent);
    if (want >= 1e-30L && want <= 1e30L) worse(w, (double)(fabsl((long double)got - want) / want), base);
    else if (want > 1e-300L && want < 1e300L) CHECK(fabsl((long double)got - want) <= 1e-13L * want);
    else CHECK(want >= 1e308L ? got > 1e307 : got < 1e-299 || want >= 1e300L);
}

TEST(pow_f64_bound)
{
    worst all = { 0, 0 };
    for (int i = 0; i < 250000; i++) {
        double base = f64_of(random_bits() % 0x7FF0000000000000u), log_base = fabs(log(base));
        if (i % 3 == 0) base = random_in(0.5, 2.0), log_base = fabs(log(base));
        pow_error(base, random_in(-69, 69) / log_base, &all);
        pow_error(random_in(0.9, 1.0), (double)(random_bits() % 10000), &all);      /* beta^step */
        pow_error(i % 2 ? 10000.0 : 500000.0, -(double)(random_bits() % 129) / 128.0, &all); /* rope's frequencies */
        pow_error(nextafter(1.0, i % 2 ? 2 : 0), random_in(-4e17, 4e17), &all);
    }
    CHECK_WORST(all, 4e-15);
    CHECK(llmpar_pow_f64(3.0, 0.0) == 1.0 && llmpar_pow_f64(1.0, NAN) == 1.0 && llmpar_pow_f64(1.0, 1e300) == 1.0 && llmpar_pow_f64(2.0, 10.0) == 1024.0);
    CHECK(llmpar_pow_f64(2.0, 1e300) == (double)INFINITY && llmpar_pow_f64(2.0, -INFINITY) == 0.0 && llmpar_pow_f64(0.5, 1e19) == 0.0 && llmpar_pow_f64(0.5, -INFINITY) == (double)INFINITY);
    CHECK(llmpar_pow_f64(0.0, 2.0) == 0.0 && llmpar_pow_f64(0.0, -2.0) == (double)INFINITY && llmpar_pow_f64(INFINITY, 2.0) == (double)INFINITY && llmpar_pow_f64(INFINITY, -0.5) == 0.0);
    CHECK(isnan(llmpar_pow_f64(-2.0, 2.0)) && isnan(llmpar_pow_f64(NAN, 2.0)) && isnan(llmpar_pow_f64(2.0, NAN)));
    CHECK(llmpar_pow_f64(nextafter(1.0, 0), 1e300) == 0.0 && llmpar_pow_f64(nextafter(1.0, 2), -1e300) == 0.0 && llmpar_pow_f64(nextafter(1.0, 2), 1e300) == (double)INFINITY);
}

TEST(sincos_f64_bound)
{
    worst sine = { 0, 0 }, cosine = { 0, 0 };
    const long double half_pi = 1.57079632679489661923132169163975144L;
    for (int i = 0; i < 800000; i++) {
        double x, s, c;
        if (i % 4 == 0) x = random_in(-10, 10);
        else if (i % 4 == 1) x = random_in(-1e9, 1e9);
        else if (i % 4 == 2) x = (double)((long double)(int64_t)(random_bits() % 1270000000u - 635000000u) * half_pi); /* nearest to a zero of one of them */
        else x = ldexp(random_in(-2, 2), -(int)(random_bits() % 60)) * (i % 8 == 3 ? 1 : (double)(i % 1000));
        if (i % 16 == 2) x = (double)(((long double)(int64_t)(random_bits() % 1000000) + 0.5L) * half_pi); /* seams */
        if (fabs(x) > 1e9) x = 1e9;
        llmpar_sincos_f64(x, &s, &c);
        worse(&sine, (double)(fabsl((long double)s - sinl((long double)x)) * 0x1p52L), x);
        worse(&cosine, (double)(fabsl((long double)c - cosl((long double)x)) * 0x1p52L), x);
    }
    CHECK_WORST(sine, 1.0);
    CHECK_WORST(cosine, 1.0);
    const double outside[] = { 1.0000001e9, -1e300, INFINITY, -INFINITY, NAN };
    for (int i = 0; i < 5; i++) {
        double s = 0, c = 0;
        llmpar_sincos_f64(outside[i], &s, &c);
        CHECK(isnan(s) && isnan(c));
    }
    double s, c;
    llmpar_sincos_f64(0.0, &s, &c);
    CHECK(s == 0.0 && c == 1.0);
}

TEST(sqrt_is_ieee)
{
    for (int i = 0; i < 1000000; i++) {
        float x = float_of((uint32_t)(random_bits() % 0x7F800000u));
        double y = f64_of(random_bits() % 0x7FF0000000000000u);
        CHECK(llmpar_sqrt_f32(x) == sqrtf(x));
        CHECK(llmpar_sqrt_f64(y) == sqrt(y));
    }
    CHECK(llmpar_sqrt_f32(4.0f) == 2.0f && llmpar_sqrt_f64(0.0) == 0.0 && signbit(llmpar_sqrt_f64(-0.0)) && llmpar_sqrt_f32(INFINITY) == INFINITY);
    CHECK(isnan(llmpar_sqrt_f32(-1.0f)) && isnan(llmpar_sqrt_f64(-1.0)) && isnan(llmpar_sqrt_f64(NAN)));
}

TEST(isfinite_by_bits)
{
    CHECK(llmpar_isfinite_f32(FLT_MAX) && llmpar_isfinite_f32(-FLT_MAX) && llmpar_isfinite_f32(0.0f) && llmpar_isfinite_f32(float_of(1)));
    CHECK(!llmpar_isfinite_f32(INFINITY) && !llmpar_isfinite_f32(-INFINITY) && !llmpar_isfinite_f32(NAN) && !llmpar_isfinite_f32(float_of(0xFF800001u)));
    CHECK(llmpar_isfinite_f64(DBL_MAX) && llmpar_isfinite_f64(-5e-324) && !llmpar_isfinite_f64(INFINITY) && !llmpar_isfinite_f64(-INFINITY) && !llmpar_isfinite_f64(NAN));
}

/* The bits are part of what a run repeats: they may not change with compiler, flags or machine. */
TEST(bits_are_pinned)
{
    uint64_t hash = 0xCBF29CE484222325u, bits;
    for (int i = 0; i < 20000; i++) {
        double value[7];
        float x = float_of((uint32_t)i * 214013u), y = (float)(i - 10000) * 0.0103f;
        double wide = ((double)i - 10000.0) * 0.0571;
        value[0] = (double)llmpar_log_f32(x > 0 ? x : 1.0f);
        value[1] = (double)llmpar_exp_f32(y);
        value[2] = llmpar_exp_f64(wide);
        value[3] = llmpar_log_f64((double)i + 0.25);
        value[4] = llmpar_pow_f64((double)i + 0.5, wide * 0.1);
        llmpar_sincos_f64(wide * 1000.0, &value[5], &value[6]);
        for (int k = 0; k < 7; k++) {
            memcpy(&bits, &value[k], 8);
            if (value[k] != value[k]) bits = 0;
            hash = (hash ^ bits) * 0x100000001B3u;
            hash ^= hash >> 29;
        }
    }
    if (hash != 0xd51529ae1818a441u) TEST_FAIL("got %016llx", (unsigned long long)hash);
}

TEST_LIST(T_(exp_f32_bound), T_(log_f32_bound), T_(exp_f64_bound), T_(log_f64_bound), T_(pow_f64_bound), T_(sincos_f64_bound), T_(sqrt_is_ieee), T_(isfinite_by_bits), T_(bits_are_pinned))
