#include "io/system.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#if !defined(LLMPAR_NO_IO)

/* More than this is cut short by the kernel anyway. */
#define LLMPAR__SYSTEM_PART ((size_t)1 << 30)

static int llmpar__system_open(void *user, const char *path, llmpar_io_mode mode, int *handle)
{
    int flags = mode == LLMPAR_IO_READ ? O_RDONLY : mode == LLMPAR_IO_WRITE ? O_WRONLY | O_CREAT | O_TRUNC : O_RDONLY | O_DIRECTORY;
    (void)user;
    /* O_NONBLOCK: a pipe without a writer is not waited for; a regular file ignores it. */
    *handle = open(path, flags | O_CLOEXEC | O_NONBLOCK, 0666);
    return *handle < 0 ? errno : 0;
}

static int llmpar__system_close(void *user, int handle)
{
    (void)user;
    return close(handle) ? errno : 0;
}

static int llmpar__system_read(void *user, int handle, void *data, size_t bytes, uint64_t offset, size_t *got)
{
    (void)user;
    *got = 0;
    if (offset > INT64_MAX) return EOVERFLOW;
    ssize_t count = pread(handle, data, bytes < LLMPAR__SYSTEM_PART ? bytes : LLMPAR__SYSTEM_PART, (off_t)offset);
    if (count < 0) return errno;
    *got = (size_t)count;
    return 0;
}

static int llmpar__system_write(void *user, int handle, const void *data, size_t bytes, size_t *written)
{
    (void)user;
    *written = 0;
    ssize_t count = write(handle, data, bytes < LLMPAR__SYSTEM_PART ? bytes : LLMPAR__SYSTEM_PART);
    if (count < 0) return errno;
    *written = (size_t)count;
    return 0;
}

static int llmpar__system_sync(void *user, int handle)
{
    (void)user;
    if (fsync(handle) == 0) return 0;
    /* A file system that cannot sync a directory says EINVAL, one that is read-only EROFS: nothing is waiting there. */
    struct stat s;
    int number = errno;
    return (number == EINVAL || number == EROFS) && fstat(handle, &s) == 0 && S_ISDIR(s.st_mode) ? 0 : number;
}

static int llmpar__system_rename(void *user, const char *from, const char *to)
{
    (void)user;
    return rename(from, to) ? errno : 0;
}

static int llmpar__system_remove(void *user, const char *path)
{
    (void)user;
    return remove(path) ? errno : 0;
}

static int llmpar__system_make_directory(void *user, const char *path)
{
    (void)user;
    return mkdir(path, 0777) ? errno : 0;
}

static int llmpar__system_look(void *user, const char *path, llmpar_io_kind *kind, uint64_t *bytes)
{
    struct stat s;
    (void)user;
    *kind = LLMPAR_IO_NONE;
    *bytes = 0;
    if (stat(path, &s) != 0) return errno == ENOENT || errno == ENOTDIR ? 0 : errno;
    *kind = S_ISREG(s.st_mode) ? LLMPAR_IO_FILE : S_ISDIR(s.st_mode) ? LLMPAR_IO_FOLDER : S_ISFIFO(s.st_mode) ? LLMPAR_IO_PIPE : LLMPAR_IO_OTHER;
    *bytes = (uint64_t)s.st_size;
    return 0;
}

static int llmpar__system_list(void *user, const char *path, int (*entry)(void *entry_user, const char *name), void *entry_user)
{
    DIR *directory = opendir(path);
    int result = 0;
    (void)user;
    if (!directory) return errno;
    while (!result) {
        errno = 0;
        const struct dirent *next = readdir(directory);
        if (!next) {
            result = errno;
            break;
        }
        if (strcmp(next->d_name, ".") && strcmp(next->d_name, "..")) result = entry(entry_user, next->d_name);
    }
    closedir(directory);
    return result;
}

static const llmpar_io llmpar__system_io = {
    LLMPAR_IO_ABI, sizeof(llmpar_io), NULL,
    llmpar__system_open, llmpar__system_close, llmpar__system_read, llmpar__system_write, llmpar__system_sync,
    llmpar__system_rename, llmpar__system_remove, llmpar__system_make_directory, llmpar__system_look, llmpar__system_list
};

LLMPAR_DEF const llmpar_io *llmpar_io_system(void) { return &llmpar__system_io; }

#undef LLMPAR__SYSTEM_PART

#endif /* LLMPAR_NO_IO */
