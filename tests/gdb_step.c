/* gdb_step: one training step of a small Llama on 2 x 2 ranks, one rank at a time (lockstep): what tests/gdb.sh walks through. */
#define _POSIX_C_SOURCE 200809L
#include "llmpar.h"
#include <stdio.h>
#include <string.h>

static llmpar_status sequence(void *user, int64_t index, int32_t *tokens)
{
    (void)user;
    for (int i = 0; i <= 16; i++) tokens[i] = (int32_t)((index * 31 + i * 7) % 256);
    return LLMPAR_OK;
}

/* A place to stop: mesh and model exist on this rank. */
__attribute__((noinline)) void before_the_step(int rank) { __asm__ volatile("" : : "r"(rank)); }

static llmpar_status train(llmpar_ctx *ctx, void *user)
{
    llmpar_mesh *mesh = NULL;
    llmpar_llama *model = NULL;
    llmpar_trainer *trainer = NULL;
    llmpar_mesh_desc mesh_desc = { .dp_shard = 2, .tp = 2 };
    llmpar_llama_desc model_desc = { .preset = "tiny", .seed = 3 };
    llmpar_trainer_desc desc = { .sequence = sequence, .seq_len = 16, .batch = 4, .log_every = -1 };
    llmpar_step step;
    llmpar_status status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_llama_create(ctx, &model_desc, &model);
    if (!status) status = llmpar_parallelize(mesh, model, &desc, &trainer);
    before_the_step(ctx->rank);
    if (!status) status = llmpar_trainer_step(trainer, &step);
    if (!status && ctx->rank == 0) *(double *)user = step.loss;
    llmpar_trainer_destroy(trainer);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    return status;
}

int main(void)
{
    llmpar_launch_desc launch = { .ranks = 4, .lockstep = 1 };
    llmpar_error error;
    double loss = 0;
    if (llmpar_launch(&launch, train, &loss, &error)) {
        fprintf(stderr, "gdb_step: %s\n", error.text);
        return 1;
    }
    printf("loss %.9f\n", loss);
    return loss > 1 && loss < 20 ? 0 : 1;
}
