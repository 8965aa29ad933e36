/* expect: cast */
/* expect: f32 to bf16 */
/* expect: expected the bits of */
/* Cuts the low half off instead of rounding to nearest even. */
static llmpar_status (*original)(llmpar_device *device, llmpar_stream *stream, const llmpar_cast_args *args);
static llmpar_status cast(llmpar_device *device, llmpar_stream *stream, const llmpar_cast_args *a)
{
    if (a->in_dtype != LLMPAR_F32 || a->out_dtype != LLMPAR_BF16) return original(device, stream, a);
    for (size_t i = 0; i < a->count; i++) ((uint16_t *)a->out)[i] = (uint16_t)(((const uint32_t *)a->in)[i] >> 16);
    return LLMPAR_OK;
}

void grade_patch(llmpar_device *table)
{
    original = table->cast;
    table->cast = cast;
}
