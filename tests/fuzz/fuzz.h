/* fuzz: what the fuzzers share. Each takes any bytes as a file: no crash, no leak, memory within a small multiple of the input; what is refused comes with a text.
   One of them by hand:
     clang -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -DLLMPAR_IMPLEMENTATION -I. tests/fuzz/fuzz_json.c -lpthread -o build/fuzz_json
     build/fuzz_json -max_total_time=60 CORPUS tests/fuzz/json */
#ifndef FUZZ_H
#define FUZZ_H

#include "llmpar.h"
#include <stdlib.h>
#include <string.h>

#define REQUIRE(condition) do { if (!(condition)) __builtin_trap(); } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static inline void fuzz_begin(llmpar_heap *heap, llmpar_error *error)
{
    llmpar_heap_init(heap, NULL);
    llmpar_error_clear(error);
}

/* The heap counts what is asked of it: never more than bytes_a_byte * size + more at once, and nothing stays. */
static inline void fuzz_end(const llmpar_heap *heap, size_t size, uint64_t bytes_a_byte, uint64_t more)
{
    REQUIRE(heap->live == 0);
    REQUIRE(heap->peak <= bytes_a_byte * size + more);
}

static inline void fuzz_refused(llmpar_status status, const llmpar_error *error) { REQUIRE(error->status == status && error->text[0]); }

#endif
