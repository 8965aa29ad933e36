#include "model/llama.h"
#include "model/llama_internal.h"

#include <stdio.h>
#include <string.h>

#include "base/math.h"
#include "base/rng.h"
#include "base/size.h"

#if !defined(LLMPAR_NO_LLAMA)

#define LLMPAR__TEXT_NO(...) llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, __VA_ARGS__)

/* Rows of one text that go together: the ids at `position` on. */
typedef struct llmpar__span { int64_t slot, position, count; } llmpar__span;

/* Inference under tensor parallelism: the block's forward with a KV cache, on parameters that stay gathered, and are lent to the session that generates.
   Buffers for at most `rows` rows at once, and for the logits of `head_rows` of them. `slots` texts are known at once, each of at most `capacity` ids: their ids, and their k, then v, for every layer, [slots][L][2][capacity, k*E]. */
typedef struct llmpar__session {
    llmpar_llama *model;
    llmpar_fsdp *fsdp;
    llmpar_device *device;
    llmpar_stream *stream;
    llmpar_tp tp;                  /* the model's, without sequence parallel */
    llmpar__shape s;               /* b = 1, t = rows */
    llmpar_dtype dtype;
    int64_t rows, head_rows, slots, capacity;
    llmpar__span *spans;           /* [slots]: of the rows that go now */
    size_t workspace_bytes, cache_bytes;
    void *block, *cache, *workspace; /* block: all activations */
    void *x, *h, *q, *o, *part, *sum, *rstd, *gate, *logits; /* q or o: behind a text's one row may come its k and v; part, rstd: sum type; sum: the reduced part, = part where they are of one type; gate: behind its rows, or each of them,
                                                                come those of up; k and v of several texts on their way into the cache */
    int32_t *ids;                  /* device [rows] */
    float *host;                   /* [head_rows, V] logits as f32 */
    void *gathered;                /* device [tp, head_rows, widest vocabulary part] */
    char *staging;                 /* host [staging_bytes], for copies: logits as they come, [tp, head_rows, widest part]; behind them all texts' ids by position */
    int32_t *host_ids;             /* [slots][capacity], in staging */
    size_t staging_bytes;
    void *const **params;          /* [units], each gathered while the session is open */
    int32_t unsharded_units;
    int lent;                      /* the parameters are this session's */
    llmpar_interleave_args *weights; /* [layers * 7 + 1], by llmpar__session_weight; NULL: they lie as ever */
    int32_t interleaved;           /* of these: all or none but while they are turned */
} llmpar__session;

enum { LLMPAR__SESSION_WEIGHTS = 7, LLMPAR__SESSION_MANY = 32 /* tokens: to turn the weights and back takes as long as 3 to 7 of them, each of which is then a fifth to a third faster */ };

static llmpar_status llmpar__session_memory(llmpar__session *g)
{
    const llmpar__shape *s = &g->s;
    const llmpar_llama_config *c = &g->model->config;
    llmpar_arena *arena = llmpar_fsdp_arena(g->fsdp);
    size_t at = 0;
    int64_t widest = (c->vocab + g->tp.ranks - 1) / g->tp.ranks;
    size_t x = llmpar__llama_take(&at, g->rows * s->d, s->size), h = llmpar__llama_take(&at, g->rows * s->d, s->size), part = llmpar__llama_take(&at, (int64_t)llmpar_tp_partial_bytes(&g->tp, 1, g->rows, s->d, g->dtype), 1);
    size_t sum = llmpar_tp_partial_dtype(&g->tp, g->dtype) == g->dtype ? part : llmpar__llama_take(&at, g->rows * s->d, s->size), rstd = llmpar__llama_take(&at, g->rows * s->h, s->sum_size);
    int64_t queries = (g->rows - g->slots) * s->h * s->e + g->slots * s->qkv;
    size_t q = llmpar__llama_take(&at, queries, s->size), o = llmpar__llama_take(&at, queries, s->size), gate = llmpar__llama_take(&at, 2 * g->rows * (s->f > s->k * s->e ? s->f : s->k * s->e), s->size);
    size_t logits = llmpar__llama_take(&at, g->head_rows * widest, s->size), gathered = llmpar__llama_take(&at, g->head_rows * widest * g->tp.ranks, s->size), ids = llmpar__llama_take(&at, g->rows, sizeof(int32_t));
    g->cache_bytes = (size_t)g->slots * (size_t)c->layers * (size_t)g->capacity * (size_t)(2 * s->k * s->e) * s->size;
    llmpar_status status = llmpar_arena_alloc(arena, LLMPAR_TAG_ACTIVATIONS, at, "generation", &g->block);
    if (!status) status = llmpar_arena_alloc(arena, LLMPAR_TAG_ACTIVATIONS, g->cache_bytes, "kv cache", &g->cache);
    if (!status) status = llmpar_arena_alloc(arena, LLMPAR_TAG_WORKSPACE, g->workspace_bytes, "generation", &g->workspace);
    if (status) return status;
    char *base = (char *)g->block;
    g->x = base + x;
    g->h = base + h;
    g->part = base + part;
    g->sum = base + sum;
    g->rstd = base + rstd;
    g->q = base + q;
    g->o = base + o;
    g->gate = base + gate;
    g->logits = base + logits;
    g->gathered = base + gathered;
    g->ids = (int32_t *)(void *)(base + ids);
    g->host = (float *)llmpar_heap_alloc(&g->model->ctx->heap, (size_t)g->head_rows, (size_t)c->vocab * sizeof(float));
    void *staging = NULL;
    size_t raw = ((size_t)(g->head_rows * widest * g->tp.ranks) * s->size + 63) / 64 * 64;
    g->staging_bytes = raw + (size_t)(g->slots * g->capacity) * sizeof(int32_t);
    status = llmpar_device_host_alloc(g->device, &g->model->ctx->heap, g->staging_bytes, &staging);
    if (!status) {
        g->staging = (char *)staging;
        g->host_ids = (int32_t *)(void *)(g->staging + raw);
    }
    return g->host && !status ? LLMPAR_OK : llmpar_fail(g->model->ctx, LLMPAR_ERR_MEMORY, "generation: no memory for %lld rows of logits", (long long)g->head_rows);
}

/* Where the cache has k of this layer from position 0 of a slot on; v: behind `capacity` of them. */
static char *llmpar__session_cache(const llmpar__session *g, int64_t slot, int32_t layer)
{
    return (char *)g->cache + (size_t)((slot * g->model->config.layers + layer) * g->capacity * 2 * g->s.k * g->s.e) * g->s.size;
}

/* Of the rows from `row` on, which are the span's. */
static void llmpar__session_attention(const llmpar__session *g, int32_t layer, const llmpar__span *span, int64_t row, int64_t ldq, llmpar_attention_args *args)
{
    const llmpar__shape *s = &g->s;
    memset(args, 0, sizeof *args);
    args->batch = 1;
    args->tq = span->count;
    args->tk = span->position + span->count;
    args->tk_stride = g->capacity;
    args->heads = s->h;
    args->kv_heads = s->k;
    args->head_dim = s->e;
    args->q = (char *)g->q + (size_t)(row * ldq) * s->size;
    args->ldq = ldq;
    args->ldo = s->h * s->e;
    args->ldk = args->ldv = s->k * s->e;
    args->out = (char *)g->o + (size_t)(row * args->ldo) * s->size;
    args->scale = llmpar__llama_scale(g->model);
    args->dtype = g->dtype;
    args->workspace = g->workspace;
    args->workspace_bytes = g->workspace_bytes;
    if (!g->cache) return;
    char *cache = llmpar__session_cache(g, span->slot, layer);
    args->k = cache;
    args->v = cache + (size_t)(g->capacity * args->ldv) * s->size;
}

/* Whether products of few rows may read all weights as streams: rows, and the pieces of each sum, are whole words. */
static int llmpar__session_streams(const llmpar__session *g)
{
    const llmpar_llama_config *c = &g->model->config;
    if (!llmpar_device_interleaved_rows(g->device, g->dtype)) return 0;
    return g->s.size % 4 == 0 || (g->s.d % 2 == 0 && g->s.e % 2 == 0 && c->intermediate % (2 * g->tp.pieces) == 0);
}

static size_t llmpar__session_workspace(const llmpar__session *g)
{
    const llmpar__shape *s = &g->s;
    const llmpar_llama_config *c = &g->model->config;
    const int64_t widths[6] = { s->h * s->e, s->k * s->e, s->qkv, s->f, 2 * s->f, s->v };
    size_t most = 0, w;
    llmpar_tp_operand row;
    llmpar_attention_args attention;
    /* Every row count up to `rows` is used: the prompt's chunks and a token of each text. Few rows are multiplied in another way than many, and need more the more there are. */
    for (int pass = 0; pass < 3; pass++) {
        int64_t few = g->rows < 16 ? g->rows : 16, rows = pass == 0 ? 1 : pass == 1 ? few : g->rows;
        for (int i = 0; i < 6; i++) {
            int64_t limit = i == 2 || i == 4 ? g->slots /* together only for one row of each text */ : i == 5 ? g->head_rows : rows, own = rows < limit ? rows : limit;
            w = i < 3 ? llmpar__llama_linear_workspace(g->model, own, widths[i], g->dtype) : llmpar_tp_product_workspace(&g->tp, LLMPAR_GEMM_NT, own, widths[i], s->d, g->dtype);
            if (w > most) most = w;
        }
        llmpar__llama_row(&g->tp, NULL, NULL, c->heads, s->e, &row);
        w = llmpar_tp_partial_workspace(&g->tp, LLMPAR_GEMM_NT, rows, s->d, c->heads, &row, 1, g->dtype);
        if (w > most) most = w;
        llmpar__llama_row(&g->tp, NULL, NULL, c->intermediate, 1, &row);
        w = llmpar_tp_partial_workspace(&g->tp, LLMPAR_GEMM_NT, rows, s->d, c->intermediate, &row, 1, g->dtype);
        if (w > most) most = w;
        const int64_t tq = rows < g->capacity ? rows : g->capacity;
        const llmpar__span span = { 0, g->capacity - tq, tq };
        llmpar__session_attention(g, 0, &span, 0, s->h * s->e, &attention);
        w = g->device->attention_workspace(g->device, &attention);
        if (w > most) most = w;
    }
    if (!llmpar__session_streams(g)) return most;
    LLMPAR__ZEROED(llmpar_interleave_args, turn);
    turn.k = s->f > s->h * s->e ? s->f : s->h * s->e; /* of the widest weight */
    if (turn.k < s->d) turn.k = s->d;
    turn.dtype = g->dtype;
    w = g->device->interleave_workspace(g->device, &turn);
    return w > most ? w : most;
}

static llmpar_status llmpar__session_open(llmpar_llama *model, llmpar_fsdp *fsdp, int64_t rows, int64_t head_rows, int64_t slots, int64_t capacity, const char *borrower, llmpar__session *g)
{
    memset(g, 0, sizeof *g);
    g->model = model;
    g->fsdp = fsdp;
    g->device = model->ctx->device;
    g->dtype = llmpar_fsdp_dtype(fsdp);
    if (model->applied != 2) return LLMPAR__TEXT_NO("generation: the model meets no mesh yet, call llmpar_parallelize or llmpar_llama_apply first");
    if (llmpar__llama_check_length(model, borrower ? 0 : capacity)) return LLMPAR_ERR_UNSUPPORTED;
    if (g->dtype != model->dtype) return LLMPAR__TEXT_NO("generation: shards in %s, expected the %s that llmpar_llama_apply was told", llmpar_dtype_name(g->dtype), llmpar_dtype_name(model->dtype));
    if (capacity > model->positions)
        return LLMPAR__TEXT_NO("generation: %lld positions, expected at most the %lld that the model was set up for", (long long)capacity, (long long)model->positions);
    g->tp = model->tp;
    g->tp.sequence_parallel = 0;
    g->rows = rows;
    g->head_rows = head_rows;
    g->slots = slots;
    g->capacity = capacity;
    LLMPAR__ZEROED(llmpar_micro, micro);
    micro.batch = 1;
    micro.t = rows;
    micro.leaves = 1;
    llmpar__llama_shape(model, &micro, g->dtype, &g->s);
    g->workspace_bytes = llmpar__session_workspace(g);
    g->params = (void *const **)llmpar_heap_alloc(&model->ctx->heap, (size_t)model->unit_count, sizeof *g->params);
    g->spans = (llmpar__span *)llmpar_heap_alloc(&model->ctx->heap, (size_t)slots, sizeof *g->spans);
    llmpar_status status = g->params && g->spans ? LLMPAR_OK : llmpar_fail(model->ctx, LLMPAR_ERR_MEMORY, "generation: out of memory");
    while (g->unsharded_units < model->unit_count && !status) {
        status = llmpar_fsdp_unshard(fsdp, g->unsharded_units, &g->params[g->unsharded_units]);
        if (!status) g->unsharded_units++;
    }
    if (!status && borrower) status = llmpar_fsdp_lend(fsdp, borrower);
    g->lent = !status && borrower;
    if (!status) status = g->device->stream_create(g->device, "generation", &g->stream);
    return status ? status : llmpar__session_memory(g);
}

/* The parameters of layer `layer`, by llmpar_llama.place. */
static void llmpar__session_params(const llmpar__session *g, int32_t layer, void *out[LLMPAR__BLOCK_PARAMS])
{
    memset(out, 0, LLMPAR__BLOCK_PARAMS * sizeof *out);
    for (int32_t mlp = 0; mlp < 2; mlp++) {
        int32_t first, unit = llmpar__llama_home(g->model, 2 * layer + mlp, &first);
        for (int p = mlp ? LLMPAR__NORM2 : 0; p < (mlp ? (int)LLMPAR__BLOCK_PARAMS : (int)LLMPAR__NORM2); p++)
            if (g->model->place[p] >= 0) out[p] = g->params[unit][first + g->model->place[p] - (mlp ? g->model->place[LLMPAR__NORM2] : 0)];
    }
}

/* The projection of the head. */
static void *llmpar__session_head_weight(const llmpar__session *g) { return g->model->config.tied ? g->params[0][0] : g->params[g->model->unit_count - 1][1]; }

/* Weight `i` of those that meet one row of x a token: seven a layer, then the head's. */
static void llmpar__session_weight(const llmpar__session *g, int32_t i, llmpar_interleave_args *args)
{
    static const int params[LLMPAR__SESSION_WEIGHTS] = { LLMPAR__WQ, LLMPAR__WK, LLMPAR__WV, LLMPAR__WO, LLMPAR__GATE, LLMPAR__UP, LLMPAR__DOWN };
    const llmpar__shape *s = &g->s;
    const int64_t n[LLMPAR__SESSION_WEIGHTS] = { s->h * s->e, s->k * s->e, s->k * s->e, s->d, s->f, s->f, s->d }, k[LLMPAR__SESSION_WEIGHTS] = { s->d, s->d, s->d, s->h * s->e, s->d, s->d, s->f };
    int32_t layer = i / LLMPAR__SESSION_WEIGHTS, which = i % LLMPAR__SESSION_WEIGHTS;
    void *p[LLMPAR__BLOCK_PARAMS];
    memset(args, 0, sizeof *args);
    args->dtype = g->dtype;
    args->workspace = g->workspace;
    args->workspace_bytes = g->workspace_bytes;
    if (layer == g->model->config.layers) {
        args->n = s->v;
        args->k = s->d;
        args->w = llmpar__session_head_weight(g);
        return;
    }
    llmpar__session_params(g, layer, p);
    args->n = n[which];
    args->k = k[which];
    args->w = p[params[which]];
}

/* While a session generates, weights that meet one row at a time have their rows interleaved, in place: there is no second copy. Each is turned before the next, on this thread, so that it is known what has to be turned back. */
static llmpar_status llmpar__session_interleave(llmpar__session *g)
{
    int32_t count = g->model->config.layers * LLMPAR__SESSION_WEIGHTS + 1;
    llmpar_status status = LLMPAR_OK;
    g->weights = (llmpar_interleave_args *)llmpar_heap_alloc(&g->model->ctx->heap, (size_t)count, sizeof *g->weights);
    if (!g->weights) return llmpar_fail(g->model->ctx, LLMPAR_ERR_MEMORY, "generation: out of memory");
    for (int32_t i = 0; i < count; i++) {
        llmpar__session_weight(g, i, &g->weights[i]);
        if ((uintptr_t)g->weights[i].w % 4) return LLMPAR_OK; /* behind a tensor of an odd number of halves */
    }
    while (g->interleaved < count && !status) {
        status = g->device->interleave(g->device, NULL, &g->weights[g->interleaved]);
        if (!status) g->interleaved++;
    }
    return status;
}

/* Returns `status`, or if it is none a failure of its own. */
static llmpar_status llmpar__session_close(llmpar__session *g, llmpar_status status)
{
    llmpar_arena *arena = llmpar_fsdp_arena(g->fsdp);
    llmpar_heap *heap = &g->model->ctx->heap;
    if (g->stream) { /* after a failure it may still read what goes now */
        g->device->synchronize(g->device, g->stream);
        g->device->stream_destroy(g->device, g->stream);
    }
    while (g->interleaved > 0) { /* whatever failed, what the weights are is not lost */
        llmpar_interleave_args *weight = &g->weights[--g->interleaved];
        weight->back = 1;
        llmpar_status turned = g->device->interleave(g->device, NULL, weight);
        if (!status) status = turned;
    }
    if (g->lent) llmpar_fsdp_lend(g->fsdp, NULL);
    llmpar_heap_free(heap, g->weights);
    for (int32_t u = 0; u < g->unsharded_units; u++) llmpar_fsdp_reshard(g->fsdp, u);
    llmpar_heap_free(heap, (void *)g->params);
    llmpar_heap_free(heap, g->spans);
    llmpar_arena_free(arena, g->block);
    llmpar_arena_free(arena, g->cache);
    llmpar_arena_free(arena, g->workspace);
    llmpar_heap_free(heap, g->host);
    llmpar_device_host_free(g->device, heap, g->staging, g->staging_bytes);
    return status;
}

/* Whether w[0] .. w[count - 1], of n[i] rows of k elements, lie one behind the other as one matrix does: one row of x, of each text, then meets them in one product, which has fewer beginnings and ends. Absent ones do. */
static int llmpar__session_together(const llmpar__session *g, int count, void *const *w, const int64_t *n, int64_t k)
{
    int64_t tile = g->interleaved > 0 ? llmpar_device_interleaved_rows(g->device, g->dtype) : 1;
    for (int i = 0; w[0] && i + 1 < count; i++)
        if (n[i] % tile || (uintptr_t)w[i] + (size_t)(n[i] * k) * g->s.size != (uintptr_t)w[i + 1]) return 0;
    return 1;
}

/* out = h[count, D] w[width, D]^T + bias */
static llmpar_status llmpar__session_linear(const llmpar__session *g, int64_t count, int64_t width, const void *w, const void *bias, void *out)
{
    return llmpar__llama_linear(g->model, g->stream, count, width, g->h, w, g->interleaved > 0, bias, out, width, g->workspace, g->workspace_bytes);
}

/* out[count, heads*E] (q, or the place of k in the cache) of its product, which may be there: norm over heads if there is one, rope. One text's rows. */
static llmpar_status llmpar__session_heads(const llmpar__session *g, int64_t heads, int64_t position, int64_t count, const void *product, const void *norm, void *out)
{
    llmpar_status status = LLMPAR_OK;
    LLMPAR__ZEROED(llmpar_rope_args, rope);
    rope.batch = 1;
    rope.t = count;
    rope.heads = heads;
    rope.head_dim = g->s.e;
    rope.ld = heads * g->s.e;
    rope.position = position;
    rope.x = out;
    rope.cosine = g->model->cosine;
    rope.sine = g->model->sine;
    rope.dtype = g->dtype;
    if (norm) status = llmpar__llama_rmsnorm(g->model->ctx, g->stream, g->model, count * heads, g->s.e, product, NULL, norm, NULL, out, g->rstd);
    else if (product != out) status = g->device->copy(g->device, g->stream, out, product, (size_t)(count * rope.ld) * g->s.size);
    return status ? status : g->device->rope(g->device, g->stream, &rope);
}

/* o = attention of norm(x) over what each text's cache then has. rows: of all spans, one behind the other. */
static llmpar_status llmpar__session_attend(llmpar__session *g, int32_t layer, void *const p[LLMPAR__BLOCK_PARAMS], int32_t spans, int64_t rows)
{
    const llmpar__shape *s = &g->s;
    llmpar_attention_args attention;
    const int64_t heads[3] = { s->h * s->e, s->k * s->e, s->k * s->e };
    int one = rows == spans && llmpar__session_together(g, 3, p + LLMPAR__WQ, heads, s->d) && llmpar__session_together(g, 3, p + LLMPAR__BQ, heads, 1); /* product: each row is q, k, v */
    int64_t ldq = one ? s->qkv : heads[0], ldk = one ? s->qkv : heads[1];
    char *q = (char *)(p[LLMPAR__QNORM] ? g->o : g->q) /* o: attention has not written it yet */, *k = (char *)g->gate, *v = k + (size_t)(rows * heads[1]) * s->size;
    llmpar__session_attention(g, layer, g->spans, 0, ldq, &attention);
    size_t at = (size_t)(g->spans[0].position * heads[1]) * s->size;
    if (spans == 1 && !p[LLMPAR__KNORM]) k = (char *)(uintptr_t)attention.k + at; /* into the cache at once */
    if (spans == 1) v = (char *)(uintptr_t)attention.v + at;
    if (one) {
        k = q + (size_t)heads[0] * s->size;
        v = k + (size_t)heads[1] * s->size;
    }
    llmpar_status status = llmpar__llama_rmsnorm(g->model->ctx, g->stream, g->model, rows, s->d, g->x, NULL, p[LLMPAR__NORM1], NULL, g->h, g->rstd);
    if (!status) status = llmpar__session_linear(g, rows, ldq, p[LLMPAR__WQ], p[LLMPAR__BQ], q);
    if (!status && !one) status = llmpar__session_linear(g, rows, heads[1], p[LLMPAR__WK], p[LLMPAR__BK], k);
    if (!status && !one) status = llmpar__session_linear(g, rows, heads[2], p[LLMPAR__WV], p[LLMPAR__BV], v);
    for (int64_t i = 0, r = 0; i < spans && !status; r += g->spans[i++].count) {
        const llmpar__span *span = &g->spans[i];
        const char *own_v = v + (size_t)(r * ldk) * s->size;
        llmpar__session_attention(g, layer, span, r, ldq, &attention);
        at = (size_t)(span->position * heads[1]) * s->size;
        char *to_v = (char *)(uintptr_t)attention.v + at;
        status = llmpar__session_heads(g, s->h, span->position, span->count, q + (size_t)(r * ldq) * s->size, p[LLMPAR__QNORM], (char *)(uintptr_t)attention.q);
        if (!status) status = llmpar__session_heads(g, s->k, span->position, span->count, k + (size_t)(r * ldk) * s->size, p[LLMPAR__KNORM], (char *)(uintptr_t)attention.k + at);
        if (!status && own_v != to_v) status = g->device->copy(g->device, g->stream, to_v, own_v, (size_t)(span->count * heads[2]) * s->size);
    }
    for (int64_t i = 0, r = 0; i < spans && !status; r += g->spans[i++].count) {
        llmpar__session_attention(g, layer, &g->spans[i], r, ldq, &attention);
        status = g->device->attention(g->device, g->stream, &attention);
    }
    return status;
}

static llmpar_status llmpar__session_layer(llmpar__session *g, int32_t layer, int32_t spans, int64_t rows)
{
    const llmpar__shape *s = &g->s;
    const llmpar_llama_config *c = &g->model->config;
    void *p[LLMPAR__BLOCK_PARAMS];
    llmpar_tp_operand row;
    llmpar_add_args add;
    llmpar__session_params(g, layer, p);
    const int64_t gates[2] = { s->f, s->f };
    int two = rows == spans && llmpar__session_together(g, 2, p + LLMPAR__GATE, gates, s->d); /* each row is gate, up */
    int64_t ldg = two ? 2 * s->f : s->f;
    char *up = (char *)g->gate + (size_t)(two ? s->f : rows * s->f) * s->size;
    llmpar_status status = llmpar__session_attend(g, layer, p, spans, rows);
    llmpar__llama_row(&g->tp, g->o, p[LLMPAR__WO], c->heads, s->e, &row);
    row.interleaved = g->interleaved > 0;
    if (!status) status = llmpar_tp_partial(&g->tp, g->stream, LLMPAR_GEMM_NT, rows, s->d, c->heads, &row, 1, g->dtype, g->part, g->workspace, g->workspace_bytes);
    if (!status) status = llmpar_tp_reduce(&g->tp, g->stream, "attention output/reduce", 1, rows, s->d, g->part, g->sum, g->dtype);
    /* x += sum, h = norm(x) */
    if (!status) status = llmpar__llama_rmsnorm(g->model->ctx, g->stream, g->model, rows, s->d, g->sum, g->x, p[LLMPAR__NORM2], g->x, g->h, g->rstd);
    if (!status) status = llmpar__session_linear(g, rows, ldg, p[LLMPAR__GATE], NULL, g->gate);
    if (!status && !two) status = llmpar__session_linear(g, rows, s->f, p[LLMPAR__UP], NULL, up);
    LLMPAR__ZEROED(llmpar_swiglu_args, swiglu);
    swiglu.rows = rows;
    swiglu.dim = s->f;
    swiglu.ld_in = swiglu.ld_out = ldg;
    swiglu.gate = g->gate;
    swiglu.up = up;
    swiglu.h = g->gate;
    swiglu.dtype = g->dtype;
    if (!status) status = g->device->swiglu(g->device, g->stream, &swiglu);
    llmpar__llama_row(&g->tp, g->gate, p[LLMPAR__DOWN], c->intermediate, 1, &row);
    row.lda = ldg;
    row.interleaved = g->interleaved > 0;
    if (!status) status = llmpar_tp_partial(&g->tp, g->stream, LLMPAR_GEMM_NT, rows, s->d, c->intermediate, &row, 1, g->dtype, g->part, g->workspace, g->workspace_bytes);
    if (!status) status = llmpar_tp_reduce(&g->tp, g->stream, "mlp output/reduce", 1, rows, s->d, g->part, g->sum, g->dtype);
    memset(&add, 0, sizeof add);
    add.count = (size_t)(rows * s->d);
    add.a = g->x;
    add.b = g->sum;
    add.out = g->x;
    add.dtype = g->dtype;
    return status ? status : g->device->add(g->device, g->stream, &add);
}

/* Logits of `count` rows of x beginning at `first`, whole vocabulary, as f32 in g->host[count, V]. */
static llmpar_status llmpar__session_head(llmpar__session *g, int64_t first, int64_t count)
{
    const llmpar__shape *s = &g->s;
    const llmpar_llama_config *c = &g->model->config;
    int64_t widest = (c->vocab + g->tp.ranks - 1) / g->tp.ranks;
    const char *x = (const char *)g->x + (size_t)(first * s->d) * s->size;
    llmpar_status status = llmpar__llama_rmsnorm(g->model->ctx, g->stream, g->model, count, s->d, x, NULL, g->params[g->model->unit_count - 1][0], NULL, g->h, g->rstd);
    if (!status) status = llmpar__llama_linear(g->model, g->stream, count, s->v, g->h, llmpar__session_head_weight(g), g->interleaved > 0, NULL, g->logits, widest, g->workspace, g->workspace_bytes);
    LLMPAR__ZEROED(llmpar_collective, call);
    call.send = g->logits;
    call.recv = g->gathered;
    call.count = (size_t)(count * widest);
    call.dtype = g->dtype;
    call.tag = "logits/all_gather";
    if (!status) status = llmpar_all_gather(g->tp.comm, g->stream, &call);
    size_t bytes = (size_t)(count * widest * g->tp.ranks) * s->size;
    if (!status) status = g->device->copy(g->device, g->stream, g->staging, g->gathered, bytes);
    if (!status) status = g->device->synchronize(g->device, g->stream);
    for (int32_t rank = 0; rank < g->tp.ranks && !status; rank++) {
        int64_t begin = llmpar_piece_begin(rank, c->vocab, g->tp.ranks), width = llmpar_piece_begin(rank + 1, c->vocab, g->tp.ranks) - begin;
        for (int64_t row = 0; row < count; row++)
            llmpar_convert(g->host + row * c->vocab + begin, LLMPAR_F32, g->staging + (size_t)((rank * count + row) * widest) * s->size, g->dtype, (size_t)width);
    }
    return status;
}

/* x[at, D] = row `row` of a table with interleaved rows, zero if another rank has it. */
static llmpar_status llmpar__session_embed(llmpar__session *g, const void *table, int64_t row, int64_t at)
{
    const llmpar__shape *s = &g->s;
    int64_t together = llmpar_device_interleaved_rows(g->device, g->dtype), words = s->d * (int64_t)s->size / 4;
    char *x = (char *)g->x + (size_t)(at * words) * 4;
    if (row < 0 || row >= s->v) return g->device->zero(g->device, g->stream, x, (size_t)words * 4);
    LLMPAR__ZEROED(llmpar_copy_rows_args, args);
    args.rows = words;
    args.width = args.ld_out = 1;
    args.size = 4;
    args.ld_in = row < s->v / together * together ? together : 1; /* the last rows, too few, lie as rows */
    args.in = (const char *)table + (size_t)(args.ld_in > 1 ? row / together * together * words + row % together : row * words) * 4;
    args.out = x;
    return g->device->copy_rows(g->device, g->stream, &args);
}

static llmpar_status llmpar__session_ids(const llmpar_llama *model, const char *what, const int32_t *ids, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= model->config.vocab) return LLMPAR__TEXT_NO("%s: token id %d at position %lld, expected 0 .. %d", what, (int)ids[i], (long long)i, (int)model->config.vocab - 1);
    return LLMPAR_OK;
}

/* x of the rows of all spans, whose ids are in host_ids; the cache then knows their keys and values. */
static llmpar_status llmpar__session_forward(llmpar__session *g, int32_t spans)
{
    const llmpar_llama_config *c = &g->model->config;
    const void *table = g->params[0][0];
    int streams = g->interleaved > 0 && c->tied;
    int64_t rows = 0;
    llmpar_status status = LLMPAR_OK;
    for (int32_t i = 0; i < spans && !status; i++) {
        const llmpar__span *span = &g->spans[i];
        const int32_t *ids = g->host_ids + span->slot * g->capacity + span->position;
        status = g->device->copy(g->device, g->stream, g->ids + rows, ids, (size_t)span->count * sizeof *ids);
        for (int64_t k = 0; k < span->count && streams && !status; k++) status = llmpar__session_embed(g, table, ids[k] - g->s.v_begin, rows + k);
        rows += span->count;
    }
    LLMPAR__ZEROED(llmpar_embedding_args, args);
    args.rows = rows;
    args.dim = g->s.d;
    args.v_begin = g->s.v_begin;
    args.v_local = g->s.v;
    args.ids = g->ids;
    args.table = table;
    args.out = g->x;
    args.dtype = g->dtype;
    if (!status && !streams) status = g->device->embedding(g->device, g->stream, &args);
    if (!status) status = llmpar_tp_select(&g->tp, g->stream, "embed/select", 1, rows, g->s.d, g->x, g->x, g->dtype);
    for (int32_t layer = 0; layer < c->layers && !status; layer++) status = llmpar__session_layer(g, layer, spans, rows);
    return status;
}

LLMPAR_DEF llmpar_status llmpar_llama_logits(llmpar_llama *model, llmpar_fsdp *fsdp, const int32_t *ids, int32_t count, float *logits)
{
    llmpar__session g;
    LLMPAR__NEED(model && fsdp, NULL);
    if (count < 1) return LLMPAR__TEXT_NO("logits: %d ids, expected at least 1", (int)count);
    llmpar_status status = llmpar__session_open(model, fsdp, count, count, 1, count, NULL, &g);
    if (!status) status = llmpar__session_ids(model, "logits", ids, count);
    const llmpar__span all = { 0, 0, count };
    if (!status) {
        memcpy(g.host_ids, ids, (size_t)count * sizeof *ids);
        g.spans[0] = all;
        status = llmpar__session_forward(&g, 1);
    }
    if (!status) status = llmpar__session_head(&g, 0, count);
    if (!status) memcpy(logits, g.host, (size_t)count * (size_t)model->config.vocab * sizeof(float));
    return llmpar__session_close(&g, status);
}

/* ---- sampling ---- */

/* The largest of finite logits, the first of equals; -1: not all are finite. As integers of the same order, so that compilers vectorise it. */
static int32_t llmpar__sample_greedy(const float *logits, int32_t vocab)
{
    enum { BLOCK = 256 };
    int32_t best = INT32_MIN, at = 0, end, infinite = 0;
    for (int32_t first = 0; first < vocab; first = end) {
        int32_t most = INT32_MIN;
        end = vocab - first < BLOCK ? vocab : first + BLOCK;
        for (int32_t i = first; i < end; i++) {
            float value = logits[i] + 0.0f; /* -0 equals 0 */
            int32_t bits;
            memcpy(&bits, &value, sizeof bits);
            infinite |= (bits & 0x7f800000) == 0x7f800000;
            if (bits < 0) bits ^= 0x7fffffff;
            most = bits > most ? bits : most;
        }
        if (most > best) {
            best = most;
            at = first;
        }
    }
    for (int32_t i = at + 1; i < vocab && i < at + BLOCK; i++)
        if (logits[i] > logits[at]) at = i;
    return infinite ? -1 : at;
}

/* Sifts entry `at` down in a max-heap over (probability, lower id first): the nucleus is popped in order of probability. */
static void llmpar__sample_sift(int32_t *heap, int32_t count, int32_t at, const float *p)
{
    for (;;) {
        int32_t child = 2 * at + 1;
        if (child >= count) return;
        if (child + 1 < count && (p[heap[child + 1]] > p[heap[child]] || (p[heap[child + 1]] == p[heap[child]] && heap[child + 1] < heap[child]))) child++;
        if (p[heap[at]] > p[heap[child]] || (p[heap[at]] == p[heap[child]] && heap[at] < heap[child])) return;
        int32_t swap = heap[at];
        heap[at] = heap[child];
        heap[child] = swap;
        at = child;
    }
}

/* logits become probabilities at this temperature; order[vocab] is scratch. `uniform` in [0, 1). */
static int32_t llmpar__sample_nucleus(float *logits, int32_t vocab, int32_t largest, double temperature, double top_p, double uniform, int32_t *order)
{
    float max = logits[largest];
    double sum = 0, mass = 0, target;
    for (int32_t i = 0; i < vocab; i++) {
        logits[i] = (float)llmpar_exp_f64(((double)logits[i] - (double)max) / temperature);
        sum += (double)logits[i];
        order[i] = i;
    }
    if (!(top_p > 0 && top_p < 1)) {
        target = uniform * sum;
        for (int32_t i = 0; i < vocab; i++) {
            mass += (double)logits[i];
            if (mass > target) return i;
        }
        return vocab - 1;
    }
    int32_t count = vocab, kept = 0;
    for (int32_t i = vocab / 2; i-- > 0;) llmpar__sample_sift(order, count, i, logits);
    while (count > 0 && mass < top_p * sum) { /* the popped ones gather behind the shrinking heap */
        int32_t top = order[0];
        mass += (double)logits[top];
        order[0] = order[--count];
        order[count] = top;
        kept++;
        llmpar__sample_sift(order, count, 0, logits);
    }
    target = uniform * mass;
    mass = 0;
    for (int32_t i = 0; i < kept; i++) {
        mass += (double)logits[order[vocab - 1 - i]];
        if (mass > target) return order[vocab - 1 - i];
    }
    return order[vocab - kept];
}

static int llmpar__sample_is_eos(const llmpar_llama_config *c, int32_t id)
{
    for (int32_t i = 0; i < c->eos_count; i++)
        if (c->eos_id[i] == id) return 1;
    return 0;
}

/* ---- texts ---- */

/* A place for a text: what the session knows there, and what is being generated. */
typedef struct llmpar__slot {
    int64_t known;   /* positions whose ids, keys and values are there */
    int32_t text;    /* which one; -1: none */
    int32_t made;    /* its ids so far; the last one waits at `known` */
    int64_t begun;   /* when, counted in texts */
    llmpar_rng rng;
} llmpar__slot;

struct llmpar_generator {
    llmpar__session session;
    llmpar__slot *slots; /* [session.slots] */
    int32_t *order;      /* [V] scratch of sampling */
    const llmpar_generate_desc *texts; /* during a run, as the next two */
    int32_t *const *ids, *counts;
    int stopped;         /* by the caller */
    int64_t begun;       /* texts */
};

static int32_t llmpar__generate_tokens(const llmpar_generate_desc *desc) { return desc->tokens ? desc->tokens : 128; }

/* What may be said before anything is taken. */
static llmpar_status llmpar__generate_check(const llmpar_llama *model, const llmpar_generate_desc *texts, int32_t count, int64_t positions)
{
    char what[48] = "generation";
    if (!texts) return LLMPAR__TEXT_NO("generation: no desc");
    for (int32_t i = 0; i < count; i++) {
        const llmpar_generate_desc *desc = &texts[i];
        int32_t tokens = llmpar__generate_tokens(desc);
        if (count > 1) snprintf(what, sizeof what, "generation of text %d", (int)i);
        if (desc->prompt_count < 1 || !desc->prompt) return LLMPAR__TEXT_NO("%s: prompt of %d ids, expected at least 1", what, (int)desc->prompt_count);
        if (tokens < 0) return LLMPAR__TEXT_NO("%s: tokens = %d, expected at least 1", what, (int)tokens);
        if (!(desc->temperature >= 0) || !llmpar_isfinite_f64(desc->temperature)) return LLMPAR__TEXT_NO("%s: temperature = %g, expected 0 or more", what, desc->temperature);
        if (!(desc->top_p >= 0 && desc->top_p <= 1)) return LLMPAR__TEXT_NO("%s: top_p = %g, expected 0 .. 1", what, desc->top_p);
        if ((int64_t)desc->prompt_count + tokens - 1 > positions)
            return LLMPAR__TEXT_NO("%s: prompt of %d ids and %d tokens, expected room for all but the last in %lld positions", what, (int)desc->prompt_count, (int)tokens, (long long)positions);
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
    const llmpar_generate_desc *desc = &g->texts[t->text];
    float *logits = s->host + row * c->vocab;
    int32_t id = llmpar__sample_greedy(logits, c->vocab);
    if (id < 0) return llmpar_fail(s->model->ctx, LLMPAR_ERR_NONFINITE, "generation: logits at position %lld are not finite", (long long)t->known - 1);
    if (desc->temperature != 0) id = llmpar__sample_nucleus(logits, c->vocab, id, desc->temperature, desc->top_p, llmpar_rng_uniform(&t->rng, (uint64_t)t->made), g->order);
    g->ids[t->text][t->made++] = id;
    g->counts[t->text] = t->made;
    llmpar_status status = desc->on_token ? desc->on_token(desc->user, id) : LLMPAR_OK;
    g->stopped = status != LLMPAR_OK;
    if (t->made == llmpar__generate_tokens(desc) || (desc->stop_at_eos && llmpar__sample_is_eos(c, id))) t->text = -1;
    else s->host_ids[slot * s->capacity + t->known] = id;
    return status;
}

/* Begins text `text` behind its own beginning, in an empty place or in that of the oldest text: the latest ones stay known. What is known elsewhere of its prompt is copied, the rest computed. */
static llmpar_status llmpar__generator_begin(llmpar_generator *g, int32_t text, int *begun)
{
    llmpar__session *s = &g->session;
    const llmpar_generate_desc *desc = &g->texts[text];
    int64_t to = -1, from = 0, shared = 0, most = -1, kept = -1;
    for (int64_t i = 0; i < s->slots; i++) {
        const int32_t *ids = s->host_ids + i * s->capacity;
        int64_t same = 0;
        while (same < g->slots[i].known && same < desc->prompt_count - 1 && ids[same] == desc->prompt[same]) same++; /* the last id gives the logits */
        if (same > most) {
            most = same;
            from = i;
        }
        int64_t keeps = same == g->slots[i].known ? same + 1 : 0; /* nothing is lost there */
        if (g->slots[i].text < 0 && (keeps > kept || (keeps == kept && g->slots[i].begun < g->slots[to].begun))) {
            kept = keeps;
            shared = same;
            to = i;
        }
    }
    *begun = to >= 0;
    if (to < 0) return LLMPAR_OK;
    llmpar__slot *t = &g->slots[to];
    size_t id = (size_t)(s->s.k * s->s.e) * s->s.size; /* bytes of its k, or v */
    llmpar_status status = LLMPAR_OK;
    for (int32_t part = 0; part < 2 * s->model->config.layers && most > shared && !status; part++) {
        size_t at = (size_t)(part % 2 * s->capacity + shared) * id;
        status = s->device->copy(s->device, s->stream, llmpar__session_cache(s, to, part / 2) + at, llmpar__session_cache(s, from, part / 2) + at, (size_t)(most - shared) * id);
    }
    memcpy(s->host_ids + to * s->capacity + shared, desc->prompt + shared, (size_t)(desc->prompt_count - shared) * sizeof *desc->prompt); /* no copy is under way there */
    t->known = most;
    t->text = text;
    t->made = 0;
    t->begun = ++g->begun;
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

/* One more id of each text that has begun; *rows: how many these are. */
static llmpar_status llmpar__generator_step(llmpar_generator *g, int32_t *rows)
{
    llmpar__session *s = &g->session;
    *rows = 0;
    for (int64_t i = 0; i < s->slots; i++) {
        const llmpar__span span = { i, g->slots[i].known, 1 };
        if (g->slots[i].text >= 0) s->spans[(*rows)++] = span;
    }
    llmpar_status status = *rows ? llmpar__session_forward(s, *rows) : LLMPAR_OK;
    if (!status && *rows) status = llmpar__session_head(s, 0, *rows);
    for (int32_t i = 0; i < *rows && !status; i++) {
        g->slots[s->spans[i].slot].known++;
        status = llmpar__generator_next(g, s->spans[i].slot, i);
    }
    return status;
}

LLMPAR_DEF llmpar_status llmpar_generator_create(llmpar_llama *model, llmpar_fsdp *fsdp, const llmpar_generator_desc *desc, llmpar_generator **out)
{
    *out = NULL;
    LLMPAR__NEED(model && fsdp, NULL);
    if (!desc) return LLMPAR__TEXT_NO("generation: no desc");
    int64_t positions = desc->positions ? desc->positions : model->positions;
    int32_t texts = desc->texts ? desc->texts : 1;
    if (positions < 0) return LLMPAR__TEXT_NO("generation: %lld positions, expected at least 1", (long long)positions);
    if (texts < 0) return LLMPAR__TEXT_NO("generation: %d texts at once, expected at least 1", (int)texts);
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
    if (!status && !s->stream) status = s->device->stream_create(s->device, "generation", &s->stream);
    if (status) return status;
    g->texts = texts;
    g->ids = ids;
    g->counts = counts;
    g->stopped = 0;
    for (int64_t i = 0; i < s->slots; i++) g->slots[i].text = -1;
    int32_t next = 0, rows = 1;
    while (!status && (next < count || rows)) {
        int begun = 1;
        while (!status && next < count && begun) {
            status = llmpar__generator_begin(g, next, &begun);
            next += begun;
        }
        if (!status) status = llmpar__generator_step(g, &rows);
    }
    if (status && !g->stopped) { /* the cache is in doubt, and the stream, which may yet read ids, may stay failed */
        for (int64_t i = 0; i < s->slots; i++) g->slots[i].known = 0;
        s->device->synchronize(s->device, s->stream);
        s->device->stream_destroy(s->device, s->stream);
        s->stream = NULL;
    }
    return status;
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

#undef LLMPAR__TEXT_NO

#endif /* LLMPAR_NO_LLAMA */
