/* bench: the clock, medians, ratios of neighbouring readings, and the file of results.

   A shared machine halves its speed for 50 ms at a time and says nothing. So a figure here is a ratio of neighbours: the bound (arithmetic, read or copy
   speed: peak.h) is measured for about a millisecond directly before and after each run of the work, ratio = rate of the work / mean of the two bounds,
   and the median over many such pairs is what is reported. Absolute rates stand beside it and mean little.

     static double work(void *user) { double start = bench_now(); ...; return flops / (bench_now() - start); }
     bench_ratio r = bench_pairs(bench_fma, &peak, work, &mine, 31);

   A program's results: bench_open() takes `--json FILE` out of the arguments, bench_row() prints a line of the table and keeps it, bench_close() writes
   the file, in the end or never. Every program answers `--help`, and refuses what it does not know with exit code 2 before anything runs. */
#ifndef BENCH_H
#define BENCH_H

#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* seconds */
static inline double bench_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline int bench_compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* sorts values[count] */
static inline double bench_median(double *values, int count)
{
    qsort(values, (size_t)count, sizeof *values, bench_compare);
    return values[count / 2];
}

/* The tokens of sequence `index`: pseudo-random, so that nothing is learned; bench/peers/llama_torch.py makes the same ones. */
static inline void bench_tokens(int64_t index, int64_t count, int32_t vocab, int32_t *tokens)
{
    uint32_t state = (uint32_t)index * 2654435761u + 12345u;
    for (int64_t i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        tokens[i] = (int32_t)((state >> 8) % (uint32_t)vocab);
    }
}

/* ---- pairs ---- */

/* Does it once (1 .. 30 ms) and says how fast: FLOPs, bytes or whatever both sides count, a second. */
typedef double (*bench_rate)(void *user);

/* Medians; `good` and `bad` are the quartiles of the ratio. */
typedef struct bench_ratio { double ratio, good, bad, work, bound; int pairs; } bench_ratio;

/* Of readings that the caller took itself: ratio[i] = work[i] / mean(bound[i], bound[i + 1]). Sorts work[pairs] and bound[pairs + 1]. */
static inline bench_ratio bench_pairs_of(double *work, double *bound, int pairs)
{
    bench_ratio r;
    double *ratio = (double *)malloc((size_t)pairs * sizeof *ratio);
    memset(&r, 0, sizeof r);
    if (!ratio || pairs < 1) { fprintf(stderr, "bench: no memory, or no pairs\n"); exit(1); }
    for (int i = 0; i < pairs; i++) ratio[i] = 2 * work[i] / (bound[i] + bound[i + 1]);
    r.ratio = bench_median(ratio, pairs);
    r.good = ratio[pairs - 1 - pairs / 4];
    r.bad = ratio[pairs / 4];
    r.work = bench_median(work, pairs);
    r.bound = bench_median(bound, pairs + 1);
    r.pairs = pairs;
    free(ratio);
    return r;
}

/* bound work bound work .. bound, after one unmeasured run of each. */
static inline bench_ratio bench_pairs(bench_rate bound, void *bound_user, bench_rate work, void *work_user, int pairs)
{
    double *works = (double *)malloc((size_t)pairs * sizeof *works), *bounds = (double *)malloc((size_t)(pairs + 1) * sizeof *bounds);
    bench_ratio r;
    if (!works || !bounds) { fprintf(stderr, "bench: no memory\n"); exit(1); }
    work(work_user);
    bound(bound_user);
    bounds[0] = bound(bound_user);
    for (int i = 0; i < pairs; i++) {
        works[i] = work(work_user);
        bounds[i + 1] = bound(bound_user);
    }
    r = bench_pairs_of(works, bounds, pairs);
    free(works);
    free(bounds);
    return r;
}

/* ---- the command line ---- */

static const char *bench_program = "bench"; /* its name in messages */

/* Ends the program: `name` (an option, an argument) with this value, and what was expected. */
static inline void bench_refuse(const char *name, const char *text, const char *expected)
{
    fprintf(stderr, "%s: %s \"%s\": expected %s\n", bench_program, name, text, expected);
    exit(2);
}

/* `text` is all of a whole number least .. most. */
static inline long bench_number(const char *name, const char *text, long least, long most)
{
    char expected[80], *end;
    errno = 0;
    long value = strtol(text, &end, 10);
    snprintf(expected, sizeof expected, "a whole number %ld .. %ld", least, most);
    if (end == text || *end || errno || value < least || value > most) bench_refuse(name, text, expected);
    return value;
}

/* --help anywhere: prints the text, whose first line is the synopsis, and ends the program. Arguments: `most` at most, and no options; -1: the caller looks. */
static inline void bench_usage(int argc, char **argv, const char *usage, int most)
{
    const char *slash = strrchr(argv[0], '/');
    bench_program = slash ? slash + 1 : argv[0];
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
            printf("usage: %s", usage);
            exit(0);
        }
    for (int i = 1; i < argc && most >= 0; i++)
        if (i > most || !strncmp(argv[i], "--", 2)) bench_refuse("argument", argv[i], most ? "what --help says" : "none");
}

/* With --serve, for bench/peers/: each line "step" on stdin is a request. 1: there is one; 0: the input has ended. */
static inline int bench_served(void)
{
    char line[100];
    if (!fgets(line, sizeof line, stdin)) return 0;
    line[strcspn(line, "\n")] = 0;
    if (strcmp(line, "step")) bench_refuse("--serve: line", line, "\"step\"");
    return 1;
}

/* ---- results ---- */

#ifndef BENCH_FLAGS
#define BENCH_FLAGS "?" /* of the implementation; the Makefile says */
#endif

/* ratio, bar: 0: none. bar_below: the bar is an upper one. */
typedef struct bench_line { char name[120], unit[24], bound_name[48]; double value, bound, ratio, good, bad, bar; int bar_below; } bench_line;
typedef struct bench_results { char part[40], file[400], command[600]; bench_line *lines; int count, room; } bench_results;

/* First line of a command's output or of a file's line that begins with `key` (NULL: of the command), without the newline. */
static inline void bench_ask(const char *command, const char *key, char *out, size_t size)
{
    char line[1000];
    FILE *f = key ? fopen(command, "r") : popen(command, "r");
    out[0] = 0;
    while (f && !out[0] && fgets(line, sizeof line, f)) {
        char *text = line;
        line[strcspn(line, "\n")] = 0;
        if (key) {
            if (strncmp(line, key, strlen(key))) continue;
            text = strchr(line, ':') ? strchr(line, ':') + 2 : line;
        }
        size_t length = strlen(text) < size ? strlen(text) : size - 1;
        memcpy(out, text, length);
        out[length] = 0;
    }
    if (f && key) fclose(f);
    else if (f) pclose(f);
}

/* part: "gemm". Removes `--json FILE` from the arguments; without it, BENCH_JSON of the environment, or no file. usage, most: bench_usage. */
static inline void bench_open(bench_results *r, const char *part, int *argc, char **argv, const char *usage, int most)
{
    const char *file = getenv("BENCH_JSON");
    int kept = 1;
    bench_usage(*argc, argv, usage, -1);
    memset(r, 0, sizeof *r);
    snprintf(r->part, sizeof r->part, "%s", part);
    for (int i = 0; i < *argc; i++) {
        size_t used = strlen(r->command);
        snprintf(r->command + used, sizeof r->command - used, "%s%s", i ? " " : "", argv[i]);
    }
    for (int i = 1; i < *argc; i++)
        if (!strcmp(argv[i], "--json")) {
            if (i + 1 == *argc) bench_refuse("--json", "", "a file name");
            file = argv[++i];
        } else argv[kept++] = argv[i];
    *argc = kept;
    argv[kept] = NULL;
    bench_usage(kept, argv, usage, most);
    if (file) snprintf(r->file, sizeof r->file, "%s", file);
}

static inline bench_line *bench_add(bench_results *r, const char *name, const char *unit)
{
    if (r->count == r->room) {
        r->room = 2 * r->room + 32;
        r->lines = (bench_line *)realloc(r->lines, (size_t)r->room * sizeof *r->lines);
        if (!r->lines) { fprintf(stderr, "bench: no memory\n"); exit(1); }
    }
    bench_line *line = &r->lines[r->count++];
    memset(line, 0, sizeof *line);
    snprintf(line->name, sizeof line->name, "%s", name);
    snprintf(line->unit, sizeof line->unit, "%s", unit);
    return line;
}

/* A line with a bound. scale: 1e-9 with unit "GFLOP/s". bar > 0: at least, < 0: at most -bar, 0: none. Prints it. */
static inline void bench_row(bench_results *r, const char *name, const char *unit, double scale, const char *bound_name, bench_ratio v, double bar)
{
    bench_line *line = bench_add(r, name, unit);
    snprintf(line->bound_name, sizeof line->bound_name, "%s", bound_name);
    line->value = v.work * scale;
    line->bound = v.bound * scale;
    line->ratio = v.ratio;
    line->good = v.good;
    line->bad = v.bad;
    line->bar = bar < 0 ? -bar : bar;
    line->bar_below = bar < 0;
    printf("  %-44s %9.2f of %9.2f %-8s %6.1f %% (%.1f .. %.1f) of %s", line->name, line->value, line->bound, unit, 100 * v.ratio, 100 * v.bad, 100 * v.good, bound_name);
    if (bar != 0) printf("   bar %s %g %%: %s", bar < 0 ? "<=" : ">=", 100 * line->bar, (bar < 0 ? v.ratio <= line->bar : v.ratio >= line->bar) ? "met" : "NOT met");
    printf("\n");
    fflush(stdout);
}

/* A line without one. */
static inline void bench_value(bench_results *r, const char *name, const char *unit, double value)
{
    bench_add(r, name, unit)->value = value;
    printf("  %-44s %9.2f %s\n", name, value, unit);
    fflush(stdout);
}

static inline void bench_write_text(FILE *f, const char *key, const char *text, const char *end)
{
    fprintf(f, "\"%s\": \"", key);
    for (; *text; text++) {
        if (*text == '"' || *text == '\\') fputc('\\', f);
        if ((unsigned char)*text >= ' ') fputc(*text, f);
    }
    fprintf(f, "\"%s", end);
}

/* Writes the file and frees. */
static inline void bench_close(bench_results *r)
{
    char text[200];
    time_t now = time(NULL);
    struct tm utc;
    FILE *f = r->file[0] ? fopen(r->file, "w") : NULL;
    if (r->file[0] && !f) { fprintf(stderr, "bench: %s: cannot be written\n", r->file); exit(1); }
    if (f) {
        gmtime_r(&now, &utc);
        strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &utc);
        fprintf(f, "{\n");
        bench_write_text(f, "part", r->part, ",\n");
        bench_write_text(f, "date", text, ",\n");
        bench_ask("/proc/cpuinfo", "model name", text, sizeof text);
        bench_write_text(f, "processor", text, ",\n");
        fprintf(f, "\"cores\": %ld,\n", sysconf(_SC_NPROCESSORS_ONLN));
#if defined(__VERSION__)
        bench_write_text(f, "compiler",
#if defined(__clang__)
            "" __VERSION__,
#else
            "gcc " __VERSION__,
#endif
            ",\n");
#endif
        bench_write_text(f, "flags", BENCH_FLAGS, ",\n");
        bench_ask("git describe --always --dirty --abbrev=12 2>/dev/null", NULL, text, sizeof text);
        bench_write_text(f, "commit", text, ",\n");
        bench_write_text(f, "command", r->command, ",\n\"rows\": [");
        for (int i = 0; i < r->count; i++) {
            const bench_line *line = &r->lines[i];
            fprintf(f, "%s\n  {", i ? "," : "");
            bench_write_text(f, "name", line->name, ", ");
            fprintf(f, "\"value\": %.6g, ", line->value);
            bench_write_text(f, "unit", line->unit, "");
            if (line->bound_name[0]) {
                fprintf(f, ", \"bound\": %.6g, ", line->bound);
                bench_write_text(f, "of", line->bound_name, "");
                fprintf(f, ", \"ratio\": %.4f, \"quartiles\": [%.4f, %.4f]", line->ratio, line->bad, line->good);
            }
            if (line->bar > 0) fprintf(f, ", \"bar\": \"%s %g\", \"met\": %s", line->bar_below ? "<=" : ">=", line->bar, (line->bar_below ? line->ratio <= line->bar : line->ratio >= line->bar) ? "true" : "false");
            fprintf(f, "}");
        }
        fprintf(f, "\n]\n}\n");
        if (fclose(f)) { fprintf(stderr, "bench: %s: cannot be written\n", r->file); exit(1); }
    }
    free(r->lines);
    r->lines = NULL;
}

#endif
