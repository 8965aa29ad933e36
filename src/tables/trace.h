/* trace: what ran when, on which stream of which rank, and how many bytes the arena held, as a Chrome trace: chrome://tracing and ui.perfetto.dev load it.

   Each rank keeps its spans in memory; a span begins and ends where its stream comes to its marks, which are host calls, so on a device that works late it shows when the work was done and not when it was
   enqueued. llmpar_trace_write collects the ranks' events into one text: process = rank, thread = stream, times in microseconds since the first rank began its trace, on one clock. */
#ifndef LLMPAR_TRACE_H
#define LLMPAR_TRACE_H

#include "tables/arena.h"
#include "tables/comm.h"

#define LLMPAR_TRACE_LANES 16

typedef struct llmpar_trace llmpar_trace; /* one rank's */

/* One stretch of a stream. Texts are copied, and cut where they are long. */
typedef struct llmpar_trace_span {
    int32_t lane;          /* of the stream: 0 .. LLMPAR_TRACE_LANES - 1 */
    int32_t micro_batch;   /* -1: none */
    uint64_t bytes;        /* moved or taken; 0: not said */
    const char *name;      /* "GATHER" */
    const char *unit;      /* "layers.3"; NULL: none */
    const char *category;  /* "compute", "communication", .. : borrowed until the trace is destroyed */
} llmpar_trace_span;

/* Receives the text piece by piece, on rank 0. Leaves a text of its own where it fails. */
typedef llmpar_status (*llmpar_trace_sink)(void *user, const char *text, size_t bytes);

/* limit: spans and memory counts that are kept; default 0 = 262144, about 130 bytes each. Further ones are not recorded, and the trace says how many. Uses the heap of ctx, whose rank it is. Local. */
LLMPAR_API llmpar_status llmpar_trace_create(llmpar_ctx *ctx, uint64_t limit, llmpar_trace **out);
LLMPAR_API void llmpar_trace_destroy(llmpar_trace *trace); /* when all streams are done */
/* Names a lane. Local, as the next ones; all of them do nothing where trace is NULL. */
LLMPAR_API void llmpar_trace_lane(llmpar_trace *trace, int32_t lane, const char *name);
/* Enqueues the span's begin on stream; *id is for its end. Spans of one lane follow each other or lie inside each other. */
LLMPAR_API llmpar_status llmpar_trace_begin(llmpar_trace *trace, llmpar_stream *stream, const llmpar_trace_span *span, uint64_t *id);
LLMPAR_API llmpar_status llmpar_trace_end(llmpar_trace *trace, llmpar_stream *stream, uint64_t id);
/* Live bytes per tag from now on. Now is when the host takes and releases memory, which it does ahead of the streams. */
LLMPAR_API void llmpar_trace_memory(llmpar_trace *trace, const llmpar_arena_usage *usage);
/* Hands the whole trace to sink on rank 0 of world, which is a communicator of all ranks that trace. Every rank's streams must be done. sink is not looked at elsewhere. Collective. */
LLMPAR_API llmpar_status llmpar_trace_write(llmpar_trace *trace, llmpar_comm *world, llmpar_trace_sink sink, void *user);

#endif
