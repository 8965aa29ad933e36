/* GENERATED from src/: edit there, then run make gen */
#ifndef LLMPAR__TEMPLATE
/*
llmpar_cuda.h - the CUDA device for llmpar

    THE BACKEND IS NOT PART OF THIS VERSION. This header reserves its name and shows how it is meant to be used; it
    declares no device. Programs run on the CPU device of llmpar.h, or on a device table (llmpar_device) of their own.

DO THIS (once the backend is there)

    In ONE .cu file:

        #define LLMPAR_CUDA_IMPLEMENTATION
        #include "llmpar_cuda.h"

    and LLMPAR_IMPLEMENTATION in a .c or .cc file as for llmpar.h. Everywhere else include "llmpar_cuda.h" alone: its
    declarations need no CUDA header.

    MIT licence, as llmpar.h.
*/
#include "llmpar.h"

#ifndef LLMPAR_CUDA_H
#define LLMPAR_CUDA_H

/* 1 once this header declares the device. */
#define LLMPAR_CUDA_AVAILABLE 0

#endif /* LLMPAR_CUDA_H */

#ifdef LLMPAR_CUDA_IMPLEMENTATION
#error "llmpar_cuda.h: the CUDA device is not part of this version; remove LLMPAR_CUDA_IMPLEMENTATION and use the CPU device of llmpar.h"
#endif
#endif /* LLMPAR__TEMPLATE */
