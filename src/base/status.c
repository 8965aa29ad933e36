#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

LLMPAR_DEF const char *llmpar_status_string(llmpar_status status)
{
    switch ((int)status) {
#define LLMPAR__STATUS_CASE(name, value, text) case value: return text;
    LLMPAR_STATUS_LIST(LLMPAR__STATUS_CASE)
#undef LLMPAR__STATUS_CASE
    default: return "unknown status";
    }
}

LLMPAR_DEF llmpar_status llmpar_error_set(llmpar_error *error, llmpar_status status, const char *format, ...)
{
    /* Formatted aside first: an argument may point into *error. */
    char text[sizeof ((llmpar_error *)0)->text], where[sizeof ((llmpar_error *)0)->where];
    va_list arguments;
    size_t i;
    if (!error || status == LLMPAR_OK || error->status != LLMPAR_OK) return status;
    va_start(arguments, format);
    int length = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (length < 0) text[0] = 0;
    if (length >= (int)sizeof text) {
        size_t end = sizeof text - 4;
        while (end > 0 && ((unsigned char)text[end] & 0xC0) == 0x80) end--; /* never half of a UTF-8 character */
        memcpy(text + end, "...", 4);
    }
    for (i = 0; text[i]; i++)
        if ((unsigned char)text[i] < 0x20) text[i] = ' '; /* one line, whatever a file name holds */
    while (i > 0 && text[i - 1] == ' ') text[--i] = 0;
    /* `where` was filled in beforehand by whoever knows the rank's place; it belongs to every error of that rank. */
    memcpy(where, error->where, sizeof where);
    llmpar_error_clear(error);
    memcpy(error->where, where, sizeof where);
    error->status = status;
    memcpy(error->text, text, i + 1);
    return status;
}

LLMPAR_DEF void llmpar_error_clear(llmpar_error *error)
{
    if (!error) return;
    memset(error, 0, sizeof *error);
    error->rank = -1;
}
