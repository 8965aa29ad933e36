#include "model_io/hf.h"

#include <string.h>

#include "base/text_internal.h"
#include "mesh/redistribute.h"
#include "model_io/checkpoint_internal.h"

#if !defined(LLMPAR_NO_LLAMA) && !defined(LLMPAR_NO_IO)

/* Passes an error of a module without ctx on to the rank. */
static llmpar_status llmpar__hf_fail(llmpar_ctx *ctx, llmpar_status status, const llmpar_error *error)
{
    return status ? llmpar_fail(ctx, status, "%s", error->text) : LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_hf_config(llmpar_ctx *ctx, const char *directory, llmpar_llama_config *out)
{
    LLMPAR__NEED(ctx, NULL);
    LLMPAR__NO_ERROR(error);
    if (LLMPAR__NO_PATH(directory)) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "config.json: no directory, expected one");
    char *text = NULL, *path = llmpar__hf_join(&ctx->heap, directory, "config.json", &error);
    size_t bytes;
    llmpar_status status = !path ? LLMPAR_ERR_MEMORY : llmpar_file_load(&ctx->heap, ctx->io, path, (size_t)16 << 20, &text, &bytes, &error);
    if (!status) status = llmpar_llama_config_parse(&ctx->heap, text, bytes, path, out, &error);
    llmpar_heap_free(&ctx->heap, text);
    llmpar_heap_free(&ctx->heap, path);
    return llmpar__hf_fail(ctx, status, &error);
}

/* ---- loading ---- */

/* "[64, 2]" */
static const char *llmpar__hf_shape(const int64_t *shape, int32_t dims, char *text, size_t capacity)
{
    llmpar__text out = llmpar__text_begin(text, capacity);
    for (int32_t d = 0; d < dims; d++) llmpar__text_put(&out, "%s%lld", d ? ", " : "[", (long long)shape[d]);
    llmpar__text_put(&out, dims ? "]" : "[]");
    return text;
}

typedef struct llmpar__hf_load {
    llmpar_fsdp *fsdp;
    llmpar_ctx *ctx;
    llmpar_hf_files *files;
    llmpar_stream *stream;
    void *raw, *wide;   /* pieces of a slice: as in the file, and in the shards' dtype; `wide` only where these differ */
    size_t raw_bytes, wide_bytes;
    int64_t capacity;   /* elements of both: half a slice, at most this many */
} llmpar__hf_load;
#define LLMPAR__HF_PIECE ((int64_t)128 << 10)
#define LLMPAR__HF_EMBEDDING "model.embed_tokens.weight"

/* Nobody goes on before all have come as far; where one did not, the others hear of it here. */
static llmpar_status llmpar__hf_agree(llmpar_ctx *ctx, llmpar_stream *stream, llmpar_status status, const char *what)
{
    if (!status) status = llmpar_comm_barrier(ctx->comm, stream, what);
    return status ? status : ctx->device->synchronize(ctx->device, stream);
}

static int llmpar__hf_is_shape(const llmpar_safetensor *tensor, const int64_t *shape, int32_t dims)
{
    int same = tensor->dims == dims;
    for (int32_t d = 0; d < dims && same; d++) same = tensor->shape[d] == shape[d];
    return same;
}

/* "model.layers.0.self_attn.rotary_emb.inv_freq": a buffer that follows from the configuration, and that transformers once wrote. */
static int llmpar__hf_is_rotary_buffer(const char *name)
{
    static const char before[] = "model.layers.", behind[] = ".self_attn.rotary_emb.inv_freq";
    if (strncmp(name, before, sizeof before - 1)) return 0;
    name += sizeof before - 1;
    size_t digits = strspn(name, "0123456789");
    return digits && !strcmp(name + digits, behind);
}

/* to[count] = elements from `first` on of this rank's rectangle of a tensor, as they stand in the file. */
static llmpar_status llmpar__hf_read(const llmpar__hf_load *load, const llmpar_safetensors *file, const llmpar_safetensor *source, const llmpar_dtensor *tensor, const llmpar_local *local, int64_t first, int64_t count, void *to)
{
    size_t size = llmpar_dtype_size(source->dtype);
    llmpar_status status = LLMPAR_OK;
    LLMPAR__NO_ERROR(error);
    for (int64_t done = 0, run; done < count && !status; done += run) {
        int64_t from = llmpar_dtensor_run(tensor, local, first + done, &run);
        if (run > count - done) run = count - done;
        status = llmpar_safetensors_read(file, source, (size_t)from * size, (size_t)run * size, (char *)to + (size_t)done * size, &error);
    }
    return llmpar__hf_fail(load->ctx, status, &error);
}

/* A tied model's file may have the head once more, if it is the embedding: each rank compares the part that it holds. */
static llmpar_status llmpar__hf_check_tied(const llmpar__hf_load *load, const llmpar_safetensors *file, const llmpar_safetensor *head)
{
    const llmpar_safetensors *other = NULL;
    const llmpar_safetensor *embedding = llmpar_hf_files_find(load->files, LLMPAR__HF_EMBEDDING, &other);
    int same = head->dtype == embedding->dtype && llmpar__hf_is_shape(head, embedding->shape, embedding->dims);
    llmpar_status status = LLMPAR_OK;
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(load->fsdp); u++) {
        const llmpar_segment *segments;
        int32_t count;
        llmpar_fsdp_layout(load->fsdp, u, NULL, &segments, &count);
        for (int32_t s = 0; s < count && same; s++) {
            llmpar_dtensor tensor;
            llmpar_local local;
            if (strcmp(llmpar_fsdp_unit(load->fsdp, u)->params[segments[s].param].name, LLMPAR__HF_EMBEDDING)) continue;
            llmpar_mesh *mesh = llmpar_fsdp_mesh(load->fsdp);
            llmpar_fsdp_dtensor(load->fsdp, u, segments[s].param, &tensor);
            llmpar_dtensor_local(&tensor, mesh->degree, mesh->coordinate, &local);
            size_t half = ((size_t)load->capacity + 1) / 2, size = llmpar_dtype_size(head->dtype);
            for (int64_t done = 0, part; done < local.flat_count && same && !status; done += part) {
                char *second = (char *)load->raw + half * size;
                part = local.flat_count - done < (int64_t)half ? local.flat_count - done : (int64_t)half;
                status = llmpar__hf_read(load, file, head, &tensor, &local, local.flat_begin + done, part, load->raw);
                if (!status) status = llmpar__hf_read(load, other, embedding, &tensor, &local, local.flat_begin + done, part, second);
                same = !status && !memcmp(load->raw, second, (size_t)part * size);
            }
            if (status) return status;
        }
    }
    return same ? LLMPAR_OK : llmpar_fail(load->ctx, LLMPAR_ERR_FORMAT, "%s: tensor %s differs from " LLMPAR__HF_EMBEDDING ", to which the configuration ties it", file->path, head->name);
}

/* Every parameter is there with its shape. *matched: their number. Sizes the pieces. */
static llmpar_status llmpar__hf_match(llmpar__hf_load *load, int32_t *matched)
{
    llmpar_ctx *ctx = load->ctx;
    llmpar_dtype dtype = llmpar_dtype_sum(llmpar_fsdp_dtype(load->fsdp));
    size_t raw = 1, wide = 0;
    int64_t most = 1;
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(load->fsdp); u++) {
        const llmpar_unit *unit = llmpar_fsdp_unit(load->fsdp, u);
        const llmpar_segment *segments;
        int32_t count;
        for (int32_t i = 0; i < unit->param_count; i++, ++*matched) {
            const llmpar_param *param = &unit->params[i];
            const llmpar_safetensors *file = NULL;
            const llmpar_safetensor *tensor = llmpar_hf_files_find(load->files, param->name, &file);
            if (!tensor) return llmpar_fail(ctx, LLMPAR_ERR_FORMAT, "%s: tensor %s is missing", load->files->path, param->name);
            if (!llmpar__hf_is_shape(tensor, param->shape, param->dims)) {
                char got[200], expected[200];
                return llmpar_fail(ctx, LLMPAR_ERR_FORMAT, "%s: tensor %s has shape %s, expected %s", file->path, param->name, llmpar__hf_shape(tensor->shape, tensor->dims, got, sizeof got),
                                   llmpar__hf_shape(param->shape, param->dims, expected, sizeof expected));
            }
            if (!llmpar__dtype_floats(tensor->dtype))
                return llmpar_fail(ctx, LLMPAR_ERR_FORMAT, "%s: tensor %s has dtype %s, expected a floating type", file->path, param->name, llmpar_dtype_name(tensor->dtype));
            if (llmpar_dtype_size(tensor->dtype) > raw) raw = llmpar_dtype_size(tensor->dtype);
            if (tensor->dtype != dtype) wide = llmpar_dtype_size(dtype);
        }
        llmpar_fsdp_layout(load->fsdp, u, NULL, &segments, &count);
        for (int32_t s = 0; s < count; s++)
            if (segments[s].count > most) most = segments[s].count;
    }
    load->capacity = (most + 1) / 2 < LLMPAR__HF_PIECE ? (most + 1) / 2 : LLMPAR__HF_PIECE;
    load->raw_bytes = ((size_t)load->capacity + 1) * raw;
    load->wide_bytes = (size_t)load->capacity * wide;
    llmpar_status status = llmpar_device_host_alloc(ctx->device, &ctx->heap, load->raw_bytes, &load->raw);
    if (!status && wide) status = llmpar_device_host_alloc(ctx->device, &ctx->heap, load->wide_bytes, &load->wide);
    return !status ? LLMPAR_OK : llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "%s: no memory to read pieces of %lld elements", load->files->path, (long long)load->capacity);
}

/* Nothing else is there, but for what says the same once more. */
static llmpar_status llmpar__hf_match_rest(const llmpar__hf_load *load, int32_t matched)
{
    const llmpar_hf_files *files = load->files;
    llmpar_status status = LLMPAR_OK;
    for (int32_t f = 0; f < files->count && files->tensors > matched; f++)
        for (int32_t t = 0; t < files->file[f]->count && !status; t++) {
            const char *name = files->file[f]->tensor[t].name;
            int known = llmpar__hf_is_rotary_buffer(name), embedding = 0;
            for (int32_t u = 0; u < llmpar_fsdp_unit_count(load->fsdp) && !known; u++)
                for (int32_t i = 0; i < llmpar_fsdp_unit(load->fsdp, u)->param_count && !known; i++) {
                    known = !strcmp(name, llmpar_fsdp_unit(load->fsdp, u)->params[i].name);
                    embedding |= !strcmp(LLMPAR__HF_EMBEDDING, llmpar_fsdp_unit(load->fsdp, u)->params[i].name);
                }
            if (known) continue;
            if (embedding && !strcmp(name, "lm_head.weight")) status = llmpar__hf_check_tied(load, files->file[f], &files->file[f]->tensor[t]);
            else status = llmpar_fail(load->ctx, LLMPAR_ERR_FORMAT, "%s: tensor %s is not part of this model (%d parameters, %d tensors)", files->file[f]->path, name, (int)matched, (int)files->tensors);
        }
    return status;
}

static llmpar_status llmpar__hf_load_unit(const llmpar__hf_load *load, int32_t u)
{
    llmpar_fsdp *fsdp = load->fsdp;
    llmpar_device *device = load->ctx->device;
    llmpar_mesh *mesh = llmpar_fsdp_mesh(fsdp);
    llmpar_dtype dtype = llmpar_dtype_sum(llmpar_fsdp_dtype(fsdp)); /* of the parameters that are updated */
    size_t size = llmpar_dtype_size(dtype);
    const llmpar_segment *segments;
    int32_t count;
    llmpar_status status = LLMPAR_OK;
    char *shard = (char *)llmpar_fsdp_shard(fsdp, u, NULL, &segments, &count);
    if (!shard) return load->ctx->error.status;
    for (int32_t s = 0; s < count && !status; s++) {
        llmpar_dtensor tensor;
        llmpar_local local;
        const llmpar_safetensors *file = NULL;
        const llmpar_safetensor *source = llmpar_hf_files_find(load->files, llmpar_fsdp_unit(fsdp, u)->params[segments[s].param].name, &file);
        llmpar_fsdp_dtensor(fsdp, u, segments[s].param, &tensor);
        llmpar_dtensor_local(&tensor, mesh->degree, mesh->coordinate, &local);
        for (int64_t done = 0, part; done < segments[s].count && !status; done += part) {
            part = segments[s].count - done < load->capacity ? segments[s].count - done : load->capacity;
            status = llmpar__hf_read(load, file, source, &tensor, &local, local.flat_begin + done, part, load->raw);
            if (!status && source->dtype != dtype) llmpar_convert(load->wide, dtype, load->raw, source->dtype, (size_t)part);
            if (!status) status = device->copy(device, load->stream, shard + (size_t)(segments[s].begin + done) * size, source->dtype != dtype ? load->wide : load->raw, (size_t)part * size);
            if (!status) status = device->synchronize(device, load->stream);
        }
    }
    llmpar_status done = llmpar_fsdp_shard_done(fsdp, u, !status);
    return status ? status : done;
}

LLMPAR_DEF llmpar_status llmpar_hf_load(llmpar_fsdp *fsdp, const char *directory)
{
    LLMPAR__NEED(fsdp, NULL);
    int32_t matched = 0;
    LLMPAR__NO_ERROR(error);
    LLMPAR__ZEROED(llmpar__hf_load, load);
    load.fsdp = fsdp;
    load.ctx = llmpar_fsdp_mesh(fsdp)->ctx;
    if (LLMPAR__NO_PATH(directory)) return llmpar_fail(load.ctx, LLMPAR_ERR_ARGUMENT, "load: no directory, expected one");
    llmpar_device *device = load.ctx->device;
    llmpar_status status = device->stream_create(device, "load", &load.stream);
    if (!status) status = llmpar__hf_fail(load.ctx, llmpar_hf_files_open(&load.ctx->heap, load.ctx->io, directory, &load.files, &error), &error);
    if (!status) status = llmpar__hf_match(&load, &matched);
    if (!status) status = llmpar__hf_match_rest(&load, matched);
    status = llmpar__hf_agree(load.ctx, load.stream, status, "load/check");
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(fsdp) && !status; u++) status = llmpar__hf_load_unit(&load, u);
    status = llmpar__hf_agree(load.ctx, load.stream, status, "load/read");
    if (load.stream) device->stream_destroy(device, load.stream);
    llmpar_device_host_free(device, &load.ctx->heap, load.raw, load.raw_bytes);
    llmpar_device_host_free(device, &load.ctx->heap, load.wide, load.wide_bytes);
    llmpar_hf_files_close(load.files);
    return status;
}

#undef LLMPAR__HF_EMBEDDING

/* ---- saving ---- */

struct llmpar_tensor_file {
    llmpar_fsdp *fsdp;
    llmpar_ctx *ctx;
    llmpar_stream *stream;
    llmpar_dtype dtype;                /* of the file */
    llmpar_safetensors_writer *writer; /* world rank 0: this, */
    llmpar_hf_writer *directory;       /* or this with `tensors`, which it borrows */
    llmpar_safetensor *tensors;
    void *full, *scratch;              /* device: the largest tensor, and what redistribution needs */
    void *host, *narrow;               /* world rank 0: a piece of a tensor, small enough to stay in the cache; the same in the file's dtype, where that is another */
    size_t host_bytes;
    int32_t *units, count, next;       /* [count] in the order they come; how many have come */
};

/* World rank 0: the tensors' names and shapes, and the file or directory. */
static llmpar_status llmpar__hf_declare(llmpar_tensor_file *file, const char *path, const llmpar_llama_config *config, uint64_t max_bytes)
{
    llmpar_ctx *ctx = file->ctx;
    int32_t count = 0, at = 0;
    for (int32_t u = 0; u < file->count; u++) count += llmpar_fsdp_unit(file->fsdp, file->units[u])->param_count;
    llmpar_safetensor *tensors = LLMPAR__ZALLOC(llmpar_safetensor, &ctx->heap, (size_t)count + 1);
    file->tensors = tensors;
    if (!tensors) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "%s: no memory for the header", path);
    for (int32_t u = 0; u < file->count; u++) {
        const llmpar_unit *unit = llmpar_fsdp_unit(file->fsdp, file->units[u]);
        for (int32_t i = 0; i < unit->param_count; i++, at++) {
            tensors[at].name = unit->params[i].name;
            tensors[at].dtype = file->dtype;
            tensors[at].dims = unit->params[i].dims;
            for (int32_t d = 0; d < unit->params[i].dims; d++) tensors[at].shape[d] = unit->params[i].shape[d];
        }
    }
    LLMPAR__NO_ERROR(error);
    if (!config) return llmpar__hf_fail(ctx, llmpar_safetensors_writer_open(&ctx->heap, ctx->io, path, tensors, count, &file->writer, &error), &error);
    size_t bytes = llmpar_llama_config_write(config, NULL, 0);
    char *text = LLMPAR__ALLOC(char, &ctx->heap, bytes + 1);
    if (!text) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "%s: out of memory for config.json", path);
    llmpar_llama_config_write(config, text, bytes + 1);
    llmpar_status status = llmpar_hf_writer_open(&ctx->heap, ctx->io, path, tensors, count, max_bytes, text, &file->directory, &error);
    llmpar_heap_free(&ctx->heap, text);
    return llmpar__hf_fail(ctx, status, &error);
}

/* config: a directory, else a file. */
static llmpar_status llmpar__hf_open(llmpar_fsdp *fsdp, const char *path, const int32_t *units, int32_t count, const llmpar_llama_config *config, const llmpar_hf_desc *desc, llmpar_tensor_file **out)
{
    llmpar_mesh *mesh = llmpar_fsdp_mesh(fsdp);
    llmpar_ctx *ctx = mesh->ctx;
    llmpar_dtype dtype = llmpar_dtype_sum(llmpar_fsdp_dtype(fsdp));
    size_t size = llmpar_dtype_size(dtype);
    int64_t most = 1, scratch = 1;
    *out = NULL;
    if (LLMPAR__NO_PATH(path)) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "save: no path, expected one");
    int32_t all = llmpar_fsdp_unit_count(fsdp);
    if (!units) count = all;
    if (count < 0) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "%s: %d units", path, (int)count);
    for (int32_t u = 0; u < count && units; u++)
        if (units[u] < 0 || units[u] >= all) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "%s: unit %d, expected 0 to %d", path, (int)units[u], (int)all - 1);
    if (desc && desc->dtype != LLMPAR_DTYPE_DEFAULT && !llmpar__dtype_floats(desc->dtype))
        return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "%s: dtype %d, expected a floating type", path, (int)desc->dtype);
    llmpar_tensor_file *file = LLMPAR__ZALLOC(llmpar_tensor_file, &ctx->heap, 1);
    if (!file) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "%s: out of memory", path);
    file->fsdp = fsdp;
    file->ctx = ctx;
    file->dtype = desc && desc->dtype != LLMPAR_DTYPE_DEFAULT ? desc->dtype : dtype;
    file->count = count;
    file->units = LLMPAR__ALLOC(int32_t, &ctx->heap, (size_t)file->count + 1);
    if (!file->units) {
        llmpar_heap_free(&ctx->heap, file);
        return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "%s: out of memory", path);
    }
    for (int32_t u = 0; u < file->count; u++) file->units[u] = units ? units[u] : u;
    for (int32_t u = 0; u < all; u++)
        for (int32_t i = 0; i < llmpar_fsdp_unit(fsdp, u)->param_count; i++) {
            llmpar_dtensor tensor;
            int64_t elements = 1, need;
            llmpar_fsdp_dtensor(fsdp, u, i, &tensor);
            for (int32_t d = 0; d < tensor.dims; d++) elements *= tensor.shape[d];
            need = llmpar_dtensor_full_scratch(&tensor, mesh);
            if (elements > most) most = elements;
            if (need > scratch) scratch = need;
        }
    llmpar_status status = ctx->device->stream_create(ctx->device, "save", &file->stream);
    if (!status) status = llmpar_arena_alloc(llmpar_fsdp_arena(fsdp), LLMPAR_TAG_COMMUNICATION, (size_t)most * size, "whole tensor", &file->full);
    if (!status) status = llmpar_arena_alloc(llmpar_fsdp_arena(fsdp), LLMPAR_TAG_COMMUNICATION, (size_t)scratch * size, "whole tensor scratch", &file->scratch);
    if (!status && ctx->rank == 0) {
        file->host_bytes = (size_t)LLMPAR__HF_PIECE * size;
        llmpar_device_host_alloc(ctx->device, &ctx->heap, file->host_bytes, &file->host);
        if (file->dtype != dtype) file->narrow = llmpar_heap_alloc(&ctx->heap, (size_t)LLMPAR__HF_PIECE, llmpar_dtype_size(file->dtype));
        status = file->host && (file->narrow || file->dtype == dtype) ? llmpar__hf_declare(file, path, config, desc ? desc->max_file_bytes : 0) : llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "%s: no memory for a piece of a tensor", path);
    }
    status = llmpar__hf_agree(ctx, file->stream, status, "save/open");
    if (status) llmpar_tensor_file_abandon(file);
    else *out = file;
    return status;
}

LLMPAR_DEF llmpar_status llmpar_tensor_file_open(llmpar_fsdp *fsdp, const char *path, const int32_t *units, int32_t count, llmpar_tensor_file **out)
{
    LLMPAR__NEED(fsdp, NULL);
    return llmpar__hf_open(fsdp, path, units, count, NULL, NULL, out);
}

/* World rank 0: the tensor in `full`. */
static llmpar_status llmpar__hf_put(llmpar_tensor_file *file, int64_t count)
{
    llmpar_device *device = file->ctx->device;
    llmpar_dtype from = llmpar_dtype_sum(llmpar_fsdp_dtype(file->fsdp));
    llmpar_status status = LLMPAR_OK;
    LLMPAR__NO_ERROR(error);
    for (int64_t done = 0, part; done < count && !status; done += part) {
        const void *data = file->narrow ? file->narrow : file->host;
        part = count - done < LLMPAR__HF_PIECE ? count - done : LLMPAR__HF_PIECE;
        size_t bytes = (size_t)part * llmpar_dtype_size(file->dtype);
        status = device->copy(device, file->stream, file->host, (const char *)file->full + (size_t)done * llmpar_dtype_size(from), (size_t)part * llmpar_dtype_size(from));
        if (!status) status = device->synchronize(device, file->stream);
        if (status) return status;
        if (file->narrow) llmpar_convert(file->narrow, file->dtype, file->host, from, (size_t)part);
        if (file->directory) status = llmpar_hf_writer_write(file->directory, data, bytes, &error);
        else status = llmpar_safetensors_writer_write(file->writer, data, bytes, &error);
    }
    return llmpar__hf_fail(file->ctx, status, &error);
}

LLMPAR_DEF llmpar_status llmpar_tensor_file_write(llmpar_tensor_file *file, int32_t unit, const void *shard)
{
    LLMPAR__NEED(file, NULL);
    llmpar_ctx *ctx = file->ctx;
    llmpar_mesh *mesh = llmpar_fsdp_mesh(file->fsdp);
    if (file->next >= file->count || unit != file->units[file->next])
        return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "save: unit %d, expected %s%d", (int)unit, file->next < file->count ? "unit " : "no more than ", file->next < file->count ? (int)file->units[file->next] : (int)file->count);
    file->next++;
    llmpar_status status = LLMPAR_OK;
    for (int32_t i = 0; i < llmpar_fsdp_unit(file->fsdp, unit)->param_count && !status; i++) {
        llmpar_dtensor tensor;
        int64_t count = 1;
        llmpar_fsdp_dtensor(file->fsdp, unit, i, &tensor);
        for (int32_t d = 0; d < tensor.dims; d++) count *= tensor.shape[d];
        status = llmpar_dtensor_full(&tensor, mesh, file->stream, llmpar_fsdp_local(file->fsdp, unit, i, (void *)(uintptr_t)shard), file->scratch, file->full);
        if (!status) status = ctx->device->synchronize(ctx->device, file->stream);
        if (!status && file->host) status = llmpar__hf_put(file, count);
    }
    return status;
}

LLMPAR_DEF llmpar_status llmpar_tensor_file_commit(llmpar_tensor_file *file)
{
    LLMPAR__NEED(file, NULL);
    llmpar_ctx *ctx = file->ctx;
    llmpar_status status = LLMPAR_OK;
    LLMPAR__NO_ERROR(error);
    if (file->writer) status = llmpar__hf_fail(ctx, llmpar_safetensors_writer_commit(file->writer, &error), &error);
    if (file->directory) status = llmpar__hf_fail(ctx, llmpar_hf_writer_commit(file->directory, &error), &error);
    file->writer = NULL;
    file->directory = NULL;
    status = llmpar__hf_agree(ctx, file->stream, status, "save/commit");
    llmpar_tensor_file_abandon(file);
    return status;
}

LLMPAR_DEF void llmpar_tensor_file_abandon(llmpar_tensor_file *file)
{
    if (!file) return;
    if (file->stream) file->ctx->device->synchronize(file->ctx->device, file->stream); /* after a failure it may still write into what goes now */
    llmpar_arena_free(llmpar_fsdp_arena(file->fsdp), file->full);
    llmpar_arena_free(llmpar_fsdp_arena(file->fsdp), file->scratch);
    llmpar_safetensors_writer_abandon(file->writer);
    llmpar_hf_writer_abandon(file->directory);
    llmpar_heap_free(&file->ctx->heap, file->tensors);
    llmpar_device_host_free(file->ctx->device, &file->ctx->heap, file->host, file->host_bytes);
    llmpar_heap_free(&file->ctx->heap, file->narrow);
    llmpar_heap_free(&file->ctx->heap, file->units);
    if (file->stream) file->ctx->device->stream_destroy(file->ctx->device, file->stream);
    llmpar_heap_free(&file->ctx->heap, file);
}

LLMPAR_DEF llmpar_status llmpar_hf_save(llmpar_fsdp *fsdp, const llmpar_llama_config *config, const char *directory, const llmpar_hf_desc *desc)
{
    LLMPAR__NEED(fsdp, NULL);
    llmpar_ctx *ctx = llmpar_fsdp_mesh(fsdp)->ctx;
    if (!config) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "save: no config");
    llmpar_tensor_file *file = NULL;
    llmpar_status status = llmpar__hf_open(fsdp, directory, NULL, 0, config, desc, &file);
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(fsdp) && !status; u++) {
        const void *shard = llmpar_fsdp_shard(fsdp, u, NULL, NULL, NULL);
        status = shard ? llmpar_tensor_file_write(file, u, shard) : ctx->error.status;
        llmpar_status done = shard ? llmpar_fsdp_shard_done(fsdp, u, 0) : LLMPAR_OK;
        if (!status) status = done;
    }
    if (!status) return llmpar_tensor_file_commit(file);
    llmpar_tensor_file_abandon(file);
    return status;
}

#undef LLMPAR__HF_PIECE

#endif /* LLMPAR_NO_LLAMA, LLMPAR_NO_IO */
