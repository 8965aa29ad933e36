/* What saving and loading a Hugging Face directory reaches of writing and reading as many bytes in a row, in the same folder and run.

   2 thread ranks, ZeRO-3, f32; write() of 1 MiB at a time and one fsync, then read(), against llmpar_save_hf (which syncs as well) and llmpar_load_hf. Before reading, the page cache is asked to let go of the file.
   Rounds are interleaved, and the best of three counts on either side. */
#define _DEFAULT_SOURCE 1
#include "llmpar.h"
#include "bench.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { ROUNDS = 3 };
typedef struct setting { const char *folder; long mib; double seconds[4]; /* the best: write, save, read, load */ } setting;

static void bench_forget(const char *path)
{
    int fd = open(path, O_RDONLY);
    if (fd >= 0 && posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) == 0) close(fd);
    else if (fd >= 0) close(fd);
}

/* Seconds for `bytes` in a row; -1: it failed. */
static double bench_stream(const char *path, int64_t bytes, int writing)
{
    size_t part = 1 << 20;
    char *buffer = (char *)malloc(part);
    if (!buffer) return -1;
    memset(buffer, 7, part);
    double begin = bench_now();
    int fd = open(path, writing ? O_CREAT | O_TRUNC | O_WRONLY : O_RDONLY, 0666), good = fd >= 0;
    for (int64_t done = 0; good && done < bytes; done += (int64_t)part) good = (writing ? write(fd, buffer, part) : read(fd, buffer, part)) == (ssize_t)part;
    if (good && writing) good = fsync(fd) == 0;
    if (fd >= 0) close(fd);
    free(buffer);
    return good ? bench_now() - begin : -1;
}

static void bench_keep(double *best, double seconds)
{
    if (*best == 0 || seconds < *best) *best = seconds;
}

static llmpar_status bench_rank(llmpar_ctx *ctx, void *user)
{
    setting *s = (setting *)user;
    llmpar_llama_config config;
    llmpar_mesh_desc mesh_desc;
    llmpar_llama_desc model_desc;
    llmpar_trainer_desc desc;
    llmpar_mesh *mesh = NULL;
    llmpar_llama *model = NULL;
    llmpar_trainer *trainer = NULL;
    char directory[600], weights[700], stream[700];
    memset(&mesh_desc, 0, sizeof mesh_desc);
    memset(&model_desc, 0, sizeof model_desc);
    memset(&desc, 0, sizeof desc);
    llmpar_status status = llmpar_llama_preset("110m", &config, &ctx->error);
    config.hidden = 1024, config.intermediate = 2816, config.heads = config.kv_heads = 16, config.head_dim = 64;
    config.layers = 1;
    int64_t one = llmpar_llama_param_count(&config);
    config.layers = 2;
    int64_t layer = llmpar_llama_param_count(&config) - one;
    int64_t layers = (((int64_t)s->mib << 18) - (one - layer)) / layer;
    config.layers = layers > 1 ? (int32_t)layers : 1;
    mesh_desc.dp_shard = 2;
    model_desc.config = &config;
    desc.seq_len = 8;
    desc.optim.kind = LLMPAR_OPTIM_SGD; /* no states */
    desc.optim.momentum = -1;
    desc.log_every = -1;
    snprintf(directory, sizeof directory, "%s/bench_model_io.model", s->folder);
    snprintf(weights, sizeof weights, "%s/model.safetensors", directory);
    snprintf(stream, sizeof stream, "%s/bench_model_io.stream", s->folder);
    if (!status) status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_llama_create(ctx, &model_desc, &model);
    if (!status) status = llmpar_parallelize(mesh, model, &desc, &trainer);
    int64_t bytes = llmpar_llama_param_count(&config) * 4;
    for (int round = 0; round < ROUNDS && !status; round++)
        for (int what = 0; what < 4 && !status; what++) {
            double begin, seconds = 0;
            if (ctx->rank == 0 && what == 2) bench_forget(stream);
            if (ctx->rank == 0 && what == 3) bench_forget(weights);
            if (ctx->rank == 0 && what % 2 == 0 && (seconds = bench_stream(stream, bytes, what == 0)) < 0) status = llmpar_fail(ctx, LLMPAR_ERR_IO, "%s: cannot write or read it", stream);
            if (!status) status = llmpar_comm_barrier(ctx->comm, NULL, "bench");
            begin = bench_now();
            if (!status && what % 2) status = what == 1 ? llmpar_save_hf(trainer, directory) : llmpar_load_hf(trainer, directory);
            if (ctx->rank == 0 && !status) bench_keep(&s->seconds[what], what % 2 ? bench_now() - begin : seconds);
        }
    if (ctx->rank == 0) {
        if (!status)
            printf("%.2f GB on 2 ranks: write + fsync %.2f s, save %.2f s (%.0f %%); read %.2f s, load %.2f s (%.0f %%)\n", (double)bytes / 1e9, s->seconds[0], s->seconds[1], 100 * s->seconds[0] / s->seconds[1], s->seconds[2],
                   s->seconds[3], 100 * s->seconds[2] / s->seconds[3]);
        unlink(stream);
        unlink(weights);
        snprintf(weights, sizeof weights, "%s/config.json", directory);
        unlink(weights);
        rmdir(directory);
    }
    llmpar_trainer_destroy(trainer);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    return status;
}

static const char usage[] =
    "bench_model_io [FOLDER [MIB]]\n"
    "Saving and loading a Hugging Face directory, beside writing and reading as many bytes in a row.\n"
    "  FOLDER   where the files are written, and removed again (default .)\n"
    "  MIB      size of the model, 200 or more (default 1024)\n";

int main(int argc, char **argv)
{
    setting s;
    llmpar_launch_desc desc;
    llmpar_error error;
    memset(&s, 0, sizeof s);
    memset(&desc, 0, sizeof desc);
    bench_usage(argc, argv, usage, 2);
    s.folder = argc > 1 ? argv[1] : ".";
    if (!s.folder[0] || strlen(s.folder) > 500) bench_refuse("FOLDER", s.folder, "a folder's name of at most 500 characters");
    s.mib = argc > 2 ? bench_number("MIB", argv[2], 200, 1 << 20) : 1024;
    desc.ranks = 2;
    if (!llmpar_launch(&desc, bench_rank, &s, &error)) return 0;
    fprintf(stderr, "bench_model_io: %s\n", error.text);
    return 1;
}
