#include "model/llama.h"
#include "model/llama_internal.h"

#include <string.h>

#include "base/math.h"

#if !defined(LLMPAR_NO_LLAMA)

/* One transformer block as a unit. Every buffer of a pass lies at an offset of this layout, which `sizes` and the callbacks share.

   saved    h1[Ns,D] rstd1[Ns]  qkv[N,(h+2k)E]  o[N,hE] lse[B,h,T]  x2[Ns,D]  h2[Ns,D] rstd2[Ns]  gate[N,f] up[N,f]
   scratch  full[N,D] (gathered rows, sequence parallel)  part[N,D]  sum[Ns,D] (what the reduce gives; = part without sequence parallel)
            backward also: dfull[N,D]  dh[N,max(f, hE)]  dqkv[N,(h+2k)E]  dx2[Ns,D]  dkv[N,2E] (ranks that share a kv head)  leaves1, leaves2 [leaves,D] */
typedef struct llmpar__block {
    llmpar__shape s;
    const llmpar_llama *model;
    const llmpar_tp *tp;
    char *h1, *rstd1, *qkv, *o, *lse, *x2, *h2, *rstd2, *gate, *up;         /* saved */
    char *full, *part, *sum, *dfull, *dh, *dqkv, *dx2, *dkv, *leaves1, *leaves2; /* scratch */
    const char *in1, *in2;  /* what qkv and gate/up read: h1, h2, or the gathered rows */
} llmpar__block;

typedef struct llmpar__block_layout { size_t h1, rstd1, qkv, o, lse, x2, h2, rstd2, gate, up, saved, full, part, sum, dfull, dh, dqkv, dx2, dkv, leaves1, leaves2, scratch; } llmpar__block_layout;

static void llmpar__block_lay(const llmpar_tp *tp, const llmpar__shape *s, int backward, llmpar__block_layout *l)
{
    size_t at = 0, size = s->size;
    l->h1 = llmpar__llama_take(&at, s->ns * s->d, size);
    l->rstd1 = llmpar__llama_take(&at, s->ns, size);
    l->qkv = llmpar__llama_take(&at, s->n * s->ld, size);
    l->o = llmpar__llama_take(&at, s->n * s->h * s->e, size);
    l->lse = llmpar__llama_take(&at, s->n * s->h, size);
    l->x2 = llmpar__llama_take(&at, s->ns * s->d, size);
    l->h2 = llmpar__llama_take(&at, s->ns * s->d, size);
    l->rstd2 = llmpar__llama_take(&at, s->ns, size);
    l->gate = llmpar__llama_take(&at, s->n * s->f, size);
    l->up = llmpar__llama_take(&at, s->n * s->f, size);
    l->saved = at;
    at = 0;
    l->full = llmpar__llama_take(&at, tp->sequence_parallel ? s->n * s->d : 0, size);
    l->part = llmpar__llama_take(&at, s->n * s->d, size);
    l->sum = tp->sequence_parallel ? llmpar__llama_take(&at, s->ns * s->d, size) : l->part;
    l->dh = llmpar__llama_take(&at, s->n * (s->f > s->h * s->e ? s->f : s->h * s->e), size); /* forward: swiglu's output */
    if (backward) {
        l->dfull = llmpar__llama_take(&at, tp->sequence_parallel ? s->n * s->d : 0, size);
        l->dqkv = llmpar__llama_take(&at, s->n * s->ld, size);
        l->dx2 = llmpar__llama_take(&at, s->ns * s->d, size);
        l->dkv = llmpar__llama_take(&at, tp->replicas > 1 ? s->n * 2 * s->e : 0, size);
        l->leaves1 = llmpar__llama_take(&at, s->leaves * s->d, size);
        l->leaves2 = llmpar__llama_take(&at, s->leaves * s->d, size);
    } else {
        l->dfull = l->dqkv = l->dx2 = l->dkv = l->leaves1 = l->leaves2 = 0;
    }
    l->scratch = at;
}

static void llmpar__block_open(const llmpar_unit_call *call, llmpar__block *b)
{
    llmpar__block_layout l;
    memset(b, 0, sizeof *b);
    b->model = (const llmpar_llama *)call->user;
    b->tp = &b->model->tp;
    llmpar__llama_shape(b->model, call->micro, call->dtype, &b->s);
    llmpar__block_lay(b->tp, &b->s, call->pass == LLMPAR_PASS_BACKWARD, &l);
    char *saved = (char *)call->saved, *scratch = (char *)call->scratch;
    b->h1 = saved + l.h1;
    b->rstd1 = saved + l.rstd1;
    b->qkv = saved + l.qkv;
    b->o = saved + l.o;
    b->lse = saved + l.lse;
    b->x2 = saved + l.x2;
    b->h2 = saved + l.h2;
    b->rstd2 = saved + l.rstd2;
    b->gate = saved + l.gate;
    b->up = saved + l.up;
    b->full = scratch + l.full;
    b->part = scratch + l.part;
    b->sum = scratch + l.sum;
    b->dfull = scratch + l.dfull;
    b->dh = scratch + l.dh;
    b->dqkv = scratch + l.dqkv;
    b->dx2 = scratch + l.dx2;
    b->dkv = scratch + l.dkv;
    b->leaves1 = scratch + l.leaves1;
    b->leaves2 = scratch + l.leaves2;
    b->in1 = b->tp->sequence_parallel ? b->full : b->h1;
    b->in2 = b->tp->sequence_parallel ? b->full : b->h2;
}

/* Element offset of k and v in a row of qkv. */
static size_t llmpar__block_k(const llmpar__shape *s) { return (size_t)(s->h * s->e) * s->size; }
static size_t llmpar__block_v(const llmpar__shape *s) { return (size_t)((s->h + s->k) * s->e) * s->size; }

/* Pointers and extents for attention over the joint q,k,v buffer. */
static void llmpar__block_attention(const llmpar__block *b, llmpar_attention_args *args)
{
    const llmpar__shape *s = &b->s;
    memset(args, 0, sizeof *args);
    args->batch = s->b;
    args->tq = args->tk = args->tk_stride = s->t;
    args->heads = s->h;
    args->kv_heads = s->k;
    args->head_dim = s->e;
    args->q = b->qkv;
    args->k = b->qkv + llmpar__block_k(s);
    args->v = b->qkv + llmpar__block_v(s);
    args->ldq = args->ldk = args->ldv = s->ld;
    args->ldo = s->h * s->e;
    args->out = b->o;
    args->lse = b->lse;
    args->scale = llmpar__llama_scale(b->model);
    args->dtype = s->dtype;
}

static llmpar_status llmpar__block_rope(const llmpar_unit_call *call, const llmpar__block *b, char *qkv, int inverse)
{
    const llmpar__shape *s = &b->s;
    llmpar_rope_args args;
    memset(&args, 0, sizeof args);
    args.batch = s->b;
    args.t = s->t;
    args.heads = s->h + s->k; /* k's heads lie behind q's */
    args.head_dim = s->e;
    args.ld = s->ld;
    args.x = qkv;
    args.cosine = b->model->cosine;
    args.sine = b->model->sine;
    args.dtype = s->dtype;
    args.inverse = inverse;
    return call->device->rope(call->device, call->stream, &args);
}

/* The operands of sums over heads and over F, see llmpar_tp_partial. Where several ranks share a kv head only the first carries its segments. */
static void llmpar__block_heads(const llmpar__block *b, const llmpar_unit_call *call, const char *dqkv, llmpar_tp_operand operand[3])
{
    const llmpar__shape *s = &b->s;
    const llmpar_llama_config *c = &b->model->config;
    memset(operand, 0, 3 * sizeof *operand);
    for (int i = 0; i < 3; i++) {
        operand[i].lda = s->ld;
        operand[i].ldb = s->d;
        operand[i].grain = s->e;
        operand[i].per = i ? c->heads / c->kv_heads : 1;
        operand[i].begin = i ? (b->tp->replicas > 1 ? b->tp->rank / b->tp->replicas : llmpar_tp_begin(b->tp, c->kv_heads)) : llmpar_tp_begin(b->tp, c->heads);
        operand[i].count = i ? (b->tp->replicas > 1 ? b->tp->rank % b->tp->replicas == 0 : s->k) : s->h;
    }
    if (!call) return;
    operand[0].a = dqkv;
    operand[1].a = dqkv + llmpar__block_k(s);
    operand[2].a = dqkv + llmpar__block_v(s);
    operand[0].b = call->params[LLMPAR__WQ];
    operand[1].b = call->params[LLMPAR__WK];
    operand[2].b = call->params[LLMPAR__WV];
}

static void llmpar__block_ffn(const llmpar__block *b, const llmpar_unit_call *call, llmpar_tp_operand operand[2])
{
    memset(operand, 0, 2 * sizeof *operand);
    for (int i = 0; i < 2; i++) {
        operand[i].lda = b->s.f;
        operand[i].ldb = b->s.d;
        operand[i].grain = 1;
        operand[i].begin = llmpar_tp_begin(b->tp, b->model->config.intermediate);
        operand[i].count = b->s.f;
    }
    if (!call) return;
    operand[0].a = b->gate;
    operand[1].a = b->up;
    operand[0].b = call->params[LLMPAR__GATE];
    operand[1].b = call->params[LLMPAR__UP];
}

/* A row-parallel product's one operand: a[N, grains*grain] w[D, grains*grain]^T. */
static void llmpar__block_row(const llmpar_tp *tp, const void *a, const void *w, int64_t grains, int64_t grain, llmpar_tp_operand *operand)
{
    memset(operand, 0, sizeof *operand);
    operand->a = a;
    operand->b = w;
    operand->count = llmpar_tp_count(tp, grains);
    operand->begin = llmpar_tp_begin(tp, grains);
    operand->grain = grain;
    operand->lda = operand->ldb = operand->count * grain;
}

LLMPAR__PRIVATE_DEF double llmpar__llama_scale(const llmpar_llama *model) { return 1.0 / llmpar_sqrt_f64((double)model->config.head_dim); }

/* ---- sizes ---- */

static size_t llmpar__block_max(size_t a, size_t b) { return a > b ? a : b; }

/* The largest workspace of any operation below; an operation refuses one that is too small, so this list cannot drift. */
static size_t llmpar__block_workspace(const llmpar__block *b, llmpar_device *device)
{
    const llmpar__shape *s = &b->s;
    const llmpar_tp *tp = b->tp;
    const llmpar_llama_config *c = &b->model->config;
    llmpar_tp_operand heads[3], ffn[2], row;
    llmpar_attention_backward_args attention;
    size_t w = 0;
    llmpar__block_heads(b, NULL, NULL, heads);
    llmpar__block_ffn(b, NULL, ffn);
    w = llmpar__block_max(w, llmpar_tp_product_workspace(tp, LLMPAR_GEMM_NT, s->n, s->h * s->e, s->d, s->dtype));
    w = llmpar__block_max(w, llmpar_tp_product_workspace(tp, LLMPAR_GEMM_NT, s->n, s->k * s->e, s->d, s->dtype));
    w = llmpar__block_max(w, llmpar_tp_product_workspace(tp, LLMPAR_GEMM_NT, s->n, s->f, s->d, s->dtype));
    llmpar__block_row(tp, NULL, NULL, c->heads, s->e, &row);
    w = llmpar__block_max(w, llmpar_tp_partial_workspace(tp, LLMPAR_GEMM_NT, s->n, s->d, c->heads, &row, 1, s->dtype));
    llmpar__block_row(tp, NULL, NULL, c->intermediate, 1, &row);
    w = llmpar__block_max(w, llmpar_tp_partial_workspace(tp, LLMPAR_GEMM_NT, s->n, s->d, c->intermediate, &row, 1, s->dtype));
    w = llmpar__block_max(w, llmpar_tp_product_workspace(tp, LLMPAR_GEMM_NN, s->n, s->f, s->d, s->dtype));
    w = llmpar__block_max(w, llmpar_tp_product_workspace(tp, LLMPAR_GEMM_NN, s->n, s->h * s->e, s->d, s->dtype));
    w = llmpar__block_max(w, llmpar_tp_partial_workspace(tp, LLMPAR_GEMM_NN, s->n, s->d, c->intermediate, ffn, 2, s->dtype));
    w = llmpar__block_max(w, llmpar_tp_partial_workspace(tp, LLMPAR_GEMM_NN, s->n, s->d, c->heads, heads, 3, s->dtype));
    w = llmpar__block_max(w, llmpar_tp_weight_gradient_workspace(tp, s->n, s->leaves, s->d, s->f, s->dtype));
    w = llmpar__block_max(w, llmpar_tp_weight_gradient_workspace(tp, s->n, s->leaves, s->f, s->d, s->dtype));
    w = llmpar__block_max(w, llmpar_tp_weight_gradient_workspace(tp, s->n, s->leaves, s->d, s->h * s->e, s->dtype));
    w = llmpar__block_max(w, llmpar_tp_weight_gradient_workspace(tp, s->n, s->leaves, s->h * s->e, s->d, s->dtype));
    w = llmpar__block_max(w, llmpar_tp_weight_gradient_workspace(tp, s->n, s->leaves, s->k * s->e, s->d, s->dtype));
    memset(&attention, 0, sizeof attention);
    attention.forward.batch = s->b;
    attention.forward.tq = attention.forward.tk = attention.forward.tk_stride = s->t;
    attention.forward.heads = s->h;
    attention.forward.kv_heads = s->k;
    attention.forward.head_dim = s->e;
    attention.forward.ldq = attention.forward.ldk = attention.forward.ldv = s->ld;
    attention.forward.ldo = s->h * s->e;
    attention.forward.dtype = s->dtype;
    w = llmpar__block_max(w, device->attention_workspace(device, &attention.forward));
    return llmpar__block_max(w, device->attention_backward_workspace(device, &attention));
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__block_sizes(void *user, const llmpar_micro *micro, llmpar_dtype dtype, llmpar_unit_sizes *out)
{
    llmpar__block b;
    llmpar__block_layout l;
    memset(&b, 0, sizeof b);
    b.model = (const llmpar_llama *)user;
    b.tp = &b.model->tp;
    llmpar__llama_shape(b.model, micro, dtype, &b.s);
    llmpar__block_lay(b.tp, &b.s, 1, &l);
    out->output = (size_t)(b.s.ns * b.s.d) * b.s.size;
    out->saved = l.saved;
    out->scratch = l.scratch;
    out->workspace = llmpar__block_workspace(&b, b.model->ctx->device);
    return LLMPAR_OK;
}

/* ---- forward ---- */

static llmpar_status llmpar__block_norm1(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    return llmpar__llama_rmsnorm(call->ctx, call->stream, b.model, b.s.ns, call->input, NULL, call->params[LLMPAR__NORM1], NULL, b.h1, b.rstd1);
}

static llmpar_status llmpar__block_gather1(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    return llmpar_tp_gather(b.tp, call->stream, "attention input/all_gather", b.s.b, b.s.t, b.s.d, b.h1, b.full, b.s.dtype);
}

static llmpar_status llmpar__block_attend(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar_attention_args attention;
    llmpar_tp_operand row;
    llmpar__block_open(call, &b);
    const llmpar__shape *s = &b.s;
    llmpar_status status = llmpar_tp_product(b.tp, call->stream, LLMPAR_GEMM_NT, s->n, s->h * s->e, s->d, b.in1, s->d, call->params[LLMPAR__WQ], s->d, b.qkv, s->ld, s->dtype, call->workspace, call->workspace_bytes);
    if (!status) status = llmpar_tp_product(b.tp, call->stream, LLMPAR_GEMM_NT, s->n, s->k * s->e, s->d, b.in1, s->d, call->params[LLMPAR__WK], s->d, b.qkv + llmpar__block_k(s), s->ld, s->dtype, call->workspace, call->workspace_bytes);
    if (!status) status = llmpar_tp_product(b.tp, call->stream, LLMPAR_GEMM_NT, s->n, s->k * s->e, s->d, b.in1, s->d, call->params[LLMPAR__WV], s->d, b.qkv + llmpar__block_v(s), s->ld, s->dtype, call->workspace, call->workspace_bytes);
    if (!status) status = llmpar__block_rope(call, &b, b.qkv, 0);
    llmpar__block_attention(&b, &attention);
    attention.workspace = call->workspace;
    attention.workspace_bytes = call->workspace_bytes;
    if (!status) status = call->device->attention(call->device, call->stream, &attention);
    llmpar__block_row(b.tp, b.o, call->params[LLMPAR__WO], b.model->config.heads, s->e, &row);
    if (!status) status = llmpar_tp_partial(b.tp, call->stream, LLMPAR_GEMM_NT, s->n, s->d, b.model->config.heads, &row, 1, s->dtype, b.part, call->workspace, call->workspace_bytes);
    return status;
}

static llmpar_status llmpar__block_reduce(llmpar_unit_call *call, const char *tag)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    return llmpar_tp_reduce(b.tp, call->stream, tag, b.s.b, b.s.t, b.s.d, b.part, b.sum, b.s.dtype);
}
static llmpar_status llmpar__block_reduce1(llmpar_unit_call *call) { return llmpar__block_reduce(call, "attention output/reduce"); }
static llmpar_status llmpar__block_reduce2(llmpar_unit_call *call) { return llmpar__block_reduce(call, "mlp output/reduce"); }
static llmpar_status llmpar__block_dreduce1(llmpar_unit_call *call) { return llmpar__block_reduce(call, "attention dx/reduce"); }
static llmpar_status llmpar__block_dreduce2(llmpar_unit_call *call) { return llmpar__block_reduce(call, "mlp dx/reduce"); }

static llmpar_status llmpar__block_norm2(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    return llmpar__llama_rmsnorm(call->ctx, call->stream, b.model, b.s.ns, b.sum, call->input, call->params[LLMPAR__NORM2], b.x2, b.h2, b.rstd2);
}

static llmpar_status llmpar__block_gather2(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    return llmpar_tp_gather(b.tp, call->stream, "mlp input/all_gather", b.s.b, b.s.t, b.s.d, b.h2, b.full, b.s.dtype);
}

static llmpar_status llmpar__block_mlp(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar_tp_operand row;
    llmpar_swiglu_args swiglu;
    llmpar__block_open(call, &b);
    const llmpar__shape *s = &b.s;
    llmpar_status status = llmpar_tp_product(b.tp, call->stream, LLMPAR_GEMM_NT, s->n, s->f, s->d, b.in2, s->d, call->params[LLMPAR__GATE], s->d, b.gate, s->f, s->dtype, call->workspace, call->workspace_bytes);
    if (!status) status = llmpar_tp_product(b.tp, call->stream, LLMPAR_GEMM_NT, s->n, s->f, s->d, b.in2, s->d, call->params[LLMPAR__UP], s->d, b.up, s->f, s->dtype, call->workspace, call->workspace_bytes);
    memset(&swiglu, 0, sizeof swiglu);
    swiglu.rows = s->n;
    swiglu.dim = swiglu.ld_in = swiglu.ld_out = s->f;
    swiglu.gate = b.gate;
    swiglu.up = b.up;
    swiglu.h = b.dh;
    swiglu.dtype = s->dtype;
    if (!status) status = call->device->swiglu(call->device, call->stream, &swiglu);
    llmpar__block_row(b.tp, b.dh, call->params[LLMPAR__DOWN], b.model->config.intermediate, 1, &row);
    if (!status) status = llmpar_tp_partial(b.tp, call->stream, LLMPAR_GEMM_NT, s->n, s->d, b.model->config.intermediate, &row, 1, s->dtype, b.part, call->workspace, call->workspace_bytes);
    return status;
}

static llmpar_status llmpar__block_residual(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar_add_args args;
    llmpar__block_open(call, &b);
    memset(&args, 0, sizeof args);
    args.count = (size_t)(b.s.ns * b.s.d);
    args.a = b.x2;
    args.b = b.sum;
    args.out = call->output;
    args.dtype = b.s.dtype;
    return call->device->add(call->device, call->stream, &args);
}

LLMPAR__PRIVATE_DEF const llmpar__op_row *llmpar__block_forward_ops(int32_t *count)
{
    static const llmpar__op_row rows[] = {
        /* 1 */ {{"norm", llmpar__block_norm1, LLMPAR_COMPUTE, {0, 0}, 0, 0}, LLMPAR__ALWAYS},
        /* 2 */ {{"attention input", llmpar__block_gather1, LLMPAR_TP_GATHER, {1, 0}, 0, 0}, LLMPAR__IF_SP},
        /* 3 */ {{"q k v, rope, attention, wo", llmpar__block_attend, LLMPAR_COMPUTE, {2, 0}, 0, 0}, LLMPAR__ALWAYS},
        /* 4 */ {{"attention output", llmpar__block_reduce1, LLMPAR_TP_REDUCE, {3, 0}, 0, 0}, LLMPAR__IF_TP},
        /* 5 */ {{"residual, norm", llmpar__block_norm2, LLMPAR_COMPUTE, {4, 0}, 0, 0}, LLMPAR__ALWAYS},
        /* 6 */ {{"mlp input", llmpar__block_gather2, LLMPAR_TP_GATHER, {5, 0}, 0, 0}, LLMPAR__IF_SP},
        /* 7 */ {{"gate, up, swiglu, down", llmpar__block_mlp, LLMPAR_COMPUTE, {6, 0}, 0, 0}, LLMPAR__ALWAYS},
        /* 8 */ {{"mlp output", llmpar__block_reduce2, LLMPAR_TP_REDUCE, {7, 0}, 0, 0}, LLMPAR__IF_TP},
        /* 9 */ {{"residual", llmpar__block_residual, LLMPAR_COMPUTE, {8, 0}, 0, 0}, LLMPAR__ALWAYS},
    };
    *count = (int32_t)(sizeof rows / sizeof rows[0]);
    return rows;
}

/* ---- backward ---- */

static llmpar_status llmpar__block_gather_dout(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    return llmpar_tp_gather(b.tp, call->stream, "mlp doutput/all_gather", b.s.b, b.s.t, b.s.d, call->doutput, b.dfull, b.s.dtype);
}

static llmpar_status llmpar__block_gather_dx2(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    return llmpar_tp_gather(b.tp, call->stream, "attention doutput/all_gather", b.s.b, b.s.t, b.s.d, b.dx2, b.dfull, b.s.dtype);
}

static const void *llmpar__block_dout(const llmpar_unit_call *call, const llmpar__block *b) { return b->tp->sequence_parallel ? b->dfull : call->doutput; }

/* dh = dout Wd, through swiglu into gate and up in place; h, recomputed, takes dh's place for dWd = dout^T h. */
static llmpar_status llmpar__block_dmlp(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar_swiglu_backward_args swiglu;
    llmpar_tp_operand ffn[2];
    llmpar__block_open(call, &b);
    const llmpar__shape *s = &b.s;
    llmpar_status status = llmpar_tp_product(b.tp, call->stream, LLMPAR_GEMM_NN, s->n, s->f, s->d, llmpar__block_dout(call, &b), s->d, call->params[LLMPAR__DOWN], s->f, b.dh, s->f, s->dtype, call->workspace, call->workspace_bytes);
    memset(&swiglu, 0, sizeof swiglu);
    swiglu.rows = s->n;
    swiglu.dim = swiglu.ld_in = swiglu.ld_out = s->f;
    swiglu.gate = b.gate;
    swiglu.up = b.up;
    swiglu.dh = b.dh;
    swiglu.dgate = b.gate;
    swiglu.dup = b.up;
    swiglu.h = b.dh;
    swiglu.dtype = s->dtype;
    if (!status) status = call->device->swiglu_backward(call->device, call->stream, &swiglu);
    llmpar__block_ffn(&b, call, ffn);
    if (!status) status = llmpar_tp_partial(b.tp, call->stream, LLMPAR_GEMM_NN, s->n, s->d, b.model->config.intermediate, ffn, 2, s->dtype, b.part, call->workspace, call->workspace_bytes);
    return status;
}

static llmpar_status llmpar__block_dw_mlp(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    const llmpar__shape *s = &b.s;
    llmpar_status status = llmpar_tp_weight_gradient(b.tp, call->stream, s->n, s->leaves, s->d, s->f, llmpar__block_dout(call, &b), s->d, b.dh, s->f, call->grads[LLMPAR__DOWN], s->dtype, call->workspace, call->workspace_bytes);
    if (!status) status = llmpar_tp_weight_gradient(b.tp, call->stream, s->n, s->leaves, s->f, s->d, b.gate, s->f, b.in2, s->d, call->grads[LLMPAR__GATE], s->dtype, call->workspace, call->workspace_bytes);
    if (!status) status = llmpar_tp_weight_gradient(b.tp, call->stream, s->n, s->leaves, s->f, s->d, b.up, s->f, b.in2, s->d, call->grads[LLMPAR__UP], s->dtype, call->workspace, call->workspace_bytes);
    return status;
}

static llmpar_status llmpar__block_dnorm2(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    return llmpar__llama_norm_backward(call, &b.s, b.sum, b.x2, call->params[LLMPAR__NORM2], b.rstd2, call->doutput, b.dx2, b.leaves2);
}

static llmpar_status llmpar__block_norm2_reduce(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    return llmpar__llama_norm_reduce(call, &b.s, b.leaves2);
}

static llmpar_status llmpar__block_dattend(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar_attention_backward_args attention;
    llmpar__block_open(call, &b);
    const llmpar__shape *s = &b.s;
    const void *dx2 = b.tp->sequence_parallel ? b.dfull : b.dx2;
    llmpar_status status = llmpar__llama_norm_weight(call, s, b.leaves2, call->grads[LLMPAR__NORM2]);
    if (!status) status = llmpar_tp_weight_gradient(b.tp, call->stream, s->n, s->leaves, s->d, s->h * s->e, dx2, s->d, b.o, s->h * s->e, call->grads[LLMPAR__WO], s->dtype, call->workspace, call->workspace_bytes);
    if (!status) status = llmpar_tp_product(b.tp, call->stream, LLMPAR_GEMM_NN, s->n, s->h * s->e, s->d, dx2, s->d, call->params[LLMPAR__WO], s->h * s->e, b.dh, s->h * s->e, s->dtype, call->workspace, call->workspace_bytes);
    memset(&attention, 0, sizeof attention);
    llmpar__block_attention(&b, &attention.forward);
    attention.forward.workspace = call->workspace;
    attention.forward.workspace_bytes = call->workspace_bytes;
    attention.dout = b.dh;
    attention.dq = b.dqkv;
    attention.dk = b.dqkv + llmpar__block_k(s);
    attention.dv = b.dqkv + llmpar__block_v(s);
    if (!status) status = call->device->attention_backward(call->device, call->stream, &attention);
    return status;
}

/* Ranks that share a kv head: dk and dv are summed over its query heads, row by row since they lie inside the joint buffer's rows. */
static llmpar_status llmpar__block_kv(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    const llmpar__shape *s = &b.s;
    llmpar_copy_rows_args copy;
    llmpar_collective c;
    memset(&copy, 0, sizeof copy);
    copy.rows = s->n;
    copy.width = copy.ld_out = 2 * s->e;
    copy.ld_in = s->ld;
    copy.size = s->size;
    copy.in = b.dqkv + llmpar__block_k(s);
    copy.out = b.dkv;
    llmpar_status status = call->device->copy_rows(call->device, call->stream, &copy);
    memset(&c, 0, sizeof c);
    c.send = c.recv = b.dkv;
    c.count = (size_t)(s->n * 2 * s->e);
    c.dtype = s->dtype;
    c.tag = "dk dv/all_reduce";
    if (!status) status = llmpar_all_reduce(b.tp->kv, call->stream, &c);
    copy.ld_in = 2 * s->e;
    copy.ld_out = s->ld;
    copy.in = b.dkv;
    copy.out = b.dqkv + llmpar__block_k(s);
    return status ? status : call->device->copy_rows(call->device, call->stream, &copy);
}

static llmpar_status llmpar__block_dqkv(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar_tp_operand heads[3];
    llmpar__block_open(call, &b);
    llmpar_status status = llmpar__block_rope(call, &b, b.dqkv, 1);
    llmpar__block_heads(&b, call, b.dqkv, heads);
    return status ? status : llmpar_tp_partial(b.tp, call->stream, LLMPAR_GEMM_NN, b.s.n, b.s.d, b.model->config.heads, heads, 3, b.s.dtype, b.part, call->workspace, call->workspace_bytes);
}

static llmpar_status llmpar__block_dw_qkv(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    const llmpar__shape *s = &b.s;
    llmpar_status status = llmpar_tp_weight_gradient(b.tp, call->stream, s->n, s->leaves, s->h * s->e, s->d, b.dqkv, s->ld, b.in1, s->d, call->grads[LLMPAR__WQ], s->dtype, call->workspace, call->workspace_bytes);
    if (!status) status = llmpar_tp_weight_gradient(b.tp, call->stream, s->n, s->leaves, s->k * s->e, s->d, b.dqkv + llmpar__block_k(s), s->ld, b.in1, s->d, call->grads[LLMPAR__WK], s->dtype, call->workspace, call->workspace_bytes);
    if (!status) status = llmpar_tp_weight_gradient(b.tp, call->stream, s->n, s->leaves, s->k * s->e, s->d, b.dqkv + llmpar__block_v(s), s->ld, b.in1, s->d, call->grads[LLMPAR__WV], s->dtype, call->workspace, call->workspace_bytes);
    return status;
}

static llmpar_status llmpar__block_dnorm1(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    return llmpar__llama_norm_backward(call, &b.s, b.sum, call->input, call->params[LLMPAR__NORM1], b.rstd1, b.dx2, call->dinput, b.leaves1);
}

static llmpar_status llmpar__block_norm1_reduce(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    return llmpar__llama_norm_reduce(call, &b.s, b.leaves1);
}

static llmpar_status llmpar__block_norm1_weight(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    return llmpar__llama_norm_weight(call, &b.s, b.leaves1, call->grads[LLMPAR__NORM1]);
}

/* The reductions of dx run beside the weight gradients of the same layers. */
LLMPAR__PRIVATE_DEF const llmpar__op_row *llmpar__block_backward_ops(int32_t *count)
{
    static const llmpar__op_row rows[] = {
        /* 1 */ {{"doutput", llmpar__block_gather_dout, LLMPAR_TP_GATHER, {0, 0}, 0, 0}, LLMPAR__IF_SP},
        /* 2 */ {{"mlp input again", llmpar__block_gather2, LLMPAR_TP_GATHER, {0, 0}, 0, 0}, LLMPAR__IF_SP},
        /* 3 */ {{"down, swiglu, mlp dx", llmpar__block_dmlp, LLMPAR_COMPUTE, {1, 0}, 0, 0}, LLMPAR__ALWAYS},
        /* 4 */ {{"mlp dx", llmpar__block_dreduce2, LLMPAR_TP_REDUCE, {3, 0}, 0, 0}, LLMPAR__IF_TP},
        /* 5 */ {{"down, gate, up dW", llmpar__block_dw_mlp, LLMPAR_COMPUTE, {2, 0}, 0, 0}, LLMPAR__ALWAYS},
        /* 6 */ {{"norm", llmpar__block_dnorm2, LLMPAR_COMPUTE, {4, 0}, 0, 0}, LLMPAR__ALWAYS},
        /* 7 */ {{"norm dW", llmpar__block_norm2_reduce, LLMPAR_TP_REDUCE, {6, 0}, 0, 0}, LLMPAR__IF_SP},
        /* 8 */ {{"dx", llmpar__block_gather_dx2, LLMPAR_TP_GATHER, {6, 0}, 0, 0}, LLMPAR__IF_SP},
        /* 9 */ {{"attention input again", llmpar__block_gather1, LLMPAR_TP_GATHER, {5, 0}, 0, 0}, LLMPAR__IF_SP},
        /* 10 */ {{"norm dW, wo dW, attention", llmpar__block_dattend, LLMPAR_COMPUTE, {7, 8}, 0, 0}, LLMPAR__ALWAYS},
        /* 11 */ {{"dk dv", llmpar__block_kv, LLMPAR_TP_REDUCE, {10, 0}, 0, 0}, LLMPAR__IF_KV},
        /* 12 */ {{"rope, attention dx", llmpar__block_dqkv, LLMPAR_COMPUTE, {11, 0}, 0, 0}, LLMPAR__ALWAYS},
        /* 13 */ {{"attention dx", llmpar__block_dreduce1, LLMPAR_TP_REDUCE, {12, 0}, 0, 0}, LLMPAR__IF_TP},
        /* 14 */ {{"q k v dW", llmpar__block_dw_qkv, LLMPAR_COMPUTE, {9, 0}, 0, 0}, LLMPAR__ALWAYS},
        /* 15 */ {{"norm", llmpar__block_dnorm1, LLMPAR_COMPUTE, {13, 0}, 0, 0}, LLMPAR__ALWAYS},
        /* 16 */ {{"norm dW", llmpar__block_norm1_reduce, LLMPAR_TP_REDUCE, {15, 0}, 0, 0}, LLMPAR__IF_SP},
        /* 17 */ {{"norm dW", llmpar__block_norm1_weight, LLMPAR_COMPUTE, {16, 0}, 0, 0}, LLMPAR__ALWAYS},
    };
    *count = (int32_t)(sizeof rows / sizeof rows[0]);
    return rows;
}

#endif /* LLMPAR_NO_LLAMA */
