/* expect: rmsnorm */
/* expect: depends on where the buffers lie */
/* Sums the squares up to the first aligned element in f32 and the rest in double: both are within the bound, but the bits depend on the address. */
#include <math.h>

static llmpar_status (*original)(llmpar_device *device, llmpar_stream *stream, const llmpar_rmsnorm_args *args);
static llmpar_status rmsnorm(llmpar_device *device, llmpar_stream *stream, const llmpar_rmsnorm_args *a)
{
    if (a->dtype != LLMPAR_F32 || a->residual) return original(device, stream, a);
    for (int64_t r = 0; r < a->rows; r++) {
        const float *x = (const float *)a->x + r * a->dim;
        double sum = 0;
        for (int64_t j = 0; j < a->dim; j++) sum += (uintptr_t)(x + j) % 64 > 16 ? (double)(x[j] * x[j]) : (double)x[j] * (double)x[j];
        float rstd = (float)(1 / sqrt(sum / (double)a->dim + a->eps));
        ((float *)a->rstd)[r] = rstd;
        for (int64_t j = 0; j < a->dim; j++) ((float *)a->y)[r * a->dim + j] = x[j] * rstd * ((const float *)a->w)[j];
    }
    return LLMPAR_OK;
}

void grade_patch(llmpar_device *table)
{
    original = table->rmsnorm;
    table->rmsnorm = rmsnorm;
}
