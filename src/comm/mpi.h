/* mpi: the communicator between MPI processes. Its functions exist where LLMPAR_USE_MPI is defined beside LLMPAR_IMPLEMENTATION; these declarations need no mpi.h.

   llmpar_launch does all of this by itself under mpirun. By hand, one world a process:
     llmpar_mpi_world_create -> llmpar_mpi_comm_create -> ... collectives ... -> llmpar_mpi_world_finish -> llmpar_comm_destroy -> llmpar_mpi_world_destroy
   After world_create no MPI call blocks and none is collective: Isend, Irecv and Test alone, so that a rank which fails, ends or dies is found by the others wherever they wait. */
#ifndef LLMPAR_COMM_MPI_H
#define LLMPAR_COMM_MPI_H

#include "base/heap.h"
#include "tables/comm.h"

/* A static function that is left out would be warned of: declared extern, a call of it fails to link. */
#if defined(LLMPAR_STATIC) && !defined(LLMPAR_USE_MPI)
#define LLMPAR__MPI_API extern
#else
#define LLMPAR__MPI_API LLMPAR_API
#endif

typedef struct llmpar_mpi_world llmpar_mpi_world;

/* Alike on all processes. Zero is a default. */
typedef struct llmpar_mpi_desc {
    const void *comm;      /* address of an MPI_Comm (an intracommunicator, duplicated); default: MPI_COMM_WORLD. MPI must be initialised and not finalised */
    size_t comm_slice;     /* bytes that a reduction handles at a time and that a message has at most; default 16 MiB, at most 1 GiB. Scratch: about 1.5 of it a process, at most 2 */
    double deadline;       /* seconds a collective may wait for its peers before it reports LLMPAR_ERR_TIMEOUT with who is where, for which it asks the others, up to a second more; default 0 = none */
    double heartbeat;      /* seconds between two signs of life; default 0.5 */
    double silence;        /* seconds without one after which a rank is given up (killed, stopped, unreachable); default 5 */
    int32_t unchecked;     /* 1: the ranks do not compare their calls */
    int32_t unattended;    /* 1: no helper thread; for programs that call MPI themselves while ranks run, which beside a helper needs MPI_THREAD_MULTIPLE. Silent ranks are then only found by `deadline` */
    int32_t direct;        /* up to this many ranks, a collective begins with a message from each to each, which also carries small data; beyond, with log2 n rounds. Default 16 */
} llmpar_mpi_desc;

/* Collective over desc->comm, and may block. heap: the rank's, borrowed; all memory is taken from it here and in collectives, on the caller's thread. desc may be NULL.
   Where MPI provides MPI_THREAD_SERIALIZED on all ranks a helper thread sends signs of life; else silent ranks are only found by `deadline`. One thread calls MPI at a time.
   Errors: LLMPAR_ERR_CONFIG (MPI not initialised, already finalised, an intercommunicator), LLMPAR_ERR_ARGUMENT, LLMPAR_ERR_MEMORY; the same on every rank. */
LLMPAR__MPI_API llmpar_status llmpar_mpi_world_create(llmpar_heap *heap, const llmpar_mpi_desc *desc, llmpar_mpi_world **out, llmpar_error *error);
LLMPAR__MPI_API int32_t llmpar_mpi_world_rank(const llmpar_mpi_world *world);  /* local */
LLMPAR__MPI_API int32_t llmpar_mpi_world_ranks(const llmpar_mpi_world *world); /* local */
/* Threads for this rank: the cores it is bound to, or else those of the machine / the ranks there; 1 where MPI leaves a process one thread. Local. */
LLMPAR__MPI_API int32_t llmpar_mpi_world_threads(const llmpar_mpi_world *world);
/* 1 where MPI provides MPI_THREAD_SERIALIZED on all ranks. Local. */
LLMPAR__MPI_API int llmpar_mpi_world_serialized(const llmpar_mpi_world *world);
/* The communicator of all ranks; its calls are in the world's record, as those of its splits. error: where its failures leave their text; its `where` (the mesh coordinate) is shown to the other ranks. Local. */
LLMPAR__MPI_API llmpar_status llmpar_mpi_comm_create(llmpar_mpi_world *world, llmpar_device *device, llmpar_error *error, llmpar_comm **out);
/* Makes *error the job's failure, if it is the first, and tells all ranks. Local. */
LLMPAR__MPI_API void llmpar_mpi_world_fail(llmpar_mpi_world *world, const llmpar_error *error);
/* The job's failure as far as this rank knows, status OK if none. Local. */
LLMPAR__MPI_API void llmpar_mpi_world_error(llmpar_mpi_world *world, llmpar_error *out);
/* This rank is done. Waits until all are; after a failure at most `grace` seconds (0: 3). *root (may be NULL): the job's root error, the same on all ranks that end in order, else status OK.
   1: all ranks have come here and MPI may be finalised; 0: some rank is dead or stuck, and only MPI_Abort ends the job. */
LLMPAR__MPI_API int llmpar_mpi_world_finish(llmpar_mpi_world *world, double grace, llmpar_error *root);
LLMPAR__MPI_API void llmpar_mpi_world_destroy(llmpar_mpi_world *world); /* NULL is fine; after finish */

#undef LLMPAR__MPI_API

#endif
