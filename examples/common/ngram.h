/* ngram: the held-out loss of a byte model that only counts, as something to compare a trained model with.

   Order n predicts a byte c from the n bytes h before it, by interpolated Witten-Bell smoothing (Witten and Bell 1991; Chen and Goodman 1998, section 2.4), which has no parameter to tune:
       P_n(c | h) = (count(h c) + kinds(h) * P_{n-1}(c | h without its first byte)) / (count(h) + kinds(h))
   where kinds(h) is the number of different bytes seen after h; P_{-1} = 1/256; an h never seen leaves P_{n-1}. */
#ifndef EXAMPLES_NGRAM_H
#define EXAMPLES_NGRAM_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

/* Mean loss in nats a byte: counts on text[0, train), then predicts text[i] from the bytes before it for from <= i < to. order 0, 1 or 2; from >= order. NaN when out of memory or when there is nothing to predict. */
static double ngram_loss(const unsigned char *text, size_t train, size_t from, size_t to, int order)
{
    /* count[level][h * 256 + c], kinds[level][h], total[level][h] with h the last `level` bytes as a number */
    uint32_t *count[3] = { NULL, NULL, NULL }, *kinds[3] = { NULL, NULL, NULL }, *total[3] = { NULL, NULL, NULL };
    double sum = 0;
    size_t i;
    int level, failed = order < 0 || order > 2 || to <= from;
    for (level = 0; level <= order && !failed; level++) {
        size_t histories = (size_t)1 << (8 * level);
        count[level] = (uint32_t *)calloc(histories * 256, sizeof(uint32_t)); /* 64 MiB for order 2, of which only what occurs is touched */
        kinds[level] = (uint32_t *)calloc(histories, sizeof(uint32_t));
        total[level] = (uint32_t *)calloc(histories, sizeof(uint32_t));
        if (!count[level] || !kinds[level] || !total[level]) failed = 1;
    }
    for (level = 0; level <= order && !failed; level++)
        for (i = (size_t)level; i < train; i++) {
            size_t h = level == 0 ? 0 : level == 1 ? text[i - 1] : (size_t)text[i - 2] * 256 + text[i - 1];
            if (count[level][h * 256 + text[i]]++ == 0) kinds[level][h]++;
            total[level][h]++;
        }
    for (i = from; i < to && !failed; i++) {
        double p = 1.0 / 256;
        for (level = 0; level <= order; level++) {
            size_t h = level == 0 ? 0 : level == 1 ? text[i - 1] : (size_t)text[i - 2] * 256 + text[i - 1];
            if (total[level][h]) p = (count[level][h * 256 + text[i]] + kinds[level][h] * p) / ((double)total[level][h] + kinds[level][h]);
        }
        sum -= log(p);
    }
    for (level = 0; level < 3; level++) {
        free(count[level]);
        free(kinds[level]);
        free(total[level]);
    }
    return failed ? NAN : sum / (double)(to - from);
}

#endif
