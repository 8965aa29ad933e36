#include "model_io/hf_files.h"
#include "model_io/checkpoint_internal.h"

#include <stdio.h>
#include <string.h>

#include "base/size.h"
#include "base/text_internal.h"

#if !defined(LLMPAR_NO_IO)

#define LLMPAR__HF_SINGLE "model.safetensors"
#define LLMPAR__HF_INDEX "model.safetensors.index.json"
#define LLMPAR__HF_BAD(...) llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: " __VA_ARGS__)
#define LLMPAR__HF_MAX_INDEX ((size_t)100000000) /* bytes, as for a header */

LLMPAR__PRIVATE_DEF char *llmpar__hf_join(llmpar_heap *heap, const char *directory, const char *name, llmpar_error *error)
{
    size_t bytes = strlen(directory) + strlen(name) + 2;
    char *path = LLMPAR__ALLOC(char, heap, bytes);
    if (path) snprintf(path, bytes, "%s/%s", directory, name);
    else llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory for a path", directory);
    return path;
}

/* ---- the index ---- */

LLMPAR_DEF void llmpar_hf_index_free(llmpar_heap *heap, llmpar_hf_index *index)
{
    if (!index) return;
    llmpar_heap_free(heap, (void *)index->tensor);
    llmpar_heap_free(heap, (void *)index->file);
    llmpar_heap_free(heap, index->place);
    llmpar_json_destroy(heap, index->json);
    memset(index, 0, sizeof *index);
}

static llmpar_status llmpar__hf_index_entry(llmpar_hf_index *index, const llmpar_json *entry, const char *name, llmpar_error *error)
{
    int32_t f = index->count ? index->place[index->count - 1] : 0; /* mostly the file of the tensor before */
    if (strlen(entry->key) != entry->key_length) return LLMPAR__HF_BAD("tensor \"%.200s\": the name holds a NUL byte (byte %zu)", name, entry->key, entry->position);
    if (entry->type != LLMPAR_JSON_STRING) return LLMPAR__HF_BAD("tensor \"%.200s\": expected the name of a file (byte %zu)", name, entry->key, entry->position);
    if (!entry->length || entry->length > 255 || strlen(entry->string) != entry->length || strpbrk(entry->string, "/\\") || strstr(entry->string, "..") || !strcmp(entry->string, "."))
        return LLMPAR__HF_BAD("tensor \"%.200s\" in file \"%.255s\": expected the name of a file in this directory, without '/', '\\' and \"..\" (byte %zu)", name, entry->key, entry->string, entry->position);
    if (!index->files || strcmp(index->file[f], entry->string))
        for (f = 0; f < index->files && strcmp(index->file[f], entry->string); f++) {}
    if (f == LLMPAR_HF_MAX_FILES) return llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "%s: file \"%.255s\" is one more than the %d that a model may have (byte %zu)", name, entry->string, LLMPAR_HF_MAX_FILES, entry->position);
    if (f == index->files) index->file[index->files++] = entry->string;
    index->tensor[index->count] = entry->key;
    index->place[index->count++] = f;
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_hf_index_parse(llmpar_heap *heap, const char *text, size_t length, const char *name, llmpar_hf_index *out, llmpar_error *error)
{
    LLMPAR__ZEROED(llmpar_json_desc, desc);
    memset(out, 0, sizeof *out);
    LLMPAR__NEED(heap && text && name, error);
    out->total_size = -1;
    desc.name = name;
    desc.unique_keys = 1;
    llmpar_status status = llmpar_json_parse(heap, text, length, &desc, &out->json, error);
    if (status) return status;
    const llmpar_json *map = llmpar_json_get(out->json, "weight_map"), *metadata = llmpar_json_get(out->json, "metadata"), *total = llmpar_json_get(metadata, "total_size");
    for (const llmpar_json *member = out->json->type == LLMPAR_JSON_OBJECT ? out->json->child : NULL; member && !status; member = member->next)
        if (member != map && member != metadata) status = LLMPAR__HF_BAD("unknown field \"%.60s\", expected metadata and weight_map (byte %zu)", name, member->key, member->position);
    if (!status && (!map || map->type != LLMPAR_JSON_OBJECT || !map->length)) status = LLMPAR__HF_BAD("expected an object with an object weight_map of tensors and files (byte %zu)", name, map ? map->position : out->json->position);
    if (!status && metadata && metadata->type != LLMPAR_JSON_OBJECT) status = LLMPAR__HF_BAD("metadata: expected an object (byte %zu)", name, metadata->position);
    if (!status && total) {
        /* Some tools have written it as 123.0. */
        int whole = total->type == LLMPAR_JSON_NUMBER && total->number >= 0 && (total->is_integer || (total->number < 9007199254740992.0 && (double)(int64_t)total->number == total->number));
        if (whole) out->total_size = total->is_integer ? total->integer : (int64_t)total->number;
        else status = LLMPAR__HF_BAD("metadata.total_size: expected a number of bytes (byte %zu)", name, total->position);
    }
    if (!status) {
        out->tensor = LLMPAR__ALLOC(const char *, heap, map->length);
        out->place = LLMPAR__ALLOC(int32_t, heap, map->length);
        out->file = LLMPAR__ALLOC(const char *, heap, map->length < LLMPAR_HF_MAX_FILES ? map->length : LLMPAR_HF_MAX_FILES);
        if (!out->tensor || !out->place || !out->file) status = llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory for %zu tensors", name, map->length);
    }
    for (const llmpar_json *entry = status ? NULL : map->child; entry && !status; entry = entry->next) status = llmpar__hf_index_entry(out, entry, name, error);
    if (status) llmpar_hf_index_free(heap, out);
    return status;
}

/* ---- reading ---- */

LLMPAR_DEF void llmpar_hf_files_close(llmpar_hf_files *files)
{
    if (!files) return;
    for (int32_t f = 0; f < files->count; f++) llmpar_safetensors_close(files->file[f]);
    llmpar_heap_free(files->heap, (void *)files->file);
    llmpar_heap_free(files->heap, (void *)(uintptr_t)files->path);
    llmpar_heap_free(files->heap, files);
}

LLMPAR_DEF const llmpar_safetensor *llmpar_hf_files_find(const llmpar_hf_files *files, const char *name, const llmpar_safetensors **file)
{
    for (int32_t f = 0; files && f < files->count; f++) {
        const llmpar_safetensor *tensor = llmpar_safetensors_find(files->file[f], name);
        *file = files->file[f];
        if (tensor) return tensor;
    }
    return NULL;
}

/* Each tensor that the index names stands in that file, and no file has another. */
static llmpar_status llmpar__hf_match_index(llmpar_hf_files *files, const llmpar_hf_index *index, llmpar_error *error)
{
    llmpar_status status = LLMPAR_OK;
    int64_t total = 0;
    int32_t first[LLMPAR_HF_MAX_FILES]; /* of the file's tensors in `seen` */
    for (int32_t f = 0; f < files->count; f++) {
        first[f] = files->tensors;
        files->tensors += files->file[f]->count;
    }
    char *seen = LLMPAR__ZALLOC(char, files->heap, (size_t)files->tensors);
    if (!seen) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory for %d tensors", files->path, (int)files->tensors);
    for (int32_t i = 0; i < index->count && !status; i++) {
        const llmpar_safetensors *file = files->file[index->place[i]];
        const llmpar_safetensor *tensor = llmpar_safetensors_find(file, index->tensor[i]);
        if (tensor) seen[first[index->place[i]] + (tensor - file->tensor)] = 1;
        else status = LLMPAR__HF_BAD("tensor %.200s is said to be in %s, which does not have it", files->path, index->tensor[i], index->file[index->place[i]]);
    }
    for (int32_t f = 0; f < files->count && !status; f++)
        for (int32_t t = 0; t < files->file[f]->count && !status; t++) {
            const llmpar_safetensor *tensor = &files->file[f]->tensor[t];
            total += (int64_t)tensor->bytes; /* of files that exist: no overflow */
            if (seen[first[f] + t]) continue;
            int32_t other = 0;
            while (other < files->count && (other == f || !llmpar_safetensors_find(files->file[other], tensor->name))) other++;
            if (other < files->count) status = LLMPAR__HF_BAD("tensor %.200s is in %s and in %s, expected once", files->path, tensor->name, index->file[other], index->file[f]);
            else status = LLMPAR__HF_BAD("tensor %.200s is in %s and not in the index", files->path, tensor->name, index->file[f]);
        }
    if (!status && index->total_size >= 0 && index->total_size != total)
        status = LLMPAR__HF_BAD("metadata.total_size is %lld, but the tensors have %lld bytes", files->path, (long long)index->total_size, (long long)total);
    llmpar_heap_free(files->heap, seen);
    return status;
}

static llmpar_status llmpar__hf_open_shards(llmpar_hf_files *files, const llmpar_io *io, const char *directory, llmpar_error *error)
{
    char *text = NULL;
    size_t bytes = 0;
    LLMPAR__ZEROED(llmpar_hf_index, index);
    llmpar_status status = llmpar_file_load(files->heap, io, files->path, LLMPAR__HF_MAX_INDEX, &text, &bytes, error);
    if (!status) status = llmpar_hf_index_parse(files->heap, text, bytes, files->path, &index, error);
    llmpar_heap_free(files->heap, text);
    if (!status) {
        files->file = LLMPAR__ZALLOC(llmpar_safetensors *, files->heap, (size_t)index.files);
        if (!files->file) status = llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory for %d files", files->path, (int)index.files);
    }
    for (int32_t f = 0; f < index.files && !status; f++) {
        char *path = llmpar__hf_join(files->heap, directory, index.file[f], error);
        status = path ? llmpar_safetensors_open(files->heap, io, path, &files->file[f], error) : LLMPAR_ERR_MEMORY;
        if (!status) files->count++;
        llmpar_heap_free(files->heap, path);
    }
    if (!status) status = llmpar__hf_match_index(files, &index, error);
    llmpar_hf_index_free(files->heap, &index);
    return status;
}

LLMPAR_DEF llmpar_status llmpar_hf_files_open(llmpar_heap *heap, const llmpar_io *io, const char *directory, llmpar_hf_files **out, llmpar_error *error)
{
    *out = NULL;
    LLMPAR__NEED(heap, error);
    LLMPAR__NEED_PATH(directory, error);
    char *single = llmpar__hf_join(heap, directory, LLMPAR__HF_SINGLE, error), *index = llmpar__hf_join(heap, directory, LLMPAR__HF_INDEX, error);
    llmpar_hf_files *files = LLMPAR__ZALLOC(llmpar_hf_files, heap, 1);
    int sharded = single && index && llmpar_file_kind(io, single) == LLMPAR_IO_NONE && llmpar_file_kind(io, index) != LLMPAR_IO_NONE;
    llmpar_safetensors **file = sharded ? NULL : LLMPAR__ZALLOC(llmpar_safetensors *, heap, 1);
    llmpar_status status = single && index && files && (sharded || file) ? LLMPAR_OK : llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory", directory);
    llmpar_heap_free(heap, sharded ? single : index);
    if (!files) {
        llmpar_heap_free(heap, sharded ? index : single);
        llmpar_heap_free(heap, (void *)file);
        return status;
    }
    files->heap = heap;
    files->path = sharded ? index : single;
    files->file = file;
    if (!status && sharded) status = llmpar__hf_open_shards(files, io, directory, error);
    else if (!status) status = llmpar_safetensors_open(heap, io, files->path, &file[0], error);
    if (!status && !sharded) {
        files->count = 1;
        files->tensors = files->file[0]->count;
    }
    if (status) llmpar_hf_files_close(files);
    else *out = files;
    return status;
}

/* ---- writing ---- */

struct llmpar_hf_writer {
    llmpar_heap *heap;
    const llmpar_io *io;
    const llmpar_safetensor *tensor; /* [count], borrowed */
    int32_t count, next;             /* next: the first tensor of no file so far */
    int32_t files, parts;            /* in all; begun */
    uint64_t max_bytes, total, left; /* left: bytes that the open file still expects */
    llmpar_safetensors_writer *writer;
    char *directory, *config;
};

static uint64_t llmpar__hf_bytes(const llmpar_safetensor *tensor)
{
    uint64_t bytes = llmpar_dtype_size(tensor->dtype);
    for (int32_t d = 0; d < tensor->dims; d++) bytes *= (uint64_t)tensor->shape[d];
    return bytes;
}

/* One behind the last tensor of the file that begins with tensor `from`; *bytes: of data in it. */
static int32_t llmpar__hf_file_end(const llmpar_hf_writer *w, int32_t from, uint64_t *bytes)
{
    int32_t at = from;
    for (*bytes = 0; at < w->count; *bytes += llmpar__hf_bytes(&w->tensor[at++]))
        if (at > from && w->max_bytes && *bytes + llmpar__hf_bytes(&w->tensor[at]) > w->max_bytes) break;
    return at;
}

/* The name of part 1 .. files, as transformers gives it. */
static char *llmpar__hf_part(const llmpar_hf_writer *w, int32_t part, const char *ending, llmpar_error *error)
{
    char name[80];
    if (w->files == 1) snprintf(name, sizeof name, LLMPAR__HF_SINGLE);
    else snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors%s", (int)part, (int)w->files, ending);
    return llmpar__hf_join(w->heap, w->directory, name, error);
}

static llmpar_status llmpar__hf_begin_part(llmpar_hf_writer *w, llmpar_error *error)
{
    int32_t end = llmpar__hf_file_end(w, w->next, &w->left);
    char *path = llmpar__hf_part(w, ++w->parts, ".part", error);
    if (!path) return LLMPAR_ERR_MEMORY;
    llmpar_status status = llmpar_safetensors_writer_open(w->heap, w->io, path, w->tensor + w->next, end - w->next, &w->writer, error);
    w->next = end;
    llmpar_heap_free(w->heap, path);
    return status;
}

static llmpar_status llmpar__hf_end_part(llmpar_hf_writer *w, llmpar_error *error)
{
    llmpar_safetensors_writer *writer = w->writer;
    w->writer = NULL;
    return llmpar_safetensors_writer_commit(writer, error);
}

LLMPAR_DEF llmpar_status llmpar_hf_writer_open(llmpar_heap *heap, const llmpar_io *io, const char *directory, const llmpar_safetensor *tensors, int32_t count, uint64_t max_bytes, const char *config, llmpar_hf_writer **out, llmpar_error *error)
{
    *out = NULL;
    LLMPAR__NEED(heap, error);
    LLMPAR__NEED_PATH(directory, error);
    llmpar_hf_writer *w = LLMPAR__ZALLOC(llmpar_hf_writer, heap, 1);
    llmpar_status status = LLMPAR_OK;
    if (!w) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory", directory);
    w->heap = heap;
    w->io = io;
    w->tensor = tensors;
    w->count = count;
    w->max_bytes = max_bytes;
    w->directory = llmpar_heap_strdup(heap, directory);
    w->config = config ? llmpar_heap_strdup(heap, config) : NULL;
    if (!w->directory || (config && !w->config)) status = llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory", directory);
    if (!status) status = llmpar_safetensors_check(heap, directory, tensors, count, error);
    for (int32_t at = 0; !status && (at < count || !w->files);) {
        uint64_t bytes;
        at = llmpar__hf_file_end(w, at, &bytes);
        w->total += bytes;
        if (++w->files > LLMPAR_HF_MAX_FILES) status = llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: files of %llu bytes are more than %d, expected fewer", directory, (unsigned long long)max_bytes, LLMPAR_HF_MAX_FILES);
    }
    if (!status) status = llmpar_directory_ensure(io, directory, error);
    if (!status) status = llmpar__hf_begin_part(w, error);
    if (status) llmpar_hf_writer_abandon(w);
    else *out = w;
    return status;
}

LLMPAR_DEF llmpar_status llmpar_hf_writer_write(llmpar_hf_writer *writer, const void *data, size_t bytes, llmpar_error *error)
{
    LLMPAR__NEED(writer, error);
    const char *from = (const char *)data;
    llmpar_status status = writer->writer ? LLMPAR_OK : llmpar_error_set(error, LLMPAR_ERR_IO, "%s: an earlier write failed", writer->directory);
    while (bytes && !status) {
        if (!writer->left && writer->next < writer->count) {
            status = llmpar__hf_end_part(writer, error);
            if (!status) status = llmpar__hf_begin_part(writer, error);
            continue;
        }
        size_t part = writer->left && bytes > writer->left ? (size_t)writer->left : bytes; /* what is too much is the file's to refuse */
        status = llmpar_safetensors_writer_write(writer->writer, from, part, error);
        writer->left -= status ? 0 : part;
        from += part;
        bytes -= part;
    }
    return status;
}

/* The names of removed files come one at a time: what a list does that changes while it is read is nobody's promise. */
typedef struct llmpar__hf_stale { const llmpar_hf_writer *writer; char name[64]; } llmpar__hf_stale;

/* Shards of another division, or left behind unfinished. -1: found, and its name taken. */
static int llmpar__hf_is_stale(void *user, const char *name)
{
    llmpar__hf_stale *stale = (llmpar__hf_stale *)user;
    static const char form[] = "model-00000-of-00000.safetensors";
    int32_t part = 0, files = 0, i = 0;
    for (; form[i] && (form[i] == '0' ? name[i] >= '0' && name[i] <= '9' : name[i] == form[i]); i++)
        if (form[i] == '0') *(i < 12 ? &part : &files) = (i < 12 ? part : files) * 10 + (name[i] - '0');
    if (form[i] || (name[i] && strcmp(name + i, ".part") && strcmp(name + i, ".part.tmp"))) return 0;
    if (!name[i] && stale->writer->files > 1 && files == stale->writer->files && part >= 1 && part <= files) return 0;
    snprintf(stale->name, sizeof stale->name, "%s", name);
    return -1;
}

static llmpar_status llmpar__hf_remove(const llmpar_hf_writer *w, const char *name, llmpar_error *error)
{
    char *path = llmpar__hf_join(w->heap, w->directory, name, error);
    llmpar_status status = path ? llmpar_file_remove(w->io, path, error) : LLMPAR_ERR_MEMORY;
    llmpar_heap_free(w->heap, path);
    return status;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__hf_put_text(llmpar_heap *heap, const llmpar_io *io, const char *directory, const char *name, const char *text, llmpar_error *error)
{
    char *path = llmpar__hf_join(heap, directory, name, error);
    llmpar_writer *writer = NULL;
    llmpar_status status = path ? llmpar_writer_open(heap, io, path, &writer, error) : LLMPAR_ERR_MEMORY;
    if (!status) status = llmpar_writer_write(writer, text, strlen(text), error);
    if (status) llmpar_writer_abandon(writer);
    else status = llmpar_writer_commit(writer, error);
    llmpar_heap_free(heap, path);
    return status;
}

static void llmpar__hf_put_index(const llmpar_hf_writer *w, llmpar__text *out)
{
    int32_t part = 0, end = 0;
    uint64_t bytes;
    llmpar__text_put(out, "{\n  \"metadata\": {\n    \"total_size\": %llu\n  },\n  \"weight_map\": {\n", (unsigned long long)w->total);
    for (int32_t i = 0; i < w->count; i++) {
        if (i == end) {
            end = llmpar__hf_file_end(w, i, &bytes);
            part++;
        }
        llmpar__text_put(out, "    ");
        llmpar__text_put_json(out, w->tensor[i].name);
        llmpar__text_put(out, ": \"model-%05d-of-%05d.safetensors\"%s\n", (int)part, (int)w->files, i + 1 < w->count ? "," : "");
    }
    llmpar__text_put(out, "  }\n}\n");
}

/* All shards are complete under their .part names. */
static llmpar_status llmpar__hf_publish(llmpar_hf_writer *w, llmpar_error *error)
{
    llmpar__text index = llmpar__text_begin(NULL, 0);
    llmpar__hf_put_index(w, &index);
    size_t bytes = index.used;
    char *text = LLMPAR__ALLOC(char, w->heap, bytes + 1);
    llmpar_status status = text ? LLMPAR_OK : llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory for an index of %zu bytes", w->directory, bytes);
    if (!status) status = llmpar__hf_remove(w, LLMPAR__HF_SINGLE, error);
    if (!status) status = llmpar__hf_remove(w, LLMPAR__HF_INDEX, error);
    if (!status) status = llmpar_directory_sync(w->io, w->directory, error); /* gone for good before a shard of the old index is replaced */
    for (int32_t part = 1; part <= w->files && !status; part++) {
        char *from = llmpar__hf_part(w, part, ".part", error), *to = llmpar__hf_part(w, part, "", error);
        status = from && to ? llmpar_file_rename(w->io, from, to, error) : LLMPAR_ERR_MEMORY;
        llmpar_heap_free(w->heap, from);
        llmpar_heap_free(w->heap, to);
    }
    if (!status) status = llmpar_directory_sync(w->io, w->directory, error);
    if (!status) {
        index = llmpar__text_begin(text, bytes + 1);
        llmpar__hf_put_index(w, &index);
        status = llmpar__hf_put_text(w->heap, w->io, w->directory, LLMPAR__HF_INDEX, text, error);
    }
    llmpar_heap_free(w->heap, text);
    return status;
}

LLMPAR_DEF llmpar_status llmpar_hf_writer_commit(llmpar_hf_writer *writer, llmpar_error *error)
{
    LLMPAR__NEED(writer, error);
    llmpar__hf_stale stale;
    llmpar_status status = writer->writer ? LLMPAR_OK : llmpar_error_set(error, LLMPAR_ERR_IO, "%s: an earlier write failed", writer->directory);
    while (!status && writer->next < writer->count) { /* only tensors without elements are left, or bytes are missing */
        status = llmpar__hf_end_part(writer, error);
        if (!status) status = llmpar__hf_begin_part(writer, error);
    }
    if (!status && writer->files > 1) status = llmpar__hf_end_part(writer, error);
    /* Weights that find no room leave a config.json that stood here, and with it the old model, alone. */
    if (!status && writer->config) status = llmpar__hf_put_text(writer->heap, writer->io, writer->directory, "config.json", writer->config, error);
    if (!status && writer->files > 1) status = llmpar__hf_publish(writer, error);
    else if (!status) status = llmpar__hf_end_part(writer, error);
    if (!status && writer->files == 1) status = llmpar__hf_remove(writer, LLMPAR__HF_INDEX, error);
    stale.writer = writer;
    for (int found = 1; found && !status;) {
        stale.name[0] = 0;
        status = llmpar_directory_list(writer->io, writer->directory, llmpar__hf_is_stale, &stale, error);
        found = stale.name[0];
        if (!status && found) status = llmpar__hf_remove(writer, stale.name, error);
    }
    if (!status) status = llmpar_directory_sync(writer->io, writer->directory, error);
    if (!status) writer->parts = 0; /* nothing of them is ours to remove any more */
    llmpar_hf_writer_abandon(writer);
    return status;
}

LLMPAR_DEF void llmpar_hf_writer_abandon(llmpar_hf_writer *writer)
{
    if (!writer) return;
    llmpar_safetensors_writer_abandon(writer->writer);
    for (int32_t part = 1; part <= writer->parts && writer->files > 1; part++) {
        char *path = llmpar__hf_part(writer, part, ".part", NULL);
        if (path) llmpar_file_remove(writer->io, path, NULL);
        llmpar_heap_free(writer->heap, path);
    }
    llmpar_heap_free(writer->heap, writer->directory);
    llmpar_heap_free(writer->heap, writer->config);
    llmpar_heap_free(writer->heap, writer);
}

#undef LLMPAR__HF_SINGLE
#undef LLMPAR__HF_INDEX
#undef LLMPAR__HF_BAD
#undef LLMPAR__HF_MAX_INDEX

#endif /* LLMPAR_NO_IO */
