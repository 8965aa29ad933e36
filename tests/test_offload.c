/* What of a step's data is where, and when: ZeRO stages, compute dtypes, recomputation, frozen units, states in host memory and in files, updates inside backward. All of it changes no bit; memory is
   accounted for to the byte; what cannot be kept is refused and leaves nothing behind. */
#include "fsdp_net.h"

static const llmpar_mesh_desc meshes[] = { { 1, 1, 1, 1, 1 }, { 1, 2, 1, 1, 1 }, { 1, 4, 1, 1, 1 }, { 2, 2, 1, 1, 1 }, { 4, 1, 1, 1, 1 } };
enum { MESHES = 5 };

static net_job job_of(int mesh, llmpar_dtype dtype)
{
    net_job job;
    memset(&job, 0, sizeof job);
    job.mesh = meshes[mesh];
    job.fsdp.dtype = dtype;
    job.fsdp.seed = 5;
    job.fsdp.optimizer_states = 2;
    job.body = net_train;
    return job;
}

static int sharded_params(const net_job *job) { return job->mesh.dp_shard > 1 && (job->fsdp.zero == LLMPAR_ZERO_DEFAULT || job->fsdp.zero == LLMPAR_ZERO_3); }

/* Runs the job on every mesh and in every ZeRO stage; the first, on one rank, is what the others must equal. */
static void everywhere(const net_job *like, const char *name)
{
    for (int mesh = 0; mesh < MESHES; mesh++)
        for (int zero = LLMPAR_ZERO_0; zero <= LLMPAR_ZERO_3; zero++) {
            char row[200];
            net_job job = *like;
            job.mesh = meshes[mesh];
            job.fsdp.zero = zero;
            if ((like->policy.micro_batches > 2 && mesh > 1) || (job.fsdp.offload[LLMPAR_STATE_PARAMS] && job.fsdp.dtype == LLMPAR_F32 && !sharded_params(&job))) continue;
            if (mesh == 0 && zero != LLMPAR_ZERO_3 && zero != LLMPAR_ZERO_0) continue;
            snprintf(row, sizeof row, "%s, mesh %d, zero %d", name, mesh, zero - 1);
            net_launch_ok(&job, row);
        }
}

TEST(zero_stages)
{
    static const llmpar_dtype dtypes[] = { LLMPAR_F32, LLMPAR_F64, LLMPAR_BF16, LLMPAR_F16 };
    for (int d = 0; d < 4; d++) {
        net_job job = job_of(0, dtypes[d]);
        memset(&net_reference, 0, sizeof net_reference);
        everywhere(&job, llmpar_dtype_name(dtypes[d]));
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
        net_job job = job_of(0, dtypes[d]);
        memset(&net_reference, 0, sizeof net_reference);
        net_launch_ok(&job, "one rank");
        for (int units = 1; units < 8; units++) { /* not the last */
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
            net_job job = job_of(0, d ? LLMPAR_F16 : LLMPAR_F32);
            job.frozen = units == 15 ? 6 : units;
            memset(&net_reference, 0, sizeof net_reference);
            net_launch_ok(&job, "one rank");
            for (int i = 0; i < 4; i++) {
                char row[100];
                job.mesh = meshes[1 + i % 2];
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
        { 4, 0, 0, 0, 0, 0, LLMPAR_RESHARD_ALWAYS, 0, 2, 1, 0, 0, 0, LLMPAR_UPDATE_AFTER }, { 2, 0, 0, 0, 0, 0, LLMPAR_RESHARD_NEVER, 0, 1, 0, 0, 0, 0, LLMPAR_UPDATE_AFTER }, { 2, 1, 0, 0, 0, 0, LLMPAR_RESHARD_EVERY, 2, 0, 3, 0, 0, 0, LLMPAR_UPDATE_AFTER },
        { 1, 0, 0, 0, 0, 0, LLMPAR_RESHARD_EVERY, 3, 4, 4, 0, 0, 0, LLMPAR_UPDATE_AFTER }, { 2, 0, 0, 0, 0, 0, LLMPAR_RESHARD_DEFAULT, 0, 1, 2, 0, 0, 0, LLMPAR_UPDATE_AFTER },
    };
    net_job job = job_of(0, LLMPAR_F32);
    memset(&net_reference, 0, sizeof net_reference);
    net_launch_ok(&job, "one rank");
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
        net_job job = job_of(0, dtypes[d]);
        memset(&net_reference, 0, sizeof net_reference);
        net_launch_ok(&job, "one rank");
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
        net_job job = job_of(0, dtypes[d]);
        memset(&net_reference, 0, sizeof net_reference);
        net_launch_ok(&job, "one rank");
        for (int set = 1; set < 16; set++)
            for (int i = 0; i < 4; i++) {
                char row[100];
                for (int s = 0; s < LLMPAR_STATE_COUNT; s++) job.fsdp.offload[s] = !(set >> s & 1) ? LLMPAR_TIER_DEVICE : (set + s + i) % 2 ? LLMPAR_TIER_FILE : LLMPAR_TIER_HOST;
                job.mesh = meshes[(set + i) % MESHES];
                job.fsdp.zero = LLMPAR_ZERO_0 + (set + i) % 4;
                if (set & 2 && !d) job.fsdp.zero = LLMPAR_ZERO_3, job.mesh = meshes[1 + i % 3]; /* the parameters themselves */
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
        job.policy.update = LLMPAR_UPDATE_TWO_PASSES;
        everywhere(&job, "all in a file, two passes");
        job.policy.update = LLMPAR_UPDATE_INSIDE;
        everywhere(&job, "all in a file, inside");
    }
}

TEST_LIST(T_(zero_stages), T_(recomputation), T_(frozen_units), T_(schedules), T_(updates_inside_backward), T_(offload_tiers))
