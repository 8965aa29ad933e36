/* gemm_library: FAST matrix products: cuBLASLt in its own order (cuBLAS library manual, "Using the cuBLASLt API").

   The library's matrices are column-major, so it is asked for c^T = b^T a^T. Segments that go on along k where another one ended, whatever their pieces, are one product: all pieces of a dim, all leaves of a batch. Several products
   are added up by beta = 1: in c where that is f32, else in f32 in the workspace, from where the sum is rounded into c once.

   Segments whose rows are one element (stride 0), and products that the library has no algorithm for, go to the EXACT kernels, which need no workspace for one piece. They come first. Where c is below f32 and only one product
   follows a stride-0 segment with k = 1, a bias, the latter is stored in c and the product is added there: no rounding is added where the one element is 1.

   The algorithm that the library chose is kept for the shape, in a table of the device: of bounded size, the shape that came last drives out an older one. */
#include "cuda/tiles_internal.h"
#include "cuda/launch.h"
#include "cuda/gemm.cu"

enum { LLMPAR__CUDA_PRODUCTS = 512, LLMPAR__CUDA_PRODUCT_PLACES = 8, LLMPAR__CUDA_GROUPS = 24 };

/* What an algorithm is chosen for. No padding: compared as bytes. */
struct llmpar__cuda_product_shape {
    int64_t m, n, k, lda, ldb, ldc;
    uint64_t workspace;
    int32_t kind, dtype, out_dtype, add; /* add: c is added to */
    int32_t align_a, align_b, align_c, tf32;
};

struct llmpar__cuda_product {
    llmpar__cuda_product_shape shape;
    int32_t known, own;      /* own: the library has none; an EXACT kernel does it */
    cublasLtMatmulAlgo_t algorithm;
    size_t workspace;        /* that it uses */
};

struct llmpar__cuda_products { llmpar__cuda_product table[LLMPAR__CUDA_PRODUCTS]; uint32_t turn; };

/* Segments that lie one behind the other along k. */
struct llmpar__cuda_gemm_group { const unsigned char *a, *b; int64_t lda, ldb, k; };

static llmpar_status llmpar__cuda_library_check(llmpar_device *device, llmpar_stream *stream, cublasStatus_t code, const char *what)
{
    if (code == CUBLAS_STATUS_SUCCESS) return LLMPAR_OK;
    return llmpar__cuda_stick(device, stream, llmpar_error_set(device->error, LLMPAR_ERR_INTERNAL, "gemm: %s: %s: %s", what, cublasLtGetStatusName(code), cublasLtGetStatusString(code)));
}

static llmpar_status llmpar__cuda_library_create(llmpar_device *device)
{
    llmpar__cuda *cuda = llmpar__cuda_of(device);
    cublasStatus_t code;
    cuda->products = llmpar_heap_zalloc(cuda->heap, 1, sizeof(llmpar__cuda_products));
    if (!cuda->products) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "cuda: no memory for the table of products");
    code = cublasLtCreate(&cuda->lt);
    if (code == CUBLAS_STATUS_SUCCESS) return LLMPAR_OK;
    cuda->lt = NULL;
    return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "cuda: cublasLtCreate: %s: %s", cublasLtGetStatusName(code), cublasLtGetStatusString(code));
}

static void llmpar__cuda_library_destroy(llmpar_device *device)
{
    llmpar__cuda *cuda = llmpar__cuda_of(device);
    if (cuda->lt) cublasLtDestroy(cuda->lt);
    cuda->lt = NULL;
    llmpar_heap_free(cuda->heap, cuda->products);
    cuda->products = NULL;
}

/* ---- one product ---- */

static cudaDataType_t llmpar__cuda_library_type(llmpar_dtype dtype) { return dtype == LLMPAR_BF16 ? CUDA_R_16BF : dtype == LLMPAR_F16 ? CUDA_R_16F : CUDA_R_32F; }

static int32_t llmpar__cuda_pointer_alignment(const void *pointer) { return (int32_t)((uintptr_t)pointer % 256 ? (uintptr_t)pointer & (~(uintptr_t)pointer + 1) : 256); }

/* What the library calls a, b, c: b, a and c transposed. */
struct llmpar__cuda_library_call { cublasLtMatmulDescOpaque_t product; cublasLtMatrixLayoutOpaque_t a, b, c; };

static cublasStatus_t llmpar__cuda_library_describe(const llmpar__cuda_product_shape *shape, llmpar__cuda_library_call *call)
{
    cudaDataType_t type = llmpar__cuda_library_type((llmpar_dtype)shape->dtype);
    cublasOperation_t turn = CUBLAS_OP_T;
    int nt = shape->kind == LLMPAR_GEMM_NT, tn = shape->kind == LLMPAR_GEMM_TN;
    cublasStatus_t code = cublasLtMatmulDescInit(&call->product, shape->tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (code == CUBLAS_STATUS_SUCCESS && nt) code = cublasLtMatmulDescSetAttribute(&call->product, CUBLASLT_MATMUL_DESC_TRANSA, &turn, sizeof turn);
    if (code == CUBLAS_STATUS_SUCCESS && tn) code = cublasLtMatmulDescSetAttribute(&call->product, CUBLASLT_MATMUL_DESC_TRANSB, &turn, sizeof turn);
    if (code == CUBLAS_STATUS_SUCCESS) code = cublasLtMatrixLayoutInit(&call->a, type, (uint64_t)(nt ? shape->k : shape->n), (uint64_t)(nt ? shape->n : shape->k), shape->ldb);
    if (code == CUBLAS_STATUS_SUCCESS) code = cublasLtMatrixLayoutInit(&call->b, type, (uint64_t)(tn ? shape->m : shape->k), (uint64_t)(tn ? shape->k : shape->m), shape->lda);
    if (code == CUBLAS_STATUS_SUCCESS) code = cublasLtMatrixLayoutInit(&call->c, llmpar__cuda_library_type((llmpar_dtype)shape->out_dtype), (uint64_t)shape->n, (uint64_t)shape->m, shape->ldc);
    return code;
}

static cublasStatus_t llmpar__cuda_library_choose(const llmpar__cuda *cuda, llmpar__cuda_library_call *call, llmpar__cuda_product *product)
{
    cublasLtMatmulPreferenceOpaque_t preference;
    cublasLtMatmulHeuristicResult_t result;
    const llmpar__cuda_product_shape *shape = &product->shape;
    uint32_t align_a = (uint32_t)shape->align_b, align_b = (uint32_t)shape->align_a, align_c = (uint32_t)shape->align_c, reduction = CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    int found = 0;
    cublasStatus_t code = cublasLtMatmulPreferenceInit(&preference);
    memset(&result, 0, sizeof result);
    if (code == CUBLAS_STATUS_SUCCESS) code = cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &shape->workspace, sizeof shape->workspace);
    if (code == CUBLAS_STATUS_SUCCESS) code = cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &align_a, sizeof align_a);
    if (code == CUBLAS_STATUS_SUCCESS) code = cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &align_b, sizeof align_b);
    if (code == CUBLAS_STATUS_SUCCESS) code = cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &align_c, sizeof align_c);
    if (code == CUBLAS_STATUS_SUCCESS) code = cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &align_c, sizeof align_c);
    /* Parts of a sum over k are added in f32, also where c is below it: it is rounded once. */
    if (code == CUBLAS_STATUS_SUCCESS && shape->out_dtype != LLMPAR_F32) code = cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction, sizeof reduction);
    if (code != CUBLAS_STATUS_SUCCESS) return code;
    code = cublasLtMatmulAlgoGetHeuristic(cuda->lt, &call->product, &call->a, &call->b, &call->c, &call->c, &preference, 1, &result, &found);
    product->own = code == CUBLAS_STATUS_NOT_SUPPORTED || (code == CUBLAS_STATUS_SUCCESS && (!found || result.state != CUBLAS_STATUS_SUCCESS));
    if (product->own) return CUBLAS_STATUS_SUCCESS;
    product->algorithm = result.algo;
    product->workspace = result.workspaceSize;
    return code;
}

/* The shape's place in the table: its own, or one that is free or given up. */
static llmpar__cuda_product *llmpar__cuda_library_place(llmpar__cuda_products *products, const llmpar__cuda_product_shape *shape)
{
    const unsigned char *bytes = (const unsigned char *)shape;
    uint32_t hash = 2166136261u;
    for (size_t i = 0; i < sizeof *shape; i++) hash = (hash ^ bytes[i]) * 16777619u; /* FNV-1a */
    for (uint32_t i = 0; i < LLMPAR__CUDA_PRODUCT_PLACES; i++) {
        llmpar__cuda_product *place = &products->table[(hash + i) % LLMPAR__CUDA_PRODUCTS];
        if (!place->known || !memcmp(&place->shape, shape, sizeof *shape)) return place;
    }
    llmpar__cuda_product *place = &products->table[(hash + products->turn++ % LLMPAR__CUDA_PRODUCT_PLACES) % LLMPAR__CUDA_PRODUCTS];
    place->known = 0;
    return place;
}

/* out (f32 or the operands' type) = the segments, or out += them, by an EXACT kernel as one piece. */
static llmpar_status llmpar__cuda_library_own(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args, const llmpar_gemm_segment *segments, int32_t count, void *out, int64_t ldc, llmpar_dtype out_dtype, int add)
{
    llmpar_gemm_args own = *args;
    own.c = out;
    own.ldc = ldc;
    own.out_dtype = out_dtype;
    own.segments = segments;
    own.segment_count = count;
    own.pieces = 1;
    own.accumulate = add;
    return llmpar__cuda_gemm_exact(device, stream, &own);
}

/* The whole call by an EXACT kernel, as one piece. */
static llmpar_status llmpar__cuda_library_flat(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args)
{
    llmpar_gemm_segment few[LLMPAR__CUDA_GEMM_RUNS], *segments = few;
    llmpar_heap *heap = llmpar__cuda_of(device)->heap;
    if (args->segment_count > LLMPAR__CUDA_GEMM_RUNS) segments = (llmpar_gemm_segment *)llmpar_heap_alloc(heap, (size_t)args->segment_count, sizeof *segments);
    if (!segments) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "gemm: no memory for %d segments", (int)args->segment_count);
    for (int32_t s = 0; s < args->segment_count; s++) {
        segments[s] = args->segments[s];
        segments[s].piece = 0;
    }
    llmpar_status status = llmpar__cuda_library_own(device, stream, args, segments, args->segment_count, args->c, args->ldc, llmpar__cuda_gemm_out(args), args->accumulate != 0);
    if (segments != few) llmpar_heap_free(heap, segments);
    return status;
}

/* out = the group's product, or out += it. */
static llmpar_status llmpar__cuda_library_product(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args, const llmpar__cuda_gemm_group *group, void *out, int64_t ldc, llmpar_dtype out_dtype, int add)
{
    llmpar__cuda *cuda = llmpar__cuda_of(device);
    llmpar__cuda_stream *state = llmpar__cuda_stream_of(device, stream);
    llmpar__cuda_product_shape shape;
    llmpar__cuda_library_call call;
    int64_t size = (int64_t)llmpar_dtype_size(args->dtype), width_a, width_b;
    const float one = 1, beta = add ? 1.0f : 0.0f;
    memset(&shape, 0, sizeof shape);
    shape.m = args->m;
    shape.n = args->n;
    shape.k = group->k;
    shape.kind = (int32_t)args->kind;
    shape.dtype = (int32_t)args->dtype;
    shape.out_dtype = (int32_t)out_dtype;
    shape.add = add;
    shape.tf32 = args->dtype == LLMPAR_F32 && cuda->desc.tf32;
    shape.workspace = state->library ? cuda->desc.library_workspace : 0;
    /* one row may have any stride; the library wants its width at least */
    width_a = args->kind == LLMPAR_GEMM_TN ? args->m : group->k;
    width_b = args->kind == LLMPAR_GEMM_NT ? group->k : args->n;
    shape.lda = group->lda / size > width_a ? group->lda / size : width_a;
    shape.ldb = group->ldb / size > width_b ? group->ldb / size : width_b;
    shape.ldc = ldc > args->n ? ldc : args->n;
    shape.align_a = llmpar__cuda_pointer_alignment(group->a);
    shape.align_b = llmpar__cuda_pointer_alignment(group->b);
    shape.align_c = llmpar__cuda_pointer_alignment(out);
    llmpar__cuda_product *product = llmpar__cuda_library_place((llmpar__cuda_products *)cuda->products, &shape);
    llmpar_status status = llmpar__cuda_library_check(device, stream, llmpar__cuda_library_describe(&shape, &call), "the description of a product");
    if (status) return status;
    if (!product->known) {
        memset(product, 0, sizeof *product);
        product->shape = shape;
        status = llmpar__cuda_library_check(device, stream, llmpar__cuda_library_choose(cuda, &call, product), "cublasLtMatmulAlgoGetHeuristic");
        if (status) return status;
        product->known = 1;
    }
    if (product->own) {
        llmpar_gemm_segment segment = { group->a, group->b, group->lda / size, group->ldb / size, group->k, 0, 0, 0 };
        if (!add || out_dtype == llmpar_dtype_sum(args->dtype)) return llmpar__cuda_library_own(device, stream, args, &segment, 1, out, ldc, out_dtype, add);
        return llmpar__cuda_library_flat(device, stream, args); /* a product behind a bias, the only one: both again */
    }
    return llmpar__cuda_library_check(device, stream,
        cublasLtMatmul(cuda->lt, &call.product, &one, group->b, &call.a, group->a, &call.b, &beta, out, &call.c, out, &call.c, &product->algorithm, state->library, product->workspace, state->handle), "cublasLtMatmul");
}

/* ---- several ---- */

struct llmpar__cuda_gemm_groups {
    llmpar__cuda_gemm_group group[LLMPAR__CUDA_GROUPS];
    llmpar_gemm_segment own[LLMPAR__CUDA_GEMM_RUNS]; /* for an EXACT kernel */
    int32_t count, own_count;
    int64_t own_k;
};

/* 0 where they do not fit. */
static int llmpar__cuda_library_group(const llmpar_gemm_args *args, llmpar__cuda_gemm_groups *groups)
{
    int64_t size = (int64_t)llmpar_dtype_size(args->dtype);
    groups->count = groups->own_count = 0;
    groups->own_k = 0;
    for (int32_t s = 0; s < args->segment_count; s++) {
        const llmpar_gemm_segment *segment = &args->segments[s];
        int64_t a_rows = args->kind == LLMPAR_GEMM_TN ? segment->k : args->m, b_rows = args->kind == LLMPAR_GEMM_NT ? args->n : segment->k;
        int32_t g = 0;
        if (!segment->k) continue;
        if ((segment->lda == 0 && a_rows > 1) || (segment->ldb == 0 && b_rows > 1)) {
            if (groups->own_count == LLMPAR__CUDA_GEMM_RUNS) return 0;
            groups->own[groups->own_count] = *segment;
            groups->own[groups->own_count++].piece = 0;
            groups->own_k += segment->k;
            continue;
        }
        for (; g < groups->count; g++) {
            llmpar__cuda_gemm_group *group = &groups->group[g];
            if (group->lda == segment->lda * size && group->ldb == segment->ldb * size && (const unsigned char *)segment->a == group->a + group->k * (args->kind == LLMPAR_GEMM_TN ? group->lda : size)
                && (const unsigned char *)segment->b == group->b + group->k * (args->kind == LLMPAR_GEMM_NT ? size : group->ldb)) {
                group->k += segment->k;
                break;
            }
        }
        if (g < groups->count) continue;
        if (g == LLMPAR__CUDA_GROUPS) return 0;
        groups->group[g].a = (const unsigned char *)segment->a;
        groups->group[g].b = (const unsigned char *)segment->b;
        groups->group[g].lda = segment->lda * size;
        groups->group[g].ldb = segment->ldb * size;
        groups->group[g].k = segment->k;
        groups->count++;
    }
    return 1;
}

/* c = in, rounded: rows of n, 8 elements a thread. */
template <typename Half> static __global__ void llmpar__cuda_gemm_narrow(const float *in, Half *c, int64_t m, int64_t n, int64_t ldc, int aligned)
{
    int64_t units = (n + 7) / 8, count = m * units;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x) {
        int64_t row = llmpar__cuda_divide(i, units), j = (i - row * units) * 8;
        const float *from = in + row * n + j;
        Half *to = c + row * ldc + j;
        if (aligned && j + 8 <= n) {
            llmpar__cuda_16 low = ((const llmpar__cuda_16 *)(const void *)from)[0], high = ((const llmpar__cuda_16 *)(const void *)from)[1], out;
            for (int e = 0; e < 4; e++) {
                Half first, second;
                llmpar__cuda_store(&first, __uint_as_float(e < 2 ? low.word[2 * e] : high.word[2 * e - 4]));
                llmpar__cuda_store(&second, __uint_as_float(e < 2 ? low.word[2 * e + 1] : high.word[2 * e - 3]));
                out.word[e] = (uint32_t)first.bits | (uint32_t)second.bits << 16;
            }
            *(llmpar__cuda_16 *)(void *)to = out;
        } else
            for (int e = 0; e < 8 && j + e < n; e++) llmpar__cuda_store(&to[e], from[e]);
    }
}

static int llmpar__cuda_gemm_is_narrow(const llmpar_gemm_args *args) { return llmpar__cuda_gemm_out(args) != llmpar_dtype_sum(args->dtype); }

/* f32 sums where c is below f32 and a piece has several segments, which are of several matrices then; pointers, which would tell, may be NULL in a query. A call without them is done by an EXACT kernel. */
static size_t llmpar__cuda_gemm_library_workspace(llmpar_device *device, const llmpar_gemm_args *args)
{
    size_t list = args->segment_count > LLMPAR__CUDA_GEMM_RUNS ? (size_t)args->segment_count * sizeof(llmpar__cuda_gemm_run) + 15 : 0, sums = (size_t)args->m * (size_t)args->n * sizeof(float) + 255;
    int several = 0;
    (void)device;
    for (int32_t s = 1; s < args->segment_count; s++) several |= args->segments[s].piece == args->segments[s - 1].piece;
    if (!several || !llmpar__cuda_gemm_is_narrow(args) || sums < list) return list;
    return sums;
}

/* Arguments are checked, m and n not 0. */
static llmpar_status llmpar__cuda_gemm_library(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args)
{
    llmpar__cuda_gemm_groups groups;
    llmpar_dtype out_dtype = llmpar__cuda_gemm_out(args), sum_dtype = llmpar_dtype_sum(args->dtype);
    int narrow = llmpar__cuda_gemm_is_narrow(args), fits = llmpar__cuda_library_group(args, &groups), add = args->accumulate != 0, wide = 0;
    void *out = args->c;
    int64_t ldc = args->ldc;
    llmpar_status status = LLMPAR_OK;
    if (narrow && fits && groups.count + (groups.own_count > 0) > 1 && !(groups.count == 1 && groups.own_k == 1)) {
        unsigned char *at = (unsigned char *)args->workspace;
        if (at) at += (256 - (uintptr_t)at % 256) % 256;
        if (at && (size_t)(at - (unsigned char *)args->workspace) + (size_t)args->m * (size_t)args->n * sizeof(float) <= args->workspace_bytes) {
            out = at;
            ldc = args->n;
            out_dtype = sum_dtype;
            wide = 1;
        } else fits = 0;
    }
    if (!fits || groups.count == 0) return llmpar__cuda_library_flat(device, stream, args); /* no group: +0, or c as it is, or what has stride 0 */
    if (groups.own_count) {
        status = llmpar__cuda_library_own(device, stream, args, groups.own, groups.own_count, out, ldc, out_dtype, add);
        add = 1;
    }
    for (int32_t g = 0; g < groups.count && !status; g++) {
        status = llmpar__cuda_library_product(device, stream, args, &groups.group[g], out, ldc, out_dtype, add);
        add = 1;
    }
    if (status) return status;
    if (wide) {
        int aligned = args->n % 8 == 0 && (uintptr_t)args->c % 16 == 0 && (args->m == 1 || args->ldc % 8 == 0);
        unsigned blocks = llmpar__cuda_blocks(llmpar__cuda_of(device), args->m * ((args->n + 7) / 8), 256, 8);
        if (args->dtype == LLMPAR_BF16) llmpar__cuda_launch(device, stream, llmpar__cuda_gemm_narrow<llmpar__cuda_bf16>, dim3(blocks), dim3(256), 0, (const float *)out, (llmpar__cuda_bf16 *)args->c, args->m, args->n, args->ldc, aligned);
        else llmpar__cuda_launch(device, stream, llmpar__cuda_gemm_narrow<llmpar__cuda_f16>, dim3(blocks), dim3(256), 0, (const float *)out, (llmpar__cuda_f16 *)args->c, args->m, args->n, args->ldc, aligned);
    }
    return llmpar__cuda_end(device, stream, "gemm");
}
