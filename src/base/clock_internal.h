/* clock_internal: a clock that nobody sets, and waiting by it. Private. */
#ifndef LLMPAR_CLOCK_INTERNAL_H
#define LLMPAR_CLOCK_INTERNAL_H

#include "base/platform.h"

#include <pthread.h>
#include <time.h>

LLMPAR__PRIVATE double llmpar__clock_seconds(void);
LLMPAR__PRIVATE uint64_t llmpar__clock_ns(clockid_t clock);
LLMPAR__PRIVATE int llmpar__clock_cond_init(pthread_cond_t *cond); /* one for llmpar__clock_cond_wait; 0: the system gives none */
/* Under the lock: until `cond` is signalled, or for so many seconds, or for nothing. */
LLMPAR__PRIVATE void llmpar__clock_cond_wait(pthread_cond_t *cond, pthread_mutex_t *lock, double seconds);
/* Between two looks at another thread's word. */
LLMPAR__PRIVATE void llmpar__clock_pause(void);

#endif
