#include "base/size.h"

LLMPAR_DEF int llmpar_size_mul(size_t a, size_t b, size_t *out)
{
    size_t product;
    if (__builtin_mul_overflow(a, b, &product)) return 0;
    *out = product;
    return 1;
}

LLMPAR_DEF int llmpar_size_add(size_t a, size_t b, size_t *out)
{
    size_t sum;
    if (__builtin_add_overflow(a, b, &sum)) return 0;
    *out = sum;
    return 1;
}

LLMPAR_DEF int llmpar_extent_product(const int64_t *extents, int count, int64_t *out)
{
    int64_t product = 1;
    int i, has_zero = 0;
    for (i = 0; i < count; i++) {
        if (extents[i] < 0) return 0;
        if (extents[i] == 0) has_zero = 1;
    }
    /* A zero extent makes the product zero in whatever order the others stand. */
    for (i = 0; i < count && !has_zero; i++)
        if (__builtin_mul_overflow(product, extents[i], &product)) return 0;
    *out = has_zero ? 0 : product;
    return 1;
}

LLMPAR_DEF int64_t llmpar_round_up(int64_t value, int64_t unit)
{
    int64_t over = value % unit;
    if (over < 0) over += unit;
    return over ? value - over + unit : value;
}

LLMPAR_DEF int llmpar_is_pow2(int64_t value)
{
    return value > 0 && (value & (value - 1)) == 0;
}

LLMPAR_DEF int64_t llmpar_piece_begin(int64_t i, int64_t grains, int64_t pieces)
{
    return i * grains / pieces;
}

LLMPAR_DEF int64_t llmpar_tree_split(int64_t n)
{
    int64_t split = 1;
    while (split < n - split) split *= 2;
    return split;
}
