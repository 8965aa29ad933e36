/* Random models and recipes: whatever the sizes, the family, the types, the optimizer and the batch, any mesh that the guarantee covers (docs/exact.md) gives the losses, norms, gradients and saved weights of one rank with no
   policy at all, and a mesh that it does not cover is refused on all ranks, with the numbers. test_exact.c has two models and all meshes; here each case is drawn whole.

   LLMPAR_TEST_FULL=1: ten times as many cases. LLMPAR_TEST_SEED=N: other cases; LLMPAR_TEST_CASE=N: this one alone, with a line for every run. */
#include "policies.h"

typedef struct text { int64_t length; int32_t vocab; uint64_t seed; } text;

/* As train_sequence, of any vocabulary. */
static llmpar_status random_sequence(void *user, int64_t index, int32_t *tokens)
{
    const text *t = (const text *)user;
    for (int64_t i = 0; i <= t->length; i++) {
        uint64_t r = train_mix(t->seed + (uint64_t)index * 1000003u + (uint64_t)i);
        tokens[i] = (int32_t)((r & 1 ? r >> 8 : 5 * ((r >> 8) % 3)) % (uint64_t)t->vocab);
        if ((r >> 40) % 9 == 0 || (index % 16 == 5 && i > 0)) tokens[i] = -1;
    }
    return LLMPAR_OK;
}

static long number_of(const char *variable, long otherwise)
{
    const char *value = getenv(variable);
    return value && value[0] ? strtol(value, NULL, 10) : otherwise;
}
static int32_t between(int32_t least, int32_t most) { return least + (int32_t)draw((unsigned)(most - least + 1)); }
#define ONE_OF(...) ((const int32_t[]){ __VA_ARGS__ }[draw(sizeof (const int32_t[]){ __VA_ARGS__ } / sizeof(int32_t))])

static llmpar_llama_config draw_model(int64_t length)
{
    llmpar_llama_config c;
    memset(&c, 0, sizeof c);
    c.family = (llmpar_family)ONE_OF(LLMPAR_FAMILY_LLAMA, LLMPAR_FAMILY_LLAMA, LLMPAR_FAMILY_MISTRAL, LLMPAR_FAMILY_QWEN2, LLMPAR_FAMILY_QWEN3);
    c.vocab = between(17, 700);
    c.hidden = draw(8) ? 4 * between(5, 18) : between(17, 72);
    c.intermediate = between(9, 130);
    c.layers = between(1, 4);
    c.heads = ONE_OF(8, 8, 8, 16, 24);
    c.kv_heads = c.heads / ONE_OF(1, 2, 4, 8);
    c.head_dim = 2 * between(1, 8);
    c.max_positions = (int32_t)length + between(0, 20);
    c.rms_eps = 1e-5;
    c.rope_theta = ONE_OF(10000, 500, 1000000);
    c.tied = (int32_t)draw(2);
    c.bos_id = -1;
    c.init_std = 0.1;
    if (c.family == LLMPAR_FAMILY_MISTRAL && draw(2)) c.sliding_window = (int32_t)length + between(0, 3);
    c.rope_scaling.kind = (llmpar_rope_kind)ONE_OF(LLMPAR_ROPE_NONE, LLMPAR_ROPE_NONE, LLMPAR_ROPE_LINEAR, LLMPAR_ROPE_LLAMA3, LLMPAR_ROPE_YARN);
    if (c.rope_scaling.kind != LLMPAR_ROPE_NONE) c.rope_scaling.factor = between(1, 8);
    if (c.rope_scaling.kind == LLMPAR_ROPE_LLAMA3 || c.rope_scaling.kind == LLMPAR_ROPE_YARN) c.rope_scaling.original_max_positions = between(4, 32);
    if (c.rope_scaling.kind == LLMPAR_ROPE_LLAMA3) {
        c.rope_scaling.low_freq_factor = 1;
        c.rope_scaling.high_freq_factor = between(2, 6);
    }
    if (c.rope_scaling.kind == LLMPAR_ROPE_YARN) {
        c.rope_scaling.attention_factor = 1.1;
        c.rope_scaling.beta_fast = 32;
        c.rope_scaling.beta_slow = 1;
        c.rope_scaling.truncate = (int32_t)draw(2);
    }
    return c;
}

/* What is part of the result: the same on every mesh of a case. */
static void draw_recipe(train_job *job)
{
    llmpar_optim_desc *o = &job->policy.optim;
    job->steps = 3;
    job->wrap = ONE_OF(1, 1, 2, 3, LLMPAR_WRAP_HALF);
    job->dtype = (llmpar_dtype)ONE_OF(LLMPAR_F32, LLMPAR_F32, LLMPAR_F32, LLMPAR_BF16, LLMPAR_BF16, LLMPAR_F16, LLMPAR_F16, LLMPAR_F64); /* the last has no fast kernels */
    job->canon = ONE_OF(0, 0, 4, 8, 16);
    job->batch = ONE_OF(8, 12, 16, 16, 16, 24);
    o->kind = (llmpar_optim_kind)ONE_OF(LLMPAR_OPTIM_ADAMW, LLMPAR_OPTIM_ADAMW, LLMPAR_OPTIM_SGD, LLMPAR_OPTIM_LOMO, LLMPAR_OPTIM_ADALOMO);
    o->clip = draw(3) ? 0 : -1;
    o->decay = draw(3) ? 0 : 0.01;
    if (o->kind == LLMPAR_OPTIM_SGD) o->momentum = ONE_OF(0, -1);
    job->policy.lr_schedule = (llmpar_lr_kind)draw(2);
    job->policy.freeze = draw(4) ? 0 : 1;
    job->policy.chain = o->kind != LLMPAR_OPTIM_LOMO && o->kind != LLMPAR_OPTIM_ADALOMO && draw(6) == 0;
    job->cpu = llmpar_cpu_level_name((llmpar_cpu_level)between((int32_t)LLMPAR_CPU_PORTABLE, (int32_t)llmpar_cpu_best_level()));
}

/* What the mesh and the policy ask of the model and the batch. */
static int covered(const train_job *job, const mesh_shape *mesh, int32_t leaves)
{
    const llmpar_llama_config *c = job->config;
    int32_t canon = job->canon ? job->canon : 8, parts = mesh->replicate * mesh->shard * (job->accum ? job->accum : 1);
    if (leaves % parts) return 0;
    if (mesh->tp == 1) return 1;
    if (canon % mesh->tp || (c->kv_heads % mesh->tp && mesh->tp % c->kv_heads)) return 0;
    return (size_t)c->hidden * llmpar_dtype_size(job->dtype) % 8 == 0 && (!job->sp || job->seq_len % mesh->tp == 0);
}

static int refused, compared;
static void one_case(long number, long seed, int loud)
{
    char name[600], model[200];
    train_result want;
    text t;
    drawn = (uint64_t)seed * 1000003u + (uint64_t)number;
    t.length = draw(4) ? 8 * between(1, 5) : between(4, 40);
    llmpar_llama_config config = draw_model(t.length);
    t.vocab = config.vocab;
    t.seed = drawn;
    train_job job = train_job_of(&config, 1, 1, 1);
    job.seq_len = t.length;
    job.sequence = random_sequence;
    job.sequence_user = &t;
    draw_recipe(&job);
    int accum = job.policy.chain ? 2 : 0;
    int32_t leaves = 1;
    while (job.batch % (2 * leaves) == 0) leaves *= 2;
    train_job first = job;
    first.accum = accum;
    snprintf(model, sizeof model, "family %d V %d D %d F %d L %d H %d K %d E %d T %d rope %d B %d canon %d wrap %d optim %d freeze %d%s", (int)config.family, (int)config.vocab, (int)config.hidden, (int)config.intermediate, (int)config.layers, (int)config.heads,
             (int)config.kv_heads, (int)config.head_dim, (int)t.length, (int)config.rope_scaling.kind, (int)job.batch, (int)job.canon, (int)job.wrap, (int)job.policy.optim.kind, (int)job.policy.freeze, job.policy.chain ? " chain" : "");
    train_run(&first, &want);
    if (want.status) TEST_FAIL("case %ld: %s: one rank: %s", number, model, want.error.text);
    for (int i = 0; i < 3 && !want.status; i++) {
        const mesh_shape *mesh = &meshes[1 + draw(MESHES - 1)];
        char policy[256];
        train_result got;
        train_job other = job;
        other.dp_replicate = mesh->replicate;
        other.dp_shard = mesh->shard;
        other.tp = mesh->tp;
        other.threads = between(1, 2);
        draw_policy(&other, mesh, accum, policy, sizeof policy);
        int inside = covered(&other, mesh, leaves);
        snprintf(name, sizeof name, "case %ld: %s: %s %s", number, model, other.cpu, policy);
        double start = test_clock();
        train_run(&other, &got);
        if (loud) printf("  %s: %s, %.2f s\n", name, inside ? "covered" : "not covered", test_clock() - start);
        if (inside) {
            compared++;
            train_same(name, &got, &want);
        } else {
            refused++;
            static const char *const numbers[] = { "power of two", "divisible", "multiple of 8 bytes", "one must divide the other" };
            int said = 0;
            for (int k = 0; k < 4; k++) said |= strstr(got.error.text, numbers[k]) != NULL;
            if (got.status != LLMPAR_ERR_MESH || !said) TEST_FAIL("%s: %s \"%s\", expected to be refused with the numbers", name, llmpar_status_string(got.status), got.error.text);
            for (int r = 0; r < got.ranks; r++) CHECK_INT(got.live[r], 0);
        }
        train_result_free(&got);
    }
    train_result_free(&want);
}

TEST(any_model_on_any_mesh)
{
    long seed = number_of("LLMPAR_TEST_SEED", 1), only = number_of("LLMPAR_TEST_CASE", -1), cases = number_of("LLMPAR_TEST_FULL", 0) ? 240 : test_rounds(24);
    double begin = test_clock();
    for (long c = 0; c < cases && only < 0 && test_failures < 4; c++) one_case(c, seed, 0);
    if (only >= 0) one_case(only, seed, 1);
    else CHECK(compared > refused);
    printf("  %d runs, %d refused, %.1f s\n", compared, refused, test_clock() - begin);
}

TEST_LIST(T_(any_model_on_any_mesh))
