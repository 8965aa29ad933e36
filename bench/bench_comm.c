/* bench_comm: the collectives of the rank threads beside Open MPI's between as many processes, in one run; and llmpar's MPI communicator beside the same MPI's own functions.

   A reading: every rank rewrites its send buffer, all meet, and the call is timed on the rank where it takes longest; GB/s = size of the larger buffer / time. Readings of both sides take turns, so a machine
   that slows down slows both. The processes (peers/open_mpi.c) sleep in a pipe while the threads work, the threads while the processes do. Where mpirun or the peer program is missing the threads are measured alone. */
#include "llmpar.h"
#include "comm.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>

typedef struct comm_peer { char folder[64]; int command[2], reply, ranks; pid_t pid; } comm_peer;
typedef struct comm_bench { comm_peer *peer; bench_results *results; } comm_bench;

/* ---- the processes ---- */

static int peer_ask(comm_peer *peer, const comm_command *command, double *seconds)
{
    for (int i = 0; i < peer->ranks; i++)
        if (write(peer->command[i], command, sizeof *command) != (ssize_t)sizeof *command) return 0;
    struct pollfd wait;
    wait.fd = peer->reply;
    wait.events = POLLIN;
    for (int tries = 0; tries < 600; tries++) { /* a minute */
        int ready = poll(&wait, 1, 100);
        if (ready > 0) return read(peer->reply, seconds, sizeof *seconds) == (ssize_t)sizeof *seconds;
        if (waitpid(peer->pid, NULL, WNOHANG) == peer->pid) {
            peer->pid = 0;
            return 0;
        }
    }
    return 0;
}

static void peer_stop(comm_peer *peer)
{
    comm_command command;
    char path[100];
    memset(&command, 0, sizeof command);
    command.stop = 1;
    for (int i = 0; i < peer->ranks && peer->pid; i++)
        if (write(peer->command[i], &command, sizeof command) < 0) break;
    if (peer->pid) waitpid(peer->pid, NULL, 0);
    for (int i = 0; i <= peer->ranks; i++) {
        snprintf(path, sizeof path, "%s/%d", peer->folder, i);
        unlink(path);
    }
    rmdir(peer->folder);
}

/* Pipes 0 .. ranks-1 carry commands, pipe `ranks` the seconds. Opened for both directions, so that nobody waits for the other side to open. */
static int peer_start(comm_peer *peer, const char *self, int ranks)
{
    char program[4096], path[100], number[16];
    const char *slash = strrchr(self, '/');
    comm_command command;
    double seconds;
    memset(peer, 0, sizeof *peer);
    snprintf(program, sizeof program, "%.*speer_open_mpi", slash ? (int)(slash - self + 1) : 0, self);
    if (access(program, X_OK) || ranks != 2 || system("command -v mpirun >/dev/null 2>&1")) return 0;
    snprintf(peer->folder, sizeof peer->folder, "/tmp/bench_comm.XXXXXX");
    if (!mkdtemp(peer->folder)) return 0;
    peer->ranks = ranks;
    for (int i = 0; i <= ranks; i++) {
        snprintf(path, sizeof path, "%s/%d", peer->folder, i);
        if (mkfifo(path, 0600)) return 0;
        int file = open(path, O_RDWR | O_CLOEXEC);
        if (i < ranks) peer->command[i] = file;
        else peer->reply = file;
    }
    snprintf(number, sizeof number, "%d", ranks);
    peer->pid = fork();
    if (!peer->pid) {
        setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1);
        setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1);
        int nothing = open("/dev/null", O_RDONLY);
        dup2(nothing, 0);
        execlp("mpirun", "mpirun", "-n", number, program, peer->folder, (char *)NULL);
        _exit(127);
    }
    if (peer->pid < 0) peer->pid = 0;
    memset(&command, 0, sizeof command);
    command.op = COMM_ALL_REDUCE;
    command.bytes = 4;
    command.calls = 1;
    if (peer->pid && peer_ask(peer, &command, &seconds)) return 1;
    peer_stop(peer);
    return 0;
}

/* ---- the threads ---- */

/* Seconds a call of the slowest rank, the same on all. */
static llmpar_status comm_one(llmpar_ctx *ctx, int op, float *send, float *recv, size_t bytes, double *seconds)
{
    llmpar_collective call, slowest;
    int calls = comm_calls(bytes);
    size_t n = (size_t)ctx->world;
    double mine = 0;
    llmpar_status st = LLMPAR_OK;
    memset(&call, 0, sizeof call);
    memset(&slowest, 0, sizeof slowest);
    call.send = send;
    call.recv = recv;
    call.dtype = LLMPAR_F32;
    call.tag = "bench";
    call.count = op == COMM_ALL_REDUCE ? bytes / 4 : bytes / 4 / n;
    for (int i = 0; i < calls && !st; i++) {
        comm_rewrite(send, comm_mine(op, bytes, ctx->world), (float)(i + ctx->rank));
        st = llmpar_comm_barrier(ctx->comm, NULL, "bench");
        double start = bench_now();
        if (!st) st = (op == COMM_ALL_REDUCE ? llmpar_all_reduce : op == COMM_ALL_GATHER ? llmpar_all_gather : llmpar_reduce_scatter)(ctx->comm, NULL, &call);
        mine += bench_now() - start;
    }
    mine /= calls;
    slowest.send = &mine;
    slowest.recv = seconds;
    slowest.count = 1;
    slowest.dtype = LLMPAR_F64;
    slowest.op = LLMPAR_MAX;
    slowest.tag = "slowest";
    return st ? st : llmpar_all_reduce(ctx->comm, NULL, &slowest);
}

static double comm_bar(int op, size_t bytes)
{
    if (op == COMM_ALL_REDUCE) return bytes >= 16777216 ? 4 : bytes == 1048576 ? 1 : 0;
    if (op == COMM_ALL_GATHER) return bytes >= 16777216 ? 1.5 : 0;
    return 0;
}

static llmpar_status comm_rank(llmpar_ctx *ctx, void *user)
{
    comm_bench *bench = (comm_bench *)user;
    comm_peer *peer = bench->peer;
    double work[32], bound[33];
    float *send = NULL, *recv = NULL;
    llmpar_status st = LLMPAR_OK;
    if (posix_memalign((void **)(void *)&send, 4096, COMM_MOST) || posix_memalign((void **)(void *)&recv, 4096, COMM_MOST)) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "bench_comm: out of memory");
    memset(send, 0, COMM_MOST);
    memset(recv, 0, COMM_MOST);
    for (int op = 0; op < COMM_OPS && !st; op++)
        for (int s = 0; s < COMM_SIZES && !st; s++) {
            size_t bytes = comm_sizes[s];
            int rounds = comm_rounds(bytes);
            comm_command command;
            char name[80];
            memset(&command, 0, sizeof command);
            command.op = op;
            command.bytes = bytes;
            command.calls = comm_calls(bytes);
            if (op != COMM_ALL_REDUCE && bytes < 1024) continue;
            for (int r = -1; r <= rounds && !st; r++) { /* bound, work, bound, .., bound; the first of each is not counted */
                double seconds = 1, theirs = 1;
                if (r < rounds) st = comm_one(ctx, op, send, recv, bytes, &seconds);
                if (!ctx->rank && peer && !peer_ask(peer, &command, &theirs)) st = llmpar_fail(ctx, LLMPAR_ERR_INTERNAL, "bench_comm: the processes do not answer");
                if (r < rounds && r >= 0) work[r] = (double)bytes / seconds;
                bound[r + 1] = (double)bytes / theirs;
                if (!st) st = llmpar_comm_barrier(ctx->comm, NULL, "turn");
            }
            if (ctx->rank || st) continue;
            snprintf(name, sizeof name, "%s, %s, %d threads", comm_op_names[op], comm_size_names[s], (int)ctx->world);
            if (peer) bench_row(bench->results, name, "GB/s", 1e-9, "Open MPI", bench_pairs_of(work, bound, rounds), comm_bar(op, bytes));
            else bench_value(bench->results, name, "GB/s", 1e-9 * bench_median(work, rounds));
            if (bytes > 4) continue;
            double us = 1e6 * (double)bytes / (peer ? bench->results->lines[bench->results->count - 1].value * 1e9 : bench_median(work, rounds)), most = 3;
            bench_ratio limit;
            memset(&limit, 0, sizeof limit);
            limit.work = us;
            limit.bound = most;
            limit.ratio = limit.good = limit.bad = us / most;
            snprintf(name, sizeof name, "%s, %s, %d threads, time", comm_op_names[op], comm_size_names[s], (int)ctx->world);
            bench_row(bench->results, name, "us", 1, "3 us", limit, -1);
        }
    /* The same MPI's own functions beside llmpar's communicator on it. */
    for (int op = COMM_ALL_GATHER; op < COMM_OPS && !st && peer && !ctx->rank; op++)
        for (int s = 0; s < COMM_SIZES && !st; s++) {
            size_t bytes = comm_sizes[s];
            int rounds = comm_rounds(bytes);
            comm_command command;
            char name[80];
            memset(&command, 0, sizeof command);
            command.op = op;
            command.bytes = bytes;
            command.calls = comm_calls(bytes);
            if (bytes < 65536) continue;
            for (int r = -1; r <= rounds && !st; r++) {
                double seconds = 1, theirs = 1;
                command.who = 1;
                if (r < rounds && !peer_ask(peer, &command, &seconds)) st = llmpar_fail(ctx, LLMPAR_ERR_INTERNAL, "bench_comm: the processes do not answer");
                command.who = 0;
                if (!st && !peer_ask(peer, &command, &theirs)) st = llmpar_fail(ctx, LLMPAR_ERR_INTERNAL, "bench_comm: the processes do not answer");
                if (r < rounds && r >= 0) work[r] = (double)bytes / seconds;
                bound[r + 1] = (double)bytes / theirs;
            }
            snprintf(name, sizeof name, "%s, %s, 2 MPI processes", comm_op_names[op], comm_size_names[s]);
            if (!st) bench_row(bench->results, name, "GB/s", 1e-9, op == COMM_ALL_GATHER ? "MPI_Allgather" : "MPI_Reduce_scatter_block", bench_pairs_of(work, bound, rounds), op == COMM_ALL_GATHER ? 0.9 : 0.8);
        }
    if (!st) st = llmpar_comm_barrier(ctx->comm, NULL, "end");
    free(send);
    free(recv);
    return st;
}

static const char usage[] =
    "bench_comm [--json FILE] [--ranks N] [--own]\n"
    "Collectives between rank threads, beside Open MPI's between processes where there is one.\n"
    "  --json FILE   the table as JSON, too\n"
    "  --ranks N     2 .. 64 (default 2)\n"
    "  --own         rank threads alone\n";

int main(int argc, char **argv)
{
    bench_results results;
    comm_bench bench;
    comm_peer peer;
    llmpar_launch_desc desc;
    llmpar_error error;
    int own = 0, ranks = 2;
    bench_open(&results, "comm", &argc, argv, usage, -1);
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--own")) own = 1;
        else if (!strcmp(argv[i], "--ranks")) {
            i++;
            ranks = (int)bench_number("--ranks", i < argc ? argv[i] : "", 2, 64);
        } else bench_refuse("argument", argv[i], "--ranks, --own or --json");
    }
    signal(SIGPIPE, SIG_IGN);
    bench.results = &results;
    bench.peer = !own && peer_start(&peer, argv[0], ranks) ? &peer : NULL;
    if (!bench.peer && !own && ranks == 2) printf("  Open MPI: skipped (no mpirun, or build/bench/peer_open_mpi was not built: it needs mpicc)\n");
    memset(&desc, 0, sizeof desc);
    desc.ranks = ranks;
    desc.transport = LLMPAR_TRANSPORT_THREADS;
    llmpar_status st = llmpar_launch(&desc, comm_rank, &bench, &error);
    if (bench.peer) peer_stop(&peer);
    if (st) {
        fprintf(stderr, "bench_comm: %s\n", error.text);
        return 1;
    }
    bench_close(&results);
    return 0;
}
