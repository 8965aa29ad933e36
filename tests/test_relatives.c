/* The near relatives of Llama (Mistral, Qwen2, Qwen3; dynamic and yarn RoPE): the same bits on every mesh, generation as the whole sequence sees it, and what is refused where the length of a sequence is known.
   Their numbers are compared with transformers' in test_golden.c, their derivatives with differences in test_model.c. */
#include "train.h"

typedef struct relative { const char *name; llmpar_family family; int tied; llmpar_rope_kind rope; int32_t heads, kv_heads, window; } relative;
static const relative relatives[] = {
    { "qwen2", LLMPAR_FAMILY_QWEN2, 0, LLMPAR_ROPE_YARN, 8, 2, 0 },
    { "qwen3", LLMPAR_FAMILY_QWEN3, 1, LLMPAR_ROPE_DYNAMIC, 8, 2, 0 },
    { "mistral", LLMPAR_FAMILY_MISTRAL, 0, LLMPAR_ROPE_NONE, 4, 4, 24 },
};
enum { RELATIVES = sizeof relatives / sizeof relatives[0] };

static llmpar_llama_config config_of(const relative *r)
{
    llmpar_llama_config c = train_config(0);
    c.layers = 2;
    c.family = r->family;
    c.tied = r->tied;
    c.heads = r->heads;
    c.kv_heads = r->kv_heads;
    c.sliding_window = r->window;
    c.rope_scaling.kind = r->rope;
    if (r->rope) c.rope_scaling.factor = 4;
    if (r->rope == LLMPAR_ROPE_DYNAMIC) c.max_positions = 16; /* and T is 24 */
    if (r->rope == LLMPAR_ROPE_YARN) {
        c.rope_scaling.original_max_positions = 16;
        c.rope_scaling.attention_factor = 1.2;
        c.rope_scaling.beta_fast = 2;
        c.rope_scaling.beta_slow = 0.1;
    }
    return c;
}

/* ---- the same bits ---- */

typedef struct way { const char *name; int32_t replicate, shard, tp, sp, accum, no_sync, zero, wrap; llmpar_recompute recompute; } way;
static const way ways[] = {
    { "tp2 sp", 1, 1, 2, 1, 1, 0, 3, 2, LLMPAR_RECOMPUTE_NONE },                     { "tp4", 1, 1, 4, 0, 1, 0, 3, 0, LLMPAR_RECOMPUTE_SELECTIVE },
    { "tp4 sp half", 1, 1, 4, 1, 2, 0, 3, LLMPAR_WRAP_HALF, LLMPAR_RECOMPUTE_FULL }, { "dp2", 1, 2, 1, 0, 2, 1, 0, 0, LLMPAR_RECOMPUTE_SELECTIVE },
    { "2x2 sp", 1, 2, 2, 1, 1, 0, 3, 2, LLMPAR_RECOMPUTE_SELECTIVE },                { "tp8", 1, 1, 8, 0, 1, 0, 3, 0, LLMPAR_RECOMPUTE_NONE },
    { "hsdp 2x2x2 sp", 2, 2, 2, 1, 2, 0, 3, 2, LLMPAR_RECOMPUTE_FULL },
};
enum { WAYS = sizeof ways / sizeof ways[0] };

static void same_bits(const relative *r, llmpar_dtype dtype)
{
    llmpar_llama_config config = config_of(r);
    train_result want, got;
    for (int w = -1; w < WAYS; w++) {
        const way *v = w < 0 ? NULL : &ways[w];
        char name[120];
        train_job job;
        memset(&job, 0, sizeof job);
        job.config = &config;
        job.dtype = dtype;
        job.zero = 3;
        job.steps = 3;
        job.keep_files = 1;
        job.on_threads = 1;
        job.exact = LLMPAR_EXACT_REQUIRE;
        if (v) {
            if (r->heads % v->tp || (test_rounds(4) < 4 && (w + (int)r->family + (int)dtype) % 3)) continue;
            job.dp_replicate = v->replicate;
            job.dp_shard = v->shard;
            job.tp = v->tp;
            job.sp = v->sp;
            job.accum = v->accum;
            job.no_sync = v->no_sync;
            job.zero = v->zero;
            job.wrap = v->wrap;
            job.policy.overlap = w & 1;
            job.policy.recompute = v->recompute;
        }
        train_run(&job, v ? &got : &want);
        if (!v) {
            if (want.status) TEST_FAIL("%s: one rank: %s", r->name, want.error.text);
            CHECK(want.step[0][2].loss < want.step[0][0].loss - 0.05);
            continue;
        }
        snprintf(name, sizeof name, "%s %s %s", r->name, llmpar_dtype_name(dtype), v->name);
        train_same(name, &got, &want);
        train_result_free(&got);
    }
    train_result_free(&want);
}

TEST(same_bits_qwen2) { same_bits(&relatives[0], LLMPAR_F32); }
TEST(same_bits_qwen3) { same_bits(&relatives[1], LLMPAR_F32); }
TEST(same_bits_mistral) { same_bits(&relatives[2], LLMPAR_F32); }
TEST(same_bits_in_half_precision)
{
    same_bits(&relatives[0], LLMPAR_BF16);
    same_bits(&relatives[1], LLMPAR_BF16);
    same_bits(&relatives[1], LLMPAR_F16);
}

/* ---- generation ---- */

enum { PROMPT = 7, LENGTH = 24, VOCAB = 509 };
typedef struct spoken { llmpar_llama *model[TRAIN_RANKS]; int dynamic; int32_t ids[LENGTH]; float logits[LENGTH * VOCAB]; int known; } spoken;

static llmpar_status keep_model(train_job *job, llmpar_ctx *ctx, llmpar_llama *model, llmpar_trainer *trainer)
{
    (void)trainer;
    ((spoken *)job->user)->model[ctx->rank] = model;
    return LLMPAR_OK;
}

/* Every id that came out of the cache is the first of the largest logits that the whole text gives at its place. */
static llmpar_status speak(train_job *job, llmpar_ctx *ctx, llmpar_trainer *trainer)
{
    static const int32_t prompt[PROMPT] = { 37, 74, 500, 0, 37, 111, 3 };
    spoken *s = (spoken *)job->user;
    llmpar_fsdp *fsdp = llmpar_trainer_fsdp(trainer);
    llmpar_generate_desc desc;
    int32_t ids[LENGTH], count = 0;
    float *logits = (float *)calloc((size_t)LENGTH * VOCAB, sizeof *logits);
    memset(&desc, 0, sizeof desc);
    memcpy(ids, prompt, sizeof prompt);
    desc.prompt = prompt;
    desc.prompt_count = PROMPT;
    desc.tokens = LENGTH - PROMPT;
    llmpar_status status = logits ? llmpar_llama_generate(s->model[ctx->rank], fsdp, &desc, ids + PROMPT, &count) : LLMPAR_ERR_MEMORY;
    if (s->dynamic) { /* its frequencies are those of one length */
        CHECK_STATUS(status, LLMPAR_ERR_UNSUPPORTED);
        CHECK_TEXT(llmpar_last_error(ctx), "rope_type = \"dynamic\" beyond max_position_embeddings = 16 depends on the length of the sequence: expected 24 positions, as llmpar_llama_apply was told, got one that grows");
        llmpar_error_clear(&ctx->error);
        CHECK_STATUS(llmpar_llama_logits(s->model[ctx->rank], fsdp, ids, LENGTH - 1, logits), LLMPAR_ERR_UNSUPPORTED);
        CHECK_TEXT(llmpar_last_error(ctx), "got 23");
        llmpar_error_clear(&ctx->error);
        for (int i = PROMPT; i < LENGTH; i++) ids[i] = 37 * (i % 11);
        status = LLMPAR_OK;
    } else if (!status) {
        CHECK_INT(count, LENGTH - PROMPT);
    }
    if (!status) status = llmpar_llama_logits(s->model[ctx->rank], fsdp, ids, LENGTH, logits);
    for (int i = PROMPT; i < LENGTH && !status && !s->dynamic; i++) {
        const float *row = logits + (size_t)(i - 1) * VOCAB;
        int best = 0;
        for (int v = 1; v < VOCAB; v++)
            if (row[v] > row[best]) best = v;
        if (best != ids[i]) TEST_FAIL("id %d is %d, the whole text says %d", i, (int)ids[i], best);
    }
    if (!status && ctx->world == 1) memcpy(s->logits, logits, sizeof s->logits), memcpy(s->ids, ids, sizeof ids), s->known = 1;
    if (!status) CHECK_BYTES(ids, s->ids, sizeof ids);
    if (!status) CHECK_BYTES(logits, s->logits, sizeof s->logits);
    free(logits);
    return status;
}

TEST(generation)
{
    spoken *s = (spoken *)calloc(1, sizeof *s);
    static const int32_t degrees[][2] = { { 1, 1 }, { 1, 2 }, { 1, 4 }, { 2, 2 } };
    if (!s) { TEST_FAIL("out of memory"); return; }
    for (int r = 0; r < RELATIVES; r++)
        for (int dtype = 0; dtype < 2; dtype++)
            for (int d = 0; d < 4; d++) {
                if (d && test_rounds(4) < 4 && d != 1 + (r + dtype) % 3) continue;
                llmpar_llama_config config = config_of(&relatives[r]);
                train_result result;
                train_job job;
                memset(&job, 0, sizeof job);
                job.config = &config;
                job.dtype = dtype ? LLMPAR_BF16 : LLMPAR_F32;
                job.dp_shard = degrees[d][0];
                job.tp = degrees[d][1];
                job.sp = d == 3;
                job.zero = 3;
                job.steps = 2; /* so that biases are not 0, nor norms 1 */
                job.on_threads = 1;
                job.ready = keep_model;
                job.finish = speak;
                job.user = s;
                s->dynamic = relatives[r].rope == LLMPAR_ROPE_DYNAMIC;
                train_run(&job, &result);
                if (result.status) TEST_FAIL("%s tp %d: %s", relatives[r].name, (int)job.tp, result.error.text);
            }
    CHECK(s->known);
    free(s);
}

/* ---- refusals ---- */

static void refused(const llmpar_llama_config *config, int64_t seq_len, const char *text)
{
    for (int tp = 1; tp <= 2; tp++) {
        train_result result;
        train_job job;
        memset(&job, 0, sizeof job);
        job.config = config;
        job.tp = tp;
        job.steps = 1;
        job.seq_len = seq_len;
        job.on_threads = 1;
        train_run(&job, &result);
        if (!text) {
            if (result.status) TEST_FAIL("%s", result.error.text);
            continue;
        }
        CHECK_STATUS(result.status, LLMPAR_ERR_UNSUPPORTED);
        CHECK_TEXT(result.error.text, text);
    }
}

TEST(refuses)
{
    llmpar_llama_config config = config_of(&relatives[2]);
    refused(&config, 24, NULL);
    config.sliding_window = 23;
    refused(&config, 24, "llama: sliding_window = 23 is shorter than the sequence, expected at least its 24 positions (or null)");
}

TEST_LIST(T_(same_bits_qwen2), T_(same_bits_qwen3), T_(same_bits_mistral), T_(same_bits_in_half_precision), T_(generation), T_(refuses))
