/* llama2.c model files: what a header and a size may not be, the order of the rows of q and k, and a real one beside its Hugging Face twin. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#include "hf_model.h"
#include "../examples/common/llama2c.h"
#include <limits.h>

static llmpar_heap heap;
static llmpar_error err;
static llmpar_heap *ready(void)
{
    if (!heap.allocator.alloc) llmpar_heap_init(&heap, NULL);
    llmpar_error_clear(&err);
    return &heap;
}

enum { DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, SEQ, FIELDS };
static const int32_t good[FIELDS] = { 12, 20, 2, 3, 1, 7, 5 };

/* Floats behind the header, from llama2.c's memory_map_weights. */
static int64_t floats(const int32_t *h)
{
    int64_t d = h[DIM], f = h[HIDDEN], l = h[LAYERS], e = d / h[HEADS], kv = h[KV_HEADS] * e, v = h[VOCAB] < 0 ? -(int64_t)h[VOCAB] : h[VOCAB];
    return v * d + l * d + l * d * d + 2 * l * d * kv + l * d * d + l * d + 3 * l * d * f + d + h[SEQ] * e + (h[VOCAB] < 0 ? v * d : 0);
}

/* A file of this header and so many floats, each its own number. */
static const char *put(const int32_t *header, int64_t count, int64_t more)
{
    static char path[600];
    float *data = (float *)malloc((size_t)count * 4 + 8);
    char *bytes = (char *)malloc(28 + (size_t)count * 4 + 8);
    for (int64_t i = 0; i < count + 2; i++) data[i] = (float)i;
    memcpy(bytes, header, 28);
    memcpy(bytes + 28, data, (size_t)count * 4 + 8);
    snprintf(path, sizeof path, "%s", in_root("model.bin"));
    write_bytes(path, bytes, (size_t)(28 + 4 * count + more));
    free(bytes), free(data);
    return path;
}

TEST(refused_files)
{
    static const struct { int field; int32_t value; llmpar_status status; const char *says; } rows[] = {
        { DIM, 0, LLMPAR_ERR_FORMAT, "dim = 0, expected 1 or more (byte 0)" }, { DIM, -12, LLMPAR_ERR_FORMAT, "dim = -12" }, { DIM, 13, LLMPAR_ERR_FORMAT, "dim = 13 is not divisible by n_heads = 3" },
        { DIM, 15, LLMPAR_ERR_CONFIG, "head_dim = 5" }, { DIM, INT_MAX / 3 * 3 / 2 * 2, LLMPAR_ERR_FORMAT, "" }, { HIDDEN, 0, LLMPAR_ERR_FORMAT, "hidden_dim = 0, expected 1 or more (byte 4)" },
        { HIDDEN, INT_MAX, LLMPAR_ERR_CONFIG, "2147483647" }, { HIDDEN, 4194304, LLMPAR_ERR_FORMAT, "the file has" }, { LAYERS, 0, LLMPAR_ERR_FORMAT, "n_layers = 0" }, { LAYERS, INT_MIN, LLMPAR_ERR_FORMAT, "n_layers = -2147483648" }, { LAYERS, INT_MAX, LLMPAR_ERR_FORMAT, "" },
        { LAYERS, 65536, LLMPAR_ERR_FORMAT, "the file has" }, { HEADS, 0, LLMPAR_ERR_FORMAT, "n_heads = 0" }, { HEADS, -3, LLMPAR_ERR_FORMAT, "n_heads = -3" }, { KV_HEADS, 0, LLMPAR_ERR_FORMAT, "n_kv_heads = 0, expected 1 or more (byte 16)" },
        { KV_HEADS, 2, LLMPAR_ERR_CONFIG, "" }, { KV_HEADS, 6, LLMPAR_ERR_CONFIG, "" }, { VOCAB, 0, LLMPAR_ERR_FORMAT, "vocab_size = 0, expected another number than 0 (byte 20)" }, { VOCAB, INT_MIN, LLMPAR_ERR_FORMAT, "vocab_size = -2147483648" },
        { VOCAB, -7, LLMPAR_ERR_FORMAT, "the file has" }, { VOCAB, 8, LLMPAR_ERR_FORMAT, "the file has" }, { SEQ, 0, LLMPAR_ERR_FORMAT, "seq_len = 0" }, { SEQ, -1, LLMPAR_ERR_FORMAT, "seq_len = -1" }, { SEQ, 6, LLMPAR_ERR_FORMAT, "the file has" },
        { SEQ, INT_MAX, LLMPAR_ERR_CONFIG, "2147483647" }, { SEQ, 536870912, LLMPAR_ERR_FORMAT, "the file has" },
    };
    llmpar_llama2c *file = NULL;
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        int32_t header[FIELDS];
        memcpy(header, good, sizeof header);
        header[rows[i].field] = rows[i].value;
        ready();
        heap.peak = heap.live;
        llmpar_status status = llmpar_llama2c_open(&heap, NULL, put(header, floats(good), 0), &file, &err);
        int expected = status == rows[i].status || (!rows[i].says[0] && (status == LLMPAR_ERR_CONFIG || status == LLMPAR_ERR_FORMAT));
        if (!expected || file || !strstr(err.text, rows[i].says) || !strstr(err.text, "model.bin: ")) TEST_FAIL("row %d: got %s \"%s\", want \"%s\"", (int)i, llmpar_status_string(status), err.text, rows[i].says);
        CHECK(heap.peak < 4096); /* whatever the header promises */
        CHECK_INT(heap.live, 0);
    }
    /* Everything large at once: sizes that overflow. */
    int32_t large[FIELDS] = { INT_MAX - 1, INT_MAX, INT_MAX, 1, 1, INT_MIN + 1, INT_MAX };
    CHECK(llmpar_llama2c_open(ready(), NULL, put(large, 10, 0), &file, &err) != LLMPAR_OK);
    /* A byte more or less, half a header, nothing. */
    for (int64_t more = -4; more <= 4; more++) {
        CHECK_STATUS(llmpar_llama2c_open(ready(), NULL, put(good, floats(good), more), &file, &err), more ? LLMPAR_ERR_FORMAT : LLMPAR_OK);
        if (more) CHECK_TEXT(err.text, "its header makes it");
        llmpar_llama2c_close(file);
    }
    for (int64_t bytes = 0; bytes < 28; bytes++) {
        CHECK_STATUS(llmpar_llama2c_open(ready(), NULL, put(good, 0, bytes - 28), &file, &err), LLMPAR_ERR_FORMAT);
        CHECK_TEXT(err.text, "expected a header of 28");
    }
    CHECK_STATUS(llmpar_llama2c_open(ready(), NULL, in_root("nothing.bin"), &file, &err), LLMPAR_ERR_IO);
    CHECK_STATUS(llmpar_llama2c_open(ready(), NULL, root, &file, &err), LLMPAR_ERR_IO);
    llmpar_llama2c_close(NULL);
    CHECK_INT(heap.live, 0);
}

TEST(out_of_memory)
{
    const char *path = put(good, floats(good), 0);
    for (uint64_t fail = 1;; fail++) {
        llmpar_heap h;
        llmpar_llama2c *file = NULL;
        llmpar_heap_init(&h, NULL);
        h.fail_at = fail;
        llmpar_status status = (ready(), llmpar_llama2c_open(&h, NULL, path, &file, &err));
        llmpar_llama2c_close(file);
        CHECK_INT(h.live, 0);
        if (!status) break;
        CHECK_STATUS(status, LLMPAR_ERR_MEMORY);
    }
}

/* Where each number of the file goes: f[i] = i, so a value says where it came from. */
TEST(places)
{
    for (int untied = 0; untied < 2; untied++) {
        int32_t header[FIELDS];
        memcpy(header, good, sizeof header);
        if (untied) header[VOCAB] = -7;
        llmpar_llama2c *file = NULL;
        CHECK_OK(llmpar_llama2c_open(ready(), NULL, put(header, floats(header), 0), &file, &err));
        if (!file) return;
        CHECK_INT(file->count, 2 * 9 + 2 + untied);
        CHECK_INT(file->config.tied, !untied);
        CHECK_INT(file->config.vocab, 7);
        CHECK_INT(file->config.head_dim, 4);
        CHECK_INT(file->config.max_positions, 5);
        CHECK(file->config.kv_heads == 1 && file->config.heads == 3 && file->config.layers == 2 && file->config.bos_id == 1 && file->config.eos_id[0] == 2);
        CHECK_INT(llmpar_llama_param_count(&file->config), floats(header) - 5 * 4);
        /* V*D, L*D, L*12*12, L*4*12 twice, L*12*12, L*D, L*20*12, L*12*20, L*20*12, D, T*E */
        static const struct { const char *name; int64_t begin, rows, columns; int paired; } rows[] = {
            { "model.embed_tokens.weight", 0, 7, 12, 0 }, { "model.layers.0.input_layernorm.weight", 84, 12, 1, 0 }, { "model.layers.1.input_layernorm.weight", 96, 12, 1, 0 },
            { "model.layers.0.self_attn.q_proj.weight", 108, 12, 12, 1 }, { "model.layers.1.self_attn.q_proj.weight", 252, 12, 12, 1 }, { "model.layers.1.self_attn.k_proj.weight", 396 + 48, 4, 12, 1 },
            { "model.layers.0.self_attn.v_proj.weight", 492, 4, 12, 0 }, { "model.layers.1.self_attn.o_proj.weight", 588 + 144, 12, 12, 0 }, { "model.layers.0.post_attention_layernorm.weight", 876, 12, 1, 0 },
            { "model.layers.1.mlp.gate_proj.weight", 900 + 240, 20, 12, 0 }, { "model.layers.0.mlp.down_proj.weight", 1380, 12, 20, 0 }, { "model.layers.1.mlp.up_proj.weight", 1860 + 240, 20, 12, 0 },
            { "model.norm.weight", 2340, 12, 1, 0 }, { "lm_head.weight", 2352 + 20, 7, 12, 0 },
        };
        for (size_t i = 0; i < sizeof rows / sizeof rows[0] - !untied; i++) {
            const llmpar_safetensor *t = NULL;
            float got[400];
            for (int32_t k = 0; k < file->count; k++)
                if (!strcmp(file->tensor[k].name, rows[i].name)) t = &file->tensor[k];
            if (!t) { TEST_FAIL("no %s", rows[i].name); continue; }
            CHECK(t->dims == (rows[i].columns == 1 ? 1 : 2) && t->shape[0] == rows[i].rows && (t->dims == 1 || t->shape[1] == rows[i].columns));
            for (int64_t from = 0; from <= rows[i].rows; from += 3) { /* from several rows on, to the end */
                CHECK_OK(llmpar_llama2c_read(file, t, from, rows[i].rows - from, got, &err));
                for (int64_t r = from; r < rows[i].rows; r++)
                    for (int64_t c = 0; c < rows[i].columns; c++) {
                        static const int64_t pair[4] = { 0, 2, 1, 3 }; /* of a head of 4: first halves (0, 1) are the even rows */
                        int64_t row = rows[i].paired ? r / 4 * 4 + pair[r % 4] : r;
                        if (got[(r - from) * rows[i].columns + c] != (float)(rows[i].begin + row * rows[i].columns + c)) { TEST_FAIL("%s[%d, %d]", rows[i].name, (int)r, (int)c); r = rows[i].rows; break; }
                    }
            }
            CHECK_STATUS(llmpar_llama2c_read(file, t, 1, rows[i].rows, got, &err), LLMPAR_ERR_ARGUMENT);
            CHECK_STATUS(llmpar_llama2c_read(file, t, -1, 1, got, &err), LLMPAR_ERR_ARGUMENT);
            CHECK_STATUS(llmpar_llama2c_read(file, t, INT64_MAX, INT64_MAX, got, &err), LLMPAR_ERR_ARGUMENT);
        }
        llmpar_llama2c_close(file);
        CHECK_INT(heap.live, 0);
    }
}

TEST(a_real_model)
{
    TEST_DATA(bin, "stories260K/stories260K.bin");
    TEST_DATA(directory, "stories260K/hf");
    llmpar_llama2c *file = NULL;
    llmpar_hf_files *files = NULL;
    CHECK_OK(llmpar_llama2c_open(ready(), NULL, bin, &file, &err));
    CHECK_OK(llmpar_hf_files_open(ready(), NULL, directory, &files, &err));
    if (!file || !files) { TEST_FAIL("%s", err.text); return; }
    CHECK_INT(file->count, files->tensors);
    for (int32_t i = 0; i < file->count; i++) {
        const llmpar_safetensor *mine = &file->tensor[i], *theirs;
        const llmpar_safetensors *where;
        theirs = llmpar_hf_files_find(files, mine->name, &where);
        if (!theirs || theirs->bytes != mine->bytes || theirs->dims != mine->dims) { TEST_FAIL("%s", mine->name); continue; }
        float *a = (float *)malloc(mine->bytes), *b = (float *)malloc(mine->bytes);
        CHECK_OK(llmpar_llama2c_read(file, mine, 0, mine->shape[0], a, &err));
        CHECK_OK(llmpar_safetensors_read(where, theirs, 0, theirs->bytes, b, &err));
        if (memcmp(a, b, mine->bytes)) TEST_FAIL("%s differs", mine->name);
        free(a), free(b);
    }
    llmpar_llama2c_close(file);
    llmpar_hf_files_close(files);
    CHECK_INT(heap.live, 0);
}

TEST_LIST(T_(refused_files), T_(out_of_memory), T_(places), T_(a_real_model))
