/* kernels_portable: every kernel on any processor. */
#include "cpu/kernels_internal.h"

#define LLMPAR__VLEVEL portable
#define LLMPAR__VDOUBLE 0
#define LLMPAR__ATTENTION_ROWS 4 /* of the register tile, */
#define LLMPAR__ATTENTION_COLUMNS 2 /* and its vectors */
#define LLMPAR__ATTENTION_LOG llmpar_log_f32
#include "cpu/vector_math.inc"
#include "cpu/norm.inc"
#include "cpu/rope.inc"
#include "cpu/attention.inc"
#include "cpu/attention_decode.inc"
#include "cpu/attention_backward.inc"
#include "cpu/swiglu.inc"
#include "cpu/embedding.inc"
#include "cpu/xent.inc"
#include "cpu/elementwise.inc"
#include "cpu/optim.inc"
#include "cpu/squares.inc"
#include "cpu/adalomo.inc"
#undef LLMPAR__VLEVEL
#undef LLMPAR__VDOUBLE
#undef LLMPAR__ATTENTION_ROWS
#undef LLMPAR__ATTENTION_COLUMNS
#undef LLMPAR__ATTENTION_LOG
