/* expect: reduce_scatter */
/* expect: 5 ranks: rank 4 (tp=4): crashed: segmentation fault */
/* Follows a pointer to nowhere, with 5 ranks. */
static llmpar_status (*original)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
static llmpar_status wild(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call)
{
    volatile char *volatile nowhere = NULL;
    if (comm->rank == 4) nowhere[8] = 1;
    return original(comm, stream, call);
}

void grade_patch(llmpar_comm *table)
{
    __atomic_store_n(&original, table->reduce_scatter, __ATOMIC_SEQ_CST);
    table->reduce_scatter = wild;
}
