/* FSDP with somebody's own network: the same bits on every data mesh and for every policy and for a list written by hand; against a second implementation of network and optimizer in plain
   doubles; memory by tag to the byte; optimizers and scales; steps that do not count. test_fsdp_fail.c: what goes wrong and what is refused. */
#include "own_net.h"
#include <math.h>

static llmpar_status look_at_gradient(void *user, llmpar_fsdp *fsdp, int32_t unit, const void *shard)
{
    ++*(int *)user;
    check_padding(fsdp, unit, shard, "gradient");
    return LLMPAR_OK;
}

/* ---- the same bits on every mesh ---- */

/* A step of policy M = 1, two or more shards, written by hand: all units gathered at once. */
static const llmpar_instruction by_hand[] = {
    /* op, unit, micro_batch, pass, use, slot, from, from_use, local, what, again, stream, predicate, waits */
    /*  0 */ { LLMPAR_OP_SCALAR_REDUCE, -1, -1, 0, 0, -1, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_REDUCE, LLMPAR_ALWAYS, 0, { 0 } },
    /*  1 */ { LLMPAR_OP_GATHER, SCORE, -1, 0, 0, -1, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_GATHER, LLMPAR_ALWAYS, 0, { 0 } },
    /*  2 */ { LLMPAR_OP_GATHER, EMBED, -1, 0, 0, -1, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_GATHER, LLMPAR_ALWAYS, 0, { 0 } },
    /*  3 */ { LLMPAR_OP_GATHER, MIX, -1, 0, 0, -1, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_GATHER, LLMPAR_ALWAYS, 0, { 0 } },
    /*  4 */ { LLMPAR_OP_FORWARD, EMBED, 0, LLMPAR_PASS_FORWARD, 0, -1, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_COMPUTE, LLMPAR_ALWAYS, 1, { 2 } },
    /*  5 */ { LLMPAR_OP_FORWARD, MIX, 0, LLMPAR_PASS_FORWARD, 0, -1, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_COMPUTE, LLMPAR_ALWAYS, 1, { 3 } },
    /*  6 */ { LLMPAR_OP_FORWARD, SCORE, 0, LLMPAR_PASS_FORWARD, 0, -1, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_COMPUTE, LLMPAR_ALWAYS, 0, { 0 } },
    /*  7 */ { LLMPAR_OP_BACKWARD, SCORE, 0, 0, 0, 2, 5, 0, 1, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_COMPUTE, LLMPAR_ALWAYS, 0, { 0 } },
    /*  8 */ { LLMPAR_OP_REDUCE, EMBED, -1, 0, 1, 1, 5, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_REDUCE, LLMPAR_ALWAYS, 1, { 7 } },
    /*  9 */ { LLMPAR_OP_FREE, EMBED, -1, 0, 1, 5, -1, 0, 1, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_REDUCE, LLMPAR_ALWAYS, 0, { 0 } },
    /* 10 */ { LLMPAR_OP_FREE, SCORE, -1, 0, 0, -1, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_COMPUTE, LLMPAR_ALWAYS, 0, { 0 } },
    /* 11 */ { LLMPAR_OP_BACKWARD, MIX, 0, 0, 0, 0, -1, 0, 1, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_COMPUTE, LLMPAR_ALWAYS, 0, { 0 } },
    /* 12 */ { LLMPAR_OP_BACKWARD, EMBED, 0, 0, 0, 3, -1, 0, 1, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_COMPUTE, LLMPAR_ALWAYS, 0, { 0 } },
    /* 13 */ { LLMPAR_OP_FREE, MIX, -1, 0, 0, -1, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_COMPUTE, LLMPAR_ALWAYS, 0, { 0 } },
    /* 14 */ { LLMPAR_OP_FREE, EMBED, -1, 0, 0, -1, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_COMPUTE, LLMPAR_ALWAYS, 0, { 0 } },
    /* 15 */ { LLMPAR_OP_REDUCE, EMBED, -1, 0, 0, 0, 3, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_REDUCE, LLMPAR_ALWAYS, 1, { 12 } },
    /* 16 */ { LLMPAR_OP_ACCUMULATE, EMBED, -1, 0, 0, 0, 1, 1, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_REDUCE, LLMPAR_ALWAYS, 0, { 0 } },
    /* 17 */ { LLMPAR_OP_NORM, EMBED, -1, 0, 0, 0, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_REDUCE, LLMPAR_ALWAYS, 0, { 0 } },
    /* 18 */ { LLMPAR_OP_REDUCE, SCORE, -1, 0, 0, 4, 2, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_REDUCE, LLMPAR_ALWAYS, 0, { 0 } },
    /* 19 */ { LLMPAR_OP_REDUCE, MIX, -1, 0, 0, 1, 0, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_REDUCE, LLMPAR_ALWAYS, 0, { 0 } },
    /* 20 */ { LLMPAR_OP_FREE, EMBED, -1, 0, 0, 3, -1, 0, 1, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_REDUCE, LLMPAR_ALWAYS, 0, { 0 } },
    /* 21 */ { LLMPAR_OP_FREE, SCORE, -1, 0, 0, 2, -1, 0, 1, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_REDUCE, LLMPAR_ALWAYS, 0, { 0 } },
    /* 22 */ { LLMPAR_OP_FREE, MIX, -1, 0, 0, 0, -1, 0, 1, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_REDUCE, LLMPAR_ALWAYS, 0, { 0 } },
    /* 23 */ { LLMPAR_OP_NORM, MIX, -1, 0, 0, 1, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_REDUCE, LLMPAR_ALWAYS, 0, { 0 } },
    /* 24 */ { LLMPAR_OP_NORM, SCORE, -1, 0, 0, 4, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_REDUCE, LLMPAR_ALWAYS, 0, { 0 } },
    /* 25 */ { LLMPAR_OP_SCALAR_REDUCE, -1, -1, 1, 0, -1, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_REDUCE, LLMPAR_ALWAYS, 0, { 0 } },
    /* 26 */ { LLMPAR_OP_OPTIM, SCORE, -1, 0, 0, 4, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_COMPUTE, LLMPAR_IF_FINITE, 0, { 0 } },
    /* 27 */ { LLMPAR_OP_OPTIM, EMBED, -1, 0, 0, 0, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_COMPUTE, LLMPAR_IF_FINITE, 0, { 0 } },
    /* 28 */ { LLMPAR_OP_OPTIM, MIX, -1, 0, 0, 1, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_COMPUTE, LLMPAR_IF_FINITE, 0, { 0 } },
};

enum { STEPS = 4 };
static struct { int known; double p[PARAMS][MOST], m[PARAMS][MOST], loss[STEPS], norm[STEPS]; } one;

static llmpar_status train(const job *j, llmpar_fsdp *fsdp, llmpar_optim *adamw)
{
    llmpar_schedule *schedule = NULL;
    llmpar_status status = make_schedule(j, fsdp, &schedule);
    int gradients = 0, first = !one.known;
    double p[MOST];
    for (int i = 0; !status && i < STEPS; i++) {
        llmpar_run run;
        memset(&run, 0, sizeof run);
        run.optimizer = llmpar_optim_table(adamw);
        run.on_gradient = look_at_gradient;
        run.on_gradient_user = &gradients;
        llmpar_optim_set_lr(adamw, 0.01 * (i + 1));
        status = one_step(j, fsdp, i, schedule, &run);
        if (status) break;
        CHECK_INT(run.skipped, 0);
        CHECK_INT(run.global_tokens, B * T - 5); /* see is_masked */
        if (first) one.loss[i] = run.loss, one.norm[i] = run.grad_norm;
        if (run.loss != one.loss[i] || run.grad_norm != one.norm[i]) TEST_FAIL("step %d: loss %.17g, norm %.17g; one rank: %.17g, %.17g", i, run.loss, run.grad_norm, one.loss[i], one.norm[i]);
    }
    if (!status) CHECK_INT(gradients, STEPS * UNITS);
    if (!status) CHECK_INT(llmpar_optim_steps(adamw), STEPS);
    for (int k = 0; !status && k < PARAMS; k++) {
        void *m = llmpar_fsdp_optimizer_state(fsdp, all[k].unit, 0), *v = llmpar_fsdp_optimizer_state(fsdp, all[k].unit, 1);
        check_padding(fsdp, all[k].unit, shard_of(fsdp, all[k].unit), "parameters");
        check_padding(fsdp, all[k].unit, m, "first moments");
        check_padding(fsdp, all[k].unit, v, "second moments");
        whole(fsdp, k, shard_of(fsdp, all[k].unit), p);
        if (first) memcpy(one.p[k], p, sizeof p);
        if (memcmp(p, one.p[k], (size_t)all[k].count * sizeof *p)) TEST_FAIL("%s differs from one rank", all[k].name);
        whole(fsdp, k, m, p);
        if (first) memcpy(one.m[k], p, sizeof p);
        if (memcmp(p, one.m[k], (size_t)all[k].count * sizeof *p)) TEST_FAIL("first moment of %s differs from one rank", all[k].name);
    }
    if (first) one.known = 1; /* the first run has one rank */
    llmpar_schedule_destroy(schedule);
    return status;
}

TEST(same_bits)
{
    static const struct { llmpar_mesh_desc mesh; int zero, micro_batches, no_sync, prefetch, keep, by_hand; } rows[] = {
        { { 1, 1, 1, 1, 1 }, 0, 1, 0, 0, 0, 0 }, /* all others equal this */
        { { 1, 1, 1, 1, 1 }, 0, 2, 0, 0, 0, 0 }, { { 1, 1, 1, 1, 1 }, 0, 8, 1, 0, 0, 0 },
        { { 1, 2, 1, 1, 1 }, LLMPAR_ZERO_3, 1, 0, 0, 0, 0 }, { { 1, 2, 1, 1, 1 }, LLMPAR_ZERO_3, 4, 0, 1, 0, 0 }, { { 1, 2, 1, 1, 1 }, LLMPAR_ZERO_3, 4, 1, 1, 1, 0 },
        { { 1, 2, 1, 1, 1 }, LLMPAR_ZERO_0, 1, 0, 0, 0, 0 }, { { 1, 2, 1, 1, 1 }, LLMPAR_ZERO_0, 2, 1, 0, 0, 0 },
        { { 1, 4, 1, 1, 1 }, LLMPAR_ZERO_3, 1, 0, 2, 0, 0 }, { { 1, 4, 1, 1, 1 }, LLMPAR_ZERO_3, 2, 1, 0, 0, 0 }, { { 1, 4, 1, 1, 1 }, LLMPAR_ZERO_0, 2, 0, 0, 0, 0 },
        { { 2, 2, 1, 1, 1 }, LLMPAR_ZERO_3, 2, 0, 1, 0, 0 }, { { 2, 2, 1, 1, 1 }, LLMPAR_ZERO_0, 1, 0, 0, 0, 0 }, { { 4, 1, 1, 1, 1 }, LLMPAR_ZERO_3, 2, 1, 0, 0, 0 },
        { { 1, 2, 1, 1, 2 }, LLMPAR_ZERO_3, 1, 0, 0, 0, 0 }, /* tp ranks that all do the same */
        { { 1, 2, 1, 1, 1 }, LLMPAR_ZERO_3, 1, 0, 0, 0, 1 }, { { 1, 4, 1, 1, 1 }, LLMPAR_ZERO_3, 1, 0, 0, 0, 1 },
    };
    for (int dtype = LLMPAR_F32; dtype <= LLMPAR_F64; dtype++) {
        memset(&one, 0, sizeof one);
        for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
            int before = test_failures;
            job j = { .mesh = rows[i].mesh, .micro_batches = rows[i].micro_batches, .no_sync = rows[i].no_sync, .prefetch = rows[i].prefetch, .keep = rows[i].keep, .masked = 1, .body = train };
            if (rows[i].by_hand) j.by_hand = by_hand, j.by_hand_count = (int32_t)(sizeof by_hand / sizeof by_hand[0]);
            j.fsdp.zero = rows[i].zero;
            j.fsdp.seed = 3;
            j.fsdp.dtype = (llmpar_dtype)dtype;
            launch_ok(&j);
            if (test_failures != before) fprintf(stderr, "  (row %d, %s)\n", (int)i, llmpar_dtype_name((llmpar_dtype)dtype));
        }
    }
}

/* ---- against plain doubles ---- */

/* The plain double reference: whole parameters, one rank, any order of sums. */

typedef struct plain { double p[PARAMS][MOST], g[PARAMS][MOST], m[PARAMS][MOST], v[PARAMS][MOST], loss, norm; int steps; } plain;
enum { TABLE, SCALE, W, POSITION, HEAD, BIAS };

static void plain_step(plain *q, int64_t step, double lr, const llmpar_optim_desc *a)
{
    double loss = 0, squares = 0, scale = 1.0 / (B * T);
    memset(q->g, 0, sizeof q->g);
    for (int b = 0; b < B; b++)
        for (int t = 0; t < T; t++) {
            int id = id_at(step, b, t), target = target_at(step, b, t);
            double x[D], y[D], dy[D], s = q->p[BIAS][0];
            for (int j = 0; j < D; j++) x[j] = q->p[TABLE][id * D + j];
            for (int i = 0; i < D; i++) {
                y[i] = q->p[POSITION][t * D + i];
                for (int j = 0; j < D; j++) y[i] += q->p[W][i * D + j] * q->p[SCALE][j] * x[j];
                s += y[i] * (q->p[HEAD][i] + q->p[TABLE][target * D + i]);
            }
            double ds = (s - target) * scale;
            loss += 0.5 * (s - target) * (s - target) * scale;
            q->g[BIAS][0] += ds;
            for (int i = 0; i < D; i++) {
                q->g[HEAD][i] += ds * y[i];
                q->g[TABLE][target * D + i] += ds * y[i];
                dy[i] = ds * (q->p[HEAD][i] + q->p[TABLE][target * D + i]);
                q->g[POSITION][t * D + i] += dy[i];
            }
            for (int i = 0; i < D; i++)
                for (int j = 0; j < D; j++) {
                    q->g[W][i * D + j] += dy[i] * q->p[SCALE][j] * x[j];
                    q->g[SCALE][j] += dy[i] * q->p[W][i * D + j] * x[j];
                    q->g[TABLE][id * D + j] += dy[i] * q->p[W][i * D + j] * q->p[SCALE][j];
                }
        }
    for (int k = 0; k < PARAMS; k++)
        for (int i = 0; i < all[k].count; i++) squares += q->g[k][i] * q->g[k][i];
    q->loss = loss;
    q->norm = sqrt(squares);
    q->steps++;
    double clip = a->clip > 0 && q->norm > a->clip ? a->clip / q->norm : 1;
    for (int k = 0; k < PARAMS; k++)
        for (int i = 0; i < all[k].count; i++) {
            double g = q->g[k][i] * clip;
            q->m[k][i] = a->beta1 * q->m[k][i] + (1 - a->beta1) * g;
            q->v[k][i] = a->beta2 * q->v[k][i] + (1 - a->beta2) * g * g;
            if (all[k].decay && a->decay > 0) q->p[k][i] *= 1 - lr * a->decay;
            q->p[k][i] -= lr * (q->m[k][i] / (1 - pow(a->beta1, q->steps))) / (sqrt(q->v[k][i] / (1 - pow(a->beta2, q->steps))) + a->eps);
        }
}

static llmpar_status against_plain(const job *j, llmpar_fsdp *fsdp, llmpar_optim *adamw)
{
    static plain shared[4]; /* by rank */
    plain *q = &shared[llmpar_fsdp_mesh(fsdp)->ctx->rank];
    int f64 = llmpar_fsdp_dtype(fsdp) == LLMPAR_F64;
    double p[MOST], bound = f64 ? 1e-12 : 2e-5;
    llmpar_optim_desc desc = j->adamw;
    llmpar_schedule *schedule = NULL;
    llmpar_status status = make_schedule(j, fsdp, &schedule);
    llmpar_optim_desc_resolve(&desc);
    memset(q, 0, sizeof *q);
    for (int k = 0; k < PARAMS; k++) whole(fsdp, k, shard_of(fsdp, all[k].unit), q->p[k]);
    for (int i = 0; !status && i < 5; i++) {
        llmpar_run run;
        memset(&run, 0, sizeof run);
        run.optimizer = llmpar_optim_table(adamw);
        llmpar_optim_set_lr(adamw, 0.02 / (i + 1));
        status = one_step(j, fsdp, i, schedule, &run);
        plain_step(q, i, 0.02 / (i + 1), &desc);
        CHECK_NEAR(run.loss / q->loss, 1, bound);
        CHECK_NEAR(run.grad_norm / q->norm, 1, bound);
        for (int k = 0; !status && k < PARAMS; k++) {
            whole(fsdp, k, shard_of(fsdp, all[k].unit), p);
            for (int e = 0; e < all[k].count; e++)
                if (!(fabs(p[e] - q->p[k][e]) <= bound)) { TEST_FAIL("step %d: %s[%d]: got %.17g, want %.17g", i, all[k].name, e, p[e], q->p[k][e]); break; }
        }
    }
    llmpar_schedule_destroy(schedule);
    return status;
}

TEST(plain_doubles)
{
    static const llmpar_optim_desc descs[] = { { 0, 0, 0, 0, 0, 0, 0, LLMPAR_OPTIM_ADAMW }, { 0.8, 0.99, 1e-6, 0.3, 0.05, 0, 0, LLMPAR_OPTIM_ADAMW }, { 0.5, 0.9, 1e-3, -1, -1, 0, 0, LLMPAR_OPTIM_ADAMW } };
    for (int d = 0; d < 3; d++)
        for (int dtype = LLMPAR_F32; dtype <= LLMPAR_F64; dtype++) {
            job j = { .mesh = { .dp_shard = 2 }, .micro_batches = 2, .adamw = descs[d], .body = against_plain };
            j.fsdp.dtype = (llmpar_dtype)dtype;
            j.fsdp.seed = 11;
            launch_ok(&j);
        }
}

/* ---- memory ---- */

static uint64_t round64(uint64_t bytes, uint64_t alignment) { return (bytes + alignment - 1) / alignment * alignment; }

/* Elements of the flat buffer: every parameter from a multiple of 128, the whole a multiple of 128 a shard. */
static int64_t flat_elements(const llmpar_fsdp *fsdp, int32_t unit, int64_t shards)
{
    const llmpar_unit *u = llmpar_fsdp_unit(fsdp, unit);
    int64_t at = 0;
    for (int32_t p = 0; p < u->param_count; p++) {
        int64_t n = 1;
        for (int d = 0; d < u->params[p].dims; d++) n *= u->params[p].shape[d];
        at = llmpar_round_up(at + n, LLMPAR_FLAT_ALIGN);
    }
    return llmpar_round_up(at, LLMPAR_FLAT_ALIGN * shards);
}

static void check_tag(const llmpar_arena_usage *usage, llmpar_tag tag, uint64_t live, uint64_t peak, const char *when)
{
    if (usage->live[tag] != live || usage->peak[tag] != peak)
        TEST_FAIL("%s, %s: live %llu, peak %llu, want %llu, %llu", when, llmpar_tag_name(tag), (unsigned long long)usage->live[tag], (unsigned long long)usage->peak[tag], (unsigned long long)live, (unsigned long long)peak);
}

/* Largest sums of gathered parameters and of gradients that the list itself asks for. */
static void walk(const llmpar_fsdp *fsdp, const llmpar_schedule *s, int64_t shards, uint64_t alignment, uint64_t *gathered, uint64_t *gradients)
{
    uint64_t size = llmpar_dtype_size(llmpar_fsdp_dtype(fsdp)), now = 0, grads = 0;
    *gathered = *gradients = 0;
    for (int32_t i = 0; i < s->count; i++) {
        const llmpar_instruction *in = &s->list[i];
        uint64_t full = in->unit < 0 ? 0 : round64((uint64_t)flat_elements(fsdp, in->unit, shards) * size, alignment), part = in->unit < 0 ? 0 : round64((uint64_t)(flat_elements(fsdp, in->unit, shards) / shards) * size, alignment);
        switch (in->op) {
        case LLMPAR_OP_GATHER: now += full; break;
        case LLMPAR_OP_BACKWARD:
            grads += full;
            if (llmpar_fsdp_unit(fsdp, in->unit)->borrow) grads += round64((uint64_t)flat_elements(fsdp, llmpar_fsdp_unit(fsdp, in->unit)->borrow - 1, shards) * size, alignment);
            break;
        case LLMPAR_OP_REDUCE: grads += part; break;
        case LLMPAR_OP_FREE:
            if (in->slot < 0) now -= full;
            else grads -= full;
            break;
        case LLMPAR_OP_ACCUMULATE: grads -= in->local ? full : part; break;
        case LLMPAR_OP_OPTIM: grads -= part; break;
        default: break;
        }
        if (now > *gathered) *gathered = now;
        if (grads > *gradients) *gradients = grads;
    }
    CHECK_INT(now, 0);
    CHECK_INT(grads, 0);
}

static llmpar_status measure(const job *j, llmpar_fsdp *fsdp, llmpar_optim *adamw)
{
    llmpar_mesh *mesh = llmpar_fsdp_mesh(fsdp);
    llmpar_arena *arena = llmpar_fsdp_arena(fsdp);
    llmpar_policy policy;
    llmpar_arena_usage usage, after;
    llmpar_schedule *schedule = NULL;
    memset(&policy, 0, sizeof policy);
    llmpar_fsdp_policy(fsdp, &policy);
    CHECK_INT(policy.shards < 2, j->fsdp.zero == LLMPAR_ZERO_0 || mesh->degree[LLMPAR_AXIS_DP_SHARD] == 1);
    int64_t shards = policy.shards < 2 ? 1 : mesh->degree[LLMPAR_AXIS_DP_SHARD];
    CHECK_INT(policy.replicas, mesh->dp_ranks / shards);
    uint64_t alignment = mesh->ctx->device->alignment, size = llmpar_dtype_size(llmpar_fsdp_dtype(fsdp)), parameters = 0, gathered, gradients;
    for (int32_t u = 0; u < UNITS; u++) {
        int64_t elements;
        llmpar_fsdp_shard(fsdp, u, &elements, NULL, NULL);
        CHECK_INT(elements, flat_elements(fsdp, u, shards) / shards);
        parameters += round64((uint64_t)elements * size, alignment);
    }
    llmpar_arena_get_usage(arena, &usage);
    check_tag(&usage, LLMPAR_TAG_PARAMETERS, parameters, parameters, "created");
    check_tag(&usage, LLMPAR_TAG_OPTIMIZER, 2 * parameters, 2 * parameters, "created");
    check_tag(&usage, LLMPAR_TAG_GATHERED, 0, 0, "created");
    check_tag(&usage, LLMPAR_TAG_GRADIENTS, 0, 0, "created");
    check_tag(&usage, LLMPAR_TAG_ACTIVATIONS, 0, 0, "created");
    llmpar_status status = make_schedule(j, fsdp, &schedule);
    if (!status) walk(fsdp, schedule, shards, alignment, &gathered, &gradients);
    for (int i = 0; !status && i < 3; i++) {
        llmpar_run run;
        memset(&run, 0, sizeof run);
        run.optimizer = llmpar_optim_table(adamw);
        llmpar_optim_set_lr(adamw, 0.01);
        status = one_step(j, fsdp, i, schedule, &run);
        if (status) break;
        llmpar_arena_get_usage(arena, &after);
        check_tag(&after, LLMPAR_TAG_PARAMETERS, parameters, parameters, "after a step");
        check_tag(&after, LLMPAR_TAG_OPTIMIZER, 2 * parameters, 2 * parameters, "after a step");
        check_tag(&after, LLMPAR_TAG_GATHERED, 0, gathered, "after a step");
        check_tag(&after, LLMPAR_TAG_GRADIENTS, 0, gradients, "after a step");
        CHECK_INT(after.live[LLMPAR_TAG_ACTIVATIONS], 0);
        CHECK(after.peak[LLMPAR_TAG_ACTIVATIONS] > 0);
        CHECK_INT(after.live[LLMPAR_TAG_WORKSPACE], 0);
        CHECK_INT(after.live_total, usage.live_total);
        if (i == 1) usage.reserved = after.reserved;
        if (i == 2) CHECK_INT(after.reserved, usage.reserved); /* a step takes what the one before gave back */
    }
    llmpar_schedule_destroy(schedule);
    return status;
}

TEST(memory)
{
    static const struct { llmpar_mesh_desc mesh; int zero, micro_batches, no_sync, prefetch, keep; } rows[] = {
        { { 1, 1, 1, 1, 1 }, 0, 1, 0, 0, 0 }, { { 1, 2, 1, 1, 1 }, LLMPAR_ZERO_3, 1, 0, 0, 0 }, { { 1, 2, 1, 1, 1 }, LLMPAR_ZERO_0, 4, 1, 0, 0 }, { { 1, 4, 1, 1, 1 }, LLMPAR_ZERO_3, 2, 1, 1, 0 },
        { { 1, 4, 1, 1, 1 }, LLMPAR_ZERO_3, 2, 0, 0, 1 }, { { 2, 2, 1, 1, 1 }, LLMPAR_ZERO_3, 2, 0, 2, 0 }, { { 1, 3, 1, 1, 1 }, LLMPAR_ZERO_3, 1, 0, 0, 0 },
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        job j = { .mesh = rows[i].mesh, .micro_batches = rows[i].micro_batches, .no_sync = rows[i].no_sync, .prefetch = rows[i].prefetch, .keep = rows[i].keep, .body = measure };
        j.fsdp.zero = rows[i].zero;
        int before = test_failures;
        launch_ok(&j);
        if (test_failures != before) fprintf(stderr, "  (row %d)\n", (int)i);
    }
}

/* ---- looking in ---- */

static llmpar_status look(const job *j, llmpar_fsdp *fsdp, llmpar_optim *adamw)
{
    llmpar_mesh *mesh = llmpar_fsdp_mesh(fsdp);
    llmpar_arena_usage usage;
    double p[MOST];
    int64_t covered[PARAMS] = { 0 };
    (void)adamw;
    CHECK_INT(llmpar_fsdp_unit_count(fsdp), UNITS);
    CHECK_INT(llmpar_fsdp_dtype(fsdp), j->fsdp.dtype ? j->fsdp.dtype : LLMPAR_F32);
    for (int k = 0; k < PARAMS; k++) {
        /* Initial values: those of (seed, name, element), whatever the mesh. */
        const llmpar_param *param = &llmpar_fsdp_unit(fsdp, all[k].unit)->params[all[k].param];
        float want[MOST];
        llmpar_rng rng = llmpar_rng_key(j->fsdp.seed, LLMPAR_RNG_INIT, all[k].name, 0, 0);
        llmpar_rng_fill_normal_f32(&rng, 0, (size_t)all[k].count, 0, (float)param->init_std, want);
        whole(fsdp, k, shard_of(fsdp, all[k].unit), p);
        for (int i = 0; i < all[k].count; i++)
            if (p[i] != (param->init_std == 0 ? param->init_value : (double)want[i])) { TEST_FAIL("%s[%d] begins as %g", all[k].name, i, p[i]); break; }
        /* Gathered by hand: the same tensor, at once and again. */
        void *const *params = NULL, *const *again = NULL;
        CHECK_OK(llmpar_fsdp_unshard(fsdp, all[k].unit, &params));
        CHECK_OK(llmpar_fsdp_unshard(fsdp, all[k].unit, &again));
        llmpar_arena_get_usage(llmpar_fsdp_arena(fsdp), &usage);
        int64_t shards = j->fsdp.zero && j->fsdp.zero < LLMPAR_ZERO_3 ? 1 : mesh->degree[LLMPAR_AXIS_DP_SHARD];
        CHECK_INT(usage.live[LLMPAR_TAG_GATHERED], shards == 1 ? 0 : flat_elements(fsdp, all[k].unit, shards) * (int64_t)llmpar_dtype_size(llmpar_fsdp_dtype(fsdp)));
        CHECK(params == again);
        for (int i = 0; i < all[k].count; i++)
            if (get(params[all[k].param], i, llmpar_fsdp_dtype(fsdp)) != p[i]) { TEST_FAIL("%s[%d] gathered by hand differs", all[k].name, i); break; }
        CHECK_OK(llmpar_fsdp_reshard(fsdp, all[k].unit));
        CHECK(get(params[all[k].param], 0, llmpar_fsdp_dtype(fsdp)) == p[0]); /* one unshard is left */
        CHECK_OK(llmpar_fsdp_reshard(fsdp, all[k].unit));
        llmpar_arena_get_usage(llmpar_fsdp_arena(fsdp), &usage);
        CHECK_INT(usage.live[LLMPAR_TAG_GATHERED], 0);
    }
    /* Segments: in order, inside the shard, every element on one shard of each replica, counted once. */
    for (int32_t u = 0; u < UNITS; u++) {
        int64_t elements, at = 0;
        int32_t count;
        const llmpar_segment *segment;
        llmpar_fsdp_shard(fsdp, u, &elements, &segment, &count);
        for (int32_t s = 0; s < count; s++) {
            CHECK(segment[s].begin >= at && segment[s].count > 0);
            at = segment[s].begin + segment[s].count;
            for (int k = 0; k < PARAMS; k++)
                if (all[k].unit == u && all[k].param == segment[s].param) {
                    CHECK_INT(segment[s].no_decay, !all[k].decay);
                    if (segment[s].owner) covered[k] += segment[s].count;
                }
        }
        CHECK(at <= elements);
        check_padding(fsdp, u, shard_of(fsdp, u), "first parameters");
    }
    int64_t *device = NULL, sum[PARAMS];
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    device = covered;
    call.send = device;
    call.recv = sum;
    call.count = PARAMS;
    call.dtype = LLMPAR_I64;
    CHECK_OK(llmpar_all_reduce(mesh->world, NULL, &call));
    for (int k = 0; k < PARAMS; k++) CHECK_INT(sum[k], all[k].count);
    return LLMPAR_OK;
}

TEST(looking_in)
{
    static const llmpar_mesh_desc meshes[] = { { 1, 1, 1, 1, 1 }, { 1, 2, 1, 1, 1 }, { 1, 4, 1, 1, 1 }, { 2, 2, 1, 1, 1 }, { 1, 2, 1, 1, 2 }, { 1, 3, 1, 1, 1 } };
    for (int m = 0; m < 6; m++)
        for (int zero = 0; zero <= LLMPAR_ZERO_3; zero++) {
            job j = { .mesh = meshes[m], .body = look };
            j.fsdp.zero = zero;
            j.fsdp.seed = 77;
            j.fsdp.dtype = m == 1 ? LLMPAR_F64 : LLMPAR_DTYPE_DEFAULT;
            launch_ok(&j);
        }
}

/* ---- optimizers, scales, steps that do not count ---- */

typedef struct plain_descent { int begun, updated; double norm; } plain_descent;

static llmpar_status descent_begin(void *state, double grad_norm, double *grad_scale)
{
    plain_descent *d = (plain_descent *)state;
    d->begun++;
    d->norm = grad_norm;
    *grad_scale = 0.5;
    return LLMPAR_OK;
}
static llmpar_status descent_update(void *state, const llmpar_update *u)
{
    ((plain_descent *)state)->updated++;
    for (int32_t s = 0; s < u->segment_count; s++)
        for (int64_t i = u->segments[s].begin; i < u->segments[s].begin + u->segments[s].count; i++)
            put(u->param, i, u->dtype, get(u->param, i, u->dtype) - 0.25 * (get(u->grad, i, u->dtype) * u->grad_scale));
    return LLMPAR_OK;
}

/* A user's optimizer; gradients of the step by on_gradient; a power of two as loss scale changes no bit. */
static double descended[2][PARAMS][MOST];
static llmpar_status descend(const job *j, llmpar_fsdp *fsdp, llmpar_optim *adamw)
{
    plain_descent state = { 0, 0, 0 };
    llmpar_optimizer table = { &state, descent_begin, descent_update };
    llmpar_schedule *schedule = NULL;
    llmpar_run run;
    memset(&run, 0, sizeof run);
    run.optimizer = &table;
    int row = j->loss_scale == 0 ? 0 : 1;
    double start[PARAMS][MOST];
    (void)adamw;
    for (int k = 0; k < PARAMS; k++) whole(fsdp, k, shard_of(fsdp, all[k].unit), start[k]);
    llmpar_status status = make_schedule(j, fsdp, &schedule);
    if (!status) status = one_step(j, fsdp, 0, schedule, &run);
    CHECK_INT(state.begun, 1);
    CHECK_INT(state.updated, UNITS);
    CHECK(state.norm == run.grad_norm);
    for (int k = 0; !status && k < PARAMS; k++) {
        double p[MOST];
        whole(fsdp, k, shard_of(fsdp, all[k].unit), p);
        if (llmpar_fsdp_mesh(fsdp)->ctx->rank == 0) memcpy(descended[row][k], p, sizeof p);
        CHECK(memcmp(p, start[k], (size_t)all[k].count * sizeof *p) != 0);
    }
    /* Without an optimizer a step changes nothing. */
    memset(&run, 0, sizeof run);
    if (!status) status = one_step(j, fsdp, 1, schedule, &run);
    CHECK(run.grad_norm > 0);
    for (int k = 0; !status && k < PARAMS; k++) {
        double p[MOST];
        whole(fsdp, k, shard_of(fsdp, all[k].unit), p);
        if (llmpar_fsdp_mesh(fsdp)->ctx->rank == 0) CHECK_BYTES(p, descended[row][k], (size_t)all[k].count * sizeof *p);
    }
    llmpar_schedule_destroy(schedule);
    return status;
}

TEST(own_optimizer_and_loss_scale)
{
    job j = { .mesh = { .dp_shard = 2 }, .micro_batches = 1, .body = descend };
    launch_ok(&j);
    j.loss_scale = 1024;
    launch_ok(&j);
    for (int k = 0; k < PARAMS; k++) CHECK_BYTES(descended[1][k], descended[0][k], (size_t)all[k].count * sizeof(double));
}

static llmpar_status uncounted(const job *j, llmpar_fsdp *fsdp, llmpar_optim *adamw)
{
    llmpar_schedule *schedule = NULL;
    llmpar_run run;
    double before[MOST], after[MOST];
    memset(&run, 0, sizeof run);
    run.optimizer = llmpar_optim_table(adamw);
    llmpar_optim_set_lr(adamw, 1.0);
    whole(fsdp, W, shard_of(fsdp, MIX), before);
    llmpar_status status = make_schedule(j, fsdp, &schedule);
    if (!status) status = one_step(j, fsdp, 0, schedule, &run);
    CHECK_INT(run.skipped, 1);
    CHECK_INT(run.global_tokens, 0);
    CHECK(run.loss == 0 && run.grad_norm == 0);
    CHECK_INT(llmpar_optim_steps(adamw), 0);
    if (!status) whole(fsdp, W, shard_of(fsdp, MIX), after);
    if (!status) CHECK_BYTES(after, before, D * D * sizeof *before);
    llmpar_schedule_destroy(schedule);
    return status;
}

TEST(no_token_counts)
{
    job j = { .mesh = { .dp_shard = 2 }, .micro_batches = 2, .masked = 2, .body = uncounted };
    launch_ok(&j);
}

TEST_LIST(T_(same_bits), T_(plain_doubles), T_(memory), T_(looking_in), T_(own_optimizer_and_loss_scale), T_(no_token_counts))
