/* adalomo: the operations of AdaLomo (device.h). */
#include "base/bits_internal.h"
#include "base/exact_sum.h"
#include "base/math.h"
#include "cpu/cpu_internal.h"
#include "cpu/kernels_internal.h"

static const llmpar__kernel llmpar__adalomo_largest_kernels[4] = LLMPAR__VKERNELS_NARROW(adalomo_largest);
static const llmpar__kernel llmpar__adalomo_squares_kernels[4] = LLMPAR__VKERNELS_NARROW(adalomo_squares);
static const llmpar__kernel llmpar__adalomo_apply_kernels[4] = LLMPAR__VKERNELS_NARROW(adalomo_apply);
static const llmpar__kernel llmpar__adalomo_sums_kernels[4] = LLMPAR__VKERNELS(adalomo_sums);

/* The exponent e of factor_sum; 0: the number is too large, or none. */
static int llmpar__adalomo_exponent(double largest, double grad_scale, llmpar_dtype dtype, int32_t *e)
{
    double x = dtype == LLMPAR_F64 ? largest * grad_scale : (double)((float)largest * (float)grad_scale);
    if (x < 0) x = -x;
    if (!(x < llmpar__power_f64(1000))) return 0;
    *e = (int32_t)(llmpar__bits_f64(x) >> 52) - 1022;
    if (*e < -1000) *e = -1000;
    return 1;
}

/* ---- largest ---- */

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_largest(llmpar_device *device, llmpar_stream *stream, const llmpar_largest_args *args)
{
    llmpar__adalomo_largest_job job;
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar_status status = llmpar__v_check_wide(device, "largest", args->dtype);
    (void)stream;
    if (status || !args->count) return status;
    job.args = args;
    job.step = llmpar__v_max(2 * LLMPAR__ADALOMO_BLOCK, llmpar__v_blocks((int64_t)args->count, LLMPAR__ADALOMO_PARTS));
    int64_t tasks = llmpar__v_blocks((int64_t)args->count, job.step);
    llmpar__pool_run(cpu, llmpar__adalomo_largest_kernels[llmpar__v_index(cpu, args->dtype)], &job, tasks);
    for (int64_t i = 0; i < tasks; i++)
        if (!(*args->largest >= job.part[i]) && *args->largest == *args->largest) *args->largest = job.part[i];
    return LLMPAR_OK;
}

/* ---- rows and columns ---- */

/* A task takes a block of columns, of all rows or, where blocks are few, of neighbouring ones. Which task is first does not show in integers. */
LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_factor_sum(llmpar_device *device, llmpar_stream *stream, const llmpar_factor_sum_args *args)
{
    llmpar__adalomo_sum_job job;
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    int32_t e;
    llmpar_status status = llmpar__v_check_wide(device, "factor_sum", args->dtype);
    (void)stream;
    if (status || args->count <= 0 || !llmpar__adalomo_exponent(*args->largest, args->grad_scale, args->dtype, &e)) return status;
    job.args = args;
    job.down = llmpar__power_f64(args->dtype == LLMPAR_F32 && e < -200 ? 200 : -e); /* nothing but zeros: its square stays finite */
    job.by_row = llmpar__power_f64(args->row_bits);
    job.by_col = llmpar__power_f64(args->col_bits);
    int64_t blocks = llmpar__v_blocks(args->cols, LLMPAR__ADALOMO_COLUMNS), rows = (args->begin + args->count - 1) / args->cols - args->begin / args->cols + 1;
    job.step = llmpar__v_min(LLMPAR__ADALOMO_COLUMNS, llmpar__v_blocks(args->cols, 16 * blocks) * 16);
    job.rows = llmpar__v_blocks(rows, blocks >= 2 * llmpar__pool_threads(cpu) ? 1 : llmpar__pool_threads(cpu));
    job.parts = llmpar__v_blocks(rows, job.rows);
    llmpar__pool_run(cpu, llmpar__adalomo_sums_kernels[llmpar__v_index(cpu, args->dtype)], &job, llmpar__v_blocks(args->cols, job.step) * job.parts);
    return LLMPAR_OK;
}

#define LLMPAR__ADALOMO_MOMENTS(name, real) \
    static void name(const llmpar_factor_moment_args *a, double unit) \
    { \
        real *m = (real *)a->moment, *f = (real *)a->factor; \
        double mean = 0; \
        for (int64_t i = 0; i < a->count; i++) { \
            m[i] = (real)(a->beta * (double)m[i] + (1 - a->beta) * ((double)a->sums[i] * unit + a->eps)); \
            mean += (double)m[i]; \
        } \
        mean = a->by_mean ? mean / (double)a->count : 1; \
        for (int64_t i = 0; i < a->count; i++) f[i] = (real)llmpar_sqrt_f64(mean / (double)m[i]); \
    }
LLMPAR__ADALOMO_MOMENTS(llmpar__adalomo_moments_f32, float)
LLMPAR__ADALOMO_MOMENTS(llmpar__adalomo_moments_f64, double)
#undef LLMPAR__ADALOMO_MOMENTS

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_factor_moment(llmpar_device *device, llmpar_stream *stream, const llmpar_factor_moment_args *args)
{
    int32_t e = 0;
    llmpar_status status = llmpar__v_check_wide(device, "factor_moment", args->dtype);
    (void)stream;
    if (status || args->count <= 0) return status;
    double power = 0, unit;
    if (llmpar__adalomo_exponent(*args->largest, args->grad_scale, args->dtype, &e)) power = llmpar__power_f64(e);
    else power = llmpar__from_bits_f64(UINT64_C(0x7ff8000000000000)); /* NaN */
    unit = llmpar__power_f64(-args->bits) * power * power / (double)args->terms;
    if (args->dtype == LLMPAR_F32) llmpar__adalomo_moments_f32(args, unit);
    else llmpar__adalomo_moments_f64(args, unit);
    return LLMPAR_OK;
}

/* ---- the update ---- */

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_adalomo_square(llmpar_device *device, llmpar_stream *stream, const llmpar_adalomo_args *args)
{
    llmpar__adalomo_square_job job;
    llmpar_exact_sum *sum = (llmpar_exact_sum *)(void *)args->update_squares;
    llmpar_status status = llmpar__v_check_wide(device, "adalomo_square", args->dtype);
    (void)stream;
    if (status || args->count <= 0) return status;
    job.args = args;
    job.cpu = (llmpar__cpu *)device->state;
    job.step = llmpar__v_max(2 * LLMPAR__ADALOMO_BLOCK, llmpar__v_blocks(args->count, LLMPAR__ADALOMO_PARTS));
    int64_t tasks = llmpar__v_blocks(args->count, job.step);
    llmpar__pool_run(job.cpu, llmpar__adalomo_squares_kernels[llmpar__v_index(job.cpu, args->dtype)], &job, tasks);
    for (int64_t i = 0; i < tasks && sum; i++) llmpar_exact_sum_merge(sum, &job.part[i]);
    if (sum) llmpar_exact_sum_carry(sum);
    return LLMPAR_OK;
}

static double llmpar__adalomo_rms(const int64_t *squares, int64_t elements)
{
    return llmpar_sqrt_f64(llmpar_exact_sum_value((const llmpar_exact_sum *)(const void *)squares) / (double)elements);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_adalomo(llmpar_device *device, llmpar_stream *stream, const llmpar_adalomo_args *args)
{
    llmpar__adalomo_apply_job job;
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar_status status = llmpar__v_check_wide(device, "adalomo", args->dtype);
    (void)stream;
    if (status || args->count <= 0) return status;
    double update = llmpar__adalomo_rms(args->update_squares, args->elements), param = llmpar__adalomo_rms(args->param_squares, args->elements), rate = args->lr * (param < 1e-3 ? 1e-3 : param);
    job.args = args;
    job.keep = 1 - rate * args->decay;
    job.minus = -rate / (update < 1 ? 1 : update);
    llmpar__pool_run(cpu, llmpar__adalomo_apply_kernels[llmpar__v_index(cpu, args->dtype)], &job, llmpar__v_blocks(args->count, LLMPAR__ADALOMO_TASK));
    return LLMPAR_OK;
}
