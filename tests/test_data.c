/* Token data: the order of training sequences, the held-out part, and the byte-model losses that the demo is compared with. */
#include "test.h"
#include "../examples/common/ngram.h"
#include <math.h>

static llmpar_error err;

/* Random-looking text of its exact size, so that the address sanitizer sees a read beyond it. */
static unsigned char *make_text(size_t count)
{
    unsigned char *text = (unsigned char *)malloc(count);
    uint32_t state = 12345;
    size_t i;
    for (i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        text[i] = (unsigned char)(state >> 24);
    }
    return text;
}

static llmpar_status init(llmpar_data *data, const void *bytes, size_t count, int64_t seq_len, uint64_t seed, double held_out, int none)
{
    llmpar_data_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.bytes = bytes; desc.count = count; desc.seq_len = seq_len; desc.seed = seed; desc.held_out = held_out; desc.no_held_out = none; desc.name = "some.txt";
    llmpar_error_clear(&err);
    return llmpar_data_init(&desc, data, &err);
}

/* First position of the tokens in the text, or -1. */
static int64_t find(const unsigned char *text, int64_t count, const int32_t *tokens, int64_t n)
{
    int64_t at, i;
    for (at = 0; at + n <= count; at++) {
        for (i = 0; i < n && text[at + i] == tokens[i]; i++) {}
        if (i == n) return at;
    }
    return -1;
}

TEST(refuses)
{
    static const struct { size_t count; int64_t seq_len; double held_out; int none; llmpar_status status; const char *text; } table[] = {
        { 0, 8, 0, 0, LLMPAR_ERR_FORMAT, "some.txt: no data: the text has 0 bytes" },
        { 1000, 0, 0, 0, LLMPAR_ERR_ARGUMENT, "seq_len = 0, expected 1 to" },
        { 1000, -4, 0, 0, LLMPAR_ERR_ARGUMENT, "seq_len = -4" },
        { 1000, (int64_t)1 << 40, 0, 0, LLMPAR_ERR_ARGUMENT, "seq_len = 1099511627776" },
        { 1000, 8, 1, 0, LLMPAR_ERR_ARGUMENT, "held_out = 1, expected" },
        { 1000, 8, -0.5, 0, LLMPAR_ERR_ARGUMENT, "held_out = -0.5" },
        { 1000, 50, 0, 0, LLMPAR_ERR_FORMAT, "some.txt: too short: 50 of 1000 tokens are held out (5 %), but one sequence needs seq_len + 1 = 51" },
        { 1000, 100, 0.95, 0, LLMPAR_ERR_FORMAT, "too short: 50 of 1000 tokens are for training, but one sequence needs seq_len + 1 = 101" },
        { 8, 8, 0, 1, LLMPAR_ERR_FORMAT, "too short: 8 of 8 tokens are for training, but one sequence needs seq_len + 1 = 9" } };
    static unsigned char text[1000];
    llmpar_data data;
    size_t i;
    for (i = 0; i < sizeof table / sizeof table[0]; i++) {
        CHECK_STATUS(init(&data, text, table[i].count, table[i].seq_len, 1, table[i].held_out, table[i].none), table[i].status);
        CHECK_TEXT(err.text, table[i].text);
    }
    CHECK_STATUS(init(&data, NULL, 1000, 8, 1, 0, 0), LLMPAR_ERR_ARGUMENT);
    CHECK_STATUS(init(&data, text, 1000, 8, 1, NAN, 0), LLMPAR_ERR_ARGUMENT);
}

/* Each epoch shows every window once, in bounds, in another order; windows lie side by side from the phase on. */
TEST(epochs_are_permutations)
{
    static const struct { size_t count; int64_t seq_len; } table[] = { { 9, 8 }, { 15, 8 }, { 16, 8 }, { 17, 8 }, { 24, 8 }, { 25, 8 }, { 150, 8 }, { 1000, 8 }, { 1013, 7 }, { 4096, 5 }, { 300, 100 } };
    size_t k;
    for (k = 0; k < sizeof table / sizeof table[0]; k++) {
        unsigned char *text = make_text(table[k].count);
        int32_t tokens[128];
        llmpar_data data;
        int64_t epoch, i, t = table[k].seq_len, different_phases = 0, first_phase = -1;
        CHECK_OK(init(&data, text, table[k].count, t, 77, 0, 1));
        CHECK_INT(data.train_count, table[k].count); CHECK_INT(data.eval_count, 0); CHECK_INT(data.eval_windows, 0);
        CHECK(data.windows >= 1 && data.phases >= 1 && data.phases <= t && data.phases - 1 + data.windows * t < data.train_count);
        /* no more than two windows' worth is left out in any epoch */
        CHECK(data.train_count - data.windows * t <= 2 * t);
        for (epoch = 0; epoch < 4; epoch++) {
            unsigned char *seen = (unsigned char *)calloc(table[k].count, 1);
            int64_t phase = (int64_t)table[k].count;
            for (i = 0; i < data.windows; i++) {
                int64_t at, want = epoch * data.windows + i;
                CHECK_OK(llmpar_data_sequence(&data, want, tokens));
                at = find(text, (int64_t)table[k].count, tokens, t + 1);
                if (at < 0) { TEST_FAIL("count %zu: sequence %lld is not in the text", table[k].count, (long long)want); break; }
                if (seen[at]) TEST_FAIL("count %zu: window at %lld twice in epoch %lld", table[k].count, (long long)at, (long long)epoch);
                seen[at] = 1;
                if (at < phase) phase = at;
            }
            CHECK(phase < data.phases);
            for (i = 0; i < data.windows; i++) CHECK(seen[phase + i * t]);
            if (first_phase < 0) first_phase = phase;
            if (phase != first_phase) different_phases++;
            free(seen);
        }
        if (data.phases >= 5) CHECK(different_phases > 0);
        free(text);
    }
}

TEST(order_is_shuffled_and_keyed)
{
    enum { WINDOWS = 999, T = 4 };
    unsigned char *text = make_text((WINDOWS + 1) * T);
    llmpar_data a, b;
    int32_t x[T + 1], y[T + 1], first[WINDOWS][T + 1];
    int64_t i, in_order = 0, same_epoch = 0, same_seed = 0;
    CHECK_OK(init(&a, text, (WINDOWS + 1) * T, T, 1, 0, 1));
    CHECK_OK(init(&b, text, (WINDOWS + 1) * T, T, 2, 0, 1));
    CHECK_INT(a.windows, WINDOWS);
    for (i = 0; i < WINDOWS; i++) CHECK_OK(llmpar_data_sequence(&a, i, first[i]));
    for (i = WINDOWS - 1; i >= 0; i--) { /* pure: the order of asking does not matter */
        CHECK_OK(llmpar_data_sequence(&a, i, x));
        CHECK_BYTES(x, first[i], sizeof x);
        if (i > 0 && find(text, a.train_count, first[i], T + 1) == find(text, a.train_count, first[i - 1], T + 1) + T) in_order++;
        CHECK_OK(llmpar_data_sequence(&a, i + WINDOWS, y));
        if (!memcmp(x, y, sizeof x)) same_epoch++;
        CHECK_OK(llmpar_data_sequence(&b, i, y));
        if (!memcmp(x, y, sizeof x)) same_seed++;
    }
    /* by chance about one of each */
    CHECK(in_order < 10); CHECK(same_epoch < 10); CHECK(same_seed < 10);
    CHECK_STATUS(llmpar_data_sequence(&a, -1, x), LLMPAR_ERR_ARGUMENT);
    CHECK_OK(llmpar_data_sequence(&a, INT64_MAX, x));
    free(text);
}

/* The order is part of what a seed means: a change of it would change every training run. */
TEST(order_is_pinned)
{
    unsigned char counter[256];
    static const int32_t want[8] = { 236, 132, 196, 130, 202, 122, 123, 187 };
    llmpar_data data;
    int32_t tokens[9];
    int i;
    for (i = 0; i < 256; i++) counter[i] = (unsigned char)i;
    CHECK_OK(init(&data, counter, 256, 8, 42, 0, 1));
    for (i = 0; i < 8; i++) {
        CHECK_OK(llmpar_data_sequence(&data, i * 11, tokens));
        CHECK_INT(tokens[0], want[i]);
        CHECK_INT(tokens[8], want[i] + 8);
    }
}

TEST(held_out_part)
{
    enum { COUNT = 2000, T = 9 };
    unsigned char *text = make_text(COUNT);
    llmpar_data data;
    int32_t tokens[T + 1];
    int64_t i;
    for (i = 0; i < COUNT; i++) text[i] = (unsigned char)(i < 1900 ? text[i] & 127 : 128 + i % 100);
    CHECK_OK(init(&data, text, COUNT, T, 5, 0, 0));
    CHECK_INT(data.train_count, 1900); CHECK_INT(data.eval_count, 100); CHECK_INT(data.eval_windows, 11);
    for (i = 0; i < 20 * data.windows; i++) {
        int k;
        CHECK_OK(llmpar_data_sequence(&data, i, tokens));
        for (k = 0; k <= T; k++) if (tokens[k] >= 128) TEST_FAIL("training sequence %lld holds a held-out token", (long long)i);
    }
    for (i = 0; i < data.eval_windows; i++) {
        CHECK_OK(llmpar_data_eval_sequence(&data, i, tokens));
        CHECK_INT(tokens[0], 128 + i * T); CHECK_INT(tokens[T], 128 + i * T + T);
    }
    CHECK_STATUS(llmpar_data_eval_sequence(&data, data.eval_windows, tokens), LLMPAR_ERR_ARGUMENT);
    CHECK_STATUS(llmpar_data_eval_sequence(&data, -1, tokens), LLMPAR_ERR_ARGUMENT);
    CHECK_OK(init(&data, text, COUNT, T, 5, 0.5, 0));
    CHECK_INT(data.train_count, 1000);
    free(text);
}

/* ---- examples/common/ngram.h ---- */

/* The same model the slow and plain way: probabilities by recursion over counts found by scanning. */
static double slow_probability(const unsigned char *text, size_t train, const unsigned char *history, int order, unsigned char c)
{
    double lower = order == 0 ? 1.0 / 256 : slow_probability(text, train, history + 1, order - 1, c), total = 0, hits = 0, kinds = 0;
    int seen[256] = { 0 };
    size_t i;
    for (i = (size_t)order; i < train; i++) {
        if (memcmp(text + i - order, history, (size_t)order)) continue;
        total++;
        if (text[i] == c) hits++;
        if (!seen[text[i]]++) kinds++;
    }
    return total == 0 ? lower : (hits + kinds * lower) / (total + kinds);
}

TEST(ngram_is_the_recursion)
{
    enum { TRAIN = 400, END = 460 };
    unsigned char *text = make_text(END);
    double loss[3];
    int order, i;
    for (i = 0; i < END; i++) text[i] = (unsigned char)("abcdefgh"[(text[i] >> 5) & (i % 3 ? 7 : 2)] + (i > 440 ? 1 : 0)); /* 'i' is never trained on */
    for (order = 0; order <= 2; order++) {
        double sum = 0, all = 0;
        for (i = TRAIN + 1; i < END; i++) sum -= log(slow_probability(text, TRAIN, text + i - order, order, text[i]));
        for (i = 0; i < 256; i++) all += slow_probability(text, TRAIN, text + TRAIN, order, (unsigned char)i);
        CHECK_NEAR(all, 1, 1e-12);
        loss[order] = ngram_loss(text, TRAIN, TRAIN + 1, END, order);
        CHECK_NEAR(loss[order], sum / (END - TRAIN - 1), 1e-12);
    }
    CHECK(loss[0] != loss[1] && loss[1] != loss[2]);
    CHECK(ngram_loss(text, TRAIN, TRAIN + 1, TRAIN + 1, 1) != ngram_loss(text, TRAIN, TRAIN + 1, TRAIN + 1, 1)); /* nothing to predict: NaN */
    free(text);
}

TEST(ngram_on_shakespeare)
{
    TEST_DATA(path, "text/tinyshakespeare.txt");
    llmpar_mapped mapped;
    llmpar_data data;
    double one, two;
    size_t from, to;
    CHECK_OK(llmpar_file_map(path, &mapped, NULL));
    CHECK_OK(init(&data, mapped.data, mapped.bytes, 256, 1, 0, 0));
    from = (size_t)data.train_count + 1;
    to = from + (size_t)(data.eval_windows * 256);
    one = ngram_loss(mapped.data, (size_t)data.train_count, from, to, 1);
    two = ngram_loss(mapped.data, (size_t)data.train_count, from, to, 2);
    printf("  held-out nats a byte: order 1 %.4f, order 2 %.4f\n", one, two);
    CHECK(one > 2.3 && one < 2.6); CHECK(two > 1.8 && two < 2.2);
    llmpar_file_unmap(&mapped);
}

TEST_LIST(T_(refuses), T_(epochs_are_permutations), T_(order_is_shuffled_and_keyed), T_(order_is_pinned), T_(held_out_part), T_(ngram_is_the_recursion), T_(ngram_on_shakespeare))
