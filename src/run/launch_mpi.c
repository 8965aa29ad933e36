/* launch_mpi: this process as one rank of an MPI job, on the caller's thread:
     MPI initialised, if nobody has -> world -> heap, CPU device, communicator -> lowest dispatch level, what the backend makes, agreement -> fn -> failure told to all -> all have ended -> MPI finalised, if it was initialised here
   A rank that cannot even start takes part up to the first collective, so that the others hear why. */
#include "run/launch_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tables/device.h"

#ifdef LLMPAR_USE_MPI

#include <mpi.h>

/* Started by mpirun, mpiexec or srun? */
static int llmpar__launch_under_mpirun(void)
{
    static const char *const names[] = { "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_SIZE" };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (getenv(names[i])) return 1;
    return 0;
}

/* The CPU device and MPI's communicator on it, at a dispatch level. */
static llmpar_status llmpar__launch_host(llmpar_ctx *ctx, llmpar_mpi_world *world, const llmpar_launch_desc *desc, llmpar_cpu_level level)
{
    LLMPAR__ZEROED(llmpar_cpu_desc, cpu);
    cpu.threads = desc->threads;
    cpu.crowded = desc->threads > llmpar_mpi_world_threads(world);
    cpu.level = level;
    llmpar_status st = llmpar_cpu_create(&ctx->heap, &ctx->error, &cpu, &ctx->host);
    return st ? st : llmpar_mpi_comm_create(world, ctx->host, &ctx->error, &ctx->host_comm);
}

/* The lowest dispatch level of all ranks: machines of a job may differ. */
static llmpar_status llmpar__launch_level(llmpar_ctx *ctx, llmpar_mpi_world *world, const llmpar_launch_desc *desc, llmpar_cpu_level level)
{
    llmpar_status st = llmpar__launch_host(ctx, world, desc, level);
    if (st || ctx->world == 1) return st;
    int64_t most = -(int64_t)level;
    st = llmpar__comm_largest(ctx->host_comm, &most, 1, "launch/level");
    if (st || most == -(int64_t)level) return st;
    llmpar__launch_clear(ctx, NULL);
    return llmpar__launch_host(ctx, world, desc, (llmpar_cpu_level)-most);
}

/* ctx->local_rank: the launcher's word, else the number of lower ranks on machines of this name. */
static llmpar_status llmpar__launch_local_mpi(llmpar_ctx *ctx)
{
    char name[256] = "";
    uint64_t mine[2] = { 0xcbf29ce484222325u, 0 };
    int32_t local = 0, lower = 0;
    int given = llmpar__launch_local(&local, &ctx->error);
    if (given < 0) return ctx->error.status;
    gethostname(name, sizeof name - 1);
    for (const char *p = name; *p; p++) mine[0] = (mine[0] ^ (unsigned char)*p) * 0x100000001b3u;
    uint64_t *all = (uint64_t *)llmpar_heap_zalloc(&ctx->heap, (size_t)ctx->world, sizeof mine);
    if (!all) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "launch: out of memory for %d ranks", (int)ctx->world);
    llmpar_collective call = llmpar__comm_collective(mine, all, 2, LLMPAR_U64, "launch/machines");
    llmpar_status st = llmpar__comm_talk(ctx->host_comm, LLMPAR_CALL_ALL_GATHER, &call);
    for (int32_t i = 0; i < ctx->rank && !st; i++) lower += all[2 * (size_t)i] == mine[0];
    ctx->local_rank = given ? local : lower;
    llmpar_heap_free(&ctx->heap, all);
    return st;
}

static llmpar_status llmpar__launch_process(llmpar_ctx *ctx, llmpar_mpi_world *world, const llmpar_launch_desc *desc, llmpar_cpu_level level, llmpar_rank_fn fn, void *user)
{
    if (desc->ranks && desc->ranks != ctx->world)
        return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "launch: ranks = %d, but there are %d MPI processes (mpirun -n %d, or another mesh)", (int)desc->ranks, (int)ctx->world, (int)desc->ranks);
    if (desc->lockstep && ctx->world > 1) return llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "launch: lockstep is for ranks that are threads, not for MPI processes");
    if (desc->pin == LLMPAR_PIN_ON) return llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "launch: pin = on is for ranks that are threads; MPI processes are bound by mpirun (--bind-to core)");
    if (desc->threads > 1 && !llmpar_mpi_world_serialized(world))
        return llmpar_fail(ctx, LLMPAR_ERR_CONFIG, "launch: threads = %d inside a rank, but MPI provides less than MPI_THREAD_SERIALIZED here or on another rank, which leaves a process one thread: ask MPI_Init_thread for it, or use threads = 1",
                           (int)desc->threads);
    llmpar_status st = llmpar__launch_level(ctx, world, desc, level);
    if (!st) st = llmpar__launch_local_mpi(ctx);
    if (!st) st = llmpar__launch_furnish(ctx, desc->backend);
    if (!st) st = llmpar__launch_agree(ctx);
    return st ? st : fn(ctx, user);
}

/* Runs the rank in an existing world. 1: all ranks have ended in order. */
static int llmpar__launch_rank_of(llmpar_ctx *ctx, llmpar_mpi_world *world, const llmpar_launch_desc *desc, llmpar_cpu_level level, llmpar_status st, llmpar_rank_fn fn, void *user, llmpar_error *root)
{
    ctx->error.rank = ctx->rank;
    if (!st) st = llmpar__launch_process(ctx, world, desc, level, fn, user);
    if (st) {
        llmpar_error error;
        llmpar__launch_failure(ctx, st, &error);
        llmpar_error known = error;
        if (llmpar__launch_root(ctx, desc->backend, &known)) llmpar_mpi_world_fail(world, &known);
        else if (st != LLMPAR_ERR_PEER && ctx->error.status != LLMPAR_ERR_PEER) llmpar_mpi_world_fail(world, &error); /* another rank's failure by another name is still the other rank's */
        if (st != LLMPAR_ERR_PEER) llmpar__launch_abort(ctx, &error);
        llmpar__launch_dump(desc->record, ctx);
        llmpar_mpi_world_error(world, root);
        int plain = root->status != LLMPAR_ERR_TIMEOUT && root->status != LLMPAR_ERR_MISMATCH; /* as among threads: an error that says itself what was wrong */
        int late = root->status == LLMPAR_ERR_TIMEOUT; /* the root's own report too: another survivor may end the job before launch returns here */
        if ((root->rank != ctx->rank || late) && error.text[0]) llmpar_log(ctx, plain ? LLMPAR_LOG_INFO : LLMPAR_LOG_ERROR, "%s%s%s%s", error.where[0] ? "(" : "", error.where, error.where[0] ? ") " : "", error.text);
    }
    int orderly = llmpar_mpi_world_finish(world, 0, root);
    llmpar__launch_clear(ctx, desc->backend);
    return orderly;
}

LLMPAR__PRIVATE_DEF int llmpar__launch_mpi(const llmpar_launch_desc *given, llmpar_rank_fn fn, void *user, llmpar_error *error)
{
    int there = 0, over = 0, owned, provided = 0, orderly = 1;
    MPI_Initialized(&there);
    MPI_Finalized(&over);
    llmpar_transport transport = given ? given->transport : LLMPAR_TRANSPORT_DEFAULT;
    if (given && given->mpi && transport == LLMPAR_TRANSPORT_DEFAULT) transport = LLMPAR_TRANSPORT_MPI;
    if (transport == LLMPAR_TRANSPORT_THREADS || (transport == LLMPAR_TRANSPORT_DEFAULT && !there && !llmpar__launch_under_mpirun())) return 0;
    owned = !there && !(given && given->mpi && given->mpi->comm); /* with a communicator MPI has to be there: world_create says so */
    if (owned) MPI_Init_thread(NULL, NULL, MPI_THREAD_SERIALIZED, &provided);

    llmpar_cpu_level level = LLMPAR_CPU_DEFAULT;
    llmpar_mpi_world *world = NULL;
    LLMPAR__ZEROED(llmpar_ctx, ctx);
    LLMPAR__ZEROED(llmpar_mpi_desc, mpi);
    LLMPAR__ZEROED(llmpar_launch_desc, desc);
    if (given) desc = *given;
    if (desc.mpi) mpi = *desc.mpi;
    llmpar_error_clear(&ctx.error);
    llmpar_heap_init(&ctx.heap, desc.allocator);
    llmpar_status st = llmpar__launch_resolve(&desc, &level, &ctx.error);
    mpi.deadline = !st && desc.deadline > 0 ? desc.deadline : 0;
    mpi.unchecked = desc.unchecked;
    ctx.log = desc.log;
    ctx.log_user = desc.log_user;
    ctx.io = desc.io;
    if (!llmpar_mpi_world_create(&ctx.heap, &mpi, &world, error)) {
        uint64_t state = llmpar__float_state(LLMPAR__FLOAT_STATE);
        ctx.rank = llmpar_mpi_world_rank(world);
        ctx.world = llmpar_mpi_world_ranks(world);
        if (!desc.threads) desc.threads = llmpar_mpi_world_threads(world);
        orderly = llmpar__launch_rank_of(&ctx, world, &desc, level, st, fn, user, error);
        llmpar__float_state(state);
        llmpar_mpi_world_destroy(world);
        if (desc.check) desc.check(&ctx, user);
    }
    if (owned && orderly) MPI_Finalize();
    if (owned && !orderly) {
        llmpar_log(&ctx, LLMPAR_LOG_ERROR, "the job ends here: rank %d%s%s%s: %s", (int)error->rank, error->where[0] ? " (" : "", error->where, error->where[0] ? ")" : "", error->text);
        MPI_Abort(MPI_COMM_WORLD, 1);
    }
    return 1;
}

#else

LLMPAR__PRIVATE_DEF int llmpar__launch_mpi(const llmpar_launch_desc *given, llmpar_rank_fn fn, void *user, llmpar_error *error)
{
    (void)fn;
    (void)user;
    if (!given || (given->transport != LLMPAR_TRANSPORT_MPI && !given->mpi)) return 0;
    LLMPAR__LAUNCH_NO(LLMPAR_ERR_UNSUPPORTED, "ranks as MPI processes are asked for, but the implementation was compiled without LLMPAR_USE_MPI");
    return 1;
}

#endif /* LLMPAR_USE_MPI */
