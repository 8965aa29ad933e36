/* gemm_thin: products of few rows with weights as they lie or with interleaved rows, y[M,N] = x[M,K] w[N,K]^T, at the speed of memory. */
#ifndef LLMPAR_GEMM_THIN_INTERNAL_H
#define LLMPAR_GEMM_THIN_INTERNAL_H

#include "cpu/half_internal.h"

enum { LLMPAR__THIN_ROWS = 16, LLMPAR__THIN_COLUMNS = 16 }; /* of one call at most; the second is also the distance of two rows of sums. Processors follow 16 rows of weights at a time well, and 32 badly */
enum { LLMPAR__THIN_KIND_F32, LLMPAR__THIN_KIND_BF16, LLMPAR__THIN_KIND_F16, LLMPAR__THIN_KIND_PAIRS }; /* the last: BF16 where a link of the chain takes two k; x are pairs, too */

/* sums[rows, columns] (+)= x[rows, k] w[columns, k]^T. */
typedef struct llmpar__gemm_thin_span {
    const char *w;                    /* rows of b, ld bytes apart */
    const char *next;                 /* what is read after this: as many rows, next_ld bytes apart */
    const char *ahead;                /* what is fetched with the first word, and ahead_step bytes further with each of the next; of rows as they lie it is set on the way */
    const float *x;                   /* [blocks of 8 rows][x_k][rows of the block], 64-byte aligned; the last block has 1, 4 or 8 rows */
    float *sums;                      /* [parts, part_step floats apart][tiles][rows][LLMPAR__THIN_COLUMNS], 64-byte aligned */
    const int64_t *ends;              /* [parts - 1] where the next part's sums begin, in elements that are whole lines of 64 bytes */
    int64_t ld, next_ld, ahead_step, k, x_k, x_done, columns, part_step; /* x_done: the span's first k (or pair) among all of x */
    int32_t rows, kind, parts;        /* parts: of k, each with chains of its own */
    int32_t fresh;                    /* the chains begin at 0, and sums are not read */
    int32_t interleaved, tiles;       /* w: the rows' words one beside the other, as many rows as a tile has columns, `tiles` (1, or what llmpar__gemm_thin_group says) of them `tile` bytes apart; ld, next and next_ld are not looked at */
    int64_t tile;
} llmpar__gemm_thin_span;
typedef void (*llmpar__gemm_thin_fn)(const llmpar__gemm_thin_span *span);

/* The function for this type at this level, and how many columns it takes at most. NULL: there is none. */
LLMPAR__PRIVATE llmpar__gemm_thin_fn llmpar__gemm_thin_function(const llmpar__cpu *cpu, llmpar_dtype dtype, int64_t *columns);
/* How many rows of x stand for `rows`, 1 .. 16: the last block is filled up. */
static inline int32_t llmpar__gemm_thin_filled(int64_t rows)
{
    int32_t last = (int32_t)rows % 8;
    return (int32_t)rows - last + (last > 4 ? 8 : last > 1 ? 4 : last);
}
static inline int32_t llmpar__gemm_thin_kind(llmpar_dtype dtype) { return dtype == LLMPAR_BF16 ? (int32_t)LLMPAR__THIN_KIND_BF16 : dtype == LLMPAR_F16 ? (int32_t)LLMPAR__THIN_KIND_F16 : (int32_t)LLMPAR__THIN_KIND_F32; }

#if defined(__x86_64__) && !defined(LLMPAR_NO_SIMD)
/* out[16 words][16 rows], words `step` floats apart, = in[16 rows][16 words], rows ld bytes apart; out and step: whole lines. */
LLMPAR__PRIVATE void llmpar__gemm_thin_avx512_transpose(const char *in, int64_t ld, float *out, int64_t step);
#endif

/* How many tiles go together whose rows are interleaved, where the chains of `most` rows of x fit the registers. */
static inline int32_t llmpar__gemm_thin_group(int32_t rows, int32_t most) { return rows == 1 ? 4 : rows < most ? most / rows : 1; }

/* Whether this product is one of gemm_thin's: NT, at most 16 rows, a type it reads at this level. Its bits are those of any other path. */
LLMPAR__PRIVATE int llmpar__gemm_thin_takes(const llmpar__cpu *cpu, const llmpar_gemm_args *args);
LLMPAR__PRIVATE size_t llmpar__gemm_thin_workspace(const llmpar__cpu *cpu, const llmpar_gemm_args *args);
static inline int llmpar__gemm_has_interleaved(const llmpar_gemm_args *args)
{
    int32_t s = 0;
    while (s < args->segment_count && !args->segments[s].interleaved) s++;
    return s < args->segment_count;
}
/* Any number of rows, sixteen at a time. args->workspace has the bytes that so many need. */
LLMPAR__PRIVATE void llmpar__gemm_thin(llmpar__cpu *cpu, const llmpar_gemm_args *args);

#endif
