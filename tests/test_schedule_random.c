/* Thousands of random policies over random units: each list validates, and holds against two slower models of what instructions do. One knows what is read and written: a list without one of its waits must be refused exactly
   where it finds two accesses without an order. The other runs the streams in random legal orders over memory that holds what was put there. */
#include "schedule_units.h"

/* ---- the slow model: what instructions read and write, and which are ordered ---- */

#define WORDS (MAX_LIST / 64)
static uint64_t before[MAX_LIST][WORDS]; /* bit j of row i: j is complete before i starts */

static int is_before(int32_t j, int32_t i) { return (int)(before[i][j / 64] >> (j % 64) & 1); }
static void put_before(int32_t j, int32_t i)
{
    for (int w = 0; w < WORDS; w++) before[i][w] |= before[j][w];
    before[i][j / 64] |= (uint64_t)1 << (j % 64);
}

static void order(const llmpar_instruction *list, int32_t count)
{
    int32_t last[LLMPAR_STREAM_COUNT] = {-1, -1, -1, -1, -1}, host[2], hosts = 0;
    for (int32_t i = 0; i < count; i++) {
        memset(before[i], 0, sizeof before[i]);
        if (last[list[i].stream] >= 0) put_before(last[list[i].stream], i);
        for (int32_t w = 0; w < list[i].wait_count; w++) put_before(list[i].waits[w], i);
        for (int32_t h = 0; h < hosts; h++) put_before(host[h], i); /* the host waited for it before it issued i */
        last[list[i].stream] = i;
        if (list[i].op == LLMPAR_OP_SCALAR_REDUCE && hosts < 2) host[hosts++] = i;
    }
}

enum {
    TOKENS, LOSS, NORMS, VERDICT,
    FORWARDS, BACKWARDS = FORWARDS + MAX_UNITS, SHARD = BACKWARDS + MAX_UNITS, PARAMS = SHARD + MAX_UNITS, MASTER = PARAMS + MAX_UNITS, STATE = MASTER + MAX_UNITS, KEPT_PARAMS = STATE + MAX_UNITS, KEPT_STATE = KEPT_PARAMS + MAX_UNITS,
    SAVED = KEPT_STATE + MAX_UNITS, INPUT = SAVED + MAX_UNITS * MAX_MICRO, DINPUT = INPUT + (MAX_UNITS + 1) * MAX_MICRO, KEPT_ACTIVATIONS = DINPUT + (MAX_UNITS + 1) * MAX_MICRO, BUFFERS = KEPT_ACTIVATIONS + MAX_UNITS * MAX_MICRO,
    KEPT_BUFFERS = BUFFERS + MAX_UNITS * 4 * LLMPAR_GRAD_SLOTS, RESOURCES = KEPT_BUFFERS + MAX_UNITS * 2 * LLMPAR_GRAD_SLOTS
};
static int32_t buffer_of(int32_t unit, int32_t use, int32_t local, int32_t slot) { return BUFFERS + ((unit * 2 + use) * 2 + local) * LLMPAR_GRAD_SLOTS + slot; }
static int32_t of_micro(int32_t first, int32_t unit, int32_t micro) { return first + unit * MAX_MICRO + micro; }

static int is_whole(const llmpar_policy *p) { return p->shards < 2 || p->zero == LLMPAR_ZERO_0 || p->zero == LLMPAR_ZERO_1 || p->zero == LLMPAR_ZERO_2; }
static int is_reduced_in_place(const llmpar_policy *p) { return p->shards > 1 && p->zero == LLMPAR_ZERO_1; }

typedef enum access_kind { READS = 0, WRITES = 1, BEGINS = 2 } access_kind; /* BEGINS: writes memory of its own, nothing before matters */
typedef struct access_list { int32_t resource[12]; access_kind kind[12]; int count; } access_list;

static void add_access(access_list *a, int32_t resource, access_kind kind)
{
    a->resource[a->count] = resource;
    a->kind[a->count++] = kind;
}

static void unit_accesses(const llmpar_instruction *in, const llmpar_policy *policy, access_list *a)
{
    int32_t u = in->unit, m = in->micro_batch, borrow = units[u].borrow - 1, parameters = is_whole(policy) ? SHARD : PARAMS;
    add_access(a, TOKENS, READS);
    add_access(a, parameters + u, READS);
    if (borrow >= 0) add_access(a, parameters + borrow, READS);
    if (in->op == LLMPAR_OP_BACKWARD) {
        add_access(a, BACKWARDS + u, WRITES);
        add_access(a, of_micro(SAVED, u, m), WRITES); /* released, like the rest */
        add_access(a, of_micro(INPUT, u, m), WRITES);
        if (u + 1 < unit_count) add_access(a, of_micro(DINPUT, u + 1, m), WRITES);
        add_access(a, of_micro(DINPUT, u, m), BEGINS);
        if (in->slot >= 0) add_access(a, buffer_of(u, 0, in->local, in->slot), BEGINS);
        if (in->from >= 0) add_access(a, buffer_of(borrow, 1, in->local, in->from), BEGINS);
        return;
    }
    add_access(a, of_micro(INPUT, u, m), READS);
    add_access(a, of_micro(SAVED, u, m), BEGINS);
    if (in->op == LLMPAR_OP_RECOMPUTE) return;
    add_access(a, FORWARDS + u, WRITES);
    add_access(a, of_micro(INPUT, u + 1, m), BEGINS);
    if (in->again) add_access(a, VERDICT, READS);
    else if (u == unit_count - 1) add_access(a, LOSS, WRITES);
}

static void move_accesses(const llmpar_instruction *in, const llmpar_policy *policy, access_list *a)
{
    int32_t u = in->unit, m = in->micro_batch, store[4] = {KEPT_STATE + u, KEPT_PARAMS + u, 0, 0}, device[4] = {STATE + u, (policy->master ? MASTER : SHARD) + u, 0, 0};
    access_kind on_device = in->op == LLMPAR_OP_FETCH ? BEGINS : WRITES, in_store = in->op == LLMPAR_OP_FETCH ? READS : WRITES;
    if (in->what == LLMPAR_STATE_GRADS) {
        device[2] = buffer_of(u, in->use, 0, in->slot);
        store[2] = KEPT_BUFFERS + (u * 2 + in->use) * LLMPAR_GRAD_SLOTS + in->slot;
    }
    if (in->what == LLMPAR_STATE_ACTIVATIONS) {
        device[3] = of_micro(SAVED, u, m);
        store[3] = of_micro(KEPT_ACTIVATIONS, u, m);
        add_access(a, of_micro(INPUT, u, m), on_device);
    }
    add_access(a, device[in->what], on_device);
    add_access(a, store[in->what], in_store);
}

static void accesses(const llmpar_instruction *in, const llmpar_policy *policy, access_list *a)
{
    int32_t u = in->unit, updated = policy->master ? MASTER : SHARD;
    a->count = 0;
    switch (in->op) {
    case LLMPAR_OP_GATHER:
        add_access(a, SHARD + u, is_whole(policy) ? WRITES : READS);
        if (!is_whole(policy)) add_access(a, PARAMS + u, BEGINS);
        break;
    case LLMPAR_OP_FREE: add_access(a, in->slot >= 0 ? buffer_of(u, in->use, in->local, in->slot) : (in->what == LLMPAR_STATE_PARAMS ? SHARD : PARAMS) + u, WRITES); break;
    case LLMPAR_OP_FORWARD:
    case LLMPAR_OP_RECOMPUTE:
    case LLMPAR_OP_BACKWARD: unit_accesses(in, policy, a); break;
    case LLMPAR_OP_REDUCE:
        if (!is_reduced_in_place(policy)) add_access(a, buffer_of(u, in->use, 1, in->from), READS);
        add_access(a, buffer_of(u, in->use, 0, in->slot), is_reduced_in_place(policy) ? WRITES : BEGINS);
        break;
    case LLMPAR_OP_REDUCE_REPLICA: add_access(a, buffer_of(u, in->use, 0, in->slot), WRITES); break;
    case LLMPAR_OP_ACCUMULATE:
        add_access(a, buffer_of(u, in->use, in->local, in->slot), WRITES);
        add_access(a, buffer_of(u, in->from_use, in->local, in->from), WRITES); /* released */
        break;
    case LLMPAR_OP_NORM:
        add_access(a, buffer_of(u, in->use, 0, in->slot), READS);
        add_access(a, NORMS, WRITES);
        break;
    case LLMPAR_OP_SCALAR_REDUCE:
        add_access(a, in->pass ? VERDICT : TOKENS, BEGINS);
        add_access(a, LOSS, in->pass ? WRITES : BEGINS);
        add_access(a, NORMS, in->pass ? WRITES : BEGINS);
        break;
    case LLMPAR_OP_OPTIM:
        if (policy->host_update) {
            add_access(a, VERDICT, READS);
            add_access(a, KEPT_BUFFERS + (u * 2 + in->use) * LLMPAR_GRAD_SLOTS + in->slot, WRITES);
            add_access(a, KEPT_STATE + u, WRITES);
            add_access(a, KEPT_PARAMS + u, WRITES);
            break;
        }
        if (policy->update != LLMPAR_UPDATE_INSIDE) add_access(a, VERDICT, READS);
        add_access(a, buffer_of(u, in->use, 0, in->slot), WRITES);
        add_access(a, STATE + u, WRITES);
        add_access(a, updated + u, WRITES);
        break;
    case LLMPAR_OP_CAST:
        add_access(a, (policy->host_update ? KEPT_PARAMS : MASTER) + u, READS);
        add_access(a, SHARD + u, WRITES);
        break;
    case LLMPAR_OP_FETCH:
    case LLMPAR_OP_STORE: move_accesses(in, policy, a); break;
    }
}

/* Two accesses of one thing, at least one a write, on streams that do not order them? */
static int has_hazard(const llmpar_instruction *list, int32_t count, const llmpar_policy *policy)
{
    static struct { int32_t index[MAX_LIST]; unsigned char writes[MAX_LIST]; int32_t count; } seen[RESOURCES];
    order(list, count);
    for (int32_t r = 0; r < RESOURCES; r++) seen[r].count = 0;
    for (int32_t i = 0; i < count; i++) {
        access_list a;
        accesses(&list[i], policy, &a);
        for (int k = 0; k < a.count; k++) {
            int32_t r = a.resource[k];
            if (a.kind[k] == BEGINS) seen[r].count = 0;
            for (int32_t j = 0; j < seen[r].count; j++)
                if ((a.kind[k] != READS || seen[r].writes[j]) && !is_before(seen[r].index[j], i)) return 1;
            seen[r].index[seen[r].count] = i;
            seen[r].writes[seen[r].count++] = a.kind[k] != READS;
        }
    }
    return 0;
}

/* May two neighbours not change places? NORMs only add to an order-free sum; an update needs the gathered copy gone, though it does not touch it. */
static int conflict(const llmpar_instruction *x, const llmpar_instruction *y, const llmpar_policy *policy)
{
    access_list a, b;
    accesses(x, policy, &a);
    accesses(y, policy, &b);
    if (x->op == LLMPAR_OP_FREE && y->op == LLMPAR_OP_OPTIM && x->unit == y->unit && x->slot < 0 && x->what != LLMPAR_STATE_PARAMS) return 1;
    for (int i = 0; i < a.count; i++)
        for (int j = 0; j < b.count; j++) {
            if (a.resource[i] != b.resource[j] || (a.kind[i] == READS && b.kind[j] == READS)) continue;
            if (a.resource[i] == NORMS && x->op == y->op) continue;
            return 1;
        }
    return 0;
}

/* ---- the second model: memory that holds what was put there ---- */

/* Memory is taken in list order, as one host thread does it; what it holds changes when its instruction runs, in any order that streams and waits allow. A number stands for every tensor, a hash for every operation. */
typedef enum cell_state { TAKEN, WRITTEN, RELEASED } cell_state;
typedef struct cell { uint64_t holds, input; cell_state state; int part; } cell; /* input: of stored activations; part: whole parameters of which only this rank's part is up to date */
static cell cells[MAX_LIST * 5];
static int32_t cell_count, now[RESOURCES], bound[MAX_LIST][12];
static access_list touched[MAX_LIST];
static uint64_t want_loss, want_norm, want_gradient[MAX_UNITS];

static uint64_t hash(uint64_t a, uint64_t b)
{
    uint64_t x = a * 0x9e3779b97f4a7c15ull + (b ^ (b >> 31)) * 0xd1342543de82ef95ull + 1;
    x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9ull;
    return x ^ (x >> 32);
}

static uint64_t parameters_of(int32_t unit) { return hash(77, (uint64_t)unit); }
static uint64_t output_of(int32_t unit, uint64_t params, uint64_t borrowed, uint64_t input) { return hash(hash(params, borrowed), hash(input, (uint64_t)unit)); }
static uint64_t input_gradient(uint64_t params, uint64_t borrowed, uint64_t input, uint64_t saved, uint64_t doutput) { return hash(hash(params, borrowed), hash(hash(input, saved), doutput)); }
static uint64_t summed(uint64_t left, uint64_t right) { return hash(left, right + 5); }
static uint64_t reduced(const llmpar_policy *p, uint64_t gradient, int over_replicas) { return over_replicas ? (p->replicas > 1 ? hash(gradient, 12) : gradient) : p->shards < 2 || p->zero == LLMPAR_ZERO_0 ? gradient : hash(gradient, 11); }

/* The sum of gradients first .. first + n - 1 in a balanced tree, or one after the other. */
static uint64_t tree(const llmpar_policy *p, const uint64_t *g, int32_t n)
{
    int32_t half = 1;
    if (n == 1) return g[0];
    while (2 * half < n) half *= 2;
    return p->chain ? summed(tree(p, g, n - 1), g[n - 1]) : summed(tree(p, g, half), tree(p, g + half, n - half));
}

/* What a step must come to, by plain loops: no list, no policy but the order of sums. */
static void expect(const llmpar_policy *p)
{
    static uint64_t gradient[MAX_UNITS][2][MAX_MICRO];
    int32_t n = unit_count, lent[MAX_UNITS] = {0};
    want_loss = want_norm = 0;
    for (int32_t m = 0; m < p->micro_batches; m++) {
        uint64_t x[MAX_UNITS + 1], d = 0;
        x[0] = hash(99, (uint64_t)m);
        for (int32_t u = 0; u < n; u++) x[u + 1] = output_of(u, parameters_of(u), units[u].borrow ? parameters_of(units[u].borrow - 1) : 0, x[u]);
        want_loss += x[n];
        for (int32_t u = n - 1; u >= 0; u--) {
            d = input_gradient(parameters_of(u), units[u].borrow ? parameters_of(units[u].borrow - 1) : 0, x[u], hash(x[u + 1], 3), d);
            gradient[u][0][m] = hash(d, 1);
            if (units[u].borrow) gradient[units[u].borrow - 1][1][m] = hash(d, 2);
            if (units[u].borrow) lent[units[u].borrow - 1] = 1;
        }
    }
    for (int32_t u = 0; u < n; u++) {
        uint64_t use[2] = {0, 0};
        for (int k = 0; k <= lent[u]; k++) {
            for (int32_t m = 0; m < p->micro_batches && !p->no_sync; m++) gradient[u][k][m] = reduced(p, reduced(p, gradient[u][k][m], 0), 1);
            use[k] = tree(p, gradient[u][k], p->micro_batches);
            if (p->no_sync) use[k] = reduced(p, reduced(p, use[k], 0), 1);
        }
        want_gradient[u] = lent[u] ? summed(use[0], use[1]) : use[0];
        if (!units[u].frozen) want_norm += hash(want_gradient[u], 4);
    }
}

static cell *put(int32_t resource, uint64_t holds, cell_state state)
{
    cell *c = &cells[cell_count];
    now[resource] = cell_count++;
    memset(c, 0, sizeof *c);
    c->holds = holds;
    c->state = state;
    return c;
}

static int is_kept(const llmpar_policy *p, llmpar_state what) { return (int)(p->offload >> (unsigned)what & 1u); }

/* Takes memory for every instruction, in list order. */
static void bind(const llmpar_instruction *list, int32_t count, const llmpar_policy *p)
{
    cell_count = 0;
    for (int32_t r = 0; r < RESOURCES; r++) now[r] = -1;
    for (int32_t u = 0; u < unit_count; u++) {
        int kept = is_kept(p, LLMPAR_STATE_PARAMS);
        if (!kept || p->master) put(SHARD + u, parameters_of(u), WRITTEN);
        if (!kept && p->master) put(MASTER + u, parameters_of(u), WRITTEN);
        if (kept) put(KEPT_PARAMS + u, parameters_of(u), WRITTEN);
        put((is_kept(p, LLMPAR_STATE_OPTIMIZER) ? KEPT_STATE : STATE) + u, 0, WRITTEN);
        put(FORWARDS + u, 0, WRITTEN);
        put(BACKWARDS + u, 0, WRITTEN);
        for (int32_t m = 0; m < p->micro_batches; m++) put(of_micro(KEPT_ACTIVATIONS, u, m), 0, WRITTEN);
        for (int32_t i = 0; i < 2 * LLMPAR_GRAD_SLOTS; i++) put(KEPT_BUFFERS + u * 2 * LLMPAR_GRAD_SLOTS + i, 0, WRITTEN);
    }
    for (int32_t m = 0; m < p->micro_batches; m++) put(of_micro(INPUT, 0, m), hash(99, (uint64_t)m), WRITTEN);
    for (int32_t i = 0; i < count; i++) {
        accesses(&list[i], p, &touched[i]);
        for (int k = 0; k < touched[i].count; k++) {
            int32_t r = touched[i].resource[k];
            if (touched[i].kind[k] == BEGINS) put(r, 0, TAKEN);
            if (now[r] < 0) put(r, 0, RELEASED); /* nobody has put anything there: using it is an error */
            bound[i][k] = now[r];
        }
    }
}

static cell *at(int32_t i, int32_t resource)
{
    for (int k = 0; k < touched[i].count; k++)
        if (touched[i].resource[k] == resource) return &cells[bound[i][k]];
    return NULL;
}

static void set(cell *c, uint64_t holds)
{
    c->holds = holds;
    c->state = WRITTEN;
}

static const char *run_unit(const llmpar_instruction *in, int32_t i, const llmpar_policy *p)
{
    int32_t u = in->unit, m = in->micro_batch, borrow = units[u].borrow - 1, first = is_whole(p) ? SHARD : PARAMS;
    cell *params = at(i, first + u), *borrowed = borrow >= 0 ? at(i, first + borrow) : NULL, *input = at(i, of_micro(INPUT, u, m)), *saved = at(i, of_micro(SAVED, u, m));
    if (params->part || (borrowed && borrowed->part)) return "computes with parameters that are only partly up to date";
    uint64_t of_borrowed = borrowed ? borrowed->holds : 0, output = output_of(u, params->holds, of_borrowed, input->holds);
    if (in->op == LLMPAR_OP_BACKWARD) {
        cell *doutput = u + 1 < unit_count ? at(i, of_micro(DINPUT, u + 1, m)) : NULL;
        uint64_t d = input_gradient(params->holds, of_borrowed, input->holds, saved->holds, doutput ? doutput->holds : 0);
        set(at(i, of_micro(DINPUT, u, m)), d);
        if (in->slot >= 0) set(at(i, buffer_of(u, 0, in->local, in->slot)), hash(d, 1));
        if (in->from >= 0) set(at(i, buffer_of(borrow, 1, in->local, in->from)), hash(d, 2));
        saved->state = RELEASED;
        if (u > 0) input->state = RELEASED; /* the token ids stay */
        if (doutput) doutput->state = RELEASED;
        return NULL;
    }
    int keeps = in->op == LLMPAR_OP_RECOMPUTE || (in->pass == LLMPAR_PASS_FORWARD && units[u].recompute != LLMPAR_RECOMPUTE_FULL);
    set(saved, keeps ? hash(output, 3) : 0);
    if (in->op == LLMPAR_OP_RECOMPUTE) return NULL;
    set(at(i, of_micro(INPUT, u + 1, m)), output);
    if (in->pass == LLMPAR_PASS_EVAL && u > 0) input->state = RELEASED;
    if (u + 1 == unit_count && !in->again) at(i, LOSS)->holds += output;
    return NULL;
}

static void run_move(const llmpar_instruction *in, int32_t i, const llmpar_policy *p)
{
    int32_t u = in->unit, m = in->micro_batch, activations = in->what == LLMPAR_STATE_ACTIVATIONS;
    cell *device = in->what == LLMPAR_STATE_OPTIMIZER ? at(i, STATE + u) : in->what == LLMPAR_STATE_PARAMS ? at(i, (p->master ? MASTER : SHARD) + u) : activations ? at(i, of_micro(SAVED, u, m)) : at(i, buffer_of(u, in->use, 0, in->slot));
    cell *store = in->what == LLMPAR_STATE_OPTIMIZER ? at(i, KEPT_STATE + u) : in->what == LLMPAR_STATE_PARAMS ? at(i, KEPT_PARAMS + u) : activations ? at(i, of_micro(KEPT_ACTIVATIONS, u, m)) : at(i, KEPT_BUFFERS + (u * 2 + in->use) * LLMPAR_GRAD_SLOTS + in->slot);
    cell *input = activations ? at(i, of_micro(INPUT, u, m)) : NULL;
    if (in->op == LLMPAR_OP_FETCH) {
        set(device, store->holds);
        if (input) set(input, store->input);
        return;
    }
    store->holds = device->holds;
    device->state = RELEASED;
    if (!input) return;
    store->input = input->holds;
    if (u > 0) input->state = RELEASED;
}

static const char *run_one(const llmpar_instruction *in, int32_t i, const llmpar_policy *p)
{
    int32_t u = in->unit, whole = is_whole(p), parts = whole && p->shards > 1 && p->zero != LLMPAR_ZERO_0;
    for (int k = 0; k < touched[i].count; k++)
        if (touched[i].kind[k] != BEGINS && cells[bound[i][k]].state != WRITTEN) return "uses what is not there yet, or no more";
    cell *buffer = u >= 0 && in->slot >= 0 ? at(i, buffer_of(u, in->use, in->op == LLMPAR_OP_ACCUMULATE ? in->local : 0, in->slot)) : NULL, *updated = at(i, (p->master ? MASTER : SHARD) + u);
    switch (in->op) {
    case LLMPAR_OP_GATHER:
        if (whole && !at(i, SHARD + u)->part) return "gathers again what is up to date";
        if (whole) at(i, SHARD + u)->part = 0;
        else set(at(i, PARAMS + u), at(i, SHARD + u)->holds);
        break;
    case LLMPAR_OP_FREE: cells[bound[i][0]].state = RELEASED; break;
    case LLMPAR_OP_FORWARD:
    case LLMPAR_OP_RECOMPUTE:
    case LLMPAR_OP_BACKWARD: return run_unit(in, i, p);
    case LLMPAR_OP_REDUCE: set(buffer, reduced(p, is_reduced_in_place(p) ? buffer->holds : at(i, buffer_of(u, in->use, 1, in->from))->holds, 0)); break;
    case LLMPAR_OP_REDUCE_REPLICA: set(buffer, reduced(p, buffer->holds, 1)); break;
    case LLMPAR_OP_ACCUMULATE:
        set(buffer, summed(buffer->holds, at(i, buffer_of(u, in->from_use, in->local, in->from))->holds));
        at(i, buffer_of(u, in->from_use, in->local, in->from))->state = RELEASED;
        break;
    case LLMPAR_OP_NORM: at(i, NORMS)->holds += hash(buffer->holds, 4); break;
    case LLMPAR_OP_SCALAR_REDUCE:
        set(at(i, in->pass ? VERDICT : TOKENS), 1);
        if (in->pass && at(i, LOSS)->holds != want_loss) return "another loss";
        if (in->pass && !p->forward_only && at(i, NORMS)->holds != want_norm) return "another norm";
        if (!in->pass) set(at(i, LOSS), 0);
        if (!in->pass) set(at(i, NORMS), 0);
        break;
    case LLMPAR_OP_OPTIM:
        if (p->host_update) {
            cell *gradient = at(i, KEPT_BUFFERS + (u * 2 + in->use) * LLMPAR_GRAD_SLOTS + in->slot), *params = at(i, KEPT_PARAMS + u);
            if (gradient->holds != want_gradient[u]) return "another gradient";
            set(params, hash(params->holds, gradient->holds));
            set(at(i, KEPT_STATE + u), hash(at(i, KEPT_STATE + u)->holds, gradient->holds));
            break;
        }
        if (buffer->holds != want_gradient[u]) return "another gradient";
        set(updated, hash(updated->holds, buffer->holds));
        set(at(i, STATE + u), hash(at(i, STATE + u)->holds, buffer->holds));
        if (!p->master) updated->part = parts;
        buffer->state = RELEASED;
        break;
    case LLMPAR_OP_CAST:
        set(at(i, SHARD + u), at(i, (p->host_update ? KEPT_PARAMS : MASTER) + u)->holds);
        at(i, SHARD + u)->part = parts;
        break;
    case LLMPAR_OP_FETCH:
    case LLMPAR_OP_STORE: run_move(in, i, p); break;
    }
    return NULL;
}

/* What is left when the step is over: updated parameters and states where they belong, and nothing else. */
static const char *left_over(const llmpar_policy *p)
{
    for (int32_t u = 0; u < unit_count; u++) {
        int kept = is_kept(p, LLMPAR_STATE_PARAMS), trained = !p->forward_only && !units[u].frozen;
        uint64_t params = trained ? hash(parameters_of(u), want_gradient[u]) : parameters_of(u), state = trained ? hash(0, want_gradient[u]) : 0;
        const cell *shard = &cells[now[kept && !p->master ? KEPT_PARAMS + u : SHARD + u]], *master = p->master ? &cells[now[(kept ? KEPT_PARAMS : MASTER) + u]] : shard;
        if (shard->holds != params || shard->part || master->holds != params) return "other parameters";
        if (cells[now[(is_kept(p, LLMPAR_STATE_OPTIMIZER) ? KEPT_STATE : STATE) + u]].holds != state) return "another optimizer state";
        for (int32_t i = 0; i < 4 * LLMPAR_GRAD_SLOTS; i++)
            if (now[BUFFERS + u * 4 * LLMPAR_GRAD_SLOTS + i] >= 0 && cells[now[BUFFERS + u * 4 * LLMPAR_GRAD_SLOTS + i]].state != RELEASED) return "a gradient is left";
        if (now[PARAMS + u] >= 0 && cells[now[PARAMS + u]].state != RELEASED) return "gathered parameters are left";
        if (is_kept(p, LLMPAR_STATE_OPTIMIZER) && now[STATE + u] >= 0 && cells[now[STATE + u]].state != RELEASED) return "a fetched state is left";
        if (kept && now[(p->master ? MASTER : SHARD) + u] >= 0 && cells[now[(p->master ? MASTER : SHARD) + u]].state != RELEASED) return "fetched parameters are left";
    }
    return NULL;
}

/* Runs the list with the streams in a random legal order (or in list order); NULL: as it should. */
static const char *simulate(const llmpar_instruction *list, int32_t count, const llmpar_policy *p, int in_list_order)
{
    static unsigned char done[MAX_LIST];
    int32_t next[LLMPAR_STREAM_COUNT] = {0};
    memset(done, 0, sizeof done);
    expect(p);
    bind(list, count, p);
    for (int32_t finished = 0, host = 0; finished < count; finished++) {
        int32_t ready[LLMPAR_STREAM_COUNT], choices = 0;
        while (host < count && (list[host].op != LLMPAR_OP_SCALAR_REDUCE || done[host])) host++; /* what the host has issued: up to the first SCALAR_REDUCE that it waits for */
        for (int s = 0; s < LLMPAR_STREAM_COUNT; s++) {
            while (next[s] < count && (done[next[s]] || (int)list[next[s]].stream != s)) next[s]++;
            int can = next[s] < count && next[s] <= host;
            for (int32_t w = 0; can && w < list[next[s]].wait_count; w++) can = done[list[next[s]].waits[w]];
            if (can) ready[choices++] = next[s];
        }
        if (!choices) return "streams wait for each other";
        int32_t i = ready[random_below(choices)];
        for (int k = 0; in_list_order && k < choices; k++)
            if (ready[k] < i) i = ready[k];
        const char *wrong = run_one(&list[i], i, p);
        if (wrong) return wrong;
        done[i] = 1;
    }
    return left_over(p);
}

/* ---- changing a list ---- */
/* ---- changing a list ---- */

static void with_swapped(const llmpar_instruction *list, int32_t count, int32_t first)
{
    memcpy(changed, list, (size_t)count * sizeof *list);
    changed[first] = list[first + 1];
    changed[first + 1] = list[first];
    for (int32_t i = 0; i < count; i++)
        for (int32_t w = 0; w < changed[i].wait_count; w++) {
            int32_t *wait = &changed[i].waits[w];
            if (*wait == first) *wait = first + 1;
            else if (*wait == first + 1) *wait = first;
        }
}

static void without_wait(const llmpar_instruction *list, int32_t count, int32_t index, int32_t wait)
{
    memcpy(changed, list, (size_t)count * sizeof *list);
    llmpar_instruction *in = &changed[index];
    for (int32_t w = wait; w + 1 < in->wait_count; w++) in->waits[w] = in->waits[w + 1];
    in->wait_count--;
}

/* ---- random policies ---- */

TEST(every_policy_validates)
{
    char what[320];
    for (int i = 0, rounds = test_rounds(6000); i < rounds; i++) {
        llmpar_schedule *s = random_schedule(6, MAX_MICRO, what);
        if (!s) continue;
        if (validate(s->list, s->count, &s->policy)) TEST_FAIL("%s: %s", what, err.text);
        if (i % 8 == 0 && (s->count > MAX_LIST || has_hazard(s->list, s->count, &s->policy))) TEST_FAIL("%s: the validator passes a list with unordered accesses", what);
        llmpar_schedule_destroy(s);
    }
    CHECK_INT(heap.live, 0);
}

/* Every list computes what plain loops do, in list order and with the streams in any order; without waits it mostly does not. */
TEST(any_order_of_streams)
{
    char what[320];
    int32_t seen[LLMPAR_OP_STORE + 1] = {0};
    int noticed = 0, rounds = test_rounds(6000);
    for (int i = 0; i < rounds; i++) {
        llmpar_schedule *s = random_schedule(6, MAX_MICRO, what);
        if (!s) continue;
        for (int k = 0; k < 3; k++) {
            const char *wrong = simulate(s->list, s->count, &s->policy, k == 0);
            if (wrong) TEST_FAIL("%s: %s: %s", what, k ? "a random order" : "list order", wrong);
        }
        for (int32_t k = 0; k < s->count; k++) {
            seen[s->list[k].op]++;
            changed[k] = s->list[k];
            changed[k].wait_count = 0;
        }
        noticed += simulate(changed, s->count, &s->policy, 0) != NULL;
        llmpar_schedule_destroy(s);
    }
    CHECK(noticed > rounds / 2);
    for (int op = LLMPAR_OP_GATHER; op <= LLMPAR_OP_STORE; op++)
        if (seen[op] < rounds) TEST_FAIL("only %d %s in %d lists", seen[op], llmpar_op_name((llmpar_op)op), rounds);
}

/* Nothing in a list may be left out or done twice, and a pair of neighbours may change places exactly if they share nothing and the order of streams survives. */
TEST(dropped_doubled_swapped)
{
    char what[320];
    for (int k = 0, rounds = test_rounds(500); k < rounds; k++) {
        llmpar_schedule *s = random_schedule(4, 4, what);
        for (int32_t i = 0; s && i < s->count; i++) {
            const char *name = llmpar_op_name(s->list[i].op);
            if (!validate(changed, without(s->list, s->count, i), &s->policy)) TEST_FAIL("%s: passes without instruction %d, %s", what, i, name);
            if (!validate(changed, with_twice(s->list, s->count, i), &s->policy)) TEST_FAIL("%s: passes with instruction %d, %s, twice", what, i, name);
            if (i + 1 == s->count) continue;
            with_swapped(s->list, s->count, i);
            int bad = conflict(&s->list[i], &s->list[i + 1], &s->policy);
            for (int32_t w = 0; w < changed[i].wait_count; w++) bad |= changed[i].waits[w] >= i;
            if (!bad) bad = has_hazard(changed, s->count, &s->policy);
            if (bad != (validate(changed, s->count, &s->policy) != LLMPAR_OK)) TEST_FAIL("%s: %s with instructions %d, %s, and %s swapped: %s", what, bad ? "passes" : "refused", i, name, llmpar_op_name(s->list[i + 1].op), err.text);
        }
        llmpar_schedule_destroy(s);
    }
}

/* A wait may go, and an instruction move to another stream, exactly where the slow model says so. */
TEST(waits_and_streams)
{
    char what[320];
    int needed = 0, spare = 0;
    for (int k = 0, rounds = test_rounds(500); k < rounds; k++) {
        llmpar_schedule *s = random_schedule(4, 4, what);
        for (int32_t i = 0; s && i < s->count; i++) {
            llmpar_op op = s->list[i].op;
            for (int32_t w = 0; w < s->list[i].wait_count; w++) {
                without_wait(s->list, s->count, i, w);
                int bad = has_hazard(changed, s->count, &s->policy);
                needed += bad;
                spare += !bad;
                if (bad != (validate(changed, s->count, &s->policy) != LLMPAR_OK))
                    TEST_FAIL("%s: %s without the wait of %d, %s, for %d, %s: %s", what, bad ? "passes" : "refused", i, llmpar_op_name(op), s->list[i].waits[w], llmpar_op_name(s->list[s->list[i].waits[w]].op), err.text);
            }
            memcpy(changed, s->list, (size_t)s->count * sizeof *changed);
            changed[i].stream = (llmpar_stream_id)((changed[i].stream + 1 + random_below(LLMPAR_STREAM_COUNT - 1)) % LLMPAR_STREAM_COUNT);
            int bad = op == LLMPAR_OP_FORWARD || op == LLMPAR_OP_RECOMPUTE || op == LLMPAR_OP_BACKWARD || has_hazard(changed, s->count, &s->policy);
            if (bad != (validate(changed, s->count, &s->policy) != LLMPAR_OK)) TEST_FAIL("%s: %s with %d, %s, on stream %d: %s", what, bad ? "passes" : "refused", i, llmpar_op_name(op), changed[i].stream, err.text);
        }
        llmpar_schedule_destroy(s);
    }
    CHECK(needed > 200 && spare > 200);
}

enum { UNIT = 1, MICRO = 2, PASS = 4, USE = 8, SLOT = 16, FROM = 32, FROM_USE = 64, LOCAL = 128, PREDICATE = 256, WHAT = 512, AGAIN = 1024 };

static int fields_of(const llmpar_instruction *in)
{
    int moves = UNIT | PREDICATE | WHAT;
    switch (in->op) {
    case LLMPAR_OP_GATHER: return UNIT | PREDICATE;
    case LLMPAR_OP_FREE: return UNIT | SLOT | PREDICATE | WHAT | (in->slot >= 0 ? USE | LOCAL : 0);
    case LLMPAR_OP_FORWARD:
    case LLMPAR_OP_RECOMPUTE: return UNIT | MICRO | PASS | PREDICATE | AGAIN;
    case LLMPAR_OP_BACKWARD: return UNIT | MICRO | SLOT | FROM | PREDICATE | AGAIN | (in->slot >= 0 || in->from >= 0 ? LOCAL : 0);
    case LLMPAR_OP_REDUCE: return UNIT | USE | SLOT | FROM | PREDICATE;
    case LLMPAR_OP_REDUCE_REPLICA:
    case LLMPAR_OP_NORM:
    case LLMPAR_OP_OPTIM: return UNIT | USE | SLOT | PREDICATE;
    case LLMPAR_OP_ACCUMULATE: return UNIT | LOCAL | SLOT | FROM | PREDICATE | USE | FROM_USE;
    case LLMPAR_OP_SCALAR_REDUCE: return PASS | PREDICATE;
    case LLMPAR_OP_CAST: return UNIT | PREDICATE;
    case LLMPAR_OP_FETCH:
    case LLMPAR_OP_STORE: return in->what == LLMPAR_STATE_GRADS ? moves | USE | SLOT : in->what == LLMPAR_STATE_ACTIVATIONS ? moves | MICRO : moves;
    }
    return 0;
}

static void change(llmpar_instruction *c, int field)
{
    switch (field) {
    case UNIT: c->unit = unit_count > 1 ? (c->unit + 1) % unit_count : 1; break;
    case MICRO: c->micro_batch++; break;
    case PASS: c->pass = c->op == LLMPAR_OP_SCALAR_REDUCE ? !c->pass : c->pass == LLMPAR_PASS_EVAL ? LLMPAR_PASS_FORWARD : LLMPAR_PASS_EVAL; break;
    case USE: c->use = !c->use; break;
    case SLOT: c->slot++; break;
    case FROM: c->from++; break;
    case FROM_USE: c->from_use = !c->from_use; break;
    case LOCAL: c->local = !c->local; break;
    case WHAT: c->what = (llmpar_state)((c->what + 1) % LLMPAR_STATE_COUNT); break;
    case AGAIN: c->again = !c->again; break;
    default: c->predicate = c->predicate == LLMPAR_ALWAYS ? LLMPAR_IF_FINITE : LLMPAR_ALWAYS; break;
    }
}

/* Every operand matters: changed, the list is refused. */
TEST(operands)
{
    char what[320];
    for (int k = 0, rounds = test_rounds(500); k < rounds; k++) {
        llmpar_schedule *s = random_schedule(4, 4, what);
        for (int32_t i = 0; s && i < s->count; i++)
            for (int field = 1; field <= AGAIN; field *= 2) {
                if (!(fields_of(&s->list[i]) & field)) continue;
                memcpy(changed, s->list, (size_t)s->count * sizeof *changed);
                change(&changed[i], field);
                if (!validate(changed, s->count, &s->policy)) TEST_FAIL("%s: passes with field %d of instruction %d, %s, changed", what, field, i, llmpar_op_name(s->list[i].op));
            }
        llmpar_schedule_destroy(s);
    }
}

/* ---- lists by chance ---- */

static int32_t small_number(void) { return random_below(4) ? random_below(4) : random_below(40) - 8; }

/* One random change; returns the new count. */
static int32_t mutate(int32_t count)
{
    static llmpar_instruction copy[MAX_LIST];
    int32_t i = random_below(count);
    llmpar_instruction *in = &changed[i];
    memcpy(copy, changed, (size_t)count * sizeof *copy);
    switch (random_below(8)) {
    case 0: return count > 1 ? without(copy, count, i) : count;
    case 1: return with_twice(copy, count, i);
    case 2: if (i + 1 < count) with_swapped(copy, count, i); return count;
    case 3: if (in->wait_count) without_wait(copy, count, i, random_below(in->wait_count)); return count;
    case 4: in->stream = (llmpar_stream_id)random_below(LLMPAR_STREAM_COUNT); return count;
    case 5: if (in->wait_count < LLMPAR_WAITS) in->waits[in->wait_count++] = random_below(i + 1); return count;
    case 6: in->op = (llmpar_op)(1 + random_below(LLMPAR_OP_STORE)); return count;
    default: break;
    }
    switch (random_below(11)) {
    case 0: in->unit = small_number(); break;
    case 1: in->micro_batch = small_number(); break;
    case 2: in->pass = small_number(); break;
    case 3: in->use = small_number(); break;
    case 4: in->slot = small_number(); break;
    case 5: in->from = small_number(); break;
    case 6: in->from_use = small_number(); break;
    case 7: in->local = small_number(); break;
    case 8: in->what = (llmpar_state)random_below(LLMPAR_STATE_COUNT + 1); break;
    case 9: in->again = small_number(); break;
    default: in->predicate = (llmpar_predicate)random_below(3); break;
    }
    return count;
}

/* Whatever the validator lets pass computes what plain loops do, in any order of streams. */
TEST(whatever_passes_is_right)
{
    char what[320];
    int passed = 0, refused = 0;
    for (int k = 0, rounds = test_rounds(2000); k < rounds; k++) {
        llmpar_schedule *s = random_schedule(4, 4, what);
        for (int j = 0; s && j < 12; j++) {
            int32_t count = s->count;
            memcpy(changed, s->list, (size_t)count * sizeof *changed);
            for (int changes = 1 + random_below(3); changes; changes--) count = mutate(count);
            if (validate(changed, count, &s->policy)) {
                refused++;
                continue;
            }
            passed++;
            for (int t = 0; t < 3; t++) {
                const char *wrong = simulate(changed, count, &s->policy, 0);
                if (wrong) TEST_FAIL("%s: a list that passes is wrong: %s", what, wrong);
            }
        }
        llmpar_schedule_destroy(s);
    }
    CHECK(passed > 200 && refused > 200);
}

TEST_LIST(T_(every_policy_validates), T_(any_order_of_streams), T_(dropped_doubled_swapped), T_(waits_and_streams), T_(operands), T_(whatever_passes_is_right))
