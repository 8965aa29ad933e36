/* test: the one small harness. A test file includes this (it includes llmpar.h), defines TEST(name) functions, and ends in
     TEST_LIST(T_(a), T_(b), T_(c))
   CHECKs may be used on rank threads. Compiled with LLMPAR_USE_MPI it runs under mpirun: every process runs every test, a test has failed if it failed on one of them, and rank 0 prints.
   The last line printed is "N passed, N failed[, N skipped]"; exit code 0 only with none failed.
   argv[1], if given, runs only tests whose name contains it. With LLMPAR_TEST_FIRST set the first that fails is the last. */
#ifndef TEST_H
#define TEST_H

#include "llmpar.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifdef LLMPAR_USE_MPI
#include <mpi.h>
#endif

static int test_failures, test_passed, test_failed, test_skipped, test_skip_now;

#define TEST(name) static void name(void)
#define TEST_FAIL(...) do { __atomic_add_fetch(&test_failures, 1, __ATOMIC_SEQ_CST); fprintf(stderr, "%s:%d: ", __FILE__, __LINE__); fprintf(stderr, __VA_ARGS__); fputc('\n', stderr); } while (0)
#define CHECK(condition) do { if (!(condition)) TEST_FAIL("CHECK(%s)", #condition); } while (0)
#define CHECK_INT(got, want) do { long long test_g = (long long)(got), test_w = (long long)(want); if (test_g != test_w) TEST_FAIL("%s: got %lld, want %lld", #got, test_g, test_w); } while (0)
#define CHECK_OK(call) do { llmpar_status test_s = (call); if (test_s) TEST_FAIL("%s: %s", #call, llmpar_status_string(test_s)); } while (0)
#define CHECK_STATUS(call, want) do { llmpar_status test_s = (call), test_w = (want); if (test_s != test_w) TEST_FAIL("%s: got %s, want %s", #call, llmpar_status_string(test_s), llmpar_status_string(test_w)); } while (0)
#define CHECK_BYTES(got, want, bytes) do { if (memcmp((got), (want), (bytes))) TEST_FAIL("%s differs from %s", #got, #want); } while (0)
#define CHECK_NEAR(got, want, bound) do { double test_g = (got), test_w = (want), test_d = test_g > test_w ? test_g - test_w : test_w - test_g; if (!(test_d <= (bound))) TEST_FAIL("%s: got %.17g, want %.17g, off by %.3g", #got, test_g, test_w, test_d); } while (0)
#define CHECK_TEXT(text, part) do { const char *test_t = (text); if (!strstr(test_t, (part))) TEST_FAIL("\"%s\" does not contain \"%s\"", test_t, (part)); } while (0)
/* Ends the test as skipped: use from the test function itself. */
#define TEST_SKIP(reason) do { printf("  skipped: %s\n", reason); test_skip_now = 1; return; } while (0)

/* LLMPAR_TEST_DATA/relative in one of four rotating static buffers, or NULL if the variable is unset. Main thread only. */
static inline const char *test_data(const char *relative)
{
    static char buffer[4][1024];
    static int next;
    const char *root = getenv("LLMPAR_TEST_DATA");
    if (!root || !root[0]) return NULL;
    next = (next + 1) % 4;
    snprintf(buffer[next], sizeof buffer[next], "%s/%s", root, relative);
    return buffer[next];
}
#define TEST_DATA(variable, relative) const char *variable = test_data(relative); if (!variable) TEST_SKIP("LLMPAR_TEST_DATA is not set")

/* How often a test repeats what it draws: a quarter under a sanitizer or with LLMPAR_TEST_QUICK, where each round costs ten times as much or was run a minute ago in another build. */
static inline int test_rounds(int rounds)
{
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    return (rounds + 3) / 4;
#else
    const char *quick = getenv("LLMPAR_TEST_QUICK");
    return quick && quick[0] ? (rounds + 3) / 4 : rounds;
#endif
}

/* Seconds of a clock that only goes forward. */
static inline double test_clock(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static inline void test_sleep(double seconds)
{
    struct timespec t = { (time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9) };
    nanosleep(&t, NULL);
}

/* For llmpar_launch_desc.check: a rank has given all its memory back. */
static inline void test_no_leak(const llmpar_ctx *ctx, void *user)
{
    (void)user;
    CHECK_INT(ctx->heap.live, 0);
}

typedef struct test_entry { const char *name; void (*run)(void); } test_entry;
static int test_rank __attribute__((unused)), test_world __attribute__((unused)) = 1; /* of an MPI job */
static inline void test_begin(int *argc, char ***argv)
{
#ifdef LLMPAR_USE_MPI
    int provided;
    MPI_Init_thread(argc, argv, MPI_THREAD_SERIALIZED, &provided);
    MPI_Comm_rank(MPI_COMM_WORLD, &test_rank);
    MPI_Comm_size(MPI_COMM_WORLD, &test_world);
    if (test_rank && !freopen("/dev/null", "w", stdout)) exit(1);
#else
    (void)argc; (void)argv;
#endif
}
static inline int test_sum(int x)
{
#ifdef LLMPAR_USE_MPI
    MPI_Allreduce(MPI_IN_PLACE, &x, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
#endif
    return x;
}
static inline int test_main(int argc, char **argv, const test_entry *tests, int count)
{
    test_begin(&argc, &argv);
    for (int i = 0; i < count; i++) {
        if (argc > 1 && !strstr(tests[i].name, argv[1])) continue;
        int before = test_failures;
        test_skip_now = 0;
        tests[i].run();
        if (test_sum(test_failures != before)) { test_failed++; printf("FAILED %s\n", tests[i].name); }
        else if (test_skip_now) test_skipped++;
        else test_passed++;
        fflush(stdout);
        if (test_failed && getenv("LLMPAR_TEST_FIRST")) break;
    }
    if (test_skipped) printf("%d passed, %d failed, %d skipped\n", test_passed, test_failed, test_skipped);
    else printf("%d passed, %d failed\n", test_passed, test_failed);
#ifdef LLMPAR_USE_MPI
    MPI_Finalize();
#endif
    return test_failed != 0;
}
#define T_(f) { #f, f }
#define TEST_LIST(...) int main(int argc, char **argv) { static const test_entry tests[] = { __VA_ARGS__ }; return test_main(argc, argv, tests, (int)(sizeof tests / sizeof tests[0])); }

#endif
