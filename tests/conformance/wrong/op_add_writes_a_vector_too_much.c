/* expect: add */
/* expect: wrote out of bounds: element */
/* expect: of out */
/* Rounds the count up to a vector of 16. */
static llmpar_status add(llmpar_device *device, llmpar_stream *stream, const llmpar_add_args *a)
{
    size_t count = (a->count + 15) / 16 * 16;
    (void)device;
    (void)stream;
    for (size_t i = 0; i < count; i++) {
        size_t j = i < a->count ? i : 0;
        if (a->dtype == LLMPAR_F32) ((float *)a->out)[i] = ((const float *)a->a)[j] + ((const float *)a->b)[j];
        else ((double *)a->out)[i] = ((const double *)a->a)[j] + ((const double *)a->b)[j];
    }
    return LLMPAR_OK;
}

void grade_patch(llmpar_device *table) { table->add = add; }
