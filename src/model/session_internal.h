/* session_internal: inference on gathered parameters, rows in, logits out; and how an id is chosen from logits. */
#ifndef LLMPAR_SESSION_INTERNAL_H
#define LLMPAR_SESSION_INTERNAL_H

#include "model/llama.h"
#include "model/llama_internal.h"

#if !defined(LLMPAR_NO_LLAMA)

/* Rows of one text that go together: the ids at `position` on. */
typedef struct llmpar__span { int64_t slot, position, count; } llmpar__span;

/* Inference under tensor parallelism: the block's forward with a KV cache, on parameters that stay gathered, and are lent to the session that generates.
   Buffers for at most `rows` rows at once, and for the logits of `head_rows` of them. `slots` texts are known at once, each of at most `capacity` ids: their ids, and their k, then v, for every layer, [slots][L][2][capacity, k*E]. */
typedef struct llmpar__session {
    llmpar_llama *model;
    llmpar_fsdp *fsdp;
    llmpar_device *device;
    llmpar_stream *stream;
    llmpar_tp tp;                  /* the model's, without sequence parallel */
    llmpar__shape s;               /* b = 1, t = rows */
    llmpar_dtype dtype;
    int64_t rows, head_rows, slots, capacity;
    llmpar__span *spans;           /* [slots]: of the rows that go now */
    llmpar_attention_args *attentions; /* [slots]: of these spans */
    size_t workspace_bytes, cache_bytes;
    void *block, *cache, *workspace; /* block: all activations */
    void *x, *h, *q, *o, *part, *sum, *rstd, *gate, *logits; /* q or o: behind a text's one row may come its k and v; part, rstd: sum type; sum: the reduced part, = part where they are of one type; gate: behind its rows, or each of them,
                                                                come those of up; k and v of several texts on their way into the cache */
    int32_t *ids;                  /* device [rows] */
    float *host;                   /* [head_rows, V] logits as f32 */
    void *gathered;                /* device [tp, head_rows, widest vocabulary part] */
    char *staging;                 /* host [staging_bytes], for copies: logits as they come, [tp, head_rows, widest part]; behind them all texts' ids by position */
    int32_t *host_ids;             /* [slots][capacity], in staging */
    size_t staging_bytes;
    void *const **params;          /* [units], each gathered while the session is open */
    int32_t unsharded_units;
    int lent;                      /* the parameters are this session's */
    llmpar_interleave_args *weights; /* [layers * 7 + 1], by llmpar__session_weight; NULL: they lie as ever */
    int32_t interleaved;           /* of these: all or none but while they are turned */
} llmpar__session;

/* session.c */
/* Where the cache has k of this layer from position 0 of a slot on; v: behind `capacity` of them. */
LLMPAR__PRIVATE char *llmpar__session_cache(const llmpar__session *g, int64_t slot, int32_t layer);
/* Whether products of few rows may read all weights as streams: rows, and the pieces of each sum, are whole words. */
LLMPAR__PRIVATE int llmpar__session_streams(const llmpar__session *g);
/* rows go at once at most, head_rows of them get logits. borrower: to whom the parameters are lent; NULL: they are only read, and not for long. After a failure too llmpar__session_close is due. */
LLMPAR__PRIVATE llmpar_status llmpar__session_open(llmpar_llama *model, llmpar_fsdp *fsdp, int64_t rows, int64_t head_rows, int64_t slots, int64_t capacity, const char *borrower, llmpar__session *g);
/* While a session generates, weights that meet one row at a time have their rows interleaved, in place: there is no second copy. Each is turned before the next, on this thread, so that it is known what has to be turned back. */
LLMPAR__PRIVATE llmpar_status llmpar__session_interleave(llmpar__session *g);
/* Returns `status`, or if it is none a failure of its own. */
LLMPAR__PRIVATE llmpar_status llmpar__session_close(llmpar__session *g, llmpar_status status);
/* Logits of `count` rows of x beginning at `first`, whole vocabulary, as f32 in g->host[count, V]. */
LLMPAR__PRIVATE llmpar_status llmpar__session_head(llmpar__session *g, int64_t first, int64_t count);
/* An error that begins with `what` where one of them is not in the vocabulary. */
LLMPAR__PRIVATE llmpar_status llmpar__session_ids(const llmpar_llama *model, const char *what, const int32_t *ids, int64_t count);
/* x of the rows of all spans, whose ids are in host_ids; the cache then knows their keys and values. */
LLMPAR__PRIVATE llmpar_status llmpar__session_forward(llmpar__session *g, int32_t spans);

/* sample.c */
/* The largest of finite logits, the first of equals; -1: not all are finite. masked: some, not all, may be -inf. As integers of the same order, so that compilers vectorise it. */
LLMPAR__PRIVATE int32_t llmpar__sample_greedy(const float *logits, int32_t vocab, int masked);
/* As temperature, top_k and top_p of desc say: logits become probabilities at this temperature; order[vocab] is scratch. `uniform` in [0, 1). */
LLMPAR__PRIVATE int32_t llmpar__sample_nucleus(float *logits, int32_t vocab, int32_t largest, const llmpar_generate_desc *desc, double uniform, int32_t *order);

#endif /* LLMPAR_NO_LLAMA */

#endif
