/* norm: RMSNorm (Zhang & Sennrich 2019) forward and backward. The hidden dim is never split, so the sum over it is in lanes; the sum of dw over tokens
   may be split by a mesh and follows docs/exact.md: a chain per T-piece, a tree over T-pieces, one row a leaf. */
#include "cpu/cpu_internal.h"
#include "cpu/kernels_internal.h"

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
    job.half = llmpar__half_of(cpu, args->dtype);
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
    job.half = llmpar__half_of(cpu, args->dtype);
    /* dw first: dx may take the place of dy. */
    if (args->dw_leaves && tokens->leaves > 0) {
        if (tokens->canon < 1 || tokens->batch % tokens->leaves)
            return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "rmsnorm_backward: %lld leaves for batch %lld, canon %d: expected leaves that divide the batch, canon >= 1", (long long)tokens->leaves, (long long)tokens->batch, (int)tokens->canon);
        llmpar__pool_run(cpu, llmpar__norm_dw_kernels[kernel], &job, tokens->leaves * job.blocks);
    }
    llmpar__pool_run(cpu, llmpar__norm_dx_kernels[kernel], &job, llmpar__v_blocks(tokens->batch * tokens->t, job.step));
    return LLMPAR_OK;
}
