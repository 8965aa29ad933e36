/* expect: all_reduce */
/* expect: wrote into its input: send[ */
/* Adds up in the send buffer and copies the sum out. */
static llmpar_status (*original)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
static llmpar_status careless(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call)
{
    llmpar_collective c = *call;
    c.recv = (void *)(uintptr_t)call->send;
    llmpar_status st = original(comm, stream, &c);
    return st || call->recv == call->send ? st : comm->device->copy(comm->device, stream, call->recv, call->send, call->count * call->blocks * llmpar_dtype_size(call->dtype));
}

void grade_patch(llmpar_comm *table)
{
    __atomic_store_n(&original, table->all_reduce, __ATOMIC_SEQ_CST);
    table->all_reduce = careless;
}
