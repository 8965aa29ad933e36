/* gpu_train: a training step of a Llama on one GPU: tokens a second, TFLOP/s, MFU, memory by tag.

   FLOPs are 6 N + 12 L H E T a token: attention counts as if it were not causal. They stand beside two bounds: what a square product of the same type reached on
   this card, before and after each step (8,192 rows and columns, random numbers), and the data sheet's dense rate, where the card is known. Plain order (exact = off) in FAST mode, as the other side of the comparison has.
   bench/gpu_train builds and runs it, and PyTorch beside it. */
#include "llmpar_cuda.h"
#include "bench.h"

enum { MOST_STEPS = 64 };

typedef struct settings {
    llmpar_llama_config config;
    llmpar_cuda_desc cuda;
    const char *model;
    bench_results *results;
    llmpar_dtype dtype;
    int64_t seq, tokens;
    int steps, serve, graphs;
    long square; /* of the product that is the bound */
} settings;

/* Dense BF16 and F16 rates of data sheets, in TFLOP/s. */
static double sheet(const char *device, llmpar_dtype dtype)
{
    static const struct { const char *name; double rate; } cards[] = { { "H200 NVL", 835.5 }, { "H200", 989.4 }, { "GH200", 989.4 }, { "H100 PCIe", 756.0 }, { "H100 NVL", 835.5 }, { "H100", 989.4 }, { "B200", 2250.0 }, { "A100", 312.0 }, { "L40S", 362.0 } };
    if (dtype == LLMPAR_F32) return 0;
    for (size_t i = 0; i < sizeof cards / sizeof cards[0]; i++)
        if (strstr(device, cards[i].name)) return cards[i].rate * 1e12;
    return 0;
}

/* ---- the bound: a square product ---- */

typedef struct square { llmpar_device *device; llmpar_stream *stream; llmpar_gemm_args args; llmpar_gemm_segment segment; void *memory[4]; size_t bytes[4]; llmpar_status status; } square;

static void square_close(square *q)
{
    for (int i = 0; i < 4; i++) q->device->free(q->device, q->memory[i], q->bytes[i]);
    if (q->stream) q->device->stream_destroy(q->device, q->stream);
}

static llmpar_status square_open(llmpar_ctx *ctx, const settings *s, square *q)
{
    size_t elements = (size_t)s->square * (size_t)s->square, item = llmpar_dtype_size(s->dtype);
    llmpar_device *device = ctx->device;
    memset(q, 0, sizeof *q);
    q->device = device;
    q->segment.lda = q->segment.ldb = q->segment.k = s->square;
    q->args.m = q->args.n = q->args.ldc = s->square;
    q->args.segments = &q->segment;
    q->args.segment_count = q->args.pieces = 1;
    q->args.kind = LLMPAR_GEMM_NT;
    q->args.dtype = s->dtype;
    q->bytes[0] = q->bytes[1] = q->bytes[2] = elements * item;
    q->bytes[3] = q->args.workspace_bytes = device->gemm_workspace(device, &q->args);
    llmpar_status status = device->stream_create(device, "bound", &q->stream);
    for (int i = 0; i < 4 && !status; i++) status = device->alloc(device, q->bytes[i], &q->memory[i]);
    char *host = (char *)malloc(elements * item);
    if (!host && !status) status = llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "gpu_train: no memory for the bound's numbers");
    uint64_t state = 88172645463325252u;
    for (size_t i = 0; i < elements && !status; i++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        float value = (float)(int64_t)(state >> 40) * (2.0f / 16777216.0f) - 1.0f;
        llmpar_convert(host + i * item, s->dtype, &value, LLMPAR_F32, 1);
    }
    for (int i = 0; i < 2 && !status; i++) status = device->copy(device, q->stream, q->memory[i], host, q->bytes[i]);
    if (!status) status = device->synchronize(device, q->stream);
    free(host);
    q->segment.a = q->memory[0];
    q->segment.b = q->memory[1];
    q->args.c = q->memory[2];
    q->args.workspace = q->memory[3];
    return status;
}

/* FLOPs a second of four products. */
static double square_rate(square *q)
{
    double start = bench_now(), n = (double)q->args.m;
    for (int i = 0; i < 4 && !q->status; i++) q->status = q->device->gemm(q->device, q->stream, &q->args);
    if (!q->status) q->status = q->device->synchronize(q->device, q->stream);
    return 4 * 2 * n * n * n / (bench_now() - start);
}

/* ---- a run ---- */

static llmpar_status sequence(void *user, int64_t index, int32_t *tokens)
{
    const settings *s = (const settings *)user;
    bench_tokens(index, s->seq + 1, s->config.vocab, tokens);
    return LLMPAR_OK;
}

static llmpar_status timed_step(llmpar_trainer *trainer, double *seconds, llmpar_step *step)
{
    double start = bench_now();
    llmpar_status status = llmpar_trainer_step(trainer, step); /* the loss is on the host when it returns */
    *seconds = bench_now() - start;
    return status;
}

static void print_memory(const llmpar_trainer *trainer)
{
    char table[2000];
    llmpar_memory memory;
    llmpar_trainer_memory(trainer, &memory);
    llmpar_memory_print(NULL, &memory, table, sizeof table);
    fputs(table, stdout);
}

static llmpar_status measure(llmpar_ctx *ctx, const settings *s, llmpar_trainer *trainer)
{
    double flops = llmpar_llama_flops_per_token(&s->config, s->seq) * (double)s->tokens, rate[MOST_STEPS], bound[MOST_STEPS + 1], work[MOST_STEPS];
    char head[64], name[120];
    square q;
    llmpar_step step;
    llmpar_status status = square_open(ctx, s, &q);
    memset(&step, 0, sizeof step);
    for (int i = 0; i < 3 && !status; i++) status = timed_step(trainer, &rate[0], &step);
    square_rate(&q);
    bound[0] = square_rate(&q);
    for (int i = 0; i < s->steps && !status; i++) {
        status = timed_step(trainer, &rate[i], &step);
        rate[i] = flops / rate[i];
        bound[i + 1] = square_rate(&q);
    }
    if (!status) status = q.status;
    square_close(&q);
    if (status) return status;
    snprintf(head, sizeof head, "%s %s T %ld, %ld tokens", s->model, llmpar_dtype_name(s->dtype), (long)s->seq, (long)s->tokens);
    memcpy(work, rate, sizeof rate);
    double tokens_per_second = bench_median(work, s->steps) / flops * (double)s->tokens, peak = sheet(ctx->device->name, s->dtype);
    memcpy(work, rate, sizeof rate);
    snprintf(name, sizeof name, "%s: MFU", head);
    bench_row(s->results, name, "TFLOP/s", 1e-12, "this card's product", bench_pairs_of(work, bound, s->steps), 0);
    if (peak > 0) {
        for (int i = 0; i <= s->steps; i++) bound[i] = peak;
        memcpy(work, rate, sizeof rate);
        snprintf(name, sizeof name, "%s: of the data sheet", head);
        bench_row(s->results, name, "TFLOP/s", 1e-12, "the data sheet", bench_pairs_of(work, bound, s->steps), s->seq == 2048 && s->cuda.mode == LLMPAR_CUDA_FAST ? 0.45 : 0);
    }
    snprintf(name, sizeof name, "%s: speed", head);
    bench_value(s->results, name, "tokens/s", tokens_per_second);
    snprintf(name, sizeof name, "%s: arena's peak", head);
    bench_value(s->results, name, "GB", (double)step.memory * 1e-9);
    printf("  loss %.4f after %ld steps\n", step.loss, (long)step.step);
    if (s->graphs) {
        llmpar_cuda_graph_counts counts;
        llmpar_cuda_graphs(ctx->device, &counts);
        printf("  graphs: %llu regions replayed, %llu captured, %llu plain\n", (unsigned long long)counts.replayed, (unsigned long long)counts.captured, (unsigned long long)counts.plain);
    }
    print_memory(trainer);
    return LLMPAR_OK;
}

/* bench/peers/run.py: a request is one step, and its seconds the answer. */
static llmpar_status serve(llmpar_trainer *trainer)
{
    double seconds;
    llmpar_step step;
    llmpar_status status = timed_step(trainer, &seconds, &step);
    if (!status) status = timed_step(trainer, &seconds, &step);
    if (!status) printf("ready %.6f loss %.4f memory %llu\n", seconds, step.loss, (unsigned long long)step.memory);
    fflush(stdout);
    while (!status && bench_served()) {
        status = timed_step(trainer, &seconds, &step);
        if (!status) printf("%.6f loss %.4f memory %llu\n", seconds, step.loss, (unsigned long long)step.memory);
        fflush(stdout);
    }
    return status;
}

static llmpar_status run(llmpar_ctx *ctx, void *user)
{
    settings *s = (settings *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_llama *model = NULL;
    llmpar_trainer *trainer = NULL;
    llmpar_mesh_desc mesh_desc;
    llmpar_llama_desc model_desc;
    llmpar_trainer_desc desc;
    memset(&mesh_desc, 0, sizeof mesh_desc);
    memset(&model_desc, 0, sizeof model_desc);
    memset(&desc, 0, sizeof desc);
    model_desc.config = &s->config;
    model_desc.logits_bytes = (int64_t)16 << 30; /* whole: in parts they cost products */
    desc.sequence = sequence;
    desc.sequence_user = s;
    desc.seq_len = s->seq;
    desc.batch = s->tokens / s->seq;
    desc.dtype = s->dtype;
    desc.exact = s->cuda.mode == LLMPAR_CUDA_FAST ? LLMPAR_EXACT_OFF : LLMPAR_EXACT_ON;
    desc.graphs = s->graphs;
    desc.log_every = -1;
    if (!s->serve) printf("%s\n", ctx->device->name);
    llmpar_status status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_llama_create(ctx, &model_desc, &model);
    if (!status) status = llmpar_parallelize(mesh, model, &desc, &trainer);
    if (!status) status = s->serve ? serve(trainer) : measure(ctx, s, trainer);
    llmpar_trainer_destroy(trainer);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    return status;
}

/* ---- options ---- */

static const char usage[] =
    "gpu_train [options]\n"
    "  --model NAME       a preset (default 1b)\n"
    "  --seq LIST         lengths (default 2048,8192)\n"
    "  --tokens N         of a step (default 16384); the batch is tokens / seq\n"
    "  --dtype TYPE       f32, bf16 (default) or f16\n"
    "  --mode MODE        fast (default) or exact\n"
    "  --graphs           captured steps are replayed\n"
    "  --cudnn            the library's attention (a build with LLMPAR_USE_CUDNN)\n"
    "  --steps N          1 .. 64 (default 10)\n"
    "  --square N         rows of the square product that is the bound (default 8192)\n"
    "  --serve            a step for each line \"step\", for bench/peers/run.py\n"
    "  --json FILE        the table as JSON, too\n";

static long number(const char *option, const char *text, char separator, const char **next)
{
    char *end;
    long n = strtol(text, &end, 10);
    if (n < 1 || n > 1 << 24 || (*end && *end != separator)) bench_refuse(option, text, "a whole number 1 .. 16777216");
    if (next) *next = *end ? end + 1 : end;
    return n;
}

int main(int argc, char **argv)
{
    const char *seq = "2048,8192";
    bench_results results;
    settings s;
    llmpar_backend backend;
    llmpar_launch_desc launch;
    llmpar_error error;
    bench_open(&results, "gpu_train", &argc, argv, usage, -1);
    memset(&s, 0, sizeof s);
    memset(&launch, 0, sizeof launch);
    llmpar_error_clear(&error);
    s.results = &results;
    s.model = "1b";
    s.dtype = LLMPAR_BF16;
    s.tokens = 16384;
    s.steps = 10;
    s.square = 8192;
    s.cuda.mode = LLMPAR_CUDA_FAST;
    for (int i = 1; i < argc; i++) {
        const char *option = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(option, "--serve")) { s.serve = 1; continue; }
        if (!strcmp(option, "--cudnn")) { s.cuda.cudnn = 1; continue; }
        if (!strcmp(option, "--graphs")) { s.graphs = 1; continue; }
        if (strncmp(option, "--", 2)) bench_refuse("argument", option, "an option, see --help");
        i++;
        if (!strcmp(option, "--model")) s.model = value;
        else if (!strcmp(option, "--seq")) seq = value;
        else if (!strcmp(option, "--tokens")) s.tokens = number(option, value, 0, NULL);
        else if (!strcmp(option, "--square")) s.square = number(option, value, 0, NULL);
        else if (!strcmp(option, "--steps")) s.steps = (int)bench_number(option, value, 1, MOST_STEPS);
        else if (!strcmp(option, "--dtype")) s.dtype = !strcmp(value, "f32") ? LLMPAR_F32 : !strcmp(value, "bf16") ? LLMPAR_BF16 : !strcmp(value, "f16") ? LLMPAR_F16 : (bench_refuse(option, value, "f32, bf16 or f16"), LLMPAR_F16);
        else if (!strcmp(option, "--mode")) s.cuda.mode = !strcmp(value, "fast") ? LLMPAR_CUDA_FAST : !strcmp(value, "exact") ? LLMPAR_CUDA_EXACT : (bench_refuse(option, value, "fast or exact"), LLMPAR_CUDA_EXACT);
        else bench_refuse("argument", option, "an option of --help");
    }
    if (!seq[0]) bench_refuse("--seq", seq, "lengths separated by commas");
    if (s.serve && strchr(seq, ',')) bench_refuse("--seq", seq, "one length with --serve");
    llmpar_cuda_backend(&s.cuda, &backend);
    launch.ranks = 1;
    launch.backend = &backend;
    for (const char *at = seq; *at;) {
        s.seq = number("--seq", at, ',', &at);
        if (s.tokens % s.seq) bench_refuse("--seq", seq, "lengths that --tokens is a multiple of");
        if (llmpar_llama_preset(s.model, &s.config, &error)) { fprintf(stderr, "gpu_train: --model: %s\n", error.text); return 2; }
        if (s.config.max_positions < s.seq) s.config.max_positions = (int32_t)s.seq;
        if (llmpar_launch(&launch, run, &s, &error)) { fprintf(stderr, "gpu_train: %s\n", error.text); return 1; }
    }
    bench_close(&results);
    return 0;
}
