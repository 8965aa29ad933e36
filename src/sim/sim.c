#include "sim/sim.h"

#include <stddef.h>
#include <string.h>

#include "base/heap.h"
#include "tables/tables_internal.h"

#if !defined(LLMPAR_NO_SIM)

/* ---- device ---- */

#define LLMPAR__SIM_BASE ((uint64_t)1 << 44) /* no process has memory of its own in this range of 64-bit addresses */
#define LLMPAR__SIM_END ((uint64_t)1 << 46)

typedef struct llmpar__sim { llmpar_device table; llmpar_device *of; llmpar_heap *heap; uint64_t next; } llmpar__sim;

static int llmpar__sim_owns(const void *memory)
{
    uint64_t at = (uint64_t)(uintptr_t)memory;
    return at >= LLMPAR__SIM_BASE && at < LLMPAR__SIM_END;
}

static llmpar_status llmpar__sim_alloc(llmpar_device *device, size_t bytes, void **out)
{
    llmpar__sim *sim = (llmpar__sim *)device->state;
    uint64_t step = ((uint64_t)bytes | 1) + device->alignment;
    *out = NULL;
    if ((uint64_t)bytes > LLMPAR__SIM_END || step > LLMPAR__SIM_END - sim->next) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "sim: %llu bytes are beyond the addresses of a simulated device", (unsigned long long)bytes);
    *out = (void *)(uintptr_t)sim->next;
    sim->next += step & ~(uint64_t)(device->alignment - 1);
    return LLMPAR_OK;
}
static void llmpar__sim_free(llmpar_device *device, void *memory, size_t bytes) { (void)device; (void)memory; (void)bytes; }

static llmpar_status llmpar__sim_copy(llmpar_device *device, llmpar_stream *stream, void *out, const void *in, size_t bytes)
{
    (void)device; (void)stream; (void)in;
    if (bytes && !llmpar__sim_owns(out)) memset(out, 0, bytes);
    return LLMPAR_OK;
}
static llmpar_status llmpar__sim_zero(llmpar_device *device, llmpar_stream *stream, void *out, size_t bytes) { return llmpar__sim_copy(device, stream, out, NULL, bytes); }

/* Streams and events are nothing but different from NULL. */
static llmpar_status llmpar__sim_stream_create(llmpar_device *device, const char *name, llmpar_stream **out) { (void)name; *out = (llmpar_stream *)device->state; return LLMPAR_OK; }
static void llmpar__sim_stream_destroy(llmpar_device *device, llmpar_stream *stream) { (void)device; (void)stream; }
static llmpar_status llmpar__sim_synchronize(llmpar_device *device, llmpar_stream *stream) { (void)device; (void)stream; return LLMPAR_OK; }
static llmpar_status llmpar__sim_stream_thread(llmpar_device *device, llmpar_stream *stream) { (void)device; (void)stream; return LLMPAR_OK; }
static llmpar_status llmpar__sim_event_create(llmpar_device *device, llmpar_event **out) { *out = (llmpar_event *)device->state; return LLMPAR_OK; }
static void llmpar__sim_event_destroy(llmpar_device *device, llmpar_event *event) { (void)device; (void)event; }
static llmpar_status llmpar__sim_event(llmpar_device *device, llmpar_stream *stream, llmpar_event *event) { (void)device; (void)stream; (void)event; return LLMPAR_OK; }
static llmpar_status llmpar__sim_event_synchronize(llmpar_device *device, llmpar_event *event) { (void)device; (void)event; return LLMPAR_OK; }
static llmpar_status llmpar__sim_host_call(llmpar_device *device, llmpar_stream *stream, llmpar_status (*fn)(void *arg), const void *arg, size_t arg_bytes)
{
    (void)device; (void)stream; (void)fn; (void)arg; (void)arg_bytes;
    return LLMPAR_OK;
}

#define LLMPAR__SIM_OPERATIONS(X) \
    X(gemm, llmpar_gemm_args) X(rmsnorm, llmpar_rmsnorm_args) X(rmsnorm_backward, llmpar_rmsnorm_backward_args) X(rope, llmpar_rope_args) X(attention, llmpar_attention_args) \
    X(attention_backward, llmpar_attention_backward_args) X(swiglu, llmpar_swiglu_args) X(swiglu_backward, llmpar_swiglu_backward_args) X(embedding, llmpar_embedding_args) \
    X(embedding_backward, llmpar_embedding_backward_args) X(xent_max, llmpar_xent_args) X(xent_sum, llmpar_xent_args) X(xent_loss, llmpar_xent_loss_args) X(xent_backward, llmpar_xent_backward_args) \
    X(tree_sum, llmpar_tree_sum_args) X(max, llmpar_max_args) X(add, llmpar_add_args) X(scale, llmpar_scale_args) X(cast, llmpar_cast_args) X(copy_rows, llmpar_copy_rows_args) X(adamw, llmpar_adamw_args) \
    X(square_sum, llmpar_square_sum_args) X(sgd, llmpar_sgd_args) X(largest, llmpar_largest_args) X(factor_sum, llmpar_factor_sum_args) X(factor_moment, llmpar_factor_moment_args) \
    X(adalomo_square, llmpar_adalomo_args) X(adalomo, llmpar_adalomo_args)
#define LLMPAR__SIM_RUN(slot, args_type) static llmpar_status llmpar__sim_##slot(llmpar_device *device, llmpar_stream *stream, const args_type *args) { (void)device; (void)stream; (void)args; return LLMPAR_OK; }
LLMPAR__SIM_OPERATIONS(LLMPAR__SIM_RUN)

static llmpar_device *llmpar__sim_of(llmpar_device *device) { return ((llmpar__sim *)device->state)->of; }
static size_t llmpar__sim_gemm_workspace(llmpar_device *device, const llmpar_gemm_args *args) { return llmpar__sim_of(device)->gemm_workspace(llmpar__sim_of(device), args); }
static size_t llmpar__sim_attention_workspace(llmpar_device *device, const llmpar_attention_args *args) { return llmpar__sim_of(device)->attention_workspace(llmpar__sim_of(device), args); }
static size_t llmpar__sim_attention_backward_workspace(llmpar_device *device, const llmpar_attention_backward_args *args) { return llmpar__sim_of(device)->attention_backward_workspace(llmpar__sim_of(device), args); }
static size_t llmpar__sim_embedding_backward_workspace(llmpar_device *device, const llmpar_embedding_backward_args *args) { return llmpar__sim_of(device)->embedding_backward_workspace(llmpar__sim_of(device), args); }

LLMPAR_DEF llmpar_status llmpar_sim_device_create(llmpar_heap *heap, llmpar_error *error, llmpar_device *of, llmpar_device **out)
{
    llmpar__sim *sim = LLMPAR__ZALLOC(llmpar__sim, heap, 1);
    *out = NULL;
    if (!sim) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "sim: out of memory for the device");
    llmpar_device *table = &sim->table;
    sim->of = of;
    sim->heap = heap;
    sim->next = LLMPAR__SIM_BASE;
    table->abi = LLMPAR_DEVICE_ABI;
    table->size = (uint32_t)sizeof *table;
    table->name = of->name;
    table->error = error;
    table->state = sim;
    table->alignment = of->alignment;
    table->alloc = llmpar__sim_alloc;
    table->free = llmpar__sim_free;
    table->copy = llmpar__sim_copy;
    table->zero = llmpar__sim_zero;
    table->stream_create = llmpar__sim_stream_create;
    table->stream_destroy = llmpar__sim_stream_destroy;
    table->synchronize = llmpar__sim_synchronize;
    /* As the device can or not, so that a recipe is refused in the plan where it would be. */
    if (LLMPAR__HAS(of, stream_thread)) table->stream_thread = llmpar__sim_stream_thread;
    table->apart = llmpar_device_apart(of);
    table->event_create = llmpar__sim_event_create;
    table->event_destroy = llmpar__sim_event_destroy;
    table->event_record = llmpar__sim_event;
    table->event_wait = llmpar__sim_event;
    table->event_synchronize = llmpar__sim_event_synchronize;
    table->host_call = llmpar__sim_host_call;
#define LLMPAR__SIM_FILL(slot, args_type) table->slot = llmpar__sim_##slot;
    LLMPAR__SIM_OPERATIONS(LLMPAR__SIM_FILL)
#undef LLMPAR__SIM_FILL
    table->gemm_workspace = llmpar__sim_gemm_workspace;
    table->attention_workspace = llmpar__sim_attention_workspace;
    table->attention_backward_workspace = llmpar__sim_attention_backward_workspace;
    table->embedding_backward_workspace = llmpar__sim_embedding_backward_workspace;
    *out = table;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_sim_device_destroy(llmpar_device *device)
{
    if (device) llmpar_heap_free(((llmpar__sim *)device->state)->heap, device->state);
}

#undef LLMPAR__SIM_BASE
#undef LLMPAR__SIM_END
#undef LLMPAR__SIM_OPERATIONS
#undef LLMPAR__SIM_RUN

/* ---- communicator ---- */

typedef struct llmpar__sim_comm { llmpar_comm comm; llmpar_comm *of; llmpar_heap *heap; int own; } llmpar__sim_comm;

static llmpar_status llmpar__sim_collective(llmpar_comm *comm, llmpar_stream *stream, const llmpar_collective *call) { (void)comm; (void)stream; (void)call; return LLMPAR_OK; }
static llmpar_status llmpar__sim_barrier(llmpar_comm *comm, llmpar_stream *stream, const char *tag) { (void)comm; (void)stream; (void)tag; return LLMPAR_OK; }
static void llmpar__sim_abort(llmpar_comm *comm, const llmpar_error *error)
{
    llmpar_comm *of = ((llmpar__sim_comm *)comm->state)->of;
    of->abort(of, error);
}

static void llmpar__sim_comm_destroy(llmpar_comm *comm)
{
    llmpar__sim_comm *sim = (llmpar__sim_comm *)comm->state;
    if (sim->own) llmpar_comm_destroy(sim->of);
    llmpar_heap_free(sim->heap, sim);
}

static llmpar_status llmpar__sim_split(llmpar_comm *comm, int32_t color, int32_t key, const char *name, llmpar_comm **out)
{
    llmpar__sim_comm *sim = (llmpar__sim_comm *)comm->state;
    llmpar_comm *part = NULL;
    *out = NULL;
    llmpar_status status = llmpar_comm_split(sim->of, color, key, name, &part);
    if (status || !part) return status;
    status = llmpar_sim_comm_create(sim->heap, comm->error, comm->device, part, 1, out);
    if (status) llmpar_comm_destroy(part);
    return status;
}

LLMPAR_DEF llmpar_status llmpar_sim_comm_create(llmpar_heap *heap, llmpar_error *error, llmpar_device *device, llmpar_comm *of, int own, llmpar_comm **out)
{
    llmpar__sim_comm *sim = LLMPAR__ZALLOC(llmpar__sim_comm, heap, 1);
    *out = NULL;
    if (!sim) return llmpar_error_set(error, LLMPAR_ERR_MEMORY, "sim: out of memory for communicator %s", of->axis);
    llmpar_comm *comm = &sim->comm;
    sim->of = of;
    sim->heap = heap;
    sim->own = own;
    comm->abi = LLMPAR_COMM_ABI;
    comm->size = (uint32_t)sizeof *comm;
    comm->rank = of->rank;
    comm->ranks = of->ranks;
    comm->axis = of->axis;
    comm->device = device;
    comm->error = error;
    comm->one_thread = LLMPAR__HAS(of, one_thread) ? of->one_thread : NULL;
    comm->state = sim;
    comm->split = llmpar__sim_split;
    comm->destroy = llmpar__sim_comm_destroy;
    comm->barrier = llmpar__sim_barrier;
    comm->all_gather = comm->reduce_scatter = comm->all_reduce = comm->broadcast = comm->all_to_all = comm->send = comm->recv = llmpar__sim_collective;
    comm->abort = llmpar__sim_abort;
    *out = comm;
    return LLMPAR_OK;
}

#endif /* LLMPAR_NO_SIM */
