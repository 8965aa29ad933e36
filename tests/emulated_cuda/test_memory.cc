/* What memory.cc counts: kernels whose figures are known. test_memory prints as the other test programs do. */
#include "memory.h"
#include "warp.h"

#include <stdio.h>
#include <stdlib.h>

#define launch(...) (void)emulated_cuda_launch("d, s, " #__VA_ARGS__, __func__, __VA_ARGS__)
static int passed, failed;
static cudaStream_t stream;

/* ---- global memory ---- */

struct __align__(16) four { float x[4]; };

static void copy(const float *in, float *out) { out[threadIdx.x] = in[threadIdx.x]; }
static void copy_16(const float *in, float *out) { ((four *)(void *)out)[threadIdx.x] = ((const four *)(const void *)in)[threadIdx.x]; }
static void every_other(const float *in, float *out) { out[threadIdx.x] = in[2 * threadIdx.x]; }
static void one_further(const float *in, float *out) { out[threadIdx.x] = in[threadIdx.x + 1]; }
static void a_row_each(const float *in, float *out) { out[threadIdx.x] = in[64 * threadIdx.x]; }
static void all_one(const float *in, float *out) { out[threadIdx.x] = in[5]; }
static void half_16(const float *in, float *out) /* 32 bytes a lane, in two goes */
{
    ((four *)(void *)out)[2 * threadIdx.x] = ((const four *)(const void *)in)[2 * threadIdx.x];
    ((four *)(void *)out)[2 * threadIdx.x + 1] = ((const four *)(const void *)in)[2 * threadIdx.x + 1];
}
static void some_lanes(const float *in, float *out)
{
    if (threadIdx.x % 32 < 8) out[threadIdx.x] = in[threadIdx.x];
}
/* Lanes of the second half make twice as many turns, which they make together. */
static void unequal_turns(const float *in, float *out)
{
    float sum = 0;
    for (unsigned i = 0; i < (threadIdx.x < 16 ? 2u : 4u); i++) sum += in[32 * i + threadIdx.x];
    out[threadIdx.x] = sum;
}
static void own_memory(const float *in, float *out) /* an array on the stack is no one's business */
{
    volatile float own[8];
    for (int i = 0; i < 8; i++) own[i] = (float)i;
    out[threadIdx.x] = in[threadIdx.x] + own[threadIdx.x % 8];
}
static void two_warps(const float *in, float *out)
{
    float x = in[threadIdx.x];
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    __syncthreads();
    out[threadIdx.x] = x;
}
static void to_one(const float *, float *out) { atomicAdd((unsigned *)(void *)out, 1u); }

/* ---- shared memory ---- */

template <int Stride> static void column(const float *, float *)
{
    LLMPAR__CUDA_SHARED(float, s);
    s[threadIdx.x * Stride] = 1.0f;
}
template <int Bytes, int Stride> static void wide_column(const float *, float *)
{
    struct __align__(Bytes) part { float x[Bytes / 4]; } one;
    LLMPAR__CUDA_SHARED(unsigned char, s);
    for (int i = 0; i < Bytes / 4; i++) one.x[i] = 1.0f;
    *(part *)(void *)(s + threadIdx.x * Stride) = one;
}
static void broadcast(const float *, float *)
{
    LLMPAR__CUDA_SHARED(volatile float, s);
    (void)s[3];
}
/* 8 rows of 16 bytes out of rows of 128, four times. */
template <int Exchanged> static void matrices(const float *, float *)
{
    uint32_t out[4];
    LLMPAR__CUDA_SHARED(uint16_t, s);
    int row = (int)threadIdx.x % 8, part = (int)threadIdx.x / 8;
    llmpar__cu_ldmatrix_x4(out, s + row * 64 + (Exchanged ? part ^ row : part) * 8);
}
template <int Stride> static void background(const float *in, float *)
{
    LLMPAR__CUDA_SHARED(unsigned char, s);
    llmpar__cu_copy_async(s + threadIdx.x * Stride, in + threadIdx.x * 4, threadIdx.x < 16 ? 16 : 0);
    llmpar__cu_copy_async_commit();
    llmpar__cu_copy_async_wait<0>();
}

/* ---- */

static void check(const char *name, void (*kernel)(const float *, float *), int shared, unsigned threads, uint64_t spent, uint64_t fewest)
{
    float *in = NULL, *out = NULL;
    if (cudaMalloc(&in, 16384) || cudaMalloc(&out, 16384)) abort();
    memset(out, 0, 16384);
    emulated_cuda_forget();
    launch(kernel, dim3(1), dim3(threads), 16384, stream, (const float *)in, out);
    if (cudaStreamSynchronize(stream)) abort();
    emulated_cuda_count count = emulated_cuda_counted((const void *)kernel, shared);
    if (count.spent == spent && count.fewest == fewest) passed++;
    else {
        failed++;
        printf("FAILED %s: %llu where %llu would do, expected %llu and %llu\n", name, (unsigned long long)count.spent, (unsigned long long)count.fewest, (unsigned long long)spent, (unsigned long long)fewest);
    }
    cudaFree(in);
    cudaFree(out);
}
#define GLOBAL(kernel, threads, ...) check(#kernel, kernel, 0, threads, __VA_ARGS__)
#define SHARED(kernel, ...) check(#kernel, kernel, 1, 32, __VA_ARGS__)

int main()
{
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    /* sectors read and written */
    GLOBAL(copy, 32, 4 + 4, 4 + 4);
    GLOBAL(copy_16, 32, 16 + 16, 16 + 16);
    GLOBAL(every_other, 32, 8 + 4, 4 + 4);
    GLOBAL(one_further, 32, 5 + 4, 4 + 4);
    GLOBAL(a_row_each, 32, 32 + 4, 4 + 4);
    GLOBAL(all_one, 32, 1 + 4, 1 + 4);
    GLOBAL(half_16, 32, 4 * 32, 4 * 16);
    GLOBAL(some_lanes, 64, 2 + 2, 2 + 2);
    GLOBAL(unequal_turns, 32, 4 + 4 + 2 + 2 + 4, 4 + 4 + 2 + 2 + 4);
    GLOBAL(own_memory, 32, 4 + 4, 4 + 4);
    GLOBAL(two_warps, 64, 8 + 8, 8 + 8);
    GLOBAL(two_warps, 40, 5 + 5, 5 + 5); /* the second is not whole */
    GLOBAL(to_one, 32, 1, 1);
    /* turns */
    SHARED(column<1>, 1, 1);
    SHARED(column<2>, 2, 1);
    SHARED(column<32>, 32, 1);
    SHARED(column<33>, 1, 1);
    SHARED(broadcast, 1, 1);
    SHARED((wide_column<8, 8>), 2, 2);
    SHARED((wide_column<8, 16>), 4, 2);
    SHARED((wide_column<16, 16>), 4, 4);
    SHARED((wide_column<16, 128>), 32, 4);
    SHARED((wide_column<16, 144>), 4, 4);
    SHARED(matrices<0>, 32, 4);
    SHARED(matrices<1>, 4, 4);
    SHARED(background<16>, 4, 4);
    SHARED(background<128>, 32, 4);
    GLOBAL(background<16>, 32, 8, 8);
    cudaStreamDestroy(stream);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
