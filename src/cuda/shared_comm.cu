/* shared_comm: the communicator of rank threads that share a GPU, or have GPUs that reach each other's memory: every collective is a kernel over the peers' buffers.

   A collective, on every rank (n ranks, this one is r), on the rank's stream S:
     record    event ready[r] behind what S holds: my buffers are as the call found them, and free for the result
     publish   what I am about to do and where my buffers are, in my place of the communicator
     meet      on the host, in a barrier of the inner communicator (rank threads): now all places are complete; compare them: all ranks do the same thing, or all report both sides and nothing has moved
     issue     S waits for every ready[p]; one kernel reads the peers' buffers and writes results; event done[r] behind it
     meet      again: now every rank has issued
     wait      S waits for every done[p]: what comes next on S finds the results, and may overwrite what the peers have read
   Nothing waits for the GPU on the host, and no kernel waits for another. A wait names only events that were recorded, on the host, before it was issued: work depends on work issued earlier, so queues that
   the driver shares between streams cannot lock each other out. An event is recorded again only behind the next meeting, when nobody will wait for its last recording any more.

   Who writes what: rank r alone writes what is derived from part r. All-gather, broadcast and all-to-all read into the own buffer; reduce-scatter sums part r; all-reduce sums slice r of all inputs and writes
   it to all outputs, which in place overwrites what nobody else reads. Sums are the tree of docs/exact.md over the ranks, element by element: the bits of every other communicator.

   Failures are the inner communicator's: a rank that fails aborts the job there, and who waits in a meeting returns with LLMPAR_ERR_PEER or LLMPAR_ERR_TIMEOUT. Before a rank goes away from a collective that
   others have begun, it closes the communicator (nobody issues from then on) and waits for what was issued: its buffers are its own again.

   send and recv: the sender's place travels through the inner communicator, the receiver's stream copies, and its answer lets the sender's stream wait for the copy. */
#include "cuda/launch.h"
#include "cuda/tree_internal.h"

#include <pthread.h>
#include <unistd.h>

#define LLMPAR__CUDA_SHARED_MOST 128 /* ranks: addresses are a kernel's arguments, of which there are 4 KiB */
#define LLMPAR__CUDA_SHARED_GRAIN 256u /* bytes: slices of an all-reduce begin at multiples of it */

/* ---- kernels ---- */

struct llmpar__cuda_ends { const void *in[LLMPAR__CUDA_SHARED_MOST]; void *out[LLMPAR__CUDA_SHARED_MOST]; };

/* out[k][b][i] = tree over j < n of in[j][b][i], i < count, b < blocks, for all k < outs; blocks are in_step and out_step elements apart. wide: all of it is 16-byte aligned. */
template <typename T> __global__ void __launch_bounds__(128) llmpar__cuda_shared_sum_kernel(const llmpar__cuda_ends ends, int32_t n, int32_t outs, int64_t count, int64_t blocks, int64_t in_step, int64_t out_step, int wide)
{
    const int64_t items = 16 / sizeof(T);
    typedef llmpar__cuda_tree_group<T, 16 / sizeof(T)> group;
    typedef llmpar__cuda_tree_group<T, 1> one;
    int64_t first = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, step = (int64_t)gridDim.x * blockDim.x, groups = wide ? count / items : 0;
    for (int64_t b = blockIdx.y; b < blocks; b += gridDim.y) {
        for (int64_t i = first; i < groups; i += step) {
            group sum = llmpar__cuda_tree_at<group>(ends, n, b * in_step / items + i);
            for (int32_t k = 0; k < outs; k++) ((group *)ends.out[k])[b * out_step / items + i] = sum;
        }
        for (int64_t i = groups * items + first; i < count; i += step) {
            one sum = llmpar__cuda_tree_at<one>(ends, n, b * in_step + i);
            for (int32_t k = 0; k < outs; k++) ((one *)ends.out[k])[b * out_step + i] = sum;
        }
    }
}

template <typename T> __global__ void __launch_bounds__(128) llmpar__cuda_shared_max_kernel(const llmpar__cuda_ends ends, int32_t n, int32_t outs, int64_t count, int64_t blocks, int64_t in_step, int64_t out_step)
{
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t b = blockIdx.y; b < blocks; b += gridDim.y)
        for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
            T most = ((const T *)ends.in[0])[b * in_step + i];
            for (int32_t j = 1; j < n; j++) most = llmpar__cuda_larger(most, ((const T *)ends.in[j])[b * in_step + i]);
            for (int32_t k = 0; k < outs; k++) ((T *)ends.out[k])[b * out_step + i] = most;
        }
}

/* out[j][b][i] = in[j][b][i], j < n. */
template <typename T> __global__ void __launch_bounds__(128) llmpar__cuda_shared_copy_kernel(const llmpar__cuda_ends ends, int32_t n, int64_t count, int64_t blocks, int64_t in_step, int64_t out_step)
{
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t at = blockIdx.y; at < n * blocks; at += gridDim.y) {
        int64_t j = at % n, b = at / n;
        const T *in = (const T *)ends.in[j] + b * in_step;
        T *out = (T *)ends.out[j] + b * out_step;
        for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) out[i] = in[i];
    }
}

/* ---- state ---- */

/* What a rank shows to the others. The events stay; the rest is of one call, written before its first meeting and read between the two. */
struct llmpar__cuda_shared_place {
    cudaEvent_t ready, done;
    llmpar_call what;
    uint64_t fingerprint;
    const void *send;
    void *recv;
};

/* The half that the ranks share; with the last of them it goes. Its heap is its own, since a rank's belongs to the rank's thread. */
struct llmpar__cuda_shared_group {
    llmpar_heap heap;
    pthread_mutex_t lock;      /* while a rank issues */
    int32_t ranks, references; /* under the lock */
    int32_t closed;            /* under the lock: a rank has gone away; nobody issues any more */
    llmpar__cuda_shared_place *place; /* [ranks] */
    cudaEvent_t *taken;        /* [ranks receiver][ranks sender]: behind the copy of a message; made by the receiver with the first */
};

struct llmpar__cuda_shared {
    llmpar_comm comm;          /* first: the table itself */
    llmpar_heap *heap;         /* the rank's */
    llmpar_comm *inner;        /* the same ranks on host memory; owned */
    llmpar__cuda_shared_group *group;
    int32_t world_rank;
    int32_t broken;            /* this rank's calls touch the group no more */
    char axis[24];
};

/* A message and the answer to it. */
struct llmpar__cuda_shared_message { llmpar_call what; uint64_t fingerprint; const void *send; cudaEvent_t event; };

static llmpar__cuda_shared *llmpar__cuda_shared_of(llmpar_comm *comm) { return (llmpar__cuda_shared *)comm->state; }

static void llmpar__cuda_shared_release(llmpar__cuda_shared_group *group)
{
    pthread_mutex_lock(&group->lock);
    int32_t left = --group->references;
    pthread_mutex_unlock(&group->lock);
    if (left) return;
    for (int32_t i = 0; i < group->ranks; i++) {
        if (group->place[i].ready) cudaEventDestroy(group->place[i].ready);
        if (group->place[i].done) cudaEventDestroy(group->place[i].done);
    }
    for (int32_t i = 0; i < group->ranks * group->ranks; i++)
        if (group->taken[i]) cudaEventDestroy(group->taken[i]);
    pthread_mutex_destroy(&group->lock);
    llmpar_heap heap = group->heap;
    llmpar_heap_free(&heap, group->place);
    llmpar_heap_free(&heap, group->taken);
    llmpar_heap_free(&heap, group);
}

/* For `ranks` ranks, each with a reference; NULL: out of memory. */
static llmpar__cuda_shared_group *llmpar__cuda_shared_group_create(int32_t ranks)
{
    llmpar_heap heap;
    llmpar_heap_init(&heap, NULL);
    llmpar__cuda_shared_group *group = (llmpar__cuda_shared_group *)llmpar_heap_zalloc(&heap, 1, sizeof *group);
    llmpar__cuda_shared_place *place = (llmpar__cuda_shared_place *)llmpar_heap_zalloc(&heap, (size_t)ranks, sizeof *place);
    cudaEvent_t *taken = (cudaEvent_t *)llmpar_heap_zalloc(&heap, (size_t)ranks * (size_t)ranks, sizeof *taken);
    if (!group || !place || !taken || pthread_mutex_init(&group->lock, NULL)) {
        llmpar_heap_free(&heap, group);
        llmpar_heap_free(&heap, place);
        llmpar_heap_free(&heap, taken);
        return NULL;
    }
    group->heap = heap;
    group->ranks = group->references = ranks;
    group->place = place;
    group->taken = taken;
    return group;
}

/* ---- meeting and failing ---- */

/* The inner communicator's slots are called without its wrappers: the record has the calls of this one. What it says of a wait has this call's number and tag. */
static llmpar_status llmpar__cuda_shared_meet(llmpar__cuda_shared *shared, const char *tag)
{
    llmpar_comm *inner = shared->inner;
    if (inner->ranks == 1) return LLMPAR_OK;
    const llmpar_call *before = inner->call;
    inner->call = shared->comm.call;
    llmpar_status status = inner->barrier(inner, NULL, tag);
    inner->call = before;
    return status;
}

/* From here on nobody issues on this communicator; waits for what was. */
static void llmpar__cuda_shared_close(llmpar__cuda_shared *shared)
{
    llmpar__cuda_shared_group *group = shared->group;
    shared->broken = 1;
    pthread_mutex_lock(&group->lock);
    group->closed = 1;
    pthread_mutex_unlock(&group->lock);
    for (int32_t i = 0; i < group->ranks; i++) /* a rank that is only now filling its place has issued nothing; an event was made before all met */
        if (group->place[i].done) cudaEventSynchronize(group->place[i].done);
    for (int32_t i = 0; i < group->ranks * group->ranks; i++)
        if (group->taken[i]) cudaEventSynchronize(group->taken[i]);
}

/* This rank's own failure, whose text is in the rank's error, becomes the job's. */
static llmpar_status llmpar__cuda_shared_fail(llmpar__cuda_shared *shared, llmpar_status status)
{
    llmpar_error error;
    if (shared->comm.error && shared->comm.error->status) error = *shared->comm.error;
    else {
        llmpar_error_clear(&error);
        llmpar_error_set(&error, status, "a collective on %s failed", shared->axis);
    }
    if (error.rank < 0) error.rank = shared->world_rank;
    llmpar__cuda_shared_close(shared);
    shared->inner->abort(shared->inner, &error);
    return status;
}

static llmpar_status llmpar__cuda_shared_mismatch(llmpar__cuda_shared *shared, const llmpar_call *a, const llmpar_call *b)
{
    char text[700];
    int swapped = a->rank > b->rank;
    llmpar_call_mismatch(swapped ? b : a, swapped ? a : b, text, sizeof text);
    return llmpar__cuda_shared_fail(shared, llmpar_error_set(shared->comm.error, LLMPAR_ERR_MISMATCH, "%s", text));
}

/* A call on a communicator that is broken, or closed by a peer: the inner one knows why. */
static llmpar_status llmpar__cuda_shared_refuse(llmpar__cuda_shared *shared, const char *tag)
{
    llmpar_status status = llmpar__cuda_shared_meet(shared, tag);
    return status ? status : llmpar_error_set(shared->comm.error, LLMPAR_ERR_PEER, "\"%s\" on %s: another rank has failed in a collective on it", tag, shared->axis);
}

static void llmpar__cuda_shared_describe(llmpar__cuda_shared *shared, llmpar_call_op op, const llmpar_collective *call, llmpar_call *out)
{
    llmpar_call_describe(&shared->comm, op, call, out);
    if (out->rank < 0) out->rank = shared->world_rank;
}

/* ---- work ---- */

/* Copies of ends.in[j] to ends.out[j], j < n: blocks of `bytes`, in_step and out_step bytes apart. */
static void llmpar__cuda_shared_copy(llmpar_device *device, llmpar_stream *stream, const llmpar__cuda_ends &ends, int32_t n, int64_t bytes, int64_t blocks, int64_t in_step, int64_t out_step)
{
    uintptr_t all = (uintptr_t)bytes | (blocks > 1 ? (uintptr_t)in_step | (uintptr_t)out_step : 0);
    if (!n || !bytes) return;
    for (int32_t j = 0; j < n; j++) all |= (uintptr_t)ends.in[j] | (uintptr_t)ends.out[j];
    int64_t size = !(all & 15) ? 16 : !(all & 3) ? 4 : 1, count = bytes / size;
    dim3 grid(llmpar__cuda_blocks(llmpar__cuda_of(device), count, 128, 8), (unsigned)(n * blocks < 65535 ? n * blocks : 65535)), threads(128);
    if (size == 16) llmpar__cuda_launch(device, stream, llmpar__cuda_shared_copy_kernel<llmpar__cuda_16>, grid, threads, 0, ends, n, count, blocks, in_step / size, out_step / size);
    else if (size == 4) llmpar__cuda_launch(device, stream, llmpar__cuda_shared_copy_kernel<uint32_t>, grid, threads, 0, ends, n, count, blocks, in_step / size, out_step / size);
    else llmpar__cuda_launch(device, stream, llmpar__cuda_shared_copy_kernel<uint8_t>, grid, threads, 0, ends, n, count, blocks, in_step, out_step);
}

/* Steps in elements. */
static void llmpar__cuda_shared_reduce(llmpar_device *device, llmpar_stream *stream, const llmpar__cuda_ends &ends, int32_t n, int32_t outs, const llmpar_call *what, int64_t count, int64_t blocks, int64_t in_step, int64_t out_step)
{
    int64_t item = (int64_t)llmpar_dtype_size((llmpar_dtype)what->dtype);
    uintptr_t all = blocks > 1 ? (uintptr_t)(in_step * item) | (uintptr_t)(out_step * item) : 0;
    if (!count) return;
    for (int32_t j = 0; j < n; j++) all |= (uintptr_t)ends.in[j];
    for (int32_t k = 0; k < outs; k++) all |= (uintptr_t)ends.out[k];
    int wide = !(all & 15);
    dim3 grid(llmpar__cuda_blocks(llmpar__cuda_of(device), wide ? (count * item + 15) / 16 : count, 128, 8), (unsigned)(blocks < 65535 ? blocks : 65535)), threads(128);
    if (what->reduce == LLMPAR_MAX) {
        if (what->dtype == LLMPAR_F32) llmpar__cuda_launch(device, stream, llmpar__cuda_shared_max_kernel<float>, grid, threads, 0, ends, n, outs, count, blocks, in_step, out_step);
        else if (what->dtype == LLMPAR_F64) llmpar__cuda_launch(device, stream, llmpar__cuda_shared_max_kernel<double>, grid, threads, 0, ends, n, outs, count, blocks, in_step, out_step);
        else llmpar__cuda_launch(device, stream, llmpar__cuda_shared_max_kernel<int64_t>, grid, threads, 0, ends, n, outs, count, blocks, in_step, out_step);
    } else if (what->dtype == LLMPAR_F32) llmpar__cuda_launch(device, stream, llmpar__cuda_shared_sum_kernel<float>, grid, threads, 0, ends, n, outs, count, blocks, in_step, out_step, wide);
    else if (what->dtype == LLMPAR_F64) llmpar__cuda_launch(device, stream, llmpar__cuda_shared_sum_kernel<double>, grid, threads, 0, ends, n, outs, count, blocks, in_step, out_step, wide);
    else llmpar__cuda_launch(device, stream, llmpar__cuda_shared_sum_kernel<uint64_t>, grid, threads, 0, ends, n, outs, count, blocks, in_step, out_step, wide);
}

/* This rank's kernel. part: bytes of one rank's part of one block. */
static void llmpar__cuda_shared_work(llmpar__cuda_shared *shared, llmpar_stream *stream, const llmpar__cuda_shared_place *place)
{
    llmpar_device *device = shared->comm.device;
    int32_t n = shared->comm.ranks, r = shared->comm.rank, ends_used = 0;
    const llmpar__cuda_shared_place *mine = &place[r];
    const llmpar_call *what = &mine->what;
    int64_t count = (int64_t)what->count, blocks = (int64_t)what->blocks, item = (int64_t)llmpar_dtype_size((llmpar_dtype)what->dtype), part = count * item;
    llmpar__cuda_ends ends;
    if (!part || !blocks) return;
    memset(&ends, 0, sizeof ends);
    switch (what->op) {
    case LLMPAR_CALL_ALL_GATHER:
    case LLMPAR_CALL_ALL_TO_ALL: {
        int turned = what->op == LLMPAR_CALL_ALL_TO_ALL;
        for (int32_t k = 0; k < n; k++) {
            int32_t i = (r + k) % n;
            ends.in[ends_used] = (const char *)place[i].send + (turned ? r * part : 0);
            ends.out[ends_used] = (char *)mine->recv + i * part;
            if (ends.in[ends_used] != ends.out[ends_used]) ends_used++; /* in place: my part is there */
        }
        llmpar__cuda_shared_copy(device, stream, ends, ends_used, part, blocks, turned ? n * part : part, n * part);
        return;
    }
    case LLMPAR_CALL_BROADCAST:
        ends.in[0] = place[what->root].send;
        ends.out[0] = mine->recv;
        if (mine->recv && mine->recv != place[what->root].send) llmpar__cuda_shared_copy(device, stream, ends, 1, part * blocks, 1, 0, 0);
        return;
    case LLMPAR_CALL_REDUCE_SCATTER:
        for (int32_t i = 0; i < n; i++) ends.in[i] = (const char *)place[i].send + r * part;
        ends.out[0] = mine->recv;
        llmpar__cuda_shared_reduce(device, stream, ends, n, 1, what, count, blocks, n * count, count);
        return;
    case LLMPAR_CALL_ALL_REDUCE: {
        int64_t total = count * blocks, grain = LLMPAR__CUDA_SHARED_GRAIN / item, grains = (total + grain - 1) / grain, begin = llmpar__cuda_piece_begin(r, grains, n) * grain, end = llmpar__cuda_piece_begin(r + 1, grains, n) * grain;
        if (end > total) end = total;
        for (int32_t i = 0; i < n; i++) {
            ends.in[i] = (const char *)place[i].send + begin * item;
            ends.out[i] = (char *)place[(r + i) % n].recv + begin * item;
        }
        if (begin < end) llmpar__cuda_shared_reduce(device, stream, ends, n, n, what, end - begin, 1, 0, 0);
        return;
    }
    default: return; /* a barrier: the events alone */
    }
}

/* ---- collectives ---- */

static llmpar_status llmpar__cuda_shared_wait(llmpar__cuda_shared *shared, cudaStream_t stream, const char *name, int done)
{
    llmpar__cuda_shared_group *group = shared->group;
    llmpar_status status = LLMPAR_OK;
    for (int32_t k = 1; k < group->ranks && !status; k++) {
        const llmpar__cuda_shared_place *peer = &group->place[(shared->comm.rank + k) % group->ranks];
        status = llmpar__cuda_check(shared->comm.device, cudaStreamWaitEvent(stream, done ? peer->done : peer->ready, 0), name);
    }
    return status;
}

static llmpar_status llmpar__cuda_shared_run(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call, int32_t operation)
{
    llmpar__cuda_shared *shared = llmpar__cuda_shared_of(comm);
    llmpar__cuda_shared_group *group = shared->group;
    llmpar__cuda_shared_place *mine = &group->place[comm->rank];
    llmpar_call_op op = (llmpar_call_op)operation;
    const char *name = llmpar_call_op_name(op);
    if (shared->broken) return llmpar__cuda_shared_refuse(shared, call->tag);
    llmpar_status status = llmpar__cuda_begin(comm->device, stream);
    cudaStream_t handle = llmpar__cuda_stream_of(comm->device, stream)->handle;
    if (!status) status = llmpar__cuda_check(comm->device, cudaEventRecord(mine->ready, handle), name);
    if (status) return llmpar__cuda_shared_fail(shared, status);
    llmpar__cuda_shared_describe(shared, op, call, &mine->what);
    mine->fingerprint = comm->unchecked ? 0 : llmpar_call_fingerprint(&mine->what);
    mine->send = call->send;
    mine->recv = call->recv;
    status = llmpar__cuda_shared_meet(shared, call->tag);
    if (status) { /* nobody has passed */
        shared->broken = 1;
        return status;
    }
    for (int32_t i = 1; i < comm->ranks; i++)
        if (group->place[i].fingerprint != group->place[0].fingerprint) return llmpar__cuda_shared_mismatch(shared, &group->place[0].what, &group->place[i].what);

    pthread_mutex_lock(&group->lock);
    int closed = group->closed;
    if (!closed) {
        status = llmpar__cuda_shared_wait(shared, handle, name, 0);
        if (!status) llmpar__cuda_shared_work(shared, stream, group->place);
        if (!status) status = llmpar__cuda_check(comm->device, cudaGetLastError(), name);
        llmpar_status recorded = llmpar__cuda_check(comm->device, cudaEventRecord(mine->done, handle), name);
        if (!status) status = recorded;
    }
    pthread_mutex_unlock(&group->lock);
    if (status) return llmpar__cuda_shared_fail(shared, status);
    if (!closed) status = llmpar__cuda_shared_meet(shared, call->tag);
    if (closed || status) { /* some have issued */
        llmpar__cuda_shared_close(shared);
        return status ? status : llmpar__cuda_shared_refuse(shared, call->tag);
    }
    status = llmpar__cuda_shared_wait(shared, handle, name, 1);
    if (!status) status = llmpar__cuda_end(comm->device, stream, name);
    return status ? llmpar__cuda_shared_fail(shared, status) : LLMPAR_OK;
}

/* ---- messages ---- */

/* A message or an answer to (out) or from (in) the peer, through the inner communicator. */
static llmpar_status llmpar__cuda_shared_pass(llmpar__cuda_shared *shared, int32_t peer, const char *tag, const llmpar__cuda_shared_message *out, llmpar__cuda_shared_message *in)
{
    llmpar_comm *inner = shared->inner;
    const llmpar_call *before = inner->call;
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.send = out;
    call.recv = in;
    call.count = sizeof *out;
    call.blocks = 1;
    call.dtype = LLMPAR_U8;
    call.peer = peer;
    call.tag = tag;
    inner->call = shared->comm.call;
    llmpar_status status = out ? inner->send(inner, NULL, &call) : inner->recv(inner, NULL, &call);
    inner->call = before;
    return status;
}

static llmpar_status llmpar__cuda_shared_point(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call, llmpar_call_op op)
{
    llmpar__cuda_shared *shared = llmpar__cuda_shared_of(comm);
    llmpar__cuda_shared_group *group = shared->group;
    llmpar__cuda_shared_place *mine = &group->place[comm->rank];
    llmpar__cuda_shared_message out, in;
    const char *name = llmpar_call_op_name(op);
    int sends = op == LLMPAR_CALL_SEND;
    if (shared->broken) return llmpar__cuda_shared_refuse(shared, call->tag);
    memset(&in, 0, sizeof in);
    memset(&out, 0, sizeof out);
    llmpar_status status = llmpar__cuda_begin(comm->device, stream);
    cudaStream_t handle = llmpar__cuda_stream_of(comm->device, stream)->handle;
    if (!status && sends) status = llmpar__cuda_check(comm->device, cudaEventRecord(mine->ready, handle), name);
    if (status) return llmpar__cuda_shared_fail(shared, status);
    llmpar__cuda_shared_describe(shared, op, call, &out.what);
    out.fingerprint = comm->unchecked ? 0 : llmpar_call_fingerprint(&out.what);
    out.send = call->send;
    out.event = mine->ready;

    if (sends) {
        status = llmpar__cuda_shared_pass(shared, call->peer, call->tag, &out, NULL);
        if (!status) status = llmpar__cuda_shared_pass(shared, call->peer, call->tag, NULL, &in);
    } else status = llmpar__cuda_shared_pass(shared, call->peer, call->tag, NULL, &in);
    if (status) {
        llmpar__cuda_shared_close(shared);
        return status;
    }
    int same = in.fingerprint == out.fingerprint;
    if (!sends) {
        cudaEvent_t *taken = &group->taken[comm->rank * comm->ranks + call->peer];
        llmpar__cuda_ends ends;
        int closed = 0;
        memset(&ends, 0, sizeof ends);
        ends.in[0] = in.send;
        ends.out[0] = call->recv;
        pthread_mutex_lock(&group->lock);
        closed = group->closed;
        if (same && !closed) {
            if (!*taken) status = llmpar__cuda_check(comm->device, cudaEventCreateWithFlags(taken, cudaEventDisableTiming), name);
            if (!status) status = llmpar__cuda_check(comm->device, cudaStreamWaitEvent(handle, in.event, 0), name);
            if (!status) {
                llmpar__cuda_shared_copy(comm->device, stream, ends, 1, (int64_t)(call->count * call->blocks * llmpar_dtype_size(call->dtype)), 1, 0, 0);
                status = llmpar__cuda_check(comm->device, cudaGetLastError(), name);
                llmpar_status recorded = llmpar__cuda_check(comm->device, cudaEventRecord(*taken, handle), name);
                if (!status) status = recorded;
            }
            out.event = *taken;
        }
        pthread_mutex_unlock(&group->lock);
        if (status) return llmpar__cuda_shared_fail(shared, status);
        if (closed) status = llmpar__cuda_shared_refuse(shared, call->tag);
        else status = llmpar__cuda_shared_pass(shared, call->peer, call->tag, &out, NULL); /* who sent sees what differs, too */
        if (status) {
            llmpar__cuda_shared_close(shared);
            return status;
        }
    }
    if (!same) return llmpar__cuda_shared_mismatch(shared, &out.what, &in.what);
    if (sends) status = llmpar__cuda_check(comm->device, cudaStreamWaitEvent(handle, in.event, 0), name);
    if (!status) status = llmpar__cuda_end(comm->device, stream, name);
    return status ? llmpar__cuda_shared_fail(shared, status) : LLMPAR_OK;
}

static llmpar_status llmpar__cuda_shared_send(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return llmpar__cuda_shared_point(comm, stream, call, LLMPAR_CALL_SEND); }
static llmpar_status llmpar__cuda_shared_recv(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { return llmpar__cuda_shared_point(comm, stream, call, LLMPAR_CALL_RECV); }

/* ---- life ---- */

static void llmpar__cuda_shared_abort(llmpar_comm *comm, const llmpar_error *error)
{
    llmpar__cuda_shared *shared = llmpar__cuda_shared_of(comm);
    llmpar_error mine = *error;
    if (mine.rank < 0) mine.rank = shared->world_rank;
    shared->inner->abort(shared->inner, &mine);
}

static void llmpar__cuda_shared_destroy(llmpar_comm *comm)
{
    llmpar__cuda_shared *shared = llmpar__cuda_shared_of(comm);
    llmpar_heap *heap = shared->heap;
    if (shared->group) llmpar__cuda_shared_release(shared->group);
    llmpar_comm_destroy(shared->inner);
    llmpar_heap_free(heap, shared);
}

static llmpar_status llmpar__cuda_shared_split(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out);

/* What the ranks tell each other first. */
struct llmpar__cuda_shared_hello {
    uint64_t process, local;   /* told apart by number and by where its code lies */
    llmpar__cuda_shared_group *group; /* of rank 0 */
    int32_t index, world_rank; /* of the driver; of the job */
};

/* Lets the rank's GPU read and write the memory of the others'. */
static llmpar_status llmpar__cuda_shared_reach(llmpar_device *device, llmpar_error *error, const char *axis, const llmpar__cuda_shared_hello *hello, int32_t ranks, int32_t rank)
{
    int mine = hello[rank].index, can = 0;
    for (int32_t i = 0; i < ranks; i++) {
        if (hello[i].index == mine) continue;
        llmpar_status status = llmpar__cuda_check(device, cudaDeviceCanAccessPeer(&can, mine, hello[i].index), "cudaDeviceCanAccessPeer");
        if (status) return status;
        if (!can)
            return llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "communicator %s: GPU %d of rank %d cannot reach the memory of GPU %d of rank %d: rank threads need one GPU or such that reach each other; processes use NCCL", axis, mine,
                                    (int)hello[rank].world_rank, (int)hello[i].index, (int)hello[i].world_rank);
        cudaError_t code = cudaDeviceEnablePeerAccess(hello[i].index, 0);
        if (code == cudaErrorPeerAccessAlreadyEnabled) cudaGetLastError();
        else if ((status = llmpar__cuda_check(device, code, "cudaDeviceEnablePeerAccess")) != LLMPAR_OK) return status;
    }
    return LLMPAR_OK;
}

/* This rank's half over the ranks of `inner`, which it owns from here on, also when it fails. */
static llmpar_status llmpar__cuda_shared_half(llmpar_comm *inner, llmpar_device *device, llmpar_heap *heap, llmpar_error *error, int32_t world_rank, llmpar_record *record, const char *axis, llmpar_comm **out)
{
    int32_t n = inner->ranks, r = inner->rank, *world_ranks = (int32_t *)llmpar_heap_alloc(heap, (size_t)n, sizeof *world_ranks);
    llmpar__cuda_shared *shared = (llmpar__cuda_shared *)llmpar_heap_zalloc(heap, 1, sizeof *shared);
    llmpar__cuda_shared_hello mine, *hello = (llmpar__cuda_shared_hello *)llmpar_heap_zalloc(heap, (size_t)n, sizeof *hello);
    llmpar__cuda_shared_group *group = r ? NULL : llmpar__cuda_shared_group_create(n);
    llmpar__cuda_shared_place place;
    llmpar_status status = LLMPAR_OK;
    memset(&mine, 0, sizeof mine);
    memset(&place, 0, sizeof place);
    if (!shared || !hello || !world_ranks || (!r && !group)) status = llmpar_error_set(error, LLMPAR_ERR_MEMORY, "communicator %s: out of memory", axis);
    else if (n > LLMPAR__CUDA_SHARED_MOST) status = llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "communicator %s: %d ranks share GPUs, expected at most %d", axis, (int)n, LLMPAR__CUDA_SHARED_MOST);
    if (!status) status = llmpar__cuda_begin(device, NULL);
    if (!status) status = llmpar__cuda_check(device, cudaEventCreateWithFlags(&place.ready, cudaEventDisableTiming), "cudaEventCreate");
    if (!status) status = llmpar__cuda_check(device, cudaEventCreateWithFlags(&place.done, cudaEventDisableTiming), "cudaEventCreate");
    int met = 0;
    if (!status && n > 1) {
        llmpar_collective call;
        memset(&call, 0, sizeof call);
        mine.process = (uint64_t)getpid();
        mine.local = (uint64_t)(uintptr_t)&llmpar__cuda_shared_half;
        mine.group = group;
        mine.index = llmpar__cuda_of(device)->index;
        mine.world_rank = world_rank;
        call.send = &mine;
        call.recv = hello;
        call.count = sizeof mine;
        call.blocks = 1;
        call.dtype = LLMPAR_U8;
        call.tag = "shared memory of GPUs";
        status = inner->all_gather(inner, NULL, &call);
        met = !status;
        for (int32_t i = 0; i < n && !status; i++)
            if (hello[i].process != hello[0].process || hello[i].local != hello[0].local)
                status = llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "communicator %s: ranks %d and %d are different processes: memory of a GPU is shared between rank threads; processes use NCCL", axis, (int)hello[0].world_rank, (int)hello[i].world_rank);
        if (met && status) met = 0; /* whose group it is gives it back */
        if (!status) {
            group = hello[0].group;
            status = llmpar__cuda_shared_reach(device, error, axis, hello, n, r);
        }
    }
    if (shared) { /* as far as destroy needs it */
        shared->heap = heap;
        shared->inner = inner;
        shared->world_rank = world_rank;
        size_t length = strlen(axis);
        memcpy(shared->axis, axis, length < sizeof shared->axis ? length : sizeof shared->axis - 1);
    }
    if (!status) {
        llmpar_comm *comm = &shared->comm;
        shared->group = group;
        group->place[r].ready = place.ready;
        group->place[r].done = place.done;
        comm->abi = LLMPAR_COMM_ABI;
        comm->size = (uint32_t)sizeof *comm;
        comm->rank = r;
        comm->ranks = n;
        comm->axis = shared->axis;
        comm->device = device;
        comm->error = error;
        comm->state = shared;
        comm->unchecked = inner->unchecked;
        comm->split = llmpar__cuda_shared_split;
        comm->destroy = llmpar__cuda_shared_destroy;
        llmpar_comm_fill(comm, llmpar__cuda_shared_run);
        comm->send = llmpar__cuda_shared_send;
        comm->recv = llmpar__cuda_shared_recv;
        comm->abort = llmpar__cuda_shared_abort;
        inner->unchecked = 1; /* calls are compared here */
        for (int32_t i = 0; i < n; i++) world_ranks[i] = n > 1 ? hello[i].world_rank : world_rank;
        if (record && n > 1 && llmpar_record_attach(record, comm, world_ranks)) status = llmpar_error_set(error, LLMPAR_ERR_MEMORY, "communicator %s: out of memory", axis);
        if (!status) *out = comm;
    }
    if (status) {
        llmpar_error failure;
        if (error->status) failure = *error;
        else {
            llmpar_error_clear(&failure);
            llmpar_error_set(&failure, status, "communicator %s could not be made", axis);
        }
        if (failure.rank < 0) failure.rank = world_rank;
        if (status != LLMPAR_ERR_PEER) inner->abort(inner, &failure);
        if (shared && shared->group) llmpar__cuda_shared_release(group); /* with the events */
        else {
            if (place.ready) cudaEventDestroy(place.ready);
            if (place.done) cudaEventDestroy(place.done);
            if (met) llmpar__cuda_shared_release(group);
            else if (group) {
                group->references = 1;
                llmpar__cuda_shared_release(group);
            }
        }
        llmpar_comm_destroy(inner);
        llmpar_heap_free(heap, shared);
    }
    llmpar_heap_free(heap, hello);
    llmpar_heap_free(heap, world_ranks);
    return status;
}

static llmpar_status llmpar__cuda_shared_split(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out)
{
    llmpar__cuda_shared *shared = llmpar__cuda_shared_of(comm);
    llmpar_comm *inner = NULL;
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.tag = name;
    *out = NULL;
    /* Compared as a call of its own kind, so that the inner split finds all ranks in it. */
    llmpar_status status = llmpar__cuda_shared_run(comm, NULL, &call, (int32_t)LLMPAR_CALL_SPLIT);
    if (status) return status;
    status = shared->inner->split(shared->inner, color, key, name, &inner);
    if (status || !inner) return status;
    inner->unchecked = comm->unchecked;
    return llmpar__cuda_shared_half(inner, comm->device, shared->heap, comm->error, shared->world_rank, comm->record, name, out);
}

LLMPAR_DEF llmpar_status llmpar_cuda_shared_comm_create(llmpar_ctx *ctx, llmpar_device *device, llmpar_comm *host, llmpar_comm **out)
{
    llmpar_comm *inner = NULL;
    *out = NULL;
    if (!host) return llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "cuda: ranks that share a GPU need the communicator of rank threads (ctx->host_comm), which this launch has not; processes use NCCL");
    llmpar_status status = llmpar_comm_split(host, 0, host->rank, host->axis, &inner);
    if (status) return status;
    return llmpar__cuda_shared_half(inner, device, &ctx->heap, &ctx->error, ctx->rank, host->record, host->axis, out);
}

#undef LLMPAR__CUDA_SHARED_MOST
#undef LLMPAR__CUDA_SHARED_GRAIN
