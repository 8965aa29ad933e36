/* redistribute_plan: what has to move, the least that could, and the collectives that do it.

   1. nothing has to move            local
   2. a chain of plain collectives   reduce (last listed axis first) by reduce_scatter where the target cuts that axis next and evenly, else by all_reduce; then undo cuts (last first) until the target's are left
   3. one axis, all pairs alike      all_to_all
   4. everything else                exchange
   The first that fits and does not cost too much: a chain without reductions sends no byte too many, and one with them at most twice the bound (an exchange sends its contributions to one rank for each element,
   which is the bound or, where that rank has no contribution of its own, one element more; but a chain spreads the work). */
#include "mesh/redistribute_internal.h"

#include <string.h>


static int llmpar__redistribute_partial(const llmpar_placement *p) { return p->kind == LLMPAR_PARTIAL_SUM || p->kind == LLMPAR_PARTIAL_MAX; }
static int32_t llmpar__redistribute_replicas(const llmpar_placement *p) { return p->kind == LLMPAR_SHARD && p->replicas > 1 ? p->replicas : 1; }
static int32_t llmpar__redistribute_ranks(const int32_t degree[LLMPAR_MESH_AXES])
{
    int32_t ranks = 1;
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) ranks *= degree[a];
    return ranks;
}

static const llmpar_placement *llmpar__redistribute_on(const llmpar_dtensor *tensor, int axis)
{
    for (int32_t i = 0; i < tensor->placements; i++)
        if ((int)tensor->placement[i].axis == axis) return &tensor->placement[i];
    return NULL;
}

static int32_t llmpar__redistribute_group(const llmpar_placement *p, int32_t degree)
{
    return p && p->kind == LLMPAR_SHARD ? llmpar__redistribute_replicas(p) : p && p->kind == LLMPAR_FLAT ? 1 : degree;
}

LLMPAR__PRIVATE_DEF void llmpar__redistribute_pair_make(const llmpar_dtensor *from, const llmpar_dtensor *to, const int32_t degree[LLMPAR_MESH_AXES], llmpar__redistribute_pair *pair)
{
    memset(pair, 0, sizeof *pair);
    pair->from = from;
    pair->to = to;
    pair->degree = degree;
    pair->ranks = llmpar__redistribute_ranks(degree);
    pair->contributions = 1;
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) {
        pair->from_group[a] = llmpar__redistribute_group(llmpar__redistribute_on(from, a), degree[a]);
        pair->to_group[a] = llmpar__redistribute_group(llmpar__redistribute_on(to, a), degree[a]);
    }
    for (int32_t i = 0; i < from->placements; i++) {
        const llmpar_placement *p = &from->placement[i], *target = llmpar__redistribute_on(to, p->axis);
        if (!llmpar__redistribute_partial(p) || degree[p->axis] == 1) continue;
        int keep = target && target->kind == p->kind;
        for (int32_t j = 0; j < i && keep; j++) { /* a sum of maxima is no maximum of sums: what is undone later has to stay so */
            const llmpar_placement *outer = &from->placement[j];
            if (!llmpar__redistribute_partial(outer) || outer->kind == p->kind || degree[outer->axis] == 1) continue;
            keep = pair->kept[outer->axis] && llmpar__redistribute_on(to, outer->axis) < target;
        }
        if (keep) {
            pair->kept[p->axis] = pair->to_group[p->axis] = 1;
        } else {
            pair->reduced[pair->reductions++] = i;
            pair->from_group[p->axis] = 1;
            pair->contributions *= degree[p->axis];
        }
    }
    for (int32_t i = 0; i < to->placements; i++) {
        const llmpar_placement *p = &to->placement[i];
        if (p->kind == LLMPAR_PARTIAL_SUM && degree[p->axis] > 1 && !pair->kept[p->axis]) pair->fresh[p->axis] = pair->to_group[p->axis] = 1;
    }
}

LLMPAR__PRIVATE_DEF int llmpar__redistribute_serves(const llmpar__redistribute_pair *pair, const int32_t sender[LLMPAR_MESH_AXES], const int32_t receiver[LLMPAR_MESH_AXES])
{
    for (int a = 0; a < LLMPAR_MESH_AXES; a++)
        if (sender[a] % pair->from_group[a] != receiver[a] % pair->from_group[a]) return 0;
    return 1;
}

LLMPAR__PRIVATE_DEF int llmpar__redistribute_needs(const llmpar__redistribute_pair *pair, const int32_t coordinate[LLMPAR_MESH_AXES], int home)
{
    for (int a = 0; a < LLMPAR_MESH_AXES; a++)
        if ((pair->fresh[a] && coordinate[a]) || (home && coordinate[a] % pair->to_group[a])) return 0;
    return 1;
}

LLMPAR__PRIVATE_DEF void llmpar__redistribute_local(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], int32_t placements, const int32_t coordinate[LLMPAR_MESH_AXES], llmpar_local *out)
{
    llmpar_dtensor prefix = *tensor;
    prefix.placements = placements;
    llmpar_dtensor_local(&prefix, degree, coordinate, out);
}

LLMPAR__PRIVATE_DEF int llmpar__redistribute_even(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], const int32_t coordinate[LLMPAR_MESH_AXES], size_t *blocks, size_t *count)
{
    const llmpar_placement *cut = &tensor->placement[tensor->placements - 1];
    int32_t at[LLMPAR_MESH_AXES];
    int64_t outer = 1, part = 0;
    llmpar_local whole, local;
    memcpy(at, coordinate, sizeof at);
    if (llmpar__redistribute_replicas(cut) > 1) return 0;
    llmpar__redistribute_local(tensor, degree, tensor->placements - 1, coordinate, &whole);
    for (at[cut->axis] = 0; at[cut->axis] < degree[cut->axis]; at[cut->axis]++) {
        llmpar_dtensor_local(tensor, degree, at, &local);
        if (at[cut->axis] && local.flat_count != part) return 0;
        part = local.flat_count;
    }
    for (int32_t d = 0; cut->kind == LLMPAR_SHARD && d < cut->dim; d++) outer *= whole.shape[d];
    *blocks = (size_t)(outer ? outer : 1);
    *count = (size_t)(outer ? part / outer : 0);
    return 1;
}

/* What moves at least, and in an exchange; in elements. */
static void llmpar__redistribute_volumes(const llmpar__redistribute_pair *pair, int64_t *bound, int64_t *exchange)
{
    llmpar__box box[LLMPAR__BOXES * LLMPAR__BOXES];
    int64_t elements = 1, need = 0, n = pair->contributions;
    *exchange = 0;
    for (int32_t d = 0; d < pair->to->dims; d++) elements *= pair->to->shape[d];
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) elements *= pair->kept[a] ? pair->degree[a] : 1;
    for (int32_t r = 0; r < pair->ranks; r++) {
        int32_t coordinate[LLMPAR_MESH_AXES];
        llmpar_local held, needed;
        int64_t common;
        llmpar__mesh_coordinate(pair->degree, r, coordinate);
        if (!llmpar__redistribute_needs(pair, coordinate, 0)) continue;
        llmpar_dtensor_local(pair->from, pair->degree, coordinate, &held);
        llmpar_dtensor_local(pair->to, pair->degree, coordinate, &needed);
        llmpar__mesh_common(&held, &needed, pair->to->dims, box, &common);
        need += needed.flat_count;
        *exchange += n > 1 && !llmpar__redistribute_needs(pair, coordinate, 1) ? needed.flat_count : n * needed.flat_count - common;
    }
    *bound = n > 1 ? (n - 2) * elements + need : *exchange;
}

LLMPAR_DEF int64_t llmpar_redistribute_bound(const llmpar_dtensor *from, const llmpar_dtensor *to, const int32_t degree[LLMPAR_MESH_AXES])
{
    llmpar__redistribute_pair pair;
    int64_t bound, exchange;
    llmpar__redistribute_pair_make(from, to, degree, &pair);
    llmpar__redistribute_volumes(&pair, &bound, &exchange);
    return bound * (int64_t)llmpar_dtype_size(from->dtype);
}

/* ---- the chain ---- */

LLMPAR__PRIVATE_DEF void llmpar__redistribute_normal(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], llmpar_dtensor *out)
{
    *out = *tensor;
    out->placements = 0;
    for (int cuts = 0; cuts < 2; cuts++)
        for (int32_t i = 0; i < tensor->placements; i++) {
            const llmpar_placement *p = &tensor->placement[i];
            int partial = llmpar__redistribute_partial(p);
            if (p->kind != LLMPAR_REPLICATE && cuts != partial && degree[p->axis] > (partial ? 1 : llmpar__redistribute_replicas(p))) out->placement[out->placements++] = *p;
        }
}

static int32_t llmpar__redistribute_partials(const llmpar_dtensor *normal)
{
    int32_t n = 0;
    while (n < normal->placements && llmpar__redistribute_partial(&normal->placement[n])) n++;
    return n;
}

/* How many cuts two normal tensors have in common before they differ. */
static int32_t llmpar__redistribute_prefix(const llmpar_dtensor *a, const llmpar_dtensor *b)
{
    int32_t first_a = llmpar__redistribute_partials(a), first_b = llmpar__redistribute_partials(b), n = 0;
    for (; first_a + n < a->placements && first_b + n < b->placements; n++) {
        const llmpar_placement *p = &a->placement[first_a + n], *q = &b->placement[first_b + n];
        if (p->kind != q->kind || p->axis != q->axis) break;
        if (p->kind == LLMPAR_FLAT ? p->offset != q->offset || p->unit_elements != q->unit_elements
                                   : p->dim != q->dim || (p->grain ? p->grain : 1) != (q->grain ? q->grain : 1) || llmpar__redistribute_replicas(p) != llmpar__redistribute_replicas(q)) break;
    }
    return n;
}

static int llmpar__redistribute_all_even(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES])
{
    int32_t axis = (int32_t)tensor->placement[tensor->placements - 1].axis, coordinate[LLMPAR_MESH_AXES];
    for (int32_t r = 0; r < llmpar__redistribute_ranks(degree); r++) {
        size_t blocks, count;
        llmpar__mesh_coordinate(degree, r, coordinate);
        if (!coordinate[axis] && !llmpar__redistribute_even(tensor, degree, coordinate, &blocks, &count)) return 0;
    }
    return 1;
}

/* Appends a step; `cut` is the tensor whose parts are sent or received: before an all_gather, after a reduce_scatter. The bytes are those that tables/comm.c counts. */
static void llmpar__redistribute_add(llmpar_redistribute_plan *plan, llmpar_redistribute_op op, llmpar_axis axis, const llmpar_dtensor *cut, const llmpar_dtensor *result)
{
    llmpar_redistribute_step *step = &plan->step[plan->steps++];
    int64_t item = (int64_t)llmpar_dtype_size(cut->dtype), n = plan->degree[axis];
    memset(step, 0, sizeof *step);
    step->op = op;
    step->axis = axis;
    step->result = *result;
    for (int32_t r = 0; r < llmpar__redistribute_ranks(plan->degree); r++) {
        int32_t coordinate[LLMPAR_MESH_AXES];
        llmpar_local local;
        llmpar__mesh_coordinate(plan->degree, r, coordinate);
        llmpar_dtensor_local(cut, plan->degree, coordinate, &local);
        int64_t part = local.flat_count * item;
        if (op == LLMPAR_REDISTRIBUTE_ALL_REDUCE) step->bytes += (int64_t)(2 * ((double)(n - 1) / (double)n) * (double)part + 0.5);
        else if (op == LLMPAR_REDISTRIBUTE_ALL_TO_ALL) step->bytes += part / n * (n - 1);
        else if (op != LLMPAR_REDISTRIBUTE_BROADCAST || coordinate[axis] % llmpar__redistribute_replicas(&cut->placement[cut->placements - 1]) == 0) step->bytes += (n - 1) * part;
    }
    plan->bytes += step->bytes;
}

static int llmpar__redistribute_chain(const llmpar__redistribute_pair *pair, llmpar_redistribute_plan *plan)
{
    llmpar_dtensor now, target;
    llmpar__redistribute_normal(pair->from, pair->degree, &now);
    llmpar__redistribute_normal(pair->to, pair->degree, &target);
    int32_t target_cuts = target.placements - llmpar__redistribute_partials(&target);
    const llmpar_placement *target_cut = &target.placement[target.placements - target_cuts];
    for (int a = 0; a < LLMPAR_MESH_AXES; a++)
        if (pair->fresh[a]) return 0;
    for (int32_t i = pair->reductions - 1; i >= 0; i--) {
        llmpar_axis axis = pair->from->placement[pair->reduced[i]].axis;
        int32_t at = 0;
        while (now.placement[at].axis != axis) at++;
        memmove(&now.placement[at], &now.placement[at + 1], (size_t)(--now.placements - at) * sizeof now.placement[0]);
        int32_t cuts = now.placements - llmpar__redistribute_partials(&now);
        const llmpar_placement *wanted = llmpar__redistribute_on(pair->to, axis);
        if (wanted && llmpar__redistribute_group(wanted, pair->degree[axis]) < pair->degree[axis]) { /* `to` cuts this axis */
            if (cuts >= target_cuts || llmpar__redistribute_prefix(&now, &target) != cuts || target_cut[cuts].axis != axis) return 0;
            now.placement[now.placements++] = target_cut[cuts];
            if (!llmpar__redistribute_all_even(&now, pair->degree)) return 0;
            llmpar__redistribute_add(plan, LLMPAR_REDISTRIBUTE_REDUCE_SCATTER, axis, &now, &now);
        } else {
            llmpar__redistribute_add(plan, LLMPAR_REDISTRIBUTE_ALL_REDUCE, axis, &now, &now);
        }
    }
    if (llmpar__redistribute_prefix(&now, &target) != target_cuts) return 0;
    while (now.placements - llmpar__redistribute_partials(&now) > target_cuts) {
        llmpar_dtensor before = now;
        now.placements--;
        llmpar__redistribute_add(plan, llmpar__redistribute_all_even(&before, pair->degree) ? LLMPAR_REDISTRIBUTE_ALL_GATHER : LLMPAR_REDISTRIBUTE_BROADCAST, before.placement[now.placements].axis, &before, &now);
    }
    return plan->steps > 0;
}

/* Does every rank take the same number of elements from every rank of this axis, and nothing from others? */
static int llmpar__redistribute_pairs_alike(const llmpar__redistribute_pair *pair, llmpar_axis axis)
{
    llmpar__box box[LLMPAR__BOXES * LLMPAR__BOXES];
    int32_t n = pair->degree[axis];
    for (int32_t r = 0; r < pair->ranks; r++) {
        int32_t receiver[LLMPAR_MESH_AXES], sender[LLMPAR_MESH_AXES];
        llmpar_local held, needed;
        int64_t common;
        llmpar__mesh_coordinate(pair->degree, r, receiver);
        memcpy(sender, receiver, sizeof sender);
        llmpar_dtensor_local(pair->to, pair->degree, receiver, &needed);
        for (sender[axis] = 0; sender[axis] < n; sender[axis]++) {
            llmpar_dtensor_local(pair->from, pair->degree, sender, &held);
            llmpar__mesh_common(&held, &needed, pair->to->dims, box, &common);
            if (!llmpar__redistribute_serves(pair, sender, receiver) || !llmpar__redistribute_needs(pair, receiver, 0) || held.flat_count != needed.flat_count || common * n != needed.flat_count) return 0;
        }
    }
    return 1;
}

/* ---- making a plan ---- */

static llmpar_status llmpar__redistribute_flat_fits(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], llmpar_error *error)
{
    for (int32_t i = 0; i < tensor->placements; i++) {
        const llmpar_placement *p = &tensor->placement[i];
        if (p->kind != LLMPAR_FLAT) continue;
        for (int32_t r = 0; r < llmpar__redistribute_ranks(degree); r++) { /* the check of the tensor knows the smallest part only */
            int32_t coordinate[LLMPAR_MESH_AXES];
            llmpar_local local;
            llmpar__mesh_coordinate(degree, r, coordinate);
            llmpar__redistribute_local(tensor, degree, i, coordinate, &local);
            if (local.elements > p->unit_elements - p->offset)
                return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: Flat on %s: the %lld elements of rank %d at offset %lld do not fit a unit of %lld", tensor->name ? tensor->name : "tensor", llmpar_axis_name(p->axis),
                                        (long long)local.elements, (int)r, (long long)p->offset, (long long)p->unit_elements);
        }
    }
    return LLMPAR_OK;
}

static llmpar_status llmpar__redistribute_check(const llmpar_dtensor *from, const llmpar_dtensor *to, const int32_t degree[LLMPAR_MESH_AXES], llmpar_error *error)
{
    const char *name = from->name ? from->name : "tensor";
    int64_t ranks = 1, elements = 1;
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) {
        if (degree[a] < 1 || ranks * degree[a] > INT32_MAX) return llmpar_error_set(error, LLMPAR_ERR_MESH, "%s: redistribute: %s = %d, expected degrees of at least 1 whose product is a number of ranks", name, llmpar_axis_name((llmpar_axis)a), (int)degree[a]);
        ranks *= degree[a];
    }
    llmpar_status st = llmpar_dtensor_check(from, degree, error);
    if (!st) st = llmpar_dtensor_check(to, degree, error);
    if (st) return st;
    int same = from->dtype == to->dtype && from->dims == to->dims;
    for (int32_t d = 0; d < from->dims && same; d++) {
        same = from->shape[d] == to->shape[d];
        elements *= from->shape[d];
    }
    if (!same) {
        char got[128], expected[128];
        llmpar__text a = llmpar__text_begin(expected, sizeof expected), b = llmpar__text_begin(got, sizeof got);
        llmpar__mesh_put_tensor(&a, from);
        llmpar__mesh_put_tensor(&b, to);
        return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "redistribute: from %s to %s: expected one dtype and shape", expected, got);
    }
    if (elements > INT64_MAX / 4 / ranks / (int64_t)llmpar_dtype_size(from->dtype)) return llmpar_error_set(error, LLMPAR_ERR_OVERFLOW, "%s: redistribute: the bytes of all %lld ranks overflow", name, (long long)ranks);
    st = llmpar__redistribute_flat_fits(from, degree, error);
    if (!st) st = llmpar__redistribute_flat_fits(to, degree, error);
    if (st) return st;
    llmpar__redistribute_pair pair;
    llmpar__redistribute_pair_make(from, to, degree, &pair);
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) {
        const llmpar_placement *p = llmpar__redistribute_on(pair.fresh[a] ? to : from, a);
        if (!p || !llmpar__redistribute_partial(p) || pair.kept[a] || degree[a] == 1) continue;
        int fine = from->dtype == LLMPAR_F32 || from->dtype == LLMPAR_F64 || from->dtype == LLMPAR_I64 || (from->dtype == LLMPAR_U64 && p->kind == LLMPAR_PARTIAL_SUM);
        if (!fine) return llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "%s: %s of %s on %s cannot be reduced (sum: f32 f64 i64 u64; max: f32 f64 i64)", name, p->kind == LLMPAR_PARTIAL_SUM ? "Partial(sum)" : "Partial(max)",
                                           llmpar_dtype_name(from->dtype), llmpar_axis_name(p->axis));
    }
    return LLMPAR_OK;
}

static void llmpar__redistribute_hash(uint64_t *hash, int64_t value)
{
    for (int i = 0; i < 8; i++) *hash = (*hash ^ ((uint64_t)value >> (8 * i) & 0xff)) * 0x100000001b3u;
}

static void llmpar__redistribute_hash_tensor(uint64_t *hash, const llmpar_dtensor *tensor)
{
    llmpar__redistribute_hash(hash, (int64_t)tensor->dtype);
    llmpar__redistribute_hash(hash, tensor->dims);
    llmpar__redistribute_hash(hash, tensor->placements);
    for (int32_t d = 0; d < tensor->dims; d++) llmpar__redistribute_hash(hash, tensor->shape[d]);
    for (int32_t i = 0; i < tensor->placements; i++) {
        const llmpar_placement *p = &tensor->placement[i];
        const int64_t value[] = { (int64_t)p->kind, (int64_t)p->axis, p->dim, p->replicas, p->grain, p->offset, p->unit_elements };
        int used = p->kind == LLMPAR_FLAT ? 7 : p->kind == LLMPAR_SHARD ? 5 : 2; /* what a kind does not use may be anything */
        for (int k = 0; k < used; k++)
            if (p->kind != LLMPAR_FLAT || k < 2 || k > 4) llmpar__redistribute_hash(hash, value[k]);
    }
}

LLMPAR_DEF llmpar_status llmpar_redistribute_plan_make(const llmpar_dtensor *from, const llmpar_dtensor *to, const int32_t degree[LLMPAR_MESH_AXES], llmpar_redistribute_plan *plan, llmpar_error *error)
{
    memset(plan, 0, sizeof *plan);
    llmpar_status st = llmpar__redistribute_check(from, to, degree, error);
    if (st) return st;
    llmpar__redistribute_pair pair;
    int64_t bound, exchange, item = (int64_t)llmpar_dtype_size(from->dtype);
    plan->from = *from;
    plan->to = *to;
    memcpy(plan->degree, degree, sizeof plan->degree);
    plan->fingerprint = 0xcbf29ce484222325u;
    llmpar__redistribute_hash_tensor(&plan->fingerprint, from);
    llmpar__redistribute_hash_tensor(&plan->fingerprint, to);
    llmpar__redistribute_pair_make(&plan->from, &plan->to, plan->degree, &pair);
    llmpar__redistribute_volumes(&pair, &bound, &exchange);
    plan->bound = bound * item;
    if (!pair.reductions && !bound) {
        plan->step[plan->steps++].result = *to;
        return LLMPAR_OK;
    }
    if (llmpar__redistribute_chain(&pair, plan) && plan->bytes <= plan->bound * (pair.reductions ? 2 : 1)) return LLMPAR_OK;
    plan->steps = 0;
    plan->bytes = 0;
    for (int a = 0; a < LLMPAR_MESH_AXES && !pair.reductions; a++)
        if (degree[a] > 1 && llmpar__redistribute_pairs_alike(&pair, (llmpar_axis)a)) {
            llmpar__redistribute_add(plan, LLMPAR_REDISTRIBUTE_ALL_TO_ALL, (llmpar_axis)a, to, to);
            return LLMPAR_OK;
        }
    plan->steps = 1;
    plan->step[0].op = LLMPAR_REDISTRIBUTE_EXCHANGE;
    plan->step[0].result = *to;
    plan->step[0].bytes = plan->bytes = exchange * item;
    return LLMPAR_OK;
}

/* wq f32[12,16]: [Shard(0) on tp, Flat(0) on dp_shard] -> [Replicate]
     1  all_gather      on dp_shard           768 bytes  -> [Shard(0) on tp]
     2  all_gather      on tp                1536 bytes  -> [Replicate]
   2304 bytes are sent by 4 ranks together; no plan can send less than 2304                                            */
LLMPAR_DEF size_t llmpar_redistribute_plan_print(const llmpar_redistribute_plan *plan, char *text, size_t capacity)
{
    static const char *const names[] = { "local", "all_gather", "broadcast", "reduce_scatter", "all_reduce", "all_to_all", "exchange" };
    llmpar__text out = llmpar__text_begin(text, capacity);
    char from[256], to[256];
    llmpar_dtensor_placements(&plan->from, from, sizeof from);
    llmpar_dtensor_placements(&plan->to, to, sizeof to);
    llmpar__mesh_put_tensor(&out, &plan->from);
    llmpar__text_put(&out, ": %s -> %s\n", from, to);
    for (int32_t i = 0; i < plan->steps; i++) {
        const llmpar_redistribute_step *step = &plan->step[i];
        int axis = step->op != LLMPAR_REDISTRIBUTE_LOCAL && step->op != LLMPAR_REDISTRIBUTE_EXCHANGE;
        llmpar_dtensor_placements(&step->result, to, sizeof to);
        llmpar__text_put(&out, "  %d  %-14s %-3s%-12s %10lld bytes  -> %s\n", (int)i + 1, names[step->op], axis ? "on" : "", axis ? llmpar_axis_name(step->axis) : "", (long long)step->bytes, to);
    }
    llmpar__text_put(&out, "%lld bytes are sent by %d ranks together; no plan can send less than %lld\n", (long long)plan->bytes, (int)llmpar__redistribute_ranks(plan->degree), (long long)plan->bound);
    return out.used;
}
