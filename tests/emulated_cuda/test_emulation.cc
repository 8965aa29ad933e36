/* The emulation itself: kernels that are right, kernels that are wrong in one place each (every fault in a child process, whose message is read), and waits between streams.
   test_emulation prints as the other test programs do. */
#include "warp.h"

#include <stdio.h>
#include <stdlib.h>
#include <string>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

#define launch(...) (void)emulated_cuda_launch("d, s, " #__VA_ARGS__, __func__, __VA_ARGS__)
static int passed, failed;
#define CHECK(x) do { if (x) passed++; else { failed++; printf("FAILED %s:%d: %s\n", __FILE__, __LINE__, #x); } } while (0)

static cudaStream_t stream;

template <typename T> static T *device(size_t count)
{
    T *p = NULL;
    if (cudaMalloc(&p, count * sizeof(T))) abort();
    return p;
}
static void wait() { if (cudaStreamSynchronize(stream)) abort(); }

/* ---- kernels ---- */

enum Fault { NONE, NO_BARRIER, HALF_BARRIER, HALF_SHUFFLE, OTHER_OPERATION, OUTSIDE, NO_WAIT, RAW_RACE };

/* Sums a block's 128 numbers in shared memory. */
static void sum(const float *in, float *out, int fault)
{
    LLMPAR__CUDA_SHARED(float, s);
    int i = (int)threadIdx.x;
    s[fault == OUTSIDE && i == 127 ? 128 : i] = in[blockIdx.x * 128 + threadIdx.x];
    if (fault == HALF_BARRIER && i >= 64) return;
    if (fault != NO_BARRIER) __syncthreads();
    for (int half = 64; half; half /= 2) {
        if (i < half) s[i] += s[i + half];
        if (fault != RAW_RACE) __syncthreads();
    }
    if (i == 0) out[blockIdx.x] = s[0];
}

static void warps(const float *in, float *out, int fault)
{
    float x = in[threadIdx.x];
    if (fault == HALF_SHUFFLE && threadIdx.x % 32 < 5) return;
    if (fault == OTHER_OPERATION && threadIdx.x % 2) __syncwarp();
    for (int by = 16; by; by /= 2) x += __shfl_xor_sync(0xffffffffu, x, by);
    out[threadIdx.x] = x + (float)__popc(__ballot_sync(0xffffffffu, threadIdx.x % 4 == 0)) + __shfl_down_sync(0xffffffffu, (float)(threadIdx.x % 32), 3) + (float)__shfl_sync(0xffffffffu, (int)threadIdx.x, 7, 8);
}

/* c[16,8] = a[16,16] b[16,8], through cp.async and ldmatrix. */
static void product(const uint16_t *a, const uint16_t *bt, float *c, int fault)
{
    LLMPAR__CUDA_SHARED(uint16_t, s); /* a: 16 rows of 16, bt: 8 rows of 16 */
    int lane = (int)threadIdx.x;
    uint32_t ra[4], rb[4];
    float d[4] = {0, 0, 0, 0};
    llmpar__cu_copy_async(s + lane / 2 * 16 + lane % 2 * 8, a + lane / 2 * 16 + lane % 2 * 8, 16);
    llmpar__cu_copy_async_commit();
    llmpar__cu_copy_async(s + 256 + lane / 4 * 16 + lane / 2 % 2 * 8, bt + lane / 4 * 16 + lane / 2 % 2 * 8, 16);
    llmpar__cu_copy_async_commit();
    if (fault == NO_WAIT) llmpar__cu_copy_async_wait<1>();
    else llmpar__cu_copy_async_wait<0>();
    __syncthreads();
    llmpar__cu_ldmatrix_x4(ra, s + (lane % 16) * 16 + lane / 16 * 8);
    llmpar__cu_ldmatrix_x4(rb, s + 256 + (lane % 8) * 16 + lane / 8 % 2 * 8);
    llmpar__cu_mma_bf16(d, ra, rb);
    for (int r = 0; r < 4; r++) c[(lane / 4 + r / 2 * 8) * 8 + lane % 4 * 2 + r % 2] = d[r];
}

static void transposed(const uint16_t *in, uint32_t *out)
{
    LLMPAR__CUDA_SHARED(uint16_t, s);
    for (int i = (int)threadIdx.x; i < 256; i += 32) s[i] = in[i];
    __syncthreads();
    llmpar__cu_ldmatrix_x4_trans(out + threadIdx.x * 4, s + threadIdx.x * 8);
}

static void count(unsigned *out) { atomicAdd(out, 1u); }
static void add_one(float *x) { x[blockIdx.x * blockDim.x + threadIdx.x] += 1.0f; }

/* ---- right ones ---- */

static float run_sum(int fault, size_t shared = 128 * sizeof(float))
{
    float *in = device<float>(5 * 128), *out = device<float>(5);
    for (int i = 0; i < 5 * 128; i++) in[i] = (float)(i % 7);
    launch(sum, dim3(5), dim3(128), shared, stream, (const float *)in, out, fault);
    wait();
    float worst = 0;
    for (int b = 0; b < 5; b++) {
        float want = 0;
        for (int i = 0; i < 128; i++) want += (float)((b * 128 + i) % 7);
        if (!(out[b] == want)) worst = 1;
    }
    cudaFree(in);
    cudaFree(out);
    return worst;
}

static int run_warps(int fault)
{
    float *in = device<float>(64), *out = device<float>(64);
    int good = 1;
    for (int i = 0; i < 64; i++) in[i] = (float)i;
    launch(warps, dim3(1), dim3(64), 0, stream, (const float *)in, out, fault);
    wait();
    for (int i = 0; i < 64; i++) {
        int lane = i % 32, down = lane + 3 < 32 ? lane + 3 : lane;
        float want = (float)(i < 32 ? 496 : 1520) + 8.0f + (float)down + (float)(i / 8 * 8 + 7);
        if (out[i] != want) good = 0;
    }
    cudaFree(in);
    cudaFree(out);
    return good;
}

static int run_product(int fault)
{
    uint16_t *a = device<uint16_t>(256), *bt = device<uint16_t>(128);
    float *c = device<float>(128);
    int good = 1;
    for (int i = 0; i < 256; i++) a[i] = (uint16_t)emulated_cuda_bf16((float)(i * 37 % 11 - 5));
    for (int i = 0; i < 128; i++) bt[i] = (uint16_t)emulated_cuda_bf16((float)(i * 29 % 13 - 6));
    launch(product, dim3(1), dim3(32), (256 + 128) * 2, stream, (const uint16_t *)a, (const uint16_t *)bt, c, fault);
    wait();
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++) {
            float want = 0;
            for (int k = 0; k < 16; k++) want += (float)((i * 16 + k) * 37 % 11 - 5) * (float)((j * 16 + k) * 29 % 13 - 6);
            if (!(c[i * 8 + j] == want)) good = 0;
        }
    cudaFree(a);
    cudaFree(bt);
    cudaFree(c);
    return good;
}

static void run_transposed()
{
    uint16_t *in = device<uint16_t>(256);
    uint32_t *out = device<uint32_t>(128);
    int good = 1;
    for (int i = 0; i < 256; i++) in[i] = (uint16_t)i;
    launch(transposed, dim3(1), dim3(32), 512, stream, (const uint16_t *)in, out);
    wait();
    for (int lane = 0; lane < 32; lane++)
        for (int m = 0; m < 4; m++)
            for (int h = 0; h < 2; h++) if ((uint16_t)(out[lane * 4 + m] >> 16 * h) != m * 64 + (lane % 4 * 2 + h) * 8 + lane / 4) good = 0;
    CHECK(good);
    cudaFree(in);
    cudaFree(out);
}

static void run_halves()
{
    int good = 1;
    for (unsigned u = 0; u < 65536; u++) { /* every f16, and the middle between it and the next */
        float x = emulated_cuda_f16_to_f32((uint16_t)u), y = emulated_cuda_f16_to_f32((uint16_t)(u + 1));
        if (emulated_cuda_f32_to_f16(x) != ((u & 0x7c00u) == 0x7c00u && (u & 0x3ffu) ? (u | 0x200u) : u)) good = 0;
        if ((u & 0x7fffu) < 0x7bffu && emulated_cuda_f32_to_f16((x + y) / 2) != (u & 1 ? u + 1 : u)) good = 0;
    }
    CHECK(good);
}

/* Through a second stream, with and without the wait for its event: without, it goes wrong in some of many tries. */
static int run_streams(int with_wait)
{
    cudaStream_t other;
    cudaEvent_t event;
    int wrong = 0;
    float *x = device<float>(64), y[64];
    cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking);
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    for (int round = 0; round < 50; round++) {
        cudaMemsetAsync(x, 0, 64 * sizeof(float), stream);
        for (int i = 0; i < 3; i++) launch(add_one, dim3(2), dim3(32), 0, stream, x);
        cudaEventRecord(event, stream);
        if (with_wait) cudaStreamWaitEvent(other, event, 0);
        cudaMemcpyAsync(y, x, sizeof y, cudaMemcpyDeviceToHost, other);
        cudaStreamSynchronize(other);
        for (int i = 0; i < 64; i++) if (y[i] != 3.0f) { wrong++; break; }
        cudaStreamSynchronize(stream);
    }
    cudaEventDestroy(event);
    cudaStreamDestroy(other);
    cudaFree(x);
    return wrong;
}

static void run_limits()
{
    unsigned *n = device<unsigned>(1);
    *n = 0;
    launch(count, dim3(3, 2, 2), dim3(4, 3, 2), 0, stream, n);
    wait();
    CHECK(*n == 12 * 24);
    CHECK(cudaGetLastError() == cudaSuccess);
    launch(count, dim3(1), dim3(1025), 0, stream, n);
    CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration);
    launch(count, dim3(1), dim3(32), 100 * 1024, stream, n);
    CHECK(cudaGetLastError() == cudaErrorInvalidValue);
    CHECK(cudaFuncSetAttribute(count, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 * 1024) == cudaSuccess);
    launch(count, dim3(1), dim3(32), 100 * 1024, stream, n);
    CHECK(cudaGetLastError() == cudaSuccess);
    CHECK(cudaFuncSetAttribute(count, cudaFuncAttributeMaxDynamicSharedMemorySize, 228 * 1024) == cudaErrorInvalidValue);
    CHECK(cudaGetLastError() == cudaErrorInvalidValue);
    wait();
    cudaFree(n);
}

/* ---- wrong ones: what the child says ---- */

static std::string in_child(int (*run)(int), int fault)
{
    int pipes[2];
    std::string text;
    char buffer[4096];
    fflush(NULL);
    if (pipe(pipes)) abort();
    pid_t child = fork();
    if (child == 0) {
        dup2(pipes[1], 2);
        close(pipes[0]);
        cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
        _exit(run(fault) ? 0 : 3);
    }
    close(pipes[1]);
    for (ssize_t n; (n = read(pipes[0], buffer, sizeof buffer)) > 0;) text.append(buffer, (size_t)n);
    close(pipes[0]);
    int status = 0;
    waitpid(child, &status, 0);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 3) text += "wrong result";
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) text += "nothing seen";
    return text;
}
static int sum_right(int fault) { return run_sum(fault) == 0.0f; }
static int sum_outside(int fault) { return run_sum(fault, 128 * sizeof(float)) == 0.0f; }

static void expect(const char *name, int (*run)(int), int fault, const char *a, const char *b)
{
    std::string text = in_child(run, fault);
    bool found = text.find(a) != std::string::npos && text.find(b) != std::string::npos;
    if (!found) printf("%s: got: %s\n", name, text.c_str());
    CHECK(found);
}

int main()
{
    /* children first: a process with threads had better not fork */
    expect("half a barrier", sum_right, HALF_BARRIER, "kernel sum", "has ended without it");
    expect("half a shuffle", run_warps, HALF_SHUFFLE, "kernel warps", "has ended");
    expect("two operations", run_warps, OTHER_OPERATION, "kernel warps", "__syncwarp");
#if defined(__SANITIZE_ADDRESS__)
    expect("beside shared memory", sum_outside, OUTSIDE, "AddressSanitizer", "use-after-poison");
#else
    expect("beside shared memory", sum_outside, OUTSIDE, "kernel sum", "behind the 512 bytes");
#endif
    expect("no barrier", sum_right, NO_BARRIER, "wrong result", "");
    expect("no barrier in a loop", sum_right, RAW_RACE, "wrong result", "");
    expect("no wait for a copy", run_product, NO_WAIT, "wrong result", "");
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    CHECK(run_sum(NONE) == 0.0f);
    CHECK(run_warps(NONE));
    for (int i = 0; i < 20; i++) CHECK(run_product(NONE));
    run_transposed();
    run_halves();
    run_limits();
    CHECK(run_streams(1) == 0);
    CHECK(run_streams(0) > 0);
    cudaStreamDestroy(stream);
    CHECK(emulated_cuda_live() == 0);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
