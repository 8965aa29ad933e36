/* What check level 1 and the record cost a training step.

   Two readings. Steps of one job (tiny model, 4 sequences of 256 tokens, 4 thread ranks as 2 x 2, ZeRO-3), with fingerprints and record in every second step and without them in the others: medians, and
   the median of the differences of neighbours. And the work alone: describing, entering, marking and fingerprinting one collective, times the collectives of a step, of the step's time. The second
   is the figure where a machine is busy: waiting ranks make neighbouring steps differ by more than what is measured. */
#define _DEFAULT_SOURCE 1
#include "llmpar.h"
#include "bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MOST = 4000 };

static const char usage[] =
    "bench_check [STEPS]\n"
    "What check level 1 and the record cost a training step of four ranks.\n"
    "  STEPS   1 .. 4000 (default 100)\n";

static llmpar_status bench_sequence(void *user, int64_t index, int32_t *tokens)
{
    (void)user;
    for (int i = 0; i <= 256; i++) tokens[i] = (int32_t)((index * 131 + i * 17 + i / 7) % 256);
    return LLMPAR_OK;
}

/* Seconds to describe, enter, mark and fingerprint a collective. */
static double bench_alone(llmpar_record *record, int32_t group)
{
    enum { CALLS = 200000 };
    double best = 1;
    uint64_t sum = 0;
    for (int round = 0; round < 5; round++) {
        double start = bench_now();
        for (int i = 0; i < CALLS; i++) {
            static const char tag[] = "layers.3.self_attn.o_proj/reduce_scatter";
            llmpar_call call;
            memset(&call, 0, sizeof call);
            call.count = (uint64_t)i;
            call.op = LLMPAR_CALL_REDUCE_SCATTER;
            call.dtype = LLMPAR_F32;
            memcpy(call.axis, "tp", 3);
            memcpy(call.tag, tag, sizeof tag);
            for (size_t k = 0; k < sizeof tag; k++) call.tag_bits = (call.tag_bits ^ (unsigned char)tag[k]) * 0x100000001b3u;
            uint64_t id = llmpar_record_begin(record, group, &call);
            llmpar_record_started(record, id);
            sum += llmpar_call_fingerprint(&call);
            llmpar_record_completed(record, id);
        }
        double seconds = (bench_now() - start) / CALLS;
        if (seconds < best) best = seconds;
    }
    return sum ? best : 0;
}

static llmpar_status bench_rank(llmpar_ctx *ctx, void *user)
{
    int steps = *(int *)user;
    static double on[MOST], off[MOST], difference[MOST];
    llmpar_mesh *mesh = NULL;
    llmpar_llama *model = NULL;
    llmpar_trainer *trainer = NULL;
    llmpar_mesh_desc mesh_desc = { .dp_shard = 2, .tp = 2 };
    llmpar_llama_desc model_desc = { .preset = "tiny" };
    llmpar_trainer_desc desc = { .sequence = bench_sequence, .seq_len = 256, .batch = 4, .log_every = -1 };
    llmpar_status st = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!st) st = llmpar_llama_create(ctx, &model_desc, &model);
    if (!st) st = llmpar_parallelize(mesh, model, &desc, &trainer);
    if (st) return st;
    llmpar_comm *comms[LLMPAR_MESH_AXES + 2];
    llmpar_record *record = ctx->comm->record;
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) comms[a] = mesh->comm[a];
    comms[LLMPAR_MESH_AXES] = mesh->dp;
    comms[LLMPAR_MESH_AXES + 1] = mesh->world;
    uint64_t calls = 0;
    for (int i = -4; i < 2 * steps && !st; i++) {
        int checked = (i + i / 2) & 1; /* on off off on ..: a trend falls on both alike */
        for (int a = 0; a < LLMPAR_MESH_AXES + 2; a++) {
            if (comms[a]->ranks == 1) continue;
            comms[a]->record = checked ? record : NULL;
            comms[a]->unchecked = !checked;
            if (i == -1) calls -= comms[a]->sequence;
        }
        double start = bench_now();
        st = llmpar_trainer_step(trainer, NULL);
        if (i == -1)
            for (int a = 0; a < LLMPAR_MESH_AXES + 2; a++)
                if (comms[a]->ranks > 1) calls += comms[a]->sequence;
        if (i >= 0 && ctx->rank == 0) (checked ? on : off)[i / 2] = bench_now() - start;
    }
    for (int a = 0; a < LLMPAR_MESH_AXES + 2; a++)
        if (comms[a]->ranks > 1) comms[a]->record = record, comms[a]->unchecked = 0;
    if (!st) st = llmpar_comm_barrier(ctx->comm, NULL, "bench/end"); /* the others rest while rank 0 measures */
    if (!st && ctx->rank == 0) {
        double alone = bench_alone(record, ctx->comm->group), median_on, median_off, between;
        for (int i = 0; i < steps; i++) difference[i] = on[i] - off[i];
        between = bench_median(difference, steps);
        median_on = bench_median(on, steps);
        median_off = bench_median(off, steps);
        printf("a step:        %8.3f ms with, %8.3f ms without (medians of %d); median difference of neighbours %+.3f ms = %+.2f %%\n", 1e3 * median_on, 1e3 * median_off, steps, 1e3 * between, 100 * between / median_off);
        printf("a collective:  %8.0f ns; %llu of them a step on each rank: %.3f %% of the step\n", 1e9 * alone, (unsigned long long)calls, 100 * alone * (double)calls / median_off);
        printf("bar:           < 2 %%\n");
    }
    llmpar_trainer_destroy(trainer);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    return st;
}

int main(int argc, char **argv)
{
    bench_usage(argc, argv, usage, 1);
    int steps = argc > 1 ? (int)bench_number("STEPS", argv[1], 1, MOST) : 100;
    llmpar_launch_desc desc;
    llmpar_error error;
    memset(&desc, 0, sizeof desc);
    desc.ranks = 4;
    if (llmpar_launch(&desc, bench_rank, &steps, &error)) { fprintf(stderr, "bench_check: %s\n", error.text); return 1; }
    return 0;
}
