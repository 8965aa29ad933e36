/* What of a step's data is where, and when: ZeRO stages, compute dtypes, recomputation, frozen units, states in host memory and in files, updates inside backward. All of it changes no bit; memory is
   accounted for to the byte. */
#include "fsdp_net.h"
#include "debug_device.h"

static int sharded_params(const net_job *job) { return job->mesh.dp_shard > 1 && (job->fsdp.zero == LLMPAR_ZERO_DEFAULT || job->fsdp.zero == LLMPAR_ZERO_3); }

/* Runs the job on meshes and ZeRO stages, every second pair of them in turns (under a sanitizer every eighth); where nothing is known yet, first on one rank, which is what the others must equal. */
static void everywhere(const net_job *like, const char *name)
{
    static int turn;
    int step = test_rounds(8) == 8 ? 2 : 8;
    for (int pair = 0; pair < 4 * NET_MESHES; pair++) {
        char row[200];
        net_job job = *like;
        int mesh = pair / 4;
        job.mesh = net_meshes[mesh];
        job.fsdp.zero = LLMPAR_ZERO_0 + pair % 4;
        if (job.mesh.dp_shard == 1 && job.fsdp.zero != LLMPAR_ZERO_3) continue; /* all the same */
        if ((like->policy.micro_batches > 2 && mesh > 1) || (job.fsdp.offload[LLMPAR_STATE_PARAMS] && job.fsdp.dtype == LLMPAR_F32 && !sharded_params(&job))) continue;
        if (turn++ % step && (net_reference.known || mesh)) continue;
        snprintf(row, sizeof row, "%s, mesh %d, zero %d", name, mesh, pair % 4);
        net_launch_ok(&job, row);
    }
}

/* A job for everywhere(), behind its like on one rank, which is what all have to equal. */
static net_job after_one_rank(llmpar_dtype dtype)
{
    net_job job = net_job_of(0, dtype);
    memset(&net_reference, 0, sizeof net_reference);
    net_launch_ok(&job, "one rank");
    return job;
}

TEST(zero_stages)
{
    static const llmpar_dtype dtypes[] = { LLMPAR_F32, LLMPAR_F64, LLMPAR_BF16, LLMPAR_F16 };
    for (int d = 0; d < 4; d++) {
        net_job job = net_job_of(0, dtypes[d]);
        memset(&net_reference, 0, sizeof net_reference);
        everywhere(&job, llmpar_dtype_name(dtypes[d]));
        if (d == 1) continue; /* f64 is f32 in another width */
        job.policy.micro_batches = 2;
        everywhere(&job, "two micro-batches");
        job.policy.no_sync = 1;
        everywhere(&job, "no_sync");
    }
}

TEST(recomputation)
{
    static const llmpar_dtype dtypes[] = { LLMPAR_F32, LLMPAR_BF16 };
    for (int d = 0; d < 2; d++) {
        net_job job = after_one_rank(dtypes[d]);
        for (int units = 1 + d; units < 8; units += 1 + 4 * d) { /* not the last */
            job.recompute = units;
            job.policy.micro_batches = units % 2 + 1;
            job.policy.prefetch = units % 3, job.policy.prefetch_backward = units % 2;
            everywhere(&job, "recompute");
        }
    }
}

/* A frozen unit keeps its values; those in front of it may not even run backward. */
TEST(frozen_units)
{
    for (int units = 1; units < 16; units += 2)
        for (int d = 0; d < 2; d++) {
            net_job job = net_job_of(0, d ? LLMPAR_F16 : LLMPAR_F32);
            job.frozen = units == 15 ? 6 : units;
            memset(&net_reference, 0, sizeof net_reference);
            net_launch_ok(&job, "one rank");
            for (int i = 0; i < 4; i++) {
                char row[100];
                job.mesh = net_meshes[1 + i % 2];
                job.recompute = i == 2 ? 7 : 0;
                job.fsdp.zero = i == 3 ? LLMPAR_ZERO_2 : LLMPAR_ZERO_3;
                job.policy.micro_batches = i == 1 ? 2 : 1;
                snprintf(row, sizeof row, "frozen %d, %d", job.frozen, i);
                net_launch_ok(&job, row);
            }
        }
}

TEST(schedules)
{
    static const llmpar_policy policies[] = {
        /* micro_batches, no_sync, chain, zero, shards, replicas, reshard, every, prefetch, backward */
        { 4, 0, 0, 0, 0, 0, LLMPAR_RESHARD_ALWAYS, 0, 2, 1, 0, 0, 0, LLMPAR_UPDATE_AFTER, 0 }, { 2, 0, 0, 0, 0, 0, LLMPAR_RESHARD_NEVER, 0, 1, 0, 0, 0, 0, LLMPAR_UPDATE_AFTER, 0 }, { 2, 1, 0, 0, 0, 0, LLMPAR_RESHARD_EVERY, 2, 0, 3, 0, 0, 0, LLMPAR_UPDATE_AFTER, 0 },
        { 1, 0, 0, 0, 0, 0, LLMPAR_RESHARD_EVERY, 3, 4, 4, 0, 0, 0, LLMPAR_UPDATE_AFTER, 0 }, { 2, 0, 0, 0, 0, 0, LLMPAR_RESHARD_DEFAULT, 0, 1, 2, 0, 0, 0, LLMPAR_UPDATE_AFTER, 0 },
    };
    net_job job = after_one_rank(LLMPAR_F32);
    for (int i = 0; i < 5; i++) {
        char row[40];
        job.policy = policies[i];
        snprintf(row, sizeof row, "policy %d", i);
        everywhere(&job, row);
    }
    /* In sequence: equal among themselves at the same number of micro-batches. */
    memset(&net_reference, 0, sizeof net_reference);
    memset(&job.policy, 0, sizeof job.policy);
    job.policy.micro_batches = 2, job.policy.chain = 1;
    everywhere(&job, "chain");
}

TEST(updates_inside_backward)
{
    static const llmpar_dtype dtypes[] = { LLMPAR_F32, LLMPAR_F16 };
    for (int d = 0; d < 2; d++) {
        net_job job = after_one_rank(dtypes[d]);
        job.policy.update = LLMPAR_UPDATE_INSIDE;
        everywhere(&job, "inside");
        job.policy.update = LLMPAR_UPDATE_TWO_PASSES;
        everywhere(&job, "two passes");
        job.recompute = 6;
        everywhere(&job, "two passes, recompute");
    }
}

/* Every set of states, in host memory and in a file, on several meshes. */
TEST(offload_tiers)
{
    static const llmpar_dtype dtypes[] = { LLMPAR_F32, LLMPAR_BF16 };
    for (int d = 0; d < 2; d++) {
        net_job job = after_one_rank(dtypes[d]);
        for (int set = 1; set < 16; set += 16 / test_rounds(16))
            for (int i = 0; i < 4; i++) {
                char row[100];
                for (int s = 0; s < LLMPAR_STATE_COUNT; s++) job.fsdp.offload[s] = !(set >> s & 1) ? LLMPAR_TIER_DEVICE : (set + s + i) % 2 ? LLMPAR_TIER_FILE : LLMPAR_TIER_HOST;
                job.mesh = net_meshes[(set + i) % NET_MESHES];
                job.fsdp.zero = LLMPAR_ZERO_0 + (set + i) % 4;
                if (set & 2 && !d) job.fsdp.zero = LLMPAR_ZERO_3, job.mesh = net_meshes[1 + i % 3]; /* the parameters themselves */
                job.policy.micro_batches = 1 + i % 2;
                job.policy.no_sync = i % 3 == 1;
                job.recompute = i == 3 ? 2 : 0;
                job.fsdp.offload_dir = "build";
                snprintf(row, sizeof row, "offload %d, %d, %s", set, i, llmpar_dtype_name(dtypes[d]));
                net_launch_ok(&job, row);
            }
        job.policy.micro_batches = 1, job.policy.no_sync = 0, job.recompute = 0;
        for (int s = 0; s < LLMPAR_STATE_COUNT; s++) job.fsdp.offload[s] = LLMPAR_TIER_FILE;
        everywhere(&job, "all in a file");
        job.fsdp.offload[LLMPAR_STATE_GRADS] = LLMPAR_TIER_DEVICE; /* none is kept that could be stored */
        job.policy.update = LLMPAR_UPDATE_TWO_PASSES;
        everywhere(&job, "all in a file, two passes");
        job.policy.update = LLMPAR_UPDATE_INSIDE;
        everywhere(&job, "all in a file, inside");
    }
}

/* ZeRO-Offload: the optimizer works on the host, in the stores' memory. */
TEST(updates_on_the_host)
{
    static const llmpar_dtype dtypes[] = { LLMPAR_BF16, LLMPAR_F16, LLMPAR_F32 };
    for (int d = 0; d < 3; d++) {
        net_job job = after_one_rank(dtypes[d]);
        for (int s = LLMPAR_STATE_OPTIMIZER; s <= LLMPAR_STATE_GRADS; s++) job.fsdp.offload[s] = LLMPAR_TIER_HOST;
        job.fsdp.offload_update = LLMPAR_TIER_HOST;
        everywhere(&job, "on the host");
        job.policy.micro_batches = 2;
        job.policy.prefetch = 1;
        everywhere(&job, "on the host, two micro-batches");
        job.policy.no_sync = 1;
        job.recompute = 6;
        everywhere(&job, "on the host, no_sync");
        job.policy.no_sync = 0;
        job.fsdp.overlap = 1;
        job.fsdp.offload[LLMPAR_STATE_ACTIVATIONS] = LLMPAR_TIER_FILE;
        job.fsdp.offload_dir = "build";
        everywhere(&job, "on the host, overlap");
    }
    net_job job = net_job_of(1, LLMPAR_BF16);
    llmpar_error error;
    llmpar_launch_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.ranks = 2, desc.check = test_no_leak;
    job.fsdp.offload_update = LLMPAR_TIER_HOST;
    job.fsdp.offload[LLMPAR_STATE_OPTIMIZER] = LLMPAR_TIER_HOST;
    job.fsdp.offload[LLMPAR_STATE_GRADS] = LLMPAR_TIER_FILE;
    CHECK_STATUS(llmpar_launch(&desc, net_rank, &job, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "updates on the host with optimizer=host, params=device, grads=file, expected all three offloaded to host");
    job.fsdp.offload_update = LLMPAR_TIER_FILE;
    CHECK_STATUS(llmpar_launch(&desc, net_rank, &job, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "offload_update = 2");
}

/* Every stream on a thread of its own. */
TEST(overlap)
{
    static const llmpar_dtype dtypes[] = { LLMPAR_F32, LLMPAR_BF16 };
    for (int d = 0; d < 2; d++) {
        net_job job = after_one_rank(dtypes[d]);
        job.fsdp.overlap = 1;
        everywhere(&job, "overlap");
        job.policy.prefetch = 2, job.policy.prefetch_backward = 1, job.policy.micro_batches = 2;
        job.recompute = 2;
        everywhere(&job, "overlap, prefetch");
        for (int s = 0; s < LLMPAR_STATE_COUNT; s++) job.fsdp.offload[s] = s % 2 ? LLMPAR_TIER_HOST : LLMPAR_TIER_FILE;
        job.fsdp.offload_dir = "build";
        everywhere(&job, "overlap, offload");
        job.fsdp.offload[LLMPAR_STATE_GRADS] = LLMPAR_TIER_DEVICE;
        job.policy.micro_batches = 1;
        job.policy.update = LLMPAR_UPDATE_INSIDE;
        everywhere(&job, "overlap, inside");
    }
    llmpar_error error;
    llmpar_launch_desc desc;
    net_job job = net_job_of(1, LLMPAR_F32);
    job.fsdp.overlap = 1;
    memset(&desc, 0, sizeof desc);
    desc.ranks = 2, desc.lockstep = 1, desc.check = test_no_leak;
    CHECK_STATUS(llmpar_launch(&desc, net_rank, &job, &error), LLMPAR_ERR_UNSUPPORTED);
    CHECK_TEXT(error.text, "overlap: lockstep");
}

/* On a device that runs each stream as late, or the others as early, as waits allow. */
static debug_order late_order;
static llmpar_status late_rank(llmpar_ctx *ctx, void *user)
{
    debug_device *d = (debug_device *)calloc(1, sizeof *d);
    llmpar_device *own = ctx->device;
    debug_device_init(d, own, late_order);
    ctx->device = ctx->comm->device = &d->table;
    llmpar_status status = net_rank(ctx, user);
    ctx->device = ctx->comm->device = own;
    if (!status && (d->most_pending < 5 || d->pending || d->early_free))
        TEST_FAIL("rank %d: at most %llu operations waited, %llu were never waited for, %llu times memory was given back too early", ctx->rank, (unsigned long long)d->most_pending, (unsigned long long)d->pending, (unsigned long long)d->early_free);
    free(d);
    return status;
}

TEST(late_streams)
{
    for (int d = 0; d < 2; d++) {
        net_job job = after_one_rank(d ? LLMPAR_BF16 : LLMPAR_F32);
        for (int row = 0; row < 6; row++)
            for (int order = DEBUG_FIFO; order <= DEBUG_OTHERS; order++) {
                llmpar_error error;
                llmpar_launch_desc desc;
                int before = test_failures;
                memset(&desc, 0, sizeof desc);
                job = net_job_of(1 + row % 3, d ? LLMPAR_BF16 : LLMPAR_F32);
                job.fsdp.offload_dir = "build";
                job.fsdp.zero = row == 1 ? LLMPAR_ZERO_1 : row == 2 ? LLMPAR_ZERO_2 : LLMPAR_ZERO_3;
                for (int s = 0; s < LLMPAR_STATE_COUNT && row % 2; s++) job.fsdp.offload[s] = s % 2 ? LLMPAR_TIER_FILE : LLMPAR_TIER_HOST;
                if (row == 5 || (row == 3 && d)) { /* updated on the host */
                    for (int s = LLMPAR_STATE_OPTIMIZER; s <= LLMPAR_STATE_GRADS; s++) job.fsdp.offload[s] = LLMPAR_TIER_HOST;
                    job.fsdp.offload_update = LLMPAR_TIER_HOST;
                }
                if (row % 2 && !d && !sharded_params(&job) && job.fsdp.offload_update != LLMPAR_TIER_HOST) job.fsdp.offload[LLMPAR_STATE_PARAMS] = LLMPAR_TIER_DEVICE;
                job.policy.micro_batches = row == 4 ? 1 : 2;
                job.policy.update = row == 4 ? LLMPAR_UPDATE_TWO_PASSES : LLMPAR_UPDATE_AFTER;
                job.policy.prefetch = row % 3, job.policy.prefetch_backward = row % 2;
                job.recompute = row > 2 ? 6 : 0;
                late_order = (debug_order)order;
                desc.ranks = job.mesh.dp_replicate * job.mesh.dp_shard;
                desc.check = test_no_leak;
                if (llmpar_launch(&desc, late_rank, &job, &error)) TEST_FAIL("rank %d (%s): %s", error.rank, error.where, error.text);
                if (test_failures != before) fprintf(stderr, "  (row %d, order %d, dtype %d)\n", row, order, d);
            }
    }
}

/* ---- gradients in half the bytes ---- */

static llmpar_status narrow(const net_job *job, llmpar_fsdp *fsdp)
{
    net_result *r = (net_result *)calloc(1, sizeof *r);
    net_optimizer state = { 0, 0, 0 };
    llmpar_optimizer table = { &state, net_optimizer_begin, net_optimizer_update };
    llmpar_schedule *schedule = NULL;
    net_device = llmpar_fsdp_mesh(fsdp)->ctx->device;
    llmpar_status status = net_schedule(job, fsdp, &schedule);
    llmpar_run run;
    memset(&run, 0, sizeof run);
    run.optimizer = &table;
    run.on_gradient = net_look;
    run.on_gradient_user = r;
    if (!status) status = net_step(job, fsdp, 0, schedule, &run);
    CHECK(run.loss == net_reference.loss[0]);
    double bound = job->fsdp.reduce_dtype == LLMPAR_BF16 ? 1.0 / 128 : 1.0 / 1024, off = 0;
    CHECK_NEAR(run.grad_norm / net_reference.norm[0], 1, bound);
    for (int k = 0; k < NET_PARAMS && !status; k++) {
        double most = 0;
        for (int i = 0; i < net_all[k].count; i++) {
            double want = net_reference.g[k][i], d = r->g[k][i] - want;
            if (most < (want < 0 ? -want : want)) most = want < 0 ? -want : want;
            if (off < (d < 0 ? -d : d)) off = d < 0 ? -d : d;
        }
        for (int i = 0; i < net_all[k].count; i++) /* every rank's part was rounded, so cancelling sums are off by their parts' size */
            if (!(r->g[k][i] - net_reference.g[k][i] <= 4 * bound * most && net_reference.g[k][i] - r->g[k][i] <= 4 * bound * most)) { TEST_FAIL("%s[%d]: %g, exactly %g", net_all[k].name, i, r->g[k][i], net_reference.g[k][i]); break; }
    }
    CHECK(off > 0); /* it was rounded at all */
    llmpar_schedule_destroy(schedule);
    free(r);
    return status;
}

static llmpar_status first_step(const net_job *job, llmpar_fsdp *fsdp)
{
    net_result *r = &net_reference;
    llmpar_schedule *schedule = NULL;
    llmpar_run run;
    memset(&run, 0, sizeof run);
    run.on_gradient = net_look;
    run.on_gradient_user = r;
    llmpar_status status = net_schedule(job, fsdp, &schedule);
    if (!status) status = net_step(job, fsdp, 0, schedule, &run);
    r->loss[0] = run.loss, r->norm[0] = run.grad_norm;
    llmpar_schedule_destroy(schedule);
    return status;
}

TEST(reduce_dtype)
{
    for (int mesh = 1; mesh < NET_MESHES; mesh++)
        for (int zero = LLMPAR_ZERO_0; zero <= LLMPAR_ZERO_3; zero++)
            for (int d = 0; d < 2; d++) {
                char row[60];
                net_job job = net_job_of(0, LLMPAR_F32);
                memset(&net_reference, 0, sizeof net_reference);
                job.body = first_step;
                net_launch_ok(&job, "one rank");
                job = net_job_of(mesh, LLMPAR_F32);
                job.fsdp.zero = zero;
                job.fsdp.reduce_dtype = d ? LLMPAR_F16 : LLMPAR_BF16;
                job.body = narrow;
                snprintf(row, sizeof row, "mesh %d, zero %d, %s", mesh, zero - 1, llmpar_dtype_name(job.fsdp.reduce_dtype));
                net_launch_ok(&job, row);
            }
}

/* ---- a step that is not finite ---- */

static llmpar_status overflow(const net_job *job, llmpar_fsdp *fsdp)
{
    net_optimizer state = { 0, 0, 0 };
    llmpar_optimizer table = { &state, net_optimizer_begin, net_optimizer_update };
    llmpar_schedule *schedule = NULL;
    double before[NET_MOST], after[NET_MOST];
    net_job calm = *job;
    calm.loss_scale = 1;
    net_device = llmpar_fsdp_mesh(fsdp)->ctx->device;
    llmpar_status status = net_schedule(job, fsdp, &schedule);
    for (int i = 0; i < 2 && !status; i++) {
        llmpar_run run;
        memset(&run, 0, sizeof run);
        run.optimizer = &table;
        net_whole(fsdp, 2, llmpar_fsdp_shard(fsdp, 1, NULL, NULL, NULL), before);
        CHECK_OK(llmpar_fsdp_shard_done(fsdp, 1, 0));
        status = net_step(i ? &calm : job, fsdp, i, schedule, &run);
        if (status) break;
        CHECK_INT(run.found_inf, i == 0);
        CHECK_INT(state.updates, i * NET_UNITS);
        net_whole(fsdp, 2, llmpar_fsdp_shard(fsdp, 1, NULL, NULL, NULL), after);
        CHECK_OK(llmpar_fsdp_shard_done(fsdp, 1, 0));
        CHECK_INT(memcmp(before, after, sizeof before) != 0, i); /* the copy in the compute dtype and the whole parameters as little: the next step's loss */
        CHECK(run.loss < 1e4);
    }
    llmpar_schedule_destroy(schedule);
    return status;
}

TEST(skipped_steps)
{
    for (int mesh = 0; mesh < NET_MESHES; mesh++)
        for (int zero = LLMPAR_ZERO_0; zero <= LLMPAR_ZERO_3; zero++)
            for (int kind = 0; kind < 3; kind++) {
                llmpar_error error;
                net_job job = net_job_of(mesh, LLMPAR_F16);
                job.body = overflow;
                job.loss_scale = 1e30;
                job.skip_nonfinite = 1;
                job.fsdp.zero = zero;
                if (kind == 1) job.policy.update = LLMPAR_UPDATE_TWO_PASSES;
                for (int s = 0; s < LLMPAR_STATE_COUNT && kind == 2; s++) job.fsdp.offload[s] = LLMPAR_TIER_HOST;
                net_launch_ok(&job, kind == 1 ? "two passes" : kind ? "offload" : "plain");
                job.skip_nonfinite = 0;
                CHECK_STATUS(net_launch(&job, &error), LLMPAR_ERR_NONFINITE);
                CHECK_TEXT(error.text, kind == 1 ? "first non-finite tensor" : "first non-finite tensor: the gradient of table"); /* of two passes the first has given its gradients back */
            }
    llmpar_error error;
    net_job job = net_job_of(0, LLMPAR_F32);
    job.policy.update = LLMPAR_UPDATE_INSIDE;
    job.skip_nonfinite = 1;
    CHECK_STATUS(net_launch(&job, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "two passes");
}

/* ---- memory ---- */

static uint64_t line_of(const llmpar_account_line *lines, int32_t count, const char *name)
{
    for (int32_t i = 0; i < count; i++)
        if (!strcmp(lines[i].name, name)) return lines[i].bytes;
    return 0;
}

static void check_lines(const llmpar_account_line *lines, int32_t count, const uint64_t *usage, const char *when)
{
    static const llmpar_tag tags[] = { LLMPAR_TAG_PARAMETERS, LLMPAR_TAG_GATHERED, LLMPAR_TAG_GRADIENTS, LLMPAR_TAG_OPTIMIZER };
    for (int t = 0; t < 4; t++) {
        uint64_t sum = 0;
        for (int32_t i = 0; i < count; i++) sum += lines[i].tag == tags[t] ? lines[i].bytes : 0;
        if (sum != usage[tags[t]]) TEST_FAIL("%s: %s: the lines give %llu bytes, the arena %llu", when, llmpar_tag_name(tags[t]), (unsigned long long)sum, (unsigned long long)usage[tags[t]]);
    }
}

/* Over the ranks that share it, a state of `width` bytes a number is held `copies` times. */
static void check_width(llmpar_fsdp *fsdp, uint64_t bytes, int64_t width, int64_t psi, int64_t copies, const char *what)
{
    int64_t mine = (int64_t)bytes, sum = 0;
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.send = &mine, call.recv = &sum, call.count = 1, call.dtype = LLMPAR_I64;
    CHECK_OK(llmpar_all_reduce(llmpar_fsdp_mesh(fsdp)->world, NULL, &call));
    if (sum != width * psi * copies) TEST_FAIL("%s: %lld bytes over all ranks, want %lld * %lld * %lld", what, (long long)sum, (long long)width, (long long)psi, (long long)copies);
}

static llmpar_status measure(const net_job *job, llmpar_fsdp *fsdp)
{
    enum { MOST = 16 };
    llmpar_account_line rest[MOST], before[MOST], peak[MOST];
    net_optimizer state = { 0, 0, 0 };
    llmpar_optimizer table = { &state, net_optimizer_begin, net_optimizer_update };
    llmpar_arena *arena = llmpar_fsdp_arena(fsdp);
    llmpar_arena_usage usage;
    llmpar_schedule *schedule = NULL;
    llmpar_policy policy;
    const llmpar_mesh *mesh = llmpar_fsdp_mesh(fsdp);
    int64_t psi = 0, ranks = mesh->dp_ranks, shards = mesh->degree[LLMPAR_AXIS_DP_SHARD], replicas = ranks / shards;
    net_device = mesh->ctx->device;
    memset(&policy, 0, sizeof policy);
    llmpar_fsdp_policy(fsdp, &policy);
    for (int k = 0; k < NET_PARAMS; k++) psi += net_all[k].count;
    int64_t p = (int64_t)llmpar_dtype_size(llmpar_fsdp_dtype(fsdp)), g = (int64_t)llmpar_dtype_size(llmpar_dtype_sum(llmpar_fsdp_dtype(fsdp))), K = 2 * g + (p < g ? g : 0);
    int32_t n = llmpar_fsdp_account(fsdp, NULL, LLMPAR_MARK_REST, rest, MOST);
    llmpar_arena_get_usage(arena, &usage);
    check_lines(rest, n, usage.live, "created");
    if (!(policy.offload & 1u << LLMPAR_STATE_PARAMS && p == g)) check_width(fsdp, line_of(rest, n, "parameters"), p, psi, llmpar_policy_whole_params(&policy) ? ranks : replicas, "parameters");
    int64_t kept = K - (policy.offload & 1u << LLMPAR_STATE_OPTIMIZER ? 2 * g : 0) - (policy.offload & 1u << LLMPAR_STATE_PARAMS && p < g ? g : 0);
    check_width(fsdp, line_of(rest, n, "optimizer") + line_of(rest, n, "master parameters"), kept, psi, llmpar_policy_whole_state(&policy) ? ranks : replicas, "optimizer");
    if (p == 2 && !policy.offload) CHECK(p == 2 && g == 4 && K == 12);
    llmpar_status status = net_schedule(job, fsdp, &schedule);
    if (!status) {
        int32_t before_count = llmpar_fsdp_account(fsdp, schedule, LLMPAR_MARK_BEFORE_OPTIMIZER, before, MOST), peak_count = llmpar_fsdp_account(fsdp, schedule, LLMPAR_MARK_PEAK, peak, MOST);
        for (int i = 0; i < 2 && !status; i++) {
            llmpar_run run;
            memset(&run, 0, sizeof run);
            run.optimizer = &table;
            llmpar_arena_reset_peaks(arena);
            status = net_step(job, fsdp, i, schedule, &run);
            check_lines(before, before_count, run.before_optimizer.live, "before the optimizer");
            llmpar_arena_get_usage(arena, &usage);
            check_lines(rest, n, usage.live, "after the step");
            check_lines(peak, peak_count, usage.peak, "peak");
            if (policy.offload & 1u << LLMPAR_STATE_GRADS || job->policy.update) continue;
            check_width(fsdp, line_of(before, before_count, "gradients"), g, psi, llmpar_policy_whole_grads(&policy) ? ranks : replicas, "gradients");
            CHECK_INT(line_of(before, before_count, "micro-batch counters") + line_of(before, before_count, "second slot of a tied weight") + line_of(before, before_count, "local gradients"), 0);
            if (job->policy.micro_batches > 1 && llmpar_policy_whole_grads(&policy)) CHECK(line_of(peak, peak_count, "micro-batch counters") > 0);
        }
    }
    llmpar_schedule_destroy(schedule);
    return status;
}

TEST(memory)
{
    static const llmpar_dtype dtypes[] = { LLMPAR_F32, LLMPAR_BF16 };
    for (int d = 0; d < 2; d++)
        for (int kind = 0; kind < 6; kind++) {
            net_job job = net_job_of(0, dtypes[d]);
            job.body = measure;
            if (kind == 1) job.policy.micro_batches = 2;
            if (kind == 2) job.policy.micro_batches = 2, job.policy.no_sync = 1, job.policy.prefetch = 2;
            if (kind == 3) job.policy.update = LLMPAR_UPDATE_INSIDE, job.recompute = 6;
            for (int s = 0; s < LLMPAR_STATE_COUNT && kind > 3; s++) job.fsdp.offload[s] = kind == 4 ? LLMPAR_TIER_HOST : s == LLMPAR_STATE_OPTIMIZER ? LLMPAR_TIER_FILE : LLMPAR_TIER_DEVICE;
            job.fsdp.offload_dir = "build";
            everywhere(&job, kind == 0 ? "plain" : kind == 1 ? "two micro-batches" : kind == 2 ? "no_sync" : kind == 3 ? "inside" : kind == 4 ? "host" : "optimizer in a file");
        }
}


/* ---- by hand ---- */

/* Every number of a unit is changed in the buffers handed out: what forward sees is that, rounded to the compute dtype, on every rank. */
static llmpar_status by_hand(const net_job *job, llmpar_fsdp *fsdp)
{
    llmpar_dtype dtype = llmpar_fsdp_dtype(fsdp), sum = llmpar_dtype_sum(dtype);
    llmpar_arena_usage first, usage;
    llmpar_arena_get_usage(llmpar_fsdp_arena(fsdp), &first);
    for (int32_t u = 0; u < NET_UNITS; u++) {
        int64_t elements, told;
        const llmpar_segment *segments, *same;
        int32_t count, as_many;
        llmpar_fsdp_layout(fsdp, u, &told, &same, &as_many);
        for (int round = 0; round < 2; round++) {
            char *shard = (char *)llmpar_fsdp_shard(fsdp, u, &elements, &segments, &count);
            CHECK(shard != NULL && elements == told && segments == same && count == as_many);
            for (int32_t s = 0; shard && s < count; s++)
                for (int64_t i = segments[s].begin; i < segments[s].begin + segments[s].count; i++) {
                    double x = net_get(shard, i, sum);
                    if (round && x != 1 + 1.0 / 4096) { TEST_FAIL("unit %d: element %lld is %g again", (int)u, (long long)i, x); break; }
                    net_put(shard, i, sum, 1 + 1.0 / 4096); /* not a bf16 or f16 number */
                }
            CHECK_OK(llmpar_fsdp_shard_done(fsdp, u, !round));
            for (int i = 0; i < 2 && !(job->frozen >> u & 1); i++) {
                void *state = llmpar_fsdp_optimizer_state(fsdp, u, i);
                CHECK(state != NULL);
                for (int64_t e = 0; state && e < elements; e++) {
                    double want = round ? 3 + i : 0;
                    if (net_get(state, e, sum) != want) { TEST_FAIL("unit %d: state %d is %g, want %g", (int)u, i, net_get(state, e, sum), want); break; }
                    net_put(state, e, sum, 3 + i);
                }
            }
            CHECK_OK(llmpar_fsdp_optimizer_done(fsdp, u, !round));
            if (job->frozen >> u & 1 && dtype != sum) break; /* it has the rounded numbers alone */
        }
        void *const *params;
        CHECK_OK(llmpar_fsdp_unshard(fsdp, u, &params));
        for (int k = 0; k < NET_PARAMS; k++)
            for (int i = 0; i < net_all[k].count && net_all[k].unit == u; i++)
                if (net_get(params[net_all[k].param], i, dtype) != (dtype == LLMPAR_F32 ? 1 + 1.0 / 4096 : 1)) { TEST_FAIL("%s[%d] is %g where forward reads it", net_all[k].name, i, net_get(params[net_all[k].param], i, dtype)); break; }
        CHECK_OK(llmpar_fsdp_reshard(fsdp, u));
    }
    llmpar_arena_get_usage(llmpar_fsdp_arena(fsdp), &usage);
    CHECK_INT(usage.live_total, first.live_total);
    /* Fetched and not given back: a step says so. */
    if (!job->fsdp.offload[LLMPAR_STATE_OPTIMIZER]) return LLMPAR_OK;
    CHECK(llmpar_fsdp_optimizer_state(fsdp, 3, 0) != NULL);
    CHECK_OK(llmpar_comm_barrier(llmpar_fsdp_mesh(fsdp)->world, NULL, "all have looked")); /* whoever fails first ends the others */
    return net_two_steps(job, fsdp);
}

TEST(looking_in)
{
    for (int kind = 0; kind < 12; kind++)
        for (int zero = LLMPAR_ZERO_0; zero <= LLMPAR_ZERO_3; zero++) {
            llmpar_error error;
            net_job job = net_job_of(kind % 4, kind % 3 ? LLMPAR_F16 : LLMPAR_F32);
            job.body = by_hand;
            job.fsdp.zero = zero;
            job.fsdp.offload_dir = "build";
            job.frozen = kind % 2 ? 2 : 0;
            for (int s = 0; s < 2; s++) job.fsdp.offload[s] = (llmpar_tier)(kind / 4);
            if (kind % 3 == 0 && !sharded_params(&job)) job.fsdp.offload[LLMPAR_STATE_PARAMS] = LLMPAR_TIER_DEVICE;
            int before = test_failures;
            llmpar_status status = net_launch(&job, &error);
            if (status != (kind < 4 ? LLMPAR_OK : LLMPAR_ERR_ARGUMENT)) TEST_FAIL("%s", error.text);
            if (kind >= 4) CHECK_TEXT(error.text, "unit score: its shard or state is still fetched by hand");
            if (test_failures != before) fprintf(stderr, "  (kind %d, zero %d)\n", kind, zero - 1);
        }
    llmpar_error error;
    net_job job = net_job_of(1, LLMPAR_F32);
    job.fsdp.zero = LLMPAR_ZERO_2;
    job.fsdp.offload[LLMPAR_STATE_PARAMS] = LLMPAR_TIER_HOST;
    CHECK_STATUS(net_launch(&job, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "offload of params, dtype f32, ZeRO-2 on 2 ranks: the whole parameters are in use all the time");
}

/* ---- bytes of instructions ---- */

static llmpar_status count_bytes(const net_job *job, llmpar_fsdp *fsdp)
{
    llmpar_mesh *mesh = llmpar_fsdp_mesh(fsdp);
    llmpar_schedule *schedule = NULL;
    llmpar_micro micro;
    llmpar_run run;
    net_optimizer state = { 0, 0, 0 };
    llmpar_optimizer table = { &state, net_optimizer_begin, net_optimizer_update };
    uint64_t sent[3] = { 0, 0, 0 }, fetched = 0, stored = 0, updated = 0, state_bytes = 0;
    memset(&micro, 0, sizeof micro);
    memset(&run, 0, sizeof run);
    net_device = mesh->ctx->device;
    micro.batch = micro.leaves = NET_B / (mesh->dp_ranks * (job->policy.micro_batches ? job->policy.micro_batches : 1));
    micro.t = NET_T;
    run.optimizer = &table;
    llmpar_status status = net_schedule(job, fsdp, &schedule);
    if (status) return status;
    uint64_t *bytes = (uint64_t *)calloc((size_t)schedule->count, sizeof *bytes);
    CHECK_OK(llmpar_fsdp_bytes(fsdp, schedule, &micro, bytes));
    for (int32_t i = 0; i < schedule->count; i++) {
        const llmpar_instruction *in = &schedule->list[i];
        if (in->op == LLMPAR_OP_GATHER || in->op == LLMPAR_OP_REDUCE) sent[0] += bytes[i];
        if (in->op == LLMPAR_OP_REDUCE_REPLICA) sent[1] += bytes[i];
        if (in->op == LLMPAR_OP_SCALAR_REDUCE) sent[2] += bytes[i];
        if (in->op == LLMPAR_OP_FETCH) fetched += bytes[i];
        if (in->op == LLMPAR_OP_STORE) stored += bytes[i];
        if (in->op == LLMPAR_OP_OPTIM) updated += bytes[i];
        if (in->op == LLMPAR_OP_FORWARD && in->unit == NET_MIX0) /* output, saved, scratch */
            CHECK_INT(bytes[i], 2 * micro.batch * NET_T * NET_D * 4 + micro.leaves * (NET_D * NET_D + NET_V * NET_D + NET_T * NET_D) * 8);
        CHECK((bytes[i] > 0) == (in->op != LLMPAR_OP_FREE));
    }
    for (int32_t u = 0; u < NET_UNITS; u++) {
        int64_t elements;
        llmpar_fsdp_layout(fsdp, u, &elements, NULL, NULL);
        state_bytes += 8 * (uint64_t)elements;
    }
    CHECK_INT(updated, 3 * state_bytes / 2 + 2 * state_bytes);
    if (job->fsdp.offload[LLMPAR_STATE_OPTIMIZER]) CHECK(fetched == state_bytes && stored == state_bytes);
    llmpar_policy policy;
    memset(&policy, 0, sizeof policy);
    llmpar_fsdp_policy(fsdp, &policy);
    llmpar_comm *comm[3] = { mesh->comm[LLMPAR_AXIS_DP_SHARD], policy.shards < 2 ? mesh->dp : mesh->comm[LLMPAR_AXIS_DP_REPLICATE], mesh->world };
    uint64_t before[3];
    for (int c = 0; c < 3; c++) before[c] = comm[c]->bytes_sent;
    status = net_step(job, fsdp, 0, schedule, &run);
    for (int c = 0; c < 3; c++) CHECK_INT(comm[c]->bytes_sent - before[c], sent[c]);
    free(bytes);
    llmpar_schedule_destroy(schedule);
    return status;
}

TEST(bytes_of_instructions)
{
    for (int mesh = 1; mesh < NET_MESHES; mesh++)
        for (int zero = LLMPAR_ZERO_0; zero <= LLMPAR_ZERO_3; zero++)
            for (int kind = 0; kind < 3; kind++) {
                char row[60];
                net_job job = net_job_of(mesh, LLMPAR_F32);
                job.body = count_bytes;
                job.fsdp.zero = zero;
                job.fsdp.reduce_dtype = kind == 1 ? LLMPAR_BF16 : LLMPAR_DTYPE_DEFAULT;
                job.policy.micro_batches = 1 + kind % 2;
                if (kind == 2) job.fsdp.offload[LLMPAR_STATE_OPTIMIZER] = LLMPAR_TIER_HOST;
                snprintf(row, sizeof row, "mesh %d, zero %d, kind %d", mesh, zero - 1, kind);
                net_launch_ok(&job, row);
            }
}

TEST_LIST(T_(zero_stages), T_(recomputation), T_(frozen_units), T_(schedules), T_(updates_inside_backward), T_(offload_tiers), T_(updates_on_the_host), T_(overlap), T_(late_streams), T_(reduce_dtype), T_(skipped_steps), T_(memory), T_(looking_in), T_(bytes_of_instructions))
