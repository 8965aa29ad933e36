#include "base/clock_internal.h"

LLMPAR__PRIVATE_DEF uint64_t llmpar__clock_ns(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

LLMPAR__PRIVATE_DEF double llmpar__clock_seconds(void) { return 1e-9 * (double)llmpar__clock_ns(CLOCK_MONOTONIC); }

LLMPAR__PRIVATE_DEF int llmpar__clock_cond_init(pthread_cond_t *cond)
{
    pthread_condattr_t attributes;
    if (pthread_condattr_init(&attributes)) return 0;
#if !defined(__APPLE__)
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
#endif
    int failed = pthread_cond_init(cond, &attributes);
    pthread_condattr_destroy(&attributes);
    return !failed;
}

LLMPAR__PRIVATE_DEF void llmpar__clock_cond_wait(pthread_cond_t *cond, pthread_mutex_t *lock, double seconds)
{
    struct timespec until;
#if defined(__APPLE__)
    clock_gettime(CLOCK_REALTIME, &until);
#else
    clock_gettime(CLOCK_MONOTONIC, &until);
#endif
    if (seconds < 0) seconds = 0;
    if (seconds > 3600) seconds = 3600; /* wakes up once an hour for nothing: no overflow of time_t */
    long nanoseconds = until.tv_nsec + (long)((seconds - (double)(long)seconds) * 1e9);
    until.tv_sec += (time_t)seconds + nanoseconds / 1000000000;
    until.tv_nsec = nanoseconds % 1000000000;
    pthread_cond_timedwait(cond, lock, &until);
}

LLMPAR__PRIVATE_DEF void llmpar__clock_pause(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    __asm__ __volatile__("isb"); /* `yield` is a nop on most: all looks would be over before a sleeper could wake */
#endif
}
