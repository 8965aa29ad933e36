/* Any bytes as a safetensors file: refused with a text, or every tensor lies inside the data and is found by its name.
     clang -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -DLLMPAR_IMPLEMENTATION -I. tests/fuzz/fuzz_safetensors.c -lpthread -o build/fuzz_safetensors
     build/fuzz_safetensors -max_total_time=60 CORPUS tests/fuzz/safetensors */
#include "llmpar.h"
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    llmpar_safetensors *file = NULL;
    llmpar_error error;
    llmpar_heap heap;
    size_t covered = 0;
    int32_t i;
    llmpar_error_clear(&error);
    llmpar_heap_init(&heap, NULL);
    if (llmpar_safetensors_open_memory(&heap, data, bytes, "fuzz", &file, &error)) {
        if (file || !error.text[0]) abort();
    } else {
        for (i = 0; i < file->count; i++) {
            const llmpar_safetensor *t = &file->tensor[i];
            int64_t elements;
            if (t->begin > bytes || t->bytes > bytes - t->begin || llmpar_safetensors_find(file, t->name) != t) abort();
            if (!llmpar_extent_product(t->shape, t->dims, &elements) || (uint64_t)elements * llmpar_dtype_size(t->dtype) != t->bytes) abort();
            covered += t->bytes;
        }
        if (covered >= bytes) abort();
    }
    llmpar_safetensors_close(file);
    if (heap.live) abort();
    return 0;
}
