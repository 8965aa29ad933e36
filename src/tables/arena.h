/* arena: the one place device memory comes from. Every allocation carries a tag; live and peak bytes are kept per tag, so that a plan can be
   compared with reality to the byte. Requests are rounded to the device's alignment; freed blocks are kept for later requests. */
#ifndef LLMPAR_ARENA_H
#define LLMPAR_ARENA_H

#include "tables/ctx.h"
#include "tables/device.h"

typedef enum llmpar_tag {
    LLMPAR_TAG_PARAMETERS = 0, /* shards */
    LLMPAR_TAG_GATHERED,       /* whole units */
    LLMPAR_TAG_GRADIENTS,
    LLMPAR_TAG_OPTIMIZER,
    LLMPAR_TAG_ACTIVATIONS,
    LLMPAR_TAG_COMMUNICATION,
    LLMPAR_TAG_WORKSPACE,
    LLMPAR_TAG_COUNT
} llmpar_tag;

LLMPAR_API const char *llmpar_tag_name(llmpar_tag tag); /* "parameters", ... */

/* In bytes. reserved: what the device has given, blocks that are free now included. extent: of what llmpar_arena_reserve took, from its begin to the end of the furthest block there ever was. */
typedef struct llmpar_arena_usage { uint64_t live[LLMPAR_TAG_COUNT], peak[LLMPAR_TAG_COUNT], live_total, peak_total, reserved, extent; } llmpar_arena_usage;

enum { LLMPAR_ARENA_STREAMS = 8 }; /* that marks tell apart */

typedef struct llmpar_arena llmpar_arena;

/* limit in bytes of live allocations, 0 = none; with a limit what is reserved keeps to it too. Borrows ctx and its device. Local. */
LLMPAR_API llmpar_status llmpar_arena_create(llmpar_ctx *ctx, uint64_t limit, llmpar_arena **out);
/* Takes so many bytes from the device now, in one piece, in which blocks lie closer together than in pieces taken as requests come; before the first request. Advice: with a limit, or where the device has not
   so much in one piece, nothing happens. How much serves: the extent that the same requests had in an arena with more than enough, as llmpar_plan_memory counts it. The arena's, until it is destroyed. LLMPAR_ERR_MEMORY: no host
   memory for an entry. Local. */
LLMPAR_API llmpar_status llmpar_arena_reserve(llmpar_arena *arena, uint64_t bytes);
/* Blocks still live are freed too. */
LLMPAR_API void llmpar_arena_destroy(llmpar_arena *arena);
/* Aligned, uninitialised. label names the buffer in messages ("layers.3 saved"); it is borrowed and must outlive the block. LLMPAR_ERR_MEMORY names tag, label, request, limit and the
   live bytes of every tag. 0 bytes give a valid pointer. Local. */
LLMPAR_API llmpar_status llmpar_arena_alloc(llmpar_arena *arena, llmpar_tag tag, size_t bytes, const char *label, void **out);
/* NULL is fine. Host order: the caller has made sure (by stream order or events) that nothing still uses the block. */
LLMPAR_API void llmpar_arena_free(llmpar_arena *arena, void *memory);
/* The same for a block that something enqueued on a stream (0 to LLMPAR_ARENA_STREAMS - 1, as the caller numbers them) may still use: mark, > 0 and larger than any before on this stream, stays with the
   memory and tells who allocates it next what to wait for. llmpar_arena_mark: the largest of a live block's memory on this stream, from when it was free before; 0: nothing to wait for. Any other
   stream is the rank's error (LLMPAR_ERR_ARGUMENT, nothing is freed), and has no marks. */
LLMPAR_API void llmpar_arena_free_marked(llmpar_arena *arena, void *memory, int32_t stream, uint64_t mark);
LLMPAR_API uint64_t llmpar_arena_mark(const llmpar_arena *arena, const void *memory, int32_t stream);
LLMPAR_API void llmpar_arena_get_usage(const llmpar_arena *arena, llmpar_arena_usage *out);
/* Peaks start again from the live bytes. */
LLMPAR_API void llmpar_arena_reset_peaks(llmpar_arena *arena);

#endif
