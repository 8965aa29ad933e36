/* parity_report: what a comparison found, as a table for people and JSON for programs; and a run's tensors as files that another program, or verify_parity --reference, reads. */
#ifndef EXAMPLES_PARITY_REPORT_H
#define EXAMPLES_PARITY_REPORT_H

#include "parity_run.h"

typedef enum tensor_kind { ACTIVATION, LOGITS, LOSS, GRADIENT } tensor_kind;
static const char *const kind_names[] = {"activation", "logits", "loss", "gradient"};

typedef struct entry {
    tensor_kind of;
    char name[120];
    long place;                       /* of a gradient: where backward comes to it */
    measure m;
    double relative, largest, bound;
    int within;
} entry;

typedef struct comparison {
    const outcome *a, *b;
    entry *entries;
    int32_t count, first_outside;     /* -1: none */
    int exact, same, within;          /* equal bits are promised; are there */
    double top[3], logits_absolute, logits_most; /* shares of top 1, 5, 10; mean and largest difference */
    llmpar_dtype forward, backward;   /* narrowest type on the way */
    double forward_unit, backward_unit;
    int64_t forward_terms, backward_terms;
    int32_t only_a, only_b;           /* gradients without a partner: frozen units */
} comparison;

static void whole(const llmpar_safetensors *file, const llmpar_safetensor *t, source *out)
{
    memset(out, 0, sizeof *out);
    out->tensors = file;
    out->tensor = t;
    out->dtype = t->dtype;
    out->count = (int64_t)(t->bytes / llmpar_dtype_size(t->dtype));
}

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---- what comes out ---- */

static void print_entries(const comparison *c, tensor_kind from, tensor_kind to, const char *title)
{
    int any = 0, colors = isatty(STDOUT_FILENO);
    for (int32_t i = 0; i < c->count; i++) {
        const entry *e = &c->entries[i];
        if (e->of < from || e->of > to) continue;
        if (!any) printf("\n%-52s relative   largest     bound\n", title);
        any = 1;
        if (e->m.same) printf("%-52s    equal     equal  %8.2g\n", e->name, e->bound);
        else printf("%s%-52s %8.2g  %8.2g  %8.2g%s%s\n", !e->within && colors ? "\033[1;31m" : "", e->name, e->relative, e->largest, e->bound, e->within ? "" : "  outside", !e->within && colors ? "\033[0m" : "");
    }
}

static void print_comparison(const comparison *c)
{
    printf("\n== %s against %s\n", c->b->name, c->a->name);
    printf("%-10s %s\n", c->a->name, c->a->text[0] ? c->a->text : "tp=1");
    printf("%-10s %s\n", c->b->name, c->b->text[0] ? c->b->text : "tp=1");
    if (c->exact) printf("bound      0: the same sums in the same order, so the same bits (docs/exact.md)\n");
    else
        printf("bound      c u sqrt(1 + h), h halves of blocks on the way; forward: c = %g, %s, sums of %lld terms, u = %.2g; backward: c = %g, %s, %lld terms, u = %.2g\n", PARITY_FORWARD, llmpar_dtype_name(c->forward),
               (long long)c->forward_terms, c->forward_unit, PARITY_BACKWARD, llmpar_dtype_name(c->backward), (long long)c->backward_terms, c->backward_unit);
    if (c->a->has_loss) printf("loss       %.9g, %.9g: difference %.2g\n", c->a->loss, c->b->loss, fabs(c->a->loss - c->b->loss));
    if (source_is(&c->a->logits)) {
        printf("logits     mean absolute error %.3g, largest %.3g\n", c->logits_absolute, c->logits_most);
        printf("tokens     top-1 %.4f %%, top-5 %.4f %%, top-10 %.4f %% the same\n", 100 * c->top[0], 100 * c->top[1], 100 * c->top[2]);
    }
    print_entries(c, ACTIVATION, ACTIVATION, "activations, behind");
    print_entries(c, LOGITS, LOSS, "logits and loss");
    print_entries(c, GRADIENT, GRADIENT, "gradients, in backward's order");
    if (c->only_a || c->only_b) printf("not compared: %d gradients that only %s has, %d that only %s has\n", (int)c->only_a, c->a->name, (int)c->only_b, c->b->name);
    if (c->within) printf("\n%s: %s\n", c->same ? "equal" : "within", c->same ? "every number compared is the same, bit for bit" : "no tensor is further away than rounding brings it");
    else {
        const entry *e = &c->entries[c->first_outside];
        printf("\noutside: the first is %s (%s): relative %.3g, largest %.3g, bound %.3g\n", e->name, kind_names[e->of], e->relative, e->largest, e->bound);
    }
}

static void json_text(FILE *f, const char *text)
{
    char out[6 * 4200];
    llmpar_json_escape(text, strlen(text), out, sizeof out);
    fputs(out, f);
}
static void json_number(FILE *f, const char *name, double value)
{
    if (isfinite(value)) fprintf(f, "\"%s\": %.17g", name, value);
    else fprintf(f, "\"%s\": null", name); /* JSON has no infinity */
}

static void json_comparison(FILE *f, const comparison *c)
{
    fprintf(f, "{\"a\": ");
    json_text(f, c->a->text);
    fprintf(f, ", \"b\": ");
    json_text(f, c->b->text);
    fprintf(f, ", \"reference\": %s, \"equal\": %s, \"within\": %s, \"exact\": %s, \"first_outside\": ", c->a->saved ? "true" : "false", c->same ? "true" : "false", c->within ? "true" : "false", c->exact ? "true" : "false");
    if (c->within) fputs("null", f);
    else json_text(f, c->entries[c->first_outside].name);
    if (c->a->has_loss) {
        fputs(", ", f);
        json_number(f, "loss_a", c->a->loss);
        fputs(", ", f);
        json_number(f, "loss_b", c->b->loss);
    }
    if (source_is(&c->a->logits)) {
        fprintf(f, ", \"top1\": %.17g, \"top5\": %.17g, \"top10\": %.17g, ", c->top[0], c->top[1], c->top[2]);
        json_number(f, "logits_mean_absolute_error", c->logits_absolute);
        fputs(", ", f);
        json_number(f, "logits_max_error", c->logits_most);
    }
    fputs(",\n \"tensors\": [", f);
    for (int32_t i = 0; i < c->count; i++) {
        const entry *e = &c->entries[i];
        fprintf(f, "%s\n  {\"kind\": \"%s\", \"name\": ", i ? "," : "", kind_names[e->of]);
        json_text(f, e->name);
        fputs(", ", f);
        json_number(f, "relative", e->relative);
        fputs(", ", f);
        json_number(f, "largest", e->largest);
        fputs(", ", f);
        json_number(f, "bound", e->bound);
        fprintf(f, ", \"equal\": %s, \"within\": %s}", e->m.same ? "true" : "false", e->within ? "true" : "false");
    }
    fputs("\n ]}", f);
}

/* only_try: can it be written? 0, or 2 with the line printed. */
static int write_json(const char *path, const comparison *c, int count, int only_try)
{
    char name[4200];
    snprintf(name, sizeof name, "%s.tmp", path);
    FILE *f = fopen(name, "w");
    if (!f) return option_error("--json: %s: cannot create: %s", name, strerror(errno));
    fputs("{\"comparisons\": [\n", f);
    for (int i = 0; i < count; i++) {
        if (i) fputs(",\n", f);
        json_comparison(f, &c[i]);
    }
    fputs("\n]}\n", f);
    int bad = ferror(f);
    if (fclose(f) || bad || (only_try ? unlink(name) : rename(name, path))) {
        unlink(name);
        return option_error("--json: %s: cannot write: %s", path, strerror(errno));
    }
    return 0;
}

/* Tensors as f32 into one safetensors file. 0 or 2. */
static int dump_file(llmpar_heap *heap, const char *directory, const char *name, const llmpar_safetensor *tensors, const source *sources, int32_t count, double scale)
{
    char path[4200];
    llmpar_error error;
    llmpar_safetensors_writer *writer = NULL;
    double *buffer = parity_buffers();
    llmpar_error_clear(&error);
    snprintf(path, sizeof path, "%s/%s", directory, name);
    llmpar_status status = buffer ? llmpar_safetensors_writer_open(heap, NULL, path, tensors, count, &writer, &error) : llmpar_error_set(&error, LLMPAR_ERR_MEMORY, "out of memory");
    for (int32_t i = 0; i < count && !status; i++)
        for (int64_t first = 0; first < sources[i].count && !status; first += PARITY_CHUNK) {
            int64_t n = sources[i].count - first < PARITY_CHUNK ? sources[i].count - first : PARITY_CHUNK;
            double *numbers = buffer + PARITY_CHUNK;
            status = source_read(&sources[i], first, n, buffer, numbers, &error);
            for (int64_t k = 0; k < n; k++) numbers[k] *= scale;
            llmpar_convert(buffer, LLMPAR_F32, numbers, LLMPAR_F64, (size_t)n);
            if (!status) status = llmpar_safetensors_writer_write(writer, buffer, (size_t)n * sizeof(float), &error);
        }
    if (!status) status = llmpar_safetensors_writer_commit(writer, &error);
    else llmpar_safetensors_writer_abandon(writer);
    free(buffer);
    return status ? fail("--dump", &error) : 0;
}

static void declare(llmpar_safetensor *t, const char *name, int32_t dims, const int64_t *shape)
{
    memset(t, 0, sizeof *t);
    t->name = name;
    t->dtype = LLMPAR_F32;
    t->dims = dims;
    memcpy(t->shape, shape, (size_t)dims * sizeof *shape);
}

static int dump(llmpar_heap *heap, const char *directory, const job *j, const outcome *b)
{
    const int64_t logits[] = {j->sequences, j->length, j->vocab}, activations[] = {j->sequences, j->length, j->hidden};
    int32_t most_tensors = (int32_t)most(j->points, b->gradients->count), count = 0;
    llmpar_safetensor *tensors = (llmpar_safetensor *)calloc((size_t)most_tensors + 1, sizeof *tensors);
    source *sources = (source *)calloc((size_t)most_tensors + 1, sizeof *sources);
    char (*names)[40] = (char (*)[40])calloc((size_t)j->points, sizeof *names), path[4200], text[160];
    llmpar_writer *writer = NULL;
    llmpar_error error;
    llmpar_error_clear(&error);
    int bad = tensors && sources && names ? 0 : option_error("verify_parity: out of memory");
    if (!bad) {
        declare(&tensors[0], "logits", 3, logits);
        bad = dump_file(heap, directory, "logits.safetensors", tensors, &b->logits, 1, 1);
    }
    for (int32_t i = 0; i < b->gradients->count && !bad; i++) {
        declare(&tensors[i], b->gradients->tensor[i].name, b->gradients->tensor[i].dims, b->gradients->tensor[i].shape);
        whole(b->gradients, &b->gradients->tensor[i], &sources[i]);
    }
    if (!bad) bad = dump_file(heap, directory, "grads.safetensors", tensors, sources, b->gradients->count, b->gradient_scale);
    for (int64_t point = 0; point < j->points && !bad; point++) {
        if (!source_is(&b->activation[point])) continue;
        point_name(point, names[point], sizeof names[point]);
        declare(&tensors[count], names[point], 3, activations);
        sources[count++] = b->activation[point];
    }
    if (!bad) bad = dump_file(heap, directory, "activations.safetensors", tensors, sources, count, 1);
    free(tensors);
    free(sources);
    free(names);
    if (bad) return bad;
    snprintf(path, sizeof path, "%s/loss.json", directory);
    snprintf(text, sizeof text, "{\"loss\": %.17g, \"tokens\": %lld}\n", b->loss, (long long)b->tokens);
    llmpar_status status = llmpar_writer_open(heap, NULL, path, &writer, &error);
    if (!status) status = llmpar_writer_write(writer, text, strlen(text), &error);
    if (!status) status = llmpar_writer_commit(writer, &error);
    else llmpar_writer_abandon(writer);
    return status ? fail("--dump", &error) : 0;
}

#endif
