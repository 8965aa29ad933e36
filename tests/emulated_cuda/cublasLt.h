/* cublasLt: stand-in for the product library, for the emulated device. */
#ifndef EMULATED_CUBLASLT_H
#define EMULATED_CUBLASLT_H

#include <cuda_runtime.h>

typedef struct cublasLtContext *cublasLtHandle_t;

#endif
