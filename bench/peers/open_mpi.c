/* One process of the MPI side of bench_comm.c, which starts it: mpirun -n 2 build/bench/peer_open_mpi FOLDER.
   Takes commands from FOLDER/rank and sleeps in between; rank 0 answers with seconds a call in FOLDER/ranks. */
#include <mpi.h>

#include "llmpar.h"
#include "../comm.h"

#include <fcntl.h>

static void peer_call(llmpar_ctx *ctx, const comm_command *c, float *send, float *recv)
{
    int n = ctx->world;
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.send = send;
    call.recv = recv;
    call.dtype = LLMPAR_F32;
    call.tag = "bench";
    call.count = (size_t)(c->op == COMM_ALL_REDUCE ? c->bytes / 4 : c->bytes / 4 / (uint64_t)n);
    int count = (int)call.count;
    if (c->who) {
        if ((c->op == COMM_ALL_REDUCE ? llmpar_all_reduce : c->op == COMM_ALL_GATHER ? llmpar_all_gather : llmpar_reduce_scatter)(ctx->comm, NULL, &call)) {
            fprintf(stderr, "peer_open_mpi: %s\n", ctx->error.text);
            MPI_Abort(MPI_COMM_WORLD, 1);
        }
    } else if (c->op == COMM_ALL_REDUCE) MPI_Allreduce(send, recv, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
    else if (c->op == COMM_ALL_GATHER) MPI_Allgather(send, count, MPI_FLOAT, recv, count, MPI_FLOAT, MPI_COMM_WORLD);
    else MPI_Reduce_scatter_block(send, recv, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
}

static llmpar_status peer_rank(llmpar_ctx *ctx, void *user)
{
    char path[200];
    comm_command c;
    float *send = NULL, *recv = NULL;
    snprintf(path, sizeof path, "%s/%d", (const char *)user, (int)ctx->rank);
    int commands = open(path, O_RDONLY);
    snprintf(path, sizeof path, "%s/%d", (const char *)user, (int)ctx->world);
    int replies = open(path, O_WRONLY);
    if (commands < 0 || replies < 0 || posix_memalign((void **)(void *)&send, 4096, COMM_MOST) || posix_memalign((void **)(void *)&recv, 4096, COMM_MOST)) return llmpar_fail(ctx, LLMPAR_ERR_IO, "peer_open_mpi: no pipes, or no memory");
    memset(send, 0, COMM_MOST);
    memset(recv, 0, COMM_MOST);
    while (read(commands, &c, sizeof c) == (ssize_t)sizeof c && !c.stop) {
        double seconds = 0, slowest;
        for (int i = 0; i < c.calls; i++) {
            comm_rewrite(send, comm_mine(c.op, (size_t)c.bytes, ctx->world), (float)(i + ctx->rank));
            MPI_Barrier(MPI_COMM_WORLD);
            double start = bench_now();
            peer_call(ctx, &c, send, recv);
            seconds += bench_now() - start;
        }
        seconds /= c.calls;
        MPI_Allreduce(&seconds, &slowest, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
        if (!ctx->rank && write(replies, &slowest, sizeof slowest) != (ssize_t)sizeof slowest) break;
    }
    free(send);
    free(recv);
    return LLMPAR_OK;
}

int main(int argc, char **argv)
{
    llmpar_launch_desc desc;
    llmpar_mpi_desc mpi;
    llmpar_error error;
    int provided;
    if (argc != 2) return 2;
    MPI_Init_thread(&argc, &argv, MPI_THREAD_SERIALIZED, &provided);
    memset(&desc, 0, sizeof desc);
    memset(&mpi, 0, sizeof mpi);
    mpi.unattended = 1; /* this program calls MPI itself while the ranks run */
    desc.mpi = &mpi;
    llmpar_status st = llmpar_launch(&desc, peer_rank, argv[1], &error);
    if (st) fprintf(stderr, "peer_open_mpi: %s\n", error.text);
    MPI_Finalize();
    return st != LLMPAR_OK;
}
