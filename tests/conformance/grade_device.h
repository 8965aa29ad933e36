/* What `make grade OP=file.c` puts in front of the file: the library's declarations and the one function that the file has to define. */
#ifndef CONFORMANCE_GRADE_DEVICE_H
#define CONFORMANCE_GRADE_DEVICE_H
#include "llmpar.h"
#ifdef __cplusplus
extern "C"
#endif
void grade_patch(llmpar_device *table); /* replaces slots of *table; called once, before the first operation */
#endif
