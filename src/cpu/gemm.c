/* gemm: the matrix product. gemm_portable.inc says what is computed; this file cuts the work into tiles for registers and caches and spreads them over the pool; gemm_kernel.c packs and has the inner loops.

   c is worked on in blocks of at most block_m x block_n. For each block the summed dim, all segments one after the other, goes by in parts of at most block_k: B is packed into panels (a tile's columns
   side by side for each k), then every tile of the block takes its steps. A is packed too, or lies where it is: with 32 registers a tile reads its rows there as fast, if k is what follows in memory (nt,
   nn), nothing needs widening, and its rows are not so many that packing pays. Where A has so few rows that a panel of B pays badly, and B's k too follow each other (nt), the two change places: B is what lies, and tiles are turned when they are
   done.

      segments      |  piece 0   |piece 1| piece 2 (two segments)  |piece 3|         pieces follow each other in the packed panels
      parts         |        part 0         |        part 1        |part 2 |
      steps         |  push      | merge,|cut: c|c:  push          |merge, merge: c|

   A step is a stretch of one piece inside a part. A piece that ends is added to the complete subtrees on its left (a binary counter makes the
   balanced tree of llmpar_tree_split) and pushed on the tile's stack of partial tiles; the last one leaves the total in c. A part that ends
   inside a piece leaves the chain in c and the next part goes on from there, which no bit shows.

   BF16 and F16 are widened while they are packed, so the tiles know f32 alone; but where there are BF16 units, a link of a chain is two k of BF16. They
   are paired from each segment's begin, and an odd one at its end with zero, so that no cut into parts shows. Below, k counts links, but for what is
   said to count elements. Where c is stored below f32, tiles work on f32 ones of their own in the
   workspace, and each is rounded into c once, when its last part is done. */
#include "cpu/gemm_thin_internal.h"
#include "cpu/gemm_internal.h"
#include "cpu/half_internal.h"

#include "base/size.h"

#include <string.h>

/* One step of a portable chain. Two roundings on x86-64, where not every processor has fma; one where fma is part of the architecture. */
#if defined(__aarch64__)
#define LLMPAR__GEMM_CHAIN_F32(a, b, sum) __builtin_fmaf(a, b, sum)
#define LLMPAR__GEMM_CHAIN_F64(a, b, sum) __builtin_fma(a, b, sum)
#else
#define LLMPAR__GEMM_CHAIN_F32(a, b, sum) ((a) * (b) + (sum))
#define LLMPAR__GEMM_CHAIN_F64(a, b, sum) ((a) * (b) + (sum))
#endif

#define LLMPAR__GEMM_NO(code, ...) llmpar_error_set(device->error, LLMPAR_ERR_##code, "gemm: " __VA_ARGS__)

typedef struct llmpar__gemm_rows { const llmpar_gemm_args *args; llmpar__half half, half_out; } llmpar__gemm_rows; /* what the plain loops get; of a and b, of c */

#define LLMPAR__GEMM_REAL double
#define LLMPAR__GEMM_ROW llmpar__gemm_row_f64
#define LLMPAR__GEMM_MULTIPLY_ADD LLMPAR__GEMM_CHAIN_F64
#define LLMPAR__GEMM_LOAD(base, i) ((const double *)(base))[i]
#define LLMPAR__GEMM_STORE(base, i, value) ((double *)(base))[i] = (value)
#include "cpu/gemm_portable.inc"

#if !defined(__aarch64__) || defined(LLMPAR_NO_SIMD)
#define LLMPAR__GEMM_REAL float
#define LLMPAR__GEMM_ROW llmpar__gemm_row_f32
#define LLMPAR__GEMM_MULTIPLY_ADD LLMPAR__GEMM_CHAIN_F32
#define LLMPAR__GEMM_LOAD(base, i) ((const float *)(base))[i]
#define LLMPAR__GEMM_STORE(base, i, value) ((float *)(base))[i] = (value)
#include "cpu/gemm_portable.inc"

#define LLMPAR__GEMM_REAL float
#define LLMPAR__GEMM_ROW llmpar__gemm_row_half
#define LLMPAR__GEMM_MULTIPLY_ADD LLMPAR__GEMM_CHAIN_F32
#define LLMPAR__GEMM_LOAD(base, i) (job->args->dtype == LLMPAR_BF16 ? llmpar_bf16_to_f32(((const uint16_t *)(base))[i]) : llmpar_f16_to_f32(((const uint16_t *)(base))[i]))
#define LLMPAR__GEMM_STORE(base, i, value) do { float value_ = (value); if (job->half_out.narrow) llmpar__half_write(&job->half_out, base, i, 1, &value_); else ((float *)(base))[i] = value_; } while (0)
#include "cpu/gemm_portable.inc"
#endif

/* ---- kernels ---- */

#if !defined(LLMPAR_NO_SIMD)

/* ---- blocks ---- */

/* A stretch of one segment inside the current part; the next chunk follows it in the panels. */
typedef struct llmpar__gemm_chunk { int32_t segment; int64_t begin, k; } /* in elements */ llmpar__gemm_chunk;

/* Sizes in cache: a group of B's panels and a panel of A in L2, the block of c and its A in L3. Packing costs less the larger a block is; the stacks that
   outlive a part grow with it, so a block with stacks is smaller. An A that lies takes no room: its block has many rows, so that B is packed once. */
enum { LLMPAR__GEMM_BLOCK_M = 1024, LLMPAR__GEMM_BLOCK_N = 4096, LLMPAR__GEMM_STACK_M = 768, LLMPAR__GEMM_STACK_N = 1536, LLMPAR__GEMM_LYING_MOST = 1535, LLMPAR__GEMM_LYING_M = 3072, LLMPAR__GEMM_LYING_STACK_N = 384, LLMPAR__GEMM_FEW_M = 256, LLMPAR__GEMM_GROUP_N = 96, LLMPAR__GEMM_BUNDLE_M = 96, LLMPAR__GEMM_THIN_M = 24, LLMPAR__GEMM_HELP_PANELS = 8, LLMPAR__GEMM_TURNED_M = 192, LLMPAR__GEMM_APART_M = 512, LLMPAR__GEMM_APART_MOST = 16 };

typedef struct llmpar__gemm_run {
    const llmpar_gemm_args *args;
    llmpar__cpu *cpu;                     /* whose pool works on a block */
    llmpar__gemm_kernel kernel;
    int turned;                           /* A and B have changed places: what is called a and b, m and n below is args' b and a, n and m */
    int lying;                            /* A is read where it lies, but for rows that fill no tile */
    int64_t all_m, all_n;                 /* of the product */
    int64_t unit;                         /* elements of a link */
    int32_t apart;                        /* threads that take whole blocks, with a workspace each; 1: all work on one together */
    int32_t threads, levels, levels_saved; /* that work on a block; partial tiles that a stack holds, at any time and between parts */
    int64_t block_m, block_n, block_k;    /* the first two multiples of the tile; not larger than the product needs */
    int64_t group_panels;                 /* of B that a worker packs at a time, for itself */
    llmpar__half half, half_out;          /* of a and b; of c */
    int64_t own_tiles;                    /* f32 tiles of c in the workspace, if c is stored below f32: all of a block where they outlive a part, else one a worker */
    int own_by_worker;
    int thin, copies, asks;               /* few rows; tiles copy the next group of B, or ask for it (turned: for the next rows) */
    size_t a_bytes, b_bytes, c_bytes, stack_bytes, saved_bytes, step_bytes, chunk_bytes, block_bytes, bytes;
    /* workspace, in this order; 64-byte aligned */
    float *a, *b, *c, *stack, *saved;
    llmpar__gemm_step *steps;             /* of the current part */
    llmpar__gemm_span *spans;             /* of its chunks */
    llmpar__gemm_chunk *chunks;
    /* the current block and part */
    int64_t i0, j0, m, n, a_panels, b_panels, first_packed; /* panel of A */
    int64_t k, step_count, chunk_count;
    int load, store, last;                /* last: the block's last part */
    int64_t groups, bundle;               /* of B; panels of A that are packed at a time */
    int64_t taken[LLMPAR__GEMM_BLOCK_N / 12 + 1]; /* panels of A that somebody has taken, of each group; atomic */
    /* where the next part begins */
    int32_t segment, piece, depth, lowest; /* lowest: stack depth reached in the current part; what lies below is from earlier ones */
    int64_t segment_done;                 /* elements of `segment` already taken */
    int inside;                           /* a part ended inside `piece` */
} llmpar__gemm_run;

/* Longest parts of the summed dim: in general, of whole pieces, and of a thin product. */
enum { LLMPAR__GEMM_PART_K = 768, LLMPAR__GEMM_PIECE_K = 1024, LLMPAR__GEMM_THIN_K = 256 };
/* Fewer multiplications than this are done before a worker has woken up. */
#define LLMPAR__GEMM_SERIAL (1 << 20)

static size_t llmpar__gemm_round(int64_t bytes) { return (size_t)llmpar_round_up(bytes, 64); }

/* Size of blocks of at most `limit` (a multiple of unit) that cut an extent into equal parts, the last one a little smaller. */
static int64_t llmpar__gemm_even_blocks(int64_t extent, int64_t limit, int64_t unit)
{
    int64_t blocks = (extent + limit - 1) / limit;
    return blocks ? llmpar_round_up((extent + blocks - 1) / blocks, unit) : 0;
}

/* How deep a stack is where a part ends, at most: after p pieces it holds as many partial tiles as p has one bits. */
static int32_t llmpar__gemm_depth_between_parts(const llmpar_gemm_args *args, int64_t unit, int64_t part)
{
    int64_t k = 0, boundary = part;
    int32_t s, deepest = 0;
    for (s = 0; s < args->segment_count; s++) {
        for (k += (args->segments[s].k + unit - 1) / unit; boundary < k; boundary += part) { /* inside this segment's piece, or at its beginning */
            int32_t depth = 0, p;
            for (p = args->segments[s].piece; p > 0; p /= 2) depth += p % 2;
            if (depth > deepest) deepest = depth;
        }
    }
    return deepest;
}

/* Length of a part: even parts of at most PART_K; where equal pieces allow it, whole subtrees of up to PIECE_K, so that a part that ends leaves one partial tile. */
static int64_t llmpar__gemm_part(int64_t total, int64_t pieces)
{
    int64_t piece = total / pieces, part = piece;
    if (pieces == 1 || total <= LLMPAR__GEMM_PART_K || total % pieces) return llmpar__gemm_even_blocks(total, LLMPAR__GEMM_PART_K, 1);
    if (piece > LLMPAR__GEMM_PIECE_K) return llmpar__gemm_even_blocks(piece, LLMPAR__GEMM_PIECE_K, 1);
    while (part * 2 <= LLMPAR__GEMM_PIECE_K && part < total) part *= 2;
    return part;
}

static void llmpar__gemm_prepare(llmpar__gemm_run *run, const llmpar__cpu *cpu, const llmpar_gemm_args *args)
{
    int64_t total = 0, parts, tile, limit_n, group_n, rows = args->m, few, apart; /* few: rows, where B goes by in wide blocks if they are few: the first group of each is packed beforehand */
    int32_t s, n;
    int outlives, even = 1; /* tiles that are no part of c outlive a part; pairs fill every segment */
    memset(run, 0, sizeof *run);
    run->args = args;
    run->kernel = llmpar__gemm_kernel_of(cpu->level, args->dtype);
    run->unit = run->kernel.pairs ? 2 : 1;
    run->threads = llmpar__pool_threads(cpu);
    run->half = llmpar__half_of(cpu, args->dtype);
    run->half_out = llmpar__half_of(cpu, args->out_dtype == LLMPAR_DTYPE_DEFAULT ? args->dtype : args->out_dtype);
    run->copies = run->kernel.copying[0] && !run->half.widen && args->kind != LLMPAR_GEMM_NT;
    run->apart = 1;
    apart = LLMPAR__GEMM_APART_M / (1 + run->copies); /* rows of a block, at most: each packs B for itself, which copying hides */
    if (run->threads > 1 && run->threads <= LLMPAR__GEMM_APART_MOST && args->m >= apart * run->threads * 3 / 2) { /* so two blocks a thread at least; the workspace has a block for each */
        rows = llmpar_round_up((args->m + apart - 1) / apart, run->threads);
        rows = llmpar_round_up((args->m + rows - 1) / rows, run->kernel.rows);
        run->apart = run->threads;
        run->threads = 1;
    }
    few = args->kind == LLMPAR_GEMM_NT ? INT64_MAX : run->apart > 1 ? 2 * (int64_t)LLMPAR__GEMM_FEW_M : rows;
    for (n = args->pieces - 1; n > 0; n /= 2) run->levels++;
    for (s = 0; s < args->segment_count; s++) total += (args->segments[s].k + run->unit - 1) / run->unit;
    run->thin = args->m <= LLMPAR__GEMM_THIN_M;
    run->block_k = run->thin ? llmpar__gemm_even_blocks(total, LLMPAR__GEMM_THIN_K, 1) : llmpar__gemm_part(total, args->pieces);
    parts = run->block_k ? (total + run->block_k - 1) / run->block_k : 0;
    if (parts > 1) run->levels_saved = llmpar__gemm_depth_between_parts(args, run->unit, run->block_k);
    for (s = 0; s < args->segment_count; s++) even = even && args->segments[s].k % run->unit == 0;
    run->lying = run->kernel.lying[0] && rows <= LLMPAR__GEMM_LYING_MOST && args->kind != LLMPAR_GEMM_TN && (run->kernel.pairs ? even : !run->half.widen);
    run->turned = run->lying && run->apart == 1 && args->kind == LLMPAR_GEMM_NT && !args->accumulate && !run->half_out.narrow && !run->thin && args->m <= LLMPAR__GEMM_TURNED_M && args->m < args->n;
    run->all_m = run->turned ? args->n : args->m;
    run->all_n = run->turned ? args->m : args->n;
    outlives = run->levels_saved || (parts > 1 && (run->half_out.narrow || run->turned));
    limit_n = !outlives || run->thin || few <= LLMPAR__GEMM_FEW_M ? LLMPAR__GEMM_BLOCK_N : few <= 2 * LLMPAR__GEMM_FEW_M ? LLMPAR__GEMM_BLOCK_N / 2 : run->lying ? LLMPAR__GEMM_LYING_STACK_N : LLMPAR__GEMM_STACK_N;
    if (outlives && limit_n * run->apart > LLMPAR__GEMM_BLOCK_N) limit_n = run->apart * LLMPAR__GEMM_LYING_STACK_N > LLMPAR__GEMM_BLOCK_N ? (int64_t)LLMPAR__GEMM_LYING_STACK_N : LLMPAR__GEMM_BLOCK_N / run->apart; /* what lies in L3 together */
    run->block_m = llmpar__gemm_even_blocks(run->turned ? run->all_m : rows, run->lying ? LLMPAR__GEMM_LYING_M : outlives && !run->thin ? LLMPAR__GEMM_STACK_M : LLMPAR__GEMM_BLOCK_M, run->kernel.rows);
    run->block_n = llmpar__gemm_even_blocks(run->all_n, limit_n, run->kernel.columns);
    group_n = run->turned ? (int64_t)LLMPAR__GEMM_TURNED_M : (int64_t)LLMPAR__GEMM_GROUP_N; /* all of it where that is little: then A, the long one, goes by once a part */
    run->group_panels = (run->block_n < group_n ? run->block_n : group_n) / run->kernel.columns;
    run->copies = run->copies && run->threads == 1 && rows >= 2 * LLMPAR__GEMM_THIN_M && (!run->lying || rows <= 2 * LLMPAR__GEMM_FEW_M); /* fewer rows leave too much uncopied, more that lie lose 1 to 2 % */
    run->asks = run->threads == 1 && run->kernel.asking[0] && !run->half.widen && args->kind == LLMPAR_GEMM_NT && !run->thin && (run->turned || parts <= 1); /* several parts lose 1 to 2 % */
    while (run->group_panels > 1 && (run->thin || (run->threads > 1 && run->block_n < 4 * run->threads * run->group_panels * run->kernel.columns))) run->group_panels /= 2; /* a few groups a worker */

    tile = run->kernel.rows * run->kernel.columns;
    run->own_by_worker = parts <= 1;
    if (run->half_out.narrow || run->turned) run->own_tiles = run->own_by_worker ? run->threads * (run->turned ? 2 * run->group_panels : 1) : llmpar_round_up(run->block_m, run->turned ? 2 * run->kernel.rows : 1) * run->block_n / tile;
    run->c_bytes = llmpar__gemm_round(run->own_tiles * tile * (int64_t)sizeof(float));
    run->a_bytes = llmpar__gemm_round((run->lying ? run->kernel.rows : run->block_m) * run->block_k * (int64_t)sizeof(float));
    run->b_bytes = llmpar__gemm_round((run->threads + run->copies) * run->group_panels * run->kernel.columns * run->block_k * (int64_t)sizeof(float));
    run->stack_bytes = llmpar__gemm_round(run->threads * run->levels * tile * (int64_t)sizeof(float));
    run->saved_bytes = llmpar__gemm_round(run->block_m * run->block_n * run->levels_saved * (int64_t)sizeof(float));
    run->step_bytes = llmpar__gemm_round(((int64_t)args->pieces + 1) * (int64_t)sizeof(llmpar__gemm_step));
    run->chunk_bytes = llmpar__gemm_round((int64_t)args->segment_count * (int64_t)(sizeof(llmpar__gemm_chunk) + sizeof(llmpar__gemm_span)));
    run->block_bytes = run->a_bytes + run->b_bytes + run->c_bytes + run->stack_bytes + run->saved_bytes + run->step_bytes + run->chunk_bytes;
    run->bytes = (size_t)run->apart * run->block_bytes + 63; /* with room to align */
}

static void llmpar__gemm_lay_out(llmpar__gemm_run *run, int32_t worker)
{
    char *at = (char *)run->args->workspace;
    at += (64 - (uintptr_t)at % 64) % 64 + (size_t)worker * run->block_bytes;
    run->a = (float *)(void *)at;
    at += run->a_bytes;
    run->b = (float *)(void *)at;
    at += run->b_bytes;
    run->c = (float *)(void *)at;
    at += run->c_bytes;
    run->stack = (float *)(void *)at;
    at += run->stack_bytes;
    run->saved = (float *)(void *)at;
    at += run->saved_bytes;
    run->steps = (llmpar__gemm_step *)(void *)at;
    at += run->step_bytes;
    run->spans = (llmpar__gemm_span *)(void *)at;
    run->chunks = (llmpar__gemm_chunk *)(void *)(run->spans + run->args->segment_count);
}

static void llmpar__gemm_add_step(llmpar__gemm_run *run, int64_t k, int32_t merges)
{
    llmpar__gemm_step *step = &run->steps[run->step_count++];
    int64_t size = run->kernel.rows * run->kernel.columns * (int64_t)sizeof(float), span = run->step_count > 1 ? step[-1].first_span / (int64_t)sizeof(llmpar__gemm_span) + step[-1].span_count : 0;
    int32_t kept = run->depth - merges;
    step->k = k;
    step->first_span = span * (int64_t)sizeof(llmpar__gemm_span);
    step->span_count = run->chunk_count - span;
    step->merges_saved = kept < run->lowest ? run->lowest - kept : 0;
    step->merges = merges - step->merges_saved;
    step->slot = (run->depth - 1) * size;
    step->slot_saved = step->slot - step->merges * size;
    step->to = kept * size;
    step->kept = kept;
    if (kept < run->lowest) run->lowest = kept;
}

/* Chunks of the next part, and its steps up to where it ends. A piece without terms is a step without terms: its +0 is added like any other. */
static void llmpar__gemm_collect_part(llmpar__gemm_run *run)
{
    const llmpar_gemm_args *args = run->args;
    int64_t step_k = 0;
    run->k = run->step_count = run->chunk_count = 0;
    run->load = run->inside || args->accumulate;
    run->store = run->inside = 0;
    run->lowest = run->depth;
    while (run->piece < args->pieces) {
        const llmpar_gemm_segment *segment = run->segment < args->segment_count ? &args->segments[run->segment] : NULL;
        if (!segment || segment->piece != run->piece) { /* the piece is complete */
            int32_t done = ++run->piece, merges = 0;
            if (done == args->pieces) merges = run->depth;
            else for (; done % 2 == 0; done /= 2) merges++;
            llmpar__gemm_add_step(run, step_k, merges);
            run->depth += 1 - merges;
            step_k = 0;
        } else if (run->segment_done == segment->k) {
            run->segment++;
            run->segment_done = 0;
        } else if (run->k < run->block_k) {
            llmpar__gemm_chunk *chunk = &run->chunks[run->chunk_count++];
            llmpar__gemm_span *span;
            int64_t left = segment->k - run->segment_done, room = (run->block_k - run->k) * run->unit, links;
            chunk->segment = run->segment;
            chunk->begin = run->segment_done;
            chunk->k = left < room ? left : room;
            run->segment_done += chunk->k;
            links = (chunk->k + run->unit - 1) / run->unit;
            span = &run->spans[run->chunk_count - 1]; /* of use if A is lying */
            span->a = (const char *)(run->turned ? segment->b : segment->a) + chunk->begin * run->half.size;
            span->ld = (run->turned ? segment->ldb : segment->lda) * run->half.size;
            span->k = links;
            run->k += links;
            step_k += links;
        } else { /* the part is full */
            run->inside = step_k > 0;
            break;
        }
    }
    if (run->inside) llmpar__gemm_add_step(run, step_k, 0);
    run->last = run->piece == args->pieces;
    run->store = run->inside || run->last;
}

/* 0 when there is no part left. */
static int llmpar__gemm_next_part(llmpar__gemm_run *run)
{
    int64_t s, lowest, asked = 0;
    if (run->piece == run->args->pieces) return 0;
    llmpar__gemm_collect_part(run);
    /* What is pushed and not taken off before the part ends is saved. */
    lowest = run->levels + 1;
    for (s = run->step_count - 1; s >= 0; s--) {
        llmpar__gemm_step *step = &run->steps[s];
        int to_c = s == run->step_count - 1 && run->store;
        step->ask = step->to;
        step->ask_base = step->kept < lowest && !to_c ? LLMPAR__GEMM_SAVED : LLMPAR__GEMM_STACK;
        step->to = to_c ? 0 : step->to;
        step->to_base = to_c ? (int64_t)LLMPAR__GEMM_C : step->ask_base;
        if (s == 0 && run->levels_saved > 0) { /* first what is saved, then c; else where the step ends */
            step->ask = 0;
            step->ask_base = LLMPAR__GEMM_SAVED;
        }
        if (step->kept < lowest) lowest = step->kept;
    }
    for (s = run->step_count > 1; run->store && s < run->step_count && asked < (run->turned && run->last ? run->kernel.columns : 1); asked += run->steps[s++].k / 8) {
        run->steps[s].ask = asked * run->args->ldc * (int64_t)sizeof(float);
        run->steps[s].ask_base = LLMPAR__GEMM_TRUE_C;
    }
    return 1;
}

/* Packs BF16 or F16: a piece of the operand is widened into scratch that stays in L1, and packed from there; a panel of B that lies as it is packed, where it goes. */
static void llmpar__gemm_pack_half(const llmpar__gemm_packing *packing, const llmpar__half *half, int64_t width, void (*pack)(const llmpar__gemm_packing *packing))
{
    enum { ROW = 80, LD = ROW + 16, ROWS = 48, STRIP = 16, STRIP_LD = 288 }; /* of k, and of rows, of a transposed operand; of k of the other, its row */
    float scratch[STRIP * STRIP_LD]; /* the same as ROWS * LD */
    llmpar__gemm_packing part = *packing;
    int64_t panel, panels = packing->transposed ? ROWS / width : STRIP_LD / width, k, i;
    part.in = scratch;
    part.ld = packing->transposed ? (int64_t)LD : (int64_t)STRIP_LD;
    for (panel = 0; panel < packing->panels; panel += panels) {
        int64_t at = panel * width, columns, p;
        int direct;
        part.panels = packing->panels - panel < panels ? packing->panels - panel : panels;
        part.valid = packing->valid - at;
        columns = part.valid < part.panels * width ? part.valid : part.panels * width;
        direct = width % 8 == 0 && columns == part.panels * width;
        for (k = 0; k < packing->k; k += part.k) {
            const char *in = (const char *)packing->in + (packing->transposed ? at * packing->ld + k : k * packing->ld + at) * half->size;
            part.k = packing->transposed ? (int64_t)ROW : (int64_t)STRIP;
            if (part.k > packing->k - k) part.k = packing->k - k;
            part.out = packing->out + panel * packing->distance + k * width;
            if (packing->transposed) {
                for (i = 0; i < columns; i++, in += packing->ld * half->size) {
                    int64_t ahead;
                    for (ahead = 0; ahead < ROW * 2; ahead += 64) __builtin_prefetch(in + ROW * 2 + ahead);
                    half->widen(scratch + i * LD, in, part.k);
                }
            } else {
                for (i = 0; i < part.k; i++, in += packing->ld * half->size) {
                    const char *ahead = in + 8 * packing->ld * half->size, *end = ahead + columns * half->size;
                    for (; ahead < end; ahead += 64) __builtin_prefetch(ahead);
                    if (direct)
                        for (p = 0; p < part.panels; p++) half->widen(part.out + p * packing->distance + i * width, in + p * width * half->size, width);
                    else half->widen(scratch + i * STRIP_LD, in, columns);
                }
                if (direct) continue;
            }
            pack(&part);
        }
    }
}

/* Panels [first, first + panels) of A, or of B, for the current part. Chunks that follow each other in memory too are packed as one: rows are read in long stretches. */
static void llmpar__gemm_pack(const llmpar__gemm_run *run, int is_b, int64_t first, int64_t panels, float *out)
{
    const llmpar_gemm_args *args = run->args;
    int64_t width = is_b ? run->kernel.columns : run->kernel.rows, at = (is_b ? run->j0 : run->i0) + first * width, c, begin, step;
    void (*pack)(const llmpar__gemm_packing *packing) = is_b ? run->kernel.pack_b : run->kernel.pack_a;
    int args_b = is_b != run->turned;
    llmpar__gemm_packing packing;
    packing.transposed = args_b ? args->kind == LLMPAR_GEMM_NT : args->kind != LLMPAR_GEMM_TN;
    packing.valid = is_b ? run->j0 + run->n - at : run->i0 + run->m - at;
    packing.panels = panels;
    packing.distance = width * run->k;
    packing.out = out;
    for (c = 0; c < run->chunk_count; c++) {
        const llmpar_gemm_segment *segment = &args->segments[run->chunks[c].segment];
        const char *base = (const char *)(args_b ? segment->b : segment->a), *next;
        begin = run->chunks[c].begin;
        packing.k = run->chunks[c].k;
        packing.ld = args_b ? segment->ldb : segment->lda;
        step = packing.transposed ? 1 : packing.ld;
        packing.in = base + (packing.transposed ? at * packing.ld + begin : begin * packing.ld + at) * run->half.size;
        for (; c + 1 < run->chunk_count && packing.k % run->unit == 0; c++, packing.k += run->chunks[c].k) {
            segment = &args->segments[run->chunks[c + 1].segment];
            next = (const char *)(args_b ? segment->b : segment->a) + run->chunks[c + 1].begin * step * run->half.size;
            if (next != base + (begin + packing.k) * step * run->half.size || (args_b ? segment->ldb : segment->lda) != packing.ld) break;
        }
        if (run->half.widen && !run->kernel.pairs) llmpar__gemm_pack_half(&packing, &run->half, width, pack);
        else pack(&packing);
        packing.out += (packing.k + run->unit - 1) / run->unit * width;
    }
}

static float *llmpar__gemm_a_panel(const llmpar__gemm_run *run, int64_t i) { return run->a + (i - run->first_packed) * run->kernel.rows * run->k; }

static void llmpar__gemm_pack_task(void *arg, int64_t task, int32_t worker)
{
    const llmpar__gemm_run *run = (const llmpar__gemm_run *)arg;
    int64_t i = run->first_packed + task * run->bundle, left = run->a_panels - i;
    (void)worker;
    llmpar__gemm_pack(run, 0, i, left < run->bundle ? left : run->bundle, llmpar__gemm_a_panel(run, i));
}

/* Whether there is anything left to copy; then `ahead` has rows. */
static int llmpar__gemm_goes_on(const llmpar__gemm_run *run, llmpar__gemm_ahead *ahead)
{
    for (; ahead->next < ahead->end; ahead->next++) {
        const llmpar__gemm_chunk *chunk = &run->chunks[ahead->next % run->chunk_count];
        const llmpar_gemm_segment *segment = &run->args->segments[chunk->segment];
        const char *from = (const char *)((const float *)segment->b + chunk->begin * segment->ldb + run->j0 + ahead->next / run->chunk_count * run->kernel.columns);
        if (ahead->rows > 0 && (from != ahead->from + ahead->rows * ahead->ld || ahead->ld != segment->ldb * (int64_t)sizeof(float))) break;
        if (ahead->rows == 0) ahead->from = from;
        ahead->ld = segment->ldb * (int64_t)sizeof(float);
        ahead->rows += chunk->k;
    }
    ahead->share = run->bundle > 1 && ahead->next <= 2 * run->group_panels * run->chunk_count ? run->k : (run->k + run->a_panels - 1) / run->a_panels; /* the first group asks for A first, and copies in the end */
    return ahead->rows > 0;
}

/* `count` rows of B from `at` on, or columns of a TN product's A. */
static void llmpar__gemm_ask(const llmpar__gemm_run *run, int of_a, int64_t at, int64_t count, llmpar__gemm_ahead *ahead)
{
    const llmpar_gemm_segment *segment;
    int64_t ld;
    ahead->rows = 0;
    if (run->chunk_count == 0 || count <= 0) return;
    segment = &run->args->segments[run->chunks->segment];
    ld = of_a ? segment->lda : segment->ldb;
    ahead->share = ahead->next = ((of_a ? count : run->k) * (int64_t)sizeof(float) + 127) / 128;
    ahead->from = (const char *)(of_a ? (const float *)segment->a + run->chunks->begin * ld + at : (const float *)segment->b + at * ld + run->chunks->begin);
    ahead->ld = ld * (int64_t)sizeof(float) - 128 * ahead->next;
    ahead->rows = of_a ? run->k : count;
}

static void llmpar__gemm_tile_at(const llmpar__gemm_run *run, int64_t i, int64_t j, const float *b, int32_t worker, llmpar__gemm_ahead *ahead)
{
    llmpar__gemm_tile tile;
    int64_t rows = run->m - i * run->kernel.rows, columns = run->n - j * run->kernel.columns, size = run->kernel.rows * run->kernel.columns;
    int64_t row = run->i0 + i * run->kernel.rows, column = run->j0 + j * run->kernel.columns, c = run->turned ? column * run->args->ldc + row : row * run->args->ldc + column;
    int r;
    tile.a = i < run->first_packed ? NULL : llmpar__gemm_a_panel(run, i);
    tile.spans = run->spans;
    tile.row = row;
    tile.b = b;
    tile.c = (float *)run->args->c + c;
    tile.stack = run->stack + worker * run->levels * size;
    tile.saved = run->saved + (i * run->b_panels + j) * run->levels_saved * size;
    tile.ldc = run->args->ldc;
    if (run->own_tiles) {
        int64_t place = j * ((run->a_panels + 1) / 2) + i / 2; /* turned: two tiles become whole lines of c */
        if (run->own_by_worker) place = (int64_t)worker * run->group_panels + j % run->group_panels;
        tile.c = run->c + (run->turned ? 2 * place + i % 2 : run->own_by_worker ? worker : i * run->b_panels + j) * size;
        tile.ldc = run->kernel.columns;
    }
    tile.steps = run->steps;
    tile.step_count = run->step_count;
    tile.rows = (int)(rows < run->kernel.rows ? rows : run->kernel.rows);
    tile.columns = (int)(columns < run->kernel.columns ? columns : run->kernel.columns);
    tile.load = run->load;
    tile.store = run->store;
    tile.ask = (char *)tile.c;
    tile.ask_row = tile.ldc * (int64_t)sizeof(float);
    tile.ask_next = 128;
    if (run->turned && run->last) { /* a row of c every 8 k */
        tile.ask = (char *)((float *)run->args->c + c);
        tile.ask_next = run->args->ldc * (int64_t)sizeof(float);
        tile.ask_row = 2 * tile.ask_next;
    }
    tile.ahead = (ahead->panel ? llmpar__gemm_goes_on(run, ahead) : ahead->rows > 0) ? ahead : NULL;
    llmpar__gemm_run_tile(&run->kernel, &tile);
    if (!run->own_tiles || !run->last) return;
    if (run->turned) {
        if (i % 2 || i + 1 == run->a_panels) llmpar__gemm_turn(tile.c - i % 2 * size, 4 * tile.ldc, i % 2 * run->kernel.rows + tile.rows, tile.columns, (float *)run->args->c + c - i % 2 * run->kernel.rows, run->args->ldc);
    } else for (r = 0; r < tile.rows; r++) llmpar__half_write(&run->half_out, run->args->c, c + r * run->args->ldc, tile.columns, tile.c + r * tile.ldc);
}

/* A group of B, packed by the worker that takes it into its own L2, with each panel of A, which stays in L1. Behind the last group a worker helps with the one where most panels of A are left: so nobody waits
   for anybody in between, and a worker whose core does something else holds up the others for one panel only. */
static void llmpar__gemm_tile_task(void *arg, int64_t task, int32_t worker)
{
    llmpar__gemm_run *run = (llmpar__gemm_run *)arg;
    int64_t width = run->kernel.columns, room = run->group_panels * width * run->block_k, full = run->n / width, next = (task + 1) * run->group_panels; /* panels */
    float *b = run->b + (run->copies ? task % 2 : (int64_t)worker) * room;
    llmpar__gemm_ahead next_a = { NULL, NULL, 0, 0, 0, 0, 0, 0 }, ahead = { NULL, run->asks ? NULL : run->b + (task + 1) % 2 * room, 0, 0, 0, 0, next * run->chunk_count, !run->copies ? 0 : (next + run->group_panels < full ? next + run->group_panels : full) * run->chunk_count };
    int64_t group = task, least = run->a_panels - LLMPAR__GEMM_HELP_PANELS, lazy = run->threads == 1 && !run->lying, take = lazy ? run->bundle : run->turned ? 2 : 1, rows = run->n - next * width, ask_at, g, i, i_end, j, j_end;
    for (g = 0; g < run->groups && task >= run->groups; g++) {
        int64_t taken = __atomic_load_n(&run->taken[g], __ATOMIC_RELAXED);
        if (taken >= least) continue;
        least = taken;
        group = g;
    }
    if (group >= run->groups) return;
    if (rows > run->group_panels * width) rows = run->group_panels * width;
    ask_at = run->a_panels - rows * 5 / 16 / run->group_panels; /* a tile asks for four rows; late, for L2 has no room for long */
    j_end = (group + 1) * run->group_panels < run->b_panels ? (group + 1) * run->group_panels : run->b_panels;
    if (!run->copies || task == 0) llmpar__gemm_pack(run, 1, group * run->group_panels, j_end - group * run->group_panels, b);
    while ((i = __atomic_fetch_add(&run->taken[group], take, __ATOMIC_RELAXED)) < run->a_panels) {
        i_end = i + take < run->a_panels ? i + take : run->a_panels;
        if (lazy && group == 0) {
            llmpar__gemm_pack(run, 0, i, i_end - i, llmpar__gemm_a_panel(run, i));
            if (run->copies && run->bundle > 1) llmpar__gemm_ask(run, 1, run->i0 + i_end * run->kernel.rows, (run->a_panels - i_end < take ? run->a_panels - i_end : take) * run->kernel.rows, &next_a);
        }
        for (; i < i_end; i++) {
            int64_t r, line;
            if (run->asks && run->turned && i + 1 < run->first_packed) llmpar__gemm_ask(run, 0, run->i0 + (i + 1) * run->kernel.rows, run->kernel.rows, &ahead);
            else if (run->asks && i == (ask_at > 0 ? ask_at : 0) && rows > 0) llmpar__gemm_ask(run, 0, run->j0 + next * width, rows, &ahead);
            for (r = 0; r < run->kernel.rows && i + 1 < run->first_packed && run->chunk_count; r++) /* where the next panel of A begins: processors follow its rows from there by themselves */
                for (line = 0; line < 4; line++) __builtin_prefetch(run->spans->a + (run->i0 + (i + 1) * run->kernel.rows + r) * run->spans->ld + 64 * line);
            for (j = group * run->group_panels; j < j_end; j++) llmpar__gemm_tile_at(run, i, j, b + (j - group * run->group_panels) * run->kernel.columns * run->k, worker, next_a.rows > 0 ? &next_a : &ahead);
        }
    }
    for (; !run->asks && llmpar__gemm_goes_on(run, &ahead); ahead.rows--, ahead.from += ahead.ld, ahead.panel += width) memcpy(ahead.panel, ahead.from, sizeof(float) * (size_t)width); /* what is left, and a panel that is not full */
    if (run->copies && full < run->b_panels && next <= full && full < next + run->group_panels) llmpar__gemm_pack(run, 1, full, 1, ahead.panel);
}

static void llmpar__gemm_block(void *arg, int64_t task, int32_t worker)
{
    llmpar__gemm_run own = *(const llmpar__gemm_run *)arg, *run = &own;
    int64_t down = (run->all_m + run->block_m - 1) / run->block_m;
    run->i0 = task % down * run->block_m;
    run->j0 = task / down * run->block_n;
    run->m = run->all_m - run->i0 < run->block_m ? run->all_m - run->i0 : run->block_m;
    run->n = run->all_n - run->j0 < run->block_n ? run->all_n - run->j0 : run->block_n;
    llmpar__gemm_lay_out(run, worker);
    run->a_panels = (run->m + run->kernel.rows - 1) / run->kernel.rows;
    run->b_panels = (run->n + run->kernel.columns - 1) / run->kernel.columns;
    run->groups = (run->b_panels + run->group_panels - 1) / run->group_panels;
    run->first_packed = run->lying ? run->m / run->kernel.rows : 0;
    run->bundle = run->args->kind != LLMPAR_GEMM_TN || run->thin ? 1 : LLMPAR__GEMM_BUNDLE_M / run->kernel.rows / (run->threads > 1 ? 2 : 1);
    run->segment = run->piece = run->depth = 0;
    run->segment_done = 0;
    run->inside = 0;
    while (llmpar__gemm_next_part(run)) {
        memset(run->taken, 0, sizeof run->taken);
        if (run->lying && run->first_packed < run->a_panels) llmpar__gemm_pack(run, 0, run->first_packed, 1, run->a);
        else if (!run->lying && run->threads > 1) llmpar__pool_run(run->cpu, llmpar__gemm_pack_task, run, (run->a_panels + run->bundle - 1) / run->bundle);
        llmpar__pool_run(run->cpu, llmpar__gemm_tile_task, run, run->groups + (run->threads > 1 ? 2 * run->threads : 0));
    }
}

/* The workspace, and how, unless gemm_thin takes it. */
static size_t llmpar__gemm_need(llmpar__gemm_run *run, const llmpar__cpu *cpu, const llmpar_gemm_args *args)
{
    if (llmpar__gemm_thin_takes(cpu, args)) return llmpar__gemm_thin_workspace(cpu, args);
    llmpar__gemm_prepare(run, cpu, args);
    return run->bytes;
}

/* Of many rows each thread does whole blocks, as one alone would: nobody waits before the end, tiles copy B on their way. */
static llmpar_status llmpar__gemm_run_f32(llmpar_device *device, const llmpar_gemm_args *args)
{
    llmpar__cpu cpu = *(llmpar__cpu *)device->state, alone = cpu;
    llmpar__gemm_run run;
    int thin = llmpar__gemm_thin_takes(&cpu, args) || llmpar__gemm_has_interleaved(args);
    size_t bytes = args->workspace ? args->workspace_bytes : 0, need = thin ? llmpar__gemm_thin_workspace(&cpu, args) : llmpar__gemm_need(&run, &cpu, args);
    if (bytes < need) return LLMPAR__GEMM_NO(ARGUMENT, "expected a workspace of %llu bytes, got %llu", (unsigned long long)need, (unsigned long long)bytes);
    if (thin) {
        llmpar__gemm_thin(&cpu, args);
        return LLMPAR_OK;
    }
    if ((double)args->m * (double)args->n * (double)run.block_k < LLMPAR__GEMM_SERIAL) cpu.pool = NULL;
    alone.pool = NULL;
    run.cpu = run.apart > 1 ? &alone : &cpu;
    llmpar__pool_run(run.apart > 1 ? &cpu : &alone, llmpar__gemm_block, &run, (run.all_m + run.block_m - 1) / run.block_m * ((run.all_n + run.block_n - 1) / run.block_n));
    return LLMPAR_OK;
}

#undef LLMPAR__GEMM_SERIAL

#endif /* LLMPAR_NO_SIMD */

/* ---- the slot ---- */

static llmpar_status llmpar__gemm_check(llmpar_device *device, const llmpar_gemm_args *args)
{
    llmpar_dtype sum = llmpar_dtype_sum(args->dtype), out = args->out_dtype == LLMPAR_DTYPE_DEFAULT ? args->dtype : args->out_dtype;
    int32_t s, previous = 0;
    if (args->kind != LLMPAR_GEMM_NT && args->kind != LLMPAR_GEMM_NN && args->kind != LLMPAR_GEMM_TN)
        return LLMPAR__GEMM_NO(ARGUMENT, "kind %d is none of NT, NN, TN", (int)args->kind);
    if (args->dtype != LLMPAR_F32 && args->dtype != LLMPAR_F64 && args->dtype != LLMPAR_BF16 && args->dtype != LLMPAR_F16)
        return LLMPAR__GEMM_NO(UNSUPPORTED, "expected dtype f32, f64, bf16 or f16, got %s", llmpar_dtype_name(args->dtype));
    if (out != args->dtype && out != sum)
        return LLMPAR__GEMM_NO(UNSUPPORTED, "expected out_dtype %s%s%s for dtype %s, got %s", llmpar_dtype_name(args->dtype), sum != args->dtype ? " or " : "", sum != args->dtype ? llmpar_dtype_name(sum) : "", llmpar_dtype_name(args->dtype), llmpar_dtype_name(out));
    if (args->accumulate && out != sum)
        return LLMPAR__GEMM_NO(ARGUMENT, "accumulate needs out_dtype %s, got %s", llmpar_dtype_name(sum), llmpar_dtype_name(out));
    if (args->m < 0 || args->n < 0) return LLMPAR__GEMM_NO(SHAPE, "negative shape m = %lld, n = %lld", (long long)args->m, (long long)args->n);
    if (args->m > 1 && args->ldc < args->n) return LLMPAR__GEMM_NO(SHAPE, "ldc = %lld is less than n = %lld", (long long)args->ldc, (long long)args->n);
    if (args->pieces < 1) return LLMPAR__GEMM_NO(ARGUMENT, "expected at least 1 piece, got %d", (int)args->pieces);
    if (args->accumulate && args->pieces != 1) return LLMPAR__GEMM_NO(ARGUMENT, "accumulate needs exactly 1 piece, got %d", (int)args->pieces);
    for (s = 0; s < args->segment_count; s++) {
        const llmpar_gemm_segment *segment = &args->segments[s];
        int64_t a_width = args->kind == LLMPAR_GEMM_TN ? args->m : segment->k, b_width = args->kind == LLMPAR_GEMM_NT ? segment->k : args->n;
        int64_t a_rows = args->kind == LLMPAR_GEMM_TN ? segment->k : args->m, b_rows = args->kind == LLMPAR_GEMM_NT ? args->n : segment->k;
        if (segment->k < 0) return LLMPAR__GEMM_NO(SHAPE, "segment %d has k = %lld", (int)s, (long long)segment->k);
        if (segment->piece < previous || segment->piece >= args->pieces)
            return LLMPAR__GEMM_NO(ARGUMENT, "segment %d is of piece %d, expected %d to %d", (int)s, (int)segment->piece, (int)previous, (int)(args->pieces - 1));
        previous = segment->piece;
        if (a_rows > 1 && segment->lda < (a_width > 1 ? a_width : 0))
            return LLMPAR__GEMM_NO(SHAPE, "segment %d: lda = %lld is less than the row of %lld", (int)s, (long long)segment->lda, (long long)a_width);
        if (b_rows > 1 && segment->ldb < (b_width > 1 ? b_width : 0))
            return LLMPAR__GEMM_NO(SHAPE, "segment %d: ldb = %lld is less than the row of %lld", (int)s, (long long)segment->ldb, (long long)b_width);
        if (!segment->interleaved) continue;
        if (args->kind != LLMPAR_GEMM_NT || !llmpar__cpu_interleaved_rows(device, args->dtype) || (segment->k | segment->ldb | segment->begin) * (int64_t)llmpar_dtype_size(args->dtype) % 4 || segment->begin < 0 || segment->begin > segment->ldb - segment->k)
            return LLMPAR__GEMM_NO(ARGUMENT, "segment %d is interleaved: expected NT, a type that has such weights, and whole words, got kind %d, %s, columns from %lld on, %lld of %lld", (int)s, (int)args->kind,
                                    llmpar_dtype_name(args->dtype), (long long)segment->begin, (long long)segment->k, (long long)segment->ldb);
    }
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF size_t llmpar__cpu_gemm_workspace(llmpar_device *device, const llmpar_gemm_args *args)
{
    size_t most = 0;
#if !defined(LLMPAR_NO_SIMD)
    /* Where each way of working, and each number of blocks, needs most: so it is enough for fewer rows too. */
    const llmpar__cpu *cpu = (const llmpar__cpu *)device->state;
    const int64_t apart = (int64_t)LLMPAR__GEMM_APART_M * llmpar__pool_threads(cpu), rows[] = { apart * 3 / 4 - 1, apart, apart * 3 / 2 - 1, 2 * apart, args->m, 16, LLMPAR__GEMM_THIN_M, LLMPAR__GEMM_FEW_M, 2 * LLMPAR__GEMM_FEW_M, args->n <= LLMPAR__GEMM_TURNED_M ? args->n - 1 : (int64_t)LLMPAR__GEMM_TURNED_M, LLMPAR__GEMM_STACK_M, LLMPAR__GEMM_BLOCK_M, LLMPAR__GEMM_LYING_MOST, 2 * LLMPAR__GEMM_STACK_M, 2 * LLMPAR__GEMM_BLOCK_M };
    size_t i, bytes;
    for (i = 0; i < sizeof rows / sizeof rows[0] && args->dtype != LLMPAR_F64 && args->m > 0 && args->n > 0; i++) {
        llmpar_gemm_args fewer = *args;
        llmpar__gemm_run run;
        fewer.m = rows[i];
        if (fewer.m > args->m || fewer.m < 1) continue;
        bytes = llmpar__gemm_need(&run, cpu, &fewer);
        if (bytes > most) most = bytes;
    }
#endif
    (void)device;
    (void)args;
    return most;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_gemm(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args)
{
    llmpar__cpu *cpu = (llmpar__cpu *)device->state;
    llmpar__gemm_rows rows;
    llmpar_status status = llmpar__gemm_check(device, args);
    (void)stream;
    if (status || args->m == 0 || args->n == 0) return status;
    rows.args = args;
    rows.half = llmpar__half_of(cpu, args->dtype);
    rows.half_out = llmpar__half_of(cpu, args->out_dtype == LLMPAR_DTYPE_DEFAULT ? args->dtype : args->out_dtype);
    if (args->dtype == LLMPAR_F64) {
        llmpar__pool_run(cpu, llmpar__gemm_row_f64, &rows, args->m);
        return LLMPAR_OK;
    }
#if !defined(LLMPAR_NO_SIMD)
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx"))
#endif
        return llmpar__gemm_run_f32(device, args);
#endif
#if !defined(__aarch64__) || defined(LLMPAR_NO_SIMD)
    llmpar__pool_run(cpu, rows.half.widen ? llmpar__gemm_row_half : llmpar__gemm_row_f32, &rows, args->m);
    return LLMPAR_OK;
#endif
}

#undef LLMPAR__GEMM_CHAIN_F32
#undef LLMPAR__GEMM_CHAIN_F64
#undef LLMPAR__GEMM_NO
