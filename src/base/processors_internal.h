/* processors_internal: which ones this thread may run on, and staying on one. Private: llmpar_launch decides who runs where. */
#ifndef LLMPAR_PROCESSORS_INTERNAL_H
#define LLMPAR_PROCESSORS_INTERNAL_H

#include "base/platform.h"

enum { LLMPAR__PROCESSORS_WORDS = 128 }; /* of 64 processors; the kernel's limit is 8,192 */

typedef struct llmpar__processors {
    uint64_t mask[LLMPAR__PROCESSORS_WORDS]; /* as the system numbers them; all zero where it does not say */
    int32_t count;                           /* >= 1 */
    int32_t mask_known;
} llmpar__processors;

/* Those the calling thread may run on. */
LLMPAR__PRIVATE void llmpar__processors_allowed(llmpar__processors *out);
/* Their cores: a core that runs several threads at once has one set of arithmetic units. order[count] (may be NULL): one processor of each core first, then the others. */
LLMPAR__PRIVATE int32_t llmpar__processors_cores(const llmpar__processors *set, int32_t *order);
/* Threads for each of `users` that share so many cores, and no more than the control group's quota of time amounts to; at least 1. */
LLMPAR__PRIVATE int32_t llmpar__processors_share(int32_t cores, int32_t users);
/* The calling thread runs on these only: 1. 0: the system cannot, or will not. */
LLMPAR__PRIVATE int llmpar__processors_stay(const llmpar__processors *set);
LLMPAR__PRIVATE int llmpar__processors_stay_on(int32_t processor);

#endif
