#include "model_io/hf.h"

#include <stdio.h>
#include <string.h>

#include "mesh/redistribute.h"

#if !defined(LLMPAR_NO_LLAMA) && !defined(LLMPAR_NO_IO)

/* DIR/name on the heap; NULL when out of memory. */
static char *llmpar__hf_path(llmpar_ctx *ctx, const char *directory, const char *name)
{
    size_t bytes = strlen(directory) + strlen(name) + 2;
    char *path = (char *)llmpar_heap_alloc(&ctx->heap, 1, bytes);
    if (path) snprintf(path, bytes, "%s/%s", directory, name);
    else llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "out of memory for a path");
    return path;
}

/* Passes an error of a module without ctx on to the rank. */
static llmpar_status llmpar__hf_fail(llmpar_ctx *ctx, llmpar_status status, const llmpar_error *error)
{
    return status ? llmpar_fail(ctx, status, "%s", error->text) : LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_hf_config(llmpar_ctx *ctx, const char *directory, llmpar_llama_config *out)
{
    llmpar_mapped file;
    llmpar_error error;
    char *path = llmpar__hf_path(ctx, directory, "config.json");
    if (!path) return LLMPAR_ERR_MEMORY;
    memset(&file, 0, sizeof file);
    llmpar_error_clear(&error);
    llmpar_status status = llmpar_file_map(path, &file, &error);
    if (!status) status = llmpar_llama_config_parse(&ctx->heap, (const char *)file.data, file.bytes, path, out, &error);
    llmpar_file_unmap(&file);
    llmpar_heap_free(&ctx->heap, path);
    return llmpar__hf_fail(ctx, status, &error);
}

/* ---- loading ---- */

/* "[64, 2]" */
static const char *llmpar__hf_shape(const int64_t *shape, int32_t dims, char *text, size_t capacity)
{
    size_t used = (size_t)snprintf(text, capacity, "[");
    for (int32_t d = 0; d < dims && used < capacity; d++) used += (size_t)snprintf(text + used, capacity - used, "%s%lld", d ? ", " : "", (long long)shape[d]);
    if (used < capacity) snprintf(text + used, capacity - used, "]");
    return text;
}

/* Every parameter is there with its shape, and nothing else. */
static llmpar_status llmpar__hf_match(llmpar_fsdp *fsdp, const llmpar_safetensors *file)
{
    llmpar_ctx *ctx = llmpar_fsdp_mesh(fsdp)->ctx;
    int32_t matched = 0;
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(fsdp); u++) {
        const llmpar_unit *unit = llmpar_fsdp_unit(fsdp, u);
        for (int32_t i = 0; i < unit->param_count; i++) {
            const llmpar_param *param = &unit->params[i];
            const llmpar_safetensor *tensor = llmpar_safetensors_find(file, param->name);
            if (!tensor) return llmpar_fail(ctx, LLMPAR_ERR_FORMAT, "%s: tensor %s is missing", file->path, param->name);
            int same = tensor->dims == param->dims;
            for (int32_t d = 0; d < param->dims && same; d++) same = tensor->shape[d] == param->shape[d];
            if (!same) {
                char got[200], expected[200];
                return llmpar_fail(ctx, LLMPAR_ERR_FORMAT, "%s: tensor %s has shape %s, expected %s", file->path, param->name, llmpar__hf_shape(tensor->shape, tensor->dims, got, sizeof got),
                                   llmpar__hf_shape(param->shape, param->dims, expected, sizeof expected));
            }
            if (tensor->dtype != LLMPAR_F32 && tensor->dtype != LLMPAR_F64 && tensor->dtype != LLMPAR_BF16 && tensor->dtype != LLMPAR_F16)
                return llmpar_fail(ctx, LLMPAR_ERR_FORMAT, "%s: tensor %s has dtype %s, expected a floating type", file->path, param->name, llmpar_dtype_name(tensor->dtype));
            matched++;
        }
    }
    if (matched == file->count) return LLMPAR_OK;
    for (int32_t t = 0; t < file->count; t++) {
        int known = 0;
        for (int32_t u = 0; u < llmpar_fsdp_unit_count(fsdp) && !known; u++)
            for (int32_t i = 0; i < llmpar_fsdp_unit(fsdp, u)->param_count && !known; i++) known = !strcmp(file->tensor[t].name, llmpar_fsdp_unit(fsdp, u)->params[i].name);
        if (!known) return llmpar_fail(ctx, LLMPAR_ERR_FORMAT, "%s: tensor %s is not part of this model (%d parameters, %d tensors in the file)", file->path, file->tensor[t].name, (int)matched, (int)file->count);
    }
    return llmpar_fail(ctx, LLMPAR_ERR_INTERNAL, "%s: %d parameters, %d tensors", file->path, (int)matched, (int)file->count);
}

static llmpar_status llmpar__hf_load_unit(llmpar_fsdp *fsdp, const llmpar_safetensors *file, int32_t u, llmpar_stream *stream)
{
    llmpar_mesh *mesh = llmpar_fsdp_mesh(fsdp);
    llmpar_ctx *ctx = mesh->ctx;
    const llmpar_unit *unit = llmpar_fsdp_unit(fsdp, u);
    llmpar_error error;
    llmpar_error_clear(&error);
    llmpar_dtype dtype = llmpar_dtype_sum(llmpar_fsdp_dtype(fsdp)); /* of the parameters that are updated */
    int64_t elements;
    void *shard = llmpar_fsdp_shard(fsdp, u, &elements, NULL, NULL);
    if (!shard) return ctx->error.status;
    size_t bytes = (size_t)elements * llmpar_dtype_size(dtype);
    void *host = llmpar_heap_alloc(&ctx->heap, 1, bytes);
    if (!host) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "%s: no memory to load unit %s (%lld elements)", file->path, unit->name, (long long)elements);
    llmpar_status status = ctx->device->copy(ctx->device, stream, host, shard, bytes);
    if (!status) status = ctx->device->synchronize(ctx->device, stream);
    for (int32_t i = 0; i < unit->param_count && !status; i++) {
        const llmpar_safetensor *source = llmpar_safetensors_find(file, unit->params[i].name);
        llmpar_dtensor tensor;
        llmpar_fsdp_dtensor(fsdp, u, i, &tensor);
        size_t count = source->bytes / llmpar_dtype_size(source->dtype);
        void *data = llmpar_heap_alloc(&ctx->heap, 1, source->bytes), *converted = llmpar_heap_alloc(&ctx->heap, count, llmpar_dtype_size(dtype));
        if (!data || !converted) status = llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "%s: no memory to convert %s", file->path, source->name);
        if (!status) status = llmpar__hf_fail(ctx, llmpar_safetensors_read(file, source, 0, source->bytes, data, &error), &error);
        if (!status) llmpar_convert(converted, dtype, data, source->dtype, count);
        if (!status) llmpar_dtensor_cut(&tensor, mesh, converted, llmpar_fsdp_local(fsdp, u, i, host));
        llmpar_heap_free(&ctx->heap, data);
        llmpar_heap_free(&ctx->heap, converted);
    }
    if (!status) status = ctx->device->copy(ctx->device, stream, shard, host, bytes);
    if (!status) status = ctx->device->synchronize(ctx->device, stream);
    llmpar_heap_free(&ctx->heap, host);
    llmpar_status done = llmpar_fsdp_shard_done(fsdp, u, !status);
    return status ? status : done;
}

LLMPAR_DEF llmpar_status llmpar_hf_load(llmpar_fsdp *fsdp, const char *directory)
{
    llmpar_ctx *ctx = llmpar_fsdp_mesh(fsdp)->ctx;
    llmpar_safetensors *file = NULL;
    llmpar_stream *stream = NULL;
    llmpar_error error;
    llmpar_error_clear(&error);
    char *path = llmpar__hf_path(ctx, directory, "model.safetensors"), *index = llmpar__hf_path(ctx, directory, "model.safetensors.index.json");
    llmpar_status status = path && index ? LLMPAR_OK : LLMPAR_ERR_MEMORY;
    if (!status && !llmpar_is_file(path) && llmpar_is_file(index)) status = llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "%s: a model in several files; expected one model.safetensors", index);
    if (!status) status = llmpar__hf_fail(ctx, llmpar_safetensors_open(&ctx->heap, ctx->io, path, &file, &error), &error);
    if (!status) status = llmpar__hf_match(fsdp, file);
    if (!status) status = ctx->device->stream_create(ctx->device, "load", &stream);
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(fsdp) && !status; u++) status = llmpar__hf_load_unit(fsdp, file, u, stream);
    if (stream) ctx->device->stream_destroy(ctx->device, stream);
    llmpar_safetensors_close(file);
    llmpar_heap_free(&ctx->heap, index);
    llmpar_heap_free(&ctx->heap, path);
    return status;
}

/* ---- saving ---- */

struct llmpar_tensor_file {
    llmpar_fsdp *fsdp;
    llmpar_ctx *ctx;
    llmpar_stream *stream;
    llmpar_safetensors_writer *writer; /* world rank 0 */
    void *full, *scratch;              /* device: the largest tensor, and what redistribution needs */
    void *host;                        /* world rank 0: one tensor */
    int32_t *units, count, next;       /* [count] in the order they come; how many have come */
};

/* Nobody goes on before rank 0's part went well; where it did not, the others hear of it here. */
static llmpar_status llmpar__hf_agree(llmpar_ctx *ctx, llmpar_stream *stream, llmpar_status status, const char *what)
{
    if (!status) status = llmpar_comm_barrier(ctx->comm, stream, what);
    return status ? status : ctx->device->synchronize(ctx->device, stream);
}

static llmpar_status llmpar__hf_declare(llmpar_tensor_file *file, const char *path)
{
    llmpar_ctx *ctx = file->ctx;
    llmpar_error error;
    int32_t count = 0, at = 0;
    for (int32_t u = 0; u < file->count; u++) count += llmpar_fsdp_unit(file->fsdp, file->units[u])->param_count;
    llmpar_safetensor *tensors = (llmpar_safetensor *)llmpar_heap_zalloc(&ctx->heap, (size_t)count + 1, sizeof *tensors);
    if (!tensors) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "%s: no memory for the header", path);
    for (int32_t u = 0; u < file->count; u++) {
        const llmpar_unit *unit = llmpar_fsdp_unit(file->fsdp, file->units[u]);
        for (int32_t i = 0; i < unit->param_count; i++, at++) {
            tensors[at].name = unit->params[i].name;
            tensors[at].dtype = llmpar_dtype_sum(llmpar_fsdp_dtype(file->fsdp));
            tensors[at].dims = unit->params[i].dims;
            for (int32_t d = 0; d < unit->params[i].dims; d++) tensors[at].shape[d] = unit->params[i].shape[d];
        }
    }
    llmpar_error_clear(&error);
    llmpar_status status = llmpar_safetensors_writer_open(&ctx->heap, ctx->io, path, tensors, count, &file->writer, &error);
    llmpar_heap_free(&ctx->heap, tensors);
    return llmpar__hf_fail(ctx, status, &error);
}

LLMPAR_DEF llmpar_status llmpar_tensor_file_open(llmpar_fsdp *fsdp, const char *path, const int32_t *units, int32_t count, llmpar_tensor_file **out)
{
    llmpar_mesh *mesh = llmpar_fsdp_mesh(fsdp);
    llmpar_ctx *ctx = mesh->ctx;
    size_t size = llmpar_dtype_size(llmpar_dtype_sum(llmpar_fsdp_dtype(fsdp)));
    int64_t most = 1, scratch = 1;
    *out = NULL;
    llmpar_tensor_file *file = (llmpar_tensor_file *)llmpar_heap_zalloc(&ctx->heap, 1, sizeof *file);
    if (!file) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "%s: out of memory", path);
    file->fsdp = fsdp;
    file->ctx = ctx;
    file->count = units ? count : llmpar_fsdp_unit_count(fsdp);
    file->units = (int32_t *)llmpar_heap_alloc(&ctx->heap, (size_t)file->count + 1, sizeof *file->units);
    if (!file->units) {
        llmpar_heap_free(&ctx->heap, file);
        return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "%s: out of memory", path);
    }
    for (int32_t u = 0; u < file->count; u++) file->units[u] = units ? units[u] : u;
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(fsdp); u++)
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
        file->host = llmpar_heap_alloc(&ctx->heap, (size_t)most, size);
        status = file->host ? llmpar__hf_declare(file, path) : llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "%s: no memory for one tensor", path);
    }
    status = llmpar__hf_agree(ctx, file->stream, status, "save/open");
    if (status) {
        llmpar_tensor_file_abandon(file);
        return status;
    }
    *out = file;
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_tensor_file_write(llmpar_tensor_file *file, int32_t unit, const void *shard)
{
    llmpar_ctx *ctx = file->ctx;
    llmpar_mesh *mesh = llmpar_fsdp_mesh(file->fsdp);
    size_t size = llmpar_dtype_size(llmpar_dtype_sum(llmpar_fsdp_dtype(file->fsdp)));
    llmpar_error error;
    llmpar_error_clear(&error);
    if (file->next >= file->count || unit != file->units[file->next])
        return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "save: unit %d, expected %s%d", (int)unit, file->next < file->count ? "unit " : "no more than ", file->next < file->count ? (int)file->units[file->next] : (int)file->count);
    file->next++;
    llmpar_status status = LLMPAR_OK;
    for (int32_t i = 0; i < llmpar_fsdp_unit(file->fsdp, unit)->param_count && !status; i++) {
        llmpar_dtensor tensor;
        size_t bytes = size;
        llmpar_fsdp_dtensor(file->fsdp, unit, i, &tensor);
        for (int32_t d = 0; d < tensor.dims; d++) bytes *= (size_t)tensor.shape[d];
        status = llmpar_dtensor_full(&tensor, mesh, file->stream, llmpar_fsdp_local(file->fsdp, unit, i, (void *)(uintptr_t)shard), file->scratch, file->full);
        if (!status && file->writer) status = ctx->device->copy(ctx->device, file->stream, file->host, file->full, bytes);
        if (!status) status = ctx->device->synchronize(ctx->device, file->stream);
        if (!status && file->writer) status = llmpar__hf_fail(ctx, llmpar_safetensors_writer_write(file->writer, file->host, bytes, &error), &error);
    }
    return status;
}

LLMPAR_DEF llmpar_status llmpar_tensor_file_commit(llmpar_tensor_file *file)
{
    llmpar_ctx *ctx = file->ctx;
    llmpar_error error;
    llmpar_status status = LLMPAR_OK;
    llmpar_error_clear(&error);
    if (file->writer) status = llmpar__hf_fail(ctx, llmpar_safetensors_writer_commit(file->writer, &error), &error);
    file->writer = NULL;
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
    llmpar_heap_free(&file->ctx->heap, file->host);
    llmpar_heap_free(&file->ctx->heap, file->units);
    if (file->stream) file->ctx->device->stream_destroy(file->ctx->device, file->stream);
    llmpar_heap_free(&file->ctx->heap, file);
}

static llmpar_status llmpar__hf_write_config(llmpar_ctx *ctx, const llmpar_llama_config *config, const char *directory)
{
    llmpar_error error;
    llmpar_writer *writer = NULL;
    llmpar_status status = LLMPAR_OK;
    llmpar_error_clear(&error);
    size_t bytes = llmpar_llama_config_write(config, NULL, 0);
    char *text = (char *)llmpar_heap_alloc(&ctx->heap, 1, bytes + 1), *path = llmpar__hf_path(ctx, directory, "config.json");
    if (!text || !path) {
        status = llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "%s: out of memory for config.json", directory);
    } else {
        llmpar_llama_config_write(config, text, bytes + 1);
        status = llmpar_writer_open(&ctx->heap, ctx->io, path, &writer, &error);
        if (!status) status = llmpar_writer_write(writer, text, bytes, &error);
        if (!status) {
            status = llmpar_writer_commit(writer, &error);
            writer = NULL;
        }
        llmpar_writer_abandon(writer);
        status = llmpar__hf_fail(ctx, status, &error);
    }
    llmpar_heap_free(&ctx->heap, path);
    llmpar_heap_free(&ctx->heap, text);
    return status;
}

LLMPAR_DEF llmpar_status llmpar_hf_save(llmpar_fsdp *fsdp, const llmpar_llama_config *config, const char *directory)
{
    llmpar_ctx *ctx = llmpar_fsdp_mesh(fsdp)->ctx;
    llmpar_tensor_file *file = NULL;
    llmpar_status status = LLMPAR_OK;
    llmpar_error error;
    llmpar_error_clear(&error);
    if (ctx->rank == 0) status = llmpar__hf_fail(ctx, llmpar_directory_ensure(ctx->io, directory, &error), &error);
    char *path = status ? NULL : llmpar__hf_path(ctx, directory, "model.safetensors");
    if (!status && !path) status = LLMPAR_ERR_MEMORY;
    if (!status) status = llmpar_tensor_file_open(fsdp, path, NULL, 0, &file);
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(fsdp) && !status; u++) {
        const void *shard = llmpar_fsdp_shard(fsdp, u, NULL, NULL, NULL);
        status = shard ? llmpar_tensor_file_write(file, u, shard) : ctx->error.status;
        llmpar_status done = shard ? llmpar_fsdp_shard_done(fsdp, u, 0) : LLMPAR_OK;
        if (!status) status = done;
    }
    /* When there is no room for the weights, a config.json of another model that stood here still stands. */
    if (!status && ctx->rank == 0) status = llmpar__hf_write_config(ctx, config, directory);
    if (!status) {
        status = llmpar_tensor_file_commit(file);
        file = NULL;
    }
    llmpar_tensor_file_abandon(file);
    llmpar_heap_free(&ctx->heap, path);
    return status;
}

#endif /* LLMPAR_NO_LLAMA, LLMPAR_NO_IO */
