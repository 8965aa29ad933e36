/* gemm_internal: what the matrix product's blocks (gemm.c) and its kernels (gemm_kernel.c) share: steps, tiles, panels. */
#ifndef LLMPAR_GEMM_INTERNAL_H
#define LLMPAR_GEMM_INTERNAL_H

#include "cpu/cpu_internal.h"

#if !defined(LLMPAR_NO_SIMD)

/* A stretch of k, in links, in which the rows of A lie `ld` bytes apart. Members of 8 bytes, for assembly code. */
typedef struct llmpar__gemm_span { const char *a; int64_t ld, k; } llmpar__gemm_span;

/* Where partial sums of a tile lie: on the stack of this part, among those that outlive a part, in c (or a copy of its edge); and where c really is, which is only asked for. */
enum { LLMPAR__GEMM_STACK, LLMPAR__GEMM_SAVED, LLMPAR__GEMM_C, LLMPAR__GEMM_TRUE_C, LLMPAR__GEMM_BASES };

/* For assembly code too: members of 8 bytes, places in bytes. */
typedef struct llmpar__gemm_step {
    int64_t k;
    int64_t first_span, span_count;
    int64_t merges, merges_saved; /* how many partial tiles are added, from the stack's top down: those of this part, then those that an earlier part saved */
    int64_t slot, slot_saved;     /* the topmost of either */
    int64_t to_base, to;          /* where the result goes */
    int64_t ask_base, ask;        /* what is asked for meanwhile, two lines every 8 k: where the step ends, a saved tile, c. A long step goes on to what lies below. All at once, at the tile's begin, they would stand in the way of the panels. */
    int64_t kept;                 /* partial tiles below what is pushed */
} llmpar__gemm_step;

/* Full panels of B's next group, where it lies as they do: each tile copies a share of its rows, one every eight k. The next row, its place, bytes from row to row; rows that follow each other, and of this tile; a register; chunks, counted through the panels. Members of 8 bytes.
   No panel: rows are asked for, 128 bytes each time; ld from a row's end to the next one, `share` times left of this row, `next` of each. */
typedef struct llmpar__gemm_ahead { const char *from; float *panel; int64_t ld, rows, share, kept, next, end; } llmpar__gemm_ahead;

/* One tile of c during one part of the summed dim. */
typedef struct llmpar__gemm_tile {
    const float *a;                    /* panel: [k, tile rows]; or NULL: */
    const llmpar__gemm_span *spans;    /* rows of A where they lie, in this part */
    int64_t row;                       /* the tile's first, from where the spans begin */
    const float *b;                    /* panel: [k, tile columns] */
    float *c;
    char *ask;                         /* c, or where it will be turned to */
    int64_t ask_row, ask_next;         /* row_bytes and ask_bytes of LLMPAR__GEMM_TRUE_C */
    float *stack, *saved;              /* [depth, tile rows, tile columns]: partial tiles of this part; those that outlive a part */
    int64_t ldc;
    const llmpar__gemm_step *steps;
    int64_t step_count;
    int rows, columns;                 /* that exist */
    int load, store;                   /* the first step starts from c; the last step's result goes to c */
    llmpar__gemm_ahead *ahead;         /* or NULL */
} llmpar__gemm_tile;

/* The chains of a tile, for assembly code: members of 8 bytes. Every accumulator lane is one chain in k order. */
typedef struct llmpar__gemm_chains {
    const float *a;
    const float *b;
    const llmpar__gemm_span *spans;    /* in place of a and k */
    int64_t row;
    const llmpar__gemm_step *steps, *steps_end;
    int64_t load;                      /* the first step starts from c, else from +0 */
    int64_t slot_bytes;
    char *base[LLMPAR__GEMM_BASES];
    int64_t row_bytes[LLMPAR__GEMM_BASES], ask_bytes[LLMPAR__GEMM_BASES]; /* from row to row; from what was asked for to what is next, and from there to the next row */
    llmpar__gemm_ahead ahead;
} llmpar__gemm_chains;

/* Packs `panels` neighbours, `distance` floats apart. A panel is out[k, width]: the `width` rows (or columns) of a tile side by side for each k. Rows from `valid` on,
   in the last panel, are zero: they fill the tile and are never stored. transposed: in[panels * width, k], else in[k, panels * width]. */
typedef struct llmpar__gemm_packing {
    const void *in;
    float *out;
    int64_t ld, k, valid, panels, distance; /* ld and k in elements of `in` */
    int transposed;
} llmpar__gemm_packing;

typedef struct llmpar__gemm_kernel {
    int64_t rows, columns;             /* of a full tile */
    int pairs;                         /* a link of the chain takes two k of BF16, which are packed side by side as a float is; else one k of F32 */
    void (*pack_a)(const llmpar__gemm_packing *packing);
    void (*pack_b)(const llmpar__gemm_packing *packing);
    void (*chains[4])(const llmpar__gemm_chains *chains); /* of the first 1, 2, 4 and 8 rows */
    void (*lying[3])(const llmpar__gemm_chains *chains);  /* or NULL: of all rows of an A that lies, and one, two or all thirds of the columns */
    void (*copying[2])(const llmpar__gemm_chains *chains); /* or NULL: chains[3] and lying[2] that copy B */
    void (*asking[2])(const llmpar__gemm_chains *chains);  /* or NULL: that ask for rows to come, into L2 */
} llmpar__gemm_kernel;

enum { LLMPAR__GEMM_TILE_FLOATS = 8 * 48 }; /* of the largest tile */

/* For operands of dtype. */
LLMPAR__PRIVATE llmpar__gemm_kernel llmpar__gemm_kernel_of(llmpar_cpu_level level, llmpar_dtype dtype);
/* out[j, i] = word j of row i, i < rows, j < columns; rows ld bytes apart, ld_out in floats. */
LLMPAR__PRIVATE void llmpar__gemm_turn(const void *in, int64_t ld, int64_t rows, int64_t columns, float *out, int64_t ld_out);
/* All steps of the part. */
LLMPAR__PRIVATE void llmpar__gemm_run_tile(const llmpar__gemm_kernel *kernel, const llmpar__gemm_tile *tile);

#endif

#endif
