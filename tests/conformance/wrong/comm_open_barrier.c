/* expect: barrier */
/* expect: came through when 1 of 2 ranks had arrived */
/* A barrier that holds nobody. */
static llmpar_status open_barrier(llmpar_comm *comm, llmpar_stream *stream, const char *tag)
{
    (void)comm;
    (void)stream;
    (void)tag;
    return LLMPAR_OK;
}

void grade_patch(llmpar_comm *table) { table->barrier = open_barrier; }
