/* redistribute: data of a dtensor from one placement to another. Today: to the whole tensor on every rank of the mesh's
   dp_shard x tp plane (what saving and looking need), and from a whole tensor to the local part. */
#ifndef LLMPAR_REDISTRIBUTE_H
#define LLMPAR_REDISTRIBUTE_H

#include "mesh/dtensor.h"

/* Elements of scratch that llmpar_dtensor_full needs beside `full` (same dtype as the tensor). Local. */
LLMPAR_API int64_t llmpar_dtensor_full_scratch(const llmpar_dtensor *tensor, const llmpar_mesh *mesh);
/* full[shape] <- the tensor, from every rank's part `local` (with FLAT: the rank's whole flat shard of the unit; else its rectangle). Uneven and empty parts are fine. Collective over dp_shard and tp. */
LLMPAR_API llmpar_status llmpar_dtensor_full(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, llmpar_stream *stream, const void *local, void *scratch, void *full);
/* local <- this rank's part of full (host or CPU memory): FLAT writes only its range inside the flat shard. Local. */
LLMPAR_API void llmpar_dtensor_cut(const llmpar_dtensor *tensor, const llmpar_mesh *mesh, const void *full, void *local);

#endif
