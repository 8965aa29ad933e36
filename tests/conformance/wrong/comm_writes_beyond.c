/* expect: all_to_all */
/* expect: wrote out of bounds: */
/* expect: of recv, which has */
/* Adds an end mark that nobody asked for. */
#include <string.h>

static llmpar_status (*original)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
static llmpar_status marked(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call)
{
    llmpar_status st = original(comm, stream, call);
    size_t item = llmpar_dtype_size(call->dtype);
    memset((char *)call->recv + (size_t)comm->ranks * call->count * call->blocks * item, 0, item);
    return st;
}

void grade_patch(llmpar_comm *table)
{
    __atomic_store_n(&original, table->all_to_all, __ATOMIC_SEQ_CST); /* the same on every rank */
    table->all_to_all = marked;
}
