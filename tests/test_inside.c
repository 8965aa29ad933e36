/* A small Llama trained with updates inside backward, and in two passes: the bits of updates after the step where these do the same, the same bits on every mesh, and no gradient that outlives its unit. */
#include "train.h"

enum { BATCH = 8, T = 16, STEPS = 3, RANKS = 4, MOST = 1 << 17 };

typedef struct job {
    int32_t dp_replicate, dp_shard, tp, zero, overlap;
    llmpar_dtype dtype;
    llmpar_optim_desc optim;
    int32_t after;                         /* 1: updates after the step, whatever the optimizer would have */
    double lr;
    /* out, of rank 0 but for the parameters' sum */
    double loss[STEPS], norm[STEPS];
    double *params;                        /* [RANKS][MOST] */
    int64_t count;
    uint64_t gradients;                    /* peak */
    int32_t forwards, updates;
} job;

static llmpar_status rank(llmpar_ctx *ctx, void *user)
{
    job *j = (job *)user;
    llmpar_llama_config config = train_config(1);
    llmpar_mesh_desc mesh_desc = { j->dp_replicate, j->dp_shard, 1, 1, j->tp };
    llmpar_llama_desc desc;
    llmpar_llama_apply_desc apply;
    llmpar_fsdp_desc fsdp_desc;
    llmpar_optim_desc optim_desc = j->optim;
    llmpar_policy policy;
    llmpar_mesh *mesh = NULL;
    llmpar_llama *model = NULL;
    llmpar_fsdp *fsdp = NULL;
    llmpar_optim *optim = NULL;
    llmpar_schedule *schedule = NULL;
    int32_t count = 0, ids[BATCH * T], targets[BATCH * T];
    config.layers = 2;
    memset(&desc, 0, sizeof desc);
    memset(&apply, 0, sizeof apply);
    memset(&fsdp_desc, 0, sizeof fsdp_desc);
    memset(&policy, 0, sizeof policy);
    desc.config = &config;
    desc.seed = 3;
    apply.canon = 8;
    apply.sequence_parallel = j->tp > 1;
    apply.positions = T;
    apply.dtype = j->dtype;
    llmpar_optim_desc_resolve(&optim_desc);
    fsdp_desc.zero = j->zero;
    fsdp_desc.dtype = j->dtype;
    fsdp_desc.seed = 3;
    fsdp_desc.overlap = j->overlap;
    fsdp_desc.optimizer_states = llmpar_optim_states(&optim_desc);
    llmpar_status status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_llama_create(ctx, &desc, &model);
    if (!status) status = llmpar_llama_apply(model, mesh->comm[LLMPAR_AXIS_TP], &apply);
    llmpar_unit *units = model ? llmpar_llama_units(model, &count) : NULL;
    if (!status) status = llmpar_fsdp_create(mesh, units, count, &fsdp_desc, &fsdp);
    if (!status) status = llmpar_optim_create(fsdp, &j->optim, &optim);
    if (!status) {
        llmpar_fsdp_policy(fsdp, &policy);
        policy.update = j->after ? LLMPAR_UPDATE_AFTER : llmpar_optim_update_when(&optim_desc, 0);
        status = llmpar_schedule_create(&ctx->heap, units, count, &policy, &schedule, &ctx->error);
    }
    if (!status) status = llmpar_schedule_validate(&ctx->heap, schedule->list, schedule->count, units, count, &schedule->policy, &ctx->error);
    if (!status && ctx->rank == 0) {
        j->forwards = j->updates = 0;
        for (int32_t i = 0; i < schedule->count; i++) {
            j->forwards += schedule->list[i].op == LLMPAR_OP_FORWARD;
            j->updates += schedule->list[i].op == LLMPAR_OP_OPTIM;
        }
        CHECK_INT(j->updates, count);
        CHECK_INT(j->forwards, count * (policy.update == LLMPAR_UPDATE_TWO_PASSES ? 2 : 1));
    }
    for (int step = 0; step < STEPS && !status; step++) {
        llmpar_run run;
        llmpar_micro micro;
        int64_t per = BATCH / mesh->dp_ranks;
        memset(&run, 0, sizeof run);
        memset(&micro, 0, sizeof micro);
        for (int64_t i = 0; i < per * T; i++) {
            int64_t at = mesh->dp_rank * per * T + i;
            ids[i] = (int32_t)((at * 7 + step * 5) % 250);
            targets[i] = at % 11 == 3 ? -1 : (int32_t)((at * 7 + step * 5 + 7) % 250);
            run.tokens += targets[i] >= 0;
        }
        micro.batch = micro.leaves = per;
        micro.t = T;
        micro.ids = ids;
        micro.targets = targets;
        run.micro = &micro;
        run.optimizer = llmpar_optim_table(optim);
        llmpar_optim_set_lr(optim, j->lr);
        status = llmpar_fsdp_run(fsdp, schedule->list, schedule->count, &run);
        if (ctx->rank == 0) j->loss[step] = run.loss, j->norm[step] = run.grad_norm;
    }
    if (!status) CHECK_INT(llmpar_optim_steps(optim), STEPS);
    if (!status && ctx->rank == 0) {
        llmpar_arena_usage usage;
        llmpar_arena_get_usage(llmpar_fsdp_arena(fsdp), &usage);
        j->gradients = usage.peak[LLMPAR_TAG_GRADIENTS];
        CHECK_INT(usage.live[LLMPAR_TAG_GRADIENTS], 0);
    }
    /* What forward reads: every unit whole, tp's part of it. */
    int64_t at = 0;
    for (int32_t u = 0; u < count && !status; u++)
        for (int32_t p = 0; p < units[u].param_count && !status; p++) {
            llmpar_dtensor tensor;
            int64_t n;
            llmpar_fsdp_dtensor(fsdp, u, p, &tensor);
            tensor.dtype = j->dtype;
            CHECK(llmpar_extent_product(tensor.shape, tensor.dims, &n));
            void *const *params;
            void *full = calloc((size_t)n, sizeof(double)), *scratch = calloc((size_t)llmpar_dtensor_full_scratch(&tensor, mesh) + 1, sizeof(double));
            llmpar_stream *stream = NULL;
            /* The gathered unit is what tp's ranks cut from the tensor: without the flat cut. */
            if (tensor.placements && tensor.placement[tensor.placements - 1].kind == LLMPAR_FLAT) tensor.placements--;
            status = llmpar_fsdp_unshard(fsdp, u, &params);
            if (!status) status = ctx->device->stream_create(ctx->device, "look", &stream);
            if (!status) status = llmpar_dtensor_full(&tensor, mesh, stream, params[p], scratch, full);
            if (!status) status = ctx->device->synchronize(ctx->device, stream);
            if (stream) ctx->device->stream_destroy(ctx->device, stream);
            if (!status) status = llmpar_fsdp_reshard(fsdp, u);
            CHECK(at + n <= MOST);
            CHECK(llmpar_convert(j->params + ctx->rank * MOST + at, LLMPAR_F64, full, tensor.dtype, (size_t)n));
            at += n;
            free(scratch);
            free(full);
        }
    if (ctx->rank == 0) j->count = at;
    llmpar_schedule_destroy(schedule);
    llmpar_optim_destroy(optim);
    llmpar_fsdp_destroy(fsdp);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    return status;
}

static void launch(job *j, const char *what)
{
    llmpar_launch_desc desc;
    llmpar_error error;
    memset(&desc, 0, sizeof desc);
    desc.ranks = j->dp_replicate * j->dp_shard * j->tp;
    desc.check = test_no_leak;
    if (llmpar_launch(&desc, rank, j, &error)) TEST_FAIL("%s: rank %d (%s): %s", what, error.rank, error.where, error.text);
}

static void same(const job *a, const job *b, const char *what, int norms)
{
    CHECK_INT(a->count, b->count);
    for (int s = 0; s < STEPS; s++)
        if (a->loss[s] != b->loss[s] || (norms && a->norm[s] != b->norm[s])) TEST_FAIL("%s: step %d: loss %.17g, norm %.17g; want %.17g, %.17g", what, s, a->loss[s], a->norm[s], b->loss[s], b->norm[s]);
    for (int r = 0; r < a->dp_replicate * a->dp_shard * a->tp; r++)
        for (int64_t i = 0; i < a->count; i++)
            if (a->params[r * MOST + i] != b->params[i]) { TEST_FAIL("%s: rank %d: parameter element %lld is %.9g, want %.9g", what, r, (long long)i, a->params[r * MOST + i], b->params[i]); return; }
}

static double *room(void) { return (double *)malloc((size_t)RANKS * MOST * sizeof(double)); }

static llmpar_optim_desc optim(llmpar_optim_kind kind, double clip)
{
    llmpar_optim_desc d;
    memset(&d, 0, sizeof d);
    d.kind = kind;
    d.clip = clip;
    if (kind == LLMPAR_OPTIM_SGD) d.momentum = -1;
    return d;
}

static const struct { int32_t dp_replicate, dp_shard, tp, zero, overlap; } meshes[] = {
    { 1, 2, 1, LLMPAR_ZERO_3, 0 }, { 1, 1, 2, LLMPAR_ZERO_3, 0 }, { 1, 2, 2, LLMPAR_ZERO_3, 0 }, { 1, 4, 1, LLMPAR_ZERO_2, 0 }, { 2, 2, 1, LLMPAR_ZERO_1, 0 }, { 1, 2, 2, LLMPAR_ZERO_0, 0 }, { 1, 2, 2, LLMPAR_ZERO_3, 1 },
};

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { FEW = 1 }; /* under a sanitizer the meshes with most to find: 2x2, and that with a thread a stream */
#else
enum { FEW = 0 };
#endif

/* want: one rank. Every n-th mesh. */
static void on_meshes(const job *one, const char *what, int every)
{
    for (size_t m = FEW ? 2 : 0; m < sizeof meshes / sizeof meshes[0]; m += (size_t)(FEW ? 4 : every)) {
        char name[80];
        job j = *one;
        snprintf(name, sizeof name, "%s, mesh %d", what, (int)m);
        j.dp_replicate = meshes[m].dp_replicate;
        j.dp_shard = meshes[m].dp_shard;
        j.tp = meshes[m].tp;
        j.zero = meshes[m].zero;
        j.overlap = meshes[m].overlap;
        j.params = room();
        launch(&j, name);
        same(&j, one, name, 1);
        free(j.params);
    }
}

/* LOMO inside backward is plain SGD after the step. */
TEST(lomo)
{
    for (int clip = 0; clip < 2; clip++) {
        job after, inside;
        memset(&after, 0, sizeof after);
        after.dp_replicate = after.dp_shard = after.tp = 1;
        after.dtype = LLMPAR_F32;
        after.lr = 0.1;
        inside = after;
        after.optim = optim(LLMPAR_OPTIM_SGD, clip ? 0.5 : -1);
        inside.optim = optim(LLMPAR_OPTIM_LOMO, clip ? 0.5 : -1);
        after.params = room();
        inside.params = room();
        launch(&after, "sgd");
        launch(&inside, clip ? "lomo in two passes" : "lomo");
        CHECK(after.loss[2] < after.loss[0] && after.norm[0] > 0.5);
        same(&inside, &after, clip ? "lomo in two passes" : "lomo", clip);
        if (!(3 * inside.gradients < 2 * after.gradients)) TEST_FAIL("gradients: %llu bytes at once, %llu after the step", (unsigned long long)inside.gradients, (unsigned long long)after.gradients);
        on_meshes(&inside, clip ? "lomo in two passes" : "lomo", clip ? 3 : 1);
        free(after.params);
        free(inside.params);
    }
}

TEST(adalomo)
{
    for (int clip = 0; clip < 2; clip++)
        for (int dtype = LLMPAR_F32; dtype <= LLMPAR_BF16; dtype += LLMPAR_BF16 - LLMPAR_F32) {
            char name[80];
            job one;
            snprintf(name, sizeof name, "adalomo %s%s", llmpar_dtype_name((llmpar_dtype)dtype), clip ? " in two passes" : "");
            memset(&one, 0, sizeof one);
            one.dp_replicate = one.dp_shard = one.tp = 1;
            one.dtype = (llmpar_dtype)dtype;
            one.lr = 0.05;
            one.optim = optim(LLMPAR_OPTIM_ADALOMO, clip ? 0.5 : 0);
            one.params = room();
            launch(&one, name);
            CHECK(one.loss[2] < one.loss[0]);
            on_meshes(&one, name, clip ? 3 : 1);
            free(one.params);
        }
}

/* ---- the recipe: each optimizer on one rank and on 2x2; the plan's bytes are those of the step ---- */

typedef struct recipe { int32_t degree, accum; llmpar_optim_desc optim; double loss[STEPS]; } recipe;

static llmpar_status recipe_rank(llmpar_ctx *ctx, void *user)
{
    recipe *r = (recipe *)user;
    llmpar_llama_config config = train_config(1);
    llmpar_mesh_desc mesh_desc = { 1, r->degree, 1, 1, r->degree };
    llmpar_mesh *mesh = NULL;
    llmpar_llama *planned = NULL, *model = NULL;
    llmpar_trainer *trainer = NULL;
    llmpar_llama_desc model_desc;
    llmpar_trainer_desc desc;
    llmpar_memory plan, real;
    llmpar_error error;
    memset(&model_desc, 0, sizeof model_desc);
    memset(&desc, 0, sizeof desc);
    model_desc.config = &config;
    desc.sequence = train_sequence;
    desc.seq_len = 24;
    desc.batch = 8;
    desc.grad_accum = r->accum;
    desc.lr = 0.05;
    desc.log_every = -1;
    desc.optim = r->optim;
    llmpar_status status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_llama_create(ctx, &model_desc, &planned);
    if (!status) status = llmpar_llama_create(ctx, &model_desc, &model);
    if (!status && r->accum == 1) status = llmpar_plan_memory(mesh, planned, &desc, &plan, &error);
    if (!status) status = llmpar_parallelize(mesh, model, &desc, &trainer);
    for (int i = 0; i < STEPS && !status; i++) {
        llmpar_step step;
        status = llmpar_trainer_step(trainer, &step);
        if (ctx->rank == 0) r->loss[i] = step.loss;
    }
    if (!status) {
        llmpar_trainer_memory(trainer, &real);
        for (int tag = 0; tag < LLMPAR_TAG_COUNT; tag++)
            if (plan.init.live[tag] != real.init.live[tag] || plan.step.peak[tag] != real.step.peak[tag])
                TEST_FAIL("%s, %s: planned %llu at first, %llu at most, taken %llu and %llu", llmpar_optim_name(r->optim.kind), llmpar_tag_name((llmpar_tag)tag), (unsigned long long)plan.init.live[tag], (unsigned long long)plan.step.peak[tag],
                          (unsigned long long)real.init.live[tag], (unsigned long long)real.step.peak[tag]);
    }
    llmpar_trainer_destroy(trainer);
    llmpar_llama_destroy(model);
    llmpar_llama_destroy(planned);
    llmpar_mesh_destroy(mesh);
    return status;
}

TEST(in_the_recipe)
{
    llmpar_launch_desc desc;
    llmpar_error error;
    memset(&desc, 0, sizeof desc);
    desc.check = test_no_leak;
    for (int kind = 0; kind < LLMPAR_OPTIM_COUNT; kind++)
        for (int clip = 0; clip < 2; clip++) {
            recipe one = { 1, 1, optim((llmpar_optim_kind)kind, clip ? 0.5 : -1), { 0 } }, four = one;
            if (kind == LLMPAR_OPTIM_SGD) one.optim.momentum = four.optim.momentum = 0.5;
            four.degree = 2;
            desc.ranks = 1;
            if (llmpar_launch(&desc, recipe_rank, &one, &error)) TEST_FAIL("%s: %s", llmpar_optim_name((llmpar_optim_kind)kind), error.text);
            desc.ranks = 4;
            if (llmpar_launch(&desc, recipe_rank, &four, &error)) TEST_FAIL("%s on 2x2: %s", llmpar_optim_name((llmpar_optim_kind)kind), error.text);
            CHECK_BYTES(one.loss, four.loss, sizeof one.loss);
            CHECK(one.loss[STEPS - 1] < one.loss[0]);
        }
    for (int kind = LLMPAR_OPTIM_LOMO; kind <= LLMPAR_OPTIM_ADALOMO; kind++) { /* a gradient that may not outlive its unit cannot wait for the next micro-batch */
        recipe two = { 1, 2, optim((llmpar_optim_kind)kind, 0), { 0 } };
        desc.ranks = 1;
        CHECK_STATUS(llmpar_launch(&desc, recipe_rank, &two, &error), LLMPAR_ERR_ARGUMENT);
        CHECK_TEXT(error.text, "micro");
    }
}

TEST_LIST(T_(lomo), T_(adalomo), T_(in_the_recipe))
