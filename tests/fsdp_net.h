/* fsdp_net: a network of four units in plain loops, in any floating dtype, for tests of FSDP's policies. Everything runs as host calls in stream order, so the streams may have threads.

   N = B*T tokens, V ids, width D:
     embed   x = table[id]
     mix0/1  y[n,:] = (x[n,:] * scale) w^T + position[t]    (mix0: what makes y is marked output_only)
     score   s = y . (head + table[target]) + bias;  loss = (s - target)^2 / 2      (reads the table a second time: borrowed)
   Sums are doubles inside a leaf, rounded to the sum type, then the balanced tree over leaves: the same bits on every data mesh. */
#include "test.h"

enum { NET_V = 11, NET_D = 19, NET_T = 4, NET_B = 8, NET_MOST = 361, NET_STEPS = 3 };
enum { NET_EMBED, NET_MIX0, NET_MIX1, NET_SCORE, NET_UNITS };
enum { NET_PARAMS = 9 };
static const struct { const char *name; int unit, param, count; } net_all[NET_PARAMS] = {
    { "table", 0, 0, NET_V * NET_D }, { "scale0", 1, 0, NET_D }, { "w0", 1, 1, NET_D * NET_D }, { "position0", 1, 2, NET_T * NET_D },
    { "scale1", 2, 0, NET_D }, { "w1", 2, 1, NET_D * NET_D }, { "position1", 2, 2, NET_T * NET_D }, { "head", 3, 0, NET_D }, { "bias", 3, 1, 1 },
};

static double net_get(const void *p, int64_t i, llmpar_dtype dtype)
{
    switch (dtype) {
    case LLMPAR_F32: return (double)((const float *)p)[i];
    case LLMPAR_F64: return ((const double *)p)[i];
    case LLMPAR_BF16: return (double)llmpar_bf16_to_f32(((const uint16_t *)p)[i]);
    default: return (double)llmpar_f16_to_f32(((const uint16_t *)p)[i]);
    }
}
static void net_put(void *p, int64_t i, llmpar_dtype dtype, double x)
{
    switch (dtype) {
    case LLMPAR_F32: ((float *)p)[i] = (float)x; break;
    case LLMPAR_F64: ((double *)p)[i] = x; break;
    case LLMPAR_BF16: ((uint16_t *)p)[i] = llmpar_f32_to_bf16((float)x); break;
    default: ((uint16_t *)p)[i] = llmpar_f32_to_f16((float)x); break;
    }
}
static double net_round(double x, llmpar_dtype dtype)
{
    return dtype == LLMPAR_F64 ? x : (double)(float)x; /* of a sum type */
}

/* What a host call takes along: no array of the caller is read later. */
typedef struct net_call {
    void (*run)(const struct net_call *c);
    llmpar_dtype dtype;
    int32_t fail;
    int64_t batch, t, leaves;
    const int32_t *ids, *targets;
    int64_t *loss;
    double grad_scale;
    void *params[3], *grads[3], *borrowed, *borrowed_grad;
    const void *input, *doutput;
    void *output, *dinput, *saved, *scratch;
} net_call;

static int64_t net_rows(const net_call *c) { return c->batch * c->t; }
static int64_t net_leaf(const net_call *c, int64_t n) { return n / c->t / (c->batch / c->leaves); }
static double *net_leaves(const net_call *c, void *at, int64_t count)
{
    memset(at, 0, (size_t)(c->leaves * count) * sizeof(double));
    return (double *)at;
}
static double net_tree(const double *leaf, int64_t count, int64_t first, int64_t n, int64_t i, llmpar_dtype sum)
{
    if (n == 1) return net_round(leaf[first * count + i], sum);
    int64_t half = llmpar_tree_split(n);
    return net_round(net_tree(leaf, count, first, half, i, sum) + net_tree(leaf, count, first + half, n - half, i, sum), sum);
}
static void net_sum(const net_call *c, const double *leaf, int64_t stride, int64_t first, int64_t count, void *grad)
{
    for (int64_t i = 0; i < count && grad; i++) net_put(grad, i, llmpar_dtype_sum(c->dtype), net_tree(leaf, stride, 0, c->leaves, first + i, llmpar_dtype_sum(c->dtype)));
}

static void net_embed(const net_call *c)
{
    for (int64_t n = 0; n < net_rows(c); n++)
        for (int64_t j = 0; j < NET_D; j++) net_put(c->output, n * NET_D + j, c->dtype, net_get(c->params[0], c->ids[n] * NET_D + j, c->dtype));
}
static void net_embed_back(const net_call *c)
{
    double *leaf = net_leaves(c, c->scratch, NET_V * NET_D);
    for (int64_t n = 0; n < net_rows(c); n++)
        for (int64_t j = 0; j < NET_D; j++) leaf[(net_leaf(c, n) * NET_V + c->ids[n]) * NET_D + j] += net_get(c->doutput, n * NET_D + j, c->dtype);
    net_sum(c, leaf, NET_V * NET_D, 0, NET_V * NET_D, c->grads[0]);
}
static void net_scale(const net_call *c)
{
    for (int64_t i = 0; i < net_rows(c) * NET_D; i++) net_put(c->saved, i, c->dtype, net_get(c->input, i, c->dtype) * net_get(c->params[0], i % NET_D, c->dtype));
}
static void net_multiply(const net_call *c)
{
    for (int64_t n = 0; n < net_rows(c); n++)
        for (int64_t i = 0; i < NET_D; i++) {
            double sum = net_get(c->params[2], n % c->t * NET_D + i, c->dtype);
            for (int64_t j = 0; j < NET_D; j++) sum += net_get(c->saved, n * NET_D + j, c->dtype) * net_get(c->params[1], i * NET_D + j, c->dtype);
            net_put(c->output, n * NET_D + i, c->dtype, sum);
        }
}
static void net_mix_back(const net_call *c)
{
    enum { D = NET_D };
    double *leaf = net_leaves(c, c->scratch, D + D * D + NET_T * D);
    for (int64_t n = 0; n < net_rows(c); n++) {
        double *at = leaf + net_leaf(c, n) * (D + D * D + NET_T * D);
        for (int64_t j = 0; j < D; j++) {
            double dz = 0;
            for (int64_t i = 0; i < D; i++) {
                double dy = net_get(c->doutput, n * D + i, c->dtype);
                dz += dy * net_get(c->params[1], i * D + j, c->dtype);
                at[D + i * D + j] += dy * net_get(c->saved, n * D + j, c->dtype);
            }
            at[j] += dz * net_get(c->input, n * D + j, c->dtype);
            at[D + D * D + n % c->t * D + j] += net_get(c->doutput, n * D + j, c->dtype);
            if (c->dinput) net_put(c->dinput, n * D + j, c->dtype, dz * net_get(c->params[0], j, c->dtype));
        }
    }
    net_sum(c, leaf, D + D * D + NET_T * D, 0, D, c->grads[0]);
    net_sum(c, leaf, D + D * D + NET_T * D, D, D * D, c->grads[1]);
    net_sum(c, leaf, D + D * D + NET_T * D, D + D * D, NET_T * D, c->grads[2]);
}
static void net_score(const net_call *c)
{
    double *score = (double *)c->saved;
    for (int64_t n = 0; n < net_rows(c); n++) {
        int32_t target = c->targets[n];
        score[n] = net_get(c->params[1], 0, c->dtype);
        for (int64_t j = 0; j < NET_D; j++) score[n] += net_get(c->input, n * NET_D + j, c->dtype) * (net_get(c->params[0], j, c->dtype) + net_get(c->borrowed, target * NET_D + j, c->dtype));
        llmpar_exact_sum_add((llmpar_exact_sum *)c->loss, 0.5 * (score[n] - target) * (score[n] - target));
    }
}
static void net_score_back(const net_call *c)
{
    enum { D = NET_D };
    const double *score = (const double *)c->saved;
    double *leaf = net_leaves(c, c->scratch, D + 1 + NET_V * D);
    for (int64_t n = 0; n < net_rows(c); n++) {
        double *at = leaf + net_leaf(c, n) * (D + 1 + NET_V * D), ds = (score[n] - c->targets[n]) * c->grad_scale;
        at[D] += ds;
        for (int64_t j = 0; j < D; j++) {
            double x = net_get(c->input, n * D + j, c->dtype);
            at[j] += ds * x;
            at[D + 1 + c->targets[n] * D + j] += ds * x;
            if (c->dinput) net_put(c->dinput, n * D + j, c->dtype, ds * (net_get(c->params[0], j, c->dtype) + net_get(c->borrowed, c->targets[n] * D + j, c->dtype)));
        }
    }
    net_sum(c, leaf, D + 1 + NET_V * D, 0, D, c->grads[0]);
    net_sum(c, leaf, D + 1 + NET_V * D, D, 1, c->grads[1]);
    net_sum(c, leaf, D + 1 + NET_V * D, D + 1, NET_V * D, c->borrowed_grad);
}

static llmpar_status net_host(void *arg)
{
    const net_call *c = (const net_call *)arg;
    if (c->fail) return LLMPAR_ERR_IO;
    c->run(c);
    return LLMPAR_OK;
}

static int net_fail; /* world rank + 1 whose embed backward fails; set between launches */

static llmpar_status net_enqueue(llmpar_unit_call *c, void (*run)(const net_call *c))
{
    net_call call;
    int unit = *(const int *)c->user;
    memset(&call, 0, sizeof call);
    call.run = run;
    call.dtype = c->dtype;
    call.batch = c->micro->batch, call.t = c->micro->t, call.leaves = c->micro->leaves;
    call.ids = c->micro->ids, call.targets = c->micro->targets, call.loss = c->micro->loss, call.grad_scale = (double)c->micro->grad_scale;
    int count = unit == NET_EMBED ? 1 : unit == NET_SCORE ? 2 : 3;
    for (int i = 0; i < count; i++) call.params[i] = c->params[i], call.grads[i] = c->grads ? c->grads[i] : NULL;
    if (c->borrowed) call.borrowed = c->borrowed[0];
    if (c->borrowed_grads) call.borrowed_grad = c->borrowed_grads[0];
    call.input = c->input, call.doutput = c->doutput;
    call.output = c->output, call.dinput = c->dinput, call.saved = c->saved, call.scratch = c->scratch;
    if (run == net_embed_back && net_fail == c->ctx->rank + 1) return llmpar_fail(c->ctx, LLMPAR_ERR_IO, "embed: planned failure");
    return c->device->host_call(c->device, c->stream, net_host, &call, sizeof call);
}
#define NET_OP(name) static llmpar_status name##_op(llmpar_unit_call *c) { return net_enqueue(c, name); }
NET_OP(net_embed) NET_OP(net_embed_back) NET_OP(net_scale) NET_OP(net_multiply) NET_OP(net_mix_back) NET_OP(net_score) NET_OP(net_score_back)

static llmpar_status net_sizes(void *user, const llmpar_micro *micro, llmpar_dtype dtype, llmpar_unit_sizes *out)
{
    int unit = *(const int *)user;
    size_t n = (size_t)(micro->batch * micro->t), size = llmpar_dtype_size(dtype);
    out->output = unit == NET_SCORE ? 0 : n * NET_D * size;
    out->saved = unit == NET_EMBED ? 0 : unit == NET_SCORE ? n * sizeof(double) : n * NET_D * size;
    out->scratch = (size_t)micro->leaves * (NET_D * NET_D + NET_V * NET_D + NET_T * NET_D) * sizeof(double);
    out->workspace = 0;
    return LLMPAR_OK;
}

#define NET_WHOLE { LLMPAR_REPLICATE, LLMPAR_AXIS_DP_REPLICATE, 0, 0, 0, 0, 0 }
static const llmpar_param net_embed_params[] = {{ "table", 2, 0, { NET_V, NET_D }, NET_WHOLE, 0.5, 0 }};
static const llmpar_param net_mix_params[2][3] = {
    {{ "scale0", 1, 1, { NET_D }, NET_WHOLE, 0, 0.75 }, { "w0", 2, 0, { NET_D, NET_D }, NET_WHOLE, 0.25, 0 }, { "position0", 2, 0, { NET_T, NET_D }, NET_WHOLE, 0.1, 0 }},
    {{ "scale1", 1, 1, { NET_D }, NET_WHOLE, 0, 1.25 }, { "w1", 2, 0, { NET_D, NET_D }, NET_WHOLE, 0.2, 0 }, { "position1", 2, 0, { NET_T, NET_D }, NET_WHOLE, 0.1, 0 }},
};
static const llmpar_param net_score_params[] = {{ "head", 1, 0, { NET_D }, NET_WHOLE, 0.3, 0 }, { "bias", 1, 1, { 1 }, NET_WHOLE, 0, 0 }};
static const llmpar_unit_op net_embed_f[] = {{ "look up", net_embed_op, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 }}, net_embed_b[] = {{ "rows", net_embed_back_op, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 }};
static const llmpar_unit_op net_mix_f[2][2] = {
    {{ "scale", net_scale_op, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 }, { "multiply", net_multiply_op, LLMPAR_TP_REDUCE, { 1, 0 }, 0, 1 }},
    {{ "scale", net_scale_op, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 }, { "multiply", net_multiply_op, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 }},
};
static const llmpar_unit_op net_mix_b[] = {{ "dmix", net_mix_back_op, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 }};
static const llmpar_unit_op net_score_f[] = {{ "score", net_score_op, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 }}, net_score_b[] = {{ "dscore", net_score_back_op, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 }};
static int net_index[NET_UNITS] = { NET_EMBED, NET_MIX0, NET_MIX1, NET_SCORE };

typedef struct net_job {
    llmpar_mesh_desc mesh;
    llmpar_fsdp_desc fsdp;
    llmpar_policy policy;                /* zero, shards, replicas, master, offload come from the object */
    int recompute, frozen;               /* bit u: unit u */
    int skip_nonfinite;
    int lost_rank;                       /* world rank + 1 whose offload_dir is not there; 0: none */
    double loss_scale;
    llmpar_status (*body)(const struct net_job *job, llmpar_fsdp *fsdp);
} net_job;

static void net_units(const net_job *job, llmpar_unit units[NET_UNITS])
{
    memset(units, 0, NET_UNITS * sizeof *units);
    units[0].name = "embed", units[0].params = net_embed_params, units[0].param_count = 1;
    units[0].forward = net_embed_f, units[0].forward_count = 1, units[0].backward = net_embed_b, units[0].backward_count = 1;
    for (int k = 0; k < 2; k++) {
        llmpar_unit *mix = &units[1 + k];
        mix->name = k ? "mix1" : "mix0", mix->params = net_mix_params[k], mix->param_count = 3;
        mix->forward = net_mix_f[k], mix->forward_count = 2, mix->backward = net_mix_b, mix->backward_count = 1;
    }
    units[3].name = "score", units[3].params = net_score_params, units[3].param_count = 2, units[3].borrow = 1 + NET_EMBED;
    units[3].forward = net_score_f, units[3].forward_count = 1, units[3].backward = net_score_b, units[3].backward_count = 1;
    for (int u = 0; u < NET_UNITS; u++) {
        units[u].sizes = net_sizes, units[u].user = &net_index[u];
        units[u].recompute = job->recompute >> u & 1 ? LLMPAR_RECOMPUTE_FULL : LLMPAR_RECOMPUTE_NONE;
        units[u].frozen = job->frozen >> u & 1;
    }
}

static llmpar_status net_rank(llmpar_ctx *ctx, void *user)
{
    const net_job *job = (const net_job *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_fsdp *fsdp = NULL;
    llmpar_unit units[NET_UNITS];
    llmpar_fsdp_desc desc = job->fsdp;
    net_units(job, units);
    if (job->lost_rank == ctx->rank + 1) desc.offload_dir = "there/is/no/such";
    llmpar_status status = llmpar_mesh_create(ctx, &job->mesh, &mesh);
    if (!status) status = llmpar_fsdp_create(mesh, units, NET_UNITS, &desc, &fsdp);
    if (!status) status = job->body(job, fsdp);
    llmpar_fsdp_destroy(fsdp);
    llmpar_mesh_destroy(mesh);
    return status;
}

static llmpar_status net_launch(const net_job *job, llmpar_error *error)
{
    llmpar_launch_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.ranks = (job->mesh.dp_replicate ? job->mesh.dp_replicate : 1) * (job->mesh.dp_shard ? job->mesh.dp_shard : 1);
    desc.check = test_no_leak;
    return llmpar_launch(&desc, net_rank, (void *)(uintptr_t)job, error);
}

static llmpar_status net_schedule(const net_job *job, llmpar_fsdp *fsdp, llmpar_schedule **out)
{
    llmpar_ctx *ctx = llmpar_fsdp_mesh(fsdp)->ctx;
    llmpar_unit units[NET_UNITS];
    llmpar_policy policy = job->policy;
    for (int u = 0; u < NET_UNITS; u++) units[u] = *llmpar_fsdp_unit(fsdp, u);
    llmpar_fsdp_policy(fsdp, &policy);
    llmpar_status status = llmpar_schedule_create(&ctx->heap, units, NET_UNITS, &policy, out, &ctx->error);
    if (!status) status = llmpar_schedule_validate(&ctx->heap, (*out)->list, (*out)->count, units, NET_UNITS, &(*out)->policy, &ctx->error);
    return status;
}

/* Step `step` over this rank's part of the NET_B sequences. */
static llmpar_status net_step(const net_job *job, llmpar_fsdp *fsdp, int64_t step, const llmpar_schedule *schedule, llmpar_run *run)
{
    const llmpar_mesh *mesh = llmpar_fsdp_mesh(fsdp);
    int64_t m_count = job->policy.micro_batches ? job->policy.micro_batches : 1, per = NET_B / (m_count * mesh->dp_ranks);
    int32_t ids[NET_B * NET_T], targets[NET_B * NET_T];
    llmpar_micro micro[NET_B];
    memset(micro, 0, sizeof micro);
    run->tokens = 0;
    for (int64_t m = 0, at = 0; m < m_count; m++) {
        int64_t first = job->policy.no_sync ? mesh->dp_rank * per * m_count + m * per : (m * mesh->dp_ranks + mesh->dp_rank) * per;
        micro[m].batch = micro[m].leaves = per;
        micro[m].t = NET_T;
        micro[m].ids = ids + at;
        micro[m].targets = targets + at;
        for (int64_t b = first; b < first + per; b++)
            for (int64_t t = 0; t < NET_T; t++, at++) {
                ids[at] = (int32_t)((step * 31 + b * 7 + t * 3 + b * t) % NET_V);
                targets[at] = (int32_t)((step * 17 + b * 5 + t * 2 + 1) % NET_V);
                run->tokens++;
            }
    }
    run->micro = micro;
    run->loss_scale = job->loss_scale;
    run->skip_nonfinite = job->skip_nonfinite;
    return llmpar_fsdp_run(fsdp, schedule->list, schedule->count, run);
}

/* Parameter k whole, out of a shard-sized buffer of its unit. Collective. */
static void net_whole(llmpar_fsdp *fsdp, int k, const void *shard, double *out)
{
    llmpar_dtensor tensor;
    llmpar_fsdp_dtensor(fsdp, net_all[k].unit, net_all[k].param, &tensor);
    size_t size = llmpar_dtype_size(tensor.dtype);
    const llmpar_mesh *mesh = llmpar_fsdp_mesh(fsdp);
    llmpar_device *device = mesh->ctx->device;
    llmpar_stream *stream = NULL;
    void *full = malloc(NET_MOST * size), *scratch = malloc((size_t)llmpar_dtensor_full_scratch(&tensor, mesh) * size + 1);
    CHECK_OK(device->stream_create(device, "whole", &stream));
    CHECK_OK(llmpar_dtensor_full(&tensor, mesh, stream, llmpar_fsdp_local(fsdp, net_all[k].unit, net_all[k].param, (void *)(uintptr_t)shard), scratch, full));
    CHECK_OK(device->synchronize(device, stream));
    device->stream_destroy(device, stream);
    CHECK(llmpar_convert(out, LLMPAR_F64, full, tensor.dtype, (size_t)net_all[k].count));
    free(scratch);
    free(full);
}

/* An optimizer with two arrays: m = m/2 + g*scale, v += m*m; p -= m/4. In stream order. */
typedef struct net_optimizer { int begun, updates; double norm; } net_optimizer;
typedef struct net_update { llmpar_dtype dtype; int64_t begin, count; void *p, *m, *v; const void *g; double scale; } net_update;

static llmpar_status net_update_host(void *arg)
{
    const net_update *u = (const net_update *)arg;
    for (int64_t i = u->begin; i < u->begin + u->count; i++) {
        double m = net_round(0.5 * net_get(u->m, i, u->dtype) + net_get(u->g, i, u->dtype) * u->scale, u->dtype);
        net_put(u->m, i, u->dtype, m);
        net_put(u->v, i, u->dtype, net_get(u->v, i, u->dtype) + m * m);
        net_put(u->p, i, u->dtype, net_get(u->p, i, u->dtype) - 0.25 * m);
    }
    return LLMPAR_OK;
}
static llmpar_status net_optimizer_begin(void *state, double norm, double *scale)
{
    net_optimizer *o = (net_optimizer *)state;
    o->begun++;
    o->norm = norm;
    *scale = 0.5;
    return LLMPAR_OK;
}
static llmpar_device *net_device_of(const llmpar_update *u);
static llmpar_status net_optimizer_update(void *state, const llmpar_update *u)
{
    llmpar_status status = LLMPAR_OK;
    ((net_optimizer *)state)->updates++;
    if (!u->state[0] || !u->state[1] || !u->param || !u->grad) TEST_FAIL("unit %d: an update without its buffers", (int)u->unit);
    for (int32_t s = 0; s < u->segment_count && !status; s++) {
        net_update job;
        memset(&job, 0, sizeof job);
        job.dtype = u->dtype, job.begin = u->segments[s].begin, job.count = u->segments[s].count;
        job.p = u->param, job.m = u->state[0], job.v = u->state[1], job.g = u->grad, job.scale = u->grad_scale;
        llmpar_device *device = net_device_of(u);
        status = device->host_call(device, u->stream, net_update_host, &job, sizeof job);
    }
    return status;
}
static __thread llmpar_device *net_device; /* of the rank on this thread */
static llmpar_device *net_device_of(const llmpar_update *u) { return u->device ? u->device : net_device; }

/* What all policies have to agree in. */
typedef struct net_result { int known; double loss[NET_STEPS], norm[NET_STEPS], p[NET_PARAMS][NET_MOST], m[NET_PARAMS][NET_MOST], g[NET_PARAMS][NET_MOST]; } net_result;
static net_result net_reference; /* written by the first job after it was cleared: one rank */

static llmpar_status net_look(void *user, llmpar_fsdp *fsdp, int32_t unit, const void *shard)
{
    net_result *r = (net_result *)user;
    for (int k = 0; k < NET_PARAMS; k++)
        if (net_all[k].unit == unit) net_whole(fsdp, k, shard, r->g[k]);
    return LLMPAR_OK;
}

static llmpar_status net_train(const net_job *job, llmpar_fsdp *fsdp)
{
    net_result *r = (net_result *)calloc(1, sizeof *r);
    net_optimizer state = { 0, 0, 0 };
    llmpar_optimizer table = { &state, net_optimizer_begin, net_optimizer_update };
    llmpar_schedule *schedule = NULL;
    int trained = 0;
    for (int u = 0; u < NET_UNITS; u++) trained += !(job->frozen >> u & 1);
    net_device = llmpar_fsdp_mesh(fsdp)->ctx->device;
    llmpar_status status = net_schedule(job, fsdp, &schedule);
    for (int i = 0; i < NET_STEPS && !status; i++) {
        llmpar_run run;
        memset(&run, 0, sizeof run);
        run.optimizer = &table;
        run.on_gradient = net_look;
        run.on_gradient_user = r;
        status = net_step(job, fsdp, i, schedule, &run);
        r->loss[i] = run.loss;
        r->norm[i] = run.grad_norm;
        CHECK_INT(run.found_inf + run.skipped, 0);
        if (!status) CHECK_INT(run.global_tokens, NET_B * NET_T);
    }
    if (!status) CHECK_INT(state.begun, NET_STEPS);
    if (!status) CHECK_INT(state.updates, NET_STEPS * trained);
    for (int k = 0; k < NET_PARAMS && !status; k++) {
        void *shard = llmpar_fsdp_shard(fsdp, net_all[k].unit, NULL, NULL, NULL), *m = llmpar_fsdp_optimizer_state(fsdp, net_all[k].unit, 0);
        CHECK(shard != NULL && (m != NULL || job->frozen >> net_all[k].unit & 1));
        net_whole(fsdp, k, shard, r->p[k]);
        if (m) net_whole(fsdp, k, m, r->m[k]);
        CHECK_OK(llmpar_fsdp_shard_done(fsdp, net_all[k].unit, 0));
        CHECK_OK(llmpar_fsdp_optimizer_done(fsdp, net_all[k].unit, 0));
    }
    llmpar_arena_usage usage;
    llmpar_arena_get_usage(llmpar_fsdp_arena(fsdp), &usage);
    CHECK_INT(usage.live[LLMPAR_TAG_GATHERED] + usage.live[LLMPAR_TAG_GRADIENTS] + usage.live[LLMPAR_TAG_ACTIVATIONS] + usage.live[LLMPAR_TAG_WORKSPACE], 0);
    if (job->fsdp.offload[LLMPAR_STATE_OPTIMIZER] && job->fsdp.offload[LLMPAR_STATE_PARAMS]) CHECK_INT(usage.live[LLMPAR_TAG_OPTIMIZER], 0);
    net_result *want = &net_reference;
    if (!status && want->known) {
        for (int i = 0; i < NET_STEPS; i++) {
            if (r->loss[i] != want->loss[i]) TEST_FAIL("step %d: loss %.17g, one rank %.17g", i, r->loss[i], want->loss[i]);
            if (job->policy.update != LLMPAR_UPDATE_INSIDE && r->norm[i] != want->norm[i]) TEST_FAIL("step %d: norm %.17g, one rank %.17g", i, r->norm[i], want->norm[i]);
        }
        for (int k = 0; k < NET_PARAMS; k++) {
            if (memcmp(r->g[k], want->g[k], sizeof r->g[k])) TEST_FAIL("the gradient of %s differs from one rank", net_all[k].name);
            if (memcmp(r->p[k], want->p[k], sizeof r->p[k])) TEST_FAIL("%s differs from one rank", net_all[k].name);
            if (memcmp(r->m[k], want->m[k], sizeof r->m[k])) TEST_FAIL("the optimizer's array of %s differs from one rank", net_all[k].name);
        }
    } else if (!status) {
        *want = *r;
        want->known = 1;
    }
    llmpar_schedule_destroy(schedule);
    free(r);
    return status;
}

static void net_launch_ok(const net_job *job, const char *row)
{
    llmpar_error error;
    int before = test_failures;
    if (net_launch(job, &error)) TEST_FAIL("rank %d (%s): %s", error.rank, error.where, error.text);
    if (test_failures != before) fprintf(stderr, "  (%s)\n", row);
}

static const llmpar_mesh_desc net_meshes[] = { { 1, 1, 1, 1, 1 }, { 1, 2, 1, 1, 1 }, { 1, 4, 1, 1, 1 }, { 2, 2, 1, 1, 1 }, { 4, 1, 1, 1, 1 } };
enum { NET_MESHES = 5 };

static net_job net_job_of(int mesh, llmpar_dtype dtype)
{
    net_job job;
    memset(&job, 0, sizeof job);
    job.mesh = net_meshes[mesh];
    job.fsdp.dtype = dtype;
    job.fsdp.seed = 5;
    job.fsdp.optimizer_states = 2;
    job.body = net_train;
    return job;
}

/* Two steps, nothing looked at. */
static llmpar_status net_two_steps(const net_job *job, llmpar_fsdp *fsdp)
{
    net_optimizer state = { 0, 0, 0 };
    llmpar_optimizer table = { &state, net_optimizer_begin, net_optimizer_update };
    llmpar_schedule *schedule = NULL;
    net_device = llmpar_fsdp_mesh(fsdp)->ctx->device;
    llmpar_status status = net_schedule(job, fsdp, &schedule);
    for (int i = 0; i < 2 && !status; i++) {
        llmpar_run run;
        memset(&run, 0, sizeof run);
        run.optimizer = &table;
        status = net_step(job, fsdp, i, schedule, &run);
    }
    llmpar_schedule_destroy(schedule);
    return status;
}
