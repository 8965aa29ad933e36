/* expect: broadcast */
/* expect: the process ended itself (exit code 0) */
/* Leaves the building. */
#include <stdlib.h>

static llmpar_status leave(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call)
{
    (void)comm;
    (void)stream;
    (void)call;
    exit(0);
}

void grade_patch(llmpar_comm *table) { table->broadcast = leave; }
