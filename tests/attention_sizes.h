/* attention_sizes: what every device's attention keeps to in its workspaces. */
#ifndef TESTS_ATTENTION_SIZES_H
#define TESTS_ATTENTION_SIZES_H

#include "test.h"

/* What serves so many queries and keys serves fewer, as a generation's chunks and tokens have them. */
static inline void attention_fewer(llmpar_device *device)
{
    for (int draw = 0; draw < 36; draw++) {
        llmpar_attention_args a;
        int64_t rows = draw % 2 ? 40 : 5, keys = 300;
        size_t need = 0;
        memset(&a, 0, sizeof a);
        a.batch = 1 + draw / 18; a.tq = rows; a.tk = a.tk_stride = keys; a.kv_heads = draw / 2 % 3 == 2 ? 1 : 2; a.heads = draw / 2 % 3 ? 8 * a.kv_heads : 2; a.head_dim = draw / 6 % 3 ? 64 : 16;
        a.dtype = draw % 3 ? LLMPAR_BF16 : LLMPAR_F32; a.scale = 0.125;
        size_t enough = device->attention_workspace(device, &a);
        for (a.tq = 1; a.tq <= rows && need <= enough; a.tq++)
            for (a.tk = a.tq; a.tk <= keys && need <= enough; a.tk += 7) need = device->attention_workspace(device, &a);
        if (need > enough) TEST_FAIL("draw %d: %lld queries need %llu bytes, %lld %llu", draw, (long long)a.tq, (unsigned long long)need, (long long)rows, (unsigned long long)enough);
    }
}

#endif
