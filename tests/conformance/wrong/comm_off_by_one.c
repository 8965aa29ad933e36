/* expect: all_gather */
/* expect: all_gather f32, count 7, blocks 1, 2 ranks: rank 0 (tp=0): recv[0] (block 0, part of rank 0, element 0) */
/* expect: that is element 0 of what rank 1 of the communicator sends */
/* A ring that is one step late: every part lands one place too far to the left. */
#include <string.h>

static llmpar_status message(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *like, int32_t peer, const void *send, void *recv)
{
    llmpar_collective m = *like;
    m.send = send;
    m.recv = recv;
    m.blocks = 1;
    m.peer = peer;
    return send ? llmpar_send(comm, stream, &m) : llmpar_recv(comm, stream, &m);
}

static llmpar_status ring(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call)
{
    size_t n = (size_t)comm->ranks, me = (size_t)comm->rank, part = call->count * llmpar_dtype_size(call->dtype);
    int32_t right = (int32_t)((me + 1) % n), left = (int32_t)((me + n - 1) % n);
    char *recv = (char *)call->recv;
    for (size_t b = 0; b < call->blocks && part; b++, recv += n * part) {
        memmove(recv + (me + n - 1) % n * part, (const char *)call->send + b * part, part); /* me, not me - 1 */
        for (size_t s = 0; s + 1 < n; s++) {
            char *out = recv + (me + 2 * n - s - 1) % n * part, *in = recv + (me + 2 * n - s - 2) % n * part;
            llmpar_status st = LLMPAR_OK;
            if (me % 2 == 0) st = message(comm, stream, call, right, out, NULL);
            if (!st) st = message(comm, stream, call, left, NULL, in);
            if (!st && me % 2) st = message(comm, stream, call, right, out, NULL);
            if (st) return st;
        }
    }
    return LLMPAR_OK;
}

void grade_patch(llmpar_comm *table) { table->all_gather = ring; }
