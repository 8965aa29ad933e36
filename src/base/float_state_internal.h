/* float_state: rounding to nearest even, denormals kept, no traps: equal bits need it, whatever the caller has set, and a new thread inherits what its creator has. */
#ifndef LLMPAR_FLOAT_STATE_INTERNAL_H
#define LLMPAR_FLOAT_STATE_INTERNAL_H

#include "base/platform.h"

#if defined(__x86_64__)
#define LLMPAR__FLOAT_STATE 0x1f80u
#else
#define LLMPAR__FLOAT_STATE 0
#endif

/* Sets the calling thread's; returns what it was. */
static inline uint64_t llmpar__float_state(uint64_t state)
{
#if defined(__x86_64__)
    unsigned old = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr((unsigned)state);
#else
    uint64_t old;
    __asm__ __volatile__("mrs %0, fpcr\n\tmsr fpcr, %1" : "=&r"(old) : "r"(state));
#endif
    return old;
}

#endif
