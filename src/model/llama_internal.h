/* llama_internal: the model's state and the shapes its unit files share. */
#ifndef LLMPAR_LLAMA_INTERNAL_H
#define LLMPAR_LLAMA_INTERNAL_H

#include "model/llama.h"

#if !defined(LLMPAR_NO_LLAMA)

/* A list of unit instructions with the condition under which each exists. The middle of the model is a row of halves, attention and MLP by turns, and a unit holds some neighbours of them: a row that is for halves in a certain
   place of their unit says so. Waits count within the half; LLMPAR__HALF_BEFORE is the joint row of the half whose rows come before. output_only is said of the unit's last half. */
enum { LLMPAR__ALWAYS = 0, LLMPAR__IF_TP = 1, LLMPAR__IF_SP = 2, LLMPAR__IF_KV = 3, LLMPAR__IF_QK = 4, LLMPAR__IF_QK_TP = 5 }; /* QK: q and k are normalised */
enum { LLMPAR__ANYWHERE = 0, LLMPAR__FIRST = 1, LLMPAR__NOT_FIRST = 2, LLMPAR__LAST = 3, LLMPAR__JOINT = 16 };
enum { LLMPAR__HALF_BEFORE = -1 };
typedef struct llmpar__op_row { llmpar_unit_op op; int32_t when, place; } llmpar__op_row;
typedef struct llmpar__op_list { llmpar_unit_op *ops; int32_t count; } llmpar__op_list;

/* A unit's user. Half h of the model is the attention of block h/2 (h even) or its MLP. */
typedef struct llmpar__part {
    const llmpar_llama *model;
    int32_t first, halves;         /* 0 halves: embedding or head */
    int32_t list;                  /* of model->lists */
} llmpar__part;
enum { LLMPAR__EMBED = 0, LLMPAR__HEAD = 1, LLMPAR__BODY = 2, LLMPAR__BODY_LAST = 3, LLMPAR__LISTS = 4 }; /* BODY_LAST: the MLP of half blocks, or the blocks that are left for the last unit */
enum { LLMPAR__WRAP_MOST = 8 };    /* blocks a unit */

/* Parameters of a block, in flat order: those of the attention, from NORM2 on those of the MLP. Which there are, and the place of each, says llmpar_llama.place. */
enum { LLMPAR__NORM1 = 0, LLMPAR__WQ, LLMPAR__WK, LLMPAR__WV, LLMPAR__WO, LLMPAR__BQ, LLMPAR__BK, LLMPAR__BV, LLMPAR__QNORM, LLMPAR__KNORM, LLMPAR__NORM2, LLMPAR__GATE, LLMPAR__UP, LLMPAR__DOWN, LLMPAR__BLOCK_PARAMS };

struct llmpar_llama {
    llmpar_ctx *ctx;
    llmpar_llama_config config;
    uint64_t seed;
    int32_t place[LLMPAR__BLOCK_PARAMS]; /* of each parameter of a block among those that there are; -1: not in this family */
    int32_t block_params;          /* how many there are */
    int32_t wrap;                  /* halves a unit */
    int32_t unit_count;
    int64_t logits_bytes;
    llmpar_unit *units;            /* [unit_count]: embedding, halves, head */
    llmpar__part *parts;           /* [unit_count]: their users */
    llmpar_param *params;          /* all units' parameters */
    char *names;                   /* text of all names */
    llmpar__op_list lists[LLMPAR__LISTS][2]; /* forward, backward */
    llmpar_tp tp;
    llmpar_dtype dtype;
    int64_t positions;
    void *cosine, *sine;           /* device [positions, E/2], sum type */
    void *one;                     /* device: the number 1 of the compute dtype, the input that a bias is the weight of; NULL without biases */
    int applied;                   /* 0 no, 1 begun, 2 done */
};

/* Local extents of one micro-batch. */
typedef struct llmpar__shape {
    int64_t b, t, n;          /* sequences, tokens each, all rows */
    int64_t ts, ns;           /* tokens and rows of the residual stream on this rank */
    int64_t d, f, h, k, e;    /* hidden; local F, query heads, kv heads; head dim */
    int64_t qkv;              /* (h + 2k)*e: a token's q, k and v */
    int64_t v, v_begin;       /* local vocabulary */
    int64_t leaves;
    size_t size, sum_size;    /* bytes of an element, and of one of the sum type */
    llmpar_dtype dtype, sum;
} llmpar__shape;

LLMPAR__PRIVATE void llmpar__llama_shape(const llmpar_llama *model, const llmpar_micro *micro, llmpar_dtype dtype, llmpar__shape *out);
/* Next `elements` elements of a buffer of which *at bytes are taken; returns their byte offset, a multiple of 64. */
LLMPAR__PRIVATE size_t llmpar__llama_take(size_t *at, int64_t elements, size_t size);

/* block.c: the rows of one half */
LLMPAR__PRIVATE llmpar_status llmpar__block_sizes(void *user, const llmpar_micro *micro, llmpar_dtype dtype, llmpar_unit_sizes *out);
LLMPAR__PRIVATE const llmpar__op_row *llmpar__block_ops(int mlp, int backward, int32_t *count);
/* A row-parallel product's one operand: a[N, grains*grain] w[D, grains*grain]^T. */
LLMPAR__PRIVATE void llmpar__llama_row(const llmpar_tp *tp, const void *a, const void *w, int64_t grains, int64_t grain, llmpar_tp_operand *operand);
/* The unit that holds half `half` of the model, and the place of the half's first parameter in it. */
LLMPAR__PRIVATE int32_t llmpar__llama_home(const llmpar_llama *model, int32_t half, int32_t *param);
/* edges.c: embedding (parameter 0: the table) and head (0: norm; 1 or borrowed 0: the output projection) */
LLMPAR__PRIVATE llmpar_status llmpar__embed_sizes(void *user, const llmpar_micro *micro, llmpar_dtype dtype, llmpar_unit_sizes *out);
LLMPAR__PRIVATE llmpar_status llmpar__head_sizes(void *user, const llmpar_micro *micro, llmpar_dtype dtype, llmpar_unit_sizes *out);
LLMPAR__PRIVATE const llmpar__op_row *llmpar__embed_ops(int backward, int32_t *count);
LLMPAR__PRIVATE const llmpar__op_row *llmpar__head_ops(int backward, int32_t *count);

LLMPAR__PRIVATE double llmpar__llama_scale(const llmpar_llama *model); /* of attention scores: 1/sqrt(E) */

/* dx = dresidual + norm backward of dy; per-leaf weight gradients into dw_leaves (not for a frozen unit), to be combined by llmpar__llama_norm_weight. */
LLMPAR__PRIVATE llmpar_status llmpar__llama_norm_backward(const llmpar_unit_call *call, const llmpar__shape *s, const void *dy, const void *x, const void *w, const void *rstd, const void *dresidual, void *dx, void *dw_leaves);
/* Sequence parallel: sums dw_leaves[leaves, D] over tp, leaf by leaf. */
LLMPAR__PRIVATE llmpar_status llmpar__llama_norm_reduce(const llmpar_unit_call *call, const llmpar__shape *s, void *dw_leaves);
/* dw[dim] = tree over leaves. */
LLMPAR__PRIVATE llmpar_status llmpar__llama_norm_weight(const llmpar_unit_call *call, const llmpar__shape *s, int64_t dim, const void *dw_leaves, void *dw);
/* Where every mesh sums the weights of norms over heads: sum[count] over tp, leaf by leaf. */
LLMPAR__PRIVATE llmpar_status llmpar__llama_sum_leaves(const llmpar_unit_call *call, const char *tag, int64_t count, void *leaves);
/* out[rows, width], rows ldo apart, = in[rows, D] w[width, D]^T + bias[width] (NULL: none), one chain an element: D products, then the bias. interleaved: w's rows are, as in llmpar_gemm_segment. */
LLMPAR__PRIVATE llmpar_status llmpar__llama_linear(const llmpar_llama *model, llmpar_stream *stream, int64_t rows, int64_t width, const void *in, const void *w, int32_t interleaved, const void *bias, void *out, int64_t ldo, void *workspace, size_t workspace_bytes);
LLMPAR__PRIVATE size_t llmpar__llama_linear_workspace(const llmpar_llama *model, int64_t rows, int64_t width, llmpar_dtype dtype);
/* Whether sequences of t tokens, or such as grow (0), may run: dynamic RoPE beyond max_positions knows one length. */
LLMPAR__PRIVATE llmpar_status llmpar__llama_check_length(const llmpar_llama *model, int64_t t);
LLMPAR__PRIVATE llmpar_status llmpar__llama_rmsnorm(llmpar_ctx *ctx, llmpar_stream *stream, const llmpar_llama *model, int64_t rows, int64_t dim, const void *x, const void *residual, const void *w, void *sum, void *y, void *rstd);

#endif /* LLMPAR_NO_LLAMA */

#endif
