/* json: an RFC 8259 reader with byte positions, and string escaping for writers. */
#ifndef LLMPAR_JSON_H
#define LLMPAR_JSON_H

#include "base/heap.h"

typedef enum llmpar_json_type { LLMPAR_JSON_NULL = 0, LLMPAR_JSON_BOOL, LLMPAR_JSON_NUMBER, LLMPAR_JSON_STRING, LLMPAR_JSON_ARRAY, LLMPAR_JSON_OBJECT } llmpar_json_type;

/* A value. Children hang on `child` and follow `next`; a member's name is in key. Strings carry their length and may hold
   NUL bytes; they are UTF-8, escapes decoded, and end in an extra NUL. Owned by the document. */
typedef struct llmpar_json {
    llmpar_json_type type;
    int boolean;                 /* BOOL */
    int is_integer;              /* NUMBER written without fraction and exponent that fits `integer` */
    int64_t integer;
    double number;               /* NUMBER; overflow to infinity is an error */
    const char *string;          /* STRING */
    size_t length;               /* bytes of `string`, or number of children */
    const char *key;             /* NULL unless a member of an object */
    size_t key_length;
    size_t position;             /* byte offset of the value in the text */
    struct llmpar_json *child, *next;
} llmpar_json;

typedef struct llmpar_json_desc {
    uint32_t max_depth;   /* default 128 */
    int unique_keys;      /* 1: a duplicate member name is an error; readers of config and safetensors always set it */
    const char *name;     /* for messages, default "json" */
} llmpar_json_desc;

/* Parses exactly one value with optional white space around it. *out is owned by the caller, freed by llmpar_json_destroy with the same heap; NULL
   on error. desc may be NULL. Errors: LLMPAR_ERR_FORMAT "NAME: byte 17: expected ',' or '}', got 'x'"; LLMPAR_ERR_MEMORY. Memory is
   bounded by 60 bytes a byte of text (90 if malformed), about 10 in usual texts. */
LLMPAR_API llmpar_status llmpar_json_parse(llmpar_heap *heap, const char *text, size_t length, const llmpar_json_desc *desc, llmpar_json **out, llmpar_error *error);
LLMPAR_API void llmpar_json_destroy(llmpar_heap *heap, llmpar_json *root);
/* Member by name (zero-terminated), or NULL. object may be NULL or no object: NULL. */
LLMPAR_API const llmpar_json *llmpar_json_get(const llmpar_json *object, const char *key);
/* Writes `length` bytes of text as a quoted JSON string with a final NUL into out; returns the bytes needed without the NUL, and writes nothing past `capacity`. Invalid UTF-8 is
   replaced by U+FFFD. */
LLMPAR_API size_t llmpar_json_escape(const char *text, size_t length, char *out, size_t capacity);

#endif
