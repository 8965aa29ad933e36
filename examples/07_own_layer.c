/* 07_own_layer: a layer of your own inside a Llama. One of its blocks becomes a plain MLP, x + relu(x w1^T) w2^T, without attention or norm; everything around it stays: the other blocks, FSDP, tensor parallelism, the trainer.

   A model is a list of units (llmpar_unit): named parameters, how much memory a pass needs, and callbacks for forward and backward. They are the model's until llmpar_parallelize; a user may replace the callbacks of one, or, as here, all of it.
   What a unit reads and writes is described at llmpar_unit_call. The weights' gradients are sums over the batch; made by llmpar_tp_weight_gradient they have the same bits on every mesh, and so has the whole training: the program
   compares one rank with 2 x 2.

     cc -O2 -I. examples/07_own_layer.c -o build/07_own_layer -lpthread -lm          (or: make build/07_own_layer)
     build/07_own_layer                                                                        */
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"

#include <stdio.h>
#include <string.h>

#include "common/options.h"

enum { STEPS = 20, LENGTH = 32, POSITIONS = 64, INNER = 160, BLOCK = 2 /* unit 0 is the embedding, so this is layers.1 */ };

/* One rank's layer. D = hidden size of the model, F = INNER. The weights are whole on every tp rank, and so is x[N,D]. */
typedef struct layer {
    const llmpar_tp *tp;
    int64_t hidden;
    llmpar_param params[2];  /* w1[F,D], w2[D,F] */
    int64_t forwards;        /* how often it ran */
} layer;

static float *inner(const llmpar_unit_call *call) { return (float *)call->saved; }   /* h[N,F] = relu(x w1^T), kept for backward */
static float *dinner(const llmpar_unit_call *call) { return (float *)call->scratch; } /* dh[N,F]; in forward: the branch's output [N,D] */
static int64_t rows(const llmpar_micro *micro) { return micro->batch * micro->t; }

static size_t most(size_t a, size_t b) { return a > b ? a : b; }

static llmpar_status sizes(void *user, const llmpar_micro *micro, llmpar_dtype dtype, llmpar_unit_sizes *out)
{
    const layer *l = (const layer *)user;
    int64_t n = rows(micro), d = l->hidden;
    out->output = (size_t)(n * d) * sizeof(float);
    out->saved = (size_t)(n * INNER) * sizeof(float);
    out->scratch = (size_t)(n * (d > INNER ? d : INNER)) * sizeof(float);
    out->workspace = most(llmpar_tp_product_workspace(l->tp, LLMPAR_GEMM_NT, n, INNER, d, dtype), llmpar_tp_product_workspace(l->tp, LLMPAR_GEMM_NT, n, d, INNER, dtype));
    out->workspace = most(out->workspace, most(llmpar_tp_product_workspace(l->tp, LLMPAR_GEMM_NN, n, INNER, d, dtype), llmpar_tp_product_workspace(l->tp, LLMPAR_GEMM_NN, n, d, INNER, dtype)));
    out->workspace = most(out->workspace, most(llmpar_tp_weight_gradient_workspace(l->tp, n, micro->leaves, d, INNER, dtype), llmpar_tp_weight_gradient_workspace(l->tp, n, micro->leaves, INNER, d, dtype)));
    return LLMPAR_OK;
}

/* x = mask > 0 ? x : 0, as an operation of our own on the stream. (It touches tensors directly: the CPU device's memory is plain memory.) */
typedef struct relu_args { int64_t count; float *x; const float *mask; } relu_args;
static llmpar_status relu(void *arg)
{
    const relu_args *a = (const relu_args *)arg;
    for (int64_t i = 0; i < a->count; i++)
        if (!(a->mask[i] > 0)) a->x[i] = 0;
    return LLMPAR_OK;
}
static llmpar_status enqueue_relu(const llmpar_unit_call *call, float *x, const float *mask)
{
    relu_args args = { rows(call->micro) * INNER, x, mask };
    return call->device->host_call(call->device, call->stream, relu, &args, sizeof args);
}

static llmpar_status add(const llmpar_unit_call *call, int64_t count, const void *a, const void *b, void *out)
{
    llmpar_add_args args = { (size_t)count, a, b, out, call->dtype };
    return call->device->add(call->device, call->stream, &args);
}

/* output[N,D] = x + relu(x w1^T) w2^T */
static llmpar_status forward(llmpar_unit_call *call)
{
    layer *l = (layer *)call->user;
    int64_t n = rows(call->micro), d = l->hidden;
    float *branch = (float *)call->scratch;
    l->forwards++;
    llmpar_status st = llmpar_tp_product(l->tp, call->stream, LLMPAR_GEMM_NT, n, INNER, d, call->input, d, call->params[0], d, inner(call), INNER, call->dtype, call->workspace, call->workspace_bytes);
    if (!st) st = enqueue_relu(call, inner(call), inner(call));
    if (!st) st = llmpar_tp_product(l->tp, call->stream, LLMPAR_GEMM_NT, n, d, INNER, inner(call), INNER, call->params[1], INNER, branch, d, call->dtype, call->workspace, call->workspace_bytes);
    return st ? st : add(call, n * d, call->input, branch, call->output);
}

/* dw2[D,F] = dy^T h, dh[N,F] = dy w2 where h > 0, dw1[F,D] = dh^T x, dx[N,D] = dy + dh w1 */
static llmpar_status backward(llmpar_unit_call *call)
{
    const layer *l = (const layer *)call->user;
    int64_t n = rows(call->micro), d = l->hidden, leaves = call->micro->leaves;
    llmpar_status st = llmpar_tp_weight_gradient(l->tp, call->stream, n, leaves, d, INNER, call->doutput, d, inner(call), INNER, call->grads[1], 0, call->dtype, call->workspace, call->workspace_bytes);
    if (!st) st = llmpar_tp_product(l->tp, call->stream, LLMPAR_GEMM_NN, n, INNER, d, call->doutput, d, call->params[1], INNER, dinner(call), INNER, call->dtype, call->workspace, call->workspace_bytes);
    if (!st) st = enqueue_relu(call, dinner(call), inner(call));
    if (!st) st = llmpar_tp_weight_gradient(l->tp, call->stream, n, leaves, INNER, d, dinner(call), INNER, call->input, d, call->grads[0], 0, call->dtype, call->workspace, call->workspace_bytes);
    if (!st) st = llmpar_tp_product(l->tp, call->stream, LLMPAR_GEMM_NN, n, d, INNER, dinner(call), INNER, call->params[0], d, call->dinput, d, call->dtype, call->workspace, call->workspace_bytes);
    return st ? st : add(call, n * d, call->doutput, call->dinput, call->dinput);
}

/* The block's place in the list of units gets the layer. */
static void take_over(llmpar_unit *unit, layer *l)
{
    static const llmpar_unit_op forward_list[] = { { "own layer", forward, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 } }, backward_list[] = { { "own layer dW, dx", backward, LLMPAR_COMPUTE, { 0, 0 }, 0, 0 } };
    static const char *const names[] = { "own_layer.w1", "own_layer.w2" };
    for (int i = 0; i < 2; i++) {
        llmpar_param *p = &l->params[i];
        memset(p, 0, sizeof *p); /* no placement over tp: whole on every rank */
        p->name = names[i];
        p->dims = 2;
        p->shape[0] = i ? l->hidden : INNER;
        p->shape[1] = i ? INNER : l->hidden;
        p->init_std = 0.02;
    }
    unit->params = l->params;
    unit->param_count = 2;
    unit->forward = forward_list;
    unit->backward = backward_list;
    unit->forward_count = unit->backward_count = 1;
    unit->sizes = sizes;
    unit->user = l;
}

/* ---- training with it ---- */

typedef struct job { llmpar_mesh_desc mesh; double loss[STEPS], norm[STEPS]; int64_t forwards; } job; /* results of rank 0 */

/* Data of our own: counting. */
static llmpar_status count_up(void *user, int64_t index, int32_t *tokens)
{
    (void)user;
    for (int i = 0; i <= LENGTH; i++) tokens[i] = (int32_t)((index * 37 + i) % 256);
    return LLMPAR_OK;
}

static llmpar_status train(llmpar_ctx *ctx, void *user)
{
    job *j = (job *)user;
    layer own;
    llmpar_mesh *mesh = NULL;
    llmpar_llama *model = NULL;
    llmpar_trainer *trainer = NULL;
    llmpar_llama_desc model_desc = { .preset = "tiny", .seed = 1 };
    llmpar_llama_apply_desc apply = { .positions = POSITIONS };
    llmpar_trainer_desc desc = { .sequence = count_up, .seq_len = LENGTH, .batch = 8, .log_every = -1 };
    memset(&own, 0, sizeof own);
    llmpar_status st = llmpar_mesh_create(ctx, &j->mesh, &mesh);
    if (!st) st = llmpar_llama_create(ctx, &model_desc, &model);
    if (!st) st = llmpar_llama_apply(model, mesh->comm[LLMPAR_AXIS_TP], &apply); /* the units get their callbacks here; llmpar_parallelize leaves them */
    if (!st) {
        own.tp = llmpar_llama_tp(model);
        own.hidden = llmpar_llama_get_config(model)->hidden;
        take_over(&llmpar_llama_units(model, NULL)[BLOCK], &own);
        st = llmpar_parallelize(mesh, model, &desc, &trainer);
    }
    for (int i = 0; i < STEPS && !st; i++) {
        llmpar_step step;
        st = llmpar_trainer_step(trainer, &step);
        if (!st && ctx->rank == 0) j->loss[i] = step.loss, j->norm[i] = step.grad_norm;
    }
    if (ctx->rank == 0) j->forwards = own.forwards;
    llmpar_trainer_destroy(trainer);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    return st;
}

int main(int argc, char **argv)
{
    int code = option_none(argc, argv, "07_own_layer");
    if (code >= 0) return code;
    llmpar_launch_desc launch = { .log = quiet_log };
    llmpar_error error;
    job one = { .forwards = 0 }, four = { .mesh = { .dp_shard = 2, .tp = 2 } };
    launch.ranks = 1;
    llmpar_status st = llmpar_launch(&launch, train, &one, &error);
    launch.ranks = 4;
    if (!st) st = llmpar_launch(&launch, train, &four, &error);
    if (st) return print_error("07_own_layer", &error);
    printf("step        loss on 1 rank     on 2 x 2\n");
    for (int i = 0; i < STEPS; i += 5) printf("%4d        %.9g         %.9g\n", i + 1, one.loss[i], four.loss[i]);
    printf("%4d        %.9g         %.9g\n", STEPS, one.loss[STEPS - 1], four.loss[STEPS - 1]);
    int same = !memcmp(one.loss, four.loss, sizeof one.loss) && !memcmp(one.norm, four.norm, sizeof one.norm), learns = one.loss[STEPS - 1] < one.loss[0];
    printf("the own layer ran %lld times on a rank; the bits are %s; the model %s\n", (long long)four.forwards, same ? "the same" : "NOT the same", learns ? "learns" : "does NOT learn");
    return same && learns && four.forwards == STEPS ? 0 : 1;
}
