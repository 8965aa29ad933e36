/* device: the optional slots with their fallbacks. */
#include "tables/device.h"
#include "tables/tables_internal.h"

#include <string.h>


LLMPAR_DEF llmpar_status llmpar_device_stream_thread(llmpar_device *device, llmpar_stream *stream)
{
    if (LLMPAR__HAS(device, stream_thread)) return device->stream_thread(device, stream);
    return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "device %s: its streams cannot have threads of their own", device->name);
}

LLMPAR_DEF llmpar_error *llmpar_device_thread_error(llmpar_device *device, llmpar_error *own)
{
    llmpar_error *error = device && LLMPAR__HAS(device, thread_error) ? device->thread_error(device) : NULL;
    return error ? error : own;
}

LLMPAR_DEF int32_t llmpar_device_threads_running(llmpar_device *device)
{
    return LLMPAR__HAS(device, threads_running) ? device->threads_running(device) : 1;
}

LLMPAR_DEF int32_t llmpar_device_interleaved_rows(llmpar_device *device, llmpar_dtype dtype)
{
    return LLMPAR__HAS(device, interleave_workspace) && device->interleaved_rows && device->interleave ? device->interleaved_rows(device, dtype) : 0;
}

LLMPAR_DEF llmpar_status llmpar_device_attention_each(llmpar_device *device, llmpar_stream *stream, const llmpar_attention_each_args *args)
{
    llmpar_status status = LLMPAR_OK;
    if (LLMPAR__HAS(device, attention_each)) return device->attention_each(device, stream, args);
    for (int32_t i = 0; i < args->count && !status; i++) status = device->attention(device, stream, &args->each[i]);
    return status;
}

LLMPAR_DEF llmpar_status llmpar_device_tree_sum_to(llmpar_device *device, const llmpar_tree_sum_to_args *args)
{
    llmpar_tree_sum_args sum;
    size_t bytes = args->count * llmpar_dtype_size(args->dtype);
    llmpar_status status = LLMPAR_OK;
    if (LLMPAR__HAS(device, tree_sum_to)) return device->tree_sum_to(device, args);
    if (!bytes || args->outs < 1) return LLMPAR_OK;
    sum.in = args->in;
    sum.n = args->n;
    sum.count = args->count;
    sum.out = args->out[0];
    sum.dtype = args->dtype;
    if (args->n > 1) status = device->tree_sum(device, NULL, &sum);
    for (int32_t i = args->n > 1; i < args->outs && !status; i++) {
        const void *from = args->n > 1 ? sum.out : args->in[0];
        if (args->out[i] != from) status = device->copy(device, NULL, args->out[i], from, bytes);
    }
    return status;
}

LLMPAR_DEF llmpar_status llmpar_device_host_alloc(llmpar_device *device, llmpar_heap *heap, size_t bytes, void **out)
{
    *out = NULL;
    if (LLMPAR__HAS(device, host_free) && device->host_alloc) return device->host_alloc(device, bytes, out);
    *out = llmpar_heap_alloc(heap, 1, bytes);
    return *out ? LLMPAR_OK : LLMPAR_ERR_MEMORY;
}

LLMPAR_DEF void llmpar_device_host_free(llmpar_device *device, llmpar_heap *heap, void *memory, size_t bytes)
{
    if (LLMPAR__HAS(device, host_free) && device->host_alloc) device->host_free(device, memory, bytes);
    else llmpar_heap_free(heap, memory);
}

LLMPAR_DEF int llmpar_device_apart(const llmpar_device *device)
{
    return LLMPAR__HAS(device, apart);
}

LLMPAR_DEF llmpar_status llmpar_order_call(llmpar_order *order, llmpar_device *device, llmpar_stream *stream, llmpar_status (*fn)(void *arg), const void *arg, size_t arg_bytes)
{
    llmpar_status status = LLMPAR_OK;
    if (!stream || !LLMPAR__HAS(device, stream_thread)) return device->host_call(device, stream, fn, arg, arg_bytes);
    if (order->device != device) {
        status = llmpar_order_wait(order);
        llmpar_order_destroy(order);
        if (!status) status = device->event_create(device, &order->event);
        if (status) return status;
        order->device = device;
    }
    status = device->event_wait(device, stream, order->event);
    if (!status) status = device->host_call(device, stream, fn, arg, arg_bytes);
    return status ? status : device->event_record(device, stream, order->event);
}

LLMPAR_DEF llmpar_status llmpar_order_wait(llmpar_order *order) { return order->event ? order->device->event_synchronize(order->device, order->event) : LLMPAR_OK; }

LLMPAR_DEF void llmpar_order_destroy(llmpar_order *order)
{
    if (!order) return;
    if (order->event) order->device->event_destroy(order->device, order->event);
    order->device = NULL;
    order->event = NULL;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__device_done(llmpar_device *device, llmpar_stream *stream, llmpar_status status)
{
    llmpar_status waited = device->synchronize(device, stream);
    return status ? status : waited;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__device_cast(llmpar_device *device, llmpar_stream *stream, const void *in, llmpar_dtype from, void *out, llmpar_dtype to, size_t count)
{
    LLMPAR__ZEROED(llmpar_cast_args, args);
    args.count = count;
    args.in = in;
    args.in_dtype = from;
    args.out = out;
    args.out_dtype = to;
    return device->cast(device, stream, &args);
}

