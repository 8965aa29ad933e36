/* expect: all_gather */
/* expect: calls the slot send directly: use llmpar_send */
/* Takes the pointer from the table instead of the function that looks after it. */
static llmpar_status direct(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call)
{
    llmpar_collective m = *call;
    m.peer = (comm->rank + 1) % comm->ranks;
    return comm->send(comm, stream, &m);
}

void grade_patch(llmpar_comm *table) { table->all_gather = direct; }
