/* adalomo: the operations of AdaLomo (device.h). Plain loops, the same at every level: they wait for memory. */
#include "base/exact_sum.h"
#include "base/math.h"
#include "cpu/cpu_internal.h"
#include "cpu/vector.h"

enum { LLMPAR__ADALOMO_BLOCK = 1024, LLMPAR__ADALOMO_CHUNK = 8192, LLMPAR__ADALOMO_PARTS = 16, LLMPAR__ADALOMO_COLUMNS = 256 };

/* 2^e, -1022 <= e <= 1023. */
static double llmpar__adalomo_power(int32_t e)
{
    uint64_t bits = (uint64_t)(e + 1023) << 52;
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The exponent e of factor_sum; 0: the number is too large, or none. */
static int llmpar__adalomo_exponent(double largest, double grad_scale, llmpar_dtype dtype, int32_t *e)
{
    double x = dtype == LLMPAR_F64 ? largest * grad_scale : (double)((float)largest * (float)grad_scale);
    uint64_t bits;
    if (x < 0) x = -x;
    if (!(x < llmpar__adalomo_power(1000))) return 0;
    memcpy(&bits, &x, sizeof bits);
    *e = (int32_t)(bits >> 52) - 1022;
    if (*e < -1000) *e = -1000;
    return 1;
}

#define LLMPAR__ADALOMO_REAL float
#define LLMPAR__ADALOMO_FN(name) llmpar__adalomo_##name##_f32
#define LLMPAR__ADALOMO_SQRT llmpar_sqrt_f32
#include "cpu/adalomo.inc"
#define LLMPAR__ADALOMO_REAL double
#define LLMPAR__ADALOMO_FN(name) llmpar__adalomo_##name##_f64
#define LLMPAR__ADALOMO_SQRT llmpar_sqrt_f64
#include "cpu/adalomo.inc"

/* ---- largest ---- */

/* As integers the absolute values are in order, infinity above all numbers and NaN above infinity. */
typedef struct llmpar__adalomo_largest_job { const llmpar_largest_args *args; int64_t step; double part[LLMPAR__ADALOMO_PARTS]; } llmpar__adalomo_largest_job;

static void llmpar__adalomo_largest(void *arg, int64_t task, int32_t worker)
{
    llmpar__adalomo_largest_job *job = (llmpar__adalomo_largest_job *)arg;
    int64_t begin = task * job->step, end = llmpar__v_min((int64_t)job->args->count, begin + job->step);
    (void)worker;
    if (job->args->dtype == LLMPAR_F32) {
        uint32_t most = 0, bits;
        float x;
        for (int64_t i = begin; i < end; i++) {
            memcpy(&bits, (const float *)job->args->x + i, sizeof bits);
            bits &= 0x7fffffffu;
            most = bits > most ? bits : most;
        }
        memcpy(&x, &most, sizeof x);
        job->part[task] = (double)x;
    } else {
        uint64_t most = 0, bits;
        for (int64_t i = begin; i < end; i++) {
            memcpy(&bits, (const double *)job->args->x + i, sizeof bits);
            bits &= UINT64_C(0x7fffffffffffffff);
            most = bits > most ? bits : most;
        }
        memcpy(&job->part[task], &most, sizeof most);
    }
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_largest(llmpar_device *device, llmpar_stream *stream, const llmpar_largest_args *args)
{
    llmpar__adalomo_largest_job job;
    llmpar_status status = llmpar__v_check(device, "largest", args->dtype);
    (void)stream;
    if (status || !args->count) return status;
    job.args = args;
    job.step = llmpar__v_max(LLMPAR__ADALOMO_CHUNK, llmpar__v_blocks((int64_t)args->count, LLMPAR__ADALOMO_PARTS));
    int64_t tasks = llmpar__v_blocks((int64_t)args->count, job.step);
    llmpar__pool_run((llmpar__cpu *)device->state, llmpar__adalomo_largest, &job, tasks);
    for (int64_t i = 0; i < tasks; i++)
        if (!(*args->largest >= job.part[i]) && *args->largest == *args->largest) *args->largest = job.part[i];
    return LLMPAR_OK;
}

/* ---- rows and columns ---- */

/* A task takes a block of columns: their sums are its own, those of the rows it adds to. Which task is first does not show in integers. */
typedef struct llmpar__adalomo_sum_job { const llmpar_factor_sum_args *args; double down; } llmpar__adalomo_sum_job;

static void llmpar__adalomo_sum(void *arg, int64_t task, int32_t worker)
{
    const llmpar__adalomo_sum_job *job = (const llmpar__adalomo_sum_job *)arg;
    int64_t begin = task * LLMPAR__ADALOMO_COLUMNS, end = llmpar__v_min(job->args->cols, begin + LLMPAR__ADALOMO_COLUMNS);
    (void)worker;
    if (job->args->dtype == LLMPAR_F32) llmpar__adalomo_sums_f32(job->args, begin, end, job->down);
    else llmpar__adalomo_sums_f64(job->args, begin, end, job->down);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_factor_sum(llmpar_device *device, llmpar_stream *stream, const llmpar_factor_sum_args *args)
{
    llmpar__adalomo_sum_job job;
    int32_t e;
    llmpar_status status = llmpar__v_check(device, "factor_sum", args->dtype);
    (void)stream;
    if (status || args->count <= 0 || !llmpar__adalomo_exponent(*args->largest, args->grad_scale, args->dtype, &e)) return status;
    job.args = args;
    job.down = llmpar__adalomo_power(-e);
    llmpar__pool_run((llmpar__cpu *)device->state, llmpar__adalomo_sum, &job, llmpar__v_blocks(args->cols, LLMPAR__ADALOMO_COLUMNS));
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_factor_moment(llmpar_device *device, llmpar_stream *stream, const llmpar_factor_moment_args *args)
{
    int32_t e = 0;
    llmpar_status status = llmpar__v_check(device, "factor_moment", args->dtype);
    (void)stream;
    if (status || args->count <= 0) return status;
    double power = 0, unit;
    if (llmpar__adalomo_exponent(*args->largest, args->grad_scale, args->dtype, &e)) power = llmpar__adalomo_power(e);
    else { /* NaN */
        uint64_t bits = UINT64_C(0x7ff8000000000000);
        memcpy(&power, &bits, sizeof power);
    }
    unit = llmpar__adalomo_power(-args->bits) * power * power / (double)args->terms;
    if (args->dtype == LLMPAR_F32) llmpar__adalomo_moments_f32(args, unit);
    else llmpar__adalomo_moments_f64(args, unit);
    return LLMPAR_OK;
}

/* ---- the update ---- */

typedef struct llmpar__adalomo_square_job { const llmpar_adalomo_args *args; int64_t step; llmpar_exact_sum part[LLMPAR__ADALOMO_PARTS]; } llmpar__adalomo_square_job;

static void llmpar__adalomo_square(void *arg, int64_t task, int32_t worker)
{
    llmpar__adalomo_square_job *job = (llmpar__adalomo_square_job *)arg;
    int64_t begin = task * job->step, end = llmpar__v_min(job->args->count, begin + job->step);
    (void)worker;
    memset(&job->part[task], 0, sizeof job->part[task]);
    if (job->args->dtype == LLMPAR_F32) llmpar__adalomo_squares_f32(job->args, begin, end, &job->part[task]);
    else llmpar__adalomo_squares_f64(job->args, begin, end, &job->part[task]);
    llmpar_exact_sum_carry(&job->part[task]);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_adalomo_square(llmpar_device *device, llmpar_stream *stream, const llmpar_adalomo_args *args)
{
    llmpar__adalomo_square_job job;
    llmpar_exact_sum *sum = (llmpar_exact_sum *)(void *)args->update_squares;
    llmpar_status status = llmpar__v_check(device, "adalomo_square", args->dtype);
    (void)stream;
    if (status || args->count <= 0) return status;
    job.args = args;
    job.step = llmpar__v_max(LLMPAR__ADALOMO_CHUNK, llmpar__v_blocks(args->count, LLMPAR__ADALOMO_PARTS));
    int64_t tasks = llmpar__v_blocks(args->count, job.step);
    llmpar__pool_run((llmpar__cpu *)device->state, llmpar__adalomo_square, &job, tasks);
    for (int64_t i = 0; i < tasks && sum; i++) llmpar_exact_sum_merge(sum, &job.part[i]);
    if (sum) llmpar_exact_sum_carry(sum);
    return LLMPAR_OK;
}

typedef struct llmpar__adalomo_apply_job { const llmpar_adalomo_args *args; double keep, minus; } llmpar__adalomo_apply_job;

static void llmpar__adalomo_apply(void *arg, int64_t task, int32_t worker)
{
    const llmpar__adalomo_apply_job *job = (const llmpar__adalomo_apply_job *)arg;
    int64_t begin = task * LLMPAR__ADALOMO_CHUNK, end = llmpar__v_min(job->args->count, begin + LLMPAR__ADALOMO_CHUNK);
    (void)worker;
    if (job->args->dtype == LLMPAR_F32) llmpar__adalomo_apply_f32(job->args, begin, end, job->keep, job->minus);
    else llmpar__adalomo_apply_f64(job->args, begin, end, job->keep, job->minus);
}

static double llmpar__adalomo_rms(const int64_t *squares, int64_t elements)
{
    return llmpar_sqrt_f64(llmpar_exact_sum_value((const llmpar_exact_sum *)(const void *)squares) / (double)elements);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_adalomo(llmpar_device *device, llmpar_stream *stream, const llmpar_adalomo_args *args)
{
    llmpar__adalomo_apply_job job;
    llmpar_status status = llmpar__v_check(device, "adalomo", args->dtype);
    (void)stream;
    if (status || args->count <= 0) return status;
    double update = llmpar__adalomo_rms(args->update_squares, args->elements), param = llmpar__adalomo_rms(args->param_squares, args->elements), rate = args->lr * (param < 1e-3 ? 1e-3 : param);
    job.args = args;
    job.keep = 1 - rate * args->decay;
    job.minus = -rate / (update < 1 ? 1 : update);
    llmpar__pool_run((llmpar__cpu *)device->state, llmpar__adalomo_apply, &job, llmpar__v_blocks(args->count, LLMPAR__ADALOMO_CHUNK));
    return LLMPAR_OK;
}
