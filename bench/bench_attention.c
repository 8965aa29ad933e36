/* bench_attention: causal attention, forward and backward, level by level, beside the arithmetic peak of that level (peak.h). FLOPs are counted causally:
   2 T^2 E a head forward, 2.5 times that backward. One sequence; heads/kv heads; one thread does few of the heads, so that a run stays short. */
#include "cpu.h"
#include "peak.h"

static const char usage[] =
    "bench_attention [--json FILE] [--pairs N] [LEVEL [THREADS [T HEADS KV_HEADS E [DTYPE]]]]\n"
    "Without arguments: the table, every level of this processor, 1 and 2 threads.\n"
    "  --json FILE   the table as JSON, too\n"
    "  --pairs N     readings of a line (default 15)\n"
    "  LEVEL         portable, avx2, avx512 or avx512bf16, as far as this processor has it\n"
    "  THREADS       1 or 2\n"
    "  T ..          one shape: positions, query heads, heads of keys and values, elements of a head; DTYPE f32, bf16 or f16\n";

typedef struct work { llmpar_device *device; llmpar_attention_backward_args args; double flops; int backward; } work;

/* All tensors of a measurement lie in one block, as a model's do in its arena. */
static char *arena;
static size_t arena_at, arena_size;
static void *room(size_t bytes)
{
    void *memory = arena + arena_at;
    arena_at += (bytes + 4095) / 4096 * 4096;
    if (arena_at > arena_size) { fprintf(stderr, "bench_attention: an arena of %zu MB is too small\n", arena_size >> 20); exit(1); }
    return memory;
}

static void *numbers(llmpar_dtype dtype, int64_t count)
{
    void *memory = room((size_t)count * llmpar_dtype_size(dtype));
    uint32_t state = 1;
    for (int64_t i = 0; i < count; i++) {
        float x;
        state = state * 1664525u + 1013904223u;
        x = ((float)(state >> 8) / 16777216.0f - 0.5f) * 3;
        if (dtype == LLMPAR_F32) ((float *)memory)[i] = x;
        else llmpar_convert((uint16_t *)memory + i, dtype, &x, LLMPAR_F32, 1);
    }
    return memory;
}

static double attention(void *user)
{
    work *w = (work *)user;
    double start = bench_now();
    if (w->backward ? w->device->attention_backward(w->device, NULL, &w->args) : w->device->attention(w->device, NULL, &w->args.forward)) { fprintf(stderr, "bench_attention: %s\n", w->device->error->text); exit(1); }
    return w->flops / (bench_now() - start);
}

/* Adds a row forward and one backward. */
static void measure(bench_results *results, llmpar_device *device, const char *level, int threads, int64_t t, int64_t heads, int64_t kv, int64_t e, llmpar_dtype dtype, int pairs, double bar)
{
    bench_fma_of peak = { bench_fma_kind(level, 0), threads };
    int64_t nq = t * heads * e, nk = t * kv * e;
    size_t need;
    work w;
    llmpar_attention_args *a = &w.args.forward;
    void *memory[8];
    memset(&w, 0, sizeof w);
    w.device = device;
    for (int i = 0; i < 8; i++) memory[i] = numbers(dtype, i < 4 ? nq : nk);
    a->batch = 1; a->tq = a->tk = a->tk_stride = t; a->heads = heads; a->kv_heads = kv; a->head_dim = e; a->scale = 1 / llmpar_sqrt_f64((double)e); a->dtype = dtype;
    a->ldq = a->ldo = heads * e;
    a->ldk = a->ldv = kv * e;
    a->q = memory[0]; a->out = memory[1]; w.args.dout = memory[2]; w.args.dq = memory[3];
    a->k = memory[4]; a->v = memory[5]; w.args.dk = memory[6]; w.args.dv = memory[7];
    a->lse = room((size_t)(t * heads) * 4);
    need = device->attention_backward_workspace(device, &w.args);
    a->workspace_bytes = device->attention_workspace(device, a);
    if (a->workspace_bytes < need) a->workspace_bytes = need;
    a->workspace = room(a->workspace_bytes);
    for (w.backward = 0; w.backward < 2; w.backward++) {
        char name[120];
        w.flops = (w.backward ? 5.0 : 2.0) * (double)t * (double)t * (double)e * (double)heads;
        snprintf(name, sizeof name, "%s %s T %d E %d heads %d/%d %s, %d thread%s", level, w.backward ? "backward" : "forward", (int)t, (int)e, (int)heads, (int)kv, llmpar_dtype_name(dtype), threads, threads > 1 ? "s" : "");
        bench_row(results, name, "GFLOP/s", 1e-9, bench_fma_name(peak.kind), bench_pairs(bench_fma, &peak, attention, &w, pairs), bar);
    }
    arena_at = 0;
}

int main(int argc, char **argv)
{
    static const int64_t shapes[][4] = { { 512, 12, 12, 64 }, { 512, 8, 2, 128 }, { 2048, 12, 12, 64 }, { 2048, 8, 2, 64 }, { 2048, 8, 2, 128 } }; /* T, heads, kv heads, E */
    llmpar_cpu_level only = LLMPAR_CPU_DEFAULT;
    static const char *const names[] = { "T", "HEADS", "KV_HEADS", "E" };
    long shape[4] = { 0 };
    int pairs = 15, only_threads = 0;
    bench_results results;
    bench_open(&results, "attention", &argc, argv, usage, -1);
    if (argc > 1 && !strcmp(argv[1], "--pairs")) {
        pairs = (int)bench_number("--pairs", argc > 2 ? argv[2] : "", 1, 1000);
        argv += 2;
        argc -= 2;
    }
    if (argc > 1) only = bench_level("LEVEL", argv[1]);
    if (argc > 2) only_threads = (int)bench_number("THREADS", argv[2], 1, 2);
    if ((argc > 3 && argc < 7) || argc > 8) bench_refuse("arguments", argv[3], "T HEADS KV_HEADS E [DTYPE], see --help");
    for (int i = 3; i < argc && i < 7; i++) shape[i - 3] = bench_number(names[i - 3], argv[i], 1, i == 3 ? 1 << 16 : 1024);
    if (argc > 3 && shape[1] % shape[2]) bench_refuse("HEADS", argv[4], "a multiple of KV_HEADS");
    llmpar_dtype dtype = argc > 7 ? bench_dtype("DTYPE", argv[7]) : LLMPAR_F32;
    for (int threads = 1; threads <= (bench_cores() > 1 || only_threads > 1 ? 2 : 1); threads++) for (int level = (int)llmpar_cpu_best_level(); level >= (int)LLMPAR_CPU_PORTABLE; level--) {
        llmpar_heap heap;
        llmpar_error error;
        llmpar_cpu_desc desc;
        llmpar_device *device = NULL;
        if ((only != LLMPAR_CPU_DEFAULT && level != (int)only) || (only_threads && threads != only_threads)) continue;
        if (only == LLMPAR_CPU_DEFAULT && threads > 1 && level != (int)llmpar_cpu_best_level()) continue;
        llmpar_heap_init(&heap, NULL);
        llmpar_error_clear(&error);
        arena_size = (size_t)256 << 20;
        arena = (char *)llmpar_heap_alloc(&heap, arena_size, 1);
        if (!arena) { fprintf(stderr, "bench_attention: no memory\n"); return 1; }
        memset(&desc, 0, sizeof desc);
        desc.level = (llmpar_cpu_level)level;
        desc.threads = threads;
        desc.processors = bench_places(threads);
        if (llmpar_cpu_create(&heap, &error, &desc, &device)) { fprintf(stderr, "bench_attention: %s\n", error.text); return 1; }
        if (argc > 6) measure(&results, device, llmpar_cpu_level_name((llmpar_cpu_level)level), threads, shape[0], shape[1], shape[2], shape[3], dtype, pairs, 0);
        else for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) for (int half = 0; half < 2; half++) {
            const int64_t *d = shapes[s], part = threads > 1 ? 1 : d[0] > 512 ? (d[2] > 2 ? 6 : 2) : 2, kv = d[2] / part > 0 ? d[2] / part : 1, heads = d[1] / d[2] * kv;
            if (level == (int)LLMPAR_CPU_PORTABLE && (half || d[0] > 512)) continue;
            if (half && d[2] != 2) continue;
            measure(&results, device, llmpar_cpu_level_name((llmpar_cpu_level)level), threads, d[0], heads, kv, d[3], half ? LLMPAR_BF16 : LLMPAR_F32, pairs, d[0] == 2048 && !half && level > (int)LLMPAR_CPU_PORTABLE ? 0.7 : 0);
        }
        llmpar_cpu_destroy(device);
        llmpar_heap_free(&heap, arena);
    }
    bench_close(&results);
    return 0;
}
