/* hf_model: small models in Hugging Face directories of a test's own: trained, saved, broken in one way. */
#ifndef HF_MODEL_H
#define HF_MODEL_H

#include "test.h"
#include <sys/stat.h>
#include <unistd.h>

/* ---- files ---- */

static char root[256];
static void remove_root(void)
{
    char command[300];
    snprintf(command, sizeof command, "rm -r '%s'", root);
    if (system(command)) fprintf(stderr, "cannot remove %s\n", root);
}

/* root/name in one of eight rotating buffers. */
static inline const char *in_root(const char *name)
{
    static char buffer[8][600];
    static int next;
    if (!root[0]) {
        const char *tmp = getenv("TMPDIR");
        snprintf(root, sizeof root, "%.200s/llmpar-test-XXXXXX", tmp && tmp[0] ? tmp : "/tmp");
        if (!mkdtemp(root)) { fprintf(stderr, "cannot make %s\n", root); exit(1); }
        atexit(remove_root);
    }
    next = (next + 1) % 8;
    snprintf(buffer[next], sizeof buffer[next], "%s/%s", root, name);
    return buffer[next];
}

static char *read_bytes(const char *path, size_t *bytes)
{
    FILE *f = fopen(path, "rb");
    char *data;
    *bytes = 0;
    if (!f) { TEST_FAIL("cannot read %s", path); return (char *)calloc(1, 1); }
    fseek(f, 0, SEEK_END);
    *bytes = (size_t)ftell(f);
    rewind(f);
    data = (char *)malloc(*bytes + 1);
    if (!data || fread(data, 1, *bytes, f) != *bytes) { fprintf(stderr, "cannot read %s\n", path); exit(1); }
    data[*bytes] = 0;
    fclose(f);
    return data;
}

static inline void write_bytes(const char *path, const void *data, size_t bytes)
{
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, bytes, f) != bytes) TEST_FAIL("cannot write %s", path);
    if (f) fclose(f);
}

static inline void check_same_file(const char *a, const char *b)
{
    size_t n, m;
    char *x = read_bytes(a, &n), *y = read_bytes(b, &m);
    if (n != m || memcmp(x, y, n)) TEST_FAIL("%s (%d bytes) and %s (%d bytes) differ", a, (int)n, b, (int)m);
    free(x);
    free(y);
}

static inline void check_same_directory(const char *a, const char *b)
{
    char x[700], y[700];
    static const char *const names[] = { "config.json", "model.safetensors" };
    for (int i = 0; i < 2; i++) {
        snprintf(x, sizeof x, "%s/%s", a, names[i]);
        snprintf(y, sizeof y, "%s/%s", b, names[i]);
        check_same_file(x, y);
        snprintf(x, sizeof x, "%s/%s.tmp", a, names[i]);
        CHECK(!llmpar_is_file(x));
    }
}

/* ---- models ---- */

typedef struct session { llmpar_ctx *ctx; llmpar_mesh *mesh; llmpar_llama *model; llmpar_trainer *trainer; llmpar_fsdp *fsdp; } session;
typedef struct job {
    llmpar_llama_config config;
    llmpar_mesh_desc mesh;
    int zero, steps;
    llmpar_dtype dtype;
    const char *load, *save, *file;      /* file: for the body */
    const llmpar_hf_desc *as;            /* how it is saved */
    const llmpar_io *io;
    llmpar_status (*body)(session *s, const struct job *j);
} job;

static inline llmpar_llama_config small(int tied)
{
    llmpar_llama_config c;
    memset(&c, 0, sizeof c);
    c.vocab = 41;
    c.hidden = 24;
    c.intermediate = 36;
    c.layers = 2;
    c.heads = 4;
    c.kv_heads = 2;
    c.head_dim = 6;
    c.max_positions = 128;
    c.rms_eps = 1e-5;
    c.rope_theta = 10000;
    c.rope_scaling.kind = tied ? LLMPAR_ROPE_LINEAR : LLMPAR_ROPE_LLAMA3;
    c.rope_scaling.factor = 4;
    c.rope_scaling.original_max_positions = tied ? 0 : 32;
    c.rope_scaling.low_freq_factor = tied ? 0 : 1;
    c.rope_scaling.high_freq_factor = tied ? 0 : 4;
    c.tied = tied;
    c.bos_id = 1;
    c.eos_count = 2;
    c.eos_id[0] = 2;
    c.eos_id[1] = 40;
    c.init_std = 0.1;
    return c;
}

static inline llmpar_status sequence(void *user, int64_t index, int32_t *tokens)
{
    (void)user;
    for (int i = 0; i <= 12; i++) tokens[i] = (int32_t)((index * 7 + i * i) % 41);
    return LLMPAR_OK;
}

static inline void no_leak(const llmpar_ctx *ctx, void *user)
{
    (void)user;
    CHECK_INT(ctx->heap.live, 0);
}

static inline llmpar_status run_rank(llmpar_ctx *ctx, void *user)
{
    const job *j = (const job *)user;
    session s = { ctx, NULL, NULL, NULL, NULL };
    llmpar_llama_desc desc = { .config = &j->config, .seed = 9 };
    llmpar_trainer_desc trainer;
    llmpar_step step;
    memset(&trainer, 0, sizeof trainer);
    trainer.seq_len = 12;
    trainer.batch = j->mesh.dp_shard == 3 ? 3 : 4;
    trainer.zero = j->zero;
    trainer.dtype = j->dtype;
    trainer.log_every = -1;
    if (j->steps) trainer.sequence = sequence;
    llmpar_status status = llmpar_mesh_create(ctx, &j->mesh, &s.mesh);
    if (!status) status = llmpar_llama_create(ctx, &desc, &s.model);
    if (!status) status = llmpar_parallelize(s.mesh, s.model, &trainer, &s.trainer);
    if (!status) s.fsdp = llmpar_trainer_fsdp(s.trainer);
    if (!status && j->load) status = llmpar_load_hf(s.trainer, j->load);
    for (int i = 0; !status && i < j->steps; i++) status = llmpar_trainer_step(s.trainer, &step);
    if (!status && j->body) status = j->body(&s, j);
    if (!status && j->save) status = j->as ? llmpar_hf_save(s.fsdp, &j->config, j->save, j->as) : llmpar_save_hf(s.trainer, j->save);
    llmpar_trainer_destroy(s.trainer);
    llmpar_llama_destroy(s.model);
    llmpar_mesh_destroy(s.mesh);
    return status;
}

static int32_t degree(int32_t d) { return d ? d : 1; }
static inline llmpar_status launch(const job *j, llmpar_error *error)
{
    llmpar_launch_desc desc = { .ranks = degree(j->mesh.dp_replicate) * degree(j->mesh.dp_shard) * degree(j->mesh.tp), .check = no_leak, .io = j->io };
    return llmpar_launch(&desc, run_rank, (void *)j, error);
}
static inline void launch_ok(const job *j)
{
    llmpar_error error;
    if (launch(j, &error)) TEST_FAIL("rank %d (%s): %s", error.rank, error.where, error.text);
}

/* A model of random weights, trained two steps on 2x2, saved. */
static inline const char *trained(int tied)
{
    static char path[2][600];
    job j = { .config = small(tied), .mesh = { .dp_shard = 2, .tp = 2 }, .steps = 2 };
    if (path[tied][0]) return path[tied];
    snprintf(path[tied], sizeof path[tied], "%s", in_root(tied ? "tied" : "untied"));
    j.save = path[tied];
    launch_ok(&j);
    return path[tied];
}

/* ---- directories that differ in one thing ---- */

typedef enum change { AS_IS, WITHOUT, EXTRA, SECOND_HEAD, SHAPE, DIMS, INTEGER } change;

/* Copies a directory with all tensors in another dtype, or tensor `name` changed. */
static inline const char *rewritten(const char *from, const char *name, llmpar_dtype dtype, change what, const char *tensor)
{
    enum { MOST = 32 };
    char path[700];
    llmpar_heap heap;
    llmpar_error error;
    llmpar_safetensors *file = NULL;
    llmpar_safetensors_writer *writer = NULL;
    llmpar_safetensor out[MOST];
    const char *to = in_root(name);
    llmpar_heap_init(&heap, NULL);
    llmpar_error_clear(&error);
    CHECK_OK(llmpar_directory_ensure(NULL, to, &error));
    snprintf(path, sizeof path, "%s/config.json", from);
    size_t bytes;
    char *text = read_bytes(path, &bytes);
    snprintf(path, sizeof path, "%s/config.json", to);
    write_bytes(path, text, bytes);
    free(text);
    snprintf(path, sizeof path, "%s/model.safetensors", from);
    CHECK_OK(llmpar_safetensors_open(&heap, NULL, path, &file, &error));
    if (!file) return to;
    int32_t count = 0;
    for (int32_t i = 0; i < file->count; i++) {
        int hit = tensor && !strcmp(file->tensor[i].name, tensor);
        if (hit && what == WITHOUT) continue;
        out[count] = file->tensor[i];
        out[count].dtype = hit && what == INTEGER ? LLMPAR_I32 : dtype;
        if (hit && what == SHAPE) { int64_t first = out[count].shape[0]; out[count].shape[0] = out[count].shape[1]; out[count].shape[1] = first; }
        if (hit && what == DIMS) { out[count].shape[2] = 1; out[count].dims = 3; }
        count++;
    }
    if (what == EXTRA || what == SECOND_HEAD) { /* zeros; the embedding once more */
        out[count] = what == EXTRA ? file->tensor[0] : *llmpar_safetensors_find(file, "model.embed_tokens.weight");
        out[count].name = tensor;
        out[count].dtype = dtype;
        if (what == EXTRA) out[count].dims = 1, out[count].shape[0] = 4;
        count++;
    }
    snprintf(path, sizeof path, "%s/model.safetensors", to);
    CHECK_OK(llmpar_safetensors_writer_open(&heap, NULL, path, out, count, &writer, &error));
    for (int32_t i = 0; i < count && writer; i++) {
        size_t n = 1, size = llmpar_dtype_size(out[i].dtype);
        for (int d = 0; d < out[i].dims; d++) n *= (size_t)out[i].shape[d];
        void *copy = calloc(n, 4), *converted = calloc(n, size);
        if (what != EXTRA || i + 1 < count) CHECK_OK(llmpar_safetensors_read(file, &out[i], 0, 4 * n, copy, &error));
        if (out[i].dtype != LLMPAR_I32) CHECK(llmpar_convert(converted, out[i].dtype, copy, LLMPAR_F32, n));
        CHECK_OK(llmpar_safetensors_writer_write(writer, converted, n * size, &error));
        free(converted);
        free(copy);
    }
    if (writer) CHECK_OK(llmpar_safetensors_writer_commit(writer, &error));
    llmpar_safetensors_close(file);
    CHECK_INT(heap.live, 0);
    return to;
}

/* ---- what is refused: and nothing is changed by it ---- */

static inline llmpar_status refuses(session *s, const job *j)
{
    int32_t units = llmpar_fsdp_unit_count(s->fsdp);
    void *before[8];
    size_t bytes[8];
    for (int32_t u = 0; u < units && u < 8; u++) {
        int64_t elements;
        const void *shard = llmpar_fsdp_shard(s->fsdp, u, &elements, NULL, NULL);
        bytes[u] = (size_t)elements * 4;
        before[u] = malloc(bytes[u]);
        memcpy(before[u], shard, bytes[u]);
    }
    llmpar_status status = llmpar_load_hf(s->trainer, j->save);
    if (!status) TEST_FAIL("%s was loaded", j->save);
    for (int32_t u = 0; u < units && u < 8; u++) {
        CHECK_BYTES(llmpar_fsdp_shard(s->fsdp, u, NULL, NULL, NULL), before[u], bytes[u]);
        free(before[u]);
    }
    return status;
}

static inline void check_refused(const char *directory, int tied, llmpar_status want, const char *text, const char *more)
{
    llmpar_error error;
    job j = { .config = small(tied), .mesh = { .dp_shard = 2, .tp = 2 }, .save = directory, .body = refuses };
    llmpar_status status = launch(&j, &error);
    if (status != want || !strstr(error.text, text) || !strstr(error.text, more)) TEST_FAIL("%s: want %s, \"%s\", \"%s\", got %s: %s", directory, llmpar_status_string(want), text, more, llmpar_status_string(status), error.text);
}

#endif
