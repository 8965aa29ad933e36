/* policies: meshes, and policies for them that are drawn at random: everything that a recipe may be told without a bit changing. */
#ifndef POLICIES_H
#define POLICIES_H

#include "train.h"

typedef struct mesh_shape { const char *name; int32_t replicate, shard, tp; } mesh_shape;
static const mesh_shape meshes[] = {
    {"1", 1, 1, 1}, {"tp2", 1, 1, 2}, {"tp4", 1, 1, 4}, {"tp8", 1, 1, 8}, {"dp2", 1, 2, 1}, {"dp4", 1, 4, 1},
    {"2x2", 1, 2, 2}, {"4x2", 1, 4, 2}, {"2x4", 1, 2, 4}, {"hsdp 2x2x2", 2, 2, 2},
};
enum { MESHES = sizeof meshes / sizeof meshes[0] };

static uint64_t drawn;
static inline unsigned draw(unsigned below)
{
    drawn += 0x9e3779b97f4a7c15u;
    return (unsigned)((train_mix(drawn) >> 20) % below);
}

/* A policy that the mesh and the batch allow. What other policies forbid is not drawn: chain and no_sync, offloaded f32 parameters that are whole at rest, ranks that update inside backward and accumulate. */
static inline void draw_policy(train_job *job, const mesh_shape *mesh, int fixed_accum, char *text, size_t capacity)
{
    llmpar_trainer_desc *p = &job->policy;
    int inside = p->optim.kind == LLMPAR_OPTIM_LOMO || p->optim.kind == LLMPAR_OPTIM_ADALOMO, stateless = inside || (p->optim.kind == LLMPAR_OPTIM_SGD && p->optim.momentum < 0);
    int master = job->dtype == LLMPAR_BF16 || job->dtype == LLMPAR_F16;
    job->exact = LLMPAR_EXACT_REQUIRE;
    job->sp = (int32_t)draw(2);
    job->zero = (int32_t)draw(4);
    job->prefetch = (int32_t)draw(5);
    p->prefetch_backward = (int32_t)draw(5) - 1;
    p->reshard = (llmpar_reshard)draw(5);
    p->reshard_every = 1 + (int32_t)draw(3);
    if (fixed_accum) {
        job->accum = fixed_accum;
    } else if (!inside) {
        job->accum = 1 << draw(3);
        job->no_sync = (int32_t)draw(2);
    }
    p->recompute = (llmpar_recompute)draw(3);
    p->recompute_every = 1 + (int32_t)draw(2);
    p->overlap = draw(3) == 0;
    for (int state = 0; state < LLMPAR_STATE_COUNT; state++) {
        if (draw(3)) continue;
        int whole = mesh->shard == 1 || job->zero < 3;
        if ((state == LLMPAR_STATE_OPTIMIZER && stateless) || (state == LLMPAR_STATE_GRADS && inside)) continue;
        if (state == LLMPAR_STATE_PARAMS && !master && whole) continue;
        p->offload[state] = draw(2) ? LLMPAR_TIER_FILE : LLMPAR_TIER_HOST;
    }
    if (draw(4) == 0 && !stateless && (master || (mesh->shard > 1 && job->zero == 3))) { /* updated on the host */
        for (int state = LLMPAR_STATE_OPTIMIZER; state <= LLMPAR_STATE_GRADS; state++) p->offload[state] = LLMPAR_TIER_HOST;
        p->offload_update = LLMPAR_TIER_HOST;
    }
    snprintf(text, capacity, "%s %s %s sp %d zero %d prefetch %d,%d reshard %d/%d accum %d%s%s recompute %d/%d overlap %d offload %d%d%d%d%s", job->config->tied ? "tied" : "untied", llmpar_dtype_name(job->dtype ? job->dtype : LLMPAR_F32), mesh->name,
             (int)job->sp, (int)job->zero, (int)job->prefetch, (int)p->prefetch_backward, (int)p->reshard, (int)p->reshard_every, (int)(job->accum ? job->accum : 1), job->no_sync ? " no_sync" : "", p->chain ? " chain" : "", (int)p->recompute,
             (int)p->recompute_every, (int)p->overlap, (int)p->offload[0], (int)p->offload[1], (int)p->offload[2], (int)p->offload[3], p->offload_update ? " on the host" : "");
}

#endif
