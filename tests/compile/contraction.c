/* Is a*b + c fused? run.sh places contraction_inside.h among the modules of the implementation (probe.h). The values are such that
   one rounding and two differ: (1 + e) * (1 - e) - 1 with e = 2^-13 is -2^-26 when fused, and 0 when the product is rounded first. */
#include "probe.h"

int main(void)
{
    volatile float a = 1.0f + 1.0f / 8192.0f, b = 1.0f - 1.0f / 8192.0f, c = -1.0f;
    float vector_a[8], vector_b[8], vector_c[8];
    for (int i = 0; i < 8; i++) { vector_a[i] = a; vector_b[i] = b; vector_c[i] = c; }
    if (llmpar__contraction_scalar(a, b, c) != 0.0f) return 1;
    llmpar__contraction_loop(vector_a, vector_b, vector_c, 8);
    for (int i = 0; i < 8; i++)
        if (vector_c[i] != 0.0f) return 2;
    return 0;
}
