#include "base/text_internal.h"
#include "base/json.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

LLMPAR__PRIVATE_DEF llmpar__text llmpar__text_begin(char *text, size_t capacity)
{
    const llmpar__text out = { text, capacity, 0 };
    if (capacity) text[0] = 0;
    return out;
}

LLMPAR__PRIVATE_DEF void llmpar__text_put(llmpar__text *out, const char *format, ...)
{
    va_list arguments;
    size_t room = out->used < out->capacity ? out->capacity - out->used : 0;
    va_start(arguments, format);
    int length = vsnprintf(room ? out->text + out->used : NULL, room, format, arguments);
    va_end(arguments);
    if (length > 0) out->used += (size_t)length;
}

LLMPAR__PRIVATE_DEF void llmpar__text_put_json(llmpar__text *out, const char *string)
{
    size_t room = out->used < out->capacity ? out->capacity - out->used : 0;
    out->used += llmpar_json_escape(string, strlen(string), room ? out->text + out->used : NULL, room);
}
