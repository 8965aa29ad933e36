/* rope: rotary position embedding in place (Su et al. 2021), half-split order. */
#include "cpu/cpu_internal.h"
#include "cpu/kernels_internal.h"

static const llmpar__kernel llmpar__rope_kernels[4] = LLMPAR__VKERNELS(rope_rotate);

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
