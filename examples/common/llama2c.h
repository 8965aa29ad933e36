/* llama2c: model files of llama2.c (github.com/karpathy/llama2.c, the "legacy" format, version 0) as tensors of a Hugging Face directory. Seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len;
   a negative vocab_size means that the classifier is not the embedding), then the weights as f32, little-endian, one kind after the other over all layers. io may be NULL (the system's). Include llmpar.h first. */
#ifndef EXAMPLES_LLAMA2C_H
#define EXAMPLES_LLAMA2C_H

#include <stdio.h>
#include <string.h>

typedef struct llmpar_llama2c {
    llmpar_llama_config config;       /* what the header does not say is as in llama2.c: eps 1e-5, theta 10000, bos 1, eos 2 */
    int32_t count;
    llmpar_safetensor *tensor;        /* [count] in the file's order: Hugging Face names, F32, shape; begin and bytes in the file */
    llmpar_file file;
    llmpar_heap *heap;
    char *path, *names;
} llmpar_llama2c;

/* Each header field and the file's exact size are checked before memory is taken for tensors. LLMPAR_ERR_IO, LLMPAR_ERR_FORMAT, LLMPAR_ERR_CONFIG (a field's value), LLMPAR_ERR_MEMORY. Owned by the caller, to whom it is an open file. */
static llmpar_status llmpar_llama2c_open(llmpar_heap *heap, const llmpar_io *io, const char *path, llmpar_llama2c **out, llmpar_error *error);
/* to[rows, shape[1]] (a norm: to[rows]) <- rows from `row` on. llama2.c turns neighbours (2i, 2i+1) of a head by RoPE, Hugging Face (i, i + E/2): the rows of q and k come in the latter's order. LLMPAR_ERR_ARGUMENT, LLMPAR_ERR_IO. */
static llmpar_status llmpar_llama2c_read(llmpar_llama2c *file, const llmpar_safetensor *tensor, int64_t row, int64_t rows, float *to, llmpar_error *error);
static void llmpar_llama2c_close(llmpar_llama2c *file); /* NULL is fine */

#define LLAMA2C_NAME 64 /* bytes, more than the longest */

/* Everything that a letter of a shape can be: D, hidden; F, intermediate; Q and K, heads and kv heads times head dim; V, vocabulary; 1, no second dim. */
typedef struct llama2c_kind { const char *name; char rows, columns, layers; } llama2c_kind;
static const llama2c_kind llama2c_kinds[] = {
    { "model.embed_tokens.weight", 'V', 'D', 0 }, { "input_layernorm.weight", 'D', '1', 1 },
    { "self_attn.q_proj.weight", 'Q', 'D', 1 }, { "self_attn.k_proj.weight", 'K', 'D', 1 }, { "self_attn.v_proj.weight", 'K', 'D', 1 }, { "self_attn.o_proj.weight", 'D', 'Q', 1 },
    { "post_attention_layernorm.weight", 'D', '1', 1 }, { "mlp.gate_proj.weight", 'F', 'D', 1 }, { "mlp.down_proj.weight", 'D', 'F', 1 }, { "mlp.up_proj.weight", 'F', 'D', 1 },
    { "model.norm.weight", 'D', '1', 0 }, { NULL, 'T', 'E', 0 } /* cosines and sines, made anew by everyone */, { "lm_head.weight", 'V', 'D', 0 }
};
#define LLAMA2C_KINDS (sizeof llama2c_kinds / sizeof llama2c_kinds[0])

static int64_t llama2c_extent(const llmpar_llama_config *c, char letter)
{
    switch (letter) {
    case 'D': return c->hidden;
    case 'F': return c->intermediate;
    case 'V': return c->vocab;
    case 'T': return c->max_positions;
    case 'E': return c->head_dim;
    case 'Q': return (int64_t)c->heads * c->head_dim;
    case 'K': return (int64_t)c->kv_heads * c->head_dim;
    default: return 1;
    }
}

static llmpar_status llama2c_header(llmpar_llama2c *f, llmpar_error *error)
{
    static const char *const names[7] = { "dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len" };
    unsigned char bytes[28];
    int32_t field[7];
    llmpar_llama_config *c = &f->config;
    llmpar_error why;
    llmpar_status status;
    if (f->file.bytes < sizeof bytes) return llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: the file has %u bytes, expected a header of 28", f->path, (unsigned)f->file.bytes);
    status = llmpar_file_read(&f->file, 0, bytes, sizeof bytes, error);
    if (status) return status;
    for (int i = 0; i < 7; i++) {
        uint32_t word = bytes[4 * i] | (uint32_t)bytes[4 * i + 1] << 8 | (uint32_t)bytes[4 * i + 2] << 16 | (uint32_t)bytes[4 * i + 3] << 24;
        memcpy(&field[i], &word, 4);
        if (field[i] <= 0 && (i != 5 || field[i] == 0 || field[i] == INT32_MIN))
            return llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: %s = %d, expected %s (byte %d): no llama2.c model of the legacy format", f->path, names[i], (int)field[i], i == 5 ? "another number than 0" : "1 or more", 4 * i);
    }
    if (field[0] % field[3]) return llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: dim = %d is not divisible by n_heads = %d (byte 0): no llama2.c model of the legacy format", f->path, (int)field[0], (int)field[3]);
    c->hidden = field[0];
    c->intermediate = field[1];
    c->layers = field[2];
    c->heads = field[3];
    c->kv_heads = field[4];
    c->head_dim = field[0] / field[3];
    c->tied = field[5] > 0;
    c->vocab = c->tied ? field[5] : -field[5];
    c->max_positions = field[6];
    c->rms_eps = 1e-5;
    c->rope_theta = 10000;
    c->init_std = 0.02;
    c->bos_id = c->vocab > 1 ? 1 : -1;
    c->eos_count = c->vocab > 2;
    c->eos_id[0] = c->eos_count ? 2 : 0;
    llmpar_error_clear(&why);
    status = llmpar_llama_config_check(c, &why);
    return status ? llmpar_error_set(error, status, "%s: %s", f->path, why.text) : LLMPAR_OK;
}

/* The tensors' places; with f->tensor NULL only counts them. Returns the file's size. */
static uint64_t llama2c_layout(llmpar_llama2c *f)
{
    uint64_t at = 28;
    f->count = 0;
    for (size_t k = 0; k < LLAMA2C_KINDS - (size_t)f->config.tied; k++) {
        const llama2c_kind *kind = &llama2c_kinds[k];
        int64_t rows = llama2c_extent(&f->config, kind->rows), columns = llama2c_extent(&f->config, kind->columns), layers = kind->layers ? f->config.layers : 1;
        uint64_t bytes = (uint64_t)rows * (uint64_t)columns * 4; /* the config's check has seen that all parameters fit 63 bits, and positions 2^29 */
        for (int64_t l = 0; f->tensor && kind->name && l < layers; l++) {
            llmpar_safetensor *t = &f->tensor[f->count + l];
            char *name = f->names + (size_t)(f->count + l) * LLAMA2C_NAME;
            if (kind->layers) snprintf(name, LLAMA2C_NAME, "model.layers.%d.%s", (int)l, kind->name);
            else snprintf(name, LLAMA2C_NAME, "%s", kind->name);
            t->name = name;
            t->dtype = LLMPAR_F32;
            t->dims = columns == 1 && kind->columns == '1' ? 1 : 2;
            t->shape[0] = rows;
            t->shape[1] = t->dims == 2 ? columns : 0;
            t->begin = (size_t)(at + (uint64_t)l * bytes);
            t->bytes = (size_t)bytes;
        }
        f->count += kind->name ? (int32_t)layers : 0;
        at += bytes * (uint64_t)layers;
    }
    return at;
}

static llmpar_status llmpar_llama2c_open(llmpar_heap *heap, const llmpar_io *io, const char *path, llmpar_llama2c **out, llmpar_error *error)
{
    llmpar_llama2c *f = (llmpar_llama2c *)llmpar_heap_zalloc(heap, 1, sizeof *f);
    llmpar_status status = LLMPAR_OK;
    *out = NULL;
    if (f) {
        f->heap = heap;
        f->file.handle = -1;
        f->path = llmpar_heap_strdup(heap, path);
    }
    if (!f || !f->path) status = llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory", path);
    if (!status) status = llmpar_file_open(io, f->path, &f->file, error);
    if (!status) status = llama2c_header(f, error);
    if (!status) {
        uint64_t bytes = llama2c_layout(f);
        if (bytes != f->file.bytes) status = llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: the file has %llu bytes, its header makes it %llu", f->path, (unsigned long long)f->file.bytes, (unsigned long long)bytes);
    }
    if (!status) {
        f->tensor = (llmpar_safetensor *)llmpar_heap_zalloc(heap, (size_t)f->count, sizeof *f->tensor);
        f->names = (char *)llmpar_heap_alloc(heap, (size_t)f->count, LLAMA2C_NAME);
        if (f->tensor && f->names) llama2c_layout(f);
        else status = llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory for %d tensors", f->path, (int)f->count);
    }
    if (status) llmpar_llama2c_close(f);
    else *out = f;
    return status;
}

static llmpar_status llmpar_llama2c_read(llmpar_llama2c *file, const llmpar_safetensor *tensor, int64_t row, int64_t rows, float *to, llmpar_error *error)
{
    size_t bytes = 4 * (size_t)(tensor->dims == 2 ? tensor->shape[1] : 1);
    int64_t head = file->config.head_dim, half = head / 2;
    llmpar_status status = LLMPAR_OK;
    if (row < 0 || rows < 0 || row > tensor->shape[0] || rows > tensor->shape[0] - row)
        return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: %s: %lld rows from %lld, but it has %lld", file->path, tensor->name, (long long)rows, (long long)row, (long long)tensor->shape[0]);
    if (!strstr(tensor->name, ".q_proj.") && !strstr(tensor->name, ".k_proj.")) return llmpar_file_read(&file->file, tensor->begin + (uint64_t)row * bytes, to, (size_t)rows * bytes, error);
    for (int64_t i = row; i < row + rows && !status; i++) {
        int64_t within = i % head, from = i - within + (within < half ? 2 * within : 2 * (within - half) + 1);
        status = llmpar_file_read(&file->file, tensor->begin + (uint64_t)from * bytes, (char *)to + (size_t)(i - row) * bytes, bytes, error);
    }
    return status;
}

static void llmpar_llama2c_close(llmpar_llama2c *file)
{
    if (!file) return;
    llmpar_file_close(&file->file);
    llmpar_heap_free(file->heap, file->tensor);
    llmpar_heap_free(file->heap, file->names);
    llmpar_heap_free(file->heap, file->path);
    llmpar_heap_free(file->heap, file);
}

#undef LLAMA2C_NAME
#undef LLAMA2C_KINDS

#endif
