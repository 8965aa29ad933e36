#include "run/trainer.h"
#include "run/trainer_internal.h"
#include "base/text_internal.h"

#include <stdio.h>
#include <string.h>

#if !defined(LLMPAR_NO_LLAMA) && !defined(LLMPAR_NO_IO) && !defined(LLMPAR_NO_TEXT)

/* memory in bytes, the smallest .. the largest of 4 ranks
                          after init   before the optimizer                   peak
     parameters              1048576                1048576                1048576
     activations      65536 .. 66560    ...                                                   */
LLMPAR_DEF llmpar_status llmpar_memory_print(llmpar_ctx *ctx, const llmpar_memory *memory, char *text, size_t capacity)
{
    enum { ROWS = LLMPAR_TAG_COUNT + 1, COLUMNS = 3, CELLS = ROWS * COLUMNS };
    LLMPAR__NEED(memory, NULL);
    const llmpar_arena_usage *marks[COLUMNS] = { &memory->init, &memory->before_optimizer, &memory->step };
    int64_t values[2 * CELLS]; /* largest, and largest of the negative: the smallest */
    for (int row = 0; row < ROWS; row++)
        for (int column = 0; column < COLUMNS; column++) {
            const llmpar_arena_usage *u = marks[column];
            uint64_t bytes = row < LLMPAR_TAG_COUNT ? (column == 2 ? u->peak[row] : u->live[row]) : column == 2 ? u->peak_total : u->live_total;
            values[row * COLUMNS + column] = (int64_t)bytes;
            values[CELLS + row * COLUMNS + column] = -(int64_t)bytes;
        }
    llmpar_status status = ctx ? llmpar__comm_largest(ctx->comm, values, 2 * CELLS, "memory") : LLMPAR_OK;
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
