/* expect: all_to_all */
/* expect: all_to_all f32, count 7, blocks 1, 3 ranks: hangs */
/* Waits for something that never comes. */
static llmpar_status (*original)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
static int never;
static llmpar_status patient(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call)
{
    while (comm->rank == 2 && !__atomic_load_n(&never, __ATOMIC_SEQ_CST)) {}
    return original(comm, stream, call);
}

void grade_patch(llmpar_comm *table)
{
    __atomic_store_n(&original, table->all_to_all, __ATOMIC_SEQ_CST);
    table->all_to_all = patient;
}
