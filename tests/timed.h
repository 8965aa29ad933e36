/* timed: tests that look at the clock, or whose deadlines are short. On a machine that stands still for seconds, or is too busy, such a test may fail through no fault of what it tests.
   TIMED(name) is TEST(name) for them. Whoever fails while a watch saw this process stand still is run again, with twice the time; who fails on a machine that runs has failed, and so has who fails five times.
   So every second in such a test, awaited or allowed, is times test_slow, and it sets up anew whatever it uses. */
#ifndef TIMED_H
#define TIMED_H

#include "test.h"

#include <pthread.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

static double test_slow = 1;

/* ---- the watch: on each processor, up to 64, a thread that naps and notes how late it was woken ---- */

enum { TEST_WATCHES = 64 };
static int test_watching;       /* atomic */
static int64_t test_stood_us;   /* atomic: the latest */

static inline void *test_watch(void *arg)
{
#ifdef __linux__
    unsigned long alone[1024 / (8 * sizeof(unsigned long))] = { 0 };
    size_t at = (size_t)(uintptr_t)arg, bits = 8 * sizeof alone[0];
    alone[at / bits] = 1ul << at % bits;
    syscall(SYS_sched_setaffinity, 0, sizeof alone, alone);
#endif
    (void)arg;
    while (__atomic_load_n(&test_watching, __ATOMIC_SEQ_CST)) {
        double before = test_clock();
        test_sleep(0.01);
        int64_t late = (int64_t)((test_clock() - before - 0.01) * 1e6), most = __atomic_load_n(&test_stood_us, __ATOMIC_SEQ_CST);
        while (late > most && !__atomic_compare_exchange_n(&test_stood_us, &most, late, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) continue;
    }
    return NULL;
}

static inline void test_timed(const char *name, void (*run)(void))
{
    for (test_slow = 1;; test_slow *= 2) {
        pthread_t watch[TEST_WATCHES];
        int watches = 0, before = test_failures;
        __atomic_store_n(&test_watching, 1, __ATOMIC_SEQ_CST);
        __atomic_store_n(&test_stood_us, 0, __ATOMIC_SEQ_CST);
#if defined(__linux__) && !(defined(TEST_FORKS) && defined(__SANITIZE_THREAD__)) /* which forbids a fork beside threads */
        unsigned long allowed[1024 / (8 * sizeof(unsigned long))] = { 0 };
        syscall(SYS_sched_getaffinity, 0, sizeof allowed, allowed);
        for (size_t at = 0, bits = 8 * sizeof allowed[0]; at < 1024 && watches < TEST_WATCHES; at++)
            if (allowed[at / bits] >> at % bits & 1 && !pthread_create(&watch[watches], NULL, test_watch, (void *)(uintptr_t)at)) watches++;
#endif
        run();
        __atomic_store_n(&test_watching, 0, __ATOMIC_SEQ_CST);
        for (int i = 0; i < watches; i++) pthread_join(watch[i], NULL);
        double stood = 1e-6 * (double)__atomic_load_n(&test_stood_us, __ATOMIC_SEQ_CST);
        int failures = test_sum(test_failures != before), still = test_sum(stood > 0.1 * test_slow);
        if (!failures || !still || test_slow > 8) break;
        printf("  %s failed on a machine that stood still for %.1f s: again, with %g times the time\n", name, stood, 2 * test_slow);
        fflush(NULL);
        test_failures = before;
    }
    test_slow = 1;
}

#define TIMED(name) static void name##_once(void); TEST(name) { test_timed(#name, name##_once); } static void name##_once(void)

#endif
