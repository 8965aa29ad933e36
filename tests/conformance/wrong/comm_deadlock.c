/* expect: all_gather */
/* expect: all_gather f32, count 7, blocks 1, 2 ranks */
/* expect: nobody can go on */
/* expect: in send */
/* Every rank sends first. */
static llmpar_status ring(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call)
{
    llmpar_collective m = *call;
    m.peer = (comm->rank + 1) % comm->ranks;
    llmpar_status st = llmpar_send(comm, stream, &m);
    m.peer = (comm->rank + comm->ranks - 1) % comm->ranks;
    return st ? st : llmpar_recv(comm, stream, &m);
}

void grade_patch(llmpar_comm *table) { table->all_gather = ring; }
