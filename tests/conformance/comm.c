/* comm: conformance of a communicator table, written from src/tables/comm.h alone: `make grade COMM=file.c` links it with the file that defines grade_patch.

   For each slot: 1 to 8 ranks, and 2 x 3 ranks where the communicator is one of two (its ranks are not those of the world); every dtype and operation, counts from 0 to 701 that no number of ranks divides,
   1 to 3 blocks, all forms in place, all roots; every bit of every output. First with one rank at a time (lockstep), where a deadlock shows at once, then with real threads.
   What the replaced slots really send is counted where they hand it to other slots, and compared with the formula of the table. */
#include "grade.h"
#include "grade_comm.h"

typedef enum slot { BARRIER, ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE, BROADCAST, ALL_TO_ALL, SEND, RECV, SPLIT, ABORT, SLOTS } slot;
static const char *const slot_names[SLOTS] = { "barrier", "all_gather", "reduce_scatter", "all_reduce", "broadcast", "all_to_all", "send", "recv", "split", "abort" };

typedef enum form { SEPARATE, IN_PLACE, ROOT_NULL } form;

/* One call. */
typedef struct cell {
    slot s;
    llmpar_dtype dtype;
    llmpar_reduce_op op;
    size_t count, blocks;
    int root, peer;       /* broadcast: root; send and recv: from root to peer */
    form f;
    int placement;
    uint64_t number;      /* of the case; salts the values */
} cell;

/* One launch. */
typedef struct pass { slot s; int rows, ranks, lockstep; } pass;

/* One rank in it. */
typedef struct run { const pass *p; llmpar_ctx *ctx; llmpar_comm *comm; llmpar_stream *stream; llmpar_comm inner; uint64_t number; int patched; } run;

static __thread run *self;      /* of this rank's thread: what the counting slots below need */
static uint64_t case_sent[2], case_formula[2]; /* atomic: bytes over all ranks of the even and the odd cases */

/* ---- slots that count what a student's slot hands to them, and pass it on ---- */

static void count_sent(const llmpar_comm *comm, const llmpar_collective *call, slot s)
{
    uint64_t part = (uint64_t)(call->count * (call->blocks ? call->blocks : 1) * llmpar_dtype_size(call->dtype)), n = (uint64_t)comm->ranks, bytes = part * (n - 1);
    if (s == SEND) bytes = part;
    if (s == RECV || (s == BROADCAST && comm->rank != call->root)) bytes = 0;
    if (s == ALL_REDUCE) bytes = comm->rank ? 0 : 2 * part * (n - 1); /* of all ranks at once: 2(n-1)/n each need not be whole */
    __atomic_add_fetch(&case_sent[self->number & 1], bytes, __ATOMIC_SEQ_CST);
}

/* The wrappers describe a call to the slot (comm->call). Who calls a slot of the table itself, with another call than it was asked for, leaves that out. */
static llmpar_status undescribed(llmpar_comm *comm, const char *name)
{
    grade_fail(GRADE_STATUS, "calls the slot %s directly: use llmpar_%s, which describes the call for messages and checks", name, name);
    return llmpar_error_set(comm->error, LLMPAR_ERR_ARGUMENT, "%s without its wrapper", name);
}
#define COUNTING(slot, S, OP) \
    static llmpar_status counting_##slot(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) \
    { \
        const llmpar_call *described = comm->call; \
        if (!described || described->op != OP || described->count != call->count || described->dtype != (int32_t)call->dtype) return undescribed(comm, #slot); \
        count_sent(comm, call, S); \
        return self->inner.slot(comm, stream, call); \
    }
COUNTING(all_gather, ALL_GATHER, LLMPAR_CALL_ALL_GATHER)
COUNTING(reduce_scatter, REDUCE_SCATTER, LLMPAR_CALL_REDUCE_SCATTER)
COUNTING(all_reduce, ALL_REDUCE, LLMPAR_CALL_ALL_REDUCE)
COUNTING(broadcast, BROADCAST, LLMPAR_CALL_BROADCAST)
COUNTING(all_to_all, ALL_TO_ALL, LLMPAR_CALL_ALL_TO_ALL)
COUNTING(send, SEND, LLMPAR_CALL_SEND)
COUNTING(recv, RECV, LLMPAR_CALL_RECV)
#undef COUNTING

static void watch(run *r)
{
    llmpar_comm *c = r->comm;
    r->inner = *c;
    c->all_gather = counting_all_gather;
    c->reduce_scatter = counting_reduce_scatter;
    c->all_reduce = counting_all_reduce;
    c->broadcast = counting_broadcast;
    c->all_to_all = counting_all_to_all;
    c->send = counting_send;
    c->recv = counting_recv;
    grade_patch(c);
    const int changed[SLOTS] = { c->barrier != r->inner.barrier, c->all_gather != counting_all_gather, c->reduce_scatter != counting_reduce_scatter, c->all_reduce != counting_all_reduce, c->broadcast != counting_broadcast,
                                 c->all_to_all != counting_all_to_all, c->send != counting_send, c->recv != counting_recv, c->split != r->inner.split, c->abort != r->inner.abort };
    r->patched = changed[r->p->s];
    if (r->ctx->rank == 0) grade->patched = r->patched;
}
/* The mesh is destroyed with the slots it was made with. */
static void unwatch(run *r)
{
    r->inner.sequence = r->comm->sequence;
    r->inner.bytes_sent = r->comm->bytes_sent;
    *r->comm = r->inner;
}

/* ---- values ---- */

/* Element `index` of rank `rank`'s send buffer: any bits that are neither NaN nor poison; sums of floats depend on their order. */
static void element(const cell *c, int rank, size_t index, void *out)
{
    uint64_t h = grade_hash(c->number * 1000003u + (uint64_t)rank * 7919u + (uint64_t)index * 64u + 1);
    union { float f; double d; uint16_t h; int32_t i; int64_t l; uint64_t u; uint8_t b; } v;
    double unit = (double)(h >> 12) / 4503599627370496.0, scale = (double)(1 << (h & 7)), x = ((h >> 3 & 1) ? -1 : 1) * (unit + 0.01) * scale;
    v.u = 0;
    switch (c->dtype) {
    case LLMPAR_F32: v.f = (float)x; break;
    case LLMPAR_F64: v.d = x; break;
    case LLMPAR_BF16: v.h = llmpar_f32_to_bf16((float)x); break;
    case LLMPAR_F16: v.h = llmpar_f32_to_f16((float)x); break;
    case LLMPAR_I32: v.i = (int32_t)(h >> 34) - 500000000; break;
    case LLMPAR_I64: v.l = (int64_t)(h >> 14) - ((int64_t)1 << 48); break;
    case LLMPAR_U64: v.u = h >> 1; break;
    default: v.b = (uint8_t)(h >> 57); break;
    }
    memcpy(out, &v, llmpar_dtype_size(c->dtype));
}

typedef union number { float f; double d; int64_t l; uint64_t u; } number;
static number combine(const cell *c, number a, number b)
{
    number out;
    out.u = 0;
    switch (c->dtype) {
    case LLMPAR_F32: out.f = c->op == LLMPAR_MAX ? (b.f > a.f ? b.f : a.f) : a.f + b.f; break;
    case LLMPAR_F64: out.d = c->op == LLMPAR_MAX ? (b.d > a.d ? b.d : a.d) : a.d + b.d; break;
    case LLMPAR_I64: out.l = c->op == LLMPAR_MAX ? (b.l > a.l ? b.l : a.l) : a.l + b.l; break;
    default: out.u = a.u + b.u; break;
    }
    return out;
}
static number contribution(const cell *c, int rank, size_t index)
{
    number v;
    v.u = 0;
    element(c, rank, index, &v);
    return v;
}
/* Ranks [first, first + n) in the balanced tree: split at the largest power of two below n. */
static number tree(const cell *c, int first, int n, size_t index)
{
    int left = 1;
    if (n == 1) return contribution(c, first, index);
    while (left * 2 < n) left *= 2;
    return combine(c, tree(c, first, left, index), tree(c, first + left, n - left, index));
}

static int reduces(slot s) { return s == REDUCE_SCATTER || s == ALL_REDUCE; }

/* Where output element `at` of rank `me` comes from: rank *from (-1: the sum of all), element *index of its send buffer. */
static void source(const cell *c, int n, int me, size_t at, int *from, size_t *index)
{
    size_t block = c->s == ALL_GATHER || c->s == ALL_TO_ALL ? at / (c->count * (size_t)n) : at / c->count, part = at / c->count % (size_t)n, i = at % c->count;
    *from = c->s == BROADCAST || c->s == SEND || c->s == RECV ? c->root : reduces(c->s) ? -1 : (int)part;
    if (c->s == ALL_GATHER) *index = block * c->count + i;
    else if (c->s == ALL_TO_ALL || c->s == REDUCE_SCATTER) *index = (block * (size_t)n + (size_t)me) * c->count + i;
    else *index = at;
}
static void expected(const cell *c, int n, int me, size_t at, void *out)
{
    int from;
    size_t index;
    source(c, n, me, at, &from, &index);
    if (from >= 0) element(c, from, index, out);
    else {
        number v = tree(c, 0, n, index);
        memcpy(out, &v, llmpar_dtype_size(c->dtype));
    }
}

/* What the wrong value could be. */
static void guess(const cell *c, int n, int me, size_t at, const void *got, char *text, size_t capacity)
{
    size_t item = llmpar_dtype_size(c->dtype), index, total = c->count * c->blocks * (c->s == REDUCE_SCATTER || c->s == ALL_TO_ALL ? (size_t)n : 1);
    int from;
    unsigned char other[8];
    text[0] = 0;
    source(c, n, me, at, &from, &index);
    if (grade_is_poison(got, item)) { snprintf(text, capacity, " (never written, or taken from outside a buffer)"); return; }
    if (from < 0 && c->op == LLMPAR_SUM) {
        number up = contribution(c, 0, index), down = contribution(c, n - 1, index), ring = contribution(c, (me + 1) % n, index);
        for (int r = 1; r < n; r++) {
            up = combine(c, up, contribution(c, r, index));
            down = combine(c, down, contribution(c, n - 1 - r, index));
            ring = combine(c, ring, contribution(c, (me + 1 + r) % n, index));
        }
        if (!memcmp(got, &up, item) || !memcmp(got, &down, item) || !memcmp(got, &ring, item)) {
            snprintf(text, capacity, " (the ranks one after another; the contract is the balanced tree over the rank index)");
            return;
        }
    }
    for (int r = 0; r < n; r++)
        for (size_t i = 0; i < total; i++) {
            element(c, r, i, other);
            if (memcmp(got, other, item)) continue;
            if (item > 2) snprintf(text, capacity, " (that is element %zu of what rank %d of the communicator sends)", i, r);
            return;
        }
    if (c->dtype == LLMPAR_F32 || c->dtype == LLMPAR_F64) {
        double x = c->dtype == LLMPAR_F64 ? ((const number *)got)->d : (double)((const number *)got)->f;
        if (isnan(x)) snprintf(text, capacity, " (computed from what was never written, or lies outside a buffer)");
    }
}

/* ---- one case ---- */

static void describe(const cell *c, int n, char *text, size_t capacity)
{
    static const char *const forms[] = { "", ", in place", ", recv NULL on the root" };
    int used = snprintf(text, capacity, "%s %s%s, count %zu, blocks %zu%s, %d rank%s", slot_names[c->s], llmpar_dtype_name(c->dtype), !reduces(c->s) ? "" : c->op == LLMPAR_MAX ? " max" : " sum", c->count, c->blocks, forms[c->f], n, n > 1 ? "s" : "");
    if (c->s == BROADCAST && used > 0) snprintf(text + used, capacity - (size_t)used, ", root %d", c->root);
    if ((c->s == SEND || c->s == RECV) && used > 0) snprintf(text + used, capacity - (size_t)used, ", from %d to %d", c->root, c->peer);
}

/* The next case begins: the first rank that comes closes the books of the one before and writes down what runs. */
static void begin(run *r, const char *what)
{
    uint64_t before = r->number++;
    if (!__atomic_compare_exchange_n(&grade->progress, &before, r->number, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) return;
    uint64_t sent = __atomic_exchange_n(&case_sent[before & 1], 0, __ATOMIC_SEQ_CST), formula = __atomic_exchange_n(&case_formula[before & 1], 0, __ATOMIC_SEQ_CST);
    double ratio = formula ? (double)sent / (double)formula : sent ? HUGE_VAL : 0;
    grade->sent += (double)sent;
    grade->formula += (double)formula;
    if (ratio > grade->worst_ratio) {
        grade->worst_ratio = ratio;
        snprintf(grade->worst, sizeof grade->worst, "%s: the ranks sent %llu bytes together, the formula says %llu", grade->what, (unsigned long long)sent, (unsigned long long)formula);
    }
    snprintf(grade->what, sizeof grade->what, "%s", what);
    grade->cases++;
}

/* Everybody has checked; has anybody failed? */
static llmpar_status end(run *r)
{
    llmpar_status st = llmpar_comm_barrier(r->ctx->comm, NULL, "conformance");
    if (!st && __atomic_load_n(&grade->stop, __ATOMIC_SEQ_CST)) return llmpar_fail(r->ctx, LLMPAR_ERR_INTERNAL, "a case has failed");
    return st;
}

static llmpar_status returned(run *r, llmpar_status st, const char *what)
{
    if (st != LLMPAR_ERR_PEER) grade_fail(GRADE_STATUS, "%s returned \"%s\": %s", what, llmpar_status_string(st), r->comm->error && r->comm->error->status ? r->comm->error->text : "(no text)");
    return st;
}

/* 0 and the failure kept at the first element of buffer `name` that differs. */
static int check_output(run *r, const cell *c, const char *name, const unsigned char *got, size_t elements)
{
    int n = r->comm->ranks, me = r->comm->rank;
    size_t item = llmpar_dtype_size(c->dtype);
    for (size_t i = 0; i < elements; i++) {
        unsigned char want[8];
        char a[48], b[48], hint[160];
        expected(c, n, me, i, want);
        if (!memcmp(got + i * item, want, item)) continue;
        size_t per = c->s == ALL_GATHER || c->s == ALL_TO_ALL ? c->count * (size_t)n : c->count;
        char part[40] = "";
        if (per != c->count) snprintf(part, sizeof part, "part of rank %zu, ", i / c->count % (size_t)n);
        unsigned char copy[8] = { 0 };
        memcpy(copy, got + i * item, item);
        grade_text(a, sizeof a, c->dtype, want);
        grade_text(b, sizeof b, c->dtype, copy);
        guess(c, n, me, i, copy, hint, sizeof hint);
        grade_fail(GRADE_VALUE, "%s[%zu] (block %zu, %selement %zu): expected %s, got %s%s", name, i, i / per, part, i % c->count, a, b, hint);
        return 0;
    }
    return 1;
}
static int check_input(run *r, const cell *c, const unsigned char *send, size_t elements, size_t skip, size_t skip_count)
{
    size_t item = llmpar_dtype_size(c->dtype);
    for (size_t i = 0; i < elements; i++) {
        unsigned char want[8];
        if (i >= skip && i < skip + skip_count) continue;
        element(c, r->comm->rank, i, want);
        if (!memcmp(send + i * item, want, item)) continue;
        grade_fail(GRADE_BOUNDS, "wrote into its input: send[%zu] of %zu elements was changed", i, elements);
        return 0;
    }
    return 1;
}

static llmpar_status invoke(llmpar_comm *comm, llmpar_stream *stream, slot s, const llmpar_collective *call)
{
    switch (s) {
    case ALL_GATHER: return llmpar_all_gather(comm, stream, call);
    case REDUCE_SCATTER: return llmpar_reduce_scatter(comm, stream, call);
    case ALL_REDUCE: return llmpar_all_reduce(comm, stream, call);
    case BROADCAST: return llmpar_broadcast(comm, stream, call);
    case ALL_TO_ALL: return llmpar_all_to_all(comm, stream, call);
    case SEND: return llmpar_send(comm, stream, call);
    default: return llmpar_recv(comm, stream, call);
    }
}

static llmpar_status one(run *r, cell c)
{
    llmpar_comm *comm = r->comm;
    int n = comm->ranks, me = comm->rank, point = c.s == SEND || c.s == RECV, sends = 1, receives = 1;
    char what[160];
    c.number = r->number + 1;
    describe(&c, n, what, sizeof what);
    begin(r, what);
    grade_places_begin();
    if (point) sends = me == c.root, receives = me == c.peer;
    if (c.s == BROADCAST) sends = me == c.root, receives = me != c.root || c.f == SEPARATE;
    size_t item = llmpar_dtype_size(c.dtype), part = c.count * c.blocks, all = part * (size_t)n;
    size_t in = c.s == REDUCE_SCATTER || c.s == ALL_TO_ALL ? all : part, out = c.s == ALL_GATHER || c.s == ALL_TO_ALL ? all : part;
    unsigned char *send = NULL, *recv = NULL, *filled;
    size_t own = 0; /* where in the joint buffer of an in-place call this rank's part lies */
    if (c.f == IN_PLACE && c.s == ALL_GATHER) recv = (unsigned char *)grade_put("recv (in place)", out * item, item, c.placement), send = recv + (own = (size_t)me * c.count) * item;
    else if (c.f == IN_PLACE && c.s == REDUCE_SCATTER) send = (unsigned char *)grade_put("send (in place)", in * item, item, c.placement), recv = send + (own = (size_t)me * c.count) * item;
    else if (c.f == IN_PLACE) send = recv = (unsigned char *)grade_put("the buffer (in place)", in * item, item, c.placement);
    else {
        if (sends) send = (unsigned char *)grade_put("send", in * item, item, c.placement);
        if (receives) recv = (unsigned char *)grade_put("recv", out * item, item, c.placement);
    }
    filled = send;
    if (c.f == IN_PLACE && c.s == BROADCAST && !sends) send = NULL;
    for (size_t i = 0; sends && i < in; i++) element(&c, me, i, filled + i * item);
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.send = send;
    call.recv = recv;
    call.count = c.count;
    call.blocks = c.blocks;
    call.dtype = c.dtype;
    call.op = c.op;
    call.root = c.s == BROADCAST ? c.root : 0;
    call.peer = me == c.root ? c.peer : c.root;
    call.tag = slot_names[c.s];
    uint64_t live = grade_memories[grade_me].live, counted = comm->bytes_sent, bytes = (uint64_t)(part * item), formula = bytes * (uint64_t)(n - 1);
    if (me == 0) { /* of the whole communicator */
        uint64_t together = point ? bytes : c.s == ALL_REDUCE ? 2 * formula : c.s == BROADCAST ? formula : (uint64_t)n * formula;
        __atomic_add_fetch(&case_formula[r->number & 1], together, __ATOMIC_SEQ_CST);
    }
    llmpar_status st = LLMPAR_OK;
    if (!point || sends || receives) st = invoke(comm, r->stream, point ? (sends ? SEND : RECV) : c.s, &call);
    if (st) return returned(r, st, "it");
    st = comm->device->synchronize(comm->device, r->stream);
    if (st) return returned(r, st, "synchronize");
    int fine = grade_check_places();
    if (fine && receives) fine = check_output(r, &c, "recv", recv, out);
    if (fine && sends && !(c.f == IN_PLACE && (c.s == ALL_REDUCE || c.s == ALL_GATHER || c.s == BROADCAST))) fine = check_input(r, &c, filled, in, own, c.f == IN_PLACE ? part : 0);
    if (fine && grade_memories[grade_me].live != live) grade_fail(GRADE_VALUE, "did not give back %lld bytes of device memory", (long long)(grade_memories[grade_me].live - live));
    if (fine && !r->patched) {
        uint64_t want = n == 1 && point ? 0 : point ? (sends ? bytes : 0) : c.s == ALL_REDUCE ? (uint64_t)(2 * ((double)(n - 1) / (double)n) * (double)bytes + 0.5) : c.s == BROADCAST && me != c.root ? 0 : formula;
        if (comm->bytes_sent - counted != want) grade_fail(GRADE_VALUE, "bytes_sent grew by %llu, the formula says %llu", (unsigned long long)(comm->bytes_sent - counted), (unsigned long long)want);
    }
    return end(r);
}

/* ---- the cases of a slot ---- */

static cell make(slot s, llmpar_dtype dtype, llmpar_reduce_op op, size_t count, size_t blocks, form f)
{
    cell c;
    memset(&c, 0, sizeof c);
    c.s = s;
    c.dtype = dtype;
    c.op = op;
    c.count = count;
    c.blocks = blocks;
    c.f = f;
    return c;
}

static int supported(slot s, llmpar_dtype dtype, llmpar_reduce_op op)
{
    if (!reduces(s)) return op == LLMPAR_SUM;
    return dtype == LLMPAR_F32 || dtype == LLMPAR_F64 || dtype == LLMPAR_I64 || (dtype == LLMPAR_U64 && op == LLMPAR_SUM);
}

/* The forms that a slot has. */
static llmpar_status forms(run *r, cell c, int *turn)
{
    llmpar_status st = LLMPAR_OK;
    int n = r->comm->ranks, last = c.s == ALL_GATHER || c.s == REDUCE_SCATTER || c.s == ALL_REDUCE ? IN_PLACE : c.s == BROADCAST ? ROOT_NULL : SEPARATE;
    for (int f = SEPARATE; f <= last && !st; f++) {
        if (f == IN_PLACE && c.blocks > 1 && (c.s == ALL_GATHER || c.s == REDUCE_SCATTER)) continue;
        c.f = (form)f;
        for (c.root = 0; c.root < (c.s == BROADCAST && c.count < 8 ? n : 1) && !st; c.root++) {
            c.placement = (*turn)++ & 1;
            st = one(r, c);
        }
    }
    return st;
}

static llmpar_status collective(run *r)
{
    static const size_t counts[] = { 0, 1, 2, 3, 5, 64, 129, 701 };
    slot s = r->p->s;
    llmpar_status st = LLMPAR_OK;
    int turn = 0, step = r->p->lockstep ? 1 : 3;
    for (int op = LLMPAR_SUM; op <= LLMPAR_MAX; op++) {
        for (int dtype = LLMPAR_F32; dtype < LLMPAR_DTYPE_COUNT && !st; dtype++)
            for (size_t blocks = 1; blocks <= 2 && !st && supported(s, (llmpar_dtype)dtype, (llmpar_reduce_op)op); blocks++) st = forms(r, make(s, (llmpar_dtype)dtype, (llmpar_reduce_op)op, 7, blocks, SEPARATE), &turn);
        for (size_t i = 0; i < sizeof counts / sizeof counts[0] && !st; i += (size_t)step)
            for (int dtype = LLMPAR_F32; dtype <= LLMPAR_I64 && !st; dtype += LLMPAR_I64 - LLMPAR_F32)
                for (size_t blocks = 1; blocks <= 3 && !st && supported(s, (llmpar_dtype)dtype, (llmpar_reduce_op)op); blocks += 2) st = forms(r, make(s, (llmpar_dtype)dtype, (llmpar_reduce_op)op, counts[i], blocks, SEPARATE), &turn);
    }
    return st;
}

/* Every ordered pair, every dtype; several messages to one rank arrive in order. */
static llmpar_status point_to_point(run *r)
{
    static const size_t counts[] = { 5, 0, 701, 1 };
    int n = r->comm->ranks, turn = 0;
    llmpar_status st = LLMPAR_OK;
    for (int from = 0; from < n; from++)
        for (int to = 0; to < n; to++)
            for (int k = 0; k < 4 && !st; k++) {
                if (from == to) continue;
                cell c = make(r->p->s, (llmpar_dtype)(LLMPAR_F32 + (from * 3 + to + k) % (LLMPAR_DTYPE_COUNT - 1)), LLMPAR_SUM, counts[k], (size_t)(1 + k % 2), SEPARATE);
                c.root = from;
                c.peer = to;
                c.placement = turn++ & 1;
                st = one(r, c);
            }
    return st;
}

static llmpar_status barriers(run *r)
{
    llmpar_status st = LLMPAR_OK;
    char what[80];
    for (int i = 0; i < 6 && !st; i++) {
        snprintf(what, sizeof what, "barrier, %d ranks", (int)r->comm->ranks);
        begin(r, what);
        grade_places_begin();
        int64_t world = r->ctx->world / r->comm->ranks, want = 0;
        if (r->ctx->rank == 0) __atomic_store_n(&grade->arrived, 0, __ATOMIC_SEQ_CST);
        st = llmpar_comm_barrier(r->ctx->comm, NULL, "conformance"); /* the library's own */
        if (st) return st;
        __atomic_add_fetch(&grade->arrived, 1, __ATOMIC_SEQ_CST);
        if ((st = llmpar_comm_barrier(r->comm, r->stream, "barrier"))) return returned(r, st, "it");
        int64_t got = __atomic_load_n(&grade->arrived, __ATOMIC_SEQ_CST);
        want = r->comm->ranks;
        if (world == 1 && got != want) grade_fail(GRADE_VALUE, "came through when %lld of %lld ranks had arrived", (long long)got, (long long)want);
        if (got < want) grade_fail(GRADE_VALUE, "came through when %lld of at least %lld ranks had arrived", (long long)got, (long long)want);
        st = end(r);
    }
    return st;
}

static llmpar_status splits(run *r)
{
    int n = r->comm->ranks, me = r->comm->rank;
    llmpar_status st = LLMPAR_OK;
    char what[80];
    for (int kind = 0; kind < 3 && !st; kind++) {
        static const char *const names[] = { "even and odd ranks", "all in reverse", "all but the first, equal keys" };
        llmpar_comm *part = NULL;
        int color[GRADE_RANKS], key[GRADE_RANKS], rank = 0, ranks = 0;
        uint64_t mine = (uint64_t)me, all[GRADE_RANKS] = { 0 };
        snprintf(what, sizeof what, "split into %s, %d ranks", names[kind], n);
        begin(r, what);
        grade_places_begin();
        for (int i = 0; i < n; i++) {
            color[i] = kind == 0 ? i % 2 : kind == 1 ? 0 : i ? 7 : -1;
            key[i] = kind == 1 ? -i : kind == 2 ? 5 : i;
        }
        if ((st = llmpar_comm_split(r->comm, color[me], key[me], "half", &part))) return returned(r, st, "it");
        if (color[me] < 0) {
            if (part) grade_fail(GRADE_VALUE, "a color below 0 must give NULL");
        } else if (!part) grade_fail(GRADE_VALUE, "gave NULL for color %d", color[me]);
        for (int i = 0; i < n && part; i++)
            if (color[i] == color[me]) ranks++, rank += key[i] < key[me] || (key[i] == key[me] && i < me);
        if (part && (part->rank != rank || part->ranks != ranks || !part->axis || strcmp(part->axis, "half")))
            grade_fail(GRADE_VALUE, "gave rank %d of %d on \"%s\", expected rank %d of %d on \"half\"", (int)part->rank, (int)part->ranks, part->axis ? part->axis : "(null)", rank, ranks);
        if ((st = end(r))) {
            llmpar_comm_destroy(part);
            return st;
        }
        if (part) {
            llmpar_collective call;
            memset(&call, 0, sizeof call);
            call.send = &mine;
            call.recv = all;
            call.count = 1;
            call.dtype = LLMPAR_U64;
            call.tag = "half";
            if ((st = llmpar_all_gather(part, r->stream, &call))) returned(r, st, "all_gather on the new communicator");
            for (int i = 0; i < n && !st; i++) {
                int place = 0;
                for (int j = 0; j < n; j++) place += color[j] == color[me] && (key[j] < key[i] || (key[j] == key[i] && j < i));
                if (color[i] == color[me] && all[place] != (uint64_t)i) grade_fail(GRADE_VALUE, "rank %d of the new communicator is old rank %llu, expected %d", place, (unsigned long long)all[place], i);
            }
            llmpar_comm_destroy(part);
        }
        if (!st) st = end(r);
    }
    return st;
}

/* Ends the launch with the planned error. */
static llmpar_status aborts(run *r)
{
    char what[80];
    int n = r->comm->ranks;
    if (n == 1 || r->ctx->world != n) return LLMPAR_OK;
    snprintf(what, sizeof what, "abort by the last rank, %d ranks", n);
    begin(r, what);
    grade_places_begin();
    if (r->comm->rank == n - 1) {
        llmpar_error planned;
        llmpar_error_clear(&planned);
        llmpar_error_set(&planned, LLMPAR_ERR_IO, "planned failure");
        planned.rank = r->ctx->rank;
        r->comm->abort(r->comm, &planned);
    }
    llmpar_status st = llmpar_comm_barrier(r->ctx->comm, NULL, "after abort"); /* any communicator of the job */
    if (st != LLMPAR_ERR_PEER) grade_fail(GRADE_VALUE, "the next collective returned \"%s\", expected \"%s\"", llmpar_status_string(st), llmpar_status_string(LLMPAR_ERR_PEER));
    else if (!strstr(llmpar_last_error(r->ctx), "planned failure")) grade_fail(GRADE_VALUE, "the next collective says \"%s\", without the text of the failure", llmpar_last_error(r->ctx));
    return LLMPAR_OK;
}

/* ---- launches ---- */

static llmpar_status rank_main(llmpar_ctx *ctx, void *user)
{
    run r;
    llmpar_mesh *mesh = NULL;
    llmpar_mesh_desc desc;
    memset(&desc, 0, sizeof desc);
    memset(&r, 0, sizeof r);
    r.p = (const pass *)user;
    r.ctx = ctx;
    r.number = __atomic_load_n(&grade->progress, __ATOMIC_SEQ_CST);
    grade_me = ctx->rank;
    self = &r;
    desc.dp_shard = r.p->rows;
    desc.tp = r.p->ranks;
    llmpar_status st = llmpar_mesh_create(ctx, &desc, &mesh);
    if (!st) {
        r.comm = mesh->comm[LLMPAR_AXIS_TP];
        snprintf(grade->rank[grade_me].who, sizeof grade->rank[grade_me].who, mesh->where[0] ? "rank %d (%s)" : "rank %d", (int)ctx->rank, mesh->where);
        watch(&r);
        st = ctx->device->stream_create(ctx->device, "conformance", &r.stream);
        grade_watch_memory(ctx->device);
        if (!st) st = end(&r); /* nobody begins a case before all know its number */
        switch (r.p->s) {
        case BARRIER: st = st ? st : barriers(&r); break;
        case SPLIT: st = st ? st : splits(&r); break;
        case ABORT: st = st ? st : aborts(&r); break;
        case SEND: case RECV: st = st ? st : point_to_point(&r); break;
        default: st = st ? st : collective(&r); break;
        }
        grade_unwatch_memory(ctx->device);
        if (r.stream) ctx->device->stream_destroy(ctx->device, r.stream);
        unwatch(&r);
    }
    llmpar_mesh_destroy(mesh);
    self = NULL;
    return st;
}

static void quiet(void *user, int rank, llmpar_log_level level, const char *line) { (void)user; (void)rank; (void)level; (void)line; }

static int bytes_only_reported;

static void try_slot(void *arg)
{
    static const struct { int rows, ranks, lockstep; } launches[] = { { 1, 1, 1 }, { 1, 2, 1 }, { 1, 3, 1 }, { 1, 4, 1 }, { 1, 5, 1 }, { 1, 6, 1 }, { 1, 7, 1 }, { 1, 8, 1 }, { 2, 3, 1 }, { 1, 3, 0 }, { 1, 4, 0 }, { 2, 2, 0 } };
    for (size_t i = 0; i < sizeof launches / sizeof launches[0] && !grade->stop; i++) {
        pass p;
        llmpar_launch_desc desc;
        llmpar_error error;
        memset(&desc, 0, sizeof desc);
        p.s = *(const slot *)arg;
        p.rows = launches[i].rows;
        p.ranks = launches[i].ranks;
        p.lockstep = launches[i].lockstep;
        desc.ranks = p.rows * p.ranks;
        desc.lockstep = p.lockstep;
        desc.deadline = p.lockstep ? 0 : 30;
        desc.log = quiet;
        llmpar_status st = llmpar_launch(&desc, rank_main, &p, &error);
        if (st && !(p.s == ABORT && strstr(error.text, "planned failure"))) {
            grade_me = error.rank >= 0 && error.rank < GRADE_RANKS ? error.rank : 0;
            if (!grade->stop) grade_fail(GRADE_STATUS, "%s", error.text);
        }
    }
    /* the books of the last case */
    uint64_t sent = case_sent[grade->progress & 1], formula = case_formula[grade->progress & 1];
    grade->sent += (double)sent;
    grade->formula += (double)formula;
    if (!grade->stop && grade->patched && grade->worst_ratio > 1.0000001 && !bytes_only_reported) {
        grade->what[0] = grade->rank[0].who[0] = 0;
        grade_me = 0;
        grade_fail(GRADE_VALUE, "sends too much: %s", grade->worst);
    }
}

int main(int argc, char **argv)
{
    int passed = 0, failed = 0, patched = 0;
    const char *file = argc > 1 ? argv[1] : "grade_patch";
    const char *only = getenv("SLOT");
    for (int i = 2; i < argc; i++) bytes_only_reported |= !strcmp(argv[i], "report");
    grade_open();
    printf("communicator table with %s, on 1 to 8 ranks and 2 x 3\n", file);
    printf("%-18s %-8s %6s   bytes sent by all ranks / formula\n", "slot", "", "cases");
    for (int s = 0; s < SLOTS; s++) {
        slot which = (slot)s;
        if (only && only[0] && strcmp(only, slot_names[s])) continue;
        char text[1600] = "";
        int fine = grade_run(try_slot, &which, text, sizeof text);
        passed += fine;
        failed += !fine;
        patched += grade->patched;
        printf("%-14s %s %-8s %6llu", slot_names[s], grade->patched ? "(*)" : "   ", fine ? "passed" : "FAILED", (unsigned long long)grade->cases);
        if (fine && grade->patched && s >= ALL_GATHER && s <= RECV) printf("   %.0f / %.0f = %.3f", grade->sent, grade->formula, grade->formula > 0 ? grade->sent / grade->formula : 0);
        if (!fine) printf("\n    %s: %s", slot_names[s], text);
        if (fine && grade->patched && grade->worst_ratio > 1.0000001) printf("\n    most above the formula: %s", grade->worst);
        putchar('\n');
    }
    if (!(passed + failed)) { printf("there is no slot \"%s\"\n", only); failed = 1; }
    else printf("(*) replaced by %s: %d of %d slots\n", file, patched, passed + failed);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
