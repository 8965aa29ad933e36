/* xent: vocab-parallel softmax cross-entropy in steps (Shoeybi et al. 2019, section 3): row maximum, sum of exp in vocab pieces, loss, gradient.
   The caller combines over the "tp" axis between the steps; logits are never gathered and never rescaled. */
#include "base/exact_sum.h"
#include "cpu/cpu_internal.h"
#include "cpu/kernels_internal.h"

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
