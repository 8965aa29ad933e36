/*
llmpar_cuda.h - the CUDA device for llmpar

DO THIS

    In ONE .cu file:

        #define LLMPAR_CUDA_IMPLEMENTATION
        #include "llmpar_cuda.h"

    and LLMPAR_IMPLEMENTATION in a .c or .cc file as for llmpar.h. Everywhere else include "llmpar_cuda.h" alone: its
    declarations need no CUDA header.

    Then name the backend in the launch desc, and the same program runs on GPUs:

        llmpar_backend gpu = {0};
        llmpar_cuda_backend(NULL, &gpu);
        launch.backend = &gpu;

    Ranks that are threads of one process share a GPU, or take one each; processes with a GPU each talk through llmpar_nccl.h.

    MIT licence, as llmpar.h.
*/
#include "llmpar.h"

#ifndef LLMPAR_CUDA_H
#define LLMPAR_CUDA_H

LLMPAR_EXTERN_C_BEGIN
#include "cuda/cuda.h"
LLMPAR_EXTERN_C_END

#endif /* LLMPAR_CUDA_H */

#ifdef LLMPAR_CUDA_IMPLEMENTATION
#ifndef LLMPAR__CUDA_IMPLEMENTED
#define LLMPAR__CUDA_IMPLEMENTED

#if !defined(__CUDACC__) && !defined(LLMPAR_CUDA_EMULATED)
#error "llmpar_cuda.h: LLMPAR_CUDA_IMPLEMENTATION belongs in a .cu file that nvcc compiles"
#else
#include "cuda/probe.cu"

#include "cuda/norm.cu"
#include "cuda/rope.cu"
#include "cuda/swiglu.cu"
#include "cuda/embedding.cu"
#include "cuda/xent.cu"
#include "cuda/elementwise.cu"
#include "cuda/gemm_half.cu"
#include "cuda/gemm_f32.cu"
#include "cuda/gemm.cu"
#include "cuda/gemm_library.cu"

#include "cuda/attention_internal.h"
#include "cuda/attention.cu"
#include "cuda/attention_decode.cu"
#include "cuda/attention_backward.cu"
#include "cuda/attention_simple.cu"
#include "cuda/attention_cudnn.cu"
#include "cuda/cast.cu"
#include "cuda/tree_sum.cu"
#include "cuda/optim.cu"
#include "cuda/squares.cu"
#include "cuda/xent_loss.cu"
#include "cuda/adalomo.cu"
#include "cuda/shared_comm.cu"
#include "cuda/graphs.cu"
#include "cuda/device.cu"

#endif
#endif
#endif /* LLMPAR_CUDA_IMPLEMENTATION */
