/* config: the shape of a Llama or of a near relative: presets, reading and writing a Hugging Face config.json, and what follows from the shape alone
   (parameter count, FLOPs, RoPE tables). Plain data, all functions are local and pure. Shape letters: V vocab, D hidden, F intermediate, L layers, H heads, K kv heads, E head dim, T positions. */
#ifndef LLMPAR_CONFIG_H
#define LLMPAR_CONFIG_H

#include "base/dtype.h"
#include "base/heap.h"
#include "base/status.h"

typedef enum llmpar_rope_kind { LLMPAR_ROPE_NONE = 0, LLMPAR_ROPE_LINEAR = 1, LLMPAR_ROPE_LLAMA3 = 2, LLMPAR_ROPE_DYNAMIC = 3, LLMPAR_ROPE_YARN = 4 } llmpar_rope_kind;

/* How RoPE frequencies are stretched to longer contexts (transformers: modeling_rope_utils). Unused fields are 0. */
typedef struct llmpar_rope_scaling {
    llmpar_rope_kind kind;
    int32_t original_max_positions; /* llama3, yarn: the context of pre-training */
    double factor;                  /* all; >= 1 */
    double low_freq_factor;         /* llama3 */
    double high_freq_factor;        /* llama3; > low_freq_factor */
    double attention_factor;        /* yarn: cos and sin are multiplied by it; what a file's mscale and mscale_all_dim, or nothing, stand for is worked out when it is read */
    double beta_fast, beta_slow;    /* yarn: rotations within the original context above which a frequency is kept, below which it is divided by factor; beta_fast >= beta_slow */
    int32_t truncate;               /* yarn: 1: the dims between which frequencies blend are whole numbers */
} llmpar_rope_scaling;

/* What differs between the models that are built. MISTRAL: a sliding window. QWEN2: biases on q, k and v. QWEN3: RMSNorm over each head of q and of k, before RoPE. */
typedef enum llmpar_family { LLMPAR_FAMILY_LLAMA = 0, LLMPAR_FAMILY_MISTRAL = 1, LLMPAR_FAMILY_QWEN2 = 2, LLMPAR_FAMILY_QWEN3 = 3 } llmpar_family;

#define LLMPAR_MAX_EOS 8

typedef struct llmpar_llama_config {
    int32_t vocab;          /* V */
    int32_t hidden;         /* D */
    int32_t intermediate;   /* F */
    int32_t layers;         /* L */
    int32_t heads;          /* H query heads */
    int32_t kv_heads;       /* K, divides H */
    int32_t head_dim;       /* E, even; H * E may differ from D */
    int32_t max_positions;  /* longest T the model was made for */
    double rms_eps, rope_theta;
    llmpar_rope_scaling rope_scaling;
    int32_t tied;           /* 1: lm_head.weight is model.embed_tokens.weight */
    int32_t bos_id;         /* -1: none */
    int32_t eos_count;      /* 0: none */
    int32_t eos_id[LLMPAR_MAX_EOS]; /* any of these ends a text */
    double init_std;        /* standard deviation of initial weights */
    llmpar_family family;
    int32_t sliding_window; /* MISTRAL: a position sees this many, itself included; 0: all. Attention is always whole: llmpar_llama_apply refuses sequences longer than the window */
} llmpar_llama_config;

/* "tiny" (bytes, < 1 M parameters), "15m", "110m" (llama2.c's stories models), "300m", "1b" (Llama 3.2 1B). LLMPAR_ERR_CONFIG lists the names. */
LLMPAR_API llmpar_status llmpar_llama_preset(const char *name, llmpar_llama_config *out, llmpar_error *error);

/* Reads a Hugging Face config.json: text[length], `name` for messages (NULL: "config.json"). Defaults are those of transformers' class for the model_type (llama, mistral, qwen2, qwen3). A field that would change the
   mathematics and is not supported is refused by name; other unknown fields are ignored. The result has passed llmpar_llama_config_check.
   LLMPAR_ERR_FORMAT (no JSON), LLMPAR_ERR_CONFIG (a field's value), LLMPAR_ERR_UNSUPPORTED: field, value, expectation, byte position. */
LLMPAR_API llmpar_status llmpar_llama_config_parse(llmpar_heap *heap, const char *text, size_t length, const char *name, llmpar_llama_config *out, llmpar_error *error);

/* Everything a model takes for granted: positive sizes, K divides H, even E, finite positive reals, ids inside the vocabulary, and tensor
   sizes and parameter bytes that fit. LLMPAR_ERR_CONFIG names the field. */
LLMPAR_API llmpar_status llmpar_llama_config_check(const llmpar_llama_config *config, llmpar_error *error);

/* A config.json that transformers loads and llmpar_llama_config_parse reads back to the same struct, bit for bit. Returns the bytes needed without the final NUL; writes
   nothing past `capacity` (text may be NULL when capacity is 0). No dtype is written: transformers takes the weights' own. */
LLMPAR_API size_t llmpar_llama_config_write(const llmpar_llama_config *config, char *text, size_t capacity);

/* All parameters, tied embeddings once. */
LLMPAR_API int64_t llmpar_llama_param_count(const llmpar_llama_config *config);

/* Forward and backward of one token: 6N + 12*L*H*E*T. N = parameters that multiply: all but the token embedding table, which is a look-up. Tied or
   not, the output projection counts as V*D: its product is computed. (torchtitan leaves it out when tied; untied the counts agree.) No recomputation, no saving for causality. */
LLMPAR_API double llmpar_llama_flops_per_token(const llmpar_llama_config *config, int64_t seq_len);

/* out[E/2]: the angle a position adds in pair i (elements i and i + E/2), after scaling, in sequences of `positions`; computed in f64. Only `dynamic` looks at positions: up to max_positions it scales nothing, for
   longer sequences the base grows with their length, and transformers' frequencies are these for sequences of exactly that length (llmpar_llama_apply and the runs after it refuse others by name). */
LLMPAR_API void llmpar_rope_inv_freq(const llmpar_llama_config *config, int64_t positions, double *out);

/* cosine, sine [positions, E/2] of position * inv_freq (yarn: times attention_factor), from f64 and rounded once to dtype (LLMPAR_F32 or LLMPAR_F64). transformers computes inv_freq and
   the angle in f32: its angle at position p is off by up to about p * 2^-23 rad, this one by p * 2^-52. LLMPAR_ERR_ARGUMENT: another dtype, negative
   positions, or an angle beyond 1e9. Uses `heap` for E/2 doubles. */
LLMPAR_API llmpar_status llmpar_rope_tables(llmpar_heap *heap, const llmpar_llama_config *config, int64_t positions, llmpar_dtype dtype, void *cosine, void *sine, llmpar_error *error);

#endif
