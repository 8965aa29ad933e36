/* cpu_internal: what the operation files of the CPU device share: the device's state, the worker pool, and one function a slot. */
#ifndef LLMPAR_CPU_INTERNAL_H
#define LLMPAR_CPU_INTERNAL_H

#include "cpu/cpu.h"

struct llmpar__pool;

typedef struct llmpar__cpu {
    llmpar_heap *heap;
    llmpar_cpu_level level;
    int f16c;                  /* the processor converts F16 (half.c) */
    struct llmpar__pool *pool; /* NULL: one thread */
    struct llmpar__queues *queues; /* of the streams with threads; NULL: there was none yet */
    const int32_t *processors; /* [threads] borrowed; NULL: no thread has its place */
    int32_t threads;
    int32_t crowded;
} llmpar__cpu;

/* Threads (pool.c). The caller's name; "r3" and "gather" give "r3 gather"; what a new thread does first: its name, and the floating-point control of every other. */
LLMPAR__PRIVATE void llmpar__thread_get_name(char name[16]);
LLMPAR__PRIVATE void llmpar__thread_make_name(char name[16], const char base[16], const char *suffix);
LLMPAR__PRIVATE void llmpar__thread_begin(const char *name);
/* The calling thread goes to the processor of this worker; worker < 0: to any of the rank's. Nothing where there are none. */
LLMPAR__PRIVATE void llmpar__thread_place(const llmpar__cpu *cpu, int32_t worker);

/* Streams with threads (stream.c). All but view, thread_error and threads_running are for the rank's own thread. */
struct llmpar__queue;
typedef llmpar_status (*llmpar__stream_fn)(llmpar_device *view, void *args); /* args: the copy; an array follows at LLMPAR__STREAM_ARRAY_AT */
#define LLMPAR__STREAM_ARRAY_AT(args_bytes) (((args_bytes) + 15u) / 16u * 16u)
LLMPAR__PRIVATE llmpar_status llmpar__stream_begin(llmpar_device *device, const char *name, struct llmpar__queue **out);
/* Waits for what is enqueued, and joins. NULL is fine. */
LLMPAR__PRIVATE void llmpar__stream_end(struct llmpar__queue *q);
LLMPAR__PRIVATE void llmpar__stream_end_all(llmpar__cpu *cpu);
/* Returns the failure that sticks, if there is one. */
LLMPAR__PRIVATE llmpar_status llmpar__stream_push(struct llmpar__queue *q, llmpar__stream_fn run, const void *args, size_t bytes, const void *array, size_t array_bytes);
LLMPAR__PRIVATE llmpar_status llmpar__stream_push_wait(struct llmpar__queue *q, struct llmpar__queue *other, uint64_t position);
/* Where an event recorded now stands. */
LLMPAR__PRIVATE uint64_t llmpar__stream_tail(struct llmpar__queue *q, llmpar_status *status);
/* Returns a failure at or before `position`, with its text in the device's error. */
LLMPAR__PRIVATE llmpar_status llmpar__stream_wait(struct llmpar__queue *q, uint64_t position);
LLMPAR__PRIVATE void llmpar__stream_wait_all(const llmpar__cpu *cpu);
/* The device as the calling thread is to use it. */
LLMPAR__PRIVATE llmpar_device *llmpar__stream_view(llmpar_device *device);
LLMPAR__PRIVATE llmpar_error *llmpar__stream_thread_error(llmpar_device *device);
LLMPAR__PRIVATE int32_t llmpar__stream_threads_running(llmpar_device *device);

/* Runs fn(arg, task, worker) for every task in [0, tasks), 0 <= worker < threads, and returns when all are done; on the caller's thread alone while another thread has the pool. Which worker takes which task is
   not fixed, so a task's result must not depend on it. Tasks only write memory of their own. */
LLMPAR__PRIVATE void llmpar__pool_run(llmpar__cpu *cpu, void (*fn)(void *arg, int64_t task, int32_t worker), void *arg, int64_t tasks);
LLMPAR__PRIVATE int32_t llmpar__pool_threads(const llmpar__cpu *cpu); /* >= 1 */
/* Of cpu->threads >= 2, the caller's included; cpu outlives it. Owned by the caller; destroy takes NULL and joins. */
LLMPAR__PRIVATE llmpar_status llmpar__pool_create(llmpar__cpu *cpu, llmpar_error *error, struct llmpar__pool **out);
LLMPAR__PRIVATE void llmpar__pool_destroy(struct llmpar__pool *pool);

/* A row of so many bytes; the lines that will be read and written soon are asked for, those of the next row behind this one's (elementwise.c). */
LLMPAR__PRIVATE void llmpar__copy_row(char *out, const char *in, size_t bytes, const char *next_out, const char *next_in);

/* Whether the compiler knows vdpbf16ps. A test build may define LLMPAR_BF16_EMULATED: it is replaced by AVX-512 instructions that do the same, but for numbers below the normal ones, which the real one takes and leaves as zeros. */
#if defined(__x86_64__) && !defined(LLMPAR_NO_SIMD) && ((defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 10) || defined(LLMPAR_BF16_EMULATED))
#define LLMPAR__BF16_UNITS 1
#else
#define LLMPAR__BF16_UNITS 0
#endif
/* Whether this processor has it, too (gemm_kernel.c). */
LLMPAR__PRIVATE int llmpar__gemm_has_bf16(void);
/* Slots, each in the file of its name or kind; here those whose arguments have its name and no array. */
#define LLMPAR__CPU_OPERATIONS(X) \
    X(rmsnorm) X(rmsnorm_backward) X(rope) X(attention) X(attention_backward) X(swiglu) X(swiglu_backward) X(embedding) X(embedding_backward) \
    X(add) X(scale) X(cast) X(copy_rows) X(adamw) X(square_sum) X(sgd) X(largest) X(factor_sum) X(factor_moment) X(adalomo) X(interleave)
#define LLMPAR__CPU_SLOT_OF(slot, args_type) LLMPAR__PRIVATE llmpar_status llmpar__cpu_##slot(llmpar_device *device, llmpar_stream *stream, const args_type *args);
#define LLMPAR__CPU_SLOT(slot) LLMPAR__CPU_SLOT_OF(slot, llmpar_##slot##_args)
LLMPAR__CPU_OPERATIONS(LLMPAR__CPU_SLOT)
LLMPAR__CPU_SLOT(gemm) LLMPAR__CPU_SLOT(attention_each) LLMPAR__CPU_SLOT(tree_sum) LLMPAR__CPU_SLOT(max) LLMPAR__CPU_SLOT(xent_loss) LLMPAR__CPU_SLOT(xent_backward)
LLMPAR__CPU_SLOT_OF(xent_max, llmpar_xent_args) LLMPAR__CPU_SLOT_OF(xent_sum, llmpar_xent_args) LLMPAR__CPU_SLOT_OF(adalomo_square, llmpar_adalomo_args)
#undef LLMPAR__CPU_SLOT_OF
#undef LLMPAR__CPU_SLOT
LLMPAR__PRIVATE llmpar_status llmpar__cpu_tree_sum_to(llmpar_device *device, const llmpar_tree_sum_to_args *args);
LLMPAR__PRIVATE size_t llmpar__cpu_gemm_workspace(llmpar_device *device, const llmpar_gemm_args *args);
LLMPAR__PRIVATE size_t llmpar__cpu_attention_workspace(llmpar_device *device, const llmpar_attention_args *args);
LLMPAR__PRIVATE size_t llmpar__cpu_attention_backward_workspace(llmpar_device *device, const llmpar_attention_backward_args *args);
LLMPAR__PRIVATE size_t llmpar__cpu_embedding_backward_workspace(llmpar_device *device, const llmpar_embedding_backward_args *args);
LLMPAR__PRIVATE size_t llmpar__cpu_interleave_workspace(llmpar_device *device, const llmpar_interleave_args *args);
LLMPAR__PRIVATE int32_t llmpar__cpu_interleaved_rows(llmpar_device *device, llmpar_dtype dtype);

#endif
