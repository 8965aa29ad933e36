/* text_internal: a text that may be longer than its buffer: it is cut there, always ends in 0, and `used` counts what the whole takes, as snprintf does. */
#ifndef LLMPAR_TEXT_INTERNAL_H
#define LLMPAR_TEXT_INTERNAL_H

#include "base/platform.h"

typedef struct llmpar__text { char *text; size_t capacity, used; } llmpar__text;

/* An empty one in the caller's text[capacity]; NULL with capacity 0 only counts. */
LLMPAR__PRIVATE llmpar__text llmpar__text_begin(char *text, size_t capacity);
/* Appends like printf. */
LLMPAR__PRIVATE void llmpar__text_put(llmpar__text *out, const char *format, ...) LLMPAR_PRINTF(2, 3);
/* Appends a JSON string, in its quotes. */
LLMPAR__PRIVATE void llmpar__text_put_json(llmpar__text *out, const char *string);

#endif
