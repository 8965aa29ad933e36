/* arena: blocks of device memory with tags. The bookkeeping lives on the rank's heap, apart from the blocks: device memory need not be readable from the host.

   Every block is in one of two hash tables of chains: live blocks by address, idle blocks by size. An idle block serves a later request of exactly its
   (rounded) size, so a step that repeats takes memory from the device only the first time, and the same requests always give the same usage. Of several the oldest serves: so which blocks a step gets follows from what is live
   when it begins, and a step that repeats gets the same addresses (which is what lets a device replay it: region_begin, tables/device.h). */
#include "tables/arena.h"

#include <stdio.h>
#include <string.h>

#include "base/size.h"

#define LLMPAR__ARENA_BUCKETS 256u

typedef struct llmpar__arena_block {
    struct llmpar__arena_block *next; /* in its chain */
    void *memory;
    size_t bytes;                     /* rounded */
    llmpar_tag tag;
    const char *label;                /* borrowed */
    uint64_t mark;                    /* of its last release */
    uint64_t number;                  /* of all that were taken from the device */
} llmpar__arena_block;

struct llmpar_arena {
    llmpar_ctx *ctx; /* borrowed */
    uint64_t limit;
    llmpar_arena_usage usage;
    llmpar__arena_block *live[LLMPAR__ARENA_BUCKETS]; /* by address */
    llmpar__arena_block *idle[LLMPAR__ARENA_BUCKETS]; /* by size; a chain in the order of their numbers */
    uint64_t taken;
};

LLMPAR_DEF const char *llmpar_tag_name(llmpar_tag tag)
{
    static const char *const names[] = { "parameters", "gathered", "gradients", "optimizer", "activations", "communication", "workspace" };
    return (unsigned)tag < LLMPAR_TAG_COUNT ? names[tag] : "?";
}

static unsigned llmpar__arena_hash(uint64_t key)
{
    return (unsigned)((key * 0x9e3779b97f4a7c15u) >> 32) % LLMPAR__ARENA_BUCKETS;
}

LLMPAR_DEF llmpar_status llmpar_arena_create(llmpar_ctx *ctx, uint64_t limit, llmpar_arena **out)
{
    *out = NULL;
    llmpar_arena *arena = (llmpar_arena *)llmpar_heap_zalloc(&ctx->heap, 1, sizeof *arena);
    if (!arena) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "arena: %lu bytes for its tables", (unsigned long)sizeof *arena);
    arena->ctx = ctx;
    arena->limit = limit;
    *out = arena;
    return LLMPAR_OK;
}

static void llmpar__arena_release(llmpar_arena *arena, llmpar__arena_block **chains)
{
    for (unsigned i = 0; i < LLMPAR__ARENA_BUCKETS; i++) {
        llmpar__arena_block *block = chains[i];
        chains[i] = NULL;
        while (block) {
            llmpar__arena_block *next = block->next;
            arena->ctx->device->free(arena->ctx->device, block->memory, block->bytes);
            arena->usage.reserved -= block->bytes;
            llmpar_heap_free(&arena->ctx->heap, block);
            block = next;
        }
    }
}

LLMPAR_DEF void llmpar_arena_destroy(llmpar_arena *arena)
{
    if (!arena) return;
    llmpar__arena_release(arena, arena->live);
    llmpar__arena_release(arena, arena->idle);
    llmpar_heap_free(&arena->ctx->heap, arena);
}

/* `why` completes "arena: activations "layers.3 saved": 4096 bytes: ...". */
static llmpar_status llmpar__arena_full(llmpar_arena *arena, llmpar_tag tag, size_t bytes, const char *label, const char *why)
{
    char list[320];
    size_t used = 0;
    list[0] = 0;
    for (int t = 0; t < LLMPAR_TAG_COUNT && used < sizeof list; t++)
        used += (size_t)snprintf(list + used, sizeof list - used, "%s%s %llu", t ? ", " : "", llmpar_tag_name((llmpar_tag)t), (unsigned long long)arena->usage.live[t]);
    return llmpar_fail(arena->ctx, LLMPAR_ERR_MEMORY, "arena: %s \"%s\": %llu bytes: %s (limit %llu, live %llu: %s)", llmpar_tag_name(tag), label, (unsigned long long)bytes, why,
                       (unsigned long long)arena->limit, (unsigned long long)arena->usage.live_total, list);
}

/* Drops the device's own text about a failure that is mended, or that the arena can tell better. */
static void llmpar__arena_forget(llmpar_ctx *ctx)
{
    ctx->error.status = LLMPAR_OK;
    ctx->error.text[0] = 0;
}

LLMPAR_DEF llmpar_status llmpar_arena_alloc(llmpar_arena *arena, llmpar_tag tag, size_t bytes, const char *label, void **out)
{
    llmpar_ctx *ctx = arena->ctx;
    llmpar_device *device = ctx->device;
    llmpar_arena_usage *usage = &arena->usage;
    *out = NULL;
    if (!label) label = "";
    if ((unsigned)tag >= LLMPAR_TAG_COUNT) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "arena: \"%s\": tag %d, expected 0 to %d", label, (int)tag, LLMPAR_TAG_COUNT - 1);
    size_t need;
    if (!llmpar_size_add(bytes ? bytes : 1, device->alignment - 1, &need)) return llmpar__arena_full(arena, tag, bytes, label, "size overflow");
    need &= ~(device->alignment - 1);
    if (arena->limit && (need > arena->limit || usage->live_total > arena->limit - need)) return llmpar__arena_full(arena, tag, need, label, "over the limit");

    unsigned bucket = llmpar__arena_hash(need);
    llmpar__arena_block **link = &arena->idle[bucket], *block;
    while (*link && (*link)->bytes != need) link = &(*link)->next;
    block = *link;
    if (block) {
        *link = block->next;
    } else {
        /* Idle blocks must not push what is really held over the limit. */
        if (arena->limit && usage->reserved > arena->limit - need) llmpar__arena_release(arena, arena->idle);
        block = (llmpar__arena_block *)llmpar_heap_zalloc(&ctx->heap, 1, sizeof *block);
        if (!block) return llmpar__arena_full(arena, tag, need, label, "no host memory for the block's entry");
        int clean = ctx->error.status == LLMPAR_OK;
        llmpar_status st = device->alloc(device, need, &block->memory);
        if (st == LLMPAR_ERR_MEMORY && usage->reserved > usage->live_total) {
            llmpar__arena_release(arena, arena->idle);
            if (clean) llmpar__arena_forget(ctx);
            st = device->alloc(device, need, &block->memory);
        }
        if (st) {
            if (st == LLMPAR_ERR_MEMORY && clean) llmpar__arena_forget(ctx);
            llmpar_heap_free(&ctx->heap, block);
            return st == LLMPAR_ERR_MEMORY ? llmpar__arena_full(arena, tag, need, label, "the device has no more memory") : st;
        }
        block->bytes = need;
        block->number = arena->taken++;
        usage->reserved += need;
    }
    block->tag = tag;
    block->label = label;
    bucket = llmpar__arena_hash((uint64_t)(uintptr_t)block->memory);
    block->next = arena->live[bucket];
    arena->live[bucket] = block;
    usage->live[tag] += need;
    usage->live_total += need;
    if (usage->live[tag] > usage->peak[tag]) usage->peak[tag] = usage->live[tag];
    if (usage->live_total > usage->peak_total) usage->peak_total = usage->live_total;
    *out = block->memory;
    return LLMPAR_OK;
}

LLMPAR_DEF uint64_t llmpar_arena_mark(const llmpar_arena *arena, const void *memory)
{
    const llmpar__arena_block *block = arena->live[llmpar__arena_hash((uint64_t)(uintptr_t)memory)];
    while (block && block->memory != memory) block = block->next;
    return block ? block->mark : 0;
}

LLMPAR_DEF void llmpar_arena_free(llmpar_arena *arena, void *memory) { llmpar_arena_free_marked(arena, memory, 0); }

LLMPAR_DEF void llmpar_arena_free_marked(llmpar_arena *arena, void *memory, uint64_t mark)
{
    if (!memory) return;
    llmpar__arena_block **link = &arena->live[llmpar__arena_hash((uint64_t)(uintptr_t)memory)], *block;
    while (*link && (*link)->memory != memory) link = &(*link)->next;
    block = *link;
    if (!block) { /* nothing to return an error through: it shows up as the rank's error */
        llmpar_fail(arena->ctx, LLMPAR_ERR_ARGUMENT, "arena: free of %p, which is not a live block of this arena", memory);
        return;
    }
    *link = block->next;
    block->mark = mark;
    arena->usage.live[block->tag] -= block->bytes;
    arena->usage.live_total -= block->bytes;
    for (link = &arena->idle[llmpar__arena_hash(block->bytes)]; *link && (*link)->number < block->number;) link = &(*link)->next;
    block->next = *link;
    *link = block;
}

LLMPAR_DEF void llmpar_arena_get_usage(const llmpar_arena *arena, llmpar_arena_usage *out)
{
    *out = arena->usage;
}

LLMPAR_DEF void llmpar_arena_reset_peaks(llmpar_arena *arena)
{
    for (int t = 0; t < LLMPAR_TAG_COUNT; t++) arena->usage.peak[t] = arena->usage.live[t];
    arena->usage.peak_total = arena->usage.live_total;
}

#undef LLMPAR__ARENA_BUCKETS
