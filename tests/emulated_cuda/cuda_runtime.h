/* cuda_runtime: the part of the CUDA runtime that llmpar uses, on the CPU, so that the CUDA device is built and run without a GPU. Device memory is host memory full of NaNs; what is enqueued
   on streams is run late and in a random legal order (emulated_cuda.cc); a kernel runs block by block with one fiber a thread (warp.h). C and C++; kernels are C++ alone.

   Environment, read once:  EMULATED_CUDA_SEED (1)          of every random choice
                            EMULATED_CUDA_DEVICES (1)       0: as without a driver; -1: a driver without a device
                            EMULATED_CUDA_CAPABILITY (90)   of each; 80, 86 and 89 have the shared memory of those
                            EMULATED_CUDA_MEMORY (4 GiB)    bytes of each
                            EMULATED_CUDA_NO_IMAGE (0)      1: as a program without code for them
   A wrong kernel (a barrier that some threads miss, lanes in different operations, a write beside shared memory, ..) ends the program with a line that names kernel, block and thread. */
#ifndef EMULATED_CUDA_RUNTIME_H
#define EMULATED_CUDA_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#define CUDART_VERSION 13000
#define CUDART_CB

#ifdef __cplusplus
extern "C" {
#endif

#define EMULATED_CUDA_ERRORS(X) \
    X(cudaSuccess, 0, "no error") \
    X(cudaErrorInvalidValue, 1, "invalid argument") \
    X(cudaErrorMemoryAllocation, 2, "out of memory") \
    X(cudaErrorInitializationError, 3, "initialization error") \
    X(cudaErrorInvalidConfiguration, 9, "invalid configuration argument") \
    X(cudaErrorInsufficientDriver, 35, "CUDA driver version is insufficient for CUDA runtime version") \
    X(cudaErrorInvalidDeviceFunction, 98, "invalid device function") \
    X(cudaErrorNoDevice, 100, "no CUDA-capable device is detected") \
    X(cudaErrorInvalidDevice, 101, "invalid device ordinal") \
    X(cudaErrorNoKernelImageForDevice, 209, "no kernel image is available for execution on the device") \
    X(cudaErrorInvalidResourceHandle, 400, "invalid resource handle") \
    X(cudaErrorNotReady, 600, "device not ready") \
    X(cudaErrorIllegalAddress, 700, "an illegal memory access was encountered") \
    X(cudaErrorLaunchOutOfResources, 701, "too many resources requested for launch") \
    X(cudaErrorPeerAccessAlreadyEnabled, 704, "peer access is already enabled") \
    X(cudaErrorPeerAccessNotEnabled, 705, "peer access has not been enabled") \
    X(cudaErrorHostMemoryAlreadyRegistered, 712, "part or all of the requested memory range is already mapped") \
    X(cudaErrorLaunchFailure, 719, "unspecified launch failure") \
    X(cudaErrorNotPermitted, 800, "operation not permitted") \
    X(cudaErrorNotSupported, 801, "operation not supported") \
    X(cudaErrorStreamCaptureUnsupported, 900, "operation not permitted when stream is capturing") \
    X(cudaErrorStreamCaptureInvalidated, 901, "operation failed due to a previous error during capture") \
    X(cudaErrorUnknown, 999, "unknown error")

typedef enum cudaError {
#define EMULATED_CUDA_ENUM(name, value, text) name = value,
    EMULATED_CUDA_ERRORS(EMULATED_CUDA_ENUM)
#undef EMULATED_CUDA_ENUM
    emulated_cuda_errors = 1000
} cudaError;
typedef enum cudaError cudaError_t;

typedef struct CUstream_st *cudaStream_t;
typedef struct CUevent_st *cudaEvent_t;
typedef struct CUgraph_st *cudaGraph_t;
typedef struct CUgraphExec_st *cudaGraphExec_t;
typedef void (*cudaHostFn_t)(void *user);
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal = 0, cudaStreamCaptureModeThreadLocal = 1, cudaStreamCaptureModeRelaxed = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToHost = 0, cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3, cudaMemcpyDefault = 4 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1, cudaDevAttrMaxSharedMemoryPerBlock = 8, cudaDevAttrMultiProcessorCount = 16, cudaDevAttrL2CacheSize = 38, cudaDevAttrMaxThreadsPerMultiProcessor = 39,
    cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76, cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
#define cudaStreamDefault 0x00
#define cudaStreamNonBlocking 0x01
#define cudaEventDefault 0x00
#define cudaEventBlockingSync 0x01
#define cudaEventDisableTiming 0x02
#define cudaHostAllocDefault 0x00
#define cudaHostAllocPortable 0x01
#define cudaHostRegisterDefault 0x00
#define cudaHostRegisterPortable 0x01

typedef struct cudaUUID_t { char bytes[16]; } cudaUUID_t;
typedef struct cudaDeviceProp {
    char name[256];
    cudaUUID_t uuid;
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
    int major, minor, multiProcessorCount, maxThreadsPerMultiProcessor, maxThreadsPerBlock, l2CacheSize, regsPerBlock, warpSize, pciBusID, pciDeviceID, pciDomainID;
} cudaDeviceProp;
typedef struct cudaFuncAttributes { size_t sharedSizeBytes, constSizeBytes, localSizeBytes; int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion; int maxDynamicSharedSizeBytes; } cudaFuncAttributes;

cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *out, int device);
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceGetPCIBusId(char *out, int bytes, int device);
cudaError_t cudaDeviceSynchronize(void);
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer);
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags);
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest);
cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaRuntimeGetVersion(int *version);
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total);
cudaError_t cudaGetLastError(void);
cudaError_t cudaPeekAtLastError(void);
const char *cudaGetErrorName(cudaError_t code);
const char *cudaGetErrorString(cudaError_t code);

cudaError_t cudaFree(void *memory);
cudaError_t cudaFreeHost(void *memory);
cudaError_t cudaHostRegister(void *memory, size_t bytes, unsigned flags);
cudaError_t cudaHostUnregister(void *memory);
cudaError_t cudaMemcpy(void *out, const void *in, size_t bytes, enum cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void *out, const void *in, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemcpy2DAsync(void *out, size_t out_pitch, const void *in, size_t in_pitch, size_t width, size_t height, enum cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemset(void *out, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void *out, int value, size_t bytes, cudaStream_t stream);

cudaError_t cudaStreamCreate(cudaStream_t *out);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags);
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int priority);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t fn, void *user);
/* Kernels, library calls, copies and memsets of one stream; nothing else may be captured. A graph runs with the arguments that were captured. */
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph);
cudaError_t cudaEventCreate(cudaEvent_t *out);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t begin, cudaEvent_t end);

/* What tests ask of the emulation alone (tests/cuda.h declares them weak, so that a build for a GPU links too). */
int emulated_cuda(void);                                             /* 1 */
void emulated_cuda_fail_launch(cudaError_t code, int calls);         /* the calls-th kernel launch from now (1 = the next) of the process is refused with code and not enqueued */
void emulated_cuda_fail_kernel(cudaError_t code, int calls);         /* the calls-th kernel from now fails while it runs: every later call of the process returns code; code cudaSuccess heals the process */
void emulated_cuda_fail_alloc(int calls);                            /* the calls-th cudaMalloc or cudaMallocHost from now has no memory */
size_t emulated_cuda_live(void);                                     /* bytes of cudaMalloc and cudaMallocHost that were not freed */
size_t emulated_cuda_graphs(void);                                   /* graphs, instantiated or not, that were not destroyed */
void emulated_cuda_fail_capture(int calls);                          /* the calls-th cudaStreamEndCapture from now has nothing */
size_t emulated_cuda_waiting(void);                                  /* entries of all streams that have not been run */
/* The stream does not go on before ready(arg) is 1, then done(arg) is called: for libraries that enqueue work whose end depends on other streams (NCCL). ready is called by any thread, often, and must not call CUDA;
   emulated_cuda_moved: it may have become so. */
int emulated_cuda_await(cudaStream_t stream, int (*ready)(void *arg), void (*done)(void *arg), void *arg);
void emulated_cuda_moved(void);

#ifdef __cplusplus
}

#include <functional>
#include <math.h>

template <typename T> static inline cudaError_t emulated_cuda_to(T **out, cudaError_t (*call)(void **, size_t), size_t bytes)
{
    void *memory = NULL;
    cudaError_t code = call(&memory, bytes);
    *out = (T *)memory;
    return code;
}
extern "C" {
cudaError_t cudaMalloc(void **out, size_t bytes);
cudaError_t cudaMallocHost(void **out, size_t bytes);
cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned flags);
cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute attribute, int value);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *out, const void *kernel);
}
template <typename T> static inline cudaError_t cudaMalloc(T **out, size_t bytes) { return emulated_cuda_to(out, (cudaError_t (*)(void **, size_t))cudaMalloc, bytes); }
template <typename T> static inline cudaError_t cudaMallocHost(T **out, size_t bytes) { return emulated_cuda_to(out, (cudaError_t (*)(void **, size_t))cudaMallocHost, bytes); }
template <typename... P> static inline cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), enum cudaFuncAttribute attribute, int value) { return cudaFuncSetAttribute((const void *)kernel, attribute, value); }
template <typename... P> static inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *out, void (*kernel)(P...)) { return cudaFuncGetAttributes(out, (const void *)kernel); }

/* ---- the language ---- */

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 { unsigned x, y, z; };
#define EMULATED_CUDA_VECTOR(type, name, align) \
    struct __attribute__((aligned(2 * align))) name##2 { type x, y; }; \
    struct __attribute__((aligned(4 * align > 16 ? 16 : 4 * align))) name##4 { type x, y, z, w; }; \
    static inline name##2 make_##name##2(type x, type y) { name##2 v = {x, y}; return v; } \
    static inline name##4 make_##name##4(type x, type y, type z, type w) { name##4 v = {x, y, z, w}; return v; }
EMULATED_CUDA_VECTOR(float, float, 4)
EMULATED_CUDA_VECTOR(int, int, 4)
EMULATED_CUDA_VECTOR(unsigned, uint, 4)
EMULATED_CUDA_VECTOR(double, double, 8)
EMULATED_CUDA_VECTOR(unsigned short, ushort, 2)
#undef EMULATED_CUDA_VECTOR

/* Enqueues kernel(values...). text: the arguments of the launch as written, of which the third is the kernel's name. */
cudaError_t emulated_cuda_enqueue(const char *text, const char *caller, const void *kernel, const std::function<void()> &run, dim3 grid, dim3 block, size_t shared, cudaStream_t stream);
template <typename... P> static inline cudaError_t emulated_cuda_launch(const char *text, const char *caller, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, P... values)
{
    return emulated_cuda_enqueue(text, caller, (const void *)kernel, [=]() { kernel(values...); }, grid, block, shared, stream);
}
/* Enqueues something else that works on device memory (a library's call). */
cudaError_t emulated_cuda_enqueue_call(const char *what, const std::function<void()> &run, cudaStream_t stream);
#else
struct dim3 { unsigned x, y, z; };
typedef struct dim3 dim3;
cudaError_t cudaMalloc(void **out, size_t bytes);
cudaError_t cudaMallocHost(void **out, size_t bytes);
cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned flags);
cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute attribute, int value);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *out, const void *kernel);
#endif

#endif
