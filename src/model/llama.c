#include "model/llama.h"
#include "model/llama_internal.h"

#include <stdio.h>
#include <string.h>

#include "base/math.h"
#include "base/size.h"
#include "tables/tables_internal.h"

#if !defined(LLMPAR_NO_LLAMA)

enum { LLMPAR__NAME_BYTES = 80, LLMPAR__ROWS_MOST = 12 /* of a half */ };

static const char *llmpar__llama_name(llmpar_llama *model, int32_t *used, const char *format, int32_t layer)
{
    char *text = model->names + (size_t)(*used)++ * LLMPAR__NAME_BYTES;
    snprintf(text, LLMPAR__NAME_BYTES, format, (int)layer);
    return text;
}

static void llmpar__llama_param(llmpar_llama *model, llmpar_param *param, int32_t *used, const char *format, int32_t layer, int64_t rows, int64_t columns, double std, double value)
{
    memset(param, 0, sizeof *param);
    param->name = llmpar__llama_name(model, used, format, layer);
    param->dims = columns ? 2 : 1;
    param->shape[0] = rows;
    param->shape[1] = columns;
    param->init_std = std;
    param->init_value = value;
    param->no_decay = columns == 0;
}

static const char *llmpar__llama_body_name(llmpar_llama *model, int32_t *used, const llmpar__part *part)
{
    char *text = (char *)(uintptr_t)llmpar__llama_name(model, used, "layers.%d", part->first / 2);
    size_t length = strlen(text);
    if (part->halves == 1) snprintf(text + length, LLMPAR__NAME_BYTES - length, "%s", part->first & 1 ? ".mlp" : ".attention");
    else if (part->halves > 2) snprintf(text + length, LLMPAR__NAME_BYTES - length, "-%d", (int)((part->first + part->halves) / 2 - 1));
    return text;
}

/* Names, shapes and units; placements come with apply. Projections back into the residual stream start smaller by sqrt(2L) (Radford et al. 2019, section 2.3). */
static void llmpar__llama_describe(llmpar_llama *model)
{
    static const char *const names[LLMPAR__BLOCK_PARAMS] = {
        "model.layers.%d.input_layernorm.weight", "model.layers.%d.self_attn.q_proj.weight", "model.layers.%d.self_attn.k_proj.weight",
        "model.layers.%d.self_attn.v_proj.weight", "model.layers.%d.self_attn.o_proj.weight", "model.layers.%d.self_attn.q_proj.bias", "model.layers.%d.self_attn.k_proj.bias", "model.layers.%d.self_attn.v_proj.bias",
        "model.layers.%d.self_attn.q_norm.weight", "model.layers.%d.self_attn.k_norm.weight", "model.layers.%d.post_attention_layernorm.weight",
        "model.layers.%d.mlp.gate_proj.weight", "model.layers.%d.mlp.up_proj.weight", "model.layers.%d.mlp.down_proj.weight"};
    const llmpar_llama_config *c = &model->config;
    int64_t d = c->hidden, q = (int64_t)c->heads * c->head_dim, kv = (int64_t)c->kv_heads * c->head_dim, f = c->intermediate, e = c->head_dim;
    const int64_t rows[LLMPAR__BLOCK_PARAMS] = {d, q, kv, kv, d, q, kv, kv, e, e, d, f, f, d}, columns[LLMPAR__BLOCK_PARAMS] = {0, d, d, d, q, 0, 0, 0, 0, 0, 0, d, d, f};
    double std = c->init_std, deep = std / llmpar_sqrt_f64(2.0 * c->layers);
    int32_t used = 0, half = 0;
    llmpar_param *param = model->params;
    for (int32_t i = 0; i < model->unit_count; i++) {
        llmpar_unit *unit = &model->units[i];
        llmpar__part *part = &model->parts[i];
        part->model = model;
        unit->user = part;
        unit->params = param;
        if (i == 0) {
            unit->name = "embed";
            unit->sizes = llmpar__embed_sizes;
            part->list = LLMPAR__EMBED;
            llmpar__llama_param(model, param++, &used, "model.embed_tokens.weight", 0, c->vocab, d, std, 0);
        } else if (i + 1 < model->unit_count) {
            part->first = half;
            part->halves = 2 * c->layers - half < model->wrap ? 2 * c->layers - half : model->wrap;
            part->list = part->halves < model->wrap || (half & 1) ? LLMPAR__BODY_LAST : LLMPAR__BODY;
            unit->name = llmpar__llama_body_name(model, &used, part);
            unit->sizes = llmpar__block_sizes;
            for (int32_t end = half + part->halves; half < end; half++)
                for (int p = half & 1 ? LLMPAR__NORM2 : LLMPAR__NORM1; p < (half & 1 ? (int)LLMPAR__BLOCK_PARAMS : (int)LLMPAR__NORM2); p++) {
                    int bias = p == LLMPAR__BQ || p == LLMPAR__BK || p == LLMPAR__BV, back = p == LLMPAR__WO || p == LLMPAR__DOWN;
                    if (model->place[p] >= 0) llmpar__llama_param(model, param++, &used, names[p], half / 2, rows[p], columns[p], !columns[p] ? 0 : back ? deep : std, !columns[p] && !bias);
                }
        } else {
            unit->name = "head";
            unit->sizes = llmpar__head_sizes;
            part->list = LLMPAR__HEAD;
            llmpar__llama_param(model, param++, &used, "model.norm.weight", 0, d, 0, 0, 1);
            if (c->tied) unit->borrow = 1;
            else llmpar__llama_param(model, param++, &used, "lm_head.weight", 0, c->vocab, d, std, 0);
        }
        unit->param_count = (int32_t)(param - unit->params);
    }
}

LLMPAR__PRIVATE_DEF int32_t llmpar__llama_home(const llmpar_llama *model, int32_t half, int32_t *param)
{
    int32_t unit = half / model->wrap, inside = half - unit * model->wrap; /* units begin with an attention, or are one half */
    *param = inside / 2 * model->block_params + (inside & 1 ? model->place[LLMPAR__NORM2] : 0);
    return unit + 1;
}

LLMPAR_DEF llmpar_status llmpar_llama_create(llmpar_ctx *ctx, const llmpar_llama_desc *desc, llmpar_llama **out)
{
    *out = NULL;
    LLMPAR__NEED(ctx, NULL);
    if (!desc || !desc->preset == !desc->config) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "llama: expected exactly one of preset and config");
    llmpar_llama_config config;
    LLMPAR__NO_ERROR(error);
    llmpar_status status = LLMPAR_OK;
    if (desc->preset) status = llmpar_llama_preset(desc->preset, &config, &error);
    else config = *desc->config;
    if (!status) status = llmpar_llama_config_check(&config, &error);
    if (!status && desc->wrap != LLMPAR_WRAP_HALF && (desc->wrap < 0 || desc->wrap > LLMPAR__WRAP_MOST))
        status = llmpar_error_set(&error, LLMPAR_ERR_ARGUMENT, "llama: wrap = %d, expected 1 .. %d blocks a unit or %d (half a block)", (int)desc->wrap, (int)LLMPAR__WRAP_MOST, LLMPAR_WRAP_HALF);
    if (!status && desc->logits_bytes < 0) status = llmpar_error_set(&error, LLMPAR_ERR_ARGUMENT, "llama: logits_bytes = %lld, expected 0 or more", (long long)desc->logits_bytes);
    if (status) return llmpar_fail(ctx, status, "%s", error.text);
    llmpar_heap *heap = &ctx->heap;
    llmpar_llama *model = LLMPAR__ZALLOC(llmpar_llama, heap, 1);
    if (!model) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "llama: out of memory");
    model->ctx = ctx;
    model->config = config;
    model->seed = desc->seed;
    model->wrap = desc->wrap == LLMPAR_WRAP_HALF ? 1 : desc->wrap ? 2 * desc->wrap : 2;
    model->unit_count = (2 * config.layers + model->wrap - 1) / model->wrap + 2;
    model->logits_bytes = desc->logits_bytes ? desc->logits_bytes : (int64_t)256 << 20;
    for (int p = 0; p < (int)LLMPAR__BLOCK_PARAMS; p++) {
        int bias = p >= (int)LLMPAR__BQ && p <= (int)LLMPAR__BV, norm = p == LLMPAR__QNORM || p == LLMPAR__KNORM;
        model->place[p] = (bias && config.family != LLMPAR_FAMILY_QWEN2) || (norm && config.family != LLMPAR_FAMILY_QWEN3) ? -1 : model->block_params++;
    }
    size_t units = (size_t)model->unit_count, params = (size_t)config.layers * (size_t)model->block_params + 3;
    model->units = LLMPAR__ZALLOC(llmpar_unit, heap, units);
    model->parts = LLMPAR__ZALLOC(llmpar__part, heap, units);
    model->params = LLMPAR__ZALLOC(llmpar_param, heap, params);
    model->names = (char *)llmpar_heap_zalloc(heap, units + params, LLMPAR__NAME_BYTES);
    if (!model->units || !model->parts || !model->params || !model->names) {
        llmpar_llama_destroy(model);
        return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "llama: out of memory for %d layers", (int)config.layers);
    }
    llmpar__llama_describe(model);
    *out = model;
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_llama_clone(llmpar_ctx *ctx, const llmpar_llama *model, llmpar_llama **out)
{
    LLMPAR__NEED(ctx && model, NULL);
    LLMPAR__ZEROED(llmpar_llama_desc, desc);
    desc.config = &model->config;
    desc.seed = model->seed;
    desc.wrap = model->wrap == 1 ? LLMPAR_WRAP_HALF : model->wrap / 2;
    desc.logits_bytes = model->logits_bytes;
    return llmpar_llama_create(ctx, &desc, out);
}

LLMPAR_DEF void llmpar_llama_destroy(llmpar_llama *model)
{
    if (!model) return;
    llmpar_heap *heap = &model->ctx->heap;
    for (int list = 0; list < LLMPAR__LISTS; list++)
        for (int way = 0; way < 2; way++) llmpar_heap_free(heap, model->lists[list][way].ops);
    size_t table = (size_t)model->positions * (size_t)(model->config.head_dim / 2) * llmpar_dtype_size(llmpar_dtype_sum(model->dtype));
    model->ctx->device->free(model->ctx->device, model->cosine, table);
    model->ctx->device->free(model->ctx->device, model->sine, table);
    model->ctx->device->free(model->ctx->device, model->one, sizeof(double));
    llmpar_tp_destroy(&model->tp);
    llmpar_heap_free(heap, model->units);
    llmpar_heap_free(heap, model->parts);
    llmpar_heap_free(heap, model->params);
    llmpar_heap_free(heap, model->names);
    llmpar_heap_free(heap, model);
}

LLMPAR_DEF const llmpar_llama_config *llmpar_llama_get_config(const llmpar_llama *model) { return model ? &model->config : NULL; }
LLMPAR_DEF uint64_t llmpar_llama_seed(const llmpar_llama *model) { return model ? model->seed : 0; }
LLMPAR_DEF const llmpar_tp *llmpar_llama_tp(const llmpar_llama *model) { return model ? &model->tp : NULL; }

LLMPAR_DEF llmpar_unit *llmpar_llama_units(llmpar_llama *model, int32_t *count)
{
    if (count) *count = model ? model->unit_count : 0;
    return model ? model->units : NULL;
}

/* ---- meeting a mesh ---- */

/* Appends the rows of one half (the whole list of the two ends) that exist for this mesh and place, waits renumbered; *joint: 1 + index of the joint row, in: of the half before. A wait for a row that does not exist needs none:
   its own predecessors are earlier on the waiting stream. */
static void llmpar__llama_rows(const llmpar_llama *model, const llmpar__op_row *rows, int32_t count, int32_t half, int last, int32_t *joint, llmpar__op_list *out)
{
    const llmpar_tp *tp = &model->tp;
    int32_t place[16], before = *joint;
    *joint = 0;
    for (int32_t i = 0; i < count; i++) {
        int where = rows[i].place & ~LLMPAR__JOINT;
        int here = rows[i].when == LLMPAR__ALWAYS || (rows[i].when == LLMPAR__IF_TP && tp->ranks > 1) || (rows[i].when == LLMPAR__IF_SP && tp->sequence_parallel) || (rows[i].when == LLMPAR__IF_KV && tp->replicas > 1) ||
                   (model->place[LLMPAR__QNORM] >= 0 && (rows[i].when == LLMPAR__IF_QK || (rows[i].when == LLMPAR__IF_QK_TP && tp->ranks > 1)));
        if ((where == LLMPAR__FIRST && half > 0) || (where == LLMPAR__NOT_FIRST && half == 0) || (where == LLMPAR__LAST && !last)) here = 0;
        place[i] = here ? out->count + 1 : 0;
        if (!here) continue;
        llmpar_unit_op *op = &out->ops[out->count++];
        *op = rows[i].op;
        op->index += half;
        op->output_only = op->output_only && last;
        for (int w = 0; w < 2; w++) op->wait[w] = op->wait[w] == LLMPAR__HALF_BEFORE ? before : op->wait[w] ? place[op->wait[w] - 1] : 0;
        if (rows[i].place & LLMPAR__JOINT) *joint = out->count;
    }
}

static void llmpar__llama_shard(llmpar_param *param, int32_t dim, int64_t grain, int32_t replicas)
{
    param->tp.kind = LLMPAR_SHARD;
    param->tp.axis = LLMPAR_AXIS_TP;
    param->tp.dim = dim;
    param->tp.grain = grain;
    param->tp.replicas = replicas;
}

/* One list for all units of a shape: halves in forward order, and backwards. */
static llmpar_status llmpar__llama_list(llmpar_llama *model, const llmpar__part *part, int backward)
{
    llmpar__op_list *out = &model->lists[part->list][backward];
    int32_t halves = part->halves ? part->halves : 1, joint = 0, count;
    if (out->ops) return LLMPAR_OK;
    out->ops = LLMPAR__ZALLOC(llmpar_unit_op, &model->ctx->heap, (size_t)halves * LLMPAR__ROWS_MOST);
    if (!out->ops) return llmpar_fail(model->ctx, LLMPAR_ERR_MEMORY, "llama: out of memory for instruction lists");
    for (int32_t i = 0; i < halves; i++) {
        int32_t half = backward ? halves - 1 - i : i;
        const llmpar__op_row *rows = part->list == LLMPAR__EMBED ? llmpar__embed_ops(backward, &count) : part->list == LLMPAR__HEAD ? llmpar__head_ops(backward, &count) : llmpar__block_ops((part->first + half) & 1, backward, &count);
        llmpar__llama_rows(model, rows, count, half, half == halves - 1, &joint, out);
    }
    return LLMPAR_OK;
}

static llmpar_status llmpar__llama_lists(llmpar_llama *model)
{
    llmpar_status status = LLMPAR_OK;
    for (int32_t i = 0; i < model->unit_count && !status; i++) {
        const llmpar__op_list *list = model->lists[model->parts[i].list];
        for (int way = 0; way < 2 && !status; way++) status = llmpar__llama_list(model, &model->parts[i], way);
        model->units[i].forward = list[0].ops;
        model->units[i].forward_count = list[0].count;
        model->units[i].backward = list[1].ops;
        model->units[i].backward_count = list[1].count;
    }
    return status;
}

/* RoPE tables, and the 1 that biases are multiplied with. */
static llmpar_status llmpar__llama_tables(llmpar_llama *model)
{
    llmpar_ctx *ctx = model->ctx;
    llmpar_device *device = ctx->device;
    llmpar_dtype dtype = llmpar_dtype_sum(model->dtype);
    size_t count = (size_t)model->positions * (size_t)(model->config.head_dim / 2), bytes = count * llmpar_dtype_size(dtype);
    const double one = 1;
    double one_low = 0;
    LLMPAR__NO_ERROR(error);
    void *host = llmpar_heap_alloc(&ctx->heap, 2, bytes);
    if (!host) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "llama: out of memory for RoPE tables of %lld positions", (long long)model->positions);
    llmpar_stream *stream = NULL;
    llmpar_status status = llmpar_rope_tables(&ctx->heap, &model->config, model->positions, dtype, host, (char *)host + bytes, &error);
    if (status) llmpar_fail(ctx, status, "%s", error.text);
    if (!status) status = device->alloc(device, bytes, &model->cosine);
    if (!status) status = device->alloc(device, bytes, &model->sine);
    if (!status) status = device->stream_create(device, "set-up", &stream);
    if (!status) status = device->copy(device, stream, model->cosine, host, bytes);
    if (!status) status = device->copy(device, stream, model->sine, (char *)host + bytes, bytes);
    if (!status && model->place[LLMPAR__BQ] >= 0) {
        llmpar_convert(&one_low, model->dtype, &one, LLMPAR_F64, 1);
        status = device->alloc(device, sizeof one_low, &model->one);
        if (!status) status = device->copy(device, stream, model->one, &one_low, llmpar_dtype_size(model->dtype));
    }
    if (stream) { /* in any case: the stream may read `host` */
        status = llmpar__device_done(device, stream, status);
        device->stream_destroy(device, stream);
    }
    llmpar_heap_free(&ctx->heap, host);
    return status;
}

/* A second apply must ask for what the first one made. */
static llmpar_status llmpar__llama_again(const llmpar_llama *model, const llmpar_comm *tp, const llmpar_llama_apply_desc *desc)
{
    int32_t canon = desc->canon ? desc->canon : 8, pieces = canon % tp->ranks == 0 ? canon : tp->ranks, sp = desc->sequence_parallel && tp->ranks > 1;
    llmpar_dtype dtype = desc->dtype == LLMPAR_DTYPE_DEFAULT ? LLMPAR_F32 : desc->dtype;
    if (model->applied != 2) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "llama: an earlier apply failed; create another model");
    if (tp == model->tp.comm && pieces == model->tp.pieces && sp == model->tp.sequence_parallel && dtype == model->dtype && desc->positions <= model->positions) return LLMPAR_OK;
    return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "llama: this model already meets a mesh with %d pieces, sequence parallel %d, %s, %lld positions; expected the same again on the same communicator, got %d, %d, %s, %lld", (int)model->tp.pieces,
                       (int)model->tp.sequence_parallel, llmpar_dtype_name(model->dtype), (long long)model->positions, (int)pieces, (int)sp, llmpar_dtype_name(dtype), (long long)desc->positions);
}

LLMPAR_DEF llmpar_status llmpar_llama_apply(llmpar_llama *model, llmpar_comm *tp, const llmpar_llama_apply_desc *desc)
{
    LLMPAR__NEED(model && tp, NULL);
    const llmpar_llama_config *c = &model->config;
    if (!desc) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "llama: no desc of what it is applied to");
    if (model->applied) return llmpar__llama_again(model, tp, desc);
    if (desc->positions < 1) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "llama: positions = %lld, expected at least 1", (long long)desc->positions);
    if (c->sliding_window && desc->positions > c->sliding_window)
        return llmpar_fail(model->ctx, LLMPAR_ERR_UNSUPPORTED, "llama: sliding_window = %d is shorter than the sequence, expected at least its %lld positions (or null): attention is over the whole sequence", (int)c->sliding_window, (long long)desc->positions);
    if (c->heads % tp->ranks) return llmpar_fail(model->ctx, LLMPAR_ERR_MESH, "llama: num_attention_heads = %d is not divisible by tp = %d", (int)c->heads, (int)tp->ranks);
    llmpar_dtype dtype = desc->dtype == LLMPAR_DTYPE_DEFAULT ? LLMPAR_F32 : desc->dtype;
    if (tp->ranks > 1 && (size_t)c->hidden * llmpar_dtype_size(dtype) % 8) /* llmpar_tp_select */
        return llmpar_fail(model->ctx, LLMPAR_ERR_MESH, "llama: hidden_size = %d in %s is no multiple of 8 bytes, which the embedding needs where tp = %d is above 1", (int)c->hidden, llmpar_dtype_name(dtype), (int)tp->ranks);
    if (desc->sequence_parallel && desc->positions % tp->ranks) return llmpar_fail(model->ctx, LLMPAR_ERR_MESH, "llama: sequence parallel: sequence length %lld is not divisible by tp = %d", (long long)desc->positions, (int)tp->ranks);
    model->applied = 1;
    model->dtype = dtype;
    model->positions = desc->positions;
    llmpar_status status = llmpar_tp_init(model->ctx, tp, desc->canon, c->kv_heads, desc->sequence_parallel, &model->tp);
    if (status) return status;
    llmpar__llama_shard(&model->params[0], 0, 1, 1);
    if (!c->tied) llmpar__llama_shard(&model->params[2 + c->layers * model->block_params], 0, 1, 1);
    for (int32_t i = 0; i < c->layers; i++) { /* however they are wrapped, they lie one after the other */
        llmpar_param *block = &model->params[1 + i * model->block_params];
        for (int p = 0; p < (int)LLMPAR__BLOCK_PARAMS; p++) {
            int kv = p == LLMPAR__WK || p == LLMPAR__WV || p == LLMPAR__BK || p == LLMPAR__BV, norm = p == LLMPAR__NORM1 || p == LLMPAR__NORM2 || p == LLMPAR__QNORM || p == LLMPAR__KNORM;
            if (model->place[p] >= 0 && !norm) llmpar__llama_shard(&block[model->place[p]], p == LLMPAR__WO || p == LLMPAR__DOWN, p < (int)LLMPAR__NORM2 ? c->head_dim : 1, kv ? model->tp.replicas : 1);
        }
    }
    status = llmpar__llama_lists(model);
    if (!status) status = llmpar__llama_tables(model);
    if (!status) model->applied = 2;
    return status;
}

/* ---- shapes and pieces that the unit files share ---- */

LLMPAR__PRIVATE_DEF void llmpar__llama_shape(const llmpar_llama *model, const llmpar_micro *micro, llmpar_dtype dtype, llmpar__shape *s)
{
    const llmpar_llama_config *c = &model->config;
    const llmpar_tp *tp = &model->tp;
    memset(s, 0, sizeof *s);
    s->b = micro->batch;
    s->t = micro->t;
    s->n = s->b * s->t;
    s->ts = tp->sequence_parallel ? s->t / tp->ranks : s->t;
    s->ns = s->b * s->ts;
    s->d = c->hidden;
    s->e = c->head_dim;
    s->f = llmpar_tp_count(tp, c->intermediate);
    s->h = c->heads / tp->ranks;
    s->k = tp->replicas > 1 ? 1 : c->kv_heads / tp->ranks;
    s->qkv = (s->h + 2 * s->k) * s->e;
    s->v = llmpar_tp_count(tp, c->vocab);
    s->v_begin = llmpar_tp_begin(tp, c->vocab);
    s->leaves = micro->leaves;
    s->size = llmpar_dtype_size(dtype);
    s->dtype = dtype;
    s->sum = llmpar_dtype_sum(dtype);
    s->sum_size = llmpar_dtype_size(s->sum);
}

LLMPAR__PRIVATE_DEF size_t llmpar__llama_take(size_t *at, int64_t elements, size_t size)
{
    size_t begin = *at;
    *at = (begin + (size_t)elements * size + 63) / 64 * 64;
    return begin;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__llama_rmsnorm(llmpar_ctx *ctx, llmpar_stream *stream, const llmpar_llama *model, int64_t rows, int64_t dim, const void *x, const void *residual, const void *w, void *sum, void *y, void *rstd)
{
    LLMPAR__ZEROED(llmpar_rmsnorm_args, args);
    args.rows = rows;
    args.dim = dim;
    args.x = x;
    args.residual = residual;
    args.w = w;
    args.sum = sum;
    args.y = y;
    args.rstd = rstd;
    args.eps = model->config.rms_eps;
    args.dtype = model->dtype;
    return ctx->device->rmsnorm(ctx->device, stream, &args);
}

/* The bias is one more column of w, and `one` in every row that of the input. */
static void llmpar__llama_linear_args(const llmpar_llama *model, int64_t rows, int64_t width, llmpar_dtype dtype, llmpar_gemm_args *args, llmpar_gemm_segment segments[2])
{
    memset(args, 0, sizeof *args);
    memset(segments, 0, 2 * sizeof *segments);
    segments[0].k = segments[0].lda = segments[0].ldb = model->config.hidden;
    segments[1].k = segments[1].ldb = 1;
    args->m = rows;
    args->n = args->ldc = width;
    args->segments = segments;
    args->segment_count = model->place[LLMPAR__BQ] >= 0 ? 2 : 1;
    args->pieces = 1;
    args->kind = LLMPAR_GEMM_NT;
    args->dtype = dtype;
}

LLMPAR__PRIVATE_DEF size_t llmpar__llama_linear_workspace(const llmpar_llama *model, int64_t rows, int64_t width, llmpar_dtype dtype)
{
    llmpar_gemm_segment segments[2];
    llmpar_gemm_args args;
    llmpar__llama_linear_args(model, rows, width, dtype, &args, segments);
    return model->ctx->device->gemm_workspace(model->ctx->device, &args);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__llama_linear(const llmpar_llama *model, llmpar_stream *stream, int64_t rows, int64_t width, const void *in, const void *w, int32_t interleaved, const void *bias, void *out, int64_t ldo, void *workspace, size_t workspace_bytes)
{
    llmpar_gemm_segment segments[2];
    llmpar_gemm_args args;
    llmpar__llama_linear_args(model, rows, width, model->dtype, &args, segments);
    args.segment_count = bias ? 2 : 1;
    segments[0].interleaved = interleaved;
    segments[0].a = in;
    segments[0].b = w;
    segments[1].a = model->one;
    segments[1].b = bias;
    args.c = out;
    args.ldc = ldo;
    args.workspace = workspace;
    args.workspace_bytes = workspace_bytes;
    return model->ctx->device->gemm(model->ctx->device, stream, &args);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__llama_check_length(const llmpar_llama *model, int64_t t)
{
    const llmpar_llama_config *c = &model->config;
    char got[32];
    if (c->rope_scaling.kind != LLMPAR_ROPE_DYNAMIC || model->positions <= c->max_positions || t == model->positions) return LLMPAR_OK;
    snprintf(got, sizeof got, t ? "%lld" : "one that grows", (long long)t);
    return llmpar_fail(model->ctx, LLMPAR_ERR_UNSUPPORTED, "llama: rope_type = \"dynamic\" beyond max_position_embeddings = %d depends on the length of the sequence: expected %lld positions, as llmpar_llama_apply was told, got %s", (int)c->max_positions,
                       (long long)model->positions, got);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__llama_norm_backward(const llmpar_unit_call *call, const llmpar__shape *s, const void *dy, const void *x, const void *w, const void *rstd, const void *dresidual, void *dx, void *dw_leaves)
{
    const llmpar_tp *tp = &((const llmpar__part *)call->user)->model->tp;
    LLMPAR__ZEROED(llmpar_rmsnorm_backward_args, args);
    args.tokens.batch = s->b;
    args.tokens.t = s->ts;
    args.tokens.t_begin = tp->sequence_parallel ? tp->rank * s->ts : 0;
    args.tokens.t_total = s->t;
    args.tokens.leaves = s->leaves;
    args.tokens.canon = tp->pieces;
    args.dim = s->d;
    args.dy = dy;
    args.x = x;
    args.w = w;
    args.rstd = rstd;
    args.dresidual = dresidual;
    args.dx = dx;
    args.dw_leaves = call->grads ? dw_leaves : NULL;
    args.dtype = s->dtype;
    return call->device->rmsnorm_backward(call->device, call->stream, &args);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__llama_sum_leaves(const llmpar_unit_call *call, const char *tag, int64_t count, void *leaves)
{
    const llmpar_collective c = llmpar__comm_collective(leaves, leaves, (size_t)count, llmpar_dtype_sum(call->dtype), tag);
    if (!call->grads) return LLMPAR_OK;
    return llmpar_all_reduce(((const llmpar__part *)call->user)->model->tp.comm, call->stream, &c);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__llama_norm_reduce(const llmpar_unit_call *call, const llmpar__shape *s, void *dw_leaves)
{
    return llmpar__llama_sum_leaves(call, "norm weight/all_reduce", s->leaves * s->d, dw_leaves);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__llama_norm_weight(const llmpar_unit_call *call, const llmpar__shape *s, int64_t dim, const void *dw_leaves, void *dw)
{
    const void **in = LLMPAR__ALLOC(const void *, &call->ctx->heap, (size_t)s->leaves);
    if (!in) return llmpar_fail(call->ctx, LLMPAR_ERR_MEMORY, "llama: no memory for %lld leaves", (long long)s->leaves);
    for (int64_t i = 0; i < s->leaves; i++) in[i] = (const char *)dw_leaves + (size_t)(i * dim) * s->sum_size;
    llmpar_status status = llmpar__device_reduce(call->device, call->stream, LLMPAR_SUM, in, (int32_t)s->leaves, (size_t)dim, dw, s->sum);
    llmpar_heap_free(&call->ctx->heap, (void *)in);
    return status;
}

#endif /* LLMPAR_NO_LLAMA */
