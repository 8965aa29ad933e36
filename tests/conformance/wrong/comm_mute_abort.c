/* expect: abort */
/* expect: the next collective returned "ok", expected "another rank failed" */
/* Tells nobody. */
static void mute(llmpar_comm *comm, const llmpar_error *error)
{
    (void)comm;
    (void)error;
}

void grade_patch(llmpar_comm *table) { table->abort = mute; }
