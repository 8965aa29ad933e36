/* gemm_f32: tiles of the EXACT matrix product for F32: fused multiply-adds in k order, one chain an element.

   A tile of 128 x 128 is made by 256 threads of 8 x 8 elements: 4 rows here and 4 rows 64 below, columns alike. A stage holds 16 k of a and b with the tile's rows (columns) side by side for each k, 132 floats apart, so that a thread
   reads 4 at once; an operand whose k is contiguous is turned on its way into shared memory, in units of one float, which also serve any alignment. */
#include "cuda/tiles_internal.h"

enum {
    LLMPAR__CUDA_GEMM_F32_SIDE = 128, LLMPAR__CUDA_GEMM_F32_K = 16, LLMPAR__CUDA_GEMM_F32_ROW = 132 /* floats */,
    LLMPAR__CUDA_GEMM_F32_OPERAND = LLMPAR__CUDA_GEMM_F32_K * LLMPAR__CUDA_GEMM_F32_ROW * 4, LLMPAR__CUDA_GEMM_F32_STAGE = 2 * LLMPAR__CUDA_GEMM_F32_OPERAND,
    LLMPAR__CUDA_GEMM_F32_STAGES = 3, LLMPAR__CUDA_GEMM_F32_FLOATS = 64
};

/* Asks for 16 k of an operand: 128 rows of the tile (columns of b), of which `extent` exist, and `k` of the 16; what does not exist is zero. */
template <int Transposed> static __device__ __forceinline__ void llmpar__cuda_gemm_f32_copy(unsigned char *out, const unsigned char *in, int64_t ld, int extent, int k)
{
    enum { SIDE = LLMPAR__CUDA_GEMM_F32_SIDE, K = LLMPAR__CUDA_GEMM_F32_K, WIDTH = Transposed ? SIDE : K, STEP = LLMPAR__CUDA_GEMM_THREADS / WIDTH, PASSES = (Transposed ? K : SIDE) / STEP };
    /* Where it is turned, a warp takes 8 k of 4 rows: so it writes to all banks. */
    int thread = (int)threadIdx.x, at = Transposed ? thread % WIDTH : (thread & 7) | (thread >> 2 & 8), row = Transposed ? thread / WIDTH : (thread >> 3 & 3) | (thread >> 4 & 12);
    int rows = at < (Transposed ? extent : k) ? (Transposed ? k : extent) - row : 0;
    in += row * ld + 4 * at;
    out += 4 * (Transposed ? row * LLMPAR__CUDA_GEMM_F32_ROW + at : at * LLMPAR__CUDA_GEMM_F32_ROW + row);
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
        llmpar__cu_copy_async_4(out + i * STEP * 4 * (Transposed ? LLMPAR__CUDA_GEMM_F32_ROW : 1), in, i * STEP < rows ? 4 : 0);
        in += STEP * ld;
    }
}

/* One k. a, b: where the thread's first 4 rows and columns are. */
static __device__ __forceinline__ void llmpar__cuda_gemm_f32_step(float (&sum)[LLMPAR__CUDA_GEMM_F32_FLOATS], const unsigned char *a, const unsigned char *b)
{
    float x[8], y[8];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        llmpar__cuda_16 in_a = *(const llmpar__cuda_16 *)(const void *)(a + 256 * h), in_b = *(const llmpar__cuda_16 *)(const void *)(b + 256 * h);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            x[4 * h + e] = __uint_as_float(in_a.word[e]);
            y[4 * h + e] = __uint_as_float(in_b.word[e]);
        }
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) sum[8 * i + j] = __fmaf_rn(x[i], y[j], sum[8 * i + j]);
}

/* The tile from or to c. */
template <int Load> static __device__ __forceinline__ void llmpar__cuda_gemm_f32_c(const llmpar__cuda_gemm_job &job, int64_t row, int64_t column, float (&sum)[LLMPAR__CUDA_GEMM_F32_FLOATS])
{
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int64_t r = row + (i >> 2) * 64 + (i & 3), j = column + 64 * h;
            float *c = (float *)job.c + r * job.ldc + j;
            if (r >= job.m) continue;
            if (job.aligned && j + 4 <= job.n) {
                llmpar__cuda_16 four;
                if (Load) four = *(const llmpar__cuda_16 *)(const void *)c;
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    if (Load) sum[8 * i + 4 * h + e] = __uint_as_float(four.word[e]);
                    else four.word[e] = __float_as_uint(sum[8 * i + 4 * h + e]);
                }
                if (!Load) llmpar__cu_store_16(c, four.word);
                continue;
            }
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (j + e < job.n) {
                    if (Load) sum[8 * i + 4 * h + e] = c[e];
                    else c[e] = sum[8 * i + 4 * h + e];
                }
        }
}

template <int TransposedA, int TransposedB> __global__ void __launch_bounds__(LLMPAR__CUDA_GEMM_THREADS, 1) llmpar__cuda_gemm_f32(const llmpar__cuda_gemm_job job)
{
    enum { SIDE = LLMPAR__CUDA_GEMM_F32_SIDE, K = LLMPAR__CUDA_GEMM_F32_K, STAGES = LLMPAR__CUDA_GEMM_F32_STAGES, ROW = 4 * LLMPAR__CUDA_GEMM_F32_ROW };
    LLMPAR__CUDA_SHARED(unsigned char, shared);
    int y = 4 * ((int)threadIdx.x >> 4), x = 4 * ((int)threadIdx.x & 15);
    float sum[LLMPAR__CUDA_GEMM_F32_FLOATS];

    llmpar__cuda_gemm_source source;
    int stage = 0, ahead = 0; /* that is multiplied; that is filled next */
    source.begin(job);

    auto fill = [&]() {
        unsigned char *out = shared + ahead * LLMPAR__CUDA_GEMM_F32_STAGE;
        if (source.left > 0) {
            llmpar__cuda_gemm_run run = llmpar__cuda_gemm_run_at(job, source.run);
            int k = min(source.left, (int)K);
            llmpar__cuda_gemm_f32_copy<TransposedA>(out, source.first<4, TransposedA>(run.a, run.lda, source.i, SIDE), run.lda, llmpar__cuda_gemm_part_of(job.m, source.i, SIDE), k);
            llmpar__cuda_gemm_f32_copy<TransposedB>(out + LLMPAR__CUDA_GEMM_F32_OPERAND, source.first<4, TransposedB>(run.b, run.ldb, source.j, SIDE), run.ldb, llmpar__cuda_gemm_part_of(job.n, source.j, SIDE), k);
            source.advance(job, run, K);
        }
        llmpar__cu_copy_async_commit();
        if (++ahead == STAGES) ahead = 0;
    };

#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) fill();
#pragma unroll 1
    for (int32_t tile = (int32_t)blockIdx.x; tile < job.tiles_m * job.tiles_n; tile += (int32_t)gridDim.x) {
        int32_t i0, j0, run = 0, piece = 0, next = llmpar__cuda_gemm_first_piece(job, 0); /* piece: that the chains are in; next: that of the next segment */
        llmpar__cuda_gemm_tile(job, tile, &i0, &j0);
#pragma unroll
        for (int i = 0; i < LLMPAR__CUDA_GEMM_F32_FLOATS; i++) sum[i] = 0;
        if (job.accumulate) llmpar__cuda_gemm_f32_c<1>(job, (int64_t)i0 * SIDE + y, (int64_t)j0 * SIDE + x, sum);
        for (;;) {
#pragma unroll 1
            for (; piece < next; piece++) llmpar__cuda_gemm_finish(job, shared, piece, sum);
            if (piece == job.pieces) break;
#pragma unroll 1
            for (int32_t k = llmpar__cuda_gemm_run_at(job, run).k; k > 0; k -= K) {
                const unsigned char *a = shared + stage * LLMPAR__CUDA_GEMM_F32_STAGE + 4 * y, *b = shared + stage * LLMPAR__CUDA_GEMM_F32_STAGE + LLMPAR__CUDA_GEMM_F32_OPERAND + 4 * x;
                llmpar__cu_copy_async_wait<STAGES - 2>();
                __syncthreads();
                fill(); /* into the stage that everybody has left at this barrier */
                if (k >= K) {
#pragma unroll
                    for (int s = 0; s < K; s++) llmpar__cuda_gemm_f32_step(sum, a + s * ROW, b + s * ROW);
                } else {
#pragma unroll 1
                    for (int s = 0; s < k; s++) llmpar__cuda_gemm_f32_step(sum, a + s * ROW, b + s * ROW);
                }
                if (++stage == STAGES) stage = 0;
            }
            next = llmpar__cuda_gemm_next_piece(job, &run, piece);
        }
        llmpar__cuda_gemm_f32_c<0>(job, (int64_t)i0 * SIDE + y, (int64_t)j0 * SIDE + x, sum);
    }
}
