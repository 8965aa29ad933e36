/* expect: gemm */
/* expect: 8 pieces, piece 5 in two segments: 8 pieces at once and one by one must have the same bits */
/* Plain loops; right as a product, but its sum is one chain where the contract cuts it into pieces. */
static double at(const void *base, int64_t i, llmpar_dtype dtype) { return dtype == LLMPAR_F32 ? (double)((const float *)base)[i] : ((const double *)base)[i]; }

static llmpar_status gemm(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *a)
{
    (void)device;
    (void)stream;
    for (int64_t i = 0; i < a->m; i++)
        for (int64_t j = 0; j < a->n; j++) {
            double sum = a->accumulate ? at(a->c, i * a->ldc + j, a->dtype) : 0;
            for (int32_t s = 0; s < a->segment_count; s++) {
                const llmpar_gemm_segment *g = &a->segments[s];
                for (int64_t k = 0; k < g->k; k++) {
                    double x = at(g->a, a->kind == LLMPAR_GEMM_TN ? k * g->lda + i : i * g->lda + k, a->dtype), y = at(g->b, a->kind == LLMPAR_GEMM_NT ? j * g->ldb + k : k * g->ldb + j, a->dtype);
                    sum = a->dtype == LLMPAR_F32 ? (double)((float)sum + (float)x * (float)y) : sum + x * y;
                }
            }
            if (a->dtype == LLMPAR_F32) ((float *)a->c)[i * a->ldc + j] = (float)sum;
            else ((double *)a->c)[i * a->ldc + j] = sum;
        }
    return LLMPAR_OK;
}

void grade_patch(llmpar_device *table) { table->gemm = gemm; }
