/* What the collectives of the rank threads cost: time of one call and bytes a second, 2 and 4 ranks, 4 bytes to 64 MB.

     make build/bench/bench_comm && build/bench/bench_comm [ranks]

   GB/s = size of the result on one rank / time of the slowest rank. Each size runs 9 times; the best is printed (what the machine can do when
   nothing else runs) and, in brackets, the median; memcpy by one thread beside it. Ranks beyond the processors share them: 4 ranks on 2 processors cannot be as fast. */
#define _DEFAULT_SOURCE 1
#include "llmpar.h"
#include "bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { ROUNDS = 9, SIZES = 10 };
static const size_t bench_sizes[SIZES] = { 4, 64, 1024, 4096, 16384, 65536, 1048576, 4194304, 16777216, 67108864 };

typedef llmpar_status (*bench_collective)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);

/* Seconds a call: the best round and the median one; the same on all ranks. */
static llmpar_status bench_one(llmpar_ctx *ctx, bench_collective collective, const llmpar_collective *call, size_t bytes, double seconds[2])
{
    int calls = bytes < 65536 ? 500 : bytes < 4194304 ? 20 : bytes < 67108864 ? 4 : 1;
    double round[ROUNDS];
    llmpar_status st = collective(ctx->comm, NULL, call);
    for (int r = 0; r < ROUNDS && !st; r++) {
        st = llmpar_comm_barrier(ctx->comm, NULL, "bench");
        double start = bench_now(), mine;
        for (int i = 0; i < calls && !st; i++) st = collective(ctx->comm, NULL, call);
        mine = (bench_now() - start) / calls;
        llmpar_collective slowest;
        memset(&slowest, 0, sizeof slowest);
        slowest.send = &mine;
        slowest.recv = &round[r];
        slowest.count = 1;
        slowest.dtype = LLMPAR_F64;
        slowest.op = LLMPAR_MAX;
        if (!st) st = llmpar_all_reduce(ctx->comm, NULL, &slowest);
    }
    qsort(round, ROUNDS, sizeof round[0], bench_compare);
    seconds[0] = round[0];
    seconds[1] = round[ROUNDS / 2];
    return st;
}

static llmpar_status bench_rank(llmpar_ctx *ctx, void *user)
{
    size_t most = bench_sizes[SIZES - 1], n = (size_t)ctx->world;
    char *send = (char *)malloc(most), *recv = (char *)malloc(most);
    llmpar_status st = LLMPAR_OK;
    (void)user;
    memset(send, 0, most);
    memset(recv, 0, most);
    if (ctx->rank == 0) printf("%d ranks\n%10s%33s%33s%33s%15s\n", (int)n, "bytes", "all_reduce f32", "reduce_scatter f32", "all_gather", "memcpy");
    for (int s = 0; s < SIZES && !st; s++) {
        size_t bytes = bench_sizes[s], part = bytes / 4 / n;
        double reduce[2] = { 0, 0 }, scatter[2] = { 0, 0 }, gather[2] = { 0, 0 };
        llmpar_collective call;
        memset(&call, 0, sizeof call);
        call.send = send;
        call.recv = recv;
        call.dtype = LLMPAR_F32;
        call.tag = "bench";
        call.count = bytes / 4;
        st = bench_one(ctx, llmpar_all_reduce, &call, bytes, reduce);
        call.count = part;
        if (!st && part) st = bench_one(ctx, llmpar_reduce_scatter, &call, bytes, scatter);
        if (!st && part) st = bench_one(ctx, llmpar_all_gather, &call, bytes, gather);
        if (ctx->rank || st) continue;
        double start = bench_now();
        int copies = bytes < 65536 ? 1000 : 3;
        for (int i = 0; i < copies; i++) {
            memcpy(recv, send, bytes);
            __asm__ __volatile__("" : : "r"(recv) : "memory");
        }
        double copy = (bench_now() - start) / copies;
        const double *const column[3] = { reduce, scatter, gather };
        printf("%10lu", (unsigned long)bytes);
        for (int c = 0; c < 3; c++)
            if (column[c][0] > 0) printf("%11.2f us %6.2f (%.2f) GB/s", 1e6 * column[c][0], 1e-9 * (double)bytes / column[c][0], 1e-9 * (double)bytes / column[c][1]);
            else printf("%33s", "");
        printf(" %9.2f GB/s\n", 1e-9 * (double)bytes / copy);
        fflush(stdout);
    }
    free(send);
    free(recv);
    return st;
}

int main(int argc, char **argv)
{
    int first = argc > 1 ? atoi(argv[1]) : 2, last = argc > 1 ? first : 4;
    for (int ranks = first; ranks <= last; ranks += 2) {
        llmpar_launch_desc desc;
        llmpar_error error;
        memset(&desc, 0, sizeof desc);
        desc.ranks = ranks;
        if (llmpar_launch(&desc, bench_rank, NULL, &error)) {
            fprintf(stderr, "bench_comm: %s\n", error.text);
            return 1;
        }
    }
    return 0;
}
