/* Weights with interleaved rows: their layout by a plain loop and back again, products of few rows with the bits that rows give, and what is refused. Text that is generated from them: test_generate.c. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#include "bits.h"
#include "test.h"

static int64_t below(int64_t n) { return (int64_t)(random_bits() % (uint64_t)n); }

/* ---- devices ---- */

typedef struct machine { llmpar_heap heap; llmpar_error error; llmpar_device *device; llmpar_stream *stream; } machine;

static void machine_begin(machine *w, int level, int threads)
{
    llmpar_cpu_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.level = (llmpar_cpu_level)level;
    desc.threads = threads;
    llmpar_heap_init(&w->heap, NULL);
    llmpar_error_clear(&w->error);
    CHECK_OK(llmpar_cpu_create(&w->heap, &w->error, &desc, &w->device));
    CHECK_OK(w->device->stream_create(w->device, "test", &w->stream));
}
static void machine_end(machine *w)
{
    w->device->stream_destroy(w->device, w->stream);
    llmpar_cpu_destroy(w->device);
    CHECK_INT(w->heap.live, 0);
}
/* A failure sticks to its stream. */
static void machine_forget(machine *w)
{
    w->device->stream_destroy(w->device, w->stream);
    llmpar_error_clear(&w->error);
    CHECK_OK(w->device->stream_create(w->device, "test", &w->stream));
}

static const llmpar_dtype dtypes[] = { LLMPAR_F32, LLMPAR_BF16, LLMPAR_F16 };
#define FOR_LEVELS(level) for (int level = (int)LLMPAR_CPU_PORTABLE; level <= (int)llmpar_cpu_best_level(); level++)
/* r: rows taken together; types without the product are another test's */
#define FOR_DTYPES(w, dtype, r) for (int dtype##_at = 0; dtype##_at < 3; dtype##_at++) for (llmpar_dtype dtype = dtypes[dtype##_at]; dtype; dtype = (llmpar_dtype)0) for (int64_t r = llmpar_device_interleaved_rows((w)->device, dtype); r > 0; r = 0)

/* ---- memory: what is behind it ends where an allocation ends, so that AddressSanitizer sees a read beside it ---- */

typedef struct room { unsigned char *all, *base; size_t bytes, before; } room;

static room room_of(size_t bytes, size_t before)
{
    room m = { NULL, NULL, bytes, before };
    void *memory = NULL;
    if (posix_memalign(&memory, 64, before + bytes + !(before + bytes))) exit(1);
    m.all = (unsigned char *)memory;
    m.base = m.all + before;
    memset(m.all, 0xff, before + bytes); /* no number, in every type */
    return m;
}

static void put(void *base, int64_t i, llmpar_dtype dtype, float value)
{
    uint16_t half = dtype == LLMPAR_BF16 ? llmpar_f32_to_bf16(value) : llmpar_f32_to_f16(value);
    if (dtype == LLMPAR_F32) memcpy((char *)base + 4 * i, &value, 4);
    else memcpy((char *)base + 2 * i, &half, 2);
}
static float value(void) /* some of them of no size, or of hardly any */
{
    static const float small[] = { 0.0f, -0.0f, 1e-30f, -1e-30f, 3e-41f, 6e-8f };
    return below(16) ? (float)((double)(random_bits() >> 40) / 8388608.0 - 1.0) : small[below(6)];
}

/* ---- the layout, as its definition has it ---- */

static void lay_out(void *out, const void *in, int64_t n, int64_t k, int64_t r, llmpar_dtype dtype)
{
    int64_t words = k * (int64_t)llmpar_dtype_size(dtype) / 4, at = 0, row;
    for (row = 0; row + r <= n; row += r)
        for (int64_t word = 0; word < words; word++)
            for (int64_t i = 0; i < r; i++) memcpy((char *)out + 4 * at++, (const char *)in + 4 * ((row + i) * words + word), 4);
    if (row < n && words) memcpy((char *)out + 4 * row * words, (const char *)in + 4 * row * words, (size_t)(4 * (n - row) * words));
}

/* Turns w; the workspace is exactly as large as asked for and full of NaN, and what is behind it must survive. */
static llmpar_status turn(machine *m, int64_t n, int64_t k, void *w, llmpar_dtype dtype, int back)
{
    llmpar_interleave_args args = { 0, k, NULL, dtype, 0, NULL, 0 };
    size_t bytes = m->device->interleave_workspace(m->device, &args), before = (size_t)below(64);
    room workspace = room_of(bytes + 64, before);
    args.n = n;
    args.w = w;
    args.back = back;
    args.workspace = workspace.base;
    args.workspace_bytes = bytes;
    llmpar_status status = m->device->interleave(m->device, m->stream, &args);
    if (!status) status = m->device->synchronize(m->device, m->stream);
    for (size_t i = 0; i < 64; i++)
        if (workspace.base[bytes + i] != 0xff) { TEST_FAIL("interleave wrote behind its workspace of %llu bytes", (unsigned long long)bytes); break; }
    free(workspace.all);
    return status;
}

static void check_layout(machine *m, llmpar_dtype dtype, int64_t r, int64_t n, int64_t k)
{
    size_t bytes = (size_t)(n * k) * llmpar_dtype_size(dtype), before = 64 + 4 * (size_t)below(16);
    room w = room_of(bytes + 64, before), want = room_of(bytes, 0), first = room_of(bytes, 0);
    for (size_t i = 0; i < bytes; i++) first.base[i] = (unsigned char)random_bits(); /* any bits, those of no number too */
    if (bytes) memcpy(w.base, first.base, bytes);
    lay_out(want.base, first.base, n, k, r, dtype);
    for (int back = 0; back < 2; back++) {
        CHECK_OK(turn(m, n, k, w.base, dtype, back));
        if (bytes && memcmp(w.base, back ? first.base : want.base, bytes)) TEST_FAIL("%s %s n=%d k=%d: not the layout%s", m->device->name, llmpar_dtype_name(dtype), (int)n, (int)k, back ? " of rows again" : "");
        for (size_t i = 0; i < before; i++)
            if (w.all[i] != 0xff) { TEST_FAIL("interleave n=%d k=%d wrote before w", (int)n, (int)k); break; }
        for (size_t i = 0; i < 64; i++)
            if (w.base[bytes + i] != 0xff) { TEST_FAIL("interleave n=%d k=%d wrote behind w", (int)n, (int)k); break; }
    }
    free(w.all);
    free(want.all);
    free(first.all);
}

TEST(layout)
{
    FOR_LEVELS(level) for (int threads = 1; threads <= 3; threads++) {
        machine m;
        machine_begin(&m, level, threads);
        FOR_DTYPES(&m, dtype, r) {
            const int64_t n[] = { 0, 1, r - 1, r, r + 1, 2 * r - 1, 2 * r, 3 * r + 2, 5 * r + 7, 16 * r, 37 * r + 1 }, words[] = { 0, 1, 2, 3, 4, 7, 15, 16, 17, 31, 33, 64, 101 };
            for (int i = 0; i < (int)(sizeof n / sizeof n[0]); i++)
                for (int j = 0; j < (int)(sizeof words / sizeof words[0]); j++) check_layout(&m, dtype, r, n[i], words[j] * 4 / (int64_t)llmpar_dtype_size(dtype));
            CHECK_OK(turn(&m, 0, 64, NULL, dtype, 0));
            CHECK_OK(turn(&m, 64, 0, NULL, dtype, 0));
            CHECK_OK(turn(&m, 64, 0, NULL, dtype, 1));
            for (int round = 0; round < test_rounds(20); round++) check_layout(&m, dtype, r, below(9 * r), (1 + below(700)) * 4 / (int64_t)llmpar_dtype_size(dtype));
        }
        machine_end(&m);
    }
}

/* ---- products ---- */

enum { SEGMENTS = 64, WEIGHTS = 4 };

typedef struct weight { int64_t k; room rows, some, mixed; } weight; /* [n, k]; some: the columns of segments that are given as rows; mixed: those of the others, interleaved */
typedef struct product {
    llmpar_gemm_args args;
    llmpar_gemm_segment segments[SEGMENTS]; /* with b in rows; which are to be interleaved is said already */
    int of[SEGMENTS];
    room a[SEGMENTS];
    weight weights[WEIGHTS];
    room bias;
    int weight_count;
} product;

/* Pieces of a segment of every weight each, side by side; lengths at most `most` times `grain` words. far: from another column than the first on; 2: not side by side. */
static void product_begin(product *p, llmpar_dtype dtype, int64_t m, int64_t n, int64_t r, int32_t pieces, int weights, int64_t grain, int64_t most, int far, int bias)
{
    int64_t size = (int64_t)llmpar_dtype_size(dtype), unit = 4 / size;
    int some = !below(4); /* the others are given as rows */
    memset(p, 0, sizeof *p);
    p->args.m = m;
    p->args.n = n;
    p->args.pieces = pieces;
    p->args.kind = LLMPAR_GEMM_NT;
    p->args.dtype = dtype;
    p->args.segments = p->segments;
    p->weight_count = weights;
    for (int i = 0; i < weights; i++) p->weights[i].k = far ? unit * below(9) : 0;
    for (int32_t piece = 0; piece < pieces; piece++)
        for (int i = 0; i < weights + (bias && piece == pieces - 1); i++) {
            int s = p->args.segment_count++;
            llmpar_gemm_segment *segment = &p->segments[s];
            segment->piece = piece;
            segment->k = i == weights ? 1 : below(8) ? unit * grain * (1 + below(most)) : 0;
            p->of[s] = i;
            if (i < weights) {
                segment->begin = p->weights[i].k;
                p->weights[i].k += segment->k + (far > 1 ? unit * below(3) : 0);
            }
            segment->interleaved = i < weights && (!some || below(3) > 0);
            segment->lda = i < weights ? segment->k + below(5) : 0;
            p->a[s] = room_of((size_t)((m - 1) * segment->lda + segment->k) * (size_t)size, (size_t)(size * below(33)));
            segment->a = p->a[s].base;
            for (int64_t row = 0; row < m; row++)
                for (int64_t j = 0; j < segment->k; j++) put(p->a[s].base, row * segment->lda + j, dtype, i < weights ? value() : 1);
        }
    for (int i = 0; i < weights; i++) {
        weight *w = &p->weights[i];
        w->rows = room_of((size_t)(n * w->k * size), 4 * (size_t)below(16));
        w->some = room_of(w->rows.bytes, 4 * (size_t)below(16));
        w->mixed = room_of(w->rows.bytes, 4 * (size_t)below(16));
        room others = room_of(w->rows.bytes, 0);
        for (int s = 0; s < p->args.segment_count; s++) /* columns of no segment are no numbers */
            for (int64_t row = 0; row < n && p->of[s] == i; row++)
                for (int64_t j = 0; j < p->segments[s].k; j++) {
                    float element = value();
                    put(w->rows.base, row * w->k + p->segments[s].begin + j, dtype, element);
                    put(p->segments[s].interleaved ? others.base : w->some.base, row * w->k + p->segments[s].begin + j, dtype, element);
                }
        lay_out(w->mixed.base, others.base, n, w->k, r, dtype);
        free(others.all);
    }
    if (bias) {
        p->bias = room_of((size_t)(n * size), (size_t)(size * below(9)));
        for (int64_t i = 0; i < n; i++) put(p->bias.base, i, dtype, value());
    }
    for (int s = 0; s < p->args.segment_count; s++) {
        p->segments[s].b = p->of[s] < weights ? p->weights[p->of[s]].rows.base + p->segments[s].begin * size : p->bias.base;
        p->segments[s].ldb = p->of[s] < weights ? p->weights[p->of[s]].k : 1;
    }
}

static void product_end(product *p)
{
    for (int i = 0; i < p->weight_count; i++) {
        free(p->weights[i].rows.all);
        free(p->weights[i].some.all);
        free(p->weights[i].mixed.all);
    }
    for (int s = 0; s < p->args.segment_count; s++) free(p->a[s].all);
    free(p->bias.all);
}

/* The segments of a product of interleaved weights, or of the same as rows, where `begin` has no meaning. */
static void take_layout(const product *p, int mixed, llmpar_gemm_segment *segments)
{
    memcpy(segments, p->segments, sizeof p->segments);
    for (int s = 0; s < p->args.segment_count; s++) {
        if (!mixed || p->of[s] == p->weight_count) {
            segments[s].interleaved = 0;
            continue;
        }
        const weight *w = &p->weights[p->of[s]];
        segments[s].b = segments[s].interleaved ? w->mixed.base : w->some.base + segments[s].begin * (int64_t)llmpar_dtype_size(p->args.dtype);
    }
}

static llmpar_status run_product(machine *w, const llmpar_gemm_args *args)
{
    llmpar_gemm_args copy = *args, ask = *args;
    llmpar_gemm_segment lengths[SEGMENTS];
    memset(lengths, 0, sizeof lengths);
    for (int s = 0; s < args->segment_count; s++) { /* all that may be read of a segment */
        lengths[s].k = args->segments[s].k;
        lengths[s].piece = args->segments[s].piece;
    }
    ask.segments = lengths;
    ask.c = NULL;
    size_t bytes = w->device->gemm_workspace(w->device, &ask);
    room workspace = room_of(bytes + 64, 0);
    copy.workspace = workspace.base;
    copy.workspace_bytes = bytes;
    llmpar_status status = w->device->gemm(w->device, w->stream, &copy);
    for (size_t i = 0; i < 64; i++)
        if (workspace.base[bytes + i] != 0xff) { TEST_FAIL("gemm wrote behind its workspace of %llu bytes", (unsigned long long)bytes); break; }
    free(workspace.all);
    return status;
}

/* The same bits as with rows, and nothing beside c. */
static int check_product(machine *w, product *p)
{
    llmpar_gemm_segment segments[SEGMENTS];
    llmpar_gemm_args args = p->args;
    int64_t ldc = args.n + below(4) + !args.n, size = (int64_t)llmpar_dtype_size(args.out_dtype), elements = args.m * ldc + 24, offset = below(12), failures = test_failures;
    unsigned char *c[2];
    for (int mixed = 0; mixed < 2; mixed++) {
        c[mixed] = (unsigned char *)malloc((size_t)(elements * size));
        memset(c[mixed], 0xa5, (size_t)(elements * size));
        args.c = c[mixed] + offset * size;
        args.ldc = ldc;
        if (args.accumulate) {
            uint64_t again = random_state;
            random_state = 5;
            for (int64_t i = 0; i < args.m; i++)
                for (int64_t j = 0; j < args.n; j++) put(args.c, i * ldc + j, args.out_dtype, value());
            random_state = again;
        }
        take_layout(p, mixed, segments);
        args.segments = segments;
        llmpar_status status = run_product(w, &args);
        if (status) TEST_FAIL("%s: %s", llmpar_status_string(status), w->error.text);
    }
    for (int64_t i = 0; i < elements; i++) {
        int64_t at = i - offset;
        int inside = at >= 0 && at / ldc < args.m && at % ldc < args.n, poison = 1;
        for (int64_t b = 0; b < size; b++) poison &= c[1][i * size + b] == 0xa5;
        if (inside ? !memcmp(c[0] + i * size, c[1] + i * size, (size_t)size) : poison) continue;
        TEST_FAIL("%s %s m=%d n=%d pieces=%d segments=%d weights=%d out %s accumulate=%d: c[%d,%d] %s", w->device->name, llmpar_dtype_name(args.dtype), (int)args.m, (int)args.n, (int)args.pieces, (int)args.segment_count, p->weight_count,
            llmpar_dtype_name(args.out_dtype), args.accumulate, (int)(at / ldc), (int)(at % ldc), inside ? "is not that of rows" : "was written");
        break;
    }
    free(c[0]);
    free(c[1]);
    return test_failures == failures;
}

/* A product of m rows and n columns; the way that k is cut comes by turns. */
static int check_any(machine *w, llmpar_dtype dtype, int64_t r, int64_t m, int64_t n, int form, int far, int64_t longer)
{
    static const struct { int32_t pieces; int weights; int64_t grain, most; int bias; } forms[] = { { 1, 1, 1, 60, 0 }, { 8, 1, 1, 20, 0 }, { 1, 1, 1, 60, 1 }, { 3, 2, 1, 12, 0 }, { 8, 1, 16 /* whole lines */, 3, 0 }, { 19, 1, 1, 6, 0 }, { 1, 3, 1, 30, 1 }, { 8, 2, 1, 9, 1 }, { 16, 1, 16, 2, 0 },
        { 17, 2, 1, 4, 0 }, { 1, 1, 1, 300, 0 }, { 2, 1, 1, 100, 0 }, { 1, 1, 1, 1, 0 }, { 3, 1, 16, 4, 0 } };
    product p;
    int i = form % (int)(sizeof forms / sizeof forms[0]);
    product_begin(&p, dtype, m, n, r, forms[i].pieces, forms[i].weights, forms[i].grain, forms[i].most * longer, far, forms[i].bias);
    p.args.accumulate = forms[i].pieces == 1 && form % 3 == 0;
    p.args.out_dtype = p.args.accumulate || form % 2 ? llmpar_dtype_sum(dtype) : dtype;
    int fine = check_product(w, &p);
    product_end(&p);
    return fine;
}

TEST(products)
{
    FOR_LEVELS(level) for (int threads = 1; threads <= 3; threads++) {
        machine w;
        int form = level + threads;
        machine_begin(&w, level, threads);
        FOR_DTYPES(&w, dtype, r) {
            const int64_t n[] = { 0, 1, 2, r - 1, r, r + 1, 2 * r - 1, 2 * r, 2 * r + 1, 3 * r, 3 * r + r / 2, 4 * r - 1, 4 * r, 4 * r + 1, 5 * r, 5 * r + 3, 8 * r, 8 * r + r - 1, 9 * r + 5 };
            for (int64_t m = 1, fine = 1; m <= 16 && fine; m += test_rounds(4) < 4 ? 3 : 1)
                for (int i = 0; i < (int)(sizeof n / sizeof n[0]) && fine; i++, form++) fine = check_any(&w, dtype, r, m, n[i], form, form / 7 % 3, 1);
        }
        machine_end(&w);
    }
}

/* Segments of different weights are not side by side, though one begins at the column where the other ends. */
TEST(weights_of_their_own)
{
    enum { M = 3, K = 32 };
    FOR_LEVELS(level) {
        machine w;
        machine_begin(&w, level, 1);
        FOR_DTYPES(&w, dtype, r) {
            int64_t size = (int64_t)llmpar_dtype_size(dtype), n = 5 * r;
            float c[2][M * 5 * 16];
            room a = room_of((size_t)(M * 2 * K * size), 0), rows[2], mixed[2];
            for (int64_t i = 0; i < M * 2 * K; i++) put(a.base, i, dtype, value());
            for (int i = 0; i < 2; i++) {
                rows[i] = room_of((size_t)(n * 2 * K * size), 0);
                mixed[i] = room_of(rows[i].bytes, 0);
                for (int64_t j = 0; j < n * 2 * K; j++) put(rows[i].base, j, dtype, value());
                lay_out(mixed[i].base, rows[i].base, n, 2 * K, r, dtype);
            }
            for (int inter = 0; inter < 2; inter++) {
                llmpar_gemm_segment segments[2];
                llmpar_gemm_args args;
                memset(segments, 0, sizeof segments);
                memset(&args, 0, sizeof args);
                for (int i = 0; i < 2; i++) {
                    segments[i].a = a.base + i * K * size;
                    segments[i].b = inter ? mixed[i].base : rows[i].base + i * K * size;
                    segments[i].lda = segments[i].ldb = 2 * K;
                    segments[i].k = K;
                    segments[i].piece = i;
                    segments[i].interleaved = inter;
                    segments[i].begin = inter ? i * K : 0;
                }
                args.m = M;
                args.n = args.ldc = n;
                args.c = c[inter];
                args.segments = segments;
                args.segment_count = args.pieces = 2;
                args.kind = LLMPAR_GEMM_NT;
                args.dtype = dtype;
                args.out_dtype = LLMPAR_F32;
                CHECK_OK(run_product(&w, &args));
            }
            CHECK_BYTES(c[1], c[0], sizeof c[0][0] * (size_t)(M * n));
            free(a.all);
            for (int i = 0; i < 2; i++) free(rows[i].all), free(mixed[i].all);
        }
        machine_end(&w);
    }
}

/* Enough for several workers. */
TEST(large_products)
{
    FOR_LEVELS(level) for (int threads = 1; threads <= 3; threads++) {
        machine w;
        machine_begin(&w, level, threads);
        FOR_DTYPES(&w, dtype, r) {
            for (int round = 0, fine = 1; round < test_rounds(8) && fine; round++) fine = check_any(&w, dtype, r, 1 + below(16), 40 * r + below(30 * r), round + 5 * threads + level, round % 2, 8);
            for (int64_t m = 17, fine = 1; m < 60 && fine; m += 14) fine = check_any(&w, dtype, r, m, 5 * r + below(60 * r), (int)m + threads, m % 2 == 0, 1); /* rows by sixteens */
            check_any(&w, dtype, r, threads == 2 ? 1 : 3, (4 * 33 * threads + 5) * r + 3, threads + 4, 0, 1); /* more results than a worker holds back */
        }
        machine_end(&w);
    }
}

/* ---- what is refused, before anything is written ---- */

typedef struct refusal { const char *name; llmpar_status want; llmpar_dtype dtype; } refusal;

static void spoil_product(int which, llmpar_gemm_args *args, llmpar_gemm_segment *s)
{
    switch (which) {
    case 0: args->dtype = args->out_dtype = LLMPAR_I32; break;
    case 1: args->kind = LLMPAR_GEMM_NN; break;
    case 2: args->kind = LLMPAR_GEMM_TN; break;
    case 3: args->dtype = args->out_dtype = LLMPAR_F64; break;
    case 4: s->k = 63; break;
    case 5: s->ldb = 127; break;
    case 6: s->begin = 3; break;
    case 7: s->begin = -2; break;
    case 8: s->begin = 66; break; /* one word more than there is */
    case 9: args->workspace_bytes -= 1; break;
    default: break; /* a type without such weights at this level */
    }
}

static void refuse_product(machine *w, int which, const refusal *refused)
{
    llmpar_gemm_segment segments[2];
    llmpar_gemm_args args;
    room a = room_of(17 * 128 * 8, 0), b = room_of(64 * 128 * 8, 0), c = room_of(17 * 64 * 8, 0), workspace = room_of(1 << 20, 0);
    memset(segments, 0, sizeof segments);
    memset(&args, 0, sizeof args);
    memset(a.base, 0, a.bytes);
    memset(b.base, 0, b.bytes);
    args.m = 4;
    args.n = 35;
    args.ldc = 40;
    args.c = c.base;
    args.kind = LLMPAR_GEMM_NT;
    args.dtype = refused->dtype;
    args.out_dtype = llmpar_dtype_sum(refused->dtype);
    args.pieces = 1;
    args.segments = segments;
    args.segment_count = 2;
    for (int s = 0; s < 2; s++) {
        segments[s].a = a.base;
        segments[s].b = b.base;
        segments[s].lda = segments[s].ldb = 128;
        segments[s].k = 64;
    }
    segments[1].interleaved = 1;
    segments[1].begin = 64;
    args.workspace = workspace.base;
    args.workspace_bytes = which == 9 ? w->device->gemm_workspace(w->device, &args) : workspace.bytes;
    if (which != 9 || args.workspace_bytes) {
        spoil_product(which, &args, &segments[1]);
        llmpar_status status = w->device->gemm(w->device, w->stream, &args);
        if (status != refused->want || !w->error.text[0]) TEST_FAIL("gemm, %s, %s: got %s \"%s\", want %s", w->device->name, refused->name, llmpar_status_string(status), w->error.text, llmpar_status_string(refused->want));
        for (size_t i = 0; i < c.bytes; i++)
            if (c.base[i] != 0xff) { TEST_FAIL("gemm, %s, %s: c was written", w->device->name, refused->name); break; }
    }
    free(a.all);
    free(b.all);
    free(c.all);
    free(workspace.all);
    machine_forget(w);
}

static void refuse_layout(machine *m, int which, const refusal *refused)
{
    llmpar_interleave_args args = { 40, 64, NULL, refused->dtype, 0, NULL, 0 };
    room w = room_of(41 * 64 * 8, 0), workspace = room_of(1 << 20, 0);
    for (size_t i = 0; i < w.bytes; i++) w.base[i] = (unsigned char)(i * 7 % 251);
    args.w = w.base;
    args.workspace = workspace.base;
    args.workspace_bytes = which == 6 ? m->device->interleave_workspace(m->device, &args) - 1 : workspace.bytes;
    if (which == 0) args.k = 63;
    if (which == 1) args.n = -1;
    if (which == 2) args.k = -2;
    if (which == 3 || which == 4) args.w = w.base + 2;
    for (args.back = 0; args.back < 2; args.back++) {
        llmpar_status status = m->device->interleave(m->device, m->stream, &args);
        if (status != refused->want || !m->error.text[0]) TEST_FAIL("interleave, %s, %s: got %s \"%s\", want %s", m->device->name, refused->name, llmpar_status_string(status), m->error.text, llmpar_status_string(refused->want));
        for (size_t i = 0; i < w.bytes; i++)
            if (w.base[i] != (unsigned char)(i * 7 % 251)) { TEST_FAIL("interleave, %s, %s: w was written", m->device->name, refused->name); break; }
        machine_forget(m);
    }
    free(w.all);
    free(workspace.all);
}

TEST(refusals)
{
    static const refusal products[] = { { "i32", LLMPAR_ERR_UNSUPPORTED, LLMPAR_F32 }, { "NN", LLMPAR_ERR_ARGUMENT, LLMPAR_BF16 }, { "TN", LLMPAR_ERR_ARGUMENT, LLMPAR_F32 }, { "f64", LLMPAR_ERR_ARGUMENT, LLMPAR_F32 },
        { "half a word of k", LLMPAR_ERR_ARGUMENT, LLMPAR_BF16 }, { "half a word a row", LLMPAR_ERR_ARGUMENT, LLMPAR_BF16 }, { "from half a word on", LLMPAR_ERR_ARGUMENT, LLMPAR_BF16 }, { "columns before the first", LLMPAR_ERR_ARGUMENT, LLMPAR_F32 },
        { "columns behind the last", LLMPAR_ERR_ARGUMENT, LLMPAR_BF16 }, { "workspace", LLMPAR_ERR_ARGUMENT, LLMPAR_F32 } };
    static const refusal layouts[] = { { "half a word a row", LLMPAR_ERR_SHAPE, LLMPAR_BF16 }, { "n < 0", LLMPAR_ERR_SHAPE, LLMPAR_F32 }, { "k < 0", LLMPAR_ERR_SHAPE, LLMPAR_F32 }, { "half a word on, bf16", LLMPAR_ERR_ARGUMENT, LLMPAR_BF16 },
        { "half a word on, f32", LLMPAR_ERR_ARGUMENT, LLMPAR_F32 }, { "f64", LLMPAR_ERR_UNSUPPORTED, LLMPAR_F64 }, { "workspace", LLMPAR_ERR_ARGUMENT, LLMPAR_F32 }, { "i32", LLMPAR_ERR_UNSUPPORTED, LLMPAR_I32 } };
    static const refusal no_product = { "no such product", LLMPAR_ERR_ARGUMENT, LLMPAR_F16 }, no_layout = { "no such product", LLMPAR_ERR_UNSUPPORTED, LLMPAR_F16 };
    FOR_LEVELS(level) {
        machine w;
        machine_begin(&w, level, 2);
        for (int i = 0; i < (int)(sizeof products / sizeof products[0]); i++) refuse_product(&w, i, &products[i]);
        for (int i = 0; i < (int)(sizeof layouts / sizeof layouts[0]); i++) refuse_layout(&w, i, &layouts[i]);
        CHECK_INT(llmpar_device_interleaved_rows(w.device, LLMPAR_F64), 0);
        if (!llmpar_device_interleaved_rows(w.device, LLMPAR_F16)) {
            refuse_product(&w, 100, &no_product);
            refuse_layout(&w, 100, &no_layout);
        }
        machine_end(&w);
    }
}

/* A table of somebody else, of any age. */
TEST(tables_without_the_slots)
{
    machine w;
    machine_begin(&w, 0, 1);
    int has = llmpar_device_interleaved_rows(w.device, LLMPAR_F32) > 0;
    const size_t sizes[] = { offsetof(llmpar_device, region_begin), offsetof(llmpar_device, interleaved_rows), offsetof(llmpar_device, interleave), offsetof(llmpar_device, interleave_workspace) };
    for (int i = 0; i < 4; i++) {
        llmpar_device device = *w.device;
        device.size = (uint32_t)sizes[i];
        CHECK_INT(llmpar_device_interleaved_rows(&device, LLMPAR_F32), 0);
    }
    llmpar_device device = *w.device;
    device.interleaved_rows = NULL;
    CHECK_INT(llmpar_device_interleaved_rows(&device, LLMPAR_F32), 0);
    device.interleave = NULL;
    device.interleave_workspace = NULL;
    CHECK_INT(llmpar_device_interleaved_rows(&device, LLMPAR_F32), 0);
    machine_end(&w);
    if (!has) TEST_SKIP("this processor has no such product");
}

TEST_LIST(T_(layout), T_(products), T_(weights_of_their_own), T_(large_products), T_(refusals), T_(tables_without_the_slots))
