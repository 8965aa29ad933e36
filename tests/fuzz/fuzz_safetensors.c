/* Any bytes as a safetensors file: refused with a text, or every tensor lies inside the data and is found by its name. */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    llmpar_heap heap;
    llmpar_error error;
    llmpar_safetensors *file = NULL;
    size_t covered = 0;
    fuzz_begin(&heap, &error);
    llmpar_status status = llmpar_safetensors_open_memory(&heap, data, size, "fuzz", &file, &error);
    REQUIRE((status == LLMPAR_OK) == (file != NULL));
    if (status) fuzz_refused(status, &error);
    else {
        for (int32_t i = 0; i < file->count; i++) {
            const llmpar_safetensor *t = &file->tensor[i];
            int64_t elements;
            REQUIRE(t->begin <= size && t->bytes <= size - t->begin && llmpar_safetensors_find(file, t->name) == t);
            REQUIRE(llmpar_extent_product(t->shape, t->dims, &elements) && (uint64_t)elements * llmpar_dtype_size(t->dtype) == t->bytes);
            covered += t->bytes;
        }
        REQUIRE(covered < size);
    }
    llmpar_safetensors_close(file);
    fuzz_end(&heap, size, 100, 4096);
    return 0;
}
