/* tables_internal: what callers of a device and of a communicator would write again and again. Private. */
#ifndef LLMPAR_TABLES_INTERNAL_H
#define LLMPAR_TABLES_INTERNAL_H

#include "tables/comm.h"
#include "tables/record.h"

#include <string.h>

/* A table's slot is there, and not empty: one that lies beyond its size is not there. */
#define LLMPAR__HAS(table, slot) ((table)->size >= (size_t)((const char *)(&(table)->slot + 1) - (const char *)(table)) && (table)->slot)

static inline size_t llmpar__least(size_t a, size_t b) { return a < b ? a : b; }
static inline int llmpar__dtype_floats(llmpar_dtype dtype) { return dtype >= LLMPAR_F32 && dtype <= LLMPAR_F16; }

/* Waits for the stream in any case, which may still use what goes now or what the caller's stack holds. The first failure of the two. */
LLMPAR__PRIVATE llmpar_status llmpar__device_done(llmpar_device *device, llmpar_stream *stream, llmpar_status status);
LLMPAR__PRIVATE llmpar_status llmpar__device_cast(llmpar_device *device, llmpar_stream *stream, const void *in, llmpar_dtype from, void *out, llmpar_dtype to, size_t count);
/* The tree over n inputs of `count` elements: a sum or maximum. Here, for the communicators' optimization level. */
static inline llmpar_status llmpar__device_reduce(llmpar_device *device, llmpar_stream *stream, llmpar_reduce_op op, const void *const *in, int32_t n, size_t count, void *out, llmpar_dtype dtype)
{
    llmpar_tree_sum_args args;
    memset(&args, 0, sizeof args);
    args.in = in;
    args.n = n;
    args.count = count;
    args.out = out;
    args.dtype = dtype;
    return op == LLMPAR_MAX ? device->max(device, stream, &args) : device->tree_sum(device, stream, &args);
}

/* Of one block; a sum, where it reduces. */
LLMPAR__PRIVATE llmpar_collective llmpar__comm_collective(const void *send, void *recv, size_t count, llmpar_dtype dtype, const char *tag);
LLMPAR__PRIVATE int llmpar__comm_overlap(const void *a, size_t a_bytes, const void *b, size_t b_bytes); /* two buffers; an empty one overlaps nothing */
LLMPAR__PRIVATE llmpar_status llmpar__comm_thread_check(const llmpar_comm *comm, const llmpar_call *call); /* refused on the thread of a stream where the ranks have one thread */
/* An all-gather, all-reduce or broadcast of values on the host, through memory of the device and a stream of its own: complete on return. A broadcast's other ranks have a `send` to read too. */
LLMPAR__PRIVATE llmpar_status llmpar__comm_talk(llmpar_comm *comm, llmpar_call_op op, const llmpar_collective *host);
/* values[count] on the host become the largest of all ranks'. Collective. */
LLMPAR__PRIVATE llmpar_status llmpar__comm_largest(llmpar_comm *comm, int64_t *values, size_t count, const char *tag);

#endif
