/* AdaLomo (Lv et al. 2023, arXiv 2310.10195, and adalomo.py of its authors): for a matrix of R rows and C columns, with g' and eps as in optim.h and b = beta2,

     r[R] = b r + (1-b) (mean over columns of g'^2 + eps)        c[C] = b c + (1-b) (mean over rows of g'^2 + eps)
     u = g' / sqrt(r c / mean(r));   p -= lr * max(1e-3, rms p) * (decay p + u / max(1, rms u))

   Parameters of other than two dims keep the whole second moment. Nothing here has an order: the sums of a unit are integers, so the ranks that share it (dp_shard, tp) add theirs up in any.

     largest |g| of each matrix     -> all-reduce max      where the fixed point stands
     squares of g by row and column,
       squares of p (exact sums)    -> all-reduce          one for the whole unit
     r, c, their inverse roots         (every rank that holds a part of the matrix has all of r and c: equal copies)
     squares of u (exact sums)      -> all-reduce
     p

   Bytes, beside nothing an element for matrices (s = 4, or 8 in f64): s (R + C) for each matrix this rank holds a part of, s for each of its elements of other parameters; and once, for the largest unit, 8 (R + C) of
   each of its matrices, s (R + C) of those it holds a part of, and 1160 a parameter. All OPTIMIZER. */
#include "optim/optim_internal.h"

#include <string.h>

#include "base/exact_sum.h"
#include "base/math.h"
#include "base/size.h"
#include "tables/tables_internal.h"

/* A segment of this rank. */
typedef struct llmpar__adalomo_part {
    int64_t begin, cols;          /* first element in the tp-local rectangle, and its columns */
    int64_t row, col;             /* where the rectangle lies in the matrix */
    int64_t moment, factor;       /* reals before its moments (R, then C; or one an element) in the unit's state, and before its factors in the workspace */
    int32_t factored, counts;     /* counts: this rank's part stands for it in sums */
} llmpar__adalomo_part;

typedef struct llmpar__adalomo_unit {
    llmpar__adalomo_part *part;   /* [segment_count] */
    int64_t *rows, *cols;         /* [param_count]; rows 0: not factored */
    int64_t *sum;                 /* [param_count] integers before its row sums, column sums behind them */
    int64_t sums;                 /* integers in all */
    int32_t params, matrices;
    void *state;
} llmpar__adalomo_unit;

typedef struct llmpar__adalomo {
    llmpar_comm *comm;            /* the ranks that share a unit's parameters; NULL: alone */
    llmpar__adalomo_unit *unit;
    int32_t units;
    void *workspace;
    size_t at_largest, at_factors;/* bytes in it; sums lie at 0: row and column sums, squares of p, squares of u */
    int64_t bytes;                /* of the arena */
    llmpar_event *done;           /* behind the last update: the workspace is one for all */
} llmpar__adalomo;

LLMPAR__PRIVATE_DEF int llmpar__adalomo_factored(const llmpar_param *param) { return param->dims == 2 && param->shape[0] > 0 && param->shape[1] > 0; }

/* ---- creation ---- */

static llmpar_status llmpar__adalomo_layout(llmpar_optim *optim, int32_t index, int64_t *moments, int64_t *factors)
{
    llmpar_fsdp *fsdp = optim->fsdp;
    const llmpar_mesh *mesh = llmpar_fsdp_mesh(fsdp);
    llmpar__adalomo_unit *unit = &optim->adalomo->unit[index];
    const llmpar_unit *u = llmpar_fsdp_unit(fsdp, index);
    const llmpar_segment *segments;
    int32_t count;
    llmpar_fsdp_layout(fsdp, index, NULL, &segments, &count);
    *moments = *factors = 0;
    if (u->frozen) return LLMPAR_OK;
    unit->params = u->param_count;
    unit->part = LLMPAR__ZALLOC(llmpar__adalomo_part, optim->heap, (size_t)count + 1);
    unit->rows = LLMPAR__ZALLOC(int64_t, optim->heap, 3 * (size_t)u->param_count + 1);
    if (!unit->part || !unit->rows) return llmpar_fail(mesh->ctx, LLMPAR_ERR_MEMORY, "adalomo: out of memory for unit %s", u->name);
    unit->cols = unit->rows + u->param_count;
    unit->sum = unit->cols + u->param_count;
    for (int32_t p = 0; p < u->param_count; p++) {
        const llmpar_param *param = &u->params[p];
        if (!llmpar__adalomo_factored(param)) continue;
        unit->rows[p] = param->shape[0];
        unit->cols[p] = param->shape[1];
        unit->sum[p] = unit->sums;
        unit->sums += param->shape[0] + param->shape[1];
        unit->matrices++;
    }
    for (int32_t s = 0; s < count; s++) {
        llmpar__adalomo_part *part = &unit->part[s];
        llmpar_dtensor tensor;
        llmpar_local local;
        int32_t p = segments[s].param, coordinate[LLMPAR_MESH_AXES];
        llmpar_fsdp_dtensor(fsdp, index, p, &tensor);
        llmpar_dtensor_local(&tensor, mesh->degree, mesh->coordinate, &local);
        if (local.flat_count != segments[s].count)
            return llmpar_fail(mesh->ctx, LLMPAR_ERR_SHAPE, "adalomo: %s: the update's part has %lld elements, its descriptor %lld", u->params[p].name, (long long)segments[s].count, (long long)local.flat_count);
        part->begin = local.flat_begin;
        part->moment = *moments;
        if (unit->rows[p]) {
            part->factored = 1;
            part->cols = local.shape[1];
            part->row = local.offset[0];
            part->col = local.offset[1];
            part->factor = *factors;
            *moments += unit->rows[p] + unit->cols[p];
            *factors += unit->rows[p] + unit->cols[p];
        } else *moments += segments[s].count;
        /* Data ranks that are not in the communicator have sums of their own, so only copies within it count once: those over tp. */
        memcpy(coordinate, mesh->coordinate, sizeof coordinate);
        coordinate[LLMPAR_AXIS_DP_REPLICATE] = 0;
        if (!tensor.placements || tensor.placement[tensor.placements - 1].kind != LLMPAR_FLAT) coordinate[LLMPAR_AXIS_DP_SHARD] = 0;
        llmpar_dtensor_local(&tensor, mesh->degree, coordinate, &local);
        part->counts = local.is_owner;
    }
    return LLMPAR_OK;
}

static llmpar_status llmpar__adalomo_memory(llmpar_optim *optim)
{
    llmpar__adalomo *a = optim->adalomo;
    llmpar_ctx *ctx = llmpar_fsdp_mesh(optim->fsdp)->ctx;
    llmpar_device *device = ctx->device;
    size_t size = llmpar_dtype_size(llmpar_dtype_sum(llmpar_fsdp_dtype(optim->fsdp))), sums = 0, params = 0, most = 0;
    llmpar_stream *stream = NULL;
    llmpar_status status = device->stream_create(device, "set-up", &stream);
    for (int32_t u = 0; u < a->units && !status; u++) {
        llmpar__adalomo_unit *unit = &a->unit[u];
        int64_t moments, factors;
        status = llmpar__adalomo_layout(optim, u, &moments, &factors);
        if (!status && moments) status = llmpar_arena_alloc(llmpar_fsdp_arena(optim->fsdp), LLMPAR_TAG_OPTIMIZER, (size_t)moments * size, llmpar_fsdp_unit(optim->fsdp, u)->name, &unit->state);
        if (!status && moments) status = device->zero(device, stream, unit->state, (size_t)moments * size);
        a->bytes += llmpar_round_up((int64_t)((size_t)moments * size), (int64_t)device->alignment);
        if (status) break;
        size_t wanted = (size_t)(unit->sums + 2 * LLMPAR_EXACT_SUM_LIMBS * (int64_t)unit->params);
        if (wanted > sums) sums = wanted;
        if ((size_t)unit->params > params) params = (size_t)unit->params;
        if ((size_t)factors > most) most = (size_t)factors;
    }
    a->at_largest = sums * sizeof(int64_t);
    a->at_factors = a->at_largest + params * sizeof(double);
    if (!status) status = llmpar_arena_alloc(llmpar_fsdp_arena(optim->fsdp), LLMPAR_TAG_OPTIMIZER, a->at_factors + most * size, "adalomo's sums", &a->workspace);
    a->bytes += llmpar_round_up((int64_t)(a->at_factors + most * size), (int64_t)device->alignment);
    if (!status) status = device->event_create(device, &a->done);
    if (stream) {
        status = llmpar__device_done(device, stream, status);
        device->stream_destroy(device, stream);
    }
    return status;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__adalomo_create(llmpar_optim *optim)
{
    llmpar_mesh *mesh = llmpar_fsdp_mesh(optim->fsdp);
    llmpar_ctx *ctx = mesh->ctx;
    llmpar_device *device = ctx->device;
    if (!LLMPAR__HAS(device, adalomo) || !device->largest || !device->factor_sum || !device->factor_moment || !device->adalomo_square)
        return llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "adalomo: device %s lacks largest, factor_sum, factor_moment, adalomo_square or adalomo", device->name);
    llmpar__adalomo *a = LLMPAR__ZALLOC(llmpar__adalomo, optim->heap, 1);
    if (!a) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "adalomo: out of memory");
    optim->adalomo = a;
    a->units = llmpar_fsdp_unit_count(optim->fsdp);
    a->unit = LLMPAR__ZALLOC(llmpar__adalomo_unit, optim->heap, (size_t)a->units);
    if (!a->unit) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "adalomo: out of memory for %d units", (int)a->units);
    LLMPAR__ZEROED(llmpar_policy, policy);
    llmpar_fsdp_policy(optim->fsdp, &policy);
    int whole = llmpar_policy_whole_state(&policy);
    llmpar_status status = LLMPAR_OK;
    if (!whole || mesh->degree[LLMPAR_AXIS_TP] > 1)
        status = llmpar_comm_split(mesh->world, whole ? mesh->dp_rank : mesh->coordinate[LLMPAR_AXIS_DP_REPLICATE], ctx->rank, "optimizer", &a->comm);
    return status ? status : llmpar__adalomo_memory(optim);
}

LLMPAR__PRIVATE_DEF void llmpar__adalomo_destroy(llmpar_optim *optim)
{
    llmpar__adalomo *a = optim->adalomo;
    llmpar_device *device = llmpar_fsdp_mesh(optim->fsdp)->ctx->device;
    if (!a) return;
    for (int32_t u = 0; u < a->units && a->unit; u++) {
        llmpar_heap_free(optim->heap, a->unit[u].part);
        llmpar_heap_free(optim->heap, a->unit[u].rows);
        llmpar_arena_free(llmpar_fsdp_arena(optim->fsdp), a->unit[u].state);
    }
    llmpar_arena_free(llmpar_fsdp_arena(optim->fsdp), a->workspace);
    if (a->done) device->event_destroy(device, a->done);
    llmpar_comm_destroy(a->comm);
    llmpar_heap_free(optim->heap, a->unit);
    llmpar_heap_free(optim->heap, a);
}

LLMPAR__PRIVATE_DEF int64_t llmpar__adalomo_bytes(const llmpar_optim *optim) { return optim->adalomo->bytes; }

LLMPAR__PRIVATE_DEF void llmpar__adalomo_factors(const llmpar_optim *optim, int32_t index, int32_t segment, llmpar_optim_factors *out)
{
    const llmpar__adalomo_unit *unit = &optim->adalomo->unit[index];
    size_t size = llmpar_dtype_size(llmpar_dtype_sum(llmpar_fsdp_dtype(optim->fsdp)));
    const llmpar_segment *segments;
    llmpar_fsdp_layout(optim->fsdp, index, NULL, &segments, NULL);
    if (!unit->state) return; /* frozen */
    char *moments = (char *)unit->state + (size_t)unit->part[segment].moment * size;
    if (unit->part[segment].factored) {
        out->rows = unit->rows[segments[segment].param];
        out->cols = unit->cols[segments[segment].param];
        out->row = moments;
        out->col = moments + (size_t)out->rows * size;
    } else out->moment = moments;
}

/* ---- the update ---- */

/* One update while it is made. */
typedef struct llmpar__adalomo_call {
    llmpar_optim *optim;
    const llmpar_update *update;
    llmpar__adalomo_unit *unit;
    llmpar_device *device;
    const char *name;             /* of the unit */
    int64_t *sums, *param_squares, *update_squares;
    double *largest;
    char *factors;
    double beta;
    size_t size;
} llmpar__adalomo_call;

static llmpar_status llmpar__adalomo_reduce(const llmpar__adalomo_call *c, void *buffer, int64_t count, llmpar_dtype dtype, llmpar_reduce_op op)
{
    if (!c->optim->adalomo->comm || count == 0) return LLMPAR_OK;
    llmpar_collective call = llmpar__comm_collective(buffer, buffer, (size_t)count, dtype, c->name);
    call.op = op;
    return llmpar_all_reduce(c->optim->adalomo->comm, c->update->stream, &call);
}

/* Terms of a sum that the fixed point has room for. */
static int32_t llmpar__adalomo_bits(int64_t terms)
{
    int32_t bits = 62;
    while (terms > (int64_t)1 << (62 - bits)) bits--;
    return bits;
}

static const void *llmpar__adalomo_grad(const llmpar__adalomo_call *c, int32_t s) { return (const char *)c->update->grad + (size_t)c->update->segments[s].begin * c->size; }
static void *llmpar__adalomo_param(const llmpar__adalomo_call *c, int32_t s) { return (char *)c->update->param + (size_t)c->update->segments[s].begin * c->size; }

static llmpar_status llmpar__adalomo_find_largest(const llmpar__adalomo_call *c)
{
    llmpar_status status = LLMPAR_OK;
    for (int32_t s = 0; s < c->update->segment_count && !status; s++) {
        if (!c->unit->part[s].factored) continue;
        LLMPAR__ZEROED(llmpar_largest_args, args);
        args.count = (size_t)c->update->segments[s].count;
        args.x = llmpar__adalomo_grad(c, s);
        args.largest = c->largest + c->update->segments[s].param;
        args.dtype = c->update->dtype;
        status = c->device->largest(c->device, c->update->stream, &args);
    }
    return status ? status : llmpar__adalomo_reduce(c, c->largest, c->unit->matrices ? c->unit->params : 0, LLMPAR_F64, LLMPAR_MAX);
}

static llmpar_status llmpar__adalomo_sum_squares(const llmpar__adalomo_call *c)
{
    llmpar_status status = LLMPAR_OK;
    for (int32_t s = 0; s < c->update->segment_count && !status; s++) {
        const llmpar__adalomo_part *part = &c->unit->part[s];
        int32_t p = c->update->segments[s].param;
        if (!part->counts) continue;
        LLMPAR__ZEROED(llmpar_square_sum_args, square);
        square.count = (size_t)c->update->segments[s].count;
        square.x = llmpar__adalomo_param(c, s);
        square.accumulator = c->param_squares + (int64_t)p * LLMPAR_EXACT_SUM_LIMBS;
        square.dtype = c->update->dtype;
        status = c->device->square_sum(c->device, c->update->stream, &square);
        if (status || !part->factored) continue;
        LLMPAR__ZEROED(llmpar_factor_sum_args, args);
        args.begin = part->begin;
        args.count = c->update->segments[s].count;
        args.cols = part->cols;
        args.g = llmpar__adalomo_grad(c, s);
        args.row_sums = c->sums + c->unit->sum[p] + part->row;
        args.col_sums = c->sums + c->unit->sum[p] + c->unit->rows[p] + part->col;
        args.row_bits = llmpar__adalomo_bits(c->unit->cols[p]);
        args.col_bits = llmpar__adalomo_bits(c->unit->rows[p]);
        args.largest = c->largest + p;
        args.grad_scale = c->update->grad_scale;
        args.dtype = c->update->dtype;
        status = c->device->factor_sum(c->device, c->update->stream, &args);
    }
    return status ? status : llmpar__adalomo_reduce(c, c->sums, c->unit->sums + LLMPAR_EXACT_SUM_LIMBS * (int64_t)c->unit->params, LLMPAR_I64, LLMPAR_SUM);
}

static llmpar_status llmpar__adalomo_moments(const llmpar__adalomo_call *c)
{
    llmpar_status status = LLMPAR_OK;
    for (int32_t s = 0; s < c->update->segment_count && !status; s++) {
        const llmpar__adalomo_part *part = &c->unit->part[s];
        int32_t p = c->update->segments[s].param;
        if (!part->factored) continue;
        for (int by_columns = 0; by_columns < 2 && !status; by_columns++) {
            int64_t rows = c->unit->rows[p], cols = c->unit->cols[p], at = by_columns ? rows : 0;
            LLMPAR__ZEROED(llmpar_factor_moment_args, args);
            args.count = by_columns ? cols : rows;
            args.terms = by_columns ? rows : cols;
            args.bits = llmpar__adalomo_bits(args.terms);
            args.by_mean = !by_columns;
            args.sums = c->sums + c->unit->sum[p] + at;
            args.largest = c->largest + p;
            args.moment = (char *)c->unit->state + (size_t)(part->moment + at) * c->size;
            args.factor = c->factors + (size_t)(part->factor + at) * c->size;
            args.grad_scale = c->update->grad_scale;
            args.beta = c->beta;
            args.eps = c->optim->desc.eps;
            args.dtype = c->update->dtype;
            status = c->device->factor_moment(c->device, c->update->stream, &args);
        }
    }
    return status;
}

/* apply 0: the squares of u; 1: p. */
static llmpar_status llmpar__adalomo_pass(const llmpar__adalomo_call *c, int apply)
{
    llmpar_status status = LLMPAR_OK;
    for (int32_t s = 0; s < c->update->segment_count && !status; s++) {
        const llmpar__adalomo_part *part = &c->unit->part[s];
        const llmpar_segment *segment = &c->update->segments[s];
        const llmpar_param *param = &llmpar_fsdp_unit(c->optim->fsdp, c->update->unit)->params[segment->param];
        LLMPAR__ZEROED(llmpar_adalomo_args, args);
        args.begin = part->begin;
        args.count = segment->count;
        args.cols = part->cols;
        args.elements = 1;
        for (int32_t d = 0; d < param->dims; d++) args.elements *= param->shape[d];
        args.p = llmpar__adalomo_param(c, s);
        args.g = llmpar__adalomo_grad(c, s);
        if (part->factored) {
            args.row_factor = c->factors + (size_t)(part->factor + part->row) * c->size;
            args.col_factor = c->factors + (size_t)(part->factor + c->unit->rows[segment->param] + part->col) * c->size;
        } else args.moment = (char *)c->unit->state + (size_t)part->moment * c->size;
        if (apply || part->counts) args.update_squares = c->update_squares + (int64_t)segment->param * LLMPAR_EXACT_SUM_LIMBS;
        args.param_squares = c->param_squares + (int64_t)segment->param * LLMPAR_EXACT_SUM_LIMBS;
        args.lr = c->optim->lr;
        args.decay = segment->no_decay || c->optim->desc.decay < 0 ? 0 : c->optim->desc.decay;
        args.grad_scale = c->update->grad_scale;
        args.beta = c->beta;
        args.eps = c->optim->desc.eps;
        args.dtype = c->update->dtype;
        status = apply ? c->device->adalomo(c->device, c->update->stream, &args) : c->device->adalomo_square(c->device, c->update->stream, &args);
    }
    return status;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__adalomo_update(void *state, const llmpar_update *update)
{
    llmpar_optim *optim = (llmpar_optim *)state;
    llmpar__adalomo *a = optim->adalomo;
    llmpar__adalomo_call c;
    c.optim = optim;
    c.update = update;
    c.unit = &a->unit[update->unit];
    c.device = llmpar_fsdp_mesh(optim->fsdp)->ctx->device;
    c.name = llmpar_fsdp_unit(optim->fsdp, update->unit)->name;
    c.sums = (int64_t *)a->workspace;
    c.param_squares = c.sums + c.unit->sums;
    c.update_squares = c.param_squares + LLMPAR_EXACT_SUM_LIMBS * (int64_t)c.unit->params;
    c.largest = (double *)(void *)((char *)a->workspace + a->at_largest);
    c.factors = (char *)a->workspace + a->at_factors;
    c.beta = optim->desc.beta2 > 0 ? optim->desc.beta2 : 1 - llmpar_pow_f64((double)optim->steps, -0.8);
    c.size = llmpar_dtype_size(update->dtype);
    llmpar_status status = c.device->event_wait(c.device, update->stream, a->done);
    if (!status) status = c.device->zero(c.device, update->stream, c.sums, (size_t)(c.unit->sums + 2 * LLMPAR_EXACT_SUM_LIMBS * (int64_t)c.unit->params) * sizeof *c.sums);
    if (!status) status = c.device->zero(c.device, update->stream, c.largest, (size_t)c.unit->params * sizeof *c.largest);
    if (!status) status = llmpar__adalomo_find_largest(&c);
    if (!status) status = llmpar__adalomo_sum_squares(&c);
    if (!status) status = llmpar__adalomo_moments(&c);
    if (!status) status = llmpar__adalomo_pass(&c, 0);
    if (!status) status = llmpar__adalomo_reduce(&c, c.update_squares, LLMPAR_EXACT_SUM_LIMBS * (int64_t)c.unit->params, LLMPAR_I64, LLMPAR_SUM);
    if (!status) status = llmpar__adalomo_pass(&c, 1);
    return status ? status : c.device->event_record(c.device, update->stream, a->done);
}
