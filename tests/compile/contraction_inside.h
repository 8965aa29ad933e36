__attribute__((target("avx2,fma"), noinline)) static float llmpar__contraction_scalar(float a, float b, float c)
{
    return a * b + c;
}

__attribute__((target("avx2,fma"), noinline)) static void llmpar__contraction_loop(const float *a, const float *b, float *c, int count)
{
    for (int i = 0; i < count; i++) c[i] += a[i] * b[i];
}
