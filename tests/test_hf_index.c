/* The files of a Hugging Face directory: what an index may say, shards that do not fit it, and writing that fails or dies at any call. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#include "hf_model.h"
#include <errno.h>

static llmpar_heap heap;
static llmpar_error err;
static llmpar_heap *ready(void)
{
    if (!heap.allocator.alloc) llmpar_heap_init(&heap, NULL);
    llmpar_error_clear(&err);
    return &heap;
}

/* The system's files, never synced: no power is lost here, and a disk is slow. */
static int no_sync(void *user, int handle)
{
    (void)user, (void)handle;
    return 0;
}
static const llmpar_io *quick(void)
{
    static llmpar_io io;
    io = *llmpar_io_system();
    io.sync = no_sync;
    return &io;
}

/* ---- the index as a text ---- */

static const struct { const char *text, *says; } bad[] = {
    { "", "byte 0" },
    { "[]", "expected an object with an object weight_map" },
    { "{}", "expected an object with an object weight_map" },
    { "{\"weight_map\":[]}", "expected an object with an object weight_map" },
    { "{\"weight_map\":{}}", "expected an object with an object weight_map" },
    { "{\"weight_map\":{\"a\":\"f\"}", "byte 23" },
    { "{\"weight_map\":{\"a\":\"f\"},\"weights\":1}", "unknown field \"weights\"" },
    { "{\"weight_map\":{\"a\":\"f\"},\"weight_map\":{\"a\":\"f\"}}", "expected every member name once, got \"weight_map\" again" },
    { "{\"weight_map\":{\"a\":\"f\",\"a\":\"f\"}}", "expected every member name once, got \"a\" again" },
    { "{\"weight_map\":{\"a\":\"f\",\"\\u0061\":\"g\"}}", "expected every member name once, got \"a\" again" },
    { "{\"weights\":1,\"weight_map\":{\"a\":\"f\"}}", "unknown field \"weights\"" },
    { "{\"weight_map\":{\"a\":1,\"b\":\"f\"}}", "tensor \"a\": expected the name of a file (byte 19)" },
    { "{\"weight_map\":{\"a\":1}}", "tensor \"a\": expected the name of a file (byte 19)" },
    { "{\"weight_map\":{\"a\":null}}", "tensor \"a\": expected the name of a file" },
    { "{\"weight_map\":{\"a\\u0000b\":\"f\"}}", "the name holds a NUL byte" },
    { "{\"weight_map\":{\"a\":\"\"}}", "tensor \"a\" in file \"\": expected the name of a file in this directory" },
    { "{\"weight_map\":{\"a\":\".\"}}", "in file \".\": expected the name" },
    { "{\"weight_map\":{\"a\":\"..\"}}", "in file \"..\": expected the name" },
    { "{\"weight_map\":{\"a\":\"../f\"}}", "in file \"../f\": expected the name" },
    { "{\"weight_map\":{\"a\":\"f..g\"}}", "in file \"f..g\": expected the name" },
    { "{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "in file \"/etc/passwd\": expected the name" },
    { "{\"weight_map\":{\"a\":\"d/f\"}}", "in file \"d/f\": expected the name" },
    { "{\"weight_map\":{\"a\":\"d\\\\f\"}}", "in file \"d\\f\": expected the name" },
    { "{\"weight_map\":{\"a\":\"f\\u0000/g\"}}", "in file \"f\": expected the name" },
    { "{\"metadata\":[],\"weight_map\":{\"a\":\"f\"}}", "metadata: expected an object" },
    { "{\"metadata\":{\"total_size\":\"8\"},\"weight_map\":{\"a\":\"f\"}}", "metadata.total_size: expected a number of bytes (byte 26)" },
    { "{\"metadata\":{\"total_size\":-8},\"weight_map\":{\"a\":\"f\"}}", "metadata.total_size: expected a number of bytes" },
    { "{\"metadata\":{\"total_size\":8.5},\"weight_map\":{\"a\":\"f\"}}", "metadata.total_size: expected a number of bytes" },
    { "{\"metadata\":{\"total_size\":18446744073709551616},\"weight_map\":{\"a\":\"f\"}}", "metadata.total_size: expected a number of bytes" },
    { "{\"metadata\":{\"total_size\":1e300},\"weight_map\":{\"a\":\"f\"}}", "metadata.total_size: expected a number of bytes" },
    { "{\"metadata\":{\"total_size\":1,\"total_size\":1},\"weight_map\":{\"a\":\"f\"}}", "expected every member name once" },
};

TEST(bad_indices)
{
    char longest[400], text[500];
    llmpar_hf_index index;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        size_t n = strlen(bad[i].text);
        char *copy = (char *)malloc(n ? n : 1); /* exact size: the address sanitizer sees a read beyond it */
        memcpy(copy, bad[i].text, n);
        llmpar_status status = llmpar_hf_index_parse(ready(), copy, n, "the index", &index, &err);
        if (status != LLMPAR_ERR_FORMAT || !strstr(err.text, "the index: ") || !strstr(err.text, bad[i].says)) TEST_FAIL("%s: got %s \"%s\", want \"%s\"", bad[i].text, llmpar_status_string(status), err.text, bad[i].says);
        CHECK(!index.json && !index.count && !index.file);
        free(copy);
    }
    memset(longest, 'x', sizeof longest);
    longest[256] = 0;
    snprintf(text, sizeof text, "{\"weight_map\":{\"a\":\"%s\"}}", longest);
    CHECK_STATUS(llmpar_hf_index_parse(ready(), text, strlen(text), "x", &index, &err), LLMPAR_ERR_FORMAT);
    CHECK_INT(heap.live, 0);
}

/* Every prefix of a good index is refused, and no allocation that fails leaves anything behind. */
TEST(good_indices)
{
    static const char text[] = " {\"metadata\": {\"total_size\": 24.0, \"total_parameters\": 6, \"by\": [\"a tool\"]}, \"weight_map\": {\"c\": \"one\", \"a\": \"two.x\", \"b\": \"one\", \"\": \"three\"}} ";
    llmpar_hf_index index;
    CHECK_OK(llmpar_hf_index_parse(ready(), text, sizeof text - 1, "x", &index, &err));
    CHECK_INT(index.total_size, 24);
    CHECK_INT(index.count, 4);
    CHECK_INT(index.files, 3);
    CHECK(!strcmp(index.file[0], "one") && !strcmp(index.file[1], "two.x") && !strcmp(index.file[2], "three") && !strcmp(index.tensor[1], "a") && !strcmp(index.tensor[3], ""));
    CHECK(index.place[0] == 0 && index.place[1] == 1 && index.place[2] == 0 && index.place[3] == 2);
    llmpar_hf_index_free(&heap, &index);
    for (size_t cut = 0; cut + 2 < sizeof text - 1; cut++) CHECK(llmpar_hf_index_parse(ready(), text, cut, "x", &index, &err) == LLMPAR_ERR_FORMAT);
    CHECK_INT(heap.live, 0);
    for (uint64_t fail = 1;; fail++) {
        llmpar_heap h;
        llmpar_heap_init(&h, NULL);
        h.fail_at = fail;
        ready();
        llmpar_status status = llmpar_hf_index_parse(&h, text, sizeof text - 1, "x", &index, &err);
        if (!status) llmpar_hf_index_free(&h, &index);
        CHECK_INT(h.live, 0);
        if (!status) break;
        CHECK_STATUS(status, LLMPAR_ERR_MEMORY);
    }
    CHECK_OK(llmpar_hf_index_parse(ready(), "{\"weight_map\":{\"a\":\"f\"}}", 24, "x", &index, &err));
    CHECK_INT(index.total_size, -1);
    llmpar_hf_index_free(&heap, &index);
    CHECK_INT(heap.live, 0);
}

/* As many files as there may be, and one more. */
TEST(many_files)
{
    char *text = (char *)malloc(40 * (LLMPAR_HF_MAX_FILES + 2));
    llmpar_hf_index index;
    for (int most = LLMPAR_HF_MAX_FILES; most <= LLMPAR_HF_MAX_FILES + 1; most++) {
        size_t n = (size_t)sprintf(text, "{\"weight_map\":{");
        for (int i = 0; i < most; i++) n += (size_t)sprintf(text + n, "%s\"t%d\":\"f%d\"", i ? "," : "", i, i);
        n += (size_t)sprintf(text + n, "}}");
        CHECK_STATUS(llmpar_hf_index_parse(ready(), text, n, "x", &index, &err), most > LLMPAR_HF_MAX_FILES ? LLMPAR_ERR_UNSUPPORTED : LLMPAR_OK);
        if (most > LLMPAR_HF_MAX_FILES) CHECK_TEXT(err.text, "file \"f1024\" is one more than the 1024");
        llmpar_hf_index_free(&heap, &index);
    }
    CHECK_INT(heap.live, 0);
    free(text);
}

/* ---- shards and what the index says of them ---- */

/* DIR/name with f32 tensors of two elements each, named by the letters. */
static void put_shard(const char *directory, const char *name, const char *letters)
{
    char path[700], names[8][2];
    llmpar_safetensor tensors[8];
    llmpar_safetensors_writer *writer = NULL;
    int32_t n = (int32_t)strlen(letters);
    memset(tensors, 0, sizeof tensors);
    for (int32_t i = 0; i < n; i++) {
        names[i][0] = letters[i], names[i][1] = 0;
        tensors[i].name = names[i];
        tensors[i].dtype = LLMPAR_F32;
        tensors[i].dims = 1;
        tensors[i].shape[0] = 2;
    }
    snprintf(path, sizeof path, "%s/%s", directory, name);
    CHECK_OK(llmpar_safetensors_writer_open(ready(), quick(), path, tensors, n, &writer, &err));
    for (int32_t i = 0; i < n; i++) {
        float values[2] = { (float)letters[i], (float)i };
        CHECK_OK(llmpar_safetensors_writer_write(writer, values, 8, &err));
    }
    CHECK_OK(llmpar_safetensors_writer_commit(writer, &err));
}

static void put_index(const char *directory, const char *text)
{
    char path[700];
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", directory);
    write_bytes(path, text, strlen(text));
}

#define GOOD_MAP "\"weight_map\":{\"a\":\"x\",\"b\":\"x\",\"c\":\"y\"}}"

TEST(shards_and_index)
{
    static const struct { const char *index, *x, *y; llmpar_status status; const char *says, *more; } rows[] = {
        { "{" GOOD_MAP, "ab", "c", LLMPAR_OK, "", "" },
        { "{\"metadata\":{\"total_size\":24}," GOOD_MAP, "ab", "c", LLMPAR_OK, "", "" },
        { "{\"metadata\":{}," GOOD_MAP, "ab", "c", LLMPAR_OK, "", "" },
        { "{\"metadata\":{\"total_size\":28}," GOOD_MAP, "ab", "c", LLMPAR_ERR_FORMAT, "metadata.total_size is 28, but the tensors have 24 bytes", "index.json" },
        { "{" GOOD_MAP, "a", "c", LLMPAR_ERR_FORMAT, "tensor b is said to be in x, which does not have it", "index.json" },
        { "{" GOOD_MAP, "a", "bc", LLMPAR_ERR_FORMAT, "tensor b is said to be in x, which does not have it", "index.json" },
        { "{" GOOD_MAP, "abd", "c", LLMPAR_ERR_FORMAT, "tensor d is in x and not in the index", "index.json" },
        { "{" GOOD_MAP, "ab", "cd", LLMPAR_ERR_FORMAT, "tensor d is in y and not in the index", "index.json" },
        { "{" GOOD_MAP, "ab", "bc", LLMPAR_ERR_FORMAT, "tensor b is in x and in y, expected once", "index.json" },
        { "{" GOOD_MAP, "abc", "c", LLMPAR_ERR_FORMAT, "tensor c is in y and in x, expected once", "index.json" },
        { "{" GOOD_MAP, "ab", NULL, LLMPAR_ERR_IO, "/y: cannot open", "" },
        { "{" GOOD_MAP, "ab", "", LLMPAR_ERR_FORMAT, "tensor c is said to be in y, which does not have it", "index.json" },
        { "{\"weight_map\":{\"a\":\"x\",\"b\":\"x\",\"c\":\"folder\"}}", "ab", "c", LLMPAR_ERR_IO, "folder: expected a regular file, got a directory", "" },
        { "{\"weight_map\":{\"a\":\"x\",\"b\":\"x\",\"c\":\"model.safetensors.index.json\"}}", "ab", "c", LLMPAR_ERR_FORMAT, "model.safetensors.index.json: the header length is", "" },
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        char directory[600], path[700];
        llmpar_hf_files *files = NULL;
        snprintf(directory, sizeof directory, "%s", in_root("shards"));
        CHECK_OK(llmpar_directory_ensure(NULL, directory, &err));
        snprintf(path, sizeof path, "%s/folder", directory);
        mkdir(path, 0777);
        put_index(directory, rows[i].index);
        put_shard(directory, "x", rows[i].x);
        snprintf(path, sizeof path, "%s/y", directory);
        if (rows[i].y) put_shard(directory, "y", rows[i].y);
        else CHECK(unlink(path) == 0);
        llmpar_status status = llmpar_hf_files_open(ready(), NULL, directory, &files, &err);
        if (status != rows[i].status || !strstr(err.text, rows[i].says) || !strstr(err.text, rows[i].more)) TEST_FAIL("row %d: got %s \"%s\", want %s \"%s\"", (int)i, llmpar_status_string(status), err.text, llmpar_status_string(rows[i].status), rows[i].says);
        CHECK(!status == (files != NULL));
        if (files) {
            const llmpar_safetensors *file = NULL;
            const llmpar_safetensor *c = llmpar_hf_files_find(files, "c", &file);
            float values[2] = { 0, 0 };
            CHECK_INT(files->count, 2);
            CHECK_INT(files->tensors, 3);
            CHECK(c && !llmpar_hf_files_find(files, "d", &file) && llmpar_hf_files_find(files, "a", &file));
            c = llmpar_hf_files_find(files, "c", &file);
            CHECK_OK(llmpar_safetensors_read(file, c, 0, 8, values, &err));
            CHECK(values[0] == 'c' && values[1] == 0);
        }
        llmpar_hf_files_close(files);
        CHECK_INT(heap.live, 0);
    }
}

/* A directory with both is the single file's, and one with neither says which is missed. */
TEST(single_file_first)
{
    char directory[600], path[700];
    llmpar_hf_files *files = NULL;
    snprintf(directory, sizeof directory, "%s", in_root("both"));
    CHECK_OK(llmpar_directory_ensure(NULL, directory, &err));
    CHECK_STATUS(llmpar_hf_files_open(ready(), NULL, directory, &files, &err), LLMPAR_ERR_IO);
    CHECK_TEXT(err.text, "both/model.safetensors: cannot open");
    put_index(directory, "not JSON");
    put_shard(directory, "model.safetensors", "qr");
    CHECK_OK(llmpar_hf_files_open(ready(), NULL, directory, &files, &err));
    CHECK(files && files->tensors == 2 && strstr(files->path, "both/model.safetensors"));
    llmpar_hf_files_close(files);
    llmpar_hf_files_close(NULL);
    snprintf(path, sizeof path, "%s/model.safetensors", directory);
    CHECK(unlink(path) == 0);
    CHECK_STATUS(llmpar_hf_files_open(ready(), NULL, directory, &files, &err), LLMPAR_ERR_FORMAT);
    CHECK_TEXT(err.text, "index.json: byte 0");
    CHECK_INT(heap.live, 0);
    for (int shards = 0; shards < 2; shards++) { /* no memory */
        if (shards) put_shard(directory, "x", "ab"), put_shard(directory, "y", "c"), put_index(directory, "{" GOOD_MAP);
        else put_shard(directory, "model.safetensors", "abc");
        for (uint64_t fail = 1;; fail++) {
            llmpar_heap h;
            llmpar_heap_init(&h, NULL);
            h.fail_at = fail;
            llmpar_status status = (ready(), llmpar_hf_files_open(&h, NULL, directory, &files, &err));
            CHECK(!status == (files != NULL));
            llmpar_hf_files_close(files);
            CHECK_INT(h.live, 0);
            if (!status) break;
            CHECK_STATUS(status, LLMPAR_ERR_MEMORY);
        }
        if (!shards) CHECK(unlink(path) == 0);
    }
}

/* ---- writing ---- */

enum { TENSORS = 6 };
static const int64_t elements[TENSORS] = { 10, 0, 30, 5, 5, 0 };

/* A directory in which every element is `value`. */
static llmpar_status put_model(llmpar_heap *h, const llmpar_io *io, const char *directory, uint64_t max_bytes, float value)
{
    static const char *const names[TENSORS] = { "e", "none", "big", "quote\"d", "b", "zero" };
    llmpar_safetensor tensors[TENSORS];
    llmpar_hf_writer *writer = NULL;
    float values[50];
    char config[40];
    memset(tensors, 0, sizeof tensors);
    for (int i = 0; i < TENSORS; i++) {
        tensors[i].name = names[i];
        tensors[i].dtype = LLMPAR_F32;
        tensors[i].dims = 1;
        tensors[i].shape[0] = elements[i];
    }
    for (int i = 0; i < 50; i++) values[i] = value;
    snprintf(config, sizeof config, "{\"model\": %g}\n", (double)value);
    llmpar_status status = llmpar_hf_writer_open(h, io, directory, tensors, TENSORS, max_bytes, config, &writer, &err);
    for (int at = 0, part = 1; at < 200 && !status; at += part, part = part * 3 % 47 + 1) {
        if (part > 200 - at) part = 200 - at;
        status = llmpar_hf_writer_write(writer, (char *)values + at, (size_t)part, &err);
    }
    if (!status) return llmpar_hf_writer_commit(writer, &err);
    llmpar_hf_writer_abandon(writer);
    return status;
}

/* The value of the model in the directory; -1: refused; -2: a mixture. *files: how many. */
static float model_value(const char *directory, int32_t *count)
{
    llmpar_hf_files *files = NULL;
    llmpar_error why;
    float value = -1, got[30];
    int tensors = 0;
    llmpar_error_clear(&why);
    *count = 0;
    if (llmpar_hf_files_open(ready(), NULL, directory, &files, &why)) return -1;
    for (int32_t f = 0; f < files->count; f++)
        for (int32_t t = 0; t < files->file[f]->count; t++, tensors++) {
            const llmpar_safetensor *tensor = &files->file[f]->tensor[t];
            CHECK_OK(llmpar_safetensors_read(files->file[f], tensor, 0, tensor->bytes, got, &why));
            for (size_t i = 0; i < tensor->bytes / 4; i++) {
                if (value == -1) value = got[i];
                else if (value != got[i]) value = -2;
            }
        }
    *count = files->count;
    llmpar_hf_files_close(files);
    return tensors == TENSORS ? value : -2;
}

static int count_entry(void *user, const char *name)
{
    (void)name;
    ++*(int *)user;
    return 0;
}
static int entries(const char *directory)
{
    int count = 0;
    CHECK_OK(llmpar_directory_list(NULL, directory, count_entry, &count, &err));
    return count;
}

/* Files of every size, each in place of another: what is loaded is the last, and nothing of the ones before is left. */
TEST(one_after_the_other)
{
    /* bytes 40 0 120 20 20 0 */
    static const struct { uint64_t max; int files; } rows[] = { { 0, 1 }, { 1, 6 }, { 40, 3 }, { 39, 5 }, { 159, 3 }, { 160, 2 }, { 200, 1 }, { 199, 2 }, { 120, 3 }, { 1000, 1 }, { 160, 2 }, { 1, 6 }, { 0, 1 } };
    char directory[600], path[700];
    snprintf(directory, sizeof directory, "%s", in_root("sizes"));
    float value = 1;
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++, value++) {
        int32_t files;
        CHECK_OK(put_model(ready(), quick(), directory, rows[i].max, value));
        CHECK_INT(heap.live, 0);
        CHECK(model_value(directory, &files) == value);
        if (files != rows[i].files) TEST_FAIL("at most %d bytes: %d files, want %d", (int)rows[i].max, (int)files, rows[i].files);
        CHECK_INT(entries(directory), files + 1 + (files > 1));
    }
    /* What only looks a little like it stays; what a crash has left goes. */
    static const char *const others[] = { "model-00001-of-00002.safetensors.bak", "model-0001-of-00002.safetensors", "xmodel-00001-of-00002.safetensors", "model-00001-of-00002.bin", "notes", "model-0000a-of-00002.safetensors" };
    static const char *const stale[] = { "model-00001-of-00002.safetensors", "model-00000-of-00003.safetensors", "model-00004-of-00003.safetensors", "model-99999-of-00000.safetensors", "model-00003-of-00004.safetensors.part", "model-00003-of-00004.safetensors.part.tmp" };
    for (size_t i = 0; i < 6; i++) snprintf(path, sizeof path, "%s/%s", directory, others[i]), write_bytes(path, "x", 1);
    for (size_t i = 0; i < sizeof stale / sizeof stale[0]; i++) snprintf(path, sizeof path, "%s/%s", directory, stale[i]), write_bytes(path, "x", 1);
    CHECK_OK(put_model(ready(), quick(), directory, 40, 50));
    CHECK_INT(entries(directory), 3 + 2 + 6);
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", directory);
    size_t bytes;
    char *text = read_bytes(path, &bytes);
    static const char want[] = "{\n  \"metadata\": {\n    \"total_size\": 200\n  },\n  \"weight_map\": {\n    \"e\": \"model-00001-of-00003.safetensors\",\n    \"none\": \"model-00001-of-00003.safetensors\",\n    \"big\": \"model-00002-of-00003.safetensors\",\n"
                               "    \"quote\\\"d\": \"model-00003-of-00003.safetensors\",\n    \"b\": \"model-00003-of-00003.safetensors\",\n    \"zero\": \"model-00003-of-00003.safetensors\"\n  }\n}\n";
    if (bytes != sizeof want - 1 || memcmp(text, want, bytes)) TEST_FAIL("%s: %s", path, text);
    free(text);
}

TEST(writer_refuses)
{
    llmpar_safetensor tensors[2];
    llmpar_hf_writer *writer = NULL;
    const char *directory = in_root("refusing");
    memset(tensors, 0, sizeof tensors);
    tensors[0].name = tensors[1].name = "a";
    tensors[0].dtype = tensors[1].dtype = LLMPAR_F32;
    CHECK_STATUS(llmpar_hf_writer_open(ready(), quick(), directory, tensors, 2, 4, NULL, &writer, &err), LLMPAR_ERR_ARGUMENT); /* in two files, but twice all the same */
    CHECK_TEXT(err.text, "tensor \"a\" is declared twice");
    CHECK(!writer && !llmpar_is_directory(directory));
    llmpar_safetensor *many = (llmpar_safetensor *)calloc(LLMPAR_HF_MAX_FILES + 1, sizeof *many);
    char (*names)[16] = (char (*)[16])calloc(LLMPAR_HF_MAX_FILES + 1, 16);
    for (int i = 0; i <= LLMPAR_HF_MAX_FILES; i++) {
        snprintf(names[i], 16, "t%d", i);
        many[i].name = names[i];
        many[i].dtype = LLMPAR_U8;
    }
    CHECK_STATUS(llmpar_hf_writer_open(ready(), quick(), directory, many, LLMPAR_HF_MAX_FILES + 1, 1, NULL, &writer, &err), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(err.text, "files of 1 bytes are more than 1024");
    free(many), free(names);
    /* Too many bytes, and too few: nothing is published. */
    tensors[1].name = "b";
    for (uint64_t max = 0; max <= 4; max += 4) {
        CHECK_OK(llmpar_hf_writer_open(ready(), quick(), directory, tensors, 2, max, NULL, &writer, &err));
        CHECK_STATUS(llmpar_hf_writer_write(writer, "123456789", 9, &err), LLMPAR_ERR_ARGUMENT);
        CHECK_TEXT(err.text, "too many");
        llmpar_hf_writer_abandon(writer);
        CHECK_OK(llmpar_hf_writer_open(ready(), quick(), directory, tensors, 2, max, NULL, &writer, &err));
        CHECK_OK(llmpar_hf_writer_write(writer, "1234567", 7, &err));
        CHECK_STATUS(llmpar_hf_writer_commit(writer, &err), LLMPAR_ERR_ARGUMENT);
        CHECK_TEXT(err.text, "bytes of data were written, expected");
        CHECK_OK(llmpar_hf_writer_open(ready(), quick(), directory, tensors, 2, max, NULL, &writer, &err));
        CHECK_STATUS(llmpar_hf_writer_commit(writer, &err), LLMPAR_ERR_ARGUMENT);
        CHECK_INT(entries(directory), 0);
    }
    llmpar_hf_writer_abandon(NULL);
    CHECK_INT(heap.live, 0);
    for (uint64_t fail = 1;; fail++) { /* no memory */
        llmpar_heap h;
        int32_t files;
        llmpar_heap_init(&h, NULL);
        h.fail_at = fail;
        llmpar_status status = put_model(&h, quick(), directory, 40, 7);
        CHECK_INT(h.live, 0);
        if (!status) break;
        CHECK_STATUS(status, LLMPAR_ERR_MEMORY);
        CHECK(model_value(directory, &files) != -2);
        ready();
    }
}

/* ---- writing that fails ---- */

/* The system's files, but the call `at` that changes something fails, or it and everything after it, as in a process that was killed. */
typedef struct broken { const llmpar_io *io; int at, calls, dead; } broken;
static int fails(void *user)
{
    broken *b = (broken *)user;
    b->calls++;
    return b->at && (b->calls == b->at || (b->dead && b->calls > b->at));
}
static int broken_open(void *u, const char *path, llmpar_io_mode mode, int *handle) { return mode != LLMPAR_IO_READ && fails(u) ? ENOSPC : ((broken *)u)->io->open(NULL, path, mode, handle); }
static int broken_close(void *u, int handle) { int number = ((broken *)u)->io->close(NULL, handle); return fails(u) ? EIO : number; }
static int broken_write(void *u, int handle, const void *data, size_t bytes, size_t *written) { *written = 0; return fails(u) ? ENOSPC : ((broken *)u)->io->write(NULL, handle, data, bytes, written); }
static int broken_sync(void *u, int handle) { (void)handle; return fails(u) ? EIO : 0; }
static int broken_rename(void *u, const char *from, const char *to) { return fails(u) ? EIO : ((broken *)u)->io->rename(NULL, from, to); }
static int broken_remove(void *u, const char *path) { return fails(u) ? EIO : ((broken *)u)->io->remove(NULL, path); }
static int broken_list(void *u, const char *path, int (*entry)(void *entry_user, const char *name), void *entry_user) { return fails(u) ? EIO : ((broken *)u)->io->list(NULL, path, entry, entry_user); }

static llmpar_io broken_files(broken *b, int at, int dead)
{
    llmpar_io io = *llmpar_io_system();
    b->io = llmpar_io_system();
    b->at = at, b->calls = 0, b->dead = dead;
    io.user = b;
    io.open = broken_open, io.close = broken_close, io.write = broken_write, io.sync = broken_sync, io.rename = broken_rename, io.remove = broken_remove, io.list = broken_list;
    return io;
}

/* Whatever is written over whatever, and wherever that stops: the directory is the old model, the new one or refused, never a mixture, and the next save works. */
TEST(fails_anywhere)
{
    static const uint64_t sizes[][2] = { { 0, 0 }, { 0, 40 }, { 40, 0 }, { 40, 40 }, { 160, 40 } };
    char directory[600];
    int done = 0, old_left = 0, refused = 0, finished = 0;
    snprintf(directory, sizeof directory, "%s", in_root("fails"));
    for (int row = 0; row < 10; row++) {
        uint64_t before = sizes[row / 2][0], after = sizes[row / 2][1];
        for (int at = 1, ended = 0; !ended; at++) {
            broken b;
            llmpar_io io = broken_files(&b, 0, 0);
            int32_t files;
            CHECK_OK(put_model(ready(), &io, directory, before, 1));
            io = broken_files(&b, at, row % 2);
            llmpar_status status = put_model(ready(), &io, directory, after, 2);
            ended = b.calls < at;
            CHECK_INT(heap.live, 0);
            float value = model_value(directory, &files);
            if (value != 1 && value != 2 && value != -1) TEST_FAIL("%d bytes over %d, call %d: a mixture", (int)after, (int)before, at);
            if (value == -1 && after == 0) TEST_FAIL("one file over %d bytes, call %d: nothing is loaded", (int)before, at);
            if (!status && value != 2) TEST_FAIL("%d bytes over %d, call %d: saved without an error, but %g is there", (int)after, (int)before, at, (double)value);
            if (ended) CHECK_OK(status);
            old_left += value == 1, refused += value == -1, finished += value == 2, done++;
        }
        broken b;
        llmpar_io io = broken_files(&b, 0, 0);
        CHECK_OK(put_model(ready(), &io, directory, after, 3));
        int32_t files;
        CHECK(model_value(directory, &files) == 3);
        CHECK_INT(entries(directory), files + 1 + (files > 1));
    }
    CHECK(done > 150 && old_left > 50 && refused > 10 && finished > 10);
}

/* The first of two files cannot be ended: neither more bytes nor the end are taken after that. */
TEST(a_writer_that_has_failed)
{
    const char *directory = in_root("failed");
    for (int end = 0; end < 2; end++) {
        broken b;
        llmpar_io io = broken_files(&b, 0, 0);
        llmpar_safetensor tensors[2];
        llmpar_hf_writer *writer = NULL;
        memset(tensors, 0, sizeof tensors);
        tensors[0].name = "a", tensors[1].name = "b";
        tensors[0].dtype = tensors[1].dtype = LLMPAR_F32;
        CHECK_OK(llmpar_hf_writer_open(ready(), &io, directory, tensors, 2, 4, NULL, &writer, &err));
        CHECK_OK(llmpar_hf_writer_write(writer, "1234", 4, &err));
        b.at = b.calls + 1;
        CHECK_STATUS(llmpar_hf_writer_write(writer, "5678", 4, &err), LLMPAR_ERR_IO);
        b.at = 0;
        ready();
        CHECK_STATUS(end ? llmpar_hf_writer_commit(writer, &err) : llmpar_hf_writer_write(writer, "5678", 4, &err), LLMPAR_ERR_IO);
        CHECK_TEXT(err.text, "an earlier write failed");
        if (!end) llmpar_hf_writer_abandon(writer);
        CHECK_INT(entries(directory), 0);
        CHECK_INT(heap.live, 0);
    }
}

TEST(no_tensors)
{
    const char *directory = in_root("nothing");
    llmpar_hf_writer *writer = NULL;
    CHECK_OK(llmpar_hf_writer_open(ready(), quick(), directory, NULL, 0, 0, NULL, &writer, &err));
    CHECK_OK(llmpar_hf_writer_commit(writer, &err));
    CHECK_INT(entries(directory), 1);
    CHECK_INT(heap.live, 0);
}

TEST_LIST(T_(bad_indices), T_(good_indices), T_(many_files), T_(shards_and_index), T_(single_file_first), T_(one_after_the_other), T_(writer_refuses), T_(fails_anywhere), T_(a_writer_that_has_failed), T_(no_tensors))
