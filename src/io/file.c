#include "io/file.h"

#include "io/system.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#if !defined(LLMPAR_NO_IO)

#define LLMPAR__FILE_BUFFER ((size_t)256 << 10)

static const unsigned char llmpar__file_nothing[1] = { 0 }; /* what an empty file's `data` points to */

static llmpar_status llmpar__file_error(llmpar_error *error, const char *path, const char *operation, int number)
{
    return llmpar_error_set(error, LLMPAR_ERR_IO, "%s: %s: %s", path, operation, strerror(number));
}

static const llmpar_io *llmpar__file_io(const llmpar_io *io) { return io ? io : llmpar_io_system(); }

static const char *llmpar__file_kind_name(llmpar_io_kind kind)
{
    return kind == LLMPAR_IO_FILE ? "regular file" : kind == LLMPAR_IO_FOLDER ? "directory" : kind == LLMPAR_IO_PIPE ? "pipe" : "device or socket";
}

static int llmpar__file_begin(const llmpar_io *io, const char *path, llmpar_io_mode mode, int *handle)
{
    int number;
    LLMPAR__AGAIN(open, path, mode, handle);
    return number;
}

static int llmpar__file_sync(const llmpar_io *io, int handle)
{
    int number;
    LLMPAR__AGAIN(sync, handle);
    return number;
}

/* POSIX leaves open whether an interrupted close has closed; everywhere we run it has. */
static int llmpar__file_end(const llmpar_io *io, int handle)
{
    int number = io->close(io->user, handle);
    return number == EINTR ? 0 : number;
}

LLMPAR_DEF llmpar_io_kind llmpar_file_kind(const llmpar_io *io, const char *path)
{
    llmpar_io_kind kind = LLMPAR_IO_NONE;
    uint64_t bytes;
    int number = EINVAL;
    io = llmpar__file_io(io);
    if (path) LLMPAR__AGAIN(look, path, &kind, &bytes);
    return number ? LLMPAR_IO_NONE : kind;
}

LLMPAR_DEF int llmpar_is_directory(const char *path) { return llmpar_file_kind(NULL, path) == LLMPAR_IO_FOLDER; }
LLMPAR_DEF int llmpar_is_file(const char *path) { return llmpar_file_kind(NULL, path) == LLMPAR_IO_FILE; }

/* ---- reading ---- */

LLMPAR_DEF llmpar_status llmpar_file_open(const llmpar_io *io, const char *path, llmpar_file *out, llmpar_error *error)
{
    llmpar_io_kind kind = LLMPAR_IO_NONE;
    uint64_t bytes = 0;
    int number;
    memset(out, 0, sizeof *out);
    out->handle = -1;
    LLMPAR__NEED_PATH(path, error);
    out->io = io = llmpar__file_io(io);
    out->path = path;
    LLMPAR__AGAIN(look, path, &kind, &bytes);
    if (number || kind == LLMPAR_IO_NONE) return llmpar__file_error(error, path, "cannot open", number ? number : ENOENT);
    if (kind != LLMPAR_IO_FILE) return llmpar_error_set(error, LLMPAR_ERR_IO, "%s: expected a regular file, got a %s", path, llmpar__file_kind_name(kind));
    number = llmpar__file_begin(io, path, LLMPAR_IO_READ, &out->handle);
    if (number) {
        out->handle = -1;
        return llmpar__file_error(error, path, "cannot open", number);
    }
    out->bytes = bytes;
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_file_read(llmpar_file *file, uint64_t offset, void *data, size_t bytes, llmpar_error *error)
{
    unsigned char *to = (unsigned char *)data;
    LLMPAR__NEED(file, error);
    while (bytes > 0) {
        size_t got = 0;
        int number = file->io->read(file->io->user, file->handle, to, bytes, offset, &got);
        if (number == EINTR) continue;
        if (number) return llmpar__file_error(error, file->path, "cannot read", number);
        if (got == 0) return llmpar_error_set(error, LLMPAR_ERR_IO, "%s: ends at byte %llu, expected %zu more (%llu when it was opened)", file->path, (unsigned long long)offset, bytes, (unsigned long long)file->bytes);
        to += got;
        offset += got;
        bytes -= got;
        __atomic_fetch_add(&file->bytes_read, (uint64_t)got, __ATOMIC_RELAXED);
    }
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_file_close(llmpar_file *file)
{
    if (!file) return;
    if (file->handle >= 0) llmpar__file_end(file->io, file->handle); /* nothing was written: what close says changes nothing */
    file->handle = -1;
}

LLMPAR_DEF llmpar_status llmpar_file_load(llmpar_heap *heap, const llmpar_io *io, const char *path, size_t most, char **text, size_t *bytes, llmpar_error *error)
{
    llmpar_file file;
    *text = NULL;
    *bytes = 0;
    LLMPAR__NEED(heap, error);
    LLMPAR__NEED_PATH(path, error);
    llmpar_status status = llmpar_file_open(io, path, &file, error);
    if (status) return status;
    if (file.bytes > most) status = llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: %llu bytes, expected at most %zu", path, (unsigned long long)file.bytes, most);
    if (!status) *text = LLMPAR__ALLOC(char, heap, (size_t)file.bytes + 1);
    if (!status && !*text) status = llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory for %llu bytes", path, (unsigned long long)file.bytes);
    if (!status) status = llmpar_file_read(&file, 0, *text, (size_t)file.bytes, error);
    llmpar_file_close(&file);
    if (status) {
        llmpar_heap_free(heap, *text);
        *text = NULL;
        return status;
    }
    (*text)[file.bytes] = 0;
    *bytes = (size_t)file.bytes;
    return LLMPAR_OK;
}

/* ---- mapped reads ---- */

LLMPAR_DEF llmpar_status llmpar_file_map(const char *path, llmpar_mapped *out, llmpar_error *error)
{
    struct stat s;
    llmpar_file file;
    memset(out, 0, sizeof *out);
    llmpar_status status = llmpar_file_open(NULL, path, &file, error);
    if (status) return status;
    int number = fstat(file.handle, &s) ? errno : 0; /* of what is open, whatever has its name by now */
    void *base = NULL;
    if (!number && s.st_size) base = mmap(NULL, (size_t)s.st_size, PROT_READ, MAP_PRIVATE, file.handle, 0);
    if (base == MAP_FAILED) number = errno;
    llmpar_file_close(&file);
    if (number) return llmpar__file_error(error, path, "cannot map", number);
    out->base = base;
    out->data = base ? (const unsigned char *)base : llmpar__file_nothing;
    out->bytes = (size_t)s.st_size;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_file_unmap(llmpar_mapped *file)
{
    if (!file) return;
    if (file->base) munmap(file->base, file->bytes);
    memset(file, 0, sizeof *file);
}

/* ---- atomic writes ---- */

struct llmpar_writer {
    llmpar_heap *heap;
    const llmpar_io *io;
    char *path;            /* final name; owned */
    char *temporary;       /* path.tmp; owned */
    unsigned char *buffer; /* [LLMPAR__FILE_BUFFER]; owned */
    size_t used;           /* bytes waiting in buffer */
    int handle;            /* -1 when closed */
    int created;           /* temporary exists and is ours to remove */
    int failed;            /* a write failed: commit must not succeed */
    llmpar_xxh64 sum;      /* of all that came */
};

static void llmpar__writer_destroy(llmpar_writer *writer)
{
    llmpar_heap *heap = writer->heap;
    if (writer->handle >= 0) llmpar__file_end(writer->io, writer->handle);
    if (writer->created) writer->io->remove(writer->io->user, writer->temporary);
    llmpar_heap_free(heap, writer->path);
    llmpar_heap_free(heap, writer->temporary);
    llmpar_heap_free(heap, writer->buffer);
    llmpar_heap_free(heap, writer);
}

LLMPAR_DEF llmpar_status llmpar_writer_open(llmpar_heap *heap, const llmpar_io *io, const char *path, llmpar_writer **out, llmpar_error *error)
{
    llmpar_writer *writer;
    llmpar_io_kind kind = llmpar_file_kind(io, path);
    *out = NULL;
    LLMPAR__NEED(heap, error);
    LLMPAR__NEED_PATH(path, error);
    size_t length = strlen(path);
    /* The new file takes the old one's place at the end: a pipe or a device must not go that way. */
    if (kind != LLMPAR_IO_NONE && kind != LLMPAR_IO_FILE) return llmpar_error_set(error, LLMPAR_ERR_IO, "%s: cannot write: it is a %s", path, llmpar__file_kind_name(kind));
    writer = LLMPAR__ZALLOC(llmpar_writer, heap, 1);
    if (!writer) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory for a writer", path);
    writer->heap = heap;
    writer->io = llmpar__file_io(io);
    writer->handle = -1;
    llmpar_xxh64_begin(&writer->sum);
    writer->path = llmpar_heap_strdup(heap, path);
    writer->temporary = LLMPAR__ALLOC(char, heap, length + sizeof ".tmp");
    writer->buffer = LLMPAR__ALLOC(unsigned char, heap, LLMPAR__FILE_BUFFER);
    if (!writer->path || !writer->temporary || !writer->buffer) {
        llmpar__writer_destroy(writer);
        return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory for a writer of %zu bytes", path, LLMPAR__FILE_BUFFER);
    }
    memcpy(writer->temporary, path, length);
    memcpy(writer->temporary + length, ".tmp", sizeof ".tmp");
    int number = llmpar__file_begin(writer->io, writer->temporary, LLMPAR_IO_WRITE, &writer->handle);
    if (number) {
        writer->handle = -1;
        llmpar__file_error(error, writer->temporary, "cannot create", number);
        llmpar__writer_destroy(writer);
        return LLMPAR_ERR_IO;
    }
    writer->created = 1;
    *out = writer;
    return LLMPAR_OK;
}

static llmpar_status llmpar__writer_put(llmpar_writer *writer, const unsigned char *data, size_t bytes, llmpar_error *error)
{
    while (bytes > 0) {
        size_t written = 0;
        int number = writer->io->write(writer->io->user, writer->handle, data, bytes, &written);
        if (number == EINTR) continue;
        if (number || written == 0) writer->failed = 1;
        if (number) return llmpar__file_error(error, writer->temporary, "cannot write", number);
        if (written == 0) return llmpar_error_set(error, LLMPAR_ERR_IO, "%s: cannot write: 0 of %zu bytes accepted", writer->temporary, bytes);
        data += written;
        bytes -= written;
    }
    return LLMPAR_OK;
}

static llmpar_status llmpar__writer_flush(llmpar_writer *writer, llmpar_error *error)
{
    size_t used = writer->used;
    writer->used = 0;
    return llmpar__writer_put(writer, writer->buffer, used, error);
}

LLMPAR_DEF llmpar_status llmpar_writer_write(llmpar_writer *writer, const void *data, size_t bytes, llmpar_error *error)
{
    LLMPAR__NEED(writer, error);
    if (writer->failed) return llmpar_error_set(error, LLMPAR_ERR_IO, "%s: an earlier write failed", writer->temporary);
    if (bytes == 0) return LLMPAR_OK;
    llmpar_xxh64_add(&writer->sum, data, bytes);
    if (bytes <= LLMPAR__FILE_BUFFER - writer->used) {
        memcpy(writer->buffer + writer->used, data, bytes);
        writer->used += bytes;
        return LLMPAR_OK;
    }
    llmpar_status status = llmpar__writer_flush(writer, error);
    if (status) return status;
    if (bytes >= LLMPAR__FILE_BUFFER) return llmpar__writer_put(writer, (const unsigned char *)data, bytes, error);
    memcpy(writer->buffer, data, bytes);
    writer->used = bytes;
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_directory_sync(const llmpar_io *io, const char *path, llmpar_error *error)
{
    int handle, number;
    LLMPAR__NEED_PATH(path, error);
    io = llmpar__file_io(io);
    number = llmpar__file_begin(io, path, LLMPAR_IO_DIRECTORY, &handle);
    /* A directory may be writable and not readable; then its entries stand without a sync. */
    if (number) return number == EACCES ? LLMPAR_OK : llmpar__file_error(error, path, "cannot open the directory", number);
    number = llmpar__file_sync(io, handle);
    llmpar__file_end(io, handle);
    return number ? llmpar__file_error(error, path, "cannot sync the directory", number) : LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_file_rename(const llmpar_io *io, const char *from, const char *to, llmpar_error *error)
{
    int number;
    LLMPAR__NEED_PATH(from, error);
    LLMPAR__NEED_PATH(to, error);
    io = llmpar__file_io(io);
    LLMPAR__AGAIN(rename, from, to);
    return number ? llmpar_error_set(error, LLMPAR_ERR_IO, "%s: cannot rename it to %s: %s", from, to, strerror(number)) : LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_file_remove(const llmpar_io *io, const char *path, llmpar_error *error)
{
    int number;
    LLMPAR__NEED_PATH(path, error);
    io = llmpar__file_io(io);
    LLMPAR__AGAIN(remove, path);
    return number && number != ENOENT ? llmpar__file_error(error, path, "cannot remove", number) : LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_directory_list(const llmpar_io *io, const char *path, int (*entry)(void *user, const char *name), void *user, llmpar_error *error)
{
    int number;
    LLMPAR__NEED_PATH(path, error);
    LLMPAR__NEED(entry, error);
    io = llmpar__file_io(io);
    LLMPAR__AGAIN(list, path, entry, user);
    return number > 0 ? llmpar__file_error(error, path, "cannot list the directory", number) : LLMPAR_OK;
}

/* The rename itself is durable only when the directory is. */
static llmpar_status llmpar__file_sync_parent(llmpar_heap *heap, const llmpar_io *io, const char *path, llmpar_error *error)
{
    const char *slash = strrchr(path, '/');
    char *parent = llmpar_heap_strdup(heap, !slash ? "." : slash == path ? "/" : path);
    if (!parent) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory for the directory's name", path);
    if (slash && slash != path) parent[slash - path] = 0;
    llmpar_status status = llmpar_directory_sync(io, parent, error);
    llmpar_heap_free(heap, parent);
    return status;
}

LLMPAR_DEF llmpar_status llmpar_writer_settle(llmpar_writer *writer, llmpar_error *error)
{
    llmpar_status status;
    LLMPAR__NEED(writer, error);
    int handle = writer->handle, number = 0;
    if (writer->failed) status = llmpar_error_set(error, LLMPAR_ERR_IO, "%s: an earlier write failed", writer->temporary);
    else status = llmpar__writer_flush(writer, error);
    if (!status) number = llmpar__file_sync(writer->io, handle);
    if (number) status = llmpar__file_error(error, writer->temporary, "cannot sync", number);
    writer->handle = -1;
    number = llmpar__file_end(writer->io, handle);
    if (number && !status) status = llmpar__file_error(error, writer->temporary, "cannot close", number);
    if (!status) status = llmpar_file_rename(writer->io, writer->temporary, writer->path, error);
    if (status) writer->io->remove(writer->io->user, writer->temporary);
    writer->created = 0;
    return status;
}

LLMPAR_DEF void llmpar_writer_sum(const llmpar_writer *writer, uint64_t *bytes, uint64_t *xxh64)
{
    if (bytes) *bytes = writer->sum.bytes;
    if (xxh64) *xxh64 = llmpar_xxh64_end(&writer->sum);
}

LLMPAR_DEF llmpar_status llmpar_writer_commit(llmpar_writer *writer, llmpar_error *error)
{
    LLMPAR__NEED(writer, error);
    llmpar_status status = llmpar_writer_settle(writer, error);
    if (!status) status = llmpar__file_sync_parent(writer->heap, writer->io, writer->path, error);
    llmpar__writer_destroy(writer);
    return status;
}

LLMPAR_DEF void llmpar_writer_abandon(llmpar_writer *writer)
{
    if (writer) llmpar__writer_destroy(writer);
}

/* ---- directories ---- */

LLMPAR_DEF llmpar_status llmpar_directory_ensure(const llmpar_io *io, const char *path, llmpar_error *error)
{
    char probe[4096];
    LLMPAR__NEED_PATH(path, error);
    int length = snprintf(probe, sizeof probe, "%s/.llmpar-probe.tmp", path), handle, number;
    if (length < 0 || (size_t)length >= sizeof probe) return llmpar_error_set(error, LLMPAR_ERR_IO, "%s: path longer than %zu bytes", path, sizeof probe - 20);
    io = llmpar__file_io(io);
    LLMPAR__AGAIN(make_directory, path);
    if (number && number != EEXIST) return llmpar__file_error(error, path, "cannot create the directory", number);
    if (number && llmpar_file_kind(io, path) != LLMPAR_IO_FOLDER) return llmpar_error_set(error, LLMPAR_ERR_IO, "%s: expected a directory, got a file", path);
    /* access() answers yes to root on read-only media: only a file that was really made proves it. */
    number = llmpar__file_begin(io, probe, LLMPAR_IO_WRITE, &handle);
    if (number) return llmpar__file_error(error, path, "cannot write in the directory", number);
    llmpar__file_end(io, handle);
    LLMPAR__AGAIN(remove, probe);
    return number ? llmpar__file_error(error, probe, "cannot remove", number) : LLMPAR_OK;
}

#undef LLMPAR__FILE_BUFFER

#endif /* LLMPAR_NO_IO */
