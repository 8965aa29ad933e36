/* expect: all_reduce */
/* expect: all_reduce f32 sum, count 7, blocks 1, 3 ranks */
/* expect: the ranks one after another; the contract is the balanced tree over the rank index */
/* Sums from the right, the last rank first: with 3 ranks p0 + (p1 + p2) is not (p0 + p1) + p2. */
static llmpar_status (*original)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
static llmpar_status chain(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call)
{
    if (call->dtype != LLMPAR_F32 || call->op != LLMPAR_SUM) return original(comm, stream, call);
    size_t bytes = (size_t)comm->ranks * call->count * call->blocks * llmpar_dtype_size(call->dtype);
    void *all = NULL;
    llmpar_collective gather = *call;
    llmpar_status st = comm->device->alloc(comm->device, bytes, &all);
    if (st) return st;
    gather.recv = all;
    gather.count = call->count * call->blocks;
    gather.blocks = 1;
    st = llmpar_all_gather(comm, stream, &gather);
    size_t total = call->count * call->blocks;
    for (size_t i = 0; i < total && !st; i++) {
        float sum = ((float *)all)[(size_t)(comm->ranks - 1) * total + i];
        for (int r = comm->ranks - 2; r >= 0; r--) sum += ((float *)all)[(size_t)r * total + i];
        ((float *)call->recv)[i] = sum;
    }
    comm->device->free(comm->device, all, bytes);
    return st;
}

void grade_patch(llmpar_comm *table)
{
    __atomic_store_n(&original, table->all_reduce, __ATOMIC_SEQ_CST);
    table->all_reduce = chain;
}
