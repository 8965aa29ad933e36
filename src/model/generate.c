#include "model/llama.h"
#include "model/session_internal.h"

#include <stdio.h>
#include <string.h>

#include "base/math.h"
#include "base/rng.h"

#if !defined(LLMPAR_NO_LLAMA)

enum { LLMPAR__SESSION_MANY = 32 /* tokens: to turn the weights and back takes as long as 3 to 7 of them, each of which is then a fifth to a third faster */ };

static int llmpar__sample_is_eos(const llmpar_llama_config *c, int32_t id)
{
    for (int32_t i = 0; i < c->eos_count; i++)
        if (c->eos_id[i] == id) return 1;
    return 0;
}

/* A place for a text: what the session knows there, and what is being generated. */
typedef struct llmpar__slot {
    int64_t known;   /* positions whose ids, keys and values are there */
    int64_t begun;   /* when, counted in texts */
    int running;     /* its last id waits at `known`; the rest of this is that text's */
    llmpar_generate_desc desc;
    int32_t *ids, *count;
    llmpar_rng rng;
} llmpar__slot;

struct llmpar_generator {
    llmpar__session session;
    llmpar__slot *slots; /* [session.slots] */
    int32_t *order;      /* [V] scratch of sampling */
    int64_t begun;       /* texts */
    int32_t running;     /* of the slots */
    int stopped;         /* by the caller */
};

static int32_t llmpar__generate_tokens(const llmpar_generate_desc *desc) { return desc->tokens ? desc->tokens : 128; }

/* What may be said before anything is taken. */
static llmpar_status llmpar__generate_check(const llmpar_llama *model, const llmpar_generate_desc *texts, int32_t count, int64_t positions)
{
    char what[48] = "generation";
    if (!texts) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "generation: no desc");
    for (int32_t i = 0; i < count; i++) {
        const llmpar_generate_desc *desc = &texts[i];
        int32_t tokens = llmpar__generate_tokens(desc);
        if (count > 1) snprintf(what, sizeof what, "generation of text %d", (int)i);
        if (desc->prompt_count < 1 || !desc->prompt) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "%s: prompt of %d ids, expected at least 1", what, (int)desc->prompt_count);
        if (tokens < 0) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "%s: tokens = %d, expected at least 1", what, (int)tokens);
        if (!(desc->temperature >= 0) || !llmpar_isfinite_f64(desc->temperature)) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "%s: temperature = %g, expected 0 or more", what, desc->temperature);
        if (desc->top_k < 0) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "%s: top_k = %d, expected 0 or more", what, (int)desc->top_k);
        if (!(desc->top_p >= 0 && desc->top_p <= 1)) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "%s: top_p = %g, expected 0 .. 1", what, desc->top_p);
        if ((int64_t)desc->prompt_count + tokens - 1 > positions)
            return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "%s: prompt of %d ids and %d tokens, expected room for all but the last in %lld positions", what, (int)desc->prompt_count, (int)tokens, (long long)positions);
        if (llmpar__session_ids(model, what, desc->prompt, desc->prompt_count)) return LLMPAR_ERR_ARGUMENT;
    }
    return LLMPAR_OK;
}

/* rows: of the longest prompt. streams: weights are interleaved, where the device has such products. */
static llmpar_status llmpar__generator_open(llmpar_llama *model, llmpar_fsdp *fsdp, int64_t rows, int32_t slots, int64_t positions, int streams, llmpar_generator *g)
{
    enum { CHUNK = 512 }; /* products of 256 rows pack the weights twice as often: 67 instead of 72 % of the peak */
    memset(g, 0, sizeof *g);
    if (rows > CHUNK) rows = CHUNK;
    g->order = (int32_t *)llmpar_heap_alloc(&model->ctx->heap, (size_t)model->config.vocab, sizeof *g->order);
    g->slots = (llmpar__slot *)llmpar_heap_zalloc(&model->ctx->heap, (size_t)slots, sizeof *g->slots);
    llmpar_status status = llmpar__session_open(model, fsdp, rows > slots ? rows : slots, slots, slots, positions, "a generator", &g->session);
    if (!status && (!g->order || !g->slots)) status = llmpar_fail(model->ctx, LLMPAR_ERR_MEMORY, "generation: out of memory");
    if (!status && streams && llmpar__session_streams(&g->session)) status = llmpar__session_interleave(&g->session);
    return status;
}

static llmpar_status llmpar__generator_close(llmpar_generator *g, llmpar_status status)
{
    llmpar_heap *heap = &g->session.model->ctx->heap;
    llmpar_heap_free(heap, g->order);
    llmpar_heap_free(heap, g->slots);
    return llmpar__session_close(&g->session, status);
}

/* The next id of slot `slot`, of logits row `row`; it waits behind what is known, or the text ends. */
static llmpar_status llmpar__generator_next(llmpar_generator *g, int64_t slot, int64_t row)
{
    llmpar__session *s = &g->session;
    llmpar__slot *t = &g->slots[slot];
    const llmpar_llama_config *c = &s->model->config;
    const llmpar_generate_desc *desc = &t->desc;
    float *logits = s->host + row * c->vocab;
    int32_t id = llmpar__sample_greedy(logits, c->vocab, 0);
    if (id < 0) return llmpar_fail(s->model->ctx, LLMPAR_ERR_NONFINITE, "generation: logits at position %lld are not finite", (long long)t->known - 1);
    llmpar_status status = LLMPAR_OK;
    if (desc->on_logits) {
        status = desc->on_logits(desc->user, logits, c->vocab);
        id = llmpar__sample_greedy(logits, c->vocab, 1);
        if (!status && id < 0) return llmpar_fail(s->model->ctx, LLMPAR_ERR_NONFINITE, "generation: logits of on_logits at position %lld, expected finite ones or -inf, and not -inf alone", (long long)t->known - 1);
    }
    if (!status) {
        if (desc->temperature != 0) id = llmpar__sample_nucleus(logits, c->vocab, id, desc, llmpar_rng_uniform(&t->rng, (uint64_t)*t->count), g->order);
        t->ids[(*t->count)++] = id;
        if (desc->on_token) status = desc->on_token(desc->user, id);
    }
    g->stopped = status && status != LLMPAR_END;
    if (!status && *t->count < llmpar__generate_tokens(desc) && !(desc->stop_at_eos && llmpar__sample_is_eos(c, id))) {
        s->host_ids[slot * s->capacity + t->known] = id;
        return LLMPAR_OK;
    }
    t->running = 0;
    g->running--;
    if (g->stopped) return status;
    if (desc->on_end) desc->on_end(desc->user);
    return LLMPAR_OK;
}

/* Before anything is asked of the session. */
static llmpar_status llmpar__generator_ready(llmpar_generator *g)
{
    llmpar__session *s = &g->session;
    g->stopped = 0;
    return s->stream ? LLMPAR_OK : s->device->stream_create(s->device, "generation", &s->stream);
}

/* What a failure leaves: no text runs, and unless the caller stopped it the cache is in doubt, and the stream, which may yet read ids, may stay failed. */
static llmpar_status llmpar__generator_done(llmpar_generator *g, llmpar_status status)
{
    llmpar__session *s = &g->session;
    for (int64_t i = 0; i < s->slots && status; i++) {
        g->slots[i].running = 0;
        if (!g->stopped) g->slots[i].known = 0;
    }
    if (!status) return LLMPAR_OK;
    g->running = 0;
    if (g->stopped) return status;
    s->device->synchronize(s->device, s->stream);
    s->device->stream_destroy(s->device, s->stream);
    s->stream = NULL;
    return status;
}

/* Begins a text behind its own beginning, in an empty place or in that of the oldest text: the latest ones stay known. What is known elsewhere of its prompt is copied, the rest computed. There is a free place. */
static llmpar_status llmpar__generator_begin(llmpar_generator *g, const llmpar_generate_desc *desc, int32_t *ids, int32_t *count)
{
    llmpar__session *s = &g->session;
    int64_t to = -1, from = 0, shared = 0, most = -1, kept = -1;
    for (int64_t i = 0; i < s->slots; i++) {
        const int32_t *here = s->host_ids + i * s->capacity;
        int64_t same = 0;
        while (same < g->slots[i].known && same < desc->prompt_count - 1 && here[same] == desc->prompt[same]) same++; /* the last id gives the logits */
        if (same > most) {
            most = same;
            from = i;
        }
        int64_t keeps = same == g->slots[i].known ? same + 1 : 0; /* nothing is lost there */
        if (!g->slots[i].running && (keeps > kept || (keeps == kept && g->slots[i].begun < g->slots[to].begun))) {
            kept = keeps;
            shared = same;
            to = i;
        }
    }
    llmpar__slot *t = &g->slots[to];
    size_t id = (size_t)(s->s.k * s->s.e) * s->s.size; /* bytes of its k, or v */
    llmpar_status status = LLMPAR_OK;
    for (int32_t part = 0; part < 2 * s->model->config.layers && most > shared && !status; part++) {
        size_t at = (size_t)(part % 2 * s->capacity + shared) * id;
        status = s->device->copy(s->device, s->stream, llmpar__session_cache(s, to, part / 2) + at, llmpar__session_cache(s, from, part / 2) + at, (size_t)(most - shared) * id);
    }
    memcpy(s->host_ids + to * s->capacity + shared, desc->prompt + shared, (size_t)(desc->prompt_count - shared) * sizeof *desc->prompt); /* no copy is under way there */
    t->known = most;
    t->begun = ++g->begun;
    t->running = 1;
    g->running++;
    t->desc = *desc;
    t->ids = ids;
    t->count = count;
    t->rng = llmpar_rng_key(desc->seed, LLMPAR_RNG_SAMPLE, NULL, 0, 0);
    int64_t last = 0;
    while (!status && t->known < desc->prompt_count) {
        const llmpar__span span = { to, t->known, desc->prompt_count - t->known < s->rows ? desc->prompt_count - t->known : s->rows };
        s->spans[0] = span;
        status = llmpar__session_forward(s, 1);
        t->known += span.count;
        last = span.count - 1;
    }
    if (!status) status = llmpar__session_head(s, last, 1);
    return status ? status : llmpar__generator_next(g, to, 0);
}

static llmpar_status llmpar__generator_step(llmpar_generator *g)
{
    llmpar__session *s = &g->session;
    int32_t rows = 0;
    for (int64_t i = 0; i < s->slots; i++) {
        const llmpar__span span = { i, g->slots[i].known, 1 };
        if (g->slots[i].running) s->spans[rows++] = span;
    }
    if (!rows) return LLMPAR_OK;
    llmpar_status status = llmpar__session_forward(s, rows);
    if (!status) status = llmpar__session_head(s, 0, rows);
    for (int32_t i = 0; i < rows && !status; i++) {
        g->slots[s->spans[i].slot].known++;
        status = llmpar__generator_next(g, s->spans[i].slot, i);
    }
    return status;
}

LLMPAR_DEF llmpar_status llmpar_generator_begin(llmpar_generator *g, const llmpar_generate_desc *text, int32_t *ids, int32_t *count, int32_t *running)
{
    *count = *running = 0;
    LLMPAR__NEED(g, NULL);
    llmpar__session *s = &g->session;
    *running = g->running;
    llmpar_status status = llmpar__generate_check(s->model, text, 1, s->capacity);
    if (!status && g->running == s->slots) status = llmpar_fail(s->model->ctx, LLMPAR_ERR_ARGUMENT, "generation: %d texts are running, expected fewer than the generator's %d", (int)g->running, (int)s->slots);
    if (!status) status = llmpar__generator_ready(g);
    if (status) return status;
    status = llmpar__generator_done(g, llmpar__generator_begin(g, text, ids, count));
    *running = g->running;
    return status;
}

LLMPAR_DEF llmpar_status llmpar_generator_step(llmpar_generator *g, int32_t *running)
{
    *running = 0;
    LLMPAR__NEED(g, NULL);
    llmpar_status status = llmpar__generator_ready(g);
    if (!status) status = llmpar__generator_done(g, llmpar__generator_step(g));
    *running = g->running;
    return status;
}

LLMPAR_DEF llmpar_status llmpar_generator_create(llmpar_llama *model, llmpar_fsdp *fsdp, const llmpar_generator_desc *desc, llmpar_generator **out)
{
    *out = NULL;
    LLMPAR__NEED(model && fsdp, NULL);
    if (!desc) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "generation: no desc");
    int64_t positions = desc->positions ? desc->positions : model->positions;
    int32_t texts = desc->texts ? desc->texts : 1;
    if (positions < 0) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "generation: %lld positions, expected at least 1", (long long)positions);
    if (texts < 0) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "generation: %d texts at once, expected at least 1", (int)texts);
    llmpar_generator *g = (llmpar_generator *)llmpar_heap_alloc(&model->ctx->heap, 1, sizeof *g);
    if (!g) return llmpar_fail(model->ctx, LLMPAR_ERR_MEMORY, "generation: out of memory");
    llmpar_status status = llmpar__generator_open(model, fsdp, positions, texts, positions, 1, g);
    if (!status) *out = g;
    else {
        llmpar__generator_close(g, status);
        llmpar_heap_free(&model->ctx->heap, g);
    }
    return status;
}

LLMPAR_DEF llmpar_status llmpar_generator_destroy(llmpar_generator *g)
{
    if (!g) return LLMPAR_OK;
    llmpar_heap *heap = &g->session.model->ctx->heap;
    llmpar_status status = llmpar__generator_close(g, LLMPAR_OK);
    llmpar_heap_free(heap, g);
    return status;
}

LLMPAR_DEF llmpar_status llmpar_generator_run(llmpar_generator *g, const llmpar_generate_desc *texts, int32_t count, int32_t *const *ids, int32_t *counts)
{
    if (count > 0) memset(counts, 0, (size_t)count * sizeof *counts);
    LLMPAR__NEED(g, NULL);
    llmpar__session *s = &g->session;
    llmpar_status status = llmpar__generate_check(s->model, texts, count, s->capacity);
    if (!status) status = llmpar__generator_ready(g);
    if (status) return status;
    int32_t next = 0;
    do {
        for (; next < count && g->running < s->slots && !status; next++) status = llmpar__generator_begin(g, &texts[next], ids[next], &counts[next]);
        if (!status) status = llmpar__generator_step(g);
    } while (!status && (next < count || g->running));
    return llmpar__generator_done(g, status);
}

LLMPAR_DEF llmpar_status llmpar_llama_generate(llmpar_llama *model, llmpar_fsdp *fsdp, const llmpar_generate_desc *desc, int32_t *ids, int32_t *count)
{
    llmpar_generator g;
    *count = 0;
    LLMPAR__NEED(model && fsdp, NULL);
    llmpar_status status = llmpar__generate_check(model, desc, 1, model->applied == 2 ? model->positions : INT64_MAX);
    if (status) return status;
    int32_t tokens = llmpar__generate_tokens(desc);
    status = llmpar__generator_open(model, fsdp, desc->prompt_count, 1, (int64_t)desc->prompt_count + tokens - 1, tokens >= LLMPAR__SESSION_MANY, &g);
    if (!status) status = llmpar_generator_run(&g, desc, 1, &ids, count);
    return llmpar__generator_close(&g, status);
}

#endif /* LLMPAR_NO_LLAMA */
