/* cuda: what the tests of the CUDA device share. Programs tests/test_cuda_*.c run unchanged on a GPU and on the emulated one (tests/emulated_cuda); without either they end as skipped.

     TEST(rmsnorm)
     {
         CUDA_OPEN();                                            the device `cuda_gpu`, and the CPU's portable kernels as `cuda_cpu`; the test is skipped with the reason where there is no device
         double *x = ops_random(rows * dim, 1.0), *y = ops_zeros(rows * dim);
         void *in = cuda_put(cuda_gpu, LLMPAR_BF16, x, rows, dim, ld, 1);      rows with gaps, one element off its alignment
         void *out = cuda_put(cuda_gpu, LLMPAR_BF16, NULL, rows, dim, dim, 0); an output: NaNs
         .. the operation, on stream NULL (done on return) or on a stream ..
         cuda_get(out, y);
         cuda_near("y", y, want, rows * dim, 1e-6, 1e-2);
         cuda_done();                                            guards and gaps of all buffers are as they were; frees them
     }
   The last test of a program is T_(cuda_end). */
#ifndef TESTS_CUDA_H
#define TESTS_CUDA_H

#include "llmpar_cuda.h"
#include "ops.h"
#include <sys/wait.h>
#include <unistd.h>

/* Of the emulation (tests/emulated_cuda/cuda_runtime.h); absent, so NULL, in a build for a GPU. The codes are CUDA's. */
int emulated_cuda(void) __attribute__((weak));
void emulated_cuda_fail_launch(int code, int calls) __attribute__((weak));
void emulated_cuda_fail_kernel(int code, int calls) __attribute__((weak));
void emulated_cuda_fail_alloc(int calls) __attribute__((weak));
size_t emulated_cuda_live(void) __attribute__((weak));
size_t emulated_cuda_waiting(void) __attribute__((weak));
size_t emulated_cuda_graphs(void) __attribute__((weak));
void emulated_cuda_fail_capture(int calls) __attribute__((weak));

static inline int cuda_emulated(void) { return emulated_cuda != NULL; }
/* 1: small sizes alone: kernels run on the CPU, or a GPU's are watched by a tool (LLMPAR_CUDA_SMALL=1). 0: on a GPU: large ones too. */
static inline int cuda_small(void)
{
    const char *text = getenv("LLMPAR_CUDA_SMALL");
    return cuda_emulated() || (text && text[0] == '1');
}

static llmpar_ctx cuda_ctx;
static llmpar_device *cuda_gpu, *cuda_cpu;
static llmpar_cuda_desc cuda_desc;
static llmpar_error cuda_none; /* why there is no device */

static inline int cuda_open(void)
{
    llmpar_cpu_desc cpu;
    if (cuda_gpu) return 1;
    llmpar_error_clear(&cuda_none);
    if (llmpar_cuda_count(&cuda_none) < 1) return 0;
    cuda_ctx.rank = 0;
    cuda_ctx.world = 1;
    llmpar_heap_init(&cuda_ctx.heap, NULL);
    llmpar_error_clear(&cuda_ctx.error);
    memset(&cpu, 0, sizeof cpu);
    cpu.level = LLMPAR_CPU_PORTABLE;
    cpu.threads = 1;
    CHECK_OK(llmpar_cpu_create(&cuda_ctx.heap, &cuda_ctx.error, &cpu, &cuda_cpu));
    if (llmpar_cuda_create(&cuda_ctx, &cuda_desc, &cuda_gpu)) { TEST_FAIL("%s", cuda_ctx.error.text); exit(1); }
    cuda_ctx.device = cuda_gpu;
    cuda_ctx.host = cuda_cpu;
    return 1;
}
#define CUDA_OPEN() do { if (!cuda_open()) TEST_SKIP(cuda_none.text); llmpar_error_clear(&cuda_ctx.error); } while (0)
/* A call that has to succeed; shows the device's text. */
#define CUDA_OK(call) do { llmpar_status cuda_s = (call); if (cuda_s) { TEST_FAIL("%s: %s: %s", #call, llmpar_status_string(cuda_s), cuda_ctx.error.text); llmpar_error_clear(&cuda_ctx.error); } } while (0)
/* A call that has to be refused with a text that contains `part`. */
#define CUDA_REFUSED(call, want, part) do { llmpar_error_clear(&cuda_ctx.error); CHECK_STATUS(call, want); CHECK_TEXT(cuda_ctx.error.text, part); llmpar_error_clear(&cuda_ctx.error); } while (0)

/* ---- buffers ---- */

enum { CUDA_GUARD = 256, CUDA_BUFFERS = 256 };
typedef struct cuda_buffer {
    llmpar_device *device;
    unsigned char *memory, *at, *image; /* at: first element; image: what the memory held at first, on the host */
    size_t total;
    llmpar_dtype dtype;
    size_t size;
    int64_t rows, width, ld;
} cuda_buffer;
static cuda_buffer cuda_buffers[CUDA_BUFFERS];
static int cuda_buffer_count;

static inline void cuda_fill(unsigned char *out, size_t bytes) { for (size_t i = 0; i < bytes; i++) out[i] = (unsigned char)(ops_bits() >> 8); }

/* rows x width elements with row stride ld, `off` elements behind a 256-byte boundary. bytes: the rows one after the other; NULL: an output, full of NaNs. */
static inline void *cuda_put_bytes(llmpar_device *device, size_t size, const void *bytes, int64_t rows, int64_t width, int64_t ld, int64_t off)
{
    cuda_buffer *b = &cuda_buffers[cuda_buffer_count];
    size_t body = rows > 0 && width > 0 ? ((size_t)(rows - 1) * (size_t)ld + (size_t)width) * size : 0;
    void *memory = NULL;
    if (cuda_buffer_count == CUDA_BUFFERS) { TEST_FAIL("too many buffers: cuda_done is missing"); exit(1); }
    cuda_buffer_count++;
    memset(b, 0, sizeof *b);
    b->device = device;
    b->size = size;
    b->rows = rows;
    b->width = width;
    b->ld = ld;
    b->total = CUDA_GUARD + (size_t)off * size + body + CUDA_GUARD;
    if (device->alloc(device, b->total, &memory)) { TEST_FAIL("%s", device->error->text); exit(1); }
    b->memory = (unsigned char *)memory;
    b->at = b->memory + CUDA_GUARD + (size_t)off * size;
    b->image = (unsigned char *)malloc(b->total);
    cuda_fill(b->image, b->total);
    for (int64_t r = 0; r < rows && width > 0; r++) {
        unsigned char *row = b->image + (b->at - b->memory) + (size_t)(r * ld) * size;
        if (bytes) memcpy(row, (const unsigned char *)bytes + (size_t)(r * width) * size, (size_t)width * size);
        else memset(row, 0xff, (size_t)width * size);
    }
    CUDA_OK(device->copy(device, NULL, b->memory, b->image, b->total));
    return b->at;
}
/* The same for values, which hold f32, bf16 and f16 exactly where they come from cuda_round; dtype I32: int32_t values behind the pointer. */
static inline void *cuda_put(llmpar_device *device, llmpar_dtype dtype, const void *values, int64_t rows, int64_t width, int64_t ld, int64_t off)
{
    size_t size = llmpar_dtype_size(dtype), count = (size_t)(rows * width);
    void *typed = NULL, *out;
    if (values && dtype != LLMPAR_I32 && dtype != LLMPAR_I64) {
        typed = malloc(count * size + 1);
        CHECK(llmpar_convert(typed, dtype, values, LLMPAR_F64, count));
    }
    out = cuda_put_bytes(device, size, typed ? typed : values, rows, width, ld, off);
    cuda_buffers[cuda_buffer_count - 1].dtype = dtype;
    free(typed);
    return out;
}
static inline void *cuda_put_vector(llmpar_device *device, llmpar_dtype dtype, const void *values, int64_t count) { return cuda_put(device, dtype, values, 1, count, count, 0); }

static inline cuda_buffer *cuda_find(const void *at)
{
    for (int i = cuda_buffer_count; i > 0; i--) if (cuda_buffers[i - 1].at == (const unsigned char *)at) return &cuda_buffers[i - 1];
    TEST_FAIL("no such buffer");
    exit(1);
}
/* The rows one after the other, as bytes. */
static inline void cuda_get_bytes(const void *at, void *out)
{
    cuda_buffer *b = cuda_find(at);
    unsigned char *now = (unsigned char *)malloc(b->total);
    CUDA_OK(b->device->copy(b->device, NULL, now, b->memory, b->total));
    for (int64_t r = 0; r < b->rows && b->width > 0; r++)
        memcpy((unsigned char *)out + (size_t)(r * b->width) * b->size, now + (b->at - b->memory) + (size_t)(r * b->ld) * b->size, (size_t)b->width * b->size);
    free(now);
}
/* As values. */
static inline void cuda_get(const void *at, double *out)
{
    cuda_buffer *b = cuda_find(at);
    size_t count = (size_t)(b->rows * b->width);
    void *typed = malloc(count * b->size + 1);
    cuda_get_bytes(at, typed);
    CHECK(llmpar_convert(out, LLMPAR_F64, typed, b->dtype, count));
    free(typed);
}
/* Writes new values into a buffer; NULL: NaNs again. */
static inline void cuda_set(const void *at, const double *values)
{
    cuda_buffer *b = cuda_find(at);
    size_t count = (size_t)(b->rows * b->width);
    unsigned char *typed = (unsigned char *)malloc(count * b->size + 1);
    memset(typed, 0xff, count * b->size);
    if (values) CHECK(llmpar_convert(typed, b->dtype, values, LLMPAR_F64, count));
    for (int64_t r = 0; r < b->rows && b->width > 0; r++) CUDA_OK(b->device->copy(b->device, NULL, b->at + (size_t)(r * b->ld) * b->size, typed + (size_t)(r * b->width) * b->size, (size_t)b->width * b->size));
    free(typed);
}

/* Guards and gaps are as they were; everything is freed. */
static inline void cuda_done(void)
{
    for (int i = 0; i < cuda_buffer_count; i++) {
        cuda_buffer *b = &cuda_buffers[i];
        unsigned char *now = (unsigned char *)malloc(b->total);
        size_t first = (size_t)(b->at - b->memory);
        CUDA_OK(b->device->copy(b->device, NULL, now, b->memory, b->total));
        for (int64_t r = 0; r < b->rows && b->width > 0; r++) memcpy(now + first + (size_t)(r * b->ld) * b->size, b->image + first + (size_t)(r * b->ld) * b->size, (size_t)b->width * b->size);
        for (size_t k = 0; k < b->total; k++)
            if (now[k] != b->image[k]) {
                TEST_FAIL("buffer %d (%lld x %lld, stride %lld, %d bytes each): byte %lld from its first element was written", i, (long long)b->rows, (long long)b->width, (long long)b->ld, (int)b->size, (long long)k - (long long)first);
                break;
            }
        b->device->free(b->device, b->memory, b->total);
        free(b->image);
        free(now);
    }
    cuda_buffer_count = 0;
}

/* ---- values ---- */

/* To what dtype can hold. */
static inline void cuda_round(llmpar_dtype dtype, double *values, int64_t count)
{
    void *typed = malloc((size_t)count * 8 + 1);
    CHECK(llmpar_convert(typed, dtype, values, LLMPAR_F64, (size_t)count));
    CHECK(llmpar_convert(values, LLMPAR_F64, typed, dtype, (size_t)count));
    free(typed);
}
/* Half a unit in the last place, relative. */
static inline double cuda_epsilon(llmpar_dtype dtype) { return dtype == LLMPAR_BF16 ? 0.00390625 : dtype == LLMPAR_F16 ? 0.00048828125 : 5.9604644775390625e-8; }
/* |got - want| <= absolute + relative |want|, NaN only where NaN is wanted; the worst is said. */
static inline void cuda_near(const char *what, const double *got, const double *want, int64_t count, double absolute, double relative)
{
    int64_t worst = -1;
    double excess = 0;
    for (int64_t i = 0; i < count; i++) {
        double bound = absolute + relative * fabs(want[i]), off = fabs(got[i] - want[i]);
        if (got[i] == want[i] || (got[i] != got[i] && want[i] != want[i])) continue;
        if (off <= bound) continue;
        if (worst < 0 || !(off / (bound > 0 ? bound : 1e-300) <= excess)) { worst = i; excess = off / (bound > 0 ? bound : 1e-300); }
        if (off != off) break;
    }
    if (worst >= 0) TEST_FAIL("%s[%lld of %lld]: got %.9g, want %.9g within %.3g + %.3g |want|", what, (long long)worst, (long long)count, got[worst], want[worst], absolute, relative);
}
/* The same bits. */
static inline void cuda_same(const char *what, const double *got, const double *want, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        if (memcmp(&got[i], &want[i], sizeof got[i])) {
            TEST_FAIL("%s[%lld of %lld]: got %.9g, want the same bits as %.9g", what, (long long)i, (long long)count, got[i], want[i]);
            return;
        }
}

/* Those of this program's tests whose names contain `tests` on other emulated devices (tests/emulated_cuda/cuda_runtime.h): EMULATED_CUDA_CAPABILITY 80 and 86 have less shared memory (163 and 99 KiB), so there are other ways
   through the same kernels; of EMULATED_CUDA_DEVICES ranks take one each. In a child, since the runtime reads its environment once. On a GPU: nothing. */
static inline void cuda_again(const char *variable, const char *value, const char *tests)
{
    pid_t child;
    int status = -1;
    if (!cuda_emulated()) return;
    fflush(NULL);
    child = fork();
    if (child == 0) {
        setenv(variable, value, 1);
        if (freopen("/dev/null", "w", stdout)) execl("/proc/self/exe", "again", tests, (char *)NULL);
        _exit(127);
    }
    waitpid(child, &status, 0);
    if (status) TEST_FAIL("%s with %s=%s: status %d", tests, variable, value, status);
}

static inline void cuda_end(void)
{
    cuda_done();
    if (!cuda_gpu) TEST_SKIP(cuda_none.text[0] ? cuda_none.text : "no device was asked for");
    llmpar_cuda_destroy(cuda_gpu);
    llmpar_cpu_destroy(cuda_cpu);
    cuda_gpu = NULL;
    CHECK_INT(cuda_ctx.heap.live, 0);
    if (cuda_emulated()) CHECK_INT(emulated_cuda_live(), 0);
    if (cuda_emulated()) CHECK_INT(emulated_cuda_graphs(), 0);
}

#endif
