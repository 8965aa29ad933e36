/* status: what every fallible call returns, and the text that says what, where, expected and got. */
#ifndef LLMPAR_STATUS_H
#define LLMPAR_STATUS_H

#include "base/platform.h"

/* One list makes the enum and the strings. */
#define LLMPAR_STATUS_LIST(X) \
    X(OK, 0, "ok") \
    X(ERR_ARGUMENT, 1, "invalid argument") \
    X(ERR_SHAPE, 2, "shape mismatch") \
    X(ERR_MEMORY, 3, "out of memory") \
    X(ERR_OVERFLOW, 4, "size overflow") \
    X(ERR_IO, 5, "input/output error") \
    X(ERR_FORMAT, 6, "malformed input") \
    X(ERR_CONFIG, 7, "invalid configuration") \
    X(ERR_MESH, 8, "mesh mismatch") \
    X(ERR_PEER, 9, "another rank failed") \
    X(ERR_MISMATCH, 10, "ranks disagree") \
    X(ERR_TIMEOUT, 11, "no answer in time") \
    X(ERR_UNSUPPORTED, 12, "not supported") \
    X(ERR_SCHEDULE, 13, "invalid schedule") \
    X(ERR_NONFINITE, 14, "non-finite value") \
    X(ERR_ABI, 15, "table with another abi") \
    X(ERR_INTERNAL, 16, "internal error") \
    X(END, 17, "the end of one text")

typedef enum llmpar_status {
#define LLMPAR__STATUS_ENUM(name, value, text) LLMPAR_##name = value,
    LLMPAR_STATUS_LIST(LLMPAR__STATUS_ENUM)
#undef LLMPAR__STATUS_ENUM
    LLMPAR_STATUS_COUNT = 18
} llmpar_status;

/* An error and its place. Owned by the caller; plain data, may be copied. */
typedef struct llmpar_error {
    llmpar_status status; /* LLMPAR_OK: no error */
    int32_t rank;         /* world rank that failed, -1 if no rank was involved */
    char where[48];       /* mesh coordinate "dp_shard=1 tp=0", or "" */
    char text[1600];      /* one line, no newline at the end */
} llmpar_error;

/* "out of memory" and so on; never NULL. Thread-safe. */
LLMPAR_API const char *llmpar_status_string(llmpar_status status);

/* Fills *error (NULL is fine) and returns `status`, so that callers write `return llmpar_error_set(...)`.
   The first error stays: a second call on an error that is already set changes nothing.
   Text longer than the buffer is cut and ends in "...". Not thread-safe for one *error. */
LLMPAR_API llmpar_status llmpar_error_set(llmpar_error *error, llmpar_status status, const char *format, ...) LLMPAR_PRINTF(3, 4);

#define LLMPAR__NO_ERROR(name) llmpar_error name; llmpar_error_clear(&name)
/* A NULL where the manual refuses it. */
#define LLMPAR__NEED(what, error) if (!(what)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: NULL, expected " #what, __func__)

/* A path that is NULL, or empty: no file has it, and with a name behind it the root of the file system would be looked into. */
#define LLMPAR__NO_PATH(path) (!(path) || !*(path))
#define LLMPAR__NEED_PATH(path, error) if (LLMPAR__NO_PATH(path)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: " #path " = %s, expected a path", __func__, (path) ? "\"\"" : "NULL")

/* Back to "no error" (status OK, rank -1, empty texts). */
LLMPAR_API void llmpar_error_clear(llmpar_error *error);

#endif
