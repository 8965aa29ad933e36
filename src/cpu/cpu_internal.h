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
} llmpar__cpu;

/* Runs fn(arg, task, worker) for every task in [0, tasks), 0 <= worker < threads, and returns when all are done. Which worker takes which task is
   not fixed, so a task's result must not depend on it. Tasks only write memory of their own. */
LLMPAR__PRIVATE void llmpar__pool_run(llmpar__cpu *cpu, void (*fn)(void *arg, int64_t task, int32_t worker), void *arg, int64_t tasks);
LLMPAR__PRIVATE int32_t llmpar__pool_threads(const llmpar__cpu *cpu); /* >= 1 */
/* threads >= 2, the caller's included. Owned by the caller; destroy takes NULL and joins. */
LLMPAR__PRIVATE llmpar_status llmpar__pool_create(llmpar_heap *heap, llmpar_error *error, int32_t threads, struct llmpar__pool **out);
LLMPAR__PRIVATE void llmpar__pool_destroy(struct llmpar__pool *pool);

/* Slots: gemm.c */
LLMPAR__PRIVATE llmpar_status llmpar__cpu_gemm(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args);
LLMPAR__PRIVATE size_t llmpar__cpu_gemm_workspace(llmpar_device *device, const llmpar_gemm_args *args);
/* norm.c */
LLMPAR__PRIVATE llmpar_status llmpar__cpu_rmsnorm(llmpar_device *device, llmpar_stream *stream, const llmpar_rmsnorm_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_rmsnorm_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_rmsnorm_backward_args *args);
/* rope.c */
LLMPAR__PRIVATE llmpar_status llmpar__cpu_rope(llmpar_device *device, llmpar_stream *stream, const llmpar_rope_args *args);
/* attention.c */
LLMPAR__PRIVATE llmpar_status llmpar__cpu_attention(llmpar_device *device, llmpar_stream *stream, const llmpar_attention_args *args);
LLMPAR__PRIVATE size_t llmpar__cpu_attention_workspace(llmpar_device *device, const llmpar_attention_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_attention_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_attention_backward_args *args);
LLMPAR__PRIVATE size_t llmpar__cpu_attention_backward_workspace(llmpar_device *device, const llmpar_attention_backward_args *args);
/* swiglu.c */
LLMPAR__PRIVATE llmpar_status llmpar__cpu_swiglu(llmpar_device *device, llmpar_stream *stream, const llmpar_swiglu_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_swiglu_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_swiglu_backward_args *args);
/* embedding.c */
LLMPAR__PRIVATE llmpar_status llmpar__cpu_embedding(llmpar_device *device, llmpar_stream *stream, const llmpar_embedding_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_embedding_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_embedding_backward_args *args);
LLMPAR__PRIVATE size_t llmpar__cpu_embedding_backward_workspace(llmpar_device *device, const llmpar_embedding_backward_args *args);
/* xent.c */
LLMPAR__PRIVATE llmpar_status llmpar__cpu_xent_max(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_xent_sum(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_xent_loss(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_loss_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_xent_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_backward_args *args);
/* elementwise.c: tree_sum, max, add, scale, cast, copy_rows */
LLMPAR__PRIVATE llmpar_status llmpar__cpu_tree_sum(llmpar_device *device, llmpar_stream *stream, const llmpar_tree_sum_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_max(llmpar_device *device, llmpar_stream *stream, const llmpar_max_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_add(llmpar_device *device, llmpar_stream *stream, const llmpar_add_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_scale(llmpar_device *device, llmpar_stream *stream, const llmpar_scale_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_cast(llmpar_device *device, llmpar_stream *stream, const llmpar_cast_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_copy_rows(llmpar_device *device, llmpar_stream *stream, const llmpar_copy_rows_args *args);
/* optim.c: adamw, sgd, square_sum */
LLMPAR__PRIVATE llmpar_status llmpar__cpu_adamw(llmpar_device *device, llmpar_stream *stream, const llmpar_adamw_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_sgd(llmpar_device *device, llmpar_stream *stream, const llmpar_sgd_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_square_sum(llmpar_device *device, llmpar_stream *stream, const llmpar_square_sum_args *args);
/* adalomo.c */
LLMPAR__PRIVATE llmpar_status llmpar__cpu_largest(llmpar_device *device, llmpar_stream *stream, const llmpar_largest_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_factor_sum(llmpar_device *device, llmpar_stream *stream, const llmpar_factor_sum_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_factor_moment(llmpar_device *device, llmpar_stream *stream, const llmpar_factor_moment_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_adalomo_square(llmpar_device *device, llmpar_stream *stream, const llmpar_adalomo_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_adalomo(llmpar_device *device, llmpar_stream *stream, const llmpar_adalomo_args *args);

#endif
