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

/* Feature-test macros have to precede the first system header. */
#if defined(LLMPAR_NCCL_IMPLEMENTATION) && !defined(LLMPAR__NCCL_IMPLEMENTED)
#if defined(__STRICT_ANSI__) && (defined(_FEATURES_H) || defined(_SYS_CDEFS_H_)) && !defined(_GNU_SOURCE) && !defined(_DEFAULT_SOURCE) && !defined(_DARWIN_C_SOURCE)
#error "llmpar: in strict mode (-std=c99) llmpar_nccl.h must come before every system header in the file that defines LLMPAR_NCCL_IMPLEMENTATION; or compile that file with -std=gnu99 or -D_DEFAULT_SOURCE"
#endif
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#if defined(__APPLE__) && !defined(_DARWIN_C_SOURCE)
#define _DARWIN_C_SOURCE 1
#endif
#endif

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

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsign-conversion"
#ifdef __cplusplus
#pragma GCC diagnostic ignored "-Wold-style-cast"
#endif

#include "nccl/socket.c"
#include "nccl/meet.c"
#include "nccl/control.c"
#include "nccl/hub.c"
#include "nccl/watch.c"
#include "nccl/memory.c"
#include "nccl/collectives.c"
#include "nccl/world.c"

#pragma GCC diagnostic pop

#endif
#endif /* LLMPAR_NCCL_IMPLEMENTATION */
