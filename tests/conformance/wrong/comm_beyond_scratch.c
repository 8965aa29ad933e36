/* expect: all_reduce */
/* expect: wrote out of bounds: byte */
/* expect: of its own device memory of */
/* Writes one byte behind the memory that it asked for. */
static llmpar_status gather_and_add(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call)
{
    size_t bytes = (size_t)comm->ranks * call->count * call->blocks * llmpar_dtype_size(call->dtype);
    void *all = NULL;
    llmpar_collective gather = *call;
    llmpar_status st = comm->device->alloc(comm->device, bytes, &all);
    if (st) return st;
    gather.recv = all;
    gather.count = call->count * call->blocks;
    gather.blocks = 1;
    st = llmpar_all_gather(comm, stream, &gather);
    const void *in[8];
    for (int r = 0; r < comm->ranks; r++) in[r] = (char *)all + (size_t)r * bytes / (size_t)comm->ranks;
    llmpar_tree_sum_args args = { in, comm->ranks, call->count * call->blocks, call->recv, call->dtype };
    if (!st) st = call->op == LLMPAR_MAX ? comm->device->max(comm->device, stream, &args) : comm->device->tree_sum(comm->device, stream, &args);
    ((char *)all)[bytes] = 1;
    comm->device->free(comm->device, all, bytes);
    return st;
}

void grade_patch(llmpar_comm *table) { table->all_reduce = gather_and_add; }
