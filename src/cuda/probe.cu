/* probe: a kernel of which the device asks whether the program holds code for the GPU; and which cannot be compiled with flags that change what the other kernels compute.
   nvcc defines no macro for --use_fast_math and its parts, but the compiler behind it answers __nvvm_reflect (NVVM IR specification, "Reflection parameters"); a call that stays after that names what is wrong, since nobody defines it. */
#include "cuda/cuda_internal.h"

#if defined(__USE_FAST_MATH__) || defined(__FAST_MATH__)
#error "llmpar_cuda.h: --use_fast_math changes what is computed, and differently in every kernel: compile without it"
#endif

#if !defined(LLMPAR_CUDA_EMULATED)
extern "C" __device__ int __nvvm_reflect(const char *what);
extern __device__ void llmpar_cuda_h_has_to_be_compiled_without_use_fast_math_and_its_parts();
#endif

static __global__ void llmpar__cuda_probe(int *out)
{
#if !defined(LLMPAR_CUDA_EMULATED)
    if (__nvvm_reflect("__CUDA_FTZ")) llmpar_cuda_h_has_to_be_compiled_without_use_fast_math_and_its_parts();
#if __CUDACC_VER_MAJOR__ >= 13
    if (!__nvvm_reflect("__CUDA_PREC_DIV") || !__nvvm_reflect("__CUDA_PREC_SQRT")) llmpar_cuda_h_has_to_be_compiled_without_use_fast_math_and_its_parts();
#endif
#endif
    *out = 1;
}
