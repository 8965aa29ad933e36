/* text: generates texts on request, for bench/peers/generate.py: greedy, new weights, one rank.

     text MODEL f32|bf16 THREADS PROMPT TOKENS

   "ready", then for every line of stdin a line "SECONDS-OF-PROMPT SECONDS-OF-OTHERS SECONDS": up to the first token, from there to the last one, and all of it as the caller sees it, with the weights that are
   turned into streams and back. */
#include "llmpar.h"

#include "../bench.h"

typedef struct text {
    llmpar_llama_config config;
    llmpar_dtype dtype;
    int prompt, tokens, made;
    double first, last; /* when tokens came */
} text;

static llmpar_status token(void *user, int32_t id)
{
    text *t = (text *)user;
    (void)id;
    t->last = bench_now();
    if (t->made++ == 0) t->first = t->last;
    return LLMPAR_OK;
}

static llmpar_status serve(llmpar_ctx *ctx, void *user)
{
    text *t = (text *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_llama *model = NULL;
    llmpar_fsdp *fsdp = NULL;
    llmpar_mesh_desc mesh_desc;
    llmpar_llama_desc model_desc;
    llmpar_llama_apply_desc apply;
    llmpar_fsdp_desc fsdp_desc;
    llmpar_generate_desc desc;
    llmpar_unit *unit = NULL;
    int32_t units = 0, count = 0, *prompt = (int32_t *)calloc((size_t)t->prompt, sizeof *prompt), *ids = (int32_t *)calloc((size_t)t->tokens, sizeof *ids);
    char line[16];
    if (!prompt || !ids) return LLMPAR_ERR_MEMORY;
    for (int i = 0; i < t->prompt; i++) prompt[i] = (int32_t)((uint32_t)i * 2654435761u % (uint32_t)t->config.vocab);
    memset(&mesh_desc, 0, sizeof mesh_desc);
    memset(&model_desc, 0, sizeof model_desc);
    memset(&apply, 0, sizeof apply);
    memset(&fsdp_desc, 0, sizeof fsdp_desc);
    memset(&desc, 0, sizeof desc);
    model_desc.config = &t->config;
    apply.dtype = fsdp_desc.dtype = t->dtype;
    apply.positions = t->prompt + t->tokens;
    llmpar_status status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_llama_create(ctx, &model_desc, &model);
    if (!status) status = llmpar_llama_apply(model, mesh->comm[LLMPAR_AXIS_TP], &apply);
    if (!status) unit = llmpar_llama_units(model, &units);
    for (int32_t u = 0; u < units; u++) unit[u].frozen = 1; /* no f32 masters */
    if (!status) status = llmpar_fsdp_create(mesh, unit, units, &fsdp_desc, &fsdp);
    desc.prompt = prompt;
    desc.prompt_count = t->prompt;
    desc.tokens = t->tokens;
    desc.on_token = token;
    desc.user = t;
    if (!status) printf("ready\n");
    fflush(stdout);
    while (!status && fgets(line, sizeof line, stdin)) {
        double begin = bench_now();
        t->made = 0;
        status = llmpar_llama_generate(model, fsdp, &desc, ids, &count);
        printf("%.6f %.6f %.6f\n", t->first - begin, t->last - t->first, bench_now() - begin);
        fflush(stdout);
    }
    llmpar_fsdp_destroy(fsdp);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    free(prompt);
    free(ids);
    return status;
}

int main(int argc, char **argv)
{
    text t;
    llmpar_launch_desc desc;
    llmpar_error error;
    memset(&t, 0, sizeof t);
    memset(&desc, 0, sizeof desc);
    if (argc != 6 || (strcmp(argv[2], "f32") && strcmp(argv[2], "bf16")) || atoi(argv[3]) < 1 || atoi(argv[4]) < 1 || atoi(argv[5]) < 2) {
        fprintf(stderr, "usage: text MODEL f32|bf16 THREADS PROMPT TOKENS\n");
        return 2;
    }
    if (llmpar_llama_preset(argv[1], &t.config, &error)) { fprintf(stderr, "text: %s\n", error.text); return 2; }
    t.dtype = strcmp(argv[2], "f32") ? LLMPAR_BF16 : LLMPAR_F32;
    t.prompt = atoi(argv[4]);
    t.tokens = atoi(argv[5]);
    if (t.config.max_positions < t.prompt + t.tokens) t.config.max_positions = t.prompt + t.tokens;
    desc.ranks = 1;
    desc.threads = atoi(argv[3]);
    if (llmpar_launch(&desc, serve, &t, &error)) { fprintf(stderr, "text: %s\n", error.text); return 1; }
    return 0;
}
