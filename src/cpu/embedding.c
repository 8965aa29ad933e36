/* embedding: rows of a vocab-sharded table by id, and its gradient. Forward is a select, not a sum with zeros. Backward sorts the tokens by id (stably, by
   counting) and sums row by row: nothing of the table's size but the result is touched. */
#include "cpu/cpu_internal.h"
#include "cpu/kernels_internal.h"

typedef struct llmpar__embedding_job { const llmpar_embedding_args *args; int64_t step; } llmpar__embedding_job;

static const llmpar__kernel llmpar__embedding_backward_kernels[4] = LLMPAR__VKERNELS(embedding_gradient);

static void llmpar__embedding_gather(void *arg, int64_t task, int32_t worker)
{
    const llmpar__embedding_job *job = (const llmpar__embedding_job *)arg;
    const llmpar_embedding_args *a = job->args;
    size_t bytes = (size_t)a->dim * llmpar_dtype_size(a->dtype);
    int64_t end = llmpar__v_min(a->rows, (task + 1) * job->step);
    (void)worker;
    for (int64_t row = task * job->step; row < end; row++) {
        int64_t id = a->ids[row] - a->v_begin, next = row + 1 < a->rows ? a->ids[row + 1] - a->v_begin : id;
        char *out = (char *)a->out + (size_t)row * bytes;
        if (next < 0 || next >= a->v_local) next = 0;
        if (id >= 0 && id < a->v_local) llmpar__copy_row(out, (const char *)a->table + (size_t)id * bytes, bytes, out + bytes, (const char *)a->table + (size_t)next * bytes);
        else memset(out, 0, bytes);
    }
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_embedding(llmpar_device *device, llmpar_stream *stream, const llmpar_embedding_args *args)
{
    llmpar__embedding_job job;
    llmpar_status status = llmpar__v_check(device, "embedding", args->dtype);
    (void)stream;
    if (status || args->rows <= 0 || args->dim <= 0) return status;
    job.args = args;
    job.step = llmpar__v_max(1, 8192 / args->dim);
    llmpar__pool_run((llmpar__cpu *)device->state, llmpar__embedding_gather, &job, llmpar__v_blocks(args->rows, job.step));
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF size_t llmpar__cpu_embedding_backward_workspace(llmpar_device *device, const llmpar_embedding_backward_args *args)
{
    (void)device;
    /* One int64 a token, v_local + 1 for the counts, and room to align. */
    return (size_t)(llmpar__v_max(0, args->v_local) + 1 + llmpar__v_max(0, args->tokens.batch * args->tokens.t)) * sizeof(int64_t) + sizeof(int64_t);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_embedding_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_embedding_backward_args *args)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    int64_t rows = args->tokens.batch * args->tokens.t, v_local = args->v_local, *begin, *order;
    size_t need = llmpar__cpu_embedding_backward_workspace(device, args);
    llmpar__embedding_backward_job job;
    llmpar_status status = llmpar__v_check(device, "embedding_backward", args->dtype);
    (void)stream;
    if (status || v_local <= 0 || args->dim <= 0) return status;
    if (rows > 0 && (args->tokens.leaves < 1 || args->tokens.batch % args->tokens.leaves))
        return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "embedding_backward: %lld leaves for batch %lld, expected leaves that divide the batch", (long long)args->tokens.leaves, (long long)args->tokens.batch);
    if (!args->workspace || args->workspace_bytes < need)
        return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "embedding_backward: workspace of %llu bytes, expected %llu", (unsigned long long)args->workspace_bytes, (unsigned long long)need);
    begin = (int64_t *)(((uintptr_t)args->workspace + 7u) & ~(uintptr_t)7u);
    order = begin + v_local + 1;
    memset(begin, 0, (size_t)(v_local + 1) * sizeof *begin);
    /* begin[v] counts id v, then says where its tokens begin; filling moves it on to where they end. */
    for (int64_t r = 0; r < rows; r++) {
        int64_t id = args->ids[r] - args->v_begin;
        if (id >= 0 && id < v_local) begin[id]++;
    }
    for (int64_t v = 0, sum = 0; v <= v_local; v++) {
        int64_t count = begin[v];
        begin[v] = sum;
        sum += count;
    }
    for (int64_t r = 0; r < rows; r++) {
        int64_t id = args->ids[r] - args->v_begin;
        if (id >= 0 && id < v_local) order[begin[id]++] = r;
    }
    /* Now begin[v] is the end of v, which is the begin of v + 1. */
    memmove(begin + 1, begin, (size_t)v_local * sizeof *begin);
    begin[0] = 0;
    job.args = args;
    job.begin = begin;
    job.order = order;
    llmpar__pool_run(cpu, llmpar__embedding_backward_kernels[llmpar__v_index(cpu, args->dtype)], &job, llmpar__v_blocks(v_local, LLMPAR__EMBEDDING_IDS));
    return LLMPAR_OK;
}
