/* heap: allocator hooks and live-byte counting. Every byte of host memory the library takes goes through one. */
#ifndef LLMPAR_HEAP_H
#define LLMPAR_HEAP_H

#include "base/status.h"

/* User hooks. alloc returns memory aligned to at least 16 bytes or NULL; free gets the size that was asked for.
   Both are called from the rank's own thread only. Zero-initialised = malloc/free;
   alloc without free = nothing is given back (a region that goes as a whole). */
typedef struct llmpar_allocator {
    void *(*alloc)(void *user, size_t bytes);
    void (*free)(void *user, void *memory, size_t bytes);
    void *user;
} llmpar_allocator;

/* One rank's heap. `live` is zero after clean-up: tests check it. */
typedef struct llmpar_heap {
    llmpar_allocator allocator; /* borrowed user pointer */
    uint64_t live;              /* bytes now allocated (as requested) */
    uint64_t peak;              /* largest `live` so far */
    uint64_t calls;             /* successful allocations so far */
    uint64_t fail_at;           /* test hook: the fail_at-th allocation (1 = next when calls is 0) and all later ones return NULL; 0 = never */
} llmpar_heap;

/* allocator may be NULL (malloc/free). Cannot fail. */
LLMPAR_API void llmpar_heap_init(llmpar_heap *heap, const llmpar_allocator *allocator);
/* count * size bytes aligned to 64, uninitialised; NULL when out of memory or when the product overflows. 0 bytes give a
   valid unique pointer. Not thread-safe for one heap. */
LLMPAR_API void *llmpar_heap_alloc(llmpar_heap *heap, size_t count, size_t size);
/* The same, zeroed. */
LLMPAR_API void *llmpar_heap_zalloc(llmpar_heap *heap, size_t count, size_t size);
/* So many of a type. */
#define LLMPAR__ALLOC(type, heap, count) ((type *)llmpar_heap_alloc(heap, count, sizeof(type)))
#define LLMPAR__ZALLOC(type, heap, count) ((type *)llmpar_heap_zalloc(heap, count, sizeof(type)))
/* A copy of a zero-terminated string, or NULL. */
LLMPAR_API char *llmpar_heap_strdup(llmpar_heap *heap, const char *text);
LLMPAR_API void llmpar_heap_free(llmpar_heap *heap, void *memory);

#endif
