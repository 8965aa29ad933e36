/* Any bytes: no crash, no leak, memory within 60 bytes a byte; what parses once parses again from its own strings. */
#include "fuzz.h"

static void check(const char *text, size_t length)
{
    llmpar_heap heap;
    size_t needed = llmpar_json_escape(text, length, NULL, 0);
    char *quoted = (char *)malloc(needed + 1);
    llmpar_json *again;
    llmpar_heap_init(&heap, NULL);
    REQUIRE(llmpar_json_escape(text, length, quoted, needed + 1) == needed && quoted[needed] == 0);
    REQUIRE(llmpar_json_parse(&heap, quoted, needed, NULL, &again, NULL) == LLMPAR_OK);
    REQUIRE(again->length == length && memcmp(again->string, text, length) == 0);
    llmpar_json_destroy(&heap, again);
    free(quoted);
}

static size_t walk(const llmpar_json *node, const llmpar_json *parent, size_t length) /* at most 128 deep */
{
    size_t children = 0;
    REQUIRE(node->position < length && (node->key != NULL) == (parent && parent->type == LLMPAR_JSON_OBJECT));
    if (node->key) check(node->key, node->key_length);
    if (node->type == LLMPAR_JSON_STRING) check(node->string, node->length);
    if (node->type == LLMPAR_JSON_NUMBER) REQUIRE(llmpar_isfinite_f64(node->number) && (!node->is_integer || (double)node->integer == node->number));
    for (const llmpar_json *child = node->child; child; child = child->next) children += walk(child, node, length);
    REQUIRE(node->type < LLMPAR_JSON_ARRAY ? children == 0 : children == node->length);
    return 1;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    for (int unique = 0; unique < 2; unique++) {
        llmpar_heap heap;
        llmpar_json_desc desc = { 0, unique, NULL };
        llmpar_error error;
        llmpar_json *root;
        fuzz_begin(&heap, &error);
        if (llmpar_json_parse(&heap, (const char *)data, size, &desc, &root, &error) == LLMPAR_OK) {
            REQUIRE(heap.peak <= 60 * (uint64_t)size + 128);
            walk(root, NULL, size);
        } else {
            REQUIRE(root == NULL && error.status == LLMPAR_ERR_FORMAT && strstr(error.text, "json: byte ") == error.text);
        }
        llmpar_json_destroy(&heap, root);
        fuzz_end(&heap, size, 90, 128);
    }
    return 0;
}
