/* checkpoint_internal: what saving (checkpoint.c), the directory (checkpoint_directory.c), the manifest and loading share. */
#ifndef LLMPAR_CHECKPOINT_INTERNAL_H
#define LLMPAR_CHECKPOINT_INTERNAL_H

#include "base/json.h"
#include "mesh/mesh_internal.h"
#include "model_io/checkpoint.h"
#include "tables/tables_internal.h"

#if !defined(LLMPAR_NO_IO)

#define LLMPAR__CHECKPOINT_VERSION 1  /* of the format */
#define LLMPAR__CHECKPOINT_CONTRACT 1 /* of docs/exact.md */
#define LLMPAR__CHECKPOINT_MANIFEST ((size_t)1 << 30) /* bytes of a manifest, at most */
#define LLMPAR__CHECKPOINT_NAME 1024  /* of a tensor with its kind, and of a file */
#define LLMPAR__CHECKPOINT_PATH 3072  /* of a file: the directory's length is checked once, at the entrance (1000 to save into, 2047 to load from), so that names behind it always fit */

/* Arrays of a parameter: itself, the optimizer's states, AdaLomo's moments. */
enum { LLMPAR__ARRAY_PARAM, LLMPAR__ARRAY_STATE0, LLMPAR__ARRAY_STATE1, LLMPAR__ARRAY_MOMENT, LLMPAR__ARRAY_ROW, LLMPAR__ARRAY_COL, LLMPAR__ARRAY_KINDS };
#define LLMPAR__ARRAYS 3 /* of one parameter, at most */
typedef struct llmpar__array {
    int32_t kind, dims;
    int64_t shape[LLMPAR_MAX_DIMS];
} llmpar__array;

LLMPAR__PRIVATE const char *llmpar__array_name(int32_t kind);
/* The arrays of a parameter; their number. The same on every rank. */
LLMPAR__PRIVATE int32_t llmpar__arrays(const llmpar_fsdp *fsdp, const llmpar_optim *optim, int32_t unit, int32_t param, llmpar__array out[LLMPAR__ARRAYS]);
/* What a world rank holds of one (flat_count 0: nothing), is_owner: and writes. */
LLMPAR__PRIVATE void llmpar__array_part(const llmpar_fsdp *fsdp, int32_t rank, int32_t unit, int32_t param, const llmpar__array *array, llmpar_local *out);
/* A unit's memory on this rank, fetched if it is offloaded. */
typedef struct llmpar__array_unit {
    char *base[1 + LLMPAR_OPTIMIZER_STATES];
    const llmpar_segment *segments;
    int32_t count;
} llmpar__array_unit;
LLMPAR__PRIVATE llmpar_status llmpar__array_fetch(llmpar_fsdp *fsdp, int32_t unit, llmpar__array_unit *out);
LLMPAR__PRIVATE llmpar_status llmpar__array_done(llmpar_fsdp *fsdp, int32_t unit, int32_t changed);
/* First element of what this rank holds of an array; NULL: nothing. */
LLMPAR__PRIVATE char *llmpar__array_memory(const llmpar_fsdp *fsdp, const llmpar_optim *optim, int32_t unit, int32_t param, const llmpar__array *array, const llmpar__array_unit *memory);

/* All ranks end with the same status: OK if every rank comes with OK, else that of the lowest failed one, whose text all ranks get as theirs: "rank 3: TEXT". error may be NULL: then the rank's own. Collective. */
LLMPAR__PRIVATE llmpar_status llmpar__checkpoint_agree(llmpar_ctx *ctx, llmpar_status status, const llmpar_error *error, const char *tag);

/* checkpoint_directory.c: rank 0's part. Local. */
typedef struct llmpar__checkpoint_file { char name[32]; uint64_t bytes, xxh64; } llmpar__checkpoint_file;
LLMPAR__PRIVATE llmpar_status llmpar__checkpoint_path(char out[LLMPAR__CHECKPOINT_PATH], llmpar_error *error, const char *format, ...) LLMPAR_PRINTF(3, 4);
LLMPAR__PRIVATE int64_t llmpar__checkpoint_step(const char *name); /* of "step-8"; -1: another name */
LLMPAR__PRIVATE llmpar_status llmpar__checkpoint_find(const llmpar_io *io, const char *directory, int64_t below, int64_t *step, llmpar_error *error); /* as llmpar_checkpoint_newest */
/* Makes DIR if need be, removes what crashes left, refuses a step that is there, makes step-N.tmp. */
LLMPAR__PRIVATE llmpar_status llmpar__checkpoint_begin(const llmpar_io *io, const char *directory, int64_t step, llmpar_error *error);
/* step-N.tmp, with all its files, becomes step-N; then `latest`; then older ones go. A failure behind the rename says that step-N is complete. */
LLMPAR__PRIVATE llmpar_status llmpar__checkpoint_publish(llmpar_heap *heap, const llmpar_io *io, const char *directory, int64_t step, int32_t keep, llmpar_error *error);
LLMPAR__PRIVATE llmpar_status llmpar__checkpoint_remove(const llmpar_io *io, const char *path, llmpar_error *error); /* a directory of files; a missing one is fine */

/* manifest.c */
typedef struct llmpar__manifest_part {
    int32_t file;
    llmpar_local local;
} llmpar__manifest_part;
typedef struct llmpar__manifest_tensor {
    const char *name;
    uint32_t kinds;                 /* bit by array kind */
    int32_t dims;
    int64_t shape[LLMPAR_MAX_DIMS];
    const llmpar__manifest_part *part;
    int32_t parts;
} llmpar__manifest_tensor;
typedef struct llmpar__manifest_file { const char *name; uint64_t bytes, xxh64; } llmpar__manifest_file;
typedef struct llmpar__manifest {
    llmpar_checkpoint_info info;
    llmpar_dtype stored;
    int32_t files, tensors;
    llmpar__manifest_file *file;
    llmpar__manifest_tensor *tensor;
    llmpar__manifest_part *part;
    llmpar_json *json;
} llmpar__manifest;
/* Writes `path` (synced under its name; its directory is not). ranks: of those with bytes 0 there are no files; config: NULL, or its entry. path NULL: nothing is written; refuses what load would, for its size. */
LLMPAR__PRIVATE llmpar_status llmpar__manifest_write(llmpar_fsdp *fsdp, const llmpar_optim *optim, const llmpar_checkpoint_info *info, const llmpar__checkpoint_file *config, const llmpar__checkpoint_file *ranks, const char *path, llmpar_error *error);
/* Checks everything that can be checked without the files and the model. Freed by destroy, also half-made. */
LLMPAR__PRIVATE llmpar_status llmpar__manifest_parse(llmpar_heap *heap, const char *text, size_t length, const char *name, llmpar__manifest *out, llmpar_error *error);
LLMPAR__PRIVATE int llmpar__manifest_is_shard(const char *name); /* of a file: may it hold parts of tensors? */
LLMPAR__PRIVATE void llmpar__manifest_destroy(llmpar_heap *heap, llmpar__manifest *manifest);

/* hf_files.c: DIR/name on the heap; NULL, with the error set, when out of memory. */
LLMPAR__PRIVATE char *llmpar__hf_join(llmpar_heap *heap, const char *directory, const char *name, llmpar_error *error);
/* DIR/name with this text, synced, in the place of what stood there. */
LLMPAR__PRIVATE llmpar_status llmpar__hf_put_text(llmpar_heap *heap, const llmpar_io *io, const char *directory, const char *name, const char *text, llmpar_error *error);

#endif /* LLMPAR_NO_IO */

#endif
