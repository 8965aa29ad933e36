/* expect: broadcast */
/* expect: out of bounds: element 7 of send of rank 0 (tp=0), which has 7 elements of 4 bytes */
/* The root sends one element too many to everybody, and they take it into a larger buffer. */
static llmpar_status loud(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call)
{
    size_t count = call->count * call->blocks + 1, bytes = count * llmpar_dtype_size(call->dtype);
    llmpar_collective m = *call;
    llmpar_status st = LLMPAR_OK;
    void *copy = NULL;
    m.count = count;
    m.blocks = 1;
    if (comm->rank == call->root) {
        for (m.peer = 0; m.peer < comm->ranks && !st; m.peer++)
            if (m.peer != comm->rank) st = llmpar_send(comm, stream, &m);
        if (!st && call->recv && call->recv != call->send) st = comm->device->copy(comm->device, stream, call->recv, call->send, bytes - bytes / count);
        return st;
    }
    m.peer = call->root;
    if ((st = comm->device->alloc(comm->device, bytes, &copy))) return st;
    m.recv = copy;
    st = llmpar_recv(comm, stream, &m);
    if (!st) st = comm->device->copy(comm->device, stream, call->recv, copy, bytes - bytes / count);
    comm->device->free(comm->device, copy, bytes);
    return st;
}

void grade_patch(llmpar_comm *table) { table->broadcast = loud; }
