/* cublasLt: a stand-in for the product library on the emulated device, as much of it as gemm_library.cu calls. Products are plain loops in double on the stream. It refuses what the real one would, and what is likely to be a mistake:
   an algorithm of another shape than the call's, pointers less aligned than was promised, more workspace than was allowed, strides below a matrix' rows. It has no algorithm for operands below 4 bytes of alignment, so
   that callers have to do without. */
#ifndef EMULATED_CUBLASLT_H
#define EMULATED_CUBLASLT_H

#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

typedef struct cublasLtContext *cublasLtHandle_t;
struct cublasLtContext { int live; };
typedef enum { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_NOT_INITIALIZED = 1, CUBLAS_STATUS_ALLOC_FAILED = 3, CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_NOT_SUPPORTED = 15 } cublasStatus_t;
typedef enum { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 } cublasOperation_t;
typedef enum { CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_FAST_TF32 = 77 } cublasComputeType_t;
typedef enum { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14 } cudaDataType_t;
typedef enum { CUBLASLT_MATMUL_DESC_TRANSA = 3, CUBLASLT_MATMUL_DESC_TRANSB = 4 } cublasLtMatmulDescAttributes_t;
typedef enum {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8
} cublasLtMatmulPreferenceAttributes_t;

typedef enum { CUBLASLT_REDUCTION_SCHEME_NONE = 0, CUBLASLT_REDUCTION_SCHEME_INPLACE = 1, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2, CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE = 4, CUBLASLT_REDUCTION_SCHEME_MASK = 7 } cublasLtReductionScheme_t;

typedef struct { uint64_t type, rows, columns, ld, data[4]; } cublasLtMatrixLayoutOpaque_t, *cublasLtMatrixLayout_t;
typedef struct { uint64_t compute, scale, turn_a, turn_b, data[28]; } cublasLtMatmulDescOpaque_t, *cublasLtMatmulDesc_t;
typedef struct { uint64_t workspace, align[4], reduction, data[2]; } cublasLtMatmulPreferenceOpaque_t, *cublasLtMatmulPreference_t;
typedef struct { uint64_t shape, align[4], halves, data[2]; } cublasLtMatmulAlgo_t; /* halves: the two halves of k are added up in c's type, as the real library's split k does where it may */
typedef struct { cublasLtMatmulAlgo_t algo; size_t workspaceSize; cublasStatus_t state; float wavesCount; int reserved[4]; } cublasLtMatmulHeuristicResult_t;

static inline const char *cublasLtGetStatusName(cublasStatus_t status)
{
    switch (status) {
    case CUBLAS_STATUS_SUCCESS: return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_ALLOC_FAILED: return "CUBLAS_STATUS_ALLOC_FAILED";
    case CUBLAS_STATUS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
    default: return "CUBLAS_STATUS_NOT_SUPPORTED";
    }
}
static inline const char *cublasLtGetStatusString(cublasStatus_t status) { return status == CUBLAS_STATUS_SUCCESS ? "success" : "of the emulated library"; }

static inline cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle)
{
    *handle = (cublasLtHandle_t)calloc(1, sizeof **handle);
    return *handle ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_ALLOC_FAILED;
}
static inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle)
{
    free(handle);
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatrixLayoutInit(cublasLtMatrixLayout_t layout, cudaDataType_t type, uint64_t rows, uint64_t columns, int64_t ld)
{
    memset(layout, 0, sizeof *layout);
    layout->type = (uint64_t)type;
    layout->rows = rows;
    layout->columns = columns;
    layout->ld = (uint64_t)ld;
    return ld < (int64_t)rows || !rows || !columns ? CUBLAS_STATUS_INVALID_VALUE : CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatmulDescInit(cublasLtMatmulDesc_t product, cublasComputeType_t compute, cudaDataType_t scale)
{
    memset(product, 0, sizeof *product);
    product->compute = (uint64_t)compute;
    product->scale = (uint64_t)scale;
    return scale == CUDA_R_32F ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}
static inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t product, cublasLtMatmulDescAttributes_t attribute, const void *value, size_t bytes)
{
    cublasOperation_t turn;
    if (bytes != sizeof turn) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(&turn, value, bytes);
    *(attribute == CUBLASLT_MATMUL_DESC_TRANSA ? &product->turn_a : &product->turn_b) = turn == CUBLAS_OP_T;
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatmulPreferenceInit(cublasLtMatmulPreference_t preference)
{
    memset(preference, 0, sizeof *preference);
    for (int i = 0; i < 4; i++) preference->align[i] = 256;
    preference->reduction = CUBLASLT_REDUCTION_SCHEME_MASK;
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute, const void *value, size_t bytes)
{
    uint32_t align;
    if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) {
        if (bytes != sizeof preference->workspace) return CUBLAS_STATUS_INVALID_VALUE;
        memcpy(&preference->workspace, value, bytes);
        return CUBLAS_STATUS_SUCCESS;
    }
    if (bytes != sizeof align) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(&align, value, bytes);
    if (attribute == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK) {
        preference->reduction = align;
        return align > CUBLASLT_REDUCTION_SCHEME_MASK ? CUBLAS_STATUS_INVALID_VALUE : CUBLAS_STATUS_SUCCESS;
    }
    if (!align || (align & (align - 1))) return CUBLAS_STATUS_INVALID_VALUE;
    preference->align[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES] = align;
    return CUBLAS_STATUS_SUCCESS;
}

/* Of all that an algorithm depends on; 0 where the matrices do not fit each other. */
static inline uint64_t emulated_cublaslt_shape(const cublasLtMatmulDescOpaque_t *product, const cublasLtMatrixLayoutOpaque_t *a, const cublasLtMatrixLayoutOpaque_t *b, const cublasLtMatrixLayoutOpaque_t *c)
{
    uint64_t m = product->turn_a ? a->columns : a->rows, k = product->turn_a ? a->rows : a->columns, k_b = product->turn_b ? b->columns : b->rows, n = product->turn_b ? b->rows : b->columns, hash = 1469598103934665603u;
    const cublasLtMatrixLayoutOpaque_t *layouts[3] = {a, b, c};
    if (k != k_b || c->rows != m || c->columns != n || a->type != b->type || (c->type != CUDA_R_32F && c->type != a->type)) return 0;
    if (product->compute == CUBLAS_COMPUTE_32F_FAST_TF32 && a->type != CUDA_R_32F) return 0;
    for (size_t i = 0; i < 4; i++) hash = (hash ^ ((const uint64_t *)product)[i]) * 1099511628211u;
    for (int l = 0; l < 3; l++)
        for (size_t i = 0; i < 4; i++) hash = (hash ^ ((const uint64_t *)layouts[l])[i]) * 1099511628211u;
    return hash | 1u;
}

static inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t product, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                                            cublasLtMatmulPreference_t preference, int wanted, cublasLtMatmulHeuristicResult_t *results, int *found)
{
    uint64_t shape = emulated_cublaslt_shape(product, a, b, c);
    *found = 0;
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (wanted < 1 || !shape || memcmp(c, d, sizeof *c)) return CUBLAS_STATUS_INVALID_VALUE;
    for (int i = 0; i < 4; i++)
        if (preference->align[i] < 4) return CUBLAS_STATUS_NOT_SUPPORTED;
    memset(results, 0, sizeof *results);
    results->algo.shape = shape;
    memcpy(results->algo.align, preference->align, sizeof results->algo.align);
    results->algo.halves = (preference->reduction & (CUBLASLT_REDUCTION_SCHEME_INPLACE | CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE)) != 0;
    results->workspaceSize = preference->workspace < 4096 ? (size_t)preference->workspace : 4096;
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}

static inline float emulated_cublaslt_get(const void *base, uint64_t i, uint64_t type)
{
    if (type == CUDA_R_32F) return ((const float *)base)[i];
    uint16_t bits = ((const uint16_t *)base)[i];
    return type == CUDA_R_16BF ? llmpar_bf16_to_f32(bits) : llmpar_f16_to_f32(bits);
}

static inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t product, const void *alpha, const void *a, cublasLtMatrixLayout_t layout_a, const void *b, cublasLtMatrixLayout_t layout_b, const void *beta,
                                            const void *c, cublasLtMatrixLayout_t layout_c, void *d, cublasLtMatrixLayout_t layout_d, const cublasLtMatmulAlgo_t *algorithm, void *workspace, size_t workspace_bytes, cudaStream_t stream)
{
    const void *pointers[4] = {a, b, c, d};
    cublasLtMatmulDescOpaque_t p = *product;
    cublasLtMatrixLayoutOpaque_t la = *layout_a, lb = *layout_b, ld = *layout_d;
    float scale = *(const float *)alpha, old = *(const float *)beta;
    uint64_t halves = algorithm->halves;
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (emulated_cublaslt_shape(product, layout_a, layout_b, layout_c) != algorithm->shape || memcmp(layout_c, layout_d, sizeof *layout_c)) return CUBLAS_STATUS_INVALID_VALUE;
    for (int i = 0; i < 4; i++)
        if ((uintptr_t)pointers[i] % algorithm->align[i]) return CUBLAS_STATUS_INVALID_VALUE;
    cudaError_t code = emulated_cuda_enqueue_call("cublasLtMatmul", [=]() {
        uint64_t inner = p.turn_a ? la.rows : la.columns, middle = halves ? inner / 2 : inner;
        if (workspace_bytes) memset(workspace, 0xff, workspace_bytes);
        for (uint64_t j = 0; j < ld.columns; j++)
            for (uint64_t i = 0; i < ld.rows; i++)
                for (uint64_t from = 0, to = middle, turn = 0; turn < 1u + halves; turn++, from = to, to = inner) {
                    double sum = 0, before = turn ? 1 : old;
                    for (uint64_t k = from; k < to; k++)
                        sum += (double)emulated_cublaslt_get(a, p.turn_a ? i * la.ld + k : k * la.ld + i, la.type) * emulated_cublaslt_get(b, p.turn_b ? k * lb.ld + j : j * lb.ld + k, lb.type);
                    sum *= scale;
                    if (before != 0) sum += before * emulated_cublaslt_get(turn ? d : c, j * ld.ld + i, ld.type);
                    if (ld.type == CUDA_R_32F) ((float *)d)[j * ld.ld + i] = (float)sum;
                    else ((uint16_t *)d)[j * ld.ld + i] = ld.type == CUDA_R_16BF ? llmpar_f32_to_bf16((float)sum) : llmpar_f32_to_f16((float)sum);
                }
    }, stream);
    return code == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

#endif
