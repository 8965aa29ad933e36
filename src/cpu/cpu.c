/* cpu: the device itself: levels, memory, streams, and the table of operations. An operation has finished when its call returns, so a stream is
   only the failure that sticks to it, and an event only the failure of what was recorded; until the stream gets a thread of its own, which
   runs what is enqueued later (stream.c). */
#include "cpu/cpu_internal.h"
#include "cpu/half_internal.h"

#include <stdio.h>
#include <string.h>

#define LLMPAR__CPU_MAX_THREADS 1024

typedef struct llmpar__cpu_stream {
    llmpar_status status;        /* sticks; with a thread it is the queue that keeps it */
    struct llmpar__queue *queue; /* NULL: operations finish inside the call */
    char name[16];
} llmpar__cpu_stream;

/* As last recorded: on a stream with a thread the place in its queue, else its failure. */
typedef struct llmpar__cpu_event {
    llmpar_status status;
    struct llmpar__queue *queue;
    uint64_t position;
} llmpar__cpu_event;

/* The device, its state and its name in one allocation of the rank's heap. */
typedef struct llmpar__cpu_device {
    llmpar_device table;
    llmpar__cpu state;
    char name[32];
} llmpar__cpu_device;

LLMPAR_DEF llmpar_cpu_level llmpar_cpu_best_level(void)
{
#if defined(__x86_64__) && !defined(LLMPAR_NO_SIMD)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !llmpar__half_has_f16c()) return LLMPAR_CPU_PORTABLE;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) return llmpar__gemm_has_bf16() ? LLMPAR_CPU_AVX512BF16 : LLMPAR_CPU_AVX512;
    return LLMPAR_CPU_AVX2;
#else
    return LLMPAR_CPU_PORTABLE;
#endif
}

LLMPAR_DEF const char *llmpar_cpu_level_name(llmpar_cpu_level level)
{
    switch (level) {
    case LLMPAR_CPU_PORTABLE: return "portable";
    case LLMPAR_CPU_AVX2: return "avx2";
    case LLMPAR_CPU_AVX512: return "avx512";
    case LLMPAR_CPU_AVX512BF16: return "avx512bf16";
    case LLMPAR_CPU_DEFAULT: break;
    }
    return "?";
}

LLMPAR_DEF int llmpar_cpu_level_parse(const char *text, llmpar_cpu_level *out)
{
    for (int i = (int)LLMPAR_CPU_PORTABLE; i <= (int)LLMPAR_CPU_AVX512BF16; i++)
        if (!strcmp(text, llmpar_cpu_level_name((llmpar_cpu_level)i))) {
            *out = (llmpar_cpu_level)i;
            return 1;
        }
    return 0;
}

/* ---- memory ---- */

static llmpar_status llmpar__cpu_alloc(llmpar_device *device, size_t bytes, void **out)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    *out = llmpar_heap_alloc(cpu->heap, bytes, 1);
    if (!*out) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "cpu: no memory for %llu bytes", (unsigned long long)bytes);
    return LLMPAR_OK;
}

static void llmpar__cpu_free(llmpar_device *device, void *memory, size_t bytes)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    (void)bytes;
    if (!memory) return;
    llmpar__stream_wait_all(cpu);
    llmpar_heap_free(cpu->heap, memory);
}

/* ---- streams and events; a NULL stream keeps no failure ---- */

static llmpar_status llmpar__cpu_stuck(llmpar_stream *stream)
{
    return stream ? ((llmpar__cpu_stream *)(void *)stream)->status : LLMPAR_OK;
}

static llmpar_status llmpar__cpu_stick(llmpar_stream *stream, llmpar_status status)
{
    if (stream && status) ((llmpar__cpu_stream *)(void *)stream)->status = status;
    return status;
}

/* Where the stream's operations wait for its thread; NULL: they run now, on this thread. */
static struct llmpar__queue *llmpar__cpu_queue(llmpar_stream *stream)
{
    return stream ? ((llmpar__cpu_stream *)(void *)stream)->queue : NULL;
}

typedef struct llmpar__cpu_move { void *out; const void *in; size_t bytes; } llmpar__cpu_move; /* in NULL: zeros */

static llmpar_status llmpar__cpu_do_move(llmpar_device *view, void *args)
{
    const llmpar__cpu_move *move = (const llmpar__cpu_move *)args;
    (void)view;
    if (move->in) memmove(move->out, move->in, move->bytes);
    else memset(move->out, 0, move->bytes);
    return LLMPAR_OK;
}

static llmpar_status llmpar__cpu_move_run(llmpar_device *device, llmpar_stream *stream, void *out, const void *in, size_t bytes)
{
    llmpar__cpu_move move = { out, in, bytes };
    struct llmpar__queue *queue = llmpar__cpu_queue(stream);
    if (queue && bytes) return llmpar__stream_push(queue, llmpar__cpu_do_move, &move, sizeof move, NULL, 0);
    if (llmpar__cpu_stuck(stream)) return llmpar__cpu_stuck(stream);
    return bytes ? llmpar__cpu_do_move(device, &move) : LLMPAR_OK;
}

static llmpar_status llmpar__cpu_copy(llmpar_device *device, llmpar_stream *stream, void *out, const void *in, size_t bytes) { return llmpar__cpu_move_run(device, stream, out, in, in ? bytes : 0); }
static llmpar_status llmpar__cpu_zero(llmpar_device *device, llmpar_stream *stream, void *out, size_t bytes) { return llmpar__cpu_move_run(device, stream, out, NULL, bytes); }

static llmpar_status llmpar__cpu_stream_create(llmpar_device *device, const char *name, llmpar_stream **out)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar__cpu_stream *stream = LLMPAR__ZALLOC(llmpar__cpu_stream, cpu->heap, 1);
    *out = (llmpar_stream *)(void *)stream;
    if (!stream) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "cpu: no memory for stream %s", name ? name : "?");
    snprintf(stream->name, sizeof stream->name, "%.15s", name ? name : "stream");
    return LLMPAR_OK;
}

static llmpar_status llmpar__cpu_stream_thread(llmpar_device *device, llmpar_stream *stream)
{
    llmpar__cpu_stream *own = (llmpar__cpu_stream *)(void *)stream;
    if (!own) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "cpu: a thread for no stream");
    if (own->queue || own->status) return own->status;
    return llmpar__stream_begin(device, own->name, &own->queue);
}

static void llmpar__cpu_stream_destroy(llmpar_device *device, llmpar_stream *stream)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar__stream_end(llmpar__cpu_queue(stream));
    llmpar_heap_free(cpu->heap, stream);
}

static llmpar_status llmpar__cpu_synchronize(llmpar_device *device, llmpar_stream *stream)
{
    struct llmpar__queue *queue = llmpar__cpu_queue(stream);
    llmpar_status status;
    (void)device;
    return queue ? llmpar__stream_wait(queue, llmpar__stream_tail(queue, &status)) : llmpar__cpu_stuck(stream);
}

static llmpar_status llmpar__cpu_event_create(llmpar_device *device, llmpar_event **out)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar__cpu_event *event = LLMPAR__ZALLOC(llmpar__cpu_event, cpu->heap, 1);
    *out = (llmpar_event *)(void *)event;
    if (!event) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "cpu: no memory for an event");
    return LLMPAR_OK;
}

static void llmpar__cpu_event_destroy(llmpar_device *device, llmpar_event *event)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar_heap_free(cpu->heap, event);
}

static llmpar_status llmpar__cpu_event_record(llmpar_device *device, llmpar_stream *stream, llmpar_event *event)
{
    llmpar__cpu_event *own = (llmpar__cpu_event *)(void *)event;
    (void)device;
    own->queue = llmpar__cpu_queue(stream);
    if (own->queue) own->position = llmpar__stream_tail(own->queue, &own->status);
    else own->status = llmpar__cpu_stuck(stream);
    return own->status;
}

/* A wait for an event of a stream without a thread that had failed: the text is in the rank's error. */
static llmpar_status llmpar__cpu_do_fail(llmpar_device *view, void *args)
{
    (void)view;
    return *(const llmpar_status *)args;
}

/* What waits for the work of a failed stream has failed too. */
static llmpar_status llmpar__cpu_event_wait(llmpar_device *device, llmpar_stream *stream, llmpar_event *event)
{
    const llmpar__cpu_event *own = (const llmpar__cpu_event *)(const void *)event;
    struct llmpar__queue *queue = llmpar__cpu_queue(stream);
    (void)device;
    if (queue && own->queue) return llmpar__stream_push_wait(queue, own->queue, own->position);
    if (queue) return own->status ? llmpar__stream_push(queue, llmpar__cpu_do_fail, &own->status, sizeof own->status, NULL, 0) : LLMPAR_OK;
    if (llmpar__cpu_stuck(stream)) return llmpar__cpu_stuck(stream);
    return llmpar__cpu_stick(stream, own->queue ? llmpar__stream_wait(own->queue, own->position) : own->status);
}

static llmpar_status llmpar__cpu_event_synchronize(llmpar_device *device, llmpar_event *event)
{
    const llmpar__cpu_event *own = (const llmpar__cpu_event *)(const void *)event;
    (void)device;
    return own->queue ? llmpar__stream_wait(own->queue, own->position) : own->status;
}

typedef struct llmpar__cpu_call { llmpar_status (*fn)(void *arg); } llmpar__cpu_call;

static llmpar_status llmpar__cpu_do_host_call(llmpar_device *view, void *args)
{
    (void)view;
    return ((const llmpar__cpu_call *)args)->fn((unsigned char *)args + LLMPAR__STREAM_ARRAY_AT(sizeof(llmpar__cpu_call)));
}

static llmpar_status llmpar__cpu_host_call(llmpar_device *device, llmpar_stream *stream, llmpar_status (*fn)(void *arg), const void *arg, size_t arg_bytes)
{
    union { char bytes[256]; double alignment_of_double; int64_t alignment_of_int; void *alignment_of_pointer; } copy;
    if (llmpar__cpu_stuck(stream)) return llmpar__cpu_stuck(stream);
    if (arg_bytes > sizeof copy.bytes)
        return llmpar__cpu_stick(stream, llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "cpu host_call: expected an argument of at most 256 bytes, got %llu", (unsigned long long)arg_bytes));
    const llmpar__cpu_call call = { fn };
    if (llmpar__cpu_queue(stream)) return llmpar__stream_push(llmpar__cpu_queue(stream), llmpar__cpu_do_host_call, &call, sizeof call, arg, arg_bytes);
    if (arg_bytes) memcpy(copy.bytes, arg, arg_bytes);
    return llmpar__cpu_stick(stream, fn(copy.bytes));
}

/* ---- operations: each runs unless its stream has failed, and a failure sticks. NULL streams run where the call is made, which may be the thread of another stream ---- */

/* set_array makes the queued copy of the arguments point at the queued copy of their array. */
#define LLMPAR__CPU_RUN_ARRAY(slot, args_type, set_array, array, array_bytes) \
    static llmpar_status llmpar__cpu_do_##slot(llmpar_device *view, void *args) \
    { \
        set_array; \
        return llmpar__cpu_##slot(view, NULL, (const args_type *)args); \
    } \
    static llmpar_status llmpar__cpu_run_##slot(llmpar_device *device, llmpar_stream *stream, const args_type *args) \
    { \
        if (llmpar__cpu_queue(stream)) return llmpar__stream_push(llmpar__cpu_queue(stream), llmpar__cpu_do_##slot, args, sizeof *args, array, array_bytes); \
        if (llmpar__cpu_stuck(stream)) return llmpar__cpu_stuck(stream); \
        return llmpar__cpu_stick(stream, llmpar__cpu_##slot(llmpar__stream_view(device), stream, args)); \
    }
#define LLMPAR__CPU_RUN(slot, args_type) LLMPAR__CPU_RUN_ARRAY(slot, args_type, (void)0, NULL, 0)
#define LLMPAR__CPU_OWN_ARRAY(args_type) ((void *)((unsigned char *)args + LLMPAR__STREAM_ARRAY_AT(sizeof(args_type))))
#define LLMPAR__CPU_INPUTS(args_type) ((args_type *)args)->in = (const void *const *)LLMPAR__CPU_OWN_ARRAY(args_type)
LLMPAR__CPU_RUN_ARRAY(gemm, llmpar_gemm_args, ((llmpar_gemm_args *)args)->segments = (const llmpar_gemm_segment *)LLMPAR__CPU_OWN_ARRAY(llmpar_gemm_args), args->segments,
                      args->segment_count > 0 ? (size_t)args->segment_count * sizeof *args->segments : 0)
LLMPAR__CPU_RUN_ARRAY(attention_each, llmpar_attention_each_args, ((llmpar_attention_each_args *)args)->each = (const llmpar_attention_args *)LLMPAR__CPU_OWN_ARRAY(llmpar_attention_each_args), args->each,
                      args->count > 0 ? (size_t)args->count * sizeof *args->each : 0)
LLMPAR__CPU_RUN_ARRAY(tree_sum, llmpar_tree_sum_args, LLMPAR__CPU_INPUTS(llmpar_tree_sum_args), args->in, args->n > 0 ? (size_t)args->n * sizeof *args->in : 0)
LLMPAR__CPU_RUN_ARRAY(max, llmpar_max_args, LLMPAR__CPU_INPUTS(llmpar_max_args), args->in, args->n > 0 ? (size_t)args->n * sizeof *args->in : 0)
#define LLMPAR__CPU_RUN_OWN(slot) LLMPAR__CPU_RUN(slot, llmpar_##slot##_args)
LLMPAR__CPU_OPERATIONS(LLMPAR__CPU_RUN_OWN)
LLMPAR__CPU_RUN(adalomo_square, llmpar_adalomo_args)
LLMPAR__CPU_RUN(xent_max, llmpar_xent_args)
LLMPAR__CPU_RUN(xent_sum, llmpar_xent_args)
LLMPAR__CPU_RUN(xent_loss, llmpar_xent_loss_args)
LLMPAR__CPU_RUN(xent_backward, llmpar_xent_backward_args)

static llmpar_status llmpar__cpu_run_tree_sum_to(llmpar_device *device, const llmpar_tree_sum_to_args *args) { return llmpar__cpu_tree_sum_to(llmpar__stream_view(device), args); }

static void llmpar__cpu_fill_table(llmpar_device *table)
{
    table->alloc = llmpar__cpu_alloc;
    table->free = llmpar__cpu_free;
    table->copy = llmpar__cpu_copy;
    table->zero = llmpar__cpu_zero;
    table->stream_create = llmpar__cpu_stream_create;
    table->stream_destroy = llmpar__cpu_stream_destroy;
    table->synchronize = llmpar__cpu_synchronize;
    table->event_create = llmpar__cpu_event_create;
    table->event_destroy = llmpar__cpu_event_destroy;
    table->event_record = llmpar__cpu_event_record;
    table->event_wait = llmpar__cpu_event_wait;
    table->event_synchronize = llmpar__cpu_event_synchronize;
    table->host_call = llmpar__cpu_host_call;
#define LLMPAR__CPU_FILL(slot) table->slot = llmpar__cpu_run_##slot;
    LLMPAR__CPU_OPERATIONS(LLMPAR__CPU_FILL)
    LLMPAR__CPU_FILL(adalomo_square)
    LLMPAR__CPU_FILL(gemm)
    LLMPAR__CPU_FILL(attention_each)
    LLMPAR__CPU_FILL(tree_sum)
    LLMPAR__CPU_FILL(max)
    LLMPAR__CPU_FILL(xent_max)
    LLMPAR__CPU_FILL(xent_sum)
    LLMPAR__CPU_FILL(xent_loss)
    LLMPAR__CPU_FILL(xent_backward)
#undef LLMPAR__CPU_FILL
    table->gemm_workspace = llmpar__cpu_gemm_workspace;
    table->attention_workspace = llmpar__cpu_attention_workspace;
    table->attention_backward_workspace = llmpar__cpu_attention_backward_workspace;
    table->embedding_backward_workspace = llmpar__cpu_embedding_backward_workspace;
    table->interleaved_rows = llmpar__cpu_interleaved_rows;
    table->interleave_workspace = llmpar__cpu_interleave_workspace;
    table->stream_thread = llmpar__cpu_stream_thread;
    table->thread_error = llmpar__stream_thread_error;
    table->threads_running = llmpar__stream_threads_running;
    table->tree_sum_to = llmpar__cpu_run_tree_sum_to;
}

#undef LLMPAR__CPU_OPERATIONS
#undef LLMPAR__CPU_RUN
#undef LLMPAR__CPU_RUN_OWN
#undef LLMPAR__CPU_RUN_ARRAY
#undef LLMPAR__CPU_OWN_ARRAY
#undef LLMPAR__CPU_INPUTS

/* ---- creation ---- */

LLMPAR_DEF llmpar_status llmpar_cpu_create(llmpar_heap *heap, llmpar_error *error, const llmpar_cpu_desc *desc, llmpar_device **out)
{
    llmpar_cpu_level best = llmpar_cpu_best_level(), level = best;
    int32_t threads = 1;
    llmpar__cpu_device *cpu;
    *out = NULL;
    if (desc && desc->level != LLMPAR_CPU_DEFAULT) level = desc->level;
    if (desc && desc->threads != 0) threads = desc->threads;
    if ((int)level < (int)LLMPAR_CPU_PORTABLE || (int)level > (int)LLMPAR_CPU_AVX512BF16) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "cpu: unknown level %d", (int)level);
    if ((int)level > (int)best)
        return llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "cpu: level %s was asked for, this processor or build has at most %s", llmpar_cpu_level_name(level), llmpar_cpu_level_name(best));
    if (threads < 1 || threads > LLMPAR__CPU_MAX_THREADS)
        return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "cpu: expected 1 to %d threads, got %d", LLMPAR__CPU_MAX_THREADS, (int)threads);

    cpu = LLMPAR__ZALLOC(llmpar__cpu_device, heap, 1);
    if (!cpu) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "cpu: no memory for the device");
    cpu->state.heap = heap;
    cpu->state.level = level;
    cpu->state.f16c = llmpar__half_has_f16c();
    cpu->state.processors = desc ? desc->processors : NULL;
    cpu->state.threads = threads;
    cpu->state.crowded = desc ? desc->crowded : 0;
    if (threads > 1) {
        llmpar_status status = llmpar__pool_create(&cpu->state, error, &cpu->state.pool);
        if (status) {
            llmpar_heap_free(heap, cpu);
            return status;
        }
    }
    snprintf(cpu->name, sizeof cpu->name, "cpu %s", llmpar_cpu_level_name(level));
    cpu->table.abi = LLMPAR_DEVICE_ABI;
    cpu->table.size = (uint32_t)sizeof(llmpar_device);
    cpu->table.name = cpu->name;
    cpu->table.error = error;
    cpu->table.state = &cpu->state;
    cpu->table.alignment = 64;
    llmpar__cpu_fill_table(&cpu->table);
    *out = &cpu->table;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_cpu_destroy(llmpar_device *device)
{
    if (!device) return;
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar__stream_end_all(cpu);
    llmpar__pool_destroy(cpu->pool);
    llmpar_heap_free(cpu->heap, (llmpar__cpu_device *)(void *)device); /* the table is its first member */
}

#undef LLMPAR__CPU_MAX_THREADS
