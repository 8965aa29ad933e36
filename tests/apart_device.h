/* apart_device: a device whose memory the host cannot touch, over another device (the CPU's, or the debug device over it), and the communicator for it: what a GPU is to the code above the tables, without a GPU.

     addresses handed out    | PROT_NONE ............................ |   whoever reads or writes them on the host gets a SIGSEGV
                                      | + APART_SPAN
     the bytes               | read and write, page by page as asked  |   where operations, copies and collectives go: every slot translates its pointers

   A host pointer in an argument of an operation or a collective is an error that names slot and argument; only copy takes one. Freed memory is inaccessible for good, so late uses are found too.
   host_alloc counts; copies between the device and host memory that is not from there are counted as `unpinned`: on a GPU these do not run beside other work. */
#ifndef APART_DEVICE_H
#define APART_DEVICE_H

#include "llmpar.h"
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef APART_SPAN
#define APART_SPAN ((size_t)1 << 36) /* addresses, not memory */
#endif
enum { APART_PINNED = 4096 };

typedef struct apart_device {
    llmpar_device table;
    llmpar_device *inner;
    char *base;                    /* of the addresses; the bytes are at + APART_SPAN */
    size_t used, page;
    uint64_t live;                 /* bytes */
    /* atomic, as streams' threads copy too */
    uint64_t copies, unpinned;     /* between host and device; of these from or to memory that is not host_alloc's */
    uint64_t host_live, host_calls; /* bytes of host_alloc there now; calls */
    char *pinned[APART_PINNED];    /* what there is of host_alloc; written by the rank's thread */
    size_t pinned_bytes[APART_PINNED];
} apart_device;

#define APART_OF(device) ((apart_device *)(void *)(device))

static inline int apart_mine(const apart_device *d, const void *p) { return (const char *)p >= d->base && (const char *)p < d->base + APART_SPAN; }

/* The bytes behind a pointer of the device; NULL for NULL. *status takes the error of another one. */
static inline void *apart_at(apart_device *d, const void *p, const char *slot, const char *argument, llmpar_status *status)
{
    if (!p) return NULL;
    if (apart_mine(d, p)) return (char *)(uintptr_t)p + APART_SPAN;
    if (!*status) *status = llmpar_error_set(llmpar_device_thread_error(&d->table, d->table.error), LLMPAR_ERR_ARGUMENT, "apart device: %s: %s is not this device's memory", slot, argument);
    return NULL;
}

/* ---- memory ---- */

static inline llmpar_status apart_alloc(llmpar_device *device, size_t bytes, void **out)
{
    apart_device *d = APART_OF(device);
    size_t whole = (bytes + d->page - 1) / d->page * d->page;
    *out = NULL;
    if (!bytes) return LLMPAR_OK;
    if (whole > APART_SPAN || d->used + whole + d->page > APART_SPAN) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "apart device: %lu bytes, and its addresses are used up", (unsigned long)bytes);
    char *at = d->base + d->used;
    if (mprotect(at + APART_SPAN, whole, PROT_READ | PROT_WRITE)) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "apart device: no %lu bytes", (unsigned long)bytes);
    memset(at + APART_SPAN, 0xff, whole); /* NaNs */
    d->used += whole + d->page;
    d->live += bytes;
    *out = at;
    return LLMPAR_OK;
}
static inline void apart_free(llmpar_device *device, void *memory, size_t bytes)
{
    apart_device *d = APART_OF(device);
    if (!memory) return;
    size_t whole = (bytes + d->page - 1) / d->page * d->page;
    d->live -= bytes;
    if (mmap((char *)memory + APART_SPAN, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED) abort();
}
static inline int apart_is_pinned(const apart_device *d, const void *p)
{
    for (int i = 0; i < APART_PINNED; i++) {
        const char *at = __atomic_load_n(&d->pinned[i], __ATOMIC_ACQUIRE);
        if (at && (const char *)p >= at && (const char *)p < at + d->pinned_bytes[i]) return 1;
    }
    return 0;
}
static inline llmpar_status apart_host_alloc(llmpar_device *device, size_t bytes, void **out)
{
    apart_device *d = APART_OF(device);
    *out = NULL;
    if (!bytes) return LLMPAR_OK;
    for (int i = 0; i < APART_PINNED; i++)
        if (!d->pinned[i]) {
            void *memory = NULL;
            if (posix_memalign(&memory, 64, bytes)) break;
            memset(memory, 0xff, bytes);
            d->pinned_bytes[i] = bytes;
            __atomic_store_n(&d->pinned[i], (char *)memory, __ATOMIC_RELEASE);
            d->host_live += bytes;
            d->host_calls++;
            *out = memory;
            return LLMPAR_OK;
        }
    return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "apart device: no %lu bytes of host memory", (unsigned long)bytes);
}
static inline void apart_host_free(llmpar_device *device, void *memory, size_t bytes)
{
    apart_device *d = APART_OF(device);
    if (!memory) return;
    for (int i = 0; i < APART_PINNED; i++)
        if (d->pinned[i] == (char *)memory && d->pinned_bytes[i] == bytes) {
            __atomic_store_n(&d->pinned[i], (char *)NULL, __ATOMIC_RELEASE);
            d->host_live -= bytes;
            free(memory);
            return;
        }
    abort(); /* not host_alloc's, or of another size */
}

static inline llmpar_status apart_copy(llmpar_device *device, llmpar_stream *stream, void *out, const void *in, size_t bytes)
{
    apart_device *d = APART_OF(device);
    int to = apart_mine(d, out), from = apart_mine(d, in);
    const void *host = to && !from ? in : from && !to ? out : NULL;
    if (bytes && host) {
        __atomic_add_fetch(&d->copies, 1, __ATOMIC_RELAXED);
        if (!apart_is_pinned(d, host)) __atomic_add_fetch(&d->unpinned, 1, __ATOMIC_RELAXED);
    }
    return d->inner->copy(d->inner, stream, to ? (char *)out + APART_SPAN : out, from ? (const char *)in + APART_SPAN : in, bytes);
}
static inline llmpar_status apart_zero(llmpar_device *device, llmpar_stream *stream, void *out, size_t bytes)
{
    llmpar_status status = LLMPAR_OK;
    out = bytes ? apart_at(APART_OF(device), out, "zero", "out", &status) : NULL;
    return status ? status : APART_OF(device)->inner->zero(APART_OF(device)->inner, stream, out, bytes);
}

/* ---- streams and events: the inner device's ---- */

static inline llmpar_status apart_stream_create(llmpar_device *device, const char *name, llmpar_stream **out) { return APART_OF(device)->inner->stream_create(APART_OF(device)->inner, name, out); }
static inline void apart_stream_destroy(llmpar_device *device, llmpar_stream *stream) { APART_OF(device)->inner->stream_destroy(APART_OF(device)->inner, stream); }
static inline llmpar_status apart_synchronize(llmpar_device *device, llmpar_stream *stream) { return APART_OF(device)->inner->synchronize(APART_OF(device)->inner, stream); }
static inline llmpar_status apart_event_create(llmpar_device *device, llmpar_event **out) { return APART_OF(device)->inner->event_create(APART_OF(device)->inner, out); }
static inline void apart_event_destroy(llmpar_device *device, llmpar_event *event) { APART_OF(device)->inner->event_destroy(APART_OF(device)->inner, event); }
static inline llmpar_status apart_event_record(llmpar_device *device, llmpar_stream *stream, llmpar_event *event) { return APART_OF(device)->inner->event_record(APART_OF(device)->inner, stream, event); }
static inline llmpar_status apart_event_wait(llmpar_device *device, llmpar_stream *stream, llmpar_event *event) { return APART_OF(device)->inner->event_wait(APART_OF(device)->inner, stream, event); }
static inline llmpar_status apart_event_synchronize(llmpar_device *device, llmpar_event *event) { return APART_OF(device)->inner->event_synchronize(APART_OF(device)->inner, event); }
static inline llmpar_status apart_host_call(llmpar_device *device, llmpar_stream *stream, llmpar_status (*fn)(void *arg), const void *arg, size_t bytes)
{
    return APART_OF(device)->inner->host_call(APART_OF(device)->inner, stream, fn, arg, bytes);
}
static inline llmpar_status apart_stream_thread(llmpar_device *device, llmpar_stream *stream) { return APART_OF(device)->inner->stream_thread(APART_OF(device)->inner, stream); }
static inline llmpar_error *apart_thread_error(llmpar_device *device) { return APART_OF(device)->inner->thread_error(APART_OF(device)->inner); }
static inline int32_t apart_threads_running(llmpar_device *device) { return APART_OF(device)->inner->threads_running(APART_OF(device)->inner); }

/* ---- operations ---- */

/* A slot whose argument struct has the pointers that P lists: P(x) for each field x. */
#define APART_OPERATION(slot, type, POINTERS) \
    static inline llmpar_status apart_##slot(llmpar_device *device, llmpar_stream *stream, const type *given) \
    { \
        apart_device *d = APART_OF(device); \
        llmpar_status status = LLMPAR_OK; \
        type args = *given; \
        const char *apart_slot = #slot; \
        POINTERS \
        return status ? status : d->inner->slot(d->inner, stream, &args); \
    }
#define P(field) args.field = (__typeof__(args.field))apart_at(d, args.field, apart_slot, #field, &status);
#define APART_OPERATIONS(X) \
    X(rmsnorm, llmpar_rmsnorm_args, P(x) P(residual) P(w) P(sum) P(y) P(rstd)) \
    X(rmsnorm_backward, llmpar_rmsnorm_backward_args, P(dy) P(x) P(w) P(rstd) P(dresidual) P(dx) P(dw_leaves)) \
    X(rope, llmpar_rope_args, P(x) P(cosine) P(sine)) \
    X(attention, llmpar_attention_args, P(q) P(k) P(v) P(doc_start) P(out) P(lse) P(workspace)) \
    X(attention_backward, llmpar_attention_backward_args, P(forward.q) P(forward.k) P(forward.v) P(forward.doc_start) P(forward.out) P(forward.lse) P(forward.workspace) P(dout) P(dq) P(dk) P(dv)) \
    X(swiglu, llmpar_swiglu_args, P(gate) P(up) P(h)) \
    X(swiglu_backward, llmpar_swiglu_backward_args, P(gate) P(up) P(dh) P(dgate) P(dup) P(h)) \
    X(embedding, llmpar_embedding_args, P(ids) P(table) P(out)) \
    X(embedding_backward, llmpar_embedding_backward_args, P(ids) P(dout) P(dtable) P(workspace)) \
    X(xent_max, llmpar_xent_args, P(logits) P(targets) P(max) P(target_logit) P(sum)) \
    X(xent_sum, llmpar_xent_args, P(logits) P(targets) P(max) P(target_logit) P(sum)) \
    X(xent_loss, llmpar_xent_loss_args, P(max) P(target_logit) P(sum) P(targets) P(accumulator) P(token_loss)) \
    X(xent_backward, llmpar_xent_backward_args, P(forward.logits) P(forward.targets) P(forward.max) P(forward.target_logit) P(forward.sum)) \
    X(add, llmpar_add_args, P(a) P(b) P(out)) \
    X(scale, llmpar_scale_args, P(x)) \
    X(cast, llmpar_cast_args, P(in) P(out)) \
    X(copy_rows, llmpar_copy_rows_args, P(in) P(out)) \
    X(adamw, llmpar_adamw_args, P(p) P(g) P(m) P(v)) \
    X(square_sum, llmpar_square_sum_args, P(x) P(accumulator)) \
    X(sgd, llmpar_sgd_args, P(p) P(g) P(m)) \
    X(largest, llmpar_largest_args, P(x) P(largest)) \
    X(factor_sum, llmpar_factor_sum_args, P(g) P(row_sums) P(col_sums) P(largest)) \
    X(factor_moment, llmpar_factor_moment_args, P(sums) P(largest) P(moment) P(factor)) \
    X(adalomo_square, llmpar_adalomo_args, P(p) P(g) P(row_factor) P(col_factor) P(moment) P(update_squares) P(param_squares)) \
    X(adalomo, llmpar_adalomo_args, P(p) P(g) P(row_factor) P(col_factor) P(moment) P(update_squares) P(param_squares))
APART_OPERATIONS(APART_OPERATION)
#undef P

enum { APART_LIST = 64 };
static inline llmpar_status apart_gemm(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *given)
{
    apart_device *d = APART_OF(device);
    llmpar_status status = LLMPAR_OK;
    llmpar_gemm_args args = *given;
    llmpar_gemm_segment few[APART_LIST], *segment = few;
    if (args.segment_count > APART_LIST) segment = (llmpar_gemm_segment *)malloc((size_t)args.segment_count * sizeof *segment);
    if (!segment) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "apart device: out of memory");
    for (int32_t i = 0; i < args.segment_count; i++) {
        segment[i] = given->segments[i];
        segment[i].a = apart_at(d, segment[i].a, "gemm", "a", &status);
        segment[i].b = apart_at(d, segment[i].b, "gemm", "b", &status);
    }
    args.segments = segment;
    args.c = apart_at(d, args.c, "gemm", "c", &status);
    args.workspace = apart_at(d, args.workspace, "gemm", "workspace", &status);
    if (!status) status = d->inner->gemm(d->inner, stream, &args);
    if (segment != few) free(segment);
    return status;
}

static inline llmpar_status apart_list(apart_device *d, const char *slot, const char *argument, const void *const *given, int32_t n, const void **out, llmpar_status *status)
{
    if (n > APART_LIST) return llmpar_error_set(d->table.error, LLMPAR_ERR_UNSUPPORTED, "apart device: %s of %d", slot, (int)n);
    for (int32_t i = 0; i < n; i++) out[i] = apart_at(d, given[i], slot, argument, status);
    return *status;
}
#define APART_TREE(slot) \
    static inline llmpar_status apart_##slot(llmpar_device *device, llmpar_stream *stream, const llmpar_tree_sum_args *given) \
    { \
        apart_device *d = APART_OF(device); \
        llmpar_status status = LLMPAR_OK; \
        llmpar_tree_sum_args args = *given; \
        const void *in[APART_LIST]; \
        if (apart_list(d, #slot, "in", given->in, given->n, in, &status)) return status; \
        args.in = in; \
        args.out = apart_at(d, args.out, #slot, "out", &status); \
        return status ? status : d->inner->slot(d->inner, stream, &args); \
    }
APART_TREE(tree_sum)
APART_TREE(max)
static inline llmpar_status apart_tree_sum_to(llmpar_device *device, const llmpar_tree_sum_to_args *given)
{
    apart_device *d = APART_OF(device);
    llmpar_status status = LLMPAR_OK;
    llmpar_tree_sum_to_args args = *given;
    const void *in[APART_LIST], *out[APART_LIST];
    if (apart_list(d, "tree_sum_to", "in", given->in, given->n, in, &status)) return status;
    if (apart_list(d, "tree_sum_to", "out", (const void *const *)given->out, given->outs, out, &status)) return status;
    args.in = in;
    args.out = (void *const *)(uintptr_t)out;
    return llmpar_device_tree_sum_to(d->inner, &args);
}

#define APART_WORKSPACE(slot, type) static inline size_t apart_##slot(llmpar_device *device, const type *args) { return APART_OF(device)->inner->slot(APART_OF(device)->inner, args); }
APART_WORKSPACE(gemm_workspace, llmpar_gemm_args)
APART_WORKSPACE(attention_workspace, llmpar_attention_args)
APART_WORKSPACE(attention_backward_workspace, llmpar_attention_backward_args)
APART_WORKSPACE(embedding_backward_workspace, llmpar_embedding_backward_args)

/* ---- making one ---- */

static inline llmpar_status apart_init(apart_device *d, llmpar_device *inner)
{
    memset(d, 0, sizeof *d);
    void *base = mmap(NULL, 2 * APART_SPAN, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) return llmpar_error_set(inner->error, LLMPAR_ERR_MEMORY, "apart device: no addresses");
    d->base = (char *)base;
    d->page = (size_t)sysconf(_SC_PAGESIZE);
    d->inner = inner;
    llmpar_device *t = &d->table;
    t->abi = LLMPAR_DEVICE_ABI;
    t->size = (uint32_t)sizeof *t;
    t->name = "apart";
    t->error = inner->error;
    t->alignment = inner->alignment;
    t->apart = 1;
#define APART_FILL(slot, type, ...) t->slot = apart_##slot;
    APART_OPERATIONS(APART_FILL)
    APART_FILL(alloc, ) APART_FILL(free, ) APART_FILL(copy, ) APART_FILL(zero, ) APART_FILL(stream_create, ) APART_FILL(stream_destroy, ) APART_FILL(synchronize, ) APART_FILL(event_create, )
    APART_FILL(event_destroy, ) APART_FILL(event_record, ) APART_FILL(event_wait, ) APART_FILL(event_synchronize, ) APART_FILL(host_call, ) APART_FILL(gemm, ) APART_FILL(tree_sum, ) APART_FILL(max, )
    APART_FILL(tree_sum_to, ) APART_FILL(gemm_workspace, ) APART_FILL(attention_workspace, ) APART_FILL(attention_backward_workspace, ) APART_FILL(embedding_backward_workspace, )
    APART_FILL(host_alloc, ) APART_FILL(host_free, )
    if (inner->stream_thread) { APART_FILL(stream_thread, ) }
    if (inner->thread_error) { APART_FILL(thread_error, ) }
    if (inner->threads_running) { APART_FILL(threads_running, ) }
#undef APART_FILL
    return LLMPAR_OK;
}
static inline void apart_end(apart_device *d)
{
    if (d->base) munmap(d->base, 2 * APART_SPAN);
    d->base = NULL;
}

/* ---- its communicator: another one, on the inner device, with the bytes' addresses ---- */

typedef struct apart_comm {
    llmpar_comm table;
    llmpar_comm *inner;
    llmpar_heap *heap;
} apart_comm;

static inline llmpar_status apart_comm_wrap(llmpar_heap *heap, llmpar_device *device, llmpar_comm *inner, llmpar_comm **out);

typedef llmpar_status (*apart_collective)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
static inline llmpar_status apart_call(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *given, const char *slot, apart_collective run)
{
    llmpar_status status = LLMPAR_OK;
    llmpar_collective call = *given;
    call.send = apart_at(APART_OF(comm->device), call.send, slot, "send", &status);
    call.recv = apart_at(APART_OF(comm->device), call.recv, slot, "recv", &status);
    if (status) return status;
    return run(((apart_comm *)comm->state)->inner, stream, &call);
}
#define APART_COLLECTIVE(slot, run) \
    static inline llmpar_status apart_comm_##slot(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return apart_call(comm, stream, call, #slot, run); }
APART_COLLECTIVE(all_gather, llmpar_all_gather)
APART_COLLECTIVE(reduce_scatter, llmpar_reduce_scatter)
APART_COLLECTIVE(all_reduce, llmpar_all_reduce)
APART_COLLECTIVE(broadcast, llmpar_broadcast)
APART_COLLECTIVE(all_to_all, llmpar_all_to_all)
APART_COLLECTIVE(send, llmpar_send)
APART_COLLECTIVE(recv, llmpar_recv)
static inline llmpar_status apart_comm_barrier(llmpar_comm *comm, llmpar_stream *stream, const char *tag) { return llmpar_comm_barrier(((apart_comm *)comm->state)->inner, stream, tag); }
static inline void apart_comm_abort(llmpar_comm *comm, const llmpar_error *error) { ((apart_comm *)comm->state)->inner->abort(((apart_comm *)comm->state)->inner, error); }
static inline void apart_comm_destroy(llmpar_comm *comm)
{
    apart_comm *c = (apart_comm *)comm->state;
    llmpar_comm_destroy(c->inner);
    llmpar_heap_free(c->heap, c);
}
static inline llmpar_status apart_comm_split(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out)
{
    apart_comm *c = (apart_comm *)comm->state;
    llmpar_comm *inner = NULL;
    llmpar_status status = llmpar_comm_split(c->inner, color, key, name, &inner);
    if (status || !inner) return status;
    return apart_comm_wrap(c->heap, comm->device, inner, out);
}
/* Takes inner, which is on the device's inner device, over. */
static inline llmpar_status apart_comm_wrap(llmpar_heap *heap, llmpar_device *device, llmpar_comm *inner, llmpar_comm **out)
{
    apart_comm *c = (apart_comm *)llmpar_heap_zalloc(heap, 1, sizeof *c);
    if (!c) {
        llmpar_comm_destroy(inner);
        return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "apart device: out of memory");
    }
    c->inner = inner;
    c->heap = heap;
    c->table.abi = LLMPAR_COMM_ABI;
    c->table.size = (uint32_t)sizeof c->table;
    c->table.rank = inner->rank;
    c->table.ranks = inner->ranks;
    c->table.axis = inner->axis;
    c->table.device = device;
    c->table.error = inner->error;
    c->table.state = c;
    c->table.unchecked = inner->unchecked;
    c->table.one_thread = inner->one_thread;
#define APART_FILL(slot) c->table.slot = apart_comm_##slot;
    APART_FILL(split) APART_FILL(destroy) APART_FILL(barrier) APART_FILL(all_gather) APART_FILL(reduce_scatter) APART_FILL(all_reduce) APART_FILL(broadcast) APART_FILL(all_to_all) APART_FILL(send) APART_FILL(recv)
    APART_FILL(abort)
#undef APART_FILL
    *out = &c->table;
    return LLMPAR_OK;
}

/* ---- as a backend of llmpar_launch ---- */

/* Of all ranks, once launch has returned. inner: makes what lies between the CPU and the apart device; NULL: nothing does. */
typedef struct apart_report {
    uint64_t leaked, host_leaked, host_calls, copies, unpinned;
    llmpar_device *(*inner)(llmpar_device *host);
    void (*inner_end)(llmpar_device *inner);
} apart_report;

static inline llmpar_status apart_backend_device(const void *user, llmpar_ctx *ctx, llmpar_device **out)
{
    const apart_report *r = (const apart_report *)user;
    apart_device *d = (apart_device *)malloc(sizeof *d);
    llmpar_device *inner = d && r->inner ? r->inner(ctx->host) : ctx->host;
    if (!d || !inner) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "apart device: out of memory");
    llmpar_status status = apart_init(d, inner);
    if (status) free(d);
    else *out = &d->table;
    return status;
}
static inline void apart_backend_end(const void *user, llmpar_device *device)
{
    apart_report *r = (apart_report *)(uintptr_t)user;
    apart_device *d = APART_OF(device);
    if (!d) return;
    __atomic_add_fetch(&r->leaked, d->live, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&r->host_leaked, d->host_live, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&r->host_calls, d->host_calls, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&r->copies, d->copies, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&r->unpinned, d->unpinned, __ATOMIC_SEQ_CST);
    apart_end(d);
    if (r->inner_end) r->inner_end(d->inner);
    free(d);
}
static inline llmpar_status apart_backend_comm(const void *user, llmpar_ctx *ctx, llmpar_device *device, llmpar_comm **out)
{
    llmpar_comm *inner = NULL;
    (void)user;
    llmpar_status status = llmpar_comm_split(ctx->host_comm, 0, ctx->rank, "world", &inner);
    if (status) return status;
    inner->device = APART_OF(device)->inner;
    return apart_comm_wrap(&ctx->heap, device, inner, out);
}
static inline void apart_backend(apart_report *report, llmpar_backend *out)
{
    memset(out, 0, sizeof *out);
    out->abi = LLMPAR_BACKEND_ABI;
    out->size = (uint32_t)sizeof *out;
    out->name = "apart";
    out->device_user = out->comm_user = report;
    out->device_create = apart_backend_device;
    out->device_destroy = apart_backend_end;
    out->comm_create = apart_backend_comm;
}

#endif
