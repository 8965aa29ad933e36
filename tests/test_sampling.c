/* How an id is chosen: top_k and top_p by frequency beside the probabilities that they leave, logits changed by the caller, and a text that its caller ends alone. From the contract in model/llama.h. */
#include "model.h"

enum { POSITIONS = 64, VOCAB = 61, TOKENS = 60, TEXTS = 8 };

/* ---- frequencies: the caller says what the logits are ---- */

typedef struct odds { const char *name; double temperature, top_p; int32_t top_k; double p[6] /* of ids 10, 20 .. 60 */, left[6] /* after top_k, temperature and top_p */; } odds;
static const odds cases[] = {
    { "as they are", 1, 0, 0, { .1, .4, .05, .3, .15, 0 }, { .1, .4, .05, .3, .15, 0 } },
    { "top_k 1", 1, 0, 1, { .1, .4, .05, .3, .15, 0 }, { 0, 1, 0, 0, 0, 0 } },
    { "top_k 3", 1, 0, 3, { .1, .4, .05, .3, .15, 0 }, { 0, .4, 0, .3, .15, 0 } },
    { "top_k of all", 1, 1, VOCAB, { .1, .4, .05, .3, .15, 0 }, { .1, .4, .05, .3, .15, 0 } },
    { "top_k beyond all", 1, 0, INT32_MAX, { .1, .4, .05, .3, .15, 0 }, { .1, .4, .05, .3, .15, 0 } },
    { "top_k where fewer are possible", 1, 0, 40, { .1, .4, .05, .3, .15, 0 }, { .1, .4, .05, .3, .15, 0 } },
    { "top_k 2 of equals", 1, 0, 2, { .2, .2, .2, .2, .2, 0 }, { .2, .2, 0, 0, 0, 0 } },
    { "top_p", 1, .75, 0, { .1, .4, .05, .3, .15, 0 }, { 0, .4, 0, .3, .15, 0 } },
    { "top_p of the k", 1, .75, 3, { .1, .4, .05, .3, .15, 0 }, { 0, .4, 0, .3, 0, 0 } }, /* .4 + .3 is .82 of these three, .70 of all */
    { "top_k of fewer than top_p takes", 1, .95, 2, { .1, .4, .05, .3, .15, 0 }, { 0, .4, 0, .3, 0, 0 } },
    { "temperature", .5, 0, 0, { .1, .4, .05, .3, .15, 0 }, { .01, .16, .0025, .09, .0225, 0 } },
    { "temperature before top_p", .5, .75, 3, { .1, .4, .05, .3, .15, 0 }, { 0, .16, 0, .09, 0, 0 } }, /* .16 + .09 of .2725 */
    { "greedy", 0, .5, 2, { .1, .4, .05, .3, .15, 0 }, { 0, 1, 0, 0, 0, 0 } },
};

static llmpar_status weigh(void *user, float *logits, int32_t vocab)
{
    const odds *o = (const odds *)user;
    CHECK_INT(vocab, VOCAB);
    for (int32_t i = 0; i < vocab; i++) logits[i] = -INFINITY;
    for (int32_t i = 0; i < 6; i++) if (o->p[i] > 0) logits[10 * i + 10] = (float)log(o->p[i]) - 40; /* any constant */
    return LLMPAR_OK;
}

static llmpar_status draw(session *s, void *user)
{
    int texts = test_rounds(40);
    llmpar_generate_desc desc = { .tokens = TOKENS, .on_logits = weigh, .prompt_count = 1 };
    const int32_t prompt = 1;
    (void)user;
    desc.prompt = &prompt;
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        const odds *o = &cases[c];
        double sum = 0, n = texts * TOKENS;
        int32_t seen[VOCAB] = { 0 }, ids[TOKENS], count;
        for (int i = 0; i < 6; i++) sum += o->left[i];
        desc.temperature = o->temperature, desc.top_p = o->top_p, desc.top_k = o->top_k;
        desc.user = (void *)o;
        for (int t = 0; t < texts; t++) {
            desc.seed = (uint64_t)t;
            CHECK_OK(llmpar_llama_generate(s->model, s->fsdp, &desc, ids, &count));
            CHECK_INT(count, TOKENS);
            for (int i = 0; i < count; i++) seen[ids[i]]++;
        }
        int32_t all = 0;
        for (int i = 0; i < 6; i++) {
            double p = o->left[i] / sum, got = seen[10 * i + 10] / n;
            all += seen[10 * i + 10];
            if (p <= 0 ? got > 0 : fabs(got - p) > 5 * sqrt(p * (1 - p) / n)) TEST_FAIL("%s: id %d is %.4f of the ids, expected %.4f", o->name, 10 * i + 10, got, p);
        }
        if (all != texts * TOKENS) TEST_FAIL("%s: %d ids that are impossible", o->name, texts * TOKENS - (int)all);
    }
    return LLMPAR_OK;
}

static job on(const llmpar_llama_config *config, llmpar_mesh_desc mesh, llmpar_status (*body)(session *s, void *user), void *user)
{
    job j = { .config = config, .mesh = mesh, .trainer = { .seq_len = POSITIONS }, .body = body, .user = user };
    return j;
}

TEST(frequencies)
{
    llmpar_llama_config c = talk_config(LLMPAR_FAMILY_LLAMA, 0, 16, 16, 2, VOCAB, POSITIONS);
    job j = on(&c, (llmpar_mesh_desc){ .tp = 1 }, draw, NULL);
    launch_ok(&j);
}

/* ---- what callbacks see and end ---- */

/* A listener of a text; at its call `stop`, counted from 1, the callback that `by_logits` names returns `with`. */
typedef struct listener { const int32_t *ids, *count; int32_t heard, asked, ended, stop, by_logits, forbidden /* an id that may not come, or -1 */; llmpar_status with; } listener;

static llmpar_status forbid(void *user, float *logits, int32_t vocab)
{
    const int32_t *forbidden = (const int32_t *)user;
    CHECK_INT(vocab, VOCAB);
    for (int32_t i = 0; i < vocab; i++) CHECK(isfinite(logits[i]));
    if (*forbidden >= 0) logits[*forbidden] = -INFINITY;
    return LLMPAR_OK;
}

static llmpar_status listen_logits(void *user, float *logits, int32_t vocab)
{
    listener *l = (listener *)user;
    CHECK_INT(*l->count, l->heard); /* the id that these choose is not there yet */
    CHECK(!l->ended);
    l->asked++;
    if (l->by_logits && l->asked == l->stop) return l->with;
    return forbid(&l->forbidden, logits, vocab);
}

static llmpar_status listen(void *user, int32_t id)
{
    listener *l = (listener *)user;
    l->heard++;
    CHECK(*l->count == l->heard && l->ids[l->heard - 1] == id);
    CHECK(!l->ended && l->asked == l->heard);
    return !l->by_logits && l->heard == l->stop ? l->with : LLMPAR_OK;
}

static void listen_end(void *user) { ((listener *)user)->ended++; }

typedef struct texts {
    int32_t prompt[TEXTS][4], room[TEXTS][TOKENS], counts[TEXTS], alone[TEXTS][TOKENS], length[TEXTS], forbidden[TEXTS], *ids[TEXTS];
    llmpar_generate_desc desc[TEXTS];
    listener listener[TEXTS];
} texts;

/* What each text is alone, without the ids that it may not have. */
static void describe(session *s, texts *t)
{
    for (int i = 0; i < TEXTS; i++) {
        llmpar_generate_desc plain = { .prompt = t->prompt[i], .prompt_count = 1 + i % 4, .tokens = 10 + 3 * i, .temperature = i % 3 ? 1 : 0, .top_k = i % 2 ? 20 : 0, .seed = (uint64_t)i };
        for (int k = 0; k < 4; k++) t->prompt[i][k] = (i * 5 + k) % VOCAB;
        t->ids[i] = t->room[i];
        t->desc[i] = plain;
        t->forbidden[i] = -1;
        CHECK_OK(llmpar_llama_generate(s->model, s->fsdp, &plain, t->alone[i], &t->length[i]));
        CHECK_INT(t->length[i], plain.tokens);
        if (i != 2 && i != 5) continue;
        t->forbidden[i] = t->alone[i][i == 5];
        plain.on_logits = forbid;
        plain.user = &t->forbidden[i];
        CHECK_OK(llmpar_llama_generate(s->model, s->fsdp, &plain, t->alone[i], &t->length[i]));
        for (int k = 0; k < t->length[i]; k++) CHECK(t->alone[i][k] != t->forbidden[i]);
    }
}

static void listen_again(texts *t)
{
    for (int i = 0; i < TEXTS; i++) {
        listener fresh = { t->room[i], &t->counts[i], 0, 0, 0, 0, 0, t->forbidden[i], LLMPAR_END };
        t->listener[i] = fresh;
        t->desc[i].on_logits = listen_logits;
        t->desc[i].on_token = listen;
        t->desc[i].on_end = listen_end;
        t->desc[i].user = &t->listener[i];
    }
}

/* By an id, never, by the first one, before one, before the first, by the last one that there may be, beyond. */
static void stops(texts *t, int32_t *left)
{
    const int32_t stop[TEXTS] = { 4, 0, 1, 7, 1, 2, t->length[6], t->length[7] + 1 };
    listen_again(t);
    for (int i = 0; i < TEXTS; i++) {
        t->listener[i].stop = stop[i];
        t->listener[i].by_logits = i == 3 || i == 4;
        left[i] = stop[i] ? stop[i] - t->listener[i].by_logits : t->length[i];
        if (left[i] > t->length[i]) left[i] = t->length[i];
    }
}

static void are_beginnings(const texts *t, const int32_t *left, const char *what)
{
    for (int i = 0; i < TEXTS; i++) {
        if (t->counts[i] != left[i] || memcmp(t->room[i], t->alone[i], (size_t)left[i] * sizeof(int32_t))) TEST_FAIL("%s: text %d has %d ids, expected the first %d of those alone", what, i, (int)t->counts[i], (int)left[i]);
        CHECK_INT(t->listener[i].ended, 1);
    }
}

static llmpar_status callbacks(session *s, void *user)
{
    const int32_t places = *(const int32_t *)user;
    llmpar_generator_desc wanted = { POSITIONS, places };
    llmpar_generator *g = NULL;
    texts *t = (texts *)take(1, sizeof *t);
    int32_t left[TEXTS], running = 0, next = 0, count;
    describe(s, t);
    llmpar_status status = llmpar_generator_create(s->model, s->fsdp, &wanted, &g);
    if (status) return status;
    for (int round = 0; round < 2; round++) {
        stops(t, left);
        CHECK_OK(llmpar_generator_run(g, t->desc, TEXTS, t->ids, t->counts));
        are_beginnings(t, left, "run");
        listen_again(t);
        CHECK_OK(llmpar_generator_run(g, t->desc, TEXTS, t->ids, t->counts));
        are_beginnings(t, t->length, "run without an end");
    }
    stops(t, left);
    while (next < TEXTS || running) {
        int32_t before = running;
        if (next < TEXTS && running < places) {
            CHECK_OK(llmpar_generator_begin(g, &t->desc[next], t->ids[next], &t->counts[next], &running));
            CHECK_INT(running, before + (left[next] > 1));
            next++;
        } else CHECK_OK(llmpar_generator_step(g, &running));
    }
    are_beginnings(t, left, "by hand");
    /* a failure that the caller has while it looks at logits ends all, and is returned */
    listen_again(t);
    t->listener[0].stop = 3;
    t->listener[0].by_logits = 1;
    t->listener[0].with = LLMPAR_ERR_IO;
    CHECK_STATUS(llmpar_generator_run(g, t->desc, TEXTS, t->ids, t->counts), LLMPAR_ERR_IO);
    for (int i = 0; i < TEXTS; i++) CHECK(t->counts[i] < 4 && t->listener[i].ended == 0 && !memcmp(t->room[i], t->alone[i], (size_t)t->counts[i] * sizeof(int32_t)));
    CHECK_INT(t->counts[0], 2);
    listen_again(t);
    CHECK_OK(llmpar_generator_run(g, t->desc, TEXTS, t->ids, t->counts));
    are_beginnings(t, t->length, "behind a failure");
    CHECK_OK(llmpar_generator_destroy(g));
    /* one text */
    stops(t, left);
    CHECK_OK(llmpar_llama_generate(s->model, s->fsdp, &t->desc[3], t->ids[3], &t->counts[3]));
    CHECK_INT(t->counts[3], left[3]);
    CHECK_INT(t->listener[3].ended, 1);
    t->desc[3].top_k = -1;
    CHECK_STATUS(llmpar_llama_generate(s->model, s->fsdp, &t->desc[3], t->ids[3], &count), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(s->ctx->error.text, "generation: top_k = -1, expected 0 or more");
    llmpar_error_clear(&s->ctx->error);
    free(t);
    return LLMPAR_OK;
}

TEST(a_text_that_ends_alone)
{
    static const llmpar_mesh_desc meshes[] = { { .tp = 1 }, { .tp = 2 }, { .dp_shard = 2 } };
    static int32_t places[] = { 1, 3, TEXTS };
    llmpar_llama_config c = talk_config(LLMPAR_FAMILY_LLAMA, 0, 32, 64, 8, VOCAB, POSITIONS);
    for (int m = 0; m < 3; m++)
        for (int p = 0; p < 3; p++) {
            job j = on(&c, meshes[m], callbacks, &places[p]);
            launch_ok(&j);
        }
}

/* ---- logits that nothing can be chosen from ---- */

static llmpar_status spoil(void *user, float *logits, int32_t vocab)
{
    int *how = (int *)user;
    if (*how == 0) logits[vocab - 1] = NAN;
    else if (*how == 1) logits[3] = INFINITY;
    else for (int32_t i = 0; i < vocab && *how == 2; i++) logits[i] = -INFINITY;
    return LLMPAR_OK;
}

static llmpar_status spoilt(session *s, void *user)
{
    llmpar_generator_desc wanted = { POSITIONS, 2 };
    llmpar_generator *g = NULL;
    const int32_t prompt[] = { 1, 2, 3 };
    int32_t room[TOKENS], *ids = room, want[TOKENS], count;
    (void)user;
    CHECK_OK(llmpar_generator_create(s->model, s->fsdp, &wanted, &g));
    for (int sampled = 0; sampled < 2; sampled++) {
        int how = 3;
        llmpar_generate_desc desc = { .prompt = prompt, .prompt_count = 3, .tokens = 5, .temperature = sampled, .on_logits = spoil, .user = &how };
        CHECK_OK(llmpar_generator_run(g, &desc, 1, &ids, &count));
        memcpy(want, room, sizeof want);
        for (int h = 0; h < 3; h++) {
            how = h;
            CHECK_STATUS(llmpar_generator_run(g, &desc, 1, &ids, &count), LLMPAR_ERR_NONFINITE);
            CHECK_TEXT(s->ctx->error.text, "logits of on_logits at position 2, expected finite ones or -inf, and not -inf alone");
            llmpar_error_clear(&s->ctx->error);
            CHECK_INT(count, 0);
            how = 3;
            CHECK_OK(llmpar_generator_run(g, &desc, 1, &ids, &count));
            CHECK(count == 5 && !memcmp(room, want, 5 * sizeof *want));
        }
    }
    CHECK_OK(llmpar_generator_destroy(g));
    return LLMPAR_OK;
}

TEST(spoilt_logits)
{
    llmpar_llama_config c = talk_config(LLMPAR_FAMILY_LLAMA, 0, 32, 64, 8, VOCAB, POSITIONS);
    job j = on(&c, (llmpar_mesh_desc){ .tp = 1 }, spoilt, NULL);
    launch_ok(&j);
}

TEST_LIST(T_(frequencies), T_(a_text_that_ends_alone), T_(spoilt_logits))
