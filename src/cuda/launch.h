/* launch: how a kernel gets onto a stream. */
#ifndef LLMPAR_CUDA_LAUNCH_H
#define LLMPAR_CUDA_LAUNCH_H

#include "cuda/cuda_internal.h"

/* Above 48 KiB a kernel has to be told. It is told the device's limit, not this launch's need: another rank's thread may be about to launch the same kernel with more. */
static inline cudaError_t llmpar__cuda_raise(llmpar_device *device, const void *kernel, size_t shared)
{
    return shared > 48 * 1024 ? cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)llmpar__cuda_of(device)->shared_limit) : cudaSuccess;
}

#ifdef LLMPAR_CUDA_EMULATED
template <typename... Parameters, typename... Arguments>
static void llmpar__cuda_launch_text(const char *text, const char *caller, llmpar_device *device, llmpar_stream *stream, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Arguments... args)
{
    cudaError_t code = llmpar__cuda_raise(device, (const void *)kernel, shared);
    if (code == cudaSuccess) (void)emulated_cuda_launch<Parameters...>(text, caller, kernel, grid, block, shared, llmpar__cuda_stream_of(device, stream)->handle, (Parameters)args...);
}
/* The text is for messages: which kernel. */
#define llmpar__cuda_launch(...) llmpar__cuda_launch_text(#__VA_ARGS__, __func__, __VA_ARGS__)
#else
/* The values have the kernel's own types here, so that their addresses are what a launch takes. */
template <typename... Parameters> static void llmpar__cuda_launch_values(cudaStream_t stream, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Parameters... values)
{
    void *pointers[] = {(void *)&values..., NULL};
    (void)cudaLaunchKernel((const void *)kernel, grid, block, pointers, shared, stream);
}
template <typename... Parameters, typename... Arguments>
static void llmpar__cuda_launch(llmpar_device *device, llmpar_stream *stream, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Arguments... args)
{
    cudaError_t code = llmpar__cuda_raise(device, (const void *)kernel, shared);
    if (code == cudaSuccess) llmpar__cuda_launch_values<Parameters...>(llmpar__cuda_stream_of(device, stream)->handle, kernel, grid, block, shared, (Parameters)args...);
}
#endif

#endif
