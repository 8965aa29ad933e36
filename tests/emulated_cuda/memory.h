/* memory: what memory.cc has counted. */
#ifndef EMULATED_CUDA_MEMORY_H
#define EMULATED_CUDA_MEMORY_H

#include <stdint.h>

/* Of a warp's accesses. spent and fewest: sectors of global memory, turns of the banks of shared memory. */
typedef struct emulated_cuda_count { uint64_t accesses, lanes, bytes, spent, fewest; } emulated_cuda_count;

#ifdef __cplusplus
extern "C" {
#endif
void emulated_cuda_forget(void);
int emulated_cuda_write(const char *path); /* for memory.sh; 0: that cannot be written */
emulated_cuda_count emulated_cuda_counted(const void *kernel, int shared); /* all places of the kernel together */
#ifdef __cplusplus
}
#endif

#endif
