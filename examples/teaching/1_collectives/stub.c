/* Assignment 1: collectives from send and recv, and a Megatron linear pair. See README.md next to this file; grade with

     make grade ASSIGNMENT=1_collectives FILE=mine.c                                                                        */
#include "assignment.h"

#include <string.h>

/* One message, as an example of a call: `count` elements at `data` to rank `to`. It returns when the receiver has taken them, so two ranks that both send first wait for each other for ever. */
static llmpar_status send_to(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *like, int32_t to, const void *data, size_t count)
{
    llmpar_collective message;
    memset(&message, 0, sizeof message);
    message.send = data;
    message.count = count;
    message.dtype = like->dtype;
    message.peer = to;
    message.tag = like->tag;
    return llmpar_send(comm, stream, &message);
}

/* Task 1: a ring. send[blocks][count] -> recv[blocks][ranks][count] */
static llmpar_status ring_all_gather(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call)
{
    (void)stream;
    (void)call;
    (void)send_to;
    return llmpar_error_set(comm->error, LLMPAR_ERR_UNSUPPORTED, "task 1, all_gather: not written yet");
}

/* Task 2: a binomial tree from call->root. */
static llmpar_status tree_broadcast(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call)
{
    (void)stream;
    (void)call;
    return llmpar_error_set(comm->error, LLMPAR_ERR_UNSUPPORTED, "task 2, broadcast: not written yet");
}

/* Task 3: send[blocks][ranks][count] -> recv[blocks][count], the balanced tree over the rank index. */
static llmpar_status tree_reduce_scatter(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call)
{
    (void)stream;
    (void)call;
    return llmpar_error_set(comm->error, LLMPAR_ERR_UNSUPPORTED, "task 3, reduce_scatter: not written yet");
}

/* Task 4: send[blocks][count] -> recv[blocks][count], in 2(n-1)/n of its bytes a rank. */
static llmpar_status tree_all_reduce(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call)
{
    (void)stream;
    (void)call;
    return llmpar_error_set(comm->error, LLMPAR_ERR_UNSUPPORTED, "task 4, all_reduce: not written yet");
}

void grade_patch(llmpar_comm *table)
{
    table->all_gather = ring_all_gather;
    table->broadcast = tree_broadcast;
    table->reduce_scatter = tree_reduce_scatter;
    table->all_reduce = tree_all_reduce;
}

/* Task 5. */
llmpar_status pair_forward(const pair *p) { return llmpar_error_set(p->tp->error, LLMPAR_ERR_UNSUPPORTED, "task 5, pair_forward: not written yet"); }
llmpar_status pair_backward(const pair *p) { return llmpar_error_set(p->tp->error, LLMPAR_ERR_UNSUPPORTED, "task 5, pair_backward: not written yet"); }
