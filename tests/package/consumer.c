/* What tests/package.sh builds in every way that a project can take llmpar in; valid as C99 and as C++11. Two ranks meet on a mesh, and the program says which version it was built with.
   With OWN_IMPLEMENTATION the functions are in this file, else they come from an object or a library. */
#ifdef OWN_IMPLEMENTATION
#define LLMPAR_IMPLEMENTATION
#endif
#include "llmpar.h"
#include <stdio.h>
#include <string.h>
#ifdef EXPECT_MPI
#ifndef LLMPAR_USE_MPI
#error "LLMPAR_USE_MPI is not defined"
#endif
#include <mpi.h>
#endif

static llmpar_status meet(llmpar_ctx *ctx, void *user)
{
    llmpar_mesh_desc desc;
    llmpar_mesh *mesh = NULL;
    llmpar_status status;

    memset(&desc, 0, sizeof desc);
    desc.tp = 2;
    status = llmpar_mesh_create(ctx, &desc, &mesh);
    if (!status) ((int *)user)[ctx->rank] = mesh->coordinate[LLMPAR_AXIS_TP] + 1;
    llmpar_mesh_destroy(mesh);
    return status;
}

int main(void)
{
    llmpar_launch_desc desc;
    llmpar_error error;
    int met[2] = { 0, 0 };

#ifdef EXPECT_MPI
    int major, minor;
    if (MPI_Get_version(&major, &minor) != MPI_SUCCESS) return 2;
#endif
    memset(&desc, 0, sizeof desc);
    desc.ranks = 2;
    if (llmpar_launch(&desc, meet, met, &error)) {
        fprintf(stderr, "%s\n", error.text);
        return 1;
    }
    printf("llmpar %s, ranks at tp=%d and tp=%d\n", LLMPAR_VERSION, met[0] - 1, met[1] - 1);
    return 0;
}
