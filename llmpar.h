/* GENERATED from src/: edit there, then run make gen */
#ifndef LLMPAR__TEMPLATE
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

    The ranks are threads of your process, or processes of mpirun (LLMPAR_USE_MPI below). Every call that takes a ctx, or an object made from one, is collective -
    all ranks make it, in the same order - unless its comment says local.

OPTIONS (define before the #include; where not said otherwise, in the file with LLMPAR_IMPLEMENTATION)

    LLMPAR_IMPLEMENTATION   this file gets the functions
    LLMPAR_STATIC           every function is static: the library is private to this file (with LLMPAR_NO_... gcc's
                            -Wunused-function then names the functions that are left out)
    LLMPAR_API              storage class and attributes of the public declarations, default `extern`
                            (everywhere alike, e.g. __declspec(dllexport), __attribute__((visibility("default"))) )
    LLMPAR_HEADER           the file's name, default "llmpar.h": the implementation includes this file again for each
                            vector width; define it if you rename the file
    LLMPAR_USE_MPI          adds ranks that are MPI processes, on one machine or many: compile this file with mpicc, start the program with
                            `mpirun -n 4`, and llmpar_launch makes the processes its ranks, with the same bits. Nothing else changes;
                            declarations need no mpi.h. Without mpirun the ranks are threads as before
    LLMPAR_NO_LLAMA         leaves out the implementation of the Llama model and of everything built on it
    LLMPAR_NO_TEXT          ... of tokenizer and token data
    LLMPAR_NO_IO            ... of files: safetensors, Hugging Face directories (with it goes what needs them)
    LLMPAR_NO_SIMD          ... of the vector kernels: portable C alone
                            (LLMPAR_NO_... never removes a declaration: a call of what is left out fails to link)

    Environment: LLMPAR_CPU=portable|avx2|avx512 forces a dispatch level. Bits may differ between levels, never between
    meshes of one level.

llmpar DOES NOT

    - print, exit or abort: every fallible call returns llmpar_status, and the text of the error names rank, mesh
      coordinate, tensor, expected and got. (llmpar_launch and the trainer write to callbacks; their default is
      stderr and stdout.)
    - keep mutable globals, or take memory behind your back: all of it goes through your llmpar_allocator. (Two exceptions
      are malloc's, because they outlive a rank or belong to another thread: records that llmpar_launch keeps for a
      failure report, and over MPI the place where messages to a failed rank are dropped.)
    - run under -ffast-math or -Ofast: equal bits need the order of sums that the source has. Contraction of a*b+c is
      switched off for this header alone; your own code keeps its flags.
    - train on GPUs in this version: ranks are threads or, with LLMPAR_USE_MPI, processes on any number of machines. Whoever
      needs more brings a device table (llmpar_device) or a communicator table (llmpar_comm) of their own.
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

/* The version: the only place that states it (make install, pkg-config and CMake read these three lines). */
#define LLMPAR_VERSION_MAJOR 0
#define LLMPAR_VERSION_MINOR 1
#define LLMPAR_VERSION_PATCH 0
#define LLMPAR_VERSION_NUMBER (LLMPAR_VERSION_MAJOR * 1000000 + LLMPAR_VERSION_MINOR * 1000 + LLMPAR_VERSION_PATCH)
#define LLMPAR_VERSION LLMPAR__VERSION_TEXT(LLMPAR_VERSION_MAJOR, LLMPAR_VERSION_MINOR, LLMPAR_VERSION_PATCH) /* "0.1.0" */
#define LLMPAR__VERSION_TEXT(major, minor, patch) LLMPAR__TEXT(major) "." LLMPAR__TEXT(minor) "." LLMPAR__TEXT(patch)
#define LLMPAR__TEXT(x) #x

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
    X(ERR_TIMEOUT, 11, "no answer in time") \
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
    char text[1600];      /* one line, no newline at the end */
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
   Both are called from the rank's own thread only. Zero-initialised = malloc/free;
   alloc without free = nothing is given back (a region that goes as a whole). */
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
    uint64_t fail_at;           /* test hook: the fail_at-th allocation (1 = next when calls is 0) and all later ones return NULL; 0 = never */
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
LLMPAR_API double llmpar_pow_f64(double base, double exponent); /* base >= 0, else NaN; 0 and infinite arguments as IEEE pow; relative error <= 4e-15 for results in [1e-30, 1e30] */
/* sine and cosine of x, |x| <= 1e9 (Cody-Waite with a three-part pi/2 and own polynomials): absolute error <= 2^-52.
   Beyond 1e9, infinite or NaN: both NaN. */
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
/* The sum rounded once to the nearest double, ties to even; inf/NaN as IEEE addition would give; an empty or zero sum is +0. Does not change *sum. */
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

/* name may be NULL, which is the empty name. Initialisation uses step = sample = 0 (docs/exact.md). */
LLMPAR_API llmpar_rng llmpar_rng_key(uint64_t seed, uint32_t purpose, const char *name, uint64_t step, uint64_t sample);
/* The four 32-bit words at `position`. */
LLMPAR_API void llmpar_rng_words(const llmpar_rng *rng, uint64_t position, uint32_t words[4]);
/* Uniform in [0, 1) with 53 bits, element `index`. */
LLMPAR_API double llmpar_rng_uniform(const llmpar_rng *rng, uint64_t index);
/* Standard normal, element `index` (Box-Muller in f64 with own log and sincos). Made of the words of uniform(index) and its
   neighbour: one stream serves one of the two. */
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
   bounded by 60 bytes a byte of text (90 if malformed), about 10 in usual texts. */
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
   Every chain starts from +0, so a chain of additions is never -0 and absent terms may be left out; a chain of fused products can underflow to -0, so the product adds the +0 of an empty piece. Zero-size calls are fine and do nothing (a gemm with k = 0 stores +0 unless accumulate). */
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

    /* memory; bytes may be 0. free takes NULL, and waits for what was enqueued before it on any stream: the arena, which gives idle blocks back when memory is short, knows no streams. */
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
     broadcast       send on root, recv elsewhere: [blocks][count]   (root's recv may be NULL or send; elsewhere send is not looked at)
     all_to_all      send[blocks][ranks][count]    recv[blocks][ranks][count]
     send / recv     [blocks][count] to / from rank `peer`
   In place: all_gather with send == recv + rank*count (blocks 1); reduce_scatter with recv == send + rank*count (blocks 1); all_reduce and broadcast with recv == send. Other overlaps are errors of the caller. */
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
    /* Kept by the wrappers (record.h). A table that ends before `group`, or has no record, works without being recorded. */
    const struct llmpar_call *call;  /* during a slot: the call of the wrapper, for messages (llmpar_call_describe) */
    struct llmpar_record *record;    /* the rank's; set by llmpar_record_attach, NULL: none */
    int32_t group;                   /* this communicator's number there */
    int32_t unchecked;               /* 1: the ranks' fingerprints are not compared (check level 0); inherited by split */
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
/* ==== src/tables/record.h ==== */
/* record: what a collective is, said the same way by every rank and every transport: a fingerprint to compare before data moves, a text to report, and a ring of each
   rank's last collectives (all of its communicators) that can be dumped as JSON with the field names of PyTorch's Flight Recorder.

   The wrappers of comm.h describe each call (comm->call), enter it in the record and mark it, on its stream, as started and as completed. A communicator
   attaches itself to its rank's record, compares fingerprints when its ranks meet, and reports with the functions below. One rank alone is not recorded: it waits for nobody. */
#ifndef LLMPAR_RECORD_H
#define LLMPAR_RECORD_H


#define LLMPAR_RECORD_ENTRIES 256

typedef enum llmpar_call_op {
    LLMPAR_CALL_NONE = 0,
    LLMPAR_CALL_BARRIER,
    LLMPAR_CALL_ALL_GATHER,
    LLMPAR_CALL_REDUCE_SCATTER,
    LLMPAR_CALL_ALL_REDUCE,
    LLMPAR_CALL_BROADCAST,
    LLMPAR_CALL_ALL_TO_ALL,
    LLMPAR_CALL_SEND,
    LLMPAR_CALL_RECV,
    LLMPAR_CALL_SPLIT
} llmpar_call_op;

/* One rank's side of one collective. No pointers and no gaps: ranks of one build may send it as bytes. Unused fields and the ends of texts are zero. */
typedef struct llmpar_call {
    uint64_t count, blocks;      /* as in llmpar_collective, blocks >= 1; both 0 for barrier and split */
    uint64_t number;             /* 1, 2, ..: of the collectives on this communicator, alike on its ranks; of send and recv: of this rank's messages there; 0 without a record */
    uint64_t tag_bits;           /* of the whole tag */
    int32_t op, dtype, reduce;   /* llmpar_call_op, llmpar_dtype, llmpar_reduce_op */
    int32_t root, peer;          /* as in llmpar_collective */
    int32_t member, members;     /* this rank's index in the communicator, and their number */
    int32_t rank;                /* this rank in the world; -1 without a record */
    char axis[24], where[48];    /* of the communicator; of the rank: "dp_shard=1 tp=0" */
    char tag[64];                /* cut */
} llmpar_call;

/* Where a rank is. Plain data like llmpar_call. */
typedef enum llmpar_position_state { LLMPAR_POSITION_OUTSIDE = 0, LLMPAR_POSITION_INSIDE, LLMPAR_POSITION_RETURNED, LLMPAR_POSITION_UNKNOWN } llmpar_position_state;
typedef struct llmpar_position {
    int32_t rank, state;         /* of the world; llmpar_position_state */
    uint64_t time_ns;            /* when its record last changed, since 1970; 0: never */
    char where[48];
    llmpar_call now, last;       /* the collective it is in, and the last one it completed; op NONE: none */
} llmpar_position;
typedef void (*llmpar_position_fn)(void *user, int32_t rank, llmpar_position *out);

typedef struct llmpar_record llmpar_record; /* one rank's; written by its thread, read by any (a short lock) */

/* "all_gather" and so on. */
LLMPAR_API const char *llmpar_call_op_name(llmpar_call_op op);
/* For slots: what this one is asked for. Its arguments, with number and rank of the call that the wrapper shows in comm->call: a slot may be called by another slot, with arguments of its own. Local. */
LLMPAR_API void llmpar_call_describe(const llmpar_comm *comm, llmpar_call_op op, const llmpar_collective *call, llmpar_call *out);
/* Equal if and only if (up to chance) the calls belong together: op, dtype, count, blocks, root, reduce, axis, tag, number; of a message both ends instead of op, peer and number. Local. */
LLMPAR_API uint64_t llmpar_call_fingerprint(const llmpar_call *call);
/* `all_reduce sum f32[2 x 100] "layers.1/x" (call 17 on tp)`. Cut at capacity; returns the bytes needed without the NUL, as all printing functions here. Local. */
LLMPAR_API size_t llmpar_call_print(const llmpar_call *call, char *text, size_t capacity);
/* `the ranks of tp disagree in op and count: rank 0 (tp=0): all_gather ..; rank 1 (tp=1): reduce_scatter ..`. Both sides say the same when both pass (lower rank, higher rank). Local. */
LLMPAR_API size_t llmpar_call_mismatch(const llmpar_call *a, const llmpar_call *b, char *text, size_t capacity);
/* `rank 1 (tp=1): outside, last completed ..; ranks 0 2: in all_reduce .., last completed ..`: every rank once, ranks of equal state together, who is in no collective first. Local. */
LLMPAR_API size_t llmpar_position_print(llmpar_position_fn get, void *user, int32_t ranks, char *text, size_t capacity);

/* timeout_ms: the deadline, for the dump; 0 none. The rank's heap; LLMPAR_ERR_MEMORY. Local, as all of these. */
LLMPAR_API llmpar_status llmpar_record_create(llmpar_heap *heap, int32_t rank, uint64_t timeout_ms, llmpar_record **out);
LLMPAR_API void llmpar_record_destroy(llmpar_record *record); /* NULL is fine; after the communicators attached to it */
/* From now on the wrappers enter comm's calls. world_rank[comm->ranks] (copied): its members. Communicators of equal axis and members are one group with one count of calls. LLMPAR_ERR_MEMORY. */
LLMPAR_API llmpar_status llmpar_record_attach(llmpar_record *record, llmpar_comm *comm, const int32_t *world_rank);
/* For the wrappers: enters *call (sets number and rank), state "scheduled"; returns its id for the marks. group: comm->group. */
LLMPAR_API uint64_t llmpar_record_begin(llmpar_record *record, int32_t group, llmpar_call *call);
LLMPAR_API void llmpar_record_started(llmpar_record *record, uint64_t id);
LLMPAR_API void llmpar_record_completed(llmpar_record *record, uint64_t id);
/* From any thread. Never LLMPAR_POSITION_RETURNED: that the communicator knows. */
LLMPAR_API void llmpar_record_position(llmpar_record *record, llmpar_position *out);
/* The dump: version, pg_config, pg_status, entries (oldest first; the tag stands in `frames`), and this rank with its mesh coordinate. From any thread. */
LLMPAR_API size_t llmpar_record_json(llmpar_record *record, char *text, size_t capacity);

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
    int32_t unchecked;     /* 1: the ranks do not compare their calls */
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
/* Waits for that, on the launching thread: 1. Or 0 if the rank is stuck: the job has failed, which wakes every rank that waits in a collective, and this one has shown no sign of life (a collective
   begun or ended) for `deadline` seconds and for 5 seconds after the failure; its memory must then stay. Never 0 without a deadline, or in lockstep. */
LLMPAR_API int llmpar_threads_rank_wait(llmpar_threads_world *world, int32_t rank);
/* llmpar_record_json of a rank that need not be this thread's; 0 and "" if the rank has no record any more. */
LLMPAR_API size_t llmpar_threads_rank_json(llmpar_threads_world *world, int32_t rank, char *text, size_t capacity);

#endif
/* ==== src/comm/mpi.h ==== */
/* mpi: the communicator between MPI processes. Its functions exist where LLMPAR_USE_MPI is defined beside LLMPAR_IMPLEMENTATION; these declarations need no mpi.h.

   llmpar_launch does all of this by itself under mpirun. By hand, one world a process:
     llmpar_mpi_world_create -> llmpar_mpi_comm_create -> ... collectives ... -> llmpar_mpi_world_finish -> llmpar_comm_destroy -> llmpar_mpi_world_destroy
   After world_create no MPI call blocks and none is collective: Isend, Irecv and Test alone, so that a rank which fails, ends or dies is found by the others wherever they wait. */
#ifndef LLMPAR_COMM_MPI_H
#define LLMPAR_COMM_MPI_H


/* A static function that is left out would be warned of: declared extern, a call of it fails to link. */
#if defined(LLMPAR_STATIC) && !defined(LLMPAR_USE_MPI)
#define LLMPAR__MPI_API extern
#else
#define LLMPAR__MPI_API LLMPAR_API
#endif

typedef struct llmpar_mpi_world llmpar_mpi_world;

/* Alike on all processes. Zero is a default. */
typedef struct llmpar_mpi_desc {
    const void *comm;      /* address of an MPI_Comm (an intracommunicator, duplicated); default: MPI_COMM_WORLD. MPI must be initialised and not finalised */
    size_t comm_slice;     /* bytes that a reduction handles at a time and that a message has at most; default 16 MiB, at most 1 GiB. Scratch: about 1.5 of it a process, at most 2 */
    double deadline;       /* seconds a collective may wait for its peers before it reports LLMPAR_ERR_TIMEOUT with who is where; default 0 = none */
    double heartbeat;      /* seconds between two signs of life; default 0.5 */
    double silence;        /* seconds without one after which a rank is given up (killed, stopped, unreachable); default 5 */
    int32_t unchecked;     /* 1: the ranks do not compare their calls */
    int32_t unattended;    /* 1: no helper thread; for programs that call MPI themselves while ranks run, which beside a helper needs MPI_THREAD_MULTIPLE. Silent ranks are then only found by `deadline` */
    int32_t direct;        /* up to this many ranks, a collective begins with a message from each to each, which also carries small data; beyond, with log2 n rounds. Default 16 */
} llmpar_mpi_desc;

/* Collective over desc->comm, and may block. heap: the rank's, borrowed; all memory is taken from it here and in collectives, on the caller's thread. desc may be NULL.
   Where MPI provides MPI_THREAD_SERIALIZED on all ranks a helper thread sends signs of life; else silent ranks are only found by `deadline`. One thread calls MPI at a time.
   Errors: LLMPAR_ERR_CONFIG (MPI not initialised, already finalised, an intercommunicator), LLMPAR_ERR_ARGUMENT, LLMPAR_ERR_MEMORY; the same on every rank. */
LLMPAR__MPI_API llmpar_status llmpar_mpi_world_create(llmpar_heap *heap, const llmpar_mpi_desc *desc, llmpar_mpi_world **out, llmpar_error *error);
LLMPAR__MPI_API int32_t llmpar_mpi_world_rank(const llmpar_mpi_world *world);  /* local */
LLMPAR__MPI_API int32_t llmpar_mpi_world_ranks(const llmpar_mpi_world *world); /* local */
/* 1 where MPI provides MPI_THREAD_SERIALIZED on all ranks. Local. */
LLMPAR__MPI_API int llmpar_mpi_world_serialized(const llmpar_mpi_world *world);
/* The communicator of all ranks; its calls are in the world's record, as those of its splits. error: where its failures leave their text; its `where` (the mesh coordinate) is shown to the other ranks. Local. */
LLMPAR__MPI_API llmpar_status llmpar_mpi_comm_create(llmpar_mpi_world *world, llmpar_device *device, llmpar_error *error, llmpar_comm **out);
/* Makes *error the job's failure, if it is the first, and tells all ranks. Local. */
LLMPAR__MPI_API void llmpar_mpi_world_fail(llmpar_mpi_world *world, const llmpar_error *error);
/* The job's failure as far as this rank knows, status OK if none. Local. */
LLMPAR__MPI_API void llmpar_mpi_world_error(llmpar_mpi_world *world, llmpar_error *out);
/* This rank is done. Waits until all are; after a failure at most `grace` seconds (0: 3). *root (may be NULL): the job's root error, the same on all ranks that end in order, else status OK.
   1: all ranks have come here and MPI may be finalised; 0: some rank is dead or stuck, and only MPI_Abort ends the job. */
LLMPAR__MPI_API int llmpar_mpi_world_finish(llmpar_mpi_world *world, double grace, llmpar_error *root);
LLMPAR__MPI_API void llmpar_mpi_world_destroy(llmpar_mpi_world *world); /* NULL is fine; after finish */

#undef LLMPAR__MPI_API

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
   PARTIAL: every coordinate holds a contribution of the whole (of what other cuts leave); the tensor is their sum or max, in the balanced tree over the coordinate. Several are undone like cuts, the last listed first.
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
/* Picture of a checked tensor: a line per rank with its rectangle, flat range and bytes, and for 1-D/2-D a table of ranks whose rows and columns are labelled with their elements and the coordinates that
   hold them (as torch's and jax's visualize_sharding do). Cut at capacity; returns bytes needed without the NUL. Local. */
LLMPAR_API size_t llmpar_dtensor_print(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, char *text, size_t capacity);
/* The same picture as an SVG document; each cell has the id "cell-ROW-COLUMN" and data-ranks, each legend line "rank-N". A tensor of other dims, or without elements, has the legend only. Local. */
LLMPAR_API size_t llmpar_dtensor_svg(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, char *text, size_t capacity);

#endif
/* ==== src/mesh/redistribute.h ==== */
/* redistribute: a tensor from any placements to any others on the same mesh, planned as a short list of collectives. A plan is plain data, which every rank makes for itself from the same request. Where a collective
   of the table does a step exactly, it is taken; everything else is an exchange: pairs of send and recv with just the elements that are needed. Sums are trees over the coordinate of each axis, the last listed axis first.
   A target may be Partial. On an axis where `from` is Partial of the same kind contributions stay where they are (if sums and maxima are mixed: as long as their order of undoing stays); else Partial(sum) is the
   tensor at coordinate 0 and zeros (-0 of f32, f64, which changes no sum) elsewhere, and Partial(max) is the tensor at every coordinate. */
#ifndef LLMPAR_REDISTRIBUTE_H
#define LLMPAR_REDISTRIBUTE_H


/* LOCAL: every rank has what it needs. ALL_GATHER undoes the last cut, BROADCAST too where parts are uneven (one from each owner). REDUCE_SCATTER reduces and cuts evenly. ALL_TO_ALL: all pairs of ranks of an axis move
   the same number of elements. EXCHANGE: send and recv between pairs of the world; contributions go to one rank for each element, which combines them, and from there to the others. */
typedef enum llmpar_redistribute_op {
    LLMPAR_REDISTRIBUTE_LOCAL = 0, LLMPAR_REDISTRIBUTE_ALL_GATHER = 1, LLMPAR_REDISTRIBUTE_BROADCAST = 2, LLMPAR_REDISTRIBUTE_REDUCE_SCATTER = 3, LLMPAR_REDISTRIBUTE_ALL_REDUCE = 4,
    LLMPAR_REDISTRIBUTE_ALL_TO_ALL = 5, LLMPAR_REDISTRIBUTE_EXCHANGE = 6
} llmpar_redistribute_op;
typedef struct llmpar_redistribute_step {
    llmpar_redistribute_op op;
    llmpar_axis axis;       /* of the collective; not for LOCAL, EXCHANGE */
    int64_t bytes;          /* sent by all ranks together, as their communicators count */
    llmpar_dtensor result;  /* what ranks hold after the step */
} llmpar_redistribute_step;
typedef struct llmpar_redistribute_plan {
    llmpar_dtensor from, to; /* names borrowed */
    int32_t degree[LLMPAR_MESH_AXES], steps; /* steps: 1 or more */
    llmpar_redistribute_step step[2 * LLMPAR_MESH_AXES];
    int64_t bytes, bound;    /* sent by all ranks together; no plan can send less than `bound`. bytes <= 2 * bound, and bytes == bound with nothing to reduce */
    uint64_t fingerprint;    /* of the request: ranks compare it before anything moves */
} llmpar_redistribute_plan;

/* The least bytes that all ranks together send. Nothing to reduce: what each rank needs in `to` and does not hold in `from`. n contributions to reduce: for each element n-1 to bring them together and one more for each
   further rank that needs it, which is the (n-1) of a reduce-scatter and the 2(n-1) of an all-reduce. Of tensors that plan_make accepts. Local. */
LLMPAR_API int64_t llmpar_redistribute_bound(const llmpar_dtensor *from, const llmpar_dtensor *to, const int32_t degree[LLMPAR_MESH_AXES]);
/* One dtype and shape in both; Flat is the same on all ranks and has to fit on each: LLMPAR_ERR_SHAPE. LLMPAR_ERR_UNSUPPORTED: a dtype that the communicators cannot reduce. LLMPAR_ERR_OVERFLOW, LLMPAR_ERR_MESH (degrees).
   Local: no communication, no allocation; so also for meshes larger than the world. */
LLMPAR_API llmpar_status llmpar_redistribute_plan_make(const llmpar_dtensor *from, const llmpar_dtensor *to, const int32_t degree[LLMPAR_MESH_AXES], llmpar_redistribute_plan *out, llmpar_error *error);
/* A line for each step with its bytes, then their sum and the bound. Cut at capacity; returns bytes needed without the NUL. Local. */
LLMPAR_API size_t llmpar_redistribute_plan_print(const llmpar_redistribute_plan *plan, char *text, size_t capacity);
/* Elements of scratch (of the tensor's dtype) that the rank at `coordinate` needs. Local. */
LLMPAR_API int64_t llmpar_redistribute_scratch(const llmpar_redistribute_plan *plan, const int32_t coordinate[LLMPAR_MESH_AXES]);
/* out <- this rank's part in `to` of the tensor whose part in `from` is `in`: rectangles; with Flat the rank's whole flat shard, of which only the tensor's range is read or written. No overlaps; what has no elements may
   be NULL. The ranks compare their requests in a barrier first: what is wrong on one is an error on all before anything moves. Collective over the world. */
LLMPAR_API llmpar_status llmpar_redistribute(const llmpar_redistribute_plan *plan, const llmpar_mesh *mesh, llmpar_stream *stream, const void *in, void *scratch, void *out);

/* To the whole tensor, undoing cuts on dp_shard and tp one by one: as saving and looking need it. Here the ranks of one Flat's axis share a layout, others may have their own. Elements of scratch that it needs. Local. */
LLMPAR_API int64_t llmpar_dtensor_full_scratch(const llmpar_dtensor *tensor, const llmpar_mesh *mesh);
/* full[shape] <- the tensor, from every rank's part `local` (with FLAT: the rank's whole flat shard of the unit; else its rectangle). Uneven and empty parts are fine. Collective over dp_shard and tp. */
LLMPAR_API llmpar_status llmpar_dtensor_full(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, llmpar_stream *stream, const void *local, void *scratch, void *full);
/* local <- this rank's part of full (host or CPU memory): FLAT writes only its range inside the flat shard. Local. */
LLMPAR_API void llmpar_dtensor_cut(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, const void *full, void *local);

#endif

/* Chapter: tp */
/* ==== src/tp/tp.h ==== */
/* tp: tensor parallelism over one mesh axis: column- and row-parallel linear layers, sequence-parallel gather and reduce, vocab-parallel select. Shoeybi et al. 2019 (Megatron), Korthikanti et al. 2022 (sequence parallel).
   Every function enqueues on the stream it is given and works for one rank, where it is plain. Sums follow docs/exact.md: pieces of the sharded dim, balanced tree, collective.

   Shapes: N = B*T rows of all tokens; Ns = B*(T/tp) rows with sequence parallel, else N. G grains (heads, rows of F, vocabulary ids) of `grain` elements are cut over tp by llmpar_piece_begin. */
#ifndef LLMPAR_TP_H
#define LLMPAR_TP_H


typedef struct llmpar_tp {
    llmpar_ctx *ctx;          /* borrowed */
    llmpar_comm *comm;        /* borrowed; the tp axis */
    llmpar_comm *kv;          /* owned; the ranks that hold the same kv head, NULL if replicas == 1 */
    int32_t rank, ranks;
    int32_t pieces;           /* of every sharded sum over the whole axis: canon where ranks divide it, else ranks */
    int32_t replicas;         /* ranks per kv head: max(1, tp / K) */
    int32_t sequence_parallel;
} llmpar_tp;

/* canon: power of two, 0 = 8. kv_heads K: K % tp == 0 or tp % K == 0, else LLMPAR_ERR_MESH. Collective over comm. */
LLMPAR_API llmpar_status llmpar_tp_init(llmpar_ctx *ctx, llmpar_comm *comm, int32_t canon, int32_t kv_heads, int32_t sequence_parallel, llmpar_tp *out);
LLMPAR_API void llmpar_tp_destroy(llmpar_tp *tp); /* a zeroed struct is fine; local */

/* First grain of this rank, and number of grains it holds. Local. */
LLMPAR_API int64_t llmpar_tp_begin(const llmpar_tp *tp, int64_t grains);
LLMPAR_API int64_t llmpar_tp_count(const llmpar_tp *tp, int64_t grains);

/* One operand pair of a sum over a sharded dim: a[N, *] and b hold `count` grains of `grain` elements beginning at global grain `begin`; b is [D, *] (NT) or [*, D] (NN). stride: elements between rows.
   owner_of(g): global grain g of this operand belongs to the piece of query grain g * per (kv heads: per = H/K; else 1). */
typedef struct llmpar_tp_operand { const void *a, *b; int64_t lda, ldb, grain, begin, count, per; } llmpar_tp_operand;

/* out[rows, D] = this rank's partial sum: per piece of `grains` (query heads, F, vocabulary) one chain over the operands in order, then the local tree. Combine over tp with llmpar_tp_reduce. kind NT or NN. */
LLMPAR_API llmpar_status llmpar_tp_partial(const llmpar_tp *tp, llmpar_stream *stream, llmpar_gemm_kind kind, int64_t rows, int64_t dim, int64_t grains, const llmpar_tp_operand *operands, int32_t operand_count, llmpar_dtype dtype, void *out, void *workspace, size_t workspace_bytes);
/* Workspace of llmpar_tp_partial for these extents; pointers in the operands are ignored. Local. */
LLMPAR_API size_t llmpar_tp_partial_workspace(const llmpar_tp *tp, llmpar_gemm_kind kind, int64_t rows, int64_t dim, int64_t grains, const llmpar_tp_operand *operands, int32_t operand_count, llmpar_dtype dtype);

/* Column-parallel forward, and every other product that no mesh splits: out[m,n] = one chain over k. */
LLMPAR_API llmpar_status llmpar_tp_product(const llmpar_tp *tp, llmpar_stream *stream, llmpar_gemm_kind kind, int64_t m, int64_t n, int64_t k, const void *a, int64_t lda, const void *b, int64_t ldb, void *out, int64_t ldo, llmpar_dtype dtype, void *workspace, size_t workspace_bytes);
LLMPAR_API size_t llmpar_tp_product_workspace(const llmpar_tp *tp, llmpar_gemm_kind kind, int64_t m, int64_t n, int64_t k, llmpar_dtype dtype);

/* Weight gradient dw[out_dim, in_dim] = dy[N,out_dim]^T x[N,in_dim]: a chain per leaf over its tokens, tree over `leaves` leaves (leaves divides the sequences that make up rows). Needs no communication over tp. */
LLMPAR_API llmpar_status llmpar_tp_weight_gradient(const llmpar_tp *tp, llmpar_stream *stream, int64_t rows, int64_t leaves, int64_t out_dim, int64_t in_dim, const void *dy, int64_t lddy, const void *x, int64_t ldx, void *dw, llmpar_dtype dtype, void *workspace, size_t workspace_bytes);
LLMPAR_API size_t llmpar_tp_weight_gradient_workspace(const llmpar_tp *tp, int64_t rows, int64_t leaves, int64_t out_dim, int64_t in_dim, llmpar_dtype dtype);

/* Sequence parallel: full[B,T,D] <- local[B,T/tp,D]. Not called without sequence parallel. */
LLMPAR_API llmpar_status llmpar_tp_gather(const llmpar_tp *tp, llmpar_stream *stream, const char *tag, int64_t batch, int64_t t, int64_t dim, const void *local, void *full, llmpar_dtype dtype);
/* Combines partials over tp: with sequence parallel out[B,T/tp,D] (reduce-scatter), else out[B,T,D] (all-reduce; out may equal partial). One rank: copies unless equal. */
LLMPAR_API llmpar_status llmpar_tp_reduce(const llmpar_tp *tp, llmpar_stream *stream, const char *tag, int64_t batch, int64_t t, int64_t dim, const void *partial, void *out, llmpar_dtype dtype);
/* The same for rows that exactly one rank holds and all others hold as zero bits (vocab-parallel embedding): a select by integer sum, so that -0 survives. More than one rank: dim * size of dtype is a multiple of 8, else LLMPAR_ERR_SHAPE. */
LLMPAR_API llmpar_status llmpar_tp_select(const llmpar_tp *tp, llmpar_stream *stream, const char *tag, int64_t batch, int64_t t, int64_t dim, const void *part, void *out, llmpar_dtype dtype);

#endif

/* Chapter: fsdp */
/* ==== src/fsdp/unit.h ==== */
/* unit: what FSDP gathers at once: named tensors and callbacks. FSDP knows units, never a model, so anybody's network is a first-class client.

   A step runs the units in order: forward 0..n-1, backward n-1..0. Unit u's output is unit u+1's input; the first unit reads the token ids of the micro-batch, the last one
   computes the loss. A unit's forward and backward are lists of instructions themselves (compute, tensor-parallel gather, tensor-parallel reduce), so that
   tensor-parallel communication is planned, printed and overlapped like the rest. */
#ifndef LLMPAR_UNIT_H
#define LLMPAR_UNIT_H


/* One parameter. name and everything in it are copied by llmpar_fsdp_create. */
typedef struct llmpar_param {
    const char *name;                 /* Hugging Face name, unique over all units */
    int32_t dims;
    int32_t no_decay;                 /* 1: weight decay does not apply (norms, biases) */
    int64_t shape[LLMPAR_MAX_DIMS];   /* global */
    llmpar_placement tp;              /* {0} = Replicate, or Shard(dim) on LLMPAR_AXIS_TP */
    double init_std;                  /* normal(0, init_std), keyed by (seed, name, element); 0: the constant init_value */
    double init_value;
} llmpar_param;

/* The part of the step's data that one micro-batch of this rank works on. B = batch sequences of T = t tokens. */
typedef struct llmpar_micro {
    int32_t index;                /* micro-batch number, 0.. */
    int64_t batch, t;             /* local sequences, tokens each (global T) */
    int64_t leaves;               /* leaves of the batch tree in this micro-batch (docs/exact.md); divides batch */
    const int32_t *ids, *targets; /* [B,T] device memory; target < 0: not counted */
    float grad_scale;             /* what dlogits are multiplied with: loss scale / unmasked tokens of the whole step */
    int64_t *loss;                /* device, 72 limbs (base/exact_sum.h): the unit that has the loss adds its token losses here */
    double *token_loss;           /* device [B,T] or NULL */
} llmpar_micro;

/* Bytes a unit needs for one micro-batch; filled by llmpar_unit.sizes. */
typedef struct llmpar_unit_sizes {
    size_t output;     /* activations handed to the next unit; 0 for the last */
    size_t saved;      /* kept from forward to backward */
    size_t scratch;    /* used inside one forward or backward */
    size_t workspace;  /* passed to operations */
} llmpar_unit_sizes;

typedef enum llmpar_pass { LLMPAR_PASS_FORWARD = 0, LLMPAR_PASS_BACKWARD = 1, LLMPAR_PASS_EVAL = 2 } llmpar_pass;

/* Everything a callback sees. Pointers are device memory, valid until the last instruction of the pass has run. params[i] is the tp-local tensor i, row-major. */
typedef struct llmpar_unit_call {
    llmpar_ctx *ctx;
    llmpar_device *device;
    llmpar_stream *stream;              /* of the instruction that runs */
    void *user;                         /* llmpar_unit.user */
    const llmpar_micro *micro;
    llmpar_pass pass;
    llmpar_dtype dtype;                 /* of parameters, activations and gradients */
    void *const *params;                /* [param_count] */
    void *const *grads;                 /* backward: [param_count], each to be fully overwritten */
    void *const *borrowed;              /* parameters of the borrowed unit, or NULL */
    void *const *borrowed_grads;        /* backward: its gradients from this use, each to be fully overwritten */
    const void *input;                  /* previous unit's output; NULL for the first */
    void *output;                       /* forward */
    const void *doutput;                /* backward: gradient of output; NULL for the last */
    void *dinput;                       /* backward: gradient of input, to be fully overwritten; NULL for the first */
    void *saved, *scratch, *workspace;
    size_t workspace_bytes;
} llmpar_unit_call;

typedef enum llmpar_unit_op_kind { LLMPAR_COMPUTE = 0, LLMPAR_TP_GATHER = 1, LLMPAR_TP_REDUCE = 2 } llmpar_unit_op_kind;

/* One instruction of a unit's forward or backward. wait = 1 + index of an earlier instruction of the same list that must be complete (0: none); instructions of one stream run in list order anyway. COMPUTE runs on the compute
   stream, TP_* on the tp stream. */
typedef struct llmpar_unit_op {
    const char *name;                              /* "qkv + attention"; static text */
    llmpar_status (*run)(llmpar_unit_call *call);  /* enqueues on call->stream */
    llmpar_unit_op_kind kind;
    int32_t wait[2];
} llmpar_unit_op;

typedef struct llmpar_unit {
    const char *name;                 /* "layers.3" */
    const llmpar_param *params;       /* borrowed until llmpar_fsdp_create returns */
    int32_t param_count;
    int32_t borrow;                   /* 1 + index of another unit whose parameters this one reads too (tied embeddings); 0: none */
    const llmpar_unit_op *forward, *backward; /* borrowed as long as the fsdp object */
    int32_t forward_count, backward_count;
    /* Sizes for a micro-batch shape (micro's batch, t, leaves). Local. */
    llmpar_status (*sizes)(void *user, const llmpar_micro *micro, llmpar_dtype dtype, llmpar_unit_sizes *out);
    void *user;
} llmpar_unit;

#endif
/* ==== src/fsdp/schedule.h ==== */
/* schedule: what a step does, as data. A pure function turns (units, policy) into a list of instructions; validate.h proves it; the executor runs it. */
#ifndef LLMPAR_SCHEDULE_H
#define LLMPAR_SCHEDULE_H


/* GATHER u            whole parameters of unit u from the shards (all-gather over dp_shard)
   FREE u              the gathered parameters, or gradient buffer `slot` where slot >= 0
   FORWARD u m         unit u on micro-batch m
   BACKWARD u m        its gradients into buffer `slot`, and for a borrowed unit into buffer `from` of that unit's use 1 (local buffers; shard buffers where parameters are unsharded)
   REDUCE u            local buffer `from` -> shard buffer `slot` (reduce-scatter over dp_shard); use: 0 own, 1 borrowed
   REDUCE_REPLICA u    shard buffer `slot` summed over dp_replicate (all of dp in ZeRO-0)
   ACCUMULATE u        buffer slot <- slot + from; from is released. `local`: local buffers, else shards; from_use: the use `from` belongs to
   NORM u              exact square sum of shard buffer `slot`
   SCALAR_REDUCE       pass 0: counted tokens of the step; pass 1: loss and norm over the world, then the host decides found_inf
   OPTIM u             update from shard buffer `slot`, which is released; only if found_inf == 0 */
typedef enum llmpar_op { LLMPAR_OP_GATHER = 1, LLMPAR_OP_FREE, LLMPAR_OP_FORWARD, LLMPAR_OP_BACKWARD, LLMPAR_OP_REDUCE, LLMPAR_OP_REDUCE_REPLICA, LLMPAR_OP_ACCUMULATE, LLMPAR_OP_NORM, LLMPAR_OP_SCALAR_REDUCE, LLMPAR_OP_OPTIM } llmpar_op;
typedef enum llmpar_stream_id { LLMPAR_STREAM_COMPUTE = 0, LLMPAR_STREAM_GATHER = 1, LLMPAR_STREAM_REDUCE = 2, LLMPAR_STREAM_TP = 3, LLMPAR_STREAM_COUNT = 4 } llmpar_stream_id;
typedef enum llmpar_predicate { LLMPAR_ALWAYS = 0, LLMPAR_IF_FINITE = 1 } llmpar_predicate; /* IF_FINITE: found_inf == 0 */

#define LLMPAR_WAITS 4
#define LLMPAR_GRAD_SLOTS 24 /* log2(micro-batches) + 2 at most */

typedef struct llmpar_instruction {
    llmpar_op op;
    int32_t unit, micro_batch;       /* -1 where it does not apply */
    int32_t pass;                    /* llmpar_pass for FORWARD; 0/1 for SCALAR_REDUCE */
    int32_t use;                     /* 0: the unit's own gradient; 1: gradient of the unit from the unit that borrows it */
    int32_t slot, from, from_use;    /* gradient buffers; -1 none */
    int32_t local;                   /* FREE, ACCUMULATE: the slots are local (whole) gradients, else shards */
    llmpar_stream_id stream;
    llmpar_predicate predicate;
    int32_t wait_count, waits[LLMPAR_WAITS]; /* indices of earlier instructions on other streams that must be complete */
} llmpar_instruction;

/* What a schedule is made from. Zero is the default everywhere. */
typedef struct llmpar_policy {
    int32_t micro_batches;        /* default 1; a power of two for equal bits */
    int32_t no_sync;              /* 0: reduce every micro-batch; 1: keep local gradients, reduce after the last */
    int32_t prefetch;             /* units gathered ahead of their use; default 0 */
    int32_t unsharded;            /* 1: parameters are whole on every rank (ZeRO-0, or dp_shard = 1): no GATHER, no FREE */
    int32_t replicas;             /* ranks that hold the same shard; default 1: no REDUCE_REPLICA */
    int32_t keep_after_forward;   /* 1: parameters stay gathered from first to last use of the step */
    int32_t forward_only;         /* 1: evaluation */
} llmpar_policy;

typedef struct llmpar_schedule {
    llmpar_instruction *list;     /* owned */
    int32_t count, capacity, units;
    llmpar_policy policy;
    llmpar_heap *heap;            /* borrowed */
} llmpar_schedule;

/* Pure: depends on units' borrow fields, their number and the policy alone. LLMPAR_ERR_ARGUMENT for a policy out of range. Owned by the caller. Local. */
LLMPAR_API llmpar_status llmpar_schedule_create(llmpar_heap *heap, const llmpar_unit *units, int32_t unit_count, const llmpar_policy *policy, llmpar_schedule **out, llmpar_error *error);
LLMPAR_API void llmpar_schedule_destroy(llmpar_schedule *schedule); /* NULL is fine */
/* One instruction a line: index, stream, op, operands, waits; a unit's own instructions once, where it first runs. Returns bytes needed without the NUL. Local. */
LLMPAR_API size_t llmpar_schedule_print(const llmpar_schedule *schedule, const llmpar_unit *units, char *text, size_t capacity);
LLMPAR_API const char *llmpar_op_name(llmpar_op op);

/* Proves a list, whoever wrote it: operands in range; waits point back; nothing is used before it is gathered or after it is freed; every buffer that is read was written and every one written is consumed; every
   unit runs forward before backward, each (unit, use, micro-batch) gradient reaches exactly one OPTIM through exactly one REDUCE; what another stream wrote or still reads is waited for.
   LLMPAR_ERR_SCHEDULE names the instruction and the reason. heap: scratch. Local. */
LLMPAR_API llmpar_status llmpar_schedule_validate(llmpar_heap *heap, const llmpar_instruction *list, int32_t count, const llmpar_unit *units, int32_t unit_count, const llmpar_policy *policy, llmpar_error *error);

#endif
/* ==== src/fsdp/fsdp.h ==== */
/* fsdp: flat shards of units, and the executor that runs a schedule over them. It knows no model and no policy.

    unit u, 3 parameters, dp_shard = 4:   | w_q ........ | w_k .. | w_o ...... |0|
    flat shards:                          |  rank 0  |  rank 1  |  rank 2  |  rank 3  |

   A unit's tp-local parameters lie one after the other in one flat buffer, each beginning at a multiple of 128 elements, cut evenly over dp_shard (shards are multiples of 128; padding is zero, in
   no file and no norm). Rajbhandari et al. 2020 (ZeRO), Zhao et al. 2023 (FSDP). */
#ifndef LLMPAR_FSDP_H
#define LLMPAR_FSDP_H


#define LLMPAR_FLAT_ALIGN 128

typedef struct llmpar_fsdp llmpar_fsdp;

typedef struct llmpar_fsdp_desc {
    int32_t zero;              /* 0 is a meaning of its own, so: LLMPAR_ZERO_DEFAULT = ZeRO-3 */
    llmpar_dtype dtype;        /* parameters, activations, gradients: F32 (default) or F64 */
    uint64_t memory_limit;     /* arena limit in bytes, 0 = none */
    uint64_t seed;             /* initialisation */
} llmpar_fsdp_desc;
#define LLMPAR_ZERO_DEFAULT 0
#define LLMPAR_ZERO_0 1 /* DDP: whole parameters, gradients summed over dp */
#define LLMPAR_ZERO_3 2 /* parameters, gradients and optimizer state sharded over dp_shard */

/* The part of one parameter inside this rank's shard. */
typedef struct llmpar_segment {
    int32_t param;        /* index in the unit */
    int32_t no_decay;
    int32_t owner;        /* 1: this rank's copy counts in norms */
    int64_t begin, count; /* elements of the shard */
} llmpar_segment;

/* What an OPTIM instruction hands to the optimizer. Buffers are shards of `elements` elements. */
typedef struct llmpar_update {
    int32_t unit;
    llmpar_dtype dtype;
    int64_t elements;
    void *param;
    const void *grad;
    const llmpar_segment *segments;
    int32_t segment_count;
    double grad_scale;     /* from begin_step */
    llmpar_stream *stream;
} llmpar_update;

/* The executor calls the optimizer through this table. */
typedef struct llmpar_optimizer {
    void *state;
    /* After SCALAR_REDUCE 1, finite values only: norm is the global gradient norm. Sets the factor for gradients (clipping; 1 at the call). NULL: 1. Local. */
    llmpar_status (*begin_step)(void *state, double grad_norm, double *grad_scale);
    /* Enqueues the update of one unit's shard on update->stream. Local. */
    llmpar_status (*update)(void *state, const llmpar_update *update);
} llmpar_optimizer;

/* One step's input and result. */
typedef struct llmpar_run {
    const llmpar_micro *micro;        /* [policy.micro_batches]; grad_scale and loss are filled in by the executor */
    int64_t tokens;                   /* in: counted tokens of this rank (all its micro-batches) */
    double loss_scale;                /* default 1 */
    const llmpar_optimizer *optimizer;/* NULL: OPTIM only releases the gradient after on_gradient */
    /* Called before OPTIM of each unit with its gradient shard (saving gradients in tests, looking); may be NULL. Collective. */
    llmpar_status (*on_gradient)(void *user, llmpar_fsdp *fsdp, int32_t unit, const void *shard);
    void *on_gradient_user;
    /* out */
    int64_t global_tokens;
    double loss;                      /* mean over counted tokens of the step */
    double grad_norm;                 /* 0 for forward-only */
    int32_t skipped;                  /* 1: no token of the step counts (N = 0), so nothing was updated */
} llmpar_run;

/* Allocates the shards (initialised by seed and name; no rank ever holds a whole tensor) and streams. Borrows mesh; copies units' names and params; borrows their callbacks. Collective. */
LLMPAR_API llmpar_status llmpar_fsdp_create(llmpar_mesh *mesh, const llmpar_unit *units, int32_t unit_count, const llmpar_fsdp_desc *desc, llmpar_fsdp **out);
LLMPAR_API void llmpar_fsdp_destroy(llmpar_fsdp *fsdp); /* NULL is fine; local */
/* Runs a list over this step's data. The list must be valid (llmpar_schedule_validate) and the same on all ranks. LLMPAR_ERR_NONFINITE when loss or norm is not finite: names the first non-finite tensor,
   and parameters are unchanged. Collective. */
LLMPAR_API llmpar_status llmpar_fsdp_run(llmpar_fsdp *fsdp, const llmpar_instruction *list, int32_t count, llmpar_run *run);

/* policy.unsharded and replicas as this object needs them. Local. */
LLMPAR_API void llmpar_fsdp_policy(const llmpar_fsdp *fsdp, llmpar_policy *policy);
/* The units as copied by create; what the object borrows or owns. Local. */
LLMPAR_API int32_t llmpar_fsdp_unit_count(const llmpar_fsdp *fsdp);
LLMPAR_API const llmpar_unit *llmpar_fsdp_unit(const llmpar_fsdp *fsdp, int32_t unit);
LLMPAR_API llmpar_mesh *llmpar_fsdp_mesh(llmpar_fsdp *fsdp);
LLMPAR_API llmpar_arena *llmpar_fsdp_arena(llmpar_fsdp *fsdp);
LLMPAR_API llmpar_dtype llmpar_fsdp_dtype(const llmpar_fsdp *fsdp);
/* This rank's shard and the segments in it. Local. */
LLMPAR_API void *llmpar_fsdp_shard(llmpar_fsdp *fsdp, int32_t unit, int64_t *elements, const llmpar_segment **segments, int32_t *segment_count);
/* Parameter as a descriptor over the mesh, and the local buffer that goes with it inside a shard-sized buffer (parameters, gradients, optimizer state). Local. */
LLMPAR_API void llmpar_fsdp_dtensor(const llmpar_fsdp *fsdp, int32_t unit, int32_t param, llmpar_dtensor *out);
LLMPAR_API void *llmpar_fsdp_local(const llmpar_fsdp *fsdp, int32_t unit, int32_t param, void *shard);
/* Gathers a unit by hand to look or generate; params[param_count] point at tp-local tensors until reshard. Counted: every unshard that succeeds needs a reshard. Collective over dp_shard. */
LLMPAR_API llmpar_status llmpar_fsdp_unshard(llmpar_fsdp *fsdp, int32_t unit, void *const **params);
LLMPAR_API llmpar_status llmpar_fsdp_reshard(llmpar_fsdp *fsdp, int32_t unit);
/* Writes into text the first parameter with a non-finite element over the world, "" if none. Collective. */
LLMPAR_API llmpar_status llmpar_fsdp_find_nonfinite(llmpar_fsdp *fsdp, char *text, size_t capacity);

#endif

/* Chapter: optim */
/* ==== src/optim/adamw.h ==== */
/* adamw: AdamW (Loshchilov & Hutter 2019) on this rank's shards, behind fsdp's optimizer table; with the learning rate schedule and gradient clipping that go with it. */
#ifndef LLMPAR_ADAMW_H
#define LLMPAR_ADAMW_H


/* Linear warm-up from 0 over `warmup` steps, then half a cosine from lr to lr_min at step `total` (Loshchilov & Hutter 2017), then lr_min. total 0: constant after warm-up.
   step counts from 1. Pure. */
LLMPAR_API double llmpar_lr_cosine(double lr, double lr_min, int64_t warmup, int64_t total, int64_t step);
/* Factor that brings a gradient of this norm down to max_norm: min(1, max_norm / norm); max_norm <= 0: 1. Pure. */
LLMPAR_API double llmpar_clip_scale(double norm, double max_norm);

typedef struct llmpar_adamw_desc {
    double beta1, beta2;   /* default 0.9, 0.95 */
    double eps;            /* default 1e-8 */
    double decay;          /* weight decay, not on parameters with no_decay; default 0.1; negative: none */
    double clip;           /* global gradient norm; default 1.0; negative: off */
} llmpar_adamw_desc;

typedef struct llmpar_adamw llmpar_adamw;

LLMPAR_API void llmpar_adamw_desc_resolve(llmpar_adamw_desc *desc); /* fills in the defaults; local */
/* LLMPAR_ERR_ARGUMENT for a resolved value out of range. Local. */
LLMPAR_API llmpar_status llmpar_adamw_desc_check(const llmpar_adamw_desc *desc, llmpar_error *error);
/* Zeroed moments for every shard, in the arena of fsdp (OPTIMIZER). Borrows fsdp. LLMPAR_ERR_ARGUMENT for values out of range. Local. */
LLMPAR_API llmpar_status llmpar_adamw_create(llmpar_fsdp *fsdp, const llmpar_adamw_desc *desc, llmpar_adamw **out);
LLMPAR_API void llmpar_adamw_destroy(llmpar_adamw *adamw); /* NULL is fine; before the fsdp object; local */
/* The table for llmpar_run; valid as long as adamw. Local. */
LLMPAR_API const llmpar_optimizer *llmpar_adamw_optimizer(const llmpar_adamw *adamw);
/* Learning rate of the coming update; its number is one more than updates so far. Local. */
LLMPAR_API void llmpar_adamw_set_lr(llmpar_adamw *adamw, double lr);
LLMPAR_API int64_t llmpar_adamw_steps(const llmpar_adamw *adamw);
/* Shard-sized first and second moments of a unit, for checkpoints. Local. */
LLMPAR_API void llmpar_adamw_moments(llmpar_adamw *adamw, int32_t unit, void **first, void **second);

#endif

/* Chapter: model */
/* ==== src/model/config.h ==== */
/* config: the shape of a Llama: presets, reading and writing a Hugging Face config.json, and what follows from the shape alone
   (parameter count, FLOPs, RoPE tables). Plain data, all functions are local and pure. Shape letters: V vocab, D hidden, F intermediate, L layers, H heads, K kv heads, E head dim, T positions. */
#ifndef LLMPAR_CONFIG_H
#define LLMPAR_CONFIG_H


typedef enum llmpar_rope_kind { LLMPAR_ROPE_NONE = 0, LLMPAR_ROPE_LINEAR = 1, LLMPAR_ROPE_LLAMA3 = 2 } llmpar_rope_kind;

/* How RoPE frequencies are stretched to longer contexts (transformers: modeling_rope_utils). Unused fields are 0. */
typedef struct llmpar_rope_scaling {
    llmpar_rope_kind kind;
    int32_t original_max_positions; /* llama3: the context of pre-training */
    double factor;                  /* linear, llama3; >= 1 */
    double low_freq_factor;         /* llama3 */
    double high_freq_factor;        /* llama3; > low_freq_factor */
} llmpar_rope_scaling;

#define LLMPAR_MAX_EOS 8

typedef struct llmpar_llama_config {
    int32_t vocab;          /* V */
    int32_t hidden;         /* D */
    int32_t intermediate;   /* F */
    int32_t layers;         /* L */
    int32_t heads;          /* H query heads */
    int32_t kv_heads;       /* K, divides H */
    int32_t head_dim;       /* E, even; H * E may differ from D */
    int32_t max_positions;  /* longest T the model was made for */
    double rms_eps, rope_theta;
    llmpar_rope_scaling rope_scaling;
    int32_t tied;           /* 1: lm_head.weight is model.embed_tokens.weight */
    int32_t bos_id;         /* -1: none */
    int32_t eos_count;      /* 0: none */
    int32_t eos_id[LLMPAR_MAX_EOS]; /* any of these ends a text */
    double init_std;        /* standard deviation of initial weights */
} llmpar_llama_config;

/* "tiny" (bytes, < 1 M parameters), "15m", "110m" (llama2.c's stories models), "1b" (Llama 3.2 1B). LLMPAR_ERR_CONFIG lists the names. */
LLMPAR_API llmpar_status llmpar_llama_preset(const char *name, llmpar_llama_config *out, llmpar_error *error);

/* Reads a Hugging Face config.json: text[length], `name` for messages (NULL: "config.json"). Defaults are transformers' LlamaConfig's. A field that would change the
   mathematics and is not supported is refused by name; other unknown fields are ignored. The result has passed llmpar_llama_config_check.
   LLMPAR_ERR_FORMAT (no JSON), LLMPAR_ERR_CONFIG (a field's value), LLMPAR_ERR_UNSUPPORTED: field, value, expectation, byte position. */
LLMPAR_API llmpar_status llmpar_llama_config_parse(llmpar_heap *heap, const char *text, size_t length, const char *name, llmpar_llama_config *out, llmpar_error *error);

/* Everything a model takes for granted: positive sizes, K divides H, even E, finite positive reals, ids inside the vocabulary, and tensor
   sizes and parameter bytes that fit. LLMPAR_ERR_CONFIG names the field. */
LLMPAR_API llmpar_status llmpar_llama_config_check(const llmpar_llama_config *config, llmpar_error *error);

/* A config.json that transformers loads and llmpar_llama_config_parse reads back to the same struct, bit for bit. Returns the bytes needed without the final NUL; writes
   nothing past `capacity` (text may be NULL when capacity is 0). No dtype is written: transformers takes the weights' own. */
LLMPAR_API size_t llmpar_llama_config_write(const llmpar_llama_config *config, char *text, size_t capacity);

/* All parameters, tied embeddings once. */
LLMPAR_API int64_t llmpar_llama_param_count(const llmpar_llama_config *config);

/* Forward and backward of one token: 6N + 12*L*H*E*T. N = parameters that multiply: all but the token embedding table, which is a look-up. Tied or
   not, the output projection counts as V*D: its product is computed. (torchtitan leaves it out when tied; untied the counts agree.) No recomputation, no saving for causality. */
LLMPAR_API double llmpar_llama_flops_per_token(const llmpar_llama_config *config, int64_t seq_len);

/* out[E/2]: the angle a position adds in pair i (elements i and i + E/2), after scaling; computed in f64. */
LLMPAR_API void llmpar_rope_inv_freq(const llmpar_llama_config *config, double *out);

/* cosine, sine [positions, E/2] of position * inv_freq, from f64 and rounded once to dtype (LLMPAR_F32 or LLMPAR_F64). transformers computes inv_freq and
   the angle in f32: its angle at position p is off by up to about p * 2^-23 rad, this one by p * 2^-52. LLMPAR_ERR_ARGUMENT: another dtype, negative
   positions, or an angle beyond 1e9. Uses `heap` for E/2 doubles. */
LLMPAR_API llmpar_status llmpar_rope_tables(llmpar_heap *heap, const llmpar_llama_config *config, int64_t positions, llmpar_dtype dtype, void *cosine, void *sine, llmpar_error *error);

#endif
/* ==== src/model/llama.h ==== */
/* llama: a Llama 3 as a list of units. The model knows its mathematics and its tp axis; neither FSDP nor any transport.

   One block, Ns = rows of the residual stream on this rank (B*T, or B*T/tp with sequence parallel), N = B*T:
     x[Ns,D] -> rmsnorm -> (gather) -> q,k,v -> rope -> attention -> wo -> (reduce) -> + x -> rmsnorm -> (gather) -> gate, up -> swiglu -> down -> (reduce) -> +
   Touvron et al. 2023; Shoeybi et al. 2019, fig. 3; Korthikanti et al. 2022, fig. 5. */
#ifndef LLMPAR_LLAMA_H
#define LLMPAR_LLAMA_H


typedef struct llmpar_llama llmpar_llama;

/* Exactly one of preset and config. */
typedef struct llmpar_llama_desc {
    const char *preset;                 /* "tiny", "15m", "110m", "1b" */
    const llmpar_llama_config *config;  /* copied */
    uint64_t seed;                      /* initialisation; default 0 */
} llmpar_llama_desc;

/* The units exist from here on: embed, layers.0 .., head. Collective only in that all ranks give the same desc. */
LLMPAR_API llmpar_status llmpar_llama_create(llmpar_ctx *ctx, const llmpar_llama_desc *desc, llmpar_llama **out);
LLMPAR_API void llmpar_llama_destroy(llmpar_llama *model); /* NULL is fine; after the fsdp object made from its units; local */
LLMPAR_API const llmpar_llama_config *llmpar_llama_get_config(const llmpar_llama *model); /* local */
LLMPAR_API uint64_t llmpar_llama_seed(const llmpar_llama *model);                         /* local */
/* The units, owned by the model. To replace a unit's callbacks: llmpar_llama_apply, which sets them; change them here; then llmpar_parallelize. Local. */
LLMPAR_API llmpar_unit *llmpar_llama_units(llmpar_llama *model, int32_t *count);

/* How the model meets a mesh. */
typedef struct llmpar_llama_apply_desc {
    int32_t canon;               /* pieces of every sum that tp may split; default 8 */
    int32_t sequence_parallel;   /* 1: the residual stream is sharded over T between the linear layers */
    llmpar_dtype dtype;          /* default F32 */
    int64_t positions;           /* longest T; RoPE tables are made for it */
} llmpar_llama_apply_desc;

/* Sets placements, instruction lists and RoPE tables for the tp communicator (one rank: no parallelism). LLMPAR_ERR_MESH names what tp does not divide. Collective over tp. Again with the same communicator and values (and no more
   positions): nothing happens, so a user may call it before llmpar_parallelize does; with others: LLMPAR_ERR_ARGUMENT. */
LLMPAR_API llmpar_status llmpar_llama_apply(llmpar_llama *model, llmpar_comm *tp, const llmpar_llama_apply_desc *desc);
LLMPAR_API const llmpar_tp *llmpar_llama_tp(const llmpar_llama *model); /* local */

/* logits[count, V] (f32, host) of one sequence ids[count]: every rank gets all. Collective over the mesh of fsdp. */
LLMPAR_API llmpar_status llmpar_llama_logits(llmpar_llama *model, llmpar_fsdp *fsdp, const int32_t *ids, int32_t count, float *logits);

typedef struct llmpar_generate_desc {
    const int32_t *prompt;    /* at least one id */
    int32_t prompt_count;
    int32_t tokens;           /* ids to generate at most; default 128 */
    double temperature;       /* 0: greedy (the first of equal maxima) */
    double top_p;             /* 0 or 1: off; else nucleus sampling (Holtzman et al. 2020) */
    uint64_t seed;            /* of sampling */
    int32_t stop_at_eos;      /* 1: ends after one of the config's eos ids */
    llmpar_status (*on_token)(void *user, int32_t id); /* each generated id, on every rank; may be NULL */
    void *user;
} llmpar_generate_desc;

/* Writes the generated ids (without the prompt) to ids[tokens], their number to *count. KV cache in the arena of fsdp. prompt + tokens beyond the positions given to apply: LLMPAR_ERR_ARGUMENT. Collective over the mesh of fsdp. */
LLMPAR_API llmpar_status llmpar_llama_generate(llmpar_llama *model, llmpar_fsdp *fsdp, const llmpar_generate_desc *desc, int32_t *ids, int32_t *count);

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
    size_t begin, bytes;        /* absolute position in the file; the format does not promise alignment: copy before use as numbers */
} llmpar_safetensor;

typedef struct llmpar_safetensors {
    int32_t count;
    const llmpar_safetensor *tensor; /* sorted by name */
    const unsigned char *data;       /* the mapped file */
    const char *path;
    void *state;
} llmpar_safetensors;

/* Maps and validates: header length <= 100,000,000 and inside the file, JSON with unique keys, known dtypes, shape product equal to the byte range, ranges that follow one another without
   gap or overlap to the end of the file. LLMPAR_ERR_FORMAT names path, tensor and byte position; LLMPAR_ERR_UNSUPPORTED: a dtype of the format that is none of ours, or more
   than 8 dims; LLMPAR_ERR_OVERFLOW: a shape whose product overflows. Owned by the caller. Local. */
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

/* Chapter: text */
/* ==== src/text/data.h ==== */
/* data: token sequences for training and evaluation out of one text. Plain data, no allocation; every function is local and pure, so ranks agree without talking.

     tokens:  |---------------- training ----------------|-- held out (the end) --|
     epoch 0:   .|--T--|--T--|--T--|--T--|--T--|--T--|--T--|..    the dots: a phase drawn per epoch
     epoch 1:   ....|--T--|--T--|--T--|--T--|--T--|--T--|--T--|   (other cuts each epoch)

   The order. A sequence is known by its global index g = step * B + i (i-th sequence of a step with B sequences over all ranks and micro-batches). The training part is cut
   into S windows; epoch e = g / S starts its first window at phase(seed, e), and g mod S goes through a permutation keyed by (seed, e): every window once an epoch, in shuffled order.
   Nothing else enters, so neither the mesh nor the number of micro-batches can change what a step sees. */
#ifndef LLMPAR_DATA_H
#define LLMPAR_DATA_H


/* Fills tokens[T+1] of the training sequence `global_index` >= 0: T inputs, each followed by its target. Must be a pure function of the index. */
typedef llmpar_status (*llmpar_sequence_fn)(void *user, int64_t global_index, int32_t *tokens);

typedef struct llmpar_data_desc {
    const void *bytes;   /* the text, borrowed as long as the llmpar_data is used; each byte is a token (vocabulary 256) */
    size_t count;        /* bytes */
    int64_t seq_len;     /* T >= 1 */
    uint64_t seed;
    double held_out;     /* share of the text at its end that is never trained on; default 0.05; below 1 */
    int32_t no_held_out; /* 1: nothing is held out */
    const char *name;    /* for messages, default "data"; not kept */
} llmpar_data_desc;

typedef struct llmpar_data {
    const unsigned char *tokens; /* borrowed */
    int64_t train_count;         /* tokens[0 .. train_count) are trained on */
    int64_t eval_count;          /* the ones behind them are held out */
    int64_t seq_len;             /* T */
    int64_t windows;             /* S: training sequences in an epoch, >= 1 */
    int64_t phases;              /* an epoch's phase is in [0, phases), 1 <= phases <= T */
    int64_t eval_windows;        /* whole sequences in the held-out part; 0 only if nothing is held out */
    uint64_t seed;
} llmpar_data;

/* LLMPAR_ERR_ARGUMENT: a field of the desc. LLMPAR_ERR_FORMAT: no data, or less than one sequence (T+1 tokens) in either part; the text has the numbers. */
LLMPAR_API llmpar_status llmpar_data_init(const llmpar_data_desc *desc, llmpar_data *out, llmpar_error *error);

/* A llmpar_sequence_fn: data points to a llmpar_data, which is only read. LLMPAR_ERR_ARGUMENT for a negative index. */
LLMPAR_API llmpar_status llmpar_data_sequence(void *data, int64_t global_index, int32_t *tokens);

/* tokens[T+1] of held-out sequence `index` in [0, eval_windows): consecutive windows, so that their targets are tokens [train_count + 1, train_count + eval_windows * T]. */
LLMPAR_API llmpar_status llmpar_data_eval_sequence(const llmpar_data *data, int64_t index, int32_t *tokens);

#endif

/* Chapter: model_io */
/* ==== src/model_io/hf.h ==== */
/* hf: Hugging Face directories: config.json and model.safetensors, read into any mesh and written from any mesh. */
#ifndef LLMPAR_HF_H
#define LLMPAR_HF_H


/* Reads DIR/config.json. LLMPAR_ERR_IO, or what llmpar_llama_config_parse says. Local. */
LLMPAR_API llmpar_status llmpar_hf_config(llmpar_ctx *ctx, const char *directory, llmpar_llama_config *out);

/* Reads DIR/model.safetensors into the shards: every rank maps the file and takes its own part; a tensor of another dtype, or one that lies unaligned, is whole on the rank's heap while it is
   converted or copied. Strict: every parameter exactly once with its shape, nothing else in the file; f32, f64, bf16
   and f16 are converted. LLMPAR_ERR_FORMAT names the tensor. Nothing is changed unless all names and shapes fit. Local on every rank (all ranks call it). */
LLMPAR_API llmpar_status llmpar_hf_load(llmpar_fsdp *fsdp, const char *directory);

/* Writes config.json and model.safetensors (dtype of the shards) from world rank 0; never more than one tensor whole on a rank. The directory is made unless it is there; files appear under their names only when
   complete. When rank 0 fails, the others return LLMPAR_ERR_PEER. Collective. */
LLMPAR_API llmpar_status llmpar_hf_save(llmpar_fsdp *fsdp, const llmpar_llama_config *config, const char *directory);

/* A safetensors file of whole tensors, one a parameter, from buffers laid out like the shards (parameters, gradients, moments). Units come in order 0, 1, ..: another one is
   LLMPAR_ERR_ARGUMENT. LLMPAR_ERR_IO from world rank 0, which writes; nothing stands under the final name before commit. Owned by the caller until commit or abandon. */
typedef struct llmpar_tensor_file llmpar_tensor_file;
LLMPAR_API llmpar_status llmpar_tensor_file_open(llmpar_fsdp *fsdp, const char *path, llmpar_tensor_file **out);       /* collective */
LLMPAR_API llmpar_status llmpar_tensor_file_write(llmpar_tensor_file *file, int32_t unit, const void *shard);         /* collective */
LLMPAR_API llmpar_status llmpar_tensor_file_commit(llmpar_tensor_file *file);                                         /* collective; destroys it */
LLMPAR_API void llmpar_tensor_file_abandon(llmpar_tensor_file *file);                                                 /* NULL is fine; local */

#endif

/* Chapter: run */
/* ==== src/run/launch.h ==== */
/* launch: makes the ranks (threads of this process), gives each its ctx, and collects the root error. */
#ifndef LLMPAR_LAUNCH_H
#define LLMPAR_LAUNCH_H


/* What ranks are. Default: MPI processes where LLMPAR_USE_MPI is defined and MPI is initialised or mpirun has started the process, else threads. */
typedef enum llmpar_transport { LLMPAR_TRANSPORT_DEFAULT = 0, LLMPAR_TRANSPORT_THREADS = 1, LLMPAR_TRANSPORT_MPI = 2 } llmpar_transport;

typedef struct llmpar_launch_desc {
    int32_t ranks;                /* 0 = the MPI processes there are, or 1. One rank, and an MPI process, runs on the caller's thread */
    llmpar_transport transport;
    const llmpar_mpi_desc *mpi;   /* own communicator and more; its deadline and unchecked are those below. Not NULL: ranks are MPI processes */
    int32_t threads;              /* workers inside a rank; default 1 */
    int32_t lockstep;             /* 1: one rank at a time, switching only at collectives (gdb) */
    const char *cpu;              /* "portable", "avx2", "avx512"; default: environment LLMPAR_CPU, else the best */
    double deadline;              /* seconds a collective waits for its peers before it reports who is where; default 0 = 600 (a rank may be late: it writes a file); negative = for ever */
    int32_t unchecked;            /* 1 (check level 0): the ranks do not compare what they call; default 0: every mismatch is reported by both sides before data moves */
    const char *record;           /* directory: when the job fails, every rank's last collectives are written to DIR/llmpar_rank_N.json; default: environment LLMPAR_RECORD, else none */
    const llmpar_allocator *allocator; /* default malloc/free; its hooks are called from all rank threads */
    llmpar_log_fn log;            /* default: errors and warnings to stderr */
    void *log_user;
    void (*check)(const llmpar_ctx *ctx, void *user); /* test hook: after a rank's clean-up, with its final heap; default none */
} llmpar_launch_desc;

typedef llmpar_status (*llmpar_rank_fn)(llmpar_ctx *ctx, void *user);

/* Runs fn on every rank and returns when all have ended: LLMPAR_OK, or the root error's status with *error filled (rank, coordinate, text; never LLMPAR_ERR_PEER). error may be NULL.
   A rank that returns an error wakes all others. A rank that stays away for ever cannot be ended: once the job has failed and the rank has neither begun nor ended a collective for `deadline` seconds
   (at least 5 after the failure), launch returns without it; the error says so, and the rank keeps running on memory that stays (fn, user, allocator and log must stay valid too: best end the process). Rank threads are named "r3" (the mesh adds the tp coordinate). The lowest common dispatch level is used on all ranks; a self-test hash
   that differs between ranks is LLMPAR_ERR_MISMATCH.
   MPI: every process calls it and gets the same error. MPI is initialised (MPI_THREAD_SERIALIZED) and finalised here unless the caller has initialised it; a caller that launches more than once must, since
   MPI starts only once. A failure of which this rank is not the root goes to the log too: its own collective, and who was where. When a rank is dead or stuck, MPI cannot be finalised: where it was
   initialised here the root error is logged and MPI_Abort ends all processes with exit code 1; else the error is returned, and the caller has to. */
LLMPAR_API llmpar_status llmpar_launch(const llmpar_launch_desc *desc, llmpar_rank_fn fn, void *user, llmpar_error *error);

#endif
/* ==== src/run/trainer.h ==== */
/* trainer: the recipe (mesh + model + placements + units + optimizer) and the training loop with its metrics. */
#ifndef LLMPAR_TRAINER_H
#define LLMPAR_TRAINER_H


typedef enum llmpar_exact { LLMPAR_EXACT_DEFAULT = 0, LLMPAR_EXACT_OFF = 1, LLMPAR_EXACT_ON = 2, LLMPAR_EXACT_REQUIRE = 3 } llmpar_exact;

typedef enum llmpar_sink_kind { LLMPAR_SINK_METRICS = 1, LLMPAR_SINK_PROGRESS = 2 } llmpar_sink_kind;
/* One line without its newline, from world rank 0. */
typedef void (*llmpar_sink_fn)(void *user, llmpar_sink_kind kind, const char *line);

/* Zero is a default everywhere. */
typedef struct llmpar_trainer_desc {
    const char *data;             /* path of a text; its bytes are the tokens (vocabulary >= 256) */
    llmpar_sequence_fn sequence;  /* or own data: tokens[seq_len + 1] of a global index; a token < 0 as target is not counted. Exactly one of data and sequence (neither: no training, only load, save, generate) */
    void *sequence_user;
    double held_out;              /* share of data kept for evaluation; default 0.05 */
    int64_t seq_len;              /* T; required */
    int64_t batch;                /* global sequences a step, over all ranks and micro-batches; default: one a data rank and micro-batch */
    int32_t grad_accum;           /* micro-batches a step; default 1 */
    int32_t no_sync;              /* 1: gradients stay local until the last micro-batch; same bits, more memory, fewer bytes */
    int32_t zero;                 /* LLMPAR_ZERO_0 or LLMPAR_ZERO_3 (default) */
    int32_t prefetch;             /* units gathered ahead; default 0 */
    int32_t sequence_parallel;    /* 1: on (where tp > 1) */
    llmpar_exact exact;           /* ON (default): same bits wherever the mesh allows; REQUIRE: refuse meshes that do not; OFF: plain order, deterministic for one mesh */
    int32_t canon;                /* pieces of sums that tp may split; power of two, default 8; OFF uses 1 */
    llmpar_dtype dtype;           /* F32 (default) or F64 */
    double lr;                    /* peak learning rate; default 1e-3 */
    double lr_min;                /* after the cosine; default lr / 10 */
    int64_t warmup;               /* steps; default 0 */
    int64_t total_steps;          /* of the cosine; default 0: constant */
    llmpar_adamw_desc adamw;
    uint64_t memory_limit;        /* arena bytes a rank; default none */
    const char *log;              /* path of a JSON-lines file, one object a step; default none */
    int32_t log_every;            /* console line every n steps; default 10; negative: none */
    llmpar_sink_fn sink;          /* default: metrics to stdout, progress to stderr if it is a terminal */
    void *sink_user;
} llmpar_trainer_desc;

/* What a step did. */
typedef struct llmpar_step {
    int64_t step;                 /* 1, 2, .. */
    int64_t tokens;               /* counted tokens of the step, all ranks */
    double loss;                  /* mean over them */
    double grad_norm;             /* before clipping */
    double lr;
    double seconds;               /* of this rank */
    double tokens_per_second;     /* all ranks */
    double tflops;                /* all ranks, by llmpar_llama_flops_per_token */
    double mfu;                   /* share of what the ranks' own matrix product reached at start, all running at once */
    uint64_t memory;              /* peak arena bytes of this rank so far */
    int32_t skipped;              /* 1: no token counted, nothing was updated */
} llmpar_step;

typedef struct llmpar_trainer llmpar_trainer;

/* Checks and fills in defaults. LLMPAR_ERR_ARGUMENT / LLMPAR_ERR_MESH with the numbers: batch not divisible by data ranks x grad_accum; REQUIRE outside the guarantee. Local. */
LLMPAR_API llmpar_status llmpar_trainer_desc_resolve(llmpar_trainer_desc *desc, const llmpar_mesh *mesh, const llmpar_llama_config *config, llmpar_error *error);
/* The recipe. Applies tp to the model, shards its units, makes optimizer and schedules. Borrows mesh and model. Everything that can be wrong with desc and data is found before memory is taken. Collective. */
LLMPAR_API llmpar_status llmpar_parallelize(llmpar_mesh *mesh, llmpar_llama *model, const llmpar_trainer_desc *desc, llmpar_trainer **out);
LLMPAR_API void llmpar_trainer_destroy(llmpar_trainer *trainer); /* NULL is fine; local */
/* One optimizer step. LLMPAR_ERR_NONFINITE names the step and the first non-finite tensor; parameters are then those before the step. Collective. */
LLMPAR_API llmpar_status llmpar_trainer_step(llmpar_trainer *trainer, llmpar_step *out);
/* Mean loss over the held-out sequences (all, or the first max_sequences if > 0). The same bits on every mesh. Collective. */
LLMPAR_API llmpar_status llmpar_trainer_eval(llmpar_trainer *trainer, int64_t max_sequences, double *loss);
/* The next step also writes its gradients (before clipping; HF names) to a safetensors file. path is copied. Collective. */
LLMPAR_API llmpar_status llmpar_trainer_save_gradients(llmpar_trainer *trainer, const char *path);
LLMPAR_API llmpar_fsdp *llmpar_trainer_fsdp(llmpar_trainer *trainer);                      /* local */
LLMPAR_API const llmpar_schedule *llmpar_trainer_schedule(const llmpar_trainer *trainer);  /* of a training step; local */
LLMPAR_API const llmpar_data *llmpar_trainer_data(const llmpar_trainer *trainer);          /* NULL with own data; local */
/* Whole directory in, whole directory out. Collective. */
LLMPAR_API llmpar_status llmpar_load_hf(llmpar_trainer *trainer, const char *directory);
LLMPAR_API llmpar_status llmpar_save_hf(llmpar_trainer *trainer, const char *directory);

#endif

LLMPAR_EXTERN_C_END

#endif /* LLMPAR_H */

/* ==== implementation ==== */

#if defined(LLMPAR_IMPLEMENTATION) && !defined(LLMPAR__IMPLEMENTED) && !defined(LLMPAR__SEPARATE)
#define LLMPAR__IMPLEMENTED
#ifndef LLMPAR_HEADER
#define LLMPAR_HEADER "llmpar.h"
#endif

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

/* condition (0 or 1) ? yes : no, with both computed: as a branch around a float operation gcc would keep the loop scalar. */
static inline uint32_t llmpar__dtype_select(int condition, uint32_t yes, uint32_t no)
{
    return no ^ ((yes ^ no) & (0u - (uint32_t)condition));
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
    uint32_t half = llmpar__dtype_select(magnitude < 0x38800000u, subnormal, normal);
    half = llmpar__dtype_select(magnitude >= 0x47800000u, 0x7C00u, half); /* 65536 and up; [65520, 65536) became infinity by the carry */
    half = llmpar__dtype_select(magnitude > 0x7F800000u, nan, half);
    return (uint16_t)(sign | half);
}

static inline uint32_t llmpar__dtype_from_f16(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, magnitude = half & 0x7FFFu;
    uint32_t normal = (magnitude << 13) + 0x38000000u;
    /* the 10 bits as the fraction of a number in [2^-14, 2^-13), less 2^-14: exact, and never an f32 subnormal */
    uint32_t subnormal = llmpar__dtype_bits(llmpar__dtype_float(0x38800000u + (magnitude << 13)) - 6.103515625e-05f);
    uint32_t special = 0x7F800000u | (magnitude << 13) | (magnitude > 0x7C00u ? 0x00400000u : 0u);
    uint32_t bits = llmpar__dtype_select(magnitude < 0x0400u, subnormal, normal);
    return sign | llmpar__dtype_select(magnitude >= 0x7C00u, special, bits);
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

/* condition (0 or 1) ? yes : no on bit patterns, with both computed: gcc keeps a loop scalar where it may turn a choice between
   floats into a branch. */
static inline uint32_t llmpar__math_select(int condition, uint32_t yes, uint32_t no)
{
    return no ^ ((yes ^ no) & (0u - (uint32_t)condition));
}

/* e^x = 2^n e^r, n = round(x / ln 2), |r| <= 0.347. Selects only, so that a loop over it vectorises; a NaN walks through
   the unsigned arithmetic and comes out of the product. */
LLMPAR_DEF float llmpar_exp_f32(float x)
{
    uint32_t bits = llmpar__math_bits_f32(x), magnitude = bits & 0x7FFFFFFFu, k, half;
    /* to [-110, 110], which is far enough for 0 and infinity */
    float clamped = llmpar__math_from_bits_f32(llmpar__math_select(magnitude > 0x42DC0000u && magnitude <= 0x7F800000u, (bits & 0x80000000u) | 0x42DC0000u, bits));
    float shifted, n, r, p;
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
    int tiny = bits < 0x00800000u;
    /* a subnormal is an integer times 2^-149: converted, not multiplied, so that denormals-are-zero cannot touch it */
    uint32_t normal = llmpar__math_select(tiny, llmpar__math_bits_f32((float)(int32_t)bits), bits);
    uint32_t moved = normal + (0x3F800000u - 0x3F3504F3u);
    float k = (float)((int32_t)(moved >> 23) - (tiny ? 127 + 149 : 127));
    float f = llmpar__math_from_bits_f32((moved & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
    float s = f / (2.0f + f), z = s * s, square = 0.5f * f * f, p;
    uint32_t result;
    p = 0.233316145f; /* (2 atanh(s) / s - 2) / z within 2e-11 of the logarithm */
    p = p * z + 0.285507786f;
    p = p * z + 0.400001222f;
    p = p * z + 0.666666666f;
    result = llmpar__math_bits_f32(k * 0.693145752f + (f - (square - (s * (square + z * p) + k * 1.42860677e-06f))));
    result = llmpar__math_select(bits >= 0x7F800000u, bits | 0x00400000u, result); /* NaN stays, quiet */
    result = llmpar__math_select(bits == 0x7F800000u, bits, result);
    result = llmpar__math_select(bits > 0x80000000u && bits <= 0xFF800000u, 0x7FC00000u, result);
    return llmpar__math_from_bits_f32(llmpar__math_select((bits & 0x7FFFFFFFu) == 0, 0xFF800000u, result));
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
    while (count >= 512) { /* below this the buckets cost more than they save; the value is the same */
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

/* ==== src/cpu/gemm.c ==== */
/* gemm: the matrix product. gemm_portable.inc says what is computed; this file cuts the work into tiles that fit registers and caches and spreads
   them over the pool; gemm_kernel.inc is the inner loop, compiled once a vector width.

   c is worked on in blocks of at most block_m x block_n. For each block the summed dim, all segments one after the other, goes by in parts of at
   most block_k: A and B are packed into panels (a tile's rows, or columns, side by side for each k), then every tile of the block takes its steps.

      segments      |  piece 0   |piece 1| piece 2 (two segments)  |piece 3|         pieces follow each other in the packed panels
      parts         |        part 0         |        part 1        |part 2 |
      steps         |  push      | merge,|cut: c|c:  push          |merge, merge: c|

   A step is a stretch of one piece inside a part. A piece that ends is added to the complete subtrees on its left (a binary counter makes the
   balanced tree of llmpar_tree_split) and pushed on the tile's stack of partial tiles; the last one leaves the total in c. A part that ends
   inside a piece leaves the chain in c and the next part goes on from there, which no bit shows. */
/* ==== src/cpu/cpu_internal.h ==== */
/* cpu_internal: what the operation files of the CPU device share: the device's state, the worker pool, and one function a slot. */
#ifndef LLMPAR_CPU_INTERNAL_H
#define LLMPAR_CPU_INTERNAL_H


struct llmpar__pool;

typedef struct llmpar__cpu {
    llmpar_heap *heap;
    llmpar_cpu_level level;
    struct llmpar__pool *pool; /* NULL: one thread */
} llmpar__cpu;

/* Runs fn(arg, task, worker) for every task in [0, tasks), 0 <= worker < threads, and returns when all are done. Which worker takes which task is
   not fixed, so a task's result must not depend on it. Tasks only write memory of their own. */
LLMPAR__PRIVATE void llmpar__pool_run(llmpar__cpu *cpu, void (*fn)(void *arg, int64_t task, int32_t worker), void *arg, int64_t tasks);
LLMPAR__PRIVATE int32_t llmpar__pool_threads(const llmpar__cpu *cpu); /* >= 1 */
/* threads >= 2, the caller's included. Owned by the caller; destroy takes NULL and joins. */
LLMPAR__PRIVATE llmpar_status llmpar__pool_create(llmpar_heap *heap, llmpar_error *error, int32_t threads, struct llmpar__pool **out);
LLMPAR__PRIVATE void llmpar__pool_destroy(struct llmpar__pool *pool);

/* Slots: gemm.c */
LLMPAR__PRIVATE llmpar_status llmpar__cpu_gemm(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args);
LLMPAR__PRIVATE size_t llmpar__cpu_gemm_workspace(llmpar_device *device, const llmpar_gemm_args *args);
/* norm.c */
LLMPAR__PRIVATE llmpar_status llmpar__cpu_rmsnorm(llmpar_device *device, llmpar_stream *stream, const llmpar_rmsnorm_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_rmsnorm_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_rmsnorm_backward_args *args);
/* rope.c */
LLMPAR__PRIVATE llmpar_status llmpar__cpu_rope(llmpar_device *device, llmpar_stream *stream, const llmpar_rope_args *args);
/* attention.c */
LLMPAR__PRIVATE llmpar_status llmpar__cpu_attention(llmpar_device *device, llmpar_stream *stream, const llmpar_attention_args *args);
LLMPAR__PRIVATE size_t llmpar__cpu_attention_workspace(llmpar_device *device, const llmpar_attention_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_attention_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_attention_backward_args *args);
LLMPAR__PRIVATE size_t llmpar__cpu_attention_backward_workspace(llmpar_device *device, const llmpar_attention_backward_args *args);
/* swiglu.c */
LLMPAR__PRIVATE llmpar_status llmpar__cpu_swiglu(llmpar_device *device, llmpar_stream *stream, const llmpar_swiglu_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_swiglu_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_swiglu_backward_args *args);
/* embedding.c */
LLMPAR__PRIVATE llmpar_status llmpar__cpu_embedding(llmpar_device *device, llmpar_stream *stream, const llmpar_embedding_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_embedding_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_embedding_backward_args *args);
LLMPAR__PRIVATE size_t llmpar__cpu_embedding_backward_workspace(llmpar_device *device, const llmpar_embedding_backward_args *args);
/* xent.c */
LLMPAR__PRIVATE llmpar_status llmpar__cpu_xent_max(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_xent_sum(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_xent_loss(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_loss_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_xent_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_backward_args *args);
/* elementwise.c: tree_sum, max, add, scale, cast, copy_rows */
LLMPAR__PRIVATE llmpar_status llmpar__cpu_tree_sum(llmpar_device *device, llmpar_stream *stream, const llmpar_tree_sum_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_max(llmpar_device *device, llmpar_stream *stream, const llmpar_max_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_add(llmpar_device *device, llmpar_stream *stream, const llmpar_add_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_scale(llmpar_device *device, llmpar_stream *stream, const llmpar_scale_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_cast(llmpar_device *device, llmpar_stream *stream, const llmpar_cast_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_copy_rows(llmpar_device *device, llmpar_stream *stream, const llmpar_copy_rows_args *args);
/* optim.c: adamw, square_sum */
LLMPAR__PRIVATE llmpar_status llmpar__cpu_adamw(llmpar_device *device, llmpar_stream *stream, const llmpar_adamw_args *args);
LLMPAR__PRIVATE llmpar_status llmpar__cpu_square_sum(llmpar_device *device, llmpar_stream *stream, const llmpar_square_sum_args *args);

#endif
/* ---- src/cpu/gemm.c goes on ---- */


#include <string.h>
#if defined(__x86_64__) && !defined(LLMPAR_NO_SIMD)
#include <immintrin.h>
#elif defined(__aarch64__) && !defined(LLMPAR_NO_SIMD)
#include <arm_neon.h>
#endif

/* One step of a portable chain. Two roundings on x86-64, where not every processor has fma; one where fma is part of the architecture. */
#if defined(__aarch64__)
#define LLMPAR__GEMM_CHAIN_F32(a, b, sum) __builtin_fmaf(a, b, sum)
#define LLMPAR__GEMM_CHAIN_F64(a, b, sum) __builtin_fma(a, b, sum)
#else
#define LLMPAR__GEMM_CHAIN_F32(a, b, sum) ((a) * (b) + (sum))
#define LLMPAR__GEMM_CHAIN_F64(a, b, sum) ((a) * (b) + (sum))
#endif

#define LLMPAR__GEMM_REAL double
#define LLMPAR__GEMM_ROW llmpar__gemm_row_f64
#define LLMPAR__GEMM_MULTIPLY_ADD LLMPAR__GEMM_CHAIN_F64
#define LLMPAR__TEMPLATE 1 /* cpu/gemm_portable.inc */
#include LLMPAR_HEADER

#if !defined(__aarch64__) || defined(LLMPAR_NO_SIMD)
#define LLMPAR__GEMM_REAL float
#define LLMPAR__GEMM_ROW llmpar__gemm_row_f32
#define LLMPAR__GEMM_MULTIPLY_ADD LLMPAR__GEMM_CHAIN_F32
#define LLMPAR__TEMPLATE 1 /* cpu/gemm_portable.inc */
#include LLMPAR_HEADER
#endif

/* ---- kernels ---- */

#if !defined(LLMPAR_NO_SIMD)

typedef struct llmpar__gemm_step {
    int64_t k;
    int32_t depth;        /* partial tiles on the stack before the step */
    int32_t merges;       /* how many of them are added, from the top; the result is pushed, unless it is the part's last and goes to c */
    int32_t merges_saved; /* how many of those, the lowest ones, were pushed in an earlier part */
    int32_t save;         /* what is pushed is needed in a later part */
} llmpar__gemm_step;

/* One tile of c during one part of the summed dim. */
typedef struct llmpar__gemm_tile {
    const float *a, *b;                /* panels: [k, tile rows], [k, tile columns] */
    float *c;
    float *stack, *saved;              /* [depth, tile rows, tile columns]: partial tiles of this part; those that outlive a part */
    int64_t ldc;
    const llmpar__gemm_step *steps;
    int64_t step_count;
    int rows, columns;                 /* that exist */
    int load, store;                   /* the first step starts from c; the last step's result goes to c */
} llmpar__gemm_tile;

/* What the packing functions of gemm_kernel.inc do, and their words. */
typedef struct llmpar__gemm_packing {
    const float *in;
    float *out;
    int64_t ld, k, valid, panels, distance;
    int transposed;
} llmpar__gemm_packing;

typedef struct llmpar__gemm_kernel {
    int64_t rows, columns;             /* of a full tile */
    void (*pack_a)(const llmpar__gemm_packing *packing);
    void (*pack_b)(const llmpar__gemm_packing *packing);
    void (*tile)(const llmpar__gemm_tile *tile);
} llmpar__gemm_kernel;

#if defined(__x86_64__)

/* In each 128-bit lane: four rows of four become four columns, which are stored where their k belongs. */
#define LLMPAR__GEMM_TRANSPOSE_X86(prefix, vector, in, ld, out, width, store) do { \
    vector x0_ = prefix##_loadu_ps(in), x1_ = prefix##_loadu_ps((in) + (ld)), x2_ = prefix##_loadu_ps((in) + 2 * (ld)), x3_ = prefix##_loadu_ps((in) + 3 * (ld)); \
    vector y0_ = prefix##_unpacklo_ps(x0_, x1_), y1_ = prefix##_unpacklo_ps(x2_, x3_), y2_ = prefix##_unpackhi_ps(x0_, x1_), y3_ = prefix##_unpackhi_ps(x2_, x3_); \
    store(prefix##_shuffle_ps(y0_, y1_, 0x44), out, width); \
    store(prefix##_shuffle_ps(y0_, y1_, 0xee), (out) + (width), width); \
    store(prefix##_shuffle_ps(y2_, y3_, 0x44), (out) + 2 * (width), width); \
    store(prefix##_shuffle_ps(y2_, y3_, 0xee), (out) + 3 * (width), width); \
} while (0)
#define LLMPAR__GEMM_STORE_2(v, out, width) do { __m256 v_ = (v); _mm_storeu_ps(out, _mm256_castps256_ps128(v_)); _mm_storeu_ps((out) + 4 * (width), _mm256_extractf128_ps(v_, 1)); } while (0)
/* The unmasked forms of these warn of uninitialised values in g++ 12's own header. */
#define LLMPAR__GEMM_512_loadu_ps(p) _mm512_loadu_ps(p)
#define LLMPAR__GEMM_512_unpacklo_ps(a, b) _mm512_maskz_unpacklo_ps(0xffff, a, b)
#define LLMPAR__GEMM_512_unpackhi_ps(a, b) _mm512_maskz_unpackhi_ps(0xffff, a, b)
#define LLMPAR__GEMM_512_shuffle_ps(a, b, order) _mm512_maskz_shuffle_ps(0xffff, a, b, order)
#define LLMPAR__GEMM_STORE_4(v, out, width) do { \
    __m512 v_ = (v); \
    _mm_storeu_ps(out, _mm512_maskz_extractf32x4_ps(0xf, v_, 0)); \
    _mm_storeu_ps((out) + 4 * (width), _mm512_maskz_extractf32x4_ps(0xf, v_, 1)); \
    _mm_storeu_ps((out) + 8 * (width), _mm512_maskz_extractf32x4_ps(0xf, v_, 2)); \
    _mm_storeu_ps((out) + 12 * (width), _mm512_maskz_extractf32x4_ps(0xf, v_, 3)); \
} while (0)

/* A step of the chain is written as its instructions: left to itself gcc 12 copies accumulators between registers, which costs a tenth of the speed.
   First the portable level, with the bits of gemm_portable.inc, whose rows serve processors without AVX. */
typedef __m256 llmpar__gemm_loose8 __attribute__((aligned(4), may_alias));
#define LLMPAR__GEMM_NAME(part) llmpar__gemm_avx_##part
#define LLMPAR__GEMM_TARGET __attribute__((target("avx")))
#define LLMPAR__GEMM_VECTOR __m256
#define LLMPAR__GEMM_LOOSE llmpar__gemm_loose8
#define LLMPAR__GEMM_LANES 8
#define LLMPAR__GEMM_ROWS 6
#define LLMPAR__GEMM_SPREAD(x) _mm256_set1_ps(x)
#define LLMPAR__GEMM_MULTIPLY_ADD(a, b, sum) __extension__ ({ __m256 t_ = sum, p_; __asm__("vmulps %3, %2, %1\n\tvaddps %0, %1, %0" : "+x"(t_), "=&x"(p_) : "x"(a), "x"(b)); t_; })
#define LLMPAR__GEMM_TRANSPOSE(in, ld, out, width) LLMPAR__GEMM_TRANSPOSE_X86(_mm256, __m256, in, ld, out, width, LLMPAR__GEMM_STORE_2)
#define LLMPAR__TEMPLATE 2 /* cpu/gemm_kernel.inc */
#include LLMPAR_HEADER

#define LLMPAR__GEMM_NAME(part) llmpar__gemm_avx2_##part
#define LLMPAR__GEMM_TARGET __attribute__((target("avx2,fma")))
#define LLMPAR__GEMM_VECTOR __m256
#define LLMPAR__GEMM_LOOSE llmpar__gemm_loose8
#define LLMPAR__GEMM_LANES 8
#define LLMPAR__GEMM_ROWS 6
#define LLMPAR__GEMM_SPREAD(x) _mm256_set1_ps(x)
#define LLMPAR__GEMM_MULTIPLY_ADD(a, b, sum) __extension__ ({ __m256 t_ = sum; __asm__("vfmadd231ps %2, %1, %0" : "+x"(t_) : "x"(a), "x"(b)); t_; })
#define LLMPAR__GEMM_TRANSPOSE(in, ld, out, width) LLMPAR__GEMM_TRANSPOSE_X86(_mm256, __m256, in, ld, out, width, LLMPAR__GEMM_STORE_2)
#define LLMPAR__TEMPLATE 2 /* cpu/gemm_kernel.inc */
#include LLMPAR_HEADER

typedef __m512 llmpar__gemm_loose16 __attribute__((aligned(4), may_alias));
#define LLMPAR__GEMM_NAME(part) llmpar__gemm_avx512_##part
#define LLMPAR__GEMM_TARGET __attribute__((target("avx512f,avx512vl,avx2,fma")))
#define LLMPAR__GEMM_VECTOR __m512
#define LLMPAR__GEMM_LOOSE llmpar__gemm_loose16
#define LLMPAR__GEMM_LANES 16
#define LLMPAR__GEMM_ROWS 12
#define LLMPAR__GEMM_SPREAD(x) _mm512_set1_ps(x)
#define LLMPAR__GEMM_MULTIPLY_ADD(a, b, sum) __extension__ ({ __m512 t_ = sum; __asm__("vfmadd231ps %2, %1, %0" : "+v"(t_) : "v"(a), "v"(b)); t_; })
#define LLMPAR__GEMM_TRANSPOSE(in, ld, out, width) LLMPAR__GEMM_TRANSPOSE_X86(LLMPAR__GEMM_512, __m512, in, ld, out, width, LLMPAR__GEMM_STORE_4)
#define LLMPAR__TEMPLATE 2 /* cpu/gemm_kernel.inc */
#include LLMPAR_HEADER

#undef LLMPAR__GEMM_TRANSPOSE_X86
#undef LLMPAR__GEMM_512_loadu_ps
#undef LLMPAR__GEMM_512_unpacklo_ps
#undef LLMPAR__GEMM_512_unpackhi_ps
#undef LLMPAR__GEMM_512_shuffle_ps
#undef LLMPAR__GEMM_STORE_2
#undef LLMPAR__GEMM_STORE_4

static llmpar__gemm_kernel llmpar__gemm_choose(llmpar_cpu_level level)
{
    llmpar__gemm_kernel avx = { 6, 16, llmpar__gemm_avx_pack_a, llmpar__gemm_avx_pack_b, llmpar__gemm_avx_tile };
    llmpar__gemm_kernel avx2 = { 6, 16, llmpar__gemm_avx2_pack_a, llmpar__gemm_avx2_pack_b, llmpar__gemm_avx2_tile };
    llmpar__gemm_kernel avx512 = { 12, 32, llmpar__gemm_avx512_pack_a, llmpar__gemm_avx512_pack_b, llmpar__gemm_avx512_tile };
    if (level == LLMPAR_CPU_AVX512) return avx512;
    if (level == LLMPAR_CPU_AVX2) return avx2;
    return avx;
}

#else /* aarch64: its vector unit and fma are always there */

typedef float32x4_t llmpar__gemm_loose4 __attribute__((aligned(4), may_alias));
#define LLMPAR__GEMM_NAME(part) llmpar__gemm_neon_##part
#define LLMPAR__GEMM_TARGET
#define LLMPAR__GEMM_VECTOR float32x4_t
#define LLMPAR__GEMM_LOOSE llmpar__gemm_loose4
#define LLMPAR__GEMM_LANES 4
#define LLMPAR__GEMM_ROWS 12
#define LLMPAR__GEMM_SPREAD(x) vdupq_n_f32(x)
#define LLMPAR__GEMM_MULTIPLY_ADD(a, b, sum) vfmaq_f32(sum, a, b)
#define LLMPAR__GEMM_TRANSPOSE(in, ld, out, width) do { int r_, k_; for (r_ = 0; r_ < 4; r_++) for (k_ = 0; k_ < 4; k_++) (out)[k_ * (width) + r_] = (in)[r_ * (ld) + k_]; } while (0)
#define LLMPAR__TEMPLATE 2 /* cpu/gemm_kernel.inc */
#include LLMPAR_HEADER

static llmpar__gemm_kernel llmpar__gemm_choose(llmpar_cpu_level level)
{
    llmpar__gemm_kernel neon = { 12, 8, llmpar__gemm_neon_pack_a, llmpar__gemm_neon_pack_b, llmpar__gemm_neon_tile };
    (void)level;
    return neon;
}

#endif

/* ---- blocks ---- */

/* A stretch of one segment inside the current part; the next chunk follows it in the panels. */
typedef struct llmpar__gemm_chunk { int32_t segment; int64_t begin, k; } llmpar__gemm_chunk;

typedef struct llmpar__gemm_run {
    const llmpar_gemm_args *args;
    llmpar__gemm_kernel kernel;
    int32_t threads, levels, levels_saved; /* partial tiles that a stack holds, at any time and between parts */
    int64_t block_m, block_n, block_k;    /* the first two multiples of the tile; not larger than the product needs */
    int64_t group_panels;                 /* of B that are packed at a time */
    int thin;                             /* few rows: a task packs its panel of B itself and uses it at once */
    size_t a_bytes, b_bytes, stack_bytes, saved_bytes, step_bytes, chunk_bytes;
    /* workspace, in this order; 64-byte aligned */
    float *a, *b, *stack, *saved;
    llmpar__gemm_step *steps;             /* of the current part */
    llmpar__gemm_chunk *chunks;
    /* the current block and part */
    int64_t i0, j0, m, n, a_panels, b_panels;
    int64_t k, step_count, chunk_count;
    int load, store;
    int64_t group, group_end;             /* the current group of B's panels */
    int64_t pack_shares, splits, bundle;  /* tasks that pack it; tasks that share it for the same panels of A; panels of A a task */
    int pack_a_first;                     /* few panels of A: they are packed before, not by the first task that uses one */
    /* where the next part begins */
    int32_t segment, piece, depth, lowest; /* lowest: stack depth reached in the current part; what lies below is from earlier ones */
    int64_t segment_done;                 /* k of `segment` already taken */
    int inside;                           /* a part ended inside `piece` */
} llmpar__gemm_run;

/* Sizes in cache: a group of B's panels and a panel of A in L2, the block of c and its A in L3. Packing costs less the larger a block is; the stacks that
   outlive a part grow with it, so a block with stacks is smaller. */
enum { LLMPAR__GEMM_BLOCK_M = 1024, LLMPAR__GEMM_BLOCK_N = 4096, LLMPAR__GEMM_STACK_M = 768, LLMPAR__GEMM_STACK_N = 1536, LLMPAR__GEMM_GROUP_N = 192, LLMPAR__GEMM_BUNDLE_M = 96 };
/* Longest parts of the summed dim: in general, of whole pieces, and of a thin product. */
enum { LLMPAR__GEMM_PART_K = 768, LLMPAR__GEMM_PIECE_K = 1024, LLMPAR__GEMM_THIN_K = 256 };
/* Fewer multiplications than this are done before a worker has woken up. */
#define LLMPAR__GEMM_SERIAL (1 << 20)

static size_t llmpar__gemm_round(int64_t bytes) { return (size_t)llmpar_round_up(bytes, 64); }

/* Size of blocks of at most `limit` (a multiple of unit) that cut an extent into equal parts, the last one a little smaller. */
static int64_t llmpar__gemm_even_blocks(int64_t extent, int64_t limit, int64_t unit)
{
    int64_t blocks = (extent + limit - 1) / limit;
    return blocks ? llmpar_round_up((extent + blocks - 1) / blocks, unit) : 0;
}

/* How deep a stack is where a part ends, at most: after p pieces it holds as many partial tiles as p has one bits. */
static int32_t llmpar__gemm_depth_between_parts(const llmpar_gemm_args *args, int64_t part)
{
    int64_t k = 0, boundary = part;
    int32_t s, deepest = 0;
    for (s = 0; s < args->segment_count; s++) {
        for (k += args->segments[s].k; boundary < k; boundary += part) { /* inside this segment's piece, or at its beginning */
            int32_t depth = 0, p;
            for (p = args->segments[s].piece; p > 0; p /= 2) depth += p % 2;
            if (depth > deepest) deepest = depth;
        }
    }
    return deepest;
}

/* Length of a part: even parts of at most PART_K; where equal pieces allow it, whole subtrees of up to PIECE_K, so that a part that ends leaves one partial tile. */
static int64_t llmpar__gemm_part(int64_t total, int64_t pieces)
{
    int64_t piece = total / pieces, part = piece;
    if (pieces == 1 || total <= LLMPAR__GEMM_PART_K || total % pieces) return llmpar__gemm_even_blocks(total, LLMPAR__GEMM_PART_K, 1);
    if (piece > LLMPAR__GEMM_PIECE_K) return llmpar__gemm_even_blocks(piece, LLMPAR__GEMM_PIECE_K, 1);
    while (part * 2 <= LLMPAR__GEMM_PIECE_K && part < total) part *= 2;
    return part;
}

static void llmpar__gemm_prepare(llmpar__gemm_run *run, const llmpar__cpu *cpu, const llmpar_gemm_args *args)
{
    int64_t total = 0, parts, tile, limit_n;
    int32_t s, n;
    memset(run, 0, sizeof *run);
    run->args = args;
    run->kernel = llmpar__gemm_choose(cpu->level);
    run->threads = llmpar__pool_threads(cpu);
    for (n = args->pieces - 1; n > 0; n /= 2) run->levels++;
    for (s = 0; s < args->segment_count; s++) total += args->segments[s].k;
    run->thin = args->m <= 2 * run->kernel.rows;
    run->block_k = run->thin ? llmpar__gemm_even_blocks(total, LLMPAR__GEMM_THIN_K, 1) : llmpar__gemm_part(total, args->pieces);
    parts = run->block_k ? (total + run->block_k - 1) / run->block_k : 0;
    if (parts > 1) run->levels_saved = llmpar__gemm_depth_between_parts(args, run->block_k);
    limit_n = run->levels_saved && !run->thin ? LLMPAR__GEMM_STACK_N : LLMPAR__GEMM_BLOCK_N;
    run->block_m = llmpar__gemm_even_blocks(args->m, run->levels_saved && !run->thin ? LLMPAR__GEMM_STACK_M : LLMPAR__GEMM_BLOCK_M, run->kernel.rows);
    run->block_n = llmpar__gemm_even_blocks(args->n, limit_n, run->kernel.columns);
    run->group_panels = (run->block_n < LLMPAR__GEMM_GROUP_N ? run->block_n : (int64_t)LLMPAR__GEMM_GROUP_N) / run->kernel.columns;

    tile = run->kernel.rows * run->kernel.columns;
    run->a_bytes = llmpar__gemm_round(run->block_m * run->block_k * (int64_t)sizeof(float));
    run->b_bytes = llmpar__gemm_round((run->thin ? run->threads : run->group_panels) * run->kernel.columns * run->block_k * (int64_t)sizeof(float));
    run->stack_bytes = llmpar__gemm_round(run->threads * run->levels * tile * (int64_t)sizeof(float));
    run->saved_bytes = llmpar__gemm_round(run->block_m * run->block_n * run->levels_saved * (int64_t)sizeof(float));
    run->step_bytes = llmpar__gemm_round(((int64_t)args->pieces + 1) * (int64_t)sizeof(llmpar__gemm_step));
    run->chunk_bytes = llmpar__gemm_round((int64_t)args->segment_count * (int64_t)sizeof(llmpar__gemm_chunk));
}

/* With room to align. */
static size_t llmpar__gemm_bytes(const llmpar__gemm_run *run)
{
    return run->a_bytes + run->b_bytes + run->stack_bytes + run->saved_bytes + run->step_bytes + run->chunk_bytes + 63;
}

static void llmpar__gemm_lay_out(llmpar__gemm_run *run, void *workspace)
{
    char *at = (char *)workspace;
    at += (64 - (uintptr_t)at % 64) % 64;
    run->a = (float *)(void *)at;
    at += run->a_bytes;
    run->b = (float *)(void *)at;
    at += run->b_bytes;
    run->stack = (float *)(void *)at;
    at += run->stack_bytes;
    run->saved = (float *)(void *)at;
    at += run->saved_bytes;
    run->steps = (llmpar__gemm_step *)(void *)at;
    at += run->step_bytes;
    run->chunks = (llmpar__gemm_chunk *)(void *)at;
}

static void llmpar__gemm_add_step(llmpar__gemm_run *run, int64_t k, int32_t merges)
{
    llmpar__gemm_step *step = &run->steps[run->step_count++];
    int32_t kept = run->depth - merges;
    step->k = k;
    step->depth = run->depth;
    step->merges = merges;
    step->merges_saved = kept < run->lowest ? run->lowest - kept : 0;
    step->save = 0;
    if (kept < run->lowest) run->lowest = kept;
}

/* Chunks of the next part, and its steps up to where it ends. A piece without terms is a step without terms: its +0 is added like any other. */
static void llmpar__gemm_collect_part(llmpar__gemm_run *run)
{
    const llmpar_gemm_args *args = run->args;
    int64_t step_k = 0;
    run->k = run->step_count = run->chunk_count = 0;
    run->load = run->inside || args->accumulate;
    run->store = run->inside = 0;
    run->lowest = run->depth;
    while (run->piece < args->pieces) {
        const llmpar_gemm_segment *segment = run->segment < args->segment_count ? &args->segments[run->segment] : NULL;
        if (!segment || segment->piece != run->piece) { /* the piece is complete */
            int32_t done = ++run->piece, merges = 0;
            if (done == args->pieces) merges = run->depth;
            else for (; done % 2 == 0; done /= 2) merges++;
            llmpar__gemm_add_step(run, step_k, merges);
            run->depth += 1 - merges;
            step_k = 0;
        } else if (run->segment_done == segment->k) {
            run->segment++;
            run->segment_done = 0;
        } else if (run->k < run->block_k) {
            llmpar__gemm_chunk *chunk = &run->chunks[run->chunk_count++];
            int64_t left = segment->k - run->segment_done, room = run->block_k - run->k;
            chunk->segment = run->segment;
            chunk->begin = run->segment_done;
            chunk->k = left < room ? left : room;
            run->segment_done += chunk->k;
            run->k += chunk->k;
            step_k += chunk->k;
        } else { /* the part is full */
            run->inside = step_k > 0;
            break;
        }
    }
    if (run->inside) llmpar__gemm_add_step(run, step_k, 0);
    run->store = run->inside || run->piece == args->pieces;
}

/* 0 when there is no part left. */
static int llmpar__gemm_next_part(llmpar__gemm_run *run)
{
    int64_t s;
    int32_t lowest;
    if (run->piece == run->args->pieces) return 0;
    llmpar__gemm_collect_part(run);
    /* What is pushed and not taken off before the part ends is saved. */
    lowest = run->levels + 1;
    for (s = run->step_count - 1; s >= 0; s--) {
        int32_t kept = run->steps[s].depth - run->steps[s].merges;
        run->steps[s].save = kept < lowest && !(s == run->step_count - 1 && run->store);
        if (kept < lowest) lowest = kept;
    }
    return 1;
}

/* Panels [first, first + panels) of A, or of B, for the current part. */
static void llmpar__gemm_pack(const llmpar__gemm_run *run, int is_b, int64_t first, int64_t panels, float *out)
{
    const llmpar_gemm_args *args = run->args;
    int64_t width = is_b ? run->kernel.columns : run->kernel.rows, at = (is_b ? run->j0 : run->i0) + first * width, c;
    llmpar__gemm_packing packing;
    packing.transposed = is_b ? args->kind == LLMPAR_GEMM_NT : args->kind != LLMPAR_GEMM_TN;
    packing.valid = is_b ? run->j0 + run->n - at : run->i0 + run->m - at;
    packing.panels = panels;
    packing.distance = width * run->k;
    packing.out = out;
    for (c = 0; c < run->chunk_count; c++) {
        const llmpar__gemm_chunk *chunk = &run->chunks[c];
        const llmpar_gemm_segment *segment = &args->segments[chunk->segment];
        packing.k = chunk->k;
        packing.ld = is_b ? segment->ldb : segment->lda;
        packing.in = (const float *)(is_b ? segment->b : segment->a) + (packing.transposed ? at * packing.ld + chunk->begin : chunk->begin * packing.ld + at);
        if (is_b) run->kernel.pack_b(&packing);
        else run->kernel.pack_a(&packing);
        packing.out += chunk->k * width;
    }
}

static float *llmpar__gemm_a_panel(const llmpar__gemm_run *run, int64_t i) { return run->a + i * run->kernel.rows * run->k; }

/* Shares of the current group of B, then, when it is their turn, the panels of A. */
static void llmpar__gemm_pack_task(void *arg, int64_t task, int32_t worker)
{
    const llmpar__gemm_run *run = (const llmpar__gemm_run *)arg;
    (void)worker;
    if (task < run->pack_shares) {
        int64_t group = run->group_end - run->group, first = llmpar_piece_begin(task, group, run->pack_shares), end = llmpar_piece_begin(task + 1, group, run->pack_shares);
        llmpar__gemm_pack(run, 1, run->group + first, end - first, run->b + first * run->kernel.columns * run->k);
    } else {
        int64_t i = task - run->pack_shares;
        llmpar__gemm_pack(run, 0, i, 1, llmpar__gemm_a_panel(run, i));
    }
}

static void llmpar__gemm_tile_at(const llmpar__gemm_run *run, int64_t i, int64_t j, const float *b, int32_t worker)
{
    llmpar__gemm_tile tile;
    int64_t rows = run->m - i * run->kernel.rows, columns = run->n - j * run->kernel.columns, size = run->kernel.rows * run->kernel.columns;
    tile.a = llmpar__gemm_a_panel(run, i);
    tile.b = b;
    tile.c = (float *)run->args->c + (run->i0 + i * run->kernel.rows) * run->args->ldc + run->j0 + j * run->kernel.columns;
    tile.stack = run->stack + worker * run->levels * size;
    tile.saved = run->saved + (i * run->b_panels + j) * run->levels_saved * size;
    tile.ldc = run->args->ldc;
    tile.steps = run->steps;
    tile.step_count = run->step_count;
    tile.rows = (int)(rows < run->kernel.rows ? rows : run->kernel.rows);
    tile.columns = (int)(columns < run->kernel.columns ? columns : run->kernel.columns);
    tile.load = run->load;
    tile.store = run->store;
    run->kernel.tile(&tile);
}

/* Each panel of A of a bundle, which stays in L1, with a share of the group of B, which stays in L2 for the next one. */
static void llmpar__gemm_tile_task(void *arg, int64_t task, int32_t worker)
{
    const llmpar__gemm_run *run = (const llmpar__gemm_run *)arg;
    int64_t i = task / run->splits * run->bundle, i_end = i + run->bundle < run->a_panels ? i + run->bundle : run->a_panels, share = task % run->splits;
    int64_t group = run->group_end - run->group, begin = llmpar_piece_begin(share, group, run->splits), end = llmpar_piece_begin(share + 1, group, run->splits), j;
    if (run->group == 0 && !run->pack_a_first) llmpar__gemm_pack(run, 0, i, i_end - i, llmpar__gemm_a_panel(run, i));
    for (; i < i_end; i++)
        for (j = begin; j < end; j++) llmpar__gemm_tile_at(run, i, run->group + j, run->b + j * run->kernel.columns * run->k, worker);
}

/* One panel of B, packed here, with the one or two panels of A. */
static void llmpar__gemm_thin_task(void *arg, int64_t task, int32_t worker)
{
    const llmpar__gemm_run *run = (const llmpar__gemm_run *)arg;
    float *b = run->b + worker * run->kernel.columns * run->block_k;
    int64_t i;
    llmpar__gemm_pack(run, 1, task, 1, b);
    for (i = 0; i < run->a_panels; i++) llmpar__gemm_tile_at(run, i, task, b, worker);
}

static void llmpar__gemm_block(llmpar__gemm_run *run, llmpar__cpu *cpu)
{
    run->a_panels = (run->m + run->kernel.rows - 1) / run->kernel.rows;
    run->b_panels = (run->n + run->kernel.columns - 1) / run->kernel.columns;
    run->pack_a_first = run->threads > 1 && run->a_panels < 4 * run->threads; /* a few tasks a worker */
    run->bundle = 1;
    if (run->args->kind == LLMPAR_GEMM_TN && (run->threads == 1 || run->m >= 4 * run->threads * LLMPAR__GEMM_BUNDLE_M)) run->bundle = LLMPAR__GEMM_BUNDLE_M / run->kernel.rows;
    run->segment = run->piece = run->depth = 0;
    run->segment_done = 0;
    run->inside = 0;
    while (llmpar__gemm_next_part(run)) {
        if (run->thin) {
            llmpar__gemm_pack(run, 0, 0, run->a_panels, run->a);
            llmpar__pool_run(cpu, llmpar__gemm_thin_task, run, run->b_panels);
            continue;
        }
        for (run->group = 0; run->group < run->b_panels; run->group = run->group_end) {
            int64_t panels = run->b_panels - run->group;
            if (panels > run->group_panels) panels = run->group_panels;
            run->group_end = run->group + panels;
            run->splits = run->pack_a_first ? (4 * run->threads + run->a_panels - 1) / run->a_panels : 1;
            if (run->splits > panels) run->splits = panels;
            run->pack_shares = run->threads == 1 ? 1 : panels < 2 * run->threads ? panels : 2 * run->threads;
            llmpar__pool_run(cpu, llmpar__gemm_pack_task, run, run->pack_shares + (run->group == 0 && run->pack_a_first ? run->a_panels : 0));
            llmpar__pool_run(cpu, llmpar__gemm_tile_task, run, (run->a_panels + run->bundle - 1) / run->bundle * run->splits);
        }
    }
}

static llmpar_status llmpar__gemm_run_f32(llmpar_device *device, const llmpar_gemm_args *args)
{
    llmpar__cpu cpu = *(llmpar__cpu *)device->state;
    llmpar__gemm_run run;
    size_t bytes;
    llmpar__gemm_prepare(&run, &cpu, args);
    bytes = args->workspace ? args->workspace_bytes : 0;
    if (bytes < llmpar__gemm_bytes(&run))
        return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "gemm: expected a workspace of %llu bytes, got %llu", (unsigned long long)llmpar__gemm_bytes(&run), (unsigned long long)bytes);
    llmpar__gemm_lay_out(&run, args->workspace);
    if ((double)args->m * (double)args->n * (double)run.block_k < LLMPAR__GEMM_SERIAL) cpu.pool = NULL;
    for (run.j0 = 0; run.j0 < args->n; run.j0 += run.block_n) {
        run.n = args->n - run.j0 < run.block_n ? args->n - run.j0 : run.block_n;
        for (run.i0 = 0; run.i0 < args->m; run.i0 += run.block_m) {
            run.m = args->m - run.i0 < run.block_m ? args->m - run.i0 : run.block_m;
            llmpar__gemm_block(&run, &cpu);
        }
    }
    return LLMPAR_OK;
}

#undef LLMPAR__GEMM_SERIAL

#endif /* LLMPAR_NO_SIMD */

/* ---- the slot ---- */

static llmpar_status llmpar__gemm_check(llmpar_device *device, const llmpar_gemm_args *args)
{
    int32_t s, previous = 0;
    if (args->kind != LLMPAR_GEMM_NT && args->kind != LLMPAR_GEMM_NN && args->kind != LLMPAR_GEMM_TN)
        return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "gemm: kind %d is none of NT, NN, TN", (int)args->kind);
    if (args->dtype != LLMPAR_F32 && args->dtype != LLMPAR_F64)
        return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "gemm: expected dtype f32 or f64, got %s", llmpar_dtype_name(args->dtype));
    if (args->m < 0 || args->n < 0) return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "gemm: negative shape m = %lld, n = %lld", (long long)args->m, (long long)args->n);
    if (args->m > 1 && args->ldc < args->n) return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "gemm: ldc = %lld is less than n = %lld", (long long)args->ldc, (long long)args->n);
    if (args->pieces < 1) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "gemm: expected at least 1 piece, got %d", (int)args->pieces);
    if (args->accumulate && args->pieces != 1) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "gemm: accumulate needs exactly 1 piece, got %d", (int)args->pieces);
    for (s = 0; s < args->segment_count; s++) {
        const llmpar_gemm_segment *segment = &args->segments[s];
        int64_t a_width = args->kind == LLMPAR_GEMM_TN ? args->m : segment->k, b_width = args->kind == LLMPAR_GEMM_NT ? segment->k : args->n;
        int64_t a_rows = args->kind == LLMPAR_GEMM_TN ? segment->k : args->m, b_rows = args->kind == LLMPAR_GEMM_NT ? args->n : segment->k;
        if (segment->k < 0) return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "gemm: segment %d has k = %lld", (int)s, (long long)segment->k);
        if (segment->piece < previous || segment->piece >= args->pieces)
            return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "gemm: segment %d is of piece %d, expected %d to %d", (int)s, (int)segment->piece, (int)previous, (int)(args->pieces - 1));
        previous = segment->piece;
        if (a_rows > 1 && segment->lda < a_width)
            return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "gemm: segment %d: lda = %lld is less than the row of %lld", (int)s, (long long)segment->lda, (long long)a_width);
        if (b_rows > 1 && segment->ldb < b_width)
            return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "gemm: segment %d: ldb = %lld is less than the row of %lld", (int)s, (long long)segment->ldb, (long long)b_width);
    }
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF size_t llmpar__cpu_gemm_workspace(llmpar_device *device, const llmpar_gemm_args *args)
{
#if !defined(LLMPAR_NO_SIMD)
    if (args->dtype == LLMPAR_F32 && args->m > 0 && args->n > 0) {
        llmpar__gemm_run run;
        llmpar__gemm_prepare(&run, (const llmpar__cpu *)device->state, args);
        return llmpar__gemm_bytes(&run);
    }
#endif
    (void)device;
    (void)args;
    return 0;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_gemm(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar_gemm_args copy = *args; /* pool tasks take a pointer to what is not const */
    llmpar_status status = llmpar__gemm_check(device, args);
    (void)stream;
    if (status || args->m == 0 || args->n == 0) return status;
    if (args->dtype == LLMPAR_F64) {
        llmpar__pool_run(cpu, llmpar__gemm_row_f64, &copy, args->m);
        return LLMPAR_OK;
    }
#if !defined(LLMPAR_NO_SIMD)
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx"))
#endif
        return llmpar__gemm_run_f32(device, args);
#endif
#if !defined(__aarch64__) || defined(LLMPAR_NO_SIMD)
    llmpar__pool_run(cpu, llmpar__gemm_row_f32, &copy, args->m);
    return LLMPAR_OK;
#endif
}

#undef LLMPAR__GEMM_CHAIN_F32
#undef LLMPAR__GEMM_CHAIN_F64
/* ==== src/cpu/attention.c ==== */
/* attention: causal softmax attention with grouped queries and packed documents, forward and backward (Dao et al. 2022, "FlashAttention";
   lse recomputation in backward). Scores exist only as tiles:

        keys of one document, tiles of 64 counted from its start
        | tile 0 | tile 1 | tile 2 |
     q  |XXXXXXXX|XXXXX   |        |   a block of query rows walks the key tiles from left to right with a running maximum;
     q  |XXXXXXXX|XXXXXX  |        |   only the columns its last row may see are computed
     q  |XXXXXXXX|XXXXXXX |        |

   A row's bits depend on its own query and on the keys of its document up to itself, never on the rows beside it: each element of a product is one
   chain, and a column that a row may not see weighs +0 in every sum, which is the same as being left out (results have +0 added at the end, so
   that a chain that underflowed to -0 cannot tell). So a decode step gives the bits of the whole sequence, and a document those it has alone.
   A task is one KV head of one sequence; its keys are packed once and used by every query head of the group. */
/* ==== src/cpu/kernels_internal.h ==== */
/* kernels: what the operations' files and their kernels (.inc, compiled once a level by kernels_*.c) tell each other: jobs, sizes of tasks, and the names. */
#ifndef LLMPAR_KERNELS_INTERNAL_H
#define LLMPAR_KERNELS_INTERNAL_H

/* ==== src/cpu/vector.h ==== */
/* vector: short vectors of one level, and the names a kernel template is made from.

   A template (norm.inc, attention.inc, ...) is included once a level, by kernels_*.c, with LLMPAR__VLEVEL set to one of
     portable_f64, portable   plain vector extensions, a*b+c unfused: the readable specification
     avx2, avx512             the same text with wider vectors and fused multiply-adds
   Every kernel is a task for llmpar__pool_run, so one table of four pointers dispatches it:
     static const llmpar__kernel llmpar__norm_forward[4] = LLMPAR__VKERNELS(norm_forward);
   NARROW ones wait for memory, not for arithmetic: they have no instance for AVX-512, where AVX2's serves as well.
   Sums along a vector have a fixed lane structure, tails run the same code masked, loads and stores need no alignment: no result
   depends on where an element lies. */
#ifndef LLMPAR_VECTOR_H
#define LLMPAR_VECTOR_H

#include <string.h>

#if defined(__x86_64__) && !defined(LLMPAR_NO_SIMD)
#define LLMPAR__VX86 1
#include <immintrin.h>
#else
#define LLMPAR__VX86 0
#endif

typedef void (*llmpar__kernel)(void *arg, int64_t task, int32_t worker);

#define LLMPAR__VPASTE2(a, b) a##b
#define LLMPAR__VPASTE(a, b) LLMPAR__VPASTE2(a, b)
#define LLMPAR__VFN(name) LLMPAR__VPASTE(llmpar__##name##_, LLMPAR__VLEVEL)   /* a kernel's name at this level */
#define LLMPAR__V(name) LLMPAR__VPASTE(llmpar__v_##name##_, LLMPAR__VLEVEL)   /* a vector function: LLMPAR__V(load)(p) */
#define LLMPAR__VREAL LLMPAR__VPASTE(llmpar__real_, LLMPAR__VLEVEL)           /* float or double */
#define LLMPAR__VEC LLMPAR__VPASTE(llmpar__vec_, LLMPAR__VLEVEL)              /* LLMPAR__VLANES of them */
#define LLMPAR__VBITS LLMPAR__VPASTE(llmpar__bits_, LLMPAR__VLEVEL)           /* the unsigned integers of the same shape */
#define LLMPAR__VLANES LLMPAR__VPASTE(LLMPAR__VLANES_, LLMPAR__VLEVEL)
#define LLMPAR__VTARGET LLMPAR__VPASTE(LLMPAR__VTARGET_, LLMPAR__VLEVEL)
#define LLMPAR__VBUILT LLMPAR__VPASTE(LLMPAR__VBUILT_, LLMPAR__VLEVEL)        /* for #if: this build has the level */
#define LLMPAR__VINLINE static inline __attribute__((always_inline, unused)) LLMPAR__VTARGET
#define LLMPAR__VSHARED static __attribute__((noinline, unused)) LLMPAR__VTARGET /* called rarely: once is enough */
#define LLMPAR__VKERNEL LLMPAR__PRIVATE_DEF LLMPAR__VTARGET
#if defined(__clang__)
#define LLMPAR__VUNROLL _Pragma("unroll")
#else
#define LLMPAR__VUNROLL _Pragma("GCC unroll 16")
#endif

#define LLMPAR__VLANES_portable_f64 2
#define LLMPAR__VLANES_portable 4
#define LLMPAR__VLANES_avx2 8
#define LLMPAR__VLANES_avx512 16
#define LLMPAR__VTARGET_portable_f64
#define LLMPAR__VTARGET_portable
#define LLMPAR__VTARGET_avx2 __attribute__((target("avx2,fma")))
#define LLMPAR__VTARGET_avx512 __attribute__((target("avx512f,avx2,fma")))
#define LLMPAR__VBUILT_portable_f64 1
#define LLMPAR__VBUILT_portable 1
#define LLMPAR__VBUILT_avx2 LLMPAR__VX86
#define LLMPAR__VBUILT_avx512 LLMPAR__VX86

#define LLMPAR__VDECLARE_AT(name, level) LLMPAR__PRIVATE LLMPAR__VTARGET_##level void llmpar__##name##_##level(void *arg, int64_t task, int32_t worker);
#if LLMPAR__VX86
#define LLMPAR__VDECLARE(name) LLMPAR__VDECLARE_AT(name, portable_f64) LLMPAR__VDECLARE_AT(name, portable) LLMPAR__VDECLARE_AT(name, avx2) LLMPAR__VDECLARE_AT(name, avx512)
#define LLMPAR__VDECLARE_NARROW(name) LLMPAR__VDECLARE_AT(name, portable_f64) LLMPAR__VDECLARE_AT(name, portable) LLMPAR__VDECLARE_AT(name, avx2)
#define LLMPAR__VKERNELS(name) { llmpar__##name##_portable_f64, llmpar__##name##_portable, llmpar__##name##_avx2, llmpar__##name##_avx512 }
#define LLMPAR__VKERNELS_NARROW(name) { llmpar__##name##_portable_f64, llmpar__##name##_portable, llmpar__##name##_avx2, llmpar__##name##_avx2 }
#else
#define LLMPAR__VDECLARE(name) LLMPAR__VDECLARE_AT(name, portable_f64) LLMPAR__VDECLARE_AT(name, portable)
#define LLMPAR__VDECLARE_NARROW(name) LLMPAR__VDECLARE(name)
#define LLMPAR__VKERNELS(name) { llmpar__##name##_portable_f64, llmpar__##name##_portable, llmpar__##name##_portable, llmpar__##name##_portable }
#define LLMPAR__VKERNELS_NARROW(name) LLMPAR__VKERNELS(name)
#endif

/* Which of the four a call runs. */
static inline int llmpar__v_index(const llmpar__cpu *cpu, llmpar_dtype dtype)
{
    if (dtype == LLMPAR_F64) return 0;
    return cpu->level == LLMPAR_CPU_AVX512 ? 3 : cpu->level == LLMPAR_CPU_AVX2 ? 2 : 1;
}
static inline int64_t llmpar__v_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t llmpar__v_max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t llmpar__v_blocks(int64_t count, int64_t block) { return (count + block - 1) / block; }
/* Most operations take F32 and F64; anything else is told so. */
static inline llmpar_status llmpar__v_check(llmpar_device *device, const char *name, llmpar_dtype dtype)
{
    if (dtype == LLMPAR_F32 || dtype == LLMPAR_F64) return LLMPAR_OK;
    return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "%s: dtype %s, expected f32 or f64", name, llmpar_dtype_name(dtype));
}

typedef double llmpar__real_portable_f64;
typedef double llmpar__vec_portable_f64 __attribute__((vector_size(16)));
typedef double llmpar__loose_portable_f64 __attribute__((vector_size(16), aligned(8), may_alias));
typedef uint64_t llmpar__bits_portable_f64 __attribute__((vector_size(16)));
typedef uint64_t llmpar__bit_portable_f64;
typedef float llmpar__real_portable;
typedef float llmpar__vec_portable __attribute__((vector_size(16)));
typedef float llmpar__loose_portable __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t llmpar__bits_portable __attribute__((vector_size(16)));
typedef uint32_t llmpar__bit_portable;

#define LLMPAR__VLEVEL portable_f64
#define LLMPAR__VSPREAD(x) { x, x }
#define LLMPAR__TEMPLATE 3 /* cpu/vector_portable.inc */
#include LLMPAR_HEADER
static inline llmpar__vec_portable_f64 llmpar__v_sqrt_portable_f64(llmpar__vec_portable_f64 x)
{
    llmpar__vec_portable_f64 y = { llmpar_sqrt_f64(x[0]), llmpar_sqrt_f64(x[1]) };
    return y;
}
#define LLMPAR__VLEVEL portable
#define LLMPAR__VSPREAD(x) { x, x, x, x }
#define LLMPAR__TEMPLATE 3 /* cpu/vector_portable.inc */
#include LLMPAR_HEADER
static inline llmpar__vec_portable llmpar__v_sqrt_portable(llmpar__vec_portable x)
{
    llmpar__vec_portable y = { llmpar_sqrt_f32(x[0]), llmpar_sqrt_f32(x[1]), llmpar_sqrt_f32(x[2]), llmpar_sqrt_f32(x[3]) };
    return y;
}

#if LLMPAR__VX86
typedef float llmpar__real_avx2;
typedef uint32_t llmpar__bit_avx2;
typedef __m256 llmpar__vec_avx2;
typedef uint32_t llmpar__bits_avx2 __attribute__((vector_size(32)));
#define LLMPAR__VLEVEL avx2
LLMPAR__VINLINE __m256 llmpar__v_splat_avx2(float x) { return _mm256_set1_ps(x); }
LLMPAR__VINLINE __m256i llmpar__v_mask_avx2(int64_t n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
LLMPAR__VINLINE __m256 llmpar__v_load_avx2(const float *p) { return _mm256_loadu_ps(p); }
LLMPAR__VINLINE void llmpar__v_store_avx2(float *p, __m256 x) { _mm256_storeu_ps(p, x); }
LLMPAR__VINLINE __m256 llmpar__v_load_n_avx2(const float *p, int64_t n) { return n >= 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, llmpar__v_mask_avx2(n)); }
LLMPAR__VINLINE void llmpar__v_store_n_avx2(float *p, int64_t n, __m256 x)
{
    if (n >= 8) _mm256_storeu_ps(p, x);
    else _mm256_maskstore_ps(p, llmpar__v_mask_avx2(n), x);
}
LLMPAR__VINLINE __m256 llmpar__v_keep_avx2(__m256 x, int64_t n, __m256 other) { return n >= 8 ? x : _mm256_blendv_ps(other, x, _mm256_castsi256_ps(llmpar__v_mask_avx2(n))); }
LLMPAR__VINLINE __m256 llmpar__v_fma_avx2(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
LLMPAR__VINLINE __m256 llmpar__v_less_avx2(__m256 a, __m256 b, __m256 yes, __m256 no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
LLMPAR__VINLINE __m256 llmpar__v_nan_avx2(__m256 a, __m256 yes, __m256 no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
LLMPAR__VINLINE __m256 llmpar__v_larger_avx2(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
LLMPAR__VINLINE float llmpar__v_larger_lane_avx2(__m256 x)
{
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
}
LLMPAR__VINLINE __m256 llmpar__v_sqrt_avx2(__m256 x) { return _mm256_sqrt_ps(x); }
/* out[8, 8] = in[8, 8] transposed */
LLMPAR__VINLINE void llmpar__v_transpose_avx2(float *out, int64_t ld_out, const float *in, int64_t ld_in)
{
    __m256 a[8], b[8];
    LLMPAR__VUNROLL
    for (int i = 0; i < 8; i += 2) { /* pairs of rows */
        __m256 x = _mm256_loadu_ps(in + i * ld_in), y = _mm256_loadu_ps(in + (i + 1) * ld_in);
        a[i] = _mm256_unpacklo_ps(x, y);
        a[i + 1] = _mm256_unpackhi_ps(x, y);
    }
    LLMPAR__VUNROLL
    for (int i = 0; i < 8; i += 4) { /* fours */
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    LLMPAR__VUNROLL
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(out + i * ld_out, _mm256_permute2f128_ps(b[i], b[i + 4], 0x20));
        _mm256_storeu_ps(out + (i + 4) * ld_out, _mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
    }
}
#undef LLMPAR__VLEVEL

typedef float llmpar__real_avx512;
typedef uint32_t llmpar__bit_avx512;
typedef __m512 llmpar__vec_avx512;
typedef uint32_t llmpar__bits_avx512 __attribute__((vector_size(64)));
#define LLMPAR__VLEVEL avx512
LLMPAR__VINLINE __m512 llmpar__v_splat_avx512(float x) { return _mm512_set1_ps(x); }
LLMPAR__VINLINE __mmask16 llmpar__v_mask_avx512(int64_t n) { return (__mmask16)(n <= 0 ? 0u : n >= 16 ? 0xffffu : (1u << n) - 1u); }
LLMPAR__VINLINE __m512 llmpar__v_load_avx512(const float *p) { return _mm512_loadu_ps(p); }
LLMPAR__VINLINE void llmpar__v_store_avx512(float *p, __m512 x) { _mm512_storeu_ps(p, x); }
LLMPAR__VINLINE __m512 llmpar__v_load_n_avx512(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(llmpar__v_mask_avx512(n), p); }
LLMPAR__VINLINE void llmpar__v_store_n_avx512(float *p, int64_t n, __m512 x) { _mm512_mask_storeu_ps(p, llmpar__v_mask_avx512(n), x); }
LLMPAR__VINLINE __m512 llmpar__v_keep_avx512(__m512 x, int64_t n, __m512 other) { return _mm512_mask_blend_ps(llmpar__v_mask_avx512(n), other, x); }
LLMPAR__VINLINE __m512 llmpar__v_fma_avx512(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
LLMPAR__VINLINE __m512 llmpar__v_less_avx512(__m512 a, __m512 b, __m512 yes, __m512 no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }
LLMPAR__VINLINE __m512 llmpar__v_nan_avx512(__m512 a, __m512 yes, __m512 no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), no, yes); }
/* The maskz forms only because gcc 12 warns about its own header's plain ones in C++. */
LLMPAR__VINLINE __m512 llmpar__v_larger_avx512(__m512 a, __m512 b) { return _mm512_maskz_max_ps((__mmask16)0xffff, a, b); }
LLMPAR__VINLINE float llmpar__v_larger_lane_avx512(__m512 x)
{
    __m512d y = _mm512_castps_pd(x);
    return llmpar__v_larger_lane_avx2(_mm256_max_ps(_mm256_castpd_ps(_mm512_maskz_extractf64x4_pd((__mmask8)0xff, y, 0)), _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd((__mmask8)0xff, y, 1))));
}
LLMPAR__VINLINE void llmpar__v_transpose_avx512(float *out, int64_t ld_out, const float *in, int64_t ld_in) { llmpar__v_transpose_avx2(out, ld_out, in, ld_in); }
LLMPAR__VINLINE __m512 llmpar__v_sqrt_avx512(__m512 x) { return _mm512_maskz_sqrt_ps((__mmask16)0xffff, x); }
#undef LLMPAR__VLEVEL
#endif

#endif
/* ---- src/cpu/kernels_internal.h goes on ---- */

/* norm */
typedef struct llmpar__norm_job { const llmpar_rmsnorm_args *args; int64_t step; } llmpar__norm_job;
typedef struct llmpar__norm_backward_job { const llmpar_rmsnorm_backward_args *args; int64_t step, blocks; } llmpar__norm_backward_job;
LLMPAR__VDECLARE_NARROW(norm_forward)
LLMPAR__VDECLARE_NARROW(norm_dx)
LLMPAR__VDECLARE_NARROW(norm_dw)

/* rope */
typedef struct llmpar__rope_job { const llmpar_rope_args *args; int64_t step; } llmpar__rope_job;
LLMPAR__VDECLARE_NARROW(rope_rotate)

/* attention */
enum { LLMPAR__ATTENTION_TILE = 64 }; /* keys a tile, and query rows a block */
typedef struct llmpar__attention_job {
    const llmpar_attention_args *args;
    const llmpar_attention_backward_args *backward; /* NULL in forward */
    char *workspace;       /* aligned to 64 */
    size_t worker_bytes;   /* of it for each worker */
    int by_task;           /* no more tasks than workers: parts of the workspace go by task */
} llmpar__attention_job;
LLMPAR__VDECLARE(attention_forward)
LLMPAR__VDECLARE(attention_backward)
/* First position after the document that position i belongs to; *begin is its first. */
LLMPAR__PRIVATE int64_t llmpar__attention_document(const llmpar_attention_args *a, int64_t sequence, int64_t i, int64_t *begin);
/* The group's heads [0, n) split at half while even, else at the largest power of two below. */
LLMPAR__PRIVATE int64_t llmpar__attention_split(int64_t n);
/* At most so many partial sums wait at the same time while that tree is walked from left to right: log2(n) rounded up, and one. */
LLMPAR__PRIVATE int64_t llmpar__attention_slots(int64_t n);

/* swiglu */
typedef struct llmpar__swiglu_job { const llmpar_swiglu_args *forward; const llmpar_swiglu_backward_args *backward; int64_t step; } llmpar__swiglu_job;
LLMPAR__VDECLARE(swiglu_forward)
LLMPAR__VDECLARE(swiglu_backward)

/* embedding */
enum { LLMPAR__EMBEDDING_IDS = 8 }; /* ids a task */
typedef struct llmpar__embedding_backward_job {
    const llmpar_embedding_backward_args *args;
    const int64_t *begin; /* [v_local + 1]: tokens of local id v are order[begin[v]] .. order[begin[v + 1] - 1], ascending */
    const int64_t *order;
} llmpar__embedding_backward_job;
LLMPAR__VDECLARE_NARROW(embedding_gradient)

/* xent */
typedef struct llmpar__xent_job { const llmpar_xent_args *args; int64_t step; double scale; } llmpar__xent_job;
LLMPAR__VDECLARE(xent_rows_max)
LLMPAR__VDECLARE(xent_rows_sum)
LLMPAR__VDECLARE(xent_rows_backward)

/* elementwise, optim: elements a task */
enum { LLMPAR__ELEMENTWISE_CHUNK = 16384, LLMPAR__OPTIM_CHUNK = 8192 };
LLMPAR__VDECLARE(elementwise_tree)
LLMPAR__VDECLARE(elementwise_max)
LLMPAR__VDECLARE(elementwise_add)
LLMPAR__VDECLARE(elementwise_scale)
LLMPAR__VDECLARE_NARROW(optim_adamw)

#endif
/* ---- src/cpu/attention.c goes on ---- */

LLMPAR__PRIVATE_DEF int64_t llmpar__attention_document(const llmpar_attention_args *a, int64_t sequence, int64_t i, int64_t *begin)
{
    const int32_t *start = a->doc_start ? a->doc_start + sequence * a->tk : NULL;
    int64_t end = a->tk;
    *begin = start ? start[i] : 0;
    if (start) for (end = i + 1; end < a->tk && start[end] == start[i];) end++;
    return end;
}

LLMPAR__PRIVATE_DEF int64_t llmpar__attention_split(int64_t n) { return n % 2 ? llmpar_tree_split(n) : n / 2; }

LLMPAR__PRIVATE_DEF int64_t llmpar__attention_slots(int64_t n)
{
    int64_t slots = 1;
    for (n--; n > 0; n /= 2) slots++;
    return slots;
}

static const llmpar__kernel llmpar__attention_forward_kernels[4] = LLMPAR__VKERNELS(attention_forward);
static const llmpar__kernel llmpar__attention_backward_kernels[4] = LLMPAR__VKERNELS(attention_backward);

/* Bytes for one worker. Rows are padded to 16 elements, so that the answer is the same at every level. */
static size_t llmpar__attention_worker_bytes(const llmpar_attention_args *a, int backward)
{
    int64_t tile = LLMPAR__ATTENTION_TILE, e = llmpar_round_up(a->head_dim, 16), t = llmpar_round_up(a->tk, tile), count;
    if (!backward) count = t * e * 2 + tile * e * 2;                                     /* keys, values; a block of q and out */
    else count = t * e * (6 + 2 * llmpar__attention_slots(a->heads / a->kv_heads)) + t * 2; /* q, dout, dq, keys twice, values; dk and dv a slot; lse, D */
    return (size_t)count * llmpar_dtype_size(a->dtype);
}

static size_t llmpar__attention_bytes(llmpar_device *device, const llmpar_attention_args *a, int backward)
{
    int64_t workers = llmpar__v_min(llmpar__pool_threads((llmpar__cpu *)device->state), llmpar__v_max(1, a->batch * a->kv_heads));
    if (a->heads < 1 || a->kv_heads < 1 || a->heads % a->kv_heads || a->head_dim < 1 || a->tk < 1) return 0;
    return (size_t)workers * llmpar__attention_worker_bytes(a, backward) + 64;
}

LLMPAR__PRIVATE_DEF size_t llmpar__cpu_attention_workspace(llmpar_device *device, const llmpar_attention_args *args) { return llmpar__attention_bytes(device, args, 0); }
LLMPAR__PRIVATE_DEF size_t llmpar__cpu_attention_backward_workspace(llmpar_device *device, const llmpar_attention_backward_args *args) { return llmpar__attention_bytes(device, &args->forward, 1); }

static llmpar_status llmpar__attention_check(llmpar_device *device, const char *name, const llmpar_attention_args *a, int backward)
{
    size_t need = llmpar__attention_bytes(device, a, backward);
    llmpar_status status = llmpar__v_check(device, name, a->dtype);
    if (status) return status;
    if (a->kv_heads < 1 || a->heads % a->kv_heads || a->head_dim < 1)
        return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "%s: %lld heads, %lld kv heads, head_dim %lld: expected heads to be a multiple of kv heads", name, (long long)a->heads, (long long)a->kv_heads, (long long)a->head_dim);
    if (a->tq > a->tk || a->tk > a->tk_stride || (backward && (a->tq != a->tk || a->tk != a->tk_stride)))
        return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "%s: tq %lld, tk %lld, tk_stride %lld: expected %s", name, (long long)a->tq, (long long)a->tk, (long long)a->tk_stride, backward ? "three equal numbers" : "tq <= tk <= tk_stride");
    if (!a->workspace || a->workspace_bytes < need)
        return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "%s: workspace of %llu bytes, expected %llu", name, (unsigned long long)a->workspace_bytes, (unsigned long long)need);
    if (a->doc_start) for (int64_t b = 0; b < a->batch; b++) {
        const int32_t *start = a->doc_start + b * a->tk;
        int64_t first = a->tk - a->tq;
        for (int64_t i = first; i < a->tk; i++)
            if (start[i] < 0 || start[i] > i || (i > first && start[i] != i && start[i] != start[i - 1]))
                return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "%s: doc_start of sequence %lld, position %lld is %d: expected the position itself or the value before it", name, (long long)b, (long long)i, (int)start[i]);
    }
    return LLMPAR_OK;
}

static void llmpar__attention_run(llmpar_device *device, const llmpar__kernel *kernels, const llmpar_attention_args *a, const llmpar_attention_backward_args *backward)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar__attention_job job;
    job.args = a;
    job.backward = backward;
    job.workspace = (char *)(((uintptr_t)a->workspace + 63u) & ~(uintptr_t)63u);
    job.worker_bytes = llmpar__attention_worker_bytes(a, backward != NULL);
    job.by_task = a->batch * a->kv_heads <= llmpar__pool_threads(cpu);
    llmpar__pool_run(cpu, kernels[llmpar__v_index(cpu, a->dtype)], &job, a->batch * a->kv_heads);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_attention(llmpar_device *device, llmpar_stream *stream, const llmpar_attention_args *args)
{
    llmpar_status status;
    (void)stream;
    if (args->batch <= 0 || args->tq <= 0 || args->heads <= 0) return LLMPAR_OK;
    status = llmpar__attention_check(device, "attention", args, 0);
    if (!status) llmpar__attention_run(device, llmpar__attention_forward_kernels, args, NULL);
    return status;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_attention_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_attention_backward_args *args)
{
    llmpar_status status;
    (void)stream;
    if (args->forward.batch <= 0 || args->forward.tq <= 0 || args->forward.heads <= 0) return LLMPAR_OK;
    status = llmpar__attention_check(device, "attention_backward", &args->forward, 1);
    if (!status) llmpar__attention_run(device, llmpar__attention_backward_kernels, &args->forward, args);
    return status;
}
/* ==== src/cpu/norm.c ==== */
/* norm: RMSNorm (Zhang & Sennrich 2019) forward and backward. The hidden dim is never split, so the sum over it is in lanes; the sum of dw over tokens
   may be split by a mesh and follows docs/exact.md: a chain per T-piece, a tree over T-pieces, one row a leaf. */

static const llmpar__kernel llmpar__norm_forward_kernels[4] = LLMPAR__VKERNELS_NARROW(norm_forward);
static const llmpar__kernel llmpar__norm_dx_kernels[4] = LLMPAR__VKERNELS_NARROW(norm_dx);
static const llmpar__kernel llmpar__norm_dw_kernels[4] = LLMPAR__VKERNELS_NARROW(norm_dw);

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_rmsnorm(llmpar_device *device, llmpar_stream *stream, const llmpar_rmsnorm_args *args)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar__norm_job job;
    llmpar_status status = llmpar__v_check(device, "rmsnorm", args->dtype);
    (void)stream;
    if (status || args->rows <= 0 || args->dim <= 0) return status;
    job.args = args;
    job.step = llmpar__v_max(1, 8192 / args->dim);
    llmpar__pool_run(cpu, llmpar__norm_forward_kernels[llmpar__v_index(cpu, args->dtype)], &job, llmpar__v_blocks(args->rows, job.step));
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_rmsnorm_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_rmsnorm_backward_args *args)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    const llmpar_tokens *tokens = &args->tokens;
    llmpar__norm_backward_job job;
    int kernel = llmpar__v_index(cpu, args->dtype);
    llmpar_status status = llmpar__v_check(device, "rmsnorm_backward", args->dtype);
    (void)stream;
    if (status || args->dim <= 0) return status;
    job.args = args;
    job.step = llmpar__v_max(1, 8192 / args->dim);
    job.blocks = llmpar__v_blocks(args->dim, 64);
    /* dw first: dx may take the place of dy. */
    if (args->dw_leaves && tokens->leaves > 0) {
        if (tokens->canon < 1 || tokens->batch % tokens->leaves)
            return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "rmsnorm_backward: %lld leaves for batch %lld, canon %d: expected leaves that divide the batch, canon >= 1", (long long)tokens->leaves, (long long)tokens->batch, (int)tokens->canon);
        llmpar__pool_run(cpu, llmpar__norm_dw_kernels[kernel], &job, tokens->leaves * job.blocks);
    }
    llmpar__pool_run(cpu, llmpar__norm_dx_kernels[kernel], &job, llmpar__v_blocks(tokens->batch * tokens->t, job.step));
    return LLMPAR_OK;
}
/* ==== src/cpu/rope.c ==== */
/* rope: rotary position embedding in place (Su et al. 2021), half-split order. */

static const llmpar__kernel llmpar__rope_kernels[4] = LLMPAR__VKERNELS_NARROW(rope_rotate);

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_rope(llmpar_device *device, llmpar_stream *stream, const llmpar_rope_args *args)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar__rope_job job;
    llmpar_status status = llmpar__v_check(device, "rope", args->dtype);
    (void)stream;
    if (status || args->batch <= 0 || args->t <= 0 || args->heads <= 0 || args->head_dim <= 0) return status;
    if (args->head_dim % 2) return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "rope: head_dim %lld, expected an even number", (long long)args->head_dim);
    job.args = args;
    job.step = llmpar__v_max(1, 8192 / (args->heads * args->head_dim));
    llmpar__pool_run(cpu, llmpar__rope_kernels[llmpar__v_index(cpu, args->dtype)], &job, llmpar__v_blocks(args->batch * args->t, job.step));
    return LLMPAR_OK;
}
/* ==== src/cpu/swiglu.c ==== */
/* swiglu: h = gate * sigmoid(gate) * up (Shazeer 2020), forward and backward, element-wise. */

static const llmpar__kernel llmpar__swiglu_forward_kernels[4] = LLMPAR__VKERNELS(swiglu_forward);
static const llmpar__kernel llmpar__swiglu_backward_kernels[4] = LLMPAR__VKERNELS(swiglu_backward);

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_swiglu(llmpar_device *device, llmpar_stream *stream, const llmpar_swiglu_args *args)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar__swiglu_job job;
    llmpar_status status = llmpar__v_check(device, "swiglu", args->dtype);
    (void)stream;
    if (status || args->rows <= 0 || args->dim <= 0) return status;
    job.forward = args;
    job.backward = NULL;
    job.step = llmpar__v_max(1, 8192 / args->dim);
    llmpar__pool_run(cpu, llmpar__swiglu_forward_kernels[llmpar__v_index(cpu, args->dtype)], &job, llmpar__v_blocks(args->rows, job.step));
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_swiglu_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_swiglu_backward_args *args)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar__swiglu_job job;
    llmpar_status status = llmpar__v_check(device, "swiglu_backward", args->dtype);
    (void)stream;
    if (status || args->rows <= 0 || args->dim <= 0) return status;
    job.forward = NULL;
    job.backward = args;
    job.step = llmpar__v_max(1, 8192 / args->dim);
    llmpar__pool_run(cpu, llmpar__swiglu_backward_kernels[llmpar__v_index(cpu, args->dtype)], &job, llmpar__v_blocks(args->rows, job.step));
    return LLMPAR_OK;
}
/* ==== src/cpu/embedding.c ==== */
/* embedding: rows of a vocab-sharded table by id, and its gradient. Forward is a select, not a sum with zeros. Backward sorts the tokens by id (stably, by
   counting) and sums row by row: nothing of the table's size but the result is touched. */

typedef struct llmpar__embedding_job { const llmpar_embedding_args *args; int64_t step; } llmpar__embedding_job;

static const llmpar__kernel llmpar__embedding_backward_kernels[4] = LLMPAR__VKERNELS_NARROW(embedding_gradient);

static void llmpar__embedding_gather(void *arg, int64_t task, int32_t worker)
{
    const llmpar__embedding_job *job = (const llmpar__embedding_job *)arg;
    const llmpar_embedding_args *a = job->args;
    size_t bytes = (size_t)a->dim * llmpar_dtype_size(a->dtype);
    int64_t end = llmpar__v_min(a->rows, (task + 1) * job->step);
    (void)worker;
    for (int64_t row = task * job->step; row < end; row++) {
        int64_t id = a->ids[row] - a->v_begin;
        if (id >= 0 && id < a->v_local) memcpy((char *)a->out + (size_t)row * bytes, (const char *)a->table + (size_t)id * bytes, bytes);
        else memset((char *)a->out + (size_t)row * bytes, 0, bytes);
    }
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_embedding(llmpar_device *device, llmpar_stream *stream, const llmpar_embedding_args *args)
{
    llmpar__embedding_job job;
    llmpar_status status = llmpar__v_check(device, "embedding", args->dtype);
    (void)stream;
    if (status || args->rows <= 0 || args->dim <= 0) return status;
    job.args = args;
    job.step = llmpar__v_max(1, 8192 / args->dim);
    llmpar__pool_run((llmpar__cpu *)device->state, llmpar__embedding_gather, &job, llmpar__v_blocks(args->rows, job.step));
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF size_t llmpar__cpu_embedding_backward_workspace(llmpar_device *device, const llmpar_embedding_backward_args *args)
{
    (void)device;
    /* One int64 a token, v_local + 1 for the counts, and room to align. */
    return (size_t)(llmpar__v_max(0, args->v_local) + 1 + llmpar__v_max(0, args->tokens.batch * args->tokens.t)) * sizeof(int64_t) + sizeof(int64_t);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_embedding_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_embedding_backward_args *args)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    int64_t rows = args->tokens.batch * args->tokens.t, v_local = args->v_local, *begin, *order;
    size_t need = llmpar__cpu_embedding_backward_workspace(device, args);
    llmpar__embedding_backward_job job;
    llmpar_status status = llmpar__v_check(device, "embedding_backward", args->dtype);
    (void)stream;
    if (status || v_local <= 0 || args->dim <= 0) return status;
    if (rows > 0 && (args->tokens.leaves < 1 || args->tokens.batch % args->tokens.leaves))
        return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "embedding_backward: %lld leaves for batch %lld, expected leaves that divide the batch", (long long)args->tokens.leaves, (long long)args->tokens.batch);
    if (!args->workspace || args->workspace_bytes < need)
        return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "embedding_backward: workspace of %llu bytes, expected %llu", (unsigned long long)args->workspace_bytes, (unsigned long long)need);
    begin = (int64_t *)(((uintptr_t)args->workspace + 7u) & ~(uintptr_t)7u);
    order = begin + v_local + 1;
    memset(begin, 0, (size_t)(v_local + 1) * sizeof *begin);
    /* begin[v] counts id v, then says where its tokens begin; filling moves it on to where they end. */
    for (int64_t r = 0; r < rows; r++) {
        int64_t id = args->ids[r] - args->v_begin;
        if (id >= 0 && id < v_local) begin[id]++;
    }
    for (int64_t v = 0, sum = 0; v <= v_local; v++) {
        int64_t count = begin[v];
        begin[v] = sum;
        sum += count;
    }
    for (int64_t r = 0; r < rows; r++) {
        int64_t id = args->ids[r] - args->v_begin;
        if (id >= 0 && id < v_local) order[begin[id]++] = r;
    }
    /* Now begin[v] is the end of v, which is the begin of v + 1. */
    memmove(begin + 1, begin, (size_t)v_local * sizeof *begin);
    begin[0] = 0;
    job.args = args;
    job.begin = begin;
    job.order = order;
    llmpar__pool_run(cpu, llmpar__embedding_backward_kernels[llmpar__v_index(cpu, args->dtype)], &job, llmpar__v_blocks(v_local, LLMPAR__EMBEDDING_IDS));
    return LLMPAR_OK;
}
/* ==== src/cpu/xent.c ==== */
/* xent: vocab-parallel softmax cross-entropy in steps (Shoeybi et al. 2019, section 3): row maximum, sum of exp in vocab pieces, loss, gradient.
   The caller combines over the "tp" axis between the steps; logits are never gathered and never rescaled. */

static const llmpar__kernel llmpar__xent_max_kernels[4] = LLMPAR__VKERNELS(xent_rows_max);
static const llmpar__kernel llmpar__xent_sum_kernels[4] = LLMPAR__VKERNELS(xent_rows_sum);
static const llmpar__kernel llmpar__xent_backward_kernels[4] = LLMPAR__VKERNELS(xent_rows_backward);

static llmpar_status llmpar__xent_run(llmpar_device *device, const char *name, const llmpar__kernel *kernels, const llmpar_xent_args *args, double scale)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar__xent_job job;
    llmpar_status status = llmpar__v_check(device, name, args->dtype);
    if (status || args->rows <= 0) return status;
    if (args->canon < 1) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "%s: canon %d, expected at least 1", name, (int)args->canon);
    job.args = args;
    job.step = llmpar__v_max(1, 8192 / llmpar__v_max(1, args->v_local));
    job.scale = scale;
    llmpar__pool_run(cpu, kernels[llmpar__v_index(cpu, args->dtype)], &job, llmpar__v_blocks(args->rows, job.step));
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_xent_max(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_args *args)
{
    (void)stream;
    return llmpar__xent_run(device, "xent_max", llmpar__xent_max_kernels, args, 0);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_xent_sum(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_args *args)
{
    (void)stream;
    return llmpar__xent_run(device, "xent_sum", llmpar__xent_sum_kernels, args, 0);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_xent_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_backward_args *args)
{
    (void)stream;
    return llmpar__xent_run(device, "xent_backward", llmpar__xent_backward_kernels, &args->forward, args->scale);
}

/* One pass on the calling thread: a logarithm a row. The accumulator is carried at the end, so that any number of calls may follow. */
LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_xent_loss(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_loss_args *args)
{
    llmpar_exact_sum *accumulator = (llmpar_exact_sum *)(void *)args->accumulator;
    llmpar_status status = llmpar__v_check(device, "xent_loss", args->dtype);
    (void)stream;
    if (status || args->rows <= 0) return status;
    for (int64_t row = 0; row < args->rows; row++) {
        double loss = 0;
        if (args->targets[row] >= 0) {
            if (args->dtype == LLMPAR_F64) loss = (llmpar_log_f64(((const double *)args->sum)[row]) + ((const double *)args->max)[row]) - ((const double *)args->target_logit)[row];
            else loss = (llmpar_log_f64((double)((const float *)args->sum)[row]) + (double)((const float *)args->max)[row]) - (double)((const float *)args->target_logit)[row];
            llmpar_exact_sum_add(accumulator, loss);
        }
        if (args->token_loss) args->token_loss[row] = loss;
    }
    llmpar_exact_sum_carry(accumulator);
    return LLMPAR_OK;
}
/* ==== src/cpu/elementwise.c ==== */
/* elementwise: tree_sum, max, add, scale, cast, copy_rows. Nothing here depends on more than one position of its operands, so the
   work is cut into chunks for the workers at will. */

static const llmpar__kernel llmpar__elementwise_tree_kernels[4] = LLMPAR__VKERNELS(elementwise_tree);
static const llmpar__kernel llmpar__elementwise_max_kernels[4] = LLMPAR__VKERNELS(elementwise_max);
static const llmpar__kernel llmpar__elementwise_add_kernels[4] = LLMPAR__VKERNELS(elementwise_add);
static const llmpar__kernel llmpar__elementwise_scale_kernels[4] = LLMPAR__VKERNELS(elementwise_scale);

static void llmpar__elementwise_run(llmpar_device *device, const llmpar__kernel *kernels, llmpar_dtype dtype, const void *args, size_t count)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar__pool_run(cpu, kernels[llmpar__v_index(cpu, dtype)], (void *)(uintptr_t)args, llmpar__v_blocks((int64_t)count, LLMPAR__ELEMENTWISE_CHUNK));
}

/* Integer addition is associative (modulo 2^64), so a plain sum has the tree's bits. Signed as unsigned: overflow wraps. */
static void llmpar__elementwise_tree_u64(void *arg, int64_t task, int32_t worker)
{
    const llmpar_tree_sum_args *a = (const llmpar_tree_sum_args *)arg;
    size_t begin = (size_t)task * LLMPAR__ELEMENTWISE_CHUNK, end = begin + LLMPAR__ELEMENTWISE_CHUNK;
    uint64_t *out = (uint64_t *)a->out;
    (void)worker;
    if (end > a->count) end = a->count;
    for (size_t i = begin; i < end; i++) {
        uint64_t sum = 0;
        for (int32_t j = 0; j < a->n; j++) sum += ((const uint64_t *)a->in[j])[i];
        out[i] = sum;
    }
}

static void llmpar__elementwise_max_i64(void *arg, int64_t task, int32_t worker)
{
    const llmpar_max_args *a = (const llmpar_max_args *)arg;
    size_t begin = (size_t)task * LLMPAR__ELEMENTWISE_CHUNK, end = begin + LLMPAR__ELEMENTWISE_CHUNK;
    int64_t *out = (int64_t *)a->out;
    (void)worker;
    if (end > a->count) end = a->count;
    for (size_t i = begin; i < end; i++) {
        int64_t most = ((const int64_t *)a->in[0])[i];
        for (int32_t j = 1; j < a->n; j++) most = llmpar__v_max(most, ((const int64_t *)a->in[j])[i]);
        out[i] = most;
    }
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_tree_sum(llmpar_device *device, llmpar_stream *stream, const llmpar_tree_sum_args *args)
{
    (void)stream;
    if (args->n < 1) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "tree_sum: n = %d, expected at least 1", (int)args->n);
    if (args->dtype == LLMPAR_I64 || args->dtype == LLMPAR_U64) {
        llmpar__pool_run((llmpar__cpu *)device->state, llmpar__elementwise_tree_u64, (void *)(uintptr_t)args, llmpar__v_blocks((int64_t)args->count, LLMPAR__ELEMENTWISE_CHUNK));
        return LLMPAR_OK;
    }
    if (args->dtype != LLMPAR_F32 && args->dtype != LLMPAR_F64) return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "tree_sum: dtype %s, expected f32, f64, i64 or u64", llmpar_dtype_name(args->dtype));
    llmpar__elementwise_run(device, llmpar__elementwise_tree_kernels, args->dtype, args, args->count);
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_max(llmpar_device *device, llmpar_stream *stream, const llmpar_max_args *args)
{
    (void)stream;
    if (args->n < 1) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "max: n = %d, expected at least 1", (int)args->n);
    if (args->dtype == LLMPAR_I64) {
        llmpar__pool_run((llmpar__cpu *)device->state, llmpar__elementwise_max_i64, (void *)(uintptr_t)args, llmpar__v_blocks((int64_t)args->count, LLMPAR__ELEMENTWISE_CHUNK));
        return LLMPAR_OK;
    }
    if (args->dtype != LLMPAR_F32 && args->dtype != LLMPAR_F64) return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "max: dtype %s, expected f32, f64 or i64", llmpar_dtype_name(args->dtype));
    llmpar__elementwise_run(device, llmpar__elementwise_max_kernels, args->dtype, args, args->count);
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_add(llmpar_device *device, llmpar_stream *stream, const llmpar_add_args *args)
{
    llmpar_status status = llmpar__v_check(device, "add", args->dtype);
    (void)stream;
    if (!status) llmpar__elementwise_run(device, llmpar__elementwise_add_kernels, args->dtype, args, args->count);
    return status;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_scale(llmpar_device *device, llmpar_stream *stream, const llmpar_scale_args *args)
{
    llmpar_status status = llmpar__v_check(device, "scale", args->dtype);
    (void)stream;
    if (!status) llmpar__elementwise_run(device, llmpar__elementwise_scale_kernels, args->dtype, args, args->count);
    return status;
}

static void llmpar__elementwise_cast(void *arg, int64_t task, int32_t worker)
{
    const llmpar_cast_args *a = (const llmpar_cast_args *)arg;
    size_t begin = (size_t)task * LLMPAR__ELEMENTWISE_CHUNK, count = a->count - begin;
    (void)worker;
    if (count > LLMPAR__ELEMENTWISE_CHUNK) count = LLMPAR__ELEMENTWISE_CHUNK;
    llmpar_convert((char *)a->out + begin * llmpar_dtype_size(a->out_dtype), a->out_dtype, (const char *)a->in + begin * llmpar_dtype_size(a->in_dtype), a->in_dtype, count);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_cast(llmpar_device *device, llmpar_stream *stream, const llmpar_cast_args *args)
{
    (void)stream;
    /* A conversion of nothing says whether the pair is known. */
    if (!llmpar_convert(args->out, args->out_dtype, args->in, args->in_dtype, 0))
        return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "cast: from %s to %s, expected floating types", llmpar_dtype_name(args->in_dtype), llmpar_dtype_name(args->out_dtype));
    llmpar__pool_run((llmpar__cpu *)device->state, llmpar__elementwise_cast, (void *)(uintptr_t)args, llmpar__v_blocks((int64_t)args->count, LLMPAR__ELEMENTWISE_CHUNK));
    return LLMPAR_OK;
}

typedef struct llmpar__elementwise_copy_job { const llmpar_copy_rows_args *args; int64_t step; } llmpar__elementwise_copy_job;

static void llmpar__elementwise_copy(void *arg, int64_t task, int32_t worker)
{
    const llmpar__elementwise_copy_job *job = (const llmpar__elementwise_copy_job *)arg;
    const llmpar_copy_rows_args *a = job->args;
    int64_t end = llmpar__v_min(a->rows, (task + 1) * job->step);
    (void)worker;
    for (int64_t r = task * job->step; r < end; r++)
        memcpy((char *)a->out + (size_t)(r * a->ld_out) * a->size, (const char *)a->in + (size_t)(r * a->ld_in) * a->size, (size_t)a->width * a->size);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_copy_rows(llmpar_device *device, llmpar_stream *stream, const llmpar_copy_rows_args *args)
{
    llmpar__elementwise_copy_job job;
    (void)stream;
    if (args->rows <= 0 || args->width <= 0 || !args->size) return LLMPAR_OK;
    job.args = args;
    job.step = llmpar__v_max(1, LLMPAR__ELEMENTWISE_CHUNK / args->width);
    llmpar__pool_run((llmpar__cpu *)device->state, llmpar__elementwise_copy, &job, llmpar__v_blocks(args->rows, job.step));
    (void)device;
    return LLMPAR_OK;
}
/* ==== src/cpu/optim.c ==== */
/* optim: AdamW (Loshchilov & Hutter 2019) element by element, and the order-free sum of squares that the gradient norm needs. */

static const llmpar__kernel llmpar__optim_adamw_kernels[4] = LLMPAR__VKERNELS_NARROW(optim_adamw);

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_adamw(llmpar_device *device, llmpar_stream *stream, const llmpar_adamw_args *args)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar_status status = llmpar__v_check(device, "adamw", args->dtype);
    (void)stream;
    if (!status) llmpar__pool_run(cpu, llmpar__optim_adamw_kernels[llmpar__v_index(cpu, args->dtype)], (void *)(uintptr_t)args, llmpar__v_blocks((int64_t)args->count, LLMPAR__OPTIM_CHUNK));
    return status;
}

/* Each task sums into an accumulator of its own; accumulators are integers, so how many there are does not show. */
enum { LLMPAR__OPTIM_PARTS = 16 };
typedef struct llmpar__optim_square_job { const llmpar_square_sum_args *args; size_t step; llmpar_exact_sum part[LLMPAR__OPTIM_PARTS]; } llmpar__optim_square_job;

static void llmpar__optim_square(void *arg, int64_t task, int32_t worker)
{
    llmpar__optim_square_job *job = (llmpar__optim_square_job *)arg;
    llmpar_exact_sum *part = &job->part[task];
    size_t begin = (size_t)task * job->step, end = begin + job->step;
    (void)worker;
    if (end > job->args->count) end = job->args->count;
    memset(part, 0, sizeof *part);
    if (job->args->dtype == LLMPAR_F32) llmpar_exact_sum_add_squares_f32(part, (const float *)job->args->x + begin, end - begin);
    else for (size_t i = begin; i < end; i++) {
        double x = ((const double *)job->args->x)[i];
        llmpar_exact_sum_add(part, x * x);
        if (!((i + 1) & 0xfffffffu)) llmpar_exact_sum_carry(part);
    }
    llmpar_exact_sum_carry(part);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_square_sum(llmpar_device *device, llmpar_stream *stream, const llmpar_square_sum_args *args)
{
    llmpar__optim_square_job job;
    llmpar_exact_sum *accumulator = (llmpar_exact_sum *)(void *)args->accumulator;
    llmpar_status status = llmpar__v_check(device, "square_sum", args->dtype);
    int64_t tasks;
    (void)stream;
    if (status || !args->count) return status;
    tasks = llmpar__v_min(LLMPAR__OPTIM_PARTS, llmpar__v_blocks((int64_t)args->count, 4096));
    job.args = args;
    job.step = (size_t)llmpar__v_blocks((int64_t)args->count, tasks);
    tasks = llmpar__v_blocks((int64_t)args->count, (int64_t)job.step);
    llmpar__pool_run((llmpar__cpu *)device->state, llmpar__optim_square, &job, tasks);
    for (int64_t i = 0; i < tasks; i++) llmpar_exact_sum_merge(accumulator, &job.part[i]);
    llmpar_exact_sum_carry(accumulator);
    return LLMPAR_OK;
}
/* ==== src/cpu/kernels_portable.c ==== */
/* kernels_portable: every kernel on any processor. */

#define LLMPAR__VLEVEL portable
#define LLMPAR__VDOUBLE 0
#define LLMPAR__ATTENTION_COLUMNS 2 /* vectors of a register tile */
#define LLMPAR__ATTENTION_LOG llmpar_log_f32
#define LLMPAR__TEMPLATE 4 /* cpu/vector_math.inc cpu/norm.inc cpu/rope.inc cpu/attention.inc cpu/attention_backward.inc cpu/swiglu.inc cpu/embedding.inc cpu/xent.inc cpu/elementwise.inc cpu/optim.inc */
#include LLMPAR_HEADER
#undef LLMPAR__VLEVEL
#undef LLMPAR__VDOUBLE
#undef LLMPAR__ATTENTION_COLUMNS
#undef LLMPAR__ATTENTION_LOG
/* ==== src/cpu/kernels_avx2.c ==== */
/* kernels_avx2: every kernel for AVX2 with fma. */

#define LLMPAR__VLEVEL avx2
#define LLMPAR__VDOUBLE 0
#define LLMPAR__ATTENTION_COLUMNS 2 /* vectors of a register tile */
#define LLMPAR__ATTENTION_LOG llmpar_log_f32
#define LLMPAR__TEMPLATE 4 /* cpu/vector_math.inc cpu/norm.inc cpu/rope.inc cpu/attention.inc cpu/attention_backward.inc cpu/swiglu.inc cpu/embedding.inc cpu/xent.inc cpu/elementwise.inc cpu/optim.inc */
#include LLMPAR_HEADER
#undef LLMPAR__VLEVEL
#undef LLMPAR__VDOUBLE
#undef LLMPAR__ATTENTION_COLUMNS
#undef LLMPAR__ATTENTION_LOG
/* ==== src/cpu/kernels_avx512.c ==== */
/* kernels_avx512: every kernel for AVX-512. */

#define LLMPAR__VLEVEL avx512
#define LLMPAR__VDOUBLE 0
#define LLMPAR__ATTENTION_COLUMNS 4 /* vectors of a register tile */
#define LLMPAR__ATTENTION_LOG llmpar_log_f32
#define LLMPAR__TEMPLATE 4 /* cpu/vector_math.inc cpu/norm.inc cpu/rope.inc cpu/attention.inc cpu/attention_backward.inc cpu/swiglu.inc cpu/embedding.inc cpu/xent.inc cpu/elementwise.inc cpu/optim.inc */
#include LLMPAR_HEADER
#undef LLMPAR__VLEVEL
#undef LLMPAR__VDOUBLE
#undef LLMPAR__ATTENTION_COLUMNS
#undef LLMPAR__ATTENTION_LOG

/* From here on nothing is hot (f64 is for checking gradients): gcc's lower level halves its work. Not where nothing was to be optimized: debuggers want -O0. */
#if defined(__OPTIMIZE__) && !defined(__clang__)
#pragma GCC optimize ("O1")
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
/* ==== src/base/json.c ==== */

#include <string.h>

/* A document is one allocation, sized by a count over the text before anything is parsed:

     | node 0 = root | node 1 | ... one for each possible value | length of the text + 1 bytes of decoded strings |

   A string is decoded to the same offset in the last part at which it stands in the text (escapes only shrink it, the closing quote's place
   takes the NUL), so a key's own byte position needs no field. Nothing recurses: an open container keeps its parent in
   `next`, which it needs only once it is closed. Memory: at most 60 bytes a byte of a valid text (empty arrays in an array), 90 of a
   malformed one (commas), about 10 of a usual one. */

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
    size_t bytes = 0;
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

/* ==== src/tables/ctx.c ==== */
/* ctx: failing with a text, and logging. */

#include <stdarg.h>
#include <stdio.h>

LLMPAR_DEF llmpar_status llmpar_fail(llmpar_ctx *ctx, llmpar_status status, const char *format, ...)
{
    if (ctx->error.status != LLMPAR_OK) return status;
    char text[sizeof ctx->error.text + 8]; /* a little longer, so that error_set sees that it must cut */
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    ctx->error.rank = ctx->rank;
    llmpar_error_set(&ctx->error, status, "%s", text);
    ctx->error.rank = ctx->rank;
    return status;
}

LLMPAR_DEF const char *llmpar_last_error(const llmpar_ctx *ctx)
{
    return ctx->error.status != LLMPAR_OK ? ctx->error.text : "";
}

LLMPAR_DEF void llmpar_log(llmpar_ctx *ctx, llmpar_log_level level, const char *format, ...)
{
    if (!ctx->log) return;
    char line[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    ctx->log(ctx->log_user, ctx->rank, level == LLMPAR_LOG_DEFAULT ? LLMPAR_LOG_INFO : level, line);
}
/* ==== src/tables/comm.c ==== */
/* comm: the wrappers: what is checked before any implementation sees a call, the counters, the record, and the one-rank case. */

#include <string.h>


/* A slot that lies beyond the table's size is empty. */
#define LLMPAR__COMM_END(slot) (offsetof(llmpar_comm, slot) + sizeof(((llmpar_comm *)0)->slot))

typedef llmpar_status (*llmpar__comm_slot)(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call);

static llmpar_status llmpar__comm_abi(const llmpar_comm *comm, size_t slot_end)
{
    if (comm->abi == LLMPAR_COMM_ABI && comm->size >= slot_end) return LLMPAR_OK;
    return llmpar_error_set(comm->error, LLMPAR_ERR_ABI, "communicator %s: table with abi %u and %u bytes, expected abi %u and at least %lu bytes",
                            comm->axis ? comm->axis : "?", (unsigned)comm->abi, (unsigned)comm->size, LLMPAR_COMM_ABI, (unsigned long)slot_end);
}

static int llmpar__comm_overlap(const void *a, size_t a_bytes, const void *b, size_t b_bytes)
{
    uintptr_t a0 = (uintptr_t)a, b0 = (uintptr_t)b;
    return a_bytes && b_bytes && a0 < b0 + b_bytes && b0 < a0 + a_bytes;
}

static int llmpar__comm_reducible(llmpar_reduce_op op, llmpar_dtype dtype)
{
    if (dtype == LLMPAR_F32 || dtype == LLMPAR_F64 || dtype == LLMPAR_I64) return op == LLMPAR_SUM || op == LLMPAR_MAX;
    return dtype == LLMPAR_U64 && op == LLMPAR_SUM;
}

/* One rank: every collective is at most a copy. */
static llmpar_status llmpar__comm_alone(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call, size_t bytes)
{
    if (!bytes || !call->recv || call->recv == call->send) return LLMPAR_OK;
    return comm->device->copy(comm->device, stream, call->recv, call->send, bytes);
}

/* The argument of the host calls that mark an entry of the record when its stream comes there. */
typedef struct llmpar__comm_mark {
    llmpar_record *record;
    uint64_t id;
} llmpar__comm_mark;

static llmpar_status llmpar__comm_started(void *arg)
{
    const llmpar__comm_mark *mark = (const llmpar__comm_mark *)arg;
    llmpar_record_started(mark->record, mark->id);
    return LLMPAR_OK;
}
static llmpar_status llmpar__comm_completed(void *arg)
{
    const llmpar__comm_mark *mark = (const llmpar__comm_mark *)arg;
    llmpar_record_completed(mark->record, mark->id);
    return LLMPAR_OK;
}

/* Is there a description of the call that the slot was asked for? */
static const llmpar_call *llmpar__comm_shown(const llmpar_comm *comm) { return comm->size >= LLMPAR__COMM_END(call) ? comm->call : NULL; }

LLMPAR_DEF void llmpar_call_describe(const llmpar_comm *comm, llmpar_call_op op, const llmpar_collective *call, llmpar_call *out)
{
    const llmpar_call *shown = llmpar__comm_shown(comm);
    const char *tag = call->tag ? call->tag : "";
    size_t length = strlen(tag), axis = comm->axis ? strlen(comm->axis) : 0;
    memset(out, 0, sizeof *out);
    out->count = call->count;
    out->blocks = call->count && !call->blocks ? 1 : call->blocks;
    out->op = (int32_t)op;
    out->dtype = (int32_t)call->dtype;
    out->reduce = (int32_t)call->op;
    out->root = call->root;
    out->peer = call->peer;
    out->member = comm->rank;
    out->members = comm->ranks;
    out->number = shown ? shown->number : 0;
    out->rank = shown ? shown->rank : -1;
    if (axis) memcpy(out->axis, comm->axis, axis < sizeof out->axis ? axis : sizeof out->axis - 1);
    if (comm->error) memcpy(out->where, comm->error->where, sizeof out->where);
    memcpy(out->tag, tag, length < sizeof out->tag ? length : sizeof out->tag - 1);
    out->tag_bits = 0xcbf29ce484222325u ^ length;
    for (size_t i = 0; i < length; i += 8) {
        uint64_t word = 0;
        memcpy(&word, tag + i, length - i < 8 ? length - i : 8);
        out->tag_bits = (out->tag_bits ^ word) * 0x9e3779b97f4a7c15u;
        out->tag_bits ^= out->tag_bits >> 32;
    }
}

/* Describes the call in *out (kept by the caller until the slot has returned) and enters it in the record, if there is one; mark->id is 0 otherwise. */
static void llmpar__comm_enter(llmpar_comm *comm, llmpar_call_op op, const llmpar_collective *call, llmpar_call *out, llmpar__comm_mark *mark)
{
    llmpar_call_describe(comm, op, call, out);
    mark->record = comm->size >= LLMPAR__COMM_END(group) ? comm->record : NULL;
    mark->id = mark->record && comm->ranks > 1 ? llmpar_record_begin(mark->record, comm->group, out) : 0;
}

/* Shows the description to the slot, unless the table is too old to have a place for it; returns what stood there (a slot may be made of other collectives of the same table). */
static const llmpar_call *llmpar__comm_show(llmpar_comm *comm, const llmpar_call *call)
{
    if (comm->size < LLMPAR__COMM_END(call)) return NULL;
    const llmpar_call *before = comm->call;
    comm->call = call;
    return before;
}

/* The slot between its marks. */
static llmpar_status llmpar__comm_slot_run(llmpar_comm *comm, llmpar_stream *stream, llmpar_call_op op, const llmpar_collective *call, llmpar__comm_slot slot)
{
    llmpar_call described;
    llmpar__comm_mark mark;
    llmpar__comm_enter(comm, op, call, &described, &mark);
    llmpar_status st = mark.id ? comm->device->host_call(comm->device, stream, llmpar__comm_started, &mark, sizeof mark) : LLMPAR_OK;
    if (st) return st;
    const llmpar_call *before = llmpar__comm_show(comm, &described);
    st = slot ? slot(comm, stream, call) : comm->barrier(comm, stream, call->tag);
    llmpar__comm_show(comm, before);
    if (!st && mark.id) st = comm->device->host_call(comm->device, stream, llmpar__comm_completed, &mark, sizeof mark);
    return st;
}

static llmpar_status llmpar__comm_call(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *given, llmpar_call_op kind, llmpar__comm_slot slot, size_t slot_end)
{
    const char *name = llmpar_call_op_name(kind);
    llmpar_status st = llmpar__comm_abi(comm, slot_end);
    if (st) return st;
    llmpar_collective call = *given;
    if (!call.blocks) call.blocks = 1;
    if (!call.tag) call.tag = "";
    size_t item = llmpar_dtype_size(call.dtype), part, all, ranks = (size_t)comm->ranks;
    if (!item) return llmpar_error_set(comm->error, LLMPAR_ERR_ARGUMENT, "%s \"%s\" on %s: dtype %d is not a stored type", name, call.tag, comm->axis, (int)call.dtype);
    if (!llmpar_size_mul(call.count, call.blocks, &part) || !llmpar_size_mul(part, item, &part) || !llmpar_size_mul(part, ranks, &all))
        return llmpar_error_set(comm->error, LLMPAR_ERR_OVERFLOW, "%s \"%s\" on %s: %lu elements in %lu blocks overflow the address space",
                                name, call.tag, comm->axis, (unsigned long)call.count, (unsigned long)call.blocks);
    int reduces = kind == LLMPAR_CALL_REDUCE_SCATTER || kind == LLMPAR_CALL_ALL_REDUCE;
    if (reduces && !llmpar__comm_reducible(call.op, call.dtype))
        return llmpar_error_set(comm->error, LLMPAR_ERR_UNSUPPORTED, "%s \"%s\" on %s: no %s of %s (sum: f32 f64 i64 u64; max: f32 f64 i64)",
                                name, call.tag, comm->axis, call.op == LLMPAR_SUM ? "sum" : call.op == LLMPAR_MAX ? "max" : "such operation", llmpar_dtype_name(call.dtype));
    if (!reduces) call.op = LLMPAR_SUM;
    if (kind != LLMPAR_CALL_BROADCAST) call.root = 0;
    if (call.root < 0 || call.root >= comm->ranks)
        return llmpar_error_set(comm->error, LLMPAR_ERR_ARGUMENT, "%s \"%s\" on %s: root %d, expected 0 to %d", name, call.tag, comm->axis, (int)call.root, (int)comm->ranks - 1);
    int point = kind == LLMPAR_CALL_SEND || kind == LLMPAR_CALL_RECV;
    if (!point) call.peer = 0;
    else if (call.peer < 0 || call.peer >= comm->ranks || call.peer == comm->rank)
        return llmpar_error_set(comm->error, LLMPAR_ERR_ARGUMENT, "%s \"%s\" on %s: peer %d of rank %d, expected another rank from 0 to %d",
                                name, call.tag, comm->axis, (int)call.peer, (int)comm->rank, (int)comm->ranks - 1);
    int needs_send = kind != LLMPAR_CALL_RECV && !(kind == LLMPAR_CALL_BROADCAST && comm->rank != call.root);
    if (!needs_send) call.send = NULL; /* a broadcast in place, send == recv on every rank, is a root's only on the root */
    int needs_recv = kind != LLMPAR_CALL_SEND && !(kind == LLMPAR_CALL_BROADCAST && comm->rank == call.root);
    if (part && ((needs_send && !call.send) || (needs_recv && !call.recv)))
        return llmpar_error_set(comm->error, LLMPAR_ERR_ARGUMENT, "%s \"%s\" on %s: %s is NULL with %lu elements", name, call.tag, comm->axis, needs_send && !call.send ? "send" : "recv", (unsigned long)call.count);

    size_t send_bytes = kind == LLMPAR_CALL_REDUCE_SCATTER || kind == LLMPAR_CALL_ALL_TO_ALL ? all : part;
    size_t recv_bytes = kind == LLMPAR_CALL_ALL_GATHER || kind == LLMPAR_CALL_ALL_TO_ALL ? all : part;
    if (call.send && call.recv && needs_send && !point && llmpar__comm_overlap(call.send, send_bytes, call.recv, recv_bytes)) {
        size_t shift = call.blocks == 1 ? part * (size_t)comm->rank : 0;
        const char *send = (const char *)call.send, *recv = (const char *)call.recv;
        int fine = send == recv && (kind == LLMPAR_CALL_ALL_REDUCE || kind == LLMPAR_CALL_BROADCAST || ranks == 1);
        if (kind == LLMPAR_CALL_ALL_GATHER && call.blocks == 1) fine = send == recv + shift;
        if (kind == LLMPAR_CALL_REDUCE_SCATTER && call.blocks == 1) fine = recv == send + shift;
        if (!fine)
            return llmpar_error_set(comm->error, LLMPAR_ERR_ARGUMENT, "%s \"%s\" on %s: send and recv overlap in a way that is not the in-place form (send %p, recv %p, %lu bytes)",
                                    name, call.tag, comm->axis, call.send, call.recv, (unsigned long)part);
    }

    if (ranks == 1) st = llmpar__comm_alone(comm, stream, &call, part);
    else if (!slot) st = llmpar_error_set(comm->error, LLMPAR_ERR_UNSUPPORTED, "%s on %s: this communicator has no such collective", name, comm->axis);
    else st = llmpar__comm_slot_run(comm, stream, kind, &call, slot);
    if (st) return st;
    comm->sequence++;
    uint64_t moved = part;
    if (kind == LLMPAR_CALL_ALL_REDUCE) moved = (uint64_t)(2 * ((double)(ranks - 1) / (double)ranks) * (double)part + 0.5);
    else if (kind == LLMPAR_CALL_RECV || (kind == LLMPAR_CALL_BROADCAST && comm->rank != call.root)) moved = 0;
    else if (kind != LLMPAR_CALL_SEND) moved = (uint64_t)part * (ranks - 1);
    comm->bytes_sent += moved;
    return LLMPAR_OK;
}

#define LLMPAR__COMM_CALL(slot, kind) llmpar__comm_call(comm, stream, call, kind, comm->slot, LLMPAR__COMM_END(slot))

LLMPAR_DEF llmpar_status llmpar_all_gather(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return LLMPAR__COMM_CALL(all_gather, LLMPAR_CALL_ALL_GATHER); }
LLMPAR_DEF llmpar_status llmpar_reduce_scatter(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return LLMPAR__COMM_CALL(reduce_scatter, LLMPAR_CALL_REDUCE_SCATTER); }
LLMPAR_DEF llmpar_status llmpar_all_reduce(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return LLMPAR__COMM_CALL(all_reduce, LLMPAR_CALL_ALL_REDUCE); }
LLMPAR_DEF llmpar_status llmpar_broadcast(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return LLMPAR__COMM_CALL(broadcast, LLMPAR_CALL_BROADCAST); }
LLMPAR_DEF llmpar_status llmpar_all_to_all(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return LLMPAR__COMM_CALL(all_to_all, LLMPAR_CALL_ALL_TO_ALL); }
LLMPAR_DEF llmpar_status llmpar_send(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return LLMPAR__COMM_CALL(send, LLMPAR_CALL_SEND); }
LLMPAR_DEF llmpar_status llmpar_recv(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return LLMPAR__COMM_CALL(recv, LLMPAR_CALL_RECV); }

LLMPAR_DEF llmpar_status llmpar_comm_barrier(llmpar_comm *comm, llmpar_stream *stream, const char *tag)
{
    llmpar_status st = llmpar__comm_abi(comm, LLMPAR__COMM_END(barrier));
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.tag = tag ? tag : "";
    if (!st && comm->ranks > 1) st = llmpar__comm_slot_run(comm, stream, LLMPAR_CALL_BARRIER, &call, NULL);
    if (!st) comm->sequence++;
    return st;
}

LLMPAR_DEF llmpar_status llmpar_comm_split(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out)
{
    *out = NULL;
    llmpar_status st = llmpar__comm_abi(comm, LLMPAR__COMM_END(split));
    if (st) return st;
    llmpar_collective call;
    llmpar_call described;
    llmpar__comm_mark mark;
    memset(&call, 0, sizeof call);
    call.tag = name ? name : "";
    llmpar__comm_enter(comm, LLMPAR_CALL_SPLIT, &call, &described, &mark);
    if (mark.id) llmpar_record_started(mark.record, mark.id);
    const llmpar_call *before = llmpar__comm_show(comm, &described);
    st = comm->split(comm, color, key, call.tag, out);
    llmpar__comm_show(comm, before);
    if (st) return st;
    if (*out && (*out)->size >= LLMPAR__COMM_END(unchecked) && comm->size >= LLMPAR__COMM_END(unchecked)) (*out)->unchecked = comm->unchecked;
    if (mark.id) llmpar_record_completed(mark.record, mark.id);
    comm->sequence++;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_comm_destroy(llmpar_comm *comm)
{
    if (comm) comm->destroy(comm);
}

#undef LLMPAR__COMM_END
#undef LLMPAR__COMM_CALL
/* ==== src/tables/record.c ==== */
/* record: descriptions, fingerprints and the ring.

   ring: entry of call `id` (1, 2, ..) stands at id % 256:   | 257 | 258 | 3 | 4 | .. | 255 | 256 |      next id 259: the oldest is 3
   A mark for an id that has been overwritten does nothing. */

#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>


typedef struct llmpar__record_entry {
    llmpar_call call;
    uint64_t id, created_ns, started_ns, completed_ns; /* 0: not yet */
    int32_t group;
} llmpar__record_entry;

typedef struct llmpar__record_group {
    char axis[24];
    int32_t ranks, same_name; /* same_name: groups before it with this axis but other members */
    int32_t *world_rank;      /* [ranks] */
    uint64_t collectives, messages, enqueued, started, completed; /* numbers given; the last collective's in each state */
} llmpar__record_group;

struct llmpar_record {
    llmpar_heap *heap;
    int32_t rank;
    uint32_t lock;           /* atomic; of everything below */
    uint64_t timeout_ms, last_id, changed_ns;
    char where[48];
    llmpar_call last;        /* completed */
    llmpar__record_group *groups;
    int32_t group_count, group_capacity;
    llmpar__record_entry entry[LLMPAR_RECORD_ENTRIES];
};

/* ---- texts ---- */

static void llmpar__record_append(char *text, size_t capacity, size_t *used, const char *format, ...) LLMPAR_PRINTF(4, 5);
static void llmpar__record_append(char *text, size_t capacity, size_t *used, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int n = vsnprintf(*used < capacity ? text + *used : NULL, *used < capacity ? capacity - *used : 0, format, args);
    va_end(args);
    if (n > 0) *used += (size_t)n;
}

LLMPAR_DEF const char *llmpar_call_op_name(llmpar_call_op op)
{
    static const char *const names[] = { "no collective", "barrier", "all_gather", "reduce_scatter", "all_reduce", "broadcast", "all_to_all", "send", "recv", "split" };
    return (unsigned)op < sizeof names / sizeof names[0] ? names[op] : "?";
}

static int llmpar__record_message(const llmpar_call *call) { return call->op == LLMPAR_CALL_SEND || call->op == LLMPAR_CALL_RECV; }

LLMPAR_DEF size_t llmpar_call_print(const llmpar_call *call, char *text, size_t capacity)
{
    size_t used = 0;
    if (capacity) text[0] = 0;
    llmpar__record_append(text, capacity, &used, "%s", llmpar_call_op_name((llmpar_call_op)call->op));
    if (call->op == LLMPAR_CALL_NONE) return used;
    if (call->op == LLMPAR_CALL_REDUCE_SCATTER || call->op == LLMPAR_CALL_ALL_REDUCE) llmpar__record_append(text, capacity, &used, call->reduce == LLMPAR_MAX ? " max" : " sum");
    if (call->blocks > 1) llmpar__record_append(text, capacity, &used, " %s[%llu x %llu]", llmpar_dtype_name((llmpar_dtype)call->dtype), (unsigned long long)call->blocks, (unsigned long long)call->count);
    else if (call->blocks) llmpar__record_append(text, capacity, &used, " %s[%llu]", llmpar_dtype_name((llmpar_dtype)call->dtype), (unsigned long long)call->count);
    if (call->op == LLMPAR_CALL_BROADCAST) llmpar__record_append(text, capacity, &used, " from root %d", (int)call->root);
    if (call->op == LLMPAR_CALL_SEND) llmpar__record_append(text, capacity, &used, " to %d", (int)call->peer);
    if (call->op == LLMPAR_CALL_RECV) llmpar__record_append(text, capacity, &used, " from %d", (int)call->peer);
    llmpar__record_append(text, capacity, &used, " \"%s\"", call->tag);
    if (call->number) llmpar__record_append(text, capacity, &used, " (%s %llu on %s)", llmpar__record_message(call) ? "message" : "call", (unsigned long long)call->number, call->axis);
    else llmpar__record_append(text, capacity, &used, " (on %s)", call->axis);
    return used;
}

static uint64_t llmpar__record_mix(uint64_t hash, uint64_t word)
{
    hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
    return hash ^ (hash >> 29);
}

LLMPAR_DEF uint64_t llmpar_call_fingerprint(const llmpar_call *call)
{
    uint64_t axis[3], hash = 0x243f6a8885a308d3u;
    int message = llmpar__record_message(call), sends = call->op == LLMPAR_CALL_SEND;
    memcpy(axis, call->axis, sizeof axis);
    hash = llmpar__record_mix(hash, (uint64_t)(uint32_t)(message ? (int32_t)LLMPAR_CALL_SEND : call->op) << 32 | (uint32_t)call->dtype);
    hash = llmpar__record_mix(hash, (uint64_t)(uint32_t)call->reduce << 32 | (uint32_t)call->root);
    if (message) hash = llmpar__record_mix(hash, (uint64_t)(uint32_t)(sends ? call->member : call->peer) << 32 | (uint32_t)(sends ? call->peer : call->member));
    else hash = llmpar__record_mix(hash, call->number);
    hash = llmpar__record_mix(hash, call->count);
    hash = llmpar__record_mix(hash, call->blocks);
    hash = llmpar__record_mix(hash, call->tag_bits);
    for (int i = 0; i < 3; i++) hash = llmpar__record_mix(hash, axis[i]);
    return hash;
}

LLMPAR_DEF size_t llmpar_call_mismatch(const llmpar_call *a, const llmpar_call *b, char *text, size_t capacity)
{
    const llmpar_call *side[2];
    size_t used = 0;
    int fields = 0, messages = llmpar__record_message(a) && llmpar__record_message(b), differ[9];
    static const char *const name[9] = { "axis", "op", "order", "dtype", "count", "blocks", "root", "reduce op", "tag" };
    side[0] = a;
    side[1] = b;
    differ[0] = memcmp(a->axis, b->axis, sizeof a->axis) != 0;
    differ[1] = !messages && a->op != b->op;
    differ[2] = messages ? (a->op == b->op || a->member != b->peer || a->peer != b->member) : !llmpar__record_message(a) && !llmpar__record_message(b) && a->number != b->number;
    differ[3] = a->dtype != b->dtype;
    differ[4] = a->count != b->count;
    differ[5] = a->blocks != b->blocks;
    differ[6] = a->root != b->root;
    differ[7] = a->reduce != b->reduce;
    differ[8] = a->tag_bits != b->tag_bits;
    if (capacity) text[0] = 0;
    llmpar__record_append(text, capacity, &used, "the ranks of %s disagree in", a->axis);
    for (int i = 0; i < 9; i++)
        if (differ[i]) llmpar__record_append(text, capacity, &used, "%s%s", fields++ ? ", " : " ", name[i]);
    for (int i = 0; i < 2; i++) {
        llmpar__record_append(text, capacity, &used, "%srank %d%s%s%s: ", i ? "; " : ": ", (int)side[i]->rank, side[i]->where[0] ? " (" : "", side[i]->where, side[i]->where[0] ? ")" : "");
        used += llmpar_call_print(side[i], used < capacity ? text + used : NULL, used < capacity ? capacity - used : 0);
    }
    return used;
}

/* What is alike for ranks that are reported together: the two ends of a message, which have one fingerprint, are not. */
static uint64_t llmpar__record_situation(const llmpar_position *p)
{
    uint64_t ends = llmpar__record_mix((uint64_t)(uint32_t)p->now.op << 32 | (uint32_t)p->last.op, (uint64_t)(uint32_t)p->state);
    return llmpar__record_mix(llmpar__record_mix(ends, llmpar_call_fingerprint(&p->now)), llmpar_call_fingerprint(&p->last));
}

LLMPAR_DEF size_t llmpar_position_print(llmpar_position_fn get, void *user, int32_t ranks, char *text, size_t capacity)
{
    enum { SITUATIONS = 24, NAMED = 12 };
    static const char *const states[] = { "outside", "in ", "has returned", "unknown" };
    uint64_t seen[SITUATIONS];
    int count = 0;
    size_t used = 0;
    llmpar_position p, q;
    if (capacity) text[0] = 0;
    for (int inside = 0; inside < 2; inside++)
        for (int32_t i = 0; i < ranks; i++) {
            get(user, i, &p);
            if ((p.state == LLMPAR_POSITION_INSIDE) != inside) continue;
            uint64_t key = llmpar__record_situation(&p);
            int k = 0;
            while (k < count && seen[k] != key) k++;
            if (k < count) continue;
            if (count == SITUATIONS) {
                llmpar__record_append(text, capacity, &used, "; ...");
                return used;
            }
            seen[count++] = key;
            int32_t alike = 1, named = 1;
            for (int32_t j = i + 1; j < ranks; j++) {
                get(user, j, &q);
                alike += llmpar__record_situation(&q) == key;
            }
            llmpar__record_append(text, capacity, &used, "%s%s %d%s%s%s", count > 1 ? "; " : "", alike > 1 ? "ranks" : "rank", (int)p.rank, p.where[0] ? " (" : "", p.where, p.where[0] ? ")" : "");
            for (int32_t j = i + 1; j < ranks && named < alike && named < NAMED; j++) {
                get(user, j, &q);
                if (llmpar__record_situation(&q) != key) continue;
                llmpar__record_append(text, capacity, &used, " %d%s%s%s", (int)q.rank, q.where[0] && alike <= 4 ? " (" : "", alike <= 4 ? q.where : "", q.where[0] && alike <= 4 ? ")" : "");
                named++;
            }
            if (named < alike) llmpar__record_append(text, capacity, &used, " and %d more", (int)(alike - named));
            llmpar__record_append(text, capacity, &used, ": %s", states[p.state]);
            if (p.state == LLMPAR_POSITION_INSIDE) used += llmpar_call_print(&p.now, used < capacity ? text + used : NULL, used < capacity ? capacity - used : 0);
            llmpar__record_append(text, capacity, &used, p.last.op == LLMPAR_CALL_NONE ? ", completed none" : ", last completed ");
            if (p.last.op != LLMPAR_CALL_NONE) used += llmpar_call_print(&p.last, used < capacity ? text + used : NULL, used < capacity ? capacity - used : 0);
        }
    return used;
}

/* ---- the ring ---- */

static void llmpar__record_lock(llmpar_record *record)
{
    while (__atomic_exchange_n(&record->lock, 1u, __ATOMIC_ACQUIRE)) sched_yield();
}
static void llmpar__record_unlock(llmpar_record *record) { __atomic_store_n(&record->lock, 0u, __ATOMIC_RELEASE); }

static uint64_t llmpar__record_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t); /* the dumps of several machines are read together */
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

LLMPAR_DEF llmpar_status llmpar_record_create(llmpar_heap *heap, int32_t rank, uint64_t timeout_ms, llmpar_record **out)
{
    llmpar_record *record = *out = (llmpar_record *)llmpar_heap_zalloc(heap, 1, sizeof *record);
    if (!record) return LLMPAR_ERR_MEMORY;
    record->heap = heap;
    record->rank = rank;
    record->timeout_ms = timeout_ms;
    record->changed_ns = llmpar__record_now();
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_record_destroy(llmpar_record *record)
{
    if (!record) return;
    for (int32_t i = 0; i < record->group_count; i++) llmpar_heap_free(record->heap, record->groups[i].world_rank);
    llmpar_heap_free(record->heap, record->groups);
    llmpar_heap_free(record->heap, record);
}

LLMPAR_DEF llmpar_status llmpar_record_attach(llmpar_record *record, llmpar_comm *comm, const int32_t *world_rank)
{
    size_t n = (size_t)comm->ranks, length = strlen(comm->axis);
    char axis[sizeof record->groups->axis];
    int32_t same_name = 0;
    memset(axis, 0, sizeof axis);
    memcpy(axis, comm->axis, length < sizeof axis ? length : sizeof axis - 1);
    for (int32_t i = 0; i < record->group_count; i++) {
        llmpar__record_group *g = &record->groups[i];
        if (memcmp(g->axis, axis, sizeof axis)) continue;
        if (g->ranks == comm->ranks && !memcmp(g->world_rank, world_rank, n * sizeof *world_rank)) {
            comm->record = record;
            comm->group = i;
            return LLMPAR_OK;
        }
        same_name++;
    }
    int32_t *members = (int32_t *)llmpar_heap_alloc(record->heap, n, sizeof *members);
    llmpar__record_group *grown = NULL, *old = record->groups;
    int32_t capacity = record->group_capacity;
    if (members && record->group_count == capacity) {
        capacity = capacity ? 2 * capacity : 8;
        grown = (llmpar__record_group *)llmpar_heap_zalloc(record->heap, (size_t)capacity, sizeof *grown);
    }
    if (!members || (record->group_count == record->group_capacity && !grown)) {
        llmpar_heap_free(record->heap, members);
        return LLMPAR_ERR_MEMORY;
    }
    memcpy(members, world_rank, n * sizeof *members);
    llmpar__record_lock(record);
    if (grown) {
        if (old) memcpy(grown, old, (size_t)record->group_count * sizeof *grown);
        record->groups = grown;
        record->group_capacity = capacity;
    }
    llmpar__record_group *g = &record->groups[record->group_count];
    memset(g, 0, sizeof *g);
    memcpy(g->axis, axis, sizeof axis);
    g->ranks = comm->ranks;
    g->same_name = same_name;
    g->world_rank = members;
    comm->record = record;
    comm->group = record->group_count++;
    llmpar__record_unlock(record);
    if (grown) llmpar_heap_free(record->heap, old);
    return LLMPAR_OK;
}

LLMPAR_DEF uint64_t llmpar_record_begin(llmpar_record *record, int32_t group, llmpar_call *call)
{
    uint64_t now = llmpar__record_now();
    llmpar__record_lock(record);
    llmpar__record_group *g = &record->groups[group];
    uint64_t id = ++record->last_id;
    llmpar__record_entry *e = &record->entry[id % LLMPAR_RECORD_ENTRIES];
    call->rank = record->rank;
    call->number = llmpar__record_message(call) ? ++g->messages : ++g->collectives;
    if (!llmpar__record_message(call)) g->enqueued = call->number;
    if (call->where[0]) memcpy(record->where, call->where, sizeof record->where);
    e->call = *call;
    e->id = id;
    e->created_ns = record->changed_ns = now;
    e->started_ns = e->completed_ns = 0;
    e->group = group;
    llmpar__record_unlock(record);
    return id;
}

static void llmpar__record_mark(llmpar_record *record, uint64_t id, int completed)
{
    uint64_t now = llmpar__record_now();
    llmpar__record_lock(record);
    llmpar__record_entry *e = &record->entry[id % LLMPAR_RECORD_ENTRIES];
    record->changed_ns = now;
    if (e->id == id) {
        llmpar__record_group *g = &record->groups[e->group];
        if (completed) {
            e->completed_ns = now;
            record->last = e->call;
        } else {
            e->started_ns = now;
        }
        if (!llmpar__record_message(&e->call)) *(completed ? &g->completed : &g->started) = e->call.number;
    }
    llmpar__record_unlock(record);
}

LLMPAR_DEF void llmpar_record_started(llmpar_record *record, uint64_t id) { llmpar__record_mark(record, id, 0); }
LLMPAR_DEF void llmpar_record_completed(llmpar_record *record, uint64_t id) { llmpar__record_mark(record, id, 1); }

static uint64_t llmpar__record_oldest(const llmpar_record *record)
{
    return record->last_id < LLMPAR_RECORD_ENTRIES ? 1 : record->last_id - LLMPAR_RECORD_ENTRIES + 1;
}

LLMPAR_DEF void llmpar_record_position(llmpar_record *record, llmpar_position *out)
{
    memset(out, 0, sizeof *out);
    llmpar__record_lock(record);
    out->rank = record->rank;
    out->time_ns = record->changed_ns;
    memcpy(out->where, record->where, sizeof out->where);
    out->last = record->last;
    for (uint64_t id = record->last_id; id >= llmpar__record_oldest(record) && id; id--) {
        const llmpar__record_entry *e = &record->entry[id % LLMPAR_RECORD_ENTRIES];
        if (!e->started_ns || e->completed_ns) continue;
        out->state = LLMPAR_POSITION_INSIDE;
        out->now = e->call;
        break;
    }
    llmpar__record_unlock(record);
}

/* ---- the dump ---- */

static const char *llmpar__record_torch_dtype(int32_t dtype)
{
    switch (dtype) {
    case LLMPAR_F32: return "Float";
    case LLMPAR_F64: return "Double";
    case LLMPAR_BF16: return "BFloat16";
    case LLMPAR_F16: return "Half";
    case LLMPAR_I32: return "Int";
    case LLMPAR_I64: return "Long";
    case LLMPAR_U64: return "UInt64";
    default: return "Byte";
    }
}

/* "tp"; the second communicator of that name with other members is "tp.1". */
static void llmpar__record_group_name(char *text, size_t capacity, const llmpar__record_group *g)
{
    if (g->same_name) snprintf(text, capacity, "%s.%d", g->axis, (int)g->same_name);
    else snprintf(text, capacity, "%s", g->axis);
}

static void llmpar__record_json_entry(const llmpar_record *record, const llmpar__record_entry *e, char *text, size_t capacity, size_t *used)
{
    const llmpar_call *c = &e->call;
    const llmpar__record_group *g = &record->groups[e->group];
    char group[48], name[320], axis[160], tag[400], where[32] = "", started[24] = "null", completed[24] = "null", duration[48] = "";
    uint64_t part = c->count * c->blocks, all = part * (uint64_t)c->members, in = part, out = part;
    if (c->op == LLMPAR_CALL_ALL_GATHER) out = all;
    if (c->op == LLMPAR_CALL_REDUCE_SCATTER) in = all;
    if (c->op == LLMPAR_CALL_ALL_TO_ALL) in = out = all;
    llmpar__record_group_name(group, sizeof group, g);
    llmpar_json_escape(group, strlen(group), name, sizeof name);
    llmpar_json_escape(g->axis, strlen(g->axis), axis, sizeof axis);
    llmpar_json_escape(c->tag, strlen(c->tag), tag, sizeof tag);
    if (c->op == LLMPAR_CALL_SEND) snprintf(where, sizeof where, " %d->%d", (int)c->member, (int)c->peer);
    if (c->op == LLMPAR_CALL_RECV) snprintf(where, sizeof where, " %d<-%d", (int)c->member, (int)c->peer);
    if (e->started_ns) snprintf(started, sizeof started, "%llu", (unsigned long long)e->started_ns);
    if (e->completed_ns) snprintf(completed, sizeof completed, "%llu", (unsigned long long)e->completed_ns);
    if (e->completed_ns && e->started_ns) snprintf(duration, sizeof duration, "\"duration_ms\": %.6f, ", 1e-6 * (double)(int64_t)(e->completed_ns - e->started_ns));
    llmpar__record_append(text, capacity, used,
                          "  {\"record_id\": %llu, \"pg_id\": %d, \"process_group\": [%s, %s], \"collective_seq_id\": %llu, \"p2p_seq_id\": %llu, \"op_id\": %llu, \"profiling_name\": \"llmpar:%s%s\", ",
                          (unsigned long long)(e->id - 1), (int)e->group, name, axis, (unsigned long long)(llmpar__record_message(c) ? 0 : c->number),
                          (unsigned long long)(llmpar__record_message(c) ? c->number : 0), (unsigned long long)e->id, llmpar_call_op_name((llmpar_call_op)c->op), where);
    llmpar__record_append(text, capacity, used, "\"time_created_ns\": %llu, %s\"input_sizes\": [[%llu]], \"input_dtypes\": [\"%s\"], \"output_sizes\": [[%llu]], \"output_dtypes\": [\"%s\"], ",
                          (unsigned long long)e->created_ns, duration, (unsigned long long)in, llmpar__record_torch_dtype(c->dtype), (unsigned long long)out, llmpar__record_torch_dtype(c->dtype));
    llmpar__record_append(text, capacity, used,
                          "\"state\": \"%s\", \"time_discovered_started_ns\": %s, \"time_discovered_completed_ns\": %s, \"retired\": %s, \"timeout_ms\": %llu, \"is_p2p\": %s, "
                          "\"root\": %d, \"reduce_op\": \"%s\", \"frames\": [{\"name\": %s, \"filename\": \"\", \"line\": 0}]}",
                          e->completed_ns ? "completed" : e->started_ns ? "started" : "scheduled", started, completed, e->completed_ns ? "true" : "false", (unsigned long long)record->timeout_ms,
                          llmpar__record_message(c) ? "true" : "false", (int)c->root, c->reduce == LLMPAR_MAX ? "max" : c->op == LLMPAR_CALL_ALL_REDUCE || c->op == LLMPAR_CALL_REDUCE_SCATTER ? "sum" : "", tag);
}

LLMPAR_DEF size_t llmpar_record_json(llmpar_record *record, char *text, size_t capacity)
{
    size_t used = 0;
    char group[48], name[320], axis[160], where[320];
    if (capacity) text[0] = 0;
    llmpar__record_lock(record);
    llmpar_json_escape(record->where, strlen(record->where), where, sizeof where);
    llmpar__record_append(text, capacity, &used, "{\n \"version\": \"2.10\",\n \"rank\": %d,\n \"where\": %s,\n \"pg_config\": {", (int)record->rank, where);
    for (int32_t i = 0; i < record->group_count; i++) {
        const llmpar__record_group *g = &record->groups[i];
        llmpar__record_group_name(group, sizeof group, g);
        llmpar_json_escape(group, strlen(group), name, sizeof name);
        llmpar_json_escape(g->axis, strlen(g->axis), axis, sizeof axis);
        llmpar__record_append(text, capacity, &used, "%s\n  %s: {\"name\": %s, \"desc\": %s, \"ranks\": \"[", i ? "," : "", name, name, axis);
        for (int32_t k = 0; k < g->ranks; k++) llmpar__record_append(text, capacity, &used, "%s%d", k ? ", " : "", (int)g->world_rank[k]);
        llmpar__record_append(text, capacity, &used, "]\"}");
    }
    llmpar__record_append(text, capacity, &used, "\n },\n \"pg_status\": {");
    for (int32_t i = 0; i < record->group_count; i++) {
        const llmpar__record_group *g = &record->groups[i];
        llmpar__record_append(text, capacity, &used, "%s\n  \"%d\": {\"last_enqueued_collective\": %llu, \"last_started_collective\": %llu, \"last_completed_collective\": %llu}", i ? "," : "", (int)i,
                              (unsigned long long)g->enqueued, (unsigned long long)g->started, (unsigned long long)g->completed);
    }
    llmpar__record_append(text, capacity, &used, "\n },\n \"entries\": [");
    for (uint64_t id = llmpar__record_oldest(record); id <= record->last_id; id++) {
        llmpar__record_append(text, capacity, &used, id == llmpar__record_oldest(record) ? "\n" : ",\n");
        llmpar__record_json_entry(record, &record->entry[id % LLMPAR_RECORD_ENTRIES], text, capacity, &used);
    }
    llmpar__record_append(text, capacity, &used, "\n ]\n}\n");
    llmpar__record_unlock(record);
    return used;
}
/* ==== src/tables/arena.c ==== */
/* arena: blocks of device memory with tags. The bookkeeping lives on the rank's heap, apart from the blocks: device memory need not be readable from the host.

   Every block is in one of two hash tables of chains: live blocks by address, idle blocks by size. An idle block serves a later request of exactly its
   (rounded) size, so a step that repeats takes memory from the device only the first time, and the same requests always give the same usage. */

#include <stdio.h>
#include <string.h>


#define LLMPAR__ARENA_BUCKETS 256u

typedef struct llmpar__arena_block {
    struct llmpar__arena_block *next; /* in its chain */
    void *memory;
    size_t bytes;                     /* rounded */
    llmpar_tag tag;
    const char *label;                /* borrowed */
} llmpar__arena_block;

struct llmpar_arena {
    llmpar_ctx *ctx; /* borrowed */
    uint64_t limit;
    llmpar_arena_usage usage;
    llmpar__arena_block *live[LLMPAR__ARENA_BUCKETS]; /* by address */
    llmpar__arena_block *idle[LLMPAR__ARENA_BUCKETS]; /* by size */
};

LLMPAR_DEF const char *llmpar_tag_name(llmpar_tag tag)
{
    static const char *const names[] = { "parameters", "gathered", "gradients", "optimizer", "activations", "communication", "workspace" };
    return (unsigned)tag < LLMPAR_TAG_COUNT ? names[tag] : "?";
}

static unsigned llmpar__arena_hash(uint64_t key)
{
    return (unsigned)((key * 0x9e3779b97f4a7c15u) >> 32) % LLMPAR__ARENA_BUCKETS;
}

LLMPAR_DEF llmpar_status llmpar_arena_create(llmpar_ctx *ctx, uint64_t limit, llmpar_arena **out)
{
    *out = NULL;
    llmpar_arena *arena = (llmpar_arena *)llmpar_heap_zalloc(&ctx->heap, 1, sizeof *arena);
    if (!arena) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "arena: %lu bytes for its tables", (unsigned long)sizeof *arena);
    arena->ctx = ctx;
    arena->limit = limit;
    *out = arena;
    return LLMPAR_OK;
}

static void llmpar__arena_release(llmpar_arena *arena, llmpar__arena_block **chains)
{
    for (unsigned i = 0; i < LLMPAR__ARENA_BUCKETS; i++) {
        llmpar__arena_block *block = chains[i];
        chains[i] = NULL;
        while (block) {
            llmpar__arena_block *next = block->next;
            arena->ctx->device->free(arena->ctx->device, block->memory, block->bytes);
            arena->usage.reserved -= block->bytes;
            llmpar_heap_free(&arena->ctx->heap, block);
            block = next;
        }
    }
}

LLMPAR_DEF void llmpar_arena_destroy(llmpar_arena *arena)
{
    if (!arena) return;
    llmpar__arena_release(arena, arena->live);
    llmpar__arena_release(arena, arena->idle);
    llmpar_heap_free(&arena->ctx->heap, arena);
}

/* `why` completes "arena: activations "layers.3 saved": 4096 bytes: ...". */
static llmpar_status llmpar__arena_full(llmpar_arena *arena, llmpar_tag tag, size_t bytes, const char *label, const char *why)
{
    char list[320];
    size_t used = 0;
    list[0] = 0;
    for (int t = 0; t < LLMPAR_TAG_COUNT && used < sizeof list; t++)
        used += (size_t)snprintf(list + used, sizeof list - used, "%s%s %llu", t ? ", " : "", llmpar_tag_name((llmpar_tag)t), (unsigned long long)arena->usage.live[t]);
    return llmpar_fail(arena->ctx, LLMPAR_ERR_MEMORY, "arena: %s \"%s\": %llu bytes: %s (limit %llu, live %llu: %s)", llmpar_tag_name(tag), label, (unsigned long long)bytes, why,
                       (unsigned long long)arena->limit, (unsigned long long)arena->usage.live_total, list);
}

/* Drops the device's own text about a failure that is mended, or that the arena can tell better. */
static void llmpar__arena_forget(llmpar_ctx *ctx)
{
    ctx->error.status = LLMPAR_OK;
    ctx->error.text[0] = 0;
}

LLMPAR_DEF llmpar_status llmpar_arena_alloc(llmpar_arena *arena, llmpar_tag tag, size_t bytes, const char *label, void **out)
{
    llmpar_ctx *ctx = arena->ctx;
    llmpar_device *device = ctx->device;
    llmpar_arena_usage *usage = &arena->usage;
    *out = NULL;
    if (!label) label = "";
    if ((unsigned)tag >= LLMPAR_TAG_COUNT) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "arena: \"%s\": tag %d, expected 0 to %d", label, (int)tag, LLMPAR_TAG_COUNT - 1);
    size_t need;
    if (!llmpar_size_add(bytes ? bytes : 1, device->alignment - 1, &need)) return llmpar__arena_full(arena, tag, bytes, label, "size overflow");
    need &= ~(device->alignment - 1);
    if (arena->limit && (need > arena->limit || usage->live_total > arena->limit - need)) return llmpar__arena_full(arena, tag, need, label, "over the limit");

    unsigned bucket = llmpar__arena_hash(need);
    llmpar__arena_block **link = &arena->idle[bucket], *block;
    while (*link && (*link)->bytes != need) link = &(*link)->next;
    block = *link;
    if (block) {
        *link = block->next;
    } else {
        /* Idle blocks must not push what is really held over the limit. */
        if (arena->limit && usage->reserved > arena->limit - need) llmpar__arena_release(arena, arena->idle);
        block = (llmpar__arena_block *)llmpar_heap_zalloc(&ctx->heap, 1, sizeof *block);
        if (!block) return llmpar__arena_full(arena, tag, need, label, "no host memory for the block's entry");
        int clean = ctx->error.status == LLMPAR_OK;
        llmpar_status st = device->alloc(device, need, &block->memory);
        if (st == LLMPAR_ERR_MEMORY && usage->reserved > usage->live_total) {
            llmpar__arena_release(arena, arena->idle);
            if (clean) llmpar__arena_forget(ctx);
            st = device->alloc(device, need, &block->memory);
        }
        if (st) {
            if (st == LLMPAR_ERR_MEMORY && clean) llmpar__arena_forget(ctx);
            llmpar_heap_free(&ctx->heap, block);
            return st == LLMPAR_ERR_MEMORY ? llmpar__arena_full(arena, tag, need, label, "the device has no more memory") : st;
        }
        block->bytes = need;
        usage->reserved += need;
    }
    block->tag = tag;
    block->label = label;
    bucket = llmpar__arena_hash((uint64_t)(uintptr_t)block->memory);
    block->next = arena->live[bucket];
    arena->live[bucket] = block;
    usage->live[tag] += need;
    usage->live_total += need;
    if (usage->live[tag] > usage->peak[tag]) usage->peak[tag] = usage->live[tag];
    if (usage->live_total > usage->peak_total) usage->peak_total = usage->live_total;
    *out = block->memory;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_arena_free(llmpar_arena *arena, void *memory)
{
    if (!memory) return;
    llmpar__arena_block **link = &arena->live[llmpar__arena_hash((uint64_t)(uintptr_t)memory)], *block;
    while (*link && (*link)->memory != memory) link = &(*link)->next;
    block = *link;
    if (!block) { /* nothing to return an error through: it shows up as the rank's error */
        llmpar_fail(arena->ctx, LLMPAR_ERR_ARGUMENT, "arena: free of %p, which is not a live block of this arena", memory);
        return;
    }
    *link = block->next;
    arena->usage.live[block->tag] -= block->bytes;
    arena->usage.live_total -= block->bytes;
    unsigned bucket = llmpar__arena_hash(block->bytes);
    block->next = arena->idle[bucket];
    arena->idle[bucket] = block;
}

LLMPAR_DEF void llmpar_arena_get_usage(const llmpar_arena *arena, llmpar_arena_usage *out)
{
    *out = arena->usage;
}

LLMPAR_DEF void llmpar_arena_reset_peaks(llmpar_arena *arena)
{
    for (int t = 0; t < LLMPAR_TAG_COUNT; t++) arena->usage.peak[t] = arena->usage.live[t];
    arena->usage.peak_total = arena->usage.live_total;
}

#undef LLMPAR__ARENA_BUCKETS

/* ==== src/cpu/cpu.c ==== */
/* cpu: the device itself: levels, memory, streams, and the table of operations. An operation has finished when its call returns, so a stream is
   only the failure that sticks to it, and an event only the failure of what was recorded. */

#include <stdio.h>
#include <string.h>

#define LLMPAR__CPU_MAX_THREADS 1024

typedef struct llmpar__cpu_stream { llmpar_status status; } llmpar__cpu_stream;
typedef struct llmpar__cpu_event { llmpar_status status; } llmpar__cpu_event; /* of the stream when last recorded */

/* The device, its state and its name in one allocation of the rank's heap. */
typedef struct llmpar__cpu_device {
    llmpar_device table;
    llmpar__cpu state;
    char name[32];
} llmpar__cpu_device;

LLMPAR_DEF llmpar_cpu_level llmpar_cpu_best_level(void)
{
#if defined(__x86_64__) && !defined(LLMPAR_NO_SIMD)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return LLMPAR_CPU_PORTABLE;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) return LLMPAR_CPU_AVX512;
    return LLMPAR_CPU_AVX2;
#else
    return LLMPAR_CPU_PORTABLE;
#endif
}

LLMPAR_DEF const char *llmpar_cpu_level_name(llmpar_cpu_level level)
{
    switch (level) {
    case LLMPAR_CPU_PORTABLE: return "portable";
    case LLMPAR_CPU_AVX2: return "avx2";
    case LLMPAR_CPU_AVX512: return "avx512";
    case LLMPAR_CPU_DEFAULT: break;
    }
    return "?";
}

LLMPAR_DEF int llmpar_cpu_level_parse(const char *text, llmpar_cpu_level *out)
{
    int i;
    for (i = (int)LLMPAR_CPU_PORTABLE; i <= (int)LLMPAR_CPU_AVX512; i++) {
        if (strcmp(text, llmpar_cpu_level_name((llmpar_cpu_level)i)) == 0) {
            *out = (llmpar_cpu_level)i;
            return 1;
        }
    }
    return 0;
}

/* ---- memory ---- */

static llmpar_status llmpar__cpu_alloc(llmpar_device *device, size_t bytes, void **out)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    *out = llmpar_heap_alloc(cpu->heap, bytes, 1);
    if (!*out) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "cpu: no memory for %llu bytes", (unsigned long long)bytes);
    return LLMPAR_OK;
}

static void llmpar__cpu_free(llmpar_device *device, void *memory, size_t bytes)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    (void)bytes;
    llmpar_heap_free(cpu->heap, memory);
}

/* ---- streams and events; a NULL stream keeps no failure ---- */

static llmpar_status llmpar__cpu_stuck(llmpar_stream *stream)
{
    return stream ? ((llmpar__cpu_stream *)(void *)stream)->status : LLMPAR_OK;
}

static llmpar_status llmpar__cpu_stick(llmpar_stream *stream, llmpar_status status)
{
    if (stream && status) ((llmpar__cpu_stream *)(void *)stream)->status = status;
    return status;
}

static llmpar_status llmpar__cpu_copy(llmpar_device *device, llmpar_stream *stream, void *out, const void *in, size_t bytes)
{
    (void)device;
    if (llmpar__cpu_stuck(stream)) return llmpar__cpu_stuck(stream);
    if (bytes) memmove(out, in, bytes);
    return LLMPAR_OK;
}

static llmpar_status llmpar__cpu_zero(llmpar_device *device, llmpar_stream *stream, void *out, size_t bytes)
{
    (void)device;
    if (llmpar__cpu_stuck(stream)) return llmpar__cpu_stuck(stream);
    if (bytes) memset(out, 0, bytes);
    return LLMPAR_OK;
}

static llmpar_status llmpar__cpu_stream_create(llmpar_device *device, const char *name, llmpar_stream **out)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar__cpu_stream *stream = (llmpar__cpu_stream *)llmpar_heap_zalloc(cpu->heap, 1, sizeof *stream);
    *out = (llmpar_stream *)(void *)stream;
    if (!stream) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "cpu: no memory for stream %s", name ? name : "?");
    return LLMPAR_OK;
}

static void llmpar__cpu_stream_destroy(llmpar_device *device, llmpar_stream *stream)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar_heap_free(cpu->heap, stream);
}

static llmpar_status llmpar__cpu_synchronize(llmpar_device *device, llmpar_stream *stream)
{
    (void)device;
    return llmpar__cpu_stuck(stream);
}

static llmpar_status llmpar__cpu_event_create(llmpar_device *device, llmpar_event **out)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar__cpu_event *event = (llmpar__cpu_event *)llmpar_heap_zalloc(cpu->heap, 1, sizeof *event);
    *out = (llmpar_event *)(void *)event;
    if (!event) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "cpu: no memory for an event");
    return LLMPAR_OK;
}

static void llmpar__cpu_event_destroy(llmpar_device *device, llmpar_event *event)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar_heap_free(cpu->heap, event);
}

static llmpar_status llmpar__cpu_event_record(llmpar_device *device, llmpar_stream *stream, llmpar_event *event)
{
    (void)device;
    ((llmpar__cpu_event *)(void *)event)->status = llmpar__cpu_stuck(stream);
    return llmpar__cpu_stuck(stream);
}

/* What waits for the work of a failed stream has failed too. */
static llmpar_status llmpar__cpu_event_wait(llmpar_device *device, llmpar_stream *stream, llmpar_event *event)
{
    (void)device;
    if (llmpar__cpu_stuck(stream)) return llmpar__cpu_stuck(stream);
    return llmpar__cpu_stick(stream, ((llmpar__cpu_event *)(void *)event)->status);
}

static llmpar_status llmpar__cpu_event_synchronize(llmpar_device *device, llmpar_event *event)
{
    (void)device;
    return ((llmpar__cpu_event *)(void *)event)->status;
}

static llmpar_status llmpar__cpu_host_call(llmpar_device *device, llmpar_stream *stream, llmpar_status (*fn)(void *arg), const void *arg, size_t arg_bytes)
{
    union { char bytes[256]; double alignment_of_double; int64_t alignment_of_int; void *alignment_of_pointer; } copy;
    if (llmpar__cpu_stuck(stream)) return llmpar__cpu_stuck(stream);
    if (arg_bytes > sizeof copy.bytes)
        return llmpar__cpu_stick(stream, llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "cpu host_call: expected an argument of at most 256 bytes, got %llu", (unsigned long long)arg_bytes));
    if (arg_bytes) memcpy(copy.bytes, arg, arg_bytes);
    return llmpar__cpu_stick(stream, fn(copy.bytes));
}

/* ---- operations: each runs unless its stream has failed, and a failure sticks ---- */

#define LLMPAR__CPU_OPERATIONS(X) \
    X(gemm) X(rmsnorm) X(rmsnorm_backward) X(rope) X(attention) X(attention_backward) X(swiglu) X(swiglu_backward) X(embedding) X(embedding_backward) \
    X(tree_sum) X(max) X(add) X(scale) X(cast) X(copy_rows) X(adamw) X(square_sum)

#define LLMPAR__CPU_RUN(slot, args_type) \
    static llmpar_status llmpar__cpu_run_##slot(llmpar_device *device, llmpar_stream *stream, const args_type *args) \
    { \
        if (llmpar__cpu_stuck(stream)) return llmpar__cpu_stuck(stream); \
        return llmpar__cpu_stick(stream, llmpar__cpu_##slot(device, stream, args)); \
    }
#define LLMPAR__CPU_RUN_OWN(slot) LLMPAR__CPU_RUN(slot, llmpar_##slot##_args)
LLMPAR__CPU_OPERATIONS(LLMPAR__CPU_RUN_OWN)
LLMPAR__CPU_RUN(xent_max, llmpar_xent_args)
LLMPAR__CPU_RUN(xent_sum, llmpar_xent_args)
LLMPAR__CPU_RUN(xent_loss, llmpar_xent_loss_args)
LLMPAR__CPU_RUN(xent_backward, llmpar_xent_backward_args)

static void llmpar__cpu_fill_table(llmpar_device *table)
{
    table->alloc = llmpar__cpu_alloc;
    table->free = llmpar__cpu_free;
    table->copy = llmpar__cpu_copy;
    table->zero = llmpar__cpu_zero;
    table->stream_create = llmpar__cpu_stream_create;
    table->stream_destroy = llmpar__cpu_stream_destroy;
    table->synchronize = llmpar__cpu_synchronize;
    table->event_create = llmpar__cpu_event_create;
    table->event_destroy = llmpar__cpu_event_destroy;
    table->event_record = llmpar__cpu_event_record;
    table->event_wait = llmpar__cpu_event_wait;
    table->event_synchronize = llmpar__cpu_event_synchronize;
    table->host_call = llmpar__cpu_host_call;
#define LLMPAR__CPU_FILL(slot) table->slot = llmpar__cpu_run_##slot;
    LLMPAR__CPU_OPERATIONS(LLMPAR__CPU_FILL)
    LLMPAR__CPU_FILL(xent_max)
    LLMPAR__CPU_FILL(xent_sum)
    LLMPAR__CPU_FILL(xent_loss)
    LLMPAR__CPU_FILL(xent_backward)
#undef LLMPAR__CPU_FILL
    table->gemm_workspace = llmpar__cpu_gemm_workspace;
    table->attention_workspace = llmpar__cpu_attention_workspace;
    table->attention_backward_workspace = llmpar__cpu_attention_backward_workspace;
    table->embedding_backward_workspace = llmpar__cpu_embedding_backward_workspace;
}

#undef LLMPAR__CPU_OPERATIONS
#undef LLMPAR__CPU_RUN
#undef LLMPAR__CPU_RUN_OWN

/* ---- creation ---- */

LLMPAR_DEF llmpar_status llmpar_cpu_create(llmpar_heap *heap, llmpar_error *error, const llmpar_cpu_desc *desc, llmpar_device **out)
{
    llmpar_cpu_level best = llmpar_cpu_best_level(), level = best;
    int32_t threads = 1;
    llmpar__cpu_device *cpu;
    *out = NULL;
    if (desc && desc->level != LLMPAR_CPU_DEFAULT) level = desc->level;
    if (desc && desc->threads != 0) threads = desc->threads;
    if ((int)level < (int)LLMPAR_CPU_PORTABLE || (int)level > (int)LLMPAR_CPU_AVX512) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "cpu: unknown level %d", (int)level);
    if ((int)level > (int)best)
        return llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "cpu: level %s was asked for, this processor or build has at most %s", llmpar_cpu_level_name(level), llmpar_cpu_level_name(best));
    if (threads < 1 || threads > LLMPAR__CPU_MAX_THREADS)
        return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "cpu: expected 1 to %d threads, got %d", LLMPAR__CPU_MAX_THREADS, (int)threads);

    cpu = (llmpar__cpu_device *)llmpar_heap_zalloc(heap, 1, sizeof *cpu);
    if (!cpu) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "cpu: no memory for the device");
    cpu->state.heap = heap;
    cpu->state.level = level;
    if (threads > 1) {
        llmpar_status status = llmpar__pool_create(heap, error, threads, &cpu->state.pool);
        if (status) {
            llmpar_heap_free(heap, cpu);
            return status;
        }
    }
    snprintf(cpu->name, sizeof cpu->name, "cpu %s", llmpar_cpu_level_name(level));
    cpu->table.abi = LLMPAR_DEVICE_ABI;
    cpu->table.size = (uint32_t)sizeof(llmpar_device);
    cpu->table.name = cpu->name;
    cpu->table.error = error;
    cpu->table.state = &cpu->state;
    cpu->table.alignment = 64;
    llmpar__cpu_fill_table(&cpu->table);
    *out = &cpu->table;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_cpu_destroy(llmpar_device *device)
{
    llmpar__cpu *cpu;
    if (!device) return;
    cpu = (llmpar__cpu *)device->state;
    llmpar__pool_destroy(cpu->pool);
    llmpar_heap_free(cpu->heap, (llmpar__cpu_device *)(void *)device); /* the table is its first member */
}

#undef LLMPAR__CPU_MAX_THREADS
/* ==== src/cpu/pool.c ==== */
/* pool: a few persistent worker threads of one rank. A run is a counter that everybody takes tasks from; the caller's thread is worker 0.
   Waiting spins for some microseconds (a run is often followed by the next) and then sleeps, so more threads than cores stay polite. */

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#if defined(__linux__)
#include <sys/prctl.h>
#endif

#define LLMPAR__POOL_SPINS 200
#define LLMPAR__POOL_STACK ((size_t)2 << 20) /* musl's default of 128 KiB is too little for tiles on the stack */

typedef struct llmpar__pool_worker {
    struct llmpar__pool *pool;
    pthread_t thread;
    int32_t index;  /* 1 .. threads - 1 */
    char name[16];
} llmpar__pool_worker;

struct llmpar__pool {
    llmpar_heap *heap;
    llmpar__pool_worker *workers; /* [threads - 1]; owned */
    int32_t threads, started;
    pthread_mutex_t mutex;
    pthread_cond_t start, done;
    /* the current run: written by the caller before `generation` moves, constant until `active` is 0 again */
    void (*fn)(void *arg, int64_t task, int32_t worker);
    void *arg;
    int64_t tasks;
    /* atomic */
    int64_t next;       /* first task nobody has taken */
    uint32_t generation;
    int32_t active;     /* workers that have not finished the current run */
    int stop;
};

static void llmpar__pool_pause(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    __asm__ __volatile__("yield");
#endif
}

/* A new thread inherits the floating-point control of its creator, so a caller with flush-to-zero would change our bits. */
static void llmpar__pool_reset_float_control(void)
{
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr(0x1f80u); /* nearest even, denormals kept, exceptions masked */
#else
    uint64_t zero = 0;
    __asm__ __volatile__("msr fpcr, %0" : : "r"(zero));
#endif
}

static void llmpar__pool_get_name(char name[16])
{
    name[0] = 0;
#if defined(__linux__)
    prctl(PR_GET_NAME, name, 0, 0, 0);
#else
    pthread_getname_np(pthread_self(), name, 16);
#endif
    name[15] = 0;
}

/* "r3 tp1" and 2 give "r3 tp1 w2"; the system keeps 15 characters, so a long base is cut. */
static void llmpar__pool_name_worker(char name[16], const char base[16], int32_t index)
{
    char suffix[16];
    size_t length = strlen(base), suffix_length;
    snprintf(suffix, sizeof suffix, " w%d", (int)index);
    suffix_length = strlen(suffix);
    if (length > 15 - suffix_length) length = 15 - suffix_length;
    memcpy(name, base, length);
    memcpy(name + length, suffix, suffix_length + 1);
}

static void llmpar__pool_set_name(const char *name)
{
#if defined(__linux__)
    prctl(PR_SET_NAME, name, 0, 0, 0);
#else
    pthread_setname_np(name);
#endif
}

static void llmpar__pool_take(struct llmpar__pool *pool, int32_t worker)
{
    for (;;) {
        int64_t task = __atomic_fetch_add(&pool->next, 1, __ATOMIC_RELAXED);
        if (task >= pool->tasks) return;
        pool->fn(pool->arg, task, worker);
    }
}

static void *llmpar__pool_main(void *arg)
{
    llmpar__pool_worker *self = (llmpar__pool_worker *)arg;
    struct llmpar__pool *pool = self->pool;
    uint32_t seen = 0;
    llmpar__pool_set_name(self->name);
    llmpar__pool_reset_float_control();
    for (;;) {
        int spins = 0;
        while (__atomic_load_n(&pool->generation, __ATOMIC_ACQUIRE) == seen && spins < LLMPAR__POOL_SPINS) {
            llmpar__pool_pause();
            spins++;
        }
        if (__atomic_load_n(&pool->generation, __ATOMIC_ACQUIRE) == seen) {
            pthread_mutex_lock(&pool->mutex);
            while (__atomic_load_n(&pool->generation, __ATOMIC_ACQUIRE) == seen) pthread_cond_wait(&pool->start, &pool->mutex);
            pthread_mutex_unlock(&pool->mutex);
        }
        seen++;
        if (__atomic_load_n(&pool->stop, __ATOMIC_ACQUIRE)) return NULL;
        llmpar__pool_take(pool, self->index);
        if (__atomic_sub_fetch(&pool->active, 1, __ATOMIC_ACQ_REL) == 0) {
            pthread_mutex_lock(&pool->mutex); /* so that the caller is either before its test of `active` or asleep */
            pthread_cond_signal(&pool->done);
            pthread_mutex_unlock(&pool->mutex);
        }
    }
}

/* Everybody leaves the wait for the next generation. */
static void llmpar__pool_release(struct llmpar__pool *pool)
{
    pthread_mutex_lock(&pool->mutex);
    __atomic_add_fetch(&pool->generation, 1u, __ATOMIC_ACQ_REL);
    pthread_cond_broadcast(&pool->start);
    pthread_mutex_unlock(&pool->mutex);
}

LLMPAR__PRIVATE_DEF void llmpar__pool_destroy(struct llmpar__pool *pool)
{
    int32_t i;
    if (!pool) return;
    __atomic_store_n(&pool->stop, 1, __ATOMIC_RELEASE);
    llmpar__pool_release(pool);
    for (i = 0; i < pool->started; i++) pthread_join(pool->workers[i].thread, NULL);
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->start);
    pthread_mutex_destroy(&pool->mutex);
    llmpar_heap_free(pool->heap, pool->workers);
    llmpar_heap_free(pool->heap, pool);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__pool_create(llmpar_heap *heap, llmpar_error *error, int32_t threads, struct llmpar__pool **out)
{
    struct llmpar__pool *pool = (struct llmpar__pool *)llmpar_heap_zalloc(heap, 1, sizeof *pool);
    pthread_attr_t attributes;
    char base[16];
    int32_t i;
    int failed = 0;
    *out = NULL;
    if (!pool) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "cpu: no memory for a pool of %d threads", (int)threads);
    pool->heap = heap;
    pool->threads = threads;
    pool->workers = (llmpar__pool_worker *)llmpar_heap_zalloc(heap, (size_t)(threads - 1), sizeof *pool->workers);
    if (!pool->workers) {
        llmpar_heap_free(heap, pool);
        return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "cpu: no memory for a pool of %d threads", (int)threads);
    }
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->start, NULL);
    pthread_cond_init(&pool->done, NULL);
    llmpar__pool_get_name(base);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, LLMPAR__POOL_STACK);
    for (i = 0; i < threads - 1 && !failed; i++) {
        llmpar__pool_worker *worker = &pool->workers[i];
        worker->pool = pool;
        worker->index = i + 1;
        llmpar__pool_name_worker(worker->name, base, i + 1);
        failed = pthread_create(&worker->thread, &attributes, llmpar__pool_main, worker);
        if (!failed) pool->started++;
    }
    pthread_attr_destroy(&attributes);
    if (failed) {
        int32_t started = pool->started;
        llmpar__pool_destroy(pool);
        return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "cpu: the system refused worker thread %d of %d (error %d)", (int)(started + 1), (int)(threads - 1), failed);
    }
    *out = pool;
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF void llmpar__pool_run(llmpar__cpu *cpu, void (*fn)(void *arg, int64_t task, int32_t worker), void *arg, int64_t tasks)
{
    struct llmpar__pool *pool = cpu->pool;
    int spins = 0;
    if (!pool || tasks <= 1) {
        int64_t task;
        for (task = 0; task < tasks; task++) fn(arg, task, 0);
        return;
    }
    pool->fn = fn;
    pool->arg = arg;
    pool->tasks = tasks;
    __atomic_store_n(&pool->next, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&pool->active, pool->threads - 1, __ATOMIC_RELAXED);
    llmpar__pool_release(pool);
    llmpar__pool_take(pool, 0);
    while (__atomic_load_n(&pool->active, __ATOMIC_ACQUIRE) && spins < LLMPAR__POOL_SPINS) {
        llmpar__pool_pause();
        spins++;
    }
    if (__atomic_load_n(&pool->active, __ATOMIC_ACQUIRE)) {
        pthread_mutex_lock(&pool->mutex);
        while (__atomic_load_n(&pool->active, __ATOMIC_ACQUIRE)) pthread_cond_wait(&pool->done, &pool->mutex);
        pthread_mutex_unlock(&pool->mutex);
    }
}

LLMPAR__PRIVATE_DEF int32_t llmpar__pool_threads(const llmpar__cpu *cpu)
{
    return cpu->pool ? cpu->pool->threads : 1;
}

#undef LLMPAR__POOL_SPINS
#undef LLMPAR__POOL_STACK
/* ==== src/cpu/kernels_f64.c ==== */
/* kernels_f64: every kernel at f64, the level of finite differences. */

#define LLMPAR__VLEVEL portable_f64
#define LLMPAR__VDOUBLE 1
#define LLMPAR__ATTENTION_COLUMNS 2 /* vectors of a register tile */
#define LLMPAR__ATTENTION_LOG llmpar_log_f64
#define LLMPAR__TEMPLATE 4 /* cpu/vector_math.inc cpu/norm.inc cpu/rope.inc cpu/attention.inc cpu/attention_backward.inc cpu/swiglu.inc cpu/embedding.inc cpu/xent.inc cpu/elementwise.inc cpu/optim.inc */
#include LLMPAR_HEADER
#undef LLMPAR__VLEVEL
#undef LLMPAR__VDOUBLE
#undef LLMPAR__ATTENTION_COLUMNS
#undef LLMPAR__ATTENTION_LOG

/* ==== src/comm/threads_wait.c ==== */
/* threads_wait: how rank threads wait for each other, and every way in which such a wait ends.

   A communicator has one word: completed barriers in the upper half, ranks that have arrived in the lower half. The last rank to arrive moves the upper half on, in one step.
   A rank that gives up (another rank failed, finished, or is late) takes its arrival back, also in one step, and only while the barrier is not complete. So either all ranks pass
   a barrier or none does, and whoever passed it may touch its peers' memory until the next one: they cannot have walked away.

   A wait looks at the word a few times, gives its processor away a few times (the rank it waits for may want it: that is four times faster than sleeping), and then sleeps on the
   communicator's condition variable: there may be many more ranks than processors. Everything slow (sleeping, failing,
   the report of who is where, splits) is under one lock of the world; a barrier that completes without a sleeper takes no lock at all.

   Nobody can go on: when every rank that has not finished is asleep and none of their words has moved, nothing ever will (only ranks move them). So calls on crossed communicators are
   reported at once by all, with what each waits for, and need no deadline.

   Lockstep: the ranks hand on a turn, 0, 1, .., n-1, 0, ..; a waiting rank looks once, and if it cannot go on it passes the turn. When the turn has gone round twice and nobody got
   further, nobody ever will. */
/* ==== src/comm/threads_internal.h ==== */
/* threads_internal: what the two files of the threads communicator share: threads.c (the collectives) stands on
   threads_wait.c (who waits for whom, and how a wait ends). */
#ifndef LLMPAR_COMM_THREADS_INTERNAL_H
#define LLMPAR_COMM_THREADS_INTERNAL_H


#include <pthread.h>

#define LLMPAR__THREADS_INLINE 2048u /* bytes a rank can send inside its slot */

/* One rank's side of one call. */
typedef struct llmpar__threads_call {
    llmpar_call what;
    const void *send;
    void *recv;
} llmpar__threads_call;

/* What a rank shows to its peers. Two per rank, used in turns, so that a slot is rewritten only after every peer has come to the next call. */
typedef struct llmpar__threads_slot {
    unsigned char payload[LLMPAR__THREADS_INLINE]; /* aligned to 64 */
    llmpar__threads_call call;
    uint64_t fingerprint;
    uint64_t pad[8 - (sizeof(llmpar__threads_call) / 8 + 1) % 8];
} llmpar__threads_slot;

/* One direction between two ranks. The upper half of `phase` counts 3 steps a message: 3k empty, 3k+1 posted, 3k+2 taken, 3(k+1) done = empty. */
typedef struct llmpar__threads_channel {
    uint64_t phase;              /* atomic; upper half as above, all ones once withdrawn */
    llmpar__threads_call sender; /* written before "posted" */
    llmpar__threads_call receiver; /* written before "done" */
    int32_t mismatch;
} llmpar__threads_channel;

/* The shared half of a communicator. Owned by the world, freed when the last rank's half is destroyed. */
typedef struct llmpar__threads_group {
    struct llmpar__threads_group *next, **link; /* the world's list */
    llmpar_threads_world *world;
    int32_t ranks, references;                  /* references: under the world's lock */
    int32_t *world_rank;                        /* [ranks] */
    uint32_t *arrived;                          /* [ranks] atomic: number of each rank's latest call */
    llmpar__threads_slot *slots;                /* [2][ranks] */
    llmpar__threads_channel *channels;          /* [ranks sender][ranks receiver], atomic pointer, made by the first send or recv */
    char axis[24];
    pthread_cond_t wake;                        /* with the world's lock */
    int32_t sleepers;                           /* atomic */
    uint64_t barrier;                           /* atomic: upper half completed barriers, lower half ranks that have arrived */
} llmpar__threads_group;

/* A wait for *word to change its upper half; on its rank's stack. */
typedef struct llmpar__threads_wait {
    uint64_t *word;                    /* atomic: a group's barrier or a channel's phase */
    uint32_t high;
    uint32_t number;                   /* of the collective on its group; 0 for send and recv */
    int32_t peer;                      /* index in the group, -1: all that have not come to call `number` */
    int32_t abortable;
    llmpar__threads_group *group;
    const llmpar_call *call;
} llmpar__threads_wait;

/* What a rank shows of itself to the others; under the world's lock except `finished`. */
typedef struct llmpar__threads_rank {
    const llmpar__threads_wait *wait; /* asleep in it; NULL: it runs */
    llmpar_record *record;            /* NULL: no communicator yet, or no more; then `position` is its last one */
    llmpar_position position;
    double seen;                      /* when it last came back from a collective with an error */
    int32_t finished;                 /* atomic */
    pthread_cond_t turn;              /* lockstep: signalled when it gets the turn */
} llmpar__threads_rank;

struct llmpar_threads_world {
    llmpar_heap *heap;
    llmpar_threads_desc desc;
    pthread_mutex_t lock;
    int32_t aborted;              /* atomic */
    int32_t spins;                /* how often a wait looks before it sleeps */
    int32_t turn, idle_turns;     /* lockstep: the rank that runs; turns passed on since somebody got further */
    int32_t asleep, finished;     /* ranks with a `wait`, ranks that have finished */
    int32_t stuck;                /* the failure is that nobody could go on: every rank that waits reports it as its own */
    double failed_at;
    llmpar_error failure;         /* the root error */
    char report[1100];            /* who was where then; "" if failure.text says so itself */
    pthread_cond_t ended;         /* signalled when a rank finishes and at the failure */
    llmpar__threads_group *groups, *world_group; /* all of them; the first one, of all ranks */
    llmpar__threads_rank *rank;   /* [ranks] */
};

/* One rank's half of a communicator; llmpar_comm's `state`. Owned by the rank's heap. */
typedef struct llmpar__threads_comm {
    llmpar_comm comm; /* first: the table itself */
    llmpar_heap *heap;
    llmpar_threads_world *world;
    llmpar__threads_group *group;
    int32_t world_rank;
    uint32_t number;       /* meetings begun: the parity picks the slot */
    llmpar_record *record; /* owned by the world communicator, NULL in others */
    const void **inputs;   /* [ranks] scratch for the reductions */
} llmpar__threads_comm;

/* Waiting (threads_wait.c). */

/* A group of `ranks` members with these world ranks (copied), holding `ranks` references; NULL: out of memory. */
LLMPAR__PRIVATE llmpar__threads_group *llmpar__threads_group_create(llmpar_threads_world *world, int32_t ranks, const int32_t *world_rank, const char *axis);
LLMPAR__PRIVATE void llmpar__threads_group_release(llmpar__threads_group *group);
/* Arrives at the group's next barrier and waits until all have. abortable: the wait may end with an error (another rank failed, finished, or is late), and the arrival is then
   taken back, so that nobody can pass a barrier from which a rank has walked away. Otherwise the barrier always completes: only for peers that are known to come. */
LLMPAR__PRIVATE llmpar_status llmpar__threads_barrier(llmpar__threads_comm *tc, const llmpar_call *call, int abortable);
/* Waits until the upper half of channel->phase is no longer `step`, which the rank with index `peer` will bring about; on an error it has been set to "withdrawn". */
LLMPAR__PRIVATE llmpar_status llmpar__threads_await(llmpar__threads_comm *tc, const llmpar_call *call, llmpar__threads_channel *channel, uint32_t step, int32_t peer, int abortable);
/* Moves a channel from one step to another and wakes who waits for it; 0 if it was not at `from`. */
LLMPAR__PRIVATE int llmpar__threads_step(llmpar__threads_comm *tc, llmpar__threads_channel *channel, uint32_t from, uint32_t to);
/* LLMPAR_ERR_PEER in the rank's error if some rank has failed, else LLMPAR_OK. */
LLMPAR__PRIVATE llmpar_status llmpar__threads_check(llmpar__threads_comm *tc, const llmpar_call *call);
/* Shows the rank's record to the others; NULL: no more, its memory goes. */
LLMPAR__PRIVATE void llmpar__threads_show(llmpar_threads_world *world, int32_t rank, llmpar_record *record);
/* Makes the error of this rank (already in comm->error) the job's, if it is the first, and wakes everybody. Returns status. */
LLMPAR__PRIVATE llmpar_status llmpar__threads_failed(llmpar__threads_comm *tc, llmpar_status status);
/* Lockstep: waits for the rank's first turn. Nothing otherwise. */
LLMPAR__PRIVATE void llmpar__threads_first_turn(llmpar_threads_world *world, int32_t rank);

#endif
/* ---- src/comm/threads_wait.c goes on ---- */

#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define LLMPAR__THREADS_YIELDS 4
#define LLMPAR__THREADS_GRACE 5.0 /* seconds after a failure in which no rank is given up */

static double llmpar__threads_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void llmpar__threads_pause(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    __asm__ __volatile__("yield");
#endif
}

/* World. */

static void llmpar__threads_broadcast_all(llmpar_threads_world *world)
{
    for (llmpar__threads_group *g = world->groups; g; g = g->next) pthread_cond_broadcast(&g->wake);
}

static int llmpar__threads_cond_init(pthread_cond_t *cond)
{
    pthread_condattr_t attributes;
    if (pthread_condattr_init(&attributes)) return 0;
#if !defined(__APPLE__)
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
#endif
    int failed = pthread_cond_init(cond, &attributes);
    pthread_condattr_destroy(&attributes);
    return !failed;
}

LLMPAR_DEF llmpar_status llmpar_threads_world_create(llmpar_heap *heap, const llmpar_threads_desc *desc, llmpar_threads_world **out, llmpar_error *error)
{
    *out = NULL;
    if (desc->ranks < 1) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "threads: ranks = %d, expected at least 1", (int)desc->ranks);
    if (!(desc->deadline >= 0)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "threads: deadline = %g seconds, expected 0 (none) or more", desc->deadline);
    llmpar_threads_world *world = (llmpar_threads_world *)llmpar_heap_zalloc(heap, 1, sizeof *world);
    if (!world) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "threads: out of memory for %d ranks", (int)desc->ranks);
    world->heap = heap;
    world->desc = *desc;
    llmpar_error_clear(&world->failure);
    pthread_mutex_init(&world->lock, NULL);
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    world->spins = processors >= desc->ranks ? 30 : 4;
    world->rank = (llmpar__threads_rank *)llmpar_heap_zalloc(heap, (size_t)desc->ranks, sizeof *world->rank);
    int32_t *all = (int32_t *)llmpar_heap_alloc(heap, (size_t)desc->ranks, sizeof *all);
    if (world->rank)
        for (int32_t i = 0; i < desc->ranks; i++) llmpar__threads_cond_init(&world->rank[i].turn);
    llmpar__threads_cond_init(&world->ended);
    if (world->rank && all) {
        for (int32_t i = 0; i < desc->ranks; i++) all[i] = i;
        world->world_group = llmpar__threads_group_create(world, desc->ranks, all, "world");
    }
    llmpar_heap_free(heap, all);
    if (!world->world_group) {
        llmpar_threads_world_destroy(world);
        return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "threads: out of memory for %d ranks", (int)desc->ranks);
    }
    *out = world;
    return LLMPAR_OK;
}

static void llmpar__threads_group_free(llmpar__threads_group *group)
{
    llmpar_heap *heap = group->world->heap;
    *group->link = group->next;
    if (group->next) group->next->link = group->link;
    pthread_cond_destroy(&group->wake);
    llmpar_heap_free(heap, group->world_rank);
    llmpar_heap_free(heap, group->arrived);
    llmpar_heap_free(heap, group->slots);
    llmpar_heap_free(heap, group->channels);
    llmpar_heap_free(heap, group);
}

LLMPAR_DEF void llmpar_threads_world_destroy(llmpar_threads_world *world)
{
    if (!world) return;
    while (world->groups) llmpar__threads_group_free(world->groups);
    if (world->rank)
        for (int32_t i = 0; i < world->desc.ranks; i++) pthread_cond_destroy(&world->rank[i].turn);
    pthread_cond_destroy(&world->ended);
    pthread_mutex_destroy(&world->lock);
    llmpar_heap_free(world->heap, world->rank);
    llmpar_heap_free(world->heap, world);
}

LLMPAR_DEF void llmpar_threads_world_error(llmpar_threads_world *world, llmpar_error *out)
{
    pthread_mutex_lock(&world->lock);
    *out = world->failure;
    pthread_mutex_unlock(&world->lock);
}

/* Groups. */

LLMPAR__PRIVATE_DEF llmpar__threads_group *llmpar__threads_group_create(llmpar_threads_world *world, int32_t ranks, const int32_t *world_rank, const char *axis)
{
    pthread_mutex_lock(&world->lock);
    llmpar_heap *heap = world->heap;
    llmpar__threads_group *group = (llmpar__threads_group *)llmpar_heap_zalloc(heap, 1, sizeof *group);
    if (group) {
        group->world = world;
        group->ranks = group->references = ranks;
        group->next = world->groups;
        group->link = &world->groups;
        if (group->next) group->next->link = &group->next;
        world->groups = group;
        snprintf(group->axis, sizeof group->axis, "%.23s", axis);
        llmpar__threads_cond_init(&group->wake);
        group->world_rank = (int32_t *)llmpar_heap_alloc(heap, (size_t)ranks, sizeof *group->world_rank);
        group->arrived = (uint32_t *)llmpar_heap_zalloc(heap, (size_t)ranks, sizeof *group->arrived);
        group->slots = (llmpar__threads_slot *)llmpar_heap_zalloc(heap, 2 * (size_t)ranks, sizeof *group->slots);
        if (group->world_rank && group->arrived && group->slots) {
            memcpy(group->world_rank, world_rank, (size_t)ranks * sizeof *world_rank);
        } else {
            llmpar__threads_group_free(group);
            group = NULL;
        }
    }
    pthread_mutex_unlock(&world->lock);
    return group;
}

LLMPAR__PRIVATE_DEF void llmpar__threads_group_release(llmpar__threads_group *group)
{
    llmpar_threads_world *world = group->world;
    pthread_mutex_lock(&world->lock);
    if (--group->references == 0) llmpar__threads_group_free(group);
    pthread_mutex_unlock(&world->lock);
}

/* Failing. All of it under the lock. */

static void llmpar__threads_position(void *user, int32_t rank, llmpar_position *out)
{
    llmpar_threads_world *world = (llmpar_threads_world *)user;
    const llmpar__threads_rank *r = &world->rank[rank];
    if (r->record) llmpar_record_position(r->record, out);
    else *out = r->position;
    out->rank = rank;
    if (__atomic_load_n(&r->finished, __ATOMIC_SEQ_CST)) out->state = LLMPAR_POSITION_RETURNED;
}

/* The first failure stays. own_report: its text says who was where. */
static void llmpar__threads_fail(llmpar_threads_world *world, const llmpar_error *error, int own_report)
{
    if (world->failure.status != LLMPAR_OK) return;
    world->failure = *error;
    if (error->status == LLMPAR_OK || error->status == LLMPAR_ERR_PEER) world->failure.status = LLMPAR_ERR_INTERNAL; /* a root error is neither */
    world->failed_at = llmpar__threads_now();
    if (!own_report) llmpar_position_print(llmpar__threads_position, world, world->desc.ranks, world->report, sizeof world->report);
    __atomic_store_n(&world->aborted, 1, __ATOMIC_SEQ_CST);
    llmpar__threads_broadcast_all(world);
    pthread_cond_broadcast(&world->ended);
}

/* This rank's error because another one failed. */
static llmpar_status llmpar__threads_peer(llmpar__threads_comm *tc, const llmpar_call *call)
{
    const llmpar_threads_world *world = tc->world;
    const llmpar_error *f = &world->failure;
    char mine[256];
    llmpar_call_print(call, mine, sizeof mine);
    llmpar_error_set(tc->comm.error, LLMPAR_ERR_PEER, "%s: rank %d%s%s%s failed: %s: %.*s%s%s", mine, (int)f->rank, f->where[0] ? " (" : "", f->where, f->where[0] ? ")" : "",
                            llmpar_status_string(f->status), world->report[0] ? 500 : (int)sizeof f->text, f->text, world->report[0] ? "; " : "", world->report);
    if (tc->comm.error->rank < 0) tc->comm.error->rank = tc->world_rank;
    return LLMPAR_ERR_PEER;
}

LLMPAR_DEF void llmpar_threads_world_fail(llmpar_threads_world *world, const llmpar_error *error)
{
    pthread_mutex_lock(&world->lock);
    llmpar__threads_fail(world, error, 0);
    pthread_mutex_unlock(&world->lock);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__threads_failed(llmpar__threads_comm *tc, llmpar_status status)
{
    llmpar_threads_world *world = tc->world;
    if (tc->comm.error->rank < 0) tc->comm.error->rank = tc->world_rank;
    pthread_mutex_lock(&world->lock);
    if (status != LLMPAR_ERR_PEER) {
        llmpar_error error = *tc->comm.error;
        error.status = status;
        error.rank = tc->world_rank;
        llmpar__threads_fail(world, &error, 0);
    }
    world->rank[tc->world_rank].seen = llmpar__threads_now();
    pthread_mutex_unlock(&world->lock);
    return status;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__threads_check(llmpar__threads_comm *tc, const llmpar_call *call)
{
    if (!__atomic_load_n(&tc->world->aborted, __ATOMIC_SEQ_CST)) return LLMPAR_OK;
    pthread_mutex_lock(&tc->world->lock);
    llmpar_status status = llmpar__threads_peer(tc, call);
    pthread_mutex_unlock(&tc->world->lock);
    return status;
}

/* The general wait. */

typedef enum llmpar__threads_outcome { LLMPAR__THREADS_READY, LLMPAR__THREADS_ABORTED, LLMPAR__THREADS_GONE, LLMPAR__THREADS_LATE, LLMPAR__THREADS_STUCK } llmpar__threads_outcome;

static int llmpar__threads_ready(const llmpar__threads_wait *wait)
{
    return (uint32_t)(__atomic_load_n(wait->word, __ATOMIC_SEQ_CST) >> 32) != wait->high;
}

/* A peer that returned from its function without coming to this call, or -1. */
static int32_t llmpar__threads_gone(const llmpar__threads_comm *tc, const llmpar__threads_wait *wait)
{
    const llmpar__threads_group *group = wait->group;
    for (int32_t i = 0; i < group->ranks; i++) {
        if (wait->peer >= 0 && i != wait->peer) continue;
        if (!__atomic_load_n(&tc->world->rank[group->world_rank[i]].finished, __ATOMIC_SEQ_CST)) continue;
        /* It finished: whether it came to this call before is settled now. */
        if (wait->peer >= 0 ? !llmpar__threads_ready(wait) : (int32_t)(wait->number - __atomic_load_n(&group->arrived[i], __ATOMIC_SEQ_CST)) > 0) return i;
    }
    return -1;
}

/* Under the lock: nobody runs who could move the word of anybody. Then all say so. */
static int llmpar__threads_is_stuck(llmpar_threads_world *world)
{
    if (world->stuck) return 1;
    if (world->asleep + world->finished < world->desc.ranks) return 0;
    for (int32_t i = 0; i < world->desc.ranks; i++) {
        const llmpar__threads_wait *wait = world->rank[i].wait;
        if (wait && (!wait->abortable || llmpar__threads_ready(wait))) return 0;
    }
    return 1;
}

/* Takes this rank's arrival or message back; 0 if the word has moved on after all. Under the lock, so that nothing changes between this and the report. */
static int llmpar__threads_withdraw(const llmpar__threads_wait *wait)
{
    uint64_t old = __atomic_load_n(wait->word, __ATOMIC_SEQ_CST);
    while ((uint32_t)(old >> 32) == wait->high) {
        uint64_t next = wait->peer < 0 ? old - 1 : (uint64_t)0xffffffffu << 32;
        if (!__atomic_compare_exchange_n(wait->word, &old, next, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) continue;
        if (wait->peer >= 0) pthread_cond_broadcast(&wait->group->wake);
        return 1;
    }
    return 0;
}

/* Hands the turn to the next rank that still runs. Under the lock. */
static void llmpar__threads_pass_turn(llmpar_threads_world *world)
{
    for (int32_t i = 0; i < world->desc.ranks; i++) {
        world->turn = world->turn + 1 == world->desc.ranks ? 0 : world->turn + 1;
        if (!__atomic_load_n(&world->rank[world->turn].finished, __ATOMIC_SEQ_CST)) break;
    }
    pthread_cond_signal(&world->rank[world->turn].turn);
}

static void llmpar__threads_take_turn(llmpar_threads_world *world, int32_t rank)
{
    while (world->turn != rank) pthread_cond_wait(&world->rank[rank].turn, &world->lock);
}

/* Under the lock, one look a turn. */
static llmpar__threads_outcome llmpar__threads_wait_lockstep(llmpar__threads_comm *tc, const llmpar__threads_wait *wait)
{
    llmpar_threads_world *world = tc->world;
    for (;;) {
        if (llmpar__threads_ready(wait)) {
            world->idle_turns = 0;
            return LLMPAR__THREADS_READY;
        }
        if (wait->abortable) {
            if (__atomic_load_n(&world->aborted, __ATOMIC_SEQ_CST)) return world->stuck ? LLMPAR__THREADS_STUCK : LLMPAR__THREADS_ABORTED;
            if (llmpar__threads_gone(tc, wait) >= 0) return LLMPAR__THREADS_GONE;
            if (world->idle_turns > 2 * world->desc.ranks) return LLMPAR__THREADS_STUCK;
        }
        world->idle_turns++;
        llmpar__threads_pass_turn(world);
        llmpar__threads_take_turn(world, tc->world_rank);
    }
}

/* Under the lock: until `cond` is signalled, or until llmpar__threads_now() is `limit` (0: for ever), or for nothing. */
static void llmpar__threads_sleep(llmpar_threads_world *world, pthread_cond_t *cond, double limit)
{
    struct timespec until;
    if (!(limit > 0)) {
        pthread_cond_wait(cond, &world->lock);
        return;
    }
#if defined(__APPLE__)
    clock_gettime(CLOCK_REALTIME, &until);
#else
    clock_gettime(CLOCK_MONOTONIC, &until);
#endif
    double rest = limit - llmpar__threads_now();
    if (rest < 0) rest = 0;
    if (rest > 3600) rest = 3600; /* wakes up once an hour for nothing: no overflow of time_t */
    long nanoseconds = until.tv_nsec + (long)((rest - (double)(long)rest) * 1e9);
    until.tv_sec += (time_t)rest + nanoseconds / 1000000000;
    until.tv_nsec = nanoseconds % 1000000000;
    pthread_cond_timedwait(cond, &world->lock, &until);
}

/* Under the lock. */
static llmpar__threads_outcome llmpar__threads_wait_asleep(llmpar__threads_comm *tc, const llmpar__threads_wait *wait)
{
    llmpar_threads_world *world = tc->world;
    llmpar__threads_group *group = tc->group;
    double limit = wait->abortable && world->desc.deadline > 0 ? llmpar__threads_now() + world->desc.deadline : 0;
    for (;;) {
        if (llmpar__threads_ready(wait)) return LLMPAR__THREADS_READY;
        if (wait->abortable) {
            if (__atomic_load_n(&world->aborted, __ATOMIC_SEQ_CST)) return world->stuck ? LLMPAR__THREADS_STUCK : LLMPAR__THREADS_ABORTED;
            if (llmpar__threads_gone(tc, wait) >= 0) return LLMPAR__THREADS_GONE;
            if (llmpar__threads_is_stuck(world)) return LLMPAR__THREADS_STUCK;
            if (limit > 0 && llmpar__threads_now() >= limit) return LLMPAR__THREADS_LATE;
        }
        llmpar__threads_sleep(world, &group->wake, limit);
    }
}

/* What this rank reports when its wait did not end well; everybody is held in place by the lock. */
static llmpar_status llmpar__threads_report(llmpar__threads_comm *tc, const llmpar__threads_wait *wait, llmpar__threads_outcome outcome, int32_t gone)
{
    llmpar_threads_world *world = tc->world;
    llmpar_status status = outcome == LLMPAR__THREADS_LATE ? LLMPAR_ERR_TIMEOUT : LLMPAR_ERR_MISMATCH;
    world->rank[tc->world_rank].seen = llmpar__threads_now();
    if (outcome == LLMPAR__THREADS_ABORTED) return llmpar__threads_peer(tc, wait->call);
    char what[256], why[64], *who = world->report;
    llmpar_call_print(wait->call, what, sizeof what);
    if (gone >= 0) snprintf(why, sizeof why, "rank %d has returned without it", (int)wait->group->world_rank[gone]);
    else if (outcome == LLMPAR__THREADS_STUCK) snprintf(why, sizeof why, "nobody can go on");
    else snprintf(why, sizeof why, "waited %g s for the other ranks", world->desc.deadline);
    if (world->failure.status == LLMPAR_OK) llmpar_position_print(llmpar__threads_position, world, world->desc.ranks, who, sizeof world->report);
    llmpar_error_set(tc->comm.error, status, "%s: %s (%s)", what, why, who);
    if (tc->comm.error->rank < 0) tc->comm.error->rank = tc->world_rank;
    if (world->failure.status != LLMPAR_OK) return status;
    llmpar_error error = *tc->comm.error;
    error.status = status;
    error.rank = tc->world_rank;
    if (outcome == LLMPAR__THREADS_STUCK) world->stuck = 1; /* the report stays for the others */
    else who[0] = 0;
    llmpar__threads_fail(world, &error, 1);
    return status;
}

/* Waits. After an error the rank's arrival or message has been taken back. */
static llmpar_status llmpar__threads_wait_for(llmpar__threads_comm *tc, const llmpar__threads_wait *wait)
{
    llmpar_threads_world *world = tc->world;
    llmpar__threads_group *group = wait->group;
    if (!world->desc.lockstep)
        for (int32_t i = 0; i < world->spins + LLMPAR__THREADS_YIELDS; i++) {
            if (llmpar__threads_ready(wait)) return LLMPAR_OK;
            if (i < world->spins) llmpar__threads_pause();
            else sched_yield();
        }
    pthread_mutex_lock(&world->lock);
    llmpar__threads_rank *self = &world->rank[tc->world_rank];
    self->wait = wait;
    world->asleep++;
    __atomic_add_fetch(&group->sleepers, 1, __ATOMIC_SEQ_CST);
    llmpar__threads_outcome outcome = world->desc.lockstep ? llmpar__threads_wait_lockstep(tc, wait) : llmpar__threads_wait_asleep(tc, wait);
    __atomic_sub_fetch(&group->sleepers, 1, __ATOMIC_SEQ_CST);
    int32_t gone = outcome == LLMPAR__THREADS_GONE ? llmpar__threads_gone(tc, wait) : -1;
    llmpar_status status = outcome != LLMPAR__THREADS_READY && llmpar__threads_withdraw(wait) ? llmpar__threads_report(tc, wait, outcome, gone) : LLMPAR_OK;
    world->asleep--;
    self->wait = NULL;
    pthread_mutex_unlock(&world->lock);
    return status;
}

/* Wakes whoever sleeps on the group's words, after one of them was changed. */
static void llmpar__threads_wake(llmpar__threads_group *group)
{
    if (!__atomic_load_n(&group->sleepers, __ATOMIC_SEQ_CST)) return;
    pthread_mutex_lock(&group->world->lock);
    pthread_cond_broadcast(&group->wake);
    pthread_mutex_unlock(&group->world->lock);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__threads_barrier(llmpar__threads_comm *tc, const llmpar_call *call, int abortable)
{
    llmpar__threads_group *group = tc->group;
    uint64_t old = __atomic_load_n(&group->barrier, __ATOMIC_SEQ_CST);
    for (;;) {
        int last = (uint32_t)old + 1 == (uint32_t)group->ranks;
        uint64_t next = last ? ((old >> 32) + 1) << 32 : old + 1;
        if (!__atomic_compare_exchange_n(&group->barrier, &old, next, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) continue;
        if (!last) break;
        llmpar__threads_wake(group);
        return LLMPAR_OK;
    }
    llmpar__threads_wait wait;
    wait.word = &group->barrier;
    wait.high = (uint32_t)(old >> 32);
    wait.number = tc->number;
    wait.peer = -1;
    wait.abortable = abortable;
    wait.group = group;
    wait.call = call;
    return llmpar__threads_wait_for(tc, &wait);
}

LLMPAR__PRIVATE_DEF int llmpar__threads_step(llmpar__threads_comm *tc, llmpar__threads_channel *channel, uint32_t from, uint32_t to)
{
    uint64_t old = (uint64_t)from << 32;
    if (!__atomic_compare_exchange_n(&channel->phase, &old, (uint64_t)to << 32, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) return 0;
    llmpar__threads_wake(tc->group);
    return 1;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__threads_await(llmpar__threads_comm *tc, const llmpar_call *call, llmpar__threads_channel *channel, uint32_t step, int32_t peer, int abortable)
{
    llmpar__threads_wait wait;
    wait.word = &channel->phase;
    wait.high = step;
    wait.number = 0;
    wait.peer = peer;
    wait.abortable = abortable;
    wait.group = tc->group;
    wait.call = call;
    return llmpar__threads_wait_for(tc, &wait);
}

/* The rank's life. */

LLMPAR__PRIVATE_DEF void llmpar__threads_first_turn(llmpar_threads_world *world, int32_t rank)
{
    if (!world->desc.lockstep) return;
    pthread_mutex_lock(&world->lock);
    llmpar__threads_take_turn(world, rank);
    world->idle_turns = 0;
    pthread_mutex_unlock(&world->lock);
}

LLMPAR_DEF void llmpar_threads_rank_finished(llmpar_threads_world *world, int32_t rank)
{
    pthread_mutex_lock(&world->lock);
    if (!world->rank[rank].finished) world->finished++;
    __atomic_store_n(&world->rank[rank].finished, 1, __ATOMIC_SEQ_CST);
    world->idle_turns = 0;
    pthread_cond_broadcast(&world->ended);
    if (world->desc.lockstep && world->turn == rank) llmpar__threads_pass_turn(world);
    llmpar__threads_broadcast_all(world);
    pthread_mutex_unlock(&world->lock);
}

LLMPAR__PRIVATE_DEF void llmpar__threads_show(llmpar_threads_world *world, int32_t rank, llmpar_record *record)
{
    llmpar__threads_rank *r = &world->rank[rank];
    pthread_mutex_lock(&world->lock);
    if (r->record && !record) llmpar_record_position(r->record, &r->position);
    r->record = record;
    pthread_mutex_unlock(&world->lock);
}

LLMPAR_DEF size_t llmpar_threads_rank_json(llmpar_threads_world *world, int32_t rank, char *text, size_t capacity)
{
    if (capacity) text[0] = 0;
    pthread_mutex_lock(&world->lock); /* which the rank needs to take its record away */
    llmpar_record *record = world->rank[rank].record;
    size_t bytes = record ? llmpar_record_json(record, text, capacity) : 0;
    pthread_mutex_unlock(&world->lock);
    return bytes;
}

/* When the rank last gave a sign of life. Its record has the time of day: taken as an age. */
static double llmpar__threads_seen(llmpar_threads_world *world, int32_t rank)
{
    struct timespec t;
    llmpar_position p;
    clock_gettime(CLOCK_REALTIME, &t);
    llmpar__threads_position(world, rank, &p);
    double age = (double)t.tv_sec - 1e-9 * (double)p.time_ns + 1e-9 * (double)t.tv_nsec, now = llmpar__threads_now();
    double seen = p.time_ns && age > 0 ? now - age : now;
    return seen > world->rank[rank].seen ? seen : world->rank[rank].seen;
}

LLMPAR_DEF int llmpar_threads_rank_wait(llmpar_threads_world *world, int32_t rank)
{
    int finished;
    pthread_mutex_lock(&world->lock);
    while (!(finished = __atomic_load_n(&world->rank[rank].finished, __ATOMIC_SEQ_CST))) {
        double limit = 0;
        if (__atomic_load_n(&world->aborted, __ATOMIC_SEQ_CST) && world->desc.deadline > 0 && !world->desc.lockstep) {
            double seen = llmpar__threads_seen(world, rank) + world->desc.deadline;
            limit = world->failed_at + LLMPAR__THREADS_GRACE;
            if (seen > limit) limit = seen;
            if (llmpar__threads_now() >= limit) break;
        }
        llmpar__threads_sleep(world, &world->ended, limit);
    }
    pthread_mutex_unlock(&world->lock);
    return finished;
}

#undef LLMPAR__THREADS_YIELDS
#undef LLMPAR__THREADS_GRACE
/* ==== src/comm/threads.c ==== */
/* threads: collectives between the rank threads of one process.

   A collective, on every rank (n ranks, this one is r):
     publish   what I am about to do, and where my buffers are, in my slot of the communicator
     barrier   from here on all slots are complete; compare them: all ranks do the same thing, or all report both sides and nothing has moved
     work      read the peers' buffers directly; nobody leaves the collective meanwhile, so they stay where they are
     barrier   buffers belong to their owners again
   Up to LLMPAR__THREADS_INLINE bytes travel inside the slot: then the second barrier is not needed, because a rank has two slots and uses them in turns.

   All-reduce: rank r alone reads slice r of all inputs, and writes its sum to slice r of everybody's output. So in place (recv == send) is safe: what is overwritten
   was read by nobody else. The slice is done in pieces that stay in the cache between the sum and the copies.
       send 0  |s0|s1|s2|s3|     rank 2 reads s2 of all,  recv 0 |  |  |S2|  |
       send 1  |s0|s1|s2|s3|  -> S2 = (s2+s2)+(s2+s2)  -> recv 1 |  |  |S2|  |
       ..                        and writes it to all     ..

   Order of sums: element by element, the device's tree_sum over the contributions in rank order. That is the whole contract; slices and pieces cut elements, never sums.

   Device and streams: the whole collective is one host call on the stream (device->host_call), so it takes its place among the stream's operations on a device
   that runs late as well as on one that runs inside the call, as the CPU does. Inside the host function the arithmetic and the large copies are the device's tree_sum, max and copy with stream NULL,
   which for every device that this communicator is used with means: now, on this thread, done on return. Its memory must be readable by all rank threads. A device that runs late must run its host
   calls in the order in which they were issued. send and recv wait for each other: a send is complete when its data has been taken. split waits on the host and belongs to no stream. */

#include <stdio.h>
#include <string.h>

#define LLMPAR__THREADS_PIECE 32768u /* bytes of a slice that are summed and passed on at a time */

/* The argument of the host call. */
typedef struct llmpar__threads_job {
    llmpar__threads_comm *tc;
    llmpar__threads_call call;
} llmpar__threads_job;

static size_t llmpar__threads_min(size_t a, size_t b) { return a < b ? a : b; }

static llmpar_status llmpar__threads_mismatch(llmpar__threads_comm *tc, const llmpar_call *a, const llmpar_call *b)
{
    char text[700];
    int swapped = a->rank > b->rank;
    llmpar_call_mismatch(swapped ? b : a, swapped ? a : b, text, sizeof text);
    return llmpar__threads_failed(tc, llmpar_error_set(tc->comm.error, LLMPAR_ERR_MISMATCH, "%s", text));
}

/* Publishes this rank's call and payload, waits for all others, and compares. *slots is then the array of all ranks' slots, valid until the next-but-one call.
   The payload (bytes may be 0) must fit the slot. */
static llmpar_status llmpar__threads_meet(llmpar__threads_comm *tc, const llmpar__threads_call *call, const void *payload, size_t bytes, llmpar__threads_slot **slots)
{
    llmpar__threads_group *group = tc->group;
    int32_t rank = tc->comm.rank;
    llmpar_status st = llmpar__threads_check(tc, &call->what);
    if (st) return llmpar__threads_failed(tc, st);
    uint32_t number = ++tc->number;
    llmpar__threads_slot *all = group->slots + (number & 1) * (size_t)group->ranks;
    all[rank].call = *call;
    all[rank].fingerprint = tc->comm.unchecked ? 0 : llmpar_call_fingerprint(&call->what);
    if (bytes) memcpy(all[rank].payload, payload, bytes);
    __atomic_store_n(&group->arrived[rank], number, __ATOMIC_SEQ_CST);
    st = llmpar__threads_barrier(tc, &all[rank].call.what, 1);
    if (st) return st;
    for (int32_t i = 1; i < group->ranks; i++)
        if (all[0].fingerprint != all[i].fingerprint) return llmpar__threads_mismatch(tc, &all[0].call.what, &all[i].call.what);
    *slots = all;
    return LLMPAR_OK;
}

/* out[count] = sum or max over the ranks of tc->inputs, in tree order. */
static llmpar_status llmpar__threads_reduce(llmpar__threads_comm *tc, const llmpar__threads_call *call, size_t count, void *out)
{
    llmpar_device *device = tc->comm.device;
    llmpar_tree_sum_args args;
    memset(&args, 0, sizeof args);
    args.in = tc->inputs;
    args.n = tc->comm.ranks;
    args.count = count;
    args.out = out;
    args.dtype = (llmpar_dtype)call->what.dtype;
    return call->what.reduce == LLMPAR_MAX ? device->max(device, NULL, &args) : device->tree_sum(device, NULL, &args);
}

static llmpar_status llmpar__threads_copy(llmpar__threads_comm *tc, void *out, const void *in, size_t bytes)
{
    if (!bytes || out == in) return LLMPAR_OK;
    return tc->comm.device->copy(tc->comm.device, NULL, out, in, bytes);
}

/* The data of rank i: in its slot, or where its send pointer says. */
static const char *llmpar__threads_source(const llmpar__threads_slot *slots, int32_t i, int in_slot)
{
    return in_slot ? (const char *)slots[i].payload : (const char *)slots[i].call.send;
}

/* All-reduce of large buffers: my slice of all, to all. */
static llmpar_status llmpar__threads_slice(llmpar__threads_comm *tc, const llmpar__threads_call *call, const llmpar__threads_slot *slots)
{
    size_t item = llmpar_dtype_size((llmpar_dtype)call->what.dtype), total = call->what.count * call->what.blocks, n = (size_t)tc->comm.ranks, r = (size_t)tc->comm.rank;
    size_t grain = 256 / item, grains = (total + grain - 1) / grain; /* slices begin at whole cache lines of aligned buffers */
    size_t begin = llmpar__threads_min(total, grains / n * r * grain + llmpar__threads_min(r, grains % n) * grain);
    size_t end = llmpar__threads_min(total, grains / n * (r + 1) * grain + llmpar__threads_min(r + 1, grains % n) * grain);
    llmpar_status st = LLMPAR_OK;
    for (size_t at = begin; at < end && !st; at += LLMPAR__THREADS_PIECE / item) {
        size_t count = llmpar__threads_min(LLMPAR__THREADS_PIECE / item, end - at);
        char *mine = (char *)call->recv + at * item;
        for (size_t i = 0; i < n; i++) tc->inputs[i] = (const char *)slots[i].call.send + at * item;
        st = llmpar__threads_reduce(tc, call, count, mine);
        for (size_t i = 0; i < n && !st; i++)
            if (i != r) st = llmpar__threads_copy(tc, (char *)slots[i].call.recv + at * item, mine, count * item);
    }
    return st;
}

/* What this rank does between the barriers. part = bytes of one rank's part of one block. */
static llmpar_status llmpar__threads_work(llmpar__threads_comm *tc, const llmpar__threads_call *call, const llmpar__threads_slot *slots, int in_slot)
{
    size_t part = call->what.count * llmpar_dtype_size((llmpar_dtype)call->what.dtype), n = (size_t)tc->comm.ranks, r = (size_t)tc->comm.rank;
    char *recv = (char *)call->recv;
    llmpar_status st = LLMPAR_OK;
    if (!part) return LLMPAR_OK;
    switch (call->what.op) {
    case LLMPAR_CALL_ALL_REDUCE:
        if (!in_slot) return llmpar__threads_slice(tc, call, slots);
        for (size_t i = 0; i < n; i++) tc->inputs[i] = slots[i].payload;
        return llmpar__threads_reduce(tc, call, call->what.count * call->what.blocks, recv);
    case LLMPAR_CALL_REDUCE_SCATTER:
        for (size_t b = 0; b < call->what.blocks && !st; b++) {
            for (size_t i = 0; i < n; i++) tc->inputs[i] = llmpar__threads_source(slots, (int32_t)i, in_slot) + (b * n + r) * part;
            st = llmpar__threads_reduce(tc, call, call->what.count, recv + b * part);
        }
        return st;
    case LLMPAR_CALL_ALL_GATHER:
        for (size_t k = 0; k < n; k++) { /* each rank begins with its own: not all at the same peer */
            size_t i = (r + k) % n;
            const char *from = llmpar__threads_source(slots, (int32_t)i, in_slot);
            for (size_t b = 0; b < call->what.blocks && !st; b++) {
                char *to = recv + (b * n + i) * part;
                if (i != r || to != (const char *)call->send + b * part) st = llmpar__threads_copy(tc, to, from + b * part, part);
            }
        }
        return st;
    case LLMPAR_CALL_BROADCAST:
        if (!recv || recv == call->send) return LLMPAR_OK;
        return llmpar__threads_copy(tc, recv, llmpar__threads_source(slots, call->what.root, in_slot), part * call->what.blocks);
    case LLMPAR_CALL_ALL_TO_ALL:
        for (size_t k = 0; k < n; k++) {
            size_t i = (r + k) % n;
            const char *from = llmpar__threads_source(slots, (int32_t)i, in_slot);
            for (size_t b = 0; b < call->what.blocks && !st; b++) st = llmpar__threads_copy(tc, recv + (b * n + i) * part, from + (b * n + r) * part, part);
        }
        return st;
    default: return LLMPAR_OK;
    }
}

/* The other end has failed and taken its side back: it held the lock until the failure was there for all to see. */
static llmpar_status llmpar__threads_withdrawn(llmpar__threads_comm *tc, const llmpar_call *call)
{
    pthread_mutex_lock(&tc->world->lock);
    pthread_mutex_unlock(&tc->world->lock);
    return llmpar__threads_failed(tc, llmpar__threads_check(tc, call));
}

/* One direction between two ranks; see the phases at llmpar__threads_channel. Runs as a host call. */
static llmpar_status llmpar__threads_point(llmpar__threads_comm *tc, const llmpar__threads_call *call)
{
    llmpar__threads_group *group = tc->group;
    size_t n = (size_t)group->ranks, me = (size_t)tc->comm.rank, peer = (size_t)call->what.peer;
    llmpar_status st = llmpar__threads_check(tc, &call->what);
    if (st) return llmpar__threads_failed(tc, st);
    llmpar__threads_channel *channels = __atomic_load_n(&group->channels, __ATOMIC_SEQ_CST);
    if (!channels) {
        pthread_mutex_lock(&tc->world->lock);
        channels = group->channels;
        if (!channels) channels = (llmpar__threads_channel *)llmpar_heap_zalloc(tc->world->heap, n * n, sizeof *channels);
        __atomic_store_n(&group->channels, channels, __ATOMIC_SEQ_CST);
        pthread_mutex_unlock(&tc->world->lock);
        if (!channels) return llmpar__threads_failed(tc, llmpar_error_set(tc->comm.error, LLMPAR_ERR_MEMORY, "%s \"%s\": out of memory for the channels of %d ranks", llmpar_call_op_name((llmpar_call_op)call->what.op), call->what.tag, (int)n));
    }
    int sends = call->what.op == LLMPAR_CALL_SEND;
    llmpar__threads_channel *channel = &channels[sends ? me * n + peer : peer * n + me];
    uint32_t step = (uint32_t)(__atomic_load_n(&channel->phase, __ATOMIC_SEQ_CST) >> 32) / 3 * 3; /* "empty" of this message */
    if (sends) {
        channel->sender = *call;
        channel->mismatch = 0;
        llmpar__threads_step(tc, channel, step, step + 1);
        st = llmpar__threads_await(tc, &call->what, channel, step + 1, call->what.peer, 1);
        if (!st && (uint32_t)(__atomic_load_n(&channel->phase, __ATOMIC_SEQ_CST) >> 32) == 0xffffffffu) return llmpar__threads_withdrawn(tc, &call->what);
        if (!st && (uint32_t)(__atomic_load_n(&channel->phase, __ATOMIC_SEQ_CST) >> 32) == step + 2) st = llmpar__threads_await(tc, &call->what, channel, step + 2, call->what.peer, 0);
    } else {
        st = llmpar__threads_await(tc, &call->what, channel, step, call->what.peer, 1);
        if (!st && !llmpar__threads_step(tc, channel, step + 1, step + 2)) return llmpar__threads_withdrawn(tc, &call->what);
        if (!st) {
            const llmpar__threads_call *from = &channel->sender;
            channel->receiver = *call;
            channel->mismatch = !tc->comm.unchecked && llmpar_call_fingerprint(&from->what) != llmpar_call_fingerprint(&call->what);
            llmpar_status copied = channel->mismatch ? LLMPAR_OK : llmpar__threads_copy(tc, call->recv, from->send, call->what.count * call->what.blocks * llmpar_dtype_size((llmpar_dtype)call->what.dtype));
            int mismatch = channel->mismatch;
            llmpar__threads_call other = *from;
            llmpar__threads_step(tc, channel, step + 2, step + 3 == 0xffffffffu ? 0 : step + 3); /* that number means "withdrawn" */
            if (copied) return llmpar__threads_failed(tc, copied);
            if (mismatch) return llmpar__threads_mismatch(tc, &other.what, &call->what);
        }
    }
    if (st) return st;
    if (sends && channel->mismatch) return llmpar__threads_mismatch(tc, &call->what, &channel->receiver.what);
    return LLMPAR_OK;
}

/* The host function of every collective. */
static llmpar_status llmpar__threads_run(void *arg)
{
    llmpar__threads_job *job = (llmpar__threads_job *)arg;
    llmpar__threads_comm *tc = job->tc;
    llmpar__threads_call *call = &job->call;
    if (call->what.op == LLMPAR_CALL_SEND || call->what.op == LLMPAR_CALL_RECV) return llmpar__threads_point(tc, call);
    /* A barrier has count 0. */
    size_t bytes = call->what.count * call->what.blocks * llmpar_dtype_size((llmpar_dtype)call->what.dtype);
    if (call->what.op == LLMPAR_CALL_REDUCE_SCATTER || call->what.op == LLMPAR_CALL_ALL_TO_ALL) bytes *= (size_t)tc->comm.ranks;
    int in_slot = bytes <= LLMPAR__THREADS_INLINE;
    size_t payload = in_slot && !(call->what.op == LLMPAR_CALL_BROADCAST && call->what.root != tc->comm.rank) ? bytes : 0;
    llmpar__threads_slot *slots = NULL;
    llmpar_status st = llmpar__threads_meet(tc, call, call->send, payload, &slots);
    if (st) return st;
    st = llmpar__threads_work(tc, call, slots, in_slot);
    if (!in_slot) llmpar__threads_barrier(tc, &call->what, 0); /* always: peers may still read my buffers, whatever became of my own work */
    return st ? llmpar__threads_failed(tc, st) : LLMPAR_OK;
}

static llmpar_status llmpar__threads_enqueue(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *given, llmpar_call_op op)
{
    llmpar__threads_job job;
    memset(&job, 0, sizeof job);
    job.tc = (llmpar__threads_comm *)comm->state;
    llmpar_call_describe(comm, op, given, &job.call.what);
    if (job.call.what.rank < 0) job.call.what.rank = job.tc->world_rank;
    job.call.send = given->send;
    job.call.recv = given->recv;
    return comm->device->host_call(comm->device, stream, llmpar__threads_run, &job, sizeof job);
}

static llmpar_status llmpar__threads_all_gather(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return llmpar__threads_enqueue(comm, stream, call, LLMPAR_CALL_ALL_GATHER); }
static llmpar_status llmpar__threads_reduce_scatter(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return llmpar__threads_enqueue(comm, stream, call, LLMPAR_CALL_REDUCE_SCATTER); }
static llmpar_status llmpar__threads_all_reduce(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return llmpar__threads_enqueue(comm, stream, call, LLMPAR_CALL_ALL_REDUCE); }
static llmpar_status llmpar__threads_broadcast(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return llmpar__threads_enqueue(comm, stream, call, LLMPAR_CALL_BROADCAST); }
static llmpar_status llmpar__threads_all_to_all(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return llmpar__threads_enqueue(comm, stream, call, LLMPAR_CALL_ALL_TO_ALL); }
static llmpar_status llmpar__threads_send(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return llmpar__threads_enqueue(comm, stream, call, LLMPAR_CALL_SEND); }
static llmpar_status llmpar__threads_recv(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return llmpar__threads_enqueue(comm, stream, call, LLMPAR_CALL_RECV); }
static llmpar_status llmpar__threads_meet_all(llmpar_comm *comm, llmpar_stream *stream, const char *tag)
{
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.tag = tag;
    return llmpar__threads_enqueue(comm, stream, &call, LLMPAR_CALL_BARRIER);
}

static void llmpar__threads_abort(llmpar_comm *comm, const llmpar_error *error)
{
    llmpar__threads_comm *tc = (llmpar__threads_comm *)comm->state;
    llmpar_error mine = *error;
    if (mine.rank < 0) mine.rank = tc->world_rank;
    llmpar_threads_world_fail(tc->world, &mine);
}

static void llmpar__threads_destroy(llmpar_comm *comm)
{
    llmpar__threads_comm *tc = (llmpar__threads_comm *)comm->state;
    llmpar_heap *heap = tc->heap;
    if (tc->record) llmpar__threads_show(tc->world, tc->world_rank, NULL);
    llmpar__threads_group_release(tc->group);
    llmpar_record_destroy(tc->record);
    llmpar_heap_free(heap, tc->inputs);
    llmpar_heap_free(heap, tc);
}

static llmpar_status llmpar__threads_split(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out);

/* This rank's half of `group`. On failure the reference to the group is given back. */
static llmpar_status llmpar__threads_half(llmpar__threads_group *group, int32_t rank, llmpar_record *record, llmpar_heap *heap, llmpar_device *device, llmpar_error *error, llmpar_comm **out)
{
    llmpar__threads_comm *tc = (llmpar__threads_comm *)llmpar_heap_zalloc(heap, 1, sizeof *tc);
    const void **inputs = (const void **)llmpar_heap_alloc(heap, (size_t)group->ranks, sizeof *inputs);
    if (tc) {
        tc->comm.axis = group->axis;
        tc->comm.ranks = group->ranks;
    }
    if (!tc || !inputs || (group->ranks > 1 && llmpar_record_attach(record, &tc->comm, group->world_rank))) {
        llmpar_error_set(error, LLMPAR_ERR_MEMORY, "communicator %s: out of memory", group->axis);
        llmpar_heap_free(heap, tc);
        llmpar_heap_free(heap, inputs);
        llmpar__threads_group_release(group);
        return LLMPAR_ERR_MEMORY;
    }
    tc->heap = heap;
    tc->world = group->world;
    tc->group = group;
    tc->world_rank = group->world_rank[rank];
    tc->inputs = inputs;
    llmpar_comm *comm = &tc->comm;
    comm->abi = LLMPAR_COMM_ABI;
    comm->size = (uint32_t)sizeof *comm;
    comm->rank = rank;
    comm->unchecked = tc->world->desc.unchecked;
    comm->device = device;
    comm->error = error;
    comm->state = tc;
    comm->split = llmpar__threads_split;
    comm->destroy = llmpar__threads_destroy;
    comm->barrier = llmpar__threads_meet_all;
    comm->all_gather = llmpar__threads_all_gather;
    comm->reduce_scatter = llmpar__threads_reduce_scatter;
    comm->all_reduce = llmpar__threads_all_reduce;
    comm->broadcast = llmpar__threads_broadcast;
    comm->all_to_all = llmpar__threads_all_to_all;
    comm->send = llmpar__threads_send;
    comm->recv = llmpar__threads_recv;
    comm->abort = llmpar__threads_abort;
    *out = comm;
    return LLMPAR_OK;
}

/* The ranks show (color, key); the first of each color makes the group and shows it; the others of that color take it. */
static llmpar_status llmpar__threads_split(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out)
{
    llmpar__threads_comm *tc = (llmpar__threads_comm *)comm->state;
    *out = NULL;
    llmpar__threads_call call;
    llmpar_collective given;
    memset(&call, 0, sizeof call);
    memset(&given, 0, sizeof given);
    given.tag = name;
    llmpar_call_describe(comm, LLMPAR_CALL_SPLIT, &given, &call.what);
    if (call.what.rank < 0) call.what.rank = tc->world_rank;
    int32_t mine[2], theirs[2], n = comm->ranks, rank = 0, ranks = 0, leader = -1, leader_key = 0;
    mine[0] = color;
    mine[1] = key;
    llmpar__threads_slot *slots = NULL;
    llmpar_status st = llmpar__threads_meet(tc, &call, mine, sizeof mine, &slots);
    if (st) return st;
    for (int32_t i = 0; i < n && color >= 0; i++) {
        memcpy(theirs, slots[i].payload, sizeof theirs);
        if (theirs[0] != color) continue;
        ranks++;
        if (theirs[1] < key || (theirs[1] == key && i < comm->rank)) rank++;
        if (leader < 0 || theirs[1] < leader_key) {
            leader = i;
            leader_key = theirs[1];
        }
    }
    llmpar__threads_group *group = NULL;
    if (leader == comm->rank) {
        int32_t *members = (int32_t *)llmpar_heap_alloc(tc->heap, (size_t)ranks, sizeof *members);
        if (members) {
            for (int32_t i = 0; i < n; i++) {
                int32_t place = 0, other[2];
                memcpy(theirs, slots[i].payload, sizeof theirs);
                if (theirs[0] != color) continue;
                for (int32_t j = 0; j < n; j++) {
                    memcpy(other, slots[j].payload, sizeof other);
                    if (other[0] == color && (other[1] < theirs[1] || (other[1] == theirs[1] && j < i))) place++;
                }
                members[place] = tc->group->world_rank[i];
            }
            group = llmpar__threads_group_create(tc->world, ranks, members, name);
        }
        llmpar_heap_free(tc->heap, members);
    }
    call.what.root = 1; /* not to be taken for the first half */
    st = llmpar__threads_meet(tc, &call, &group, sizeof group, &slots);
    if (st || color < 0) return st;
    memcpy(&group, slots[leader].payload, sizeof group);
    if (!group) return llmpar__threads_failed(tc, llmpar_error_set(comm->error, LLMPAR_ERR_MEMORY, "split \"%s\" of %s: out of memory for %d ranks", name, comm->axis, (int)ranks));
    st = llmpar__threads_half(group, rank, comm->record, tc->heap, comm->device, comm->error, out);
    return st ? llmpar__threads_failed(tc, st) : LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_threads_comm_create(llmpar_threads_world *world, int32_t rank, llmpar_heap *heap, llmpar_device *device, llmpar_error *error, llmpar_comm **out)
{
    *out = NULL;
    if (rank < 0 || rank >= world->desc.ranks) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "threads: rank %d, expected 0 to %d", (int)rank, (int)world->desc.ranks - 1);
    llmpar__threads_first_turn(world, rank);
    llmpar_record *record = NULL;
    uint64_t deadline_ms = world->desc.lockstep || world->desc.deadline > 1e12 ? 0 : (uint64_t)(world->desc.deadline * 1e3);
    if (world->desc.ranks > 1 && llmpar_record_create(heap, rank, deadline_ms, &record)) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "threads: out of memory for the record of rank %d", (int)rank);
    llmpar_status st = llmpar__threads_half(world->world_group, rank, record, heap, device, error, out);
    if (st) {
        llmpar_record_destroy(record);
        return st;
    }
    ((llmpar__threads_comm *)(*out)->state)->record = record;
    if (record) llmpar__threads_show(world, rank, record);
    return LLMPAR_OK;
}

#undef LLMPAR__THREADS_PIECE
/* ==== src/comm/mpi_world.c ==== */
/* mpi_world: the processes of a job: set-up, control messages, and how a failure reaches everybody.

   Two duplicated communicators. `data` carries collectives (mpi_wait.c). `control` carries notes, and one receive is always posted for them:
     BEAT       every desc.heartbeat seconds to the ranks r+1, r+2, r+4, ..: the sender lives, and this is where it is
     FAILED     once, to all, from every rank that has heard of a failure: the failure, and where the sender is
     FINISHED   once, to all: the sender's rank function has returned
     BYE        once, to all, when all have finished: the last note of the sender. With it an empty last message on `data`, up to which everybody drops what a failure has left there
   So a failure floods the job even where its first witness dies, every survivor can say who was where, and nothing is left in flight when communicators are freed.

   Who looks at `control`: the rank's thread while it waits in a collective, and else a helper thread, ten times a second; both under world->lock, which is around every MPI call.
   A computing rank therefore beats as well as a waiting one; a stopped or killed process does not. Silence is counted in this rank's own attention (at most a quarter second a look),
   so that a rank which was itself stopped does not blame the others when it goes on. Where MPI provides less than MPI_THREAD_SERIALIZED there is no helper and silence says nothing. */
/* ==== src/comm/mpi_internal.h ==== */
/* mpi_internal: what the files of the MPI communicator share: mpi_world.c (set-up, control messages, failing), mpi_wait.c (messages under way, and how ranks meet before data moves),
   mpi.c (the collectives). */
#ifndef LLMPAR_COMM_MPI_INTERNAL_H
#define LLMPAR_COMM_MPI_INTERNAL_H


#ifdef LLMPAR_USE_MPI

#include <mpi.h>
#include <pthread.h>

#define LLMPAR__MPI_INLINE 2048u /* bytes a rank can send beside its header */
#define LLMPAR__MPI_BATCH 64     /* data messages under way */

/* What every collective begins with. Only `bytes` of the payload travel. */
typedef struct llmpar__mpi_header {
    uint64_t fingerprint, context, bytes;
    llmpar_call call;                          /* op NONE: nothing has come */
    unsigned char payload[LLMPAR__MPI_INLINE]; /* aligned to 8 */
} llmpar__mpi_header;

typedef enum llmpar__mpi_note_kind { LLMPAR__MPI_BEAT = 1, LLMPAR__MPI_FAILED = 2, LLMPAR__MPI_FINISHED = 3, LLMPAR__MPI_BYE = 4 } llmpar__mpi_note_kind;

/* A control message. Plain bytes. */
typedef struct llmpar__mpi_note {
    int32_t kind, rank;
    llmpar_position position; /* of the sender */
    llmpar_error error;       /* the failure that the sender knows; status OK: none */
} llmpar__mpi_note;

/* One note to all other ranks, sent at most once. */
typedef struct llmpar__mpi_cast {
    llmpar__mpi_note note;
    MPI_Request *request;    /* [ranks]; of `bye` [2][ranks]: the last messages on `data` too */
    int sent;
} llmpar__mpi_cast;

typedef struct llmpar__mpi_peer {
    llmpar_position position;
    double silent;           /* seconds of this rank's own attention without a sign of life; watched peers only */
    double finished_for;     /* .. since it finished */
    int32_t watched, finished, bye, dead, told; /* told: has said where it is since the failure */
    int32_t flushed;         /* its last message on `data` has come */
} llmpar__mpi_peer;

/* A peer that gets this rank's heartbeats. */
typedef struct llmpar__mpi_beat {
    llmpar__mpi_note note;
    MPI_Request request;
    int32_t to;
} llmpar__mpi_beat;

struct llmpar_mpi_world {
    llmpar_heap *heap;
    llmpar_mpi_desc desc;            /* resolved */
    MPI_Comm data, control;
    int32_t rank, ranks, serialized, attended, crowded; /* attended: all ranks have helpers; crowded: more ranks than processors on this node */
    uint64_t next_context;
    llmpar_record *record;           /* of this rank's collectives */
    pthread_mutex_t lock;            /* around every MPI call and everything below up to `inbox` */
    pthread_cond_t wake;
    pthread_t helper;
    int32_t helping, stop;
    int32_t aborted;                 /* atomic */
    int32_t draining;                /* no receive is wanted any more: whatever arrives is dropped, so that its sender is done */
    int32_t orderly;                 /* all ranks have ended in order */
    llmpar_error failure;            /* the root error as far as this rank knows */
    double failed_at;
    llmpar__mpi_peer *peer;          /* [ranks] */
    llmpar__mpi_note incoming;       /* the standing receive */
    MPI_Request standing;
    llmpar__mpi_cast failed, finished, bye;
    llmpar__mpi_beat *beat;          /* [beats] ranks + 1, + 2, + 4, .. */
    int32_t beats;
    double last_beat, last_look;
    MPI_Request dropped;             /* the message that is being dropped */
    unsigned char *bucket;           /* .. into this, of malloc: the helper's thread may not use the rank's heap */
    size_t bucket_bytes;
    /* the rank's thread only */
    llmpar__mpi_header outbox, *inbox;  /* [inboxes] */
    int32_t inboxes, met;               /* met: headers of the present call that are, or come, in inbox[0, met) */
    MPI_Request *meeting;               /* [2 * inboxes] receives, then sends */
    MPI_Request request[LLMPAR__MPI_BATCH];
    int32_t from[LLMPAR__MPI_BATCH];    /* a receive's source, a world rank; -1: a send */
    int32_t posted;
    char *scratch;
    size_t scratch_bytes;
};

/* One rank's half of a communicator; llmpar_comm's `state`. */
typedef struct llmpar__mpi_comm {
    llmpar_comm comm; /* first: the table itself */
    llmpar_mpi_world *world;
    uint64_t context;
    int32_t *member;        /* [ranks] world ranks */
    int32_t levels;         /* of the reduction's tree above this rank */
    struct llmpar__mpi_level *level; /* [levels], from the leaf up */
    int32_t *label;         /* [levels][ranks], see mpi.c */
    int32_t *kept;          /* [ranks] scratch: the parts that this rank holds */
    int32_t most_kept, most_given; /* parts that this rank keeps and gives at a level, at most */
    char axis[24];
} llmpar__mpi_comm;

/* World and control (mpi_world.c). */

LLMPAR__PRIVATE double llmpar__mpi_now(void);
/* Under the lock: receives control messages, sends heartbeats, notices silence. */
LLMPAR__PRIVATE void llmpar__mpi_look(llmpar_mpi_world *world);
/* Under the lock: what the calls of inbox[0, count) say about their ranks: inside their call, or out of it. */
LLMPAR__PRIVATE void llmpar__mpi_seen(llmpar_mpi_world *world, int32_t count, int completed);
/* Under the lock: llmpar_mpi_world_fail. */
LLMPAR__PRIVATE void llmpar__mpi_fail_locked(llmpar_mpi_world *world, const llmpar_error *error);
/* Under the lock, which it gives away meanwhile: who is where, by what the ranks themselves say; after a failure it waits up to a second for those that have not said it yet. */
LLMPAR__PRIVATE void llmpar__mpi_who(llmpar_mpi_world *world, char *text, size_t capacity);
/* An MPI function's complaint as LLMPAR_ERR_INTERNAL. */
LLMPAR__PRIVATE llmpar_status llmpar__mpi_error(llmpar_error *error, const char *function, int code);

/* Waiting (mpi_wait.c). All run on the rank's thread and leave their text in tc->comm.error. */

/* Sends or receives `bytes` to or from the member with index `peer`, in messages of at most comm_slice; waits for room among the messages under way. */
LLMPAR__PRIVATE llmpar_status llmpar__mpi_post(llmpar__mpi_comm *tc, const llmpar_call *call, int receives, int32_t peer, void *memory, size_t bytes);
/* Waits until all posted messages are through. On an error none is left that this rank could end. */
LLMPAR__PRIVATE llmpar_status llmpar__mpi_complete(llmpar__mpi_comm *tc, const llmpar_call *call);
/* After a failure `st` of this rank's own with messages under way: tells the job and ends them. Returns st. */
LLMPAR__PRIVATE llmpar_status llmpar__mpi_abandon(llmpar__mpi_comm *tc, const llmpar_call *call, llmpar_status st);
/* All members come to the same call, or all report both sides and nothing has moved. Up to desc.direct members: member i's payload is then in inbox[i], this rank's own too. More: bytes is 0. */
LLMPAR__PRIVATE llmpar_status llmpar__mpi_meet(llmpar__mpi_comm *tc, const llmpar_call *call, const void *payload, size_t bytes);
/* Both ends of a message meet; the sender's payload is then in inbox[0] of the receiver. */
LLMPAR__PRIVATE llmpar_status llmpar__mpi_meet_one(llmpar__mpi_comm *tc, const llmpar_call *call, const void *payload, size_t bytes);
/* Makes the error of this rank (already in comm->error) the job's, if it is the first. Returns status. */
LLMPAR__PRIVATE llmpar_status llmpar__mpi_failed(llmpar__mpi_comm *tc, llmpar_status status);

#endif /* LLMPAR_USE_MPI */

#endif
/* ---- src/comm/mpi_world.c goes on ---- */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>


#ifdef LLMPAR_USE_MPI

#include <time.h>
#include <unistd.h>

#define LLMPAR__MPI_NOTE_TAG 1    /* on control */
#define LLMPAR__MPI_LAST_TAG 3    /* on data, above those of mpi_wait.c */
#define LLMPAR__MPI_LOOK 0.1      /* seconds between two looks of the helper */
#define LLMPAR__MPI_ATTENTION 0.25

LLMPAR__PRIVATE_DEF double llmpar__mpi_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void llmpar__mpi_nap(double seconds)
{
    struct timespec t;
    t.tv_sec = (time_t)seconds;
    t.tv_nsec = (long)((seconds - (double)t.tv_sec) * 1e9);
    nanosleep(&t, NULL);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__mpi_error(llmpar_error *error, const char *function, int code)
{
    char text[MPI_MAX_ERROR_STRING + 1];
    int length = 0;
    text[0] = 0;
    MPI_Error_string(code, text, &length);
    return llmpar_error_set(error, LLMPAR_ERR_INTERNAL, "mpi: %s: %.400s", function, text);
}

/* ---- notes ---- */

/* To all other ranks, once. */
static void llmpar__mpi_tell(llmpar_mpi_world *world, llmpar__mpi_cast *cast, llmpar__mpi_note_kind kind)
{
    if (cast->sent) return;
    cast->sent = 1;
    cast->note.kind = (int32_t)kind;
    cast->note.rank = world->rank;
    llmpar_record_position(world->record, &cast->note.position);
    if (kind >= LLMPAR__MPI_FINISHED && !world->aborted) cast->note.position.state = (int32_t)LLMPAR_POSITION_RETURNED;
    cast->note.error = world->failure;
    for (int32_t k = 1; k < world->ranks; k++) {
        int32_t to = (world->rank + k) % world->ranks;
        if (MPI_Isend(&cast->note, (int)sizeof cast->note, MPI_BYTE, to, LLMPAR__MPI_NOTE_TAG, world->control, &cast->request[to])) cast->request[to] = MPI_REQUEST_NULL;
    }
}

/* Which of two failures is the job's: a rule that all ranks share, whatever they hear first. */
static int llmpar__mpi_precedes(const llmpar_error *a, const llmpar_error *b)
{
    if (a->rank != b->rank) return a->rank < b->rank;
    return strcmp(a->text, b->text) < 0;
}

LLMPAR__PRIVATE_DEF void llmpar__mpi_fail_locked(llmpar_mpi_world *world, const llmpar_error *error)
{
    int first = !world->aborted;
    if (first || llmpar__mpi_precedes(error, &world->failure)) {
        world->failure = *error;
        if (error->status == LLMPAR_OK || error->status == LLMPAR_ERR_PEER) world->failure.status = LLMPAR_ERR_INTERNAL; /* a root error is neither */
    }
    if (!first) return;
    world->failed_at = llmpar__mpi_now();
    __atomic_store_n(&world->aborted, 1, __ATOMIC_SEQ_CST);
    llmpar__mpi_tell(world, &world->failed, LLMPAR__MPI_FAILED);
}

LLMPAR_DEF void llmpar_mpi_world_fail(llmpar_mpi_world *world, const llmpar_error *error)
{
    pthread_mutex_lock(&world->lock);
    llmpar__mpi_fail_locked(world, error);
    pthread_mutex_unlock(&world->lock);
}

LLMPAR_DEF void llmpar_mpi_world_error(llmpar_mpi_world *world, llmpar_error *out)
{
    pthread_mutex_lock(&world->lock);
    *out = world->failure;
    pthread_mutex_unlock(&world->lock);
}

static void llmpar__mpi_heard(llmpar_mpi_world *world, const llmpar__mpi_note *note)
{
    if (note->rank < 0 || note->rank >= world->ranks) return;
    llmpar__mpi_peer *peer = &world->peer[note->rank];
    if (!peer->told || note->position.state == LLMPAR_POSITION_INSIDE) peer->position = note->position; /* once the job has failed, where it was then */
    peer->silent = 0;
    if (note->kind == LLMPAR__MPI_FINISHED) peer->finished = 1;
    if (note->kind == LLMPAR__MPI_BYE) peer->finished = peer->bye = 1;
    if (note->error.status == LLMPAR_OK) return;
    peer->told = 1;
    llmpar__mpi_fail_locked(world, &note->error);
}

LLMPAR__PRIVATE_DEF void llmpar__mpi_seen(llmpar_mpi_world *world, int32_t count, int completed)
{
    for (int32_t i = 0; i < count; i++) {
        const llmpar_call *call = &world->inbox[i].call;
        if (world->meeting[i] != MPI_REQUEST_NULL || call->op == LLMPAR_CALL_NONE || call->rank < 0 || call->rank >= world->ranks) continue;
        llmpar__mpi_peer *peer = &world->peer[call->rank];
        if (peer->told || peer->finished) continue; /* it knows better */
        llmpar_position *position = &peer->position;
        position->state = (int32_t)(completed ? LLMPAR_POSITION_OUTSIDE : LLMPAR_POSITION_INSIDE);
        *(completed ? &position->last : &position->now) = *call;
        if (completed) position->now.op = (int32_t)LLMPAR_CALL_NONE;
        memcpy(position->where, call->where, sizeof position->where);
    }
}

static void llmpar__mpi_listen(llmpar_mpi_world *world)
{
    if (MPI_Irecv(&world->incoming, (int)sizeof world->incoming, MPI_BYTE, MPI_ANY_SOURCE, LLMPAR__MPI_NOTE_TAG, world->control, &world->standing)) world->standing = MPI_REQUEST_NULL;
}

static void llmpar__mpi_beats(llmpar_mpi_world *world, double now)
{
    if (now - world->last_beat < world->desc.heartbeat || world->bye.sent) return;
    world->last_beat = now;
    for (int32_t i = 0; i < world->beats; i++) {
        llmpar__mpi_beat *beat = &world->beat[i];
        int done = 1;
        if (beat->request != MPI_REQUEST_NULL && (MPI_Test(&beat->request, &done, MPI_STATUS_IGNORE) || !done)) continue; /* it does not take the last one either */
        beat->note.kind = (int32_t)LLMPAR__MPI_BEAT;
        beat->note.rank = world->rank;
        llmpar_record_position(world->record, &beat->note.position);
        if (world->finished.sent && !world->aborted) beat->note.position.state = (int32_t)LLMPAR_POSITION_RETURNED;
        beat->note.error = world->failure;
        if (MPI_Isend(&beat->note, (int)sizeof beat->note, MPI_BYTE, beat->to, LLMPAR__MPI_NOTE_TAG, world->control, &beat->request)) beat->request = MPI_REQUEST_NULL;
    }
}

static void llmpar__mpi_silence(llmpar_mpi_world *world, double attention)
{
    for (int32_t i = 0; i < world->ranks; i++) {
        llmpar__mpi_peer *peer = &world->peer[i];
        if (peer->finished) peer->finished_for += attention;
        if (!peer->watched || peer->bye || peer->dead) continue;
        peer->silent += attention;
        if (peer->silent < world->desc.silence) continue;
        peer->dead = 1;
        if (world->aborted) continue;
        llmpar_error error;
        char where[320] = "never heard of";
        llmpar_error_clear(&error);
        if (peer->position.state == LLMPAR_POSITION_INSIDE) llmpar_call_print(&peer->position.now, where, sizeof where);
        else if (peer->position.state != LLMPAR_POSITION_UNKNOWN) snprintf(where, sizeof where, "%s", peer->finished ? "returned" : "outside");
        llmpar_error_set(&error, LLMPAR_ERR_TIMEOUT, "no sign of life from rank %d for %g s: killed, stopped or unreachable; it was last seen in: %s", (int)i, world->desc.silence, where);
        error.rank = i;
        memcpy(error.where, peer->position.where, sizeof error.where);
        llmpar__mpi_fail_locked(world, &error);
    }
}

/* Takes what nobody will receive any more, whole: MPI libraries are not to be trusted with a receive that is too short. */
static void llmpar__mpi_drain(llmpar_mpi_world *world)
{
    for (int i = 0; i < 16; i++) {
        int there = 0, done = 1, bytes = 0;
        MPI_Status status;
        if (world->dropped != MPI_REQUEST_NULL && MPI_Test(&world->dropped, &done, MPI_STATUS_IGNORE)) return;
        if (!done || MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, world->data, &there, &status) || !there || MPI_Get_count(&status, MPI_BYTE, &bytes)) return;
        if ((size_t)bytes > world->bucket_bytes) {
            unsigned char *larger = (unsigned char *)malloc((size_t)bytes); /* not the rank's heap: this may be the helper's thread. At most comm_slice, and only after a failure */
            if (!larger) return; /* its sender gives up after a while, and the job cannot end in order */
            free(world->bucket);
            world->bucket = larger;
            world->bucket_bytes = (size_t)bytes;
        }
        if (status.MPI_TAG == LLMPAR__MPI_LAST_TAG) world->peer[status.MPI_SOURCE].flushed = 1;
        if (MPI_Irecv(world->bucket, bytes, MPI_BYTE, status.MPI_SOURCE, status.MPI_TAG, world->data, &world->dropped)) world->dropped = MPI_REQUEST_NULL;
    }
}

LLMPAR__PRIVATE_DEF void llmpar__mpi_look(llmpar_mpi_world *world)
{
    double now = llmpar__mpi_now(), attention = now - world->last_look;
    world->last_look = now;
    for (int i = 0; i < 1024; i++) {
        int done = 0;
        if (world->standing == MPI_REQUEST_NULL) llmpar__mpi_listen(world);
        if (MPI_Test(&world->standing, &done, MPI_STATUS_IGNORE)) {
            world->standing = MPI_REQUEST_NULL;
            break;
        }
        if (!done) break;
        llmpar__mpi_heard(world, &world->incoming);
        llmpar__mpi_listen(world);
    }
    llmpar__mpi_beats(world, now);
    if (world->attended) llmpar__mpi_silence(world, attention < LLMPAR__MPI_ATTENTION ? attention : LLMPAR__MPI_ATTENTION);
    if (world->draining) llmpar__mpi_drain(world);
}

static int llmpar__mpi_cond_init(pthread_cond_t *cond)
{
    pthread_condattr_t attributes;
    if (pthread_condattr_init(&attributes)) return 0;
#if !defined(__APPLE__)
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
#endif
    int failed = pthread_cond_init(cond, &attributes);
    pthread_condattr_destroy(&attributes);
    return !failed;
}

static void *llmpar__mpi_help(void *arg)
{
    llmpar_mpi_world *world = (llmpar_mpi_world *)arg;
    pthread_mutex_lock(&world->lock);
    while (!world->stop) {
        llmpar__mpi_look(world);
        struct timespec until;
#if defined(__APPLE__)
        clock_gettime(CLOCK_REALTIME, &until);
#else
        clock_gettime(CLOCK_MONOTONIC, &until);
#endif
        until.tv_nsec += (long)((world->aborted ? 0.1 : 1) * LLMPAR__MPI_LOOK * 1e9);
        if (until.tv_nsec >= 1000000000) {
            until.tv_nsec -= 1000000000;
            until.tv_sec++;
        }
        pthread_cond_timedwait(&world->wake, &world->lock, &until);
    }
    pthread_mutex_unlock(&world->lock);
    return NULL;
}

/* ---- set-up ---- */

/* What the ranks show each other at set-up. Plain bytes. */
typedef struct llmpar__mpi_hello {
    int32_t level, direct;
    uint64_t comm_slice;
    llmpar_error error;
} llmpar__mpi_hello;

static llmpar_status llmpar__mpi_resolve(llmpar_mpi_desc *desc, int ranks, llmpar_error *error)
{
    if (desc->comm_slice && (desc->comm_slice > (size_t)1 << 30 || desc->comm_slice < 8 * (size_t)ranks))
        return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "mpi: comm_slice = %llu bytes, expected 0 (16 MiB), or 8 bytes a rank to 1 GiB", (unsigned long long)desc->comm_slice);
    if (!(desc->deadline >= 0)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "mpi: deadline = %g seconds, expected 0 (none) or more", desc->deadline);
    if (!(desc->heartbeat >= 0) || !(desc->silence >= 0)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "mpi: heartbeat = %g and silence = %g seconds, expected 0 (0.5, 5) or more", desc->heartbeat, desc->silence);
    if (desc->direct < 0 || desc->direct > 256) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "mpi: direct = %d ranks, expected 0 (16) to 256", (int)desc->direct);
    if (!desc->comm_slice) desc->comm_slice = (size_t)16 << 20;
    if (desc->heartbeat == 0) desc->heartbeat = 0.5;
    if (desc->silence == 0) desc->silence = 5;
    if (!desc->direct) desc->direct = 16;
    if (desc->silence < 3 * desc->heartbeat) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "mpi: silence = %g seconds, expected at least three heartbeats of %g", desc->silence, desc->heartbeat);
    return LLMPAR_OK;
}

static MPI_Request *llmpar__mpi_requests(llmpar_heap *heap, size_t count)
{
    MPI_Request *request = (MPI_Request *)llmpar_heap_alloc(heap, count, sizeof *request);
    for (size_t i = 0; request && i < count; i++) request[i] = MPI_REQUEST_NULL;
    return request;
}

/* Everything that may fail on one rank alone. */
static llmpar_status llmpar__mpi_furnish(llmpar_mpi_world *world, int level, llmpar_error *error)
{
    size_t n = (size_t)world->ranks;
    llmpar_status st = llmpar__mpi_resolve(&world->desc, (int)world->ranks, error);
    if (st) return st;
    for (int32_t k = 1; k < world->ranks; k *= 2) world->beats++;
    world->inboxes = world->desc.direct < world->ranks ? world->desc.direct : world->ranks;
    if (world->inboxes < 2) world->inboxes = 2;
    world->peer = (llmpar__mpi_peer *)llmpar_heap_zalloc(world->heap, n, sizeof *world->peer);
    world->beat = (llmpar__mpi_beat *)llmpar_heap_zalloc(world->heap, (size_t)world->beats, sizeof *world->beat);
    world->inbox = (llmpar__mpi_header *)llmpar_heap_zalloc(world->heap, (size_t)world->inboxes, sizeof *world->inbox);
    world->meeting = llmpar__mpi_requests(world->heap, 2 * (size_t)world->inboxes);
    world->failed.request = llmpar__mpi_requests(world->heap, n);
    world->finished.request = llmpar__mpi_requests(world->heap, n);
    world->bye.request = llmpar__mpi_requests(world->heap, 2 * n);
    world->bucket_bytes = sizeof *world->inbox; /* headers can be dropped even without memory */
    world->bucket = (unsigned char *)malloc(world->bucket_bytes);
    if (!world->bucket || !world->peer || !world->beat || !world->inbox || !world->meeting || !world->failed.request || !world->finished.request || !world->bye.request)
        return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "mpi: out of memory for %d ranks", (int)world->ranks);
    if (llmpar_record_create(world->heap, world->rank, world->desc.deadline < 1e12 ? (uint64_t)(world->desc.deadline * 1000) : 0, &world->record)) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "mpi: out of memory for the record");
    for (int32_t i = 0; i < world->ranks; i++) {
        world->peer[i].position.rank = i;
        world->peer[i].position.state = (int32_t)LLMPAR_POSITION_UNKNOWN;
    }
    for (int32_t i = 0, k = 1; i < world->beats; i++, k *= 2) {
        world->beat[i].to = (world->rank + k) % world->ranks;
        world->beat[i].request = MPI_REQUEST_NULL;
        world->peer[(world->rank - k + world->ranks) % world->ranks].watched = 1;
    }
    if (level < MPI_THREAD_SERIALIZED || world->desc.unattended || world->ranks == 1) return LLMPAR_OK;
    int failed = pthread_create(&world->helper, NULL, llmpar__mpi_help, world); /* it waits for the lock */
    if (failed) return llmpar_error_set(error, LLMPAR_ERR_INTERNAL, "mpi: the helper thread could not be started (system error %d)", failed);
    world->helping = 1;
    return LLMPAR_OK;
}

/* Ends the helper, and waits for it. Without the lock. */
static void llmpar__mpi_dismiss(llmpar_mpi_world *world)
{
    if (!world->helping) return;
    pthread_mutex_lock(&world->lock);
    world->stop = 1;
    pthread_cond_signal(&world->wake);
    pthread_mutex_unlock(&world->lock);
    pthread_join(world->helper, NULL);
    world->helping = 0;
}

/* All ranks are well and alike, or all say who is not. */
static llmpar_status llmpar__mpi_agree(llmpar_mpi_world *world, int level, llmpar_status st, llmpar_error *error)
{
    llmpar__mpi_hello mine, first, lowest;
    int32_t sick = st ? world->rank : world->ranks, sickest = 0;
    memset(&mine, 0, sizeof mine);
    mine.level = level;
    mine.direct = world->desc.direct;
    mine.comm_slice = world->desc.comm_slice;
    if (st) mine.error = *error;
    else llmpar_error_clear(&mine.error);
    mine.error.rank = world->rank;
    lowest = mine;
    /* The lowest rank with an error shows it to all. Set-up may use blocking collectives. */
    int code = MPI_Allreduce(&sick, &sickest, 1, MPI_INT32_T, MPI_MIN, world->data);
    if (code) return llmpar__mpi_error(error, "MPI_Allreduce", code);
    if (sickest < world->ranks) {
        code = MPI_Bcast(&lowest, (int)sizeof lowest, MPI_BYTE, sickest, world->data);
        if (code) return llmpar__mpi_error(error, "MPI_Bcast", code);
        if (st) return st;
        *error = lowest.error;
        return error->status;
    }
    first = mine;
    code = MPI_Bcast(&first, (int)sizeof first, MPI_BYTE, 0, world->data);
    if (code) return llmpar__mpi_error(error, "MPI_Bcast", code);
    int32_t differs = first.direct != mine.direct || first.comm_slice != mine.comm_slice ? world->rank : world->ranks, other = 0, levels[2], least[2];
    levels[0] = level;
    levels[1] = !world->desc.unattended;
    code = MPI_Allreduce(&differs, &other, 1, MPI_INT32_T, MPI_MIN, world->data);
    if (!code) code = MPI_Allreduce(levels, least, 2, MPI_INT32_T, MPI_MIN, world->data);
    if (code) return llmpar__mpi_error(error, "MPI_Allreduce", code);
    world->serialized = least[0] >= MPI_THREAD_SERIALIZED;
    world->attended = world->serialized && least[1];
    if (other == world->ranks) return LLMPAR_OK;
    lowest = mine;
    code = MPI_Bcast(&lowest, (int)sizeof lowest, MPI_BYTE, other, world->data);
    if (code) return llmpar__mpi_error(error, "MPI_Bcast", code);
    llmpar_error_set(error, LLMPAR_ERR_MISMATCH, "mpi: the ranks are described differently: rank 0: comm_slice %llu, direct %d; rank %d: comm_slice %llu, direct %d", (unsigned long long)first.comm_slice,
                     (int)first.direct, (int)other, (unsigned long long)lowest.comm_slice, (int)lowest.direct);
    error->rank = other;
    return LLMPAR_ERR_MISMATCH;
}

/* Are there more ranks on this node than processors? Then a waiting rank gives its processor away at once. */
static void llmpar__mpi_neighbours(llmpar_mpi_world *world)
{
    MPI_Comm node = MPI_COMM_NULL;
    int here = world->ranks;
    if (!MPI_Comm_split_type(world->data, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node) && node != MPI_COMM_NULL) {
        MPI_Comm_size(node, &here);
        MPI_Comm_free(&node);
    }
    world->crowded = here > (int)sysconf(_SC_NPROCESSORS_ONLN);
}

static void llmpar__mpi_free(llmpar_mpi_world *world)
{
    llmpar_heap *heap = world->heap;
    llmpar_record_destroy(world->record);
    llmpar_heap_free(heap, world->peer);
    llmpar_heap_free(heap, world->beat);
    llmpar_heap_free(heap, world->inbox);
    llmpar_heap_free(heap, world->meeting);
    llmpar_heap_free(heap, world->failed.request);
    llmpar_heap_free(heap, world->finished.request);
    llmpar_heap_free(heap, world->bye.request);
    llmpar_heap_free(heap, world->scratch);
    free(world->bucket);
    pthread_cond_destroy(&world->wake);
    pthread_mutex_destroy(&world->lock);
    llmpar_heap_free(heap, world);
}

LLMPAR_DEF llmpar_status llmpar_mpi_world_create(llmpar_heap *heap, const llmpar_mpi_desc *desc, llmpar_mpi_world **out, llmpar_error *error)
{
    *out = NULL;
    int there = 0, over = 0, inter = 0, level = 0, main_thread = 1, rank = 0, ranks = 0;
    llmpar_error unheard;
    llmpar_error_clear(&unheard);
    if (!error) error = &unheard;
    MPI_Initialized(&there);
    if (!there) return llmpar_error_set(error, LLMPAR_ERR_CONFIG, "mpi: MPI is not initialised: call MPI_Init_thread before, with MPI_THREAD_SERIALIZED");
    MPI_Finalized(&over);
    if (over) return llmpar_error_set(error, LLMPAR_ERR_CONFIG, "mpi: MPI is already finalised, and cannot be initialised again in this process");
    MPI_Comm from = desc && desc->comm ? *(const MPI_Comm *)desc->comm : MPI_COMM_WORLD;
    if (from == MPI_COMM_NULL) return llmpar_error_set(error, LLMPAR_ERR_CONFIG, "mpi: the communicator is MPI_COMM_NULL");
    int code = MPI_Comm_test_inter(from, &inter);
    if (!code && inter) return llmpar_error_set(error, LLMPAR_ERR_CONFIG, "mpi: the communicator is an intercommunicator, expected an intracommunicator");
    MPI_Query_thread(&level);
    if (level < MPI_THREAD_SERIALIZED) MPI_Is_thread_main(&main_thread);
    if (!main_thread) return llmpar_error_set(error, LLMPAR_ERR_CONFIG, "mpi: called on another thread than MPI was initialised on, and MPI provides less than MPI_THREAD_SERIALIZED");
    if (!code) code = MPI_Comm_rank(from, &rank);
    if (!code) code = MPI_Comm_size(from, &ranks);
    if (code) return llmpar__mpi_error(error, "MPI_Comm_size", code);

    llmpar_mpi_world spare, *world = (llmpar_mpi_world *)llmpar_heap_zalloc(heap, 1, sizeof *world);
    int alone = !world; /* out of memory: takes part in the agreement all the same */
    if (alone) {
        world = &spare;
        memset(world, 0, sizeof *world);
    }
    world->heap = heap;
    if (desc) world->desc = *desc;
    world->rank = (int32_t)rank;
    world->ranks = (int32_t)ranks;
    world->standing = world->dropped = MPI_REQUEST_NULL;
    world->last_look = world->last_beat = llmpar__mpi_now();
    world->next_context = 1;
    for (int i = 0; i < LLMPAR__MPI_BATCH; i++) world->request[i] = MPI_REQUEST_NULL;
    llmpar_error_clear(&world->failure);
    code = MPI_Comm_dup(from, &world->data);
    if (!code) code = MPI_Comm_dup(from, &world->control);
    if (code) {
        if (!alone) llmpar_heap_free(heap, world);
        return llmpar__mpi_error(error, "MPI_Comm_dup", code);
    }
    MPI_Comm_set_errhandler(world->data, MPI_ERRORS_RETURN);
    MPI_Comm_set_errhandler(world->control, MPI_ERRORS_RETURN);
    pthread_mutex_init(&world->lock, NULL);
    llmpar__mpi_cond_init(&world->wake);
    pthread_mutex_lock(&world->lock);
    llmpar_status st = alone ? llmpar_error_set(error, LLMPAR_ERR_MEMORY, "mpi: out of memory") : llmpar__mpi_furnish(world, level, error);
    if (st && error->rank < 0) error->rank = world->rank;
    st = llmpar__mpi_agree(world, level, st, error);
    if (!st) llmpar__mpi_neighbours(world);
    if (!st) llmpar__mpi_listen(world);
    world->last_look = world->last_beat = llmpar__mpi_now();
    if (st || !world->attended) world->stop = 1;
    pthread_mutex_unlock(&world->lock);
    if (st || world->stop) llmpar__mpi_dismiss(world);
    if (!st) {
        *out = world;
        return LLMPAR_OK;
    }
    MPI_Comm_free(&world->data);
    MPI_Comm_free(&world->control);
    if (alone) {
        pthread_cond_destroy(&world->wake);
        pthread_mutex_destroy(&world->lock);
    } else {
        llmpar__mpi_free(world);
    }
    return st;
}

LLMPAR_DEF int32_t llmpar_mpi_world_rank(const llmpar_mpi_world *world) { return world->rank; }
LLMPAR_DEF int32_t llmpar_mpi_world_ranks(const llmpar_mpi_world *world) { return world->ranks; }
LLMPAR_DEF int llmpar_mpi_world_serialized(const llmpar_mpi_world *world) { return world->serialized; }

/* ---- who is where ---- */

/* Looks, and then sleeps a little without the lock. */
static void llmpar__mpi_idle(llmpar_mpi_world *world)
{
    llmpar__mpi_look(world);
    pthread_mutex_unlock(&world->lock);
    llmpar__mpi_nap(0.0005);
    pthread_mutex_lock(&world->lock);
}

static void llmpar__mpi_position(void *user, int32_t rank, llmpar_position *out)
{
    llmpar_mpi_world *world = (llmpar_mpi_world *)user;
    if (rank == world->rank) llmpar_record_position(world->record, out);
    else *out = world->peer[rank].position;
}

LLMPAR__PRIVATE_DEF void llmpar__mpi_who(llmpar_mpi_world *world, char *text, size_t capacity)
{
    double limit = llmpar__mpi_now() + 1;
    for (int waiting = world->aborted; waiting && llmpar__mpi_now() < limit;) {
        waiting = 0;
        for (int32_t i = 0; i < world->ranks; i++)
            if (i != world->rank && !world->peer[i].told && !world->peer[i].dead && !world->peer[i].finished) waiting = 1;
        if (waiting) llmpar__mpi_idle(world);
    }
    llmpar_position_print(llmpar__mpi_position, world, world->ranks, text, capacity);
}

/* ---- the end ---- */

static int llmpar__mpi_all(const llmpar_mpi_world *world, int bye)
{
    for (int32_t i = 0; i < world->ranks; i++)
        if (i != world->rank && !(bye ? world->peer[i].bye && world->peer[i].flushed : world->peer[i].finished)) return 0;
    return 1;
}

static void llmpar__mpi_flush(llmpar_mpi_world *world)
{
    for (int32_t i = 0; i < world->ranks; i++)
        if (i != world->rank && MPI_Isend(world->outbox.payload, 0, MPI_BYTE, (int)i, LLMPAR__MPI_LAST_TAG, world->data, &world->bye.request[world->ranks + i])) world->bye.request[world->ranks + i] = MPI_REQUEST_NULL;
}

static int llmpar__mpi_sent(llmpar_mpi_world *world)
{
    int done = 1, all = 1;
    int32_t n = world->ranks;
    for (int32_t i = 0; i < 4 * n; i++) {
        MPI_Request *request = i < n ? &world->failed.request[i] : i < 2 * n ? &world->finished.request[i - n] : &world->bye.request[i - 2 * n];
        if (*request != MPI_REQUEST_NULL && !MPI_Test(request, &done, MPI_STATUS_IGNORE)) all = all && done;
    }
    for (int32_t i = 0; i < world->beats; i++)
        if (world->beat[i].request != MPI_REQUEST_NULL && !MPI_Test(&world->beat[i].request, &done, MPI_STATUS_IGNORE)) all = all && done;
    return all;
}

LLMPAR_DEF int llmpar_mpi_world_finish(llmpar_mpi_world *world, double grace, llmpar_error *root)
{
    pthread_mutex_lock(&world->lock);
    double called = llmpar__mpi_now();
    if (!(grace > 0)) grace = 3;
    llmpar__mpi_tell(world, &world->finished, LLMPAR__MPI_FINISHED);
    while (!llmpar__mpi_all(world, 0)) {
        if (world->aborted && llmpar__mpi_now() - (called > world->failed_at ? called : world->failed_at) > grace) break;
        if (world->aborted) world->draining = 1;
        llmpar__mpi_idle(world);
    }
    if (llmpar__mpi_all(world, 0)) {
        world->draining = 1;
        llmpar__mpi_tell(world, &world->bye, LLMPAR__MPI_BYE);
        llmpar__mpi_flush(world);
        double limit = llmpar__mpi_now() + 10;
        int done = 0;
        while (!done && llmpar__mpi_now() < limit) {
            llmpar__mpi_idle(world);
            done = llmpar__mpi_all(world, 1) && llmpar__mpi_sent(world) && world->dropped == MPI_REQUEST_NULL;
        }
        world->orderly = done;
        if (!done && !world->aborted) {
            int32_t late = 0;
            llmpar_error error;
            while (late < world->ranks - 1 && (late == world->rank || (world->peer[late].bye && world->peer[late].flushed))) late++;
            llmpar_error_clear(&error);
            llmpar_error_set(&error, LLMPAR_ERR_TIMEOUT, "mpi: rank %d has not confirmed the end of the job within 10 s", (int)late);
            error.rank = late;
            llmpar__mpi_fail_locked(world, &error);
        }
    }
    if (root) {
        if (world->aborted) *root = world->failure;
        else llmpar_error_clear(root);
    }
    pthread_mutex_unlock(&world->lock);
    llmpar__mpi_dismiss(world);
    for (int k = 0; k < 2; k++) {
        MPI_Request *receive = k ? &world->dropped : &world->standing;
        int done = 0;
        if (*receive == MPI_REQUEST_NULL) continue;
        MPI_Cancel(receive);
        for (int i = 0; i < 1000 && !done; i++)
            if (MPI_Test(receive, &done, MPI_STATUS_IGNORE)) break;
    }
    return world->orderly;
}

LLMPAR_DEF void llmpar_mpi_world_destroy(llmpar_mpi_world *world)
{
    if (!world) return;
    llmpar__mpi_dismiss(world);
    if (world->orderly) { /* else messages to the dead are still under way, and freeing may wait for them */
        MPI_Comm_free(&world->data);
        MPI_Comm_free(&world->control);
    }
    llmpar__mpi_free(world);
}

#undef LLMPAR__MPI_NOTE_TAG
#undef LLMPAR__MPI_LAST_TAG
#undef LLMPAR__MPI_LOOK
#undef LLMPAR__MPI_ATTENTION

#endif /* LLMPAR_USE_MPI */
/* ==== src/comm/mpi_wait.c ==== */
/* mpi_wait: messages under way, and how the members of a communicator meet before data moves.

   Meeting. A rank that comes to a collective tells the other members what it is about to do, and waits until it has heard the same from all of them. So nobody moves a byte before everybody is there and
   agrees; whoever differs is reported by all sides. Up to desc.direct members each tells each, and small data travels along. Beyond, in round k (1, 2, 4, ..) rank r tells r+k the call of the
   lowest rank that it has heard of and the lowest call that differs from it; after log2 n rounds everybody has heard of everybody.
   Headers of all communicators have one tag: messages of a pair arrive in order, so a header of another communicator than the awaited one means that the two ranks make their calls in different orders,
   or on different axes: reported at once instead of a deadlock.

   Waiting looks a few times, then gives the processor away (there may be more ranks than processors), then sleeps for ever longer moments. It ends with an error when another rank fails, when a rank
   that has not come has returned from its function, and at the deadline. */

#include <stdio.h>
#include <string.h>

#ifdef LLMPAR_USE_MPI

#include <sched.h>
#include <time.h>

#define LLMPAR__MPI_HEADER_TAG 1
#define LLMPAR__MPI_DATA_TAG 2
#define LLMPAR__MPI_HEADER_BYTES(more) ((int)(offsetof(llmpar__mpi_header, payload) + (more)))
#define LLMPAR__MPI_SETTLE 1.0 /* seconds that a failing rank waits for its own messages */
#define LLMPAR__MPI_GONE 1.0   /* seconds after which the message of a rank that has finished would have come */

typedef struct llmpar__mpi_wait {
    double begin, limit; /* limit 0: none */
    int looks;
} llmpar__mpi_wait;

static void llmpar__mpi_wait_begin(llmpar__mpi_wait *wait, const llmpar_mpi_world *world)
{
    wait->begin = llmpar__mpi_now();
    wait->limit = world->desc.deadline > 0 ? wait->begin + world->desc.deadline : 0;
    wait->looks = 0;
}

/* Between two looks, without the lock. */
static void llmpar__mpi_pause(const llmpar_mpi_world *world, llmpar__mpi_wait *wait)
{
    int looks = wait->looks++;
    if (looks < (world->crowded ? 4 : 2000)) {
        if (world->crowded || looks % 16 == 15) sched_yield();
        return;
    }
    struct timespec t;
    t.tv_sec = 0;
    t.tv_nsec = looks < 2100 ? 20000 : 200000;
    nanosleep(&t, NULL);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__mpi_failed(llmpar__mpi_comm *tc, llmpar_status status)
{
    if (tc->comm.error->rank < 0) tc->comm.error->rank = tc->world->rank;
    if (status != LLMPAR_ERR_PEER) {
        llmpar_error error = *tc->comm.error;
        error.status = status;
        error.rank = tc->world->rank;
        llmpar_mpi_world_fail(tc->world, &error);
    }
    pthread_mutex_lock(&tc->world->lock); /* what is still on its way to this rank keeps its sender, and the sender's buffers, waiting */
    tc->world->draining = 1;
    pthread_mutex_unlock(&tc->world->lock);
    return status;
}

/* Under the lock. */
static llmpar_status llmpar__mpi_peer_error(llmpar__mpi_comm *tc, const llmpar_call *call)
{
    llmpar_mpi_world *world = tc->world;
    char what[320], who[1100];
    llmpar__mpi_seen(world, world->met, 0);
    llmpar__mpi_who(world, who, sizeof who); /* first: it gives the lock away, and a failure may become another */
    llmpar_call_print(call, what, sizeof what);
    const llmpar_error *f = &world->failure;
    return llmpar_error_set(tc->comm.error, LLMPAR_ERR_PEER, "%s: rank %d%s%s%s failed: %s: %.500s; %s", what, (int)f->rank, f->where[0] ? " (" : "", f->where, f->where[0] ? ")" : "", llmpar_status_string(f->status), f->text, who);
}

/* LLMPAR_ERR_PEER in the rank's error if some rank has failed, else LLMPAR_OK. Where ranks disagree, one that comes late meets them all the same: perhaps it is the other side of it. */
static llmpar_status llmpar__mpi_check(llmpar__mpi_comm *tc, const llmpar_call *call)
{
    llmpar_mpi_world *world = tc->world;
    if (!__atomic_load_n(&world->aborted, __ATOMIC_SEQ_CST)) return LLMPAR_OK;
    llmpar_status st = LLMPAR_OK;
    pthread_mutex_lock(&world->lock);
    if (world->failure.status != LLMPAR_ERR_MISMATCH || world->draining || llmpar__mpi_now() > world->failed_at + 1) st = llmpar__mpi_peer_error(tc, call);
    pthread_mutex_unlock(&world->lock);
    return st ? llmpar__mpi_failed(tc, st) : LLMPAR_OK;
}

/* Under the lock: is the wait over for another reason than success? missing: world rank that has not come, -1: not known. */
static llmpar_status llmpar__mpi_hopeless(llmpar__mpi_comm *tc, const llmpar_call *call, const llmpar__mpi_wait *wait, int32_t missing)
{
    llmpar_mpi_world *world = tc->world;
    if (world->aborted) return LLMPAR_ERR_PEER; /* its text comes when the messages are settled */
    int gone = missing >= 0 && world->peer[missing].finished && world->peer[missing].finished_for > LLMPAR__MPI_GONE;
    int late = wait->limit > 0 && llmpar__mpi_now() >= wait->limit;
    if (!gone && !late) return LLMPAR_OK;
    char what[320], who[1100];
    llmpar__mpi_seen(world, world->met, 0);
    llmpar_call_print(call, what, sizeof what);
    llmpar__mpi_who(world, who, sizeof who);
    if (gone) llmpar_error_set(tc->comm.error, LLMPAR_ERR_MISMATCH, "%s: rank %d has returned without it; %s", what, (int)missing, who);
    else llmpar_error_set(tc->comm.error, LLMPAR_ERR_TIMEOUT, "%s: waited %g s for the other ranks; %s", what, world->desc.deadline, who);
    return gone ? LLMPAR_ERR_MISMATCH : LLMPAR_ERR_TIMEOUT;
}

/* Ends a failed call: tells the job, and ends its messages: receives are cancelled, sends are waited for, since their receivers drop what they no longer want. from: as in the world; NULL: the first half
   of the requests are receives. Returns st. */
static llmpar_status llmpar__mpi_settle(llmpar__mpi_comm *tc, const llmpar_call *call, llmpar_status st, MPI_Request *request, const int32_t *from, int32_t count)
{
    llmpar_mpi_world *world = tc->world;
    if (st != LLMPAR_ERR_PEER) llmpar__mpi_failed(tc, st);
    double limit = llmpar__mpi_now() + LLMPAR__MPI_SETTLE;
    int done = 0;
    pthread_mutex_lock(&world->lock);
    for (int32_t i = 0; i < count; i++)
        if (request[i] != MPI_REQUEST_NULL && (from ? from[i] >= 0 : i < count / 2)) MPI_Cancel(&request[i]);
    world->draining = 1;
    while (!done && llmpar__mpi_now() < limit) {
        llmpar__mpi_look(world);
        done = 1;
        for (int32_t i = 0; i < count; i++) {
            int one = 1;
            if (request[i] != MPI_REQUEST_NULL && !MPI_Test(&request[i], &one, MPI_STATUS_IGNORE)) done = done && one;
        }
        if (done) break;
        pthread_mutex_unlock(&world->lock);
        sched_yield();
        pthread_mutex_lock(&world->lock);
    }
    for (int32_t i = 0; i < count; i++)
        if (request[i] != MPI_REQUEST_NULL) { /* to a dead rank */
            MPI_Request_free(&request[i]);
            request[i] = MPI_REQUEST_NULL;
        }
    if (st == LLMPAR_ERR_PEER) llmpar__mpi_peer_error(tc, call);
    pthread_mutex_unlock(&world->lock);
    return st == LLMPAR_ERR_PEER ? llmpar__mpi_failed(tc, st) : st;
}

/* ---- data ---- */

/* Waits until at most `most` messages are under way. */
static llmpar_status llmpar__mpi_until(llmpar__mpi_comm *tc, const llmpar_call *call, int32_t most)
{
    llmpar_mpi_world *world = tc->world;
    llmpar__mpi_wait wait;
    llmpar_status st = LLMPAR_OK;
    MPI_Status status[LLMPAR__MPI_BATCH];
    int finished[LLMPAR__MPI_BATCH], count;
    if (world->posted > most) llmpar__mpi_wait_begin(&wait, world);
    while (world->posted > most && !st) {
        pthread_mutex_lock(&world->lock);
        int code = MPI_Testsome((int)world->posted, world->request, &count, finished, status);
        if (code) st = llmpar__mpi_error(tc->comm.error, "MPI_Testsome", code);
        int32_t left = 0, missing = -1;
        for (int32_t i = 0; i < world->posted && !st; i++) {
            if (world->request[i] == MPI_REQUEST_NULL) continue;
            world->request[left] = world->request[i];
            world->from[left++] = world->from[i];
        }
        if (!st) world->posted = left;
        if (left > most && !st) {
            llmpar__mpi_look(world);
            for (int32_t i = 0; i < left && missing < 0; i++)
                if (world->from[i] >= 0 && world->peer[world->from[i]].finished) missing = world->from[i];
            st = llmpar__mpi_hopeless(tc, call, &wait, missing);
        }
        pthread_mutex_unlock(&world->lock);
        if (world->posted > most && !st) llmpar__mpi_pause(world, &wait);
    }
    if (st) {
        llmpar__mpi_settle(tc, call, st, world->request, world->from, world->posted);
        world->posted = 0;
    }
    return st;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__mpi_complete(llmpar__mpi_comm *tc, const llmpar_call *call) { return llmpar__mpi_until(tc, call, 0); }

LLMPAR__PRIVATE_DEF llmpar_status llmpar__mpi_abandon(llmpar__mpi_comm *tc, const llmpar_call *call, llmpar_status st)
{
    st = llmpar__mpi_settle(tc, call, st, tc->world->request, tc->world->from, tc->world->posted);
    tc->world->posted = 0;
    return st;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__mpi_post(llmpar__mpi_comm *tc, const llmpar_call *call, int receives, int32_t peer, void *memory, size_t bytes)
{
    llmpar_mpi_world *world = tc->world;
    while (bytes) {
        size_t now = bytes < world->desc.comm_slice ? bytes : world->desc.comm_slice;
        if (world->posted == LLMPAR__MPI_BATCH) {
            llmpar_status st = llmpar__mpi_until(tc, call, LLMPAR__MPI_BATCH - 1);
            if (st) return st;
        }
        MPI_Request *request = &world->request[world->posted];
        pthread_mutex_lock(&world->lock);
        int code = receives ? MPI_Irecv(memory, (int)now, MPI_BYTE, (int)tc->member[peer], LLMPAR__MPI_DATA_TAG, world->data, request)
                            : MPI_Isend(memory, (int)now, MPI_BYTE, (int)tc->member[peer], LLMPAR__MPI_DATA_TAG, world->data, request);
        pthread_mutex_unlock(&world->lock);
        if (code) {
            *request = MPI_REQUEST_NULL;
            llmpar_status st = llmpar__mpi_settle(tc, call, llmpar__mpi_error(tc->comm.error, receives ? "MPI_Irecv" : "MPI_Isend", code), world->request, world->from, world->posted);
            world->posted = 0;
            return st;
        }
        world->from[world->posted++] = receives ? tc->member[peer] : -1;
        memory = (char *)memory + now;
        bytes -= now;
    }
    return LLMPAR_OK;
}

/* ---- meeting ---- */

static llmpar_status llmpar__mpi_mismatch(llmpar__mpi_comm *tc, const llmpar_call *a, const llmpar_call *b)
{
    char text[1000];
    llmpar_call_mismatch(a->rank <= b->rank ? a : b, a->rank <= b->rank ? b : a, text, sizeof text);
    return llmpar_error_set(tc->comm.error, LLMPAR_ERR_MISMATCH, "%s", text);
}

/* Waits for world->meeting[0, count) receives into inbox[i] from the members `from[i]`, and count sends behind them. Whoever comes with another communicator's call ends it at once; other differences are
   left to the caller. */
static llmpar_status llmpar__mpi_await(llmpar__mpi_comm *tc, const llmpar_call *call, int32_t count)
{
    llmpar_mpi_world *world = tc->world;
    llmpar__mpi_wait wait;
    llmpar_status st = LLMPAR_OK;
    double differs = 0; /* when a difference was seen: those who have not come by then are not waited for much longer */
    llmpar__mpi_wait_begin(&wait, world);
    for (int left = 1; left && !st;) {
        const llmpar_call *other = NULL, *odd = NULL;
        int32_t missing = -1;
        left = 0;
        pthread_mutex_lock(&world->lock);
        for (int32_t i = 0; i < 2 * count && !st; i++) {
            if (world->meeting[i] == MPI_REQUEST_NULL) continue;
            int done = 0, code = MPI_Test(&world->meeting[i], &done, MPI_STATUS_IGNORE);
            if (code) st = llmpar__mpi_error(tc->comm.error, "MPI_Test", code);
            if (done) continue;
            left = 1;
            if (i < count) missing = i;
        }
        for (int32_t i = 0; i < count; i++) {
            const llmpar__mpi_header *in = &world->inbox[i];
            if (world->meeting[i] != MPI_REQUEST_NULL || in->call.op == LLMPAR_CALL_NONE) continue;
            if (in->context != world->outbox.context && !other) other = &in->call;
            else if (in->context == world->outbox.context && !tc->comm.unchecked && in->fingerprint != world->outbox.fingerprint && !odd) odd = &in->call;
        }
        if (!st && other) st = llmpar__mpi_mismatch(tc, call, other);
        if (!st && left) {
            llmpar__mpi_look(world);
            double now = llmpar__mpi_now();
            if (differs == 0 && (odd || (world->aborted && world->failure.status == LLMPAR_ERR_MISMATCH))) differs = now; /* perhaps the other side of it is on its way here */
            if (differs == 0 || now > differs + 0.5) {
                if (odd) st = llmpar__mpi_mismatch(tc, call, odd);
                else st = llmpar__mpi_hopeless(tc, call, &wait, missing >= 0 ? world->inbox[missing].call.rank : -1);
            }
        }
        pthread_mutex_unlock(&world->lock);
        if (left && !st) llmpar__mpi_pause(world, &wait);
    }
    return st ? llmpar__mpi_settle(tc, call, st, world->meeting, NULL, 2 * count) : LLMPAR_OK;
}

/* Posts the i-th receive of a header, and the send of the outbox to the same or another member. */
static llmpar_status llmpar__mpi_post_header(llmpar__mpi_comm *tc, const llmpar_call *call, int32_t i, int32_t count, int32_t from, int32_t to)
{
    llmpar_mpi_world *world = tc->world;
    llmpar__mpi_header *in = &world->inbox[i];
    in->call.op = (int32_t)LLMPAR_CALL_NONE;
    in->call.rank = tc->member[from];
    pthread_mutex_lock(&world->lock);
    int code = MPI_Irecv(in, (int)sizeof *in, MPI_BYTE, (int)tc->member[from], LLMPAR__MPI_HEADER_TAG, world->data, &world->meeting[i]);
    if (!code) code = MPI_Isend(&world->outbox, LLMPAR__MPI_HEADER_BYTES(world->outbox.bytes), MPI_BYTE, (int)tc->member[to], LLMPAR__MPI_HEADER_TAG, world->data, &world->meeting[count + i]);
    pthread_mutex_unlock(&world->lock);
    if (!code) return LLMPAR_OK;
    return llmpar__mpi_settle(tc, call, llmpar__mpi_error(tc->comm.error, "MPI_Isend", code), world->meeting, NULL, 2 * count);
}

static void llmpar__mpi_pack(llmpar__mpi_comm *tc, const llmpar_call *call, const void *payload, size_t bytes)
{
    llmpar__mpi_header *out = &tc->world->outbox;
    out->fingerprint = llmpar_call_fingerprint(call);
    out->context = tc->context;
    out->call = *call;
    out->bytes = bytes;
    if (bytes) memcpy(out->payload, payload, bytes);
}

/* Each tells each. inbox[i] is member i's, this rank's own included. */
static llmpar_status llmpar__mpi_meet_direct(llmpar__mpi_comm *tc, const llmpar_call *call, const void *payload, size_t bytes)
{
    llmpar_mpi_world *world = tc->world;
    int32_t n = tc->comm.ranks, r = tc->comm.rank;
    llmpar__mpi_pack(tc, call, payload, bytes);
    memcpy(&world->inbox[r], &world->outbox, (size_t)LLMPAR__MPI_HEADER_BYTES(bytes));
    llmpar_status st = LLMPAR_OK;
    for (int32_t i = 0; i < 2 * n; i++) world->meeting[i] = MPI_REQUEST_NULL;
    world->met = n;
    for (int32_t k = 1; k < n && !st; k++) st = llmpar__mpi_post_header(tc, call, (r + k) % n, n, (r + k) % n, (r + k) % n);
    if (!st) st = llmpar__mpi_await(tc, call, n);
    for (int32_t i = 1; i < n && !st && !tc->comm.unchecked; i++)
        if (world->inbox[0].fingerprint != world->inbox[i].fingerprint) st = llmpar__mpi_failed(tc, llmpar__mpi_mismatch(tc, &world->inbox[0].call, &world->inbox[i].call));
    return st;
}

/* What has been heard so far: the lowest rank's call, and the lowest one that differs (op NONE: none). */
static void llmpar__mpi_merge(llmpar_call best[2], const llmpar_call *heard)
{
    llmpar_call later = *heard;
    if (heard->op == LLMPAR_CALL_NONE) return;
    if (heard->rank < best[0].rank) {
        later = best[0];
        best[0] = *heard;
    }
    uint64_t fingerprint = llmpar_call_fingerprint(&best[0]);
    if (best[1].op != LLMPAR_CALL_NONE && llmpar_call_fingerprint(&best[1]) == fingerprint) best[1].op = (int32_t)LLMPAR_CALL_NONE;
    if (llmpar_call_fingerprint(&later) != fingerprint && (best[1].op == LLMPAR_CALL_NONE || later.rank < best[1].rank)) best[1] = later;
}

/* log2 n rounds. */
static llmpar_status llmpar__mpi_meet_rounds(llmpar__mpi_comm *tc, const llmpar_call *call)
{
    llmpar_mpi_world *world = tc->world;
    int32_t n = tc->comm.ranks, r = tc->comm.rank;
    llmpar_call best[2], told;
    best[0] = best[1] = *call;
    best[1].op = (int32_t)LLMPAR_CALL_NONE;
    for (int32_t k = 1; k < n; k *= 2) {
        llmpar__mpi_pack(tc, &best[0], &best[1], sizeof best[1]);
        llmpar_status st = llmpar__mpi_post_header(tc, call, 0, 1, (r - k + n) % n, (r + k) % n);
        if (!st) st = llmpar__mpi_await(tc, call, 1);
        if (st) return st;
        memcpy(&told, world->inbox[0].payload, sizeof told);
        llmpar__mpi_merge(best, &world->inbox[0].call);
        llmpar__mpi_merge(best, &told);
    }
    if (best[1].op != LLMPAR_CALL_NONE && !tc->comm.unchecked) return llmpar__mpi_failed(tc, llmpar__mpi_mismatch(tc, &best[0], &best[1]));
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__mpi_meet(llmpar__mpi_comm *tc, const llmpar_call *call, const void *payload, size_t bytes)
{
    llmpar_status st = llmpar__mpi_check(tc, call);
    tc->world->met = 0;
    if (st) return st;
    return tc->comm.ranks <= tc->world->desc.direct ? llmpar__mpi_meet_direct(tc, call, payload, bytes) : llmpar__mpi_meet_rounds(tc, call);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__mpi_meet_one(llmpar__mpi_comm *tc, const llmpar_call *call, const void *payload, size_t bytes)
{
    llmpar_mpi_world *world = tc->world;
    llmpar_status st = llmpar__mpi_check(tc, call);
    if (st) return st;
    world->met = 1;
    llmpar__mpi_pack(tc, call, payload, bytes);
    st = llmpar__mpi_post_header(tc, call, 0, 1, call->peer, call->peer);
    if (!st) st = llmpar__mpi_await(tc, call, 1);
    if (!st && !tc->comm.unchecked && world->inbox[0].fingerprint != world->outbox.fingerprint) st = llmpar__mpi_failed(tc, llmpar__mpi_mismatch(tc, call, &world->inbox[0].call));
    return st;
}

#undef LLMPAR__MPI_HEADER_TAG
#undef LLMPAR__MPI_DATA_TAG
#undef LLMPAR__MPI_HEADER_BYTES
#undef LLMPAR__MPI_SETTLE
#undef LLMPAR__MPI_GONE

#endif /* LLMPAR_USE_MPI */
/* ==== src/comm/mpi.c ==== */
/* mpi: collectives between processes.

   Every collective: meet (mpi_wait.c: everybody is there and agrees), then move data; what is small has already moved with the meeting. The arithmetic is the device's tree_sum and max, on the rank's own
   thread with stream NULL, as in threads.c; the whole collective is one host call on the stream.

   Reductions go on with the tree over the rank index (docs/exact.md). A node of the tree covers ranks [lo, lo+m) and has two parts: `left` of p ranks, the largest power of two below m, and `right` of q = m - p.
   The sum over a node is spread over its ranks: part j of the result (one a rank of the communicator) lies with rank lo + label(j). At the root label(j) = j, so that part j ends where it belongs; going down,
     label in the left part    c < p ? c : c - p
     label in the right part   c < p ? c mod q : c - p        (c: the label at the node)
   Going up, rank a of the left part keeps the parts with c = a and gives those with c = a + p to rank a of the right part; rank a of the right part keeps c = p + a and gives c = a, a + q, .. < p to those
   ranks of the left part. For powers of two that is recursive halving with the partners r^1, r^2, r^4 ..: log2 n messages, and (n-1)/n of the data.
       n = 4, rank 1 (parts 0 1 2 3):   0 2 -> rank 0, keeps 1 3 of (x0+x1)     1 keeps, 3 -> rank 3: part 1 of (x0+x1)+(x2+x3)
   A slice of at most comm_slice bytes at a time, so scratch is bounded. All-reduce: the same on parts of about equal length, then the parts go to everybody. */

#include <string.h>


#ifdef LLMPAR_USE_MPI

/* A node of the reduction's tree that this rank is in. */
struct llmpar__mpi_level {
    int32_t lo, p, q;
    int32_t left; /* 1: this rank is in the left part */
};

/* The argument of the host call. */
typedef struct llmpar__mpi_job {
    llmpar__mpi_comm *tc;
    const void *send;
    void *recv;
    llmpar_call call;
} llmpar__mpi_job;

/* A slice of a reduction: part j is `bytes(j)` at base + offset(j) of this rank's input. */
typedef struct llmpar__mpi_slice {
    const char *base;
    size_t stride, count; /* stride > 0: part j is `count` elements at j * stride bytes; 0: part j is piece j of `count` elements */
    size_t item, parts;
    void *out;            /* this rank's part of the result */
} llmpar__mpi_slice;

static size_t llmpar__mpi_min(size_t a, size_t b) { return a < b ? a : b; }

static size_t llmpar__mpi_part(const llmpar__mpi_slice *s, size_t j, size_t *count)
{
    if (s->stride) {
        *count = s->count;
        return j * s->stride;
    }
    size_t begin = (size_t)llmpar_piece_begin((int64_t)j, (int64_t)s->count, (int64_t)s->parts);
    *count = (size_t)llmpar_piece_begin((int64_t)j + 1, (int64_t)s->count, (int64_t)s->parts) - begin;
    return begin * s->item;
}

static llmpar_status llmpar__mpi_copy(llmpar__mpi_comm *tc, void *out, const void *in, size_t bytes)
{
    if (!bytes || out == in) return LLMPAR_OK;
    return tc->comm.device->copy(tc->comm.device, NULL, out, in, bytes);
}

static llmpar_status llmpar__mpi_combine(llmpar__mpi_comm *tc, const llmpar_call *call, const void *const *in, int32_t n, size_t count, void *out)
{
    llmpar_device *device = tc->comm.device;
    llmpar_tree_sum_args args;
    if (!count) return LLMPAR_OK;
    memset(&args, 0, sizeof args);
    args.in = in;
    args.n = n;
    args.count = count;
    args.out = out;
    args.dtype = (llmpar_dtype)call->dtype;
    return call->reduce == LLMPAR_MAX ? device->max(device, NULL, &args) : device->tree_sum(device, NULL, &args);
}

/* At least `bytes` of scratch. */
static llmpar_status llmpar__mpi_scratch(llmpar__mpi_comm *tc, const llmpar_call *call, size_t bytes)
{
    llmpar_mpi_world *world = tc->world;
    if (world->scratch_bytes >= bytes) return LLMPAR_OK;
    llmpar_heap_free(world->heap, world->scratch);
    world->scratch_bytes = 0;
    world->scratch = (char *)llmpar_heap_alloc(world->heap, bytes, 1);
    if (!world->scratch) return llmpar_error_set(tc->comm.error, LLMPAR_ERR_MEMORY, "%s \"%s\" on %s: out of memory for %llu bytes of scratch", llmpar_call_op_name((llmpar_call_op)call->op), call->tag, tc->axis, (unsigned long long)bytes);
    world->scratch_bytes = bytes;
    return LLMPAR_OK;
}

/* Gives the held parts with label c at this level to the member `to`. A single part of the input goes from where it is; else they are packed behind `pack`. */
static llmpar_status llmpar__mpi_give(llmpar__mpi_comm *tc, const llmpar_call *call, const llmpar__mpi_slice *s, int32_t l, int32_t held, int32_t c, int32_t to, size_t room, const char *partial, char **pack)
{
    const int32_t *label = tc->label + (size_t)l * s->parts, *kept = tc->kept;
    char *begin = *pack, *only = NULL;
    size_t bytes = 0, parts = 0, count;
    llmpar_status st = LLMPAR_OK;
    for (int32_t i = 0; i < held && !st; i++) {
        if (label[kept[i]] != c) continue;
        size_t offset = llmpar__mpi_part(s, (size_t)kept[i], &count);
        const char *from = partial ? partial + (size_t)i * room : s->base + offset;
        if (parts == 1) { /* not the only one after all */
            st = llmpar__mpi_copy(tc, begin, only, bytes);
            *pack += room;
        }
        if (parts) {
            if (!st) st = llmpar__mpi_copy(tc, *pack, from, count * s->item);
            *pack += room;
        }
        only = (char *)(uintptr_t)from;
        bytes = count * s->item;
        parts++;
    }
    if (st || !parts) return st;
    return llmpar__mpi_post(tc, call, 0, to, parts == 1 ? only : begin, parts == 1 ? bytes : (parts - 1) * room + bytes);
}

/* Reduces one slice. */
static llmpar_status llmpar__mpi_halve(llmpar__mpi_comm *tc, const llmpar_call *call, const llmpar__mpi_slice *s)
{
    size_t n = s->parts, room = (s->stride ? s->count : (s->count + n - 1) / n) * s->item, count;
    size_t keep = (size_t)tc->most_kept * room, give = (size_t)tc->most_given * room;
    llmpar_status st = llmpar__mpi_scratch(tc, call, 2 * keep + give);
    if (st) return st;
    char *partial = tc->world->scratch, *incoming = partial + keep, *pack;
    int32_t held = (int32_t)n, *kept = tc->kept;
    for (int32_t i = 0; i < held; i++) kept[i] = i;
    for (int32_t l = 0; l < tc->levels && !st; l++) {
        const struct llmpar__mpi_level *level = &tc->level[l];
        const int32_t *label = tc->label + (size_t)l * n;
        int32_t a = tc->comm.rank - level->lo - (level->left ? 0 : level->p), mine = level->left ? a : level->p + a, keeps = 0;
        int32_t partner = level->left ? level->lo + level->p + a % level->q : level->lo + a;
        const char *held_partial = l ? partial : NULL;
        size_t expected = 0;
        pack = incoming + keep;
        for (int32_t i = 0; i < held; i++)
            if (label[kept[i]] == mine) {
                llmpar__mpi_part(s, (size_t)kept[i], &count);
                expected = (size_t)keeps++ * room + count * s->item;
            }
        st = llmpar__mpi_post(tc, call, 1, partner, incoming, expected);
        if (level->left) {
            if (a < level->q && !st) st = llmpar__mpi_give(tc, call, s, l, held, a + level->p, level->lo + level->p + a, room, held_partial, &pack);
        } else {
            for (int32_t c = a; c < level->p && !st; c += level->q) st = llmpar__mpi_give(tc, call, s, l, held, c, level->lo + c, room, held_partial, &pack);
        }
        if (!st) st = llmpar__mpi_complete(tc, call);
        keeps = 0;
        for (int32_t i = 0; i < held && !st; i++) {
            if (label[kept[i]] != mine) continue;
            size_t offset = llmpar__mpi_part(s, (size_t)kept[i], &count);
            const void *own = l ? partial + (size_t)i * room : s->base + offset, *theirs = incoming + (size_t)keeps * room, *in[2];
            in[0] = level->left ? own : theirs;
            in[1] = level->left ? theirs : own;
            st = llmpar__mpi_combine(tc, call, in, 2, count, l + 1 == tc->levels ? s->out : (void *)(partial + (size_t)keeps * room));
            kept[keeps++] = kept[i];
        }
        held = keeps;
    }
    return st;
}

/* Parts that go from rank to rank: part i of the receiver comes from rank i. Own parts have been copied. Receives and sends take turns, and all ranks are of one size: so the rank that is furthest behind
   never waits for a message that is not yet on its way, however few may be under way. */
static llmpar_status llmpar__mpi_exchange(llmpar__mpi_comm *tc, const llmpar_call *call, size_t blocks, const char *send, char *recv, size_t part, int all_to_all)
{
    size_t n = (size_t)tc->comm.ranks, r = (size_t)tc->comm.rank;
    llmpar_status st = LLMPAR_OK;
    for (size_t k = 1; k < n && !st; k++) {
        size_t to = (r + k) % n, from = (r + n - k) % n;
        for (size_t b = 0; b < blocks && !st; b++) {
            char *in = recv + (b * n + from) * part, *out = (char *)(uintptr_t)send + (all_to_all ? b * n + to : b) * part;
            for (size_t at = 0; at < part && !st; at += tc->world->desc.comm_slice) {
                size_t now = llmpar__mpi_min(tc->world->desc.comm_slice, part - at);
                st = llmpar__mpi_post(tc, call, 1, (int32_t)from, in + at, now);
                if (!st) st = llmpar__mpi_post(tc, call, 0, (int32_t)to, out + at, now);
            }
        }
    }
    return st ? st : llmpar__mpi_complete(tc, call);
}

static llmpar_status llmpar__mpi_reduce_scatter_large(llmpar__mpi_comm *tc, const llmpar_call *call, const char *send, char *recv, size_t item)
{
    size_t n = (size_t)tc->comm.ranks, part = (size_t)call->count * item, step = tc->world->desc.comm_slice / n / item;
    llmpar__mpi_slice s;
    llmpar_status st = LLMPAR_OK;
    memset(&s, 0, sizeof s);
    s.item = item;
    s.parts = n;
    s.stride = part;
    if (!step) step = 1;
    for (size_t b = 0; b < call->blocks; b++)
        for (size_t at = 0; at < call->count && !st; at += step) {
            s.base = send + b * n * part + at * item;
            s.count = llmpar__mpi_min(step, (size_t)call->count - at);
            s.out = recv + b * part + at * item;
            st = llmpar__mpi_halve(tc, call, &s);
        }
    return st;
}

static llmpar_status llmpar__mpi_all_reduce_large(llmpar__mpi_comm *tc, const llmpar_call *call, const char *send, char *recv, size_t item)
{
    size_t n = (size_t)tc->comm.ranks, r = (size_t)tc->comm.rank, total = (size_t)(call->count * call->blocks), step = tc->world->desc.comm_slice / item;
    llmpar__mpi_slice s;
    llmpar_status st = LLMPAR_OK;
    memset(&s, 0, sizeof s);
    s.item = item;
    s.parts = n;
    if (step < n) step = n;
    for (size_t at = 0; at < total && !st; at += step) {
        size_t mine, theirs;
        s.base = send + at * item;
        s.count = llmpar__mpi_min(step, total - at);
        char *out = recv + at * item, *own = out + llmpar__mpi_part(&s, r, &mine);
        s.out = own;
        st = llmpar__mpi_halve(tc, call, &s);
        for (size_t k = 1; k < n && !st; k++) {
            size_t from = (r + n - k) % n, offset = llmpar__mpi_part(&s, from, &theirs);
            st = llmpar__mpi_post(tc, call, 1, (int32_t)from, out + offset, theirs * item);
            if (!st) st = llmpar__mpi_post(tc, call, 0, (int32_t)((r + k) % n), own, mine * item);
        }
        if (!st) st = llmpar__mpi_complete(tc, call);
    }
    return st;
}

/* A binomial tree below the root, slice by slice. */
static llmpar_status llmpar__mpi_broadcast_large(llmpar__mpi_comm *tc, const llmpar_call *call, char *buffer, size_t bytes)
{
    int32_t n = tc->comm.ranks, v = (tc->comm.rank - call->root + n) % n, mask = 1;
    llmpar_status st = LLMPAR_OK;
    while (mask < n && !(v & mask)) mask *= 2;
    for (size_t at = 0; at < bytes && !st; at += tc->world->desc.comm_slice) {
        size_t now = llmpar__mpi_min(tc->world->desc.comm_slice, bytes - at);
        if (v) {
            st = llmpar__mpi_post(tc, call, 1, (v - mask + call->root) % n, buffer + at, now);
            if (!st) st = llmpar__mpi_complete(tc, call);
        }
        for (int32_t child = mask / 2; child >= 1 && !st; child /= 2)
            if (v + child < n) st = llmpar__mpi_post(tc, call, 0, (v + child + call->root) % n, buffer + at, now);
    }
    return st ? st : llmpar__mpi_complete(tc, call);
}

/* Everything that fits beside the headers: the payloads of all ranks are here. */
static llmpar_status llmpar__mpi_small(llmpar__mpi_comm *tc, const llmpar_call *call, char *recv, size_t part)
{
    llmpar_mpi_world *world = tc->world;
    const void *in[256];
    size_t n = (size_t)tc->comm.ranks, r = (size_t)tc->comm.rank;
    llmpar_status st = LLMPAR_OK;
    switch (call->op) {
    case LLMPAR_CALL_ALL_REDUCE:
        for (size_t i = 0; i < n; i++) in[i] = world->inbox[i].payload;
        return llmpar__mpi_combine(tc, call, in, (int32_t)n, (size_t)(call->count * call->blocks), recv);
    case LLMPAR_CALL_REDUCE_SCATTER:
        for (size_t b = 0; b < call->blocks && !st; b++) {
            for (size_t i = 0; i < n; i++) in[i] = world->inbox[i].payload + (b * n + r) * part;
            st = llmpar__mpi_combine(tc, call, in, (int32_t)n, (size_t)call->count, recv + b * part);
        }
        return st;
    case LLMPAR_CALL_BROADCAST: return recv ? llmpar__mpi_copy(tc, recv, world->inbox[call->root].payload, part * (size_t)call->blocks) : LLMPAR_OK;
    default: /* all_gather, all_to_all */
        for (size_t i = 0; i < n; i++)
            for (size_t b = 0; b < call->blocks && !st; b++)
                st = llmpar__mpi_copy(tc, recv + (b * n + i) * part, world->inbox[i].payload + (call->op == LLMPAR_CALL_ALL_TO_ALL ? b * n + r : b) * part, part);
        return st;
    }
}

static llmpar_status llmpar__mpi_large(llmpar__mpi_comm *tc, const llmpar_call *call, const char *send, char *recv, size_t part, size_t item)
{
    size_t n = (size_t)tc->comm.ranks, r = (size_t)tc->comm.rank, blocks = (size_t)call->blocks;
    llmpar_status st = LLMPAR_OK;
    switch (call->op) {
    case LLMPAR_CALL_ALL_GATHER:
        for (size_t b = 0; b < blocks && !st; b++) st = llmpar__mpi_copy(tc, recv + (b * n + r) * part, send + b * part, part);
        return st ? st : llmpar__mpi_exchange(tc, call, blocks, send, recv, part, 0);
    case LLMPAR_CALL_ALL_TO_ALL:
        for (size_t b = 0; b < blocks && !st; b++) st = llmpar__mpi_copy(tc, recv + (b * n + r) * part, send + (b * n + r) * part, part);
        return st ? st : llmpar__mpi_exchange(tc, call, blocks, send, recv, part, 1);
    case LLMPAR_CALL_REDUCE_SCATTER: return llmpar__mpi_reduce_scatter_large(tc, call, send, recv, item);
    case LLMPAR_CALL_ALL_REDUCE: return llmpar__mpi_all_reduce_large(tc, call, send, recv, item);
    case LLMPAR_CALL_BROADCAST:
        st = llmpar__mpi_broadcast_large(tc, call, (int32_t)r == call->root ? (char *)(uintptr_t)send : recv, part * blocks);
        return st || (int32_t)r != call->root || !recv ? st : llmpar__mpi_copy(tc, recv, send, part * blocks);
    default: return LLMPAR_OK;
    }
}

/* The host function of every collective. */
static llmpar_status llmpar__mpi_run(void *arg)
{
    const llmpar__mpi_job *job = (const llmpar__mpi_job *)arg;
    const llmpar_call *call = &job->call;
    llmpar__mpi_comm *tc = job->tc;
    size_t n = (size_t)tc->comm.ranks, item = llmpar_dtype_size((llmpar_dtype)call->dtype), part = (size_t)call->count * item, bytes = part * (size_t)call->blocks; /* a barrier has none */
    int sends = call->op == LLMPAR_CALL_SEND;
    llmpar_status st;
    if (sends || call->op == LLMPAR_CALL_RECV) {
        int small = bytes <= LLMPAR__MPI_INLINE;
        st = llmpar__mpi_meet_one(tc, call, job->send, sends && small ? bytes : 0);
        if (!st && small && !sends) st = llmpar__mpi_copy(tc, job->recv, tc->world->inbox[0].payload, bytes);
        if (!st && !small) st = llmpar__mpi_post(tc, call, !sends, call->peer, sends ? (void *)(uintptr_t)job->send : job->recv, bytes);
        if (!st) st = llmpar__mpi_complete(tc, call);
    } else {
        if (call->op == LLMPAR_CALL_REDUCE_SCATTER || call->op == LLMPAR_CALL_ALL_TO_ALL) bytes *= n;
        int small = bytes <= LLMPAR__MPI_INLINE && tc->comm.ranks <= tc->world->desc.direct, silent = call->op == LLMPAR_CALL_BROADCAST && call->root != tc->comm.rank;
        st = llmpar__mpi_meet(tc, call, job->send, small && !silent ? bytes : 0);
        if (!st && bytes) st = small ? llmpar__mpi_small(tc, call, (char *)job->recv, part) : llmpar__mpi_large(tc, call, (const char *)job->send, (char *)job->recv, part, item);
    }
    if (st && tc->world->posted) return llmpar__mpi_abandon(tc, call, st); /* the device's */
    if (st) return llmpar__mpi_failed(tc, st);                             /* the device's, or told already */
    pthread_mutex_lock(&tc->world->lock);
    llmpar__mpi_seen(tc->world, tc->world->met, 1);
    tc->world->met = 0;
    pthread_mutex_unlock(&tc->world->lock);
    return LLMPAR_OK;
}

static llmpar_status llmpar__mpi_enqueue(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *given, llmpar_call_op op)
{
    llmpar__mpi_job job;
    memset(&job, 0, sizeof job);
    job.tc = (llmpar__mpi_comm *)comm->state;
    job.send = given->send;
    job.recv = given->recv;
    llmpar_call_describe(comm, op, given, &job.call);
    if (job.call.rank < 0) job.call.rank = job.tc->world->rank;
    return comm->device->host_call(comm->device, stream, llmpar__mpi_run, &job, sizeof job);
}

static llmpar_status llmpar__mpi_all_gather(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return llmpar__mpi_enqueue(comm, stream, call, LLMPAR_CALL_ALL_GATHER); }
static llmpar_status llmpar__mpi_reduce_scatter(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return llmpar__mpi_enqueue(comm, stream, call, LLMPAR_CALL_REDUCE_SCATTER); }
static llmpar_status llmpar__mpi_all_reduce(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return llmpar__mpi_enqueue(comm, stream, call, LLMPAR_CALL_ALL_REDUCE); }
static llmpar_status llmpar__mpi_broadcast(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return llmpar__mpi_enqueue(comm, stream, call, LLMPAR_CALL_BROADCAST); }
static llmpar_status llmpar__mpi_all_to_all(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return llmpar__mpi_enqueue(comm, stream, call, LLMPAR_CALL_ALL_TO_ALL); }
static llmpar_status llmpar__mpi_send(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return llmpar__mpi_enqueue(comm, stream, call, LLMPAR_CALL_SEND); }
static llmpar_status llmpar__mpi_recv(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return llmpar__mpi_enqueue(comm, stream, call, LLMPAR_CALL_RECV); }
static llmpar_status llmpar__mpi_barrier(llmpar_comm *comm, llmpar_stream *stream, const char *tag)
{
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.tag = tag;
    return llmpar__mpi_enqueue(comm, stream, &call, LLMPAR_CALL_BARRIER);
}

static void llmpar__mpi_abort(llmpar_comm *comm, const llmpar_error *error)
{
    llmpar__mpi_comm *tc = (llmpar__mpi_comm *)comm->state;
    llmpar_error mine = *error;
    if (mine.rank < 0) mine.rank = tc->world->rank;
    llmpar_mpi_world_fail(tc->world, &mine);
}

/* ---- communicators ---- */

static void llmpar__mpi_destroy(llmpar_comm *comm)
{
    llmpar__mpi_comm *tc = (llmpar__mpi_comm *)comm->state;
    llmpar_heap *heap = tc->world->heap;
    llmpar_heap_free(heap, tc->member);
    llmpar_heap_free(heap, tc->level);
    llmpar_heap_free(heap, tc->label);
    llmpar_heap_free(heap, tc->kept);
    llmpar_heap_free(heap, tc);
}

static llmpar_status llmpar__mpi_split(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out);

/* The path from this rank's leaf up to the root, and the labels of all parts along it. */
static void llmpar__mpi_plan(llmpar__mpi_comm *tc)
{
    int32_t n = tc->comm.ranks, r = tc->comm.rank, lo = 0, m = n, l = tc->levels;
    while (m > 1) {
        int32_t p = (int32_t)llmpar_tree_split(m), *label = tc->label + (size_t)--l * (size_t)n;
        const int32_t *above = label + n;
        struct llmpar__mpi_level *level = &tc->level[l];
        for (int32_t j = 0; j < n; j++) {
            int32_t c = j;
            if (l + 1 < tc->levels) { /* from the node above */
                const struct llmpar__mpi_level *up = level + 1;
                c = above[j];
                if (up->left) c = c < up->p ? c : c - up->p;
                else c = c < up->p ? c % up->q : c - up->p;
            }
            label[j] = c;
        }
        level->lo = lo;
        level->p = p;
        level->q = m - p;
        level->left = r < lo + p;
        int32_t a = level->left ? r - lo : r - lo - p, keeps = 0, gives = 0;
        for (int32_t j = 0; j < n; j++) {
            keeps += label[j] == (level->left ? a : p + a);
            gives += level->left ? label[j] == a + p : label[j] < p && label[j] % level->q == a;
        }
        if (keeps > tc->most_kept) tc->most_kept = keeps;
        if (gives > tc->most_given) tc->most_given = gives;
        if (level->left) m = p;
        else lo += p, m -= p;
    }
}

/* A communicator of these world ranks (copied). Local. */
static llmpar_status llmpar__mpi_make(llmpar_mpi_world *world, const int32_t *member, int32_t ranks, int32_t rank, uint64_t context, const char *name, llmpar_device *device, llmpar_error *error, llmpar_comm **out)
{
    llmpar_heap *heap = world->heap;
    llmpar__mpi_comm *tc = (llmpar__mpi_comm *)llmpar_heap_zalloc(heap, 1, sizeof *tc);
    if (!tc) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "communicator %.23s: out of memory", name);
    llmpar_comm *comm = &tc->comm;
    int32_t lo = 0;
    for (int32_t m = ranks; m > 1; tc->levels++) {
        int32_t p = (int32_t)llmpar_tree_split(m);
        if (rank < lo + p) m = p;
        else lo += p, m -= p;
    }
    tc->world = world;
    tc->context = context;
    tc->member = (int32_t *)llmpar_heap_alloc(heap, (size_t)ranks, sizeof *tc->member);
    tc->level = (struct llmpar__mpi_level *)llmpar_heap_zalloc(heap, (size_t)tc->levels, sizeof *tc->level);
    tc->label = (int32_t *)llmpar_heap_zalloc(heap, (size_t)tc->levels * (size_t)ranks, sizeof *tc->label);
    tc->kept = (int32_t *)llmpar_heap_zalloc(heap, (size_t)ranks, sizeof *tc->kept);
    comm->state = tc;
    if (!tc->member || !tc->level || !tc->label || !tc->kept) {
        llmpar__mpi_destroy(comm);
        return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "communicator %.23s: out of memory for %d ranks", name, (int)ranks);
    }
    memcpy(tc->member, member, (size_t)ranks * sizeof *member);
    memcpy(tc->axis, name, llmpar__mpi_min(strlen(name), sizeof tc->axis - 1));
    comm->abi = LLMPAR_COMM_ABI;
    comm->size = (uint32_t)sizeof *comm;
    comm->rank = rank;
    comm->ranks = ranks;
    comm->axis = tc->axis;
    comm->device = device;
    comm->error = error;
    comm->split = llmpar__mpi_split;
    comm->destroy = llmpar__mpi_destroy;
    comm->barrier = llmpar__mpi_barrier;
    comm->all_gather = llmpar__mpi_all_gather;
    comm->reduce_scatter = llmpar__mpi_reduce_scatter;
    comm->all_reduce = llmpar__mpi_all_reduce;
    comm->broadcast = llmpar__mpi_broadcast;
    comm->all_to_all = llmpar__mpi_all_to_all;
    comm->send = llmpar__mpi_send;
    comm->recv = llmpar__mpi_recv;
    comm->abort = llmpar__mpi_abort;
    comm->unchecked = world->desc.unchecked;
    llmpar__mpi_plan(tc);
    if (llmpar_record_attach(world->record, comm, member)) {
        llmpar__mpi_destroy(comm);
        return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "communicator %.23s: out of memory for its record", name);
    }
    *out = comm;
    return LLMPAR_OK;
}

/* What the ranks show each other at a split. Plain bytes. */
typedef struct llmpar__mpi_place {
    int32_t color, key;
    uint64_t next_context;
} llmpar__mpi_place;

/* Every rank sees all places and works out its own communicator from them: no further message. Contexts: one above all that a member has been part of. */
static llmpar_status llmpar__mpi_split_places(llmpar__mpi_comm *tc, int32_t color, int32_t key, const char *name, llmpar__mpi_place *place, int32_t *member, llmpar_comm **out)
{
    llmpar_mpi_world *world = tc->world;
    llmpar_call call;
    llmpar_collective named;
    int32_t n = tc->comm.ranks, r = tc->comm.rank, ranks = 0, rank = 0;
    memset(&named, 0, sizeof named);
    named.tag = name;
    llmpar_call_describe(&tc->comm, LLMPAR_CALL_SPLIT, &named, &call);
    if (call.rank < 0) call.rank = tc->world->rank;
    place[r].color = color;
    place[r].key = key;
    place[r].next_context = world->next_context;
    llmpar_status st = llmpar__mpi_meet(tc, &call, NULL, 0);
    if (!st) st = llmpar__mpi_exchange(tc, &call, 1, (const char *)&place[r], (char *)place, sizeof *place, 0);
    if (st) return st;
    uint64_t context = 0;
    for (int32_t i = 0; i < n; i++)
        if (place[i].next_context > context) context = place[i].next_context;
    world->next_context = context + 1;
    for (int32_t i = 0; i < n && color >= 0; i++) {
        int32_t at = 0;
        if (place[i].color != color) continue;
        for (int32_t j = 0; j < n; j++)
            if (place[j].color == color && (place[j].key < place[i].key || (place[j].key == place[i].key && j < i))) at++;
        member[at] = tc->member[i];
        if (i == r) rank = at;
        ranks++;
    }
    if (color < 0) return LLMPAR_OK;
    return llmpar__mpi_make(world, member, ranks, rank, context, name, tc->comm.device, tc->comm.error, out);
}

static llmpar_status llmpar__mpi_split(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out)
{
    llmpar__mpi_comm *tc = (llmpar__mpi_comm *)comm->state;
    llmpar_heap *heap = tc->world->heap;
    llmpar__mpi_place *place = (llmpar__mpi_place *)llmpar_heap_zalloc(heap, (size_t)comm->ranks, sizeof *place);
    int32_t *member = (int32_t *)llmpar_heap_alloc(heap, (size_t)comm->ranks, sizeof *member);
    *out = NULL;
    llmpar_status st = place && member ? llmpar__mpi_split_places(tc, color, key, name, place, member, out)
                                       : llmpar_error_set(comm->error, LLMPAR_ERR_MEMORY, "split \"%s\" of %s: out of memory for %d ranks", name, comm->axis, (int)comm->ranks);
    llmpar_heap_free(heap, place);
    llmpar_heap_free(heap, member);
    return st ? llmpar__mpi_failed(tc, st) : LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_mpi_comm_create(llmpar_mpi_world *world, llmpar_device *device, llmpar_error *error, llmpar_comm **out)
{
    *out = NULL;
    int32_t *all = (int32_t *)llmpar_heap_alloc(world->heap, (size_t)world->ranks, sizeof *all);
    if (!all) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "communicator world: out of memory for %d ranks", (int)world->ranks);
    for (int32_t i = 0; i < world->ranks; i++) all[i] = i;
    llmpar_status st = llmpar__mpi_make(world, all, world->ranks, world->rank, 0, "world", device, error, out);
    llmpar_heap_free(world->heap, all);
    return st;
}

#endif /* LLMPAR_USE_MPI */

/* ==== src/io/file.c ==== */

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#if !defined(LLMPAR_NO_IO)

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

#endif /* LLMPAR_NO_IO */
/* ==== src/io/safetensors.c ==== */

#include <stdio.h>
#include <string.h>

#if !defined(LLMPAR_NO_IO)

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

#endif /* LLMPAR_NO_IO */

/* ==== src/mesh/mesh.c ==== */
/* mesh: world ranks on five named axes, and the communicators along them. */
/* ==== src/mesh/mesh_internal.h ==== */
/* mesh_internal: what the files of this room share. */
#ifndef LLMPAR_MESH_INTERNAL_H
#define LLMPAR_MESH_INTERNAL_H


/* Appends to text[capacity] at *used like snprintf, also past the capacity: *used counts what the whole needs. */
LLMPAR__PRIVATE void llmpar__mesh_append(char *text, size_t capacity, size_t *used, const char *format, ...) LLMPAR_PRINTF(4, 5);
/* The coordinate of a world rank. */
LLMPAR__PRIVATE void llmpar__mesh_coordinate(const int32_t degree[LLMPAR_MESH_AXES], int32_t rank, int32_t coordinate[LLMPAR_MESH_AXES]);
/* "wq f32[8,6]" */
LLMPAR__PRIVATE void llmpar__mesh_append_tensor(char *text, size_t capacity, size_t *used, const llmpar_dtensor *tensor);
/* " dp_shard=1 tp=0": the axes of more than one rank. */
LLMPAR__PRIVATE void llmpar__mesh_append_coordinate(char *text, size_t capacity, size_t *used, const int32_t degree[LLMPAR_MESH_AXES], const int32_t coordinate[LLMPAR_MESH_AXES]);

/* A box of the global tensor, dim d from begin[d] to end[d]. What a rank holds (a range of a rectangle's row-major elements) is a few of them, in row-major order:

     . . # #    the range [2, 11) of a rectangle of 4 x 4: the rest of a row, whole rows, the start of a row
     # # # #
     # # # .
     . . . .                                                                                               */
typedef struct llmpar__box { int64_t begin[LLMPAR_MAX_DIMS], end[LLMPAR_MAX_DIMS]; } llmpar__box;
#define LLMPAR__BOXES (2 * LLMPAR_MAX_DIMS - 1)
/* The non-empty boxes of `part`; returns how many. */
LLMPAR__PRIVATE int32_t llmpar__mesh_boxes(const llmpar_local *part, int32_t dims, llmpar__box box[LLMPAR__BOXES]);
/* The common boxes of two parts; returns how many, *volume = their elements together. Two parts that meet in the same boxes on two ranks list them in the same order. */
LLMPAR__PRIVATE int32_t llmpar__mesh_common(const llmpar_local *a, const llmpar_local *b, int32_t dims, llmpar__box box[LLMPAR__BOXES * LLMPAR__BOXES], int64_t *volume);

#endif
/* ---- src/mesh/mesh.c goes on ---- */

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#if defined(__linux__)
#include <sys/prctl.h>
#endif

LLMPAR_DEF const char *llmpar_axis_name(llmpar_axis axis)
{
    static const char *const names[] = { "dp_replicate", "dp_shard", "cp", "pp", "tp" };
    return (unsigned)axis < LLMPAR_MESH_AXES ? names[axis] : "?";
}

LLMPAR_DEF llmpar_status llmpar_mesh_desc_resolve(llmpar_mesh_desc *desc, int32_t world, llmpar_error *error)
{
    int32_t *const degree[LLMPAR_MESH_AXES] = { &desc->dp_replicate, &desc->dp_shard, &desc->cp, &desc->pp, &desc->tp };
    int64_t product = 1;
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) {
        if (*degree[a] == 0) *degree[a] = 1;
        if (*degree[a] < 0) return llmpar_error_set(error, LLMPAR_ERR_MESH, "mesh: %s = %d, expected a degree of at least 1", llmpar_axis_name((llmpar_axis)a), (int)*degree[a]);
    }
    for (int a = LLMPAR_AXIS_CP; a <= LLMPAR_AXIS_PP; a++)
        if (*degree[a] > 1) return llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "mesh: %s = %d: this axis is reserved and not built yet, expected 1", llmpar_axis_name((llmpar_axis)a), (int)*degree[a]);
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) product *= product > INT32_MAX ? 1 : *degree[a]; /* too large already: no overflow */
    if (product != world)
        return llmpar_error_set(error, LLMPAR_ERR_MESH, "mesh: dp_replicate %d x dp_shard %d x cp %d x pp %d x tp %d = %s%lld ranks, but the world has %d", (int)desc->dp_replicate,
                                (int)desc->dp_shard, (int)desc->cp, (int)desc->pp, (int)desc->tp, product > INT32_MAX ? "more than " : "", (long long)(product > INT32_MAX ? INT32_MAX : product), (int)world);
    return LLMPAR_OK;
}

LLMPAR_DEF int32_t llmpar_mesh_rank_at(const llmpar_mesh *mesh, const int32_t coordinate[LLMPAR_MESH_AXES])
{
    int32_t rank = 0;
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) rank = rank * mesh->degree[a] + coordinate[a];
    return rank;
}

LLMPAR__PRIVATE_DEF void llmpar__mesh_append(char *text, size_t capacity, size_t *used, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int n = vsnprintf(*used < capacity ? text + *used : NULL, *used < capacity ? capacity - *used : 0, format, args);
    va_end(args);
    if (n > 0) *used += (size_t)n;
}

LLMPAR__PRIVATE_DEF void llmpar__mesh_append_coordinate(char *text, size_t capacity, size_t *used, const int32_t degree[LLMPAR_MESH_AXES], const int32_t coordinate[LLMPAR_MESH_AXES])
{
    for (int a = 0; a < LLMPAR_MESH_AXES; a++)
        if (degree[a] > 1) llmpar__mesh_append(text, capacity, used, " %s=%d", llmpar_axis_name((llmpar_axis)a), (int)coordinate[a]);
}

LLMPAR__PRIVATE_DEF void llmpar__mesh_coordinate(const int32_t degree[LLMPAR_MESH_AXES], int32_t rank, int32_t coordinate[LLMPAR_MESH_AXES])
{
    for (int a = LLMPAR_MESH_AXES - 1; a >= 0; a--) {
        coordinate[a] = rank % degree[a];
        rank /= degree[a];
    }
}

/* Thread names are for debuggers: "r3" becomes "r3 tp1", and only where launch has given that name. */
static void llmpar__mesh_name_thread(const llmpar_mesh *mesh)
{
#if defined(__linux__)
    char now[16], plain[16], full[32];
    memset(now, 0, sizeof now);
    snprintf(plain, sizeof plain, "r%d", (int)mesh->ctx->rank);
    if (mesh->degree[LLMPAR_AXIS_TP] == 1 || prctl(PR_GET_NAME, now, 0, 0, 0) || strcmp(now, plain)) return;
    snprintf(full, sizeof full, "r%d tp%d", (int)mesh->ctx->rank, (int)mesh->coordinate[LLMPAR_AXIS_TP]);
    prctl(PR_SET_NAME, full, 0, 0, 0); /* the kernel cuts at 15 characters */
#else
    (void)mesh;
#endif
}

LLMPAR_DEF llmpar_status llmpar_mesh_create(llmpar_ctx *ctx, const llmpar_mesh_desc *given, llmpar_mesh **out)
{
    *out = NULL;
    llmpar_mesh_desc desc = *given;
    llmpar_error error;
    llmpar_error_clear(&error);
    llmpar_status st = llmpar_mesh_desc_resolve(&desc, ctx->world, &error);
    if (st) return llmpar_fail(ctx, st, "%s", error.text);
    const llmpar_device *device = ctx->device; /* whoever brings an own one is told here, before anything is called */
    if (device->abi != LLMPAR_DEVICE_ABI || device->size < sizeof *device)
        return llmpar_fail(ctx, LLMPAR_ERR_ABI, "mesh: device table with abi %u and %u bytes, expected abi %u and at least %lu bytes", (unsigned)device->abi, (unsigned)device->size, LLMPAR_DEVICE_ABI, (unsigned long)sizeof *device);
    llmpar_mesh *mesh = (llmpar_mesh *)llmpar_heap_zalloc(&ctx->heap, 1, sizeof *mesh);
    if (!mesh) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "mesh: out of memory");
    mesh->ctx = ctx;
    mesh->world = ctx->comm;
    int32_t *const degree = mesh->degree;
    degree[LLMPAR_AXIS_DP_REPLICATE] = desc.dp_replicate;
    degree[LLMPAR_AXIS_DP_SHARD] = desc.dp_shard;
    degree[LLMPAR_AXIS_CP] = desc.cp;
    degree[LLMPAR_AXIS_PP] = desc.pp;
    degree[LLMPAR_AXIS_TP] = desc.tp;
    llmpar__mesh_coordinate(degree, ctx->rank, mesh->coordinate);
    mesh->dp_ranks = degree[LLMPAR_AXIS_DP_REPLICATE] * degree[LLMPAR_AXIS_DP_SHARD];
    mesh->dp_rank = mesh->coordinate[LLMPAR_AXIS_DP_REPLICATE] * degree[LLMPAR_AXIS_DP_SHARD] + mesh->coordinate[LLMPAR_AXIS_DP_SHARD];
    char where[sizeof mesh->where + 1] = "";
    size_t used = 0;
    llmpar__mesh_append_coordinate(where, sizeof where, &used, degree, mesh->coordinate);
    if (used) memcpy(mesh->where, where + 1, sizeof mesh->where); /* without the blank before it */
    if (ctx->error.status == LLMPAR_OK) memcpy(ctx->error.where, mesh->where, sizeof mesh->where);
    llmpar__mesh_name_thread(mesh);

    /* The ranks of an axis share all other coordinates: the color is the world rank at coordinate 0. */
    for (int a = 0; a <= LLMPAR_MESH_AXES && !st; a++) {
        int32_t first[LLMPAR_MESH_AXES];
        memcpy(first, mesh->coordinate, sizeof first);
        int flat = a == LLMPAR_MESH_AXES;
        if (flat) first[LLMPAR_AXIS_DP_REPLICATE] = first[LLMPAR_AXIS_DP_SHARD] = 0;
        else first[a] = 0;
        st = llmpar_comm_split(ctx->comm, llmpar_mesh_rank_at(mesh, first), flat ? mesh->dp_rank : mesh->coordinate[a], flat ? "dp" : llmpar_axis_name((llmpar_axis)a), flat ? &mesh->dp : &mesh->comm[a]);
    }
    if (st) {
        llmpar_mesh_destroy(mesh);
        return st;
    }
    *out = mesh;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_mesh_destroy(llmpar_mesh *mesh)
{
    if (!mesh) return;
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) llmpar_comm_destroy(mesh->comm[a]);
    llmpar_comm_destroy(mesh->dp);
    llmpar_heap_free(&mesh->ctx->heap, mesh);
}

/* mesh: dp_replicate 1 x dp_shard 2 x tp 2 = 4 ranks

                         tp 0   tp 1
      dp_shard 0       |    0 |    1 |
      dp_shard 1       |    2 |   [3]|   <- this rank                                             */
LLMPAR_DEF size_t llmpar_mesh_print(const llmpar_mesh *mesh, char *text, size_t capacity)
{
    size_t used = 0;
    if (capacity) text[0] = 0;
    const int32_t *degree = mesh->degree;
    llmpar__mesh_append(text, capacity, &used, "mesh: dp_replicate %d x dp_shard %d x tp %d = %d ranks, this is rank %d\n\n%26s", (int)degree[LLMPAR_AXIS_DP_REPLICATE], (int)degree[LLMPAR_AXIS_DP_SHARD],
                        (int)degree[LLMPAR_AXIS_TP], (int)mesh->ctx->world, (int)mesh->ctx->rank, "");
    for (int32_t t = 0; t < degree[LLMPAR_AXIS_TP]; t++) llmpar__mesh_append(text, capacity, &used, "  tp %-3d", (int)t);
    llmpar__mesh_append(text, capacity, &used, "\n");
    int32_t at[LLMPAR_MESH_AXES] = { 0, 0, 0, 0, 0 };
    for (at[0] = 0; at[0] < degree[0]; at[0]++)
        for (at[1] = 0; at[1] < degree[1]; at[1]++) {
            char row[64];
            if (degree[0] > 1) snprintf(row, sizeof row, "dp_replicate %d dp_shard %d", (int)at[0], (int)at[1]);
            else snprintf(row, sizeof row, "dp_shard %d", (int)at[1]);
            llmpar__mesh_append(text, capacity, &used, "  %-24s|", row);
            for (at[4] = 0; at[4] < degree[4]; at[4]++) {
                int32_t rank = llmpar_mesh_rank_at(mesh, at);
                char cell[16];
                snprintf(cell, sizeof cell, rank == mesh->ctx->rank ? "[%d]" : " %d ", (int)rank);
                llmpar__mesh_append(text, capacity, &used, "%6s|", cell);
            }
            llmpar__mesh_append(text, capacity, &used, "\n");
        }
    return used;
}
/* ==== src/mesh/dtensor.c ==== */
/* dtensor: the arithmetic of cutting. Placements are applied in their order: each SHARD shrinks the rectangle along one dim, a FLAT at the end takes a range of its row-major elements. */

#include <string.h>


static int64_t llmpar__dtensor_grain(const llmpar_placement *p) { return p->grain ? p->grain : 1; }
static int32_t llmpar__dtensor_replicas(const llmpar_placement *p) { return p->replicas ? p->replicas : 1; }

/* Part `part` of `extent` elements cut into `parts` at whole grains. */
static void llmpar__dtensor_part(int64_t extent, int64_t grain, int32_t parts, int32_t part, int64_t *offset, int64_t *length)
{
    int64_t begin = llmpar_piece_begin(part, extent / grain, parts) * grain;
    *offset = begin;
    *length = llmpar_piece_begin(part + 1, extent / grain, parts) * grain - begin;
}

LLMPAR_DEF llmpar_status llmpar_dtensor_check(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], llmpar_error *error)
{
    const char *name = tensor->name ? tensor->name : "tensor";
    int64_t elements, grain[LLMPAR_MAX_DIMS];
    int64_t smallest[LLMPAR_MAX_DIMS]; /* over the ranks */
    int seen[LLMPAR_MESH_AXES] = { 0, 0, 0, 0, 0 }, flat = 0;
    if (!llmpar_dtype_size(tensor->dtype)) return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: dtype %d is not a stored type", name, (int)tensor->dtype);
    if (tensor->dims < 0 || tensor->dims > LLMPAR_MAX_DIMS) return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: %d dims, expected 0 to %d", name, (int)tensor->dims, LLMPAR_MAX_DIMS);
    if (tensor->placements < 0 || tensor->placements > LLMPAR_MESH_AXES) return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: %d placements, expected 0 to %d", name, (int)tensor->placements, LLMPAR_MESH_AXES);
    for (int32_t d = 0; d < tensor->dims; d++)
        if (tensor->shape[d] < 0) return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: dim %d has extent %lld, expected 0 or more", name, (int)d, (long long)tensor->shape[d]);
    if (!llmpar_extent_product(tensor->shape, tensor->dims, &elements) || elements > INT64_MAX / (int64_t)llmpar_dtype_size(tensor->dtype))
        return llmpar_error_set(error, LLMPAR_ERR_OVERFLOW, "%s: the product of its extents overflows", name);
    for (int32_t d = 0; d < tensor->dims; d++) {
        smallest[d] = tensor->shape[d];
        grain[d] = 0;
    }
    for (int32_t i = 0; i < tensor->placements; i++) {
        const llmpar_placement *p = &tensor->placement[i];
        if ((unsigned)p->axis >= LLMPAR_MESH_AXES) return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: placement %d names axis %d, expected 0 to %d", name, (int)i, (int)p->axis, LLMPAR_MESH_AXES - 1);
        const char *axis = llmpar_axis_name(p->axis);
        if (seen[p->axis]++) return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: axis %s is named twice", name, axis);
        if (p->kind == LLMPAR_REPLICATE || p->kind == LLMPAR_PARTIAL_SUM || p->kind == LLMPAR_PARTIAL_MAX) continue;
        if (flat) return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: a cut on %s after Flat: expected Flat to be the last cut", name, axis);
        if (p->kind == LLMPAR_SHARD) {
            if (p->dim < 0 || p->dim >= tensor->dims) return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: Shard(%d) on %s, expected a dim below %d", name, (int)p->dim, axis, (int)tensor->dims);
            int64_t g = llmpar__dtensor_grain(p);
            int32_t replicas = llmpar__dtensor_replicas(p);
            if (g < 1 || tensor->shape[p->dim] % g || (grain[p->dim] && grain[p->dim] % g))
                return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: Shard(%d) on %s: grain %lld does not divide %s %lld", name, (int)p->dim, axis, (long long)g, grain[p->dim] && g > 0 && tensor->shape[p->dim] % g == 0 ? "the grain of the earlier cut," : "the extent",
                                        (long long)(grain[p->dim] && g > 0 && tensor->shape[p->dim] % g == 0 ? grain[p->dim] : tensor->shape[p->dim]));
            if (replicas < 1 || degree[p->axis] % replicas)
                return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: Shard(%d) on %s: %d replicas do not divide the degree %d", name, (int)p->dim, axis, (int)replicas, (int)degree[p->axis]);
            grain[p->dim] = g;
            smallest[p->dim] = smallest[p->dim] / g / (degree[p->axis] / replicas) * g; /* floor(G/n) grains is the least that any part has */
        } else if (p->kind == LLMPAR_FLAT) {
            int64_t least = 0;
            flat = 1;
            if (p->unit_elements < 0 || p->unit_elements % degree[p->axis])
                return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: Flat on %s: a unit of %lld elements cannot be cut evenly over %d ranks", name, axis, (long long)p->unit_elements, (int)degree[p->axis]);
            /* Ranks with uneven earlier cuts lay out their units by their own extents, so the largest part need not fit here. */
            llmpar_extent_product(smallest, tensor->dims, &least);
            if (p->offset < 0 || p->offset > p->unit_elements || least > p->unit_elements - p->offset)
                return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: Flat on %s: %lld elements at offset %lld do not fit a unit of %lld", name, axis, (long long)least, (long long)p->offset, (long long)p->unit_elements);
        } else {
            return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: placement %d has kind %d, expected 0 to %d", name, (int)i, (int)p->kind, (int)LLMPAR_FLAT);
        }
    }
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_dtensor_local(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], const int32_t coordinate[LLMPAR_MESH_AXES], llmpar_local *out)
{
    int cut[LLMPAR_MESH_AXES] = { 0, 0, 0, 0, 0 };
    const llmpar_placement *flat = NULL;
    memset(out, 0, sizeof *out);
    out->is_owner = 1;
    for (int32_t d = 0; d < tensor->dims; d++) out->shape[d] = tensor->shape[d];
    for (int32_t i = 0; i < tensor->placements; i++) {
        const llmpar_placement *p = &tensor->placement[i];
        if (p->kind == LLMPAR_SHARD) {
            int32_t replicas = llmpar__dtensor_replicas(p);
            int64_t begin, length;
            llmpar__dtensor_part(out->shape[p->dim], llmpar__dtensor_grain(p), degree[p->axis] / replicas, coordinate[p->axis] / replicas, &begin, &length);
            out->offset[p->dim] += begin;
            out->shape[p->dim] = length;
            if (coordinate[p->axis] % replicas) out->is_owner = 0;
            cut[p->axis] = 1;
        } else if (p->kind == LLMPAR_FLAT) {
            flat = p;
            cut[p->axis] = 1;
        }
    }
    for (int a = 0; a < LLMPAR_MESH_AXES; a++)
        if (!cut[a] && coordinate[a]) out->is_owner = 0;
    out->elements = 1;
    for (int32_t d = 0; d < tensor->dims; d++) out->elements *= out->shape[d];
    out->flat_count = out->elements;
    if (flat) {
        /* unit   |....|== this tensor ==========|......|
           shard         |=== this rank ===|              */
        int64_t size = flat->unit_elements / degree[flat->axis], begin = size * coordinate[flat->axis], end = begin + size;
        int64_t from = flat->offset > begin ? flat->offset : begin, to = flat->offset + out->elements < end ? flat->offset + out->elements : end;
        out->flat_count = to > from ? to - from : 0;
        out->flat_begin = out->flat_count ? from - flat->offset : 0;
        out->shard_begin = out->flat_count ? from - begin : 0;
    }
}

LLMPAR_DEF size_t llmpar_dtensor_placements(const llmpar_dtensor *tensor, char *text, size_t capacity)
{
    size_t used = 0;
    if (capacity) text[0] = 0;
    llmpar__mesh_append(text, capacity, &used, tensor->placements ? "[" : "[Replicate");
    for (int32_t i = 0; i < tensor->placements; i++) {
        const llmpar_placement *p = &tensor->placement[i];
        if (i) llmpar__mesh_append(text, capacity, &used, ", ");
        if (p->kind == LLMPAR_SHARD && p->replicas > 1) llmpar__mesh_append(text, capacity, &used, "Shard(%d) x %d replicas", (int)p->dim, (int)p->replicas);
        else if (p->kind == LLMPAR_SHARD) llmpar__mesh_append(text, capacity, &used, "Shard(%d)", (int)p->dim);
        else if (p->kind == LLMPAR_FLAT) llmpar__mesh_append(text, capacity, &used, "Flat(%lld)", (long long)p->offset);
        else llmpar__mesh_append(text, capacity, &used, "%s", p->kind == LLMPAR_PARTIAL_SUM ? "Partial(sum)" : p->kind == LLMPAR_PARTIAL_MAX ? "Partial(max)" : "Replicate");
        llmpar__mesh_append(text, capacity, &used, " on %s", llmpar_axis_name(p->axis));
    }
    llmpar__mesh_append(text, capacity, &used, "]");
    return used;
}

LLMPAR__PRIVATE_DEF void llmpar__mesh_append_tensor(char *text, size_t capacity, size_t *used, const llmpar_dtensor *tensor)
{
    llmpar__mesh_append(text, capacity, used, "%s %s[", tensor->name ? tensor->name : "tensor", llmpar_dtype_name(tensor->dtype));
    for (int32_t d = 0; d < tensor->dims; d++) llmpar__mesh_append(text, capacity, used, "%s%lld", d ? "," : "", (long long)tensor->shape[d]);
    llmpar__mesh_append(text, capacity, used, "]");
}

/* The range [begin, end) of a rectangle's row-major elements, seen from dim d on (the dims before have been fixed in `at`). */
static void llmpar__dtensor_range(const llmpar_local *part, int32_t dims, int32_t d, int64_t begin, int64_t end, const llmpar__box *at, llmpar__box *box, int32_t *count)
{
    int64_t inner = 1;
    if (begin >= end) return;
    for (int32_t i = d + 1; i < dims; i++) inner *= part->shape[i];
    llmpar__box now = *at;
    int64_t first = begin / inner, last = end / inner;
    if (d >= dims || (begin % inner == 0 && end % inner == 0)) { /* whole rows */
        for (int32_t i = d; i < dims; i++) {
            now.begin[i] = part->offset[i] + (i == d ? first : 0);
            now.end[i] = part->offset[i] + (i == d ? last : part->shape[i]);
        }
        box[(*count)++] = now;
        return;
    }
    now.begin[d] = part->offset[d] + first;
    now.end[d] = now.begin[d] + 1;
    if (first == last) {
        llmpar__dtensor_range(part, dims, d + 1, begin % inner, end % inner, &now, box, count);
        return;
    }
    if (begin % inner) llmpar__dtensor_range(part, dims, d + 1, begin % inner, inner, &now, box, count);
    llmpar__dtensor_range(part, dims, d, (begin + inner - 1) / inner * inner, last * inner, at, box, count);
    now.begin[d] = part->offset[d] + last;
    now.end[d] = now.begin[d] + 1;
    llmpar__dtensor_range(part, dims, d + 1, 0, end % inner, &now, box, count);
}

LLMPAR__PRIVATE_DEF int32_t llmpar__mesh_boxes(const llmpar_local *part, int32_t dims, llmpar__box box[LLMPAR__BOXES])
{
    llmpar__box none;
    int32_t count = 0;
    memset(&none, 0, sizeof none);
    llmpar__dtensor_range(part, dims, 0, part->flat_begin, part->flat_begin + part->flat_count, &none, box, &count);
    return count;
}

LLMPAR__PRIVATE_DEF int32_t llmpar__mesh_common(const llmpar_local *a, const llmpar_local *b, int32_t dims, llmpar__box box[LLMPAR__BOXES * LLMPAR__BOXES], int64_t *volume)
{
    llmpar__box of_a[LLMPAR__BOXES], of_b[LLMPAR__BOXES];
    int32_t boxes_a = llmpar__mesh_boxes(a, dims, of_a), boxes_b = llmpar__mesh_boxes(b, dims, of_b), count = 0;
    *volume = 0;
    for (int32_t i = 0; i < boxes_a; i++)
        for (int32_t j = 0; j < boxes_b; j++) {
            llmpar__box *common = &box[count];
            int64_t elements = 1;
            memset(common, 0, sizeof *common);
            for (int32_t d = 0; d < dims; d++) {
                common->begin[d] = of_a[i].begin[d] > of_b[j].begin[d] ? of_a[i].begin[d] : of_b[j].begin[d];
                common->end[d] = of_a[i].end[d] < of_b[j].end[d] ? of_a[i].end[d] : of_b[j].end[d];
                elements *= common->end[d] > common->begin[d] ? common->end[d] - common->begin[d] : 0;
            }
            if (!elements) continue;
            *volume += elements;
            count++;
        }
    return count;
}
/* ==== src/mesh/picture.c ==== */
/* picture: who holds what of a tensor, as text and as SVG. All cuts of all ranks' boxes, along rows and along columns, make a grid whose cells are each held by one set of ranks. */

#include <stdio.h>
#include <string.h>

#define LLMPAR__PICTURE_BANDS 128  /* rows or columns of a grid; more are not drawn */
#define LLMPAR__PICTURE_LEGEND 64  /* ranks in an SVG's legend */

/* A 1-D tensor is one row. rows, columns 0: no grid (other dims, no elements, too many cuts). */
typedef struct llmpar__picture {
    const llmpar_dtensor *tensor;
    const int32_t *degree;
    int32_t ranks, bands[2];
    int64_t at[2][LLMPAR__PICTURE_BANDS + 1]; /* band i of the rows or columns: [at[i], at[i + 1]) */
} llmpar__picture;

/* The boxes of a rank with dims 0 and 1 as rows and columns. */
static int32_t llmpar__picture_boxes(const llmpar__picture *picture, int32_t rank, int32_t coordinate[LLMPAR_MESH_AXES], llmpar_local *local, llmpar__box box[LLMPAR__BOXES])
{
    llmpar__mesh_coordinate(picture->degree, rank, coordinate);
    llmpar_dtensor_local(picture->tensor, picture->degree, coordinate, local);
    int32_t boxes = llmpar__mesh_boxes(local, picture->tensor->dims, box);
    for (int32_t b = 0; b < boxes && picture->tensor->dims == 1; b++) {
        box[b].begin[1] = box[b].begin[0];
        box[b].end[1] = box[b].end[0];
        box[b].begin[0] = 0;
        box[b].end[0] = 1;
    }
    return boxes;
}

static int llmpar__picture_cut(llmpar__picture *picture, int dim, int64_t value)
{
    int64_t *at = picture->at[dim];
    int32_t n = picture->bands[dim], i = 0; /* at[0..n]: n + 1 cuts */
    while (i <= n && at[i] < value) i++;
    if (i <= n && at[i] == value) return 1;
    if (n == LLMPAR__PICTURE_BANDS) return 0;
    memmove(&at[i + 1], &at[i], (size_t)(n + 1 - i) * sizeof *at);
    at[i] = value;
    picture->bands[dim]++;
    return 1;
}

static void llmpar__picture_make(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, llmpar__picture *picture)
{
    memset(picture, 0, sizeof *picture);
    picture->tensor = tensor;
    picture->degree = mesh->degree;
    picture->ranks = 1;
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) picture->ranks *= mesh->degree[a];
    if (tensor->dims < 1 || tensor->dims > 2 || !tensor->shape[0] || !tensor->shape[tensor->dims - 1]) return;
    picture->bands[0] = picture->bands[1] = 1;
    picture->at[0][1] = tensor->dims == 2 ? tensor->shape[0] : 1;
    picture->at[1][1] = tensor->shape[tensor->dims - 1];
    int fits = 1;
    for (int32_t r = 0; r < picture->ranks; r++) {
        int32_t coordinate[LLMPAR_MESH_AXES];
        llmpar_local local;
        llmpar__box box[LLMPAR__BOXES];
        int32_t boxes = llmpar__picture_boxes(picture, r, coordinate, &local, box);
        for (int32_t b = 0; b < boxes; b++)
            for (int d = 0; d < 2; d++) fits = fits && llmpar__picture_cut(picture, d, box[b].begin[d]) && llmpar__picture_cut(picture, d, box[b].end[d]);
    }
    if (!fits) picture->bands[0] = picture->bands[1] = 0;
}

/* The ranks of a cell, "0-3 8", cut with ".."; the first of them, -1 without any. */
static int32_t llmpar__picture_holders(const llmpar__picture *picture, int32_t row, int32_t column, char *text, size_t capacity)
{
    int32_t first = -1, begin = -1;
    size_t used = 0;
    text[0] = 0;
    for (int32_t r = 0; r <= picture->ranks; r++) {
        int holds = 0;
        if (r < picture->ranks) {
            int32_t coordinate[LLMPAR_MESH_AXES];
            llmpar_local local;
            llmpar__box box[LLMPAR__BOXES];
            int32_t boxes = llmpar__picture_boxes(picture, r, coordinate, &local, box);
            int64_t y = picture->at[0][row], x = picture->at[1][column];
            for (int32_t b = 0; b < boxes; b++) holds = holds || (box[b].begin[0] <= y && y < box[b].end[0] && box[b].begin[1] <= x && x < box[b].end[1]);
        }
        if (holds && first < 0) first = r;
        if (holds && begin < 0) begin = r;
        if (holds || begin < 0) continue;
        llmpar__mesh_append(text, capacity, &used, r - begin > 2 ? "%s%d-%d" : r - begin == 2 ? "%s%d %d" : "%s%d", used ? " " : "", (int)begin, (int)r - 1);
        begin = -1;
    }
    if (used >= capacity) memcpy(text + capacity - 3, "..", 3);
    return first;
}

/* The first rank that holds the same as this one. */
static int32_t llmpar__picture_first(const llmpar__picture *picture, int32_t rank)
{
    int32_t coordinate[LLMPAR_MESH_AXES];
    llmpar_local local, other;
    llmpar__mesh_coordinate(picture->degree, rank, coordinate);
    llmpar_dtensor_local(picture->tensor, picture->degree, coordinate, &local);
    for (int32_t r = 0; r < rank; r++) {
        llmpar__mesh_coordinate(picture->degree, r, coordinate);
        llmpar_dtensor_local(picture->tensor, picture->degree, coordinate, &other);
        other.is_owner = local.is_owner;
        if (!memcmp(&local, &other, sizeof local)) return r;
    }
    return rank;
}

/* "0:6 tp=0": the elements of a band, and the coordinates that all its holders share. */
static void llmpar__picture_label(const llmpar__picture *picture, int dim, int32_t band, char *elements, char *coordinates, size_t capacity)
{
    int32_t shared[LLMPAR_MESH_AXES];
    size_t used = 0;
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) shared[a] = -1; /* -2: several */
    for (int32_t r = 0; r < picture->ranks; r++) {
        int32_t coordinate[LLMPAR_MESH_AXES];
        llmpar_local local;
        llmpar__box box[LLMPAR__BOXES];
        int32_t boxes = llmpar__picture_boxes(picture, r, coordinate, &local, box);
        for (int32_t b = 0; b < boxes; b++)
            for (int a = 0; a < LLMPAR_MESH_AXES && box[b].begin[dim] < picture->at[dim][band + 1] && box[b].end[dim] > picture->at[dim][band]; a++)
                shared[a] = shared[a] == -1 || shared[a] == coordinate[a] ? coordinate[a] : -2;
    }
    snprintf(elements, capacity, "%lld:%lld", (long long)picture->at[dim][band], (long long)picture->at[dim][band + 1]);
    coordinates[0] = 0;
    for (int a = 0; a < LLMPAR_MESH_AXES; a++)
        if (picture->degree[a] > 1 && shared[a] >= 0) llmpar__mesh_append(coordinates, capacity, &used, "%s%s=%d", used ? " " : "", llmpar_axis_name((llmpar_axis)a), (int)shared[a]);
}

/* "rank 3 dp_shard=1 tp=1  [2:4, 0:6]  elements 6:12 at 0 of the shard  24 bytes (copy)" */
static void llmpar__picture_rank(const llmpar__picture *picture, int32_t rank, char *text, size_t capacity, size_t *used)
{
    const llmpar_dtensor *tensor = picture->tensor;
    int32_t coordinate[LLMPAR_MESH_AXES];
    llmpar_local local;
    int flat = 0;
    llmpar__mesh_coordinate(picture->degree, rank, coordinate);
    llmpar_dtensor_local(tensor, picture->degree, coordinate, &local);
    for (int32_t i = 0; i < tensor->placements; i++) flat |= tensor->placement[i].kind == LLMPAR_FLAT;
    llmpar__mesh_append(text, capacity, used, "rank %d", (int)rank);
    llmpar__mesh_append_coordinate(text, capacity, used, picture->degree, coordinate);
    llmpar__mesh_append(text, capacity, used, "  [");
    for (int32_t d = 0; d < tensor->dims; d++) llmpar__mesh_append(text, capacity, used, "%s%lld:%lld", d ? ", " : "", (long long)local.offset[d], (long long)(local.offset[d] + local.shape[d]));
    llmpar__mesh_append(text, capacity, used, "]");
    if (flat) llmpar__mesh_append(text, capacity, used, "  elements %lld:%lld at %lld of the shard", (long long)local.flat_begin, (long long)(local.flat_begin + local.flat_count), (long long)local.shard_begin);
    llmpar__mesh_append(text, capacity, used, "  %lld bytes%s", (long long)(local.flat_count * (int64_t)llmpar_dtype_size(tensor->dtype)), local.is_owner ? "" : " (copy)");
}

/* wq f32[12,16] [Shard(0) on tp, Flat(0) on dp_shard]
     rank 0 dp_shard=0 tp=0  [0:6, 0:16]  elements 0:48 at 0 of the shard  192 bytes
     ..
     ranks of each part
                                 0:16
       0:3   dp_shard=0 tp=0   | 0
       ..                                                                                              */
LLMPAR_DEF size_t llmpar_dtensor_print(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, char *text, size_t capacity)
{
    enum { WIDTH = 40, ROWS = 64, COLUMNS = 24 };
    size_t used = 0;
    llmpar__picture picture;
    char placements[256], elements[WIDTH], coordinates[WIDTH], cell[WIDTH];
    llmpar__picture_make(tensor, mesh, &picture);
    llmpar_dtensor_placements(tensor, placements, sizeof placements);
    if (capacity) text[0] = 0;
    llmpar__mesh_append_tensor(text, capacity, &used, tensor);
    llmpar__mesh_append(text, capacity, &used, " %s\n", placements);
    for (int32_t r = 0; r < picture.ranks; r++) {
        llmpar__mesh_append(text, capacity, &used, "  ");
        llmpar__picture_rank(&picture, r, text, capacity, &used);
        llmpar__mesh_append(text, capacity, &used, "\n");
    }
    int32_t rows = picture.bands[0], columns = picture.bands[1];
    if (!rows || rows > ROWS || columns > COLUMNS) return used;
    int width[COLUMNS], left = 0, left_elements = 0, named = 0;
    for (int32_t c = 0; c < columns; c++) {
        llmpar__picture_label(&picture, 1, c, elements, coordinates, WIDTH);
        width[c] = (int)(strlen(elements) > strlen(coordinates) ? strlen(elements) : strlen(coordinates));
        named |= coordinates[0] != 0;
        for (int32_t r = 0; r < rows; r++) {
            llmpar__picture_holders(&picture, r, c, cell, sizeof cell);
            if ((int)strlen(cell) > width[c]) width[c] = (int)strlen(cell);
        }
    }
    for (int32_t r = 0; r < rows; r++) {
        llmpar__picture_label(&picture, 0, r, elements, coordinates, WIDTH);
        if ((int)strlen(elements) > left_elements) left_elements = (int)strlen(elements);
        if ((int)strlen(coordinates) > left) left = (int)strlen(coordinates);
    }
    llmpar__mesh_append(text, capacity, &used, "  ranks that hold each part, by rows and columns\n");
    for (int line = 0; line < 1 + named; line++) {
        llmpar__mesh_append(text, capacity, &used, "    %*s  %*s  ", left_elements, "", left, "");
        for (int32_t c = 0; c < columns; c++) {
            llmpar__picture_label(&picture, 1, c, elements, coordinates, WIDTH);
            llmpar__mesh_append(text, capacity, &used, " %-*s ", width[c], line ? coordinates : elements);
        }
        llmpar__mesh_append(text, capacity, &used, "\n");
    }
    for (int32_t r = 0; r < rows; r++) {
        llmpar__picture_label(&picture, 0, r, elements, coordinates, WIDTH);
        llmpar__mesh_append(text, capacity, &used, "    %-*s  %-*s |", left_elements, tensor->dims == 2 ? elements : "", left, coordinates);
        for (int32_t c = 0; c < columns; c++) {
            llmpar__picture_holders(&picture, r, c, cell, sizeof cell);
            llmpar__mesh_append(text, capacity, &used, " %-*s|", width[c], cell);
        }
        llmpar__mesh_append(text, capacity, &used, "\n");
    }
    return used;
}

/* ---- SVG ---- */

/* A light color for a rank: hues by the golden angle, so that neighbours differ. */
static unsigned llmpar__picture_color(int32_t rank)
{
    int32_t hue = (int32_t)(((int64_t)rank * 1375 + 2100) / 10 % 360), part = hue % 60, color[3];
    const int32_t low = 178, high = 246, up = low + (high - low) * part / 60, down = high - (high - low) * part / 60;
    const int32_t table[6][3] = { { high, up, low }, { down, high, low }, { low, high, up }, { low, down, high }, { up, low, high }, { high, low, down } };
    memcpy(color, table[hue / 60], sizeof color);
    return (unsigned)color[0] << 16 | (unsigned)color[1] << 8 | (unsigned)color[2];
}

/* Text content: what XML forbids or reads as markup is written as entities or replaced. */
static void llmpar__picture_escape(char *text, size_t capacity, size_t *used, const char *content)
{
    for (; *content; content++) {
        unsigned char c = (unsigned char)*content;
        const char *entity = c == '&' ? "&amp;" : c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '"' ? "&quot;" : c < 0x20 || c >= 0x7f ? "?" : NULL;
        if (entity) llmpar__mesh_append(text, capacity, used, "%s", entity);
        else llmpar__mesh_append(text, capacity, used, "%c", (int)c);
    }
}

/* Does this cell carry its ranks' name? Of the cells beside, above and below that the same ranks hold, the largest does. */
static int llmpar__picture_named(const llmpar__picture *picture, const int32_t *x, const int32_t *y, int32_t row, int32_t column)
{
    static const int32_t step[4][2] = { { -1, 0 }, { 0, -1 }, { 1, 0 }, { 0, 1 } };
    char cell[96], next[96];
    int64_t area = (int64_t)(x[column + 1] - x[column]) * (y[row + 1] - y[row]);
    llmpar__picture_holders(picture, row, column, cell, sizeof cell);
    for (int i = 0; i < 4; i++)
        for (int32_t r = row + step[i][0], c = column + step[i][1]; r >= 0 && c >= 0 && r < picture->bands[0] && c < picture->bands[1]; r += step[i][0], c += step[i][1]) {
            llmpar__picture_holders(picture, r, c, next, sizeof next);
            if (strcmp(cell, next)) break;
            if ((int64_t)(x[c + 1] - x[c]) * (y[r + 1] - y[r]) >= area + (i > 1)) return 0;
        }
    return 1;
}

/* Pixels that the longest label of a dim takes; by elements and coordinates one above the other, or side by side. */
static int32_t llmpar__picture_room(const llmpar__picture *picture, int dim, int side)
{
    char elements[96], coordinates[96];
    int32_t room = 0;
    for (int32_t i = 0; i < picture->bands[dim]; i++) {
        llmpar__picture_label(picture, dim, i, elements, coordinates, sizeof elements);
        int32_t a = (int32_t)strlen(elements), b = (int32_t)strlen(coordinates), need = 9 * (side ? a + b + 1 : a > b ? a : b);
        if (need > room) room = need;
    }
    return room;
}

/* Where band i begins, in pixels: by its share of the elements, but with room for a word. */
static void llmpar__picture_pixels(const llmpar__picture *picture, int dim, int32_t whole, int32_t least, int32_t pixel[LLMPAR__PICTURE_BANDS + 1])
{
    double total = (double)picture->at[dim][picture->bands[dim]];
    for (int32_t i = 0; i < picture->bands[dim]; i++) {
        int32_t share = (int32_t)((double)whole * ((double)(picture->at[dim][i + 1] - picture->at[dim][i]) / total));
        pixel[i + 1] = pixel[i] + (share > least ? share : least);
    }
}

LLMPAR_DEF size_t llmpar_dtensor_svg(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, char *text, size_t capacity)
{
    enum { TOP = 110, WHOLE = 640, LINE = 20, LABEL = 96 };
    size_t used = 0, length;
    llmpar__picture picture;
    char line[512], elements[LABEL], coordinates[LABEL], cell[LABEL], next[LABEL];
    int32_t x[LLMPAR__PICTURE_BANDS + 1], y[LLMPAR__PICTURE_BANDS + 1];
    llmpar__picture_make(tensor, mesh, &picture);
    int32_t rows = picture.bands[0], columns = picture.bands[1], legend = picture.ranks < LLMPAR__PICTURE_LEGEND ? picture.ranks : LLMPAR__PICTURE_LEGEND;
    double ratio = rows ? (double)picture.at[0][rows] / (double)picture.at[1][columns] : 0;
    int32_t narrow = 16 + llmpar__picture_room(&picture, 1, 0), beside = 0;
    y[0] = TOP;
    llmpar__picture_pixels(&picture, 0, tensor->dims == 1 ? 60 : ratio < 0.25 ? 160 : ratio > 1 ? WHOLE : (int32_t)((double)WHOLE * ratio), 30, y);
    for (int32_t r = 0; r < rows; r++) beside |= y[r + 1] - y[r] < 40;
    int32_t left = 34 + llmpar__picture_room(&picture, 0, beside);
    x[0] = left < 100 ? 100 : left;
    llmpar__picture_pixels(&picture, 1, ratio > 1.5 && tensor->dims == 2 ? (int32_t)((double)WHOLE / (ratio > 4 ? 2.5 : ratio / 1.5)) : WHOLE, narrow > 96 ? narrow : 96, x);
    int32_t width = x[columns] + 30 < 900 ? 900 : x[columns] + 30, under = y[rows] + (rows ? 40 : 0), height = under + LINE * (legend + (legend < picture.ranks)) + 24;
    if (capacity) text[0] = 0;
    llmpar__mesh_append(text, capacity, &used, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" font-family=\"DejaVu Sans, Helvetica, Arial, sans-serif\" font-size=\"13\" fill=\"#222222\">\n",
                        (int)width, (int)height, (int)width, (int)height);
    llmpar__mesh_append(text, capacity, &used, "<rect width=\"%d\" height=\"%d\" fill=\"#ffffff\"/>\n<text id=\"title\" x=\"24\" y=\"34\" font-size=\"18\" font-weight=\"bold\">", (int)width, (int)height);
    length = 0;
    llmpar__mesh_append_tensor(line, sizeof line, &length, tensor);
    llmpar__picture_escape(text, capacity, &used, line);
    llmpar_dtensor_placements(tensor, line, sizeof line);
    llmpar__mesh_append(text, capacity, &used, "</text>\n<text id=\"placements\" x=\"24\" y=\"57\" fill=\"#555555\">%s</text>\n", line);
    for (int32_t c = 0; c < columns; c++) {
        llmpar__picture_label(&picture, 1, c, elements, coordinates, LABEL);
        llmpar__mesh_append(text, capacity, &used, "<g id=\"column-%d\" text-anchor=\"middle\"><text x=\"%d\" y=\"%d\" font-weight=\"bold\">%s</text><text x=\"%d\" y=\"%d\" font-size=\"12\" fill=\"#555555\">%s</text></g>\n", (int)c,
                            (int)(x[c] + x[c + 1]) / 2, TOP - 10, coordinates, (int)(x[c] + x[c + 1]) / 2, coordinates[0] ? TOP - 26 : TOP - 10, elements);
    }
    for (int32_t r = 0; r < rows; r++) {
        int32_t middle = (y[r] + y[r + 1]) / 2 + 5;
        llmpar__picture_label(&picture, 0, r, elements, coordinates, LABEL);
        if (tensor->dims == 1) elements[0] = 0;
        llmpar__mesh_append(text, capacity, &used, "<g id=\"row-%d\" text-anchor=\"end\">", (int)r);
        if (coordinates[0] && y[r + 1] - y[r] >= 40) /* one above the other, or side by side */
            llmpar__mesh_append(text, capacity, &used, "<text x=\"%d\" y=\"%d\" font-weight=\"bold\">%s</text><text x=\"%d\" y=\"%d\" font-size=\"12\" fill=\"#555555\">%s</text></g>\n", (int)x[0] - 10, (int)middle - 8, coordinates, (int)x[0] - 10, (int)middle + 9, elements);
        else
            llmpar__mesh_append(text, capacity, &used, "<text x=\"%d\" y=\"%d\" font-size=\"12\"><tspan font-weight=\"bold\">%s</tspan> <tspan fill=\"#555555\">%s</tspan></text></g>\n", (int)x[0] - 10, (int)middle, coordinates, elements);
    }
    for (int32_t r = 0; r < rows; r++)
        for (int32_t c = 0; c < columns; c++) {
            int32_t first = llmpar__picture_holders(&picture, r, c, cell, sizeof cell), w = x[c + 1] - x[c], h = y[r + 1] - y[r];
            llmpar__mesh_append(text, capacity, &used, "<rect id=\"cell-%d-%d\" data-ranks=\"%s\" x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" fill=\"#%06x\"/>\n", (int)r, (int)c, cell, (int)x[c], (int)y[r], (int)w, (int)h, first < 0 ? 0xeeeeeeu : llmpar__picture_color(first));
            if (llmpar__picture_named(&picture, x, y, r, c))
                llmpar__mesh_append(text, capacity, &used, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">%s %s</text>\n", (int)x[c] + w / 2, (int)y[r] + h / 2 + 5, strchr(cell, ' ') || strchr(cell, '-') ? "ranks" : "rank", cell);
        }
    llmpar__mesh_append(text, capacity, &used, "<g stroke=\"#444444\" stroke-width=\"1.5\" stroke-linecap=\"square\">\n");
    for (int32_t r = 0; r < rows; r++) /* a line where the ranks change */
        for (int32_t c = 0; c < columns; c++) {
            llmpar__picture_holders(&picture, r, c, cell, sizeof cell);
            next[0] = 0;
            if (c + 1 < columns) llmpar__picture_holders(&picture, r, c + 1, next, sizeof next);
            if (c + 1 < columns && strcmp(cell, next)) llmpar__mesh_append(text, capacity, &used, "<path d=\"M%d %dV%d\"/>\n", (int)x[c + 1], (int)y[r], (int)y[r + 1]);
            if (r + 1 < rows) llmpar__picture_holders(&picture, r + 1, c, next, sizeof next);
            if (r + 1 < rows && strcmp(cell, next)) llmpar__mesh_append(text, capacity, &used, "<path d=\"M%d %dH%d\"/>\n", (int)x[c], (int)y[r + 1], (int)x[c + 1]);
        }
    if (rows) llmpar__mesh_append(text, capacity, &used, "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" fill=\"none\"/>\n", (int)x[0], (int)y[0], (int)(x[columns] - x[0]), (int)(y[rows] - y[0]));
    llmpar__mesh_append(text, capacity, &used, "</g>\n");
    for (int32_t r = 0; r < legend; r++) {
        length = 0;
        llmpar__picture_rank(&picture, r, line, sizeof line, &length);
        llmpar__mesh_append(text, capacity, &used, "<g id=\"rank-%d\"><rect x=\"24\" y=\"%d\" width=\"13\" height=\"13\" fill=\"#%06x\" stroke=\"#444444\"/><text x=\"46\" y=\"%d\" font-size=\"12\" xml:space=\"preserve\">%s</text></g>\n", (int)r, (int)(under + LINE * r - 11),
                            llmpar__picture_color(llmpar__picture_first(&picture, r)), (int)(under + LINE * r), line);
    }
    if (legend < picture.ranks) llmpar__mesh_append(text, capacity, &used, "<text x=\"46\" y=\"%d\" font-size=\"12\">and %d more ranks</text>\n", (int)(under + LINE * legend), (int)(picture.ranks - legend));
    llmpar__mesh_append(text, capacity, &used, "</svg>\n");
    return used;
}

#undef LLMPAR__PICTURE_BANDS
#undef LLMPAR__PICTURE_LEGEND
/* ==== src/mesh/redistribute_plan.c ==== */
/* redistribute_plan: what has to move, the least that could, and the collectives that do it.

   1. nothing has to move            local
   2. a chain of plain collectives   reduce (last listed axis first) by reduce_scatter where the target cuts that axis next and evenly, else by all_reduce; then undo cuts (last first) until the target's are left
   3. one axis, all pairs alike      all_to_all
   4. everything else                exchange
   The first that fits and does not cost too much: a chain without reductions sends no byte too many, and one with them at most twice the bound (an exchange sends its contributions to one rank for each element,
   which is the bound or, where that rank has no contribution of its own, one element more; but a chain spreads the work). */
/* ==== src/mesh/redistribute_internal.h ==== */
/* redistribute_internal: what planning (redistribute_plan.c) and moving (redistribute.c) share: who sends what to whom. */
#ifndef LLMPAR_REDISTRIBUTE_INTERNAL_H
#define LLMPAR_REDISTRIBUTE_INTERNAL_H


/* The roles of the axes in a request. Ranks of an axis form groups of `group` neighbours that hold the same part; a rank takes what it needs from the rank that has its own place in each group:

     from: Shard(0) x 2 replicas on tp 4    tp 0 | tp 1 | tp 2 | tp 3      group 2: tp 3 takes the first part from tp 1, tp 2 from tp 0
                                            first part  | second part
   An axis to be reduced has groups of one: a rank takes from all its coordinates. */
typedef struct llmpar__redistribute_pair {
    const llmpar_dtensor *from, *to;
    const int32_t *degree;
    int32_t ranks, reductions;
    int32_t reduced[LLMPAR_MESH_AXES];                                     /* placements of `from` to be reduced, in list order */
    int32_t from_group[LLMPAR_MESH_AXES], to_group[LLMPAR_MESH_AXES];      /* by axis */
    int32_t kept[LLMPAR_MESH_AXES], fresh[LLMPAR_MESH_AXES];               /* by axis: Partial stays; Partial(sum) whose value stands at coordinate 0 */
    int64_t contributions;                                                 /* to each element: product of the reduced axes' degrees */
} llmpar__redistribute_pair;

LLMPAR__PRIVATE void llmpar__redistribute_pair_make(const llmpar_dtensor *from, const llmpar_dtensor *to, const int32_t degree[LLMPAR_MESH_AXES], llmpar__redistribute_pair *pair);
/* Does `receiver` take from `sender` what that holds (and it needs)? */
LLMPAR__PRIVATE int llmpar__redistribute_serves(const llmpar__redistribute_pair *pair, const int32_t sender[LLMPAR_MESH_AXES], const int32_t receiver[LLMPAR_MESH_AXES]);
/* Does the rank need its part of `to`? home: is it also the first of the ranks that need the same? */
LLMPAR__PRIVATE int llmpar__redistribute_needs(const llmpar__redistribute_pair *pair, const int32_t coordinate[LLMPAR_MESH_AXES], int home);
/* What a coordinate holds after the first `placements` placements. */
LLMPAR__PRIVATE void llmpar__redistribute_local(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], int32_t placements, const int32_t coordinate[LLMPAR_MESH_AXES], llmpar_local *out);
/* The placements that do something on this mesh: Partial first, then the cuts. The parts are the same, but a Flat over one rank is gone: they begin at 0. */
LLMPAR__PRIVATE void llmpar__redistribute_normal(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], llmpar_dtensor *out);
/* Is the last placement an even cut of what this coordinate's axis held before it, part r at rank r? Then the larger part is [blocks][ranks][count]. */
LLMPAR__PRIVATE int llmpar__redistribute_even(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], const int32_t coordinate[LLMPAR_MESH_AXES], size_t *blocks, size_t *count);

#endif
/* ---- src/mesh/redistribute_plan.c goes on ---- */

#include <string.h>


static int llmpar__redistribute_partial(const llmpar_placement *p) { return p->kind == LLMPAR_PARTIAL_SUM || p->kind == LLMPAR_PARTIAL_MAX; }
static int32_t llmpar__redistribute_replicas(const llmpar_placement *p) { return p->kind == LLMPAR_SHARD && p->replicas > 1 ? p->replicas : 1; }
static int32_t llmpar__redistribute_ranks(const int32_t degree[LLMPAR_MESH_AXES])
{
    int32_t ranks = 1;
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) ranks *= degree[a];
    return ranks;
}

static const llmpar_placement *llmpar__redistribute_on(const llmpar_dtensor *tensor, int axis)
{
    for (int32_t i = 0; i < tensor->placements; i++)
        if ((int)tensor->placement[i].axis == axis) return &tensor->placement[i];
    return NULL;
}

static int32_t llmpar__redistribute_group(const llmpar_placement *p, int32_t degree)
{
    return p && p->kind == LLMPAR_SHARD ? llmpar__redistribute_replicas(p) : p && p->kind == LLMPAR_FLAT ? 1 : degree;
}

LLMPAR__PRIVATE_DEF void llmpar__redistribute_pair_make(const llmpar_dtensor *from, const llmpar_dtensor *to, const int32_t degree[LLMPAR_MESH_AXES], llmpar__redistribute_pair *pair)
{
    memset(pair, 0, sizeof *pair);
    pair->from = from;
    pair->to = to;
    pair->degree = degree;
    pair->ranks = llmpar__redistribute_ranks(degree);
    pair->contributions = 1;
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) {
        pair->from_group[a] = llmpar__redistribute_group(llmpar__redistribute_on(from, a), degree[a]);
        pair->to_group[a] = llmpar__redistribute_group(llmpar__redistribute_on(to, a), degree[a]);
    }
    for (int32_t i = 0; i < from->placements; i++) {
        const llmpar_placement *p = &from->placement[i], *target = llmpar__redistribute_on(to, p->axis);
        if (!llmpar__redistribute_partial(p) || degree[p->axis] == 1) continue;
        int keep = target && target->kind == p->kind;
        for (int32_t j = 0; j < i && keep; j++) { /* a sum of maxima is no maximum of sums: what is undone later has to stay so */
            const llmpar_placement *outer = &from->placement[j];
            if (!llmpar__redistribute_partial(outer) || outer->kind == p->kind || degree[outer->axis] == 1) continue;
            keep = pair->kept[outer->axis] && llmpar__redistribute_on(to, outer->axis) < target;
        }
        if (keep) {
            pair->kept[p->axis] = pair->to_group[p->axis] = 1;
        } else {
            pair->reduced[pair->reductions++] = i;
            pair->from_group[p->axis] = 1;
            pair->contributions *= degree[p->axis];
        }
    }
    for (int32_t i = 0; i < to->placements; i++) {
        const llmpar_placement *p = &to->placement[i];
        if (p->kind == LLMPAR_PARTIAL_SUM && degree[p->axis] > 1 && !pair->kept[p->axis]) pair->fresh[p->axis] = pair->to_group[p->axis] = 1;
    }
}

LLMPAR__PRIVATE_DEF int llmpar__redistribute_serves(const llmpar__redistribute_pair *pair, const int32_t sender[LLMPAR_MESH_AXES], const int32_t receiver[LLMPAR_MESH_AXES])
{
    for (int a = 0; a < LLMPAR_MESH_AXES; a++)
        if (sender[a] % pair->from_group[a] != receiver[a] % pair->from_group[a]) return 0;
    return 1;
}

LLMPAR__PRIVATE_DEF int llmpar__redistribute_needs(const llmpar__redistribute_pair *pair, const int32_t coordinate[LLMPAR_MESH_AXES], int home)
{
    for (int a = 0; a < LLMPAR_MESH_AXES; a++)
        if ((pair->fresh[a] && coordinate[a]) || (home && coordinate[a] % pair->to_group[a])) return 0;
    return 1;
}

LLMPAR__PRIVATE_DEF void llmpar__redistribute_local(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], int32_t placements, const int32_t coordinate[LLMPAR_MESH_AXES], llmpar_local *out)
{
    llmpar_dtensor prefix = *tensor;
    prefix.placements = placements;
    llmpar_dtensor_local(&prefix, degree, coordinate, out);
}

LLMPAR__PRIVATE_DEF int llmpar__redistribute_even(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], const int32_t coordinate[LLMPAR_MESH_AXES], size_t *blocks, size_t *count)
{
    const llmpar_placement *cut = &tensor->placement[tensor->placements - 1];
    int32_t at[LLMPAR_MESH_AXES];
    int64_t outer = 1, part = 0;
    llmpar_local whole, local;
    memcpy(at, coordinate, sizeof at);
    if (llmpar__redistribute_replicas(cut) > 1) return 0;
    llmpar__redistribute_local(tensor, degree, tensor->placements - 1, coordinate, &whole);
    for (at[cut->axis] = 0; at[cut->axis] < degree[cut->axis]; at[cut->axis]++) {
        llmpar_dtensor_local(tensor, degree, at, &local);
        if (at[cut->axis] && local.flat_count != part) return 0;
        part = local.flat_count;
    }
    for (int32_t d = 0; cut->kind == LLMPAR_SHARD && d < cut->dim; d++) outer *= whole.shape[d];
    *blocks = (size_t)(outer ? outer : 1);
    *count = (size_t)(outer ? part / outer : 0);
    return 1;
}

/* What moves at least, and in an exchange; in elements. */
static void llmpar__redistribute_volumes(const llmpar__redistribute_pair *pair, int64_t *bound, int64_t *exchange)
{
    llmpar__box box[LLMPAR__BOXES * LLMPAR__BOXES];
    int64_t elements = 1, need = 0, n = pair->contributions;
    *exchange = 0;
    for (int32_t d = 0; d < pair->to->dims; d++) elements *= pair->to->shape[d];
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) elements *= pair->kept[a] ? pair->degree[a] : 1;
    for (int32_t r = 0; r < pair->ranks; r++) {
        int32_t coordinate[LLMPAR_MESH_AXES];
        llmpar_local held, needed;
        int64_t common;
        llmpar__mesh_coordinate(pair->degree, r, coordinate);
        if (!llmpar__redistribute_needs(pair, coordinate, 0)) continue;
        llmpar_dtensor_local(pair->from, pair->degree, coordinate, &held);
        llmpar_dtensor_local(pair->to, pair->degree, coordinate, &needed);
        llmpar__mesh_common(&held, &needed, pair->to->dims, box, &common);
        need += needed.flat_count;
        *exchange += n > 1 && !llmpar__redistribute_needs(pair, coordinate, 1) ? needed.flat_count : n * needed.flat_count - common;
    }
    *bound = n > 1 ? (n - 2) * elements + need : *exchange;
}

LLMPAR_DEF int64_t llmpar_redistribute_bound(const llmpar_dtensor *from, const llmpar_dtensor *to, const int32_t degree[LLMPAR_MESH_AXES])
{
    llmpar__redistribute_pair pair;
    int64_t bound, exchange;
    llmpar__redistribute_pair_make(from, to, degree, &pair);
    llmpar__redistribute_volumes(&pair, &bound, &exchange);
    return bound * (int64_t)llmpar_dtype_size(from->dtype);
}

/* ---- the chain ---- */

LLMPAR__PRIVATE_DEF void llmpar__redistribute_normal(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], llmpar_dtensor *out)
{
    *out = *tensor;
    out->placements = 0;
    for (int cuts = 0; cuts < 2; cuts++)
        for (int32_t i = 0; i < tensor->placements; i++) {
            const llmpar_placement *p = &tensor->placement[i];
            int partial = llmpar__redistribute_partial(p);
            if (p->kind != LLMPAR_REPLICATE && cuts != partial && degree[p->axis] > (partial ? 1 : llmpar__redistribute_replicas(p))) out->placement[out->placements++] = *p;
        }
}

static int32_t llmpar__redistribute_partials(const llmpar_dtensor *normal)
{
    int32_t n = 0;
    while (n < normal->placements && llmpar__redistribute_partial(&normal->placement[n])) n++;
    return n;
}

/* How many cuts two normal tensors have in common before they differ. */
static int32_t llmpar__redistribute_prefix(const llmpar_dtensor *a, const llmpar_dtensor *b)
{
    int32_t first_a = llmpar__redistribute_partials(a), first_b = llmpar__redistribute_partials(b), n = 0;
    for (; first_a + n < a->placements && first_b + n < b->placements; n++) {
        const llmpar_placement *p = &a->placement[first_a + n], *q = &b->placement[first_b + n];
        if (p->kind != q->kind || p->axis != q->axis) break;
        if (p->kind == LLMPAR_FLAT ? p->offset != q->offset || p->unit_elements != q->unit_elements
                                   : p->dim != q->dim || (p->grain ? p->grain : 1) != (q->grain ? q->grain : 1) || llmpar__redistribute_replicas(p) != llmpar__redistribute_replicas(q)) break;
    }
    return n;
}

static int llmpar__redistribute_all_even(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES])
{
    int32_t axis = (int32_t)tensor->placement[tensor->placements - 1].axis, coordinate[LLMPAR_MESH_AXES];
    for (int32_t r = 0; r < llmpar__redistribute_ranks(degree); r++) {
        size_t blocks, count;
        llmpar__mesh_coordinate(degree, r, coordinate);
        if (!coordinate[axis] && !llmpar__redistribute_even(tensor, degree, coordinate, &blocks, &count)) return 0;
    }
    return 1;
}

/* Appends a step; `cut` is the tensor whose parts are sent or received: before an all_gather, after a reduce_scatter. The bytes are those that tables/comm.c counts. */
static void llmpar__redistribute_add(llmpar_redistribute_plan *plan, llmpar_redistribute_op op, llmpar_axis axis, const llmpar_dtensor *cut, const llmpar_dtensor *result)
{
    llmpar_redistribute_step *step = &plan->step[plan->steps++];
    int64_t item = (int64_t)llmpar_dtype_size(cut->dtype), n = plan->degree[axis];
    memset(step, 0, sizeof *step);
    step->op = op;
    step->axis = axis;
    step->result = *result;
    for (int32_t r = 0; r < llmpar__redistribute_ranks(plan->degree); r++) {
        int32_t coordinate[LLMPAR_MESH_AXES];
        llmpar_local local;
        llmpar__mesh_coordinate(plan->degree, r, coordinate);
        llmpar_dtensor_local(cut, plan->degree, coordinate, &local);
        int64_t part = local.flat_count * item;
        if (op == LLMPAR_REDISTRIBUTE_ALL_REDUCE) step->bytes += (int64_t)(2 * ((double)(n - 1) / (double)n) * (double)part + 0.5);
        else if (op == LLMPAR_REDISTRIBUTE_ALL_TO_ALL) step->bytes += part / n * (n - 1);
        else if (op != LLMPAR_REDISTRIBUTE_BROADCAST || coordinate[axis] % llmpar__redistribute_replicas(&cut->placement[cut->placements - 1]) == 0) step->bytes += (n - 1) * part;
    }
    plan->bytes += step->bytes;
}

static int llmpar__redistribute_chain(const llmpar__redistribute_pair *pair, llmpar_redistribute_plan *plan)
{
    llmpar_dtensor now, target;
    llmpar__redistribute_normal(pair->from, pair->degree, &now);
    llmpar__redistribute_normal(pair->to, pair->degree, &target);
    int32_t target_cuts = target.placements - llmpar__redistribute_partials(&target);
    const llmpar_placement *target_cut = &target.placement[target.placements - target_cuts];
    for (int a = 0; a < LLMPAR_MESH_AXES; a++)
        if (pair->fresh[a]) return 0;
    for (int32_t i = pair->reductions - 1; i >= 0; i--) {
        llmpar_axis axis = pair->from->placement[pair->reduced[i]].axis;
        int32_t at = 0;
        while (now.placement[at].axis != axis) at++;
        memmove(&now.placement[at], &now.placement[at + 1], (size_t)(--now.placements - at) * sizeof now.placement[0]);
        int32_t cuts = now.placements - llmpar__redistribute_partials(&now);
        const llmpar_placement *wanted = llmpar__redistribute_on(pair->to, axis);
        if (wanted && llmpar__redistribute_group(wanted, pair->degree[axis]) < pair->degree[axis]) { /* `to` cuts this axis */
            if (cuts >= target_cuts || llmpar__redistribute_prefix(&now, &target) != cuts || target_cut[cuts].axis != axis) return 0;
            now.placement[now.placements++] = target_cut[cuts];
            if (!llmpar__redistribute_all_even(&now, pair->degree)) return 0;
            llmpar__redistribute_add(plan, LLMPAR_REDISTRIBUTE_REDUCE_SCATTER, axis, &now, &now);
        } else {
            llmpar__redistribute_add(plan, LLMPAR_REDISTRIBUTE_ALL_REDUCE, axis, &now, &now);
        }
    }
    if (llmpar__redistribute_prefix(&now, &target) != target_cuts) return 0;
    while (now.placements - llmpar__redistribute_partials(&now) > target_cuts) {
        llmpar_dtensor before = now;
        now.placements--;
        llmpar__redistribute_add(plan, llmpar__redistribute_all_even(&before, pair->degree) ? LLMPAR_REDISTRIBUTE_ALL_GATHER : LLMPAR_REDISTRIBUTE_BROADCAST, before.placement[now.placements].axis, &before, &now);
    }
    return plan->steps > 0;
}

/* Does every rank take the same number of elements from every rank of this axis, and nothing from others? */
static int llmpar__redistribute_pairs_alike(const llmpar__redistribute_pair *pair, llmpar_axis axis)
{
    llmpar__box box[LLMPAR__BOXES * LLMPAR__BOXES];
    int32_t n = pair->degree[axis];
    for (int32_t r = 0; r < pair->ranks; r++) {
        int32_t receiver[LLMPAR_MESH_AXES], sender[LLMPAR_MESH_AXES];
        llmpar_local held, needed;
        int64_t common;
        llmpar__mesh_coordinate(pair->degree, r, receiver);
        memcpy(sender, receiver, sizeof sender);
        llmpar_dtensor_local(pair->to, pair->degree, receiver, &needed);
        for (sender[axis] = 0; sender[axis] < n; sender[axis]++) {
            llmpar_dtensor_local(pair->from, pair->degree, sender, &held);
            llmpar__mesh_common(&held, &needed, pair->to->dims, box, &common);
            if (!llmpar__redistribute_serves(pair, sender, receiver) || !llmpar__redistribute_needs(pair, receiver, 0) || held.flat_count != needed.flat_count || common * n != needed.flat_count) return 0;
        }
    }
    return 1;
}

/* ---- making a plan ---- */

static llmpar_status llmpar__redistribute_flat_fits(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], llmpar_error *error)
{
    for (int32_t i = 0; i < tensor->placements; i++) {
        const llmpar_placement *p = &tensor->placement[i];
        if (p->kind != LLMPAR_FLAT) continue;
        for (int32_t r = 0; r < llmpar__redistribute_ranks(degree); r++) { /* the check of the tensor knows the smallest part only */
            int32_t coordinate[LLMPAR_MESH_AXES];
            llmpar_local local;
            llmpar__mesh_coordinate(degree, r, coordinate);
            llmpar__redistribute_local(tensor, degree, i, coordinate, &local);
            if (local.elements > p->unit_elements - p->offset)
                return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "%s: Flat on %s: the %lld elements of rank %d at offset %lld do not fit a unit of %lld", tensor->name ? tensor->name : "tensor", llmpar_axis_name(p->axis),
                                        (long long)local.elements, (int)r, (long long)p->offset, (long long)p->unit_elements);
        }
    }
    return LLMPAR_OK;
}

static llmpar_status llmpar__redistribute_check(const llmpar_dtensor *from, const llmpar_dtensor *to, const int32_t degree[LLMPAR_MESH_AXES], llmpar_error *error)
{
    const char *name = from->name ? from->name : "tensor";
    int64_t ranks = 1, elements = 1;
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) {
        if (degree[a] < 1 || ranks * degree[a] > INT32_MAX) return llmpar_error_set(error, LLMPAR_ERR_MESH, "%s: redistribute: %s = %d, expected degrees of at least 1 whose product is a number of ranks", name, llmpar_axis_name((llmpar_axis)a), (int)degree[a]);
        ranks *= degree[a];
    }
    llmpar_status st = llmpar_dtensor_check(from, degree, error);
    if (!st) st = llmpar_dtensor_check(to, degree, error);
    if (st) return st;
    int same = from->dtype == to->dtype && from->dims == to->dims;
    for (int32_t d = 0; d < from->dims && same; d++) {
        same = from->shape[d] == to->shape[d];
        elements *= from->shape[d];
    }
    if (!same) {
        char got[128], expected[128];
        size_t a = 0, b = 0;
        llmpar__mesh_append_tensor(expected, sizeof expected, &a, from);
        llmpar__mesh_append_tensor(got, sizeof got, &b, to);
        return llmpar_error_set(error, LLMPAR_ERR_SHAPE, "redistribute: from %s to %s: expected one dtype and shape", expected, got);
    }
    if (elements > INT64_MAX / 4 / ranks / (int64_t)llmpar_dtype_size(from->dtype)) return llmpar_error_set(error, LLMPAR_ERR_OVERFLOW, "%s: redistribute: the bytes of all %lld ranks overflow", name, (long long)ranks);
    st = llmpar__redistribute_flat_fits(from, degree, error);
    if (!st) st = llmpar__redistribute_flat_fits(to, degree, error);
    if (st) return st;
    llmpar__redistribute_pair pair;
    llmpar__redistribute_pair_make(from, to, degree, &pair);
    for (int a = 0; a < LLMPAR_MESH_AXES; a++) {
        const llmpar_placement *p = llmpar__redistribute_on(pair.fresh[a] ? to : from, a);
        if (!p || !llmpar__redistribute_partial(p) || pair.kept[a] || degree[a] == 1) continue;
        int fine = from->dtype == LLMPAR_F32 || from->dtype == LLMPAR_F64 || from->dtype == LLMPAR_I64 || (from->dtype == LLMPAR_U64 && p->kind == LLMPAR_PARTIAL_SUM);
        if (!fine) return llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "%s: %s of %s on %s cannot be reduced (sum: f32 f64 i64 u64; max: f32 f64 i64)", name, p->kind == LLMPAR_PARTIAL_SUM ? "Partial(sum)" : "Partial(max)",
                                           llmpar_dtype_name(from->dtype), llmpar_axis_name(p->axis));
    }
    return LLMPAR_OK;
}

static void llmpar__redistribute_hash(uint64_t *hash, int64_t value)
{
    for (int i = 0; i < 8; i++) *hash = (*hash ^ ((uint64_t)value >> (8 * i) & 0xff)) * 0x100000001b3u;
}

static void llmpar__redistribute_hash_tensor(uint64_t *hash, const llmpar_dtensor *tensor)
{
    llmpar__redistribute_hash(hash, (int64_t)tensor->dtype);
    llmpar__redistribute_hash(hash, tensor->dims);
    llmpar__redistribute_hash(hash, tensor->placements);
    for (int32_t d = 0; d < tensor->dims; d++) llmpar__redistribute_hash(hash, tensor->shape[d]);
    for (int32_t i = 0; i < tensor->placements; i++) {
        const llmpar_placement *p = &tensor->placement[i];
        const int64_t value[] = { (int64_t)p->kind, (int64_t)p->axis, p->dim, p->replicas, p->grain, p->offset, p->unit_elements };
        int used = p->kind == LLMPAR_FLAT ? 7 : p->kind == LLMPAR_SHARD ? 5 : 2; /* what a kind does not use may be anything */
        for (int k = 0; k < used; k++)
            if (p->kind != LLMPAR_FLAT || k < 2 || k > 4) llmpar__redistribute_hash(hash, value[k]);
    }
}

LLMPAR_DEF llmpar_status llmpar_redistribute_plan_make(const llmpar_dtensor *from, const llmpar_dtensor *to, const int32_t degree[LLMPAR_MESH_AXES], llmpar_redistribute_plan *plan, llmpar_error *error)
{
    memset(plan, 0, sizeof *plan);
    llmpar_status st = llmpar__redistribute_check(from, to, degree, error);
    if (st) return st;
    llmpar__redistribute_pair pair;
    int64_t bound, exchange, item = (int64_t)llmpar_dtype_size(from->dtype);
    plan->from = *from;
    plan->to = *to;
    memcpy(plan->degree, degree, sizeof plan->degree);
    plan->fingerprint = 0xcbf29ce484222325u;
    llmpar__redistribute_hash_tensor(&plan->fingerprint, from);
    llmpar__redistribute_hash_tensor(&plan->fingerprint, to);
    llmpar__redistribute_pair_make(&plan->from, &plan->to, plan->degree, &pair);
    llmpar__redistribute_volumes(&pair, &bound, &exchange);
    plan->bound = bound * item;
    if (!pair.reductions && !bound) {
        plan->step[plan->steps++].result = *to;
        return LLMPAR_OK;
    }
    if (llmpar__redistribute_chain(&pair, plan) && plan->bytes <= plan->bound * (pair.reductions ? 2 : 1)) return LLMPAR_OK;
    plan->steps = 0;
    plan->bytes = 0;
    for (int a = 0; a < LLMPAR_MESH_AXES && !pair.reductions; a++)
        if (degree[a] > 1 && llmpar__redistribute_pairs_alike(&pair, (llmpar_axis)a)) {
            llmpar__redistribute_add(plan, LLMPAR_REDISTRIBUTE_ALL_TO_ALL, (llmpar_axis)a, to, to);
            return LLMPAR_OK;
        }
    plan->steps = 1;
    plan->step[0].op = LLMPAR_REDISTRIBUTE_EXCHANGE;
    plan->step[0].result = *to;
    plan->step[0].bytes = plan->bytes = exchange * item;
    return LLMPAR_OK;
}

/* wq f32[12,16]: [Shard(0) on tp, Flat(0) on dp_shard] -> [Replicate]
     1  all_gather      on dp_shard           768 bytes  -> [Shard(0) on tp]
     2  all_gather      on tp                1536 bytes  -> [Replicate]
   2304 bytes are sent by 4 ranks together; no plan can send less than 2304                                            */
LLMPAR_DEF size_t llmpar_redistribute_plan_print(const llmpar_redistribute_plan *plan, char *text, size_t capacity)
{
    static const char *const names[] = { "local", "all_gather", "broadcast", "reduce_scatter", "all_reduce", "all_to_all", "exchange" };
    size_t used = 0;
    char from[256], to[256];
    if (capacity) text[0] = 0;
    llmpar_dtensor_placements(&plan->from, from, sizeof from);
    llmpar_dtensor_placements(&plan->to, to, sizeof to);
    llmpar__mesh_append_tensor(text, capacity, &used, &plan->from);
    llmpar__mesh_append(text, capacity, &used, ": %s -> %s\n", from, to);
    for (int32_t i = 0; i < plan->steps; i++) {
        const llmpar_redistribute_step *step = &plan->step[i];
        int axis = step->op != LLMPAR_REDISTRIBUTE_LOCAL && step->op != LLMPAR_REDISTRIBUTE_EXCHANGE;
        llmpar_dtensor_placements(&step->result, to, sizeof to);
        llmpar__mesh_append(text, capacity, &used, "  %d  %-14s %-3s%-12s %10lld bytes  -> %s\n", (int)i + 1, names[step->op], axis ? "on" : "", axis ? llmpar_axis_name(step->axis) : "", (long long)step->bytes, to);
    }
    llmpar__mesh_append(text, capacity, &used, "%lld bytes are sent by %d ranks together; no plan can send less than %lld\n", (long long)plan->bytes, (int)llmpar__redistribute_ranks(plan->degree), (long long)plan->bound);
    return used;
}
/* ==== src/mesh/redistribute.c ==== */
/* redistribute: carrying out a plan, and undoing the cuts of a tensor for who wants it whole.

   Inside, a part is what a rank holds and nothing else: pointers to flat shards are moved to the tensor's range first. Between two steps it lies in scratch. */

#include <string.h>


/* ---- boxes ---- */

/* Moves a box between two parts. Dims that lie without a gap in both are merged, so that most boxes are one call. */
static llmpar_status llmpar__redistribute_copy(llmpar_device *device, llmpar_stream *stream, size_t item, int32_t dims, const llmpar__box *box, const llmpar_local *from, const char *in, const llmpar_local *to, char *out)
{
    int64_t length[LLMPAR_MAX_DIMS + 1], ld_in[LLMPAR_MAX_DIMS + 1], ld_out[LLMPAR_MAX_DIMS + 1]; /* innermost first */
    int64_t step_in = 1, step_out = 1, at_in = -from->flat_begin, at_out = -to->flat_begin, calls = 1;
    int32_t levels = 1;
    llmpar_status st = LLMPAR_OK;
    length[0] = ld_in[0] = ld_out[0] = 1;
    for (int32_t d = dims - 1; d >= 0; d--) {
        int64_t extent = box->end[d] - box->begin[d];
        at_in += (box->begin[d] - from->offset[d]) * step_in;
        at_out += (box->begin[d] - to->offset[d]) * step_out;
        if (extent != 1 && step_in == length[levels - 1] * ld_in[levels - 1] && step_out == length[levels - 1] * ld_out[levels - 1]) {
            length[levels - 1] *= extent;
        } else if (extent != 1) {
            length[levels] = extent;
            ld_in[levels] = step_in;
            ld_out[levels++] = step_out;
        }
        step_in *= from->shape[d];
        step_out *= to->shape[d];
    }
    llmpar_copy_rows_args rows;
    memset(&rows, 0, sizeof rows);
    rows.width = length[0];
    rows.rows = levels > 1 ? length[1] : 1;
    rows.ld_in = levels > 1 ? ld_in[1] : length[0];
    rows.ld_out = levels > 1 ? ld_out[1] : length[0];
    rows.size = item;
    for (int32_t i = 2; i < levels; i++) calls *= length[i];
    for (int64_t call = 0; call < calls && !st; call++) {
        int64_t rest = call, i = at_in, o = at_out;
        for (int32_t level = 2; level < levels; level++) {
            i += rest % length[level] * ld_in[level];
            o += rest % length[level] * ld_out[level];
            rest /= length[level];
        }
        rows.in = in + (size_t)i * item;
        rows.out = out + (size_t)o * item;
        st = levels == 1 ? device->copy(device, stream, out + (size_t)o * item, rows.in, (size_t)length[0] * item) : device->copy_rows(device, stream, &rows);
    }
    return st;
}

/* What two parts have in common, box after box: into `packed` (pack), out of it (unpack), or straight across (packed NULL). */
static llmpar_status llmpar__redistribute_boxes(const llmpar_mesh *mesh, llmpar_stream *stream, const llmpar_dtensor *tensor, const llmpar_local *from, const char *in, const llmpar_local *to, char *out, char *packed)
{
    llmpar__box box[LLMPAR__BOXES * LLMPAR__BOXES];
    size_t item = llmpar_dtype_size(tensor->dtype);
    int64_t volume;
    int32_t boxes = llmpar__mesh_common(from, to, tensor->dims, box, &volume);
    llmpar_status st = LLMPAR_OK;
    for (int32_t i = 0; i < boxes && !st; i++) {
        llmpar_local piece; /* the box as a part of its own */
        int64_t elements = 1;
        memset(&piece, 0, sizeof piece);
        for (int32_t d = 0; d < tensor->dims; d++) {
            piece.offset[d] = box[i].begin[d];
            piece.shape[d] = box[i].end[d] - box[i].begin[d];
            elements *= piece.shape[d];
        }
        st = llmpar__redistribute_copy(mesh->ctx->device, stream, item, tensor->dims, &box[i], packed && !in ? &piece : from, packed && !in ? packed : in, packed && in ? &piece : to, packed && in ? packed : out);
        if (packed) packed += (size_t)elements * item;
    }
    return st;
}

static int64_t llmpar__redistribute_volume(const llmpar_dtensor *tensor, const llmpar_local *a, const llmpar_local *b)
{
    llmpar__box box[LLMPAR__BOXES * LLMPAR__BOXES];
    int64_t volume;
    llmpar__mesh_common(a, b, tensor->dims, box, &volume);
    return volume;
}

/* ---- the table's collectives ---- */

static void llmpar__redistribute_call(llmpar_collective *call, const llmpar_dtensor *tensor, const void *send, void *recv, size_t blocks, size_t count)
{
    memset(call, 0, sizeof *call);
    call->send = send;
    call->recv = recv;
    call->blocks = blocks;
    call->count = count;
    call->dtype = tensor->dtype;
    call->tag = tensor->name;
}

/* What `coordinate` would hold at another place of its axis. */
static void llmpar__redistribute_part(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], const int32_t coordinate[LLMPAR_MESH_AXES], llmpar_axis axis, int32_t place, llmpar_local *out)
{
    int32_t at[LLMPAR_MESH_AXES];
    memcpy(at, coordinate, sizeof at);
    at[axis] = place;
    llmpar_dtensor_local(tensor, degree, at, out);
}

/* Does a part of the last cut lie in one piece in the larger rectangle? */
static int llmpar__redistribute_direct(const llmpar_dtensor *tensor, const llmpar_local *whole)
{
    const llmpar_placement *cut = &tensor->placement[tensor->placements - 1];
    for (int32_t d = 0; cut->kind == LLMPAR_SHARD && d < cut->dim; d++)
        if (whole->shape[d] != 1) return 0;
    return 1;
}

/* Undoes the last cut. A range (FLAT) and a cut of the outermost dim are received where they belong, others by way of `staging`. Empty parts are known to be empty on every rank and are not sent. */
static llmpar_status llmpar__redistribute_broadcasts(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, llmpar_stream *stream, const char *in, char *staging, char *out)
{
    const llmpar_placement *cut = &tensor->placement[tensor->placements - 1];
    llmpar_comm *comm = mesh->comm[cut->axis];
    int32_t replicas = cut->kind == LLMPAR_SHARD && cut->replicas > 1 ? cut->replicas : 1;
    llmpar_local whole, part;
    llmpar_status st = LLMPAR_OK;
    llmpar__redistribute_local(tensor, mesh->degree, tensor->placements - 1, mesh->coordinate, &whole);
    int direct = llmpar__redistribute_direct(tensor, &whole);
    for (int32_t owner = 0; owner < comm->ranks && !st; owner += replicas) {
        llmpar__redistribute_part(tensor, mesh->degree, mesh->coordinate, cut->axis, owner, &part);
        if (!part.flat_count) continue;
        int64_t first = part.flat_begin; /* in the larger rectangle, of a part in one piece */
        if (cut->kind == LLMPAR_SHARD) {
            first = part.offset[cut->dim] - whole.offset[cut->dim];
            for (int32_t d = cut->dim + 1; d < tensor->dims; d++) first *= whole.shape[d];
        }
        char *place = direct ? out + (size_t)first * llmpar_dtype_size(tensor->dtype) : staging;
        int mine = comm->rank == owner;
        llmpar_collective call;
        llmpar__redistribute_call(&call, tensor, mine ? in : NULL, mine ? NULL : place, 1, (size_t)part.flat_count);
        call.root = owner;
        if (comm->ranks > 1) st = llmpar_broadcast(comm, stream, &call);
        if (!st && (mine || !direct)) st = llmpar__redistribute_boxes(mesh, stream, tensor, &part, mine ? in : place, &whole, out, NULL);
    }
    return st;
}

/* Every rank's piece of `to` from every rank's part of `from` on one axis: [ranks][count] both ways, packed. */
static llmpar_status llmpar__redistribute_pairs(const llmpar_redistribute_plan *plan, const llmpar_mesh *mesh, llmpar_axis axis, llmpar_stream *stream, const char *in, char *scratch, char *out)
{
    llmpar_comm *comm = mesh->comm[axis];
    llmpar_local held, needed, other;
    llmpar_status st = LLMPAR_OK;
    llmpar_dtensor_local(&plan->from, mesh->degree, mesh->coordinate, &held);
    llmpar_dtensor_local(&plan->to, mesh->degree, mesh->coordinate, &needed);
    size_t count = (size_t)(held.flat_count / comm->ranks), bytes = count * llmpar_dtype_size(plan->from.dtype);
    char *received = scratch + bytes * (size_t)comm->ranks;
    if (!count) return LLMPAR_OK;
    for (int32_t r = 0; r < comm->ranks && !st; r++) {
        llmpar__redistribute_part(&plan->to, mesh->degree, mesh->coordinate, axis, r, &other);
        st = llmpar__redistribute_boxes(mesh, stream, &plan->from, &held, in, &other, NULL, scratch + (size_t)r * bytes);
    }
    llmpar_collective call;
    llmpar__redistribute_call(&call, &plan->from, scratch, received, 1, count);
    if (!st) st = llmpar_all_to_all(comm, stream, &call);
    for (int32_t r = 0; r < comm->ranks && !st; r++) {
        llmpar__redistribute_part(&plan->from, mesh->degree, mesh->coordinate, axis, r, &other);
        st = llmpar__redistribute_boxes(mesh, stream, &plan->from, &other, NULL, &needed, out, received + (size_t)r * bytes);
    }
    return st;
}

/* ---- exchange ---- */

/* One rank's view of an exchange. */
typedef struct llmpar__redistribute_exchange {
    llmpar__redistribute_pair pair;
    int32_t me[LLMPAR_MESH_AXES];
    llmpar_local held, needed;
    int64_t most_out, most_in, slots; /* elements of the largest message each way; contributions that this rank adds up (0: none) */
} llmpar__redistribute_exchange;

static void llmpar__redistribute_exchange_make(const llmpar_redistribute_plan *plan, const int32_t coordinate[LLMPAR_MESH_AXES], llmpar__redistribute_exchange *x)
{
    memset(x, 0, sizeof *x);
    llmpar__redistribute_pair_make(&plan->from, &plan->to, plan->degree, &x->pair);
    memcpy(x->me, coordinate, sizeof x->me);
    llmpar_dtensor_local(&plan->from, plan->degree, coordinate, &x->held);
    llmpar_dtensor_local(&plan->to, plan->degree, coordinate, &x->needed);
    int reduces = x->pair.contributions > 1, receives = llmpar__redistribute_needs(&x->pair, coordinate, reduces);
    x->slots = reduces && receives ? x->pair.contributions : 0;
    for (int32_t r = 0; r < x->pair.ranks; r++) {
        int32_t peer[LLMPAR_MESH_AXES];
        llmpar_local other;
        int64_t volume;
        llmpar__mesh_coordinate(plan->degree, r, peer);
        if (!memcmp(peer, coordinate, sizeof peer)) continue;
        if (llmpar__redistribute_serves(&x->pair, coordinate, peer) && llmpar__redistribute_needs(&x->pair, peer, reduces)) {
            llmpar_dtensor_local(&plan->to, plan->degree, peer, &other);
            volume = llmpar__redistribute_volume(&plan->from, &x->held, &other);
            if (volume > x->most_out) x->most_out = volume;
        }
        if (receives && llmpar__redistribute_serves(&x->pair, peer, coordinate)) {
            llmpar_dtensor_local(&plan->from, plan->degree, peer, &other);
            volume = llmpar__redistribute_volume(&plan->from, &other, &x->needed);
            if (volume > x->most_in) x->most_in = volume;
        }
    }
}

/* Slot 0 <- the tree over `n` slots that lie `stride` bytes apart. */
static llmpar_status llmpar__redistribute_tree(llmpar_device *device, llmpar_stream *stream, const llmpar_dtensor *tensor, llmpar_placement_kind kind, char *slot, int64_t n, size_t stride, int64_t count)
{
    if (n < 2) return LLMPAR_OK;
    int64_t left = llmpar_tree_split(n);
    llmpar_status st = llmpar__redistribute_tree(device, stream, tensor, kind, slot, left, stride, count);
    if (!st) st = llmpar__redistribute_tree(device, stream, tensor, kind, slot + (size_t)left * stride, n - left, stride, count);
    if (st) return st;
    const void *in[2];
    in[0] = slot;
    in[1] = slot + (size_t)left * stride;
    llmpar_tree_sum_args args;
    memset(&args, 0, sizeof args);
    args.in = in;
    args.n = 2;
    args.count = (size_t)count;
    args.out = slot;
    args.dtype = tensor->dtype;
    return kind == LLMPAR_PARTIAL_MAX ? device->max(device, stream, &args) : device->tree_sum(device, stream, &args);
}

/* Where the contribution of a coordinate stands: the last listed axis fastest. */
static int64_t llmpar__redistribute_slot(const llmpar__redistribute_pair *pair, const int32_t coordinate[LLMPAR_MESH_AXES])
{
    int64_t slot = 0;
    for (int32_t i = 0; i < pair->reductions; i++) {
        llmpar_axis axis = pair->from->placement[pair->reduced[i]].axis;
        slot = slot * pair->degree[axis] + coordinate[axis];
    }
    return slot;
}

static llmpar_status llmpar__redistribute_message(const llmpar_mesh *mesh, llmpar_stream *stream, const llmpar_dtensor *tensor, int32_t peer, const void *send, void *recv, int64_t count)
{
    llmpar_collective call;
    llmpar__redistribute_call(&call, tensor, send, recv, 1, (size_t)count);
    call.peer = peer;
    return send ? llmpar_send(mesh->world, stream, &call) : llmpar_recv(mesh->world, stream, &call);
}

/* Rounds: in round k rank r deals with rank r ^ k, the lower one sends first. So all ranks see the pairs in one order, and nobody waits in a circle.
     scratch: | outgoing message | incoming message | slot 0 | slot 1 | ..                                                                       */
static llmpar_status llmpar__redistribute_exchange_run(const llmpar_redistribute_plan *plan, const llmpar_mesh *mesh, llmpar_stream *stream, const char *in, char *scratch, char *out)
{
    const llmpar_dtensor *tensor = &plan->from;
    llmpar_device *device = mesh->ctx->device;
    size_t item = llmpar_dtype_size(tensor->dtype);
    llmpar__redistribute_exchange x;
    llmpar__redistribute_exchange_make(plan, mesh->coordinate, &x);
    const llmpar__redistribute_pair *pair = &x.pair;
    int32_t me = llmpar_mesh_rank_at(mesh, mesh->coordinate);
    int reduces = pair->contributions > 1, receives = llmpar__redistribute_needs(pair, x.me, reduces);
    size_t part = (size_t)x.needed.flat_count * item;
    char *incoming = scratch + (size_t)x.most_out * item, *slots = incoming + (size_t)x.most_in * item;
    llmpar_status st = LLMPAR_OK;
    if (receives) st = llmpar__redistribute_boxes(mesh, stream, tensor, &x.held, in, &x.needed, reduces ? slots + (size_t)llmpar__redistribute_slot(pair, x.me) * part : out, NULL);
    int32_t rounds = 1;
    while (rounds < pair->ranks) rounds *= 2;
    for (int32_t k = 1; k < rounds && !st; k++) {
        int32_t peer = me ^ k, at[LLMPAR_MESH_AXES];
        llmpar_local other;
        if (peer >= pair->ranks) continue;
        llmpar__mesh_coordinate(plan->degree, peer, at);
        for (int turn = 0; turn < 2 && !st; turn++) {
            if ((me < peer) == (turn == 0)) {
                if (!llmpar__redistribute_serves(pair, x.me, at) || !llmpar__redistribute_needs(pair, at, reduces)) continue;
                llmpar_dtensor_local(&plan->to, plan->degree, at, &other);
                int64_t volume = llmpar__redistribute_volume(tensor, &x.held, &other);
                if (volume) st = llmpar__redistribute_boxes(mesh, stream, tensor, &x.held, in, &other, NULL, scratch);
                if (volume && !st) st = llmpar__redistribute_message(mesh, stream, tensor, peer, scratch, NULL, volume);
            } else {
                if (!receives || !llmpar__redistribute_serves(pair, at, x.me)) continue;
                llmpar_dtensor_local(&plan->from, plan->degree, at, &other);
                int64_t volume = llmpar__redistribute_volume(tensor, &other, &x.needed);
                if (volume) st = llmpar__redistribute_message(mesh, stream, tensor, peer, NULL, incoming, volume);
                if (volume && !st) st = llmpar__redistribute_boxes(mesh, stream, tensor, &other, NULL, &x.needed, reduces ? slots + (size_t)llmpar__redistribute_slot(pair, at) * part : out, incoming);
            }
        }
    }
    if (st || !reduces || !part) return st;

    int64_t stride = 1;
    for (int32_t i = pair->reductions - 1; i >= 0 && receives; i--) {
        const llmpar_placement *p = &plan->from.placement[pair->reduced[i]];
        int64_t n = plan->degree[p->axis];
        for (int64_t base = 0; base < pair->contributions && !st; base += stride * n)
            st = llmpar__redistribute_tree(device, stream, tensor, p->kind, slots + (size_t)base * part, n, (size_t)stride * part, x.needed.flat_count);
        stride *= n;
    }
    if (receives && !st) st = device->copy(device, stream, out, slots, part);
    for (int32_t k = 1; k < rounds && !st; k++) { /* from the first of the ranks that need the same to the others */
        int32_t peer = me ^ k, at[LLMPAR_MESH_AXES];
        int same = 1;
        if (peer >= pair->ranks) continue;
        llmpar__mesh_coordinate(plan->degree, peer, at);
        for (int a = 0; a < LLMPAR_MESH_AXES; a++) same = same && at[a] / pair->to_group[a] == x.me[a] / pair->to_group[a];
        if (!same || !llmpar__redistribute_needs(pair, at, 0)) continue;
        if (receives) st = llmpar__redistribute_message(mesh, stream, tensor, peer, out, NULL, x.needed.flat_count);
        else if (llmpar__redistribute_needs(pair, at, 1)) st = llmpar__redistribute_message(mesh, stream, tensor, peer, NULL, out, x.needed.flat_count);
    }
    return st;
}

/* ---- plans ---- */

/* Step i of a plan undoes a cut of, or reduces, what the step before left: the first one has the request itself, with cuts that do something last. */
static void llmpar__redistribute_before(const llmpar_redistribute_plan *plan, int32_t i, llmpar_dtensor *out)
{
    if (i) *out = plan->step[i - 1].result;
    else llmpar__redistribute_normal(&plan->from, plan->degree, out);
}

static int64_t llmpar__redistribute_staging(const llmpar_dtensor *tensor, const int32_t degree[LLMPAR_MESH_AXES], const int32_t coordinate[LLMPAR_MESH_AXES])
{
    const llmpar_placement *cut = &tensor->placement[tensor->placements - 1];
    int64_t most = 0;
    llmpar_local whole, part;
    llmpar__redistribute_local(tensor, degree, tensor->placements - 1, coordinate, &whole);
    if (llmpar__redistribute_direct(tensor, &whole)) return 0;
    for (int32_t r = 0; r < degree[cut->axis]; r++) {
        llmpar__redistribute_part(tensor, degree, coordinate, cut->axis, r, &part);
        if (part.elements > most) most = part.elements;
    }
    return most;
}

LLMPAR_DEF int64_t llmpar_redistribute_scratch(const llmpar_redistribute_plan *plan, const int32_t coordinate[LLMPAR_MESH_AXES])
{
    int64_t elements = 0, staging = 0; /* the parts between the steps, each in its own place, then the largest staging area */
    for (int32_t i = 0; i < plan->steps; i++) {
        const llmpar_redistribute_step *step = &plan->step[i];
        llmpar_local local;
        llmpar_dtensor_local(&step->result, plan->degree, coordinate, &local);
        if (i + 1 < plan->steps) elements += local.flat_count;
        if (step->op == LLMPAR_REDISTRIBUTE_BROADCAST) {
            llmpar_dtensor before;
            llmpar__redistribute_before(plan, i, &before);
            int64_t need = llmpar__redistribute_staging(&before, plan->degree, coordinate);
            if (need > staging) staging = need;
        } else if (step->op == LLMPAR_REDISTRIBUTE_ALL_TO_ALL) {
            staging = 2 * local.flat_count;
        } else if (step->op == LLMPAR_REDISTRIBUTE_EXCHANGE) {
            llmpar__redistribute_exchange x;
            llmpar__redistribute_exchange_make(plan, coordinate, &x);
            staging = x.most_out + x.most_in + x.slots * x.needed.flat_count;
        }
    }
    return elements + staging;
}

static llmpar_status llmpar__redistribute_step_run(const llmpar_redistribute_plan *plan, int32_t i, const llmpar_mesh *mesh, llmpar_stream *stream, const char *in, char *staging, char *out)
{
    const llmpar_redistribute_step *step = &plan->step[i];
    llmpar_comm *comm = mesh->comm[step->axis];
    llmpar_dtensor before;
    llmpar_local held, result;
    llmpar_collective call;
    size_t blocks = 1, count = 0;
    llmpar__redistribute_before(plan, i, &before);
    llmpar_dtensor_local(&before, mesh->degree, mesh->coordinate, &held);
    llmpar_dtensor_local(&step->result, mesh->degree, mesh->coordinate, &result);
    switch (step->op) {
    case LLMPAR_REDISTRIBUTE_LOCAL: return llmpar__redistribute_boxes(mesh, stream, &plan->from, &held, in, &result, out, NULL);
    case LLMPAR_REDISTRIBUTE_BROADCAST: return llmpar__redistribute_broadcasts(&before, mesh, stream, in, staging, out);
    case LLMPAR_REDISTRIBUTE_ALL_TO_ALL: return llmpar__redistribute_pairs(plan, mesh, step->axis, stream, in, staging, out);
    case LLMPAR_REDISTRIBUTE_EXCHANGE: return llmpar__redistribute_exchange_run(plan, mesh, stream, in, staging, out);
    case LLMPAR_REDISTRIBUTE_ALL_GATHER: llmpar__redistribute_even(&before, mesh->degree, mesh->coordinate, &blocks, &count); break;
    case LLMPAR_REDISTRIBUTE_REDUCE_SCATTER: llmpar__redistribute_even(&step->result, mesh->degree, mesh->coordinate, &blocks, &count); break;
    case LLMPAR_REDISTRIBUTE_ALL_REDUCE: count = (size_t)held.flat_count; break;
    }
    if (!count) return LLMPAR_OK;
    llmpar__redistribute_call(&call, &before, in, out, blocks, count);
    if (step->op == LLMPAR_REDISTRIBUTE_ALL_GATHER) return llmpar_all_gather(comm, stream, &call);
    for (int32_t p = 0; p < before.placements; p++)
        if (before.placement[p].axis == step->axis && before.placement[p].kind == LLMPAR_PARTIAL_MAX) call.op = LLMPAR_MAX;
    return step->op == LLMPAR_REDISTRIBUTE_ALL_REDUCE ? llmpar_all_reduce(comm, stream, &call) : llmpar_reduce_scatter(comm, stream, &call);
}

static llmpar_status llmpar__redistribute_run(const llmpar_redistribute_plan *plan, const llmpar_mesh *mesh, llmpar_stream *stream, const char *in, char *scratch, char *out)
{
    size_t item = llmpar_dtype_size(plan->from.dtype), between = 0;
    char *area = scratch;
    llmpar_local local;
    llmpar_status st = LLMPAR_OK;
    for (int32_t i = 0; i + 1 < plan->steps; i++) {
        llmpar_dtensor_local(&plan->step[i].result, mesh->degree, mesh->coordinate, &local);
        between += (size_t)local.flat_count * item;
    }
    for (int32_t i = 0; i < plan->steps && !st; i++) {
        int last = i + 1 == plan->steps;
        llmpar_dtensor_local(&plan->step[i].result, mesh->degree, mesh->coordinate, &local);
        st = llmpar__redistribute_step_run(plan, i, mesh, stream, in, scratch + between, last ? out : area);
        in = area;
        area += last ? 0 : (size_t)local.flat_count * item;
    }
    return st;
}

static int llmpar__redistribute_overlap(const void *a, size_t a_bytes, const void *b, size_t b_bytes)
{
    return a_bytes && b_bytes && (uintptr_t)a < (uintptr_t)b + b_bytes && (uintptr_t)b < (uintptr_t)a + a_bytes;
}

LLMPAR_DEF llmpar_status llmpar_redistribute(const llmpar_redistribute_plan *plan, const llmpar_mesh *mesh, llmpar_stream *stream, const void *in, void *scratch, void *out)
{
    llmpar_device *device = mesh->ctx->device;
    const llmpar_dtensor *to = &plan->to;
    const char *name = to->name ? to->name : "tensor";
    size_t item = llmpar_dtype_size(to->dtype);
    llmpar_local held, needed;
    if (plan->steps < 1) return llmpar_fail(mesh->ctx, LLMPAR_ERR_ARGUMENT, "redistribute: the plan is empty: expected one that plan_make has made");
    for (int a = 0; a < LLMPAR_MESH_AXES; a++)
        if (plan->degree[a] != mesh->degree[a])
            return llmpar_fail(mesh->ctx, LLMPAR_ERR_MESH, "%s: redistribute: the plan is for a mesh with %s = %d, expected this mesh's %d", name, llmpar_axis_name((llmpar_axis)a), (int)plan->degree[a], (int)mesh->degree[a]);
    llmpar_dtensor_local(&plan->from, mesh->degree, mesh->coordinate, &held);
    llmpar_dtensor_local(to, mesh->degree, mesh->coordinate, &needed);
    size_t in_bytes = (size_t)held.flat_count * item, out_bytes = (size_t)needed.flat_count * item, scratch_bytes = (size_t)llmpar_redistribute_scratch(plan, mesh->coordinate) * item;
    if ((in_bytes && !in) || (out_bytes && !out) || (scratch_bytes && !scratch))
        return llmpar_fail(mesh->ctx, LLMPAR_ERR_ARGUMENT, "%s: redistribute: %s is NULL, expected room for %lu bytes", name, in_bytes && !in ? "in" : out_bytes && !out ? "out" : "scratch",
                           (unsigned long)(in_bytes && !in ? in_bytes : out_bytes && !out ? out_bytes : scratch_bytes));
    const char *source = in_bytes ? (const char *)in + (size_t)held.shard_begin * item : NULL;
    char *target = out_bytes ? (char *)out + (size_t)needed.shard_begin * item : NULL;
    if (llmpar__redistribute_overlap(source, in_bytes, target, out_bytes) || llmpar__redistribute_overlap(scratch, scratch_bytes, source, in_bytes) || llmpar__redistribute_overlap(scratch, scratch_bytes, target, out_bytes))
        return llmpar_fail(mesh->ctx, LLMPAR_ERR_ARGUMENT, "%s: redistribute: in, scratch and out overlap", name);

    char tag[64], before[64], after[64]; /* the barrier compares tags: the request as a number, and, as far as it fits, in words */
    size_t used = 0;
    llmpar_dtensor_placements(&plan->from, before, sizeof before);
    llmpar_dtensor_placements(to, after, sizeof after);
    llmpar__mesh_append(tag, sizeof tag, &used, "redistribute %08x %s %s -> %s", (unsigned)(plan->fingerprint ^ plan->fingerprint >> 32), name, before, after);
    llmpar_status st = llmpar_comm_barrier(mesh->world, stream, tag);
    llmpar__redistribute_pair pair;
    llmpar__redistribute_pair_make(&plan->from, to, plan->degree, &pair);
    if (!st && out_bytes && !llmpar__redistribute_needs(&pair, mesh->coordinate, 0)) { /* Partial(sum) whose value stands at coordinate 0 */
        llmpar_scale_args minus;
        memset(&minus, 0, sizeof minus);
        minus.count = (size_t)needed.flat_count;
        minus.x = target;
        minus.factor = -1;
        minus.dtype = to->dtype;
        st = device->zero(device, stream, target, out_bytes);
        if (!st && (to->dtype == LLMPAR_F32 || to->dtype == LLMPAR_F64)) st = device->scale(device, stream, &minus);
        if (plan->step[0].op == LLMPAR_REDISTRIBUTE_LOCAL) return st;
    }
    if (!st) st = llmpar__redistribute_run(plan, mesh, stream, source, (char *)scratch, target);
    return st;
}

/* ---- whole tensors ---- */

/* The plan that undoes one cut after the other, as far as this rank's axes go: what the ranks of an axis decide, they decide alike, since only what lies on that axis counts. */
static void llmpar__redistribute_full_plan(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, llmpar_redistribute_plan *plan)
{
    llmpar_dtensor now;
    memset(plan, 0, sizeof *plan);
    plan->from = plan->to = *tensor;
    plan->to.placements = 0;
    memcpy(plan->degree, mesh->degree, sizeof plan->degree);
    llmpar__redistribute_normal(tensor, mesh->degree, &now);
    while (now.placements || !plan->steps) {
        llmpar_redistribute_step *step = &plan->step[plan->steps++];
        size_t blocks, count;
        if (now.placements) {
            step->axis = now.placement[now.placements - 1].axis;
            step->op = llmpar__redistribute_even(&now, mesh->degree, mesh->coordinate, &blocks, &count) ? LLMPAR_REDISTRIBUTE_ALL_GATHER : LLMPAR_REDISTRIBUTE_BROADCAST;
            now.placements--;
        }
        step->result = now;
    }
}

LLMPAR_DEF int64_t llmpar_dtensor_full_scratch(const llmpar_dtensor *tensor, const llmpar_mesh *mesh)
{
    llmpar_redistribute_plan plan;
    llmpar__redistribute_full_plan(tensor, mesh, &plan);
    return llmpar_redistribute_scratch(&plan, mesh->coordinate);
}

LLMPAR_DEF llmpar_status llmpar_dtensor_full(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, llmpar_stream *stream, const void *local, void *scratch, void *full)
{
    const char *name = tensor->name ? tensor->name : "tensor";
    llmpar_redistribute_plan plan;
    llmpar_local part;
    llmpar_error error;
    llmpar_error_clear(&error);
    llmpar_status st = llmpar_dtensor_check(tensor, mesh->degree, &error);
    if (st) return llmpar_fail(mesh->ctx, st, "%s", error.text);
    for (int32_t i = 0; i < tensor->placements; i++) {
        const llmpar_placement *p = &tensor->placement[i];
        int partial = p->kind == LLMPAR_PARTIAL_SUM || p->kind == LLMPAR_PARTIAL_MAX, elsewhere = p->kind != LLMPAR_REPLICATE && p->axis != LLMPAR_AXIS_DP_SHARD && p->axis != LLMPAR_AXIS_TP;
        if ((partial || elsewhere) && mesh->degree[p->axis] > 1) {
            char placements[256];
            llmpar_dtensor_placements(tensor, placements, sizeof placements);
            return llmpar_fail(mesh->ctx, LLMPAR_ERR_UNSUPPORTED, "%s: %s cannot be made whole: expected Shard or Flat on dp_shard and tp only", name, placements);
        }
    }
    for (int32_t i = 0; i < tensor->placements; i++) { /* the check knows the smallest part only */
        const llmpar_placement *p = &tensor->placement[i];
        llmpar__redistribute_local(tensor, mesh->degree, i, mesh->coordinate, &part);
        if (p->kind == LLMPAR_FLAT && part.elements > p->unit_elements - p->offset)
            return llmpar_fail(mesh->ctx, LLMPAR_ERR_SHAPE, "%s: Flat on %s: %lld elements at offset %lld do not fit a unit of %lld", name, llmpar_axis_name(p->axis), (long long)part.elements,
                               (long long)p->offset, (long long)p->unit_elements);
    }
    llmpar__redistribute_full_plan(tensor, mesh, &plan);
    llmpar_dtensor_local(tensor, mesh->degree, mesh->coordinate, &part);
    return llmpar__redistribute_run(&plan, mesh, stream, (const char *)local + (size_t)part.shard_begin * llmpar_dtype_size(tensor->dtype), (char *)scratch, (char *)full);
}

LLMPAR_DEF void llmpar_dtensor_cut(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, const void *full, void *local)
{
    llmpar_local part;
    size_t item = llmpar_dtype_size(tensor->dtype);
    llmpar_dtensor_local(tensor, mesh->degree, mesh->coordinate, &part);
    char *out = (char *)local + (size_t)part.shard_begin * item;
    int64_t run = tensor->dims ? part.shape[tensor->dims - 1] : 1, at = part.flat_begin, end = part.flat_begin + part.flat_count;
    while (at < end) { /* a run of the rectangle's innermost dim at a time */
        int64_t length = run - at % run, rest = at / run, from = tensor->dims ? part.offset[tensor->dims - 1] + at % run : 0, stride = tensor->dims ? tensor->shape[tensor->dims - 1] : 1;
        if (length > end - at) length = end - at;
        for (int32_t d = tensor->dims - 2; d >= 0; d--) {
            from += (part.offset[d] + rest % part.shape[d]) * stride;
            rest /= part.shape[d];
            stride *= tensor->shape[d];
        }
        memcpy(out, (const char *)full + (size_t)from * item, (size_t)length * item);
        out += (size_t)length * item;
        at += length;
    }
}

/* ==== src/tp/tp.c ==== */

#include <string.h>


LLMPAR_DEF llmpar_status llmpar_tp_init(llmpar_ctx *ctx, llmpar_comm *comm, int32_t canon, int32_t kv_heads, int32_t sequence_parallel, llmpar_tp *out)
{
    memset(out, 0, sizeof *out);
    out->ctx = ctx;
    out->comm = comm;
    out->rank = comm->rank;
    out->ranks = comm->ranks;
    if (canon == 0) canon = 8;
    if (!llmpar_is_pow2(canon)) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "tp: canon = %d is not a power of two", (int)canon);
    /* Ranks that do not divide the pieces still give a deterministic result, one piece a rank, but one that depends on tp. */
    out->pieces = canon % comm->ranks == 0 ? canon : comm->ranks;
    out->sequence_parallel = sequence_parallel && comm->ranks > 1;
    out->replicas = 1;
    if (kv_heads % comm->ranks != 0) {
        if (kv_heads <= 0 || comm->ranks % kv_heads != 0)
            return llmpar_fail(ctx, LLMPAR_ERR_MESH, "tp: num_key_value_heads = %d and tp = %d: one must divide the other", (int)kv_heads, (int)comm->ranks);
        out->replicas = comm->ranks / kv_heads;
        return llmpar_comm_split(comm, comm->rank / out->replicas, comm->rank, "tp.kv", &out->kv);
    }
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_tp_destroy(llmpar_tp *tp)
{
    llmpar_comm_destroy(tp->kv);
    tp->kv = NULL;
}

LLMPAR_DEF int64_t llmpar_tp_begin(const llmpar_tp *tp, int64_t grains) { return llmpar_piece_begin(tp->rank, grains, tp->ranks); }

LLMPAR_DEF int64_t llmpar_tp_count(const llmpar_tp *tp, int64_t grains)
{
    return llmpar_piece_begin(tp->rank + 1, grains, tp->ranks) - llmpar_piece_begin(tp->rank, grains, tp->ranks);
}

/* Enough for one piece a query head group: operands (q, k, v) x local pieces. */
#define LLMPAR__TP_SEGMENTS 192

/* First of this operand's own grains whose query grain is >= limit: ceil(limit / per), clamped to what the rank holds. */
static int64_t llmpar__tp_operand_grain(const llmpar_tp_operand *operand, int64_t limit)
{
    int64_t per = operand->per > 0 ? operand->per : 1;
    int64_t grain = (limit + per - 1) / per, end = operand->begin + operand->count;
    return grain < operand->begin ? operand->begin : grain > end ? end : grain;
}

/* The segments of this rank's pieces, in piece order and within a piece in operand order; -1 when they do not fit. With pointers = 0 only extents are filled in. */
static int32_t llmpar__tp_segments(const llmpar_tp *tp, llmpar_gemm_kind kind, int64_t grains, const llmpar_tp_operand *operands, int32_t operand_count, llmpar_dtype dtype, int pointers,
                                   llmpar_gemm_segment *segments)
{
    size_t size = llmpar_dtype_size(dtype);
    int32_t local = tp->pieces / tp->ranks, count = 0;
    for (int32_t piece = 0; piece < local; piece++) {
        int64_t global = (int64_t)tp->rank * local + piece;
        int64_t low = llmpar_piece_begin(global, grains, tp->pieces), high = llmpar_piece_begin(global + 1, grains, tp->pieces);
        for (int32_t o = 0; o < operand_count; o++) {
            const llmpar_tp_operand *operand = &operands[o];
            int64_t first = llmpar__tp_operand_grain(operand, low), last = llmpar__tp_operand_grain(operand, high);
            if (last <= first) continue;
            if (count == LLMPAR__TP_SEGMENTS) return -1;
            llmpar_gemm_segment *segment = &segments[count++];
            memset(segment, 0, sizeof *segment);
            int64_t skip = (first - operand->begin) * operand->grain;
            segment->k = (last - first) * operand->grain;
            segment->piece = piece;
            segment->lda = operand->lda;
            segment->ldb = operand->ldb;
            if (pointers) {
                segment->a = (const char *)operand->a + (size_t)skip * size;
                segment->b = (const char *)operand->b + (size_t)(kind == LLMPAR_GEMM_NT ? skip : skip * operand->ldb) * size;
            }
        }
    }
    return count;
}

LLMPAR_DEF llmpar_status llmpar_tp_partial(const llmpar_tp *tp, llmpar_stream *stream, llmpar_gemm_kind kind, int64_t rows, int64_t dim, int64_t grains, const llmpar_tp_operand *operands, int32_t operand_count,
                                           llmpar_dtype dtype, void *out, void *workspace, size_t workspace_bytes)
{
    llmpar_gemm_segment segments[LLMPAR__TP_SEGMENTS];
    llmpar_gemm_args args;
    memset(&args, 0, sizeof args);
    args.segment_count = llmpar__tp_segments(tp, kind, grains, operands, operand_count, dtype, 1, segments);
    if (args.segment_count < 0) return llmpar_fail(tp->ctx, LLMPAR_ERR_SHAPE, "tp: %d local pieces with %d operands need more than %d segments", (int)(tp->pieces / tp->ranks), (int)operand_count, LLMPAR__TP_SEGMENTS);
    args.m = rows;
    args.n = dim;
    args.c = out;
    args.ldc = dim;
    args.segments = segments;
    args.pieces = tp->pieces / tp->ranks;
    args.kind = kind;
    args.dtype = dtype;
    args.workspace = workspace;
    args.workspace_bytes = workspace_bytes;
    return tp->ctx->device->gemm(tp->ctx->device, stream, &args);
}

LLMPAR_DEF size_t llmpar_tp_partial_workspace(const llmpar_tp *tp, llmpar_gemm_kind kind, int64_t rows, int64_t dim, int64_t grains, const llmpar_tp_operand *operands, int32_t operand_count, llmpar_dtype dtype)
{
    llmpar_gemm_segment segments[LLMPAR__TP_SEGMENTS];
    llmpar_gemm_args args;
    memset(&args, 0, sizeof args);
    args.segment_count = llmpar__tp_segments(tp, kind, grains, operands, operand_count, dtype, 0, segments);
    if (args.segment_count < 0) return 0; /* the call itself reports it */
    args.m = rows;
    args.n = dim;
    args.ldc = dim;
    args.segments = segments;
    args.pieces = tp->pieces / tp->ranks;
    args.kind = kind;
    args.dtype = dtype;
    return tp->ctx->device->gemm_workspace(tp->ctx->device, &args);
}

static void llmpar__tp_product_args(llmpar_gemm_args *args, llmpar_gemm_segment *segment, llmpar_gemm_kind kind, int64_t m, int64_t n, int64_t k, llmpar_dtype dtype)
{
    memset(args, 0, sizeof *args);
    memset(segment, 0, sizeof *segment);
    segment->k = k;
    args->m = m;
    args->n = n;
    args->ldc = n;
    args->segments = segment;
    args->segment_count = 1;
    args->pieces = 1;
    args->kind = kind;
    args->dtype = dtype;
}

LLMPAR_DEF llmpar_status llmpar_tp_product(const llmpar_tp *tp, llmpar_stream *stream, llmpar_gemm_kind kind, int64_t m, int64_t n, int64_t k, const void *a, int64_t lda, const void *b, int64_t ldb, void *out,
                                           int64_t ldo, llmpar_dtype dtype, void *workspace, size_t workspace_bytes)
{
    llmpar_gemm_args args;
    llmpar_gemm_segment segment;
    llmpar__tp_product_args(&args, &segment, kind, m, n, k, dtype);
    segment.a = a;
    segment.b = b;
    segment.lda = lda;
    segment.ldb = ldb;
    args.c = out;
    args.ldc = ldo;
    args.workspace = workspace;
    args.workspace_bytes = workspace_bytes;
    return tp->ctx->device->gemm(tp->ctx->device, stream, &args);
}

LLMPAR_DEF size_t llmpar_tp_product_workspace(const llmpar_tp *tp, llmpar_gemm_kind kind, int64_t m, int64_t n, int64_t k, llmpar_dtype dtype)
{
    llmpar_gemm_args args;
    llmpar_gemm_segment segment;
    llmpar__tp_product_args(&args, &segment, kind, m, n, k, dtype);
    return tp->ctx->device->gemm_workspace(tp->ctx->device, &args);
}

/* One piece a leaf: rows [i*rows/leaves, (i+1)*rows/leaves). The list lives on the rank's heap since leaves have no cap. */
static llmpar_status llmpar__tp_leaves(const llmpar_tp *tp, int64_t rows, int64_t leaves, const void *dy, int64_t lddy, const void *x, int64_t ldx, llmpar_dtype dtype, llmpar_gemm_args *args)
{
    llmpar_gemm_segment *segments = (llmpar_gemm_segment *)llmpar_heap_zalloc(&tp->ctx->heap, (size_t)leaves, sizeof *segments);
    if (!segments) return llmpar_fail(tp->ctx, LLMPAR_ERR_MEMORY, "tp: no memory for %lld gemm segments", (long long)leaves);
    size_t size = llmpar_dtype_size(dtype);
    int64_t each = rows / leaves;
    for (int64_t i = 0; i < leaves; i++) {
        segments[i].k = each;
        segments[i].piece = (int32_t)i;
        segments[i].lda = lddy;
        segments[i].ldb = ldx;
        if (dy) segments[i].a = (const char *)dy + (size_t)(i * each * lddy) * size;
        if (x) segments[i].b = (const char *)x + (size_t)(i * each * ldx) * size;
    }
    args->segments = segments;
    args->segment_count = (int32_t)leaves;
    args->pieces = (int32_t)leaves;
    args->kind = LLMPAR_GEMM_TN;
    args->dtype = dtype;
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_tp_weight_gradient(const llmpar_tp *tp, llmpar_stream *stream, int64_t rows, int64_t leaves, int64_t out_dim, int64_t in_dim, const void *dy, int64_t lddy, const void *x, int64_t ldx, void *dw,
                                                   llmpar_dtype dtype, void *workspace, size_t workspace_bytes)
{
    llmpar_gemm_args args;
    memset(&args, 0, sizeof args);
    if (leaves < 1 || rows % leaves) return llmpar_fail(tp->ctx, LLMPAR_ERR_SHAPE, "tp: %lld leaves do not divide %lld rows", (long long)leaves, (long long)rows);
    llmpar_status status = llmpar__tp_leaves(tp, rows, leaves, dy, lddy, x, ldx, dtype, &args);
    if (status) return status;
    args.m = out_dim;
    args.n = in_dim;
    args.c = dw;
    args.ldc = in_dim;
    args.workspace = workspace;
    args.workspace_bytes = workspace_bytes;
    status = tp->ctx->device->gemm(tp->ctx->device, stream, &args);
    llmpar_heap_free(&tp->ctx->heap, (void *)(uintptr_t)args.segments);
    return status;
}

LLMPAR_DEF size_t llmpar_tp_weight_gradient_workspace(const llmpar_tp *tp, int64_t rows, int64_t leaves, int64_t out_dim, int64_t in_dim, llmpar_dtype dtype)
{
    llmpar_gemm_args args;
    memset(&args, 0, sizeof args);
    if (llmpar__tp_leaves(tp, rows, leaves, NULL, out_dim, NULL, in_dim, dtype, &args)) return 0;
    args.m = out_dim;
    args.n = in_dim;
    args.ldc = in_dim;
    size_t bytes = tp->ctx->device->gemm_workspace(tp->ctx->device, &args);
    llmpar_heap_free(&tp->ctx->heap, (void *)(uintptr_t)args.segments);
    return bytes;
}

LLMPAR_DEF llmpar_status llmpar_tp_gather(const llmpar_tp *tp, llmpar_stream *stream, const char *tag, int64_t batch, int64_t t, int64_t dim, const void *local, void *full, llmpar_dtype dtype)
{
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.send = local;
    call.recv = full;
    call.count = (size_t)(t / tp->ranks * dim);
    call.blocks = (size_t)batch;
    call.dtype = dtype;
    call.tag = tag;
    return llmpar_all_gather(tp->comm, stream, &call);
}

static llmpar_status llmpar__tp_combine(const llmpar_tp *tp, llmpar_stream *stream, const char *tag, int64_t batch, int64_t t, size_t row, const void *in, void *out, llmpar_dtype dtype)
{
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.send = in;
    call.recv = out;
    call.dtype = dtype;
    call.tag = tag;
    if (tp->sequence_parallel) {
        call.count = (size_t)(t / tp->ranks) * row;
        call.blocks = (size_t)batch;
        return llmpar_reduce_scatter(tp->comm, stream, &call);
    }
    call.count = (size_t)(batch * t) * row;
    return llmpar_all_reduce(tp->comm, stream, &call);
}

LLMPAR_DEF llmpar_status llmpar_tp_reduce(const llmpar_tp *tp, llmpar_stream *stream, const char *tag, int64_t batch, int64_t t, int64_t dim, const void *partial, void *out, llmpar_dtype dtype)
{
    return llmpar__tp_combine(tp, stream, tag, batch, t, (size_t)dim, partial, out, dtype);
}

LLMPAR_DEF llmpar_status llmpar_tp_select(const llmpar_tp *tp, llmpar_stream *stream, const char *tag, int64_t batch, int64_t t, int64_t dim, const void *part, void *out, llmpar_dtype dtype)
{
    size_t bytes = (size_t)dim * llmpar_dtype_size(dtype);
    if (tp->ranks == 1) return llmpar__tp_combine(tp, stream, tag, batch, t, (size_t)dim, part, out, dtype); /* a copy, of any width */
    if (bytes % 8) return llmpar_fail(tp->ctx, LLMPAR_ERR_SHAPE, "tp: rows of %lld elements are no multiple of 8 bytes", (long long)dim);
    return llmpar__tp_combine(tp, stream, tag, batch, t, bytes / 8, part, out, LLMPAR_U64);
}

#undef LLMPAR__TP_SEGMENTS

/* ==== src/fsdp/flat.c ==== */
/* ==== src/fsdp/fsdp_internal.h ==== */
/* fsdp_internal: the state that flat.c lays out and executor.c runs over. */
#ifndef LLMPAR_FSDP_INTERNAL_H
#define LLMPAR_FSDP_INTERNAL_H


#define LLMPAR__UNIT_EVENTS 64 /* instructions in a unit's forward or backward */

typedef struct llmpar__flat {
    llmpar_unit unit;                 /* name and params are copies owned here */
    int64_t elements;                 /* of the whole flat buffer, padding included */
    int64_t shard_elements;
    int64_t *offset;                  /* [param_count] in the flat buffer; [param_count] = end of the last parameter */
    int64_t *count;                   /* [param_count] tp-local elements */
    llmpar_segment *segments;
    int32_t segment_count;
    int32_t gathers;                  /* unshard() calls and GATHER not yet undone */
    void *shard;                      /* parameters; PARAMETERS */
    void *gathered;                   /* whole flat buffer, or NULL; GATHERED. == shard where unsharded */
    void **params;                    /* [param_count] into gathered */
    void **grads;                     /* [2][param_count] scratch for unit calls */
    void *grad[2][2][LLMPAR_GRAD_SLOTS]; /* [use][local][slot]; GRADIENTS */
    void **output, **saved, **dinput; /* [micro_batches] during a run; ACTIVATIONS */
    char *label[6];                   /* names of its buffers and collectives for messages */
} llmpar__flat;
enum { LLMPAR__LABEL_SHARD, LLMPAR__LABEL_GATHER, LLMPAR__LABEL_GRADIENT, LLMPAR__LABEL_REDUCE, LLMPAR__LABEL_REPLICA, LLMPAR__LABEL_ACTIVATIONS };

struct llmpar_fsdp {
    llmpar_ctx *ctx;
    llmpar_mesh *mesh;
    llmpar_device *device;
    llmpar_arena *arena;
    llmpar_dtype dtype;
    int32_t unsharded, replicas;
    llmpar_comm *shard_comm;          /* dp_shard; one rank where unsharded */
    llmpar_comm *replica_comm;        /* dp_replicate, or all of dp where unsharded */
    int32_t counts;                   /* 1: this rank's shards count in norms (replica coordinate 0) */
    uint64_t seed;
    llmpar__flat *units;
    int32_t unit_count;
    llmpar_stream *stream[LLMPAR_STREAM_COUNT];
    llmpar_event **event;             /* by instruction index, NULL until needed */
    int32_t event_count;
    llmpar_event *unit_event[LLMPAR__UNIT_EVENTS + 1];
    llmpar_event *free_event[LLMPAR_STREAM_COUNT]; /* behind the last release on each stream */
    uint64_t free_serial[LLMPAR_STREAM_COUNT], free_seen[LLMPAR_STREAM_COUNT][LLMPAR_STREAM_COUNT];
    int64_t *scalars;                 /* device: loss limbs, then square limbs */
};
#define LLMPAR__SCALARS (2 * LLMPAR_EXACT_SUM_LIMBS)

/* Allocates and enqueues the all-gather of a unit on `stream`. */
LLMPAR__PRIVATE llmpar_status llmpar__fsdp_gather(llmpar_fsdp *fsdp, llmpar__flat *flat, llmpar_stream *stream);
LLMPAR__PRIVATE void llmpar__fsdp_release(llmpar_fsdp *fsdp, llmpar__flat *flat);
/* Index of the first tensor over the world with a non-finite element: unit * 65536 + param for parameters, + 2^40 for the gradients in buffer 0; -1: none. Collective. */
LLMPAR__PRIVATE llmpar_status llmpar__fsdp_first_nonfinite(llmpar_fsdp *fsdp, int64_t *index);

#endif
/* ---- src/fsdp/flat.c goes on ---- */

#include <string.h>
#include <stdio.h>


/* ---- layout ---- */

LLMPAR_DEF void llmpar_fsdp_dtensor(const llmpar_fsdp *fsdp, int32_t unit, int32_t param, llmpar_dtensor *out)
{
    const llmpar__flat *flat = &fsdp->units[unit];
    const llmpar_param *p = &flat->unit.params[param];
    memset(out, 0, sizeof *out);
    out->name = p->name;
    out->dtype = fsdp->dtype;
    out->dims = p->dims;
    for (int i = 0; i < p->dims; i++) out->shape[i] = p->shape[i];
    if (p->tp.kind == LLMPAR_SHARD) {
        out->placement[out->placements] = p->tp;
        out->placement[out->placements++].axis = LLMPAR_AXIS_TP;
    }
    if (fsdp->unsharded) return;
    llmpar_placement *cut = &out->placement[out->placements++];
    cut->kind = LLMPAR_FLAT;
    cut->axis = LLMPAR_AXIS_DP_SHARD;
    cut->offset = flat->offset ? flat->offset[param] : 0;
    cut->unit_elements = flat->elements;
}

LLMPAR_DEF void *llmpar_fsdp_local(const llmpar_fsdp *fsdp, int32_t unit, int32_t param, void *shard)
{
    if (!fsdp->unsharded) return shard;
    return (char *)shard + (size_t)fsdp->units[unit].offset[param] * llmpar_dtype_size(fsdp->dtype);
}

/* Offsets of the tp-local tensors, the flat buffer's size, and this rank's segments. */
static llmpar_status llmpar__flat_layout(llmpar_fsdp *fsdp, int32_t index)
{
    llmpar_ctx *ctx = fsdp->ctx;
    llmpar__flat *flat = &fsdp->units[index];
    int32_t n = flat->unit.param_count;
    int64_t at = 0, ranks = fsdp->shard_comm ? fsdp->shard_comm->ranks : 1;
    for (int32_t i = 0; i < n; i++) {
        llmpar_dtensor tensor;
        llmpar_local local;
        llmpar_fsdp_dtensor(fsdp, index, i, &tensor);
        if (tensor.placements && tensor.placement[tensor.placements - 1].kind == LLMPAR_FLAT) tensor.placements--; /* the flat cut is what we are laying out */
        llmpar_status status = llmpar_dtensor_check(&tensor, fsdp->mesh->degree, &ctx->error);
        if (status) return status;
        llmpar_dtensor_local(&tensor, fsdp->mesh->degree, fsdp->mesh->coordinate, &local);
        flat->offset[i] = at;
        flat->count[i] = local.elements;
        if (local.elements > ((int64_t)1 << 40)) return llmpar_fail(ctx, LLMPAR_ERR_OVERFLOW, "%s: %lld local elements are more than 2^40", tensor.name, (long long)local.elements);
        at = llmpar_round_up(at + local.elements, LLMPAR_FLAT_ALIGN);
    }
    flat->offset[n] = at;
    flat->elements = llmpar_round_up(at, LLMPAR_FLAT_ALIGN * ranks);
    if (flat->elements == 0) flat->elements = LLMPAR_FLAT_ALIGN * ranks;
    flat->shard_elements = flat->elements / ranks;
    for (int32_t i = 0; i < n; i++) {
        llmpar_dtensor tensor;
        llmpar_local local;
        llmpar_fsdp_dtensor(fsdp, index, i, &tensor);
        llmpar_status status = llmpar_dtensor_check(&tensor, fsdp->mesh->degree, &ctx->error);
        if (status) return status;
        llmpar_dtensor_local(&tensor, fsdp->mesh->degree, fsdp->mesh->coordinate, &local);
        if (local.flat_count == 0) continue;
        llmpar_segment *segment = &flat->segments[flat->segment_count++];
        segment->param = i;
        segment->no_decay = flat->unit.params[i].no_decay;
        segment->owner = fsdp->counts && local.is_owner;
        segment->begin = fsdp->unsharded ? flat->offset[i] : local.shard_begin;
        segment->count = local.flat_count;
    }
    return LLMPAR_OK;
}

/* ---- creation ---- */

static char *llmpar__flat_label(llmpar_heap *heap, const char *unit, const char *what)
{
    size_t bytes = strlen(unit) + strlen(what) + 2;
    char *text = (char *)llmpar_heap_alloc(heap, 1, bytes);
    if (text) snprintf(text, bytes, "%s/%s", unit, what);
    return text;
}

static llmpar_status llmpar__flat_copy(llmpar_fsdp *fsdp, int32_t index, const llmpar_unit *unit)
{
    static const char *const what[] = {"shard", "all_gather", "gradient", "reduce_scatter", "all_reduce", "activations"};
    llmpar_heap *heap = &fsdp->ctx->heap;
    llmpar__flat *flat = &fsdp->units[index];
    size_t n = (size_t)unit->param_count;
    flat->unit = *unit;
    flat->unit.params = NULL;
    flat->unit.name = NULL;
    if (unit->param_count < 0 || unit->forward_count > LLMPAR__UNIT_EVENTS || unit->backward_count > LLMPAR__UNIT_EVENTS)
        return llmpar_fail(fsdp->ctx, LLMPAR_ERR_ARGUMENT, "unit %s: %d parameters, %d + %d instructions; expected >= 0 and at most %d a pass", unit->name, (int)unit->param_count, (int)unit->forward_count,
                           (int)unit->backward_count, LLMPAR__UNIT_EVENTS);
    for (size_t i = 0; i < n; i++)
        if (unit->params[i].dims < 0 || unit->params[i].dims > LLMPAR_MAX_DIMS) return llmpar_fail(fsdp->ctx, LLMPAR_ERR_SHAPE, "%s: %d dims, expected 0 .. %d", unit->params[i].name, (int)unit->params[i].dims, LLMPAR_MAX_DIMS);
    flat->unit.name = llmpar_heap_strdup(heap, unit->name);
    llmpar_param *params = (llmpar_param *)llmpar_heap_zalloc(heap, n + 1, sizeof *params);
    flat->unit.params = params;
    flat->offset = (int64_t *)llmpar_heap_zalloc(heap, n + 1, sizeof(int64_t));
    flat->count = (int64_t *)llmpar_heap_zalloc(heap, n + 1, sizeof(int64_t));
    flat->segments = (llmpar_segment *)llmpar_heap_zalloc(heap, n + 1, sizeof(llmpar_segment));
    flat->params = (void **)llmpar_heap_zalloc(heap, n + 1, sizeof(void *));
    flat->grads = (void **)llmpar_heap_zalloc(heap, 2 * n + 1, sizeof(void *));
    int missing = !flat->unit.name || !params || !flat->offset || !flat->count || !flat->segments || !flat->params || !flat->grads;
    for (int i = 0; i < 6 && !missing; i++) missing = !(flat->label[i] = llmpar__flat_label(heap, flat->unit.name, what[i]));
    for (size_t i = 0; i < n && !missing; i++) {
        params[i] = unit->params[i];
        params[i].name = llmpar_heap_strdup(heap, unit->params[i].name);
        missing = !params[i].name;
    }
    if (missing) return llmpar_fail(fsdp->ctx, LLMPAR_ERR_MEMORY, "unit %s: out of memory for its description", unit->name);
    return llmpar__flat_layout(fsdp, index);
}

/* Elements [first, first + count) of the row-major rectangle, as runs that are contiguous in the global tensor. */
static int64_t llmpar__flat_global(const llmpar_param *param, const llmpar_local *local, int64_t element, int64_t *run)
{
    int64_t index = 0, stride = 1, rest = element;
    *run = param->dims ? local->shape[param->dims - 1] - element % local->shape[param->dims - 1] : 1;
    for (int32_t d = param->dims - 1; d >= 0; d--) {
        index += (rest % local->shape[d] + local->offset[d]) * stride;
        rest /= local->shape[d];
        stride *= param->shape[d];
    }
    return index;
}

/* Initial values: each element from its own counter, so that a rank makes only what it holds. */
static llmpar_status llmpar__flat_initialise(llmpar_fsdp *fsdp, int32_t index)
{
    enum { CHUNK = 2048 };
    llmpar__flat *flat = &fsdp->units[index];
    size_t size = llmpar_dtype_size(fsdp->dtype);
    float values[CHUNK];
    double wide[CHUNK];
    llmpar_status status = fsdp->device->zero(fsdp->device, fsdp->stream[0], flat->shard, (size_t)flat->shard_elements * size);
    for (int32_t s = 0; s < flat->segment_count && !status; s++) {
        const llmpar_segment *segment = &flat->segments[s];
        const llmpar_param *param = &flat->unit.params[segment->param];
        llmpar_rng rng = llmpar_rng_key(fsdp->seed, LLMPAR_RNG_INIT, param->name, 0, 0);
        llmpar_dtensor tensor;
        llmpar_local local;
        llmpar_fsdp_dtensor(fsdp, index, segment->param, &tensor);
        llmpar_dtensor_local(&tensor, fsdp->mesh->degree, fsdp->mesh->coordinate, &local);
        for (int64_t done = 0; done < segment->count && !status;) {
            int64_t run, count = segment->count - done;
            int64_t first = llmpar__flat_global(param, &local, local.flat_begin + done, &run);
            if (count > run) count = run;
            if (count > CHUNK) count = CHUNK;
            if (param->init_std == 0)
                for (int64_t i = 0; i < count; i++) values[i] = (float)param->init_value;
            else
                llmpar_rng_fill_normal_f32(&rng, (uint64_t)first, (size_t)count, 0.0f, (float)param->init_std, values);
            const void *source = values;
            if (fsdp->dtype == LLMPAR_F64) {
                for (int64_t i = 0; i < count; i++) wide[i] = values[i];
                source = wide;
            }
            status = fsdp->device->copy(fsdp->device, fsdp->stream[0], (char *)flat->shard + (size_t)(segment->begin + done) * size, source, (size_t)count * size);
            if (!status) status = fsdp->device->synchronize(fsdp->device, fsdp->stream[0]);
            done += count;
        }
    }
    return status ? status : fsdp->device->synchronize(fsdp->device, fsdp->stream[0]);
}

static llmpar_status llmpar__fsdp_setup(llmpar_fsdp *fsdp, const llmpar_unit *units)
{
    static const char *const names[] = {"compute", "gather", "reduce", "tp"};
    llmpar_ctx *ctx = fsdp->ctx;
    llmpar_device *device = fsdp->device;
    llmpar_status status = LLMPAR_OK;
    for (int s = 0; s < LLMPAR_STREAM_COUNT && !status; s++) status = device->stream_create(device, names[s], &fsdp->stream[s]);
    for (int s = 0; s < LLMPAR_STREAM_COUNT && !status; s++) status = device->event_create(device, &fsdp->free_event[s]);
    for (int e = 0; e <= LLMPAR__UNIT_EVENTS && !status; e++) status = device->event_create(device, &fsdp->unit_event[e]);
    for (int32_t u = 0; u < fsdp->unit_count && !status; u++) status = llmpar__flat_copy(fsdp, u, &units[u]);
    /* Names are keys of files and of the random numbers: twice the same would be a silent copy. */
    for (int32_t u = 0; u < fsdp->unit_count && !status; u++)
        for (int32_t i = 0; i < fsdp->units[u].unit.param_count && !status; i++)
            for (int32_t v = 0; v <= u && !status; v++)
                for (int32_t j = 0; j < (v == u ? i : fsdp->units[v].unit.param_count) && !status; j++)
                    if (!strcmp(fsdp->units[u].unit.params[i].name, fsdp->units[v].unit.params[j].name))
                        status = llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "parameter name %s stands in units %s and %s, expected once", fsdp->units[u].unit.params[i].name, fsdp->units[v].unit.name, fsdp->units[u].unit.name);
    void *scalars = NULL;
    if (!status) status = llmpar_arena_alloc(fsdp->arena, LLMPAR_TAG_COMMUNICATION, LLMPAR__SCALARS * sizeof(int64_t), "loss and norm", &scalars);
    fsdp->scalars = (int64_t *)scalars;
    for (int32_t u = 0; u < fsdp->unit_count && !status; u++) {
        llmpar__flat *flat = &fsdp->units[u];
        size_t size = llmpar_dtype_size(fsdp->dtype);
        status = llmpar_arena_alloc(fsdp->arena, LLMPAR_TAG_PARAMETERS, (size_t)flat->shard_elements * size, flat->label[LLMPAR__LABEL_SHARD], &flat->shard);
        if (!status) status = llmpar__flat_initialise(fsdp, u);
        if (!status && fsdp->unsharded) {
            flat->gathered = flat->shard;
            for (int32_t i = 0; i < flat->unit.param_count; i++) flat->params[i] = (char *)flat->shard + (size_t)flat->offset[i] * size;
        }
    }
    return status;
}

LLMPAR_DEF llmpar_status llmpar_fsdp_create(llmpar_mesh *mesh, const llmpar_unit *units, int32_t unit_count, const llmpar_fsdp_desc *desc, llmpar_fsdp **out)
{
    llmpar_ctx *ctx = mesh->ctx;
    *out = NULL;
    if (unit_count < 1) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "fsdp: %d units, expected at least 1", (int)unit_count);
    if (desc->zero < LLMPAR_ZERO_DEFAULT || desc->zero > LLMPAR_ZERO_3) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "fsdp: zero = %d, expected LLMPAR_ZERO_0 or LLMPAR_ZERO_3", (int)desc->zero);
    llmpar_dtype dtype = desc->dtype == LLMPAR_DTYPE_DEFAULT ? LLMPAR_F32 : desc->dtype;
    if (dtype != LLMPAR_F32 && dtype != LLMPAR_F64) return llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "fsdp: dtype %s, expected f32 or f64", llmpar_dtype_name(dtype));
    llmpar_fsdp *fsdp = (llmpar_fsdp *)llmpar_heap_zalloc(&ctx->heap, 1, sizeof *fsdp);
    if (!fsdp) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "fsdp: out of memory");
    fsdp->ctx = ctx;
    fsdp->mesh = mesh;
    fsdp->device = ctx->device;
    fsdp->dtype = dtype;
    fsdp->seed = desc->seed;
    fsdp->unsharded = desc->zero == LLMPAR_ZERO_0 || mesh->degree[LLMPAR_AXIS_DP_SHARD] == 1;
    fsdp->shard_comm = fsdp->unsharded ? NULL : mesh->comm[LLMPAR_AXIS_DP_SHARD];
    fsdp->replica_comm = fsdp->unsharded ? mesh->dp : mesh->comm[LLMPAR_AXIS_DP_REPLICATE];
    fsdp->replicas = fsdp->replica_comm->ranks;
    fsdp->counts = fsdp->replica_comm->rank == 0;
    fsdp->unit_count = unit_count;
    fsdp->units = (llmpar__flat *)llmpar_heap_zalloc(&ctx->heap, (size_t)unit_count, sizeof *fsdp->units);
    llmpar_status status = fsdp->units ? llmpar_arena_create(ctx, desc->memory_limit, &fsdp->arena) : llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "fsdp: out of memory for %d units", (int)unit_count);
    if (!status) status = llmpar__fsdp_setup(fsdp, units);
    if (status) {
        llmpar_fsdp_destroy(fsdp);
        return status;
    }
    *out = fsdp;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_fsdp_destroy(llmpar_fsdp *fsdp)
{
    if (!fsdp) return;
    llmpar_heap *heap = &fsdp->ctx->heap;
    for (int s = 0; s < LLMPAR_STREAM_COUNT; s++)
        if (fsdp->stream[s]) fsdp->device->synchronize(fsdp->device, fsdp->stream[s]); /* its failure was reported where it happened */
    for (int32_t u = 0; u < fsdp->unit_count && fsdp->units; u++) {
        llmpar__flat *flat = &fsdp->units[u];
        for (int32_t i = 0; i < flat->unit.param_count && flat->unit.params; i++) llmpar_heap_free(heap, (void *)(uintptr_t)flat->unit.params[i].name);
        for (int i = 0; i < 6; i++) llmpar_heap_free(heap, flat->label[i]);
        llmpar_heap_free(heap, (void *)(uintptr_t)flat->unit.params);
        llmpar_heap_free(heap, (void *)(uintptr_t)flat->unit.name);
        llmpar_heap_free(heap, flat->offset);
        llmpar_heap_free(heap, flat->count);
        llmpar_heap_free(heap, flat->segments);
        llmpar_heap_free(heap, flat->params);
        llmpar_heap_free(heap, flat->grads);
        llmpar_heap_free(heap, flat->output);
        llmpar_heap_free(heap, flat->saved);
        llmpar_heap_free(heap, flat->dinput);
    }
    llmpar_arena_destroy(fsdp->arena);
    for (int32_t e = 0; e < fsdp->event_count; e++)
        if (fsdp->event[e]) fsdp->device->event_destroy(fsdp->device, fsdp->event[e]);
    for (int e = 0; e <= LLMPAR__UNIT_EVENTS; e++)
        if (fsdp->unit_event[e]) fsdp->device->event_destroy(fsdp->device, fsdp->unit_event[e]);
    for (int s = 0; s < LLMPAR_STREAM_COUNT; s++) {
        if (fsdp->free_event[s]) fsdp->device->event_destroy(fsdp->device, fsdp->free_event[s]);
        if (fsdp->stream[s]) fsdp->device->stream_destroy(fsdp->device, fsdp->stream[s]);
    }
    llmpar_heap_free(heap, fsdp->event);
    llmpar_heap_free(heap, fsdp->units);
    llmpar_heap_free(heap, fsdp);
}

/* ---- gathering ---- */

LLMPAR__PRIVATE_DEF llmpar_status llmpar__fsdp_gather(llmpar_fsdp *fsdp, llmpar__flat *flat, llmpar_stream *stream)
{
    size_t size = llmpar_dtype_size(fsdp->dtype);
    if (fsdp->unsharded || flat->gathers++ > 0) return LLMPAR_OK;
    llmpar_status status = llmpar_arena_alloc(fsdp->arena, LLMPAR_TAG_GATHERED, (size_t)flat->elements * size, flat->label[LLMPAR__LABEL_GATHER], &flat->gathered);
    if (status) return status;
    for (int32_t i = 0; i < flat->unit.param_count; i++) flat->params[i] = (char *)flat->gathered + (size_t)flat->offset[i] * size;
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.send = flat->shard;
    call.recv = flat->gathered;
    call.count = (size_t)flat->shard_elements;
    call.dtype = fsdp->dtype;
    call.tag = flat->label[LLMPAR__LABEL_GATHER];
    return llmpar_all_gather(fsdp->shard_comm, stream, &call);
}

LLMPAR__PRIVATE_DEF void llmpar__fsdp_release(llmpar_fsdp *fsdp, llmpar__flat *flat)
{
    if (fsdp->unsharded || flat->gathers == 0 || --flat->gathers > 0) return;
    llmpar_arena_free(fsdp->arena, flat->gathered);
    flat->gathered = NULL;
}

LLMPAR_DEF llmpar_status llmpar_fsdp_unshard(llmpar_fsdp *fsdp, int32_t unit, void *const **params)
{
    llmpar__flat *flat = &fsdp->units[unit];
    llmpar_status status = llmpar__fsdp_gather(fsdp, flat, fsdp->stream[LLMPAR_STREAM_GATHER]);
    llmpar_status waited = fsdp->device->synchronize(fsdp->device, fsdp->stream[LLMPAR_STREAM_GATHER]);
    if (!status) status = waited;
    if (status) llmpar__fsdp_release(fsdp, flat);
    else if (params) *params = flat->params;
    return status;
}

LLMPAR_DEF llmpar_status llmpar_fsdp_reshard(llmpar_fsdp *fsdp, int32_t unit)
{
    llmpar__flat *flat = &fsdp->units[unit];
    if (!fsdp->unsharded && flat->gathers == 0) return llmpar_fail(fsdp->ctx, LLMPAR_ERR_ARGUMENT, "unit %s: reshard without unshard", flat->unit.name);
    llmpar__fsdp_release(fsdp, flat);
    return LLMPAR_OK;
}

/* ---- looking in ---- */

LLMPAR_DEF void llmpar_fsdp_policy(const llmpar_fsdp *fsdp, llmpar_policy *policy)
{
    policy->unsharded = fsdp->unsharded;
    policy->replicas = fsdp->replicas;
}
LLMPAR_DEF int32_t llmpar_fsdp_unit_count(const llmpar_fsdp *fsdp) { return fsdp->unit_count; }
LLMPAR_DEF const llmpar_unit *llmpar_fsdp_unit(const llmpar_fsdp *fsdp, int32_t unit) { return &fsdp->units[unit].unit; }
LLMPAR_DEF llmpar_mesh *llmpar_fsdp_mesh(llmpar_fsdp *fsdp) { return fsdp->mesh; }
LLMPAR_DEF llmpar_arena *llmpar_fsdp_arena(llmpar_fsdp *fsdp) { return fsdp->arena; }
LLMPAR_DEF llmpar_dtype llmpar_fsdp_dtype(const llmpar_fsdp *fsdp) { return fsdp->dtype; }

LLMPAR_DEF void *llmpar_fsdp_shard(llmpar_fsdp *fsdp, int32_t unit, int64_t *elements, const llmpar_segment **segments, int32_t *segment_count)
{
    llmpar__flat *flat = &fsdp->units[unit];
    if (elements) *elements = flat->shard_elements;
    if (segments) *segments = flat->segments;
    if (segment_count) *segment_count = flat->segment_count;
    return flat->shard;
}

static llmpar_status llmpar__flat_scan(llmpar_fsdp *fsdp, const llmpar__flat *flat, const void *shard, int64_t base, int64_t *best)
{
    int64_t limbs[LLMPAR_EXACT_SUM_LIMBS];
    size_t size = llmpar_dtype_size(fsdp->dtype);
    for (int32_t s = 0; s < flat->segment_count; s++) {
        const llmpar_segment *segment = &flat->segments[s];
        llmpar_square_sum_args args;
        memset(&args, 0, sizeof args);
        args.count = (size_t)segment->count;
        args.x = (const char *)shard + (size_t)segment->begin * size;
        args.accumulator = fsdp->scalars;
        args.dtype = fsdp->dtype;
        llmpar_status status = fsdp->device->zero(fsdp->device, fsdp->stream[0], fsdp->scalars, sizeof limbs);
        if (!status) status = fsdp->device->square_sum(fsdp->device, fsdp->stream[0], &args);
        if (!status) status = fsdp->device->copy(fsdp->device, fsdp->stream[0], limbs, fsdp->scalars, sizeof limbs);
        if (!status) status = fsdp->device->synchronize(fsdp->device, fsdp->stream[0]);
        if (status) return status;
        int special = limbs[LLMPAR_EXACT_SUM_LIMBS - 3] || limbs[LLMPAR_EXACT_SUM_LIMBS - 2] || limbs[LLMPAR_EXACT_SUM_LIMBS - 1];
        if (special && (*best < 0 || base + segment->param < *best)) *best = base + segment->param;
    }
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__fsdp_first_nonfinite(llmpar_fsdp *fsdp, int64_t *index)
{
    llmpar_status status = LLMPAR_OK;
    int64_t best = -1, agreed;
    for (int32_t u = 0; u < fsdp->unit_count && !status; u++) status = llmpar__flat_scan(fsdp, &fsdp->units[u], fsdp->units[u].shard, (int64_t)u << 16, &best);
    for (int32_t u = 0; u < fsdp->unit_count && !status; u++)
        if (fsdp->units[u].grad[0][0][0]) status = llmpar__flat_scan(fsdp, &fsdp->units[u], fsdp->units[u].grad[0][0][0], ((int64_t)1 << 40) + ((int64_t)u << 16), &best);
    if (status) return status;
    /* The smallest index wins: the largest of its negative. */
    agreed = best < 0 ? INT64_MIN / 2 : -best;
    status = fsdp->device->copy(fsdp->device, fsdp->stream[0], fsdp->scalars, &agreed, sizeof agreed);
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.send = call.recv = fsdp->scalars;
    call.count = 1;
    call.dtype = LLMPAR_I64;
    call.op = LLMPAR_MAX;
    call.tag = "first non-finite tensor";
    if (!status) status = llmpar_all_reduce(fsdp->mesh->world, fsdp->stream[0], &call);
    if (!status) status = fsdp->device->copy(fsdp->device, fsdp->stream[0], &agreed, fsdp->scalars, sizeof agreed);
    llmpar_status waited = fsdp->device->synchronize(fsdp->device, fsdp->stream[0]); /* in any case: the stream may read `agreed` */
    if (!status) status = waited;
    *index = agreed == INT64_MIN / 2 ? -1 : -agreed;
    return status;
}

LLMPAR_DEF llmpar_status llmpar_fsdp_find_nonfinite(llmpar_fsdp *fsdp, char *text, size_t capacity)
{
    int64_t index;
    llmpar_status status = llmpar__fsdp_first_nonfinite(fsdp, &index);
    if (capacity) text[0] = 0;
    if (!status && index >= 0) snprintf(text, capacity, "%s", fsdp->units[(index >> 16) & 0xffffff].unit.params[index & 0xffff].name);
    return status;
}
/* ==== src/fsdp/schedule.c ==== */

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

LLMPAR_DEF const char *llmpar_op_name(llmpar_op op)
{
    switch (op) {
    case LLMPAR_OP_GATHER: return "GATHER";
    case LLMPAR_OP_FREE: return "FREE";
    case LLMPAR_OP_FORWARD: return "FORWARD";
    case LLMPAR_OP_BACKWARD: return "BACKWARD";
    case LLMPAR_OP_REDUCE: return "REDUCE";
    case LLMPAR_OP_REDUCE_REPLICA: return "REDUCE_REPLICA";
    case LLMPAR_OP_ACCUMULATE: return "ACCUMULATE";
    case LLMPAR_OP_NORM: return "NORM";
    case LLMPAR_OP_SCALAR_REDUCE: return "SCALAR_REDUCE";
    case LLMPAR_OP_OPTIM: return "OPTIM";
    }
    return "?";
}

/* The compute steps of a step in order: for every micro-batch all forwards, then all backwards.

     step:   F0 F1 F2 B2 B1 B0 | F0 F1 ...
     resident (prefetch 0): unit 2 stays from F2 to B2, unit 0 from B0 to the next F0; all others are freed after a use and gathered again.
     prefetch d: the gather stands d steps before its use; a gather that would stand before the preceding free cancels both. */
typedef struct llmpar__plan {
    llmpar_schedule *schedule;
    const llmpar_unit *units;
    int32_t steps_per_micro, steps;
    unsigned char *flag;      /* [steps][units]: 1 gather before, 2 free after */
    int32_t *last_gather;     /* [units] instruction index, -1 */
    int32_t *depth;           /* [units][2] occupied buffers of the binary counter */
    int32_t last_param_free;  /* instruction index, -1 */
    int32_t last_grad_free;
    int32_t status;           /* 1: out of memory */
} llmpar__plan;

static int32_t llmpar__plan_unit(const llmpar__plan *plan, int32_t step, int *backward)
{
    int32_t n = plan->schedule->units, k = step % plan->steps_per_micro;
    *backward = k >= n;
    return k < n ? k : 2 * n - 1 - k;
}

static int llmpar__plan_uses(const llmpar__plan *plan, int32_t step, int32_t unit)
{
    int backward;
    int32_t own = llmpar__plan_unit(plan, step, &backward);
    return own == unit || plan->units[own].borrow - 1 == unit;
}

static llmpar_instruction *llmpar__plan_emit(llmpar__plan *plan, llmpar_op op, int32_t unit, int32_t micro, llmpar_stream_id stream)
{
    llmpar_schedule *schedule = plan->schedule;
    static const llmpar_instruction empty = {LLMPAR_OP_GATHER, -1, -1, 0, 0, -1, -1, 0, 0, LLMPAR_STREAM_COMPUTE, LLMPAR_ALWAYS, 0, {-1, -1, -1, -1}};
    if (schedule->count == schedule->capacity) {
        int32_t capacity = schedule->capacity ? schedule->capacity * 2 : 64;
        llmpar_instruction *list = (llmpar_instruction *)llmpar_heap_alloc(schedule->heap, (size_t)capacity, sizeof *list);
        if (!list) {
            plan->status = 1;
            schedule->count = 0; /* keep writing into the old list; the caller reports */
            if (!schedule->list) return NULL;
        } else {
            if (schedule->count) memcpy(list, schedule->list, (size_t)schedule->count * sizeof *list);
            llmpar_heap_free(schedule->heap, schedule->list);
            schedule->list = list;
            schedule->capacity = capacity;
        }
    }
    llmpar_instruction *instruction = &schedule->list[schedule->count++];
    *instruction = empty;
    instruction->op = op;
    instruction->unit = unit;
    instruction->micro_batch = micro;
    instruction->stream = stream;
    return instruction;
}

static void llmpar__plan_wait(llmpar_instruction *instruction, int32_t index)
{
    if (index < 0) return;
    for (int32_t i = 0; i < instruction->wait_count; i++)
        if (instruction->waits[i] == index) return;
    if (instruction->wait_count < LLMPAR_WAITS) instruction->waits[instruction->wait_count++] = index;
}

/* Where the gathers and frees stand. */
static void llmpar__plan_residency(llmpar__plan *plan)
{
    const llmpar_policy *policy = &plan->schedule->policy;
    int32_t n = plan->schedule->units;
    for (int32_t unit = 0; unit < n; unit++) {
        int32_t previous = -1;
        for (int32_t step = 0; step < plan->steps; step++) {
            if (!llmpar__plan_uses(plan, step, unit)) continue;
            int32_t gather = step - policy->prefetch < 0 ? 0 : step - policy->prefetch;
            if (previous >= 0 && (step == previous + 1 || policy->keep_after_forward || gather <= previous)) {
                previous = step;
                continue;
            }
            if (previous >= 0) plan->flag[(size_t)previous * (size_t)n + (size_t)unit] |= 2u;
            plan->flag[(size_t)gather * (size_t)n + (size_t)unit] |= 1u;
            previous = step;
        }
        if (previous >= 0) plan->flag[(size_t)previous * (size_t)n + (size_t)unit] |= 2u;
    }
}

static void llmpar__plan_gathers(llmpar__plan *plan, int32_t step)
{
    int32_t n = plan->schedule->units, last = step + plan->schedule->policy.prefetch;
    /* In order of need, which for a step may be its own unit and the one it borrows. */
    for (int32_t ahead = step; ahead <= last && ahead < plan->steps; ahead++)
        for (int32_t unit = 0; unit < n; unit++) {
            unsigned char *flag = &plan->flag[(size_t)step * (size_t)n + (size_t)unit];
            if (!(*flag & 1u) || !llmpar__plan_uses(plan, ahead, unit)) continue;
            *flag &= (unsigned char)~1u;
            llmpar_instruction *gather = llmpar__plan_emit(plan, LLMPAR_OP_GATHER, unit, -1, LLMPAR_STREAM_GATHER);
            if (!gather) return;
            llmpar__plan_wait(gather, plan->last_param_free);
            plan->last_gather[unit] = plan->schedule->count - 1;
        }
}

/* One more gradient of (unit, use) is in buffer depth-1 of the counter: merge while the number of micro-batches says so.
   Micro-batch m completes as many subtrees as m + 1 has trailing zero bits. `last` folds what is left when M is no power of two. */
static void llmpar__plan_count(llmpar__plan *plan, int32_t unit, int32_t use, int32_t micro, int last, int local, llmpar_stream_id stream)
{
    int32_t *depth = &plan->depth[unit * 2 + use];
    for (int32_t bits = micro + 1; *depth > 1 && ((bits & 1) == 0 || last); bits >>= 1) {
        llmpar_instruction *add = llmpar__plan_emit(plan, LLMPAR_OP_ACCUMULATE, unit, micro, stream);
        if (!add) return;
        add->use = add->from_use = use;
        add->slot = *depth - 2;
        add->from = *depth - 1;
        add->local = local;
        --*depth;
    }
}

/* Local buffer `from` to the shard counter's next buffer, summed over replicas. */
static void llmpar__plan_reduce(llmpar__plan *plan, int32_t unit, int32_t use, int32_t micro, int32_t from, int32_t slot, int32_t after)
{
    const llmpar_policy *policy = &plan->schedule->policy;
    if (!policy->unsharded) {
        llmpar_instruction *reduce = llmpar__plan_emit(plan, LLMPAR_OP_REDUCE, unit, micro, LLMPAR_STREAM_REDUCE);
        if (!reduce) return;
        reduce->use = use;
        reduce->from = from;
        reduce->slot = slot;
        llmpar__plan_wait(reduce, after);
    }
    if (policy->replicas > 1) {
        llmpar_instruction *replica = llmpar__plan_emit(plan, LLMPAR_OP_REDUCE_REPLICA, unit, micro, LLMPAR_STREAM_REDUCE);
        if (!replica) return;
        replica->use = use;
        replica->slot = slot;
        llmpar__plan_wait(replica, after);
    }
}

static void llmpar__plan_free_local(llmpar__plan *plan, int32_t unit, int32_t use, int32_t slot)
{
    llmpar_instruction *release = llmpar__plan_emit(plan, LLMPAR_OP_FREE, unit, -1, LLMPAR_STREAM_REDUCE);
    if (!release) return;
    release->use = use;
    release->slot = slot;
    release->local = 1;
    plan->last_grad_free = plan->schedule->count - 1;
}

/* Everything one (unit, use) gradient goes through after its backward; returns 1 if local buffer `from` is to be freed later. */
static int llmpar__plan_gradient(llmpar__plan *plan, int32_t unit, int32_t use, int32_t micro, int32_t slot, int32_t backward)
{
    const llmpar_policy *policy = &plan->schedule->policy;
    int last = micro + 1 == policy->micro_batches;
    int32_t *depth = &plan->depth[unit * 2 + use];
    if (policy->no_sync) {
        int local = !policy->unsharded;
        int32_t before = plan->schedule->count;
        llmpar__plan_count(plan, unit, use, micro, last, local, LLMPAR_STREAM_COMPUTE);
        if (!last) return 0;
        llmpar__plan_reduce(plan, unit, use, micro, 0, 0, plan->schedule->count > before ? plan->schedule->count - 1 : backward);
        return local;
    }
    if (!policy->unsharded) { /* the shard counter grows by what REDUCE writes; an unsharded backward wrote it there itself */
        llmpar__plan_reduce(plan, unit, use, micro, slot, *depth, backward);
        ++*depth;
    } else {
        llmpar__plan_reduce(plan, unit, use, micro, -1, slot, backward);
    }
    int32_t before = plan->schedule->count;
    llmpar__plan_count(plan, unit, use, micro, last, 0, LLMPAR_STREAM_REDUCE);
    if (plan->schedule->list && plan->schedule->count > before) llmpar__plan_wait(&plan->schedule->list[before], backward);
    return !policy->unsharded;
}

static void llmpar__plan_backward(llmpar__plan *plan, int32_t unit, int32_t micro, int32_t pending[2])
{
    const llmpar_policy *policy = &plan->schedule->policy;
    int32_t borrow = plan->units[unit].borrow - 1;
    /* Which buffer backward writes: the counter's next one, except where only shards are counted: then local buffer 0. */
    int counted = policy->no_sync || policy->unsharded;
    if (pending[0] == unit) { /* a single unit: its own gradient of the micro-batch before is still in the buffer */
        llmpar__plan_free_local(plan, unit, 0, 0);
        pending[0] = -1;
    }
    int32_t slot = counted ? plan->depth[unit * 2]++ : 0;
    int32_t from = borrow < 0 ? -1 : counted ? plan->depth[borrow * 2 + 1]++ : 0;
    llmpar_instruction *backward = llmpar__plan_emit(plan, LLMPAR_OP_BACKWARD, unit, micro, LLMPAR_STREAM_COMPUTE);
    if (!backward) return;
    backward->pass = LLMPAR_PASS_BACKWARD;
    backward->slot = slot;
    backward->from = from;
    backward->local = !policy->unsharded;
    int32_t index = plan->schedule->count - 1;
    if (!policy->unsharded) {
        llmpar__plan_wait(backward, plan->last_gather[unit]);
        if (borrow >= 0) llmpar__plan_wait(backward, plan->last_gather[borrow]);
    }
    llmpar__plan_wait(backward, plan->last_grad_free);
    /* The buffer that was reduced one step ago is freed now: this backward did not have to wait for that reduction. Before this step's own reduction, which the next backward then need not wait for either. */
    if (pending[0] >= 0) llmpar__plan_free_local(plan, pending[0], 0, 0);
    if (pending[1] >= 0) llmpar__plan_free_local(plan, pending[1], 1, 0);
    int release = llmpar__plan_gradient(plan, unit, 0, micro, slot, index);
    int release_borrowed = borrow >= 0 ? llmpar__plan_gradient(plan, borrow, 1, micro, from, index) : 0;
    pending[0] = release ? unit : -1;
    pending[1] = release_borrowed ? borrow : -1;
}

static void llmpar__plan_step(llmpar__plan *plan, int32_t step, int32_t pending[2])
{
    int backward;
    int32_t n = plan->schedule->units, unit = llmpar__plan_unit(plan, step, &backward), micro = step / plan->steps_per_micro;
    int32_t borrow = plan->units[unit].borrow - 1;
    if (!plan->schedule->policy.unsharded) llmpar__plan_gathers(plan, step);
    if (backward) {
        llmpar__plan_backward(plan, unit, micro, pending);
    } else {
        llmpar_instruction *forward = llmpar__plan_emit(plan, LLMPAR_OP_FORWARD, unit, micro, LLMPAR_STREAM_COMPUTE);
        if (!forward) return;
        forward->pass = plan->schedule->policy.forward_only ? LLMPAR_PASS_EVAL : LLMPAR_PASS_FORWARD;
        if (!plan->schedule->policy.unsharded) {
            llmpar__plan_wait(forward, plan->last_gather[unit]);
            if (borrow >= 0) llmpar__plan_wait(forward, plan->last_gather[borrow]);
        }
    }
    if (plan->schedule->policy.unsharded) return;
    for (int32_t other = 0; other < n; other++)
        if (plan->flag[(size_t)step * (size_t)n + (size_t)other] & 2u) {
            llmpar__plan_emit(plan, LLMPAR_OP_FREE, other, -1, LLMPAR_STREAM_COMPUTE);
            plan->last_param_free = plan->schedule->count - 1;
        }
}

/* Tied weights: g = g_head + g_embed, once, on the shard. Then norms, the one scalar reduction, the updates. */
static void llmpar__plan_finish(llmpar__plan *plan)
{
    int32_t n = plan->schedule->units;
    if (!plan->schedule->policy.forward_only) {
        for (int32_t unit = 0; unit < n; unit++) {
            int32_t borrow = plan->units[unit].borrow - 1;
            if (borrow < 0) continue;
            llmpar_instruction *add = llmpar__plan_emit(plan, LLMPAR_OP_ACCUMULATE, borrow, -1, LLMPAR_STREAM_REDUCE);
            if (!add) return;
            add->slot = add->from = 0;
            add->from_use = 1;
            if (plan->schedule->policy.unsharded) llmpar__plan_wait(add, plan->schedule->count - 2);
        }
        for (int32_t unit = 0; unit < n; unit++) {
            llmpar_instruction *norm = llmpar__plan_emit(plan, LLMPAR_OP_NORM, unit, -1, LLMPAR_STREAM_REDUCE);
            if (!norm) return;
            norm->slot = 0;
        }
    }
    /* Behind the last compute instruction: it wrote gradients (unsharded) and the loss. */
    int32_t compute = -1;
    for (int32_t i = 0; i < plan->schedule->count; i++)
        if (plan->schedule->list[i].stream == LLMPAR_STREAM_COMPUTE) compute = i;
    if (!plan->schedule->policy.forward_only && plan->schedule->policy.unsharded)
        for (int32_t i = 0; i < plan->schedule->count; i++)
            if (plan->schedule->list[i].op == LLMPAR_OP_NORM) llmpar__plan_wait(&plan->schedule->list[i], compute);
    llmpar_instruction *reduce = llmpar__plan_emit(plan, LLMPAR_OP_SCALAR_REDUCE, -1, -1, LLMPAR_STREAM_REDUCE);
    if (!reduce) return;
    reduce->pass = 1;
    llmpar__plan_wait(reduce, compute);
    if (plan->schedule->policy.forward_only) return;
    int32_t after = plan->schedule->count - 1;
    for (int32_t unit = 0; unit < n; unit++) {
        llmpar_instruction *optim = llmpar__plan_emit(plan, LLMPAR_OP_OPTIM, unit, -1, LLMPAR_STREAM_COMPUTE);
        if (!optim) return;
        optim->slot = 0;
        optim->predicate = LLMPAR_IF_FINITE;
        llmpar__plan_wait(optim, after);
    }
}

static llmpar_status llmpar__plan_check(const llmpar_unit *units, int32_t unit_count, const llmpar_policy *policy, llmpar_error *error)
{
    if (unit_count < 1) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "schedule: %d units, expected at least 1", (int)unit_count);
    if (policy->micro_batches < 1 || policy->micro_batches > (1 << 20)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "schedule: micro_batches = %d, expected 1 .. %d", (int)policy->micro_batches, 1 << 20);
    if (policy->prefetch < 0 || policy->prefetch > 64) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "schedule: prefetch = %d, expected 0 .. 64", (int)policy->prefetch);
    if (policy->replicas < 1) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "schedule: replicas = %d, expected at least 1", (int)policy->replicas);
    if ((int64_t)unit_count * policy->micro_batches > ((int64_t)1 << 24)) /* a few instructions each, counted in 32 bits */
        return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "schedule: %d units x %d micro-batches, expected at most %d together", (int)unit_count, (int)policy->micro_batches, 1 << 24);
    for (int32_t unit = 0; unit < unit_count; unit++) {
        int32_t borrow = units[unit].borrow - 1;
        if (borrow >= unit_count || borrow < -1 || borrow == unit || (borrow >= 0 && units[borrow].borrow))
            return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "schedule: unit %s borrows unit %d, expected another unit that borrows none", units[unit].name, (int)borrow);
        for (int32_t other = 0; other < unit && borrow >= 0; other++)
            if (units[other].borrow - 1 == borrow) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "schedule: units %s and %s both borrow unit %s, expected one borrower", units[other].name, units[unit].name, units[borrow].name);
    }
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_schedule_create(llmpar_heap *heap, const llmpar_unit *units, int32_t unit_count, const llmpar_policy *policy, llmpar_schedule **out, llmpar_error *error)
{
    llmpar_policy resolved = *policy;
    *out = NULL;
    if (resolved.micro_batches == 0) resolved.micro_batches = 1;
    if (resolved.replicas == 0) resolved.replicas = 1;
    llmpar_status status = llmpar__plan_check(units, unit_count, &resolved, error);
    if (status) return status;
    llmpar__plan plan;
    memset(&plan, 0, sizeof plan);
    llmpar_schedule *schedule = (llmpar_schedule *)llmpar_heap_zalloc(heap, 1, sizeof *schedule);
    if (!schedule) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "schedule: out of memory");
    schedule->heap = heap;
    schedule->units = unit_count;
    schedule->policy = resolved;
    plan.schedule = schedule;
    plan.units = units;
    plan.steps_per_micro = resolved.forward_only ? unit_count : 2 * unit_count;
    plan.steps = plan.steps_per_micro * resolved.micro_batches;
    plan.last_param_free = plan.last_grad_free = -1;
    plan.flag = (unsigned char *)llmpar_heap_zalloc(heap, (size_t)plan.steps, (size_t)unit_count);
    plan.last_gather = (int32_t *)llmpar_heap_zalloc(heap, (size_t)unit_count, sizeof(int32_t));
    plan.depth = (int32_t *)llmpar_heap_zalloc(heap, (size_t)unit_count * 2, sizeof(int32_t));
    if (!plan.flag || !plan.last_gather || !plan.depth) plan.status = 1;
    if (!plan.status) {
        int32_t pending[2] = {-1, -1};
        llmpar__plan_residency(&plan);
        llmpar__plan_emit(&plan, LLMPAR_OP_SCALAR_REDUCE, -1, -1, LLMPAR_STREAM_COMPUTE);
        for (int32_t step = 0; step < plan.steps && !plan.status; step++) llmpar__plan_step(&plan, step, pending);
        if (pending[0] >= 0) llmpar__plan_free_local(&plan, pending[0], 0, 0);
        if (pending[1] >= 0) llmpar__plan_free_local(&plan, pending[1], 1, 0);
        llmpar__plan_finish(&plan);
    }
    llmpar_heap_free(heap, plan.depth);
    llmpar_heap_free(heap, plan.last_gather);
    llmpar_heap_free(heap, plan.flag);
    if (plan.status) {
        llmpar_schedule_destroy(schedule);
        return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "schedule: out of memory for %d units, %d micro-batches", (int)unit_count, (int)resolved.micro_batches);
    }
    *out = schedule;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_schedule_destroy(llmpar_schedule *schedule)
{
    if (!schedule) return;
    llmpar_heap *heap = schedule->heap;
    llmpar_heap_free(heap, schedule->list);
    llmpar_heap_free(heap, schedule);
}

/* Text that may be longer than its buffer: counts what it would take. */
typedef struct llmpar__schedule_text { char *text; size_t capacity, length; } llmpar__schedule_text;
static void llmpar__schedule_put(llmpar__schedule_text *out, const char *format, ...) LLMPAR_PRINTF(2, 3);
static void llmpar__schedule_put(llmpar__schedule_text *out, const char *format, ...)
{
    va_list list;
    size_t room = out->length < out->capacity ? out->capacity - out->length : 0;
    va_start(list, format);
    int written = vsnprintf(room ? out->text + out->length : NULL, room, format, list);
    va_end(list);
    if (written > 0) out->length += (size_t)written;
}

static void llmpar__schedule_put_ops(llmpar__schedule_text *out, const llmpar_unit_op *ops, int32_t count)
{
    static const char *const kind[] = {"COMPUTE", "TP_GATHER", "TP_REDUCE"};
    for (int32_t i = 0; i < count; i++) {
        llmpar__schedule_put(out, "          . %2d %-7s %-9s %s", (int)i, ops[i].kind == LLMPAR_COMPUTE ? "compute" : "tp", kind[ops[i].kind], ops[i].name);
        for (int32_t w = 0; w < 2; w++)
            if (ops[i].wait[w]) llmpar__schedule_put(out, "%s%d", w && ops[i].wait[0] ? "," : "  after .", (int)ops[i].wait[w] - 1);
        llmpar__schedule_put(out, "\n");
    }
}

LLMPAR_DEF size_t llmpar_schedule_print(const llmpar_schedule *schedule, const llmpar_unit *units, char *text, size_t capacity)
{
    static const char *const stream[] = {"compute", "gather", "reduce", "tp"};
    llmpar__schedule_text out;
    out.text = text;
    out.capacity = capacity;
    out.length = 0;
    if (capacity) text[0] = 0;
    for (int32_t i = 0; i < schedule->count; i++) {
        const llmpar_instruction *in = &schedule->list[i];
        llmpar__schedule_put(&out, "%5d  %-7s  %-14s", (int)i, stream[in->stream], llmpar_op_name(in->op));
        if (in->unit >= 0) llmpar__schedule_put(&out, " %s", units[in->unit].name);
        if (in->op == LLMPAR_OP_FORWARD || in->op == LLMPAR_OP_BACKWARD) llmpar__schedule_put(&out, " mb%d", (int)in->micro_batch);
        if (in->op == LLMPAR_OP_SCALAR_REDUCE) llmpar__schedule_put(&out, "%s", in->pass ? " loss, norm" : " tokens");
        const char *kind = in->local ? "local" : "shard";
        const char *use = in->use ? ".borrowed" : "";
        if (in->op == LLMPAR_OP_BACKWARD) llmpar__schedule_put(&out, " -> %s%d", kind, (int)in->slot);
        if (in->op == LLMPAR_OP_BACKWARD && in->from >= 0) llmpar__schedule_put(&out, ", %s.borrowed %s%d", units[units[in->unit].borrow - 1].name, kind, (int)in->from);
        if (in->op == LLMPAR_OP_REDUCE) llmpar__schedule_put(&out, "%s local%d -> shard%d", use, (int)in->from, (int)in->slot);
        if (in->op == LLMPAR_OP_ACCUMULATE) llmpar__schedule_put(&out, "%s %s%d += %s%s%d", use, kind, (int)in->slot, in->from_use != in->use ? "borrowed " : "", kind, (int)in->from);
        if ((in->op == LLMPAR_OP_FREE && in->slot >= 0) || in->op == LLMPAR_OP_REDUCE_REPLICA || in->op == LLMPAR_OP_NORM || in->op == LLMPAR_OP_OPTIM) llmpar__schedule_put(&out, "%s %s%d", use, kind, (int)in->slot);
        if (in->predicate == LLMPAR_IF_FINITE) llmpar__schedule_put(&out, " if finite");
        for (int32_t w = 0; w < in->wait_count; w++) llmpar__schedule_put(&out, "%s%d", w ? "," : "  after ", (int)in->waits[w]);
        llmpar__schedule_put(&out, "\n");
        /* A unit's own list: the first time a unit with this list runs. */
        if (in->op != LLMPAR_OP_FORWARD && in->op != LLMPAR_OP_BACKWARD) continue;
        int seen = in->micro_batch > 0;
        const llmpar_unit_op *ops = in->op == LLMPAR_OP_FORWARD ? units[in->unit].forward : units[in->unit].backward;
        for (int32_t j = 0; j < i && !seen; j++)
            if (schedule->list[j].op == in->op && (in->op == LLMPAR_OP_FORWARD ? units[schedule->list[j].unit].forward : units[schedule->list[j].unit].backward) == ops) seen = 1;
        if (!seen) llmpar__schedule_put_ops(&out, ops, in->op == LLMPAR_OP_FORWARD ? units[in->unit].forward_count : units[in->unit].backward_count);
    }
    return out.length;
}
/* ==== src/fsdp/validate.c ==== */

#include <string.h>

/* A list is walked once. Order between streams is proved with vector clocks: clock[i][s] is the last instruction of stream s that is complete before
   instruction i starts. Gradient buffers carry what is in them: how many (use, micro-batch) gradients, and the sum of one random number for each, so that a lost, doubled or foreign one shows. */
typedef struct llmpar__buffer {
    int32_t live, writer, consumed, reduced, replica, normed;
    int32_t reader[LLMPAR_STREAM_COUNT]; /* last reading instruction of each stream, -1 */
    int64_t gradients;
    uint64_t content;
} llmpar__buffer;

typedef struct llmpar__unit_state {
    int32_t gathered;                    /* instruction, -1 */
    int32_t reader[LLMPAR_STREAM_COUNT];
    int32_t last_gather;                 /* also after its FREE: it read the shard */
    int32_t forwards, backwards, last_forward, last_backward, updated;
    llmpar__buffer buffer[2][2][LLMPAR_GRAD_SLOTS]; /* [use][local][slot] */
} llmpar__unit_state;

typedef struct llmpar__proof {
    const llmpar_instruction *list;
    const llmpar_unit *units;
    int32_t count, unit_count, at, scalar[2];
    int32_t norm[LLMPAR_STREAM_COUNT]; /* last NORM of each stream, -1: they add into one accumulator */
    llmpar_policy policy;
    llmpar__unit_state *state;
    int32_t (*clock)[LLMPAR_STREAM_COUNT];
    llmpar_error *error;
} llmpar__proof;

static llmpar_status llmpar__proof_fail(llmpar__proof *proof, const char *reason)
{
    const llmpar_instruction *in = &proof->list[proof->at];
    const char *unit = in->unit >= 0 && in->unit < proof->unit_count ? proof->units[in->unit].name : "-";
    return llmpar_error_set(proof->error, LLMPAR_ERR_SCHEDULE, "schedule: instruction %d, %s %s: %s", (int)proof->at, llmpar_op_name(in->op), unit, reason);
}

/* Is instruction `earlier` complete before the one at hand starts? */
static int llmpar__proof_after(const llmpar__proof *proof, int32_t earlier)
{
    return earlier < 0 || proof->clock[proof->at][proof->list[earlier].stream] >= earlier;
}

static int llmpar__proof_after_readers(const llmpar__proof *proof, const int32_t reader[LLMPAR_STREAM_COUNT])
{
    for (int s = 0; s < LLMPAR_STREAM_COUNT; s++)
        if (!llmpar__proof_after(proof, reader[s])) return 0;
    return 1;
}

static void llmpar__proof_no_readers(int32_t reader[LLMPAR_STREAM_COUNT])
{
    for (int s = 0; s < LLMPAR_STREAM_COUNT; s++) reader[s] = -1;
}

/* A number that stands for one gradient (splitmix64). */
static uint64_t llmpar__proof_token(int32_t unit, int32_t use, int32_t micro)
{
    uint64_t x = ((uint64_t)(uint32_t)unit << 33) + ((uint64_t)(uint32_t)micro << 1) + (uint64_t)use + 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static int llmpar__proof_borrowed(const llmpar__proof *proof, int32_t unit)
{
    for (int32_t i = 0; i < proof->unit_count; i++)
        if (proof->units[i].borrow - 1 == unit) return 1;
    return 0;
}

static int llmpar__proof_complete(const llmpar__proof *proof, int32_t unit, const llmpar__buffer *buffer)
{
    int uses = 1 + llmpar__proof_borrowed(proof, unit);
    uint64_t content = 0;
    for (int use = 0; use < uses; use++)
        for (int32_t m = 0; m < proof->policy.micro_batches; m++) content += llmpar__proof_token(unit, use, m);
    return buffer->gradients == (int64_t)uses * proof->policy.micro_batches && buffer->content == content;
}

static llmpar__buffer *llmpar__proof_buffer(llmpar__proof *proof, int32_t unit, int32_t use, int32_t local, int32_t slot)
{
    return &proof->state[unit].buffer[use][local][slot];
}

static void llmpar__proof_write(llmpar__proof *proof, llmpar__buffer *buffer)
{
    memset(buffer, 0, sizeof *buffer);
    buffer->live = 1;
    buffer->writer = proof->at;
    llmpar__proof_no_readers(buffer->reader);
}

static llmpar_status llmpar__proof_read(llmpar__proof *proof, llmpar__buffer *buffer)
{
    if (!buffer->live) return llmpar__proof_fail(proof, "reads a gradient buffer that nothing has written");
    if (!llmpar__proof_after(proof, buffer->writer)) return llmpar__proof_fail(proof, "reads a gradient buffer without waiting for its writer");
    buffer->reader[proof->list[proof->at].stream] = proof->at;
    return LLMPAR_OK;
}

static llmpar_status llmpar__proof_operands(llmpar__proof *proof, const llmpar_instruction *in)
{
    if ((int)in->op < LLMPAR_OP_GATHER || (int)in->op > LLMPAR_OP_OPTIM) return llmpar__proof_fail(proof, "no such op");
    if ((int)in->stream < 0 || (int)in->stream >= LLMPAR_STREAM_COUNT) return llmpar__proof_fail(proof, "no such stream");
    if (in->op != LLMPAR_OP_SCALAR_REDUCE && (in->unit < 0 || in->unit >= proof->unit_count)) return llmpar__proof_fail(proof, "no such unit");
    if (in->use < 0 || in->use > 1 || in->from_use < 0 || in->from_use > 1 || in->local < 0 || in->local > 1) return llmpar__proof_fail(proof, "use or local is neither 0 nor 1");
    if (in->slot < -1 || in->slot >= LLMPAR_GRAD_SLOTS || in->from < -1 || in->from >= LLMPAR_GRAD_SLOTS) return llmpar__proof_fail(proof, "no such gradient buffer");
    if ((in->op == LLMPAR_OP_FORWARD || in->op == LLMPAR_OP_BACKWARD) && (in->micro_batch < 0 || in->micro_batch >= proof->policy.micro_batches)) return llmpar__proof_fail(proof, "no such micro-batch");
    if ((in->op == LLMPAR_OP_FORWARD || in->op == LLMPAR_OP_BACKWARD) && in->stream != LLMPAR_STREAM_COMPUTE) return llmpar__proof_fail(proof, "is not on the compute stream, where units run");
    if (in->predicate != LLMPAR_ALWAYS && in->op != LLMPAR_OP_OPTIM) return llmpar__proof_fail(proof, "has a predicate, which only OPTIM asks");
    if (in->wait_count < 0 || in->wait_count > LLMPAR_WAITS) return llmpar__proof_fail(proof, "more waits than an instruction holds");
    for (int32_t w = 0; w < in->wait_count; w++)
        if (in->waits[w] < 0 || in->waits[w] >= proof->at) return llmpar__proof_fail(proof, "waits for an instruction that does not come before it (streams would deadlock)");
    int needs_slot = in->op == LLMPAR_OP_BACKWARD || in->op == LLMPAR_OP_REDUCE || in->op == LLMPAR_OP_REDUCE_REPLICA || in->op == LLMPAR_OP_ACCUMULATE || in->op == LLMPAR_OP_NORM || in->op == LLMPAR_OP_OPTIM;
    int needs_from = in->op == LLMPAR_OP_REDUCE || in->op == LLMPAR_OP_ACCUMULATE || (in->op == LLMPAR_OP_BACKWARD && proof->units[in->unit].borrow);
    if ((needs_slot && in->slot < 0) || (needs_from && in->from < 0)) return llmpar__proof_fail(proof, "a gradient buffer is missing");
    return LLMPAR_OK;
}

static void llmpar__proof_clock(llmpar__proof *proof, const llmpar_instruction *in, int32_t last[LLMPAR_STREAM_COUNT], int32_t host[LLMPAR_STREAM_COUNT])
{
    int32_t *clock = proof->clock[proof->at];
    for (int s = 0; s < LLMPAR_STREAM_COUNT; s++) clock[s] = host[s];
    for (int32_t w = -1; w < in->wait_count; w++) {
        int32_t earlier = w < 0 ? last[in->stream] : in->waits[w];
        if (earlier < 0) continue;
        for (int s = 0; s < LLMPAR_STREAM_COUNT; s++)
            if (proof->clock[earlier][s] > clock[s]) clock[s] = proof->clock[earlier][s];
        if (earlier > clock[proof->list[earlier].stream]) clock[proof->list[earlier].stream] = earlier;
    }
    last[in->stream] = proof->at;
    if (in->op == LLMPAR_OP_SCALAR_REDUCE) { /* the host waits for it: whatever comes later comes after it */
        for (int s = 0; s < LLMPAR_STREAM_COUNT; s++)
            if (clock[s] > host[s]) host[s] = clock[s];
        if (proof->at > host[in->stream]) host[in->stream] = proof->at;
    }
}

static llmpar_status llmpar__proof_params(llmpar__proof *proof, int32_t unit)
{
    llmpar__unit_state *state = &proof->state[unit];
    if (proof->policy.unsharded) return LLMPAR_OK;
    if (state->gathered < 0) return llmpar__proof_fail(proof, "uses parameters that are not gathered");
    if (!llmpar__proof_after(proof, state->gathered)) return llmpar__proof_fail(proof, "uses parameters without waiting for their gather");
    state->reader[proof->list[proof->at].stream] = proof->at;
    return LLMPAR_OK;
}

static llmpar_status llmpar__proof_compute(llmpar__proof *proof, const llmpar_instruction *in)
{
    llmpar__unit_state *state = &proof->state[in->unit];
    int32_t borrow = proof->units[in->unit].borrow - 1, n = proof->unit_count;
    if (proof->scalar[0] < 0) return llmpar__proof_fail(proof, "runs before the token count is known");
    llmpar_status status = llmpar__proof_params(proof, in->unit);
    if (!status && borrow >= 0) status = llmpar__proof_params(proof, borrow);
    if (status) return status;
    if (in->op == LLMPAR_OP_FORWARD) {
        if ((in->pass == LLMPAR_PASS_EVAL) != (proof->policy.forward_only != 0) || in->pass == LLMPAR_PASS_BACKWARD) return llmpar__proof_fail(proof, "its pass does not fit the policy");
        if (state->forwards != in->micro_batch) return llmpar__proof_fail(proof, "micro-batches are not run once each, in order");
        if (in->unit > 0 && (proof->state[in->unit - 1].forwards <= in->micro_batch || !llmpar__proof_after(proof, proof->state[in->unit - 1].last_forward))) return llmpar__proof_fail(proof, "runs before the unit in front of it");
        state->forwards++;
        state->last_forward = proof->at;
        return LLMPAR_OK;
    }
    if (proof->policy.forward_only) return llmpar__proof_fail(proof, "backward in a forward-only schedule");
    if (state->backwards != in->micro_batch) return llmpar__proof_fail(proof, "micro-batches are not run once each, in order");
    const llmpar__unit_state *behind = &proof->state[in->unit + 1 < n ? in->unit + 1 : in->unit];
    int32_t needed = in->unit + 1 < n ? behind->last_backward : state->last_forward;
    if ((in->unit + 1 < n ? behind->backwards : state->forwards) <= in->micro_batch || !llmpar__proof_after(proof, needed)) return llmpar__proof_fail(proof, "runs before the unit behind it");
    for (int use = 0; use < (borrow >= 0 ? 2 : 1); use++) {
        int32_t unit = use ? borrow : in->unit;
        llmpar__buffer *buffer = llmpar__proof_buffer(proof, unit, use, in->local, use ? in->from : in->slot);
        if (buffer->live) return llmpar__proof_fail(proof, "overwrites a gradient buffer that is still needed");
        llmpar__proof_write(proof, buffer);
        buffer->gradients = 1;
        buffer->content = llmpar__proof_token(unit, use, in->micro_batch);
        if (!in->local && !proof->policy.unsharded) return llmpar__proof_fail(proof, "writes whole gradients into a shard buffer");
        buffer->reduced = !in->local;
    }
    state->backwards++;
    state->last_backward = proof->at;
    return LLMPAR_OK;
}

static llmpar_status llmpar__proof_reduce(llmpar__proof *proof, const llmpar_instruction *in)
{
    llmpar__buffer *from = llmpar__proof_buffer(proof, in->unit, in->use, 1, in->from), *to = llmpar__proof_buffer(proof, in->unit, in->use, 0, in->slot);
    if (proof->policy.unsharded) return llmpar__proof_fail(proof, "reduces into shards where gradients are whole");
    llmpar_status status = llmpar__proof_read(proof, from);
    if (status) return status;
    if (from->consumed) return llmpar__proof_fail(proof, "reduces a gradient twice");
    if (to->live) return llmpar__proof_fail(proof, "overwrites a gradient buffer that is still needed");
    from->consumed = 1;
    llmpar__proof_write(proof, to);
    to->gradients = from->gradients;
    to->content = from->content;
    to->reduced = 1;
    return LLMPAR_OK;
}

static llmpar_status llmpar__proof_accumulate(llmpar__proof *proof, const llmpar_instruction *in)
{
    llmpar__buffer *to = llmpar__proof_buffer(proof, in->unit, in->use, in->local, in->slot), *from = llmpar__proof_buffer(proof, in->unit, in->from_use, in->local, in->from);
    if (to == from) return llmpar__proof_fail(proof, "adds a gradient buffer to itself");
    int ordered = llmpar__proof_after_readers(proof, to->reader);
    llmpar_status status = llmpar__proof_read(proof, to);
    if (!status) status = llmpar__proof_read(proof, from);
    if (status) return status;
    if (!ordered) return llmpar__proof_fail(proof, "changes a gradient buffer that another stream still reads");
    if (to->consumed || from->consumed || to->normed || from->normed) return llmpar__proof_fail(proof, "adds to a gradient that was already reduced or measured");
    if (to->reduced != from->reduced || to->replica != from->replica) return llmpar__proof_fail(proof, "adds gradients that are not at the same stage of reduction");
    to->gradients += from->gradients;
    to->content += from->content;
    to->writer = proof->at;
    from->live = 0;
    return LLMPAR_OK;
}

static llmpar_status llmpar__proof_free(llmpar__proof *proof, const llmpar_instruction *in)
{
    llmpar__unit_state *state = &proof->state[in->unit];
    if (in->slot < 0) {
        if (state->gathered < 0) return llmpar__proof_fail(proof, "frees parameters that are not gathered");
        if (!llmpar__proof_after(proof, state->gathered) || !llmpar__proof_after_readers(proof, state->reader)) return llmpar__proof_fail(proof, "frees parameters that another stream may still use");
        state->gathered = -1;
        return LLMPAR_OK;
    }
    llmpar__buffer *buffer = llmpar__proof_buffer(proof, in->unit, in->use, in->local, in->slot);
    if (!buffer->live) return llmpar__proof_fail(proof, "frees a gradient buffer that nothing has written");
    if (!buffer->consumed) return llmpar__proof_fail(proof, "frees a gradient that was not reduced");
    if (!llmpar__proof_after(proof, buffer->writer) || !llmpar__proof_after_readers(proof, buffer->reader)) return llmpar__proof_fail(proof, "frees a gradient buffer that another stream may still use");
    buffer->live = 0;
    return LLMPAR_OK;
}

static llmpar_status llmpar__proof_final(llmpar__proof *proof, const llmpar_instruction *in)
{
    if (in->op == LLMPAR_OP_SCALAR_REDUCE) {
        int pass = in->pass != 0;
        if (proof->scalar[pass] >= 0) return llmpar__proof_fail(proof, "runs twice");
        proof->scalar[pass] = proof->at;
        for (int32_t unit = 0; unit < proof->unit_count && pass; unit++) {
            const llmpar__unit_state *state = &proof->state[unit];
            if (state->forwards != proof->policy.micro_batches || !llmpar__proof_after(proof, state->last_forward)) return llmpar__proof_fail(proof, "runs before the loss is complete");
            if (!proof->policy.forward_only && state->updated != 1) return llmpar__proof_fail(proof, "runs before every norm is known");
        }
        return pass && !llmpar__proof_after_readers(proof, proof->norm) ? llmpar__proof_fail(proof, "does not wait for a norm") : LLMPAR_OK;
    }
    llmpar__buffer *buffer = llmpar__proof_buffer(proof, in->unit, in->use, 0, in->slot);
    llmpar_status status = llmpar__proof_read(proof, buffer);
    if (status) return status;
    if (!llmpar__proof_complete(proof, in->unit, buffer)) return llmpar__proof_fail(proof, "the gradient does not hold every micro-batch and use exactly once");
    if (!buffer->reduced || (proof->policy.replicas > 1 && !buffer->replica)) return llmpar__proof_fail(proof, "the gradient is not reduced over all data ranks");
    if (in->op == LLMPAR_OP_NORM) {
        if (buffer->normed) return llmpar__proof_fail(proof, "measures a gradient twice");
        if (!llmpar__proof_after_readers(proof, proof->norm)) return llmpar__proof_fail(proof, "adds to the norm at the same time as another stream");
        proof->norm[in->stream] = proof->at;
        buffer->normed = 1;
        proof->state[in->unit].updated = 1;
        return LLMPAR_OK;
    }
    if (!buffer->normed || proof->scalar[1] < 0) return llmpar__proof_fail(proof, "updates before the norm is known");
    if (in->predicate != LLMPAR_IF_FINITE) return llmpar__proof_fail(proof, "updates without asking whether the gradient is finite");
    if (!llmpar__proof_after(proof, proof->state[in->unit].last_gather)) return llmpar__proof_fail(proof, "updates parameters while they are gathered");
    buffer->live = 0;
    proof->state[in->unit].updated = 2;
    return LLMPAR_OK;
}

static llmpar_status llmpar__proof_instruction(llmpar__proof *proof, const llmpar_instruction *in)
{
    switch (in->op) {
    case LLMPAR_OP_GATHER:
        if (proof->policy.unsharded) return llmpar__proof_fail(proof, "gathers parameters that are not sharded");
        if (proof->state[in->unit].gathered >= 0) return llmpar__proof_fail(proof, "gathers parameters that are gathered already");
        if (proof->state[in->unit].updated == 2) return llmpar__proof_fail(proof, "gathers parameters after their update");
        proof->state[in->unit].gathered = proof->state[in->unit].last_gather = proof->at;
        llmpar__proof_no_readers(proof->state[in->unit].reader);
        return LLMPAR_OK;
    case LLMPAR_OP_FREE: return llmpar__proof_free(proof, in);
    case LLMPAR_OP_FORWARD:
    case LLMPAR_OP_BACKWARD: return llmpar__proof_compute(proof, in);
    case LLMPAR_OP_REDUCE: return llmpar__proof_reduce(proof, in);
    case LLMPAR_OP_REDUCE_REPLICA: {
        llmpar__buffer *buffer = llmpar__proof_buffer(proof, in->unit, in->use, 0, in->slot);
        int ordered = llmpar__proof_after_readers(proof, buffer->reader);
        llmpar_status status = llmpar__proof_read(proof, buffer);
        if (status) return status;
        if (!ordered) return llmpar__proof_fail(proof, "changes a gradient buffer that another stream still reads");
        if (buffer->replica) return llmpar__proof_fail(proof, "sums a gradient over replicas twice");
        buffer->replica = 1;
        buffer->writer = proof->at;
        return LLMPAR_OK;
    }
    case LLMPAR_OP_ACCUMULATE: return llmpar__proof_accumulate(proof, in);
    case LLMPAR_OP_NORM:
    case LLMPAR_OP_SCALAR_REDUCE:
    case LLMPAR_OP_OPTIM: return llmpar__proof_final(proof, in);
    }
    return llmpar__proof_fail(proof, "no such op");
}

static llmpar_status llmpar__proof_end(llmpar__proof *proof)
{
    for (int32_t unit = 0; unit < proof->unit_count; unit++) {
        const llmpar__unit_state *state = &proof->state[unit];
        const char *name = proof->units[unit].name;
        if (state->forwards != proof->policy.micro_batches) return llmpar_error_set(proof->error, LLMPAR_ERR_SCHEDULE, "schedule: end: unit %s ran forward on %d of %d micro-batches", name, (int)state->forwards, (int)proof->policy.micro_batches);
        if (state->gathered >= 0) return llmpar_error_set(proof->error, LLMPAR_ERR_SCHEDULE, "schedule: end: parameters of unit %s, gathered by instruction %d, are never freed", name, (int)state->gathered);
        for (int use = 0; use < 2; use++)
            for (int local = 0; local < 2; local++)
                for (int slot = 0; slot < LLMPAR_GRAD_SLOTS; slot++)
                    if (state->buffer[use][local][slot].live)
                        return llmpar_error_set(proof->error, LLMPAR_ERR_SCHEDULE, "schedule: end: gradient of unit %s, written by instruction %d, is never consumed", name, (int)state->buffer[use][local][slot].writer);
        if (!proof->policy.forward_only && (state->backwards != proof->policy.micro_batches || state->updated != 2))
            return llmpar_error_set(proof->error, LLMPAR_ERR_SCHEDULE, "schedule: end: unit %s ran backward on %d of %d micro-batches and was %supdated", name, (int)state->backwards, (int)proof->policy.micro_batches, state->updated == 2 ? "" : "not ");
    }
    if (proof->scalar[1] < 0) return llmpar_error_set(proof->error, LLMPAR_ERR_SCHEDULE, "schedule: end: the loss is never reduced");
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_schedule_validate(llmpar_heap *heap, const llmpar_instruction *list, int32_t count, const llmpar_unit *units, int32_t unit_count, const llmpar_policy *policy, llmpar_error *error)
{
    llmpar__proof proof;
    llmpar_status status = LLMPAR_OK;
    int32_t last[LLMPAR_STREAM_COUNT], host[LLMPAR_STREAM_COUNT];
    memset(&proof, 0, sizeof proof);
    proof.list = list;
    proof.count = count;
    proof.units = units;
    proof.unit_count = unit_count;
    proof.policy = *policy;
    if (!proof.policy.micro_batches) proof.policy.micro_batches = 1;
    proof.scalar[0] = proof.scalar[1] = -1;
    proof.error = error;
    if (count < 0 || unit_count < 1) return llmpar_error_set(error, LLMPAR_ERR_SCHEDULE, "schedule: %d instructions for %d units", (int)count, (int)unit_count);
    proof.state = (llmpar__unit_state *)llmpar_heap_zalloc(heap, (size_t)unit_count, sizeof *proof.state);
    proof.clock = (int32_t(*)[LLMPAR_STREAM_COUNT])llmpar_heap_alloc(heap, (size_t)count, sizeof *proof.clock);
    if (!proof.state || !proof.clock) status = llmpar_error_set(error, LLMPAR_ERR_MEMORY, "schedule: no memory to validate %d instructions", (int)count);
    for (int32_t unit = 0; unit < unit_count && !status; unit++) {
        proof.state[unit].gathered = proof.state[unit].last_gather = proof.state[unit].last_forward = proof.state[unit].last_backward = -1;
        llmpar__proof_no_readers(proof.state[unit].reader);
    }
    for (int s = 0; s < LLMPAR_STREAM_COUNT; s++) last[s] = host[s] = proof.norm[s] = -1;
    for (proof.at = 0; proof.at < count && !status; proof.at++) {
        const llmpar_instruction *in = &list[proof.at];
        status = llmpar__proof_operands(&proof, in);
        if (status) break;
        llmpar__proof_clock(&proof, in, last, host);
        status = llmpar__proof_instruction(&proof, in);
    }
    if (!status) status = llmpar__proof_end(&proof);
    llmpar_heap_free(heap, proof.clock);
    llmpar_heap_free(heap, proof.state);
    return status;
}
/* ==== src/fsdp/executor.c ==== */

#include <string.h>
#include <stdio.h>


/* One host thread walks the list. Data order between streams is in the list's waits; that freed memory may be handed to another stream
   is the executor's own concern: who allocates waits for the last release on every other stream. */
typedef struct llmpar__exec {
    llmpar_fsdp *fsdp;
    llmpar_run *run;
    llmpar_micro *micro;       /* [micro_batches] with grad_scale and loss filled in */
    int32_t micro_batches;
    int32_t found_inf;
    double grad_scale;         /* from the optimizer */
    int64_t nonfinite;         /* index of the first non-finite tensor */
} llmpar__exec;

/* ---- memory in stream order ---- */

static llmpar_status llmpar__exec_reuse(llmpar_fsdp *fsdp, llmpar_stream_id stream)
{
    for (int other = 0; other < LLMPAR_STREAM_COUNT; other++) {
        if (other == (int)stream || fsdp->free_seen[stream][other] == fsdp->free_serial[other]) continue;
        llmpar_status status = fsdp->device->event_wait(fsdp->device, fsdp->stream[stream], fsdp->free_event[other]);
        if (status) return status;
        fsdp->free_seen[stream][other] = fsdp->free_serial[other];
    }
    return LLMPAR_OK;
}

static llmpar_status llmpar__exec_alloc(llmpar_fsdp *fsdp, llmpar_stream_id stream, llmpar_tag tag, size_t bytes, const char *label, void **out)
{
    llmpar_status status = llmpar__exec_reuse(fsdp, stream);
    return status ? status : llmpar_arena_alloc(fsdp->arena, tag, bytes, label, out);
}

static llmpar_status llmpar__exec_freed(llmpar_fsdp *fsdp, llmpar_stream_id stream)
{
    fsdp->free_serial[stream]++;
    return fsdp->device->event_record(fsdp->device, fsdp->stream[stream], fsdp->free_event[stream]);
}

static llmpar_status llmpar__exec_free(llmpar_fsdp *fsdp, llmpar_stream_id stream, void **memory)
{
    if (!*memory) return LLMPAR_OK;
    llmpar_arena_free(fsdp->arena, *memory);
    *memory = NULL;
    return llmpar__exec_freed(fsdp, stream);
}

/* ---- a unit's own instructions ---- */

static llmpar_status llmpar__exec_ops(llmpar__exec *exec, const llmpar_unit_op *ops, int32_t count, llmpar_unit_call *call)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar_device *device = fsdp->device;
    llmpar_stream *compute = fsdp->stream[LLMPAR_STREAM_COMPUTE], *tp = fsdp->stream[LLMPAR_STREAM_TP];
    llmpar_status status = LLMPAR_OK;
    int used_tp = 0;
    for (int32_t i = 0; i < count && !status; i++) {
        int on_tp = ops[i].kind != LLMPAR_COMPUTE;
        call->stream = on_tp ? tp : compute;
        if (on_tp && !used_tp) { /* whatever the unit reads was written on the compute stream before */
            status = device->event_record(device, compute, fsdp->unit_event[LLMPAR__UNIT_EVENTS]);
            if (!status) status = device->event_wait(device, tp, fsdp->unit_event[LLMPAR__UNIT_EVENTS]);
        }
        used_tp |= on_tp;
        for (int w = 0; w < 2 && !status; w++) {
            int32_t wait = ops[i].wait[w] - 1;
            if (wait < 0) continue;
            if (wait >= i) return llmpar_fail(fsdp->ctx, LLMPAR_ERR_SCHEDULE, "unit instruction %d (%s) waits for %d, expected an earlier one", (int)i, ops[i].name, (int)wait);
            if ((ops[wait].kind != LLMPAR_COMPUTE) != on_tp) status = device->event_wait(device, call->stream, fsdp->unit_event[wait]);
        }
        if (!status) status = ops[i].run(call);
        if (!status) status = device->event_record(device, call->stream, fsdp->unit_event[i]);
    }
    /* The call's memory is released on the compute stream, so nothing of it may still run on the other. */
    if (used_tp && !status) status = device->event_record(device, tp, fsdp->unit_event[LLMPAR__UNIT_EVENTS]);
    if (used_tp && !status) status = device->event_wait(device, compute, fsdp->unit_event[LLMPAR__UNIT_EVENTS]);
    return status;
}

static llmpar_status llmpar__exec_sizes(llmpar__exec *exec, int32_t unit, int32_t m, llmpar_unit_sizes *out)
{
    const llmpar_unit *u = &exec->fsdp->units[unit].unit;
    memset(out, 0, sizeof *out);
    return u->sizes(u->user, &exec->micro[m], exec->fsdp->dtype, out);
}

static void llmpar__exec_call(llmpar__exec *exec, const llmpar_instruction *in, llmpar_unit_call *call)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar__flat *flat = &fsdp->units[in->unit];
    int32_t borrow = flat->unit.borrow - 1;
    memset(call, 0, sizeof *call);
    call->ctx = fsdp->ctx;
    call->device = fsdp->device;
    call->user = flat->unit.user;
    call->micro = &exec->micro[in->micro_batch];
    call->pass = in->op == LLMPAR_OP_BACKWARD ? LLMPAR_PASS_BACKWARD : (llmpar_pass)in->pass;
    call->dtype = fsdp->dtype;
    call->params = flat->params;
    if (borrow >= 0) call->borrowed = fsdp->units[borrow].params;
    call->input = in->unit > 0 ? fsdp->units[in->unit - 1].output[in->micro_batch] : NULL;
}

static llmpar_status llmpar__exec_scratch(llmpar__exec *exec, llmpar__flat *flat, const llmpar_unit_sizes *sizes, llmpar_unit_call *call)
{
    llmpar_status status = llmpar__exec_alloc(exec->fsdp, LLMPAR_STREAM_COMPUTE, LLMPAR_TAG_ACTIVATIONS, sizes->scratch, flat->label[LLMPAR__LABEL_ACTIVATIONS], &call->scratch);
    if (!status) status = llmpar__exec_alloc(exec->fsdp, LLMPAR_STREAM_COMPUTE, LLMPAR_TAG_WORKSPACE, sizes->workspace, flat->label[LLMPAR__LABEL_ACTIVATIONS], &call->workspace);
    call->workspace_bytes = sizes->workspace;
    return status;
}

static llmpar_status llmpar__exec_release_scratch(llmpar__exec *exec, llmpar_unit_call *call, llmpar_status status)
{
    llmpar_status a = llmpar__exec_free(exec->fsdp, LLMPAR_STREAM_COMPUTE, &call->workspace);
    llmpar_status b = llmpar__exec_free(exec->fsdp, LLMPAR_STREAM_COMPUTE, &call->scratch);
    return status ? status : a ? a : b;
}

static llmpar_status llmpar__exec_forward(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar__flat *flat = &fsdp->units[in->unit];
    int32_t m = in->micro_batch;
    llmpar_unit_sizes sizes;
    llmpar_unit_call call;
    llmpar__exec_call(exec, in, &call);
    llmpar_status status = llmpar__exec_sizes(exec, in->unit, m, &sizes);
    if (!status && sizes.output) status = llmpar__exec_alloc(fsdp, LLMPAR_STREAM_COMPUTE, LLMPAR_TAG_ACTIVATIONS, sizes.output, flat->label[LLMPAR__LABEL_ACTIVATIONS], &flat->output[m]);
    if (!status) status = llmpar__exec_alloc(fsdp, LLMPAR_STREAM_COMPUTE, LLMPAR_TAG_ACTIVATIONS, sizes.saved, flat->label[LLMPAR__LABEL_ACTIVATIONS], &flat->saved[m]);
    if (!status) status = llmpar__exec_scratch(exec, flat, &sizes, &call);
    call.output = flat->output[m];
    call.saved = flat->saved[m];
    if (!status) status = llmpar__exec_ops(exec, flat->unit.forward, flat->unit.forward_count, &call);
    status = llmpar__exec_release_scratch(exec, &call, status);
    if (status || in->pass != LLMPAR_PASS_EVAL) return status;
    status = llmpar__exec_free(fsdp, LLMPAR_STREAM_COMPUTE, &flat->saved[m]);
    if (!status && in->unit > 0) status = llmpar__exec_free(fsdp, LLMPAR_STREAM_COMPUTE, &fsdp->units[in->unit - 1].output[m]);
    return status;
}

/* A buffer for the whole gradient of a unit; its padding is zeroed, the rest is written by backward. */
static llmpar_status llmpar__exec_gradient(llmpar__exec *exec, int32_t unit, int32_t use, int32_t local, int32_t slot)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar__flat *flat = &fsdp->units[unit];
    size_t size = llmpar_dtype_size(fsdp->dtype);
    void **buffer = &flat->grad[use][local][slot];
    int32_t n = flat->unit.param_count;
    llmpar_status status = llmpar__exec_alloc(fsdp, LLMPAR_STREAM_COMPUTE, LLMPAR_TAG_GRADIENTS, (size_t)flat->elements * size, flat->label[LLMPAR__LABEL_GRADIENT], buffer);
    for (int32_t i = 0; i < n && !status; i++) {
        int64_t end = flat->offset[i] + flat->count[i], next = i + 1 < n ? flat->offset[i + 1] : flat->elements;
        flat->grads[use * n + i] = (char *)*buffer + (size_t)flat->offset[i] * size;
        if (next > end) status = fsdp->device->zero(fsdp->device, fsdp->stream[LLMPAR_STREAM_COMPUTE], (char *)*buffer + (size_t)end * size, (size_t)(next - end) * size);
    }
    if (n == 0 && !status) status = fsdp->device->zero(fsdp->device, fsdp->stream[LLMPAR_STREAM_COMPUTE], *buffer, (size_t)flat->elements * size);
    return status;
}

static llmpar_status llmpar__exec_backward(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar__flat *flat = &fsdp->units[in->unit], *before = in->unit > 0 ? flat - 1 : NULL, *behind = in->unit + 1 < fsdp->unit_count ? flat + 1 : NULL;
    int32_t m = in->micro_batch, borrow = flat->unit.borrow - 1;
    llmpar_unit_sizes sizes, input;
    llmpar_unit_call call;
    llmpar__exec_call(exec, in, &call);
    llmpar_status status = llmpar__exec_sizes(exec, in->unit, m, &sizes);
    if (!status) status = llmpar__exec_gradient(exec, in->unit, 0, in->local, in->slot);
    if (!status && borrow >= 0) status = llmpar__exec_gradient(exec, borrow, 1, in->local, in->from);
    if (!status && before) {
        status = llmpar__exec_sizes(exec, in->unit - 1, m, &input);
        if (!status) status = llmpar__exec_alloc(fsdp, LLMPAR_STREAM_COMPUTE, LLMPAR_TAG_ACTIVATIONS, input.output, before->label[LLMPAR__LABEL_ACTIVATIONS], &flat->dinput[m]);
    }
    if (!status) status = llmpar__exec_scratch(exec, flat, &sizes, &call);
    call.grads = flat->grads;
    if (borrow >= 0) call.borrowed_grads = fsdp->units[borrow].grads + fsdp->units[borrow].unit.param_count;
    call.saved = flat->saved[m];
    call.doutput = behind ? behind->dinput[m] : NULL;
    call.dinput = flat->dinput[m];
    if (!status) status = llmpar__exec_ops(exec, flat->unit.backward, flat->unit.backward_count, &call);
    status = llmpar__exec_release_scratch(exec, &call, status);
    if (!status) status = llmpar__exec_free(fsdp, LLMPAR_STREAM_COMPUTE, &flat->saved[m]);
    if (!status && before) status = llmpar__exec_free(fsdp, LLMPAR_STREAM_COMPUTE, &before->output[m]);
    if (!status && behind) status = llmpar__exec_free(fsdp, LLMPAR_STREAM_COMPUTE, &behind->dinput[m]);
    return status;
}

/* ---- gradients ---- */

static llmpar_status llmpar__exec_reduce(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar__flat *flat = &fsdp->units[in->unit];
    void **shard = &flat->grad[in->use][0][in->slot];
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.dtype = fsdp->dtype;
    call.count = (size_t)flat->shard_elements;
    if (in->op == LLMPAR_OP_REDUCE) {
        llmpar_status status = llmpar__exec_alloc(fsdp, in->stream, LLMPAR_TAG_GRADIENTS, call.count * llmpar_dtype_size(fsdp->dtype), flat->label[LLMPAR__LABEL_GRADIENT], shard);
        if (status) return status;
        call.send = flat->grad[in->use][1][in->from];
        call.recv = *shard;
        call.tag = flat->label[LLMPAR__LABEL_REDUCE];
        return llmpar_reduce_scatter(fsdp->shard_comm, fsdp->stream[in->stream], &call);
    }
    call.send = call.recv = *shard;
    call.tag = flat->label[LLMPAR__LABEL_REPLICA];
    return llmpar_all_reduce(fsdp->replica_comm, fsdp->stream[in->stream], &call);
}

static llmpar_status llmpar__exec_accumulate(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar__flat *flat = &fsdp->units[in->unit];
    void **to = &flat->grad[in->use][in->local][in->slot], **from = &flat->grad[in->from_use][in->local][in->from];
    llmpar_add_args args;
    memset(&args, 0, sizeof args);
    args.count = (size_t)(in->local ? flat->elements : flat->shard_elements);
    args.a = *to; /* the lower micro-batch, on the left */
    args.b = *from;
    args.out = *to;
    args.dtype = fsdp->dtype;
    llmpar_status status = fsdp->device->add(fsdp->device, fsdp->stream[in->stream], &args);
    return status ? status : llmpar__exec_free(fsdp, in->stream, from);
}

static llmpar_status llmpar__exec_norm(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar__flat *flat = &fsdp->units[in->unit];
    llmpar_status status = LLMPAR_OK;
    for (int32_t s = 0; s < flat->segment_count && !status; s++) {
        const llmpar_segment *segment = &flat->segments[s];
        if (!segment->owner) continue;
        llmpar_square_sum_args args;
        memset(&args, 0, sizeof args);
        args.count = (size_t)segment->count;
        args.x = (const char *)flat->grad[in->use][0][in->slot] + (size_t)segment->begin * llmpar_dtype_size(fsdp->dtype);
        args.accumulator = fsdp->scalars + LLMPAR_EXACT_SUM_LIMBS;
        args.dtype = fsdp->dtype;
        status = fsdp->device->square_sum(fsdp->device, fsdp->stream[in->stream], &args);
    }
    return status;
}

/* ---- scalars ---- */

static llmpar_status llmpar__exec_scalars(llmpar__exec *exec, const llmpar_instruction *in, int64_t *values, size_t count, const char *tag)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar_stream *stream = fsdp->stream[in->stream];
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.send = call.recv = fsdp->scalars;
    call.count = count;
    call.dtype = LLMPAR_I64;
    call.tag = tag;
    llmpar_status status = fsdp->device->copy(fsdp->device, stream, fsdp->scalars, values, count * sizeof *values);
    if (!status) status = llmpar_all_reduce(fsdp->mesh->world, stream, &call);
    if (!status) status = fsdp->device->copy(fsdp->device, stream, values, fsdp->scalars, count * sizeof *values);
    llmpar_status waited = fsdp->device->synchronize(fsdp->device, stream); /* in any case: the stream may read the caller's values */
    return status ? status : waited;
}

static llmpar_status llmpar__exec_tokens(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    /* Every rank of a tp group holds the same sequences: they count once. */
    int64_t tokens = fsdp->mesh->coordinate[LLMPAR_AXIS_TP] == 0 ? exec->run->tokens : 0;
    llmpar_status status = llmpar__exec_scalars(exec, in, &tokens, 1, "tokens");
    if (status) return status;
    exec->run->global_tokens = tokens;
    for (int32_t m = 0; m < exec->micro_batches; m++) exec->micro[m].grad_scale = tokens ? (float)(exec->run->loss_scale / (double)tokens) : 0.0f;
    /* Loss and norm start from zero before any stream adds to them. */
    status = fsdp->device->zero(fsdp->device, fsdp->stream[in->stream], fsdp->scalars, LLMPAR__SCALARS * sizeof(int64_t));
    return status ? status : fsdp->device->synchronize(fsdp->device, fsdp->stream[in->stream]);
}

static llmpar_status llmpar__exec_loss(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar_run *run = exec->run;
    llmpar_exact_sum sum[2];
    llmpar_status status = fsdp->device->copy(fsdp->device, fsdp->stream[in->stream], sum, fsdp->scalars, sizeof sum);
    if (!status) status = fsdp->device->synchronize(fsdp->device, fsdp->stream[in->stream]);
    if (status) return status;
    if (fsdp->mesh->coordinate[LLMPAR_AXIS_TP] != 0) memset(&sum[0], 0, sizeof sum[0]); /* all of a tp group computed the same loss */
    llmpar_exact_sum_carry(&sum[0]);
    llmpar_exact_sum_carry(&sum[1]);
    status = llmpar__exec_scalars(exec, in, sum[0].limb, LLMPAR__SCALARS, "loss, norm");
    if (status) return status;
    run->loss = run->global_tokens ? llmpar_exact_sum_value(&sum[0]) / (double)run->global_tokens : 0;
    run->grad_norm = llmpar_sqrt_f64(llmpar_exact_sum_value(&sum[1])) / run->loss_scale;
    run->skipped = run->global_tokens == 0;
    exec->found_inf = !llmpar_isfinite_f64(run->loss) || !llmpar_isfinite_f64(run->grad_norm);
    if (exec->found_inf) return llmpar__fsdp_first_nonfinite(fsdp, &exec->nonfinite);
    if (run->optimizer && run->optimizer->begin_step && !run->skipped) status = run->optimizer->begin_step(run->optimizer->state, run->grad_norm, &exec->grad_scale);
    exec->grad_scale /= run->loss_scale;
    return status;
}

static llmpar_status llmpar__exec_optim(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar_run *run = exec->run;
    llmpar__flat *flat = &fsdp->units[in->unit];
    void **grad = &flat->grad[in->use][0][in->slot];
    llmpar_status status = LLMPAR_OK;
    if (run->on_gradient) {
        status = fsdp->device->synchronize(fsdp->device, fsdp->stream[in->stream]);
        if (!status) status = run->on_gradient(run->on_gradient_user, fsdp, in->unit, *grad);
    }
    if (!status && run->optimizer && !exec->found_inf && !run->skipped) {
        llmpar_update update;
        memset(&update, 0, sizeof update);
        update.unit = in->unit;
        update.dtype = fsdp->dtype;
        update.elements = flat->shard_elements;
        update.param = flat->shard;
        update.grad = *grad;
        update.segments = flat->segments;
        update.segment_count = flat->segment_count;
        update.grad_scale = exec->grad_scale;
        update.stream = fsdp->stream[in->stream];
        status = run->optimizer->update(run->optimizer->state, &update);
    }
    return status ? status : llmpar__exec_free(fsdp, in->stream, grad);
}

/* ---- the walk ---- */

static llmpar_status llmpar__exec_instruction(llmpar__exec *exec, const llmpar_instruction *in)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar_status status;
    switch (in->op) {
    case LLMPAR_OP_GATHER:
        status = llmpar__exec_reuse(fsdp, in->stream);
        return status ? status : llmpar__fsdp_gather(fsdp, &fsdp->units[in->unit], fsdp->stream[in->stream]);
    case LLMPAR_OP_FREE:
        if (in->slot >= 0) return llmpar__exec_free(fsdp, in->stream, &fsdp->units[in->unit].grad[in->use][in->local][in->slot]);
        llmpar__fsdp_release(fsdp, &fsdp->units[in->unit]);
        return llmpar__exec_freed(fsdp, in->stream);
    case LLMPAR_OP_FORWARD: return llmpar__exec_forward(exec, in);
    case LLMPAR_OP_BACKWARD: return llmpar__exec_backward(exec, in);
    case LLMPAR_OP_REDUCE:
    case LLMPAR_OP_REDUCE_REPLICA: return llmpar__exec_reduce(exec, in);
    case LLMPAR_OP_ACCUMULATE: return llmpar__exec_accumulate(exec, in);
    case LLMPAR_OP_NORM: return llmpar__exec_norm(exec, in);
    case LLMPAR_OP_SCALAR_REDUCE: return in->pass ? llmpar__exec_loss(exec, in) : llmpar__exec_tokens(exec, in);
    case LLMPAR_OP_OPTIM: return llmpar__exec_optim(exec, in);
    }
    return llmpar_fail(fsdp->ctx, LLMPAR_ERR_SCHEDULE, "no op %d", (int)in->op);
}

static llmpar_status llmpar__exec_walk(llmpar__exec *exec, const llmpar_instruction *list, int32_t count, const unsigned char *awaited)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    llmpar_status status = LLMPAR_OK;
    for (int32_t i = 0; i < count && !status; i++) {
        const llmpar_instruction *in = &list[i];
        for (int32_t w = 0; w < in->wait_count && !status; w++)
            if (list[in->waits[w]].stream != in->stream) status = fsdp->device->event_wait(fsdp->device, fsdp->stream[in->stream], fsdp->event[in->waits[w]]);
        if (!status) status = llmpar__exec_instruction(exec, in);
        if (!status && awaited[i]) status = fsdp->device->event_record(fsdp->device, fsdp->stream[in->stream], fsdp->event[i]);
    }
    for (int s = 0; s < LLMPAR_STREAM_COUNT; s++) {
        llmpar_status sync = fsdp->device->synchronize(fsdp->device, fsdp->stream[s]);
        if (!status) status = sync;
    }
    return status;
}

/* Events for the instructions that somebody waits for; they stay for the next step. */
static llmpar_status llmpar__exec_events(llmpar_fsdp *fsdp, const llmpar_instruction *list, int32_t count, unsigned char *awaited)
{
    llmpar_heap *heap = &fsdp->ctx->heap;
    if (count > fsdp->event_count) {
        llmpar_event **event = (llmpar_event **)llmpar_heap_zalloc(heap, (size_t)count, sizeof *event);
        if (!event) return llmpar_fail(fsdp->ctx, LLMPAR_ERR_MEMORY, "no memory for %d events", (int)count);
        if (fsdp->event_count) memcpy(event, fsdp->event, (size_t)fsdp->event_count * sizeof *event);
        llmpar_heap_free(heap, fsdp->event);
        fsdp->event = event;
        fsdp->event_count = count;
    }
    for (int32_t i = 0; i < count; i++)
        for (int32_t w = 0; w < list[i].wait_count; w++)
            if (list[list[i].waits[w]].stream != list[i].stream) awaited[list[i].waits[w]] = 1;
    for (int32_t i = 0; i < count; i++)
        if (awaited[i] && !fsdp->event[i]) {
            llmpar_status status = fsdp->device->event_create(fsdp->device, &fsdp->event[i]);
            if (status) return status;
        }
    return LLMPAR_OK;
}

/* Whatever an interrupted step left behind. */
static void llmpar__exec_clean(llmpar__exec *exec)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    for (int32_t u = 0; u < fsdp->unit_count; u++) {
        llmpar__flat *flat = &fsdp->units[u];
        for (int i = 0; i < 4 * LLMPAR_GRAD_SLOTS; i++) {
            void **grad = &flat->grad[i / (2 * LLMPAR_GRAD_SLOTS)][i / LLMPAR_GRAD_SLOTS % 2][i % LLMPAR_GRAD_SLOTS];
            llmpar_arena_free(fsdp->arena, *grad);
            *grad = NULL;
        }
        void ***lists[3] = {&flat->output, &flat->saved, &flat->dinput};
        for (int k = 0; k < 3; k++) {
            for (int32_t m = 0; m < exec->micro_batches && *lists[k]; m++) llmpar_arena_free(fsdp->arena, (*lists[k])[m]);
            llmpar_heap_free(&fsdp->ctx->heap, *lists[k]);
            *lists[k] = NULL;
        }
        while (!fsdp->unsharded && flat->gathers > 0) llmpar__fsdp_release(fsdp, flat);
    }
}

static llmpar_status llmpar__exec_report(llmpar__exec *exec)
{
    llmpar_fsdp *fsdp = exec->fsdp;
    int64_t index = exec->nonfinite;
    const char *what = index >= ((int64_t)1 << 40) ? "the gradient of " : "", *name = "no parameter or gradient (an activation)";
    if (index >= 0) name = fsdp->units[(index >> 16) & 0xffffff].unit.params[index & 0xffff].name;
    return llmpar_fail(fsdp->ctx, LLMPAR_ERR_NONFINITE, "loss %g, gradient norm %g: expected finite values; first non-finite tensor: %s%s", exec->run->loss, exec->run->grad_norm, what, name);
}

LLMPAR_DEF llmpar_status llmpar_fsdp_run(llmpar_fsdp *fsdp, const llmpar_instruction *list, int32_t count, llmpar_run *run)
{
    llmpar_heap *heap = &fsdp->ctx->heap;
    llmpar__exec exec;
    memset(&exec, 0, sizeof exec);
    exec.fsdp = fsdp;
    exec.run = run;
    exec.grad_scale = 1;
    exec.nonfinite = -1;
    if (run->loss_scale == 0) run->loss_scale = 1;
    run->loss = run->grad_norm = 0;
    run->global_tokens = 0;
    run->skipped = 0;
    for (int32_t i = 0; i < count; i++)
        if (list[i].micro_batch >= exec.micro_batches) exec.micro_batches = list[i].micro_batch + 1;
    for (int32_t u = 0; u < fsdp->unit_count; u++)
        if (fsdp->units[u].gathers) return llmpar_fail(fsdp->ctx, LLMPAR_ERR_ARGUMENT, "unit %s: still unsharded by hand, expected reshard before a step", fsdp->units[u].unit.name);
    unsigned char *awaited = (unsigned char *)llmpar_heap_zalloc(heap, (size_t)count + 1, 1);
    exec.micro = (llmpar_micro *)llmpar_heap_alloc(heap, (size_t)exec.micro_batches + 1, sizeof *exec.micro);
    llmpar_status status = LLMPAR_OK;
    if (!awaited || !exec.micro) status = llmpar_fail(fsdp->ctx, LLMPAR_ERR_MEMORY, "no memory for a step of %d instructions", (int)count);
    for (int32_t m = 0; m < exec.micro_batches && !status; m++) {
        exec.micro[m] = run->micro[m];
        exec.micro[m].index = m;
        exec.micro[m].loss = fsdp->scalars;
    }
    for (int32_t u = 0; u < fsdp->unit_count && !status; u++) {
        llmpar__flat *flat = &fsdp->units[u];
        flat->output = (void **)llmpar_heap_zalloc(heap, (size_t)exec.micro_batches, sizeof(void *));
        flat->saved = (void **)llmpar_heap_zalloc(heap, (size_t)exec.micro_batches, sizeof(void *));
        flat->dinput = (void **)llmpar_heap_zalloc(heap, (size_t)exec.micro_batches, sizeof(void *));
        if (!flat->output || !flat->saved || !flat->dinput) status = llmpar_fail(fsdp->ctx, LLMPAR_ERR_MEMORY, "no memory for %d micro-batches", (int)exec.micro_batches);
    }
    if (!status) status = llmpar__exec_events(fsdp, list, count, awaited);
    if (!status) status = llmpar__exec_walk(&exec, list, count, awaited);
    llmpar__exec_clean(&exec);
    llmpar_heap_free(heap, exec.micro);
    llmpar_heap_free(heap, awaited);
    if (!status && exec.found_inf) status = llmpar__exec_report(&exec);
    return status;
}

/* ==== src/optim/adamw.c ==== */

#include <string.h>


struct llmpar_adamw {
    llmpar_fsdp *fsdp;
    llmpar_heap *heap;
    llmpar_adamw_desc desc;
    llmpar_optimizer table;
    void **first, **second;   /* [units] */
    double lr, power1, power2; /* beta^step */
    int64_t steps;
};

LLMPAR_DEF double llmpar_lr_cosine(double lr, double lr_min, int64_t warmup, int64_t total, int64_t step)
{
    const double pi = 3.14159265358979323846;
    double sine, cosine;
    if (step <= warmup) return warmup > 0 ? lr * (double)step / (double)warmup : lr;
    if (total <= warmup) return lr;
    if (step >= total) return lr_min;
    llmpar_sincos_f64(pi * (double)(step - warmup) / (double)(total - warmup), &sine, &cosine);
    return lr_min + 0.5 * (lr - lr_min) * (1.0 + cosine);
}

LLMPAR_DEF double llmpar_clip_scale(double norm, double max_norm)
{
    return max_norm > 0 && norm > max_norm ? max_norm / norm : 1.0;
}

LLMPAR_DEF void llmpar_adamw_desc_resolve(llmpar_adamw_desc *desc)
{
    if (desc->beta1 == 0) desc->beta1 = 0.9;
    if (desc->beta2 == 0) desc->beta2 = 0.95;
    if (desc->eps == 0) desc->eps = 1e-8;
    if (desc->decay == 0) desc->decay = 0.1;
    if (desc->clip == 0) desc->clip = 1.0;
}

static llmpar_status llmpar__adamw_begin(void *state, double grad_norm, double *grad_scale)
{
    llmpar_adamw *adamw = (llmpar_adamw *)state;
    *grad_scale = llmpar_clip_scale(grad_norm, adamw->desc.clip);
    adamw->steps++;
    adamw->power1 *= adamw->desc.beta1;
    adamw->power2 *= adamw->desc.beta2;
    return LLMPAR_OK;
}

static llmpar_status llmpar__adamw_update(void *state, const llmpar_update *update)
{
    llmpar_adamw *adamw = (llmpar_adamw *)state;
    llmpar_device *device = llmpar_fsdp_mesh(adamw->fsdp)->ctx->device;
    size_t size = llmpar_dtype_size(update->dtype);
    llmpar_status status = LLMPAR_OK;
    /* Segment by segment: decay differs, and padding between them must stay zero. */
    for (int32_t s = 0; s < update->segment_count && !status; s++) {
        const llmpar_segment *segment = &update->segments[s];
        size_t begin = (size_t)segment->begin * size;
        llmpar_adamw_args args;
        memset(&args, 0, sizeof args);
        args.count = (size_t)segment->count;
        args.p = (char *)update->param + begin;
        args.g = (const char *)update->grad + begin;
        args.m = (char *)adamw->first[update->unit] + begin;
        args.v = (char *)adamw->second[update->unit] + begin;
        args.lr = adamw->lr;
        args.beta1 = adamw->desc.beta1;
        args.beta2 = adamw->desc.beta2;
        args.eps = adamw->desc.eps;
        args.decay = segment->no_decay || adamw->desc.decay < 0 ? 0 : adamw->desc.decay;
        args.correction1 = 1 - adamw->power1;
        args.correction2 = 1 - adamw->power2;
        args.grad_scale = update->grad_scale;
        args.dtype = update->dtype;
        status = device->adamw(device, update->stream, &args);
    }
    return status;
}

LLMPAR_DEF llmpar_status llmpar_adamw_desc_check(const llmpar_adamw_desc *desc, llmpar_error *error)
{
    if (!(desc->beta1 > 0 && desc->beta1 < 1) || !(desc->beta2 > 0 && desc->beta2 < 1)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "adamw: beta1 = %g, beta2 = %g, expected between 0 and 1", desc->beta1, desc->beta2);
    if (!(desc->eps > 0 && desc->eps < 1)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "adamw: eps = %g, expected between 0 and 1", desc->eps);
    if (!(desc->decay <= 1)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "adamw: decay = %g, expected at most 1", desc->decay);
    if (desc->clip != desc->clip) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "adamw: clip = %g, expected a number", desc->clip);
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_adamw_create(llmpar_fsdp *fsdp, const llmpar_adamw_desc *desc, llmpar_adamw **out)
{
    llmpar_ctx *ctx = llmpar_fsdp_mesh(fsdp)->ctx;
    llmpar_arena *arena = llmpar_fsdp_arena(fsdp);
    int32_t units = llmpar_fsdp_unit_count(fsdp);
    size_t size = llmpar_dtype_size(llmpar_fsdp_dtype(fsdp));
    llmpar_adamw_desc resolved = *desc;
    *out = NULL;
    llmpar_adamw_desc_resolve(&resolved);
    llmpar_error error;
    llmpar_error_clear(&error);
    llmpar_status status = llmpar_adamw_desc_check(&resolved, &error);
    if (status) return llmpar_fail(ctx, status, "%s", error.text);
    llmpar_adamw *adamw = (llmpar_adamw *)llmpar_heap_zalloc(&ctx->heap, 1, sizeof *adamw);
    if (!adamw) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "adamw: out of memory");
    adamw->fsdp = fsdp;
    adamw->heap = &ctx->heap;
    adamw->desc = resolved;
    adamw->power1 = adamw->power2 = 1;
    adamw->table.state = adamw;
    adamw->table.begin_step = llmpar__adamw_begin;
    adamw->table.update = llmpar__adamw_update;
    adamw->first = (void **)llmpar_heap_zalloc(&ctx->heap, (size_t)units, sizeof(void *));
    adamw->second = (void **)llmpar_heap_zalloc(&ctx->heap, (size_t)units, sizeof(void *));
    if (!adamw->first || !adamw->second) status = llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "adamw: out of memory for %d units", (int)units);
    llmpar_stream *stream = NULL;
    if (!status) status = ctx->device->stream_create(ctx->device, "set-up", &stream);
    for (int32_t u = 0; u < units && !status; u++) {
        int64_t elements;
        const char *name = llmpar_fsdp_unit(fsdp, u)->name;
        llmpar_fsdp_shard(fsdp, u, &elements, NULL, NULL);
        void **moment[2] = {&adamw->first[u], &adamw->second[u]};
        for (int i = 0; i < 2 && !status; i++) {
            status = llmpar_arena_alloc(arena, LLMPAR_TAG_OPTIMIZER, (size_t)elements * size, name, moment[i]);
            if (!status) status = ctx->device->zero(ctx->device, stream, *moment[i], (size_t)elements * size);
        }
    }
    if (!status) status = ctx->device->synchronize(ctx->device, stream);
    if (stream) ctx->device->stream_destroy(ctx->device, stream);
    if (status) {
        llmpar_adamw_destroy(adamw);
        return status;
    }
    *out = adamw;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_adamw_destroy(llmpar_adamw *adamw)
{
    if (!adamw) return;
    llmpar_arena *arena = llmpar_fsdp_arena(adamw->fsdp);
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(adamw->fsdp); u++) {
        if (adamw->first) llmpar_arena_free(arena, adamw->first[u]);
        if (adamw->second) llmpar_arena_free(arena, adamw->second[u]);
    }
    llmpar_heap_free(adamw->heap, adamw->first);
    llmpar_heap_free(adamw->heap, adamw->second);
    llmpar_heap_free(adamw->heap, adamw);
}

LLMPAR_DEF const llmpar_optimizer *llmpar_adamw_optimizer(const llmpar_adamw *adamw) { return &adamw->table; }
LLMPAR_DEF void llmpar_adamw_set_lr(llmpar_adamw *adamw, double lr) { adamw->lr = lr; }
LLMPAR_DEF int64_t llmpar_adamw_steps(const llmpar_adamw *adamw) { return adamw->steps; }
LLMPAR_DEF void llmpar_adamw_moments(llmpar_adamw *adamw, int32_t unit, void **first, void **second)
{
    *first = adamw->first[unit];
    *second = adamw->second[unit];
}

/* ==== src/text/data.c ==== */

#include <string.h>

#if !defined(LLMPAR_NO_TEXT)

/* Streams of the data's random numbers; part of the order that a seed stands for. */
static const char llmpar__data_phase_name[] = "data.phase", llmpar__data_order_name[] = "data.order";

LLMPAR_DEF llmpar_status llmpar_data_init(const llmpar_data_desc *desc, llmpar_data *out, llmpar_error *error)
{
    const char *name = desc->name ? desc->name : "data";
    double share = desc->no_held_out ? 0 : desc->held_out == 0 ? 0.05 : desc->held_out;
    int64_t count = (int64_t)desc->count, t = desc->seq_len;
    memset(out, 0, sizeof *out);
    if (desc->count == 0) return llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: no data: the text has 0 bytes", name);
    if (!desc->bytes) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: bytes is NULL, expected %zu bytes", name, desc->count);
    if (count < 0) return llmpar_error_set(error, LLMPAR_ERR_OVERFLOW, "%s: %zu bytes, expected less than 2^63", name, desc->count);
    if (t < 1 || t > INT32_MAX) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: seq_len = %lld, expected 1 to %d", name, (long long)t, INT32_MAX);
    if (!(share >= 0 && share < 1)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "%s: held_out = %g, expected a share above 0 and below 1", name, desc->held_out);
    out->tokens = (const unsigned char *)desc->bytes;
    out->eval_count = (int64_t)((double)count * share);
    out->train_count = count - out->eval_count;
    out->seq_len = t;
    out->seed = desc->seed;
    if (share > 0 && out->eval_count < t + 1)
        return llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: too short: %lld of %lld tokens are held out (%g %%), but one sequence needs seq_len + 1 = %lld", name,
                                (long long)out->eval_count, (long long)count, share * 100, (long long)t + 1);
    if (out->train_count < t + 1)
        return llmpar_error_set(error, LLMPAR_ERR_FORMAT, "%s: too short: %lld of %lld tokens are for training, but one sequence needs seq_len + 1 = %lld", name,
                                (long long)out->train_count, (long long)count, (long long)t + 1);
    /* The last window ends at phase + S*T, and its last target must exist: phase + S*T < train_count for every phase. */
    out->windows = out->train_count / t - 1;
    if (out->windows < 1) out->windows = 1;
    out->phases = out->train_count - out->windows * t;
    if (out->phases > t) out->phases = t;
    out->eval_windows = out->eval_count > 0 ? (out->eval_count - 1) / t : 0;
    return LLMPAR_OK;
}

/* 64 random bits, a function of all arguments. */
static uint64_t llmpar__data_random(uint64_t seed, const char *name, int64_t epoch, uint64_t position)
{
    llmpar_rng rng = llmpar_rng_key(seed, LLMPAR_RNG_DATA, name, (uint64_t)epoch, 0);
    uint32_t words[4];
    llmpar_rng_words(&rng, position, words);
    return (uint64_t)words[1] << 32 | words[0];
}

/* Where `index` goes in epoch's permutation of [0, count): a Feistel network of eight rounds is a permutation of [0, 4^half), the smallest such range that holds count;
   what falls outside is sent through again until it falls inside (cycle walking, fewer than 4 turns on average), which leaves a permutation of [0, count). */
static int64_t llmpar__data_permute(uint64_t seed, int64_t epoch, int64_t count, int64_t index)
{
    llmpar_rng rng = llmpar_rng_key(seed, LLMPAR_RNG_DATA, llmpar__data_order_name, (uint64_t)epoch, 0);
    uint64_t value = (uint64_t)index, mask;
    int half = 1;
    while (half < 32 && ((uint64_t)1 << 2 * half) < (uint64_t)count) half++;
    mask = ((uint64_t)1 << half) - 1;
    do {
        uint64_t left = value >> half, right = value & mask, round;
        for (round = 0; round < 8; round++) {
            uint32_t words[4];
            uint64_t next;
            llmpar_rng_words(&rng, round << 32 | right, words);
            next = left ^ (words[0] & mask);
            left = right;
            right = next;
        }
        value = left << half | right;
    } while (value >= (uint64_t)count);
    return (int64_t)value;
}

static void llmpar__data_copy(const llmpar_data *data, int64_t start, int32_t *tokens)
{
    int64_t i;
    for (i = 0; i <= data->seq_len; i++) tokens[i] = data->tokens[start + i];
}

LLMPAR_DEF llmpar_status llmpar_data_sequence(void *data, int64_t global_index, int32_t *tokens)
{
    const llmpar_data *d = (const llmpar_data *)data;
    int64_t epoch, phase, window;
    if (global_index < 0) return LLMPAR_ERR_ARGUMENT;
    epoch = global_index / d->windows;
    phase = (int64_t)(llmpar__data_random(d->seed, llmpar__data_phase_name, epoch, 0) % (uint64_t)d->phases);
    window = llmpar__data_permute(d->seed, epoch, d->windows, global_index % d->windows);
    llmpar__data_copy(d, phase + window * d->seq_len, tokens);
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_data_eval_sequence(const llmpar_data *data, int64_t index, int32_t *tokens)
{
    if (index < 0 || index >= data->eval_windows) return LLMPAR_ERR_ARGUMENT;
    llmpar__data_copy(data, data->train_count + index * data->seq_len, tokens);
    return LLMPAR_OK;
}

#endif /* LLMPAR_NO_TEXT */

/* ==== src/model/config.c ==== */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if !defined(LLMPAR_NO_LLAMA)

#define LLMPAR__CONFIG_TWO_PI 6.283185307179586476925286766559

/* ---- presets ---- */

typedef struct llmpar__config_preset { const char *name; llmpar_llama_config config; } llmpar__config_preset;

/* vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, max_positions, eps, theta, {kind, original, factor, low, high}, tied, bos, eos_count, {eos}, init_std */
static const llmpar__config_preset llmpar__config_presets[] = {
    { "tiny", { 256, 128, 384, 4, 8, 4, 16, 1024, 1e-5, 10000.0, { LLMPAR_ROPE_NONE, 0, 0, 0, 0 }, 0, -1, 0, { 0 }, 0.02 } },
    { "15m", { 32000, 288, 768, 6, 6, 6, 48, 256, 1e-5, 10000.0, { LLMPAR_ROPE_NONE, 0, 0, 0, 0 }, 1, 1, 1, { 2 }, 0.02 } },
    { "110m", { 32000, 768, 2048, 12, 12, 12, 64, 1024, 1e-5, 10000.0, { LLMPAR_ROPE_NONE, 0, 0, 0, 0 }, 1, 1, 1, { 2 }, 0.02 } },
    { "1b", { 128256, 2048, 8192, 16, 32, 8, 64, 131072, 1e-5, 500000.0, { LLMPAR_ROPE_LLAMA3, 8192, 32.0, 1.0, 4.0 }, 1, 128000, 1, { 128001 }, 0.02 } }
};
#define LLMPAR__CONFIG_PRESETS (sizeof llmpar__config_presets / sizeof llmpar__config_presets[0])

LLMPAR_DEF llmpar_status llmpar_llama_preset(const char *name, llmpar_llama_config *out, llmpar_error *error)
{
    char list[200];
    size_t i, used = 0;
    memset(out, 0, sizeof *out);
    for (i = 0; i < LLMPAR__CONFIG_PRESETS; i++) {
        if (name && !strcmp(name, llmpar__config_presets[i].name)) {
            *out = llmpar__config_presets[i].config;
            return LLMPAR_OK;
        }
        used += (size_t)snprintf(list + used, sizeof list - used, "%s%s", i == 0 ? "" : i + 1 == LLMPAR__CONFIG_PRESETS ? " or " : ", ", llmpar__config_presets[i].name);
    }
    return llmpar_error_set(error, LLMPAR_ERR_CONFIG, "llama preset: \"%.100s\" is unknown, expected %s", name ? name : "", list);
}

/* ---- checking: one pass finds the fault, callers say where it stands ---- */

/* What is wrong: the field by its name in config.json, and the rest of the sentence. */
typedef struct llmpar__config_fault { const char *field; char text[320]; } llmpar__config_fault;

static int llmpar__config_say_range(llmpar__config_fault *f, const char *field, int64_t value, int64_t low, int64_t high)
{
    if (value >= low && value <= high) return 0;
    f->field = field;
    snprintf(f->text, sizeof f->text, "%s = %lld, expected an integer from %lld to %lld", field, (long long)value, (long long)low, (long long)high);
    return 1;
}

static int llmpar__config_say_real(llmpar__config_fault *f, const char *field, double value, int good, const char *expected)
{
    if (good && llmpar_isfinite_f64(value)) return 0;
    f->field = field;
    snprintf(f->text, sizeof f->text, "%s = %g, expected %s", field, value, expected);
    return 1;
}

/* Limits are far above any model; they make sure that products of two or three of them fit in 64 bits. */
static const int64_t llmpar__config_max_vocab = (int64_t)1 << 24, llmpar__config_max_hidden = (int64_t)1 << 20, llmpar__config_max_intermediate = (int64_t)1 << 22;
static const int64_t llmpar__config_max_layers = (int64_t)1 << 16, llmpar__config_max_heads = (int64_t)1 << 16, llmpar__config_max_head_dim = (int64_t)1 << 14;
static const int64_t llmpar__config_max_positions = (int64_t)1 << 29, llmpar__config_max_params = (int64_t)1 << 53;

static int llmpar__config_find_rope_fault(const llmpar_llama_config *c, llmpar__config_fault *f)
{
    const llmpar_rope_scaling *s = &c->rope_scaling;
    if (s->kind == LLMPAR_ROPE_NONE) return 0;
    if (s->kind != LLMPAR_ROPE_LINEAR && s->kind != LLMPAR_ROPE_LLAMA3) {
        f->field = "rope_type";
        snprintf(f->text, sizeof f->text, "rope_scaling kind = %d, expected none, linear or llama3", (int)s->kind);
        return 1;
    }
    if (llmpar__config_say_real(f, "factor", s->factor, s->factor >= 1 && s->factor <= 1e6, "a number from 1 to 1e6")) return 1;
    if (s->kind == LLMPAR_ROPE_LINEAR) return 0;
    if (llmpar__config_say_real(f, "low_freq_factor", s->low_freq_factor, s->low_freq_factor > 0, "a positive number")) return 1;
    if (llmpar__config_say_real(f, "high_freq_factor", s->high_freq_factor, s->high_freq_factor > s->low_freq_factor, "a number above low_freq_factor")) return 1;
    return llmpar__config_say_range(f, "original_max_position_embeddings", s->original_max_positions, 1, llmpar__config_max_positions);
}

static int64_t llmpar__config_layer_params(const llmpar_llama_config *c)
{
    int64_t d = c->hidden, q = (int64_t)c->heads * c->head_dim, kv = (int64_t)c->kv_heads * c->head_dim;
    return 2 * d * q + 2 * d * kv + 3 * d * c->intermediate + 2 * d;
}

static int llmpar__config_find_fault(const llmpar_llama_config *c, llmpar__config_fault *f)
{
    int32_t i;
    int64_t params;
    if (llmpar__config_say_range(f, "vocab_size", c->vocab, 1, llmpar__config_max_vocab)) return 1;
    if (llmpar__config_say_range(f, "hidden_size", c->hidden, 1, llmpar__config_max_hidden)) return 1;
    if (llmpar__config_say_range(f, "intermediate_size", c->intermediate, 1, llmpar__config_max_intermediate)) return 1;
    if (llmpar__config_say_range(f, "num_hidden_layers", c->layers, 1, llmpar__config_max_layers)) return 1;
    if (llmpar__config_say_range(f, "num_attention_heads", c->heads, 1, llmpar__config_max_heads)) return 1;
    if (llmpar__config_say_range(f, "num_key_value_heads", c->kv_heads, 1, c->heads)) return 1;
    if (c->heads % c->kv_heads) {
        f->field = "num_attention_heads";
        snprintf(f->text, sizeof f->text, "num_attention_heads = %d is not divisible by num_key_value_heads = %d", (int)c->heads, (int)c->kv_heads);
        return 1;
    }
    if (llmpar__config_say_range(f, "head_dim", c->head_dim, 2, llmpar__config_max_head_dim)) return 1;
    if (c->head_dim % 2) {
        f->field = "head_dim";
        snprintf(f->text, sizeof f->text, "head_dim = %d, expected an even number (rotary position embedding turns pairs)", (int)c->head_dim);
        return 1;
    }
    if (llmpar__config_say_range(f, "max_position_embeddings", c->max_positions, 1, llmpar__config_max_positions)) return 1;
    if (llmpar__config_say_real(f, "rms_norm_eps", c->rms_eps, c->rms_eps > 0 && c->rms_eps <= 1, "a number above 0, at most 1")) return 1;
    if (llmpar__config_say_real(f, "rope_theta", c->rope_theta, c->rope_theta >= 1 && c->rope_theta <= 1e15, "a number from 1 to 1e15")) return 1;
    if (llmpar__config_find_rope_fault(c, f)) return 1;
    if (llmpar__config_say_range(f, "tie_word_embeddings", c->tied, 0, 1)) return 1;
    if (llmpar__config_say_range(f, "bos_token_id", c->bos_id, -1, c->vocab - 1)) return 1;
    if (llmpar__config_say_range(f, "eos_token_id count", c->eos_count, 0, LLMPAR_MAX_EOS)) return 1;
    for (i = 0; i < c->eos_count; i++)
        if (llmpar__config_say_range(f, "eos_token_id", c->eos_id[i], 0, c->vocab - 1)) return 1;
    if (llmpar__config_say_real(f, "initializer_range", c->init_std, c->init_std >= 0 && c->init_std <= 1, "a number from 0 to 1")) return 1;
    /* One layer alone fits in 64 bits at these limits, all layers may not. */
    params = llmpar__config_layer_params(c);
    if (params > llmpar__config_max_params / c->layers || llmpar_llama_param_count(c) > llmpar__config_max_params) {
        f->field = "num_hidden_layers";
        snprintf(f->text, sizeof f->text, "num_hidden_layers = %d, layers of %lld parameters, expected at most %lld in all", (int)c->layers, (long long)params, (long long)llmpar__config_max_params);
        return 1;
    }
    return 0;
}

LLMPAR_DEF llmpar_status llmpar_llama_config_check(const llmpar_llama_config *config, llmpar_error *error)
{
    llmpar__config_fault fault;
    if (!llmpar__config_find_fault(config, &fault)) return LLMPAR_OK;
    return llmpar_error_set(error, LLMPAR_ERR_CONFIG, "llama config: %s", fault.text);
}

/* ---- reading config.json ---- */

typedef struct llmpar__config_reader {
    const char *name;        /* for messages */
    const char *text;
    size_t length;
    const llmpar_json *root;
    llmpar_error *error;
} llmpar__config_reader;

/* The value as it stands in the text, cut to `capacity`. */
static const char *llmpar__config_excerpt(const llmpar__config_reader *r, const llmpar_json *value, char *out, size_t capacity)
{
    size_t i = 0, at = value->position;
    char open = at < r->length ? r->text[at] : 0;
    if (value->type == LLMPAR_JSON_ARRAY || value->type == LLMPAR_JSON_OBJECT) {
        snprintf(out, capacity, "%s", open == '[' ? "an array" : "an object");
        return out;
    }
    while (at + i < r->length && i + 1 < capacity) {
        char c = r->text[at + i];
        if (open == '"' ? i > 0 && c == '"' && r->text[at + i - 1] != '\\' : strchr(" \t\r\n,]}", c) != NULL) {
            if (open == '"') out[i++] = c;
            break;
        }
        out[i++] = c;
    }
    out[i] = 0;
    return out;
}

static llmpar_status llmpar__config_wrong(const llmpar__config_reader *r, llmpar_status status, const llmpar_json *value, const char *expected)
{
    char excerpt[80];
    return llmpar_error_set(r->error, status, "%s: %.80s = %s, expected %s (byte %zu)", r->name, value->key, llmpar__config_excerpt(r, value, excerpt, sizeof excerpt), expected, value->position);
}

/* An integer field. NULL value: `missing` if that is allowed, else an error. */
static llmpar_status llmpar__config_int(const llmpar__config_reader *r, const llmpar_json *object, const char *key, int null_is_missing, int required, int32_t missing, int32_t *out)
{
    const llmpar_json *value = llmpar_json_get(object, key);
    *out = missing;
    if (!value || (null_is_missing && value->type == LLMPAR_JSON_NULL)) {
        if (!required) return LLMPAR_OK;
        return llmpar_error_set(r->error, LLMPAR_ERR_CONFIG, "%s: %s is missing (byte %zu)", r->name, key, object->position);
    }
    if (value->type != LLMPAR_JSON_NUMBER || !value->is_integer || value->integer < INT32_MIN || value->integer > INT32_MAX)
        return llmpar__config_wrong(r, LLMPAR_ERR_CONFIG, value, "an integer from 1 to 2147483647");
    *out = (int32_t)value->integer;
    return LLMPAR_OK;
}

static llmpar_status llmpar__config_real(const llmpar__config_reader *r, const llmpar_json *object, const char *key, int required, double missing, double *out)
{
    const llmpar_json *value = llmpar_json_get(object, key);
    *out = missing;
    if (!value) {
        if (!required) return LLMPAR_OK;
        return llmpar_error_set(r->error, LLMPAR_ERR_CONFIG, "%s: %s is missing from %s (byte %zu)", r->name, key, object->key ? object->key : "the object", object->position);
    }
    if (value->type != LLMPAR_JSON_NUMBER) return llmpar__config_wrong(r, LLMPAR_ERR_CONFIG, value, "a number");
    *out = value->number;
    return LLMPAR_OK;
}

static int llmpar__config_is_text(const llmpar_json *value, const char *text)
{
    return value && value->type == LLMPAR_JSON_STRING && value->length == strlen(text) && !memcmp(value->string, text, value->length);
}

/* What a field may say when only one behaviour is built. An absent field and null always mean that behaviour. */
typedef enum llmpar__config_rule { LLMPAR__CONFIG_FALSE, LLMPAR__CONFIG_TRUE, LLMPAR__CONFIG_NULL, LLMPAR__CONFIG_ZERO, LLMPAR__CONFIG_ONE } llmpar__config_rule;
typedef struct llmpar__config_only { const char *field; llmpar__config_rule rule; } llmpar__config_only;

/* Fields of transformers' Llama and of its relatives that change what is computed. */
static const llmpar__config_only llmpar__config_fixed[] = {
    { "attention_bias", LLMPAR__CONFIG_FALSE }, { "mlp_bias", LLMPAR__CONFIG_FALSE }, { "attention_dropout", LLMPAR__CONFIG_ZERO },
    { "sliding_window", LLMPAR__CONFIG_NULL }, { "use_sliding_window", LLMPAR__CONFIG_FALSE }, { "quantization_config", LLMPAR__CONFIG_NULL },
    { "partial_rotary_factor", LLMPAR__CONFIG_ONE }, { "is_causal", LLMPAR__CONFIG_TRUE }, { "use_bidirectional_attention", LLMPAR__CONFIG_FALSE },
    { "add_cross_attention", LLMPAR__CONFIG_FALSE }, { "is_encoder_decoder", LLMPAR__CONFIG_FALSE }, { "auto_map", LLMPAR__CONFIG_NULL },
    { "layer_types", LLMPAR__CONFIG_NULL }, { "no_rope_layers", LLMPAR__CONFIG_NULL }, { "num_experts", LLMPAR__CONFIG_NULL }, { "num_local_experts", LLMPAR__CONFIG_NULL },
    { "use_qk_norm", LLMPAR__CONFIG_FALSE }, { "qk_layernorm", LLMPAR__CONFIG_FALSE }, { "attn_logit_softcapping", LLMPAR__CONFIG_NULL },
    { "final_logit_softcapping", LLMPAR__CONFIG_NULL }, { "embedding_multiplier", LLMPAR__CONFIG_ONE }, { "residual_multiplier", LLMPAR__CONFIG_ONE },
    { "attention_multiplier", LLMPAR__CONFIG_NULL }, { "logits_scaling", LLMPAR__CONFIG_ONE }, { "logit_scale", LLMPAR__CONFIG_ONE }
};

static llmpar_status llmpar__config_check_only(const llmpar__config_reader *r, const llmpar_json *value, llmpar__config_rule rule)
{
    static const char *const expected[] = { "false or null: nothing else is supported", "true or null: nothing else is supported", "null: nothing else is supported",
                                            "0 or null: nothing else is supported", "1 or null: nothing else is supported" };
    int good = 0;
    if (!value || value->type == LLMPAR_JSON_NULL) return LLMPAR_OK;
    switch (rule) {
    case LLMPAR__CONFIG_FALSE: good = value->type == LLMPAR_JSON_BOOL && !value->boolean; break;
    case LLMPAR__CONFIG_TRUE: good = value->type == LLMPAR_JSON_BOOL && value->boolean; break;
    case LLMPAR__CONFIG_NULL: break;
    case LLMPAR__CONFIG_ZERO: good = value->type == LLMPAR_JSON_NUMBER && value->number == 0; break;
    case LLMPAR__CONFIG_ONE: good = value->type == LLMPAR_JSON_NUMBER && value->number == 1; break;
    default: break;
    }
    return good ? LLMPAR_OK : llmpar__config_wrong(r, LLMPAR_ERR_UNSUPPORTED, value, expected[(int)rule]);
}

static llmpar_status llmpar__config_read_identity(const llmpar__config_reader *r)
{
    const llmpar_json *model_type = llmpar_json_get(r->root, "model_type"), *architectures = llmpar_json_get(r->root, "architectures"), *activation = llmpar_json_get(r->root, "hidden_act");
    llmpar_status status = LLMPAR_OK;
    size_t i;
    if (architectures && architectures->type == LLMPAR_JSON_NULL) architectures = NULL;
    if (!model_type && !architectures)
        return llmpar_error_set(r->error, LLMPAR_ERR_CONFIG, "%s: model_type is missing, expected \"llama\" (byte %zu)", r->name, r->root->position);
    if (model_type && !llmpar__config_is_text(model_type, "llama")) return llmpar__config_wrong(r, LLMPAR_ERR_UNSUPPORTED, model_type, "\"llama\"");
    if (architectures && (architectures->type != LLMPAR_JSON_ARRAY || architectures->length != 1 || !llmpar__config_is_text(architectures->child, "LlamaForCausalLM"))) {
        char excerpt[80];
        int one = architectures->type == LLMPAR_JSON_ARRAY && architectures->length == 1;
        return llmpar_error_set(r->error, LLMPAR_ERR_UNSUPPORTED, "%s: architectures = %s%s%s, expected [\"LlamaForCausalLM\"] (byte %zu)", r->name, one ? "[" : "",
                                llmpar__config_excerpt(r, one ? architectures->child : architectures, excerpt, sizeof excerpt), one ? "]" : "", architectures->position);
    }
    /* transformers knows silu by the name of swish too. */
    if (activation && !llmpar__config_is_text(activation, "silu") && !llmpar__config_is_text(activation, "swish"))
        status = llmpar__config_wrong(r, LLMPAR_ERR_UNSUPPORTED, activation, "\"silu\"");
    for (i = 0; !status && i < sizeof llmpar__config_fixed / sizeof llmpar__config_fixed[0]; i++)
        status = llmpar__config_check_only(r, llmpar_json_get(r->root, llmpar__config_fixed[i].field), llmpar__config_fixed[i].rule);
    return status;
}

static llmpar_status llmpar__config_read_sizes(const llmpar__config_reader *r, llmpar_llama_config *c)
{
    const llmpar_json *root = r->root, *heads = llmpar_json_get(root, "num_attention_heads");
    llmpar_status status = llmpar__config_int(r, root, "vocab_size", 0, 1, 0, &c->vocab);
    if (!status) status = llmpar__config_int(r, root, "hidden_size", 0, 1, 0, &c->hidden);
    if (!status) status = llmpar__config_int(r, root, "intermediate_size", 0, 1, 0, &c->intermediate);
    if (!status) status = llmpar__config_int(r, root, "num_hidden_layers", 0, 1, 0, &c->layers);
    if (!status) status = llmpar__config_int(r, root, "num_attention_heads", 0, 1, 0, &c->heads);
    if (status) return status;
    if (c->heads <= 0) return llmpar__config_wrong(r, LLMPAR_ERR_CONFIG, heads, "a positive integer");
    status = llmpar__config_int(r, root, "num_key_value_heads", 1, 0, c->heads, &c->kv_heads);
    if (!status) status = llmpar__config_int(r, root, "head_dim", 1, 0, 0, &c->head_dim);
    if (!status) status = llmpar__config_int(r, root, "max_position_embeddings", 0, 0, 2048, &c->max_positions);
    if (status) return status;
    if (!llmpar_json_get(root, "head_dim") || llmpar_json_get(root, "head_dim")->type == LLMPAR_JSON_NULL) {
        if (c->hidden > 0 && c->hidden % c->heads)
            return llmpar_error_set(r->error, LLMPAR_ERR_CONFIG, "%s: num_attention_heads = %d does not divide hidden_size = %d, and head_dim is missing (byte %zu)",
                                    r->name, (int)c->heads, (int)c->hidden, heads->position);
        c->head_dim = c->hidden / c->heads;
    }
    return LLMPAR_OK;
}

/* A field of config.json's top level as a token id: null (or the -1 that some writers use) means none. */
static llmpar_status llmpar__config_read_id(const llmpar__config_reader *r, const llmpar_llama_config *c, const char *key, const llmpar_json *value, int32_t *out)
{
    char excerpt[80];
    if (value->type == LLMPAR_JSON_NULL) {
        *out = -1;
        return LLMPAR_OK;
    }
    if (value->type != LLMPAR_JSON_NUMBER || !value->is_integer || value->integer < -1 || value->integer >= c->vocab)
        return llmpar_error_set(r->error, LLMPAR_ERR_CONFIG, "%s: %s = %s, expected a token id below vocab_size = %d, or null (byte %zu)",
                                r->name, key, llmpar__config_excerpt(r, value, excerpt, sizeof excerpt), (int)c->vocab, value->position);
    *out = (int32_t)value->integer;
    return LLMPAR_OK;
}

static llmpar_status llmpar__config_read_ids(const llmpar__config_reader *r, llmpar_llama_config *c)
{
    const llmpar_json *bos = llmpar_json_get(r->root, "bos_token_id"), *eos = llmpar_json_get(r->root, "eos_token_id"), *item;
    llmpar_status status = LLMPAR_OK;
    int32_t id = -1;
    c->bos_id = c->vocab > 1 ? 1 : -1; /* transformers' defaults: 1 and 2 */
    if (bos) status = llmpar__config_read_id(r, c, "bos_token_id", bos, &c->bos_id);
    if (status) return status;
    c->eos_count = 0;
    if (!eos) {
        if (c->vocab > 2) c->eos_id[c->eos_count++] = 2;
        return LLMPAR_OK;
    }
    if (eos->type == LLMPAR_JSON_ARRAY && eos->length > LLMPAR_MAX_EOS)
        return llmpar_error_set(r->error, LLMPAR_ERR_UNSUPPORTED, "%s: eos_token_id has %zu ids, at most %d are supported (byte %zu)", r->name, eos->length, LLMPAR_MAX_EOS, eos->position);
    for (item = eos->type == LLMPAR_JSON_ARRAY ? eos->child : eos; item && !status; item = eos->type == LLMPAR_JSON_ARRAY ? item->next : NULL) {
        status = llmpar__config_read_id(r, c, "eos_token_id", item, &id);
        if (!status && id >= 0) c->eos_id[c->eos_count++] = id;
    }
    return status;
}

/* The kind of scaling, from "rope_type" or the older "type". */
static llmpar_status llmpar__config_read_rope_kind(const llmpar__config_reader *r, const llmpar_json *rope, llmpar_rope_kind *out)
{
    const llmpar_json *type = llmpar_json_get(rope, "rope_type"), *older = llmpar_json_get(rope, "type");
    if (type && older && (type->type != LLMPAR_JSON_STRING || older->type != LLMPAR_JSON_STRING || strcmp(type->string, older->string)))
        return llmpar__config_wrong(r, LLMPAR_ERR_CONFIG, older, "the same as rope_type");
    if (!type) type = older;
    if (!type) {
        /* {"rope_theta": ...} alone is how newer files write unscaled RoPE; parameters of a scaling without its name are a fault. */
        if (llmpar_json_get(rope, "factor"))
            return llmpar_error_set(r->error, LLMPAR_ERR_CONFIG, "%s: rope_type is missing from %s (byte %zu)", r->name, rope->key, rope->position);
        *out = LLMPAR_ROPE_NONE;
    }
    else if (llmpar__config_is_text(type, "default")) *out = LLMPAR_ROPE_NONE;
    else if (llmpar__config_is_text(type, "linear")) *out = LLMPAR_ROPE_LINEAR;
    else if (llmpar__config_is_text(type, "llama3")) *out = LLMPAR_ROPE_LLAMA3;
    else return llmpar__config_wrong(r, LLMPAR_ERR_UNSUPPORTED, type, "\"default\", \"linear\" or \"llama3\"");
    return LLMPAR_OK;
}

/* rope_scaling (with rope_theta beside it) or rope_parameters (with rope_theta inside). */
static llmpar_status llmpar__config_read_rope(const llmpar__config_reader *r, llmpar_llama_config *c)
{
    static const char *const known[] = { "rope_type", "type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "rope_theta", "partial_rotary_factor", "attention_factor" };
    const llmpar_json *scaling = llmpar_json_get(r->root, "rope_scaling"), *parameters = llmpar_json_get(r->root, "rope_parameters"), *member, *outside = llmpar_json_get(r->root, "original_max_position_embeddings");
    const llmpar_json *rope;
    llmpar_rope_scaling *s = &c->rope_scaling;
    llmpar_status status = llmpar__config_real(r, r->root, "rope_theta", 0, 10000.0, &c->rope_theta);
    double theta = c->rope_theta;
    size_t i;
    if (status) return status;
    if (scaling && scaling->type == LLMPAR_JSON_NULL) scaling = NULL;
    if (parameters && parameters->type == LLMPAR_JSON_NULL) parameters = NULL;
    if (scaling && parameters)
        return llmpar_error_set(r->error, LLMPAR_ERR_CONFIG, "%s: both rope_scaling and rope_parameters are given, expected one (bytes %zu and %zu)", r->name, scaling->position, parameters->position);
    rope = scaling ? scaling : parameters;
    if (!rope) return LLMPAR_OK;
    if (rope->type != LLMPAR_JSON_OBJECT) return llmpar__config_wrong(r, LLMPAR_ERR_CONFIG, rope, "an object or null");
    status = llmpar__config_read_rope_kind(r, rope, &s->kind);
    for (member = rope->child; member && !status; member = member->next) {
        for (i = 0; i < sizeof known / sizeof known[0] && strcmp(member->key, known[i]); i++) {}
        if (i == sizeof known / sizeof known[0])
            status = llmpar_error_set(r->error, LLMPAR_ERR_UNSUPPORTED, "%s: %s has an unknown field %.80s (byte %zu)", r->name, rope->key, member->key, member->position);
    }
    if (!status) status = llmpar__config_check_only(r, llmpar_json_get(rope, "partial_rotary_factor"), LLMPAR__CONFIG_ONE);
    if (!status) status = llmpar__config_check_only(r, llmpar_json_get(rope, "attention_factor"), LLMPAR__CONFIG_ONE);
    if (!status) status = llmpar__config_real(r, rope, "rope_theta", 0, theta, &c->rope_theta);
    if (status) return status;
    if (c->rope_theta != theta && llmpar_json_get(r->root, "rope_theta"))
        return llmpar_error_set(r->error, LLMPAR_ERR_CONFIG, "%s: rope_theta = %g contradicts %g in %s (byte %zu)", r->name, theta, c->rope_theta, rope->key, llmpar_json_get(r->root, "rope_theta")->position);
    if (s->kind == LLMPAR_ROPE_NONE) return LLMPAR_OK;
    status = llmpar__config_real(r, rope, "factor", 1, 0, &s->factor);
    if (status || s->kind == LLMPAR_ROPE_LINEAR) return status;
    status = llmpar__config_real(r, rope, "low_freq_factor", 1, 0, &s->low_freq_factor);
    if (!status) status = llmpar__config_real(r, rope, "high_freq_factor", 1, 0, &s->high_freq_factor);
    if (!status) status = llmpar__config_int(r, rope, "original_max_position_embeddings", 0, 1, 0, &s->original_max_positions);
    /* Newer transformers let a field of this name outside the object win. */
    if (!status && outside && (outside->type != LLMPAR_JSON_NUMBER || outside->number != (double)s->original_max_positions))
        status = llmpar__config_wrong(r, LLMPAR_ERR_CONFIG, outside, "the value inside the rope object");
    return status;
}

static llmpar_status llmpar__config_read(const llmpar__config_reader *r, llmpar_llama_config *c)
{
    const llmpar_json *tie = llmpar_json_get(r->root, "tie_word_embeddings"), *place, *rope;
    llmpar__config_fault fault;
    llmpar_status status;
    if (r->root->type != LLMPAR_JSON_OBJECT) return llmpar_error_set(r->error, LLMPAR_ERR_FORMAT, "%s: expected an object (byte %zu)", r->name, r->root->position);
    status = llmpar__config_read_identity(r);
    if (!status) status = llmpar__config_read_sizes(r, c);
    if (!status) status = llmpar__config_real(r, r->root, "rms_norm_eps", 0, 1e-6, &c->rms_eps);
    if (!status) status = llmpar__config_real(r, r->root, "initializer_range", 0, 0.02, &c->init_std);
    if (!status) status = llmpar__config_read_rope(r, c);
    if (!status && tie && tie->type != LLMPAR_JSON_BOOL) status = llmpar__config_wrong(r, LLMPAR_ERR_CONFIG, tie, "true or false");
    if (status) return status;
    c->tied = tie ? tie->boolean : 0;
    c->bos_id = -1;
    /* Sizes first: the range of a token id is only meaningful under a good vocabulary. */
    if (!llmpar__config_find_fault(c, &fault)) return llmpar__config_read_ids(r, c);
    rope = llmpar_json_get(r->root, "rope_scaling");
    if (!rope || rope->type == LLMPAR_JSON_NULL) rope = llmpar_json_get(r->root, "rope_parameters");
    place = llmpar_json_get(rope, fault.field);
    if (!place) place = llmpar_json_get(r->root, fault.field);
    if (!place) return llmpar_error_set(r->error, LLMPAR_ERR_CONFIG, "%s: %s (a default; byte %zu)", r->name, fault.text, r->root->position);
    return llmpar_error_set(r->error, LLMPAR_ERR_CONFIG, "%s: %s (byte %zu)", r->name, fault.text, place->position);
}

LLMPAR_DEF llmpar_status llmpar_llama_config_parse(llmpar_heap *heap, const char *text, size_t length, const char *name, llmpar_llama_config *out, llmpar_error *error)
{
    llmpar__config_reader reader;
    llmpar_json_desc desc;
    llmpar_json *root = NULL;
    llmpar_status status;
    memset(out, 0, sizeof *out);
    memset(&desc, 0, sizeof desc);
    memset(&reader, 0, sizeof reader);
    desc.name = name ? name : "config.json";
    desc.unique_keys = 1;
    status = llmpar_json_parse(heap, text, length, &desc, &root, error);
    if (status) return status;
    reader.name = desc.name;
    reader.text = text;
    reader.length = length;
    reader.root = root;
    reader.error = error;
    status = llmpar__config_read(&reader, out);
    if (status) memset(out, 0, sizeof *out);
    llmpar_json_destroy(heap, root);
    return status;
}

/* ---- writing config.json ---- */

typedef struct llmpar__config_text { char *text; size_t used, capacity; } llmpar__config_text;

static void llmpar__config_put(llmpar__config_text *t, const char *part)
{
    for (; *part; part++, t->used++)
        if (t->used < t->capacity) t->text[t->used] = *part;
}

static void llmpar__config_put_int(llmpar__config_text *t, const char *key, int64_t value)
{
    char line[128];
    snprintf(line, sizeof line, "  \"%s\": %lld,\n", key, (long long)value);
    llmpar__config_put(t, line);
}

/* The shortest text that reads back as the same double, with a '.' whatever the process's locale, and always a fraction or exponent, as Python writes it. */
static void llmpar__config_put_real(llmpar__config_text *t, const char *indent, const char *key, double value, const char *after)
{
    char number[48], line[160];
    size_t i, used = 0;
    int digits, has_point = 0;
    for (digits = 1; digits <= 17; digits++) {
        if (value >= 1 && value < 1e15 && value == (double)(int64_t)value) snprintf(number, sizeof number, "%.0f", value);
        else snprintf(number, sizeof number, "%.*g", digits, value);
        if (strtod(number, NULL) == value) break;
    }
    for (i = 0; number[i]; i++) {
        if (strchr("0123456789+-eE", number[i])) {
            if (number[i] == 'e' || number[i] == 'E') has_point = 1;
            number[used++] = number[i];
        }
        else if (!has_point) {
            number[used++] = '.';
            has_point = 1;
        }
    }
    number[used] = 0;
    snprintf(line, sizeof line, "%s\"%s\": %s%s%s\n", indent, key, number, has_point ? "" : ".0", after);
    llmpar__config_put(t, line);
}

static void llmpar__config_put_eos(llmpar__config_text *t, const llmpar_llama_config *c)
{
    char number[32];
    int32_t i;
    llmpar__config_put(t, "  \"eos_token_id\": ");
    if (c->eos_count == 0) llmpar__config_put(t, "null");
    if (c->eos_count > 1) llmpar__config_put(t, "[");
    for (i = 0; i < c->eos_count; i++) {
        snprintf(number, sizeof number, "%s%d", i ? ", " : "", (int)c->eos_id[i]);
        llmpar__config_put(t, number);
    }
    llmpar__config_put(t, c->eos_count > 1 ? "],\n" : ",\n");
}

static void llmpar__config_put_rope(llmpar__config_text *t, const llmpar_llama_config *c)
{
    const llmpar_rope_scaling *s = &c->rope_scaling;
    if (s->kind == LLMPAR_ROPE_NONE) {
        llmpar__config_put(t, "  \"rope_scaling\": null,\n");
        return;
    }
    llmpar__config_put(t, "  \"rope_scaling\": {\n");
    llmpar__config_put(t, s->kind == LLMPAR_ROPE_LINEAR ? "    \"rope_type\": \"linear\",\n" : "    \"rope_type\": \"llama3\",\n");
    if (s->kind == LLMPAR_ROPE_LLAMA3) {
        llmpar__config_put(t, "  ");
        llmpar__config_put_int(t, "original_max_position_embeddings", s->original_max_positions);
        llmpar__config_put_real(t, "    ", "low_freq_factor", s->low_freq_factor, ",");
        llmpar__config_put_real(t, "    ", "high_freq_factor", s->high_freq_factor, ",");
    }
    llmpar__config_put_real(t, "    ", "factor", s->factor, "");
    llmpar__config_put(t, "  },\n");
}

LLMPAR_DEF size_t llmpar_llama_config_write(const llmpar_llama_config *config, char *text, size_t capacity)
{
    llmpar__config_text t;
    t.text = text;
    t.used = 0;
    t.capacity = capacity ? capacity - 1 : 0;
    llmpar__config_put(&t, "{\n  \"architectures\": [\n    \"LlamaForCausalLM\"\n  ],\n  \"model_type\": \"llama\",\n");
    llmpar__config_put_int(&t, "vocab_size", config->vocab);
    llmpar__config_put_int(&t, "hidden_size", config->hidden);
    llmpar__config_put_int(&t, "intermediate_size", config->intermediate);
    llmpar__config_put_int(&t, "num_hidden_layers", config->layers);
    llmpar__config_put_int(&t, "num_attention_heads", config->heads);
    llmpar__config_put_int(&t, "num_key_value_heads", config->kv_heads);
    llmpar__config_put_int(&t, "head_dim", config->head_dim);
    llmpar__config_put_int(&t, "max_position_embeddings", config->max_positions);
    llmpar__config_put(&t, "  \"hidden_act\": \"silu\",\n  \"attention_bias\": false,\n  \"mlp_bias\": false,\n");
    llmpar__config_put_real(&t, "  ", "rms_norm_eps", config->rms_eps, ",");
    llmpar__config_put_real(&t, "  ", "rope_theta", config->rope_theta, ",");
    llmpar__config_put_rope(&t, config);
    llmpar__config_put_real(&t, "  ", "initializer_range", config->init_std, ",");
    if (config->bos_id < 0) llmpar__config_put(&t, "  \"bos_token_id\": null,\n");
    else llmpar__config_put_int(&t, "bos_token_id", config->bos_id);
    llmpar__config_put_eos(&t, config);
    llmpar__config_put(&t, config->tied ? "  \"tie_word_embeddings\": true\n}\n" : "  \"tie_word_embeddings\": false\n}\n");
    if (capacity) text[t.used < t.capacity ? t.used : t.capacity] = 0;
    return t.used;
}

/* ---- what follows from the shape ---- */

LLMPAR_DEF int64_t llmpar_llama_param_count(const llmpar_llama_config *config)
{
    int64_t d = config->hidden;
    return config->layers * llmpar__config_layer_params(config) + d + (config->tied ? 1 : 2) * (int64_t)config->vocab * d;
}

LLMPAR_DEF double llmpar_llama_flops_per_token(const llmpar_llama_config *config, int64_t seq_len)
{
    double multiplying = (double)(llmpar_llama_param_count(config) - (config->tied ? 0 : (int64_t)config->vocab * config->hidden));
    return 6 * multiplying + 12.0 * config->layers * config->heads * config->head_dim * (double)seq_len;
}

LLMPAR_DEF void llmpar_rope_inv_freq(const llmpar_llama_config *config, double *out)
{
    const llmpar_rope_scaling *s = &config->rope_scaling;
    int32_t i, pairs = config->head_dim / 2;
    for (i = 0; i < pairs; i++) {
        double f = 1 / llmpar_pow_f64(config->rope_theta, 2.0 * i / config->head_dim);
        if (s->kind == LLMPAR_ROPE_LINEAR) f /= s->factor;
        if (s->kind == LLMPAR_ROPE_LLAMA3) {
            /* Rotations within the original context: many are kept, few are slowed down by `factor`, between them a linear blend. */
            double wavelength = LLMPAR__CONFIG_TWO_PI / f, original = s->original_max_positions;
            if (wavelength > original / s->low_freq_factor) f /= s->factor;
            else if (!(wavelength < original / s->high_freq_factor)) {
                double smooth = (original / wavelength - s->low_freq_factor) / (s->high_freq_factor - s->low_freq_factor);
                f = (1 - smooth) * f / s->factor + smooth * f;
            }
        }
        out[i] = f;
    }
}

LLMPAR_DEF llmpar_status llmpar_rope_tables(llmpar_heap *heap, const llmpar_llama_config *config, int64_t positions, llmpar_dtype dtype, void *cosine, void *sine, llmpar_error *error)
{
    int64_t p;
    int32_t i, pairs = config->head_dim / 2;
    double *inv_freq, c, s;
    if (dtype != LLMPAR_F32 && dtype != LLMPAR_F64)
        return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "rope tables: dtype = %s, expected f32 or f64", llmpar_dtype_name(dtype));
    /* No frequency exceeds 1, so this also bounds the angle that sincos has to reduce. */
    if (positions < 0 || positions > 1000000000)
        return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "rope tables: positions = %lld, expected 0 to 1000000000", (long long)positions);
    inv_freq = (double *)llmpar_heap_alloc(heap, (size_t)pairs, sizeof *inv_freq);
    if (!inv_freq) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "rope tables: out of memory for %d frequencies", (int)pairs);
    llmpar_rope_inv_freq(config, inv_freq);
    for (p = 0; p < positions; p++)
        for (i = 0; i < pairs; i++) {
            int64_t at = p * pairs + i;
            llmpar_sincos_f64((double)p * inv_freq[i], &s, &c);
            if (dtype == LLMPAR_F64) {
                ((double *)cosine)[at] = c;
                ((double *)sine)[at] = s;
            }
            else {
                ((float *)cosine)[at] = (float)c;
                ((float *)sine)[at] = (float)s;
            }
        }
    llmpar_heap_free(heap, inv_freq);
    return LLMPAR_OK;
}

#undef LLMPAR__CONFIG_TWO_PI
#undef LLMPAR__CONFIG_PRESETS

#endif /* LLMPAR_NO_LLAMA */
/* ==== src/model/llama.c ==== */
/* ==== src/model/llama_internal.h ==== */
/* llama_internal: the model's state and the shapes its unit files share. */
#ifndef LLMPAR_LLAMA_INTERNAL_H
#define LLMPAR_LLAMA_INTERNAL_H


#if !defined(LLMPAR_NO_LLAMA)

/* A list of unit instructions with the condition under which each exists. */
enum { LLMPAR__ALWAYS = 0, LLMPAR__IF_TP = 1, LLMPAR__IF_SP = 2, LLMPAR__IF_KV = 3 };
typedef struct llmpar__op_row { llmpar_unit_op op; int32_t when; } llmpar__op_row;
typedef struct llmpar__op_list { llmpar_unit_op *ops; int32_t count; } llmpar__op_list;
enum { LLMPAR__EMBED = 0, LLMPAR__BLOCK = 1, LLMPAR__HEAD = 2, LLMPAR__UNIT_KINDS = 3 };

struct llmpar_llama {
    llmpar_ctx *ctx;
    llmpar_llama_config config;
    uint64_t seed;
    llmpar_unit *units;            /* [layers + 2]; their user is the model */
    llmpar_param *params;          /* all units' parameters */
    char *names;                   /* text of all names */
    llmpar__op_list lists[LLMPAR__UNIT_KINDS][2]; /* forward, backward */
    llmpar_tp tp;
    llmpar_dtype dtype;
    int64_t positions;
    void *cosine, *sine;           /* device [positions, E/2] */
    int applied;                   /* 0 no, 1 begun, 2 done */
};

/* Local extents of one micro-batch. */
typedef struct llmpar__shape {
    int64_t b, t, n;          /* sequences, tokens each, all rows */
    int64_t ts, ns;           /* tokens and rows of the residual stream on this rank */
    int64_t d, f, h, k, e;    /* hidden; local F, query heads, kv heads; head dim */
    int64_t ld;               /* (h + 2k)*e: row of the joint q,k,v buffer */
    int64_t v, v_begin;       /* local vocabulary */
    int64_t leaves;
    size_t size;              /* bytes of an element */
    llmpar_dtype dtype;
} llmpar__shape;

LLMPAR__PRIVATE void llmpar__llama_shape(const llmpar_llama *model, const llmpar_micro *micro, llmpar_dtype dtype, llmpar__shape *out);
/* Next `elements` elements of a buffer of which *at bytes are taken; returns their byte offset, a multiple of 64. */
LLMPAR__PRIVATE size_t llmpar__llama_take(size_t *at, int64_t elements, size_t size);

/* block.c */
LLMPAR__PRIVATE llmpar_status llmpar__block_sizes(void *user, const llmpar_micro *micro, llmpar_dtype dtype, llmpar_unit_sizes *out);
LLMPAR__PRIVATE const llmpar__op_row *llmpar__block_forward_ops(int32_t *count);
LLMPAR__PRIVATE const llmpar__op_row *llmpar__block_backward_ops(int32_t *count);
/* parameters of a block, in flat order */
enum { LLMPAR__NORM1 = 0, LLMPAR__WQ, LLMPAR__WK, LLMPAR__WV, LLMPAR__WO, LLMPAR__NORM2, LLMPAR__GATE, LLMPAR__UP, LLMPAR__DOWN, LLMPAR__BLOCK_PARAMS };
/* edges.c: embedding (parameter 0: the table) and head (0: norm; 1 or borrowed 0: the output projection) */
LLMPAR__PRIVATE llmpar_status llmpar__embed_sizes(void *user, const llmpar_micro *micro, llmpar_dtype dtype, llmpar_unit_sizes *out);
LLMPAR__PRIVATE llmpar_status llmpar__head_sizes(void *user, const llmpar_micro *micro, llmpar_dtype dtype, llmpar_unit_sizes *out);
LLMPAR__PRIVATE const llmpar__op_row *llmpar__embed_ops(int backward, int32_t *count);
LLMPAR__PRIVATE const llmpar__op_row *llmpar__head_ops(int backward, int32_t *count);

LLMPAR__PRIVATE double llmpar__llama_scale(const llmpar_llama *model); /* of attention scores: 1/sqrt(E) */

/* dx = dresidual + norm backward of dy; per-leaf weight gradients into dw_leaves, to be combined by llmpar__llama_norm_weight. */
LLMPAR__PRIVATE llmpar_status llmpar__llama_norm_backward(const llmpar_unit_call *call, const llmpar__shape *s, const void *dy, const void *x, const void *w, const void *rstd, const void *dresidual, void *dx, void *dw_leaves);
/* Sequence parallel: sums dw_leaves[leaves, D] over tp, leaf by leaf. */
LLMPAR__PRIVATE llmpar_status llmpar__llama_norm_reduce(const llmpar_unit_call *call, const llmpar__shape *s, void *dw_leaves);
/* dw[D] = tree over leaves. */
LLMPAR__PRIVATE llmpar_status llmpar__llama_norm_weight(const llmpar_unit_call *call, const llmpar__shape *s, const void *dw_leaves, void *dw);
LLMPAR__PRIVATE llmpar_status llmpar__llama_rmsnorm(llmpar_ctx *ctx, llmpar_stream *stream, const llmpar_llama *model, int64_t rows, const void *x, const void *residual, const void *w, void *sum, void *y, void *rstd);

#endif /* LLMPAR_NO_LLAMA */

#endif
/* ---- src/model/llama.c goes on ---- */

#include <stdio.h>
#include <string.h>


#if !defined(LLMPAR_NO_LLAMA)

enum { LLMPAR__NAME_BYTES = 80 };

static const char *llmpar__llama_name(llmpar_llama *model, int32_t *used, const char *format, int32_t layer)
{
    char *text = model->names + (size_t)(*used)++ * LLMPAR__NAME_BYTES;
    snprintf(text, LLMPAR__NAME_BYTES, format, (int)layer);
    return text;
}

static void llmpar__llama_param(llmpar_llama *model, llmpar_param *param, int32_t *used, const char *format, int32_t layer, int64_t rows, int64_t columns, double std)
{
    memset(param, 0, sizeof *param);
    param->name = llmpar__llama_name(model, used, format, layer);
    param->dims = columns ? 2 : 1;
    param->shape[0] = rows;
    param->shape[1] = columns;
    param->init_std = std;
    param->init_value = std == 0 ? 1 : 0;
    param->no_decay = columns == 0;
}

/* Names, shapes and units; placements come with apply. Projections back into the residual stream start smaller by sqrt(2L) (Radford et al. 2019, section 2.3). */
static void llmpar__llama_describe(llmpar_llama *model)
{
    static const char *const names[LLMPAR__BLOCK_PARAMS] = {
        "model.layers.%d.input_layernorm.weight", "model.layers.%d.self_attn.q_proj.weight", "model.layers.%d.self_attn.k_proj.weight",
        "model.layers.%d.self_attn.v_proj.weight", "model.layers.%d.self_attn.o_proj.weight", "model.layers.%d.post_attention_layernorm.weight",
        "model.layers.%d.mlp.gate_proj.weight", "model.layers.%d.mlp.up_proj.weight", "model.layers.%d.mlp.down_proj.weight"};
    const llmpar_llama_config *c = &model->config;
    int64_t d = c->hidden, q = (int64_t)c->heads * c->head_dim, kv = (int64_t)c->kv_heads * c->head_dim, f = c->intermediate;
    const int64_t rows[LLMPAR__BLOCK_PARAMS] = {d, q, kv, kv, d, d, f, f, d}, columns[LLMPAR__BLOCK_PARAMS] = {0, d, d, d, q, 0, d, d, f};
    double std = c->init_std, deep = std / llmpar_sqrt_f64(2.0 * c->layers);
    int32_t used = 0;
    llmpar_param *param = model->params;
    for (int32_t i = 0; i < c->layers + 2; i++) {
        model->units[i].user = model;
        model->units[i].params = param;
        if (i == 0) {
            model->units[i].name = "embed";
            model->units[i].sizes = llmpar__embed_sizes;
            llmpar__llama_param(model, param++, &used, "model.embed_tokens.weight", 0, c->vocab, d, std);
        } else if (i <= c->layers) {
            model->units[i].name = llmpar__llama_name(model, &used, "layers.%d", i - 1);
            model->units[i].sizes = llmpar__block_sizes;
            for (int p = 0; p < LLMPAR__BLOCK_PARAMS; p++) {
                int norm = p == LLMPAR__NORM1 || p == LLMPAR__NORM2, back = p == LLMPAR__WO || p == LLMPAR__DOWN;
                llmpar__llama_param(model, param++, &used, names[p], i - 1, rows[p], columns[p], norm ? 0 : back ? deep : std);
            }
        } else {
            model->units[i].name = "head";
            model->units[i].sizes = llmpar__head_sizes;
            llmpar__llama_param(model, param++, &used, "model.norm.weight", 0, d, 0, 0);
            if (c->tied) model->units[i].borrow = 1;
            else llmpar__llama_param(model, param++, &used, "lm_head.weight", 0, c->vocab, d, std);
        }
        model->units[i].param_count = (int32_t)(param - model->units[i].params);
    }
}

LLMPAR_DEF llmpar_status llmpar_llama_create(llmpar_ctx *ctx, const llmpar_llama_desc *desc, llmpar_llama **out)
{
    *out = NULL;
    if (!desc->preset == !desc->config) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "llama: expected exactly one of preset and config");
    llmpar_llama_config config;
    llmpar_error error;
    llmpar_error_clear(&error);
    llmpar_status status = LLMPAR_OK;
    if (desc->preset) status = llmpar_llama_preset(desc->preset, &config, &error);
    else config = *desc->config;
    if (!status) status = llmpar_llama_config_check(&config, &error);
    if (status) return llmpar_fail(ctx, status, "%s", error.text);
    llmpar_heap *heap = &ctx->heap;
    llmpar_llama *model = (llmpar_llama *)llmpar_heap_zalloc(heap, 1, sizeof *model);
    if (!model) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "llama: out of memory");
    model->ctx = ctx;
    model->config = config;
    model->seed = desc->seed;
    size_t units = (size_t)config.layers + 2, params = (size_t)config.layers * LLMPAR__BLOCK_PARAMS + 3;
    model->units = (llmpar_unit *)llmpar_heap_zalloc(heap, units, sizeof *model->units);
    model->params = (llmpar_param *)llmpar_heap_zalloc(heap, params, sizeof *model->params);
    model->names = (char *)llmpar_heap_zalloc(heap, units + params, LLMPAR__NAME_BYTES);
    if (!model->units || !model->params || !model->names) {
        llmpar_llama_destroy(model);
        return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "llama: out of memory for %d layers", (int)config.layers);
    }
    llmpar__llama_describe(model);
    *out = model;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_llama_destroy(llmpar_llama *model)
{
    if (!model) return;
    llmpar_heap *heap = &model->ctx->heap;
    for (int kind = 0; kind < LLMPAR__UNIT_KINDS; kind++)
        for (int way = 0; way < 2; way++) llmpar_heap_free(heap, model->lists[kind][way].ops);
    size_t table = (size_t)model->positions * (size_t)(model->config.head_dim / 2) * llmpar_dtype_size(model->dtype);
    model->ctx->device->free(model->ctx->device, model->cosine, table);
    model->ctx->device->free(model->ctx->device, model->sine, table);
    llmpar_tp_destroy(&model->tp);
    llmpar_heap_free(heap, model->units);
    llmpar_heap_free(heap, model->params);
    llmpar_heap_free(heap, model->names);
    llmpar_heap_free(heap, model);
}

LLMPAR_DEF const llmpar_llama_config *llmpar_llama_get_config(const llmpar_llama *model) { return &model->config; }
LLMPAR_DEF uint64_t llmpar_llama_seed(const llmpar_llama *model) { return model->seed; }
LLMPAR_DEF const llmpar_tp *llmpar_llama_tp(const llmpar_llama *model) { return &model->tp; }

LLMPAR_DEF llmpar_unit *llmpar_llama_units(llmpar_llama *model, int32_t *count)
{
    if (count) *count = model->config.layers + 2;
    return model->units;
}

/* ---- meeting a mesh ---- */

/* The rows that exist for this mesh, waits renumbered. A wait for a row that does not exist needs none: its own predecessors are earlier on the waiting stream. */
static llmpar_status llmpar__llama_list(llmpar_llama *model, const llmpar__op_row *rows, int32_t count, llmpar__op_list *out)
{
    const llmpar_tp *tp = &model->tp;
    int32_t place[64];
    out->ops = (llmpar_unit_op *)llmpar_heap_zalloc(&model->ctx->heap, (size_t)count, sizeof *out->ops);
    if (!out->ops) return llmpar_fail(model->ctx, LLMPAR_ERR_MEMORY, "llama: out of memory for instruction lists");
    for (int32_t i = 0; i < count; i++) {
        int here = rows[i].when == LLMPAR__ALWAYS || (rows[i].when == LLMPAR__IF_TP && tp->ranks > 1) || (rows[i].when == LLMPAR__IF_SP && tp->sequence_parallel) || (rows[i].when == LLMPAR__IF_KV && tp->replicas > 1);
        place[i] = here ? out->count + 1 : 0;
        if (!here) continue;
        llmpar_unit_op *op = &out->ops[out->count++];
        *op = rows[i].op;
        for (int w = 0; w < 2; w++) op->wait[w] = op->wait[w] ? place[op->wait[w] - 1] : 0;
    }
    return LLMPAR_OK;
}

static void llmpar__llama_shard(llmpar_param *param, int32_t dim, int64_t grain, int32_t replicas)
{
    param->tp.kind = LLMPAR_SHARD;
    param->tp.axis = LLMPAR_AXIS_TP;
    param->tp.dim = dim;
    param->tp.grain = grain;
    param->tp.replicas = replicas;
}

static llmpar_status llmpar__llama_lists(llmpar_llama *model)
{
    llmpar_status status = LLMPAR_OK;
    for (int kind = 0; kind < LLMPAR__UNIT_KINDS && !status; kind++)
        for (int way = 0; way < 2 && !status; way++) {
            int32_t count = 0;
            const llmpar__op_row *rows = kind == LLMPAR__EMBED ? llmpar__embed_ops(way, &count) : kind == LLMPAR__HEAD ? llmpar__head_ops(way, &count) : way ? llmpar__block_backward_ops(&count) : llmpar__block_forward_ops(&count);
            status = llmpar__llama_list(model, rows, count, &model->lists[kind][way]);
        }
    for (int32_t i = 0; i < model->config.layers + 2 && !status; i++) {
        int kind = i == 0 ? LLMPAR__EMBED : i <= model->config.layers ? LLMPAR__BLOCK : LLMPAR__HEAD;
        model->units[i].forward = model->lists[kind][0].ops;
        model->units[i].forward_count = model->lists[kind][0].count;
        model->units[i].backward = model->lists[kind][1].ops;
        model->units[i].backward_count = model->lists[kind][1].count;
    }
    return status;
}

static llmpar_status llmpar__llama_rope(llmpar_llama *model)
{
    llmpar_ctx *ctx = model->ctx;
    llmpar_device *device = ctx->device;
    size_t count = (size_t)model->positions * (size_t)(model->config.head_dim / 2), bytes = count * llmpar_dtype_size(model->dtype);
    llmpar_error error;
    llmpar_error_clear(&error);
    void *host = llmpar_heap_alloc(&ctx->heap, 2, bytes);
    if (!host) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "llama: out of memory for RoPE tables of %lld positions", (long long)model->positions);
    llmpar_stream *stream = NULL;
    llmpar_status status = llmpar_rope_tables(&ctx->heap, &model->config, model->positions, model->dtype, host, (char *)host + bytes, &error);
    if (status) llmpar_fail(ctx, status, "%s", error.text);
    if (!status) status = device->alloc(device, bytes, &model->cosine);
    if (!status) status = device->alloc(device, bytes, &model->sine);
    if (!status) status = device->stream_create(device, "set-up", &stream);
    if (!status) status = device->copy(device, stream, model->cosine, host, bytes);
    if (!status) status = device->copy(device, stream, model->sine, (char *)host + bytes, bytes);
    if (stream) { /* in any case: the stream may read `host` */
        llmpar_status waited = device->synchronize(device, stream);
        if (!status) status = waited;
        device->stream_destroy(device, stream);
    }
    llmpar_heap_free(&ctx->heap, host);
    return status;
}

/* A second apply must ask for what the first one made. */
static llmpar_status llmpar__llama_again(const llmpar_llama *model, const llmpar_comm *tp, const llmpar_llama_apply_desc *desc)
{
    int32_t canon = desc->canon ? desc->canon : 8, pieces = canon % tp->ranks == 0 ? canon : tp->ranks, sp = desc->sequence_parallel && tp->ranks > 1;
    llmpar_dtype dtype = desc->dtype == LLMPAR_DTYPE_DEFAULT ? LLMPAR_F32 : desc->dtype;
    if (model->applied != 2) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "llama: an earlier apply failed; create another model");
    if (tp == model->tp.comm && pieces == model->tp.pieces && sp == model->tp.sequence_parallel && dtype == model->dtype && desc->positions <= model->positions) return LLMPAR_OK;
    return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "llama: this model already meets a mesh with %d pieces, sequence parallel %d, %s, %lld positions; expected the same again on the same communicator, got %d, %d, %s, %lld", (int)model->tp.pieces,
                       (int)model->tp.sequence_parallel, llmpar_dtype_name(model->dtype), (long long)model->positions, (int)pieces, (int)sp, llmpar_dtype_name(dtype), (long long)desc->positions);
}

LLMPAR_DEF llmpar_status llmpar_llama_apply(llmpar_llama *model, llmpar_comm *tp, const llmpar_llama_apply_desc *desc)
{
    const llmpar_llama_config *c = &model->config;
    if (model->applied) return llmpar__llama_again(model, tp, desc);
    if (desc->positions < 1) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "llama: positions = %lld, expected at least 1", (long long)desc->positions);
    if (c->heads % tp->ranks) return llmpar_fail(model->ctx, LLMPAR_ERR_MESH, "llama: num_attention_heads = %d is not divisible by tp = %d", (int)c->heads, (int)tp->ranks);
    llmpar_dtype dtype = desc->dtype == LLMPAR_DTYPE_DEFAULT ? LLMPAR_F32 : desc->dtype;
    if (tp->ranks > 1 && (size_t)c->hidden * llmpar_dtype_size(dtype) % 8) /* llmpar_tp_select */
        return llmpar_fail(model->ctx, LLMPAR_ERR_MESH, "llama: hidden_size = %d in %s is no multiple of 8 bytes, which the embedding needs where tp = %d is above 1", (int)c->hidden, llmpar_dtype_name(dtype), (int)tp->ranks);
    if (desc->sequence_parallel && desc->positions % tp->ranks) return llmpar_fail(model->ctx, LLMPAR_ERR_MESH, "llama: sequence parallel: sequence length %lld is not divisible by tp = %d", (long long)desc->positions, (int)tp->ranks);
    model->applied = 1;
    model->dtype = dtype;
    model->positions = desc->positions;
    llmpar_status status = llmpar_tp_init(model->ctx, tp, desc->canon, c->kv_heads, desc->sequence_parallel, &model->tp);
    if (status) return status;
    int32_t units = c->layers + 2;
    for (int32_t i = 0; i < units; i++) {
        llmpar_param *p = model->params + (model->units[i].params - model->params);
        if (i == 0) llmpar__llama_shard(&p[0], 0, 1, 1);
        else if (i == units - 1 && !c->tied) llmpar__llama_shard(&p[1], 0, 1, 1);
        if (i == 0 || i == units - 1) continue;
        llmpar__llama_shard(&p[LLMPAR__WQ], 0, c->head_dim, 1);
        llmpar__llama_shard(&p[LLMPAR__WK], 0, c->head_dim, model->tp.replicas);
        llmpar__llama_shard(&p[LLMPAR__WV], 0, c->head_dim, model->tp.replicas);
        llmpar__llama_shard(&p[LLMPAR__WO], 1, c->head_dim, 1);
        llmpar__llama_shard(&p[LLMPAR__GATE], 0, 1, 1);
        llmpar__llama_shard(&p[LLMPAR__UP], 0, 1, 1);
        llmpar__llama_shard(&p[LLMPAR__DOWN], 1, 1, 1);
    }
    status = llmpar__llama_lists(model);
    if (!status) status = llmpar__llama_rope(model);
    if (!status) model->applied = 2;
    return status;
}

/* ---- shapes and pieces that the unit files share ---- */

LLMPAR__PRIVATE_DEF void llmpar__llama_shape(const llmpar_llama *model, const llmpar_micro *micro, llmpar_dtype dtype, llmpar__shape *s)
{
    const llmpar_llama_config *c = &model->config;
    const llmpar_tp *tp = &model->tp;
    memset(s, 0, sizeof *s);
    s->b = micro->batch;
    s->t = micro->t;
    s->n = s->b * s->t;
    s->ts = tp->sequence_parallel ? s->t / tp->ranks : s->t;
    s->ns = s->b * s->ts;
    s->d = c->hidden;
    s->e = c->head_dim;
    s->f = llmpar_tp_count(tp, c->intermediate);
    s->h = c->heads / tp->ranks;
    s->k = tp->replicas > 1 ? 1 : c->kv_heads / tp->ranks;
    s->ld = (s->h + 2 * s->k) * s->e;
    s->v = llmpar_tp_count(tp, c->vocab);
    s->v_begin = llmpar_tp_begin(tp, c->vocab);
    s->leaves = micro->leaves;
    s->size = llmpar_dtype_size(dtype);
    s->dtype = dtype;
}

LLMPAR__PRIVATE_DEF size_t llmpar__llama_take(size_t *at, int64_t elements, size_t size)
{
    size_t begin = *at;
    *at = (begin + (size_t)elements * size + 63) / 64 * 64;
    return begin;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__llama_rmsnorm(llmpar_ctx *ctx, llmpar_stream *stream, const llmpar_llama *model, int64_t rows, const void *x, const void *residual, const void *w, void *sum, void *y, void *rstd)
{
    llmpar_rmsnorm_args args;
    memset(&args, 0, sizeof args);
    args.rows = rows;
    args.dim = model->config.hidden;
    args.x = x;
    args.residual = residual;
    args.w = w;
    args.sum = sum;
    args.y = y;
    args.rstd = rstd;
    args.eps = model->config.rms_eps;
    args.dtype = model->dtype;
    return ctx->device->rmsnorm(ctx->device, stream, &args);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__llama_norm_backward(const llmpar_unit_call *call, const llmpar__shape *s, const void *dy, const void *x, const void *w, const void *rstd, const void *dresidual, void *dx, void *dw_leaves)
{
    const llmpar_tp *tp = &((const llmpar_llama *)call->user)->tp;
    llmpar_rmsnorm_backward_args args;
    memset(&args, 0, sizeof args);
    args.tokens.batch = s->b;
    args.tokens.t = s->ts;
    args.tokens.t_begin = tp->sequence_parallel ? tp->rank * s->ts : 0;
    args.tokens.t_total = s->t;
    args.tokens.leaves = s->leaves;
    args.tokens.canon = tp->pieces;
    args.dim = s->d;
    args.dy = dy;
    args.x = x;
    args.w = w;
    args.rstd = rstd;
    args.dresidual = dresidual;
    args.dx = dx;
    args.dw_leaves = dw_leaves;
    args.dtype = s->dtype;
    return call->device->rmsnorm_backward(call->device, call->stream, &args);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__llama_norm_reduce(const llmpar_unit_call *call, const llmpar__shape *s, void *dw_leaves)
{
    llmpar_collective c;
    memset(&c, 0, sizeof c);
    c.send = c.recv = dw_leaves;
    c.count = (size_t)(s->leaves * s->d);
    c.dtype = s->dtype;
    c.tag = "norm weight/all_reduce";
    return llmpar_all_reduce(((const llmpar_llama *)call->user)->tp.comm, call->stream, &c);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__llama_norm_weight(const llmpar_unit_call *call, const llmpar__shape *s, const void *dw_leaves, void *dw)
{
    const void **in = (const void **)llmpar_heap_alloc(&call->ctx->heap, (size_t)s->leaves, sizeof *in);
    if (!in) return llmpar_fail(call->ctx, LLMPAR_ERR_MEMORY, "llama: no memory for %lld leaves", (long long)s->leaves);
    for (int64_t i = 0; i < s->leaves; i++) in[i] = (const char *)dw_leaves + (size_t)(i * s->d) * s->size;
    llmpar_tree_sum_args args;
    memset(&args, 0, sizeof args);
    args.in = in;
    args.n = (int32_t)s->leaves;
    args.count = (size_t)s->d;
    args.out = dw;
    args.dtype = s->dtype;
    llmpar_status status = call->device->tree_sum(call->device, call->stream, &args);
    llmpar_heap_free(&call->ctx->heap, (void *)in);
    return status;
}

#endif /* LLMPAR_NO_LLAMA */
/* ==== src/model/block.c ==== */

#include <string.h>


#if !defined(LLMPAR_NO_LLAMA)

/* One transformer block as a unit. Every buffer of a pass lies at an offset of this layout, which `sizes` and the callbacks share.

   saved    h1[Ns,D] rstd1[Ns]  qkv[N,(h+2k)E]  o[N,hE] lse[B,h,T]  x2[Ns,D]  h2[Ns,D] rstd2[Ns]  gate[N,f] up[N,f]
   scratch  full[N,D] (gathered rows, sequence parallel)  part[N,D]  sum[Ns,D] (what the reduce gives; = part without sequence parallel)
            backward also: dfull[N,D]  dh[N,max(f, hE)]  dqkv[N,(h+2k)E]  dx2[Ns,D]  dkv[N,2E] (ranks that share a kv head)  leaves1, leaves2 [leaves,D] */
typedef struct llmpar__block {
    llmpar__shape s;
    const llmpar_llama *model;
    const llmpar_tp *tp;
    char *h1, *rstd1, *qkv, *o, *lse, *x2, *h2, *rstd2, *gate, *up;         /* saved */
    char *full, *part, *sum, *dfull, *dh, *dqkv, *dx2, *dkv, *leaves1, *leaves2; /* scratch */
    const char *in1, *in2;  /* what qkv and gate/up read: h1, h2, or the gathered rows */
} llmpar__block;

typedef struct llmpar__block_layout { size_t h1, rstd1, qkv, o, lse, x2, h2, rstd2, gate, up, saved, full, part, sum, dfull, dh, dqkv, dx2, dkv, leaves1, leaves2, scratch; } llmpar__block_layout;

static void llmpar__block_lay(const llmpar_tp *tp, const llmpar__shape *s, int backward, llmpar__block_layout *l)
{
    size_t at = 0, size = s->size;
    l->h1 = llmpar__llama_take(&at, s->ns * s->d, size);
    l->rstd1 = llmpar__llama_take(&at, s->ns, size);
    l->qkv = llmpar__llama_take(&at, s->n * s->ld, size);
    l->o = llmpar__llama_take(&at, s->n * s->h * s->e, size);
    l->lse = llmpar__llama_take(&at, s->n * s->h, size);
    l->x2 = llmpar__llama_take(&at, s->ns * s->d, size);
    l->h2 = llmpar__llama_take(&at, s->ns * s->d, size);
    l->rstd2 = llmpar__llama_take(&at, s->ns, size);
    l->gate = llmpar__llama_take(&at, s->n * s->f, size);
    l->up = llmpar__llama_take(&at, s->n * s->f, size);
    l->saved = at;
    at = 0;
    l->full = llmpar__llama_take(&at, tp->sequence_parallel ? s->n * s->d : 0, size);
    l->part = llmpar__llama_take(&at, s->n * s->d, size);
    l->sum = tp->sequence_parallel ? llmpar__llama_take(&at, s->ns * s->d, size) : l->part;
    l->dh = llmpar__llama_take(&at, s->n * (s->f > s->h * s->e ? s->f : s->h * s->e), size); /* forward: swiglu's output */
    if (backward) {
        l->dfull = llmpar__llama_take(&at, tp->sequence_parallel ? s->n * s->d : 0, size);
        l->dqkv = llmpar__llama_take(&at, s->n * s->ld, size);
        l->dx2 = llmpar__llama_take(&at, s->ns * s->d, size);
        l->dkv = llmpar__llama_take(&at, tp->replicas > 1 ? s->n * 2 * s->e : 0, size);
        l->leaves1 = llmpar__llama_take(&at, s->leaves * s->d, size);
        l->leaves2 = llmpar__llama_take(&at, s->leaves * s->d, size);
    } else {
        l->dfull = l->dqkv = l->dx2 = l->dkv = l->leaves1 = l->leaves2 = 0;
    }
    l->scratch = at;
}

static void llmpar__block_open(const llmpar_unit_call *call, llmpar__block *b)
{
    llmpar__block_layout l;
    memset(b, 0, sizeof *b);
    b->model = (const llmpar_llama *)call->user;
    b->tp = &b->model->tp;
    llmpar__llama_shape(b->model, call->micro, call->dtype, &b->s);
    llmpar__block_lay(b->tp, &b->s, call->pass == LLMPAR_PASS_BACKWARD, &l);
    char *saved = (char *)call->saved, *scratch = (char *)call->scratch;
    b->h1 = saved + l.h1;
    b->rstd1 = saved + l.rstd1;
    b->qkv = saved + l.qkv;
    b->o = saved + l.o;
    b->lse = saved + l.lse;
    b->x2 = saved + l.x2;
    b->h2 = saved + l.h2;
    b->rstd2 = saved + l.rstd2;
    b->gate = saved + l.gate;
    b->up = saved + l.up;
    b->full = scratch + l.full;
    b->part = scratch + l.part;
    b->sum = scratch + l.sum;
    b->dfull = scratch + l.dfull;
    b->dh = scratch + l.dh;
    b->dqkv = scratch + l.dqkv;
    b->dx2 = scratch + l.dx2;
    b->dkv = scratch + l.dkv;
    b->leaves1 = scratch + l.leaves1;
    b->leaves2 = scratch + l.leaves2;
    b->in1 = b->tp->sequence_parallel ? b->full : b->h1;
    b->in2 = b->tp->sequence_parallel ? b->full : b->h2;
}

/* Element offset of k and v in a row of qkv. */
static size_t llmpar__block_k(const llmpar__shape *s) { return (size_t)(s->h * s->e) * s->size; }
static size_t llmpar__block_v(const llmpar__shape *s) { return (size_t)((s->h + s->k) * s->e) * s->size; }

/* Pointers and extents for attention over the joint q,k,v buffer. */
static void llmpar__block_attention(const llmpar__block *b, llmpar_attention_args *args)
{
    const llmpar__shape *s = &b->s;
    memset(args, 0, sizeof *args);
    args->batch = s->b;
    args->tq = args->tk = args->tk_stride = s->t;
    args->heads = s->h;
    args->kv_heads = s->k;
    args->head_dim = s->e;
    args->q = b->qkv;
    args->k = b->qkv + llmpar__block_k(s);
    args->v = b->qkv + llmpar__block_v(s);
    args->ldq = args->ldk = args->ldv = s->ld;
    args->ldo = s->h * s->e;
    args->out = b->o;
    args->lse = b->lse;
    args->scale = llmpar__llama_scale(b->model);
    args->dtype = s->dtype;
}

static llmpar_status llmpar__block_rope(const llmpar_unit_call *call, const llmpar__block *b, char *qkv, int inverse)
{
    const llmpar__shape *s = &b->s;
    llmpar_rope_args args;
    memset(&args, 0, sizeof args);
    args.batch = s->b;
    args.t = s->t;
    args.heads = s->h + s->k; /* k's heads lie behind q's */
    args.head_dim = s->e;
    args.ld = s->ld;
    args.x = qkv;
    args.cosine = b->model->cosine;
    args.sine = b->model->sine;
    args.dtype = s->dtype;
    args.inverse = inverse;
    return call->device->rope(call->device, call->stream, &args);
}

/* The operands of sums over heads and over F, see llmpar_tp_partial. Where several ranks share a kv head only the first carries its segments. */
static void llmpar__block_heads(const llmpar__block *b, const llmpar_unit_call *call, const char *dqkv, llmpar_tp_operand operand[3])
{
    const llmpar__shape *s = &b->s;
    const llmpar_llama_config *c = &b->model->config;
    memset(operand, 0, 3 * sizeof *operand);
    for (int i = 0; i < 3; i++) {
        operand[i].lda = s->ld;
        operand[i].ldb = s->d;
        operand[i].grain = s->e;
        operand[i].per = i ? c->heads / c->kv_heads : 1;
        operand[i].begin = i ? (b->tp->replicas > 1 ? b->tp->rank / b->tp->replicas : llmpar_tp_begin(b->tp, c->kv_heads)) : llmpar_tp_begin(b->tp, c->heads);
        operand[i].count = i ? (b->tp->replicas > 1 ? b->tp->rank % b->tp->replicas == 0 : s->k) : s->h;
    }
    if (!call) return;
    operand[0].a = dqkv;
    operand[1].a = dqkv + llmpar__block_k(s);
    operand[2].a = dqkv + llmpar__block_v(s);
    operand[0].b = call->params[LLMPAR__WQ];
    operand[1].b = call->params[LLMPAR__WK];
    operand[2].b = call->params[LLMPAR__WV];
}

static void llmpar__block_ffn(const llmpar__block *b, const llmpar_unit_call *call, llmpar_tp_operand operand[2])
{
    memset(operand, 0, 2 * sizeof *operand);
    for (int i = 0; i < 2; i++) {
        operand[i].lda = b->s.f;
        operand[i].ldb = b->s.d;
        operand[i].grain = 1;
        operand[i].begin = llmpar_tp_begin(b->tp, b->model->config.intermediate);
        operand[i].count = b->s.f;
    }
    if (!call) return;
    operand[0].a = b->gate;
    operand[1].a = b->up;
    operand[0].b = call->params[LLMPAR__GATE];
    operand[1].b = call->params[LLMPAR__UP];
}

/* A row-parallel product's one operand: a[N, grains*grain] w[D, grains*grain]^T. */
static void llmpar__block_row(const llmpar_tp *tp, const void *a, const void *w, int64_t grains, int64_t grain, llmpar_tp_operand *operand)
{
    memset(operand, 0, sizeof *operand);
    operand->a = a;
    operand->b = w;
    operand->count = llmpar_tp_count(tp, grains);
    operand->begin = llmpar_tp_begin(tp, grains);
    operand->grain = grain;
    operand->lda = operand->ldb = operand->count * grain;
}

LLMPAR__PRIVATE_DEF double llmpar__llama_scale(const llmpar_llama *model) { return 1.0 / llmpar_sqrt_f64((double)model->config.head_dim); }

/* ---- sizes ---- */

static size_t llmpar__block_max(size_t a, size_t b) { return a > b ? a : b; }

/* The largest workspace of any operation below; an operation refuses one that is too small, so this list cannot drift. */
static size_t llmpar__block_workspace(const llmpar__block *b, llmpar_device *device)
{
    const llmpar__shape *s = &b->s;
    const llmpar_tp *tp = b->tp;
    const llmpar_llama_config *c = &b->model->config;
    llmpar_tp_operand heads[3], ffn[2], row;
    llmpar_attention_backward_args attention;
    size_t w = 0;
    llmpar__block_heads(b, NULL, NULL, heads);
    llmpar__block_ffn(b, NULL, ffn);
    w = llmpar__block_max(w, llmpar_tp_product_workspace(tp, LLMPAR_GEMM_NT, s->n, s->h * s->e, s->d, s->dtype));
    w = llmpar__block_max(w, llmpar_tp_product_workspace(tp, LLMPAR_GEMM_NT, s->n, s->k * s->e, s->d, s->dtype));
    w = llmpar__block_max(w, llmpar_tp_product_workspace(tp, LLMPAR_GEMM_NT, s->n, s->f, s->d, s->dtype));
    llmpar__block_row(tp, NULL, NULL, c->heads, s->e, &row);
    w = llmpar__block_max(w, llmpar_tp_partial_workspace(tp, LLMPAR_GEMM_NT, s->n, s->d, c->heads, &row, 1, s->dtype));
    llmpar__block_row(tp, NULL, NULL, c->intermediate, 1, &row);
    w = llmpar__block_max(w, llmpar_tp_partial_workspace(tp, LLMPAR_GEMM_NT, s->n, s->d, c->intermediate, &row, 1, s->dtype));
    w = llmpar__block_max(w, llmpar_tp_product_workspace(tp, LLMPAR_GEMM_NN, s->n, s->f, s->d, s->dtype));
    w = llmpar__block_max(w, llmpar_tp_product_workspace(tp, LLMPAR_GEMM_NN, s->n, s->h * s->e, s->d, s->dtype));
    w = llmpar__block_max(w, llmpar_tp_partial_workspace(tp, LLMPAR_GEMM_NN, s->n, s->d, c->intermediate, ffn, 2, s->dtype));
    w = llmpar__block_max(w, llmpar_tp_partial_workspace(tp, LLMPAR_GEMM_NN, s->n, s->d, c->heads, heads, 3, s->dtype));
    w = llmpar__block_max(w, llmpar_tp_weight_gradient_workspace(tp, s->n, s->leaves, s->d, s->f, s->dtype));
    w = llmpar__block_max(w, llmpar_tp_weight_gradient_workspace(tp, s->n, s->leaves, s->f, s->d, s->dtype));
    w = llmpar__block_max(w, llmpar_tp_weight_gradient_workspace(tp, s->n, s->leaves, s->d, s->h * s->e, s->dtype));
    w = llmpar__block_max(w, llmpar_tp_weight_gradient_workspace(tp, s->n, s->leaves, s->h * s->e, s->d, s->dtype));
    w = llmpar__block_max(w, llmpar_tp_weight_gradient_workspace(tp, s->n, s->leaves, s->k * s->e, s->d, s->dtype));
    memset(&attention, 0, sizeof attention);
    attention.forward.batch = s->b;
    attention.forward.tq = attention.forward.tk = attention.forward.tk_stride = s->t;
    attention.forward.heads = s->h;
    attention.forward.kv_heads = s->k;
    attention.forward.head_dim = s->e;
    attention.forward.ldq = attention.forward.ldk = attention.forward.ldv = s->ld;
    attention.forward.ldo = s->h * s->e;
    attention.forward.dtype = s->dtype;
    w = llmpar__block_max(w, device->attention_workspace(device, &attention.forward));
    return llmpar__block_max(w, device->attention_backward_workspace(device, &attention));
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__block_sizes(void *user, const llmpar_micro *micro, llmpar_dtype dtype, llmpar_unit_sizes *out)
{
    llmpar__block b;
    llmpar__block_layout l;
    memset(&b, 0, sizeof b);
    b.model = (const llmpar_llama *)user;
    b.tp = &b.model->tp;
    llmpar__llama_shape(b.model, micro, dtype, &b.s);
    llmpar__block_lay(b.tp, &b.s, 1, &l);
    out->output = (size_t)(b.s.ns * b.s.d) * b.s.size;
    out->saved = l.saved;
    out->scratch = l.scratch;
    out->workspace = llmpar__block_workspace(&b, b.model->ctx->device);
    return LLMPAR_OK;
}

/* ---- forward ---- */

static llmpar_status llmpar__block_norm1(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    return llmpar__llama_rmsnorm(call->ctx, call->stream, b.model, b.s.ns, call->input, NULL, call->params[LLMPAR__NORM1], NULL, b.h1, b.rstd1);
}

static llmpar_status llmpar__block_gather1(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    return llmpar_tp_gather(b.tp, call->stream, "attention input/all_gather", b.s.b, b.s.t, b.s.d, b.h1, b.full, b.s.dtype);
}

static llmpar_status llmpar__block_attend(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar_attention_args attention;
    llmpar_tp_operand row;
    llmpar__block_open(call, &b);
    const llmpar__shape *s = &b.s;
    llmpar_status status = llmpar_tp_product(b.tp, call->stream, LLMPAR_GEMM_NT, s->n, s->h * s->e, s->d, b.in1, s->d, call->params[LLMPAR__WQ], s->d, b.qkv, s->ld, s->dtype, call->workspace, call->workspace_bytes);
    if (!status) status = llmpar_tp_product(b.tp, call->stream, LLMPAR_GEMM_NT, s->n, s->k * s->e, s->d, b.in1, s->d, call->params[LLMPAR__WK], s->d, b.qkv + llmpar__block_k(s), s->ld, s->dtype, call->workspace, call->workspace_bytes);
    if (!status) status = llmpar_tp_product(b.tp, call->stream, LLMPAR_GEMM_NT, s->n, s->k * s->e, s->d, b.in1, s->d, call->params[LLMPAR__WV], s->d, b.qkv + llmpar__block_v(s), s->ld, s->dtype, call->workspace, call->workspace_bytes);
    if (!status) status = llmpar__block_rope(call, &b, b.qkv, 0);
    llmpar__block_attention(&b, &attention);
    attention.workspace = call->workspace;
    attention.workspace_bytes = call->workspace_bytes;
    if (!status) status = call->device->attention(call->device, call->stream, &attention);
    llmpar__block_row(b.tp, b.o, call->params[LLMPAR__WO], b.model->config.heads, s->e, &row);
    if (!status) status = llmpar_tp_partial(b.tp, call->stream, LLMPAR_GEMM_NT, s->n, s->d, b.model->config.heads, &row, 1, s->dtype, b.part, call->workspace, call->workspace_bytes);
    return status;
}

static llmpar_status llmpar__block_reduce(llmpar_unit_call *call, const char *tag)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    return llmpar_tp_reduce(b.tp, call->stream, tag, b.s.b, b.s.t, b.s.d, b.part, b.sum, b.s.dtype);
}
static llmpar_status llmpar__block_reduce1(llmpar_unit_call *call) { return llmpar__block_reduce(call, "attention output/reduce"); }
static llmpar_status llmpar__block_reduce2(llmpar_unit_call *call) { return llmpar__block_reduce(call, "mlp output/reduce"); }
static llmpar_status llmpar__block_dreduce1(llmpar_unit_call *call) { return llmpar__block_reduce(call, "attention dx/reduce"); }
static llmpar_status llmpar__block_dreduce2(llmpar_unit_call *call) { return llmpar__block_reduce(call, "mlp dx/reduce"); }

static llmpar_status llmpar__block_norm2(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    return llmpar__llama_rmsnorm(call->ctx, call->stream, b.model, b.s.ns, b.sum, call->input, call->params[LLMPAR__NORM2], b.x2, b.h2, b.rstd2);
}

static llmpar_status llmpar__block_gather2(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    return llmpar_tp_gather(b.tp, call->stream, "mlp input/all_gather", b.s.b, b.s.t, b.s.d, b.h2, b.full, b.s.dtype);
}

static llmpar_status llmpar__block_mlp(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar_tp_operand row;
    llmpar_swiglu_args swiglu;
    llmpar__block_open(call, &b);
    const llmpar__shape *s = &b.s;
    llmpar_status status = llmpar_tp_product(b.tp, call->stream, LLMPAR_GEMM_NT, s->n, s->f, s->d, b.in2, s->d, call->params[LLMPAR__GATE], s->d, b.gate, s->f, s->dtype, call->workspace, call->workspace_bytes);
    if (!status) status = llmpar_tp_product(b.tp, call->stream, LLMPAR_GEMM_NT, s->n, s->f, s->d, b.in2, s->d, call->params[LLMPAR__UP], s->d, b.up, s->f, s->dtype, call->workspace, call->workspace_bytes);
    memset(&swiglu, 0, sizeof swiglu);
    swiglu.rows = s->n;
    swiglu.dim = swiglu.ld_in = swiglu.ld_out = s->f;
    swiglu.gate = b.gate;
    swiglu.up = b.up;
    swiglu.h = b.dh;
    swiglu.dtype = s->dtype;
    if (!status) status = call->device->swiglu(call->device, call->stream, &swiglu);
    llmpar__block_row(b.tp, b.dh, call->params[LLMPAR__DOWN], b.model->config.intermediate, 1, &row);
    if (!status) status = llmpar_tp_partial(b.tp, call->stream, LLMPAR_GEMM_NT, s->n, s->d, b.model->config.intermediate, &row, 1, s->dtype, b.part, call->workspace, call->workspace_bytes);
    return status;
}

static llmpar_status llmpar__block_residual(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar_add_args args;
    llmpar__block_open(call, &b);
    memset(&args, 0, sizeof args);
    args.count = (size_t)(b.s.ns * b.s.d);
    args.a = b.x2;
    args.b = b.sum;
    args.out = call->output;
    args.dtype = b.s.dtype;
    return call->device->add(call->device, call->stream, &args);
}

LLMPAR__PRIVATE_DEF const llmpar__op_row *llmpar__block_forward_ops(int32_t *count)
{
    static const llmpar__op_row rows[] = {
        /* 1 */ {{"norm", llmpar__block_norm1, LLMPAR_COMPUTE, {0, 0}}, LLMPAR__ALWAYS},
        /* 2 */ {{"attention input", llmpar__block_gather1, LLMPAR_TP_GATHER, {1, 0}}, LLMPAR__IF_SP},
        /* 3 */ {{"q k v, rope, attention, wo", llmpar__block_attend, LLMPAR_COMPUTE, {2, 0}}, LLMPAR__ALWAYS},
        /* 4 */ {{"attention output", llmpar__block_reduce1, LLMPAR_TP_REDUCE, {3, 0}}, LLMPAR__IF_TP},
        /* 5 */ {{"residual, norm", llmpar__block_norm2, LLMPAR_COMPUTE, {4, 0}}, LLMPAR__ALWAYS},
        /* 6 */ {{"mlp input", llmpar__block_gather2, LLMPAR_TP_GATHER, {5, 0}}, LLMPAR__IF_SP},
        /* 7 */ {{"gate, up, swiglu, down", llmpar__block_mlp, LLMPAR_COMPUTE, {6, 0}}, LLMPAR__ALWAYS},
        /* 8 */ {{"mlp output", llmpar__block_reduce2, LLMPAR_TP_REDUCE, {7, 0}}, LLMPAR__IF_TP},
        /* 9 */ {{"residual", llmpar__block_residual, LLMPAR_COMPUTE, {8, 0}}, LLMPAR__ALWAYS},
    };
    *count = (int32_t)(sizeof rows / sizeof rows[0]);
    return rows;
}

/* ---- backward ---- */

static llmpar_status llmpar__block_gather_dout(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    return llmpar_tp_gather(b.tp, call->stream, "mlp doutput/all_gather", b.s.b, b.s.t, b.s.d, call->doutput, b.dfull, b.s.dtype);
}

static llmpar_status llmpar__block_gather_dx2(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    return llmpar_tp_gather(b.tp, call->stream, "attention doutput/all_gather", b.s.b, b.s.t, b.s.d, b.dx2, b.dfull, b.s.dtype);
}

static const void *llmpar__block_dout(const llmpar_unit_call *call, const llmpar__block *b) { return b->tp->sequence_parallel ? b->dfull : call->doutput; }

/* dh = dout Wd, through swiglu into gate and up in place; h, recomputed, takes dh's place for dWd = dout^T h. */
static llmpar_status llmpar__block_dmlp(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar_swiglu_backward_args swiglu;
    llmpar_tp_operand ffn[2];
    llmpar__block_open(call, &b);
    const llmpar__shape *s = &b.s;
    llmpar_status status = llmpar_tp_product(b.tp, call->stream, LLMPAR_GEMM_NN, s->n, s->f, s->d, llmpar__block_dout(call, &b), s->d, call->params[LLMPAR__DOWN], s->f, b.dh, s->f, s->dtype, call->workspace, call->workspace_bytes);
    memset(&swiglu, 0, sizeof swiglu);
    swiglu.rows = s->n;
    swiglu.dim = swiglu.ld_in = swiglu.ld_out = s->f;
    swiglu.gate = b.gate;
    swiglu.up = b.up;
    swiglu.dh = b.dh;
    swiglu.dgate = b.gate;
    swiglu.dup = b.up;
    swiglu.h = b.dh;
    swiglu.dtype = s->dtype;
    if (!status) status = call->device->swiglu_backward(call->device, call->stream, &swiglu);
    llmpar__block_ffn(&b, call, ffn);
    if (!status) status = llmpar_tp_partial(b.tp, call->stream, LLMPAR_GEMM_NN, s->n, s->d, b.model->config.intermediate, ffn, 2, s->dtype, b.part, call->workspace, call->workspace_bytes);
    return status;
}

static llmpar_status llmpar__block_dw_mlp(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    const llmpar__shape *s = &b.s;
    llmpar_status status = llmpar_tp_weight_gradient(b.tp, call->stream, s->n, s->leaves, s->d, s->f, llmpar__block_dout(call, &b), s->d, b.dh, s->f, call->grads[LLMPAR__DOWN], s->dtype, call->workspace, call->workspace_bytes);
    if (!status) status = llmpar_tp_weight_gradient(b.tp, call->stream, s->n, s->leaves, s->f, s->d, b.gate, s->f, b.in2, s->d, call->grads[LLMPAR__GATE], s->dtype, call->workspace, call->workspace_bytes);
    if (!status) status = llmpar_tp_weight_gradient(b.tp, call->stream, s->n, s->leaves, s->f, s->d, b.up, s->f, b.in2, s->d, call->grads[LLMPAR__UP], s->dtype, call->workspace, call->workspace_bytes);
    return status;
}

static llmpar_status llmpar__block_dnorm2(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    return llmpar__llama_norm_backward(call, &b.s, b.sum, b.x2, call->params[LLMPAR__NORM2], b.rstd2, call->doutput, b.dx2, b.leaves2);
}

static llmpar_status llmpar__block_norm2_reduce(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    return llmpar__llama_norm_reduce(call, &b.s, b.leaves2);
}

static llmpar_status llmpar__block_dattend(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar_attention_backward_args attention;
    llmpar__block_open(call, &b);
    const llmpar__shape *s = &b.s;
    const void *dx2 = b.tp->sequence_parallel ? b.dfull : b.dx2;
    llmpar_status status = llmpar__llama_norm_weight(call, s, b.leaves2, call->grads[LLMPAR__NORM2]);
    if (!status) status = llmpar_tp_weight_gradient(b.tp, call->stream, s->n, s->leaves, s->d, s->h * s->e, dx2, s->d, b.o, s->h * s->e, call->grads[LLMPAR__WO], s->dtype, call->workspace, call->workspace_bytes);
    if (!status) status = llmpar_tp_product(b.tp, call->stream, LLMPAR_GEMM_NN, s->n, s->h * s->e, s->d, dx2, s->d, call->params[LLMPAR__WO], s->h * s->e, b.dh, s->h * s->e, s->dtype, call->workspace, call->workspace_bytes);
    memset(&attention, 0, sizeof attention);
    llmpar__block_attention(&b, &attention.forward);
    attention.forward.workspace = call->workspace;
    attention.forward.workspace_bytes = call->workspace_bytes;
    attention.dout = b.dh;
    attention.dq = b.dqkv;
    attention.dk = b.dqkv + llmpar__block_k(s);
    attention.dv = b.dqkv + llmpar__block_v(s);
    if (!status) status = call->device->attention_backward(call->device, call->stream, &attention);
    return status;
}

/* Ranks that share a kv head: dk and dv are summed over its query heads, row by row since they lie inside the joint buffer's rows. */
static llmpar_status llmpar__block_kv(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    const llmpar__shape *s = &b.s;
    llmpar_copy_rows_args copy;
    llmpar_collective c;
    memset(&copy, 0, sizeof copy);
    copy.rows = s->n;
    copy.width = copy.ld_out = 2 * s->e;
    copy.ld_in = s->ld;
    copy.size = s->size;
    copy.in = b.dqkv + llmpar__block_k(s);
    copy.out = b.dkv;
    llmpar_status status = call->device->copy_rows(call->device, call->stream, &copy);
    memset(&c, 0, sizeof c);
    c.send = c.recv = b.dkv;
    c.count = (size_t)(s->n * 2 * s->e);
    c.dtype = s->dtype;
    c.tag = "dk dv/all_reduce";
    if (!status) status = llmpar_all_reduce(b.tp->kv, call->stream, &c);
    copy.ld_in = 2 * s->e;
    copy.ld_out = s->ld;
    copy.in = b.dkv;
    copy.out = b.dqkv + llmpar__block_k(s);
    return status ? status : call->device->copy_rows(call->device, call->stream, &copy);
}

static llmpar_status llmpar__block_dqkv(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar_tp_operand heads[3];
    llmpar__block_open(call, &b);
    llmpar_status status = llmpar__block_rope(call, &b, b.dqkv, 1);
    llmpar__block_heads(&b, call, b.dqkv, heads);
    return status ? status : llmpar_tp_partial(b.tp, call->stream, LLMPAR_GEMM_NN, b.s.n, b.s.d, b.model->config.heads, heads, 3, b.s.dtype, b.part, call->workspace, call->workspace_bytes);
}

static llmpar_status llmpar__block_dw_qkv(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    const llmpar__shape *s = &b.s;
    llmpar_status status = llmpar_tp_weight_gradient(b.tp, call->stream, s->n, s->leaves, s->h * s->e, s->d, b.dqkv, s->ld, b.in1, s->d, call->grads[LLMPAR__WQ], s->dtype, call->workspace, call->workspace_bytes);
    if (!status) status = llmpar_tp_weight_gradient(b.tp, call->stream, s->n, s->leaves, s->k * s->e, s->d, b.dqkv + llmpar__block_k(s), s->ld, b.in1, s->d, call->grads[LLMPAR__WK], s->dtype, call->workspace, call->workspace_bytes);
    if (!status) status = llmpar_tp_weight_gradient(b.tp, call->stream, s->n, s->leaves, s->k * s->e, s->d, b.dqkv + llmpar__block_v(s), s->ld, b.in1, s->d, call->grads[LLMPAR__WV], s->dtype, call->workspace, call->workspace_bytes);
    return status;
}

static llmpar_status llmpar__block_dnorm1(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    return llmpar__llama_norm_backward(call, &b.s, b.sum, call->input, call->params[LLMPAR__NORM1], b.rstd1, b.dx2, call->dinput, b.leaves1);
}

static llmpar_status llmpar__block_norm1_reduce(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    return llmpar__llama_norm_reduce(call, &b.s, b.leaves1);
}

static llmpar_status llmpar__block_norm1_weight(llmpar_unit_call *call)
{
    llmpar__block b;
    llmpar__block_open(call, &b);
    return llmpar__llama_norm_weight(call, &b.s, b.leaves1, call->grads[LLMPAR__NORM1]);
}

/* The reductions of dx run beside the weight gradients of the same layers. */
LLMPAR__PRIVATE_DEF const llmpar__op_row *llmpar__block_backward_ops(int32_t *count)
{
    static const llmpar__op_row rows[] = {
        /* 1 */ {{"doutput", llmpar__block_gather_dout, LLMPAR_TP_GATHER, {0, 0}}, LLMPAR__IF_SP},
        /* 2 */ {{"mlp input again", llmpar__block_gather2, LLMPAR_TP_GATHER, {0, 0}}, LLMPAR__IF_SP},
        /* 3 */ {{"down, swiglu, mlp dx", llmpar__block_dmlp, LLMPAR_COMPUTE, {1, 0}}, LLMPAR__ALWAYS},
        /* 4 */ {{"mlp dx", llmpar__block_dreduce2, LLMPAR_TP_REDUCE, {3, 0}}, LLMPAR__IF_TP},
        /* 5 */ {{"down, gate, up dW", llmpar__block_dw_mlp, LLMPAR_COMPUTE, {2, 0}}, LLMPAR__ALWAYS},
        /* 6 */ {{"norm", llmpar__block_dnorm2, LLMPAR_COMPUTE, {4, 0}}, LLMPAR__ALWAYS},
        /* 7 */ {{"norm dW", llmpar__block_norm2_reduce, LLMPAR_TP_REDUCE, {6, 0}}, LLMPAR__IF_SP},
        /* 8 */ {{"dx", llmpar__block_gather_dx2, LLMPAR_TP_GATHER, {6, 0}}, LLMPAR__IF_SP},
        /* 9 */ {{"attention input again", llmpar__block_gather1, LLMPAR_TP_GATHER, {5, 0}}, LLMPAR__IF_SP},
        /* 10 */ {{"norm dW, wo dW, attention", llmpar__block_dattend, LLMPAR_COMPUTE, {7, 8}}, LLMPAR__ALWAYS},
        /* 11 */ {{"dk dv", llmpar__block_kv, LLMPAR_TP_REDUCE, {10, 0}}, LLMPAR__IF_KV},
        /* 12 */ {{"rope, attention dx", llmpar__block_dqkv, LLMPAR_COMPUTE, {11, 0}}, LLMPAR__ALWAYS},
        /* 13 */ {{"attention dx", llmpar__block_dreduce1, LLMPAR_TP_REDUCE, {12, 0}}, LLMPAR__IF_TP},
        /* 14 */ {{"q k v dW", llmpar__block_dw_qkv, LLMPAR_COMPUTE, {9, 0}}, LLMPAR__ALWAYS},
        /* 15 */ {{"norm", llmpar__block_dnorm1, LLMPAR_COMPUTE, {13, 0}}, LLMPAR__ALWAYS},
        /* 16 */ {{"norm dW", llmpar__block_norm1_reduce, LLMPAR_TP_REDUCE, {15, 0}}, LLMPAR__IF_SP},
        /* 17 */ {{"norm dW", llmpar__block_norm1_weight, LLMPAR_COMPUTE, {16, 0}}, LLMPAR__ALWAYS},
    };
    *count = (int32_t)(sizeof rows / sizeof rows[0]);
    return rows;
}

#endif /* LLMPAR_NO_LLAMA */
/* ==== src/model/edges.c ==== */

#include <string.h>

#if !defined(LLMPAR_NO_LLAMA)

/* The two ends of the model as units: the vocab-parallel embedding, and the head (final norm, output projection, vocab-parallel cross-entropy: logits are never gathered). */

/* ---- embedding: scratch part[N,D] (before the select), dfull[N,D] (gathered gradient) ---- */

typedef struct llmpar__embed { llmpar__shape s; const llmpar_llama *model; const llmpar_tp *tp; char *part, *dfull; size_t scratch; } llmpar__embed;

static void llmpar__embed_lay(const llmpar_llama *model, const llmpar_micro *micro, llmpar_dtype dtype, void *scratch, llmpar__embed *out)
{
    size_t at = 0;
    memset(out, 0, sizeof *out);
    out->model = model;
    out->tp = &model->tp;
    llmpar__llama_shape(model, micro, dtype, &out->s);
    size_t part = llmpar__llama_take(&at, out->tp->ranks > 1 ? out->s.n * out->s.d : 0, out->s.size);
    out->scratch = at;
    if (!scratch) return;
    out->part = out->dfull = (char *)scratch + part; /* one is forward's, the other backward's */
}

static void llmpar__embed_open(const llmpar_unit_call *call, llmpar__embed *out)
{
    llmpar__embed_lay((const llmpar_llama *)call->user, call->micro, call->dtype, call->scratch, out);
}

static void llmpar__embed_backward_args(const llmpar__embed *e, const llmpar_micro *micro, llmpar_embedding_backward_args *args)
{
    memset(args, 0, sizeof *args);
    args->tokens.batch = e->s.b;
    args->tokens.t = args->tokens.t_total = e->s.t;
    args->tokens.leaves = e->s.leaves;
    args->tokens.canon = e->tp->pieces;
    args->dim = e->s.d;
    args->v_begin = e->s.v_begin;
    args->v_local = e->s.v;
    args->ids = micro->ids;
    args->dtype = e->s.dtype;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__embed_sizes(void *user, const llmpar_micro *micro, llmpar_dtype dtype, llmpar_unit_sizes *out)
{
    llmpar__embed e;
    llmpar_embedding_backward_args args;
    const llmpar_llama *model = (const llmpar_llama *)user;
    /* The first unit of every pass speaks for all: RoPE tables and shards are of the dtype and length given to apply. */
    if (dtype != model->dtype || micro->t > model->positions || (model->tp.sequence_parallel && micro->t % model->tp.ranks))
        return llmpar_fail(model->ctx, LLMPAR_ERR_SHAPE, "llama: micro-batch %d of %lld tokens in %s, expected at most %lld (a multiple of %d) in %s, as llmpar_llama_apply was told", (int)micro->index, (long long)micro->t,
                           llmpar_dtype_name(dtype), (long long)model->positions, model->tp.sequence_parallel ? (int)model->tp.ranks : 1, llmpar_dtype_name(model->dtype));
    llmpar__embed_lay(model, micro, dtype, NULL, &e);
    llmpar__embed_backward_args(&e, micro, &args);
    out->output = (size_t)(e.s.ns * e.s.d) * e.s.size;
    out->scratch = e.scratch;
    out->workspace = model->ctx->device->embedding_backward_workspace(model->ctx->device, &args);
    return LLMPAR_OK;
}

static llmpar_status llmpar__embed_forward(llmpar_unit_call *call)
{
    llmpar__embed e;
    llmpar_embedding_args args;
    llmpar__embed_open(call, &e);
    memset(&args, 0, sizeof args);
    args.rows = e.s.n;
    args.dim = e.s.d;
    args.v_begin = e.s.v_begin;
    args.v_local = e.s.v;
    args.ids = call->micro->ids;
    args.table = call->params[0];
    args.out = e.tp->ranks > 1 ? (void *)e.part : call->output;
    args.dtype = e.s.dtype;
    return call->device->embedding(call->device, call->stream, &args);
}

static llmpar_status llmpar__embed_select(llmpar_unit_call *call)
{
    llmpar__embed e;
    llmpar__embed_open(call, &e);
    return llmpar_tp_select(e.tp, call->stream, "embed/select", e.s.b, e.s.t, e.s.d, e.part, call->output, e.s.dtype);
}

static llmpar_status llmpar__embed_gather(llmpar_unit_call *call)
{
    llmpar__embed e;
    llmpar__embed_open(call, &e);
    return llmpar_tp_gather(e.tp, call->stream, "embed doutput/all_gather", e.s.b, e.s.t, e.s.d, call->doutput, e.dfull, e.s.dtype);
}

static llmpar_status llmpar__embed_backward(llmpar_unit_call *call)
{
    llmpar__embed e;
    llmpar_embedding_backward_args args;
    llmpar__embed_open(call, &e);
    llmpar__embed_backward_args(&e, call->micro, &args);
    args.dout = e.tp->sequence_parallel ? (const void *)e.dfull : call->doutput;
    args.dtable = call->grads[0];
    args.workspace = call->workspace;
    args.workspace_bytes = call->workspace_bytes;
    return call->device->embedding_backward(call->device, call->stream, &args);
}

LLMPAR__PRIVATE_DEF const llmpar__op_row *llmpar__embed_ops(int backward, int32_t *count)
{
    static const llmpar__op_row forward_rows[] = {
        /* 1 */ {{"look up", llmpar__embed_forward, LLMPAR_COMPUTE, {0, 0}}, LLMPAR__ALWAYS},
        /* 2 */ {{"select", llmpar__embed_select, LLMPAR_TP_REDUCE, {1, 0}}, LLMPAR__IF_TP},
    };
    static const llmpar__op_row backward_rows[] = {
        /* 1 */ {{"doutput", llmpar__embed_gather, LLMPAR_TP_GATHER, {0, 0}}, LLMPAR__IF_SP},
        /* 2 */ {{"dW", llmpar__embed_backward, LLMPAR_COMPUTE, {1, 0}}, LLMPAR__ALWAYS},
    };
    *count = 2;
    return backward ? backward_rows : forward_rows;
}

/* ---- head
   saved    h[Ns,D] rstd[Ns]  logits[N,V/tp]  max[N] target[N] (together: one reduction)  sum[N]
   scratch  full[N,D] (sequence parallel)  part[N,D]  dh[Ns,D] (= part without sequence parallel)  leaves[leaves,D] ---- */

typedef struct llmpar__head {
    llmpar__shape s;
    const llmpar_llama *model;
    const llmpar_tp *tp;
    char *h, *rstd, *logits, *max, *target, *sum, *full, *part, *dh, *leaves;
    const char *in;
    size_t saved, scratch;
} llmpar__head;

static void llmpar__head_lay(const llmpar_llama *model, const llmpar_micro *micro, llmpar_dtype dtype, void *saved, void *scratch, llmpar__head *out)
{
    size_t at = 0, size;
    memset(out, 0, sizeof *out);
    out->model = model;
    out->tp = &model->tp;
    llmpar__llama_shape(model, micro, dtype, &out->s);
    const llmpar__shape *s = &out->s;
    size = s->size;
    size_t h = llmpar__llama_take(&at, s->ns * s->d, size), rstd = llmpar__llama_take(&at, s->ns, size), logits = llmpar__llama_take(&at, s->n * s->v, size);
    size_t max = llmpar__llama_take(&at, 2 * s->n, size), sum = llmpar__llama_take(&at, s->n, size);
    out->saved = at;
    at = 0;
    size_t full = llmpar__llama_take(&at, out->tp->sequence_parallel ? s->n * s->d : 0, size), part = llmpar__llama_take(&at, s->n * s->d, size);
    size_t dh = out->tp->sequence_parallel ? llmpar__llama_take(&at, s->ns * s->d, size) : part, leaves = llmpar__llama_take(&at, s->leaves * s->d, size);
    out->scratch = at;
    if (!saved || !scratch) return;
    out->h = (char *)saved + h;
    out->rstd = (char *)saved + rstd;
    out->logits = (char *)saved + logits;
    out->max = (char *)saved + max;
    out->target = out->max + (size_t)s->n * size;
    out->sum = (char *)saved + sum;
    out->full = (char *)scratch + full;
    out->part = (char *)scratch + part;
    out->dh = (char *)scratch + dh;
    out->leaves = (char *)scratch + leaves;
    out->in = out->tp->sequence_parallel ? out->full : out->h;
}

static void llmpar__head_open(const llmpar_unit_call *call, llmpar__head *out)
{
    llmpar__head_lay((const llmpar_llama *)call->user, call->micro, call->dtype, call->saved, call->scratch, out);
}

static void llmpar__head_operand(const llmpar__head *h, const void *w, llmpar_tp_operand *operand)
{
    memset(operand, 0, sizeof *operand);
    operand->a = h->logits;
    operand->b = w;
    operand->lda = h->s.v;
    operand->ldb = h->s.d;
    operand->grain = 1;
    operand->begin = h->s.v_begin;
    operand->count = h->s.v;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__head_sizes(void *user, const llmpar_micro *micro, llmpar_dtype dtype, llmpar_unit_sizes *out)
{
    llmpar__head h;
    llmpar_tp_operand operand;
    llmpar__head_lay((const llmpar_llama *)user, micro, dtype, NULL, NULL, &h);
    llmpar__head_operand(&h, NULL, &operand);
    out->saved = h.saved;
    out->scratch = h.scratch;
    out->workspace = llmpar_tp_product_workspace(h.tp, LLMPAR_GEMM_NT, h.s.n, h.s.v, h.s.d, dtype);
    size_t dx = llmpar_tp_partial_workspace(h.tp, LLMPAR_GEMM_NN, h.s.n, h.s.d, h.model->config.vocab, &operand, 1, dtype);
    size_t dw = llmpar_tp_weight_gradient_workspace(h.tp, h.s.n, h.s.leaves, h.s.v, h.s.d, dtype);
    if (dx > out->workspace) out->workspace = dx;
    if (dw > out->workspace) out->workspace = dw;
    return LLMPAR_OK;
}

/* The output projection [V/tp, D]: its own parameter, or the embedding table. */
static void *llmpar__head_weight(const llmpar_unit_call *call) { return call->borrowed ? call->borrowed[0] : call->params[1]; }
static void *llmpar__head_grad(const llmpar_unit_call *call) { return call->borrowed_grads ? call->borrowed_grads[0] : call->grads[1]; }

static void llmpar__head_xent(const llmpar_unit_call *call, const llmpar__head *h, llmpar_xent_args *args)
{
    memset(args, 0, sizeof *args);
    args->rows = h->s.n;
    args->ld = args->v_local = h->s.v;
    args->v_begin = h->s.v_begin;
    args->v_total = h->model->config.vocab;
    args->canon = h->tp->pieces;
    args->logits = h->logits;
    args->targets = call->micro->targets;
    args->max = h->max;
    args->target_logit = h->target;
    args->sum = h->sum;
    args->dtype = h->s.dtype;
}

static llmpar_status llmpar__head_norm(llmpar_unit_call *call)
{
    llmpar__head h;
    llmpar__head_open(call, &h);
    return llmpar__llama_rmsnorm(call->ctx, call->stream, h.model, h.s.ns, call->input, NULL, call->params[0], NULL, h.h, h.rstd);
}

static llmpar_status llmpar__head_gather(llmpar_unit_call *call)
{
    llmpar__head h;
    llmpar__head_open(call, &h);
    return llmpar_tp_gather(h.tp, call->stream, "head input/all_gather", h.s.b, h.s.t, h.s.d, h.h, h.full, h.s.dtype);
}

static llmpar_status llmpar__head_logits(llmpar_unit_call *call)
{
    llmpar__head h;
    llmpar_xent_args xent;
    llmpar__head_open(call, &h);
    llmpar_status status = llmpar_tp_product(h.tp, call->stream, LLMPAR_GEMM_NT, h.s.n, h.s.v, h.s.d, h.in, h.s.d, llmpar__head_weight(call), h.s.d, h.logits, h.s.v, h.s.dtype, call->workspace, call->workspace_bytes);
    llmpar__head_xent(call, &h, &xent);
    return status ? status : call->device->xent_max(call->device, call->stream, &xent);
}

static llmpar_status llmpar__head_combine(llmpar_unit_call *call, const char *tag, void *values, int64_t count, llmpar_reduce_op op)
{
    const llmpar_tp *tp = &((const llmpar_llama *)call->user)->tp;
    llmpar_collective c;
    memset(&c, 0, sizeof c);
    c.send = c.recv = values;
    c.count = (size_t)count;
    c.dtype = call->dtype;
    c.op = op;
    c.tag = tag;
    return llmpar_all_reduce(tp->comm, call->stream, &c);
}

static llmpar_status llmpar__head_max(llmpar_unit_call *call)
{
    llmpar__head h;
    llmpar__head_open(call, &h);
    return llmpar__head_combine(call, "head max/all_reduce", h.max, 2 * h.s.n, LLMPAR_MAX);
}

static llmpar_status llmpar__head_exp(llmpar_unit_call *call)
{
    llmpar__head h;
    llmpar_xent_args xent;
    llmpar__head_open(call, &h);
    llmpar__head_xent(call, &h, &xent);
    return call->device->xent_sum(call->device, call->stream, &xent);
}

static llmpar_status llmpar__head_sum(llmpar_unit_call *call)
{
    llmpar__head h;
    llmpar__head_open(call, &h);
    return llmpar__head_combine(call, "head sum/all_reduce", h.sum, h.s.n, LLMPAR_SUM);
}

static llmpar_status llmpar__head_loss(llmpar_unit_call *call)
{
    llmpar__head h;
    llmpar_xent_loss_args args;
    llmpar__head_open(call, &h);
    memset(&args, 0, sizeof args);
    args.rows = h.s.n;
    args.max = h.max;
    args.target_logit = h.target;
    args.sum = h.sum;
    args.targets = call->micro->targets;
    args.accumulator = call->micro->loss;
    args.token_loss = call->micro->token_loss;
    args.dtype = h.s.dtype;
    return call->device->xent_loss(call->device, call->stream, &args);
}

static llmpar_status llmpar__head_dlogits(llmpar_unit_call *call)
{
    llmpar__head h;
    llmpar_xent_backward_args xent;
    llmpar_tp_operand operand;
    llmpar__head_open(call, &h);
    llmpar__head_xent(call, &h, &xent.forward);
    xent.scale = call->micro->grad_scale;
    llmpar_status status = call->device->xent_backward(call->device, call->stream, &xent);
    llmpar__head_operand(&h, llmpar__head_weight(call), &operand);
    return status ? status : llmpar_tp_partial(h.tp, call->stream, LLMPAR_GEMM_NN, h.s.n, h.s.d, h.model->config.vocab, &operand, 1, h.s.dtype, h.part, call->workspace, call->workspace_bytes);
}

static llmpar_status llmpar__head_reduce(llmpar_unit_call *call)
{
    llmpar__head h;
    llmpar__head_open(call, &h);
    return llmpar_tp_reduce(h.tp, call->stream, "head dx/reduce", h.s.b, h.s.t, h.s.d, h.part, h.dh, h.s.dtype);
}

static llmpar_status llmpar__head_dw(llmpar_unit_call *call)
{
    llmpar__head h;
    llmpar__head_open(call, &h);
    return llmpar_tp_weight_gradient(h.tp, call->stream, h.s.n, h.s.leaves, h.s.v, h.s.d, h.logits, h.s.v, h.in, h.s.d, llmpar__head_grad(call), h.s.dtype, call->workspace, call->workspace_bytes);
}

static llmpar_status llmpar__head_dnorm(llmpar_unit_call *call)
{
    llmpar__head h;
    llmpar__head_open(call, &h);
    return llmpar__llama_norm_backward(call, &h.s, h.dh, call->input, call->params[0], h.rstd, NULL, call->dinput, h.leaves);
}

static llmpar_status llmpar__head_norm_reduce(llmpar_unit_call *call)
{
    llmpar__head h;
    llmpar__head_open(call, &h);
    return llmpar__llama_norm_reduce(call, &h.s, h.leaves);
}

static llmpar_status llmpar__head_norm_weight(llmpar_unit_call *call)
{
    llmpar__head h;
    llmpar__head_open(call, &h);
    return llmpar__llama_norm_weight(call, &h.s, h.leaves, call->grads[0]);
}

LLMPAR__PRIVATE_DEF const llmpar__op_row *llmpar__head_ops(int backward, int32_t *count)
{
    static const llmpar__op_row forward_rows[] = {
        /* 1 */ {{"norm", llmpar__head_norm, LLMPAR_COMPUTE, {0, 0}}, LLMPAR__ALWAYS},
        /* 2 */ {{"input", llmpar__head_gather, LLMPAR_TP_GATHER, {1, 0}}, LLMPAR__IF_SP},
        /* 3 */ {{"logits, max", llmpar__head_logits, LLMPAR_COMPUTE, {2, 0}}, LLMPAR__ALWAYS},
        /* 4 */ {{"max", llmpar__head_max, LLMPAR_TP_REDUCE, {3, 0}}, LLMPAR__IF_TP},
        /* 5 */ {{"sum of exp", llmpar__head_exp, LLMPAR_COMPUTE, {4, 0}}, LLMPAR__ALWAYS},
        /* 6 */ {{"sum of exp", llmpar__head_sum, LLMPAR_TP_REDUCE, {5, 0}}, LLMPAR__IF_TP},
        /* 7 */ {{"loss", llmpar__head_loss, LLMPAR_COMPUTE, {6, 0}}, LLMPAR__ALWAYS},
    };
    static const llmpar__op_row backward_rows[] = {
        /* 1 */ {{"input again", llmpar__head_gather, LLMPAR_TP_GATHER, {0, 0}}, LLMPAR__IF_SP},
        /* 2 */ {{"dlogits, dx", llmpar__head_dlogits, LLMPAR_COMPUTE, {0, 0}}, LLMPAR__ALWAYS},
        /* 3 */ {{"dx", llmpar__head_reduce, LLMPAR_TP_REDUCE, {2, 0}}, LLMPAR__IF_TP},
        /* 4 */ {{"dW", llmpar__head_dw, LLMPAR_COMPUTE, {1, 0}}, LLMPAR__ALWAYS},
        /* 5 */ {{"norm", llmpar__head_dnorm, LLMPAR_COMPUTE, {3, 0}}, LLMPAR__ALWAYS},
        /* 6 */ {{"norm dW", llmpar__head_norm_reduce, LLMPAR_TP_REDUCE, {5, 0}}, LLMPAR__IF_SP},
        /* 7 */ {{"norm dW", llmpar__head_norm_weight, LLMPAR_COMPUTE, {6, 0}}, LLMPAR__ALWAYS},
    };
    *count = 7;
    return backward ? backward_rows : forward_rows;
}

#endif /* LLMPAR_NO_LLAMA */
/* ==== src/model/generate.c ==== */

#include <string.h>


#if !defined(LLMPAR_NO_LLAMA)

/* Inference under tensor parallelism: the block's forward with a KV cache, on parameters that stay gathered.
   Buffers for at most `rows` rows at once; the cache holds `capacity` positions of k and v for every layer, [L][capacity, 2*k*E]. */
typedef struct llmpar__session {
    llmpar_llama *model;
    llmpar_fsdp *fsdp;
    llmpar_device *device;
    llmpar_stream *stream;
    llmpar_tp tp;                  /* the model's, without sequence parallel */
    llmpar__shape s;               /* b = 1, t = rows */
    llmpar_dtype dtype;
    int64_t rows, capacity;
    size_t workspace_bytes, cache_bytes;
    void *block, *cache, *workspace; /* block: all activations */
    void *x, *h, *q, *o, *part, *gate, *up, *logits;
    int32_t *ids;                  /* device [rows] */
    float *host;                   /* [rows, V] logits as f32 */
    void *gathered;                /* device [tp, widest vocabulary part] */
    int32_t unsharded_units;
} llmpar__session;

static llmpar_status llmpar__session_memory(llmpar__session *g)
{
    const llmpar__shape *s = &g->s;
    const llmpar_llama_config *c = &g->model->config;
    llmpar_arena *arena = llmpar_fsdp_arena(g->fsdp);
    size_t at = 0;
    int64_t widest = (c->vocab + g->tp.ranks - 1) / g->tp.ranks;
    size_t x = llmpar__llama_take(&at, g->rows * s->d, s->size), h = llmpar__llama_take(&at, g->rows * s->d, s->size), part = llmpar__llama_take(&at, g->rows * s->d, s->size);
    size_t q = llmpar__llama_take(&at, g->rows * s->h * s->e, s->size), o = llmpar__llama_take(&at, g->rows * s->h * s->e, s->size);
    size_t gate = llmpar__llama_take(&at, g->rows * s->f, s->size), up = llmpar__llama_take(&at, g->rows * s->f, s->size);
    size_t logits = llmpar__llama_take(&at, g->rows * widest, s->size), gathered = llmpar__llama_take(&at, g->rows * widest * g->tp.ranks, s->size), ids = llmpar__llama_take(&at, g->rows, sizeof(int32_t));
    g->cache_bytes = (size_t)c->layers * (size_t)g->capacity * (size_t)(2 * s->k * s->e) * s->size;
    llmpar_status status = llmpar_arena_alloc(arena, LLMPAR_TAG_ACTIVATIONS, at, "generation", &g->block);
    if (!status) status = llmpar_arena_alloc(arena, LLMPAR_TAG_ACTIVATIONS, g->cache_bytes, "kv cache", &g->cache);
    if (!status) status = llmpar_arena_alloc(arena, LLMPAR_TAG_WORKSPACE, g->workspace_bytes, "generation", &g->workspace);
    if (status) return status;
    char *base = (char *)g->block;
    g->x = base + x;
    g->h = base + h;
    g->part = base + part;
    g->q = base + q;
    g->o = base + o;
    g->gate = base + gate;
    g->up = base + up;
    g->logits = base + logits;
    g->gathered = base + gathered;
    g->ids = (int32_t *)(void *)(base + ids);
    g->host = (float *)llmpar_heap_alloc(&g->model->ctx->heap, (size_t)g->rows, (size_t)c->vocab * sizeof(float));
    return g->host ? LLMPAR_OK : llmpar_fail(g->model->ctx, LLMPAR_ERR_MEMORY, "generation: no memory for %lld rows of logits", (long long)g->rows);
}

static void llmpar__session_attention(const llmpar__session *g, int32_t layer, int64_t position, int64_t count, llmpar_attention_args *args)
{
    const llmpar__shape *s = &g->s;
    char *cache = (char *)g->cache + (size_t)layer * (size_t)(g->capacity * 2 * s->k * s->e) * s->size;
    memset(args, 0, sizeof *args);
    args->batch = 1;
    args->tq = count;
    args->tk = position + count;
    args->tk_stride = g->capacity;
    args->heads = s->h;
    args->kv_heads = s->k;
    args->head_dim = s->e;
    args->q = g->q;
    if (g->cache) {
        args->k = cache;
        args->v = cache + (size_t)(s->k * s->e) * s->size;
    }
    args->ldq = args->ldo = s->h * s->e;
    args->ldk = args->ldv = 2 * s->k * s->e;
    args->out = g->o;
    args->scale = llmpar__llama_scale(g->model);
    args->dtype = g->dtype;
    args->workspace = g->workspace;
    args->workspace_bytes = g->workspace_bytes;
}

static void llmpar__session_row(const llmpar__session *g, const void *a, const void *w, int64_t grains, int64_t grain, llmpar_tp_operand *operand)
{
    memset(operand, 0, sizeof *operand);
    operand->a = a;
    operand->b = w;
    operand->count = llmpar_tp_count(&g->tp, grains);
    operand->begin = llmpar_tp_begin(&g->tp, grains);
    operand->grain = grain;
    operand->lda = operand->ldb = operand->count * grain;
}

static size_t llmpar__session_workspace(const llmpar__session *g)
{
    const llmpar__shape *s = &g->s;
    const llmpar_llama_config *c = &g->model->config;
    int64_t widths[4];
    size_t most = 0, w;
    widths[0] = s->h * s->e;
    widths[1] = s->k * s->e;
    widths[2] = s->f;
    widths[3] = s->v;
    llmpar_tp_operand row;
    llmpar_attention_args attention;
    /* Every row count up to `rows` is used: the prompt's chunks and single tokens. */
    for (int pass = 0; pass < 2; pass++) {
        int64_t rows = pass ? g->rows : 1;
        for (int i = 0; i < 4; i++) {
            w = llmpar_tp_product_workspace(&g->tp, LLMPAR_GEMM_NT, rows, widths[i], s->d, g->dtype);
            if (w > most) most = w;
        }
        llmpar__session_row(g, NULL, NULL, c->heads, s->e, &row);
        w = llmpar_tp_partial_workspace(&g->tp, LLMPAR_GEMM_NT, rows, s->d, c->heads, &row, 1, g->dtype);
        if (w > most) most = w;
        llmpar__session_row(g, NULL, NULL, c->intermediate, 1, &row);
        w = llmpar_tp_partial_workspace(&g->tp, LLMPAR_GEMM_NT, rows, s->d, c->intermediate, &row, 1, g->dtype);
        if (w > most) most = w;
        llmpar__session_attention(g, 0, g->capacity - rows, rows, &attention);
        w = g->device->attention_workspace(g->device, &attention);
        if (w > most) most = w;
    }
    return most;
}

static llmpar_status llmpar__session_open(llmpar_llama *model, llmpar_fsdp *fsdp, int64_t rows, int64_t capacity, llmpar__session *g)
{
    llmpar_micro micro;
    memset(g, 0, sizeof *g);
    g->model = model;
    g->fsdp = fsdp;
    g->device = model->ctx->device;
    g->dtype = llmpar_fsdp_dtype(fsdp);
    if (model->applied != 2) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "generation: the model meets no mesh yet, call llmpar_parallelize or llmpar_llama_apply first");
    if (g->dtype != model->dtype) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "generation: shards in %s, expected the %s that llmpar_llama_apply was told", llmpar_dtype_name(g->dtype), llmpar_dtype_name(model->dtype));
    if (capacity > model->positions)
        return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "generation: %lld positions, expected at most the %lld that the model was set up for", (long long)capacity, (long long)model->positions);
    g->tp = model->tp;
    g->tp.sequence_parallel = 0;
    g->rows = rows;
    g->capacity = capacity;
    memset(&micro, 0, sizeof micro);
    micro.batch = 1;
    micro.t = rows;
    micro.leaves = 1;
    llmpar__llama_shape(model, &micro, g->dtype, &g->s);
    g->workspace_bytes = llmpar__session_workspace(g);
    llmpar_status status = g->device->stream_create(g->device, "generation", &g->stream);
    if (!status) status = llmpar__session_memory(g);
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(fsdp) && !status; u++) {
        status = llmpar_fsdp_unshard(fsdp, u, NULL);
        if (!status) g->unsharded_units = u + 1;
    }
    return status;
}

static void llmpar__session_close(llmpar__session *g)
{
    llmpar_arena *arena = llmpar_fsdp_arena(g->fsdp);
    if (g->stream) { /* after a failure it may still read what goes now */
        g->device->synchronize(g->device, g->stream);
        g->device->stream_destroy(g->device, g->stream);
    }
    for (int32_t u = 0; u < g->unsharded_units; u++) llmpar_fsdp_reshard(g->fsdp, u);
    llmpar_arena_free(arena, g->block);
    llmpar_arena_free(arena, g->cache);
    llmpar_arena_free(arena, g->workspace);
    llmpar_heap_free(&g->model->ctx->heap, g->host);
}

static llmpar_status llmpar__session_rope(const llmpar__session *g, void *x, int64_t heads, int64_t ld, int64_t position, int64_t count)
{
    llmpar_rope_args args;
    memset(&args, 0, sizeof args);
    args.batch = 1;
    args.t = count;
    args.heads = heads;
    args.head_dim = g->s.e;
    args.ld = ld;
    args.position = position;
    args.x = x;
    args.cosine = g->model->cosine;
    args.sine = g->model->sine;
    args.dtype = g->dtype;
    return g->device->rope(g->device, g->stream, &args);
}

static llmpar_status llmpar__session_layer(llmpar__session *g, int32_t layer, int64_t position, int64_t count)
{
    const llmpar__shape *s = &g->s;
    const llmpar_llama_config *c = &g->model->config;
    void *const *p = NULL;
    llmpar_attention_args attention;
    llmpar_swiglu_args swiglu;
    llmpar_tp_operand row;
    llmpar_add_args add;
    int64_t ld = 2 * s->k * s->e;
    llmpar_status status = llmpar_fsdp_unshard(g->fsdp, layer + 1, &p); /* counted: already gathered */
    if (status) return status;
    status = llmpar_fsdp_reshard(g->fsdp, layer + 1);
    llmpar__session_attention(g, layer, position, count, &attention);
    char *k = (char *)(uintptr_t)attention.k + (size_t)(position * ld) * s->size, *v = (char *)(uintptr_t)attention.v + (size_t)(position * ld) * s->size;
    if (!status) status = llmpar__llama_rmsnorm(g->model->ctx, g->stream, g->model, count, g->x, NULL, p[LLMPAR__NORM1], NULL, g->h, g->part);
    if (!status) status = llmpar_tp_product(&g->tp, g->stream, LLMPAR_GEMM_NT, count, s->h * s->e, s->d, g->h, s->d, p[LLMPAR__WQ], s->d, g->q, s->h * s->e, g->dtype, g->workspace, g->workspace_bytes);
    if (!status) status = llmpar_tp_product(&g->tp, g->stream, LLMPAR_GEMM_NT, count, s->k * s->e, s->d, g->h, s->d, p[LLMPAR__WK], s->d, k, ld, g->dtype, g->workspace, g->workspace_bytes);
    if (!status) status = llmpar_tp_product(&g->tp, g->stream, LLMPAR_GEMM_NT, count, s->k * s->e, s->d, g->h, s->d, p[LLMPAR__WV], s->d, v, ld, g->dtype, g->workspace, g->workspace_bytes);
    if (!status) status = llmpar__session_rope(g, g->q, s->h, s->h * s->e, position, count);
    if (!status) status = llmpar__session_rope(g, k, s->k, ld, position, count);
    if (!status) status = g->device->attention(g->device, g->stream, &attention);
    llmpar__session_row(g, g->o, p[LLMPAR__WO], c->heads, s->e, &row);
    if (!status) status = llmpar_tp_partial(&g->tp, g->stream, LLMPAR_GEMM_NT, count, s->d, c->heads, &row, 1, g->dtype, g->part, g->workspace, g->workspace_bytes);
    if (!status) status = llmpar_tp_reduce(&g->tp, g->stream, "attention output/reduce", 1, count, s->d, g->part, g->part, g->dtype);
    /* x += part, h = norm(x); rstd is not needed and goes where gate will be */
    if (!status) status = llmpar__llama_rmsnorm(g->model->ctx, g->stream, g->model, count, g->part, g->x, p[LLMPAR__NORM2], g->x, g->h, g->gate);
    if (!status) status = llmpar_tp_product(&g->tp, g->stream, LLMPAR_GEMM_NT, count, s->f, s->d, g->h, s->d, p[LLMPAR__GATE], s->d, g->gate, s->f, g->dtype, g->workspace, g->workspace_bytes);
    if (!status) status = llmpar_tp_product(&g->tp, g->stream, LLMPAR_GEMM_NT, count, s->f, s->d, g->h, s->d, p[LLMPAR__UP], s->d, g->up, s->f, g->dtype, g->workspace, g->workspace_bytes);
    memset(&swiglu, 0, sizeof swiglu);
    swiglu.rows = count;
    swiglu.dim = swiglu.ld_in = swiglu.ld_out = s->f;
    swiglu.gate = g->gate;
    swiglu.up = g->up;
    swiglu.h = g->gate;
    swiglu.dtype = g->dtype;
    if (!status) status = g->device->swiglu(g->device, g->stream, &swiglu);
    llmpar__session_row(g, g->gate, p[LLMPAR__DOWN], c->intermediate, 1, &row);
    if (!status) status = llmpar_tp_partial(&g->tp, g->stream, LLMPAR_GEMM_NT, count, s->d, c->intermediate, &row, 1, g->dtype, g->part, g->workspace, g->workspace_bytes);
    if (!status) status = llmpar_tp_reduce(&g->tp, g->stream, "mlp output/reduce", 1, count, s->d, g->part, g->part, g->dtype);
    memset(&add, 0, sizeof add);
    add.count = (size_t)(count * s->d);
    add.a = g->x;
    add.b = g->part;
    add.out = g->x;
    add.dtype = g->dtype;
    return status ? status : g->device->add(g->device, g->stream, &add);
}

/* Logits of `count` rows of x beginning at `first`, whole vocabulary, as f32 in g->host[count, V]. */
static llmpar_status llmpar__session_head(llmpar__session *g, int64_t first, int64_t count)
{
    const llmpar__shape *s = &g->s;
    const llmpar_llama_config *c = &g->model->config;
    llmpar_heap *heap = &g->model->ctx->heap;
    int32_t head = c->layers + 1;
    int64_t widest = (c->vocab + g->tp.ranks - 1) / g->tp.ranks;
    void *const *p = NULL, *const *table = NULL;
    llmpar_collective call;
    llmpar_status status = llmpar_fsdp_unshard(g->fsdp, head, &p);
    if (!status) status = llmpar_fsdp_reshard(g->fsdp, head);
    if (!status) status = llmpar_fsdp_unshard(g->fsdp, 0, &table);
    if (!status) status = llmpar_fsdp_reshard(g->fsdp, 0);
    if (status) return status;
    const char *x = (const char *)g->x + (size_t)(first * s->d) * s->size;
    status = llmpar__llama_rmsnorm(g->model->ctx, g->stream, g->model, count, x, NULL, p[0], NULL, g->h, g->part);
    if (!status) status = llmpar_tp_product(&g->tp, g->stream, LLMPAR_GEMM_NT, count, s->v, s->d, g->h, s->d, c->tied ? table[0] : p[1], s->d, g->logits, widest, g->dtype, g->workspace, g->workspace_bytes);
    memset(&call, 0, sizeof call);
    call.send = g->logits;
    call.recv = g->gathered;
    call.count = (size_t)(count * widest);
    call.dtype = g->dtype;
    call.tag = "logits/all_gather";
    if (!status) status = llmpar_all_gather(g->tp.comm, g->stream, &call);
    size_t bytes = (size_t)(count * widest * g->tp.ranks) * s->size;
    char *raw = status ? NULL : (char *)llmpar_heap_alloc(heap, 1, bytes);
    if (!status && !raw) status = llmpar_fail(g->model->ctx, LLMPAR_ERR_MEMORY, "generation: no memory for %lld rows of logits", (long long)count);
    if (!status) status = g->device->copy(g->device, g->stream, raw, g->gathered, bytes);
    if (!status) status = g->device->synchronize(g->device, g->stream);
    for (int32_t rank = 0; rank < g->tp.ranks && !status; rank++) {
        int64_t begin = llmpar_piece_begin(rank, c->vocab, g->tp.ranks), width = llmpar_piece_begin(rank + 1, c->vocab, g->tp.ranks) - begin;
        for (int64_t row = 0; row < count; row++)
            llmpar_convert(g->host + row * c->vocab + begin, LLMPAR_F32, raw + (size_t)((rank * count + row) * widest) * s->size, g->dtype, (size_t)width);
    }
    llmpar_heap_free(heap, raw);
    return status;
}

static llmpar_status llmpar__session_forward(llmpar__session *g, const int32_t *ids, int64_t position, int64_t count)
{
    const llmpar_llama_config *c = &g->model->config;
    void *const *table = NULL;
    llmpar_embedding_args args;
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= c->vocab) return llmpar_fail(g->model->ctx, LLMPAR_ERR_ARGUMENT, "token id %d at position %lld, expected 0 .. %d", (int)ids[i], (long long)(position + i), (int)c->vocab - 1);
    llmpar_status status = llmpar_fsdp_unshard(g->fsdp, 0, &table);
    if (!status) status = llmpar_fsdp_reshard(g->fsdp, 0);
    if (!status) status = g->device->copy(g->device, g->stream, g->ids, ids, (size_t)count * sizeof *ids);
    memset(&args, 0, sizeof args);
    args.rows = count;
    args.dim = g->s.d;
    args.v_begin = g->s.v_begin;
    args.v_local = g->s.v;
    args.ids = g->ids;
    args.table = status ? NULL : table[0];
    args.out = g->x;
    args.dtype = g->dtype;
    if (!status) status = g->device->embedding(g->device, g->stream, &args);
    if (!status) status = llmpar_tp_select(&g->tp, g->stream, "embed/select", 1, count, g->s.d, g->x, g->x, g->dtype);
    for (int32_t layer = 0; layer < c->layers && !status; layer++) status = llmpar__session_layer(g, layer, position, count);
    return status;
}

LLMPAR_DEF llmpar_status llmpar_llama_logits(llmpar_llama *model, llmpar_fsdp *fsdp, const int32_t *ids, int32_t count, float *logits)
{
    llmpar__session g;
    if (count < 1) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "logits: %d ids, expected at least 1", (int)count);
    llmpar_status status = llmpar__session_open(model, fsdp, count, count, &g);
    if (!status) status = llmpar__session_forward(&g, ids, 0, count);
    if (!status) status = llmpar__session_head(&g, 0, count);
    if (!status) memcpy(logits, g.host, (size_t)count * (size_t)model->config.vocab * sizeof(float));
    llmpar__session_close(&g);
    return status;
}

/* ---- sampling ---- */

static int32_t llmpar__sample_greedy(const float *logits, int32_t vocab)
{
    int32_t best = 0;
    for (int32_t i = 1; i < vocab; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
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

/* logits become probabilities at this temperature; order[vocab] is scratch. `uniform` in [0, 1). */
static int32_t llmpar__sample_nucleus(float *logits, int32_t vocab, double temperature, double top_p, double uniform, int32_t *order)
{
    float max = logits[llmpar__sample_greedy(logits, vocab)];
    double sum = 0, mass = 0, target;
    for (int32_t i = 0; i < vocab; i++) {
        logits[i] = (float)llmpar_exp_f64(((double)logits[i] - (double)max) / temperature);
        sum += (double)logits[i];
        order[i] = i;
    }
    if (!(top_p > 0 && top_p < 1)) {
        target = uniform * sum;
        for (int32_t i = 0; i < vocab; i++) {
            mass += (double)logits[i];
            if (mass > target) return i;
        }
        return vocab - 1;
    }
    int32_t count = vocab, kept = 0;
    for (int32_t i = vocab / 2; i-- > 0;) llmpar__sample_sift(order, count, i, logits);
    while (count > 0 && mass < top_p * sum) { /* the popped ones gather behind the shrinking heap */
        int32_t top = order[0];
        mass += (double)logits[top];
        order[0] = order[--count];
        order[count] = top;
        kept++;
        llmpar__sample_sift(order, count, 0, logits);
    }
    target = uniform * mass;
    mass = 0;
    for (int32_t i = 0; i < kept; i++) {
        mass += (double)logits[order[vocab - 1 - i]];
        if (mass > target) return order[vocab - 1 - i];
    }
    return order[vocab - kept];
}

/* Sampling takes it for granted: one NaN would make every comparison of probability masses false. */
static int llmpar__sample_finite(const float *logits, int32_t vocab)
{
    for (int32_t i = 0; i < vocab; i++)
        if (!llmpar_isfinite_f32(logits[i])) return 0;
    return 1;
}

static int llmpar__sample_is_eos(const llmpar_llama_config *c, int32_t id)
{
    for (int32_t i = 0; i < c->eos_count; i++)
        if (c->eos_id[i] == id) return 1;
    return 0;
}

LLMPAR_DEF llmpar_status llmpar_llama_generate(llmpar_llama *model, llmpar_fsdp *fsdp, const llmpar_generate_desc *desc, int32_t *ids, int32_t *count)
{
    enum { CHUNK = 256 };
    const llmpar_llama_config *c = &model->config;
    llmpar__session g;
    int32_t tokens = desc->tokens ? desc->tokens : 128;
    *count = 0;
    if (desc->prompt_count < 1 || !desc->prompt) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "generation: prompt of %d ids, expected at least 1", (int)desc->prompt_count);
    if (tokens < 0) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "generation: tokens = %d, expected at least 1", (int)tokens);
    if (!(desc->temperature >= 0) || !llmpar_isfinite_f64(desc->temperature)) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "generation: temperature = %g, expected 0 or more", desc->temperature);
    if (!(desc->top_p >= 0 && desc->top_p <= 1)) return llmpar_fail(model->ctx, LLMPAR_ERR_ARGUMENT, "generation: top_p = %g, expected 0 .. 1", desc->top_p);
    int64_t rows = desc->prompt_count < CHUNK ? desc->prompt_count : CHUNK;
    int32_t *order = (int32_t *)llmpar_heap_alloc(&model->ctx->heap, (size_t)c->vocab, sizeof *order);
    if (!order) return llmpar_fail(model->ctx, LLMPAR_ERR_MEMORY, "generation: out of memory");
    llmpar_rng rng = llmpar_rng_key(desc->seed, LLMPAR_RNG_SAMPLE, NULL, 0, 0);
    llmpar_status status = llmpar__session_open(model, fsdp, rows, (int64_t)desc->prompt_count + tokens - (tokens > 0), &g);
    int64_t position = 0, last = 0;
    while (!status && position < desc->prompt_count) {
        int64_t n = desc->prompt_count - position < rows ? desc->prompt_count - position : rows;
        status = llmpar__session_forward(&g, desc->prompt + position, position, n);
        position += n;
        last = n - 1;
    }
    for (int32_t i = 0; i < tokens && !status; i++) {
        status = llmpar__session_head(&g, last, 1);
        if (!status && !llmpar__sample_finite(g.host, c->vocab)) status = llmpar_fail(model->ctx, LLMPAR_ERR_NONFINITE, "generation: logits at position %lld are not finite", (long long)position - 1);
        if (status) break;
        int32_t id = desc->temperature == 0 ? llmpar__sample_greedy(g.host, c->vocab) : llmpar__sample_nucleus(g.host, c->vocab, desc->temperature, desc->top_p, llmpar_rng_uniform(&rng, (uint64_t)i), order);
        ids[(*count)++] = id;
        if (desc->on_token) status = desc->on_token(desc->user, id);
        if (status || i + 1 == tokens || (desc->stop_at_eos && llmpar__sample_is_eos(c, id))) break;
        status = llmpar__session_forward(&g, ids + *count - 1, position++, 1); /* not &id: the stream may read it later */
        last = 0;
    }
    llmpar__session_close(&g);
    llmpar_heap_free(&model->ctx->heap, order);
    return status;
}

#endif /* LLMPAR_NO_LLAMA */

/* ==== src/model_io/hf.c ==== */

#include <stdio.h>
#include <string.h>


#if !defined(LLMPAR_NO_LLAMA) && !defined(LLMPAR_NO_IO)

/* DIR/name on the heap; NULL when out of memory. */
static char *llmpar__hf_path(llmpar_ctx *ctx, const char *directory, const char *name)
{
    size_t bytes = strlen(directory) + strlen(name) + 2;
    char *path = (char *)llmpar_heap_alloc(&ctx->heap, 1, bytes);
    if (path) snprintf(path, bytes, "%s/%s", directory, name);
    else llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "out of memory for a path");
    return path;
}

/* Passes an error of a module without ctx on to the rank. */
static llmpar_status llmpar__hf_fail(llmpar_ctx *ctx, llmpar_status status, const llmpar_error *error)
{
    return status ? llmpar_fail(ctx, status, "%s", error->text) : LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_hf_config(llmpar_ctx *ctx, const char *directory, llmpar_llama_config *out)
{
    llmpar_mapped file;
    llmpar_error error;
    char *path = llmpar__hf_path(ctx, directory, "config.json");
    if (!path) return LLMPAR_ERR_MEMORY;
    memset(&file, 0, sizeof file);
    llmpar_error_clear(&error);
    llmpar_status status = llmpar_file_map(path, &file, &error);
    if (!status) status = llmpar_llama_config_parse(&ctx->heap, (const char *)file.data, file.bytes, path, out, &error);
    llmpar_file_unmap(&file);
    llmpar_heap_free(&ctx->heap, path);
    return llmpar__hf_fail(ctx, status, &error);
}

/* ---- loading ---- */

/* "[64, 2]" */
static const char *llmpar__hf_shape(const int64_t *shape, int32_t dims, char *text, size_t capacity)
{
    size_t used = (size_t)snprintf(text, capacity, "[");
    for (int32_t d = 0; d < dims && used < capacity; d++) used += (size_t)snprintf(text + used, capacity - used, "%s%lld", d ? ", " : "", (long long)shape[d]);
    if (used < capacity) snprintf(text + used, capacity - used, "]");
    return text;
}

/* Every parameter is there with its shape, and nothing else. */
static llmpar_status llmpar__hf_match(llmpar_fsdp *fsdp, const llmpar_safetensors *file)
{
    llmpar_ctx *ctx = llmpar_fsdp_mesh(fsdp)->ctx;
    int32_t matched = 0;
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(fsdp); u++) {
        const llmpar_unit *unit = llmpar_fsdp_unit(fsdp, u);
        for (int32_t i = 0; i < unit->param_count; i++) {
            const llmpar_param *param = &unit->params[i];
            const llmpar_safetensor *tensor = llmpar_safetensors_find(file, param->name);
            if (!tensor) return llmpar_fail(ctx, LLMPAR_ERR_FORMAT, "%s: tensor %s is missing", file->path, param->name);
            int same = tensor->dims == param->dims;
            for (int32_t d = 0; d < param->dims && same; d++) same = tensor->shape[d] == param->shape[d];
            if (!same) {
                char got[200], expected[200];
                return llmpar_fail(ctx, LLMPAR_ERR_FORMAT, "%s: tensor %s has shape %s, expected %s", file->path, param->name, llmpar__hf_shape(tensor->shape, tensor->dims, got, sizeof got),
                                   llmpar__hf_shape(param->shape, param->dims, expected, sizeof expected));
            }
            if (tensor->dtype != LLMPAR_F32 && tensor->dtype != LLMPAR_F64 && tensor->dtype != LLMPAR_BF16 && tensor->dtype != LLMPAR_F16)
                return llmpar_fail(ctx, LLMPAR_ERR_FORMAT, "%s: tensor %s has dtype %s, expected a floating type", file->path, param->name, llmpar_dtype_name(tensor->dtype));
            matched++;
        }
    }
    if (matched == file->count) return LLMPAR_OK;
    for (int32_t t = 0; t < file->count; t++) {
        int known = 0;
        for (int32_t u = 0; u < llmpar_fsdp_unit_count(fsdp) && !known; u++)
            for (int32_t i = 0; i < llmpar_fsdp_unit(fsdp, u)->param_count && !known; i++) known = !strcmp(file->tensor[t].name, llmpar_fsdp_unit(fsdp, u)->params[i].name);
        if (!known) return llmpar_fail(ctx, LLMPAR_ERR_FORMAT, "%s: tensor %s is not part of this model (%d parameters, %d tensors in the file)", file->path, file->tensor[t].name, (int)matched, (int)file->count);
    }
    return llmpar_fail(ctx, LLMPAR_ERR_INTERNAL, "%s: %d parameters, %d tensors", file->path, (int)matched, (int)file->count);
}

static llmpar_status llmpar__hf_load_unit(llmpar_fsdp *fsdp, const llmpar_safetensors *file, int32_t u, llmpar_stream *stream)
{
    llmpar_mesh *mesh = llmpar_fsdp_mesh(fsdp);
    llmpar_ctx *ctx = mesh->ctx;
    const llmpar_unit *unit = llmpar_fsdp_unit(fsdp, u);
    llmpar_dtype dtype = llmpar_fsdp_dtype(fsdp);
    int64_t elements;
    void *shard = llmpar_fsdp_shard(fsdp, u, &elements, NULL, NULL);
    size_t bytes = (size_t)elements * llmpar_dtype_size(dtype);
    void *host = llmpar_heap_alloc(&ctx->heap, 1, bytes);
    if (!host) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "%s: no memory to load unit %s (%lld elements)", file->path, unit->name, (long long)elements);
    llmpar_status status = ctx->device->copy(ctx->device, stream, host, shard, bytes);
    if (!status) status = ctx->device->synchronize(ctx->device, stream);
    for (int32_t i = 0; i < unit->param_count && !status; i++) {
        const llmpar_safetensor *source = llmpar_safetensors_find(file, unit->params[i].name);
        llmpar_dtensor tensor;
        llmpar_fsdp_dtensor(fsdp, u, i, &tensor);
        const void *data = file->data + source->begin;
        void *converted = NULL;
        size_t count = source->bytes / llmpar_dtype_size(source->dtype);
        if (source->dtype != dtype || (uintptr_t)data % 8) {
            converted = llmpar_heap_alloc(&ctx->heap, count, llmpar_dtype_size(dtype));
            if (!converted) status = llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "%s: no memory to convert %s", file->path, source->name);
            else if (source->dtype == dtype) memcpy(converted, data, source->bytes);
            else llmpar_convert(converted, dtype, data, source->dtype, count);
        }
        if (!status) llmpar_dtensor_cut(&tensor, mesh, converted ? converted : data, llmpar_fsdp_local(fsdp, u, i, host));
        llmpar_heap_free(&ctx->heap, converted);
    }
    if (!status) status = ctx->device->copy(ctx->device, stream, shard, host, bytes);
    if (!status) status = ctx->device->synchronize(ctx->device, stream);
    llmpar_heap_free(&ctx->heap, host);
    return status;
}

LLMPAR_DEF llmpar_status llmpar_hf_load(llmpar_fsdp *fsdp, const char *directory)
{
    llmpar_ctx *ctx = llmpar_fsdp_mesh(fsdp)->ctx;
    llmpar_safetensors *file = NULL;
    llmpar_stream *stream = NULL;
    llmpar_error error;
    llmpar_error_clear(&error);
    char *path = llmpar__hf_path(ctx, directory, "model.safetensors"), *index = llmpar__hf_path(ctx, directory, "model.safetensors.index.json");
    llmpar_status status = path && index ? LLMPAR_OK : LLMPAR_ERR_MEMORY;
    if (!status && !llmpar_is_file(path) && llmpar_is_file(index)) status = llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "%s: a model in several files; expected one model.safetensors", index);
    if (!status) status = llmpar__hf_fail(ctx, llmpar_safetensors_open(&ctx->heap, path, &file, &error), &error);
    if (!status) status = llmpar__hf_match(fsdp, file);
    if (!status) status = ctx->device->stream_create(ctx->device, "load", &stream);
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(fsdp) && !status; u++) status = llmpar__hf_load_unit(fsdp, file, u, stream);
    if (stream) ctx->device->stream_destroy(ctx->device, stream);
    llmpar_safetensors_close(file);
    llmpar_heap_free(&ctx->heap, index);
    llmpar_heap_free(&ctx->heap, path);
    return status;
}

/* ---- saving ---- */

struct llmpar_tensor_file {
    llmpar_fsdp *fsdp;
    llmpar_ctx *ctx;
    llmpar_stream *stream;
    llmpar_safetensors_writer *writer; /* world rank 0 */
    void *full, *scratch;              /* device: the largest tensor, and what redistribution needs */
    void *host;                        /* world rank 0: one tensor */
    int32_t next;                      /* unit */
};

/* Nobody goes on before rank 0's part went well; where it did not, the others hear of it here. */
static llmpar_status llmpar__hf_agree(llmpar_ctx *ctx, llmpar_stream *stream, llmpar_status status, const char *what)
{
    if (!status) status = llmpar_comm_barrier(ctx->comm, stream, what);
    return status ? status : ctx->device->synchronize(ctx->device, stream);
}

static llmpar_status llmpar__hf_declare(llmpar_tensor_file *file, const char *path)
{
    llmpar_ctx *ctx = file->ctx;
    llmpar_error error;
    int32_t count = 0, at = 0;
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(file->fsdp); u++) count += llmpar_fsdp_unit(file->fsdp, u)->param_count;
    llmpar_safetensor *tensors = (llmpar_safetensor *)llmpar_heap_zalloc(&ctx->heap, (size_t)count + 1, sizeof *tensors);
    if (!tensors) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "%s: no memory for the header", path);
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(file->fsdp); u++) {
        const llmpar_unit *unit = llmpar_fsdp_unit(file->fsdp, u);
        for (int32_t i = 0; i < unit->param_count; i++, at++) {
            tensors[at].name = unit->params[i].name;
            tensors[at].dtype = llmpar_fsdp_dtype(file->fsdp);
            tensors[at].dims = unit->params[i].dims;
            for (int32_t d = 0; d < unit->params[i].dims; d++) tensors[at].shape[d] = unit->params[i].shape[d];
        }
    }
    llmpar_error_clear(&error);
    llmpar_status status = llmpar_safetensors_writer_open(&ctx->heap, path, tensors, count, &file->writer, &error);
    llmpar_heap_free(&ctx->heap, tensors);
    return llmpar__hf_fail(ctx, status, &error);
}

LLMPAR_DEF llmpar_status llmpar_tensor_file_open(llmpar_fsdp *fsdp, const char *path, llmpar_tensor_file **out)
{
    llmpar_mesh *mesh = llmpar_fsdp_mesh(fsdp);
    llmpar_ctx *ctx = mesh->ctx;
    size_t size = llmpar_dtype_size(llmpar_fsdp_dtype(fsdp));
    int64_t most = 1, scratch = 1;
    *out = NULL;
    llmpar_tensor_file *file = (llmpar_tensor_file *)llmpar_heap_zalloc(&ctx->heap, 1, sizeof *file);
    if (!file) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "%s: out of memory", path);
    file->fsdp = fsdp;
    file->ctx = ctx;
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(fsdp); u++)
        for (int32_t i = 0; i < llmpar_fsdp_unit(fsdp, u)->param_count; i++) {
            llmpar_dtensor tensor;
            int64_t elements = 1, need;
            llmpar_fsdp_dtensor(fsdp, u, i, &tensor);
            for (int32_t d = 0; d < tensor.dims; d++) elements *= tensor.shape[d];
            need = llmpar_dtensor_full_scratch(&tensor, mesh);
            if (elements > most) most = elements;
            if (need > scratch) scratch = need;
        }
    llmpar_status status = ctx->device->stream_create(ctx->device, "save", &file->stream);
    if (!status) status = llmpar_arena_alloc(llmpar_fsdp_arena(fsdp), LLMPAR_TAG_COMMUNICATION, (size_t)most * size, "whole tensor", &file->full);
    if (!status) status = llmpar_arena_alloc(llmpar_fsdp_arena(fsdp), LLMPAR_TAG_COMMUNICATION, (size_t)scratch * size, "whole tensor scratch", &file->scratch);
    if (!status && ctx->rank == 0) {
        file->host = llmpar_heap_alloc(&ctx->heap, (size_t)most, size);
        status = file->host ? llmpar__hf_declare(file, path) : llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "%s: no memory for one tensor", path);
    }
    status = llmpar__hf_agree(ctx, file->stream, status, "save/open");
    if (status) {
        llmpar_tensor_file_abandon(file);
        return status;
    }
    *out = file;
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_tensor_file_write(llmpar_tensor_file *file, int32_t unit, const void *shard)
{
    llmpar_ctx *ctx = file->ctx;
    llmpar_mesh *mesh = llmpar_fsdp_mesh(file->fsdp);
    size_t size = llmpar_dtype_size(llmpar_fsdp_dtype(file->fsdp));
    llmpar_error error;
    llmpar_error_clear(&error);
    if (unit != file->next) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "save: unit %d, expected unit %d", (int)unit, (int)file->next);
    file->next++;
    llmpar_status status = LLMPAR_OK;
    for (int32_t i = 0; i < llmpar_fsdp_unit(file->fsdp, unit)->param_count && !status; i++) {
        llmpar_dtensor tensor;
        size_t bytes = size;
        llmpar_fsdp_dtensor(file->fsdp, unit, i, &tensor);
        for (int32_t d = 0; d < tensor.dims; d++) bytes *= (size_t)tensor.shape[d];
        status = llmpar_dtensor_full(&tensor, mesh, file->stream, llmpar_fsdp_local(file->fsdp, unit, i, (void *)(uintptr_t)shard), file->scratch, file->full);
        if (!status && file->writer) status = ctx->device->copy(ctx->device, file->stream, file->host, file->full, bytes);
        if (!status) status = ctx->device->synchronize(ctx->device, file->stream);
        if (!status && file->writer) status = llmpar__hf_fail(ctx, llmpar_safetensors_writer_write(file->writer, file->host, bytes, &error), &error);
    }
    return status;
}

LLMPAR_DEF llmpar_status llmpar_tensor_file_commit(llmpar_tensor_file *file)
{
    llmpar_ctx *ctx = file->ctx;
    llmpar_error error;
    llmpar_status status = LLMPAR_OK;
    llmpar_error_clear(&error);
    if (file->writer) status = llmpar__hf_fail(ctx, llmpar_safetensors_writer_commit(file->writer, &error), &error);
    file->writer = NULL;
    status = llmpar__hf_agree(ctx, file->stream, status, "save/commit");
    llmpar_tensor_file_abandon(file);
    return status;
}

LLMPAR_DEF void llmpar_tensor_file_abandon(llmpar_tensor_file *file)
{
    if (!file) return;
    if (file->stream) file->ctx->device->synchronize(file->ctx->device, file->stream); /* after a failure it may still write into what goes now */
    llmpar_arena_free(llmpar_fsdp_arena(file->fsdp), file->full);
    llmpar_arena_free(llmpar_fsdp_arena(file->fsdp), file->scratch);
    llmpar_safetensors_writer_abandon(file->writer);
    llmpar_heap_free(&file->ctx->heap, file->host);
    if (file->stream) file->ctx->device->stream_destroy(file->ctx->device, file->stream);
    llmpar_heap_free(&file->ctx->heap, file);
}

static llmpar_status llmpar__hf_write_config(llmpar_ctx *ctx, const llmpar_llama_config *config, const char *directory)
{
    llmpar_error error;
    llmpar_writer *writer = NULL;
    llmpar_status status = LLMPAR_OK;
    llmpar_error_clear(&error);
    size_t bytes = llmpar_llama_config_write(config, NULL, 0);
    char *text = (char *)llmpar_heap_alloc(&ctx->heap, 1, bytes + 1), *path = llmpar__hf_path(ctx, directory, "config.json");
    if (!text || !path) {
        status = llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "%s: out of memory for config.json", directory);
    } else {
        llmpar_llama_config_write(config, text, bytes + 1);
        status = llmpar_writer_open(&ctx->heap, path, &writer, &error);
        if (!status) status = llmpar_writer_write(writer, text, bytes, &error);
        if (!status) {
            status = llmpar_writer_commit(writer, &error);
            writer = NULL;
        }
        llmpar_writer_abandon(writer);
        status = llmpar__hf_fail(ctx, status, &error);
    }
    llmpar_heap_free(&ctx->heap, path);
    llmpar_heap_free(&ctx->heap, text);
    return status;
}

LLMPAR_DEF llmpar_status llmpar_hf_save(llmpar_fsdp *fsdp, const llmpar_llama_config *config, const char *directory)
{
    llmpar_ctx *ctx = llmpar_fsdp_mesh(fsdp)->ctx;
    llmpar_tensor_file *file = NULL;
    llmpar_status status = LLMPAR_OK;
    llmpar_error error;
    llmpar_error_clear(&error);
    if (ctx->rank == 0) status = llmpar__hf_fail(ctx, llmpar_directory_ensure(directory, &error), &error);
    char *path = status ? NULL : llmpar__hf_path(ctx, directory, "model.safetensors");
    if (!status && !path) status = LLMPAR_ERR_MEMORY;
    if (!status) status = llmpar_tensor_file_open(fsdp, path, &file);
    for (int32_t u = 0; u < llmpar_fsdp_unit_count(fsdp) && !status; u++) status = llmpar_tensor_file_write(file, u, llmpar_fsdp_shard(fsdp, u, NULL, NULL, NULL));
    /* When there is no room for the weights, a config.json of another model that stood here still stands. */
    if (!status && ctx->rank == 0) status = llmpar__hf_write_config(ctx, config, directory);
    if (!status) {
        status = llmpar_tensor_file_commit(file);
        file = NULL;
    }
    llmpar_tensor_file_abandon(file);
    llmpar_heap_free(&ctx->heap, path);
    return status;
}

#endif /* LLMPAR_NO_LLAMA, LLMPAR_NO_IO */

/* ==== src/run/launch.c ==== */
/* launch: rank threads, their contexts, and the root error.

   One rank's life, on its own thread (on the caller's for a world of one rank):
     name, floating-point state -> heap, device, communicator -> agreement with the others -> fn -> failure told to all, record written -> communicator and device destroyed
   The check hook runs when all ranks have ended, on the caller's thread, rank by rank.

   A rank that never comes back cannot be joined and must not lose its memory. So what the ranks share belongs to all of them and to the caller, and whoever leaves last frees it: if a rank is stuck
   the caller leaves first, with the error. */
/* ==== src/run/launch_internal.h ==== */
/* launch_internal: what both ways of making ranks share: launch.c (threads), launch_mpi.c (processes). */
#ifndef LLMPAR_LAUNCH_INTERNAL_H
#define LLMPAR_LAUNCH_INTERNAL_H


/* Rounding to nearest and no flush-to-zero: the library's results do not depend on what the application has set. Returns the state to restore. */
LLMPAR__PRIVATE uint64_t llmpar__launch_float_state(void);
LLMPAR__PRIVATE void llmpar__launch_float_restore(uint64_t state);
/* Checks the desc and fills in the defaults; ranks stays as it is where it is 0. */
LLMPAR__PRIVATE llmpar_status llmpar__launch_resolve(llmpar_launch_desc *desc, llmpar_cpu_level *level, llmpar_error *error);
/* All ranks compute alike, or all say who does not. */
LLMPAR__PRIVATE llmpar_status llmpar__launch_agree(llmpar_ctx *ctx);
/* Writes a rank's record, if there is one, to DIRECTORY/llmpar_rank_N.json, unless that is NULL or ""; what goes wrong is a warning. */
LLMPAR__PRIVATE void llmpar__launch_dump(const char *directory, const llmpar_ctx *ctx, llmpar_record *record);
/* Runs this process's rank where the job's ranks are MPI processes: 1, and *error is the result. 0: they are not. */
LLMPAR__PRIVATE int llmpar__launch_mpi(const llmpar_launch_desc *given, llmpar_rank_fn fn, void *user, llmpar_error *error);

#endif
/* ---- src/run/launch.c goes on ---- */

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#if defined(__linux__)
#include <sys/prctl.h>
#endif


#define LLMPAR__LAUNCH_STACK ((size_t)8 << 20) /* of a rank thread: musl's default is 128 KiB */
#define LLMPAR__LAUNCH_MAX_RANKS 4096
#define LLMPAR__LAUNCH_DEADLINE 600.0
#define LLMPAR__LAUNCH_PATH 999

typedef struct llmpar__launch_rank {
    llmpar_ctx ctx;
    struct llmpar__launch_job *job;
    pthread_t thread;
    int32_t stuck;  /* left running */
    char *returned; /* malloc: the record of a rank that returned, in case another one fails after it */
} llmpar__launch_rank;

/* What all ranks of one launch share; read-only while they run, but for `references`. */
typedef struct llmpar__launch_job {
    llmpar_launch_desc desc;
    llmpar_cpu_level level;
    llmpar_rank_fn fn;
    void *user;
    llmpar_heap heap; /* of the launching thread; the ranks' splits use it under the world's lock, and whoever frees the job */
    llmpar_threads_world *world;
    llmpar__launch_rank *rank;
    char record[LLMPAR__LAUNCH_PATH + 1]; /* directory, "" = none */
    int32_t references; /* atomic: the rank threads and the caller */
} llmpar__launch_job;

LLMPAR__PRIVATE_DEF uint64_t llmpar__launch_float_state(void)
{
#if defined(__x86_64__)
    unsigned old = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(old & ~(0x8000u | 0x6000u | 0x0040u)); /* FTZ, rounding, DAZ */
    return old;
#else
    uint64_t old;
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(old));
    __asm__ __volatile__("msr fpcr, %0" : : "r"(old & ~((uint64_t)0x3 << 22 | (uint64_t)1 << 24 | (uint64_t)1 << 19))); /* rounding, FZ, FZ16 */
    return old;
#endif
}

LLMPAR__PRIVATE_DEF void llmpar__launch_float_restore(uint64_t state)
{
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr((unsigned)state);
#else
    __asm__ __volatile__("msr fpcr, %0" : : "r"(state));
#endif
}

static void llmpar__launch_log(void *user, int rank, llmpar_log_level level, const char *line)
{
    (void)user;
    if (level == LLMPAR_LOG_INFO) return;
    fprintf(stderr, "llmpar: rank %d: %s%s\n", rank, level == LLMPAR_LOG_WARNING ? "warning: " : "", line);
}

/* FNV-1a over the bytes of small results: two ranks whose kernels differ (another level, another compiler) differ here. */
static llmpar_status llmpar__launch_self_test(llmpar_ctx *ctx, uint64_t *out)
{
    enum { M = 5, N = 19, K = 67 };
    llmpar_device *device = ctx->device;
    size_t floats = M * K + N * K + M * N, workspace_bytes;
    llmpar_gemm_segment segment[4];
    llmpar_gemm_args args;
    memset(&args, 0, sizeof args);
    memset(segment, 0, sizeof segment);
    float *a = (float *)llmpar_heap_alloc(&ctx->heap, floats, sizeof *a);
    if (!a) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "launch: out of memory for the self-test");
    float *b = a + M * K, *c = b + N * K;
    for (int i = 0; i < M * K + N * K; i++) a[i] = (float)((i * 7919 + 13) % 1009 - 504) * (1.0f / 333.0f);
    for (int i = 0; i < 4; i++) {
        int begin = i * K / 4;
        segment[i].a = a + begin;
        segment[i].b = b + begin;
        segment[i].lda = segment[i].ldb = K;
        segment[i].k = (i + 1) * K / 4 - begin;
        segment[i].piece = i;
    }
    args.m = M;
    args.n = N;
    args.c = c;
    args.ldc = N;
    args.segments = segment;
    args.segment_count = args.pieces = 4;
    args.kind = LLMPAR_GEMM_NT;
    args.dtype = LLMPAR_F32;
    workspace_bytes = device->gemm_workspace(device, &args);
    llmpar_stream *stream = NULL;
    llmpar_status st = device->alloc(device, workspace_bytes, &args.workspace);
    args.workspace_bytes = workspace_bytes;
    if (!st) st = device->stream_create(device, "self-test", &stream);
    if (!st) st = device->gemm(device, stream, &args);
    if (stream) {
        llmpar_status synchronized = device->synchronize(device, stream);
        if (!st) st = synchronized;
        device->stream_destroy(device, stream);
    }
    uint64_t hash = 0xcbf29ce484222325u;
    const unsigned char *bytes = (const unsigned char *)c;
    for (size_t i = 0; !st && i < M * N * sizeof *c; i++) hash = (hash ^ bytes[i]) * 0x100000001b3u;
    for (const char *p = device->name; *p; p++) hash = (hash ^ (unsigned char)*p) * 0x100000001b3u;
    device->free(device, args.workspace, workspace_bytes);
    llmpar_heap_free(&ctx->heap, a);
    *out = hash;
    return st;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__launch_agree(llmpar_ctx *ctx)
{
    if (ctx->world == 1) return LLMPAR_OK;
    uint64_t mine = 0, *all = (uint64_t *)llmpar_heap_zalloc(&ctx->heap, (size_t)ctx->world, sizeof *all);
    if (!all) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "launch: out of memory for %d ranks", (int)ctx->world);
    llmpar_status st = llmpar__launch_self_test(ctx, &mine);
    llmpar_stream *stream = NULL;
    if (!st) st = ctx->device->stream_create(ctx->device, "launch", &stream);
    if (!st) {
        llmpar_collective call;
        memset(&call, 0, sizeof call);
        call.send = &mine;
        call.recv = all;
        call.count = 1;
        call.dtype = LLMPAR_U64;
        call.tag = "launch/self_test";
        st = llmpar_all_gather(ctx->comm, stream, &call);
        llmpar_status synchronized = ctx->device->synchronize(ctx->device, stream);
        if (!st) st = synchronized;
        ctx->device->stream_destroy(ctx->device, stream);
    }
    for (int32_t i = 1; i < ctx->world && !st; i++)
        if (all[i] != all[0])
            st = llmpar_fail(ctx, LLMPAR_ERR_MISMATCH, "launch: the self-test gives other bits on rank %d (%016llx) than on rank 0 (%016llx); this rank's device is %s", (int)i,
                             (unsigned long long)all[i], (unsigned long long)all[0], ctx->device->name);
    llmpar_heap_free(&ctx->heap, all);
    return st;
}

/* text == NULL: there was no memory for it. */
static void llmpar__launch_write(const char *directory, const llmpar_ctx *ctx, const char *text)
{
    char path[1100], line[1280];
    snprintf(path, sizeof path, "%s/llmpar_rank_%d.json", directory, (int)ctx->rank);
    if (text) mkdir(directory, 0777); /* may be there */
    FILE *file = text ? fopen(path, "w") : NULL;
    int failed = !file || fputs(text, file) < 0;
    if (file && fclose(file)) failed = 1;
    snprintf(line, sizeof line, "the record could not be written to %s: %s", path, text ? strerror(errno) : "out of memory");
    if (failed && ctx->log) ctx->log(ctx->log_user, (int)ctx->rank, LLMPAR_LOG_WARNING, line);
}

/* malloc; NULL: no memory. */
static char *llmpar__launch_json(llmpar_record *record)
{
    size_t bytes = llmpar_record_json(record, NULL, 0) + 1;
    char *text = (char *)malloc(bytes);
    if (text) llmpar_record_json(record, text, bytes);
    return text;
}

LLMPAR__PRIVATE_DEF void llmpar__launch_dump(const char *directory, const llmpar_ctx *ctx, llmpar_record *record)
{
    if (!directory || !directory[0] || !record) return;
    char *text = llmpar__launch_json(record);
    llmpar__launch_write(directory, ctx, text);
    free(text);
}

/* The same for a rank that is stuck: its record belongs to its thread, which may yet go on. */
static void llmpar__launch_dump_stuck(const char *directory, const llmpar_ctx *ctx, llmpar_threads_world *world)
{
    if (!directory[0]) return;
    size_t bytes = llmpar_threads_rank_json(world, ctx->rank, NULL, 0) + 4096;
    char *text = (char *)malloc(bytes);
    if (!text || llmpar_threads_rank_json(world, ctx->rank, text, bytes)) llmpar__launch_write(directory, ctx, text);
    free(text);
}

/* What a rank that did not fail first has to say: whom it waited for, in which collective. A user's error needs no such lines: it says itself what was wrong. */
static void llmpar__launch_report(llmpar__launch_job *job, llmpar_ctx *ctx)
{
    llmpar_error root;
    char line[sizeof root.text + sizeof root.where + 4];
    llmpar_threads_world_error(job->world, &root);
    int plain = root.status != LLMPAR_ERR_TIMEOUT && root.status != LLMPAR_ERR_MISMATCH;
    snprintf(line, sizeof line, "%s%s%s%s", ctx->error.where[0] ? "(" : "", ctx->error.where, ctx->error.where[0] ? ") " : "", ctx->error.text);
    if (root.rank != ctx->rank && ctx->error.text[0]) llmpar_log(ctx, plain ? LLMPAR_LOG_INFO : LLMPAR_LOG_ERROR, "%s", line);
}

static void llmpar__launch_run(llmpar__launch_rank *self)
{
    llmpar__launch_job *job = self->job;
    llmpar_ctx *ctx = &self->ctx;
    llmpar_cpu_desc cpu;
    memset(&cpu, 0, sizeof cpu);
    cpu.threads = job->desc.threads;
    cpu.level = job->level;
    llmpar_status st = llmpar_cpu_create(&ctx->heap, &ctx->error, &cpu, &ctx->device);
    if (!st) st = llmpar_threads_comm_create(job->world, ctx->rank, &ctx->heap, ctx->device, &ctx->error, &ctx->comm);
    if (!st) st = llmpar__launch_agree(ctx);
    if (!st) st = job->fn(ctx, job->user);
    if (st) {
        llmpar_error error = ctx->error;
        if (error.status == LLMPAR_OK) llmpar_error_set(&error, st, "the rank's function returned \"%s\" without a text", llmpar_status_string(st));
        error.rank = ctx->rank;
        error.status = st;
        llmpar_threads_world_fail(job->world, &error);
        llmpar__launch_report(job, ctx);
        if (ctx->comm) llmpar__launch_dump(job->record, ctx, ctx->comm->record);
    } else if (job->record[0] && ctx->comm->record) {
        self->returned = llmpar__launch_json(ctx->comm->record);
    }
    llmpar_threads_rank_finished(job->world, ctx->rank);
    llmpar_comm_destroy(ctx->comm);
    llmpar_cpu_destroy(ctx->device);
    ctx->comm = NULL;
    ctx->device = NULL;
}

/* The last one out frees what all share. */
static void llmpar__launch_leave(llmpar__launch_job *job)
{
    if (__atomic_sub_fetch(&job->references, 1, __ATOMIC_ACQ_REL)) return;
    llmpar_heap heap = job->heap;
    for (int32_t i = 0; i < job->desc.ranks; i++) free(job->rank[i].returned);
    llmpar_threads_world_destroy(job->world); /* gives back to job->heap: its count is no longer looked at */
    llmpar_heap_free(&heap, job->rank);
    llmpar_heap_free(&heap, job);
}

static void *llmpar__launch_thread(void *arg)
{
    llmpar__launch_rank *self = (llmpar__launch_rank *)arg;
    char name[16];
    snprintf(name, sizeof name, "r%d", (int)self->ctx.rank);
#if defined(__linux__)
    prctl(PR_SET_NAME, name, 0, 0, 0);
#elif defined(__APPLE__)
    pthread_setname_np(name);
#endif
    llmpar__launch_float_state(); /* the thread ends with it */
    llmpar__launch_run(self);
    llmpar__launch_leave(self->job);
    return NULL;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__launch_resolve(llmpar_launch_desc *desc, llmpar_cpu_level *level, llmpar_error *error)
{
    if (desc->ranks < 0 || desc->ranks > LLMPAR__LAUNCH_MAX_RANKS)
        return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "launch: ranks = %d, expected 0 (all there are) to %d", (int)desc->ranks, LLMPAR__LAUNCH_MAX_RANKS);
    if (desc->threads < 0 || desc->threads > 1024) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "launch: threads = %d inside a rank, expected 0 (one) to 1024", (int)desc->threads);
    if (desc->deadline != desc->deadline) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "launch: the deadline is not a number, expected seconds, 0 (%g) or negative (none)", LLMPAR__LAUNCH_DEADLINE);
    if (desc->deadline <= 0) desc->deadline = desc->deadline < 0 ? 0 : LLMPAR__LAUNCH_DEADLINE; /* from here on 0 is none */
    if (!desc->record || !desc->record[0]) desc->record = getenv("LLMPAR_RECORD");
    if (desc->record && !desc->record[0]) desc->record = NULL;
    if (desc->record && strlen(desc->record) > LLMPAR__LAUNCH_PATH) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "launch: record: a path of %lu bytes, expected at most %d", (unsigned long)strlen(desc->record), LLMPAR__LAUNCH_PATH);
    if (!desc->threads) desc->threads = 1;
    if (!desc->log) desc->log = llmpar__launch_log;
    const char *variable = getenv("LLMPAR_CPU"), *text = desc->cpu && desc->cpu[0] ? desc->cpu : variable && variable[0] ? variable : NULL;
    *level = llmpar_cpu_best_level();
    if (text && !llmpar_cpu_level_parse(text, level)) {
        char choices[128];
        size_t used = 0;
        choices[0] = 0;
        for (int i = LLMPAR_CPU_PORTABLE; strcmp(llmpar_cpu_level_name((llmpar_cpu_level)i), "?") && used < sizeof choices; i++) {
            int n = snprintf(choices + used, sizeof choices - used, "%s%s", used ? ", " : "", llmpar_cpu_level_name((llmpar_cpu_level)i));
            used += n > 0 ? (size_t)n : 0;
        }
        return llmpar_error_set(error, LLMPAR_ERR_CONFIG, "launch: %s \"%s\" is not a dispatch level (%s)", text == variable ? "LLMPAR_CPU" : "cpu", text, choices);
    }
    return LLMPAR_OK;
}

/* Adds to the error which ranks are left running; the end of a long text makes room. */
static void llmpar__launch_stuck(const llmpar__launch_job *job, llmpar_error *error, int32_t started)
{
    char note[240] = "; stuck and left running, with their memory: ";
    size_t used = strlen(note), length = strlen(error->text);
    for (int32_t i = 0; i < started && used < sizeof note - 16; i++)
        if (job->rank[i].stuck) used += (size_t)snprintf(note + used, sizeof note - used, "rank %d ", (int)i);
    note[--used] = 0;
    if (length > sizeof error->text - 1 - used) length = sizeof error->text - 1 - used;
    memcpy(error->text + length, note, used + 1);
}

LLMPAR_DEF llmpar_status llmpar_launch(const llmpar_launch_desc *given, llmpar_rank_fn fn, void *user, llmpar_error *error)
{
    llmpar_error local;
    if (!error) error = &local;
    llmpar_error_clear(error);
    if (!fn) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "launch: no rank function");
    if (llmpar__launch_mpi(given, fn, user, error)) return error->status;
    llmpar_launch_desc desc;
    llmpar_cpu_level level;
    memset(&desc, 0, sizeof desc);
    if (given) desc = *given;
    llmpar_status st = llmpar__launch_resolve(&desc, &level, error);
    if (st) return st;

    int32_t ranks = desc.ranks ? desc.ranks : 1, started = 0, stuck = 0;
    desc.ranks = ranks;
    llmpar_heap heap;
    llmpar_heap_init(&heap, desc.allocator);
    llmpar__launch_job *job = (llmpar__launch_job *)llmpar_heap_zalloc(&heap, 1, sizeof *job);
    llmpar__launch_rank *rank = (llmpar__launch_rank *)llmpar_heap_zalloc(&heap, (size_t)ranks, sizeof *rank);
    if (!job || !rank) {
        llmpar_heap_free(&heap, rank);
        llmpar_heap_free(&heap, job);
        return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "launch: out of memory for %d ranks", (int)ranks);
    }
    job->desc = desc;
    job->level = level;
    job->fn = fn;
    job->user = user;
    job->heap = heap;
    job->rank = rank;
    job->references = 1;
    snprintf(job->record, sizeof job->record, "%s", desc.record ? desc.record : "");
    llmpar_threads_desc threads;
    memset(&threads, 0, sizeof threads);
    threads.ranks = ranks;
    threads.lockstep = desc.lockstep;
    threads.deadline = desc.deadline;
    threads.unchecked = desc.unchecked;
    st = llmpar_threads_world_create(&job->heap, &threads, &job->world, error);
    if (st) {
        llmpar__launch_leave(job);
        return st;
    }
    for (int32_t i = 0; i < ranks; i++) {
        llmpar_ctx *ctx = &rank[i].ctx;
        rank[i].job = job;
        ctx->rank = i;
        ctx->world = ranks;
        llmpar_heap_init(&ctx->heap, desc.allocator);
        llmpar_error_clear(&ctx->error);
        ctx->error.rank = i;
        ctx->log = desc.log;
        ctx->log_user = desc.log_user;
    }

    if (ranks == 1) {
        uint64_t state = llmpar__launch_float_state();
        llmpar__launch_run(&rank[0]);
        llmpar__launch_float_restore(state);
        started = 1;
    } else {
        pthread_attr_t attributes;
        int failed = pthread_attr_init(&attributes);
        if (!failed) {
            pthread_attr_setstacksize(&attributes, LLMPAR__LAUNCH_STACK);
            while (started < ranks && !failed) {
                __atomic_add_fetch(&job->references, 1, __ATOMIC_ACQ_REL);
                failed = pthread_create(&rank[started].thread, &attributes, llmpar__launch_thread, &rank[started]);
                if (failed) __atomic_sub_fetch(&job->references, 1, __ATOMIC_ACQ_REL);
                else started++;
            }
            pthread_attr_destroy(&attributes);
        }
        if (failed) {
            llmpar_error broken;
            llmpar_error_clear(&broken);
            llmpar_error_set(&broken, LLMPAR_ERR_INTERNAL, "launch: thread %d of %d could not be started (system error %d)", (int)started, (int)ranks, failed);
            broken.rank = started;
            llmpar_threads_world_fail(job->world, &broken);
            for (int32_t i = started; i < ranks; i++) llmpar_threads_rank_finished(job->world, i);
        }
        for (int32_t i = 0; i < started; i++) {
            rank[i].stuck = !llmpar_threads_rank_wait(job->world, i);
            stuck += rank[i].stuck;
            if (!rank[i].stuck) pthread_join(rank[i].thread, NULL);
        }
        for (int32_t i = 0; i < started && stuck; i++)
            if (rank[i].stuck) {
                llmpar__launch_dump_stuck(job->record, &rank[i].ctx, job->world);
                pthread_detach(rank[i].thread);
            }
    }
    for (int32_t i = 0; i < started && desc.check; i++)
        if (!rank[i].stuck) desc.check(&rank[i].ctx, user);
    llmpar_threads_world_error(job->world, error);
    for (int32_t i = 0; i < started && error->status; i++)
        if (!rank[i].stuck && rank[i].returned) llmpar__launch_write(job->record, &rank[i].ctx, rank[i].returned);
    if (stuck) llmpar__launch_stuck(job, error, started);
    llmpar__launch_leave(job);
    return error->status;
}

#undef LLMPAR__LAUNCH_STACK
#undef LLMPAR__LAUNCH_MAX_RANKS
#undef LLMPAR__LAUNCH_DEADLINE
#undef LLMPAR__LAUNCH_PATH
/* ==== src/run/launch_mpi.c ==== */
/* launch_mpi: this process as one rank of an MPI job, on the caller's thread:
     MPI initialised, if nobody has -> world -> heap, device, communicator -> lowest dispatch level, agreement -> fn -> failure told to all -> all have ended -> MPI finalised, if it was initialised here
   A rank that cannot even start takes part up to the first collective, so that the others hear why. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>


#ifdef LLMPAR_USE_MPI

#include <mpi.h>

/* Started by mpirun, mpiexec or srun? */
static int llmpar__launch_under_mpirun(void)
{
    static const char *const names[] = { "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_SIZE" };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (getenv(names[i])) return 1;
    return 0;
}

/* Device and communicator at a dispatch level. */
static llmpar_status llmpar__launch_furnish(llmpar_ctx *ctx, llmpar_mpi_world *world, const llmpar_launch_desc *desc, llmpar_cpu_level level)
{
    llmpar_cpu_desc cpu;
    memset(&cpu, 0, sizeof cpu);
    cpu.threads = desc->threads;
    cpu.level = level;
    llmpar_status st = llmpar_cpu_create(&ctx->heap, &ctx->error, &cpu, &ctx->device);
    return st ? st : llmpar_mpi_comm_create(world, ctx->device, &ctx->error, &ctx->comm);
}

static void llmpar__launch_clear(llmpar_ctx *ctx)
{
    llmpar_comm_destroy(ctx->comm);
    llmpar_cpu_destroy(ctx->device);
    ctx->comm = NULL;
    ctx->device = NULL;
}

/* The lowest dispatch level of all ranks: machines of a job may differ. */
static llmpar_status llmpar__launch_level(llmpar_ctx *ctx, llmpar_mpi_world *world, const llmpar_launch_desc *desc, llmpar_cpu_level level)
{
    llmpar_status st = llmpar__launch_furnish(ctx, world, desc, level);
    if (st || ctx->world == 1) return st;
    int64_t mine = -(int64_t)level, most = 0;
    llmpar_stream *stream = NULL;
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.send = &mine;
    call.recv = &most;
    call.count = 1;
    call.dtype = LLMPAR_I64;
    call.op = LLMPAR_MAX;
    call.tag = "launch/level";
    st = ctx->device->stream_create(ctx->device, "launch", &stream);
    if (st) return st;
    st = llmpar_all_reduce(ctx->comm, stream, &call);
    llmpar_status synchronized = ctx->device->synchronize(ctx->device, stream);
    ctx->device->stream_destroy(ctx->device, stream);
    if (!st) st = synchronized;
    if (st || most == mine) return st;
    llmpar__launch_clear(ctx);
    return llmpar__launch_furnish(ctx, world, desc, (llmpar_cpu_level)-most);
}

static llmpar_status llmpar__launch_process(llmpar_ctx *ctx, llmpar_mpi_world *world, const llmpar_launch_desc *desc, llmpar_cpu_level level, llmpar_rank_fn fn, void *user)
{
    if (desc->ranks && desc->ranks != ctx->world)
        return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "launch: ranks = %d, but there are %d MPI processes (mpirun -n %d)", (int)desc->ranks, (int)ctx->world, (int)desc->ranks);
    if (desc->lockstep && ctx->world > 1) return llmpar_fail(ctx, LLMPAR_ERR_UNSUPPORTED, "launch: lockstep is for ranks that are threads, not for MPI processes");
    if (desc->threads > 1 && !llmpar_mpi_world_serialized(world))
        return llmpar_fail(ctx, LLMPAR_ERR_CONFIG, "launch: threads = %d inside a rank, but MPI provides less than MPI_THREAD_SERIALIZED here or on another rank, which leaves a process one thread: ask MPI_Init_thread for it, or use threads = 1",
                           (int)desc->threads);
    llmpar_status st = llmpar__launch_level(ctx, world, desc, level);
    if (!st) st = llmpar__launch_agree(ctx);
    return st ? st : fn(ctx, user);
}

/* Runs the rank in an existing world. 1: all ranks have ended in order. */
static int llmpar__launch_rank_of(llmpar_ctx *ctx, llmpar_mpi_world *world, const llmpar_launch_desc *desc, llmpar_cpu_level level, llmpar_status st, llmpar_rank_fn fn, void *user, llmpar_error *root)
{
    ctx->error.rank = ctx->rank;
    if (!st) st = llmpar__launch_process(ctx, world, desc, level, fn, user);
    if (st) {
        llmpar_error error = ctx->error;
        if (error.status == LLMPAR_OK) llmpar_error_set(&error, st, "the rank's function returned \"%s\" without a text", llmpar_status_string(st));
        error.rank = ctx->rank;
        error.status = st;
        if (st != LLMPAR_ERR_PEER && ctx->error.status != LLMPAR_ERR_PEER) llmpar_mpi_world_fail(world, &error); /* another rank's failure by another name is still the other rank's */
        if (ctx->comm) llmpar__launch_dump(desc->record, ctx, ctx->comm->record);
        llmpar_mpi_world_error(world, root);
        int plain = root->status != LLMPAR_ERR_TIMEOUT && root->status != LLMPAR_ERR_MISMATCH; /* as among threads: an error that says itself what was wrong */
        int late = root->status == LLMPAR_ERR_TIMEOUT; /* the root's own report too: another survivor may end the job before launch returns here */
        if ((root->rank != ctx->rank || late) && error.text[0]) llmpar_log(ctx, plain ? LLMPAR_LOG_INFO : LLMPAR_LOG_ERROR, "%s%s%s%s", error.where[0] ? "(" : "", error.where, error.where[0] ? ") " : "", error.text);
    }
    int orderly = llmpar_mpi_world_finish(world, 0, root);
    llmpar__launch_clear(ctx);
    return orderly;
}

LLMPAR__PRIVATE_DEF int llmpar__launch_mpi(const llmpar_launch_desc *given, llmpar_rank_fn fn, void *user, llmpar_error *error)
{
    int there = 0, over = 0, owned, provided = 0, orderly = 1;
    MPI_Initialized(&there);
    MPI_Finalized(&over);
    llmpar_transport transport = given ? given->transport : LLMPAR_TRANSPORT_DEFAULT;
    if (given && given->mpi && transport == LLMPAR_TRANSPORT_DEFAULT) transport = LLMPAR_TRANSPORT_MPI;
    if (transport == LLMPAR_TRANSPORT_THREADS || (transport == LLMPAR_TRANSPORT_DEFAULT && !there && !llmpar__launch_under_mpirun())) return 0;
    owned = !there && !(given && given->mpi && given->mpi->comm); /* with a communicator MPI has to be there: world_create says so */
    if (owned) MPI_Init_thread(NULL, NULL, MPI_THREAD_SERIALIZED, &provided);

    llmpar_ctx ctx;
    llmpar_mpi_desc mpi;
    llmpar_launch_desc desc;
    llmpar_cpu_level level = LLMPAR_CPU_DEFAULT;
    llmpar_mpi_world *world = NULL;
    memset(&ctx, 0, sizeof ctx);
    memset(&mpi, 0, sizeof mpi);
    memset(&desc, 0, sizeof desc);
    if (given) desc = *given;
    if (desc.mpi) mpi = *desc.mpi;
    llmpar_error_clear(&ctx.error);
    llmpar_heap_init(&ctx.heap, desc.allocator);
    llmpar_status st = llmpar__launch_resolve(&desc, &level, &ctx.error);
    mpi.deadline = !st && desc.deadline > 0 ? desc.deadline : 0;
    mpi.unchecked = desc.unchecked;
    ctx.log = desc.log;
    ctx.log_user = desc.log_user;
    if (!llmpar_mpi_world_create(&ctx.heap, &mpi, &world, error)) {
        uint64_t state = llmpar__launch_float_state();
        ctx.rank = llmpar_mpi_world_rank(world);
        ctx.world = llmpar_mpi_world_ranks(world);
        orderly = llmpar__launch_rank_of(&ctx, world, &desc, level, st, fn, user, error);
        llmpar__launch_float_restore(state);
        llmpar_mpi_world_destroy(world);
        if (desc.check) desc.check(&ctx, user);
    }
    if (owned && orderly) MPI_Finalize();
    if (owned && !orderly) {
        llmpar_log(&ctx, LLMPAR_LOG_ERROR, "the job ends here: rank %d%s%s%s: %s", (int)error->rank, error->where[0] ? " (" : "", error->where, error->where[0] ? ")" : "", error->text);
        MPI_Abort(MPI_COMM_WORLD, 1);
    }
    return 1;
}

#else

LLMPAR__PRIVATE_DEF int llmpar__launch_mpi(const llmpar_launch_desc *given, llmpar_rank_fn fn, void *user, llmpar_error *error)
{
    (void)fn;
    (void)user;
    if (!given || (given->transport != LLMPAR_TRANSPORT_MPI && !given->mpi)) return 0;
    llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "launch: ranks as MPI processes are asked for, but the implementation was compiled without LLMPAR_USE_MPI");
    return 1;
}

#endif /* LLMPAR_USE_MPI */
/* ==== src/run/parallelize.c ==== */
/* ==== src/run/trainer_internal.h ==== */
/* trainer_internal: the trainer's state, made by parallelize.c, driven by trainer.c, reported by metrics.c. */
#ifndef LLMPAR_TRAINER_INTERNAL_H
#define LLMPAR_TRAINER_INTERNAL_H


#if !defined(LLMPAR_NO_LLAMA) && !defined(LLMPAR_NO_IO) && !defined(LLMPAR_NO_TEXT)

struct llmpar_trainer {
    llmpar_ctx *ctx;
    llmpar_mesh *mesh;
    llmpar_llama *model;
    llmpar_trainer_desc desc;       /* resolved; strings are copies */
    llmpar_fsdp *fsdp;
    llmpar_adamw *adamw;
    llmpar_schedule *train, *eval;
    llmpar_mapped file;
    llmpar_data data;
    int64_t local;                  /* sequences of this rank in one micro-batch */
    int32_t *ids, *targets;         /* device [grad_accum * local, T] */
    int32_t *staging;               /* host [T + 1], then [2][local * T] */
    llmpar_micro *micro;            /* [grad_accum] */
    llmpar_stream *stream;
    int64_t steps;
    char *gradients;                /* path of the next step's gradients, or NULL */
    llmpar_tensor_file *gradient_file;
    void *log;                      /* FILE of the JSON lines, world rank 0 */
    double peak_flops;              /* all ranks' own matrix products at once, FLOP/s */
    int progress;                   /* a progress line is on the terminal */
};

LLMPAR__PRIVATE double llmpar__run_seconds(void); /* monotonic */
LLMPAR__PRIVATE llmpar_status llmpar__metrics_open(llmpar_trainer *trainer);
LLMPAR__PRIVATE void llmpar__metrics_close(llmpar_trainer *trainer);
/* Console line, progress line and log line of a step; world rank 0. */
LLMPAR__PRIVATE llmpar_status llmpar__metrics_step(llmpar_trainer *trainer, const llmpar_step *step);
/* Sets trainer->peak_flops. Collective. */
LLMPAR__PRIVATE llmpar_status llmpar__metrics_peak(llmpar_trainer *trainer);

#endif /* LLMPAR_NO_LLAMA, LLMPAR_NO_IO, LLMPAR_NO_TEXT */

#endif
/* ---- src/run/parallelize.c goes on ---- */

#include <stdio.h>
#include <string.h>


#if !defined(LLMPAR_NO_LLAMA) && !defined(LLMPAR_NO_IO) && !defined(LLMPAR_NO_TEXT)

/* ---- what was asked for, checked ---- */

static int64_t llmpar__recipe_leaves(int64_t batch) /* the largest power of two that divides it */
{
    return batch & -batch;
}

/* The guarantee of docs/exact.md, or the numbers that break it. */
static llmpar_status llmpar__recipe_exact(const llmpar_trainer_desc *desc, const llmpar_mesh *mesh, llmpar_error *error)
{
    int32_t tp = mesh->degree[LLMPAR_AXIS_TP];
    int64_t leaves = llmpar__recipe_leaves(desc->batch), cuts = (int64_t)mesh->dp_ranks * desc->grad_accum;
    if (!llmpar_is_pow2(tp) || desc->canon % tp)
        return llmpar_error_set(error, LLMPAR_ERR_MESH, "exact = require: tp = %d is not a power of two that divides the %d canonical pieces, so sums over tp depend on it", (int)tp, (int)desc->canon);
    if (!llmpar_is_pow2(mesh->dp_ranks) || !llmpar_is_pow2(desc->grad_accum) || leaves % cuts)
        return llmpar_error_set(error, LLMPAR_ERR_MESH, "exact = require: %d data ranks x grad_accum %d is not a power of two that divides the %lld leaves of batch %lld (its largest power of two), so sums over the batch depend on it",
                                (int)mesh->dp_ranks, (int)desc->grad_accum, (long long)leaves, (long long)desc->batch);
    return LLMPAR_OK;
}

static llmpar_status llmpar__recipe_numbers(const llmpar_trainer_desc *d, llmpar_error *error)
{
    if (d->data && d->sequence) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "trainer: data and sequence are both set, expected one");
    if (d->seq_len < 1 || d->seq_len > ((int64_t)1 << 24)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "trainer: seq_len = %lld, expected 1 .. %d", (long long)d->seq_len, 1 << 24);
    if (d->grad_accum < 1 || d->grad_accum > (1 << 16)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "trainer: grad_accum = %d, expected 1 .. %d", (int)d->grad_accum, 1 << 16);
    if (d->batch < 1 || d->batch > ((int64_t)1 << 30)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "trainer: batch = %lld, expected 1 .. %d", (long long)d->batch, 1 << 30);
    if (d->prefetch < 0 || d->prefetch > 64) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "trainer: prefetch = %d, expected 0 .. 64", (int)d->prefetch);
    if (!(d->lr > 0) || !llmpar_isfinite_f64(d->lr)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "trainer: lr = %g, expected a positive number", d->lr);
    if (!(d->lr_min >= 0 && d->lr_min <= d->lr)) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "trainer: lr_min = %g, expected 0 .. lr = %g", d->lr_min, d->lr);
    if (d->warmup < 0 || d->total_steps < 0) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "trainer: warmup = %lld, total_steps = %lld, expected 0 or more", (long long)d->warmup, (long long)d->total_steps);
    if ((int)d->exact < 0 || (int)d->exact > LLMPAR_EXACT_REQUIRE) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "trainer: exact = %d, expected one of llmpar_exact", (int)d->exact);
    if (!llmpar_is_pow2(d->canon) || d->canon > 64) return llmpar_error_set(error, LLMPAR_ERR_ARGUMENT, "trainer: canon = %d, expected a power of two up to 64", (int)d->canon);
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_trainer_desc_resolve(llmpar_trainer_desc *d, const llmpar_mesh *mesh, const llmpar_llama_config *config, llmpar_error *error)
{
    if (d->grad_accum == 0) d->grad_accum = 1;
    if (d->batch == 0 && d->grad_accum > 0) d->batch = (int64_t)mesh->dp_ranks * d->grad_accum;
    if (d->exact == LLMPAR_EXACT_DEFAULT) d->exact = LLMPAR_EXACT_ON;
    if (d->exact == LLMPAR_EXACT_OFF) d->canon = 1;
    if (d->canon == 0) d->canon = 8;
    if (d->zero == LLMPAR_ZERO_DEFAULT) d->zero = LLMPAR_ZERO_3;
    if (d->dtype == LLMPAR_DTYPE_DEFAULT) d->dtype = LLMPAR_F32;
    if (d->lr == 0) d->lr = 1e-3;
    if (d->lr_min == 0) d->lr_min = d->lr / 10;
    if (d->held_out == 0) d->held_out = 0.05;
    if (d->log_every == 0) d->log_every = 10;
    llmpar_adamw_desc_resolve(&d->adamw);
    llmpar_status status = llmpar__recipe_numbers(d, error);
    if (!status) status = llmpar_adamw_desc_check(&d->adamw, error);
    if (status) return status;
    int64_t cuts = (int64_t)mesh->dp_ranks * d->grad_accum;
    if (d->batch % cuts)
        return llmpar_error_set(error, LLMPAR_ERR_MESH, "trainer: batch = %lld is not divisible by %d data ranks (dp_replicate %d x dp_shard %d) x grad_accum %d = %lld", (long long)d->batch, (int)mesh->dp_ranks,
                                (int)mesh->degree[LLMPAR_AXIS_DP_REPLICATE], (int)mesh->degree[LLMPAR_AXIS_DP_SHARD], (int)d->grad_accum, (long long)cuts);
    if (d->seq_len > config->max_positions)
        return llmpar_error_set(error, LLMPAR_ERR_CONFIG, "trainer: seq_len = %lld, expected at most the model's max_position_embeddings = %d", (long long)d->seq_len, (int)config->max_positions);
    if (d->data && config->vocab < 256) return llmpar_error_set(error, LLMPAR_ERR_CONFIG, "trainer: bytes as tokens need a vocabulary of at least 256, the model has %d", (int)config->vocab);
    return d->exact == LLMPAR_EXACT_REQUIRE ? llmpar__recipe_exact(d, mesh, error) : LLMPAR_OK;
}

/* ---- the steps of the recipe ---- */

static llmpar_status llmpar__recipe_data(llmpar_trainer *t)
{
    llmpar_data_desc desc;
    llmpar_error error;
    if (!t->desc.data) return LLMPAR_OK;
    llmpar_error_clear(&error);
    llmpar_status status = llmpar_file_map(t->desc.data, &t->file, &error);
    memset(&desc, 0, sizeof desc);
    desc.bytes = t->file.data;
    desc.count = t->file.bytes;
    desc.seq_len = t->desc.seq_len;
    desc.seed = llmpar_llama_seed(t->model);
    desc.held_out = t->desc.held_out;
    desc.name = t->desc.data;
    if (!status) status = llmpar_data_init(&desc, &t->data, &error);
    if (status) return llmpar_fail(t->ctx, status, "%s", error.text);
    t->desc.sequence = llmpar_data_sequence;
    t->desc.sequence_user = &t->data;
    return LLMPAR_OK;
}

static llmpar_status llmpar__recipe_schedule(llmpar_trainer *t, int32_t forward_only, llmpar_schedule **out)
{
    int32_t count;
    llmpar_unit *units = llmpar_llama_units(t->model, &count);
    llmpar_policy policy;
    memset(&policy, 0, sizeof policy);
    llmpar_fsdp_policy(t->fsdp, &policy);
    policy.micro_batches = t->desc.grad_accum;
    policy.no_sync = t->desc.no_sync;
    policy.prefetch = t->desc.prefetch;
    policy.forward_only = forward_only;
    llmpar_status status = llmpar_schedule_create(&t->ctx->heap, units, count, &policy, out, &t->ctx->error);
    if (!status) status = llmpar_schedule_validate(&t->ctx->heap, (*out)->list, (*out)->count, units, count, &(*out)->policy, &t->ctx->error);
    return status;
}

static llmpar_status llmpar__recipe_buffers(llmpar_trainer *t)
{
    llmpar_heap *heap = &t->ctx->heap;
    int64_t rows = t->local * t->desc.seq_len;
    size_t all = (size_t)(rows * t->desc.grad_accum) * sizeof(int32_t);
    void *ids = NULL, *targets = NULL;
    llmpar_status status = llmpar_arena_alloc(llmpar_fsdp_arena(t->fsdp), LLMPAR_TAG_ACTIVATIONS, all, "token ids", &ids);
    if (!status) status = llmpar_arena_alloc(llmpar_fsdp_arena(t->fsdp), LLMPAR_TAG_ACTIVATIONS, all, "targets", &targets);
    if (!status) status = t->ctx->device->stream_create(t->ctx->device, "data", &t->stream);
    if (status) return status;
    t->ids = (int32_t *)ids;
    t->targets = (int32_t *)targets;
    t->staging = (int32_t *)llmpar_heap_alloc(heap, (size_t)(2 * rows + t->desc.seq_len + 1), sizeof(int32_t));
    t->micro = (llmpar_micro *)llmpar_heap_zalloc(heap, (size_t)t->desc.grad_accum, sizeof *t->micro);
    if (!t->staging || !t->micro) return llmpar_fail(t->ctx, LLMPAR_ERR_MEMORY, "trainer: no memory for %lld tokens a micro-batch", (long long)rows);
    for (int32_t m = 0; m < t->desc.grad_accum; m++) {
        t->micro[m].batch = t->local;
        t->micro[m].t = t->desc.seq_len;
        t->micro[m].leaves = t->desc.exact == LLMPAR_EXACT_OFF ? 1 : llmpar__recipe_leaves(t->local);
        t->micro[m].ids = t->ids + m * rows;
        t->micro[m].targets = t->targets + m * rows;
    }
    return LLMPAR_OK;
}

static llmpar_status llmpar__recipe(llmpar_trainer *t)
{
    llmpar_llama_apply_desc apply;
    llmpar_fsdp_desc fsdp;
    int32_t count;
    memset(&apply, 0, sizeof apply);
    memset(&fsdp, 0, sizeof fsdp);
    /* Files first: data missing or short, or a log that cannot be written, is found before memory is taken. */
    llmpar_status status = llmpar__recipe_data(t);
    if (!status) status = llmpar__metrics_open(t);
    if (status) return status;
    /* Tensor parallelism: the model gets its axis. */
    apply.canon = t->desc.canon;
    apply.sequence_parallel = t->desc.sequence_parallel;
    apply.dtype = t->desc.dtype;
    apply.positions = t->desc.seq_len;
    status = llmpar_llama_apply(t->model, t->mesh->comm[LLMPAR_AXIS_TP], &apply);
    if (status) return status;
    /* FSDP: the model's units become flat shards. */
    llmpar_unit *units = llmpar_llama_units(t->model, &count);
    fsdp.zero = t->desc.zero;
    fsdp.dtype = t->desc.dtype;
    fsdp.memory_limit = t->desc.memory_limit;
    fsdp.seed = llmpar_llama_seed(t->model);
    status = llmpar_fsdp_create(t->mesh, units, count, &fsdp, &t->fsdp);
    if (status || !t->desc.sequence) return status; /* without data: load, save, generate */
    /* What a step does, as a list, proved before it ever runs. */
    status = llmpar__recipe_schedule(t, 0, &t->train);
    if (!status) status = llmpar__recipe_schedule(t, 1, &t->eval);
    /* The optimizer on the shards, the step's tokens, the metrics. */
    if (!status) status = llmpar_adamw_create(t->fsdp, &t->desc.adamw, &t->adamw);
    if (!status) status = llmpar__recipe_buffers(t);
    return status ? status : llmpar__metrics_peak(t);
}

LLMPAR_DEF llmpar_status llmpar_parallelize(llmpar_mesh *mesh, llmpar_llama *model, const llmpar_trainer_desc *desc, llmpar_trainer **out)
{
    llmpar_ctx *ctx = mesh->ctx;
    llmpar_trainer_desc resolved = *desc;
    llmpar_error error;
    *out = NULL;
    llmpar_error_clear(&error);
    llmpar_status status = llmpar_trainer_desc_resolve(&resolved, mesh, llmpar_llama_get_config(model), &error);
    if (status) return llmpar_fail(ctx, status, "%s", error.text);
    llmpar_trainer *t = (llmpar_trainer *)llmpar_heap_zalloc(&ctx->heap, 1, sizeof *t);
    if (!t) return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "trainer: out of memory");
    t->ctx = ctx;
    t->mesh = mesh;
    t->model = model;
    t->desc = resolved;
    t->desc.data = desc->data ? llmpar_heap_strdup(&ctx->heap, desc->data) : NULL;
    t->desc.log = desc->log ? llmpar_heap_strdup(&ctx->heap, desc->log) : NULL;
    t->local = t->desc.batch / ((int64_t)mesh->dp_ranks * t->desc.grad_accum);
    if ((desc->data && !t->desc.data) || (desc->log && !t->desc.log)) status = llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "trainer: out of memory");
    if (!status) status = llmpar__recipe(t);
    if (status) {
        llmpar_trainer_destroy(t);
        return status;
    }
    *out = t;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_trainer_destroy(llmpar_trainer *t)
{
    if (!t) return;
    llmpar_heap *heap = &t->ctx->heap;
    llmpar__metrics_close(t);
    llmpar_tensor_file_abandon(t->gradient_file);
    if (t->stream) t->ctx->device->synchronize(t->ctx->device, t->stream); /* its failure was reported where it happened */
    if (t->fsdp) {
        llmpar_arena_free(llmpar_fsdp_arena(t->fsdp), t->ids);
        llmpar_arena_free(llmpar_fsdp_arena(t->fsdp), t->targets);
    }
    llmpar_adamw_destroy(t->adamw);
    llmpar_schedule_destroy(t->train);
    llmpar_schedule_destroy(t->eval);
    if (t->stream) t->ctx->device->stream_destroy(t->ctx->device, t->stream);
    llmpar_fsdp_destroy(t->fsdp);
    llmpar_file_unmap(&t->file);
    llmpar_heap_free(heap, t->staging);
    llmpar_heap_free(heap, t->micro);
    llmpar_heap_free(heap, t->gradients);
    llmpar_heap_free(heap, (void *)(uintptr_t)t->desc.data);
    llmpar_heap_free(heap, (void *)(uintptr_t)t->desc.log);
    llmpar_heap_free(heap, t);
}

LLMPAR_DEF llmpar_fsdp *llmpar_trainer_fsdp(llmpar_trainer *t) { return t->fsdp; }
LLMPAR_DEF const llmpar_schedule *llmpar_trainer_schedule(const llmpar_trainer *t) { return t->train; }
LLMPAR_DEF const llmpar_data *llmpar_trainer_data(const llmpar_trainer *t) { return t->desc.data ? &t->data : NULL; }
LLMPAR_DEF llmpar_status llmpar_load_hf(llmpar_trainer *t, const char *directory) { return llmpar_hf_load(t->fsdp, directory); }
LLMPAR_DEF llmpar_status llmpar_save_hf(llmpar_trainer *t, const char *directory) { return llmpar_hf_save(t->fsdp, llmpar_llama_get_config(t->model), directory); }

#endif /* LLMPAR_NO_LLAMA, LLMPAR_NO_IO, LLMPAR_NO_TEXT */
/* ==== src/run/trainer.c ==== */

#include <string.h>

#if !defined(LLMPAR_NO_LLAMA) && !defined(LLMPAR_NO_IO) && !defined(LLMPAR_NO_TEXT)

/* Index within the step of sequence j of micro-batch m on this data rank; docs/exact.md, "The batch":
     sync     | m0: r0 r1 | m1: r0 r1 |      every micro-batch is reduced over the ranks
     no_sync  | r0: m0 m1 | r1: m0 m1 |      every rank sums its own first */
static int64_t llmpar__trainer_index(const llmpar_trainer *t, int32_t m, int64_t j)
{
    int64_t ranks = t->mesh->dp_ranks, rank = t->mesh->dp_rank, part = t->desc.no_sync ? rank * t->desc.grad_accum + m : m * ranks + rank;
    return part * t->local + j;
}

/* One sequence into ids and targets of a micro-batch; counts its targets. mask: a sequence that only fills up the batch. */
static llmpar_status llmpar__trainer_sequence(llmpar_trainer *t, int64_t index, int held_out, int mask, int32_t *ids, int32_t *targets, int64_t *counted)
{
    llmpar_ctx *ctx = t->ctx;
    int64_t length = t->desc.seq_len;
    int32_t vocab = llmpar_llama_get_config(t->model)->vocab, *tokens = t->staging;
    llmpar_status status = held_out ? llmpar_data_eval_sequence(&t->data, mask ? 0 : index, tokens) : t->desc.sequence(t->desc.sequence_user, index, tokens);
    if (status) return llmpar_fail(ctx, status, "sequence %lld: the data source failed (%s)", (long long)index, llmpar_status_string(status));
    for (int64_t i = 0; i <= length; i++) {
        /* A negative token is a target that is not counted; as an input it stands for id 0. */
        if (tokens[i] >= vocab) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "sequence %lld: token id %d at position %lld, expected at most %d", (long long)index, (int)tokens[i], (long long)i, (int)vocab - 1);
        if (i < length) ids[i] = tokens[i] < 0 ? 0 : tokens[i];
        if (i > 0) {
            targets[i - 1] = mask || tokens[i] < 0 ? -1 : tokens[i];
            *counted += targets[i - 1] >= 0;
        }
    }
    return LLMPAR_OK;
}

/* All tokens of a step (first = global index of its first sequence), or of a group of held-out sequences below `limit`. */
static llmpar_status llmpar__trainer_tokens(llmpar_trainer *t, int64_t first, int held_out, int64_t limit, int64_t *counted)
{
    llmpar_device *device = t->ctx->device;
    int64_t length = t->desc.seq_len, rows = t->local * length;
    int32_t *ids = t->staging + length + 1, *targets = ids + rows;
    llmpar_status status = LLMPAR_OK;
    *counted = 0;
    for (int32_t m = 0; m < t->desc.grad_accum && !status; m++) {
        for (int64_t j = 0; j < t->local && !status; j++) {
            int64_t index = first + llmpar__trainer_index(t, m, j);
            status = llmpar__trainer_sequence(t, index, held_out, held_out && index >= limit, ids + j * length, targets + j * length, counted);
        }
        if (!status) status = device->copy(device, t->stream, t->ids + m * rows, ids, (size_t)rows * sizeof *ids);
        if (!status) status = device->copy(device, t->stream, t->targets + m * rows, targets, (size_t)rows * sizeof *ids);
        if (!status) status = device->synchronize(device, t->stream);
    }
    return status;
}

static llmpar_status llmpar__trainer_gradient(void *user, llmpar_fsdp *fsdp, int32_t unit, const void *shard)
{
    (void)fsdp;
    return llmpar_tensor_file_write(((llmpar_trainer *)user)->gradient_file, unit, shard);
}

LLMPAR_DEF llmpar_status llmpar_trainer_save_gradients(llmpar_trainer *t, const char *path)
{
    if (!t->train) return llmpar_fail(t->ctx, LLMPAR_ERR_ARGUMENT, "trainer: made without data, it cannot step");
    llmpar_heap_free(&t->ctx->heap, t->gradients);
    t->gradients = llmpar_heap_strdup(&t->ctx->heap, path);
    return t->gradients ? LLMPAR_OK : llmpar_fail(t->ctx, LLMPAR_ERR_MEMORY, "trainer: out of memory");
}

/* As it was before any error: the rank's place stays. */
static void llmpar__trainer_forget(llmpar_error *error)
{
    llmpar_error old = *error;
    llmpar_error_clear(error);
    error->rank = old.rank;
    memcpy(error->where, old.where, sizeof old.where);
}

static void llmpar__trainer_rates(const llmpar_trainer *t, llmpar_step *out)
{
    llmpar_arena_usage usage;
    llmpar_arena_get_usage(llmpar_fsdp_arena(t->fsdp), &usage);
    double positions = (double)t->desc.batch * (double)t->desc.seq_len;
    out->tokens_per_second = out->seconds > 0 ? positions / out->seconds : 0;
    out->tflops = out->tokens_per_second * llmpar_llama_flops_per_token(llmpar_llama_get_config(t->model), t->desc.seq_len) * 1e-12;
    out->mfu = t->peak_flops > 0 ? out->tflops * 1e12 / t->peak_flops : 0;
    out->memory = usage.peak_total;
}

LLMPAR_DEF llmpar_status llmpar_trainer_step(llmpar_trainer *t, llmpar_step *out)
{
    llmpar_step step;
    llmpar_run run;
    memset(&step, 0, sizeof step);
    memset(&run, 0, sizeof run);
    if (!t->train) return llmpar_fail(t->ctx, LLMPAR_ERR_ARGUMENT, "trainer: made without data, it cannot step");
    double begin = llmpar__run_seconds();
    step.step = t->steps + 1;
    step.lr = llmpar_lr_cosine(t->desc.lr, t->desc.lr_min, t->desc.warmup, t->desc.total_steps, step.step);
    llmpar_status status = llmpar__trainer_tokens(t, t->steps * t->desc.batch, 0, 0, &run.tokens);
    if (!status && t->gradients) {
        status = llmpar_tensor_file_open(t->fsdp, t->gradients, &t->gradient_file);
        llmpar_heap_free(&t->ctx->heap, t->gradients); /* asked for once, also if it cannot be opened */
        t->gradients = NULL;
    }
    if (status) return status;
    run.micro = t->micro;
    run.optimizer = llmpar_adamw_optimizer(t->adamw);
    if (t->gradient_file) {
        run.on_gradient = llmpar__trainer_gradient;
        run.on_gradient_user = t;
    }
    llmpar_adamw_set_lr(t->adamw, step.lr);
    /* The first error of a rank stays; one that the caller has lived with must not stand for this step's. */
    llmpar_error earlier = t->ctx->error, *error = &t->ctx->error;
    llmpar__trainer_forget(error);
    status = llmpar_fsdp_run(t->fsdp, t->train->list, t->train->count, &run);
    if (status == LLMPAR_ERR_NONFINITE) { /* the step's number goes in front */
        llmpar_error first = *error;
        llmpar__trainer_forget(error);
        llmpar_fail(t->ctx, status, "step %lld: %s", (long long)step.step, first.text);
    }
    if (!status) *error = earlier;
    if (t->gradient_file) {
        if (!status) status = llmpar_tensor_file_commit(t->gradient_file);
        else llmpar_tensor_file_abandon(t->gradient_file);
        t->gradient_file = NULL;
    }
    if (status) return status;
    t->steps++;
    step.tokens = run.global_tokens;
    step.loss = run.loss;
    step.grad_norm = run.grad_norm;
    step.skipped = run.skipped;
    step.seconds = llmpar__run_seconds() - begin;
    llmpar__trainer_rates(t, &step);
    if (step.skipped) llmpar_log(t->ctx, LLMPAR_LOG_WARNING, "step %lld: no token counts, nothing was updated", (long long)step.step);
    if (out) *out = step;
    return llmpar__metrics_step(t, &step);
}

LLMPAR_DEF llmpar_status llmpar_trainer_eval(llmpar_trainer *t, int64_t max_sequences, double *loss)
{
    *loss = 0;
    if (!t->desc.data || !t->data.eval_windows) return llmpar_fail(t->ctx, LLMPAR_ERR_ARGUMENT, "trainer: no held-out sequences to evaluate on");
    int64_t limit = max_sequences > 0 && max_sequences < t->data.eval_windows ? max_sequences : t->data.eval_windows, tokens = 0;
    double sum = 0;
    llmpar_status status = LLMPAR_OK;
    /* Groups as large as a training batch; the last one is filled up with sequences that do not count. */
    for (int64_t first = 0; first < limit && !status; first += t->desc.batch) {
        llmpar_run run;
        memset(&run, 0, sizeof run);
        status = llmpar__trainer_tokens(t, first, 1, limit, &run.tokens);
        run.micro = t->micro;
        if (!status) status = llmpar_fsdp_run(t->fsdp, t->eval->list, t->eval->count, &run);
        sum += run.loss * (double)run.global_tokens;
        tokens += run.global_tokens;
    }
    if (!status) *loss = sum / (double)tokens;
    return status;
}

#endif /* LLMPAR_NO_LLAMA, LLMPAR_NO_IO, LLMPAR_NO_TEXT */
/* ==== src/run/metrics.c ==== */

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#if !defined(LLMPAR_NO_LLAMA) && !defined(LLMPAR_NO_IO) && !defined(LLMPAR_NO_TEXT)

LLMPAR__PRIVATE_DEF double llmpar__run_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Metrics to stdout; progress in place on stderr, if that is a terminal. */
static void llmpar__metrics_sink(void *user, llmpar_sink_kind kind, const char *line)
{
    (void)user;
    int terminal = isatty(2);
    if (kind == LLMPAR_SINK_METRICS) {
        if (terminal) fputs("\r\033[K", stderr);
        printf("%s\n", line);
        fflush(stdout);
    } else if (terminal) {
        fprintf(stderr, "\r\033[K%s", line);
        fflush(stderr);
    }
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__metrics_open(llmpar_trainer *t)
{
    if (!t->desc.sink) t->desc.sink = llmpar__metrics_sink;
    if (t->ctx->rank || !t->desc.log) return LLMPAR_OK;
    /* Only tried here, before any work. It begins with the first line: a start that fails leaves no file, and an older log as it was. */
    int file = open(t->desc.log, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666), created = file >= 0;
    if (file < 0 && errno == EEXIST) file = open(t->desc.log, O_WRONLY | O_CLOEXEC);
    if (file < 0) return llmpar_fail(t->ctx, LLMPAR_ERR_IO, "%s: cannot open for writing: %s", t->desc.log, strerror(errno));
    close(file);
    if (created) unlink(t->desc.log);
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF void llmpar__metrics_close(llmpar_trainer *t)
{
    if (t->progress) t->desc.sink(t->desc.sink_user, LLMPAR_SINK_PROGRESS, "");
    if (t->log) fclose((FILE *)t->log); /* every line was flushed and checked when written */
    t->log = NULL;
    t->progress = 0;
}

static llmpar_status llmpar__metrics_log(llmpar_trainer *t, const llmpar_step *step)
{
    if (!t->log) t->log = fopen(t->desc.log, "w");
    FILE *file = (FILE *)t->log;
    llmpar_arena_usage usage;
    if (!file) return llmpar_fail(t->ctx, LLMPAR_ERR_IO, "%s: cannot open for writing: %s", t->desc.log, strerror(errno));
    llmpar_arena_get_usage(llmpar_fsdp_arena(t->fsdp), &usage);
    fprintf(file, "{\"step\":%lld,\"loss\":%.9g,\"grad_norm\":%.9g,\"lr\":%.9g,\"tokens_per_second\":%.6g,\"mfu\":%.6g,\"memory\":{", (long long)step->step, step->loss, step->grad_norm, step->lr, step->tokens_per_second, step->mfu);
    for (int tag = 0; tag < LLMPAR_TAG_COUNT; tag++) fprintf(file, "\"%s\":%llu,", llmpar_tag_name((llmpar_tag)tag), (unsigned long long)usage.peak[tag]);
    fprintf(file, "\"total\":%llu}}\n", (unsigned long long)usage.peak_total);
    if (fflush(file) || ferror(file)) return llmpar_fail(t->ctx, LLMPAR_ERR_IO, "%s: cannot write step %lld: %s", t->desc.log, (long long)step->step, strerror(errno));
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__metrics_step(llmpar_trainer *t, const llmpar_step *step)
{
    char line[256];
    if (t->ctx->rank) return LLMPAR_OK;
    double gib = (double)step->memory / (1024.0 * 1024.0 * 1024.0), percent = 100.0 * step->mfu;
    long long tps = (long long)(step->tokens_per_second + 0.5);
    if (t->desc.log_every > 0 && (step->step == 1 || step->step % t->desc.log_every == 0)) {
        snprintf(line, sizeof line, "step: %5lld  loss: %8.5f  grad_norm: %8.4f  memory: %6.3fGiB  tps: %lld  tflops: %.4f  mfu: %.2f%%", (long long)step->step, step->loss, step->grad_norm, gib, tps, step->tflops, percent);
        t->desc.sink(t->desc.sink_user, LLMPAR_SINK_METRICS, line);
    }
    if (t->desc.log_every > 0) {
        if (t->desc.total_steps > 0) {
            int64_t left = t->desc.total_steps - step->step;
            snprintf(line, sizeof line, "step %lld/%lld  loss %.4f  %lld tokens/s  %.0f s left", (long long)step->step, (long long)t->desc.total_steps, step->loss, tps, (double)(left > 0 ? left : 0) * step->seconds);
        } else {
            snprintf(line, sizeof line, "step %lld  loss %.4f  %lld tokens/s", (long long)step->step, step->loss, tps);
        }
        t->desc.sink(t->desc.sink_user, LLMPAR_SINK_PROGRESS, line);
        t->progress = 1;
    }
    return t->desc.log ? llmpar__metrics_log(t, step) : LLMPAR_OK;
}

/* What MFU is measured against: a square product on every rank at once, the best of a few tries. */
LLMPAR__PRIVATE_DEF llmpar_status llmpar__metrics_peak(llmpar_trainer *t)
{
    enum { SIDE = 256, TRIES = 3 };
    llmpar_ctx *ctx = t->ctx;
    llmpar_device *device = ctx->device;
    llmpar_arena *arena = llmpar_fsdp_arena(t->fsdp);
    llmpar_gemm_args args;
    llmpar_gemm_segment segment;
    void *data = NULL, *workspace = NULL, *rate = NULL;
    size_t size = llmpar_dtype_size(t->desc.dtype), matrix = (size_t)SIDE * SIDE * size;
    memset(&args, 0, sizeof args);
    memset(&segment, 0, sizeof segment);
    segment.k = segment.lda = segment.ldb = SIDE;
    args.m = args.n = args.ldc = SIDE;
    args.segments = &segment;
    args.segment_count = args.pieces = 1;
    args.kind = LLMPAR_GEMM_NT;
    args.dtype = t->desc.dtype;
    args.workspace_bytes = device->gemm_workspace(device, &args);
    llmpar_status status = llmpar_arena_alloc(arena, LLMPAR_TAG_WORKSPACE, 3 * matrix, "peak", &data);
    if (!status) status = llmpar_arena_alloc(arena, LLMPAR_TAG_WORKSPACE, args.workspace_bytes, "peak", &workspace);
    if (!status) status = llmpar_arena_alloc(arena, LLMPAR_TAG_WORKSPACE, sizeof(double), "peak", &rate);
    if (!status) status = device->zero(device, t->stream, data, 3 * matrix);
    segment.a = data;
    segment.b = (char *)data + matrix;
    args.c = (char *)data + 2 * matrix;
    args.workspace = workspace;
    double best = 0;
    for (int i = 0; i < TRIES && !status; i++) {
        status = llmpar_comm_barrier(ctx->comm, t->stream, "peak");
        if (!status) status = device->synchronize(device, t->stream);
        double begin = llmpar__run_seconds();
        if (!status) status = device->gemm(device, t->stream, &args);
        if (!status) status = device->synchronize(device, t->stream);
        double flops = 2.0 * (double)SIDE * (double)SIDE * (double)SIDE / (llmpar__run_seconds() - begin + 1e-9);
        if (i > 0 && flops > best) best = flops; /* the first one warms up */
    }
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.send = call.recv = rate;
    call.count = 1;
    call.dtype = LLMPAR_F64;
    call.tag = "peak";
    if (!status) status = device->copy(device, t->stream, rate, &best, sizeof best);
    if (!status) status = llmpar_all_reduce(ctx->comm, t->stream, &call);
    if (!status) status = device->copy(device, t->stream, &t->peak_flops, rate, sizeof best);
    llmpar_status waited = device->synchronize(device, t->stream); /* in any case: the stream may use what goes now */
    if (!status) status = waited;
    llmpar_arena_free(arena, rate);
    llmpar_arena_free(arena, workspace);
    llmpar_arena_free(arena, data);
    llmpar_arena_reset_peaks(arena);
    return status;
}

#endif /* LLMPAR_NO_LLAMA, LLMPAR_NO_IO, LLMPAR_NO_TEXT */

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
#elif LLMPAR__TEMPLATE == 1
#undef LLMPAR__TEMPLATE
/* ==== src/cpu/gemm_portable.inc ==== */
/* gemm_portable: the specification of a matrix product, in plain loops. Everything faster computes these sums in this order.
   Parameters: LLMPAR__GEMM_REAL the element type, LLMPAR__GEMM_ROW the name of the function that is made,
   LLMPAR__GEMM_MULTIPLY_ADD(a, b, sum) one step of a chain. */

/* Row `i` of c. A few columns at a time, so that their chains, which do not touch each other, overlap in the processor. */
static void LLMPAR__GEMM_ROW(void *arg, int64_t i, int32_t worker)
{
    enum { COLUMNS = 8 };
    const llmpar_gemm_args *args = (const llmpar_gemm_args *)arg;
    LLMPAR__GEMM_REAL *c = (LLMPAR__GEMM_REAL *)args->c + i * args->ldc;
    int64_t j0;
    (void)worker;
    for (j0 = 0; j0 < args->n; j0 += COLUMNS) {
        LLMPAR__GEMM_REAL stack[32][COLUMNS]; /* partial sums of whole subtrees; pieces < 2^31 */
        int depth = 0, j, columns = args->n - j0 < COLUMNS ? (int)(args->n - j0) : (int)COLUMNS;
        int32_t piece, s = 0;
        for (piece = 0; piece < args->pieces; piece++) {
            LLMPAR__GEMM_REAL *sum = stack[depth++];
            int32_t done;
            for (j = 0; j < COLUMNS; j++) sum[j] = args->accumulate && j < columns ? c[j0 + j] : 0;
            for (; s < args->segment_count && args->segments[s].piece == piece; s++) {
                const llmpar_gemm_segment *segment = &args->segments[s];
                const LLMPAR__GEMM_REAL *a = (const LLMPAR__GEMM_REAL *)segment->a, *b = (const LLMPAR__GEMM_REAL *)segment->b;
                int64_t a_row = args->kind == LLMPAR_GEMM_TN ? 1 : segment->lda, a_k = args->kind == LLMPAR_GEMM_TN ? segment->lda : 1;
                int64_t b_column = args->kind == LLMPAR_GEMM_NT ? segment->ldb : 1, b_k = args->kind == LLMPAR_GEMM_NT ? 1 : segment->ldb;
                int64_t k;
                for (k = 0; k < segment->k; k++) {
                    LLMPAR__GEMM_REAL x = a[i * a_row + k * a_k];
                    for (j = 0; j < columns; j++) sum[j] = LLMPAR__GEMM_MULTIPLY_ADD(x, b[(j0 + j) * b_column + k * b_k], sum[j]);
                }
            }
            /* The tree, like a binary counter: after piece p, as many subtrees are complete as p + 1 has trailing zero bits. */
            for (done = piece + 1; done % 2 == 0; done /= 2) {
                depth--;
                for (j = 0; j < COLUMNS; j++) stack[depth - 1][j] = stack[depth - 1][j] + stack[depth][j];
            }
        }
        for (; depth > 1; depth--)
            for (j = 0; j < COLUMNS; j++) stack[depth - 2][j] = stack[depth - 2][j] + stack[depth - 1][j];
        for (j = 0; j < columns; j++) c[j0 + j] = stack[0][j];
    }
}

#undef LLMPAR__GEMM_REAL
#undef LLMPAR__GEMM_ROW
#undef LLMPAR__GEMM_MULTIPLY_ADD
#elif LLMPAR__TEMPLATE == 2
#undef LLMPAR__TEMPLATE
/* ==== src/cpu/gemm_kernel.inc ==== */
/* gemm_kernel: packing, and the register tile of one vector width. Included by gemm.c once a width. Parameters:
     LLMPAR__GEMM_NAME(part)         name of a function of this width
     LLMPAR__GEMM_TARGET             attributes that allow the instructions
     LLMPAR__GEMM_VECTOR             vector of LLMPAR__GEMM_LANES floats; LLMPAR__GEMM_LOOSE: the same, aligned like a float
     LLMPAR__GEMM_ROWS               rows of a tile; it has 2 * LANES columns, so 2 * ROWS accumulators, and some registers must be left
     LLMPAR__GEMM_SPREAD(x)          x in every lane
     LLMPAR__GEMM_MULTIPLY_ADD(a, b, sum)
     LLMPAR__GEMM_TRANSPOSE(in, ld, out, width)   out[k * width + r] = in[r * ld + k], r < 4, k < LANES */

#define LLMPAR__GEMM_COLUMNS (2 * LLMPAR__GEMM_LANES)
#define LLMPAR__GEMM_AT(pointer) (*(LLMPAR__GEMM_LOOSE *)(void *)(pointer))
#define LLMPAR__GEMM_READ(pointer) (*(const LLMPAR__GEMM_LOOSE *)(const void *)(pointer))

/* Packs `panels` neighbours, `distance` floats apart. A panel is out[k, width]: the `width` rows (or columns) of a tile side by side for each k. Rows from `valid` on,
   in the last panel, are zero: they fill the tile and are never stored. transposed: in[panels * width, k], else in[k, panels * width]. */
static inline __attribute__((always_inline)) LLMPAR__GEMM_TARGET void LLMPAR__GEMM_NAME(pack)(const llmpar__gemm_packing *packing, const int width)
{
    const float *in = packing->in;
    int64_t ld = packing->ld, k = packing->k, distance = packing->distance, full = packing->valid / width, panel, i;
    int r;
    if (full > packing->panels) full = packing->panels;
    if (packing->transposed) {
        for (panel = 0; panel < full; panel++) {
            const float *rows = in + panel * width * ld;
            float *out = packing->out + panel * distance;
            for (i = 0; i + LLMPAR__GEMM_LANES <= k; i += LLMPAR__GEMM_LANES) {
                for (r = 0; r + 4 <= width; r += 4) {
                    int ahead;
                    for (ahead = 0; ahead < 4; ahead++) __builtin_prefetch(rows + (r + ahead) * ld + i + 64);
                    LLMPAR__GEMM_TRANSPOSE(rows + r * ld + i, ld, out + i * width + r, width);
                }
                for (; r < width; r++) {
                    int lane;
                    for (lane = 0; lane < LLMPAR__GEMM_LANES; lane++) out[(i + lane) * width + r] = rows[r * ld + i + lane];
                }
            }
            for (; i < k; i++)
                for (r = 0; r < width; r++) out[i * width + r] = rows[r * ld + i];
        }
    } else {
        for (i = 0; i < k; i++) /* whole rows at a time, which memory likes */
            for (panel = 0; panel < full; panel++) {
                __builtin_prefetch(in + (i + 8) * ld + panel * width);
                if (width > 16) __builtin_prefetch(in + (i + 8) * ld + panel * width + 16);
                memcpy(packing->out + panel * distance + i * width, in + i * ld + panel * width, sizeof(float) * (size_t)width);
            }
    }
    if (full < packing->panels) {
        int64_t row_step = packing->transposed ? ld : 1, k_step = packing->transposed ? 1 : ld;
        float *out = packing->out + full * distance;
        for (i = 0; i < k; i++)
            for (r = 0; r < width; r++) out[i * width + r] = full * width + r < packing->valid ? in[(full * width + r) * row_step + i * k_step] : 0.0f;
    }
}

LLMPAR__GEMM_TARGET static void LLMPAR__GEMM_NAME(pack_a)(const llmpar__gemm_packing *packing) { LLMPAR__GEMM_NAME(pack)(packing, LLMPAR__GEMM_ROWS); }
LLMPAR__GEMM_TARGET static void LLMPAR__GEMM_NAME(pack_b)(const llmpar__gemm_packing *packing) { LLMPAR__GEMM_NAME(pack)(packing, LLMPAR__GEMM_COLUMNS); }

/* Keeps gcc from loading the next k so early that accumulators are moved out of its way. */
#define LLMPAR__GEMM_IN_ORDER() __asm__ __volatile__("" : : : "memory")

/* One k of a tile: sum[r, :] gets a[k, r] * b[k, :]. Both panels come from L2, so what the next k will need is asked for. */
#define LLMPAR__GEMM_LINK(i) do { \
    __builtin_prefetch(b + ((i) + 8) * LLMPAR__GEMM_COLUMNS); \
    if (LLMPAR__GEMM_COLUMNS > 16) __builtin_prefetch(b + ((i) + 8) * LLMPAR__GEMM_COLUMNS + 16); \
    if ((i) % 2 == 0 || LLMPAR__GEMM_ROWS > 8) __builtin_prefetch(a + ((i) + 32) * LLMPAR__GEMM_ROWS); \
    LLMPAR__GEMM_VECTOR b0 = LLMPAR__GEMM_READ(b + (i) * LLMPAR__GEMM_COLUMNS), b1 = LLMPAR__GEMM_READ(b + (i) * LLMPAR__GEMM_COLUMNS + LLMPAR__GEMM_LANES); \
    for (r = 0; r < rows; r++) { \
        LLMPAR__GEMM_VECTOR x = LLMPAR__GEMM_SPREAD(a[(i) * LLMPAR__GEMM_ROWS + r]); \
        sum[r][0] = LLMPAR__GEMM_MULTIPLY_ADD(x, b0, sum[r][0]); \
        sum[r][1] = LLMPAR__GEMM_MULTIPLY_ADD(x, b1, sum[r][1]); \
    } \
} while (0)

/* The first `rows` (a constant) rows of a tile through all steps of a block. Every accumulator lane is one chain in k order. */
static inline __attribute__((always_inline)) LLMPAR__GEMM_TARGET void LLMPAR__GEMM_NAME(chains)(const llmpar__gemm_tile *tile, const int rows, float *c, int64_t ldc)
{
    const float *a = tile->a, *b = tile->b;
    int64_t s;
    int row;
    for (row = 0; row < rows && tile->store; row++) { /* c comes from memory while the chains run */
        __builtin_prefetch(c + row * ldc, 1);
        __builtin_prefetch(c + row * ldc + LLMPAR__GEMM_COLUMNS - 1, 1);
    }
    for (s = 0; s < tile->step_count; s++) {
        const llmpar__gemm_step *step = &tile->steps[s];
        LLMPAR__GEMM_VECTOR sum[LLMPAR__GEMM_ROWS][2];
        float *slot;
        int64_t k;
        int32_t merge;
        int r;
        if (s == 0 && tile->load) {
            for (r = 0; r < rows; r++) {
                sum[r][0] = LLMPAR__GEMM_READ(c + r * ldc);
                sum[r][1] = LLMPAR__GEMM_READ(c + r * ldc + LLMPAR__GEMM_LANES);
            }
        } else {
            for (r = 0; r < rows; r++) sum[r][0] = sum[r][1] = LLMPAR__GEMM_SPREAD(0.0f);
        }
        for (k = step->k; k >= 4 && rows == LLMPAR__GEMM_ROWS; k -= 4) { /* unrolled where it counts */
            LLMPAR__GEMM_LINK(0);
            LLMPAR__GEMM_IN_ORDER();
            LLMPAR__GEMM_LINK(1);
            LLMPAR__GEMM_IN_ORDER();
            LLMPAR__GEMM_LINK(2);
            LLMPAR__GEMM_IN_ORDER();
            LLMPAR__GEMM_LINK(3);
            a += 4 * LLMPAR__GEMM_ROWS;
            b += 4 * LLMPAR__GEMM_COLUMNS;
        }
        for (; k > 0; k--) {
            LLMPAR__GEMM_LINK(0);
            a += LLMPAR__GEMM_ROWS;
            b += LLMPAR__GEMM_COLUMNS;
        }
        for (merge = 0; merge < step->merges; merge++) {
            slot = (merge < step->merges - step->merges_saved ? tile->stack : tile->saved) + (step->depth - 1 - merge) * (LLMPAR__GEMM_ROWS * LLMPAR__GEMM_COLUMNS);
            for (r = 0; r < rows; r++) {
                sum[r][0] = LLMPAR__GEMM_READ(slot + r * LLMPAR__GEMM_COLUMNS) + sum[r][0];
                sum[r][1] = LLMPAR__GEMM_READ(slot + r * LLMPAR__GEMM_COLUMNS + LLMPAR__GEMM_LANES) + sum[r][1];
            }
        }
        slot = (step->save ? tile->saved : tile->stack) + (step->depth - step->merges) * (LLMPAR__GEMM_ROWS * LLMPAR__GEMM_COLUMNS);
        if (s == tile->step_count - 1 && tile->store) {
            for (r = 0; r < rows; r++) {
                LLMPAR__GEMM_AT(c + r * ldc) = sum[r][0];
                LLMPAR__GEMM_AT(c + r * ldc + LLMPAR__GEMM_LANES) = sum[r][1];
            }
        } else {
            for (r = 0; r < rows; r++) {
                LLMPAR__GEMM_AT(slot + r * LLMPAR__GEMM_COLUMNS) = sum[r][0];
                LLMPAR__GEMM_AT(slot + r * LLMPAR__GEMM_COLUMNS + LLMPAR__GEMM_LANES) = sum[r][1];
            }
        }
    }
}

/* A tile at the edge of c works on a copy, so that the code is the same for every element. */
LLMPAR__GEMM_TARGET static void LLMPAR__GEMM_NAME(tile)(const llmpar__gemm_tile *tile)
{
    float edge[LLMPAR__GEMM_ROWS * LLMPAR__GEMM_COLUMNS] __attribute__((aligned(64)));
    int compiled = tile->rows <= 1 ? 1 : tile->rows <= 2 ? 2 : tile->rows <= 4 ? 4 : tile->rows <= 8 && LLMPAR__GEMM_ROWS > 8 ? 8 : LLMPAR__GEMM_ROWS;
    int is_edge = tile->rows < compiled || tile->columns < LLMPAR__GEMM_COLUMNS, r, j;
    float *c = is_edge ? edge : tile->c;
    int64_t ldc = is_edge ? (int64_t)LLMPAR__GEMM_COLUMNS : tile->ldc;
    if (is_edge && tile->load)
        for (r = 0; r < compiled; r++)
            for (j = 0; j < LLMPAR__GEMM_COLUMNS; j++) edge[r * LLMPAR__GEMM_COLUMNS + j] = r < tile->rows && j < tile->columns ? tile->c[r * tile->ldc + j] : 0.0f;
    switch (compiled) {
    case 1: LLMPAR__GEMM_NAME(chains)(tile, 1, c, ldc); break;
    case 2: LLMPAR__GEMM_NAME(chains)(tile, 2, c, ldc); break;
    case 4: LLMPAR__GEMM_NAME(chains)(tile, 4, c, ldc); break;
#if LLMPAR__GEMM_ROWS > 8
    case 8: LLMPAR__GEMM_NAME(chains)(tile, 8, c, ldc); break;
#endif
#if LLMPAR__GEMM_ROWS != 4
    default: LLMPAR__GEMM_NAME(chains)(tile, LLMPAR__GEMM_ROWS, c, ldc); break;
#endif
    }
    if (is_edge && tile->store)
        for (r = 0; r < tile->rows; r++)
            for (j = 0; j < tile->columns; j++) tile->c[r * tile->ldc + j] = edge[r * LLMPAR__GEMM_COLUMNS + j];
}

#undef LLMPAR__GEMM_LINK
#undef LLMPAR__GEMM_IN_ORDER
#undef LLMPAR__GEMM_COLUMNS
#undef LLMPAR__GEMM_AT
#undef LLMPAR__GEMM_READ
#undef LLMPAR__GEMM_NAME
#undef LLMPAR__GEMM_TARGET
#undef LLMPAR__GEMM_VECTOR
#undef LLMPAR__GEMM_LOOSE
#undef LLMPAR__GEMM_LANES
#undef LLMPAR__GEMM_ROWS
#undef LLMPAR__GEMM_SPREAD
#undef LLMPAR__GEMM_MULTIPLY_ADD
#undef LLMPAR__GEMM_TRANSPOSE
#elif LLMPAR__TEMPLATE == 3
#undef LLMPAR__TEMPLATE
/* ==== src/cpu/vector_portable.inc ==== */
/* vector_portable: the vector functions in plain vector extensions. Parameters: LLMPAR__VLEVEL, portable or portable_f64; LLMPAR__VSPREAD(x), x for every lane.
   load_n and store_n touch only the first n elements, n < 0 counts as 0; keep(x, n, other) takes the first n lanes of x and the rest of
   other; less(a, b, yes, no) is a < b ? yes : no; larger is max, and the second operand where one is NaN;
   larger_lane is the largest lane, any lane if one is NaN; transpose is of 8 x 8. */
LLMPAR__VINLINE LLMPAR__VEC LLMPAR__V(splat)(LLMPAR__VREAL x)
{
    LLMPAR__VEC y = LLMPAR__VSPREAD(x);
    return y;
}
LLMPAR__VINLINE LLMPAR__VEC LLMPAR__V(load)(const LLMPAR__VREAL *p) { return (LLMPAR__VEC)*(const LLMPAR__VPASTE(llmpar__loose_, LLMPAR__VLEVEL) *)p; }
LLMPAR__VINLINE void LLMPAR__V(store)(LLMPAR__VREAL *p, LLMPAR__VEC x) { *(LLMPAR__VPASTE(llmpar__loose_, LLMPAR__VLEVEL) *)p = x; }
LLMPAR__VINLINE LLMPAR__VEC LLMPAR__V(load_n)(const LLMPAR__VREAL *p, int64_t n)
{
    LLMPAR__VEC y = { 0 };
    if (n >= LLMPAR__VLANES) return LLMPAR__V(load)(p);
    if (n > 0) memcpy(&y, p, (size_t)n * sizeof *p);
    return y;
}
LLMPAR__VINLINE void LLMPAR__V(store_n)(LLMPAR__VREAL *p, int64_t n, LLMPAR__VEC x)
{
    if (n >= LLMPAR__VLANES) LLMPAR__V(store)(p, x);
    else if (n > 0) memcpy(p, &x, (size_t)n * sizeof *p);
}
LLMPAR__VINLINE LLMPAR__VEC LLMPAR__V(keep)(LLMPAR__VEC x, int64_t n, LLMPAR__VEC other)
{
    if (n >= LLMPAR__VLANES) return x;
    if (n > 0) memcpy(&other, &x, (size_t)n * sizeof(LLMPAR__VREAL));
    return other;
}
LLMPAR__VINLINE LLMPAR__VEC LLMPAR__V(fma)(LLMPAR__VEC a, LLMPAR__VEC b, LLMPAR__VEC c) { return a * b + c; }
LLMPAR__VINLINE LLMPAR__VEC LLMPAR__V(select)(LLMPAR__VBITS mask, LLMPAR__VEC yes, LLMPAR__VEC no) { return (LLMPAR__VEC)(((LLMPAR__VBITS)yes & mask) | ((LLMPAR__VBITS)no & ~mask)); }
LLMPAR__VINLINE LLMPAR__VEC LLMPAR__V(less)(LLMPAR__VEC a, LLMPAR__VEC b, LLMPAR__VEC yes, LLMPAR__VEC no) { return LLMPAR__V(select)((LLMPAR__VBITS)(a < b), yes, no); }
LLMPAR__VINLINE LLMPAR__VEC LLMPAR__V(nan)(LLMPAR__VEC a, LLMPAR__VEC yes, LLMPAR__VEC no) { return LLMPAR__V(select)((LLMPAR__VBITS)(a != a), yes, no); }
LLMPAR__VINLINE LLMPAR__VEC LLMPAR__V(larger)(LLMPAR__VEC a, LLMPAR__VEC b) { return LLMPAR__V(select)((LLMPAR__VBITS)(a > b), a, b); }
LLMPAR__VINLINE LLMPAR__VREAL LLMPAR__V(larger_lane)(LLMPAR__VEC x)
{
    LLMPAR__VREAL y = x[0];
    for (int k = 1; k < LLMPAR__VLANES; k++) y = y > x[k] ? y : x[k];
    return y;
}
LLMPAR__VINLINE void LLMPAR__V(transpose)(LLMPAR__VREAL *out, int64_t ld_out, const LLMPAR__VREAL *in, int64_t ld_in)
{
    for (int i = 0; i < 8; i++) for (int j = 0; j < 8; j++) out[j * ld_out + i] = in[i * ld_in + j];
}
#undef LLMPAR__VLEVEL
#undef LLMPAR__VSPREAD
#elif LLMPAR__TEMPLATE == 4
#undef LLMPAR__TEMPLATE
/* ==== src/cpu/vector_math.inc ==== */
/* vector_math: exp, horizontal sums and the balanced tree, written once for every level. Parameters: LLMPAR__VLEVEL, LLMPAR__VDOUBLE (1: f64). */
#if LLMPAR__VBUILT

LLMPAR__VINLINE LLMPAR__VREAL LLMPAR__V(sum)(LLMPAR__VEC x)
{
    LLMPAR__VREAL a[LLMPAR__VLANES];
    LLMPAR__V(store)(a, x);
    LLMPAR__VUNROLL
    for (int w = LLMPAR__VLANES / 2; w > 0; w /= 2) {
        LLMPAR__VUNROLL
        for (int k = 0; k < w; k++) a[k] += a[k + w];
    }
    return a[0];
}

/* The larger one, NaN if any is NaN. */
LLMPAR__VINLINE LLMPAR__VEC LLMPAR__V(max)(LLMPAR__VEC a, LLMPAR__VEC b) { return LLMPAR__V(nan)(a, a, LLMPAR__V(larger)(a, b)); }
LLMPAR__VINLINE LLMPAR__VREAL LLMPAR__V(max_lane)(LLMPAR__VEC x)
{
    LLMPAR__VREAL a[LLMPAR__VLANES];
    LLMPAR__V(store)(a, x);
    LLMPAR__VUNROLL
    for (int w = LLMPAR__VLANES / 2; w > 0; w /= 2) {
        LLMPAR__VUNROLL
        for (int k = 0; k < w; k++) a[k] = a[k] != a[k] || a[k] > a[k + w] ? a[k] : a[k + w];
    }
    return a[0];
}

/* exp(x) for x <= 0, NaN for NaN; results below the smallest normal number are +0, exp(0) is exactly 1. Error <= 2 ulp.
   x = n ln 2 + r, |r| <= 0.35; exp(r) by a polynomial; 2^n goes into the exponent. n comes from the low bits of x/ln 2 + 1.5 * 2^(mantissa bits),
   where the unit in the last place is 1. ln 2 is split so that n times its high part is exact without fma. */
LLMPAR__VINLINE LLMPAR__VEC LLMPAR__V(exp)(LLMPAR__VEC x)
{
#if LLMPAR__VDOUBLE
    const LLMPAR__VREAL magic = 6755399441055744.0, log2e = 1.4426950408889634, high = 6.93145751953125e-1, low = 1.42860682030941723212e-6, least = -708.3964185322641;
    const LLMPAR__VPASTE(llmpar__bit_, LLMPAR__VLEVEL) bias = 1023, shift = 52;
    static const LLMPAR__VREAL c[12] = { 1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5 };
    enum { terms = 12 };
#else
    const LLMPAR__VREAL magic = 12582912.0f, log2e = 1.44269504f, high = 0.693359375f, low = -2.12194440e-4f, least = -87.3365448f;
    const LLMPAR__VPASTE(llmpar__bit_, LLMPAR__VLEVEL) bias = 127, shift = 23;
    static const LLMPAR__VREAL c[6] = { 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f };
    enum { terms = 6 };
#endif
    LLMPAR__VEC t = LLMPAR__V(fma)(x, LLMPAR__V(splat)(log2e), LLMPAR__V(splat)(magic));
    LLMPAR__VEC n = t - LLMPAR__V(splat)(magic);
    LLMPAR__VEC r = LLMPAR__V(fma)(n, LLMPAR__V(splat)(-low), LLMPAR__V(fma)(n, LLMPAR__V(splat)(-high), x));
    LLMPAR__VEC p = LLMPAR__V(splat)(c[0]);
    LLMPAR__VBITS scale = (LLMPAR__VBITS)t - (LLMPAR__VBITS)LLMPAR__V(splat)(magic);
    LLMPAR__VUNROLL
    for (int k = 1; k < terms; k++) p = LLMPAR__V(fma)(p, r, LLMPAR__V(splat)(c[k]));
    p = LLMPAR__V(fma)(p, r * r, r) + LLMPAR__V(splat)(1);
    scale = (scale + bias) << shift;
    return LLMPAR__V(less)(x, LLMPAR__V(splat)(least), LLMPAR__V(splat)(0), p * (LLMPAR__VEC)scale);
}

/* A balanced tree (llmpar_tree_split) over leaves of 4 vectors that arrive in index order. Leaves that do not arrive count as +0: adding +0 to a sum that
   started from +0 changes nothing, so they are skipped, and the subtree of a part of the leaves has the bits it has in the whole tree.
   Two leaves part at the height of the highest differing bit of their indices; a new leaf closes every subtree below that height. */
typedef struct LLMPAR__V(tree) {
    LLMPAR__VEC value[48][4];
    int height[48]; /* where value[i] parts from value[i - 1] */
    int depth;
    int64_t last;
} LLMPAR__V(tree);

LLMPAR__VSHARED void LLMPAR__V(tree_begin)(LLMPAR__V(tree) *tree)
{
    tree->depth = 0;
    tree->last = 0;
}
LLMPAR__VSHARED void LLMPAR__V(tree_join)(LLMPAR__V(tree) *tree, int height)
{
    while (tree->depth >= 2 && tree->height[tree->depth - 1] < height) {
        tree->depth--;
        for (int v = 0; v < 4; v++) tree->value[tree->depth - 1][v] = tree->value[tree->depth - 1][v] + tree->value[tree->depth][v];
    }
}
LLMPAR__VSHARED void LLMPAR__V(tree_push)(LLMPAR__V(tree) *tree, int64_t index, const LLMPAR__VEC *leaf)
{
    int height = tree->depth ? 64 - __builtin_clzll((unsigned long long)(index ^ tree->last)) : 0;
    LLMPAR__V(tree_join)(tree, height);
    for (int v = 0; v < 4; v++) tree->value[tree->depth][v] = leaf[v];
    tree->height[tree->depth++] = height;
    tree->last = index;
}
/* The sum lies in value[0]; +0 if no leaf arrived. */
LLMPAR__VSHARED void LLMPAR__V(tree_finish)(LLMPAR__V(tree) *tree)
{
    LLMPAR__V(tree_join)(tree, 65);
    if (!tree->depth) for (int v = 0; v < 4; v++) tree->value[0][v] = LLMPAR__V(splat)(0);
}

#endif
/* ==== src/cpu/norm.inc ==== */
/* Kernels of norm.c. Parameter: LLMPAR__VLEVEL. */
#if LLMPAR__VBUILT && LLMPAR__VLANES <= 8

/* A task is `step` rows. */
LLMPAR__VKERNEL void LLMPAR__VFN(norm_forward)(void *arg, int64_t task, int32_t worker)
{
    const llmpar__norm_job *job = (const llmpar__norm_job *)arg;
    const llmpar_rmsnorm_args *a = job->args;
    const LLMPAR__VREAL *w = (const LLMPAR__VREAL *)a->w;
    int64_t d = a->dim, end = llmpar__v_min(a->rows, (task + 1) * job->step);
    (void)worker;
    for (int64_t row = task * job->step; row < end; row++) {
        const LLMPAR__VREAL *x = (const LLMPAR__VREAL *)a->x + row * d;
        LLMPAR__VREAL *y = (LLMPAR__VREAL *)a->y + row * d, rstd;
        LLMPAR__VEC s[4], scale;
        for (int k = 0; k < 4; k++) s[k] = LLMPAR__V(splat)(0);
        if (a->residual) {
            const LLMPAR__VREAL *residual = (const LLMPAR__VREAL *)a->residual + row * d;
            LLMPAR__VREAL *sum = (LLMPAR__VREAL *)a->sum + row * d;
            for (int64_t i = 0; i < d; i += LLMPAR__VLANES) LLMPAR__V(store_n)(sum + i, d - i, LLMPAR__V(load_n)(x + i, d - i) + LLMPAR__V(load_n)(residual + i, d - i));
            x = sum;
        }
        for (int64_t i = 0; i < d; i += 4 * LLMPAR__VLANES) {
            LLMPAR__VUNROLL
            for (int k = 0; k < 4; k++) {
                int64_t j = i + k * LLMPAR__VLANES;
                if (j < d) {
                    LLMPAR__VEC v = LLMPAR__V(load_n)(x + j, d - j);
                    s[k] = LLMPAR__V(fma)(v, v, s[k]);
                }
            }
        }
        /* 1/sqrt in the vector unit of the level: IEEE square root and division, correctly rounded each. */
        scale = LLMPAR__V(splat)(LLMPAR__V(sum)((s[0] + s[1]) + (s[2] + s[3])) / (LLMPAR__VREAL)d + (LLMPAR__VREAL)a->eps);
        scale = LLMPAR__V(splat)(1) / LLMPAR__V(sqrt)(scale);
        rstd = scale[0];
        if (a->rstd) ((LLMPAR__VREAL *)a->rstd)[row] = rstd;
        for (int64_t i = 0; i < d; i += LLMPAR__VLANES)
            LLMPAR__V(store_n)(y + i, d - i, LLMPAR__V(load_n)(x + i, d - i) * scale * LLMPAR__V(load_n)(w + i, d - i));
    }
}

/* With a = dy*w and xhat = x*rstd: dx = dresidual + rstd * (a - xhat * mean(a * xhat)). A task is `step` rows. */
LLMPAR__VKERNEL void LLMPAR__VFN(norm_dx)(void *arg, int64_t task, int32_t worker)
{
    const llmpar__norm_backward_job *job = (const llmpar__norm_backward_job *)arg;
    const llmpar_rmsnorm_backward_args *a = job->args;
    const LLMPAR__VREAL *w = (const LLMPAR__VREAL *)a->w;
    int64_t d = a->dim, end = llmpar__v_min(a->tokens.batch * a->tokens.t, (task + 1) * job->step);
    (void)worker;
    for (int64_t row = task * job->step; row < end; row++) {
        const LLMPAR__VREAL *x = (const LLMPAR__VREAL *)a->x + row * d, *dy = (const LLMPAR__VREAL *)a->dy + row * d;
        const LLMPAR__VREAL *dresidual = a->dresidual ? (const LLMPAR__VREAL *)a->dresidual + row * d : NULL;
        LLMPAR__VREAL *dx = (LLMPAR__VREAL *)a->dx + row * d, rstd = ((const LLMPAR__VREAL *)a->rstd)[row];
        LLMPAR__VEC s[4], scale = LLMPAR__V(splat)(rstd), mean;
        for (int k = 0; k < 4; k++) s[k] = LLMPAR__V(splat)(0);
        for (int64_t i = 0; i < d; i += 4 * LLMPAR__VLANES) {
            LLMPAR__VUNROLL
            for (int k = 0; k < 4; k++) {
                int64_t j = i + k * LLMPAR__VLANES, n = d - j;
                if (n > 0) s[k] = LLMPAR__V(fma)(LLMPAR__V(load_n)(dy + j, n) * LLMPAR__V(load_n)(w + j, n), LLMPAR__V(load_n)(x + j, n) * scale, s[k]);
            }
        }
        mean = LLMPAR__V(splat)(LLMPAR__V(sum)((s[0] + s[1]) + (s[2] + s[3])) / (LLMPAR__VREAL)d);
        for (int64_t i = 0; i < d; i += LLMPAR__VLANES) {
            int64_t n = d - i;
            LLMPAR__VEC g = LLMPAR__V(load_n)(dy + i, n) * LLMPAR__V(load_n)(w + i, n), r = LLMPAR__V(splat)(0);
            g = LLMPAR__V(fma)(LLMPAR__V(load_n)(x + i, n) * scale, -mean, g) * scale;
            if (dresidual) r = LLMPAR__V(load_n)(dresidual + i, n);
            LLMPAR__V(store_n)(dx + i, n, r + g);
        }
    }
}

/* A task is 64 columns of one leaf. Columns are walked in blocks of four vectors, so that a piece's chain stays in registers. */
LLMPAR__VKERNEL void LLMPAR__VFN(norm_dw)(void *arg, int64_t task, int32_t worker)
{
    const llmpar__norm_backward_job *job = (const llmpar__norm_backward_job *)arg;
    const llmpar_rmsnorm_backward_args *a = job->args;
    const llmpar_tokens *tokens = &a->tokens;
    const LLMPAR__VREAL *x = (const LLMPAR__VREAL *)a->x, *dy = (const LLMPAR__VREAL *)a->dy, *rstd = (const LLMPAR__VREAL *)a->rstd;
    int64_t leaf = task / job->blocks, d = a->dim, column = task % job->blocks * 64, end = llmpar__v_min(d, column + 64), share = tokens->batch / tokens->leaves;
    LLMPAR__VREAL *dw = (LLMPAR__VREAL *)a->dw_leaves + leaf * d;
    LLMPAR__V(tree) tree;
    (void)worker;
    for (; column < end; column += 4 * LLMPAR__VLANES) {
        LLMPAR__V(tree_begin)(&tree);
        for (int64_t piece = 0; piece < tokens->canon; piece++) {
            int64_t t0 = llmpar__v_max(llmpar_piece_begin(piece, tokens->t_total, tokens->canon), tokens->t_begin) - tokens->t_begin;
            int64_t t1 = llmpar__v_min(llmpar_piece_begin(piece + 1, tokens->t_total, tokens->canon), tokens->t_begin + tokens->t) - tokens->t_begin;
            LLMPAR__VEC s[4];
            if (t0 >= t1) continue;
            for (int k = 0; k < 4; k++) s[k] = LLMPAR__V(splat)(0);
            for (int64_t b = leaf * share; b < (leaf + 1) * share; b++)
                for (int64_t row = b * tokens->t + t0; row < b * tokens->t + t1; row++) {
                    LLMPAR__VEC scale = LLMPAR__V(splat)(rstd[row]);
                    LLMPAR__VUNROLL
                    for (int k = 0; k < 4; k++) {
                        int64_t j = column + k * LLMPAR__VLANES, n = d - j;
                        if (n > 0) s[k] = LLMPAR__V(fma)(LLMPAR__V(load_n)(dy + row * d + j, n), LLMPAR__V(load_n)(x + row * d + j, n) * scale, s[k]);
                    }
                }
            /* A fused chain can underflow to -0; as a leaf of the tree it is +0. */
            for (int k = 0; k < 4; k++) s[k] = s[k] + LLMPAR__V(splat)(0);
            LLMPAR__V(tree_push)(&tree, piece, s);
        }
        LLMPAR__V(tree_finish)(&tree);
        for (int k = 0; k < 4; k++) {
            int64_t j = column + k * LLMPAR__VLANES;
            if (j < d) LLMPAR__V(store_n)(dw + j, d - j, tree.value[0][k]);
        }
    }
}

#endif
/* ==== src/cpu/rope.inc ==== */
/* Kernel of rope.c; a task is `step` rows. Parameter: LLMPAR__VLEVEL.
   (a, b) = (x[i], x[i + E/2]) becomes (a cos - b sin, b cos + a sin); the inverse has -sin. */
#if LLMPAR__VBUILT && LLMPAR__VLANES <= 8

LLMPAR__VKERNEL void LLMPAR__VFN(rope_rotate)(void *arg, int64_t task, int32_t worker)
{
    const llmpar__rope_job *job = (const llmpar__rope_job *)arg;
    const llmpar_rope_args *p = job->args;
    int64_t half = p->head_dim / 2, end = llmpar__v_min(p->batch * p->t, (task + 1) * job->step);
    LLMPAR__VEC sign = LLMPAR__V(splat)((LLMPAR__VREAL)(p->inverse ? -1 : 1));
    (void)worker;
    for (int64_t row = task * job->step; row < end; row++) {
        int64_t position = p->position + row % p->t;
        const LLMPAR__VREAL *cosine = (const LLMPAR__VREAL *)p->cosine + position * half, *sine = (const LLMPAR__VREAL *)p->sine + position * half;
        for (int64_t i = 0; i < half; i += LLMPAR__VLANES) {
            int64_t n = half - i;
            LLMPAR__VEC c = LLMPAR__V(load_n)(cosine + i, n), s = LLMPAR__V(load_n)(sine + i, n) * sign;
            for (int64_t h = 0; h < p->heads; h++) {
                LLMPAR__VREAL *x = (LLMPAR__VREAL *)p->x + row * p->ld + h * p->head_dim + i;
                LLMPAR__VEC a = LLMPAR__V(load_n)(x, n), b = LLMPAR__V(load_n)(x + half, n);
                LLMPAR__V(store_n)(x, n, LLMPAR__V(fma)(a, c, -(b * s)));
                LLMPAR__V(store_n)(x + half, n, LLMPAR__V(fma)(b, c, a * s));
            }
        }
    }
}

#endif
/* ==== src/cpu/attention.inc ==== */
/* Forward kernel of attention.c, and what backward shares with it. Parameters: LLMPAR__VLEVEL, LLMPAR__ATTENTION_COLUMNS (vectors of a register tile),
   LLMPAR__ATTENTION_LOG (the scalar logarithm). */
#if LLMPAR__VBUILT

/* c[4, columns vectors] = (add ? c : +0) + a b over `count` steps: a[r, k] at a + r*a_row + k*a_step, b[k, :] at b + k*ldb. One chain an element.
   Written out, because clang leaves an array of accumulators in memory; columns is 1, 2 or 4 and known where it is inlined. */
#define LLMPAR__ATTENTION_BEGIN(r) s##r##0 = add ? LLMPAR__V(load)(c + r * ldc) : zero; \
    if (columns > 1) s##r##1 = add ? LLMPAR__V(load)(c + r * ldc + LLMPAR__VLANES) : zero; \
    if (columns > 2) { s##r##2 = add ? LLMPAR__V(load)(c + r * ldc + 2 * LLMPAR__VLANES) : zero; s##r##3 = add ? LLMPAR__V(load)(c + r * ldc + 3 * LLMPAR__VLANES) : zero; }
#define LLMPAR__ATTENTION_STEP(r) x = LLMPAR__V(splat)(a[r * a_row]); \
    s##r##0 = LLMPAR__V(fma)(x, y0, s##r##0); \
    if (columns > 1) s##r##1 = LLMPAR__V(fma)(x, y1, s##r##1); \
    if (columns > 2) { s##r##2 = LLMPAR__V(fma)(x, y2, s##r##2); s##r##3 = LLMPAR__V(fma)(x, y3, s##r##3); }
#define LLMPAR__ATTENTION_END(r) LLMPAR__V(store)(c + r * ldc, s##r##0); \
    if (columns > 1) LLMPAR__V(store)(c + r * ldc + LLMPAR__VLANES, s##r##1); \
    if (columns > 2) { LLMPAR__V(store)(c + r * ldc + 2 * LLMPAR__VLANES, s##r##2); LLMPAR__V(store)(c + r * ldc + 3 * LLMPAR__VLANES, s##r##3); }
LLMPAR__VINLINE void LLMPAR__VFN(attention_tile)(const int columns, const LLMPAR__VREAL *a, int64_t a_row, int64_t a_step, const LLMPAR__VREAL *b, int64_t ldb, LLMPAR__VREAL *c, int64_t ldc, int64_t count, int add)
{
    const LLMPAR__VEC zero = LLMPAR__V(splat)(0);
    LLMPAR__VEC s00, s01 = zero, s02 = zero, s03 = zero, s10, s11 = zero, s12 = zero, s13 = zero, s20, s21 = zero, s22 = zero, s23 = zero, s30, s31 = zero, s32 = zero, s33 = zero, x, y0, y1 = zero, y2 = zero, y3 = zero;
    LLMPAR__ATTENTION_BEGIN(0) LLMPAR__ATTENTION_BEGIN(1) LLMPAR__ATTENTION_BEGIN(2) LLMPAR__ATTENTION_BEGIN(3)
    for (int64_t k = 0; k < count; k++, a += a_step, b += ldb) {
        y0 = LLMPAR__V(load)(b);
        if (columns > 1) y1 = LLMPAR__V(load)(b + LLMPAR__VLANES);
        if (columns > 2) { y2 = LLMPAR__V(load)(b + 2 * LLMPAR__VLANES); y3 = LLMPAR__V(load)(b + 3 * LLMPAR__VLANES); }
        LLMPAR__ATTENTION_STEP(0) LLMPAR__ATTENTION_STEP(1) LLMPAR__ATTENTION_STEP(2) LLMPAR__ATTENTION_STEP(3)
    }
    LLMPAR__ATTENTION_END(0) LLMPAR__ATTENTION_END(1) LLMPAR__ATTENTION_END(2) LLMPAR__ATTENTION_END(3)
}
#undef LLMPAR__ATTENTION_BEGIN
#undef LLMPAR__ATTENTION_STEP
#undef LLMPAR__ATTENTION_END

/* The same for c[4, width], width rounded up to whole vectors (rows of b and c are padded). */
LLMPAR__VSHARED void LLMPAR__VFN(attention_strip)(const LLMPAR__VREAL *a, int64_t a_row, int64_t a_step, const LLMPAR__VREAL *b, int64_t ldb, LLMPAR__VREAL *c, int64_t ldc, int64_t count, int64_t width, int add)
{
    int64_t left = llmpar__v_blocks(width, LLMPAR__VLANES), n;
    for (; left > 0; left -= n, b += n * LLMPAR__VLANES, c += n * LLMPAR__VLANES) {
        if (LLMPAR__ATTENTION_COLUMNS == 4 && left >= 4) { n = 4; LLMPAR__VFN(attention_tile)(LLMPAR__ATTENTION_COLUMNS, a, a_row, a_step, b, ldb, c, ldc, count, add); }
        else if (left >= 2) { n = 2; LLMPAR__VFN(attention_tile)(2, a, a_row, a_step, b, ldb, c, ldc, count, add); }
        else { n = 1; LLMPAR__VFN(attention_tile)(1, a, a_row, a_step, b, ldb, c, ldc, count, add); }
    }
}

/* out[rows, ld] = in[rows, e] * scale, padded with zeros to whole vectors and to whole groups of four rows. */
LLMPAR__VSHARED void LLMPAR__VFN(attention_pack_rows)(LLMPAR__VREAL *out, int64_t ld, const LLMPAR__VREAL *in, int64_t ld_in, int64_t rows, int64_t e, LLMPAR__VREAL scale)
{
    LLMPAR__VEC factor = LLMPAR__V(splat)(scale);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < e; j += LLMPAR__VLANES) LLMPAR__V(store)(out + r * ld + j, LLMPAR__V(load_n)(in + r * ld_in + j, e - j) * factor);
    for (int64_t r = rows; r % 4; r++)
        for (int64_t j = 0; j < e; j += LLMPAR__VLANES) LLMPAR__V(store)(out + r * ld + j, LLMPAR__V(splat)(0));
}

/* out[tile][e][64] = transposed tiles of in[keys, e], the last one padded with zeros. */
LLMPAR__VSHARED void LLMPAR__VFN(attention_pack_columns)(LLMPAR__VREAL *out, const LLMPAR__VREAL *in, int64_t ld_in, int64_t keys, int64_t e)
{
    for (int64_t key = 0; key < keys; key += LLMPAR__ATTENTION_TILE, out += e * LLMPAR__ATTENTION_TILE) {
        const LLMPAR__VREAL *from = in + key * ld_in;
        int64_t count = llmpar__v_min(LLMPAR__ATTENTION_TILE, keys - key), k8 = count / 8 * 8, e8 = e / 8 * 8;
        for (int64_t k = 0; k < k8; k += 8) for (int64_t j = 0; j < e8; j += 8) LLMPAR__V(transpose)(out + j * LLMPAR__ATTENTION_TILE + k, LLMPAR__ATTENTION_TILE, from + k * ld_in + j, ld_in);
        for (int64_t j = 0; j < e; j++) {
            LLMPAR__VREAL *row = out + j * LLMPAR__ATTENTION_TILE;
            for (int64_t k = j < e8 ? k8 : 0; k < count; k++) row[k] = from[k * ld_in + j];
            for (int64_t k = count; k < LLMPAR__ATTENTION_TILE; k++) row[k] = 0;
        }
    }
}

/* Query rows [position, position + rows) of a document, rows <= 64, counted from its start; q, out, lse point at the first of them. */
LLMPAR__VKERNEL void LLMPAR__VFN(attention_block)(const llmpar_attention_args *a, const LLMPAR__VREAL *keys, const LLMPAR__VREAL *values, LLMPAR__VREAL *scratch, int64_t position, int64_t rows, const LLMPAR__VREAL *q, LLMPAR__VREAL *out, LLMPAR__VREAL *lse)
{
    const LLMPAR__VEC least = LLMPAR__V(splat)(-(LLMPAR__VREAL)__builtin_inf());
    int64_t e = a->head_dim, ld = llmpar_round_up(e, 16);
    LLMPAR__VREAL *block = scratch, *sums = scratch + LLMPAR__ATTENTION_TILE * ld;
    LLMPAR__VREAL top[LLMPAR__ATTENTION_TILE], p[4 * LLMPAR__ATTENTION_TILE];
    LLMPAR__VEC weight[LLMPAR__ATTENTION_TILE];
    LLMPAR__VFN(attention_pack_rows)(block, ld, q, a->ldq, rows, e, (LLMPAR__VREAL)a->scale);
    memset(sums, 0, (size_t)(LLMPAR__ATTENTION_TILE * ld) * sizeof *sums);
    for (int64_t r = 0; r < rows; r++) {
        top[r] = least[0];
        weight[r] = LLMPAR__V(splat)(0);
    }
    for (int64_t first = 0; first < position + rows; first += LLMPAR__ATTENTION_TILE, keys += LLMPAR__ATTENTION_TILE * e, values += LLMPAR__ATTENTION_TILE * ld)
        for (int64_t r = 0; r < rows; r += 4) {
            int64_t limit = llmpar__v_min(LLMPAR__ATTENTION_TILE, position + llmpar__v_min(r + 4, rows) - first), seen[4];
            LLMPAR__VREAL change[16], next[4];
            if (limit <= 0) continue;
            LLMPAR__VFN(attention_strip)(block + r * ld, ld, 1, keys, LLMPAR__ATTENTION_TILE, p, LLMPAR__ATTENTION_TILE, e, limit, 0);
            for (int64_t x = 0; x < 4; x++) {
                LLMPAR__VEC most = least;
                seen[x] = r + x < rows ? llmpar__v_max(0, llmpar__v_min(limit, position + r + x + 1 - first)) : 0;
                change[x] = 0;
                if (!seen[x]) continue;
                for (int64_t j = 0; j < seen[x]; j += LLMPAR__VLANES) most = LLMPAR__V(larger)(most, LLMPAR__V(keep)(LLMPAR__V(load)(p + x * LLMPAR__ATTENTION_TILE + j), seen[x] - j, least));
                next[x] = LLMPAR__V(larger_lane)(most);
                if (!(next[x] > top[r + x])) next[x] = top[r + x];
                change[x] = top[r + x] - next[x];
            }
            for (int x = 0; x < 4; x += LLMPAR__VLANES) LLMPAR__V(store)(change + x, LLMPAR__V(exp)(LLMPAR__V(load_n)(change + x, 4 - x)));
            for (int64_t x = 0; x < 4; x++) {
                LLMPAR__VREAL *score = p + x * LLMPAR__ATTENTION_TILE;
                LLMPAR__VEC shift, factor;
                int64_t j = 0;
                if (seen[x]) {
                    shift = LLMPAR__V(splat)(next[x]);
                    factor = LLMPAR__V(splat)(change[x]);
                    weight[r + x] = weight[r + x] * factor;
                    for (; j < seen[x]; j += LLMPAR__VLANES) {
                        LLMPAR__VEC y = LLMPAR__V(exp)(LLMPAR__V(keep)(LLMPAR__V(load)(score + j) - shift, seen[x] - j, least));
                        LLMPAR__V(store)(score + j, y);
                        weight[r + x] = weight[r + x] + y;
                    }
                    /* A factor of exactly 1 changes no bit. */
                    if (top[r + x] < next[x]) for (int64_t i = 0; i < e; i += LLMPAR__VLANES) LLMPAR__V(store)(sums + (r + x) * ld + i, LLMPAR__V(load)(sums + (r + x) * ld + i) * factor);
                    top[r + x] = next[x];
                }
                for (; j < limit; j += LLMPAR__VLANES) LLMPAR__V(store)(score + j, LLMPAR__V(splat)(0));
            }
            LLMPAR__VFN(attention_strip)(p, LLMPAR__ATTENTION_TILE, 1, values, ld, sums + r * ld, ld, limit, e, 1);
        }
    for (int64_t r = 0; r < rows; r++) {
        LLMPAR__VREAL total = LLMPAR__V(sum)(weight[r]);
        LLMPAR__VEC factor = LLMPAR__V(splat)(1 / total);
        for (int64_t j = 0; j < e; j += LLMPAR__VLANES) LLMPAR__V(store_n)(out + r * a->ldo + j, e - j, LLMPAR__V(load)(sums + r * ld + j) * factor + LLMPAR__V(splat)(0));
        if (lse) lse[r] = top[r] + LLMPAR__ATTENTION_LOG(total);
    }
}

LLMPAR__VKERNEL void LLMPAR__VFN(attention_forward)(void *arg, int64_t task, int32_t worker)
{
    const llmpar__attention_job *job = (const llmpar__attention_job *)arg;
    const llmpar_attention_args *a = job->args;
    int64_t e = a->head_dim, ld = llmpar_round_up(e, 16), t = llmpar_round_up(a->tk, LLMPAR__ATTENTION_TILE), b = task / a->kv_heads, kv = task % a->kv_heads, group = a->heads / a->kv_heads, begin, end;
    LLMPAR__VREAL *keys = (LLMPAR__VREAL *)(void *)(job->workspace + job->worker_bytes * (size_t)(job->by_task ? task : worker)), *values = keys + t * ld, *scratch = values + t * ld;
    for (int64_t i = a->tk - a->tq; i < a->tk; i = end) {
        end = llmpar__attention_document(a, b, i, &begin);
        LLMPAR__VFN(attention_pack_columns)(keys, (const LLMPAR__VREAL *)a->k + (b * a->tk_stride + begin) * a->ldk + kv * e, a->ldk, end - begin, e);
        LLMPAR__VFN(attention_pack_rows)(values, ld, (const LLMPAR__VREAL *)a->v + (b * a->tk_stride + begin) * a->ldv + kv * e, a->ldv, end - begin, e, 1);
        for (int64_t h = kv * group; h < (kv + 1) * group; h++)
            for (int64_t first = i; first < end; first += LLMPAR__ATTENTION_TILE) {
                int64_t row = first - (a->tk - a->tq);
                LLMPAR__VFN(attention_block)(a, keys, values, scratch, first - begin, llmpar__v_min(LLMPAR__ATTENTION_TILE, end - first), (const LLMPAR__VREAL *)a->q + (b * a->tq + row) * a->ldq + h * e, (LLMPAR__VREAL *)a->out + (b * a->tq + row) * a->ldo + h * e,
                    a->lse ? (LLMPAR__VREAL *)a->lse + (b * a->heads + h) * a->tq + row : NULL);
            }
    }
}

#endif
/* ==== src/cpu/attention_backward.inc ==== */
/* Backward kernel of attention.c. Parameter: LLMPAR__VLEVEL; attention.inc of that level comes before.
   With S = scale q k^T, P = exp(S - lse), D = rowsum(dout * out):
     dP = dout v^T,  dS = P (dP - D),  dq = scale dS k,  dk = scale dS^T q,  dv = P^T dout. */
#if LLMPAR__VBUILT

/* One document of one task; n keys (and query rows), all arrays packed with row stride ld. */
typedef struct LLMPAR__VFN(attention_state) {
    const llmpar__attention_job *job;
    int64_t b, kv, begin, n, ld;
    LLMPAR__VREAL *q, *dout, *dq, *rows, *keys, *values; /* rows: keys as rows; keys, values: transposed tiles; q: times scale */
    LLMPAR__VREAL *lse, *d;
    LLMPAR__VREAL *slots;                                 /* dk then dv, each [t, ld], for each slot */
    int64_t slot_size;
} LLMPAR__VFN(attention_state);

/* One query head: dq to the caller's tensor, dk and dv into the packed arrays. Key tiles outside, query blocks inside. */
LLMPAR__VSHARED void LLMPAR__VFN(attention_head)(const LLMPAR__VFN(attention_state) *s, int64_t h, LLMPAR__VREAL *dk, LLMPAR__VREAL *dv)
{
    const llmpar_attention_args *a = s->job->args;
    const LLMPAR__VEC least = LLMPAR__V(splat)(-(LLMPAR__VREAL)__builtin_inf()), zero = LLMPAR__V(splat)(0);
    int64_t e = a->head_dim, ld = s->ld, n = s->n, row0 = s->b * a->tq + s->begin;
    const LLMPAR__VREAL *out = (const LLMPAR__VREAL *)a->out + row0 * a->ldo + h * e;
    LLMPAR__VREAL *dq = (LLMPAR__VREAL *)s->job->backward->dq + row0 * a->ldq + h * e;
    LLMPAR__VREAL p[LLMPAR__ATTENTION_TILE * LLMPAR__ATTENTION_TILE], ds[LLMPAR__ATTENTION_TILE * LLMPAR__ATTENTION_TILE];
    LLMPAR__VEC scale = LLMPAR__V(splat)((LLMPAR__VREAL)a->scale);
    LLMPAR__VFN(attention_pack_rows)(s->q, ld, (const LLMPAR__VREAL *)a->q + row0 * a->ldq + h * e, a->ldq, n, e, (LLMPAR__VREAL)a->scale);
    LLMPAR__VFN(attention_pack_rows)(s->dout, ld, (const LLMPAR__VREAL *)s->job->backward->dout + row0 * a->ldo + h * e, a->ldo, n, e, 1);
    memset(s->dq, 0, (size_t)(s->slot_size) * sizeof *s->dq);
    memset(dk, 0, (size_t)(s->slot_size) * sizeof *dk);
    memset(dv, 0, (size_t)(s->slot_size) * sizeof *dv);
    memcpy(s->lse, (const LLMPAR__VREAL *)a->lse + (s->b * a->heads + h) * a->tq + s->begin, (size_t)n * sizeof *s->lse);
    for (int64_t r = 0; r < n; r++) {
        LLMPAR__VEC sum = zero;
        for (int64_t j = 0; j < e; j += LLMPAR__VLANES) sum = LLMPAR__V(fma)(LLMPAR__V(load)(s->dout + r * ld + j), LLMPAR__V(load_n)(out + r * a->ldo + j, e - j), sum);
        s->d[r] = LLMPAR__V(sum)(sum);
    }
    for (int64_t first = 0; first < n; first += LLMPAR__ATTENTION_TILE) {
        const LLMPAR__VREAL *keys = s->keys + first * e, *values = s->values + first * e, *rows = s->rows + first * ld;
        for (int64_t r0 = first; r0 < n; r0 += LLMPAR__ATTENTION_TILE) {
            int64_t count = llmpar__v_min(LLMPAR__ATTENTION_TILE, n - r0), key_count = llmpar__v_min(LLMPAR__ATTENTION_TILE, n - first);
            for (int64_t r = 0; r < count; r += 4) {
                int64_t limit = llmpar__v_min(LLMPAR__ATTENTION_TILE, r0 + llmpar__v_min(r + 4, count) - first);
                LLMPAR__VFN(attention_strip)(s->q + (r0 + r) * ld, ld, 1, keys, LLMPAR__ATTENTION_TILE, p + r * LLMPAR__ATTENTION_TILE, LLMPAR__ATTENTION_TILE, e, limit, 0);
                LLMPAR__VFN(attention_strip)(s->dout + (r0 + r) * ld, ld, 1, values, LLMPAR__ATTENTION_TILE, ds + r * LLMPAR__ATTENTION_TILE, LLMPAR__ATTENTION_TILE, e, limit, 0);
                for (int64_t x = r; x < r + 4; x++) {
                    LLMPAR__VREAL *score = p + x * LLMPAR__ATTENTION_TILE, *slope = ds + x * LLMPAR__ATTENTION_TILE;
                    int64_t seen = x < count ? llmpar__v_min(limit, r0 + x + 1 - first) : 0, j = 0;
                    if (seen > 0) {
                        LLMPAR__VEC shift = LLMPAR__V(splat)(s->lse[r0 + x]), mean = LLMPAR__V(splat)(s->d[r0 + x]);
                        for (; j < seen; j += LLMPAR__VLANES) {
                            LLMPAR__VEC y = LLMPAR__V(exp)(LLMPAR__V(keep)(LLMPAR__V(load)(score + j) - shift, seen - j, least));
                            LLMPAR__V(store)(score + j, y);
                            LLMPAR__V(store)(slope + j, LLMPAR__V(keep)(y * (LLMPAR__V(load)(slope + j) - mean), seen - j, zero));
                        }
                    }
                    for (; j < LLMPAR__ATTENTION_TILE; j += LLMPAR__VLANES) {
                        LLMPAR__V(store)(score + j, zero);
                        LLMPAR__V(store)(slope + j, zero);
                    }
                }
                LLMPAR__VFN(attention_strip)(ds + r * LLMPAR__ATTENTION_TILE, LLMPAR__ATTENTION_TILE, 1, rows, ld, s->dq + (r0 + r) * ld, ld, limit, e, 1);
            }
            for (int64_t j = 0; j < key_count; j += 4) {
                int64_t from = r0 == first ? j : 0; /* rows above the diagonal do not see these keys */
                LLMPAR__VFN(attention_strip)(p + from * LLMPAR__ATTENTION_TILE + j, 1, LLMPAR__ATTENTION_TILE, s->dout + (r0 + from) * ld, ld, dv + (first + j) * ld, ld, count - from, e, 1);
                LLMPAR__VFN(attention_strip)(ds + from * LLMPAR__ATTENTION_TILE + j, 1, LLMPAR__ATTENTION_TILE, s->q + (r0 + from) * ld, ld, dk + (first + j) * ld, ld, count - from, e, 1);
            }
        }
    }
    for (int64_t r = 0; r < n; r++)
        for (int64_t j = 0; j < e; j += LLMPAR__VLANES) LLMPAR__V(store_n)(dq + r * a->ldq + j, e - j, LLMPAR__V(load)(s->dq + r * ld + j) * scale + zero);
}

/* The tree over heads [h, h + count) of the group; the sum ends in `slot`. */
LLMPAR__VSHARED void LLMPAR__VFN(attention_heads)(const LLMPAR__VFN(attention_state) *s, int64_t h, int64_t count, int64_t slot)
{
    LLMPAR__VREAL *sum = s->slots + 2 * slot * s->slot_size;
    int64_t left;
    if (count == 1) {
        LLMPAR__VFN(attention_head)(s, h, sum, sum + s->slot_size);
        return;
    }
    left = llmpar__attention_split(count);
    LLMPAR__VFN(attention_heads)(s, h, left, slot);
    LLMPAR__VFN(attention_heads)(s, h + left, count - left, slot + 1);
    for (int64_t i = 0; i < 2 * s->slot_size; i += LLMPAR__VLANES) LLMPAR__V(store)(sum + i, LLMPAR__V(load)(sum + i) + LLMPAR__V(load)(sum + 2 * s->slot_size + i));
}

LLMPAR__VKERNEL void LLMPAR__VFN(attention_backward)(void *arg, int64_t task, int32_t worker)
{
    const llmpar__attention_job *job = (const llmpar__attention_job *)arg;
    const llmpar_attention_args *a = job->args;
    int64_t e = a->head_dim, group = a->heads / a->kv_heads, end, size;
    LLMPAR__VFN(attention_state) s;
    s.job = job;
    s.b = task / a->kv_heads;
    s.kv = task % a->kv_heads;
    s.ld = llmpar_round_up(e, 16);
    size = llmpar_round_up(a->tk, LLMPAR__ATTENTION_TILE) * s.ld;
    s.q = (LLMPAR__VREAL *)(void *)(job->workspace + job->worker_bytes * (size_t)(job->by_task ? task : worker));
    s.dout = s.q + size;
    s.dq = s.dout + size;
    s.rows = s.dq + size;
    s.keys = s.rows + size;
    s.values = s.keys + size;
    s.slots = s.values + size;
    s.lse = s.slots + 2 * llmpar__attention_slots(group) * size;
    s.d = s.lse + size / s.ld;
    for (int64_t i = 0; i < a->tk; i = end) {
        const LLMPAR__VREAL *k, *v;
        LLMPAR__VREAL *dk, *dv;
        end = llmpar__attention_document(a, s.b, i, &s.begin);
        s.n = end - s.begin;
        s.slot_size = llmpar_round_up(s.n, LLMPAR__ATTENTION_TILE) * s.ld;
        k = (const LLMPAR__VREAL *)a->k + (s.b * a->tk + s.begin) * a->ldk + s.kv * e;
        v = (const LLMPAR__VREAL *)a->v + (s.b * a->tk + s.begin) * a->ldv + s.kv * e;
        dk = (LLMPAR__VREAL *)job->backward->dk + (s.b * a->tk + s.begin) * a->ldk + s.kv * e;
        dv = (LLMPAR__VREAL *)job->backward->dv + (s.b * a->tk + s.begin) * a->ldv + s.kv * e;
        LLMPAR__VFN(attention_pack_rows)(s.rows, s.ld, k, a->ldk, s.n, e, 1);
        LLMPAR__VFN(attention_pack_columns)(s.keys, k, a->ldk, s.n, e);
        LLMPAR__VFN(attention_pack_columns)(s.values, v, a->ldv, s.n, e);
        LLMPAR__VFN(attention_heads)(&s, s.kv * group, group, 0);
        for (int64_t r = 0; r < s.n; r++)
            for (int64_t j = 0; j < e; j += LLMPAR__VLANES) {
                LLMPAR__V(store_n)(dk + r * a->ldk + j, e - j, LLMPAR__V(load)(s.slots + r * s.ld + j) + LLMPAR__V(splat)(0));
                LLMPAR__V(store_n)(dv + r * a->ldv + j, e - j, LLMPAR__V(load)(s.slots + s.slot_size + r * s.ld + j) + LLMPAR__V(splat)(0));
            }
    }
}

#endif
/* ==== src/cpu/swiglu.inc ==== */
/* Kernels of swiglu.c; a task is `step` rows. Parameter: LLMPAR__VLEVEL. */
#if LLMPAR__VBUILT

/* 1/(1 + e^-g) from e = exp(-|g|) <= 1, so nothing overflows: g < 0 has e/(1 + e). */
LLMPAR__VINLINE LLMPAR__VEC LLMPAR__VFN(swiglu_sigmoid)(LLMPAR__VEC g)
{
    LLMPAR__VEC zero = LLMPAR__V(splat)(0), one = LLMPAR__V(splat)(1), e = LLMPAR__V(exp)(LLMPAR__V(less)(g, zero, g, -g));
    return LLMPAR__V(less)(g, zero, e, one) / (one + e);
}

LLMPAR__VKERNEL void LLMPAR__VFN(swiglu_forward)(void *arg, int64_t task, int32_t worker)
{
    const llmpar__swiglu_job *job = (const llmpar__swiglu_job *)arg;
    const llmpar_swiglu_args *a = job->forward;
    int64_t end = llmpar__v_min(a->rows, (task + 1) * job->step);
    (void)worker;
    for (int64_t row = task * job->step; row < end; row++) {
        const LLMPAR__VREAL *gate = (const LLMPAR__VREAL *)a->gate + row * a->ld_in, *up = (const LLMPAR__VREAL *)a->up + row * a->ld_in;
        LLMPAR__VREAL *h = (LLMPAR__VREAL *)a->h + row * a->ld_out;
        for (int64_t i = 0; i < a->dim; i += LLMPAR__VLANES) {
            int64_t n = a->dim - i;
            LLMPAR__VEC g = LLMPAR__V(load_n)(gate + i, n);
            LLMPAR__V(store_n)(h + i, n, g * LLMPAR__VFN(swiglu_sigmoid)(g) * LLMPAR__V(load_n)(up + i, n));
        }
    }
}

/* With s = sigmoid(g), silu = g s: dup = dh silu, dgate = dh up s (1 + g (1 - s)). */
LLMPAR__VKERNEL void LLMPAR__VFN(swiglu_backward)(void *arg, int64_t task, int32_t worker)
{
    const llmpar__swiglu_job *job = (const llmpar__swiglu_job *)arg;
    const llmpar_swiglu_backward_args *a = job->backward;
    int64_t end = llmpar__v_min(a->rows, (task + 1) * job->step);
    (void)worker;
    for (int64_t row = task * job->step; row < end; row++) {
        const LLMPAR__VREAL *gate = (const LLMPAR__VREAL *)a->gate + row * a->ld_in, *up = (const LLMPAR__VREAL *)a->up + row * a->ld_in, *dh = (const LLMPAR__VREAL *)a->dh + row * a->ld_out;
        LLMPAR__VREAL *dgate = (LLMPAR__VREAL *)a->dgate + row * a->ld_in, *dup = (LLMPAR__VREAL *)a->dup + row * a->ld_in, *h = a->h ? (LLMPAR__VREAL *)a->h + row * a->ld_out : NULL;
        for (int64_t i = 0; i < a->dim; i += LLMPAR__VLANES) {
            int64_t n = a->dim - i;
            LLMPAR__VEC one = LLMPAR__V(splat)(1), g = LLMPAR__V(load_n)(gate + i, n), u = LLMPAR__V(load_n)(up + i, n), d = LLMPAR__V(load_n)(dh + i, n);
            LLMPAR__VEC s = LLMPAR__VFN(swiglu_sigmoid)(g), silu = g * s;
            LLMPAR__V(store_n)(dup + i, n, d * silu);
            LLMPAR__V(store_n)(dgate + i, n, d * u * (s * LLMPAR__V(fma)(g, one - s, one)));
            if (h) LLMPAR__V(store_n)(h + i, n, silu * u);
        }
    }
}

#endif
/* ==== src/cpu/embedding.inc ==== */
/* Kernel of embedding.c; a task is LLMPAR__EMBEDDING_IDS rows of the table. Parameter: LLMPAR__VLEVEL.
   For each id: a chain over its tokens inside a leaf, the tree over the leaves that have the id. */
#if LLMPAR__VBUILT && LLMPAR__VLANES <= 8

LLMPAR__VKERNEL void LLMPAR__VFN(embedding_gradient)(void *arg, int64_t task, int32_t worker)
{
    const llmpar__embedding_backward_job *job = (const llmpar__embedding_backward_job *)arg;
    const llmpar_embedding_backward_args *a = job->args;
    const LLMPAR__VREAL *dout = (const LLMPAR__VREAL *)a->dout;
    int64_t d = a->dim, end = llmpar__v_min(a->v_local, (task + 1) * LLMPAR__EMBEDDING_IDS), leaf_rows = a->tokens.leaves > 0 ? a->tokens.batch / a->tokens.leaves * a->tokens.t : 0;
    LLMPAR__V(tree) tree;
    (void)worker;
    for (int64_t v = task * LLMPAR__EMBEDDING_IDS; v < end; v++) {
        const int64_t *order = job->order + job->begin[v];
        int64_t count = job->begin[v + 1] - job->begin[v];
        LLMPAR__VREAL *out = (LLMPAR__VREAL *)a->dtable + v * d;
        for (int64_t column = 0; column < d; column += 4 * LLMPAR__VLANES) {
            LLMPAR__V(tree_begin)(&tree);
            for (int64_t i = 0; i < count;) {
                int64_t leaf = order[i] / leaf_rows, leaf_end = (leaf + 1) * leaf_rows;
                LLMPAR__VEC s[4];
                for (int k = 0; k < 4; k++) s[k] = LLMPAR__V(splat)(0);
                for (; i < count && order[i] < leaf_end; i++) {
                    LLMPAR__VUNROLL
                    for (int k = 0; k < 4; k++) {
                        int64_t j = column + k * LLMPAR__VLANES;
                        if (j < d) s[k] = s[k] + LLMPAR__V(load_n)(dout + order[i] * d + j, d - j);
                    }
                }
                LLMPAR__V(tree_push)(&tree, leaf, s);
            }
            LLMPAR__V(tree_finish)(&tree);
            for (int k = 0; k < 4; k++) {
                int64_t j = column + k * LLMPAR__VLANES;
                if (j < d) LLMPAR__V(store_n)(out + j, d - j, tree.value[0][k]);
            }
        }
    }
}

#endif
/* ==== src/cpu/xent.inc ==== */
/* Kernels of xent.c; a task is `step` rows. Parameter: LLMPAR__VLEVEL. */
#if LLMPAR__VBUILT

LLMPAR__VKERNEL void LLMPAR__VFN(xent_rows_max)(void *arg, int64_t task, int32_t worker)
{
    const llmpar__xent_job *job = (const llmpar__xent_job *)arg;
    const llmpar_xent_args *a = job->args;
    const LLMPAR__VEC least = LLMPAR__V(splat)(-(LLMPAR__VREAL)__builtin_inf());
    int64_t end = llmpar__v_min(a->rows, (task + 1) * job->step);
    (void)worker;
    for (int64_t row = task * job->step; row < end; row++) {
        const LLMPAR__VREAL *x = (const LLMPAR__VREAL *)a->logits + row * a->ld;
        LLMPAR__VEC most = least;
        int64_t target = (int64_t)a->targets[row] - a->v_begin;
        for (int64_t i = 0; i < a->v_local; i += LLMPAR__VLANES) most = LLMPAR__V(max)(most, LLMPAR__V(keep)(LLMPAR__V(load_n)(x + i, a->v_local - i), a->v_local - i, least));
        ((LLMPAR__VREAL *)a->max)[row] = LLMPAR__V(max_lane)(most);
        ((LLMPAR__VREAL *)a->target_logit)[row] = a->targets[row] >= 0 && target >= 0 && target < a->v_local ? x[target] : least[0];
    }
}

/* Pieces of the whole vocabulary inside this shard; lanes count from a piece's begin, so a shard border at a piece's border changes nothing. */
LLMPAR__VKERNEL void LLMPAR__VFN(xent_rows_sum)(void *arg, int64_t task, int32_t worker)
{
    const llmpar__xent_job *job = (const llmpar__xent_job *)arg;
    const llmpar_xent_args *a = job->args;
    const LLMPAR__VEC zero = LLMPAR__V(splat)(0), least = LLMPAR__V(splat)(-(LLMPAR__VREAL)__builtin_inf());
    int64_t end = llmpar__v_min(a->rows, (task + 1) * job->step);
    (void)worker;
    for (int64_t row = task * job->step; row < end; row++) {
        const LLMPAR__VREAL *x = (const LLMPAR__VREAL *)a->logits + row * a->ld;
        LLMPAR__VEC most = LLMPAR__V(splat)(((const LLMPAR__VREAL *)a->max)[row]);
        LLMPAR__VREAL sum[64];
        int heights[64], depth = 0;
        int64_t last = 0;
        /* The balanced tree over pieces: as in vector_math.inc, with one number a leaf. */
        for (int64_t piece = 0; piece < a->canon; piece++) {
            int64_t begin = llmpar__v_max(llmpar_piece_begin(piece, a->v_total, a->canon) - a->v_begin, 0), stop = llmpar__v_min(llmpar_piece_begin(piece + 1, a->v_total, a->canon) - a->v_begin, a->v_local);
            LLMPAR__VEC s = zero;
            int height;
            if (begin >= stop) continue;
            for (int64_t i = begin; i < stop; i += LLMPAR__VLANES) s = s + LLMPAR__V(exp)(LLMPAR__V(keep)(LLMPAR__V(load_n)(x + i, stop - i) - most, stop - i, least));
            height = depth ? 64 - __builtin_clzll((unsigned long long)(piece ^ last)) : 0;
            for (; depth >= 2 && heights[depth - 1] < height; depth--) sum[depth - 2] += sum[depth - 1];
            sum[depth] = LLMPAR__V(sum)(s);
            heights[depth++] = height;
            last = piece;
        }
        for (; depth >= 2; depth--) sum[depth - 2] += sum[depth - 1];
        ((LLMPAR__VREAL *)a->sum)[row] = depth ? sum[0] : 0;
    }
}

LLMPAR__VKERNEL void LLMPAR__VFN(xent_rows_backward)(void *arg, int64_t task, int32_t worker)
{
    const llmpar__xent_job *job = (const llmpar__xent_job *)arg;
    const llmpar_xent_args *a = job->args;
    LLMPAR__VEC scale = LLMPAR__V(splat)((LLMPAR__VREAL)job->scale), one = LLMPAR__V(splat)(1);
    int64_t end = llmpar__v_min(a->rows, (task + 1) * job->step);
    (void)worker;
    for (int64_t row = task * job->step; row < end; row++) {
        LLMPAR__VREAL *x = (LLMPAR__VREAL *)a->logits + row * a->ld;
        int64_t target = (int64_t)a->targets[row] - a->v_begin;
        LLMPAR__VEC most = LLMPAR__V(splat)(((const LLMPAR__VREAL *)a->max)[row]), sum = LLMPAR__V(splat)(((const LLMPAR__VREAL *)a->sum)[row]), hit = one;
        if (a->targets[row] < 0) {
            for (int64_t i = 0; i < a->v_local; i += LLMPAR__VLANES) LLMPAR__V(store_n)(x + i, a->v_local - i, LLMPAR__V(splat)(0));
            continue;
        }
        sum = one / sum;
        if (target >= 0 && target < a->v_local) hit = (LLMPAR__V(exp)(LLMPAR__V(splat)(x[target]) - most) * sum - one) * scale;
        else target = -1;
        for (int64_t i = 0; i < a->v_local; i += LLMPAR__VLANES)
            LLMPAR__V(store_n)(x + i, a->v_local - i, LLMPAR__V(exp)(LLMPAR__V(load_n)(x + i, a->v_local - i) - most) * sum * scale);
        if (target >= 0) x[target] = hit[0];
    }
}

#endif
/* ==== src/cpu/elementwise.inc ==== */
/* Kernels of elementwise.c; a task is one chunk. Parameter: LLMPAR__VLEVEL. */
#if LLMPAR__VBUILT

/* The tree over n operands by a binary counter: after operand j, as many subtrees are closed as j has trailing ones. What is left at the end closes
   from the right, which is the split at the largest power of two below n. */
LLMPAR__VKERNEL void LLMPAR__VFN(elementwise_tree)(void *arg, int64_t task, int32_t worker)
{
    const llmpar_tree_sum_args *a = (const llmpar_tree_sum_args *)arg;
    const LLMPAR__VREAL *const *in = (const LLMPAR__VREAL *const *)a->in;
    LLMPAR__VREAL *out = (LLMPAR__VREAL *)a->out;
    int64_t begin = task * LLMPAR__ELEMENTWISE_CHUNK, end = llmpar__v_min((int64_t)a->count, begin + LLMPAR__ELEMENTWISE_CHUNK);
    (void)worker;
    for (int64_t i = begin; i < end; i += LLMPAR__VLANES) {
        int64_t n = end - i;
        LLMPAR__VEC sum[32], s;
        if (a->n == 2) s = LLMPAR__V(load_n)(in[0] + i, n) + LLMPAR__V(load_n)(in[1] + i, n);
        else if (a->n == 4) s = (LLMPAR__V(load_n)(in[0] + i, n) + LLMPAR__V(load_n)(in[1] + i, n)) + (LLMPAR__V(load_n)(in[2] + i, n) + LLMPAR__V(load_n)(in[3] + i, n));
        else {
            int depth = 0;
            for (int32_t j = 0; j < a->n; j++) {
                s = LLMPAR__V(load_n)(in[j] + i, n);
                for (int32_t bits = j; bits & 1; bits >>= 1) s = sum[--depth] + s;
                sum[depth++] = s;
            }
            s = sum[--depth];
            while (depth) s = sum[--depth] + s;
        }
        LLMPAR__V(store_n)(out + i, n, s);
    }
}

LLMPAR__VKERNEL void LLMPAR__VFN(elementwise_max)(void *arg, int64_t task, int32_t worker)
{
    const llmpar_max_args *a = (const llmpar_max_args *)arg;
    const LLMPAR__VREAL *const *in = (const LLMPAR__VREAL *const *)a->in;
    int64_t begin = task * LLMPAR__ELEMENTWISE_CHUNK, end = llmpar__v_min((int64_t)a->count, begin + LLMPAR__ELEMENTWISE_CHUNK);
    (void)worker;
    for (int64_t i = begin; i < end; i += LLMPAR__VLANES) {
        LLMPAR__VEC most = LLMPAR__V(load_n)(in[0] + i, end - i);
        for (int32_t j = 1; j < a->n; j++) most = LLMPAR__V(max)(most, LLMPAR__V(load_n)(in[j] + i, end - i));
        LLMPAR__V(store_n)((LLMPAR__VREAL *)a->out + i, end - i, most);
    }
}

LLMPAR__VKERNEL void LLMPAR__VFN(elementwise_add)(void *arg, int64_t task, int32_t worker)
{
    const llmpar_add_args *p = (const llmpar_add_args *)arg;
    const LLMPAR__VREAL *a = (const LLMPAR__VREAL *)p->a, *b = (const LLMPAR__VREAL *)p->b;
    int64_t begin = task * LLMPAR__ELEMENTWISE_CHUNK, end = llmpar__v_min((int64_t)p->count, begin + LLMPAR__ELEMENTWISE_CHUNK);
    (void)worker;
    for (int64_t i = begin; i < end; i += LLMPAR__VLANES)
        LLMPAR__V(store_n)((LLMPAR__VREAL *)p->out + i, end - i, LLMPAR__V(load_n)(a + i, end - i) + LLMPAR__V(load_n)(b + i, end - i));
}

LLMPAR__VKERNEL void LLMPAR__VFN(elementwise_scale)(void *arg, int64_t task, int32_t worker)
{
    const llmpar_scale_args *p = (const llmpar_scale_args *)arg;
    LLMPAR__VREAL *x = (LLMPAR__VREAL *)p->x;
    LLMPAR__VEC factor = LLMPAR__V(splat)((LLMPAR__VREAL)p->factor);
    int64_t begin = task * LLMPAR__ELEMENTWISE_CHUNK, end = llmpar__v_min((int64_t)p->count, begin + LLMPAR__ELEMENTWISE_CHUNK);
    (void)worker;
    for (int64_t i = begin; i < end; i += LLMPAR__VLANES) LLMPAR__V(store_n)(x + i, end - i, LLMPAR__V(load_n)(x + i, end - i) * factor);
}

#endif
/* ==== src/cpu/optim.inc ==== */
/* Kernel of optim.c; a task is one chunk. Parameter: LLMPAR__VLEVEL.
   The order of operations is the contract (every rounding counts):
     g' = g * grad_scale
     m  = fma(beta1, m, (1 - beta1) * g')
     v  = fma(beta2, v, ((1 - beta2) * g') * g')
     p  = fma(-lr, (m / c1) / (sqrt(v / c2) + eps), p * (1 - lr * decay))
   The scalars 1 - beta and 1 - lr * decay are computed in f64 and rounded once; square root and division are IEEE's. */
#if LLMPAR__VBUILT && LLMPAR__VLANES <= 8

LLMPAR__VKERNEL void LLMPAR__VFN(optim_adamw)(void *arg, int64_t task, int32_t worker)
{
    const llmpar_adamw_args *a = (const llmpar_adamw_args *)arg;
    LLMPAR__VREAL *p = (LLMPAR__VREAL *)a->p, *m = (LLMPAR__VREAL *)a->m, *v = (LLMPAR__VREAL *)a->v;
    const LLMPAR__VREAL *grad = (const LLMPAR__VREAL *)a->g;
    LLMPAR__VEC scale = LLMPAR__V(splat)((LLMPAR__VREAL)a->grad_scale), beta1 = LLMPAR__V(splat)((LLMPAR__VREAL)a->beta1), beta2 = LLMPAR__V(splat)((LLMPAR__VREAL)a->beta2);
    LLMPAR__VEC rest1 = LLMPAR__V(splat)((LLMPAR__VREAL)(1 - a->beta1)), rest2 = LLMPAR__V(splat)((LLMPAR__VREAL)(1 - a->beta2));
    LLMPAR__VEC c1 = LLMPAR__V(splat)((LLMPAR__VREAL)a->correction1), c2 = LLMPAR__V(splat)((LLMPAR__VREAL)a->correction2), eps = LLMPAR__V(splat)((LLMPAR__VREAL)a->eps);
    LLMPAR__VEC keep = LLMPAR__V(splat)((LLMPAR__VREAL)(1 - a->lr * a->decay)), minus_lr = LLMPAR__V(splat)((LLMPAR__VREAL)-a->lr);
    int64_t begin = task * LLMPAR__OPTIM_CHUNK, end = llmpar__v_min((int64_t)a->count, begin + LLMPAR__OPTIM_CHUNK);
    (void)worker;
    for (int64_t i = begin; i < end; i += LLMPAR__VLANES) {
        int64_t n = end - i;
        LLMPAR__VEC g = LLMPAR__V(load_n)(grad + i, n) * scale;
        LLMPAR__VEC m1 = LLMPAR__V(fma)(beta1, LLMPAR__V(load_n)(m + i, n), rest1 * g);
        LLMPAR__VEC v1 = LLMPAR__V(fma)(beta2, LLMPAR__V(load_n)(v + i, n), rest2 * g * g);
        LLMPAR__VEC step = (m1 / c1) / (LLMPAR__V(sqrt)(v1 / c2) + eps);
        LLMPAR__V(store_n)(m + i, n, m1);
        LLMPAR__V(store_n)(v + i, n, v1);
        LLMPAR__V(store_n)(p + i, n, LLMPAR__V(fma)(minus_lr, step, LLMPAR__V(load_n)(p + i, n) * keep));
    }
}

#endif
#endif /* LLMPAR__TEMPLATE */
