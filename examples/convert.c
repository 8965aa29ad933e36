/* convert: Hugging Face directories from other files: shards merged or made, another dtype, a llama2.c model. One process, in pieces: whatever a model's size, a few MiB and the headers are in memory.

   cc -O3 -I. examples/convert.c -o build/convert -lpthread -lm       (or: make build/convert)
   build/convert --in model --out merged                               shards become one file
   build/convert --in model --out half --dtype bf16 --shard 2G         another dtype, in files of at most 2 GiB
   build/convert --in stories260K.bin --out stories                    llama2.c's legacy format */
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/llama2c.h"
#include "common/options.h"
#include "common/policy.h"

static void usage(void)
{
    puts("usage: convert --in DIR|FILE.bin --out DIR [options]\n"
         "  --in DIR            a Hugging Face directory: model.safetensors, or shards and their index\n"
         "  --in FILE.bin       a llama2.c model (legacy format): q and k are brought into Hugging Face's order\n"
         "  --out DIR           made unless it is there; may be --in\n"
         "  --dtype D           f32, f64, bf16, f16, rounded to nearest (default: what each tensor is)\n"
         "  --shard BYTES       files of at most so many bytes of tensors, and an index (K, M, G allowed; default: one file)\n"
         "  --help\n"
         "The model's architecture does not matter. config.json goes along, its dtype changed if there is a new one; so do a tokenizer's files and generation_config.json.");
}

typedef struct job {
    const char *in, *out;
    uint64_t shard;
    llmpar_dtype dtype;
    llmpar_heap heap;
    llmpar_error error;
    llmpar_hf_files *files; /* one of these two */
    llmpar_llama2c *bin;
    llmpar_safetensor *source, *target; /* [count] */
    const llmpar_safetensors **file;    /* [count], with files: where each is */
    int32_t count;
    char *config;
} job;

static llmpar_status no_memory(job *j, const char *what) { return llmpar_error_set(&j->error, LLMPAR_ERR_MEMORY, "%s: out of memory for %s", j->in, what); }

/* DIR/name in one of two buffers. */
static const char *in_directory(const char *directory, const char *name)
{
    static char buffer[2][4096];
    static int next;
    next = !next;
    snprintf(buffer[next], sizeof buffer[next], "%s/%s", directory, name);
    return buffer[next];
}

/* config.json with the dtype that the weights get. Where it names none, transformers takes the weights' own. */
static llmpar_status read_config(job *j)
{
    static const char *const keys[] = {"torch_dtype", "dtype"};
    const char *word = j->dtype == LLMPAR_F32 ? "float32" : j->dtype == LLMPAR_F64 ? "float64" : j->dtype == LLMPAR_BF16 ? "bfloat16" : "float16", *path = in_directory(j->in, "config.json");
    llmpar_json_desc desc;
    llmpar_json *root = NULL;
    char *text = NULL;
    size_t bytes, used = 0;
    memset(&desc, 0, sizeof desc);
    desc.unique_keys = 1;
    desc.name = path;
    llmpar_status status = llmpar_file_load(&j->heap, NULL, path, (size_t)16 << 20, &text, &bytes, &j->error);
    if (!status) status = llmpar_json_parse(&j->heap, text, bytes, &desc, &root, &j->error);
    if (!status) j->config = (char *)llmpar_heap_alloc(&j->heap, bytes + 64, 1);
    if (!status && !j->config) status = no_memory(j, "config.json");
    for (size_t at = 0; !status && at < bytes;) {
        const llmpar_json *value = NULL;
        for (int k = 0; k < 2 && j->dtype && !value; k++) {
            value = llmpar_json_get(root, keys[k]);
            if (value && (value->type != LLMPAR_JSON_STRING || value->position != at)) value = NULL;
        }
        if (!value) {
            j->config[used++] = text[at++];
            continue;
        }
        used += (size_t)sprintf(j->config + used, "\"%s\"", word);
        at += value->length + 2; /* none of these words has an escape, */
        if (text[at - 1] != '"') status = llmpar_error_set(&j->error, LLMPAR_ERR_FORMAT, "%s: dtype: expected a plain word (byte %zu)", path, value->position);
    }
    if (j->config) j->config[used] = 0;
    llmpar_json_destroy(&j->heap, root);
    llmpar_heap_free(&j->heap, text);
    return status;
}

static llmpar_status open_input(job *j)
{
    llmpar_status status;
    if (llmpar_is_directory(j->in)) {
        status = llmpar_hf_files_open(&j->heap, NULL, j->in, &j->files, &j->error);
        if (!status) status = read_config(j);
        j->count = status ? 0 : j->files->tensors;
    } else {
        status = llmpar_llama2c_open(&j->heap, NULL, j->in, &j->bin, &j->error);
        size_t bytes = status ? 0 : llmpar_llama_config_write(&j->bin->config, NULL, 0);
        j->config = status ? NULL : (char *)llmpar_heap_alloc(&j->heap, bytes + 1, 1);
        if (!status && !j->config) status = no_memory(j, "config.json");
        if (!status) llmpar_llama_config_write(&j->bin->config, j->config, bytes + 1);
        j->count = status ? 0 : j->bin->count;
    }
    if (status) return status;
    j->source = (llmpar_safetensor *)llmpar_heap_zalloc(&j->heap, (size_t)j->count + 1, sizeof *j->source);
    j->target = (llmpar_safetensor *)llmpar_heap_zalloc(&j->heap, (size_t)j->count + 1, sizeof *j->target);
    j->file = (const llmpar_safetensors **)llmpar_heap_zalloc(&j->heap, (size_t)j->count + 1, sizeof *j->file);
    if (!j->source || !j->target || !j->file) return no_memory(j, "the tensors' names");
    int32_t at = 0;
    for (int32_t f = 0; j->files && f < j->files->count; f++)
        for (int32_t t = 0; t < j->files->file[f]->count; t++, at++) {
            j->source[at] = j->files->file[f]->tensor[t];
            j->file[at] = j->files->file[f];
        }
    for (; at < j->count; at++) j->source[at] = j->bin->tensor[at];
    for (at = 0; at < j->count; at++) {
        llmpar_dtype d = j->source[at].dtype;
        j->target[at] = j->source[at];
        if (j->dtype && (d == LLMPAR_F32 || d == LLMPAR_F64 || d == LLMPAR_BF16 || d == LLMPAR_F16)) j->target[at].dtype = j->dtype; /* integers stay what they are */
    }
    return LLMPAR_OK;
}

/* One tensor, in pieces of at most `most` bytes or, of llama2.c, one row. */
static llmpar_status copy_tensor(job *j, llmpar_hf_writer *writer, int32_t index, size_t most)
{
    const llmpar_safetensor *source = &j->source[index];
    llmpar_dtype to = j->target[index].dtype;
    size_t size = llmpar_dtype_size(source->dtype), row = j->bin && source->dims == 2 ? 4 * (size_t)source->shape[1] : size, rows = row < most ? most / row : 1, all = source->bytes / row;
    char *data = (char *)llmpar_heap_alloc(&j->heap, rows, row), *wide = to == source->dtype ? data : (char *)llmpar_heap_alloc(&j->heap, rows, row / size * llmpar_dtype_size(to));
    llmpar_status status = data && wide ? LLMPAR_OK : no_memory(j, "a piece of a tensor");
    for (size_t done = 0, part; done < all && !status; done += part) {
        part = all - done < rows ? all - done : rows;
        if (j->bin) status = llmpar_llama2c_read(j->bin, source, (int64_t)done, (int64_t)part, (float *)(void *)data, &j->error);
        else status = llmpar_safetensors_read(j->file[index], source, done * row, part * row, data, &j->error);
        if (!status && wide != data) llmpar_convert(wide, to, data, source->dtype, part * row / size);
        if (!status) status = llmpar_hf_writer_write(writer, wide, part * row / size * llmpar_dtype_size(to), &j->error);
    }
    if (wide != data) llmpar_heap_free(&j->heap, wide);
    llmpar_heap_free(&j->heap, data);
    return status;
}

/* Files beside the weights, as far as they are there. */
static llmpar_status copy_others(job *j)
{
    static const char *const names[] = {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"};
    llmpar_status status = LLMPAR_OK;
    for (size_t i = 0; i < sizeof names / sizeof names[0] && j->files && strcmp(j->in, j->out) && !status; i++) {
        const char *from = in_directory(j->in, names[i]), *to = in_directory(j->out, names[i]);
        llmpar_writer *writer = NULL;
        char *text = NULL;
        size_t bytes;
        if (!llmpar_is_file(from)) continue;
        status = llmpar_file_load(&j->heap, NULL, from, (size_t)256 << 20, &text, &bytes, &j->error);
        if (!status) status = llmpar_writer_open(&j->heap, NULL, to, &writer, &j->error);
        if (!status) status = llmpar_writer_write(writer, text, bytes, &j->error);
        if (status) llmpar_writer_abandon(writer);
        else status = llmpar_writer_commit(writer, &j->error);
        llmpar_heap_free(&j->heap, text);
    }
    return status;
}

static llmpar_status convert(job *j)
{
    llmpar_hf_writer *writer = NULL;
    llmpar_status status = open_input(j);
    if (!status) status = llmpar_hf_writer_open(&j->heap, NULL, j->out, j->target, j->count, j->shard, j->config, &writer, &j->error);
    for (int32_t i = 0; i < j->count && !status; i++) status = copy_tensor(j, writer, i, (size_t)1 << 20);
    if (!status) status = copy_others(j);
    if (!status) status = llmpar_hf_writer_commit(writer, &j->error);
    else llmpar_hf_writer_abandon(writer);
    if (!status) printf("%s: %d tensors\n", j->out, (int)j->count);
    llmpar_hf_files_close(j->files);
    llmpar_llama2c_close(j->bin);
    llmpar_heap_free(&j->heap, j->source);
    llmpar_heap_free(&j->heap, j->target);
    llmpar_heap_free(&j->heap, (void *)j->file);
    llmpar_heap_free(&j->heap, j->config);
    return status;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"in", 1, 0, 'i'}, {"out", 1, 0, 'o'}, {"dtype", 1, 0, 'd'}, {"shard", 1, 0, 's'}, {"help", 0, 0, 'h'}, {0, 0, 0, 0}};
    static const char *const dtypes[] = {"f32", "f64", "bf16", "f16"};
    static const llmpar_dtype dtype[] = {LLMPAR_F32, LLMPAR_F64, LLMPAR_BF16, LLMPAR_F16};
    job j;
    int bad = 0, word = 0;
    memset(&j, 0, sizeof j);
    for (int c; !bad && (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (c) {
        case 'i': j.in = optarg; break;
        case 'o': j.out = optarg; break;
        case 'd': bad = option_word("--dtype", optarg, dtypes, 4, &word); j.dtype = dtype[word]; break;
        case 's': bad = policy_bytes("--shard", optarg, &j.shard); break;
        case 'h': usage(); return 0;
        default: bad = 2; /* getopt_long has said what */
        }
    }
    if (!bad && optind < argc) bad = option_error("unexpected argument \"%s\", see --help", argv[optind]);
    if (!bad && !j.in) bad = option_error("--in is missing, see --help");
    if (!bad && !j.out) bad = option_error("--out is missing, see --help");
    if (!bad && strlen(j.in) + strlen(j.out) > 2000) bad = option_error("--in and --out: names of %zu bytes, expected at most 2000", strlen(j.in) + strlen(j.out));
    if (bad) return 2;
    llmpar_heap_init(&j.heap, NULL);
    llmpar_error_clear(&j.error);
    j.error.rank = -1;
    return convert(&j) ? print_error("convert", &j.error) : 0;
}
