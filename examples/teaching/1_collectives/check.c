/* The tests of assignment 1: small whole numbers that can be followed by hand; the same numbers stand in README.md. `make grade ASSIGNMENT=1_collectives FILE=mine.c` runs them,
   one child process each, and then the whole conformance suite on the same file. */
#include "grade.h"
#include "assignment.h"

/* A task's test runs on every rank. */
typedef struct task { const char *name; int ranks; llmpar_status (*run)(llmpar_comm *comm, llmpar_stream *stream); } task;

static void expect(const char *what, const float *got, const float *want, int count)
{
    for (int i = 0; i < count; i++)
        if (memcmp(&got[i], &want[i], sizeof *got)) {
            grade_fail(GRADE_VALUE, "%s[%d]: expected %.9g, got %.9g%s", what, i, (double)want[i], (double)got[i], grade_is_poison(&got[i], sizeof *got) ? " (never written)" : "");
            return;
        }
}

static llmpar_collective describe(const float *send, float *recv, size_t count)
{
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.send = send;
    call.recv = recv;
    call.count = count;
    call.dtype = LLMPAR_F32;
    call.tag = "by hand";
    return call;
}
static float *buffer(const char *name, int count) { return (float *)grade_put(name, (size_t)count * sizeof(float), sizeof(float), 0); }

/* Rank r sends [10r, 10r+1]; everybody gets [0 1 10 11 20 21]. */
static llmpar_status all_gather(llmpar_comm *comm, llmpar_stream *stream)
{
    static const float want[] = { 0, 1, 10, 11, 20, 21 };
    float *send = buffer("send", 2), *recv = buffer("recv", 6);
    send[0] = (float)(10 * comm->rank);
    send[1] = send[0] + 1;
    llmpar_collective call = describe(send, recv, 2);
    llmpar_status st = llmpar_all_gather(comm, stream, &call);
    if (!st) expect("recv", recv, want, 6);
    return st;
}

/* Rank 1 sends [7 8 9]; everybody has it. */
static llmpar_status broadcast(llmpar_comm *comm, llmpar_stream *stream)
{
    static const float want[] = { 7, 8, 9 };
    float *data = buffer("data", 3);
    if (comm->rank == 1) memcpy(data, want, sizeof want);
    llmpar_collective call = describe(data, comm->rank == 1 ? NULL : data, 3);
    call.root = 1;
    llmpar_status st = llmpar_broadcast(comm, stream, &call);
    if (!st) expect("data", data, want, 3);
    return st;
}

/* [1 2 3], [10 20 30], [100 200 300]: rank 0 gets 111, rank 1 222, rank 2 333. */
static llmpar_status reduce_scatter(llmpar_comm *comm, llmpar_stream *stream)
{
    static const float scale[] = { 1, 10, 100 }, want[] = { 111, 222, 333 };
    float *send = buffer("send", 3), *recv = buffer("recv", 1);
    for (int i = 0; i < 3; i++) send[i] = scale[comm->rank] * (float)(i + 1);
    llmpar_collective call = describe(send, recv, 1);
    llmpar_status st = llmpar_reduce_scatter(comm, stream, &call);
    if (!st) expect("recv", recv, &want[comm->rank], 1);
    return st;
}

/* The same numbers: everybody gets [111 222 333], in place. */
static llmpar_status all_reduce(llmpar_comm *comm, llmpar_stream *stream)
{
    static const float scale[] = { 1, 10, 100 }, want[] = { 111, 222, 333 };
    float *data = buffer("data", 3);
    for (int i = 0; i < 3; i++) data[i] = scale[comm->rank] * (float)(i + 1);
    llmpar_collective call = describe(data, data, 3);
    llmpar_status st = llmpar_all_reduce(comm, stream, &call);
    if (!st) expect("data", data, want, 3);
    return st;
}

/* 2^25, 1, -2^25, 1. The tree: (2^25 + 1) + (-2^25 + 1) = 2^25 + -2^25 = 0, for both ones are lost in f32. One after another: ((2^25 + 1) + -2^25) + 1 = 1. */
static llmpar_status tree_order(llmpar_comm *comm, llmpar_stream *stream)
{
    static const float values[] = { 33554432, 1, -33554432, 1 }, want[] = { 0 };
    float *send = buffer("send", 1), *recv = buffer("recv", 1);
    send[0] = values[comm->rank];
    llmpar_collective call = describe(send, recv, 1);
    llmpar_status st = llmpar_all_reduce(comm, stream, &call);
    if (!st && recv[0] == 1) grade_fail(GRADE_VALUE, "recv[0]: expected 0, got 1: that is the ranks one after another, not the balanced tree");
    if (!st) expect("recv", recv, want, 1);
    return st;
}

/* x = [1 2]; w1 = [3 1; 1 -1]; w2 = [1 2; 2 1]; dy = [1 1]. Rank r holds row r of w1 and column r of w2. */
static void pair_make(pair *p, llmpar_comm *comm, llmpar_stream *stream)
{
    static const float w1[2][2] = { { 3, 1 }, { 1, -1 } }, w2[2][2] = { { 1, 2 }, { 2, 1 } };
    float *x = buffer("x", 2), *a = buffer("w1", 2), *b = buffer("w2", 2), *dy = buffer("dy", 2);
    memset(p, 0, sizeof *p);
    p->tp = comm;
    p->stream = stream;
    p->n = 1;
    p->d = 2;
    p->f = 1;
    for (int i = 0; i < 2; i++) {
        x[i] = (float)(i + 1);
        dy[i] = 1;
        a[i] = w1[comm->rank][i];
        b[i] = w2[i][comm->rank];
    }
    p->x = x;
    p->w1 = a;
    p->w2 = b;
    p->dy = dy;
    p->h = buffer("h", 1);
    p->y = buffer("y", 2);
    p->dx = buffer("dx", 2);
    p->dw1 = buffer("dw1", 2);
    p->dw2 = buffer("dw2", 2);
}
static llmpar_status pair_y(llmpar_comm *comm, llmpar_stream *stream)
{
    static const float h[] = { 5, 0 }, y[] = { 5, 10 };
    pair p;
    pair_make(&p, comm, stream);
    llmpar_status st = pair_forward(&p);
    if (!st) expect("h", p.h, &h[comm->rank], 1);
    if (!st) expect("y", p.y, y, 2);
    return st;
}
static llmpar_status pair_gradients(llmpar_comm *comm, llmpar_stream *stream)
{
    static const float h[] = { 5, 0 }, dx[] = { 9, 3 }, dw1[2][2] = { { 3, 6 }, { 0, 0 } }, dw2[2][2] = { { 5, 5 }, { 0, 0 } };
    pair p;
    pair_make(&p, comm, stream);
    p.h[0] = h[comm->rank];
    llmpar_status st = pair_backward(&p);
    if (!st) expect("dw2", p.dw2, dw2[comm->rank], 2);
    if (!st) expect("dw1", p.dw1, dw1[comm->rank], 2);
    if (!st) expect("dx", p.dx, dx, 2);
    return st;
}

/* Whole numbers from -4 to 4 in larger shapes: sums of them are exact, so any order gives the bits of one rank. 4 ranks, n = 5, d = 6, F = 12. */
enum { N = 5, D = 6, F = 12 };
static float whole_number(int tensor, int i) { return (float)((int)(grade_hash((uint64_t)(tensor * 1000 + i)) % 9) - 4); }
static llmpar_status pair_larger(llmpar_comm *comm, llmpar_stream *stream)
{
    static float x[N * D], w1[F * D], w2[D * F], dy[N * D], h[N * F], dh[N * F]; /* every rank writes the same */
    float y[N * D], dx[N * D];
    int f = F / comm->ranks, first = f * comm->rank;
    pair p;
    float *a = buffer("w1", f * D), *b = buffer("w2", D * f), *mine_x = buffer("x", N * D), *mine_dy = buffer("dy", N * D);
    memset(&p, 0, sizeof p);
    for (int i = 0; i < N * D; i++) mine_x[i] = x[i] = whole_number(1, i), mine_dy[i] = dy[i] = whole_number(2, i);
    for (int i = 0; i < F * D; i++) w1[i] = whole_number(3, i), w2[i] = whole_number(4, i);
    for (int j = 0; j < f; j++)
        for (int i = 0; i < D; i++) a[j * D + i] = w1[(first + j) * D + i], b[i * f + j] = w2[i * F + first + j];
    for (int n = 0; n < N; n++) {
        for (int j = 0; j < F; j++) {
            h[n * F + j] = dh[n * F + j] = 0;
            for (int i = 0; i < D; i++) h[n * F + j] += x[n * D + i] * w1[j * D + i], dh[n * F + j] += dy[n * D + i] * w2[i * F + j];
            if (!(h[n * F + j] > 0)) h[n * F + j] = dh[n * F + j] = 0;
        }
        for (int i = 0; i < D; i++) {
            y[n * D + i] = dx[n * D + i] = 0;
            for (int j = 0; j < F; j++) y[n * D + i] += h[n * F + j] * w2[i * F + j], dx[n * D + i] += dh[n * F + j] * w1[j * D + i];
        }
    }
    p.tp = comm;
    p.stream = stream;
    p.n = N;
    p.d = D;
    p.f = f;
    p.x = mine_x;
    p.dy = mine_dy;
    p.w1 = a;
    p.w2 = b;
    p.h = buffer("h", N * f);
    p.y = buffer("y", N * D);
    p.dx = buffer("dx", N * D);
    p.dw1 = buffer("dw1", f * D);
    p.dw2 = buffer("dw2", D * f);
    llmpar_status st = pair_forward(&p);
    if (!st) expect("y", p.y, y, N * D);
    if (!st) st = pair_backward(&p);
    if (!st) expect("dx", p.dx, dx, N * D);
    for (int j = 0; j < f && !st; j++)
        for (int i = 0; i < D; i++) {
            float want1 = 0, want2 = 0;
            for (int n = 0; n < N; n++) want1 += dh[n * F + first + j] * x[n * D + i], want2 += dy[n * D + i] * h[n * F + first + j];
            if (p.dw1[j * D + i] != want1) grade_fail(GRADE_VALUE, "dw1[%d,%d]: expected %g, got %g", j, i, (double)want1, (double)p.dw1[j * D + i]);
            if (p.dw2[i * f + j] != want2) grade_fail(GRADE_VALUE, "dw2[%d,%d]: expected %g, got %g", i, j, (double)want2, (double)p.dw2[i * f + j]);
        }
    return st;
}

static const task tasks[] = {
    { "task 1, ring all_gather: [0 1] [10 11] [20 21]", 3, all_gather },
    { "task 2, tree broadcast: [7 8 9] from rank 1", 5, broadcast },
    { "task 3, reduce_scatter: 111, 222, 333", 3, reduce_scatter },
    { "task 4, all_reduce: [111 222 333] in place", 3, all_reduce },
    { "task 4, the order of the tree: 2^25, 1, -2^25, 1 is 0", 4, tree_order },
    { "task 5, the pair forward: y = [5 10]", 2, pair_y },
    { "task 5, the pair backward: dx = [9 3]", 2, pair_gradients },
    { "task 5, 4 ranks, whole numbers", 4, pair_larger },
};

/* ---- running them ---- */

static llmpar_status rank_main(llmpar_ctx *ctx, void *user)
{
    const task *t = (const task *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_mesh_desc desc;
    llmpar_stream *stream = NULL;
    memset(&desc, 0, sizeof desc);
    desc.tp = t->ranks;
    grade_me = ctx->rank;
    llmpar_status st = llmpar_mesh_create(ctx, &desc, &mesh);
    if (!st) st = ctx->device->stream_create(ctx->device, "tasks", &stream);
    if (!st) {
        llmpar_comm *comm = mesh->comm[LLMPAR_AXIS_TP], inner = *comm;
        snprintf(grade->rank[grade_me].who, sizeof grade->rank[grade_me].who, "rank %d (%s)", (int)ctx->rank, mesh->where);
        grade_patch(comm);
        st = t->run(comm, stream);
        if (!st) st = ctx->device->synchronize(ctx->device, stream);
        if (st && st != LLMPAR_ERR_PEER) grade_fail(GRADE_STATUS, "returned \"%s\": %s", llmpar_status_string(st), llmpar_last_error(ctx));
        grade_check_places();
        *comm = inner;
        ctx->device->stream_destroy(ctx->device, stream);
    }
    llmpar_mesh_destroy(mesh);
    return st;
}

static void quiet(void *user, int rank, llmpar_log_level level, const char *line) { (void)user; (void)rank; (void)level; (void)line; }

static void run_task(void *arg)
{
    const task *t = (const task *)arg;
    llmpar_launch_desc desc;
    llmpar_error error;
    memset(&desc, 0, sizeof desc);
    desc.ranks = t->ranks;
    desc.lockstep = 1; /* one rank at a time: ranks that wait for each other are found at once */
    desc.log = quiet;
    if (llmpar_launch(&desc, rank_main, (void *)(uintptr_t)t, &error) && !grade->stop) grade_fail(GRADE_STATUS, "%s", error.text);
}

int main(int argc, char **argv)
{
    int passed = 0, failed = 0;
    grade_open();
    printf("assignment 1 with %s\n", argc > 1 ? argv[1] : "?");
    for (size_t i = 0; i < sizeof tasks / sizeof tasks[0]; i++) {
        char text[1600] = "";
        int fine = grade_run(run_task, (void *)(uintptr_t)&tasks[i], text, sizeof text);
        passed += fine;
        failed += !fine;
        printf("%-6s %s\n", fine ? "passed" : "FAILED", tasks[i].name);
        if (!fine) printf("       %s\n", text);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
