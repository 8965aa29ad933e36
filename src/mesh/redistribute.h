/* redistribute: a tensor from any placements to any others on the same mesh, planned as a short list of collectives. A plan is plain data, which every rank makes for itself from the same request. Where a collective
   of the table does a step exactly, it is taken; everything else is an exchange: pairs of send and recv with just the elements that are needed. Sums are trees over the coordinate of each axis, the last listed axis first.
   A target may be Partial. On an axis where `from` is Partial of the same kind contributions stay where they are (if sums and maxima are mixed: as long as their order of undoing stays); else Partial(sum) is the
   tensor at coordinate 0 and zeros (-0 of f32, f64, which changes no sum) elsewhere, and Partial(max) is the tensor at every coordinate. */
#ifndef LLMPAR_REDISTRIBUTE_H
#define LLMPAR_REDISTRIBUTE_H

#include "mesh/dtensor.h"

/* LOCAL: every rank has what it needs. ALL_GATHER undoes the last cut, BROADCAST too where parts are uneven (one from each owner). REDUCE_SCATTER reduces and cuts evenly. ALL_TO_ALL: all pairs of ranks of an axis move
   the same number of elements. EXCHANGE: send and recv between pairs of the world; contributions go to one rank for each element, which combines them, and from there to the others. */
typedef enum llmpar_redistribute_op {
    LLMPAR_REDISTRIBUTE_LOCAL = 0, LLMPAR_REDISTRIBUTE_ALL_GATHER = 1, LLMPAR_REDISTRIBUTE_BROADCAST = 2, LLMPAR_REDISTRIBUTE_REDUCE_SCATTER = 3, LLMPAR_REDISTRIBUTE_ALL_REDUCE = 4,
    LLMPAR_REDISTRIBUTE_ALL_TO_ALL = 5, LLMPAR_REDISTRIBUTE_EXCHANGE = 6
} llmpar_redistribute_op;
typedef struct llmpar_redistribute_step {
    llmpar_redistribute_op op;
    llmpar_axis axis;       /* of the collective; not for LOCAL, EXCHANGE */
    int64_t bytes;          /* sent by all ranks together, as their communicators count */
    llmpar_dtensor result;  /* what ranks hold after the step */
} llmpar_redistribute_step;
typedef struct llmpar_redistribute_plan {
    llmpar_dtensor from, to; /* names borrowed */
    int32_t degree[LLMPAR_MESH_AXES], steps; /* steps: 1 or more */
    llmpar_redistribute_step step[2 * LLMPAR_MESH_AXES];
    int64_t bytes, bound;    /* sent by all ranks together; no plan can send less than `bound`. bytes <= 2 * bound, and bytes == bound with nothing to reduce */
    uint64_t fingerprint;    /* of the request: ranks compare it before anything moves */
} llmpar_redistribute_plan;

/* The least bytes that all ranks together send. Nothing to reduce: what each rank needs in `to` and does not hold in `from`. n contributions to reduce: for each element n-1 to bring them together and one more for each
   further rank that needs it, which is the (n-1) of a reduce-scatter and the 2(n-1) of an all-reduce. Of tensors that plan_make accepts. Local. */
LLMPAR_API int64_t llmpar_redistribute_bound(const llmpar_dtensor *from, const llmpar_dtensor *to, const int32_t degree[LLMPAR_MESH_AXES]);
/* One dtype and shape in both; Flat is the same on all ranks and has to fit on each: LLMPAR_ERR_SHAPE. LLMPAR_ERR_UNSUPPORTED: a dtype that the communicators cannot reduce. LLMPAR_ERR_OVERFLOW, LLMPAR_ERR_MESH (degrees).
   Local: no communication, no allocation; so also for meshes larger than the world. */
LLMPAR_API llmpar_status llmpar_redistribute_plan_make(const llmpar_dtensor *from, const llmpar_dtensor *to, const int32_t degree[LLMPAR_MESH_AXES], llmpar_redistribute_plan *out, llmpar_error *error);
/* A line for each step with its bytes, then their sum and the bound. Cut at capacity; returns bytes needed without the NUL. Local. */
LLMPAR_API size_t llmpar_redistribute_plan_print(const llmpar_redistribute_plan *plan, char *text, size_t capacity);
/* Elements of scratch (of the tensor's dtype) that the rank at `coordinate` needs. Local. */
LLMPAR_API int64_t llmpar_redistribute_scratch(const llmpar_redistribute_plan *plan, const int32_t coordinate[LLMPAR_MESH_AXES]);
/* out <- this rank's part in `to` of the tensor whose part in `from` is `in`: rectangles; with Flat the rank's whole flat shard, of which only the tensor's range is read or written. No overlaps; what has no elements may
   be NULL. The ranks compare their requests in a barrier first: what is wrong on one is an error on all before anything moves. Collective over the world. */
LLMPAR_API llmpar_status llmpar_redistribute(const llmpar_redistribute_plan *plan, const llmpar_mesh *mesh, llmpar_stream *stream, const void *in, void *scratch, void *out);

/* To the whole tensor, undoing cuts on dp_shard and tp one by one: as saving and looking need it. Here the ranks of one Flat's axis share a layout, others may have their own. Elements of scratch that it needs. Local. */
LLMPAR_API int64_t llmpar_dtensor_full_scratch(const llmpar_dtensor *tensor, const llmpar_mesh *mesh);
/* full[shape] <- the tensor, from every rank's part `local` (with FLAT: the rank's whole flat shard of the unit; else its rectangle). Uneven and empty parts are fine. Collective over dp_shard and tp. */
LLMPAR_API llmpar_status llmpar_dtensor_full(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, llmpar_stream *stream, const void *local, void *scratch, void *full);
/* local <- this rank's part of full, both in host memory: FLAT writes only its range inside the flat shard. Local. */
LLMPAR_API void llmpar_dtensor_cut(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, const void *full, void *local);

#endif
