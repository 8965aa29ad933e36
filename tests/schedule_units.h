/* schedule_units: what the tests of schedules share: units, policies, and lists with something left out or done twice. */
#ifndef SCHEDULE_UNITS_H
#define SCHEDULE_UNITS_H

#include "test.h"

#define MAX_UNITS 6
#define MAX_LIST 4096

static llmpar_heap heap;
static llmpar_unit units[MAX_UNITS];
static int32_t unit_count;

static inline llmpar_status nothing(llmpar_unit_call *call)
{
    (void)call;
    return LLMPAR_OK;
}

static const llmpar_unit_op plain[] = {{"all", nothing, LLMPAR_COMPUTE, {0, 0}, 0, 0}};
static const llmpar_unit_op with_tp[] = {{"multiply", nothing, LLMPAR_COMPUTE, {0, 0}, 0, 0}, {"sum", nothing, LLMPAR_TP_REDUCE, {1, 0}, 0, 0}, {"add", nothing, LLMPAR_COMPUTE, {2, 1}, 0, 0}};

/* borrower, lender: indices, or borrower < 0. */
static inline void make_units(int32_t count, int32_t borrower, int32_t lender)
{
    static const char *const names[MAX_UNITS] = {"u0", "u1", "u2", "u3", "u4", "u5"};
    if (!heap.allocator.alloc) llmpar_heap_init(&heap, NULL);
    memset(units, 0, sizeof units);
    unit_count = count;
    for (int32_t i = 0; i < count; i++) {
        units[i].name = names[i];
        units[i].forward = i == 1 ? with_tp : plain;
        units[i].forward_count = i == 1 ? 3 : 1;
        units[i].backward = plain;
        units[i].backward_count = 1;
    }
    if (borrower >= 0) units[borrower].borrow = 1 + lender;
}

static llmpar_error err;
static inline llmpar_status validate(const llmpar_instruction *list, int32_t count, const llmpar_policy *policy)
{
    llmpar_error_clear(&err);
    return llmpar_schedule_validate(&heap, list, count, units, unit_count, policy, &err);
}

static inline llmpar_policy make_policy(int32_t micro_batches, int32_t no_sync, int32_t prefetch, int32_t unsharded, int32_t replicas, int32_t forward_only)
{
    llmpar_policy policy;
    memset(&policy, 0, sizeof policy);
    policy.micro_batches = micro_batches;
    policy.no_sync = no_sync;
    policy.prefetch = policy.prefetch_backward = prefetch;
    policy.shards = unsharded ? 1 : 2;
    policy.replicas = replicas;
    policy.forward_only = forward_only;
    return policy;
}

/* ---- changing a list ---- */

static llmpar_instruction changed[MAX_LIST];

static inline int32_t without(const llmpar_instruction *list, int32_t count, int32_t gone)
{
    int32_t n = 0;
    for (int32_t i = 0; i < count; i++) {
        if (i == gone) continue;
        int32_t waits = 0;
        changed[n] = list[i];
        for (int32_t w = 0; w < list[i].wait_count; w++)
            if (list[i].waits[w] != gone) changed[n].waits[waits++] = list[i].waits[w] - (list[i].waits[w] > gone);
        changed[n++].wait_count = waits;
    }
    return n;
}

static inline int32_t with_twice(const llmpar_instruction *list, int32_t count, int32_t again)
{
    for (int32_t i = 0; i <= count; i++) {
        changed[i] = list[i <= again ? i : i - 1];
        for (int32_t w = 0; w < changed[i].wait_count; w++) changed[i].waits[w] += changed[i].waits[w] > again;
    }
    return count + 1;
}

#endif
