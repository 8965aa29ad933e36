/* gemm_half: tiles of the EXACT matrix product for BF16 and F16: mma.sync m16n8k16 with f32 sums.

   A link of a chain is 16 k, counted from each segment's begin; the last one of a segment is filled with zeros. Inside a link the order is the tensor core's, the same for every element. So a product that goes on from c (accumulate)
   has the bits of the whole where it was cut at a multiple of 16.

   A tile of 128 x 256 is made by 8 warps of 64 x 64. A stage holds 32 k of a and b, as they lie in memory: rows of 32 k, or, of a transposed operand, 32 rows of the tile's whole width; ldmatrix transposes the latter. Units of 16 bytes
   are exchanged inside a row by its number, so that the 8 rows that ldmatrix reads at once are in different banks:

      [row][unit ^ (row / 2) % 4]   rows of 64 bytes        [row][unit ^ row % 8]   rows of 256 or 512 bytes

   The fragments of a link are read while the link before it is multiplied, also across the barrier between two stages. */
#include "cuda/tiles_internal.h"

enum {
    LLMPAR__CUDA_GEMM_HALF_M = 128, LLMPAR__CUDA_GEMM_HALF_N = 256, LLMPAR__CUDA_GEMM_HALF_K = 32,
    LLMPAR__CUDA_GEMM_HALF_A_BYTES = LLMPAR__CUDA_GEMM_HALF_M * LLMPAR__CUDA_GEMM_HALF_K * 2,
    LLMPAR__CUDA_GEMM_HALF_B_BYTES = LLMPAR__CUDA_GEMM_HALF_N * LLMPAR__CUDA_GEMM_HALF_K * 2,
    LLMPAR__CUDA_GEMM_HALF_STAGE = LLMPAR__CUDA_GEMM_HALF_A_BYTES + LLMPAR__CUDA_GEMM_HALF_B_BYTES,
    LLMPAR__CUDA_GEMM_HALF_FLOATS = LLMPAR__CUDA_GEMM_HALF_M * LLMPAR__CUDA_GEMM_HALF_N / LLMPAR__CUDA_GEMM_THREADS,
    LLMPAR__CUDA_GEMM_HALF_STAGES = 4, LLMPAR__CUDA_GEMM_HALF_STAGES_DEEP = 6 /* where shared memory has room for them */
};

/* Asks for 32 k of an operand: Extent rows of the tile (columns of b), of which `extent` exist, and `k` of the 32; what does not exist is zero. `in`: the first element. */
template <int Extent, int Transposed> static __device__ __forceinline__ void llmpar__cuda_gemm_half_copy(unsigned char *out, const unsigned char *in, int64_t ld, int extent, int k, int loose)
{
    constexpr int units = Transposed ? Extent / 8 : LLMPAR__CUDA_GEMM_HALF_K / 8, step = LLMPAR__CUDA_GEMM_THREADS / units, passes = (Transposed ? LLMPAR__CUDA_GEMM_HALF_K : Extent) / step;
    int thread = llmpar__cu_again((int)threadIdx.x), unit = thread % units, row = thread / units;
    int rows = (Transposed ? k : extent) - row, bytes = min(max(2 * (Transposed ? extent : k) - 16 * unit, 0), 16);
    in += row * ld + 16 * unit;
    out += row * (16 * units) + 16 * (unit ^ (Transposed ? row & 7 : row >> 1 & 3));
    if (!loose) {
#pragma unroll
        for (int i = 0; i < passes; i++) {
            llmpar__cu_copy_async(out + i * step * (16 * units), in, i * step < rows ? bytes : 0);
            in += step * ld;
        }
        return;
    }
#pragma unroll 1
    for (int i = 0; i < passes; i++) { /* element by element */
        llmpar__cuda_16 unit_of_8;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            uint32_t low = i * step < rows && 4 * e < bytes ? *(const uint16_t *)(const void *)(in + 4 * e) : 0u;
            uint32_t high = i * step < rows && 4 * e + 2 < bytes ? *(const uint16_t *)(const void *)(in + 4 * e + 2) : 0u;
            unit_of_8.word[e] = low | high << 16;
        }
        *(llmpar__cuda_16 *)(void *)(out + i * step * (16 * units)) = unit_of_8;
        in += step * ld;
    }
}

template <int F16> struct llmpar__cuda_gemm_half_type { typedef llmpar__cuda_bf16 type; };
template <> struct llmpar__cuda_gemm_half_type<1> { typedef llmpar__cuda_f16 type; };

/* A warp's fragments of one link. */
struct llmpar__cuda_gemm_half_fragments { uint32_t a[4][4], b[4][4]; };

/* Where a lane reads them: `row` bytes into the operand's part of a stage, and the unit in that row, exchanged. */
struct llmpar__cuda_gemm_half_lane { int row, unit; };

/* warp: its first row (column) in the tile. near: of the lane's 8 x 8 matrix among the four: does it lie 8 further along the rows (columns), along k? */
template <int Extent, int Transposed> static __device__ __forceinline__ llmpar__cuda_gemm_half_lane llmpar__cuda_gemm_half_lane_of(int warp, int further, int further_k)
{
    int r = (int)threadIdx.x & 7;
    llmpar__cuda_gemm_half_lane lane;
    lane.row = Transposed ? (8 * further_k + r) * (2 * Extent) + 2 * warp : (warp + 8 * further + r) * (2 * LLMPAR__CUDA_GEMM_HALF_K);
    lane.unit = Transposed ? 16 * (further ^ r) : 16 * (further_k ^ r >> 1);
    return lane;
}

/* 16 rows (columns) x 16 k: number `i` of the warp's four, of link `link` of the stage. */
template <int Extent, int Transposed> static __device__ __forceinline__ void llmpar__cuda_gemm_half_read(uint32_t out[4], const unsigned char *stage, llmpar__cuda_gemm_half_lane lane, int i, int link)
{
    if (Transposed) llmpar__cu_ldmatrix_x4_trans(out, stage + lane.row + link * 16 * (2 * Extent) + (llmpar__cu_again(lane.unit) ^ 32 * i));
    else llmpar__cu_ldmatrix_x4(out, stage + lane.row + i * 16 * (2 * LLMPAR__CUDA_GEMM_HALF_K) + (lane.unit ^ 32 * link));
}

template <int F16> static __device__ __forceinline__ void llmpar__cuda_gemm_half_multiply(float (&sum)[LLMPAR__CUDA_GEMM_HALF_FLOATS], const llmpar__cuda_gemm_half_fragments &in)
{
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (F16) llmpar__cu_mma_f16(sum + 32 * i + 4 * j, in.a[i], in.b[j >> 1] + 2 * (j & 1));
            else llmpar__cu_mma_bf16(sum + 32 * i + 4 * j, in.a[i], in.b[j >> 1] + 2 * (j & 1));
        }
}

static __device__ __forceinline__ void llmpar__cuda_gemm_half_wait(int stages)
{
    if (stages == LLMPAR__CUDA_GEMM_HALF_STAGES) llmpar__cu_copy_async_wait<LLMPAR__CUDA_GEMM_HALF_STAGES - 2>();
    else llmpar__cu_copy_async_wait<LLMPAR__CUDA_GEMM_HALF_STAGES_DEEP - 2>();
    __syncthreads();
}

/* Stores a tile in the operands' type. Of each 8 neighbours in a row four lanes have 2; they exchange four such, so that each has all of one: 16 bytes. */
template <int F16> static __device__ __forceinline__ void llmpar__cuda_gemm_half_store(const llmpar__cuda_gemm_job &job, int64_t i0, int64_t j0, const float (&sum)[LLMPAR__CUDA_GEMM_HALF_FLOATS])
{
    typedef typename llmpar__cuda_gemm_half_type<F16>::type half;
    int thread = llmpar__cu_again((int)threadIdx.x), lane = thread & 31, warp = thread >> 5;
    int64_t row = i0 + (warp >> 2) * 64 + (lane >> 2), column = j0 + (warp & 3) * 64 + 8 * (lane & 3);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        half *c = (half *)job.c + (row + 8 * i) * job.ldc + column;
#pragma unroll
        for (int b = 0; b < 8; b += 4) {
            llmpar__cuda_16 out;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                half low, high;
                int at = 32 * (i >> 1) + 4 * (b + e) + 2 * (i & 1);
                llmpar__cuda_store(&low, sum[at]);
                llmpar__cuda_store(&high, sum[at + 1]);
                out.word[e] = (uint32_t)low.bits | (uint32_t)high.bits << 16;
            }
#pragma unroll
            for (int bit = 1; bit <= 2; bit *= 2) /* word e of lane l becomes word l of lane e */
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    if (e & bit) continue;
                    uint32_t given = lane & bit ? out.word[e] : out.word[e | bit], taken = __shfl_xor_sync(0xffffffffu, given, bit);
                    if (lane & bit) out.word[e] = taken;
                    else out.word[e | bit] = taken;
                }
            if (row + 8 * i >= job.m) continue;
            if (job.aligned && column + 8 * b + 8 <= job.n) llmpar__cu_store_16(c + 8 * b, out.word);
            else {
#pragma unroll
                for (int e = 0; e < 8; e++)
                    if (column + 8 * b + e < job.n) c[8 * b + e].bits = (uint16_t)(out.word[e >> 1] >> 16 * (e & 1));
            }
        }
    }
}

/* The tile from or to f32. */
template <int Load> static __device__ __forceinline__ void llmpar__cuda_gemm_half_f32(const llmpar__cuda_gemm_job &job, int64_t i0, int64_t j0, float (&sum)[LLMPAR__CUDA_GEMM_HALF_FLOATS])
{
    int thread = llmpar__cu_again((int)threadIdx.x), lane = thread & 31, warp = thread >> 5;
    int64_t row = i0 + (warp >> 2) * 64 + (lane >> 2), column = j0 + (warp & 3) * 64 + 2 * (lane & 3);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float *c = (float *)job.c + (row + 8 * i) * job.ldc + column;
#pragma unroll
        for (int b = 0; b < 8; b++) {
            int at = 32 * (i >> 1) + 4 * b + 2 * (i & 1);
            if (row + 8 * i >= job.m || column + 8 * b >= job.n) continue;
            if (job.aligned && column + 8 * b + 1 < job.n) {
                llmpar__cuda_pair_of_floats pair = { { sum[at], sum[at + 1] } };
                if (!Load) *(llmpar__cuda_pair_of_floats *)(void *)(c + 8 * b) = pair;
                else {
                    pair = *(const llmpar__cuda_pair_of_floats *)(const void *)(c + 8 * b);
                    sum[at] = pair.x[0];
                    sum[at + 1] = pair.x[1];
                }
            } else if (Load) {
                sum[at] = c[8 * b];
                if (column + 8 * b + 1 < job.n) sum[at + 1] = c[8 * b + 1];
            } else {
                c[8 * b] = sum[at];
                if (column + 8 * b + 1 < job.n) c[8 * b + 1] = sum[at + 1];
            }
        }
    }
}

template <int F16, int TransposedA, int TransposedB> __global__ void __launch_bounds__(LLMPAR__CUDA_GEMM_THREADS, 1) llmpar__cuda_gemm_half(const llmpar__cuda_gemm_job job)
{
    enum { M = LLMPAR__CUDA_GEMM_HALF_M, N = LLMPAR__CUDA_GEMM_HALF_N, K = LLMPAR__CUDA_GEMM_HALF_K };
    LLMPAR__CUDA_SHARED(unsigned char, shared);
    int matrix = (int)threadIdx.x >> 3 & 3, warp_m = ((int)threadIdx.x >> 7) * 64, warp_n = ((int)threadIdx.x >> 5 & 3) * 64;
    llmpar__cuda_gemm_half_lane lane_a = llmpar__cuda_gemm_half_lane_of<M, TransposedA>(warp_m, matrix & 1, matrix >> 1);
    llmpar__cuda_gemm_half_lane lane_b = llmpar__cuda_gemm_half_lane_of<N, TransposedB>(warp_n, matrix >> 1, matrix & 1);
    llmpar__cuda_gemm_half_fragments fragments[2];
    float sum[LLMPAR__CUDA_GEMM_HALF_FLOATS];

    lane_b.row += LLMPAR__CUDA_GEMM_HALF_A_BYTES;
    llmpar__cuda_gemm_source source;
    int stage = 0; /* that is multiplied */
    source.begin(job);

    auto fill = [&](int ahead) {
        unsigned char *out = shared + ahead * LLMPAR__CUDA_GEMM_HALF_STAGE;
        if (source.left > 0) {
            llmpar__cuda_gemm_run run = llmpar__cuda_gemm_run_at(job, source.run);
            int k = min(source.left, (int)K);
            llmpar__cuda_gemm_half_copy<M, TransposedA>(out, source.first<2, TransposedA>(run.a, run.lda, source.i, M), run.lda, llmpar__cuda_gemm_part_of(job.m, source.i, M), k, run.loose & 1);
            llmpar__cuda_gemm_half_copy<N, TransposedB>(out + LLMPAR__CUDA_GEMM_HALF_A_BYTES, source.first<2, TransposedB>(run.b, run.ldb, source.j, N), run.ldb, llmpar__cuda_gemm_part_of(job.n, source.j, N), k, run.loose & 2);
            source.advance(job, run, K);
        }
        llmpar__cu_copy_async_commit();
    };
    auto read = [&](int link) {
        const unsigned char *in = shared + stage * LLMPAR__CUDA_GEMM_HALF_STAGE;
#pragma unroll
        for (int i = 0; i < 4; i++) llmpar__cuda_gemm_half_read<M, TransposedA>(fragments[link].a[i], in, lane_a, i, link);
#pragma unroll
        for (int i = 0; i < 4; i++) llmpar__cuda_gemm_half_read<N, TransposedB>(fragments[link].b[i], in, lane_b, i, link);
    };

#pragma unroll 1
    for (int i = 0; i < job.stages - 1; i++) fill(i);
    llmpar__cuda_gemm_half_wait(job.stages);
#pragma unroll 1
    for (int32_t tile = (int32_t)blockIdx.x; tile < job.tiles_m * job.tiles_n; tile += (int32_t)gridDim.x) {
        int32_t i0, j0, run = 0, piece = 0, next = llmpar__cuda_gemm_first_piece(job, 0); /* piece: that the chains are in; next: that of the next segment */
        llmpar__cuda_gemm_tile(job, tile, &i0, &j0);
        int active = (int64_t)i0 * M + warp_m < job.m && (int64_t)j0 * N + warp_n < job.n;
#pragma unroll
        for (int i = 0; i < LLMPAR__CUDA_GEMM_HALF_FLOATS; i++) sum[i] = 0;
        if (job.accumulate) llmpar__cuda_gemm_half_f32<1>(job, (int64_t)i0 * M, (int64_t)j0 * N, sum);
        for (;;) {
#pragma unroll 1
            for (; piece < next; piece++) llmpar__cuda_gemm_finish(job, shared, piece, sum);
            if (piece == job.pieces) break;
            if (active) read(0);
#pragma unroll 1
            for (int32_t k = llmpar__cuda_gemm_run_at(job, run).k; k > 0; k -= K) {
                /* Into the stage that everybody left at the last barrier; half of the warps before they multiply, half behind it: so one of the two of a scheduler multiplies while the other one computes addresses. */
#pragma unroll 1
                for (int turn = 0; turn < 2; turn++) {
                    if (turn == (warp_m == 0)) {
                        if (!active) continue;
                        read(1);
                        llmpar__cuda_gemm_half_multiply<F16>(sum, fragments[0]);
                    } else fill((stage ? stage : job.stages) - 1);
                }
                if (++stage == job.stages) stage = 0;
                llmpar__cuda_gemm_half_wait(job.stages);
                if (active) {
                    read(0); /* behind a segment's last chunk: for nothing */
                    if (k > K / 2) llmpar__cuda_gemm_half_multiply<F16>(sum, fragments[1]);
                }
            }
            next = llmpar__cuda_gemm_next_piece(job, &run, piece);
        }
        llmpar__cuda_gemm_tile(job, llmpar__cu_again(tile), &i0, &j0);
        if (job.narrow) llmpar__cuda_gemm_half_store<F16>(job, (int64_t)i0 * M, (int64_t)j0 * N, sum);
        else llmpar__cuda_gemm_half_f32<0>(job, (int64_t)i0 * M, (int64_t)j0 * N, sum);
    }
}
