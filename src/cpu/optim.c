/* optim: AdamW (Loshchilov & Hutter 2019) and SGD, element by element. */
#include "cpu/cpu_internal.h"
#include "cpu/kernels_internal.h"

static const llmpar__kernel llmpar__optim_adamw_kernels[4] = LLMPAR__VKERNELS_NARROW(optim_adamw);

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_adamw(llmpar_device *device, llmpar_stream *stream, const llmpar_adamw_args *args)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar_status status = llmpar__v_check_wide(device, "adamw", args->dtype);
    (void)stream;
    if (!status) llmpar__pool_run(cpu, llmpar__optim_adamw_kernels[llmpar__v_index(cpu, args->dtype)], (void *)(uintptr_t)args, llmpar__v_blocks((int64_t)args->count, LLMPAR__OPTIM_CHUNK));
    return status;
}

static const llmpar__kernel llmpar__optim_sgd_kernels[4] = LLMPAR__VKERNELS_NARROW(optim_sgd);

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_sgd(llmpar_device *device, llmpar_stream *stream, const llmpar_sgd_args *args)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar_status status = llmpar__v_check(device, "sgd", args->dtype);
    (void)stream;
    if (!status) llmpar__pool_run(cpu, llmpar__optim_sgd_kernels[llmpar__v_index(cpu, args->dtype)], (void *)(uintptr_t)args, llmpar__v_blocks((int64_t)args->count, LLMPAR__OPTIM_CHUNK));
    return status;
}
