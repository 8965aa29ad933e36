/* The longest sequence that can be trained within one fixed memory limit per rank, on four ranks, under policies of growing thrift.

   For each policy the plan (the recipe on a device that only counts) is searched by doubling and halving; then a step is really trained at the length found, with the arena's limit on, and one at the next longer length
   has to be refused. One sequence a data rank: four of them where all ranks are data ranks, two on 2x2. Lengths are those of a sequence; the limit is what one rank's arena may hold at any moment: parameters, gradients,
   optimizer state, activations, workspaces. */
#define _DEFAULT_SOURCE 1
#include "llmpar.h"
#include "bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct policy { const char *name; int32_t shard, replicate, tp, zero, sp; llmpar_recompute recompute; int offload; } policy;
static const policy policies[] = {
    {"DDP",                                          1, 4, 1, LLMPAR_ZERO_0, 0, LLMPAR_RECOMPUTE_NONE, 0},
    {"FSDP",                                         4, 1, 1, LLMPAR_ZERO_3, 0, LLMPAR_RECOMPUTE_NONE, 0},
    {"FSDP x TP (2x2), sp",                          2, 1, 2, LLMPAR_ZERO_3, 1, LLMPAR_RECOMPUTE_NONE, 0},
    {"FSDP x TP (2x2), no sp",                       2, 1, 2, LLMPAR_ZERO_3, 0, LLMPAR_RECOMPUTE_NONE, 0},
    {"FSDP + recompute",                             4, 1, 1, LLMPAR_ZERO_3, 0, LLMPAR_RECOMPUTE_FULL, 0},
    {"FSDP x TP (2x2), sp + recompute",              2, 1, 2, LLMPAR_ZERO_3, 1, LLMPAR_RECOMPUTE_FULL, 0},
    {"FSDP + recompute + offload",                   4, 1, 1, LLMPAR_ZERO_3, 0, LLMPAR_RECOMPUTE_FULL, 1},
    {"FSDP x TP (2x2), sp + recompute + offload",    2, 1, 2, LLMPAR_ZERO_3, 1, LLMPAR_RECOMPUTE_FULL, 1},
};
enum { POLICIES = sizeof policies / sizeof policies[0] };

typedef struct search {
    const policy *p;
    uint64_t limit;
    int64_t step, length; /* out: longest multiple of step that trains; 0: none */
    int64_t flops_length; /* length of the step that is to be trained, 0: plan only */
    uint64_t peak;
    double loss;
} search;

static const llmpar_llama_config bench_model = { .vocab = 256, .hidden = 128, .intermediate = 352, .layers = 12, .heads = 8, .kv_heads = 8, .head_dim = 16, .max_positions = 1 << 17, .rms_eps = 1e-5, .rope_theta = 500000, .bos_id = -1 };

static int64_t longest; /* of all, for the source of tokens: set before the ranks start */
static llmpar_status bench_sequence(void *user, int64_t index, int32_t *tokens)
{
    int64_t length = *(const int64_t *)user;
    for (int64_t i = 0; i <= length; i++) tokens[i] = (int32_t)((uint64_t)(index * 7919 + i * 31 + i / 5) % 251);
    return LLMPAR_OK;
}

static void bench_desc(const search *s, const int64_t *length, llmpar_trainer_desc *d)
{
    memset(d, 0, sizeof *d);
    d->sequence = bench_sequence;
    d->sequence_user = (void *)(uintptr_t)length;
    d->seq_len = *length;
    d->zero = s->p->zero;
    d->sequence_parallel = s->p->sp;
    d->recompute = s->p->recompute;
    d->memory_limit = s->limit;
    d->log_every = -1;
    if (s->p->offload) {
        d->offload[LLMPAR_STATE_OPTIMIZER] = LLMPAR_TIER_FILE;
        d->offload[LLMPAR_STATE_ACTIVATIONS] = LLMPAR_TIER_FILE;
        d->offload_dir = getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp";
    }
}

/* Would a step of this length fit? The same answer on every rank: the plan's largest peak decides. */
static llmpar_status bench_fits(llmpar_ctx *ctx, llmpar_mesh *mesh, const search *s, int64_t length, int *fits)
{
    llmpar_llama_config config = bench_model;
    llmpar_llama_desc model_desc;
    llmpar_llama *model = NULL;
    llmpar_trainer_desc desc;
    llmpar_memory memory;
    llmpar_error error;
    memset(&model_desc, 0, sizeof model_desc);
    model_desc.config = &config;
    bench_desc(s, &length, &desc);
    desc.memory_limit = 0;
    llmpar_status status = llmpar_llama_create(ctx, &model_desc, &model);
    if (!status) status = llmpar_plan_memory(mesh, model, &desc, &memory, &error);
    llmpar_llama_destroy(model);
    int64_t peak = status ? 0 : (int64_t)memory.step.peak_total;
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.send = call.recv = &peak; /* CPU: host memory is device memory */
    call.count = 1;
    call.dtype = LLMPAR_I64;
    call.op = LLMPAR_MAX;
    if (!status) status = llmpar_all_reduce(ctx->comm, NULL, &call);
    *fits = (uint64_t)peak <= s->limit;
    return status;
}

static llmpar_status bench_search(llmpar_ctx *ctx, void *user)
{
    search *s = (search *)user;
    llmpar_mesh_desc mesh_desc;
    llmpar_mesh *mesh = NULL;
    memset(&mesh_desc, 0, sizeof mesh_desc);
    mesh_desc.dp_replicate = s->p->replicate;
    mesh_desc.dp_shard = s->p->shard;
    mesh_desc.tp = s->p->tp;
    llmpar_status status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status && !s->flops_length) {
        int64_t low = 0, high = 1; /* in steps: low fits, high does not */
        int fits = 1;
        while (!status && fits && high * s->step <= longest) {
            status = bench_fits(ctx, mesh, s, high * s->step, &fits);
            if (fits) low = high, high *= 2;
        }
        while (!status && high - low > 1) {
            int64_t middle = low + (high - low) / 2;
            status = bench_fits(ctx, mesh, s, middle * s->step, &fits);
            if (fits) low = middle;
            else high = middle;
        }
        if (!ctx->rank) s->length = low * s->step;
    } else if (!status) { /* a real step, with the arena's limit on */
        llmpar_llama_config config = bench_model;
        llmpar_llama_desc model_desc;
        llmpar_llama *model = NULL;
        llmpar_trainer *trainer = NULL;
        llmpar_trainer_desc desc;
        llmpar_step step;
        memset(&model_desc, 0, sizeof model_desc);
        model_desc.config = &config;
        bench_desc(s, &s->flops_length, &desc);
        status = llmpar_llama_create(ctx, &model_desc, &model);
        if (!status) status = llmpar_parallelize(mesh, model, &desc, &trainer);
        if (!status) status = llmpar_trainer_step(trainer, &step);
        if (!status && !ctx->rank) {
            s->peak = step.memory;
            s->loss = step.loss;
        }
        llmpar_trainer_destroy(trainer);
        llmpar_llama_destroy(model);
    }
    llmpar_mesh_destroy(mesh);
    return status;
}

static void bench_quiet(void *user, int rank, llmpar_log_level level, const char *line) { (void)user; (void)rank; (void)level; (void)line; }

static const char usage[] =
    "longest_sequence [LIMIT_MIB [STEP]]\n"
    "The longest sequence that four ranks train within one memory limit each, under policies of growing thrift.\n"
    "  LIMIT_MIB   of a rank (default 24)\n"
    "  STEP        lengths are multiples of it, 2 .. 65536 (default 32)\n";

int main(int argc, char **argv)
{
    bench_usage(argc, argv, usage, 2);
    double mib = argc > 1 ? (double)bench_number("LIMIT_MIB", argv[1], 1, 1 << 20) : 24;
    int64_t step = argc > 2 ? bench_number("STEP", argv[2], 2, 1 << 16) : 32, length[POLICIES];
    int failed = 0;
    llmpar_llama_config config = bench_model;
    longest = (int64_t)config.max_positions;
    printf("longest trainable sequence, 4 ranks, %.4g MiB each; %d layers, hidden %d, %.2f million parameters, f32, AdamW\n", mib, (int)config.layers, (int)config.hidden, (double)llmpar_llama_param_count(&config) * 1e-6);
    printf("%-44s %10s %12s %12s\n", "policy", "tokens", "peak bytes", "one longer");
    for (int i = 0; i < POLICIES; i++) {
        llmpar_launch_desc launch;
        llmpar_error error;
        search s;
        memset(&launch, 0, sizeof launch);
        memset(&s, 0, sizeof s);
        launch.ranks = 4;
        launch.deadline = -1;
        launch.log = bench_quiet;
        s.p = &policies[i];
        s.limit = (uint64_t)(mib * 1048576.0);
        s.step = step;
        length[i] = 0;
        if (llmpar_launch(&launch, bench_search, &s, &error)) {
            fprintf(stderr, "%s: %s\n", s.p->name, error.text);
            return 1;
        }
        if (!s.length) {
            printf("%-44s %10s\n", s.p->name, "none");
            continue;
        }
        length[i] = s.flops_length = s.length;
        if (llmpar_launch(&launch, bench_search, &s, &error)) {
            fprintf(stderr, "%s: %lld tokens were planned, but: %s\n", s.p->name, (long long)s.length, error.text);
            return 1;
        }
        s.flops_length = s.length + step;
        int refused = llmpar_launch(&launch, bench_search, &s, &error) == LLMPAR_ERR_MEMORY;
        printf("%-44s %10lld %12llu %12s\n", s.p->name, (long long)s.length, (unsigned long long)s.peak, s.length + step > longest ? "model's end" : refused ? "refused" : "TRAINED");
        fflush(stdout);
        failed |= !refused && s.length + step <= longest;
    }
    if (length[1]) {
        double ratio = (double)length[2] / (double)length[1];
        printf("FSDP x TP / FSDP: %.2f (bar 2), without sp %.2f, with recomputation %.2f, and with offload %.2f\n", ratio, (double)length[3] / (double)length[1], (double)length[5] / (double)length[4], (double)length[7] / (double)length[6]);
        failed |= ratio < 2;
    }
    return failed;
}
