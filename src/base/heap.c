#include "base/heap.h"
#include "base/size.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

/* What lies just below every pointer that was handed out:

     raw              memory - sizeof(header)     memory (multiple of 64)
      |... up to 63 ...| header                  | bytes ...              */
typedef struct llmpar__heap_header {
    void *raw;       /* as the hook gave it */
    size_t total;    /* as asked of the hook */
    size_t bytes;    /* as asked by the caller */
} llmpar__heap_header;

#define LLMPAR__HEAP_ALIGN 64
#define LLMPAR__HEAP_LARGE ((size_t)4 << 20)

/* Large blocks ask for huge pages: a product walks through megabytes with a stride, and every 4 KiB of them is a place in a table that is looked up
   (twice over in a virtual machine). Advice: a system without them says no, and nothing else changes. */
static void *llmpar__heap_malloc(void *user, size_t bytes)
{
    void *memory = malloc(bytes);
    (void)user;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (memory && bytes >= LLMPAR__HEAP_LARGE) {
        uintptr_t page = 65536 /* of any system a multiple of its own */, begin = ((uintptr_t)memory + page - 1) / page * page, end = ((uintptr_t)memory + bytes) / page * page;
        int kept = errno;
        if (madvise((void *)begin, (size_t)(end - begin), MADV_HUGEPAGE)) errno = kept;
    }
#endif
    return memory;
}

static void llmpar__heap_release(void *user, void *memory, size_t bytes)
{
    (void)user;
    (void)bytes;
    free(memory);
}

LLMPAR_DEF void llmpar_heap_init(llmpar_heap *heap, const llmpar_allocator *allocator)
{
    memset(heap, 0, sizeof *heap);
    if (allocator && allocator->alloc) {
        heap->allocator = *allocator; /* without a free hook nothing is given back: the user's region goes at once */
    } else {
        heap->allocator.alloc = llmpar__heap_malloc;
        heap->allocator.free = llmpar__heap_release;
    }
}

LLMPAR_DEF void *llmpar_heap_alloc(llmpar_heap *heap, size_t count, size_t size)
{
    llmpar__heap_header header;
    if (!llmpar_size_mul(count, size, &header.bytes)) return NULL;
    if (!llmpar_size_add(header.bytes, sizeof header + LLMPAR__HEAP_ALIGN - 1, &header.total)) return NULL;
    if (heap->fail_at && heap->calls + 1 >= heap->fail_at) return NULL;
    header.raw = heap->allocator.alloc(heap->allocator.user, header.total);
    if (!header.raw) return NULL;
    char *memory = (char *)header.raw + sizeof header;
    memory += (LLMPAR__HEAP_ALIGN - (size_t)((uintptr_t)memory % LLMPAR__HEAP_ALIGN)) % LLMPAR__HEAP_ALIGN;
    memcpy(memory - sizeof header, &header, sizeof header);
    heap->calls++;
    heap->live += header.bytes;
    if (heap->live > heap->peak) heap->peak = heap->live;
    return memory;
}

LLMPAR_DEF void *llmpar_heap_zalloc(llmpar_heap *heap, size_t count, size_t size)
{
    void *memory = llmpar_heap_alloc(heap, count, size);
    if (memory) memset(memory, 0, count * size);
    return memory;
}

LLMPAR_DEF char *llmpar_heap_strdup(llmpar_heap *heap, const char *text)
{
    size_t bytes = strlen(text) + 1;
    char *copy = LLMPAR__ALLOC(char, heap, bytes);
    if (copy) memcpy(copy, text, bytes);
    return copy;
}

LLMPAR_DEF void llmpar_heap_free(llmpar_heap *heap, void *memory)
{
    llmpar__heap_header header;
    if (!memory) return;
    memcpy(&header, (char *)memory - sizeof header, sizeof header);
    heap->live -= header.bytes;
    if (heap->allocator.free) heap->allocator.free(heap->allocator.user, header.raw, header.total);
}

#undef LLMPAR__HEAP_ALIGN
#undef LLMPAR__HEAP_LARGE
