/* The network that you shard, and what the file you hand in defines.

   Three units, N = sequences of one number each, W = 16 features, all numbers f32:
     scale    x[n,i] = id[n] * g[i]                                       parameter g[W]
     mix      y[n,o] = sum over i of x[n,i] * w[o,i]                      parameter w[W,W]     your two functions
     score    s[n] = sum over o of y[n,o] * v[o], loss (s - target)^2/2   parameter v[W]
   All parameters begin as 1. */
#ifndef ASSIGNMENT_2_H
#define ASSIGNMENT_2_H

#include "llmpar.h"

enum { WIDTH = 16 };
enum { SCALE, MIX, SCORE, UNITS };

/* Task 1. What a callback sees is described at llmpar_unit_call. N = call->micro->batch * call->micro->t rows; on the CPU a callback may compute at once. */
llmpar_status mix_forward(llmpar_unit_call *call);
llmpar_status mix_backward(llmpar_unit_call *call);

/* Tasks 2 and 3. A step of one micro-batch over two or more shards; static memory. */
const llmpar_instruction *fsdp_list(int32_t *count);

/* Instructions with the fields that matter here; the others are "does not apply". `waits` is WAIT(how many, indices of earlier instructions ...) or NO_WAIT. llmpar_op in llmpar.h says what each does.
   Streams: gathers run on one, computation on one, reductions on one. What another stream wrote, or still reads, must be waited for; what the same stream did is in order anyway. */
#define WAIT(n, ...) n, { __VA_ARGS__ }
#define NO_WAIT 0, { 0 }
#define GATHER(unit, ...)                  { LLMPAR_OP_GATHER, unit, -1, 0, 0, -1, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_GATHER, LLMPAR_ALWAYS, __VA_ARGS__ }
#define FREE(unit, ...)                    { LLMPAR_OP_FREE, unit, -1, 0, 0, -1, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_COMPUTE, LLMPAR_ALWAYS, __VA_ARGS__ }                       /* the gathered parameters */
#define FORWARD(unit, ...)                 { LLMPAR_OP_FORWARD, unit, 0, LLMPAR_PASS_FORWARD, 0, -1, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_COMPUTE, LLMPAR_ALWAYS, __VA_ARGS__ }
#define BACKWARD(unit, local, ...)         { LLMPAR_OP_BACKWARD, unit, 0, 0, 0, local, -1, 0, 1, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_COMPUTE, LLMPAR_ALWAYS, __VA_ARGS__ }                 /* whole gradients into local buffer `local` */
#define REDUCE(unit, local, shard, ...)    { LLMPAR_OP_REDUCE, unit, -1, 0, 0, shard, local, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_REDUCE, LLMPAR_ALWAYS, __VA_ARGS__ }                /* reduce-scatter into shard buffer `shard` */
#define FREE_GRADIENT(unit, local, ...)    { LLMPAR_OP_FREE, unit, -1, 0, 0, local, -1, 0, 1, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_REDUCE, LLMPAR_ALWAYS, __VA_ARGS__ }                     /* local buffer `local` */
#define NORM(unit, shard, ...)             { LLMPAR_OP_NORM, unit, -1, 0, 0, shard, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_REDUCE, LLMPAR_ALWAYS, __VA_ARGS__ }
#define COUNT_TOKENS(...)                  { LLMPAR_OP_SCALAR_REDUCE, -1, -1, 0, 0, -1, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_REDUCE, LLMPAR_ALWAYS, __VA_ARGS__ }
#define LOSS_AND_NORM(...)                 { LLMPAR_OP_SCALAR_REDUCE, -1, -1, 1, 0, -1, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_REDUCE, LLMPAR_ALWAYS, __VA_ARGS__ }
#define OPTIM(unit, shard, ...)            { LLMPAR_OP_OPTIM, unit, -1, 0, 0, shard, -1, 0, 0, LLMPAR_STATE_OPTIMIZER, 0, LLMPAR_STREAM_COMPUTE, LLMPAR_IF_FINITE, __VA_ARGS__ }                /* update, and release the shard buffer */

#endif
