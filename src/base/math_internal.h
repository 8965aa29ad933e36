/* math_internal: the one place where an integer becomes a correctly rounded double; shared by json and exact_sum. */
#ifndef LLMPAR_MATH_INTERNAL_H
#define LLMPAR_MATH_INTERNAL_H

#include "base/platform.h"

/* (significand + d) * 2^exponent with 0 < d < 1 if `sticky`, else d = 0; rounded once to nearest, ties to even.
   Subnormals and infinity as IEEE has them. With sticky set the significand must have at least 55 bits. */
LLMPAR__PRIVATE double llmpar__math_round_scaled(uint64_t significand, int sticky, int64_t exponent);

#endif
