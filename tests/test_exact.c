/* The same bits on every mesh (docs/exact.md): losses, gradient norms, gradients and saved weights of five steps on any mesh of thread ranks are
   those of one rank, whatever the sequence parallelism, ZeRO stage, prefetch depth and number of micro-batches.

   By default a sample in which every mesh meets every number of micro-batches with two opposite sets of the other options, at one dispatch level of the processor or the other; LLMPAR_TEST_QUICK=1 takes one of the two,
   LLMPAR_TEST_FULL=1 every combination. Compiled with LLMPAR_USE_MPI, under mpirun: the meshes of as many ranks as there are processes, each compared with one rank on the process's own thread. */
#include "policies.h"

#include <time.h>

typedef struct batch_cut { const char *name; int32_t accum, no_sync; } batch_cut;
static const batch_cut cuts[] = {{"", 1, 0}, {" accum 2 sync", 2, 0}, {" accum 2 no_sync", 2, 1}, {" accum 4 sync", 4, 0}, {" accum 4 no_sync", 4, 1}};
enum { CUTS = sizeof cuts / sizeof cuts[0] };

static int wants(const char *variable)
{
    const char *value = getenv(variable);
    return value && value[0] && strcmp(value, "0");
}

static train_job job_of(const llmpar_llama_config *config, const mesh_shape *mesh)
{
    train_job job;
    memset(&job, 0, sizeof job);
    job.config = config;
    job.dp_replicate = mesh->replicate;
    job.dp_shard = mesh->shard;
    job.tp = mesh->tp;
    job.zero = 3;
    job.keep_files = 1;
    return job;
}

/* Runs the job and compares it with what one rank did. After a few that differ, the rest would say the same again. */
static int differing, compared;
static int fits(int ranks)
{
#ifdef LLMPAR_USE_MPI
    return ranks == test_world;
#else
    return ranks > 0;
#endif
}
static void compare(train_job *job, const char *name, const train_result *want)
{
    int ranks = (job->dp_replicate ? job->dp_replicate : 1) * (job->dp_shard ? job->dp_shard : 1) * (job->tp ? job->tp : 1);
    if (differing >= 4 || !fits(ranks)) return;
    compared++;
    train_result *got = (train_result *)malloc(sizeof *got);
    train_run(job, got);
    if (!train_same(name, got, want) && ++differing == 4) TEST_FAIL("no further comparisons");
    train_result_free(got);
    free(got);
}

/* The dispatch levels of this processor in turn; runs are compared with one rank of the same level. */
enum { MOST_LEVELS = 8 };
static unsigned levels_here(void) { return (unsigned)((int)llmpar_cpu_best_level() - (int)LLMPAR_CPU_PORTABLE) + 1; }
static const char *level_name(unsigned level) { return llmpar_cpu_level_name((llmpar_cpu_level)((unsigned)LLMPAR_CPU_PORTABLE + level)); }

/* options: bit 0 sp, bit 1 zero 0, bit 2 prefetch 1. */
static void compare_options(const llmpar_llama_config *config, const char *cpu, const mesh_shape *mesh, const batch_cut *cut, unsigned options, const train_result *want)
{
    char name[160];
    train_job job = job_of(config, mesh);
    job.cpu = cpu;
    job.sp = options & 1;
    job.zero = options & 2 ? 0 : 3;
    job.prefetch = options >> 2 & 1;
    job.accum = cut->accum;
    job.no_sync = cut->no_sync;
    job.exact = LLMPAR_EXACT_REQUIRE;
    snprintf(name, sizeof name, "%s %s %s%s sp %d zero %d prefetch %d", config->tied ? "tied" : "untied", cpu, mesh->name, cut->name, (int)job.sp, (int)job.zero, (int)job.prefetch);
    compare(&job, name, want);
}

/* The run that all others are compared with. */
static void reference(const llmpar_llama_config *config, const char *cpu, llmpar_dtype dtype, train_result *out)
{
    train_job job = job_of(config, &meshes[0]);
    job.cpu = cpu;
    job.dtype = dtype;
    job.on_threads = 1;
    train_run(&job, out);
    if (out->status) TEST_FAIL("one rank: %s", out->error.text);
    CHECK_INT(out->live[0], 0);
    for (int i = 0; i < TRAIN_FILES; i++) CHECK(out->file[i].bytes > 1000);
}

/* Does the job train at all? Otherwise equal bits say little. */
TEST(trains)
{
    train_result r;
    llmpar_llama_config config = train_config(1);
    reference(&config, NULL, LLMPAR_F32, &r);
    CHECK(r.step[0][0].loss > 4 && r.step[0][0].loss < 9);
    CHECK(r.step[0][TRAIN_STEPS - 1].loss < r.step[0][0].loss - 0.1);
    CHECK(r.step[0][0].grad_norm > 1.01); /* so that clipping acts */
    CHECK(r.step[0][0].tokens > 200 && r.step[0][0].tokens < 15 * 24);
    CHECK(r.file[0].bytes == r.file[1].bytes && r.file[0].data && memcmp(r.file[0].data, r.file[1].data, r.file[0].bytes));
    train_result_free(&r);
}

static void matrix(int tied)
{
    train_result want[MOST_LEVELS];
    llmpar_llama_config config = train_config(tied);
    int full = wants("LLMPAR_TEST_FULL"), quick = wants("LLMPAR_TEST_QUICK"), before = compared;
    unsigned levels = levels_here();
    double begin = test_clock();
    for (unsigned level = 0; level < levels; level++) reference(&config, level_name(level), LLMPAR_F32, &want[level]);
    for (unsigned m = 0; m < MESHES; m++)
        for (unsigned c = 0; c < CUTS; c++)
            for (unsigned options = 0; options < 8; options++) {
                unsigned chosen = (3 * m + 5 * c + 2 * (unsigned)tied) % 8;
                if (!full && options != chosen && (quick || options != (chosen ^ 7))) continue;
                for (unsigned level = 0; level < levels; level++)
                    if (full || level == (m + c + (unsigned)tied + (options == chosen)) % levels) compare_options(&config, level_name(level), &meshes[m], &cuts[c], options, &want[level]);
            }
    printf("  %s: %d runs, %.1f s\n", tied ? "tied" : "untied", compared - before, test_clock() - begin);
    for (unsigned level = 0; level < levels; level++) train_result_free(&want[level]);
}

TEST(matrix_tied) { matrix(1); }
TEST(matrix_untied) { matrix(0); }

/* ---- every policy: drawn at random, all of it at once, and the same bits ---- */

/* Each kind of run against one rank with no policy at all. */
static void policies(llmpar_dtype dtype, llmpar_optim_kind optim, int chain, int draws)
{
    double begin = test_clock();
    int before = compared, accum = chain ? 4 : 0;
    drawn = (uint64_t)dtype * 1000 + (uint64_t)optim * 10 + (uint64_t)chain;
    for (int tied = 0; tied < 2; tied++) {
        const char *cpu = level_name(((unsigned)tied + (unsigned)dtype + (unsigned)optim + (unsigned)chain) % levels_here());
        train_result want;
        llmpar_llama_config config = train_config(tied);
        train_job job = job_of(&config, &meshes[0]);
        job.dtype = dtype;
        job.cpu = cpu;
        job.policy.optim.kind = optim;
        job.policy.chain = chain;
        job.accum = accum;
        job.on_threads = 1;
        train_run(&job, &want);
        if (want.status) TEST_FAIL("one rank: %s", want.error.text);
        for (unsigned m = 0; m < MESHES && !want.status; m++)
            for (int i = 0; i < draws && (!wants("LLMPAR_TEST_QUICK") || (m + (unsigned)tied) % 2); i++) { /* quick: every second mesh */
                char name[256];
                train_job other = job_of(&config, &meshes[m]);
                other.dtype = dtype;
                other.cpu = cpu;
                other.policy.optim.kind = optim;
                other.policy.chain = chain;
                draw_policy(&other, &meshes[m], accum, name, sizeof name);
                compare(&other, name, &want);
            }
        train_result_free(&want);
    }
    printf("  %d runs, %.1f s\n", compared - before, test_clock() - begin);
}
static int draws(int usual) { return wants("LLMPAR_TEST_FULL") ? 10 * usual : wants("LLMPAR_TEST_QUICK") ? (usual + 5) / 6 : usual; }

TEST(policies_f32) { policies(LLMPAR_F32, LLMPAR_OPTIM_ADAMW, 0, draws(6)); }
TEST(policies_bf16) { policies(LLMPAR_BF16, LLMPAR_OPTIM_ADAMW, 0, draws(3)); }
TEST(policies_f16) { policies(LLMPAR_F16, LLMPAR_OPTIM_ADAMW, 0, draws(3)); }
TEST(policies_chain) { policies(LLMPAR_F32, LLMPAR_OPTIM_ADAMW, 1, draws(1)); }
TEST(policies_sgd) { policies(LLMPAR_F32, LLMPAR_OPTIM_SGD, 0, draws(1)); }
TEST(policies_lomo) { policies(LLMPAR_F32, LLMPAR_OPTIM_LOMO, 0, draws(1)); }
TEST(policies_adalomo) { policies(LLMPAR_F32, LLMPAR_OPTIM_ADALOMO, 0, draws(1)); }

/* Each dispatch level is the same on every mesh, and with workers inside a rank; levels may differ from each other. */
TEST(levels)
{
    static const int at[] = {0, 3, 6, 9};
    llmpar_llama_config config = train_config(1);
    for (unsigned i = 0; i < levels_here(); i++) {
        train_result want;
        reference(&config, level_name(i), LLMPAR_F32, &want);
        for (unsigned k = 0; k < sizeof at / sizeof at[0]; k++) {
            char name[160];
            train_job job = job_of(&config, &meshes[at[k]]);
            job.cpu = level_name(i);
            job.threads = k % 2 ? 1 : 2;
            job.sp = job.prefetch = k > 1;
            snprintf(name, sizeof name, "%s %s %d threads", level_name(i), meshes[at[k]].name, (int)job.threads);
            compare(&job, name, &want);
        }
        train_result_free(&want);
    }
}

TEST(in_f64)
{
    train_result want;
    llmpar_llama_config config = train_config(0);
    reference(&config, NULL, LLMPAR_F64, &want);
    train_job job = job_of(&config, &meshes[6]);
    job.dtype = LLMPAR_F64;
    job.sp = 1;
    compare(&job, "f64 2x2", &want);
    train_result_free(&want);
}

/* Canon is part of the contract: 16 pieces give other bits than 8, but the same ones on every mesh. */
TEST(other_canon)
{
    train_result want, eight;
    llmpar_llama_config config = train_config(0);
    train_job job = job_of(&config, &meshes[0]);
    job.canon = 16;
    train_run(&job, &want);
    CHECK_OK(want.status);
    reference(&config, NULL, LLMPAR_F32, &eight);
    CHECK(want.file[2].data && eight.file[2].data && memcmp(want.file[2].data, eight.file[2].data, eight.file[2].bytes));
    job = job_of(&config, &meshes[8]);
    job.canon = 16;
    job.sp = 1;
    compare(&job, "canon 16, 2x4", &want);
    train_result_free(&want);
    train_result_free(&eight);
}

/* Leaves of several sequences (24 = 8 x 3), and a T that no rank count divides into even pieces: 20 positions in 8 pieces of 2 and 3. */
TEST(uneven_leaves_and_pieces)
{
    static const struct { int mesh; int32_t sp, accum, no_sync; } runs[] = {{2, 1, 1, 0}, {3, 0, 2, 1}, {5, 0, 2, 0}, {6, 1, 4, 1}, {7, 1, 2, 0}, {8, 1, 2, 1}, {9, 1, 2, 0}};
    static const int64_t length = 20;
    for (int tied = 0; tied < 2; tied++) {
        train_result want;
        llmpar_llama_config config = train_config(tied);
        for (unsigned i = 0; i <= sizeof runs / sizeof runs[0]; i++) {
            char name[160];
            train_job job = job_of(&config, &meshes[i ? runs[i - 1].mesh : 0]);
            job.batch = 24;
            job.seq_len = length;
            job.sequence_user = (void *)(uintptr_t)&length;
            job.exact = LLMPAR_EXACT_REQUIRE;
            if (!i) {
                train_run(&job, &want);
                CHECK_OK(want.status);
                continue;
            }
            job.sp = runs[i - 1].sp;
            job.accum = runs[i - 1].accum;
            job.no_sync = runs[i - 1].no_sync;
            snprintf(name, sizeof name, "batch 24, T 20, %s sp %d accum %d no_sync %d", meshes[runs[i - 1].mesh].name, (int)job.sp, (int)job.accum, (int)job.no_sync);
            compare(&job, name, &want);
        }
        train_result_free(&want);
    }
}

/* Outside the guarantee: the same mesh gives the same bits, and `require` says which numbers do not fit. */
static void outside(train_job *job, const char *name, const char *number, const char *other)
{
    train_result a, b;
    if (!fits(job->dp_shard * job->tp)) return;
    train_run(job, &a);
    train_run(job, &b);
    CHECK_OK(a.status);
    train_same(name, &b, &a);
    CHECK(a.step[0][TRAIN_STEPS - 1].loss < a.step[0][0].loss - 0.1);
    train_result_free(&a);
    train_result_free(&b);
    job->exact = LLMPAR_EXACT_REQUIRE;
    train_run(job, &a);
    CHECK_STATUS(a.status, LLMPAR_ERR_MESH);
    CHECK_TEXT(a.error.text, number);
    CHECK_TEXT(a.error.text, other);
    for (int r = 0; r < a.ranks; r++) CHECK_INT(a.live[r], 0);
    train_result_free(&a);
}

TEST(three_data_ranks)
{
    llmpar_llama_config config = train_config(0);
    mesh_shape three = {"dp3", 1, 3, 1};
    train_job job = job_of(&config, &three);
    job.batch = 6;
    outside(&job, "dp3", "3 data ranks", "batch 6");
    job.exact = LLMPAR_EXACT_DEFAULT;
    job.accum = 2;
    job.no_sync = job.prefetch = 1;
    outside(&job, "dp3 no_sync", "3 data ranks", "grad_accum 2");
}

TEST(three_tensor_ranks)
{
    llmpar_llama_config config = train_config(0);
    mesh_shape three = {"tp3", 1, 1, 3};
    config.heads = 6;
    config.kv_heads = 3;
    train_job job = job_of(&config, &three);
    outside(&job, "tp3", "tp = 3", "8");
    job.exact = LLMPAR_EXACT_DEFAULT;
    job.sp = 1;
    outside(&job, "tp3 sp", "tp = 3", "8");
}

/* Without the guarantee: exact = off is deterministic for one mesh. */
TEST(exact_off)
{
    train_result a, b;
    llmpar_llama_config config = train_config(1);
    train_job job = job_of(&config, &meshes[6]);
    job.exact = LLMPAR_EXACT_OFF;
    train_run(&job, &a);
    train_run(&job, &b);
    CHECK_OK(a.status);
    train_same("exact off", &b, &a);
    train_result_free(&a);
    train_result_free(&b);
}

TEST_LIST(T_(trains), T_(matrix_tied), T_(matrix_untied), T_(policies_f32), T_(policies_bf16), T_(policies_f16), T_(policies_chain), T_(policies_sgd), T_(policies_lomo), T_(policies_adalomo), T_(levels), T_(in_f64), T_(other_canon), T_(uneven_leaves_and_pieces), T_(three_data_ranks), T_(three_tensor_ranks), T_(exact_off))
