/* A user of the library in another language than its implementation: compiled as C99 and as C++11, linked with both. */
#include "llmpar.h"
#include <string.h>

int main(void)
{
    llmpar_heap heap;
    llmpar_error error;
    size_t product = 0;
    char *copy;

    if (strcmp(llmpar_status_string(LLMPAR_OK), "ok")) return 1;
    llmpar_error_clear(&error);
    if (llmpar_error_set(&error, LLMPAR_ERR_SHAPE, "expected %d, got %d", 2, 3) != LLMPAR_ERR_SHAPE) return 2;
    if (!strstr(error.text, "expected 2, got 3")) return 3;
    if (!llmpar_size_mul(6, 7, &product) || product != 42) return 4;
    llmpar_heap_init(&heap, NULL);
    copy = llmpar_heap_strdup(&heap, "text");
    if (!copy || strcmp(copy, "text")) return 5;
    llmpar_heap_free(&heap, copy);
    if (heap.live != 0) return 6;
    return 0;
}
