/* bench_gemm: the matrix product beside the arithmetic peak of its dispatch level, taken before and after each run (bench.h, peak.h); one core, but for
   the lines that say otherwise, and 8 exact pieces, but for those that compare with one. */
#include "cpu.h"
#include "peak.h"

static const char usage[] =
    "bench_gemm [--json FILE] [LEVEL [KIND M N K [PIECES [DTYPE [THREADS]]]]]\n"
    "Without KIND: the table, of LEVEL, or of the best level and of AVX2.\n"
    "  --json FILE   the table as JSON, too\n"
    "  LEVEL         portable, avx2, avx512 or avx512bf16, as far as this processor has it\n"
    "  KIND          nt (x w^T), nn (dy w) or tn (dy^T x)\n"
    "  M N K         rows and columns of the result, and length of the sums\n"
    "  PIECES        of each sum, 1 .. 64 (default 8)\n"
    "  DTYPE         f32 (default), bf16 or f16\n"
    "  THREADS       1 (default) or 2\n";

enum { MOST_PIECES = 64 };
static const char *const kind_names[] = { "?", "nt", "nn", "tn" };

/* One product, ready to be run again and again. Its memory is one block, in which the first huge page begins the operands: so does a trainer's, where tensors lie in one large piece. */
typedef struct product {
    llmpar_device *device;
    llmpar_gemm_args args;
    llmpar_gemm_segment segments[MOST_PIECES];
    void *memory;
    size_t bytes;
    double flops;
} product;

static void fill(char *out, llmpar_dtype dtype, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        float x = (float)((i * 2654435761u) % 1000) * 1e-3f - 0.5f;
        if (dtype == LLMPAR_F32) ((float *)(void *)out)[i] = x;
        else ((uint16_t *)(void *)out)[i] = dtype == LLMPAR_BF16 ? llmpar_f32_to_bf16(x) : llmpar_f32_to_f16(x);
    }
}

/* The summed dim in `pieces` equal pieces. */
static void product_begin(product *p, llmpar_device *device, llmpar_gemm_kind kind, llmpar_dtype dtype, int64_t m, int64_t n, int64_t k, int32_t pieces)
{
    const size_t huge = (size_t)2 << 20;
    int64_t size = (int64_t)llmpar_dtype_size(dtype);
    size_t a_bytes = (size_t)(m * k * size + 63) / 64 * 64, b_bytes = (size_t)(n * k * size + 63) / 64 * 64, c_bytes = (size_t)(m * n * 4 + 63) / 64 * 64;
    char *at;
    memset(p, 0, sizeof *p);
    p->device = device;
    p->flops = 2.0 * (double)m * (double)n * (double)k;
    p->args.m = m;
    p->args.n = n;
    p->args.ldc = n;
    p->args.segments = p->segments;
    p->args.segment_count = p->args.pieces = pieces;
    p->args.kind = kind;
    p->args.dtype = dtype;
    for (int32_t i = 0; i < pieces; i++) {
        llmpar_gemm_segment *s = &p->segments[i];
        s->piece = i;
        s->k = llmpar_piece_begin(i + 1, k, pieces) - llmpar_piece_begin(i, k, pieces);
        s->lda = kind == LLMPAR_GEMM_TN ? m : k;
        s->ldb = kind == LLMPAR_GEMM_NT ? k : n;
    }
    p->args.workspace_bytes = device->gemm_workspace(device, &p->args);
    p->bytes = a_bytes + b_bytes + c_bytes + p->args.workspace_bytes + 2 * huge;
    if (device->alloc(device, p->bytes, &p->memory)) { fprintf(stderr, "%s\n", device->error->text); exit(1); }
    at = (char *)p->memory + (huge - (uintptr_t)p->memory % huge) % huge;
    fill(at, dtype, m * k);
    fill(at + a_bytes, dtype, n * k);
    p->args.c = at + a_bytes + b_bytes;
    p->args.workspace = at + a_bytes + b_bytes + c_bytes;
    for (int32_t i = 0; i < pieces; i++) {
        int64_t first = llmpar_piece_begin(i, k, pieces);
        p->segments[i].a = at + (kind == LLMPAR_GEMM_TN ? first * m : first) * size;
        p->segments[i].b = at + a_bytes + (kind == LLMPAR_GEMM_NT ? first : first * n) * size;
    }
}

static void product_end(product *p) { p->device->free(p->device, p->memory, p->bytes); }

/* FLOPs a second. Small products are repeated until a reading lasts a millisecond. */
static double product_rate(void *user)
{
    product *p = (product *)user;
    double start = bench_now(), seconds, flops = 0;
    do {
        if (p->device->gemm(p->device, NULL, &p->args)) { fprintf(stderr, "%s\n", p->device->error->text); exit(1); }
        flops += p->flops;
        seconds = bench_now() - start;
    } while (seconds < BENCH_SLICE);
    return flops / seconds;
}

/* Enough pairs for a quiet median, in about half a second, but at least 5. */
static int pair_count(double flops, int threads)
{
    double seconds = flops / (1e11 * threads) + 2e-3, count = 0.4 / seconds;
    return count < 5 ? 5 : count > 101 ? 101 : (int)count | 1;
}

typedef struct cpu_of { llmpar_heap heap; llmpar_error error; llmpar_device *device; const char *level; int threads; } cpu_of;

static void cpu_begin(cpu_of *cpu, llmpar_cpu_level level, int threads)
{
    llmpar_cpu_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.level = level;
    desc.threads = threads;
    desc.processors = bench_places(threads);
    llmpar_heap_init(&cpu->heap, NULL);
    llmpar_error_clear(&cpu->error);
    if (llmpar_cpu_create(&cpu->heap, &cpu->error, &desc, &cpu->device)) { fprintf(stderr, "%s\n", cpu->error.text); exit(1); }
    cpu->level = llmpar_cpu_level_name(level);
    cpu->threads = threads;
}

static void against_peak(bench_results *results, cpu_of *cpu, llmpar_gemm_kind kind, llmpar_dtype dtype, int64_t m, int64_t n, int64_t k, int32_t pieces, double bar)
{
    bench_fma_of peak = { bench_fma_kind(cpu->level, dtype == LLMPAR_BF16), cpu->threads };
    char name[120];
    product p;
    product_begin(&p, cpu->device, kind, dtype, m, n, k, pieces);
    snprintf(name, sizeof name, "%s %s %s %lld x %lld x %lld, %d piece%s%s", cpu->level, llmpar_dtype_name(dtype), kind_names[kind], (long long)m, (long long)n, (long long)k, (int)pieces,
             pieces == 1 ? "" : "s", cpu->threads == 2 ? ", 2 threads" : "");
    bench_row(results, name, "GFLOP/s", 1e-9, bench_fma_name(peak.kind), bench_pairs(bench_fma, &peak, product_rate, &p, pair_count(p.flops, cpu->threads)), bar);
    product_end(&p);
}

/* The rate of `of` as a part of that of `bound`. */
static void beside(bench_results *results, const char *name, const char *bound_name, product *of, product *bound, double bar)
{
    bench_row(results, name, "GFLOP/s", 1e-9, bound_name, bench_pairs(product_rate, bound, product_rate, of, pair_count(of->flops + bound->flops, 1)), bar);
    product_end(of);
    product_end(bound);
}

static void table(bench_results *results, llmpar_cpu_level level, int short_one)
{
    static const int64_t rows[] = { 128, 256, 512, 2048 }, weights[][2] = { { 768, 768 }, { 768, 2048 }, { 2048, 768 }, { 2048, 2048 }, { 2048, 8192 }, { 8192, 2048 } };
    static const int64_t odd[][3] = { { 131, 769, 773 }, { 257, 2053, 769 }, { 509, 773, 2039 }, { 2053, 2039, 2063 } };
    cpu_of cpu, two;
    double bar = level >= LLMPAR_CPU_AVX512 ? 0.92 : 0.85;
    int bf16_units = level >= LLMPAR_CPU_AVX512 && bench_fma_kind(llmpar_cpu_level_name(level), 1) == BENCH_AVX512_BF16;
    cpu_begin(&cpu, level, 1);
    cpu_begin(&two, level, 2);
    for (size_t m = short_one ? 2 : 0; m < sizeof rows / sizeof rows[0]; m++)
        for (size_t w = 0; w < sizeof weights / sizeof weights[0]; w++)
            for (int kind = 1; kind <= 3; kind++)
                if (!short_one || w == 0 || w == 3) against_peak(results, &cpu, (llmpar_gemm_kind)kind, LLMPAR_F32, rows[m], weights[w][1], weights[w][0], 8, bar);
    for (size_t o = 0; o < sizeof odd / sizeof odd[0]; o++)
        for (int kind = 1; kind <= 3; kind++) against_peak(results, &cpu, (llmpar_gemm_kind)kind, LLMPAR_F32, odd[o][0], odd[o][1], odd[o][2], 8, 0.80);
    for (int kind = 1; kind <= 3; kind++) {
        for (int large = 0; large < 2; large++) {
            int64_t m = large ? 2048 : 512, d = large ? 2048 : 768;
            char name[120];
            product eight, one;
            against_peak(results, &cpu, (llmpar_gemm_kind)kind, LLMPAR_BF16, m, d, d, 8, bf16_units ? 0.75 : 0.85);
            product_begin(&eight, cpu.device, (llmpar_gemm_kind)kind, LLMPAR_F32, m, d, d, 8);
            product_begin(&one, cpu.device, (llmpar_gemm_kind)kind, LLMPAR_F32, m, d, d, 1);
            snprintf(name, sizeof name, "%s %s %lld x %lld x %lld, 8 pieces", cpu.level, kind_names[kind], (long long)m, (long long)d, (long long)d);
            beside(results, name, "1 piece", &eight, &one, 0.95);
        }
        if (bench_cores() >= 2) {
            char name[120];
            product both, one;
            against_peak(results, &two, (llmpar_gemm_kind)kind, LLMPAR_F32, 2048, 2048, 2048, 8, bar);
            product_begin(&both, two.device, (llmpar_gemm_kind)kind, LLMPAR_F32, 1024, 768, 768, 8);
            product_begin(&one, cpu.device, (llmpar_gemm_kind)kind, LLMPAR_F32, 1024, 768, 768, 8);
            snprintf(name, sizeof name, "%s %s 1024 x 768 x 768, 2 threads", cpu.level, kind_names[kind]);
            beside(results, name, "1 thread", &both, &one, 1.85);
        }
    }
    llmpar_cpu_destroy(cpu.device);
    llmpar_cpu_destroy(two.device);
}

int main(int argc, char **argv)
{
    bench_results results;
    llmpar_cpu_level level = llmpar_cpu_best_level();
    bench_open(&results, "gemm", &argc, argv, usage, 8);
    if (argc > 1) level = bench_level("LEVEL", argv[1]);
    if (argc > 2 && argc < 6) bench_refuse("arguments", argv[2], "KIND M N K, see --help");
    if (argc > 5) {
        cpu_of cpu;
        int64_t size[3];
        int kind = 1;
        while (kind < 3 && strcmp(argv[2], kind_names[kind])) kind++;
        if (strcmp(argv[2], kind_names[kind])) bench_refuse("KIND", argv[2], "nt, nn or tn");
        for (int i = 0; i < 3; i++) size[i] = bench_number(i == 0 ? "M" : i == 1 ? "N" : "K", argv[3 + i], 1, 1 << 20);
        int32_t pieces = argc > 6 ? (int32_t)bench_number("PIECES", argv[6], 1, MOST_PIECES) : 8;
        llmpar_dtype dtype = argc > 7 ? bench_dtype("DTYPE", argv[7]) : LLMPAR_F32;
        cpu_begin(&cpu, level, argc > 8 ? (int)bench_number("THREADS", argv[8], 1, 2) : 1);
        against_peak(&results, &cpu, (llmpar_gemm_kind)kind, dtype, size[0], size[1], size[2], pieces, 0);
        llmpar_cpu_destroy(cpu.device);
    } else {
        table(&results, level, argc > 1 && level < LLMPAR_CPU_AVX512);
        if (argc == 1 && level > LLMPAR_CPU_AVX2) table(&results, LLMPAR_CPU_AVX2, 1);
    }
    bench_close(&results);
    return 0;
}
