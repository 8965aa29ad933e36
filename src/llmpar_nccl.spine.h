/*
llmpar_nccl.h - the NCCL communicator for llmpar

DO THIS

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

LLMPAR_EXTERN_C_BEGIN
#include "nccl/nccl.h"
LLMPAR_EXTERN_C_END

#endif /* LLMPAR_NCCL_H */

#ifdef LLMPAR_NCCL_IMPLEMENTATION
#ifndef LLMPAR__NCCL_IMPLEMENTED
#define LLMPAR__NCCL_IMPLEMENTED

#endif
#endif /* LLMPAR_NCCL_IMPLEMENTATION */
