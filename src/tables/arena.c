/* arena: blocks of device memory with tags. The bookkeeping lives on the rank's heap, apart from the blocks: device memory need not be readable from the host.

   Memory comes from the device in stretches, one for each request that nothing free serves. A stretch is cut where a smaller request takes a part of it, and free neighbours become one again:

     a stretch:  | live | free        | live    | free |        blocks, linked from left to right

   Live blocks are in a hash table of chains by address, free ones in a list; the first that is large enough serves. A piece that was reserved comes first, its end last: whoever counts the same requests in a larger one sees the same places, so
   what it counts is enough. Blocks lie by size; of equals the older stretch first, then the lower address. Outside a piece a small request does not cut a large block: it may live on when the large one is wanted again.
   So a gradient lies where activations were, and a step that repeats takes memory from the device only the first time. Nothing depends on addresses but their order inside a stretch: the same requests always give the same usage, and a
   step that repeats gets the same addresses (which is what lets a device replay it: region_begin, tables/device.h). With a limit nothing is cut: a stretch goes back to the device only as a whole, and what is reserved could not keep to
   the limit. */
#include "tables/arena.h"

#include <string.h>

#include "base/size.h"
#include "base/text_internal.h"

#define LLMPAR__ARENA_BUCKETS 256u
/* A request takes a part of a block that is at most so many times as large; with AddressSanitizer none, so that it sees where every block ends. */
#define LLMPAR__ARENA_CUT 8
#if defined(__SANITIZE_ADDRESS__)
#undef LLMPAR__ARENA_CUT
#define LLMPAR__ARENA_CUT 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#undef LLMPAR__ARENA_CUT
#define LLMPAR__ARENA_CUT 1
#endif
#endif

typedef struct llmpar__arena_block {
    struct llmpar__arena_block *next;         /* in its chain, or in the list of free ones */
    struct llmpar__arena_block *left, *right; /* in its stretch; NULL: here it begins, or ends */
    char *memory;
    size_t bytes;                             /* rounded */
    llmpar_tag tag;
    const char *label;                        /* borrowed; NULL: the block is free */
    uint64_t mark[LLMPAR_ARENA_STREAMS];      /* of the last releases of its memory */
    uint64_t number;                          /* of the stretch, as they were taken from the device */
} llmpar__arena_block;

struct llmpar_arena {
    llmpar_ctx *ctx; /* borrowed */
    uint64_t limit;
    llmpar_arena_usage usage;
    llmpar__arena_block *live[LLMPAR__ARENA_BUCKETS]; /* by address */
    llmpar__arena_block *idle;                        /* those of the piece, its end, all others; by size, number, address */
    uint64_t taken;
    char *piece;                                      /* stretch 0, if it was reserved */
};

LLMPAR_DEF const char *llmpar_tag_name(llmpar_tag tag)
{
    static const char *const names[] = { "parameters", "gathered", "gradients", "optimizer", "activations", "communication", "workspace" };
    return (unsigned)tag < LLMPAR_TAG_COUNT ? names[tag] : "?";
}

/* The link in a chain that leads to this live block, or the chain's end. */
static llmpar__arena_block **llmpar__arena_find(const llmpar_arena *arena, const void *memory)
{
    llmpar__arena_block **link = (llmpar__arena_block **)&arena->live[(unsigned)(((uint64_t)(uintptr_t)memory * 0x9e3779b97f4a7c15u) >> 32) % LLMPAR__ARENA_BUCKETS];
    while (*link && (*link)->memory != memory) link = &(*link)->next;
    return link;
}

static int llmpar__arena_in_piece(const llmpar_arena *arena, const llmpar__arena_block *block) { return arena->piece && block->number == 0; }

/* The order of the list of free blocks. */
static int llmpar__arena_before(const llmpar_arena *arena, const llmpar__arena_block *x, const llmpar__arena_block *y)
{
    int x_in = llmpar__arena_in_piece(arena, x), y_in = llmpar__arena_in_piece(arena, y);
    if (x_in != y_in) return x_in;
    if (x_in && !(x->right && y->right)) return x->right != NULL;
    if (x->bytes != y->bytes) return x->bytes < y->bytes;
    return x->number < y->number || (x->number == y->number && x->memory < y->memory);
}

/* The link in the list of free blocks that leads to this one, or to where it belongs. */
static llmpar__arena_block **llmpar__arena_place(llmpar_arena *arena, const llmpar__arena_block *block)
{
    llmpar__arena_block **link = &arena->idle;
    while (*link && llmpar__arena_before(arena, *link, block)) link = &(*link)->next;
    return link;
}

static void llmpar__arena_add_idle(llmpar_arena *arena, llmpar__arena_block *block)
{
    llmpar__arena_block **link = llmpar__arena_place(arena, block);
    block->label = NULL;
    block->next = *link;
    *link = block;
}

LLMPAR_DEF llmpar_status llmpar_arena_create(llmpar_ctx *ctx, uint64_t limit, llmpar_arena **out)
{
    *out = NULL;
    llmpar_arena *arena = LLMPAR__ZALLOC(llmpar_arena, &ctx->heap, 1);
    if (!arena) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "arena: no memory for its tables");
    arena->ctx = ctx;
    arena->limit = limit;
    *out = arena;
    return LLMPAR_OK;
}

/* Two free neighbours, neither in the list, become one. */
static llmpar__arena_block *llmpar__arena_join(llmpar_arena *arena, llmpar__arena_block *left, llmpar__arena_block *right)
{
    for (int i = 0; i < LLMPAR_ARENA_STREAMS; i++)
        if (right->mark[i] > left->mark[i]) left->mark[i] = right->mark[i];
    left->bytes += right->bytes;
    left->right = right->right;
    if (left->right) left->right->left = left;
    llmpar_heap_free(&arena->ctx->heap, right);
    return left;
}

/* Out of its chain: into the list, with the free blocks beside it. */
static void llmpar__arena_retire(llmpar_arena *arena, llmpar__arena_block **link)
{
    llmpar__arena_block *block = *link, *left = block->left, *right = block->right;
    *link = block->next;
    arena->usage.live[block->tag] -= block->bytes;
    arena->usage.live_total -= block->bytes;
    if (left && !left->label) {
        link = llmpar__arena_place(arena, left);
        *link = left->next;
        block = llmpar__arena_join(arena, left, block);
    }
    if (right && !right->label) {
        link = llmpar__arena_place(arena, right);
        *link = right->next;
        block = llmpar__arena_join(arena, block, right);
    }
    llmpar__arena_add_idle(arena, block);
}

/* Gives back the stretches of which nothing is live. */
static void llmpar__arena_release(llmpar_arena *arena)
{
    llmpar__arena_block **link = &arena->idle, *block;
    while ((block = *link) != NULL) {
        if (block->left || block->right) {
            link = &block->next;
            continue;
        }
        *link = block->next;
        if (llmpar__arena_in_piece(arena, block)) arena->piece = NULL;
        arena->ctx->device->free(arena->ctx->device, block->memory, block->bytes);
        arena->usage.reserved -= block->bytes;
        llmpar_heap_free(&arena->ctx->heap, block);
    }
}

LLMPAR_DEF void llmpar_arena_destroy(llmpar_arena *arena)
{
    if (!arena) return;
    for (unsigned i = 0; i < LLMPAR__ARENA_BUCKETS; i++)
        while (arena->live[i]) llmpar__arena_retire(arena, &arena->live[i]);
    llmpar__arena_release(arena);
    llmpar_heap_free(&arena->ctx->heap, arena);
}

/* `why` completes "arena: activations "layers.3 saved": 4096 bytes: ...". */
static llmpar_status llmpar__arena_full(llmpar_arena *arena, llmpar_tag tag, size_t bytes, const char *label, const char *why)
{
    char list[320];
    llmpar__text out = llmpar__text_begin(list, sizeof list);
    for (int t = 0; t < LLMPAR_TAG_COUNT; t++) llmpar__text_put(&out, "%s%s %llu", t ? ", " : "", llmpar_tag_name((llmpar_tag)t), (unsigned long long)arena->usage.live[t]);
    return llmpar_fail(arena->ctx, LLMPAR_ERR_MEMORY, "arena: %s \"%s\": %llu bytes: %s (limit %llu, live %llu: %s)", llmpar_tag_name(tag), label, (unsigned long long)bytes, why,
                       (unsigned long long)arena->limit, (unsigned long long)arena->usage.live_total, list);
}

/* Drops the device's own text about a failure that is mended, or that the arena can tell better. */
static void llmpar__arena_forget(llmpar_ctx *ctx)
{
    ctx->error.status = LLMPAR_OK;
    ctx->error.text[0] = 0;
}

/* A stretch of the device's becomes this new block. */
static llmpar_status llmpar__arena_take(llmpar_arena *arena, llmpar__arena_block *block, size_t bytes)
{
    void *memory = NULL;
    llmpar_status status = arena->ctx->device->alloc(arena->ctx->device, bytes, &memory);
    if (status) return status;
    block->memory = (char *)memory;
    block->bytes = bytes;
    block->number = arena->taken++;
    arena->usage.reserved += bytes;
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_arena_reserve(llmpar_arena *arena, uint64_t bytes)
{
    llmpar_ctx *ctx = arena->ctx;
    size_t alignment = ctx->device->alignment;
    if (LLMPAR__ARENA_CUT == 1 || arena->limit || arena->taken || !bytes || bytes > SIZE_MAX - alignment) return LLMPAR_OK;
    llmpar__arena_block *block = LLMPAR__ZALLOC(llmpar__arena_block, &ctx->heap, 1);
    if (!block) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "arena: no host memory for a block's entry");
    int clean = ctx->error.status == LLMPAR_OK;
    llmpar_status status = llmpar__arena_take(arena, block, ((size_t)bytes + alignment - 1) & ~(alignment - 1));
    if (status) {
        llmpar_heap_free(&ctx->heap, block);
        if (status == LLMPAR_ERR_MEMORY && clean) llmpar__arena_forget(ctx);
        return status == LLMPAR_ERR_MEMORY ? LLMPAR_OK : status;
    }
    arena->piece = block->memory;
    llmpar__arena_add_idle(arena, block);
    return LLMPAR_OK;
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

    llmpar__arena_block **link = &arena->idle, *block, *rest = NULL;
    while (*link && (*link)->bytes < need) link = &(*link)->next;
    block = *link;
    if (block && block->bytes > need && !llmpar__arena_in_piece(arena, block) && (arena->limit || (block->bytes - 1) / LLMPAR__ARENA_CUT >= need)) block = NULL;
    if (!block || block->bytes > need) {
        rest = LLMPAR__ZALLOC(llmpar__arena_block, &ctx->heap, 1);
        if (!rest) return llmpar__arena_full(arena, tag, need, label, "no host memory for the block's entry");
    }
    if (block) {
        *link = block->next;
        if (rest) {
            *rest = *block;
            rest->memory += need;
            rest->bytes -= need;
            rest->left = block;
            if (rest->right) rest->right->left = rest;
            llmpar__arena_add_idle(arena, rest);
            block->bytes = need;
            block->right = rest;
        }
    } else {
        /* Idle blocks must not push what is really held over the limit. */
        if (arena->limit && usage->reserved > arena->limit - need) llmpar__arena_release(arena);
        int clean = ctx->error.status == LLMPAR_OK;
        llmpar_status st = llmpar__arena_take(arena, rest, need);
        if (st == LLMPAR_ERR_MEMORY && usage->reserved > usage->live_total) {
            llmpar__arena_release(arena);
            if (clean) llmpar__arena_forget(ctx);
            st = llmpar__arena_take(arena, rest, need);
        }
        if (st) {
            if (st == LLMPAR_ERR_MEMORY && clean) llmpar__arena_forget(ctx);
            llmpar_heap_free(&ctx->heap, rest);
            return st == LLMPAR_ERR_MEMORY ? llmpar__arena_full(arena, tag, need, label, "the device has no more memory") : st;
        }
        block = rest;
    }
    if (llmpar__arena_in_piece(arena, block) && (uint64_t)(block->memory - arena->piece) + need > usage->extent) usage->extent = (uint64_t)(block->memory - arena->piece) + need;
    block->tag = tag;
    block->label = label;
    link = llmpar__arena_find(arena, block->memory);
    block->next = NULL;
    *link = block;
    usage->live[tag] += need;
    usage->live_total += need;
    if (usage->live[tag] > usage->peak[tag]) usage->peak[tag] = usage->live[tag];
    if (usage->live_total > usage->peak_total) usage->peak_total = usage->live_total;
    *out = block->memory;
    return LLMPAR_OK;
}

LLMPAR_DEF uint64_t llmpar_arena_mark(const llmpar_arena *arena, const void *memory, int32_t stream)
{
    const llmpar__arena_block *block = *llmpar__arena_find(arena, memory);
    return block && (uint32_t)stream < LLMPAR_ARENA_STREAMS ? block->mark[stream] : 0;
}

LLMPAR_DEF void llmpar_arena_free(llmpar_arena *arena, void *memory) { llmpar_arena_free_marked(arena, memory, 0, 0); }

LLMPAR_DEF void llmpar_arena_free_marked(llmpar_arena *arena, void *memory, int32_t stream, uint64_t mark)
{
    if (!memory) return;
    if ((uint32_t)stream >= LLMPAR_ARENA_STREAMS) {
        llmpar_fail(arena->ctx, LLMPAR_ERR_ARGUMENT, "arena: free of %p: stream %d, expected 0 to %d", memory, (int)stream, LLMPAR_ARENA_STREAMS - 1);
        return;
    }
    llmpar__arena_block **link = llmpar__arena_find(arena, memory), *block = *link;
    if (!block) { /* nothing to return an error through: it shows up as the rank's error */
        llmpar_fail(arena->ctx, LLMPAR_ERR_ARGUMENT, "arena: free of %p, which is not a live block of this arena", memory);
        return;
    }
    memset(block->mark, 0, sizeof block->mark); /* what it had before is behind this release */
    block->mark[stream] = mark;
    llmpar__arena_retire(arena, link);
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
#undef LLMPAR__ARENA_CUT
