/* device: the options that say what ranks compute and communicate with. Compiled with LLMPAR_USE_CUDA (and llmpar_cuda.h as an object of nvcc linked) a program knows CUDA, with LLMPAR_USE_NCCL as well NCCL; otherwise
   these words are refused with the reason. */
#ifndef EXAMPLES_DEVICE_H
#define EXAMPLES_DEVICE_H

#include "options.h"

#ifdef LLMPAR_USE_CUDA
#include "llmpar_cuda.h"
#endif
#ifdef LLMPAR_USE_NCCL
#define LLMPAR_NCCL_IMPLEMENTATION
#include "llmpar_nccl.h"
#endif

/* For getopt_long: append to a program's own list. */
enum { DEVICE_OPTION = 258 };
#define DEVICE_OPTIONS {"device", 1, 0, DEVICE_OPTION}, {"cuda-mode", 1, 0, DEVICE_OPTION}, {"tf32", 0, 0, DEVICE_OPTION}, {"cudnn", 0, 0, DEVICE_OPTION}, {"comm", 1, 0, DEVICE_OPTION}

#define DEVICE_USAGE \
    "device (docs/gpu.md)\n" \
    "  --device cpu|cuda   what ranks compute with; cuda: a program built with CUDA (make build/NAME_cuda). Rank N of a machine takes\n" \
    "                      GPU N modulo its GPUs (default cpu)\n" \
    "  --cuda-mode exact|fast   exact: the same bits on every mesh (default); fast: products of the vendor's library, and with --comm nccl\n" \
    "                      sums in NCCL's own order\n" \
    "  --tf32              f32 products in TF32; with --cuda-mode fast\n" \
    "  --cudnn             attention of cuDNN, where built with it; with --cuda-mode fast\n" \
    "  --comm threads|nccl   what GPUs talk through: rank threads, which may share a GPU (default), or NCCL, a GPU each. With nccl, where RANK\n" \
    "                      and WORLD_SIZE are in the environment (torchrun), this process is that rank\n"

typedef struct device_settings {
    int cuda, mode, tf32, cudnn, nccl; /* as on the command line; mode: 1 + its index, 0: not given */
    llmpar_backend backend;
#ifdef LLMPAR_USE_CUDA
    llmpar_cuda_desc desc;
#endif
#ifdef LLMPAR_USE_NCCL
    llmpar_nccl_desc comm;
#endif
} device_settings;

/* One option. 0, or 2 with the line printed. */
__attribute__((unused)) static int device_option(const char *option, const char *text, device_settings *d)
{
    static const char *const devices[] = {"cpu", "cuda"}, *const modes[] = {"exact", "fast"}, *const comms[] = {"threads", "nccl"};
    int word = 0, bad = 0;
    if (!strcmp(option, "device")) {
        bad = option_word("--device", text, devices, 2, &word);
        d->cuda = word;
    } else if (!strcmp(option, "cuda-mode")) {
        bad = option_word("--cuda-mode", text, modes, 2, &word);
        d->mode = 1 + word;
    } else if (!strcmp(option, "comm")) {
        bad = option_word("--comm", text, comms, 2, &word);
        d->nccl = word;
    } else if (!strcmp(option, "tf32")) {
        d->tf32 = 1;
    } else {
        d->cudnn = 1;
    }
    return bad;
}

/* Do the options go together, and can this program do what they say? program: its name. 0, or 2 with the line printed. */
__attribute__((unused)) static int device_options_check(const device_settings *d, const char *program)
{
    (void)program;
    if (!d->cuda && (d->mode || d->tf32 || d->cudnn || d->nccl)) return option_error("--cuda-mode, --tf32, --cudnn and --comm nccl say how to compute with --device cuda, which is missing, see --help");
    if ((d->tf32 || d->cudnn) && d->mode != 2) return option_error("--%s: expected --cuda-mode fast beside it: exact products and attention are the library's own", d->tf32 ? "tf32" : "cudnn");
#ifndef LLMPAR_USE_CUDA
    if (d->cuda) return option_error("--device cuda: this program was built without CUDA, expected build/%s_cuda (make build/%s_cuda)", program, program);
#endif
#ifndef LLMPAR_USE_NCCL
    if (d->nccl) return option_error("--comm nccl: this program was built without NCCL, expected build/%s_nccl (make build/%s_nccl)", program, program);
#endif
    return 0;
}

/* Into the launch desc; *d stays until launch returns. */
__attribute__((unused)) static void device_launch(device_settings *d, llmpar_launch_desc *launch)
{
    memset(&d->backend, 0, sizeof d->backend);
    if (!d->cuda) return;
#ifdef LLMPAR_USE_CUDA
    memset(&d->desc, 0, sizeof d->desc);
    d->desc.mode = d->mode == 2 ? LLMPAR_CUDA_FAST : LLMPAR_CUDA_EXACT;
    d->desc.tf32 = d->tf32;
    d->desc.cudnn = d->cudnn;
    llmpar_cuda_backend(&d->desc, &d->backend);
#endif
#ifdef LLMPAR_USE_NCCL
    if (d->nccl) {
        memset(&d->comm, 0, sizeof d->comm);
        d->comm.fast = d->mode == 2;
        llmpar_nccl_backend(&d->comm, &d->backend);
        if (getenv("RANK") && getenv("WORLD_SIZE")) launch->transport = LLMPAR_TRANSPORT_ENVIRONMENT;
    }
#endif
    launch->backend = &d->backend;
}

#endif
