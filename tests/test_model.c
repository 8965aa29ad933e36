/* The Llama against numbers that others computed: a trained model (stories260K: ids, logits, losses, gradient norms by llama2.c and PyTorch), and finite differences of its own loss.
   Small random models whose gradients and optimizer steps come from Hugging Face transformers: test_golden.c. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#include "model.h"
#include <unistd.h>

/* ---- stories260K ---- */

/* Under ThreadSanitizer, twenty times slower, only what has threads: few of them. */
#if defined(__SANITIZE_THREAD__)
#define UNTHREADED_TOO 0
#else
#define UNTHREADED_TOO 1
#endif

#define STORIES_V 512
static struct { int32_t ids[201]; double first_row[STORIES_V]; int32_t top_id[5]; double top_logit[5]; } golden;

static void read_golden(const char *path)
{
    llmpar_heap heap;
    double pairs[10];
    llmpar_json *root = read_json(&heap, path);
    CHECK_INT(integers(llmpar_json_get(root, "ids"), golden.ids, 201), 201);
    CHECK_INT(numbers(llmpar_json_get(root, "logits_first_row"), golden.first_row, STORIES_V), STORIES_V);
    CHECK_INT(numbers(llmpar_json_get(root, "logits_row63_top5"), pairs, 10), 10);
    for (int i = 0; i < 5; i++) golden.top_id[i] = (int32_t)pairs[2 * i], golden.top_logit[i] = pairs[2 * i + 1];
    llmpar_json_destroy(&heap, root);
}

static llmpar_status check_ids(session *s, void *user)
{
    int32_t ids[200], count = 0;
    llmpar_generate_desc desc;
    (void)user;
    memset(&desc, 0, sizeof desc);
    desc.prompt = golden.ids;
    desc.prompt_count = 1;
    desc.tokens = 200;
    llmpar_status status = llmpar_llama_generate(s->model, s->fsdp, &desc, ids, &count);
    if (status) return status;
    CHECK_INT(count, 200);
    for (int i = 0; i < 200; i++)
        if (ids[i] != golden.ids[i + 1]) { TEST_FAIL("tp %d: id %d is %d, want %d", s->mesh->degree[LLMPAR_AXIS_TP], i + 1, ids[i], golden.ids[i + 1]); break; }
    return LLMPAR_OK;
}

static float *logits_of_one_rank; /* [64, V] of the first mesh: all others must have the same bytes */

static llmpar_status check_logits(session *s, void *user)
{
    float *logits = (float *)take(64 * STORIES_V, sizeof *logits), *row = logits + 63 * STORIES_V;
    (void)user;
    llmpar_status status = llmpar_llama_logits(s->model, s->fsdp, golden.ids, 64, logits);
    for (int i = 0; !status && i < STORIES_V; i++) CHECK_NEAR(logits[i], golden.first_row[i], 1e-4);
    for (int k = 0; !status && k < 5; k++) {
        int higher = 0;
        CHECK_NEAR(row[golden.top_id[k]], golden.top_logit[k], 1e-4);
        for (int i = 0; i < STORIES_V; i++) higher += row[i] > row[golden.top_id[k]];
        CHECK_INT(higher, k);
    }
    if (!status && logits_of_one_rank) CHECK_BYTES(logits, logits_of_one_rank, 64 * STORIES_V * sizeof *logits);
    if (!status && !logits_of_one_rank) logits_of_one_rank = logits;
    else free(logits);
    return status;
}

TEST(stories_ids_and_logits)
{
    TEST_DATA(directory, "stories260K/hf");
    TEST_DATA(file, "stories260K/hf/golden.json");
    read_golden(file);
    for (int dtype = LLMPAR_F32; dtype <= LLMPAR_F64; dtype++) {
        for (int tp = 1; tp <= 8; tp *= dtype == LLMPAR_F32 ? 2 : 8) {
            job j = { .directory = directory, .mesh = { .tp = tp }, .trainer = { .seq_len = 201, .dtype = (llmpar_dtype)dtype }, .body = check_logits };
            launch_ok(&j);
            j.body = check_ids;
            if (dtype == LLMPAR_F32 && tp <= 4 && UNTHREADED_TOO) launch_ok(&j);
        }
        free(logits_of_one_rank);
        logits_of_one_rank = NULL;
    }
    /* Units gathered over the data ranks: every rank gets all ids. */
    job j = { .directory = directory, .mesh = { .dp_shard = 2, .tp = 2 }, .trainer = { .seq_len = 201 }, .body = check_ids };
    launch_ok(&j);
}

typedef struct text_case { const char *name; int32_t ids[260]; int count; double mean_nll, ppl, first8[8]; } text_case;

static llmpar_status check_text(session *s, void *user)
{
    const text_case *c = (const text_case *)user;
    int64_t t = c->count - 1;
    batch b = { c->ids, c->ids + 1, 1, t };
    double *losses = (double *)take((size_t)t, sizeof *losses), sum = 0, bound = llmpar_fsdp_dtype(s->fsdp) == LLMPAR_F64 ? 1e-10 : 1e-5;
    llmpar_run run;
    memset(&run, 0, sizeof run);
    llmpar_status status = step(s, &b, 1, &run, losses);
    if (!status) {
        CHECK_INT(run.global_tokens, t);
        check_relative(c->name, run.loss, c->mean_nll, bound);
        check_relative(c->name, exp(run.loss), c->ppl, bound * 10);
        for (int64_t i = 0; i < t; i++) sum += losses[i];
        check_relative("token losses", sum / (double)t, run.loss, 1e-13);
        for (int i = 0; i < 8; i++) CHECK_NEAR(losses[i], c->first8[i], llmpar_fsdp_dtype(s->fsdp) == LLMPAR_F64 ? 1e-9 : 2e-5); /* the file has 9 digits */
    }
    free(losses);
    return status;
}

TEST(stories_perplexity)
{
    TEST_DATA(directory, "stories260K/hf");
    TEST_DATA(file, "stories260K/hf/golden_f64.json");
    llmpar_heap heap;
    llmpar_json *root = read_json(&heap, file);
    int texts = 0;
    for (const llmpar_json *e = llmpar_json_get(root, "eval") ? llmpar_json_get(root, "eval")->child : NULL; e; e = e->next, texts++) {
        static text_case c;
        memset(&c, 0, sizeof c);
        c.name = e->key;
        c.count = integers(llmpar_json_get(e, "ids"), c.ids, 260);
        c.mean_nll = number(e, "mean_nll");
        c.ppl = number(e, "ppl");
        CHECK_INT(numbers(llmpar_json_get(e, "first8_nll"), c.first8, 8), 8);
        for (int dtype = LLMPAR_F32; dtype <= LLMPAR_F64; dtype++)
            for (int tp = UNTHREADED_TOO ? 1 : 4; tp <= 4; tp *= 4) {
                job j = { .directory = directory, .mesh = { .tp = tp }, .trainer = { .seq_len = c.count, .dtype = (llmpar_dtype)dtype }, .body = check_text, .user = &c };
                launch_ok(&j);
            }
    }
    CHECK(texts >= 2);
    llmpar_json_destroy(&heap, root);
}

/* The step through the front door: data by callback, gradients by file. */
#define TRAINED_T 47
static int32_t trained[2][TRAINED_T + 1];
static llmpar_status trained_sequence(void *user, int64_t index, int32_t *tokens)
{
    (void)user;
    if (index < 0) return LLMPAR_ERR_ARGUMENT;
    memcpy(tokens, trained[index % 2], sizeof trained[0]);
    return LLMPAR_OK;
}

typedef struct norms_case { const llmpar_json *root; const char *path; } norms_case;

static llmpar_status check_norms(session *s, void *user)
{
    const norms_case *c = (const norms_case *)user;
    int f64 = llmpar_fsdp_dtype(s->fsdp) == LLMPAR_F64, checked = 0;
    double bound = f64 ? 1e-10 : 1e-5, all = 0;
    llmpar_step result;
    llmpar_status status = llmpar_trainer_save_gradients(s->trainer, c->path);
    if (!status) status = llmpar_trainer_step(s->trainer, &result);
    if (status) return status;
    CHECK_INT(result.step, 1);
    CHECK_INT(result.tokens, 2 * TRAINED_T);
    check_relative("loss", result.loss, number(c->root, "loss"), bound);
    if (s->ctx->rank) return LLMPAR_OK; /* one reads the file */
    llmpar_safetensors *file = NULL;
    status = llmpar_safetensors_open(&s->ctx->heap, NULL, c->path, &file, &s->ctx->error);
    if (status) return status;
    double factor = f64 ? scale_rounding(result.tokens) : 1;
    for (int32_t i = 0; i < file->count; i++) {
        const llmpar_safetensor *t = &file->tensor[i];
        size_t n = t->bytes / llmpar_dtype_size(t->dtype);
        double *value = (double *)take(n, sizeof *value), sum = 0;
        void *copy = take(t->bytes, 1);
        CHECK_INT(t->dtype, llmpar_fsdp_dtype(s->fsdp));
        CHECK_OK(llmpar_safetensors_read(file, t, 0, t->bytes, copy, NULL));
        CHECK(llmpar_convert(value, LLMPAR_F64, copy, t->dtype, n));
        for (size_t k = 0; k < n; k++) sum += value[k] * value[k];
        all += sum;
        const llmpar_json *want = llmpar_json_get(llmpar_json_get(c->root, "grads_l2_sample"), t->name);
        if (want) check_relative(t->name, sqrt(sum) / factor, want->number, bound), checked++;
        free(copy);
        free(value);
    }
    CHECK_INT(checked, llmpar_json_get(c->root, "grads_l2_sample")->length);
    CHECK_INT(file->count, 2 + 5 * 9);
    check_relative("grad_norm", result.grad_norm, sqrt(all), f64 ? 1e-13 : 1e-6);
    llmpar_safetensors_close(file);
    return LLMPAR_OK;
}

TEST(stories_gradients)
{
    TEST_DATA(directory, "stories260K/hf");
    TEST_DATA(file, "stories260K/hf/golden_f64.json");
    char path[] = "/tmp/llmpar-test-XXXXXX";
    int descriptor = mkstemp(path);
    llmpar_heap heap;
    norms_case c = { read_json(&heap, file), path };
    if (descriptor >= 0) close(descriptor);
    CHECK_INT(integers(llmpar_json_get(c.root, "batch_ids"), trained[0], 2 * (TRAINED_T + 1)), 2 * (TRAINED_T + 1));
    static const struct { llmpar_mesh_desc mesh; llmpar_dtype dtype; } runs[] = { { { 1, 1, 1, 1, 1 }, LLMPAR_F32 }, { { 1, 2, 1, 1, 2 }, LLMPAR_F32 }, { { 1, 1, 1, 1, 2 }, LLMPAR_F64 } };
    for (int i = UNTHREADED_TOO ? 0 : 1; i < 3; i++) {
        job j = { .directory = directory, .mesh = runs[i].mesh, .body = check_norms, .user = &c };
        j.trainer.sequence = trained_sequence;
        j.trainer.seq_len = TRAINED_T;
        j.trainer.batch = 2;
        j.trainer.dtype = runs[i].dtype;
        j.trainer.log_every = -1;
        launch_ok(&j);
    }
    unlink(path);
    llmpar_json_destroy(&heap, (llmpar_json *)c.root);
}

/* ---- finite differences ---- */

static llmpar_status check_differences(session *s, void *user)
{
    enum { FD_B = 2, FD_T = 7, SAMPLES = 6 };
    int32_t ids[FD_B * FD_T], targets[FD_B * FD_T], units = llmpar_fsdp_unit_count(s->fsdp), vocab = llmpar_llama_get_config(s->model)->vocab;
    batch b = { ids, targets, FD_B, FD_T };
    gradients g = { (void **)take((size_t)units, sizeof(void *)) };
    llmpar_rng rng = llmpar_rng_key(3, LLMPAR_RNG_USER, "finite differences", 0, 0);
    uint64_t draw = 0;
    int kinds = 0;
    (void)user;
    for (int32_t u = 0; u < units; u++) /* biases begin at 0, and norms at 1 */
        for (int32_t p = 0; p < llmpar_fsdp_unit(s->fsdp, u)->param_count; p++) {
            const llmpar_param *param = &llmpar_fsdp_unit(s->fsdp, u)->params[p];
            double *w = (double *)llmpar_fsdp_local(s->fsdp, u, p, llmpar_fsdp_shard(s->fsdp, u, NULL, NULL, NULL));
            for (int64_t i = 0; param->dims == 1 && i < param->shape[0]; i++) w[i] += 0.8 * llmpar_rng_uniform(&rng, draw++) - 0.4;
        }
    for (int i = 0; i < FD_B * FD_T; i++) {
        ids[i] = (int32_t)(llmpar_rng_uniform(&rng, draw++) * vocab);
        targets[i] = i == 4 ? -1 : (int32_t)(llmpar_rng_uniform(&rng, draw++) * vocab);
    }
    llmpar_run run;
    memset(&run, 0, sizeof run);
    run.on_gradient = keep_gradient;
    run.on_gradient_user = &g;
    llmpar_status status = step(s, &b, 0, &run, NULL);
    for (int32_t u = 0; !status && u < units; u++)
        for (int32_t p = 0; !status && p < llmpar_fsdp_unit(s->fsdp, u)->param_count; p++, kinds++) {
            const llmpar_param *param = &llmpar_fsdp_unit(s->fsdp, u)->params[p];
            double *w = (double *)llmpar_fsdp_local(s->fsdp, u, p, llmpar_fsdp_shard(s->fsdp, u, NULL, NULL, NULL)), *dw = (double *)llmpar_fsdp_local(s->fsdp, u, p, g.shard[u]), largest = 0;
            int64_t count = 1, at = 0;
            for (int d = 0; d < param->dims; d++) count *= param->shape[d];
            for (int64_t i = 0; i < count; i++)
                if (fabs(dw[i]) > largest) largest = fabs(dw[i]), at = i;
            for (int k = 0; k < SAMPLES && !status; k++) {
                /* f' = (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12h, error h^4 */
                const double h = 2e-4, old = w[at];
                double f[4];
                static const double steps[4] = { 1, -1, 2, -2 };
                for (int e = 0; e < 4 && !status; e++) {
                    llmpar_run eval;
                    memset(&eval, 0, sizeof eval);
                    w[at] = old + steps[e] * h;
                    status = step(s, &b, 1, &eval, NULL);
                    f[e] = eval.loss;
                }
                w[at] = old;
                double want = (8 * (f[0] - f[1]) - (f[2] - f[3])) / (12 * h), got = dw[at] / scale_rounding(run.global_tokens);
                if (!status && !(fabs(got - want) <= 1e-6 * fabs(want) + 1e-9 * largest)) TEST_FAIL("%s[%lld]: gradient %.12g, finite difference %.12g", param->name, (long long)at, got, want);
                at = (int64_t)(llmpar_rng_uniform(&rng, draw++) * (double)count);
            }
        }
    llmpar_family family = llmpar_llama_get_config(s->model)->family;
    CHECK_INT(kinds, 2 + 2 * (family == LLMPAR_FAMILY_QWEN2 ? 12 : family == LLMPAR_FAMILY_QWEN3 ? 11 : 9) + !llmpar_llama_get_config(s->model)->tied);
    drop_gradients(s, &g);
    return status;
}

TEST(finite_differences)
{
    for (int k = 0; k < 4; k++) {
        int tied = k & 1;
        llmpar_llama_config c;
        memset(&c, 0, sizeof c);
        c.family = k == 2 ? LLMPAR_FAMILY_QWEN2 : k == 3 ? LLMPAR_FAMILY_QWEN3 : LLMPAR_FAMILY_LLAMA;
        c.vocab = 19;
        c.hidden = 12;
        c.intermediate = 20;
        c.layers = 2;
        c.heads = 4;
        c.kv_heads = 2;
        c.head_dim = 6;
        c.max_positions = 64;
        c.rms_eps = 1e-5;
        c.rope_theta = 100;
        c.rope_scaling.kind = k == 0 ? LLMPAR_ROPE_LLAMA3 : k == 1 ? LLMPAR_ROPE_LINEAR : k == 2 ? LLMPAR_ROPE_YARN : LLMPAR_ROPE_NONE;
        c.rope_scaling.factor = k < 3 ? 2 : 0;
        c.rope_scaling.original_max_positions = k == 1 ? 0 : 16;
        c.rope_scaling.low_freq_factor = k ? 0 : 1;
        c.rope_scaling.high_freq_factor = k ? 0 : 4;
        c.rope_scaling.attention_factor = c.rope_scaling.beta_fast = c.rope_scaling.beta_slow = k == 2 ? 1.5 : 0;
        c.tied = tied;
        c.bos_id = -1;
        c.init_std = 0.4;
        job j = { .config = &c, .trainer = { .seq_len = 7, .dtype = LLMPAR_F64 }, .body = check_differences };
        launch_ok(&j);
    }
}

/* ---- sizes that nobody would choose, and faults on the way ---- */

/* Heads wider than the hidden size, fewer rows of F than ranks, a prime vocabulary, an odd hidden size. */
static llmpar_llama_config awkward(int tied)
{
    llmpar_llama_config c;
    memset(&c, 0, sizeof c);
    c.vocab = 37;
    c.hidden = 33;
    c.intermediate = 5;
    c.layers = 2;
    c.heads = 8;
    c.kv_heads = 2;
    c.head_dim = 10;
    c.max_positions = 16;
    c.rms_eps = 1e-5;
    c.rope_theta = 10000;
    c.tied = tied;
    c.bos_id = -1;
    c.init_std = 0.2;
    return c;
}

typedef struct awkward_result { float logits[5 * 37]; int32_t ids[8]; } awkward_result;

static llmpar_status awkward_body(session *s, void *user)
{
    static const int32_t prompt[] = { 3, 36, 0, 7, 7 };
    awkward_result mine, *want = (awkward_result *)user;
    int32_t count = 0;
    llmpar_generate_desc desc;
    memset(&mine, 0, sizeof mine);
    memset(&desc, 0, sizeof desc);
    desc.prompt = prompt;
    desc.prompt_count = 5;
    desc.tokens = 8;
    desc.temperature = 0.7;
    desc.top_p = 0.9;
    llmpar_status status = llmpar_llama_logits(s->model, s->fsdp, prompt, 5, mine.logits);
    if (!status) status = llmpar_llama_generate(s->model, s->fsdp, &desc, mine.ids, &count);
    if (status) return status;
    if (s->ctx->world == 1) *want = mine;
    CHECK_BYTES(mine.logits, want->logits, sizeof mine.logits);
    CHECK_BYTES(mine.ids, want->ids, sizeof mine.ids);
    return LLMPAR_OK;
}

TEST(awkward_sizes)
{
    for (int tied = 0; tied < 2; tied++)
        for (int dtype = LLMPAR_F32; dtype <= LLMPAR_F64; dtype++) {
            llmpar_llama_config c = awkward(tied);
            awkward_result want;
            job j = { .config = &c, .mesh = { .tp = 1 }, .trainer = { .seq_len = 16, .dtype = (llmpar_dtype)dtype }, .body = awkward_body, .user = &want };
            launch_ok(&j);
            if (dtype == LLMPAR_F32) { /* rows of 33 floats cannot be selected as 8-byte integers */
                llmpar_error error;
                j.mesh.tp = 2;
                CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_MESH);
                CHECK_TEXT(error.text, "hidden_size = 33");
                c.hidden = 34;
                j.mesh.tp = 1;
                launch_ok(&j);
            }
            for (int tp = 2; tp <= 8; tp *= 2) {
                j.mesh.tp = tp;
                launch_ok(&j);
            }
        }
}

/* ---- half precision ---- */

typedef struct half_result { float logits[64 * STORIES_V]; int32_t ids[40]; int known; } half_result;

static llmpar_status half_body(session *s, void *user)
{
    half_result *want = (half_result *)user, *mine = (half_result *)take(1, sizeof *mine);
    int32_t count = 0;
    llmpar_generate_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.prompt = golden.ids;
    desc.prompt_count = 9;
    desc.tokens = 40;
    llmpar_status status = llmpar_llama_logits(s->model, s->fsdp, golden.ids, 64, mine->logits);
    if (!status) status = llmpar_llama_generate(s->model, s->fsdp, &desc, mine->ids, &count);
    if (!status && s->ctx->world == 1) *want = *mine;
    if (!status) CHECK_BYTES(mine->logits, want->logits, sizeof mine->logits);
    if (!status) CHECK_BYTES(mine->ids, want->ids, sizeof mine->ids);
    free(mine);
    return status;
}

/* Generation in bf16 and f16: the same bits on every mesh, near f32, and at first the same text. */
TEST(stories_in_half_precision)
{
    TEST_DATA(directory, "stories260K/hf");
    TEST_DATA(file, "stories260K/hf/golden.json");
    half_result *want = (half_result *)take(1, sizeof *want);
    read_golden(file);
    for (int dtype = 0; dtype < 2; dtype++) {
        job j = { .directory = directory, .mesh = { .tp = 1 }, .trainer = { .seq_len = 64, .dtype = dtype ? LLMPAR_F16 : LLMPAR_BF16 }, .body = half_body, .user = want };
        launch_ok(&j);
        double off = 0;
        for (int i = 0; i < STORIES_V; i++) off = fmax(off, fabs(want->logits[i] - golden.first_row[i]));
        if (!(off > 0 && off < (dtype ? 0.05 : 0.4))) TEST_FAIL("%s: the first row of logits is off by %.3g", dtype ? "f16" : "bf16", off);
        for (int i = 0; i < 4; i++) CHECK_INT(want->ids[i], golden.ids[9 + i]);
        for (int tp = 2; tp <= 8; tp *= 2) {
            j.mesh.tp = tp;
            j.wrap = tp == 4 ? LLMPAR_WRAP_HALF : 0;
            launch_ok(&j);
        }
    }
    free(want);
}

/* ---- blocks wrapped into units one way or another ---- */

typedef struct wrapped { const char *to; float logits[5 * 38]; int32_t ids[8]; double loss; int known; } wrapped;

static llmpar_status wrapped_sequence(void *user, int64_t index, int32_t *tokens)
{
    (void)user;
    for (int i = 0; i < 17; i++) tokens[i] = (int32_t)((index * 7 + i * (i + 3)) % 38);
    return LLMPAR_OK;
}

/* Two steps, whatever is computed again in them, then everything that names units: save, logits, generate, evaluate. */
static llmpar_status wrapped_body(session *s, void *user)
{
    static const int32_t prompt[] = { 3, 36, 0, 7, 7 };
    wrapped *w = (wrapped *)user;
    wrapped mine;
    int32_t count = 0, targets[32];
    batch b = { targets, targets + 1, 2, 8 };
    llmpar_run eval;
    llmpar_step result;
    llmpar_generate_desc desc;
    memset(&mine, 0, sizeof mine);
    memset(&desc, 0, sizeof desc);
    memset(&eval, 0, sizeof eval);
    for (int i = 0; i < 32; i++) targets[i] = i % 38;
    desc.prompt = prompt;
    desc.prompt_count = 5;
    desc.tokens = 8;
    llmpar_status status = LLMPAR_OK;
    for (int i = 0; i < 2 && !status; i++) status = llmpar_trainer_step(s->trainer, &result);
    if (!status) status = llmpar_save_hf(s->trainer, w->to);
    if (!status) status = llmpar_llama_logits(s->model, s->fsdp, prompt, 5, mine.logits);
    if (!status) status = llmpar_llama_generate(s->model, s->fsdp, &desc, mine.ids, &count);
    if (!status) status = step(s, &b, 1, &eval, NULL);
    if (status) return status;
    mine.loss = eval.loss;
    if (s->ctx->rank) return LLMPAR_OK;
    if (!w->known) memcpy(w->logits, mine.logits, sizeof mine.logits), memcpy(w->ids, mine.ids, sizeof mine.ids), w->loss = mine.loss;
    w->known = 1;
    CHECK_BYTES(mine.logits, w->logits, sizeof mine.logits);
    CHECK_BYTES(mine.ids, w->ids, sizeof mine.ids);
    CHECK(mine.loss == w->loss);
    return LLMPAR_OK;
}

TEST(wrapping)
{
    static const int32_t wraps[] = { 0, 1, LLMPAR_WRAP_HALF, 2, 3, 8 };
    char root[] = "/tmp/llmpar_wrapping_XXXXXX", first[64], next[64], file[96], config[96];
    llmpar_llama_config c = awkward(0);
    llmpar_error error;
    wrapped w;
    size_t want_length = 0, length;
    char *want = NULL, *got;
    memset(&w, 0, sizeof w);
    CHECK(mkdtemp(root) != NULL);
    c.vocab = 38;
    c.hidden = 34;
    c.layers = 5;
    /* What `first` saves, the others load from and must save again after the same two steps. */
    snprintf(first, sizeof first, "%s/first", root);
    snprintf(next, sizeof next, "%s/next", root);
    for (int k = 0; k < 6; k++)
        for (int sp = 0; sp < 2; sp++) {
            job j = { .config = &c, .mesh = { .dp_shard = 2, .tp = k ? 2 : 1 }, .trainer = { .seq_len = 16, .batch = 4, .sequence = wrapped_sequence, .sequence_parallel = sp, .recompute = (llmpar_recompute)((k + sp) % 3), .overlap = (k + sp) & 1, .log_every = -1 }, .body = wrapped_body, .user = &w,
                      .wrap = wraps[k], .logits_bytes = k % 3 ? 2000 : 0 };
            w.to = want ? next : first;
            if (launch(&j, &error)) { TEST_FAIL("wrap %d: rank %d (%s): %s", wraps[k], error.rank, error.where, error.text); continue; }
            snprintf(file, sizeof file, "%s/model.safetensors", w.to);
            snprintf(config, sizeof config, "%s/config.json", w.to);
            got = read_text(file, &length);
            if (!want) want = got, want_length = length;
            else {
                if (length != want_length || memcmp(got, want, length)) TEST_FAIL("wrap %d, sp %d: not the same file", wraps[k], sp);
                free(got);
                unlink(file);
                unlink(config);
                rmdir(next);
            }
        }
    /* A file knows no units. */
    w.known = 0;
    for (int k = 0; k < 6; k++) {
        job j = { .directory = first, .mesh = { .tp = 2 }, .trainer = { .seq_len = 16, .batch = 4, .sequence = wrapped_sequence, .log_every = -1 }, .body = wrapped_body, .user = &w, .wrap = wraps[k] };
        w.to = next;
        launch_ok(&j);
    }
    unlink(file);
    unlink(config);
    rmdir(next);
    snprintf(file, sizeof file, "%s/model.safetensors", first);
    snprintf(config, sizeof config, "%s/config.json", first);
    unlink(file);
    unlink(config);
    rmdir(first);
    rmdir(root);
    free(want);
    static const int32_t bad[] = { -2, 9 };
    for (int k = 0; k < 2; k++) {
        job j = { .config = &c, .trainer = { .seq_len = 16 }, .body = wrapped_body, .user = &w, .wrap = bad[k] };
        CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_ARGUMENT);
        CHECK_TEXT(error.text, "expected 1 .. 8 blocks a unit or -1");
    }
}

/* One weight of the output projection is no number: so is one logit. */
static llmpar_status poisoned_body(session *s, void *user)
{
    static const int32_t prompt[] = { 3, 4 };
    int32_t ids[4], count = 0, head = llmpar_fsdp_unit_count(s->fsdp) - 1;
    float *w = (float *)llmpar_fsdp_local(s->fsdp, head, 1, llmpar_fsdp_shard(s->fsdp, head, NULL, NULL, NULL)), old = w[33 * 5];
    llmpar_step step;
    (void)user;
    w[33 * 5] = (float)NAN;
    for (int k = 0; k < 4; k++) {
        llmpar_generate_desc desc;
        memset(&desc, 0, sizeof desc);
        desc.prompt = prompt;
        desc.prompt_count = 2;
        desc.tokens = 4;
        desc.temperature = k < 2 ? 0 : 1;
        desc.top_p = k & 1 ? 0.5 : 0;
        CHECK_STATUS(llmpar_llama_generate(s->model, s->fsdp, &desc, ids, &count), LLMPAR_ERR_NONFINITE);
        CHECK_INT(count, 0);
    }
    /* What went wrong before does not stand for what goes wrong in a step, nor a step's own error twice. */
    for (int k = 0; k < 2; k++) {
        CHECK_STATUS(llmpar_trainer_step(s->trainer, &step), LLMPAR_ERR_NONFINITE);
        CHECK_TEXT(llmpar_last_error(s->ctx), "step 1: loss");
        CHECK_TEXT(llmpar_last_error(s->ctx), "lm_head.weight");
        CHECK_INT(s->ctx->error.rank, 0);
    }
    w[33 * 5] = old;
    llmpar_status status = llmpar_trainer_step(s->trainer, &step);
    CHECK_INT(step.step, 1);
    return status;
}

static llmpar_status counting_sequence(void *user, int64_t index, int32_t *tokens)
{
    (void)user;
    for (int i = 0; i <= 8; i++) tokens[i] = (int32_t)((index + i) % 37);
    return LLMPAR_OK;
}

TEST(not_a_number)
{
    llmpar_llama_config c = awkward(0);
    job j = { .config = &c, .trainer = { .sequence = counting_sequence, .seq_len = 8, .log_every = -1 }, .body = poisoned_body };
    launch_ok(&j);
}

static llmpar_status unshard_body(session *s, void *user)
{
    void *const *params = NULL;
    (void)user;
    /* On both ranks alike, before anything is sent. */
    for (int k = 0; k < 2; k++) {
        s->ctx->heap.fail_at = s->ctx->heap.calls + 1;
        CHECK_STATUS(llmpar_fsdp_unshard(s->fsdp, 1, &params), LLMPAR_ERR_MEMORY);
        s->ctx->heap.fail_at = 0;
        CHECK(params == NULL);
    }
    CHECK_OK(llmpar_fsdp_unshard(s->fsdp, 1, &params));
    CHECK(params && params[0]);
    CHECK_OK(llmpar_fsdp_reshard(s->fsdp, 1));
    CHECK_STATUS(llmpar_fsdp_reshard(s->fsdp, 1), LLMPAR_ERR_ARGUMENT);
    return LLMPAR_OK;
}

TEST(unshard_that_fails)
{
    llmpar_llama_config c = awkward(0);
    job j = { .config = &c, .mesh = { .dp_shard = 2 }, .trainer = { .seq_len = 8 }, .body = unshard_body };
    launch_ok(&j);
}

TEST_LIST(T_(stories_ids_and_logits), T_(stories_perplexity), T_(stories_gradients), T_(finite_differences), T_(stories_in_half_precision), T_(awkward_sizes), T_(wrapping), T_(not_a_number), T_(unshard_that_fails))
