/* What the Llama's units promise whoever runs them, without FSDP: the units are walked by hand, as the executor would. However blocks are wrapped into units, whatever is kept or computed again, however the logits are cut, on every
   number of tp ranks, with or without sequence parallelism, in f32, bf16 and f16: the same bits. Frozen units cost nothing and change nothing. And bf16 says of a trained model what f32 says. */
#include "test.h"
#include <math.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define FEWER 1
#else
#define FEWER 0
#endif

enum { MOST_UNITS = 16, SEQUENCES = 4, T = 8, ROWS = SEQUENCES * T };

/* Everything a walk gives. gradient: all parameters, whole, one after the other in the model's order, which no wrapping changes. */
typedef struct result { char *gradient; llmpar_exact_sum loss; double token_loss[512]; int products, weight_products; } result;

typedef struct job {
    llmpar_llama_config config;
    const char *directory;        /* weights, else random ones */
    const int32_t *ids, *targets;
    int64_t sequences, t, leaves;
    llmpar_dtype dtype;
    int32_t tp, sequence_parallel, wrap;
    llmpar_recompute recompute;
    int64_t logits_bytes;
    uint32_t frozen;              /* bit u: unit u */
    int order;                    /* of the two streams */
    result *out;
    size_t peak_saved;            /* bytes, out: what all units keep together */
} job;

static void *take(size_t count, size_t size)
{
    void *p = calloc(count ? count : 1, size);
    if (!p) { fprintf(stderr, "out of memory\n"); exit(1); }
    return p;
}

/* Memory that nobody has written: reading it shows. */
static void *raw(llmpar_device *device, size_t bytes)
{
    void *p = NULL;
    CHECK_OK(device->alloc(device, bytes, &p));
    if (p && bytes) memset(p, 0xff, bytes); /* NaN in every floating type */
    return p;
}

/* ---- parameters: whole in f64, this rank's part in the dtype ---- */

static int64_t extent(const llmpar_param *p) { return p->shape[0] * (p->dims == 2 ? p->shape[1] : 1); }

static void whole_param(const job *j, const llmpar_safetensors *file, const llmpar_param *p, double *out)
{
    int64_t n = extent(p);
    if (file) {
        const llmpar_safetensor *t = llmpar_safetensors_find(file, p->name);
        void *copy = take(t ? t->bytes : 0, 1);
        if (t) CHECK_OK(llmpar_safetensors_read(file, t, 0, t->bytes, copy, NULL));
        CHECK(t && llmpar_convert(out, LLMPAR_F64, copy, t->dtype, (size_t)n));
        free(copy);
        return;
    }
    uint64_t key = 1469598103934665603u; /* of the name */
    for (const char *c = p->name; *c; c++) key = (key ^ (unsigned char)*c) * 1099511628211u;
    for (int64_t i = 0; i < n; i++) {
        uint64_t x = (key + (uint64_t)i) * 0x9e3779b97f4a7c15u;
        x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93u;
        out[i] = (p->dims == 1) + ((double)(x >> 40) / (1 << 23) - 1) * (p->dims == 1 ? 0.3 : 3 * j->config.init_std);
    }
}

/* Rows and columns [r0, r1) x [c0, c1) of the whole tensor are this rank's. */
static void mine(const llmpar_tp *tp, const llmpar_param *p, int64_t *r0, int64_t *r1, int64_t *c0, int64_t *c1)
{
    *r0 = *c0 = 0;
    *r1 = p->shape[0];
    *c1 = p->dims == 2 ? p->shape[1] : 1;
    if (p->tp.kind != LLMPAR_SHARD) return;
    int64_t grains = p->shape[p->tp.dim] / p->tp.grain, begin = p->tp.replicas > 1 ? tp->rank / p->tp.replicas : llmpar_tp_begin(tp, grains), count = p->tp.replicas > 1 ? 1 : llmpar_tp_count(tp, grains);
    *(p->tp.dim ? c0 : r0) = begin * p->tp.grain;
    *(p->tp.dim ? c1 : r1) = (begin + count) * p->tp.grain;
}

static int64_t local_extent(const llmpar_tp *tp, const llmpar_param *p)
{
    int64_t r0, r1, c0, c1;
    mine(tp, p, &r0, &r1, &c0, &c1);
    return (r1 - r0) * (c1 - c0);
}

static void cut(const llmpar_tp *tp, const llmpar_param *p, const double *whole, llmpar_dtype dtype, void *local)
{
    int64_t r0, r1, c0, c1, columns = p->dims == 2 ? p->shape[1] : 1;
    mine(tp, p, &r0, &r1, &c0, &c1);
    for (int64_t r = r0; r < r1; r++) llmpar_convert((char *)local + (size_t)((r - r0) * (c1 - c0)) * llmpar_dtype_size(dtype), dtype, whole + r * columns + c0, LLMPAR_F64, (size_t)(c1 - c0));
}

/* The other way; of ranks that hold the same, the first speaks. */
static void join(const llmpar_tp *tp, const llmpar_param *p, const void *local, size_t size, char *whole)
{
    int64_t r0, r1, c0, c1, columns = p->dims == 2 ? p->shape[1] : 1;
    if (tp->rank % (p->tp.kind != LLMPAR_SHARD ? tp->ranks : p->tp.replicas > 1 ? p->tp.replicas : 1)) return;
    mine(tp, p, &r0, &r1, &c0, &c1);
    for (int64_t r = r0; r < r1; r++) memcpy(whole + (size_t)(r * columns + c0) * size, (const char *)local + (size_t)((r - r0) * (c1 - c0)) * size, (size_t)(c1 - c0) * size);
}

/* ---- the walk ---- */

static int products, weight_products;
typedef llmpar_status (*gemm_fn)(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args);
static gemm_fn real_gemm;
static llmpar_status counted_gemm(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args)
{
    __atomic_add_fetch(args->kind == LLMPAR_GEMM_TN ? &weight_products : &products, 1, __ATOMIC_RELAXED);
    gemm_fn gemm;
    __atomic_load(&real_gemm, &gemm, __ATOMIC_RELAXED);
    return gemm(device, stream, args);
}

/* Two streams promise no more than the waits say: an order of their own, then the compute stream as far ahead as it can be, then the tp stream. */
enum { AS_LISTED = 0, COMPUTE_AHEAD = 1, TP_AHEAD = 2 };

static llmpar_status run_ops(const llmpar_unit *unit, const llmpar_unit_op *ops, int32_t count, int order, llmpar_unit_call *call)
{
    enum { MOST = 160 };
    char done[MOST] = { 0 };
    int32_t next[2] = { 0, 0 }, first_tp = 0; /* of the compute and the tp stream */
    CHECK(count <= MOST);
    while (first_tp < count && ops[first_tp].kind == LLMPAR_COMPUTE) first_tp++;
    for (;;) {
        int32_t take_it = -1;
        for (int k = 0; k < 2; k++) {
            int stream = order == COMPUTE_AHEAD ? k : 1 - k, ready = 1;
            int32_t *at = &next[stream];
            while (*at < count && (done[*at] || (ops[*at].kind != LLMPAR_COMPUTE) != stream)) ++*at;
            if (*at == count) continue;
            for (int w = 0; w < 2; w++) {
                CHECK(ops[*at].wait[w] >= 0 && ops[*at].wait[w] <= *at);
                if (ops[*at].wait[w] && !done[ops[*at].wait[w] - 1]) ready = 0;
            }
            if (*at == first_tp) /* the executor: what was enqueued before the tp stream's first instruction is complete */
                for (int32_t i = 0; i < first_tp; i++) ready &= done[i];
            if (ready && (take_it < 0 || (order == AS_LISTED && *at < take_it))) take_it = *at;
        }
        if (take_it < 0) break;
        done[take_it] = 1;
        if (call->pass == LLMPAR_PASS_RECOMPUTE && ops[take_it].output_only) continue;
        call->index = ops[take_it].index;
        llmpar_status status = ops[take_it].run(call);
        if (status) {
            fprintf(stderr, "%s: %s\n", unit->name, ops[take_it].name);
            return status;
        }
    }
    CHECK(next[0] == count && next[1] == count);
    return LLMPAR_OK;
}

static llmpar_status pass(llmpar_ctx *ctx, const llmpar_unit *unit, const llmpar_micro *micro, llmpar_pass which, const llmpar_unit_sizes *sizes, int order, llmpar_unit_call *call)
{
    llmpar_device *device = ctx->device;
    call->ctx = ctx;
    call->device = device;
    call->user = unit->user;
    call->micro = micro;
    call->pass = which;
    call->recompute = unit->recompute;
    call->scratch = raw(device, sizes->scratch);
    call->workspace = raw(device, sizes->workspace);
    call->workspace_bytes = sizes->workspace;
    llmpar_status status = which == LLMPAR_PASS_BACKWARD ? run_ops(unit, unit->backward, unit->backward_count, order, call) : run_ops(unit, unit->forward, unit->forward_count, order, call);
    device->free(device, call->scratch, sizes->scratch);
    device->free(device, call->workspace, sizes->workspace);
    return status;
}

static llmpar_status walk(llmpar_ctx *ctx, llmpar_llama *model, job *j)
{
    llmpar_device *device = ctx->device;
    const llmpar_tp *tp = llmpar_llama_tp(model);
    int32_t n;
    llmpar_unit *units = llmpar_llama_units(model, &n);
    size_t size = llmpar_dtype_size(j->dtype), sum_size = llmpar_dtype_size(llmpar_dtype_sum(j->dtype));
    void **params[MOST_UNITS], **grads[MOST_UNITS], *borrowed_grad[1] = { NULL }, *output[MOST_UNITS] = { NULL }, *saved[MOST_UNITS] = { NULL }, *dinput[MOST_UNITS + 1] = { NULL };
    llmpar_unit_sizes sizes[MOST_UNITS];
    llmpar_safetensors *file = NULL;
    llmpar_micro micro;
    llmpar_exact_sum *loss = (llmpar_exact_sum *)take(1, sizeof *loss);
    int32_t counted = 0;
    llmpar_status status = LLMPAR_OK;
    CHECK(n <= MOST_UNITS);
    if (j->directory) {
        char path[1024];
        snprintf(path, sizeof path, "%s/model.safetensors", j->directory);
        status = llmpar_safetensors_open(&ctx->heap, NULL, path, &file, &ctx->error);
        if (status) return status;
    }
    memset(&micro, 0, sizeof micro);
    micro.batch = j->sequences;
    micro.t = j->t;
    micro.leaves = j->leaves;
    micro.ids = j->ids;
    micro.targets = j->targets;
    for (int64_t i = 0; i < j->sequences * j->t; i++) counted += j->targets[i] >= 0;
    micro.grad_scale = (float)(64.0 / counted);
    micro.loss = loss->limb;
    double *token_loss = (double *)take((size_t)(j->sequences * j->t), sizeof *token_loss);
    micro.token_loss = token_loss;
    for (int32_t u = 0; u < n; u++) {
        params[u] = (void **)take((size_t)units[u].param_count, sizeof(void *));
        grads[u] = (void **)take((size_t)units[u].param_count, sizeof(void *));
        if (u > 0 && u + 1 < n) units[u].recompute = j->recompute;
        for (int32_t p = 0; p < units[u].param_count; p++) {
            const llmpar_param *param = &units[u].params[p];
            double *whole = (double *)take((size_t)extent(param), sizeof *whole);
            whole_param(j, file, param, whole);
            params[u][p] = raw(device, (size_t)local_extent(tp, param) * size);
            grads[u][p] = raw(device, (size_t)local_extent(tp, param) * sum_size);
            cut(tp, param, whole, j->dtype, params[u][p]);
            free(whole);
        }
        memset(&sizes[u], 0, sizeof sizes[u]);
        sizes[u].recompute = (int32_t)units[u].recompute;
        if (!status) status = units[u].sizes(units[u].user, &micro, j->dtype, &sizes[u]);
        if (ctx->rank == 0) j->peak_saved += sizes[u].saved;
    }
    borrowed_grad[0] = raw(device, (size_t)local_extent(tp, &units[0].params[0]) * sum_size);
    int32_t first = 0; /* trained unit */
    while (first < n && (j->frozen >> first & 1)) first++;
    for (int32_t u = 0; u < n && !status; u++) {
        llmpar_unit_call call;
        memset(&call, 0, sizeof call);
        call.dtype = j->dtype;
        call.params = params[u];
        if (units[u].borrow) call.borrowed = params[units[u].borrow - 1];
        call.input = u ? output[u - 1] : NULL;
        call.output = output[u] = raw(device, sizes[u].output);
        call.saved = saved[u] = raw(device, sizes[u].saved);
        status = pass(ctx, &units[u], &micro, LLMPAR_PASS_FORWARD, &sizes[u], j->order, &call);
    }
    for (int32_t u = n; u-- > 0 && !status;) {
        llmpar_unit_call call;
        int32_t lender = units[u].borrow - 1;
        int here = !(j->frozen >> u & 1), before = first < u, there = lender >= 0 && !(j->frozen >> lender & 1);
        memset(&call, 0, sizeof call);
        call.dtype = j->dtype;
        call.params = params[u];
        if (lender >= 0) call.borrowed = params[lender];
        call.input = u ? output[u - 1] : NULL;
        call.saved = saved[u];
        if (units[u].recompute == LLMPAR_RECOMPUTE_FULL && (here || before)) {
            memset(saved[u], 0xff, sizes[u].saved);
            if (u + 1 < n) memset(output[u], 0xff, sizes[u].output);
            status = pass(ctx, &units[u], &micro, LLMPAR_PASS_RECOMPUTE, &sizes[u], j->order, &call);
        }
        call.grads = here ? grads[u] : NULL;
        call.borrowed_grads = there ? borrowed_grad : NULL;
        call.doutput = dinput[u + 1];
        if (before) call.dinput = dinput[u] = raw(device, sizes[u - 1].output);
        if (!status && (here || before || there)) status = pass(ctx, &units[u], &micro, LLMPAR_PASS_BACKWARD, &sizes[u], j->order, &call);
        else if (u) dinput[u] = raw(device, sizes[u - 1].output);
    }
    size_t at = 0;
    for (int32_t u = 0; u < n; u++)
        for (int32_t p = 0; p < units[u].param_count; p++) {
            const llmpar_param *param = &units[u].params[p];
            int untouched = 1;
            size_t bytes = (size_t)local_extent(tp, param) * sum_size;
            for (size_t i = 0; i < bytes; i++) untouched &= ((unsigned char *)grads[u][p])[i] == 0xff;
            if (!status && bytes) CHECK_INT(untouched, j->frozen >> u & 1);
            if (!status) join(tp, param, grads[u][p], sum_size, j->out->gradient + at);
            at += (size_t)extent(param) * sum_size;
        }
    if (!status && units[n - 1].borrow) join(tp, &units[0].params[0], borrowed_grad[0], sum_size, j->out->gradient + at);
    if (!status && ctx->rank == 0) {
        j->out->loss = *loss;
        for (int64_t i = 0; i < j->sequences * j->t && i < 512; i++) j->out->token_loss[i] = token_loss[i];
    }
    for (int32_t u = 0; u < n; u++) {
        for (int32_t p = 0; p < units[u].param_count; p++) {
            device->free(device, params[u][p], (size_t)local_extent(tp, &units[u].params[p]) * size);
            device->free(device, grads[u][p], (size_t)local_extent(tp, &units[u].params[p]) * sum_size);
        }
        device->free(device, output[u], sizes[u].output);
        device->free(device, saved[u], sizes[u].saved);
        if (u) device->free(device, dinput[u], sizes[u - 1].output);
        free(params[u]);
        free(grads[u]);
    }
    device->free(device, borrowed_grad[0], (size_t)local_extent(tp, &units[0].params[0]) * sum_size);
    llmpar_safetensors_close(file);
    free(token_loss);
    free(loss);
    return status;
}

static llmpar_status run_rank(llmpar_ctx *ctx, void *user)
{
    job *j = (job *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_llama *model = NULL;
    llmpar_mesh_desc mesh_desc = { .tp = j->tp };
    llmpar_llama_desc desc = { .config = &j->config, .wrap = j->wrap, .logits_bytes = j->logits_bytes };
    llmpar_llama_apply_desc apply = { .sequence_parallel = j->sequence_parallel, .dtype = j->dtype, .positions = j->t };
    gemm_fn gemm = ctx->device->gemm;
    __atomic_store(&real_gemm, &gemm, __ATOMIC_RELAXED);
    ctx->device->gemm = counted_gemm;
    llmpar_status status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_llama_create(ctx, &desc, &model);
    if (!status) status = llmpar_llama_apply(model, mesh->comm[LLMPAR_AXIS_TP], &apply);
    if (!status) status = walk(ctx, model, j);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    return status;
}

static size_t gradient_bytes(const job *j)
{
    return (size_t)(llmpar_llama_param_count(&j->config) + (j->config.tied ? (int64_t)j->config.vocab * j->config.hidden : 0)) * llmpar_dtype_size(llmpar_dtype_sum(j->dtype));
}

static void run(job *j, result *out)
{
    llmpar_error error;
    llmpar_launch_desc desc = { .ranks = j->tp };
    memset(out, 0, sizeof *out);
    out->gradient = (char *)take(gradient_bytes(j), 1);
    j->out = out;
    j->peak_saved = 0;
    products = weight_products = 0;
    if (llmpar_launch(&desc, run_rank, j, &error)) TEST_FAIL("rank %d (%s): %s", error.rank, error.where, error.text);
    out->products = products;
    out->weight_products = weight_products;
}

/* ---- the same bits ---- */

static int32_t ids[ROWS], targets[ROWS];

static void describe(job *j, llmpar_dtype dtype, int tied)
{
    static const llmpar_llama_config config = { .vocab = 259, .hidden = 40, .intermediate = 52, .layers = 3, .heads = 8, .kv_heads = 2, .head_dim = 6, .max_positions = T, .rms_eps = 1e-5, .rope_theta = 1e4, .bos_id = -1, .init_std = 0.06 };
    llmpar_rng rng = llmpar_rng_key(11, LLMPAR_RNG_USER, "ids", 0, 0);
    memset(j, 0, sizeof *j);
    j->config = config;
    j->config.tied = tied;
    for (int i = 0; i < ROWS; i++) {
        ids[i] = (int32_t)(llmpar_rng_uniform(&rng, (uint64_t)(2 * i)) * config.vocab);
        targets[i] = i % 7 == 3 ? -1 : (int32_t)(llmpar_rng_uniform(&rng, (uint64_t)(2 * i + 1)) * config.vocab);
    }
    j->ids = ids;
    j->targets = targets;
    j->sequences = SEQUENCES;
    j->t = T;
    j->leaves = SEQUENCES;
    j->dtype = dtype;
    j->tp = 1;
}

static void check_same(const job *j, const result *got, const result *want, const char *what)
{
    size_t bytes = gradient_bytes(j), at = 0, size = llmpar_dtype_size(llmpar_dtype_sum(j->dtype));
    while (at < bytes && got->gradient[at] == want->gradient[at]) at++;
    if (at < bytes || memcmp(&got->loss, &want->loss, sizeof got->loss) || memcmp(got->token_loss, want->token_loss, sizeof got->token_loss))
        TEST_FAIL("%s: %s tp %d sp %d wrap %d recompute %d logits %lld order %d tied %d: %s differs (gradient element %lld), loss %.17g, want %.17g", what, llmpar_dtype_name(j->dtype), j->tp, j->sequence_parallel, j->wrap, (int)j->recompute, (long long)j->logits_bytes,
                  j->order, j->config.tied, at < bytes ? "a gradient" : "the loss", at < bytes ? (long long)(at / size) : -1, llmpar_exact_sum_value(&got->loss), llmpar_exact_sum_value(&want->loss));
}

static void same_bits(llmpar_dtype dtype)
{
    static const int32_t wraps[] = { 0, LLMPAR_WRAP_HALF, 2, 8 };
    static const int64_t cuts[] = { 0, 1, 3000 }; /* whole; a row and a column; some of each */
    int count = 0, every = FEWER || getenv("LLMPAR_TEST_QUICK") ? 29 : dtype == LLMPAR_F32 || dtype == LLMPAR_BF16 ? 5 : 7; /* no divisor of 4, 3 or 3: all combinations of any two */
    for (int tied = 0; tied < 2; tied++) {
        job j;
        result want, got;
        describe(&j, dtype, tied);
        if (dtype == LLMPAR_F32 || dtype == LLMPAR_F16) j.config.family = tied == (dtype == LLMPAR_F32) ? LLMPAR_FAMILY_QWEN3 : LLMPAR_FAMILY_QWEN2;
        run(&j, &want);
        CHECK(llmpar_exact_sum_value(&want.loss) > 0);
        for (int tp = 1; tp <= 8; tp *= 2)
            for (int sp = 0; sp <= (tp > 1); sp++)
                for (int w = 0; w < 4; w++)
                    for (int r = 0; r < 3; r++)
                        for (int c = 0; c < 3; c++) {
                            if (count++ % every) continue;
                            j.tp = tp;
                            j.sequence_parallel = sp;
                            j.wrap = wraps[w];
                            j.recompute = (llmpar_recompute)r;
                            j.logits_bytes = cuts[c];
                            j.order = (j.order + 1) % 3;
                            run(&j, &got);
                            check_same(&j, &got, &want, "same bits");
                            free(got.gradient);
                        }
        free(want.gradient);
    }
}

TEST(same_bits_f32) { same_bits(LLMPAR_F32); }
TEST(same_bits_bf16) { same_bits(LLMPAR_BF16); }
TEST(same_bits_f16) { same_bits(LLMPAR_F16); }
TEST(same_bits_f64) { same_bits(LLMPAR_F64); }

/* ---- frozen units ---- */

TEST(frozen_units)
{
    static const uint32_t masks[] = { 0x01, 0x1e, 0x0f, 0x1f & ~4u, 0x06, 0x10 }; /* embed, 3 blocks, head */
    for (int tied = 0; tied < 2; tied++)
        for (int tp = 1; tp <= 4; tp *= 4)
            for (int sp = 0; sp <= (tp > 1); sp++)
                for (int m = 0; m < 6; m++)
                    for (int r = FEWER ? m % 3 : 0; r < (FEWER ? m % 3 + 1 : 3); r++) {
                        job j;
                        result all, some;
                        describe(&j, LLMPAR_F32, tied);
                        j.tp = tp;
                        j.sequence_parallel = sp;
                        j.recompute = (llmpar_recompute)r;
                        j.order = (m + r) % 3;
                        if (m % 2) j.logits_bytes = 3000;
                        run(&j, &all);
                        j.frozen = masks[m];
                        run(&j, &some);
                        /* A trained unit's gradient has the bits it always had; a frozen one's was not touched (walk) and costs no product. */
                        size_t at = 0, unit[5], counts[5], size = 4;
                        const llmpar_llama_config *c = &j.config;
                        size_t d = (size_t)c->hidden, block = 2 * d + 2 * d * (size_t)((c->heads + c->kv_heads) * c->head_dim) + 3 * d * (size_t)c->intermediate;
                        for (int u = 0; u < 5; u++) {
                            counts[u] = u == 0 ? d * (size_t)c->vocab : u < 4 ? block : d + (tied ? 0 : d * (size_t)c->vocab);
                            unit[u] = at;
                            at += counts[u];
                        }
                        CHECK_INT(at * size + (tied ? counts[0] * size : 0), gradient_bytes(&j));
                        int lost = 0, head_parts = all.weight_products / tp - 3 * 7;
                        for (int u = 0; u < 5; u++)
                            if (!(j.frozen >> u & 1)) CHECK_BYTES(some.gradient + unit[u] * size, all.gradient + unit[u] * size, counts[u] * size);
                            else lost += u == 0 ? 0 : u < 4 ? 7 : tied ? 0 : head_parts;
                        if (tied && (j.frozen & 1)) lost += head_parts;
                        CHECK_INT(all.weight_products - some.weight_products, lost * tp);
                        CHECK(some.products <= all.products);
                        if (m == 2) CHECK(some.products < all.products); /* the head alone: nothing is handed on to the blocks */
                        free(all.gradient);
                        free(some.gradient);
                    }
}

/* ---- what is kept ---- */

TEST(selective_keeps_less)
{
    job j;
    result r;
    size_t kept[3];
    for (int mode = 0; mode < 2; mode++) {
        describe(&j, LLMPAR_F32, 0);
        j.recompute = (llmpar_recompute)mode;
        run(&j, &r);
        kept[mode] = j.peak_saved;
        free(r.gradient);
    }
    /* two norm outputs [N,D] a block */
    CHECK_INT(kept[0] - kept[1], 3 * 2 * ROWS * 40 * 4);
}

/* ---- logits are never whole ---- */

static llmpar_status check_head(llmpar_ctx *ctx, void *user)
{
    llmpar_llama_config config;
    llmpar_mesh *mesh = NULL;
    llmpar_mesh_desc mesh_desc = { 0 };
    int64_t logits = (int64_t)128256 * 8192 * 2, bytes[4] = { 1, (int64_t)64 << 20, 0, logits };
    size_t total[4];
    (void)user;
    CHECK_OK(llmpar_llama_preset("1b", &config, &ctx->error));
    CHECK_INT(config.vocab, 128256);
    llmpar_status status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    for (int k = 0; k < 4 && !status; k++) {
        llmpar_llama *model = NULL;
        llmpar_llama_desc desc = { .config = &config, .logits_bytes = bytes[k] };
        llmpar_llama_apply_desc apply = { .dtype = LLMPAR_BF16, .positions = 8192 };
        llmpar_unit_sizes sizes;
        llmpar_micro micro;
        int32_t n;
        memset(&sizes, 0, sizeof sizes);
        memset(&micro, 0, sizeof micro);
        micro.batch = micro.leaves = 1;
        micro.t = 8192;
        status = llmpar_llama_create(ctx, &desc, &model);
        if (!status) status = llmpar_llama_apply(model, mesh->comm[LLMPAR_AXIS_TP], &apply);
        const llmpar_unit *units = status ? NULL : llmpar_llama_units(model, &n);
        if (!status) status = units[n - 1].sizes(units[n - 1].user, &micro, LLMPAR_BF16, &sizes);
        total[k] = sizes.saved + sizes.scratch;
        llmpar_llama_destroy(model);
    }
    llmpar_mesh_destroy(mesh);
    if (status) return status;
    CHECK(total[1] - total[0] <= (size_t)64 << 20);
    CHECK(total[1] - total[0] > (size_t)60 << 20);
    CHECK(total[2] - total[0] <= (size_t)256 << 20); /* the default */
    CHECK(total[2] - total[0] > (size_t)240 << 20);
    CHECK(total[3] - total[0] > (size_t)logits - ((size_t)1 << 20));
    return LLMPAR_OK;
}

TEST(logits_are_never_whole)
{
    llmpar_error error;
    llmpar_launch_desc desc = { .ranks = 1 };
    if (llmpar_launch(&desc, check_head, NULL, &error)) TEST_FAIL("%s", error.text);
    /* The price where there are several leaves: 4 products of all rows and the vocabulary instead of 3. */
    job j;
    result whole, parts;
    describe(&j, LLMPAR_F32, 0);
    run(&j, &whole);
    j.logits_bytes = 130 * 32 * 4; /* half the rows, half the columns */
    run(&j, &parts);
    CHECK_INT(parts.products - whole.products, (2 + 2 + 2) - (1 + 1)); /* of halves: logits, dx, logits again; instead of logits, dx */
    CHECK_INT(parts.weight_products - whole.weight_products, 1);
    free(whole.gradient);
    free(parts.gradient);
}

/* Of one leaf the weights' gradient goes on from part to part: no product more than with whole logits, and the same bits. */
TEST(parts_of_one_leaf)
{
    enum { ONE = 300 }; /* parts of 64 rows and one of 44 */
    static int32_t ids_of_one[ONE], targets_of_one[ONE];
    static const llmpar_dtype dtypes[] = { LLMPAR_F32, LLMPAR_BF16, LLMPAR_F16, LLMPAR_F64 };
    for (int i = 0; i < ONE; i++) ids_of_one[i] = i * 37 % 259, targets_of_one[i] = i % 11 == 5 ? -1 : (i * 53 + 7) % 259;
    for (int d = 0; d < 4; d++)
        for (int tied = 0; tied < 2; tied++) {
            job j;
            result whole, parts;
            describe(&j, dtypes[d], tied);
            j.config.max_positions = ONE;
            j.ids = ids_of_one;
            j.targets = targets_of_one;
            j.sequences = j.leaves = 1;
            j.t = ONE;
            run(&j, &whole);
            for (int way = 0; way < 3; way++) {
                j.tp = way ? 4 : 1;
                j.sequence_parallel = way == 2;
                j.logits_bytes = (int64_t)(259 + 3) / j.tp * (int64_t)llmpar_dtype_size(dtypes[d]) * 100;
                run(&j, &parts);
                check_same(&j, &parts, &whole, "parts of one leaf");
                free(parts.gradient);
                if (!way) CHECK_INT(parts.products - whole.products, (5 + 5) - (1 + 1));
                if (!way) CHECK_INT(parts.weight_products - whole.weight_products, 5 - 1);
                j.frozen = 0x0f; /* the head alone is trained: nothing is handed down */
                run(&j, &parts);
                CHECK_BYTES(&parts.loss, &whole.loss, sizeof whole.loss);
                free(parts.gradient);
                j.frozen = 0;
            }
            free(whole.gradient);
            j.tp = 1; /* one token: logits are whole, whatever is allowed */
            j.sequence_parallel = 0;
            j.t = 1;
            j.logits_bytes = 0;
            run(&j, &whole);
            j.logits_bytes = 400;
            run(&j, &parts);
            check_same(&j, &parts, &whole, "one token");
            free(parts.gradient);
            free(whole.gradient);
        }
}

/* ---- a trained model in half precision ---- */

static double cosine(const float *a, const float *b, size_t n)
{
    double ab = 0, aa = 0, bb = 0;
    for (size_t i = 0; i < n; i++) ab += (double)a[i] * b[i], aa += (double)a[i] * a[i], bb += (double)b[i] * b[i];
    return ab / sqrt(aa * bb);
}

typedef struct config_of { const char *directory; llmpar_llama_config config; } config_of;
static llmpar_status read_config(llmpar_ctx *ctx, void *user) { return llmpar_hf_config(ctx, ((config_of *)user)->directory, &((config_of *)user)->config); }

TEST(half_precision_of_a_trained_model)
{
    TEST_DATA(directory, "stories260K/hf");
    TEST_DATA(golden, "stories260K/hf/golden.json");
    enum { N = 128 };
    static int32_t text[N + 1];
    config_of c = { directory, { 0 } };
    llmpar_error error;
    llmpar_launch_desc desc = { .ranks = 1 };
    if (llmpar_launch(&desc, read_config, &c, &error)) { TEST_FAIL("%s", error.text); return; }
    FILE *f = fopen(golden, "rb");
    static char json[1 << 16];
    if (!f || !fread(json, 1, sizeof json - 1, f)) { TEST_FAIL("cannot read %s", golden); return; }
    fclose(f);
    const char *at = strstr(json, "\"ids\"");
    at = at ? strchr(at, '[') : NULL;
    for (int i = 0; at && i <= N; i++) text[i] = (int32_t)strtol(at + 1, (char **)&at, 10);
    job j;
    result want, got;
    describe(&j, LLMPAR_F32, 0);
    j.config = c.config;
    j.directory = directory;
    j.ids = text;
    j.targets = text + 1;
    j.sequences = 2;
    j.t = N / 2;
    j.leaves = 2;
    run(&j, &want);
    size_t n = gradient_bytes(&j) / sizeof(float);
    double loss = llmpar_exact_sum_value(&want.loss) / N;
    CHECK(loss > 0.1 && loss < 3);
    for (int half = 0; half < 2; half++) {
        j.dtype = half ? LLMPAR_F16 : LLMPAR_BF16;
        j.tp = 1;
        j.sequence_parallel = 0;
        run(&j, &got);
        double off = fabs(llmpar_exact_sum_value(&got.loss) / N - loss) / loss, same = cosine((const float *)(void *)got.gradient, (const float *)(void *)want.gradient, n);
        if (!(off < 0.01)) TEST_FAIL("%s: loss %.6f, f32 has %.6f", llmpar_dtype_name(j.dtype), llmpar_exact_sum_value(&got.loss) / N, loss);
        if (!(same > 0.99)) TEST_FAIL("%s: the gradient's direction: cosine %.6f to f32's", llmpar_dtype_name(j.dtype), same);
        CHECK(off > 0 && same < 1); /* it is not f32 in disguise */
        result cut_up;
        j.tp = 4;
        j.sequence_parallel = 1;
        j.logits_bytes = 5000;
        j.recompute = LLMPAR_RECOMPUTE_SELECTIVE;
        run(&j, &cut_up);
        check_same(&j, &cut_up, &got, "stories260K");
        j.logits_bytes = 0;
        j.recompute = LLMPAR_RECOMPUTE_NONE;
        free(cut_up.gradient);
        free(got.gradient);
    }
    free(want.gradient);
}

TEST_LIST(T_(same_bits_f32), T_(same_bits_bf16), T_(same_bits_f16), T_(same_bits_f64), T_(frozen_units), T_(selective_keeps_less), T_(logits_are_never_whole), T_(parts_of_one_leaf), T_(half_precision_of_a_trained_model))
