/* What tests/package.sh builds in every way that a project can take llmpar in; valid as C99 and as C++11. Two ranks tell each other their coordinates, and rank 0 says which version it was built with.
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
    llmpar_collective call;
    llmpar_status status;
    int64_t mine = 0, all[2] = { 0, 0 };

    memset(&desc, 0, sizeof desc);
    memset(&call, 0, sizeof call);
    desc.tp = 2;
    status = llmpar_mesh_create(ctx, &desc, &mesh);
    if (!status) {
        mine = mesh->coordinate[LLMPAR_AXIS_TP];
        call.send = &mine;
        call.recv = all;
        call.count = 1;
        call.dtype = LLMPAR_I64;
        status = llmpar_all_gather(mesh->comm[LLMPAR_AXIS_TP], NULL, &call);
    }
    if (!status && ctx->rank == 0) snprintf((char *)user, 80, "llmpar %s, ranks at tp=%d and tp=%d", LLMPAR_VERSION, (int)all[0], (int)all[1]);
    llmpar_mesh_destroy(mesh);
    return status;
}

int main(void)
{
    llmpar_launch_desc desc;
    llmpar_error error;
    char text[80] = "";

#ifdef EXPECT_MPI
    int major, minor;
    if (MPI_Get_version(&major, &minor) != MPI_SUCCESS) return 2; /* links */
#endif
    memset(&desc, 0, sizeof desc);
    desc.ranks = 2;
    if (llmpar_launch(&desc, meet, text, &error)) {
        fprintf(stderr, "%s\n", error.text);
        return 1;
    }
    if (text[0]) puts(text);
    return 0;
}
