/* expect: all_to_all */
/* expect: wrote out of bounds: element -1 */
/* expect: of recv */
/* Clears the element before its buffer. */
#include <string.h>

static llmpar_status (*original)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
static llmpar_status marked(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call)
{
    llmpar_status st = original(comm, stream, call);
    size_t item = llmpar_dtype_size(call->dtype);
    memset((char *)call->recv - item, 0, item);
    return st;
}

void grade_patch(llmpar_comm *table)
{
    __atomic_store_n(&original, table->all_to_all, __ATOMIC_SEQ_CST); /* the same on every rank */
    table->all_to_all = marked;
}
