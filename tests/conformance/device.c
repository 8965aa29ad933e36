/* device: conformance of a device table, written from src/tables/device.h alone: `make grade OP=file.c` links it with the file that defines grade_patch.

   Each operation is called with the same values on the table under test and on the library's portable one. Where the contract is exact (copies, selections, single roundings, trees in a stated order) every bit
   counts and the portable code runs in the same dtype; elsewhere it runs in f64 and each operation has its bound. Every call is made twice, at the end and at the beginning of its zones: the bits must be the same.
   What the contract promises about cuts is checked on the table itself: pieces of a product, a row, column or shard alone. */
#include "device_cases.h"
#include "grade_device.h"

/* ---- the list ---- */

#define OFFSET(slot) offsetof(llmpar_device, slot)
static const struct { const char *name; operation run; double f32, f64; size_t slot[9]; } list[] = { /* bounds relative to the largest element; 0: every bit */
    { "memory", op_alloc, 0, 0, { OFFSET(alloc), OFFSET(free) } },
    { "streams", op_streams, 0, 0, { OFFSET(stream_create), OFFSET(stream_destroy), OFFSET(synchronize), OFFSET(event_create), OFFSET(event_destroy), OFFSET(event_record), OFFSET(event_wait), OFFSET(event_synchronize), OFFSET(host_call) } },
    { "copy", op_copy, 0, 0, { OFFSET(copy) } },
    { "zero", op_zero, 0, 0, { OFFSET(zero) } },
    { "gemm", op_gemm, 2e-6, 1e-14, { OFFSET(gemm), OFFSET(gemm_workspace) } },
    { "rmsnorm", op_rmsnorm, 6e-7, 1e-13, { OFFSET(rmsnorm) } },
    { "rmsnorm_backward", op_rmsnorm_backward, 4e-6, 1e-13, { OFFSET(rmsnorm_backward) } },
    { "rope", op_rope, 2e-7, 1e-15, { OFFSET(rope) } },
    { "attention", op_attention, 1e-6, 1e-13, { OFFSET(attention), OFFSET(attention_workspace) } },
    { "attention_backward", op_attention_backward, 4e-6, 1e-13, { OFFSET(attention_backward), OFFSET(attention_backward_workspace) } },
    { "swiglu", op_swiglu, 4e-7, 1e-14, { OFFSET(swiglu) } },
    { "swiglu_backward", op_swiglu_backward, 6e-7, 1e-14, { OFFSET(swiglu_backward) } },
    { "embedding", op_embedding, 0, 0, { OFFSET(embedding) } },
    { "embedding_backward", op_embedding_backward, 0, 0, { OFFSET(embedding_backward), OFFSET(embedding_backward_workspace) } },
    { "xent_max", op_xent_max, 0, 0, { OFFSET(xent_max) } },
    { "xent_sum", op_xent_sum, 1e-6, 1e-14, { OFFSET(xent_sum) } },
    { "xent_loss", op_xent_loss, 1e-12, 1e-13, { OFFSET(xent_loss) } },
    { "xent_backward", op_xent_backward, 1e-6, 1e-14, { OFFSET(xent_backward) } },
    { "tree_sum", op_tree_sum, 0, 0, { OFFSET(tree_sum) } },
    { "max", op_max, 0, 0, { OFFSET(max) } },
    { "add", op_add, 0, 0, { OFFSET(add) } },
    { "scale", op_scale, 0, 0, { OFFSET(scale) } },
    { "cast", op_cast, 0, 0, { OFFSET(cast) } },
    { "copy_rows", op_copy_rows, 0, 0, { OFFSET(copy_rows) } },
    { "adamw", op_adamw, 3e-7, 1e-14, { OFFSET(adamw) } },
    { "sgd", op_sgd, 3e-7, 1e-14, { OFFSET(sgd) } },
    { "largest", op_largest, 0, 0, { OFFSET(largest) } },
    { "factor_sum", op_factor_sum, 0, 0, { OFFSET(factor_sum) } },
    { "factor_moment", op_factor_moment, 2e-7, 1e-14, { OFFSET(factor_moment) } },
    { "adalomo_square", op_adalomo_square, 1e-6, 1e-13, { OFFSET(adalomo_square) } },
    { "adalomo", op_adalomo, 1e-6, 1e-13, { OFFSET(adalomo) } },
    { "square_sum", op_square_sum, 0, 0, { OFFSET(square_sum) } },
};
enum { SLOTS = sizeof list / sizeof list[0] };

/* ---- trials ---- */

static void collect(trial *t)
{
    for (int o = 0; o < t->outs; o++) {
        output *out = &t->out[o];
        out->value = (double *)malloc((size_t)(out->rows * out->width + 1) * sizeof *out->value);
        for (int64_t i = 0; i < out->rows * out->width; i++) out->value[i] = load(out->at, i / out->width * out->ld + i % out->width, out->dtype);
    }
}

static void release(trial *t)
{
    for (int o = 0; o < t->outs; o++) free(t->out[o].value);
    for (int i = 0; i < t->ins; i++) free(t->in[i].copy);
    t->outs = t->ins = 0;
}

/* 1 and collected results, 0 and no case or a failure. */
static int attempt(trial *t, int slot, int k, llmpar_device *d, llmpar_stream *stream, llmpar_dtype dtype, int tested, int placement)
{
    memset(t, 0, sizeof *t);
    t->d = d;
    t->stream = stream;
    t->dtype = dtype;
    t->tested = tested;
    t->placement = placement;
    t->random = (uint64_t)(slot * 1000 + k) << 20;
    grade_places_begin();
    llmpar_status st = list[slot].run(t, k);
    if (st == NO_MORE) return 0;
    if (!st) st = d->synchronize(d, stream);
    if (st) {
        grade_fail(GRADE_STATUS, "%sreturned \"%s\": %s", tested ? "" : "the reference ", llmpar_status_string(st), d->error && d->error->status ? d->error->text : "(no text)");
        return 0;
    }
    if (!grade_check_places()) return 0;
    for (int i = 0; i < t->ins; i++)
        for (size_t b = 0; b < t->in[i].bytes; b++)
            if (((const char *)t->in[i].at)[b] != ((const char *)t->in[i].copy)[b]) {
                grade_fail(GRADE_BOUNDS, "wrote into its input: byte %zu of %s was changed", b, t->in[i].name);
                return 0;
            }
    collect(t);
    return 1;
}

static void place_of(const output *o, int64_t i, char *text, size_t capacity)
{
    if (o->rows > 1) snprintf(text, capacity, "%s[%lld,%lld]", o->name, (long long)(i / o->width), (long long)(i % o->width));
    else snprintf(text, capacity, "%s[%lld]", o->name, (long long)i);
}

/* bound < 0: the two placements of the tested table. */
static void compare(const trial *got, const trial *want, double bound)
{
    for (int o = 0; o < got->outs; o++) {
        const output *g = &got->out[o], *w = &want->out[o];
        double top = 0;
        char where[64];
        for (int64_t i = 0; i < g->rows * g->width; i++) top = fabs(w->value[i]) > top && isfinite(w->value[i]) ? fabs(w->value[i]) : top;
        for (int64_t i = 0; i < g->rows * g->width; i++) {
            double x = g->value[i], y = w->value[i];
            if (!memcmp(&x, &y, sizeof x) || (isnan(x) && isnan(y))) continue;
            place_of(g, i, where, sizeof where);
            if (bound < 0) { grade_fail(GRADE_VALUE, "%s depends on where the buffers lie: %.17g at the end of their zones, %.17g at the beginning", where, x, y); return; }
            if (bound > 0 && fabs(x - y) <= bound * top) continue;
            const char *hint = isnan(x) && !isnan(y) ? " (never written, or computed from what lies outside a buffer)" : "";
            if (bound == 0) grade_fail(GRADE_VALUE, "%s: expected the bits of %.9g, got %.9g%s", where, y, x, hint);
            else grade_fail(GRADE_VALUE, "%s: expected %.9g, got %.9g, off by %.3g; the bound is %.3g (%.1g of the largest)%s", where, y, x, fabs(x - y), bound * top, bound, hint);
            return;
        }
    }
}

static llmpar_heap heap;
static llmpar_error error;

static llmpar_device *make_device(llmpar_cpu_level level)
{
    llmpar_cpu_desc desc;
    llmpar_device *d = NULL;
    memset(&desc, 0, sizeof desc);
    desc.level = level;
    if (llmpar_cpu_create(&heap, &error, &desc, &d)) {
        grade_fail(GRADE_STATUS, "%s", error.text);
        _exit(1);
    }
    return d;
}

static llmpar_cpu_level level_under_test(void)
{
    llmpar_cpu_level level = llmpar_cpu_best_level();
    const char *name = getenv("LLMPAR_CPU");
    if (name && name[0] && !llmpar_cpu_level_parse(name, &level)) { fprintf(stderr, "conformance: LLMPAR_CPU \"%s\" is not a dispatch level\n", name); exit(2); }
    return level;
}

static void try_slot(void *arg)
{
    int slot = *(const int *)arg;
    llmpar_heap_init(&heap, NULL);
    llmpar_error_clear(&error);
    llmpar_device *reference = make_device(LLMPAR_CPU_PORTABLE), *tested = make_device(level_under_test()), before;
    llmpar_stream *streams[2];
    before = *tested;
    grade_patch(tested);
    for (int i = 0; i < 9; i++) /* function pointers all, compared as bytes */
        if (list[slot].slot[i] && memcmp((const char *)&before + list[slot].slot[i], (const char *)tested + list[slot].slot[i], sizeof(void (*)(void)))) grade->patched = 1;
    if (reference->stream_create(reference, "reference", &streams[0]) || before.stream_create(tested, "tested", &streams[1])) { grade_fail(GRADE_STATUS, "no stream: %s", error.text); return; }
    if (list[slot].run != op_alloc) grade_watch_memory(tested);
    for (int k = 0; !grade->stop; k++) {
        int more = 0;
        for (int dtype = LLMPAR_F32; dtype <= LLMPAR_F64 && !grade->stop; dtype++) {
            trial want, end, begin;
            double bound = dtype == LLMPAR_F32 ? list[slot].f32 : list[slot].f64;
            __atomic_add_fetch(&grade->progress, 1, __ATOMIC_SEQ_CST);
            if (!attempt(&want, slot, k, reference, streams[0], bound > 0 ? LLMPAR_F64 : (llmpar_dtype)dtype, 0, 0)) { release(&want); continue; }
            more = 1;
            uint64_t live = grade_memories[grade_me].live;
            int fine = attempt(&end, slot, k, tested, streams[1], (llmpar_dtype)dtype, 1, 0);
            if (fine) compare(&end, &want, bound);
            if (fine && !grade->stop && grade_memories[grade_me].live != live) grade_fail(GRADE_VALUE, "did not give back %lld bytes of device memory", (long long)(grade_memories[grade_me].live - live));
            fine = fine && !grade->stop && attempt(&begin, slot, k, tested, streams[1], (llmpar_dtype)dtype, 1, 1);
            if (fine) {
                compare(&end, &begin, -1);
                release(&begin);
            }
            release(&end);
            release(&want);
            grade->cases++;
        }
        if (!more) break;
    }
}

int main(int argc, char **argv)
{
    int passed = 0, failed = 0, patched = 0;
    const char *file = argc > 1 ? argv[1] : "grade_patch", *only = getenv("SLOT");
    grade_open();
    printf("device table with %s, cpu %s against the portable one\n", file, llmpar_cpu_level_name(level_under_test()));
    printf("%-22s %-8s %6s\n", "slot", "", "cases");
    for (int s = 0; s < SLOTS; s++) {
        char text[1600] = "";
        if (only && only[0] && strcmp(only, list[s].name)) continue;
        int fine = grade_run(try_slot, &s, text, sizeof text);
        passed += fine;
        failed += !fine;
        patched += grade->patched;
        printf("%-18s %s %-8s %6llu", list[s].name, grade->patched ? "(*)" : "   ", fine ? "passed" : "FAILED", (unsigned long long)grade->cases);
        if (!fine) printf("\n    %s: %s", list[s].name, text);
        putchar('\n');
    }
    if (!(passed + failed)) { printf("there is no slot \"%s\"\n", only); failed = 1; }
    else printf("(*) replaced by %s: %d of %d slots\n", file, patched, passed + failed);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
