/* dtype: element types and conversions. Every narrowing rounds to nearest, ties to even; NaN stays NaN. */
#ifndef LLMPAR_DTYPE_H
#define LLMPAR_DTYPE_H

#include "base/platform.h"

typedef enum llmpar_dtype {
    LLMPAR_DTYPE_DEFAULT = 0, /* each desc says what it means there; never a stored type */
    LLMPAR_F32 = 1,
    LLMPAR_F64 = 2,
    LLMPAR_BF16 = 3,
    LLMPAR_F16 = 4,
    LLMPAR_I32 = 5,
    LLMPAR_I64 = 6,
    LLMPAR_U64 = 7,
    LLMPAR_U8 = 8,
    LLMPAR_DTYPE_COUNT = 9
} llmpar_dtype;

/* Bytes of one element; 0 for DEFAULT or an unknown value. */
LLMPAR_API size_t llmpar_dtype_size(llmpar_dtype dtype);
/* The type that sums over elements of `dtype` are kept in (gradients, reductions, row statistics): F32 for BF16 and F16, else the type itself. */
LLMPAR_API llmpar_dtype llmpar_dtype_sum(llmpar_dtype dtype);
/* "f32", "bf16", ...; "?" for an unknown value. */
LLMPAR_API const char *llmpar_dtype_name(llmpar_dtype dtype);

/* Bit patterns. NaNs become the quiet NaN with the sign and the leading payload bits kept (bf16: x86/torch truncation
   with the quiet bit set). f16 overflow gives infinity, subnormals are exact. */
LLMPAR_API uint16_t llmpar_f32_to_bf16(float value);
LLMPAR_API float llmpar_bf16_to_f32(uint16_t bits);
LLMPAR_API uint16_t llmpar_f32_to_f16(float value);
LLMPAR_API float llmpar_f16_to_f32(uint16_t bits);

/* count elements from one floating dtype to another (f32, f64, bf16, f16 in any pair; f64 -> 16 bit rounds once).
   Buffers must not overlap unless identical types. Returns 0 for a dtype that is not floating, else 1. */
LLMPAR_API int llmpar_convert(void *out, llmpar_dtype out_dtype, const void *in, llmpar_dtype in_dtype, size_t count);

#endif
