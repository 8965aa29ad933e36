/* math: the library's own elementary functions. Kernels call no libm, so that the same source gives the same bits with any
   C library; each states its error. All are pure and thread-safe. The *_f32 functions are written branch-light so that a loop over
   them can be vectorised; they use no fma (bits do not depend on the instruction set). */
#ifndef LLMPAR_MATH_H
#define LLMPAR_MATH_H

#include "base/platform.h"

LLMPAR_API float llmpar_exp_f32(float x);   /* <= 2 ulp; under -104 gives 0, over 88.73 inf; NaN in, NaN out; results may be subnormal (<= 1 ulp of the smallest subnormal) */
LLMPAR_API float llmpar_log_f32(float x);   /* <= 2 ulp, subnormals included; 0 gives -inf, negative gives NaN */
LLMPAR_API double llmpar_exp_f64(double x); /* <= 2 ulp */
LLMPAR_API double llmpar_log_f64(double x); /* <= 2 ulp */
LLMPAR_API double llmpar_pow_f64(double base, double exponent); /* base >= 0, else NaN; 0 and infinite arguments as IEEE pow; relative error <= 4e-15 for results in [1e-30, 1e30] */
/* sine and cosine of x, |x| <= 1e9 (Cody-Waite with a three-part pi/2 and own polynomials): absolute error <= 2^-52.
   Beyond 1e9, infinite or NaN: both NaN. */
LLMPAR_API void llmpar_sincos_f64(double x, double *sine, double *cosine);
LLMPAR_API double llmpar_sqrt_f64(double x); /* correctly rounded (IEEE) */
LLMPAR_API float llmpar_sqrt_f32(float x);   /* correctly rounded (IEEE) */
LLMPAR_API int llmpar_isfinite_f32(float x); /* by bits; immune to compiler flags */
LLMPAR_API int llmpar_isfinite_f64(double x);

#endif
