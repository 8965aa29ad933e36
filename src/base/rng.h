/* rng: counter-based random numbers (Philox4x32-10, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
   A number is a pure function of its key and position, so a rank generates only its own slices and no mesh changes a value. */
#ifndef LLMPAR_RNG_H
#define LLMPAR_RNG_H

#include "base/platform.h"

typedef enum llmpar_rng_purpose { LLMPAR_RNG_INIT = 1, LLMPAR_RNG_SAMPLE = 2, LLMPAR_RNG_DATA = 3, LLMPAR_RNG_DROPOUT = 4, LLMPAR_RNG_USER = 100 } llmpar_rng_purpose;

/* The key of a stream; plain data. Made by llmpar_rng_key from (seed, purpose, name, step, sample). */
typedef struct llmpar_rng { uint32_t key[2]; uint32_t counter_high[2]; } llmpar_rng;

/* name may be NULL, which is the empty name. Initialisation uses step = sample = 0 (docs/exact.md). */
LLMPAR_API llmpar_rng llmpar_rng_key(uint64_t seed, uint32_t purpose, const char *name, uint64_t step, uint64_t sample);
/* The four 32-bit words at `position`. */
LLMPAR_API void llmpar_rng_words(const llmpar_rng *rng, uint64_t position, uint32_t words[4]);
/* Uniform in [0, 1) with 53 bits, element `index`. */
LLMPAR_API double llmpar_rng_uniform(const llmpar_rng *rng, uint64_t index);
/* Standard normal, element `index` (Box-Muller in f64 with own log and sincos). Made of the words of uniform(index) and its
   neighbour: one stream serves one of the two. */
LLMPAR_API double llmpar_rng_normal(const llmpar_rng *rng, uint64_t index);
/* out[i] = mean + stddev * normal(first + i) rounded to f32, i < count. */
LLMPAR_API void llmpar_rng_fill_normal_f32(const llmpar_rng *rng, uint64_t first, size_t count, float mean, float stddev, float *out);

#endif
