/* attention: causal softmax attention with grouped queries and packed documents, forward and backward (Dao et al. 2022, "FlashAttention";
   lse recomputation in backward). Scores exist only as tiles:

        keys of one document, tiles of 64 counted from its start
        | tile 0 | tile 1 | tile 2 |
     q  |XXXXXXXX|XXXXX   |        |   a block of query rows walks the key tiles from left to right with a running maximum;
     q  |XXXXXXXX|XXXXXX  |        |   only the columns its last row may see are computed
     q  |XXXXXXXX|XXXXXXX |        |

   A row's bits depend on its own query and on the keys of its document up to itself, never on the rows beside it: each element of a product is one
   chain, and a column that a row may not see weighs +0 in every sum, which is the same as being left out (results have +0 added at the end, so
   that a chain that underflowed to -0 cannot tell). So a decode step gives the bits of the whole sequence, and a document those it has alone.
   Scores are in units of ln 2, because exp2 takes less arithmetic than exp: q is multiplied by scale / ln 2 on the way in, lse by ln 2 on the way out.
   A task is one KV head of one sequence; its keys are packed once and used by every query head of the group. */
#include "cpu/cpu_internal.h"
#include "cpu/kernels_internal.h"

LLMPAR__PRIVATE_DEF int64_t llmpar__attention_document(const llmpar_attention_args *a, int64_t sequence, int64_t i, int64_t *begin)
{
    const int32_t *start = a->doc_start ? a->doc_start + sequence * a->tk : NULL;
    int64_t end = a->tk;
    *begin = start ? start[i] : 0;
    if (start) for (end = i + 1; end < a->tk && start[end] == start[i];) end++;
    return end;
}

LLMPAR__PRIVATE_DEF int64_t llmpar__attention_split(int64_t n) { return n % 2 ? llmpar_tree_split(n) : n / 2; }

LLMPAR__PRIVATE_DEF int64_t llmpar__attention_slots(int64_t n)
{
    int64_t slots = 1;
    for (n--; n > 0; n /= 2) slots++;
    return slots;
}

static const llmpar__kernel llmpar__attention_forward_kernels[4] = LLMPAR__VKERNELS(attention_forward);
#if LLMPAR__VX86
static const llmpar__kernel llmpar__attention_decode_kernels[4] = { NULL, llmpar__attention_decode_portable, llmpar__attention_decode_avx2, llmpar__attention_decode_avx512 };
#else
static const llmpar__kernel llmpar__attention_decode_kernels[4] = { NULL, llmpar__attention_decode_portable, llmpar__attention_decode_portable, llmpar__attention_decode_portable };
#endif
static const llmpar__kernel llmpar__attention_backward_kernels[4] = LLMPAR__VKERNELS(attention_backward);

/* Bytes for one worker. Rows are padded to 16 elements, so that the answer is the same at every level. */
static size_t llmpar__attention_worker_bytes(const llmpar_attention_args *a, int backward)
{
    int64_t tile = LLMPAR__ATTENTION_TILE, block = LLMPAR__ATTENTION_BLOCK, e = llmpar_round_up(a->head_dim, 16), left = block * llmpar_round_up(a->head_dim, tile), t = llmpar_round_up(a->tk, tile), count;
    if (!backward) count = t * e * 2 + block * tile + left + block * e;                      /* keys, values; of a block: scores, q, out */
    else count = t * e * (3 + 2 * llmpar__attention_slots(a->heads / a->kv_heads)) + 2 * block * tile + (a->dtype == LLMPAR_BF16 ? 4 : 3) * left + block * e; /* keys twice, values; dk and dv a slot; of a block: scores, dS, q twice, dout (BF16: twice), dq */
    return (size_t)count * llmpar_dtype_size(llmpar_dtype_sum(a->dtype)); /* BF16 and F16 are widened on the way in */
}

static size_t llmpar__attention_bytes(llmpar_device *device, const llmpar_attention_args *a, int backward)
{
    int64_t workers = llmpar__v_min(llmpar__pool_threads((llmpar__cpu *)device->state), llmpar__v_max(1, a->batch * a->kv_heads));
    if (a->heads < 1 || a->kv_heads < 1 || a->heads % a->kv_heads || a->head_dim < 1 || a->tk < 1) return 0;
    return (size_t)workers * llmpar__attention_worker_bytes(a, backward) + 64;
}

LLMPAR__PRIVATE_DEF size_t llmpar__cpu_attention_workspace(llmpar_device *device, const llmpar_attention_args *args) { return llmpar__attention_bytes(device, args, 0); }
LLMPAR__PRIVATE_DEF size_t llmpar__cpu_attention_backward_workspace(llmpar_device *device, const llmpar_attention_backward_args *args) { return llmpar__attention_bytes(device, &args->forward, 1); }

static llmpar_status llmpar__attention_check(llmpar_device *device, const char *name, const llmpar_attention_args *a, int backward)
{
    size_t need = llmpar__attention_bytes(device, a, backward);
    llmpar_status status = llmpar__v_check(device, name, a->dtype);
    if (status) return status;
    if (a->kv_heads < 1 || a->heads % a->kv_heads || a->head_dim < 1)
        return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "%s: %lld heads, %lld kv heads, head_dim %lld: expected heads to be a multiple of kv heads", name, (long long)a->heads, (long long)a->kv_heads, (long long)a->head_dim);
    if (a->tq > a->tk || a->tk > a->tk_stride || (backward && (a->tq != a->tk || a->tk != a->tk_stride)))
        return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "%s: tq %lld, tk %lld, tk_stride %lld: expected %s", name, (long long)a->tq, (long long)a->tk, (long long)a->tk_stride, backward ? "three equal numbers" : "tq <= tk <= tk_stride");
    if (!a->workspace || a->workspace_bytes < need)
        return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "%s: workspace of %llu bytes, expected %llu", name, (unsigned long long)a->workspace_bytes, (unsigned long long)need);
    if (a->doc_start) for (int64_t b = 0; b < a->batch; b++) {
        const int32_t *start = a->doc_start + b * a->tk;
        int64_t first = a->tk - a->tq;
        for (int64_t i = first; i < a->tk; i++)
            if (start[i] < 0 || start[i] > i || (i > first && start[i] != i && start[i] != start[i - 1]))
                return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "%s: doc_start of sequence %lld, position %lld is %d: expected the position itself or the value before it", name, (long long)b, (long long)i, (int)start[i]);
    }
    return LLMPAR_OK;
}

static int llmpar__attention_empty(const llmpar_attention_args *a) { return a->batch <= 0 || a->tq <= 0 || a->heads <= 0; }

/* The kernel, and its job but for the workspace; `threads` share the call's tasks, of which *tasks says how many. */
static llmpar__kernel llmpar__attention_plan(llmpar__cpu *cpu, const llmpar__kernel *kernels, const llmpar_attention_args *a, const llmpar_attention_backward_args *backward, int64_t threads, llmpar__attention_job *job, int64_t *tasks)
{
    memset(job, 0, sizeof *job);
    job->args = a;
    job->backward = backward;
    job->pairs = cpu->level == LLMPAR_CPU_AVX512BF16 && a->dtype == LLMPAR_BF16 && a->head_dim % 2 == 0;
    job->half = job->half_dkv = llmpar__half_of(cpu, a->dtype);
    if (backward) {
        if (backward->dkv_dtype != LLMPAR_DTYPE_DEFAULT) job->half_dkv = llmpar__half_of(cpu, backward->dkv_dtype);
        job->ld_dk = backward->ld_dkv ? backward->ld_dkv : a->ldk;
        job->ld_dv = backward->ld_dkv ? backward->ld_dkv : a->ldv;
    }
    if (!backward && a->heads / a->kv_heads * a->tq <= LLMPAR__THIN_ROWS && a->dtype != LLMPAR_F64) job->decode = llmpar__gemm_thin_function(cpu, a->dtype, &job->decode_columns);
    if (job->decode) {
        int64_t filled = llmpar__gemm_thin_filled(a->heads / a->kv_heads * a->tq);
        kernels = llmpar__attention_decode_kernels;
        job->decode_parts = llmpar__v_blocks(a->kv_heads, LLMPAR__ATTENTION_DECODE / filled); /* what a task then needs is less than the tiled path's block */
        job->decode_parts = llmpar__v_min(a->kv_heads, llmpar_round_up(job->decode_parts, threads)); /* as many for every thread, and no more: the longer what they read of a row is */
        if (a->head_dim * job->half.size % 64) job->decode_parts = a->kv_heads;
    } else job->decode_parts = a->kv_heads;
    *tasks = a->batch * job->decode_parts;
    return kernels[llmpar__v_index(cpu, a->dtype)];
}

static char *llmpar__attention_aligned(const llmpar_attention_args *a) { return (char *)(((uintptr_t)a->workspace + 63u) & ~(uintptr_t)63u); }

static void llmpar__attention_run(llmpar_device *device, const llmpar__kernel *kernels, const llmpar_attention_args *a, const llmpar_attention_backward_args *backward)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar__attention_job job;
    int64_t tasks, threads = llmpar__pool_threads(cpu);
    llmpar__kernel kernel = llmpar__attention_plan(cpu, kernels, a, backward, threads, &job, &tasks);
    job.workspace = llmpar__attention_aligned(a);
    job.worker_bytes = llmpar__attention_worker_bytes(a, backward != NULL);
    job.by_task = tasks <= threads;
    llmpar__pool_run(cpu, kernel, &job, tasks);
}

/* ---- several calls: their tasks one behind the other, so that a thread reads the whole rows of a text's cache ---- */

typedef struct llmpar__attention_each_job { llmpar__cpu *cpu; const llmpar_attention_args *each; size_t worker_bytes; int64_t threads /* of one call */; int by_task; } llmpar__attention_each_job;

static void llmpar__attention_each_task(void *arg, int64_t task, int32_t worker)
{
    const llmpar__attention_each_job *all = (const llmpar__attention_each_job *)arg;
    const llmpar_attention_args *a = all->each;
    llmpar__attention_job job;
    llmpar__kernel kernel = NULL;
    char *workspace = llmpar__attention_aligned(a) + all->worker_bytes * (size_t)(all->by_task ? task : worker);
    for (int64_t tasks; !kernel; a++) {
        if (llmpar__attention_empty(a)) continue;
        kernel = llmpar__attention_plan(all->cpu, llmpar__attention_forward_kernels, a, NULL, all->threads, &job, &tasks);
        if (task >= tasks) {
            task -= tasks;
            kernel = NULL;
        }
    }
    job.workspace = workspace; /* worker_bytes 0: this worker's alone */
    kernel(&job, task, worker);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_attention_each(llmpar_device *device, llmpar_stream *stream, const llmpar_attention_each_args *args)
{
    llmpar__attention_each_job all;
    llmpar__attention_job job;
    int64_t total = 0, tasks, threads;
    (void)stream;
    memset(&all, 0, sizeof all);
    all.cpu = (llmpar__cpu *)device->state;
    all.each = args->each;
    threads = llmpar__pool_threads(all.cpu);
    all.threads = llmpar__v_blocks(threads, llmpar__v_max(1, args->count));
    for (int32_t i = 0; i < args->count; i++) {
        const llmpar_attention_args *a = &args->each[i];
        llmpar_status status;
        if (llmpar__attention_empty(a)) continue;
        status = llmpar__attention_check(device, "attention_each", a, 0);
        if (status) return status;
        if (a->workspace != args->each[0].workspace) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "attention_each: call %d has a workspace of its own, expected that of call 0", (int)i);
        llmpar__attention_plan(all.cpu, llmpar__attention_forward_kernels, a, NULL, all.threads, &job, &tasks);
        all.worker_bytes = all.worker_bytes > llmpar__attention_worker_bytes(a, 0) ? all.worker_bytes : llmpar__attention_worker_bytes(a, 0);
        total += tasks;
    }
    if (!total) return LLMPAR_OK;
    all.by_task = total <= threads;
    size_t need = (size_t)llmpar__v_min(total, threads) * all.worker_bytes + 64;
    if (args->each[0].workspace_bytes < need)
        return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "attention_each: workspace of %llu bytes, expected %llu", (unsigned long long)args->each[0].workspace_bytes, (unsigned long long)need);
    llmpar__pool_run(all.cpu, llmpar__attention_each_task, &all, total);
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_attention(llmpar_device *device, llmpar_stream *stream, const llmpar_attention_args *args)
{
    llmpar_status status;
    (void)stream;
    if (llmpar__attention_empty(args)) return LLMPAR_OK;
    status = llmpar__attention_check(device, "attention", args, 0);
    if (!status) llmpar__attention_run(device, llmpar__attention_forward_kernels, args, NULL);
    return status;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_attention_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_attention_backward_args *args)
{
    llmpar_status status;
    (void)stream;
    if (llmpar__attention_empty(&args->forward)) return LLMPAR_OK;
    status = llmpar__attention_check(device, "attention_backward", &args->forward, 1);
    if (!status && args->dkv_dtype != LLMPAR_DTYPE_DEFAULT && args->dkv_dtype != args->forward.dtype && args->dkv_dtype != llmpar_dtype_sum(args->forward.dtype))
        return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "attention_backward: dkv_dtype %s for dtype %s, expected the same or %s", llmpar_dtype_name(args->dkv_dtype), llmpar_dtype_name(args->forward.dtype), llmpar_dtype_name(llmpar_dtype_sum(args->forward.dtype)));
    if (!status && args->ld_dkv < 0) return llmpar_error_set(device->error, LLMPAR_ERR_SHAPE, "attention_backward: ld_dkv %lld, expected 0 or the distance of two rows", (long long)args->ld_dkv);
    if (!status) llmpar__attention_run(device, llmpar__attention_backward_kernels, &args->forward, args);
    return status;
}
