/* tree_internal: the balanced tree over operands in memory, in a thread's registers: for tree_sum and for the communicator of ranks that share a GPU.

   The tree is walked as a binary counter: after operand j as many subtrees are closed as j has trailing ones; subtrees wait in registers, one a level. */
#ifndef LLMPAR_CUDA_TREE_INTERNAL_H
#define LLMPAR_CUDA_TREE_INTERNAL_H

#include "cuda/cuda_internal.h"

enum { LLMPAR__CUDA_TREE_LEVELS = 9 }; /* less than 2^9 operands */

template <typename T, int Count> struct __align__(sizeof(T) * Count) llmpar__cuda_tree_group { T x[Count]; };

static __device__ __forceinline__ float llmpar__cuda_tree_add(float a, float b) { return __fadd_rn(a, b); }
static __device__ __forceinline__ double llmpar__cuda_tree_add(double a, double b) { return __dadd_rn(a, b); }
static __device__ __forceinline__ uint64_t llmpar__cuda_tree_add(uint64_t a, uint64_t b) { return a + b; }

template <typename Group> static __device__ __forceinline__ Group llmpar__cuda_tree_sum_groups(Group a, const Group &b)
{
#pragma unroll
    for (unsigned k = 0; k < sizeof a.x / sizeof a.x[0]; k++) a.x[k] = llmpar__cuda_tree_add(a.x[k], b.x[k]);
    return a;
}

/* Operands: a kernel's argument with an array `in` of addresses. */
template <typename Group, typename Operands> static __device__ __forceinline__ Group llmpar__cuda_tree_at(const Operands &operands, int32_t n, int64_t i)
{
    Group level[LLMPAR__CUDA_TREE_LEVELS], sum = ((const Group *)operands.in[0])[i];
#pragma unroll
    for (int l = 0; l < LLMPAR__CUDA_TREE_LEVELS; l++) level[l] = sum; /* read only where the counter says so, which a compiler cannot see */
    for (int32_t j = 1; j < n; j++) {
        Group next = ((const Group *)operands.in[j])[i];
        int open = 1;
#pragma unroll
        for (int l = 0; l < LLMPAR__CUDA_TREE_LEVELS; l++) {
            if (!open) continue;
            if (j >> l & 1) next = llmpar__cuda_tree_sum_groups(level[l], next);
            else {
                level[l] = next;
                open = 0;
            }
        }
    }
    /* What is open closes from the right: the split at the largest power of two below n. */
    int found = 0;
#pragma unroll
    for (int l = 0; l < LLMPAR__CUDA_TREE_LEVELS; l++) {
        if (!(n >> l & 1)) continue;
        sum = found ? llmpar__cuda_tree_sum_groups(level[l], sum) : level[l];
        found = 1;
    }
    return sum;
}

#endif
