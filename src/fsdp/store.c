#include "fsdp/store_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#define LLMPAR__STORE_CHUNK ((size_t)1 << 20) /* staging between device memory and the file */

struct llmpar__store {
    llmpar_ctx *ctx;
    char *path;            /* the name it had */
    int count_only;
    int fd;                /* -1: no file */
    uint64_t end, fixed;   /* of the ranges given out; of those that stay for good */
    uint64_t reserved;     /* bytes that the disk has */
    void *staging;         /* [LLMPAR__STORE_CHUNK] */
    llmpar_error error;    /* of a transfer */
};

static llmpar_status llmpar__store_open(llmpar__store *store, const char *directory)
{
    llmpar_ctx *ctx = store->ctx;
    size_t bytes = strlen(directory) + 80;
    store->path = LLMPAR__ALLOC(char, &ctx->heap, bytes);
    llmpar_status status = llmpar_device_host_alloc(ctx->device, &ctx->heap, LLMPAR__STORE_CHUNK, &store->staging);
    if (!store->path || status) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "offload: %s: out of memory for the staging buffer", directory);
    /* A name that somebody else's left-over or another process space with the same ids has is not ours: the next one. */
    for (int attempt = 0; attempt < 100; attempt++) {
        snprintf(store->path, bytes, "%s/llmpar-offload-%ld-%d-%d", directory, (long)getpid(), (int)ctx->rank, attempt);
        store->fd = open(store->path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        if (store->fd >= 0 || errno != EEXIST) break;
    }
    if (store->fd < 0) return llmpar_fail(ctx, LLMPAR_ERR_IO, "offload: %s: %s, expected a directory that files can be made in", store->path, strerror(errno));
    if (unlink(store->path)) return llmpar_fail(ctx, LLMPAR_ERR_IO, "offload: %s: cannot remove its name: %s", store->path, strerror(errno));
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__store_create(llmpar_ctx *ctx, const char *directory, int file, int count_only, llmpar__store **out)
{
    *out = NULL;
    llmpar__store *store = LLMPAR__ZALLOC(llmpar__store, &ctx->heap, 1);
    if (!store) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "offload: out of memory");
    store->ctx = ctx;
    store->fd = -1;
    store->count_only = count_only;
    llmpar_error_clear(&store->error);
    llmpar_status status = file && !count_only ? llmpar__store_open(store, directory && directory[0] ? directory : ".") : LLMPAR_OK;
    if (status) llmpar__store_destroy(store);
    else *out = store;
    return status;
}

LLMPAR__PRIVATE_DEF void llmpar__store_destroy(llmpar__store *store)
{
    if (!store) return;
    llmpar_heap *heap = &store->ctx->heap;
    if (store->fd >= 0) close(store->fd);
    llmpar_heap_free(heap, store->path);
    llmpar_device_host_free(store->ctx->device, heap, store->staging, LLMPAR__STORE_CHUNK);
    llmpar_heap_free(heap, store);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__store_place(llmpar__store *store, llmpar_tier tier, uint64_t bytes, llmpar__place *place)
{
    memset(place, 0, sizeof *place);
    if (tier == LLMPAR_TIER_HOST && !store->count_only) {
        if (llmpar_device_host_alloc(store->ctx->device, &store->ctx->heap, (size_t)bytes, &place->host)) return llmpar_fail(store->ctx, LLMPAR_ERR_MEMORY, "offload: no host memory for %llu bytes", (unsigned long long)bytes);
        memset(place->host, 0, (size_t)bytes);
    } else if (tier == LLMPAR_TIER_FILE) {
        if (bytes > (uint64_t)INT64_MAX / 2 - store->end) return llmpar_fail(store->ctx, LLMPAR_ERR_OVERFLOW, "offload: %llu bytes after %llu are more than a file holds", (unsigned long long)bytes, (unsigned long long)store->end);
        place->offset = store->end;
        store->end += (bytes + 4095) / 4096 * 4096; /* whole pages: transfers of different buffers never share one */
    }
    place->tier = tier;
    place->bytes = place->used = bytes;
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF void llmpar__store_drop(llmpar__store *store, llmpar__place *place)
{
    llmpar_device_host_free(store->ctx->device, &store->ctx->heap, place->host, (size_t)place->bytes);
    memset(place, 0, sizeof *place);
}

LLMPAR__PRIVATE_DEF void llmpar__store_rewind(llmpar__store *store) { store->end = store->fixed; }

/* Whole transfers in spite of short ones and signals; errno of the one that failed, -1: the file ended. */
static int llmpar__store_move(int fd, char *memory, size_t bytes, uint64_t offset, int write)
{
    while (bytes) {
        ssize_t moved = write ? pwrite(fd, memory, bytes, (off_t)offset) : pread(fd, memory, bytes, (off_t)offset);
        if (moved < 0 && errno == EINTR) continue;
        if (moved < 0) return errno;
        if (moved == 0) return write ? ENOSPC : -1;
        memory += moved;
        bytes -= (size_t)moved;
        offset += (uint64_t)moved;
    }
    return 0;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__store_reserve(llmpar__store *store)
{
    if (store->fd < 0 || store->end <= store->reserved) return LLMPAR_OK;
    int number = EOPNOTSUPP;
#if defined(__linux__)
    do number = posix_fallocate(store->fd, (off_t)store->reserved, (off_t)(store->end - store->reserved));
    while (number == EINTR);
#endif
    if (number == EOPNOTSUPP || number == EINVAL) { /* a file system that cannot promise blocks is given zeros */
        memset(store->staging, 0, LLMPAR__STORE_CHUNK);
        number = 0;
        for (uint64_t at = store->reserved; at < store->end && !number; at += LLMPAR__STORE_CHUNK) {
            uint64_t rest = store->end - at;
            number = llmpar__store_move(store->fd, (char *)store->staging, rest < LLMPAR__STORE_CHUNK ? (size_t)rest : LLMPAR__STORE_CHUNK, at, 1);
        }
    }
    if (number) return llmpar_fail(store->ctx, LLMPAR_ERR_IO, "offload: %s: %llu bytes: %s", store->path, (unsigned long long)store->end, strerror(number));
    store->reserved = store->end;
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__store_fix(llmpar__store *store)
{
    store->fixed = store->end;
    return llmpar__store_reserve(store);
}

/* One chunk between the staging buffer and the file; runs in stream order. */
typedef struct llmpar__store_job {
    llmpar__store *store;
    const char *label;
    uint64_t offset;
    size_t bytes;
    int write;
} llmpar__store_job;

static llmpar_status llmpar__store_chunk(void *arg)
{
    const llmpar__store_job *job = (const llmpar__store_job *)arg;
    llmpar__store *store = job->store;
    int number = llmpar__store_move(store->fd, (char *)store->staging, job->bytes, job->offset, job->write);
    if (!number) return LLMPAR_OK;
    return llmpar_error_set(&store->error, LLMPAR_ERR_IO, "offload: %s: %s of %s: %lu bytes at %llu: %s", store->path, job->write ? "write" : "read", job->label, (unsigned long)job->bytes, (unsigned long long)job->offset,
                            number < 0 ? "the file ends before them" : strerror(number));
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__store_transfer(llmpar__store *store, llmpar_stream *stream, const llmpar__place *place, void *memory, const char *label, int write)
{
    llmpar_device *device = store->ctx->device;
    if (store->count_only) return LLMPAR_OK;
    if (place->tier == LLMPAR_TIER_HOST) return write ? device->copy(device, stream, place->host, memory, (size_t)place->used) : device->copy(device, stream, memory, place->host, (size_t)place->used);
    llmpar_status status = LLMPAR_OK;
    for (uint64_t at = 0; at < place->used && !status; at += LLMPAR__STORE_CHUNK) {
        const size_t bytes = place->used - at < LLMPAR__STORE_CHUNK ? (size_t)(place->used - at) : LLMPAR__STORE_CHUNK;
        const llmpar__store_job job = {store, label, place->offset + at, bytes, write};
        if (write) status = device->copy(device, stream, store->staging, (char *)memory + at, bytes);
        if (!status) status = device->host_call(device, stream, llmpar__store_chunk, &job, sizeof job);
        if (!write && !status) status = device->copy(device, stream, (char *)memory + at, store->staging, bytes);
    }
    return status;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__store_failed(llmpar__store *store, llmpar_status status)
{
    if (!store || !status || !store->error.status) return status;
    return llmpar_fail(store->ctx, store->error.status, "%s", store->error.text);
}

#undef LLMPAR__STORE_CHUNK
