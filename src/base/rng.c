#include "base/rng.h"
#include "base/math.h"

/* Philox4x32-10: ten rounds of two 32 x 32 -> 64 bit products, the key bumped by Weyl constants between them.
   Constants and order from Random123's philox.h (Salmon et al. 2011, section 3.3). */
static void llmpar__rng_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4])
{
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

/* Two Philox blocks in a chain: the first mixes (seed; purpose, hash of name), the second, under the first's output,
   (step, sample). For one seed, purpose and name no two (step, sample) share a stream: a block is a bijection of its counter. */
LLMPAR_DEF llmpar_rng llmpar_rng_key(uint64_t seed, uint32_t purpose, const char *name, uint64_t step, uint64_t sample)
{
    llmpar_rng rng;
    uint32_t counter[4], words[4], key[2];
    uint64_t hash = 0xCBF29CE484222325u; /* FNV-1a, 64 bit */
    for (; name && *name; name++) hash = (hash ^ (unsigned char)*name) * 0x100000001B3u;
    key[0] = (uint32_t)seed;
    key[1] = (uint32_t)(seed >> 32);
    counter[0] = (uint32_t)hash;
    counter[1] = (uint32_t)(hash >> 32);
    counter[2] = purpose;
    counter[3] = 0;
    llmpar__rng_philox(counter, key, words);
    counter[0] = (uint32_t)step ^ words[2];
    counter[1] = (uint32_t)(step >> 32) ^ words[3];
    counter[2] = (uint32_t)sample;
    counter[3] = (uint32_t)(sample >> 32);
    llmpar__rng_philox(counter, words, words);
    rng.key[0] = words[0];
    rng.key[1] = words[1];
    rng.counter_high[0] = words[2];
    rng.counter_high[1] = words[3];
    return rng;
}

LLMPAR_DEF void llmpar_rng_words(const llmpar_rng *rng, uint64_t position, uint32_t words[4])
{
    uint32_t counter[4];
    counter[0] = (uint32_t)position;
    counter[1] = (uint32_t)(position >> 32);
    counter[2] = rng->counter_high[0];
    counter[3] = rng->counter_high[1];
    llmpar__rng_philox(counter, rng->key, words);
}

/* The upper 53 of 64 bits, as a multiple of 2^-53. */
static double llmpar__rng_unit(uint32_t high, uint32_t low)
{
    return (double)(((uint64_t)high << 32 | low) >> 11) * (1.0 / 9007199254740992.0);
}

/* Elements 2i and 2i + 1 are made of the four words at position i. */
LLMPAR_DEF double llmpar_rng_uniform(const llmpar_rng *rng, uint64_t index)
{
    uint32_t words[4];
    llmpar_rng_words(rng, index >> 1, words);
    return index & 1 ? llmpar__rng_unit(words[2], words[3]) : llmpar__rng_unit(words[0], words[1]);
}

/* Box and Muller 1958: the pair at position i is element 2i (cosine) and 2i + 1 (sine). */
static void llmpar__rng_normal_pair(const llmpar_rng *rng, uint64_t position, double pair[2])
{
    uint32_t words[4];
    double radius, sine, cosine;
    llmpar_rng_words(rng, position, words);
    radius = llmpar_sqrt_f64(-2.0 * llmpar_log_f64(1.0 - llmpar__rng_unit(words[0], words[1]))); /* of (0, 1] */
    llmpar_sincos_f64(6.2831853071795862 * llmpar__rng_unit(words[2], words[3]), &sine, &cosine);
    pair[0] = radius * cosine;
    pair[1] = radius * sine;
}

LLMPAR_DEF double llmpar_rng_normal(const llmpar_rng *rng, uint64_t index)
{
    double pair[2];
    llmpar__rng_normal_pair(rng, index >> 1, pair);
    return pair[index & 1];
}

LLMPAR_DEF void llmpar_rng_fill_normal_f32(const llmpar_rng *rng, uint64_t first, size_t count, float mean, float stddev, float *out)
{
    double pair[2] = { 0.0, 0.0 };
    for (size_t i = 0; i < count; i++) {
        uint64_t index = first + i;
        if (i == 0 || !(index & 1)) llmpar__rng_normal_pair(rng, index >> 1, pair);
        out[i] = (float)((double)mean + (double)stddev * pair[index & 1]);
    }
}
