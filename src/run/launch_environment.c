/* launch_environment: this process as one rank of a job that torchrun or a like launcher has started, on the caller's thread:
     RANK, WORLD_SIZE .. -> heap, CPU device -> the backend's device and communicator -> agreement -> fn -> failure told through the communicator -> all have ended, or one has failed -> all destroyed
   Nothing connects the processes but the backend's communicator, which meets at MASTER_ADDR:MASTER_PORT. And what the environment says to any process: which of its machine's ranks is it? */
#include "run/launch_internal.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/processors_internal.h"

#define LLMPAR__LAUNCH_MEETING 264

/* ---- what launchers put into the environment ---- */

LLMPAR__PRIVATE_DEF int llmpar__launch_variable(const char *name, int32_t least, int32_t most, int32_t *out, llmpar_error *error)
{
    const char *text = getenv(name);
    int64_t value = 0;
    size_t digits = 0;
    if (!text) return 0;
    while (digits < 10 && text[digits] >= '0' && text[digits] <= '9') value = value * 10 + (text[digits++] - '0');
    if (!digits || text[digits] || value < least || value > most) {
        LLMPAR__LAUNCH_NO(LLMPAR_ERR_CONFIG, "the environment has %s = \"%.40s\", expected a number from %d to %d", name, text, (int)least, (int)most);
        return -1;
    }
    *out = (int32_t)value;
    return 1;
}

LLMPAR__PRIVATE_DEF int llmpar__launch_local(int32_t *out, llmpar_error *error)
{
    static const char *const names[] = { "LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID" };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        int there = llmpar__launch_variable(names[i], 0, INT32_MAX, out, error);
        if (there) return there;
    }
    return 0;
}

/* ---- a rank of the environment ---- */

/* The rank's place by the environment, strictly. */
static llmpar_status llmpar__launch_place(llmpar_ctx *ctx, const llmpar_launch_desc *desc, int32_t *locals, llmpar_error *error)
{
    int32_t world = 0, rank = 0, local = 0;
    int has_world = llmpar__launch_variable("WORLD_SIZE", 1, 1 << 20, &world, error);
    int has_rank = has_world < 0 ? -1 : llmpar__launch_variable("RANK", 0, has_world ? world - 1 : INT32_MAX, &rank, error);
    if (has_world < 0 || has_rank < 0) return error->status;
    if (!has_world || !has_rank)
        return LLMPAR__LAUNCH_NO(LLMPAR_ERR_CONFIG, "ranks by the environment are asked for, but %s is not there, expected RANK, WORLD_SIZE and LOCAL_RANK of torchrun or a like launcher", has_world ? "RANK" : "WORLD_SIZE");
    int has_locals = llmpar__launch_variable("LOCAL_WORLD_SIZE", 1, world, locals, error);
    int has_local = has_locals < 0 ? -1 : llmpar__launch_local(&local, error);
    if (has_locals < 0 || has_local < 0) return error->status;
    if (has_locals && has_local && local >= *locals)
        return LLMPAR__LAUNCH_NO(LLMPAR_ERR_CONFIG, "the environment has LOCAL_RANK = %d, expected a number below LOCAL_WORLD_SIZE = %d", (int)local, (int)*locals);
    if (!has_locals) *locals = world;
    ctx->rank = rank;
    ctx->world = world;
    ctx->local_rank = has_local ? local : has_locals ? rank % *locals : rank;
    if (desc->ranks && desc->ranks != world) return LLMPAR__LAUNCH_NO(LLMPAR_ERR_ARGUMENT, "ranks = %d, but the environment has WORLD_SIZE = %d", (int)desc->ranks, (int)world);
    return LLMPAR_OK;
}

/* "host:port" of where the ranks meet, in meeting[LLMPAR__LAUNCH_MEETING]; "": the environment does not say, and the backend has to know. */
static llmpar_status llmpar__launch_meeting(char *meeting, llmpar_error *error)
{
    const char *host = getenv("MASTER_ADDR");
    int32_t port = 0;
    int has_port = llmpar__launch_variable("MASTER_PORT", 1, 65535, &port, error);
    meeting[0] = 0;
    if (has_port < 0) return error->status;
    if (!host && !has_port) return LLMPAR_OK;
    if (!host || !host[0] || !has_port) return LLMPAR__LAUNCH_NO(LLMPAR_ERR_CONFIG, "the environment has %s without %s, expected both or neither", has_port ? "MASTER_PORT" : "MASTER_ADDR", has_port ? "MASTER_ADDR" : "MASTER_PORT");
    if (strlen(host) > LLMPAR__LAUNCH_MEETING - 8) return LLMPAR__LAUNCH_NO(LLMPAR_ERR_CONFIG, "the environment has a MASTER_ADDR of %lu bytes, expected at most %d", (unsigned long)strlen(host), LLMPAR__LAUNCH_MEETING - 8);
    snprintf(meeting, LLMPAR__LAUNCH_MEETING, "%s:%d", host, (int)port);
    return LLMPAR_OK;
}

static llmpar_status llmpar__launch_refuse(const llmpar_launch_desc *desc, llmpar_error *error)
{
    if (desc->mpi) return LLMPAR__LAUNCH_NO(LLMPAR_ERR_ARGUMENT, "ranks by the environment and a desc for MPI, expected one of them");
    if (desc->lockstep) return LLMPAR__LAUNCH_NO(LLMPAR_ERR_UNSUPPORTED, "lockstep is for ranks that are threads, not for processes of the environment");
    if (desc->pin == LLMPAR_PIN_ON) return LLMPAR__LAUNCH_NO(LLMPAR_ERR_UNSUPPORTED, "pin = on is for ranks that are threads; processes are bound by their launcher");
    if (!desc->backend || !desc->backend->comm_create)
        return LLMPAR__LAUNCH_NO(LLMPAR_ERR_CONFIG, "ranks by the environment need a backend with a communicator (comm_create: llmpar_nccl_backend); %s", desc->backend ? "this backend has none" : "there is no backend");
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__launch_environment(const llmpar_launch_desc *given, llmpar_rank_fn fn, void *user, llmpar_error *error)
{
    llmpar_launch_desc desc = *given;
    llmpar_cpu_level level = LLMPAR_CPU_DEFAULT;
    int32_t locals = 1;
    char meeting[LLMPAR__LAUNCH_MEETING];
    LLMPAR__ZEROED(llmpar_ctx, ctx);
    LLMPAR__ZEROED(llmpar_cpu_desc, cpu);
    llmpar_error_clear(&ctx.error);
    llmpar_status st = llmpar__launch_resolve(&desc, &level, error);
    if (!st) st = llmpar__launch_refuse(&desc, error);
    if (!st) st = llmpar__launch_place(&ctx, &desc, &locals, error);
    if (!st) st = llmpar__launch_meeting(meeting, error);
    if (st) return st;
    llmpar_heap_init(&ctx.heap, desc.allocator);
    ctx.error.rank = ctx.rank;
    ctx.log = desc.log;
    ctx.log_user = desc.log_user;
    ctx.io = desc.io;
    ctx.meeting = meeting[0] ? meeting : NULL;
    llmpar__processors allowed;
    llmpar__processors_allowed(&allowed);
    cpu.threads = desc.threads ? desc.threads : llmpar__processors_share(llmpar__processors_cores(&allowed, NULL), locals);
    cpu.crowded = (int64_t)cpu.threads * locals > allowed.count;
    cpu.level = level;

    uint64_t state = llmpar__float_state(LLMPAR__FLOAT_STATE);
    st = llmpar_cpu_create(&ctx.heap, &ctx.error, &cpu, &ctx.host);
    st = st ? llmpar__launch_absent(&ctx, desc.backend, st) : llmpar__launch_furnish(&ctx, desc.backend);
    if (!st) st = llmpar__launch_agree(&ctx);
    if (!st) st = fn(&ctx, user);
    if (st) {
        llmpar__launch_failure(&ctx, st, error);
        if (ctx.error.rank >= 0) error->rank = ctx.error.rank; /* where the ranks met, the one that they could not meet for */
        if (st != LLMPAR_ERR_PEER) llmpar__launch_abort(&ctx, error);
        llmpar__launch_dump(desc.record, &ctx);
    }
    if (ctx.comm && desc.backend->comm_finish) {
        LLMPAR__NO_ERROR(root);
        desc.backend->comm_finish(desc.backend->comm_user, ctx.comm, &root);
        if (root.status) *error = root;
    }
    llmpar__launch_clear(&ctx, desc.backend);
    llmpar__float_state(state);
    ctx.meeting = NULL;
    if (desc.check) desc.check(&ctx, user);
    return error->status;
}

#undef LLMPAR__LAUNCH_MEETING
