/* Many ranks, many micro-batches. Checkpoints of thousands of ranks, as one of them sees them: rank 0 of a world whose other ranks are not there writes the manifest, and a run of one rank reads it. A step of hundreds of
   micro-batches asks a unit for its sizes once a shape. Nothing is timed, but whoever looks at all parts for each part, or at all parameters for each, is at it for minutes. */
#include "test.h"
#include "checkpoints.h"

enum { PARAMS = 2000, PARTS = 200000 };

/* ---- a world of many ranks, all of whom say what rank 0 says ---- */

static llmpar_mesh_desc crowd;

static llmpar_status echo(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call, int32_t op)
{
    size_t bytes = call->count * llmpar_dtype_size(call->dtype);
    char *to = (char *)call->recv;
    (void)stream;
    for (int32_t r = 0; r < (op == LLMPAR_CALL_ALL_GATHER ? comm->ranks : 1) && to; r++, to += bytes)
        if (to != call->send) memcpy(to, call->send, bytes);
    return LLMPAR_OK;
}
static void leave(llmpar_comm *comm) { free(comm); }
static void ignore(llmpar_comm *comm, const llmpar_error *error) { (void)comm, (void)error; }
static llmpar_status part(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out)
{
    (void)color, (void)key;
    *out = (llmpar_comm *)malloc(sizeof **out);
    **out = *comm;
    (*out)->axis = name;
    (*out)->ranks = !strcmp(name, "tp") ? crowd.tp : !strcmp(name, "dp") || !strcmp(name, "dp_shard") ? crowd.dp_shard : 1;
    return LLMPAR_OK;
}

static llmpar_status nothing(llmpar_unit_call *call) { return (void)call, LLMPAR_OK; }
static const llmpar_unit_op op[] = { { "all", nothing, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 } };

/* An object for one unit of these parameters, in the rank's world. */
static llmpar_status object(llmpar_ctx *ctx, const llmpar_mesh_desc *mesh_desc, const llmpar_param *params, int32_t count, llmpar_mesh **mesh, llmpar_fsdp **fsdp)
{
    llmpar_unit unit;
    llmpar_fsdp_desc desc;
    memset(&unit, 0, sizeof unit);
    memset(&desc, 0, sizeof desc);
    unit.name = "all";
    unit.params = params;
    unit.param_count = count;
    unit.forward = unit.backward = op;
    unit.forward_count = unit.backward_count = 1;
    desc.count_only = 1;
    llmpar_status status = llmpar_mesh_create(ctx, mesh_desc, mesh);
    return status ? status : llmpar_fsdp_create(*mesh, &unit, 1, &desc, fsdp);
}

static void save(llmpar_fsdp *fsdp, const char *directory, llmpar_status status, const char *text)
{
    llmpar_ctx *ctx = llmpar_fsdp_mesh(fsdp)->ctx;
    llmpar_checkpoint *checkpoint = NULL;
    llmpar_checkpoint_desc desc;
    llmpar_checkpoint_info info;
    memset(&desc, 0, sizeof desc);
    memset(&info, 0, sizeof info);
    desc.directory = directory;
    info.step = 1;
    CHECK_OK(llmpar_checkpoint_create(fsdp, NULL, &desc, &checkpoint));
    CHECK_STATUS(llmpar_checkpoint_save(checkpoint, &info), status);
    CHECK_TEXT(llmpar_last_error(ctx), text);
    llmpar_checkpoint_destroy(checkpoint);
}

static void load(llmpar_ctx *ctx, const llmpar_param *params, int32_t count, const char *step, llmpar_status status, const char *text)
{
    const llmpar_mesh_desc alone = { 1, 1, 1, 1, 1 };
    llmpar_mesh *mesh = NULL;
    llmpar_fsdp *fsdp = NULL;
    llmpar_checkpoint_info info;
    CHECK_OK(object(ctx, &alone, params, count, &mesh, &fsdp));
    llmpar_error_clear(&ctx->error);
    if (fsdp) CHECK_STATUS(llmpar_checkpoint_load(fsdp, NULL, step, NULL, NULL, &info), status);
    CHECK_TEXT(llmpar_last_error(ctx), text);
    llmpar_error_clear(&ctx->error);
    llmpar_fsdp_destroy(fsdp);
    llmpar_mesh_destroy(mesh);
}

static void on_a_rank(llmpar_rank_fn fn)
{
    llmpar_launch_desc desc;
    llmpar_error error;
    memset(&desc, 0, sizeof desc);
    llmpar_error_clear(&error);
    desc.ranks = 1;
    CHECK_OK(llmpar_launch(&desc, fn, NULL, &error));
}

/* ---- writing ---- */

static llmpar_param weight(int64_t rows, int64_t columns)
{
    llmpar_param param;
    memset(&param, 0, sizeof param);
    param.name = "weight";
    param.dims = 2;
    param.shape[0] = rows;
    param.shape[1] = columns;
    return param;
}

static void save_in_crowd(llmpar_ctx *ctx, int32_t dp_shard, int32_t tp, const llmpar_param *params, int32_t count, const char *directory, llmpar_status status, const char *text)
{
    llmpar_ctx many = *ctx;
    llmpar_comm world;
    llmpar_mesh *mesh = NULL;
    llmpar_fsdp *fsdp = NULL;
    memset(&world, 0, sizeof world);
    crowd.dp_shard = dp_shard;
    crowd.tp = tp;
    world.abi = LLMPAR_COMM_ABI;
    world.size = sizeof world;
    world.ranks = many.world = dp_shard * tp;
    world.axis = "world";
    world.device = ctx->device;
    world.error = &many.error;
    world.split = part;
    world.destroy = leave;
    world.abort = ignore;
    llmpar_comm_fill(&world, echo);
    many.comm = &world;
    llmpar_heap_init(&many.heap, NULL);
    CHECK_OK(object(&many, &crowd, params, count, &mesh, &fsdp));
    if (fsdp) save(fsdp, directory, status, text);
    llmpar_fsdp_destroy(fsdp);
    llmpar_mesh_destroy(mesh);
    CHECK_INT(many.heap.live, 0);
}

static llmpar_status writes(llmpar_ctx *ctx, void *user)
{
    static llmpar_param params[PARAMS];
    static char name[PARAMS][16];
    (void)user;
    for (int i = 0; i < PARAMS; i++) {
        snprintf(name[i], sizeof name[i], "w%d", i);
        params[i].name = name[i];
        params[i].dims = 2;
        params[i].shape[0] = 12; /* 1 or 2 rows a rank */
        params[i].shape[1] = 100;
        params[i].tp.kind = LLMPAR_SHARD;
        params[i].tp.axis = LLMPAR_AXIS_TP;
    }
    save_in_crowd(ctx, 256, 8, params, PARAMS, cp_path("crowd"), LLMPAR_OK, "");
    /* Every tensor is there, and what is missing are the files of the others. */
    load(ctx, params, PARAMS, cp_path("crowd/step-1"), LLMPAR_ERR_IO, "rank-00001.safetensors");
    return LLMPAR_OK;
}

/* Found by counting, before there is a file: what could be saved, and not be loaded. */
static llmpar_status writes_too_much(llmpar_ctx *ctx, void *user)
{
    const llmpar_param one = weight(1, 1);
    (void)user;
    save_in_crowd(ctx, 12 << 20, 1, &one, 1, cp_path("much"), LLMPAR_ERR_UNSUPPORTED, "bytes, expected at most 1073741824");
    CHECK(!cp_exists(cp_path("much")));
    return LLMPAR_OK;
}

TEST(thousands_of_ranks_write) { on_a_rank(writes); }
TEST(a_manifest_that_could_not_be_loaded) { on_a_rank(writes_too_much); }

/* ---- reading ---- */

typedef struct claim { int64_t offset[2], shape[2], begin, count; } claim;

/* DIR/step-0 with a manifest of one f32 tensor "weight" [rows,columns], part i in file i. */
static const char *claimed(int64_t rows, int64_t columns, const claim *parts, int count)
{
    const char *directory = cp_path("claimed/step-0");
    char *text = (char *)malloc(1000 + (size_t)count * 300), *at = text;
    llmpar_xxh64 sum;
    cp_clear(cp_path("claimed"));
    if (mkdir(cp_path("claimed"), 0700) || mkdir(directory, 0700)) TEST_FAIL("cannot make %s", directory);
    at += sprintf(at, "{\"format\":\"llmpar checkpoint\",\"version\":1,\"contract\":1,\n\"step\":0,\"updates\":0,\n\"batch\":1,\"seq_len\":1,\"seed\":\"1\",\"data_tokens\":0,\"canon\":1,\n\"loss_scale\":null,\n\"dtype\":\"f32\",\"stored\":\"f32\","
                      "\"optimizer\":\"none\",\"zero\":3,\n\"mesh\":{\"dp_replicate\":1,\"dp_shard\":1,\"cp\":1,\"pp\":1,\"tp\":1},\n\"files\":[");
    for (int i = 0; i < count; i++) at += sprintf(at, "%s{\"name\":\"rank-%05d.safetensors\",\"bytes\":8,\"xxh64\":\"0123456789abcdef\"}", i ? ",\n" : "", i);
    at += sprintf(at, "],\n\"tensors\":[{\"name\":\"weight\",\"arrays\":[\"param\"],\"shape\":[%lld,%lld],\"parts\":[", (long long)rows, (long long)columns);
    for (int i = 0; i < count; i++)
        at += sprintf(at, "%s{\"file\":%d,\"offset\":[%lld,%lld],\"shape\":[%lld,%lld],\"begin\":%lld,\"count\":%lld}", i ? ",\n" : "", i, (long long)parts[i].offset[0], (long long)parts[i].offset[1], (long long)parts[i].shape[0],
                      (long long)parts[i].shape[1], (long long)parts[i].begin, (long long)parts[i].count);
    at += sprintf(at, "]}]");
    llmpar_xxh64_begin(&sum);
    llmpar_xxh64_add(&sum, text, (size_t)(at - text));
    at += sprintf(at, ",\n\"xxh64\":\"%016llx\"}\n", (unsigned long long)llmpar_xxh64_end(&sum));
    char path[900];
    snprintf(path, sizeof path, "%s/manifest.json", directory);
    cp_write(path, text, (size_t)(at - text));
    free(text);
    return directory;
}

static const char *const there = "rank-00000.safetensors: "; /* the manifest is taken, and then this file is missing */

static llmpar_status reads_ranges(llmpar_ctx *ctx, void *user)
{
    enum { FEW = 1000 };
    claim *parts = (claim *)calloc(PARTS, sizeof *parts);
    llmpar_param param = weight(PARTS, 3);
    (void)user;
    for (int i = 0; i < PARTS; i++) { /* ranges of one rectangle that begin and end inside rows, but for the last */
        parts[i].shape[0] = PARTS;
        parts[i].shape[1] = 3;
        parts[i].begin = i ? 3 * i + 1 : 0;
        parts[i].count = 3 + (i == 0) - (i + 1 == PARTS);
    }
    load(ctx, &param, 1, claimed(PARTS, 3, parts, PARTS), LLMPAR_ERR_IO, there);
    param = weight(FEW, 3);
    for (int i = 0; i < FEW; i++) parts[i].shape[0] = FEW;
    parts[FEW - 1].count = 2;
    load(ctx, &param, 1, claimed(FEW, 3, parts, FEW), LLMPAR_ERR_IO, there);
    parts[700].count = 4;
    load(ctx, &param, 1, claimed(FEW, 3, parts, FEW), LLMPAR_ERR_FORMAT, "the parts in rank-00700.safetensors and rank-00701.safetensors overlap");
    parts[700].count = 2;
    load(ctx, &param, 1, claimed(FEW, 3, parts, FEW), LLMPAR_ERR_FORMAT, "its parts have 2999 elements, expected 3000");
    parts[700].count = 3;
    parts[700].begin--; /* as many as there should be */
    load(ctx, &param, 1, claimed(FEW, 3, parts, FEW), LLMPAR_ERR_FORMAT, "the parts in rank-00699.safetensors and rank-00700.safetensors overlap");
    free(parts);
    return LLMPAR_OK;
}

static llmpar_status reads_rectangles(llmpar_ctx *ctx, void *user)
{
    enum { SIDE = 400, FEW = 30 };
    claim *parts = (claim *)calloc(SIDE * SIDE, sizeof *parts);
    llmpar_param param = weight(2 * SIDE, 3 * SIDE);
    (void)user;
    for (int side = SIDE; side >= FEW; side += FEW - SIDE) {
        param = weight(2 * side, 3 * side);
        for (int i = 0; i < side * side; i++) {
            const claim one = { { 2 * (i / side), 3 * (i % side) }, { 2, 3 }, 0, 6 };
            parts[i] = one;
        }
        load(ctx, &param, 1, claimed(2 * side, 3 * side, parts, side * side), LLMPAR_ERR_IO, there);
    }
    parts[5 * FEW + 4] = parts[4 * FEW + 5]; /* its mirror image across the diagonal, and a hole where it was */
    load(ctx, &param, 1, claimed(2 * FEW, 3 * FEW, parts, FEW * FEW), LLMPAR_ERR_FORMAT, "the parts in rank-00125.safetensors and rank-00154.safetensors overlap");
    parts[5 * FEW + 4].offset[0] = 10;
    parts[5 * FEW + 4].offset[1] = 11;
    load(ctx, &param, 1, claimed(2 * FEW, 3 * FEW, parts, FEW * FEW), LLMPAR_ERR_FORMAT, "the parts in rank-00153.safetensors and rank-00154.safetensors overlap");
    free(parts);
    return LLMPAR_OK;
}

TEST(many_ranges_are_read) { on_a_rank(reads_ranges); }
TEST(many_rectangles_are_read) { on_a_rank(reads_rectangles); }

/* ---- micro-batches ---- */

enum { UNITS = 3, MICRO = 500 };
static int asked[UNITS], wrong;

static llmpar_status sizes(void *user, const llmpar_micro *micro, llmpar_dtype dtype, llmpar_unit_sizes *out)
{
    ++*(int *)user;
    out->scratch = (size_t)micro->t * llmpar_dtype_size(dtype);
    out->workspace = (size_t)(micro->t * micro->batch);
    out->saved = out->output = 8;
    return LLMPAR_OK;
}
static llmpar_status looks(llmpar_unit_call *call)
{
    wrong += call->workspace_bytes != (size_t)(call->micro->t * call->micro->batch);
    if (call->grads) memset(call->grads[0], 0, 8 * 8 * sizeof(float));
    return LLMPAR_OK;
}
static const llmpar_unit_op look[] = { { "all", looks, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 } };

static llmpar_status steps(llmpar_ctx *ctx, void *user)
{
    static const char *const name[UNITS] = { "first", "second", "third" };
    const llmpar_mesh_desc alone = { 1, 1, 1, 1, 1 };
    llmpar_unit units[UNITS];
    llmpar_param params[UNITS];
    llmpar_micro micro[MICRO];
    llmpar_fsdp_desc desc;
    llmpar_policy policy;
    llmpar_run run;
    llmpar_mesh *mesh = NULL;
    llmpar_fsdp *fsdp = NULL;
    llmpar_schedule *schedule = NULL;
    (void)user;
    memset(units, 0, sizeof units);
    memset(micro, 0, sizeof micro);
    memset(&desc, 0, sizeof desc);
    memset(&policy, 0, sizeof policy);
    memset(&run, 0, sizeof run);
    for (int u = 0; u < UNITS; u++) {
        params[u] = weight(8, 8);
        units[u].name = params[u].name = name[u];
        units[u].params = &params[u];
        units[u].param_count = 1;
        units[u].forward = units[u].backward = look;
        units[u].forward_count = units[u].backward_count = 1;
        units[u].sizes = sizes;
        units[u].user = &asked[u];
    }
    for (int m = 0; m < MICRO; m++) {
        micro[m].batch = m + 2 < MICRO ? 2 : 1; /* two are shorter, and of these the last */
        micro[m].t = m + 1 < MICRO ? 16 : 8;
        micro[m].leaves = 1;
    }
    run.micro = micro;
    CHECK_OK(llmpar_mesh_create(ctx, &alone, &mesh));
    CHECK_OK(llmpar_fsdp_create(mesh, units, UNITS, &desc, &fsdp));
    llmpar_fsdp_policy(fsdp, &policy);
    policy.micro_batches = MICRO;
    CHECK_OK(llmpar_schedule_create(&ctx->heap, units, UNITS, &policy, &schedule, &ctx->error));
    for (int step = 1; step <= 2; step++) { /* what a step found out is not believed in the next */
        CHECK_OK(llmpar_fsdp_run(fsdp, schedule->list, schedule->count, &run));
        for (int u = 0; u < UNITS; u++) CHECK_INT(asked[u], 3 * step);
    }
    CHECK_INT(wrong, 0);
    llmpar_schedule_destroy(schedule);
    llmpar_fsdp_destroy(fsdp);
    llmpar_mesh_destroy(mesh);
    return LLMPAR_OK;
}

TEST(many_micro_batches) { on_a_rank(steps); }

TEST_LIST(T_(thousands_of_ranks_write), T_(a_manifest_that_could_not_be_loaded), T_(many_ranges_are_read), T_(many_rectangles_are_read), T_(many_micro_batches))
