/* squares: what squares.c and its kernel (squares.inc) tell each other. */
#ifndef LLMPAR_SQUARES_INTERNAL_H
#define LLMPAR_SQUARES_INTERNAL_H

#include "base/exact_sum.h"
#include "cpu/vector.h"

/* A block's largest and smallest exponent decide how it is added: two words hold exponents that lie up to 20 apart, three 42; what is wider, or not finite, goes number by number (base/exact_sum.c). */
enum {
    LLMPAR__SQUARES_BLOCK = 2048,      /* numbers a block, which the first-level cache holds where they have to be summed again */
    LLMPAR__SQUARES_LOG_ADDITIONS = 8, /* of a lane to one word: over 4 registers of 2 lanes at least */
    LLMPAR__SQUARES_WORDS = 3,
    LLMPAR__SQUARES_TWO = 28 - LLMPAR__SQUARES_LOG_ADDITIONS,
    LLMPAR__SQUARES_THREE = 54 - 3 * LLMPAR__SQUARES_LOG_ADDITIONS / 2,
    LLMPAR__SQUARES_BLOCKS = 1 << 20   /* between flushes: a block adds less than 2^32 to `high` and to `low` */
};

/* Words of the same place over many blocks: integers, in units. */
typedef struct llmpar__squares_window {
    int top, blocks;
    double start[LLMPAR__SQUARES_WORDS], unit[LLMPAR__SQUARES_WORDS];
    int64_t high[LLMPAR__SQUARES_WORDS], low[LLMPAR__SQUARES_WORDS]; /* high counts 2^26 units */
} llmpar__squares_window;

typedef struct llmpar__squares_job {
    const void *value;
    const void *ahead;        /* ahead[i] is asked for while value[i] is summed: what comes soon, or what the next ones will be made of */
    llmpar__squares_window *window; /* of one task whose calls follow each other, who flushes it; NULL: each has its own */
    int64_t count, step;
    llmpar_exact_sum *sums; /* [tasks] */
} llmpar__squares_job;

/* Makes the window fit a block whose absolute values, as bits, are at most `largest` and, where not zero, at least `least`. Returns the words to use, 0: neither. */
LLMPAR__PRIVATE int llmpar__squares_choose(llmpar__squares_window *window, llmpar_exact_sum *sum, uint32_t largest, uint32_t least);
LLMPAR__PRIVATE void llmpar__squares_flush(llmpar__squares_window *window, llmpar_exact_sum *sum);
/* Adds value[i]^2, i < count, to the window, which begins as zeros, or to the sum; `ahead` is as in the job. The bits are those of llmpar_exact_sum_add_squares_f32 at every level. */
LLMPAR__PRIVATE void llmpar__squares_add(const llmpar__cpu *cpu, llmpar__squares_window *window, llmpar_exact_sum *sum, const float *value, int64_t count, const float *ahead);

/* f64 has no kernel of this kind. */
#if LLMPAR__VX86
LLMPAR__VDECLARE_AT(squares, portable) LLMPAR__VDECLARE_AT(squares, avx2) LLMPAR__VDECLARE_AT(squares, avx512)
#define LLMPAR__SQUARES_KERNELS { NULL, llmpar__squares_portable, llmpar__squares_avx2, llmpar__squares_avx512 }
#else
LLMPAR__VDECLARE_AT(squares, portable)
#define LLMPAR__SQUARES_KERNELS { NULL, llmpar__squares_portable, llmpar__squares_portable, llmpar__squares_portable }
#endif

#endif
