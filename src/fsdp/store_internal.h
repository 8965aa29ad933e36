/* store: where states stay between their uses: host memory beside the arena, or ranges of one file a rank.

     file:  | optimizer u0 | optimizer u1 | master u0 | .. | gradients, activations: laid out when a list first needs them |

   The file has no name from the moment it is open, so that nothing stays after an end of any kind; its whole size is reserved before it is used, so that a full disk is an error then and not in the middle of a step. */
#ifndef LLMPAR_STORE_INTERNAL_H
#define LLMPAR_STORE_INTERNAL_H

#include "fsdp/fsdp.h"

typedef struct llmpar__store llmpar__store;

/* Room for one buffer. Zero-initialised: none. */
typedef struct llmpar__place {
    uint64_t bytes;    /* room */
    uint64_t used;     /* bytes of the buffer that is kept there now */
    uint64_t offset;   /* in the file */
    void *host;        /* HOST tier: owned */
    llmpar_tier tier;
} llmpar__place;

/* file: a place may be of the FILE tier: the file is made in `directory`. count_only: neither file nor memory, and nothing moves. Errors name the path. Owned by the caller. Local, as all of these. */
LLMPAR__PRIVATE llmpar_status llmpar__store_create(llmpar_ctx *ctx, const char *directory, int file, int count_only, llmpar__store **out);
LLMPAR__PRIVATE void llmpar__store_destroy(llmpar__store *store); /* NULL is fine; places of the HOST tier are given back by store_drop */
/* Room for `bytes` behind what the file holds, or zeroed host memory. */
LLMPAR__PRIVATE llmpar_status llmpar__store_place(llmpar__store *store, llmpar_tier tier, uint64_t bytes, llmpar__place *place);
LLMPAR__PRIVATE void llmpar__store_drop(llmpar__store *store, llmpar__place *place); /* host memory is freed; the file's range only with a rewind */
LLMPAR__PRIVATE void llmpar__store_rewind(llmpar__store *store); /* ranges behind those that are fixed are no longer used */
/* The disk's blocks for everything placed so far: zeros where nothing was written. */
LLMPAR__PRIVATE llmpar_status llmpar__store_reserve(llmpar__store *store);
LLMPAR__PRIVATE llmpar_status llmpar__store_fix(llmpar__store *store); /* the same, and all that stays for good */
/* Enqueues place->used bytes from (write) or to device memory, always on the same stream. label is borrowed until they ran. */
LLMPAR__PRIVATE llmpar_status llmpar__store_transfer(llmpar__store *store, llmpar_stream *stream, const llmpar__place *place, void *memory, const char *label, int write);
/* After a failed wait for the stream: makes the failure of a transfer the rank's error. The stream's thread does not touch that. */
LLMPAR__PRIVATE llmpar_status llmpar__store_failed(llmpar__store *store, llmpar_status status);

#endif
