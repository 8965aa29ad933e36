/* The CUDA device's casts, tree sums, largest elements and exact sums (squares, losses), bit for bit what the CPU device computes at its portable and its best level. */
#include "cuda_bits.h"

static const int64_t sizes[] = { 1, 2, 7, 8, 9, 15, 16, 31, 33, 255, 256, 257, 1030 };
enum { SIZES = (int)(sizeof sizes / sizeof sizes[0]) };
static int64_t size_of(int i) { return i < SIZES ? sizes[i] : cuda_small() ? 9001 : 3000017; }

/* ---- casts ---- */

static void *cast_values(llmpar_dtype dtype, int64_t n, int round)
{
    bits_kind kind = (bits_kind)(round % BITS_KINDS);
    if (dtype == LLMPAR_F32) return bits_floats(n, kind);
    if (dtype == LLMPAR_F64) return bits_doubles(n, kind);
    uint16_t *x = (uint16_t *)malloc((size_t)n * 2 + 1);
    for (int64_t i = 0; i < n; i++) x[i] = n > 60000 || round > 20 ? (uint16_t)(i + round * 4096) : (uint16_t)ops_bits();
    return x;
}

TEST(casts)
{
    CUDA_OPEN();
    static const llmpar_dtype types[4] = { LLMPAR_F32, LLMPAR_BF16, LLMPAR_F16, LLMPAR_F64 };
    for (int pair = 0; pair < 16; pair++)
        for (int round = 0; round < 25 - (pair % 5 == 0) * 20; round++) { /* rounds above 20: every 16-bit number */
            int64_t n = round == 24 ? 65536 : round > 20 ? 4099 : size_of(round % (SIZES + 1)), off_in = round & 1, off_out = round >> 1 & 1;
            llmpar_dtype from = types[pair / 4], to = types[pair % 4];
            if (round == 24 && cuda_small() && from != LLMPAR_BF16 && from != LLMPAR_F16) n = 4100;
            void *x = cast_values(from, n, round);
            bits_buffer in = bits_put(from, x, n, off_in), out = bits_put(to, NULL, n, off_out);
            for (int d = 0; d < BITS_DEVICES; d++) {
                llmpar_cast_args a = { (size_t)n, in.at[d], from, out.at[d], to };
                CUDA_OK(bits_device(d)->cast(bits_device(d), NULL, &a));
            }
            bits_check("cast", &out, 0);
            cuda_done();
            free(x);
        }
    llmpar_cast_args wrong = { 1, NULL, LLMPAR_I32, NULL, LLMPAR_F32 };
    CUDA_REFUSED(cuda_gpu->cast(cuda_gpu, NULL, &wrong), LLMPAR_ERR_UNSUPPORTED, "cast: from i32 to f32");
    wrong.in_dtype = LLMPAR_F32;
    wrong.out_dtype = LLMPAR_U8;
    CUDA_REFUSED(cuda_gpu->cast(cuda_gpu, NULL, &wrong), LLMPAR_ERR_UNSUPPORTED, "cast: from f32 to u8");
    wrong.out_dtype = LLMPAR_F32;
    wrong.out = cuda_put_vector(cuda_gpu, LLMPAR_F32, NULL, 1);
    CUDA_REFUSED(cuda_gpu->cast(cuda_gpu, NULL, &wrong), LLMPAR_ERR_INTERNAL, "copy: device"); /* from NULL, as a copy: what that says is the cast's */
    cuda_done();
    wrong.out_dtype = LLMPAR_BF16;
    wrong.count = 0;
    CUDA_OK(cuda_gpu->cast(cuda_gpu, NULL, &wrong));
}

/* ---- tree sums ---- */

static void *sum_values(llmpar_dtype dtype, int64_t n, int round)
{
    if (dtype == LLMPAR_F32) return bits_floats(n, (bits_kind)(round % BITS_KINDS));
    if (dtype == LLMPAR_F64) return bits_doubles(n, (bits_kind)(round % BITS_KINDS));
    uint64_t *x = (uint64_t *)malloc((size_t)n * 8 + 1);
    for (int64_t i = 0; i < n; i++) x[i] = (uint64_t)ops_bits() << 33 ^ (uint64_t)ops_bits() << 10 ^ ops_bits();
    return x;
}

/* place: of the result among the operands, -1: apart. */
static void sum_case(llmpar_dtype dtype, int maximum, int32_t count, int64_t n, int place, int off, int round)
{
    enum { MOST = 70 };
    bits_buffer in[MOST], out = { { NULL }, dtype, n };
    void *x[MOST];
    for (int32_t j = 0; j < count; j++) {
        x[j] = sum_values(dtype, n, round);
        in[j] = bits_put(dtype, x[j], n, j == count - 1 ? off : 0);
    }
    if (place < 0) out = bits_put(dtype, NULL, n, off);
    for (int d = 0; d < BITS_DEVICES; d++) {
        const void *operands[MOST];
        llmpar_tree_sum_args a;
        for (int32_t j = 0; j < count; j++) operands[j] = in[j].at[d];
        a.in = operands;
        a.n = count;
        a.count = (size_t)n;
        a.out = place < 0 ? out.at[d] : in[place].at[d];
        a.dtype = dtype;
        CUDA_OK(maximum ? bits_device(d)->max(bits_device(d), NULL, &a) : bits_device(d)->tree_sum(bits_device(d), NULL, &a));
    }
    if (place < 0) bits_check(maximum ? "max" : "tree_sum", &out, !maximum);
    for (int32_t j = 0; j < count; j++) bits_check(place == j ? "in place" : "an operand", &in[j], place == j && !maximum);
    cuda_done();
    for (int32_t j = 0; j < count; j++) free(x[j]);
}

TEST(tree_sums)
{
    CUDA_OPEN();
    static const llmpar_dtype types[4] = { LLMPAR_F32, LLMPAR_F64, LLMPAR_I64, LLMPAR_U64 };
    static const int32_t counts[] = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 33, 64, 70 };
    for (int i = 0; i < (int)(sizeof counts / sizeof counts[0]); i++)
        for (int t = 0; t < 4; t++)
            for (int round = 0; round < 4; round++) {
                int64_t n = size_of((int)ops_below(SIZES));
                int32_t count = counts[i];
                if (round == 3) n = count < 10 ? size_of(SIZES) : 1030;
                sum_case(types[t], 0, count, n, round & 1 ? (int)ops_below(count) : -1, round & 2 ? 1 : 0, round + i);
                if (t < 3) sum_case(types[t], 1, count, n, round & 1 ? (int)ops_below(count) : -1, round & 2 ? 1 : 0, round + i);
            }
    const void *none[1] = { NULL };
    llmpar_tree_sum_args wrong = { none, 0, 1, NULL, LLMPAR_F32 };
    CUDA_REFUSED(cuda_gpu->tree_sum(cuda_gpu, NULL, &wrong), LLMPAR_ERR_ARGUMENT, "tree_sum: n = 0");
    CUDA_REFUSED(cuda_gpu->max(cuda_gpu, NULL, &wrong), LLMPAR_ERR_ARGUMENT, "max: n = 0");
    wrong.n = 100000;
    CUDA_REFUSED(cuda_gpu->tree_sum(cuda_gpu, NULL, &wrong), LLMPAR_ERR_UNSUPPORTED, "tree_sum: n = 100000");
    wrong.n = 1;
    wrong.dtype = LLMPAR_BF16;
    CUDA_REFUSED(cuda_gpu->tree_sum(cuda_gpu, NULL, &wrong), LLMPAR_ERR_UNSUPPORTED, "tree_sum: dtype bf16");
    wrong.dtype = LLMPAR_U64;
    CUDA_REFUSED(cuda_gpu->max(cuda_gpu, NULL, &wrong), LLMPAR_ERR_UNSUPPORTED, "max: dtype u64");
    wrong.count = 0;
    CUDA_OK(cuda_gpu->tree_sum(cuda_gpu, NULL, &wrong));
}

/* Ranks' subtrees summed apart give the whole tree's bits. */
TEST(subtrees)
{
    CUDA_OPEN();
    enum { N = 8, COUNT = 77 };
    void *in[N], *part[N], *whole = cuda_put_bytes(cuda_gpu, 4, NULL, 1, COUNT, COUNT, 0), *both = cuda_put_bytes(cuda_gpu, 4, NULL, 1, COUNT, COUNT, 0);
    float a[COUNT], b[COUNT];
    for (int j = 0; j < N; j++) {
        float *x = bits_floats(COUNT, BITS_LIKE);
        in[j] = cuda_put_bytes(cuda_gpu, 4, x, 1, COUNT, COUNT, 0);
        part[j] = cuda_put_bytes(cuda_gpu, 4, NULL, 1, COUNT, COUNT, 0);
        free(x);
    }
    llmpar_tree_sum_args args = { (const void *const *)in, N, COUNT, whole, LLMPAR_F32 };
    CUDA_OK(cuda_gpu->tree_sum(cuda_gpu, NULL, &args));
    cuda_get_bytes(whole, a);
    for (int ranks = 2; ranks < N; ranks *= 2) {
        for (int r = 0; r < ranks; r++) {
            llmpar_tree_sum_args own = { (const void *const *)in + r * (N / ranks), N / ranks, COUNT, part[r], LLMPAR_F32 };
            CUDA_OK(cuda_gpu->tree_sum(cuda_gpu, NULL, &own));
        }
        llmpar_tree_sum_args all = { (const void *const *)part, ranks, COUNT, both, LLMPAR_F32 };
        CUDA_OK(cuda_gpu->tree_sum(cuda_gpu, NULL, &all));
        cuda_get_bytes(both, b);
        CHECK_BYTES(b, a, sizeof a);
    }
    cuda_done();
}

/* ---- squares ---- */

static int64_t *accumulator(int round)
{
    int64_t *x = (int64_t *)calloc(LLMPAR_EXACT_SUM_LIMBS, sizeof *x);
    for (int i = 0; i < 67 && round % 3; i++) x[i] = (int64_t)(ops_bits() ^ (uint64_t)ops_bits() << 20) >> (round % 3 == 1 ? 20 : 2); /* also not carried */
    x[70] = round % 4;
    return x;
}

/* Magnitudes that a tensor can have: one scale, or several far apart, or with holes of zeros. */
static void spread(float *x, int64_t n, int how)
{
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        int e = how == 0 ? 120 : how == 1 ? (i / 300 % 2 ? 60 : 150) : how == 2 ? 1 + (int)ops_below(254) : how == 3 ? (int)(i * 254 / n) + 1 : how == 4 ? 254 - (int)(i * 254 / n) : (int)(i % 3) * 40 + 20;
        memcpy(&bits, &x[i], 4);
        bits = (bits & 0x807fffffu) | (uint32_t)e << 23;
        if (how == 5 && i % 7 < 3) bits = ops_below(2) ? 0 : 0x80000000u;
        if (how == 2 && i % 11 == 0) bits &= 0x807fffffu;
        memcpy(&x[i], &bits, 4);
    }
}

TEST(squares)
{
    CUDA_OPEN();
    for (int round = 0; round < 8 * (SIZES + 1); round++) {
        int64_t n = size_of(round % (SIZES + 1)), *start = accumulator(round);
        float *x = bits_floats(n, round % 8 == 7 ? BITS_SPECIAL : BITS_ANY);
        if (round % 8 < 6) spread(x, n, round % 8);
        bits_buffer in = bits_put(LLMPAR_F32, x, n, round >> 1 & 1), out = bits_put(LLMPAR_I64, start, LLMPAR_EXACT_SUM_LIMBS, 0);
        for (int d = 0; d < BITS_DEVICES; d++)
            for (int64_t at = 0, part = d || round % 5 ? n : n / 3 + 1; at < n; at += part) { /* in parts too: integers */
                llmpar_square_sum_args a = { (size_t)(n - at < part ? n - at : part), (float *)in.at[d] + at, (int64_t *)out.at[d], LLMPAR_F32 };
                CUDA_OK(bits_device(d)->square_sum(bits_device(d), NULL, &a));
            }
        bits_check("square_sum", &out, 0);
        cuda_done();
        free(x);
        free(start);
    }
    /* Whole blocks of one number: zeros, the largest, subnormals; and so many full fractions low in a warp's range that its registers are as full as they get. */
    for (int k = 0; k < 5; k++) {
        int64_t n = k < 4 ? 9001 : cuda_small() ? 2200001 : 80000011, *start = accumulator(0);
        static const uint32_t number[] = { 0, 0x7f7fffffu, 0x3fffffffu, 0x007fffffu, 0x33ffffffu };
        uint32_t *x = (uint32_t *)malloc((size_t)n * 4);
        for (int64_t i = 0; i < n; i++) x[i] = k == 4 && i % 256 == 0 ? 0x3fffffffu : number[k];
        bits_buffer in = bits_put(LLMPAR_F32, x, n, 0), out = bits_put(LLMPAR_I64, start, LLMPAR_EXACT_SUM_LIMBS, 0);
        for (int d = 0; d < BITS_DEVICES; d++) {
            llmpar_square_sum_args a = { (size_t)n, in.at[d], (int64_t *)out.at[d], LLMPAR_F32 };
            CUDA_OK(bits_device(d)->square_sum(bits_device(d), NULL, &a));
        }
        bits_check("square_sum", &out, 0);
        cuda_done();
        free(x);
        free(start);
    }
    llmpar_square_sum_args wrong = { 1, NULL, NULL, LLMPAR_F64 };
    CUDA_REFUSED(cuda_gpu->square_sum(cuda_gpu, NULL, &wrong), LLMPAR_ERR_UNSUPPORTED, "square_sum: dtype f64");
}

/* ---- losses ---- */

TEST(losses)
{
    CUDA_OPEN();
    for (int round = 0; round < 6 * (SIZES + 1); round++) {
        int64_t n = size_of(round % (SIZES + 1)), *start = accumulator(round);
        float *most = bits_floats(n, round % 3 ? BITS_LIKE : BITS_SPECIAL), *target = bits_floats(n, round % 3 ? BITS_LIKE : BITS_SPECIAL), *sum = bits_floats(n, round % 3 == 1 ? BITS_LIKE : round % 3 ? BITS_ANY : BITS_SPECIAL);
        int32_t *ids = (int32_t *)malloc((size_t)n * 4);
        for (int64_t i = 0; i < n; i++) {
            ids[i] = ops_below(4) ? (int32_t)ops_below(1000) : -1;
            if (round % 3) sum[i] = fabsf(sum[i]);
            if (round % 3 == 1) sum[i] = 1 + sum[i] * 1000;
        }
        bits_buffer bm = bits_put(LLMPAR_F32, most, n, 0), bt = bits_put(LLMPAR_F32, target, n, 0), bs = bits_put(LLMPAR_F32, sum, n, round & 1), bi = bits_put(LLMPAR_I32, ids, n, 0);
        bits_buffer out = bits_put(LLMPAR_I64, start, LLMPAR_EXACT_SUM_LIMBS, 0), loss = bits_put(LLMPAR_F64, NULL, n, 0);
        for (int d = 0; d < BITS_DEVICES; d++) {
            llmpar_xent_loss_args a = { n, bm.at[d], bt.at[d], bs.at[d], (const int32_t *)bi.at[d], (int64_t *)out.at[d], round % 4 == 3 ? NULL : (double *)loss.at[d], round % 2 ? LLMPAR_F32 : LLMPAR_BF16 };
            CUDA_OK(bits_device(d)->xent_loss(bits_device(d), NULL, &a));
        }
        bits_check("losses", &loss, 1);
        bits_check("loss", &out, 0);
        cuda_done();
        free(most); free(target); free(sum); free(ids); free(start);
    }
    llmpar_xent_loss_args wrong;
    memset(&wrong, 0, sizeof wrong);
    wrong.dtype = LLMPAR_F32;
    CUDA_OK(cuda_gpu->xent_loss(cuda_gpu, NULL, &wrong));
    wrong.rows = 1;
    wrong.dtype = LLMPAR_F64;
    CUDA_REFUSED(cuda_gpu->xent_loss(cuda_gpu, NULL, &wrong), LLMPAR_ERR_UNSUPPORTED, "xent_loss: dtype f64");
}

TEST(close_devices) { bits_close(); }

TEST_LIST(T_(casts), T_(tree_sums), T_(subtrees), T_(squares), T_(losses), T_(close_devices), T_(cuda_end))
