/* expect: copy_rows */
/* expect: f32 rows=3 width=5 ld_in=7 ld_out=6: out[1,0]: expected the bits of */
/* expect: never written, or computed from what lies outside a buffer */
/* Takes the rows of the input as if they had no gap. */
#include <string.h>

static llmpar_status copy_rows(llmpar_device *device, llmpar_stream *stream, const llmpar_copy_rows_args *a)
{
    (void)device;
    (void)stream;
    for (int64_t r = 0; r < a->rows; r++) memcpy((char *)a->out + (size_t)(r * a->ld_out) * a->size, (const char *)a->in + (size_t)(r * a->width) * a->size, (size_t)a->width * a->size);
    return LLMPAR_OK;
}

void grade_patch(llmpar_device *table) { table->copy_rows = copy_rows; }
