/* safetensors: reader (validated as the format's reference does, and stricter) and writer.
   Format: u64 little-endian header length, JSON header {name: {dtype, shape, data_offsets}}, data. */
#ifndef LLMPAR_SAFETENSORS_H
#define LLMPAR_SAFETENSORS_H

#include "base/dtype.h"
#include "base/heap.h"
#include "io/file.h"

typedef struct llmpar_safetensor {
    const char *name;
    llmpar_dtype dtype;
    int32_t dims;               /* <= 8 */
    int64_t shape[8];
    size_t begin, bytes;        /* absolute position in the file; the format does not promise alignment: copy before use as numbers */
} llmpar_safetensor;

typedef struct llmpar_safetensors {
    int32_t count;
    const llmpar_safetensor *tensor; /* sorted by name */
    const unsigned char *data;       /* open_memory: the file; else NULL */
    const llmpar_file *source;       /* the open file, which counts the bytes read; open_memory: NULL */
    const char *path;
    void *state;
} llmpar_safetensors;

/* Opens, reads the header and nothing else, validates: header length <= 100,000,000 and inside the file (checked before memory is taken for it), JSON with unique keys, known dtypes, shape
   product equal to the byte range, ranges that follow one another without gap or overlap to the end of the file. LLMPAR_ERR_IO; LLMPAR_ERR_FORMAT names path, tensor and byte
   position; LLMPAR_ERR_UNSUPPORTED: a dtype of the format that is none of ours, or more than 8 dims; LLMPAR_ERR_OVERFLOW: a shape whose product overflows. io may be NULL (the
   system's). Owned by the caller, to whom it is an open file. Local. */
LLMPAR_API llmpar_status llmpar_safetensors_open(llmpar_heap *heap, const llmpar_io *io, const char *path, llmpar_safetensors **out, llmpar_error *error);
/* The same from memory (for fuzzing); data is borrowed. name for messages. */
LLMPAR_API llmpar_status llmpar_safetensors_open_memory(llmpar_heap *heap, const void *data, size_t bytes, const char *name, llmpar_safetensors **out, llmpar_error *error);
/* to[bytes] = the tensor's bytes from `offset` (in bytes, as they stand in the file), just these. LLMPAR_ERR_ARGUMENT: outside the tensor; LLMPAR_ERR_IO: cannot read, or the file has become
   shorter. Several threads may read. Local. */
LLMPAR_API llmpar_status llmpar_safetensors_read(const llmpar_safetensors *file, const llmpar_safetensor *tensor, size_t offset, size_t bytes, void *to, llmpar_error *error);
LLMPAR_API void llmpar_safetensors_close(llmpar_safetensors *file);
LLMPAR_API const llmpar_safetensor *llmpar_safetensors_find(const llmpar_safetensors *file, const char *name); /* NULL if absent */

/* What the writer refuses of tensors (name, dtype, dims, shape), without writing. LLMPAR_ERR_ARGUMENT, LLMPAR_ERR_SHAPE, LLMPAR_ERR_OVERFLOW; path for messages. */
LLMPAR_API llmpar_status llmpar_safetensors_check(llmpar_heap *heap, const char *path, const llmpar_safetensor *tensors, int32_t count, llmpar_error *error);

/* Streaming writer: declare all tensors first (their order is the file's), then write their bytes in that order in any portions. A header written by it is padded with spaces to 8 bytes and
   carries __metadata__ {"format": "pt"}. commit checks that every byte came. */
typedef struct llmpar_safetensors_writer llmpar_safetensors_writer;
LLMPAR_API llmpar_status llmpar_safetensors_writer_open(llmpar_heap *heap, const llmpar_io *io, const char *path, const llmpar_safetensor *tensors, int32_t count, llmpar_safetensors_writer **out, llmpar_error *error); /* reads name, dtype, dims, shape */
LLMPAR_API llmpar_status llmpar_safetensors_writer_write(llmpar_safetensors_writer *writer, const void *data, size_t bytes, llmpar_error *error);
LLMPAR_API llmpar_status llmpar_safetensors_writer_commit(llmpar_safetensors_writer *writer, llmpar_error *error); /* destroys it */
LLMPAR_API llmpar_status llmpar_safetensors_writer_settle(llmpar_safetensors_writer *writer, llmpar_error *error); /* commit without the directory's sync and the destruction: see llmpar_writer_settle */
LLMPAR_API void llmpar_safetensors_writer_sum(const llmpar_safetensors_writer *writer, uint64_t *bytes, uint64_t *xxh64); /* of the file so far */
LLMPAR_API void llmpar_safetensors_writer_abandon(llmpar_safetensors_writer *writer);

#endif
