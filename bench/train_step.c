/* train_step: one training step (forward, backward, clipping, AdamW) of a Llama on several meshes: tokens a second, GFLOP/s as a part of the multiply-add peak, communication that nothing hides, peak memory.

   A layout is dpN, tpN or AxB (dp_shard x tp), and tN behind it: threads a rank (default 1). Without options: every model, length and dtype on 1x1, 1x1t2, dp2, tp2 and 2x2. Two sequences a step (--batch; dp8: eight), so that what one
   rank does is what several do. The layouts named together stay in memory together and take turns, step by step, each after one that is not counted: their ratio is one of neighbours.

   FLOPs are 6 N + 12 L H E T a token: attention counts as if it were not causal. The peak beside a step is measured inside it, for a millisecond on all cores that the layout uses, whenever it comes to an attention (which all ranks do together), and
   its time is taken off again; layouts with more threads than cores have it before and after the step. Communication: time of a rank inside collectives, waiting for the others included, mean over the ranks. */
#include "cpu.h"
#include "peak.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_LAYOUTS = 8, MOST_RANKS = 16, MOST_STEPS = 64, MOST_KINDS = 256 };

/* ---- layouts, and the baton that goes round between them ---- */

typedef struct layout { char name[16]; int shard, tp, threads; } layout;

typedef struct settings {
    llmpar_llama_config config;
    const char *model, *level;
    llmpar_recompute recompute;
    int32_t recompute_every; /* 0: every block */
    llmpar_dtype dtype;
    enum bench_kind peak;
    int64_t seq, batch;
    int steps, profile, overlap, serve;
} settings;

/* What one kind of call took: of gemm one kind a shape. */
typedef struct kind { char name[64]; long calls; double seconds, flops, bytes; } kind;

typedef struct team team;
typedef struct rank {
    team *team;
    int index;
    int depth;                    /* inside a wrapped call: what it calls counts as its own */
    double begin, end;            /* of the last step */
    double communication, sampled, peak; /* of the last step: seconds in collectives, seconds of sampling, sum of the samples */
    int samples;
    uint64_t memory;
    double loss;
    char memory_table[2000];
    kind kinds[MOST_KINDS];
    int kind_count;
} rank;

struct team {
    layout layout;
    const settings *s;
    pthread_t thread;
    int ranks, cores, sample; /* sample: measure the peak inside steps */
    int turn, quit, arrived;  /* under the mutex */
    int failed;
    double flops, seconds;    /* a step's; the last one's */
    rank *rank;
    double rate[MOST_STEPS], peak[MOST_STEPS], communication[MOST_STEPS]; /* FLOPs a second, the peak beside, seconds over seconds */
};

static pthread_mutex_t baton = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t moved = PTHREAD_COND_INITIALIZER;
static __thread rank *self; /* NULL on the threads of streams */
static llmpar_device real;  /* the slots behind the wrappers, the same ones on all ranks */
static llmpar_comm real_comm;

/* ---- wrappers: the slots of the device and of the communicators, with a clock around ---- */

static kind *kind_of(const char *name)
{
    for (int i = 0; i < self->kind_count; i++)
        if (!strcmp(self->kinds[i].name, name)) return &self->kinds[i];
    if (self->kind_count == MOST_KINDS) { fprintf(stderr, "train_step: more than %d kinds of calls\n", (int)MOST_KINDS); exit(1); }
    kind *k = &self->kinds[self->kind_count++];
    memset(k, 0, sizeof *k);
    snprintf(k->name, sizeof k->name, "%s", name);
    return k;
}

static void count(const char *name, double seconds, double flops, double bytes)
{
    kind *k = kind_of(name);
    k->calls++;
    k->seconds += seconds;
    k->flops += flops;
    k->bytes += bytes;
}

#define WRAP(slot, type, what, flops, bytes) \
    static llmpar_status train_##slot(llmpar_device *device, llmpar_stream *stream, const type *a) \
    { \
        char name_[64]; \
        double start_; \
        llmpar_status status_; \
        if (!self || self->depth) return real.slot(device, stream, a); \
        what; \
        self->depth++; \
        start_ = bench_now(); \
        status_ = real.slot(device, stream, a); \
        count(name_, bench_now() - start_, flops, bytes); \
        self->depth--; \
        return status_; \
    }
#define NAME(text) snprintf(name_, sizeof name_, text)
#define SIZE ((double)llmpar_dtype_size(a->dtype))

/* All ranks come to their attentions together, so their samples run at once and nobody waits for one. */
static void sample(void)
{
    bench_fma_of of;
    double start = bench_now();
    if (!self->team->sample || self->depth) return;
    of.kind = self->team->s->peak;
    of.threads = self->team->layout.threads;
    self->peak += bench_fma(&of);
    self->samples++;
    self->sampled += bench_now() - start;
}

static int64_t gemm_k(const llmpar_gemm_args *a)
{
    int64_t k = 0;
    for (int32_t i = 0; i < a->segment_count; i++) k += a->segments[i].k;
    return k;
}
static const char *const gemm_kinds[] = { "?", "nt", "nn", "tn" };
/* causal: half the square */
static double attention_flops(const llmpar_attention_args *a) { return 2.0 * (double)a->batch * (double)a->heads * (double)a->head_dim * (double)a->tq * (double)a->tk; }

/* A collective does its arithmetic inside of its own call: depth. */
WRAP(gemm, llmpar_gemm_args, snprintf(name_, sizeof name_, "gemm %s %4ld x %5ld x %5ld", gemm_kinds[a->kind], (long)a->m, (long)a->n, (long)gemm_k(a)), 2.0 * (double)a->m * (double)a->n * (double)gemm_k(a), 0)
WRAP(rmsnorm, llmpar_rmsnorm_args, NAME("rmsnorm"), 0, (a->residual ? 4 : 2) * SIZE * (double)(a->rows * a->dim))
WRAP(rmsnorm_backward, llmpar_rmsnorm_backward_args, NAME("rmsnorm backward"), 0, (a->dresidual ? 4 : 3) * SIZE * (double)(a->tokens.batch * a->tokens.t * a->dim))
WRAP(rope, llmpar_rope_args, NAME("rope"), 0, 2 * SIZE * (double)(a->batch * a->t * a->heads * a->head_dim))
WRAP(attention, llmpar_attention_args, sample(); NAME("attention"), attention_flops(a), 0)
WRAP(attention_backward, llmpar_attention_backward_args, sample(); NAME("attention backward"), 2.5 * attention_flops(&a->forward), 0)
WRAP(swiglu, llmpar_swiglu_args, NAME("swiglu"), 0, 3 * SIZE * (double)(a->rows * a->dim))
WRAP(swiglu_backward, llmpar_swiglu_backward_args, NAME("swiglu backward"), 0, (a->h ? 6 : 5) * SIZE * (double)(a->rows * a->dim))
WRAP(embedding, llmpar_embedding_args, NAME("embedding"), 0, 2 * SIZE * (double)(a->rows * a->dim))
WRAP(embedding_backward, llmpar_embedding_backward_args, NAME("embedding backward"), 0, SIZE * (double)(a->tokens.batch * a->tokens.t * a->dim) + (double)(a->v_local * a->dim) * (double)llmpar_dtype_size(llmpar_dtype_sum(a->dtype)))
WRAP(xent_max, llmpar_xent_args, NAME("xent max"), 0, SIZE * (double)(a->rows * a->v_local))
WRAP(xent_sum, llmpar_xent_args, NAME("xent sum"), 0, SIZE * (double)(a->rows * a->v_local))
WRAP(xent_loss, llmpar_xent_loss_args, NAME("xent loss"), 0, 0)
WRAP(xent_backward, llmpar_xent_backward_args, NAME("xent backward"), 0, 2 * (double)llmpar_dtype_size(a->forward.dtype) * (double)(a->forward.rows * a->forward.v_local))
WRAP(tree_sum, llmpar_tree_sum_args, NAME("tree sum"), 0, SIZE * (double)(a->n + 1) * (double)a->count)
WRAP(max, llmpar_max_args, NAME("max"), 0, SIZE * (double)(a->n + 1) * (double)a->count)
WRAP(add, llmpar_add_args, NAME("add"), 0, 3 * SIZE * (double)a->count)
WRAP(scale, llmpar_scale_args, NAME("scale"), 0, 2 * SIZE * (double)a->count)
WRAP(cast, llmpar_cast_args, NAME("cast"), 0, (double)(llmpar_dtype_size(a->in_dtype) + llmpar_dtype_size(a->out_dtype)) * (double)a->count)
WRAP(copy_rows, llmpar_copy_rows_args, NAME("copy rows"), 0, 2.0 * (double)a->size * (double)(a->rows * a->width))
WRAP(adamw, llmpar_adamw_args, NAME("adamw"), 0, 7 * SIZE * (double)a->count)
WRAP(square_sum, llmpar_square_sum_args, NAME("square sum"), 0, SIZE * (double)a->count)

static llmpar_status train_copy(llmpar_device *device, llmpar_stream *stream, void *out, const void *in, size_t bytes)
{
    if (!self || self->depth) return real.copy(device, stream, out, in, bytes);
    double start = bench_now();
    llmpar_status status = real.copy(device, stream, out, in, bytes);
    count("copy", bench_now() - start, 0, 2.0 * (double)bytes);
    return status;
}
static llmpar_status train_zero(llmpar_device *device, llmpar_stream *stream, void *out, size_t bytes)
{
    if (!self || self->depth) return real.zero(device, stream, out, bytes);
    double start = bench_now();
    llmpar_status status = real.zero(device, stream, out, bytes);
    count("zero", bench_now() - start, 0, (double)bytes);
    return status;
}
static llmpar_status train_alloc(llmpar_device *device, size_t bytes, void **out)
{
    double start = bench_now();
    llmpar_status status = real.alloc(device, bytes, out);
    count("alloc", bench_now() - start, 0, 0);
    return status;
}
static void train_free(llmpar_device *device, void *memory, size_t bytes)
{
    double start = bench_now();
    real.free(device, memory, bytes);
    count("free", bench_now() - start, 0, 0);
}

#define WRAP_COMM(slot, factor) \
    static llmpar_status train_##slot(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) \
    { \
        char name_[64]; \
        double start_ = bench_now(), blocks_ = call->blocks ? (double)call->blocks : 1; \
        llmpar_status status_; \
        self->depth++; \
        status_ = real_comm.slot(comm, stream, call); \
        self->depth--; \
        start_ = bench_now() - start_; \
        self->communication += start_; \
        snprintf(name_, sizeof name_, "%s over %s", #slot, comm->axis); \
        count(name_, start_, 0, (factor) * blocks_ * (double)call->count * (double)llmpar_dtype_size(call->dtype)); \
        return status_; \
    }
/* With --overlap a collective is only enqueued, and these wait for it. */
static llmpar_status train_event_wait(llmpar_device *device, llmpar_stream *stream, llmpar_event *event)
{
    double start = bench_now();
    llmpar_status status = real.event_wait(device, stream, event);
    if (!self || self->depth) return status;
    self->communication += bench_now() - start;
    count("event wait", bench_now() - start, 0, 0);
    return status;
}
static llmpar_status train_synchronize(llmpar_device *device, llmpar_stream *stream)
{
    double start = bench_now();
    llmpar_status status = real.synchronize(device, stream);
    if (!self || self->depth) return status;
    self->communication += bench_now() - start;
    count("synchronize", bench_now() - start, 0, 0);
    return status;
}
WRAP_COMM(all_gather, (double)comm->ranks)
WRAP_COMM(reduce_scatter, (double)comm->ranks)
WRAP_COMM(all_reduce, 1)
WRAP_COMM(broadcast, 1)
WRAP_COMM(all_to_all, (double)comm->ranks)

static void wrap_device(llmpar_device *d)
{
    pthread_mutex_lock(&baton);
    real = *d;
    pthread_mutex_unlock(&baton);
#define SLOT(name) d->name = train_##name;
    SLOT(gemm) SLOT(rmsnorm) SLOT(rmsnorm_backward) SLOT(rope) SLOT(attention) SLOT(attention_backward) SLOT(swiglu) SLOT(swiglu_backward) SLOT(embedding) SLOT(embedding_backward) SLOT(xent_max) SLOT(xent_sum)
    SLOT(xent_loss) SLOT(xent_backward) SLOT(tree_sum) SLOT(max) SLOT(add) SLOT(scale) SLOT(cast) SLOT(copy_rows) SLOT(adamw) SLOT(square_sum) SLOT(copy) SLOT(zero) SLOT(alloc) SLOT(free) SLOT(event_wait) SLOT(synchronize)
#undef SLOT
}

static void unwrap_device(llmpar_device *d)
{
    llmpar_device was = *d;
    *d = real;
    d->name = was.name;
    d->error = was.error;
    d->state = was.state;
}

static void wrap_comm(llmpar_comm *c)
{
    if (!c || c->ranks == 1 || c->all_gather == train_all_gather) return;
    pthread_mutex_lock(&baton);
    real_comm = *c;
    pthread_mutex_unlock(&baton);
    c->all_gather = train_all_gather;
    c->reduce_scatter = train_reduce_scatter;
    c->all_reduce = train_all_reduce;
    c->broadcast = train_broadcast;
    c->all_to_all = train_all_to_all;
}

/* ---- a rank ---- */

static llmpar_status train_sequence(void *user, int64_t index, int32_t *tokens)
{
    const settings *s = (const settings *)user;
    bench_tokens(index, s->seq + 1, s->config.vocab, tokens);
    return LLMPAR_OK;
}

/* Waits for the turn; 0: it is over. All ranks of a team go through. */
static int take(team *t)
{
    pthread_mutex_lock(&baton);
    t->arrived++;
    pthread_cond_broadcast(&moved);
    int seen = t->turn;
    while (t->turn == seen && !t->quit) pthread_cond_wait(&moved, &baton);
    int quit = t->quit;
    pthread_mutex_unlock(&baton);
    return !quit;
}

static void print_memory(const llmpar_trainer *trainer, rank *r)
{
    llmpar_memory memory;
    llmpar_trainer_memory(trainer, &memory);
    llmpar_memory_print(NULL, &memory, r->memory_table, sizeof r->memory_table);
}

static llmpar_status train_rank(llmpar_ctx *ctx, void *user)
{
    team *t = (team *)user;
    const settings *s = t->s;
    rank *r = &t->rank[ctx->rank];
    llmpar_mesh *mesh = NULL;
    llmpar_llama *model = NULL;
    llmpar_trainer *trainer = NULL;
    llmpar_mesh_desc mesh_desc;
    llmpar_llama_desc model_desc;
    llmpar_trainer_desc desc;
    llmpar_step step;
    memset(&mesh_desc, 0, sizeof mesh_desc);
    memset(&model_desc, 0, sizeof model_desc);
    memset(&desc, 0, sizeof desc);
    self = r;
    r->team = t;
    r->index = ctx->rank;
    wrap_device(ctx->device);
    mesh_desc.dp_shard = t->layout.shard;
    mesh_desc.tp = t->layout.tp;
    model_desc.config = &s->config;
    desc.sequence = train_sequence;
    desc.sequence_user = (void *)(uintptr_t)s;
    desc.seq_len = s->seq;
    desc.batch = s->batch;
    desc.dtype = s->dtype;
    desc.overlap = s->overlap;
    desc.recompute = s->recompute;
    desc.recompute_every = s->recompute_every;
    desc.prefetch = s->overlap ? 1 : 0;
    desc.log_every = -1;
    llmpar_status status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    for (int a = 0; a < LLMPAR_MESH_AXES && !status; a++) wrap_comm(mesh->comm[a]);
    if (!status) wrap_comm(mesh->dp);
    if (!status) wrap_comm(mesh->world);
    if (!status) status = llmpar_llama_create(ctx, &model_desc, &model);
    if (!status) status = llmpar_parallelize(mesh, model, &desc, &trainer);
    while (!status && take(t)) {
        r->communication = r->sampled = r->peak = 0;
        r->samples = r->kind_count = 0;
        r->begin = bench_now();
        status = llmpar_trainer_step(trainer, &step);
        r->end = bench_now();
        r->memory = step.memory;
        r->loss = step.loss;
        if (s->profile && !status) print_memory(trainer, r);
    }
    if (status) {
        pthread_mutex_lock(&baton);
        t->failed = 1;
        pthread_cond_broadcast(&moved);
        pthread_mutex_unlock(&baton);
    }
    llmpar_trainer_destroy(trainer);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    unwrap_device(ctx->device);
    return status;
}

static void *train_team(void *user)
{
    team *t = (team *)user;
    llmpar_launch_desc desc;
    llmpar_error error;
    memset(&desc, 0, sizeof desc);
    desc.ranks = t->ranks;
    desc.threads = t->layout.threads;
    desc.cpu = t->s->level;
    if (llmpar_launch(&desc, train_rank, t, &error)) {
        fprintf(stderr, "train_step: %s: %s\n", t->layout.name, error.text);
        pthread_mutex_lock(&baton);
        t->failed = 1;
        pthread_cond_broadcast(&moved);
        pthread_mutex_unlock(&baton);
    }
    return NULL;
}

/* ---- the conductor ---- */

static void await(team *t)
{
    pthread_mutex_lock(&baton);
    while (t->arrived < t->ranks && !t->failed) pthread_cond_wait(&moved, &baton);
    int failed = t->failed;
    pthread_mutex_unlock(&baton);
    if (failed) { fprintf(stderr, "train_step: %s failed\n", t->layout.name); pthread_join(t->thread, NULL); exit(1); }
}

/* One step of a team, alone on the machine; i < 0: not counted. */
static void turn(team *t, int i)
{
    bench_fma_of of;
    double before = 0, begin = 1e300, end = 0, sampled = 0, communication = 0, peak = 0;
    int samples = 0;
    of.kind = t->s->peak;
    of.threads = t->cores;
    if (!t->sample && !t->s->serve) before = bench_fma(&of) + bench_fma(&of) + bench_fma(&of);
    pthread_mutex_lock(&baton);
    t->arrived = 0;
    t->turn++;
    pthread_cond_broadcast(&moved);
    pthread_mutex_unlock(&baton);
    await(t);
    if (!t->sample && !t->s->serve) peak = (before + bench_fma(&of) + bench_fma(&of) + bench_fma(&of)) / 6;
    for (int r = 0; r < t->ranks; r++) {
        rank *p = &t->rank[r];
        if (p->begin < begin) begin = p->begin;
        if (p->end > end) end = p->end;
        sampled += p->sampled / t->ranks;
        communication += p->communication / t->ranks;
        peak += p->peak;
        samples = p->samples;
    }
    if (t->sample) peak /= samples;
    t->seconds = end - begin - sampled;
    if (i < 0) return;
    double seconds = t->seconds;
    t->rate[i] = t->flops / seconds;
    t->peak[i] = peak;
    t->communication[i] = communication / seconds;
}

static int kind_compare(const void *a, const void *b)
{
    double x = ((const kind *)a)->seconds, y = ((const kind *)b)->seconds;
    return x < y ? 1 : x > y ? -1 : 0;
}

/* Where the last step of rank 0 went. */
static void print_profile(team *t)
{
    rank *r = &t->rank[0];
    double seconds = r->end - r->begin - r->sampled, known = 0, arithmetic = 0, peak = t->sample ? r->peak / r->samples : 0, memory = 0;
    for (int i = 0; i < r->kind_count; i++) {
        known += r->kinds[i].seconds;
        if (r->kinds[i].flops > 0) arithmetic += r->kinds[i].seconds;
        else memory += r->kinds[i].seconds;
    }
    qsort(r->kinds, (size_t)r->kind_count, sizeof r->kinds[0], kind_compare);
    printf("  %s: rank 0, last step: %.3f s; gemm and attention %.1f %%, other calls %.1f %%, outside of calls %.1f %%\n", t->layout.name, seconds, 100 * arithmetic / seconds, 100 * memory / seconds, 100 * (1 - known / seconds));
    fputs(r->memory_table, stdout);
    printf("    %-36s %6s %10s %7s %10s %9s %9s\n", "", "calls", "ms", "share", "GFLOP/s", "of peak", "GB/s");
    for (int i = 0; i < r->kind_count; i++) {
        kind *k = &r->kinds[i];
        printf("    %-36s %6ld %10.2f %6.2f%%", k->name, k->calls, 1e3 * k->seconds, 100 * k->seconds / seconds);
        if (k->flops > 0) printf(" %10.1f %8.1f%%", 1e-9 * k->flops / k->seconds, peak > 0 ? 100 * k->flops / k->seconds / peak : 0);
        if (k->bytes > 0) printf(" %30.1f", 1e-9 * k->bytes / k->seconds);
        printf("\n");
    }
}

/* Ratio of two layouts' rates, step by step, each over its own peak a core: a core that somebody else slows down does not count. */
static void print_ratio(bench_results *results, const char *head, const team *a, const team *b, int steps, double bar)
{
    double work[MOST_STEPS], bound[MOST_STEPS + 1];
    char name[120];
    for (int i = 0; i < steps; i++) {
        work[i] = a->rate[i] / (a->peak[i] / a->cores);
        bound[i] = b->rate[i] / (b->peak[i] / b->cores);
    }
    bound[steps] = bound[steps - 1];
    snprintf(name, sizeof name, "%s, %s beside %s", head, a->layout.name, b->layout.name);
    bench_row(results, name, "cores", 1, b->layout.name, bench_pairs_of(work, bound, steps), bar);
}

static const team *team_named(const team *teams, int count, const char *name)
{
    for (int i = 0; i < count; i++)
        if (!strcmp(teams[i].layout.name, name)) return &teams[i];
    return NULL;
}

/* bench/peers/run.py: a request is one step, and its seconds the answer. */
static void serve(team *t)
{
    printf("ready %.6f loss %.4f\n", t->seconds, t->rank[0].loss);
    fflush(stdout);
    while (bench_served()) {
        turn(t, -1);
        printf("%.6f loss %.4f\n", t->seconds, t->rank[0].loss);
        fflush(stdout);
    }
}

static void run_together(bench_results *results, const settings *s, const layout *layouts, int layout_count)
{
    static team teams[MOST_LAYOUTS];
    char head[64], name[120];
    memset(teams, 0, sizeof teams);
    snprintf(head, sizeof head, "%s %s T %ld B %ld%s", s->model, llmpar_dtype_name(s->dtype), (long)s->seq, (long)s->batch, s->overlap ? " overlap" : "");
    for (int i = 0; i < layout_count; i++) {
        team *t = &teams[i];
        int cores = bench_cores();
        t->layout = layouts[i];
        t->s = s;
        t->ranks = layouts[i].shard * layouts[i].tp;
        t->cores = t->ranks * layouts[i].threads <= cores ? t->ranks * layouts[i].threads : cores;
        t->sample = t->ranks * layouts[i].threads <= cores && !s->serve;
        t->flops = llmpar_llama_flops_per_token(&s->config, s->seq) * (double)(s->seq * s->batch);
        t->rank = (rank *)calloc((size_t)t->ranks, sizeof *t->rank);
        if (!t->rank || pthread_create(&t->thread, NULL, train_team, t)) { fprintf(stderr, "train_step: no memory or no thread\n"); exit(1); }
        await(t);
        turn(t, -1);
    }
    if (s->serve) serve(&teams[0]);
    for (int step = 0; step < s->steps && !s->serve; step++)
        for (int i = 0; i < layout_count; i++) turn(&teams[i], step);
    for (int i = 0; i < layout_count && !s->serve; i++) {
        team *t = &teams[i];
        double rate[MOST_STEPS], peak[MOST_STEPS + 1], communication[MOST_STEPS], bytes = 0;
        memcpy(rate, t->rate, sizeof rate);
        memcpy(communication, t->communication, sizeof communication);
        for (int k = 0; k < t->ranks; k++) bytes += (double)t->rank[k].memory;
        /* a step's own peak on both sides of it */
        for (int k = 0; k < s->steps; k++) {
            rate[k] = t->rate[k] / t->peak[k];
            peak[k] = 1;
        }
        peak[s->steps] = 1;
        bench_ratio r = bench_pairs_of(rate, peak, s->steps);
        memcpy(rate, t->rate, sizeof rate);
        memcpy(peak, t->peak, sizeof t->peak);
        r.work = bench_median(rate, s->steps);
        r.bound = bench_median(peak, s->steps);
        snprintf(name, sizeof name, "%s, %s", head, t->layout.name);
        bench_row(results, name, "GFLOP/s", 1e-9, t->cores > 1 ? "the peak of its cores" : "the peak of its core", r, !strcmp(s->model, "110m") && s->seq == 1024 && s->dtype == LLMPAR_F32 && t->cores == 2 && t->ranks <= 4 && !s->level ? 0.70 : 0);
        snprintf(name, sizeof name, "%s, %s: speed", head, t->layout.name);
        bench_value(results, name, "tokens/s", r.work / t->flops * (double)(s->seq * s->batch));
        if (t->ranks > 1) {
            snprintf(name, sizeof name, "%s, %s: in collectives", head, t->layout.name);
            bench_value(results, name, "% of the step", 100 * bench_median(communication, s->steps));
        }
        snprintf(name, sizeof name, "%s, %s: peak memory, all ranks", head, t->layout.name);
        bench_value(results, name, "MB", bytes * 1e-6);
    }
    const team *one = team_named(teams, layout_count, "1x1"), *two = team_named(teams, layout_count, "1x1t2"), *dp2 = team_named(teams, layout_count, "dp2"), *dp8 = team_named(teams, layout_count, "dp8");
    int bars = !strcmp(s->model, "110m") && s->seq >= 1024 && s->dtype == LLMPAR_F32;
    if (s->serve) one = two = dp2 = dp8 = NULL;
    if (one && two) print_ratio(results, head, two, one, s->steps, bars ? 1.85 : 0);
    for (int i = 0; i < layout_count; i++)
        if (two && teams[i].ranks == 2 && teams[i].cores == 2) print_ratio(results, head, &teams[i], two, s->steps, bars ? 0.92 : 0);
    if (dp2 && dp8) print_ratio(results, head, dp8, dp2, s->steps, bars ? 0.85 : 0);
    for (int i = 0; i < layout_count; i++) {
        team *t = &teams[i];
        if (s->profile) print_profile(t);
        pthread_mutex_lock(&baton);
        t->quit = 1;
        pthread_cond_broadcast(&moved);
        pthread_mutex_unlock(&baton);
        pthread_join(t->thread, NULL);
        free(t->rank);
    }
}

/* ---- options ---- */

static const char usage[] =
    "train_step [options]\n"
    "Without options: every model, length and type on 1x1, 1x1t2, dp2, tp2 and 2x2.\n"
    "  --model NAME        15m, 110m, 300m, or another preset\n"
    "  --seq LIST          lengths (default 256,1024)\n"
    "  --dtype TYPE        f32 or bf16\n"
    "  --layout LIST       1x1, dpN, tpN or AxB (dp_shard x tp), and tN behind it: threads a rank\n"
    "  --batch N           sequences a step (default 2, or as many as data ranks)\n"
    "  --steps N           1 .. 64 (default 5)\n"
    "  --level LEVEL       portable, avx2, avx512 or avx512bf16, as far as this processor has it\n"
    "  --recompute WHAT    none, selective or full; full,2: every second block\n"
    "  --overlap           collectives on a thread of their own\n"
    "  --profile           what each kind of call takes\n"
    "  --serve             a step for each line \"step\", for bench/peers/run.py; with one model, length, type and layout\n"
    "  --json FILE         the table as JSON, too\n";

static int parse_layouts(const char *text, layout *out)
{
    int count = 0;
    for (const char *at = text; *at;) {
        layout *l = &out[count];
        int used = 0, threads = 0;
        size_t length = strcspn(at, ",");
        memset(l, 0, sizeof *l);
        if (count == MOST_LAYOUTS || length >= sizeof l->name) bench_refuse("--layout", text, "at most 8 of 1x1, 1x1t2, dp2, tp2, 2x2 .., separated by commas");
        memcpy(l->name, at, length);
        l->shard = l->tp = 1;
        if (sscanf(l->name, "dp%d%n", &l->shard, &used) != 1 && sscanf(l->name, "tp%d%n", &l->tp, &used) != 1 && sscanf(l->name, "%dx%d%n", &l->shard, &l->tp, &used) != 2) bench_refuse("--layout", l->name, "dpN, tpN or AxB, and tN for threads");
        l->threads = 1;
        if (l->name[used] == 't' && sscanf(l->name + used, "t%d%n", &l->threads, &threads) == 1) used += threads;
        if (l->name[used] || l->shard < 1 || l->tp < 1 || l->threads < 1 || l->shard * l->tp > MOST_RANKS || l->threads > BENCH_MOST_THREADS) bench_refuse("--layout", l->name, "dpN, tpN or AxB of at most 16 ranks, and tN for threads");
        count++;
        at += length;
        if (*at == ',') at++;
    }
    if (!count) bench_refuse("--layout", text, "at least one");
    return count;
}

static void run(bench_results *results, settings *s, const char *layouts)
{
    layout list[MOST_LAYOUTS];
    llmpar_error error;
    int count = parse_layouts(layouts, list);
    int64_t batch = s->batch;
    llmpar_cpu_level level = s->level ? bench_level("--level", s->level) : llmpar_cpu_best_level();
    llmpar_error_clear(&error);
    if (llmpar_llama_preset(s->model, &s->config, &error)) { fprintf(stderr, "train_step: --model: %s\n", error.text); exit(2); }
    if (s->config.max_positions < s->seq) s->config.max_positions = (int32_t)s->seq;
    s->peak = bench_fma_kind(llmpar_cpu_level_name(level), s->dtype == LLMPAR_BF16);
    for (int i = 0; i < count && !batch; i++)
        if (s->batch < list[i].shard) s->batch = list[i].shard;
    if (!batch && s->batch < 2) s->batch = 2;
    run_together(results, s, list, count);
    s->batch = batch;
}

static void parse_recompute(const char *text, settings *s)
{
    static const char *const words[] = { "none", "selective", "full" };
    const char *comma = strchr(text, ',');
    size_t length = comma ? (size_t)(comma - text) : strlen(text);
    int w = 0;
    while (w < 3 && (strlen(words[w]) != length || strncmp(text, words[w], length))) w++;
    if (w == 3) bench_refuse("--recompute", text, "none, selective, full, or one of them, and a comma and a number: of every so many blocks one");
    s->recompute = (llmpar_recompute)w;
    if (comma) s->recompute_every = (int32_t)bench_number("--recompute", comma + 1, 1, 1024);
}

int main(int argc, char **argv)
{
    static const char *const all[] = { "15m", "110m", "300m" };
    /* what does not fit into memory together */
    static const char *const together[] = { "1x1,1x1t2,dp2,tp2,2x2", "", "" }, *const apart[] = { "1x1t2,dp2", "1x1t2,tp2", "1x1,2x2" };
    const char *layouts = NULL, *model = NULL, *seq = "256,1024";
    bench_results results;
    settings s;
    int dtype = 0;
    bench_open(&results, "train", &argc, argv, usage, -1);
    memset(&s, 0, sizeof s);
    s.steps = 5;
    for (int i = 1; i < argc; i++) {
        const char *option = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(option, "--profile")) { s.profile = 1; continue; }
        if (!strcmp(option, "--overlap")) { s.overlap = 1; continue; }
        if (!strcmp(option, "--serve")) { s.serve = 1; continue; }
        if (strncmp(option, "--", 2)) bench_refuse("argument", option, "an option, see --help");
        i++;
        if (!strcmp(option, "--model")) model = value;
        else if (!strcmp(option, "--seq")) seq = value;
        else if (!strcmp(option, "--layout")) layouts = value;
        else if (!strcmp(option, "--level")) s.level = value;
        else if (!strcmp(option, "--recompute")) parse_recompute(value, &s);
        else if (!strcmp(option, "--batch")) s.batch = bench_number(option, value, 1, 1024);
        else if (!strcmp(option, "--steps")) s.steps = (int)bench_number(option, value, 1, MOST_STEPS);
        else if (!strcmp(option, "--dtype")) dtype = !strcmp(value, "f32") ? LLMPAR_F32 : !strcmp(value, "bf16") ? LLMPAR_BF16 : (bench_refuse(option, value, "f32 or bf16"), LLMPAR_BF16);
        else bench_refuse("argument", option, "an option of --help");
    }
    if (!seq[0]) bench_refuse("--seq", seq, "lengths separated by commas");
    if (s.serve && (!model || !layouts || strchr(layouts, ',') || strchr(seq, ',') || !dtype)) bench_refuse("--serve", "", "one --model, --seq, --dtype and --layout with it");
    for (int m = 0; m < 3; m++) {
        if (model && m > 0) break;
        s.model = model ? model : all[m];
        for (const char *at = seq; *at;) {
            char *end;
            s.seq = strtol(at, &end, 10);
            if (s.seq < 1 || s.seq > 1 << 20 || (*end && *end != ',')) bench_refuse("--seq", seq, "lengths separated by commas");
            at = *end ? end + 1 : end;
            for (int d = 0; d < 2; d++) {
                s.dtype = d ? LLMPAR_BF16 : LLMPAR_F32;
                if (dtype && (int)s.dtype != dtype) continue;
                if (layouts) run(&results, &s, layouts);
                for (int g = 0; g < 3 && !layouts; g++) {
                    const char *group = strcmp(s.model, "300m") ? together[g] : apart[g];
                    if (group[0]) run(&results, &s, group);
                }
            }
        }
    }
    bench_close(&results);
    return 0;
}
