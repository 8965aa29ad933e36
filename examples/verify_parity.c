/* verify_parity: is it the same model? Runs a model twice, as configurations a and b (meshes, types, policies, devices' levels), or compares one run with saved tensors, as transformers can write them: logits and how often the likeliest tokens
   agree, every layer's activations, the loss, every parameter's gradient; and names the first tensor that is further away than rounding brings it.

   cc -O3 -I. examples/verify_parity.c -o build/verify_parity -lpthread -lm       (or: make build/verify_parity)
   build/verify_parity --model DIR --tokens ids.u32 --seq-len 256 --a tp=1 --b dp-shard=2,tp=2,dtype=bf16
   build/verify_parity --model DIR --tokens ids.u32 --seq-len 256 --b tp=2 --reference saved        see docs/parity.md */
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"

#include <getopt.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/options.h"
#include "common/parity.h"
#include "common/parity_report.h"
#include "common/parity_run.h"
#include "common/policy.h"

/* ---- saved tensors ---- */

/* One tensor of a reference: floating, of this shape. 0 or 2. */
static int reference_tensor(const llmpar_safetensors *file, const char *name, int32_t dims, const int64_t *shape, source *out)
{
    char got[160] = "", expected[160] = "";
    const llmpar_safetensor *t = llmpar_safetensors_find(file, name);
    if (!t) return option_error("verify_parity: %s: tensor \"%s\" is missing", file->path, name);
    int same = t->dims == dims;
    for (int32_t i = 0; i < t->dims; i++) snprintf(got + strlen(got), sizeof got - strlen(got), "%s%lld", i ? "," : "", (long long)t->shape[i]);
    for (int32_t i = 0; i < dims; i++) {
        snprintf(expected + strlen(expected), sizeof expected - strlen(expected), "%s%lld", i ? "," : "", (long long)shape[i]);
        same = same && t->shape[i] == shape[i];
    }
    if (!same) return option_error("verify_parity: %s: tensor \"%s\" has shape [%s], expected [%s]", file->path, name, got, expected);
    if (t->dtype < LLMPAR_F32 || t->dtype > LLMPAR_F16) return option_error("verify_parity: %s: tensor \"%s\" has dtype %s, expected f32, f64, bf16 or f16", file->path, name, llmpar_dtype_name(t->dtype));
    out->tensors = file;
    out->tensor = t;
    out->dtype = t->dtype;
    out->count = 1;
    for (int32_t i = 0; i < dims; i++) out->count *= shape[i];
    return 0;
}

static int reference_is(const char *directory, const char *name)
{
    char path[4200];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    return llmpar_file_kind(NULL, path) != LLMPAR_IO_NONE;
}

/* *out stays NULL where there is no such file. path is kept by the caller. */
static int reference_file(llmpar_heap *heap, const char *directory, const char *name, char *path, size_t bytes, llmpar_safetensors **out)
{
    llmpar_error error;
    llmpar_error_clear(&error);
    snprintf(path, bytes, "%s/%s", directory, name);
    if (!reference_is(directory, name)) return 0;
    return llmpar_safetensors_open(heap, NULL, path, out, &error) ? fail("--reference", &error) : 0;
}

static int reference_loss(llmpar_heap *heap, const char *directory, const job *j, outcome *out)
{
    char path[4200], *text = NULL;
    size_t bytes;
    llmpar_json *root = NULL;
    llmpar_json_desc desc = {0, 1, path};
    llmpar_error error;
    llmpar_error_clear(&error);
    if (!reference_is(directory, "loss.json")) return 0;
    snprintf(path, sizeof path, "%s/loss.json", directory);
    llmpar_status status = llmpar_file_load(heap, NULL, path, 1 << 20, &text, &bytes, &error);
    if (!status) status = llmpar_json_parse(heap, text, bytes, &desc, &root, &error);
    llmpar_heap_free(heap, text);
    const llmpar_json *loss = status ? NULL : llmpar_json_get(root, "loss"), *tokens = status ? NULL : llmpar_json_get(root, "tokens");
    if (!status && (!loss || loss->type != LLMPAR_JSON_NUMBER)) status = llmpar_error_set(&error, LLMPAR_ERR_FORMAT, "%s: expected an object with the number \"loss\"", path);
    if (!status && tokens && (tokens->type != LLMPAR_JSON_NUMBER || !tokens->is_integer || tokens->integer != j->sequences * j->length))
        status = llmpar_error_set(&error, LLMPAR_ERR_FORMAT, "%s: \"tokens\" is not the %lld predicted tokens of --tokens", path, (long long)(j->sequences * j->length));
    if (!status) {
        out->has_loss = 1;
        out->loss = loss->number;
    }
    llmpar_json_destroy(heap, root);
    return status ? fail("--reference", &error) : 0;
}

/* Before anything runs: files that are there have to be whole and fit the model; gradients are looked at later, when b's are there. */
static int reference_open(llmpar_heap *heap, const char *directory, const job *j, char paths[3][4200], outcome *out)
{
    const int64_t logits[] = {j->sequences, j->length, j->vocab}, activations[] = {j->sequences, j->length, j->hidden};
    out->saved = 1;
    out->name = "reference";
    out->text = directory;
    out->gradient_scale = 1;
    if (!llmpar_is_directory(directory)) return option_error("--reference: %s: no such directory", directory);
    if (reference_file(heap, directory, "logits.safetensors", paths[0], sizeof paths[0], &out->saved_logits)) return 2;
    if (reference_file(heap, directory, "grads.safetensors", paths[1], sizeof paths[1], &out->gradients)) return 2;
    if (reference_file(heap, directory, "activations.safetensors", paths[2], sizeof paths[2], &out->saved_activations)) return 2;
    if (!out->saved_logits && !out->gradients && !out->saved_activations && !reference_is(directory, "loss.json"))
        return option_error("--reference: %s: none of logits.safetensors, grads.safetensors, activations.safetensors, loss.json is there", directory);
    if (out->saved_logits && reference_tensor(out->saved_logits, "logits", 3, logits, &out->logits)) return 2;
    out->activation = (source *)calloc((size_t)j->points, sizeof *out->activation);
    if (!out->activation) return option_error("verify_parity: out of memory");
    int32_t known = 0;
    for (int64_t point = 0; out->saved_activations && point < j->points; point++) {
        char name[40];
        point_name(point, name, sizeof name);
        if (!llmpar_safetensors_find(out->saved_activations, name)) continue;
        if (reference_tensor(out->saved_activations, name, 3, activations, &out->activation[point])) return 2;
        known++;
    }
    if (out->saved_activations && known != out->saved_activations->count)
        return option_error("verify_parity: %s: %d tensors, of which %d are embed, layers.N or layers.N.attention of this model; expected no other", out->saved_activations->path, (int)out->saved_activations->count, (int)known);
    return reference_loss(heap, directory, j, out);
}

/* ---- the comparison ---- */

static void judge(entry *e, double relative, double largest, double bound)
{
    e->relative = e->m.finite ? relative : INFINITY;
    e->largest = e->m.finite ? largest : INFINITY;
    e->bound = bound;
    e->within = e->relative <= bound && e->largest <= bound;
}

static entry *add_entry(comparison *c, tensor_kind of, const char *name)
{
    entry *e = &c->entries[c->count++];
    memset(e, 0, sizeof *e);
    e->of = of;
    snprintf(e->name, sizeof e->name, "%s", name);
    return e;
}

static int by_place(const void *x, const void *y)
{
    const entry *a = (const entry *)x, *b = (const entry *)y;
    return a->place != b->place ? (a->place > b->place) - (a->place < b->place) : strcmp(a->name, b->name);
}

static llmpar_status compare_top(const job *j, comparison *c, llmpar_error *error)
{
    size_t v = (size_t)j->vocab;
    int64_t rows = j->sequences * j->length;
    char *raw = (char *)malloc(8 * v);
    float *x = (float *)malloc(sizeof(float) * v), *y = (float *)malloc(sizeof(float) * v);
    llmpar_status status = raw && x && y ? LLMPAR_OK : llmpar_error_set(error, LLMPAR_ERR_MEMORY, "out of memory");
    const source *sources[] = {&c->a->logits, &c->b->logits};
    for (int64_t row = 0; row < rows && !status; row++) {
        int32_t top[2][PARITY_TOP];
        int kept = 0;
        for (int side = 0; side < 2 && !status; side++) {
            float *logits = side ? y : x;
            status = source_raw(sources[side], row * j->vocab, j->vocab, raw, error);
            if (!status) llmpar_convert(logits, LLMPAR_F32, raw, sources[side]->dtype, v);
            if (!status) kept = parity_top(logits, j->vocab, top[side]);
        }
        for (int i = 0; i < 3 && !status; i++) c->top[i] += parity_overlap(top[0], top[1], kept, i == 0 ? 1 : i == 1 ? 5 : 10) / (double)rows;
    }
    free(raw);
    free(x);
    free(y);
    return status;
}

/* A gradient tensor whose norm is nothing beside the whole gradient's has only rounding in it: its distance counts in parts of what rounding leaves there. */
static void judge_gradients(comparison *c, int32_t from, const job *j)
{
    double all = 0, most = 0;
    for (int32_t i = from; i < c->count; i++) {
        all += c->entries[i].m.reference2;
        if (c->entries[i].m.reference_most > most) most = c->entries[i].m.reference_most;
    }
    for (int32_t i = from; i < c->count; i++) {
        entry *e = &c->entries[i];
        double norm = sqrt(e->m.reference2), least = c->backward_unit * sqrt(all), least_most = c->backward_unit * most;
        judge(e, parity_ratio(sqrt(e->m.difference2), norm > least ? norm : least), parity_ratio(e->m.difference_most, e->m.reference_most > least_most ? e->m.reference_most : least_most),
              c->exact ? 0 : parity_bound(PARITY_BACKWARD, c->backward_unit, 2 * (j->points - 1)));
        if (c->exact) e->within = e->m.same;
    }
}

/* 0, or 2 with the line printed. */
static int compare_gradients(const job *j, comparison *c)
{
    const outcome *a = c->a, *b = c->b;
    int32_t from = c->count;
    llmpar_error error;
    llmpar_error_clear(&error);
    for (int32_t i = 0; i < b->gradients->count; i++) {
        const llmpar_safetensor *t = &b->gradients->tensor[i];
        source x, y;
        if (a->saved && reference_tensor(a->gradients, t->name, t->dims, t->shape, &x)) return 2;
        const llmpar_safetensor *other = llmpar_safetensors_find(a->gradients, t->name);
        if (!other) {
            c->only_b++;
            continue;
        }
        whole(a->gradients, other, &x);
        whole(b->gradients, t, &y);
        entry *e = add_entry(c, GRADIENT, t->name);
        e->place = parity_backward_place(t->name);
        if (parity_measure(&x, a->gradient_scale, &y, b->gradient_scale, &e->m, &error)) return fail("gradients", &error);
    }
    c->only_a = a->gradients->count - (c->count - from);
    if (a->saved && c->only_a)
        for (int32_t i = 0; i < a->gradients->count; i++)
            if (!llmpar_safetensors_find(b->gradients, a->gradients->tensor[i].name)) return option_error("verify_parity: %s: tensor \"%s\" is no parameter with a gradient in b", a->gradients->path, a->gradients->tensor[i].name);
    qsort(c->entries + from, (size_t)(c->count - from), sizeof *c->entries, by_place);
    judge_gradients(c, from, j);
    return 0;
}

static int compare_forward(const job *j, comparison *c)
{
    llmpar_error error;
    llmpar_error_clear(&error);
    for (int64_t point = 0; point < j->points; point++) {
        char name[40];
        if (!source_is(&c->a->activation[point]) || !source_is(&c->b->activation[point])) continue;
        point_name(point, name, sizeof name);
        entry *e = add_entry(c, ACTIVATION, name);
        if (parity_measure(&c->a->activation[point], 1, &c->b->activation[point], 1, &e->m, &error)) return fail("activations", &error);
        judge(e, parity_ratio(sqrt(e->m.difference2), sqrt(e->m.reference2)), parity_ratio(e->m.difference_most, e->m.reference_most), c->exact ? 0 : parity_bound(PARITY_FORWARD, c->forward_unit, point));
        if (c->exact) e->within = e->m.same;
    }
    double bound = c->exact ? 0 : parity_bound(PARITY_FORWARD, c->forward_unit, j->points), most = 0;
    if (source_is(&c->a->logits)) {
        entry *e = add_entry(c, LOGITS, "logits");
        if (parity_measure(&c->a->logits, 1, &c->b->logits, 1, &e->m, &error) || compare_top(j, c, &error)) return fail("logits", &error);
        judge(e, parity_ratio(sqrt(e->m.difference2), sqrt(e->m.reference2)), parity_ratio(e->m.difference_most, e->m.reference_most), bound);
        if (c->exact) e->within = e->m.same;
        c->logits_absolute = e->m.absolute / (double)e->m.count;
        c->logits_most = e->m.difference_most;
        most = e->m.reference_most;
    }
    if (c->a->has_loss) { /* a mean of differences of logits: its error is a part of theirs, not of its own size, which may be near 0 */
        entry *e = add_entry(c, LOSS, "loss");
        double difference = fabs(c->b->loss - c->a->loss), size = fabs(c->a->loss) > most ? fabs(c->a->loss) : most;
        e->m.same = c->a->loss == c->b->loss;
        e->m.finite = isfinite(c->a->loss) && isfinite(c->b->loss);
        e->m.count = 1;
        e->m.difference_most = difference;
        judge(e, parity_ratio(difference, size), parity_ratio(difference, size), bound);
        if (c->exact) e->within = e->m.same;
    }
    return 0;
}

/* a is a run (how_a) or the reference (NULL). 0, or 2 with the line printed. */
static int compare(const job *j, const outcome *a, const configuration *how_a, const outcome *b, const configuration *how_b, comparison *c)
{
    const llmpar_llama_config *config = &how_b->config;
    memset(c, 0, sizeof *c);
    c->a = a;
    c->b = b;
    c->entries = (entry *)calloc((size_t)j->points + 2 + (b->gradients ? (size_t)b->gradients->count : 0), sizeof *c->entries);
    if (!c->entries) return option_error("verify_parity: out of memory");
    c->exact = how_a && a->exact && b->exact && how_a->policy.dtype == how_b->policy.dtype && how_a->policy.chain == how_b->policy.chain && (!how_a->policy.chain || how_a->grad_accum == how_b->grad_accum) &&
               !strcmp(how_a->model, how_b->model) && how_a->policy.loss_scale.scale == how_b->policy.loss_scale.scale && !strcmp(how_a->cpu ? how_a->cpu : "", how_b->cpu ? how_b->cpu : "");
    llmpar_dtype type = how_a ? how_a->policy.dtype : a->computed ? a->computed : source_is(&a->logits) ? a->logits.dtype : a->gradients && a->gradients->count ? a->gradients->tensor[0].dtype : LLMPAR_F32;
    c->forward = parity_narrower(type, how_b->policy.dtype);
    c->backward = c->forward;
    if (how_a && how_a->policy.reduce_dtype != LLMPAR_DTYPE_DEFAULT) c->backward = parity_narrower(c->backward, how_a->policy.reduce_dtype);
    if (how_b->policy.reduce_dtype != LLMPAR_DTYPE_DEFAULT) c->backward = parity_narrower(c->backward, how_b->policy.reduce_dtype);
    c->forward_terms = most(most(config->hidden, config->intermediate), most((int64_t)config->heads * config->head_dim, j->length));
    c->backward_terms = most(most(c->forward_terms, config->vocab), j->sequences * j->length);
    c->forward_unit = parity_unit(c->forward, c->forward_terms);
    c->backward_unit = parity_unit(c->backward, c->backward_terms);
    if (!how_a) { /* transformers takes the angles of RoPE in f32: off by up to position * 2^-24 in the fastest pair, by less in every further one; a part of that reaches the scores */
        c->forward_unit += (double)j->length * 0x1p-30;
        c->backward_unit += (double)j->length * 0x1p-30;
    }
    if (compare_forward(j, c) || (a->gradients && compare_gradients(j, c))) return 2;
    c->first_outside = -1;
    c->same = 1;
    for (int32_t i = 0; i < c->count; i++) {
        c->same &= c->entries[i].m.same;
        if (!c->entries[i].within && c->first_outside < 0) c->first_outside = i;
    }
    c->within = c->first_outside < 0;
    return 0;
}

/* ---- the command line ---- */

static void usage(void)
{
    puts("usage: verify_parity --model DIR --tokens FILE --seq-len N [--a LIST] [--b LIST] [--reference DIR] [options]\n"
         "Runs configuration b and compares it with configuration a, or with saved tensors, or with both: logits, the likeliest tokens, activations behind every layer, loss, the gradient of every parameter.\n"
         "  --model DIR       Hugging Face directory\n"
         "  --tokens FILE     ids as u32, least byte first; each N + 1 of them are one sequence, all sequences are one batch\n"
         "  --seq-len N       tokens a sequence that are read; each has the next as its target\n"
         "  --a LIST          a configuration, see below; not given: only --reference is compared with\n"
         "  --b LIST          the other (default: one rank, f32)\n"
         "  --reference DIR   compares b with DIR/logits.safetensors (tensor logits [B,T,V]), grads.safetensors (whole tensors, Hugging Face names), activations.safetensors (embed, layers.0 .. [B,T,D]) and loss.json\n"
         "                    ({\"loss\": mean over all predicted tokens}); those that are there. docs/parity.md has a script that writes them with transformers\n"
         "  --reference-dtype f32|f64|bf16|f16   in which the reference was computed (default: the type of its tensors)\n"
         "  --dump DIR        writes these files, in f32, from b\n"
         "  --json FILE       the comparison for programs\n"
         "  --help\n"
         "configuration: NAME=VALUE,NAME=VALUE ..; a comma inside a value is written +, as in offload=optimizer=file+params=host. Names are options of train_llama:\n"
         "  dp-replicate, dp-shard, tp, threads, grad-accum, and of the policy: sp zero reshard prefetch no-sync accumulate exact dtype reduce-dtype recompute freeze offload offload-dir overlap memory-limit optimizer clip\n"
         "  loss-scale wrap logits-bytes; further cpu=portable|avx2|avx512|avx512bf16, and model=DIR instead of --model, for the same model in other files\n"
         "bound: distances are |b - a| / |a| in Euclidean norms (relative) and max|b - a| / max|a| (largest). Where a and b add in the same order and the same types, the bound is 0: the same bits. Else it is\n"
         "  c u sqrt(1 + h), c = 8 (gradients: 16), u = store + sqrt(K) sum / 2: store and sum are the unit roundoffs of the narrower type and of the type its sums have (bf16 2^-8, f16 2^-11, f32 2^-24, f64 2^-53; sums below f32 in f32), K the\n"
         "  longest sum, h the halves of blocks that the number has come through. docs/parity.md has the reason and what was measured.\n"
         "memory: what a training step over the whole file takes (grad-accum=N makes it smaller), and a sequence's logits, T x V x 4 bytes a rank; on the disk ($TMPDIR, else /tmp), until the end and for each of a and b:\n"
         "  logits B x T x V x 4 bytes, activations B x T x D x (2 L + 1) numbers at most, the gradients\n"
         "exit code: 0 within the bound, 1 outside, 2 usage or input errors");
}

static int is_option(const char *name)
{
    static const struct option options[] = {POLICY_OPTIONS, {0, 0, 0, 0}};
    for (const struct option *o = options; o->name; o++)
        if (!strcmp(o->name, name)) return 1;
    return 0;
}

static int read_configuration(const char *name, const char *text, const char *model, configuration *c)
{
    static const char *const without_effect[] = {"trace", "schedule", "lr-min", "decay-steps", "weight-decay", "momentum"}; /* on the gradients of one step */
    static const struct { const char *name; size_t at; long most; } numbers[] = {{"dp-replicate", offsetof(configuration, dp_replicate), 4096}, {"dp-shard", offsetof(configuration, dp_shard), 4096}, {"tp", offsetof(configuration, tp), 4096},
                                                                                {"threads", offsetof(configuration, threads), 256}, {"grad-accum", offsetof(configuration, grad_accum), 1 << 16}};
    memset(c, 0, sizeof *c);
    c->name = name;
    c->text = text;
    c->model = model;
    c->dp_replicate = c->dp_shard = c->tp = c->grad_accum = 1; /* threads: 0, the cores / the ranks */
    c->words = strdup(text);
    if (!c->words) return option_error("verify_parity: out of memory");
    for (char *at = c->words, *next; *at; at = next) {
        size_t length = strcspn(at, ",");
        next = at + length + (at[length] == ',');
        if (at[length] == ',' && !*next) return option_error("--%s \"%s\": expected another option behind the comma", name, text);
        at[length] = 0;
        char *value = strchr(at, '=');
        if (!value) return option_error("--%s \"%s\": \"%s\": expected NAME=VALUE", name, text, at);
        *value++ = 0;
        for (char *p = value; *p; p++)
            if (*p == '+') *p = ',';
        int known = 0, bad = 0;
        for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
            if (!strcmp(at, numbers[i].name)) {
                char shown[40];
                snprintf(shown, sizeof shown, "--%s %s", name, at);
                bad = option_long(shown, value, 1, numbers[i].most, (long *)((char *)c + numbers[i].at));
                known = 1;
            }
        for (size_t i = 0; i < sizeof without_effect / sizeof without_effect[0]; i++)
            if (!strcmp(at, without_effect[i])) return option_error("--%s \"%s\": %s has no effect on what is compared, expected not", name, text, at);
        if (!strcmp(at, "cpu")) c->cpu = value, known = 1;
        if (!strcmp(at, "model")) c->model = value, known = 1;
        if (!known && !is_option(at)) return option_error("--%s \"%s\": \"%s\" is no option of a configuration, see --help", name, text, at);
        if (!known) bad = policy_option(at, value, &c->policy, &c->shape);
        if (bad) return bad;
    }
    if (c->policy.dtype == LLMPAR_DTYPE_DEFAULT) c->policy.dtype = LLMPAR_F32;
    if (c->dp_replicate * c->dp_shard * c->tp > 4096) return option_error("--%s \"%s\": %ld ranks, expected at most 4096", name, text, c->dp_replicate * c->dp_shard * c->tp);
    return 0;
}

static llmpar_status read_config(llmpar_ctx *ctx, void *user)
{
    configuration *c = (configuration *)user;
    return llmpar_hf_config(ctx, c->model, &c->config);
}

/* Everything that shows without running. */
static int check_configuration(configuration *c, const job *j, outcome *out)
{
    llmpar_launch_desc launch = {0};
    llmpar_trainer_desc desc, strict;
    llmpar_error error;
    llmpar_mesh mesh;
    launch.ranks = 1;
    launch.transport = LLMPAR_TRANSPORT_THREADS;
    launch.log = quiet_log;
    if (!llmpar_is_directory(c->model)) return option_error("verify_parity: %s: model %s: no such directory", c->name, c->model);
    if (llmpar_launch(&launch, read_config, c, &error)) return fail(c->name, &error);
    memset(&mesh, 0, sizeof mesh);
    for (int axis = 0; axis < LLMPAR_MESH_AXES; axis++) mesh.degree[axis] = 1;
    mesh.degree[LLMPAR_AXIS_DP_REPLICATE] = (int32_t)c->dp_replicate;
    mesh.degree[LLMPAR_AXIS_DP_SHARD] = (int32_t)c->dp_shard;
    mesh.degree[LLMPAR_AXIS_TP] = (int32_t)c->tp;
    mesh.dp_ranks = (int32_t)(c->dp_replicate * c->dp_shard);
    describe(c, j, &desc);
    desc.sequence = sequence;
    llmpar_error_clear(&error);
    strict = desc;
    if (llmpar_trainer_desc_resolve(&desc, &mesh, &c->config, &error)) return fail(c->name, &error);
    if (c->config.heads % c->tp) return option_error("verify_parity: %s: num_attention_heads = %d is not divisible by tp = %ld", c->name, (int)c->config.heads, c->tp);
    strict.exact = LLMPAR_EXACT_REQUIRE;
    out->exact = desc.exact != LLMPAR_EXACT_OFF && !llmpar_trainer_desc_resolve(&strict, &mesh, &c->config, &error);
    return 0;
}

typedef struct command { const char *model, *tokens, *a, *b, *reference, *dump, *json; long seq_len; } command;

/* Reads the ids; *rest of them make no sequence. */
static int read_tokens(llmpar_heap *heap, const char *path, job *j, char **text, int64_t *rest)
{
    llmpar_error error;
    size_t bytes;
    llmpar_error_clear(&error);
    if (llmpar_file_load(heap, NULL, path, (size_t)1 << 32, text, &bytes, &error)) return fail("--tokens", &error);
    if (bytes % 4) return option_error("verify_parity: --tokens: %s: %zu bytes, expected a multiple of 4 (ids as u32)", path, bytes);
    j->ids = (const unsigned char *)*text;
    j->sequences = (int64_t)(bytes / 4) / (j->length + 1);
    *rest = (int64_t)(bytes / 4) % (j->length + 1);
    if (!j->sequences) return option_error("verify_parity: --tokens: %s: %zu ids, expected at least seq-len + 1 = %lld", path, bytes / 4, (long long)j->length + 1);
    return 0;
}

static int check_model(const command *k, const job *j, const configuration *a, const configuration *b)
{
    if (k->a && (a->config.hidden != b->config.hidden || a->config.layers != b->config.layers || a->config.vocab != b->config.vocab))
        return option_error("verify_parity: a has %d layers, hidden %d, vocab %d; b has %d, %d, %d: expected the same model", (int)a->config.layers, (int)a->config.hidden, (int)a->config.vocab, (int)b->config.layers, (int)b->config.hidden,
                            (int)b->config.vocab);
    for (int64_t i = 0; i < j->sequences * (j->length + 1); i++)
        if (id_at(j->ids, i) >= (uint32_t)b->config.vocab) return option_error("verify_parity: --tokens: %s: id %lu at position %lld, expected at most %d", k->tokens, (unsigned long)id_at(j->ids, i), (long long)i, (int)b->config.vocab - 1);
    return 0;
}

static int make_folder(void)
{
    const char *place = getenv("TMPDIR");
    char path[sizeof folder];
    if (snprintf(path, sizeof path, "%s/verify_parity.XXXXXX", place && *place ? place : "/tmp") >= (int)sizeof path) return option_error("verify_parity: TMPDIR is too long");
    if (!mkdtemp(path)) return option_error("verify_parity: %s: cannot create: %s", path, strerror(errno));
    memcpy(folder, path, sizeof path);
    signal(SIGINT, folder_signal);
    signal(SIGTERM, folder_signal);
    signal(SIGHUP, folder_signal);
    return 0;
}

/* A folder that cannot be written is better found before. */
static int check_dump(const char *path)
{
    llmpar_error error;
    llmpar_error_clear(&error);
    int was_there = llmpar_is_directory(path);
    if (llmpar_directory_ensure(NULL, path, &error)) return fail("--dump", &error);
    if (!was_there) rmdir(path);
    return 0;
}

static int verify(const command *k, configuration how[2], outcome out[3], comparison results[2], llmpar_heap *heap, char **text, char paths[3][4200])
{
    job j;
    int64_t rest = 0;
    int count = 0, outside = 0;
    llmpar_error error;
    llmpar_error_clear(&error);
    memset(&j, 0, sizeof j);
    j.length = k->seq_len;
    if ((k->a && read_configuration("a", k->a, k->model, &how[0])) || read_configuration("b", k->b, k->model, &how[1]) || read_tokens(heap, k->tokens, &j, text, &rest)) return 2;
    for (int side = k->a ? 0 : 1; side < 2; side++)
        if (check_configuration(&how[side], &j, &out[side])) return 2;
    if (check_model(k, &j, &how[0], &how[1])) return 2;
    j.hidden = how[1].config.hidden;
    j.vocab = how[1].config.vocab;
    j.points = 2 * (int64_t)how[1].config.layers + 1;
    if (k->reference && reference_open(heap, k->reference, &j, paths, &out[2])) return 2;
    if ((k->dump && check_dump(k->dump)) || (k->json && write_json(k->json, NULL, 0, 1)) || make_folder()) return 2;
    if ((k->a && run(&how[0], &j, &out[0], heap)) || run(&how[1], &j, &out[1], heap)) return 2;
    if (k->a && compare(&j, &out[0], &how[0], &out[1], &how[1], &results[count++])) return 2;
    if (k->reference && compare(&j, &out[2], NULL, &out[1], &how[1], &results[count++])) return 2;
    if (k->dump && llmpar_directory_ensure(NULL, k->dump, &error)) return fail("--dump", &error);
    if (k->dump && dump(heap, k->dump, &j, &out[1])) return 2;
    if (k->json && write_json(k->json, results, count, 0)) return 2;
    printf("model      %s: %d layers, hidden %d, vocab %d\n", k->model, (int)how[1].config.layers, (int)j.hidden, (int)j.vocab);
    printf("tokens     %s: %lld sequences, %lld predicted tokens", k->tokens, (long long)j.sequences, (long long)(j.sequences * j.length));
    if (rest) printf("; the last %lld ids make no sequence and are not used", (long long)rest);
    putchar('\n');
    for (int i = 0; i < count; i++) {
        print_comparison(&results[i]);
        outside |= !results[i].within;
    }
    if (k->dump) printf("%sloss       %.9g; written to %s\n", count ? "\n" : "", out[1].loss, k->dump);
    return outside;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"model", 1, 0, 'm'}, {"tokens", 1, 0, 't'}, {"seq-len", 1, 0, 'T'}, {"a", 1, 0, 'a'}, {"b", 1, 0, 'b'}, {"reference", 1, 0, 'r'}, {"reference-dtype", 1, 0, 'R'}, {"dump", 1, 0, 'd'}, {"json", 1, 0, 'j'}, {"help", 0, 0, 'h'}, {0, 0, 0, 0}};
    static const char *const dtypes[] = {"f32", "f64", "bf16", "f16"};
    static const llmpar_dtype dtype[] = {LLMPAR_F32, LLMPAR_F64, LLMPAR_BF16, LLMPAR_F16};
    command k = {.b = ""};
    configuration how[2];
    outcome out[3];
    comparison results[2];
    llmpar_heap heap;
    char *text = NULL;
    static char paths[3][4200];
    int bad = 0, word = -1;
    for (int c; !bad && (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (c) {
        case 'm': k.model = optarg; break;
        case 't': k.tokens = optarg; break;
        case 'T': bad = option_long("--seq-len", optarg, 1, 1 << 24, &k.seq_len); break;
        case 'a': k.a = optarg; break;
        case 'b': k.b = optarg; break;
        case 'r': k.reference = optarg; break;
        case 'R': bad = option_word("--reference-dtype", optarg, dtypes, 4, &word); break;
        case 'd': k.dump = optarg; break;
        case 'j': k.json = optarg; break;
        case 'h': usage(); return 0;
        default: bad = 2; /* getopt_long has said what */
        }
    }
    if (!bad && optind < argc) bad = option_error("unexpected argument \"%s\", see --help", argv[optind]);
    if (!bad && !k.model) bad = option_error("--model is missing, see --help");
    if (!bad && !k.tokens) bad = option_error("--tokens is missing, see --help");
    if (!bad && !k.seq_len) bad = option_error("--seq-len is missing, see --help");
    if (!bad && !k.a && !k.reference && !k.dump) bad = option_error("expected at least one of --a, --reference and --dump, see --help");
    if (!bad && word >= 0 && !k.reference) bad = option_error("--reference-dtype without --reference, see --help");
    if (!bad && k.json && !k.a && !k.reference) bad = option_error("--json without --a and --reference: nothing is compared");
    if (bad) return 2;
    memset(how, 0, sizeof how);
    memset(out, 0, sizeof out);
    memset(results, 0, sizeof results);
    for (int i = 0; i < 3; i++) out[i].activation_file.handle = out[i].logit_file.handle = -1;
    if (word >= 0) out[2].computed = dtype[word];
    llmpar_heap_init(&heap, NULL);
    bad = verify(&k, how, out, results, &heap, &text, paths);
    for (int i = 0; i < 3; i++) outcome_end(&out[i]);
    for (int i = 0; i < 2; i++) {
        free(results[i].entries);
        free(how[i].words);
    }
    llmpar_heap_free(&heap, text);
    folder_remove();
    if (fflush(stdout) || ferror(stdout)) return option_error("verify_parity: cannot write to stdout");
    return bad;
}
