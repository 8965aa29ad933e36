/* expect: all_gather */
/* expect: of what rank */
/* A buffer that all ranks share, since they are threads of one process: the last to come writes over what the others send. */
#include <string.h>

static char scratch[1 << 16];
static llmpar_status (*original)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
static llmpar_status shared(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call)
{
    llmpar_collective c = *call;
    memcpy(scratch, call->send, call->count * call->blocks * llmpar_dtype_size(call->dtype));
    c.send = scratch;
    return original(comm, stream, &c);
}

void grade_patch(llmpar_comm *table)
{
    __atomic_store_n(&original, table->all_gather, __ATOMIC_SEQ_CST);
    table->all_gather = shared;
}
