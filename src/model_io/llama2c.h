/* llama2c: model files of llama2.c (github.com/karpathy/llama2.c, the "legacy" format, version 0) as tensors of a Hugging Face directory. Seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len;
   a negative vocab_size means that the classifier is not the embedding), then the weights as f32, little-endian, one kind after the other over all layers. io may be NULL (the system's). All local. */
#ifndef LLMPAR_LLAMA2C_H
#define LLMPAR_LLAMA2C_H

#include "io/safetensors.h"
#include "model/config.h"

typedef struct llmpar_llama2c {
    llmpar_llama_config config;       /* what the header does not say is as in llama2.c: eps 1e-5, theta 10000, bos 1, eos 2 */
    int32_t count;
    llmpar_safetensor *tensor;        /* [count] in the file's order: Hugging Face names, F32, shape; begin and bytes in the file */
    llmpar_file file;
    llmpar_heap *heap;
    char *path, *names;
} llmpar_llama2c;

/* Each header field and the file's exact size are checked before memory is taken for tensors. LLMPAR_ERR_IO, LLMPAR_ERR_FORMAT, LLMPAR_ERR_CONFIG (a field's value), LLMPAR_ERR_MEMORY. Owned by the caller, to whom it is an open file. */
LLMPAR_API llmpar_status llmpar_llama2c_open(llmpar_heap *heap, const llmpar_io *io, const char *path, llmpar_llama2c **out, llmpar_error *error);
/* to[rows, shape[1]] (a norm: to[rows]) <- rows from `row` on. llama2.c turns neighbours (2i, 2i+1) of a head by RoPE, Hugging Face (i, i + E/2): the rows of q and k come in the latter's order. LLMPAR_ERR_ARGUMENT, LLMPAR_ERR_IO. */
LLMPAR_API llmpar_status llmpar_llama2c_read(llmpar_llama2c *file, const llmpar_safetensor *tensor, int64_t row, int64_t rows, float *to, llmpar_error *error);
LLMPAR_API void llmpar_llama2c_close(llmpar_llama2c *file); /* NULL is fine */

#endif
