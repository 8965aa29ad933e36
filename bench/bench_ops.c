/* bench_ops: the operations that wait for memory, beside the triad a = b + s c on as many threads: bytes that have to move (each operand read once, each
   result written once) over time. The arrays of a call lie in memory, 200 MB and more behind those that were there before, and as many calls make a reading as move 12 MB; the worker threads are awake, as inside a step.
   Both sides do what they are read at before they are read, over more than a third-level cache of 32 MB: lines that a triad wrote would else be written back while the operation is read, and the triad would find a cache that takes all of its own.
   "L2": the arrays stay in the second-level cache, on one thread, where arithmetic may be what limits, and so does the triad. */
#include "cpu.h"
#include "peak.h"

enum { DIM = 768, COLD_ROWS = 1024, WARM_ROWS = 24, POOL_MB = 256, LEAD_MB = 48, PAIRS = 21, VOCAB = 32000 };
enum { NORM, NORM_BACKWARD, ROPE, SWIGLU, SWIGLU_BACKWARD, XENT_MAX, XENT_SUM, XENT_BACKWARD, EMBEDDING, EMBEDDING_BACKWARD, ADD, SCALE, TO_HALF, FROM_HALF, TREE2, TREE4, TREE8, COPY_ROWS, ADAMW, SGD, SQUARE_SUM, LARGEST, FACTOR_SUM, ADALOMO_SQUARE, ADALOMO, OPERATIONS };
/* bytes an element: values read and written; whether F32 alone has it; arrays that lie behind one another */
static const struct { const char *name; double values; int f32_only, arrays; } operation[OPERATIONS] = {
    {"rmsnorm, residual", 4, 0, 4}, {"rmsnorm backward", 4, 0, 4}, {"rope", 2, 0, 1}, {"swiglu", 3, 0, 3}, {"swiglu backward", 6, 0, 3}, {"xent max", 1, 0, 1}, {"xent sum", 1, 0, 1}, {"xent backward", 2, 0, 1}, {"embedding", 2, 0, 2}, {"embedding backward", 2, 0, 4},
    {"add", 3, 0, 3}, {"scale", 2, 0, 1}, {"cast to bf16", 1.5, 1, 2}, {"cast from bf16", 1.5, 1, 2}, {"tree sum of 2", 3, 1, 3}, {"tree sum of 4", 5, 1, 5}, {"tree sum of 8", 9, 1, 9}, {"copy rows", 2, 0, 2}, {"adamw", 7, 1, 4}, {"sgd with momentum", 5, 1, 3}, {"square sum", 1, 1, 1},
    {"largest", 1, 1, 1}, {"factor sum", 1, 1, 1}, {"adalomo square", 1, 1, 1}, {"adalomo", 3, 1, 2},
};

typedef struct ops_case {
    llmpar_device *device;
    char *pool;
    float *w;                   /* DIM weights, or factors of columns; then of rows */
    int32_t *ids;
    void *workspace;
    size_t workspace_bytes, at, span;
    int op, lead, repeat, warm;
    int64_t rows;
    llmpar_dtype dtype;
} ops_case;

static void ops_call(ops_case *c, char *base)
{
    llmpar_device *d = c->device;
    int64_t n = c->rows * DIM;
    int xent = c->op == XENT_MAX || c->op == XENT_SUM || c->op == XENT_BACKWARD;
    size_t size = llmpar_dtype_size(c->dtype), step = (size_t)n * size;
    char *x[9];
    double largest = 4;
    llmpar_status status = LLMPAR_OK;
    for (int i = 0; i < 9; i++) x[i] = base + (size_t)i * step;
    float *row_values = c->w + 2 * VOCAB;
    if (c->op == NORM) {
        llmpar_rmsnorm_args a;
        memset(&a, 0, sizeof a);
        a.rows = c->rows; a.dim = DIM; a.x = x[0]; a.residual = x[1]; a.sum = x[2]; a.y = x[3]; a.w = c->w; a.rstd = row_values; a.eps = 1e-5; a.dtype = c->dtype;
        status = d->rmsnorm(d, NULL, &a);
    } else if (c->op == NORM_BACKWARD) {
        llmpar_rmsnorm_backward_args a;
        memset(&a, 0, sizeof a);
        a.tokens.batch = a.tokens.leaves = 1; a.tokens.t = a.tokens.t_total = c->rows; a.tokens.canon = 8; a.dim = DIM; a.dtype = c->dtype;
        a.dy = x[0]; a.x = x[1]; a.dresidual = x[2]; a.dx = x[3]; a.w = c->w; a.rstd = row_values; a.dw_leaves = c->w + VOCAB;
        status = d->rmsnorm_backward(d, NULL, &a);
    } else if (c->op == ROPE) {
        llmpar_rope_args a;
        memset(&a, 0, sizeof a);
        a.batch = 1; a.t = c->rows; a.heads = DIM / 64; a.ld = DIM; a.head_dim = 64; a.x = x[0]; a.cosine = (float *)c->workspace; a.sine = (float *)c->workspace + 32 * COLD_ROWS; a.dtype = c->dtype;
        status = d->rope(d, NULL, &a);
    } else if (c->op == SWIGLU) {
        llmpar_swiglu_args a;
        memset(&a, 0, sizeof a);
        a.rows = c->rows; a.dim = a.ld_in = a.ld_out = DIM; a.gate = x[0]; a.up = x[1]; a.h = x[2]; a.dtype = c->dtype;
        status = d->swiglu(d, NULL, &a);
    } else if (c->op == SWIGLU_BACKWARD) { /* as the model does: all in place */
        llmpar_swiglu_backward_args a;
        memset(&a, 0, sizeof a);
        a.rows = c->rows; a.dim = a.ld_in = a.ld_out = DIM; a.gate = a.dgate = x[0]; a.up = a.dup = x[1]; a.dh = a.h = x[2]; a.dtype = c->dtype;
        status = d->swiglu_backward(d, NULL, &a);
    } else if (xent) {
        llmpar_xent_backward_args g;
        llmpar_xent_args *a = &g.forward;
        memset(&g, 0, sizeof g);
        a->v_local = a->v_total = a->ld = c->rows == WARM_ROWS ? n : VOCAB; a->rows = n / a->ld; a->canon = 8; a->logits = x[0]; a->targets = c->ids; a->max = row_values; a->target_logit = row_values + 64; a->sum = row_values + 128; a->dtype = c->dtype;
        g.scale = 1;
        status = c->op == XENT_MAX ? d->xent_max(d, NULL, a) : c->op == XENT_SUM ? d->xent_sum(d, NULL, a) : d->xent_backward(d, NULL, &g);
    } else if (c->op == EMBEDDING) {
        llmpar_embedding_args a;
        memset(&a, 0, sizeof a);
        a.rows = a.v_local = c->rows; a.dim = DIM; a.ids = c->ids; a.table = x[0]; a.out = x[1]; a.dtype = c->dtype;
        status = d->embedding(d, NULL, &a);
    } else if (c->op == EMBEDDING_BACKWARD) { /* of a table as large as the batch */
        llmpar_embedding_backward_args a;
        memset(&a, 0, sizeof a);
        a.tokens.batch = a.tokens.leaves = 1; a.tokens.t = a.tokens.t_total = c->rows; a.tokens.canon = 8; a.dim = DIM; a.v_local = c->rows; a.ids = c->ids; a.dout = x[0]; a.dtable = x[1] + (c->dtype == LLMPAR_BF16 ? step : 0); a.dtype = c->dtype;
        a.workspace = c->workspace; a.workspace_bytes = c->workspace_bytes;
        status = d->embedding_backward(d, NULL, &a);
    } else if (c->op == ADD) {
        llmpar_add_args a;
        a.count = (size_t)n; a.a = x[0]; a.b = x[1]; a.out = x[2]; a.dtype = c->dtype;
        status = d->add(d, NULL, &a);
    } else if (c->op == SCALE) {
        llmpar_scale_args a;
        a.count = (size_t)n; a.x = x[0]; a.factor = -1; a.dtype = c->dtype;
        status = d->scale(d, NULL, &a);
    } else if (c->op == TO_HALF || c->op == FROM_HALF) {
        llmpar_cast_args a;
        a.count = (size_t)n; a.in = x[0]; a.out = x[1]; a.in_dtype = c->op == TO_HALF ? LLMPAR_F32 : LLMPAR_BF16; a.out_dtype = c->op == TO_HALF ? LLMPAR_BF16 : LLMPAR_F32;
        status = d->cast(d, NULL, &a);
    } else if (c->op == TREE2 || c->op == TREE4 || c->op == TREE8) {
        llmpar_tree_sum_args a;
        a.in = (const void *const *)x; a.n = c->op == TREE2 ? 2 : c->op == TREE4 ? 4 : 8; a.count = (size_t)n; a.out = x[a.n]; a.dtype = c->dtype;
        status = d->tree_sum(d, NULL, &a);
    } else if (c->op == COPY_ROWS) {
        llmpar_copy_rows_args a;
        a.rows = c->rows; a.width = a.ld_in = a.ld_out = DIM; a.size = size; a.in = x[0]; a.out = x[1];
        status = d->copy_rows(d, NULL, &a);
    } else if (c->op == ADAMW) {
        llmpar_adamw_args a;
        memset(&a, 0, sizeof a);
        a.count = (size_t)n; a.p = x[0]; a.g = x[1]; a.m = x[2]; a.v = x[3]; a.lr = 1e-6; a.beta1 = 0.9; a.beta2 = 0.95; a.eps = 1e-8; a.correction1 = a.correction2 = 0.5; a.grad_scale = 1; a.dtype = c->dtype;
        status = d->adamw(d, NULL, &a);
    } else if (c->op == SGD) {
        llmpar_sgd_args a;
        memset(&a, 0, sizeof a);
        a.count = (size_t)n; a.p = x[0]; a.g = x[1]; a.m = x[2]; a.lr = 1e-6; a.momentum = 0.9; a.grad_scale = 1; a.dtype = c->dtype;
        status = d->sgd(d, NULL, &a);
    } else if (c->op == SQUARE_SUM) {
        int64_t accumulator[LLMPAR_EXACT_SUM_LIMBS] = { 0 };
        llmpar_square_sum_args a;
        a.count = (size_t)n; a.x = x[0]; a.accumulator = accumulator; a.dtype = c->dtype;
        status = d->square_sum(d, NULL, &a);
    } else if (c->op == LARGEST) {
        llmpar_largest_args a;
        a.count = (size_t)n; a.x = x[0]; a.largest = &largest; a.dtype = c->dtype;
        status = d->largest(d, NULL, &a);
    } else if (c->op == FACTOR_SUM) {
        static int64_t sums[COLD_ROWS + DIM];
        llmpar_factor_sum_args a;
        memset(&a, 0, sizeof a);
        memset(sums, 0, sizeof sums);
        a.count = n; a.cols = DIM; a.g = x[0]; a.row_sums = sums; a.col_sums = sums + COLD_ROWS; a.row_bits = a.col_bits = 40; a.largest = &largest; a.grad_scale = 1; a.dtype = c->dtype;
        status = d->factor_sum(d, NULL, &a);
    } else {
        int64_t squares[LLMPAR_EXACT_SUM_LIMBS] = { 0 };
        llmpar_adalomo_args a;
        memset(&a, 0, sizeof a);
        a.count = a.elements = n; a.cols = DIM; a.p = x[0]; a.g = x[1]; a.row_factor = row_values; a.col_factor = c->w; a.update_squares = squares; a.param_squares = squares; a.lr = 1e-6; a.grad_scale = 1; a.beta = 0.9; a.eps = 1e-30; a.dtype = c->dtype;
        status = c->op == ADALOMO ? d->adalomo(d, NULL, &a) : d->adalomo_square(d, NULL, &a);
    }
    if (status) { fprintf(stderr, "bench_ops: %s: %s\n", operation[c->op].name, d->error->text); exit(1); }
}

static double ops_run(void *user)
{
    ops_case *c = (ops_case *)user;
    double bytes = operation[c->op].values * (double)(c->rows * DIM) * (double)llmpar_dtype_size(c->dtype), start = 0;
    llmpar_scale_args wake;
    wake.count = 3 * VOCAB; wake.x = c->w; wake.factor = 1; wake.dtype = LLMPAR_F32;
    c->device->scale(c->device, NULL, &wake);
    start = bench_now();
    if (c->dtype == LLMPAR_BF16 && c->op == EMBEDDING_BACKWARD) bytes *= 1.5; /* the gradient is f32 */
    for (int i = -c->lead; i < c->repeat; i++) {
        if (!i) start = bench_now();
        if (!c->warm) {
            c->at += c->span;
            if (c->at + c->span > (size_t)POOL_MB << 20) c->at = 0;
        }
        ops_call(c, c->pool + c->at);
    }
    return bytes * c->repeat / (bench_now() - start);
}

static double ops_triad(void *user)
{
    bench_memory_of *memory = (bench_memory_of *)user;
    for (size_t done = 0; done < (size_t)LEAD_MB << 20; done += memory->slice * (size_t)memory->threads) bench_triad(memory);
    return bench_triad(memory);
}

/* The triad in three arrays of the size that the operations have there. */
static double ops_cached(void *user)
{
    bench_walk walk;
    double start = bench_now(), bytes = 0, seconds;
    walk.base = (char *)user;
    walk.bytes = (size_t)3 * WARM_ROWS * DIM * sizeof(float);
    do {
        for (int i = 0; i < 8; i++) {
            if (bench_memory_wide()) bench_triad_wide(&walk); else bench_triad_plain(&walk);
            bytes += (double)walk.bytes;
        }
        seconds = bench_now() - start;
    } while (seconds < BENCH_SLICE);
    return bytes / seconds;
}

static void ops_fill(char *pool, llmpar_dtype dtype)
{
    uint32_t state = 1;
    size_t size = llmpar_dtype_size(dtype);
    for (size_t i = 0; i < ((size_t)POOL_MB << 20) / size; i++) {
        state = state * 1664525u + 1013904223u;
        float x = (float)(state >> 8) / 16777216.0f + 0.001f; /* positive: AdamW's v is */
        if (dtype == LLMPAR_F32) ((float *)(void *)pool)[i] = x;
        else ((uint16_t *)(void *)pool)[i] = llmpar_f32_to_bf16(x);
    }
}

static const char usage[] =
    "bench_ops [--json FILE] [LEVEL] [f32|bf16] [OPERATION]\n"
    "Without arguments: the table, of every level but portable.\n"
    "  --json FILE   the table as JSON, too\n"
    "  LEVEL         portable, avx2, avx512 or avx512bf16, as far as this processor has it\n"
    "  OPERATION     one line of the table, as \"swiglu backward\"\n";

int main(int argc, char **argv)
{
    bench_results results;
    llmpar_cpu_level only = LLMPAR_CPU_DEFAULT;
    const char *name = NULL, *type = NULL;
    int only_f32 = 0;
    char *pool = NULL;
    float *w = (float *)calloc(3 * VOCAB, sizeof *w);
    int32_t *ids = (int32_t *)calloc(VOCAB, sizeof *ids);
    bench_open(&results, "ops", &argc, argv, usage, 3);
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "f32") || !strcmp(argv[i], "bf16")) type = argv[i];
        else if (llmpar_cpu_level_parse(argv[i], &only)) bench_level("LEVEL", argv[i]);
        else {
            int op = 0;
            while (op < OPERATIONS && strcmp(argv[i], operation[op].name)) op++;
            if (op == OPERATIONS) bench_refuse("argument", argv[i], "a level, f32, bf16 or the name of an operation, see --help");
            name = argv[i];
            only_f32 = operation[op].f32_only;
        }
    }
    if (only_f32 && type && strcmp(type, "f32")) bench_refuse(name, type, "f32, its only type");
    if (!w || !ids) return 1;
    pool = bench_memory(POOL_MB, 1).base;
    for (int i = 0; i < 3 * VOCAB; i++) w[i] = 1 + (float)(i % 17) / 16;
    for (int level = (int)LLMPAR_CPU_PORTABLE; level <= (int)llmpar_cpu_best_level(); level++) {
        if (only == LLMPAR_CPU_DEFAULT ? level == (int)LLMPAR_CPU_PORTABLE && llmpar_cpu_best_level() != LLMPAR_CPU_PORTABLE : level != (int)only) continue;
        for (int threads = 1; threads <= bench_cores(); threads = threads == 1 && bench_cores() > 1 ? bench_cores() : bench_cores() + 1) {
            bench_memory_of memory = bench_memory(256, threads);
            llmpar_heap heap;
            llmpar_error error;
            llmpar_cpu_desc desc;
            ops_case c;
            memset(&c, 0, sizeof c);
            memset(&desc, 0, sizeof desc);
            llmpar_heap_init(&heap, NULL);
            llmpar_error_clear(&error);
            desc.level = (llmpar_cpu_level)level;
            desc.threads = threads;
            desc.processors = bench_places(threads);
            if (llmpar_cpu_create(&heap, &error, &desc, &c.device)) { fprintf(stderr, "bench_ops: %s\n", error.text); return 1; }
            c.pool = pool;
            c.w = w;
            c.ids = ids;
            c.workspace_bytes = 1 << 20;
            c.workspace = calloc(1, c.workspace_bytes);
            for (int half = 0; half < 2; half++) {
                c.dtype = half ? LLMPAR_BF16 : LLMPAR_F32;
                for (int i = 0; i < 64 * COLD_ROWS; i++) ((float *)c.workspace)[i] = i < 32 * COLD_ROWS ? 0.8f : 0.6f; /* an embedding's gradient has sorted in it */
                if (type && strcmp(type, llmpar_dtype_name(c.dtype))) continue;
                for (c.op = 0; c.op < OPERATIONS; c.op++)
                    for (int warm = 0; warm < 2; warm++) {
                        char line[120];
                        bench_ratio r;
                        if ((half && operation[c.op].f32_only) || (name && strcmp(name, operation[c.op].name)) || (warm && (threads > 1 || c.op == TREE8))) continue;
                        ops_fill(pool, c.dtype);
                        c.rows = warm ? WARM_ROWS : half ? 2 * COLD_ROWS : COLD_ROWS;
                        for (int i = 0; i < VOCAB; i++) ids[i] = (int32_t)((uint32_t)i * 709u % (uint32_t)c.rows);
                        c.span = (size_t)(c.rows * DIM) * (size_t)operation[c.op].arrays * llmpar_dtype_size(c.dtype);
                        c.at = 0;
                        c.warm = warm;
                        c.repeat = warm ? 100 : 1 + (int)(12e6 / (operation[c.op].values * 4 * COLD_ROWS * DIM));
                        c.lead = warm ? 0 : 1 + (int)(((size_t)LEAD_MB << 20) / c.span);
                        r = warm ? bench_pairs(ops_cached, pool + c.span, ops_run, &c, PAIRS) : bench_pairs(ops_triad, &memory, ops_run, &c, PAIRS);
                        snprintf(line, sizeof line, "%s %s %s%s, %d thread%s", llmpar_cpu_level_name((llmpar_cpu_level)level), llmpar_dtype_name(c.dtype), operation[c.op].name, warm ? ", L2" : "", threads, threads > 1 ? "s" : "");
                        bench_row(&results, line, "GB/s", 1e-9, warm ? "triad in L2" : "triad", r, warm || level != (int)llmpar_cpu_best_level() ? 0 : 0.8);
                    }
            }
            llmpar_cpu_destroy(c.device);
            free(c.workspace);
            free(memory.base);
        }
    }
    bench_close(&results);
    free(pool);
    free(w);
    free(ids);
    return 0;
}
