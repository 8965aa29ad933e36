/* demo: a byte-level Llama of less than a million parameters learns to write on a 2x2 mesh (dp_shard 2 x tp 2, four thread ranks), and the
   first steps are repeated on one rank to show that losses and weights are the same bits.

   make demo                        (or: cc -O3 -I. examples/demo.c -o build/demo -lpthread -lm && build/demo --data TEXT)
   build/demo --data input.txt      any text of a few hundred kilobytes

   Held-out loss is shown beside what byte models that only count reach on the same bytes; the run ends with an error unless it gets below the midpoint of order 1 and order 2. */
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "common/ngram.h"
#include "common/options.h"

enum { PROOF_STEPS = 10, SEQ_LEN = 256, BATCH = 4, EVAL_SEQUENCES = 32 };

typedef struct demo {
    const char *data, *out;
    long steps;
    int32_t dp_shard, tp;
    int proof;                   /* 1: only the first steps */
    const char *checkpoint;      /* weights after PROOF_STEPS */
    double losses[PROOF_STEPS];  /* written by rank 0 */
    double order1, order2, held_out;
    double seconds;
} demo;

/* Small enough for a laptop's minute. Weights this narrow want a larger start than the usual 0.02. */
static void shape(llmpar_llama_config *config)
{
    llmpar_error error;
    llmpar_llama_preset("tiny", config, &error);
    config->hidden = 96;
    config->layers = 3;
    config->heads = 6;
    config->kv_heads = 2;
    config->intermediate = 256;
    config->max_positions = 512;
    config->init_std = 0.06;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static llmpar_status count_bytes(llmpar_ctx *ctx, demo *d, const llmpar_data *data)
{
    size_t from = (size_t)data->train_count + 1, to = from + (size_t)(data->eval_windows * data->seq_len);
    if (ctx->rank || d->proof) return LLMPAR_OK;
    d->order1 = ngram_loss(data->tokens, (size_t)data->train_count, from, to, 1);
    d->order2 = ngram_loss(data->tokens, (size_t)data->train_count, from, to, 2);
    if (!(d->order2 > 0)) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "no memory to count byte pairs");
    printf("held out: the last %lld of %lld bytes. Byte models that only count: order 1 %.4f, order 2 %.4f; to beat: their midpoint %.4f\n\n", (long long)data->eval_count, (long long)(data->train_count + data->eval_count), d->order1,
           d->order2, (d->order1 + d->order2) / 2);
    fflush(stdout);
    return LLMPAR_OK;
}

static llmpar_status evaluate(llmpar_ctx *ctx, demo *d, llmpar_trainer *trainer, int64_t step, int64_t sequences)
{
    double loss;
    llmpar_status status = llmpar_trainer_eval(trainer, sequences, &loss);
    if (status || ctx->rank) return status;
    if (isatty(2)) fputs("\r\033[K", stderr);
    printf("step: %5lld  held-out loss: %8.5f   (order 1 %.4f, order 2 %.4f)%s\n", (long long)step, loss, d->order1, d->order2, sequences ? "" : "  all of it");
    fflush(stdout);
    d->held_out = loss;
    return LLMPAR_OK;
}

static llmpar_status train(llmpar_ctx *ctx, void *user)
{
    demo *d = (demo *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_llama *model = NULL;
    llmpar_trainer *trainer = NULL;
    llmpar_llama_config config;
    llmpar_mesh_desc mesh_desc;
    llmpar_llama_desc model_desc;
    llmpar_trainer_desc desc;
    memset(&mesh_desc, 0, sizeof mesh_desc);
    memset(&model_desc, 0, sizeof model_desc);
    memset(&desc, 0, sizeof desc);
    shape(&config);
    mesh_desc.dp_shard = d->dp_shard;
    mesh_desc.tp = d->tp;
    model_desc.config = &config;
    model_desc.seed = 1;
    desc.data = d->data;
    desc.seq_len = SEQ_LEN;
    desc.batch = BATCH;
    desc.lr = 5e-3;
    desc.optim.beta2 = 0.99;
    desc.warmup = d->steps < 500 ? d->steps / 10 : 50;
    desc.total_steps = d->steps;
    desc.prefetch = 1;
    desc.exact = LLMPAR_EXACT_REQUIRE;
    desc.log_every = d->proof ? -1 : 50;
    llmpar_status status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_llama_create(ctx, &model_desc, &model);
    if (!status) status = llmpar_parallelize(mesh, model, &desc, &trainer);
    if (!status) status = count_bytes(ctx, d, llmpar_trainer_data(trainer));
    double begin = now();
    for (long i = 0; i < (d->proof ? PROOF_STEPS : d->steps) && !status; i++) {
        llmpar_step step;
        status = llmpar_trainer_step(trainer, &step);
        if (!status && i < PROOF_STEPS && ctx->rank == 0) d->losses[i] = step.loss;
        if (!status && i + 1 == PROOF_STEPS) status = llmpar_save_hf(trainer, d->checkpoint);
        if (!status && !d->proof && (i + 1) % 200 == 0 && i + 1 < d->steps) status = evaluate(ctx, d, trainer, i + 1, EVAL_SEQUENCES);
    }
    if (!status && !d->proof) status = evaluate(ctx, d, trainer, d->steps, 0);
    if (!status && !d->proof) status = llmpar_save_hf(trainer, d->out);
    if (ctx->rank == 0) d->seconds = now() - begin;
    llmpar_trainer_destroy(trainer);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    return status;
}

static llmpar_status show(void *user, int32_t id)
{
    (void)user;
    putchar(id);
    fflush(stdout);
    return LLMPAR_OK;
}

/* What the saved model writes, under tp 2. */
static llmpar_status write_sample(llmpar_ctx *ctx, void *user)
{
    const demo *d = (const demo *)user;
    static const int32_t prompt[] = {'\n'};
    llmpar_mesh *mesh = NULL;
    llmpar_llama *model = NULL;
    llmpar_trainer *trainer = NULL;
    llmpar_llama_config config;
    llmpar_mesh_desc mesh_desc;
    llmpar_llama_desc model_desc;
    llmpar_trainer_desc desc;
    llmpar_generate_desc generate;
    int32_t ids[SEQ_LEN], count;
    memset(&mesh_desc, 0, sizeof mesh_desc);
    memset(&model_desc, 0, sizeof model_desc);
    memset(&desc, 0, sizeof desc);
    memset(&generate, 0, sizeof generate);
    mesh_desc.tp = 2;
    model_desc.config = &config;
    desc.seq_len = SEQ_LEN;
    generate.prompt = prompt;
    generate.prompt_count = 1;
    generate.tokens = SEQ_LEN - 1;
    generate.temperature = 0.8;
    generate.top_p = 0.95;
    generate.seed = 7;
    if (ctx->rank == 0) generate.on_token = show;
    llmpar_status status = llmpar_hf_config(ctx, d->out, &config);
    if (!status) status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_llama_create(ctx, &model_desc, &model);
    if (!status) status = llmpar_parallelize(mesh, model, &desc, &trainer);
    if (!status) status = llmpar_load_hf(trainer, d->out);
    if (!status) status = llmpar_llama_generate(model, llmpar_trainer_fsdp(trainer), &generate, ids, &count);
    llmpar_trainer_destroy(trainer);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    return status;
}

static llmpar_status launch(int ranks, llmpar_rank_fn fn, demo *d)
{
    llmpar_launch_desc desc;
    llmpar_error error;
    memset(&desc, 0, sizeof desc);
    desc.ranks = ranks;
    desc.log = quiet_log;
    llmpar_status status = llmpar_launch(&desc, fn, d, &error);
    if (status) print_error("demo", &error);
    return status;
}

/* 1 if both files have the same bytes. */
static int same_file(const char *a, const char *b)
{
    FILE *f = fopen(a, "rb"), *g = fopen(b, "rb");
    int same = f && g, x = 0, y = 0;
    while (same && x != EOF) {
        x = getc(f);
        y = getc(g);
        same = x == y;
    }
    if (f) fclose(f);
    if (g) fclose(g);
    return same;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"data", 1, 0, 'd'}, {"out", 1, 0, 'o'}, {"steps", 1, 0, 'n'}, {"help", 0, 0, 'h'}, {0, 0, 0, 0}};
    demo run, proof;
    char mesh_dir[1024], one_dir[1024], a[1100], b[1100];
    int bad = 0;
    memset(&run, 0, sizeof run);
    run.data = "llmpar.h"; /* the one text that is surely here */
    run.out = "build/demo-out";
    run.steps = 1300;
    for (int c; !bad && (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (c) {
        case 'd': run.data = optarg; break;
        case 'o': run.out = optarg; break;
        case 'n': bad = option_long("--steps", optarg, PROOF_STEPS, 1000000, &run.steps); break;
        case 'h': puts("usage: demo [--data TEXT] [--out DIR] [--steps N]\n"
                       "  --data TEXT   its bytes are learned (default llmpar.h)\n"
                       "  --out DIR     the trained model goes there, what is compared to DIR-step10-* (default build/demo-out)\n"
                       "  --steps N     (default 1300: two minutes of one core)"); return 0;
        default: bad = 2;
        }
    }
    if (!bad && optind < argc) bad = option_error("unexpected argument \"%s\", see --help", argv[optind]);
    if (bad) return 2;
    snprintf(mesh_dir, sizeof mesh_dir, "%s-step%d-2x2", run.out, PROOF_STEPS);
    snprintf(one_dir, sizeof one_dir, "%s-step%d-1rank", run.out, PROOF_STEPS);
    llmpar_error error;
    llmpar_error_clear(&error);
    if (llmpar_directory_ensure(NULL, run.out, &error)) { /* better found before training than after */
        fprintf(stderr, "demo: --out: %s\n", error.text);
        return 1;
    }
    llmpar_llama_config config;
    shape(&config);
    run.dp_shard = run.tp = 2;
    run.checkpoint = mesh_dir;
    printf("A Llama with %lld parameters learns %s byte by byte: %ld steps of %d sequences of %d bytes, on 4 ranks: dp_shard 2 x tp 2.\n", (long long)llmpar_llama_param_count(&config), run.data, run.steps, BATCH, SEQ_LEN);
    fflush(stdout);
    if (launch(4, train, &run)) return 1;
    printf("\n%ld steps in %.1f s. The first %d again on one rank:\n", run.steps, run.seconds, PROOF_STEPS);
    fflush(stdout);
    proof = run;
    proof.dp_shard = proof.tp = proof.proof = 1;
    proof.checkpoint = one_dir;
    memset(proof.losses, 0, sizeof proof.losses);
    if (launch(1, train, &proof)) return 1;
    int losses = !memcmp(run.losses, proof.losses, sizeof run.losses);
    snprintf(a, sizeof a, "%s/model.safetensors", mesh_dir);
    snprintf(b, sizeof b, "%s/model.safetensors", one_dir);
    int weights = same_file(a, b);
    for (int i = 0; i < PROOF_STEPS; i++) printf("  step %2d   2x2 %.17g   1 rank %.17g   %s\n", i + 1, run.losses[i], proof.losses[i], run.losses[i] == proof.losses[i] ? "same bits" : "DIFFERENT");
    printf("  losses: %s.  weights after step %d: %s.\n\n", losses ? "same bits" : "DIFFERENT", PROOF_STEPS, weights ? "same bits" : "DIFFERENT");
    printf("What it writes:\n----\n");
    if (launch(2, write_sample, &run)) return 1;
    printf("\n----\n\nFiles (Hugging Face directories):\n  %s: the trained model\n  %s, %s: the weights that were compared\n", run.out, mesh_dir, one_dir);
    double midpoint = (run.order1 + run.order2) / 2;
    int learned = run.held_out < midpoint;
    printf("\nheld-out loss %.4f, %s the midpoint %.4f of order 1 and order 2.\n", run.held_out, learned ? "below" : "NOT below", midpoint);
    return losses && weights && learned ? 0 : 1;
}
