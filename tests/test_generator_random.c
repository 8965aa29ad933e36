/* Random conversations: prompts that go on with, cut short, fork or repeat earlier texts, one by one and several at once, with callers that end them and descs that are refused in between. What llmpar_llama_generate makes of each
   desc on one rank is what a generator has to make of it on any mesh, and training goes on behind it as if there had been none. From the contract in model/llama.h alone. */
#include "apart_device.h"
#include "model.h"

enum { LONGEST = 144, ROOM = 128, TEXTS = 64, TURNS = 8, AT_ONCE = 7, PHASES = 2 };

typedef struct dice { llmpar_rng rng; uint64_t next; } dice;
static dice dice_of(uint64_t seed, const char *what) { dice d = { llmpar_rng_key(seed, LLMPAR_RNG_USER, what, 0, 0), 0 }; return d; }
static int32_t roll(dice *d, int32_t n) { return (int32_t)(llmpar_rng_uniform(&d->rng, d->next++) * n); } /* 0 .. n - 1 */
#define PICK(d, ...) ((const int32_t[]){ __VA_ARGS__ }[roll(d, (int32_t)(sizeof (const int32_t[]){ __VA_ARGS__ } / sizeof(int32_t)))])

typedef struct text {
    llmpar_generate_desc desc;  /* its prompt is the one below, or NULL */
    int32_t prompt[LONGEST + 2 * ROOM], ids[ROOM], count;
    int32_t stop;               /* the caller ends all texts at this id of the reply, from 1; 0: never */
    int32_t leave;              /* the caller ends it alone there */
    int bad;                    /* no such text: LLMPAR_ERR_ARGUMENT */
} text;
typedef struct talk {
    uint64_t seed;
    llmpar_llama_config config;
    llmpar_dtype dtype;
    const char *cpu;
    llmpar_generator_desc generator;
    text texts[PHASES][TEXTS];
    llmpar_step steps[PHASES];
    int32_t positions, freeze, turns[PHASES][TURNS] /* texts at once */, interleaved, stopped, left, refused; /* texts of these kinds */
} talk;

static llmpar_status talk_sequence(void *user, int64_t index, int32_t *tokens)
{
    const talk *t = (const talk *)user;
    llmpar_rng rng = llmpar_rng_key(t->seed, LLMPAR_RNG_USER, "sequence", 0, (uint64_t)index);
    for (int32_t i = 0; i <= t->positions; i++) tokens[i] = (int32_t)(llmpar_rng_uniform(&rng, (uint64_t)i) * t->config.vocab);
    return LLMPAR_OK;
}

static void write_text(const talk *t, dice *d, const text *earlier, int32_t earlier_count, text *x)
{
    int32_t count = 0, limit = t->positions;
    memset(x, 0, sizeof *x);
    if (earlier_count && roll(d, 4)) { /* a part or all of one of the latest ones, or of any */
        const text *from = &earlier[roll(d, 2) ? earlier_count - 1 - roll(d, earlier_count < 4 ? earlier_count : 4) : roll(d, earlier_count)];
        int32_t said = from->desc.prompt_count, whole = from->bad ? 0 : said + from->count;
        count = whole ? PICK(d, whole, whole, whole - 1, said, 1 + roll(d, whole), 1 + roll(d, whole)) : 0;
        for (int32_t i = 0; i < count; i++) x->prompt[i] = i < said ? from->prompt[i] : from->ids[i - said];
    }
    if (!count || roll(d, 3)) for (int32_t more = 1 + roll(d, count ? 6 : limit / 2); more; more--) x->prompt[count++] = roll(d, t->config.vocab);
    int32_t tokens = x->desc.tokens = roll(d, 5) ? 1 + roll(d, 14) : 32 + roll(d, 17);
    if (!roll(d, 12)) x->desc.tokens = 0, tokens = ROOM; /* the default */
    if (count + tokens - 1 > limit || !roll(d, 20)) { /* as long as may be */
        if (tokens > limit) x->desc.tokens = tokens = 5;
        if (count > limit + 1 - tokens) count = limit + 1 - tokens;
        else x->desc.tokens = tokens = limit + 1 - count < ROOM ? limit + 1 - count : ROOM;
    }
    x->desc.prompt = x->prompt, x->desc.prompt_count = count;
    x->desc.temperature = (double)PICK(d, 0, 0, 7, 10, 30) / 10, x->desc.top_p = (double)PICK(d, 0, 3, 9, 10) / 10, x->desc.top_k = PICK(d, 0, 0, 1, 5, 40, 1000);
    x->desc.seed = (uint64_t)roll(d, 3), x->desc.stop_at_eos = roll(d, 2);
    x->bad = !roll(d, 14);
    if (x->bad) switch (roll(d, 9)) {
    case 0: x->prompt[roll(d, count)] = PICK(d, -1, t->config.vocab, INT32_MAX, INT32_MIN); break;
    case 1: x->desc.prompt_count = PICK(d, 0, -1, INT32_MAX); break;
    case 2: x->desc.prompt = NULL; break;
    case 3: x->desc.tokens = PICK(d, -1, INT32_MIN, INT32_MAX); break;
    case 4: x->desc.temperature = roll(d, 2) ? -1 : (double)NAN; break;
    case 5: x->desc.top_p = roll(d, 2) ? 1.5 : (double)NAN; break;
    case 6: x->desc.top_k = PICK(d, -1, INT32_MIN); break;
    default: for (x->desc.tokens = roll(d, ROOM) + 1; count + x->desc.tokens <= limit + 1; x->desc.prompt_count = ++count) x->prompt[count] = 0;
    }
}

/* What is said on one rank, without a generator. */
static llmpar_status said(session *s, void *user)
{
    talk *t = (talk *)user;
    dice d = dice_of(t->seed, "texts");
    llmpar_status status = LLMPAR_OK;
    for (int p = 0; p < PHASES && !status; p++) {
        int32_t n = 0;
        for (int i = 0; i < TURNS; i++)
            for (int32_t end = n + (t->turns[p][i] = PICK(&d, 1, 1, 1, 2, 3, 5, AT_ONCE)); n < end; n++) {
                text *x = &t->texts[p][n];
                write_text(t, &d, t->texts[p], n, x);
                CHECK_STATUS(llmpar_llama_generate(s->model, s->fsdp, &x->desc, x->ids, &x->count), x->bad ? LLMPAR_ERR_ARGUMENT : LLMPAR_OK);
                t->interleaved += x->count >= 32;
                CHECK(x->bad ? !x->count : x->count > 0);
                llmpar_error_clear(&s->ctx->error);
                t->refused += x->bad;
                t->stopped += (x->stop = x->bad || roll(&d, 10) ? 0 : 1 + roll(&d, x->count)) > 0;
                t->left += (x->leave = x->bad || roll(&d, 5) ? 0 : 1 + roll(&d, x->count)) > 0;
            }
        status = llmpar_trainer_step(s->trainer, &t->steps[p]);
    }
    return status;
}

/* Ids that it has where the caller does not end all texts. */
static int32_t ids_of(const text *x) { return x->leave ? x->leave : x->count; }

typedef struct ear { const text *x; int32_t heard; } ear;
static llmpar_status hear(void *user, int32_t id)
{
    ear *e = (ear *)user;
    if (e->heard >= e->x->count || e->x->ids[e->heard] != id) TEST_FAIL("id %d of a reply is %d, alone %d", (int)e->heard, (int)id, e->heard < e->x->count ? (int)e->x->ids[e->heard] : -1);
    e->heard++;
    return e->heard == e->x->stop ? LLMPAR_ERR_IO : e->heard == e->x->leave ? LLMPAR_END : LLMPAR_OK;
}

/* .. and what a generator says to it. */
static void speak(session *s, llmpar_generator *g, const talk *t, const text *texts, int32_t n, const char *name)
{
    llmpar_generate_desc desc[AT_ONCE];
    int32_t *ids[AT_ONCE], counts[AT_ONCE], longest = t->generator.positions ? t->generator.positions : t->positions;
    ear ears[AT_ONCE];
    llmpar_status want = LLMPAR_OK;
    for (int32_t i = 0; i < n; i++) {
        const text *x = &texts[i];
        int32_t tokens = x->desc.tokens ? x->desc.tokens : ROOM;
        const ear fresh = { x, 0 };
        ears[i] = fresh;
        desc[i] = x->desc;
        desc[i].on_token = hear;
        desc[i].user = &ears[i];
        ids[i] = (int32_t *)take(tokens > 0 && tokens <= ROOM ? (size_t)tokens : 1, sizeof **ids); /* exactly, for the address sanitizer */
        counts[i] = -1;
        if (x->bad || (int64_t)desc[i].prompt_count + tokens - 1 > longest) want = LLMPAR_ERR_ARGUMENT; /* before anything is done */
        else if (x->stop && x->stop <= ids_of(x) && !want) want = LLMPAR_ERR_IO;
    }
    llmpar_status got = llmpar_generator_run(g, desc, n, ids, counts);
    if (got != want) TEST_FAIL("%s: rank %d: %s, expected %s (%s)", name, s->ctx->rank, llmpar_status_string(got), llmpar_status_string(want), llmpar_last_error(s->ctx));
    llmpar_error_clear(&s->ctx->error);
    for (int32_t i = 0; i < n; i++) {
        const text *x = &texts[i];
        int right = got == LLMPAR_ERR_IO ? counts[i] <= ids_of(x) : counts[i] == (got ? 0 : ids_of(x));
        if (counts[i] != ears[i].heard || !right) TEST_FAIL("%s: rank %d, text %d: %d ids and %d heard, alone %d", name, s->ctx->rank, (int)i, (int)counts[i], (int)ears[i].heard, (int)x->count);
        else if (memcmp(ids[i], x->ids, (size_t)counts[i] * sizeof **ids)) TEST_FAIL("%s: rank %d, text %d: other ids than alone", name, s->ctx->rank, (int)i);
        free(ids[i]);
    }
}

static void refused_meanwhile(session *s, const talk *t)
{
    static const int32_t prompt[1];
    llmpar_generate_desc desc = { .prompt = prompt, .prompt_count = 1, .tokens = 1 };
    llmpar_generator *second;
    llmpar_step step;
    void *const *params;
    float logits[1];
    int32_t id, count;
    CHECK_STATUS(llmpar_llama_generate(s->model, s->fsdp, &desc, &id, &count), LLMPAR_ERR_ARGUMENT);
    CHECK_STATUS(llmpar_llama_logits(s->model, s->fsdp, prompt, 1, logits), LLMPAR_ERR_ARGUMENT);
    CHECK_STATUS(llmpar_generator_create(s->model, s->fsdp, &t->generator, &second), LLMPAR_ERR_ARGUMENT);
    CHECK_STATUS(llmpar_fsdp_unshard(s->fsdp, 0, &params), LLMPAR_ERR_ARGUMENT);
    CHECK_STATUS(llmpar_trainer_step(s->trainer, &step), LLMPAR_ERR_ARGUMENT);
    CHECK(second == NULL);
    llmpar_error_clear(&s->ctx->error);
}

typedef struct place { const talk *talk; const char *name; } place;
static llmpar_status repeated(session *s, void *user)
{
    const place *at = (const place *)user;
    const talk *t = at->talk;
    dice d = dice_of(t->seed, at->name);
    llmpar_status status = LLMPAR_OK;
    for (int p = 0; p < PHASES && !status; p++) {
        llmpar_generator *g = NULL;
        llmpar_step step;
        const text *next = t->texts[p];
        status = llmpar_generator_create(s->model, s->fsdp, &t->generator, &g);
        for (int i = 0; i < TURNS && !status; next += t->turns[p][i++]) {
            speak(s, g, t, next, t->turns[p][i], at->name);
            if (!roll(&d, 6)) refused_meanwhile(s, t);
            if (roll(&d, 10)) continue;
            CHECK_OK(llmpar_generator_destroy(g));
            status = llmpar_generator_create(s->model, s->fsdp, &t->generator, &g);
        }
        CHECK_OK(llmpar_generator_destroy(g));
        if (!status) status = llmpar_trainer_step(s->trainer, &step);
        if (!status && (memcmp(&step.loss, &t->steps[p].loss, sizeof step.loss) || memcmp(&step.grad_norm, &t->steps[p].grad_norm, sizeof step.grad_norm)))
            TEST_FAIL("%s: rank %d: step %d behind a generator: loss %.17g, norm %.17g; without %.17g, %.17g", at->name, s->ctx->rank, p + 1, step.loss, step.grad_norm, t->steps[p].loss, t->steps[p].grad_norm);
    }
    return status;
}

static void quiet(void *user, llmpar_sink_kind kind, const char *line) { (void)user, (void)kind, (void)line; }
static void make_talk(talk *t, uint64_t seed)
{
    dice d = dice_of(seed, "talk");
    memset(t, 0, sizeof *t);
    t->seed = seed;
    t->positions = PICK(&d, 40, 72, LONGEST);
    t->dtype = (llmpar_dtype)PICK(&d, LLMPAR_F32, LLMPAR_F32, LLMPAR_BF16, LLMPAR_F16);
    t->cpu = llmpar_cpu_level_name((llmpar_cpu_level)(1 + roll(&d, (int32_t)llmpar_cpu_best_level())));
    t->freeze = !roll(&d, 4);
    t->generator.positions = roll(&d, 3) ? 0 : t->positions - roll(&d, t->positions / 2);
    t->generator.texts = PICK(&d, 0, 1, 2, 3, 6);
    llmpar_llama_config c = { .family = (llmpar_family)PICK(&d, LLMPAR_FAMILY_LLAMA, LLMPAR_FAMILY_QWEN2, LLMPAR_FAMILY_QWEN3), .max_positions = t->positions, .rms_eps = 1e-5, .rope_theta = 10000, .bos_id = -1, .init_std = 0.2 };
    c.tied = roll(&d, 2), c.vocab = 40 + roll(&d, 60);
    c.hidden = t->dtype == LLMPAR_F32 ? PICK(&d, 30, 38, 64) : PICK(&d, 28, 36, 64);
    c.intermediate = 2 * (12 + roll(&d, 50));
    c.layers = 1 + roll(&d, 3), c.kv_heads = PICK(&d, 1, 2, 4), c.heads = c.kv_heads * PICK(&d, 1, 2, 3);
    c.heads <<= c.heads & 1; /* tp 2 */
    c.head_dim = PICK(&d, 4, 6, 10, 16);
    c.eos_count = roll(&d, 4);
    for (int32_t i = 0; i < c.eos_count; i++) c.eos_id[i] = (i * 17 + roll(&d, 17)) % c.vocab;
    t->config = c;
}

static void launch_on(talk *t, const char *name, const llmpar_mesh_desc *mesh, dice *d, llmpar_status (*body)(session *, void *), const llmpar_backend *backend)
{
    place at = { t, name };
    job j = { .config = &t->config, .mesh = *mesh, .body = body, .user = body == said ? (void *)t : &at };
    llmpar_trainer_desc r = { .seq_len = t->positions, .batch = 4, .lr = 1e-2, .dtype = t->dtype, .freeze = t->freeze, .sequence = talk_sequence, .sequence_user = t, .sink = quiet, .offload_dir = "/tmp" };
    llmpar_launch_desc launch = { .ranks = degree(mesh->dp_replicate) * degree(mesh->dp_shard) * degree(mesh->tp), .cpu = t->cpu, .backend = backend, .check = no_leak };
    llmpar_error error;
    if (d) {
        j.wrap = t->freeze /* counts units */ ? 0 : PICK(d, 0, 2, LLMPAR_WRAP_HALF);
        r.zero = roll(d, 5), r.prefetch = roll(d, 3), r.sequence_parallel = roll(d, 2), r.overlap = !roll(d, 3);
        for (int i = 0; i < LLMPAR_STATE_COUNT; i++) r.offload[i] = (llmpar_tier)PICK(d, 0, 0, 1, 2);
        if ((t->dtype == LLMPAR_F32 || t->freeze) && (mesh->dp_shard < 2 || (r.zero && r.zero != LLMPAR_ZERO_3))) r.offload[LLMPAR_STATE_PARAMS] = LLMPAR_TIER_DEVICE; /* these have no masters to offload */
    }
    j.trainer = r;
    if (llmpar_launch(&launch, run_rank, &j, &error)) TEST_FAIL("%s: rank %d (%s): %s", name, error.rank, error.where, error.text);
}

static void converse(talk *t, uint64_t seed, const llmpar_backend *backend)
{
    static const struct { const char *name; llmpar_mesh_desc mesh; } at[] = { { "one rank", { .tp = 1 } }, { "tp 2", { .tp = 2 } }, { "dp_shard 2", { .dp_shard = 2 } }, { "2x2", { .dp_shard = 2, .tp = 2 } }, { "2x2 replicated", { .dp_replicate = 2, .dp_shard = 2 } } };
    dice d = dice_of(seed, "meshes");
    int before = test_failures, one = 1 + roll(&d, 4);
    make_talk(t, seed);
    launch_on(t, "alone", &at[0].mesh, NULL, said, NULL);
    for (int i = 0; i < 5; i++) if (backend ? i == one : i != one) launch_on(t, at[i].name, &at[i].mesh, &d, repeated, backend);
    if (test_failures != before) fprintf(stderr, "in the conversation of seed %llu: dtype %d, %s, family %d\n", (unsigned long long)seed, (int)t->dtype, t->cpu, (int)t->config.family);
}

static void converse_all(uint64_t seed, int rounds, const llmpar_backend *backend)
{
    talk *t = (talk *)take(1, sizeof *t);
    int32_t interleaved = 0, stopped = 0, left = 0, refused = 0;
    for (uint64_t end = seed + (uint64_t)rounds; seed < end; seed++) {
        converse(t, seed, backend);
        interleaved += t->interleaved, stopped += t->stopped, left += t->left, refused += t->refused;
    }
    CHECK(interleaved && stopped && left && refused);
    free(t);
}

TEST(conversations) { converse_all(1, test_rounds(24), NULL); }
TEST(apart) /* on a device whose memory the host cannot touch */
{
    apart_report report = { .leaked = 0 };
    llmpar_backend backend;
    apart_backend(&report, &backend);
    converse_all(101, test_rounds(8), &backend);
    CHECK_INT(report.leaked + report.host_leaked, 0);
}

TEST_LIST(T_(conversations), T_(apart))
