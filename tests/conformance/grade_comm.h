/* What `make grade COMM=file.c` puts in front of the file: the library's declarations and the one function that the file has to define. */
#ifndef CONFORMANCE_GRADE_COMM_H
#define CONFORMANCE_GRADE_COMM_H
#include "llmpar.h"
#ifdef __cplusplus
extern "C"
#endif
void grade_patch(llmpar_comm *table); /* replaces slots of *table; called once on every rank, before the first collective */
#endif
