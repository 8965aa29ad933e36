#include "base/text_internal.h"

#include <stdarg.h>
#include <stdio.h>

LLMPAR__PRIVATE_DEF llmpar__text llmpar__text_begin(char *text, size_t capacity)
{
    llmpar__text out;
    out.text = text;
    out.capacity = capacity;
    out.used = 0;
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
