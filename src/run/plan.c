#include "run/plan.h"
#include "run/trainer_internal.h"
#include "base/text_internal.h"

#include <stdio.h>
#include <string.h>

#include "sim/sim.h"

#if !defined(LLMPAR_NO_LLAMA) && !defined(LLMPAR_NO_IO) && !defined(LLMPAR_NO_TEXT)

#if !defined(LLMPAR_NO_SIM)

/* One step of the recipe in a world of its own: the rank's ctx again, with a device and a world that only count. */
LLMPAR__PRIVATE_DEF llmpar_status llmpar__plan_step(llmpar_mesh *mesh, llmpar_llama *model, const llmpar_trainer_desc *desc, const llmpar__recipe_blocks *blocks, llmpar_memory *out, llmpar_error *error)
{
    llmpar_ctx *ctx = mesh->ctx, sim = *ctx;
    llmpar_mesh *sim_mesh = NULL;
    llmpar_llama *sim_model = NULL;
    llmpar_trainer *trainer = NULL;
    LLMPAR__ZEROED(llmpar_mesh_desc, degrees);
    memset(out, 0, sizeof *out);
    llmpar_heap_init(&sim.heap, &ctx->heap.allocator);
    llmpar_error_clear(&sim.error);
    sim.log = NULL;
    sim.device = NULL;
    sim.comm = NULL;
    degrees.dp_replicate = mesh->degree[LLMPAR_AXIS_DP_REPLICATE];
    degrees.dp_shard = mesh->degree[LLMPAR_AXIS_DP_SHARD];
    degrees.cp = mesh->degree[LLMPAR_AXIS_CP];
    degrees.pp = mesh->degree[LLMPAR_AXIS_PP];
    degrees.tp = mesh->degree[LLMPAR_AXIS_TP];
    llmpar_status status = llmpar_sim_device_create(&sim.heap, &sim.error, ctx->device, &sim.device);
    if (!status) status = llmpar_sim_comm_create(&sim.heap, &sim.error, sim.device, ctx->comm, 0, &sim.comm);
    sim.host = sim.device; /* nothing is computed anywhere */
    sim.host_comm = sim.comm;
    if (!status) status = llmpar_mesh_create(&sim, &degrees, &sim_mesh);
    out->init.live_total = !status; /* done: what ranks do together */
    if (!status) status = llmpar_llama_clone(&sim, model, &sim_model);
    if (!status) status = llmpar__trainer_create(sim_mesh, sim_model, desc, blocks, 1, (uint64_t)1 << 45 /* more than enough */, &trainer);
    if (!status) status = llmpar_trainer_step(trainer, NULL);
    if (!status) llmpar_trainer_memory(trainer, out);
    if (out->step.extent) out->init.reserved = out->before_optimizer.reserved = out->step.reserved = out->step.extent; /* what a trainer reserves */
    if (status) *error = sim.error;
    llmpar_trainer_destroy(trainer);
    llmpar_llama_destroy(sim_model);
    llmpar_mesh_destroy(sim_mesh);
    llmpar_comm_destroy(sim.comm);
    llmpar_sim_device_destroy(sim.device);
    return status;
}

#else

LLMPAR__PRIVATE_DEF llmpar_status llmpar__plan_step(llmpar_mesh *mesh, llmpar_llama *model, const llmpar_trainer_desc *desc, const llmpar__recipe_blocks *blocks, llmpar_memory *out, llmpar_error *error)
{
    (void)mesh; (void)model; (void)desc; (void)blocks;
    memset(out, 0, sizeof *out);
    return llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "plan: this build leaves out the device that only counts (LLMPAR_NO_SIM)");
}

#endif

LLMPAR__PRIVATE_DEF llmpar_status llmpar__plan_needs(llmpar_mesh *mesh, llmpar_llama *model, const llmpar_trainer_desc *desc, const llmpar__recipe_blocks *blocks, llmpar_memory *out)
{
    LLMPAR__NO_ERROR(error);
    llmpar_status status = llmpar__plan_step(mesh, model, desc, blocks, out, &error);
    if (status == LLMPAR_ERR_ARGUMENT || status == LLMPAR_ERR_UNSUPPORTED || status == LLMPAR_ERR_MESH || status == LLMPAR_ERR_CONFIG || status == LLMPAR_ERR_SHAPE) return LLMPAR_OK;
    return status ? llmpar_fail(mesh->ctx, status, "%s", error.text) : LLMPAR_OK;
}

/* ---- fitting a limit ---- */

/* The largest rank's peak without a limit, the same number on every rank; 0 where the recipe is not allowed. */
static llmpar_status llmpar__plan_peak(llmpar_mesh *mesh, llmpar_llama *model, const llmpar_trainer_desc *desc, const llmpar__recipe_blocks *blocks, uint64_t *peak)
{
    llmpar_trainer_desc free_desc = *desc;
    llmpar_memory memory;
    free_desc.memory_limit = 0;
    llmpar_status status = llmpar__plan_needs(mesh, model, &free_desc, blocks, &memory);
    *peak = memory.step.peak_total;
    return status ? status : llmpar__comm_largest(mesh->ctx->comm, (int64_t *)peak, 1, "plan");
}

/* "--recompute full: 123456 bytes (9999 less)" for a policy that is not on yet and would save. */
static llmpar_status llmpar__plan_offer(llmpar_mesh *mesh, llmpar_llama *model, const llmpar_trainer_desc *other, uint64_t now, const char *name, llmpar__text *out)
{
    llmpar_trainer_desc desc = *other;
    llmpar__recipe_blocks blocks;
    uint64_t peak;
    LLMPAR__NO_ERROR(error);
    /* The user's own numbers are resolved already; what changed has to be allowed. */
    if (llmpar_trainer_desc_resolve(&desc, mesh, llmpar_llama_get_config(model), &error)) return LLMPAR_OK;
    llmpar__recipe_blocks_of(&desc, model, &blocks);
    llmpar_status status = llmpar__plan_peak(mesh, model, &desc, &blocks, &peak);
    if (status || peak == 0 || peak >= now) return status;
    llmpar__text_put(out, "%s%s: %llu (%llu less%s)", out->used ? ", " : "", name, (unsigned long long)peak, (unsigned long long)(now - peak), peak <= desc.memory_limit ? ", fits" : "");
    return LLMPAR_OK;
}

static llmpar_status llmpar__plan_offers(llmpar_mesh *mesh, llmpar_llama *model, const llmpar_trainer_desc *desc, uint64_t now, llmpar__text *out)
{
    static const char *const tiers[] = {"offload optimizer=file", "offload params=file", "offload grads=file", "offload activations=file"};
    llmpar_status status = LLMPAR_OK;
    llmpar_trainer_desc other;
    char accum[48];
#define LLMPAR__PLAN_OFFER(sensible, change, name) \
    other = *desc; \
    change; \
    if (!status && (sensible)) status = llmpar__plan_offer(mesh, model, &other, now, name, out);
    LLMPAR__PLAN_OFFER(desc->recompute == LLMPAR_RECOMPUTE_NONE, other.recompute = LLMPAR_RECOMPUTE_SELECTIVE, "recompute selective")
    LLMPAR__PLAN_OFFER(desc->recompute != LLMPAR_RECOMPUTE_AUTO && (desc->recompute != LLMPAR_RECOMPUTE_FULL || desc->recompute_every > 1), (other.recompute = LLMPAR_RECOMPUTE_FULL, other.recompute_every = 1), "recompute full")
    LLMPAR__PLAN_OFFER(desc->zero != LLMPAR_ZERO_3 && mesh->degree[LLMPAR_AXIS_DP_SHARD] > 1, other.zero = LLMPAR_ZERO_3, "zero 3")
    LLMPAR__PLAN_OFFER(mesh->degree[LLMPAR_AXIS_TP] > 1 && !desc->sequence_parallel && desc->seq_len % mesh->degree[LLMPAR_AXIS_TP] == 0, other.sequence_parallel = 1, "sp on")
    for (int state = 0; state < LLMPAR_STATE_COUNT; state++) {
        LLMPAR__PLAN_OFFER(desc->offload[state] == LLMPAR_TIER_DEVICE, other.offload[state] = LLMPAR_TIER_FILE, tiers[state])
    }
    snprintf(accum, sizeof accum, "grad-accum %d", 2 * (int)desc->grad_accum);
    LLMPAR__PLAN_OFFER(desc->batch % (2 * (int64_t)desc->grad_accum * mesh->dp_ranks) == 0, other.grad_accum *= 2, accum)
#undef LLMPAR__PLAN_OFFER
    return status;
}

/* As many blocks as have to, in the cheapest way: first selectively, then fully (and then all others selectively), found by halving: more blocks take less memory, but for the last ones, where what recomputing
   itself needs can be the peak. If nothing fits: the blocks with the smallest peak that was seen. */
static llmpar_status llmpar__plan_auto(llmpar_mesh *mesh, llmpar_llama *model, const llmpar_trainer_desc *desc, llmpar__recipe_blocks *blocks)
{
    int32_t all = llmpar__recipe_block_units(model);
    uint64_t least = UINT64_MAX;
    LLMPAR__ZEROED(llmpar__recipe_blocks, best);
    best.every = desc->recompute_every;
    for (int full = 0; full < 2; full++) {
        int32_t low = 0, high = all; /* the answer is in [low, high], if there is one */
        memset(blocks, 0, sizeof *blocks);
        blocks->every = desc->recompute_every;
        if (full) blocks->selective = all;
        for (;;) {
            int32_t middle = low + (high - low) / 2;
            uint64_t peak;
            if (full) blocks->full = middle;
            else blocks->selective = middle;
            llmpar_status status = llmpar__plan_peak(mesh, model, desc, blocks, &peak);
            if (status) return status;
            if (peak && peak < least) {
                least = peak;
                best = *blocks;
            }
            int fits = peak && peak <= desc->memory_limit;
            if (low == high && fits) return LLMPAR_OK;
            if (low == high) break;
            if (fits) high = middle;
            else low = middle + 1;
        }
    }
    *blocks = best;
    return LLMPAR_OK; /* nothing fits: the caller says so */
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__plan_fit(llmpar_mesh *mesh, llmpar_llama *model, const llmpar_trainer_desc *desc, llmpar__recipe_blocks *blocks)
{
    llmpar_ctx *ctx = mesh->ctx;
    llmpar_memory memory;
    LLMPAR__NO_ERROR(error);
    llmpar_status status = desc->recompute == LLMPAR_RECOMPUTE_AUTO ? llmpar__plan_auto(mesh, model, desc, blocks) : LLMPAR_OK;
    if (status) return status;
    llmpar_status mine = llmpar__plan_step(mesh, model, desc, blocks, &memory, &error);
    int64_t refused = mine != LLMPAR_OK;
    if (mine && (mine != LLMPAR_ERR_MEMORY || !memory.init.live_total)) return llmpar_fail(ctx, mine, "%s", error.text);
    status = llmpar__comm_largest(ctx->comm, &refused, 1, "plan"); /* all ranks refuse together */
    if (status || !refused) return status;
    char offers[900];
    llmpar__text out = llmpar__text_begin(offers, sizeof offers);
    uint64_t now;
    status = llmpar__plan_peak(mesh, model, desc, blocks, &now);
    if (!status) status = llmpar__plan_offers(mesh, model, desc, now, &out);
    if (status) return status;
    return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "memory limit %llu bytes a rank: a step takes %llu%s%s%s; %s", (unsigned long long)desc->memory_limit, (unsigned long long)now,
                       desc->recompute == LLMPAR_RECOMPUTE_AUTO ? ", whatever is recomputed" : "", out.used ? "; with " : "", offers, mine ? error.text : "this rank's part would fit");
}

LLMPAR_DEF llmpar_status llmpar_plan_memory(llmpar_mesh *mesh, llmpar_llama *model, const llmpar_trainer_desc *desc, llmpar_memory *out, llmpar_error *error)
{
    llmpar__recipe_blocks blocks;
    LLMPAR__NO_ERROR(wrong);
    memset(out, 0, sizeof *out);
    LLMPAR__NEED(mesh && model, NULL);
    if (!desc) return llmpar_fail(mesh->ctx, LLMPAR_ERR_ARGUMENT, "plan: no desc");
    llmpar_trainer_desc resolved = *desc;
    llmpar_status status = llmpar_trainer_desc_resolve(&resolved, mesh, llmpar_llama_get_config(model), &wrong);
    if (status) return llmpar_fail(mesh->ctx, status, "%s", wrong.text);
    llmpar__recipe_blocks_of(&resolved, model, &blocks);
    if (resolved.recompute == LLMPAR_RECOMPUTE_AUTO) status = llmpar__plan_auto(mesh, model, &resolved, &blocks);
    if (!status) status = llmpar__plan_step(mesh, model, &resolved, &blocks, out, &wrong);
    if (status == LLMPAR_ERR_MEMORY && error) *error = wrong;
    return status == LLMPAR_ERR_MEMORY || !status ? status : llmpar_fail(mesh->ctx, status, "%s", wrong.text);
}

#endif /* LLMPAR_NO_LLAMA, LLMPAR_NO_IO, LLMPAR_NO_TEXT */
