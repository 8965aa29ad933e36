/* expect: max */
/* expect: expected the bits of nan, got */
/* A NaN is larger than nothing: it gets lost. */
static llmpar_status (*original)(llmpar_device *device, llmpar_stream *stream, const llmpar_max_args *args);
static llmpar_status max(llmpar_device *device, llmpar_stream *stream, const llmpar_max_args *a)
{
    if (a->dtype != LLMPAR_F32) return original(device, stream, a);
    for (size_t i = 0; i < a->count; i++) {
        float most = ((const float *)a->in[0])[i];
        for (int32_t j = 1; j < a->n; j++) most = ((const float *)a->in[j])[i] > most ? ((const float *)a->in[j])[i] : most;
        ((float *)a->out)[i] = most;
    }
    return LLMPAR_OK;
}

void grade_patch(llmpar_device *table)
{
    original = table->max;
    table->max = max;
}
