/* The manifest of a checkpoint: written by rank 0, which works out every rank's part, and read with the suspicion that files deserve. Its last member is the XXH64 of the bytes before `,"xxh64"`. */
#include "model_io/checkpoint_internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/bits_internal.h"
#include "base/size.h"

#if !defined(LLMPAR_NO_IO)

#define LLMPAR__MANIFEST_TAIL 30 /* ,\n"xxh64":"0123456789abcdef"}\n */

/* ---- writing ---- */

typedef struct llmpar__manifest_out {
    llmpar_writer *writer; /* NULL: bytes are only counted */
    size_t bytes;
    llmpar_error *error;
    llmpar_status status; /* the first failure */
} llmpar__manifest_out;

static void llmpar__manifest_add(llmpar__manifest_out *out, const char *text)
{
    out->bytes += strlen(text);
    if (!out->status && out->writer) out->status = llmpar_writer_write(out->writer, text, strlen(text), out->error);
}

LLMPAR_PRINTF(2, 3) static void llmpar__manifest_put(llmpar__manifest_out *out, const char *format, ...)
{
    char text[512]; /* numbers and words of known length */
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    llmpar__manifest_add(out, text);
}

static void llmpar__manifest_put_name(llmpar__manifest_out *out, const char *name)
{
    char text[6 * LLMPAR__CHECKPOINT_NAME]; /* an escape is at most six bytes for one, and a name that is longer has no file to be in */
    llmpar_json_escape(name, strlen(name), text, sizeof text);
    llmpar__manifest_add(out, text);
}

static void llmpar__manifest_put_extents(llmpar__manifest_out *out, const char *key, const int64_t *extents, int32_t dims)
{
    llmpar__manifest_put(out, "\"%s\":[", key);
    for (int32_t d = 0; d < dims; d++) llmpar__manifest_put(out, "%s%lld", d ? "," : "", (long long)extents[d]);
    llmpar__manifest_put(out, "]");
}

/* One entry: a tensor, those of its arrays that lie alike, and the parts. */
static void llmpar__manifest_put_tensor(llmpar__manifest_out *out, const llmpar_fsdp *fsdp, int32_t unit, int32_t param, const llmpar__array *array, int32_t arrays, const int32_t *index, int32_t ranks, int first)
{
    llmpar__manifest_put(out, "%s\n{\"name\":", first ? "" : ",");
    llmpar__manifest_put_name(out, llmpar_fsdp_unit(fsdp, unit)->params[param].name);
    llmpar__manifest_put(out, ",\"arrays\":[");
    for (int32_t a = 0; a < arrays; a++) llmpar__manifest_put(out, "%s\"%s\"", a ? "," : "", llmpar__array_name(array[a].kind));
    llmpar__manifest_put(out, "],");
    llmpar__manifest_put_extents(out, "shape", array->shape, array->dims);
    llmpar__manifest_put(out, ",\"parts\":[");
    const char *comma = "";
    for (int32_t r = 0; r < ranks; r++) {
        llmpar_local local;
        llmpar__array_part(fsdp, r, unit, param, array, &local);
        if (!local.is_owner || !local.flat_count) continue;
        llmpar__manifest_put(out, "%s\n {\"file\":%d,", comma, (int)index[r]);
        llmpar__manifest_put_extents(out, "offset", local.offset, array->dims);
        llmpar__manifest_put(out, ",");
        llmpar__manifest_put_extents(out, "shape", local.shape, array->dims);
        llmpar__manifest_put(out, ",\"begin\":%lld,\"count\":%lld}", (long long)local.flat_begin, (long long)local.flat_count);
        comma = ",";
    }
    llmpar__manifest_put(out, "]}");
}

static void llmpar__manifest_put_info(llmpar__manifest_out *out, const llmpar_checkpoint_info *info)
{
    llmpar__manifest_put(out, "{\"format\":\"llmpar checkpoint\",\"version\":%d,\"contract\":%d,\n\"step\":%lld,\"updates\":%lld,\n", LLMPAR__CHECKPOINT_VERSION, LLMPAR__CHECKPOINT_CONTRACT, (long long)info->step, (long long)info->updates);
    llmpar__manifest_put(out, "\"batch\":%lld,\"seq_len\":%lld,\"seed\":\"%llu\",\"data_tokens\":%lld,\"canon\":%d,\n", (long long)info->batch, (long long)info->seq_len, (unsigned long long)info->seed, (long long)info->data_tokens, (int)info->canon);
    if (info->scale.scale > 0)
        llmpar__manifest_put(out, "\"loss_scale\":{\"scale\":%.17g,\"least\":%.17g,\"most\":%.17g,\"interval\":%lld,\"finite_steps\":%lld},\n", info->scale.scale, info->scale.least, info->scale.most, (long long)info->scale.interval,
                             (long long)info->scale.finite_steps);
    else llmpar__manifest_put(out, "\"loss_scale\":null,\n");
    llmpar__manifest_put(out, "\"dtype\":\"%s\",\"stored\":\"%s\",\"optimizer\":\"%s\",\"zero\":%d,\n\"mesh\":{", llmpar_dtype_name(info->dtype), llmpar_dtype_name(llmpar_dtype_sum(info->dtype)), info->optimizer, (int)(info->zero - LLMPAR_ZERO_0));
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) llmpar__manifest_put(out, "%s\"%s\":%d", a ? "," : "", llmpar_axis_name((llmpar_axis)a), (int)info->degree[a]);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__manifest_write(llmpar_fsdp *fsdp, const llmpar_optim *optim, const llmpar_checkpoint_info *info, const llmpar__checkpoint_file *config, const llmpar__checkpoint_file *ranks, const char *path, llmpar_error *error)
{
    llmpar_ctx *ctx = llmpar_fsdp_mesh(fsdp)->ctx;
    llmpar__array array[LLMPAR__ARRAYS];
    llmpar__manifest_out out = {NULL, 0, error, LLMPAR_OK};
    const llmpar__checkpoint_file most = {"rank-00000.safetensors", UINT64_MAX, 0};
    int32_t files = 0, first = 1, *index = LLMPAR__ALLOC(int32_t, &ctx->heap, (size_t)ctx->world);
    if (!index) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "checkpoint: out of memory");
    if (path) out.status = llmpar_writer_open(&ctx->heap, ctx->io, path, &out.writer, error);
    llmpar__manifest_put_info(&out, info);
    llmpar__manifest_put(&out, "},\n\"files\":[");
    for (int32_t r = 0; r <= ctx->world; r++) {
        const llmpar__checkpoint_file *file = !path ? &most : r < ctx->world ? &ranks[r] : config;
        if (!file || !file->bytes) continue;
        if (r < ctx->world) index[r] = files;
        llmpar__manifest_put(&out, "%s\n{\"name\":\"%s\",\"bytes\":%llu,\"xxh64\":\"%016llx\"}", files ? "," : "", file->name, (unsigned long long)file->bytes, (unsigned long long)file->xxh64);
        files++;
    }
    llmpar__manifest_put(&out, "],\n\"tensors\":[");
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(fsdp); u++)
        for (int32_t p = 0; p < llmpar_fsdp_unit(fsdp, u)->param_count && !out.status; p++) {
            int32_t arrays = llmpar__arrays(fsdp, optim, u, p, array), alike = arrays;
            while (array[alike - 1].kind >= LLMPAR__ARRAY_ROW) alike--;
            llmpar__manifest_put_tensor(&out, fsdp, u, p, array, alike, index, ctx->world, first);
            first = 0;
            for (int32_t a = alike; a < arrays; a++) llmpar__manifest_put_tensor(&out, fsdp, u, p, &array[a], 1, index, ctx->world, 0);
        }
    llmpar__manifest_put(&out, "]");
    uint64_t sum = 0;
    if (!out.status && path) llmpar_writer_sum(out.writer, NULL, &sum);
    llmpar__manifest_put(&out, ",\n\"xxh64\":\"%016llx\"}\n", (unsigned long long)sum);
    if (!out.status && path) out.status = llmpar_writer_settle(out.writer, error);
    if (out.bytes > LLMPAR__CHECKPOINT_MANIFEST && !path) out.status = llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "checkpoint: a manifest of %zu bytes, expected at most %zu", out.bytes, LLMPAR__CHECKPOINT_MANIFEST);
    llmpar_writer_abandon(out.writer);
    llmpar_heap_free(&ctx->heap, index);
    return out.status;
}

/* ---- reading ---- */

typedef struct llmpar__manifest_in {
    const char *name;
    llmpar_error *error;
    llmpar_status status; /* the first failure: what comes behind is not looked at */
} llmpar__manifest_in;

LLMPAR_PRINTF(3, 4) static void llmpar__manifest_bad(llmpar__manifest_in *in, const llmpar_json *at, const char *format, ...)
{
    char text[400];
    va_list list;
    if (in->status) return;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    in->status = llmpar_error_set(in->error, LLMPAR_ERR_FORMAT, "%s: byte %zu: %s", in->name, at ? at->position : (size_t)0, text);
}

static int llmpar__manifest_listed(const char *keys, const llmpar_json *member)
{
    for (const char *at = keys; *at;) {
        size_t length = strcspn(at, " ");
        if (length == member->key_length && !memcmp(at, member->key, length)) return 1;
        at += length + (at[length] == ' ');
    }
    return 0;
}

/* Exactly these members: 1. keys: separated by spaces. What is looked up by one of them behind this is there, unless something has failed. */
static int llmpar__manifest_object(llmpar__manifest_in *in, const llmpar_json *object, const char *what, const char *keys)
{
    size_t count = 0;
    if (in->status) return 0;
    if (object->type != LLMPAR_JSON_OBJECT) {
        llmpar__manifest_bad(in, object, "%s: expected an object", what);
        return 0;
    }
    for (const char *at = keys; *at; count++) {
        char key[32];
        size_t length = strcspn(at, " ");
        memcpy(key, at, length);
        key[length] = 0;
        if (!llmpar_json_get(object, key)) llmpar__manifest_bad(in, object, "%s: %s is missing", what, key);
        at += length + (at[length] == ' ');
    }
    if (object->length == count || in->status) return !in->status;
    for (const llmpar_json *m = object->child; m; m = m->next)
        if (!llmpar__manifest_listed(keys, m)) llmpar__manifest_bad(in, m, "%s: unknown member %.100s", what, m->key);
    return 0;
}

static int64_t llmpar__manifest_integer(llmpar__manifest_in *in, const llmpar_json *value, const char *what, int64_t low, int64_t high)
{
    if (in->status) return low;
    if (value && value->type == LLMPAR_JSON_NUMBER && value->is_integer && value->integer >= low && value->integer <= high) return value->integer;
    llmpar__manifest_bad(in, value, "%s: expected a whole number %lld .. %lld", what, (long long)low, (long long)high);
    return low;
}

static int64_t llmpar__manifest_member(llmpar__manifest_in *in, const llmpar_json *object, const char *key, int64_t low, int64_t high) { return llmpar__manifest_integer(in, llmpar_json_get(object, key), key, low, high); }

static double llmpar__manifest_positive(llmpar__manifest_in *in, const llmpar_json *object, const char *key)
{
    const llmpar_json *value = llmpar_json_get(object, key);
    if (!in->status && value->type == LLMPAR_JSON_NUMBER && value->number > 0) return value->number;
    llmpar__manifest_bad(in, value, "%s: expected a positive number", key);
    return 1;
}

static const char *llmpar__manifest_string(llmpar__manifest_in *in, const llmpar_json *value, const char *what, size_t most)
{
    if (in->status) return "";
    if (value->type == LLMPAR_JSON_STRING && value->length > 0 && value->length <= most && strlen(value->string) == value->length) return value->string;
    llmpar__manifest_bad(in, value, "%s: expected a text of 1 .. %zu bytes", what, most);
    return "";
}

/* Digits to a base, all of the text: 1. */
static int llmpar__manifest_digits(const char *text, unsigned base, uint64_t *out)
{
    *out = 0;
    for (; *text; text++) {
        unsigned digit = *text >= '0' && *text <= '9' ? (unsigned)(*text - '0') : *text >= 'a' && *text <= 'f' ? (unsigned)(*text - 'a') + 10u : 99u;
        if (digit >= base || *out > (UINT64_MAX - digit) / base) return 0;
        *out = *out * base + digit;
    }
    return 1;
}

static llmpar_dtype llmpar__manifest_dtype(llmpar__manifest_in *in, const llmpar_json *root, const char *key)
{
    const char *name = llmpar__manifest_string(in, llmpar_json_get(root, key), key, 8);
    for (int t = LLMPAR_F32; t <= LLMPAR_F16; t++)
        if (!strcmp(name, llmpar_dtype_name((llmpar_dtype)t))) return (llmpar_dtype)t;
    llmpar__manifest_bad(in, llmpar_json_get(root, key), "%s: expected f32, f64, bf16 or f16", key);
    return LLMPAR_F32;
}

static void llmpar__manifest_info(llmpar__manifest_in *in, const llmpar_json *root, llmpar_checkpoint_info *info)
{
    const llmpar_json *scale = llmpar_json_get(root, "loss_scale"), *mesh = llmpar_json_get(root, "mesh");
    info->step = llmpar__manifest_member(in, root, "step", 0, INT64_MAX);
    info->updates = llmpar__manifest_member(in, root, "updates", 0, info->step);
    info->batch = llmpar__manifest_member(in, root, "batch", 0, INT64_MAX);
    info->seq_len = llmpar__manifest_member(in, root, "seq_len", 0, INT64_MAX);
    info->data_tokens = llmpar__manifest_member(in, root, "data_tokens", 0, INT64_MAX);
    info->canon = (int32_t)llmpar__manifest_member(in, root, "canon", 0, 64);
    info->zero = LLMPAR_ZERO_0 + (int32_t)llmpar__manifest_member(in, root, "zero", 0, 3);
    if (!llmpar__manifest_digits(llmpar__manifest_string(in, llmpar_json_get(root, "seed"), "seed", 20), 10, &info->seed)) llmpar__manifest_bad(in, llmpar_json_get(root, "seed"), "seed: expected the digits of a number below 2^64");
    info->dtype = llmpar__manifest_dtype(in, root, "dtype");
    snprintf(info->optimizer, sizeof info->optimizer, "%s", llmpar__manifest_string(in, llmpar_json_get(root, "optimizer"), "optimizer", sizeof info->optimizer - 1));
    if (!in->status && scale->type != LLMPAR_JSON_NULL && llmpar__manifest_object(in, scale, "loss_scale", "scale least most interval finite_steps")) {
        LLMPAR__NO_ERROR(why);
        info->scale.scale = llmpar__manifest_positive(in, scale, "scale");
        info->scale.least = llmpar__manifest_positive(in, scale, "least");
        info->scale.most = llmpar__manifest_positive(in, scale, "most");
        info->scale.interval = llmpar__manifest_member(in, scale, "interval", 1, INT64_MAX);
        info->scale.finite_steps = llmpar__manifest_member(in, scale, "finite_steps", 0, INT64_MAX);
        if (!in->status && llmpar_loss_scale_check(&info->scale, &why)) llmpar__manifest_bad(in, scale, "%.300s", why.text);
    }
    if (llmpar__manifest_object(in, mesh, "mesh", "dp_replicate dp_shard cp pp tp"))
        for (int a = 0; a < LLMPAR_MESH_AXES; a++) info->degree[a] = (int32_t)llmpar__manifest_member(in, mesh, llmpar_axis_name((llmpar_axis)a), 1, 1 << 20);
}

static const llmpar_json *llmpar__manifest_array(llmpar__manifest_in *in, const llmpar_json *value, const char *what)
{
    if (in->status) return NULL;
    if (value->type == LLMPAR_JSON_ARRAY) return value->child;
    llmpar__manifest_bad(in, value, "%s: expected an array", what);
    return NULL;
}

static void llmpar__manifest_files(llmpar__manifest_in *in, const llmpar_json *list, llmpar__manifest *m)
{
    for (const llmpar_json *f = llmpar__manifest_array(in, list, "files"); f && !in->status; f = f->next) {
        llmpar__manifest_file *file = &m->file[m->files];
        if (!llmpar__manifest_object(in, f, "file", "name bytes xxh64")) return;
        const char *sum = llmpar__manifest_string(in, llmpar_json_get(f, "xxh64"), "xxh64", 16);
        file->name = llmpar__manifest_string(in, llmpar_json_get(f, "name"), "name", 64);
        file->bytes = (uint64_t)llmpar__manifest_member(in, f, "bytes", 1, INT64_MAX);
        if (strlen(sum) != 16 || !llmpar__manifest_digits(sum, 16, &file->xxh64)) llmpar__manifest_bad(in, f, "xxh64: expected 16 digits");
        if (strspn(file->name, "abcdefghijklmnopqrstuvwxyz0123456789-.") != strlen(file->name) || file->name[0] == '.' || !strcmp(file->name, "manifest.json")) llmpar__manifest_bad(in, f, "file name %.64s", file->name);
        if (m->files && strcmp(m->file[m->files - 1].name, file->name) == 0) llmpar__manifest_bad(in, f, "file %s stands twice", file->name);
        m->files++;
    }
}

static void llmpar__manifest_extents(llmpar__manifest_in *in, const llmpar_json *list, const char *what, int32_t dims, int64_t out[LLMPAR_MAX_DIMS])
{
    const llmpar_json *e = llmpar__manifest_array(in, list, what);
    if (!in->status && list->length != (size_t)dims) llmpar__manifest_bad(in, list, "%s: %zu extents, expected %d", what, list->length, (int)dims);
    for (int32_t d = 0; d < dims && !in->status; d++, e = e->next) out[d] = llmpar__manifest_integer(in, e, what, 0, (int64_t)1 << 50);
}

LLMPAR__PRIVATE_DEF int llmpar__manifest_is_shard(const char *name)
{
    size_t length = strlen(name);
    return length > 12 && !strcmp(name + length - 12, ".safetensors");
}

/* Random; the indices from a to b weigh draw(b) - draw(a). */
static uint64_t llmpar__manifest_draw(int64_t index, int32_t dim) { return llmpar__bits_mix((uint64_t)index * LLMPAR_MAX_DIMS + (uint64_t)dim); }

/* What a part weighs, where each index of a dim has a random weight and an element the product of its indices'. Parts that hold every element once weigh what the tensor does; others only by chance, once in 2^48. */
static uint64_t llmpar__manifest_weight(const llmpar_local *part, int32_t dims)
{
    llmpar__box box[LLMPAR__BOXES];
    uint64_t sum = 0, weight;
    for (int32_t b = llmpar__mesh_boxes(part, dims, box); b-- > 0; sum += weight) {
        weight = 1;
        for (int32_t d = 0; d < dims; d++) weight *= llmpar__manifest_draw(box[b].end[d], d) - llmpar__manifest_draw(box[b].begin[d], d);
    }
    return sum;
}

static void llmpar__manifest_parts(llmpar__manifest_in *in, const llmpar_json *list, llmpar__manifest *m, llmpar__manifest_tensor *tensor, int64_t elements, llmpar__manifest_part *part)
{
    llmpar__box box[LLMPAR__BOXES * LLMPAR__BOXES];
    uint64_t weight = 1; /* that no part has had yet */
    int64_t held = 0, common;
    for (int32_t d = 0; d < tensor->dims; d++) weight *= llmpar__manifest_draw(tensor->shape[d], d) - llmpar__manifest_draw(0, d);
    tensor->part = part;
    for (const llmpar_json *p = llmpar__manifest_array(in, list, "parts"); p && !in->status && held <= elements; p = p->next, part++) {
        llmpar_local *local = &part->local;
        if (!llmpar__manifest_object(in, p, tensor->name, "file offset shape begin count")) return;
        part->file = (int32_t)llmpar__manifest_member(in, p, "file", 0, (int64_t)m->files - 1);
        llmpar__manifest_extents(in, llmpar_json_get(p, "offset"), "offset", tensor->dims, local->offset);
        llmpar__manifest_extents(in, llmpar_json_get(p, "shape"), "shape", tensor->dims, local->shape);
        for (int32_t d = 0; d < tensor->dims; d++)
            if (local->shape[d] > tensor->shape[d] - local->offset[d]) llmpar__manifest_bad(in, p, "%.200s: the part is larger than the tensor in dim %d", tensor->name, (int)d);
        if (!in->status && !llmpar__manifest_is_shard(m->file[part->file].name)) llmpar__manifest_bad(in, p, "%.200s: a part in %s, expected a .safetensors file", tensor->name, m->file[part->file].name);
        if (in->status) return;
        llmpar_extent_product(local->shape, tensor->dims, &local->elements); /* it fits, as the tensor does */
        local->flat_begin = llmpar__manifest_member(in, p, "begin", 0, local->elements);
        local->flat_count = llmpar__manifest_member(in, p, "count", 1, local->elements - local->flat_begin);
        if (tensor->parts && part->file <= part[-1].file) llmpar__manifest_bad(in, p, "%.200s: parts in files %d and %d, expected one a file, in their order", tensor->name, (int)part[-1].file, (int)part->file);
        if (in->status) return;
        held += local->flat_count;
        weight -= llmpar__manifest_weight(local, tensor->dims);
        tensor->parts++;
    }
    /* Each with each, in search of a culprit. */
    const llmpar_json *p = list->child;
    for (const llmpar__manifest_part *a = tensor->part; weight && !in->status && a < tensor->part + tensor->parts; a++, p = p->next)
        for (const llmpar__manifest_part *b = tensor->part; b < a && !in->status; b++)
            if (llmpar__mesh_common(&a->local, &b->local, tensor->dims, box, &common)) llmpar__manifest_bad(in, p, "%.200s: the parts in %s and %s overlap", tensor->name, m->file[b->file].name, m->file[a->file].name);
    if (held != elements || weight) llmpar__manifest_bad(in, list, "%.200s: its parts have %lld elements, expected %lld", tensor->name, (long long)held, (long long)elements);
}

static void llmpar__manifest_tensors(llmpar__manifest_in *in, const llmpar_json *list, llmpar__manifest *m)
{
    llmpar__manifest_part *part = m->part;
    for (const llmpar_json *t = llmpar__manifest_array(in, list, "tensors"); t && !in->status; t = t->next) {
        llmpar__manifest_tensor *tensor = &m->tensor[m->tensors++];
        int64_t elements = 0;
        if (!llmpar__manifest_object(in, t, "tensor", "name arrays shape parts")) return;
        tensor->name = llmpar__manifest_string(in, llmpar_json_get(t, "name"), "name", LLMPAR__CHECKPOINT_NAME - 8);
        for (const llmpar_json *a = llmpar__manifest_array(in, llmpar_json_get(t, "arrays"), "arrays"); a && !in->status; a = a->next) {
            const char *name = llmpar__manifest_string(in, a, "array", 16);
            int32_t kind = 0;
            while (kind < LLMPAR__ARRAY_KINDS && strcmp(name, llmpar__array_name(kind))) kind++;
            if (kind == LLMPAR__ARRAY_KINDS) llmpar__manifest_bad(in, a, "%.200s: unknown array %.16s", tensor->name, name);
            else if (tensor->kinds >> kind & 1u) llmpar__manifest_bad(in, a, "%.200s: array %s stands twice", tensor->name, name);
            tensor->kinds |= 1u << kind;
        }
        const llmpar_json *shape = llmpar_json_get(t, "shape"), *parts = llmpar_json_get(t, "parts");
        llmpar__manifest_array(in, shape, "shape");
        if (!in->status && shape->length > LLMPAR_MAX_DIMS) llmpar__manifest_bad(in, shape, "%.200s: %zu dims, expected at most %d", tensor->name, shape->length, LLMPAR_MAX_DIMS);
        if (in->status) return;
        tensor->dims = (int32_t)shape->length;
        llmpar__manifest_extents(in, shape, "shape", tensor->dims, tensor->shape);
        if (!in->status && (!llmpar_extent_product(tensor->shape, tensor->dims, &elements) || elements > (int64_t)1 << 50)) llmpar__manifest_bad(in, shape, "%.200s: more than 2^50 elements", tensor->name);
        if (!in->status) llmpar__manifest_parts(in, parts, m, tensor, elements, part);
        part += tensor->parts;
    }
}

/* Room for what the JSON holds. */
static llmpar_status llmpar__manifest_room(llmpar_heap *heap, const llmpar_json *files, const llmpar_json *tensors, llmpar__manifest *m, llmpar__manifest_in *in)
{
    size_t parts = 0;
    for (const llmpar_json *t = tensors->child; t; t = t->next) {
        const llmpar_json *p = llmpar_json_get(t, "parts");
        parts += p ? p->length : 0;
    }
    m->file = LLMPAR__ZALLOC(llmpar__manifest_file, heap, files->length + 1);
    m->tensor = LLMPAR__ZALLOC(llmpar__manifest_tensor, heap, tensors->length + 1);
    m->part = LLMPAR__ZALLOC(llmpar__manifest_part, heap, parts + 1);
    if (m->file && m->tensor && m->part) return LLMPAR_OK;
    return in->status = llmpar_error_set(in->error, LLMPAR_ERR_MEMORY, "%s: out of memory for %zu files, %zu tensors, %zu parts", in->name, files->length, tensors->length, parts);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__manifest_parse(llmpar_heap *heap, const char *text, size_t length, const char *name, llmpar__manifest *m, llmpar_error *error)
{
    char tail[LLMPAR__MANIFEST_TAIL + 1];
    llmpar_xxh64 sum;
    llmpar__manifest_in in = {name, error, LLMPAR_OK};
    memset(m, 0, sizeof *m);
    LLMPAR__ZEROED(llmpar_json_desc, desc);
    desc.max_depth = 8;
    desc.unique_keys = 1;
    desc.name = name;
    if (length < LLMPAR__MANIFEST_TAIL) return llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: %zu bytes are no manifest", name, length);
    llmpar_xxh64_begin(&sum);
    llmpar_xxh64_add(&sum, text, length - LLMPAR__MANIFEST_TAIL);
    snprintf(tail, sizeof tail, ",\n\"xxh64\":\"%016llx\"}\n", (unsigned long long)llmpar_xxh64_end(&sum));
    if (memcmp(tail, text + length - LLMPAR__MANIFEST_TAIL, LLMPAR__MANIFEST_TAIL)) return llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: damaged: it does not end in its checksum %.16s", name, tail + 11);
    llmpar_status status = llmpar_json_parse(heap, text, length, &desc, &m->json, error);
    if (status) return status;
    const llmpar_json *root = m->json, *format = llmpar_json_get(root, "format");
    if (!format || format->type != LLMPAR_JSON_STRING || strcmp(format->string, "llmpar checkpoint")) llmpar__manifest_bad(&in, root, "expected \"format\":\"llmpar checkpoint\"");
    int64_t version = llmpar__manifest_member(&in, root, "version", 1, INT64_MAX), contract = llmpar__manifest_member(&in, root, "contract", 1, INT64_MAX);
    if (!in.status && (version != LLMPAR__CHECKPOINT_VERSION || contract != LLMPAR__CHECKPOINT_CONTRACT))
        return llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "%s: version %lld, contract %lld, expected %d and %d", name, (long long)version, (long long)contract, LLMPAR__CHECKPOINT_VERSION, LLMPAR__CHECKPOINT_CONTRACT);
    llmpar__manifest_object(&in, root, "manifest", "format version contract step updates batch seq_len seed data_tokens canon loss_scale dtype stored optimizer zero mesh files tensors xxh64");
    if (in.status) return in.status;
    llmpar__manifest_info(&in, root, &m->info);
    m->stored = llmpar__manifest_dtype(&in, root, "stored");
    if (m->stored != llmpar_dtype_sum(m->info.dtype)) llmpar__manifest_bad(&in, llmpar_json_get(root, "stored"), "stored: %s, expected %s", llmpar_dtype_name(m->stored), llmpar_dtype_name(llmpar_dtype_sum(m->info.dtype)));
    const llmpar_json *files = llmpar_json_get(root, "files"), *tensors = llmpar_json_get(root, "tensors");
    if (in.status || llmpar__manifest_room(heap, files, tensors, m, &in)) return in.status;
    llmpar__manifest_files(&in, files, m);
    llmpar__manifest_tensors(&in, tensors, m);
    return in.status;
}

LLMPAR__PRIVATE_DEF void llmpar__manifest_destroy(llmpar_heap *heap, llmpar__manifest *m)
{
    llmpar_heap_free(heap, m->file);
    llmpar_heap_free(heap, m->tensor);
    llmpar_heap_free(heap, m->part);
    llmpar_json_destroy(heap, m->json);
    memset(m, 0, sizeof *m);
}

#undef LLMPAR__MANIFEST_TAIL

#endif /* LLMPAR_NO_IO */
