/* norm: RMSNorm (Zhang & Sennrich 2019) forward and backward. The hidden dim is never split, so the sum over it is in lanes; the sum of dw over tokens
   may be split by a mesh and follows docs/exact.md: a chain per T-piece, a tree over T-pieces, one row a leaf. */
#include "cpu/cpu_internal.h"
#include "cpu/kernels_internal.h"

static const llmpar__kernel llmpar__norm_forward_kernels[4] = LLMPAR__VKERNELS(norm_forward);
static const llmpar__kernel llmpar__norm_dx_kernels[4] = LLMPAR__VKERNELS(norm_dx);
static const llmpar__kernel llmpar__norm_piece_kernels[4] = LLMPAR__VKERNELS(norm_piece);
static const llmpar__kernel llmpar__norm_tree_kernels[4] = LLMPAR__VKERNELS(norm_tree);

enum { LLMPAR__NORM_CHAINS = 16384 }; /* on the caller's stack: doubles that hold chains of dw */

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_rmsnorm(llmpar_device *device, llmpar_stream *stream, const llmpar_rmsnorm_args *args)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar__norm_job job;
    llmpar_status status = llmpar__v_check(device, "rmsnorm", args->dtype);
    (void)stream;
    if (status || args->rows <= 0 || args->dim <= 0) return status;
    job.args = args;
    job.step = llmpar__v_max(1, 16384 / args->dim);
    llmpar__pool_run(cpu, llmpar__norm_forward_kernels[llmpar__v_index(cpu, args->dtype)], &job, llmpar__v_blocks(args->rows, job.step));
    return LLMPAR_OK;
}

/* dw of all leaves, some leaves or columns at a time, so that their chains find room. dx goes along if whole rows are taken: a row comes from memory once. Returns whether it did. */
static int llmpar__norm_dw(llmpar__cpu *cpu, llmpar__norm_backward_job *job, double *chains)
{
    const llmpar_rmsnorm_backward_args *a = job->args;
    const llmpar_tokens *tokens = &a->tokens;
    int64_t room = LLMPAR__NORM_CHAINS * (int64_t)sizeof *chains / (a->dtype == LLMPAR_F64 ? 8 : 4), last = tokens->canon - 1, leaves, t0, t1;
    int kernel = llmpar__v_index(cpu, a->dtype);
    for (job->piece = 0; job->piece < last; job->piece++) {
        llmpar__norm_piece_rows(tokens, job->piece, &t0, &t1);
        if (t0 < t1) break;
    }
    for (; last > job->piece; last--) {
        llmpar__norm_piece_rows(tokens, last, &t0, &t1);
        if (t0 < t1) break;
    }
    job->pieces = last + 1 - job->piece;
    job->stride = llmpar__v_min(llmpar__v_blocks(a->dim, 32) * 32, room / job->pieces / 32 * 32);
    if (!job->stride) return -1;
    job->with_dx = job->stride >= a->dim;
    job->chains = chains;
    leaves = llmpar__v_max(1, room / (job->pieces * job->stride));
    for (job->leaf = 0; job->leaf < tokens->leaves; job->leaf += leaves) {
        int64_t count = llmpar__v_min(leaves, tokens->leaves - job->leaf);
        for (job->column = 0; job->column < a->dim; job->column += job->stride) {
            job->columns = llmpar__v_min(job->stride, a->dim - job->column);
            llmpar__pool_run(cpu, llmpar__norm_piece_kernels[kernel], job, count * job->pieces);
            llmpar__pool_run(cpu, llmpar__norm_tree_kernels[kernel], job, count);
        }
    }
    return job->with_dx;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_rmsnorm_backward(llmpar_device *device, llmpar_stream *stream, const llmpar_rmsnorm_backward_args *args)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    const llmpar_tokens *tokens = &args->tokens;
    llmpar__norm_backward_job job;
    double chains[LLMPAR__NORM_CHAINS];
    llmpar_status status = llmpar__v_check(device, "rmsnorm_backward", args->dtype);
    int done = 0;
    (void)stream;
    if (status || args->dim <= 0) return status;
    memset(&job, 0, sizeof job);
    job.args = args;
    job.step = llmpar__v_max(1, 8192 / args->dim);
    if (args->dw_leaves && tokens->leaves > 0) {
        if (tokens->canon < 1 || tokens->batch % tokens->leaves)
            return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "rmsnorm_backward: %lld leaves for batch %lld, canon %d: expected leaves that divide the batch, canon >= 1", (long long)tokens->leaves, (long long)tokens->batch, (int)tokens->canon);
        done = llmpar__norm_dw(cpu, &job, chains); /* before dx, which may take the place of dy */
        if (done < 0) return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "rmsnorm_backward: %lld pieces of the sequence, expected at most %d", (long long)job.pieces, (int)(LLMPAR__NORM_CHAINS / 32));
    }
    if (done) return LLMPAR_OK;
    job.with_dx = 1;
    llmpar__pool_run(cpu, llmpar__norm_dx_kernels[llmpar__v_index(cpu, args->dtype)], &job, llmpar__v_blocks(tokens->batch * tokens->t, job.step));
    return LLMPAR_OK;
}
