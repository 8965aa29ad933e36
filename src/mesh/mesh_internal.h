/* mesh_internal: what the files of this room share. */
#ifndef LLMPAR_MESH_INTERNAL_H
#define LLMPAR_MESH_INTERNAL_H

#include "mesh/mesh.h"

/* Appends to text[capacity] at *used like snprintf, also past the capacity: *used counts what the whole needs. */
LLMPAR__PRIVATE void llmpar__mesh_append(char *text, size_t capacity, size_t *used, const char *format, ...) LLMPAR_PRINTF(4, 5);

#endif
