/* What the file you hand in defines. Everything else of llmpar.h may be called. */
#ifndef ASSIGNMENT_1_H
#define ASSIGNMENT_1_H

#include "llmpar.h"

/* Tasks 1 to 4: puts your functions into the slots all_gather, broadcast, reduce_scatter and all_reduce of *table. */
void grade_patch(llmpar_comm *table);

/* Task 5: two linear layers over the tp ranks, y = relu(x w1^T) w2^T. F inner features are cut over the ranks: this one holds f of them. All tensors row-major. */
typedef struct pair {
    llmpar_comm *tp;
    llmpar_stream *stream;
    int64_t n, d, f;       /* rows; features of x and y; this rank's inner features */
    const float *x;        /* [n,d] the same on every rank */
    const float *w1;       /* [f,d] its rows of w1[F,d]: column-parallel */
    const float *w2;       /* [d,f] its columns of w2[d,F]: row-parallel */
    const float *dy;       /* [n,d] the same on every rank; backward */
    float *h;              /* [n,f] out of forward, after relu; in for backward */
    float *y;              /* [n,d] out of forward, complete on every rank */
    float *dx;             /* [n,d] out of backward, complete on every rank */
    float *dw1, *dw2;      /* [f,d], [d,f] out of backward */
} pair;

llmpar_status pair_forward(const pair *p);
llmpar_status pair_backward(const pair *p);

#endif
