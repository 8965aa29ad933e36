/* faults: one script of collectives on a 2 x 2 mesh, and every way in which one rank (the culprit) can spoil it:

     before (barrier on the axis)   X: the collective under test, on `axis`   Y: all_reduce on the axis   Z: all_reduce on the other axis   after (barrier of the world)

   A mutation changes what the culprit calls; a fault keeps it from coming: it returns an error, or stays away until it is released. Every call has a receive buffer of its own, filled with a pattern:
   a call that fails must have left it alone. Works with every transport. */
#ifndef FAULTS_H
#define FAULTS_H

#include "test.h"

#include <time.h>

enum { FAULTS_RANKS = 4, FAULTS_FLOATS = 3000 };

typedef enum fault_x { X_BARRIER, X_ALL_GATHER, X_REDUCE_SCATTER, X_ALL_REDUCE, X_MAX, X_BROADCAST, X_ALL_TO_ALL, X_MESSAGE, X_SPLIT, X_COUNT } fault_x;
typedef enum fault_axis { FAULT_TP, FAULT_DP, FAULT_WORLD } fault_axis;
typedef enum fault_kind {
    FAULT_NONE, /* mutations */ FAULT_OP, FAULT_DTYPE, FAULT_SIZE, FAULT_BLOCKS, FAULT_ROOT, FAULT_REDUCE, FAULT_ORDER, FAULT_AXIS, FAULT_TAG, FAULT_LONG_TAG, FAULT_MISSING, FAULT_EXTRA, FAULT_MUTATIONS,
    /* faults */ FAULT_ERROR = FAULT_MUTATIONS, FAULT_AWAY, FAULT_RETURNS
} fault_kind;

static const char *const fault_x_name[X_COUNT] = {"barrier", "all_gather", "reduce_scatter sum", "all_reduce sum", "all_reduce max", "broadcast", "all_to_all", "send", "split"};
static const char *const fault_axis_name[] = {"tp", "dp_shard", "world"};
static const char *const fault_kind_name[] = {"nothing", "op", "dtype", "count", "blocks", "root", "reduce op", "order", "axis", "tag", "end of a long tag", "missing call", "extra call", "error", "stays away", "returns"};

typedef struct fault_case {
    fault_x x;
    fault_axis axis;
    fault_kind kind;
    int large, culprit;
    double deadline;
    int unchecked;
    int release;                  /* atomic: ends FAULT_AWAY; set by the last survivor unless keep_away */
    int keep_away;
    const char *record;
    /* out */
    double failed_at;             /* when the culprit failed */
    int survivors;                /* atomic: have returned */
    llmpar_status status[FAULTS_RANKS], job;
    char text[FAULTS_RANKS][1600];
    double returned_at[FAULTS_RANKS];
    uint64_t live[FAULTS_RANKS];
    llmpar_error error;
} fault_case;

/* Does this mutation change anything in this collective? */
static inline int fault_applies(fault_x x, fault_kind kind)
{
    int data = x != X_BARRIER && x != X_SPLIT;
    if (kind == FAULT_DTYPE || kind == FAULT_SIZE || kind == FAULT_BLOCKS) return data;
    if (kind == FAULT_ROOT) return x == X_BROADCAST;
    if (kind == FAULT_REDUCE) return x == X_REDUCE_SCATTER || x == X_ALL_REDUCE || x == X_MAX;
    return kind != FAULT_LONG_TAG || data;
}

typedef struct fault_buffers { double send[FAULTS_RANKS * FAULTS_FLOATS / 2], recv[FAULTS_RANKS * FAULTS_FLOATS / 2]; } fault_buffers;

static llmpar_status fault_call(fault_x x, llmpar_comm *comm, fault_buffers *b, llmpar_collective call)
{
    llmpar_status st = LLMPAR_OK;
    llmpar_comm *part = NULL;
    memset(b->recv, 0xa5, sizeof b->recv);
    call.send = b->send;
    call.recv = b->recv;
    call.peer = comm->rank ^ 1;
    switch (x) {
    case X_BARRIER: st = llmpar_comm_barrier(comm, NULL, call.tag); break;
    case X_ALL_GATHER: st = llmpar_all_gather(comm, NULL, &call); break;
    case X_REDUCE_SCATTER: st = llmpar_reduce_scatter(comm, NULL, &call); break;
    case X_ALL_REDUCE: case X_MAX: st = llmpar_all_reduce(comm, NULL, &call); break;
    case X_BROADCAST: st = llmpar_broadcast(comm, NULL, &call); break;
    case X_ALL_TO_ALL: st = llmpar_all_to_all(comm, NULL, &call); break;
    case X_MESSAGE: st = comm->rank % 2 ? llmpar_recv(comm, NULL, &call) : llmpar_send(comm, NULL, &call); break;
    default:
        st = llmpar_comm_split(comm, 0, 0, call.tag, &part);
        llmpar_comm_destroy(part);
        break;
    }
    const unsigned char *recv = (const unsigned char *)b->recv;
    for (size_t i = 0; st && i < sizeof b->recv; i++)
        if (recv[i] != 0xa5) {
            TEST_FAIL("%s failed, but byte %zu of its receive buffer was written", fault_x_name[x], i);
            break;
        }
    return st;
}

static llmpar_status fault_script(llmpar_ctx *ctx, fault_case *c, const llmpar_mesh *mesh, fault_buffers *b)
{
    llmpar_comm *const comms[] = { mesh->comm[LLMPAR_AXIS_TP], mesh->comm[LLMPAR_AXIS_DP_SHARD], mesh->world };
    llmpar_comm *comm = comms[c->axis], *other = comms[c->axis == FAULT_TP ? FAULT_DP : FAULT_TP];
    int me = ctx->rank == c->culprit;
    fault_x x = c->x;
    llmpar_collective call, y = { .count = 30, .dtype = LLMPAR_F32, .tag = "layers.3.wo/y" };
    memset(&call, 0, sizeof call);
    call.count = c->large ? FAULTS_FLOATS / 2 : 40;
    call.dtype = LLMPAR_F32;
    call.op = x == X_MAX ? LLMPAR_MAX : LLMPAR_SUM;
    call.root = 1;
    call.tag = c->kind == FAULT_LONG_TAG ? "layers.3.self_attention.output_projection.weight/of_the_fourth_pass/x" : "layers.3.wo/x";
    for (size_t i = 0; i < sizeof b->send / sizeof b->send[0]; i++) b->send[i] = ctx->rank + 1;
    llmpar_status st = llmpar_comm_barrier(comm, NULL, "before");
    if (me)
        switch (c->kind) {
        case FAULT_OP: x = x == X_MAX || x == X_ALL_REDUCE || x == X_ALL_TO_ALL ? X_ALL_GATHER : x == X_MESSAGE ? X_ALL_REDUCE : x == X_SPLIT ? X_BARRIER : (fault_x)(x + 1); break;
        case FAULT_DTYPE: call.dtype = LLMPAR_F64; call.count /= 2; break;
        case FAULT_SIZE: call.count--; break;
        case FAULT_BLOCKS: call.blocks = 2; call.count /= 2; break;
        case FAULT_ROOT: call.root = 0; break;
        case FAULT_REDUCE: call.op = x == X_MAX ? LLMPAR_SUM : LLMPAR_MAX; break;
        case FAULT_AXIS: comm = other; break;
        case FAULT_TAG: call.tag = "layers.4.wo/x"; break;
        case FAULT_LONG_TAG: call.tag = "layers.3.self_attention.output_projection.weight/of_the_fourth_pass/X"; break;
        case FAULT_ERROR:
            c->failed_at = test_clock();
            return st ? st : llmpar_fail(ctx, LLMPAR_ERR_IO, "the disk is full");
        case FAULT_RETURNS:
            c->failed_at = test_clock();
            return st;
        case FAULT_AWAY:
            c->failed_at = test_clock();
            while (!__atomic_load_n(&c->release, __ATOMIC_SEQ_CST)) test_sleep(0.002);
            break;
        default: break;
        }
    llmpar_comm *axis = comms[c->axis];
    if (!st && me && c->kind == FAULT_ORDER) st = fault_call(X_ALL_REDUCE, axis, b, y);
    if (!st && !(me && c->kind == FAULT_MISSING)) st = fault_call(x, comm, b, call);
    if (!st && me && c->kind == FAULT_EXTRA) st = fault_call(x, comm, b, call);
    if (!st && !(me && c->kind == FAULT_ORDER)) st = fault_call(X_ALL_REDUCE, axis, b, y);
    y.tag = "layers.3.wo/z";
    if (!st) st = fault_call(X_ALL_REDUCE, other, b, y);
    if (!st) st = llmpar_comm_barrier(mesh->world, NULL, "after");
    return st;
}

static llmpar_status fault_rank(llmpar_ctx *ctx, void *user)
{
    fault_case *c = (fault_case *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_mesh_desc desc = { .dp_shard = 2, .tp = 2 };
    fault_buffers *b = (fault_buffers *)malloc(sizeof *b);
    llmpar_status st = llmpar_mesh_create(ctx, &desc, &mesh);
    if (!st) st = fault_script(ctx, c, mesh, b);
    llmpar_mesh_destroy(mesh);
    free(b);
    c->status[ctx->rank] = st;
    c->returned_at[ctx->rank] = test_clock();
    snprintf(c->text[ctx->rank], sizeof c->text[0], "%s", llmpar_last_error(ctx));
    if (ctx->rank != c->culprit && __atomic_add_fetch(&c->survivors, 1, __ATOMIC_SEQ_CST) == FAULTS_RANKS - 1 && !c->keep_away) __atomic_store_n(&c->release, 1, __ATOMIC_SEQ_CST);
    return st;
}

static void fault_check(const llmpar_ctx *ctx, void *user) { ((fault_case *)user)->live[ctx->rank] = ctx->heap.live; }
static void fault_quiet(void *user, int rank, llmpar_log_level level, const char *line) { (void)user; (void)rank; (void)level; (void)line; }

static fault_case fault_of(fault_x x, fault_axis axis, fault_kind kind, int large, int culprit)
{
    fault_case c;
    memset(&c, 0, sizeof c);
    c.x = x;
    c.axis = axis;
    c.kind = kind;
    c.large = large;
    c.culprit = culprit;
    c.deadline = 60; /* ends a test that fails */
    for (int i = 0; i < FAULTS_RANKS; i++) c.status[i] = LLMPAR_STATUS_COUNT;
    return c;
}

static void fault_run(fault_case *c)
{
    llmpar_launch_desc desc = { .ranks = FAULTS_RANKS, .deadline = c->deadline, .unchecked = c->unchecked, .record = c->record, .log = fault_quiet, .check = fault_check };
    c->job = llmpar_launch(&desc, fault_rank, c, &c->error);
}

static const char *fault_name(const fault_case *c)
{
    static __thread char text[200];
    snprintf(text, sizeof text, "%s on %s, %s, culprit %d: %s", fault_x_name[c->x], fault_axis_name[c->axis], c->large ? "large" : "small", c->culprit, fault_kind_name[c->kind]);
    return text;
}

#endif
