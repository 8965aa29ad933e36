/* expect: split */
/* expect: split into all in reverse, 2 ranks: rank 0 (tp=0): gave rank 0 of 2 on "half", expected rank 1 of 2 */
/* Ranks keep their order whatever their keys say. */
static llmpar_status (*original)(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out);
static llmpar_status keyless(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out)
{
    (void)key;
    return original(comm, color, 0, name, out);
}

void grade_patch(llmpar_comm *table)
{
    __atomic_store_n(&original, table->split, __ATOMIC_SEQ_CST);
    table->split = keyless;
}
