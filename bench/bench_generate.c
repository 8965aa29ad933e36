/* bench_generate: what waits for memory when text is generated. First products of 1 to 16 rows with weights larger than the caches, then whole tokens.
   Each beside the speed at which memory is read, measured right before and after.

     bench_generate [--json FILE] [products [ROWS N K DTYPE THREADS]] */
#include "llmpar.h"

#include "bench.h"
#include "peak.h"

/* ---- products of few rows ---- */

typedef struct product {
    llmpar_device *device;
    llmpar_gemm_args args;
    llmpar_gemm_segment segments[8];
    const char *weights, *next;      /* a buffer of many copies; next: where the next product's lie */
    size_t weights_bytes, bytes;     /* of the buffer; of one product's */
} product;

static double product_work(void *user)
{
    product *p = (product *)user;
    double start;
    if (p->next + p->bytes > p->weights + p->weights_bytes) p->next = p->weights;
    for (int32_t s = 0; s < p->args.segment_count; s++) p->segments[s].b = p->next + (size_t)s * (size_t)p->segments[0].k * llmpar_dtype_size(p->args.dtype);
    p->next += p->bytes;
    start = bench_now();
    if (p->device->gemm(p->device, NULL, &p->args)) { fprintf(stderr, "%s\n", p->device->error->text); exit(1); }
    return (double)p->bytes / (bench_now() - start);
}

static void product_line(bench_results *results, llmpar_device *device, bench_memory_of *memory, int threads, int64_t rows, int64_t n, int64_t k, int32_t pieces, llmpar_dtype dtype)
{
    product p;
    char name[100];
    size_t size = llmpar_dtype_size(dtype);
    void *a = NULL, *c = NULL;
    memset(&p, 0, sizeof p);
    p.device = device;
    p.args.m = rows;
    p.args.n = n;
    p.args.ldc = n;
    p.args.segments = p.segments;
    p.args.segment_count = p.args.pieces = pieces;
    p.args.kind = LLMPAR_GEMM_NT;
    p.args.dtype = dtype;
    if (device->alloc(device, (size_t)(rows * k) * size, &a) || device->alloc(device, (size_t)(rows * n) * size, &c)) exit(1);
    memset(a, 0, (size_t)(rows * k) * size);
    p.args.c = c;
    for (int32_t s = 0; s < pieces; s++) {
        p.segments[s].piece = s;
        p.segments[s].k = k / pieces;
        p.segments[s].a = (const char *)a + (size_t)s * (size_t)(k / pieces) * size;
        p.segments[s].lda = p.segments[s].ldb = k;
    }
    p.weights = p.next = memory->base;
    p.weights_bytes = memory->bytes;
    p.bytes = (size_t)(n * k) * size;
    p.args.workspace_bytes = device->gemm_workspace(device, &p.args);
    if (device->alloc(device, p.args.workspace_bytes, &p.args.workspace)) exit(1);
    snprintf(name, sizeof name, "%2d x %d x %d %s, %d piece%s, %d thread%s", (int)rows, (int)n, (int)k, llmpar_dtype_name(dtype), (int)pieces, pieces > 1 ? "s" : "", threads, threads > 1 ? "s" : "");
    bench_row(results, name, "GB/s", 1e-9, "reading", bench_pairs(bench_read, memory, product_work, &p, 21), 0.9);
    device->free(device, p.args.workspace, p.args.workspace_bytes);
    device->free(device, a, (size_t)(rows * k) * size);
    device->free(device, c, (size_t)(rows * n) * size);
}

static llmpar_device *open_device(llmpar_heap *heap, llmpar_error *error, int threads)
{
    llmpar_cpu_desc desc;
    llmpar_device *device;
    memset(&desc, 0, sizeof desc);
    desc.threads = threads;
    llmpar_heap_init(heap, NULL);
    llmpar_error_clear(error);
    if (llmpar_cpu_create(heap, error, &desc, &device)) { fprintf(stderr, "%s\n", error->text); exit(1); }
    return device;
}

static void products(bench_results *results, int argc, char **argv)
{
    static const int64_t shapes[][2] = { { 2048, 8192 }, { 4096, 4096 }, { 32000, 768 } };
    for (int threads = 1; threads <= bench_cores(); threads = threads == 1 && bench_cores() > 1 ? bench_cores() : bench_cores() + 1) {
        llmpar_heap heap;
        llmpar_error error;
        llmpar_device *device = open_device(&heap, &error, threads);
        bench_memory_of memory = bench_memory(512, threads);
        if (argc == 5) {
            llmpar_dtype dtype = !strcmp(argv[3], "bf16") ? LLMPAR_BF16 : !strcmp(argv[3], "f16") ? LLMPAR_F16 : LLMPAR_F32;
            if (atoi(argv[4]) == threads) for (int pieces = 1; pieces <= 8; pieces += 7) product_line(results, device, &memory, threads, atoi(argv[0]), atoi(argv[1]), atoi(argv[2]), pieces, dtype);
        } else
            for (int half = 0; half < 2; half++)
                for (int shape = 0; shape < 3; shape++)
                    for (int rows = 1; rows <= 16; rows *= 2) product_line(results, device, &memory, threads, rows, shapes[shape][0], shapes[shape][1], shape == 0 ? 8 : 1, half ? LLMPAR_BF16 : LLMPAR_F32);
        free(memory.base);
        llmpar_cpu_destroy(device);
    }
}

int main(int argc, char **argv)
{
    bench_results results;
    bench_open(&results, "generate", &argc, argv);
    if (argc > 1 && strcmp(argv[1], "products")) { fprintf(stderr, "bench_generate: unexpected argument \"%s\"\n", argv[1]); return 2; }
    products(&results, argc - 2, argv + 2);
    bench_close(&results);
    return 0;
}
