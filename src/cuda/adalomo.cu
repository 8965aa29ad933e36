/* adalomo: the operations of AdaLomo (tables/device.h), with the bits of the CPU device: products and sums one by one in its order, sums over rows and columns in integers, squares in the exact accumulator.

   What a sum depends on (the largest gradient, the root mean squares) lies in device memory: each block's first thread reads it and does the few scalar operations itself. */
#include "cuda/exact_internal.h"

/* 2^e, -1022 <= e <= 1023. */
static __device__ __forceinline__ double llmpar__cuda_power(int e) { return __longlong_as_double((long long)(e + 1023) << 52); }

/* The exponent e of factor_sum: 2^e is the smallest power of two above largest * grad_scale, e >= -1000; 0: that is too large, or no number. */
static __device__ __forceinline__ int llmpar__cuda_factor_exponent(double largest, double grad_scale, int *e)
{
    double x = (double)__fmul_rn((float)largest, (float)grad_scale);
    if (x < 0) x = -x;
    if (!(x < llmpar__cuda_power(1000))) return 0;
    *e = (int)(__double_as_longlong(x) >> 52) - 1022;
    if (*e < -1000) *e = -1000;
    return 1;
}

/* ---- rows and columns ---- */

enum { LLMPAR__CUDA_FACTOR_COLUMNS = 256, LLMPAR__CUDA_FACTOR_ROWS = 32 };

/* A warp takes a tile of 256 columns and 32 rows, eight columns a lane. A column's sum stays in its lane to the end of the tile, a row's is added up over the lanes; both go to memory by integer additions. */
__global__ void __launch_bounds__(256) llmpar__cuda_factor_sum_kernel(llmpar_factor_sum_args a)
{
    const float *g = (const float *)a.g;
    float scale = (float)a.grad_scale;
    int64_t end = a.begin + a.count, first_row = a.begin / a.cols, rows = (end - 1) / a.cols + 1 - first_row, lane = threadIdx.x % 32;
    int64_t across = (a.cols + LLMPAR__CUDA_FACTOR_COLUMNS - 1) / LLMPAR__CUDA_FACTOR_COLUMNS, tiles = across * ((rows + LLMPAR__CUDA_FACTOR_ROWS - 1) / LLMPAR__CUDA_FACTOR_ROWS);
    int e;
    if (!llmpar__cuda_factor_exponent(*a.largest, a.grad_scale, &e)) return;
    double down = llmpar__cuda_power(-e), by_row = llmpar__cuda_power(a.row_bits), by_col = llmpar__cuda_power(a.col_bits);
    for (int64_t tile = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; tile < tiles; tile += (int64_t)gridDim.x * (blockDim.x / 32)) {
        int64_t row = first_row + tile / across * LLMPAR__CUDA_FACTOR_ROWS, last = row + LLMPAR__CUDA_FACTOR_ROWS, column = tile % across * LLMPAR__CUDA_FACTOR_COLUMNS + lane;
        long long down_sum[8] = { 0, 0, 0, 0, 0, 0, 0, 0 };
        if (last > first_row + rows) last = first_row + rows;
        for (; row < last; row++) {
            long long row_sum = 0;
#pragma unroll
            for (int k = 0; k < 8; k++) {
                int64_t c = column + 32 * k, i = row * a.cols + c;
                if (c >= a.cols || i < a.begin || i >= end) continue;
                double y = __dmul_rn((double)__fmul_rn(g[i - a.begin], scale), down), square = __dmul_rn(y, y);
                long long some = y != 0;
                row_sum += (long long)__dmul_rn(square, by_row) + some;
                down_sum[k] += (long long)__dmul_rn(square, by_col) + some;
            }
            row_sum = llmpar__cuda_warp_sum(row_sum);
            if (lane == 0 && row_sum) atomicAdd((unsigned long long *)(void *)a.row_sums + row, (unsigned long long)row_sum);
        }
#pragma unroll
        for (int k = 0; k < 8; k++)
            if (down_sum[k]) atomicAdd((unsigned long long *)(void *)a.col_sums + column + 32 * k, (unsigned long long)down_sum[k]);
    }
}

static llmpar_status llmpar__cuda_factor_sum(llmpar_device *device, llmpar_stream *stream, const llmpar_factor_sum_args *args)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "factor_sum", args->dtype, 0);
    if (status || args->count <= 0) return status;
    int64_t per = LLMPAR__CUDA_FACTOR_COLUMNS * LLMPAR__CUDA_FACTOR_ROWS / 32, across = (args->cols + LLMPAR__CUDA_FACTOR_COLUMNS - 1) / LLMPAR__CUDA_FACTOR_COLUMNS * LLMPAR__CUDA_FACTOR_COLUMNS;
    unsigned blocks = llmpar__cuda_blocks(llmpar__cuda_of(device), (args->count / args->cols + 2) * across / per + 1, 256, 4);
    llmpar__cuda_launch(device, stream, llmpar__cuda_factor_sum_kernel, dim3(blocks), dim3(256), 0, *args);
    return llmpar__cuda_end(device, stream, "factor_sum");
}

enum { LLMPAR__CUDA_MOMENT_TILE = 1024 };

/* With by_mean one block alone: the mean is a chain, tile by tile by one thread. Otherwise any number of blocks. */
__global__ void __launch_bounds__(256) llmpar__cuda_factor_moment_kernel(llmpar_factor_moment_args a)
{
    LLMPAR__CUDA_SHARED(double, shared);
    float *moment = (float *)a.moment, *factor = (float *)a.factor;
    double *tile = shared + 1, mean = 0, power = __longlong_as_double(0x7ff8000000000000), rest = __dadd_rn(1, -a.beta);
    int64_t count = a.count;
    int e;
    if (llmpar__cuda_factor_exponent(*a.largest, a.grad_scale, &e)) power = llmpar__cuda_power(e);
    double unit = __ddiv_rn(__dmul_rn(__dmul_rn(llmpar__cuda_power(-a.bits), power), power), (double)a.terms);
    for (int64_t at = (int64_t)blockIdx.x * LLMPAR__CUDA_MOMENT_TILE; at < count; at += (int64_t)gridDim.x * LLMPAR__CUDA_MOMENT_TILE) {
        int64_t n = count - at < LLMPAR__CUDA_MOMENT_TILE ? count - at : (int64_t)LLMPAR__CUDA_MOMENT_TILE;
        for (int64_t k = threadIdx.x; k < n; k += blockDim.x) {
            float m = (float)__dadd_rn(__dmul_rn(a.beta, (double)moment[at + k]), __dmul_rn(rest, __dadd_rn(__dmul_rn((double)a.sums[at + k], unit), a.eps)));
            moment[at + k] = m;
            if (a.by_mean) tile[k] = (double)m;
            else factor[at + k] = (float)__dsqrt_rn(__ddiv_rn(1, (double)m));
        }
        if (!a.by_mean) continue;
        __syncthreads();
        if (threadIdx.x == 0)
            for (int64_t k = 0; k < n; k++) mean = __dadd_rn(mean, tile[k]);
        __syncthreads();
    }
    if (!a.by_mean) return;
    if (threadIdx.x == 0) shared[0] = __ddiv_rn(mean, (double)count);
    __syncthreads();
    mean = shared[0];
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) factor[i] = (float)__dsqrt_rn(__ddiv_rn(mean, (double)moment[i]));
}

static llmpar_status llmpar__cuda_factor_moment(llmpar_device *device, llmpar_stream *stream, const llmpar_factor_moment_args *args)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "factor_moment", args->dtype, 0);
    if (status || args->count <= 0) return status;
    unsigned blocks = args->by_mean ? 1 : llmpar__cuda_blocks(llmpar__cuda_of(device), (args->count + 3) / 4, 256, 8);
    llmpar__cuda_launch(device, stream, llmpar__cuda_factor_moment_kernel, dim3(blocks), dim3(256), (LLMPAR__CUDA_MOMENT_TILE + 1) * sizeof(double), *args);
    return llmpar__cuda_end(device, stream, "factor_moment");
}

/* ---- the update ---- */

/* Where a warp's elements begin: one division for all. */
struct llmpar__cuda_place { int64_t row, column; };
static __device__ __forceinline__ llmpar__cuda_place llmpar__cuda_place_of(const llmpar_adalomo_args &a, int64_t at)
{
    llmpar__cuda_place place = { 0, 0 };
    if (!a.row_factor) return place;
    place.row = (a.begin + at) / a.cols;
    place.column = a.begin + at - place.row * a.cols;
    return place;
}

/* u of element at + o, 0 <= o < 256. */
static __device__ __forceinline__ float llmpar__cuda_direction(const llmpar_adalomo_args &a, const llmpar__cuda_place &place, int64_t at, int o)
{
    float g = __fmul_rn(((const float *)a.g)[at + o], (float)a.grad_scale);
    if (!a.row_factor) return __fdiv_rn(g, __fsqrt_rn(((const float *)a.moment)[at + o]));
    int64_t row = place.row, column = place.column + o;
    if (a.cols < LLMPAR__CUDA_EXACT_BATCH) { /* so both fit 32 bits */
        row += (unsigned)column / (unsigned)a.cols;
        column = (unsigned)column % (unsigned)a.cols;
    } else if (column >= a.cols) {
        row++;
        column -= a.cols;
    }
    return __fmul_rn(__fmul_rn(g, ((const float *)a.row_factor)[row]), ((const float *)a.col_factor)[column]);
}

__global__ void __launch_bounds__(256, 4) llmpar__cuda_adalomo_square_kernel(llmpar_adalomo_args a)
{
    LLMPAR__CUDA_SHARED(unsigned long long, limbs);
    const float *g = (const float *)a.g;
    float *moment = (float *)a.moment, scale = (float)a.grad_scale, beta = (float)a.beta, rest = (float)__dadd_rn(1, -a.beta), eps = (float)a.eps;
    int64_t warps = (int64_t)gridDim.x * (blockDim.x / 32);
    int lane = (int)(threadIdx.x % 32);
    llmpar__cuda_squares squares;
    llmpar__cuda_exact_begin(limbs);
    llmpar__cuda_squares_begin(&squares);
    for (int64_t at = ((int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * LLMPAR__CUDA_EXACT_BATCH; at < a.count; at += warps * LLMPAR__CUDA_EXACT_BATCH) {
        llmpar__cuda_place place = llmpar__cuda_place_of(a, at);
        uint32_t bits[LLMPAR__CUDA_EXACT_LANE];
#pragma unroll
        for (int k = 0; k < LLMPAR__CUDA_EXACT_LANE; k++) {
            int o = k * 32 + lane;
            bits[k] = 0;
            if (at + o >= a.count) continue;
            if (!a.row_factor) {
                float scaled = __fmul_rn(g[at + o], scale);
                moment[at + o] = __fadd_rn(__fmul_rn(beta, moment[at + o]), __fmul_rn(rest, __fadd_rn(__fmul_rn(scaled, scaled), eps)));
            }
            if (a.update_squares) bits[k] = __float_as_uint(llmpar__cuda_direction(a, place, at, o));
        }
        if (a.update_squares) llmpar__cuda_squares_add(&squares, limbs, bits);
    }
    if (!a.update_squares) return;
    llmpar__cuda_squares_end(&squares, limbs);
    llmpar__cuda_exact_end(limbs, a.update_squares);
}

static llmpar_status llmpar__cuda_adalomo_square(llmpar_device *device, llmpar_stream *stream, const llmpar_adalomo_args *args)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "adalomo_square", args->dtype, 0);
    if (status || args->count <= 0) return status;
    unsigned blocks = llmpar__cuda_blocks(llmpar__cuda_of(device), (args->count + 7) / 8, 256, 1);
    llmpar__cuda_launch(device, stream, llmpar__cuda_adalomo_square_kernel, dim3(blocks), dim3(256), LLMPAR__CUDA_EXACT_BYTES, *args);
    if (args->update_squares) llmpar__cuda_exact_carry(device, stream, args->update_squares);
    return llmpar__cuda_end(device, stream, "adalomo_square");
}

/* significand * 2^exponent, and a little more if `sticky`, rounded once to nearest, ties to even; subnormals and infinity as IEEE has them. */
static __device__ double llmpar__cuda_round_scaled(uint64_t significand, int sticky, int exponent)
{
    if (!significand) return 0.0;
    int length = 64 - __clzll((long long)significand), drop = length - 53;
    uint64_t kept;
    if (exponent + length > 1024) return __longlong_as_double(0x7ff0000000000000);
    if (exponent + length < -1074) return 0.0;
    if (exponent + drop < -1074) drop = -1074 - exponent;
    if (drop <= 0) kept = significand << -drop;
    else {
        uint64_t lost = drop < 64 ? significand & (((uint64_t)1 << drop) - 1) : significand, half = (uint64_t)1 << (drop - 1);
        kept = drop < 64 ? significand >> drop : 0;
        if (lost > half || (lost == half && (sticky || (kept & 1)))) kept++;
    }
    if (kept < 0x0010000000000000u) return __longlong_as_double((long long)kept);
    return __longlong_as_double((long long)(kept + ((uint64_t)(exponent + drop + 1074) << 52)));
}

/* The accumulator's value (llmpar_exact_sum_value) for a sum of squares, which is not negative. limbs[72] are the block's own copy, carried in place. */
static __device__ double llmpar__cuda_exact_value(int64_t *limbs)
{
    if (limbs[LLMPAR__CUDA_EXACT_NAN] || (limbs[LLMPAR__CUDA_EXACT_INFINITY] && limbs[LLMPAR__CUDA_EXACT_NEGATIVE_INFINITY])) return __longlong_as_double(0x7ff8000000000000);
    if (limbs[LLMPAR__CUDA_EXACT_INFINITY]) return __longlong_as_double(0x7ff0000000000000);
    int top = 0, sticky = 0;
    for (int i = 0; i < LLMPAR__CUDA_EXACT_NUMBER - 1; i++) {
        limbs[i + 1] += limbs[i] >> 32;
        limbs[i] &= 0xffffffff;
        if (limbs[i]) top = i;
    }
    if (limbs[LLMPAR__CUDA_EXACT_NUMBER - 1]) top = LLMPAR__CUDA_EXACT_NUMBER - 1;
    if (limbs[top] > 0xffffffff) return __longlong_as_double(0x7ff0000000000000);
    uint64_t significand = (uint64_t)limbs[top] << 32;
    if (top > 0) significand |= (uint64_t)limbs[top - 1];
    if (top < 2) return llmpar__cuda_round_scaled(significand, 0, 32 * (top - 1) - 1088);
    int shift = __clzll((long long)significand);
    if (shift) significand = significand << shift | (uint64_t)limbs[top - 2] >> (32 - shift);
    sticky = ((uint64_t)limbs[top - 2] & (0xffffffffu >> shift)) != 0;
    for (int i = 0; i < top - 2; i++) sticky |= limbs[i] != 0;
    return llmpar__cuda_round_scaled(significand, sticky, 32 * (top - 1) - 1088 - shift);
}

__global__ void __launch_bounds__(256) llmpar__cuda_adalomo_kernel(llmpar_adalomo_args a)
{
    LLMPAR__CUDA_SHARED(int64_t, limbs);
    float *p = (float *)a.p, *scalars = (float *)(void *)(limbs + 2 * LLMPAR_EXACT_SUM_LIMBS);
    double *rms = (double *)(void *)(scalars + 2);
    int lane = (int)(threadIdx.x % 32);
    for (unsigned i = threadIdx.x; i < 2 * LLMPAR_EXACT_SUM_LIMBS; i += blockDim.x) limbs[i] = i < LLMPAR_EXACT_SUM_LIMBS ? a.update_squares[i] : a.param_squares[i - LLMPAR_EXACT_SUM_LIMBS];
    __syncthreads();
    if (threadIdx.x == 0 || threadIdx.x == 32) rms[threadIdx.x / 32] = __dsqrt_rn(__ddiv_rn(llmpar__cuda_exact_value(limbs + (threadIdx.x ? LLMPAR_EXACT_SUM_LIMBS : 0)), (double)a.elements));
    __syncthreads();
    if (threadIdx.x == 0) {
        double rate = __dmul_rn(a.lr, rms[1] < 1e-3 ? 1e-3 : rms[1]);
        scalars[0] = (float)__dadd_rn(1, -__dmul_rn(rate, a.decay));
        scalars[1] = (float)__ddiv_rn(-rate, rms[0] < 1 ? 1.0 : rms[0]);
    }
    __syncthreads();
    float keep = scalars[0], minus = scalars[1];
    for (int64_t at = ((int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * LLMPAR__CUDA_EXACT_BATCH; at < a.count; at += (int64_t)gridDim.x * (blockDim.x / 32) * LLMPAR__CUDA_EXACT_BATCH) {
        llmpar__cuda_place place = llmpar__cuda_place_of(a, at);
#pragma unroll
        for (int k = 0; k < LLMPAR__CUDA_EXACT_LANE; k++) {
            int o = k * 32 + lane;
            if (at + o < a.count) p[at + o] = __fadd_rn(__fmul_rn(p[at + o], keep), __fmul_rn(minus, llmpar__cuda_direction(a, place, at, o)));
        }
    }
}

static llmpar_status llmpar__cuda_adalomo(llmpar_device *device, llmpar_stream *stream, const llmpar_adalomo_args *args)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, "adalomo", args->dtype, 0);
    if (status || args->count <= 0) return status;
    unsigned blocks = llmpar__cuda_blocks(llmpar__cuda_of(device), (args->count + 7) / 8, 256, 1);
    llmpar__cuda_launch(device, stream, llmpar__cuda_adalomo_kernel, dim3(blocks), dim3(256), 2 * LLMPAR__CUDA_EXACT_BYTES + 2 * sizeof(float) + 2 * sizeof(double), *args);
    return llmpar__cuda_end(device, stream, "adalomo");
}
