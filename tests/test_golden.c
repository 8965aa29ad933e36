/* Small random models against Hugging Face transformers (tests/golden/README.md): logits, loss, every gradient, and every parameter after three steps of AdamW with clipping, on meshes of 1 to 4 ranks, in f32 and in f64. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#include "model.h"

/* tests/golden/MODEL/FILE beside this source. */
static const char *golden_path(const char *model, const char *file)
{
    static char buffer[4][1024];
    static int next;
    const char *slash = strrchr(__FILE__, '/');
    next = (next + 1) % 4;
    snprintf(buffer[next], sizeof buffer[next], "%.*s/golden/%s%s%s", slash ? (int)(slash - __FILE__) : 1, slash ? __FILE__ : ".", model, file[0] ? "/" : "", file);
    return buffer[next];
}

#define GOLDEN_STEPS 3
#define GOLDEN_TOKENS 48
typedef struct golden_case {
    char directory[1024];
    const llmpar_json *root;
    llmpar_safetensors *logits, *gradients, *after;
    llmpar_error error;
    int32_t ids[GOLDEN_STEPS][GOLDEN_TOKENS], targets[GOLDEN_STEPS][GOLDEN_TOKENS];
    double loss[GOLDEN_STEPS], norm[GOLDEN_STEPS];
} golden_case;

static llmpar_status check_golden(session *s, void *user)
{
    const golden_case *c = (const golden_case *)user;
    int f64 = llmpar_fsdp_dtype(s->fsdp) == LLMPAR_F64;
    int32_t units = llmpar_fsdp_unit_count(s->fsdp), vocab = llmpar_llama_get_config(s->model)->vocab;
    llmpar_optim *adamw = NULL;
    llmpar_optim_desc desc = { number(c->root, "beta1"), number(c->root, "beta2"), number(c->root, "eps"), number(c->root, "weight_decay"), number(c->root, "clip"), 0, 0, LLMPAR_OPTIM_ADAMW };
    gradients g = { (void **)take((size_t)units, sizeof(void *)) };
    int32_t tensors = 0;
    int64_t t = (int64_t)number(c->root, "seq_len");

    float *logits = (float *)take((size_t)(GOLDEN_TOKENS * vocab), sizeof *logits); /* they come in f32 whatever the dtype */
    double *logits_f64 = (double *)take((size_t)(GOLDEN_TOKENS * vocab), sizeof *logits_f64);
    llmpar_status status = llmpar_llama_logits(s->model, s->fsdp, c->ids[0], (int32_t)t, logits);
    if (!status) status = llmpar_llama_logits(s->model, s->fsdp, c->ids[0] + t, (int32_t)t, logits + t * vocab);
    for (int i = 0; i < GOLDEN_TOKENS * vocab; i++) logits_f64[i] = logits[i];
    if (!status) check_tensor(c->logits, "logits", logits_f64, GOLDEN_TOKENS * vocab, f64 ? 6e-8 : 3e-6);
    if (!status) check_tensor(c->logits, "logits_f32", logits_f64, GOLDEN_TOKENS * vocab, 1e-5); /* what transformers makes of float32 */
    free(logits_f64);
    free(logits);

    if (!status) status = llmpar_optim_create(s->fsdp, &desc, &adamw);
    for (int i = 0; !status && i < GOLDEN_STEPS; i++) {
        batch b = { c->ids[i], c->targets[i], GOLDEN_TOKENS / t, t };
        llmpar_run run;
        memset(&run, 0, sizeof run);
        run.optimizer = llmpar_optim_table(adamw);
        if (i == 0) run.on_gradient = keep_gradient, run.on_gradient_user = &g;
        llmpar_optim_set_lr(adamw, number(c->root, "lr"));
        status = step(s, &b, 0, &run, NULL);
        if (status) break;
        check_relative("loss", run.loss, c->loss[i], f64 ? 1e-13 : i ? 1e-5 : 1e-6);
        check_relative("grad_norm", run.grad_norm / (f64 ? scale_rounding(run.global_tokens) : 1), c->norm[i], f64 ? 1e-12 : 1e-5);
        CHECK_INT(llmpar_optim_steps(adamw), i + 1);
    }
    for (int32_t u = 0; !status && u < units; u++)
        for (int32_t p = 0; p < llmpar_fsdp_unit(s->fsdp, u)->param_count; p++, tensors++) {
            llmpar_dtensor tensor;
            int64_t n;
            double *value = whole(s, u, p, g.shard[u], &tensor, &n), factor = f64 ? scale_rounding(GOLDEN_TOKENS) : 1;
            for (int64_t i = 0; i < n; i++) value[i] /= factor;
            check_tensor(c->gradients, tensor.name, value, n, f64 ? 1e-13 : 2e-5);
            free(value);
            value = whole(s, u, p, llmpar_fsdp_shard(s->fsdp, u, NULL, NULL, NULL), &tensor, &n);
            check_tensor(c->after, tensor.name, value, n, f64 ? 1e-11 : 1e-5);
            free(value);
        }
    if (!status) CHECK_INT(tensors, c->gradients->count);
    if (!status) CHECK_INT(tensors, c->after->count);
    drop_gradients(s, &g);
    llmpar_optim_destroy(adamw);
    return status;
}

/* That there are sequences makes the trainer ask for the optimizer's states; the steps here bring their own. */
static llmpar_status no_sequence(void *user, int64_t index, int32_t *tokens)
{
    (void)user, (void)index, (void)tokens;
    return LLMPAR_ERR_UNSUPPORTED;
}

static void golden_model(const char *model)
{
    static const struct { llmpar_mesh_desc mesh; int sp, zero; } meshes[] = {
        { { 1, 1, 1, 1, 1 }, 0, 0 }, { { 1, 1, 1, 1, 2 }, 0, 0 }, { { 1, 1, 1, 1, 4 }, 1, 0 }, { { 1, 2, 1, 1, 1 }, 0, 0 },
        { { 1, 2, 1, 1, 2 }, 1, 0 }, { { 1, 2, 1, 1, 1 }, 0, LLMPAR_ZERO_0 }, { { 2, 1, 1, 1, 2 }, 0, 0 },
    };
    static golden_case c;
    llmpar_heap heap, files;
    llmpar_heap_init(&files, NULL);
    memset(&c, 0, sizeof c);
    llmpar_json *root = read_json(&heap, golden_path(model, "expected.json"));
    c.root = root;
    snprintf(c.directory, sizeof c.directory, "%s", golden_path(model, ""));
    CHECK_OK(llmpar_safetensors_open(&files, NULL, golden_path(model, "logits.safetensors"), &c.logits, &c.error));
    CHECK_OK(llmpar_safetensors_open(&files, NULL, golden_path(model, "gradients.safetensors"), &c.gradients, &c.error));
    CHECK_OK(llmpar_safetensors_open(&files, NULL, golden_path(model, "after.safetensors"), &c.after, &c.error));
    int steps = 0;
    for (const llmpar_json *e = llmpar_json_get(root, "steps") ? llmpar_json_get(root, "steps")->child : NULL; e && steps < GOLDEN_STEPS; e = e->next, steps++) {
        CHECK_INT(integers(llmpar_json_get(e, "ids"), c.ids[steps], GOLDEN_TOKENS), GOLDEN_TOKENS);
        CHECK_INT(integers(llmpar_json_get(e, "targets"), c.targets[steps], GOLDEN_TOKENS), GOLDEN_TOKENS);
        c.loss[steps] = number(e, "loss");
        c.norm[steps] = number(e, "grad_norm");
    }
    CHECK_INT(steps, GOLDEN_STEPS);
    if (c.logits && c.gradients && c.after)
        for (int dtype = LLMPAR_F32; dtype <= LLMPAR_F64; dtype++)
            for (size_t m = 0; m < sizeof meshes / sizeof meshes[0]; m++) {
                if (test_rounds(4) < 4 && m != (dtype == LLMPAR_F32 ? 2 : 4)) continue; /* 4 ranks */
                job j = { .directory = c.directory, .mesh = meshes[m].mesh, .body = check_golden, .user = &c };
                j.trainer.seq_len = (int64_t)number(root, "seq_len");
                j.trainer.dtype = (llmpar_dtype)dtype;
                j.trainer.sequence_parallel = meshes[m].sp;
                j.trainer.zero = meshes[m].zero;
                j.trainer.sequence = no_sequence;
                int before = test_failures;
                launch_ok(&j);
                if (test_failures != before) fprintf(stderr, "  (%s, mesh %d, %s)\n", model, (int)m, llmpar_dtype_name((llmpar_dtype)dtype));
            }
    llmpar_safetensors_close(c.logits);
    llmpar_safetensors_close(c.gradients);
    llmpar_safetensors_close(c.after);
    llmpar_json_destroy(&heap, root);
}

TEST(llama3_untied) { golden_model("llama3_untied"); }
TEST(linear_tied) { golden_model("linear_tied"); }
TEST(qwen2_yarn) { golden_model("qwen2_yarn"); }
TEST(qwen3_dynamic) { golden_model("qwen3_dynamic"); }
TEST(mistral_window) { golden_model("mistral_window"); }

TEST_LIST(T_(llama3_untied), T_(linear_tied), T_(qwen2_yarn), T_(qwen3_dynamic), T_(mistral_window))
