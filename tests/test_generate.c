/* Text that is generated from weights with interleaved rows: the ids and the logits that rows give, on every mesh, and every parameter is what it was, whatever ended the text. The products: test_interleave.c. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#include "model.h"

#define FEW (test_rounds(4) < 4)
static const llmpar_dtype dtypes[] = { LLMPAR_F32, LLMPAR_BF16, LLMPAR_F16 };

enum { LONG = 40, SHORT = 8 /* too few for weights to be turned */, POSITIONS = 64 };

/* A rank's device, its real slots, and what went through those that are watched. */
static __thread struct watched { llmpar_device real; int turned, back, mixed, products, product_fails, turn_fails, tokens, token_fails; uint64_t last, logits, rows[LONG]; int begun[LONG]; /* of each token */ session *meanwhile; } watched;

static llmpar_status planted(llmpar_device *device) { return llmpar_error_set(device->error, LLMPAR_ERR_IO, "planted"); }
static llmpar_status watched_gemm(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args)
{
    for (int32_t s = 0; s < args->segment_count; s++) watched.mixed += args->segments[s].interleaved;
    if (++watched.products == watched.product_fails) return planted(device);
    llmpar_status status = watched.real.gemm(device, stream, args);
    size_t size = llmpar_dtype_size(args->out_dtype);
    watched.last = 0; /* of the last row */
    for (int64_t i = args->m - 1; i < args->m && !status; i++)
        for (size_t j = 0; j < (size_t)args->n * size; j++) watched.last = (watched.last ^ ((const unsigned char *)args->c)[(size_t)(i * args->ldc) * size + j]) * 0x100000001b3u;
    return status;
}
static llmpar_status watched_interleave(llmpar_device *device, llmpar_stream *stream, const llmpar_interleave_args *args)
{
    if (!args->back && watched.turned + 1 == watched.turn_fails) return planted(device);
    args->back ? watched.back++ : watched.turned++;
    return watched.real.interleave(device, stream, args);
}
static llmpar_status watched_token(void *user, int32_t id)
{
    (void)user;
    (void)id;
    watched.logits = watched.logits * 31 + watched.last; /* the head's product was the last one */
    if (watched.meanwhile && watched.turned && watched.tokens == 3) { /* nobody may use the weights now */
        session *s = watched.meanwhile;
        float *logits = (float *)take((size_t)llmpar_llama_get_config(s->model)->vocab, sizeof *logits);
        llmpar_generate_desc desc;
        int32_t first = 1, ids[LONG], count;
        memset(&desc, 0, sizeof desc);
        desc.prompt = &first;
        desc.prompt_count = 1;
        desc.tokens = LONG;
        CHECK_STATUS(llmpar_llama_logits(s->model, s->fsdp, &first, 1, logits), LLMPAR_ERR_ARGUMENT);
        llmpar_error_clear(&s->ctx->error);
        CHECK_STATUS(llmpar_llama_generate(s->model, s->fsdp, &desc, ids, &count), LLMPAR_ERR_ARGUMENT);
        llmpar_error_clear(&s->ctx->error);
        if (s->ctx->world == 1) { /* a list that fails ends a job of several */
            static int32_t ids_of_step[4] = { 1, 2, 3, 4 };
            llmpar_schedule *schedule = NULL;
            llmpar_policy policy;
            llmpar_micro micro;
            llmpar_run run;
            int32_t units;
            llmpar_unit *unit = llmpar_llama_units(s->model, &units);
            memset(&policy, 0, sizeof policy);
            memset(&micro, 0, sizeof micro);
            memset(&run, 0, sizeof run);
            llmpar_fsdp_policy(s->fsdp, &policy);
            policy.forward_only = 1;
            CHECK_OK(llmpar_schedule_create(&s->ctx->heap, unit, units, &policy, &schedule, &s->ctx->error));
            micro.batch = micro.leaves = 1;
            micro.t = run.tokens = 4;
            micro.ids = micro.targets = ids_of_step;
            run.micro = &micro;
            CHECK_STATUS(llmpar_fsdp_run(s->fsdp, schedule->list, schedule->count, &run), LLMPAR_ERR_ARGUMENT);
            CHECK(strstr(s->ctx->error.text, "the parameters are lent to a generator") != NULL);
            llmpar_error_clear(&s->ctx->error);
            llmpar_schedule_destroy(schedule);
        }
        free(logits);
    }
    if (watched.tokens < LONG) {
        watched.rows[watched.tokens] = watched.last;
        watched.begun[watched.tokens] = watched.products;
    }
    return ++watched.tokens == watched.token_fails ? LLMPAR_ERR_IO : LLMPAR_OK;
}
static void watch_again(void)
{
    llmpar_device real = watched.real;
    memset(&watched, 0, sizeof watched);
    watched.real = real;
}

typedef struct talk {
    const char *name;
    int32_t prompt;
    int hold;               /* the units stay gathered beside */
    int turns;              /* weights of this shape are interleaved, where the device has such products for their type */
    int known;              /* what the first mesh said */
    int32_t ids[3][LONG], count[3];
} talk;

/* All parameters, one after the other; to be freed. Collective. */
static unsigned char *parameters(session *s, void *const **held, size_t *bytes)
{
    unsigned char *all = NULL;
    *bytes = 0;
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(s->fsdp); u++) {
        void *const *params = held ? held[u] : NULL;
        if (!held) CHECK_OK(llmpar_fsdp_unshard(s->fsdp, u, &params));
        for (int32_t p = 0; p < llmpar_fsdp_unit(s->fsdp, u)->param_count; p++) {
            llmpar_local part;
            llmpar_fsdp_part(s->fsdp, s->ctx->rank, u, p, &part);
            size_t more = (size_t)part.elements * llmpar_dtype_size(llmpar_fsdp_dtype(s->fsdp));
            all = (unsigned char *)realloc(all, *bytes + more + 1);
            memcpy(all + *bytes, params[p], more);
            *bytes += more;
        }
        if (!held) CHECK_OK(llmpar_fsdp_reshard(s->fsdp, u));
    }
    return all;
}

/* Norms and biases that are not all 1 and 0, the same on every mesh. */
static llmpar_status shake(session *s)
{
    llmpar_status status = LLMPAR_OK;
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(s->fsdp) && !status; u++) {
        void *shard = llmpar_fsdp_shard(s->fsdp, u, NULL, NULL, NULL);
        for (int32_t p = 0; p < llmpar_fsdp_unit(s->fsdp, u)->param_count; p++) {
            llmpar_local part;
            float *w = (float *)llmpar_fsdp_local(s->fsdp, u, p, shard);
            llmpar_fsdp_part(s->fsdp, s->ctx->rank, u, p, &part);
            for (int64_t i = 0; i < part.flat_count && llmpar_fsdp_unit(s->fsdp, u)->params[p].dims == 1; i++) w[part.shard_begin + i] += (float)((part.offset[0] + part.flat_begin + i) * 37 % 17 - 8) / 16;
        }
        status = llmpar_fsdp_shard_done(s->fsdp, u, 1);
    }
    return status;
}

/* kind 0: greedy; 1: sampled; 2: sampled, up to one of the ids that end a text */
static llmpar_status say(session *s, const talk *t, int kind, uint64_t seed, int32_t tokens, int32_t *ids, int32_t *count)
{
    int32_t prompt[POSITIONS];
    llmpar_generate_desc desc;
    memset(&desc, 0, sizeof desc);
    for (int32_t i = 0; i < t->prompt; i++) prompt[i] = (i * i * 7 + 3) % llmpar_llama_get_config(s->model)->vocab;
    desc.prompt = prompt;
    desc.prompt_count = t->prompt;
    desc.tokens = tokens;
    desc.on_token = watched_token;
    desc.temperature = kind ? 0.9 : 0;
    desc.top_p = kind == 1 ? 0.9 : 0;
    desc.seed = seed;
    desc.stop_at_eos = kind == 2;
    return llmpar_llama_generate(s->model, s->fsdp, &desc, ids, count);
}

static llmpar_status talk_steps(session *s, talk *t, int turns, void *const **held)
{
    enum { ROWS = 12 };
    llmpar_device *device = s->ctx->device;
    int32_t ids[LONG], want[3][LONG], count = 0, want_count[3], vocab = llmpar_llama_get_config(s->model)->vocab;
    size_t bytes, again;
    uint64_t seed, head[3];
    unsigned char *before = parameters(s, held, &bytes), *after;
    float *logits = (float *)take((size_t)(ROWS * vocab), sizeof *logits), *later = (float *)take((size_t)(ROWS * vocab), sizeof *later);
#define PARAMETERS_STAY(what) do { \
        after = parameters(s, held, &again); \
        if (again != bytes || memcmp(before, after, bytes)) TEST_FAIL("%s, rank %d: %s: parameters are not what they were", t->name, s->ctx->rank, what); \
        free(after); \
        if (watched.turned != watched.back) TEST_FAIL("%s, rank %d: %s: %d weights turned, %d turned back", t->name, s->ctx->rank, what, watched.turned, watched.back); \
    } while (0)
    device->interleaved_rows = NULL;
    llmpar_status status = LLMPAR_OK;
    int products = 0;
    for (int kind = 0; kind < 2 && !status; kind++) {
        watched.logits = 0;
        products = -watched.products;
        status = say(s, t, kind, 1, LONG, want[kind], &want_count[kind]);
        head[kind] = watched.logits;
        products += watched.products;
    }
    for (seed = 1; seed < 40 && !status; seed++) { /* one that ends in the middle */
        watched.logits = 0;
        status = say(s, t, 2, seed, LONG, want[2], &want_count[2]);
        head[2] = watched.logits;
        if (want_count[2] > 1 && want_count[2] < LONG) break;
    }
    CHECK_INT(watched.turned + watched.mixed, 0);
    PARAMETERS_STAY("as rows");
    device->interleaved_rows = watched.real.interleaved_rows;
    watch_again();
    if (!status) status = say(s, t, 0, 1, SHORT, ids, &count);
    CHECK_INT(count, SHORT);
    CHECK_INT(watched.turned, 0);
    CHECK_BYTES(ids, want[0], sizeof ids[0] * SHORT);
    if (!status) status = llmpar_llama_logits(s->model, s->fsdp, want[0], ROWS, logits);
    for (int kind = 0; kind < 4 && !status; kind++) { /* and the first one again */
        watch_again();
        memset(ids, 0xff, sizeof ids);
        watched.meanwhile = s;
        status = say(s, t, kind % 3, kind == 2 ? seed : 1, LONG, ids, &count);
        CHECK_INT(count, want_count[kind % 3]);
        if (!status && memcmp(ids, want[kind % 3], sizeof ids[0] * (size_t)count)) TEST_FAIL("%s, rank %d: kind %d: other ids than of rows", t->name, s->ctx->rank, kind);
        if (!status && watched.logits != head[kind % 3]) TEST_FAIL("%s, rank %d: kind %d: other logits than of rows", t->name, s->ctx->rank, kind);
        if (!t->known) memcpy(t->ids[kind % 3], ids, sizeof ids), t->count[kind % 3] = count;
        CHECK_INT(count, t->count[kind % 3]);
        CHECK_BYTES(ids, t->ids[kind % 3], sizeof ids[0] * (size_t)count);
        CHECK(turns ? watched.turned && watched.mixed : !watched.turned && !watched.mixed);
        PARAMETERS_STAY("40 tokens");
    }
    CHECK_INT(want_count[0], LONG);
    CHECK_INT(want_count[1], LONG);
    CHECK(want_count[2] > 1 && want_count[2] < LONG);
    /* What fails on the way: the caller, a product early and late, a weight that is not turned. */
    for (int fault = 0; fault < 9 && !status; fault++) {
        static const int tokens[] = { 1, 2, 6, LONG };
        watch_again();
        if (fault < 4) watched.token_fails = tokens[fault];
        else if (fault < 7) watched.product_fails = products * (fault - 3) / 4;
        else if (turns) watched.turn_fails = fault == 7 ? 1 : 3;
        else continue;
        CHECK_STATUS(say(s, t, 0, 1, LONG, ids, &count), LLMPAR_ERR_IO);
        llmpar_error_clear(&s->ctx->error);
        CHECK(!turns || fault == 0 || fault == 7 || watched.turned > 0);
        PARAMETERS_STAY(fault < 4 ? "on_token failed" : fault < 7 ? "a product failed" : "a weight failed");
    }
    watch_again();
    if (!status) status = llmpar_llama_logits(s->model, s->fsdp, want[0], ROWS, later);
    CHECK_BYTES(later, logits, (size_t)(ROWS * vocab) * sizeof *logits);
    if (!status) status = say(s, t, 0, 1, LONG, ids, &count);
    CHECK_BYTES(ids, want[0], sizeof ids);
    PARAMETERS_STAY("40 tokens after faults");
#undef PARAMETERS_STAY
    free(before);
    free(logits);
    free(later);
    return status;
}

static llmpar_status talk_body(session *s, void *user)
{
    talk *t = (talk *)user;
    llmpar_device *device = s->ctx->device;
    int32_t units = llmpar_fsdp_unit_count(s->fsdp);
    void *const **held = (void *const **)take((size_t)units, sizeof *held);
    llmpar_status status = shake(s);
    int turns = t->turns && llmpar_device_interleaved_rows(device, llmpar_fsdp_dtype(s->fsdp)) > 0;
    memset(&watched, 0, sizeof watched);
    watched.real = *device;
    device->gemm = watched_gemm;
    device->interleave = watched_interleave;
    for (int32_t u = 0; u < units && t->hold; u++) CHECK_OK(llmpar_fsdp_unshard(s->fsdp, u, &held[u]));
    if (!status) status = talk_steps(s, t, turns, t->hold ? held : NULL);
    for (int32_t u = 0; u < units && t->hold; u++) CHECK_OK(llmpar_fsdp_reshard(s->fsdp, u));
    device->gemm = watched.real.gemm;
    device->interleave = watched.real.interleave;
    free((void *)held);
    return status;
}

static llmpar_llama_config config_that_ends(llmpar_family family, int tied, int32_t hidden, int32_t intermediate, int32_t head_dim, int32_t vocab)
{
    llmpar_llama_config c = talk_config(family, tied, hidden, intermediate, head_dim, vocab, POSITIONS);
    c.eos_count = 2;
    c.eos_id[0] = 7;
    c.eos_id[1] = 12;
    return c;
}

/* One rank, then others, each of which must say the same. */
static void talk_everywhere(talk *t, const llmpar_llama_config *config, llmpar_dtype dtype, int turns)
{
    static const struct { llmpar_mesh_desc mesh; int32_t wrap, hold; } meshes[] = { { { .tp = 1 }, 0, 0 }, { { .tp = 2 }, LLMPAR_WRAP_HALF, 0 }, { { .tp = 2 }, 2, 1 }, { { .dp_shard = 2 }, 0, 1 } };
    t->known = 0;
    t->turns = turns;
    for (int i = 0; i < 4; i++) {
        job j = { .config = config, .mesh = meshes[i].mesh, .trainer = { .seq_len = POSITIONS, .dtype = dtype }, .body = talk_body, .user = t, .wrap = meshes[i].wrap };
        t->hold = meshes[i].hold;
        launch_ok(&j);
        t->known = 1;
    }
}

TEST(text)
{
    static const struct { const char *name; llmpar_family family; int tied; int32_t hidden, intermediate, head_dim, vocab, prompt; int turns; /* f32; halves */ } cases[] = {
        { "whole groups", LLMPAR_FAMILY_LLAMA, 0, 64, 128, 16, 64, 5, 3 }, { "rows left", LLMPAR_FAMILY_LLAMA, 1, 40, 112, 10, 61, 20, 3 }, { "biases", LLMPAR_FAMILY_QWEN2, 0, 48, 80, 8, 61, 5, 3 },
        { "norms of heads, tied", LLMPAR_FAMILY_QWEN3, 1, 48, 80, 12, 64, 1, 3 }, { "odd lengths", LLMPAR_FAMILY_QWEN2, 1, 36, 44, 6, 62, 7, 1 } };
    for (int i = 0; i < 5; i++)
        for (int dtype = 0; dtype < 3; dtype++) {
            if (FEW && dtype != i % 3) continue;
            llmpar_llama_config c = config_that_ends(cases[i].family, cases[i].tied, cases[i].hidden, cases[i].intermediate, cases[i].head_dim, cases[i].vocab);
            talk t = { cases[i].name, cases[i].prompt, 0, 0, 0, { { 0 } }, { 0 } };
            talk_everywhere(&t, &c, dtypes[dtype], cases[i].turns >> (dtype > 0) & 1);
        }
}

TEST(text_at_every_level)
{
    const char *given = getenv("LLMPAR_CPU");
    char keep[32];
    snprintf(keep, sizeof keep, "%s", given ? given : "");
    for (int level = (int)LLMPAR_CPU_PORTABLE; level <= (int)llmpar_cpu_best_level(); level++) for (int dtype = 0; dtype < 3; dtype++) {
        if (FEW && dtype != level % 3) continue;
        llmpar_llama_config c = config_that_ends(LLMPAR_FAMILY_QWEN2, dtype & 1, 40, 80, 10, 61);
        talk t = { llmpar_cpu_level_name((llmpar_cpu_level)level), 17, 0, 0, 0, { { 0 } }, { 0 } };
        setenv("LLMPAR_CPU", t.name, 1);
        talk_everywhere(&t, &c, dtypes[dtype], 1);
    }
    if (given) setenv("LLMPAR_CPU", keep, 1);
    else unsetenv("LLMPAR_CPU");
}

/* Weights that lie side by side meet one row in one product, which has the bits of many: those of the whole sequence. */
static int together(int64_t n, int64_t k, int64_t tile) { return n * k % LLMPAR_FLAT_ALIGN == 0 && n % tile == 0; }
static llmpar_status together_body(session *s, void *user)
{
    talk *t = (talk *)user;
    llmpar_device *device = s->ctx->device;
    const llmpar_llama_config *c = llmpar_llama_get_config(s->model);
    int64_t tp = t->turns, q = c->heads * c->head_dim / tp, k = c->kv_heads * c->head_dim / tp, rows = llmpar_device_interleaved_rows(device, llmpar_fsdp_dtype(s->fsdp));
    float *logits = (float *)take((size_t)(POSITIONS * c->vocab), sizeof *logits);
    llmpar_status status = shake(s);
    memset(&watched, 0, sizeof watched);
    watched.real = *device;
    device->gemm = watched_gemm;
    for (int turned = 0; turned < 2 && !status; turned++) {
        int32_t ids[POSITIONS], count = 0, tokens = turned ? LONG : SHORT;
        int64_t tile = turned && rows ? rows : 1, products = 3;
        if (!together(q, c->hidden, tile) || !together(k, c->hidden, tile) || (c->family == LLMPAR_FAMILY_QWEN2 && (!together(q, 1, 1) || !together(k, 1, 1)))) products += 2;
        if (!together(c->intermediate / tp, c->hidden, tile)) products++;
        watch_again();
        for (int32_t i = 0; i < t->prompt; i++) ids[i] = (i * i * 7 + 3) % c->vocab;
        status = say(s, t, 0, 1, tokens, ids + t->prompt, &count);
        uint64_t *row = watched.rows;
        if (watched.begun[2] - watched.begun[1] != c->layers * (products + 1) + 1) TEST_FAIL("%s, tp %d: %d products a token, expected %d", t->name, (int)tp, watched.begun[2] - watched.begun[1], (int)(c->layers * (products + 1) + 1));
        for (int32_t i = 0; i < count && !status; i += turned ? 6 : 1) {
            status = llmpar_llama_logits(s->model, s->fsdp, ids, t->prompt + i, logits);
            if (watched.last != row[i]) TEST_FAIL("%s, tp %d, rank %d: logits of token %d are not those of the whole sequence", t->name, (int)tp, s->ctx->rank, (int)i);
        }
    }
    device->gemm = watched.real.gemm;
    free(logits);
    return status;
}

TEST(products_together)
{
    static const struct { const char *name; llmpar_family family; int32_t hidden, intermediate, head_dim, kv_heads; } cases[] = {
        { "together", LLMPAR_FAMILY_LLAMA, 128, 256, 16, 2 }, { "gates apart for two", LLMPAR_FAMILY_QWEN3, 128, 208, 16, 2 }, { "biases apart", LLMPAR_FAMILY_QWEN2, 64, 96, 16, 4 }, { "biases together", LLMPAR_FAMILY_QWEN2, 64, 128, 32, 8 }, { "apart", LLMPAR_FAMILY_LLAMA, 36, 44, 6, 2 } };
    for (int i = 0; i < 5; i++)
        for (int tp = 1; tp <= 2; tp++) {
            llmpar_llama_config c = config_that_ends(cases[i].family, i & 1, cases[i].hidden, cases[i].intermediate, cases[i].head_dim, 64);
            talk t = { cases[i].name, 5, 0, tp, 0, { { 0 } }, { 0 } };
            job j = { .config = &c, .mesh = { .tp = tp }, .trainer = { .seq_len = POSITIONS, .dtype = dtypes[i % 3] }, .body = together_body, .user = &t };
            c.kv_heads = cases[i].kv_heads;
            launch_ok(&j);
        }
}

TEST_LIST(T_(text), T_(text_at_every_level), T_(products_together))
