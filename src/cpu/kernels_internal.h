/* kernels: what the operations' files and their kernels (.inc, compiled once a level by kernels_*.c) tell each other: jobs, sizes of tasks, and the names. */
#ifndef LLMPAR_KERNELS_INTERNAL_H
#define LLMPAR_KERNELS_INTERNAL_H

#include "cpu/gemm_thin_internal.h"
#include "cpu/squares_internal.h"
#include "cpu/vector.h"

/* norm */
typedef struct llmpar__norm_job { const llmpar_rmsnorm_args *args; int64_t step; } llmpar__norm_job;
typedef struct llmpar__norm_backward_job {
    const llmpar_rmsnorm_backward_args *args;
    int64_t step;
    int64_t leaf, piece, pieces, column, columns, stride; /* a run's first leaf, its pieces and columns of dw */
    void *chains;            /* [leaves of the run][pieces][stride], of the sum type */
    int with_dx;
} llmpar__norm_backward_job;
LLMPAR__VDECLARE(norm_forward)
LLMPAR__VDECLARE(norm_dx)
LLMPAR__VDECLARE(norm_piece)
LLMPAR__VDECLARE(norm_tree)
/* The rows of a sequence that lie in the piece and in this shard. */
static inline void llmpar__norm_piece_rows(const llmpar_tokens *tokens, int64_t piece, int64_t *t0, int64_t *t1)
{
    *t0 = llmpar__v_max(llmpar_piece_begin(piece, tokens->t_total, tokens->canon), tokens->t_begin) - tokens->t_begin;
    *t1 = llmpar__v_min(llmpar_piece_begin(piece + 1, tokens->t_total, tokens->canon), tokens->t_begin + tokens->t) - tokens->t_begin;
}

/* rope */
typedef struct llmpar__rope_job { const llmpar_rope_args *args; int64_t step; } llmpar__rope_job;
LLMPAR__VDECLARE(rope_rotate)

/* attention */
enum { LLMPAR__ATTENTION_TILE = 64, LLMPAR__ATTENTION_BLOCK = 192, LLMPAR__ATTENTION_STRIP = 12, LLMPAR__ATTENTION_DECODE = 96 }; /* keys a tile, which the bits depend on; query rows a block, a strip of it, and a task of decoding at most, which they do not */
#define LLMPAR__ATTENTION_LOG2E 1.4426950408889634 /* 1 / ln 2: scores are in units of ln 2 */
#define LLMPAR__ATTENTION_LN2 0.6931471805599453
typedef struct llmpar__attention_job {
    const llmpar_attention_args *args;
    const llmpar_attention_backward_args *backward; /* NULL in forward */
    char *workspace;       /* aligned to 64 */
    size_t worker_bytes;   /* of it for each worker */
    int by_task;           /* no more tasks than workers: parts of the workspace go by task */
    int pairs;             /* scores and dP are products of BF16 as it lies, two elements at a time, as products are at this level; a pair of a row takes the place of an element */
    llmpar__half half, half_dkv; /* of dk and dv */
    int64_t ld_dk, ld_dv;
    llmpar__gemm_thin_fn decode; /* of few query rows: scores, decode_columns keys at a time */
    int64_t decode_columns;
    int64_t decode_parts;  /* tasks of a sequence: each takes neighbouring KV heads, whose rows of the cache are read together */
} llmpar__attention_job;
LLMPAR__VDECLARE(attention_forward)
LLMPAR__VDECLARE_AT(attention_decode, portable)
#if LLMPAR__VX86
LLMPAR__VDECLARE_AT(attention_decode, avx2)
LLMPAR__VDECLARE_AT(attention_decode, avx512)
#endif
LLMPAR__VDECLARE(attention_backward)
/* First position after the document that position i belongs to; *begin is its first. */
LLMPAR__PRIVATE int64_t llmpar__attention_document(const llmpar_attention_args *a, int64_t sequence, int64_t i, int64_t *begin);
/* The group's heads [0, n) split at half while even, else at the largest power of two below. */
LLMPAR__PRIVATE int64_t llmpar__attention_split(int64_t n);
/* At most so many partial sums wait at the same time while that tree is walked from left to right: log2(n) rounded up, and one. */
LLMPAR__PRIVATE int64_t llmpar__attention_slots(int64_t n);

/* swiglu */
typedef struct llmpar__swiglu_job { const llmpar_swiglu_args *forward; const llmpar_swiglu_backward_args *backward; int64_t step; } llmpar__swiglu_job;
LLMPAR__VDECLARE(swiglu_forward)
LLMPAR__VDECLARE(swiglu_backward)

/* embedding */
enum { LLMPAR__EMBEDDING_IDS = 32 }; /* ids a task */
typedef struct llmpar__embedding_backward_job {
    const llmpar_embedding_backward_args *args;
    const int64_t *begin; /* [v_local + 1]: tokens of local id v are order[begin[v]] .. order[begin[v + 1] - 1], ascending */
    const int64_t *order;
} llmpar__embedding_backward_job;
LLMPAR__VDECLARE(embedding_gradient)

/* xent */
typedef struct llmpar__xent_job { const llmpar_xent_args *args; int64_t step; double scale; } llmpar__xent_job;
LLMPAR__VDECLARE(xent_rows_max)
LLMPAR__VDECLARE(xent_rows_sum)
LLMPAR__VDECLARE(xent_rows_backward)

/* elementwise, optim: elements a task */
enum { LLMPAR__ELEMENTWISE_CHUNK = 16384, LLMPAR__OPTIM_CHUNK = 8192 };
LLMPAR__VDECLARE(elementwise_max)
LLMPAR__VDECLARE(elementwise_add)
LLMPAR__VDECLARE(elementwise_scale)
LLMPAR__VDECLARE(elementwise_cast)
LLMPAR__VDECLARE_NARROW(optim_adamw)
LLMPAR__VDECLARE_NARROW(optim_sgd)

/* adalomo */
enum { LLMPAR__ADALOMO_BLOCK = 2048, LLMPAR__ADALOMO_TASK = 16384, LLMPAR__ADALOMO_PARTS = 16, LLMPAR__ADALOMO_COLUMNS = 1024 };
typedef struct llmpar__adalomo_largest_job { const llmpar_largest_args *args; int64_t step; double part[LLMPAR__ADALOMO_PARTS]; } llmpar__adalomo_largest_job;
typedef struct llmpar__adalomo_sum_job { const llmpar_factor_sum_args *args; int64_t step, rows, parts; double down, by_row, by_col; } llmpar__adalomo_sum_job;
typedef struct llmpar__adalomo_square_job { const llmpar_adalomo_args *args; llmpar__cpu *cpu; int64_t step; llmpar_exact_sum part[LLMPAR__ADALOMO_PARTS]; } llmpar__adalomo_square_job;
typedef struct llmpar__adalomo_apply_job { const llmpar_adalomo_args *args; double keep, minus; } llmpar__adalomo_apply_job;
LLMPAR__VDECLARE_NARROW(adalomo_largest)
LLMPAR__VDECLARE_NARROW(adalomo_squares)
LLMPAR__VDECLARE_NARROW(adalomo_apply)
LLMPAR__VDECLARE(adalomo_sums)

#endif
