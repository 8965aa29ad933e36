/* 02_tensor_parallel: a two-layer MLP cut over ranks by hand, forward and backward, with the same bits as on one rank.

   y = relu(x w1^T) w2^T. The first layer is column-parallel: a rank holds some of its output features, so of h, and needs no communication. The second is row-parallel: it holds the matching input
   features of w2, and its product is only its share of a sum over the inner dim. One all-reduce completes it. In backward it is the other way round: the gradient of x is the sum. The weights'
   gradients never travel. Shoeybi et al. 2019 (Megatron), figure 3a.

   Floating-point sums depend on their order, so ranks that simply add their shares get other bits than one rank. Here the inner dim is cut into `canon` pieces that do not depend on the ranks; each piece
   is one chain, and pieces are added in a balanced tree, of which a rank owns a subtree and the all-reduce is the rest. The program shows both. Try --tp 1, 2, 4, 8; 3 does not divide 8 pieces.

     cc -O2 -I. examples/02_tensor_parallel.c -o build/02_tensor_parallel -lpthread -lm          (or: make build/02_tensor_parallel)
     build/02_tensor_parallel --tp 4                                                                        */
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/options.h"

static const char *usage =
    "usage: 02_tensor_parallel [--tp N] [--hidden N] [--inner N] [--seq-len N] [--canon N]\n"
    "  --tp N        ranks that share the two products (default 4)\n"
    "  --hidden N    D, features of x and y (default 64)\n"
    "  --inner N     F, features between the layers, cut over the ranks (default 96)\n"
    "  --seq-len N   T, tokens a sequence, of 8 sequences (default 16)\n"
    "  --canon N     pieces of the sums over F: a power of two (default 8)\n";

enum { SEQUENCES = 8 };

/* Sizes, and what one rank got of everything: whole tensors that the second run is compared with. N = 8*T rows. */
typedef struct reference {
    int64_t rows, hidden, inner;  /* N, D, F */
    int32_t canon, keep;          /* keep: this run fills the tensors in; otherwise it compares with them */
    float *y, *dx, *dw1, *dw2;    /* [N,D], [N,D], [F,D], [D,F] */
    int64_t differ[4];            /* elements of y, dx, dw1, dw2 that the ranks together found to differ; written by rank 0 */
} reference;

/* One rank's part. f = its share of the inner dim: features [begin, begin + f) of F. */
typedef struct mlp {
    llmpar_ctx *ctx;
    llmpar_tp tp;
    llmpar_arena *arena;   /* owns all memory below */
    llmpar_stream *stream;
    int64_t rows, hidden, inner, begin, f;
    float *x, *y, *dy, *dx; /* [N,D], the same on every rank */
    float *w1, *dw1;        /* [f,D] rows of w1[F,D] */
    float *w2, *dw2;        /* [D,f] columns of w2[D,F] */
    float *h, *dh;          /* [N,f] */
    void *workspace;
    size_t workspace_bytes;
} mlp;

/* Element (row, column) of a whole tensor is a function of its name and index alone, so a rank makes only what it holds. out[rows, columns] = part of name[*, width] from (row, column) on. */
static void fill(const char *name, int64_t width, int64_t row, int64_t column, int64_t rows, int64_t columns, float *out)
{
    llmpar_rng rng = llmpar_rng_key(1, LLMPAR_RNG_USER, name, 0, 0);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) out[i * columns + j] = (float)(0.1 * llmpar_rng_normal(&rng, (uint64_t)((row + i) * width + column + j)));
}

/* An operation of our own joins the others on the stream. (It reads tensors directly: the CPU device's memory is plain memory.) */
typedef struct relu_args { int64_t count; float *x; const float *mask; } relu_args;

/* x = mask > 0 ? x : 0; with mask == x that is relu, with mask == h its backward. */
static llmpar_status relu(void *arg)
{
    const relu_args *a = (const relu_args *)arg;
    for (int64_t i = 0; i < a->count; i++)
        if (!(a->mask[i] > 0)) a->x[i] = 0;
    return LLMPAR_OK;
}

static llmpar_status enqueue_relu(const mlp *m, float *x, const float *mask)
{
    relu_args args = { m->rows * m->f, x, mask };
    return m->ctx->device->host_call(m->ctx->device, m->stream, relu, &args, sizeof args);
}

/* This rank's share of a sum over F of a[N,f] with its part of a weight. */
static llmpar_tp_operand share(const mlp *m, const float *a, const float *b, int64_t ldb)
{
    llmpar_tp_operand o;
    memset(&o, 0, sizeof o);
    o.a = a;
    o.b = b;
    o.lda = m->f;
    o.ldb = ldb;
    o.grain = o.per = 1;
    o.begin = m->begin;
    o.count = m->f;
    return o;
}

static llmpar_status forward(mlp *m)
{
    int64_t N = m->rows, D = m->hidden, f = m->f;
    llmpar_tp_operand second = share(m, m->h, m->w2, f);
    /* h[N,f] = relu(x[N,D] w1[f,D]^T): complete on every rank, whatever the cut */
    llmpar_status st = llmpar_tp_product(&m->tp, m->stream, LLMPAR_GEMM_NT, N, f, D, m->x, D, m->w1, D, m->h, f, LLMPAR_F32, m->workspace, m->workspace_bytes);
    if (!st) st = enqueue_relu(m, m->h, m->h);
    /* y[N,D] = h[N,f] w2[D,f]^T: this rank's pieces of the sum over F, added in a tree ... */
    if (!st) st = llmpar_tp_partial(&m->tp, m->stream, LLMPAR_GEMM_NT, N, D, m->inner, &second, 1, LLMPAR_F32, m->y, m->workspace, m->workspace_bytes);
    /* ... and the rest of the tree over the ranks */
    if (!st) st = llmpar_tp_reduce(&m->tp, m->stream, "y", SEQUENCES, N / SEQUENCES, D, m->y, m->y, LLMPAR_F32);
    return st;
}

static llmpar_status backward(mlp *m)
{
    int64_t N = m->rows, D = m->hidden, f = m->f;
    llmpar_tp_operand first = share(m, m->dh, m->w1, D);
    /* dw2[D,f] = dy[N,D]^T h[N,f]: one chain a sequence, a tree over sequences */
    llmpar_status st = llmpar_tp_weight_gradient(&m->tp, m->stream, N, SEQUENCES, D, f, m->dy, D, m->h, f, m->dw2, 0, LLMPAR_F32, m->workspace, m->workspace_bytes);
    /* dh[N,f] = dy[N,D] w2[D,f], where h > 0 */
    if (!st) st = llmpar_tp_product(&m->tp, m->stream, LLMPAR_GEMM_NN, N, f, D, m->dy, D, m->w2, f, m->dh, f, LLMPAR_F32, m->workspace, m->workspace_bytes);
    if (!st) st = enqueue_relu(m, m->dh, m->h);
    /* dx[N,D] = dh[N,f] w1[f,D]: again a share of a sum over F */
    if (!st) st = llmpar_tp_partial(&m->tp, m->stream, LLMPAR_GEMM_NN, N, D, m->inner, &first, 1, LLMPAR_F32, m->dx, m->workspace, m->workspace_bytes);
    if (!st) st = llmpar_tp_reduce(&m->tp, m->stream, "dx", SEQUENCES, N / SEQUENCES, D, m->dx, m->dx, LLMPAR_F32);
    /* dw1[f,D] = dh[N,f]^T x[N,D] */
    if (!st) st = llmpar_tp_weight_gradient(&m->tp, m->stream, N, SEQUENCES, f, D, m->dh, f, m->x, D, m->dw1, 0, LLMPAR_F32, m->workspace, m->workspace_bytes);
    return st;
}

static size_t largest(size_t a, size_t b) { return a > b ? a : b; }

/* Operations never allocate: they say beforehand what they need. */
static size_t workspace_bytes(const mlp *m)
{
    int64_t N = m->rows, D = m->hidden, f = m->f;
    llmpar_tp_operand first = share(m, NULL, NULL, D), second = share(m, NULL, NULL, f);
    size_t bytes = llmpar_tp_product_workspace(&m->tp, LLMPAR_GEMM_NT, N, f, D, LLMPAR_F32);
    bytes = largest(bytes, llmpar_tp_product_workspace(&m->tp, LLMPAR_GEMM_NN, N, f, D, LLMPAR_F32));
    bytes = largest(bytes, llmpar_tp_partial_workspace(&m->tp, LLMPAR_GEMM_NT, N, D, m->inner, &second, 1, LLMPAR_F32));
    bytes = largest(bytes, llmpar_tp_partial_workspace(&m->tp, LLMPAR_GEMM_NN, N, D, m->inner, &first, 1, LLMPAR_F32));
    bytes = largest(bytes, llmpar_tp_weight_gradient_workspace(&m->tp, N, SEQUENCES, D, f, LLMPAR_F32));
    return largest(bytes, llmpar_tp_weight_gradient_workspace(&m->tp, N, SEQUENCES, f, D, LLMPAR_F32));
}

static llmpar_status create(llmpar_ctx *ctx, const reference *ref, mlp *m)
{
    memset(m, 0, sizeof *m);
    m->ctx = ctx;
    m->rows = ref->rows;
    m->hidden = ref->hidden;
    m->inner = ref->inner;
    /* The world is the tp axis; a mesh (see 01_mesh) would hand out mesh->comm[LLMPAR_AXIS_TP] instead. There are no kv heads here: any number that the ranks divide. */
    llmpar_status st = llmpar_tp_init(ctx, ctx->comm, ref->canon, ctx->world, 0, &m->tp);
    if (!st) st = ctx->device->stream_create(ctx->device, "compute", &m->stream);
    if (!st) st = llmpar_arena_create(ctx, 0, &m->arena);
    if (st) return st;
    m->begin = llmpar_tp_begin(&m->tp, m->inner);
    m->f = llmpar_tp_count(&m->tp, m->inner);
    m->workspace_bytes = workspace_bytes(m);
    size_t whole = (size_t)(m->rows * m->hidden) * sizeof(float), weight = (size_t)(m->f * m->hidden) * sizeof(float), middle = (size_t)(m->rows * m->f) * sizeof(float);
    struct { float **out; size_t bytes; llmpar_tag tag; const char *label; } buffer[] = {
        { &m->x, whole, LLMPAR_TAG_ACTIVATIONS, "x" }, { &m->y, whole, LLMPAR_TAG_ACTIVATIONS, "y" }, { &m->dy, whole, LLMPAR_TAG_ACTIVATIONS, "dy" }, { &m->dx, whole, LLMPAR_TAG_ACTIVATIONS, "dx" },
        { &m->w1, weight, LLMPAR_TAG_PARAMETERS, "w1" }, { &m->w2, weight, LLMPAR_TAG_PARAMETERS, "w2" }, { &m->dw1, weight, LLMPAR_TAG_GRADIENTS, "dw1" }, { &m->dw2, weight, LLMPAR_TAG_GRADIENTS, "dw2" },
        { &m->h, middle, LLMPAR_TAG_ACTIVATIONS, "h" }, { &m->dh, middle, LLMPAR_TAG_ACTIVATIONS, "dh" }
    };
    for (size_t i = 0; i < sizeof buffer / sizeof buffer[0] && !st; i++) {
        void *memory = NULL;
        st = llmpar_arena_alloc(m->arena, buffer[i].tag, buffer[i].bytes, buffer[i].label, &memory);
        *buffer[i].out = (float *)memory;
    }
    if (!st) st = llmpar_arena_alloc(m->arena, LLMPAR_TAG_WORKSPACE, m->workspace_bytes, "workspace", &m->workspace);
    if (st) return st;
    fill("x", m->hidden, 0, 0, m->rows, m->hidden, m->x);
    fill("dy", m->hidden, 0, 0, m->rows, m->hidden, m->dy); /* as if a loss had sent it back */
    fill("w1", m->hidden, m->begin, 0, m->f, m->hidden, m->w1);
    fill("w2", m->inner, 0, m->begin, m->hidden, m->f, m->w2);
    return LLMPAR_OK;
}

/* Leaves a result in the reference, or counts the elements whose bits differ from it. part[rows, columns] stands at (row, column) of whole[*, width]. */
static int64_t keep_or_compare(int keep, float *whole, int64_t width, int64_t row, int64_t column, const float *part, int64_t rows, int64_t columns)
{
    int64_t differ = 0;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) {
            float *at = &whole[(row + i) * width + column + j];
            if (keep) *at = part[i * columns + j];
            else differ += memcmp(at, &part[i * columns + j], sizeof *at) != 0;
        }
    return differ;
}

/* Every rank runs this. */
static llmpar_status run(llmpar_ctx *ctx, void *user)
{
    reference *ref = (reference *)user;
    mlp m;
    int64_t differ[4] = { 0, 0, 0, 0 };
    llmpar_status st = create(ctx, ref, &m);
    if (!st) st = forward(&m);
    if (!st) st = backward(&m);
    if (!st) st = ctx->device->synchronize(ctx->device, m.stream);
    if (!st) {
        int keep = ref->keep;
        differ[0] = keep_or_compare(keep, ref->y, m.hidden, 0, 0, m.y, m.rows, m.hidden);
        differ[1] = keep_or_compare(keep, ref->dx, m.hidden, 0, 0, m.dx, m.rows, m.hidden);
        differ[2] = keep_or_compare(keep, ref->dw1, m.hidden, m.begin, 0, m.dw1, m.f, m.hidden);
        differ[3] = keep_or_compare(keep, ref->dw2, m.inner, 0, m.begin, m.dw2, m.hidden, m.f);
        /* Every rank looked at y and dx, and at its own part of the weights' gradients. */
        llmpar_collective sum;
        memset(&sum, 0, sizeof sum);
        sum.send = sum.recv = differ;
        sum.count = 4;
        sum.dtype = LLMPAR_I64;
        sum.tag = "differ";
        st = llmpar_all_reduce(ctx->comm, m.stream, &sum);
        if (!st) st = ctx->device->synchronize(ctx->device, m.stream);
        if (ctx->rank == 0) memcpy(ref->differ, differ, sizeof differ);
    }
    if (m.stream) ctx->device->stream_destroy(ctx->device, m.stream);
    llmpar_arena_destroy(m.arena);
    llmpar_tp_destroy(&m.tp);
    return st;
}

/* One rank, then `ranks` ranks. */
static llmpar_status compare(reference *ref, int32_t canon, int32_t ranks, llmpar_error *error)
{
    llmpar_launch_desc launch;
    memset(&launch, 0, sizeof launch);
    launch.log = quiet_log;
    launch.ranks = ref->keep = 1;
    ref->canon = canon;
    llmpar_status st = llmpar_launch(&launch, run, ref, error);
    launch.ranks = ranks;
    ref->keep = 0;
    if (!st) st = llmpar_launch(&launch, run, ref, error);
    return st;
}

/* Who holds what: one character for a block of each tensor, the digit of its rank ('a' is 10), '*' where every rank holds all. */
static void picture(const reference *ref, int ranks)
{
    static const char *const names[5] = { "x[N,D]", "w1[F,D]", "h[N,F]", "w2[D,F]", "y[N,D]" };
    static const int cut[5] = { 0, 1, 2, 2, 0 }; /* 0 whole, 1 rows, 2 columns */
    enum { HEIGHT = 8, WIDTH = 16 };
    printf("N = %lld rows, D = %lld, F = %lld, on tp = %d ranks\n\n", (long long)ref->rows, (long long)ref->hidden, (long long)ref->inner, ranks);
    for (int t = 0; t < 5; t++) printf("   %-*s", t < 4 ? WIDTH : 0, names[t]);
    for (int row = 0; row < HEIGHT; row++) {
        printf("\n");
        for (int t = 0; t < 5; t++) {
            printf("   ");
            for (int column = 0; column < WIDTH; column++) {
                int64_t at = cut[t] == 1 ? row * ref->inner / HEIGHT : column * ref->inner / WIDTH;
                int owner = 0;
                while (owner + 1 < ranks && llmpar_piece_begin(owner + 1, ref->inner, ranks) <= at) owner++;
                putchar(cut[t] ? "0123456789abcdefghijklmnopqrstuvwxyz"[owner % 36] : '*');
            }
        }
    }
    printf("\n   %-*s   %-*s   %-*s   %-*s   %s\n\n", WIDTH, "on every rank", WIDTH, "rows", WIDTH, "columns", WIDTH, "columns", "sum of all ranks");
}

static int print_result(const char *title, const reference *ref, int ranks)
{
    int64_t N = ref->rows, D = ref->hidden, F = ref->inner, all = 0;
    struct { const char *name; int64_t rows, columns, count; } line[4] = { { "y", N, D, N * D * ranks }, { "dx", N, D, N * D * ranks }, { "dw1", F, D, F * D }, { "dw2", D, F, D * F } };
    printf("%s\n", title);
    for (int i = 0; i < 4; i++) {
        if (ref->differ[i]) printf("   %-4s [%lld,%lld]: %lld of %lld compared elements differ from one rank's\n", line[i].name, (long long)line[i].rows, (long long)line[i].columns, (long long)ref->differ[i], (long long)line[i].count);
        else printf("   %-4s [%lld,%lld]: the same bits as on one rank\n", line[i].name, (long long)line[i].rows, (long long)line[i].columns);
        all += ref->differ[i];
    }
    return all != 0;
}

int main(int argc, char **argv)
{
    static const struct option longs[] = { { "tp", required_argument, NULL, 't' }, { "hidden", required_argument, NULL, 'd' }, { "inner", required_argument, NULL, 'f' }, { "seq-len", required_argument, NULL, 's' },
                                           { "canon", required_argument, NULL, 'c' }, { "help", no_argument, NULL, 'h' }, { NULL, 0, NULL, 0 } };
    long tp = 4, hidden = 64, inner = 96, seq_len = 16, canon = 8;
    int c, bad = 0;
    while (!bad && (c = getopt_long(argc, argv, "", longs, NULL)) != -1) {
        switch (c) {
        case 't': bad = option_long("--tp", optarg, 1, 64, &tp); break;
        case 'd': bad = option_long("--hidden", optarg, 1, 4096, &hidden); break;
        case 'f': bad = option_long("--inner", optarg, 1, 16384, &inner); break;
        case 's': bad = option_long("--seq-len", optarg, 1, 1024, &seq_len); break;
        case 'c': bad = option_long("--canon", optarg, 1, 64, &canon); break;
        case 'h': fputs(usage, stdout); return 0;
        default: bad = 2; /* getopt_long has said what */
        }
    }
    if (!bad && optind < argc) bad = option_error("unexpected argument \"%s\", see --help", argv[optind]);
    if (bad) return bad;
    reference ref;
    llmpar_error error;
    memset(&ref, 0, sizeof ref);
    ref.rows = SEQUENCES * seq_len;
    ref.hidden = hidden;
    ref.inner = inner;
    ref.y = (float *)malloc((size_t)(ref.rows * hidden) * sizeof(float));
    ref.dx = (float *)malloc((size_t)(ref.rows * hidden) * sizeof(float));
    ref.dw1 = (float *)malloc((size_t)(inner * hidden) * sizeof(float));
    ref.dw2 = (float *)malloc((size_t)(inner * hidden) * sizeof(float));
    int failed = !ref.y || !ref.dx || !ref.dw1 || !ref.dw2;
    if (failed) fprintf(stderr, "02_tensor_parallel: out of memory\n");
    if (!failed && compare(&ref, (int32_t)canon, (int32_t)tp, &error)) failed = print_error("02_tensor_parallel", &error);
    if (!failed) {
        char title[80];
        picture(&ref, (int)tp);
        snprintf(title, sizeof title, "sums over F in %ld pieces (tp = %ld)", canon, tp);
        /* The promise holds where ranks divide the pieces; elsewhere the result is deterministic, but one of its own. */
        failed = print_result(title, &ref, (int)tp) && canon % tp == 0;
    }
    if (!failed && tp > 1 && canon > 1) {
        if (compare(&ref, 1, (int32_t)tp, &error)) failed = print_error("02_tensor_parallel", &error);
        else print_result("\nthe usual way, for comparison: one piece a rank", &ref, (int)tp);
    }
    free(ref.y);
    free(ref.dx);
    free(ref.dw1);
    free(ref.dw2);
    return failed;
}
