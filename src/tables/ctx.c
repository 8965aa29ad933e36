/* ctx: failing with a text, and logging. */
#include "tables/ctx.h"

#include "tables/device.h"

#include <stdarg.h>
#include <stdio.h>

LLMPAR_DEF llmpar_status llmpar_fail(llmpar_ctx *ctx, llmpar_status status, const char *format, ...)
{
    llmpar_error *error = llmpar_device_thread_error(ctx->device, &ctx->error);
    if (error->status != LLMPAR_OK) return status;
    char text[sizeof ctx->error.text + 8]; /* a little longer, so that error_set sees that it must cut */
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    llmpar_error_set(error, status, "%s", text);
    error->rank = ctx->rank;
    return status;
}

LLMPAR_DEF const char *llmpar_last_error(const llmpar_ctx *ctx)
{
    return ctx->error.status != LLMPAR_OK ? ctx->error.text : "";
}

LLMPAR_DEF void llmpar_log(llmpar_ctx *ctx, llmpar_log_level level, const char *format, ...)
{
    if (!ctx->log) return;
    char line[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    ctx->log(ctx->log_user, ctx->rank, level == LLMPAR_LOG_DEFAULT ? LLMPAR_LOG_INFO : level, line);
}
