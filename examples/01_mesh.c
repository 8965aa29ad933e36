/* 01_mesh: which rank sits where on a 2D mesh, and which part of each tensor it holds.

   Ranks are named by their coordinates on axes: "tp" (tensor parallel, innermost) and "dp_shard" (fully sharded data parallel), and "dp_replicate" outside. A tensor says how each axis treats it, in the order
   of cutting: first tp shards one dim, then dp_shard takes its share of what is left. The program prints pictures of that. Then it brings every tensor from its parts to the whole, and one from rows to columns, by plans that
   say beforehand which collectives they take and how many bytes these send; and checks each element.

     cc -O2 -I. examples/01_mesh.c -o build/01_mesh -lpthread -lm          (or: make build/01_mesh)
     build/01_mesh --dp-shard 2 --tp 2 --svg mesh.svg                                                       */
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/options.h"

static const char *usage =
    "usage: 01_mesh [--dp-replicate N] [--dp-shard N] [--tp N] [--rows N] [--cols N] [--rank N] [--svg FILE] [--lockstep]\n"
    "  --dp-replicate N   copies of the sharded model (default 1)\n"
    "  --dp-shard N       ranks that share one copy's parameters (default 2)\n"
    "  --tp N             ranks that share every matrix product (default 2)\n"
    "  --rows N --cols N  size of the weight matrices in the pictures (default 12 x 16)\n"
    "  --rank N           which rank draws the pictures (default 0)\n"
    "  --svg FILE         also draws the column-parallel weight as SVG\n"
    "  --lockstep         run one rank at a time, switching at collectives (for a debugger)\n";

typedef struct options { llmpar_mesh_desc mesh; int64_t rows, cols; int32_t rank; const char *svg; } options;

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

static int64_t elements_of(const llmpar_dtensor *t) { return t->shape[0] * (t->dims == 2 ? t->shape[1] : 1); }

/* Elements of the buffer in which this rank keeps its part: with Flat its whole shard of the unit. */
static int64_t local_elements(const llmpar_dtensor *t, const llmpar_mesh *mesh)
{
    llmpar_local local;
    const llmpar_placement *last = &t->placement[t->placements - 1];
    if (t->placements && last->kind == LLMPAR_FLAT) return last->unit_elements / mesh->degree[last->axis];
    llmpar_dtensor_local(t, mesh->degree, mesh->coordinate, &local);
    return local.elements;
}

/* Cuts a tensor of known values into the parts of `from`, brings them to those of `to`, and compares them with the tensor cut that way. */
static llmpar_status move(llmpar_ctx *ctx, llmpar_mesh *mesh, const llmpar_dtensor *from, const llmpar_dtensor *to, int print)
{
    llmpar_redistribute_plan plan;
    llmpar_status st = llmpar_redistribute_plan_make(from, to, mesh->degree, &plan, &ctx->error);
    if (st) return st;
    if (print) {
        char text[2000];
        llmpar_redistribute_plan_print(&plan, text, sizeof text);
        printf("%s\n", text);
    }
    size_t whole_count = (size_t)elements_of(from), in_count = (size_t)local_elements(from, mesh), out_count = (size_t)local_elements(to, mesh);
    float *whole = (float *)llmpar_heap_alloc(&ctx->heap, whole_count, sizeof *whole), *in = (float *)llmpar_heap_zalloc(&ctx->heap, in_count, sizeof *in);
    float *out = (float *)llmpar_heap_zalloc(&ctx->heap, out_count, sizeof *out), *want = (float *)llmpar_heap_zalloc(&ctx->heap, out_count, sizeof *want);
    float *scratch = (float *)llmpar_heap_alloc(&ctx->heap, (size_t)llmpar_redistribute_scratch(&plan, mesh->coordinate), sizeof *scratch);
    if (!whole || !in || !out || !want || !scratch) st = llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "01_mesh: no memory for %s", from->name);
    if (!st) {
        for (size_t i = 0; i < whole_count; i++) whole[i] = (float)i;
        llmpar_dtensor_cut(from, mesh, whole, in);
        llmpar_dtensor_cut(to, mesh, whole, want);
        st = llmpar_redistribute(&plan, mesh, NULL, in, scratch, out);
        for (size_t i = 0; i < out_count && !st; i++)
            if (out[i] != want[i]) st = llmpar_fail(ctx, LLMPAR_ERR_INTERNAL, "01_mesh: element %lu of %s is %g, expected %g", (unsigned long)i, from->name, (double)out[i], (double)want[i]);
    }
    llmpar_heap_free(&ctx->heap, whole);
    llmpar_heap_free(&ctx->heap, in);
    llmpar_heap_free(&ctx->heap, out);
    llmpar_heap_free(&ctx->heap, want);
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

static llmpar_status draw_tensor(llmpar_ctx *ctx, const llmpar_dtensor *w, const llmpar_mesh *mesh, const char *path)
{
    size_t bytes = llmpar_dtensor_svg(w, mesh, NULL, 0);
    char *text = (char *)malloc(bytes + 1);
    FILE *file = text ? fopen(path, "w") : NULL;
    if (text) llmpar_dtensor_svg(w, mesh, text, bytes + 1);
    int fine = file && fwrite(text, 1, bytes, file) == bytes;
    if (file && fclose(file)) fine = 0;
    free(text);
    return fine ? LLMPAR_OK : llmpar_fail(ctx, LLMPAR_ERR_IO, "%s: cannot write: %s", path, strerror(errno));
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
        if (o->svg) st = draw_tensor(ctx, &w[1], mesh, o->svg);
    }
    /* Each to the whole tensor on every rank; then the matrix from rows to columns of the tp ranks. */
    llmpar_dtensor whole[3], columns = w[1];
    for (int i = 0; i < 3 && !st; i++) {
        whole[i] = w[i];
        whole[i].placements = 0;
        st = move(ctx, mesh, &w[i], &whole[i], ctx->rank == o->rank);
    }
    columns.placements = w[1].placements = 1;
    columns.placement[0].dim = 1;
    if (!st) st = move(ctx, mesh, &w[1], &columns, ctx->rank == o->rank);

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
        printf("every tensor is where it should be on %d ranks; the tp communicator counts %lld of them, the data-parallel one %lld\n", (int)ctx->world, (long long)members[0], (long long)members[1]);
    llmpar_mesh_destroy(mesh);
    return st;
}

int main(int argc, char **argv)
{
    static const struct option longs[] = { { "dp-replicate", required_argument, NULL, 'R' }, { "dp-shard", required_argument, NULL, 's' }, { "tp", required_argument, NULL, 't' },
                                           { "rows", required_argument, NULL, 'r' }, { "cols", required_argument, NULL, 'c' }, { "rank", required_argument, NULL, 'k' },
                                           { "svg", required_argument, NULL, 'v' }, { "lockstep", no_argument, NULL, 'l' }, { "help", no_argument, NULL, 'h' }, { NULL, 0, NULL, 0 } };
    options o;
    llmpar_launch_desc launch;
    llmpar_error error;
    long replicate = 1, shard = 2, tp = 2, rows = 12, cols = 16, rank = 0;
    int c, bad = 0;
    memset(&launch, 0, sizeof launch);
    memset(&o, 0, sizeof o);
    while (!bad && (c = getopt_long(argc, argv, "h", longs, NULL)) != -1) {
        switch (c) {
        case 'R': bad = option_long("--dp-replicate", optarg, 1, 64, &replicate); break;
        case 's': bad = option_long("--dp-shard", optarg, 1, 64, &shard); break;
        case 't': bad = option_long("--tp", optarg, 1, 64, &tp); break;
        case 'r': bad = option_long("--rows", optarg, 1, 4096, &rows); break;
        case 'c': bad = option_long("--cols", optarg, 1, 4096, &cols); break;
        case 'k': bad = option_long("--rank", optarg, 0, 255, &rank); break;
        case 'v': o.svg = optarg; break;
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
    o.mesh.dp_replicate = (int32_t)replicate;
    o.mesh.dp_shard = (int32_t)shard;
    o.mesh.tp = (int32_t)tp;
    o.rows = rows;
    o.cols = cols;
    o.rank = (int32_t)rank;
    launch.ranks = (int32_t)ranks;
    return llmpar_launch(&launch, rank_main, &o, &error) ? print_error("01_mesh", &error) : 0;
}
