/* Saving and loading a checkpoint, beside dd with fsync in the same place and run.

   Two thread ranks share a model of two parameters, whose checkpoint (f32 parameters and two states of AdamW) is MB large (default 1024). Each round writes as much with dd (1 process, and 2 at once; the faster one is the bound), saves,
   and loads; medians. Saving is all of llmpar_checkpoint_save: checksums, syncs, manifest, rename. Loading is all of llmpar_checkpoint_load: every file is read for its checksum and for its numbers. */
#define _DEFAULT_SOURCE 1
#include "llmpar.h"
#include "bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { ROUNDS = 21 };
typedef struct bench_job {
    const char *directory;
    int64_t bytes;
    int rounds;
    double save[ROUNDS], load[ROUNDS], one[ROUNDS], two[ROUNDS], background[ROUNDS]; /* seconds */
} bench_job;

static void bench_run(const char *command)
{
    if (system(command)) {
        fprintf(stderr, "bench_checkpoint: failed: %s\n", command);
        exit(1);
    }
}

static void bench_meet(llmpar_ctx *ctx)
{
    llmpar_stream *stream = NULL;
    if (ctx->device->stream_create(ctx->device, "meet", &stream) || llmpar_comm_barrier(ctx->comm, stream, "meet") || ctx->device->synchronize(ctx->device, stream)) exit(1);
    ctx->device->stream_destroy(ctx->device, stream);
}

static void bench_dd(bench_job *job, int round)
{
    char command[1500];
    long blocks = (long)(job->bytes >> 22);
    double start;
    snprintf(command, sizeof command, "rm -rf '%s'/step-* '%s'/dd*", job->directory, job->directory);
    bench_run(command);
    bench_run("sync");
    snprintf(command, sizeof command, "dd if=/dev/zero of='%s'/dd bs=4M count=%ld conv=fsync 2>/dev/null", job->directory, blocks);
    start = bench_now();
    bench_run(command);
    job->one[round] = bench_now() - start;
    snprintf(command, sizeof command, "rm '%s'/dd; sync", job->directory);
    bench_run(command);
    snprintf(command, sizeof command, "for i in 1 2; do dd if=/dev/zero of='%s'/dd$i bs=4M count=%ld conv=fsync 2>/dev/null & done; wait", job->directory, blocks / 2);
    start = bench_now();
    bench_run(command);
    job->two[round] = bench_now() - start;
    snprintf(command, sizeof command, "rm '%s'/dd*; sync", job->directory);
    bench_run(command);
}

static llmpar_status bench_rank(llmpar_ctx *ctx, void *user)
{
    bench_job *job = (bench_job *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_fsdp *fsdp = NULL;
    llmpar_checkpoint *cp = NULL, *behind = NULL;
    llmpar_mesh_desc mesh_desc = {0, 2, 0, 0, 1};
    llmpar_fsdp_desc desc;
    llmpar_param params[2];
    llmpar_unit units[2];
    llmpar_checkpoint_desc cp_desc = {job->directory, NULL, 1, 0};
    llmpar_checkpoint_info info;
    memset(&desc, 0, sizeof desc);
    memset(params, 0, sizeof params);
    memset(units, 0, sizeof units);
    memset(&info, 0, sizeof info);
    desc.optimizer_states = 2;
    for (int u = 0; u < 2; u++) {
        params[u].name = u ? "b" : "a";
        params[u].dims = 2;
        params[u].shape[0] = job->bytes / 24 / 1024;
        params[u].shape[1] = 1024;
        params[u].init_std = 1;
        units[u].name = params[u].name;
        units[u].params = &params[u];
        units[u].param_count = 1;
    }
    llmpar_status status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_fsdp_create(mesh, units, 2, &desc, &fsdp);
    if (!status) status = llmpar_checkpoint_create(fsdp, NULL, &cp_desc, &cp);
    cp_desc.background = 1;
    if (!status) status = llmpar_checkpoint_create(fsdp, NULL, &cp_desc, &behind);
    for (int round = 0; round < job->rounds && !status; round++) {
        char path[1200];
        bench_meet(ctx);
        if (!ctx->rank) bench_dd(job, round);
        bench_meet(ctx);
        info.step = round;
        double start = bench_now();
        status = llmpar_checkpoint_save(cp, &info);
        bench_meet(ctx);
        if (!ctx->rank) job->save[round] = bench_now() - start;
        snprintf(path, sizeof path, "%s/step-%d", job->directory, round);
        bench_meet(ctx);
        start = bench_now();
        if (!status) status = llmpar_checkpoint_load(fsdp, NULL, path, NULL, NULL, &info);
        bench_meet(ctx);
        if (!ctx->rank) job->load[round] = bench_now() - start;
        if (round) continue;
        info.step = 1000; /* what a step waits for a save in the background: a copy */
        start = bench_now();
        if (!status) status = llmpar_checkpoint_save(behind, &info);
        if (!ctx->rank) job->background[0] = bench_now() - start;
        if (!status) status = llmpar_checkpoint_poll(behind, 1);
    }
    llmpar_checkpoint_destroy(cp);
    llmpar_checkpoint_destroy(behind);
    llmpar_fsdp_destroy(fsdp);
    llmpar_mesh_destroy(mesh);
    return status;
}

static const char usage[] =
    "bench_checkpoint [DIRECTORY [MB [ROUNDS]]]\n"
    "Saving and loading a checkpoint, beside dd with fsync in the same place and run.\n"
    "  DIRECTORY   where the files are written, and removed again (default build)\n"
    "  MB          size of the checkpoint, 16 or more (default 1024)\n"
    "  ROUNDS      medians of so many (default 5)\n";

int main(int argc, char **argv)
{
    static bench_job job;
    char directory[1000], command[1100];
    llmpar_launch_desc launch;
    llmpar_error error;
    bench_usage(argc, argv, usage, 3);
    long mb = argc > 2 ? bench_number("MB", argv[2], 16, 1 << 20) : 1024;
    job.rounds = argc > 3 ? (int)bench_number("ROUNDS", argv[3], 1, ROUNDS) : 5;
    if (argc > 1 && (!argv[1][0] || strlen(argv[1]) > 900 || strchr(argv[1], '\''))) bench_refuse("DIRECTORY", argv[1], "a directory's name of at most 900 characters without apostrophes");
    snprintf(directory, sizeof directory, "%s/bench-checkpoint.%d", argc > 1 ? argv[1] : "build", (int)getpid());
    job.directory = directory;
    job.bytes = (int64_t)mb << 20;
    snprintf(command, sizeof command, "mkdir '%s'", directory);
    bench_run(command);
    memset(&launch, 0, sizeof launch);
    launch.ranks = 2;
    int failed = llmpar_launch(&launch, bench_rank, &job, &error) != LLMPAR_OK;
    snprintf(command, sizeof command, "rm -rf '%s'", directory);
    bench_run(command);
    if (failed) {
        fprintf(stderr, "bench_checkpoint: %s\n", error.text);
        return 1;
    }
    double gb = (double)job.bytes * 1e-9, one = bench_median(job.one, job.rounds), two = bench_median(job.two, job.rounds), best = one < two ? one : two, save = bench_median(job.save, job.rounds), load = bench_median(job.load, job.rounds);
    printf("checkpoint of %.2f GB, 2 thread ranks, medians of %d rounds\n", gb, job.rounds);
    printf("dd with fsync       %6.2f GB/s (1 process), %.2f GB/s (2 at once)\n", gb / one, gb / two);
    printf("save                %6.2f GB/s, %.2f of dd; in the background the step waits %.3f s\n", gb / save, best / save, job.background[0]);
    printf("load                %6.2f GB/s, %.2f of dd\n", gb / load, best / load);
    return 0;
}
