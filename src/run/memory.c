#include "run/trainer.h"
#include "run/trainer_internal.h"
#include "base/text_internal.h"

#include <stdio.h>
#include <string.h>

#if !defined(LLMPAR_NO_LLAMA) && !defined(LLMPAR_NO_IO) && !defined(LLMPAR_NO_TEXT)

/* values[count] become the largest of all ranks', element by element. */
static llmpar_status llmpar__memory_largest(llmpar_ctx *ctx, const char *tag, int64_t *values, size_t count)
{
    llmpar_device *device = ctx->device;
    llmpar_stream *stream = NULL;
    llmpar_collective call;
    void *buffer = NULL;
    size_t bytes = count * sizeof *values;
    memset(&call, 0, sizeof call);
    llmpar_status status = device->alloc(device, bytes, &buffer);
    if (!status) status = device->stream_create(device, tag, &stream);
    call.send = call.recv = buffer;
    call.count = count;
    call.dtype = LLMPAR_I64;
    call.op = LLMPAR_MAX;
    call.tag = tag;
    if (!status) status = device->copy(device, stream, buffer, values, bytes);
    if (!status) status = llmpar_all_reduce(ctx->comm, stream, &call);
    if (!status) status = device->copy(device, stream, values, buffer, bytes);
    if (stream) { /* in any case: the stream may use what goes now */
        llmpar_status waited = device->synchronize(device, stream);
        if (!status) status = waited;
        device->stream_destroy(device, stream);
    }
    device->free(device, buffer, bytes);
    return status;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__run_largest(llmpar_ctx *ctx, const char *tag, int64_t *value) { return llmpar__memory_largest(ctx, tag, value, 1); }

/* memory in bytes, the smallest .. the largest of 4 ranks
                          after init   before the optimizer                   peak
     parameters              1048576                1048576                1048576
     activations      65536 .. 66560    ...                                                   */
LLMPAR_DEF llmpar_status llmpar_memory_print(llmpar_ctx *ctx, const llmpar_memory *memory, char *text, size_t capacity)
{
    enum { ROWS = LLMPAR_TAG_COUNT + 1, COLUMNS = 3, CELLS = ROWS * COLUMNS };
    const llmpar_arena_usage *marks[COLUMNS];
    int64_t values[2 * CELLS]; /* largest, and largest of the negative: the smallest */
    marks[0] = &memory->init;
    marks[1] = &memory->before_optimizer;
    marks[2] = &memory->step;
    for (int row = 0; row < ROWS; row++)
        for (int column = 0; column < COLUMNS; column++) {
            const llmpar_arena_usage *u = marks[column];
            uint64_t bytes = row < LLMPAR_TAG_COUNT ? (column == 2 ? u->peak[row] : u->live[row]) : column == 2 ? u->peak_total : u->live_total;
            values[row * COLUMNS + column] = (int64_t)bytes;
            values[CELLS + row * COLUMNS + column] = -(int64_t)bytes;
        }
    llmpar_status status = ctx ? llmpar__memory_largest(ctx, "memory", values, 2 * CELLS) : LLMPAR_OK;
    int32_t world = ctx ? ctx->world : 1;
    llmpar__text out = llmpar__text_begin(text, capacity);
    if (status || (ctx && ctx->rank)) return status;
    llmpar__text_put(&out, "memory in bytes%s%d rank%s\n%-16s%25s%25s%25s\n", world > 1 ? ", the smallest .. the largest of " : ", ", (int)world, world > 1 ? "s" : "", "", "after init", "before the optimizer", "peak");
    for (int row = 0; row < ROWS; row++) {
        llmpar__text_put(&out, "%-16s", row < LLMPAR_TAG_COUNT ? llmpar_tag_name((llmpar_tag)row) : "together");
        for (int column = 0; column < COLUMNS; column++) {
            long long high = values[row * COLUMNS + column], low = -values[CELLS + row * COLUMNS + column];
            char cell[48];
            if (low == high) snprintf(cell, sizeof cell, "%lld", high);
            else snprintf(cell, sizeof cell, "%lld .. %lld", low, high);
            llmpar__text_put(&out, "%25s", cell);
        }
        llmpar__text_put(&out, "\n");
    }
    return LLMPAR_OK;
}

#endif /* LLMPAR_NO_LLAMA, LLMPAR_NO_IO, LLMPAR_NO_TEXT */
