/* GENERATED from src/: edit there, then run make gen */
/*
llmpar.h - train and run Llama-family models on many ranks at once

    Fully sharded data parallelism (FSDP) x tensor parallelism (TP) on a 2D device mesh, in one C99 header.
    Loss, gradients and saved weights have the same bits on every mesh.
    MIT licence, see the end of the file.

DO THIS

    In ONE .c (or .cc) file of your program:

        #define LLMPAR_IMPLEMENTATION
        #include "llmpar.h"

    before any other #include. Everywhere else include "llmpar.h" alone. Compile that one file with -O3, even in a
    debug build (the kernels are in it), and link with -lpthread -lm:

        cc -O3 -c llmpar_impl.c
        cc -g program.c llmpar_impl.o -o program -lpthread -lm

    A whole program, one file (C99; in C++ write `llmpar_mesh_desc d = {};` and fill it in):

        #define LLMPAR_IMPLEMENTATION
        #include "llmpar.h"
        #include <stdio.h>

        static llmpar_status train(llmpar_ctx *ctx, void *user)              // every rank runs this
        {
            llmpar_mesh *mesh = NULL; llmpar_llama *model = NULL; llmpar_trainer *t = NULL; llmpar_step s;
            llmpar_status st = llmpar_mesh_create(ctx, &(llmpar_mesh_desc){ .dp_shard = 2, .tp = 2 }, &mesh);
            if (!st) st = llmpar_llama_create(ctx, &(llmpar_llama_desc){ .preset = "tiny", .seed = 1 }, &model);
            if (!st) st = llmpar_parallelize(mesh, model, &(llmpar_trainer_desc){ .data = (const char *)user, .seq_len = 256, .batch = 8, .lr = 1e-3 }, &t);
            for (int i = 0; !st && i < 200; i++) st = llmpar_trainer_step(t, &s);
            if (!st) st = llmpar_save_hf(t, "out");                          // transformers loads this
            llmpar_trainer_destroy(t); llmpar_llama_destroy(model); llmpar_mesh_destroy(mesh);   // NULL is fine
            return st;
        }

        int main(void)
        {
            llmpar_error err;
            if (llmpar_launch(&(llmpar_launch_desc){ .ranks = 4 }, train, (void *)"input.txt", &err)) { fprintf(stderr, "%s\n", err.text); return 1; }
            return 0;
        }

    The ranks are threads of your process. Every call that takes a ctx, or an object made from one, is collective -
    all ranks make it, in the same order - unless its comment says local.

OPTIONS (define before the #include; where not said otherwise, in the file with LLMPAR_IMPLEMENTATION)

    LLMPAR_IMPLEMENTATION   this file gets the functions
    LLMPAR_STATIC           every function is static: the library is private to this file
    LLMPAR_API              storage class and attributes of the public declarations, default `extern`
                            (everywhere alike, e.g. __declspec(dllexport), __attribute__((visibility("default"))) )
    LLMPAR_NO_LLAMA         leaves out the implementation of the Llama model and of everything built on it
    LLMPAR_NO_TEXT          ... of tokenizer and token data
    LLMPAR_NO_IO            ... of files: safetensors, Hugging Face directories (with it goes what needs them)
    LLMPAR_NO_SIM           ... of the device and the communicator that only count
    LLMPAR_NO_SIMD          ... of the vector kernels: portable C alone, the same bits
                            (LLMPAR_NO_... never removes a declaration: a call of what is left out fails to link)

    Environment: LLMPAR_CPU=portable|avx2|avx512 forces a dispatch level (same bits, other speed).

llmpar DOES NOT

    - print, exit or abort: every fallible call returns llmpar_status, and the text of the error names rank, mesh
      coordinate, tensor, expected and got. (llmpar_launch and the trainer write to callbacks; their default is
      stderr and stdout.)
    - keep mutable globals, or take memory behind your back: all of it goes through your llmpar_allocator.
    - run under -ffast-math or -Ofast: equal bits need the order of sums that the source has. Contraction of a*b+c is
      switched off for this header alone; your own code keeps its flags.
    - train on several machines or on GPUs in this version: the ranks are threads. Whoever needs more brings a
      device table (llmpar_device) or a communicator table (llmpar_comm) of their own.
    - promise equal bits outside the guarantee (docs/exact.md): rank counts that do not divide the canonical pieces
      are deterministic, and refused under `exact = require`.

CHAPTERS: base (status, memory, numbers) - tables (one rank's view, device, communicator) - cpu - comm - mesh - tp -
fsdp - optim - io - text - model - model_io - run. Each declaration says its shapes, its owner and its errors.
*/

/* Feature-test macros have to precede the first system header. */
#if defined(LLMPAR_IMPLEMENTATION) && !defined(LLMPAR__IMPLEMENTED) && !defined(__CUDACC__)
#if defined(__STRICT_ANSI__) && (defined(_FEATURES_H) || defined(_SYS_CDEFS_H_)) && !defined(_GNU_SOURCE) && !defined(_DEFAULT_SOURCE) && !defined(_DARWIN_C_SOURCE)
#error "llmpar: in strict mode (-std=c99) llmpar.h must come before every system header in the file that defines LLMPAR_IMPLEMENTATION; or compile that file with -std=gnu99 or -D_DEFAULT_SOURCE"
#endif
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#if defined(__APPLE__) && !defined(_DARWIN_C_SOURCE)
#define _DARWIN_C_SOURCE 1
#endif
#endif

#ifndef LLMPAR_H
#define LLMPAR_H

/* ==== src/base/platform.h ==== */
/* platform: what every module may assume about the compiler, and the linkage macros.
   The only module that tests the platform; everything else is plain C99 that is also C++11. */
#ifndef LLMPAR_PLATFORM_H
#define LLMPAR_PLATFORM_H

/* Modules built one by one include this before any system header; the generated header does the same at its top. */
#ifdef LLMPAR__SEPARATE
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#if defined(__APPLE__) && !defined(_DARWIN_C_SOURCE)
#define _DARWIN_C_SOURCE 1
#endif
#endif

#include <stddef.h>
#include <stdint.h>

#if !defined(__GNUC__)
#error "llmpar: needs gcc >= 9 or clang >= 11 (vector extensions and __atomic builtins)"
#endif
#if !defined(__linux__) && !defined(__APPLE__)
#error "llmpar: supports Linux (glibc, musl); macOS compiles; other systems are not supported"
#endif
#if !defined(__x86_64__) && !defined(__aarch64__)
#error "llmpar: supports x86-64 and aarch64"
#endif
#if defined(__CUDACC__) && defined(LLMPAR_IMPLEMENTATION)
#error "llmpar: define LLMPAR_IMPLEMENTATION in a .c or .cc file, not in one compiled by nvcc; .cu files get the declarations"
#endif

/* Linkage. LLMPAR_API may be defined by the user (dllexport, visibility). LLMPAR_STATIC makes every public
   function static. LLMPAR__PRIVATE marks functions shared between modules but not with users: static in the
   generated header, extern when the modules are built one by one (LLMPAR__SEPARATE). */
#ifndef LLMPAR_API
#ifdef LLMPAR_STATIC
#define LLMPAR_API static LLMPAR__UNUSED
#else
#define LLMPAR_API extern
#endif
#endif
#define LLMPAR__UNUSED __attribute__((unused))
#ifdef LLMPAR__SEPARATE
#define LLMPAR__PRIVATE extern
#define LLMPAR__PRIVATE_DEF
#else
#define LLMPAR__PRIVATE static LLMPAR__UNUSED
#define LLMPAR__PRIVATE_DEF static LLMPAR__UNUSED
#endif
/* A definition of a LLMPAR_API function begins with LLMPAR_DEF, of a LLMPAR__PRIVATE one with LLMPAR__PRIVATE_DEF. */
#ifdef LLMPAR_STATIC
#define LLMPAR_DEF static LLMPAR__UNUSED
#else
#define LLMPAR_DEF
#endif

#define LLMPAR_RESTRICT __restrict
#define LLMPAR_PRINTF(format_index, first) __attribute__((format(printf, format_index, first)))

#ifdef __cplusplus
#define LLMPAR_EXTERN_C_BEGIN extern "C" {
#define LLMPAR_EXTERN_C_END }
#else
#define LLMPAR_EXTERN_C_BEGIN
#define LLMPAR_EXTERN_C_END
#endif

#endif

LLMPAR_EXTERN_C_BEGIN

/* Chapter: base */
/* ==== src/base/status.h ==== */
/* status: what every fallible call returns, and the text that says what, where, expected and got. */
#ifndef LLMPAR_STATUS_H
#define LLMPAR_STATUS_H


/* One list makes the enum and the strings. */
#define LLMPAR_STATUS_LIST(X) \
    X(OK, 0, "ok") \
    X(ERR_ARGUMENT, 1, "invalid argument") \
    X(ERR_SHAPE, 2, "shape mismatch") \
    X(ERR_MEMORY, 3, "out of memory") \
    X(ERR_OVERFLOW, 4, "size overflow") \
    X(ERR_IO, 5, "input/output error") \
    X(ERR_FORMAT, 6, "malformed input") \
    X(ERR_CONFIG, 7, "invalid configuration") \
    X(ERR_MESH, 8, "mesh mismatch") \
    X(ERR_PEER, 9, "another rank failed") \
    X(ERR_MISMATCH, 10, "ranks disagree") \
    X(ERR_TIMEOUT, 11, "deadline exceeded") \
    X(ERR_UNSUPPORTED, 12, "not supported") \
    X(ERR_SCHEDULE, 13, "invalid schedule") \
    X(ERR_NONFINITE, 14, "non-finite value") \
    X(ERR_ABI, 15, "table with another abi") \
    X(ERR_INTERNAL, 16, "internal error")

typedef enum llmpar_status {
#define LLMPAR__STATUS_ENUM(name, value, text) LLMPAR_##name = value,
    LLMPAR_STATUS_LIST(LLMPAR__STATUS_ENUM)
#undef LLMPAR__STATUS_ENUM
    LLMPAR_STATUS_COUNT = 17
} llmpar_status;

/* An error and its place. Owned by the caller; plain data, may be copied. */
typedef struct llmpar_error {
    llmpar_status status; /* LLMPAR_OK: no error */
    int32_t rank;         /* world rank that failed, -1 if no rank was involved */
    char where[48];       /* mesh coordinate "dp_shard=1 tp=0", or "" */
    char text[700];       /* one line, no newline at the end */
} llmpar_error;

/* "out of memory" and so on; never NULL. Thread-safe. */
LLMPAR_API const char *llmpar_status_string(llmpar_status status);

/* Fills *error (NULL is fine) and returns `status`, so that callers write `return llmpar_error_set(...)`.
   The first error stays: a second call on an error that is already set changes nothing.
   Text longer than the buffer is cut and ends in "...". Not thread-safe for one *error. */
LLMPAR_API llmpar_status llmpar_error_set(llmpar_error *error, llmpar_status status, const char *format, ...) LLMPAR_PRINTF(3, 4);

/* Back to "no error" (status OK, rank -1, empty texts). */
LLMPAR_API void llmpar_error_clear(llmpar_error *error);

#endif
/* ==== src/base/heap.h ==== */
/* heap: allocator hooks and live-byte counting. Every byte of host memory the library takes goes through one. */
#ifndef LLMPAR_HEAP_H
#define LLMPAR_HEAP_H


/* User hooks. alloc returns memory aligned to at least 16 bytes or NULL; free gets the size that was asked for.
   Both are called from the rank's own thread only. Zero-initialised = malloc/free. */
typedef struct llmpar_allocator {
    void *(*alloc)(void *user, size_t bytes);
    void (*free)(void *user, void *memory, size_t bytes);
    void *user;
} llmpar_allocator;

/* One rank's heap. `live` is zero after clean-up: tests check it. */
typedef struct llmpar_heap {
    llmpar_allocator allocator; /* borrowed user pointer */
    uint64_t live;              /* bytes now allocated (as requested) */
    uint64_t peak;              /* largest `live` so far */
    uint64_t calls;             /* successful allocations so far */
    uint64_t fail_at;           /* test hook: the fail_at-th allocation (1 = next when calls is 0) returns NULL; 0 = never */
} llmpar_heap;

/* allocator may be NULL (malloc/free). Cannot fail. */
LLMPAR_API void llmpar_heap_init(llmpar_heap *heap, const llmpar_allocator *allocator);
/* count * size bytes aligned to 64, uninitialised; NULL when out of memory or when the product overflows. 0 bytes give a
   valid unique pointer. Not thread-safe for one heap. */
LLMPAR_API void *llmpar_heap_alloc(llmpar_heap *heap, size_t count, size_t size);
/* The same, zeroed. */
LLMPAR_API void *llmpar_heap_zalloc(llmpar_heap *heap, size_t count, size_t size);
/* A copy of a zero-terminated string, or NULL. */
LLMPAR_API char *llmpar_heap_strdup(llmpar_heap *heap, const char *text);
/* memory may be NULL. */
LLMPAR_API void llmpar_heap_free(llmpar_heap *heap, void *memory);

#endif
/* ==== src/base/size.h ==== */
/* size: checked integer arithmetic, and the two rules of docs/exact.md that cut extents and shape trees. */
#ifndef LLMPAR_SIZE_H
#define LLMPAR_SIZE_H


/* Each returns 1 and stores the result, or returns 0 and leaves *out alone when it would overflow. */
LLMPAR_API int llmpar_size_mul(size_t a, size_t b, size_t *out);
LLMPAR_API int llmpar_size_add(size_t a, size_t b, size_t *out);
/* Product of `count` non-negative extents; 0 on a negative extent or on overflow of int64_t. count 0 gives 1. */
LLMPAR_API int llmpar_extent_product(const int64_t *extents, int count, int64_t *out);
/* Smallest multiple of `unit` (> 0) that is >= value. The caller made sure that it fits. */
LLMPAR_API int64_t llmpar_round_up(int64_t value, int64_t unit);
LLMPAR_API int llmpar_is_pow2(int64_t value); /* 1, 2, 4, ...: yes; 0 and negatives: no */

/* First grain of piece i when `grains` are cut into `pieces`: floor(i * grains / pieces), 0 <= i <= pieces. The same rule
   cuts a tensor dim over the ranks of a mesh axis, which is why a rank boundary is a piece boundary whenever ranks divide
   pieces: floor(r*G/n) == floor((r*(C/n))*G/C). No overflow for grains < 2^40, pieces < 2^20. */
LLMPAR_API int64_t llmpar_piece_begin(int64_t i, int64_t grains, int64_t pieces);

/* Where a balanced tree over n >= 2 leaves splits: the largest power of two below n (left part [0, split)). */
LLMPAR_API int64_t llmpar_tree_split(int64_t n);

#endif
/* ==== src/base/dtype.h ==== */
/* dtype: element types and conversions. Every narrowing rounds to nearest, ties to even; NaN stays NaN. */
#ifndef LLMPAR_DTYPE_H
#define LLMPAR_DTYPE_H


typedef enum llmpar_dtype {
    LLMPAR_DTYPE_DEFAULT = 0, /* each desc says what it means there; never a stored type */
    LLMPAR_F32 = 1,
    LLMPAR_F64 = 2,
    LLMPAR_BF16 = 3,
    LLMPAR_F16 = 4,
    LLMPAR_I32 = 5,
    LLMPAR_I64 = 6,
    LLMPAR_U64 = 7,
    LLMPAR_U8 = 8,
    LLMPAR_DTYPE_COUNT = 9
} llmpar_dtype;

/* Bytes of one element; 0 for DEFAULT or an unknown value. */
LLMPAR_API size_t llmpar_dtype_size(llmpar_dtype dtype);
/* "f32", "bf16", ...; "?" for an unknown value. */
LLMPAR_API const char *llmpar_dtype_name(llmpar_dtype dtype);

/* Bit patterns. NaNs become the quiet NaN with the sign and the leading payload bits kept (bf16: x86/torch truncation
   with the quiet bit set). f16 overflow gives infinity, subnormals are exact. */
LLMPAR_API uint16_t llmpar_f32_to_bf16(float value);
LLMPAR_API float llmpar_bf16_to_f32(uint16_t bits);
LLMPAR_API uint16_t llmpar_f32_to_f16(float value);
LLMPAR_API float llmpar_f16_to_f32(uint16_t bits);

/* count elements from one floating dtype to another (f32, f64, bf16, f16 in any pair; f64 -> 16 bit rounds once).
   Buffers must not overlap unless identical types. Returns 0 for a dtype that is not floating, else 1. */
LLMPAR_API int llmpar_convert(void *out, llmpar_dtype out_dtype, const void *in, llmpar_dtype in_dtype, size_t count);

#endif
/* ==== src/base/math.h ==== */
/* math: the library's own elementary functions. Kernels call no libm, so that the same source gives the same bits with any
   C library; each states its error. All are pure and thread-safe. The *_f32 functions are written branch-light so that a loop over
   them can be vectorised; they use no fma (bits do not depend on the instruction set). */
#ifndef LLMPAR_MATH_H
#define LLMPAR_MATH_H


LLMPAR_API float llmpar_exp_f32(float x);   /* <= 2 ulp; under -104 gives 0, over 88.73 inf; NaN in, NaN out; results may be subnormal (<= 1 ulp of the smallest subnormal) */
LLMPAR_API float llmpar_log_f32(float x);   /* <= 2 ulp, subnormals included; 0 gives -inf, negative gives NaN */
LLMPAR_API double llmpar_exp_f64(double x); /* <= 2 ulp */
LLMPAR_API double llmpar_log_f64(double x); /* <= 2 ulp */
LLMPAR_API double llmpar_pow_f64(double base, double exponent); /* base > 0; relative error <= 4e-15 for results in [1e-30, 1e30] */
/* sine and cosine of x, |x| <= 1e9 (Cody-Waite with a three-part pi/2 and own polynomials): absolute error <= 2^-52. */
LLMPAR_API void llmpar_sincos_f64(double x, double *sine, double *cosine);
LLMPAR_API double llmpar_sqrt_f64(double x); /* correctly rounded (IEEE) */
LLMPAR_API float llmpar_sqrt_f32(float x);   /* correctly rounded (IEEE) */
LLMPAR_API int llmpar_isfinite_f32(float x); /* by bits; immune to compiler flags */
LLMPAR_API int llmpar_isfinite_f64(double x);

#endif
/* ==== src/base/exact_sum.h ==== */
/* exact_sum: an order-free, exact sum of doubles (Kulisch's long accumulator in 32-bit limbs held in int64).
   Adding limbs of two accumulators as integers merges them, so ranks combine by an i64 sum all-reduce in any order and every mesh gets the same bits. */
#ifndef LLMPAR_EXACT_SUM_H
#define LLMPAR_EXACT_SUM_H


/* limb[i] has weight 2^(32*i - 1088), i < 67; the last three count +inf, -inf and NaN terms. All zero = empty sum. At most 2^30 additions
   (merged ones counted) before llmpar_exact_sum_carry. */
#define LLMPAR_EXACT_SUM_LIMBS 72
typedef struct llmpar_exact_sum { int64_t limb[LLMPAR_EXACT_SUM_LIMBS]; } llmpar_exact_sum;

LLMPAR_API void llmpar_exact_sum_add(llmpar_exact_sum *sum, double value);
/* Adds value[i]^2, i < count, each square exact (a product of two floats fits a double). Carries by itself. */
LLMPAR_API void llmpar_exact_sum_add_squares_f32(llmpar_exact_sum *sum, const float *value, size_t count);
LLMPAR_API void llmpar_exact_sum_merge(llmpar_exact_sum *sum, const llmpar_exact_sum *other);
/* Normalises limbs to 32 bits; the value is unchanged. */
LLMPAR_API void llmpar_exact_sum_carry(llmpar_exact_sum *sum);
/* The sum rounded once to the nearest double, ties to even; inf/NaN as IEEE addition would give. Does not change *sum. */
LLMPAR_API double llmpar_exact_sum_value(const llmpar_exact_sum *sum);

#endif
/* ==== src/base/rng.h ==== */
/* rng: counter-based random numbers (Philox4x32-10, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
   A number is a pure function of its key and position, so a rank generates only its own slices and no mesh changes a value. */
#ifndef LLMPAR_RNG_H
#define LLMPAR_RNG_H


typedef enum llmpar_rng_purpose { LLMPAR_RNG_INIT = 1, LLMPAR_RNG_SAMPLE = 2, LLMPAR_RNG_DATA = 3, LLMPAR_RNG_DROPOUT = 4, LLMPAR_RNG_USER = 100 } llmpar_rng_purpose;

/* The key of a stream; plain data. Made by llmpar_rng_key from (seed, purpose, name, step, sample). */
typedef struct llmpar_rng { uint32_t key[2]; uint32_t counter_high[2]; } llmpar_rng;

/* name may be NULL. Initialisation uses step = sample = 0 (docs/exact.md). */
LLMPAR_API llmpar_rng llmpar_rng_key(uint64_t seed, uint32_t purpose, const char *name, uint64_t step, uint64_t sample);
/* The four 32-bit words at `position`. */
LLMPAR_API void llmpar_rng_words(const llmpar_rng *rng, uint64_t position, uint32_t words[4]);
/* Uniform in [0, 1) with 53 bits, element `index`. */
LLMPAR_API double llmpar_rng_uniform(const llmpar_rng *rng, uint64_t index);
/* Standard normal, element `index` (Box-Muller in f64 with own log and sincos). */
LLMPAR_API double llmpar_rng_normal(const llmpar_rng *rng, uint64_t index);
/* out[i] = mean + stddev * normal(first + i) rounded to f32, i < count. */
LLMPAR_API void llmpar_rng_fill_normal_f32(const llmpar_rng *rng, uint64_t first, size_t count, float mean, float stddev, float *out);

#endif
/* ==== src/base/json.h ==== */
/* json: an RFC 8259 reader with byte positions, and string escaping for writers. */
#ifndef LLMPAR_JSON_H
#define LLMPAR_JSON_H


typedef enum llmpar_json_type { LLMPAR_JSON_NULL = 0, LLMPAR_JSON_BOOL, LLMPAR_JSON_NUMBER, LLMPAR_JSON_STRING, LLMPAR_JSON_ARRAY, LLMPAR_JSON_OBJECT } llmpar_json_type;

/* A value. Children hang on `child` and follow `next`; a member's name is in key. Strings carry their length and may hold
   NUL bytes; they are UTF-8, escapes decoded, and end in an extra NUL. Owned by the document. */
typedef struct llmpar_json {
    llmpar_json_type type;
    int boolean;                 /* BOOL */
    int is_integer;              /* NUMBER written without fraction and exponent that fits `integer` */
    int64_t integer;
    double number;               /* NUMBER; overflow to infinity is an error */
    const char *string;          /* STRING */
    size_t length;               /* bytes of `string`, or number of children */
    const char *key;             /* NULL unless a member of an object */
    size_t key_length;
    size_t position;             /* byte offset of the value in the text */
    struct llmpar_json *child, *next;
} llmpar_json;

typedef struct llmpar_json_desc {
    uint32_t max_depth;   /* default 128 */
    int unique_keys;      /* 1: a duplicate member name is an error; readers of config and safetensors always set it */
    const char *name;     /* for messages, default "json" */
} llmpar_json_desc;

/* Parses exactly one value with optional white space around it. *out is owned by the caller, freed by llmpar_json_destroy with the same heap; NULL
   on error. desc may be NULL. Errors: LLMPAR_ERR_FORMAT "NAME: byte 17: expected ',' or '}', got 'x'"; LLMPAR_ERR_MEMORY. Memory is
   bounded by a small multiple of `length`. */
LLMPAR_API llmpar_status llmpar_json_parse(llmpar_heap *heap, const char *text, size_t length, const llmpar_json_desc *desc, llmpar_json **out, llmpar_error *error);
LLMPAR_API void llmpar_json_destroy(llmpar_heap *heap, llmpar_json *root);
/* Member by name (zero-terminated), or NULL. object may be NULL or no object: NULL. */
LLMPAR_API const llmpar_json *llmpar_json_get(const llmpar_json *object, const char *key);
/* Writes `length` bytes of text as a quoted JSON string with a final NUL into out; returns the bytes needed without the NUL, and writes nothing past `capacity`. Invalid UTF-8 is
   replaced by U+FFFD. */
LLMPAR_API size_t llmpar_json_escape(const char *text, size_t length, char *out, size_t capacity);

#endif

/* Chapter: tables */
/* ==== src/tables/ctx.h ==== */
/* ctx: one rank's view of the job: heap, device, world communicator, error text, log. Made and ended by llmpar_launch; never
   shared between ranks. */
#ifndef LLMPAR_CTX_H
#define LLMPAR_CTX_H


struct llmpar_device;
struct llmpar_comm;

typedef enum llmpar_log_level { LLMPAR_LOG_DEFAULT = 0, LLMPAR_LOG_ERROR = 1, LLMPAR_LOG_WARNING = 2, LLMPAR_LOG_INFO = 3 } llmpar_log_level;
/* Receives one line without its newline. Called on the rank's own thread. */
typedef void (*llmpar_log_fn)(void *user, int rank, llmpar_log_level level, const char *line);

typedef struct llmpar_ctx {
    int32_t rank, world;          /* world rank and number of ranks */
    llmpar_heap heap;             /* host memory of this rank; the CPU device takes its memory here too */
    llmpar_error error;           /* the first error of this rank */
    struct llmpar_device *device; /* owned by launch */
    struct llmpar_comm *comm;     /* the world; owned by launch */
    llmpar_log_fn log;            /* NULL: silent */
    void *log_user;
} llmpar_ctx;

/* Sets ctx->error (the first error stays) with ctx->rank and returns status. Local. */
LLMPAR_API llmpar_status llmpar_fail(llmpar_ctx *ctx, llmpar_status status, const char *format, ...) LLMPAR_PRINTF(3, 4);
/* Text of this rank's first error, "" if none. Valid as long as ctx. Local. */
LLMPAR_API const char *llmpar_last_error(const llmpar_ctx *ctx);
/* Sends one line to the log sink, if any. Local. */
LLMPAR_API void llmpar_log(llmpar_ctx *ctx, llmpar_log_level level, const char *format, ...) LLMPAR_PRINTF(3, 4);

#endif
/* ==== src/tables/device.h ==== */
/* device: the table of everything that touches tensor memory. A user may bring another implementation, or replace one slot.

   Lifecycle. Whoever runs the ranks (llmpar_launch) makes one device a rank. Every operation is an enqueue on a stream: it returns when accepted; argument structs
   and the arrays they point to (gemm segments, tree_sum inputs) are copied before it returns, tensor buffers belong to the stream until an event
   recorded behind it completes. A failure sticks to the stream and returns from the next call or wait. The CPU device completes inside the call.
   Operations never allocate: where one needs scratch, a `_workspace` slot tells how many bytes the caller passes.

   Conventions. All tensors are row-major. `ld` = distance of rows in elements. dtype (F32 or F64) is the type of all floating buffers of the call unless said
   otherwise; F64 runs the portable code. N = rows = batch * t tokens. Results never depend on alignment or on what stands beside an element (docs/exact.md).
   Every chain starts from +0, so no partial sum is ever -0. Zero-size calls are fine and do nothing (a gemm with k = 0 stores +0 unless accumulate). */
#ifndef LLMPAR_DEVICE_H
#define LLMPAR_DEVICE_H


#define LLMPAR_DEVICE_ABI 1u

typedef struct llmpar_device llmpar_device;
typedef struct llmpar_stream llmpar_stream;
typedef struct llmpar_event llmpar_event;

/* One piece-part of a product: a and b already point at the part's first element. The parts of one piece are chained in list order. */
typedef struct llmpar_gemm_segment {
    const void *a, *b;
    int64_t lda, ldb;
    int64_t k;        /* extent of the summed dim in this part, >= 0 */
    int32_t piece;    /* 0 <= piece < pieces, non-decreasing along the list */
} llmpar_gemm_segment;

typedef enum llmpar_gemm_kind { LLMPAR_GEMM_DEFAULT = 0, LLMPAR_GEMM_NT = 1, LLMPAR_GEMM_NN = 2, LLMPAR_GEMM_TN = 3 } llmpar_gemm_kind;

/* c[m,n] = tree over pieces of (chain over the piece's segments of sum_k a*b).
   NT: a[m,k] b[n,k] (y = x w^T);  NN: a[m,k] b[k,n] (dx = dy w);  TN: a[k,m] b[k,n] (dw = dy^T x). DEFAULT is an error.
   A piece without segments counts as +0. The tree over `pieces` leaves is the balanced tree of llmpar_tree_split.
   accumulate: the chain starts from c instead of +0; requires pieces == 1. c must not overlap a or b. */
typedef struct llmpar_gemm_args {
    int64_t m, n;
    void *c;
    int64_t ldc;
    const llmpar_gemm_segment *segments;
    int32_t segment_count, pieces;
    llmpar_gemm_kind kind;
    llmpar_dtype dtype;
    int accumulate;
    void *workspace; size_t workspace_bytes;
} llmpar_gemm_args;

/* How the token rows of a call are laid out for sums over tokens. `batch` sequences of `t` rows each; a sequence's rows are positions [t_begin, t_begin + t) of t_total (sequence parallel: a part).
   `leaves` divides batch: leaf i owns sequences [i*batch/leaves, (i+1)*batch/leaves). */
typedef struct llmpar_tokens {
    int64_t batch, t, t_begin, t_total;
    int64_t leaves;
    int32_t canon;   /* pieces of t_total; t_begin and t_begin + t are piece boundaries when the guarantee holds */
} llmpar_tokens;

/* y[N,D] = x * rstd * w, rstd[N] = 1/sqrt(mean(x^2) + eps) (Zhang & Sennrich 2019). If `residual` is not NULL: sum[N,D] = x + residual is stored
   first (sum may equal x or residual) and normalised instead of x. */
typedef struct llmpar_rmsnorm_args {
    int64_t rows, dim;
    const void *x, *residual, *w;
    void *sum, *y, *rstd;
    double eps;
    llmpar_dtype dtype;
} llmpar_rmsnorm_args;

/* dx[N,D] = dresidual (NULL = 0) + gradient through the norm; dx may equal dresidual or dy. dw_leaves[leaves, D]: per leaf the balanced tree over this call's T-pieces
   (boundaries llmpar_piece_begin(i, t_total, canon) inside [t_begin, t_begin+t); a part-piece counts as its own piece) of the token chain (sequences of the leaf in order, positions of the piece in order) of dy * x * rstd.
   NULL dw_leaves: not computed. With t = t_total there are canon pieces; with a part, its subtree. */
typedef struct llmpar_rmsnorm_backward_args {
    llmpar_tokens tokens; /* rows = batch * t */
    int64_t dim;
    const void *dy, *x, *w, *rstd, *dresidual;
    void *dx, *dw_leaves;
    llmpar_dtype dtype;
} llmpar_rmsnorm_backward_args;

/* In place on x[N, heads, E] with row stride ld: half-split rotation (x[i], x[i+E/2]) by the angles of tables cos/sin[positions, E/2] (dtype as x), row r of a
   sequence at position position + (r mod t). Su et al. 2021 (RoFormer), eq. 34 in Hugging Face's half-split order. inverse != 0 rotates back (backward). */
typedef struct llmpar_rope_args {
    int64_t batch, t, heads, head_dim, ld, position;
    void *x;
    const void *cosine, *sine;
    llmpar_dtype dtype;
    int inverse;
} llmpar_rope_args;

/* out[b,i,h,:] = softmax_j(scale * q[b,i,h,:] . k[b,j,h*kv_heads/heads,:]) v over j <= i + (tk - tq), j >= doc_start[b*tk + i + (tk - tq)]. lse[b,h,i] = log sum exp (natural), F32/F64 as dtype.
   Row i of sequence b of q is q + (b*tq + i)*ldq, head h at + h*E; k, v: row (b*tk_stride + j)*ldk. tk_stride >= tk (a KV cache longer than its fill). doc_start NULL: 0.
   Key tiles are taken at absolute positions counted from the document's start, sequentially. lse may be NULL. Dao et al. 2022. */
typedef struct llmpar_attention_args {
    int64_t batch, tq, tk, tk_stride, heads, kv_heads, head_dim;
    const void *q, *k, *v;
    int64_t ldq, ldk, ldv, ldo;
    const int32_t *doc_start;
    void *out, *lse;
    double scale;
    llmpar_dtype dtype;
    void *workspace; size_t workspace_bytes;
} llmpar_attention_args;

/* Gradients; tq == tk == tk_stride. dk, dv[b,j,kv,:] = balanced tree over the heads/kv_heads query heads of the group held in this call (split in half while the count is even, else at
   the largest power of two below) of each query head's own sum. dq, dk, dv have the row strides ldq, ldk, ldv. */
typedef struct llmpar_attention_backward_args {
    llmpar_attention_args forward; /* q, k, v, out, lse as forward left them */
    const void *dout;              /* row stride ldo */
    void *dq, *dk, *dv;
} llmpar_attention_backward_args;

/* h[N,F] = gate * sigmoid(gate) * up (Shazeer 2020), row strides ld_in (gate, up) and ld_out (h). h may equal gate or up when the strides are equal. */
typedef struct llmpar_swiglu_args { int64_t rows, dim, ld_in, ld_out; const void *gate, *up; void *h; llmpar_dtype dtype; } llmpar_swiglu_args;
/* dgate, dup (stride ld_in, may equal gate, up) from dh (stride ld_out). h (stride ld_out; may equal dh) is recomputed unless NULL. */
typedef struct llmpar_swiglu_backward_args { int64_t rows, dim, ld_in, ld_out; const void *gate, *up, *dh; void *dgate, *dup, *h; llmpar_dtype dtype; } llmpar_swiglu_backward_args;

/* out[N,D]: row of table[V_local,D] where v_begin <= id < v_begin + v_local, else all-zero bits. ids outside the whole vocabulary were refused earlier. */
typedef struct llmpar_embedding_args { int64_t rows, dim, v_begin, v_local; const int32_t *ids; const void *table; void *out; llmpar_dtype dtype; } llmpar_embedding_args;
/* dtable[V_local,D], fully overwritten: balanced tree over leaves of the token chain of dout rows with that id. tokens.t == t_total here. */
typedef struct llmpar_embedding_backward_args {
    llmpar_tokens tokens;
    int64_t dim, v_begin, v_local;
    const int32_t *ids; const void *dout; void *dtable;
    llmpar_dtype dtype;
    void *workspace; size_t workspace_bytes;
} llmpar_embedding_backward_args;

/* Vocab-parallel softmax cross-entropy in steps, so that the caller combines over "tp" between them (Shoeybi et al. 2019, section 3).
   logits[N, v_local] with row stride ld; columns are vocabulary ids [v_begin, v_begin + v_local) of v_total; target < 0 = not counted. Pieces: llmpar_piece_begin(i, v_total, canon). */
typedef struct llmpar_xent_args {
    int64_t rows, ld, v_begin, v_local, v_total;
    int32_t canon;
    void *logits;
    const int32_t *targets; /* [N] */
    void *max;              /* [N] row maximum; -inf if v_local = 0 */
    void *target_logit;     /* [N] the target's logit if it is in this shard, else -inf */
    void *sum;              /* [N] balanced tree over this shard's pieces of sum exp(logit - max) */
    llmpar_dtype dtype;
} llmpar_xent_args;
/* xent_max: writes max, target_logit. xent_sum: reads the global max, writes sum. xent_backward: logits <- (exp(logit - max)/sum - [id == target]) * scale in place,
   zero rows where target < 0. */
typedef struct llmpar_xent_backward_args { llmpar_xent_args forward; float scale; } llmpar_xent_backward_args;
/* accumulator[0..71] (int64, base/exact_sum.h) += f64 token losses log(sum) + max - target_logit of rows with target >= 0; token_loss[N] (f64, may be NULL) gets each (0 if not counted). */
typedef struct llmpar_xent_loss_args { int64_t rows; const void *max, *target_logit, *sum; const int32_t *targets; int64_t *accumulator; double *token_loss; llmpar_dtype dtype; } llmpar_xent_loss_args;

/* out[i] = balanced tree over j < n of in[j][i], i < count. out may equal any one in[j]. dtypes F32, F64, I64, U64; n >= 1. */
typedef struct llmpar_tree_sum_args { const void *const *in; int32_t n; size_t count; void *out; llmpar_dtype dtype; } llmpar_tree_sum_args;
/* out[i] = max over j of in[j][i]; F32, F64, I64. NaN wins. */
typedef struct llmpar_tree_sum_args llmpar_max_args;
/* out = a + b; out may equal a or b. */
typedef struct llmpar_add_args { size_t count; const void *a, *b; void *out; llmpar_dtype dtype; } llmpar_add_args;
/* x *= factor */
typedef struct llmpar_scale_args { size_t count; void *x; double factor; llmpar_dtype dtype; } llmpar_scale_args;
typedef struct llmpar_cast_args { size_t count; const void *in; llmpar_dtype in_dtype; void *out; llmpar_dtype out_dtype; } llmpar_cast_args;
/* rows x width elements of `size` bytes each between strided matrices (strides in elements); no overlap. */
typedef struct llmpar_copy_rows_args { int64_t rows, width, ld_in, ld_out; size_t size; const void *in; void *out; } llmpar_copy_rows_args;

/* AdamW with decoupled decay (Loshchilov & Hutter 2019), element-wise, fma order written out in the portable kernel:
   g' = g*grad_scale; m = b1*m + (1-b1)*g'; v = b2*v + (1-b2)*g'^2; p = p*(1 - lr*decay) - lr * (m/c1) / (sqrt(v/c2) + eps). c1 = 1-b1^step, c2 = 1-b2^step. */
typedef struct llmpar_adamw_args { size_t count; void *p; const void *g; void *m, *v; double lr, beta1, beta2, eps, decay, correction1, correction2, grad_scale; llmpar_dtype dtype; } llmpar_adamw_args;
/* accumulator[0..71] += exact squares of x (F32; F64 squares are rounded once). Infinities and NaNs are counted in the accumulator. */
typedef struct llmpar_square_sum_args { size_t count; const void *x; int64_t *accumulator; llmpar_dtype dtype; } llmpar_square_sum_args;

struct llmpar_device {
    uint32_t abi, size;       /* LLMPAR_DEVICE_ABI, sizeof(llmpar_device): a slot beyond `size` is empty */
    const char *name;         /* "cpu avx512": device type and dispatch level; ranks must agree */
    llmpar_error *error;      /* where failures leave their text; the rank's */
    void *state;              /* the implementation's own */
    size_t alignment;         /* every alloc is aligned to it; a power of two >= 64 */

    /* memory; bytes may be 0. free takes NULL. */
    llmpar_status (*alloc)(llmpar_device *device, size_t bytes, void **out);
    void (*free)(llmpar_device *device, void *memory, size_t bytes);
    llmpar_status (*copy)(llmpar_device *device, llmpar_stream *stream, void *out, const void *in, size_t bytes);
    llmpar_status (*zero)(llmpar_device *device, llmpar_stream *stream, void *out, size_t bytes);

    /* streams and events. An event may be recorded again; waiting on one never recorded is no wait. synchronize waits for one stream on the host and
       returns its sticky failure. event_synchronize waits on the host. host_call runs fn(arg) in stream order (the thread and MPI communicators use it). */
    llmpar_status (*stream_create)(llmpar_device *device, const char *name, llmpar_stream **out);
    void (*stream_destroy)(llmpar_device *device, llmpar_stream *stream);
    llmpar_status (*synchronize)(llmpar_device *device, llmpar_stream *stream);
    llmpar_status (*event_create)(llmpar_device *device, llmpar_event **out);
    void (*event_destroy)(llmpar_device *device, llmpar_event *event);
    llmpar_status (*event_record)(llmpar_device *device, llmpar_stream *stream, llmpar_event *event);
    llmpar_status (*event_wait)(llmpar_device *device, llmpar_stream *stream, llmpar_event *event);
    llmpar_status (*event_synchronize)(llmpar_device *device, llmpar_event *event);
    llmpar_status (*host_call)(llmpar_device *device, llmpar_stream *stream, llmpar_status (*fn)(void *arg), const void *arg, size_t arg_bytes); /* arg is copied, arg_bytes <= 256 */

    /* operations */
    llmpar_status (*gemm)(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args);
    size_t (*gemm_workspace)(llmpar_device *device, const llmpar_gemm_args *args); /* pointers may be NULL in queries; reads m, n, kind, dtype, pieces and the segments' k */
    llmpar_status (*rmsnorm)(llmpar_device *device, llmpar_stream *stream, const llmpar_rmsnorm_args *args);
    llmpar_status (*rmsnorm_backward)(llmpar_device *device, llmpar_stream *stream, const llmpar_rmsnorm_backward_args *args);
    llmpar_status (*rope)(llmpar_device *device, llmpar_stream *stream, const llmpar_rope_args *args);
    llmpar_status (*attention)(llmpar_device *device, llmpar_stream *stream, const llmpar_attention_args *args);
    size_t (*attention_workspace)(llmpar_device *device, const llmpar_attention_args *args);
    llmpar_status (*attention_backward)(llmpar_device *device, llmpar_stream *stream, const llmpar_attention_backward_args *args);
    size_t (*attention_backward_workspace)(llmpar_device *device, const llmpar_attention_backward_args *args);
    llmpar_status (*swiglu)(llmpar_device *device, llmpar_stream *stream, const llmpar_swiglu_args *args);
    llmpar_status (*swiglu_backward)(llmpar_device *device, llmpar_stream *stream, const llmpar_swiglu_backward_args *args);
    llmpar_status (*embedding)(llmpar_device *device, llmpar_stream *stream, const llmpar_embedding_args *args);
    llmpar_status (*embedding_backward)(llmpar_device *device, llmpar_stream *stream, const llmpar_embedding_backward_args *args);
    size_t (*embedding_backward_workspace)(llmpar_device *device, const llmpar_embedding_backward_args *args);
    llmpar_status (*xent_max)(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_args *args);
    llmpar_status (*xent_sum)(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_args *args);
    llmpar_status (*xent_loss)(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_loss_args *args);
    llmpar_status (*xent_backward)(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_backward_args *args);
    llmpar_status (*tree_sum)(llmpar_device *device, llmpar_stream *stream, const llmpar_tree_sum_args *args);
    llmpar_status (*max)(llmpar_device *device, llmpar_stream *stream, const llmpar_max_args *args);
    llmpar_status (*add)(llmpar_device *device, llmpar_stream *stream, const llmpar_add_args *args);
    llmpar_status (*scale)(llmpar_device *device, llmpar_stream *stream, const llmpar_scale_args *args);
    llmpar_status (*cast)(llmpar_device *device, llmpar_stream *stream, const llmpar_cast_args *args);
    llmpar_status (*copy_rows)(llmpar_device *device, llmpar_stream *stream, const llmpar_copy_rows_args *args);
    llmpar_status (*adamw)(llmpar_device *device, llmpar_stream *stream, const llmpar_adamw_args *args);
    llmpar_status (*square_sum)(llmpar_device *device, llmpar_stream *stream, const llmpar_square_sum_args *args);
};

#endif
/* ==== src/tables/comm.h ==== */
/* comm: the communicator table: collectives between the ranks of one mesh axis. A user may bring another implementation, or replace one slot.

   Every collective is an enqueue on a stream of the communicator's device: it returns when accepted; buffers belong to the stream until an event behind it completes; all ranks of the communicator make the
   same calls in the same order. Reductions combine the ranks' contributions in the balanced binary tree over the rank index (llmpar_tree_split), lower index on the left, in the dtype given: the
   same bits on every implementation. When a rank fails, every other rank's pending and next collective returns LLMPAR_ERR_PEER; nothing hangs. */
#ifndef LLMPAR_COMM_H
#define LLMPAR_COMM_H


#define LLMPAR_COMM_ABI 1u

typedef struct llmpar_comm llmpar_comm;

typedef enum llmpar_reduce_op { LLMPAR_SUM = 0, LLMPAR_MAX = 1 } llmpar_reduce_op; /* SUM: F32 F64 I64 U64; MAX: F32 F64 I64 */

/* One call. `count` elements per rank and block; `blocks` (0 means 1) repeats the collective over consecutive blocks of the buffers:
     all_gather      send[blocks][count]           recv[blocks][ranks][count]
     reduce_scatter  send[blocks][ranks][count]    recv[blocks][count]
     all_reduce      send[blocks][count]           recv[blocks][count]
     broadcast       send on root, recv elsewhere: [blocks][count]   (root's recv may be NULL or send)
     all_to_all      send[blocks][ranks][count]    recv[blocks][ranks][count]
     send / recv     [blocks][count] to / from rank `peer`
   In place: all_gather with send == recv + rank*count (blocks 1); reduce_scatter with recv == send + rank*count (blocks 1); all_reduce with recv == send. Other overlaps are errors of the caller. */
typedef struct llmpar_collective {
    const void *send;
    void *recv;
    size_t count, blocks;
    llmpar_dtype dtype;
    llmpar_reduce_op op;
    int32_t root, peer;
    const char *tag;      /* "layers.7.wo/reduce_scatter"; borrowed until the call returns, kept as a copy for messages; NULL = "" */
} llmpar_collective;

struct llmpar_comm {
    uint32_t abi, size;      /* LLMPAR_COMM_ABI, sizeof(llmpar_comm) */
    int32_t rank, ranks;     /* this rank's index in the communicator and their number */
    const char *axis;        /* "tp", "dp", "world": for messages; owned by the communicator */
    llmpar_device *device;   /* does the arithmetic; the creating rank's */
    llmpar_error *error;     /* where failures leave their text; the rank's */
    void *state;
    uint64_t sequence;       /* collectives accepted so far */
    uint64_t bytes_sent;     /* by the formula of the algorithm: all_gather (n-1)*count, reduce_scatter (n-1)*count, all_reduce 2(n-1)/n*count ... elements of this rank, in bytes */

    /* Ranks with the same color (>= 0) form a new communicator, ordered by (key, rank); color < 0: *out = NULL. name is copied. Collective. */
    llmpar_status (*split)(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out);
    void (*destroy)(llmpar_comm *comm); /* local; NULL is refused by the wrapper */
    llmpar_status (*barrier)(llmpar_comm *comm, llmpar_stream *stream, const char *tag);
    llmpar_status (*all_gather)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
    llmpar_status (*reduce_scatter)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
    llmpar_status (*all_reduce)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
    llmpar_status (*broadcast)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
    llmpar_status (*all_to_all)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
    llmpar_status (*send)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
    llmpar_status (*recv)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
    /* Local, from any rank: every rank's pending and next collective on any communicator of the job returns LLMPAR_ERR_PEER with this error's rank and text. */
    void (*abort)(llmpar_comm *comm, const llmpar_error *error);
};

/* Wrappers with checks common to all implementations (abi, sizes, dtype and op allowed, root and peer in range, NULL buffers with a count). With ranks == 1 they copy
   send to recv on the stream where these differ and call no slot. They keep `sequence` and `bytes_sent`. Collective. */
LLMPAR_API llmpar_status llmpar_comm_barrier(llmpar_comm *comm, llmpar_stream *stream, const char *tag);
LLMPAR_API llmpar_status llmpar_all_gather(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
LLMPAR_API llmpar_status llmpar_reduce_scatter(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
LLMPAR_API llmpar_status llmpar_all_reduce(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
LLMPAR_API llmpar_status llmpar_broadcast(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
LLMPAR_API llmpar_status llmpar_all_to_all(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
LLMPAR_API llmpar_status llmpar_send(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
LLMPAR_API llmpar_status llmpar_recv(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);
LLMPAR_API llmpar_status llmpar_comm_split(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out);
LLMPAR_API void llmpar_comm_destroy(llmpar_comm *comm); /* NULL is fine; local */

#endif
/* ==== src/tables/arena.h ==== */
/* arena: the one place device memory comes from. Every allocation carries a tag; live and peak bytes are kept per tag, so that a plan can be
   compared with reality to the byte. Requests are rounded to the device's alignment; freed blocks are kept for requests of the same size. */
#ifndef LLMPAR_ARENA_H
#define LLMPAR_ARENA_H


typedef enum llmpar_tag {
    LLMPAR_TAG_PARAMETERS = 0, /* shards */
    LLMPAR_TAG_GATHERED,       /* whole units */
    LLMPAR_TAG_GRADIENTS,
    LLMPAR_TAG_OPTIMIZER,
    LLMPAR_TAG_ACTIVATIONS,
    LLMPAR_TAG_COMMUNICATION,
    LLMPAR_TAG_WORKSPACE,
    LLMPAR_TAG_COUNT
} llmpar_tag;

LLMPAR_API const char *llmpar_tag_name(llmpar_tag tag); /* "parameters", ... */

typedef struct llmpar_arena_usage { uint64_t live[LLMPAR_TAG_COUNT], peak[LLMPAR_TAG_COUNT], live_total, peak_total, reserved; } llmpar_arena_usage;

typedef struct llmpar_arena llmpar_arena;

/* limit in bytes of live allocations, 0 = none. Borrows ctx and its device. Local. */
LLMPAR_API llmpar_status llmpar_arena_create(llmpar_ctx *ctx, uint64_t limit, llmpar_arena **out);
/* NULL is fine. Blocks still live are freed too. */
LLMPAR_API void llmpar_arena_destroy(llmpar_arena *arena);
/* Aligned, uninitialised. label names the buffer in messages ("layers.3 saved"); it is borrowed and must outlive the block. LLMPAR_ERR_MEMORY names tag, label, request, limit and the
   live bytes of every tag. 0 bytes give a valid pointer. Local. */
LLMPAR_API llmpar_status llmpar_arena_alloc(llmpar_arena *arena, llmpar_tag tag, size_t bytes, const char *label, void **out);
/* NULL is fine. Host order: the caller has made sure (by stream order or events) that nothing still uses the block. */
LLMPAR_API void llmpar_arena_free(llmpar_arena *arena, void *memory);
LLMPAR_API void llmpar_arena_get_usage(const llmpar_arena *arena, llmpar_arena_usage *out);
/* Peaks start again from the live bytes. */
LLMPAR_API void llmpar_arena_reset_peaks(llmpar_arena *arena);

#endif

/* Chapter: cpu */
/* ==== src/cpu/cpu.h ==== */
/* cpu: the CPU device. Portable kernels are the readable specification (also in f64); faster levels are chosen at run time. */
#ifndef LLMPAR_CPU_H
#define LLMPAR_CPU_H


typedef enum llmpar_cpu_level { LLMPAR_CPU_DEFAULT = 0, LLMPAR_CPU_PORTABLE = 1, LLMPAR_CPU_AVX2 = 2, LLMPAR_CPU_AVX512 = 3 } llmpar_cpu_level;

/* Best level of this processor. Local, thread-safe. */
LLMPAR_API llmpar_cpu_level llmpar_cpu_best_level(void);
/* "portable", "avx2", "avx512"; "?" otherwise. */
LLMPAR_API const char *llmpar_cpu_level_name(llmpar_cpu_level level);
/* Parses a name as LLMPAR_CPU has it; 0 if unknown. */
LLMPAR_API int llmpar_cpu_level_parse(const char *text, llmpar_cpu_level *out);

typedef struct llmpar_cpu_desc {
    int32_t threads;          /* workers of this rank, the caller's thread included; default 1; results do not depend on it */
    llmpar_cpu_level level;   /* default: best */
} llmpar_cpu_desc;

/* heap and error are borrowed and belong to the rank. LLMPAR_ERR_UNSUPPORTED if the processor lacks the level. Worker threads are named as the caller's thread with "w1" .. appended.
   Sets flush-to-zero state off on the workers. Local. */
LLMPAR_API llmpar_status llmpar_cpu_create(llmpar_heap *heap, llmpar_error *error, const llmpar_cpu_desc *desc, llmpar_device **out);
LLMPAR_API void llmpar_cpu_destroy(llmpar_device *device); /* NULL is fine; joins workers */

#endif

/* Chapter: comm */
/* ==== src/comm/threads.h ==== */
/* threads: the communicator between rank threads of one process: collectives straight through shared memory in tree order. */
#ifndef LLMPAR_COMM_THREADS_H
#define LLMPAR_COMM_THREADS_H


/* What the rank threads of a job share: barriers, published pointers, the first failure. */
typedef struct llmpar_threads_world llmpar_threads_world;

typedef struct llmpar_threads_desc {
    int32_t ranks;
    int32_t lockstep;      /* 1: one rank runs at a time, switching only at collectives */
    double deadline;       /* seconds a collective may wait for its peers before it reports LLMPAR_ERR_TIMEOUT with who is where; default 0 = none. Not in lockstep, where a debugger may stop the clock */
} llmpar_threads_desc;

/* heap: of the launching thread, used only in create and destroy (and for splits under a lock). Local. */
LLMPAR_API llmpar_status llmpar_threads_world_create(llmpar_heap *heap, const llmpar_threads_desc *desc, llmpar_threads_world **out, llmpar_error *error);
LLMPAR_API void llmpar_threads_world_destroy(llmpar_threads_world *world); /* NULL is fine; after all rank threads ended */
/* The first failure of any rank (root cause, never LLMPAR_ERR_PEER), status OK if none. */
LLMPAR_API void llmpar_threads_world_error(llmpar_threads_world *world, llmpar_error *out);
/* The world communicator of one rank; called once by each rank thread. The rank's memory comes from its own heap; device and error are the rank's. Local. */
LLMPAR_API llmpar_status llmpar_threads_comm_create(llmpar_threads_world *world, int32_t rank, llmpar_heap *heap, llmpar_device *device, llmpar_error *error, llmpar_comm **out);
/* Makes *error the job's failure, if it is the first, and wakes every rank: what comm->abort does, for a rank that has no communicator yet. error->status is not OK. Local. */
LLMPAR_API void llmpar_threads_world_fail(llmpar_threads_world *world, const llmpar_error *error);
/* Rank `rank` is done (returned from its function): a peer that still waits for it in a collective gets an error naming it instead of hanging. Local. */
LLMPAR_API void llmpar_threads_rank_finished(llmpar_threads_world *world, int32_t rank);

#endif

/* Chapter: mesh */
/* ==== src/mesh/mesh.h ==== */
/* mesh: ranks on named axes, tp innermost, and a communicator for every axis and for the flattened data axes. */
#ifndef LLMPAR_MESH_H
#define LLMPAR_MESH_H


#define LLMPAR_MESH_AXES 5
typedef enum llmpar_axis { LLMPAR_AXIS_DP_REPLICATE = 0, LLMPAR_AXIS_DP_SHARD = 1, LLMPAR_AXIS_CP = 2, LLMPAR_AXIS_PP = 3, LLMPAR_AXIS_TP = 4 } llmpar_axis;

/* Degrees, torchtitan's names; 0 means 1. Their product must be the world size. cp and pp above 1 are refused by name. */
typedef struct llmpar_mesh_desc { int32_t dp_replicate, dp_shard, cp, pp, tp; } llmpar_mesh_desc;

typedef struct llmpar_mesh {
    llmpar_ctx *ctx;                          /* borrowed */
    int32_t degree[LLMPAR_MESH_AXES];         /* by llmpar_axis */
    int32_t coordinate[LLMPAR_MESH_AXES];     /* this rank's */
    llmpar_comm *comm[LLMPAR_MESH_AXES];      /* owned; one rank for axes of degree 1 */
    llmpar_comm *dp;                          /* owned; dp_replicate x dp_shard flattened, dp_shard fastest */
    llmpar_comm *world;                       /* ctx->comm, borrowed */
    int32_t dp_rank, dp_ranks;                /* flattened data coordinate */
    char where[48];                           /* "dp_shard=1 tp=0": axes with degree > 1, "" on one rank */
} llmpar_mesh;

LLMPAR_API const char *llmpar_axis_name(llmpar_axis axis); /* "dp_replicate", "dp_shard", "cp", "pp", "tp" */
/* Sets zero degrees to 1 and checks: LLMPAR_ERR_MESH with the degrees, their product and world if these differ; LLMPAR_ERR_UNSUPPORTED for cp, pp. Local. */
LLMPAR_API llmpar_status llmpar_mesh_desc_resolve(llmpar_mesh_desc *desc, int32_t world, llmpar_error *error);
/* Collective over the world. Also fills ctx->error.where for later errors of this rank. */
LLMPAR_API llmpar_status llmpar_mesh_create(llmpar_ctx *ctx, const llmpar_mesh_desc *desc, llmpar_mesh **out);
LLMPAR_API void llmpar_mesh_destroy(llmpar_mesh *mesh); /* NULL is fine; local */
/* World rank of a coordinate. Local. */
LLMPAR_API int32_t llmpar_mesh_rank_at(const llmpar_mesh *mesh, const int32_t coordinate[LLMPAR_MESH_AXES]);
/* Writes a picture of the mesh (rows: data coordinates, columns: tp) into text, cut at capacity; returns bytes needed without the NUL. Local. */
LLMPAR_API size_t llmpar_mesh_print(const llmpar_mesh *mesh, char *text, size_t capacity);

#endif
/* ==== src/mesh/dtensor.h ==== */
/* dtensor: which part of a global tensor a rank holds. Local arithmetic only: no communication, no allocation. */
#ifndef LLMPAR_DTENSOR_H
#define LLMPAR_DTENSOR_H


#define LLMPAR_MAX_DIMS 4

typedef enum llmpar_placement_kind { LLMPAR_REPLICATE = 0, LLMPAR_SHARD = 1, LLMPAR_PARTIAL_SUM = 2, LLMPAR_PARTIAL_MAX = 3, LLMPAR_FLAT = 4 } llmpar_placement_kind;

/* How one mesh axis treats a tensor.
   SHARD: dim `dim` is cut in grains of `grain` elements (0 = 1; a head for q, k, v) by llmpar_piece_begin over parts = degree / replicas; rank r holds part r / replicas (replicas 0 = 1; above 1 for
   kv heads where tp > kv heads).
   FLAT: the row-major local tensor left by the earlier cuts is a slice [offset, offset + elements) of a unit's flat buffer of `unit_elements`, cut evenly over the axis. */
typedef struct llmpar_placement {
    llmpar_placement_kind kind;
    llmpar_axis axis;
    int32_t dim, replicas;
    int64_t grain;
    int64_t offset, unit_elements;
} llmpar_placement;

/* Placements in the order of cutting: tp first, then Flat over dp_shard. Axes not named replicate. Plain data; name is borrowed. */
typedef struct llmpar_dtensor {
    const char *name;
    llmpar_dtype dtype;
    int32_t dims, placements;
    int64_t shape[LLMPAR_MAX_DIMS];          /* global */
    llmpar_placement placement[LLMPAR_MESH_AXES];
} llmpar_dtensor;

/* The rectangular part (all SHARD placements applied) a coordinate holds, and within its row-major elements the FLAT range. Extents may be 0. */
typedef struct llmpar_local {
    int64_t shape[LLMPAR_MAX_DIMS], offset[LLMPAR_MAX_DIMS]; /* rectangle in the global tensor */
    int64_t elements;                                        /* of the rectangle */
    int64_t flat_begin, flat_count;                          /* part of the rectangle's elements held after FLAT (all of it without FLAT) */
    int64_t shard_begin;                                     /* where that part begins in the rank's flat shard (0 without FLAT) */
    int is_owner;                                            /* coordinate 0 of every axis that replicates (parts): counts once in norms and files */
} llmpar_local;

/* Checks shape, dims, axes named twice, grain dividing the dim, replicas dividing the degree, flat bounds. LLMPAR_ERR_SHAPE. Local. */
LLMPAR_API llmpar_status llmpar_dtensor_check(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], llmpar_error *error);
/* What `coordinate` holds of a checked tensor. Local. */
LLMPAR_API void llmpar_dtensor_local(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], const int32_t coordinate[LLMPAR_MESH_AXES], llmpar_local *out);
/* "[Shard(0) on tp, Flat(128) on dp_shard]" into text; returns bytes needed. Local. */
LLMPAR_API size_t llmpar_dtensor_placements(const llmpar_dtensor *tensor, char *text, size_t capacity);
/* Picture: a line per rank with its rectangle, flat range and bytes, and for 1-D/2-D a small map. Returns bytes needed. Local. */
LLMPAR_API size_t llmpar_dtensor_print(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, char *text, size_t capacity);

#endif
/* ==== src/mesh/redistribute.h ==== */
/* redistribute: data of a dtensor from one placement to another. Today: to the whole tensor on every rank of the mesh's
   dp_shard x tp plane (what saving and looking need), and from a whole tensor to the local part. */
#ifndef LLMPAR_REDISTRIBUTE_H
#define LLMPAR_REDISTRIBUTE_H


/* Elements of scratch that llmpar_dtensor_full needs beside `full` (same dtype as the tensor). Local. */
LLMPAR_API int64_t llmpar_dtensor_full_scratch(const llmpar_dtensor *tensor, const llmpar_mesh *mesh);
/* full[shape] <- the tensor, from every rank's part `local` (with FLAT: the rank's whole flat shard of the unit; else its rectangle). Uneven and empty parts are fine. Collective over dp_shard and tp. */
LLMPAR_API llmpar_status llmpar_dtensor_full(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, llmpar_stream *stream, const void *local, void *scratch, void *full);
/* local <- this rank's part of full (host or CPU memory): FLAT writes only its range inside the flat shard. Local. */
LLMPAR_API void llmpar_dtensor_cut(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, const void *full, void *local);

#endif

/* Chapter: io */
/* ==== src/io/file.h ==== */
/* file: the file primitives: mapped reads, atomic writes, directories. Errors name path, operation and errno text. */
#ifndef LLMPAR_FILE_H
#define LLMPAR_FILE_H


/* A whole file mapped read-only. Plain data, closed by llmpar_file_unmap (zeroed struct is fine). */
typedef struct llmpar_mapped { const unsigned char *data; size_t bytes; void *base; } llmpar_mapped;
/* LLMPAR_ERR_IO: missing, a directory, not readable. An empty file gives data != NULL, bytes 0. Local. */
LLMPAR_API llmpar_status llmpar_file_map(const char *path, llmpar_mapped *out, llmpar_error *error);
LLMPAR_API void llmpar_file_unmap(llmpar_mapped *file);

/* Buffered writer to `path`.tmp, synced and renamed by commit; nothing under the final name before that. */
typedef struct llmpar_writer llmpar_writer;
LLMPAR_API llmpar_status llmpar_writer_open(llmpar_heap *heap, const char *path, llmpar_writer **out, llmpar_error *error);
LLMPAR_API llmpar_status llmpar_writer_write(llmpar_writer *writer, const void *data, size_t bytes, llmpar_error *error);
/* fsync, close, rename. Destroys the writer in any case; on failure the .tmp file is removed. */
LLMPAR_API llmpar_status llmpar_writer_commit(llmpar_writer *writer, llmpar_error *error);
/* Closes and removes the .tmp file. NULL is fine. */
LLMPAR_API void llmpar_writer_abandon(llmpar_writer *writer);

/* Creates a directory (parents must exist) unless it is there; checks that it can be written. */
LLMPAR_API llmpar_status llmpar_directory_ensure(const char *path, llmpar_error *error);
LLMPAR_API int llmpar_is_directory(const char *path);
LLMPAR_API int llmpar_is_file(const char *path);

#endif
/* ==== src/io/safetensors.h ==== */
/* safetensors: reader (validated as the format's reference does, and stricter) and writer.
   Format: u64 little-endian header length, JSON header {name: {dtype, shape, data_offsets}}, data. */
#ifndef LLMPAR_SAFETENSORS_H
#define LLMPAR_SAFETENSORS_H


typedef struct llmpar_safetensor {
    const char *name;
    llmpar_dtype dtype;
    int32_t dims;               /* <= 8 */
    int64_t shape[8];
    size_t begin, bytes;        /* absolute position in the file */
} llmpar_safetensor;

typedef struct llmpar_safetensors {
    int32_t count;
    const llmpar_safetensor *tensor; /* sorted by name */
    const unsigned char *data;       /* the mapped file */
    const char *path;
    void *state;
} llmpar_safetensors;

/* Maps and validates: header length <= 100,000,000 and inside the file, JSON with unique keys, known dtypes, shape product equal to the byte range, ranges that follow one another without
   gap or overlap to the end of the file. LLMPAR_ERR_FORMAT names path, tensor and byte position. Owned by the caller. Local. */
LLMPAR_API llmpar_status llmpar_safetensors_open(llmpar_heap *heap, const char *path, llmpar_safetensors **out, llmpar_error *error);
/* The same from memory (for fuzzing); data is borrowed. name for messages. */
LLMPAR_API llmpar_status llmpar_safetensors_open_memory(llmpar_heap *heap, const void *data, size_t bytes, const char *name, llmpar_safetensors **out, llmpar_error *error);
LLMPAR_API void llmpar_safetensors_close(llmpar_safetensors *file); /* NULL is fine */
LLMPAR_API const llmpar_safetensor *llmpar_safetensors_find(const llmpar_safetensors *file, const char *name); /* NULL if absent */

/* Streaming writer: declare all tensors first (their order is the file's), then write their bytes in that order in any portions. A header written by it is padded with spaces to 8 bytes and
   carries __metadata__ {"format": "pt"}. commit checks that every byte came. */
typedef struct llmpar_safetensors_writer llmpar_safetensors_writer;
LLMPAR_API llmpar_status llmpar_safetensors_writer_open(llmpar_heap *heap, const char *path, const llmpar_safetensor *tensors, int32_t count, llmpar_safetensors_writer **out, llmpar_error *error); /* reads name, dtype, dims, shape */
LLMPAR_API llmpar_status llmpar_safetensors_writer_write(llmpar_safetensors_writer *writer, const void *data, size_t bytes, llmpar_error *error);
LLMPAR_API llmpar_status llmpar_safetensors_writer_commit(llmpar_safetensors_writer *writer, llmpar_error *error); /* destroys it */
LLMPAR_API void llmpar_safetensors_writer_abandon(llmpar_safetensors_writer *writer); /* NULL is fine */

#endif

/* Chapter: run */
/* ==== src/run/launch.h ==== */
/* launch: makes the ranks (threads of this process), gives each its ctx, and collects the root error. */
#ifndef LLMPAR_LAUNCH_H
#define LLMPAR_LAUNCH_H


typedef struct llmpar_launch_desc {
    int32_t ranks;                /* 0 = 1 (the MPI world once MPI is there). One rank runs on the caller's thread */
    int32_t threads;              /* workers inside a rank; default 1 */
    int32_t lockstep;             /* 1: one rank at a time, switching only at collectives (gdb) */
    const char *cpu;              /* "portable", "avx2", "avx512"; default: environment LLMPAR_CPU, else the best */
    double deadline;              /* seconds a collective waits for its peers; default 0 = for ever */
    const llmpar_allocator *allocator; /* default malloc/free; its hooks are called from all rank threads */
    llmpar_log_fn log;            /* default: errors and warnings to stderr */
    void *log_user;
    void (*check)(const llmpar_ctx *ctx, void *user); /* test hook: after a rank's clean-up, with its final heap; default none */
} llmpar_launch_desc;

typedef llmpar_status (*llmpar_rank_fn)(llmpar_ctx *ctx, void *user);

/* Runs fn on every rank and returns when all have ended: LLMPAR_OK, or the root error's status with *error filled (rank, coordinate, text; never LLMPAR_ERR_PEER). error may be NULL.
   A rank that returns an error wakes all others. Rank threads are named "r3" (the mesh adds the tp coordinate). The lowest common dispatch level is used on all ranks; a self-test hash
   that differs between ranks is LLMPAR_ERR_MISMATCH. */
LLMPAR_API llmpar_status llmpar_launch(const llmpar_launch_desc *desc, llmpar_rank_fn fn, void *user, llmpar_error *error);

#endif

LLMPAR_EXTERN_C_END

#endif /* LLMPAR_H */

/* ==== implementation ==== */

#if defined(LLMPAR_IMPLEMENTATION) && !defined(LLMPAR__IMPLEMENTED) && !defined(LLMPAR__SEPARATE)
#define LLMPAR__IMPLEMENTED

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__)
#error "llmpar: compile the file with LLMPAR_IMPLEMENTATION without -ffast-math, -Ofast and their parts (-O3 is fine): equal bits on every mesh need the order of sums that the source has"
#endif

/* a*b+c must not become a fused multiply-add behind the source's back: bits would depend on the instruction set. */
#if defined(__clang__) && defined(__x86_64__)
#pragma float_control(push)
#pragma clang fp contract(off)
#elif defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC push_options
#pragma GCC optimize ("fp-contract=off")
#endif

/* Warnings that the modules' own builds leave off, or that only look at the style of a foreign file. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsign-conversion"
#ifdef __cplusplus
#pragma GCC diagnostic ignored "-Wold-style-cast"
#endif

/* ==== src/base/status.c ==== */

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

LLMPAR_DEF const char *llmpar_status_string(llmpar_status status)
{
    switch ((int)status) {
#define LLMPAR__STATUS_CASE(name, value, text) case value: return text;
    LLMPAR_STATUS_LIST(LLMPAR__STATUS_CASE)
#undef LLMPAR__STATUS_CASE
    default: return "unknown status";
    }
}

LLMPAR_DEF llmpar_status llmpar_error_set(llmpar_error *error, llmpar_status status, const char *format, ...)
{
    /* Formatted aside first: an argument may point into *error. */
    char text[sizeof ((llmpar_error *)0)->text], where[sizeof ((llmpar_error *)0)->where];
    va_list arguments;
    int length;
    size_t i;
    if (!error || status == LLMPAR_OK || error->status != LLMPAR_OK) return status;
    va_start(arguments, format);
    length = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (length < 0) text[0] = 0;
    if (length >= (int)sizeof text) {
        size_t end = sizeof text - 4;
        while (end > 0 && ((unsigned char)text[end] & 0xC0) == 0x80) end--; /* never half of a UTF-8 character */
        memcpy(text + end, "...", 4);
    }
    for (i = 0; text[i]; i++)
        if ((unsigned char)text[i] < 0x20) text[i] = ' '; /* one line, whatever a file name holds */
    while (i > 0 && text[i - 1] == ' ') text[--i] = 0;
    /* `where` was filled in beforehand by whoever knows the rank's place; it belongs to every error of that rank. */
    memcpy(where, error->where, sizeof where);
    llmpar_error_clear(error);
    memcpy(error->where, where, sizeof where);
    error->status = status;
    memcpy(error->text, text, i + 1);
    return status;
}

LLMPAR_DEF void llmpar_error_clear(llmpar_error *error)
{
    if (!error) return;
    memset(error, 0, sizeof *error);
    error->rank = -1;
}
/* ==== src/base/heap.c ==== */

#include <stdlib.h>
#include <string.h>

/* What lies just below every pointer that was handed out:

     raw              memory - sizeof(header)     memory (multiple of 64)
      |... up to 63 ...| header                  | bytes ...              */
typedef struct llmpar__heap_header {
    void *raw;       /* as the hook gave it */
    size_t total;    /* as asked of the hook */
    size_t bytes;    /* as asked by the caller */
} llmpar__heap_header;

#define LLMPAR__HEAP_ALIGN 64

static void *llmpar__heap_malloc(void *user, size_t bytes)
{
    (void)user;
    return malloc(bytes);
}

static void llmpar__heap_release(void *user, void *memory, size_t bytes)
{
    (void)user;
    (void)bytes;
    free(memory);
}

LLMPAR_DEF void llmpar_heap_init(llmpar_heap *heap, const llmpar_allocator *allocator)
{
    memset(heap, 0, sizeof *heap);
    if (allocator && allocator->alloc) {
        heap->allocator = *allocator; /* without a free hook nothing is given back: the user's region goes at once */
    } else {
        heap->allocator.alloc = llmpar__heap_malloc;
        heap->allocator.free = llmpar__heap_release;
    }
}

LLMPAR_DEF void *llmpar_heap_alloc(llmpar_heap *heap, size_t count, size_t size)
{
    llmpar__heap_header header;
    char *memory;
    if (!llmpar_size_mul(count, size, &header.bytes)) return NULL;
    if (!llmpar_size_add(header.bytes, sizeof header + LLMPAR__HEAP_ALIGN - 1, &header.total)) return NULL;
    if (heap->fail_at && heap->calls + 1 >= heap->fail_at) return NULL;
    header.raw = heap->allocator.alloc(heap->allocator.user, header.total);
    if (!header.raw) return NULL;
    memory = (char *)header.raw + sizeof header;
    memory += (LLMPAR__HEAP_ALIGN - (size_t)((uintptr_t)memory % LLMPAR__HEAP_ALIGN)) % LLMPAR__HEAP_ALIGN;
    memcpy(memory - sizeof header, &header, sizeof header);
    heap->calls++;
    heap->live += header.bytes;
    if (heap->live > heap->peak) heap->peak = heap->live;
    return memory;
}

LLMPAR_DEF void *llmpar_heap_zalloc(llmpar_heap *heap, size_t count, size_t size)
{
    void *memory = llmpar_heap_alloc(heap, count, size);
    if (memory) memset(memory, 0, count * size);
    return memory;
}

LLMPAR_DEF char *llmpar_heap_strdup(llmpar_heap *heap, const char *text)
{
    size_t bytes = strlen(text) + 1;
    char *copy = (char *)llmpar_heap_alloc(heap, bytes, 1);
    if (copy) memcpy(copy, text, bytes);
    return copy;
}

LLMPAR_DEF void llmpar_heap_free(llmpar_heap *heap, void *memory)
{
    llmpar__heap_header header;
    if (!memory) return;
    memcpy(&header, (char *)memory - sizeof header, sizeof header);
    heap->live -= header.bytes;
    if (heap->allocator.free) heap->allocator.free(heap->allocator.user, header.raw, header.total);
}

#undef LLMPAR__HEAP_ALIGN
/* ==== src/base/size.c ==== */

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
/* ==== src/base/dtype.c ==== */

#include <string.h>

/* All conversions work on bit patterns or on normal numbers only, so their results do not depend on the thread's
   flush-to-zero state (but for f64 -> f32, a plain cast). They select instead of branching: the loops of llmpar_convert vectorise. */

LLMPAR_DEF size_t llmpar_dtype_size(llmpar_dtype dtype)
{
    switch ((int)dtype) {
    case LLMPAR_F32: case LLMPAR_I32: return 4;
    case LLMPAR_F64: case LLMPAR_I64: case LLMPAR_U64: return 8;
    case LLMPAR_BF16: case LLMPAR_F16: return 2;
    case LLMPAR_U8: return 1;
    default: return 0;
    }
}

LLMPAR_DEF const char *llmpar_dtype_name(llmpar_dtype dtype)
{
    switch ((int)dtype) {
    case LLMPAR_DTYPE_DEFAULT: return "default";
    case LLMPAR_F32: return "f32";
    case LLMPAR_F64: return "f64";
    case LLMPAR_BF16: return "bf16";
    case LLMPAR_F16: return "f16";
    case LLMPAR_I32: return "i32";
    case LLMPAR_I64: return "i64";
    case LLMPAR_U64: return "u64";
    case LLMPAR_U8: return "u8";
    default: return "?";
    }
}

static inline uint32_t llmpar__dtype_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float llmpar__dtype_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The inline bodies work on f32 bits: the 32-bit step of f64 -> 16 bit never exists as a float, whose subnormals could be flushed. */
static inline uint16_t llmpar__dtype_to_bf16(uint32_t bits)
{
    uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    uint32_t nan = (bits >> 16) | 0x40u;
    return (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded);
}

static inline uint32_t llmpar__dtype_from_bf16(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? bits | 0x00400000u : bits;
}

static inline uint16_t llmpar__dtype_to_f16(uint32_t bits)
{
    uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    /* 2^-14 and up: move the exponent bias from 127 to 15, round off 13 bits; a carry may give infinity (0x7C00) */
    uint32_t normal = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
    /* below: adding 0.5 puts the last bit of the f16 subnormal at the last bit of the sum, so the addition rounds */
    uint32_t subnormal = llmpar__dtype_bits(llmpar__dtype_float(magnitude) + 0.5f) - 0x3F000000u;
    uint32_t nan = 0x7E00u | ((magnitude >> 13) & 0x3FFu);
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x47800000u ? 0x7C00u : half; /* 65536 and up; [65520, 65536) became infinity by the carry */
    half = magnitude > 0x7F800000u ? nan : half;
    return (uint16_t)(sign | half);
}

static inline uint32_t llmpar__dtype_from_f16(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, magnitude = half & 0x7FFFu;
    uint32_t normal = (magnitude << 13) + 0x38000000u;
    /* the 10 bits as the fraction of a number in [2^-14, 2^-13), less 2^-14: exact, and never an f32 subnormal */
    uint32_t subnormal = llmpar__dtype_bits(llmpar__dtype_float(0x38800000u + (magnitude << 13)) - 6.103515625e-05f);
    uint32_t special = 0x7F800000u | (magnitude << 13) | (magnitude > 0x7C00u ? 0x00400000u : 0u);
    uint32_t bits = magnitude < 0x0400u ? subnormal : normal;
    bits = magnitude >= 0x7C00u ? special : bits;
    return sign | bits;
}

/* f64 -> f32 bits rounded to odd: of the two neighbours the one whose last bit is 1, unless exact. Rounding that once
   more to at most 22 bits gives what one rounding from f64 gives (Boldo and Melquiond 2008). NaN keeps its leading payload. */
static inline uint32_t llmpar__dtype_f64_to_odd(double value)
{
    uint64_t bits, magnitude, fraction;
    uint32_t sign, result;
    int shift;
    memcpy(&bits, &value, sizeof bits);
    sign = (uint32_t)(bits >> 32) & 0x80000000u;
    magnitude = bits & 0x7FFFFFFFFFFFFFFFu;
    if (magnitude > 0x7FF0000000000000u) return sign | 0x7FC00000u | ((uint32_t)(magnitude >> 29) & 0x003FFFFFu);
    if (magnitude == 0x7FF0000000000000u) return sign | 0x7F800000u;
    if (magnitude >= 0x47F0000000000000u) return sign | 0x7F7FFFFFu; /* 2^128 and up: the largest float is odd */
    if (magnitude >= 0x3810000000000000u) {                          /* 2^-126 and up: normal */
        result = (uint32_t)((magnitude - 0x3800000000000000u) >> 29);
        return sign | result | ((magnitude & 0x1FFFFFFFu) != 0);
    }
    if (magnitude < 0x3690000000000000u) return sign | (magnitude != 0); /* below 2^-150 */
    fraction = (magnitude & 0x000FFFFFFFFFFFFFu) | 0x0010000000000000u;
    shift = 926 - (int)(magnitude >> 52); /* to units of 2^-149: fraction * 2^(exponent - 1075 + 149) */
    result = (uint32_t)(fraction >> shift);
    return sign | result | ((fraction & (((uint64_t)1 << shift) - 1)) != 0);
}

LLMPAR_DEF uint16_t llmpar_f32_to_bf16(float value) { return llmpar__dtype_to_bf16(llmpar__dtype_bits(value)); }
LLMPAR_DEF float llmpar_bf16_to_f32(uint16_t bits) { return llmpar__dtype_float(llmpar__dtype_from_bf16(bits)); }
LLMPAR_DEF uint16_t llmpar_f32_to_f16(float value) { return llmpar__dtype_to_f16(llmpar__dtype_bits(value)); }
LLMPAR_DEF float llmpar_f16_to_f32(uint16_t bits) { return llmpar__dtype_float(llmpar__dtype_from_f16(bits)); }

/* One loop for a pair of types: `expression` turns from[i] into to[i]. */
#define LLMPAR__DTYPE_LOOP(in_type, out_type, expression) do { \
        const in_type *from = (const in_type *)in; \
        out_type *to = (out_type *)out; \
        size_t i; \
        for (i = 0; i < count; i++) to[i] = (expression); \
        return 1; \
    } while (0)
#define LLMPAR__DTYPE_PAIR(a, b) ((int)(a) * (int)LLMPAR_DTYPE_COUNT + (int)(b))

LLMPAR_DEF int llmpar_convert(void *out, llmpar_dtype out_dtype, const void *in, llmpar_dtype in_dtype, size_t count)
{
    if (in_dtype == out_dtype) {
        if (in_dtype != LLMPAR_F32 && in_dtype != LLMPAR_F64 && in_dtype != LLMPAR_BF16 && in_dtype != LLMPAR_F16) return 0;
        if (count && out != in) memmove(out, in, count * llmpar_dtype_size(in_dtype));
        return 1;
    }
    switch (LLMPAR__DTYPE_PAIR(in_dtype, out_dtype)) {
    case LLMPAR__DTYPE_PAIR(LLMPAR_F32, LLMPAR_F64): LLMPAR__DTYPE_LOOP(float, double, (double)from[i]);
    case LLMPAR__DTYPE_PAIR(LLMPAR_F64, LLMPAR_F32): LLMPAR__DTYPE_LOOP(double, float, (float)from[i]);
    case LLMPAR__DTYPE_PAIR(LLMPAR_F32, LLMPAR_BF16): LLMPAR__DTYPE_LOOP(float, uint16_t, llmpar__dtype_to_bf16(llmpar__dtype_bits(from[i])));
    case LLMPAR__DTYPE_PAIR(LLMPAR_F32, LLMPAR_F16): LLMPAR__DTYPE_LOOP(float, uint16_t, llmpar__dtype_to_f16(llmpar__dtype_bits(from[i])));
    case LLMPAR__DTYPE_PAIR(LLMPAR_BF16, LLMPAR_F32): LLMPAR__DTYPE_LOOP(uint16_t, float, llmpar__dtype_float(llmpar__dtype_from_bf16(from[i])));
    case LLMPAR__DTYPE_PAIR(LLMPAR_F16, LLMPAR_F32): LLMPAR__DTYPE_LOOP(uint16_t, float, llmpar__dtype_float(llmpar__dtype_from_f16(from[i])));
    case LLMPAR__DTYPE_PAIR(LLMPAR_BF16, LLMPAR_F64): LLMPAR__DTYPE_LOOP(uint16_t, double, (double)llmpar__dtype_float(llmpar__dtype_from_bf16(from[i])));
    case LLMPAR__DTYPE_PAIR(LLMPAR_F16, LLMPAR_F64): LLMPAR__DTYPE_LOOP(uint16_t, double, (double)llmpar__dtype_float(llmpar__dtype_from_f16(from[i])));
    case LLMPAR__DTYPE_PAIR(LLMPAR_F64, LLMPAR_BF16): LLMPAR__DTYPE_LOOP(double, uint16_t, llmpar__dtype_to_bf16(llmpar__dtype_f64_to_odd(from[i])));
    case LLMPAR__DTYPE_PAIR(LLMPAR_F64, LLMPAR_F16): LLMPAR__DTYPE_LOOP(double, uint16_t, llmpar__dtype_to_f16(llmpar__dtype_f64_to_odd(from[i])));
    case LLMPAR__DTYPE_PAIR(LLMPAR_BF16, LLMPAR_F16): LLMPAR__DTYPE_LOOP(uint16_t, uint16_t, llmpar__dtype_to_f16(llmpar__dtype_from_bf16(from[i])));
    case LLMPAR__DTYPE_PAIR(LLMPAR_F16, LLMPAR_BF16): LLMPAR__DTYPE_LOOP(uint16_t, uint16_t, llmpar__dtype_to_bf16(llmpar__dtype_from_f16(from[i])));
    default: return 0;
    }
}

#undef LLMPAR__DTYPE_LOOP
#undef LLMPAR__DTYPE_PAIR
/* ==== src/base/math.c ==== */
/* ==== src/base/math_internal.h ==== */
/* math_internal: the one place where an integer becomes a correctly rounded double; shared by json and exact_sum. */
#ifndef LLMPAR_MATH_INTERNAL_H
#define LLMPAR_MATH_INTERNAL_H


/* (significand + d) * 2^exponent with 0 < d < 1 if `sticky`, else d = 0; rounded once to nearest, ties to even.
   Subnormals and infinity as IEEE has them. With sticky set the significand must have at least 55 bits. */
LLMPAR__PRIVATE double llmpar__math_round_scaled(uint64_t significand, int sticky, int64_t exponent);

#endif
/* ---- src/base/math.c goes on ---- */

#include <string.h>

#if defined(__x86_64__)
#include <emmintrin.h>
#else
#include <arm_neon.h>
#endif

/* Polynomial coefficients are Chebyshev fits (near-minimax) made at 200 bits; beside each stands the fit's own error. Comments
   name the reduction, which is the textbook one: Muller, "Elementary Functions", chapters 5, 6 and 11.
   Every scaling is by powers of two made from bits, so nothing depends on tables, on a C library or on fma. */

static inline uint32_t llmpar__math_bits_f32(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float llmpar__math_from_bits_f32(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint64_t llmpar__math_bits_f64(double value)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline double llmpar__math_from_bits_f64(uint64_t bits)
{
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* e^x = 2^n e^r, n = round(x / ln 2), |r| <= 0.347. Selects only, so that a loop over it vectorises; a NaN walks through
   the unsigned arithmetic and comes out of the product. */
LLMPAR_DEF float llmpar_exp_f32(float x)
{
    float clamped = x > 90.0f ? 90.0f : x;
    float shifted, n, r, p;
    uint32_t k, half;
    clamped = clamped < -110.0f ? -110.0f : clamped;
    shifted = clamped * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the sum's low bits are the rounded integer */
    n = shifted - 12582912.0f;
    k = llmpar__math_bits_f32(shifted) - 0x4B400000u;
    r = clamped - n * 0.693145752f; /* 15 bits of ln 2: the product is exact */
    r = r - n * 1.42860677e-06f;
    p = 0.00139262135f; /* (e^r - 1 - r) / r^2, relative to e^r within 8e-9 */
    p = p * r + 0.00836320297f;
    p = p * r + 0.0416665544f;
    p = p * r + 0.166665768f;
    p = p * r + 0.5f;
    p = 1.0f + (r + r * r * p);
    half = (k >> 1) | (k & 0x80000000u); /* k / 2 in two's complement */
    /* two factors: 2^128 is no float, and a subnormal result is rounded by the last product alone */
    p = p * llmpar__math_from_bits_f32((half + 127u) << 23);
    return p * llmpar__math_from_bits_f32((k - half + 127u) << 23);
}

/* x = 2^k m, m in [sqrt(1/2), sqrt(2)); with f = m - 1 and s = f / (2 + f), log m = 2 atanh s = f - (f^2/2 - s (f^2/2 + R)). */
LLMPAR_DEF float llmpar_log_f32(float x)
{
    uint32_t bits = llmpar__math_bits_f32(x);
    uint32_t tiny = bits < 0x00800000u;
    /* a subnormal is an integer times 2^-149: converted, not multiplied, so that denormals-are-zero cannot touch it */
    uint32_t normal = tiny ? llmpar__math_bits_f32((float)(int32_t)bits) : bits;
    uint32_t moved = normal + (0x3F800000u - 0x3F3504F3u);
    float k = (float)((int32_t)(moved >> 23) - (tiny ? 127 + 149 : 127));
    float f = llmpar__math_from_bits_f32((moved & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
    float s = f / (2.0f + f), z = s * s, square = 0.5f * f * f, p, result;
    p = 0.233316145f; /* (2 atanh(s) / s - 2) / z within 2e-11 of the logarithm */
    p = p * z + 0.285507786f;
    p = p * z + 0.400001222f;
    p = p * z + 0.666666666f;
    result = k * 0.693145752f + (f - (square - (s * (square + z * p) + k * 1.42860677e-06f)));
    result = bits >= 0x7F800000u ? x + x : result; /* +inf stays; NaN stays; negatives next */
    result = bits > 0x80000000u && bits <= 0xFF800000u ? llmpar__math_from_bits_f32(0x7FC00000u) : result;
    return (bits & 0x7FFFFFFFu) == 0 ? llmpar__math_from_bits_f32(0xFF800000u) : result;
}

/* e^(high + low), |low| <= 2^-40 |high|; high may be NaN or infinite, low may not. */
static double llmpar__math_exp_pair(double high, double low)
{
    double shifted, n, r, p;
    int64_t k, half;
    if (!(high < 709.79)) return high >= 709.79 ? llmpar__math_from_bits_f64(0x7FF0000000000000u) : high;
    if (high < -745.2) return 0.0;
    shifted = high * 1.4426950408889634 + 6755399441055744.0; /* 1.5 * 2^52 */
    n = shifted - 6755399441055744.0;
    k = (int64_t)n;
    r = high - n * 0.69314718036912382; /* 32 bits of ln 2: the product is exact */
    r = r - (n * 1.9082149292705877e-10 - low);
    p = 2.0914717341716378e-09; /* (e^r - 1 - r) / r^2, relative to e^r within 2e-19 */
    p = p * r + 2.5105259538448494e-08;
    p = p * r + 2.755727357010214e-07;
    p = p * r + 2.7557255297969643e-06;
    p = p * r + 2.4801587325605324e-05;
    p = p * r + 0.00019841269874901259;
    p = p * r + 0.0013888888888883731;
    p = p * r + 0.0083333333333261116;
    p = p * r + 0.041666666666666671;
    p = p * r + 0.16666666666666671;
    p = p * r + 0.5;
    p = 1.0 + (r + r * r * p);
    half = k / 2;
    p = p * llmpar__math_from_bits_f64((uint64_t)(half + 1023) << 52);
    return p * llmpar__math_from_bits_f64((uint64_t)(k - half + 1023) << 52);
}

LLMPAR_DEF double llmpar_exp_f64(double x)
{
    return llmpar__math_exp_pair(x, 0.0);
}

/* x = 2^k (1 + f), 1 + f in [sqrt(1/2), sqrt(2)), for a positive finite x. Returns k. */
static int llmpar__math_split(double x, double *f)
{
    uint64_t bits = llmpar__math_bits_f64(x), moved;
    int offset = 1023;
    if (bits < 0x0010000000000000u) { /* subnormal: an integer times 2^-1074 */
        bits = llmpar__math_bits_f64((double)(int64_t)bits);
        offset += 1074;
    }
    moved = bits + (0x3FF0000000000000u - 0x3FE6A09E667F3BCDu);
    *f = llmpar__math_from_bits_f64((moved & 0x000FFFFFFFFFFFFFu) + 0x3FE6A09E667F3BCDu) - 1.0;
    return (int)(moved >> 52) - offset;
}

/* (2 atanh(s) / s - 2) / z with z = s^2, |s| <= 0.1716; within 3e-20 of the logarithm. */
static double llmpar__math_log_polynomial(double z)
{
    double p = 0.13088034850927555;
    p = p * z + 0.13268638369266825;
    p = p * z + 0.15386244737621665;
    p = p * z + 0.18181795547521137;
    p = p * z + 0.22222222392581045;
    p = p * z + 0.28571428570799784;
    p = p * z + 0.40000000000000885;
    return p * z + 0.66666666666666663;
}

LLMPAR_DEF double llmpar_log_f64(double x)
{
    double f, s, z, square, k;
    if (!(x > 0.0)) return llmpar__math_from_bits_f64(x == 0.0 ? 0xFFF0000000000000u : 0x7FF8000000000000u);
    if (!llmpar_isfinite_f64(x)) return x;
    k = (double)llmpar__math_split(x, &f);
    s = f / (2.0 + f);
    z = s * s;
    square = 0.5 * f * f;
    return k * 0.69314718036912382 + (f - (square - (s * (square + z * llmpar__math_log_polynomial(z)) + k * 1.9082149292705877e-10)));
}

/* a * b = *high + *low exactly (Dekker 1971), for products well inside the range. */
static void llmpar__math_product(double a, double b, double *high, double *low)
{
    double a1 = a * 134217729.0, b1 = b * 134217729.0, a2, b2; /* 2^27 + 1 */
    a1 = a1 - (a1 - a);
    b1 = b1 - (b1 - b);
    a2 = a - a1;
    b2 = b - b1;
    *high = a * b;
    *low = ((a1 * b1 - *high) + a1 * b2 + a2 * b1) + a2 * b2;
}

/* base^exponent = e^(exponent log base), the logarithm and the product in pairs of doubles: a relative error of 2^-58
   in the logarithm is an absolute one of at most 2^-51.9 in an exponent of 69. */
LLMPAR_DEF double llmpar_pow_f64(double base, double exponent)
{
    const double infinity = llmpar__math_from_bits_f64(0x7FF0000000000000u);
    double f, k, total, rest, s, s_low, c, product, product_low, high, low, sum;
    if (exponent == 0.0 || base == 1.0) return 1.0;
    if (!(base >= 0.0) || exponent != exponent) return llmpar__math_from_bits_f64(0x7FF8000000000000u);
    if (base == 0.0 || base == infinity) return (base == 0.0) == (exponent < 0.0) ? infinity : 0.0;
    /* |log base| >= 2^-53, so 2^65 decides as infinity does, and the product below stays in range */
    if (exponent > 36893488147419103232.0) exponent = 36893488147419103232.0;
    if (exponent < -36893488147419103232.0) exponent = -36893488147419103232.0;

    k = (double)llmpar__math_split(base, &f);
    /* s + s_low = f / (2 + f): the quotient's exact remainder gives the second part */
    total = 2.0 + f;
    rest = f - (total - 2.0);
    s = f / total;
    llmpar__math_product(s, total, &product, &product_low);
    s_low = (((f - product) - product_low) - s * rest) / total;
    c = s * (s * s) * llmpar__math_log_polynomial(s * s);
    /* log base = high + low, every sum with its rest */
    sum = k * 0.69314718036912382;
    high = sum + 2.0 * s;
    low = k != 0.0 ? (sum - high) + 2.0 * s : 0.0;
    low = low + (k * 1.9082149292705877e-10 + (2.0 * s_low + c));

    llmpar__math_product(exponent, high, &product, &product_low);
    product_low = product_low + exponent * low;
    sum = product + product_low;
    if (!(sum < 800.0 && sum > -800.0)) return sum > 0.0 ? infinity : 0.0;
    return llmpar__math_exp_pair(sum, (product - sum) + product_low);
}

LLMPAR_DEF void llmpar_sincos_f64(double x, double *sine, double *cosine)
{
    double shifted, n, r, high, low, z, p, s, c;
    int64_t quadrant;
    if (!(x >= -1e9 && x <= 1e9)) {
        *sine = *cosine = llmpar__math_from_bits_f64(0x7FF8000000000000u);
        return;
    }
    shifted = x * 0.63661977236758138 + 6755399441055744.0;
    n = shifted - 6755399441055744.0;
    quadrant = (int64_t)n;
    /* pi/2 in 23 + 23 + 53 bits: n has 30, so the first two products and differences are exact */
    r = (x - n * 1.5707962512969971) - n * 7.5497894158615964e-08;
    p = n * 5.390302858158119e-15;
    high = r - p;
    low = (r - high) - p;
    z = high * high;
    p = 1.5917848524808262e-10; /* (sin(r)/r - 1) / r^2, |r| <= pi/4, within 1.3e-17 of sin(r)/r */
    p = p * z - 2.5051127944014188e-08;
    p = p * z + 2.7557316083816358e-06;
    p = p * z - 0.00019841269836722418;
    p = p * z + 0.0083333333333309254;
    p = p * z - 0.16666666666666666;
    s = high + (high * z * p + low);
    p = -1.1382456778061306e-11; /* (cos(r) - 1 + r^2/2) / r^4 within 5e-19 of cos(r) */
    p = p * z + 2.0876143827993133e-09;
    p = p * z - 2.7557317260008837e-07;
    p = p * z + 2.480158729874307e-05;
    p = p * z - 0.0013888888888887382;
    p = p * z + 0.041666666666666664;
    c = 1.0 - (0.5 * z - (z * z * p - high * low));
    *sine = quadrant & 1 ? c : s;
    *cosine = quadrant & 1 ? s : c;
    if (quadrant & 2) *sine = -*sine;
    if ((quadrant + 1) & 2) *cosine = -*cosine;
}

/* The instruction, not __builtin_sqrt: that may call libm for negative arguments. */
LLMPAR_DEF double llmpar_sqrt_f64(double x)
{
#if defined(__x86_64__)
    __m128d v = _mm_set_sd(x);
    return _mm_cvtsd_f64(_mm_sqrt_sd(v, v));
#else
    return vget_lane_f64(vsqrt_f64(vdup_n_f64(x)), 0);
#endif
}

LLMPAR_DEF float llmpar_sqrt_f32(float x)
{
#if defined(__x86_64__)
    return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x)));
#else
    return vget_lane_f32(vsqrt_f32(vdup_n_f32(x)), 0);
#endif
}

LLMPAR_DEF int llmpar_isfinite_f32(float x)
{
    return (llmpar__math_bits_f32(x) & 0x7F800000u) != 0x7F800000u;
}

LLMPAR_DEF int llmpar_isfinite_f64(double x)
{
    return (llmpar__math_bits_f64(x) & 0x7FF0000000000000u) != 0x7FF0000000000000u;
}

LLMPAR__PRIVATE_DEF double llmpar__math_round_scaled(uint64_t significand, int sticky, int64_t exponent)
{
    uint64_t kept, lost, half;
    int length, drop;
    if (significand == 0) return 0.0;
    length = 64 - __builtin_clzll(significand);
    if (exponent + length > 1024) return llmpar__math_from_bits_f64(0x7FF0000000000000u);
    if (exponent + length < -1074) return 0.0; /* below half of the smallest subnormal, 2^-1075 */
    /* the last bit kept has weight 2^-1074 or is the 53rd */
    drop = length - 53;
    if (exponent + drop < -1074) drop = (int)(-1074 - exponent);
    if (drop <= 0) {
        kept = significand << -drop;
    } else {
        /* drop <= length <= 64 */
        kept = drop < 64 ? significand >> drop : 0;
        lost = drop < 64 ? significand & (((uint64_t)1 << drop) - 1) : significand;
        half = (uint64_t)1 << (drop - 1);
        if (lost > half || (lost == half && (sticky || (kept & 1)))) kept++;
    }
    /* kept counts units of 2^(exponent + drop): as bits, the subnormals and normals are one line; a carry moves up by itself */
    if (kept < 0x0010000000000000u) return llmpar__math_from_bits_f64(kept);
    return llmpar__math_from_bits_f64(kept + ((uint64_t)(exponent + drop + 1074) << 52));
}
/* ==== src/base/exact_sum.c ==== */

#include <string.h>

/* limb i of the number    ... | 66 | 65 | ... | 1 | 0 |   weight 2^(32 i - 1088)
   A finite double is a 53-bit integer at bit position max(exponent, 1) + 13 of this register, so it touches three limbs, each
   by less than 2^32. Limbs are signed and hold 2^30 such terms without a carry. */
#define LLMPAR__EXACT_NUMBER 67 /* limbs of the number */
#define LLMPAR__EXACT_INFINITY 69
#define LLMPAR__EXACT_NEGATIVE_INFINITY 70
#define LLMPAR__EXACT_NAN 71

/* limbs += (or -=) value * 2^(position - 1088), value < 2^64, 0 <= position < 32 * 64 */
static inline void llmpar__exact_place(int64_t *limbs, uint64_t value, int position, int negative)
{
    int64_t *limb = limbs + (position >> 5);
    int shift = position & 31;
    uint64_t low = (value & 0xFFFFFFFFu) << shift, high = (value >> 32) << shift; /* each < 2^63 */
    int64_t first, second, third;
    high += low >> 32;
    first = (int64_t)(low & 0xFFFFFFFFu);
    second = (int64_t)(high & 0xFFFFFFFFu);
    third = (int64_t)(high >> 32);
    limb[0] += negative ? -first : first;
    limb[1] += negative ? -second : second;
    limb[2] += negative ? -third : third;
}

LLMPAR_DEF void llmpar_exact_sum_add(llmpar_exact_sum *sum, double value)
{
    uint64_t bits, fraction;
    int exponent, negative;
    memcpy(&bits, &value, sizeof bits);
    fraction = bits & 0x000FFFFFFFFFFFFFu;
    exponent = (int)(bits >> 52) & 0x7FF;
    negative = (int)(bits >> 63);
    if (exponent == 0x7FF) {
        sum->limb[fraction ? LLMPAR__EXACT_NAN : negative ? LLMPAR__EXACT_NEGATIVE_INFINITY : LLMPAR__EXACT_INFINITY]++;
        return;
    }
    if (exponent) fraction |= 0x0010000000000000u;
    else exponent = 1;
    llmpar__exact_place(sum->limb, fraction, exponent + 13, negative);
}

/* A finite float is an integer below 2^24 times 2^(max(exponent, 1) - 150); its square is an integer below 2^48 at bit
   position 2 max(exponent, 1) + 788. */
static inline void llmpar__exact_square(llmpar_exact_sum *sum, uint32_t bits)
{
    uint32_t exponent = (bits >> 23) & 0xFFu, fraction = bits & 0x007FFFFFu;
    if (exponent == 0xFFu) {
        sum->limb[fraction ? LLMPAR__EXACT_NAN : LLMPAR__EXACT_INFINITY]++;
        return;
    }
    if (exponent) fraction |= 0x00800000u;
    else exponent = 1;
    llmpar__exact_place(sum->limb, (uint64_t)fraction * fraction, 2 * (int)exponent + 788, 0);
}

/* Terms with the same exponent share a 64-bit bucket, which 2^16 squares cannot overflow; buckets go to the limbs at the end of
   a block. Two sets of buckets, used in turn, hide the latency of adding to the same bucket again. */
static void llmpar__exact_squares_block(llmpar_exact_sum *sum, const float *value, size_t count)
{
    uint64_t bucket[2][256];
    size_t i;
    int e;
    memset(bucket, 0, sizeof bucket);
    for (i = 0; i < count; i++) {
        uint32_t bits, exponent, fraction;
        memcpy(&bits, value + i, sizeof bits);
        exponent = (bits >> 23) & 0xFFu;
        fraction = (bits & 0x007FFFFFu) | (uint32_t)(exponent != 0) << 23;
        if (exponent == 0xFFu) llmpar__exact_square(sum, bits);
        else bucket[i & 1][exponent] += (uint64_t)fraction * fraction;
    }
    for (e = 0; e < 255; e++) {
        int position = 2 * (e ? e : 1) + 788;
        if (bucket[0][e]) llmpar__exact_place(sum->limb, bucket[0][e], position, 0);
        if (bucket[1][e]) llmpar__exact_place(sum->limb, bucket[1][e], position, 0);
    }
}

LLMPAR_DEF void llmpar_exact_sum_add_squares_f32(llmpar_exact_sum *sum, const float *value, size_t count)
{
    const size_t block = 65536;
    size_t i;
    llmpar_exact_sum_carry(sum);
    while (count >= 256) { /* below this the buckets cost more than they save; the value is the same */
        size_t now = count < block ? count : block;
        llmpar__exact_squares_block(sum, value, now);
        llmpar_exact_sum_carry(sum);
        value += now;
        count -= now;
    }
    for (i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, value + i, sizeof bits);
        llmpar__exact_square(sum, bits);
    }
    llmpar_exact_sum_carry(sum);
}

LLMPAR_DEF void llmpar_exact_sum_merge(llmpar_exact_sum *sum, const llmpar_exact_sum *other)
{
    int i;
    for (i = 0; i < LLMPAR_EXACT_SUM_LIMBS; i++) sum->limb[i] += other->limb[i];
}

/* Limbs below the top one become [0, 2^32); the top one keeps the sign. */
LLMPAR_DEF void llmpar_exact_sum_carry(llmpar_exact_sum *sum)
{
    int i;
    for (i = 0; i < LLMPAR__EXACT_NUMBER - 1; i++) {
        sum->limb[i + 1] += sum->limb[i] >> 32; /* rounds down, on negatives too */
        sum->limb[i] &= 0xFFFFFFFF;
    }
}

LLMPAR_DEF double llmpar_exact_sum_value(const llmpar_exact_sum *sum)
{
    llmpar_exact_sum digits = *sum;
    const int64_t *special = sum->limb;
    uint64_t significand;
    double value;
    int top, i, shift, sticky, negative;

    if (special[LLMPAR__EXACT_NAN] || (special[LLMPAR__EXACT_INFINITY] && special[LLMPAR__EXACT_NEGATIVE_INFINITY])) {
        const uint64_t nan = 0x7FF8000000000000u;
        memcpy(&value, &nan, sizeof value);
        return value;
    }
    if (special[LLMPAR__EXACT_INFINITY] || special[LLMPAR__EXACT_NEGATIVE_INFINITY]) {
        const uint64_t infinity = special[LLMPAR__EXACT_INFINITY] ? 0x7FF0000000000000u : 0xFFF0000000000000u;
        memcpy(&value, &infinity, sizeof value);
        return value;
    }

    llmpar_exact_sum_carry(&digits);
    negative = digits.limb[LLMPAR__EXACT_NUMBER - 1] < 0;
    if (negative) {
        for (i = 0; i < LLMPAR__EXACT_NUMBER; i++) digits.limb[i] = -digits.limb[i];
        llmpar_exact_sum_carry(&digits);
    }
    for (top = LLMPAR__EXACT_NUMBER - 1; top > 0 && digits.limb[top] == 0; top--) { }
    if (digits.limb[top] > 0xFFFFFFFF) { /* only the top limb can: 2^1056 and up */
        const uint64_t infinity = negative ? 0xFFF0000000000000u : 0x7FF0000000000000u;
        memcpy(&value, &infinity, sizeof value);
        return value;
    }
    /* 64 bits from the highest bit down, and whether anything lies below */
    significand = (uint64_t)digits.limb[top] << 32;
    if (top > 0) significand |= (uint64_t)digits.limb[top - 1];
    sticky = 0;
    if (top > 1) {
        shift = __builtin_clzll(significand); /* 0..31: limb[top] is not zero */
        if (shift) significand = significand << shift | (uint64_t)digits.limb[top - 2] >> (32 - shift);
        sticky = ((uint64_t)digits.limb[top - 2] & ((((uint64_t)1 << 32) - 1) >> shift)) != 0;
        for (i = 0; i < top - 2; i++) sticky |= digits.limb[i] != 0;
        value = llmpar__math_round_scaled(significand, sticky, 32 * (top - 1) - 1088 - shift);
    } else {
        value = llmpar__math_round_scaled(significand, 0, 32 * (top - 1) - 1088);
    }
    return negative ? -value : value;
}

#undef LLMPAR__EXACT_NUMBER
#undef LLMPAR__EXACT_INFINITY
#undef LLMPAR__EXACT_NEGATIVE_INFINITY
#undef LLMPAR__EXACT_NAN
/* ==== src/base/rng.c ==== */

/* Philox4x32-10: ten rounds of two 32 x 32 -> 64 bit products, the key bumped by Weyl constants between them.
   Constants and order from Random123's philox.h (Salmon et al. 2011, section 3.3). */
static void llmpar__rng_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4])
{
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
    int round;
    for (round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

/* Two Philox blocks in a chain: the first mixes (seed; purpose, hash of name), the second, under the first's output,
   (step, sample). For one seed, purpose and name no two (step, sample) share a stream: a block is a bijection of its counter. */
LLMPAR_DEF llmpar_rng llmpar_rng_key(uint64_t seed, uint32_t purpose, const char *name, uint64_t step, uint64_t sample)
{
    llmpar_rng rng;
    uint32_t counter[4], words[4], key[2];
    uint64_t hash = 0xCBF29CE484222325u; /* FNV-1a, 64 bit */
    for (; name && *name; name++) hash = (hash ^ (unsigned char)*name) * 0x100000001B3u;
    key[0] = (uint32_t)seed;
    key[1] = (uint32_t)(seed >> 32);
    counter[0] = (uint32_t)hash;
    counter[1] = (uint32_t)(hash >> 32);
    counter[2] = purpose;
    counter[3] = 0;
    llmpar__rng_philox(counter, key, words);
    counter[0] = (uint32_t)step ^ words[2];
    counter[1] = (uint32_t)(step >> 32) ^ words[3];
    counter[2] = (uint32_t)sample;
    counter[3] = (uint32_t)(sample >> 32);
    llmpar__rng_philox(counter, words, words);
    rng.key[0] = words[0];
    rng.key[1] = words[1];
    rng.counter_high[0] = words[2];
    rng.counter_high[1] = words[3];
    return rng;
}

LLMPAR_DEF void llmpar_rng_words(const llmpar_rng *rng, uint64_t position, uint32_t words[4])
{
    uint32_t counter[4];
    counter[0] = (uint32_t)position;
    counter[1] = (uint32_t)(position >> 32);
    counter[2] = rng->counter_high[0];
    counter[3] = rng->counter_high[1];
    llmpar__rng_philox(counter, rng->key, words);
}

/* The upper 53 of 64 bits, as a multiple of 2^-53. */
static double llmpar__rng_unit(uint32_t high, uint32_t low)
{
    return (double)(((uint64_t)high << 32 | low) >> 11) * (1.0 / 9007199254740992.0);
}

/* Elements 2i and 2i + 1 are made of the four words at position i. */
LLMPAR_DEF double llmpar_rng_uniform(const llmpar_rng *rng, uint64_t index)
{
    uint32_t words[4];
    llmpar_rng_words(rng, index >> 1, words);
    return index & 1 ? llmpar__rng_unit(words[2], words[3]) : llmpar__rng_unit(words[0], words[1]);
}

/* Box and Muller 1958: the pair at position i is element 2i (cosine) and 2i + 1 (sine). */
static void llmpar__rng_normal_pair(const llmpar_rng *rng, uint64_t position, double pair[2])
{
    uint32_t words[4];
    double radius, sine, cosine;
    llmpar_rng_words(rng, position, words);
    radius = llmpar_sqrt_f64(-2.0 * llmpar_log_f64(1.0 - llmpar__rng_unit(words[0], words[1]))); /* of (0, 1] */
    llmpar_sincos_f64(6.2831853071795862 * llmpar__rng_unit(words[2], words[3]), &sine, &cosine);
    pair[0] = radius * cosine;
    pair[1] = radius * sine;
}

LLMPAR_DEF double llmpar_rng_normal(const llmpar_rng *rng, uint64_t index)
{
    double pair[2];
    llmpar__rng_normal_pair(rng, index >> 1, pair);
    return pair[index & 1];
}

LLMPAR_DEF void llmpar_rng_fill_normal_f32(const llmpar_rng *rng, uint64_t first, size_t count, float mean, float stddev, float *out)
{
    double pair[2] = { 0.0, 0.0 };
    size_t i;
    for (i = 0; i < count; i++) {
        uint64_t index = first + i;
        if (i == 0 || !(index & 1)) llmpar__rng_normal_pair(rng, index >> 1, pair);
        out[i] = (float)((double)mean + (double)stddev * pair[index & 1]);
    }
}
/* ==== src/base/json.c ==== */

#include <string.h>

/* A document is one allocation, sized by a count over the text before anything is parsed:

     | node 0 = root | node 1 | ...  one for each possible value | text's length + 1 bytes of decoded strings |

   A string is decoded to the same offset in the last part at which it stands in the text (escapes only shrink it, the closing quote's place
   takes the NUL), so a key's own byte position needs no field. Nothing recurses: an open container keeps its parent in
   `next`, which it needs only once it is closed. */

typedef struct llmpar__json_parser {
    llmpar_heap *heap;
    const char *text;
    size_t length, at;
    const char *name;
    uint32_t max_depth;
    int unique_keys;
    llmpar_json *nodes; /* owned; becomes the document */
    size_t used;        /* nodes so far */
    char *strings;      /* behind the nodes */
    llmpar_error *error;
} llmpar__json_parser;

/* ---- errors: each returns 0, so that a reader can `return` it ---- */

static int llmpar__json_expected(llmpar__json_parser *p, size_t position, const char *expected)
{
    if (position >= p->length) {
        llmpar_error_set(p->error, LLMPAR_ERR_FORMAT, "%s: byte %zu: expected %s, got the end of the text", p->name, position, expected);
    } else {
        unsigned byte = (unsigned char)p->text[position];
        if (byte > 0x20 && byte < 0x7F)
            llmpar_error_set(p->error, LLMPAR_ERR_FORMAT, "%s: byte %zu: expected %s, got '%c'", p->name, position, expected, (int)byte);
        else
            llmpar_error_set(p->error, LLMPAR_ERR_FORMAT, "%s: byte %zu: expected %s, got byte 0x%02X", p->name, position, expected, byte);
    }
    return 0;
}

static void llmpar__json_skip_space(llmpar__json_parser *p)
{
    while (p->at < p->length) {
        char c = p->text[p->at];
        if (c != ' ' && c != '\t' && c != '\n' && c != '\r') return;
        p->at++;
    }
}

/* The character at the cursor, or -1 at the end. */
static int llmpar__json_peek(const llmpar__json_parser *p)
{
    return p->at < p->length ? (unsigned char)p->text[p->at] : -1;
}

/* ---- strings ---- */

/* Bytes of the UTF-8 character at text, 0 if it is none: overlong forms, surrogates and values above U+10FFFF are
   refused (Unicode 15, table 3-7). */
static size_t llmpar__json_utf8(const char *text, size_t length)
{
    unsigned first, second, low = 0x80, high = 0xBF;
    size_t bytes, i;
    if (length == 0) return 0;
    first = (unsigned char)text[0];
    if (first < 0x80) return 1;
    if (first < 0xC2 || first > 0xF4) return 0;
    bytes = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    if (length < bytes) return 0;
    if (first == 0xE0) low = 0xA0;
    if (first == 0xED) high = 0x9F;
    if (first == 0xF0) low = 0x90;
    if (first == 0xF4) high = 0x8F;
    second = (unsigned char)text[1];
    if (second < low || second > high) return 0;
    for (i = 2; i < bytes; i++)
        if (((unsigned char)text[i] & 0xC0) != 0x80) return 0;
    return bytes;
}

static char *llmpar__json_put_utf8(char *out, uint32_t code)
{
    if (code < 0x80) {
        *out++ = (char)code;
    } else if (code < 0x800) {
        *out++ = (char)(0xC0 | code >> 6);
        *out++ = (char)(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
        *out++ = (char)(0xE0 | code >> 12);
        *out++ = (char)(0x80 | (code >> 6 & 0x3F));
        *out++ = (char)(0x80 | (code & 0x3F));
    } else {
        *out++ = (char)(0xF0 | code >> 18);
        *out++ = (char)(0x80 | (code >> 12 & 0x3F));
        *out++ = (char)(0x80 | (code >> 6 & 0x3F));
        *out++ = (char)(0x80 | (code & 0x3F));
    }
    return out;
}

/* Four hexadecimal digits at the cursor. */
static int llmpar__json_hex4(llmpar__json_parser *p, uint32_t *code)
{
    int i;
    *code = 0;
    for (i = 0; i < 4; i++, p->at++) {
        int c = llmpar__json_peek(p);
        int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
        if (digit < 0) return llmpar__json_expected(p, p->at, "four hexadecimal digits after \\u");
        *code = *code * 16 + (uint32_t)digit;
    }
    return 1;
}

/* What follows \u, two escapes for a code above U+FFFF. */
static int llmpar__json_unicode(llmpar__json_parser *p, uint32_t *code)
{
    size_t start = p->at - 2;
    uint32_t second;
    if (!llmpar__json_hex4(p, code)) return 0;
    if (*code < 0xD800 || *code > 0xDFFF) return 1;
    if (*code > 0xDBFF) return llmpar__json_expected(p, start, "no second half of a surrogate pair without a first");
    if (p->length - p->at < 2 || p->text[p->at] != '\\' || p->text[p->at + 1] != 'u')
        return llmpar__json_expected(p, p->at, "the second half of a surrogate pair");
    start = p->at;
    p->at += 2;
    if (!llmpar__json_hex4(p, &second)) return 0;
    if (second < 0xDC00 || second > 0xDFFF) return llmpar__json_expected(p, start, "the second half of a surrogate pair");
    *code = 0x10000 + ((*code - 0xD800) << 10) + (second - 0xDC00);
    return 1;
}

/* The string whose opening quote is at the cursor. */
static int llmpar__json_read_string(llmpar__json_parser *p, const char **string, size_t *length)
{
    char *begin = p->strings + p->at + 1, *out = begin;
    p->at++;
    for (;;) {
        int c = llmpar__json_peek(p);
        if (c == '"') break;
        if (c < 0x20) return llmpar__json_expected(p, p->at, "a character of a string or its closing '\"'");
        if (c != '\\') {
            size_t bytes = llmpar__json_utf8(p->text + p->at, p->length - p->at);
            if (!bytes) return llmpar__json_expected(p, p->at, "UTF-8");
            for (; bytes; bytes--) *out++ = p->text[p->at++];
            continue;
        }
        p->at++;
        c = llmpar__json_peek(p);
        if (c == 'u') {
            uint32_t code;
            p->at++;
            if (!llmpar__json_unicode(p, &code)) return 0;
            out = llmpar__json_put_utf8(out, code);
            continue;
        }
        switch (c) {
        case '"': case '\\': case '/': *out++ = (char)c; break;
        case 'b': *out++ = '\b'; break;
        case 'f': *out++ = '\f'; break;
        case 'n': *out++ = '\n'; break;
        case 'r': *out++ = '\r'; break;
        case 't': *out++ = '\t'; break;
        default: return llmpar__json_expected(p, p->at, "one of \"\\/bfnrtu after \\");
        }
        p->at++;
    }
    p->at++;
    *out = 0;
    *string = begin;
    *length = (size_t)(out - begin);
    return 1;
}

/* ---- numbers ---- */

/* A natural number below 2^2816, for decimals that double arithmetic cannot round exactly. */
#define LLMPAR__JSON_BIG_LIMBS 88
typedef struct llmpar__json_big {
    uint32_t limb[LLMPAR__JSON_BIG_LIMBS]; /* lowest first */
    int used;                              /* limbs; the highest is not zero */
} llmpar__json_big;

/* big = big * factor + term */
static void llmpar__json_big_multiply(llmpar__json_big *big, uint32_t factor, uint32_t term)
{
    uint64_t carry = term;
    int i;
    for (i = 0; i < big->used; i++) {
        carry += (uint64_t)big->limb[i] * factor;
        big->limb[i] = (uint32_t)carry;
        carry >>= 32;
    }
    if (carry) big->limb[big->used++] = (uint32_t)carry;
}

static int llmpar__json_big_bits(const llmpar__json_big *big)
{
    return big->used ? 32 * big->used - __builtin_clz(big->limb[big->used - 1]) : 0;
}

static void llmpar__json_big_shift(llmpar__json_big *big, int bits)
{
    int limbs = bits / 32, i;
    if (!big->used) return;
    if (limbs) {
        for (i = big->used - 1; i >= 0; i--) big->limb[i + limbs] = big->limb[i];
        for (i = 0; i < limbs; i++) big->limb[i] = 0;
        big->used += limbs;
    }
    if (bits % 32) llmpar__json_big_multiply(big, (uint32_t)1 << bits % 32, 0);
}

static int llmpar__json_big_less(const llmpar__json_big *a, const llmpar__json_big *b)
{
    int i;
    if (a->used != b->used) return a->used < b->used;
    for (i = a->used - 1; i >= 0; i--)
        if (a->limb[i] != b->limb[i]) return a->limb[i] < b->limb[i];
    return 0;
}

/* a -= b, a >= b */
static void llmpar__json_big_subtract(llmpar__json_big *a, const llmpar__json_big *b)
{
    int64_t borrow = 0;
    int i;
    for (i = 0; i < a->used; i++) {
        borrow += (int64_t)a->limb[i] - (i < b->used ? (int64_t)b->limb[i] : 0);
        a->limb[i] = (uint32_t)borrow;
        borrow >>= 32;
    }
    while (a->used && a->limb[a->used - 1] == 0) a->used--;
}

/* digits (most significant first) * 10^scale, rounded once: both sides of the fraction are brought to the same length, then 64
   quotient bits come out by subtraction, and a rest that is not zero is the sticky bit. */
static double llmpar__json_exact(const unsigned char *digits, int count, int scale)
{
    llmpar__json_big above, below;
    uint64_t quotient = 0;
    int i, shift;
    above.used = 0;
    for (i = 0; i < count; i++) llmpar__json_big_multiply(&above, 10, digits[i]);
    below.limb[0] = 1;
    below.used = 1;
    for (i = 0; i < scale; i++) llmpar__json_big_multiply(&above, 5, 0);
    for (i = 0; i > scale; i--) llmpar__json_big_multiply(&below, 5, 0);
    shift = llmpar__json_big_bits(&above) - llmpar__json_big_bits(&below);
    if (shift < 0) llmpar__json_big_shift(&above, -shift);
    else llmpar__json_big_shift(&below, shift);
    for (i = 0; i < 64; i++) { /* above < 2 below */
        quotient <<= 1;
        if (!llmpar__json_big_less(&above, &below)) {
            llmpar__json_big_subtract(&above, &below);
            quotient |= 1;
        }
        llmpar__json_big_multiply(&above, 2, 0);
    }
    return llmpar__math_round_scaled(quotient, above.used != 0, (int64_t)shift + scale - 63);
}

/* The correctly rounded value of an unsigned number that fits the grammar; infinity where it is too large. 800 digits decide
   (768 are enough for any double or midpoint); non-zero ones beyond count as one more digit 1. */
static double llmpar__json_decimal(const char *text, size_t length)
{
    static const double power[23] = { 1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11,
                                      1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22 };
    const int64_t limit = (int64_t)1 << 59; /* beyond any text's length: zeros cannot bring a clamped exponent back */
    unsigned char digits[801];
    int count = 0, fraction = 0, beyond = 0, i;
    int64_t scale = 0, exponent = 0;
    size_t at;
    for (at = 0; at < length && (text[at] | 0x20) != 'e'; at++) {
        if (text[at] == '.') {
            fraction = 1;
        } else if (count == 800) {
            beyond |= text[at] != '0';
            scale += !fraction;
        } else {
            if (count || text[at] != '0') digits[count++] = (unsigned char)(text[at] - '0');
            scale -= fraction;
        }
    }
    if (at < length) {
        int negative = text[at + 1] == '-';
        for (at += text[at + 1] == '-' || text[at + 1] == '+' ? 2 : 1; at < length; at++)
            if (exponent < limit) exponent = exponent * 10 + (text[at] - '0');
        if (exponent > limit) exponent = limit;
        scale += negative ? -exponent : exponent;
    }
    if (beyond) {
        digits[count++] = 1;
        scale--;
    }
    for (; count && digits[count - 1] == 0; count--) scale++;
    if (count == 0) return 0.0;
    if (count + scale > 310) return llmpar__math_round_scaled(1, 0, 2000);
    if (count + scale < -330) return 0.0;
    if (count <= 15 && scale >= -22 && scale <= 22) { /* both operands exact: one rounding (Clinger 1990) */
        uint64_t value = 0;
        for (i = 0; i < count; i++) value = value * 10 + digits[i];
        return scale < 0 ? (double)value / power[-scale] : (double)value * power[scale];
    }
    return llmpar__json_exact(digits, count, (int)scale);
}

static int llmpar__json_is_digit(int c) { return c >= '0' && c <= '9'; }

/* At least one digit at the cursor. */
static int llmpar__json_digits(llmpar__json_parser *p)
{
    if (!llmpar__json_is_digit(llmpar__json_peek(p))) return llmpar__json_expected(p, p->at, "a digit");
    while (llmpar__json_is_digit(llmpar__json_peek(p))) p->at++;
    return 1;
}

static int llmpar__json_read_number(llmpar__json_parser *p, llmpar_json *node)
{
    size_t begin, i;
    uint64_t magnitude = 0;
    int negative = llmpar__json_peek(p) == '-', whole = 1;
    p->at += (size_t)negative;
    begin = p->at;
    if (llmpar__json_peek(p) == '0') p->at++;
    else if (!llmpar__json_digits(p)) return 0;
    for (i = begin; i < p->at && whole; i++)
        whole = !__builtin_mul_overflow(magnitude, (uint64_t)10, &magnitude) && !__builtin_add_overflow(magnitude, (uint64_t)(p->text[i] - '0'), &magnitude);
    if (llmpar__json_peek(p) == '.') {
        whole = 0;
        p->at++;
        if (!llmpar__json_digits(p)) return 0;
    }
    if (llmpar__json_peek(p) == 'e' || llmpar__json_peek(p) == 'E') {
        whole = 0;
        p->at++;
        if (llmpar__json_peek(p) == '+' || llmpar__json_peek(p) == '-') p->at++;
        if (!llmpar__json_digits(p)) return 0;
    }
    node->type = LLMPAR_JSON_NUMBER;
    node->number = llmpar__json_decimal(p->text + begin, p->at - begin);
    if (node->number > 1.7976931348623157e308) {
        llmpar_error_set(p->error, LLMPAR_ERR_FORMAT, "%s: byte %zu: expected a number up to 1.8e308, got a larger one", p->name, node->position);
        return 0;
    }
    if (negative) node->number = -node->number;
    if (whole && magnitude <= (uint64_t)INT64_MAX + (uint64_t)negative) {
        node->is_integer = 1;
        node->integer = negative ? (magnitude ? -(int64_t)(magnitude - 1) - 1 : 0) : (int64_t)magnitude;
    }
    return 1;
}

/* ---- member names ---- */

/* Any total order in which equal names are neighbours; equal ones in text order. */
static int llmpar__json_key_before(const llmpar_json *a, const llmpar_json *b)
{
    int order;
    if (a->key_length != b->key_length) return a->key_length < b->key_length;
    order = memcmp(a->key, b->key, a->key_length);
    return order ? order < 0 : a->key < b->key;
}

static void llmpar__json_sift(const llmpar_json **member, size_t root, size_t count)
{
    const llmpar_json *moving = member[root];
    size_t child;
    for (; (child = 2 * root + 1) < count; root = child) {
        if (child + 1 < count && llmpar__json_key_before(member[child], member[child + 1])) child++;
        if (!llmpar__json_key_before(moving, member[child])) break;
        member[root] = member[child];
    }
    member[root] = moving;
}

/* Refuses an object with two members of the same name. A heap sort: no input makes it quadratic or deep. */
static int llmpar__json_check_unique(llmpar__json_parser *p, const llmpar_json *object)
{
    const llmpar_json **member, *duplicate = NULL, *node, *swap;
    size_t count = 0, i;
    int shown;
    if (object->length < 2) return 1;
    member = (const llmpar_json **)llmpar_heap_alloc(p->heap, object->length, sizeof *member);
    if (!member) {
        llmpar_error_set(p->error, LLMPAR_ERR_MEMORY, "%s: no memory to check %zu member names", p->name, object->length);
        return 0;
    }
    for (node = object->child; node; node = node->next) member[count++] = node;
    for (i = count / 2; i-- > 0;) llmpar__json_sift(member, i, count);
    for (i = count - 1; i > 0; i--) {
        swap = member[0];
        member[0] = member[i];
        member[i] = swap;
        llmpar__json_sift(member, 0, i);
    }
    for (i = 1; i < count; i++)
        if (member[i]->key_length == member[i - 1]->key_length && memcmp(member[i]->key, member[i - 1]->key, member[i]->key_length) == 0)
            if (!duplicate || member[i]->key < duplicate->key) duplicate = member[i];
    llmpar_heap_free(p->heap, (void *)member);
    if (!duplicate) return 1;
    shown = duplicate->key_length < 80 ? (int)duplicate->key_length : 80;
    while (shown > 0 && ((unsigned char)duplicate->key[shown] & 0xC0) == 0x80) shown--; /* whole characters */
    llmpar_error_set(p->error, LLMPAR_ERR_FORMAT, "%s: byte %zu: expected every member name once, got \"%.*s\" again", p->name,
                     (size_t)(duplicate->key - p->strings) - 1, shown, duplicate->key);
    return 0;
}

/* ---- values ---- */

static int llmpar__json_read_key(llmpar__json_parser *p, llmpar_json *node)
{
    if (llmpar__json_peek(p) != '"') return llmpar__json_expected(p, p->at, "'\"' of a member's name");
    if (!llmpar__json_read_string(p, &node->key, &node->key_length)) return 0;
    llmpar__json_skip_space(p);
    if (llmpar__json_peek(p) != ':') return llmpar__json_expected(p, p->at, "':'");
    p->at++;
    llmpar__json_skip_space(p);
    return 1;
}

static int llmpar__json_read_word(llmpar__json_parser *p, const char *word)
{
    size_t length = strlen(word);
    if (p->length - p->at < length || memcmp(p->text + p->at, word, length) != 0) return llmpar__json_expected(p, p->at, "a value");
    p->at += length;
    return 1;
}

static int llmpar__json_read_scalar(llmpar__json_parser *p, llmpar_json *node)
{
    int c = llmpar__json_peek(p);
    if (c == '"') {
        node->type = LLMPAR_JSON_STRING;
        return llmpar__json_read_string(p, &node->string, &node->length);
    }
    if (c == '-' || llmpar__json_is_digit(c)) return llmpar__json_read_number(p, node);
    if (c == 'n') return llmpar__json_read_word(p, "null"); /* NULL is type 0 */
    if (c != 't' && c != 'f') return llmpar__json_expected(p, p->at, "a value");
    node->type = LLMPAR_JSON_BOOL;
    node->boolean = c == 't';
    return llmpar__json_read_word(p, c == 't' ? "true" : "false");
}

static int llmpar__json_read_document(llmpar__json_parser *p)
{
    llmpar_json *parent = NULL, *last = NULL, *node; /* last: the newest complete child of parent */
    uint32_t depth = 0;
    for (;;) {
        int c, closer;
        llmpar__json_skip_space(p);
        node = &p->nodes[p->used++];
        memset(node, 0, sizeof *node);
        if (parent && parent->type == LLMPAR_JSON_OBJECT && !llmpar__json_read_key(p, node)) return 0;
        node->position = p->at;
        if (last) last->next = node;
        else if (parent) parent->child = node;
        if (parent) parent->length++;
        c = llmpar__json_peek(p);
        if (c == '[' || c == '{') {
            node->type = c == '[' ? LLMPAR_JSON_ARRAY : LLMPAR_JSON_OBJECT;
            if (depth == p->max_depth) {
                llmpar_error_set(p->error, LLMPAR_ERR_FORMAT, "%s: byte %zu: expected at most %u nested arrays and objects, got more", p->name, p->at, (unsigned)p->max_depth);
                return 0;
            }
            p->at++;
            llmpar__json_skip_space(p);
            if (llmpar__json_peek(p) != (c == '[' ? ']' : '}')) {
                node->next = parent;
                parent = node;
                last = NULL;
                depth++;
                continue;
            }
            p->at++;
        } else if (!llmpar__json_read_scalar(p, node)) {
            return 0;
        }
        for (last = node;; last = node) { /* close what ends here */
            llmpar__json_skip_space(p);
            c = llmpar__json_peek(p);
            if (!parent) return c < 0 ? 1 : llmpar__json_expected(p, p->at, "the end of the text");
            closer = parent->type == LLMPAR_JSON_ARRAY ? ']' : '}';
            if (c == ',') break;
            if (c != closer) return llmpar__json_expected(p, p->at, closer == ']' ? "',' or ']'" : "',' or '}'");
            p->at++;
            node = parent;
            parent = node->next;
            node->next = NULL;
            depth--;
            if (p->unique_keys && node->type == LLMPAR_JSON_OBJECT && !llmpar__json_check_unique(p, node)) return 0;
        }
        p->at++;
    }
}

/* No text has more values than one and its '[', '{' and ',' outside strings: one of them stands before every value but the root. */
static size_t llmpar__json_count(const char *text, size_t length)
{
    size_t count = 1, i;
    int inside = 0;
    for (i = 0; i < length; i++) {
        char c = text[i];
        if (c == '"') inside = !inside;
        else if (inside && c == '\\') i++;
        else if (!inside && (c == ',' || c == '[' || c == '{')) count++;
    }
    return count;
}

LLMPAR_DEF llmpar_status llmpar_json_parse(llmpar_heap *heap, const char *text, size_t length, const llmpar_json_desc *desc, llmpar_json **out, llmpar_error *error)
{
    llmpar__json_parser p;
    llmpar_error own; /* the status must be known where the caller wants no text */
    size_t bytes;
    *out = NULL;
    llmpar_error_clear(&own);
    memset(&p, 0, sizeof p);
    p.heap = heap;
    p.text = text;
    p.length = length;
    p.name = desc && desc->name ? desc->name : "json";
    p.max_depth = desc && desc->max_depth ? desc->max_depth : 128;
    p.unique_keys = desc ? desc->unique_keys : 0;
    p.error = &own;
    if (llmpar_size_mul(llmpar__json_count(text, length), sizeof *p.nodes, &bytes) && llmpar_size_add(bytes, length, &bytes) && llmpar_size_add(bytes, 1, &bytes))
        p.nodes = (llmpar_json *)llmpar_heap_alloc(heap, bytes, 1);
    if (!p.nodes) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: no memory for the values of %zu bytes of text", p.name, length);
    p.strings = (char *)p.nodes + (bytes - length - 1);
    if (!llmpar__json_read_document(&p)) {
        llmpar_heap_free(heap, p.nodes);
        return llmpar_error_set(error, own.status, "%s", own.text);
    }
    *out = p.nodes;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_json_destroy(llmpar_heap *heap, llmpar_json *root)
{
    llmpar_heap_free(heap, root);
}

LLMPAR_DEF const llmpar_json *llmpar_json_get(const llmpar_json *object, const char *key)
{
    const llmpar_json *member;
    size_t length = strlen(key);
    if (!object || object->type != LLMPAR_JSON_OBJECT) return NULL;
    for (member = object->child; member; member = member->next)
        if (member->key_length == length && memcmp(member->key, key, length) == 0) return member;
    return NULL;
}

/* ---- writing ---- */

LLMPAR_DEF size_t llmpar_json_escape(const char *text, size_t length, char *out, size_t capacity)
{
    static const char hex[] = "0123456789abcdef";
    static const char plain[] = "\b\f\n\r\t\"\\", letter[] = "bfnrt\"\\";
    size_t needed = 0, at = 0, i, bytes;
    char piece[8];
    int ended = 0;
    for (i = 0; i <= length + 1; i++) { /* the opening quote, at most `length` characters, the closing quote */
        size_t piece_length = 1;
        piece[0] = '"';
        if (i > 0 && at < length) {
            unsigned char c = (unsigned char)text[at];
            const char *found = c ? strchr(plain, c) : NULL;
            bytes = llmpar__json_utf8(text + at, length - at);
            if (found) {
                piece[0] = '\\';
                piece[1] = letter[found - plain];
                piece_length = 2;
            } else if (c < 0x20) {
                memcpy(piece, "\\u00", 4);
                piece[4] = hex[c >> 4];
                piece[5] = hex[c & 15];
                piece_length = 6;
            } else if (bytes) {
                memcpy(piece, text + at, bytes);
                piece_length = bytes;
            } else {
                memcpy(piece, "\xEF\xBF\xBD", 3);
                piece_length = 3;
                bytes = 1;
            }
            at += bytes;
        } else if (i > 0) {
            ended = 1;
        }
        for (bytes = 0; bytes < piece_length; bytes++, needed++)
            if (needed + 1 < capacity) out[needed] = piece[bytes];
        if (ended) break;
    }
    if (capacity) out[needed < capacity ? needed : capacity - 1] = 0;
    return needed;
}

#undef LLMPAR__JSON_BIG_LIMBS

/* ==== src/io/file.c ==== */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#define LLMPAR__FILE_BUFFER ((size_t)256 << 10)

static const unsigned char llmpar__file_nothing[1] = { 0 }; /* what an empty file's `data` points to */

static llmpar_status llmpar__file_error(llmpar_error *error, const char *path, const char *operation, int number)
{
    return llmpar_error_set(error, LLMPAR_ERR_IO, "%s: %s: %s", path, operation, strerror(number));
}

LLMPAR_DEF int llmpar_is_directory(const char *path)
{
    struct stat s;
    return stat(path, &s) == 0 && S_ISDIR(s.st_mode);
}

LLMPAR_DEF int llmpar_is_file(const char *path)
{
    struct stat s;
    return stat(path, &s) == 0 && S_ISREG(s.st_mode);
}

/* ---- mapped reads ---- */

LLMPAR_DEF llmpar_status llmpar_file_map(const char *path, llmpar_mapped *out, llmpar_error *error)
{
    struct stat s;
    void *base;
    int fd, number;
    memset(out, 0, sizeof *out);
    /* O_NONBLOCK: a fifo without a writer is refused below instead of waited for; a regular file ignores it. */
    fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return llmpar__file_error(error, path, "cannot open", errno);
    if (fstat(fd, &s) != 0) {
        number = errno;
        close(fd);
        return llmpar__file_error(error, path, "cannot stat", number);
    }
    if (!S_ISREG(s.st_mode)) {
        close(fd);
        return llmpar_error_set(error, LLMPAR_ERR_IO, "%s: expected a regular file, got %s", path,
                                S_ISDIR(s.st_mode) ? "a directory" : S_ISFIFO(s.st_mode) ? "a pipe" : "a device or socket");
    }
    if (s.st_size == 0) {
        close(fd);
        out->data = llmpar__file_nothing;
        return LLMPAR_OK;
    }
    base = mmap(NULL, (size_t)s.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    number = errno;
    close(fd);
    if (base == MAP_FAILED) return llmpar__file_error(error, path, "cannot map", number);
    out->base = base;
    out->data = (const unsigned char *)base;
    out->bytes = (size_t)s.st_size;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_file_unmap(llmpar_mapped *file)
{
    if (!file) return;
    if (file->base) munmap(file->base, file->bytes);
    memset(file, 0, sizeof *file);
}

/* ---- atomic writes ---- */

struct llmpar_writer {
    llmpar_heap *heap;
    char *path;            /* final name; owned */
    char *temporary;       /* path.tmp; owned */
    unsigned char *buffer; /* [LLMPAR__FILE_BUFFER]; owned */
    size_t used;           /* bytes waiting in buffer */
    int fd;                /* -1 when closed */
    int created;           /* temporary exists and is ours to remove */
    int failed;            /* a write failed: commit must not succeed */
};

static void llmpar__writer_destroy(llmpar_writer *writer)
{
    llmpar_heap *heap = writer->heap;
    if (writer->fd >= 0) close(writer->fd);
    if (writer->created) unlink(writer->temporary);
    llmpar_heap_free(heap, writer->path);
    llmpar_heap_free(heap, writer->temporary);
    llmpar_heap_free(heap, writer->buffer);
    llmpar_heap_free(heap, writer);
}

LLMPAR_DEF llmpar_status llmpar_writer_open(llmpar_heap *heap, const char *path, llmpar_writer **out, llmpar_error *error)
{
    llmpar_writer *writer;
    size_t length = strlen(path);
    int number;
    *out = NULL;
    if (llmpar_is_directory(path)) return llmpar_error_set(error, LLMPAR_ERR_IO, "%s: cannot write: it is a directory", path);
    writer = (llmpar_writer *)llmpar_heap_zalloc(heap, 1, sizeof *writer);
    if (!writer) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory for a writer", path);
    writer->heap = heap;
    writer->fd = -1;
    writer->path = llmpar_heap_strdup(heap, path);
    writer->temporary = (char *)llmpar_heap_alloc(heap, length + sizeof ".tmp", 1);
    writer->buffer = (unsigned char *)llmpar_heap_alloc(heap, LLMPAR__FILE_BUFFER, 1);
    if (!writer->path || !writer->temporary || !writer->buffer) {
        llmpar__writer_destroy(writer);
        return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory for a writer of %zu bytes", path, LLMPAR__FILE_BUFFER);
    }
    memcpy(writer->temporary, path, length);
    memcpy(writer->temporary + length, ".tmp", sizeof ".tmp");
    writer->fd = open(writer->temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (writer->fd < 0) {
        number = errno;
        llmpar__file_error(error, writer->temporary, "cannot create", number);
        llmpar__writer_destroy(writer);
        return LLMPAR_ERR_IO;
    }
    writer->created = 1;
    *out = writer;
    return LLMPAR_OK;
}

static llmpar_status llmpar__writer_put(llmpar_writer *writer, const unsigned char *data, size_t bytes, llmpar_error *error)
{
    while (bytes > 0) {
        /* One write of more than 2 GiB is cut short by the kernel anyway. */
        size_t part = bytes < ((size_t)1 << 30) ? bytes : (size_t)1 << 30;
        ssize_t written = write(writer->fd, data, part);
        if (written < 0) {
            if (errno == EINTR) continue;
            writer->failed = 1;
            return llmpar__file_error(error, writer->temporary, "cannot write", errno);
        }
        if (written == 0) {
            writer->failed = 1;
            return llmpar_error_set(error, LLMPAR_ERR_IO, "%s: cannot write: 0 of %zu bytes accepted", writer->temporary, part);
        }
        data += written;
        bytes -= (size_t)written;
    }
    return LLMPAR_OK;
}

static llmpar_status llmpar__writer_flush(llmpar_writer *writer, llmpar_error *error)
{
    size_t used = writer->used;
    writer->used = 0;
    return llmpar__writer_put(writer, writer->buffer, used, error);
}

LLMPAR_DEF llmpar_status llmpar_writer_write(llmpar_writer *writer, const void *data, size_t bytes, llmpar_error *error)
{
    llmpar_status status;
    if (writer->failed) return llmpar_error_set(error, LLMPAR_ERR_IO, "%s: an earlier write failed", writer->temporary);
    if (bytes == 0) return LLMPAR_OK;
    if (bytes <= LLMPAR__FILE_BUFFER - writer->used) {
        memcpy(writer->buffer + writer->used, data, bytes);
        writer->used += bytes;
        return LLMPAR_OK;
    }
    status = llmpar__writer_flush(writer, error);
    if (status) return status;
    if (bytes >= LLMPAR__FILE_BUFFER) return llmpar__writer_put(writer, (const unsigned char *)data, bytes, error);
    memcpy(writer->buffer, data, bytes);
    writer->used = bytes;
    return LLMPAR_OK;
}

/* The rename itself is durable only when the directory is. File systems that cannot sync a directory say EINVAL. */
static llmpar_status llmpar__file_sync_parent(llmpar_heap *heap, const char *path, llmpar_error *error)
{
    const char *slash = strrchr(path, '/');
    char *parent;
    llmpar_status status = LLMPAR_OK;
    int fd;
    if (!slash) parent = llmpar_heap_strdup(heap, ".");
    else if (slash == path) parent = llmpar_heap_strdup(heap, "/");
    else {
        parent = llmpar_heap_strdup(heap, path);
        if (parent) parent[slash - path] = 0;
    }
    if (!parent) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory for the directory's name", path);
    fd = open(parent, O_RDONLY | O_CLOEXEC);
    /* A directory may be writable and not readable; then the rename stands without a sync. */
    if (fd < 0 && errno != EACCES) status = llmpar__file_error(error, parent, "cannot open the directory", errno);
    if (fd >= 0) {
        if (fsync(fd) != 0 && errno != EINVAL && errno != EROFS) status = llmpar__file_error(error, parent, "cannot sync the directory", errno);
        close(fd);
    }
    llmpar_heap_free(heap, parent);
    return status;
}

LLMPAR_DEF llmpar_status llmpar_writer_commit(llmpar_writer *writer, llmpar_error *error)
{
    llmpar_status status;
    int fd;
    if (writer->failed) status = llmpar_error_set(error, LLMPAR_ERR_IO, "%s: an earlier write failed", writer->temporary);
    else status = llmpar__writer_flush(writer, error);
    if (!status && fsync(writer->fd) != 0) status = llmpar__file_error(error, writer->temporary, "cannot sync", errno);
    fd = writer->fd;
    writer->fd = -1;
    /* After close the descriptor is gone, whatever close says. */
    if (close(fd) != 0 && !status) status = llmpar__file_error(error, writer->temporary, "cannot close", errno);
    if (!status && rename(writer->temporary, writer->path) != 0) status = llmpar__file_error(error, writer->path, "cannot rename the finished file to it", errno);
    if (!status) {
        writer->created = 0;
        status = llmpar__file_sync_parent(writer->heap, writer->path, error);
    }
    llmpar__writer_destroy(writer);
    return status;
}

LLMPAR_DEF void llmpar_writer_abandon(llmpar_writer *writer)
{
    if (writer) llmpar__writer_destroy(writer);
}

/* ---- directories ---- */

LLMPAR_DEF llmpar_status llmpar_directory_ensure(const char *path, llmpar_error *error)
{
    char probe[4096];
    int length, fd;
    if (mkdir(path, 0777) != 0) {
        int number = errno;
        if (number != EEXIST) return llmpar__file_error(error, path, "cannot create the directory", number);
        if (!llmpar_is_directory(path)) return llmpar_error_set(error, LLMPAR_ERR_IO, "%s: expected a directory, got a file", path);
    }
    /* access() answers yes to root on read-only media: only a file that was really made proves it. */
    length = snprintf(probe, sizeof probe, "%s/.llmpar-XXXXXX", path);
    if (length < 0 || (size_t)length >= sizeof probe) return llmpar_error_set(error, LLMPAR_ERR_IO, "%s: path longer than %zu bytes", path, sizeof probe - 16);
    fd = mkstemp(probe);
    if (fd < 0) return llmpar__file_error(error, path, "cannot write in the directory", errno);
    close(fd);
    if (unlink(probe) != 0) return llmpar__file_error(error, probe, "cannot remove", errno);
    return LLMPAR_OK;
}

#undef LLMPAR__FILE_BUFFER
/* ==== src/io/safetensors.c ==== */

#include <stdio.h>
#include <string.h>

/* The format's limits: https://github.com/huggingface/safetensors#format */
#define LLMPAR__ST_MAX_HEADER 100000000u
#define LLMPAR__ST_MAX_DIMS 8

typedef struct llmpar__st_dtype { const char *name; llmpar_dtype dtype; } llmpar__st_dtype;

/* Every dtype the format knows; LLMPAR_DTYPE_DEFAULT: not one of ours. */
static const llmpar__st_dtype llmpar__st_dtypes[] = {
    { "F32", LLMPAR_F32 }, { "F64", LLMPAR_F64 }, { "BF16", LLMPAR_BF16 }, { "F16", LLMPAR_F16 },
    { "I32", LLMPAR_I32 }, { "I64", LLMPAR_I64 }, { "U64", LLMPAR_U64 }, { "U8", LLMPAR_U8 },
    { "BOOL", LLMPAR_DTYPE_DEFAULT }, { "I8", LLMPAR_DTYPE_DEFAULT }, { "I16", LLMPAR_DTYPE_DEFAULT }, { "U16", LLMPAR_DTYPE_DEFAULT },
    { "U32", LLMPAR_DTYPE_DEFAULT }, { "F4", LLMPAR_DTYPE_DEFAULT }, { "F6_E2M3", LLMPAR_DTYPE_DEFAULT }, { "F6_E3M2", LLMPAR_DTYPE_DEFAULT },
    { "F8_E5M2", LLMPAR_DTYPE_DEFAULT }, { "F8_E4M3", LLMPAR_DTYPE_DEFAULT }, { "F8_E8M0", LLMPAR_DTYPE_DEFAULT },
    { "F8_E4M3FNUZ", LLMPAR_DTYPE_DEFAULT }, { "F8_E5M2FNUZ", LLMPAR_DTYPE_DEFAULT }, { "C64", LLMPAR_DTYPE_DEFAULT }
};
#define LLMPAR__ST_DTYPES (sizeof llmpar__st_dtypes / sizeof llmpar__st_dtypes[0])
static const char llmpar__st_supported[] = "F32, F64, BF16, F16, I32, I64, U64 or U8";

/* What an open file owns; llmpar_safetensors.state points to it, and its first member is what the user holds. */
typedef struct llmpar__st_file {
    llmpar_safetensors file;
    llmpar_heap *heap;
    llmpar_mapped mapped;        /* zero for open_memory */
    char *path;
    char *names;                 /* all names, each zero-terminated */
    llmpar_safetensor *tensors;
} llmpar__st_file;

/* Where reading stands, for messages. */
typedef struct llmpar__st_reader {
    const char *path;
    const char *header;          /* the JSON text */
    const char *tensor;          /* name, UTF-8 */
    size_t data_bytes;           /* bytes after the header */
    llmpar_error *error;
} llmpar__st_reader;

/* ---- sorting: heapsort, because the library takes no memory behind the allocator's back and qsort may ---- */

typedef int (*llmpar__st_before)(const llmpar_safetensor *a, const llmpar_safetensor *b);

static int llmpar__st_by_name(const llmpar_safetensor *a, const llmpar_safetensor *b) { return strcmp(a->name, b->name) < 0; }

/* Empty tensors before the one that starts at the same byte. */
static int llmpar__st_by_begin(const llmpar_safetensor *a, const llmpar_safetensor *b)
{
    return a->begin != b->begin ? a->begin < b->begin : a->bytes < b->bytes;
}

static void llmpar__st_sink(llmpar_safetensor *t, size_t root, size_t count, llmpar__st_before before)
{
    llmpar_safetensor value = t[root];
    for (;;) {
        size_t child = 2 * root + 1;
        if (child >= count) break;
        if (child + 1 < count && before(&t[child], &t[child + 1])) child++;
        if (!before(&value, &t[child])) break;
        t[root] = t[child];
        root = child;
    }
    t[root] = value;
}

static void llmpar__st_sort(llmpar_safetensor *t, size_t count, llmpar__st_before before)
{
    size_t i;
    for (i = count / 2; i > 0; i--) llmpar__st_sink(t, i - 1, count, before);
    for (i = count; i > 1; i--) {
        llmpar_safetensor last = t[i - 1];
        t[i - 1] = t[0];
        t[0] = last;
        llmpar__st_sink(t, 0, i - 1, before);
    }
}

/* ---- reading ---- */

static const char *llmpar__st_type_name(const llmpar_json *value)
{
    switch (value->type) {
    case LLMPAR_JSON_NULL: return "null";
    case LLMPAR_JSON_BOOL: return "a boolean";
    case LLMPAR_JSON_NUMBER: return "a number";
    case LLMPAR_JSON_STRING: return "a string";
    case LLMPAR_JSON_ARRAY: return "an array";
    case LLMPAR_JSON_OBJECT: return "an object";
    default: return "?";
    }
}

/* A non-negative integer written as one: no fraction, no exponent, no "-0". */
static llmpar_status llmpar__st_extent(const llmpar__st_reader *r, const char *field, size_t index, const llmpar_json *value, int64_t *out)
{
    if (value->type != LLMPAR_JSON_NUMBER)
        return llmpar_error_set(r->error, LLMPAR_ERR_FORMAT, "%s: tensor \"%.200s\": %s[%zu] is %s, expected a non-negative integer (header byte %zu)",
                                r->path, r->tensor, field, index, llmpar__st_type_name(value), value->position);
    if (!value->is_integer || r->header[value->position] == '-') {
        const char *text = r->header + value->position; /* ends: at least the object's '}' follows */
        size_t length = strspn(text, "+-.0123456789eE");
        return llmpar_error_set(r->error, LLMPAR_ERR_FORMAT, "%s: tensor \"%.200s\": %s[%zu] = %.*s, expected a non-negative integer below 2^63 (header byte %zu)",
                                r->path, r->tensor, field, index, length > 40 ? 40 : (int)length, text, value->position);
    }
    *out = value->integer;
    return LLMPAR_OK;
}

static llmpar_status llmpar__st_read_dtype(const llmpar__st_reader *r, const llmpar_json *value, llmpar_dtype *out)
{
    size_t i;
    if (value->type != LLMPAR_JSON_STRING)
        return llmpar_error_set(r->error, LLMPAR_ERR_FORMAT, "%s: tensor \"%.200s\": dtype is %s, expected a string (header byte %zu)",
                                r->path, r->tensor, llmpar__st_type_name(value), value->position);
    for (i = 0; i < LLMPAR__ST_DTYPES; i++) {
        if (strlen(llmpar__st_dtypes[i].name) != value->length || memcmp(llmpar__st_dtypes[i].name, value->string, value->length)) continue;
        *out = llmpar__st_dtypes[i].dtype;
        if (*out != LLMPAR_DTYPE_DEFAULT) return LLMPAR_OK;
        return llmpar_error_set(r->error, LLMPAR_ERR_UNSUPPORTED, "%s: tensor \"%.200s\": dtype %s is not supported, expected %s (header byte %zu)",
                                r->path, r->tensor, llmpar__st_dtypes[i].name, llmpar__st_supported, value->position);
    }
    return llmpar_error_set(r->error, LLMPAR_ERR_FORMAT, "%s: tensor \"%.200s\": unknown dtype \"%.60s\", expected %s (header byte %zu)",
                            r->path, r->tensor, value->string, llmpar__st_supported, value->position);
}

static llmpar_status llmpar__st_read_shape(const llmpar__st_reader *r, const llmpar_json *value, llmpar_safetensor *out, size_t *bytes)
{
    const llmpar_json *extent;
    size_t count = llmpar_dtype_size(out->dtype), i = 0;
    llmpar_status status;
    if (value->type != LLMPAR_JSON_ARRAY)
        return llmpar_error_set(r->error, LLMPAR_ERR_FORMAT, "%s: tensor \"%.200s\": shape is %s, expected an array (header byte %zu)",
                                r->path, r->tensor, llmpar__st_type_name(value), value->position);
    if (value->length > LLMPAR__ST_MAX_DIMS)
        return llmpar_error_set(r->error, LLMPAR_ERR_UNSUPPORTED, "%s: tensor \"%.200s\": shape has %zu dims, at most %d are supported (header byte %zu)",
                                r->path, r->tensor, value->length, LLMPAR__ST_MAX_DIMS, value->position);
    /* The product is taken in the reference's order: a zero extent does not excuse an overflow before it. */
    for (extent = value->child; extent; extent = extent->next, i++) {
        status = llmpar__st_extent(r, "shape", i, extent, &out->shape[i]);
        if (status) return status;
        if (!llmpar_size_mul(count, (size_t)out->shape[i], &count))
            return llmpar_error_set(r->error, LLMPAR_ERR_OVERFLOW, "%s: tensor \"%.200s\": the product of the shape overflows at shape[%zu] = %lld (header byte %zu)",
                                    r->path, r->tensor, i, (long long)out->shape[i], extent->position);
    }
    out->dims = (int32_t)value->length;
    *bytes = count;
    return LLMPAR_OK;
}

/* Leaves out->begin relative to the data. */
static llmpar_status llmpar__st_read_offsets(const llmpar__st_reader *r, const llmpar_json *value, size_t bytes, llmpar_safetensor *out)
{
    int64_t begin = 0, end = 0;
    llmpar_status status;
    if (value->type != LLMPAR_JSON_ARRAY || value->length != 2)
        return llmpar_error_set(r->error, LLMPAR_ERR_FORMAT, "%s: tensor \"%.200s\": data_offsets is %s of length %zu, expected an array of 2 (header byte %zu)",
                                r->path, r->tensor, llmpar__st_type_name(value), value->type == LLMPAR_JSON_ARRAY || value->type == LLMPAR_JSON_OBJECT ? value->length : 0, value->position);
    status = llmpar__st_extent(r, "data_offsets", 0, value->child, &begin);
    if (!status) status = llmpar__st_extent(r, "data_offsets", 1, value->child->next, &end);
    if (status) return status;
    if (end < begin)
        return llmpar_error_set(r->error, LLMPAR_ERR_FORMAT, "%s: tensor \"%.200s\": data_offsets [%lld, %lld] end before they begin (header byte %zu)",
                                r->path, r->tensor, (long long)begin, (long long)end, value->position);
    if ((uint64_t)end > (uint64_t)r->data_bytes)
        return llmpar_error_set(r->error, LLMPAR_ERR_FORMAT, "%s: tensor \"%.200s\": data_offsets [%lld, %lld] reach past the end of the file, which has %zu bytes of data (header byte %zu)",
                                r->path, r->tensor, (long long)begin, (long long)end, r->data_bytes, value->position);
    if ((uint64_t)(end - begin) != (uint64_t)bytes)
        return llmpar_error_set(r->error, LLMPAR_ERR_FORMAT, "%s: tensor \"%.200s\": dtype and shape need %zu bytes, data_offsets [%lld, %lld] give %lld (header byte %zu)",
                                r->path, r->tensor, bytes, (long long)begin, (long long)end, (long long)(end - begin), value->position);
    out->begin = (size_t)begin;
    out->bytes = bytes;
    return LLMPAR_OK;
}

static llmpar_status llmpar__st_read_tensor(llmpar__st_reader *r, const llmpar_json *entry, llmpar_safetensor *out)
{
    const llmpar_json *member, *dtype = llmpar_json_get(entry, "dtype"), *shape = llmpar_json_get(entry, "shape"), *offsets = llmpar_json_get(entry, "data_offsets");
    size_t bytes = 0;
    llmpar_status status;
    if (strlen(entry->key) != entry->key_length)
        return llmpar_error_set(r->error, LLMPAR_ERR_FORMAT, "%s: tensor \"%.200s\": the name holds a NUL byte (header byte %zu)", r->path, entry->key, entry->position);
    if (entry->type != LLMPAR_JSON_OBJECT)
        return llmpar_error_set(r->error, LLMPAR_ERR_FORMAT, "%s: tensor \"%.200s\" is %s, expected an object with dtype, shape and data_offsets (header byte %zu)",
                                r->path, r->tensor, llmpar__st_type_name(entry), entry->position);
    if (!dtype || !shape || !offsets)
        return llmpar_error_set(r->error, LLMPAR_ERR_FORMAT, "%s: tensor \"%.200s\": %s is missing (header byte %zu)",
                                r->path, r->tensor, !dtype ? "dtype" : !shape ? "shape" : "data_offsets", entry->position);
    for (member = entry->child; member; member = member->next)
        if (member != dtype && member != shape && member != offsets)
            return llmpar_error_set(r->error, LLMPAR_ERR_FORMAT, "%s: tensor \"%.200s\": unknown field \"%.60s\", expected dtype, shape and data_offsets (header byte %zu)",
                                    r->path, r->tensor, member->key, member->position);
    status = llmpar__st_read_dtype(r, dtype, &out->dtype);
    if (!status) status = llmpar__st_read_shape(r, shape, out, &bytes);
    if (!status) status = llmpar__st_read_offsets(r, offsets, bytes, out);
    return status;
}

static llmpar_status llmpar__st_check_metadata(const llmpar__st_reader *r, const llmpar_json *metadata)
{
    const llmpar_json *member;
    if (metadata->type != LLMPAR_JSON_OBJECT)
        return llmpar_error_set(r->error, LLMPAR_ERR_FORMAT, "%s: __metadata__ is %s, expected an object of strings (header byte %zu)",
                                r->path, llmpar__st_type_name(metadata), metadata->position);
    for (member = metadata->child; member; member = member->next)
        if (member->type != LLMPAR_JSON_STRING)
            return llmpar_error_set(r->error, LLMPAR_ERR_FORMAT, "%s: __metadata__ \"%.100s\" is %s, expected a string (header byte %zu)",
                                    r->path, member->key, llmpar__st_type_name(member), member->position);
    return LLMPAR_OK;
}

/* Fills s->tensors and s->names from the parsed header; begin is still relative. */
static llmpar_status llmpar__st_read_header(llmpar__st_file *s, llmpar__st_reader *r, const llmpar_json *root)
{
    const llmpar_json *entry;
    size_t count = 0, name_bytes = 0, at = 0;
    llmpar_status status = LLMPAR_OK;
    for (entry = root->child; entry && !status; entry = entry->next) {
        if (!strcmp(entry->key, "__metadata__") && entry->key_length == 12) {
            status = llmpar__st_check_metadata(r, entry);
            continue;
        }
        count++;
        name_bytes += entry->key_length + 1; /* each byte stands in a header of at most 10^8 */
    }
    if (status) return status;
    s->tensors = (llmpar_safetensor *)llmpar_heap_zalloc(s->heap, count, sizeof *s->tensors);
    s->names = (char *)llmpar_heap_alloc(s->heap, name_bytes, 1);
    if (!s->tensors || !s->names) return llmpar_error_set(r->error, LLMPAR_ERR_MEMORY, "%s: out of memory for %zu tensor names", r->path, count);
    for (entry = root->child; entry; entry = entry->next) {
        llmpar_safetensor *tensor = &s->tensors[s->file.count];
        if (!strcmp(entry->key, "__metadata__") && entry->key_length == 12) continue;
        r->tensor = entry->key;
        status = llmpar__st_read_tensor(r, entry, tensor);
        if (status) return status;
        memcpy(s->names + at, entry->key, entry->key_length + 1);
        tensor->name = s->names + at;
        at += entry->key_length + 1;
        s->file.count++;
    }
    return LLMPAR_OK;
}

/* Every byte of the data belongs to exactly one tensor. Makes `begin` absolute. */
static llmpar_status llmpar__st_check_cover(llmpar__st_file *s, const llmpar__st_reader *r, size_t data_at)
{
    size_t reached = 0;
    int32_t i;
    llmpar__st_sort(s->tensors, (size_t)s->file.count, llmpar__st_by_begin);
    for (i = 0; i < s->file.count; i++) {
        llmpar_safetensor *tensor = &s->tensors[i];
        if (tensor->begin > reached)
            return llmpar_error_set(r->error, LLMPAR_ERR_FORMAT, "%s: tensor \"%.200s\" begins at data byte %zu, expected %zu: a gap of %zu bytes before it (file byte %zu)",
                                    r->path, tensor->name, tensor->begin, reached, tensor->begin - reached, data_at + reached);
        if (tensor->begin < reached)
            return llmpar_error_set(r->error, LLMPAR_ERR_FORMAT, "%s: tensor \"%.200s\" begins at data byte %zu, expected %zu: it overlaps tensor \"%.200s\" (file byte %zu)",
                                    r->path, tensor->name, tensor->begin, reached, s->tensors[i - 1].name, data_at + tensor->begin);
        reached += tensor->bytes;
        tensor->begin += data_at;
    }
    if (reached != r->data_bytes)
        return llmpar_error_set(r->error, LLMPAR_ERR_FORMAT, "%s: %zu bytes follow the last tensor (file byte %zu)", r->path, r->data_bytes - reached, data_at + reached);
    llmpar__st_sort(s->tensors, (size_t)s->file.count, llmpar__st_by_name);
    return LLMPAR_OK;
}

static llmpar_status llmpar__st_parse(llmpar__st_file *s, const unsigned char *data, size_t bytes, llmpar_error *error)
{
    llmpar__st_reader r;
    llmpar_json_desc desc;
    llmpar_json *root = NULL;
    llmpar_status status;
    uint64_t length = 0;
    char name[256];
    int i;
    memset(&r, 0, sizeof r);
    memset(&desc, 0, sizeof desc);
    if (bytes < 8) return llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: the file has %zu bytes, expected at least 8 for the header length", s->path, bytes);
    for (i = 7; i >= 0; i--) length = length << 8 | data[i];
    if (length > LLMPAR__ST_MAX_HEADER)
        return llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: the header length is %llu, expected at most %u (file byte 0)", s->path, (unsigned long long)length, LLMPAR__ST_MAX_HEADER);
    if (length > bytes - 8)
        return llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: the header length is %llu, but only %zu bytes follow it: the file is truncated (file byte 0)",
                                s->path, (unsigned long long)length, bytes - 8);
    if (length == 0 || data[8] != '{')
        return llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: the header does not begin with '{' (file byte 8)", s->path);
    snprintf(name, sizeof name, "%.200s: header", s->path);
    desc.name = name;
    desc.unique_keys = 1;
    status = llmpar_json_parse(s->heap, (const char *)data + 8, (size_t)length, &desc, &root, error);
    if (status) return status;
    r.path = s->path;
    r.header = (const char *)data + 8;
    r.data_bytes = bytes - 8 - (size_t)length;
    r.error = error;
    status = llmpar__st_read_header(s, &r, root);
    llmpar_json_destroy(s->heap, root);
    if (!status) status = llmpar__st_check_cover(s, &r, 8 + (size_t)length);
    if (status) return status;
    s->file.tensor = s->tensors;
    s->file.data = data;
    s->file.path = s->path;
    return LLMPAR_OK;
}

/* An empty file object with its path, or NULL. */
static llmpar__st_file *llmpar__st_create(llmpar_heap *heap, const char *path, llmpar_error *error)
{
    llmpar__st_file *s = (llmpar__st_file *)llmpar_heap_zalloc(heap, 1, sizeof *s);
    if (s) {
        s->heap = heap;
        s->file.state = s;
        s->path = llmpar_heap_strdup(heap, path);
        if (s->path) return s;
        llmpar_heap_free(heap, s);
    }
    llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory", path);
    return NULL;
}

LLMPAR_DEF void llmpar_safetensors_close(llmpar_safetensors *file)
{
    llmpar__st_file *s;
    llmpar_heap *heap;
    if (!file) return;
    s = (llmpar__st_file *)file->state;
    heap = s->heap;
    llmpar_file_unmap(&s->mapped);
    llmpar_heap_free(heap, s->tensors);
    llmpar_heap_free(heap, s->names);
    llmpar_heap_free(heap, s->path);
    llmpar_heap_free(heap, s);
}

LLMPAR_DEF llmpar_status llmpar_safetensors_open(llmpar_heap *heap, const char *path, llmpar_safetensors **out, llmpar_error *error)
{
    llmpar__st_file *s;
    llmpar_status status;
    *out = NULL;
    s = llmpar__st_create(heap, path, error);
    if (!s) return LLMPAR_ERR_MEMORY;
    status = llmpar_file_map(path, &s->mapped, error);
    if (!status) status = llmpar__st_parse(s, s->mapped.data, s->mapped.bytes, error);
    if (status) {
        llmpar_safetensors_close(&s->file);
        return status;
    }
    *out = &s->file;
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_safetensors_open_memory(llmpar_heap *heap, const void *data, size_t bytes, const char *name, llmpar_safetensors **out, llmpar_error *error)
{
    llmpar__st_file *s;
    llmpar_status status;
    *out = NULL;
    s = llmpar__st_create(heap, name, error);
    if (!s) return LLMPAR_ERR_MEMORY;
    status = llmpar__st_parse(s, (const unsigned char *)data, bytes, error);
    if (status) {
        llmpar_safetensors_close(&s->file);
        return status;
    }
    *out = &s->file;
    return LLMPAR_OK;
}

LLMPAR_DEF const llmpar_safetensor *llmpar_safetensors_find(const llmpar_safetensors *file, const char *name)
{
    int32_t low = 0, high = file->count;
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        int order = strcmp(name, file->tensor[middle].name);
        if (order == 0) return &file->tensor[middle];
        if (order < 0) high = middle;
        else low = middle + 1;
    }
    return NULL;
}

/* ---- writing ---- */

struct llmpar_safetensors_writer {
    llmpar_heap *heap;
    llmpar_writer *writer;
    char *path;
    size_t expected, written; /* bytes of data */
};

/* The dtype's name in the format, NULL if it is not a stored type. */
static const char *llmpar__st_dtype_name(llmpar_dtype dtype)
{
    size_t i;
    for (i = 0; i < LLMPAR__ST_DTYPES; i++)
        if (dtype != LLMPAR_DTYPE_DEFAULT && llmpar__st_dtypes[i].dtype == dtype) return llmpar__st_dtypes[i].name;
    return NULL;
}

/* A text that grows; with text == NULL it only counts. */
typedef struct llmpar__st_text { char *text; size_t used, capacity; } llmpar__st_text;

static void llmpar__st_put(llmpar__st_text *t, const char *part)
{
    size_t length = strlen(part);
    if (t->text) memcpy(t->text + t->used, part, length);
    t->used += length;
}

static void llmpar__st_put_number(llmpar__st_text *t, uint64_t value)
{
    char digits[24];
    snprintf(digits, sizeof digits, "%llu", (unsigned long long)value);
    llmpar__st_put(t, digits);
}

static void llmpar__st_put_string(llmpar__st_text *t, const char *string)
{
    size_t length = strlen(string);
    if (t->text) t->used += llmpar_json_escape(string, length, t->text + t->used, t->capacity - t->used);
    else t->used += llmpar_json_escape(string, length, NULL, 0);
}

/* The header's JSON with its padding. The shapes have been checked. */
static void llmpar__st_put_header(llmpar__st_text *t, const llmpar_safetensor *tensors, int32_t count)
{
    uint64_t at = 0;
    int32_t i, d;
    llmpar__st_put(t, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (i = 0; i < count; i++) {
        uint64_t bytes = llmpar_dtype_size(tensors[i].dtype);
        llmpar__st_put(t, ",");
        llmpar__st_put_string(t, tensors[i].name);
        llmpar__st_put(t, ":{\"dtype\":\"");
        llmpar__st_put(t, llmpar__st_dtype_name(tensors[i].dtype));
        llmpar__st_put(t, "\",\"shape\":[");
        for (d = 0; d < tensors[i].dims; d++) {
            if (d) llmpar__st_put(t, ",");
            llmpar__st_put_number(t, (uint64_t)tensors[i].shape[d]);
            bytes *= (uint64_t)tensors[i].shape[d];
        }
        llmpar__st_put(t, "],\"data_offsets\":[");
        llmpar__st_put_number(t, at);
        llmpar__st_put(t, ",");
        at += bytes;
        llmpar__st_put_number(t, at);
        llmpar__st_put(t, "]}");
    }
    llmpar__st_put(t, "}");
    while (t->used % 8) llmpar__st_put(t, " ");
}

/* Everything the reader would refuse, before a file is created. *total: bytes of data. */
static llmpar_status llmpar__st_check_tensors(const char *path, const llmpar_safetensor *tensors, int32_t count, size_t *total, llmpar_error *error)
{
    int32_t i, d;
    *total = 0;
    if (count < 0) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: tensor count = %d, expected at least 0", path, (int)count);
    for (i = 0; i < count; i++) {
        const llmpar_safetensor *tensor = &tensors[i];
        size_t bytes = llmpar_dtype_size(tensor->dtype);
        int64_t elements;
        if (!tensor->name || !strcmp(tensor->name, "__metadata__"))
            return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: tensor %d: name %s, expected another", path, (int)i, tensor->name ? "__metadata__ is reserved" : "is NULL");
        if (!llmpar__st_dtype_name(tensor->dtype))
            return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: tensor \"%.200s\": dtype %d is no stored type, expected %s", path, tensor->name, (int)tensor->dtype, llmpar__st_supported);
        if (tensor->dims < 0 || tensor->dims > LLMPAR__ST_MAX_DIMS)
            return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: tensor \"%.200s\": %d dims, expected 0 to %d", path, tensor->name, (int)tensor->dims, LLMPAR__ST_MAX_DIMS);
        for (d = 0; d < tensor->dims; d++)
            if (tensor->shape[d] < 0)
                return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: tensor \"%.200s\": shape[%d] = %lld, expected at least 0", path, tensor->name, (int)d, (long long)tensor->shape[d]);
        if (!llmpar_extent_product(tensor->shape, tensor->dims, &elements) || !llmpar_size_mul(bytes, (size_t)elements, &bytes) || !llmpar_size_add(*total, bytes, total))
            return llmpar_error_set(error, LLMPAR_ERR_OVERFLOW, "%s: tensor \"%.200s\": its size, or that of the whole file, overflows", path, tensor->name);
    }
    return LLMPAR_OK;
}

/* The reader refuses a duplicate name, so the writer must not make one. */
static llmpar_status llmpar__st_check_names(llmpar_heap *heap, const char *path, const llmpar_safetensor *tensors, int32_t count, llmpar_error *error)
{
    llmpar_safetensor *sorted = (llmpar_safetensor *)llmpar_heap_alloc(heap, (size_t)count, sizeof *sorted);
    llmpar_status status = LLMPAR_OK;
    int32_t i;
    if (!sorted) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory for %d tensor names", path, (int)count);
    if (count) memcpy(sorted, tensors, (size_t)count * sizeof *sorted);
    llmpar__st_sort(sorted, (size_t)count, llmpar__st_by_name);
    for (i = 1; i < count && !status; i++)
        if (!strcmp(sorted[i - 1].name, sorted[i].name))
            status = llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: tensor \"%.200s\" is declared twice", path, sorted[i].name);
    llmpar_heap_free(heap, sorted);
    return status;
}

LLMPAR_DEF llmpar_status llmpar_safetensors_writer_open(llmpar_heap *heap, const char *path, const llmpar_safetensor *tensors, int32_t count, llmpar_safetensors_writer **out, llmpar_error *error)
{
    llmpar_safetensors_writer *w;
    llmpar__st_text header;
    unsigned char length[8];
    size_t total, i;
    llmpar_status status;
    *out = NULL;
    memset(&header, 0, sizeof header);
    status = llmpar__st_check_tensors(path, tensors, count, &total, error);
    if (!status) status = llmpar__st_check_names(heap, path, tensors, count, error);
    if (status) return status;
    llmpar__st_put_header(&header, tensors, count);
    if (header.used > LLMPAR__ST_MAX_HEADER)
        return llmpar_error_set(error, LLMPAR_ERR_OVERFLOW, "%s: the header needs %zu bytes, the format allows %u", path, header.used, LLMPAR__ST_MAX_HEADER);
    header.capacity = header.used + 1; /* json_escape ends its text with a NUL */
    header.used = 0;
    header.text = (char *)llmpar_heap_alloc(heap, header.capacity, 1);
    w = (llmpar_safetensors_writer *)llmpar_heap_zalloc(heap, 1, sizeof *w);
    if (w) {
        w->heap = heap;
        w->expected = total;
        w->path = llmpar_heap_strdup(heap, path);
    }
    if (!header.text || !w || !w->path) status = llmpar_error_set(error, LLMPAR_ERR_MEMORY, "%s: out of memory for a header of %zu bytes", path, header.capacity);
    if (!status) status = llmpar_writer_open(heap, path, &w->writer, error);
    if (!status) {
        llmpar__st_put_header(&header, tensors, count);
        for (i = 0; i < 8; i++) length[i] = (unsigned char)((uint64_t)header.used >> (8 * i) & 0xFF);
        status = llmpar_writer_write(w->writer, length, sizeof length, error);
    }
    if (!status) status = llmpar_writer_write(w->writer, header.text, header.used, error);
    llmpar_heap_free(heap, header.text);
    if (status) {
        llmpar_safetensors_writer_abandon(w);
        return status;
    }
    *out = w;
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_safetensors_writer_write(llmpar_safetensors_writer *writer, const void *data, size_t bytes, llmpar_error *error)
{
    llmpar_status status;
    if (bytes > writer->expected - writer->written)
        return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: %zu bytes after %zu of %zu declared: too many", writer->path, bytes, writer->written, writer->expected);
    status = llmpar_writer_write(writer->writer, data, bytes, error);
    if (!status) writer->written += bytes;
    return status;
}

LLMPAR_DEF llmpar_status llmpar_safetensors_writer_commit(llmpar_safetensors_writer *writer, llmpar_error *error)
{
    llmpar_status status;
    if (writer->written != writer->expected)
        status = llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: %zu bytes of data were written, expected %zu", writer->path, writer->written, writer->expected);
    else {
        llmpar_writer *inner = writer->writer;
        writer->writer = NULL;
        status = llmpar_writer_commit(inner, error);
    }
    llmpar_safetensors_writer_abandon(writer);
    return status;
}

LLMPAR_DEF void llmpar_safetensors_writer_abandon(llmpar_safetensors_writer *writer)
{
    llmpar_heap *heap;
    if (!writer) return;
    heap = writer->heap;
    llmpar_writer_abandon(writer->writer);
    llmpar_heap_free(heap, writer->path);
    llmpar_heap_free(heap, writer);
}

#undef LLMPAR__ST_MAX_HEADER
#undef LLMPAR__ST_MAX_DIMS
#undef LLMPAR__ST_DTYPES

#pragma GCC diagnostic pop

#if defined(__clang__) && defined(__x86_64__)
#pragma float_control(pop)
#elif defined(__clang__)
#pragma STDC FP_CONTRACT DEFAULT
#else
#pragma GCC pop_options
#endif

#endif /* LLMPAR_IMPLEMENTATION */

/*
MIT License

Copyright (c) 2026 llmpar authors

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
*/
