#include "model/llama.h"
#include "model/llama_internal.h"

#include <string.h>

#include "tables/tables_internal.h"

#if !defined(LLMPAR_NO_LLAMA)

/* The two ends of the model as units: the vocab-parallel embedding, and the head (final norm, output projection, vocab-parallel cross-entropy: logits are never gathered). */

/* ---- embedding: scratch part[N,D] (before the select), dfull[N,D] (gathered gradient) ---- */

typedef struct llmpar__embed { llmpar__shape s; const llmpar_llama *model; const llmpar_tp *tp; char *part, *dfull; size_t scratch; } llmpar__embed;

static void llmpar__embed_lay(const llmpar_llama *model, const llmpar_micro *micro, llmpar_dtype dtype, void *scratch, llmpar__embed *out)
{
    size_t at = 0;
    memset(out, 0, sizeof *out);
    out->model = model;
    out->tp = &model->tp;
    llmpar__llama_shape(model, micro, dtype, &out->s);
    size_t part = llmpar__llama_take(&at, out->tp->ranks > 1 ? out->s.n * out->s.d : 0, out->s.size);
    out->scratch = at;
    if (!scratch) return;
    out->part = out->dfull = (char *)scratch + part; /* one is forward's, the other backward's */
}

static llmpar__embed llmpar__embed_open(const llmpar_unit_call *call)
{
    llmpar__embed e;
    llmpar__embed_lay(((const llmpar__part *)call->user)->model, call->micro, call->dtype, call->scratch, &e);
    return e;
}

static void llmpar__embed_backward_args(const llmpar__embed *e, const llmpar_micro *micro, llmpar_embedding_backward_args *args)
{
    memset(args, 0, sizeof *args);
    args->tokens.batch = e->s.b;
    args->tokens.t = args->tokens.t_total = e->s.t;
    args->tokens.leaves = e->s.leaves;
    args->tokens.canon = e->tp->pieces;
    args->dim = e->s.d;
    args->v_begin = e->s.v_begin;
    args->v_local = e->s.v;
    args->ids = micro->ids;
    args->dtype = e->s.dtype;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__embed_sizes(void *user, const llmpar_micro *micro, llmpar_dtype dtype, llmpar_unit_sizes *out)
{
    llmpar__embed e;
    llmpar_embedding_backward_args args;
    const llmpar_llama *model = ((const llmpar__part *)user)->model;
    /* The first unit of every pass speaks for all: RoPE tables and shards are of the dtype and length given to apply. */
    if (dtype != model->dtype || micro->t > model->positions || (model->tp.sequence_parallel && micro->t % model->tp.ranks))
        return llmpar_fail(model->ctx, LLMPAR_ERR_SHAPE, "llama: micro-batch %d of %lld tokens in %s, expected at most %lld (a multiple of %d) in %s, as llmpar_llama_apply was told", (int)micro->index, (long long)micro->t,
                           llmpar_dtype_name(dtype), (long long)model->positions, model->tp.sequence_parallel ? (int)model->tp.ranks : 1, llmpar_dtype_name(model->dtype));
    llmpar_status status = llmpar__llama_check_length(model, micro->t);
    if (status) return status;
    llmpar__embed_lay(model, micro, dtype, NULL, &e);
    llmpar__embed_backward_args(&e, micro, &args);
    out->output = (size_t)(e.s.ns * e.s.d) * e.s.size;
    out->scratch = e.scratch;
    out->workspace = model->ctx->device->embedding_backward_workspace(model->ctx->device, &args);
    return LLMPAR_OK;
}

static llmpar_status llmpar__embed_forward(llmpar_unit_call *call)
{
    llmpar__embed e = llmpar__embed_open(call);
    LLMPAR__ZEROED(llmpar_embedding_args, args);
    args.rows = e.s.n;
    args.dim = e.s.d;
    args.v_begin = e.s.v_begin;
    args.v_local = e.s.v;
    args.ids = call->micro->ids;
    args.table = call->params[0];
    args.out = e.tp->ranks > 1 ? (void *)e.part : call->output;
    args.dtype = e.s.dtype;
    return call->device->embedding(call->device, call->stream, &args);
}

static llmpar_status llmpar__embed_select(llmpar_unit_call *call)
{
    llmpar__embed e = llmpar__embed_open(call);
    return llmpar_tp_select(e.tp, call->stream, "embed/select", e.s.b, e.s.t, e.s.d, e.part, call->output, e.s.dtype);
}

static llmpar_status llmpar__embed_gather(llmpar_unit_call *call)
{
    if (!call->grads) return LLMPAR_OK;
    llmpar__embed e = llmpar__embed_open(call);
    return llmpar_tp_gather(e.tp, call->stream, "embed doutput/all_gather", e.s.b, e.s.t, e.s.d, call->doutput, e.dfull, e.s.dtype);
}

static llmpar_status llmpar__embed_backward(llmpar_unit_call *call)
{
    llmpar_embedding_backward_args args;
    if (!call->grads) return LLMPAR_OK;
    llmpar__embed e = llmpar__embed_open(call);
    llmpar__embed_backward_args(&e, call->micro, &args);
    args.dout = e.tp->sequence_parallel ? (const void *)e.dfull : call->doutput;
    args.dtable = call->grads[0];
    args.workspace = call->workspace;
    args.workspace_bytes = call->workspace_bytes;
    return call->device->embedding_backward(call->device, call->stream, &args);
}

LLMPAR__PRIVATE_DEF const llmpar__op_row *llmpar__embed_ops(int backward, int32_t *count)
{
    static const llmpar__op_row forward_rows[] = {
        /* 1 */ {{"look up", llmpar__embed_forward, LLMPAR_COMPUTE, {0, 0}, 0, 1}, LLMPAR__ALWAYS, LLMPAR__ANYWHERE},
        /* 2 */ {{"select", llmpar__embed_select, LLMPAR_TP_REDUCE, {1, 0}, 0, 1}, LLMPAR__IF_TP, LLMPAR__ANYWHERE},
    };
    static const llmpar__op_row backward_rows[] = {
        /* 1 */ {{"doutput", llmpar__embed_gather, LLMPAR_TP_GATHER, {0, 0}, 0, 0}, LLMPAR__IF_SP, LLMPAR__ANYWHERE},
        /* 2 */ {{"dW", llmpar__embed_backward, LLMPAR_COMPUTE, {1, 0}, 0, 0}, LLMPAR__ALWAYS, LLMPAR__ANYWHERE},
    };
    *count = 2;
    return backward ? backward_rows : forward_rows;
}

/* ---- head
   saved    h[Ns,D] rstd[Ns]  max[N] target[N] (together: one reduction)  sum[N]  logits[N,V/tp] where they fit
   scratch  full[N,D] (sequence parallel)  part[N,D]  dh[Ns,D] (= part where nothing is scattered or rounded)  leaves[leaves,D]  logits: a part of them where they do not fit
   rstd, max, target, sum, part and leaves are of the sum type.

   Logits that exceed llmpar_llama_desc.logits_bytes are never whole. Forward then leaves all to backward, which takes some rows at a time: logits, their maximum over tp, the sum of exp, the loss, dlogits in their place, dx. Of one leaf
   dW goes on from part to part: 3 products of N*V*D, as many as with whole logits. Of several it would take log2(leaves) more of dW, so logits are made again there, some columns at a time: 4 products. Every sum is as whole as ever, in
   the order of docs/exact.md. An evaluation, which has no backward, makes its losses in forward.
   A part's collectives run on the compute stream; the tp stream is idle then, so that the order of the communicator's calls is the list's. ---- */

typedef struct llmpar__head {
    llmpar__shape s;
    const llmpar_llama *model;
    const llmpar_tp *tp;
    int whole;                     /* logits are saved */
    int once;                      /* else: dW is made with dx, not from columns made again */
    int64_t rows, columns;         /* of a part of them */
    char *h, *rstd, *logits, *max, *target, *sum, *full, *part, *dh, *leaves;
    const char *in;
    size_t saved, scratch;
} llmpar__head;

static int64_t llmpar__head_fit(int64_t bytes, int64_t line, int64_t most)
{
    int64_t n = line > 0 ? bytes / line : most;
    return n < 1 ? 1 : n > most ? most : n;
}

static void llmpar__head_lay(const llmpar_llama *model, const llmpar_micro *micro, llmpar_dtype dtype, void *saved, void *scratch, llmpar__head *out)
{
    size_t at = 0, size, logits;
    memset(out, 0, sizeof *out);
    out->model = model;
    out->tp = &model->tp;
    llmpar__llama_shape(model, micro, dtype, &out->s);
    const llmpar__shape *s = &out->s;
    size = s->size;
    /* By the widest rank's share, so that all ranks cut alike. */
    int64_t widest = (model->config.vocab + out->tp->ranks - 1) / out->tp->ranks;
    out->rows = llmpar__head_fit(model->logits_bytes, widest * (int64_t)size, s->n);
    out->columns = llmpar__head_fit(model->logits_bytes, s->n * (int64_t)size, s->v);
    out->whole = out->rows == s->n;
    out->once = !out->whole && s->leaves == 1 && out->rows >= LLMPAR_TP_PART;
    if (out->whole) out->columns = s->v;
    if (out->once) { /* parts of like size */
        int64_t most = out->rows / LLMPAR_TP_PART * LLMPAR_TP_PART, parts = (s->n + most - 1) / most;
        out->rows = ((s->n + parts - 1) / parts + LLMPAR_TP_PART - 1) / LLMPAR_TP_PART * LLMPAR_TP_PART;
        out->columns = s->v;
    }
    size_t h = llmpar__llama_take(&at, s->ns * s->d, size), rstd = llmpar__llama_take(&at, s->ns, s->sum_size), max = llmpar__llama_take(&at, 2 * s->n, s->sum_size), sum = llmpar__llama_take(&at, s->n, s->sum_size);
    logits = out->whole ? llmpar__llama_take(&at, s->n * s->v, size) : 0;
    out->saved = at;
    at = 0;
    size_t full = llmpar__llama_take(&at, out->tp->sequence_parallel ? s->n * s->d : 0, size), part = llmpar__llama_take(&at, (int64_t)llmpar_tp_partial_bytes(out->tp, s->b, s->t, s->d, dtype), 1);
    size_t dh = out->tp->sequence_parallel || llmpar_tp_partial_dtype(out->tp, dtype) != dtype ? llmpar__llama_take(&at, s->ns * s->d, size) : part, leaves = llmpar__llama_take(&at, s->leaves * s->d, s->sum_size);
    if (!out->whole) logits = llmpar__llama_take(&at, out->once || out->rows * s->v > out->columns * s->n ? out->rows * s->v : out->columns * s->n, size);
    out->scratch = at;
    if (!saved || !scratch) return;
    out->h = (char *)saved + h;
    out->rstd = (char *)saved + rstd;
    out->max = (char *)saved + max;
    out->target = out->max + (size_t)s->n * s->sum_size;
    out->sum = (char *)saved + sum;
    out->logits = (char *)(out->whole ? saved : scratch) + logits;
    out->full = (char *)scratch + full;
    out->part = (char *)scratch + part;
    out->dh = (char *)scratch + dh;
    out->leaves = (char *)scratch + leaves;
    out->in = out->tp->sequence_parallel ? out->full : out->h;
}

static llmpar__head llmpar__head_open(const llmpar_unit_call *call)
{
    llmpar__head h;
    llmpar__head_lay(((const llmpar__part *)call->user)->model, call->micro, call->dtype, call->saved, call->scratch, &h);
    return h;
}

static void llmpar__head_operand(const llmpar__head *h, const void *w, llmpar_tp_operand *operand)
{
    memset(operand, 0, sizeof *operand);
    operand->a = h->logits;
    operand->b = w;
    operand->lda = h->s.v;
    operand->ldb = h->s.d;
    operand->grain = 1;
    operand->begin = h->s.v_begin;
    operand->count = h->s.v;
}

static void llmpar__head_most(size_t *most, size_t bytes) { *most = bytes > *most ? bytes : *most; }

LLMPAR__PRIVATE_DEF llmpar_status llmpar__head_sizes(void *user, const llmpar_micro *micro, llmpar_dtype dtype, llmpar_unit_sizes *out)
{
    llmpar__head h;
    llmpar_tp_operand operand;
    llmpar__head_lay(((const llmpar__part *)user)->model, micro, dtype, NULL, NULL, &h);
    const llmpar__shape *s = &h.s;
    llmpar__head_operand(&h, NULL, &operand);
    out->saved = h.saved;
    out->scratch = h.scratch;
    for (int rest = 0; rest < 2; rest++) { /* parts, and what is left for the last of them */
        int64_t rows = rest ? s->n % h.rows : h.rows, columns = h.columns == s->v ? s->v : rest ? s->v % h.columns : h.columns, summed = h.once ? rows : s->n;
        llmpar__head_most(&out->workspace, llmpar_tp_product_workspace(h.tp, LLMPAR_GEMM_NT, rows, s->v, s->d, dtype));
        llmpar__head_most(&out->workspace, llmpar_tp_partial_workspace(h.tp, LLMPAR_GEMM_NN, rows, s->d, h.model->config.vocab, &operand, 1, dtype));
        llmpar__head_most(&out->workspace, llmpar_tp_product_workspace(h.tp, LLMPAR_GEMM_NT, summed, columns, s->d, dtype));
        llmpar__head_most(&out->workspace, llmpar_tp_weight_gradient_workspace(h.tp, summed, s->leaves, columns, s->d, dtype));
    }
    return out->workspace == SIZE_MAX ? LLMPAR_ERR_MEMORY : LLMPAR_OK;
}

/* The output projection [V/tp, D]: its own parameter, or the embedding table. */
static const char *llmpar__head_weight(const llmpar_unit_call *call) { return (const char *)(call->borrowed ? call->borrowed[0] : call->params[1]); }
static char *llmpar__head_grad(const llmpar_unit_call *call) /* NULL: frozen */
{
    void *const *grads = call->borrowed ? call->borrowed_grads : call->grads;
    return grads ? (char *)grads[call->borrowed ? 0 : 1] : NULL;
}
/* The norm's weight gradient comes with dx. */
static int llmpar__head_wants_dx(const llmpar_unit_call *call) { return call->dinput || call->grads; }

/* Rows [row, row + rows) and columns [column, column + columns) of logits, which begin at h->logits. */
static void llmpar__head_xent(const llmpar_unit_call *call, const llmpar__head *h, int64_t row, int64_t rows, int64_t column, int64_t columns, llmpar_xent_args *args)
{
    size_t at = (size_t)row * h->s.sum_size;
    memset(args, 0, sizeof *args);
    args->rows = rows;
    args->ld = args->v_local = columns;
    args->v_begin = h->s.v_begin + column;
    args->v_total = h->model->config.vocab;
    args->canon = h->tp->pieces;
    args->logits = h->logits;
    args->targets = call->micro->targets + row;
    args->max = h->max + at;
    args->target_logit = h->target + at;
    args->sum = h->sum + at;
    args->dtype = h->s.dtype;
}

static llmpar_status llmpar__head_product(const llmpar_unit_call *call, const llmpar__head *h, int64_t row, int64_t rows, int64_t column, int64_t columns)
{
    int64_t d = h->s.d;
    return llmpar_tp_product(h->tp, call->stream, LLMPAR_GEMM_NT, rows, columns, d, h->in + (size_t)(row * d) * h->s.size, d, llmpar__head_weight(call) + (size_t)(column * d) * h->s.size, d, h->logits, columns, h->s.dtype,
                             call->workspace, call->workspace_bytes);
}

static llmpar_status llmpar__head_norm(llmpar_unit_call *call)
{
    llmpar__head h = llmpar__head_open(call);
    return llmpar__llama_rmsnorm(call->ctx, call->stream, h.model, h.s.ns, h.s.d, call->input, NULL, call->params[0], NULL, h.h, h.rstd);
}

static llmpar_status llmpar__head_gather(llmpar_unit_call *call)
{
    llmpar__head h = llmpar__head_open(call);
    if (h.whole ? call->pass == LLMPAR_PASS_BACKWARD && !llmpar__head_grad(call) : call->pass == LLMPAR_PASS_FORWARD) return LLMPAR_OK;
    return llmpar_tp_gather(h.tp, call->stream, "head input/all_gather", h.s.b, h.s.t, h.s.d, h.h, h.full, h.s.dtype);
}

static llmpar_status llmpar__head_combine(const llmpar_unit_call *call, const llmpar__head *h, const char *tag, void *values, int64_t count, llmpar_reduce_op op)
{
    llmpar_collective c = llmpar__comm_collective(values, values, (size_t)count, h->s.sum, tag);
    c.op = op;
    return h->tp->ranks == 1 ? LLMPAR_OK : llmpar_all_reduce(h->tp->comm, call->stream, &c);
}

/* A step towards the losses of these rows: 0 logits and their maximum, 1 over tp, 2 sum of exp, 3 over tp, 4 losses. */
static llmpar_status llmpar__head_step(const llmpar_unit_call *call, const llmpar__head *h, int64_t row, int64_t rows, int32_t step)
{
    llmpar_xent_args xent;
    llmpar_status status;
    llmpar__head_xent(call, h, row, rows, 0, h->s.v, &xent);
    switch (step) {
    case 0:
        status = llmpar__head_product(call, h, row, rows, 0, h->s.v);
        return status ? status : call->device->xent_max(call->device, call->stream, &xent);
    case 1:
        status = llmpar__head_combine(call, h, "head max/all_reduce", xent.max, h->whole ? 2 * rows : rows, LLMPAR_MAX);
        return status || h->whole ? status : llmpar__head_combine(call, h, "head target/all_reduce", xent.target_logit, rows, LLMPAR_MAX);
    case 2: return call->device->xent_sum(call->device, call->stream, &xent);
    case 3: return llmpar__head_combine(call, h, "head sum/all_reduce", xent.sum, rows, LLMPAR_SUM);
    }
    LLMPAR__ZEROED(llmpar_xent_loss_args, loss);
    loss.rows = rows;
    loss.max = xent.max;
    loss.target_logit = xent.target_logit;
    loss.sum = xent.sum;
    loss.targets = xent.targets;
    loss.accumulator = call->micro->loss;
    loss.token_loss = call->micro->token_loss ? call->micro->token_loss + row : NULL;
    loss.dtype = h->s.dtype;
    return call->device->xent_loss(call->device, call->stream, &loss);
}

static llmpar_status llmpar__head_steps(const llmpar_unit_call *call, const llmpar__head *h, int64_t row, int64_t rows)
{
    llmpar_status status = LLMPAR_OK;
    for (int32_t step = 0; step < 5 && !status; step++) status = llmpar__head_step(call, h, row, rows, step);
    return status;
}

static llmpar_status llmpar__head_forward(llmpar_unit_call *call)
{
    llmpar__head h = llmpar__head_open(call);
    llmpar_status status = LLMPAR_OK;
    if (h.whole) return llmpar__head_step(call, &h, 0, h.s.n, call->index);
    for (int64_t row = 0; call->pass == LLMPAR_PASS_EVAL && call->index == 0 && row < h.s.n && !status; row += h.rows) status = llmpar__head_steps(call, &h, row, h.s.n - row < h.rows ? h.s.n - row : h.rows);
    return status;
}

/* dlogits in place of the logits of these rows and columns. */
static llmpar_status llmpar__head_dlogits(const llmpar_unit_call *call, const llmpar__head *h, int64_t row, int64_t rows, int64_t column, int64_t columns)
{
    llmpar_xent_backward_args xent;
    llmpar__head_xent(call, h, row, rows, column, columns, &xent.forward);
    xent.scale = call->micro->grad_scale;
    return call->device->xent_backward(call->device, call->stream, &xent);
}

static llmpar_status llmpar__head_dx(llmpar_unit_call *call)
{
    llmpar_tp_operand operand;
    llmpar__head h = llmpar__head_open(call);
    llmpar__head_operand(&h, llmpar__head_weight(call), &operand);
    size_t line = (size_t)h.s.d * llmpar_dtype_size(llmpar_tp_partial_dtype(h.tp, h.s.dtype));
    char *grad = h.once ? llmpar__head_grad(call) : NULL;
    llmpar_status status = LLMPAR_OK;
    for (int64_t row = 0; row < h.s.n && !status; row += h.rows) {
        int64_t rows = h.s.n - row < h.rows ? h.s.n - row : h.rows;
        if (!h.whole) status = llmpar__head_steps(call, &h, row, rows);
        if (!status) status = llmpar__head_dlogits(call, &h, row, rows, 0, h.s.v);
        if (!status && llmpar__head_wants_dx(call))
            status = llmpar_tp_partial(h.tp, call->stream, LLMPAR_GEMM_NN, rows, h.s.d, h.model->config.vocab, &operand, 1, h.s.dtype, h.part + (size_t)row * line, call->workspace, call->workspace_bytes);
        if (!status && grad)
            status = llmpar_tp_weight_gradient(h.tp, call->stream, rows, 1, h.s.v, h.s.d, h.logits, h.s.v, h.in + (size_t)(row * h.s.d) * h.s.size, h.s.d, grad, row > 0, h.s.dtype, call->workspace, call->workspace_bytes);
    }
    return status;
}

static llmpar_status llmpar__head_reduce(llmpar_unit_call *call)
{
    if (!llmpar__head_wants_dx(call)) return LLMPAR_OK;
    llmpar__head h = llmpar__head_open(call);
    return llmpar_tp_reduce(h.tp, call->stream, "head dx/reduce", h.s.b, h.s.t, h.s.d, h.part, h.dh, h.s.dtype);
}

static llmpar_status llmpar__head_dw(llmpar_unit_call *call)
{
    char *grad = llmpar__head_grad(call);
    llmpar__head h = llmpar__head_open(call);
    const llmpar__shape *s = &h.s;
    if (!grad || h.once) return LLMPAR_OK;
    llmpar_status status = LLMPAR_OK;
    for (int64_t column = 0; column < s->v && !status; column += h.columns) {
        int64_t columns = s->v - column < h.columns ? s->v - column : h.columns;
        if (!h.whole) status = llmpar__head_product(call, &h, 0, s->n, column, columns);
        if (!h.whole && !status) status = llmpar__head_dlogits(call, &h, 0, s->n, column, columns);
        if (!status) status = llmpar_tp_weight_gradient(h.tp, call->stream, s->n, s->leaves, columns, s->d, h.logits, columns, h.in, s->d, grad + (size_t)(column * s->d) * s->sum_size, 0, s->dtype, call->workspace, call->workspace_bytes);
    }
    return status;
}

static llmpar_status llmpar__head_dnorm(llmpar_unit_call *call)
{
    if (!llmpar__head_wants_dx(call)) return LLMPAR_OK;
    llmpar__head h = llmpar__head_open(call);
    return llmpar__llama_norm_backward(call, &h.s, h.dh, call->input, call->params[0], h.rstd, NULL, call->dinput ? call->dinput : h.dh, h.leaves);
}

static llmpar_status llmpar__head_norm_reduce(llmpar_unit_call *call)
{
    llmpar__head h = llmpar__head_open(call);
    return llmpar__llama_norm_reduce(call, &h.s, h.leaves);
}

static llmpar_status llmpar__head_norm_weight(llmpar_unit_call *call)
{
    if (!call->grads) return LLMPAR_OK;
    llmpar__head h = llmpar__head_open(call);
    return llmpar__llama_norm_weight(call, &h.s, h.s.d, h.leaves, call->grads[0]);
}

LLMPAR__PRIVATE_DEF const llmpar__op_row *llmpar__head_ops(int backward, int32_t *count)
{
    static const llmpar__op_row forward_rows[] = {
        /* 1 */ {{"norm", llmpar__head_norm, LLMPAR_COMPUTE, {0, 0}, 0, 0}, LLMPAR__ALWAYS, LLMPAR__ANYWHERE},
        /* 2 */ {{"input", llmpar__head_gather, LLMPAR_TP_GATHER, {1, 0}, 0, 0}, LLMPAR__IF_SP, LLMPAR__ANYWHERE},
        /* 3 */ {{"logits, max", llmpar__head_forward, LLMPAR_COMPUTE, {2, 0}, 0, 0}, LLMPAR__ALWAYS, LLMPAR__ANYWHERE},
        /* 4 */ {{"max", llmpar__head_forward, LLMPAR_TP_REDUCE, {3, 0}, 1, 0}, LLMPAR__IF_TP, LLMPAR__ANYWHERE},
        /* 5 */ {{"sum of exp", llmpar__head_forward, LLMPAR_COMPUTE, {4, 0}, 2, 0}, LLMPAR__ALWAYS, LLMPAR__ANYWHERE},
        /* 6 */ {{"sum of exp", llmpar__head_forward, LLMPAR_TP_REDUCE, {5, 0}, 3, 0}, LLMPAR__IF_TP, LLMPAR__ANYWHERE},
        /* 7 */ {{"loss", llmpar__head_forward, LLMPAR_COMPUTE, {6, 0}, 4, 0}, LLMPAR__ALWAYS, LLMPAR__ANYWHERE},
    };
    static const llmpar__op_row backward_rows[] = {
        /* 1 */ {{"input again", llmpar__head_gather, LLMPAR_TP_GATHER, {0, 0}, 0, 0}, LLMPAR__IF_SP, LLMPAR__ANYWHERE},
        /* 2 */ {{"dlogits, dx", llmpar__head_dx, LLMPAR_COMPUTE, {1, 0}, 0, 0}, LLMPAR__ALWAYS, LLMPAR__ANYWHERE},
        /* 3 */ {{"dx", llmpar__head_reduce, LLMPAR_TP_REDUCE, {2, 0}, 0, 0}, LLMPAR__IF_TP, LLMPAR__ANYWHERE},
        /* 4 */ {{"dW", llmpar__head_dw, LLMPAR_COMPUTE, {1, 0}, 0, 0}, LLMPAR__ALWAYS, LLMPAR__ANYWHERE},
        /* 5 */ {{"norm", llmpar__head_dnorm, LLMPAR_COMPUTE, {3, 0}, 0, 0}, LLMPAR__ALWAYS, LLMPAR__ANYWHERE},
        /* 6 */ {{"norm dW", llmpar__head_norm_reduce, LLMPAR_TP_REDUCE, {5, 0}, 0, 0}, LLMPAR__IF_SP, LLMPAR__ANYWHERE},
        /* 7 */ {{"norm dW", llmpar__head_norm_weight, LLMPAR_COMPUTE, {6, 0}, 0, 0}, LLMPAR__ALWAYS, LLMPAR__ANYWHERE},
    };
    *count = 7;
    return backward ? backward_rows : forward_rows;
}

#endif /* LLMPAR_NO_LLAMA */
