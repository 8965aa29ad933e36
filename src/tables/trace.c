/* trace: events in blocks that never move, because a stream writes an event's times while the rank's thread goes on adding events. */
#include "tables/trace.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/clock_internal.h"
#include "base/json.h"
#include "tables/tables_internal.h"

#define LLMPAR__TRACE_BLOCK 256u
#define LLMPAR__TRACE_TEXT 65536u /* bytes that are put together before they are handed on */
#define LLMPAR__TRACE_LINE 2048u  /* the longest event */

typedef struct llmpar__trace_event {
    uint64_t begin_ns, end_ns; /* 0: its stream has not come there */
    uint64_t bytes;
    const char *category;      /* NULL: live bytes per tag at begin_ns */
    int32_t lane, micro_batch;
    union {
        struct { char name[24], unit[40]; } span;
        uint64_t live[LLMPAR_TAG_COUNT];
    } of;
} llmpar__trace_event;

typedef struct llmpar__trace_block {
    struct llmpar__trace_block *next;
    llmpar__trace_event event[LLMPAR__TRACE_BLOCK];
} llmpar__trace_block;

struct llmpar_trace {
    llmpar_ctx *ctx;
    uint64_t limit, count, dropped;
    uint64_t created_ns;
    int64_t clock_ns;          /* what the time of day is ahead of this machine's steady clock */
    llmpar__trace_block *first, *last;
    uint64_t live[LLMPAR_TAG_COUNT]; /* as last counted */
    char lane[LLMPAR_TRACE_LANES][24];
    char text[LLMPAR__TRACE_TEXT];   /* of write */
};

static uint64_t llmpar__trace_now(void) { return llmpar__clock_ns(CLOCK_MONOTONIC); } /* one for all processes of a machine */

LLMPAR_DEF llmpar_status llmpar_trace_create(llmpar_ctx *ctx, uint64_t limit, llmpar_trace **out)
{
    llmpar_trace *trace = *out = LLMPAR__ZALLOC(llmpar_trace, &ctx->heap, 1);
    if (!trace) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "trace: out of memory");
    trace->ctx = ctx;
    trace->limit = limit ? limit : 262144;
    trace->created_ns = llmpar__trace_now();
    trace->clock_ns = (int64_t)(llmpar__clock_ns(CLOCK_REALTIME) - trace->created_ns);
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_trace_destroy(llmpar_trace *trace)
{
    if (!trace) return;
    while (trace->first) {
        llmpar__trace_block *next = trace->first->next;
        llmpar_heap_free(&trace->ctx->heap, trace->first);
        trace->first = next;
    }
    llmpar_heap_free(&trace->ctx->heap, trace);
}

static void llmpar__trace_copy(char *out, size_t capacity, const char *text) { snprintf(out, capacity, "%s", text ? text : ""); }

LLMPAR_DEF void llmpar_trace_lane(llmpar_trace *trace, int32_t lane, const char *name)
{
    if (trace && lane >= 0 && lane < LLMPAR_TRACE_LANES) llmpar__trace_copy(trace->lane[lane], sizeof trace->lane[lane], name);
}

/* The next event, zeroed; NULL: none is left. A trace that is cut is better than a step that fails. */
static llmpar__trace_event *llmpar__trace_add(llmpar_trace *trace)
{
    uint64_t at = trace->count % LLMPAR__TRACE_BLOCK;
    if (trace->count < trace->limit && at == 0) {
        llmpar__trace_block *block = LLMPAR__ZALLOC(llmpar__trace_block, &trace->ctx->heap, 1);
        if (!block) trace->limit = trace->count;
        else if (trace->last) trace->last->next = block;
        else trace->first = block;
        if (block) trace->last = block;
    }
    if (trace->count >= trace->limit) {
        trace->dropped++;
        return NULL;
    }
    trace->count++;
    return &trace->last->event[at];
}

static llmpar_status llmpar__trace_mark(void *arg)
{
    *(*(uint64_t **)arg) = llmpar__trace_now();
    return LLMPAR_OK;
}

static llmpar_status llmpar__trace_enqueue(llmpar_trace *trace, llmpar_stream *stream, uint64_t *time)
{
    return trace->ctx->device->host_call(trace->ctx->device, stream, llmpar__trace_mark, &time, sizeof time);
}

LLMPAR_DEF llmpar_status llmpar_trace_begin(llmpar_trace *trace, llmpar_stream *stream, const llmpar_trace_span *span, uint64_t *id)
{
    *id = 0;
    if (!trace) return LLMPAR_OK;
    llmpar__trace_event *event = span->lane >= 0 && span->lane < LLMPAR_TRACE_LANES ? llmpar__trace_add(trace) : NULL;
    if (!event) return LLMPAR_OK;
    event->bytes = span->bytes;
    event->category = span->category ? span->category : "";
    event->lane = span->lane;
    event->micro_batch = span->micro_batch;
    llmpar__trace_copy(event->of.span.name, sizeof event->of.span.name, span->name);
    llmpar__trace_copy(event->of.span.unit, sizeof event->of.span.unit, span->unit);
    *id = (uint64_t)(uintptr_t)event;
    return llmpar__trace_enqueue(trace, stream, &event->begin_ns);
}

LLMPAR_DEF llmpar_status llmpar_trace_end(llmpar_trace *trace, llmpar_stream *stream, uint64_t id)
{
    if (!trace || !id) return LLMPAR_OK;
    return llmpar__trace_enqueue(trace, stream, &((llmpar__trace_event *)(uintptr_t)id)->end_ns);
}

LLMPAR_DEF void llmpar_trace_memory(llmpar_trace *trace, const llmpar_arena_usage *usage)
{
    if (!trace || (trace->count && !memcmp(trace->live, usage->live, sizeof trace->live))) return;
    llmpar__trace_event *event = llmpar__trace_add(trace);
    if (!event) return;
    event->begin_ns = llmpar__trace_now();
    memcpy(event->of.live, usage->live, sizeof event->of.live);
    memcpy(trace->live, usage->live, sizeof trace->live);
}

/* ---- writing ---- */

typedef struct llmpar__trace_out {
    llmpar_trace *trace;
    llmpar_comm *world;
    llmpar_stream *stream;
    void *memory;           /* of the device, [LLMPAR__TRACE_TEXT]: what goes to rank 0 */
    llmpar_trace_sink sink; /* rank 0 */
    void *user;
    size_t used;
    uint64_t base_ns;       /* 0 of the trace on this rank's clock */
    llmpar_status status, sunk; /* of the transport; of the sink, whose failure the other ranks need not wait for */
} llmpar__trace_out;

static void llmpar__trace_move(llmpar__trace_out *out, int sends, int32_t peer, void *values, size_t count, llmpar_dtype dtype)
{
    llmpar_device *device = out->world->device;
    size_t bytes = count * llmpar_dtype_size(dtype);
    llmpar_collective call = llmpar__comm_collective(sends ? out->memory : NULL, sends ? NULL : out->memory, count, dtype, "trace");
    if (out->status) return;
    call.peer = peer;
    if (sends) out->status = device->copy(device, out->stream, out->memory, values, bytes);
    if (!out->status) out->status = sends ? llmpar_send(out->world, out->stream, &call) : llmpar_recv(out->world, out->stream, &call);
    if (!out->status && !sends) out->status = device->copy(device, out->stream, values, out->memory, bytes);
    out->status = llmpar__device_done(device, out->stream, out->status);
}

static void llmpar__trace_sink(llmpar__trace_out *out, size_t bytes)
{
    if (bytes && !out->sunk && !out->status) out->sunk = out->sink(out->user, out->trace->text, bytes);
}

/* Hands on what there is: to the sink, or to rank 0, for which a piece of 0 bytes is the last one. */
static void llmpar__trace_flush(llmpar__trace_out *out)
{
    int64_t bytes = (int64_t)out->used;
    if (out->world->rank == 0) {
        llmpar__trace_sink(out, out->used);
    } else {
        llmpar__trace_move(out, 1, 0, &bytes, 1, LLMPAR_I64);
        if (bytes) llmpar__trace_move(out, 1, 0, out->trace->text, out->used, LLMPAR_U8);
    }
    out->used = 0;
}

LLMPAR_PRINTF(2, 3) static void llmpar__trace_put(llmpar__trace_out *out, const char *format, ...)
{
    va_list args;
    if (out->used + LLMPAR__TRACE_LINE > LLMPAR__TRACE_TEXT) llmpar__trace_flush(out);
    va_start(args, format);
    int n = vsnprintf(out->trace->text + out->used, LLMPAR__TRACE_LINE, format, args);
    va_end(args);
    if (n > 0) out->used += (size_t)n < LLMPAR__TRACE_LINE ? (size_t)n : LLMPAR__TRACE_LINE - 1;
}

static const char *llmpar__trace_quote(const char *text, char out[336])
{
    llmpar_json_escape(text, strlen(text), out, 336);
    return out;
}

static void llmpar__trace_span(llmpar__trace_out *out, const llmpar__trace_event *event, uint64_t last_ns)
{
    char name[336], unit[336], label[72], category[336];
    const char *of = event->of.span.unit;
    uint64_t end = event->end_ns ? event->end_ns : last_ns, ts = event->begin_ns - out->base_ns, dur = end - event->begin_ns;
    if (!event->begin_ns) return; /* its stream failed before */
    snprintf(label, sizeof label, "%s%s%s", event->of.span.name, of[0] ? " " : "", of);
    llmpar__trace_put(out, ",\n{\"ph\":\"X\",\"pid\":%d,\"tid\":%d,\"ts\":%llu.%03u,\"dur\":%llu.%03u,\"name\":%s,\"cat\":%s,\"args\":{", (int)out->world->rank, (int)event->lane, (unsigned long long)(ts / 1000),
                      (unsigned)(ts % 1000), (unsigned long long)(dur / 1000), (unsigned)(dur % 1000), llmpar__trace_quote(label, name), llmpar__trace_quote(event->category, category));
    llmpar__trace_put(out, "\"op\":%s", llmpar__trace_quote(event->of.span.name, name));
    if (of[0]) llmpar__trace_put(out, ",\"unit\":%s", llmpar__trace_quote(of, unit));
    if (event->micro_batch >= 0) llmpar__trace_put(out, ",\"micro_batch\":%d", (int)event->micro_batch);
    if (event->bytes) llmpar__trace_put(out, ",\"bytes\":%llu", (unsigned long long)event->bytes);
    llmpar__trace_put(out, "%s}}", event->end_ns ? "" : ",\"unfinished\":true");
}

static void llmpar__trace_counter(llmpar__trace_out *out, const llmpar__trace_event *event)
{
    uint64_t ts = event->begin_ns - out->base_ns;
    llmpar__trace_put(out, ",\n{\"ph\":\"C\",\"pid\":%d,\"tid\":0,\"ts\":%llu.%03u,\"name\":\"arena bytes\",\"args\":{", (int)out->world->rank, (unsigned long long)(ts / 1000), (unsigned)(ts % 1000));
    for (int tag = 0; tag < (int)LLMPAR_TAG_COUNT; tag++) llmpar__trace_put(out, "%s\"%s\":%llu", tag ? "," : "", llmpar_tag_name((llmpar_tag)tag), (unsigned long long)event->of.live[tag]);
    llmpar__trace_put(out, "}}");
}

static void llmpar__trace_rank(llmpar__trace_out *out)
{
    const llmpar_trace *trace = out->trace;
    const char *where = trace->ctx->error.where;
    char label[96], name[336];
    int pid = (int)out->world->rank;
    uint64_t last_ns = llmpar__trace_now(), left = trace->count;
    snprintf(label, sizeof label, "rank %d%s%s%s", pid, where[0] ? " (" : "", where, where[0] ? ")" : "");
    llmpar__trace_put(out, "%s{\"ph\":\"M\",\"pid\":%d,\"tid\":0,\"name\":\"process_name\",\"args\":{\"name\":%s}}", pid ? ",\n" : "", pid, llmpar__trace_quote(label, name));
    llmpar__trace_put(out, ",\n{\"ph\":\"M\",\"pid\":%d,\"tid\":0,\"name\":\"process_sort_index\",\"args\":{\"sort_index\":%d}}", pid, pid);
    if (trace->dropped) llmpar__trace_put(out, ",\n{\"ph\":\"M\",\"pid\":%d,\"tid\":0,\"name\":\"process_labels\",\"args\":{\"labels\":\"%llu later events not recorded\"}}", pid, (unsigned long long)trace->dropped);
    for (int lane = 0; lane < LLMPAR_TRACE_LANES; lane++) {
        if (!trace->lane[lane][0]) continue;
        llmpar__trace_put(out, ",\n{\"ph\":\"M\",\"pid\":%d,\"tid\":%d,\"name\":\"thread_name\",\"args\":{\"name\":%s}}", pid, lane, llmpar__trace_quote(trace->lane[lane], name));
        llmpar__trace_put(out, ",\n{\"ph\":\"M\",\"pid\":%d,\"tid\":%d,\"name\":\"thread_sort_index\",\"args\":{\"sort_index\":%d}}", pid, lane, lane);
    }
    for (const llmpar__trace_block *block = trace->first; block; block = block->next)
        for (uint32_t i = 0; i < LLMPAR__TRACE_BLOCK && left; i++, left--) {
            if (block->event[i].category) llmpar__trace_span(out, &block->event[i], last_ns);
            else llmpar__trace_counter(out, &block->event[i]);
        }
}

/* The ranks' clocks: those of one machine are the same; of another one they are told by the time of day, which agrees to some milliseconds. */
static void llmpar__trace_agree(llmpar__trace_out *out, int64_t *all)
{
    const int64_t mine[2] = {(int64_t)out->trace->created_ns, out->trace->clock_ns};
    int64_t earliest = INT64_MAX, shift = 0;
    llmpar_collective call = llmpar__comm_collective(mine, all, 2, LLMPAR_I64, "trace");
    out->status = llmpar__comm_talk(out->world, LLMPAR_CALL_ALL_GATHER, &call);
    for (int32_t r = 0; r < out->world->ranks && !out->status; r++) {
        int64_t ahead = all[2 * r + 1] - all[1], created;
        if (ahead < 1000000000 && ahead > -1000000000) ahead = 0;
        created = all[2 * r] + ahead; /* on rank 0's clock */
        if (created < earliest) earliest = created;
        if (r == out->world->rank) shift = ahead;
    }
    out->base_ns = (uint64_t)(earliest - shift);
}

LLMPAR_DEF llmpar_status llmpar_trace_write(llmpar_trace *trace, llmpar_comm *world, llmpar_trace_sink sink, void *user)
{
    llmpar_device *device = world->device;
    LLMPAR__ZEROED(llmpar__trace_out, out);
    out.trace = trace;
    out.world = world;
    out.sink = sink;
    out.user = user;
    int64_t *all = LLMPAR__ZALLOC(int64_t, &trace->ctx->heap, 2 * (size_t)world->ranks);
    if (!all) return llmpar_fail(trace->ctx, LLMPAR_ERR_MEMORY, "trace: out of memory for %d ranks", (int)world->ranks);
    llmpar__trace_agree(&out, all);
    llmpar_heap_free(&trace->ctx->heap, all);
    if (!out.status) out.status = device->alloc(device, LLMPAR__TRACE_TEXT, &out.memory);
    if (!out.status) out.status = device->stream_create(device, "trace", &out.stream);
    if (!out.status) {
        if (world->rank == 0) llmpar__trace_put(&out, "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n");
        llmpar__trace_rank(&out);
        if (out.used) llmpar__trace_flush(&out);
        if (world->rank) llmpar__trace_flush(&out);
        for (int32_t r = 1; r < world->ranks && world->rank == 0; r++)
            for (int64_t bytes = 1; bytes && !out.status;) {
                llmpar__trace_move(&out, 0, r, &bytes, 1, LLMPAR_I64);
                if (!out.status && (bytes < 0 || bytes > (int64_t)LLMPAR__TRACE_TEXT)) out.status = llmpar_fail(trace->ctx, LLMPAR_ERR_INTERNAL, "trace: a piece of %lld bytes from rank %d", (long long)bytes, (int)r);
                if (!bytes || out.status) continue;
                llmpar__trace_move(&out, 0, r, trace->text, (size_t)bytes, LLMPAR_U8);
                llmpar__trace_sink(&out, (size_t)bytes);
            }
        if (world->rank == 0) {
            llmpar__trace_put(&out, "\n]}\n");
            llmpar__trace_flush(&out);
        }
    }
    if (out.stream) device->stream_destroy(device, out.stream);
    device->free(device, out.memory, LLMPAR__TRACE_TEXT);
    return out.status ? out.status : out.sunk;
}

#undef LLMPAR__TRACE_BLOCK
#undef LLMPAR__TRACE_TEXT
#undef LLMPAR__TRACE_LINE
