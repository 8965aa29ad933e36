/* Any bytes as a config.json: refused with a text, or a model that may be made, whose own config.json says the same. */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    llmpar_heap heap;
    llmpar_error error;
    llmpar_llama_config config, again;
    char text[4096];
    fuzz_begin(&heap, &error);
    llmpar_status status = llmpar_llama_config_parse(&heap, (const char *)data, size, NULL, &config, &error);
    if (status) fuzz_refused(status, &error);
    else {
        REQUIRE(llmpar_llama_config_check(&config, &error) == LLMPAR_OK);
        size_t length = llmpar_llama_config_write(&config, text, sizeof text);
        REQUIRE(length < sizeof text && strlen(text) == length);
        if (length > size) size = length;
        REQUIRE(llmpar_llama_config_parse(&heap, text, length, NULL, &again, &error) == LLMPAR_OK);
        REQUIRE(memcmp(&again, &config, sizeof config) == 0);
    }
    fuzz_end(&heap, size, 90, 256);
    return 0;
}
