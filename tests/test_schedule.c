/* Schedules as data: what is printed, which policies are refused, and one broken list for every reason that the validator has. Random policies: test_schedule_random.c. */
#include "schedule_units.h"

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

/* ---- one broken list for every reason ---- */

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

TEST_LIST(T_(printed), T_(broken_lists), T_(refused_policies), T_(out_of_memory))
