/* Schedules as data: what is printed, which policies are refused, and one broken list for every reason that the validator has. Random policies: test_schedule_random.c. */
#include "schedule_units.h"

/* ---- the printed list ---- */

static void check_print_bytes(const llmpar_policy *policy, const uint64_t *bytes, const char *want)
{
    static char text[16384];
    llmpar_schedule *schedule = NULL;
    CHECK_OK(llmpar_schedule_create(&heap, units, unit_count, policy, &schedule, &err));
    if (!schedule) return;
    size_t length = llmpar_schedule_print(schedule, units, bytes, text, sizeof text);
    CHECK_INT(length, strlen(text));
    if (strcmp(text, want)) TEST_FAIL("printed:\n%swant:\n%s", text, want);
    char small[40];
    memset(small, 'x', sizeof small);
    CHECK_INT(llmpar_schedule_print(schedule, units, bytes, small, 30), length);
    CHECK(!memcmp(small, text, 29) && small[29] == 0 && small[30] == 'x');
    CHECK_INT(llmpar_schedule_print(schedule, units, bytes, NULL, 0), length);
    llmpar_schedule_destroy(schedule);
    CHECK_INT(heap.live, 0);
}

static void check_print(const llmpar_policy *policy, const char *want) { check_print_bytes(policy, NULL, want); }

TEST(printed)
{
    static const uint64_t bytes[64] = {0, 1, 999, 1000, 1048576, 70000000001u, UINT64_MAX};
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
    make_units(2, 1, 0); /* ZeRO-1 with tied units: whole gradients are reduced in place, the updated parts gathered in place */
    policy = make_policy(1, 0, 0, 0, 2, 0);
    policy.zero = LLMPAR_ZERO_1;
    policy.master = 1;
    check_print(&policy,
        "    0  compute  SCALAR_REDUCE  tokens\n"
        "    1  compute  FORWARD        u0 mb0\n"
        "          .  0 compute COMPUTE   all\n"
        "    2  compute  FORWARD        u1 mb0\n"
        "          .  0 compute COMPUTE   multiply\n"
        "          .  1 tp      TP_REDUCE sum  after .0\n"
        "          .  2 compute COMPUTE   add  after .1,0\n"
        "    3  compute  BACKWARD       u1 mb0 -> shard0, u0.borrowed shard0\n"
        "          .  0 compute COMPUTE   all\n"
        "    4  reduce   REDUCE         u1 shard0 in place  after 3\n"
        "    5  reduce   REDUCE_REPLICA u1 shard0  after 3\n"
        "    6  reduce   REDUCE         u0.borrowed shard0 in place  after 3\n"
        "    7  reduce   REDUCE_REPLICA u0.borrowed shard0  after 3\n"
        "    8  compute  BACKWARD       u0 mb0 -> shard0\n"
        "    9  reduce   REDUCE         u0 shard0 in place  after 8\n"
        "   10  reduce   REDUCE_REPLICA u0 shard0  after 8\n"
        "   11  reduce   ACCUMULATE     u0 shard0 += borrowed shard0\n"
        "   12  reduce   NORM           u0 shard0\n"
        "   13  reduce   NORM           u1 shard0\n"
        "   14  reduce   SCALAR_REDUCE  loss, norm  after 8\n"
        "   15  compute  OPTIM          u0 shard0 if finite  after 14\n"
        "   16  compute  CAST           u0 if finite\n"
        "   17  gather   GATHER         u0 if finite  after 16\n"
        "   18  compute  OPTIM          u1 shard0 if finite  after 14\n"
        "   19  compute  CAST           u1 if finite\n"
        "   20  gather   GATHER         u1 if finite  after 19\n");
    make_units(3, -1, 0); /* everything in stores, a frozen unit in front, one recomputed; bytes */
    units[0].frozen = 1;
    units[1].recompute = LLMPAR_RECOMPUTE_FULL;
    units[1].forward = plain;
    units[1].forward_count = 1;
    policy = make_policy(1, 0, 0, 0, 1, 0);
    policy.offload = 15;
    check_print_bytes(&policy, bytes,
        "    0  compute  SCALAR_REDUCE  tokens\n"
        "    1  offload  FETCH          u0 params  1 B\n"
        "    2  gather   GATHER         u0  999 B  after 1\n"
        "    3  gather   FREE           u0 fetched shard  1,000 B\n"
        "    4  compute  FORWARD        u0 mb0  1,048,576 B  after 2\n"
        "          .  0 compute COMPUTE   all\n"
        "    5  compute  FREE           u0  70,000,000,001 B\n"
        "    6  offload  FETCH          u1 params  18,446,744,073,709,551,615 B\n"
        "    7  gather   GATHER         u1  after 5,6\n"
        "    8  gather   FREE           u1 fetched shard\n"
        "    9  compute  FORWARD        u1 mb0  after 7\n"
        "   10  offload  STORE          u1 activations mb0  after 9\n"
        "   11  compute  FREE           u1\n"
        "   12  offload  FETCH          u2 params\n"
        "   13  gather   GATHER         u2  after 11,12\n"
        "   14  gather   FREE           u2 fetched shard\n"
        "   15  compute  FORWARD        u2 mb0  after 13\n"
        "   16  offload  FETCH          u1 activations mb0\n"
        "   17  compute  BACKWARD       u2 mb0 -> local0  after 13\n"
        "          .  0 compute COMPUTE   all\n"
        "   18  reduce   REDUCE         u2 local0 -> shard0  after 17\n"
        "   19  compute  FREE           u2\n"
        "   20  reduce   NORM           u2 shard0\n"
        "   21  offload  STORE          u2 grads shard0  after 20\n"
        "   22  offload  FETCH          u1 params\n"
        "   23  gather   GATHER         u1  after 19,22\n"
        "   24  gather   FREE           u1 fetched shard\n"
        "   25  compute  RECOMPUTE      u1 mb0  after 23\n"
        "   26  compute  BACKWARD       u1 mb0 -> local0\n"
        "   27  reduce   FREE           u2 local0\n"
        "   28  reduce   REDUCE         u1 local0 -> shard0  after 26\n"
        "   29  compute  FREE           u1\n"
        "   30  reduce   NORM           u1 shard0\n"
        "   31  offload  STORE          u1 grads shard0  after 30\n"
        "   32  reduce   FREE           u1 local0\n"
        "   33  reduce   SCALAR_REDUCE  loss, norm  after 29\n"
        "   34  offload  FETCH          u1 optimizer\n"
        "   35  offload  FETCH          u1 params\n"
        "   36  offload  FETCH          u1 grads shard0\n"
        "   37  offload  FETCH          u2 optimizer\n"
        "   38  offload  FETCH          u2 params\n"
        "   39  offload  FETCH          u2 grads shard0\n"
        "   40  compute  OPTIM          u1 shard0 if finite  after 33,36\n"
        "   41  offload  STORE          u1 optimizer  after 40\n"
        "   42  offload  STORE          u1 params\n"
        "   43  compute  OPTIM          u2 shard0 if finite  after 33,39\n"
        "   44  offload  STORE          u2 optimizer  after 43\n"
        "   45  offload  STORE          u2 params\n");
    make_units(2, -1, 0); /* two passes: the norm first, updates inside the second backward */
    units[1].forward = plain;
    units[1].forward_count = 1;
    policy = make_policy(1, 0, 0, 1, 1, 0);
    policy.update = LLMPAR_UPDATE_TWO_PASSES;
    check_print(&policy,
        "    0  compute  SCALAR_REDUCE  tokens\n"
        "    1  compute  FORWARD        u0 mb0\n"
        "          .  0 compute COMPUTE   all\n"
        "    2  compute  FORWARD        u1 mb0\n"
        "    3  compute  BACKWARD       u1 mb0 -> shard0\n"
        "          .  0 compute COMPUTE   all\n"
        "    4  reduce   NORM           u1 shard0  after 3\n"
        "    5  reduce   FREE           u1 shard0\n"
        "    6  compute  BACKWARD       u0 mb0 -> shard0  after 5\n"
        "    7  reduce   NORM           u0 shard0  after 6\n"
        "    8  reduce   FREE           u0 shard0\n"
        "    9  reduce   SCALAR_REDUCE  loss, norm  after 6\n"
        "   10  compute  FORWARD        u0 mb0 again\n"
        "   11  compute  FORWARD        u1 mb0 again\n"
        "   12  compute  BACKWARD       u1 mb0 again -> shard0  after 8\n"
        "   13  compute  OPTIM          u1 shard0 if finite\n"
        "   14  compute  BACKWARD       u0 mb0 again -> shard0  after 8\n"
        "   15  compute  OPTIM          u0 shard0 if finite\n");
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

/* ---- what a list keeps on the device ---- */

/* Is whoever runs at instruction i a user of the unit's parameters? */
static int uses(const llmpar_instruction *in, int32_t unit)
{
    int runs = in->op == LLMPAR_OP_FORWARD || in->op == LLMPAR_OP_RECOMPUTE || in->op == LLMPAR_OP_BACKWARD;
    return runs && (in->unit == unit || units[in->unit].borrow - 1 == unit);
}

/* Gathers stand as far ahead of their use as the policy says: `forward` or `backward` steps, fewer only at the begin of the list and, in ALWAYS, where the unit has to be freed first. */
static void check_prefetch(const llmpar_schedule *s, int32_t gather, const char *what)
{
    int32_t ahead = 0, before = 0, use = gather;
    while (use < s->count && !uses(&s->list[use], s->list[gather].unit)) use++;
    for (int32_t i = 0; i < use; i++) {
        int step = s->list[i].op == LLMPAR_OP_FORWARD || s->list[i].op == LLMPAR_OP_BACKWARD;
        before += step;
        ahead += step && i > gather;
    }
    int32_t depth = s->list[use].op == LLMPAR_OP_FORWARD ? s->policy.prefetch : s->policy.prefetch_backward;
    if (depth > before) depth = before;
    if (ahead > depth || (ahead < depth && s->policy.reshard != LLMPAR_RESHARD_ALWAYS)) TEST_FAIL("%s: instruction %d gathers %d steps ahead, want %d", what, gather, ahead, depth);
}

/* Units whose parameters go between forward and backward of a micro-batch: NEVER: none, ALWAYS: all, EVERY: by number. */
static void check_reshard(const llmpar_schedule *s, const char *what)
{
    for (int32_t u = 0; u < s->units; u++) {
        int32_t gathers = 0, freed = 0, turns = 0, was_backward = 1;
        for (int32_t i = 0, gone = 0; i < s->count; i++) {
            const llmpar_instruction *in = &s->list[i];
            gathers += in->op == LLMPAR_OP_GATHER && in->unit == u;
            if (in->op == LLMPAR_OP_FREE && in->unit == u && in->slot < 0 && in->what != LLMPAR_STATE_PARAMS) gone = 1;
            if (!uses(in, u)) continue;
            int backward = in->op != LLMPAR_OP_FORWARD;
            turns += backward && !was_backward;
            freed += backward && !was_backward && gone;
            was_backward = backward;
            gone = 0;
        }
        int stays = s->policy.reshard == LLMPAR_RESHARD_NEVER || (s->policy.reshard == LLMPAR_RESHARD_EVERY && (u + 1) % s->policy.reshard_every);
        if (stays && (gathers != 1 || freed)) TEST_FAIL("%s: unit %d is gathered %d times, want once", what, u, gathers);
        if (s->policy.reshard == LLMPAR_RESHARD_ALWAYS && freed != turns) TEST_FAIL("%s: unit %d is freed after %d of %d forwards", what, u, freed, turns);
        int last = u + 1 == s->units && s->policy.reshard != LLMPAR_RESHARD_ALWAYS;
        if (last && freed) TEST_FAIL("%s: the last unit is freed before its backward", what);
        if (!stays && !last && s->policy.prefetch_backward == 0 && !units[s->units - 1].borrow && freed != turns) TEST_FAIL("%s: unit %d is freed after %d of %d forwards without prefetching", what, u, freed, turns);
    }
}

/* What is offloaded or updated inside backward is on the device for as long as it must be. */
static void check_kept(const llmpar_schedule *s, const char *what)
{
    int32_t states = 0, params = 0, saved = 0, gradients = 0, tied = 0;
    int kept[LLMPAR_STATE_COUNT], inside = s->policy.update != LLMPAR_UPDATE_AFTER && !s->policy.forward_only, whole = llmpar_policy_whole_grads(&s->policy);
    for (int k = 0; k < LLMPAR_STATE_COUNT; k++) kept[k] = (int)(s->policy.offload >> (unsigned)k & 1u);
    for (int32_t u = 0; u < s->units; u++) tied |= units[u].borrow && !units[units[u].borrow - 1].frozen;
    for (int32_t i = 0; i < s->count; i++) {
        const llmpar_instruction *in = &s->list[i];
        int32_t change = in->op == LLMPAR_OP_FETCH ? 1 : in->op == LLMPAR_OP_STORE ? -1 : 0;
        if (change && in->what == LLMPAR_STATE_OPTIMIZER) states += change;
        if (change && in->what == LLMPAR_STATE_PARAMS) params += change;
        if (change && in->what == LLMPAR_STATE_ACTIVATIONS) saved += change;
        if (change && in->what == LLMPAR_STATE_GRADS) gradients += change;
        if (in->op == LLMPAR_OP_FREE && in->slot < 0 && in->what == LLMPAR_STATE_PARAMS) params--;
        if (in->op == LLMPAR_OP_FORWARD && in->pass == LLMPAR_PASS_FORWARD && in->unit + 1 < s->units && (in->unit > 0 || units[0].recompute != LLMPAR_RECOMPUTE_FULL)) saved++;
        if (in->op == LLMPAR_OP_BACKWARD && in->unit + 1 < s->units && (in->unit > 0 || units[0].recompute != LLMPAR_RECOMPUTE_FULL)) saved--;
        if (in->op == LLMPAR_OP_BACKWARD && (inside || (kept[LLMPAR_STATE_GRADS] && !s->policy.no_sync)) && gradients > (inside && tied)) TEST_FAIL("%s: %d gradients are kept at instruction %d", what, gradients, i);
        if (in->op == LLMPAR_OP_BACKWARD && whole) gradients += (in->slot >= 0) + (in->from >= 0);
        if (in->op == LLMPAR_OP_REDUCE && !whole) gradients++;
        if ((in->op == LLMPAR_OP_OPTIM && !s->policy.host_update) || (in->op == LLMPAR_OP_ACCUMULATE && !in->local) || (in->op == LLMPAR_OP_FREE && in->slot >= 0 && !in->local)) gradients--;
        if (kept[LLMPAR_STATE_OPTIMIZER] && states > (s->policy.host_update ? 0 : 2)) TEST_FAIL("%s: instruction %d fetches a third optimizer state", what, i);
        if (kept[LLMPAR_STATE_PARAMS] && params > 2 + s->policy.prefetch + s->policy.prefetch_backward) TEST_FAIL("%s: instruction %d fetches parameters too early", what, i);
        if (kept[LLMPAR_STATE_ACTIVATIONS] && saved > 2) TEST_FAIL("%s: instruction %d: the activations of %d units are on the device", what, i, saved);
        if (in->op == LLMPAR_OP_RECOMPUTE && !(s->list[i + 1].op == LLMPAR_OP_BACKWARD && s->list[i + 1].unit == in->unit)) TEST_FAIL("%s: instruction %d recomputes before it must", what, i);
    }
}

TEST(what_is_kept)
{
    char what[320];
    for (int i = 0, rounds = test_rounds(4000); i < rounds; i++) {
        llmpar_schedule *s = random_schedule(6, MAX_MICRO, what);
        if (!s) continue;
        int sharded = !llmpar_policy_whole_params(&s->policy);
        for (int32_t k = 0; k < s->count && sharded; k++)
            if (s->list[k].op == LLMPAR_OP_GATHER) check_prefetch(s, k, what);
        if (sharded) check_reshard(s, what);
        check_kept(s, what);
        llmpar_schedule_destroy(s);
    }
}

/* ---- one broken list for every reason ---- */

/* ---- one broken list for every reason ---- */

typedef enum edit_kind { END = 0, DROP, TWICE, SET, NO_WAITS, WAIT } edit_kind;
/* SET: which member becomes `value`; WAIT: the nth op also waits for instruction `value` (of the list as it then is). */
typedef enum member { NO_MEMBER = 0, OP, STREAM, OF_UNIT, OF_MICRO, OF_PASS, OF_USE, OF_SLOT, OF_FROM, OF_FROM_USE, OF_LOCAL, OF_PREDICATE, OF_WHAT, OF_AGAIN, WAIT_COUNT, WAIT_0 } member;
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
        case OF_WHAT: in->what = (llmpar_state)e->value; break;
        case OF_AGAIN: in->again = e->value; break;
        case WAIT_COUNT: in->wait_count = e->value; break;
        default: in->waits[0] = e->value; break;
        }
    }
    return count;
}

/* Policies of the table: two units, no borrowing, where nothing else is said (set_policy).
   SHARDED   0 SCALAR 1 GATHER u0 2 FORWARD u0 3 FREE u0 4 GATHER u1 5 FORWARD u1 6 BACKWARD u1 7 REDUCE u1 8 FREE u1 9 GATHER u0 10 BACKWARD u0 11 REDUCE u0 12 FREE u1 local0 13 FREE u0 14 FREE u0 local0
             15 NORM u0 16 NORM u1 17 SCALAR 18 OPTIM u0 19 OPTIM u1 */
enum { SHARDED, TWO_MICRO, KEPT, REPLICAS, WHOLE, EVALUATION, WHOLE_KEPT, OFFLOADED, ZERO_1, INSIDE, TWO_PASSES, TIED, TIED_ZERO_1, FULL, FULL_STORED, FROZEN, GRADS_STORED, POLICIES };
static const struct { int policy; edit edits[10]; const char *text; } broken[] = {
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
    { TWO_MICRO, {{ SET, LLMPAR_OP_REDUCE, 0, OF_SLOT, 1 }, { SET, LLMPAR_OP_REDUCE, 2, OF_SLOT, 0 }}, "micro-batches were added in another order than the policy's" },
    { OFFLOADED, {{ DROP, LLMPAR_OP_FETCH, 6, NO_MEMBER, 0 }}, "OPTIM u0: reads a gradient that is in its store" },
    { FROZEN, {{ SET, LLMPAR_OP_BACKWARD, 1, OF_SLOT, 0 }}, "BACKWARD u2: writes the gradient of a frozen unit" },
    { FROZEN, {{ SET, LLMPAR_OP_BACKWARD, 0, OF_FROM, 0 }}, "BACKWARD u3: writes the gradient of a unit that it does not borrow, or that is frozen" },
    { FROZEN, {{ TWICE, LLMPAR_OP_BACKWARD, 2, NO_MEMBER, 0 }, { SET, LLMPAR_OP_BACKWARD, 3, OF_UNIT, 0 }, { SET, LLMPAR_OP_BACKWARD, 3, OF_SLOT, -1 }}, "BACKWARD u0: backward of a unit in front of everything that is trained" },
    { FROZEN, {{ SET, LLMPAR_OP_FORWARD, 0, OF_PASS, LLMPAR_PASS_FORWARD }}, "FORWARD u0: its pass does not fit the policy" },
    { FROZEN, {{ SET, LLMPAR_OP_FETCH, 0, OF_UNIT, 0 }}, "FETCH u0: moves what a frozen unit does not have" },
    { FROZEN, {{ SET, LLMPAR_OP_NORM, 0, OF_UNIT, 2 }}, "NORM u2: reads a gradient buffer that nothing has written" },
    { OFFLOADED, {{ SET, LLMPAR_OP_FETCH, 0, OF_WHAT, 4 }}, "no such state" },
    { OFFLOADED, {{ SET, LLMPAR_OP_FETCH, 2, OF_MICRO, 1 }}, "no such micro-batch" },
    { SHARDED, {{ SET, LLMPAR_OP_FORWARD, 0, OF_AGAIN, 1 }}, "no such pass over the step" },
    { INSIDE, {{ SET, LLMPAR_OP_OPTIM, 0, OF_PREDICATE, LLMPAR_IF_FINITE }}, "asks whether gradients are finite before that is known" },
    { INSIDE, {{ SET, LLMPAR_OP_CAST, 0, OF_PREDICATE, LLMPAR_IF_FINITE }}, "asks whether gradients are finite before that is known" },
    { ZERO_1, {{ SET, LLMPAR_OP_GATHER, 0, OF_PREDICATE, LLMPAR_ALWAYS }}, "GATHER u0: updates without asking whether the gradient is finite" },
    { WHOLE, {{ TWICE, LLMPAR_OP_OPTIM, 0, NO_MEMBER, 0 }, { SET, LLMPAR_OP_OPTIM, 1, OF_PREDICATE, 0 }, { SET, LLMPAR_OP_OPTIM, 1, OF_MICRO, 0 }, { SET, LLMPAR_OP_OPTIM, 1, OP, LLMPAR_OP_FORWARD }}, "FORWARD u0: uses parameters after their update" },
    { TWO_PASSES, {{ DROP, LLMPAR_OP_SCALAR_REDUCE, 1, NO_MEMBER, 0 }}, "FORWARD u0: begins the second pass before the norm of the first is known" },
    { FULL, {{ SET, LLMPAR_OP_RECOMPUTE, 0, OF_UNIT, 1 }}, "RECOMPUTE u1: recomputes a unit that keeps what its backward needs" },
    { FULL, {{ SET, LLMPAR_OP_FORWARD, 0, OF_PASS, LLMPAR_PASS_RECOMPUTE }, { SET, LLMPAR_OP_FORWARD, 0, OP, LLMPAR_OP_RECOMPUTE }}, "RECOMPUTE u0: recomputes before the forward or after the backward" },
    { FULL, {{ TWICE, LLMPAR_OP_RECOMPUTE, 0, NO_MEMBER, 0 }}, "RECOMPUTE u0: recomputes activations that are there already" },
    { FULL, {{ DROP, LLMPAR_OP_RECOMPUTE, 0, NO_MEMBER, 0 }}, "BACKWARD u0: uses activations that were not recomputed" },
    { FULL, {{ SET, LLMPAR_OP_RECOMPUTE, 0, OF_PASS, LLMPAR_PASS_FORWARD }}, "RECOMPUTE u0: its pass does not fit the policy" },
    { FULL, {{ SET, LLMPAR_OP_RECOMPUTE, 0, STREAM, LLMPAR_STREAM_TP }}, "RECOMPUTE u0: is not on the compute stream" },
    { FULL_STORED, {{ DROP, LLMPAR_OP_FETCH, 0, NO_MEMBER, 0 }}, "RECOMPUTE u1: recomputes from an input that is in its store" },
    { FULL_STORED, {{ DROP, LLMPAR_OP_FETCH, 1, NO_MEMBER, 0 }}, "BACKWARD u0: uses activations that are in their store" },
    { FULL_STORED, {{ DROP, LLMPAR_OP_STORE, 0, NO_MEMBER, 0 }}, "FETCH u0: fetches what is not in its store" },
    { FULL_STORED, {{ SET, LLMPAR_OP_STORE, 1, OF_UNIT, 2 }}, "STORE u2: stores activations of the last unit, whose backward follows" },
    { FULL_STORED, {{ TWICE, LLMPAR_OP_STORE, 0, NO_MEMBER, 0 }}, "STORE u0: stores what is not on the device" },
    { OFFLOADED, {{ DROP, LLMPAR_OP_STORE, 1, NO_MEMBER, 0 }}, "FETCH u1: fetches what is not in its store" },
    { OFFLOADED, {{ TWICE, LLMPAR_OP_STORE, 1, NO_MEMBER, 0 }}, "STORE u1: stores what is not on the device" },
    { OFFLOADED, {{ TWICE, LLMPAR_OP_STORE, 3, NO_MEMBER, 0 }}, "STORE u0: stores what is not on the device" },
    { SHARDED, {{ SET, LLMPAR_OP_OPTIM, 0, OF_PREDICATE, 0 }, { SET, LLMPAR_OP_OPTIM, 0, OP, LLMPAR_OP_FETCH }}, "FETCH u0: moves what the policy keeps on the device" },
    { GRADS_STORED, {{ DROP, LLMPAR_OP_REDUCE_REPLICA, 0, NO_MEMBER, 0 }}, "STORE u1: stores a gradient that is not reduced" },
    { OFFLOADED, {{ TWICE, LLMPAR_OP_FETCH, 4, NO_MEMBER, 0 }}, "FETCH u0: fetches what is on the device already" },
    { OFFLOADED, {{ TWICE, LLMPAR_OP_FETCH, 0, NO_MEMBER, 0 }}, "FETCH u0: fetches what is on the device already" },
    { WHOLE, {{ SET, LLMPAR_OP_BACKWARD, 0, OF_LOCAL, 1 }}, "writes local gradients where they are reduced in place" },
    { ZERO_1, {{ SET, LLMPAR_OP_REDUCE, 0, OF_FROM, 1 }}, "reduces from another buffer where gradients are reduced in place" },
    { ZERO_1, {{ TWICE, LLMPAR_OP_REDUCE, 0, NO_MEMBER, 0 }}, "REDUCE u1: reduces a gradient twice" },
    { KEPT, {{ DROP, LLMPAR_OP_ACCUMULATE, 0, NO_MEMBER, 0 }}, "REDUCE u1: reduces another number of micro-batches at once than the policy says" },
    { WHOLE_KEPT, {{ DROP, LLMPAR_OP_ACCUMULATE, 0, NO_MEMBER, 0 }}, "REDUCE_REPLICA u1: reduces another number of micro-batches at once than the policy says" },
    { SHARDED, {{ SET, LLMPAR_OP_NORM, 0, OP, LLMPAR_OP_REDUCE_REPLICA }}, "sums over replicas where there are none" },
    { TIED_ZERO_1, {{ DROP, LLMPAR_OP_REDUCE, 0, NO_MEMBER, 0 }}, "REDUCE_REPLICA u1: sums over replicas before the gradient is reduced" },
    { TIED, {{ SET, LLMPAR_OP_ACCUMULATE, 0, OF_USE, 1 }, { SET, LLMPAR_OP_ACCUMULATE, 0, OF_FROM_USE, 0 }}, "ACCUMULATE u0: adds the uses of a tied unit otherwise than own + borrowed, once, complete and reduced" },
    { TIED, {{ DROP, LLMPAR_OP_ACCUMULATE, 0, NO_MEMBER, 0 }}, "NORM u0: the gradient does not hold every micro-batch and use exactly once" },
    { OFFLOADED, {{ TWICE, LLMPAR_OP_FREE, 0, NO_MEMBER, 0 }}, "FREE u0: frees a shard that was not fetched" },
    { OFFLOADED, {{ SET, LLMPAR_OP_STORE, 4, OP, LLMPAR_OP_FREE }}, "FREE u0: frees a changed shard that is not stored" },
    { OFFLOADED, {{ SET, LLMPAR_OP_FREE, 0, OF_WHAT, LLMPAR_STATE_ACTIVATIONS }}, "FREE u0: frees what is neither parameters nor a gradient" },
    { OFFLOADED, {{ SET, LLMPAR_OP_FETCH, 6, OF_WHAT, 0 }, { SET, LLMPAR_OP_FETCH, 6, OP, LLMPAR_OP_FREE }}, "FREE u0: frees a gradient that is in its store" },
    { SHARDED, {{ SET, LLMPAR_OP_OPTIM, 0, OF_PREDICATE, 0 }, { SET, LLMPAR_OP_OPTIM, 0, OP, LLMPAR_OP_FREE }}, "FREE u0: frees a gradient that nothing was updated from (only a first pass may, after the norm)" },
    { TWO_PASSES, {{ DROP, LLMPAR_OP_NORM, 0, NO_MEMBER, 0 }}, "FREE u1: frees a gradient that nothing was updated from" },
    { OFFLOADED, {{ DROP, LLMPAR_OP_FETCH, 4, NO_MEMBER, 0 }}, "OPTIM u0: updates with optimizer state that is in its store" },
    { OFFLOADED, {{ DROP, LLMPAR_OP_FETCH, 5, NO_MEMBER, 0 }}, "OPTIM u0: updates parameters that are in their store" },
    { SHARDED, {{ SET, LLMPAR_OP_OPTIM, 1, OP, LLMPAR_OP_CAST }}, "CAST u1: casts parameters that have no master copy" },
    { ZERO_1, {{ SET, LLMPAR_OP_OPTIM, 0, OP, LLMPAR_OP_CAST }}, "CAST u0: casts parameters before their update" },
    { ZERO_1, {{ TWICE, LLMPAR_OP_CAST, 0, NO_MEMBER, 0 }}, "CAST u0: casts parameters twice" },
    { ZERO_1, {{ TWICE, LLMPAR_OP_CAST, 0, NO_MEMBER, 0 }, { SET, LLMPAR_OP_CAST, 0, OF_PREDICATE, 0 }, { SET, LLMPAR_OP_CAST, 0, OF_WHAT, LLMPAR_STATE_PARAMS }, { SET, LLMPAR_OP_CAST, 0, OP, LLMPAR_OP_STORE }}, "CAST u0: casts parameters that are in their store" },
    { ZERO_1, {{ DROP, LLMPAR_OP_CAST, 0, NO_MEMBER, 0 }}, "GATHER u0: gathers whole parameters before their update is complete" },
    { ZERO_1, {{ TWICE, LLMPAR_OP_GATHER, 0, NO_MEMBER, 0 }}, "GATHER u0: gathers updated parameters twice" },
    { OFFLOADED, {{ DROP, LLMPAR_OP_FETCH, 0, NO_MEMBER, 0 }}, "GATHER u0: gathers a shard that is in its store" },
    { INSIDE, {{ NO_WAITS, LLMPAR_OP_OPTIM, 0, NO_MEMBER, 0 }}, "OPTIM u1: changes a gradient buffer that another stream still reads" },
    { OFFLOADED, {{ SET, LLMPAR_OP_FREE, 0, STREAM, LLMPAR_STREAM_COMPUTE }}, "FREE u0: frees a shard that another stream may still use" },
    { ZERO_1, {{ NO_WAITS, LLMPAR_OP_STORE, 1, NO_MEMBER, 0 }}, "STORE u0: stores parameters that another stream may still use" },
    { ZERO_1, {{ NO_WAITS, LLMPAR_OP_STORE, 0, NO_MEMBER, 0 }}, "STORE u0: stores optimizer state that another stream may still use" },
    { OFFLOADED, {{ NO_WAITS, LLMPAR_OP_GATHER, 0, NO_MEMBER, 0 }}, "GATHER u0: gathers a shard without waiting for its fetch or update" },
    { ZERO_1, {{ NO_WAITS, LLMPAR_OP_GATHER, 0, NO_MEMBER, 0 }}, "GATHER u0: gathers a shard without waiting for its fetch or update" },
    { ZERO_1, {{ SET, LLMPAR_OP_CAST, 0, STREAM, LLMPAR_STREAM_GATHER }}, "CAST u0: casts parameters without waiting for their update" },
    { ZERO_1, {{ NO_WAITS, LLMPAR_OP_OPTIM, 0, NO_MEMBER, 0 }}, "OPTIM u0: updates parameters without waiting for their fetch" },
    { FROZEN, {{ NO_WAITS, LLMPAR_OP_OPTIM, 0, NO_MEMBER, 0 }}, "OPTIM u1: updates without waiting for the optimizer state" },
    { SHARDED, {{ TWICE, LLMPAR_OP_OPTIM, 0, NO_MEMBER, 0 }, { TWICE, LLMPAR_OP_OPTIM, 0, NO_MEMBER, 0 }, { SET, LLMPAR_OP_OPTIM, 0, OF_PREDICATE, 0 }, { SET, LLMPAR_OP_OPTIM, 0, STREAM, LLMPAR_STREAM_GATHER }, { SET, LLMPAR_OP_OPTIM, 0, OP, LLMPAR_OP_GATHER }, { SET, LLMPAR_OP_OPTIM, 0, OF_PREDICATE, 0 }, { SET, LLMPAR_OP_OPTIM, 0, STREAM, LLMPAR_STREAM_GATHER }, { SET, LLMPAR_OP_OPTIM, 0, OF_SLOT, -1 }, { SET, LLMPAR_OP_OPTIM, 0, OP, LLMPAR_OP_FREE }}, "OPTIM u0: updates parameters that another stream may still use" },
    { FULL_STORED, {{ NO_WAITS, LLMPAR_OP_STORE, 0, NO_MEMBER, 0 }}, "STORE u0: stores activations that another stream may still use" },
    { FULL_STORED, {{ NO_WAITS, LLMPAR_OP_RECOMPUTE, 0, NO_MEMBER, 0 }}, "RECOMPUTE u1: uses activations without waiting for them" },
    { FULL_STORED, {{ SET, LLMPAR_OP_FETCH, 0, STREAM, LLMPAR_STREAM_REDUCE }}, "FETCH u1: fetches without waiting for the store" },
    { ZERO_1, {{ DROP, LLMPAR_OP_GATHER, 1, NO_MEMBER, 0 }}, "end: unit u1 was updated and its whole parameters never gathered again" },
    { INSIDE, {{ DROP, LLMPAR_OP_CAST, 0, NO_MEMBER, 0 }}, "end: unit u1 was updated and its master parameters never cast" },
    { OFFLOADED, {{ DROP, LLMPAR_OP_STORE, 6, NO_MEMBER, 0 }}, "end: parameters of unit u1 are not in their store" },
    { OFFLOADED, {{ DROP, LLMPAR_OP_STORE, 5, NO_MEMBER, 0 }, { WAIT, LLMPAR_OP_STORE, 5, NO_MEMBER, 37 }}, "end: optimizer states of unit u1 are not in their store" },
    { SHARDED, {{ DROP, LLMPAR_OP_OPTIM, 1, NO_MEMBER, 0 }}, "end: gradient of unit u1, written by instruction 7, is never consumed" },
    { EVALUATION, {{ DROP, LLMPAR_OP_SCALAR_REDUCE, 1, NO_MEMBER, 0 }}, "end: the loss is never reduced" },
};

static llmpar_policy set_policy(int which)
{
    llmpar_policy policy = make_policy(which == TWO_MICRO || which == KEPT || which == REPLICAS || which == WHOLE_KEPT || which == GRADS_STORED ? 2 : 1, which == KEPT || which == WHOLE_KEPT, 0,
                                       which == WHOLE || which == WHOLE_KEPT || which == FULL || which == FULL_STORED || which == FROZEN, 1, which == EVALUATION);
    make_units(which == FROZEN ? 4 : which == FULL_STORED ? 3 : 2, which == TIED || which == TIED_ZERO_1 ? 1 : -1, 0);
    if (which == REPLICAS || which == WHOLE || which == WHOLE_KEPT || which == TIED_ZERO_1 || which == GRADS_STORED) policy.replicas = 2;
    if (which == ZERO_1 || which == TIED_ZERO_1) policy.zero = LLMPAR_ZERO_1;
    policy.master = which == ZERO_1 || which == INSIDE;
    policy.offload = which == OFFLOADED ? 15u : which == ZERO_1 ? 3u : which == FROZEN ? 1u : which == FULL_STORED ? 8u : which == GRADS_STORED ? 4u : 0;
    policy.update = which == INSIDE ? LLMPAR_UPDATE_INSIDE : which == TWO_PASSES ? LLMPAR_UPDATE_TWO_PASSES : LLMPAR_UPDATE_AFTER;
    if (which == FULL) units[0].recompute = LLMPAR_RECOMPUTE_FULL;
    if (which == FULL_STORED) units[1].recompute = LLMPAR_RECOMPUTE_FULL;
    if (which == FROZEN) units[0].frozen = units[2].frozen = 1;
    return policy;
}

TEST(broken_lists)
{
    static llmpar_instruction list[256];
    llmpar_policy policy[POLICIES];
    for (int p = 0; p < POLICIES; p++) policy[p] = set_policy(p);
    for (size_t i = 0; i < sizeof broken / sizeof broken[0]; i++) {
        const llmpar_policy *p = &policy[broken[i].policy];
        set_policy(broken[i].policy);
        llmpar_schedule *s = NULL;
        CHECK_OK(llmpar_schedule_create(&heap, units, unit_count, p, &s, &err));
        if (!s) return;
        int32_t count = s->count;
        memcpy(list, s->list, (size_t)count * sizeof *list);
        for (int e = 0; e < 10 && broken[i].edits[e].kind; e++) count = apply(list, count, &broken[i].edits[e]);
        llmpar_status status = validate(list, count, p);
        if (status != LLMPAR_ERR_SCHEDULE || !strstr(err.text, broken[i].text)) TEST_FAIL("row %d: want \"%s\", got %s, \"%s\"", (int)i, broken[i].text, llmpar_status_string(status), err.text);
        llmpar_schedule_destroy(s);
    }
    make_units(2, -1, 0); /* nothing at all, and only forwards */
    CHECK_STATUS(validate(list, 0, &policy[SHARDED]), LLMPAR_ERR_SCHEDULE);
    CHECK_TEXT(err.text, "end: unit u0 ran forward on 0 of 1 micro-batches");
    CHECK_STATUS(validate(list, -1, &policy[SHARDED]), LLMPAR_ERR_SCHEDULE);
    llmpar_schedule *s = NULL;
    CHECK_OK(llmpar_schedule_create(&heap, units, unit_count, &policy[WHOLE], &s, &err));
    if (s) CHECK_STATUS(validate(s->list, 3, &policy[WHOLE]), LLMPAR_ERR_SCHEDULE); /* SCALAR_REDUCE, two forwards */
    CHECK_TEXT(err.text, "end: unit u0 ran backward on 0 of 1 micro-batches and was not updated");
    /* A list is good for its policy alone. */
    for (int p = 0; p < WHOLE_KEPT && s; p++) CHECK_STATUS(validate(s->list, s->count, &policy[p]), p == WHOLE ? LLMPAR_OK : LLMPAR_ERR_SCHEDULE);
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
    enum { ON_HOST = 1024 }; /* with offload */
    static const struct { int micro_batches, no_sync, chain, zero, whole, reshard, every, prefetch_backward, forward_only, master, offload, update, frozen, recomputed, recompute; const char *text; } pairs[] = {
        { 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, "chain with no_sync, expected one of them" },
        { 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, "updates inside backward with 2 micro-batches, expected 1" },
        { 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, "updates inside backward with 2 micro-batches, expected 1" },
        { 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 7 + ON_HOST, 1, 0, 0, 0, "gradients offloaded with updates inside backward" },
        { 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 3 + ON_HOST, 0, 0, 0, 0, "updates on the host without grads offloaded, expected optimizer, params and grads in host memory" },
        { 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, ON_HOST, 0, 0, 0, 0, "updates on the host without optimizer params grads offloaded" },
        { 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 7 + ON_HOST, 0, 0, 0, 0, "the whole parameters are in use all the time" },
        { 1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 7 + ON_HOST, 0, 0, 0, 0, NULL },
        { 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7 + 2 * ON_HOST, 0, 0, 0, 0, "host_update = 2, expected 0 .. 1" },
        { 2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, NULL }, /* an evaluation updates nothing */
        { 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 1, 0, 0, 0, "gradients offloaded with updates inside backward" },
        { 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, "the whole parameters are in use all the time" },
        { 1, 0, 0, LLMPAR_ZERO_2, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, "the whole parameters are in use all the time" },
        { 1, 0, 0, LLMPAR_ZERO_2, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, NULL },
        { 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, LLMPAR_RECOMPUTE_FULL, "unit u2: full recomputation of the last unit" },
        { 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, LLMPAR_RECOMPUTE_SELECTIVE, NULL },
        { 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 3, "unit u1: recompute = 3" },
        { 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, "all 3 units are frozen" },
        { 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, NULL },
        { 1, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, "zero = 5, expected 1 .. 4" },
        { 1, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, "reshard = 5, expected 1 .. 4" },
        { 1, 0, 0, 0, 0, LLMPAR_RESHARD_EVERY, -1, 0, 0, 0, 0, 0, 0, 0, 0, "reshard_every = -1" },
        { 1, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, "prefetch_backward = 5, expected 0 .. 4" },
        { 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, "offload = 16, expected 0 .. 15" },
        { 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, "update = 3, expected 0 .. 2" },
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
    for (size_t i = 0; i < sizeof pairs / sizeof pairs[0]; i++) {
        make_units(3, -1, 0);
        for (int32_t u = 0; u < 3; u++) units[u].frozen = pairs[i].frozen >> u & 1;
        units[pairs[i].recomputed].recompute = (llmpar_recompute)pairs[i].recompute;
        llmpar_policy policy = make_policy(pairs[i].micro_batches, pairs[i].no_sync, 0, pairs[i].whole, 1, pairs[i].forward_only);
        policy.chain = pairs[i].chain;
        policy.zero = pairs[i].zero;
        policy.reshard = (llmpar_reshard)pairs[i].reshard;
        policy.reshard_every = pairs[i].every;
        policy.prefetch_backward = pairs[i].prefetch_backward;
        policy.master = pairs[i].master;
        policy.offload = (unsigned)(pairs[i].offload % ON_HOST);
        policy.host_update = pairs[i].offload / ON_HOST;
        policy.update = (llmpar_update_when)pairs[i].update;
        llmpar_error_clear(&err);
        CHECK_STATUS(llmpar_schedule_create(&heap, units, 3, &policy, &s, &err), pairs[i].text ? LLMPAR_ERR_ARGUMENT : LLMPAR_OK);
        if (pairs[i].text) CHECK_TEXT(err.text, pairs[i].text);
        llmpar_schedule_destroy(s);
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

TEST_LIST(T_(printed), T_(what_is_kept), T_(broken_lists), T_(refused_policies), T_(out_of_memory))
