/* hf_files: the weight files of a Hugging Face directory, model.safetensors or model.safetensors.index.json and its shards, read and written by one process without knowing a model. io may be NULL (the system's). All local. */
#ifndef LLMPAR_HF_FILES_H
#define LLMPAR_HF_FILES_H

#include "base/json.h"
#include "io/safetensors.h"

#define LLMPAR_HF_MAX_FILES 1024 /* shards of one model; each is an open file while it is read */

/* What an index says. Freed by llmpar_hf_index_free; a zeroed struct is fine. */
typedef struct llmpar_hf_index {
    int32_t count, files;
    const char **tensor;   /* [count] names, each once */
    int32_t *place;        /* [count] which file */
    const char **file;     /* [files] names, each once */
    int64_t total_size;    /* metadata.total_size; -1: not stated */
    llmpar_json *json;     /* owns the texts */
} llmpar_hf_index;

/* {"metadata": {"total_size": N, ..}, "weight_map": {tensor: file, ..}}, metadata optional, nothing else. A file's name is one in the directory: not empty, without '/', '\' and "..". LLMPAR_ERR_FORMAT names what is wrong;
   LLMPAR_ERR_UNSUPPORTED: more files than LLMPAR_HF_MAX_FILES; LLMPAR_ERR_MEMORY. name for messages. */
LLMPAR_API llmpar_status llmpar_hf_index_parse(llmpar_heap *heap, const char *text, size_t length, const char *name, llmpar_hf_index *out, llmpar_error *error);
LLMPAR_API void llmpar_hf_index_free(llmpar_heap *heap, llmpar_hf_index *index);

/* The open files of a directory. */
typedef struct llmpar_hf_files {
    int32_t count, tensors;          /* files; tensors in all of them */
    llmpar_safetensors **file;       /* [count] */
    const char *path;                /* of the file or the index, for messages */
    llmpar_heap *heap;
} llmpar_hf_files;

/* Where there are both, model.safetensors is taken, as transformers does. Each tensor stands in exactly the file that the index says, and in no other; nothing else does; metadata.total_size, where it is stated, is the sum
   of their bytes. Reads headers only. LLMPAR_ERR_IO; LLMPAR_ERR_FORMAT names file and tensor; else what the files' own headers are refused with. Owned by the caller. */
LLMPAR_API llmpar_status llmpar_hf_files_open(llmpar_heap *heap, const llmpar_io *io, const char *directory, llmpar_hf_files **out, llmpar_error *error);
LLMPAR_API void llmpar_hf_files_close(llmpar_hf_files *files);
/* NULL if no file has it; else *file is the one that does. */
LLMPAR_API const llmpar_safetensor *llmpar_hf_files_find(const llmpar_hf_files *files, const char *name, const llmpar_safetensors **file);

/* Writes a directory: all tensors are declared first, then their bytes follow in that order in any portions. max_bytes > 0: a file takes tensors until the next one would go beyond that many bytes of data (one that is larger
   has a file of its own); where that makes several, they are model-00001-of-0000N.safetensors, and an index. Else one model.safetensors.
   Until commit, the directory loads as before: shards are written under names that end in .part. commit then writes config.json, and
     one file:  renames it into place, then removes an old index and old shards, which it outranks anyway;
     several:   removes what would be loaded instead (an old model.safetensors, an old index), gives the shards their names, writes the index, and removes older shards.
   So a crash leaves what was there, or all that is new, or a directory that is refused, and never a mixture. The directory is made unless it is there. */
typedef struct llmpar_hf_writer llmpar_hf_writer;
/* tensors[count] (name, dtype, dims, shape) and their names are borrowed until commit or abandon; config, the text of config.json, is copied; NULL: none is written. */
LLMPAR_API llmpar_status llmpar_hf_writer_open(llmpar_heap *heap, const llmpar_io *io, const char *directory, const llmpar_safetensor *tensors, int32_t count, uint64_t max_bytes, const char *config, llmpar_hf_writer **out, llmpar_error *error);
LLMPAR_API llmpar_status llmpar_hf_writer_write(llmpar_hf_writer *writer, const void *data, size_t bytes, llmpar_error *error);
LLMPAR_API llmpar_status llmpar_hf_writer_commit(llmpar_hf_writer *writer, llmpar_error *error); /* destroys it in any case */
LLMPAR_API void llmpar_hf_writer_abandon(llmpar_hf_writer *writer);                               /* removes what it made */

#endif
