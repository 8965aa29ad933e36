/* hf: Hugging Face directories: config.json and model.safetensors, read into any mesh and written from any mesh. */
#ifndef LLMPAR_HF_H
#define LLMPAR_HF_H

#include "io/safetensors.h"
#include "model/llama.h"

/* Reads DIR/config.json. LLMPAR_ERR_IO, or what llmpar_llama_config_parse says. Local. */
LLMPAR_API llmpar_status llmpar_hf_config(llmpar_ctx *ctx, const char *directory, llmpar_llama_config *out);

/* Reads DIR/model.safetensors into the shards: every rank maps the file and takes its own part; a tensor of another dtype, or one that lies unaligned, is whole on the rank's heap while it is
   converted or copied. Strict: every parameter exactly once with its shape, nothing else in the file; f32, f64, bf16
   and f16 are converted. LLMPAR_ERR_FORMAT names the tensor. Nothing is changed unless all names and shapes fit. Local on every rank (all ranks call it). */
LLMPAR_API llmpar_status llmpar_hf_load(llmpar_fsdp *fsdp, const char *directory);

/* Writes config.json and model.safetensors (dtype of the shards) from world rank 0; never more than one tensor whole on a rank. The directory is made unless it is there; files appear under their names only when
   complete. When rank 0 fails, the others return LLMPAR_ERR_PEER. Collective. */
LLMPAR_API llmpar_status llmpar_hf_save(llmpar_fsdp *fsdp, const llmpar_llama_config *config, const char *directory);

/* A safetensors file of whole tensors, one a parameter, from buffers laid out like the shards (parameters, gradients, moments). Units come in order 0, 1, ..: another one is
   LLMPAR_ERR_ARGUMENT. LLMPAR_ERR_IO from world rank 0, which writes; nothing stands under the final name before commit. Owned by the caller until commit or abandon. */
typedef struct llmpar_tensor_file llmpar_tensor_file;
/* units[count]: which units come, in which order; NULL: all of fsdp's in theirs. Collective. */
LLMPAR_API llmpar_status llmpar_tensor_file_open(llmpar_fsdp *fsdp, const char *path, const int32_t *units, int32_t count, llmpar_tensor_file **out);
LLMPAR_API llmpar_status llmpar_tensor_file_write(llmpar_tensor_file *file, int32_t unit, const void *shard);         /* collective */
LLMPAR_API llmpar_status llmpar_tensor_file_commit(llmpar_tensor_file *file);                                         /* collective; destroys it */
LLMPAR_API void llmpar_tensor_file_abandon(llmpar_tensor_file *file);                                                 /* NULL is fine; local */

#endif
