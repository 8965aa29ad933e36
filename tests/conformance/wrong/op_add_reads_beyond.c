/* expect: add */
/* expect: out of bounds: element */
/* Reads one element more than there is, for nothing. */
static volatile float seen;
static llmpar_status (*original)(llmpar_device *device, llmpar_stream *stream, const llmpar_add_args *args);
static llmpar_status add(llmpar_device *device, llmpar_stream *stream, const llmpar_add_args *a)
{
    if (a->dtype == LLMPAR_F32) seen = ((const float *)a->a)[a->count];
    return original(device, stream, a);
}

void grade_patch(llmpar_device *table)
{
    original = table->add;
    table->add = add;
}
