/* schedule_units: what the tests of schedules share: units, policies, and lists with something left out or done twice. */
#ifndef SCHEDULE_UNITS_H
#define SCHEDULE_UNITS_H

#include "test.h"

#define MAX_UNITS 6
#define MAX_LIST 4096
#define MAX_MICRO 8

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

/* ---- random policies ---- */

static uint64_t random_state = 1;
static inline int32_t random_below(int32_t n)
{
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return (int32_t)((random_state >> 33) % (uint64_t)n);
}

/* A policy of every kind, over units of every kind; pairs that exclude each other are drawn again. */
static inline llmpar_schedule *random_schedule(int32_t most_units, int32_t most_micro_batches, char what[320])
{
    for (;;) {
        int32_t count = 1 + random_below(most_units), borrower = -1, lender = 0;
        if (count > 1 && random_below(2)) {
            borrower = random_below(count);
            lender = (borrower + 1 + random_below(count - 1)) % count;
        }
        make_units(count, borrower, lender);
        llmpar_policy policy = make_policy(random_below(3) ? 1 + random_below(most_micro_batches) : 1, random_below(3) == 0, random_below(5), random_below(4) == 0, 1 + random_below(2), random_below(8) == 0);
        policy.prefetch_backward = random_below(5);
        policy.zero = random_below(2) ? LLMPAR_ZERO_DEFAULT : random_below(5);
        policy.reshard = (llmpar_reshard)random_below(5);
        policy.reshard_every = random_below(4);
        policy.chain = random_below(3) == 0;
        policy.master = random_below(2);
        policy.offload = random_below(2) ? 0 : (unsigned)random_below(1 << LLMPAR_STATE_COUNT);
        policy.update = random_below(2) ? LLMPAR_UPDATE_AFTER : (llmpar_update_when)random_below(3);
        if (random_below(5) == 0) {
            policy.host_update = 1;
            policy.offload |= 7u;
            policy.update = LLMPAR_UPDATE_AFTER;
        }
        int frozen = random_below(3) == 0;
        int length = snprintf(what, 320, "micro_batches %d no_sync %d chain %d prefetch %d %d zero %d shards %d replicas %d reshard %d/%d forward_only %d master %d offload %u update %d%s units", policy.micro_batches, policy.no_sync, policy.chain,
                              policy.prefetch, policy.prefetch_backward, policy.zero, policy.shards, policy.replicas, (int)policy.reshard, policy.reshard_every, policy.forward_only, policy.master, policy.offload, (int)policy.update, policy.host_update ? " on the host" : "");
        for (int32_t i = 0; i < count; i++) {
            units[i].frozen = frozen && random_below(2);
            units[i].recompute = (llmpar_recompute)random_below(i + 1 < count ? 3 : 2);
            length += snprintf(what + length, (size_t)(320 - length), " %s%s%s", units[i].frozen ? "frozen" : "trained", units[i].recompute == LLMPAR_RECOMPUTE_FULL ? "+full" : "", i == borrower ? "+borrows" : i == lender && borrower >= 0 ? "+lends" : "");
        }
        llmpar_schedule *schedule = NULL;
        llmpar_error_clear(&err);
        llmpar_status status = llmpar_schedule_create(&heap, units, count, &policy, &schedule, &err);
        if (!status) return schedule;
        if (status != LLMPAR_ERR_ARGUMENT) {
            TEST_FAIL("%s: %s", what, err.text);
            return NULL;
        }
    }
}

#endif
