/* debug_device: a device that does nothing until somebody waits. It wraps the table of another device (the CPU's), keeps every operation with copies of its argument struct and
   of the arrays that this points to, and executes them in synchronize and event_synchronize. What relies on an operation being complete when its call returns breaks here.

     DEBUG_FIFO     all streams in one queue, executed in the order of the calls
     DEBUG_LAZY     only what the waited-for stream needs: its own queue, and other streams as far as its event waits say. What misses a wait runs too early
     DEBUG_OTHERS   all other streams first (the last made first), as far as their event waits allow, then the waited-for stream. What misses a wait runs too late

   New memory is filled with NaNs. In all orders every rank runs its collectives in the same order, as long as all ranks make the same calls. */
#ifndef DEBUG_DEVICE_H
#define DEBUG_DEVICE_H

#include "llmpar.h"
#include <stdlib.h>
#include <string.h>

typedef enum debug_order { DEBUG_FIFO, DEBUG_LAZY, DEBUG_OTHERS } debug_order;
enum { DEBUG_STREAMS = 32 };

struct debug_node;
typedef struct debug_stream {
    llmpar_stream *inner;
    struct debug_stream *queue;       /* where this stream's operations wait: itself, or in FIFO the device's one queue */
    struct debug_node *head, *tail;
    llmpar_status status;             /* sticks */
} debug_stream;

typedef struct debug_event {
    debug_stream *stream;             /* of the last record; NULL: never recorded */
    uint64_t recorded, done;          /* serial numbers of records */
    llmpar_status status;             /* of the stream when the record was executed */
} debug_event;

typedef struct debug_device {
    llmpar_device table;
    llmpar_device *inner;
    debug_order order;
    debug_stream shared;              /* FIFO's queue */
    debug_stream *stream[DEBUG_STREAMS];
    int streams;
    int executing;                    /* inside an operation: a communicator's own calls go straight through */
    uint64_t executed, pending, most_pending;
    uint64_t early_free;              /* memory or streams given back while operations were waiting on a device that had not failed */
    int failed;
} debug_device;

typedef llmpar_status (*debug_run)(debug_device *d, debug_stream *s, void *args);
typedef struct debug_node {
    struct debug_node *next;
    debug_stream *stream;
    debug_run run;
    void *args;                       /* behind the node; the arrays behind it */
} debug_node;

/* ---- queues ---- */

static inline llmpar_status debug_step(debug_device *d, debug_stream *queue)
{
    debug_node *node = queue->head;
    debug_stream *stream = node->stream;
    queue->head = node->next;
    if (!queue->head) queue->tail = NULL;
    d->pending--;
    if (!stream->status) {
        int nested = d->executing;
        d->executing = 1;
        stream->status = node->run(d, stream, node->args);
        d->executing = nested;
        d->executed++;
        if (stream->status) d->failed = 1;
    }
    free(node);
    return stream->status;
}

static inline void debug_drain(debug_device *d, debug_stream *queue)
{
    while (queue->head) debug_step(d, queue);
}

static inline void debug_until(debug_device *d, debug_event *event, uint64_t serial)
{
    while (event->done < serial && event->stream && event->stream->queue->head) debug_step(d, event->stream->queue);
}

static inline void debug_others(debug_device *d, const debug_stream *queue)
{
    if (d->order != DEBUG_OTHERS) return;
    for (int i = d->streams; i-- > 0;)
        if (d->stream[i] && d->stream[i] != queue) debug_drain(d, d->stream[i]);
}

static inline llmpar_status debug_enqueue(debug_device *d, debug_stream *stream, debug_run run, const void *args, size_t bytes, const void *array, size_t array_bytes, void **array_out)
{
    size_t head = (sizeof(debug_node) + 15) / 16 * 16, body = (bytes + 15) / 16 * 16;
    if (stream->status) return stream->status;
    debug_node *node = (debug_node *)malloc(head + body + array_bytes);
    if (!node) return llmpar_error_set(d->table.error, LLMPAR_ERR_MEMORY, "debug device: out of memory");
    node->next = NULL;
    node->stream = stream;
    node->run = run;
    node->args = (char *)node + head;
    if (bytes) memcpy(node->args, args, bytes);
    if (array_bytes) memcpy((char *)node->args + body, array, array_bytes);
    if (array_out) *array_out = (char *)node->args + body;
    debug_stream *queue = stream->queue;
    if (queue->tail) queue->tail->next = node;
    else queue->head = node;
    queue->tail = node;
    if (++d->pending > d->most_pending) d->most_pending = d->pending;
    return LLMPAR_OK;
}

#define DEBUG_OF(device) ((debug_device *)(void *)(device))
#define DEBUG_STREAM(s) ((debug_stream *)(void *)(s))
#define DEBUG_EVENT(e) ((debug_event *)(void *)(e))
/* An operation of a communicator that is being executed carries an inner stream or none. */
#define DEBUG_THROUGH(device, stream) (DEBUG_OF(device)->executing || !(stream))

/* ---- memory ---- */

static inline llmpar_status debug_alloc(llmpar_device *device, size_t bytes, void **out)
{
    llmpar_device *inner = DEBUG_OF(device)->inner;
    llmpar_status status = inner->alloc(inner, bytes, out);
    if (!status && bytes) memset(*out, 0xff, bytes);
    return status;
}

static inline void debug_free(llmpar_device *device, void *memory, size_t bytes)
{
    debug_device *d = DEBUG_OF(device);
    if (memory && d->pending && !d->executing) {
        d->early_free += !d->failed;
        debug_drain(d, &d->shared);
        for (int i = 0; i < d->streams; i++)
            if (d->stream[i]) debug_drain(d, d->stream[i]);
    }
    d->inner->free(d->inner, memory, bytes);
}

typedef struct debug_copy_args { void *out; const void *in; size_t bytes; } debug_copy_args;
static inline llmpar_status debug_run_copy(debug_device *d, debug_stream *s, void *args)
{
    debug_copy_args *a = (debug_copy_args *)args;
    return a->in ? d->inner->copy(d->inner, s->inner, a->out, a->in, a->bytes) : d->inner->zero(d->inner, s->inner, a->out, a->bytes);
}
static inline llmpar_status debug_copy(llmpar_device *device, llmpar_stream *stream, void *out, const void *in, size_t bytes)
{
    debug_device *d = DEBUG_OF(device);
    debug_copy_args args = {out, in, bytes};
    if (DEBUG_THROUGH(device, stream)) return d->inner->copy(d->inner, stream, out, in, bytes);
    return bytes ? debug_enqueue(d, DEBUG_STREAM(stream), debug_run_copy, &args, sizeof args, NULL, 0, NULL) : LLMPAR_OK;
}
static inline llmpar_status debug_zero(llmpar_device *device, llmpar_stream *stream, void *out, size_t bytes)
{
    debug_device *d = DEBUG_OF(device);
    debug_copy_args args = {out, NULL, bytes};
    if (DEBUG_THROUGH(device, stream)) return d->inner->zero(d->inner, stream, out, bytes);
    return debug_enqueue(d, DEBUG_STREAM(stream), debug_run_copy, &args, sizeof args, NULL, 0, NULL);
}

/* ---- streams and events ---- */

static inline llmpar_status debug_stream_create(llmpar_device *device, const char *name, llmpar_stream **out)
{
    debug_device *d = DEBUG_OF(device);
    llmpar_stream *inner = NULL;
    int at = 0;
    *out = NULL;
    while (at < d->streams && d->stream[at]) at++;
    if (at == DEBUG_STREAMS) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "debug device: more than %d streams", DEBUG_STREAMS);
    llmpar_status status = d->inner->stream_create(d->inner, name, &inner);
    if (status) return status;
    debug_stream *stream = (debug_stream *)calloc(1, sizeof *stream);
    if (!stream) {
        d->inner->stream_destroy(d->inner, inner);
        return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "debug device: out of memory");
    }
    stream->inner = inner;
    stream->queue = d->order == DEBUG_FIFO ? &d->shared : stream;
    d->stream[at] = stream;
    if (at == d->streams) d->streams++;
    *out = (llmpar_stream *)(void *)stream;
    return LLMPAR_OK;
}

static inline void debug_stream_destroy(llmpar_device *device, llmpar_stream *handle)
{
    debug_device *d = DEBUG_OF(device);
    debug_stream *stream = DEBUG_STREAM(handle);
    if (!stream) return;
    if (stream->queue->head && !d->failed) d->early_free++; /* work was never waited for */
    if (d->order != DEBUG_FIFO)
        while (stream->head) { debug_node *node = stream->head; stream->head = node->next; free(node); d->pending--; }
    else if (d->shared.head) /* what is left may name this stream */
        while (d->shared.head) { debug_node *node = d->shared.head; d->shared.head = node->next; if (!node->next) d->shared.tail = NULL; free(node); d->pending--; }
    for (int i = 0; i < d->streams; i++)
        if (d->stream[i] == stream) d->stream[i] = NULL;
    d->inner->stream_destroy(d->inner, stream->inner);
    free(stream);
}

static inline llmpar_status debug_synchronize(llmpar_device *device, llmpar_stream *stream)
{
    debug_device *d = DEBUG_OF(device);
    if (DEBUG_THROUGH(device, stream)) return d->inner->synchronize(d->inner, stream);
    debug_others(d, DEBUG_STREAM(stream)->queue);
    debug_drain(d, DEBUG_STREAM(stream)->queue);
    return DEBUG_STREAM(stream)->status;
}

static inline llmpar_status debug_event_create(llmpar_device *device, llmpar_event **out)
{
    debug_event *event = (debug_event *)calloc(1, sizeof *event);
    *out = (llmpar_event *)(void *)event;
    return event ? LLMPAR_OK : llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "debug device: out of memory");
}

static inline void debug_event_destroy(llmpar_device *device, llmpar_event *event) { (void)device; free(event); }

typedef struct debug_event_args { debug_event *event; debug_stream *stream; uint64_t serial; } debug_event_args;
static inline llmpar_status debug_run_record(debug_device *d, debug_stream *s, void *args)
{
    debug_event_args *a = (debug_event_args *)args;
    (void)d;
    a->event->done = a->serial;
    a->event->status = s->status;
    return LLMPAR_OK;
}
static inline llmpar_status debug_event_record(llmpar_device *device, llmpar_stream *stream, llmpar_event *event)
{
    debug_event_args args = {DEBUG_EVENT(event), DEBUG_STREAM(stream), DEBUG_EVENT(event)->recorded + 1};
    llmpar_status status = debug_enqueue(DEBUG_OF(device), args.stream, debug_run_record, &args, sizeof args, NULL, 0, NULL);
    if (status) { /* recorded behind a failure */
        args.event->status = status;
        return status;
    }
    args.event->recorded = args.serial;
    args.event->stream = args.stream;
    return LLMPAR_OK;
}

static inline llmpar_status debug_run_wait(debug_device *d, debug_stream *s, void *args)
{
    debug_event_args *a = (debug_event_args *)args;
    if (a->stream != s && a->stream->queue != s->queue)
        while (a->event->done < a->serial && a->stream->queue->head) debug_step(d, a->stream->queue);
    return a->stream->status;
}
static inline llmpar_status debug_event_wait(llmpar_device *device, llmpar_stream *stream, llmpar_event *handle)
{
    debug_event *event = DEBUG_EVENT(handle);
    debug_event_args args = {event, event->stream, event->recorded};
    if (DEBUG_STREAM(stream)->status) return DEBUG_STREAM(stream)->status;
    if (event->status) return DEBUG_STREAM(stream)->status = event->status;
    if (!event->stream) return LLMPAR_OK;
    return debug_enqueue(DEBUG_OF(device), DEBUG_STREAM(stream), debug_run_wait, &args, sizeof args, NULL, 0, NULL);
}

static inline llmpar_status debug_event_synchronize(llmpar_device *device, llmpar_event *handle)
{
    debug_event *event = DEBUG_EVENT(handle);
    if (event->stream) debug_others(DEBUG_OF(device), event->stream->queue);
    debug_until(DEBUG_OF(device), event, event->recorded);
    return event->status;
}

typedef struct debug_host_args { llmpar_status (*fn)(void *arg); size_t bytes; union { char bytes[256]; double a; int64_t b; void *c; } arg; } debug_host_args;
static inline llmpar_status debug_run_host(debug_device *d, debug_stream *s, void *args)
{
    debug_host_args *a = (debug_host_args *)args;
    return d->inner->host_call(d->inner, s->inner, a->fn, a->arg.bytes, a->bytes);
}
static inline llmpar_status debug_host_call(llmpar_device *device, llmpar_stream *stream, llmpar_status (*fn)(void *arg), const void *arg, size_t bytes)
{
    debug_device *d = DEBUG_OF(device);
    debug_host_args args;
    if (DEBUG_THROUGH(device, stream)) return d->inner->host_call(d->inner, stream, fn, arg, bytes);
    if (bytes > sizeof args.arg) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "debug device: host_call with %lu bytes", (unsigned long)bytes);
    memset(&args, 0, sizeof args);
    args.fn = fn;
    args.bytes = bytes;
    if (bytes) memcpy(args.arg.bytes, arg, bytes);
    return debug_enqueue(d, DEBUG_STREAM(stream), debug_run_host, &args, sizeof args, NULL, 0, NULL);
}

/* ---- operations ---- */

#define DEBUG_OPERATIONS(X) \
    X(rmsnorm, llmpar_rmsnorm_args) X(rmsnorm_backward, llmpar_rmsnorm_backward_args) X(rope, llmpar_rope_args) X(attention, llmpar_attention_args) \
    X(attention_backward, llmpar_attention_backward_args) X(swiglu, llmpar_swiglu_args) X(swiglu_backward, llmpar_swiglu_backward_args) X(embedding, llmpar_embedding_args) \
    X(embedding_backward, llmpar_embedding_backward_args) X(xent_max, llmpar_xent_args) X(xent_sum, llmpar_xent_args) X(xent_loss, llmpar_xent_loss_args) \
    X(xent_backward, llmpar_xent_backward_args) X(add, llmpar_add_args) X(scale, llmpar_scale_args) X(cast, llmpar_cast_args) X(copy_rows, llmpar_copy_rows_args) \
    X(adamw, llmpar_adamw_args) X(square_sum, llmpar_square_sum_args) X(sgd, llmpar_sgd_args) X(largest, llmpar_largest_args) \
    X(factor_sum, llmpar_factor_sum_args) X(factor_moment, llmpar_factor_moment_args) X(adalomo_square, llmpar_adalomo_args) X(adalomo, llmpar_adalomo_args)

#define DEBUG_RUN(slot, type) \
    static inline llmpar_status debug_run_##slot(debug_device *d, debug_stream *s, void *args) { return d->inner->slot(d->inner, s->inner, (const type *)args); }
#define DEBUG_ENQUEUE(slot, type) \
    DEBUG_RUN(slot, type) \
    static inline llmpar_status debug_##slot(llmpar_device *device, llmpar_stream *stream, const type *args) \
    { \
        debug_device *d = DEBUG_OF(device); \
        if (DEBUG_THROUGH(device, stream)) return d->inner->slot(d->inner, stream, args); \
        return debug_enqueue(d, DEBUG_STREAM(stream), debug_run_##slot, args, sizeof *args, NULL, 0, NULL); \
    }
/* The same for an operation with an array: the copy of the arguments points at the copy of the array. */
#define DEBUG_ENQUEUE_ARRAY(slot, type, array, elements) \
    DEBUG_RUN(slot, type) \
    static inline llmpar_status debug_##slot(llmpar_device *device, llmpar_stream *stream, const type *args) \
    { \
        debug_device *d = DEBUG_OF(device); \
        void *copy = NULL; \
        if (DEBUG_THROUGH(device, stream)) return d->inner->slot(d->inner, stream, args); \
        llmpar_status status = debug_enqueue(d, DEBUG_STREAM(stream), debug_run_##slot, args, sizeof *args, args->array, (size_t)args->elements * sizeof *args->array, &copy); \
        if (!status) memcpy((char *)DEBUG_STREAM(stream)->queue->tail->args + offsetof(type, array), &copy, sizeof copy); \
        return status; \
    }
DEBUG_OPERATIONS(DEBUG_ENQUEUE)
DEBUG_ENQUEUE_ARRAY(gemm, llmpar_gemm_args, segments, segment_count)
DEBUG_ENQUEUE_ARRAY(tree_sum, llmpar_tree_sum_args, in, n)
DEBUG_ENQUEUE_ARRAY(max, llmpar_max_args, in, n)

#define DEBUG_WORKSPACE(slot, type) static inline size_t debug_##slot(llmpar_device *device, const type *args) { return DEBUG_OF(device)->inner->slot(DEBUG_OF(device)->inner, args); }
DEBUG_WORKSPACE(gemm_workspace, llmpar_gemm_args)
DEBUG_WORKSPACE(attention_workspace, llmpar_attention_args)
DEBUG_WORKSPACE(attention_backward_workspace, llmpar_attention_backward_args)
DEBUG_WORKSPACE(embedding_backward_workspace, llmpar_embedding_backward_args)

static inline void debug_device_init(debug_device *d, llmpar_device *inner, debug_order order)
{
    memset(d, 0, sizeof *d);
    d->inner = inner;
    d->order = order;
    d->shared.queue = &d->shared;
    d->table.abi = LLMPAR_DEVICE_ABI;
    d->table.size = (uint32_t)sizeof(llmpar_device);
    d->table.name = "debug";
    d->table.error = inner->error;
    d->table.alignment = inner->alignment;
    d->table.alloc = debug_alloc;
    d->table.free = debug_free;
    d->table.copy = debug_copy;
    d->table.zero = debug_zero;
    d->table.stream_create = debug_stream_create;
    d->table.stream_destroy = debug_stream_destroy;
    d->table.synchronize = debug_synchronize;
    d->table.event_create = debug_event_create;
    d->table.event_destroy = debug_event_destroy;
    d->table.event_record = debug_event_record;
    d->table.event_wait = debug_event_wait;
    d->table.event_synchronize = debug_event_synchronize;
    d->table.host_call = debug_host_call;
#define DEBUG_FILL(slot, type) d->table.slot = debug_##slot;
    DEBUG_OPERATIONS(DEBUG_FILL)
    DEBUG_FILL(gemm, _)
    DEBUG_FILL(tree_sum, _)
    DEBUG_FILL(max, _)
    DEBUG_FILL(gemm_workspace, _)
    DEBUG_FILL(attention_workspace, _)
    DEBUG_FILL(attention_backward_workspace, _)
    DEBUG_FILL(embedding_backward_workspace, _)
#undef DEBUG_FILL
}

#endif
