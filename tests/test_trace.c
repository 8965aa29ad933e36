/* The Chrome trace: its schema on real training steps, the ranks' clocks, what is cut, and that it shows the gather of unit u+1 during the forward of unit u where streams have threads. */
#include "train.h"

#include <pthread.h>
#include <time.h>
#include <unistd.h>

/* ---- a trace as text, and as a document ---- */

typedef struct text_buffer { char *text; size_t used, capacity; int fail_after; } text_buffer;
static llmpar_status text_sink(void *user, const char *text, size_t bytes)
{
    text_buffer *b = (text_buffer *)user;
    if (b->fail_after && --b->fail_after == 0) return LLMPAR_ERR_IO;
    if (b->used + bytes + 1 > b->capacity) {
        b->capacity = 2 * (b->used + bytes + 1);
        b->text = (char *)realloc(b->text, b->capacity);
    }
    memcpy(b->text + b->used, text, bytes);
    b->used += bytes;
    b->text[b->used] = 0;
    return LLMPAR_OK;
}

enum { MOST_RANKS = 8 };
typedef struct trace_counts { int spans, counters, unfinished, lanes[MOST_RANKS], ranks, dropped; double last[MOST_RANKS][LLMPAR_TRACE_LANES], end[MOST_RANKS][LLMPAR_TRACE_LANES], last_counter[MOST_RANKS]; } trace_counts;

static double number(const llmpar_json *object, const char *key)
{
    const llmpar_json *v = llmpar_json_get(object, key);
    if (!v || v->type != LLMPAR_JSON_NUMBER) { TEST_FAIL("byte %lu: no number \"%s\"", (unsigned long)object->position, key); return -1; }
    return v->number;
}
static const char *string(const llmpar_json *object, const char *key)
{
    const llmpar_json *v = llmpar_json_get(object, key);
    if (!v || v->type != LLMPAR_JSON_STRING) { TEST_FAIL("byte %lu: no string \"%s\"", (unsigned long)object->position, key); return ""; }
    return v->string;
}

/* The schema of one event. Spans of one lane come in the order in which they begin, and lie beside or inside each other. */
static void check_event(const llmpar_json *e, trace_counts *n)
{
    const char *phase = string(e, "ph"), *name = string(e, "name");
    int pid = (int)number(e, "pid"), tid = (int)number(e, "tid");
    const llmpar_json *args = llmpar_json_get(e, "args");
    if (pid < 0 || pid >= MOST_RANKS || tid < 0 || tid >= LLMPAR_TRACE_LANES) { TEST_FAIL("byte %lu: pid %d, tid %d", (unsigned long)e->position, pid, tid); return; }
    CHECK(args && args->type == LLMPAR_JSON_OBJECT);
    if (!strcmp(phase, "M")) {
        if (!strcmp(name, "process_name")) { CHECK_TEXT(string(args, "name"), "rank "); n->ranks++; }
        else if (!strcmp(name, "thread_name")) { CHECK(string(args, "name")[0]); n->lanes[pid] |= 1 << tid; }
        else if (!strcmp(name, "process_labels")) n->dropped++;
        else CHECK(number(args, "sort_index") >= 0);
        return;
    }
    double ts = number(e, "ts");
    if (!(ts >= 0)) TEST_FAIL("%s: ts %g", name, ts);
    if (!strcmp(phase, "C")) {
        n->counters++;
        CHECK(ts >= n->last_counter[pid]);
        n->last_counter[pid] = ts;
        CHECK_INT(args->length, LLMPAR_TAG_COUNT);
        for (const llmpar_json *v = args->child; v; v = v->next)
            if (v->type != LLMPAR_JSON_NUMBER || !v->is_integer || v->integer < 0) TEST_FAIL("counter %s", v->key);
        return;
    }
    if (strcmp(phase, "X")) { TEST_FAIL("phase %s", phase); return; }
    double end = ts + number(e, "dur");
    n->spans++;
    n->unfinished += llmpar_json_get(args, "unfinished") != NULL;
    if (!(n->lanes[pid] & 1 << tid)) TEST_FAIL("%s: lane %d of rank %d has no name", name, tid, pid);
    if (!(end >= ts) || ts < n->last[pid][tid]) TEST_FAIL("%s on lane %d of rank %d: from %.3f to %.3f, after one from %.3f", name, tid, pid, ts, end, n->last[pid][tid]);
    if (ts < n->end[pid][tid] - 1e-3 && end > n->end[pid][tid] + 1e-3) TEST_FAIL("%s on lane %d of rank %d: from %.3f to %.3f, inside one that ends at %.3f", name, tid, pid, ts, end, n->end[pid][tid]);
    n->last[pid][tid] = ts;
    if (end > n->end[pid][tid]) n->end[pid][tid] = end;
    CHECK(string(e, "cat")[0]);
    CHECK(!strncmp(name, string(args, "op"), strlen(string(args, "op"))));
    if (llmpar_json_get(args, "unit")) CHECK_TEXT(name, string(args, "unit"));
    if (llmpar_json_get(args, "bytes")) CHECK(number(args, "bytes") > 0);
    if (llmpar_json_get(args, "micro_batch")) CHECK(number(args, "micro_batch") >= 0);
}

/* Parses and checks the whole text; the document stays for more questions. */
static llmpar_json *check_text(llmpar_heap *heap, const text_buffer *b, trace_counts *n)
{
    llmpar_json *root = NULL;
    llmpar_json_desc desc;
    llmpar_error error;
    memset(&desc, 0, sizeof desc);
    memset(n, 0, sizeof *n);
    desc.unique_keys = 1;
    llmpar_error_clear(&error);
    if (llmpar_json_parse(heap, b->text ? b->text : "", b->used, &desc, &root, &error)) { TEST_FAIL("%s", error.text); return NULL; }
    const llmpar_json *events = llmpar_json_get(root, "traceEvents");
    CHECK(events && events->type == LLMPAR_JSON_ARRAY);
    for (const llmpar_json *e = events ? events->child : NULL; e; e = e->next) check_event(e, n);
    return root;
}

/* Complete spans of rank `pid` that are called `name`; the number, and the at-th one's begin and end. */
static int find(const llmpar_json *root, int pid, const char *name, int at, double *begin, double *end)
{
    int count = 0;
    for (const llmpar_json *e = llmpar_json_get(root, "traceEvents")->child; e; e = e->next) {
        if (strcmp(string(e, "ph"), "X") || (int)number(e, "pid") != pid || strcmp(string(e, "name"), name)) continue;
        if (count++ != at || !begin) continue;
        *begin = number(e, "ts");
        *end = *begin + number(e, "dur");
    }
    return count;
}

/* ---- training ---- */

typedef struct traced { llmpar_trace *trace[TRAIN_RANKS]; text_buffer text; uint64_t limit; } traced;

static llmpar_status traced_ready(train_job *job, llmpar_ctx *ctx, llmpar_llama *model, llmpar_trainer *trainer)
{
    traced *t = (traced *)job->user;
    (void)model;
    llmpar_status st = llmpar_trace_create(ctx, t->limit, &t->trace[ctx->rank]);
    if (!st) llmpar_fsdp_set_trace(llmpar_trainer_fsdp(trainer), t->trace[ctx->rank]);
    return st;
}
static llmpar_status traced_finish(train_job *job, llmpar_ctx *ctx, llmpar_trainer *trainer)
{
    traced *t = (traced *)job->user;
    llmpar_fsdp_set_trace(llmpar_trainer_fsdp(trainer), NULL);
    llmpar_status st = llmpar_trace_write(t->trace[ctx->rank], ctx->comm, text_sink, ctx->rank ? NULL : &t->text);
    llmpar_trace_destroy(t->trace[ctx->rank]);
    return st;
}

static void train_traced(int32_t shard, int32_t tp, int32_t overlap, uint64_t limit)
{
    train_result plain, result;
    traced t;
    trace_counts n;
    llmpar_heap heap;
    llmpar_llama_config config = train_config(0);
    train_job job;
    memset(&t, 0, sizeof t);
    memset(&job, 0, sizeof job);
    t.limit = limit;
    job.config = &config;
    job.dp_shard = shard;
    job.tp = tp;
    job.zero = 3;
    job.prefetch = 1;
    job.accum = 2;
    job.steps = 2;
    job.keep_files = 1;
    job.policy.overlap = overlap;
    job.policy.recompute = LLMPAR_RECOMPUTE_FULL;
    train_run(&job, &plain);
    CHECK_OK(plain.status);
    job.user = &t;
    job.ready = traced_ready;
    job.finish = traced_finish;
    train_run(&job, &result);
    CHECK_OK(result.status);
    train_same("with a trace", &result, &plain);
    llmpar_heap_init(&heap, NULL);
    llmpar_json *root = check_text(&heap, &t.text, &n);
    if (root) {
        int ranks = shard * tp;
        CHECK_INT(n.ranks, ranks);
        CHECK_INT(n.unfinished, 0);
        if (limit) {
            CHECK(n.spans + n.counters <= (int)limit * ranks);
            CHECK_INT(n.dropped, ranks);
        } else {
            CHECK_INT(n.dropped, 0);
            CHECK(n.counters > 20 * ranks);
            for (int r = 0; r < ranks; r++) {
                double begin = 0, end = 0, from = 0, to = 0;
                CHECK_INT(find(root, r, "OPTIM layers.0", 0, NULL, NULL), 2); /* steps */
                CHECK_INT(find(root, r, "FORWARD layers.0", 0, NULL, NULL), 4); /* micro-batches */
                CHECK_INT(find(root, r, "RECOMPUTE layers.0", 0, NULL, NULL), 4);
                CHECK_INT(find(root, r, "REDUCE layers.0", 0, NULL, NULL), shard > 1 ? 4 : 0);
                CHECK(find(root, r, "GATHER layers.0", 0, &from, &to) >= (shard > 1 ? 4 : 0));
                find(root, r, "FORWARD layers.0", 0, &begin, &end);
                if (shard > 1 && to > begin) TEST_FAIL("rank %d: layers.0 runs at %.3f and is gathered at %.3f", r, begin, to);
                CHECK_INT((n.lanes[r] & 31), 31);
                CHECK(n.last[r][LLMPAR_STREAM_TP] > 0 || tp == 1);
            }
        }
        llmpar_json_destroy(&heap, root);
    }
    free(t.text.text);
    train_result_free(&plain);
    train_result_free(&result);
}

TEST(one_rank) { train_traced(1, 1, 0, 0); }
TEST(four_ranks) { train_traced(2, 2, 0, 0); }
TEST(four_ranks_with_overlap) { train_traced(2, 2, 1, 0); }
TEST(cut_at_a_limit) { train_traced(2, 1, 0, 100); }

/* ---- overlap ---- */

/* The gather of unit k ends only when unit k-1 has begun its forward, and the forward of unit k ends only when the gather of unit k+1 has begun: nothing gets further unless both are under way at once. */
enum { UNITS = 5, RANKS = 2, NUMBERS = 512, PATIENCE = 120 };
typedef struct meeting { pthread_mutex_t lock; pthread_cond_t moved; int gathering[UNITS + 1], running[UNITS]; } meeting;
static meeting meetings[RANKS];
static const char *const unit_name[UNITS] = {"first", "second", "third", "fourth", "fifth"};

typedef struct meet { meeting *at; int *mine; const int *other; } meet;
static llmpar_status run_meet(void *arg)
{
    meet *m = (meet *)arg;
    struct timespec until;
    int late = 0;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += PATIENCE;
    pthread_mutex_lock(&m->at->lock);
    *m->mine = 1;
    pthread_cond_broadcast(&m->at->moved);
    while (m->other && !*m->other && !late) late = pthread_cond_timedwait(&m->at->moved, &m->at->lock, &until);
    pthread_mutex_unlock(&m->at->lock);
    return late ? LLMPAR_ERR_TIMEOUT : LLMPAR_OK;
}

static llmpar_status (*threads_split)(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out);
static llmpar_status (*threads_all_gather)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);

static llmpar_status slow_all_gather(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call)
{
    for (int k = 0; k < UNITS; k++) {
        meet m = {&meetings[comm->rank], &meetings[comm->rank].gathering[k], k ? &meetings[comm->rank].running[k - 1] : NULL};
        if (!strstr(call->tag, unit_name[k])) continue;
        llmpar_status st = comm->device->host_call(comm->device, stream, run_meet, &m, sizeof m);
        if (st) return st;
    }
    return threads_all_gather(comm, stream, call);
}
static llmpar_status slow_split(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out)
{
    llmpar_status st = threads_split(comm, color, key, name, out);
    if (!st && *out) {
        (*out)->split = slow_split;
        (*out)->all_gather = slow_all_gather;
    }
    return st;
}

static llmpar_status unit_sizes(void *user, const llmpar_micro *micro, llmpar_dtype dtype, llmpar_unit_sizes *out)
{
    (void)micro;
    (void)dtype;
    out->output = *(const int *)user + 1 < UNITS ? NUMBERS * sizeof(float) : 0;
    return LLMPAR_OK;
}
static llmpar_status unit_forward(llmpar_unit_call *call)
{
    int k = *(const int *)call->user;
    meeting *at = &meetings[call->ctx->rank];
    meet m = {at, &at->running[k], k + 1 < UNITS ? &at->gathering[k + 1] : NULL};
    llmpar_status st = call->device->host_call(call->device, call->stream, run_meet, &m, sizeof m);
    if (!st && call->output) st = call->device->copy(call->device, call->stream, call->output, call->params[0], NUMBERS * sizeof(float));
    return st;
}

static text_buffer overlap_text;
static llmpar_status overlap_rank(llmpar_ctx *ctx, void *user)
{
    static const llmpar_unit_op forward = {"copy", unit_forward, LLMPAR_COMPUTE, {0, 0}, 0, 0};
    static int index[UNITS] = {0, 1, 2, 3, 4};
    char names[UNITS][32];
    llmpar_param param[UNITS];
    llmpar_unit units[UNITS];
    llmpar_mesh *mesh = NULL;
    llmpar_fsdp *fsdp = NULL;
    llmpar_schedule *schedule = NULL;
    llmpar_trace *trace = NULL;
    llmpar_mesh_desc mesh_desc;
    llmpar_fsdp_desc desc;
    llmpar_policy policy;
    llmpar_micro micro;
    llmpar_run run;
    (void)user;
    memset(param, 0, sizeof param);
    memset(units, 0, sizeof units);
    memset(&mesh_desc, 0, sizeof mesh_desc);
    memset(&desc, 0, sizeof desc);
    memset(&micro, 0, sizeof micro);
    memset(&run, 0, sizeof run);
    for (int k = 0; k < UNITS; k++) {
        snprintf(names[k], sizeof names[k], "%s.w", unit_name[k]);
        param[k].name = names[k];
        param[k].dims = 1;
        param[k].shape[0] = NUMBERS;
        param[k].init_std = 1;
        units[k].name = unit_name[k];
        units[k].params = &param[k];
        units[k].param_count = 1;
        units[k].forward = &forward;
        units[k].forward_count = 1;
        units[k].sizes = unit_sizes;
        units[k].user = &index[k];
    }
    ctx->comm->split = slow_split;
    mesh_desc.dp_shard = RANKS;
    desc.overlap = 1;
    llmpar_status st = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!st) st = llmpar_fsdp_create(mesh, units, UNITS, &desc, &fsdp);
    if (!st) {
        memset(&policy, 0, sizeof policy);
        llmpar_fsdp_policy(fsdp, &policy);
        policy.forward_only = 1;
        policy.prefetch = 1;
        st = llmpar_schedule_create(&ctx->heap, units, UNITS, &policy, &schedule, &ctx->error);
    }
    if (!st) st = llmpar_trace_create(ctx, 0, &trace);
    if (!st) llmpar_fsdp_set_trace(fsdp, trace);
    micro.batch = micro.t = micro.leaves = 1;
    run.micro = &micro;
    run.tokens = 1;
    if (!st) st = llmpar_fsdp_run(fsdp, schedule->list, schedule->count, &run);
    if (!st) st = llmpar_trace_write(trace, ctx->comm, text_sink, &overlap_text);
    llmpar_fsdp_destroy(fsdp);
    llmpar_trace_destroy(trace);
    llmpar_schedule_destroy(schedule);
    llmpar_mesh_destroy(mesh);
    ctx->comm->split = threads_split;
    return st;
}

static llmpar_status learn_slots(llmpar_ctx *ctx, void *user)
{
    (void)user;
    if (ctx->rank == 0) {
        threads_split = ctx->comm->split;
        threads_all_gather = ctx->comm->all_gather;
    }
    return LLMPAR_OK;
}

TEST(the_next_gather_runs_during_the_forward)
{
    llmpar_launch_desc launch;
    llmpar_error error;
    llmpar_heap heap;
    trace_counts n;
    memset(&launch, 0, sizeof launch);
    memset(meetings, 0, sizeof meetings);
    for (int r = 0; r < RANKS; r++) {
        pthread_mutex_init(&meetings[r].lock, NULL);
        pthread_cond_init(&meetings[r].moved, NULL);
    }
    launch.ranks = RANKS;
    launch.transport = LLMPAR_TRANSPORT_THREADS;
    if (llmpar_launch(&launch, learn_slots, NULL, &error) || llmpar_launch(&launch, overlap_rank, NULL, &error)) TEST_FAIL("rank %d: %s", (int)error.rank, error.text);
    llmpar_heap_init(&heap, NULL);
    llmpar_json *root = check_text(&heap, &overlap_text, &n);
    for (int r = 0; r < RANKS && root; r++)
        for (int k = 0; k + 1 < UNITS; k++) {
            char gather[64], forward[64];
            double a = 0, b = 0, c = 0, d = 0;
            snprintf(gather, sizeof gather, "GATHER %s", unit_name[k + 1]);
            snprintf(forward, sizeof forward, "FORWARD %s", unit_name[k]);
            CHECK_INT(find(root, r, gather, 0, &a, &b), 1);
            CHECK_INT(find(root, r, forward, 0, &c, &d), 1);
            if (!(a < d && c < b)) TEST_FAIL("rank %d: %s from %.3f to %.3f, %s from %.3f to %.3f: not at the same time", r, gather, a, b, forward, c, d);
        }
    llmpar_json_destroy(&heap, root);
    CHECK_INT(heap.live, 0);
    free(overlap_text.text);
    for (int r = 0; r < RANKS; r++) {
        pthread_cond_destroy(&meetings[r].moved);
        pthread_mutex_destroy(&meetings[r].lock);
    }
}

/* ---- by hand ---- */

typedef struct by_hand { text_buffer text; uint64_t live[4]; int fail_after; } by_hand;
static void by_hand_check(const llmpar_ctx *ctx, void *user) { ((by_hand *)user)->live[ctx->rank] = ctx->heap.live; }

static llmpar_status by_hand_rank(llmpar_ctx *ctx, void *user)
{
    by_hand *job = (by_hand *)user;
    llmpar_trace *trace = NULL;
    llmpar_stream *stream = NULL;
    llmpar_trace_span span;
    uint64_t outer = 0, inner = 0, id;
    llmpar_arena_usage usage;
    memset(&span, 0, sizeof span);
    memset(&usage, 0, sizeof usage);
    llmpar_status st = llmpar_trace_create(ctx, 0, &trace);
    if (!st) st = ctx->device->stream_create(ctx->device, "s", &stream);
    if (st) return st;
    llmpar_trace_lane(trace, 3, "a \"lane\"\n");
    span.lane = 3;
    span.micro_batch = -1;
    span.name = "a name \"that\" is longer than there is room for";
    span.unit = "sch\303\266n\001 and \\ much, much longer than anybody would call a unit of a network";
    span.category = "test";
    CHECK_OK(llmpar_trace_begin(trace, stream, &span, &outer));
    for (int i = 0; i < 1000; i++) {
        span.name = "inner";
        span.bytes = (uint64_t)i;
        CHECK_OK(llmpar_trace_begin(trace, stream, &span, &inner));
        usage.live[i % LLMPAR_TAG_COUNT] += 64;
        llmpar_trace_memory(trace, &usage);
        llmpar_trace_memory(trace, &usage); /* the same: once is enough */
        if (i < 999) CHECK_OK(llmpar_trace_end(trace, stream, inner));
    }
    span.lane = LLMPAR_TRACE_LANES; /* there is none: nothing happens */
    CHECK_OK(llmpar_trace_begin(trace, stream, &span, &id));
    CHECK_INT(id, 0);
    CHECK_OK(llmpar_trace_end(trace, stream, id));
    CHECK_OK(llmpar_trace_begin(NULL, stream, &span, &id));
    llmpar_trace_memory(NULL, &usage);
    CHECK_OK(ctx->device->synchronize(ctx->device, stream));
    llmpar_status written = llmpar_trace_write(trace, ctx->comm, text_sink, ctx->rank ? NULL : &job->text);
    CHECK_STATUS(written, job->fail_after && ctx->rank == 0 ? LLMPAR_ERR_IO : LLMPAR_OK); /* of the others nobody waits */
    ctx->device->stream_destroy(ctx->device, stream);
    llmpar_trace_destroy(trace);
    return LLMPAR_OK;
}

TEST(texts_nesting_and_a_sink_that_fails)
{
    for (int fail = 0; fail < 4; fail++)
        for (int32_t ranks = 1; ranks <= 3; ranks += 2) {
            llmpar_launch_desc launch;
            llmpar_error error;
            llmpar_heap heap;
            trace_counts n;
            by_hand job;
            memset(&job, 0, sizeof job);
            memset(&launch, 0, sizeof launch);
            job.text.fail_after = job.fail_after = fail;
            launch.ranks = ranks;
            launch.transport = LLMPAR_TRANSPORT_THREADS;
            launch.check = by_hand_check;
            if (llmpar_launch(&launch, by_hand_rank, &job, &error)) TEST_FAIL("%s", error.text);
            for (int r = 0; r < ranks; r++) CHECK_INT(job.live[r], 0);
            llmpar_heap_init(&heap, NULL);
            if (!fail) {
                llmpar_json *root = check_text(&heap, &job.text, &n);
                CHECK_INT(n.ranks, ranks);
                CHECK_INT(n.spans, 1001 * ranks);
                CHECK_INT(n.counters, 1000 * ranks);
                CHECK_INT(n.unfinished, 2 * ranks);
                CHECK_INT(find(root, ranks - 1, "inner sch\303\266n\001 and \\ much, much longer than an", 0, NULL, NULL), 1000);
                llmpar_json_destroy(&heap, root);
            }
            free(job.text.text);
        }
}

TEST_LIST(T_(texts_nesting_and_a_sink_that_fails), T_(one_rank), T_(four_ranks), T_(four_ranks_with_overlap), T_(cut_at_a_limit), T_(the_next_gather_runs_during_the_forward))
