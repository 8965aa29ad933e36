/* Any bytes as a checkpoint's manifest, as they are and with a right checksum behind them: refused with a text, or every element of every tensor stands in exactly one part, in a file that is named. */
#include "fuzz.h"
#include "model_io/checkpoint_internal.h"
#include <stdio.h>

/* seen[elements] += 1 where the range of the part's rectangle lies in the tensor. */
static void mark(const llmpar__manifest_tensor *tensor, const llmpar_local *local, unsigned char *seen)
{
    for (int64_t i = local->flat_begin; i < local->flat_begin + local->flat_count; i++) {
        int64_t at = 0, stride = 1, rest = i;
        for (int32_t d = tensor->dims - 1; d >= 0; d--) {
            at += (local->offset[d] + rest % local->shape[d]) * stride;
            rest /= local->shape[d];
            stride *= tensor->shape[d];
        }
        seen[at]++;
    }
}

static void look(const llmpar__manifest *m)
{
    for (int32_t t = 0; t < m->tensors; t++) {
        const llmpar__manifest_tensor *tensor = &m->tensor[t];
        int64_t elements, held = 0;
        REQUIRE(tensor->dims >= 0 && tensor->dims <= LLMPAR_MAX_DIMS && llmpar_extent_product(tensor->shape, tensor->dims, &elements));
        for (int32_t p = 0; p < tensor->parts; p++) {
            const llmpar_local *local = &tensor->part[p].local;
            REQUIRE(tensor->part[p].file >= 0 && tensor->part[p].file < m->files && local->flat_begin >= 0 && local->flat_count > 0 && local->flat_count <= local->elements - local->flat_begin);
            for (int32_t d = 0; d < tensor->dims; d++) REQUIRE(local->offset[d] >= 0 && local->shape[d] >= 0 && local->offset[d] <= tensor->shape[d] - local->shape[d]);
            held += local->flat_count;
        }
        REQUIRE(held == elements);
        if (elements > 4096) continue;
        unsigned char *seen = (unsigned char *)calloc((size_t)elements + 1, 1);
        for (int32_t p = 0; p < tensor->parts; p++) mark(tensor, &tensor->part[p].local, seen);
        for (int64_t i = 0; i < elements; i++) REQUIRE(seen[i] == 1);
        free(seen);
    }
    for (int32_t f = 0; f < m->files; f++) REQUIRE(m->file[f].name[0] && m->file[f].name[0] != '.' && !strchr(m->file[f].name, '/') && m->file[f].bytes > 0);
}

static void parse(const char *text, size_t length)
{
    llmpar_heap heap;
    llmpar_error error;
    llmpar__manifest manifest;
    fuzz_begin(&heap, &error);
    llmpar_status status = llmpar__manifest_parse(&heap, text, length, "manifest", &manifest, &error);
    if (status) fuzz_refused(status, &error);
    else look(&manifest);
    llmpar__manifest_destroy(&heap, &manifest);
    fuzz_end(&heap, length, 200, 1024);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char tail[40], *text = (char *)malloc(size + 30);
    llmpar_xxh64 sum;
    parse((const char *)data, size);
    llmpar_xxh64_begin(&sum);
    llmpar_xxh64_add(&sum, data, size);
    snprintf(tail, sizeof tail, ",\n\"xxh64\":\"%016llx\"}\n", (unsigned long long)llmpar_xxh64_end(&sum));
    if (size) memcpy(text, data, size);
    memcpy(text + size, tail, 30);
    parse(text, size + 30);
    free(text);
    return 0;
}
