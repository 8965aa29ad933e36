#include "tables/halving.h"

#include <string.h>

#include "base/size.h"

LLMPAR_DEF int llmpar_halving_make(llmpar_heap *heap, int32_t ranks, int32_t rank, llmpar_halving *out)
{
    size_t n = (size_t)ranks, levels = 0;
    int32_t lo = 0;
    memset(out, 0, sizeof *out);
    for (int32_t m = ranks; m > 1; levels++) {
        int32_t p = (int32_t)llmpar_tree_split(m);
        if (rank < lo + p) m = p;
        else lo += p, m -= p;
    }
    out->level = (llmpar_halving_level *)llmpar_heap_zalloc(heap, 1, levels * sizeof *out->level + (levels + 1) * n * sizeof(int32_t));
    if (!out->level) return 0;
    out->levels = (int32_t)levels;
    out->label = (int32_t *)(void *)(out->level + levels);
    out->kept = out->label + levels * n;
    lo = 0;
    for (int32_t m = ranks, l = out->levels; m > 1;) {
        int32_t p = (int32_t)llmpar_tree_split(m), *label = out->label + (size_t)--l * n;
        const int32_t *above = label + n;
        llmpar_halving_level *level = &out->level[l];
        for (int32_t j = 0; j < ranks; j++) {
            int32_t c = j;
            if (l + 1 < out->levels) { /* from the node above */
                const llmpar_halving_level *up = level + 1;
                c = above[j];
                if (up->left) c = c < up->p ? c : c - up->p;
                else c = c < up->p ? c % up->q : c - up->p;
            }
            label[j] = c;
        }
        level->lo = lo;
        level->p = p;
        level->q = m - p;
        level->left = rank < lo + p;
        int32_t a = rank - lo - (level->left ? 0 : p), keeps = 0, gives = 0;
        level->mine = level->left ? a : p + a;
        level->partner = level->left ? lo + p + a % level->q : lo + a;
        for (int32_t j = 0; j < ranks; j++) {
            keeps += label[j] == level->mine;
            gives += level->left ? label[j] == a + p : label[j] < p && label[j] % level->q == a;
        }
        if (keeps > out->most_kept) out->most_kept = keeps;
        if (gives > out->most_given) out->most_given = gives;
        if (level->left) m = p;
        else lo += p, m -= p;
    }
    return 1;
}

LLMPAR_DEF void llmpar_halving_free(llmpar_heap *heap, llmpar_halving *halving)
{
    if (!halving) return;
    llmpar_heap_free(heap, halving->level);
    memset(halving, 0, sizeof *halving);
}
