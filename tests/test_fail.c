/* A rank that fails in the middle of a step, wherever it is: every rank returns soon, the job's error is the root one with its rank and text, and no rank keeps
   a byte. And what a step does when its numbers are no longer finite. */
#include "timed.h"
#include "train.h"

#include <math.h>
#include <pthread.h>
#include <time.h>

/* Under a sanitizer fewer places are tried. */
#if defined(__SANITIZE_THREAD__)
enum { TRIES = 1 };
#elif defined(__SANITIZE_ADDRESS__)
enum { TRIES = 2 };
#else
enum { TRIES = 6 };
#endif

/* What a test wants to happen on one rank, and what happened. */
enum { SLOT_ALLOC, SLOT_STREAM_CREATE, SLOT_EVENT_CREATE, SLOT_EVENT_RECORD, SLOT_EVENT_WAIT, SLOT_HOST_CALL, SLOT_COPY, SLOT_GEMM, SLOT_ADD, SLOT_SQUARE_SUM, SLOT_ADAMW, SLOTS };
static const char *const slot_name[SLOTS] = {"alloc", "stream_create", "event_create", "event_record", "event_wait", "host_call", "copy", "gemm", "add", "square_sum", "adamw"};

typedef struct plan {
    int rank;                        /* the one that fails; -1: all */
    int slot; uint64_t nth;          /* the nth call of a device slot fails; 0: never */
    uint64_t heap_nth;               /* the nth allocation of the rank fails; 0: never */
    int64_t heap_step;               /* counted from the begin of this step (0, 1, ..) instead of from the begin; -1 */
    int64_t bad_sequence;            /* this global index cannot be read on that rank; -1 */
    int bad_token;                   /* .. or has a token beyond the vocabulary */
    int away;                        /* the rank stays away from the nth collective (counted on all its communicators) until the others have returned */
    /* out */
    uint64_t calls[TRAIN_RANKS][SLOTS], heap_calls[TRAIN_RANKS][4];
    double failed_at;                /* clock when the planned rank's steps returned, or when it stayed away */
    uint64_t collectives[TRAIN_RANKS];
    int survivors;                   /* atomic: have returned */
    double returned_at[TRAIN_RANKS];
    char text[TRAIN_RANKS][1600];
} plan;

/* The calling rank's. */
static __thread plan *my_plan;
static __thread int my_rank;
static __thread llmpar_device my_device;

static int planned(int slot)
{
    uint64_t n = ++my_plan->calls[my_rank][slot];
    return (my_plan->rank == my_rank || my_plan->rank < 0) && my_plan->slot == slot && my_plan->nth == n;
}
static llmpar_status plant(llmpar_device *device, int slot)
{
    return llmpar_error_set(device->error, LLMPAR_ERR_INTERNAL, "planted: call %llu of %s", (unsigned long long)my_plan->nth, slot_name[slot]);
}
static llmpar_status fail_alloc(llmpar_device *d, size_t bytes, void **out)
{
    *out = NULL;
    return planned(SLOT_ALLOC) ? plant(d, SLOT_ALLOC) : my_device.alloc(d, bytes, out);
}
static llmpar_status fail_stream_create(llmpar_device *d, const char *name, llmpar_stream **out)
{
    *out = NULL;
    return planned(SLOT_STREAM_CREATE) ? plant(d, SLOT_STREAM_CREATE) : my_device.stream_create(d, name, out);
}
static llmpar_status fail_event_create(llmpar_device *d, llmpar_event **out)
{
    *out = NULL;
    return planned(SLOT_EVENT_CREATE) ? plant(d, SLOT_EVENT_CREATE) : my_device.event_create(d, out);
}
static llmpar_status fail_event_record(llmpar_device *d, llmpar_stream *s, llmpar_event *e) { return planned(SLOT_EVENT_RECORD) ? plant(d, SLOT_EVENT_RECORD) : my_device.event_record(d, s, e); }
static llmpar_status fail_event_wait(llmpar_device *d, llmpar_stream *s, llmpar_event *e) { return planned(SLOT_EVENT_WAIT) ? plant(d, SLOT_EVENT_WAIT) : my_device.event_wait(d, s, e); }
static llmpar_status fail_host_call(llmpar_device *d, llmpar_stream *s, llmpar_status (*fn)(void *arg), const void *arg, size_t bytes)
{
    /* A collective is three host calls, the middle one large: itself between its marks in the record. */
    int begins = bytes < 100 && my_plan->calls[my_rank][SLOT_HOST_CALL] % 3 == 0;
    if (begins && ++my_plan->collectives[my_rank] == my_plan->nth && my_plan->away && my_plan->rank == my_rank) {
        struct timespec moment = { 0, 2000000 };
        my_plan->failed_at = test_clock();
        while (__atomic_load_n(&my_plan->survivors, __ATOMIC_SEQ_CST) < 3) nanosleep(&moment, NULL);
    }
    return planned(SLOT_HOST_CALL) && !my_plan->away ? plant(d, SLOT_HOST_CALL) : my_device.host_call(d, s, fn, arg, bytes);
}
static llmpar_status fail_copy(llmpar_device *d, llmpar_stream *s, void *out, const void *in, size_t bytes) { return planned(SLOT_COPY) ? plant(d, SLOT_COPY) : my_device.copy(d, s, out, in, bytes); }
static llmpar_status fail_gemm(llmpar_device *d, llmpar_stream *s, const llmpar_gemm_args *a) { return planned(SLOT_GEMM) ? plant(d, SLOT_GEMM) : my_device.gemm(d, s, a); }
static llmpar_status fail_add(llmpar_device *d, llmpar_stream *s, const llmpar_add_args *a) { return planned(SLOT_ADD) ? plant(d, SLOT_ADD) : my_device.add(d, s, a); }
static llmpar_status fail_square_sum(llmpar_device *d, llmpar_stream *s, const llmpar_square_sum_args *a) { return planned(SLOT_SQUARE_SUM) ? plant(d, SLOT_SQUARE_SUM) : my_device.square_sum(d, s, a); }
static llmpar_status fail_adamw(llmpar_device *d, llmpar_stream *s, const llmpar_adamw_args *a) { return planned(SLOT_ADAMW) ? plant(d, SLOT_ADAMW) : my_device.adamw(d, s, a); }

static llmpar_status begin(train_job *job, llmpar_ctx *ctx)
{
    llmpar_device *d = ctx->device;
    my_plan = (plan *)job->user;
    my_rank = ctx->rank;
    my_device = *d;
    d->alloc = fail_alloc;
    d->stream_create = fail_stream_create;
    d->event_create = fail_event_create;
    d->event_record = fail_event_record;
    d->event_wait = fail_event_wait;
    d->host_call = fail_host_call;
    d->copy = fail_copy;
    d->gemm = fail_gemm;
    d->add = fail_add;
    d->square_sum = fail_square_sum;
    d->adamw = fail_adamw;
    if (my_plan->rank == my_rank && my_plan->heap_nth && my_plan->heap_step < 0) ctx->heap.fail_at = ctx->heap.calls + my_plan->heap_nth;
    my_plan->heap_calls[my_rank][0] = ctx->heap.calls;
    return LLMPAR_OK;
}

static llmpar_status before_step(train_job *job, llmpar_ctx *ctx, llmpar_trainer *trainer, int step)
{
    (void)job; (void)trainer;
    if (step < 3) my_plan->heap_calls[my_rank][1 + step] = ctx->heap.calls;
    if (my_plan->rank == my_rank && my_plan->heap_nth && my_plan->heap_step == step) ctx->heap.fail_at = ctx->heap.calls + my_plan->heap_nth;
    return LLMPAR_OK;
}

static llmpar_status failed(train_job *job, llmpar_ctx *ctx, llmpar_trainer *trainer, llmpar_status status)
{
    (void)job; (void)trainer;
    if (my_plan->rank == my_rank && !my_plan->away) my_plan->failed_at = test_clock();
    snprintf(my_plan->text[my_rank], sizeof my_plan->text[0], "%s", llmpar_last_error(ctx));
    my_plan->returned_at[my_rank] = test_clock();
    if (my_plan->rank != my_rank) __atomic_add_fetch(&my_plan->survivors, 1, __ATOMIC_SEQ_CST);
    return status;
}

/* Without it the last rank's failure in its last update would find the others done. */
static llmpar_status finish(train_job *job, llmpar_ctx *ctx, llmpar_trainer *trainer)
{
    (void)job; (void)trainer;
    return llmpar_comm_barrier(ctx->comm, NULL, "finish");
}

static llmpar_status sequence(void *user, int64_t index, int32_t *tokens)
{
    int planned_here = my_plan && my_plan->rank == my_rank && my_plan->bad_sequence == index;
    llmpar_status status = train_sequence(user, index, tokens);
    if (planned_here && !my_plan->bad_token) return LLMPAR_ERR_IO;
    if (planned_here) tokens[3] = 509;
    return status;
}

static const int64_t eight = 8;

/* Small: there are many jobs. */
static llmpar_llama_config small_config(void)
{
    llmpar_llama_config c = train_config(1);
    c.hidden = 16;
    c.intermediate = 20;
    c.heads = 4;
    c.kv_heads = 2;
    c.head_dim = 4;
    c.layers = 1;
    return c;
}

static train_job job_of(const llmpar_llama_config *config, plan *p)
{
    train_job job;
    memset(&job, 0, sizeof job);
    memset(p, 0, sizeof *p);
    p->heap_step = p->bad_sequence = -1;
    job.config = config;
    job.dp_shard = job.tp = 2;
    job.zero = 3;
    job.sp = job.prefetch = 1;
    job.accum = 2;
    job.steps = 2;
    job.batch = 4;
    job.seq_len = 8;
    job.sequence = sequence;
    job.sequence_user = (void *)(uintptr_t)&eight;
    job.begin = begin;
    job.before_step = before_step;
    job.finish = finish;
    job.failed = failed;
    job.user = p;
    return job;
}

/* Runs a job of which rank p->rank is to fail with `want` and a text that contains `part`. */
static void expect(train_job *job, const char *name, llmpar_status want, const char *part)
{
    const plan *p = (const plan *)job->user;
    train_result r;
    train_run(job, &r);
    double late = p->failed_at > 0 ? test_clock() - p->failed_at : 0;
    if (r.status != want || !strstr(r.error.text, part))
        TEST_FAIL("%s: got %s: rank %d: %s; expected %s: rank %d: .. %s ..", name, llmpar_status_string(r.status), (int)r.error.rank, r.error.text, llmpar_status_string(want), p->rank, part);
    else if (r.error.rank != p->rank) TEST_FAIL("%s: the error is rank %d's, expected rank %d's", name, (int)r.error.rank, p->rank);
    if (late > 2 * test_slow) TEST_FAIL("%s: the last rank returned %.1f s after the failure", name, late);
    for (int i = 0; i < r.ranks; i++) {
        llmpar_status other = i == p->rank ? want : LLMPAR_ERR_PEER;
        if (r.rank_status[i] != other) TEST_FAIL("%s: rank %d returned %s, expected %s", name, i, r.rank_status[i] == LLMPAR_STATUS_COUNT ? "nothing" : llmpar_status_string(r.rank_status[i]), llmpar_status_string(other));
        if (r.live[i]) TEST_FAIL("%s: rank %d keeps %llu bytes", name, i, (unsigned long long)r.live[i]);
    }
    train_result_free(&r);
}

/* Numbers of calls out of `calls`, `tries` of them spread evenly, first and last included (one: in the middle). */
static uint64_t spread(uint64_t calls, int i, int tries) { return tries < 2 ? calls / 2 + 1 : 1 + (calls - 1) * (uint64_t)i / (uint64_t)(tries - 1); }

static void count_calls(const llmpar_llama_config *config, plan *p)
{
    train_result r;
    train_job job = job_of(config, p);
    train_run(&job, &r);
    CHECK_OK(r.status);
    for (int i = 0; i < r.ranks; i++) CHECK_INT(r.live[i], 0);
    train_result_free(&r);
}

/* Device slots, from the first call to the last. */
TIMED(device_calls)
{
    static plan clean, p;
    llmpar_llama_config config = small_config();
    count_calls(&config, &clean);
    for (int slot = 0; slot < SLOTS; slot++) {
        CHECK(clean.calls[1][slot] > 0);
        int tries = clean.calls[1][slot] < TRIES ? (int)clean.calls[1][slot] : TRIES;
        for (int i = 0; i < tries; i++) {
            char name[100], part[100];
            train_job job = job_of(&config, &p);
            p.rank = (slot + i) % 4;
            p.slot = slot;
            /* The very last host call notes in the record that the last barrier is done: the others are home by then. */
            p.nth = spread(clean.calls[p.rank][slot] - (slot == SLOT_HOST_CALL), i, tries);
            snprintf(name, sizeof name, "call %llu of %s on rank %d", (unsigned long long)p.nth, slot_name[slot], p.rank);
            snprintf(part, sizeof part, "planted: call %llu of %s", (unsigned long long)p.nth, slot_name[slot]);
            expect(&job, name, LLMPAR_ERR_INTERNAL, part);
        }
    }
}

/* The n-th allocation of a rank, from its begin, and from the begin of the first and the second step. */
TIMED(allocations)
{
    static plan clean, p;
    llmpar_llama_config config = small_config();
    count_calls(&config, &clean);
    for (int64_t step = -1; step < 2; step++) {
        uint64_t calls = clean.heap_calls[1][2 + (step > 0)] - clean.heap_calls[1][1 + step];
        if (step > 0) calls = 3; /* the last step allocates at least its lists */
        if (step < 0) calls = clean.heap_calls[1][1] - clean.heap_calls[1][0];
        int most = step < 0 ? 4 * TRIES : 2 * TRIES, tries = calls < (uint64_t)most ? (int)calls : most;
        CHECK(calls > 2);
        for (int i = 0; i < tries; i++) {
            char name[100];
            train_job job = job_of(&config, &p);
            p.rank = step < 0 ? i % 4 : 1;
            p.heap_step = step;
            p.heap_nth = spread(calls, i, tries);
            snprintf(name, sizeof name, "allocation %llu of step %lld on rank %d", (unsigned long long)p.heap_nth, (long long)step, p.rank);
            expect(&job, name, LLMPAR_ERR_MEMORY, "");
        }
    }
}

/* A rank that stays away from a collective somewhere in a step: after the deadline everybody says where it is. The jobs run at once: they mostly wait. */
enum { AWAY = 20, DEADLINE = 3 };
typedef struct away_job { plan p; train_job job; train_result result; } away_job;

static void *away_run(void *arg)
{
    away_job *a = (away_job *)arg;
    train_run(&a->job, &a->result);
    return NULL;
}

TIMED(a_rank_stays_away)
{
    char waited[60];
    static away_job all[AWAY];
    static plan clean;
    pthread_t thread[AWAY];
    llmpar_llama_config config = small_config();
    int places = TRIES < 6 ? 5 : AWAY;
    count_calls(&config, &clean);
    CHECK_INT(clean.calls[1][SLOT_HOST_CALL], 3 * clean.collectives[1]);
    CHECK(clean.collectives[1] > AWAY);
    for (int i = 0; i < places; i++) {
        away_job *a = &all[i];
        a->job = job_of(&config, &a->p);
        a->job.deadline = DEADLINE * test_slow;
        a->p.rank = i % 4;
        a->p.away = 1;
        a->p.slot = -1;
        a->p.nth = spread(clean.collectives[a->p.rank], i, places);
        if (pthread_create(&thread[i], NULL, away_run, a)) { TEST_FAIL("no thread"); return; }
    }
    for (int i = 0; i < places; i++) pthread_join(thread[i], NULL);
    snprintf(waited, sizeof waited, "waited %g s for the other ranks", DEADLINE * test_slow);
    for (int i = 0; i < places; i++) {
        away_job *a = &all[i];
        char rank[40];
        snprintf(rank, sizeof rank, " %d (dp_shard=%d tp=%d)", a->p.rank, a->p.rank / 2, a->p.rank % 2);
        double failure = 1e30; /* the first one whose deadline has passed */
        for (int r = 0; r < 4; r++)
            if (r != a->p.rank && a->p.returned_at[r] < failure) failure = a->p.returned_at[r];
        CHECK(failure - a->p.failed_at > 0.25 * a->job.deadline);
        CHECK_STATUS(a->result.status, LLMPAR_ERR_TIMEOUT);
        for (int r = 0; r < 4; r++) {
            CHECK_INT(a->result.live[r], 0);
            if (r == a->p.rank) continue;
            const char *text = a->p.text[r];
            if (!strstr(text, rank) || !strstr(text, ": outside, last completed ") || !strstr(text, waited) || !strstr(text, "\" (call ") || (strncmp(text, "barrier ", 8) && !strstr(text, "f32[") && !strstr(text, "64[")))
                TEST_FAIL("collective %llu, rank %d away: rank %d says: %s", (unsigned long long)a->p.nth, a->p.rank, r, text);
            if (!(a->p.returned_at[r] - failure < 2 * test_slow)) TEST_FAIL("collective %llu, rank %d away: rank %d returned %.1f s after the first", (unsigned long long)a->p.nth, a->p.rank, r, a->p.returned_at[r] - failure);
        }
        train_result_free(&a->result);
    }
}

TIMED(data_source)
{
    static plan p;
    llmpar_llama_config config = small_config();
    for (int rank = 0; rank < 4; rank++) {
        train_job job = job_of(&config, &p);
        p.rank = rank;
        p.bad_sequence = 4 + rank / 2; /* of step 2, first micro-batch */
        expect(&job, "data source", LLMPAR_ERR_IO, rank / 2 ? "sequence 5: the data source failed" : "sequence 4: the data source failed");
        job = job_of(&config, &p);
        p.rank = rank;
        p.bad_sequence = 6 + rank / 2;
        p.bad_token = 1;
        expect(&job, "token id", LLMPAR_ERR_ARGUMENT, "token id 509 at position 3, expected at most 508");
    }
}

/* Saving where nothing can be saved: rank 0 finds out, all stop. */
static llmpar_status save_nowhere(train_job *job, llmpar_ctx *ctx, llmpar_trainer *trainer, int step)
{
    (void)job; (void)ctx;
    if (step == 0) return LLMPAR_OK;
    return my_plan->bad_token ? llmpar_trainer_save_gradients(trainer, "/no/such/directory/g.safetensors") : llmpar_save_hf(trainer, "/no/such/directory");
}

TIMED(unwritable)
{
    static plan p;
    llmpar_llama_config config = small_config();
    for (int gradients = 0; gradients < 2; gradients++) {
        train_job job = job_of(&config, &p);
        p.bad_token = gradients;
        job.before_step = save_nowhere;
        expect(&job, gradients ? "gradients to nowhere" : "model to nowhere", LLMPAR_ERR_IO, "/no/such/directory");
    }
}

/* A limit of exactly the peak is enough, less is refused with tag, request and limit. */
TEST(memory_limit)
{
    static plan p;
    train_result r;
    llmpar_llama_config config = train_config(1);
    for (int ranks = 1; ranks <= 4; ranks += 3)
        for (int i = -1; i < TRIES + 3; i++) {
            static uint64_t peak;
            char limit[64];
            train_job job = job_of(&config, &p);
            job.dp_shard = job.tp = ranks > 1 ? 2 : 1;
            job.batch = 32;
            job.memory_limit = i < 0 ? 0 : i < 2 ? peak - (uint64_t)i : peak * (uint64_t)(i - 1) / 8;
            train_run(&job, &r);
            CHECK_STATUS(r.status, i < 1 ? LLMPAR_OK : LLMPAR_ERR_MEMORY);
            snprintf(limit, sizeof limit, "%llu", (unsigned long long)job.memory_limit);
            if (i > 0) CHECK_TEXT(r.error.text, limit);
            for (int k = 0; k < ranks; k++) {
                if (i < 0 && (k == 0 || r.step[k][1].memory > peak)) peak = r.step[k][1].memory;
                CHECK(i < 1 ? r.rank_status[k] == LLMPAR_OK : r.rank_status[k] == LLMPAR_ERR_MEMORY || r.rank_status[k] == LLMPAR_ERR_PEER); /* any rank may be the first to notice */
                CHECK_INT(r.live[k], 0);
            }
        }
}

/* ---- own callbacks: a step by hand on the model's units, any instruction of any unit replaced ---- */

typedef struct by_hand {
    int rank, unit, op, backward;    /* the instruction that fails; unit -1: none */
    int gradient_unit;               /* on_gradient fails there; -1 */
    int32_t units, ops[8][2];        /* out */
    uint64_t live[TRAIN_RANKS];
    llmpar_status status[TRAIN_RANKS];
    double failed_at;
} by_hand;

static __thread by_hand *my_hand;

static llmpar_status failing_op(llmpar_unit_call *call)
{
    if (call->ctx->rank != my_hand->rank) return LLMPAR_OK; /* cannot be: only that rank has it */
    my_hand->failed_at = test_clock();
    return llmpar_fail(call->ctx, LLMPAR_ERR_UNSUPPORTED, "planted: an own instruction, pass %d, micro-batch %d", (int)call->pass, (int)call->micro->index);
}

static llmpar_status failing_gradient(void *user, llmpar_fsdp *fsdp, int32_t unit, const void *shard)
{
    by_hand *h = (by_hand *)user;
    llmpar_ctx *ctx = llmpar_fsdp_mesh(fsdp)->ctx;
    (void)shard;
    if (ctx->rank != h->rank || unit != h->gradient_unit) return LLMPAR_OK;
    h->failed_at = test_clock();
    return llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "planted: gradient of unit %d", (int)unit);
}

static llmpar_status hand_rank(llmpar_ctx *ctx, void *user)
{
    enum { B = 2, T = 8 };
    by_hand *h = (by_hand *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_llama *model = NULL;
    llmpar_fsdp *fsdp = NULL;
    llmpar_optim *adamw = NULL;
    llmpar_schedule *schedule = NULL;
    llmpar_mesh_desc mesh_desc;
    llmpar_llama_desc desc;
    llmpar_llama_apply_desc apply;
    llmpar_fsdp_desc fsdp_desc;
    llmpar_optim_desc adamw_desc;
    llmpar_policy policy;
    llmpar_run run;
    llmpar_micro micro[2];
    llmpar_unit_op replaced[64];
    int32_t count = 0, ids[2][B * T], targets[2][B * T];
    llmpar_llama_config config = small_config();
    my_hand = h;
    memset(&mesh_desc, 0, sizeof mesh_desc);
    memset(&desc, 0, sizeof desc);
    memset(&apply, 0, sizeof apply);
    memset(&fsdp_desc, 0, sizeof fsdp_desc);
    memset(&adamw_desc, 0, sizeof adamw_desc);
    memset(&policy, 0, sizeof policy);
    memset(&run, 0, sizeof run);
    memset(micro, 0, sizeof micro);
    mesh_desc.dp_shard = mesh_desc.tp = 2;
    desc.config = &config;
    apply.canon = 8;
    apply.sequence_parallel = 1;
    apply.positions = T;
    llmpar_optim_desc_resolve(&adamw_desc);
    fsdp_desc.optimizer_states = llmpar_optim_states(&adamw_desc);
    for (int m = 0; m < 2; m++) {
        for (int i = 0; i < B * T; i++) {
            ids[m][i] = (i * 7 + m) % 509;
            targets[m][i] = (i * 7 + m + 7) % 509;
        }
        micro[m].batch = B;
        micro[m].t = T;
        micro[m].leaves = 2;
        micro[m].ids = ids[m];
        micro[m].targets = targets[m];
    }
    llmpar_status status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_llama_create(ctx, &desc, &model);
    if (!status) status = llmpar_llama_apply(model, mesh->comm[LLMPAR_AXIS_TP], &apply);
    llmpar_unit *units = model ? llmpar_llama_units(model, &count) : NULL;
    if (!status && ctx->rank == 0) {
        h->units = count;
        for (int32_t u = 0; u < count && u < 8; u++) {
            h->ops[u][0] = units[u].forward_count;
            h->ops[u][1] = units[u].backward_count;
        }
    }
    if (!status && h->unit >= 0 && ctx->rank == h->rank) {
        llmpar_unit *u = &units[h->unit];
        const llmpar_unit_op *ops = h->backward ? u->backward : u->forward;
        memcpy(replaced, ops, (size_t)(h->backward ? u->backward_count : u->forward_count) * sizeof *ops);
        replaced[h->op].run = failing_op;
        if (h->backward) u->backward = replaced;
        else u->forward = replaced;
    }
    if (!status) status = llmpar_fsdp_create(mesh, units, count, &fsdp_desc, &fsdp);
    if (!status) {
        llmpar_fsdp_policy(fsdp, &policy);
        policy.micro_batches = 2;
        status = llmpar_schedule_create(&ctx->heap, units, count, &policy, &schedule, &ctx->error);
    }
    if (!status) status = llmpar_optim_create(fsdp, &adamw_desc, &adamw);
    if (!status) {
        run.micro = micro;
        run.tokens = 2 * B * T;
        run.optimizer = llmpar_optim_table(adamw);
        run.on_gradient = failing_gradient;
        run.on_gradient_user = h;
        llmpar_optim_set_lr(adamw, 1e-3);
    }
    for (int i = 0; i < 2 && !status; i++) status = llmpar_fsdp_run(fsdp, schedule->list, schedule->count, &run);
    llmpar_optim_destroy(adamw);
    llmpar_schedule_destroy(schedule);
    llmpar_fsdp_destroy(fsdp);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    h->status[ctx->rank] = status;
    return status;
}

static void hand_check(const llmpar_ctx *ctx, void *user) { ((by_hand *)user)->live[ctx->rank] = ctx->heap.live; }

static void hand_run(by_hand *h, llmpar_status want, const char *part)
{
    llmpar_launch_desc launch;
    llmpar_error error;
    memset(&launch, 0, sizeof launch);
    launch.ranks = 4;
    launch.log = train_quiet;
    launch.check = hand_check;
    llmpar_status status = llmpar_launch(&launch, hand_rank, h, &error);
    if (status != want || !strstr(error.text, part) || (want && error.rank != h->rank))
        TEST_FAIL("unit %d %s instruction %d, gradient %d: got %s: rank %d: %s", h->unit, h->backward ? "backward" : "forward", h->op, h->gradient_unit, llmpar_status_string(status), (int)error.rank, error.text);
    if (want) CHECK(test_clock() - h->failed_at < 2 * test_slow);
    for (int i = 0; i < 4; i++) {
        CHECK_STATUS(h->status[i], !want ? LLMPAR_OK : i == h->rank ? want : LLMPAR_ERR_PEER);
        CHECK_INT(h->live[i], 0);
    }
}

TIMED(own_callbacks)
{
    by_hand clean, h;
    memset(&clean, 0, sizeof clean);
    clean.rank = clean.unit = clean.gradient_unit = -1;
    hand_run(&clean, LLMPAR_OK, "");
    CHECK_INT(clean.units, 3);
    for (int32_t u = 0; u < clean.units; u++)
        for (int backward = 0; backward < 2; backward++)
            for (int32_t op = TRIES < 6 ? u % 2 : 0; op < clean.ops[u][backward]; op += TRIES < 6 ? 2 : 1) {
                memset(&h, 0, sizeof h);
                h.rank = (u + op + backward) % 4;
                h.unit = u;
                h.op = op;
                h.backward = backward;
                h.gradient_unit = -1;
                hand_run(&h, LLMPAR_ERR_UNSUPPORTED, backward ? "planted: an own instruction, pass 1, micro-batch" : "planted: an own instruction, pass 0, micro-batch 0");
            }
    for (int u = 0; u < clean.units; u++) {
        memset(&h, 0, sizeof h);
        h.rank = 3 - u;
        h.unit = -1;
        h.gradient_unit = u;
        hand_run(&h, LLMPAR_ERR_UNSUPPORTED, "planted: gradient of unit");
    }
}

/* ---- numbers that are not finite ---- */

typedef struct poison {
    const char *name;                /* parameter; NULL: none */
    float value;
    int all;                         /* the whole tensor, not one element a rank */
    int recover;                     /* put the old values back, forget the error and go on */
    const char *expected;            /* part of the text */
    unsigned char *before[TRAIN_RANKS];
} poison;

/* All shards of a rank, one after the other. */
static unsigned char *shards(llmpar_fsdp *fsdp, size_t *bytes)
{
    unsigned char *copy = NULL;
    *bytes = 0;
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(fsdp); u++) {
        int64_t elements;
        const void *shard = llmpar_fsdp_shard(fsdp, u, &elements, NULL, NULL);
        copy = (unsigned char *)realloc(copy, *bytes + (size_t)elements * sizeof(float));
        memcpy(copy + *bytes, shard, (size_t)elements * sizeof(float));
        *bytes += (size_t)elements * sizeof(float);
    }
    return copy;
}

static void put_back(llmpar_fsdp *fsdp, const unsigned char *copy)
{
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(fsdp); u++) {
        int64_t elements;
        void *shard = llmpar_fsdp_shard(fsdp, u, &elements, NULL, NULL);
        memcpy(shard, copy, (size_t)elements * sizeof(float));
        copy += (size_t)elements * sizeof(float);
    }
}

static void put_poison(llmpar_fsdp *fsdp, const poison *p)
{
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(fsdp); u++) {
        const llmpar_segment *segments;
        int32_t count;
        float *shard = (float *)llmpar_fsdp_shard(fsdp, u, NULL, &segments, &count);
        for (int32_t s = 0; s < count; s++)
            if (!strcmp(llmpar_fsdp_unit(fsdp, u)->params[segments[s].param].name, p->name))
                for (int64_t i = 0; i < (p->all ? segments[s].count : segments[s].count > 0); i++) shard[segments[s].begin + i] = p->value;
    }
}

static llmpar_status poison_before(train_job *job, llmpar_ctx *ctx, llmpar_trainer *trainer, int step)
{
    poison *p = (poison *)job->user;
    llmpar_fsdp *fsdp = llmpar_trainer_fsdp(trainer);
    unsigned char *sound, *now;
    size_t bytes;
    if (step != 2 || !p->name) return LLMPAR_OK;
    sound = shards(fsdp, &bytes);
    put_poison(fsdp, p);
    p->before[ctx->rank] = shards(fsdp, &bytes);
    llmpar_status status = llmpar_trainer_step(trainer, NULL);
    now = shards(fsdp, &bytes);
    CHECK_STATUS(status, LLMPAR_ERR_NONFINITE);
    CHECK_BYTES(now, p->before[ctx->rank], bytes);
    CHECK_TEXT(llmpar_last_error(ctx), "step 3:");
    CHECK_TEXT(llmpar_last_error(ctx), p->expected);
    if (p->recover) {
        put_back(fsdp, sound);
        llmpar_error_clear(&ctx->error);
        status = LLMPAR_OK;
    }
    free(sound);
    free(now);
    free(p->before[ctx->rank]);
    return status;
}

TEST(not_finite)
{
    static const poison cases[] = {
        {"model.embed_tokens.weight", NAN, 1, 0, "model.embed_tokens.weight", {0}},
        {"model.layers.0.mlp.up_proj.weight", NAN, 0, 0, "model.layers.0.mlp.up_proj.weight", {0}},
        {"model.layers.1.self_attn.k_proj.weight", INFINITY, 0, 0, "model.layers.1.self_attn.k_proj.weight", {0}},
        {"model.layers.1.post_attention_layernorm.weight", -INFINITY, 0, 0, "model.layers.1.post_attention_layernorm.weight", {0}},
        {"model.norm.weight", NAN, 0, 0, "model.norm.weight", {0}},
        {"model.layers.0.mlp.down_proj.weight", 3e38f, 1, 0, "first non-finite tensor:", {0}},
    };
    static const int shape[][3] = {{1, 1, 1}, {1, 2, 2}, {2, 2, 1}, {1, 1, 4}};
    llmpar_llama_config config = train_config(1);
    for (unsigned m = 0; m < sizeof shape / sizeof shape[0]; m++)
        for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
            if (TRIES < 6 && (i + m) % 4 != 1) continue;
            train_result r;
            train_job job;
            poison p = cases[i];
            memset(&job, 0, sizeof job);
            job.config = &config;
            job.dp_replicate = shape[m][0];
            job.dp_shard = shape[m][1];
            job.tp = shape[m][2];
            job.zero = i % 2 ? 3 : 0;
            job.accum = 1 + (int)(m % 2);
            job.before_step = poison_before;
            job.user = &p;
            train_run(&job, &r);
            CHECK_STATUS(r.status, LLMPAR_ERR_NONFINITE);
            CHECK_TEXT(r.error.text, p.expected);
            CHECK_TEXT(r.error.text, "step 3:");
            for (int k = 0; k < r.ranks; k++) {
                CHECK_STATUS(r.rank_status[k], LLMPAR_ERR_NONFINITE);
                CHECK_INT(r.live[k], 0);
            }
        }
}

/* A step that was refused leaves nothing behind: with the old weights the run goes on as if it had not been. */
TEST(not_finite_recovered)
{
    train_result want, got;
    llmpar_llama_config config = train_config(0);
    train_job job;
    poison p;
    memset(&job, 0, sizeof job);
    job.config = &config;
    job.dp_shard = job.tp = 2;
    job.zero = 3;
    job.keep_files = 1;
    train_run(&job, &want);
    CHECK_OK(want.status);
    memset(&p, 0, sizeof p);
    p.name = "model.layers.2.self_attn.o_proj.weight";
    p.value = NAN;
    p.recover = 1;
    p.expected = p.name;
    job.before_step = poison_before;
    job.user = &p;
    train_run(&job, &got);
    train_same("recovered", &got, &want);
    train_result_free(&want);
    train_result_free(&got);
}

/* A step in which no target counts changes nothing and says so. */
static llmpar_status no_targets(void *user, int64_t index, int32_t *tokens)
{
    int64_t step = index / 16;
    llmpar_status status = train_sequence(user, index - 16 * (step > 1), tokens); /* without it, the data go on as before */
    for (int i = 1; i <= 24 && step == 1; i++) tokens[i] = -1;
    return status;
}

TEST(no_token_counts)
{
    train_result r, plain;
    llmpar_llama_config config = train_config(1);
    train_job job;
    memset(&job, 0, sizeof job);
    job.config = &config;
    job.dp_shard = job.tp = 2;
    job.zero = 3;
    job.sequence = no_targets;
    job.steps = 3;
    train_run(&job, &r);
    CHECK_OK(r.status);
    job.sequence = NULL;
    train_run(&job, &plain);
    CHECK_OK(plain.status);
    for (int i = 0; i < 4; i++) {
        CHECK_INT(r.step[i][1].skipped, 1);
        CHECK_INT(r.step[i][1].tokens, 0);
        CHECK_INT(r.step[i][2].skipped, 0);
        CHECK(r.step[i][1].loss == 0 && r.step[i][1].grad_norm == 0);
        CHECK(r.step[i][2].loss == plain.step[0][1].loss && r.step[i][2].grad_norm == plain.step[0][1].grad_norm);
    }
}

TEST_LIST(T_(device_calls), T_(allocations), T_(a_rank_stays_away), T_(data_source), T_(unwritable), T_(memory_limit), T_(own_callbacks), T_(not_finite), T_(not_finite_recovered), T_(no_token_counts))
