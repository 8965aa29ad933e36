/* faults: what a job says when one rank fails, calls something else, or stays away.

   Four ranks on a 2 x 2 mesh make the same few collectives; at the third round the culprit does what --fault says. Every rank that survives prints its own error (it names who is where), and the
   program prints the job's: the root one.

     cc -O2 -I. examples/faults.c -o build/faults -lpthread -lm          (or: make build/faults)
     build/faults --fault count                                          (or under mpirun -n 4, where it was built with MPI) */
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common/options.h"

static const char *usage =
    "usage: faults --fault WORD [options]\n"
    "  --fault WORD   none; error: the culprit returns an error; return: it returns as if all was well; late: it stays away for twice the deadline;\n"
    "                 op, count, dtype, tag, order, missing: it calls something else than the others, or leaves a call out\n"
    "  --rank N       the culprit, 0 .. 3 (default 2)\n"
    "  --deadline X   seconds that a collective waits for the others (default 1)\n"
    "  --record DIR   ranks that fail write their last collectives there, as JSON\n";

enum { NONE, ERROR, RETURN, LATE, OP, COUNT, DTYPE, TAG, ORDER, MISSING, FAULTS };
static const char *const words[FAULTS] = { "none", "error", "return", "late", "op", "count", "dtype", "tag", "order", "missing" };

typedef struct job { int fault; long culprit; double deadline; char said[4][2048]; } job;

/* One round: a sum over tp, a gather over dp_shard, a barrier of all. `fault` is what this rank does about it. */
static llmpar_status step(llmpar_mesh *mesh, int round, int fault)
{
    double part[16] = { 0 }, sum[16], all[16];
    char tag[2][32];
    llmpar_collective reduce, gather;
    llmpar_comm *tp = mesh->comm[LLMPAR_AXIS_TP], *dp = mesh->comm[LLMPAR_AXIS_DP_SHARD];
    llmpar_status st = LLMPAR_OK;

    memset(&reduce, 0, sizeof reduce);
    memset(&gather, 0, sizeof gather);
    snprintf(tag[0], sizeof tag[0], "layers.%d.mlp", round);
    snprintf(tag[1], sizeof tag[1], "layers.%d/gather", round);
    reduce.send = gather.send = part;
    reduce.recv = sum;
    gather.recv = all;
    reduce.count = gather.count = fault == COUNT ? 4 : 8;
    reduce.dtype = gather.dtype = LLMPAR_F32;
    reduce.tag = fault == TAG ? "layers.9.mlp" : tag[0];
    gather.tag = tag[1];
    if (fault == DTYPE) {
        reduce.dtype = LLMPAR_F64;
        reduce.count = 4;
    }
    if (fault == ORDER) { /* the two collectives exchanged */
        st = llmpar_all_gather(dp, NULL, &gather);
        return st ? st : llmpar_all_reduce(tp, NULL, &reduce);
    }
    if (fault == OP) st = llmpar_reduce_scatter(tp, NULL, &reduce);
    else if (fault != MISSING) st = llmpar_all_reduce(tp, NULL, &reduce);
    if (!st) st = llmpar_all_gather(dp, NULL, &gather);
    return st ? st : llmpar_comm_barrier(mesh->world, NULL, "end of step");
}

/* The ranks' errors are printed in order, by main. */
static void quiet(void *user, int rank, llmpar_log_level level, const char *line) { (void)user; (void)rank; (void)level; (void)line; }

/* One statement a line. */
static void say(const char *text)
{
    for (; *text; text++) {
        if (*text != ';') putchar(*text);
        else fputs(";\n       ", stdout);
    }
    putchar('\n');
}

static llmpar_status run(llmpar_ctx *ctx, void *user) /* every rank */
{
    job *j = (job *)user;
    llmpar_mesh_desc desc;
    llmpar_mesh *mesh = NULL;
    llmpar_status st;

    memset(&desc, 0, sizeof desc);
    desc.dp_shard = desc.tp = 2;
    st = llmpar_mesh_create(ctx, &desc, &mesh);
    for (int round = 0; !st && round < 4; round++) {
        int fault = round == 2 && ctx->rank == j->culprit ? j->fault : NONE;
        if (fault == RETURN) break;
        if (fault == ERROR) {
            st = llmpar_fail(ctx, LLMPAR_ERR_IO, "cannot read part 7 of the data");
            break;
        }
        if (fault == LATE) {
            struct timespec away = { (time_t)(2 * j->deadline), 0 };
            nanosleep(&away, NULL);
        }
        st = step(mesh, round, fault);
    }
    if (st) snprintf(j->said[ctx->rank], sizeof j->said[0], "%s", llmpar_last_error(ctx));
    llmpar_mesh_destroy(mesh);
    return st;
}

int main(int argc, char **argv)
{
    static const struct option list[] = { { "fault", 1, NULL, 'f' }, { "rank", 1, NULL, 'r' }, { "deadline", 1, NULL, 'd' }, { "record", 1, NULL, 'o' }, { "help", 0, NULL, 'h' }, { NULL, 0, NULL, 0 } };
    static job j; /* zero */
    llmpar_launch_desc desc;
    llmpar_error error;
    llmpar_status status;
    int option;

    memset(&desc, 0, sizeof desc);
    desc.ranks = 4;
    desc.log = quiet; /* else every rank's error goes to stderr as well */
    j.culprit = 2;
    j.deadline = 1;
    while ((option = getopt_long(argc, argv, "", list, NULL)) != -1) {
        int bad = 0;
        switch (option) {
        case 'f': bad = option_word("--fault", optarg, words, FAULTS, &j.fault); break;
        case 'r': bad = option_long("--rank", optarg, 0, 3, &j.culprit); break;
        case 'd': bad = option_double("--deadline", optarg, 0.1, 60, &j.deadline); break;
        case 'o': desc.record = optarg; break;
        case 'h': fputs(usage, stdout); return 0;
        default: return 2;
        }
        if (bad) return bad;
    }
    if (optind < argc) return option_error("unexpected \"%s\"", argv[optind]);
    desc.deadline = j.deadline;
    status = llmpar_launch(&desc, run, &j, &error);
    for (int rank = 0; rank < 4; rank++) {
        if (!j.said[rank][0]) continue;
        printf("rank %d: ", rank);
        say(j.said[rank]);
    }
    if (!status) {
        puts("four rounds, and nobody complained");
        return 0;
    }
    printf("the job: %s, rank %d (%s): ", llmpar_status_string(status), (int)error.rank, error.where);
    say(error.text);
    return 1;
}
