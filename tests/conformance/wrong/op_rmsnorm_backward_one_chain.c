/* expect: rmsnorm_backward */
/* expect: dw of all positions and of two halves added must have the same bits */
/* The gradient of the weights is one chain over the tokens of a leaf, where the contract cuts the positions into pieces and adds these in a tree. */
static llmpar_status (*original)(llmpar_device *device, llmpar_stream *stream, const llmpar_rmsnorm_backward_args *args);
static llmpar_status backward(llmpar_device *device, llmpar_stream *stream, const llmpar_rmsnorm_backward_args *a)
{
    llmpar_status st = original(device, stream, a);
    if (st || a->dtype != LLMPAR_F32 || !a->dw_leaves || a->dx == a->dy) return st;
    int64_t rows = a->tokens.batch * a->tokens.t / a->tokens.leaves;
    for (int64_t l = 0; l < a->tokens.leaves; l++)
        for (int64_t j = 0; j < a->dim; j++) {
            float sum = 0;
            for (int64_t r = l * rows; r < (l + 1) * rows; r++) sum += ((const float *)a->dy)[r * a->dim + j] * ((const float *)a->x)[r * a->dim + j] * ((const float *)a->rstd)[r];
            ((float *)a->dw_leaves)[l * a->dim + j] = sum;
        }
    return LLMPAR_OK;
}

void grade_patch(llmpar_device *table)
{
    original = table->rmsnorm_backward;
    table->rmsnorm_backward = backward;
}
