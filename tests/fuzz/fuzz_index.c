/* Any bytes as a model.safetensors.index.json: refused with a text, or every tensor once, in a file that stands in the directory itself. */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    llmpar_heap heap;
    llmpar_error error;
    llmpar_hf_index index;
    fuzz_begin(&heap, &error);
    llmpar_status status = llmpar_hf_index_parse(&heap, (const char *)data, size, "index", &index, &error);
    if (status) fuzz_refused(status, &error);
    else {
        REQUIRE(index.count > 0 && index.files > 0 && index.files <= index.count && index.files <= LLMPAR_HF_MAX_FILES && index.total_size >= -1);
        for (int32_t i = 0; i < index.count; i++) REQUIRE(index.place[i] >= 0 && index.place[i] < index.files && strlen(index.tensor[i]) < size);
        for (int32_t f = 0; f < index.files; f++) {
            const char *name = index.file[f];
            REQUIRE(name[0] && strlen(name) < 256 && !strchr(name, '/') && !strchr(name, '\\') && strcmp(name, ".") && !strstr(name, ".."));
            for (int32_t g = 0; g < f && g < 8; g++) REQUIRE(strcmp(index.file[g], name));
        }
        llmpar_hf_index_free(&heap, &index);
    }
    fuzz_end(&heap, size, 110, 512);
    return 0;
}
