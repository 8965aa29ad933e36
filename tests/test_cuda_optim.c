/* The CUDA device's optimizers, bit for bit what the CPU device computes at its portable and its best level: AdamW, SGD, the largest absolute value, AdaLomo. A step may run on either side and must not show it. */
#include "cuda_bits.h"

static const int64_t sizes[] = { 1, 3, 4, 5, 31, 33, 257, 1030, 4099 };
enum { SIZES = (int)(sizeof sizes / sizeof sizes[0]) };
static int64_t size_of(int i) { return i < SIZES ? sizes[i] : cuda_small() ? 9001 : 3000017; }

TEST(adamw)
{
    CUDA_OPEN();
    for (int round = 0; round < 3 * (SIZES + 1); round++) {
        int64_t n = size_of(round % (SIZES + 1)), off = round & 1;
        bits_kind kind = (bits_kind)(round % BITS_KINDS);
        float *x[4];
        bits_buffer b[4];
        for (int k = 0; k < 4; k++) {
            x[k] = bits_floats(n, kind);
            if (k == 3) for (int64_t i = 0; i < n; i++) x[k][i] = fabsf(x[k][i]);
            b[k] = bits_put(LLMPAR_F32, x[k], n, k == 2 ? off : 0);
        }
        for (int d = 0; d < BITS_DEVICES; d++) {
            llmpar_adamw_args a = { (size_t)n, b[0].at[d], b[1].at[d], b[2].at[d], b[3].at[d], 3e-4, 0.9, 0.95, round % 4 ? 1e-8 : 0, 0.1, 1 - 0.9 * 0.9, 1 - 0.95 * 0.95, round % 3 ? 0.37 : 1.0, LLMPAR_F32 };
            CUDA_OK(bits_device(d)->adamw(bits_device(d), NULL, &a));
        }
        bits_check("adamw p", &b[0], 1);
        bits_check("adamw g", &b[1], 0);
        bits_check("adamw m", &b[2], 1);
        bits_check("adamw v", &b[3], 1);
        cuda_done();
        for (int k = 0; k < 4; k++) free(x[k]);
    }
    llmpar_adamw_args none, wrong;
    memset(&none, 0, sizeof none);
    none.dtype = LLMPAR_F32;
    CUDA_OK(cuda_gpu->adamw(cuda_gpu, NULL, &none));
    wrong = none;
    wrong.dtype = LLMPAR_F64;
    wrong.count = 1;
    CUDA_REFUSED(cuda_gpu->adamw(cuda_gpu, NULL, &wrong), LLMPAR_ERR_UNSUPPORTED, "adamw: dtype f64");
    wrong.dtype = LLMPAR_BF16;
    CUDA_REFUSED(cuda_gpu->adamw(cuda_gpu, NULL, &wrong), LLMPAR_ERR_UNSUPPORTED, "adamw: dtype bf16");
}

TEST(sgd)
{
    CUDA_OPEN();
    for (int round = 0; round < 4 * (SIZES + 1); round++) {
        int64_t n = size_of(round % (SIZES + 1)), off = round / 2 & 1;
        bits_kind kind = (bits_kind)(round % BITS_KINDS);
        int momentum = round & 1;
        double limit = round % 4 == 0 ? 0 : round % 4 == 1 ? -1 : 0.01;
        float *x[3];
        bits_buffer b[3];
        for (int k = 0; k < 3; k++) {
            x[k] = bits_floats(n, kind);
            b[k] = bits_put(LLMPAR_F32, x[k], n, k == 1 ? off : 0);
        }
        for (int d = 0; d < BITS_DEVICES; d++) {
            llmpar_sgd_args a = { (size_t)n, b[0].at[d], b[1].at[d], momentum ? b[2].at[d] : NULL, 0.01, 0.9, 0.1, limit, 0.37, LLMPAR_F32 };
            CUDA_OK(bits_device(d)->sgd(bits_device(d), NULL, &a));
        }
        for (int k = 0; k < 3; k++) bits_check(k == 0 ? "sgd p" : k == 1 ? "sgd g" : "sgd m", &b[k], 1);
        cuda_done();
        for (int k = 0; k < 3; k++) free(x[k]);
    }
}

TEST(largest)
{
    CUDA_OPEN();
    static const double before[] = { 0, 1e-3, 1e30, -1, INFINITY, NAN };
    for (int round = 0; round < 6 * (SIZES + 1); round++) {
        int64_t n = size_of(round % (SIZES + 1));
        float *x = bits_floats(n, round % 3 == 2 ? BITS_SPECIAL : round % 3 ? BITS_ANY : BITS_LIKE);
        if (round % 5 == 0) for (int64_t i = 0; i < n; i++) x[i] = 0;
        bits_buffer in = bits_put(LLMPAR_F32, x, n, round & 1), out = bits_put(LLMPAR_F64, &before[round % 6], 1, 0);
        for (int d = 0; d < BITS_DEVICES; d++) {
            llmpar_largest_args a = { (size_t)n, in.at[d], (double *)out.at[d], LLMPAR_F32 };
            CUDA_OK(bits_device(d)->largest(bits_device(d), NULL, &a));
        }
        bits_check("largest", &out, 1);
        cuda_done();
        free(x);
    }
}

/* ---- AdaLomo ---- */

/* A matrix of rows x cols, cut into parts of any length: sums over all parts, moments and factors, squares of the update, the update; and the whole at once. */
static void adalomo_case(int64_t rows, int64_t cols, bits_kind kind, int cut, double grad_scale, double least)
{
    int64_t n = rows * cols, part = cut ? 1 + ops_below(n) : n;
    float *g = bits_floats(n, kind), *p = bits_floats(n, BITS_LIKE), *row_moment = bits_floats(rows, BITS_LIKE), *col_moment = bits_floats(cols, BITS_LIKE);
    double zero = least;
    int64_t *none = (int64_t *)calloc((size_t)(rows + cols + LLMPAR_EXACT_SUM_LIMBS), sizeof *none);
    for (int64_t i = 0; i < rows; i++) row_moment[i] = fabsf(row_moment[i]);
    for (int64_t i = 0; i < cols; i++) col_moment[i] = fabsf(col_moment[i]);
    bits_buffer bg = bits_put(LLMPAR_F32, g, n, cut), bp = bits_put(LLMPAR_F32, p, n, 0), largest = bits_put(LLMPAR_F64, &zero, 1, 0), row_sums = bits_put(LLMPAR_I64, none, rows, 0), col_sums = bits_put(LLMPAR_I64, none, cols, 0);
    bits_buffer rm = bits_put(LLMPAR_F32, row_moment, rows, 0), cm = bits_put(LLMPAR_F32, col_moment, cols, 0), rf = bits_put(LLMPAR_F32, NULL, rows, 0), cf = bits_put(LLMPAR_F32, NULL, cols, 0);
    bits_buffer update = bits_put(LLMPAR_I64, none, LLMPAR_EXACT_SUM_LIMBS, 0), squares = bits_put(LLMPAR_I64, none, LLMPAR_EXACT_SUM_LIMBS, 0);
    int32_t row_bits = 62, col_bits = 62;
    while ((int64_t)1 << (62 - row_bits) < cols) row_bits--;
    while ((int64_t)1 << (62 - col_bits) < rows) col_bits--;
    for (int d = 0; d < BITS_DEVICES; d++) {
        llmpar_device *device = bits_device(d);
        /* The parts in turn, of a GPU from the last to the first. */
        int64_t parts = (n + part - 1) / part;
        for (int phase = 0; phase < 5; phase++)
            for (int64_t k = 0; k < parts; k++) {
                int64_t begin = (d ? k : parts - 1 - k) * part, count = n - begin < part ? n - begin : part;
                llmpar_adalomo_args a;
                memset(&a, 0, sizeof a);
                a.begin = begin; a.count = count; a.cols = cols; a.elements = n;
                a.p = (float *)bp.at[d] + begin; a.g = (float *)bg.at[d] + begin;
                a.row_factor = rf.at[d]; a.col_factor = cf.at[d];
                a.update_squares = (int64_t *)update.at[d]; a.param_squares = (int64_t *)squares.at[d];
                a.lr = 1e-3; a.decay = 0.01; a.grad_scale = grad_scale; a.beta = 0.999; a.eps = 1e-30; a.dtype = LLMPAR_F32;
                if (phase == 0) {
                    llmpar_largest_args args = { (size_t)count, a.g, (double *)largest.at[d], LLMPAR_F32 };
                    llmpar_square_sum_args sum = { (size_t)count, a.p, (int64_t *)squares.at[d], LLMPAR_F32 };
                    CUDA_OK(device->largest(device, NULL, &args));
                    CUDA_OK(device->square_sum(device, NULL, &sum));
                } else if (phase == 1) {
                    llmpar_factor_sum_args args = { begin, count, cols, a.g, (int64_t *)row_sums.at[d], (int64_t *)col_sums.at[d], row_bits, col_bits, (double *)largest.at[d], grad_scale, LLMPAR_F32 };
                    CUDA_OK(device->factor_sum(device, NULL, &args));
                } else if (phase == 2 && k == 0) {
                    llmpar_factor_moment_args by_row = { rows, (int64_t *)row_sums.at[d], cols, row_bits, 1, (double *)largest.at[d], rm.at[d], rf.at[d], grad_scale, 0.999, 1e-30, LLMPAR_F32 };
                    llmpar_factor_moment_args by_col = { cols, (int64_t *)col_sums.at[d], rows, col_bits, 0, (double *)largest.at[d], cm.at[d], cf.at[d], grad_scale, 0.999, 1e-30, LLMPAR_F32 };
                    CUDA_OK(device->factor_moment(device, NULL, &by_row));
                    CUDA_OK(device->factor_moment(device, NULL, &by_col));
                } else if (phase == 3) CUDA_OK(device->adalomo_square(device, NULL, &a));
                else if (phase == 4) CUDA_OK(device->adalomo(device, NULL, &a));
            }
    }
    bits_check("largest", &largest, 1);
    bits_check("row sums", &row_sums, 0);
    bits_check("column sums", &col_sums, 0);
    bits_check("row moments", &rm, 1);
    bits_check("column moments", &cm, 1);
    bits_check("row factors", &rf, 1);
    bits_check("column factors", &cf, 1);
    bits_check("squares of parameters", &squares, 0);
    bits_check("squares of the update", &update, 0);
    bits_check("parameters", &bp, 1);
    bits_check("gradients", &bg, 0);
    cuda_done();
    free(g); free(p); free(row_moment); free(col_moment); free(none);
}

TEST(adalomo_matrices)
{
    CUDA_OPEN();
    static const int64_t shapes[][2] = { { 1, 1 }, { 1, 700 }, { 700, 1 }, { 3, 5 }, { 33, 257 }, { 70, 31 }, { 5, 1030 }, { 40, 300 }, { 1500, 2 } };
    for (int i = 0; i < (int)(sizeof shapes / sizeof shapes[0]); i++)
        for (int k = 0; k < 4; k++) adalomo_case(shapes[i][0], shapes[i][1], k == 3 ? BITS_SPECIAL : k ? BITS_ANY : BITS_LIKE, k & 1, i & 1 ? 1.0 : 0.37, 0);
    adalomo_case(6, 9, BITS_LIKE, 0, 1e38, 1e290); /* too large: nothing is summed, moments are NaN */
    adalomo_case(6, 9, BITS_LIKE, 0, 0, 0);
    adalomo_case(6, 9, BITS_LIKE, 1, -2.5, 0);
    if (!cuda_small()) adalomo_case(1500, 2000, BITS_LIKE, 1, 0.37, 0);
}

/* Tensors that are not factored. */
TEST(adalomo_vectors)
{
    CUDA_OPEN();
    for (int round = 0; round < 2 * (SIZES + 1); round++) {
        int64_t n = size_of(round % (SIZES + 1)), none[LLMPAR_EXACT_SUM_LIMBS] = { 0 };
        bits_kind kind = (bits_kind)(round % BITS_KINDS);
        float *g = bits_floats(n, kind), *p = bits_floats(n, BITS_LIKE), *m = bits_floats(n, BITS_LIKE);
        for (int64_t i = 0; i < n; i++) m[i] = fabsf(m[i]);
        bits_buffer bg = bits_put(LLMPAR_F32, g, n, round & 1), bp = bits_put(LLMPAR_F32, p, n, 0), bm = bits_put(LLMPAR_F32, m, n, 0);
        bits_buffer update = bits_put(LLMPAR_I64, none, LLMPAR_EXACT_SUM_LIMBS, 0), squares = bits_put(LLMPAR_I64, none, LLMPAR_EXACT_SUM_LIMBS, 0);
        for (int d = 0; d < BITS_DEVICES; d++) {
            llmpar_device *device = bits_device(d);
            llmpar_adalomo_args a;
            llmpar_square_sum_args sum = { (size_t)n, bp.at[d], (int64_t *)squares.at[d], LLMPAR_F32 };
            memset(&a, 0, sizeof a);
            a.count = n; a.cols = 1; a.elements = n; a.p = bp.at[d]; a.g = bg.at[d]; a.moment = bm.at[d];
            a.update_squares = (int64_t *)update.at[d]; a.param_squares = (int64_t *)squares.at[d];
            a.lr = 1e-3; a.decay = 0.01; a.grad_scale = 0.37; a.beta = 0.999; a.eps = 1e-30; a.dtype = LLMPAR_F32;
            CUDA_OK(device->square_sum(device, NULL, &sum));
            if (round % 3 == 2) { /* the moment alone, then again with its squares */
                a.update_squares = NULL;
                CUDA_OK(device->adalomo_square(device, NULL, &a));
                a.update_squares = (int64_t *)update.at[d];
            }
            CUDA_OK(device->adalomo_square(device, NULL, &a));
            CUDA_OK(device->adalomo(device, NULL, &a));
        }
        bits_check("moments", &bm, 1);
        bits_check("squares of the update", &update, 0);
        bits_check("parameters", &bp, 1);
        cuda_done();
        free(g); free(p); free(m);
    }
}

TEST(close_devices) { bits_close(); }

TEST_LIST(T_(adamw), T_(sgd), T_(largest), T_(adalomo_matrices), T_(adalomo_vectors), T_(close_devices), T_(cuda_end))
