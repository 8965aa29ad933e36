/* model: a model on a mesh of thread ranks, one step of it by hand, and reference numbers from files; for the tests that compare a model with what others computed. */
#ifndef MODEL_H
#define MODEL_H

#include "test.h"
#include <math.h>

/* ---- one model on one mesh ---- */

typedef struct session {
    llmpar_ctx *ctx;
    llmpar_mesh *mesh;
    llmpar_llama *model;
    llmpar_trainer *trainer;
    llmpar_fsdp *fsdp;
} session;

typedef struct job {
    const char *directory;               /* weights; NULL: those of `config` and seed 7 */
    const llmpar_llama_config *config;
    llmpar_mesh_desc mesh;
    llmpar_trainer_desc trainer;
    llmpar_status (*body)(session *s, void *user);
    void *user;
    int32_t wrap;                        /* of the model's desc */
    int64_t logits_bytes;
} job;

static inline void no_leak(const llmpar_ctx *ctx, void *user)
{
    (void)user;
    CHECK_INT(ctx->heap.live, 0);
}

static inline llmpar_status run_rank(llmpar_ctx *ctx, void *user)
{
    const job *j = (const job *)user;
    session s = { ctx, NULL, NULL, NULL, NULL };
    llmpar_llama_config config;
    llmpar_llama_desc desc = { .config = j->config ? j->config : &config, .seed = 7, .wrap = j->wrap, .logits_bytes = j->logits_bytes };
    llmpar_status status = j->config ? LLMPAR_OK : llmpar_hf_config(ctx, j->directory, &config);
    if (!status) status = llmpar_mesh_create(ctx, &j->mesh, &s.mesh);
    if (!status) status = llmpar_llama_create(ctx, &desc, &s.model);
    if (!status) status = llmpar_parallelize(s.mesh, s.model, &j->trainer, &s.trainer);
    if (!status) s.fsdp = llmpar_trainer_fsdp(s.trainer);
    if (!status && j->directory) status = llmpar_load_hf(s.trainer, j->directory);
    if (!status) status = j->body(&s, j->user);
    llmpar_trainer_destroy(s.trainer);
    llmpar_llama_destroy(s.model);
    llmpar_mesh_destroy(s.mesh);
    return status;
}

static inline int32_t degree(int32_t d) { return d ? d : 1; }

static inline llmpar_status launch(const job *j, llmpar_error *error)
{
    llmpar_launch_desc desc = { .ranks = degree(j->mesh.dp_replicate) * degree(j->mesh.dp_shard) * degree(j->mesh.tp), .check = no_leak };
    return llmpar_launch(&desc, run_rank, (void *)j, error);
}

static inline void launch_ok(const job *j)
{
    llmpar_error error;
    if (launch(j, &error)) TEST_FAIL("rank %d (%s): %s", error.rank, error.where, error.text);
}

static inline void *take(size_t count, size_t size)
{
    void *p = calloc(count ? count : 1, size);
    if (!p) { fprintf(stderr, "out of memory\n"); exit(1); }
    return p;
}

/* ---- a model that talks: two layers, 8 heads on 2 kv heads, no id ends a text ---- */

static inline llmpar_llama_config talk_config(llmpar_family family, int tied, int32_t hidden, int32_t intermediate, int32_t head_dim, int32_t vocab, int32_t positions)
{
    llmpar_llama_config c;
    memset(&c, 0, sizeof c);
    c.family = family;
    c.tied = tied;
    c.vocab = vocab;
    c.hidden = hidden;
    c.intermediate = intermediate;
    c.layers = 2;
    c.heads = 8;
    c.kv_heads = 2;
    c.head_dim = head_dim;
    c.max_positions = positions;
    c.rms_eps = 1e-5;
    c.rope_theta = 10000;
    c.bos_id = -1;
    c.init_std = 0.15;
    return c;
}

/* ---- one step by hand: a schedule over this rank's part of a global batch ---- */

/* B sequences of T; targets < 0 do not count. */
typedef struct batch { const int32_t *ids, *targets; int64_t sequences, t; } batch;

static inline int64_t largest_power_of_two(int64_t n) /* that divides n */
{
    return n & -n;
}

/* token_loss: [B/dp, T] of this rank, or NULL. */
static inline llmpar_status step(session *s, const batch *b, int forward_only, llmpar_run *run, double *token_loss)
{
    llmpar_device *device = s->ctx->device;
    llmpar_arena *arena = llmpar_fsdp_arena(s->fsdp);
    int64_t sequences = b->sequences / s->mesh->dp_ranks, count = sequences * b->t, first = s->mesh->dp_rank * count;
    size_t bytes = (size_t)count * sizeof(int32_t);
    void *ids = NULL, *targets = NULL, *losses = NULL;
    llmpar_stream *stream = NULL;
    llmpar_schedule *schedule = NULL;
    llmpar_policy policy;
    llmpar_micro micro;
    memset(&policy, 0, sizeof policy);
    memset(&micro, 0, sizeof micro);
    policy.forward_only = forward_only;
    llmpar_fsdp_policy(s->fsdp, &policy);
    llmpar_status status = device->stream_create(device, "test", &stream);
    if (!status) status = llmpar_arena_alloc(arena, LLMPAR_TAG_ACTIVATIONS, bytes, "ids", &ids);
    if (!status) status = llmpar_arena_alloc(arena, LLMPAR_TAG_ACTIVATIONS, bytes, "targets", &targets);
    if (!status && token_loss) status = llmpar_arena_alloc(arena, LLMPAR_TAG_ACTIVATIONS, (size_t)count * sizeof(double), "losses", &losses);
    if (!status) status = device->copy(device, stream, ids, b->ids + first, bytes);
    if (!status) status = device->copy(device, stream, targets, b->targets + first, bytes);
    if (!status) status = device->synchronize(device, stream);
    const llmpar_unit *units = NULL;
    int32_t unit_count = llmpar_fsdp_unit_count(s->fsdp);
    if (!status) {
        units = llmpar_llama_units(s->model, NULL);
        status = llmpar_schedule_create(&s->ctx->heap, units, unit_count, &policy, &schedule, &s->ctx->error);
    }
    micro.batch = sequences;
    micro.t = b->t;
    micro.leaves = largest_power_of_two(b->sequences) / s->mesh->dp_ranks;
    micro.ids = (const int32_t *)ids;
    micro.targets = (const int32_t *)targets;
    micro.token_loss = (double *)losses;
    run->micro = &micro;
    run->tokens = 0;
    for (int64_t i = 0; i < count; i++) run->tokens += b->targets[first + i] >= 0;
    if (!status) status = llmpar_fsdp_run(s->fsdp, schedule->list, schedule->count, run);
    if (!status && token_loss) status = device->copy(device, stream, token_loss, losses, (size_t)count * sizeof(double));
    if (!status) status = device->synchronize(device, stream);
    llmpar_schedule_destroy(schedule);
    llmpar_arena_free(arena, losses);
    llmpar_arena_free(arena, targets);
    llmpar_arena_free(arena, ids);
    if (stream) device->stream_destroy(device, stream);
    return status;
}

/* Copies of every unit's gradient shard. */
typedef struct gradients { void **shard; } gradients;

static inline llmpar_status keep_gradient(void *user, llmpar_fsdp *fsdp, int32_t unit, const void *shard)
{
    gradients *g = (gradients *)user;
    int64_t elements;
    llmpar_fsdp_shard(fsdp, unit, &elements, NULL, NULL);
    size_t bytes = (size_t)elements * llmpar_dtype_size(llmpar_fsdp_dtype(fsdp));
    if (g->shard[unit]) TEST_FAIL("unit %d: a second gradient", unit);
    g->shard[unit] = take(bytes, 1);
    memcpy(g->shard[unit], shard, bytes);
    return LLMPAR_OK;
}

static inline void drop_gradients(session *s, gradients *g)
{
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(s->fsdp); u++) free(g->shard[u]);
    free(g->shard);
}

/* The whole tensor in f64 out of a shard-sized buffer; to be freed. Collective. */
static inline double *whole(session *s, int32_t unit, int32_t param, void *shard, llmpar_dtensor *tensor, int64_t *elements)
{
    llmpar_fsdp_dtensor(s->fsdp, unit, param, tensor);
    size_t size = llmpar_dtype_size(tensor->dtype);
    llmpar_device *device = s->ctx->device;
    llmpar_stream *stream = NULL;
    CHECK(llmpar_extent_product(tensor->shape, tensor->dims, elements));
    void *full = take((size_t)*elements, size), *scratch = take((size_t)llmpar_dtensor_full_scratch(tensor, s->mesh), size);
    double *out = (double *)take((size_t)*elements, sizeof *out);
    CHECK_OK(device->stream_create(device, "whole", &stream));
    CHECK_OK(llmpar_dtensor_full(tensor, s->mesh, stream, llmpar_fsdp_local(s->fsdp, unit, param, shard), scratch, full));
    CHECK_OK(device->synchronize(device, stream));
    device->stream_destroy(device, stream);
    CHECK(llmpar_convert(out, LLMPAR_F64, full, tensor->dtype, (size_t)*elements));
    free(scratch);
    free(full);
    return out;
}

/* ---- reference numbers ---- */

static inline char *read_text(const char *path, size_t *length)
{
    FILE *f = fopen(path, "rb");
    char *text;
    if (!f) { TEST_FAIL("cannot read %s", path); *length = 0; return (char *)take(1, 1); }
    fseek(f, 0, SEEK_END);
    *length = (size_t)ftell(f);
    rewind(f);
    text = (char *)take(*length + 1, 1);
    if (fread(text, 1, *length, f) != *length) TEST_FAIL("cannot read %s", path);
    fclose(f);
    return text;
}

static inline llmpar_json *read_json(llmpar_heap *heap, const char *path)
{
    size_t length;
    char *text = read_text(path, &length);
    llmpar_json *root = NULL;
    llmpar_heap_init(heap, NULL);
    CHECK_OK(llmpar_json_parse(heap, text, length, NULL, &root, NULL));
    free(text);
    return root;
}

static inline double number(const llmpar_json *object, const char *key)
{
    const llmpar_json *value = llmpar_json_get(object, key);
    if (!value || value->type != LLMPAR_JSON_NUMBER) { TEST_FAIL("no number \"%s\"", key); return 0; }
    return value->number;
}

/* Numbers of an array, nested ones one after the other; returns how many. */
static inline int numbers(const llmpar_json *array, double *out, int capacity)
{
    int n = 0;
    if (!array) return 0;
    for (const llmpar_json *v = array->child; v; v = v->next) {
        if (v->type == LLMPAR_JSON_ARRAY) n += numbers(v, out + n, capacity - n);
        else if (n < capacity) out[n++] = v->number;
    }
    return n;
}

static inline int integers(const llmpar_json *array, int32_t *out, int capacity)
{
    double *value = (double *)take((size_t)capacity, sizeof *value);
    int n = numbers(array, value, capacity);
    for (int i = 0; i < n; i++) out[i] = (int32_t)value[i];
    free(value);
    return n;
}

static inline void check_relative(const char *what, double got, double want, double bound)
{
    double off = fabs(got - want) / fabs(want);
    if (!(off <= bound)) TEST_FAIL("%s: got %.17g, want %.17g, off by %.3g of it, allowed %.3g", what, got, want, off, bound);
}

/* got[count] against tensor `name` of a file: the largest difference within `bound` of the tensor's largest magnitude. */
static inline void check_tensor(const llmpar_safetensors *file, const char *name, const double *got, int64_t count, double bound)
{
    const llmpar_safetensor *tensor = llmpar_safetensors_find(file, name);
    double largest = 0, off = 0;
    int64_t worst = 0, n = 1;
    if (!tensor || (tensor->dtype != LLMPAR_F64 && tensor->dtype != LLMPAR_F32)) { TEST_FAIL("%s: no f64 or f32 tensor \"%s\"", file->path, name); return; }
    for (int i = 0; i < tensor->dims; i++) n *= tensor->shape[i];
    CHECK_INT(count, n);
    double *want = (double *)take((size_t)n, sizeof *want);
    void *raw = take((size_t)n, llmpar_dtype_size(tensor->dtype));
    CHECK_OK(llmpar_safetensors_read(file, tensor, 0, tensor->bytes, raw, NULL));
    CHECK(llmpar_convert(want, LLMPAR_F64, raw, tensor->dtype, (size_t)n));
    free(raw);
    for (int64_t i = 0; i < n; i++) {
        double d = fabs(got[i] - want[i]);
        if (fabs(want[i]) > largest) largest = fabs(want[i]);
        if (!(d <= off)) off = d, worst = i;
    }
    if (!(off <= bound * largest)) TEST_FAIL("%s[%lld]: got %.17g, want %.17g, off by %.3g of the largest %.3g, allowed %.3g", name, (long long)worst, got[worst], want[worst], off / largest, largest, bound);
    free(want);
}

/* dlogits carry the one f32 value 1/N (docs/exact.md), so in f64 every gradient differs from the mathematical one by exactly this factor. */
static inline double scale_rounding(int64_t tokens) { return (double)(float)(1.0 / (double)tokens) * (double)tokens; }

#endif
