/* expect: swiglu */
/* expect: swiglu: f32 rows=5 dim=1: h[0,0]: expected */
/* expect: the bound is */
/* sigmoid(gate) * up: the gate itself is missing. */
#include <math.h>

static llmpar_status swiglu(llmpar_device *device, llmpar_stream *stream, const llmpar_swiglu_args *a)
{
    (void)device;
    (void)stream;
    for (int64_t r = 0; r < a->rows; r++)
        for (int64_t j = 0; j < a->dim; j++) {
            if (a->dtype == LLMPAR_F32) ((float *)a->h)[r * a->ld_out + j] = (float)(1 / (1 + exp(-(double)((const float *)a->gate)[r * a->ld_in + j]))) * ((const float *)a->up)[r * a->ld_in + j];
            else ((double *)a->h)[r * a->ld_out + j] = 1 / (1 + exp(-((const double *)a->gate)[r * a->ld_in + j])) * ((const double *)a->up)[r * a->ld_in + j];
        }
    return LLMPAR_OK;
}

void grade_patch(llmpar_device *table) { table->swiglu = swiglu; }
