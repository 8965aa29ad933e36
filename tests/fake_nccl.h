/* fake_nccl: what a test asks of the stand-in for NCCL (fake_nccl.c). */
#ifndef FAKE_NCCL_H
#define FAKE_NCCL_H

#include <stddef.h>

/* What a stream handle points at. `enqueue` NULL: the operations happen now (the device completes inside its calls); else it puts fn(arg) into the stream, where it may wait for the peers' streams. */
typedef struct fake_nccl_stream {
    int (*enqueue)(void *device, void *stream, void (*fn)(void *arg), void *arg); /* 0: done */
    void *device, *stream;
} fake_nccl_stream;

/* Or, not NULL, handles are streams of the emulated CUDA runtime, and these its emulated_cuda_await and emulated_cuda_moved. */
extern int (*fake_nccl_await)(void *stream, int (*ready)(void *arg), void (*done)(void *arg), void *arg);
extern void (*fake_nccl_moved)(void);

typedef enum fake_nccl_kind {
    FAKE_NCCL_NOTHING = 0,
    FAKE_NCCL_HANGS,        /* the group never ends */
    FAKE_NCCL_REFUSES,      /* ncclGroupEnd returns an error */
    FAKE_NCCL_BREAKS,       /* the group fails later, by the asynchronous error */
    FAKE_NCCL_INIT_REFUSES, /* the init does */
    FAKE_NCCL_INIT_HANGS,
    FAKE_NCCL_NO_MEMORY     /* ncclMemAlloc */
} fake_nccl_kind;

/* Everything since the last reset. Set before ranks run. */
typedef struct fake_nccl_state {
    fake_nccl_kind kind;    /* what goes wrong .. */
    int rank, at;           /* .. on this rank of the world, in its at-th group (1, 2, ..) */
    int version;            /* 0: 22800 */
    int quiet;              /* 1: a mismatch is counted, not printed */
    int mismatches;         /* calls that did not fit together */
    int overlaps;           /* a rank had groups of two communicators running at once */
    int misuse;             /* calls that NCCL refuses, or may not survive */
    int groups, comms;      /* groups run, communicators alive */
    int blocks;             /* of ncclMemAlloc alive */
    size_t bytes;           /* of messages */
} fake_nccl_state;
extern fake_nccl_state fake_nccl;

/* The stream of this handle is gone: what it had not come to never runs (a failed stream drops it). */
void fake_nccl_drop(const fake_nccl_stream *stream);
/* All to nothing; nothing may be alive. */
void fake_nccl_reset(void);

#endif
