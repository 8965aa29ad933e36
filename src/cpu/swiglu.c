/* swiglu: h = gate * sigmoid(gate) * up (Shazeer 2020), forward and backward, element-wise. */
#include "cpu/cpu_internal.h"
#include "cpu/kernels_internal.h"

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
    job.step = llmpar__v_max(1, 16384 / args->dim);
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
    job.step = llmpar__v_max(1, 16384 / args->dim);
    llmpar__pool_run(cpu, llmpar__swiglu_backward_kernels[llmpar__v_index(cpu, args->dtype)], &job, llmpar__v_blocks(args->rows, job.step));
    return LLMPAR_OK;
}
