/* expect: reduce_scatter */
/* expect: reduce_scatter f64 sum, count 7 */
/* expect: rank 0 (tp=0): recv[0] */
/* Every number is a float to it. */
#include <string.h>

static llmpar_status (*original)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
static llmpar_status floats(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call)
{
    llmpar_collective c = *call;
    c.dtype = LLMPAR_F32;
    if (llmpar_dtype_size(call->dtype) == 8) c.count *= 2;
    comm->reduce_scatter = original;
    llmpar_status st = llmpar_reduce_scatter(comm, stream, &c);
    comm->reduce_scatter = floats;
    return st;
}

void grade_patch(llmpar_comm *table)
{
    __atomic_store_n(&original, table->reduce_scatter, __ATOMIC_SEQ_CST);
    table->reduce_scatter = floats;
}
