/* One rank does what ranks should not, in the middle of work; run by tests/mpi.sh, which looks at what the others report:
     mpirun -n 4 test_mpi_fault HOW PLACE VICTIM DIRECTORY
   HOW: error (its function returns one), exit (exit code 3, no farewell), kill (SIGKILL), stop (SIGSTOP), loop (for ever); soak SECONDS: nothing, but delays of up to 2 s everywhere.
   LLMPAR_TEST_SLOW=2: with twice the time.
   PLACE: which collective, before or inside it; `test_mpi_fault places` prints their number. Every process writes DIRECTORY/rank_N: the seconds from the fault to its report, and the report. */
#include "test.h"

#include <signal.h>
#include <time.h>
#include <unistd.h>

typedef struct place { const char *op; int large, pair, inside; } place; /* pair: on the tp axis, else on the world; inside: when the first sum or copy of it is made */
static const place places[] = {
    {"barrier", 0, 0, 0},        {"all_gather", 0, 0, 0},     {"all_gather", 1, 0, 0},     {"all_gather", 1, 1, 0},     {"reduce_scatter", 0, 0, 0}, {"reduce_scatter", 1, 0, 0},
    {"reduce_scatter", 1, 1, 0}, {"all_reduce", 0, 0, 0},     {"all_reduce", 1, 0, 0},     {"all_reduce", 0, 1, 0},     {"all_reduce", 1, 1, 0},     {"broadcast", 0, 0, 0},
    {"broadcast", 1, 0, 0},      {"broadcast", 1, 1, 0},      {"all_to_all", 0, 0, 0},     {"all_to_all", 1, 0, 0},     {"all_to_all", 0, 1, 0},     {"send", 0, 1, 0},
    {"send", 1, 1, 0},           {"recv", 0, 1, 0},           {"recv", 1, 1, 0},           {"split", 0, 0, 0},          {"all_reduce", 1, 0, 1},     {"reduce_scatter", 1, 0, 1},
    {"all_gather", 1, 0, 1},     {"all_to_all", 1, 0, 1},
};
enum { PLACES = sizeof places / sizeof places[0] };

static const char *how, *directory;
static int victim, where;
static struct timespec begun;
static int slow = 1;
static llmpar_device plain;

static double since(struct timespec from)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (double)(t.tv_sec - from.tv_sec) + 1e-9 * (double)(t.tv_nsec - from.tv_nsec);
}

/* When the fault happened, for all to read. */
static void mark(void)
{
    char path[600];
    snprintf(path, sizeof path, "%s/fault", directory);
    FILE *f = fopen(path, "w");
    clock_gettime(CLOCK_REALTIME, &begun);
    if (f) { fprintf(f, "%lld %ld\n", (long long)begun.tv_sec, begun.tv_nsec); fclose(f); }
}

static llmpar_status strike(llmpar_error *error)
{
    mark();
    if (!strcmp(how, "exit")) exit(3);
    if (!strcmp(how, "kill")) kill(getpid(), SIGKILL);
    if (!strcmp(how, "stop")) kill(getpid(), SIGSTOP);
    if (!strcmp(how, "loop"))
        for (volatile unsigned i = 0;; i++)
            if (i % 1000 == 0) usleep(1000); /* for ever, but not at the cost of the others */
    return llmpar_error_set(error, LLMPAR_ERR_NONFINITE, "this rank gives up");
}

static llmpar_status struck_sum(llmpar_device *d, llmpar_stream *s, const llmpar_tree_sum_args *a) { (void)s; (void)a; return strike(d->error); }
static llmpar_status struck_copy(llmpar_device *d, llmpar_stream *s, void *out, const void *in, size_t bytes) { (void)s; (void)out; (void)in; (void)bytes; return strike(d->error); }

/* The report: what llmpar says in this process. */
static void report(void *user, int rank, llmpar_log_level level, const char *line)
{
    char path[600];
    long long seconds = 0;
    long nanoseconds = 0;
    (void)user; (void)level;
    snprintf(path, sizeof path, "%s/fault", directory);
    FILE *f = fopen(path, "r");
    if (f) { if (fscanf(f, "%lld %ld", &seconds, &nanoseconds) != 2) seconds = 0; fclose(f); }
    struct timespec t;
    t.tv_sec = (time_t)seconds;
    t.tv_nsec = nanoseconds;
    snprintf(path, sizeof path, "%s/rank_%d", directory, rank);
    f = fopen(path, "a");
    if (f) { fprintf(f, "%.1f %s\n", since(t), line); fclose(f); }
}

static llmpar_status call_of(llmpar_comm *comm, const place *p, float *x, float *y, const char *tag)
{
    size_t count = p->large ? 50000 : 4;
    llmpar_collective call = { .send = x, .recv = y, .count = count, .dtype = LLMPAR_F32, .tag = tag, .peer = 1 - comm->rank };
    if (!strcmp(p->op, "barrier")) return llmpar_comm_barrier(comm, NULL, tag);
    if (!strcmp(p->op, "all_gather")) return llmpar_all_gather(comm, NULL, &call);
    if (!strcmp(p->op, "reduce_scatter")) return llmpar_reduce_scatter(comm, NULL, &call);
    if (!strcmp(p->op, "all_reduce")) return llmpar_all_reduce(comm, NULL, &call);
    if (!strcmp(p->op, "broadcast")) return llmpar_broadcast(comm, NULL, &call);
    if (!strcmp(p->op, "all_to_all")) return llmpar_all_to_all(comm, NULL, &call);
    if (!strcmp(p->op, "split")) {
        llmpar_comm *other = NULL;
        llmpar_status st = llmpar_comm_split(comm, 0, 0, tag, &other);
        llmpar_comm_destroy(other);
        return st;
    }
    int sends = comm->rank == (!strcmp(p->op, "send") ? 0 : 1);
    return sends ? llmpar_send(comm, NULL, &call) : llmpar_recv(comm, NULL, &call);
}

static llmpar_status work(llmpar_ctx *ctx, void *user)
{
    const place *p = &places[where];
    llmpar_mesh *mesh = NULL;
    llmpar_mesh_desc desc = { .dp_shard = ctx->world / 2, .tp = 2 };
    float *x = (float *)calloc((size_t)50000 * 8, sizeof *x), *y = (float *)calloc((size_t)50000 * 8, sizeof *y);
    (void)user;
    llmpar_status st = llmpar_mesh_create(ctx, &desc, &mesh);
    llmpar_comm *comm = st ? NULL : p->pair ? mesh->comm[LLMPAR_AXIS_TP] : ctx->comm;
    if (!st) st = call_of(comm, p, x, y, "warm/up");
    if (!st) st = llmpar_comm_barrier(ctx->comm, NULL, "before");
    plain = *ctx->device;
    if (!st && ctx->rank == victim) {
        if (p->inside) {
            ctx->device->tree_sum = struck_sum;
            if (!strncmp(p->op, "all_g", 5) || !strncmp(p->op, "all_t", 5)) ctx->device->copy = struck_copy;
        } else {
            usleep(200000 * (unsigned)slow); /* the others wait by now */
            st = strike(&ctx->error);
        }
    }
    if (!st) st = call_of(comm, p, x, y, "layers.3/x");
    if (!st) st = llmpar_comm_barrier(ctx->comm, NULL, "layers.3/end");
    ctx->device->tree_sum = plain.tree_sum;
    ctx->device->copy = plain.copy;
    llmpar_mesh_destroy(mesh);
    free(x);
    free(y);
    return st;
}

static llmpar_status soak(llmpar_ctx *ctx, void *user)
{
    double seconds = *(double *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_mesh_desc desc = { .dp_shard = ctx->world / 2, .tp = 2 };
    float *x = (float *)calloc((size_t)50000 * 8, sizeof *x), *y = (float *)calloc((size_t)50000 * 8, sizeof *y);
    unsigned random = (unsigned)ctx->rank * 7919u + 17u, calls = 0;
    llmpar_status st = llmpar_mesh_create(ctx, &desc, &mesh);
    for (int64_t go = 1; !st && go; calls++) {
        const place *p = &places[calls % PLACES];
        int64_t mine = since(begun) < seconds;
        llmpar_collective call = { .send = &mine, .recv = &go, .count = 1, .dtype = LLMPAR_I64, .op = LLMPAR_MAX, .tag = "soak/go" };
        random = random * 1664525u + 1013904223u;
        usleep((random >> 8) % 2000000u);
        st = llmpar_all_reduce(ctx->comm, NULL, &call);
        random = random * 1664525u + 1013904223u;
        if (random & 0x800000) usleep((random >> 8) % 2000000u);
        if (!st) st = call_of(p->pair ? mesh->comm[LLMPAR_AXIS_TP] : ctx->comm, p, x, y, "soak/x");
    }
    if (!st && ctx->rank == 0) printf("%u collectives with delays in %.0f s, no false alarm\n", 2 * calls, since(begun));
    llmpar_mesh_destroy(mesh);
    free(x);
    free(y);
    return st;
}

int main(int argc, char **argv)
{
    if (argc > 1 && !strcmp(argv[1], "places")) { printf("%d\n", (int)PLACES); return 0; }
    if (getenv("LLMPAR_TEST_SLOW")) slow = atoi(getenv("LLMPAR_TEST_SLOW"));
    llmpar_mpi_desc mpi = { .silence = 5 * slow };
    if (argc > 2 && !strcmp(argv[1], "soak")) {
        double seconds = atof(argv[2]);
        llmpar_error error;
        llmpar_launch_desc desc = { .transport = LLMPAR_TRANSPORT_MPI, .mpi = &mpi, .deadline = 5 * slow };
        clock_gettime(CLOCK_REALTIME, &begun);
        if (!llmpar_launch(&desc, soak, &seconds, &error)) return 0;
        fprintf(stderr, "%s\n", error.text);
        return 1;
    }
    if (argc < 5) return 2;
    how = argv[1];
    where = atoi(argv[2]) % PLACES;
    victim = atoi(argv[3]);
    directory = argv[4];
    llmpar_error error;
    /* The rank that does not hear the victim's heart is the first to give up: it has to ask before it says where the victim is. */
    const char *mine = getenv("OMPI_COMM_WORLD_RANK") ? getenv("OMPI_COMM_WORLD_RANK") : getenv("PMI_RANK");
    double deadline = !mine || atoi(mine) == (victim + 3) % 4 ? 5 * slow : 5.5 * slow;
    llmpar_launch_desc desc = { .transport = LLMPAR_TRANSPORT_MPI, .mpi = &mpi, .deadline = deadline, .log = report };
    llmpar_status st = llmpar_launch(&desc, work, NULL, &error);
    return st ? 1 : 0;
}
