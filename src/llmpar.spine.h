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
            if (!st) st = llmpar_parallelize(mesh, model, &(llmpar_trainer_desc){ .data = user, .seq_len = 256, .batch = 8, .lr = 1e-3 }, &t);
            for (int i = 0; !st && i < 200; i++) st = llmpar_trainer_step(t, &s);
            if (!st) st = llmpar_save_hf(t, "out");                          // transformers loads this
            llmpar_trainer_destroy(t); llmpar_llama_destroy(model); llmpar_mesh_destroy(mesh);   // NULL is fine
            return st;
        }

        int main(void)
        {
            llmpar_error err;
            if (llmpar_launch(&(llmpar_launch_desc){ .ranks = 4 }, train, "input.txt", &err)) { fprintf(stderr, "%s\n", err.text); return 1; }
            return 0;
        }

    The ranks are threads of your process, or processes of mpirun (LLMPAR_USE_MPI below). Every call that takes a ctx, or an object made from one, is collective -
    all ranks make it, in the same order - unless its comment says local.

    NULL for an object, desc or path, where no comment allows it, is refused in the chapters io to run: LLMPAR_ERR_ARGUMENT, or 0
    or NULL from what has no status. What destroys, closes or frees takes NULL. The chapters below, and void functions, do not look.

OPTIONS (define before the #include; where not said otherwise, in the file with LLMPAR_IMPLEMENTATION)

    LLMPAR_IMPLEMENTATION   this file gets the functions
    LLMPAR_STATIC           every function is static: the library is private to this file (with LLMPAR_NO_... gcc's
                            -Wunused-function then names the functions that are left out)
    LLMPAR_API              storage class and attributes of the public declarations, default `extern`
                            (everywhere alike, e.g. __attribute__((visibility("default"))))
    LLMPAR_HEADER           the file's name, if renamed (default "llmpar.h"): it includes itself once a vector width
    LLMPAR_USE_MPI          adds ranks that are MPI processes, on one machine or many: compile this file with mpicc, start the program with
                            `mpirun -n 4`, and llmpar_launch makes the processes its ranks. Declarations need no mpi.h.
                            Without mpirun the ranks are threads as before
    LLMPAR_NO_LLAMA         leaves out the implementation of the Llama model and of everything built on it
    LLMPAR_NO_TEXT          ... of token data
    LLMPAR_NO_IO            ... of files: safetensors, Hugging Face directories (with it goes what needs them)
    LLMPAR_NO_SIM           ... of the device that only counts: no plan of memory, so memory_limit is refused
    LLMPAR_NO_SIMD          ... of the vector kernels: portable C alone
                            (never a declaration: a call of what is left out fails to link)

    Environment: LLMPAR_CPU=portable|avx2|avx512|avx512bf16 forces a dispatch level. Bits may differ between levels, never between
    meshes of one level.

llmpar DOES NOT

    - print, exit or abort: every fallible call returns llmpar_status, and the text of the error names rank, mesh
      coordinate, tensor, expected and got. (llmpar_launch and the trainer write to callbacks; their default is
      stderr and stdout.)
    - keep mutable globals, or take memory behind your back: all of it goes through your llmpar_allocator. (Two are
      malloc's, as they outlive a rank: records for a failure report, and over MPI where messages to a failed rank go.)
    - run under -ffast-math or -Ofast: equal bits need the order of sums that the source has. Contraction of a*b+c is
      switched off for this header alone; your own code keeps its flags.
    - use GPUs by itself: llmpar_cuda.h and llmpar_nccl.h do (docs/gpu.md). For anything else bring a device table
      (llmpar_device) or a communicator table (llmpar_comm) of your own.
    - promise equal bits outside the guarantee (docs/exact.md): rank counts that do not divide the canonical pieces, and
      gradients that travel in less than f32 (reduce_dtype), are deterministic, and refused under `exact = require`.

CHAPTERS: base (status, memory, numbers) - tables (one rank's view, device, communicator) - cpu - comm - sim - mesh - tp -
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

#include "base/platform.h"

LLMPAR_EXTERN_C_BEGIN

/* Chapter: base */
#include "base/status.h"
#include "base/heap.h"
#include "base/size.h"
#include "base/dtype.h"
#include "base/math.h"
#include "base/exact_sum.h"
#include "base/rng.h"
#include "base/xxh64.h"
#include "base/json.h"

/* Chapter: tables */
#include "tables/io.h"
#include "tables/ctx.h"
#include "tables/device.h"
#include "tables/comm.h"
#include "tables/backend.h"
#include "tables/record.h"
#include "tables/halving.h"
#include "tables/arena.h"

/* Chapter: cpu */
#include "cpu/cpu.h"

/* Chapter: comm */
#include "comm/threads.h"
#include "comm/mpi.h"

/* Chapter: sim */
#include "sim/sim.h"

/* Chapter: mesh */
#include "mesh/mesh.h"
#include "mesh/dtensor.h"
#include "mesh/redistribute.h"

/* Chapter: tp */
#include "tp/tp.h"

/* Chapter: fsdp */
#include "fsdp/unit.h"
#include "fsdp/schedule.h"
#include "fsdp/fsdp.h"

/* Chapter: optim */
#include "optim/lr.h"
#include "optim/optim.h"

/* Chapter: model */
#include "model/config.h"
#include "model/llama.h"

/* Chapter: io */
#include "io/system.h"
#include "io/file.h"
#include "io/safetensors.h"

/* Chapter: text */
#include "text/data.h"

/* Chapter: model_io */
#include "model_io/hf_files.h"
#include "model_io/hf.h"
#include "model_io/checkpoint.h"

/* Chapter: run */
#include "run/launch.h"
#include "run/trainer.h"
#include "run/plan.h"

LLMPAR_EXTERN_C_END

#endif /* LLMPAR_H */

/* ==== implementation ==== */

#if defined(LLMPAR_IMPLEMENTATION) && !defined(LLMPAR__IMPLEMENTED) && !defined(LLMPAR__SEPARATE)
#define LLMPAR__IMPLEMENTED
#ifndef LLMPAR_HEADER
#define LLMPAR_HEADER "llmpar.h"
#endif

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || __FLT_EVAL_METHOD__ == 2
#error "llmpar: compile the file with LLMPAR_IMPLEMENTATION without -ffast-math, -Ofast and their parts, -mfpmath=387 (-O3 is fine): equal bits on every mesh need the order of sums that the source has"
#endif

#if defined(__x86_64__) && !defined(LLMPAR_NO_SIMD)
#include <immintrin.h> /* here: each of its functions would carry the pragma's options */
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

#include "base/size.c"
#include "base/dtype.c"
#include "base/math.c"
#include "base/exact_sum.c"
#include "base/rng.c"
#include "base/xxh64.c"

#include "cpu/half.c"
#include "cpu/gemm_thin.c"
#include "cpu/gemm_kernel.c"
#include "cpu/gemm.c"
#include "cpu/attention.c"
#include "cpu/norm.c"
#include "cpu/rope.c"
#include "cpu/swiglu.c"
#include "cpu/embedding.c"
#include "cpu/xent.c"
#include "cpu/elementwise.c"
#include "cpu/tree_sum.c"
#include "cpu/kernels_avx2.c"
#include "cpu/kernels_avx512.c"
#if defined(__OPTIMIZE__) && !defined(__clang__) && defined(__x86_64__)
#pragma GCC optimize ("O1") /* what processors without AVX2 take: twice as fast to compile, some hundredths slower */
#endif
#include "cpu/kernels_portable.c"

/* From here on little is hot: gcc's lower level halves its work. Not where nothing was to be optimized: debuggers want -O0. */
#if defined(__OPTIMIZE__) && !defined(__clang__)
#pragma GCC optimize ("O1")
#endif

#include "cpu/optim.c"
#include "cpu/squares.c"
#include "cpu/adalomo.c"
#include "cpu/interleave.c"
#include "cpu/cpu.c"
#include "cpu/pool.c"
#include "cpu/stream.c"

#include "base/clock.c"
#include "tables/comm.c"
#include "tables/record.c"
#include "comm/threads_wait.c"
#include "comm/threads.c"
#include "comm/mpi_world.c"
#include "comm/mpi_wait.c"
#include "comm/mpi.c"

#include "model/sample.c"
#include "model/session.c"
#include "model/generate.c"

/* And from here on nothing is: what runs once a job, or some microseconds an instruction of a step; f64 is for checking gradients. (glibc's checked open is an error at -O0.) */
#if defined(__OPTIMIZE__) && !defined(__clang__) && !defined(_FORTIFY_SOURCE)
#pragma GCC optimize ("O0")
#endif

#include "base/status.c"
#include "base/heap.c"
#include "base/processors.c"
#include "tables/device.c"
#include "tables/ctx.c"
#include "tables/halving.c"
#include "tables/arena.c"
#include "tables/trace.c"

#include "cpu/kernels_f64.c"

#include "base/json.c"
#include "base/text.c"

#include "io/system.c"
#include "io/file.c"
#include "io/safetensors.c"

#include "sim/sim.c"

#include "mesh/mesh.c"
#include "mesh/dtensor.c"
#include "mesh/picture.c"
#include "mesh/redistribute_plan.c"
#include "mesh/redistribute.c"

#include "tp/tp.c"

#include "fsdp/flat.c"
#include "fsdp/store.c"
#include "fsdp/shard.c"
#include "fsdp/schedule_order.c"
#include "fsdp/schedule.c"
#include "fsdp/schedule_print.c"
#include "fsdp/validate.c"
#include "fsdp/account.c"
#include "fsdp/executor_unit.c"
#include "fsdp/executor_shard.c"
#include "fsdp/executor.c"

#include "optim/lr.c"
#include "optim/optim.c"
#include "optim/adalomo.c"

#include "text/data.c"

#include "model/config.c"
#include "model/rope_tables.c"
#include "model/llama.c"
#include "model/block.c"
#include "model/edges.c"

#include "model_io/hf_files.c"
#include "model_io/hf.c"
#include "model_io/checkpoint_directory.c"
#include "model_io/manifest.c"
#include "model_io/checkpoint.c"
#include "model_io/checkpoint_load.c"

#include "run/launch.c"
#include "run/launch_furnish.c"
#include "run/launch_mpi.c"
#include "run/launch_environment.c"
#include "run/parallelize.c"
#include "run/trainer.c"
#include "run/trainer_checkpoint.c"
#include "run/metrics.c"
#include "run/memory.c"
#include "run/plan.c"

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
