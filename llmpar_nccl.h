/* GENERATED from src/: edit there, then run make gen */
#ifndef LLMPAR__TEMPLATE
/*
llmpar_nccl.h - the NCCL communicator for llmpar

    THE BACKEND IS NOT PART OF THIS VERSION. This header reserves its name and shows how it is meant to be used; it
    declares no communicator. Programs run on the rank threads of llmpar.h, or on a communicator table (llmpar_comm)
    of their own.

DO THIS (once the backend is there)

    In ONE .c file (plain C, no nvcc needed):

        #define LLMPAR_NCCL_IMPLEMENTATION
        #include "llmpar_nccl.h"

    and LLMPAR_IMPLEMENTATION as for llmpar.h. Everywhere else include "llmpar_nccl.h" alone: its declarations need no
    NCCL header.

    MIT licence, as llmpar.h.
*/
#include "llmpar.h"

#ifndef LLMPAR_NCCL_H
#define LLMPAR_NCCL_H

/* 1 once this header declares the communicator. */
#define LLMPAR_NCCL_AVAILABLE 0

#endif /* LLMPAR_NCCL_H */

#ifdef LLMPAR_NCCL_IMPLEMENTATION
#error "llmpar_nccl.h: the NCCL communicator is not part of this version; remove LLMPAR_NCCL_IMPLEMENTATION and use the rank threads of llmpar.h"
#endif
#endif /* LLMPAR__TEMPLATE */
