#include "io/file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#if !defined(LLMPAR_NO_IO)

#define LLMPAR__FILE_BUFFER ((size_t)256 << 10)

static const unsigned char llmpar__file_nothing[1] = { 0 }; /* what an empty file's `data` points to */

static llmpar_status llmpar__file_error(llmpar_error *error, const char *path, const char *operation, int number)
{
    return llmpar_error_set(error, LLMPAR_ERR_IO, "%s: %s: %s", path, operation, strerror(number));
}

LLMPAR_DEF int llmpar_is_directory(const char *path)
{
    struct stat s;
    return stat(path, &s) == 0 && S_ISDIR(s.st_mode);
}

LLMPAR_DEF int llmpar_is_file(const char *path)
{
    struct stat s;
    return stat(path, &s) == 0 && S_ISREG(s.st_mode);
}

/* ---- mapped reads ---- */

LLMPAR_DEF llmpar_status llmpar_file_map(const char *path, llmpar_mapped *out, llmpar_error *error)
{
    struct stat s;
    void *base;
    int fd, number;
    memset(out, 0, sizeof *out);
    /* O_NONBLOCK: a fifo without a writer is refused below instead of waited for; a regular file ignores it. */
    fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return llmpar__file_error(error, path, "cannot open", errno);
    if (fstat(fd, &s) != 0) {
        number = errno;
        close(fd);
        return llmpar__file_error(error, path, "cannot stat", number);
    }
    if (!S_ISREG(s.st_mode)) {
        close(fd);
        return llmpar_error_set(error, LLMPAR_ERR_IO, "%s: expected a regular file, got %s", path,
                                S_ISDIR(s.st_mode) ? "a directory" : S_ISFIFO(s.st_mode) ? "a pipe" : "a device or socket");
    }
    if (s.st_size == 0) {
        close(fd);
        out->data = llmpar__file_nothing;
        return LLMPAR_OK;
    }
    base = mmap(NULL, (size_t)s.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    number = errno;
    close(fd);
    if (base == MAP_FAILED) return llmpar__file_error(error, path, "cannot map", number);
    out->base = base;
    out->data = (const unsigned char *)base;
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
    char *path;            /* final name; owned */
    char *temporary;       /* path.tmp; owned */
    unsigned char *buffer; /* [LLMPAR__FILE_BUFFER]; owned */
    size_t used;           /* bytes waiting in buffer */
    int fd;                /* -1 when closed */
    int created;           /* temporary exists and is ours to remove */
    int failed;            /* a write failed: commit must not succeed */
};

static void llmpar__writer_destroy(llmpar_writer *writer)
{
    llmpar_heap *heap = writer->heap;
    if (writer->fd >= 0) close(writer->fd);
    if (writer->created) unlink(writer->temporary);
    llmpar_heap_free(heap, writer->path);
    llmpar_heap_free(heap, writer->temporary);
    llmpar_heap_free(heap, writer->buffer);
    llmpar_heap_free(heap, writer);
}

LLMPAR_DEF llmpar_status llmpar_writer_open(llmpar_heap *heap, const char *path, llmpar_writer **out, llmpar_error *error)
{
    llmpar_writer *writer;
    size_t length = strlen(path);
    int number;
    *out = NULL;
    struct stat s;
    /* The new file takes the old one's place at the end: a pipe or a device must not go that way. */
    if (stat(path, &s) == 0 && !S_ISREG(s.st_mode)) return llmpar_error_set(error, LLMPAR_ERR_IO, "%s: cannot write: it is a %s", path, S_ISDIR(s.st_mode) ? "directory" : S_ISFIFO(s.st_mode) ? "pipe" : "device or socket");
    writer = (llmpar_writer *)llmpar_heap_zalloc(heap, 1, sizeof *writer);
    if (!writer) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory for a writer", path);
    writer->heap = heap;
    writer->fd = -1;
    writer->path = llmpar_heap_strdup(heap, path);
    writer->temporary = (char *)llmpar_heap_alloc(heap, length + sizeof ".tmp", 1);
    writer->buffer = (unsigned char *)llmpar_heap_alloc(heap, LLMPAR__FILE_BUFFER, 1);
    if (!writer->path || !writer->temporary || !writer->buffer) {
        llmpar__writer_destroy(writer);
        return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory for a writer of %zu bytes", path, LLMPAR__FILE_BUFFER);
    }
    memcpy(writer->temporary, path, length);
    memcpy(writer->temporary + length, ".tmp", sizeof ".tmp");
    writer->fd = open(writer->temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (writer->fd < 0) {
        number = errno;
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
        /* One write of more than 2 GiB is cut short by the kernel anyway. */
        size_t part = bytes < ((size_t)1 << 30) ? bytes : (size_t)1 << 30;
        ssize_t written = write(writer->fd, data, part);
        if (written < 0) {
            if (errno == EINTR) continue;
            writer->failed = 1;
            return llmpar__file_error(error, writer->temporary, "cannot write", errno);
        }
        if (written == 0) {
            writer->failed = 1;
            return llmpar_error_set(error, LLMPAR_ERR_IO, "%s: cannot write: 0 of %zu bytes accepted", writer->temporary, part);
        }
        data += written;
        bytes -= (size_t)written;
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
    llmpar_status status;
    if (writer->failed) return llmpar_error_set(error, LLMPAR_ERR_IO, "%s: an earlier write failed", writer->temporary);
    if (bytes == 0) return LLMPAR_OK;
    if (bytes <= LLMPAR__FILE_BUFFER - writer->used) {
        memcpy(writer->buffer + writer->used, data, bytes);
        writer->used += bytes;
        return LLMPAR_OK;
    }
    status = llmpar__writer_flush(writer, error);
    if (status) return status;
    if (bytes >= LLMPAR__FILE_BUFFER) return llmpar__writer_put(writer, (const unsigned char *)data, bytes, error);
    memcpy(writer->buffer, data, bytes);
    writer->used = bytes;
    return LLMPAR_OK;
}

/* The rename itself is durable only when the directory is. File systems that cannot sync a directory say EINVAL. */
static llmpar_status llmpar__file_sync_parent(llmpar_heap *heap, const char *path, llmpar_error *error)
{
    const char *slash = strrchr(path, '/');
    char *parent;
    llmpar_status status = LLMPAR_OK;
    int fd;
    if (!slash) parent = llmpar_heap_strdup(heap, ".");
    else if (slash == path) parent = llmpar_heap_strdup(heap, "/");
    else {
        parent = llmpar_heap_strdup(heap, path);
        if (parent) parent[slash - path] = 0;
    }
    if (!parent) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory for the directory's name", path);
    fd = open(parent, O_RDONLY | O_CLOEXEC);
    /* A directory may be writable and not readable; then the rename stands without a sync. */
    if (fd < 0 && errno != EACCES) status = llmpar__file_error(error, parent, "cannot open the directory", errno);
    if (fd >= 0) {
        if (fsync(fd) != 0 && errno != EINVAL && errno != EROFS) status = llmpar__file_error(error, parent, "cannot sync the directory", errno);
        close(fd);
    }
    llmpar_heap_free(heap, parent);
    return status;
}

LLMPAR_DEF llmpar_status llmpar_writer_commit(llmpar_writer *writer, llmpar_error *error)
{
    llmpar_status status;
    int fd;
    if (writer->failed) status = llmpar_error_set(error, LLMPAR_ERR_IO, "%s: an earlier write failed", writer->temporary);
    else status = llmpar__writer_flush(writer, error);
    if (!status && fsync(writer->fd) != 0) status = llmpar__file_error(error, writer->temporary, "cannot sync", errno);
    fd = writer->fd;
    writer->fd = -1;
    /* After close the descriptor is gone, whatever close says. */
    if (close(fd) != 0 && !status) status = llmpar__file_error(error, writer->temporary, "cannot close", errno);
    if (!status && rename(writer->temporary, writer->path) != 0) status = llmpar__file_error(error, writer->path, "cannot rename the finished file to it", errno);
    if (!status) {
        writer->created = 0;
        status = llmpar__file_sync_parent(writer->heap, writer->path, error);
    }
    llmpar__writer_destroy(writer);
    return status;
}

LLMPAR_DEF void llmpar_writer_abandon(llmpar_writer *writer)
{
    if (writer) llmpar__writer_destroy(writer);
}

/* ---- directories ---- */

LLMPAR_DEF llmpar_status llmpar_directory_ensure(const char *path, llmpar_error *error)
{
    char probe[4096];
    int length, fd;
    if (mkdir(path, 0777) != 0) {
        int number = errno;
        if (number != EEXIST) return llmpar__file_error(error, path, "cannot create the directory", number);
        if (!llmpar_is_directory(path)) return llmpar_error_set(error, LLMPAR_ERR_IO, "%s: expected a directory, got a file", path);
    }
    /* access() answers yes to root on read-only media: only a file that was really made proves it. */
    length = snprintf(probe, sizeof probe, "%s/.llmpar-XXXXXX", path);
    if (length < 0 || (size_t)length >= sizeof probe) return llmpar_error_set(error, LLMPAR_ERR_IO, "%s: path longer than %zu bytes", path, sizeof probe - 16);
    fd = mkstemp(probe);
    if (fd < 0) return llmpar__file_error(error, path, "cannot write in the directory", errno);
    close(fd);
    if (unlink(probe) != 0) return llmpar__file_error(error, probe, "cannot remove", errno);
    return LLMPAR_OK;
}

#undef LLMPAR__FILE_BUFFER

#endif /* LLMPAR_NO_IO */
