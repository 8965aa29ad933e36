/* expect: streams */
/* expect: the failure of a stream must stick */
/* Every synchronize starts afresh. */
static llmpar_status (*original)(llmpar_device *device, llmpar_stream *stream);
static int failures;
static llmpar_status synchronize(llmpar_device *device, llmpar_stream *stream)
{
    llmpar_status st = original(device, stream);
    return st && failures++ % 2 ? LLMPAR_OK : st;
}

void grade_patch(llmpar_device *table)
{
    original = table->synchronize;
    table->synchronize = synchronize;
}
