/* status, heap, size, dtype, rng and exact_sum. */
#include "test.h"
#include "bits.h"
#include <math.h>

/* ---- status ---- */

TEST(status_texts)
{
    CHECK_TEXT(llmpar_status_string(LLMPAR_OK), "ok");
    CHECK_TEXT(llmpar_status_string(LLMPAR_ERR_PEER), "another rank failed");
    CHECK_TEXT(llmpar_status_string((llmpar_status)99), "unknown");
    for (int i = 0; i < LLMPAR_STATUS_COUNT; i++) CHECK(!strstr(llmpar_status_string((llmpar_status)i), "unknown"));
}

TEST(error_set_keeps_the_first)
{
    llmpar_error error;
    llmpar_error_clear(&error);
    CHECK_INT(error.rank, -1);
    CHECK_STATUS(llmpar_error_set(&error, LLMPAR_OK, "nothing"), LLMPAR_OK);
    CHECK_INT(error.text[0], 0);
    CHECK_STATUS(llmpar_error_set(&error, LLMPAR_ERR_SHAPE, "expected %d, got %s", 3, "x\ny\n"), LLMPAR_ERR_SHAPE);
    CHECK(!strcmp(error.text, "expected 3, got x y"));
    CHECK_STATUS(llmpar_error_set(&error, LLMPAR_ERR_IO, "second"), LLMPAR_ERR_IO);
    CHECK_STATUS(error.status, LLMPAR_ERR_SHAPE);
    CHECK_TEXT(error.text, "expected 3");
    CHECK_STATUS(llmpar_error_set(NULL, LLMPAR_ERR_IO, "x"), LLMPAR_ERR_IO);
    error.status = LLMPAR_OK; /* an argument inside the text that is written */
    llmpar_error_set(&error, LLMPAR_ERR_IO, "again: %s", error.text);
    CHECK(!strcmp(error.text, "again: expected 3, got x y"));
}

TEST(error_set_cuts_long_texts)
{
    for (int width = 690; width < 710; width++) {
        llmpar_error error;
        char text[800];
        int i = 0;
        llmpar_error_clear(&error);
        for (; i + 2 <= width; i += 2) memcpy(text + i, "\xC3\xA9", 2); /* e with an accent: two bytes */
        if (i < width) text[i++] = 'x';
        text[i] = 0;
        llmpar_error_set(&error, LLMPAR_ERR_IO, "%s", text);
        size_t length = strlen(error.text);
        if (width < (int)sizeof error.text) {
            CHECK(!strcmp(error.text, text));
        } else {
            CHECK(length >= sizeof error.text - 3 && length < sizeof error.text);
            CHECK(!strcmp(error.text + length - 3, "..."));
            CHECK((unsigned char)error.text[length - 4] == 0xA9); /* no half character before the dots */
        }
    }
}

/* ---- heap ---- */

static void *hook_alloc(void *user, size_t bytes)
{
    *(long long *)user += (long long)bytes;
    return malloc(bytes);
}

static void hook_free(void *user, void *memory, size_t bytes)
{
    *(long long *)user -= (long long)bytes;
    free(memory);
}

TEST(heap_counts_and_aligns)
{
    long long held = 0;
    llmpar_allocator hooks = { hook_alloc, hook_free, &held };
    llmpar_heap heap;
    void *memory[64];
    uint64_t bytes = 0;
    llmpar_heap_init(&heap, &hooks);
    for (size_t i = 0; i < 64; i++) {
        memory[i] = llmpar_heap_alloc(&heap, i, i);
        CHECK(memory[i] && (uintptr_t)memory[i] % 64 == 0);
        memset(memory[i], 0xA5, i * i);
        bytes += i * i;
        CHECK_INT(heap.live, bytes);
        for (size_t j = 0; j < i; j++) CHECK(memory[j] != memory[i]);
    }
    CHECK_INT(heap.calls, 64);
    for (size_t i = 0; i < 64; i++) llmpar_heap_free(&heap, memory[(i * 29) % 64]);
    llmpar_heap_free(&heap, NULL);
    CHECK_INT(heap.live, 0);
    CHECK_INT(heap.peak, bytes);
    CHECK_INT(held, 0);
}

TEST(heap_refuses)
{
    llmpar_heap heap;
    llmpar_heap_init(&heap, NULL);
    CHECK(!llmpar_heap_alloc(&heap, (size_t)1 << 33, (size_t)1 << 33));
    CHECK(!llmpar_heap_alloc(&heap, (size_t)-1, 1));
    CHECK(!llmpar_heap_alloc(&heap, (size_t)-64, 1));
    CHECK_INT(heap.calls, 0);
    heap.fail_at = 2;
    char *first = llmpar_heap_strdup(&heap, "first");
    CHECK(first && !strcmp(first, "first"));
    CHECK(!llmpar_heap_strdup(&heap, "second"));
    heap.fail_at = 0;
    unsigned char *zero = (unsigned char *)llmpar_heap_zalloc(&heap, 1000, 3);
    CHECK(zero != NULL);
    for (int i = 0; zero && i < 3000; i++) CHECK_INT(zero[i], 0);
    CHECK_INT(heap.live, 3006);
    llmpar_heap_free(&heap, first);
    llmpar_heap_free(&heap, zero);
    CHECK_INT(heap.live, 0);
}

/* ---- size ---- */

TEST(size_arithmetic)
{
    size_t out = 7;
    int64_t product = 7;
    CHECK(!llmpar_size_mul((size_t)1 << 32, (size_t)1 << 32, &out) && out == 7);
    CHECK(llmpar_size_mul((size_t)1 << 32, ((size_t)1 << 32) - 1, &out) && out == 0xFFFFFFFF00000000u);
    CHECK(llmpar_size_mul(0, (size_t)-1, &out) && out == 0);
    CHECK(!llmpar_size_add((size_t)-1, 1, &out) && out == 0);
    CHECK(llmpar_size_add((size_t)-2, 1, &out) && out == (size_t)-1);
    const int64_t fine[] = { 3, 5, 7 }, negative[] = { 0, -1 }, large[] = { INT64_MAX, 2 }, zero[] = { INT64_MAX, 2, 0 };
    CHECK(!llmpar_extent_product(negative, 2, &product) && !llmpar_extent_product(large, 2, &product) && product == 7);
    CHECK(llmpar_extent_product(fine, 3, &product) && product == 105);
    CHECK(llmpar_extent_product(fine, 0, &product) && product == 1);
    CHECK(llmpar_extent_product(zero, 3, &product) && product == 0);
    CHECK_INT(llmpar_round_up(0, 128), 0);
    CHECK_INT(llmpar_round_up(1, 128), 128);
    CHECK_INT(llmpar_round_up(128, 128), 128);
    CHECK_INT(llmpar_round_up(129, 3), 129);
    CHECK(llmpar_is_pow2(1) && llmpar_is_pow2(4096) && !llmpar_is_pow2(0) && !llmpar_is_pow2(-4) && !llmpar_is_pow2(6) && !llmpar_is_pow2(INT64_MIN));
}

TEST(pieces_and_trees)
{
    CHECK_INT(llmpar_tree_split(2), 1);
    CHECK_INT(llmpar_tree_split(3), 2);
    CHECK_INT(llmpar_tree_split(4), 2);
    CHECK_INT(llmpar_tree_split(5), 4);
    CHECK_INT(llmpar_tree_split(8), 4);
    CHECK_INT(llmpar_tree_split(9), 8);
    /* the pieces cover the grains in order, and a rank's boundary is a piece's boundary when ranks divide pieces */
    for (int64_t grains = 0; grains < 70; grains++) {
        for (int64_t pieces = 1; pieces <= 16; pieces *= 2) {
            CHECK_INT(llmpar_piece_begin(0, grains, pieces), 0);
            CHECK_INT(llmpar_piece_begin(pieces, grains, pieces), grains);
            for (int64_t i = 0; i < pieces; i++) {
                int64_t width = llmpar_piece_begin(i + 1, grains, pieces) - llmpar_piece_begin(i, grains, pieces);
                CHECK(width == grains / pieces || width == (grains + pieces - 1) / pieces);
            }
            for (int64_t ranks = 1; ranks <= pieces; ranks *= 2)
                for (int64_t r = 0; r <= ranks; r++)
                    CHECK_INT(llmpar_piece_begin(r, grains, ranks), llmpar_piece_begin(r * (pieces / ranks), grains, pieces));
        }
    }
    CHECK_INT(llmpar_piece_begin((1 << 20) - 1, ((int64_t)1 << 40) - 1, (1 << 20) - 1), ((int64_t)1 << 40) - 1);
}

/* ---- dtype ---- */

TEST(dtype_names_and_sizes)
{
    const size_t size[] = { 0, 4, 8, 2, 2, 4, 8, 8, 1, 0 };
    const char *name[] = { "default", "f32", "f64", "bf16", "f16", "i32", "i64", "u64", "u8", "?" };
    for (int i = 0; i < 10; i++) {
        CHECK_INT(llmpar_dtype_size((llmpar_dtype)i), size[i]);
        CHECK(!strcmp(llmpar_dtype_name((llmpar_dtype)i), name[i]));
    }
}

TEST(dtype_matches_the_table)
{
    TEST_DATA(path, "numerics/f32_to_bf16_f16.csv");
    FILE *file = fopen(path, "r");
    char line[200];
    int lines = 0;
    if (!file) { TEST_FAIL("cannot open %s", path); return; }
    while (fgets(line, sizeof line, file)) {
        unsigned f32, bf16, f16, nan;
        if (sscanf(line, "%x,%x,%x,%u", &f32, &bf16, &f16, &nan) != 4) continue;
        lines++;
        uint16_t b = llmpar_f32_to_bf16(float_of(f32)), h = llmpar_f32_to_f16(float_of(f32));
        if (nan) {
            CHECK((b & 0x7F80) == 0x7F80 && (b & 0x40) && b >> 15 == f32 >> 31 && (h & 0x7C00) == 0x7C00 && (h & 0x200) && h >> 15 == f32 >> 31);
        } else if (b != bf16 || h != f16) {
            TEST_FAIL("%08x: bf16 %04x, want %04x; f16 %04x, want %04x", f32, b, bf16, h, f16);
        }
    }
    fclose(file);
    CHECK(lines > 1000);
}

/* The value of a 16-bit pattern, by its definition. */
static double half_value(unsigned bits, int fraction_bits, int bias)
{
    int exponent = (int)(bits & 0x7FFF) >> fraction_bits, fraction = (int)bits & ((1 << fraction_bits) - 1), top = (0x7FFF >> fraction_bits);
    double value = exponent == top ? (fraction ? (double)NAN : (double)INFINITY) : ldexp(fraction + (exponent ? 1 << fraction_bits : 0), (exponent ? exponent : 1) - bias - fraction_bits);
    return bits & 0x8000 ? -value : value;
}

TEST(dtype_all_16_bit_patterns)
{
    for (unsigned i = 0; i < 0x10000; i++) {
        double f16 = half_value(i, 10, 15), bf16 = half_value(i, 7, 127), wide;
        uint16_t in = (uint16_t)i, back;
        float narrow;
        if (f16 == f16) {
            CHECK_INT(bits_of(llmpar_f16_to_f32(in)), bits_of((float)f16));
            CHECK_INT(llmpar_f32_to_f16((float)f16), i);
            CHECK(llmpar_convert(&wide, LLMPAR_F64, &in, LLMPAR_F16, 1) && bits_of_f64(wide) == bits_of_f64(f16));
            CHECK(llmpar_convert(&back, LLMPAR_F16, &f16, LLMPAR_F64, 1) && back == i);
        } else {
            CHECK_INT(bits_of(llmpar_f16_to_f32(in)), (i & 0x8000) << 16 | 0x7FC00000u | (i & 0x1FF) << 13);
            CHECK_INT(llmpar_f32_to_f16(llmpar_f16_to_f32(in)), i | 0x200);
        }
        if (bf16 == bf16) {
            CHECK_INT(bits_of(llmpar_bf16_to_f32(in)), i << 16);
            CHECK_INT(llmpar_f32_to_bf16((float)bf16), i);
            CHECK(llmpar_convert(&back, LLMPAR_BF16, &bf16, LLMPAR_F64, 1) && back == i);
        } else {
            CHECK_INT(bits_of(llmpar_bf16_to_f32(in)), (i | 0x40) << 16);
            CHECK_INT(llmpar_f32_to_bf16(llmpar_bf16_to_f32(in)), i | 0x40);
        }
        CHECK(llmpar_convert(&narrow, LLMPAR_F32, &in, LLMPAR_BF16, 1) && bits_of(narrow) == bits_of(llmpar_bf16_to_f32(in)));
        CHECK(llmpar_convert(&back, LLMPAR_F16, &in, LLMPAR_BF16, 1) && back == llmpar_f32_to_f16(llmpar_bf16_to_f32(in)));
        CHECK(llmpar_convert(&back, LLMPAR_BF16, &in, LLMPAR_F16, 1) && back == llmpar_f32_to_bf16(llmpar_f16_to_f32(in)));
    }
}

/* Rounding by definition: the nearest of two neighbours, the even one in the middle. `value` >= 0 and finite. */
static unsigned nearest_half(double value, int fraction_bits, int bias)
{
    unsigned infinity = (0x7FFFu >> fraction_bits) << fraction_bits, low = 0, high = infinity;
    while (high - low > 1) { /* the largest pattern that is not above value */
        unsigned middle = (low + high) / 2;
        if (half_value(middle, fraction_bits, bias) <= value) low = middle;
        else high = middle;
    }
    double below = half_value(low, fraction_bits, bias);
    double above = high == infinity ? ldexp(1.0, (int)(0x7FFFu >> fraction_bits) - bias) : half_value(high, fraction_bits, bias);
    double middle = 0.5 * below + 0.5 * above; /* exact in f64 */
    return value < middle || (value == middle && !(low & 1)) ? low : high;
}

TEST(dtype_f64_rounds_once)
{
    for (int i = 0; i < 200000; i++) {
        int bf16 = i & 1, fraction_bits = bf16 ? 7 : 10, bias = bf16 ? 127 : 15;
        double value;
        uint16_t got;
        if (i % 3 == 0) { /* beside a midpoint of two neighbours: what a detour through f32 gets wrong */
            unsigned pattern = (unsigned)(random_bits() % ((0x7FFFu >> fraction_bits) << fraction_bits));
            double a = half_value(pattern, fraction_bits, bias), b = half_value(pattern + 1, fraction_bits, bias);
            value = b == (double)INFINITY ? ldexp(1.0, bf16 ? 128 : 16) - a * 0.001 : 0.5 * a + 0.5 * b;
            value = f64_of(bits_of_f64(value) + random_bits() % 5 - 2);
        } else if (i % 3 == 1) {
            value = ldexp(1.0 + ldexp((double)(random_bits() >> 12), -52), (int)(random_bits() % (bf16 ? 300u : 60u)) - (bf16 ? 160 : 35));
        } else {
            value = f64_of(random_bits() >> 1);
            if (!isfinite(value)) continue;
        }
        unsigned want = nearest_half(value, fraction_bits, bias);
        CHECK(llmpar_convert(&got, bf16 ? LLMPAR_BF16 : LLMPAR_F16, &value, LLMPAR_F64, 1));
        if (got != want) TEST_FAIL("%a to %s: got %04x, want %04x", value, bf16 ? "bf16" : "f16", got, want);
        value = -value;
        llmpar_convert(&got, bf16 ? LLMPAR_BF16 : LLMPAR_F16, &value, LLMPAR_F64, 1);
        CHECK_INT(got, want | 0x8000);
        float narrow = (float)-value;
        if (isfinite(narrow)) {
            got = bf16 ? llmpar_f32_to_bf16(narrow) : llmpar_f32_to_f16(narrow);
            CHECK_INT(got, nearest_half((double)narrow, fraction_bits, bias));
        }
    }
    const double special[] = { INFINITY, -INFINITY };
    uint16_t got[2];
    llmpar_convert(got, LLMPAR_F16, special, LLMPAR_F64, 2);
    CHECK(got[0] == 0x7C00 && got[1] == 0xFC00);
    llmpar_convert(got, LLMPAR_BF16, special, LLMPAR_F64, 2);
    CHECK(got[0] == 0x7F80 && got[1] == 0xFF80);
    double nan = f64_of(0xFFF0000000000001u); /* signalling, payload lost at the far end */
    llmpar_convert(got, LLMPAR_BF16, &nan, LLMPAR_F64, 1);
    llmpar_convert(got + 1, LLMPAR_F16, &nan, LLMPAR_F64, 1);
    CHECK(got[0] == 0xFFC0 && got[1] == 0xFE00);
}

TEST(dtype_convert_lengths)
{
    float in[67], out[68];
    uint16_t half[68];
    for (int i = 0; i < 67; i++) in[i] = (float)i * 0.37f - 9.0f;
    CHECK_INT(llmpar_convert(out, LLMPAR_F32, in, LLMPAR_I32, 0), 0);
    CHECK_INT(llmpar_convert(out, LLMPAR_U8, in, LLMPAR_U8, 0), 0);
    CHECK_INT(llmpar_convert(out, LLMPAR_DTYPE_DEFAULT, in, LLMPAR_F32, 0), 0);
    for (size_t n = 0; n <= 67; n++) { /* an element does not depend on its place or neighbours; nothing past the end is written */
        half[n] = 0x1234;
        CHECK(llmpar_convert(half, LLMPAR_BF16, in, LLMPAR_F32, n));
        CHECK_INT(half[n], 0x1234);
        for (size_t i = 0; i < n; i++) CHECK_INT(half[i], llmpar_f32_to_bf16(in[i]));
        CHECK(llmpar_convert(out, LLMPAR_F32, in, LLMPAR_F32, n));
        CHECK_BYTES(out, in, n * 4);
    }
    CHECK(llmpar_convert(in, LLMPAR_F32, in, LLMPAR_F32, 67));
}

/* ---- rng ---- */

TEST(philox_known_answers)
{
    /* Random123's kat_vectors: philox4x32 10 */
    static const uint32_t known[3][10] = {
        { 0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8 },
        { 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd },
        { 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1 },
    };
    for (int i = 0; i < 3; i++) {
        llmpar_rng rng;
        uint32_t words[4];
        rng.counter_high[0] = known[i][2];
        rng.counter_high[1] = known[i][3];
        rng.key[0] = known[i][4];
        rng.key[1] = known[i][5];
        llmpar_rng_words(&rng, (uint64_t)known[i][1] << 32 | known[i][0], words);
        CHECK_BYTES(words, known[i] + 6, 16);
    }
}

TEST(rng_keys_differ)
{
    llmpar_rng keys[8] = {
        llmpar_rng_key(1, LLMPAR_RNG_INIT, "a", 0, 0), llmpar_rng_key(2, LLMPAR_RNG_INIT, "a", 0, 0), llmpar_rng_key(1, LLMPAR_RNG_DATA, "a", 0, 0),
        llmpar_rng_key(1, LLMPAR_RNG_INIT, "b", 0, 0), llmpar_rng_key(1, LLMPAR_RNG_INIT, "a", 1, 0), llmpar_rng_key(1, LLMPAR_RNG_INIT, "a", 0, 1),
        llmpar_rng_key(1, LLMPAR_RNG_INIT, NULL, 0, 0), llmpar_rng_key((uint64_t)1 << 32, LLMPAR_RNG_INIT, "a", 0, 0),
    };
    llmpar_rng again = llmpar_rng_key(1, LLMPAR_RNG_INIT, "a", 0, 0);
    CHECK_BYTES(&again, &keys[0], sizeof again);
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < i; j++) CHECK(memcmp(&keys[i], &keys[j], sizeof again) != 0);
}

/* Streams are part of every initialised model: these bits may not change without a new contract version. */
TEST(rng_streams_are_pinned)
{
    llmpar_rng rng = llmpar_rng_key(1, LLMPAR_RNG_INIT, "model.embed_tokens.weight", 0, 0);
    uint32_t words[4];
    llmpar_rng_words(&rng, 0, words);
    CHECK(words[0] == 0x3a8f9274 && words[1] == 0x24c3e6c8 && words[2] == 0x2b4e3a22 && words[3] == 0x6759cbc6);
    CHECK(bits_of_f64(llmpar_rng_normal(&rng, 5)) == 0xbfd499d19c84761au);
    for (uint64_t i = 0; i < 1000; i++) { /* the formula, with libm */
        double u = 1 - llmpar_rng_uniform(&rng, 2 * i), v = llmpar_rng_uniform(&rng, 2 * i + 1), pi = 3.14159265358979323846;
        CHECK_NEAR(llmpar_rng_normal(&rng, 2 * i), sqrt(-2 * log(u)) * cos(2 * pi * v), 1e-14);
        CHECK_NEAR(llmpar_rng_normal(&rng, 2 * i + 1), sqrt(-2 * log(u)) * sin(2 * pi * v), 1e-14);
    }
}

TEST(rng_fill_is_position_independent)
{
    llmpar_rng rng = llmpar_rng_key(42, LLMPAR_RNG_INIT, "w", 0, 0);
    float whole[101], part[101];
    llmpar_rng_fill_normal_f32(&rng, 1000, 101, 0.5f, 0.02f, whole);
    for (size_t i = 0; i < 101; i++) CHECK(whole[i] == (float)(0.5 + (double)0.02f * llmpar_rng_normal(&rng, 1000 + i)));
    for (size_t cut = 0; cut <= 101; cut++) {
        llmpar_rng_fill_normal_f32(&rng, 1000, cut, 0.5f, 0.02f, part);
        llmpar_rng_fill_normal_f32(&rng, 1000 + cut, 101 - cut, 0.5f, 0.02f, part + cut);
        CHECK_BYTES(part, whole, sizeof whole);
    }
}

TEST(rng_distribution)
{
    enum { N = 400000 };
    llmpar_rng rng = llmpar_rng_key(7, LLMPAR_RNG_USER, "d", 3, 4);
    double sum = 0, square = 0, cube = 0, fourth = 0, pair = 0, last = 0;
    int bin[64] = { 0 }, beyond[4] = { 0 };
    for (int i = 0; i < N; i++) {
        double u = llmpar_rng_uniform(&rng, (uint64_t)i), z = llmpar_rng_normal(&rng, (uint64_t)i);
        CHECK(u >= 0 && u < 1 && z == z);
        bin[(int)(u * 64)]++;
        for (int k = 0; k < 4; k++) beyond[k] += fabs(z) > k;
        sum += z;
        square += z * z;
        cube += z * z * z;
        fourth += z * z * z * z;
        pair += z * last;
        last = z;
    }
    double chi = 0, sd = 1 / sqrt((double)N);
    for (int k = 0; k < 64; k++) chi += (bin[k] - N / 64.0) * (bin[k] - N / 64.0) / (N / 64.0);
    CHECK(chi > 25 && chi < 120); /* 63 degrees of freedom: about five standard deviations */
    CHECK_NEAR(sum / N, 0, 5 * sd);
    CHECK_NEAR(square / N, 1, 5 * sd * sqrt(2.0));
    CHECK_NEAR(cube / N, 0, 5 * sd * sqrt(15.0));
    CHECK_NEAR(fourth / N, 3, 5 * sd * sqrt(96.0));
    CHECK_NEAR(pair / N, 0, 5 * sd);
    CHECK_NEAR(beyond[1] / (double)N, 0.31731, 0.004);
    CHECK_NEAR(beyond[2] / (double)N, 0.04550, 0.002);
    CHECK_NEAR(beyond[3] / (double)N, 0.00270, 0.0005);
}

/* ---- exact_sum ---- */

__extension__ typedef __int128 wide;

static double exact(const double *value, size_t count)
{
    llmpar_exact_sum sum;
    memset(&sum, 0, sizeof sum);
    for (size_t i = 0; i < count; i++) llmpar_exact_sum_add(&sum, value[i]);
    return llmpar_exact_sum_value(&sum);
}

static void shuffle(double *value, size_t count)
{
    for (size_t i = count; i > 1; i--) {
        size_t j = (size_t)(random_bits() % i);
        double swap = value[i - 1];
        value[i - 1] = value[j];
        value[j] = swap;
    }
}

/* Seven terms and their sum as rational arithmetic rounds it (Python's fractions); the last ones are ties, their neighbours, and overflow. */
static const struct { uint64_t term[7], sum; } exact_case[] = {
    { { 0x001A6A3A6513270Eu, 0x000892F9D23F0824u, 0x0020ED909531985Du, 0x8011600A099950D8u, 0x0033D9C111E20B8Fu, 0x003D3AC90F21DDB6u, 0x80039263F28C105Du }, 0x004E8701FD33F479u },
    { { 0xFFDF29D0953F48F1u, 0x7FC658CD95E60AF5u, 0x7F98E8190BECD7B0u, 0xFF96B4CB4A23D596u, 0x7FC922761E27A1C0u, 0x7FCAE97BD0EDA82Fu, 0x7F8923A794E3BF91u }, 0x7FBBD38518083E7Du },
    { { 0xBF418F135F557203u, 0xC15907A71012F037u, 0x40F7F15034B9B5DFu, 0xC0AC6F876D76B07Eu, 0x405EC66A95E761D1u, 0x3FF3F98E4CBD87ADu, 0xBF3C7A2EB2F14C94u }, 0xC158AB50A9ECCF31u },
    { { 0x0A74CDD2930D6EAFu, 0xBF557EE0E00902C7u, 0xB979BE4B49B64A08u, 0x895830E01E398F10u, 0x1515790FC1D3FCFFu, 0x7776BF467D2CAF82u, 0x7B213DEEAB1031D0u }, 0x7B213DEEAB1031D0u },
    { { 0x802B1FEE57124242u, 0x003CC0119474031Bu, 0x00017F5ED70820FEu, 0x802B2715795E8229u, 0x800BB2D40F88080Bu, 0x80293F44A5AA3C81u, 0x803B774E48DB40AFu }, 0x8044839F1ECA5BE7u },
    { { 0x7FD05C6A58D5563Du, 0xFFB2B0535AFFB229u, 0xFF80F17A7E62AA0Au, 0x7FE211C749952399u, 0xFF96415465DC9F50u, 0xFFE14A0F7F1B103Cu, 0x7FB8CA8166D22876u }, 0x7FD186C4566D3B45u },
    { { 0x420D1BC5230D977Eu, 0x41F474698CDB305Fu, 0xC025BD86FC891B4Au, 0xC20F52DD616499C9u, 0x3F12D1C9153E7C2Au, 0x3F63BBBEA8948C89u, 0x40796D0CD4C28C2Eu }, 0x41F0063928EC568Fu },
    { { 0x21A010C4482C9CBCu, 0x35A5E87688DAF401u, 0xC87F3FE3519088F5u, 0x58683F73DBF4A8B2u, 0xCF0AD1B7A7ABE1C2u, 0x86EE647C74E69A5Du, 0xE3DDFE01F3AED0B6u }, 0xE3DDFE01F3AED0B6u },
    { { 0x8036623765E7E423u, 0x0036623765E7E423u, 0x000113DB30CBC97Du, 0x801298CB70CCEC31u, 0x0020D75999C94309u, 0x00026B949118BB16u, 0x8005D158F2EE4E45u }, 0x000CC3FE91BBD02Fu },
    { { 0xFF8DFD431200339Du, 0x7FC260766050914Au, 0xFFA58EE8F4998D7Cu, 0xFFA1F7297961FD92u, 0x7FEFE3BF7CF20724u, 0xFFEFE3BF7CF20724u, 0x7F81A28F24E4E25Au }, 0x7FAEE51A17FFE5C9u },
    { { 0x41FB239F174C77A2u, 0x41D29540B12AA1F6u, 0xBE9F373C3488F876u, 0xC092587B5C9BCF35u, 0xC0A06EC4EA057543u, 0xC09FA7F04C4F9B06u, 0xC1FB239F174C77A2u }, 0x41D2953B834B4A25u },
    { { 0xA165DE0084B5A818u, 0x956C59DB5B0EE76Fu, 0x442C77028AA4248Cu, 0xAA339194A2EDDBBDu, 0xE7DFC241C9D488B1u, 0xED2CE5B231F51707u, 0x6D2CE5B231F51707u }, 0xE7DFC241C9D488B1u },
    { { 0x3FF0000000000000u, 0x3CA0000000000000u, 0x0000000000000000u, 0x0000000000000000u, 0x0000000000000000u, 0x0000000000000000u, 0x0000000000000000u }, 0x3FF0000000000000u },
    { { 0x3FF0000000000001u, 0x3CA0000000000000u, 0x0000000000000000u, 0x0000000000000000u, 0x0000000000000000u, 0x0000000000000000u, 0x0000000000000000u }, 0x3FF0000000000002u },
    { { 0x3FF0000000000000u, 0x3CA0000000000000u, 0x0000000000000001u, 0x0000000000000000u, 0x0000000000000000u, 0x0000000000000000u, 0x0000000000000000u }, 0x3FF0000000000001u },
    { { 0x3FF0000000000000u, 0x3CA0000000000000u, 0x8000000000000001u, 0x0000000000000000u, 0x0000000000000000u, 0x0000000000000000u, 0x0000000000000000u }, 0x3FF0000000000000u },
    { { 0x7FEFFFFFFFFFFFFFu, 0x7C90000000000000u, 0x0000000000000000u, 0x0000000000000000u, 0x0000000000000000u, 0x0000000000000000u, 0x0000000000000000u }, 0x7FF0000000000000u },
    { { 0x7FEFFFFFFFFFFFFFu, 0x7C90000000000000u, 0x8000000000000001u, 0x0000000000000000u, 0x0000000000000000u, 0x0000000000000000u, 0x0000000000000000u }, 0x7FEFFFFFFFFFFFFFu },
    { { 0x7FEFFFFFFFFFFFFFu, 0x7FEFFFFFFFFFFFFFu, 0xFFEFFFFFFFFFFFFFu, 0x0000000000000000u, 0x0000000000000000u, 0x0000000000000000u, 0x0000000000000000u }, 0x7FEFFFFFFFFFFFFFu },
    { { 0xFFEFFFFFFFFFFFFFu, 0xFFEFFFFFFFFFFFFFu, 0x0000000000000000u, 0x0000000000000000u, 0x0000000000000000u, 0x0000000000000000u, 0x0000000000000000u }, 0xFFF0000000000000u },
    { { 0x0010000000000000u, 0x8000000000000001u, 0x0000000000000000u, 0x0000000000000000u, 0x0000000000000000u, 0x0000000000000000u, 0x0000000000000000u }, 0x000FFFFFFFFFFFFFu },
};

TEST(exact_sum_rational_cases)
{
    for (size_t c = 0; c < sizeof exact_case / sizeof exact_case[0]; c++) {
        double value[7];
        for (int i = 0; i < 7; i++) value[i] = f64_of(exact_case[c].term[i]);
        for (int turn = 0; turn < 20; turn++, shuffle(value, 7)) {
            uint64_t got = bits_of_f64(exact(value, 7));
            if (got != exact_case[c].sum) TEST_FAIL("case %d: got %016llx, want %016llx", (int)c, (unsigned long long)got, (unsigned long long)exact_case[c].sum);
        }
    }
}

/* Integers times 2^-40, summed in 128 bits; the compiler's conversion rounds to nearest even. */
TEST(exact_sum_against_int128)
{
    enum { N = 3000 };
    static double value[N];
    for (int turn = 0; turn < 100; turn++) {
        wide total = 0;
        for (int i = 0; i < N; i++) {
            int64_t integer = (int64_t)(random_bits() >> 11) - ((int64_t)1 << 52);
            int up = (int)(random_bits() % 50);
            if (i >= N / 2 && turn % 2) { /* cancel an earlier term almost exactly */
                value[i] = -value[i - N / 2];
                total -= (wide)ldexp(value[i - N / 2], 40);
                continue;
            }
            value[i] = ldexp((double)integer, up - 40);
            total += (wide)integer * ((wide)1 << up);
        }
        if (turn % 2) { value[0] += 0x1p-40 * 3; total = (wide)ldexp(value[0], 40) + (wide)ldexp(value[N / 2], 40); }
        CHECK(bits_of_f64(exact(value, N)) == bits_of_f64(ldexp((double)total, -40)));
        double before = exact(value, N);
        shuffle(value, N);
        CHECK(bits_of_f64(exact(value, N)) == bits_of_f64(before));
    }
}

TEST(exact_sum_special_values)
{
    const double none[1] = { 0 }, negative_zero[1] = { -0.0 }, up[2] = { 1, INFINITY }, down[2] = { -INFINITY, 5 }, both[2] = { INFINITY, -INFINITY }, nan[3] = { INFINITY, NAN, 1 };
    CHECK(bits_of_f64(exact(none, 0)) == 0 && bits_of_f64(exact(negative_zero, 1)) == 0);
    CHECK(exact(up, 2) == (double)INFINITY && exact(down, 2) == (double)-INFINITY);
    CHECK(isnan(exact(both, 2)) && isnan(exact(nan, 3)));
    const double cancel[4] = { 1e308, 1e-308, 3.0, -1e308 }, gone[4] = { 5e-324, 1e300, -1e300, -5e-324 };
    CHECK(exact(cancel, 4) == 3.0 && bits_of_f64(exact(gone, 4)) == 0);
    for (int e = -1074; e < 1024; e++) { /* every single bit, both signs, and next to a far larger and a far smaller one */
        double bit[3] = { ldexp(1.0, e), 0, 0 };
        CHECK(exact(bit, 1) == bit[0]);
        bit[0] = -bit[0];
        CHECK(exact(bit, 1) == bit[0]);
        bit[1] = ldexp(1.0, 1023), bit[2] = -bit[1];
        CHECK(exact(bit, 3) == bit[0]);
    }
}

TEST(exact_sum_many_additions)
{
    llmpar_exact_sum sum, copy;
    memset(&sum, 0, sizeof sum);
    for (int i = 0; i < 1 << 20; i++) llmpar_exact_sum_add(&sum, 0x1.fffffffffffffp+1023); /* all limbs grow, the sum overflows */
    CHECK(llmpar_exact_sum_value(&sum) == (double)INFINITY);
    for (int i = 0; i < 1 << 20; i++) llmpar_exact_sum_add(&sum, i ? -0x1.fffffffffffffp+1023 : -0x1p+1000);
    CHECK(llmpar_exact_sum_value(&sum) == 0x1.fffffffffffffp+1023 - 0x1p+1000);
    copy = sum;
    llmpar_exact_sum_carry(&copy);
    for (int i = 0; i < 66; i++) CHECK(copy.limb[i] >= 0 && copy.limb[i] < (int64_t)1 << 32);
    CHECK(bits_of_f64(llmpar_exact_sum_value(&copy)) == bits_of_f64(llmpar_exact_sum_value(&sum)));
    memset(&sum, 0, sizeof sum);
    for (int i = 0; i < 1 << 20; i++) llmpar_exact_sum_add(&sum, -0.1);
    CHECK(llmpar_exact_sum_value(&sum) == -0.1 * (1 << 20));
}

/* Ranks add parts and merge limbs in any order, carried or not: the same bits, and after a carry the same limbs. */
TEST(exact_sum_merges)
{
    enum { N = 4000 };
    static double value[N];
    llmpar_exact_sum whole, merged, part[8];
    for (int i = 0; i < N; i++) value[i] = f64_of((random_bits() & 0x8FFFFFFFFFFFFFFFu) | 0x2000000000000000u) * (i % 7 ? 1 : -1);
    memset(&whole, 0, sizeof whole);
    for (int i = 0; i < N; i++) llmpar_exact_sum_add(&whole, value[i]);
    for (int turn = 0; turn < 10; turn++) {
        memset(part, 0, sizeof part);
        memset(&merged, 0, sizeof merged);
        for (int i = 0; i < N; i++) llmpar_exact_sum_add(&part[random_bits() % 8], value[i]);
        for (int r = 0; r < 8; r++) {
            if (random_bits() & 1) llmpar_exact_sum_carry(&part[(r + turn) % 8]);
            llmpar_exact_sum_merge(&merged, &part[(r + turn) % 8]);
        }
        CHECK(bits_of_f64(llmpar_exact_sum_value(&merged)) == bits_of_f64(llmpar_exact_sum_value(&whole)));
        llmpar_exact_sum_carry(&merged);
        llmpar_exact_sum_carry(&whole);
        CHECK_BYTES(&merged, &whole, sizeof whole);
    }
}

TEST(exact_sum_squares)
{
    enum { N = 150000 };
    static float value[N];
    llmpar_exact_sum one, all, parts;
    for (int kind = 0; kind < 3; kind++) {
        for (int i = 0; i < N; i++) { /* everything finite; near 1; one binade of largest fractions, the fullest buckets */
            uint32_t bits = (uint32_t)random_bits();
            if (kind == 0 && (bits & 0x7F800000u) == 0x7F800000u) bits &= 0x80FFFFFFu;
            if (kind == 1) bits = (bits & 0x80FFFFFFu) | 0x3F000000u;
            if (kind == 2) bits = 0x7F7FFFFFu;
            value[i] = float_of(bits);
        }
        memset(&one, 0, sizeof one);
        memset(&parts, 0, sizeof parts);
        all = parts;
        for (int i = 0; i < N; i++) llmpar_exact_sum_add(&one, (double)value[i] * (double)value[i]);
        llmpar_exact_sum_add_squares_f32(&all, value, N);
        for (size_t at = 0, n; at < N; at += n) {
            n = (size_t)(random_bits() % 700);
            if (n > N - at) n = N - at;
            llmpar_exact_sum_add_squares_f32(&parts, value + at, n);
        }
        llmpar_exact_sum_carry(&one);
        CHECK_BYTES(&all, &one, sizeof one);
        CHECK_BYTES(&parts, &one, sizeof one);
    }
    value[5] = -INFINITY;
    value[N - 1] = NAN;
    memset(&all, 0, sizeof all);
    llmpar_exact_sum_add_squares_f32(&all, value, N - 1);
    CHECK(llmpar_exact_sum_value(&all) == (double)INFINITY);
    llmpar_exact_sum_add_squares_f32(&all, value + N - 3, 3);
    CHECK(isnan(llmpar_exact_sum_value(&all)));
}

TEST_LIST(T_(status_texts), T_(error_set_keeps_the_first), T_(error_set_cuts_long_texts), T_(heap_counts_and_aligns), T_(heap_refuses), T_(size_arithmetic),
          T_(pieces_and_trees), T_(dtype_names_and_sizes), T_(dtype_matches_the_table), T_(dtype_all_16_bit_patterns), T_(dtype_f64_rounds_once),
          T_(dtype_convert_lengths), T_(philox_known_answers), T_(rng_keys_differ), T_(rng_streams_are_pinned), T_(rng_fill_is_position_independent),
          T_(rng_distribution), T_(exact_sum_rational_cases), T_(exact_sum_against_int128), T_(exact_sum_special_values), T_(exact_sum_many_additions),
          T_(exact_sum_merges), T_(exact_sum_squares))
