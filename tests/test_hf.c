/* Hugging Face directories: written from a 2x2 mesh and read into others byte for byte, other dtypes, and what a directory may not be. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#include "hf_model.h"
#include <errno.h>
#include <fcntl.h>

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

/* A model that trains in bf16 or f16 has f32 master parameters: a 16-bit directory goes in and comes out of every mesh as the same bytes. */
TEST(sixteen_bits)
{
    static const llmpar_dtype types[] = { LLMPAR_BF16, LLMPAR_F16 };
    for (int i = 0; i < 4; i++) {
        llmpar_hf_desc as = { .dtype = types[i & 1] };
        const char *from = in_root("narrow");
        char kept[600];
        snprintf(kept, sizeof kept, "%s", from);
        job j = { .config = small(i / 2), .load = trained(i / 2), .save = kept, .as = &as };
        launch_ok(&j);
        check_values(kept, types[i & 1], types[i & 1], trained(i / 2));
        job again = { .config = small(i / 2), .mesh = { .dp_shard = 2, .tp = 2 }, .dtype = types[i & 1], .zero = i & 1 ? LLMPAR_ZERO_1 : 0, .load = kept, .save = in_root("narrow again"), .as = &as };
        launch_ok(&again);
        check_same_directory(kept, again.save);
        again.as = NULL; /* the shards' own dtype is f32 */
        launch_ok(&again);
        check_values(again.save, types[i & 1], LLMPAR_F32, trained(i / 2));
    }
    llmpar_error error;
    llmpar_hf_desc as = { .dtype = LLMPAR_I32 };
    job j = { .config = small(0), .save = in_root("integers"), .as = &as };
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "expected a floating type");
}

/* ---- shards ---- */

static int is_shard(void *user, const char *name)
{
    *(int *)user += !strncmp(name, "model-0", 7);
    return 0;
}

/* In files of several sizes out of any mesh and back into any other. */
TEST(sharded_directories)
{
    static const struct { llmpar_mesh_desc out, in; uint64_t bytes; int files; } rows[] = {
        { { 1, 2, 1, 1, 2 }, { 1, 1, 1, 1, 1 }, 1, 21 }, { { 1, 1, 1, 1, 1 }, { 1, 3, 1, 1, 1 }, 5000, 12 }, { { 1, 1, 1, 1, 4 }, { 2, 2, 1, 1, 1 }, 20000, 3 }, { { 1, 4, 1, 1, 1 }, { 1, 2, 1, 1, 2 }, 1 << 20, 0 },
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        llmpar_hf_desc as = { .max_file_bytes = rows[i].bytes };
        int files = 0;
        char to[600];
        llmpar_error error;
        snprintf(to, sizeof to, "%s", in_root("sharded"));
        job out = { .config = small(0), .mesh = rows[i].out, .load = trained(0), .save = to, .as = &as }, in = { .config = small(0), .mesh = rows[i].in, .load = to, .save = in_root("merged") };
        launch_ok(&out);
        CHECK_OK(llmpar_directory_list(NULL, to, is_shard, &files, &error));
        CHECK_INT(files, rows[i].files);
        launch_ok(&in);
        check_same_directory(trained(0), in.save);
    }
}

/* ---- what is read ---- */

/* The system's files, counting what a rank reads, and failing from byte `stop` on or not opening at all. */
typedef struct watch { int64_t bytes[8]; int64_t stop; int stop_rank, refuse_rank; } watch;
static watch watched;
static __thread int watching_rank;
static int watched_open(void *user, const char *path, llmpar_io_mode mode, int *handle)
{
    (void)user;
    return mode == LLMPAR_IO_READ && watched.refuse_rank == 1 + watching_rank ? EACCES : llmpar_io_system()->open(NULL, path, mode, handle);
}
static int watched_read(void *user, int handle, void *data, size_t bytes, uint64_t offset, size_t *got)
{
    (void)user;
    *got = 0;
    if (watched.stop_rank == 1 + watching_rank && watched.bytes[watching_rank] >= watched.stop) return 0; /* the file has become shorter */
    int number = llmpar_io_system()->read(NULL, handle, data, bytes, offset, got);
    watched.bytes[watching_rank] += (int64_t)*got;
    return number;
}
static const llmpar_io *watched_files(void)
{
    static llmpar_io io;
    memset(&watched, 0, sizeof watched);
    io = *llmpar_io_system();
    io.open = watched_open;
    io.read = watched_read;
    return &io;
}

/* What this rank holds, counted from its rectangles: elements of all and of the largest part; bytes of headers in the directory. */
static void holding(session *s, const char *directory, int64_t *all, int64_t *largest, int64_t *headers)
{
    *all = *largest = *headers = 0;
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(s->fsdp); u++)
        for (int32_t i = 0; i < llmpar_fsdp_unit(s->fsdp, u)->param_count; i++) {
            llmpar_dtensor tensor;
            llmpar_local local;
            llmpar_fsdp_dtensor(s->fsdp, u, i, &tensor);
            llmpar_dtensor_local(&tensor, s->mesh->degree, s->mesh->coordinate, &local);
            *all += local.flat_count;
            if (local.flat_count > *largest) *largest = local.flat_count;
        }
    llmpar_hf_files *files = NULL;
    llmpar_error error;
    llmpar_heap heap;
    llmpar_heap_init(&heap, NULL);
    CHECK_OK(llmpar_hf_files_open(&heap, NULL, directory, &files, &error));
    for (int32_t f = 0; files && f < files->count; f++) *headers += (int64_t)files->file[f]->source->bytes_read;
    llmpar_hf_files_close(files);
}

static int64_t file_bytes(const char *directory, const char *name)
{
    char path[700];
    struct stat st;
    snprintf(path, sizeof path, "%s/%s", directory, name);
    return stat(path, &st) ? 0 : (int64_t)st.st_size;
}

/* Every rank reads the headers and, to the byte, what it holds; and takes beside headers at most half a slice of the file and of the shard. */
static llmpar_status thrifty(session *s, const job *j)
{
    int64_t all, largest, headers, index = file_bytes(j->file, "model.safetensors.index.json");
    size_t size = j->as ? llmpar_dtype_size(j->as->dtype) : 4;
    llmpar_hf_files *files = NULL;
    watching_rank = s->ctx->rank;
    holding(s, j->file, &all, &largest, &headers);
    /* What opening alone takes at its peak (the JSON of a header), and then holds. */
    s->ctx->heap.peak = s->ctx->heap.live;
    llmpar_status status = llmpar_hf_files_open(&s->ctx->heap, NULL, j->file, &files, &s->ctx->error);
    uint64_t opening = s->ctx->heap.peak, held = s->ctx->heap.live;
    llmpar_hf_files_close(files);
    s->ctx->heap.peak = s->ctx->heap.live;
    watched.bytes[s->ctx->rank] = 0;
    if (!status) status = llmpar_load_hf(s->trainer, j->file);
    int64_t read = watched.bytes[s->ctx->rank], want = all * (int64_t)size + headers + index;
    if (read != want) TEST_FAIL("%s: rank %d read %lld bytes, want %lld", j->file, (int)s->ctx->rank, (long long)read, (long long)want);
    uint64_t slice = (uint64_t)largest * (size > 4 ? size : 4) + 1024, most = opening + 256 > held + slice ? opening + 256 : held + slice; /* and a stream */
    if (s->ctx->heap.peak > most) TEST_FAIL("%s: rank %d took up to %llu bytes, want %llu", j->file, (int)s->ctx->rank, (unsigned long long)s->ctx->heap.peak, (unsigned long long)most);
    return status;
}

TEST(reads_what_it_holds)
{
    static const struct { llmpar_mesh_desc mesh; int zero; } rows[] = { { { 1, 1, 1, 1, 1 }, 0 }, { { 1, 4, 1, 1, 1 }, 0 }, { { 1, 1, 1, 1, 4 }, 0 }, { { 1, 2, 1, 1, 2 }, 0 }, { { 1, 3, 1, 1, 2 }, 0 }, { { 2, 2, 1, 1, 2 }, 0 }, { { 1, 2, 1, 1, 2 }, LLMPAR_ZERO_1 } };
    static const llmpar_dtype types[] = { LLMPAR_F32, LLMPAR_BF16, LLMPAR_F64 };
    for (int f = 0; f < 7; f++) {
        llmpar_hf_desc as = { .max_file_bytes = f % 6 < 3 ? 0 : 9000, .dtype = types[f % 3] };
        llmpar_llama_config config = small(0);
        if (f == 6) config.vocab = 20000; /* slices are larger than headers */
        char from[600];
        snprintf(from, sizeof from, "%s", in_root("read"));
        job j = { .config = config, .load = f < 6 ? trained(0) : NULL, .save = from, .as = &as };
        launch_ok(&j);
        for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
            job in = { .config = config, .mesh = rows[i].mesh, .zero = rows[i].zero, .file = from, .as = &as, .io = watched_files(), .body = thrifty };
            launch_ok(&in);
        }
    }
}

/* ---- one rank that cannot read ---- */

static llmpar_status refuses_here(session *s, const job *j)
{
    watching_rank = s->ctx->rank;
    return refuses(s, j);
}
static llmpar_status breaks_off(session *s, const job *j)
{
    watching_rank = s->ctx->rank;
    llmpar_status status = llmpar_load_hf(s->trainer, j->save);
    if (!status) TEST_FAIL("rank %d has loaded it", (int)s->ctx->rank);
    return status;
}

/* It ends the job on every rank; as long as it is a header that fails, nothing has changed on any. A file that ends too early meanwhile fails a read and nothing else. */
TEST(one_rank_fails)
{
    for (int rank = 0; rank < 4; rank++) {
        llmpar_error error;
        job j = { .config = small(0), .mesh = { .dp_shard = 2, .tp = 2 }, .save = trained(0), .io = watched_files(), .body = refuses_here };
        watched.refuse_rank = 1 + rank;
        CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_IO);
        CHECK_INT(error.rank, rank);
        CHECK_TEXT(error.text, "cannot open");
        for (int64_t stop = 0; stop < 7000; stop += stop < 10 ? 8 : 1100) {
            j.io = watched_files();
            j.body = stop < 8 ? refuses_here : breaks_off;
            watched.stop_rank = 1 + rank;
            watched.stop = stop;
            CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_IO);
            CHECK_INT(error.rank, rank);
            CHECK_TEXT(error.text, "model.safetensors: ends at byte");
        }
    }
}

/* ---- no memory ---- */

static int starved_rank, starving, starved_ended;
static uint64_t starved_at;
static llmpar_status starves(session *s, const job *j)
{
    llmpar_hf_desc as = { .max_file_bytes = 9000, .dtype = LLMPAR_BF16 };
    llmpar_status status;
    if (s->ctx->rank == starved_rank) s->ctx->heap.fail_at = s->ctx->heap.calls + starved_at;
    if (starving) status = llmpar_hf_save(s->fsdp, &j->config, j->file, &as);
    else status = llmpar_load_hf(s->trainer, trained(0));
    if (s->ctx->rank == starved_rank) {
        CHECK(status == LLMPAR_OK || status == LLMPAR_ERR_MEMORY);
        starved_ended = !status;
        s->ctx->heap.fail_at = 0;
    }
    return status;
}

/* Any allocation that fails while a directory is loaded or saved ends the job, on every rank, with that error; nothing leaks, nothing hangs. */
TEST(out_of_memory)
{
    trained(0);
    for (starving = 0; starving < 2; starving++)
        for (starved_rank = 0; starved_rank < 2; starved_rank++)
            for (starved_at = 1, starved_ended = 0; !starved_ended && starved_at < 1000; starved_at += starved_at < 40 ? 1 : 5) {
                llmpar_error error;
                job j = { .config = small(0), .mesh = { .dp_shard = 2 }, .file = in_root("starved"), .body = starves };
                llmpar_status status = launch(&j, &error);
                CHECK_STATUS(status, starved_ended ? LLMPAR_OK : LLMPAR_ERR_MEMORY);
                if (!starved_ended) CHECK_INT(error.rank, starved_rank);
            }
}

/* ---- what is refused ---- */

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
    /* The same in shards, by the shard's name. */
    llmpar_hf_desc as = { .max_file_bytes = 9000 };
    job j = { .config = small(0), .load = rewritten(trained(0), "shape", LLMPAR_F32, AS_IS, NULL), .save = in_root("split"), .as = &as };
    launch_ok(&j);
    check_refused(j.save, 1, LLMPAR_ERR_FORMAT, "lm_head.weight", "-of-0000");
    /* Cut off in the middle. */
    const char *cut = rewritten(trained(0), "cut", LLMPAR_F32, AS_IS, NULL);
    char path[700];
    snprintf(path, sizeof path, "%s/model.safetensors", cut);
    struct stat st;
    CHECK(stat(path, &st) == 0 && truncate(path, st.st_size - 100) == 0);
    check_refused(cut, 0, LLMPAR_ERR_FORMAT, "model.safetensors", "");
}

/* What older files have beside the parameters: the head of a tied model, if it is the embedding, and a buffer of each layer. */
static llmpar_status loads(session *s, const job *j) { return llmpar_load_hf(s->trainer, j->file); }
TEST(what_may_be_there_twice)
{
    static const struct { const char *name; int tied; const char *says; } rows[] = {
        { "model.layers.1.self_attn.rotary_emb.inv_freq", 0, NULL },
        { "model.layers.31.self_attn.rotary_emb.inv_freq", 1, NULL },
        { "model.layers..self_attn.rotary_emb.inv_freq", 0, "not part of this model" },
        { "model.layers.1x.self_attn.rotary_emb.inv_freq", 0, "not part of this model" },
        { "model.layers.1.self_attn.rotary_emb.inv_freq2", 0, "not part of this model" },
        { "model.rotary_emb.inv_freq", 0, "not part of this model" },
        { "model.layers.1.self_attn.q_proj.bias", 1, "not part of this model" },
        { "lm_head.bias", 1, "not part of this model" },
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        const char *directory = rewritten(trained(rows[i].tied), "twice", LLMPAR_F32, EXTRA, rows[i].name);
        job j = { .config = small(rows[i].tied), .mesh = { .dp_shard = 2, .tp = 2 }, .load = directory, .save = in_root("once") };
        if (rows[i].says) {
            check_refused(directory, rows[i].tied, LLMPAR_ERR_FORMAT, rows[i].name, rows[i].says);
            continue;
        }
        launch_ok(&j);
        check_same_directory(trained(rows[i].tied), j.save);
    }
    static const llmpar_mesh_desc meshes[] = { { 1, 1, 1, 1, 1 }, { 1, 2, 1, 1, 2 }, { 1, 1, 1, 1, 4 } };
    for (int i = 0; i < 3; i++) {
        llmpar_error error;
        job j = { .config = small(1), .mesh = meshes[i], .load = rewritten(trained(1), "head", LLMPAR_F32, SECOND_HEAD, "lm_head.weight"), .save = in_root("once") };
        launch_ok(&j);
        check_same_directory(trained(1), j.save);
        j.load = NULL, j.body = loads;
        for (int64_t at = 0; at < 41 * 24; at += 41 * 24 / 5) { /* one element differs: the rank that holds it says so */
            j.file = rewritten(trained(1), "other head", LLMPAR_F32, SECOND_HEAD, "lm_head.weight");
            char path[700];
            snprintf(path, sizeof path, "%s/model.safetensors", j.file);
            struct stat st;
            int fd = open(path, O_RDWR);
            CHECK(fd >= 0 && fstat(fd, &st) == 0 && pwrite(fd, "\1", 1, st.st_size - 4 * (41 * 24 - at)) == 1 && close(fd) == 0);
            CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_FORMAT);
            CHECK_TEXT(error.text, "lm_head.weight differs from model.embed_tokens.weight");
        }
    }
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

/* A unit that is not there, and fewer units than none. */
static llmpar_status no_such_unit(session *s, const job *j)
{
    llmpar_tensor_file *file = NULL;
    int32_t units[2] = { 0, llmpar_fsdp_unit_count(s->fsdp) };
    llmpar_status status = llmpar_tensor_file_open(s->fsdp, j->file, units, j->save ? -1 : 2, &file);
    CHECK(!file);
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
    j.body = no_such_unit;
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_ARGUMENT);
    CHECK(strstr(error.text, "tensors.safetensors: unit 4, expected 0 to 3"));
    j.save = "fewer than none";
    CHECK_STATUS(launch(&j, &error), LLMPAR_ERR_ARGUMENT);
    CHECK(strstr(error.text, "tensors.safetensors: -1 units"));
    j.save = NULL;
    j.body = too_early;
    CHECK(launch(&j, &error) != LLMPAR_OK);
    CHECK(!llmpar_is_file(path));
    j.body = tensor_files;
    launch_ok(&j);
    check_same_file(path, weights); /* parameters as a file of tensors are the model's own file */
}

TEST_LIST(T_(any_mesh_saves_the_same_bytes), T_(contents), T_(saving_takes_one_tensor), T_(other_dtypes), T_(a_model_from_elsewhere), T_(sixteen_bits), T_(sharded_directories), T_(reads_what_it_holds), T_(one_rank_fails), T_(out_of_memory), T_(strict_loading), T_(what_may_be_there_twice), T_(saving_fails), T_(tensor_file))
