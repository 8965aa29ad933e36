/* The CUDA device itself: memory, streams, events, host calls, failures. */
#include "cuda.h"

TEST(creates)
{
    llmpar_device *device;
    llmpar_cuda_desc desc;
    CUDA_OPEN();
    CHECK_TEXT(cuda_gpu->name, "cuda sm_");
    CHECK_TEXT(cuda_gpu->name, " exact ");
    CHECK_INT(cuda_gpu->apart, 1);
    CHECK(cuda_gpu->alignment >= 256);
    memset(&desc, 0, sizeof desc);
    desc.tf32 = 1;
    CUDA_REFUSED(llmpar_cuda_create(&cuda_ctx, &desc, &device), LLMPAR_ERR_ARGUMENT, "tf32 with mode exact");
    memset(&desc, 0, sizeof desc);
    desc.mode = (llmpar_cuda_mode)7;
    CUDA_REFUSED(llmpar_cuda_create(&cuda_ctx, &desc, &device), LLMPAR_ERR_ARGUMENT, "mode 7");
}

TEST(copies)
{
    int64_t sizes[] = {1, 255, 4096, 100003};
    CUDA_OPEN();
    for (int i = 0; i < 4; i++) {
        int64_t n = sizes[i];
        double *x = ops_random(n, 1.0), *y = ops_zeros(n);
        void *a = cuda_put_vector(cuda_gpu, LLMPAR_F32, x, n), *b = cuda_put(cuda_gpu, LLMPAR_F32, NULL, 1, n, n, 1);
        CHECK_INT((uintptr_t)cuda_find(a)->memory % 256, 0);
        CUDA_OK(cuda_gpu->copy(cuda_gpu, NULL, b, a, (size_t)n * 4));
        cuda_get(b, y);
        cuda_same("copy", y, x, n);
        CUDA_OK(cuda_gpu->zero(cuda_gpu, NULL, b, (size_t)n * 4));
        cuda_get(b, y);
        for (int64_t k = 0; k < n; k++) if (y[k] != 0.0) { TEST_FAIL("zero"); break; }
        cuda_done();
        free(x);
        free(y);
    }
    CUDA_OK(cuda_gpu->copy(cuda_gpu, NULL, NULL, NULL, 0));
}

TEST_LIST(T_(creates), T_(copies), T_(cuda_end))
