/* Schedules as data: what is printed, that every policy gives a list that validates, and that every broken list is refused. The validator is held against a second, slower model
   of what instructions read and write: a list without one of its waits must be refused exactly where that model finds two accesses without an order. */
#include "test.h"

#define MAX_UNITS 6
#define MAX_LIST 4096

static llmpar_heap heap;
static llmpar_unit units[MAX_UNITS];
static int32_t unit_count;

static llmpar_status nothing(llmpar_unit_call *call)
{
    (void)call;
    return LLMPAR_OK;
}

static const llmpar_unit_op plain[] = {{"all", nothing, LLMPAR_COMPUTE, {0, 0}, 0, 0}};
static const llmpar_unit_op with_tp[] = {{"multiply", nothing, LLMPAR_COMPUTE, {0, 0}, 0, 0}, {"sum", nothing, LLMPAR_TP_REDUCE, {1, 0}, 0, 0}, {"add", nothing, LLMPAR_COMPUTE, {2, 1}, 0, 0}};

/* borrower, lender: indices, or borrower < 0. */
static void make_units(int32_t count, int32_t borrower, int32_t lender)
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
static llmpar_status validate(const llmpar_instruction *list, int32_t count, const llmpar_policy *policy)
{
    llmpar_error_clear(&err);
    return llmpar_schedule_validate(&heap, list, count, units, unit_count, policy, &err);
}

static llmpar_policy make_policy(int32_t micro_batches, int32_t no_sync, int32_t prefetch, int32_t unsharded, int32_t replicas, int32_t forward_only)
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

/* ---- the printed list ---- */

static void check_print(const llmpar_policy *policy, const char *want)
{
    static char text[16384];
    llmpar_schedule *schedule = NULL;
    CHECK_OK(llmpar_schedule_create(&heap, units, unit_count, policy, &schedule, &err));
    if (!schedule) return;
    size_t length = llmpar_schedule_print(schedule, units, NULL, text, sizeof text);
    CHECK_INT(length, strlen(text));
    if (strcmp(text, want)) TEST_FAIL("printed:\n%swant:\n%s", text, want);
    char small[40];
    memset(small, 'x', sizeof small);
    CHECK_INT(llmpar_schedule_print(schedule, units, NULL, small, 30), length);
    CHECK(!memcmp(small, text, 29) && small[29] == 0 && small[30] == 'x');
    CHECK_INT(llmpar_schedule_print(schedule, units, NULL, NULL, 0), length);
    llmpar_schedule_destroy(schedule);
    CHECK_INT(heap.live, 0);
}

TEST(printed)
{
    make_units(3, 2, 0); /* tied: u2 borrows u0 */
    llmpar_policy policy = make_policy(1, 0, 1, 0, 2, 0);
    check_print(&policy,
        "    0  compute  SCALAR_REDUCE  tokens\n"
        "    1  gather   GATHER         u0\n"
        "    2  gather   GATHER         u1\n"
        "    3  compute  FORWARD        u0 mb0  after 1\n"
        "          .  0 compute COMPUTE   all\n"
        "    4  compute  FREE           u0\n"
        "    5  gather   GATHER         u0  after 4\n"
        "    6  gather   GATHER         u2  after 4\n"
        "    7  compute  FORWARD        u1 mb0  after 2\n"
        "          .  0 compute COMPUTE   multiply\n"
        "          .  1 tp      TP_REDUCE sum  after .0\n"
        "          .  2 compute COMPUTE   add  after .1,0\n"
        "    8  compute  FREE           u1\n"
        "    9  compute  FORWARD        u2 mb0  after 6,5\n"
        "   10  gather   GATHER         u1  after 8\n"
        "   11  compute  BACKWARD       u2 mb0 -> local0, u0.borrowed local0  after 6,5\n"
        "          .  0 compute COMPUTE   all\n"
        "   12  reduce   REDUCE         u2 local0 -> shard0  after 11\n"
        "   13  reduce   REDUCE_REPLICA u2 shard0  after 11\n"
        "   14  reduce   REDUCE         u0.borrowed local0 -> shard0  after 11\n"
        "   15  reduce   REDUCE_REPLICA u0.borrowed shard0  after 11\n"
        "   16  compute  FREE           u0\n"
        "   17  compute  FREE           u2\n"
        "   18  gather   GATHER         u0  after 17\n"
        "   19  compute  BACKWARD       u1 mb0 -> local0  after 10\n"
        "   20  reduce   FREE           u2 local0\n" /* before the next reduction: u0's backward waits for 21, not for 23 */
        "   21  reduce   FREE           u0.borrowed local0\n"
        "   22  reduce   REDUCE         u1 local0 -> shard0  after 19\n"
        "   23  reduce   REDUCE_REPLICA u1 shard0  after 19\n"
        "   24  compute  FREE           u1\n"
        "   25  compute  BACKWARD       u0 mb0 -> local0  after 18,21\n"
        "   26  reduce   FREE           u1 local0\n"
        "   27  reduce   REDUCE         u0 local0 -> shard0  after 25\n"
        "   28  reduce   REDUCE_REPLICA u0 shard0  after 25\n"
        "   29  compute  FREE           u0\n"
        "   30  reduce   FREE           u0 local0\n"
        "   31  reduce   ACCUMULATE     u0 shard0 += borrowed shard0\n"
        "   32  reduce   NORM           u0 shard0\n"
        "   33  reduce   NORM           u1 shard0\n"
        "   34  reduce   NORM           u2 shard0\n"
        "   35  reduce   SCALAR_REDUCE  loss, norm  after 29\n"
        "   36  compute  OPTIM          u0 shard0 if finite  after 35\n"
        "   37  compute  OPTIM          u1 shard0 if finite  after 35\n"
        "   38  compute  OPTIM          u2 shard0 if finite  after 35\n");
    make_units(1, -1, 0); /* whole parameters, two micro-batches kept local */
    policy = make_policy(2, 1, 0, 1, 2, 0);
    check_print(&policy,
        "    0  compute  SCALAR_REDUCE  tokens\n"
        "    1  compute  FORWARD        u0 mb0\n"
        "          .  0 compute COMPUTE   all\n"
        "    2  compute  BACKWARD       u0 mb0 -> shard0\n"
        "          .  0 compute COMPUTE   all\n"
        "    3  compute  FORWARD        u0 mb1\n"
        "    4  compute  BACKWARD       u0 mb1 -> shard1\n"
        "    5  compute  ACCUMULATE     u0 shard0 += shard1\n"
        "    6  reduce   REDUCE_REPLICA u0 shard0  after 5\n"
        "    7  reduce   NORM           u0 shard0  after 5\n"
        "    8  reduce   SCALAR_REDUCE  loss, norm  after 5\n"
        "    9  compute  OPTIM          u0 shard0 if finite  after 8\n");
    make_units(2, -1, 0); /* evaluation */
    policy = make_policy(2, 0, 0, 0, 1, 1);
    check_print(&policy,
        "    0  compute  SCALAR_REDUCE  tokens\n"
        "    1  gather   GATHER         u0\n"
        "    2  compute  FORWARD        u0 mb0  after 1\n"
        "          .  0 compute COMPUTE   all\n"
        "    3  compute  FREE           u0\n"
        "    4  gather   GATHER         u1  after 3\n"
        "    5  compute  FORWARD        u1 mb0  after 4\n"
        "          .  0 compute COMPUTE   multiply\n"
        "          .  1 tp      TP_REDUCE sum  after .0\n"
        "          .  2 compute COMPUTE   add  after .1,0\n"
        "    6  compute  FREE           u1\n"
        "    7  gather   GATHER         u0  after 6\n"
        "    8  compute  FORWARD        u0 mb1  after 7\n"
        "    9  compute  FREE           u0\n"
        "   10  gather   GATHER         u1  after 9\n"
        "   11  compute  FORWARD        u1 mb1  after 10\n"
        "   12  compute  FREE           u1\n"
        "   13  reduce   SCALAR_REDUCE  loss, norm  after 12\n");
}

/* ---- the slow model: what instructions read and write, and which are ordered ---- */

#define WORDS (MAX_LIST / 64)
static uint64_t before[MAX_LIST][WORDS]; /* bit j of row i: j is complete before i starts */

static int is_before(int32_t j, int32_t i) { return (int)(before[i][j / 64] >> (j % 64) & 1); }
static void put_before(int32_t j, int32_t i)
{
    for (int w = 0; w < WORDS; w++) before[i][w] |= before[j][w];
    before[i][j / 64] |= (uint64_t)1 << (j % 64);
}

static void order(const llmpar_instruction *list, int32_t count)
{
    int32_t last[LLMPAR_STREAM_COUNT] = {-1, -1, -1, -1}, host[2], hosts = 0;
    for (int32_t i = 0; i < count; i++) {
        memset(before[i], 0, sizeof before[i]);
        if (last[list[i].stream] >= 0) put_before(last[list[i].stream], i);
        for (int32_t w = 0; w < list[i].wait_count; w++) put_before(list[i].waits[w], i);
        for (int32_t h = 0; h < hosts; h++) put_before(host[h], i); /* the host waited for it before it issued i */
        last[list[i].stream] = i;
        if (list[i].op == LLMPAR_OP_SCALAR_REDUCE && hosts < 2) host[hosts++] = i;
    }
}

enum { TOKENS, LOSS, NORMS, VERDICT, ACTIVATIONS, STORED, PARAMS = STORED + MAX_UNITS, BUFFERS = PARAMS + MAX_UNITS, RESOURCES = BUFFERS + MAX_UNITS * 4 * LLMPAR_GRAD_SLOTS };
static int32_t buffer_of(int32_t unit, int32_t use, int32_t local, int32_t slot) { return BUFFERS + ((unit * 2 + use) * 2 + local) * LLMPAR_GRAD_SLOTS + slot; }

typedef enum access_kind { READS = 0, WRITES = 1, BEGINS = 2 } access_kind; /* BEGINS: writes memory of its own, nothing before matters */
typedef struct access_list { int32_t resource[8]; access_kind kind[8]; int count; } access_list;

static void add_access(access_list *a, int32_t resource, access_kind kind)
{
    a->resource[a->count] = resource;
    a->kind[a->count++] = kind;
}

static void accesses(const llmpar_instruction *in, const llmpar_policy *policy, access_list *a)
{
    int32_t u = in->unit, borrow = u >= 0 ? units[u].borrow - 1 : -1, parameters = policy->shards < 2 ? STORED : PARAMS;
    a->count = 0;
    switch (in->op) {
    case LLMPAR_OP_GATHER:
        add_access(a, STORED + u, READS);
        add_access(a, PARAMS + u, BEGINS);
        break;
    case LLMPAR_OP_FREE: add_access(a, in->slot < 0 ? PARAMS + u : buffer_of(u, in->use, in->local, in->slot), WRITES); break;
    case LLMPAR_OP_FORWARD:
    case LLMPAR_OP_BACKWARD:
        add_access(a, TOKENS, READS);
        add_access(a, parameters + u, READS);
        if (borrow >= 0) add_access(a, parameters + borrow, READS);
        add_access(a, ACTIVATIONS, WRITES);
        if (in->op == LLMPAR_OP_FORWARD) {
            if (u == unit_count - 1) add_access(a, LOSS, WRITES);
        } else {
            add_access(a, buffer_of(u, 0, in->local, in->slot), BEGINS);
            if (borrow >= 0) add_access(a, buffer_of(borrow, 1, in->local, in->from), BEGINS);
        }
        break;
    case LLMPAR_OP_REDUCE:
        add_access(a, buffer_of(u, in->use, 1, in->from), READS);
        add_access(a, buffer_of(u, in->use, 0, in->slot), BEGINS);
        break;
    case LLMPAR_OP_REDUCE_REPLICA: add_access(a, buffer_of(u, in->use, 0, in->slot), WRITES); break;
    case LLMPAR_OP_ACCUMULATE:
        add_access(a, buffer_of(u, in->use, in->local, in->slot), WRITES);
        add_access(a, buffer_of(u, in->from_use, in->local, in->from), WRITES); /* released */
        break;
    case LLMPAR_OP_NORM:
        add_access(a, buffer_of(u, in->use, 0, in->slot), READS);
        add_access(a, NORMS, WRITES);
        break;
    case LLMPAR_OP_SCALAR_REDUCE:
        add_access(a, in->pass ? VERDICT : TOKENS, BEGINS);
        add_access(a, LOSS, in->pass ? WRITES : BEGINS);
        add_access(a, NORMS, in->pass ? WRITES : BEGINS);
        break;
    case LLMPAR_OP_OPTIM:
        add_access(a, VERDICT, READS);
        add_access(a, buffer_of(u, in->use, 0, in->slot), WRITES);
        add_access(a, STORED + u, WRITES);
        break;
    }
}

/* Two accesses of one thing, at least one a write, on streams that do not order them? */
static int has_hazard(const llmpar_instruction *list, int32_t count, const llmpar_policy *policy)
{
    static struct { int32_t index[MAX_LIST]; unsigned char writes[MAX_LIST]; int32_t count; } seen[RESOURCES];
    order(list, count);
    for (int32_t r = 0; r < RESOURCES; r++) seen[r].count = 0;
    for (int32_t i = 0; i < count; i++) {
        access_list a;
        accesses(&list[i], policy, &a);
        for (int k = 0; k < a.count; k++) {
            int32_t r = a.resource[k];
            if (a.kind[k] == BEGINS) seen[r].count = 0;
            for (int32_t j = 0; j < seen[r].count; j++)
                if ((a.kind[k] != READS || seen[r].writes[j]) && !is_before(seen[r].index[j], i)) return 1;
            seen[r].index[seen[r].count] = i;
            seen[r].writes[seen[r].count++] = a.kind[k] != READS;
        }
    }
    return 0;
}

/* May two neighbours not change places? NORMs only add to an order-free sum. */
static int conflict(const llmpar_instruction *x, const llmpar_instruction *y, const llmpar_policy *policy)
{
    access_list a, b;
    accesses(x, policy, &a);
    accesses(y, policy, &b);
    for (int i = 0; i < a.count; i++)
        for (int j = 0; j < b.count; j++) {
            if (a.resource[i] != b.resource[j] || (a.kind[i] == READS && b.kind[j] == READS)) continue;
            if (a.resource[i] == NORMS && x->op == y->op) continue;
            if (a.resource[i] == ACTIVATIONS && x->micro_batch != y->micro_batch && (x->op != y->op || x->unit != y->unit)) continue; /* another micro-batch's */
            return 1;
        }
    return 0;
}

/* ---- changing a list ---- */

static llmpar_instruction changed[MAX_LIST];

static int32_t without(const llmpar_instruction *list, int32_t count, int32_t gone)
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

static int32_t with_twice(const llmpar_instruction *list, int32_t count, int32_t again)
{
    for (int32_t i = 0; i <= count; i++) {
        changed[i] = list[i <= again ? i : i - 1];
        for (int32_t w = 0; w < changed[i].wait_count; w++) changed[i].waits[w] += changed[i].waits[w] > again;
    }
    return count + 1;
}

static void with_swapped(const llmpar_instruction *list, int32_t count, int32_t first)
{
    memcpy(changed, list, (size_t)count * sizeof *list);
    changed[first] = list[first + 1];
    changed[first + 1] = list[first];
    for (int32_t i = 0; i < count; i++)
        for (int32_t w = 0; w < changed[i].wait_count; w++) {
            int32_t *wait = &changed[i].waits[w];
            if (*wait == first) *wait = first + 1;
            else if (*wait == first + 1) *wait = first;
        }
}

static void without_wait(const llmpar_instruction *list, int32_t count, int32_t index, int32_t wait)
{
    memcpy(changed, list, (size_t)count * sizeof *list);
    llmpar_instruction *in = &changed[index];
    for (int32_t w = wait; w + 1 < in->wait_count; w++) in->waits[w] = in->waits[w + 1];
    in->wait_count--;
}

/* ---- random policies ---- */

static uint64_t random_state = 1;
static int32_t random_below(int32_t n)
{
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return (int32_t)((random_state >> 33) % (uint64_t)n);
}

static llmpar_schedule *random_schedule(int32_t most_units, int32_t most_micro_batches, char what[160])
{
    int32_t count = 1 + random_below(most_units), borrower = -1, lender = 0;
    if (count > 1 && random_below(2)) {
        borrower = random_below(count);
        lender = (borrower + 1 + random_below(count - 1)) % count;
    }
    make_units(count, borrower, lender);
    llmpar_policy policy = make_policy(1 + random_below(most_micro_batches), random_below(2), random_below(5), random_below(3) == 0, 1 + random_below(2), random_below(5) == 0);
    policy.reshard = random_below(2) ? LLMPAR_RESHARD_NEVER : LLMPAR_RESHARD_DEFAULT;
    snprintf(what, 160, "%d units, %d borrows %d, micro_batches %d no_sync %d prefetch %d unsharded %d replicas %d keep %d forward_only %d", count, borrower, lender, policy.micro_batches, policy.no_sync, policy.prefetch,
             policy.shards < 2, policy.replicas, (int)policy.reshard, policy.forward_only);
    llmpar_schedule *schedule = NULL;
    llmpar_error_clear(&err);
    if (llmpar_schedule_create(&heap, units, count, &policy, &schedule, &err)) TEST_FAIL("%s: %s", what, err.text);
    return schedule;
}

TEST(every_policy_validates)
{
    char what[160];
    for (int i = 0; i < 4000; i++) {
        llmpar_schedule *s = random_schedule(6, 8, what);
        if (!s) continue;
        if (validate(s->list, s->count, &s->policy)) TEST_FAIL("%s: %s", what, err.text);
        if (i % 8 == 0 && (s->count > MAX_LIST || has_hazard(s->list, s->count, &s->policy))) TEST_FAIL("%s: the validator passes a list with unordered accesses", what);
        llmpar_schedule_destroy(s);
    }
    CHECK_INT(heap.live, 0);
}

/* Nothing in a list may be left out or done twice, and a pair of neighbours may change places exactly if they share nothing and the order of streams survives. */
TEST(dropped_doubled_swapped)
{
    char what[160];
    for (int k = 0; k < 400; k++) {
        llmpar_schedule *s = random_schedule(4, 4, what);
        for (int32_t i = 0; s && i < s->count; i++) {
            const char *name = llmpar_op_name(s->list[i].op);
            if (!validate(changed, without(s->list, s->count, i), &s->policy)) TEST_FAIL("%s: passes without instruction %d, %s", what, i, name);
            if (!validate(changed, with_twice(s->list, s->count, i), &s->policy)) TEST_FAIL("%s: passes with instruction %d, %s, twice", what, i, name);
            if (i + 1 == s->count) continue;
            with_swapped(s->list, s->count, i);
            int bad = conflict(&s->list[i], &s->list[i + 1], &s->policy);
            for (int32_t w = 0; w < changed[i].wait_count; w++) bad |= changed[i].waits[w] >= i;
            if (!bad) bad = has_hazard(changed, s->count, &s->policy);
            if (bad != (validate(changed, s->count, &s->policy) != LLMPAR_OK)) TEST_FAIL("%s: %s with instructions %d, %s, and %s swapped: %s", what, bad ? "passes" : "refused", i, name, llmpar_op_name(s->list[i + 1].op), err.text);
        }
        llmpar_schedule_destroy(s);
    }
}

/* A wait may go, and an instruction move to another stream, exactly where the slow model says so. */
TEST(waits_and_streams)
{
    char what[160];
    int needed = 0, spare = 0;
    for (int k = 0; k < 400; k++) {
        llmpar_schedule *s = random_schedule(4, 4, what);
        for (int32_t i = 0; s && i < s->count; i++) {
            llmpar_op op = s->list[i].op;
            for (int32_t w = 0; w < s->list[i].wait_count; w++) {
                without_wait(s->list, s->count, i, w);
                int bad = has_hazard(changed, s->count, &s->policy);
                needed += bad;
                spare += !bad;
                if (bad != (validate(changed, s->count, &s->policy) != LLMPAR_OK))
                    TEST_FAIL("%s: %s without the wait of %d, %s, for %d, %s: %s", what, bad ? "passes" : "refused", i, llmpar_op_name(op), s->list[i].waits[w], llmpar_op_name(s->list[s->list[i].waits[w]].op), err.text);
            }
            memcpy(changed, s->list, (size_t)s->count * sizeof *changed);
            changed[i].stream = (llmpar_stream_id)((changed[i].stream + 1 + random_below(3)) % LLMPAR_STREAM_COUNT);
            int bad = op == LLMPAR_OP_FORWARD || op == LLMPAR_OP_BACKWARD || has_hazard(changed, s->count, &s->policy);
            if (bad != (validate(changed, s->count, &s->policy) != LLMPAR_OK)) TEST_FAIL("%s: %s with %d, %s, on stream %d: %s", what, bad ? "passes" : "refused", i, llmpar_op_name(op), changed[i].stream, err.text);
        }
        llmpar_schedule_destroy(s);
    }
    CHECK(needed > 1000 && spare > 1000);
}

static int is_lent(int32_t unit)
{
    int lent = 0;
    for (int32_t i = 0; i < unit_count; i++) lent |= units[i].borrow - 1 == unit;
    return lent;
}

enum { UNIT = 1, MICRO = 2, PASS = 4, USE = 8, SLOT = 16, FROM = 32, FROM_USE = 64, LOCAL = 128, PREDICATE = 256 };

TEST(operands)
{
    char what[160];
    for (int k = 0; k < 400; k++) {
        llmpar_schedule *s = random_schedule(4, 4, what);
        for (int32_t i = 0; s && i < s->count; i++) {
            const llmpar_instruction *in = &s->list[i];
            int fields = 0;
            switch (in->op) {
            case LLMPAR_OP_GATHER: fields = UNIT | PREDICATE; break;
            case LLMPAR_OP_FREE: fields = UNIT | SLOT | PREDICATE | (in->slot >= 0 ? USE | LOCAL : 0); break;
            case LLMPAR_OP_FORWARD: fields = UNIT | MICRO | PASS | PREDICATE; break;
            case LLMPAR_OP_BACKWARD: fields = UNIT | MICRO | SLOT | LOCAL | PREDICATE | (units[in->unit].borrow ? FROM : 0); break;
            case LLMPAR_OP_REDUCE: fields = UNIT | USE | SLOT | FROM | PREDICATE; break;
            case LLMPAR_OP_REDUCE_REPLICA: fields = UNIT | USE | SLOT | PREDICATE; break;
            case LLMPAR_OP_ACCUMULATE: /* where a unit has two uses, adding across them is another order of the same sum */
                fields = UNIT | LOCAL | SLOT | FROM | PREDICATE | (is_lent(in->unit) ? 0 : USE | FROM_USE);
                break;
            case LLMPAR_OP_NORM: fields = UNIT | USE | SLOT | PREDICATE; break;
            case LLMPAR_OP_SCALAR_REDUCE: fields = PASS | PREDICATE; break;
            case LLMPAR_OP_OPTIM: fields = UNIT | USE | SLOT | PREDICATE; break;
            }
            for (int field = 1; field <= PREDICATE; field *= 2) {
                if (!(fields & field)) continue;
                memcpy(changed, s->list, (size_t)s->count * sizeof *changed);
                llmpar_instruction *c = &changed[i];
                switch (field) {
                case UNIT: c->unit = unit_count > 1 ? (c->unit + 1) % unit_count : 1; break;
                case MICRO: c->micro_batch++; break;
                case PASS: c->pass = c->op == LLMPAR_OP_SCALAR_REDUCE ? !c->pass : LLMPAR_PASS_EVAL - c->pass; break;
                case USE: c->use = !c->use; break;
                case SLOT: c->slot++; break;
                case FROM: c->from++; break;
                case FROM_USE: c->from_use = !c->from_use; break;
                case LOCAL: c->local = !c->local; break;
                default: c->predicate = c->predicate == LLMPAR_ALWAYS ? LLMPAR_IF_FINITE : LLMPAR_ALWAYS; break;
                }
                if (!validate(changed, s->count, &s->policy)) TEST_FAIL("%s: passes with field %d of instruction %d, %s, changed", what, field, i, llmpar_op_name(in->op));
            }
        }
        llmpar_schedule_destroy(s);
    }
}

/* ---- one broken list for every reason ---- */

typedef enum edit_kind { END = 0, DROP, TWICE, SET, NO_WAITS, WAIT } edit_kind;
/* SET: which member becomes `value`; WAIT: the nth op also waits for instruction `value` (of the list as it then is). */
typedef enum member { NO_MEMBER = 0, OP, STREAM, OF_UNIT, OF_MICRO, OF_PASS, OF_USE, OF_SLOT, OF_FROM, OF_FROM_USE, OF_LOCAL, OF_PREDICATE, WAIT_COUNT, WAIT_0 } member;
typedef struct edit { edit_kind kind; llmpar_op op; int nth; member what; int value; } edit;

static int32_t find(const llmpar_instruction *list, int32_t count, llmpar_op op, int nth)
{
    for (int32_t i = 0; i < count; i++)
        if (list[i].op == op && nth-- == 0) return i;
    TEST_FAIL("no such %s", llmpar_op_name(op));
    return 0;
}

static int32_t apply(llmpar_instruction *list, int32_t count, const edit *e)
{
    int32_t at = find(list, count, e->op, e->nth);
    llmpar_instruction *in = &list[at];
    switch (e->kind) {
    case DROP: count = without(list, count, at); memcpy(list, changed, (size_t)count * sizeof *list); break;
    case TWICE: count = with_twice(list, count, at); memcpy(list, changed, (size_t)count * sizeof *list); break;
    case NO_WAITS: in->wait_count = 0; break;
    case WAIT: in->waits[in->wait_count++] = e->value; break;
    default:
        switch (e->what) {
        case OP: in->op = (llmpar_op)e->value; break;
        case STREAM: in->stream = (llmpar_stream_id)e->value; break;
        case OF_UNIT: in->unit = e->value; break;
        case OF_MICRO: in->micro_batch = e->value; break;
        case OF_PASS: in->pass = e->value; break;
        case OF_USE: in->use = e->value; break;
        case OF_SLOT: in->slot = e->value; break;
        case OF_FROM: in->from = e->value; break;
        case OF_FROM_USE: in->from_use = e->value; break;
        case OF_LOCAL: in->local = e->value; break;
        case OF_PREDICATE: in->predicate = (llmpar_predicate)e->value; break;
        case WAIT_COUNT: in->wait_count = e->value; break;
        default: in->waits[0] = e->value; break;
        }
    }
    return count;
}

/* Policies of the table: two units, no borrowing.
   SHARDED   0 SCALAR 1 GATHER u0 2 FORWARD u0 3 FREE u0 4 GATHER u1 5 FORWARD u1 6 BACKWARD u1 7 REDUCE u1 8 FREE u1 9 GATHER u0 10 BACKWARD u0 11 REDUCE u0 12 FREE u1 local0 13 FREE u0 14 FREE u0 local0
             15 NORM u0 16 NORM u1 17 SCALAR 18 OPTIM u0 19 OPTIM u1 */
enum { SHARDED, TWO_MICRO, KEPT, REPLICAS, WHOLE, EVALUATION, POLICIES };
static const struct { int policy; edit edits[6]; const char *text; } broken[] = {
    { SHARDED, {{ SET, LLMPAR_OP_FREE, 0, OP, 0 }}, "no such op" },
    { SHARDED, {{ SET, LLMPAR_OP_FREE, 0, OP, 15 }}, "no such op" },
    { SHARDED, {{ SET, LLMPAR_OP_NORM, 0, STREAM, LLMPAR_STREAM_COUNT }}, "no such stream" },
    { SHARDED, {{ SET, LLMPAR_OP_NORM, 0, STREAM, -1 }}, "no such stream" },
    { SHARDED, {{ SET, LLMPAR_OP_FORWARD, 0, OF_UNIT, 2 }}, "instruction 2, FORWARD -: no such unit" },
    { SHARDED, {{ SET, LLMPAR_OP_OPTIM, 1, OF_UNIT, -1 }}, "instruction 19, OPTIM -: no such unit" },
    { SHARDED, {{ SET, LLMPAR_OP_REDUCE, 0, OF_USE, 2 }}, "use or local is neither 0 nor 1" },
    { SHARDED, {{ SET, LLMPAR_OP_REDUCE, 0, OF_FROM_USE, -1 }}, "use or local is neither 0 nor 1" },
    { SHARDED, {{ SET, LLMPAR_OP_BACKWARD, 0, OF_LOCAL, 2 }}, "use or local is neither 0 nor 1" },
    { SHARDED, {{ SET, LLMPAR_OP_NORM, 0, OF_SLOT, LLMPAR_GRAD_SLOTS }}, "no such gradient buffer" },
    { SHARDED, {{ SET, LLMPAR_OP_REDUCE, 0, OF_FROM, -2 }}, "no such gradient buffer" },
    { SHARDED, {{ SET, LLMPAR_OP_FORWARD, 1, OF_MICRO, 1 }}, "no such micro-batch" },
    { SHARDED, {{ SET, LLMPAR_OP_BACKWARD, 1, OF_MICRO, -1 }}, "no such micro-batch" },
    { SHARDED, {{ SET, LLMPAR_OP_BACKWARD, 0, STREAM, LLMPAR_STREAM_TP }}, "is not on the compute stream" },
    { SHARDED, {{ SET, LLMPAR_OP_NORM, 0, OF_PREDICATE, LLMPAR_IF_FINITE }}, "has a predicate, which only OPTIM and what follows from it ask" },
    { SHARDED, {{ SET, LLMPAR_OP_OPTIM, 0, WAIT_COUNT, LLMPAR_WAITS + 1 }}, "more waits than an instruction holds" },
    { SHARDED, {{ SET, LLMPAR_OP_OPTIM, 0, WAIT_COUNT, -1 }}, "more waits than an instruction holds" },
    { SHARDED, {{ SET, LLMPAR_OP_REDUCE, 0, WAIT_0, 7 }}, "waits for an instruction that does not come before it" },
    { SHARDED, {{ SET, LLMPAR_OP_REDUCE, 0, WAIT_0, -1 }}, "waits for an instruction that does not come before it" },
    { SHARDED, {{ SET, LLMPAR_OP_BACKWARD, 0, OF_SLOT, -1 }}, "a gradient buffer is missing" },
    { SHARDED, {{ SET, LLMPAR_OP_REDUCE, 0, OF_FROM, -1 }}, "a gradient buffer is missing" },
    { SHARDED, {{ SET, LLMPAR_OP_NORM, 0, OF_SLOT, -1 }}, "a gradient buffer is missing" },
    { SHARDED, {{ SET, LLMPAR_OP_REDUCE, 1, OF_FROM, 1 }}, "instruction 12, REDUCE u0: reads a gradient buffer that nothing has written" },
    { SHARDED, {{ NO_WAITS, LLMPAR_OP_REDUCE, 0, NO_MEMBER, 0 }}, "instruction 7, REDUCE u1: reads a gradient buffer without waiting for its writer" },
    { SHARDED, {{ DROP, LLMPAR_OP_GATHER, 2, NO_MEMBER, 0 }}, "instruction 9, BACKWARD u0: uses parameters that are not gathered" },
    { SHARDED, {{ NO_WAITS, LLMPAR_OP_FORWARD, 1, NO_MEMBER, 0 }}, "instruction 5, FORWARD u1: uses parameters without waiting for their gather" },
    { SHARDED, {{ SET, LLMPAR_OP_FORWARD, 0, OF_PASS, LLMPAR_PASS_EVAL }}, "its pass does not fit the policy" },
    { SHARDED, {{ SET, LLMPAR_OP_FORWARD, 0, OF_PASS, LLMPAR_PASS_BACKWARD }}, "its pass does not fit the policy" },
    { EVALUATION, {{ SET, LLMPAR_OP_FORWARD, 0, OF_PASS, LLMPAR_PASS_FORWARD }}, "its pass does not fit the policy" },
    { TWO_MICRO, {{ SET, LLMPAR_OP_FORWARD, 0, OF_MICRO, 1 }}, "micro-batches are not run once each, in order" },
    { TWO_MICRO, {{ SET, LLMPAR_OP_BACKWARD, 2, OF_MICRO, 0 }}, "micro-batches are not run once each, in order" },
    { SHARDED, {{ DROP, LLMPAR_OP_FORWARD, 0, NO_MEMBER, 0 }, { SET, LLMPAR_OP_FREE, 0, STREAM, LLMPAR_STREAM_GATHER }}, "FORWARD u1: runs before the unit in front of it" },
    { SHARDED, {{ DROP, LLMPAR_OP_FORWARD, 1, NO_MEMBER, 0 }}, "BACKWARD u1: runs before the unit behind it" },
    { SHARDED, {{ DROP, LLMPAR_OP_BACKWARD, 0, NO_MEMBER, 0 }, { DROP, LLMPAR_OP_REDUCE, 0, NO_MEMBER, 0 }}, "BACKWARD u0: runs before the unit behind it" },
    { EVALUATION, {{ SET, LLMPAR_OP_FREE, 1, OP, LLMPAR_OP_BACKWARD }, { SET, LLMPAR_OP_BACKWARD, 0, OF_SLOT, 0 }, { SET, LLMPAR_OP_BACKWARD, 0, OF_MICRO, 0 }}, "backward in a forward-only schedule" },
    { SHARDED, {{ DROP, LLMPAR_OP_SCALAR_REDUCE, 0, NO_MEMBER, 0 }}, "instruction 1, FORWARD u0: runs before the token count is known" },
    { EVALUATION, {{ DROP, LLMPAR_OP_SCALAR_REDUCE, 0, NO_MEMBER, 0 }}, "runs before the token count is known" },
    { TWO_MICRO, {{ DROP, LLMPAR_OP_FREE, 2, NO_MEMBER, 0 }}, "overwrites a gradient buffer that is still needed" },
    { SHARDED, {{ SET, LLMPAR_OP_BACKWARD, 0, OF_LOCAL, 0 }}, "writes whole gradients into a shard buffer" },
    { SHARDED, {{ TWICE, LLMPAR_OP_REDUCE, 0, NO_MEMBER, 0 }, { SET, LLMPAR_OP_REDUCE, 1, OF_SLOT, 1 }}, "instruction 8, REDUCE u1: reduces a gradient twice" },
    { WHOLE, {{ SET, LLMPAR_OP_REDUCE_REPLICA, 0, OP, LLMPAR_OP_REDUCE }, { SET, LLMPAR_OP_REDUCE, 0, OF_FROM, 0 }}, "reduces into shards where gradients are whole" },
    { TWO_MICRO, {{ SET, LLMPAR_OP_ACCUMULATE, 0, OF_FROM, 0 }}, "adds a gradient buffer to itself" },
    { TWO_MICRO, {{ DROP, LLMPAR_OP_FREE, 4, NO_MEMBER, 0 }, { SET, LLMPAR_OP_BACKWARD, 3, OF_SLOT, 1 }, { SET, LLMPAR_OP_REDUCE, 3, OP, LLMPAR_OP_ACCUMULATE }, { SET, LLMPAR_OP_ACCUMULATE, 1, OF_SLOT, 0 }, { SET, LLMPAR_OP_ACCUMULATE, 1, OF_FROM, 1 }, { SET, LLMPAR_OP_ACCUMULATE, 1, OF_LOCAL, 1 }}, "adds to a gradient that was already reduced or measured" },
    { REPLICAS, {{ DROP, LLMPAR_OP_REDUCE_REPLICA, 3, NO_MEMBER, 0 }}, "adds gradients that are not at the same stage of reduction" },
    { SHARDED, {{ TWICE, LLMPAR_OP_FREE, 0, NO_MEMBER, 0 }}, "instruction 4, FREE u0: frees parameters that are not gathered" },
    { WHOLE, {{ SET, LLMPAR_OP_REDUCE_REPLICA, 0, OP, LLMPAR_OP_FREE }, { SET, LLMPAR_OP_FREE, 0, OF_SLOT, -1 }}, "frees parameters that are not gathered" },
    { SHARDED, {{ SET, LLMPAR_OP_FREE, 0, STREAM, LLMPAR_STREAM_GATHER }}, "instruction 3, FREE u0: frees parameters that another stream may still use" },
    { SHARDED, {{ TWICE, LLMPAR_OP_FREE, 2, NO_MEMBER, 0 }}, "instruction 12, FREE u1: frees a gradient buffer that nothing has written" },
    { SHARDED, {{ DROP, LLMPAR_OP_REDUCE, 0, NO_MEMBER, 0 }}, "instruction 10, FREE u1: frees a gradient that was not reduced" },
    { SHARDED, {{ SET, LLMPAR_OP_FREE, 2, STREAM, LLMPAR_STREAM_COMPUTE }}, "instruction 11, FREE u1: frees a gradient buffer that another stream may still use" },
    { SHARDED, {{ TWICE, LLMPAR_OP_SCALAR_REDUCE, 0, NO_MEMBER, 0 }}, "instruction 1, SCALAR_REDUCE -: runs twice" },
    { SHARDED, {{ TWICE, LLMPAR_OP_SCALAR_REDUCE, 1, NO_MEMBER, 0 }}, "instruction 18, SCALAR_REDUCE -: runs twice" },
    { EVALUATION, {{ NO_WAITS, LLMPAR_OP_SCALAR_REDUCE, 1, NO_MEMBER, 0 }}, "runs before the loss is complete" },
    { SHARDED, {{ DROP, LLMPAR_OP_NORM, 1, NO_MEMBER, 0 }}, "instruction 16, SCALAR_REDUCE -: runs before every norm is known" },
    { SHARDED, {{ SET, LLMPAR_OP_NORM, 1, STREAM, LLMPAR_STREAM_GATHER }, { WAIT, LLMPAR_OP_NORM, 1, NO_MEMBER, 15 }}, "instruction 17, SCALAR_REDUCE -: does not wait for a norm" },
    { SHARDED, {{ SET, LLMPAR_OP_NORM, 1, STREAM, LLMPAR_STREAM_GATHER }, { WAIT, LLMPAR_OP_NORM, 1, NO_MEMBER, 14 }}, "instruction 16, NORM u1: adds to the norm at the same time as another stream" },
    { TWO_MICRO, {{ DROP, LLMPAR_OP_ACCUMULATE, 0, NO_MEMBER, 0 }}, "NORM u1: the gradient does not hold every micro-batch and use exactly once" },
    { WHOLE, {{ DROP, LLMPAR_OP_REDUCE_REPLICA, 0, NO_MEMBER, 0 }}, "NORM u1: the gradient is not reduced over all data ranks" },
    { SHARDED, {{ TWICE, LLMPAR_OP_NORM, 0, NO_MEMBER, 0 }}, "instruction 16, NORM u0: measures a gradient twice" },
    { SHARDED, {{ DROP, LLMPAR_OP_SCALAR_REDUCE, 1, NO_MEMBER, 0 }, { WAIT, LLMPAR_OP_OPTIM, 0, NO_MEMBER, 16 }}, "instruction 17, OPTIM u0: updates before the norm is known" },
    { SHARDED, {{ SET, LLMPAR_OP_OPTIM, 0, OF_PREDICATE, LLMPAR_ALWAYS }}, "updates without asking whether the gradient is finite" },
    { SHARDED, {{ SET, LLMPAR_OP_NORM, 0, OF_SLOT, 1 }}, "instruction 15, NORM u0: reads a gradient buffer that nothing has written" },
    { WHOLE, {{ SET, LLMPAR_OP_NORM, 0, OP, LLMPAR_OP_GATHER }}, "gathers parameters that are not sharded" },
    { SHARDED, {{ TWICE, LLMPAR_OP_GATHER, 0, NO_MEMBER, 0 }}, "instruction 2, GATHER u0: gathers parameters that are gathered already" },
    { SHARDED, {{ SET, LLMPAR_OP_OPTIM, 1, OP, LLMPAR_OP_GATHER }, { SET, LLMPAR_OP_GATHER, 3, OF_UNIT, 0 }, { SET, LLMPAR_OP_GATHER, 3, OF_PREDICATE, LLMPAR_ALWAYS }}, "instruction 19, GATHER u0: gathers parameters after their update" },
    { SHARDED, {{ TWICE, LLMPAR_OP_OPTIM, 0, NO_MEMBER, 0 }, { SET, LLMPAR_OP_OPTIM, 0, OP, LLMPAR_OP_GATHER }, { SET, LLMPAR_OP_GATHER, 3, OF_PREDICATE, LLMPAR_ALWAYS }, { SET, LLMPAR_OP_GATHER, 3, STREAM, LLMPAR_STREAM_GATHER }}, "instruction 19, OPTIM u0: updates parameters that are still gathered" },
    { WHOLE, {{ TWICE, LLMPAR_OP_REDUCE_REPLICA, 0, NO_MEMBER, 0 }}, "sums a gradient over replicas twice" },
    { EVALUATION, {{ DROP, LLMPAR_OP_FREE, 1, NO_MEMBER, 0 }, { WAIT, LLMPAR_OP_SCALAR_REDUCE, 1, NO_MEMBER, 5 }}, "end: parameters of unit u1, gathered by instruction 4, are never freed" },
    { SHARDED, {{ DROP, LLMPAR_OP_OPTIM, 1, NO_MEMBER, 0 }}, "end: gradient of unit u1, written by instruction 7, is never consumed" },
    { EVALUATION, {{ DROP, LLMPAR_OP_SCALAR_REDUCE, 1, NO_MEMBER, 0 }}, "end: the loss is never reduced" },
};

TEST(broken_lists)
{
    static llmpar_instruction list[256];
    llmpar_policy policy[POLICIES];
    policy[SHARDED] = make_policy(1, 0, 0, 0, 1, 0);
    policy[TWO_MICRO] = make_policy(2, 0, 0, 0, 1, 0);
    policy[KEPT] = make_policy(2, 1, 0, 0, 1, 0);
    policy[REPLICAS] = make_policy(2, 0, 0, 0, 2, 0);
    policy[WHOLE] = make_policy(1, 0, 0, 1, 2, 0);
    policy[EVALUATION] = make_policy(1, 0, 0, 0, 1, 1);
    make_units(2, -1, 0);
    for (size_t i = 0; i < sizeof broken / sizeof broken[0]; i++) {
        const llmpar_policy *p = &policy[broken[i].policy];
        llmpar_schedule *s = NULL;
        CHECK_OK(llmpar_schedule_create(&heap, units, unit_count, p, &s, &err));
        if (!s) return;
        int32_t count = s->count;
        memcpy(list, s->list, (size_t)count * sizeof *list);
        for (int e = 0; e < 6 && broken[i].edits[e].kind; e++) count = apply(list, count, &broken[i].edits[e]);
        llmpar_status status = validate(list, count, p);
        if (status != LLMPAR_ERR_SCHEDULE || !strstr(err.text, broken[i].text)) TEST_FAIL("row %d: want \"%s\", got %s, \"%s\"", (int)i, broken[i].text, llmpar_status_string(status), err.text);
        llmpar_schedule_destroy(s);
    }
    /* Nothing at all, and only forwards. */
    CHECK_STATUS(validate(list, 0, &policy[SHARDED]), LLMPAR_ERR_SCHEDULE);
    CHECK_TEXT(err.text, "end: unit u0 ran forward on 0 of 1 micro-batches");
    CHECK_STATUS(validate(list, -1, &policy[SHARDED]), LLMPAR_ERR_SCHEDULE);
    llmpar_schedule *s = NULL;
    CHECK_OK(llmpar_schedule_create(&heap, units, unit_count, &policy[WHOLE], &s, &err));
    if (s) CHECK_STATUS(validate(s->list, 3, &policy[WHOLE]), LLMPAR_ERR_SCHEDULE); /* SCALAR_REDUCE, two forwards */
    CHECK_TEXT(err.text, "end: unit u0 ran backward on 0 of 1 micro-batches and was not updated");
    /* A list is good for its policy alone. */
    for (int p = 0; p < POLICIES && s; p++) CHECK_STATUS(validate(s->list, s->count, &policy[p]), p == WHOLE ? LLMPAR_OK : LLMPAR_ERR_SCHEDULE);
    llmpar_schedule_destroy(s);
    CHECK_INT(heap.live, 0);
}

TEST(refused_policies)
{
    static const struct { int32_t units, borrower, lender, micro_batches, prefetch, replicas; const char *text; } rows[] = {
        { 0, -1, 0, 1, 0, 1, "0 units, expected at least 1" },
        { 2, -1, 0, -1, 0, 1, "micro_batches = -1" },
        { 2, -1, 0, (1 << 20) + 1, 0, 1, "micro_batches = 1048577" },
        { 2, -1, 0, 1, -1, 1, "prefetch = -1" },
        { 2, -1, 0, 1, 5, 1, "prefetch = 5, expected 0 .. 4" },
        { 2, -1, 0, 1, 0, -1, "replicas = -1" },
        { 2, 1, 1, 1, 0, 1, "unit u1 borrows unit 1" },
        { 2, 1, 2, 1, 0, 1, "unit u1 borrows unit 2" },
        { 2, 1, -3, 1, 0, 1, "unit u1 borrows unit -3" },
    };
    llmpar_schedule *s;
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        make_units(rows[i].units, rows[i].borrower, rows[i].lender);
        llmpar_policy policy = make_policy(rows[i].micro_batches, 0, rows[i].prefetch, 0, rows[i].replicas, 0);
        s = (llmpar_schedule *)units;
        llmpar_error_clear(&err);
        CHECK_STATUS(llmpar_schedule_create(&heap, units, unit_count, &policy, &s, &err), LLMPAR_ERR_ARGUMENT);
        CHECK(s == NULL);
        CHECK_TEXT(err.text, rows[i].text);
    }
    llmpar_policy policy = make_policy(1 << 20, 0, 0, 0, 1, 0); /* refused before a unit is looked at */
    llmpar_error_clear(&err);
    CHECK_STATUS(llmpar_schedule_create(&heap, units, 2048, &policy, &s, &err), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(err.text, "2048 units x 1048576 micro-batches, expected at most 16777216");
    policy = make_policy(0, 0, 0, 0, 0, 0); /* zeroes are defaults */
    make_units(3, 2, 0);
    units[1].borrow = 1; /* two borrowers */
    llmpar_error_clear(&err);
    CHECK_STATUS(llmpar_schedule_create(&heap, units, 3, &policy, &s, &err), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(err.text, "units u1 and u2 both borrow unit u0");
    units[1].borrow = 3; /* a borrower that lends */
    llmpar_error_clear(&err);
    CHECK_STATUS(llmpar_schedule_create(&heap, units, 3, &policy, &s, &err), LLMPAR_ERR_ARGUMENT);
    make_units(3, 2, 0);
    CHECK_OK(llmpar_schedule_create(&heap, units, 3, &policy, &s, &err));
    if (s) CHECK_OK(validate(s->list, s->count, &policy));
    if (s) CHECK_INT(s->policy.micro_batches, 1);
    llmpar_schedule_destroy(s);
    llmpar_schedule_destroy(NULL);
}

/* Every allocation of create and validate fails once. */
TEST(out_of_memory)
{
    llmpar_policy policy = make_policy(8, 0, 1, 0, 2, 0);
    llmpar_schedule *s = NULL;
    make_units(5, 4, 0);
    int failed = 0;
    for (uint64_t n = 1; n < 100; n++, failed++) {
        heap.fail_at = heap.calls + n;
        llmpar_error_clear(&err);
        llmpar_status status = llmpar_schedule_create(&heap, units, unit_count, &policy, &s, &err);
        heap.fail_at = 0;
        if (!status) break;
        CHECK_INT(status, LLMPAR_ERR_MEMORY);
        CHECK(s == NULL);
        CHECK_INT(heap.live, 0);
    }
    CHECK(failed > 5);
    for (uint64_t n = 1; s && n < 100; n++) {
        uint64_t live = heap.live;
        heap.fail_at = heap.calls + n;
        llmpar_status status = validate(s->list, s->count, &policy);
        heap.fail_at = 0;
        CHECK_INT(heap.live, live);
        if (!status) break;
        CHECK_INT(status, LLMPAR_ERR_MEMORY);
    }
    llmpar_schedule_destroy(s);
    CHECK_INT(heap.live, 0);
}

TEST_LIST(T_(printed), T_(every_policy_validates), T_(dropped_doubled_swapped), T_(waits_and_streams), T_(operands), T_(broken_lists), T_(refused_policies), T_(out_of_memory))
