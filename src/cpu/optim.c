/* optim: AdamW (Loshchilov & Hutter 2019) and SGD element by element, and the order-free sum of squares that the gradient norm needs. */
#include "base/exact_sum.h"
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
    llmpar_status status = llmpar__v_check_wide(device, "square_sum", args->dtype);
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
