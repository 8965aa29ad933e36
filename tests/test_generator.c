/* Many texts of one generator, one by one and at once: the ids and the logits that each gives alone, on every mesh, though nothing is computed twice; and the parameters are lent until it goes, and then what they were. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#include "apart_device.h"
#include "debug_device.h"
#include "model.h"

#include <unistd.h>

enum { POSITIONS = 64, LONG = 1100, TEXTS = 8, ROWS = 16 };
static const llmpar_dtype dtypes[] = { LLMPAR_F32, LLMPAR_BF16, LLMPAR_F16 };

/* What went through a rank's device. */
static __thread struct watched { llmpar_device real; int64_t rows; int products, product_fails, turned, back, turn_fails, tokens, token_fails, row, ended; uint64_t last[ROWS]; /* of the first rows of the last product */ } watched;

static llmpar_status planted(llmpar_device *device) { return llmpar_error_set(device->error, LLMPAR_ERR_IO, "planted"); }
static llmpar_status watched_gemm(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args)
{
    if (++watched.products == watched.product_fails) return planted(device);
    llmpar_status status = watched.real.gemm(device, stream, args);
    size_t bytes = (size_t)args->n * llmpar_dtype_size(args->out_dtype), ld = (size_t)args->ldc * llmpar_dtype_size(args->out_dtype);
    watched.row = 0;
    for (int64_t r = 0; r < args->m && r < ROWS && !status; r++) {
        watched.last[r] = 0;
        for (size_t i = 0; i < bytes; i++) watched.last[r] = (watched.last[r] ^ ((const unsigned char *)args->c)[(size_t)r * ld + i]) * 0x100000001b3u;
    }
    return status;
}
static llmpar_status watched_attention(llmpar_device *device, llmpar_stream *stream, const llmpar_attention_args *args)
{
    watched.rows += args->tq;
    return watched.real.attention(device, stream, args);
}
static llmpar_status watched_each(llmpar_device *device, llmpar_stream *stream, const llmpar_attention_each_args *args)
{
    for (int32_t i = 0; i < args->count; i++) watched.rows += args->each[i].tq;
    return watched.real.attention_each(device, stream, args);
}
static llmpar_status watched_interleave(llmpar_device *device, llmpar_stream *stream, const llmpar_interleave_args *args)
{
    if (!args->back && watched.turned + 1 == watched.turn_fails) return planted(device);
    args->back ? watched.back++ : watched.turned++;
    return watched.real.interleave(device, stream, args);
}
static llmpar_status watched_token(void *user, int32_t id)
{
    uint64_t *logits = (uint64_t *)user;
    (void)id;
    *logits = *logits * 31 + watched.last[watched.row++]; /* the head's product was the last one, a row for each text that goes on */
    return ++watched.tokens == watched.token_fails ? LLMPAR_ERR_IO : LLMPAR_OK;
}
static void watched_end(void *user)
{
    (void)user;
    watched.ended++;
}
static void watch_again(void)
{
    llmpar_device real = watched.real;
    memset(&watched, 0, sizeof watched);
    watched.real = real;
}

typedef struct text { int32_t prompt_count, tokens, seed /* 0: greedy */, shared /* ids whose keys are kept from before */; int32_t prompt[LONG], ids[LONG], count; uint64_t logits, heard; } text;
typedef struct talk { const char *name; int32_t positions; int known /* what the first mesh said */; text texts[TEXTS]; } talk;

static void describe(text *x, llmpar_generate_desc *desc)
{
    memset(desc, 0, sizeof *desc);
    desc->prompt = x->prompt;
    desc->prompt_count = x->prompt_count;
    desc->tokens = x->tokens;
    desc->temperature = x->seed ? 0.9 : 0;
    desc->top_p = x->seed > 1 ? 0.9 : 0;
    desc->seed = (uint64_t)x->seed;
    desc->on_token = watched_token;
    desc->user = &x->heard;
    x->heard = 0;
}

/* The text as one that stands alone. */
static llmpar_status alone(session *s, text *x)
{
    llmpar_generate_desc desc;
    watch_again();
    describe(x, &desc);
    llmpar_status status = llmpar_llama_generate(s->model, s->fsdp, &desc, x->ids, &x->count);
    x->logits = x->heard;
    return status;
}

/* The texts, each behind the one before. The generator keeps all of a prompt and of a reply but its last id. */
static llmpar_status write_texts(session *s, text *texts, int32_t positions)
{
    int32_t vocab = llmpar_llama_get_config(s->model)->vocab, first = positions / 8;
    llmpar_status status = LLMPAR_OK;
    for (int i = 0; i < TEXTS && !status; i++) {
        text *x = &texts[i], *before = i ? x - 1 : NULL;
        memset(x, 0, sizeof *x);
        for (int32_t k = 0; k < positions; k++) x->prompt[k] = (k * k * 7 + 3) % vocab;
        x->prompt_count = first;
        x->tokens = positions / 4;
        if (i == 1) { /* a conversation goes on */
            x->prompt_count = before->prompt_count + before->count + 3;
            memcpy(x->prompt + before->prompt_count, before->ids, (size_t)before->count * sizeof *x->ids);
            x->tokens = positions / 8;
            x->seed = 1;
            x->shared = before->prompt_count + before->count - 1;
        } else if (i == 2) { /* the same again, with other luck */
            memcpy(x, before, sizeof *x);
            x->seed = 2;
            x->shared = x->prompt_count - 1; /* whose last id gives the logits */
        } else if (i == 3) { /* another one behind the first ids */
            x->prompt[3] = (x->prompt[3] + 1) % vocab;
            x->shared = 3;
        } else if (i == 4) { /* a part of it */
            memcpy(x->prompt, before->prompt, sizeof x->prompt);
            x->prompt_count = x->shared = first - 1;
            x->shared--;
            x->tokens = 1;
        } else if (i == 5) { /* nothing of it, as long as may be */
            x->prompt[0] = (x->prompt[0] + 1) % vocab;
            x->prompt_count = positions - 4;
            x->tokens = 5;
        } else if (i == 6) { /* one id */
            x->prompt[0] = (x->prompt[0] + 2) % vocab;
            x->prompt_count = x->tokens = 1;
        } else if (i == 7) { /* and then those of the one before, whose keys are still there and not these */
            x->prompt[0] = before->prompt[0];
            x->shared = 1;
        }
        status = alone(s, x);
        CHECK_INT(x->count, x->tokens);
    }
    return status;
}

#define LENT(call) do { \
        CHECK_STATUS(call, LLMPAR_ERR_ARGUMENT); \
        if (!strstr(s->ctx->error.text, "the parameters are lent to a generator")) TEST_FAIL("%s: \"%s\"", #call, s->ctx->error.text); \
        llmpar_error_clear(&s->ctx->error); \
    } while (0)
/* Nobody else gets at the weights. */
static void all_refused(session *s, text *x)
{
    llmpar_generate_desc desc;
    llmpar_generator_desc generator;
    llmpar_generator *second = NULL;
    int32_t ids[POSITIONS], count;
    void *const *params = NULL;
    float logits[POSITIONS];
    char where[80];
    describe(x, &desc);
    desc.tokens = 1;
    memset(&generator, 0, sizeof generator);
    LENT(llmpar_generator_create(s->model, s->fsdp, &generator, &second));
    CHECK(second == NULL);
    LENT(llmpar_llama_generate(s->model, s->fsdp, &desc, ids, &count));
    LENT(llmpar_llama_logits(s->model, s->fsdp, x->prompt, 1, logits));
    LENT(llmpar_fsdp_unshard(s->fsdp, 0, &params));
    LENT(llmpar_fsdp_lend(s->fsdp, "somebody"));
    LENT(llmpar_fsdp_shard(s->fsdp, 0, NULL, NULL, NULL) ? LLMPAR_OK : s->ctx->error.status);
    LENT(llmpar_fsdp_shard_done(s->fsdp, 0, 1));
    CHECK_STATUS(llmpar_fsdp_reshard(s->fsdp, 0), LLMPAR_ERR_ARGUMENT); /* what is gathered is the borrower's */
    CHECK_TEXT(s->ctx->error.text, "reshard without unshard");
    llmpar_error_clear(&s->ctx->error);
    LENT(llmpar_fsdp_find_nonfinite(s->fsdp, where, sizeof where));
    if (s->ctx->world == 1) { /* what fails in these ends a job of several */
        llmpar_run run;
        batch b = { x->prompt, x->prompt, 1, 4 };
        char directory[] = "/tmp/llmpar-generator-XXXXXX";
        memset(&run, 0, sizeof run);
        LENT(step(s, &b, 0, &run, NULL));
        LENT(step(s, &b, 1, &run, NULL));
        CHECK(mkdtemp(directory) != NULL);
        LENT(llmpar_save_hf(s->trainer, directory));
        rmdir(directory);
    }
}

/* What the generator makes of x must be what x is alone; it computes only what it must. */
static llmpar_status again(const talk *t, llmpar_generator *g, const session *s, text *x, int64_t rows, const char *what)
{
    int32_t *ids = (int32_t *)take(LONG, sizeof *ids), count = -1, layers = llmpar_llama_get_config(s->model)->layers;
    llmpar_generate_desc desc;
    watch_again();
    describe(x, &desc);
    llmpar_status status = llmpar_generator_run(g, &desc, 1, &ids, &count);
    if (count != x->count || memcmp(ids, x->ids, (size_t)count * sizeof *ids)) TEST_FAIL("%s, rank %d, %s: other ids than alone", t->name, s->ctx->rank, what);
    if (x->heard != x->logits) TEST_FAIL("%s, rank %d, %s: other logits than alone", t->name, s->ctx->rank, what);
    if (watched.rows != rows * layers) TEST_FAIL("%s, rank %d, %s: %lld rows, expected %lld", t->name, s->ctx->rank, what, (long long)(watched.rows / layers), (long long)rows);
    CHECK_INT(watched.turned + watched.back, 0);
    free(ids);
    return status;
}

/* A hash of this rank's shards. */
static uint64_t shards(session *s)
{
    uint64_t hash = 0;
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(s->fsdp); u++) {
        int64_t elements;
        const unsigned char *shard = (const unsigned char *)llmpar_fsdp_shard(s->fsdp, u, &elements, NULL, NULL);
        CHECK(shard != NULL);
        for (size_t i = 0; shard && i < (size_t)elements * llmpar_dtype_size(llmpar_dtype_sum(llmpar_fsdp_dtype(s->fsdp))); i++) hash = (hash ^ shard[i]) * 0x100000001b3u;
        CHECK_OK(llmpar_fsdp_shard_done(s->fsdp, u, 0));
    }
    return hash;
}

/* All at once, in so many places. */
static llmpar_status at_once(const talk *t, session *s, text *x, int32_t places)
{
    enum { SAMPLES = 5 };
    llmpar_generator_desc generator = { t->positions, places };
    llmpar_generate_desc desc[TEXTS];
    llmpar_generator *g = NULL;
    int32_t *ids[TEXTS], count[TEXTS];
    text *samples = (text *)take(SAMPLES, sizeof *samples);
    llmpar_status status = LLMPAR_OK;
    int64_t rows = x[0].prompt_count;
    for (int i = 0; i < TEXTS; i++) ids[i] = (int32_t *)take(LONG, sizeof *ids[i]);
    for (int i = 0; i < SAMPLES && !status; i++) { /* one prompt and other luck: it is computed once, but for its last id, which gives the logits */
        memcpy(&samples[i], &x[0], sizeof *x);
        samples[i].seed = i + 2;
        samples[i].tokens = x[0].tokens - i;
        rows += (i > 0) + samples[i].tokens - 1;
        status = alone(s, &samples[i]);
    }
    if (!status) status = llmpar_generator_create(s->model, s->fsdp, &generator, &g);
    for (int round = 0; round < 3 && !status; round++) {
        text *all = round ? x : samples;
        int texts = round ? TEXTS : SAMPLES;
        for (int i = 0; i < texts; i++) describe(&all[i], &desc[i]);
        watch_again();
        status = llmpar_generator_run(g, desc, texts, ids, count);
        for (int i = 0; i < texts && !status; i++) {
            if (count[i] != all[i].count || memcmp(ids[i], all[i].ids, (size_t)count[i] * sizeof *ids[i])) TEST_FAIL("%s, rank %d, round %d, text %d of %d places: other ids than alone", t->name, s->ctx->rank, round, i, places);
            if (all[i].heard != all[i].logits) TEST_FAIL("%s, rank %d, round %d, text %d of %d places: other logits than alone", t->name, s->ctx->rank, round, i, places);
        }
        int64_t layers = llmpar_llama_get_config(s->model)->layers;
        if (!round && watched.rows != rows * layers) TEST_FAIL("%s, rank %d, %d places: %lld rows for samples of one prompt, expected %lld", t->name, s->ctx->rank, places, (long long)(watched.rows / layers), (long long)rows);
    }
    /* the caller ends it: all texts are what they were until then, and the next ones are as ever */
    for (int i = 0; i < TEXTS; i++) describe(&x[i], &desc[i]);
    watch_again();
    watched.token_fails = 12;
    CHECK_STATUS(llmpar_generator_run(g, desc, TEXTS, ids, count), LLMPAR_ERR_IO);
    int32_t all = 0;
    for (int i = 0; i < TEXTS; all += count[i++]) CHECK_BYTES(ids[i], x[i].ids, (size_t)count[i] * sizeof *ids[i]);
    CHECK_INT(all, 12);
    /* one of them is wrong: nothing is done, and it is named */
    desc[3].temperature = -1;
    CHECK_STATUS(llmpar_generator_run(g, desc, TEXTS, ids, count), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(s->ctx->error.text, "generation of text 3: temperature = -1");
    llmpar_error_clear(&s->ctx->error);
    for (int i = 0; i < TEXTS; i++) CHECK_INT(count[i], 0);
    describe(&x[3], &desc[3]);
    static const int32_t wrong[] = { 1, 2, -1 };
    desc[4].prompt = wrong;
    desc[4].prompt_count = 3;
    CHECK_STATUS(llmpar_generator_run(g, desc, TEXTS, ids, count), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(s->ctx->error.text, "generation of text 4: token id -1 at position 2");
    llmpar_error_clear(&s->ctx->error);
    for (int i = 0; i < TEXTS; i++) CHECK_INT(count[i], 0);
    CHECK_INT(watched.tokens, 12);
    describe(&x[4], &desc[4]);
    /* a product fails */
    watch_again();
    watched.product_fails = 150;
    CHECK_STATUS(llmpar_generator_run(g, desc, TEXTS, ids, count), LLMPAR_ERR_IO);
    llmpar_error_clear(&s->ctx->error);
    for (int i = 0; i < TEXTS; i++) describe(&x[i], &desc[i]);
    watch_again();
    if (!status) status = llmpar_generator_run(g, desc, TEXTS, ids, count);
    for (int i = 0; i < TEXTS && !status; i++) CHECK(count[i] == x[i].count && x[i].heard == x[i].logits);
    /* by hand: a text begins at every other step, while others run */
    int32_t next = 0, running = 0, most = 0;
    for (int i = 0; i < TEXTS; i++) {
        describe(&x[i], &desc[i]);
        desc[i].on_end = watched_end;
    }
    watch_again();
    for (int turn = 0; !status && (next < TEXTS || running); turn++) {
        if (next < TEXTS && running == places) {
            int32_t none = -1, still = -1;
            CHECK_STATUS(llmpar_generator_begin(g, &desc[next], ids[next], &none, &still), LLMPAR_ERR_ARGUMENT);
            CHECK_TEXT(s->ctx->error.text, "texts are running, expected fewer than the generator's");
            llmpar_error_clear(&s->ctx->error);
            CHECK(none == 0 && still == places);
        } else if (next < TEXTS && turn % 2 == 0) {
            status = llmpar_generator_begin(g, &desc[next], ids[next], &count[next], &running);
            CHECK(count[next] == 1);
            next++;
        }
        if (running > most) most = running;
        if (!status) status = llmpar_generator_step(g, &running);
    }
    CHECK(most > 1);
    CHECK_INT(watched.ended, TEXTS);
    for (int i = 0; i < TEXTS && !status; i++) CHECK(count[i] == x[i].count && !memcmp(ids[i], x[i].ids, (size_t)count[i] * sizeof *ids[i]) && x[i].heard == x[i].logits);
    if (!status) status = llmpar_generator_step(g, &running);
    CHECK_INT(running, 0);
    /* run goes on with what was begun by hand */
    describe(&x[0], &desc[0]);
    if (!status) status = llmpar_generator_begin(g, &desc[0], ids[0], &count[0], &running);
    CHECK_INT(running, 1);
    describe(&x[3], &desc[3]);
    if (!status) status = llmpar_generator_run(g, &desc[3], 1, &ids[3], &count[3]);
    CHECK(x[0].heard == x[0].logits && x[3].heard == x[3].logits && count[0] == x[0].count && count[3] == x[3].count);
    CHECK_OK(llmpar_generator_run(g, desc, 0, ids, count));
    CHECK_OK(llmpar_generator_destroy(g));
    for (int i = 0; i < TEXTS; i++) free(ids[i]);
    free(samples);
    return status;
}

static llmpar_status talk_steps(session *s, void *user)
{
    talk *t = (talk *)user;
    llmpar_generator *g = NULL;
    llmpar_generate_desc desc;
    llmpar_generator_desc generator = { t->positions, 0 };
    llmpar_arena_usage usage[2];
    text *x = (text *)take(TEXTS, sizeof *x);
    int32_t room[POSITIONS], *ids = room, count = -1;
    int streams = llmpar_device_interleaved_rows(s->ctx->device, llmpar_fsdp_dtype(s->fsdp)) > 0;
    uint64_t before = shards(s);
    llmpar_status status = write_texts(s, x, t->positions);
    llmpar_arena_get_usage(llmpar_fsdp_arena(s->fsdp), &usage[0]);
    watch_again();
    if (!status) status = llmpar_generator_create(s->model, s->fsdp, &generator, &g);
    CHECK(streams ? watched.turned : !watched.turned);
    int turned = watched.turned;
    for (int i = 0; i < TEXTS && !status; i++) {
        char what[20];
        snprintf(what, sizeof what, "text %d", i);
        if (!t->known) t->texts[i] = x[i];
        if (x[i].count != t->texts[i].count || memcmp(x[i].ids, t->texts[i].ids, sizeof x[i].ids)) TEST_FAIL("%s, rank %d, %s: other ids than on one rank", t->name, s->ctx->rank, what);
        status = again(t, g, s, &x[i], x[i].prompt_count - x[i].shared + x[i].tokens - 1, what);
    }
    if (!status) all_refused(s, &x[0]);
    /* the caller ends a text: what there is of it stays */
    if (!status) status = again(t, g, s, &x[0], x[0].prompt_count + x[0].tokens - 1, "before a short one");
    watch_again();
    watched.token_fails = 3;
    describe(&x[3], &desc);
    CHECK_STATUS(llmpar_generator_run(g, &desc, 1, &ids, &count), LLMPAR_ERR_IO);
    CHECK_INT(count, 3);
    CHECK_BYTES(ids, x[3].ids, 3 * sizeof *ids);
    if (!status) status = again(t, g, s, &x[3], x[3].tokens, "a text that was ended");
    /* too long, an id that is none: said before anything is done */
    describe(&x[5], &desc);
    desc.tokens++;
    CHECK_STATUS(llmpar_generator_run(g, &desc, 1, &ids, &count), LLMPAR_ERR_ARGUMENT);
    CHECK_INT(count, 0);
    CHECK_TEXT(s->ctx->error.text, "expected room for all but the last");
    llmpar_error_clear(&s->ctx->error);
    if (!status) status = again(t, g, s, &x[3], x[3].tokens, "behind one that is too long");
    int32_t wrong = llmpar_llama_get_config(s->model)->vocab;
    memset(&desc, 0, sizeof desc);
    desc.prompt = &wrong;
    desc.prompt_count = 1;
    desc.tokens = 1;
    CHECK_STATUS(llmpar_generator_run(g, &desc, 1, &ids, &count), LLMPAR_ERR_ARGUMENT);
    llmpar_error_clear(&s->ctx->error);
    if (!status) status = again(t, g, s, &x[3], x[3].tokens, "behind an id that is none");
    /* a product fails, in the prompt and behind it: the text is forgotten, the generator not */
    for (int fault = 0; fault < 2 && !status; fault++) {
        watch_again();
        describe(&x[1], &desc);
        watched.product_fails = fault ? 60 : 2;
        CHECK_STATUS(llmpar_generator_run(g, &desc, 1, &ids, &count), LLMPAR_ERR_IO);
        llmpar_error_clear(&s->ctx->error);
        status = again(t, g, s, &x[3 * fault], x[3 * fault].prompt_count + x[3 * fault].tokens - 1, "behind a failure");
    }
    watch_again();
    CHECK_OK(llmpar_generator_destroy(g));
    CHECK_INT(watched.back, turned);
    llmpar_arena_get_usage(llmpar_fsdp_arena(s->fsdp), &usage[1]);
    for (int tag = 0; tag < LLMPAR_TAG_COUNT; tag++) CHECK_INT(usage[1].live[tag], usage[0].live[tag]);
    CHECK(shards(s) == before);
    static const int32_t places[] = { 2, 3, ROWS };
    for (int i = 0; i < 3 && !status && t->positions < LONG; i++) status = at_once(t, s, x, places[i]);
    CHECK(shards(s) == before);
    watch_again();
    if (!status) status = alone(s, &x[0]);
    CHECK_BYTES(x[0].ids, t->texts[0].ids, sizeof x[0].ids);
    if (streams) { /* a weight cannot be turned: nothing stays */
        watch_again();
        watched.turn_fails = 3;
        CHECK_STATUS(llmpar_generator_create(s->model, s->fsdp, &generator, &g), LLMPAR_ERR_IO);
        llmpar_error_clear(&s->ctx->error);
        CHECK(g == NULL);
        CHECK_INT(watched.back, 2);
        CHECK(shards(s) == before);
    }
    free(x);
    return status;
}

static llmpar_status watch(session *s, void *user, llmpar_status (*body)(session *, void *))
{
    llmpar_device *device = s->ctx->host;
    memset(&watched, 0, sizeof watched);
    watched.real = *device;
    device->gemm = watched_gemm;
    device->attention = watched_attention;
    if (watched.real.attention_each) device->attention_each = watched_each;
    device->interleave = watched_interleave;
    llmpar_status status = body(s, user);
    device->gemm = watched.real.gemm;
    device->attention = watched.real.attention;
    device->attention_each = watched.real.attention_each;
    device->interleave = watched.real.interleave;
    return status;
}
static llmpar_status talk_body(session *s, void *user) { return watch(s, user, talk_steps); }

static void talk_everywhere(const char *name, const llmpar_llama_config *config, llmpar_dtype dtype, int32_t wrap)
{
    static const llmpar_mesh_desc meshes[] = { { .tp = 1 }, { .tp = 2 }, { .dp_shard = 2 }, { .dp_shard = 2, .tp = 2 } };
    talk *t = (talk *)take(1, sizeof *t);
    t->name = name;
    t->positions = config->max_positions;
    for (int i = 0; i < 4; i++) {
        job j = { .config = config, .mesh = meshes[i], .trainer = { .seq_len = t->positions, .dtype = dtype }, .body = talk_body, .user = t, .wrap = wrap };
        launch_ok(&j);
        t->known = 1;
    }
    free(t);
}

TEST(texts_of_one_generator)
{
    static const struct { const char *name; llmpar_family family; int tied; int32_t hidden, head_dim, vocab, wrap; } cases[] = {
        { "whole groups", LLMPAR_FAMILY_LLAMA, 0, 64, 16, 64, 0 }, { "rows left, tied", LLMPAR_FAMILY_LLAMA, 1, 40, 10, 61, LLMPAR_WRAP_HALF }, { "norms of heads, tied", LLMPAR_FAMILY_QWEN3, 1, 48, 12, 64, 2 } };
    for (int i = 0; i < 3; i++)
        for (int dtype = 0; dtype < 3; dtype++) {
            if (test_rounds(4) < 4 && dtype != i) continue;
            llmpar_llama_config c = talk_config(cases[i].family, cases[i].tied, cases[i].hidden, 2 * cases[i].hidden, cases[i].head_dim, cases[i].vocab, POSITIONS);
            talk_everywhere(cases[i].name, &c, dtypes[dtype], cases[i].wrap);
        }
}

/* Conversations turn by turn, two of them behind one system prompt: as many as there are places stay known, and these are the latest. */
static llmpar_status turns(session *s, void *user)
{
    enum { TURNS = 10, SYSTEM = 10, MORE = 3, REPLY = 4 };
    static const int who[TURNS] = { 0, 1, 0, 1, 2, 1, 2, 0, 2, 0 }, known[TURNS] = { 0, SYSTEM, -1, -1, 0, -1, -1, SYSTEM, -1, -1 }; /* -1: all that was said but its last id */
    text *x = (text *)take(TURNS, sizeof *x);
    llmpar_generator_desc generator = { 0, 2 };
    llmpar_generator *g = NULL;
    llmpar_status status = LLMPAR_OK;
    for (int i = 0; i < TURNS && !status; i++) {
        int last = i - 1;
        while (last >= 0 && who[last] != who[i]) last--;
        x[i].tokens = REPLY;
        if (last >= 0) {
            memcpy(x[i].prompt, x[last].prompt, sizeof x[i].prompt);
            memcpy(x[i].prompt + x[last].prompt_count, x[last].ids, REPLY * sizeof *x[i].ids);
            x[i].prompt_count = x[last].prompt_count + REPLY;
        } else for (; x[i].prompt_count < SYSTEM; x[i].prompt_count++) x[i].prompt[x[i].prompt_count] = who[i] / 2 + x[i].prompt_count;
        x[i].shared = known[i] < 0 ? x[i].prompt_count - 1 : known[i];
        for (int k = 0; k < MORE + 20 * (i == 0); k++) x[i].prompt[x[i].prompt_count++] = 40 + who[i]; /* the first one is long */
        status = alone(s, &x[i]);
    }
    if (!status) status = llmpar_generator_create(s->model, s->fsdp, &generator, &g);
    for (int i = 0; i < TURNS && !status; i++) {
        char what[20];
        snprintf(what, sizeof what, "turn %d", i);
        status = again((const talk *)user, g, s, &x[i], x[i].prompt_count - x[i].shared + REPLY - 1, what);
    }
    CHECK_OK(llmpar_generator_destroy(g));
    free(x);
    return status;
}

static llmpar_status turns_body(session *s, void *user) { return watch(s, user, turns); }
TEST(what_stays_known)
{
    llmpar_llama_config c = talk_config(LLMPAR_FAMILY_LLAMA, 0, 32, 64, 8, 64, 2 * POSITIONS);
    talk t = { .name = "turn by turn" };
    job j = { .config = &c, .mesh = { .tp = 2 }, .trainer = { .seq_len = c.max_positions }, .body = turns_body, .user = &t };
    launch_ok(&j);
}

/* Where a failure comes late and sticks to the stream, the generator may be used again too. */
static debug_order late_order;
static llmpar_device *late(llmpar_device *host)
{
    debug_device *d = (debug_device *)take(1, sizeof *d);
    debug_device_init(d, host, late_order);
    return &d->table;
}
static void late_end(llmpar_device *inner) { free(inner); }

static llmpar_status late_failure(session *s, void *user)
{
    llmpar_generator_desc generator = { 0, 2 };
    llmpar_generate_desc desc;
    llmpar_generator *g = NULL;
    text *x = (text *)take(TEXTS, sizeof *x);
    int32_t *ids = (int32_t *)take(LONG, sizeof *ids), count;
    llmpar_status status = write_texts(s, x, POSITIONS);
    if (!status) status = llmpar_generator_create(s->model, s->fsdp, &generator, &g);
    for (int fault = 0; fault < 3 && !status; fault++) {
        watch_again();
        describe(&x[fault], &desc);
        watched.product_fails = 7 + 20 * fault;
        CHECK_STATUS(llmpar_generator_run(g, &desc, 1, &ids, &count), LLMPAR_ERR_IO);
        llmpar_error_clear(&s->ctx->error);
        status = again((const talk *)user, g, s, &x[fault], x[fault].prompt_count + x[fault].tokens - 1, "behind a late failure");
    }
    CHECK_OK(llmpar_generator_destroy(g));
    free(ids);
    free(x);
    return status;
}
static llmpar_status late_body(session *s, void *user) { return watch(s, user, late_failure); }

TEST(late_failures)
{
    llmpar_llama_config c = talk_config(LLMPAR_FAMILY_LLAMA, 0, 32, 64, 8, 61, POSITIONS);
    talk t = { .name = "late" };
    job j = { .config = &c, .mesh = { .tp = 1 }, .trainer = { .seq_len = POSITIONS }, .body = late_body, .user = &t };
    for (int order = 0; order < 3; order++) {
        apart_report report = { .inner = late, .inner_end = late_end };
        llmpar_backend backend;
        llmpar_launch_desc launch_desc = { .ranks = 1, .backend = &backend, .check = no_leak };
        llmpar_error error;
        late_order = (debug_order)order;
        apart_backend(&report, &backend);
        if (llmpar_launch(&launch_desc, run_rank, &j, &error)) TEST_FAIL("%s", error.text);
        CHECK_INT(report.leaked + report.host_leaked, 0);
    }
}

/* Prompts of more rows than go at once. */
TEST(long_prompts)
{
    llmpar_llama_config c = talk_config(LLMPAR_FAMILY_LLAMA, 1, 32, 64, 8, 61, LONG);
    talk_everywhere("long", &c, LLMPAR_F32, 0);
}

static llmpar_status refusals(session *s, void *user)
{
    static const struct { llmpar_generator_desc desc; const char *text; } wrong[] = { { { -1, 0 }, "-1 positions, expected at least 1" }, { { POSITIONS + 1, 0 }, "65 positions, expected at most the 64" }, { { 0, -3 }, "-3 texts at once, expected at least 1" } };
    llmpar_generator *g = (llmpar_generator *)user; /* not NULL */
    llmpar_generator_desc generator;
    for (int i = 0; i < 3; i++) {
        CHECK_STATUS(llmpar_generator_create(s->model, s->fsdp, &wrong[i].desc, &g), LLMPAR_ERR_ARGUMENT);
        CHECK(g == NULL);
        CHECK_TEXT(s->ctx->error.text, wrong[i].text);
        llmpar_error_clear(&s->ctx->error);
    }
    CHECK_OK(llmpar_generator_destroy(NULL));
    /* 0: as many as the model was set up for */
    llmpar_generate_desc desc;
    int32_t prompt[POSITIONS] = { 0 }, room[2], *ids = room, count;
    memset(&desc, 0, sizeof desc);
    memset(&generator, 0, sizeof generator);
    desc.prompt = prompt;
    desc.prompt_count = POSITIONS;
    desc.tokens = 1;
    CHECK_OK(llmpar_generator_create(s->model, s->fsdp, &generator, &g));
    CHECK_OK(llmpar_generator_run(g, &desc, 1, &ids, &count));
    CHECK_INT(count, 1);
    desc.tokens = 2;
    CHECK_STATUS(llmpar_generator_run(g, &desc, 1, &ids, &count), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(s->ctx->error.text, "prompt of 64 ids and 2 tokens");
    llmpar_error_clear(&s->ctx->error);
    desc.tokens = -1;
    CHECK_STATUS(llmpar_generator_run(g, &desc, 1, &ids, &count), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(s->ctx->error.text, "tokens = -1");
    llmpar_error_clear(&s->ctx->error);
    CHECK_OK(llmpar_generator_destroy(g));
    return LLMPAR_OK;
}

TEST(what_is_refused)
{
    llmpar_llama_config c = talk_config(LLMPAR_FAMILY_LLAMA, 0, 32, 64, 8, 61, POSITIONS);
    int something;
    job j = { .config = &c, .mesh = { .tp = 1 }, .trainer = { .seq_len = POSITIONS }, .body = refusals, .user = &something };
    launch_ok(&j);
}

TEST_LIST(T_(texts_of_one_generator), T_(what_stays_known), T_(late_failures), T_(long_prompts), T_(what_is_refused))
