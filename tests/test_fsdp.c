/* FSDP with somebody's own network: three units of plain loops, no llama in sight. The same bits on every data mesh and for every policy and for a list written by hand; against a
   second implementation of network and optimizer in plain doubles; memory by tag to the byte; what is refused. */
#include "test.h"
#include <math.h>

/* The network, N = B*T tokens of T = 8, D = 19, ids below V = 11:
     embed   x = table[id]
     mix     y[n,:] = (x[n,:] * scale) w^T + position[t]
     score   s = y . (head + table[target]) + bias;  loss = (s - target)^2 / 2      (reads the table a second time: borrowed) */
enum { V = 11, D = 19, T = 8, B = 8, MOST = 384 };
enum { EMBED, MIX, SCORE, UNITS };

/* ---- numbers of either dtype ---- */

static double get(const void *p, int64_t i, llmpar_dtype dtype) { return dtype == LLMPAR_F64 ? ((const double *)p)[i] : (double)((const float *)p)[i]; }
static double rounded(double x, llmpar_dtype dtype) { return dtype == LLMPAR_F64 ? x : (double)(float)x; }
static void put(void *p, int64_t i, llmpar_dtype dtype, double x)
{
    if (dtype == LLMPAR_F64) ((double *)p)[i] = x;
    else ((float *)p)[i] = (float)x;
}

/* Balanced tree over leaves [first, first + n) of element i. */
static double tree(const double *leaf, int64_t count, int64_t first, int64_t n, int64_t i, llmpar_dtype dtype)
{
    if (n == 1) return rounded(leaf[first * count + i], dtype);
    int64_t half = llmpar_tree_split(n);
    return rounded(tree(leaf, count, first, half, i, dtype) + tree(leaf, count, first + half, n - half, i, dtype), dtype);
}

static void sum_leaves(const llmpar_unit_call *c, const double *leaf, int64_t count, void *grad)
{
    for (int64_t i = 0; i < count; i++) put(grad, i, c->dtype, tree(leaf, count, 0, c->micro->leaves, i, c->dtype));
}

static int64_t rows(const llmpar_unit_call *c) { return c->micro->batch * c->micro->t; }
static int64_t leaf_of(const llmpar_unit_call *c, int64_t n) { return n / c->micro->t / (c->micro->batch / c->micro->leaves); }
static double *zeroed_leaves(const llmpar_unit_call *c, void *at, int64_t count)
{
    memset(at, 0, (size_t)(c->micro->leaves * count) * sizeof(double));
    return (double *)at;
}

/* ---- units ---- */

static int fail_in_backward; /* world rank + 1 that fails there; read by all ranks, set between launches */

static llmpar_status embed_forward(llmpar_unit_call *c)
{
    if (c->input || c->doutput) TEST_FAIL("the first unit has an input");
    for (int64_t n = 0; n < rows(c); n++)
        for (int64_t j = 0; j < D; j++) put(c->output, n * D + j, c->dtype, get(c->params[0], c->micro->ids[n] * D + j, c->dtype));
    return LLMPAR_OK;
}

static llmpar_status embed_backward(llmpar_unit_call *c)
{
    double *leaf = zeroed_leaves(c, c->scratch, V * D);
    if (c->pass != LLMPAR_PASS_BACKWARD || c->dinput) TEST_FAIL("embed backward: pass %d, dinput %p", (int)c->pass, c->dinput);
    if (fail_in_backward == c->ctx->rank + 1) return llmpar_fail(c->ctx, LLMPAR_ERR_IO, "embed: planned failure");
    for (int64_t n = 0; n < rows(c); n++)
        for (int64_t j = 0; j < D; j++) leaf[(leaf_of(c, n) * V + c->micro->ids[n]) * D + j] += get(c->doutput, n * D + j, c->dtype);
    sum_leaves(c, leaf, V * D, c->grads[0]);
    return LLMPAR_OK;
}

/* saved: z = x * scale. Three instructions, the middle one on the other stream. */
static llmpar_status mix_scale(llmpar_unit_call *c)
{
    for (int64_t i = 0; i < rows(c) * D; i++) put(c->saved, i, c->dtype, get(c->input, i, c->dtype) * get(c->params[0], i % D, c->dtype));
    return LLMPAR_OK;
}
static llmpar_status mix_multiply(llmpar_unit_call *c)
{
    for (int64_t n = 0; n < rows(c); n++)
        for (int64_t i = 0; i < D; i++) {
            double sum = 0;
            for (int64_t j = 0; j < D; j++) sum += get(c->saved, n * D + j, c->dtype) * get(c->params[1], i * D + j, c->dtype);
            put(c->output, n * D + i, c->dtype, sum);
        }
    return LLMPAR_OK;
}
static llmpar_status mix_position(llmpar_unit_call *c)
{
    for (int64_t i = 0; i < rows(c) * D; i++) put(c->output, i, c->dtype, get(c->output, i, c->dtype) + get(c->params[2], i % (T * D), c->dtype));
    return LLMPAR_OK;
}

static llmpar_status mix_dx(llmpar_unit_call *c)
{
    double *leaf = zeroed_leaves(c, c->scratch, D);
    if (c->pass != LLMPAR_PASS_BACKWARD) TEST_FAIL("mix backward: pass %d", (int)c->pass);
    for (int64_t n = 0; n < rows(c); n++)
        for (int64_t j = 0; j < D; j++) {
            double dz = 0;
            for (int64_t i = 0; i < D; i++) dz += get(c->doutput, n * D + i, c->dtype) * get(c->params[1], i * D + j, c->dtype);
            leaf[leaf_of(c, n) * D + j] += dz * get(c->input, n * D + j, c->dtype);
            put(c->dinput, n * D + j, c->dtype, dz * get(c->params[0], j, c->dtype));
        }
    sum_leaves(c, leaf, D, c->grads[0]);
    return LLMPAR_OK;
}
static llmpar_status mix_dw(llmpar_unit_call *c)
{
    double *leaf = zeroed_leaves(c, c->scratch, D * D);
    for (int64_t n = 0; n < rows(c); n++)
        for (int64_t i = 0; i < D; i++)
            for (int64_t j = 0; j < D; j++) leaf[(leaf_of(c, n) * D + i) * D + j] += get(c->doutput, n * D + i, c->dtype) * get(c->saved, n * D + j, c->dtype);
    sum_leaves(c, leaf, D * D, c->grads[1]);
    leaf = zeroed_leaves(c, c->scratch, T * D);
    for (int64_t n = 0; n < rows(c); n++)
        for (int64_t j = 0; j < D; j++) leaf[(leaf_of(c, n) * T + n % T) * D + j] += get(c->doutput, n * D + j, c->dtype);
    sum_leaves(c, leaf, T * D, c->grads[2]);
    return LLMPAR_OK;
}

static int counted(const llmpar_unit_call *c, int64_t n) { return c->micro->targets[n] >= 0; }

static llmpar_status score_forward(llmpar_unit_call *c)
{
    double *score = (double *)c->saved;
    if (c->output) TEST_FAIL("the last unit has an output");
    for (int64_t n = 0; n < rows(c); n++) {
        int32_t target = c->micro->targets[n];
        score[n] = get(c->params[1], 0, c->dtype);
        if (!counted(c, n)) continue;
        for (int64_t j = 0; j < D; j++) score[n] += get(c->input, n * D + j, c->dtype) * (get(c->params[0], j, c->dtype) + get(c->borrowed[0], target * D + j, c->dtype));
        llmpar_exact_sum_add((llmpar_exact_sum *)c->micro->loss, 0.5 * (score[n] - target) * (score[n] - target));
    }
    return LLMPAR_OK;
}

static llmpar_status score_backward(llmpar_unit_call *c)
{
    const double *score = (const double *)c->saved;
    double *head = zeroed_leaves(c, c->scratch, D + 1), *table = zeroed_leaves(c, head + c->micro->leaves * (D + 1), V * D);
    if (c->doutput) TEST_FAIL("the last unit has a gradient of its output");
    for (int64_t n = 0; n < rows(c); n++) {
        int64_t leaf = leaf_of(c, n), target = counted(c, n) ? c->micro->targets[n] : 0;
        double ds = counted(c, n) ? (score[n] - (double)target) * (double)c->micro->grad_scale : 0;
        head[leaf * (D + 1) + D] += ds;
        for (int64_t j = 0; j < D; j++) {
            double x = get(c->input, n * D + j, c->dtype);
            head[leaf * (D + 1) + j] += ds * x;
            table[(leaf * V + target) * D + j] += ds * x;
            put(c->dinput, n * D + j, c->dtype, ds * (get(c->params[0], j, c->dtype) + get(c->borrowed[0], target * D + j, c->dtype)));
        }
    }
    for (int64_t i = 0; i <= D; i++) put(i < D ? c->grads[0] : c->grads[1], i % D, c->dtype, tree(head, D + 1, 0, c->micro->leaves, i, c->dtype));
    sum_leaves(c, table, V * D, c->borrowed_grads[0]);
    return LLMPAR_OK;
}

static llmpar_status sizes(void *user, const llmpar_micro *micro, llmpar_dtype dtype, llmpar_unit_sizes *out)
{
    int unit = *(const int *)user;
    size_t n = (size_t)(micro->batch * micro->t), size = llmpar_dtype_size(dtype);
    out->output = unit == SCORE ? 0 : n * D * size;
    out->saved = unit == EMBED ? 0 : unit == MIX ? n * D * size : n * sizeof(double);
    out->scratch = (size_t)micro->leaves * (D * D + V * D + D + 1) * sizeof(double);
    out->workspace = 0;
    return LLMPAR_OK;
}

static const llmpar_param embed_params[] = {{ "table", 2, 0, { V, D }, { LLMPAR_REPLICATE, LLMPAR_AXIS_DP_REPLICATE, 0, 0, 0, 0, 0 }, 0.5, 0 }};
static const llmpar_param mix_params[] = {
    { "scale", 1, 1, { D }, { LLMPAR_REPLICATE, LLMPAR_AXIS_DP_REPLICATE, 0, 0, 0, 0, 0 }, 0, 0.75 },
    { "w", 2, 0, { D, D }, { LLMPAR_REPLICATE, LLMPAR_AXIS_DP_REPLICATE, 0, 0, 0, 0, 0 }, 0.25, 0 },
    { "position", 2, 0, { T, D }, { LLMPAR_REPLICATE, LLMPAR_AXIS_DP_REPLICATE, 0, 0, 0, 0, 0 }, 0.1, 0 },
};
static const llmpar_param score_params[] = {
    { "head", 1, 0, { D }, { LLMPAR_REPLICATE, LLMPAR_AXIS_DP_REPLICATE, 0, 0, 0, 0, 0 }, 0.3, 0 },
    { "bias", 1, 1, { 1 }, { LLMPAR_REPLICATE, LLMPAR_AXIS_DP_REPLICATE, 0, 0, 0, 0, 0 }, 0, 0 },
};
static const llmpar_unit_op embed_f[] = {{ "look up", embed_forward, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 }}, embed_b[] = {{ "rows", embed_backward, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 }};
static const llmpar_unit_op mix_f[] = {{ "scale", mix_scale, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 }, { "multiply", mix_multiply, LLMPAR_TP_REDUCE, { 1, 0 }, 0, 0 }, { "position", mix_position, LLMPAR_COMPUTE, { 2, 0 }, 0, 0 }};
static const llmpar_unit_op mix_b[] = {{ "dx", mix_dx, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 }, { "dw", mix_dw, LLMPAR_TP_GATHER, { 1, 0 }, 0, 0 }};
static const llmpar_unit_op score_f[] = {{ "score", score_forward, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 }}, score_b[] = {{ "dscore", score_backward, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 }};
static int index_of[UNITS] = { EMBED, MIX, SCORE };

static void make_units(llmpar_unit units[UNITS])
{
    memset(units, 0, UNITS * sizeof *units);
    units[EMBED].name = "embed", units[EMBED].params = embed_params, units[EMBED].param_count = 1;
    units[EMBED].forward = embed_f, units[EMBED].forward_count = 1, units[EMBED].backward = embed_b, units[EMBED].backward_count = 1;
    units[MIX].name = "mix", units[MIX].params = mix_params, units[MIX].param_count = 3;
    units[MIX].forward = mix_f, units[MIX].forward_count = 3, units[MIX].backward = mix_b, units[MIX].backward_count = 2;
    units[SCORE].name = "score", units[SCORE].params = score_params, units[SCORE].param_count = 2, units[SCORE].borrow = 1 + EMBED;
    units[SCORE].forward = score_f, units[SCORE].forward_count = 1, units[SCORE].backward = score_b, units[SCORE].backward_count = 1;
    for (int u = 0; u < UNITS; u++) units[u].sizes = sizes, units[u].user = &index_of[u];
}
static const struct { const char *name; int unit, param, count, decay; } all[] = {
    { "table", EMBED, 0, V * D, 1 }, { "scale", MIX, 0, D, 0 }, { "w", MIX, 1, D * D, 1 }, { "position", MIX, 2, T * D, 1 }, { "head", SCORE, 0, D, 1 }, { "bias", SCORE, 1, 1, 0 },
};
enum { PARAMS = 6 };

/* ---- data ---- */

static int32_t id_at(int64_t step, int64_t b, int64_t t) { return (int32_t)((step * 31 + b * 7 + t * 3 + b * t) % V); }
static int32_t target_at(int64_t step, int64_t b, int64_t t) { return (int32_t)((step * 17 + b * 5 + t * 2 + 1) % V); }
/* masked: some targets do not count; 2: none does. */
static int is_masked(int masked, int64_t b, int64_t t) { return masked == 2 || (masked == 1 && (b * T + t) % 13 == 4); }

/* ---- the plain double reference: whole parameters, one rank, any order of sums ---- */

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

/* ---- running it ---- */

typedef struct job {
    llmpar_mesh_desc mesh;
    llmpar_fsdp_desc fsdp;
    llmpar_optim_desc adamw;
    int32_t micro_batches, no_sync, prefetch, keep, by_hand, masked, steps;
    double loss_scale;
    const llmpar_optimizer *optimizer;   /* NULL: AdamW */
    llmpar_status (*body)(const struct job *job, llmpar_fsdp *fsdp, llmpar_optim *adamw);
} job;

static void no_leak(const llmpar_ctx *ctx, void *user)
{
    (void)user;
    CHECK_INT(ctx->heap.live, 0);
}

static llmpar_status run_rank(llmpar_ctx *ctx, void *user)
{
    const job *j = (const job *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_fsdp *fsdp = NULL;
    llmpar_optim *adamw = NULL;
    llmpar_unit units[UNITS];
    make_units(units);
    llmpar_status status = llmpar_mesh_create(ctx, &j->mesh, &mesh);
    llmpar_fsdp_desc desc = j->fsdp;
    if (desc.optimizer_states == 0) desc.optimizer_states = 2;
    if (!status) status = llmpar_fsdp_create(mesh, units, UNITS, &desc, &fsdp);
    memset(units, 0x5a, sizeof units); /* they were copied */
    if (!status) status = llmpar_optim_create(fsdp, &j->adamw, &adamw);
    if (!status) status = j->body(j, fsdp, adamw);
    llmpar_optim_destroy(adamw);
    llmpar_fsdp_destroy(fsdp);
    llmpar_mesh_destroy(mesh);
    return status;
}

static llmpar_status launch(const job *j, llmpar_error *error)
{
    int32_t ranks = (j->mesh.dp_replicate ? j->mesh.dp_replicate : 1) * (j->mesh.dp_shard ? j->mesh.dp_shard : 1) * (j->mesh.tp ? j->mesh.tp : 1);
    llmpar_launch_desc desc = { .ranks = ranks, .check = no_leak };
    return llmpar_launch(&desc, run_rank, (void *)j, error);
}

static void launch_ok(const job *j)
{
    llmpar_error error;
    if (launch(j, &error)) TEST_FAIL("rank %d (%s): %s", error.rank, error.where, error.text);
}

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

static llmpar_status make_schedule(const job *j, llmpar_fsdp *fsdp, llmpar_schedule **out)
{
    llmpar_ctx *ctx = llmpar_fsdp_mesh(fsdp)->ctx;
    llmpar_unit units[UNITS];
    llmpar_policy policy;
    memset(&policy, 0, sizeof policy);
    for (int u = 0; u < UNITS; u++) units[u] = *llmpar_fsdp_unit(fsdp, u);
    policy.micro_batches = j->micro_batches;
    policy.no_sync = j->no_sync;
    policy.prefetch = j->prefetch;
    policy.reshard = j->keep ? LLMPAR_RESHARD_NEVER : LLMPAR_RESHARD_DEFAULT;
    llmpar_fsdp_policy(fsdp, &policy);
    llmpar_status status = llmpar_schedule_create(&ctx->heap, units, UNITS, &policy, out, &ctx->error);
    if (!status && j->by_hand) { /* the list takes the place of the generated one */
        llmpar_schedule *s = *out;
        int32_t count = (int32_t)(sizeof by_hand / sizeof by_hand[0]);
        CHECK(s->capacity >= count);
        memcpy(s->list, by_hand, sizeof by_hand);
        s->count = count;
    }
    if (!status) status = llmpar_schedule_validate(&ctx->heap, (*out)->list, (*out)->count, units, UNITS, &policy, &ctx->error);
    return status;
}

/* Step number `step` over this rank's part of the B sequences. */
static llmpar_status one_step(const job *j, llmpar_fsdp *fsdp, int64_t step, const llmpar_schedule *schedule, llmpar_run *run)
{
    const llmpar_mesh *mesh = llmpar_fsdp_mesh(fsdp);
    int64_t m_count = j->micro_batches ? j->micro_batches : 1, per = B / (m_count * mesh->dp_ranks);
    static const int32_t cut = B * T;
    int32_t *ids = (int32_t *)malloc(2 * sizeof *ids * (size_t)cut), *targets = ids + cut; /* the CPU device: host memory is device memory */
    llmpar_micro micro[B];
    memset(micro, 0, sizeof micro);
    run->tokens = 0;
    for (int64_t m = 0, at = 0; m < m_count; m++) {
        int64_t first = j->no_sync ? mesh->dp_rank * per * m_count + m * per : (m * mesh->dp_ranks + mesh->dp_rank) * per;
        micro[m].batch = per;
        micro[m].t = T;
        micro[m].leaves = per; /* P = B leaves in all */
        micro[m].ids = ids + at;
        micro[m].targets = targets + at;
        for (int64_t b = first; b < first + per; b++)
            for (int64_t t = 0; t < T; t++, at++) {
                ids[at] = id_at(step, b, t);
                targets[at] = is_masked(j->masked, b, t) ? -1 : target_at(step, b, t);
                run->tokens += targets[at] >= 0;
            }
    }
    run->micro = micro;
    run->loss_scale = j->loss_scale;
    llmpar_status status = llmpar_fsdp_run(fsdp, schedule->list, schedule->count, run);
    free(ids);
    return status;
}

/* Parameter k whole, out of a shard-sized buffer of its unit. Collective. */
static void whole(llmpar_fsdp *fsdp, int k, void *shard, double *out)
{
    llmpar_dtensor tensor;
    llmpar_fsdp_dtensor(fsdp, all[k].unit, all[k].param, &tensor);
    CHECK(!strcmp(tensor.name, all[k].name));
    size_t size = llmpar_dtype_size(tensor.dtype);
    const llmpar_mesh *mesh = llmpar_fsdp_mesh(fsdp);
    llmpar_device *device = mesh->ctx->device;
    llmpar_stream *stream = NULL;
    void *full = malloc(MOST * size), *scratch = malloc((size_t)llmpar_dtensor_full_scratch(&tensor, mesh) * size + 1);
    CHECK_OK(device->stream_create(device, "whole", &stream));
    CHECK_OK(llmpar_dtensor_full(&tensor, mesh, stream, llmpar_fsdp_local(fsdp, all[k].unit, all[k].param, shard), scratch, full));
    CHECK_OK(device->synchronize(device, stream));
    device->stream_destroy(device, stream);
    CHECK(llmpar_convert(out, LLMPAR_F64, full, tensor.dtype, (size_t)all[k].count));
    free(scratch);
    free(full);
}

static void *shard_of(llmpar_fsdp *fsdp, int32_t unit) { return llmpar_fsdp_shard(fsdp, unit, NULL, NULL, NULL); }

/* Elements of a shard-sized buffer that belong to no parameter are zero. */
static void check_padding(llmpar_fsdp *fsdp, int32_t unit, const void *buffer, const char *what)
{
    int64_t elements, at = 0;
    int32_t count;
    const llmpar_segment *segment;
    llmpar_fsdp_shard(fsdp, unit, &elements, &segment, &count);
    CHECK_INT(elements % LLMPAR_FLAT_ALIGN, 0);
    for (int32_t s = 0; s <= count; s++) {
        int64_t end = s < count ? segment[s].begin : elements;
        for (; at < end; at++)
            if (get(buffer, at, llmpar_fsdp_dtype(fsdp)) != 0) TEST_FAIL("unit %d: %s: padding element %lld is %g", unit, what, (long long)at, get(buffer, at, llmpar_fsdp_dtype(fsdp)));
        if (s < count) at = segment[s].begin + segment[s].count;
    }
}

static llmpar_status look_at_gradient(void *user, llmpar_fsdp *fsdp, int32_t unit, const void *shard)
{
    ++*(int *)user;
    check_padding(fsdp, unit, shard, "gradient");
    return LLMPAR_OK;
}

/* ---- the same bits on every mesh ---- */

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
            job j = { .mesh = rows[i].mesh, .micro_batches = rows[i].micro_batches, .no_sync = rows[i].no_sync, .prefetch = rows[i].prefetch, .keep = rows[i].keep, .by_hand = rows[i].by_hand, .masked = 1, .body = train };
            j.fsdp.zero = rows[i].zero;
            j.fsdp.seed = 3;
            j.fsdp.dtype = (llmpar_dtype)dtype;
            launch_ok(&j);
            if (test_failures != before) fprintf(stderr, "  (row %d, %s)\n", (int)i, llmpar_dtype_name((llmpar_dtype)dtype));
        }
    }
}

/* ---- against plain doubles ---- */

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

/* An infinite element of "position" (row 7, on the last of two shards): the step says so by name, and nothing changes. */
static llmpar_status infinite(const job *j, llmpar_fsdp *fsdp, llmpar_optim *adamw)
{
    llmpar_mesh *mesh = llmpar_fsdp_mesh(fsdp);
    llmpar_schedule *schedule = NULL;
    llmpar_run run;
    char name[64];
    double before[PARAMS][MOST], after[MOST];
    memset(&run, 0, sizeof run);
    run.optimizer = llmpar_optim_table(adamw);
    llmpar_optim_set_lr(adamw, 0.1);
    CHECK_OK(llmpar_fsdp_find_nonfinite(fsdp, name, sizeof name));
    CHECK(!strcmp(name, ""));
    int64_t elements;
    int32_t count;
    const llmpar_segment *segment;
    void *shard = llmpar_fsdp_shard(fsdp, MIX, &elements, &segment, &count);
    if (mesh->dp_rank == 1 && count && segment[count - 1].param == 2) put(shard, segment[count - 1].begin + segment[count - 1].count - 1, LLMPAR_F32, HUGE_VAL);
    CHECK_OK(llmpar_fsdp_find_nonfinite(fsdp, name, sizeof name));
    CHECK(!strcmp(name, "position"));
    for (int k = 0; k < PARAMS; k++) whole(fsdp, k, shard_of(fsdp, all[k].unit), before[k]);
    llmpar_status status = make_schedule(j, fsdp, &schedule);
    if (!status) status = one_step(j, fsdp, 0, schedule, &run);
    CHECK_INT(status, LLMPAR_ERR_NONFINITE);
    CHECK_TEXT(llmpar_last_error(mesh->ctx), "first non-finite tensor: position");
    CHECK_INT(llmpar_optim_steps(adamw), 0);
    for (int k = 0; k < PARAMS; k++) {
        whole(fsdp, k, shard_of(fsdp, all[k].unit), after);
        CHECK_BYTES(after, before[k], (size_t)all[k].count * sizeof *after);
    }
    llmpar_arena_usage usage;
    llmpar_arena_get_usage(llmpar_fsdp_arena(fsdp), &usage);
    CHECK_INT(usage.live[LLMPAR_TAG_GATHERED] + usage.live[LLMPAR_TAG_GRADIENTS] + usage.live[LLMPAR_TAG_ACTIVATIONS], 0);
    llmpar_schedule_destroy(schedule);
    return status;
}

TEST(infinite_parameter)
{
    llmpar_error error;
    job j = { .mesh = { .dp_shard = 2 }, .micro_batches = 1, .body = infinite };
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_NONFINITE);
    CHECK_TEXT(error.text, "first non-finite tensor: position");
}

/* ---- failures ---- */

static llmpar_status some_steps(const job *j, llmpar_fsdp *fsdp, llmpar_optim *adamw)
{
    llmpar_schedule *schedule = NULL;
    llmpar_status status = make_schedule(j, fsdp, &schedule);
    for (int i = 0; !status && i < 2; i++) {
        llmpar_run run;
        memset(&run, 0, sizeof run);
        run.optimizer = llmpar_optim_table(adamw);
        llmpar_optim_set_lr(adamw, 0.01);
        status = one_step(j, fsdp, i, schedule, &run);
    }
    llmpar_arena_usage usage;
    llmpar_arena_get_usage(llmpar_fsdp_arena(fsdp), &usage);
    CHECK_INT(usage.live[LLMPAR_TAG_GATHERED] + usage.live[LLMPAR_TAG_GRADIENTS] + usage.live[LLMPAR_TAG_ACTIVATIONS], 0);
    llmpar_schedule_destroy(schedule);
    return status;
}

TEST(a_rank_fails_in_a_step)
{
    for (int zero = LLMPAR_ZERO_0; zero <= LLMPAR_ZERO_3; zero += 3)
        for (int rank = 0; rank < 4; rank++) {
            llmpar_error error;
            job j = { .mesh = { .dp_shard = 4 }, .micro_batches = 2, .prefetch = 1, .body = some_steps };
            j.fsdp.zero = zero;
            fail_in_backward = rank + 1;
            CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_IO);
            CHECK_INT(error.rank, rank);
            CHECK_TEXT(error.text, "embed: planned failure");
            fail_in_backward = 0;
        }
}

static llmpar_status by_hand_errors(const job *j, llmpar_fsdp *fsdp, llmpar_optim *adamw)
{
    llmpar_schedule *schedule = NULL;
    llmpar_run run;
    memset(&run, 0, sizeof run);
    (void)adamw;
    if (j->steps == 0) return llmpar_fsdp_reshard(fsdp, SCORE);
    llmpar_status status = llmpar_fsdp_unshard(fsdp, MIX, NULL);
    if (!status) status = make_schedule(j, fsdp, &schedule);
    if (!status) status = one_step(j, fsdp, 0, schedule, &run);
    llmpar_schedule_destroy(schedule);
    return status;
}

static llmpar_status nobody(const job *j, llmpar_fsdp *fsdp, llmpar_optim *adamw)
{
    (void)j, (void)fsdp, (void)adamw;
    TEST_FAIL("was not refused");
    return LLMPAR_OK;
}

TEST(refused)
{
    llmpar_error error;
    job j = { .mesh = { .dp_shard = 2 }, .micro_batches = 1, .body = by_hand_errors };
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "unit score: reshard without unshard");
    j.steps = 1;
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "unit mix: still unsharded by hand");
    j.body = nobody;
    j.fsdp.zero = 5;
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "zero = 5");
    j.fsdp.zero = 0;
    j.fsdp.dtype = LLMPAR_I32;
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_UNSUPPORTED);
    CHECK_TEXT(error.text, "dtype i32");
    j.fsdp.dtype = LLMPAR_F64;
    j.fsdp.reduce_dtype = LLMPAR_BF16;
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_UNSUPPORTED);
    CHECK_TEXT(error.text, "reduce_dtype bf16 with dtype f64");
    j.fsdp.dtype = j.fsdp.reduce_dtype = LLMPAR_DTYPE_DEFAULT;
    j.fsdp.offload[LLMPAR_STATE_GRADS] = (llmpar_tier)3;
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "offload of grads to tier 3");
    j.fsdp.offload[LLMPAR_STATE_GRADS] = LLMPAR_TIER_DEVICE;
    j.fsdp.memory_limit = 3000; /* 256 + 768 + 256 elements over two ranks are 2560 bytes; the moments do not fit */
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_MEMORY);
    CHECK_TEXT(error.text, "optimizer");
    j.fsdp.memory_limit = 1500;
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_MEMORY);
    CHECK_TEXT(error.text, "parameters");
    j.fsdp.memory_limit = 0;
    j.fsdp.optimizer_states = -1;
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "optimizer_states = -1");
}

/* create alone, with wrong units. */
static int wrong_units;
static llmpar_status create_wrong(llmpar_ctx *ctx, void *user)
{
    llmpar_mesh *mesh = NULL;
    llmpar_mesh_desc mesh_desc;
    llmpar_fsdp_desc desc;
    llmpar_fsdp *fsdp = (llmpar_fsdp *)user;
    llmpar_unit units[UNITS];
    llmpar_param twice[2];
    memset(&mesh_desc, 0, sizeof mesh_desc);
    memset(&desc, 0, sizeof desc);
    mesh_desc.dp_shard = 2;
    make_units(units);
    twice[0] = score_params[0];
    twice[1] = score_params[1];
    if (wrong_units == 1) twice[1].name = "table";
    if (wrong_units == 2) twice[1].name = "head";
    if (wrong_units == 3) twice[0].shape[0] = -5;
    if (wrong_units == 4) twice[0].dims = 5;
    if (wrong_units == 5) twice[0].tp.kind = LLMPAR_SHARD, twice[0].tp.axis = LLMPAR_AXIS_TP, twice[0].tp.dim = 1;
    units[SCORE].params = twice;
    if (wrong_units == 6) units[MIX].forward_count = 161;
    if (wrong_units == 7) units[MIX].backward_count = 161;
    llmpar_status status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_fsdp_create(mesh, units, wrong_units == 0 ? 0 : UNITS, &desc, &fsdp);
    if (status) CHECK(fsdp == NULL);
    llmpar_fsdp_destroy(fsdp);
    llmpar_mesh_destroy(mesh);
    return status;
}

TEST(wrong_units_refused)
{
    static const struct { llmpar_status status; const char *text; } rows[] = {
        { LLMPAR_ERR_ARGUMENT, "0 units" }, { LLMPAR_ERR_ARGUMENT, "table stands in units embed and score" }, { LLMPAR_ERR_ARGUMENT, "head stands in units score and score" }, { LLMPAR_ERR_SHAPE, "head" },
        { LLMPAR_ERR_SHAPE, "head" }, { LLMPAR_ERR_SHAPE, "head" }, { LLMPAR_ERR_ARGUMENT, "unit mix" }, { LLMPAR_ERR_ARGUMENT, "unit mix" },
    };
    llmpar_launch_desc desc = { .ranks = 2, .check = no_leak };
    for (wrong_units = 0; wrong_units < 8; wrong_units++) {
        llmpar_error error;
        CHECK_STATUS(llmpar_launch(&desc, create_wrong, &error, &error), rows[wrong_units].status);
        CHECK_TEXT(error.text, rows[wrong_units].text);
    }
}

/* The nth allocation of one rank fails, for every n: an error on every rank, nothing left. */
static int failing_rank;
static uint64_t failing_call;
static int reached_end;
static llmpar_status poor_rank(llmpar_ctx *ctx, void *user)
{
    if (ctx->rank == failing_rank) ctx->heap.fail_at = ctx->heap.calls + failing_call;
    llmpar_status status = run_rank(ctx, user);
    if (!status) __atomic_add_fetch(&reached_end, 1, __ATOMIC_SEQ_CST);
    return status;
}

TEST(out_of_memory)
{
    job j = { .mesh = { .dp_shard = 2 }, .micro_batches = 2, .body = some_steps };
    int failed = 0;
    failing_rank = 1;
    for (failing_call = 1; failing_call < 2000; failing_call += failing_call < 40 ? 1 : 7) {
        llmpar_launch_desc desc = { .ranks = 2, .check = no_leak };
        llmpar_error error;
        reached_end = 0;
        llmpar_status status = llmpar_launch(&desc, poor_rank, &j, &error);
        if (!status) break;
        if (status != LLMPAR_ERR_MEMORY) TEST_FAIL("allocation %d: %s: %s", (int)failing_call, llmpar_status_string(status), error.text);
        CHECK_INT(error.rank, 1);
        CHECK_INT(reached_end, 0);
        failed++;
    }
    CHECK(failed > 40);
    CHECK_INT(reached_end, 2);
}

TEST_LIST(T_(same_bits), T_(plain_doubles), T_(memory), T_(looking_in), T_(own_optimizer_and_loss_scale), T_(no_token_counts), T_(infinite_parameter), T_(a_rank_fails_in_a_step),
          T_(refused), T_(wrong_units_refused), T_(out_of_memory))
