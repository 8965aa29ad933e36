/* gemm_blas: our f32 product and a BLAS library's sgemm, in turns, each beside the multiply-add peak taken before and after; one core. What a processor
   lets a product reach, with its caches shared with others, nobody knows better than the libraries that its maker tunes. */
#define _DEFAULT_SOURCE 1
#include "llmpar.h"

#include "../peak.h"

#include <dlfcn.h>

typedef void (*sgemm_fn)(const char *transa, const char *transb, const int *m, const int *n, const int *k, const float *alpha, const float *a, const int *lda, const float *b, const int *ldb, const float *beta, float *c, const int *ldc);

typedef struct product {
    sgemm_fn sgemm; /* NULL: ours */
    llmpar_device *device;
    llmpar_gemm_args args;
    llmpar_gemm_segment segments[8];
    float *a, *b, *c;
    int kind, m, n, k;
} product;

/* FLOPs a second, of runs that last a millisecond together. Row-major c = a b is column-major c^T = b^T a^T. */
static double product_rate(void *user)
{
    product *p = (product *)user;
    const float one = 1, zero = 0;
    const char *t = "T", *n = "N";
    double start = bench_now(), seconds, flops = 0;
    do {
        if (!p->sgemm) {
            if (p->device->gemm(p->device, NULL, &p->args)) { fprintf(stderr, "gemm_blas: %s\n", p->device->error->text); exit(1); }
        } else if (p->kind == LLMPAR_GEMM_NT) p->sgemm(t, n, &p->n, &p->m, &p->k, &one, p->b, &p->k, p->a, &p->k, &zero, p->c, &p->n);
        else if (p->kind == LLMPAR_GEMM_NN) p->sgemm(n, n, &p->n, &p->m, &p->k, &one, p->b, &p->n, p->a, &p->k, &zero, p->c, &p->n);
        else p->sgemm(n, t, &p->n, &p->m, &p->k, &one, p->b, &p->n, p->a, &p->m, &zero, p->c, &p->n);
        flops += 2.0 * p->m * p->n * p->k;
        seconds = bench_now() - start;
    } while (seconds < BENCH_SLICE);
    return flops / seconds;
}

static void compare(bench_results *results, llmpar_device *device, const char *level, const char *library, sgemm_fn sgemm, int kind, int m, int n, int k)
{
    static const char *const kinds[] = { "?", "nt", "nn", "tn" };
    bench_fma_of peak = { bench_fma_kind(level, 0), 1 };
    product ours, theirs;
    char name[120];
    size_t bytes[3] = { (size_t)m * (size_t)k * 4, (size_t)n * (size_t)k * 4, (size_t)m * (size_t)n * 4 };
    void *memory[4] = { NULL, NULL, NULL, NULL };
    double rate[2][64], bound[2][65], difference = 0;
    int pairs = (int)(0.6 / (4.0 * m * n * k / 1e11 + 4e-3)) | 1;
    if (pairs < 5) pairs = 5;
    if (pairs > 63) pairs = 63;
    memset(&ours, 0, sizeof ours);
    for (int i = 0; i < 3; i++) {
        if (device->alloc(device, bytes[i], &memory[i])) { fprintf(stderr, "gemm_blas: %s\n", device->error->text); exit(1); }
        for (size_t j = 0; j < bytes[i] / 4; j++) ((float *)memory[i])[j] = (float)((j * 2654435761u) % 1000) * 1e-3f - 0.5f;
    }
    ours.device = device;
    ours.a = (float *)memory[0];
    ours.b = (float *)memory[1];
    ours.c = (float *)memory[2];
    ours.kind = kind;
    ours.m = m;
    ours.n = n;
    ours.k = k;
    theirs = ours;
    theirs.sgemm = sgemm;
    theirs.c = (float *)malloc(bytes[2]);
    if (!theirs.c) { fprintf(stderr, "gemm_blas: no memory\n"); exit(1); }
    ours.args.m = m;
    ours.args.n = ours.args.ldc = n;
    ours.args.c = ours.c;
    ours.args.segments = ours.segments;
    ours.args.segment_count = ours.args.pieces = 8;
    ours.args.kind = (llmpar_gemm_kind)kind;
    ours.args.dtype = LLMPAR_F32;
    for (int i = 0; i < 8; i++) {
        int64_t first = llmpar_piece_begin(i, k, 8);
        ours.segments[i].piece = i;
        ours.segments[i].k = llmpar_piece_begin(i + 1, k, 8) - first;
        ours.segments[i].lda = kind == LLMPAR_GEMM_TN ? m : k;
        ours.segments[i].ldb = kind == LLMPAR_GEMM_NT ? k : n;
        ours.segments[i].a = ours.a + (kind == LLMPAR_GEMM_TN ? first * m : first);
        ours.segments[i].b = ours.b + (kind == LLMPAR_GEMM_NT ? first : first * n);
    }
    ours.args.workspace_bytes = device->gemm_workspace(device, &ours.args);
    if (device->alloc(device, ours.args.workspace_bytes, &memory[3])) { fprintf(stderr, "gemm_blas: %s\n", device->error->text); exit(1); }
    ours.args.workspace = memory[3];
    product_rate(&ours);
    product_rate(&theirs);
    for (size_t j = 0; j < bytes[2] / 4; j++) {
        double d = (double)ours.c[j] - (double)theirs.c[j];
        if (d < 0) d = -d;
        if (!(d <= difference)) difference = d;
    }
    if (!(difference < 1e-3 * k)) { fprintf(stderr, "gemm_blas: %s of %d x %d x %d: the results differ by %g\n", kinds[kind], m, n, k, difference); exit(1); }
    for (int i = 0; i < pairs; i++) /* peak ours peak theirs peak; each side keeps the peaks before and after it */
        for (int side = 0; side < 2; side++) {
            bound[side][i] = bench_fma(&peak);
            rate[side][i] = product_rate(side ? &theirs : &ours);
            bound[side][i] = 0.5 * (bound[side][i] + bench_fma(&peak));
        }
    for (int side = 0; side < 2; side++) {
        double ratios[64];
        bench_ratio r;
        memset(&r, 0, sizeof r);
        for (int i = 0; i < pairs; i++) ratios[i] = rate[side][i] / bound[side][i];
        r.ratio = bench_median(ratios, pairs);
        r.bad = ratios[pairs / 4];
        r.good = ratios[pairs - 1 - pairs / 4];
        r.pairs = pairs;
        double ours_[64], bounds_[64];
        memcpy(ours_, rate[side], sizeof ours_);
        memcpy(bounds_, bound[side], sizeof bounds_);
        r.work = bench_median(ours_, pairs);
        r.bound = bench_median(bounds_, pairs);
        snprintf(name, sizeof name, "%s %d x %d x %d, %s", kinds[kind], m, n, k, side ? library : "llmpar, 8 pieces");
        bench_row(results, name, "GFLOP/s", 1e-9, bench_fma_name(peak.kind), r, 0);
    }
    double ratios[64], theirs_[64], ours_[64];
    bench_ratio r;
    memset(&r, 0, sizeof r);
    for (int i = 0; i < pairs; i++) ratios[i] = rate[0][i] / rate[1][i];
    memcpy(ours_, rate[0], sizeof ours_);
    memcpy(theirs_, rate[1], sizeof theirs_);
    r.ratio = bench_median(ratios, pairs);
    r.bad = ratios[pairs / 4];
    r.good = ratios[pairs - 1 - pairs / 4];
    r.pairs = pairs;
    r.work = bench_median(ours_, pairs);
    r.bound = bench_median(theirs_, pairs);
    snprintf(name, sizeof name, "%s %d x %d x %d, llmpar of the library", kinds[kind], m, n, k);
    bench_row(results, name, "GFLOP/s", 1e-9, "sgemm", r, 0);
    for (int i = 0; i < 4; i++) device->free(device, memory[i], i < 3 ? bytes[i] : ours.args.workspace_bytes);
    free(theirs.c);
}

static const char usage[] =
    "gemm_blas [--json FILE] LIBRARY [M N K]\n"
    "  --json FILE   the table as JSON, too\n"
    "  LIBRARY       whatever exports sgemm_, as libopenblas.so.0, libmkl_rt.so or PyTorch's libtorch_cpu.so\n"
    "  M N K         one shape instead of the table: rows and columns of the result, length of the sums\n";

int main(int argc, char **argv)
{
    static const int shapes[][3] = { { 512, 768, 768 }, { 512, 2048, 2048 }, { 2048, 768, 2048 }, { 2048, 2048, 2048 }, { 2048, 8192, 2048 } };
    bench_results results;
    llmpar_heap heap;
    llmpar_error error;
    llmpar_device *device = NULL;
    bench_open(&results, "gemm-blas", &argc, argv, usage, 4);
    if (argc != 2 && argc != 5) bench_refuse("arguments", argc > 1 ? argv[1] : "", "LIBRARY [M N K], see --help");
    int size[3] = { 0 };
    for (int i = 0; i < 3 && argc == 5; i++) size[i] = (int)bench_number(i == 0 ? "M" : i == 1 ? "N" : "K", argv[2 + i], 1, 1 << 16);
    setenv("OMP_NUM_THREADS", "1", 1);
    setenv("OPENBLAS_NUM_THREADS", "1", 1);
    setenv("MKL_NUM_THREADS", "1", 1);
    void *library = dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL);
    sgemm_fn sgemm = NULL;
    if (library) *(void **)(void *)&sgemm = dlsym(library, "sgemm_");
    if (!sgemm) { printf("gemm_blas: skipped: %s\n", library ? "the library has no sgemm_" : dlerror()); return 0; }
    const char *file = strrchr(argv[1], '/') ? strrchr(argv[1], '/') + 1 : argv[1];
    llmpar_heap_init(&heap, NULL);
    llmpar_error_clear(&error);
    if (llmpar_cpu_create(&heap, &error, NULL, &device)) { fprintf(stderr, "gemm_blas: %s\n", error.text); return 1; }
    const char *level = llmpar_cpu_level_name(llmpar_cpu_best_level());
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++)
        for (int kind = 1; kind <= 3; kind++) {
            if (argc == 5) compare(&results, device, level, file, sgemm, kind, size[0], size[1], size[2]);
            else compare(&results, device, level, file, sgemm, kind, shapes[s][0], shapes[s][1], shapes[s][2]);
            if (argc == 5 && kind == 3) s = sizeof shapes / sizeof shapes[0];
        }
    llmpar_cpu_destroy(device);
    bench_close(&results);
    return 0;
}
