/* squares: the order-free, exact sum of squares (base/exact_sum.h) that gradient norms and AdaLomo need, as fast as memory gives the numbers. */
#include "cpu/squares_internal.h"

#include "base/bits_internal.h"

static const llmpar__kernel llmpar__squares_kernels[4] = LLMPAR__SQUARES_KERNELS;

/* A sum of units: exact, although a double holds only 53 of its bits. */
static void llmpar__squares_deposit(llmpar_exact_sum *sum, int64_t units, double unit)
{
    llmpar_exact_sum_add(sum, (double)(units >> 32) * (unit * 4294967296.0));
    llmpar_exact_sum_add(sum, (double)(units & 0xFFFFFFFF) * unit);
}

LLMPAR__PRIVATE_DEF void llmpar__squares_flush(llmpar__squares_window *window, llmpar_exact_sum *sum)
{
    for (int w = 0; w < LLMPAR__SQUARES_WORDS; w++) {
        if (window->high[w] || window->low[w]) {
            llmpar__squares_deposit(sum, window->high[w], window->unit[w] * 67108864.0);
            llmpar__squares_deposit(sum, window->low[w], window->unit[w]);
        }
        window->high[w] = window->low[w] = 0;
    }
    window->blocks = 0;
}

/* Floats of exponents e <= top (e >= 1, 127 for 1): squares are below 2^(2 top - 252) and multiples of 2^(2 e - 300). A word is a register that starts at 2^k (later ones, which take terms of both signs, in the middle of
   [2^k, 2^(k + 1))) with room for 2^L terms, L = LOG_ADDITIONS, before it leaves that range: so its unit stays 2^(k - 52), and what an addition rounds off is at most half of that and goes to the next word.
     word 0: k = 2 top - 252 + L;  word 1: 2 top - 304 + 2 L, unit 2^(2 top - 356 + 2 L), nothing is rounded off if e >= top - 28 + L;  word 2: unit 2^(2 top - 408 + 3 L), e >= top - 54 + 3/2 L */
LLMPAR__PRIVATE_DEF int llmpar__squares_choose(llmpar__squares_window *window, llmpar_exact_sum *sum, uint32_t largest, uint32_t least)
{
    int most = (int)(largest >> 23), fewest = (int)(least >> 23), spread, below;
    most = most ? most : 1;
    fewest = fewest ? fewest : 1;
    if (most == 255) return 0;
    spread = most - fewest;
    below = window->top - fewest;
    if (most > window->top || window->blocks >= LLMPAR__SQUARES_BLOCKS || (below > LLMPAR__SQUARES_TWO && spread <= LLMPAR__SQUARES_TWO) || (below > LLMPAR__SQUARES_THREE && spread <= LLMPAR__SQUARES_THREE)) {
        llmpar__squares_flush(window, sum);
        window->top = most + (spread < LLMPAR__SQUARES_TWO); /* room for the next block's */
        below = window->top - fewest;
        int k = 2 * window->top - 252 + LLMPAR__SQUARES_LOG_ADDITIONS;
        for (int w = 0; w < LLMPAR__SQUARES_WORDS; w++) {
            window->start[w] = llmpar__power_f64(k) * (w ? 1.5 : 1.0);
            window->unit[w] = llmpar__power_f64(k - 52);
            k += LLMPAR__SQUARES_LOG_ADDITIONS - 52;
        }
    }
    if (below > LLMPAR__SQUARES_THREE) return 0;
    window->blocks++;
    return below > LLMPAR__SQUARES_TWO ? 3 : 2;
}

LLMPAR__PRIVATE_DEF void llmpar__squares_add(const llmpar__cpu *cpu, llmpar__squares_window *window, llmpar_exact_sum *sum, const float *value, int64_t count, const float *ahead)
{
    llmpar__squares_job job;
    job.value = value;
    job.ahead = ahead;
    job.window = window;
    job.count = job.step = count;
    job.sums = sum;
    llmpar__squares_kernels[llmpar__v_index(cpu, LLMPAR_F32)](&job, 0, 0);
}

/* f64: the rounded square, added exactly. */
static void llmpar__squares_f64(void *arg, int64_t task, int32_t worker)
{
    const llmpar__squares_job *job = (const llmpar__squares_job *)arg;
    int64_t begin = task * job->step, end = llmpar__v_min(job->count, begin + job->step);
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        double x = ((const double *)job->value)[i];
        llmpar_exact_sum_add(&job->sums[task], x * x);
        if (!((i + 1) & 0xfffffff)) llmpar_exact_sum_carry(&job->sums[task]);
    }
    llmpar_exact_sum_carry(&job->sums[task]);
}

/* Each task sums into an accumulator of its own; accumulators are integers, so how many there are does not show. */
LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_square_sum(llmpar_device *device, llmpar_stream *stream, const llmpar_square_sum_args *args)
{
    enum { PARTS = 16 };
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar_exact_sum part[PARTS], *accumulator = (llmpar_exact_sum *)(void *)args->accumulator;
    llmpar__squares_job job;
    llmpar_status status = llmpar__v_check_wide(device, "square_sum", args->dtype);
    (void)stream;
    if (status || !args->count) return status;
    int64_t tasks = llmpar__v_min(PARTS, llmpar__v_blocks((int64_t)args->count, 4 * LLMPAR__SQUARES_BLOCK));
    job.value = args->x;
    job.ahead = (const char *)args->x + LLMPAR__VAHEAD;
    job.window = NULL;
    job.count = (int64_t)args->count;
    job.step = llmpar__v_blocks(job.count, tasks);
    job.sums = part;
    tasks = llmpar__v_blocks(job.count, job.step);
    memset(part, 0, (size_t)tasks * sizeof *part);
    llmpar__pool_run(cpu, args->dtype == LLMPAR_F64 ? llmpar__squares_f64 : llmpar__squares_kernels[llmpar__v_index(cpu, args->dtype)], &job, tasks);
    for (int64_t i = 0; i < tasks; i++) llmpar_exact_sum_merge(accumulator, &part[i]);
    llmpar_exact_sum_carry(accumulator);
    return LLMPAR_OK;
}
