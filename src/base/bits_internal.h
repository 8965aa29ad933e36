/* bits: a number as its bits and back. */
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

#endif
