/* bench_peak: what this machine can do at best: multiply-adds in registers alone, level by level, and bytes from memory; on one core and on all. Each is
   the bound that some other part of the benchmark stands beside. Medians of slices of a millisecond, with their quartiles, because a shared machine's speed moves. */
#include "bench.h"
#include "peak.h"

enum { PEAK_SLICES = 61 };

/* The same reading against its own neighbours: a ratio of 1, whose quartiles say how restless the machine is. */
static void peak_line(bench_results *results, const char *what, bench_rate rate, void *user, int threads, const char *unit)
{
    char name[100];
    bench_ratio r = bench_pairs(rate, user, rate, user, PEAK_SLICES);
    snprintf(name, sizeof name, "%s, %d thread%s", what, threads, threads > 1 ? "s" : "");
    bench_row(results, name, unit, 1e-9, "its neighbours", r, 0);
}

/* a += b in 256 KiB, which the second-level cache holds. */
typedef struct peak_cached { float a[32768], b[32768]; } peak_cached;
BENCH_WIDE static double peak_add_cached(void *user)
{
    peak_cached *c = (peak_cached *)user;
    double start = bench_now(), seconds;
    long times = 0;
    do {
        for (int i = 0; i < 32768; i += 8) *(bench_floats *)(void *)&c->a[i] += *(const bench_floats *)(const void *)&c->b[i];
        __asm__ __volatile__("" : : : "memory");
        times++;
        seconds = bench_now() - start;
    } while (seconds < BENCH_SLICE);
    return 3.0 * sizeof c->a * (double)times / seconds;
}

static const char usage[] =
    "bench_peak [--json FILE]\n"
    "Multiply-adds in registers and bytes from memory, on one core and on all.\n"
    "  --json FILE   the table as JSON, too\n";

int main(int argc, char **argv)
{
    bench_results results;
    void *cached = NULL;
    bench_open(&results, "peak", &argc, argv, usage, 0);
    if (posix_memalign(&cached, 4096, sizeof(peak_cached))) return 1;
    memset(cached, 0, sizeof(peak_cached));
    for (int threads = 1; threads <= bench_cores(); threads = threads == 1 && bench_cores() > 1 ? bench_cores() : bench_cores() + 1) {
        bench_memory_of memory = bench_memory(512, threads);
        for (int kind = BENCH_MULTIPLY_ADD; kind <= BENCH_NEON; kind++) {
            bench_fma_of of;
            of.kind = (enum bench_kind)kind;
            of.threads = threads;
            if (bench_fma_has(of.kind)) peak_line(&results, bench_fma_name(of.kind), bench_fma, &of, threads, "GFLOP/s");
        }
        peak_line(&results, "read of 512 MB", bench_read, &memory, threads, "GB/s");
        peak_line(&results, "triad in 512 MB", bench_triad, &memory, threads, "GB/s");
        peak_line(&results, "memcpy in 512 MB", bench_memcpy, &memory, threads, "GB/s");
        if (threads == 1 && bench_memory_wide()) peak_line(&results, "a += b in 256 KiB", peak_add_cached, cached, threads, "GB/s");
        free(memory.base);
    }
    free(cached);
    bench_close(&results);
    return 0;
}
