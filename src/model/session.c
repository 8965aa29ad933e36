#include "model/session_internal.h"

#include <string.h>

#include "base/math.h"
#include "base/size.h"

#if !defined(LLMPAR_NO_LLAMA)

enum { LLMPAR__SESSION_WEIGHTS = 7 };

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

LLMPAR__PRIVATE_DEF char *llmpar__session_cache(const llmpar__session *g, int64_t slot, int32_t layer)
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

LLMPAR__PRIVATE_DEF int llmpar__session_streams(const llmpar__session *g)
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
        if (rows == 1) attention.batch = g->slots; /* attention_each */
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

LLMPAR__PRIVATE_DEF llmpar_status llmpar__session_open(llmpar_llama *model, llmpar_fsdp *fsdp, int64_t rows, int64_t head_rows, int64_t slots, int64_t capacity, const char *borrower, llmpar__session *g)
{
    memset(g, 0, sizeof *g);
    g->model = model;
    g->fsdp = fsdp;
    g->device = model->ctx->device;
    g->dtype = llmpar_fsdp_dtype(fsdp);
    if (model->applied != 2) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "generation: the model meets no mesh yet, call llmpar_parallelize or llmpar_llama_apply first");
    if (llmpar__llama_check_length(model, borrower ? 0 : capacity)) return LLMPAR_ERR_UNSUPPORTED;
    if (g->dtype != model->dtype) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "generation: shards in %s, expected the %s that llmpar_llama_apply was told", llmpar_dtype_name(g->dtype), llmpar_dtype_name(model->dtype));
    if (capacity > model->positions)
        return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "generation: %lld positions, expected at most the %lld that the model was set up for", (long long)capacity, (long long)model->positions);
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
    g->attentions = (llmpar_attention_args *)llmpar_heap_alloc(&model->ctx->heap, (size_t)slots, sizeof *g->attentions);
    llmpar_status status = g->params && g->spans && g->attentions ? LLMPAR_OK : llmpar_fail(model->ctx, LLMPAR_ERR_MEMORY, "generation: out of memory");
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

LLMPAR__PRIVATE_DEF llmpar_status llmpar__session_interleave(llmpar__session *g)
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

LLMPAR__PRIVATE_DEF llmpar_status llmpar__session_close(llmpar__session *g, llmpar_status status)
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
    llmpar_heap_free(heap, g->attentions);
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
    for (int64_t i = 0, r = 0; i < spans; r += g->spans[i++].count) llmpar__session_attention(g, layer, &g->spans[i], r, ldq, &g->attentions[i]);
    const llmpar_attention_each_args each = { g->attentions, spans };
    if (!status) status = spans > 1 ? llmpar_device_attention_each(g->device, g->stream, &each) : g->device->attention(g->device, g->stream, g->attentions);
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

LLMPAR__PRIVATE_DEF llmpar_status llmpar__session_head(llmpar__session *g, int64_t first, int64_t count)
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

LLMPAR__PRIVATE_DEF llmpar_status llmpar__session_ids(const llmpar_llama *model, const char *what, const int32_t *ids, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= model->config.vocab) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "%s: token id %d at position %lld, expected 0 .. %d", what, (int)ids[i], (long long)i, (int)model->config.vocab - 1);
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__session_forward(llmpar__session *g, int32_t spans)
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
    if (count < 1) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "logits: %d ids, expected at least 1", (int)count);
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

#endif /* LLMPAR_NO_LLAMA */
