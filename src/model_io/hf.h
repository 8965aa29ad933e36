/* hf: Hugging Face directories: config.json and weights, read into any mesh and written from any mesh. */
#ifndef LLMPAR_HF_H
#define LLMPAR_HF_H

#include "model/llama.h"
#include "model_io/hf_files.h"

/* Reads DIR/config.json. LLMPAR_ERR_IO, or what llmpar_llama_config_parse says. Local. */
LLMPAR_API llmpar_status llmpar_hf_config(llmpar_ctx *ctx, const char *directory, llmpar_llama_config *out);

/* Reads DIR/model.safetensors, or the shards of DIR/model.safetensors.index.json where there is no such file, into the shards of parameters. Every rank reads headers, and of the tensors what it holds, in pieces of at most
   half a slice. f32, f64, bf16 and f16 are converted.
   Strict: every parameter exactly once with its shape, nothing else; what llmpar_hf_files_open refuses. Two things may be there that say the same once more: lm_head.weight of a tied model, if it is the embedding to the
   byte (each rank compares its part), and model.layers.N.self_attn.rotary_emb.inv_freq of older files, which is not looked at.
   Nothing is changed on any rank unless all fits on all; a read that fails later (LLMPAR_ERR_IO) leaves parameters partly read. When a rank fails, the others return LLMPAR_ERR_PEER. LLMPAR_ERR_FORMAT names the tensor. Collective. */
LLMPAR_API llmpar_status llmpar_hf_load(llmpar_fsdp *fsdp, const char *directory);

/* Zero is a default everywhere. */
typedef struct llmpar_hf_desc {
    uint64_t max_file_bytes; /* 0: one file; else shards of at most so many bytes of tensors, but at least one each */
    llmpar_dtype dtype;      /* of the file: F32, F64, BF16, F16; default: that of the shards, which is the sum type. Narrower: rounded to nearest */
} llmpar_hf_desc;

/* Writes config.json and the weights from world rank 0 as llmpar_hf_writer does (hf_files.h); never more than one tensor whole in a rank's device memory. desc NULL: defaults. When rank 0 fails, the others return LLMPAR_ERR_PEER. Collective. */
LLMPAR_API llmpar_status llmpar_hf_save(llmpar_fsdp *fsdp, const llmpar_llama_config *config, const char *directory, const llmpar_hf_desc *desc);

/* A safetensors file of whole tensors, one a parameter, from buffers laid out like the shards (parameters, gradients, moments). Units come in order 0, 1, ..: another one is
   LLMPAR_ERR_ARGUMENT. LLMPAR_ERR_IO from world rank 0, which writes; nothing stands under the final name before commit. Owned by the caller until commit or abandon. */
typedef struct llmpar_tensor_file llmpar_tensor_file;
/* units[count]: which units come, in which order; NULL: all of fsdp's in theirs. Collective. */
LLMPAR_API llmpar_status llmpar_tensor_file_open(llmpar_fsdp *fsdp, const char *path, const int32_t *units, int32_t count, llmpar_tensor_file **out);
LLMPAR_API llmpar_status llmpar_tensor_file_write(llmpar_tensor_file *file, int32_t unit, const void *shard);         /* collective */
LLMPAR_API llmpar_status llmpar_tensor_file_commit(llmpar_tensor_file *file);                                         /* collective; destroys it */
LLMPAR_API void llmpar_tensor_file_abandon(llmpar_tensor_file *file);                                                 /* local */

#endif
