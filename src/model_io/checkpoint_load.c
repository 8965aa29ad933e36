/* Loading: verify everything, the files shared out over the ranks; then every rank takes the numbers of its own parts from the files that hold them.

     ours, a range of a rectangle   |....====|====|==..|       the common boxes of our part and each of theirs are runs of rows in both;
     theirs, by file                |==A==|=B==|==C====|       one run where the cuts agree                                                    */
#include "model_io/checkpoint.h"
#include "model_io/checkpoint_internal.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "io/system.h"

#if !defined(LLMPAR_NO_IO)

#define LLMPAR__LOAD_PIECE ((size_t)512 << 10)  /* of a part, at once in memory: stays in a cache */
#define LLMPAR__LOAD_AHEAD ((size_t)64 << 10)   /* what short runs are read through */
#define LLMPAR__LOAD_FILES 32                   /* open at once */

typedef struct llmpar__load_file { int32_t index; llmpar_safetensors *file; } llmpar__load_file;
typedef struct llmpar__load {
    llmpar_fsdp *fsdp;
    llmpar_optim *optim;
    llmpar_ctx *ctx;
    const char *path;
    llmpar__manifest manifest;
    int states;                   /* 0: parameters alone are taken */
    llmpar_error error;
    llmpar__load_file open[LLMPAR__LOAD_FILES];
    int32_t next;                 /* in `open`, to be replaced */
    unsigned char *piece, *ahead; /* [LLMPAR__LOAD_PIECE], [LLMPAR__LOAD_AHEAD] */
    const llmpar_safetensor *ahead_of;
    size_t ahead_begin, ahead_bytes;
} llmpar__load;

/* ---- verification ---- */

static llmpar_status llmpar__load_manifest(llmpar__load *load)
{
    char path[LLMPAR__CHECKPOINT_PATH], *text = NULL;
    size_t bytes;
    llmpar_heap *heap = &load->ctx->heap;
    const size_t most = LLMPAR__CHECKPOINT_PATH - LLMPAR__CHECKPOINT_NAME - 1;
    if (strlen(load->path) > most) return llmpar_error_set(&load->error, LLMPAR_ERR_ARGUMENT, "%.200s..: a path of more than %zu bytes", load->path, most);
    snprintf(path, sizeof path, "%s/manifest.json", load->path);
    llmpar_status status = llmpar_file_load(heap, load->ctx->io, path, LLMPAR__CHECKPOINT_MANIFEST, &text, &bytes, &load->error);
    if (!status) status = llmpar__manifest_parse(heap, text, bytes, path, &load->manifest, &load->error);
    llmpar_heap_free(heap, text);
    const char *slash = strrchr(load->path, '/');
    int64_t named = llmpar__checkpoint_step(slash ? slash + 1 : load->path);
    if (!status && named >= 0 && named != load->manifest.info.step)
        status = llmpar_error_set(&load->error, LLMPAR_ERR_FORMAT, "%s: it is of step %lld, not of the step in its directory's name", path, (long long)load->manifest.info.step);
    return status;
}

static int llmpar__load_known(void *user, const char *name)
{
    llmpar__load *load = (llmpar__load *)user;
    for (int32_t f = 0; f < load->manifest.files; f++)
        if (!strcmp(name, load->manifest.file[f].name)) return 0;
    if (!strcmp(name, "manifest.json")) return 0;
    llmpar_error_set(&load->error, LLMPAR_ERR_FORMAT, "%s/%.200s: a file that the manifest does not name", load->path, name);
    return -1;
}

/* Size, checksum, and for a rank's file the tensors that the manifest says are in it. */
static llmpar_status llmpar__load_verify(llmpar__load *load, int32_t f, unsigned char *buffer)
{
    const llmpar__manifest *m = &load->manifest;
    llmpar_error *error = &load->error;
    char path[LLMPAR__CHECKPOINT_PATH], name[LLMPAR__CHECKPOINT_NAME];
    llmpar_safetensors *tensors = NULL;
    llmpar_file file;
    llmpar_xxh64 sum;
    snprintf(path, sizeof path, "%s/%s", load->path, m->file[f].name);
    llmpar_status status = llmpar_file_open(load->ctx->io, path, &file, error);
    if (status) return status;
    if (file.bytes != m->file[f].bytes) status = llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: %llu bytes, the manifest says %llu", path, (unsigned long long)file.bytes, (unsigned long long)m->file[f].bytes);
    llmpar_xxh64_begin(&sum);
    for (uint64_t at = 0; at < file.bytes && !status;) {
        size_t part = file.bytes - at < LLMPAR__LOAD_PIECE ? (size_t)(file.bytes - at) : LLMPAR__LOAD_PIECE;
        status = llmpar_file_read(&file, at, buffer, part, error);
        if (!status) llmpar_xxh64_add(&sum, buffer, part);
        at += part;
    }
    llmpar_file_close(&file);
    if (!status && llmpar_xxh64_end(&sum) != m->file[f].xxh64)
        status = llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: damaged: checksum %016llx, the manifest says %016llx", path, (unsigned long long)llmpar_xxh64_end(&sum), (unsigned long long)m->file[f].xxh64);
    if (status || !llmpar__manifest_is_shard(m->file[f].name)) return status;
    status = llmpar_safetensors_open(&load->ctx->heap, load->ctx->io, path, &tensors, error);
    int32_t expected = 0;
    for (int32_t t = 0; t < m->tensors && !status; t++)
        for (int32_t p = 0; p < m->tensor[t].parts && !status; p++)
            for (int32_t k = 0; k < LLMPAR__ARRAY_KINDS && m->tensor[t].part[p].file == f && !status; k++) {
                if (!(m->tensor[t].kinds >> k & 1u)) continue;
                snprintf(name, sizeof name, "%s/%s", llmpar__array_name(k), m->tensor[t].name);
                const llmpar_safetensor *tensor = llmpar_safetensors_find(tensors, name);
                expected++;
                if (!tensor || tensor->dims != 1 || tensor->shape[0] != m->tensor[t].part[p].local.flat_count || tensor->dtype != m->stored)
                    status = llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: %s: expected it as %s[%lld]", path, name, llmpar_dtype_name(m->stored), (long long)m->tensor[t].part[p].local.flat_count);
            }
    if (!status && tensors->count != expected) status = llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: %d tensors, the manifest says %d", path, (int)tensors->count, (int)expected);
    llmpar_safetensors_close(tensors);
    return status;
}

/* The manifest's entry of an array, its kind taken from the entry's; *hint: where to look first. */
static llmpar__manifest_tensor *llmpar__load_take(llmpar__load *load, const char *name, int32_t kind, int32_t *hint)
{
    for (int32_t i = 0; i < load->manifest.tensors; i++) {
        int32_t at = *hint + i < load->manifest.tensors ? *hint + i : *hint + i - load->manifest.tensors;
        llmpar__manifest_tensor *tensor = &load->manifest.tensor[at];
        if (!(tensor->kinds >> kind & 1u) || strcmp(tensor->name, name)) continue;
        *hint = at;
        return tensor;
    }
    return NULL;
}

/* Does the checkpoint hold what this run has, and nothing else? Entries' kinds are cleared as they are found, and set again. */
static llmpar_status llmpar__load_match(llmpar__load *load)
{
    llmpar__manifest *m = &load->manifest;
    llmpar__array array[LLMPAR__ARRAYS];
    llmpar_error *error = &load->error;
    llmpar_dtype dtype = llmpar_dtype_sum(llmpar_fsdp_dtype(load->fsdp));
    const char *own = load->optim ? llmpar_optim_name(llmpar_optim_get_kind(load->optim)) : "none";
    int32_t hint = 0;
    if (m->stored != dtype) return llmpar_error_set(error, LLMPAR_ERR_CONFIG, "%s: numbers of type %s, this run has %s", load->path, llmpar_dtype_name(m->stored), llmpar_dtype_name(dtype));
    if (load->states && strcmp(m->info.optimizer, own)) return llmpar_error_set(error, LLMPAR_ERR_CONFIG, "%s: optimizer %s, this run has %s", load->path, m->info.optimizer, own);
    uint32_t *kinds = LLMPAR__ALLOC(uint32_t, &load->ctx->heap, (size_t)m->tensors + 1);
    if (!kinds) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory", load->path);
    for (int32_t t = 0; t < m->tensors; t++) kinds[t] = m->tensor[t].kinds;
    llmpar_status status = LLMPAR_OK;
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(load->fsdp) && !status; u++)
        for (int32_t p = 0; p < llmpar_fsdp_unit(load->fsdp, u)->param_count && !status; p++) {
            const char *name = llmpar_fsdp_unit(load->fsdp, u)->params[p].name;
            int32_t arrays = llmpar__arrays(load->fsdp, load->states ? load->optim : NULL, u, p, array);
            for (int32_t a = 0; a < arrays && !status; a++) {
                llmpar__manifest_tensor *tensor = llmpar__load_take(load, name, array[a].kind, &hint);
                int32_t dims = array[a].dims, d = 0;
                while (tensor && tensor->dims == dims && d < dims && tensor->shape[d] == array[a].shape[d]) d++;
                if (!tensor) status = llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: %s/%.200s is missing", load->path, llmpar__array_name(array[a].kind), name);
                else if (d < dims || tensor->dims != dims)
                    status = llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: %s/%.200s: %lld in dim %d of %d, expected %lld in dim %d of %d", load->path, llmpar__array_name(array[a].kind), name, (long long)tensor->shape[d], (int)d, (int)tensor->dims, (long long)array[a].shape[d], (int)d, (int)dims);
                else tensor->kinds &= ~(1u << array[a].kind);
            }
        }
    for (int32_t t = 0; t < m->tensors && !status; t++) {
        uint32_t rest = load->states ? m->tensor[t].kinds : m->tensor[t].kinds & 1u << LLMPAR__ARRAY_PARAM;
        int32_t kind = 0;
        while (rest && !(rest >> kind & 1u)) kind++;
        if (rest) status = llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: %s/%.200s is not part of this run, or stands twice", load->path, llmpar__array_name(kind), m->tensor[t].name);
    }
    for (int32_t t = 0; t < m->tensors; t++) m->tensor[t].kinds = kinds[t];
    llmpar_heap_free(&load->ctx->heap, kinds);
    return status;
}

static llmpar_status llmpar__load_check(llmpar__load *load)
{
    llmpar_ctx *ctx = load->ctx;
    const llmpar_io *io = ctx->io ? ctx->io : llmpar_io_system();
    llmpar_status status = llmpar__load_manifest(load);
    if (!status) status = llmpar__load_match(load);
    if (!status && ctx->rank == 0) {
        int number;
        LLMPAR__AGAIN(list, load->path, llmpar__load_known, load);
        if (number) status = number < 0 ? LLMPAR_ERR_FORMAT : llmpar_error_set(&load->error, LLMPAR_ERR_IO, "%s: cannot list it: %s", load->path, strerror(number));
    }
    for (int32_t f = ctx->rank; f < load->manifest.files && !status; f += ctx->world) status = llmpar__load_verify(load, f, load->piece);
    return status;
}

/* ---- numbers ---- */

static llmpar_status llmpar__load_open(llmpar__load *load, int32_t index, const llmpar_safetensors **out)
{
    char path[LLMPAR__CHECKPOINT_PATH];
    for (int i = 0; i < LLMPAR__LOAD_FILES; i++)
        if (load->open[i].file && load->open[i].index == index) {
            *out = load->open[i].file;
            return LLMPAR_OK;
        }
    llmpar__load_file *slot = &load->open[load->next];
    load->next = (load->next + 1) % LLMPAR__LOAD_FILES;
    llmpar_safetensors_close(slot->file);
    slot->file = NULL;
    slot->index = index;
    load->ahead_of = NULL;
    snprintf(path, sizeof path, "%s/%s", load->path, load->manifest.file[index].name);
    llmpar_status status = llmpar_safetensors_open(&load->ctx->heap, load->ctx->io, path, &slot->file, &load->error);
    *out = slot->file;
    return status;
}

/* A run; short ones come out of a stretch that is read ahead, up to `end`, which bounds what is needed of this tensor now. */
static llmpar_status llmpar__load_run(llmpar__load *load, const llmpar_safetensors *file, const llmpar_safetensor *tensor, size_t offset, size_t bytes, size_t end, unsigned char *to)
{
    if (bytes * 2 > LLMPAR__LOAD_AHEAD) return llmpar_safetensors_read(file, tensor, offset, bytes, to, &load->error);
    if (load->ahead_of != tensor || offset + bytes > load->ahead_begin + load->ahead_bytes) { /* within a tensor offsets rise: of the pieces, of the boxes in one, of the runs in a box */
        load->ahead_of = tensor;
        load->ahead_begin = offset;
        load->ahead_bytes = llmpar__least(end - offset, LLMPAR__LOAD_AHEAD);
        llmpar_status status = llmpar_safetensors_read(file, tensor, offset, load->ahead_bytes, load->ahead, &load->error);
        if (status) {
            load->ahead_of = NULL;
            return status;
        }
    }
    memcpy(to, load->ahead + (offset - load->ahead_begin), bytes);
    return LLMPAR_OK;
}

/* Row-major index of a point inside a part's rectangle, counted from the part's first element. */
static int64_t llmpar__load_index(const llmpar_local *part, int32_t dims, const int64_t *point)
{
    int64_t index = 0;
    for (int32_t d = 0; d < dims; d++) index = index * part->shape[d] + (point[d] - part->offset[d]);
    return index - part->flat_begin;
}

static llmpar_status llmpar__load_box(llmpar__load *load, const llmpar_safetensors *file, const llmpar_safetensor *tensor, const llmpar_local *theirs, const llmpar_local *ours, int32_t dims, const llmpar__box *box)
{
    size_t size = llmpar_dtype_size(load->manifest.stored);
    int64_t point[LLMPAR_MAX_DIMS], last[LLMPAR_MAX_DIMS], run = 1;
    int32_t outer = dims;
    while (outer > 0) { /* dims from `outer` on are one run in both */
        int32_t d = --outer;
        run *= box->end[d] - box->begin[d];
        if (box->end[d] - box->begin[d] != theirs->shape[d] || theirs->shape[d] != ours->shape[d]) break;
    }
    for (int32_t d = 0; d < dims; d++) {
        point[d] = box->begin[d];
        last[d] = box->end[d] - 1;
    }
    size_t end = (size_t)(llmpar__load_index(theirs, dims, last) + 1) * size;
    for (;;) {
        llmpar_status status = llmpar__load_run(load, file, tensor, (size_t)llmpar__load_index(theirs, dims, point) * size, (size_t)run * size, end, load->piece + (size_t)llmpar__load_index(ours, dims, point) * size);
        if (status) return status;
        int32_t d = outer - 1;
        while (d >= 0 && ++point[d] == box->end[d]) {
            point[d] = box->begin[d];
            d--;
        }
        if (d < 0) return LLMPAR_OK;
    }
}

/* `ours` of an array, no more than a piece, into load->piece. */
static llmpar_status llmpar__load_piece(llmpar__load *load, const llmpar__manifest_tensor *tensor, int32_t kind, const llmpar_local *ours)
{
    char name[LLMPAR__CHECKPOINT_NAME];
    llmpar__box box[LLMPAR__BOXES * LLMPAR__BOXES];
    llmpar_status status = LLMPAR_OK;
    snprintf(name, sizeof name, "%s/%s", llmpar__array_name(kind), tensor->name);
    for (int32_t p = 0; p < tensor->parts && !status; p++) {
        int64_t volume;
        int32_t boxes = llmpar__mesh_common(&tensor->part[p].local, ours, tensor->dims, box, &volume);
        const llmpar_safetensors *file;
        if (!volume) continue;
        status = llmpar__load_open(load, tensor->part[p].file, &file);
        const llmpar_safetensor *source = status ? NULL : llmpar_safetensors_find(file, name);
        if (!status && !source) status = llmpar_error_set(&load->error, LLMPAR_ERR_FORMAT, "%s: %s has gone", file->path, name);
        for (int32_t b = 0; b < boxes && !status; b++) status = llmpar__load_box(load, file, source, &tensor->part[p].local, ours, tensor->dims, &box[b]);
    }
    return status;
}

static llmpar_status llmpar__load_array(llmpar__load *load, llmpar_stream *stream, int32_t unit, int32_t param, const llmpar__array *array, const llmpar__array_unit *memory, int32_t *hint)
{
    llmpar_device *device = load->ctx->device;
    size_t size = llmpar_dtype_size(load->manifest.stored);
    llmpar_local ours;
    llmpar__array_part(load->fsdp, load->ctx->rank, unit, param, array, &ours);
    char *to = llmpar__array_memory(load->fsdp, load->optim, unit, param, array, memory);
    const llmpar__manifest_tensor *tensor = llmpar__load_take(load, llmpar_fsdp_unit(load->fsdp, unit)->params[param].name, array->kind, hint);
    int64_t count = ours.flat_count, most = (int64_t)(LLMPAR__LOAD_PIECE / size);
    for (int64_t done = 0; done < count; done += ours.flat_count, ours.flat_begin += ours.flat_count) {
        ours.flat_count = count - done < most ? count - done : most;
        llmpar_status status = llmpar__load_piece(load, tensor, array->kind, &ours);
        if (!status) status = device->copy(device, stream, to + (size_t)done * size, load->piece, (size_t)ours.flat_count * size);
        if (!status) status = device->synchronize(device, stream);
        if (status) return status;
    }
    return LLMPAR_OK;
}

/* Every unit is taken and given back, also behind a failure: giving back is collective where parameters are whole. */
static llmpar_status llmpar__load_numbers(llmpar__load *load)
{
    llmpar_ctx *ctx = load->ctx;
    llmpar__array array[LLMPAR__ARRAYS];
    llmpar__array_unit memory;
    llmpar_stream *stream = NULL;
    int32_t hint = 0;
    llmpar_status status = ctx->device->stream_create(ctx->device, "load", &stream);
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(load->fsdp) && stream; u++) {
        llmpar_status fetched = llmpar__array_fetch(load->fsdp, u, &memory);
        if (fetched) {
            status = fetched;
            break;
        }
        for (int32_t p = 0; p < llmpar_fsdp_unit(load->fsdp, u)->param_count && !status; p++) {
            int32_t arrays = llmpar__arrays(load->fsdp, load->states ? load->optim : NULL, u, p, array);
            for (int32_t a = 0; a < arrays && !status; a++) status = llmpar__load_array(load, stream, u, p, &array[a], &memory, &hint);
        }
        llmpar_status done = llmpar__array_done(load->fsdp, u, 1);
        if (!status) status = done;
    }
    if (stream) ctx->device->stream_destroy(ctx->device, stream);
    for (int i = 0; i < LLMPAR__LOAD_FILES; i++) llmpar_safetensors_close(load->open[i].file);
    if (status && !load->error.status) llmpar_error_set(&load->error, status, "%s", ctx->error.text);
    return status;
}

LLMPAR_DEF llmpar_status llmpar_checkpoint_load(llmpar_fsdp *fsdp, llmpar_optim *optim, const char *path, llmpar_checkpoint_accept accept, void *user, llmpar_checkpoint_info *info)
{
    LLMPAR__NEED(fsdp, NULL);
    llmpar_ctx *ctx = llmpar_fsdp_mesh(fsdp)->ctx;
    if (LLMPAR__NO_PATH(path)) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "checkpoint: no path, expected one");
    LLMPAR__NO_ERROR(error);
    memset(info, 0, sizeof *info);
    llmpar__load *load = LLMPAR__ZALLOC(llmpar__load, &ctx->heap, 1);
    void *buffer = NULL;
    llmpar_status status = llmpar_device_host_alloc(ctx->device, &ctx->heap, LLMPAR__LOAD_PIECE + LLMPAR__LOAD_AHEAD, &buffer);
    status = load && !status ? LLMPAR_OK : llmpar_error_set(&error, LLMPAR_ERR_MEMORY, "%s: out of memory to load it", path);
    if (!status) {
        load->fsdp = fsdp;
        load->optim = optim;
        load->ctx = ctx;
        load->path = path;
        load->states = optim || llmpar_fsdp_optimizer_states(fsdp);
        load->piece = (unsigned char *)buffer;
        load->ahead = load->piece + LLMPAR__LOAD_PIECE;
        status = llmpar__load_check(load);
    }
    status = llmpar__checkpoint_agree(ctx, status, error.status ? &error : &load->error, "checkpoint verified");
    if (!status && accept) status = llmpar__checkpoint_agree(ctx, accept(user, path, &load->manifest.info), NULL, "checkpoint accepted");
    if (!status) {
        status = llmpar__load_numbers(load);
        status = llmpar__checkpoint_agree(ctx, status, &load->error, "checkpoint loaded");
    }
    if (!status && optim) llmpar_optim_set_steps(optim, load->manifest.info.updates);
    if (!status) *info = load->manifest.info;
    if (load) llmpar__manifest_destroy(&ctx->heap, &load->manifest);
    llmpar_device_host_free(ctx->device, &ctx->heap, buffer, LLMPAR__LOAD_PIECE + LLMPAR__LOAD_AHEAD);
    llmpar_heap_free(&ctx->heap, load);
    return status;
}

LLMPAR_DEF llmpar_status llmpar_checkpoint_newest(llmpar_ctx *ctx, const char *directory, int64_t below, int64_t *step)
{
    LLMPAR__NEED(ctx, NULL);
    if (LLMPAR__NO_PATH(directory)) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "checkpoint: no directory, expected one");
    LLMPAR__NO_ERROR(error);
    *step = -1;
    llmpar_status status = ctx->rank ? LLMPAR_OK : llmpar__checkpoint_find(ctx->io, directory, below, step, &error);
    status = llmpar__checkpoint_agree(ctx, status, &error, "checkpoints listed");
    return status ? status : llmpar__comm_largest(ctx->comm, step, 1, "newest checkpoint");
}

#undef LLMPAR__LOAD_PIECE
#undef LLMPAR__LOAD_AHEAD
#undef LLMPAR__LOAD_FILES

#endif /* LLMPAR_NO_IO */
