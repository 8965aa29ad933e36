/* 06_custom_comm: a collective of your own. A Llama trains on 2 x 2 ranks, once with the library's communicators and once with an all-gather that is a ring of send and recv; the bits stay the same.

   A communicator is a table of functions (llmpar_comm). Whoever wants to try another algorithm, count or log what is sent, or use another network replaces a slot; everything above works through the table. A slot calls other
   collectives by their public functions (llmpar_send, not table->send): these describe the call for messages and checks. `make grade COMM=file.c` runs a conformance suite on slots like this one (docs/teaching.md).

     cc -O2 -I. examples/06_custom_comm.c -o build/06_custom_comm -lpthread -lm          (or: make build/06_custom_comm)
     build/06_custom_comm                                                                        */
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"

#include <stdio.h>
#include <string.h>

#include "common/options.h"

enum { STEPS = 5, LENGTH = 32 };

static int64_t rings, messages; /* of all ranks: how often the slot was used, and what it was made of */

static llmpar_status message(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call, size_t peer, const void *send, void *recv)
{
    llmpar_collective m;
    memset(&m, 0, sizeof m);
    m.send = send;
    m.recv = recv;
    m.count = call->count;
    m.dtype = call->dtype;
    m.peer = (int32_t)peer;
    m.tag = call->tag;
    __atomic_add_fetch(&messages, send != NULL, __ATOMIC_SEQ_CST);
    return send ? llmpar_send(comm, stream, &m) : llmpar_recv(comm, stream, &m);
}

/* send[blocks][count] -> recv[blocks][ranks][count]. In step s a rank passes on, to the right, what it got in step s - 1 from the left:

     rank 0   a . .      a . c      a b c
     rank 1   . b .  ->  a b .  ->  a b c
     rank 2   . . c      . b c      a b c

   A send ends when the data has been taken: even ranks send first, odd ranks receive first, so somebody can always go on. */
static llmpar_status ring_all_gather(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call)
{
    size_t n = (size_t)comm->ranks, me = (size_t)comm->rank, part = call->count * llmpar_dtype_size(call->dtype), right = (me + 1) % n, left = (me + n - 1) % n;
    llmpar_status st = LLMPAR_OK;
    __atomic_add_fetch(&rings, 1, __ATOMIC_SEQ_CST);
    for (size_t b = 0; b < call->blocks && part && !st; b++) {
        char *recv = (char *)call->recv + b * n * part;
        const char *mine = (const char *)call->send + b * part;
        if (recv + me * part != mine) st = comm->device->copy(comm->device, stream, recv + me * part, mine, part);
        for (size_t s = 0; s + 1 < n && !st; s++) {
            char *out = recv + (me + n - s) % n * part, *in = recv + (me + n - s - 1) % n * part;
            if (me % 2 == 0) st = message(comm, stream, call, right, out, NULL);
            if (!st) st = message(comm, stream, call, left, NULL, in);
            if (!st && me % 2) st = message(comm, stream, call, right, out, NULL);
        }
    }
    return st;
}

/* ---- training, with or without it ---- */

typedef struct job { int own; double loss[STEPS], norm[STEPS]; } job; /* results of rank 0 */

/* Data of our own: counting. */
static llmpar_status count_up(void *user, int64_t index, int32_t *tokens)
{
    (void)user;
    for (int i = 0; i <= LENGTH; i++) tokens[i] = (int32_t)((index * 37 + i) % 256);
    return LLMPAR_OK;
}

static llmpar_status train(llmpar_ctx *ctx, void *user)
{
    job *j = (job *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_llama *model = NULL;
    llmpar_trainer *trainer = NULL;
    llmpar_mesh_desc mesh_desc = { .dp_shard = 2, .tp = 2 };
    llmpar_llama_desc model_desc = { .preset = "tiny", .seed = 1 };
    llmpar_trainer_desc desc = { .sequence = count_up, .seq_len = LENGTH, .batch = 8, .sequence_parallel = 1, .log_every = -1 };
    llmpar_status st = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!st && j->own) { /* this rank's tables: of the parameters' axis, and of tensor parallelism, whose sequence-parallel layers gather, too */
        mesh->comm[LLMPAR_AXIS_DP_SHARD]->all_gather = ring_all_gather;
        mesh->comm[LLMPAR_AXIS_TP]->all_gather = ring_all_gather;
    }
    if (!st) st = llmpar_llama_create(ctx, &model_desc, &model);
    if (!st) st = llmpar_parallelize(mesh, model, &desc, &trainer);
    for (int i = 0; i < STEPS && !st; i++) {
        llmpar_step step;
        st = llmpar_trainer_step(trainer, &step);
        if (!st && ctx->rank == 0) j->loss[i] = step.loss, j->norm[i] = step.grad_norm;
    }
    llmpar_trainer_destroy(trainer);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    return st;
}

int main(int argc, char **argv)
{
    int code = option_none(argc, argv, "06_custom_comm");
    if (code >= 0) return code;
    llmpar_launch_desc launch = { .ranks = 4, .log = quiet_log };
    llmpar_error error;
    job plain = { .own = 0 }, ring = { .own = 1 };
    if (llmpar_launch(&launch, train, &plain, &error) || llmpar_launch(&launch, train, &ring, &error)) return print_error("06_custom_comm", &error);
    printf("step   loss and gradient norm: the library's all-gather   a ring of send and recv\n");
    for (int i = 0; i < STEPS; i++) printf("%4d            %.9g  %-12.9g                   %.9g  %.9g\n", i + 1, plain.loss[i], plain.norm[i], ring.loss[i], ring.norm[i]);
    int same = !memcmp(plain.loss, ring.loss, sizeof plain.loss) && !memcmp(plain.norm, ring.norm, sizeof plain.norm);
    printf("the ring ran %lld times, in %lld messages; the bits are %s\n", (long long)rings, (long long)messages, same ? "the same" : "NOT the same");
    return same && rings > 0 && messages >= rings ? 0 : 1;
}
