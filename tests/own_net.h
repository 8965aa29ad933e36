/* own_net: FSDP with somebody's own network, for tests: three units of plain loops, no llama in sight, their data, and a job that runs steps of it on every rank.
   (fsdp_net.h is the one for buffers in any dtype and streams with threads.) */
#ifndef OWN_NET_H
#define OWN_NET_H

#include "test.h"

/* The network, N = B*T tokens of T = 8, D = 19, ids below V = 11:
     embed   x = table[id]
     mix     y[n,:] = (x[n,:] * scale) w^T + position[t]
     score   s = y . (head + table[target]) + bias;  loss = (s - target)^2 / 2      (reads the table a second time: borrowed) */
enum { V = 11, D = 19, T = 8, B = 8, MOST = 384 };
enum { EMBED, MIX, SCORE, UNITS };
/* ---- numbers of either dtype ---- */

static inline double get(const void *p, int64_t i, llmpar_dtype dtype) { return dtype == LLMPAR_F64 ? ((const double *)p)[i] : (double)((const float *)p)[i]; }
static inline double rounded(double x, llmpar_dtype dtype) { return dtype == LLMPAR_F64 ? x : (double)(float)x; }
static inline void put(void *p, int64_t i, llmpar_dtype dtype, double x)
{
    if (dtype == LLMPAR_F64) ((double *)p)[i] = x;
    else ((float *)p)[i] = (float)x;
}

/* Balanced tree over leaves [first, first + n) of element i. */
static inline double tree(const double *leaf, int64_t count, int64_t first, int64_t n, int64_t i, llmpar_dtype dtype)
{
    if (n == 1) return rounded(leaf[first * count + i], dtype);
    int64_t half = llmpar_tree_split(n);
    return rounded(tree(leaf, count, first, half, i, dtype) + tree(leaf, count, first + half, n - half, i, dtype), dtype);
}

static inline void sum_leaves(const llmpar_unit_call *c, const double *leaf, int64_t count, void *grad)
{
    for (int64_t i = 0; i < count; i++) put(grad, i, c->dtype, tree(leaf, count, 0, c->micro->leaves, i, c->dtype));
}

static inline int64_t rows(const llmpar_unit_call *c) { return c->micro->batch * c->micro->t; }
static inline int64_t leaf_of(const llmpar_unit_call *c, int64_t n) { return n / c->micro->t / (c->micro->batch / c->micro->leaves); }
static inline double *zeroed_leaves(const llmpar_unit_call *c, void *at, int64_t count)
{
    memset(at, 0, (size_t)(c->micro->leaves * count) * sizeof(double));
    return (double *)at;
}

/* ---- units ---- */

static int fail_in_backward; /* world rank + 1 that fails there; read by all ranks, set between launches */

static inline llmpar_status embed_forward(llmpar_unit_call *c)
{
    if (c->input || c->doutput) TEST_FAIL("the first unit has an input");
    for (int64_t n = 0; n < rows(c); n++)
        for (int64_t j = 0; j < D; j++) put(c->output, n * D + j, c->dtype, get(c->params[0], c->micro->ids[n] * D + j, c->dtype));
    return LLMPAR_OK;
}

static inline llmpar_status embed_backward(llmpar_unit_call *c)
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
static inline llmpar_status mix_scale(llmpar_unit_call *c)
{
    for (int64_t i = 0; i < rows(c) * D; i++) put(c->saved, i, c->dtype, get(c->input, i, c->dtype) * get(c->params[0], i % D, c->dtype));
    return LLMPAR_OK;
}
static inline llmpar_status mix_multiply(llmpar_unit_call *c)
{
    for (int64_t n = 0; n < rows(c); n++)
        for (int64_t i = 0; i < D; i++) {
            double sum = 0;
            for (int64_t j = 0; j < D; j++) sum += get(c->saved, n * D + j, c->dtype) * get(c->params[1], i * D + j, c->dtype);
            put(c->output, n * D + i, c->dtype, sum);
        }
    return LLMPAR_OK;
}
static inline llmpar_status mix_position(llmpar_unit_call *c)
{
    for (int64_t i = 0; i < rows(c) * D; i++) put(c->output, i, c->dtype, get(c->output, i, c->dtype) + get(c->params[2], i % (T * D), c->dtype));
    return LLMPAR_OK;
}

static inline llmpar_status mix_dx(llmpar_unit_call *c)
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
static inline llmpar_status mix_dw(llmpar_unit_call *c)
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

static inline int counted(const llmpar_unit_call *c, int64_t n) { return c->micro->targets[n] >= 0; }

static inline llmpar_status score_forward(llmpar_unit_call *c)
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

static inline llmpar_status score_backward(llmpar_unit_call *c)
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

static inline llmpar_status sizes(void *user, const llmpar_micro *micro, llmpar_dtype dtype, llmpar_unit_sizes *out)
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

static inline void make_units(llmpar_unit units[UNITS])
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

static inline int32_t id_at(int64_t step, int64_t b, int64_t t) { return (int32_t)((step * 31 + b * 7 + t * 3 + b * t) % V); }
static inline int32_t target_at(int64_t step, int64_t b, int64_t t) { return (int32_t)((step * 17 + b * 5 + t * 2 + 1) % V); }
/* masked: some targets do not count; 2: none does. */
static inline int is_masked(int masked, int64_t b, int64_t t) { return masked == 2 || (masked == 1 && (b * T + t) % 13 == 4); }
/* ---- running it ---- */

typedef struct job {
    llmpar_mesh_desc mesh;
    llmpar_fsdp_desc fsdp;
    llmpar_optim_desc adamw;
    int32_t micro_batches, no_sync, prefetch, keep, masked, steps;
    const llmpar_instruction *by_hand; /* a list that takes the place of the generated one, or NULL */
    int32_t by_hand_count;
    double loss_scale;
    const llmpar_optimizer *optimizer;   /* NULL: AdamW */
    llmpar_status (*body)(const struct job *job, llmpar_fsdp *fsdp, llmpar_optim *adamw);
} job;

static inline llmpar_status run_rank(llmpar_ctx *ctx, void *user)
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

static inline llmpar_status launch(const job *j, llmpar_error *error)
{
    int32_t ranks = (j->mesh.dp_replicate ? j->mesh.dp_replicate : 1) * (j->mesh.dp_shard ? j->mesh.dp_shard : 1) * (j->mesh.tp ? j->mesh.tp : 1);
    llmpar_launch_desc desc = { .ranks = ranks, .check = test_no_leak };
    return llmpar_launch(&desc, run_rank, (void *)j, error);
}

static inline void launch_ok(const job *j)
{
    llmpar_error error;
    if (launch(j, &error)) TEST_FAIL("rank %d (%s): %s", error.rank, error.where, error.text);
}

static inline llmpar_status make_schedule(const job *j, llmpar_fsdp *fsdp, llmpar_schedule **out)
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
    if (!status && j->by_hand) {
        llmpar_schedule *s = *out;
        CHECK(s->capacity >= j->by_hand_count);
        memcpy(s->list, j->by_hand, (size_t)j->by_hand_count * sizeof *j->by_hand);
        s->count = j->by_hand_count;
    }
    if (!status) status = llmpar_schedule_validate(&ctx->heap, (*out)->list, (*out)->count, units, UNITS, &policy, &ctx->error);
    return status;
}

/* Step number `step` over this rank's part of the B sequences. */
static inline llmpar_status one_step(const job *j, llmpar_fsdp *fsdp, int64_t step, const llmpar_schedule *schedule, llmpar_run *run)
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
static inline void whole(llmpar_fsdp *fsdp, int k, void *shard, double *out)
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

static inline void *shard_of(llmpar_fsdp *fsdp, int32_t unit) { return llmpar_fsdp_shard(fsdp, unit, NULL, NULL, NULL); }

/* Elements of a shard-sized buffer that belong to no parameter are zero. */
static inline void check_padding(llmpar_fsdp *fsdp, int32_t unit, const void *buffer, const char *what)
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

#endif
