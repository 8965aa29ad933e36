/* bits: a number as its bits and back, and mixed. */
#ifndef LLMPAR_BITS_INTERNAL_H
#define LLMPAR_BITS_INTERNAL_H

#include <stdint.h>
#include <string.h>

static inline uint32_t llmpar__bits_f32(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float llmpar__from_bits_f32(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint64_t llmpar__bits_f64(double value)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline double llmpar__from_bits_f64(uint64_t bits)
{
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline double llmpar__power_f64(int e) { return llmpar__from_bits_f64((uint64_t)(e + 1023) << 52); } /* 2^e, -1022 <= e <= 1023 */

static inline uint64_t llmpar__bits_mix(uint64_t x) /* splitmix64 */
{
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

#endif
