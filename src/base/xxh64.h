/* xxh64: the 64-bit checksum XXH64 (Collet, xxHash specification 0.1.1, seed 0), which `xxhsum -H64` prints. No protection against intent. */
#ifndef LLMPAR_XXH64_H
#define LLMPAR_XXH64_H

#include "base/platform.h"

/* Plain data; may be copied. */
typedef struct llmpar_xxh64 {
    uint64_t lane[4];
    uint64_t bytes;             /* so far */
    unsigned char rest[32];     /* the last bytes % 32 of them */
} llmpar_xxh64;

LLMPAR_API void llmpar_xxh64_begin(llmpar_xxh64 *state);
LLMPAR_API void llmpar_xxh64_add(llmpar_xxh64 *state, const void *data, size_t bytes); /* in any portions */
LLMPAR_API uint64_t llmpar_xxh64_end(const llmpar_xxh64 *state); /* of what was added so far; may go on */

#endif
