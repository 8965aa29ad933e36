/* bench_generate: what waits for memory when text is generated. First products of 1 to 16 rows, each with the next copy of its weights in 256 MB, far more than the caches, then whole tokens.
   Each beside the speed at which memory is read, measured right before and after; a product whose multiply-adds take longer at their peak than reading its weights, beside that peak.
   Weights have interleaved rows, as while text is generated; `rows`: they lie as in training, as for short texts. */
#include "cpu.h"
#include "peak.h"

static const char usage[] =
    "bench_generate [--json FILE] [products|rows [ROWS N K DTYPE THREADS]]\n"
    "       bench_generate [--json FILE] tokens [options]\n"
    "Without arguments: the table of products, then whole tokens.\n"
    "  products          products of few rows with interleaved weights; one of them: ROWS N K, f32, bf16 or f16, THREADS\n"
    "  rows              the same with weights as they lie in training\n"
    "  tokens            whole tokens, and prompts\n"
    "  --model NAME      1.1b or a preset (default 110m, then 1.1b)\n"
    "  --dtype TYPE      f32, bf16 (default both) or f16\n"
    "  --layout LAYOUT   1x1, 1x1tN (N threads) or tpN (default 1x1, 1x1t2, tp2)\n"
    "  --level LEVEL     portable, avx2, avx512 or avx512bf16, as far as this processor has it\n"
    "  --prompt N        ids (default 256)\n"
    "  --tokens N        behind them, 3 .. 64 (default 40)\n"
    "  --texts N         at once, 1 .. 16 (default 1)\n"
    "  --profile         what each kind of call takes\n"
    "  --serve           a reply for each line \"step\", for bench/peers/generate.py; with one model, type and layout 1x1 or 1x1tN\n"
    "  --ids FIRST       with --serve: the first prompt begins with this id, and answers end with the ids of the reply\n"
    "  --json FILE       the table as JSON, too\n";

/* ---- products of few rows ---- */

static int interleaved = 1;

typedef struct product {
    llmpar_device *device;
    llmpar_gemm_args args;
    llmpar_gemm_segment segments[8];
    const char *weights, *next;      /* a buffer of many copies; next: where the next product's lie */
    size_t weights_bytes, bytes;     /* of the buffer; of one product's */
} product;

static void product_next(product *p)
{
    if (p->next + p->bytes > p->weights + p->weights_bytes) p->next = p->weights;
    for (int32_t s = 0; s < p->args.segment_count; s++) {
        p->segments[s].begin = (int64_t)s * p->segments[0].k;
        p->segments[s].b = p->next + (p->segments[s].interleaved ? 0 : (size_t)p->segments[s].begin * llmpar_dtype_size(p->args.dtype));
    }
    p->next += p->bytes;
    if (p->device->gemm(p->device, NULL, &p->args)) { fprintf(stderr, "%s\n", p->device->error->text); exit(1); }
}

/* A product that follows another one, as they do in a token: behind the bound's own threads the device's are asleep. */
static double product_work(void *user)
{
    product *p = (product *)user;
    double start;
    product_next(p);
    start = bench_now();
    product_next(p);
    return (double)p->bytes / (bench_now() - start);
}

/* Bytes of weights a second that the multiply-adds at their peak would take. */
typedef struct product_arithmetic { bench_fma_of fma; double flops_a_byte; } product_arithmetic;
static double product_arithmetic_rate(void *user)
{
    product_arithmetic *of = (product_arithmetic *)user;
    return bench_fma(&of->fma) / of->flops_a_byte;
}

static void product_line(bench_results *results, llmpar_device *device, bench_memory_of *memory, int threads, int64_t rows, int64_t n, int64_t k, int32_t pieces, llmpar_dtype dtype)
{
    product p;
    char name[100];
    size_t size = llmpar_dtype_size(dtype);
    void *a = NULL, *c = NULL;
    product_arithmetic arithmetic;
    double reading[9], computing[9];
    bench_memory_of bound = *memory; /* its first half; the products walk through the other: neither finds in a cache what the other has just read */
    bound.bytes /= 2;
    memset(&p, 0, sizeof p);
    p.device = device;
    p.args.m = rows;
    p.args.n = n;
    p.args.ldc = n;
    p.args.segments = p.segments;
    p.args.segment_count = p.args.pieces = pieces;
    p.args.kind = LLMPAR_GEMM_NT;
    p.args.dtype = dtype;
    if (device->alloc(device, (size_t)(rows * k) * size, &a) || device->alloc(device, (size_t)(rows * n) * size, &c)) exit(1);
    memset(a, 0, (size_t)(rows * k) * size);
    p.args.c = c;
    for (int32_t s = 0; s < pieces; s++) {
        p.segments[s].piece = s;
        p.segments[s].k = k / pieces;
        p.segments[s].a = (const char *)a + (size_t)s * (size_t)(k / pieces) * size;
        p.segments[s].lda = p.segments[s].ldb = k;
        p.segments[s].interleaved = interleaved && llmpar_device_interleaved_rows(device, dtype) > 0 && k / pieces * (int64_t)size % 4 == 0;
    }
    p.weights = p.next = memory->base + bound.bytes;
    p.weights_bytes = memory->bytes - bound.bytes;
    p.bytes = (size_t)(n * k) * size;
    if (p.bytes > p.weights_bytes) { fprintf(stderr, "bench_generate: weights of %zu MB, expected at most %zu\n", p.bytes >> 20, p.weights_bytes >> 20); exit(2); }
    p.args.workspace_bytes = device->gemm_workspace(device, &p.args);
    if (device->alloc(device, p.args.workspace_bytes, &p.args.workspace)) exit(1);
    snprintf(name, sizeof name, "%2d x %d x %d %s%s, %d piece%s, %d thread%s", (int)rows, (int)n, (int)k, llmpar_dtype_name(dtype), interleaved ? "" : " rows", (int)pieces, pieces > 1 ? "s" : "", threads, threads > 1 ? "s" : "");
    arithmetic.fma.kind = bench_fma_kind(llmpar_cpu_level_name(llmpar_cpu_best_level()), dtype == LLMPAR_BF16);
    arithmetic.fma.threads = threads;
    arithmetic.flops_a_byte = 2.0 * (double)rows / (double)size;
    for (int i = 0; i < 9; i++) {
        reading[i] = bench_read(&bound);
        computing[i] = product_arithmetic_rate(&arithmetic);
    }
    if (bench_median(computing, 9) < bench_median(reading, 9)) bench_row(results, name, "GB/s", 1e-9, bench_fma_name(arithmetic.fma.kind), bench_pairs(product_arithmetic_rate, &arithmetic, product_work, &p, 21), 0.9);
    else bench_row(results, name, "GB/s", 1e-9, "reading", bench_pairs(bench_read, &bound, product_work, &p, 21), 0.9);
    device->free(device, p.args.workspace, p.args.workspace_bytes);
    device->free(device, a, (size_t)(rows * k) * size);
    device->free(device, c, (size_t)(rows * n) * size);
}

static llmpar_device *open_device(llmpar_heap *heap, llmpar_error *error, int threads)
{
    llmpar_cpu_desc desc;
    llmpar_device *device;
    memset(&desc, 0, sizeof desc);
    desc.threads = threads;
    desc.processors = bench_places(threads);
    llmpar_heap_init(heap, NULL);
    llmpar_error_clear(error);
    if (llmpar_cpu_create(heap, error, &desc, &device)) { fprintf(stderr, "%s\n", error->text); exit(1); }
    return device;
}

static void products(bench_results *results, int argc, char **argv)
{
    static const int64_t shapes[][2] = { { 2048, 8192 }, { 4096, 4096 }, { 32000, 768 } };
    int number[5] = { 0 };
    llmpar_dtype dtype = LLMPAR_F32;
    if (argc && argc != 5) bench_refuse("arguments", argv[0], "none or ROWS N K DTYPE THREADS");
    for (int i = 0; i < argc; i++) {
        static const char *const names[] = { "ROWS", "N", "K", "DTYPE", "THREADS" };
        if (i == 3) dtype = bench_dtype("DTYPE", argv[i]);
        else number[i] = (int)bench_number(names[i], argv[i], 1, i < 3 ? 1 << 20 : bench_cores());
    }
    for (int threads = argc ? number[4] : 1; threads <= bench_cores(); threads = !argc && threads == 1 && bench_cores() > 1 ? bench_cores() : bench_cores() + 1) {
        llmpar_heap heap;
        llmpar_error error;
        llmpar_device *device = open_device(&heap, &error, threads);
        bench_memory_of memory = bench_memory(512, threads);
        if (argc == 5) {
            for (int pieces = 1; pieces <= 8; pieces += 7) product_line(results, device, &memory, threads, number[0], number[1], number[2], pieces, dtype);
        } else
            for (int half = 0; half < 2; half++)
                for (int shape = 0; shape < 3; shape++)
                    for (int rows = 1; rows <= 16; rows *= 2) product_line(results, device, &memory, threads, rows, shapes[shape][0], shapes[shape][1], shape == 0 ? 8 : 1, half ? LLMPAR_BF16 : LLMPAR_F32);
        free(memory.base);
        llmpar_cpu_destroy(device);
    }
}

/* ---- whole tokens ---- */

enum { MOST_TOKENS = 64, MOST_RANKS = 8, MOST_KINDS = 24, MOST_TEXTS = 16, MOST_PROMPT = 1 << 20, PROMPTS = 7 /* readings of a prompt of more than 16 */ };

typedef struct kind { const char *name; long calls; double seconds; } kind;

typedef struct rank {
    bench_memory_of memory;
    double before, after;                                        /* when the prompt began; when the last token was done with */
    double prompt[PROMPTS], prompt_peak[PROMPTS];                /* seconds, and the peak during them */
    double seconds[MOST_TOKENS], bound[MOST_TOKENS + 1];         /* a token's; reading around it */
    double peak, sampled;                                        /* during the prompt: sum of the samples; seconds that they took */
    double turning;                                              /* weights become streams */
    int tokens, samples, prompts;
    kind kinds[2][MOST_KINDS];                                   /* calls of the prompts, of the tokens */
} rank;

typedef struct generation {
    llmpar_llama_config config;
    const char *model, *level;
    llmpar_dtype dtype;
    int ranks, threads, prompt, tokens, texts, profile, serve, first /* --ids, or -1 */;
    enum bench_kind peak;
    rank rank[MOST_RANKS];
} generation;

static __thread rank *self;
static __thread const generation *job;
static llmpar_device real; /* the slots behind the wrappers */

static void count(const char *name, double seconds)
{
    if (!self || (!self->tokens && self->prompts == PROMPTS)) return; /* the prompt before the tokens is not read */
    for (int i = 0; i < MOST_KINDS; i++) {
        kind *k = &self->kinds[self->tokens > 0][i];
        if (k->name && strcmp(k->name, name)) continue;
        k->name = name;
        k->calls++;
        k->seconds += seconds;
        return;
    }
}

/* The peak of arithmetic is measured inside the prompt, wherever it comes to an attention. */
static void sample(void)
{
    bench_fma_of of;
    double start = bench_now();
    if (self->tokens || self->samples >= 60 || self->prompts == PROMPTS || job->texts > 1) return;
    of.kind = job->peak;
    of.threads = job->threads;
    self->peak += bench_fma(&of);
    self->samples++;
    self->sampled += bench_now() - start;
}

#define WRAP(slot, type, before) \
    static llmpar_status generate_##slot(llmpar_device *device, llmpar_stream *stream, const type *args) \
    { \
        before; \
        double start = bench_now(); \
        llmpar_status status = real.slot(device, stream, args); \
        count(#slot, bench_now() - start); \
        return status; \
    }
WRAP(gemm, llmpar_gemm_args, (void)0)
WRAP(attention, llmpar_attention_args, sample())
WRAP(attention_each, llmpar_attention_each_args, (void)0)
WRAP(rmsnorm, llmpar_rmsnorm_args, (void)0)
WRAP(rope, llmpar_rope_args, (void)0)
WRAP(swiglu, llmpar_swiglu_args, (void)0)
WRAP(add, llmpar_add_args, (void)0)
WRAP(tree_sum, llmpar_tree_sum_args, (void)0)
WRAP(cast, llmpar_cast_args, (void)0)
WRAP(embedding, llmpar_embedding_args, if (self && self->before == 0) self->before = bench_now()) /* a prompt begins here: parameters are gathered */

static llmpar_status generate_interleave(llmpar_device *device, llmpar_stream *stream, const llmpar_interleave_args *args)
{
    double start = bench_now();
    llmpar_status status = real.interleave(device, stream, args);
    if (self && !args->back) self->turning += bench_now() - start;
    return status;
}

/* All ranks read at once, each with its threads. */
static llmpar_status generate_token(void *user, int32_t id)
{
    double now = bench_now();
    (void)user;
    (void)id;
    if (self->tokens == 0 && job->texts == 1 && job->prompt > 16 && self->prompts < PROMPTS) { /* a prompt and its one token */
        self->prompt[self->prompts] = now - self->before - self->sampled;
        self->prompt_peak[self->prompts++] = self->samples ? self->peak / self->samples : 0;
        self->before = self->peak = self->sampled = 0;
        self->samples = 0;
        return LLMPAR_OK;
    }
    if (self->tokens > 0) self->seconds[self->tokens - 1] = now - self->after;
    self->bound[self->tokens++] = bench_read(&self->memory);
    self->after = bench_now();
    return LLMPAR_OK;
}

/* ---- whole replies on request ---- */

typedef struct reply { double at[MOST_TOKENS]; int tokens; } reply;

static llmpar_status reply_token(void *user, int32_t id)
{
    reply *r = (reply *)user;
    (void)id;
    r->at[r->tokens++] = bench_now();
    return LLMPAR_OK;
}

/* bench/peers/generate.py: a request is one reply. The answer: seconds to its first token, of a token behind it (median), of all, with what the caller waits for behind the last token.
   The weights are loaded and laid out once, as a peer's are; each prompt begins with another id, so that nothing of the one before is known. Nothing is sampled meanwhile. With --ids the first prompt begins with that one, and
   an answer ends with the ids of the reply. */
static llmpar_status serve(llmpar_llama *model, llmpar_fsdp *fsdp, llmpar_generate_desc *desc, int32_t *prompt, int32_t *ids)
{
    int32_t vocab = llmpar_llama_get_config(model)->vocab;
    const char *ready = "ready ";
    reply r;
    llmpar_generator_desc wanted = { desc->prompt_count + desc->tokens, 1 };
    llmpar_generator *generator;
    llmpar_status status = llmpar_generator_create(model, fsdp, &wanted, &generator);
    desc->on_token = reply_token;
    desc->user = &r;
    prompt[0] = job->first < 0 ? 1 : job->first;
    while (!status) {
        double start = bench_now(), seconds[MOST_TOKENS];
        int32_t made = 0;
        r.tokens = 0;
        status = llmpar_generator_run(generator, desc, 1, &ids, &made);
        if (status) break;
        for (int i = 0; i + 1 < r.tokens; i++) seconds[i] = r.at[i + 1] - r.at[i];
        printf("%s%.6f %.6f %.6f", ready, r.at[0] - start, bench_median(seconds, r.tokens - 1), bench_now() - start);
        for (int32_t i = 0; i < made && job->first >= 0; i++) printf(" %d", (int)ids[i]);
        printf("\n");
        fflush(stdout);
        ready = "";
        prompt[0] = (prompt[0] + 1) % vocab;
        if (!bench_served()) break;
    }
    llmpar_status end = llmpar_generator_destroy(generator);
    return status ? status : end;
}

/* Texts at once, of as many prompts that have nothing in common; each step is the last one's token. */
static llmpar_status together(llmpar_llama *model, llmpar_fsdp *fsdp, const generation *g, const llmpar_generate_desc *desc)
{
    llmpar_generator_desc wanted = { g->prompt + g->tokens, g->texts };
    llmpar_generate_desc texts[MOST_TEXTS];
    llmpar_generator *generator = NULL;
    int32_t *prompts = (int32_t *)malloc((size_t)(g->texts * g->prompt) * sizeof *prompts), room[MOST_TEXTS][MOST_TOKENS], *ids[MOST_TEXTS], made[MOST_TEXTS];
    llmpar_status status = prompts ? llmpar_generator_create(model, fsdp, &wanted, &generator) : LLMPAR_ERR_MEMORY;
    for (int i = 0; i < g->texts && prompts; i++) {
        memcpy(prompts + i * g->prompt, desc->prompt, (size_t)g->prompt * sizeof *prompts);
        prompts[i * g->prompt] = i;
        texts[i] = *desc;
        texts[i].prompt = prompts + i * g->prompt;
        if (i + 1 < g->texts) texts[i].on_token = NULL;
        ids[i] = room[i];
    }
    if (!status) status = llmpar_generator_run(generator, texts, g->texts, ids, made);
    llmpar_status end = llmpar_generator_destroy(generator);
    free(prompts);
    return status ? status : end;
}

static llmpar_status generate_rank(llmpar_ctx *ctx, void *user)
{
    generation *g = (generation *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_llama *model = NULL;
    llmpar_fsdp *fsdp = NULL;
    llmpar_mesh_desc mesh_desc;
    llmpar_llama_desc model_desc;
    llmpar_llama_apply_desc apply;
    llmpar_fsdp_desc fsdp_desc;
    llmpar_generate_desc desc;
    int32_t units = 0, made = 0, *prompt = (int32_t *)calloc((size_t)g->prompt, sizeof *prompt), ids[MOST_TOKENS];
    llmpar_unit *unit = NULL;
    self = &g->rank[ctx->rank];
    job = g;
    if (!prompt) return LLMPAR_ERR_MEMORY;
    for (int i = 0; i < g->prompt; i++) prompt[i] = (int32_t)((uint32_t)i * 2654435761u % (uint32_t)g->config.vocab);
    if (!g->serve) self->memory = bench_memory(256, g->threads);
    real = *ctx->device;
    memset(&mesh_desc, 0, sizeof mesh_desc);
    memset(&model_desc, 0, sizeof model_desc);
    memset(&apply, 0, sizeof apply);
    memset(&fsdp_desc, 0, sizeof fsdp_desc);
    memset(&desc, 0, sizeof desc);
    mesh_desc.tp = g->ranks;
    model_desc.config = &g->config;
    apply.dtype = fsdp_desc.dtype = g->dtype;
    apply.positions = g->prompt + g->tokens;
    llmpar_status status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_llama_create(ctx, &model_desc, &model);
    if (!status) status = llmpar_llama_apply(model, mesh->comm[LLMPAR_AXIS_TP], &apply);
    if (!status) unit = llmpar_llama_units(model, &units);
    for (int32_t u = 0; u < units; u++) unit[u].frozen = 1; /* no f32 masters */
    if (!status) status = llmpar_fsdp_create(mesh, unit, units, &fsdp_desc, &fsdp);
    desc.prompt = prompt;
    desc.prompt_count = g->prompt;
    desc.tokens = g->tokens;
    if (g->serve) {
        if (!status) status = serve(model, fsdp, &desc, prompt, ids);
        goto out;
    }
#define SLOT(name) ctx->device->name = generate_##name;
    SLOT(gemm) SLOT(attention) SLOT(attention_each) SLOT(rmsnorm) SLOT(rope) SLOT(swiglu) SLOT(add) SLOT(tree_sum) SLOT(cast) SLOT(embedding) SLOT(interleave)
#undef SLOT
    desc.on_token = generate_token;
    for (int i = 0; i < PROMPTS && g->prompt > 16 && g->texts == 1 && !status; i++) {
        desc.tokens = 1;
        status = llmpar_llama_generate(model, fsdp, &desc, ids, &made);
    }
    desc.tokens = g->tokens;
    if (!status) status = g->texts > 1 ? together(model, fsdp, g, &desc) : llmpar_llama_generate(model, fsdp, &desc, ids, &made);
#define SLOT(name) ctx->device->name = real.name;
    SLOT(gemm) SLOT(attention) SLOT(attention_each) SLOT(rmsnorm) SLOT(rope) SLOT(swiglu) SLOT(add) SLOT(tree_sum) SLOT(cast) SLOT(embedding) SLOT(interleave)
#undef SLOT
out:
    llmpar_fsdp_destroy(fsdp);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    free(self->memory.base);
    free(prompt);
    return status;
}

static void profile(const char *what, const kind *kinds, double seconds, int times)
{
    printf("    of a %s's %.3f ms, rank 0:", what, 1e3 * seconds);
    for (int i = 0; i < MOST_KINDS && kinds[i].name; i++) printf("  %s %ld x %.1f us = %.3f ms", kinds[i].name, kinds[i].calls / times, 1e6 * kinds[i].seconds / (double)kinds[i].calls, 1e3 * kinds[i].seconds / times);
    printf("\n");
}

static void generate(bench_results *results, generation *g)
{
    const llmpar_llama_config *c = &g->config;
    llmpar_launch_desc desc;
    llmpar_error error;
    char name[120], layout[32];
    double heads = (double)c->heads * c->head_dim, kv = (double)c->kv_heads * c->head_dim;
    double block = (double)c->hidden * (2 * heads + 2 * kv + 3.0 * c->intermediate), head = (double)c->vocab * c->hidden, size = (double)llmpar_dtype_size(g->dtype);
    double work[MOST_TOKENS], bound[MOST_TOKENS + 1], prompt[PROMPTS], peak[PROMPTS], flops;
    memset(g->rank, 0, sizeof g->rank);
    memset(&desc, 0, sizeof desc);
    desc.ranks = g->ranks;
    desc.threads = g->threads;
    desc.cpu = g->level;
    if (llmpar_launch(&desc, generate_rank, g, &error)) { fprintf(stderr, "bench_generate: %s\n", error.text); exit(1); }
    if (g->serve) return;
    rank *r = &g->rank[0];
    if (g->ranks > 1) snprintf(layout, sizeof layout, "tp %d", g->ranks);
    else snprintf(layout, sizeof layout, "%d thread%s", g->threads, g->threads > 1 ? "s" : "");
    /* each weight is read once a token, and the cache up to the token's own position */
    for (int i = 0; i + 1 < r->tokens; i++) work[i] = (block * c->layers + head + 2 * kv * c->layers * (g->prompt + i + 1) * g->texts) * size / r->seconds[i];
    for (int i = 0; i < r->tokens; i++) {
        bound[i] = 0;
        for (int k = 0; k < g->ranks; k++) bound[i] += g->rank[k].bound[i];
    }
    snprintf(name, sizeof name, "%s %s, %s: tokens after %d", g->model, llmpar_dtype_name(g->dtype), layout, g->prompt);
    if (g->texts > 1) snprintf(name + strlen(name), sizeof name - strlen(name), ", %d texts", g->texts);
    double seconds = bench_median(r->seconds, r->tokens - 1);
    bench_row(results, name, "GB/s", 1e-9, "reading", bench_pairs_of(work, bound, r->tokens - 1), g->texts > 1 ? 0 : 0.85);
    snprintf(name, sizeof name, "%s %s, %s: tokens a second", g->model, llmpar_dtype_name(g->dtype), layout);
    if (g->texts > 1) snprintf(name + strlen(name), sizeof name - strlen(name), ", %d texts", g->texts);
    bench_value(results, name, "1/s", g->texts / seconds);
    snprintf(name, sizeof name, "%s %s, %s: weights into streams and back, tokens", g->model, llmpar_dtype_name(g->dtype), layout);
    if (r->turning > 0) bench_value(results, name, "", 2 * r->turning / seconds);
    if (g->profile) profile("token", r->kinds[1], seconds, r->tokens - 1);
    /* the last row alone meets the head; attention is causal */
    flops = 2 * block * c->layers * g->prompt + 2 * head + 2 * heads * c->layers * (double)g->prompt * (g->prompt + 1.0);
    if (g->prompt > 16 && g->texts == 1) {
        for (int i = 0; i < PROMPTS; i++) {
            peak[i] = 0;
            for (int k = 0; k < g->ranks; k++) peak[i] += g->rank[k].prompt_peak[i];
            prompt[i] = flops / r->prompt[i];
            work[i] = prompt[i] / peak[i]; /* each beside its own peak */
            bound[i] = bound[i + 1] = 1;
        }
        bench_ratio ratio = bench_pairs_of(work, bound, PROMPTS);
        ratio.work = bench_median(prompt, PROMPTS);
        ratio.bound = bench_median(peak, PROMPTS);
        snprintf(name, sizeof name, "%s %s, %s: prompt of %d", g->model, llmpar_dtype_name(g->dtype), layout, g->prompt);
        bench_row(results, name, "GFLOP/s", 1e-9, bench_fma_name(g->peak), ratio, 0.7);
        if (g->profile) profile("prompt", r->kinds[0], bench_median(r->prompt, PROMPTS), PROMPTS);
    }
}

static void options(int argc, char **argv, generation *g, const char **model, const char **dtype, const char **layout)
{
    for (int i = 0; i < argc; i++) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(name, "--profile")) { g->profile = 1; continue; }
        if (!strcmp(name, "--serve")) { g->serve = 1; continue; }
        if (strncmp(name, "--", 2)) bench_refuse("argument", name, "an option, see --help");
        if (!strcmp(name, "--model")) *model = value;
        else if (!strcmp(name, "--dtype")) *dtype = value;
        else if (!strcmp(name, "--layout")) *layout = value;
        else if (!strcmp(name, "--level")) g->level = value;
        else if (!strcmp(name, "--prompt")) g->prompt = (int)bench_number(name, value, 1, MOST_PROMPT);
        else if (!strcmp(name, "--tokens")) g->tokens = (int)bench_number(name, value, 3, MOST_TOKENS);
        else if (!strcmp(name, "--texts")) g->texts = (int)bench_number(name, value, 1, MOST_TEXTS);
        else if (!strcmp(name, "--ids")) g->first = (int)bench_number(name, value, 0, INT32_MAX);
        else bench_refuse("argument", name, "an option of --help");
        i++;
    }
    bench_level("--level", g->level);
    if (g->serve && g->texts > 1) { fprintf(stderr, "bench_generate: --texts %d with --serve: expected 1\n", g->texts); exit(2); }
    if (g->first >= 0 && !g->serve) { fprintf(stderr, "bench_generate: --ids: expected --serve with it\n"); exit(2); }
}

/* What the command line asks for has to fit; of what a run without options has, what does not is left out (0). */
static int layout_of(generation *g, const char *text, int asked)
{
    int used = 0;
    g->ranks = g->threads = 1;
    if (strcmp(text, "1x1") && (sscanf(text, "1x1t%d%n", &g->threads, &used) != 1 || text[used]) && (sscanf(text, "tp%d%n", &g->ranks, &used) != 1 || text[used])) bench_refuse("--layout", text, "1x1, 1x1tN or tpN");
    if (g->ranks < 1 || g->ranks > MOST_RANKS || g->threads < 1 || g->threads > BENCH_MOST_THREADS) bench_refuse("--layout", text, "1 to 8 ranks, 1 to 64 threads");
    if (g->ranks * g->threads <= bench_cores()) return 1;
    if (asked) { fprintf(stderr, "bench_generate: --layout %s: expected at most the %d processors that there are\n", text, bench_cores()); exit(2); }
    return 0;
}

/* The shape of TinyLlama 1.1B. */
static void shape_of(const char *model, llmpar_llama_config *c)
{
    llmpar_error error;
    llmpar_error_clear(&error);
    if (strcmp(model, "1.1b")) {
        if (llmpar_llama_preset(model, c, &error)) { fprintf(stderr, "bench_generate: --model: %s\n", error.text); exit(2); }
        if (c->max_positions < 4096) c->max_positions = 4096;
        return;
    }
    if (llmpar_llama_preset("110m", c, &error)) exit(1);
    c->hidden = 2048;
    c->intermediate = 5632;
    c->layers = 22;
    c->heads = 32;
    c->kv_heads = 4;
    c->head_dim = 64;
    c->max_positions = 4096;
    c->tied = 0;
}

int main(int argc, char **argv)
{
    static const char *const models[] = { "110m", "1.1b" }, *const dtypes[] = { "f32", "bf16" }, *const layouts[] = { "1x1", "1x1t2", "tp2" };
    static generation g;
    bench_results results;
    const char *model = NULL, *dtype = NULL, *layout = NULL, *what = NULL;
    bench_open(&results, "generate", &argc, argv, usage, -1);
    if (argc > 1) what = argv[1];
    if (what && strcmp(what, "products") && strcmp(what, "rows") && strcmp(what, "tokens")) bench_refuse("argument", what, "products, rows or tokens");
    g.prompt = 256;
    g.texts = 1;
    g.tokens = 40;
    g.first = -1;
    g.level = llmpar_cpu_level_name(llmpar_cpu_best_level());
    if (what && !strcmp(what, "tokens")) options(argc - 2, argv + 2, &g, &model, &dtype, &layout);
    if (g.serve && (!model || !dtype || !layout || strncmp(layout, "1x1", 3))) { fprintf(stderr, "bench_generate: --serve: expected one --model, --dtype and --layout 1x1 or 1x1tN with it\n"); return 2; }
    interleaved = !what || strcmp(what, "rows");
    if (!what || strcmp(what, "tokens")) products(&results, what ? argc - 2 : 0, argv + 2);
    if (what && strcmp(what, "tokens")) { bench_close(&results); return 0; }
    for (int m = 0; m < 2; m++)
        for (int d = 0; d < 2; d++)
            for (int l = 0; l < 3; l++) {
                const char *shape = model ? model : models[m], *type = dtype ? dtype : dtypes[d], *form = layout ? layout : layouts[l];
                if ((model && m) || (dtype && d) || (layout && l)) continue;
                g.model = shape;
                shape_of(shape, &g.config);
                if (g.first >= g.config.vocab) { fprintf(stderr, "bench_generate: --ids %d: expected less than the vocabulary of %s, %d\n", g.first, shape, (int)g.config.vocab); return 2; }
                g.dtype = bench_dtype("--dtype", type);
                g.peak = bench_fma_kind(g.level, g.dtype == LLMPAR_BF16);
                if (!layout_of(&g, form, layout != NULL)) continue;
                generate(&results, &g);
            }
    bench_close(&results);
    return 0;
}
