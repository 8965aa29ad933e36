/* io: what the library asks of the operating system about files, as a table: a test fails, cuts short or loses any call, a user brings another store. The system's own is llmpar_io_system (io/system.h).

   Every function returns 0 or an errno value. EINTR means: ask again (not after close, which has closed in any case). Short reads and writes are the caller's affair. Several threads may use a table at once. */
#ifndef LLMPAR_IO_H
#define LLMPAR_IO_H

#include <stddef.h>
#include <stdint.h>

/* READ: an existing regular file. WRITE: a new file, or an old regular one, emptied. DIRECTORY: only to be synced. */
typedef enum llmpar_io_mode { LLMPAR_IO_READ = 0, LLMPAR_IO_WRITE = 1, LLMPAR_IO_DIRECTORY = 2 } llmpar_io_mode;
typedef enum llmpar_io_kind { LLMPAR_IO_NONE = 0, LLMPAR_IO_FILE = 1, LLMPAR_IO_FOLDER = 2, LLMPAR_IO_PIPE = 3, LLMPAR_IO_OTHER = 4 } llmpar_io_kind;

typedef struct llmpar_io {
    uint32_t abi, size; /* LLMPAR_IO_ABI, sizeof; new slots come at the end */
    void *user;
    /* Never waits for the other end of a pipe. What is no regular file (DIRECTORY: no directory) may be opened or refused; callers `look` first. */
    int (*open)(void *user, const char *path, llmpar_io_mode mode, int *handle);
    int (*close)(void *user, int handle); /* the handle is gone in any case */
    int (*read)(void *user, int handle, void *data, size_t bytes, uint64_t offset, size_t *got);       /* got < bytes: not the end yet, unless 0 */
    int (*write)(void *user, int handle, const void *data, size_t bytes, size_t *written);             /* behind what was written before */
    int (*sync)(void *user, int handle);  /* file: its data and size are on the disk; DIRECTORY: so are its entries */
    int (*rename)(void *user, const char *from, const char *to); /* atomically, in place of a file of that name, or of an empty directory */
    int (*remove)(void *user, const char *path);         /* a file or an empty directory */
    int (*make_directory)(void *user, const char *path);
    int (*look)(void *user, const char *path, llmpar_io_kind *kind, uint64_t *bytes); /* a missing path is NONE, not an error */
    /* Every entry but . and .., in any order, until `entry` returns other than 0, which is then returned. */
    int (*list)(void *user, const char *path, int (*entry)(void *entry_user, const char *name), void *entry_user);
} llmpar_io;

#define LLMPAR_IO_ABI 1u

#endif
