/* 03_own_model_fsdp: somebody's own network under FSDP. No Llama anywhere: three layers in plain C loops that learn which of three spirals a point of the plane belongs to.

   FSDP sees units: named parameters and two callbacks each. It shards the parameters, gradients and optimizer state of a unit over --dp-shard ranks, gathers a unit when the schedule says so, and sums
   gradients. What a step does is a list that is made from a policy, proved, printed and then run. The program trains on one rank and on all ranks and compares the bits of losses and parameters.

   What a callback owes for equal bits: sums over the batch in the order of `batch_sum` below. Everything else is up to it.

     cc -O2 -I. examples/03_own_model_fsdp.c -o build/03_own_model_fsdp -lpthread -lm          (or: make build/03_own_model_fsdp)
     build/03_own_model_fsdp --dp-shard 4                                                                        */
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/options.h"

static const char *usage =
    "usage: 03_own_model_fsdp [options]\n"
    "  --dp-shard N       ranks that share parameters, gradients and optimizer state (default 4)\n"
    "  --dp-replicate N   copies of that (default 1)\n"
    "  --batch N          points a step, over all ranks and micro-batches (default 64)\n"
    "  --grad-accum N     micro-batches a step (default 1)\n"
    "  --steps N          (default 300)\n"
    "  --prefetch 0|1     units gathered ahead of their use (default 1)\n";

enum { LAYERS = 3, INPUT = 2, HIDDEN = 32, CLASSES = 3, PARAMETERS = INPUT * HIDDEN + HIDDEN + HIDDEN * HIDDEN + HIDDEN + HIDDEN * CLASSES + CLASSES };

/* ---- the task: point `index` of an endless stream, the same whoever asks ---- */

static int32_t spiral_point(int64_t index, float point[INPUT])
{
    llmpar_rng rng = llmpar_rng_key(7, LLMPAR_RNG_DATA, "spirals", 0, (uint64_t)index);
    int32_t label = (int32_t)(index % CLASSES);
    double radius = 0.08 + 0.92 * llmpar_rng_uniform(&rng, 0), sine, cosine;
    llmpar_sincos_f64(6.0 * radius + 6.283185307179586 * label / CLASSES + 0.8 * (llmpar_rng_uniform(&rng, 1) - 0.5), &sine, &cosine);
    point[0] = (float)(radius * cosine);
    point[1] = (float)(radius * sine);
    return label;
}

/* ---- the network: y[B,out] = relu(x[B,in] w[out,in]^T + b[out]); the last layer has softmax cross-entropy instead of relu ---- */

typedef struct layer {
    int64_t in, out;
    const float *points;   /* the first layer's input, [micro-batches][B,INPUT]; this rank's */
    int last;
} layer;

/* What one call works on, with the pointers taken out of llmpar_unit_call: it is copied onto the stream. */
typedef struct layer_call {
    const layer *l;
    int64_t batch, leaves;
    const float *x, *w, *b, *dy;    /* [B,in], [out,in], [out], [B,out] */
    float *y, *saved, *scratch;     /* [B,out] each; saved: what relu let through, or the logits */
    float *dx, *dw, *db;
    const int32_t *targets;
    int64_t *loss;
    float grad_scale;
} layer_call;

/* sum over the batch of a[s]*b[s] (b NULL: of a[s]). Inside a leaf one chain, over leaves a balanced tree. A rank's leaves are a subtree of the whole batch's, and the reduce-scatter goes on with it. */
static float batch_sum(const float *a, int64_t lda, const float *b, int64_t ldb, int64_t batch, int64_t leaves)
{
    if (leaves > 1) {
        int64_t left = llmpar_tree_split(leaves), cut = batch / leaves * left;
        return batch_sum(a, lda, b, ldb, cut, left) + batch_sum(a + cut * lda, lda, b ? b + cut * ldb : NULL, ldb, batch - cut, leaves - left);
    }
    float sum = 0;
    for (int64_t s = 0; s < batch; s++) sum += b ? a[s * lda] * b[s * ldb] : a[s * lda];
    return sum;
}

/* log sum exp of one row of logits */
static double log_sum_exp(const float *logits, int64_t count)
{
    double most = logits[0], sum = 0;
    for (int64_t c = 1; c < count; c++) most = logits[c] > most ? logits[c] : most;
    for (int64_t c = 0; c < count; c++) sum += llmpar_exp_f64(logits[c] - most);
    return most + llmpar_log_f64(sum);
}

static void linear(const layer *l, int64_t batch, const float *x, const float *w, const float *b, float *y)
{
    for (int64_t s = 0; s < batch; s++)
        for (int64_t o = 0; o < l->out; o++) {
            float sum = b[o];
            for (int64_t i = 0; i < l->in; i++) sum += x[s * l->in + i] * w[o * l->in + i];
            y[s * l->out + o] = l->last || sum > 0 ? sum : 0;
        }
}

static llmpar_status layer_forward(void *arg)
{
    const layer_call *c = (const layer_call *)arg;
    int64_t out = c->l->out;
    linear(c->l, c->batch, c->x, c->w, c->b, c->saved);
    if (!c->l->last) {
        memcpy(c->y, c->saved, (size_t)(c->batch * out) * sizeof(float));
        return LLMPAR_OK;
    }
    /* The exact accumulator has no order: ranks add theirs as integers. */
    for (int64_t s = 0; s < c->batch; s++) llmpar_exact_sum_add((llmpar_exact_sum *)c->loss, log_sum_exp(c->saved + s * out, out) - c->saved[s * out + c->targets[s]]);
    return LLMPAR_OK;
}

static llmpar_status layer_backward(void *arg)
{
    const layer_call *c = (const layer_call *)arg;
    int64_t in = c->l->in, out = c->l->out;
    float *dz = c->scratch; /* [B,out] gradient before relu */
    for (int64_t s = 0; s < c->batch; s++) {
        double norm = c->l->last ? log_sum_exp(c->saved + s * out, out) : 0;
        for (int64_t o = 0; o < out; o++) {
            float z = c->saved[s * out + o];
            if (c->l->last) dz[s * out + o] = c->grad_scale * (float)(llmpar_exp_f64(z - norm) - (o == c->targets[s]));
            else dz[s * out + o] = z > 0 ? c->dy[s * out + o] : 0;
        }
    }
    for (int64_t o = 0; o < out; o++) {
        for (int64_t i = 0; i < in; i++) c->dw[o * in + i] = batch_sum(dz + o, out, c->x + i, in, c->batch, c->leaves);
        c->db[o] = batch_sum(dz + o, out, NULL, 0, c->batch, c->leaves);
    }
    for (int64_t s = 0; s < c->batch && c->dx; s++)
        for (int64_t i = 0; i < in; i++) {
            float sum = 0;
            for (int64_t o = 0; o < out; o++) sum += dz[s * out + o] * c->w[o * in + i];
            c->dx[s * in + i] = sum;
        }
    return LLMPAR_OK;
}

/* ---- what FSDP is told about it ---- */

/* Host functions run in stream order like every operation. (They touch tensors directly: the CPU device's memory is plain memory.) */
static llmpar_status enqueue(llmpar_unit_call *call, llmpar_status (*run)(void *))
{
    const layer *l = (const layer *)call->user;
    const llmpar_micro *micro = call->micro;
    layer_call c;
    memset(&c, 0, sizeof c);
    c.l = l;
    c.batch = micro->batch;
    c.leaves = micro->leaves;
    c.x = call->input ? (const float *)call->input : l->points + micro->index * micro->batch * INPUT;
    c.w = (const float *)call->params[0];
    c.b = (const float *)call->params[1];
    c.y = (float *)call->output;
    c.saved = (float *)call->saved;
    c.scratch = (float *)call->scratch;
    c.dy = (const float *)call->doutput;
    c.dx = (float *)call->dinput;
    c.dw = call->grads ? (float *)call->grads[0] : NULL;
    c.db = call->grads ? (float *)call->grads[1] : NULL;
    c.targets = micro->targets;
    c.loss = micro->loss;
    c.grad_scale = micro->grad_scale;
    return call->device->host_call(call->device, call->stream, run, &c, sizeof c);
}

static llmpar_status forward(llmpar_unit_call *call) { return enqueue(call, layer_forward); }
static llmpar_status backward(llmpar_unit_call *call) { return enqueue(call, layer_backward); }

static llmpar_status sizes(void *user, const llmpar_micro *micro, llmpar_dtype dtype, llmpar_unit_sizes *out)
{
    const layer *l = (const layer *)user;
    size_t activations = (size_t)(micro->batch * l->out) * llmpar_dtype_size(dtype);
    out->output = l->last ? 0 : activations;
    out->saved = out->scratch = activations;
    return LLMPAR_OK;
}

static void describe(layer layers[LAYERS], const float *points, llmpar_param params[LAYERS][2], llmpar_unit units[LAYERS])
{
    static const char *const names[LAYERS][3] = { { "points", "points.weight", "points.bias" }, { "hidden", "hidden.weight", "hidden.bias" }, { "classes", "classes.weight", "classes.bias" } };
    static const int64_t width[LAYERS + 1] = { INPUT, HIDDEN, HIDDEN, CLASSES };
    static const llmpar_unit_op forward_ops[1] = { { "linear", forward, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 } }, backward_ops[1] = { { "linear backward", backward, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 } };
    memset(layers, 0, LAYERS * sizeof *layers);
    memset(params, 0, LAYERS * sizeof *params);
    memset(units, 0, LAYERS * sizeof *units);
    for (int i = 0; i < LAYERS; i++) {
        layers[i].in = width[i];
        layers[i].out = width[i + 1];
        layers[i].points = points;
        layers[i].last = i == LAYERS - 1;
        llmpar_param *w = &params[i][0], *b = &params[i][1];
        w->name = names[i][1];
        w->dims = 2;
        w->shape[0] = layers[i].out;
        w->shape[1] = layers[i].in;
        w->init_std = llmpar_sqrt_f64(2.0 / (double)layers[i].in); /* He et al. 2015; keyed by name and element, so no mesh changes it */
        b->name = names[i][2];
        b->dims = 1;
        b->shape[0] = layers[i].out;
        b->no_decay = 1;
        units[i].name = names[i][0];
        units[i].params = params[i];
        units[i].param_count = 2;
        units[i].forward = forward_ops;
        units[i].backward = backward_ops;
        units[i].forward_count = units[i].backward_count = 1;
        units[i].sizes = sizes;
        units[i].user = &layers[i];
    }
}

/* ---- training ---- */

/* What was asked for, and what the first run leaves for the second one to compare with. */
typedef struct job {
    llmpar_mesh_desc mesh;
    int64_t batch;
    int32_t grad_accum, prefetch, steps;
    int keep;                      /* 1: the first run, on one rank */
    double *losses;                /* [steps], by rank 0 */
    float parameters[PARAMETERS];  /* whole; by rank 0 */
    int32_t losses_differ, parameters_differ;
    llmpar_arena_usage usage[2];   /* of rank 0 in either run */
} job;

/* Everything one rank owns. */
typedef struct trainer {
    llmpar_ctx *ctx;
    job *j;
    llmpar_mesh *mesh;
    llmpar_fsdp *fsdp;
    llmpar_optim *adamw;
    llmpar_schedule *schedule;
    layer layers[LAYERS];
    int64_t local;                 /* points of this rank in a micro-batch */
    float *points;                 /* [grad_accum][local,INPUT] */
    int32_t *labels;               /* [grad_accum][local] */
    llmpar_micro *micro;           /* [grad_accum] */
} trainer;

static llmpar_status create(trainer *t)
{
    llmpar_ctx *ctx = t->ctx;
    llmpar_param params[LAYERS][2];
    llmpar_unit units[LAYERS];
    llmpar_fsdp_desc fsdp;
    llmpar_optim_desc adamw;
    llmpar_policy policy;
    memset(&fsdp, 0, sizeof fsdp);
    memset(&adamw, 0, sizeof adamw);
    memset(&policy, 0, sizeof policy);
    llmpar_mesh_desc one;
    memset(&one, 0, sizeof one);
    llmpar_status st = llmpar_mesh_create(ctx, t->j->keep ? &one : &t->j->mesh, &t->mesh);
    if (st) return st;
    int64_t parts = (int64_t)t->mesh->dp_ranks * t->j->grad_accum;
    if (t->j->batch % parts) return llmpar_fail(ctx, LLMPAR_ERR_MESH, "--batch %lld is not divisible by %d ranks x --grad-accum %d = %lld", (long long)t->j->batch, (int)t->mesh->dp_ranks, (int)t->j->grad_accum, (long long)parts);
    t->local = t->j->batch / parts;
    t->points = (float *)llmpar_heap_alloc(&ctx->heap, (size_t)(t->local * t->j->grad_accum * INPUT), sizeof *t->points);
    t->labels = (int32_t *)llmpar_heap_alloc(&ctx->heap, (size_t)(t->local * t->j->grad_accum), sizeof *t->labels);
    t->micro = (llmpar_micro *)llmpar_heap_zalloc(&ctx->heap, (size_t)t->j->grad_accum, sizeof *t->micro);
    if (!t->points || !t->labels || !t->micro) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "out of memory");
    for (int32_t m = 0; m < t->j->grad_accum; m++) {
        t->micro[m].batch = t->local;
        t->micro[m].t = 1; /* a point is a sequence of one */
        t->micro[m].leaves = t->local & -t->local; /* the largest power of two that divides it */
        t->micro[m].targets = t->labels + m * t->local;
    }
    describe(t->layers, t->points, params, units);
    fsdp.seed = 1;
    fsdp.optimizer_states = 2; /* AdamW's moments */
    st = llmpar_fsdp_create(t->mesh, units, LAYERS, &fsdp, &t->fsdp);
    adamw.decay = 0.01;
    if (!st) st = llmpar_optim_create(t->fsdp, &adamw, &t->adamw);
    if (st) return st;
    /* What a step does, as a list; proved before it ever runs. */
    llmpar_fsdp_policy(t->fsdp, &policy);
    policy.micro_batches = t->j->grad_accum;
    policy.prefetch = policy.prefetch_backward = t->j->prefetch;
    st = llmpar_schedule_create(&ctx->heap, units, LAYERS, &policy, &t->schedule, &ctx->error);
    if (!st) st = llmpar_schedule_validate(&ctx->heap, t->schedule->list, t->schedule->count, units, LAYERS, &t->schedule->policy, &ctx->error);
    if (!st && ctx->rank == 0 && !t->j->keep) {
        size_t bytes = llmpar_schedule_print(t->schedule, units, NULL, NULL, 0) + 1;
        char *text = (char *)malloc(bytes);
        if (text) {
            llmpar_schedule_print(t->schedule, units, NULL, text, bytes);
            printf("what a step does on %d ranks:\n%s\n", (int)ctx->world, text);
        }
        free(text);
    }
    return st;
}

static llmpar_status step(trainer *t, int32_t number)
{
    llmpar_run run;
    memset(&run, 0, sizeof run);
    /* Micro-batch m is the m-th contiguous block of the step's points, this rank's share a block of that. */
    for (int32_t m = 0; m < t->j->grad_accum; m++)
        for (int64_t s = 0; s < t->local; s++) {
            int64_t at = m * t->local + s, index = ((int64_t)m * t->mesh->dp_ranks + t->mesh->dp_rank) * t->local + s;
            t->labels[at] = spiral_point(number * t->j->batch + index, t->points + at * INPUT);
        }
    run.micro = t->micro;
    run.tokens = t->local * t->j->grad_accum;
    run.optimizer = llmpar_optim_table(t->adamw);
    llmpar_optim_set_lr(t->adamw, llmpar_lr_cosine(0.02, 0.0005, t->j->steps / 20, t->j->steps, number + 1));
    llmpar_status st = llmpar_fsdp_run(t->fsdp, t->schedule->list, t->schedule->count, &run);
    if (st || t->ctx->rank) return st;
    if (t->j->keep) t->j->losses[number] = run.loss;
    else t->j->losses_differ += memcmp(&t->j->losses[number], &run.loss, sizeof run.loss) != 0;
    if (!t->j->keep && (number == 0 || (number + 1) % 50 == 0)) printf("step %5d   loss %.6f   gradient norm %.4f\n", (int)number + 1, run.loss, run.grad_norm);
    return LLMPAR_OK;
}

/* The plane as the trained network sees it: one letter a class. whole[i]: weight and bias of layer i. */
static void draw(const layer *layers, float *const whole[LAYERS][2])
{
    for (int row = 0; row < 21; row++) {
        printf("   ");
        for (int column = 0; column < 51; column++) {
            float x[HIDDEN] = { (float)(column - 25) / 25.0f, (float)(10 - row) / 10.0f }, y[HIDDEN];
            for (int i = 0; i < LAYERS; i++) {
                linear(&layers[i], 1, x, whole[i][0], whole[i][1], y);
                memcpy(x, y, (size_t)layers[i].out * sizeof *x);
            }
            putchar(x[0] > x[1] ? (x[0] > x[2] ? '.' : '#') : x[1] > x[2] ? 'o' : '#');
        }
        putchar('\n');
    }
}

/* Every unit is gathered to look at it; rank 0 keeps or compares it, and at last draws. */
static llmpar_status inspect(trainer *t)
{
    float *whole[LAYERS][2], *at = t->j->parameters;
    int32_t gathered = 0;
    llmpar_status st = LLMPAR_OK;
    while (gathered < LAYERS && !st) {
        void *const *params;
        const layer *l = &t->layers[gathered];
        st = llmpar_fsdp_unshard(t->fsdp, gathered, &params);
        for (int p = 0; p < 2 && !st; p++) {
            size_t count = (size_t)(p ? l->out : l->out * l->in);
            whole[gathered][p] = (float *)params[p];
            if (t->ctx->rank == 0 && t->j->keep) memcpy(at, params[p], count * sizeof(float));
            for (size_t i = 0; i < count && t->ctx->rank == 0 && !t->j->keep; i++) t->j->parameters_differ += memcmp(&at[i], &whole[gathered][p][i], sizeof(float)) != 0;
            at += count;
        }
        gathered += !st;
    }
    if (!st && t->ctx->rank == 0 && !t->j->keep) {
        printf("\nthe plane as the network sees it\n");
        draw(t->layers, whole);
    }
    while (gathered > 0) {
        llmpar_status freed = llmpar_fsdp_reshard(t->fsdp, --gathered);
        if (!st) st = freed;
    }
    return st;
}

/* Every rank runs this. */
static llmpar_status train(llmpar_ctx *ctx, void *user)
{
    trainer t;
    memset(&t, 0, sizeof t);
    t.ctx = ctx;
    t.j = (job *)user;
    llmpar_status st = create(&t);
    for (int32_t i = 0; i < t.j->steps && !st; i++) st = step(&t, i);
    if (!st && ctx->rank == 0) llmpar_arena_get_usage(llmpar_fsdp_arena(t.fsdp), &t.j->usage[!t.j->keep]);
    if (!st) st = inspect(&t);
    llmpar_schedule_destroy(t.schedule);
    llmpar_optim_destroy(t.adamw);
    llmpar_fsdp_destroy(t.fsdp);
    llmpar_heap_free(&ctx->heap, t.micro);
    llmpar_heap_free(&ctx->heap, t.labels);
    llmpar_heap_free(&ctx->heap, t.points);
    llmpar_mesh_destroy(t.mesh);
    return st;
}

static void print_result(const job *j, int ranks)
{
    printf("\npeak memory of one rank, bytes %21s %12d ranks\n", "1 rank", ranks);
    for (int tag = 0; tag < LLMPAR_TAG_COUNT; tag++)
        printf("   %-24s %24llu %18llu\n", llmpar_tag_name((llmpar_tag)tag), (unsigned long long)j->usage[0].peak[tag], (unsigned long long)j->usage[1].peak[tag]);
    if (j->losses_differ || j->parameters_differ)
        printf("\n%d of %d losses and %d of %d parameters differ from one rank's\n", (int)j->losses_differ, (int)j->steps, (int)j->parameters_differ, PARAMETERS);
    else printf("\nall %d losses and all %d parameters are the same bits as on one rank\n", (int)j->steps, PARAMETERS);
}

int main(int argc, char **argv)
{
    static const struct option longs[] = { { "dp-shard", required_argument, NULL, 's' }, { "dp-replicate", required_argument, NULL, 'r' }, { "batch", required_argument, NULL, 'b' }, { "grad-accum", required_argument, NULL, 'a' },
                                           { "steps", required_argument, NULL, 'n' }, { "prefetch", required_argument, NULL, 'p' }, { "help", no_argument, NULL, 'h' }, { NULL, 0, NULL, 0 } };
    long shard = 4, replicate = 1, batch = 64, grad_accum = 1, steps = 300, prefetch = 1;
    int c, bad = 0;
    while (!bad && (c = getopt_long(argc, argv, "", longs, NULL)) != -1) {
        switch (c) {
        case 's': bad = option_long("--dp-shard", optarg, 1, 64, &shard); break;
        case 'r': bad = option_long("--dp-replicate", optarg, 1, 64, &replicate); break;
        case 'b': bad = option_long("--batch", optarg, 1, 1 << 20, &batch); break;
        case 'a': bad = option_long("--grad-accum", optarg, 1, 1 << 10, &grad_accum); break;
        case 'n': bad = option_long("--steps", optarg, 1, 1000000, &steps); break;
        case 'p': bad = option_long("--prefetch", optarg, 0, 1, &prefetch); break;
        case 'h': fputs(usage, stdout); return 0;
        default: bad = 2; /* getopt_long has said what */
        }
    }
    if (!bad && optind < argc) bad = option_error("unexpected argument \"%s\", see --help", argv[optind]);
    if (!bad && shard * replicate > 256) bad = option_error("--dp-shard %ld x --dp-replicate %ld = %ld ranks, expected at most 256 threads", shard, replicate, shard * replicate);
    if (bad) return bad;
    static job j;
    llmpar_launch_desc launch;
    llmpar_error error;
    memset(&launch, 0, sizeof launch);
    launch.log = quiet_log;
    j.mesh.dp_shard = (int32_t)shard;
    j.mesh.dp_replicate = (int32_t)replicate;
    j.batch = batch;
    j.grad_accum = 1;
    j.prefetch = (int32_t)prefetch;
    j.steps = (int32_t)steps;
    j.losses = (double *)malloc((size_t)steps * sizeof *j.losses);
    if (!j.losses) {
        fprintf(stderr, "03_own_model_fsdp: out of memory\n");
        return 1;
    }
    /* First on one rank without micro-batches, then as asked. */
    launch.ranks = j.keep = 1;
    llmpar_status st = llmpar_launch(&launch, train, &j, &error);
    launch.ranks = (int32_t)(shard * replicate);
    j.grad_accum = (int32_t)grad_accum;
    j.keep = 0;
    if (!st) st = llmpar_launch(&launch, train, &j, &error);
    int failed = st ? print_error("03_own_model_fsdp", &error) : 0;
    if (!failed) {
        int64_t leaves = batch & -batch, cuts = shard * replicate * grad_accum;
        print_result(&j, (int)(shard * replicate));
        /* The promise holds where ranks and micro-batches divide the leaves of the batch; elsewhere the result is deterministic, but one of its own. */
        failed = (j.losses_differ || j.parameters_differ) && leaves % cuts == 0;
    }
    free(j.losses);
    return failed;
}
