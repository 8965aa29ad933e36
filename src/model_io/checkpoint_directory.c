/* The directory of checkpoints, as one rank changes it. Power may fail anywhere: every line leaves what is complete complete.

     step-8.tmp/ + files (each synced)  ->  sync step-8.tmp  ->  rename to step-8  ->  sync DIR  ->  latest (written aside, synced, renamed, DIR synced)  ->  older ones: renamed to .tmp, then removed */
#include "model_io/checkpoint_internal.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "io/system.h"

#if !defined(LLMPAR_NO_IO)

LLMPAR__PRIVATE_DEF llmpar_status llmpar__checkpoint_path(char out[LLMPAR__CHECKPOINT_PATH], llmpar_error *error, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    int n = vsnprintf(out, LLMPAR__CHECKPOINT_PATH, format, list);
    va_end(list);
    return (unsigned)n < LLMPAR__CHECKPOINT_PATH ? LLMPAR_OK : llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%.200s..: a path of more than %d bytes", out, LLMPAR__CHECKPOINT_PATH - 1);
}

LLMPAR__PRIVATE_DEF int64_t llmpar__checkpoint_step(const char *name)
{
    int64_t step = 0;
    if (strncmp(name, "step-", 5) || name[5] < '0' || name[5] > '9' || (name[5] == '0' && name[6])) return -1;
    for (name += 5; *name; name++) {
        if (*name < '0' || *name > '9' || step > (INT64_MAX - 9) / 10) return -1;
        step = 10 * step + (*name - '0');
    }
    return step;
}

static llmpar_status llmpar__directory_error(llmpar_error *error, const char *what, const char *path, int number) { return llmpar_error_set(error, LLMPAR_ERR_IO, "%s: cannot %s: %s", path, what, strerror(number)); }

/* ---- names in a directory ---- */

typedef struct llmpar__directory_scan {
    const llmpar_io *io;
    const char *directory;
    int64_t below, newest;   /* complete steps */
    int removed;             /* files, by sweep */
} llmpar__directory_scan;

static int llmpar__directory_unlink(const llmpar_io *io, const char *path)
{
    int number;
    LLMPAR__AGAIN(remove, path);
    return number;
}

static int llmpar__directory_newest(void *user, const char *name)
{
    llmpar__directory_scan *scan = (llmpar__directory_scan *)user;
    int64_t step = llmpar__checkpoint_step(name);
    if (step > scan->newest && step < scan->below) scan->newest = step;
    return 0;
}

static int llmpar__directory_sweep(void *user, const char *name)
{
    llmpar__directory_scan *scan = (llmpar__directory_scan *)user;
    char path[LLMPAR__CHECKPOINT_PATH];
    if (strlen(name) >= LLMPAR__CHECKPOINT_NAME) return ENAMETOOLONG; /* whoever put it there */
    snprintf(path, sizeof path, "%s/%s", scan->directory, name);
    int number = llmpar__directory_unlink(scan->io, path);
    scan->removed += !number;
    return number;
}

static int llmpar__directory_list(const llmpar_io *io, const char *path, int (*entry)(void *user, const char *name), void *user)
{
    int number;
    LLMPAR__AGAIN(list, path, entry, user);
    return number;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__checkpoint_find(const llmpar_io *io, const char *directory, int64_t below, int64_t *step, llmpar_error *error)
{
    llmpar__directory_scan scan = {NULL, NULL, below, -1, 0};
    io = io ? io : llmpar_io_system();
    int number = llmpar__directory_list(io, directory, llmpar__directory_newest, &scan);
    *step = scan.newest;
    return number && number != ENOENT ? llmpar__directory_error(error, "list it", directory, number) : LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__checkpoint_remove(const llmpar_io *io, const char *path, llmpar_error *error)
{
    llmpar__directory_scan scan = {io ? io : llmpar_io_system(), path, 0, 0, 0};
    io = scan.io;
    int number;
    do { /* a listing may miss entries while others are removed */
        scan.removed = 0;
        number = llmpar__directory_list(io, path, llmpar__directory_sweep, &scan);
    } while (!number && scan.removed);
    if (number == ENOENT) return LLMPAR_OK;
    if (!number || number == ENOTDIR) number = llmpar__directory_unlink(io, path);
    return number ? llmpar__directory_error(error, "remove it", path, number) : LLMPAR_OK;
}

/* Any step-*.tmp that is there: the name of one without .tmp, in char[64], or "". */
static int llmpar__directory_leftover(void *user, const char *name)
{
    size_t length = strlen(name);
    char *out = (char *)user;
    if (length < 5 || length >= 64 || strcmp(name + length - 4, ".tmp")) return 0;
    snprintf(out, 64, "%.*s", (int)length - 4, name);
    if (llmpar__checkpoint_step(out) < 0) out[0] = 0;
    return out[0] ? -1 : 0;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__checkpoint_begin(const llmpar_io *io, const char *directory, int64_t step, llmpar_error *error)
{
    char path[LLMPAR__CHECKPOINT_PATH], left[64];
    io = io ? io : llmpar_io_system();
    int fresh = llmpar_file_kind(io, directory) == LLMPAR_IO_NONE, number;
    llmpar_status status = llmpar_directory_ensure(io, directory, error);
    if (!status && fresh) { /* its own entry has to last too */
        const char *slash = strrchr(directory, '/');
        snprintf(path, sizeof path, "%.*s", !slash ? 1 : slash == directory ? 1 : (int)(slash - directory), slash ? directory : ".");
        status = llmpar_directory_sync(io, path, error);
    }
    while (!status) {
        left[0] = 0;
        number = llmpar__directory_list(io, directory, llmpar__directory_leftover, left);
        if (number > 0) return llmpar__directory_error(error, "list it", directory, number);
        if (!left[0]) break;
        snprintf(path, sizeof path, "%s/%s.tmp", directory, left);
        status = llmpar__checkpoint_remove(io, path, error);
    }
    snprintf(path, sizeof path, "%s/step-%lld", directory, (long long)step);
    if (!status && llmpar_file_kind(io, path) != LLMPAR_IO_NONE)
        status = llmpar_error_set(error, LLMPAR_ERR_IO, "%s: it is there already, and nothing is overwritten: expected a directory of this run alone, or a resume from its newest step", path);
    if (status) return status;
    snprintf(path, sizeof path, "%s/step-%lld.tmp", directory, (long long)step);
    LLMPAR__AGAIN(make_directory, path);
    return number ? llmpar__directory_error(error, "create the directory", path, number) : LLMPAR_OK;
}

/* All complete ones but the newest `keep`. */
static llmpar_status llmpar__checkpoint_prune(const llmpar_io *io, const char *directory, int64_t step, int32_t keep, llmpar_error *error)
{
    char from[LLMPAR__CHECKPOINT_PATH], to[LLMPAR__CHECKPOINT_PATH];
    llmpar_status status = LLMPAR_OK;
    for (int32_t n = 1; !status; n++) { /* the one just written is the first */
        status = llmpar__checkpoint_find(io, directory, step, &step, error);
        if (status || step < 0) break;
        if (n < keep) continue;
        snprintf(from, sizeof from, "%s/step-%lld", directory, (long long)step);
        snprintf(to, sizeof to, "%s/step-%lld.tmp", directory, (long long)step);
        status = llmpar_file_rename(io, from, to, error); /* at once: it never stands there in part */
        if (!status) status = llmpar_directory_sync(io, directory, error);
        if (!status) status = llmpar__checkpoint_remove(io, to, error);
    }
    return status;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__checkpoint_publish(llmpar_heap *heap, const llmpar_io *io, const char *directory, int64_t step, int32_t keep, llmpar_error *error)
{
    char from[LLMPAR__CHECKPOINT_PATH], to[LLMPAR__CHECKPOINT_PATH], latest[32];
    LLMPAR__NO_ERROR(why);
    io = io ? io : llmpar_io_system();
    snprintf(latest, sizeof latest, "step-%lld\n", (long long)step);
    snprintf(to, sizeof to, "%s/step-%lld", directory, (long long)step);
    snprintf(from, sizeof from, "%s/step-%lld.tmp", directory, (long long)step);
    llmpar_status status = llmpar_directory_sync(io, from, error);
    if (!status) status = llmpar_file_rename(io, from, to, error);
    if (status) return status;
    status = llmpar_directory_sync(io, directory, &why);
    if (!status) status = llmpar__hf_put_text(heap, io, directory, "latest", latest, &why);
    if (!status && keep) status = llmpar__checkpoint_prune(io, directory, step, keep, &why);
    return status ? llmpar_error_set(error, status, "%s is complete, but: %s", to, why.text) : LLMPAR_OK;
}

#endif /* LLMPAR_NO_IO */
