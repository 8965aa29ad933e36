/* The tests of assignment 2: small whole numbers that can be followed by hand; the same numbers stand in README.md. `make grade ASSIGNMENT=2_fsdp FILE=mine.c` runs them, one child process each. */
#include "grade.h"
#include "assignment.h"

/* ---- the rest of the network ---- */

static int64_t rows(const llmpar_unit_call *call) { return call->micro->batch * call->micro->t; }

static llmpar_status scale_forward(llmpar_unit_call *call)
{
    for (int64_t i = 0; i < rows(call) * WIDTH; i++) ((float *)call->output)[i] = (float)call->micro->ids[i / WIDTH] * ((const float *)call->params[0])[i % WIDTH];
    return LLMPAR_OK;
}
static llmpar_status scale_backward(llmpar_unit_call *call)
{
    for (int64_t i = 0; i < WIDTH; i++) {
        float sum = 0;
        for (int64_t n = 0; n < rows(call); n++) sum += ((const float *)call->doutput)[n * WIDTH + i] * (float)call->micro->ids[n];
        ((float *)call->grads[0])[i] = sum;
    }
    return LLMPAR_OK;
}
static llmpar_status score_forward(llmpar_unit_call *call)
{
    for (int64_t n = 0; n < rows(call); n++) {
        float s = 0;
        for (int64_t o = 0; o < WIDTH; o++) s += ((const float *)call->input)[n * WIDTH + o] * ((const float *)call->params[0])[o];
        float off = s - (float)call->micro->targets[n];
        ((float *)call->saved)[n] = off;
        llmpar_exact_sum_add((llmpar_exact_sum *)call->micro->loss, 0.5 * (double)off * (double)off);
    }
    return LLMPAR_OK;
}
static llmpar_status score_backward(llmpar_unit_call *call)
{
    const float *off = (const float *)call->saved, *y = (const float *)call->input, *v = (const float *)call->params[0];
    for (int64_t o = 0; o < WIDTH; o++) {
        float sum = 0;
        for (int64_t n = 0; n < rows(call); n++) {
            float ds = off[n] * call->micro->grad_scale;
            sum += ds * y[n * WIDTH + o];
            ((float *)call->dinput)[n * WIDTH + o] = ds * v[o];
        }
        ((float *)call->grads[0])[o] = sum;
    }
    return LLMPAR_OK;
}
static llmpar_status sizes(void *user, const llmpar_micro *micro, llmpar_dtype dtype, llmpar_unit_sizes *out)
{
    size_t n = (size_t)(micro->batch * micro->t), item = llmpar_dtype_size(dtype);
    int unit = *(const int *)user;
    memset(out, 0, sizeof *out);
    out->output = unit == SCORE ? 0 : n * WIDTH * item;
    out->saved = unit == SCORE ? n * item : 0;
    return LLMPAR_OK;
}

/* The middle layer once more, to compare with: any order of sums, in double. */
static llmpar_status plain_forward(llmpar_unit_call *call)
{
    for (int64_t k = 0; k < rows(call) * WIDTH; k++) {
        double sum = 0;
        for (int64_t i = 0; i < WIDTH; i++) sum += (double)((const float *)call->input)[k / WIDTH * WIDTH + i] * (double)((const float *)call->params[0])[k % WIDTH * WIDTH + i];
        ((float *)call->output)[k] = (float)sum;
    }
    return LLMPAR_OK;
}
static llmpar_status plain_backward(llmpar_unit_call *call)
{
    const float *x = (const float *)call->input, *w = (const float *)call->params[0], *dy = (const float *)call->doutput;
    for (int64_t k = 0; k < WIDTH * WIDTH; k++) {
        double sum = 0;
        for (int64_t n = 0; n < rows(call); n++) sum += (double)dy[n * WIDTH + k / WIDTH] * (double)x[n * WIDTH + k % WIDTH];
        ((float *)call->grads[0])[k] = (float)sum;
    }
    for (int64_t k = 0; k < rows(call) * WIDTH; k++) {
        double sum = 0;
        for (int64_t o = 0; o < WIDTH; o++) sum += (double)dy[k / WIDTH * WIDTH + o] * (double)w[o * WIDTH + k % WIDTH];
        ((float *)call->dinput)[k] = (float)sum;
    }
    return LLMPAR_OK;
}

static const int unit_numbers[UNITS] = { SCALE, MIX, SCORE };
static const char *const unit_names[UNITS] = { "scale", "mix", "score" };
static const llmpar_unit_op plain[2] = { { "mix", plain_forward, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 }, { "mix dx dw", plain_backward, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 } };
static const llmpar_unit_op operations[UNITS][2] = {
    { { "scale", scale_forward, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 }, { "scale dg", scale_backward, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 } },
    { { "mix", mix_forward, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 }, { "mix dx dw", mix_backward, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 } },
    { { "score", score_forward, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 }, { "score dv dy", score_backward, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 } },
};

/* random: parameters from a normal distribution instead of 1; plainly: the middle layer of this file. */
static void describe(llmpar_unit units[UNITS], llmpar_param params[UNITS], int random, int plainly)
{
    static const char *const names[UNITS] = { "g", "w", "v" };
    memset(units, 0, UNITS * sizeof *units);
    memset(params, 0, UNITS * sizeof *params);
    for (int u = 0; u < UNITS; u++) {
        params[u].name = names[u];
        params[u].dims = u == MIX ? 2 : 1;
        params[u].shape[0] = params[u].shape[1] = WIDTH;
        params[u].init_value = 1;
        params[u].init_std = random ? 0.5 : 0;
        units[u].name = unit_names[u];
        units[u].params = &params[u];
        units[u].param_count = 1;
        units[u].forward = plainly && u == MIX ? &plain[0] : &operations[u][0];
        units[u].backward = plainly && u == MIX ? &plain[1] : &operations[u][1];
        units[u].forward_count = units[u].backward_count = 1;
        units[u].sizes = sizes;
        units[u].user = (void *)(uintptr_t)&unit_numbers[u];
    }
}

/* ---- one step, on the list of the file or on the library's own ---- */

enum { MOST_STEPS = 3 };
typedef struct result { double loss[MOST_STEPS], norm[MOST_STEPS]; float w[WIDTH * WIDTH], g[WIDTH]; uint64_t gathered; } result;
typedef struct job {
    const char *name;
    int ranks, batch, steps, own_list, by_hand, library_too, memory, random;
    result mine, library; /* by rank 0 */
} job;

/* Every element of every gradient is the same number: dg, dw, dv of README.md. */
static llmpar_status look(void *user, llmpar_fsdp *fsdp, int32_t unit, const void *shard)
{
    static const float want[UNITS] = { 40, 2.5f, 40 };
    static const char *const names[UNITS] = { "dg", "dw", "dv" };
    const llmpar_segment *segments;
    int64_t elements;
    int32_t count;
    if (!((const job *)user)->by_hand) return LLMPAR_OK;
    llmpar_fsdp_shard(fsdp, unit, &elements, &segments, &count);
    for (int32_t s = 0; s < count; s++)
        for (int64_t i = 0; i < segments[s].count; i++) {
            float got = ((const float *)shard)[segments[s].begin + i];
            if (got != want[unit]) {
                grade_fail(GRADE_VALUE, "%s: element %lld of this rank's shard: expected %g, got %g", names[unit], (long long)i, (double)want[unit], (double)got);
                return LLMPAR_OK;
            }
        }
    return LLMPAR_OK;
}

/* p -= g / 1024: a power of two, so that steps stay exact for long. */
static llmpar_status descend(void *state, const llmpar_update *update)
{
    (void)state;
    for (int64_t i = 0; i < update->elements; i++) ((float *)update->param)[i] -= ((const float *)update->grad)[i] / 1024;
    return LLMPAR_OK;
}

static llmpar_status train(llmpar_ctx *ctx, job *j, const llmpar_instruction *list, int32_t count, llmpar_mesh *mesh, int plainly, result *out)
{
    llmpar_unit units[UNITS];
    llmpar_param params[UNITS];
    llmpar_fsdp *fsdp = NULL;
    llmpar_schedule *schedule = NULL;
    llmpar_policy policy;
    llmpar_fsdp_desc desc;
    llmpar_optimizer optimizer;
    int32_t ids[16], targets[16];
    memset(&policy, 0, sizeof policy);
    memset(&desc, 0, sizeof desc);
    memset(&optimizer, 0, sizeof optimizer);
    optimizer.update = descend;
    describe(units, params, j->random, plainly);
    llmpar_status st = llmpar_fsdp_create(mesh, units, UNITS, &desc, &fsdp);
    if (!st) {
        llmpar_fsdp_policy(fsdp, &policy);
        if (list) st = llmpar_schedule_validate(&ctx->heap, list, count, units, UNITS, &policy, &ctx->error);
        else st = llmpar_schedule_create(&ctx->heap, units, UNITS, &policy, &schedule, &ctx->error);
    }
    int local = j->batch / j->ranks;
    for (int step = 0; step < j->steps && !st; step++) {
        llmpar_micro micro;
        llmpar_run run;
        memset(&micro, 0, sizeof micro);
        memset(&run, 0, sizeof run);
        for (int n = 0; n < local; n++) { /* sequence s of the batch: id s + 1, and a target that the first step misses by s + 1 */
            ids[n] = mesh->dp_rank * local + n + 1;
            targets[n] = j->random ? -3 * ids[n] : WIDTH * WIDTH * ids[n] - ids[n];
        }
        micro.batch = local;
        micro.t = 1;
        micro.leaves = local;
        micro.ids = ids;
        micro.targets = targets;
        run.micro = &micro;
        run.tokens = local;
        run.optimizer = &optimizer;
        run.on_gradient = look;
        run.on_gradient_user = j;
        st = llmpar_fsdp_run(fsdp, list ? list : schedule->list, list ? count : schedule->count, &run);
        if (!st && ctx->rank == 0) out->loss[step] = run.loss, out->norm[step] = run.grad_norm;
    }
    llmpar_arena_usage usage;
    if (!st) {
        llmpar_arena_get_usage(llmpar_fsdp_arena(fsdp), &usage);
        if (ctx->rank == 0) out->gathered = usage.peak[LLMPAR_TAG_GATHERED];
    }
    for (int u = SCALE; u <= MIX && !st; u++) {
        void *const *whole;
        st = llmpar_fsdp_unshard(fsdp, u, &whole);
        if (st) break;
        if (ctx->rank == 0) memcpy(u == MIX ? out->w : out->g, whole[0], u == MIX ? sizeof out->w : sizeof out->g);
        st = llmpar_fsdp_reshard(fsdp, u);
    }
    llmpar_schedule_destroy(schedule);
    llmpar_fsdp_destroy(fsdp);
    return st;
}

static llmpar_status rank_main(llmpar_ctx *ctx, void *user)
{
    job *j = (job *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_mesh_desc desc;
    int32_t count = 0;
    const llmpar_instruction *list = NULL;
    memset(&desc, 0, sizeof desc);
    desc.dp_shard = j->ranks;
    grade_me = ctx->rank;
    llmpar_status st = llmpar_mesh_create(ctx, &desc, &mesh);
    if (!st) snprintf(grade->rank[grade_me].who, sizeof grade->rank[grade_me].who, mesh->where[0] ? "rank %d (%s)" : "rank %d", (int)ctx->rank, mesh->where);
    if (!st && j->own_list) {
        list = fsdp_list(&count);
        if (!list || count < 1) st = llmpar_fail(ctx, LLMPAR_ERR_SCHEDULE, "fsdp_list gave no instructions");
    }
    if (!st) st = train(ctx, j, list, count, mesh, 0, &j->mine);
    if (!st && (j->library_too || j->random)) st = train(ctx, j, NULL, 0, mesh, j->random, &j->library);
    if (st && st != LLMPAR_ERR_PEER) grade_fail(GRADE_STATUS, "\"%s\": %s", llmpar_status_string(st), llmpar_last_error(ctx));
    if (!st && ctx->rank == 0 && j->by_hand) {
        for (int i = 0; i < WIDTH * WIDTH; i++)
            if (j->mine.w[i] != 1 - 2.5f / 1024) { grade_fail(GRADE_VALUE, "w[%d,%d] after the step: expected 1 - 2.5/1024 = %.9g, got %.9g", i / WIDTH, i % WIDTH, 1 - 2.5 / 1024, (double)j->mine.w[i]); break; }
        if (j->mine.loss[0] != 1.25) grade_fail(GRADE_VALUE, "loss: expected 1.25, got %.17g", j->mine.loss[0]);
        if (fabs(j->mine.norm[0] - sqrt(52800)) > 1e-9) grade_fail(GRADE_VALUE, "gradient norm: expected the root of 16*40^2 + 256*2.5^2 + 16*40^2 = 52800, got %.17g", j->mine.norm[0]);
    }
    if (!st && ctx->rank == 0 && j->random) {
        double bound = 1e-5;
        if (fabs(j->mine.loss[0] - j->library.loss[0]) > bound * fabs(j->library.loss[0])) grade_fail(GRADE_VALUE, "loss: expected %.9g, got %.9g: mix_forward is y[n,o] = sum over i of x[n,i] * w[o,i]", j->library.loss[0], j->mine.loss[0]);
        for (int i = 0; i < WIDTH * WIDTH; i++)
            if (!(fabs((double)j->mine.w[i] - (double)j->library.w[i]) <= bound)) { grade_fail(GRADE_VALUE, "w[%d,%d] after a step: expected %.9g, got %.9g: dw[o,i] = sum over n of dy[n,o] * x[n,i]", i / WIDTH, i % WIDTH, (double)j->library.w[i], (double)j->mine.w[i]); break; }
        for (int i = 0; i < WIDTH; i++)
            if (!(fabs((double)j->mine.g[i] - (double)j->library.g[i]) <= bound)) { grade_fail(GRADE_VALUE, "g[%d] after a step: expected %.9g, got %.9g: dx[n,i] = sum over o of dy[n,o] * w[o,i]", i, (double)j->library.g[i], (double)j->mine.g[i]); break; }
    }
    if (!st && ctx->rank == 0 && j->library_too) {
        for (int s = 0; s < j->steps; s++)
            if (j->mine.loss[s] != j->library.loss[s] || j->mine.norm[s] != j->library.norm[s]) grade_fail(GRADE_VALUE, "step %d: loss %.17g and norm %.17g; the library's own list gives %.17g and %.17g", s + 1, j->mine.loss[s], j->mine.norm[s], j->library.loss[s], j->library.norm[s]);
        if (memcmp(j->mine.w, j->library.w, sizeof j->mine.w)) grade_fail(GRADE_VALUE, "w differs from what the library's own list gives");
    }
    if (!st && ctx->rank == 0 && j->memory && j->mine.gathered > WIDTH * WIDTH * sizeof(float))
        grade_fail(GRADE_VALUE, "%llu bytes of gathered parameters at the peak, expected at most the largest unit, %zu: free a unit before the next is gathered, and gather it again for backward", (unsigned long long)j->mine.gathered, WIDTH * WIDTH * sizeof(float));
    llmpar_mesh_destroy(mesh);
    return st;
}

static void quiet(void *user, int rank, llmpar_log_level level, const char *line) { (void)user; (void)rank; (void)level; (void)line; }

static void run_job(void *arg)
{
    job *j = (job *)arg;
    llmpar_launch_desc desc;
    llmpar_error error;
    memset(&desc, 0, sizeof desc);
    desc.ranks = j->ranks;
    desc.lockstep = 1;
    desc.log = quiet;
    if (llmpar_launch(&desc, rank_main, j, &error) && !grade->stop) grade_fail(GRADE_STATUS, "%s", error.text);
}

int main(int argc, char **argv)
{
    static job jobs[] = {
        { .name = "task 1, your layer in the library's own list on one rank: loss 1.25, dg 40, dw 2.5, dv 40", .ranks = 1, .batch = 2, .steps = 1, .by_hand = 1 },
        { .name = "task 1, your layer with random parameters, against plain loops", .ranks = 1, .batch = 3, .steps = 1, .random = 1 },
        { .name = "task 2, your list on 2 ranks: valid, and the same numbers", .ranks = 2, .batch = 2, .steps = 1, .own_list = 1, .by_hand = 1 },
        { .name = "task 2, your list on 4 ranks, three steps: the bits of the library's own list", .ranks = 4, .batch = 8, .steps = 3, .own_list = 1, .library_too = 1 },
        { .name = "task 3, one unit whole at a time: at most 1024 bytes gathered", .ranks = 2, .batch = 2, .steps = 1, .own_list = 1, .memory = 1 },
    };
    int passed = 0, failed = 0;
    grade_open();
    printf("assignment 2 with %s\n", argc > 1 ? argv[1] : "?");
    for (size_t i = 0; i < sizeof jobs / sizeof jobs[0]; i++) {
        char text[1600] = "";
        int fine = grade_run(run_job, &jobs[i], text, sizeof text);
        passed += fine;
        failed += !fine;
        printf("%-6s %s\n", fine ? "passed" : "FAILED", jobs[i].name);
        if (!fine) printf("       %s\n", text);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
