/* cpu: the device itself: levels, memory, streams, and the table of operations. An operation has finished when its call returns, so a stream is
   only the failure that sticks to it, and an event only the failure of what was recorded. */
#include "cpu/cpu_internal.h"
#include "cpu/half_internal.h"

#include <stdio.h>
#include <string.h>

#define LLMPAR__CPU_MAX_THREADS 1024

typedef struct llmpar__cpu_stream { llmpar_status status; } llmpar__cpu_stream;
typedef struct llmpar__cpu_event { llmpar_status status; } llmpar__cpu_event; /* of the stream when last recorded */

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
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return LLMPAR_CPU_PORTABLE;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) return LLMPAR_CPU_AVX512;
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
    case LLMPAR_CPU_DEFAULT: break;
    }
    return "?";
}

LLMPAR_DEF int llmpar_cpu_level_parse(const char *text, llmpar_cpu_level *out)
{
    int i;
    for (i = (int)LLMPAR_CPU_PORTABLE; i <= (int)LLMPAR_CPU_AVX512; i++) {
        if (strcmp(text, llmpar_cpu_level_name((llmpar_cpu_level)i)) == 0) {
            *out = (llmpar_cpu_level)i;
            return 1;
        }
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

static llmpar_status llmpar__cpu_copy(llmpar_device *device, llmpar_stream *stream, void *out, const void *in, size_t bytes)
{
    (void)device;
    if (llmpar__cpu_stuck(stream)) return llmpar__cpu_stuck(stream);
    if (bytes) memmove(out, in, bytes);
    return LLMPAR_OK;
}

static llmpar_status llmpar__cpu_zero(llmpar_device *device, llmpar_stream *stream, void *out, size_t bytes)
{
    (void)device;
    if (llmpar__cpu_stuck(stream)) return llmpar__cpu_stuck(stream);
    if (bytes) memset(out, 0, bytes);
    return LLMPAR_OK;
}

static llmpar_status llmpar__cpu_stream_create(llmpar_device *device, const char *name, llmpar_stream **out)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar__cpu_stream *stream = (llmpar__cpu_stream *)llmpar_heap_zalloc(cpu->heap, 1, sizeof *stream);
    *out = (llmpar_stream *)(void *)stream;
    if (!stream) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "cpu: no memory for stream %s", name ? name : "?");
    return LLMPAR_OK;
}

static void llmpar__cpu_stream_destroy(llmpar_device *device, llmpar_stream *stream)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar_heap_free(cpu->heap, stream);
}

static llmpar_status llmpar__cpu_synchronize(llmpar_device *device, llmpar_stream *stream)
{
    (void)device;
    return llmpar__cpu_stuck(stream);
}

static llmpar_status llmpar__cpu_event_create(llmpar_device *device, llmpar_event **out)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar__cpu_event *event = (llmpar__cpu_event *)llmpar_heap_zalloc(cpu->heap, 1, sizeof *event);
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
    (void)device;
    ((llmpar__cpu_event *)(void *)event)->status = llmpar__cpu_stuck(stream);
    return llmpar__cpu_stuck(stream);
}

/* What waits for the work of a failed stream has failed too. */
static llmpar_status llmpar__cpu_event_wait(llmpar_device *device, llmpar_stream *stream, llmpar_event *event)
{
    (void)device;
    if (llmpar__cpu_stuck(stream)) return llmpar__cpu_stuck(stream);
    return llmpar__cpu_stick(stream, ((llmpar__cpu_event *)(void *)event)->status);
}

static llmpar_status llmpar__cpu_event_synchronize(llmpar_device *device, llmpar_event *event)
{
    (void)device;
    return ((llmpar__cpu_event *)(void *)event)->status;
}

static llmpar_status llmpar__cpu_host_call(llmpar_device *device, llmpar_stream *stream, llmpar_status (*fn)(void *arg), const void *arg, size_t arg_bytes)
{
    union { char bytes[256]; double alignment_of_double; int64_t alignment_of_int; void *alignment_of_pointer; } copy;
    if (llmpar__cpu_stuck(stream)) return llmpar__cpu_stuck(stream);
    if (arg_bytes > sizeof copy.bytes)
        return llmpar__cpu_stick(stream, llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "cpu host_call: expected an argument of at most 256 bytes, got %llu", (unsigned long long)arg_bytes));
    if (arg_bytes) memcpy(copy.bytes, arg, arg_bytes);
    return llmpar__cpu_stick(stream, fn(copy.bytes));
}

/* ---- operations: each runs unless its stream has failed, and a failure sticks ---- */

#define LLMPAR__CPU_OPERATIONS(X) \
    X(gemm) X(rmsnorm) X(rmsnorm_backward) X(rope) X(attention) X(attention_backward) X(swiglu) X(swiglu_backward) X(embedding) X(embedding_backward) \
    X(tree_sum) X(max) X(add) X(scale) X(cast) X(copy_rows) X(adamw) X(square_sum) X(sgd) X(largest) X(factor_sum) X(factor_moment) X(adalomo)

#define LLMPAR__CPU_RUN(slot, args_type) \
    static llmpar_status llmpar__cpu_run_##slot(llmpar_device *device, llmpar_stream *stream, const args_type *args) \
    { \
        if (llmpar__cpu_stuck(stream)) return llmpar__cpu_stuck(stream); \
        return llmpar__cpu_stick(stream, llmpar__cpu_##slot(device, stream, args)); \
    }
#define LLMPAR__CPU_RUN_OWN(slot) LLMPAR__CPU_RUN(slot, llmpar_##slot##_args)
LLMPAR__CPU_OPERATIONS(LLMPAR__CPU_RUN_OWN)
LLMPAR__CPU_RUN(adalomo_square, llmpar_adalomo_args)
LLMPAR__CPU_RUN(xent_max, llmpar_xent_args)
LLMPAR__CPU_RUN(xent_sum, llmpar_xent_args)
LLMPAR__CPU_RUN(xent_loss, llmpar_xent_loss_args)
LLMPAR__CPU_RUN(xent_backward, llmpar_xent_backward_args)

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
    LLMPAR__CPU_FILL(xent_max)
    LLMPAR__CPU_FILL(xent_sum)
    LLMPAR__CPU_FILL(xent_loss)
    LLMPAR__CPU_FILL(xent_backward)
#undef LLMPAR__CPU_FILL
    table->gemm_workspace = llmpar__cpu_gemm_workspace;
    table->attention_workspace = llmpar__cpu_attention_workspace;
    table->attention_backward_workspace = llmpar__cpu_attention_backward_workspace;
    table->embedding_backward_workspace = llmpar__cpu_embedding_backward_workspace;
}

#undef LLMPAR__CPU_OPERATIONS
#undef LLMPAR__CPU_RUN
#undef LLMPAR__CPU_RUN_OWN

/* ---- creation ---- */

LLMPAR_DEF llmpar_status llmpar_cpu_create(llmpar_heap *heap, llmpar_error *error, const llmpar_cpu_desc *desc, llmpar_device **out)
{
    llmpar_cpu_level best = llmpar_cpu_best_level(), level = best;
    int32_t threads = 1;
    llmpar__cpu_device *cpu;
    *out = NULL;
    if (desc && desc->level != LLMPAR_CPU_DEFAULT) level = desc->level;
    if (desc && desc->threads != 0) threads = desc->threads;
    if ((int)level < (int)LLMPAR_CPU_PORTABLE || (int)level > (int)LLMPAR_CPU_AVX512) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "cpu: unknown level %d", (int)level);
    if ((int)level > (int)best)
        return llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "cpu: level %s was asked for, this processor or build has at most %s", llmpar_cpu_level_name(level), llmpar_cpu_level_name(best));
    if (threads < 1 || threads > LLMPAR__CPU_MAX_THREADS)
        return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "cpu: expected 1 to %d threads, got %d", LLMPAR__CPU_MAX_THREADS, (int)threads);

    cpu = (llmpar__cpu_device *)llmpar_heap_zalloc(heap, 1, sizeof *cpu);
    if (!cpu) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "cpu: no memory for the device");
    cpu->state.heap = heap;
    cpu->state.level = level;
    cpu->state.f16c = llmpar__half_has_f16c();
    if (threads > 1) {
        llmpar_status status = llmpar__pool_create(heap, error, threads, &cpu->state.pool);
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
    llmpar__cpu *cpu;
    if (!device) return;
    cpu = (llmpar__cpu *)device->state;
    llmpar__pool_destroy(cpu->pool);
    llmpar_heap_free(cpu->heap, (llmpar__cpu_device *)(void *)device); /* the table is its first member */
}

#undef LLMPAR__CPU_MAX_THREADS
