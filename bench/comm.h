/* What bench_comm.c (rank threads) and peers/open_mpi.c (processes) measure, and how they talk. */
#ifndef BENCH_COMM_H
#define BENCH_COMM_H

#include "bench.h"

#include <stdint.h>
#include <string.h>

enum { COMM_ALL_REDUCE, COMM_ALL_GATHER, COMM_REDUCE_SCATTER, COMM_OPS };
enum { COMM_SIZES = 7, COMM_MOST = 67108864 };
static const size_t comm_sizes[COMM_SIZES] = { 4, 1024, 65536, 1048576, 4194304, 16777216, 67108864 };
static const char *const comm_size_names[COMM_SIZES] = { "4 B", "1 KB", "64 KB", "1 MB", "4 MB", "16 MB", "64 MB" };
static const char *const comm_op_names[COMM_OPS] = { "all_reduce", "all_gather", "reduce_scatter" };

/* One reading: `calls` calls of a collective whose larger buffer has `bytes`. Who: the MPI's own function, or llmpar's on the same MPI. */
typedef struct comm_command { int32_t op, who; uint64_t bytes; int32_t calls, stop; } comm_command;

static inline int comm_calls(size_t bytes) { return bytes < 65536 ? 1000 : bytes < 1048576 ? 100 : bytes < 4194304 ? 12 : bytes < 16777216 ? 4 : 1; }
static inline int comm_rounds(size_t bytes) { return bytes < 16777216 ? 15 : 11; }

/* What a rank's work would do before it calls: every byte is new, in this core's cache or on its way out of it. */
static inline void comm_rewrite(float *x, size_t bytes, float value)
{
    for (size_t i = 0; i < bytes / sizeof *x; i++) x[i] = value;
    __asm__ __volatile__("" : : "r"(x) : "memory");
}

/* Bytes a rank sends. */
static inline size_t comm_mine(int op, size_t bytes, int ranks) { return op == COMM_ALL_GATHER ? bytes / (size_t)ranks : bytes; }

#endif
