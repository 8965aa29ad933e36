/* The arena: bytes per tag, limits, reuse, and what it says when memory is short. */
#include "test.h"

#if defined(__SANITIZE_THREAD__)
const char *__tsan_default_options(void);
const char *__tsan_default_options(void) { return "allocator_may_return_null=1"; } /* half of all addresses is asked for: no memory, and no error of the test */
#endif

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
    CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_ACTIVATIONS, 4096, "small", &b)); /* the idle 8192 go first: never more held than the limit, and nothing is cut */
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

#if defined(__SANITIZE_ADDRESS__)
#define CUTS 0
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUTS 0
#endif
#endif
#if !defined(CUTS)
#define CUTS 1 /* with AddressSanitizer every block is one of the device's */
#endif

/* A smaller request takes a part of a free block, the parts become one again, and nobody waits for less than who left them. */
static llmpar_status cutting(llmpar_ctx *ctx)
{
    enum { K = 1024 };
    llmpar_arena *arena = NULL;
    llmpar_arena_usage u;
    void *big = NULL, *a = NULL, *b = NULL, *c = NULL, *small = NULL, *again = NULL;
    CHECK_OK(llmpar_arena_create(ctx, 0, &arena));
    CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_ACTIVATIONS, 16 * K, "big", &big));
    CHECK_INT(llmpar_arena_mark(arena, big, 2), 0);
    for (int32_t wrong = -1; wrong <= LLMPAR_ARENA_STREAMS; wrong += LLMPAR_ARENA_STREAMS + 1) {
        llmpar_arena_free_marked(arena, big, wrong, 7);
        CHECK_INT(ctx->error.status, LLMPAR_ERR_ARGUMENT);
        CHECK_TEXT(ctx->error.text, "expected 0 to 7");
        llmpar_error_clear(&ctx->error);
        CHECK_INT(llmpar_arena_mark(arena, big, wrong), 0);
        llmpar_arena_get_usage(arena, &u);
        CHECK_INT(u.live_total, 16 * K);
    }
    llmpar_arena_free_marked(arena, big, 2, 7);
    CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_GRADIENTS, 4 * K, "a", &a));
    CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_GRADIENTS, 4 * K, "b", &b));
    CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_GRADIENTS, 8 * K, "c", &c));
    CHECK((char *)a == (char *)big && (char *)b == (char *)big + 4 * K && (char *)c == (char *)big + 8 * K);
    CHECK_INT(llmpar_arena_mark(arena, a, 2), 7);
    CHECK_INT(llmpar_arena_mark(arena, c, 2), 7);
    CHECK_INT(llmpar_arena_mark(arena, c, 1), 0);
    llmpar_arena_get_usage(arena, &u);
    CHECK_INT(u.reserved, 16 * K);
    CHECK_INT(u.live_total, 16 * K);
    CHECK_INT(u.live[LLMPAR_TAG_GRADIENTS], 16 * K);
    llmpar_arena_free_marked(arena, a, 1, 20); /* left of a live one */
    llmpar_arena_free_marked(arena, c, 3, 5);  /* right of a live one */
    llmpar_arena_free_marked(arena, b, 2, 9);  /* between two free ones */
    CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_ACTIVATIONS, 16 * K, "again", &again));
    CHECK(again == big);
    CHECK_INT(llmpar_arena_mark(arena, again, 1), 20);
    CHECK_INT(llmpar_arena_mark(arena, again, 2), 9);
    CHECK_INT(llmpar_arena_mark(arena, again, 3), 5);
    llmpar_arena_free(arena, again); /* nothing uses it: nothing to wait for */
    CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_WORKSPACE, 2 * K - 64, "small", &small)); /* a large block is not cut for a small one */
    llmpar_arena_get_usage(arena, &u);
    CHECK_INT(u.reserved, 18 * K - 64);
    CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_ACTIVATIONS, 2 * K, "an eighth", &a));
    CHECK(a == big);
    CHECK_INT(llmpar_arena_mark(arena, a, 1), 0);
    llmpar_arena_get_usage(arena, &u);
    CHECK_INT(u.reserved, 18 * K - 64);
    ctx->heap.fail_at = 1; /* what is left of a cut block needs an entry */
    CHECK_STATUS(llmpar_arena_alloc(arena, LLMPAR_TAG_ACTIVATIONS, 6 * K, "b", &b), LLMPAR_ERR_MEMORY);
    CHECK(b == NULL);
    llmpar_error_clear(&ctx->error);
    CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_ACTIVATIONS, 14 * K, "all that is left", &b));
    ctx->heap.fail_at = 0;
    CHECK((char *)b == (char *)big + 2 * K);
    llmpar_arena_destroy(arena);
    return LLMPAR_OK;
}
TEST(blocks_are_cut_and_joined) { if (CUTS) on_one_rank(cutting); }

/* A step whose sizes do not fit each other: activations come, gradients take their place. The device is asked in the first one only, every later step has the addresses of the second, and little more is held than is live at once. */
static llmpar_status steps(llmpar_ctx *ctx)
{
    enum { LAYERS = 12, STEPS = 5, K = 1024 };
    llmpar_arena *arena = NULL;
    llmpar_arena_usage u;
    void *saved[LAYERS], *gradient[LAYERS], *scratch = NULL, *was[2 * LAYERS];
    uint64_t reserved = 0;
    CHECK_OK(llmpar_arena_create(ctx, 0, &arena));
    for (int step = 0; step < STEPS; step++) {
        for (int l = 0; l < LAYERS; l++) {
            CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_ACTIVATIONS, (size_t)(45 + l % 3) * K, "saved", &saved[l]));
            CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_WORKSPACE, 9 * K, "scratch", &scratch));
            llmpar_arena_free(arena, scratch);
        }
        for (int l = LAYERS - 1; l >= 0; l--) {
            CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_GRADIENTS, 28 * K, "gradient", &gradient[l]));
            CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_WORKSPACE, 5 * K, "scratch", &scratch));
            llmpar_arena_free(arena, scratch);
            llmpar_arena_free(arena, saved[l]);
        }
        for (int l = 0; l < LAYERS; l++) llmpar_arena_free(arena, gradient[l]);
        llmpar_arena_get_usage(arena, &u);
        CHECK_INT(u.live_total, 0);
        if (step == 0) reserved = u.reserved;
        CHECK_INT(u.reserved, reserved);
        for (int l = 0; l < LAYERS; l++) {
            if (step > 1) CHECK(saved[l] == was[l] && gradient[l] == was[LAYERS + l]);
            was[l] = saved[l];
            was[LAYERS + l] = gradient[l];
        }
    }
    if (CUTS) CHECK(u.reserved <= u.peak_total + u.peak_total / 20);
    llmpar_arena_destroy(arena);
    return LLMPAR_OK;
}
TEST(a_step_that_repeats) { on_one_rank(steps); }

/* In a piece that was reserved blocks lie close, and a larger piece shows how large it has to be. */
static llmpar_status reserving(llmpar_ctx *ctx)
{
    enum { K = 1024, BLOCKS = 40, TURNS = 3000 };
    static const uint64_t sizes[] = { (uint64_t)64 << 20, 0 };
    static size_t offset[2][TURNS];
    uint64_t extent = 0;
    for (int run = 0; run < 2; run++) {
        llmpar_arena *arena = NULL;
        llmpar_arena_usage u;
        char *block[BLOCKS] = { NULL }, *begin = NULL;
        uint64_t x = 88172645463325252u;
        CHECK_OK(llmpar_arena_create(ctx, 0, &arena));
        CHECK_OK(llmpar_arena_reserve(arena, run ? extent : sizes[0]));
        CHECK_OK(llmpar_arena_reserve(arena, sizes[0])); /* once */
        llmpar_arena_get_usage(arena, &u);
        CHECK_INT(u.reserved, run ? extent : sizes[0]);
        CHECK_INT(u.live_total, 0);
        for (int i = 0; i < TURNS; i++) {
            x ^= x << 13; x ^= x >> 7; x ^= x << 17;
            int s = (int)(x % BLOCKS);
            if (block[s]) {
                llmpar_arena_free(arena, block[s]);
                block[s] = NULL;
                continue;
            }
            void *p = NULL;
            CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_ACTIVATIONS, 64 + (size_t)(x >> 20) % (200 * K), "t", &p));
            block[s] = (char *)p;
            if (!begin) begin = block[s];
            offset[run][i] = (size_t)(block[s] - begin);
            if (run) CHECK_INT(offset[1][i], offset[0][i]);
        }
        llmpar_arena_get_usage(arena, &u);
        CHECK_INT(u.reserved, run ? extent : sizes[0]); /* nothing more was taken */
        CHECK(u.extent >= u.peak_total && u.extent < u.peak_total * 3 / 2);
        if (run) CHECK_INT(u.extent, extent);
        extent = u.extent;
        void *more = NULL; /* what does not fit comes from the device as ever */
        CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_ACTIVATIONS, sizes[0], "more", &more));
        llmpar_arena_get_usage(arena, &u);
        CHECK_INT(u.extent, extent);
        CHECK_INT(u.reserved, sizes[0] + (run ? extent : sizes[0]));
        llmpar_arena_destroy(arena);
    }
    llmpar_arena *arena = NULL;
    llmpar_arena_usage u;
    CHECK_OK(llmpar_arena_create(ctx, 1 << 20, &arena)); /* with a limit, or where there is not so much: nothing */
    CHECK_OK(llmpar_arena_reserve(arena, 1 << 19));
    llmpar_arena_get_usage(arena, &u);
    CHECK_INT(u.reserved, 0);
    llmpar_arena_destroy(arena);
    CHECK_OK(llmpar_arena_create(ctx, 0, &arena));
    CHECK_OK(llmpar_arena_reserve(arena, SIZE_MAX / 2));
    CHECK_OK(llmpar_arena_reserve(arena, SIZE_MAX));
    CHECK_INT(ctx->error.status, LLMPAR_OK);
    llmpar_arena_get_usage(arena, &u);
    CHECK_INT(u.reserved, 0);
    ctx->heap.fail_at = 1;
    CHECK_STATUS(llmpar_arena_reserve(arena, K), LLMPAR_ERR_MEMORY);
    CHECK_TEXT(ctx->error.text, "arena: no host memory");
    llmpar_error_clear(&ctx->error);
    ctx->heap.fail_at = 0;
    void *p = NULL, *hole[2], *between[2], *again[2];
    llmpar_arena *close = NULL; /* what fits a hole leaves the larger one to what needs it */
    CHECK_OK(llmpar_arena_create(ctx, 0, &close));
    CHECK_OK(llmpar_arena_reserve(close, sizes[0]));
    for (int i = 0; i < 2; i++) {
        CHECK_OK(llmpar_arena_alloc(close, LLMPAR_TAG_ACTIVATIONS, (size_t)(20 - 10 * i) * K, "a hole", &hole[i]));
        CHECK_OK(llmpar_arena_alloc(close, LLMPAR_TAG_ACTIVATIONS, K, "between", &between[i]));
    }
    for (int i = 0; i < 2; i++) llmpar_arena_free(close, hole[i]);
    for (int i = 0; i < 2; i++) CHECK_OK(llmpar_arena_alloc(close, LLMPAR_TAG_ACTIVATIONS, (size_t)(10 + 10 * i) * K, "again", &again[i]));
    CHECK(again[0] == hole[1] && again[1] == hole[0]);
    llmpar_arena_get_usage(close, &u);
    CHECK_INT(u.extent, u.peak_total);
    llmpar_arena_destroy(close);
    CHECK_OK(llmpar_arena_reserve(arena, 8 * K));
    CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_WORKSPACE, 64, "small", &p)); /* of a piece small requests take a part too */
    llmpar_arena_get_usage(arena, &u);
    CHECK_INT(u.reserved, 8 * K);
    llmpar_arena_free(arena, p);
    real_alloc = ctx->device->alloc;
    real_free = ctx->device->free;
    llmpar_device *before = ctx->device;
    llmpar_device small = *ctx->device;
    small.alloc = small_alloc;
    small.free = small_free;
    ctx->device = &small;
    device_room = K;
    CHECK_OK(llmpar_arena_alloc(arena, LLMPAR_TAG_WORKSPACE, 9 * K, "the piece goes back when there is nothing else", &p));
    llmpar_arena_get_usage(arena, &u);
    CHECK_INT(u.reserved, 9 * K);
    llmpar_arena_destroy(arena);
    CHECK_INT(device_room, 9 * K);
    ctx->device = before;
    return LLMPAR_OK;
}
TEST(a_piece_is_reserved) { if (CUTS) on_one_rank(reserving); }

TEST(names)
{
    CHECK(!strcmp(llmpar_tag_name(LLMPAR_TAG_PARAMETERS), "parameters"));
    CHECK(!strcmp(llmpar_tag_name(LLMPAR_TAG_WORKSPACE), "workspace"));
    CHECK(!strcmp(llmpar_tag_name(LLMPAR_TAG_COUNT), "?"));
}

TEST_LIST(T_(usage), T_(limit), T_(out_of_memory), T_(idle_blocks_go_back_to_a_full_device), T_(random_traffic), T_(blocks_are_cut_and_joined), T_(a_step_that_repeats), T_(a_piece_is_reserved), T_(names))
