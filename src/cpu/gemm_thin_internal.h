/* gemm_thin: products of few rows with weights as they lie, y[M,N] = x[M,K] w[N,K]^T, at the speed of memory. */
#ifndef LLMPAR_GEMM_THIN_INTERNAL_H
#define LLMPAR_GEMM_THIN_INTERNAL_H

#include "cpu/half_internal.h"

/* Whether this product is one of gemm_thin's: NT, at most 16 rows, a type it reads at this level. Its bits are those of any other path. */
LLMPAR__PRIVATE int llmpar__gemm_thin_takes(const llmpar__cpu *cpu, const llmpar_gemm_args *args);
LLMPAR__PRIVATE size_t llmpar__gemm_thin_workspace(const llmpar__cpu *cpu, const llmpar_gemm_args *args);
/* args->workspace has that many bytes. */
LLMPAR__PRIVATE void llmpar__gemm_thin(llmpar__cpu *cpu, const llmpar_gemm_args *args);

#endif
