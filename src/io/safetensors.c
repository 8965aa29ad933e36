#include "io/safetensors.h"
#include "base/json.h"
#include "base/size.h"
#include "base/text_internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#if !defined(LLMPAR_NO_IO)

/* The format's limits: https://github.com/huggingface/safetensors#format */
#define LLMPAR__ST_MAX_HEADER 100000000u
#define LLMPAR__ST_MAX_DIMS 8

typedef struct llmpar__st_dtype { const char *name; llmpar_dtype dtype; } llmpar__st_dtype;

/* Every dtype the format knows; LLMPAR_DTYPE_DEFAULT: not one of ours. */
static const llmpar__st_dtype llmpar__st_dtypes[] = {
    { "F32", LLMPAR_F32 }, { "F64", LLMPAR_F64 }, { "BF16", LLMPAR_BF16 }, { "F16", LLMPAR_F16 },
    { "I32", LLMPAR_I32 }, { "I64", LLMPAR_I64 }, { "U64", LLMPAR_U64 }, { "U8", LLMPAR_U8 },
    { "BOOL", LLMPAR_DTYPE_DEFAULT }, { "I8", LLMPAR_DTYPE_DEFAULT }, { "I16", LLMPAR_DTYPE_DEFAULT }, { "U16", LLMPAR_DTYPE_DEFAULT },
    { "U32", LLMPAR_DTYPE_DEFAULT }, { "F4", LLMPAR_DTYPE_DEFAULT }, { "F6_E2M3", LLMPAR_DTYPE_DEFAULT }, { "F6_E3M2", LLMPAR_DTYPE_DEFAULT },
    { "F8_E5M2", LLMPAR_DTYPE_DEFAULT }, { "F8_E4M3", LLMPAR_DTYPE_DEFAULT }, { "F8_E8M0", LLMPAR_DTYPE_DEFAULT },
    { "F8_E4M3FNUZ", LLMPAR_DTYPE_DEFAULT }, { "F8_E5M2FNUZ", LLMPAR_DTYPE_DEFAULT }, { "C64", LLMPAR_DTYPE_DEFAULT }
};
#define LLMPAR__ST_DTYPES (sizeof llmpar__st_dtypes / sizeof llmpar__st_dtypes[0])
static const char llmpar__st_supported[] = "F32, F64, BF16, F16, I32, I64, U64 or U8";

/* What an open file owns; llmpar_safetensors.state points to it, and its first member is what the user holds. */
typedef struct llmpar__st_file {
    llmpar_safetensors file;
    llmpar_heap *heap;
    llmpar_file source;          /* closed for open_memory */
    char *path;
    char *names;                 /* all names, each zero-terminated */
    llmpar_safetensor *tensors;
} llmpar__st_file;

/* Where reading stands, for messages. */
typedef struct llmpar__st_reader {
    const char *path;
    const char *header;          /* the JSON text */
    const char *tensor;          /* name, UTF-8 */
    size_t data_bytes;           /* bytes after the header */
    llmpar_error *error;
} llmpar__st_reader;

/* ---- sorting: heapsort, because the library takes no memory behind the allocator's back and qsort may ---- */

typedef int (*llmpar__st_before)(const llmpar_safetensor *a, const llmpar_safetensor *b);

static int llmpar__st_by_name(const llmpar_safetensor *a, const llmpar_safetensor *b) { return strcmp(a->name, b->name) < 0; }

/* Empty tensors before the one that starts at the same byte. */
static int llmpar__st_by_begin(const llmpar_safetensor *a, const llmpar_safetensor *b)
{
    return a->begin != b->begin ? a->begin < b->begin : a->bytes < b->bytes;
}

static void llmpar__st_sink(llmpar_safetensor *t, size_t root, size_t count, llmpar__st_before before)
{
    llmpar_safetensor value = t[root];
    for (;;) {
        size_t child = 2 * root + 1;
        if (child >= count) break;
        if (child + 1 < count && before(&t[child], &t[child + 1])) child++;
        if (!before(&value, &t[child])) break;
        t[root] = t[child];
        root = child;
    }
    t[root] = value;
}

static void llmpar__st_sort(llmpar_safetensor *t, size_t count, llmpar__st_before before)
{
    for (size_t i = count / 2; i > 0; i--) llmpar__st_sink(t, i - 1, count, before);
    for (size_t i = count; i > 1; i--) {
        llmpar_safetensor last = t[i - 1];
        t[i - 1] = t[0];
        t[0] = last;
        llmpar__st_sink(t, 0, i - 1, before);
    }
}

/* ---- reading ---- */

static const char *llmpar__st_type_name(const llmpar_json *value)
{
    static const char *const names[] = {"null", "a boolean", "a number", "a string", "an array", "an object"}; /* by llmpar_json_type */
    return names[value->type];
}

#define LLMPAR__ST_BAD(format, ...) llmpar_error_set(r->error, LLMPAR_ERR_FORMAT, "%s: " format, r->path, __VA_ARGS__)
LLMPAR_PRINTF(4, 5) static llmpar_status llmpar__st_wrong(const llmpar__st_reader *r, llmpar_status status, const llmpar_json *value, const char *format, ...)
{
    char text[512];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    return llmpar_error_set(r->error, status, "%s: tensor \"%.200s\": %s (header byte %zu)", r->path, r->tensor, text, value->position);
}

/* A non-negative integer written as one: no fraction, no exponent, no "-0". */
static llmpar_status llmpar__st_extent(const llmpar__st_reader *r, const char *field, size_t index, const llmpar_json *value, int64_t *out)
{
    if (value->type != LLMPAR_JSON_NUMBER)
        return llmpar__st_wrong(r, LLMPAR_ERR_FORMAT, value, "%s[%zu] is %s, expected a non-negative integer", field, index, llmpar__st_type_name(value));
    if (!value->is_integer || r->header[value->position] == '-') {
        const char *text = r->header + value->position; /* ends: at least the object's '}' follows */
        size_t length = strspn(text, "+-.0123456789eE");
        return llmpar__st_wrong(r, LLMPAR_ERR_FORMAT, value, "%s[%zu] = %.*s, expected a non-negative integer below 2^63", field, index, length > 40 ? 40 : (int)length, text);
    }
    *out = value->integer;
    return LLMPAR_OK;
}

static llmpar_status llmpar__st_read_dtype(const llmpar__st_reader *r, const llmpar_json *value, llmpar_dtype *out)
{
    if (value->type != LLMPAR_JSON_STRING)
        return llmpar__st_wrong(r, LLMPAR_ERR_FORMAT, value, "dtype is %s, expected a string", llmpar__st_type_name(value));
    for (size_t i = 0; i < LLMPAR__ST_DTYPES; i++) {
        if (strlen(llmpar__st_dtypes[i].name) != value->length || memcmp(llmpar__st_dtypes[i].name, value->string, value->length)) continue;
        *out = llmpar__st_dtypes[i].dtype;
        if (*out != LLMPAR_DTYPE_DEFAULT) return LLMPAR_OK;
        return llmpar__st_wrong(r, LLMPAR_ERR_UNSUPPORTED, value, "dtype %s is not supported, expected %s", llmpar__st_dtypes[i].name, llmpar__st_supported);
    }
    return llmpar__st_wrong(r, LLMPAR_ERR_FORMAT, value, "unknown dtype \"%.60s\", expected %s", value->string, llmpar__st_supported);
}

static llmpar_status llmpar__st_read_shape(const llmpar__st_reader *r, const llmpar_json *value, llmpar_safetensor *out, size_t *bytes)
{
    size_t count = llmpar_dtype_size(out->dtype), i = 0;
    if (value->type != LLMPAR_JSON_ARRAY)
        return llmpar__st_wrong(r, LLMPAR_ERR_FORMAT, value, "shape is %s, expected an array", llmpar__st_type_name(value));
    if (value->length > LLMPAR__ST_MAX_DIMS)
        return llmpar__st_wrong(r, LLMPAR_ERR_UNSUPPORTED, value, "shape has %zu dims, at most %d are supported", value->length, LLMPAR__ST_MAX_DIMS);
    /* The product is taken in the reference's order: a zero extent does not excuse an overflow before it. */
    for (const llmpar_json *extent = value->child; extent; extent = extent->next, i++) {
        llmpar_status status = llmpar__st_extent(r, "shape", i, extent, &out->shape[i]);
        if (status) return status;
        if (!llmpar_size_mul(count, (size_t)out->shape[i], &count))
            return llmpar__st_wrong(r, LLMPAR_ERR_OVERFLOW, extent, "the product of the shape overflows at shape[%zu] = %lld", i, (long long)out->shape[i]);
    }
    out->dims = (int32_t)value->length;
    *bytes = count;
    return LLMPAR_OK;
}

/* Leaves out->begin relative to the data. */
static llmpar_status llmpar__st_read_offsets(const llmpar__st_reader *r, const llmpar_json *value, size_t bytes, llmpar_safetensor *out)
{
    int64_t begin = 0, end = 0;
    if (value->type != LLMPAR_JSON_ARRAY || value->length != 2)
        return llmpar__st_wrong(r, LLMPAR_ERR_FORMAT, value, "data_offsets is %s of length %zu, expected an array of 2", llmpar__st_type_name(value), value->type == LLMPAR_JSON_ARRAY || value->type == LLMPAR_JSON_OBJECT ? value->length : 0);
    llmpar_status status = llmpar__st_extent(r, "data_offsets", 0, value->child, &begin);
    if (!status) status = llmpar__st_extent(r, "data_offsets", 1, value->child->next, &end);
    if (status) return status;
    if (end < begin)
        return llmpar__st_wrong(r, LLMPAR_ERR_FORMAT, value, "data_offsets [%lld, %lld] end before they begin", (long long)begin, (long long)end);
    if ((uint64_t)end > (uint64_t)r->data_bytes)
        return llmpar__st_wrong(r, LLMPAR_ERR_FORMAT, value, "data_offsets [%lld, %lld] reach past the end of the file, which has %zu bytes of data", (long long)begin, (long long)end, r->data_bytes);
    if ((uint64_t)(end - begin) != (uint64_t)bytes)
        return llmpar__st_wrong(r, LLMPAR_ERR_FORMAT, value, "dtype and shape need %zu bytes, data_offsets [%lld, %lld] give %lld", bytes, (long long)begin, (long long)end, (long long)(end - begin));
    out->begin = (size_t)begin;
    out->bytes = bytes;
    return LLMPAR_OK;
}

static llmpar_status llmpar__st_read_tensor(llmpar__st_reader *r, const llmpar_json *entry, llmpar_safetensor *out)
{
    const llmpar_json *member, *dtype = llmpar_json_get(entry, "dtype"), *shape = llmpar_json_get(entry, "shape"), *offsets = llmpar_json_get(entry, "data_offsets");
    size_t bytes = 0;
    if (strlen(entry->key) != entry->key_length)
        return llmpar__st_wrong(r, LLMPAR_ERR_FORMAT, entry, "the name holds a NUL byte");
    if (entry->type != LLMPAR_JSON_OBJECT)
        return LLMPAR__ST_BAD("tensor \"%.200s\" is %s, expected an object with dtype, shape and data_offsets (header byte %zu)", r->tensor, llmpar__st_type_name(entry), entry->position);
    if (!dtype || !shape || !offsets)
        return llmpar__st_wrong(r, LLMPAR_ERR_FORMAT, entry, "%s is missing", !dtype ? "dtype" : !shape ? "shape" : "data_offsets");
    for (member = entry->child; member; member = member->next)
        if (member != dtype && member != shape && member != offsets)
            return llmpar__st_wrong(r, LLMPAR_ERR_FORMAT, member, "unknown field \"%.60s\", expected dtype, shape and data_offsets", member->key);
    llmpar_status status = llmpar__st_read_dtype(r, dtype, &out->dtype);
    if (!status) status = llmpar__st_read_shape(r, shape, out, &bytes);
    return status ? status : llmpar__st_read_offsets(r, offsets, bytes, out);
}

static llmpar_status llmpar__st_check_metadata(const llmpar__st_reader *r, const llmpar_json *metadata)
{
    if (metadata->type != LLMPAR_JSON_OBJECT)
        return LLMPAR__ST_BAD("__metadata__ is %s, expected an object of strings (header byte %zu)", llmpar__st_type_name(metadata), metadata->position);
    for (const llmpar_json *member = metadata->child; member; member = member->next)
        if (member->type != LLMPAR_JSON_STRING)
            return LLMPAR__ST_BAD("__metadata__ \"%.100s\" is %s, expected a string (header byte %zu)", member->key, llmpar__st_type_name(member), member->position);
    return LLMPAR_OK;
}

/* Fills s->tensors and s->names from the parsed header; begin is still relative. */
static llmpar_status llmpar__st_read_header(llmpar__st_file *s, llmpar__st_reader *r, const llmpar_json *root)
{
    size_t count = 0, name_bytes = 0, at = 0;
    llmpar_status status = LLMPAR_OK;
    for (const llmpar_json *entry = root->child; entry && !status; entry = entry->next) {
        if (!strcmp(entry->key, "__metadata__") && entry->key_length == 12) {
            status = llmpar__st_check_metadata(r, entry);
            continue;
        }
        count++;
        name_bytes += entry->key_length + 1; /* each byte stands in a header of at most 10^8 */
    }
    if (status) return status;
    s->tensors = LLMPAR__ZALLOC(llmpar_safetensor, s->heap, count);
    s->names = LLMPAR__ALLOC(char, s->heap, name_bytes);
    if (!s->tensors || !s->names) return llmpar_error_set(r->error, LLMPAR_ERR_MEMORY, "%s: out of memory for %zu tensor names", r->path, count);
    for (const llmpar_json *entry = root->child; entry; entry = entry->next) {
        llmpar_safetensor *tensor = &s->tensors[s->file.count];
        if (!strcmp(entry->key, "__metadata__") && entry->key_length == 12) continue;
        r->tensor = entry->key;
        status = llmpar__st_read_tensor(r, entry, tensor);
        if (status) return status;
        memcpy(s->names + at, entry->key, entry->key_length + 1);
        tensor->name = s->names + at;
        at += entry->key_length + 1;
        s->file.count++;
    }
    return LLMPAR_OK;
}

/* Every byte of the data belongs to exactly one tensor. Makes `begin` absolute. */
static llmpar_status llmpar__st_check_cover(llmpar__st_file *s, const llmpar__st_reader *r, size_t data_at)
{
    size_t reached = 0;
    llmpar__st_sort(s->tensors, (size_t)s->file.count, llmpar__st_by_begin);
    for (int32_t i = 0; i < s->file.count; i++) {
        llmpar_safetensor *tensor = &s->tensors[i];
        if (tensor->begin > reached)
            return LLMPAR__ST_BAD("tensor \"%.200s\" begins at data byte %zu, expected %zu: a gap of %zu bytes before it (file byte %zu)", tensor->name, tensor->begin, reached, tensor->begin - reached, data_at + reached);
        if (tensor->begin < reached)
            return LLMPAR__ST_BAD("tensor \"%.200s\" begins at data byte %zu, expected %zu: it overlaps tensor \"%.200s\" (file byte %zu)", tensor->name, tensor->begin, reached, s->tensors[i - 1].name, data_at + tensor->begin);
        reached += tensor->bytes;
        tensor->begin += data_at;
    }
    if (reached != r->data_bytes)
        return LLMPAR__ST_BAD("%zu bytes follow the last tensor (file byte %zu)", r->data_bytes - reached, data_at + reached);
    llmpar__st_sort(s->tensors, (size_t)s->file.count, llmpar__st_by_name);
    return LLMPAR_OK;
}

/* first[at most 8]: how the file of `bytes` begins. *length: of the header, which lies inside the file. */
static llmpar_status llmpar__st_header_length(const llmpar__st_file *s, const unsigned char *first, uint64_t bytes, size_t *length, llmpar_error *error)
{
    uint64_t stated = 0;
    if (bytes < 8) return llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: the file has %u bytes, expected at least 8 for the header length", s->path, (unsigned)bytes);
    for (int i = 7; i >= 0; i--) stated = stated << 8 | first[i];
    if (stated > LLMPAR__ST_MAX_HEADER)
        return llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: the header length is %llu, expected at most %u (file byte 0)", s->path, (unsigned long long)stated, LLMPAR__ST_MAX_HEADER);
    if (stated > bytes - 8)
        return llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: the header length is %llu, but only %llu bytes follow it: the file is truncated (file byte 0)",
                                s->path, (unsigned long long)stated, (unsigned long long)(bytes - 8));
    if ((uint64_t)(size_t)bytes != bytes) return llmpar_error_set(error, LLMPAR_ERR_OVERFLOW, "%s: %llu bytes are more than this machine can address", s->path, (unsigned long long)bytes);
    *length = (size_t)stated;
    return LLMPAR_OK;
}

static llmpar_status llmpar__st_parse(llmpar__st_file *s, const char *header, size_t length, size_t data_bytes, llmpar_error *error)
{
    llmpar_json *root = NULL;
    char name[256];
    LLMPAR__ZEROED(llmpar__st_reader, r);
    LLMPAR__ZEROED(llmpar_json_desc, desc);
    if (length == 0 || header[0] != '{')
        return llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: the header does not begin with '{' (file byte 8)", s->path);
    snprintf(name, sizeof name, "%.200s: header", s->path);
    desc.name = name;
    desc.unique_keys = 1;
    llmpar_status status = llmpar_json_parse(s->heap, header, length, &desc, &root, error);
    if (status) return status;
    r.path = s->path;
    r.header = header;
    r.data_bytes = data_bytes;
    r.error = error;
    status = llmpar__st_read_header(s, &r, root);
    llmpar_json_destroy(s->heap, root);
    if (!status) status = llmpar__st_check_cover(s, &r, 8 + length);
    s->file.tensor = s->tensors;
    s->file.path = s->path;
    return status;
}

/* An empty file object with its path, or NULL. */
static llmpar__st_file *llmpar__st_create(llmpar_heap *heap, const char *path, llmpar_error *error)
{
    llmpar__st_file *s = LLMPAR__ZALLOC(llmpar__st_file, heap, 1);
    if (s) {
        s->heap = heap;
        s->file.state = s;
        s->source.handle = -1;
        s->path = llmpar_heap_strdup(heap, path);
        if (s->path) return s;
        llmpar_heap_free(heap, s);
    }
    llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory", path);
    return NULL;
}

LLMPAR_DEF void llmpar_safetensors_close(llmpar_safetensors *file)
{
    if (!file) return;
    llmpar__st_file *s = (llmpar__st_file *)file->state;
    llmpar_heap *heap = s->heap;
    llmpar_file_close(&s->source);
    llmpar_heap_free(heap, s->tensors);
    llmpar_heap_free(heap, s->names);
    llmpar_heap_free(heap, s->path);
    llmpar_heap_free(heap, s);
}

/* What was opened, or nothing of it. */
static llmpar_status llmpar__st_opened(llmpar__st_file *s, llmpar_status status, llmpar_safetensors **out)
{
    if (status) llmpar_safetensors_close(&s->file);
    else *out = &s->file;
    return status;
}

LLMPAR_DEF llmpar_status llmpar_safetensors_open(llmpar_heap *heap, const llmpar_io *io, const char *path, llmpar_safetensors **out, llmpar_error *error)
{
    unsigned char first[8];
    char *header = NULL;
    size_t length = 0;
    *out = NULL;
    LLMPAR__NEED(heap, error);
    LLMPAR__NEED_PATH(path, error);
    llmpar__st_file *s = llmpar__st_create(heap, path, error);
    if (!s) return LLMPAR_ERR_MEMORY;
    llmpar_status status = llmpar_file_open(io, s->path, &s->source, error);
    if (!status && s->source.bytes >= 8) status = llmpar_file_read(&s->source, 0, first, 8, error);
    if (!status) status = llmpar__st_header_length(s, first, s->source.bytes, &length, error);
    if (!status) header = LLMPAR__ALLOC(char, heap, length);
    if (!status && !header) status = llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory for a header of %zu bytes", path, length);
    if (!status) status = llmpar_file_read(&s->source, 8, header, length, error);
    if (!status) status = llmpar__st_parse(s, header, length, (size_t)s->source.bytes - 8 - length, error);
    llmpar_heap_free(heap, header);
    s->file.source = &s->source;
    return llmpar__st_opened(s, status, out);
}

LLMPAR_DEF llmpar_status llmpar_safetensors_open_memory(llmpar_heap *heap, const void *data, size_t bytes, const char *name, llmpar_safetensors **out, llmpar_error *error)
{
    size_t length = 0;
    *out = NULL;
    LLMPAR__NEED(heap && data && name, error);
    llmpar__st_file *s = llmpar__st_create(heap, name, error);
    if (!s) return LLMPAR_ERR_MEMORY;
    llmpar_status status = llmpar__st_header_length(s, (const unsigned char *)data, bytes, &length, error);
    if (!status) status = llmpar__st_parse(s, (const char *)data + 8, length, bytes - 8 - length, error);
    s->file.data = (const unsigned char *)data;
    return llmpar__st_opened(s, status, out);
}

LLMPAR_DEF llmpar_status llmpar_safetensors_read(const llmpar_safetensors *file, const llmpar_safetensor *tensor, size_t offset, size_t bytes, void *to, llmpar_error *error)
{
    LLMPAR__NEED(file && tensor, error);
    llmpar__st_file *s = (llmpar__st_file *)file->state;
    if (offset > tensor->bytes || bytes > tensor->bytes - offset)
        return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: tensor \"%.200s\": %zu bytes from byte %zu, but it has %zu", file->path, tensor->name, bytes, offset, tensor->bytes);
    if (!file->data) return llmpar_file_read(&s->source, tensor->begin + offset, to, bytes, error);
    if (bytes) memcpy(to, file->data + tensor->begin + offset, bytes);
    return LLMPAR_OK;
}

LLMPAR_DEF const llmpar_safetensor *llmpar_safetensors_find(const llmpar_safetensors *file, const char *name)
{
    if (!file || !name) return NULL;
    int32_t low = 0, high = file->count;
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        int order = strcmp(name, file->tensor[middle].name);
        if (order == 0) return &file->tensor[middle];
        if (order < 0) high = middle;
        else low = middle + 1;
    }
    return NULL;
}

/* ---- writing ---- */

struct llmpar_safetensors_writer {
    llmpar_heap *heap;
    llmpar_writer *writer;
    char *path;
    size_t expected, written; /* bytes of data */
};

/* The dtype's name in the format, NULL if it is not a stored type. */
static const char *llmpar__st_dtype_name(llmpar_dtype dtype)
{
    for (size_t i = 0; i < LLMPAR__ST_DTYPES; i++)
        if (dtype != LLMPAR_DTYPE_DEFAULT && llmpar__st_dtypes[i].dtype == dtype) return llmpar__st_dtypes[i].name;
    return NULL;
}

/* The header's JSON with its padding. The shapes have been checked. */
static void llmpar__st_put_header(llmpar__text *t, const llmpar_safetensor *tensors, int32_t count)
{
    uint64_t at = 0;
    llmpar__text_put(t, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (int32_t i = 0; i < count; i++) {
        uint64_t bytes = llmpar_dtype_size(tensors[i].dtype);
        llmpar__text_put(t, ",");
        llmpar__text_put_json(t, tensors[i].name);
        llmpar__text_put(t, ":{\"dtype\":\"%s\",\"shape\":[", llmpar__st_dtype_name(tensors[i].dtype));
        for (int32_t d = 0; d < tensors[i].dims; d++) {
            llmpar__text_put(t, "%s%lld", d ? "," : "", (long long)tensors[i].shape[d]);
            bytes *= (uint64_t)tensors[i].shape[d];
        }
        llmpar__text_put(t, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)at, (unsigned long long)(at + bytes));
        at += bytes;
    }
    llmpar__text_put(t, "}");
    while (t->used % 8) llmpar__text_put(t, " ");
}

/* Everything the reader would refuse, duplicate names too, before a file is created. *total: bytes of data. */
static llmpar_status llmpar__st_check(llmpar_heap *heap, const char *path, const llmpar_safetensor *tensors, int32_t count, size_t *total, llmpar_error *error)
{
    *total = 0;
    LLMPAR__NEED_PATH(path, error);
    LLMPAR__NEED(tensors || count < 1, error);
    if (count < 0) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: tensor count = %d, expected at least 0", path, (int)count);
    for (int32_t i = 0; i < count; i++) {
        const llmpar_safetensor *tensor = &tensors[i];
        size_t bytes = llmpar_dtype_size(tensor->dtype);
        int64_t elements;
        if (!tensor->name || !strcmp(tensor->name, "__metadata__"))
            return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: tensor %d: name %s, expected another", path, (int)i, tensor->name ? "__metadata__ is reserved" : "is NULL");
        if (!llmpar__st_dtype_name(tensor->dtype))
            return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: tensor \"%.200s\": dtype %d is no stored type, expected %s", path, tensor->name, (int)tensor->dtype, llmpar__st_supported);
        if (tensor->dims < 0 || tensor->dims > LLMPAR__ST_MAX_DIMS)
            return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: tensor \"%.200s\": %d dims, expected 0 to %d", path, tensor->name, (int)tensor->dims, LLMPAR__ST_MAX_DIMS);
        for (int32_t d = 0; d < tensor->dims; d++)
            if (tensor->shape[d] < 0)
                return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: tensor \"%.200s\": shape[%d] = %lld, expected at least 0", path, tensor->name, (int)d, (long long)tensor->shape[d]);
        if (!llmpar_extent_product(tensor->shape, tensor->dims, &elements) || !llmpar_size_mul(bytes, (size_t)elements, &bytes) || !llmpar_size_add(*total, bytes, total))
            return llmpar_error_set(error, LLMPAR_ERR_OVERFLOW, "%s: tensor \"%.200s\": its size, or that of the whole file, overflows", path, tensor->name);
    }
    LLMPAR__NEED(heap, error);
    llmpar_safetensor *sorted = LLMPAR__ALLOC(llmpar_safetensor, heap, (size_t)count);
    llmpar_status status = LLMPAR_OK;
    if (!sorted) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory for %d tensor names", path, (int)count);
    if (count) memcpy(sorted, tensors, (size_t)count * sizeof *sorted);
    llmpar__st_sort(sorted, (size_t)count, llmpar__st_by_name);
    for (int32_t i = 1; i < count && !status; i++)
        if (!strcmp(sorted[i - 1].name, sorted[i].name))
            status = llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: tensor \"%.200s\" is declared twice", path, sorted[i].name);
    llmpar_heap_free(heap, sorted);
    return status;
}

LLMPAR_DEF llmpar_status llmpar_safetensors_check(llmpar_heap *heap, const char *path, const llmpar_safetensor *tensors, int32_t count, llmpar_error *error)
{
    size_t total;
    return llmpar__st_check(heap, path, tensors, count, &total, error);
}

LLMPAR_DEF llmpar_status llmpar_safetensors_writer_open(llmpar_heap *heap, const llmpar_io *io, const char *path, const llmpar_safetensor *tensors, int32_t count, llmpar_safetensors_writer **out, llmpar_error *error)
{
    unsigned char length[8];
    size_t total;
    *out = NULL;
    llmpar_status status = llmpar__st_check(heap, path, tensors, count, &total, error);
    if (status) return status;
    llmpar__text header = llmpar__text_begin(NULL, 0);
    llmpar__st_put_header(&header, tensors, count);
    if (header.used > LLMPAR__ST_MAX_HEADER)
        return llmpar_error_set(error, LLMPAR_ERR_OVERFLOW, "%s: the header needs %zu bytes, the format allows %u", path, header.used, LLMPAR__ST_MAX_HEADER);
    size_t capacity = header.used + 1;
    char *text = LLMPAR__ALLOC(char, heap, capacity);
    llmpar_safetensors_writer *w = LLMPAR__ZALLOC(llmpar_safetensors_writer, heap, 1);
    if (w) {
        w->heap = heap;
        w->expected = total;
        w->path = llmpar_heap_strdup(heap, path);
    }
    if (!text || !w || !w->path) status = llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory for a header of %zu bytes", path, capacity);
    if (!status) status = llmpar_writer_open(heap, io, path, &w->writer, error);
    if (!status) {
        header = llmpar__text_begin(text, capacity);
        llmpar__st_put_header(&header, tensors, count);
        for (int i = 0; i < 8; i++) length[i] = (unsigned char)((uint64_t)header.used >> (8 * i) & 0xFF);
        status = llmpar_writer_write(w->writer, length, sizeof length, error);
    }
    if (!status) status = llmpar_writer_write(w->writer, text, header.used, error);
    llmpar_heap_free(heap, text);
    if (status) llmpar_safetensors_writer_abandon(w);
    else *out = w;
    return status;
}

LLMPAR_DEF llmpar_status llmpar_safetensors_writer_write(llmpar_safetensors_writer *writer, const void *data, size_t bytes, llmpar_error *error)
{
    LLMPAR__NEED(writer, error);
    if (bytes > writer->expected - writer->written)
        return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: %zu bytes after %zu of %zu declared: too many", writer->path, bytes, writer->written, writer->expected);
    llmpar_status status = llmpar_writer_write(writer->writer, data, bytes, error);
    if (!status) writer->written += bytes;
    return status;
}

static llmpar_status llmpar__st_complete(const llmpar_safetensors_writer *writer, llmpar_error *error)
{
    LLMPAR__NEED(writer, error);
    if (writer->written == writer->expected) return LLMPAR_OK;
    return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: %zu bytes of data were written, expected %zu", writer->path, writer->written, writer->expected);
}

LLMPAR_DEF llmpar_status llmpar_safetensors_writer_settle(llmpar_safetensors_writer *writer, llmpar_error *error)
{
    llmpar_status status = llmpar__st_complete(writer, error);
    return status ? status : llmpar_writer_settle(writer->writer, error);
}

LLMPAR_DEF void llmpar_safetensors_writer_sum(const llmpar_safetensors_writer *writer, uint64_t *bytes, uint64_t *xxh64) { llmpar_writer_sum(writer->writer, bytes, xxh64); }

LLMPAR_DEF llmpar_status llmpar_safetensors_writer_commit(llmpar_safetensors_writer *writer, llmpar_error *error)
{
    llmpar_status status = llmpar__st_complete(writer, error);
    if (!status) {
        llmpar_writer *inner = writer->writer;
        writer->writer = NULL;
        status = llmpar_writer_commit(inner, error);
    }
    llmpar_safetensors_writer_abandon(writer);
    return status;
}

LLMPAR_DEF void llmpar_safetensors_writer_abandon(llmpar_safetensors_writer *writer)
{
    if (!writer) return;
    llmpar_heap *heap = writer->heap;
    llmpar_writer_abandon(writer->writer);
    llmpar_heap_free(heap, writer->path);
    llmpar_heap_free(heap, writer);
}

#undef LLMPAR__ST_MAX_HEADER
#undef LLMPAR__ST_MAX_DIMS
#undef LLMPAR__ST_DTYPES
#undef LLMPAR__ST_BAD

#endif /* LLMPAR_NO_IO */
