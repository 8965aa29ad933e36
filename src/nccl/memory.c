/* memory: device memory as NCCL wants it where it is to reach it without copies of its own: ncclMemAlloc in the place of the device's allocator. (For that it wants it registered with each communicator too,
   ncclCommRegister, which nobody does yet: not without GPUs to see it on.)

   While a world lives, device->alloc and free are the functions below; blocks of 1 MiB and more come from NCCL (which gives whole pages of 2 MiB), smaller ones from the device. Every block of NCCL's is on a list, so
   that free knows whose it is, and blocks may be older than the world or outlive it. When the last world is gone and the last such block is back, the table is as it was. */
#include "nccl/nccl.h"
#include "nccl/nccl_internal.h"

#include <string.h>

#define LLMPAR__NCCL_SMALL ((size_t)1 << 20)
#define LLMPAR__NCCL_TOKEN 256

/* device->memory_state. */
typedef struct llmpar__nccl_memory {
    llmpar_heap *heap;
    llmpar_status (*alloc)(llmpar_device *device, size_t bytes, void **out);
    void (*free)(llmpar_device *device, void *memory, size_t bytes);
    void **block;  /* [count] of NCCL's */
    size_t count, room;
    void *token;   /* a small block of the device's, see llmpar__nccl_free */
    int32_t worlds;
} llmpar__nccl_memory;

static void llmpar__nccl_forget(llmpar_device *device)
{
    llmpar__nccl_memory *memory = (llmpar__nccl_memory *)device->memory_state;
    if (memory->worlds || memory->count) return;
    device->alloc = memory->alloc;
    device->free = memory->free;
    device->memory_state = NULL;
    device->free(device, memory->token, LLMPAR__NCCL_TOKEN);
    llmpar_heap_free(memory->heap, memory->block);
    llmpar_heap_free(memory->heap, memory);
}

static llmpar_status llmpar__nccl_alloc(llmpar_device *device, size_t bytes, void **out)
{
    llmpar__nccl_memory *memory = (llmpar__nccl_memory *)device->memory_state;
    *out = NULL;
    if (bytes < LLMPAR__NCCL_SMALL || !memory->worlds) return memory->alloc(device, bytes, out);
    if (memory->count == memory->room) {
        size_t room = memory->room ? 2 * memory->room : 64;
        void **block = (void **)llmpar_heap_alloc(memory->heap, room, sizeof *block);
        if (!block) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "nccl: out of memory for the list of %llu device blocks", (unsigned long long)room);
        if (memory->count) memcpy(block, memory->block, memory->count * sizeof *block);
        llmpar_heap_free(memory->heap, memory->block);
        memory->block = block;
        memory->room = room;
    }
    if (ncclMemAlloc(out, bytes)) return memory->alloc(device, bytes, out); /* the device says in its own words that there is no more, or finds a place that whole pages do not fit in */
    memory->block[memory->count++] = *out;
    return LLMPAR_OK;
}

static void llmpar__nccl_free(llmpar_device *device, void *block, size_t bytes)
{
    llmpar__nccl_memory *memory = (llmpar__nccl_memory *)device->memory_state;
    size_t i = memory->count;
    while (i > 0 && memory->block[i - 1] != block) i--;
    if (!block || !i) {
        memory->free(device, block, bytes);
        return;
    }
    /* The table's free waits for everything that was enqueued; NCCL's does not. So a small block of the device's own goes first, and comes back. */
    if (!memory->token) memory->alloc(device, LLMPAR__NCCL_TOKEN, &memory->token);
    memory->free(device, memory->token, LLMPAR__NCCL_TOKEN);
    memory->token = NULL;
    if (memory->alloc(device, LLMPAR__NCCL_TOKEN, &memory->token)) memory->token = NULL;
    ncclMemFree(block);
    memory->block[i - 1] = memory->block[--memory->count];
    llmpar__nccl_forget(device);
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__nccl_memory_begin(llmpar_heap *heap, llmpar_device *device)
{
    if (device->size < offsetof(llmpar_device, memory_state) + sizeof device->memory_state)
        return llmpar_error_set(device->error, LLMPAR_ERR_ABI, "nccl: the table of device %s has no place for another allocator: own_memory = 1 leaves it its own", device->name);
    llmpar__nccl_memory *memory = (llmpar__nccl_memory *)device->memory_state;
    if (memory && device->alloc != llmpar__nccl_alloc) return llmpar_error_set(device->error, LLMPAR_ERR_CONFIG, "nccl: the allocator of device %s has been replaced already: own_memory = 1 leaves it as it is", device->name);
    if (!memory) {
        memory = (llmpar__nccl_memory *)llmpar_heap_zalloc(heap, 1, sizeof *memory);
        if (!memory) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "nccl: out of memory for the allocator");
        llmpar_status st = device->alloc(device, LLMPAR__NCCL_TOKEN, &memory->token);
        if (st) {
            llmpar_heap_free(heap, memory);
            return st;
        }
        memory->heap = heap;
        memory->alloc = device->alloc;
        memory->free = device->free;
        device->memory_state = memory;
        device->alloc = llmpar__nccl_alloc;
        device->free = llmpar__nccl_free;
    }
    memory->worlds++;
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_memory_end(llmpar_device *device)
{
    llmpar__nccl_memory *memory = (llmpar__nccl_memory *)device->memory_state;
    memory->worlds--;
    llmpar__nccl_forget(device);
}

#undef LLMPAR__NCCL_SMALL
#undef LLMPAR__NCCL_TOKEN
