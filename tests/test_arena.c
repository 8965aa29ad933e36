/* The arena: bytes per tag, limits, reuse, and what it says when memory is short. */
#include "test.h"

typedef llmpar_status (*body)(llmpar_ctx *ctx);
static llmpar_status call_body(llmpar_ctx *ctx, void *user) { return (*(body *)user)(ctx); }
static void on_one_rank(body run)
{
    llmpar_launch_desc desc = { .ranks = 1, .check = test_no_leak };
    CHECK_OK(llmpar_launch(&desc, call_body, &run, NULL));
}

static size_t rounded(llmpar_ctx *ctx, size_t bytes)
{
    size_t a = ctx->device->alignment;
    return (bytes ? bytes + a - 1 : a) / a * a;
}

static llmpar_status accounting(llmpar_ctx *ctx)
{
    llmpar_arena *arena = NULL;
    llmpar_arena_usage u;
    void *a = NULL, *b = NULL, *c = NULL, *zero = NULL;
    CHECK_OK(llmpar_arena_create(ctx, 0, &arena));
    CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_PARAMETERS, 1000, "a", &a));
    CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_ACTIVATIONS, 5000, "b", &b));
    CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_ACTIVATIONS, 1, "c", &c));
    CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_WORKSPACE, 0, "zero", &zero));
    CHECK(a && b && c && zero && zero != c);
    CHECK_INT((uintptr_t)a % ctx->device->alignment, 0);
    CHECK_INT((uintptr_t)c % ctx->device->alignment, 0);
    memset(a, 1, 1000);
    memset(b, 2, 5000);
    size_t ra = rounded(ctx, 1000), rb = rounded(ctx, 5000), rc = rounded(ctx, 1), rz = rounded(ctx, 0);
    llmpar_arena_get_usage(arena, &u);
    CHECK_INT(u.live[LLMPAR_TAG_PARAMETERS], ra);
    CHECK_INT(u.live[LLMPAR_TAG_ACTIVATIONS], rb + rc);
    CHECK_INT(u.live_total, ra + rb + rc + rz);
    CHECK_INT(u.peak_total, u.live_total);
    CHECK_INT(u.reserved, u.live_total);
    llmpar_arena_free(arena, b);
    llmpar_arena_get_usage(arena, &u);
    CHECK_INT(u.live[LLMPAR_TAG_ACTIVATIONS], rc);
    CHECK_INT(u.peak[LLMPAR_TAG_ACTIVATIONS], rb + rc);
    CHECK_INT(u.live_total, ra + rc + rz);
    CHECK_INT(u.peak_total, ra + rb + rc + rz);
    CHECK_INT(u.reserved, ra + rb + rc + rz);
    void *again = NULL;
    CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_GRADIENTS, 5000, "again", &again));
    CHECK(again == b); /* the same size: the same block */
    llmpar_arena_get_usage(arena, &u);
    CHECK_INT(u.live[LLMPAR_TAG_GRADIENTS], rb);
    CHECK_INT(u.reserved, ra + rb + rc + rz);
    llmpar_arena_free(arena, again);
    llmpar_arena_reset_peaks(arena);
    llmpar_arena_get_usage(arena, &u);
    CHECK_INT(u.peak_total, ra + rc + rz);
    CHECK_INT(u.peak[LLMPAR_TAG_GRADIENTS], 0);
    CHECK_INT(u.peak[LLMPAR_TAG_PARAMETERS], ra);
    llmpar_arena_free(arena, NULL);
    llmpar_arena_free(arena, a);
    CHECK_INT(ctx->error.status, LLMPAR_OK);
    llmpar_arena_free(arena, a); /* twice */
    CHECK_INT(ctx->error.status, LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(ctx->error.text, "not a live block");
    llmpar_error_clear(&ctx->error);
    llmpar_arena_destroy(arena); /* with live blocks */
    llmpar_arena_destroy(NULL);
    return LLMPAR_OK;
}
TEST(usage) { on_one_rank(accounting); }

static llmpar_status limits(llmpar_ctx *ctx)
{
    llmpar_arena *arena = NULL;
    llmpar_arena_usage u;
    void *a = NULL, *b = NULL;
    CHECK_OK(llmpar_arena_create(ctx, 10240, &arena));
    CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_GATHERED, 8192, "layers.3", &a));
    CHECK_STATUS(llmpar_arena_alloc(arena, LLMPAR_TAG_ACTIVATIONS, 4096, "layers.3 saved", &b), LLMPAR_ERR_MEMORY);
    CHECK(b == NULL);
    CHECK_TEXT(ctx->error.text, "activations \"layers.3 saved\": 4096 bytes");
    CHECK_TEXT(ctx->error.text, "limit 10240");
    CHECK_TEXT(ctx->error.text, "parameters 0, gathered 8192, gradients 0");
    llmpar_error_clear(&ctx->error);
    CHECK_STATUS(llmpar_arena_alloc(arena, LLMPAR_TAG_ACTIVATIONS, SIZE_MAX - 3, "huge", &b), LLMPAR_ERR_MEMORY);
    llmpar_error_clear(&ctx->error);
    CHECK_STATUS(llmpar_arena_alloc(arena, (llmpar_tag)7, 1, "odd", &b), LLMPAR_ERR_ARGUMENT);
    llmpar_error_clear(&ctx->error);
    llmpar_arena_free(arena, a);
    CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_ACTIVATIONS, 4096, "small", &b)); /* the idle 8192 go first: never more held than the limit */
    llmpar_arena_get_usage(arena, &u);
    CHECK_INT(u.reserved, 4096);
    llmpar_arena_destroy(arena);
    return LLMPAR_OK;
}
TEST(limit) { on_one_rank(limits); }

static llmpar_status short_of_memory(llmpar_ctx *ctx)
{
    llmpar_arena *arena = NULL;
    void *p = NULL;
    CHECK_OK(llmpar_arena_create(ctx, 0, &arena));
    for (uint64_t k = 1; k <= 2; k++) { /* the entry's memory, then the block's */
        ctx->heap.fail_at = ctx->heap.calls + k;
        CHECK_STATUS(llmpar_arena_alloc(arena, LLMPAR_TAG_OPTIMIZER, 4096, "moments", &p), LLMPAR_ERR_MEMORY);
        CHECK(p == NULL);
        CHECK_TEXT(ctx->error.text, "arena: optimizer \"moments\": 4096 bytes");
        llmpar_error_clear(&ctx->error);
        ctx->heap.fail_at = 0;
    }
    CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_OPTIMIZER, 4096, "moments", &p));
    ctx->heap.fail_at = 1;
    llmpar_arena_free(arena, p);
    CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_OPTIMIZER, 4096, "moments", &p)); /* reuse takes no memory at all */
    llmpar_arena *none = NULL;
    CHECK_STATUS(llmpar_arena_create(ctx, 0, &none), LLMPAR_ERR_MEMORY);
    CHECK(none == NULL);
    llmpar_error_clear(&ctx->error);
    ctx->heap.fail_at = 0;
    llmpar_arena_destroy(arena);
    return LLMPAR_OK;
}
TEST(out_of_memory) { on_one_rank(short_of_memory); }

/* The device is full until the arena gives its idle blocks back. */
static uint64_t device_room;
static llmpar_status (*real_alloc)(llmpar_device *device, size_t bytes, void **out);
static void (*real_free)(llmpar_device *device, void *memory, size_t bytes);
static llmpar_status small_alloc(llmpar_device *device, size_t bytes, void **out)
{
    *out = NULL;
    if (bytes > device_room) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "device full");
    device_room -= bytes;
    return real_alloc(device, bytes, out);
}
static void small_free(llmpar_device *device, void *memory, size_t bytes)
{
    device_room += bytes;
    real_free(device, memory, bytes);
}
static llmpar_status small_device(llmpar_ctx *ctx)
{
    llmpar_arena *arena = NULL;
    void *p = NULL;
    llmpar_device *before = ctx->device;
    llmpar_device small = *ctx->device;
    real_alloc = small.alloc;
    real_free = small.free;
    small.alloc = small_alloc;
    small.free = small_free;
    ctx->device = &small;
    device_room = 8192;
    CHECK_OK(llmpar_arena_create(ctx, 0, &arena));
    CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_WORKSPACE, 6400, "one", &p));
    llmpar_arena_free(arena, p);
    CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_WORKSPACE, 7040, "two", &p));
    CHECK_INT(ctx->error.status, LLMPAR_OK); /* a mended failure leaves no trace */
    CHECK_STATUS(llmpar_arena_alloc(arena, LLMPAR_TAG_WORKSPACE, 6400, "three", &p), LLMPAR_ERR_MEMORY);
    CHECK_TEXT(ctx->error.text, "workspace \"three\": 6400 bytes: the device has no more memory");
    llmpar_error_clear(&ctx->error);
    llmpar_arena_destroy(arena);
    CHECK_INT(device_room, 8192);
    ctx->device = before;
    return LLMPAR_OK;
}
TEST(idle_blocks_go_back_to_a_full_device) { on_one_rank(small_device); }

/* Random traffic against a plain list: bytes add up, live blocks never overlap. */
static llmpar_status traffic(llmpar_ctx *ctx)
{
    enum { SLOTS = 64 };
    static unsigned char *block[SLOTS];
    static size_t bytes[SLOTS], live[LLMPAR_TAG_COUNT], peak[LLMPAR_TAG_COUNT];
    static int tag[SLOTS];
    llmpar_arena *arena = NULL;
    llmpar_arena_usage u;
    uint64_t x = 88172645463325252u, total = 0, peak_total = 0;
    CHECK_OK(llmpar_arena_create(ctx, 0, &arena));
    for (int i = 0; i < 20000; i++) {
        x ^= x << 13; x ^= x >> 7; x ^= x << 17;
        int s = (int)(x % SLOTS);
        if (block[s]) {
            for (size_t k = 0; k < bytes[s]; k += 61) CHECK_INT(block[s][k], s);
            live[tag[s]] -= rounded(ctx, bytes[s]);
            total -= rounded(ctx, bytes[s]);
            llmpar_arena_free(arena, block[s]);
            block[s] = NULL;
        } else {
            void *p = NULL;
            bytes[s] = (size_t)(x >> 20) % 37 * ((x >> 40) % 37);
            tag[s] = (int)((x >> 50) % LLMPAR_TAG_COUNT);
            CHECK_OK(llmpar_arena_alloc(arena, (llmpar_tag)tag[s], bytes[s], "t", &p));
            block[s] = (unsigned char *)p;
            memset(p, s, bytes[s]);
            live[tag[s]] += rounded(ctx, bytes[s]);
            total += rounded(ctx, bytes[s]);
            if (live[tag[s]] > peak[tag[s]]) peak[tag[s]] = live[tag[s]];
            if (total > peak_total) peak_total = total;
        }
        llmpar_arena_get_usage(arena, &u);
        CHECK_INT(u.live_total, total);
        CHECK_INT(u.peak_total, peak_total);
        for (int t = 0; t < LLMPAR_TAG_COUNT; t++) {
            CHECK_INT(u.live[t], live[t]);
            CHECK_INT(u.peak[t], peak[t]);
        }
    }
    llmpar_arena_destroy(arena);
    return LLMPAR_OK;
}
TEST(random_traffic) { on_one_rank(traffic); }

TEST(names)
{
    CHECK(!strcmp(llmpar_tag_name(LLMPAR_TAG_PARAMETERS), "parameters"));
    CHECK(!strcmp(llmpar_tag_name(LLMPAR_TAG_WORKSPACE), "workspace"));
    CHECK(!strcmp(llmpar_tag_name(LLMPAR_TAG_COUNT), "?"));
}

TEST_LIST(T_(usage), T_(limit), T_(out_of_memory), T_(idle_blocks_go_back_to_a_full_device), T_(random_traffic), T_(names))
