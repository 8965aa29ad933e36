/* Hugging Face directories: written from a 2x2 mesh and read into others byte for byte, other dtypes, and what a directory may not be. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#include "test.h"
#include <math.h>
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
static const char *in_root(const char *name)
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

static void write_bytes(const char *path, const void *data, size_t bytes)
{
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, bytes, f) != bytes) TEST_FAIL("cannot write %s", path);
    if (f) fclose(f);
}

static void check_same_file(const char *a, const char *b)
{
    size_t n, m;
    char *x = read_bytes(a, &n), *y = read_bytes(b, &m);
    if (n != m || memcmp(x, y, n)) TEST_FAIL("%s (%d bytes) and %s (%d bytes) differ", a, (int)n, b, (int)m);
    free(x);
    free(y);
}

static void check_same_directory(const char *a, const char *b)
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
    llmpar_status (*body)(session *s, const struct job *j);
} job;

static llmpar_llama_config small(int tied)
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

static llmpar_status sequence(void *user, int64_t index, int32_t *tokens)
{
    (void)user;
    for (int i = 0; i <= 12; i++) tokens[i] = (int32_t)((index * 7 + i * i) % 41);
    return LLMPAR_OK;
}

static void no_leak(const llmpar_ctx *ctx, void *user)
{
    (void)user;
    CHECK_INT(ctx->heap.live, 0);
}

static llmpar_status run_rank(llmpar_ctx *ctx, void *user)
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
    if (!status && j->save) status = llmpar_save_hf(s.trainer, j->save);
    llmpar_trainer_destroy(s.trainer);
    llmpar_llama_destroy(s.model);
    llmpar_mesh_destroy(s.mesh);
    return status;
}

static int32_t degree(int32_t d) { return d ? d : 1; }
static llmpar_status launch(const job *j, llmpar_error *error)
{
    llmpar_launch_desc desc = { .ranks = degree(j->mesh.dp_replicate) * degree(j->mesh.dp_shard) * degree(j->mesh.tp), .check = no_leak };
    return llmpar_launch(&desc, run_rank, (void *)j, error);
}
static void launch_ok(const job *j)
{
    llmpar_error error;
    if (launch(j, &error)) TEST_FAIL("rank %d (%s): %s", error.rank, error.where, error.text);
}

/* A model of random weights, trained two steps on 2x2, saved. */
static const char *trained(int tied)
{
    static char path[2][600];
    job j = { .config = small(tied), .mesh = { .dp_shard = 2, .tp = 2 }, .steps = 2 };
    if (path[tied][0]) return path[tied];
    snprintf(path[tied], sizeof path[tied], "%s", in_root(tied ? "tied" : "untied"));
    j.save = path[tied];
    launch_ok(&j);
    return path[tied];
}

/* ---- from mesh to mesh ---- */

TEST(any_mesh_saves_the_same_bytes)
{
    static const struct { llmpar_mesh_desc mesh; int zero; } rows[] = {
        { { 1, 1, 1, 1, 1 }, 0 }, { { 1, 1, 1, 1, 4 }, 0 }, { { 1, 4, 1, 1, 1 }, 0 }, { { 1, 2, 1, 1, 2 }, 0 }, { { 1, 3, 1, 1, 1 }, 0 }, { { 1, 2, 1, 1, 1 }, LLMPAR_ZERO_0 }, { { 2, 2, 1, 1, 2 }, 0 },
    };
    for (int tied = 0; tied < 2; tied++) {
        const char *from = trained(tied), *to = in_root("again");
        for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
            job j = { .config = small(tied), .mesh = rows[i].mesh, .zero = rows[i].zero, .load = from, .save = to };
            launch_ok(&j);
            check_same_directory(from, to);
        }
    }
}

/* What stands in the directory. */
TEST(contents)
{
    for (int tied = 0; tied < 2; tied++) {
        char path[700];
        size_t bytes;
        llmpar_heap heap;
        llmpar_error error;
        llmpar_llama_config got, want = small(tied);
        llmpar_safetensors *file = NULL;
        llmpar_heap_init(&heap, NULL);
        llmpar_error_clear(&error);
        snprintf(path, sizeof path, "%s/config.json", trained(tied));
        char *text = read_bytes(path, &bytes);
        memset(&got, 0, sizeof got);
        CHECK_OK(llmpar_llama_config_parse(&heap, text, bytes, NULL, &got, &error));
        CHECK_INT(got.vocab, want.vocab);
        CHECK_INT(got.tied, want.tied);
        CHECK_INT(got.rope_scaling.kind, want.rope_scaling.kind);
        CHECK(got.rope_scaling.factor == want.rope_scaling.factor && got.rms_eps == want.rms_eps);
        CHECK_INT(got.eos_count, 2);
        free(text);
        snprintf(path, sizeof path, "%s/model.safetensors", trained(tied));
        CHECK_OK(llmpar_safetensors_open(&heap, NULL, path, &file, &error));
        if (!file) continue;
        CHECK_INT(file->count, 2 + 2 * 9 + !tied);
        static const struct { const char *name; int64_t rows, columns; } shapes[] = {
            { "model.embed_tokens.weight", 41, 24 }, { "model.layers.0.input_layernorm.weight", 24, 0 }, { "model.layers.1.self_attn.q_proj.weight", 24, 24 }, { "model.layers.1.self_attn.k_proj.weight", 12, 24 },
            { "model.layers.0.self_attn.v_proj.weight", 12, 24 }, { "model.layers.0.self_attn.o_proj.weight", 24, 24 }, { "model.layers.1.post_attention_layernorm.weight", 24, 0 }, { "model.layers.1.mlp.gate_proj.weight", 36, 24 },
            { "model.layers.0.mlp.up_proj.weight", 36, 24 }, { "model.layers.1.mlp.down_proj.weight", 24, 36 }, { "model.norm.weight", 24, 0 }, { "lm_head.weight", 41, 24 },
        };
        for (size_t i = 0; i < sizeof shapes / sizeof shapes[0] - (size_t)tied; i++) {
            const llmpar_safetensor *t = llmpar_safetensors_find(file, shapes[i].name);
            if (!t) { TEST_FAIL("no tensor %s", shapes[i].name); continue; }
            CHECK_INT(t->dtype, LLMPAR_F32);
            CHECK_INT(t->dims, shapes[i].columns ? 2 : 1);
            CHECK_INT(t->shape[0], shapes[i].rows);
            if (shapes[i].columns) CHECK_INT(t->shape[1], shapes[i].columns);
        }
        CHECK((llmpar_safetensors_find(file, "lm_head.weight") == NULL) == tied);
        llmpar_safetensors_close(file);
        CHECK_INT(heap.live, 0);
    }
}

/* No more than one tensor whole on a rank: what saving and loading take of the heap beside the shards. */
static llmpar_status frugal(session *s, const job *j)
{
    uint64_t live = s->ctx->heap.live, largest = 4 * 41 * 24, shards = 0;
    s->ctx->heap.peak = live;
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(s->fsdp); u++) {
        int64_t elements;
        llmpar_fsdp_shard(s->fsdp, u, &elements, NULL, NULL);
        if ((uint64_t)elements * 4 > shards) shards = (uint64_t)elements * 4;
    }
    llmpar_status status = llmpar_save_hf(s->trainer, j->save);
    /* the tensor, what gathering it needs beside it; on rank 0 the writer's buffer and header too */
    if (s->ctx->rank) CHECK(s->ctx->heap.peak - live <= 3 * largest + shards + 4096);
    live = s->ctx->heap.live; /* the arena keeps what it took */
    if (!status) status = llmpar_save_hf(s->trainer, j->save);
    CHECK_INT(s->ctx->heap.live, live);
    return status;
}

TEST(saving_takes_one_tensor)
{
    job j = { .config = small(0), .mesh = { .dp_shard = 2, .tp = 2 }, .load = trained(0), .save = in_root("frugal"), .body = frugal };
    launch_ok(&j);
    check_same_directory(trained(0), j.save);
}

/* ---- dtypes ---- */

typedef enum change { AS_IS, WITHOUT, EXTRA, SHAPE, DIMS, INTEGER } change;

/* Copies a directory with all tensors in another dtype, or tensor `name` changed. */
static const char *rewritten(const char *from, const char *name, llmpar_dtype dtype, change what, const char *tensor)
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
    if (what == EXTRA) {
        out[count] = file->tensor[0];
        out[count].name = tensor;
        out[count].dtype = dtype;
        out[count].dims = 1;
        out[count++].shape[0] = 4;
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

/* Loaded into f32 or f64, values are those of the file's dtype; saved and loaded once more nothing changes. */
static void check_values(const char *directory, llmpar_dtype through, llmpar_dtype kept, const char *original)
{
    char path[700];
    llmpar_heap heap;
    llmpar_error error;
    llmpar_safetensors *got = NULL, *want = NULL;
    llmpar_heap_init(&heap, NULL);
    llmpar_error_clear(&error);
    snprintf(path, sizeof path, "%s/model.safetensors", directory);
    CHECK_OK(llmpar_safetensors_open(&heap, NULL, path, &got, &error));
    snprintf(path, sizeof path, "%s/model.safetensors", original);
    CHECK_OK(llmpar_safetensors_open(&heap, NULL, path, &want, &error));
    for (int32_t i = 0; got && want && i < got->count; i++) {
        const llmpar_safetensor *g = &got->tensor[i], *w = llmpar_safetensors_find(want, g->name);
        CHECK_INT(g->dtype, kept);
        if (!w) { TEST_FAIL("%s: %s is new", directory, g->name); break; }
        size_t n = w->bytes / 4, size = llmpar_dtype_size(kept);
        void *f32 = malloc(w->bytes), *had = malloc(g->bytes), *narrow = malloc(8 * n), *wide = malloc(size * n);
        CHECK_OK(llmpar_safetensors_read(want, w, 0, w->bytes, f32, &error));
        CHECK_OK(llmpar_safetensors_read(got, g, 0, g->bytes, had, &error));
        CHECK(llmpar_convert(narrow, through, f32, LLMPAR_F32, n));
        CHECK(llmpar_convert(wide, kept, narrow, through, n));
        CHECK_INT(g->bytes, n * size);
        if (g->bytes == n * size && memcmp(wide, had, g->bytes)) TEST_FAIL("%s: %s differs", directory, g->name);
        free(wide), free(narrow), free(had), free(f32);
    }
    llmpar_safetensors_close(got);
    llmpar_safetensors_close(want);
}

TEST(other_dtypes)
{
    static const llmpar_dtype files[] = { LLMPAR_BF16, LLMPAR_F16, LLMPAR_F64, LLMPAR_F32 };
    for (int f = 0; f < 4; f++)
        for (int kept = LLMPAR_F32; kept <= LLMPAR_F64; kept++) {
            const char *from = rewritten(trained(f & 1), "other", files[f], AS_IS, NULL);
            job j = { .config = small(f & 1), .mesh = { .dp_shard = f < 2 ? 2 : 1, .tp = 2 }, .dtype = (llmpar_dtype)kept, .load = from, .save = in_root("wide") };
            launch_ok(&j);
            check_values(j.save, files[f], (llmpar_dtype)kept, trained(f & 1));
        }
}

TEST(a_model_from_elsewhere)
{
    TEST_DATA(directory, "stories260K/hf");
    llmpar_heap heap;
    llmpar_error error;
    char path[1100];
    size_t bytes;
    job j = { .mesh = { .dp_shard = 2, .tp = 2 }, .load = directory, .save = in_root("elsewhere") };
    llmpar_heap_init(&heap, NULL);
    snprintf(path, sizeof path, "%s/config.json", directory);
    char *text = read_bytes(path, &bytes);
    CHECK_OK(llmpar_llama_config_parse(&heap, text, bytes, NULL, &j.config, &error));
    free(text);
    launch_ok(&j);
    check_values(j.save, LLMPAR_F32, LLMPAR_F32, directory);
}

/* ---- what is refused ---- */

static llmpar_status refuses(session *s, const job *j)
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

static void check_refused(const char *directory, int tied, llmpar_status want, const char *text, const char *more)
{
    llmpar_error error;
    job j = { .config = small(tied), .mesh = { .dp_shard = 2, .tp = 2 }, .save = directory, .body = refuses };
    llmpar_status status = launch(&j, &error);
    if (status != want || !strstr(error.text, text) || !strstr(error.text, more)) TEST_FAIL("%s: want %s, \"%s\", \"%s\", got %s: %s", directory, llmpar_status_string(want), text, more, llmpar_status_string(status), error.text);
}

TEST(strict_loading)
{
    const char *k = "model.layers.1.self_attn.k_proj.weight";
    check_refused(rewritten(trained(0), "missing", LLMPAR_F32, WITHOUT, k), 0, LLMPAR_ERR_FORMAT, k, "missing");
    check_refused(rewritten(trained(0), "headless", LLMPAR_F32, WITHOUT, "lm_head.weight"), 0, LLMPAR_ERR_FORMAT, "lm_head.weight", "missing");
    check_refused(rewritten(trained(0), "extra", LLMPAR_F32, EXTRA, "model.layers.2.mlp.bias"), 0, LLMPAR_ERR_FORMAT, "model.layers.2.mlp.bias", "not part of this model");
    check_refused(rewritten(trained(1), "second head", LLMPAR_F32, EXTRA, "lm_head.weight"), 1, LLMPAR_ERR_FORMAT, "lm_head.weight", "differs from model.embed_tokens.weight");
    check_refused(rewritten(trained(0), "shape", LLMPAR_F32, SHAPE, k), 0, LLMPAR_ERR_FORMAT, k, "has shape [24, 12], expected [12, 24]");
    check_refused(rewritten(trained(0), "dims", LLMPAR_F32, DIMS, k), 0, LLMPAR_ERR_FORMAT, k, "has shape [12, 24, 1], expected [12, 24]");
    check_refused(rewritten(trained(0), "integer", LLMPAR_F32, INTEGER, k), 0, LLMPAR_ERR_FORMAT, k, "dtype i32");
    check_refused(trained(1), 0, LLMPAR_ERR_FORMAT, "lm_head.weight", "missing");
    check_refused(trained(0), 1, LLMPAR_ERR_FORMAT, "lm_head.weight", "differs from model.embed_tokens.weight");
    check_refused(in_root("no such directory"), 0, LLMPAR_ERR_IO, "no such directory", "model.safetensors");
    /* Cut off in the middle. */
    const char *cut = rewritten(trained(0), "cut", LLMPAR_F32, AS_IS, NULL);
    char path[700];
    snprintf(path, sizeof path, "%s/model.safetensors", cut);
    struct stat st;
    CHECK(stat(path, &st) == 0 && truncate(path, st.st_size - 100) == 0);
    check_refused(cut, 0, LLMPAR_ERR_FORMAT, "model.safetensors", "");
}

/* ---- saving that fails ---- */

TEST(saving_fails)
{
    llmpar_error error;
    job j = { .config = small(0), .mesh = { .dp_shard = 2, .tp = 2 }, .save = in_root("not there/deeper") };
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_IO);
    CHECK_INT(error.rank, 0);
    CHECK_TEXT(error.text, "not there/deeper");
    write_bytes(in_root("a file"), "x", 1);
    j.save = in_root("a file");
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_IO);
    CHECK_INT(error.rank, 0);
    CHECK_TEXT(error.text, "a file");
    /* The weights' name is taken by a directory: nothing is left half-written. */
    char path[700];
    j.save = in_root("taken");
    snprintf(path, sizeof path, "%s/model.safetensors", j.save);
    CHECK(mkdir(j.save, 0777) == 0 && mkdir(path, 0777) == 0);
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_IO);
    CHECK_TEXT(error.text, "model.safetensors");
    CHECK(rmdir(path) == 0);
    CHECK(!llmpar_is_file(path));
    snprintf(path, sizeof path, "%s/model.safetensors.tmp", j.save);
    CHECK(!llmpar_is_file(path));
    /* An old directory is written over. */
    launch_ok(&j);
    j.load = trained(0);
    launch_ok(&j);
    check_same_directory(trained(0), j.save);
}

/* ---- files of other buffers ---- */

static llmpar_status tensor_files(session *s, const job *j)
{
    llmpar_tensor_file *file = NULL;
    int32_t units = llmpar_fsdp_unit_count(s->fsdp);
    llmpar_status status = llmpar_tensor_file_open(s->fsdp, j->file, NULL, 0, &file);
    if (status) return status;
    for (int32_t u = 0; u < units && !status; u++) status = llmpar_tensor_file_write(file, u, llmpar_fsdp_shard(s->fsdp, u, NULL, NULL, NULL));
    CHECK(!llmpar_is_file(j->file));
    if (status) { llmpar_tensor_file_abandon(file); return status; }
    status = llmpar_comm_barrier(s->mesh->world, NULL, "nobody has committed");
    llmpar_status committed = llmpar_tensor_file_commit(file);
    return status ? status : committed;
}

static llmpar_status wrong_order(session *s, const job *j)
{
    llmpar_tensor_file *file = NULL;
    llmpar_status status = llmpar_tensor_file_open(s->fsdp, j->file, NULL, 0, &file);
    if (!status) status = llmpar_tensor_file_write(file, 1, llmpar_fsdp_shard(s->fsdp, 1, NULL, NULL, NULL));
    llmpar_tensor_file_abandon(file);
    return status;
}

static llmpar_status too_early(session *s, const job *j)
{
    llmpar_tensor_file *file = NULL;
    llmpar_status status = llmpar_tensor_file_open(s->fsdp, j->file, NULL, 0, &file);
    if (!status) status = llmpar_tensor_file_write(file, 0, llmpar_fsdp_shard(s->fsdp, 0, NULL, NULL, NULL));
    if (status) llmpar_tensor_file_abandon(file); /* rank 0 may have failed already */
    else status = llmpar_tensor_file_commit(file);
    if (!status) TEST_FAIL("half a file was committed");
    return status;
}

TEST(tensor_file)
{
    char path[600], weights[700];
    llmpar_error error;
    snprintf(path, sizeof path, "%s", in_root("tensors.safetensors"));
    snprintf(weights, sizeof weights, "%s/model.safetensors", trained(1));
    job j = { .config = small(1), .mesh = { .dp_shard = 2, .tp = 2 }, .load = trained(1), .file = path, .body = wrong_order };
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_ARGUMENT);
    CHECK(!llmpar_is_file(path));
    j.body = too_early;
    CHECK(launch(&j, &error) != LLMPAR_OK);
    CHECK(!llmpar_is_file(path));
    j.body = tensor_files;
    launch_ok(&j);
    check_same_file(path, weights); /* parameters as a file of tensors are the model's own file */
}

TEST_LIST(T_(any_mesh_saves_the_same_bytes), T_(contents), T_(saving_takes_one_tensor), T_(other_dtypes), T_(a_model_from_elsewhere), T_(strict_loading), T_(saving_fails), T_(tensor_file))
