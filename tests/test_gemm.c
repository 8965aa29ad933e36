/* gemm: every level against plain loops, byte by byte; whole and cut, at any size, offset, thread count. */
#include "test.h"
#include <math.h>

enum { MAX_SEGMENTS = 160 };

typedef struct problem {
    llmpar_gemm_args args;
    llmpar_gemm_segment segments[MAX_SEGMENTS];
    void *memory[2 * MAX_SEGMENTS];
    int memory_count;
} problem;

static uint64_t random_state = 1;
static uint32_t random_bits(void)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 33);
}
static int random_below(int n) { return (int)(random_bits() % (uint32_t)n); }
static double random_value(void) { return (double)random_bits() / 1073741824.0 - 1.0; }

/* BF16 operands come with sums in F32 here; their rounding has tests of its own (test_half_products). */
static llmpar_dtype sum_dtype(const problem *p) { return llmpar_dtype_sum(p->args.dtype); }
static double get(const void *base, int64_t i, llmpar_dtype dtype) { return dtype == LLMPAR_F64 ? ((const double *)base)[i] : dtype == LLMPAR_BF16 ? (double)llmpar_bf16_to_f32(((const uint16_t *)base)[i]) : (double)((const float *)base)[i]; }
static void set(void *base, int64_t i, llmpar_dtype dtype, double v)
{
    if (dtype == LLMPAR_F64) ((double *)base)[i] = v;
    else if (dtype == LLMPAR_BF16) ((uint16_t *)base)[i] = llmpar_f32_to_bf16((float)v);
    else ((float *)base)[i] = (float)v;
}

/* rows x width random elements at an odd address, distance ld; the gaps hold NaN, which must never reach a result */
static void *random_matrix(problem *p, int64_t rows, int64_t width, int64_t ld)
{
    size_t count = (size_t)(rows > 0 ? (rows - 1) * ld + width : 0) + 16, size = llmpar_dtype_size(p->args.dtype);
    char *memory = (char *)malloc(count * size);
    void *base = memory + size * (size_t)random_below(5);
    int64_t i, j;
    for (i = 0; i < (int64_t)count; i++) set(memory, i, p->args.dtype, (double)NAN);
    for (i = 0; i < rows; i++)
        for (j = 0; j < width; j++) set(base, i * ld + j, p->args.dtype, random_value());
    p->memory[p->memory_count++] = memory;
    return base;
}

static void problem_begin(problem *p, llmpar_gemm_kind kind, llmpar_dtype dtype, int64_t m, int64_t n, int32_t pieces)
{
    memset(p, 0, sizeof *p);
    p->args.kind = kind;
    p->args.dtype = dtype;
    p->args.out_dtype = llmpar_dtype_sum(dtype);
    p->args.m = m;
    p->args.n = n;
    p->args.pieces = pieces;
    p->args.segments = p->segments;
}

static void problem_segment(problem *p, int32_t piece, int64_t k)
{
    llmpar_gemm_segment *s = &p->segments[p->args.segment_count++];
    int64_t m = p->args.m, n = p->args.n;
    int tn = p->args.kind == LLMPAR_GEMM_TN, nt = p->args.kind == LLMPAR_GEMM_NT;
    s->piece = piece;
    s->k = k;
    s->lda = (tn ? m : k) + random_below(6);
    s->ldb = (nt ? k : n) + random_below(6);
    s->a = tn ? random_matrix(p, k, m, s->lda) : random_matrix(p, m, k, s->lda);
    s->b = nt ? random_matrix(p, n, k, s->ldb) : random_matrix(p, k, n, s->ldb);
}

static void problem_end(problem *p)
{
    int i;
    for (i = 0; i < p->memory_count; i++) free(p->memory[i]);
    p->memory_count = 0;
}

/* `pieces` pieces of up to three segments of up to max_k; some of them empty */
static void problem_random(problem *p, llmpar_gemm_kind kind, llmpar_dtype dtype, int64_t m, int64_t n, int32_t pieces, int max_k)
{
    int32_t piece;
    problem_begin(p, kind, dtype, m, n, pieces);
    for (piece = 0; piece < pieces; piece++) {
        int parts = random_below(4) == 0 ? random_below(4) : 1;
        for (; parts > 0 && p->args.segment_count < MAX_SEGMENTS; parts--) problem_segment(p, piece, random_below(8) == 0 ? 0 : random_below(max_k + 1));
    }
}

/* The tree as the definition has it. */
static double tree(const double *leaf, int64_t n, int f32)
{
    double left, right;
    if (n == 1) return leaf[0];
    left = tree(leaf, llmpar_tree_split(n), f32);
    right = tree(leaf + llmpar_tree_split(n), n - llmpar_tree_split(n), f32);
    return f32 ? (double)((float)left + (float)right) : left + right;
}

static double element_a(const problem *p, const llmpar_gemm_segment *s, int64_t i, int64_t k) { return get(s->a, p->args.kind == LLMPAR_GEMM_TN ? k * s->lda + i : i * s->lda + k, p->args.dtype); }
static double element_b(const problem *p, const llmpar_gemm_segment *s, int64_t j, int64_t k) { return get(s->b, p->args.kind == LLMPAR_GEMM_NT ? j * s->ldb + k : k * s->ldb + j, p->args.dtype); }

/* Element (i, j) in the contract's order; fused: one rounding a step, as the levels with fma; pairs: of every two k of a segment the odd one is added first,
   as units for BF16 do. `start` is c before the call. */
static double reference(const problem *p, int fused, int pairs, int64_t i, int64_t j, double start)
{
    static double leaf[4096];
    int f32 = p->args.dtype != LLMPAR_F64;
    int32_t piece, s = 0;
    for (piece = 0; piece < p->args.pieces; piece++) {
        double sum = p->args.accumulate ? start : 0;
        for (; s < p->args.segment_count && p->segments[s].piece == piece; s++) {
            int64_t k;
            for (k = 0; k < p->segments[s].k; k++) {
                int64_t at = pairs && (k ^ 1) < p->segments[s].k ? k ^ 1 : k;
                double a = element_a(p, &p->segments[s], i, at), b = element_b(p, &p->segments[s], j, at);
                if (f32 && fused) sum = (double)fmaf((float)a, (float)b, (float)sum);
                else if (f32) { volatile float product = (float)a * (float)b; sum = (double)(product + (float)sum); }
                else if (fused) sum = fma(a, b, sum);
                else { volatile double product = a * b; sum = product + sum; }
            }
        }
        leaf[piece] = sum;
    }
    return tree(leaf, p->args.pieces, f32);
}

#if defined(__aarch64__)
static int level_is_fused(llmpar_cpu_level level, llmpar_dtype dtype) { (void)level; (void)dtype; return 1; }
#else
static int level_is_fused(llmpar_cpu_level level, llmpar_dtype dtype) { return dtype != LLMPAR_F64 && level != LLMPAR_CPU_PORTABLE; }
#endif
static int level_has_pairs(llmpar_cpu_level level, llmpar_dtype dtype) { return level == LLMPAR_CPU_AVX512BF16 && dtype == LLMPAR_BF16; }

typedef struct machine { llmpar_heap heap; llmpar_error error; llmpar_device *device; llmpar_stream *stream; } machine;

static void machine_begin(machine *w, llmpar_cpu_level level, int threads)
{
    llmpar_cpu_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.level = level;
    desc.threads = threads;
    llmpar_heap_init(&w->heap, NULL);
    llmpar_error_clear(&w->error);
    CHECK_OK(llmpar_cpu_create(&w->heap, &w->error, &desc, &w->device));
    CHECK_OK(w->device->stream_create(w->device, "test", &w->stream));
}
static void machine_end(machine *w)
{
    w->device->stream_destroy(w->device, w->stream);
    llmpar_cpu_destroy(w->device);
    CHECK_INT(w->heap.live, 0);
}

/* Runs with a workspace of exactly the size asked for, at a 64-byte boundary, full of NaN; bytes behind it must survive. */
static void run(machine *w, const llmpar_gemm_args *args)
{
    llmpar_gemm_args copy = *args;
    size_t bytes = w->device->gemm_workspace(w->device, args), i;
    unsigned char *memory = (unsigned char *)malloc(bytes + 128), *base = memory + (64 - (uintptr_t)memory % 64) % 64;
    memset(memory, 0xff, bytes + 128);
    copy.workspace = base;
    copy.workspace_bytes = bytes;
    CHECK_OK(w->device->gemm(w->device, w->stream, &copy));
    for (i = 0; i < 64; i++)
        if (base[bytes + i] != 0xff) { TEST_FAIL("gemm wrote behind its workspace of %llu bytes", (unsigned long long)bytes); break; }
    free(memory);
}

/* Result of p in fresh memory of m rows with the given ld and offset; neighbours must survive. The caller frees *memory. */
static void *run_poisoned(machine *w, const problem *p, int64_t ldc, int offset, const void *start, void **memory)
{
    size_t size = llmpar_dtype_size(sum_dtype(p)), count = (size_t)(p->args.m * ldc) + 64;
    unsigned char *bytes = (unsigned char *)malloc(count * size);
    unsigned char *c = bytes + size * (size_t)(32 + offset);
    llmpar_gemm_args args = p->args;
    int64_t i, j;
    memset(bytes, 0xa5, count * size);
    for (i = 0; start && i < p->args.m; i++) memcpy(c + size * (size_t)(i * ldc), (const char *)start + size * (size_t)(i * p->args.n), size * (size_t)p->args.n);
    args.c = c;
    args.ldc = ldc;
    run(w, &args);
    for (i = 0; i < (int64_t)count; i++) {
        int64_t at = i - 32 - offset;
        int inside = at >= 0 && at / ldc < p->args.m && at % ldc < p->args.n;
        for (j = 0; !inside && j < (int64_t)size; j++)
            if (bytes[i * (int64_t)size + j] != 0xa5) { TEST_FAIL("gemm m=%d n=%d wrote outside c at element %d", (int)p->args.m, (int)p->args.n, (int)at); *memory = bytes; return c; }
    }
    *memory = bytes;
    return c;
}

/* p at this level equals the reference in every bit. */
static void check_bytes(machine *w, llmpar_cpu_level level, problem *p)
{
    int fused = level_is_fused(level, p->args.dtype), pairs = level_has_pairs(level, p->args.dtype);
    int64_t i, j, ldc = p->args.n + random_below(5);
    size_t size = llmpar_dtype_size(sum_dtype(p));
    void *memory, *start = NULL;
    const void *c;
    if (p->args.accumulate) {
        start = malloc((size_t)(p->args.m * p->args.n) * size + 1);
        for (i = 0; i < p->args.m * p->args.n; i++) set(start, i, sum_dtype(p), random_value());
    }
    c = run_poisoned(w, p, ldc, random_below(9), start, &memory);
    for (i = 0; i < p->args.m; i++)
        for (j = 0; j < p->args.n; j++) {
            double got = get(c, i * ldc + j, sum_dtype(p)), want = reference(p, fused, pairs, i, j, start ? get(start, i * p->args.n + j, sum_dtype(p)) : 0.0);
            if (memcmp(&got, &want, sizeof got)) {
                TEST_FAIL("%s %s kind %d m=%d n=%d pieces=%d segments=%d accumulate=%d: c[%d,%d] got %.9g, want %.9g", w->device->name, llmpar_dtype_name(p->args.dtype), (int)p->args.kind, (int)p->args.m, (int)p->args.n, (int)p->args.pieces,
                    (int)p->args.segment_count, p->args.accumulate, (int)i, (int)j, got, want);
                i = p->args.m;
                break;
            }
        }
    free(memory);
    free(start);
}

#define FOR_LEVELS(level) for (int level = (int)LLMPAR_CPU_PORTABLE; level <= (int)llmpar_cpu_best_level(); level++)
#define FOR_KINDS(kind) for (int kind = (int)LLMPAR_GEMM_NT; kind <= (int)LLMPAR_GEMM_TN; kind++)

/* The specification in f64 against sums in long double, and every level in f32 within the bound of its k steps. */
TEST(sums_are_right)
{
    FOR_LEVELS(level) FOR_KINDS(kind) for (int dtype = (int)LLMPAR_F32; dtype <= (int)LLMPAR_F64; dtype++) {
        machine w;
        problem p;
        void *memory;
        const void *c;
        machine_begin(&w, (llmpar_cpu_level)level, 1);
        problem_random(&p, (llmpar_gemm_kind)kind, (llmpar_dtype)dtype, 37, 53, 8, 40);
        c = run_poisoned(&w, &p, 60, 0, NULL, &memory);
        for (int64_t i = 0; i < 37; i++)
            for (int64_t j = 0; j < 53; j++) {
                long double sum = 0, size = 0;
                for (int s = 0; s < p.args.segment_count; s++)
                    for (int64_t k = 0; k < p.segments[s].k; k++) {
                        long double product = (long double)element_a(&p, &p.segments[s], i, k) * element_b(&p, &p.segments[s], j, k);
                        sum += product;
                        size += product < 0 ? -product : product;
                    }
                CHECK_NEAR(get(c, i * 60 + j, (llmpar_dtype)dtype), (double)sum, (double)size * (dtype == (int)LLMPAR_F32 ? 50 * 6e-8 : 50 * 1.2e-16));
            }
        free(memory);
        problem_end(&p);
        machine_end(&w);
    }
}

TEST(random_shapes)
{
    FOR_LEVELS(level) {
        machine w;
        machine_begin(&w, (llmpar_cpu_level)level, 1);
        for (int round = 0; round < test_rounds(160); round++) {
            static const int32_t piece_counts[] = { 1, 1, 1, 2, 3, 4, 5, 7, 8, 8, 13, 16 };
            problem p;
            int32_t pieces = piece_counts[random_below(12)];
            int64_t m = random_below(3) == 0 ? 1 + random_below(90) : 1 + random_below(30), n = random_below(3) == 0 ? 1 + random_below(150) : 1 + random_below(50);
            problem_random(&p, (llmpar_gemm_kind)(1 + round % 3), round % 8 == 7 ? LLMPAR_F64 : round % 8 == 5 ? LLMPAR_BF16 : LLMPAR_F32, m, n, pieces, pieces == 1 ? 300 : 40);
            p.args.accumulate = pieces == 1 && random_below(2);
            check_bytes(&w, (llmpar_cpu_level)level, &p);
            problem_end(&p);
        }
        machine_end(&w);
    }
}

/* More of everything than one tile, one panel or one group has, and primes, so that every block has an edge. */
TEST(primes)
{
    static const int64_t primes[] = { 17, 29, 47, 53, 97, 101, 131, 193, 211 };
    FOR_LEVELS(level) {
        machine one, two;
        machine_begin(&one, (llmpar_cpu_level)level, 1);
        machine_begin(&two, (llmpar_cpu_level)level, 2);
        for (int round = 0; round < test_rounds(10); round++) {
            problem p;
            int32_t pieces = 1 + random_below(16);
            problem_random(&p, (llmpar_gemm_kind)(1 + round % 3), round % 2 ? LLMPAR_BF16 : LLMPAR_F32, primes[random_below(9)], primes[random_below(9)], pieces, pieces == 1 ? 211 : 31);
            p.args.accumulate = pieces == 1 && random_below(2);
            check_bytes(round % 4 < 2 ? &one : &two, (llmpar_cpu_level)level, &p);
            problem_end(&p);
        }
        machine_end(&one);
        machine_end(&two);
    }
}

/* k past every cache block, cut inside and between pieces; 64 leaves of 24 rows as the token sums have them */
TEST(long_sums)
{
    static const int32_t piece_counts[] = { 1, 2, 3, 8, 64 };
    FOR_LEVELS(level) FOR_KINDS(kind) {
        machine w;
        machine_begin(&w, (llmpar_cpu_level)level, 1);
        for (int i = 0; i < test_rounds(5); i++) {
            problem p;
            problem_begin(&p, (llmpar_gemm_kind)kind, LLMPAR_F32, 13, 35, piece_counts[i]);
            for (int32_t piece = 0; piece < piece_counts[i]; piece++) problem_segment(&p, piece, i == 0 ? 2111 : 1537 / piece_counts[i]);
            check_bytes(&w, (llmpar_cpu_level)level, &p);
            p.args.accumulate = piece_counts[i] == 1;
            if (p.args.accumulate) check_bytes(&w, (llmpar_cpu_level)level, &p);
            problem_end(&p);
        }
        machine_end(&w);
    }
}

/* More rows and columns than one block in cache. Compared with blocks of the same product, whose order random_shapes has checked. */
TEST(wide_outputs)
{
    FOR_LEVELS(level) FOR_KINDS(kind) for (int32_t pieces = 1; pieces <= 8; pieces += 7) {
        machine w;
        problem p;
        void *memory;
        const float *c;
        int64_t m = kind == 1 ? 1990 : 70, n = kind == 1 ? 70 : 1100;
        float *part = (float *)malloc(64 * 64 * sizeof *part);
        machine_begin(&w, (llmpar_cpu_level)level, 1);
        problem_begin(&p, (llmpar_gemm_kind)kind, LLMPAR_F32, m, n, pieces);
        for (int32_t piece = 0; piece < pieces; piece++) problem_segment(&p, piece, 800 / pieces);
        c = (const float *)run_poisoned(&w, &p, n + 3, 1, NULL, &memory);
        for (int round = 0; round < test_rounds(40); round++) {
            problem q = p;
            q.args.segments = q.segments;
            int64_t i0 = random_below((int)m), j0 = random_below((int)n);
            q.args.m = m - i0 < 40 ? m - i0 : 1 + random_below(40);
            q.args.n = n - j0 < 40 ? n - j0 : 1 + random_below(40);
            for (int s = 0; s < q.args.segment_count; s++) {
                q.segments[s].a = (const float *)q.segments[s].a + (kind == (int)LLMPAR_GEMM_TN ? i0 : i0 * q.segments[s].lda);
                q.segments[s].b = (const float *)q.segments[s].b + (kind == (int)LLMPAR_GEMM_NT ? j0 * q.segments[s].ldb : j0);
            }
            q.args.c = part;
            q.args.ldc = 64;
            run(&w, &q.args);
            for (int64_t i = 0; i < q.args.m; i++) CHECK_BYTES(part + i * 64, c + (i0 + i) * (n + 3) + j0, (size_t)q.args.n * 4);
        }
        free(part);
        free(memory);
        problem_end(&p);
        machine_end(&w);
    }
}

/* Rows, columns and the chain cut at every position give the bytes of the whole. */
TEST(cut_everywhere)
{
    FOR_LEVELS(level) FOR_KINDS(kind) {
        enum { M = 29, N = 71, K = 45 };
        machine w;
        problem p;
        void *memory;
        const float *c;
        float part[M * N];
        int tn = kind == (int)LLMPAR_GEMM_TN, nt = kind == (int)LLMPAR_GEMM_NT;
        machine_begin(&w, (llmpar_cpu_level)level, 1);
        problem_begin(&p, (llmpar_gemm_kind)kind, LLMPAR_F32, M, N, 1);
        problem_segment(&p, 0, K);
        c = (const float *)run_poisoned(&w, &p, N, 0, NULL, &memory);
        for (int cut = 0; cut <= N; cut++) {
            for (int half = 0; half < 2; half++) {
                problem q = p; /* rows */
                q.args.segments = q.segments;
                int row = cut <= M ? cut : 0;
                q.args.m = half ? M - row : row;
                q.args.c = part + (half ? row * N : 0);
                q.args.ldc = N;
                if (half) q.segments[0].a = (const float *)q.segments[0].a + row * (tn ? 1 : q.segments[0].lda);
                run(&w, &q.args);
            }
            CHECK_BYTES(part, c, sizeof part);
            for (int half = 0; half < 2; half++) {
                problem q = p; /* columns */
                q.args.segments = q.segments;
                q.args.n = half ? N - cut : cut;
                q.args.c = part + (half ? cut : 0);
                q.args.ldc = N;
                if (half) q.segments[0].b = (const float *)q.segments[0].b + cut * (nt ? q.segments[0].ldb : 1);
                run(&w, &q.args);
            }
            CHECK_BYTES(part, c, sizeof part);
            for (int half = 0; half < 2 && cut <= K; half++) {
                problem q = p; /* the chain */
                q.args.segments = q.segments;
                q.args.accumulate = half;
                q.args.c = part;
                q.args.ldc = N;
                q.segments[0].k = half ? K - cut : cut;
                if (half) {
                    q.segments[0].a = (const float *)q.segments[0].a + cut * (tn ? q.segments[0].lda : 1);
                    q.segments[0].b = (const float *)q.segments[0].b + cut * (nt ? 1 : q.segments[0].ldb);
                }
                run(&w, &q.args);
            }
            CHECK_BYTES(part, c, sizeof part);
        }
        free(memory);
        problem_end(&p);
        machine_end(&w);
    }
}

/* The 8 pieces on 1, 2, 4, 8 ranks whose results are added as a tree; pieces have uneven lengths, several segments, one is empty. */
TEST(pieces_over_ranks)
{
    FOR_LEVELS(level) FOR_KINDS(kind) {
        enum { M = 25, N = 40 };
        static float part[8][M * N];
        machine w;
        problem p;
        void *memory;
        const float *c;
        machine_begin(&w, (llmpar_cpu_level)level, 1);
        problem_begin(&p, (llmpar_gemm_kind)kind, LLMPAR_F32, M, N, 8);
        for (int32_t piece = 0; piece < 8; piece++)
            for (int s = 0; piece != 5 && s < 2; s++) problem_segment(&p, piece, 7 * piece + 20 * s);
        c = (const float *)run_poisoned(&w, &p, N, 0, NULL, &memory);
        for (int ranks = 1; ranks <= 8; ranks *= 2) {
            for (int r = 0; r < ranks; r++) {
                problem q = p;
                q.args.segments = q.segments;
                q.args.segment_count = 0;
                q.args.pieces = 8 / ranks;
                for (int s = 0; s < p.args.segment_count; s++)
                    if (p.segments[s].piece / q.args.pieces == r) {
                        q.segments[q.args.segment_count] = p.segments[s];
                        q.segments[q.args.segment_count++].piece = p.segments[s].piece % q.args.pieces;
                    }
                q.args.c = part[r];
                q.args.ldc = N;
                run(&w, &q.args);
            }
            for (int distance = 1; distance < ranks; distance *= 2)
                for (int r = 0; r < ranks; r += 2 * distance)
                    for (int i = 0; i < M * N; i++) part[r][i] = part[r][i] + part[r + distance][i];
            CHECK_BYTES(part[0], c, sizeof part[0]);
        }
        free(memory);
        problem_end(&p);
        machine_end(&w);
    }
}

/* Few rows, weights of all pieces side by side as a model's lie: whole lines of 64 bytes and not, an empty piece, lengths that differ, and what is left behind the last line. */
TEST(pieces_side_by_side)
{
    static const int64_t lengths[3][4] = { { 32, 64, 0, 43 }, { 96, 32, 128, 64 }, { 32, 40, 16, 24 } };
    FOR_LEVELS(level) for (int half = 0; half < 2; half++) for (int l = 0; l < 3; l++) for (int64_t m = 1; m <= 16; m += 3) {
        machine w;
        problem p;
        int64_t k = 0, n = 1 + random_below(70);
        machine_begin(&w, (llmpar_cpu_level)level, 1 + random_below(2));
        problem_begin(&p, LLMPAR_GEMM_NT, half ? LLMPAR_BF16 : LLMPAR_F32, m, n, 4);
        for (int s = 0; s < 4; s++) k += lengths[l][s];
        problem_segment(&p, 0, k);
        for (int s = 0; s < 4; s++) {
            if (s) {
                p.segments[s] = p.segments[s - 1];
                p.segments[s].a = (const char *)p.segments[s].a + (size_t)p.segments[s].k * llmpar_dtype_size(p.args.dtype);
                p.segments[s].b = (const char *)p.segments[s].b + (size_t)p.segments[s].k * llmpar_dtype_size(p.args.dtype);
            }
            p.segments[s].piece = s;
            p.segments[s].k = lengths[l][s];
        }
        p.args.segment_count = 4;
        check_bytes(&w, (llmpar_cpu_level)level, &p);
        problem_end(&p);
        machine_end(&w);
    }
}

TEST(thread_counts)
{
    FOR_LEVELS(level) FOR_KINDS(kind) for (int32_t pieces = 1; pieces <= 8; pieces += 7) {
        static const int64_t shapes[][2] = { { 1, 700 }, { 100, 130 }, { 700, 5 }, { 37, 1 }, { 770, 50 }, { 1541, 50 } }; /* the last two: blocks that threads take whole */
        for (int shape = 0; shape < 6; shape++) {
            problem p;
            int64_t m = shapes[shape][0], n = shapes[shape][1];
            void *memory, *first_memory = NULL;
            const void *first = NULL;
            problem_begin(&p, (llmpar_gemm_kind)kind, LLMPAR_F32, m, n, pieces);
            for (int32_t piece = 0; piece < pieces; piece++) problem_segment(&p, piece, (shape < 4 ? 600 : 1700) / pieces);
            for (int threads = 1; threads <= 4; threads++) {
                machine w;
                const void *c;
                machine_begin(&w, (llmpar_cpu_level)level, threads);
                c = run_poisoned(&w, &p, n, 0, NULL, &memory);
                if (first) CHECK_BYTES(c, first, (size_t)(m * n) * 4);
                if (first) free(memory);
                else { first = c; first_memory = memory; }
                machine_end(&w);
            }
            free(first_memory);
            problem_end(&p);
        }
    }
}

/* A fused step may round to -0 (1e-30 * -1e-30 + 0), and the +0 of an empty piece turns that into +0: skipping the addition would show. Infinities and NaN
   stay in their own row and column. */
TEST(special_values)
{
    FOR_LEVELS(level) {
        machine w;
        problem p;
        machine_begin(&w, (llmpar_cpu_level)level, 1);
        for (int32_t empty = 0; empty < 4; empty++) {
            problem_begin(&p, LLMPAR_GEMM_NT, LLMPAR_F32, 3, 5, 4);
            for (int32_t piece = 0; piece < 4; piece++)
                if (piece != empty) problem_segment(&p, piece, 1);
            for (int s = 0; s < 3; s++) {
                for (int i = 0; i < 3; i++) ((float *)(uintptr_t)p.segments[s].a)[i * p.segments[s].lda] = 1e-30f;
                for (int j = 0; j < 5; j++) ((float *)(uintptr_t)p.segments[s].b)[j * p.segments[s].ldb] = -1e-30f;
            }
            check_bytes(&w, (llmpar_cpu_level)level, &p);
            problem_end(&p);
        }
        problem_begin(&p, LLMPAR_GEMM_NN, LLMPAR_F32, 30, 50, 1);
        problem_segment(&p, 0, 20);
        ((float *)(uintptr_t)p.segments[0].a)[13 * p.segments[0].lda + 5] = INFINITY;
        ((float *)(uintptr_t)p.segments[0].b)[5 * p.segments[0].ldb + 17] = 0;
        {
            void *memory;
            const float *c = (const float *)run_poisoned(&w, &p, 50, 0, NULL, &memory);
            for (int i = 0; i < 30; i++)
                for (int j = 0; j < 50; j++) {
                    if (i == 13 && j == 17) CHECK(isnan(c[i * 50 + j]));
                    else if (i == 13) CHECK(isinf(c[i * 50 + j]));
                    else CHECK(isfinite(c[i * 50 + j]));
                }
            free(memory);
        }
        problem_end(&p);
        machine_end(&w);
    }
}

TEST(empty_products)
{
    FOR_LEVELS(level) FOR_KINDS(kind) {
        machine w;
        problem p;
        float c[6];
        machine_begin(&w, (llmpar_cpu_level)level, 1);
        for (int i = 0; i < 6; i++) c[i] = 7;
        problem_begin(&p, (llmpar_gemm_kind)kind, LLMPAR_F32, 2, 3, 1);
        p.args.c = c;
        p.args.ldc = 3;
        p.args.accumulate = 1;
        run(&w, &p.args);
        for (int i = 0; i < 6; i++) CHECK(c[i] == 7); /* no segments: c stays */
        p.args.m = 0;
        p.args.accumulate = 0;
        run(&w, &p.args);
        p.args.m = 2;
        p.args.n = 0;
        run(&w, &p.args);
        for (int i = 0; i < 6; i++) CHECK(c[i] == 7);
        p.args.n = 3;
        p.args.pieces = 5;
        run(&w, &p.args);
        for (int i = 0; i < 6; i++) { uint32_t bits; memcpy(&bits, &c[i], 4); CHECK_INT(bits, 0); } /* no terms: +0 */
        machine_end(&w);
    }
}

static void check_refused(void (*spoil)(llmpar_gemm_args *args, llmpar_gemm_segment *segment), llmpar_status want, const char *text)
{
    machine w;
    problem p;
    float c[64];
    char *workspace;
    machine_begin(&w, LLMPAR_CPU_DEFAULT, 1);
    problem_begin(&p, LLMPAR_GEMM_NT, LLMPAR_F32, 4, 6, 2);
    problem_segment(&p, 0, 9);
    problem_segment(&p, 1, 9);
    p.args.workspace_bytes = w.device->gemm_workspace(w.device, &p.args);
    workspace = (char *)malloc(p.args.workspace_bytes + 64);
    p.args.workspace = workspace;
    p.args.c = c;
    p.args.ldc = 8;
    spoil(&p.args, p.segments);
    memset(c, 0x11, sizeof c);
    CHECK_STATUS(w.device->gemm(w.device, w.stream, &p.args), want);
    CHECK_TEXT(w.error.text, text);
    for (int i = 0; i < 64; i++) { uint32_t bits; memcpy(&bits, &c[i], 4); CHECK(bits == 0x11111111u); }
    CHECK_STATUS(w.device->synchronize(w.device, w.stream), want);
    free(workspace);
    problem_end(&p);
    machine_end(&w);
}
static void spoil_kind(llmpar_gemm_args *args, llmpar_gemm_segment *s) { (void)s; args->kind = LLMPAR_GEMM_DEFAULT; }
static void spoil_dtype(llmpar_gemm_args *args, llmpar_gemm_segment *s) { (void)s; args->dtype = LLMPAR_I32; }
static void spoil_m(llmpar_gemm_args *args, llmpar_gemm_segment *s) { (void)s; args->m = -1; }
static void spoil_ldc(llmpar_gemm_args *args, llmpar_gemm_segment *s) { (void)s; args->ldc = 5; }
static void spoil_accumulate(llmpar_gemm_args *args, llmpar_gemm_segment *s) { (void)s; args->accumulate = 1; }
static void spoil_pieces(llmpar_gemm_args *args, llmpar_gemm_segment *s) { (void)s; args->pieces = 0; }
static void spoil_k(llmpar_gemm_args *args, llmpar_gemm_segment *s) { (void)args; s[1].k = -3; }
static void spoil_order(llmpar_gemm_args *args, llmpar_gemm_segment *s) { (void)args; s[0].piece = 1; s[1].piece = 0; }
static void spoil_lda(llmpar_gemm_args *args, llmpar_gemm_segment *s) { (void)args; s[1].lda = 8; }
static void spoil_ldb(llmpar_gemm_args *args, llmpar_gemm_segment *s) { (void)args; s[0].ldb = 8; }
static void spoil_workspace(llmpar_gemm_args *args, llmpar_gemm_segment *s) { (void)s; args->workspace_bytes -= 1; }

TEST(bad_arguments)
{
    machine w;
    problem p;
    check_refused(spoil_kind, LLMPAR_ERR_ARGUMENT, "kind 0");
    check_refused(spoil_dtype, LLMPAR_ERR_UNSUPPORTED, "i32");
    check_refused(spoil_m, LLMPAR_ERR_SHAPE, "m = -1");
    check_refused(spoil_ldc, LLMPAR_ERR_SHAPE, "ldc = 5");
    check_refused(spoil_accumulate, LLMPAR_ERR_ARGUMENT, "exactly 1 piece, got 2");
    check_refused(spoil_pieces, LLMPAR_ERR_ARGUMENT, "got 0");
    check_refused(spoil_k, LLMPAR_ERR_SHAPE, "segment 1 has k = -3");
    check_refused(spoil_order, LLMPAR_ERR_ARGUMENT, "segment 1 is of piece 0");
    check_refused(spoil_lda, LLMPAR_ERR_SHAPE, "lda = 8");
    check_refused(spoil_ldb, LLMPAR_ERR_SHAPE, "ldb = 8");
    machine_begin(&w, LLMPAR_CPU_DEFAULT, 1);
    problem_begin(&p, LLMPAR_GEMM_NT, LLMPAR_F32, 4, 6, 1);
    problem_segment(&p, 0, 9);
    if (w.device->gemm_workspace(w.device, &p.args) > 0) check_refused(spoil_workspace, LLMPAR_ERR_ARGUMENT, "workspace");
    problem_end(&p);
    machine_end(&w);
}

/* A prompt's last chunk, or that of a head's logits, has any number of rows up to that for which the workspace was asked for. */
TEST(fewer_rows_need_no_more)
{
    static const int64_t most[] = { 3, 7, 9, 10, 12, 15, 40, 200, 300, 700, 1100, 2100 }, columns[] = { 100, 5000, 2100 };
    FOR_LEVELS(level) for (int draw = 0; draw < 48; draw++) {
        machine w;
        llmpar_gemm_segment segments[8];
        llmpar_gemm_args args;
        machine_begin(&w, (llmpar_cpu_level)level, 1 + draw % 3);
        memset(segments, 0, sizeof segments);
        memset(&args, 0, sizeof args);
        args.segments = segments;
        args.segment_count = args.pieces = draw / 24 ? 8 : 1;
        for (int i = 0; i < 8; i++) {
            segments[i].piece = i;
            segments[i].k = (draw % 2 ? 96 : 2053) / args.pieces;
        }
        args.n = columns[draw / 6 % 3];
        args.kind = (llmpar_gemm_kind)(1 + draw % 3);
        args.dtype = draw / 12 % 2 ? LLMPAR_BF16 : LLMPAR_F32;
        for (size_t i = 0; i < sizeof most / sizeof most[0]; i++) {
            args.m = most[i];
            size_t enough = w.device->gemm_workspace(w.device, &args), need = 0;
            for (args.m = 1; args.m < most[i] && need <= enough; args.m++) need = w.device->gemm_workspace(w.device, &args);
            CHECK(need <= enough);
        }
        machine_end(&w);
    }
}

TEST_LIST(T_(sums_are_right), T_(random_shapes), T_(primes), T_(long_sums), T_(wide_outputs), T_(cut_everywhere), T_(pieces_over_ranks), T_(pieces_side_by_side), T_(thread_counts), T_(special_values), T_(empty_products), T_(bad_arguments), T_(fewer_rows_need_no_more))
