#include "model/session_internal.h"

#include <string.h>

#include "base/math.h"

#if !defined(LLMPAR_NO_LLAMA)

LLMPAR__PRIVATE_DEF int32_t llmpar__sample_greedy(const float *logits, int32_t vocab, int masked)
{
    enum { BLOCK = 256 };
    const int32_t never = masked ? INT32_MIN + 0x7f800000 : 0; /* the bits of -inf, or of a number */
    int32_t best = INT32_MIN, at = 0, end, infinite = 0;
    for (int32_t first = 0; first < vocab; first = end) {
        int32_t most = INT32_MIN;
        end = vocab - first < BLOCK ? vocab : first + BLOCK;
        for (int32_t i = first; i < end; i++) {
            float value = logits[i] + 0.0f; /* -0 equals 0 */
            int32_t bits;
            memcpy(&bits, &value, sizeof bits);
            infinite |= ((bits & 0x7f800000) == 0x7f800000) & (bits != never);
            if (bits < 0) bits ^= 0x7fffffff;
            most = bits > most ? bits : most;
        }
        if (most > best) {
            best = most;
            at = first;
        }
    }
    for (int32_t i = at + 1; i < vocab && i < at + BLOCK; i++)
        if (logits[i] > logits[at]) at = i;
    return infinite || !llmpar_isfinite_f64((double)logits[at]) ? -1 : at;
}

/* Sifts entry `at` down in a max-heap over (probability, lower id first): the nucleus is popped in order of probability. */
static void llmpar__sample_sift(int32_t *heap, int32_t count, int32_t at, const float *p)
{
    for (;;) {
        int32_t child = 2 * at + 1;
        if (child >= count) return;
        if (child + 1 < count && (p[heap[child + 1]] > p[heap[child]] || (p[heap[child + 1]] == p[heap[child]] && heap[child + 1] < heap[child]))) child++;
        if (p[heap[at]] > p[heap[child]] || (p[heap[at]] == p[heap[child]] && heap[at] < heap[child])) return;
        int32_t swap = heap[at];
        heap[at] = heap[child];
        heap[child] = swap;
        at = child;
    }
}

/* The likeliest of the heap goes behind it, where those popped before are; its probability. */
static double llmpar__sample_pop(int32_t *heap, int32_t *count, const float *p)
{
    int32_t top = heap[0];
    heap[0] = heap[--*count];
    heap[*count] = top;
    llmpar__sample_sift(heap, *count, 0, p);
    return (double)p[top];
}

LLMPAR__PRIVATE_DEF int32_t llmpar__sample_nucleus(float *logits, int32_t vocab, int32_t largest, const llmpar_generate_desc *desc, double uniform, int32_t *order)
{
    float max = logits[largest];
    double sum = 0, mass = 0, target, top_p = desc->top_p > 0 ? desc->top_p : 1;
    int32_t most = desc->top_k && desc->top_k < vocab ? desc->top_k : vocab, count = vocab, kept = 0;
    for (int32_t i = 0; i < vocab; i++) {
        logits[i] = (float)llmpar_exp_f64(((double)logits[i] - (double)max) / desc->temperature);
        sum += (double)logits[i];
        order[i] = i;
    }
    if (top_p >= 1 && most == vocab) {
        target = uniform * sum;
        for (int32_t i = 0; i < vocab; i++) {
            mass += (double)logits[i];
            if (mass > target) return i;
        }
        return largest;
    }
    for (int32_t i = vocab / 2; i-- > 0;) llmpar__sample_sift(order, count, i, logits);
    if (most < vocab) {
        while (vocab - count < most) mass += llmpar__sample_pop(order, &count, logits);
        sum = mass;
    }
    for (mass = 0; kept < most && mass < top_p * sum; kept++) {
        if (kept == vocab - count) llmpar__sample_pop(order, &count, logits);
        mass += (double)logits[order[vocab - 1 - kept]];
    }
    target = uniform * mass;
    mass = 0;
    for (int32_t i = 0; i < kept; i++) {
        mass += (double)logits[order[vocab - 1 - i]];
        if (mass > target) return order[vocab - 1 - i];
    }
    return largest;
}

#endif /* LLMPAR_NO_LLAMA */
