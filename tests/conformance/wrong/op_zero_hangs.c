/* expect: zero */
/* expect: zero: f32 count=100: hangs */
/* Counts with too few bits. */
static llmpar_status zero(llmpar_device *device, llmpar_stream *stream, void *out, size_t bytes)
{
    (void)device;
    (void)stream;
    for (unsigned char i = 0; i < bytes; i++) __atomic_store_n((char *)out + i, 0, __ATOMIC_RELAXED);
    return LLMPAR_OK;
}

void grade_patch(llmpar_device *table) { table->zero = zero; }
