/* data: token sequences for training and evaluation out of one text. Plain data, no allocation; every function is local and pure, so ranks agree without talking.

     tokens:  |---------------- training ----------------|-- held out (the end) --|
     epoch 0:   .|--T--|--T--|--T--|--T--|--T--|--T--|--T--|..    the dots: a phase drawn per epoch
     epoch 1:   ....|--T--|--T--|--T--|--T--|--T--|--T--|--T--|   (other cuts each epoch)

   The order. A sequence is known by its global index g = step * B + i (i-th sequence of a step with B sequences over all ranks and micro-batches). The training part is cut
   into S windows; epoch e = g / S starts its first window at phase(seed, e), and g mod S goes through a permutation keyed by (seed, e): every window once an epoch, in shuffled order.
   Nothing else enters, so neither the mesh nor the number of micro-batches can change what a step sees. */
#ifndef LLMPAR_DATA_H
#define LLMPAR_DATA_H

#include "base/status.h"

/* Fills tokens[T+1] of the training sequence `global_index` >= 0: T inputs, each followed by its target. Must be a pure function of the index. */
typedef llmpar_status (*llmpar_sequence_fn)(void *user, int64_t global_index, int32_t *tokens);

typedef struct llmpar_data_desc {
    const void *bytes;   /* the text, borrowed as long as the llmpar_data is used; each byte is a token (vocabulary 256) */
    size_t count;        /* bytes */
    int64_t seq_len;     /* T >= 1 */
    uint64_t seed;
    double held_out;     /* share of the text at its end that is never trained on; default 0.05; below 1 */
    int32_t no_held_out; /* 1: nothing is held out */
    const char *name;    /* for messages, default "data"; not kept */
} llmpar_data_desc;

typedef struct llmpar_data {
    const unsigned char *tokens; /* borrowed */
    int64_t train_count;         /* tokens[0 .. train_count) are trained on */
    int64_t eval_count;          /* the ones behind them are held out */
    int64_t seq_len;             /* T */
    int64_t windows;             /* S: training sequences in an epoch, >= 1 */
    int64_t phases;              /* an epoch's phase is in [0, phases), 1 <= phases <= T */
    int64_t eval_windows;        /* whole sequences in the held-out part; 0 only if nothing is held out */
    uint64_t seed;
} llmpar_data;

/* LLMPAR_ERR_ARGUMENT: a field of the desc. LLMPAR_ERR_FORMAT: no data, or less than one sequence (T+1 tokens) in either part; the text has the numbers. */
LLMPAR_API llmpar_status llmpar_data_init(const llmpar_data_desc *desc, llmpar_data *out, llmpar_error *error);

/* A llmpar_sequence_fn: data points to a llmpar_data, which is only read. LLMPAR_ERR_ARGUMENT for a negative index. */
LLMPAR_API llmpar_status llmpar_data_sequence(void *data, int64_t global_index, int32_t *tokens);

/* tokens[T+1] of held-out sequence `index` in [0, eval_windows): consecutive windows, so that their targets are tokens [train_count + 1, train_count + eval_windows * T]. */
LLMPAR_API llmpar_status llmpar_data_eval_sequence(const llmpar_data *data, int64_t index, int32_t *tokens);

#endif
