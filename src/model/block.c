#include "model/llama.h"
#include "model/llama_internal.h"

#include <string.h>

#include "base/math.h"
#include "tables/tables_internal.h"

#if !defined(LLMPAR_NO_LLAMA)

/* The two halves of a transformer block: x + attention(norm(x)) and x + mlp(norm(x)). A unit holds one half, a block or several blocks: the rows of its halves one after the other, each with op.index = its place in the unit.
   Every buffer of a pass lies at an offset of this layout, which `sizes` and the callbacks share.

   saved, for each half:   h[Ns,D] (norm's output; selective recomputation makes it again)  rstd[Ns]  attention: qkv[N,hE][N,kE][N,kE] o[N,hE] lse[B,h,T]  (q and k normalised: raw[N,hE][N,kE] before the norm, qk_rstd[N*h][N*k])  mlp: gate[N,f] up[N,f]  stream[Ns,D] (the half's output, unless it is the unit's)
   scratch, for all halves: full[N,D] (gathered rows, sequence parallel)  part[N,D] (partial sums)  sum[Ns,D] (what the reduce gives; = part where nothing is scattered or rounded)
            act: forward swiglu's output, backward the gradient of it or of o  h[Ns,D], spare[Ns] (selective)
            backward also: dfull[N,D]  dqkv, as qkv  dx[Ns,D] (between halves)  dkv[2][N,E] (ranks that share a kv head; = dqkv's where nothing is rounded)  leaves[leaves,D]  qk_leaves[2][leaves,E] (norms of q and k)
   Partial sums, rstds, lse, dkv and leaves are of the sum type, all else of the compute dtype. Rounding points: every product, norm, rope, attention and swiglu output; a partial sum once, behind its tree; then the residual. */
typedef struct llmpar__block_half {
    llmpar__shape s;
    const llmpar__part *part_of;
    const llmpar_llama *model;
    const llmpar_tp *tp;
    int mlp, first, last, again;    /* again: h is made again in backward */
    int32_t param;                  /* of the half's norm */
    const char *input;
    char *output;
    const char *dout;
    char *din;
    char *h, *rstd, *qkv, *raw, *qk_rstd, *o, *lse, *gate, *up; /* saved (h: scratch if again) */
    char *full, *part, *sum, *act, *spare, *dfull, *dqkv, *dx, *dkv, *leaves, *qk_leaves; /* scratch */
    const char *in;                 /* what the products read: h, or the gathered rows */
} llmpar__block_half;

/* Offsets of half `j` of the unit; saved, scratch: bytes of all. */
typedef struct llmpar__block_layout { size_t before, h, rstd, qkv, raw, qk_rstd, o, lse, gate, up, stream, saved, full, part, sum, act, spare, dfull, dqkv, dx, dkv, leaves, qk_leaves, scratch; } llmpar__block_layout;

static int llmpar__block_has_norms(const llmpar_llama *model) { return model->place[LLMPAR__QNORM] >= 0; } /* of q and k */

/* Where k and v begin in qkv, in bytes. */
static size_t llmpar__block_k(const llmpar__shape *s) { return (size_t)(s->n * s->h * s->e) * s->size; }
static size_t llmpar__block_v(const llmpar__shape *s) { return (size_t)(s->n * (s->h + s->k) * s->e) * s->size; }

static void llmpar__block_lay(const llmpar__part *part, const llmpar__shape *s, int again, int backward, int32_t j, llmpar__block_layout *l)
{
    const llmpar_tp *tp = &part->model->tp;
    size_t at = 0, spare_h;
    int64_t gathered = tp->sequence_parallel ? s->n * s->d : 0, act = 0;
    int norms = llmpar__block_has_norms(part->model), attention = !(part->first & 1) || part->halves > 1, mlp = (part->first & 1) || part->halves > 1;
    memset(l, 0, sizeof *l);
    for (int32_t i = 0; i < part->halves; i++) {
        int is_mlp = (part->first + i) & 1;
        llmpar__block_layout here = *l;
        here.h = llmpar__llama_take(&at, again ? 0 : s->ns * s->d, s->size);
        here.rstd = llmpar__llama_take(&at, s->ns, s->sum_size);
        here.qkv = llmpar__llama_take(&at, is_mlp ? 0 : s->n * s->qkv, s->size);
        here.raw = llmpar__llama_take(&at, is_mlp || !norms ? 0 : s->n * (s->h + s->k) * s->e, s->size);
        here.qk_rstd = llmpar__llama_take(&at, is_mlp || !norms ? 0 : s->n * (s->h + s->k), s->sum_size);
        here.o = llmpar__llama_take(&at, is_mlp ? 0 : s->n * s->h * s->e, s->size);
        here.lse = llmpar__llama_take(&at, is_mlp ? 0 : s->n * s->h, s->sum_size);
        here.gate = llmpar__llama_take(&at, is_mlp ? s->n * s->f : 0, s->size);
        here.up = llmpar__llama_take(&at, is_mlp ? s->n * s->f : 0, s->size);
        here.stream = llmpar__llama_take(&at, i + 1 < part->halves ? s->ns * s->d : 0, s->size);
        if (i < j) here.before = here.stream;
        if (i <= j) *l = here;
    }
    l->saved = at;
    at = 0;
    if (mlp) act = s->n * s->f;
    if (attention && backward && s->n * s->h * s->e > act) act = s->n * s->h * s->e;
    l->full = llmpar__llama_take(&at, gathered, s->size);
    l->part = llmpar__llama_take(&at, (int64_t)llmpar_tp_partial_bytes(tp, s->b, s->t, s->d, s->dtype), 1);
    l->sum = tp->sequence_parallel || llmpar_tp_partial_dtype(tp, s->dtype) != s->dtype ? llmpar__llama_take(&at, s->ns * s->d, s->size) : l->part;
    l->act = llmpar__llama_take(&at, act, s->size);
    spare_h = llmpar__llama_take(&at, again ? s->ns * s->d : 0, s->size);
    if (again) l->h = spare_h;
    l->spare = llmpar__llama_take(&at, again ? s->ns : 0, s->sum_size);
    if (backward) {
        l->dfull = llmpar__llama_take(&at, gathered, s->size);
        l->dqkv = llmpar__llama_take(&at, attention ? s->n * s->qkv : 0, s->size);
        l->dx = llmpar__llama_take(&at, s->ns * s->d, s->size);
        l->dkv = s->sum == s->dtype ? l->dqkv + llmpar__block_k(s) : llmpar__llama_take(&at, attention && tp->replicas > 1 ? s->n * 2 * s->e : 0, s->sum_size);
        l->leaves = llmpar__llama_take(&at, s->leaves * s->d, s->sum_size);
        l->qk_leaves = llmpar__llama_take(&at, attention && norms ? 2 * s->leaves * s->e : 0, s->sum_size);
    }
    l->scratch = at;
}

static llmpar__block_half llmpar__block_open_at(const llmpar_unit_call *call, int32_t j)
{
    llmpar__block_half half, *b = &half;
    llmpar__block_layout l;
    memset(b, 0, sizeof *b);
    b->part_of = (const llmpar__part *)call->user;
    b->model = b->part_of->model;
    b->tp = &b->model->tp;
    b->mlp = (b->part_of->first + j) & 1;
    b->first = j == 0;
    b->last = j + 1 == b->part_of->halves;
    b->again = call->recompute == LLMPAR_RECOMPUTE_SELECTIVE;
    llmpar__llama_home(b->model, b->part_of->first + j, &b->param);
    llmpar__llama_shape(b->model, call->micro, call->dtype, &b->s);
    llmpar__block_lay(b->part_of, &b->s, b->again, call->pass == LLMPAR_PASS_BACKWARD, j, &l);
    char *saved = (char *)call->saved, *scratch = (char *)call->scratch;
    b->h = (b->again ? scratch : saved) + l.h;
    b->rstd = saved + l.rstd;
    b->qkv = saved + l.qkv;
    b->raw = saved + l.raw;
    b->qk_rstd = saved + l.qk_rstd;
    b->o = saved + l.o;
    b->lse = saved + l.lse;
    b->gate = saved + l.gate;
    b->up = saved + l.up;
    b->full = scratch + l.full;
    b->part = scratch + l.part;
    b->sum = scratch + l.sum;
    b->act = scratch + l.act;
    b->spare = scratch + l.spare;
    b->dfull = scratch + l.dfull;
    b->dqkv = scratch + l.dqkv;
    b->dx = scratch + l.dx;
    b->dkv = scratch + l.dkv;
    b->leaves = scratch + l.leaves;
    b->qk_leaves = scratch + l.qk_leaves;
    b->in = b->tp->sequence_parallel ? b->full : b->h;
    b->input = b->first ? (const char *)call->input : saved + l.before;
    b->output = b->last ? (char *)call->output : saved + l.stream;
    b->dout = b->last ? (const char *)call->doutput : b->dx;
    b->din = b->first && call->dinput ? (char *)call->dinput : b->dx; /* the norm's weight gradient comes with it, wanted or not */
    return half;
}
static llmpar__block_half llmpar__block_open(const llmpar_unit_call *call) { return llmpar__block_open_at(call, call->index); }

/* Place of parameter p among those of the call; NULL where the family has none. */
static void *llmpar__block_at(const llmpar__block_half *b, void *const *of, int p)
{
    const int32_t *place = b->model->place;
    return place[p] < 0 ? NULL : of[b->param + place[p] - (b->mlp ? place[LLMPAR__NORM2] : 0)];
}
static void *llmpar__block_param(const llmpar__block_half *b, const llmpar_unit_call *call, int p) { return llmpar__block_at(b, call->params, p); }
static void *llmpar__block_grad(const llmpar__block_half *b, const llmpar_unit_call *call, int p) { return llmpar__block_at(b, call->grads, p); }

/* Pointers and extents for attention. */
static void llmpar__block_attention(const llmpar__block_half *b, const llmpar_unit_call *call, llmpar_attention_args *args)
{
    const llmpar__shape *s = &b->s;
    memset(args, 0, sizeof *args);
    args->batch = s->b;
    args->tq = args->tk = args->tk_stride = s->t;
    args->heads = s->h;
    args->kv_heads = s->k;
    args->head_dim = s->e;
    args->ldq = args->ldo = s->h * s->e;
    args->ldk = args->ldv = s->k * s->e;
    args->scale = llmpar__llama_scale(b->model);
    args->dtype = s->dtype;
    if (!call) return;
    args->q = b->qkv;
    args->k = b->qkv + llmpar__block_k(s);
    args->v = b->qkv + llmpar__block_v(s);
    args->out = b->o;
    args->lse = b->lse;
    args->workspace = call->workspace;
    args->workspace_bytes = call->workspace_bytes;
}

static llmpar_status llmpar__block_rope(const llmpar_unit_call *call, const llmpar__block_half *b, char *qkv, int inverse)
{
    const llmpar__shape *s = &b->s;
    llmpar_status status = LLMPAR_OK;
    LLMPAR__ZEROED(llmpar_rope_args, args);
    args.batch = s->b;
    args.t = s->t;
    args.head_dim = s->e;
    args.cosine = b->model->cosine;
    args.sine = b->model->sine;
    args.dtype = s->dtype;
    args.inverse = inverse;
    for (int k = 0; k < 2 && !status; k++) {
        args.heads = k ? s->k : s->h;
        args.ld = args.heads * s->e;
        args.x = qkv + (k ? llmpar__block_k(s) : 0);
        status = call->device->rope(call->device, call->stream, &args);
    }
    return status;
}

/* First of this rank's kv heads. */
static int64_t llmpar__block_first_kv(const llmpar__block_half *b) { return b->tp->replicas > 1 ? b->tp->rank / b->tp->replicas : llmpar_tp_begin(b->tp, b->model->config.kv_heads); }

/* The operands of sums over heads and over F, see llmpar_tp_partial. Where several ranks share a kv head only the first carries its segments. */
static void llmpar__block_heads(const llmpar__block_half *b, const llmpar_unit_call *call, const char *dqkv, llmpar_tp_operand operand[3])
{
    const llmpar__shape *s = &b->s;
    const llmpar_llama_config *c = &b->model->config;
    memset(operand, 0, 3 * sizeof *operand);
    for (int i = 0; i < 3; i++) {
        operand[i].lda = (i ? s->k : s->h) * s->e;
        operand[i].ldb = s->d;
        operand[i].grain = s->e;
        operand[i].per = i ? c->heads / c->kv_heads : 1;
        operand[i].begin = i ? llmpar__block_first_kv(b) : llmpar_tp_begin(b->tp, c->heads);
        operand[i].count = i ? (b->tp->replicas > 1 ? b->tp->rank % b->tp->replicas == 0 : s->k) : s->h;
    }
    if (!call) return;
    operand[0].a = dqkv;
    operand[1].a = dqkv + llmpar__block_k(s);
    operand[2].a = dqkv + llmpar__block_v(s);
    operand[0].b = llmpar__block_param(b, call, LLMPAR__WQ);
    operand[1].b = llmpar__block_param(b, call, LLMPAR__WK);
    operand[2].b = llmpar__block_param(b, call, LLMPAR__WV);
}

static void llmpar__block_ffn(const llmpar__block_half *b, const llmpar_unit_call *call, llmpar_tp_operand operand[2])
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
    operand[0].b = llmpar__block_param(b, call, LLMPAR__GATE);
    operand[1].b = llmpar__block_param(b, call, LLMPAR__UP);
}

LLMPAR__PRIVATE_DEF void llmpar__llama_row(const llmpar_tp *tp, const void *a, const void *w, int64_t grains, int64_t grain, llmpar_tp_operand *operand)
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

/* Ranks that share a kv head add theirs in the sum type: llmpar__block_kv. */
static void llmpar__block_dattention(const llmpar__block_half *b, const llmpar_unit_call *call, llmpar_attention_backward_args *args)
{
    const llmpar__shape *s = &b->s;
    int shared = b->tp->replicas > 1;
    memset(args, 0, sizeof *args);
    llmpar__block_attention(b, call, &args->forward);
    args->dkv_dtype = shared ? s->sum : s->dtype;
    if (!call) return;
    args->dout = b->act;
    args->dq = b->dqkv;
    args->dk = shared ? b->dkv : b->dqkv + llmpar__block_k(s);
    args->dv = shared ? b->dkv + (size_t)(s->n * s->e) * s->sum_size : b->dqkv + llmpar__block_v(s);
}

/* ---- sizes ---- */

/* The largest workspace of any operation below; an operation refuses one that is too small, so this list cannot drift. */
static size_t llmpar__block_workspace(const llmpar__block_half *b, llmpar_device *device)
{
    const llmpar__shape *s = &b->s;
    const llmpar_tp *tp = b->tp;
    const llmpar_llama_config *c = &b->model->config;
    llmpar_tp_operand heads[3], ffn[2], row;
    llmpar_attention_backward_args attention;
    size_t w[20], most = 0;
    int n = 0;
    llmpar__block_heads(b, NULL, NULL, heads);
    llmpar__block_ffn(b, NULL, ffn);
    w[n++] = llmpar__llama_linear_workspace(b->model, s->n, s->h * s->e, s->dtype);
    w[n++] = llmpar__llama_linear_workspace(b->model, s->n, s->k * s->e, s->dtype);
    w[n++] = llmpar_tp_product_workspace(tp, LLMPAR_GEMM_NT, s->n, s->f, s->d, s->dtype);
    llmpar__llama_row(tp, NULL, NULL, c->heads, s->e, &row);
    w[n++] = llmpar_tp_partial_workspace(tp, LLMPAR_GEMM_NT, s->n, s->d, c->heads, &row, 1, s->dtype);
    llmpar__llama_row(tp, NULL, NULL, c->intermediate, 1, &row);
    w[n++] = llmpar_tp_partial_workspace(tp, LLMPAR_GEMM_NT, s->n, s->d, c->intermediate, &row, 1, s->dtype);
    w[n++] = llmpar_tp_product_workspace(tp, LLMPAR_GEMM_NN, s->n, s->f, s->d, s->dtype);
    w[n++] = llmpar_tp_product_workspace(tp, LLMPAR_GEMM_NN, s->n, s->h * s->e, s->d, s->dtype);
    w[n++] = llmpar_tp_partial_workspace(tp, LLMPAR_GEMM_NN, s->n, s->d, c->intermediate, ffn, 2, s->dtype);
    w[n++] = llmpar_tp_partial_workspace(tp, LLMPAR_GEMM_NN, s->n, s->d, c->heads, heads, 3, s->dtype);
    const int64_t h = s->h * s->e, k = s->k * s->e, dw[7][2] = { { s->d, s->f }, { s->f, s->d }, { s->d, h }, { h, s->d }, { k, s->d }, { h, 1 }, { k, 1 } };
    for (int i = 0; i < 7; i++) w[n++] = llmpar_tp_weight_gradient_workspace(tp, s->n, s->leaves, dw[i][0], dw[i][1], s->dtype);
    llmpar__block_dattention(b, NULL, &attention);
    w[n++] = device->attention_workspace(device, &attention.forward);
    w[n++] = device->attention_backward_workspace(device, &attention);
    while (n > 0)
        if (w[--n] > most) most = w[n];
    return most;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__block_sizes(void *user, const llmpar_micro *micro, llmpar_dtype dtype, llmpar_unit_sizes *out)
{
    llmpar__block_layout l;
    LLMPAR__ZEROED(llmpar__block_half, b);
    b.part_of = (const llmpar__part *)user;
    b.model = b.part_of->model;
    b.tp = &b.model->tp;
    llmpar__llama_shape(b.model, micro, dtype, &b.s);
    llmpar__block_lay(b.part_of, &b.s, out->recompute == (int32_t)LLMPAR_RECOMPUTE_SELECTIVE, 1, 0, &l);
    out->output = (size_t)(b.s.ns * b.s.d) * b.s.size;
    out->saved = l.saved;
    out->scratch = l.scratch;
    out->workspace = llmpar__block_workspace(&b, b.model->ctx->device);
    return out->workspace == SIZE_MAX ? LLMPAR_ERR_MEMORY : LLMPAR_OK;
}

/* ---- what both halves do ---- */

static llmpar_status llmpar__block_norm(llmpar_unit_call *call)
{
    llmpar__block_half b = llmpar__block_open(call);
    return llmpar__llama_rmsnorm(call->ctx, call->stream, b.model, b.s.ns, b.s.d, b.input, NULL, llmpar__block_param(&b, call, b.mlp ? LLMPAR__NORM2 : LLMPAR__NORM1), NULL, b.h, b.rstd);
}

/* The half before ends here: its reduced sum and its input make this one's input. */
static llmpar_status llmpar__block_residual_norm(llmpar_unit_call *call)
{
    llmpar__block_half b = llmpar__block_open(call), before = llmpar__block_open_at(call, call->index - 1);
    return llmpar__llama_rmsnorm(call->ctx, call->stream, b.model, b.s.ns, b.s.d, b.sum, before.input, llmpar__block_param(&b, call, b.mlp ? LLMPAR__NORM2 : LLMPAR__NORM1), before.output, b.h, b.rstd);
}

/* Selective recomputation: norm's output once more, from the same bits by the same code. */
static llmpar_status llmpar__block_again(llmpar_unit_call *call, const llmpar__block_half *b)
{
    if (!b->again || call->pass != LLMPAR_PASS_BACKWARD) return LLMPAR_OK;
    return llmpar__llama_rmsnorm(call->ctx, call->stream, b->model, b->s.ns, b->s.d, b->input, NULL, llmpar__block_param(b, call, b->mlp ? LLMPAR__NORM2 : LLMPAR__NORM1), NULL, b->h, b->spare);
}

/* Forward, and again in backward for the weight gradients. */
static llmpar_status llmpar__block_gather(llmpar_unit_call *call)
{
    if (call->pass == LLMPAR_PASS_BACKWARD && !call->grads) return LLMPAR_OK;
    llmpar__block_half b = llmpar__block_open(call);
    llmpar_status status = llmpar__block_again(call, &b);
    return status ? status : llmpar_tp_gather(b.tp, call->stream, b.mlp ? "mlp input/all_gather" : "attention input/all_gather", b.s.b, b.s.t, b.s.d, b.h, b.full, b.s.dtype);
}

static llmpar_status llmpar__block_reduce(llmpar_unit_call *call)
{
    int backward = call->pass == LLMPAR_PASS_BACKWARD;
    llmpar__block_half b = llmpar__block_open(call);
    return llmpar_tp_reduce(b.tp, call->stream, b.mlp ? (backward ? "mlp dx/reduce" : "mlp output/reduce") : backward ? "attention dx/reduce" : "attention output/reduce", b.s.b, b.s.t, b.s.d, b.part, b.sum, b.s.dtype);
}

static llmpar_status llmpar__block_residual(llmpar_unit_call *call)
{
    llmpar__block_half b = llmpar__block_open(call);
    LLMPAR__ZEROED(llmpar_add_args, args);
    args.count = (size_t)(b.s.ns * b.s.d);
    args.a = b.input;
    args.b = b.sum;
    args.out = b.output;
    args.dtype = b.s.dtype;
    return call->device->add(call->device, call->stream, &args);
}

static llmpar_status llmpar__block_gather_dout(llmpar_unit_call *call)
{
    llmpar__block_half b = llmpar__block_open(call);
    return llmpar_tp_gather(b.tp, call->stream, b.mlp ? "mlp doutput/all_gather" : "attention doutput/all_gather", b.s.b, b.s.t, b.s.d, b.dout, b.dfull, b.s.dtype);
}

static llmpar_status llmpar__block_dnorm(llmpar_unit_call *call)
{
    llmpar__block_half b = llmpar__block_open(call);
    return llmpar__llama_norm_backward(call, &b.s, b.sum, b.input, llmpar__block_param(&b, call, b.mlp ? LLMPAR__NORM2 : LLMPAR__NORM1), b.rstd, b.dout, b.din, b.leaves);
}

static llmpar_status llmpar__block_norm_reduce(llmpar_unit_call *call)
{
    llmpar__block_half b = llmpar__block_open(call);
    return llmpar__llama_norm_reduce(call, &b.s, b.leaves);
}

static llmpar_status llmpar__block_norm_weight(llmpar_unit_call *call)
{
    if (!call->grads) return LLMPAR_OK;
    llmpar__block_half b = llmpar__block_open(call);
    return llmpar__llama_norm_weight(call, &b.s, b.s.d, b.leaves, llmpar__block_grad(&b, call, b.mlp ? LLMPAR__NORM2 : LLMPAR__NORM1));
}

/* part[N,D] = this rank's part of a[N, grains*grain] w[D, grains*grain]^T */
static llmpar_status llmpar__block_rows(const llmpar__block_half *b, const llmpar_unit_call *call, const char *a, int p, int64_t grains, int64_t grain)
{
    llmpar_tp_operand row;
    llmpar__llama_row(b->tp, a, llmpar__block_param(b, call, p), grains, grain, &row);
    return llmpar_tp_partial(b->tp, call->stream, LLMPAR_GEMM_NT, b->s.n, b->s.d, grains, &row, 1, b->s.dtype, b->part, call->workspace, call->workspace_bytes);
}

/* dw[out_dim, in_dim] of parameter p */
static llmpar_status llmpar__block_dw(const llmpar__block_half *b, const llmpar_unit_call *call, int p, int64_t out_dim, int64_t in_dim, const char *dy, int64_t lddy, const char *x)
{
    return llmpar_tp_weight_gradient(b->tp, call->stream, b->s.n, b->s.leaves, out_dim, in_dim, dy, lddy, x, in_dim, llmpar__block_grad(b, call, p), 0, b->s.dtype, call->workspace, call->workspace_bytes);
}

/* ---- attention ---- */

/* q[N,hE] or k, v[N,kE]: weight wq + i, bias bq + i */
static llmpar_status llmpar__block_head_product(const llmpar__block_half *b, const llmpar_unit_call *call, int i, char *out)
{
    return llmpar__llama_linear(b->model, call->stream, b->s.n, (i ? b->s.k : b->s.h) * b->s.e, b->in, llmpar__block_param(b, call, LLMPAR__WQ + i), 0, llmpar__block_param(b, call, LLMPAR__BQ + i), out, (i ? b->s.k : b->s.h) * b->s.e, call->workspace, call->workspace_bytes);
}

/* Norms of q and of k (i = 1): over E, a row for each head of each token. */
static llmpar_status llmpar__block_head_norm(const llmpar__block_half *b, const llmpar_unit_call *call, int i)
{
    const llmpar__shape *s = &b->s;
    size_t at = i ? llmpar__block_k(s) : 0;
    return llmpar__llama_rmsnorm(call->ctx, call->stream, b->model, s->n * (i ? s->k : s->h), s->e, b->raw + at, NULL, llmpar__block_param(b, call, LLMPAR__QNORM + i), NULL, b->qkv + at, b->qk_rstd + (i ? (size_t)(s->n * s->h) * s->sum_size : 0));
}

/* Back through it, in place. To the operation a token is a sequence and its heads are the positions: so the weight's pieces are pieces of heads, of which this rank holds a part. A kv head that several ranks share counts once. */
static llmpar_status llmpar__block_head_dnorm(const llmpar__block_half *b, const llmpar_unit_call *call, int i)
{
    const llmpar__shape *s = &b->s;
    const llmpar_llama_config *c = &b->model->config;
    size_t at = i ? llmpar__block_k(s) : 0, leaves = (size_t)(s->leaves * s->e) * s->sum_size;
    LLMPAR__ZEROED(llmpar_rmsnorm_backward_args, args);
    args.tokens.batch = s->n;
    args.tokens.t = i ? s->k : s->h;
    args.tokens.t_begin = i ? llmpar__block_first_kv(b) : llmpar_tp_begin(b->tp, c->heads);
    args.tokens.t_total = i ? c->kv_heads : c->heads;
    args.tokens.leaves = s->leaves;
    args.tokens.canon = b->tp->pieces;
    args.dim = s->e;
    args.dy = args.dx = b->dqkv + at;
    args.x = b->raw + at;
    args.w = llmpar__block_param(b, call, LLMPAR__QNORM + i);
    args.rstd = b->qk_rstd + (i ? (size_t)(s->n * s->h) * s->sum_size : 0);
    args.dw_leaves = call->grads ? b->qk_leaves + (i ? leaves : 0) : NULL;
    args.dtype = s->dtype;
    llmpar_status status = call->device->rmsnorm_backward(call->device, call->stream, &args);
    if (!status && args.dw_leaves && i && b->tp->rank % b->tp->replicas) status = call->device->zero(call->device, call->stream, args.dw_leaves, leaves);
    return status;
}

static llmpar_status llmpar__block_attend(llmpar_unit_call *call)
{
    llmpar_attention_args attention;
    llmpar__block_half b = llmpar__block_open(call);
    const llmpar__shape *s = &b.s;
    int norms = llmpar__block_has_norms(b.model);
    llmpar_status status = llmpar__block_head_product(&b, call, 0, norms ? b.raw : b.qkv);
    if (!status) status = llmpar__block_head_product(&b, call, 1, (norms ? b.raw : b.qkv) + llmpar__block_k(s));
    if (!status) status = llmpar__block_head_product(&b, call, 2, b.qkv + llmpar__block_v(s));
    for (int i = 0; i < 2 && norms && !status; i++) status = llmpar__block_head_norm(&b, call, i);
    if (!status) status = llmpar__block_rope(call, &b, b.qkv, 0);
    llmpar__block_attention(&b, call, &attention);
    return status ? status : call->device->attention(call->device, call->stream, &attention);
}

static llmpar_status llmpar__block_wo(llmpar_unit_call *call)
{
    llmpar__block_half b = llmpar__block_open(call);
    return llmpar__block_rows(&b, call, b.o, LLMPAR__WO, b.model->config.heads, b.s.e);
}

static const char *llmpar__block_dout(const llmpar__block_half *b) { return b->tp->sequence_parallel ? b->dfull : b->dout; }

static llmpar_status llmpar__block_dattend(llmpar_unit_call *call)
{
    llmpar_attention_backward_args attention;
    llmpar__block_half b = llmpar__block_open(call);
    const llmpar__shape *s = &b.s;
    llmpar_status status = call->grads ? llmpar__block_dw(&b, call, LLMPAR__WO, s->d, s->h * s->e, llmpar__block_dout(&b), s->d, b.o) : LLMPAR_OK;
    if (!status) status = llmpar_tp_product(b.tp, call->stream, LLMPAR_GEMM_NN, s->n, s->h * s->e, s->d, llmpar__block_dout(&b), s->d, llmpar__block_param(&b, call, LLMPAR__WO), s->h * s->e, b.act, s->h * s->e, s->dtype, call->workspace, call->workspace_bytes);
    llmpar__block_dattention(&b, call, &attention);
    return status ? status : call->device->attention_backward(call->device, call->stream, &attention);
}

/* Ranks that share a kv head: dk and dv are summed over its query heads, and rounded once on their way to dqkv, where they stand one behind the other too. */
static llmpar_status llmpar__block_kv(llmpar_unit_call *call)
{
    llmpar__block_half b = llmpar__block_open(call);
    const llmpar__shape *s = &b.s;
    const llmpar_collective c = llmpar__comm_collective(b.dkv, b.dkv, (size_t)(s->n * 2 * s->e), s->sum, "dk dv/all_reduce");
    llmpar_status status = llmpar_all_reduce(b.tp->kv, call->stream, &c);
    return status || s->dtype == s->sum ? status : llmpar__device_cast(call->device, call->stream, b.dkv, s->sum, b.dqkv + llmpar__block_k(s), s->dtype, c.count);
}

static llmpar_status llmpar__block_dqkv(llmpar_unit_call *call)
{
    llmpar_tp_operand heads[3];
    llmpar__block_half b = llmpar__block_open(call);
    llmpar_status status = llmpar__block_rope(call, &b, b.dqkv, 1);
    for (int i = 0; i < 2 && llmpar__block_has_norms(b.model) && !status; i++) status = llmpar__block_head_dnorm(&b, call, i);
    llmpar__block_heads(&b, call, b.dqkv, heads);
    return status ? status : llmpar_tp_partial(b.tp, call->stream, LLMPAR_GEMM_NN, b.s.n, b.s.d, b.model->config.heads, heads, 3, b.s.dtype, b.part, call->workspace, call->workspace_bytes);
}

static llmpar_status llmpar__block_dw_qkv(llmpar_unit_call *call)
{
    if (!call->grads) return LLMPAR_OK;
    llmpar__block_half b = llmpar__block_open(call);
    const llmpar__shape *s = &b.s;
    llmpar_status status = b.tp->sequence_parallel ? LLMPAR_OK : llmpar__block_again(call, &b);
    const size_t at[3] = {0, llmpar__block_k(s), llmpar__block_v(s)};
    for (int i = 0; i < 3 && !status; i++) {
        int64_t width = (i ? s->k : s->h) * s->e;
        void *bias = llmpar__block_grad(&b, call, LLMPAR__BQ + i);
        status = llmpar__block_dw(&b, call, LLMPAR__WQ + i, width, s->d, b.dqkv + at[i], width, b.in);
        if (!status && bias) status = llmpar_tp_weight_gradient(b.tp, call->stream, s->n, s->leaves, width, 1, b.dqkv + at[i], width, b.model->one, 0, bias, 0, s->dtype, call->workspace, call->workspace_bytes);
    }
    return status;
}

static llmpar_status llmpar__block_head_norm_reduce(llmpar_unit_call *call)
{
    llmpar__block_half b = llmpar__block_open(call);
    return llmpar__llama_sum_leaves(call, "q k norm weight/all_reduce", 2 * b.s.leaves * b.s.e, b.qk_leaves);
}

static llmpar_status llmpar__block_head_norm_weight(llmpar_unit_call *call)
{
    llmpar_status status = LLMPAR_OK;
    if (!call->grads) return LLMPAR_OK;
    llmpar__block_half b = llmpar__block_open(call);
    for (int i = 0; i < 2 && !status; i++)
        status = llmpar__llama_norm_weight(call, &b.s, b.s.e, b.qk_leaves + (size_t)(i * b.s.leaves * b.s.e) * b.s.sum_size, llmpar__block_grad(&b, call, LLMPAR__QNORM + i));
    return status;
}

/* ---- MLP ---- */

/* out[N,f] = in[N,D] w[f,D]^T */
static llmpar_status llmpar__block_columns(const llmpar__block_half *b, const llmpar_unit_call *call, int p, char *out)
{
    return llmpar_tp_product(b->tp, call->stream, LLMPAR_GEMM_NT, b->s.n, b->s.f, b->s.d, b->in, b->s.d, llmpar__block_param(b, call, p), b->s.d, out, b->s.f, b->s.dtype, call->workspace, call->workspace_bytes);
}

static llmpar_status llmpar__block_gate_up(llmpar_unit_call *call)
{
    llmpar__block_half b = llmpar__block_open(call);
    llmpar_status status = llmpar__block_columns(&b, call, LLMPAR__GATE, b.gate);
    return status ? status : llmpar__block_columns(&b, call, LLMPAR__UP, b.up);
}

static llmpar_status llmpar__block_down(llmpar_unit_call *call)
{
    llmpar__block_half b = llmpar__block_open(call);
    LLMPAR__ZEROED(llmpar_swiglu_args, swiglu);
    swiglu.rows = b.s.n;
    swiglu.dim = swiglu.ld_in = swiglu.ld_out = b.s.f;
    swiglu.gate = b.gate;
    swiglu.up = b.up;
    swiglu.h = b.act;
    swiglu.dtype = b.s.dtype;
    llmpar_status status = call->device->swiglu(call->device, call->stream, &swiglu);
    return status ? status : llmpar__block_rows(&b, call, b.act, LLMPAR__DOWN, b.model->config.intermediate, 1);
}

/* dh = dout Wd, through swiglu into gate and up in place; h, recomputed, takes dh's place for dWd = dout^T h. */
static llmpar_status llmpar__block_dmlp(llmpar_unit_call *call)
{
    llmpar_tp_operand ffn[2];
    llmpar__block_half b = llmpar__block_open(call);
    const llmpar__shape *s = &b.s;
    llmpar_status status = llmpar_tp_product(b.tp, call->stream, LLMPAR_GEMM_NN, s->n, s->f, s->d, llmpar__block_dout(&b), s->d, llmpar__block_param(&b, call, LLMPAR__DOWN), s->f, b.act, s->f, s->dtype, call->workspace, call->workspace_bytes);
    LLMPAR__ZEROED(llmpar_swiglu_backward_args, swiglu);
    swiglu.rows = s->n;
    swiglu.dim = swiglu.ld_in = swiglu.ld_out = s->f;
    swiglu.gate = b.gate;
    swiglu.up = b.up;
    swiglu.dh = b.act;
    swiglu.dgate = b.gate;
    swiglu.dup = b.up;
    swiglu.h = call->grads ? b.act : NULL;
    swiglu.dtype = s->dtype;
    if (!status) status = call->device->swiglu_backward(call->device, call->stream, &swiglu);
    llmpar__block_ffn(&b, call, ffn);
    return status ? status : llmpar_tp_partial(b.tp, call->stream, LLMPAR_GEMM_NN, s->n, s->d, b.model->config.intermediate, ffn, 2, s->dtype, b.part, call->workspace, call->workspace_bytes);
}

static llmpar_status llmpar__block_dw_mlp(llmpar_unit_call *call)
{
    if (!call->grads) return LLMPAR_OK;
    llmpar__block_half b = llmpar__block_open(call);
    const llmpar__shape *s = &b.s;
    llmpar_status status = b.tp->sequence_parallel ? LLMPAR_OK : llmpar__block_again(call, &b);
    if (!status) status = llmpar__block_dw(&b, call, LLMPAR__DOWN, s->d, s->f, llmpar__block_dout(&b), s->d, b.act);
    if (!status) status = llmpar__block_dw(&b, call, LLMPAR__GATE, s->f, s->d, b.gate, s->f, b.in);
    return status ? status : llmpar__block_dw(&b, call, LLMPAR__UP, s->f, s->d, b.up, s->f, b.in);
}

/* ---- the rows. The reductions of dx run beside the weight gradients of the same layers; buffers that two halves use one after the other are safe because the joint row is behind their last use. ---- */

LLMPAR__PRIVATE_DEF const llmpar__op_row *llmpar__block_ops(int mlp, int backward, int32_t *count)
{
    static const llmpar__op_row attention_forward[] = {
        /* 1 */ {{"norm", llmpar__block_norm, LLMPAR_COMPUTE, {0, 0}, 0, 0}, LLMPAR__ALWAYS, LLMPAR__ANYWHERE},
        /* 2 */ {{"attention input", llmpar__block_gather, LLMPAR_TP_GATHER, {1, 0}, 0, 0}, LLMPAR__IF_SP, LLMPAR__ANYWHERE},
        /* 3 */ {{"q k v, rope, attention", llmpar__block_attend, LLMPAR_COMPUTE, {2, 0}, 0, 0}, LLMPAR__ALWAYS, LLMPAR__ANYWHERE},
        /* 4 */ {{"wo", llmpar__block_wo, LLMPAR_COMPUTE, {0, 0}, 0, 1}, LLMPAR__ALWAYS, LLMPAR__ANYWHERE},
        /* 5 */ {{"attention output", llmpar__block_reduce, LLMPAR_TP_REDUCE, {4, 0}, 0, 1}, LLMPAR__IF_TP, LLMPAR__JOINT},
        /* 6 */ {{"residual", llmpar__block_residual, LLMPAR_COMPUTE, {5, 0}, 0, 1}, LLMPAR__ALWAYS, LLMPAR__LAST},
    };
    static const llmpar__op_row mlp_forward[] = {
        /* 1 */ {{"norm", llmpar__block_norm, LLMPAR_COMPUTE, {0, 0}, 0, 0}, LLMPAR__ALWAYS, LLMPAR__FIRST},
        /* 2 */ {{"residual, norm", llmpar__block_residual_norm, LLMPAR_COMPUTE, {LLMPAR__HALF_BEFORE, 0}, 0, 0}, LLMPAR__ALWAYS, LLMPAR__NOT_FIRST},
        /* 3 */ {{"mlp input", llmpar__block_gather, LLMPAR_TP_GATHER, {1, 2}, 0, 0}, LLMPAR__IF_SP, LLMPAR__ANYWHERE},
        /* 4 */ {{"gate, up", llmpar__block_gate_up, LLMPAR_COMPUTE, {3, 0}, 0, 0}, LLMPAR__ALWAYS, LLMPAR__ANYWHERE},
        /* 5 */ {{"swiglu, down", llmpar__block_down, LLMPAR_COMPUTE, {0, 0}, 0, 1}, LLMPAR__ALWAYS, LLMPAR__ANYWHERE},
        /* 6 */ {{"mlp output", llmpar__block_reduce, LLMPAR_TP_REDUCE, {5, 0}, 0, 1}, LLMPAR__IF_TP, LLMPAR__ANYWHERE},
        /* 7 */ {{"residual", llmpar__block_residual, LLMPAR_COMPUTE, {6, 0}, 0, 1}, LLMPAR__ALWAYS, LLMPAR__JOINT},
    };
    static const llmpar__op_row attention_backward[] = {
        /* 1 */ {{"attention doutput", llmpar__block_gather_dout, LLMPAR_TP_GATHER, {LLMPAR__HALF_BEFORE, 0}, 0, 0}, LLMPAR__IF_SP, LLMPAR__ANYWHERE},
        /* 2 */ {{"attention input again", llmpar__block_gather, LLMPAR_TP_GATHER, {LLMPAR__HALF_BEFORE, 0}, 0, 0}, LLMPAR__IF_SP, LLMPAR__ANYWHERE},
        /* 3 */ {{"wo dW, attention", llmpar__block_dattend, LLMPAR_COMPUTE, {1, 0}, 0, 0}, LLMPAR__ALWAYS, LLMPAR__ANYWHERE},
        /* 4 */ {{"dk dv", llmpar__block_kv, LLMPAR_TP_REDUCE, {3, 0}, 0, 0}, LLMPAR__IF_KV, LLMPAR__ANYWHERE},
        /* 5 */ {{"rope, attention dx", llmpar__block_dqkv, LLMPAR_COMPUTE, {4, 0}, 0, 0}, LLMPAR__ALWAYS, LLMPAR__ANYWHERE},
        /* 6 */ {{"attention dx", llmpar__block_reduce, LLMPAR_TP_REDUCE, {5, 0}, 0, 0}, LLMPAR__IF_TP, LLMPAR__ANYWHERE},
        /* 7 */ {{"q k v dW", llmpar__block_dw_qkv, LLMPAR_COMPUTE, {2, 0}, 0, 0}, LLMPAR__ALWAYS, LLMPAR__ANYWHERE},
        /* 8 */ {{"norm", llmpar__block_dnorm, LLMPAR_COMPUTE, {6, 0}, 0, 0}, LLMPAR__ALWAYS, LLMPAR__JOINT},
        /* 9 */ {{"norm dW", llmpar__block_norm_reduce, LLMPAR_TP_REDUCE, {8, 0}, 0, 0}, LLMPAR__IF_SP, LLMPAR__ANYWHERE},
        /* 10 */ {{"norm dW", llmpar__block_norm_weight, LLMPAR_COMPUTE, {9, 0}, 0, 0}, LLMPAR__ALWAYS, LLMPAR__ANYWHERE},
        /* 11 */ {{"q k norm dW", llmpar__block_head_norm_reduce, LLMPAR_TP_REDUCE, {5, 0}, 0, 0}, LLMPAR__IF_QK_TP, LLMPAR__ANYWHERE},
        /* 12 */ {{"q k norm dW", llmpar__block_head_norm_weight, LLMPAR_COMPUTE, {11, 0}, 0, 0}, LLMPAR__IF_QK, LLMPAR__ANYWHERE},
    };
    static const llmpar__op_row mlp_backward[] = {
        /* 1 */ {{"mlp doutput", llmpar__block_gather_dout, LLMPAR_TP_GATHER, {LLMPAR__HALF_BEFORE, 0}, 0, 0}, LLMPAR__IF_SP, LLMPAR__ANYWHERE},
        /* 2 */ {{"mlp input again", llmpar__block_gather, LLMPAR_TP_GATHER, {LLMPAR__HALF_BEFORE, 0}, 0, 0}, LLMPAR__IF_SP, LLMPAR__ANYWHERE},
        /* 3 */ {{"down, swiglu, mlp dx", llmpar__block_dmlp, LLMPAR_COMPUTE, {1, 0}, 0, 0}, LLMPAR__ALWAYS, LLMPAR__ANYWHERE},
        /* 4 */ {{"mlp dx", llmpar__block_reduce, LLMPAR_TP_REDUCE, {3, 0}, 0, 0}, LLMPAR__IF_TP, LLMPAR__ANYWHERE},
        /* 5 */ {{"down, gate, up dW", llmpar__block_dw_mlp, LLMPAR_COMPUTE, {2, 0}, 0, 0}, LLMPAR__ALWAYS, LLMPAR__ANYWHERE},
        /* 6 */ {{"norm", llmpar__block_dnorm, LLMPAR_COMPUTE, {4, 0}, 0, 0}, LLMPAR__ALWAYS, LLMPAR__JOINT},
        /* 7 */ {{"norm dW", llmpar__block_norm_reduce, LLMPAR_TP_REDUCE, {6, 0}, 0, 0}, LLMPAR__IF_SP, LLMPAR__ANYWHERE},
        /* 8 */ {{"norm dW", llmpar__block_norm_weight, LLMPAR_COMPUTE, {7, 0}, 0, 0}, LLMPAR__ALWAYS, LLMPAR__ANYWHERE},
    };
    *count = mlp ? (backward ? 8 : 7) : backward ? 12 : 6;
    return mlp ? (backward ? mlp_backward : mlp_forward) : backward ? attention_backward : attention_forward;
}

#endif /* LLMPAR_NO_LLAMA */
