/* xent: vocab-parallel softmax cross-entropy in steps (Shoeybi et al. 2019, section 3): row maximum, sum of exp in vocabulary pieces, gradient in place. (The loss, which adds into the exact accumulator: xent_loss.cu.)
   The maximum has no order, and the gradient is element-wise. A piece's sum belongs to one warp, whose lanes count from the piece's begin: each lane takes 16 bytes of columns, again and again 512 bytes further on, adds the 16 bytes up as a tree
   and these in a chain; then a tree over the lanes. So a shard's border at a piece's border changes nothing. The warps of a block are pieces of a row, side by side, and rows where a shard has few pieces. */
#include "cuda/rows_internal.h"

/* The largest over the lanes of a row, as llmpar__cuda_row_sum; NaN if one is. */
static __device__ __forceinline__ float llmpar__cuda_row_max(float x, int lanes, float *partial)
{
    for (int o = (lanes < 32 ? lanes : 32) / 2; o > 0; o /= 2) x = llmpar__cuda_larger(x, __shfl_xor_sync(0xffffffffu, x, o));
    if (lanes > 32) {
        const int warps = lanes / 32, warp = (int)threadIdx.x / 32, first = warp - warp % warps;
        if (threadIdx.x % 32 == 0) partial[warp] = x;
        __syncthreads();
        for (int k = 0; k < warps; k++) x = llmpar__cuda_larger(x, partial[first + k]);
    }
    return x;
}

/* Columns are counted from 16 bytes of aligned memory, `shift` elements before the row's first: what lies before the row or behind it is masked. */
template <typename T> static __device__ __forceinline__ int llmpar__cuda_xent_shift(const T *row) { return (int)((uintptr_t)row % 16 / sizeof(T)); }

template <typename T> static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS) llmpar__cuda_xent_rows_max(llmpar_xent_args a, int lanes)
{
    LLMPAR__CUDA_SHARED(float, partial);
    const int width = llmpar__cuda_vector<T>::count, lane = (int)threadIdx.x % lanes, at_once = LLMPAR__CUDA_ROW_THREADS / lanes, together = 4;
    const int64_t step = (int64_t)lanes * width;
    int turn = 0;
    for (int64_t first = (int64_t)blockIdx.x * at_once; first < a.rows; first += (int64_t)gridDim.x * at_once, turn ^= 1) {
        const int64_t row = first + (int)threadIdx.x / lanes, end = row < a.rows ? a.v_local : 0;
        const T *x = (const T *)a.logits + (end ? row * a.ld : 0);
        const int shift = llmpar__cuda_xent_shift(x);
        float most = llmpar__cuda_minus_infinity();
        for (int64_t c = (int64_t)lane * width - shift; c < end; c += together * step) {
            llmpar__cuda_16 raw[together];
#pragma unroll
            for (int j = 0; j < together; j++) {
                const int64_t at = c + j * step;
                if (at >= 0 && at + width <= end) raw[j] = *(const llmpar__cuda_16 *)(const void *)(x + at);
            }
#pragma unroll
            for (int j = 0; j < together; j++) {
                const int64_t at = c + j * step;
                float v[width];
                if (at >= 0 && at + width <= end) {
                    llmpar__cuda_unpack<T>(v, raw[j]);
#pragma unroll
                    for (int k = 0; k < width; k++) most = llmpar__cuda_larger(most, v[k]);
                } else {
                    for (int k = 0; k < width; k++)
                        if (at + k >= 0 && at + k < end) most = llmpar__cuda_larger(most, llmpar__cuda_load(x[at + k]));
                }
            }
        }
        most = llmpar__cuda_row_max(most, lanes, partial + turn * LLMPAR__CUDA_ROW_WARPS);
        if (row < a.rows && lane == 0) {
            const int64_t target = (int64_t)a.targets[row] - a.v_begin;
            ((float *)a.max)[row] = most;
            ((float *)a.target_logit)[row] = a.targets[row] >= 0 && target >= 0 && target < a.v_local ? llmpar__cuda_load(x[target]) : llmpar__cuda_minus_infinity();
        }
    }
}

/* How the pieces are cut: those in this shard, how many side by side, levels of the tree over rounds of them. */
typedef struct llmpar__cuda_xent_cut { int64_t first, last; int slots, levels; } llmpar__cuda_xent_cut;

template <typename T> static __device__ __forceinline__ float llmpar__cuda_xent_piece(const T *x, int64_t count, float most, int lane)
{
    const int width = llmpar__cuda_vector<T>::count, together = 4;
    const int64_t step = 32 * width;
    const int wide = (uintptr_t)x % 16 == 0;
    float s = 0;
    for (int64_t c = (int64_t)lane * width; c < count; c += together * step) {
        llmpar__cuda_16 raw[together];
#pragma unroll
        for (int j = 0; j < together; j++) raw[j] = llmpar__cuda_read(x + c + j * step, count - c - j * step, wide);
#pragma unroll
        for (int j = 0; j < together; j++) {
            float v[width];
            const int64_t left = count - c - j * step;
            llmpar__cuda_unpack<T>(v, raw[j]);
#pragma unroll
            for (int k = 0; k < width; k++) v[k] = llmpar__cuda_exp(__fsub_rn(v[k], most));
            if (left < width) { /* behind the numbers: a question for each of them would be a branch for each */
#pragma unroll
                for (int k = 0; k < width; k++)
                    if (k >= left) v[k] = 0;
            }
#pragma unroll
            for (int half = width / 2; half > 0; half /= 2) {
#pragma unroll
                for (int k = 0; k < half; k++) v[k] = __fadd_rn(v[2 * k], v[2 * k + 1]);
            }
            s = __fadd_rn(s, v[0]);
        }
    }
    return llmpar__cuda_row_sum(s, 32, NULL);
}

template <typename T> static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS, 3) llmpar__cuda_xent_rows_sum(llmpar_xent_args a, llmpar__cuda_xent_cut cut)
{
    LLMPAR__CUDA_SHARED(float, sums); /* of the round's pieces; [warp] */
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, slot = warp % cut.slots, at_once = LLMPAR__CUDA_ROW_WARPS / cut.slots;
    float *stack = sums + LLMPAR__CUDA_ROW_WARPS + warp;
    for (int64_t first = (int64_t)blockIdx.x * at_once; first < a.rows; first += (int64_t)gridDim.x * at_once) {
        const int64_t row = first + warp / cut.slots;
        const int first_of_row = slot == 0 && lane == 0 && row < a.rows;
        const float most = row < a.rows ? ((const float *)a.max)[row] : 0.0f;
        llmpar__cuda_tree tree = { 0, 0 };
        for (int64_t round = cut.first / cut.slots; round <= cut.last / cut.slots; round++) {
            const int64_t piece = round * cut.slots + slot;
            float s = 0;
            if (row < a.rows && piece < a.canon) {
                const int64_t begin = max(llmpar__cuda_piece_begin(piece, a.v_total, a.canon) - a.v_begin, (int64_t)0), end = min(llmpar__cuda_piece_begin(piece + 1, a.v_total, a.canon) - a.v_begin, a.v_local);
                if (begin < end) s = llmpar__cuda_xent_piece((const T *)a.logits + row * a.ld + begin, end - begin, most, lane);
            }
            __syncthreads(); /* the last round's sums were read */
            if (lane == 0) sums[warp] = s;
            __syncthreads();
            if (first_of_row) llmpar__cuda_tree_push(&tree, stack, LLMPAR__CUDA_ROW_WARPS, round, llmpar__cuda_slot_sum(sums + warp, cut.slots, 1));
            llmpar__cuda_tree_pushed(&tree, round);
        }
        if (first_of_row) ((float *)a.sum)[row] = llmpar__cuda_tree_sum(&tree, stack, LLMPAR__CUDA_ROW_WARPS, cut.levels);
    }
}

/* logits <- (exp(logit - max) / sum - [target]) scale. A block takes LLMPAR__CUDA_XENT_PART x 16 bytes of a row for each thread. */
enum { LLMPAR__CUDA_XENT_PART = 4 };
template <typename T> static __device__ __forceinline__ float llmpar__cuda_xent_gradient(float x, float most, float inverse, float scale, int hit)
{
    float p = __fmul_rn(llmpar__cuda_exp(__fsub_rn(x, most)), inverse);
    return __fmul_rn(hit ? __fsub_rn(p, 1.0f) : p, scale);
}
template <typename T> static __global__ void __launch_bounds__(LLMPAR__CUDA_ROW_THREADS) llmpar__cuda_xent_rows_backward(llmpar_xent_args a, float scale, int64_t parts)
{
    const int width = llmpar__cuda_vector<T>::count, together = LLMPAR__CUDA_XENT_PART;
    const int64_t step = LLMPAR__CUDA_ROW_THREADS * width, total = a.rows * parts;
    for (int64_t part = blockIdx.x; part < total; part += gridDim.x) {
        const int64_t row = llmpar__cuda_divide(part, parts), end = a.v_local;
        T *x = (T *)a.logits + row * a.ld;
        const int counted = a.targets[row] >= 0;
        const int64_t target = (int64_t)a.targets[row] - a.v_begin, c = (part - row * parts) * together * step + (int64_t)threadIdx.x * width - llmpar__cuda_xent_shift(x);
        const float most = ((const float *)a.max)[row], inverse = __fdiv_rn(1.0f, ((const float *)a.sum)[row]);
        llmpar__cuda_16 raw[together];
#pragma unroll
        for (int j = 0; j < together; j++) {
            const int64_t at = c + j * step;
            if (counted && at >= 0 && at + width <= end) raw[j] = *(const llmpar__cuda_16 *)(const void *)(x + at);
            else raw[j].word[0] = raw[j].word[1] = raw[j].word[2] = raw[j].word[3] = 0;
        }
#pragma unroll
        for (int j = 0; j < together; j++) {
            const int64_t at = c + j * step;
            float v[width];
            if (at >= 0 && at + width <= end) {
                if (counted) {
                    const int hit = target - at >= 0 && target - at < width ? (int)(target - at) : -1; /* one comparison of 64 bits, not one a number */
                    llmpar__cuda_unpack<T>(v, raw[j]);
#pragma unroll
                    for (int k = 0; k < width; k++) v[k] = llmpar__cuda_xent_gradient<T>(v[k], most, inverse, scale, k == hit);
                    raw[j] = llmpar__cuda_pack<T>(v);
                }
                *(llmpar__cuda_16 *)(void *)(x + at) = raw[j];
            } else {
                for (int k = 0; k < width; k++)
                    if (at + k >= 0 && at + k < end) {
                        if (counted) llmpar__cuda_store(&x[at + k], llmpar__cuda_xent_gradient<T>(llmpar__cuda_load(x[at + k]), most, inverse, scale, at + k == target));
                        else llmpar__cuda_set_bits(&x[at + k], 0);
                    }
            }
        }
    }
}

template <typename T> static void llmpar__cuda_xent_run_max(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_args *args)
{
    const int lanes = args->v_local < 64 * (int64_t)(16 / sizeof(T)) ? 32 : LLMPAR__CUDA_ROW_THREADS, at_once = LLMPAR__CUDA_ROW_THREADS / lanes;
    llmpar__cuda_launch(device, stream, llmpar__cuda_xent_rows_max<T>, dim3(llmpar__cuda_row_blocks(llmpar__cuda_of(device), (args->rows + at_once - 1) / at_once, 4)), dim3(LLMPAR__CUDA_ROW_THREADS), 2 * LLMPAR__CUDA_ROW_WARPS * sizeof(float), *args, lanes);
}

template <typename T> static void llmpar__cuda_xent_run_sum(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_args *args)
{
    const int64_t local = args->v_local > 0 ? args->v_local : 0;
    llmpar__cuda_xent_cut cut;
    cut.first = 0;
    cut.last = args->canon - 1;
    while (cut.first < cut.last && llmpar__cuda_piece_begin(cut.first + 1, args->v_total, args->canon) <= args->v_begin) cut.first++;
    while (cut.last > cut.first && llmpar__cuda_piece_begin(cut.last, args->v_total, args->canon) >= args->v_begin + local) cut.last--;
    cut.slots = llmpar__cuda_slots(cut.last + 1 - cut.first);
    cut.levels = llmpar__cuda_tree_levels(cut.last / cut.slots);
    const int at_once = LLMPAR__CUDA_ROW_WARPS / cut.slots;
    llmpar__cuda_launch(device, stream, llmpar__cuda_xent_rows_sum<T>, dim3(llmpar__cuda_row_blocks(llmpar__cuda_of(device), (args->rows + at_once - 1) / at_once, 4)), dim3(LLMPAR__CUDA_ROW_THREADS), (size_t)(LLMPAR__CUDA_ROW_WARPS * (1 + cut.levels)) * sizeof(float), *args, cut);
}

template <typename T> static void llmpar__cuda_xent_run_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_backward_args *args)
{
    const int64_t width = llmpar__cuda_vector<T>::count, columns = args->forward.v_local + width - 1, part = LLMPAR__CUDA_XENT_PART * LLMPAR__CUDA_ROW_THREADS * width, parts = (columns + part - 1) / part;
    if (args->forward.v_local <= 0) return;
    llmpar__cuda_launch(device, stream, llmpar__cuda_xent_rows_backward<T>, dim3(llmpar__cuda_row_blocks(llmpar__cuda_of(device), args->forward.rows * parts, 8)), dim3(LLMPAR__CUDA_ROW_THREADS), 0, args->forward, args->scale, parts);
}

static llmpar_status llmpar__cuda_xent_check(llmpar_device *device, llmpar_stream *stream, const char *name, const llmpar_xent_args *args)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_dtype(device, name, args->dtype, 1);
    if (!status && args->rows > 0 && args->canon < 1) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "%s: canon %d, expected at least 1", name, (int)args->canon);
    return status;
}

static llmpar_status llmpar__cuda_xent_max(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_args *args)
{
    llmpar_status status = llmpar__cuda_xent_check(device, stream, "xent_max", args);
    if (status || args->rows <= 0) return status;
    LLMPAR__CUDA_BY_DTYPE(args->dtype, llmpar__cuda_xent_run_max, device, stream, args);
    return llmpar__cuda_end(device, stream, "xent_max");
}

static llmpar_status llmpar__cuda_xent_sum(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_args *args)
{
    llmpar_status status = llmpar__cuda_xent_check(device, stream, "xent_sum", args);
    if (status || args->rows <= 0) return status;
    LLMPAR__CUDA_BY_DTYPE(args->dtype, llmpar__cuda_xent_run_sum, device, stream, args);
    return llmpar__cuda_end(device, stream, "xent_sum");
}

static llmpar_status llmpar__cuda_xent_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_xent_backward_args *args)
{
    llmpar_status status = llmpar__cuda_xent_check(device, stream, "xent_backward", &args->forward);
    if (status || args->forward.rows <= 0) return status;
    LLMPAR__CUDA_BY_DTYPE(args->forward.dtype, llmpar__cuda_xent_run_backward, device, stream, args);
    return llmpar__cuda_end(device, stream, "xent_backward");
}
