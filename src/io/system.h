/* system: the operating system's files as a table. */
#ifndef LLMPAR_SYSTEM_H
#define LLMPAR_SYSTEM_H

#include "base/platform.h"
#include "tables/io.h"

/* POSIX calls, nothing else. Static, never changed. Local. */
LLMPAR_API const llmpar_io *llmpar_io_system(void);

#endif
