/* generate: text from a Hugging Face directory, with a KV cache under tensor parallelism. Every tp prints the same ids.

   cc -O3 -I. examples/generate.c -o build/generate -lpthread -lm       (or: make build/generate)
   build/generate --model DIR --tp 2 --prompt-ids 1 --tokens 200 --ids
   build/generate --model out --prompt "ROMEO:" --prompt "JULIET:" --temperature 0.8 --top-p 0.95 --seed 1   (models over bytes, vocabulary 256) */
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"

#include <ctype.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/device.h"
#include "common/options.h"

enum { MOST_PROMPTS = 1000, MOST_STOPS = 100 };

/* A prompt, or what ends a text. */
typedef struct prompt { const char *given; int32_t *ids, count; } prompt;

typedef struct settings {
    const char *model;
    prompt *prompts;   /* [prompt_count], each the beginning of a text */
    prompt *stops;     /* [stop_count] */
    int prompt_count, stop_count;
    int32_t longest;   /* ids of a prompt */
    long tp, tokens, threads, at_once, top_k;
    unsigned long seed;
    double temperature, top_p, penalty;
    int print_ids, bytes /* prompts are text */, stop_bytes /* a stop is */, pin;
    llmpar_dtype dtype;
    device_settings device;
} settings;

static void usage(void)
{
    puts("usage: generate --model DIR (--prompt TEXT | --prompt-ids 1,2,3)... [options]\n"
         "  --model DIR         Hugging Face directory (config.json, model.safetensors)\n"
         "  --prompt TEXT       prompt; its bytes are the tokens, for models with vocabulary 256\n"
         "  --prompt-ids LIST   prompt as token ids, comma-separated\n"
         "                      either may be given many times: each begins a text of its own\n"
         "  --tokens N          tokens to generate at most (default 128)\n"
         "  --temperature X     0 = greedy (default 0)\n"
         "  --top-k N           one of the N likeliest ids (default 0: of all)\n"
         "  --top-p X           nucleus sampling, 0 < X <= 1, of those (default 1: off)\n"
         "  --repeat-penalty X  logits of ids that are in the text so far: divided by X above 0, multiplied below (Keskar et al. 2019; default 1: off)\n"
         "  --stop TEXT         ends a reply that ends with TEXT; for models with vocabulary 256\n"
         "  --stop-ids LIST     the same with token ids; either may be given many times\n"
         "  --seed N            of sampling (default 0); the next text takes the next number\n"
         "  --at-once N         texts generated at once; each takes a cache, all read the weights together (default: all prompts, at most 16; same ids)\n"
         "  --tp N              tensor-parallel ranks (default 1)\n"
         "  --threads N         workers inside a rank (default: the cores / the ranks of this machine; same bits)\n"
         "  --pin auto|on|off   does each thread stay on a processor of its own (default auto: where the threads fill the machine)\n"
         "  --dtype f32|f64|bf16|f16   of parameters and activations (default f32)\n"
         "  --ids               print prompt and generated ids on one line instead of text (always behind --prompt-ids where the vocabulary is not 256), whatever the model's eos is\n"
         DEVICE_USAGE
         "  --help");
}

static void print_byte(int32_t id)
{
    putchar(id < 256 ? id : '?');
}

/* A text on one rank: what its callbacks see. */
typedef struct text {
    const settings *s;
    const prompt *prompt;
    const int32_t *ids, *count;
    unsigned char *seen; /* [V], all 0 between calls */
    int shows;
} text;

/* Each id of the text once. */
static llmpar_status penalize(void *user, float *logits, int32_t vocab)
{
    const text *t = (const text *)user;
    (void)vocab;
    for (int clear = 0; clear < 2; clear++)
        for (int32_t i = 0; i < t->prompt->count + *t->count; i++) {
            int32_t id = i < t->prompt->count ? t->prompt->ids[i] : t->ids[i - t->prompt->count];
            if (!clear && !t->seen[id]) logits[id] = (float)(logits[id] > 0 ? logits[id] / t->s->penalty : logits[id] * t->s->penalty);
            t->seen[id] = !clear;
        }
    return LLMPAR_OK;
}

static llmpar_status on_token(void *user, int32_t id)
{
    const text *t = (const text *)user;
    if (t->shows) {
        print_byte(id);
        fflush(stdout);
    }
    for (int i = 0; i < t->s->stop_count; i++) {
        const prompt *stop = &t->s->stops[i];
        if (*t->count >= stop->count && !memcmp(t->ids + *t->count - stop->count, stop->ids, (size_t)stop->count * sizeof *stop->ids)) return LLMPAR_END;
    }
    return LLMPAR_OK;
}

/* A text that is alone is shown id by id as it grows, several when all are there. */
static llmpar_status generate_texts(llmpar_ctx *ctx, const settings *s, llmpar_generator *generator, int32_t vocab, int as_ids)
{
    size_t n = (size_t)s->prompt_count;
    llmpar_generate_desc *descs = (llmpar_generate_desc *)calloc(n, sizeof *descs);
    text *texts = (text *)calloc(n, sizeof *texts);
    int32_t *all = (int32_t *)malloc(n * (size_t)s->tokens * sizeof *all), **ids = (int32_t **)malloc(n * sizeof *ids), *counts = (int32_t *)malloc(n * sizeof *counts);
    unsigned char *seen = (unsigned char *)calloc((size_t)vocab, 1);
    int shows = ctx->rank == 0 && !as_ids && s->prompt_count == 1;
    llmpar_status status = descs && texts && all && ids && counts && seen ? LLMPAR_OK : llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "out of memory");
    for (int p = 0; p < s->prompt_count && !status; p++) {
        text *t = &texts[p];
        ids[p] = all + (size_t)p * (size_t)s->tokens;
        t->s = s;
        t->prompt = &s->prompts[p];
        t->ids = ids[p];
        t->count = &counts[p];
        t->seen = seen;
        t->shows = shows;
        descs[p].prompt = t->prompt->ids;
        descs[p].prompt_count = t->prompt->count;
        descs[p].tokens = (int32_t)s->tokens;
        descs[p].temperature = s->temperature;
        descs[p].top_k = (int32_t)s->top_k;
        descs[p].top_p = s->top_p;
        descs[p].seed = s->seed + (unsigned long)p;
        descs[p].stop_at_eos = !s->print_ids;
        descs[p].on_logits = s->penalty > 0 && s->penalty != 1 ? penalize : NULL;
        descs[p].on_token = on_token;
        descs[p].user = t;
    }
    if (!status && shows && s->bytes) printf("%s", s->prompts[0].given);
    if (!status) status = llmpar_generator_run(generator, descs, s->prompt_count, ids, counts);
    for (int p = 0; p < s->prompt_count && !status && ctx->rank == 0; p++) {
        const prompt *prompt = &s->prompts[p];
        if (!as_ids && !shows && s->bytes) printf("%s", prompt->given);
        for (int32_t i = 0; i < counts[p] && !as_ids && !shows; i++) print_byte(ids[p][i]);
        for (int32_t i = 0; i < prompt->count + counts[p] && as_ids; i++) printf("%s%d", i ? " " : "", (int)(i < prompt->count ? prompt->ids[i] : ids[p][i - prompt->count]));
        printf("\n");
    }
    free(descs);
    free(texts);
    free(all);
    free(ids);
    free(counts);
    free(seen);
    return status;
}

static llmpar_status generate(llmpar_ctx *ctx, void *user)
{
    const settings *s = (const settings *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_llama *model = NULL;
    llmpar_trainer *trainer = NULL;
    llmpar_llama_config config;
    llmpar_mesh_desc mesh_desc;
    llmpar_llama_desc model_desc;
    llmpar_trainer_desc trainer_desc;
    llmpar_generator *generator = NULL;
    llmpar_generator_desc generator_desc;
    memset(&mesh_desc, 0, sizeof mesh_desc);
    memset(&model_desc, 0, sizeof model_desc);
    memset(&trainer_desc, 0, sizeof trainer_desc);
    memset(&generator_desc, 0, sizeof generator_desc);
    memset(&config, 0, sizeof config);
    mesh_desc.tp = (int32_t)s->tp;
    model_desc.config = &config;
    trainer_desc.dtype = s->dtype;
    trainer_desc.seq_len = s->longest + s->tokens;
    llmpar_status status = llmpar_hf_config(ctx, s->model, &config);
    if (!status && s->bytes && config.vocab != 256) status = llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "--prompt needs a model over bytes (vocabulary 256), %s has %d: use --prompt-ids", s->model, (int)config.vocab);
    if (!status && s->stop_bytes && config.vocab != 256) status = llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "--stop needs a model over bytes (vocabulary 256), %s has %d: use --stop-ids", s->model, (int)config.vocab);
    for (int i = 0; i < s->stop_count && !status; i++)
        for (int32_t k = 0; k < s->stops[i].count && !status; k++)
            if (s->stops[i].ids[k] >= config.vocab) status = llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "--stop-ids \"%s\": token id %d, expected 0 .. %d", s->stops[i].given, (int)s->stops[i].ids[k], (int)config.vocab - 1);
    if (!status && trainer_desc.seq_len > config.max_positions)
        status = llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "prompt of %d ids + %ld tokens is more than the model's max_position_embeddings = %d", (int)s->longest, s->tokens, (int)config.max_positions);
    if (!status) status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_llama_create(ctx, &model_desc, &model);
    if (!status) status = llmpar_parallelize(mesh, model, &trainer_desc, &trainer);
    if (!status) status = llmpar_load_hf(trainer, s->model);
    generator_desc.texts = (int32_t)(s->at_once ? s->at_once : s->prompt_count < 16 ? s->prompt_count : 16);
    if (!status) status = llmpar_generator_create(model, llmpar_trainer_fsdp(trainer), &generator_desc, &generator);
    if (!status) status = generate_texts(ctx, s, generator, config.vocab, s->print_ids || (!s->bytes && config.vocab != 256)); /* whose prompt is text has a model of bytes, however many ids it knows */
    llmpar_status end = llmpar_generator_destroy(generator);
    if (!status) status = end;
    llmpar_trainer_destroy(trainer);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    return status;
}

/* One more of a list, as ids: bytes of the text, or the numbers of the list. */
static int add_ids(const char *option, const char *given, int bytes, prompt **list, int most, int *count)
{
    if (*count == most) return option_error("%s: more than %d", option, most);
    if (!*list && !(*list = (prompt *)calloc((size_t)most, sizeof **list))) return option_error("out of memory");
    prompt *p = &(*list)[(*count)++];
    p->given = given;
    p->ids = (int32_t *)malloc((strlen(given) + 1) * sizeof *p->ids);
    if (!p->ids) return option_error("out of memory");
    for (const char *c = given; bytes && *c; c++) p->ids[p->count++] = (unsigned char)*c;
    for (const char *c = given; !bytes;) {
        char *end;
        long id = isdigit((unsigned char)*c) ? strtol(c, &end, 10) : -1;
        if (id < 0 || id > INT32_MAX || (*end && *end != ',')) return option_error("%s \"%s\": expected numbers 0 or more, separated by commas", option, given);
        p->ids[p->count++] = (int32_t)id;
        if (!*end) break;
        c = end + 1;
    }
    return p->count ? 0 : option_error("%s is empty, expected at least one token", option);
}

static int add_prompt(settings *s, const char *given, int bytes)
{
    if (s->prompt_count && bytes != s->bytes) return option_error("expected exactly one of --prompt and --prompt-ids, see --help");
    s->bytes = bytes;
    int bad = add_ids(bytes ? "--prompt" : "--prompt-ids", given, bytes, &s->prompts, MOST_PROMPTS, &s->prompt_count);
    if (!bad && s->prompts[s->prompt_count - 1].count > s->longest) s->longest = s->prompts[s->prompt_count - 1].count;
    return bad;
}

static int add_stop(settings *s, const char *given, int bytes)
{
    s->stop_bytes |= bytes;
    return add_ids(bytes ? "--stop" : "--stop-ids", given, bytes, &s->stops, MOST_STOPS, &s->stop_count);
}

static void free_settings(settings *s)
{
    for (int p = 0; p < s->prompt_count; p++) free(s->prompts[p].ids);
    for (int p = 0; p < s->stop_count; p++) free(s->stops[p].ids);
    free(s->prompts);
    free(s->stops);
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"model", 1, 0, 'm'}, {"prompt", 1, 0, 'p'}, {"prompt-ids", 1, 0, 'i'}, {"tokens", 1, 0, 'n'}, {"temperature", 1, 0, 't'}, {"top-k", 1, 0, 'k'}, {"top-p", 1, 0, 'q'},
                                            {"repeat-penalty", 1, 0, 'r'}, {"stop", 1, 0, 'S'}, {"stop-ids", 1, 0, 'J'},
                                            {"seed", 1, 0, 's'},  {"tp", 1, 0, 'T'}, {"at-once", 1, 0, 'a'},     {"threads", 1, 0, 'w'},    {"pin", 1, 0, 'N'}, {"ids", 0, 0, 'I'},    {"dtype", 1, 0, 'D'},
                                            DEVICE_OPTIONS,       {"help", 0, 0, 'h'},   {0, 0, 0, 0}};
    static const char *const pins[] = {"auto", "on", "off"}, *const dtypes[] = {"f32", "f64", "bf16", "f16"};
    static const llmpar_dtype dtype[] = {LLMPAR_F32, LLMPAR_F64, LLMPAR_BF16, LLMPAR_F16};
    settings s;
    memset(&s, 0, sizeof s);
    s.tokens = 128;
    s.tp = 1;
    int bad = 0, index = 0, word = 0;
    for (int c; !bad && (c = getopt_long(argc, argv, "", options, &index)) != -1;) {
        switch (c) {
        case 'm': s.model = optarg; break;
        case 'p': bad = add_prompt(&s, optarg, 1); break;
        case 'i': bad = add_prompt(&s, optarg, 0); break;
        case 'n': bad = option_long("--tokens", optarg, 1, 1 << 24, &s.tokens); break;
        case 't': bad = option_double("--temperature", optarg, 0, 1000, &s.temperature); break;
        case 'k': bad = option_long("--top-k", optarg, 0, INT32_MAX, &s.top_k); break;
        case 'r': bad = option_double("--repeat-penalty", optarg, 1e-3, 1000, &s.penalty); break;
        case 'S': bad = add_stop(&s, optarg, 1); break;
        case 'J': bad = add_stop(&s, optarg, 0); break;
        case 'q': bad = option_double("--top-p", optarg, 1e-9, 1, &s.top_p); break;
        case 's': bad = option_seed("--seed", optarg, &s.seed); break;
        case 'a': bad = option_long("--at-once", optarg, 1, MOST_PROMPTS, &s.at_once); break;
        case 'T': bad = option_long("--tp", optarg, 1, 4096, &s.tp); break;
        case 'w': bad = option_long("--threads", optarg, 1, 256, &s.threads); break;
        case 'N': bad = option_word("--pin", optarg, pins, 3, &s.pin); break;
        case 'I': s.print_ids = 1; break;
        case 'D': bad = option_word("--dtype", optarg, dtypes, 4, &word); s.dtype = dtype[word]; break;
        case DEVICE_OPTION: bad = device_option(options[index].name, optarg, &s.device); break;
        case 'h': usage(); free_settings(&s); return 0;
        default: bad = 2; /* getopt_long has said what */
        }
    }
    if (!bad && optind < argc) bad = option_error("unexpected argument \"%s\", see --help", argv[optind]);
    if (!bad && !s.model) bad = option_error("--model is missing, see --help");
    if (!bad && !s.prompt_count) bad = option_error("expected exactly one of --prompt and --prompt-ids, see --help");
    if (!bad) bad = device_options_check(&s.device, "generate");
    if (!bad) bad = option_processes("generate");
    if (bad) {
        free_settings(&s);
        return 2;
    }
    llmpar_launch_desc launch;
    llmpar_error error;
    memset(&launch, 0, sizeof launch);
    launch.ranks = (int32_t)s.tp;
    launch.threads = (int32_t)s.threads;
    launch.pin = (llmpar_pin)s.pin;
    launch.log = quiet_log;
    device_launch(&s.device, &launch);
    llmpar_status status = llmpar_launch(&launch, generate, &s, &error);
    free_settings(&s);
    return status ? print_error("generate", &error) : output_end("generate");
}
