#include "text/data.h"
#include "base/rng.h"

#include <string.h>

#if !defined(LLMPAR_NO_TEXT)

/* Streams of the data's random numbers; part of the order that a seed stands for. */
static const char llmpar__data_phase_name[] = "data.phase", llmpar__data_order_name[] = "data.order";

LLMPAR_DEF llmpar_status llmpar_data_init(const llmpar_data_desc *desc, llmpar_data *out, llmpar_error *error)
{
    memset(out, 0, sizeof *out);
    if (!desc) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "data: no desc");
    const char *name = desc->name ? desc->name : "data";
    double share = desc->no_held_out ? 0 : desc->held_out == 0 ? 0.05 : desc->held_out;
    int64_t count = (int64_t)desc->count, t = desc->seq_len;
    if (desc->count == 0) return llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: no data: the text has 0 bytes", name);
    if (!desc->bytes) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: bytes is NULL, expected %zu bytes", name, desc->count);
    if (count < 0) return llmpar_error_set(error, LLMPAR_ERR_OVERFLOW, "%s: %zu bytes, expected less than 2^63", name, desc->count);
    if (t < 1 || t > INT32_MAX) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: seq_len = %lld, expected 1 to %d", name, (long long)t, INT32_MAX);
    if (!(share >= 0 && share < 1)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: held_out = %g, expected a share above 0 and below 1", name, desc->held_out);
    out->tokens = (const unsigned char *)desc->bytes;
    out->eval_count = (int64_t)((double)count * share);
    out->train_count = count - out->eval_count;
    out->seq_len = t;
    out->seed = desc->seed;
    if (share > 0 && out->eval_count < t + 1)
        return llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: too short: %lld of %lld tokens are held out (%g %%), but one sequence needs seq_len + 1 = %lld", name,
                                (long long)out->eval_count, (long long)count, share * 100, (long long)t + 1);
    if (out->train_count < t + 1)
        return llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: too short: %lld of %lld tokens are for training, but one sequence needs seq_len + 1 = %lld", name,
                                (long long)out->train_count, (long long)count, (long long)t + 1);
    /* The last window ends at phase + S*T, and its last target must exist: phase + S*T < train_count for every phase. */
    out->windows = out->train_count / t - 1;
    if (out->windows < 1) out->windows = 1;
    out->phases = out->train_count - out->windows * t;
    if (out->phases > t) out->phases = t;
    out->eval_windows = out->eval_count > 0 ? (out->eval_count - 1) / t : 0;
    return LLMPAR_OK;
}

/* 64 random bits, a function of all arguments. */
static uint64_t llmpar__data_random(uint64_t seed, const char *name, int64_t epoch, uint64_t position)
{
    llmpar_rng rng = llmpar_rng_key(seed, LLMPAR_RNG_DATA, name, (uint64_t)epoch, 0);
    uint32_t words[4];
    llmpar_rng_words(&rng, position, words);
    return (uint64_t)words[1] << 32 | words[0];
}

/* Where `index` goes in epoch's permutation of [0, count): a Feistel network of eight rounds is a permutation of [0, 4^half), the smallest such range that holds count;
   what falls outside is sent through again until it falls inside (cycle walking, fewer than 4 turns on average), which leaves a permutation of [0, count). */
static int64_t llmpar__data_permute(uint64_t seed, int64_t epoch, int64_t count, int64_t index)
{
    llmpar_rng rng = llmpar_rng_key(seed, LLMPAR_RNG_DATA, llmpar__data_order_name, (uint64_t)epoch, 0);
    uint64_t value = (uint64_t)index, mask;
    int half = 1;
    while (half < 32 && ((uint64_t)1 << 2 * half) < (uint64_t)count) half++;
    mask = ((uint64_t)1 << half) - 1;
    do {
        uint64_t left = value >> half, right = value & mask, round;
        for (round = 0; round < 8; round++) {
            uint32_t words[4];
            llmpar_rng_words(&rng, round << 32 | right, words);
            uint64_t next = left ^ (words[0] & mask);
            left = right;
            right = next;
        }
        value = left << half | right;
    } while (value >= (uint64_t)count);
    return (int64_t)value;
}

static void llmpar__data_copy(const llmpar_data *data, int64_t start, int32_t *tokens)
{
    for (int64_t i = 0; i <= data->seq_len; i++) tokens[i] = data->tokens[start + i];
}

LLMPAR_DEF llmpar_status llmpar_data_sequence(void *data, int64_t global_index, int32_t *tokens)
{
    const llmpar_data *d = (const llmpar_data *)data;
    LLMPAR__NEED(d, NULL);
    if (global_index < 0) return LLMPAR_ERR_ARGUMENT;
    int64_t epoch = global_index / d->windows;
    int64_t phase = (int64_t)(llmpar__data_random(d->seed, llmpar__data_phase_name, epoch, 0) % (uint64_t)d->phases);
    int64_t window = llmpar__data_permute(d->seed, epoch, d->windows, global_index % d->windows);
    llmpar__data_copy(d, phase + window * d->seq_len, tokens);
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_data_eval_sequence(const llmpar_data *data, int64_t index, int32_t *tokens)
{
    LLMPAR__NEED(data, NULL);
    if (index < 0 || index >= data->eval_windows) return LLMPAR_ERR_ARGUMENT;
    llmpar__data_copy(data, data->train_count + index * data->seq_len, tokens);
    return LLMPAR_OK;
}

#endif /* LLMPAR_NO_TEXT */
