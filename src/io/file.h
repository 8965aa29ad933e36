/* file: the file primitives: mapped reads, atomic writes, directories. Errors name path, operation and errno text. */
#ifndef LLMPAR_FILE_H
#define LLMPAR_FILE_H

#include "base/heap.h"
#include "base/status.h"

/* A whole file mapped read-only. Plain data, closed by llmpar_file_unmap (zeroed struct is fine). */
typedef struct llmpar_mapped { const unsigned char *data; size_t bytes; void *base; } llmpar_mapped;
/* LLMPAR_ERR_IO: missing, a directory, not readable. An empty file gives data != NULL, bytes 0. Local. */
LLMPAR_API llmpar_status llmpar_file_map(const char *path, llmpar_mapped *out, llmpar_error *error);
LLMPAR_API void llmpar_file_unmap(llmpar_mapped *file);

/* Buffered writer to `path`.tmp, synced and renamed by commit; nothing under the final name before that. */
typedef struct llmpar_writer llmpar_writer;
LLMPAR_API llmpar_status llmpar_writer_open(llmpar_heap *heap, const char *path, llmpar_writer **out, llmpar_error *error);
LLMPAR_API llmpar_status llmpar_writer_write(llmpar_writer *writer, const void *data, size_t bytes, llmpar_error *error);
/* fsync, close, rename. Destroys the writer in any case; on failure the .tmp file is removed. */
LLMPAR_API llmpar_status llmpar_writer_commit(llmpar_writer *writer, llmpar_error *error);
/* Closes and removes the .tmp file. NULL is fine. */
LLMPAR_API void llmpar_writer_abandon(llmpar_writer *writer);

/* Creates a directory (parents must exist) unless it is there; checks that it can be written. */
LLMPAR_API llmpar_status llmpar_directory_ensure(const char *path, llmpar_error *error);
LLMPAR_API int llmpar_is_directory(const char *path);
LLMPAR_API int llmpar_is_file(const char *path);

#endif
