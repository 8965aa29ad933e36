/* 01_mesh: which rank sits where on a 2D mesh, and which part of each tensor it holds.

   Ranks are named by their coordinates on axes: "tp" (tensor parallel, innermost) and "dp_shard" (fully sharded data parallel), and "dp_replicate" outside. A tensor says how each axis treats it, in the order
   of cutting: first tp shards one dim, then dp_shard takes its share of what is left. The program prints pictures of that, then makes every tensor whole again from the parts and checks each element.

     cc -O2 -I. examples/01_mesh.c -o build/01_mesh -lpthread -lm          (or: make build/01_mesh)
     build/01_mesh --dp-shard 2 --tp 2                                                                      */
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/options.h"

static const char *usage =
    "usage: 01_mesh [--dp-replicate N] [--dp-shard N] [--tp N] [--rows N] [--cols N] [--rank N] [--lockstep]\n"
    "  --dp-replicate N   copies of the sharded model (default 1)\n"
    "  --dp-shard N       ranks that share one copy's parameters (default 2)\n"
    "  --tp N             ranks that share every matrix product (default 2)\n"
    "  --rows N --cols N  size of the weight matrices in the pictures (default 12 x 16)\n"
    "  --rank N           which rank draws the pictures (default 0)\n"
    "  --lockstep         run one rank at a time, switching at collectives (for a debugger)\n";

typedef struct options { llmpar_mesh_desc mesh; int64_t rows, cols; int32_t rank; } options;

/* A weight w[rows,cols], or w[cols] with rows 0: tp cuts dim `tp_dim` (-1: no cut), then the unit's flat buffer is cut over dp_shard. */
static llmpar_dtensor weight(const char *name, int64_t rows, int64_t cols, int tp_dim, int64_t offset, int64_t unit_elements)
{
    llmpar_dtensor w;
    memset(&w, 0, sizeof w);
    w.name = name;
    w.dtype = LLMPAR_F32;
    w.dims = rows ? 2 : 1;
    w.shape[0] = rows ? rows : cols;
    w.shape[1] = rows ? cols : 0;
    if (tp_dim >= 0) {
        w.placement[w.placements].kind = LLMPAR_SHARD;
        w.placement[w.placements].axis = LLMPAR_AXIS_TP;
        w.placement[w.placements++].dim = tp_dim;
    }
    w.placement[w.placements].kind = LLMPAR_FLAT;
    w.placement[w.placements].axis = LLMPAR_AXIS_DP_SHARD;
    w.placement[w.placements].offset = offset;
    w.placement[w.placements++].unit_elements = unit_elements;
    return w;
}

/* Cuts a tensor of known values into this rank's part, makes it whole again from all parts, and looks at every element. */
static llmpar_status round_trip(llmpar_ctx *ctx, llmpar_mesh *mesh, const llmpar_dtensor *w)
{
    int64_t n = w->shape[0] * (w->dims == 2 ? w->shape[1] : 1), shard = w->placement[w->placements - 1].unit_elements / mesh->degree[LLMPAR_AXIS_DP_SHARD], scratch_elements = llmpar_dtensor_full_scratch(w, mesh);
    float *whole = (float *)llmpar_heap_alloc(&ctx->heap, (size_t)n, sizeof *whole), *part = (float *)llmpar_heap_zalloc(&ctx->heap, (size_t)shard, sizeof *part);
    float *scratch = (float *)llmpar_heap_alloc(&ctx->heap, (size_t)scratch_elements, sizeof *scratch);
    llmpar_status st = whole && part && scratch ? LLMPAR_OK : llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "01_mesh: no memory for %s", w->name);
    if (!st) {
        for (int64_t i = 0; i < n; i++) whole[i] = (float)i;
        llmpar_dtensor_cut(w, mesh, whole, part);
        memset(whole, 0xff, (size_t)n * sizeof *whole);
        st = llmpar_dtensor_full(w, mesh, NULL, part, scratch, whole);
        for (int64_t i = 0; i < n && !st; i++)
            if (whole[i] != (float)i) st = llmpar_fail(ctx, LLMPAR_ERR_INTERNAL, "01_mesh: element %lld of %s came back as %g", (long long)i, w->name, (double)whole[i]);
    }
    llmpar_heap_free(&ctx->heap, whole);
    llmpar_heap_free(&ctx->heap, part);
    llmpar_heap_free(&ctx->heap, scratch);
    return st;
}

static void print_tensor(const llmpar_dtensor *w, const llmpar_mesh *mesh)
{
    size_t bytes = llmpar_dtensor_print(w, mesh, NULL, 0) + 1;
    char *text = (char *)malloc(bytes);
    if (!text) return;
    llmpar_dtensor_print(w, mesh, text, bytes);
    printf("%s\n", text);
    free(text);
}

/* Every rank runs this. */
static llmpar_status rank_main(llmpar_ctx *ctx, void *user)
{
    const options *o = (const options *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_status st = llmpar_mesh_create(ctx, &o->mesh, &mesh);
    if (st) return st;

    /* One unit of three parameters, one after the other in one flat buffer that is padded until dp_shard divides it; room for the largest tp part of each. */
    int64_t tp = mesh->degree[LLMPAR_AXIS_TP], shards = mesh->degree[LLMPAR_AXIS_DP_SHARD];
    int64_t column = (o->rows + tp - 1) / tp * o->cols, row = o->rows * ((o->cols + tp - 1) / tp), unit = llmpar_round_up(o->cols + column + row, shards);
    llmpar_dtensor w[3];
    w[0] = weight("norm (the same on every tp rank)", 0, o->cols, -1, 0, unit);
    w[1] = weight("wq (column-parallel: rows cut)", o->rows, o->cols, 0, o->cols, unit);
    w[2] = weight("wo (row-parallel: columns cut)", o->rows, o->cols, 1, o->cols + column, unit);

    if (ctx->rank == o->rank) {
        size_t bytes = llmpar_mesh_print(mesh, NULL, 0) + 1;
        char *text = (char *)malloc(bytes);
        if (text) {
            llmpar_mesh_print(mesh, text, bytes);
            printf("%s\nflat unit of %lld elements, %lld on each of %lld dp_shard ranks: | norm | wq | wo | padding |\n\n", text, (long long)unit, (long long)(unit / shards), (long long)shards);
        }
        free(text);
        for (int i = 0; i < 3; i++) print_tensor(&w[i], mesh);
    }
    for (int i = 0; i < 3 && !st; i++) st = round_trip(ctx, mesh, &w[i]);

    /* How many world ranks share each communicator: a sum of ones along every axis. */
    int64_t one = 1, members[2] = { 0, 0 };
    llmpar_collective sum;
    memset(&sum, 0, sizeof sum);
    sum.send = &one;
    sum.count = 1;
    sum.dtype = LLMPAR_I64;
    sum.tag = "members";
    sum.recv = &members[0];
    if (!st) st = llmpar_all_reduce(mesh->comm[LLMPAR_AXIS_TP], NULL, &sum);
    sum.recv = &members[1];
    if (!st) st = llmpar_all_reduce(mesh->dp, NULL, &sum);
    if (!st && ctx->rank == o->rank)
        printf("every tensor was cut and made whole again on %d ranks; the tp communicator counts %lld of them, the data-parallel one %lld\n", (int)ctx->world, (long long)members[0], (long long)members[1]);
    llmpar_mesh_destroy(mesh);
    return st;
}

int main(int argc, char **argv)
{
    static const struct option longs[] = { { "dp-replicate", required_argument, NULL, 'R' }, { "dp-shard", required_argument, NULL, 's' }, { "tp", required_argument, NULL, 't' },
                                           { "rows", required_argument, NULL, 'r' }, { "cols", required_argument, NULL, 'c' }, { "rank", required_argument, NULL, 'k' },
                                           { "lockstep", no_argument, NULL, 'l' }, { "help", no_argument, NULL, 'h' }, { NULL, 0, NULL, 0 } };
    options o;
    llmpar_launch_desc launch;
    llmpar_error error;
    long replicate = 1, shard = 2, tp = 2, rows = 12, cols = 16, rank = 0;
    int c, bad = 0;
    memset(&launch, 0, sizeof launch);
    while (!bad && (c = getopt_long(argc, argv, "h", longs, NULL)) != -1) {
        switch (c) {
        case 'R': bad = option_long("--dp-replicate", optarg, 1, 64, &replicate); break;
        case 's': bad = option_long("--dp-shard", optarg, 1, 64, &shard); break;
        case 't': bad = option_long("--tp", optarg, 1, 64, &tp); break;
        case 'r': bad = option_long("--rows", optarg, 1, 4096, &rows); break;
        case 'c': bad = option_long("--cols", optarg, 1, 4096, &cols); break;
        case 'k': bad = option_long("--rank", optarg, 0, 255, &rank); break;
        case 'l': launch.lockstep = 1; break;
        case 'h': fputs(usage, stdout); return 0;
        default: fputs(usage, stderr); return 2;
        }
    }
    if (bad) return bad;
    if (optind < argc) return option_error("01_mesh: unexpected argument \"%s\" (--help lists the options)", argv[optind]);
    long ranks = replicate * shard * tp;
    if (ranks > 256) return option_error("01_mesh: --dp-replicate %ld x --dp-shard %ld x --tp %ld = %ld ranks, expected at most 256 threads", replicate, shard, tp, ranks);
    if (rank >= ranks) return option_error("01_mesh: --rank %ld: expected a rank below %ld", rank, ranks);
    memset(&o, 0, sizeof o);
    o.mesh.dp_replicate = (int32_t)replicate;
    o.mesh.dp_shard = (int32_t)shard;
    o.mesh.tp = (int32_t)tp;
    o.rows = rows;
    o.cols = cols;
    o.rank = (int32_t)rank;
    launch.ranks = (int32_t)ranks;
    return llmpar_launch(&launch, rank_main, &o, &error) ? print_error("01_mesh", &error) : 0;
}
