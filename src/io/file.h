/* file: reading, atomic writing and directories over a table of files. io NULL: the system's files. A path that is NULL or empty: LLMPAR_ERR_ARGUMENT. Errors name path, operation and the errno's text. Everything here is local. */
#ifndef LLMPAR_FILE_H
#define LLMPAR_FILE_H

#include "base/heap.h"
#include "base/status.h"
#include "base/xxh64.h"
#include "tables/io.h"

/* An open file for reading, which may shrink or grow meanwhile: then a read fails, nothing else. Plain data; several threads may read. Closed by llmpar_file_close. */
typedef struct llmpar_file {
    const llmpar_io *io;
    int handle;             /* -1: closed */
    uint64_t bytes;         /* size when it was opened */
    uint64_t bytes_read;    /* through llmpar_file_read so far; counted atomically */
    const char *path;       /* borrowed */
} llmpar_file;
#define LLMPAR_FILE_CLOSED { NULL, -1, 0, 0, NULL }

/* LLMPAR_ERR_IO: missing, not a regular file, not readable. path is borrowed until close. */
LLMPAR_API llmpar_status llmpar_file_open(const llmpar_io *io, const char *path, llmpar_file *out, llmpar_error *error);
/* Exactly data[bytes] from `offset`. LLMPAR_ERR_IO: a failed read, or a file that ends before. */
LLMPAR_API llmpar_status llmpar_file_read(llmpar_file *file, uint64_t offset, void *data, size_t bytes, llmpar_error *error);
LLMPAR_API void llmpar_file_close(llmpar_file *file); /* a closed one is fine */
/* A whole file of at most `most` bytes, with a NUL behind it, owned by the caller (llmpar_heap_free). LLMPAR_ERR_FORMAT: it is larger. */
LLMPAR_API llmpar_status llmpar_file_load(llmpar_heap *heap, const llmpar_io *io, const char *path, size_t most, char **text, size_t *bytes, llmpar_error *error);

/* A whole file of the system mapped read-only, for texts that are read at random. Plain data, closed by llmpar_file_unmap (zeroed struct is fine). */
typedef struct llmpar_mapped { const unsigned char *data; size_t bytes; void *base; } llmpar_mapped;
/* LLMPAR_ERR_IO: missing, a directory, not readable. An empty file gives data != NULL, bytes 0. */
LLMPAR_API llmpar_status llmpar_file_map(const char *path, llmpar_mapped *out, llmpar_error *error);
LLMPAR_API void llmpar_file_unmap(llmpar_mapped *file);

/* Buffered writer to `path`.tmp, synced and renamed by commit; nothing under the final name before that. */
typedef struct llmpar_writer llmpar_writer;
LLMPAR_API llmpar_status llmpar_writer_open(llmpar_heap *heap, const llmpar_io *io, const char *path, llmpar_writer **out, llmpar_error *error);
LLMPAR_API llmpar_status llmpar_writer_write(llmpar_writer *writer, const void *data, size_t bytes, llmpar_error *error);
/* Flush, sync, close, rename: all of commit but the directory, which the caller then syncs, and memory, which stays until the writer is abandoned; so on any thread. On failure the .tmp file is removed. */
LLMPAR_API llmpar_status llmpar_writer_settle(llmpar_writer *writer, llmpar_error *error);
/* Bytes that came so far, and their XXH64; any may be NULL. */
LLMPAR_API void llmpar_writer_sum(const llmpar_writer *writer, uint64_t *bytes, uint64_t *xxh64);
/* Sync, close, rename, sync of the directory. Destroys the writer in any case; on failure the .tmp file is removed. */
LLMPAR_API llmpar_status llmpar_writer_commit(llmpar_writer *writer, llmpar_error *error);
/* Closes and removes the .tmp file. */
LLMPAR_API void llmpar_writer_abandon(llmpar_writer *writer);

/* Creates a directory (parents must exist) unless it is there; checks that it can be written. */
LLMPAR_API llmpar_status llmpar_directory_ensure(const llmpar_io *io, const char *path, llmpar_error *error);
/* The directory's entries are on the disk. */
LLMPAR_API llmpar_status llmpar_directory_sync(const llmpar_io *io, const char *path, llmpar_error *error);
LLMPAR_API llmpar_status llmpar_file_rename(const llmpar_io *io, const char *from, const char *to, llmpar_error *error);
/* A file or an empty directory; a missing one is fine. */
LLMPAR_API llmpar_status llmpar_file_remove(const llmpar_io *io, const char *path, llmpar_error *error);
/* The names in a directory but . and .., in any order, until `entry` returns -1 (0: go on). The directory is not to be changed meanwhile. */
LLMPAR_API llmpar_status llmpar_directory_list(const llmpar_io *io, const char *path, int (*entry)(void *user, const char *name), void *user, llmpar_error *error);
/* What is at path; NONE also where it cannot be looked at. */
LLMPAR_API llmpar_io_kind llmpar_file_kind(const llmpar_io *io, const char *path);
/* The same of the system's files. */
LLMPAR_API int llmpar_is_directory(const char *path);
LLMPAR_API int llmpar_is_file(const char *path);

#define LLMPAR__AGAIN(call, ...) do number = io->call(io->user, __VA_ARGS__); while (number == EINTR)

#endif
