/* expect: all_gather */
/* expect: all_gather f32, count 7, blocks 2, 2 ranks: rank 0 (tp=0): recv[14] (block 1, part of rank 0, element 0) */
/* expect: never written */
/* One block is enough for everybody. */
static llmpar_status (*original)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
static llmpar_status one_block(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call)
{
    llmpar_collective c = *call;
    c.blocks = 1;
    comm->all_gather = original;
    llmpar_status st = llmpar_all_gather(comm, stream, &c);
    comm->all_gather = one_block;
    return st;
}

void grade_patch(llmpar_comm *table)
{
    __atomic_store_n(&original, table->all_gather, __ATOMIC_SEQ_CST);
    table->all_gather = one_block;
}
