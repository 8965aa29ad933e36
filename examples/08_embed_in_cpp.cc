// 08_embed_in_cpp: an existing C++ training loop takes FSDP, and nothing else. Layers, data, loss and optimizer stay what they were; the parameters, their gradients and the optimizer's state are sharded over ranks.
//
// The first half is a program as it may be found anywhere: linear layers, SGD with momentum, one thread. The second half is what was added: each layer becomes a unit whose callbacks call the layer, the optimizer gets its
// shard through a table of one function, and the loop runs on every rank. Nothing of llmpar's model, trainer or text code is used.
// The losses must be those of the old loop (up to rounding: sums over the batch have another order), and the same bits on 1, 2 and 4 ranks.
//
//   c++ -O2 -I. examples/08_embed_in_cpp.cc -o build/08_embed_in_cpp -lpthread -lm          (or: make build/08_embed_in_cpp)
//   build/08_embed_in_cpp
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

// ---- the program that was there: learn sin(3x) * y ----

namespace old_code {

const int kBatch = 32, kSteps = 200, kInputs = 2;
const float kRate = 0.05f;

void sample(int64_t index, float x[kInputs], float *target)
{
    x[0] = static_cast<float>(index * 37 % 101) / 50.0f - 1.0f;
    x[1] = static_cast<float>(index * 53 % 97) / 48.0f - 1.0f;
    *target = std::sin(3.0f * x[0]) * x[1];
}

// y = tanh(x w^T + b), without tanh in the last layer.
struct Linear {
    int in, out;
    bool last;

    void forward(const float *w, const float *b, const float *x, float *y, int batch) const
    {
        for (int s = 0; s < batch; s++)
            for (int o = 0; o < out; o++) {
                float sum = b[o];
                for (int i = 0; i < in; i++) sum += x[s * in + i] * w[o * in + i];
                y[s * out + o] = last ? sum : std::tanh(sum);
            }
    }

    // Gradients summed over the batch into dw, db; dx may be null.
    void backward(const float *w, const float *x, const float *y, const float *dy, float *dx, float *dw, float *db, int batch) const
    {
        std::fill(dw, dw + out * in, 0.0f);
        std::fill(db, db + out, 0.0f);
        if (dx) std::fill(dx, dx + batch * in, 0.0f);
        for (int s = 0; s < batch; s++)
            for (int o = 0; o < out; o++) {
                float dz = last ? dy[s * out + o] : dy[s * out + o] * (1 - y[s * out + o] * y[s * out + o]);
                db[o] += dz;
                for (int i = 0; i < in; i++) {
                    dw[o * in + i] += dz * x[s * in + i];
                    if (dx) dx[s * in + i] += dz * w[o * in + i];
                }
            }
    }
};

struct Momentum {
    std::vector<float> velocity;
    void step(float *p, const float *g, std::size_t n)
    {
        velocity.resize(n);
        for (std::size_t i = 0; i < n; i++) {
            velocity[i] = 0.9f * velocity[i] + g[i];
            p[i] -= kRate * velocity[i];
        }
    }
};

typedef std::vector<std::vector<float> > Tensors; // w and b of layer l at 2l and 2l + 1

std::vector<Linear> make_layers()
{
    const int widths[] = { kInputs, 64, 64, 1 };
    std::vector<Linear> layers;
    for (int l = 0; l < 3; l++) {
        Linear layer = { widths[l], widths[l + 1], l == 2 };
        layers.push_back(layer);
    }
    return layers;
}

Tensors make_parameters(const std::vector<Linear> &layers)
{
    Tensors p;
    uint32_t state = 1;
    for (const Linear &l : layers) {
        std::vector<float> w(static_cast<std::size_t>(l.in * l.out));
        for (float &x : w) {
            state = state * 1664525u + 1013904223u;
            x = (static_cast<float>(state >> 8) / 8388608.0f - 1.0f) / std::sqrt(static_cast<float>(l.in));
        }
        p.push_back(w);
        p.push_back(std::vector<float>(static_cast<std::size_t>(l.out), 0.0f));
    }
    return p;
}

std::vector<double> train()
{
    const std::vector<Linear> layers = make_layers();
    Tensors p = make_parameters(layers), g = p, a(layers.size() + 1), d(layers.size() + 1);
    std::vector<Momentum> optimizer(p.size());
    std::vector<float> target(kBatch);
    std::vector<double> losses;
    a[0].resize(kBatch * kInputs);
    for (std::size_t l = 0; l < layers.size(); l++) a[l + 1].resize(static_cast<std::size_t>(kBatch * layers[l].out));
    for (std::size_t l = 0; l < a.size(); l++) d[l].resize(a[l].size());
    for (int step = 0; step < kSteps; step++) {
        double loss = 0;
        for (int s = 0; s < kBatch; s++) sample(static_cast<int64_t>(step) * kBatch + s, &a[0][static_cast<std::size_t>(s * kInputs)], &target[static_cast<std::size_t>(s)]);
        for (std::size_t l = 0; l < layers.size(); l++) layers[l].forward(p[2 * l].data(), p[2 * l + 1].data(), a[l].data(), a[l + 1].data(), kBatch);
        for (std::size_t s = 0; s < kBatch; s++) {
            float off = a.back()[s] - target[s];
            loss += 0.5 * static_cast<double>(off) * static_cast<double>(off);
            d.back()[s] = off / kBatch;
        }
        for (std::size_t l = layers.size(); l-- > 0;)
            layers[l].backward(p[2 * l].data(), a[l].data(), a[l + 1].data(), d[l + 1].data(), l ? d[l].data() : nullptr, g[2 * l].data(), g[2 * l + 1].data(), kBatch);
        for (std::size_t i = 0; i < p.size(); i++) optimizer[i].step(p[i].data(), g[i].data(), p[i].size());
        losses.push_back(loss / kBatch);
    }
    return losses;
}

} // namespace old_code

// ---- what was added ----

namespace with_fsdp {

using old_code::Linear;
using old_code::kBatch;

// A layer as a unit. One object a rank.
struct Unit {
    Linear layer;
    std::vector<float> points, targets; // this rank's part of the batch: the first layer's input, the last one's goal
    std::string name, w_name, b_name;
    llmpar_param params[2];
    llmpar_unit_op forward, backward;
};

// dw and db over samples [first, first + batch): a chain inside each of `leaves` equal leaves, a balanced tree over the leaves. A rank's leaves are a subtree of the whole batch's, and the reduce-scatter goes on
// with the same tree: that is all it takes for equal bits on any number of ranks.
void sum_leaves(const Unit &u, const llmpar_unit_call &c, const float *x, int first, int batch, int leaves, float *dw, float *db)
{
    const Linear &l = u.layer;
    const float *y = static_cast<const float *>(c.saved) + first * l.out, *dy = static_cast<const float *>(c.scratch) + first * l.out;
    if (leaves == 1) {
        float *dx = static_cast<float *>(c.dinput);
        l.backward(static_cast<const float *>(c.params[0]), x + first * l.in, y, dy, dx ? dx + first * l.in : nullptr, dw, db, batch);
        return;
    }
    int left = static_cast<int>(llmpar_tree_split(leaves)), cut = batch / leaves * left;
    std::vector<float> dw2(static_cast<std::size_t>(l.in * l.out)), db2(static_cast<std::size_t>(l.out));
    sum_leaves(u, c, x, first, cut, left, dw, db);
    sum_leaves(u, c, x, first + cut, batch - cut, leaves - left, dw2.data(), db2.data());
    for (std::size_t i = 0; i < dw2.size(); i++) dw[i] += dw2[i];
    for (std::size_t i = 0; i < db2.size(); i++) db[i] += db2[i];
}

llmpar_status unit_forward(llmpar_unit_call *c)
{
    const Unit &u = *static_cast<const Unit *>(c->user);
    int batch = static_cast<int>(c->micro->batch);
    const float *x = c->input ? static_cast<const float *>(c->input) : u.points.data();
    float *y = static_cast<float *>(c->saved);
    u.layer.forward(static_cast<const float *>(c->params[0]), static_cast<const float *>(c->params[1]), x, y, batch);
    if (!u.layer.last) std::memcpy(c->output, y, static_cast<std::size_t>(batch * u.layer.out) * sizeof(float));
    for (int s = 0; s < batch && u.layer.last; s++) { // the loss, into an accumulator that knows no order
        double off = static_cast<double>(y[s] - u.targets[static_cast<std::size_t>(s)]);
        llmpar_exact_sum_add(reinterpret_cast<llmpar_exact_sum *>(c->micro->loss), 0.5 * off * off);
    }
    return LLMPAR_OK;
}

llmpar_status unit_backward(llmpar_unit_call *c)
{
    const Unit &u = *static_cast<const Unit *>(c->user);
    int batch = static_cast<int>(c->micro->batch);
    const float *x = c->input ? static_cast<const float *>(c->input) : u.points.data(), *y = static_cast<const float *>(c->saved);
    float *dy = static_cast<float *>(c->scratch);
    if (!u.layer.last) std::memcpy(dy, c->doutput, static_cast<std::size_t>(batch * u.layer.out) * sizeof(float));
    for (int s = 0; s < batch && u.layer.last; s++) dy[s] = (y[s] - u.targets[static_cast<std::size_t>(s)]) * c->micro->grad_scale;
    try { // an exception must not leave the callback: the library is C
        sum_leaves(u, *c, x, 0, batch, static_cast<int>(c->micro->leaves), static_cast<float *>(c->grads[0]), static_cast<float *>(c->grads[1]));
    } catch (const std::exception &e) {
        return llmpar_fail(c->ctx, LLMPAR_ERR_MEMORY, "backward of %s: %s", u.name.c_str(), e.what());
    }
    return LLMPAR_OK;
}

llmpar_status unit_sizes(void *user, const llmpar_micro *micro, llmpar_dtype, llmpar_unit_sizes *out)
{
    const Unit &u = *static_cast<const Unit *>(user);
    std::size_t bytes = static_cast<std::size_t>(micro->batch * u.layer.out) * sizeof(float);
    out->output = u.layer.last ? 0 : bytes;
    out->saved = out->scratch = bytes;
    out->workspace = 0;
    return LLMPAR_OK;
}

// The old optimizer steps over this rank's shard of each unit.
struct Optimizer {
    std::vector<old_code::Momentum> momentum; // one a unit
    static llmpar_status update(void *state, const llmpar_update *u)
    {
        try {
            static_cast<Optimizer *>(state)->momentum[static_cast<std::size_t>(u->unit)].step(static_cast<float *>(u->param), static_cast<const float *>(u->grad), static_cast<std::size_t>(u->elements));
        } catch (const std::exception &) {
            return LLMPAR_ERR_MEMORY;
        }
        return LLMPAR_OK;
    }
};

struct Job {
    int ranks;
    std::vector<double> losses; // by rank 0
    uint64_t parameters;        // bytes that rank 0 keeps
};

// What a rank owns, destroyed in the reverse order of their making.
struct Handles {
    llmpar_mesh *mesh = nullptr;
    llmpar_fsdp *fsdp = nullptr;
    llmpar_schedule *schedule = nullptr;
    ~Handles()
    {
        llmpar_schedule_destroy(schedule);
        llmpar_fsdp_destroy(fsdp);
        llmpar_mesh_destroy(mesh);
    }
};

// The initial values come from the old program: each rank takes its slice of every tensor.
void take_parameters(llmpar_fsdp *fsdp, const old_code::Tensors &p)
{
    const llmpar_mesh *mesh = llmpar_fsdp_mesh(fsdp);
    for (int u = 0; u < llmpar_fsdp_unit_count(fsdp); u++)
        for (int i = 0; i < 2; i++) {
            llmpar_dtensor tensor;
            llmpar_local local;
            llmpar_fsdp_dtensor(fsdp, u, i, &tensor);
            llmpar_dtensor_local(&tensor, mesh->degree, mesh->coordinate, &local);
            float *at = static_cast<float *>(llmpar_fsdp_local(fsdp, u, i, llmpar_fsdp_shard(fsdp, u, nullptr, nullptr, nullptr)));
            const std::vector<float> &from = p[static_cast<std::size_t>(2 * u + i)];
            if (local.flat_count > 0) std::memcpy(at + local.shard_begin, from.data() + local.flat_begin, static_cast<std::size_t>(local.flat_count) * sizeof(float));
        }
}

llmpar_status train_rank(llmpar_ctx *ctx, Job &job)
{
    const std::vector<Linear> layers = old_code::make_layers();
    std::vector<Unit> owners(layers.size());
    std::vector<llmpar_unit> units(layers.size());
    Handles h;
    int local = kBatch / job.ranks;
    for (std::size_t l = 0; l < layers.size(); l++) {
        Unit &o = owners[l];
        o.layer = layers[l];
        o.points.resize(static_cast<std::size_t>(local * old_code::kInputs));
        o.targets.resize(static_cast<std::size_t>(local));
        o.name = "layer." + std::to_string(l);
        o.w_name = o.name + ".weight";
        o.b_name = o.name + ".bias";
        o.params[0] = o.params[1] = llmpar_param();
        o.params[0].name = o.w_name.c_str();
        o.params[0].dims = 2;
        o.params[0].shape[0] = o.layer.out;
        o.params[0].shape[1] = o.layer.in;
        o.params[1].name = o.b_name.c_str();
        o.params[1].dims = 1;
        o.params[1].shape[0] = o.layer.out;
        o.forward = llmpar_unit_op();
        o.forward.name = "forward";
        o.forward.run = unit_forward;
        o.backward = llmpar_unit_op();
        o.backward.name = "backward";
        o.backward.run = unit_backward;
        llmpar_unit &u = units[l];
        u = llmpar_unit();
        u.name = o.name.c_str();
        u.params = o.params;
        u.param_count = 2;
        u.forward = &o.forward;
        u.backward = &o.backward;
        u.forward_count = u.backward_count = 1;
        u.sizes = unit_sizes;
        u.user = &o;
    }
    int32_t count = static_cast<int32_t>(units.size());
    llmpar_mesh_desc mesh = llmpar_mesh_desc();
    llmpar_fsdp_desc desc = llmpar_fsdp_desc();
    llmpar_policy policy = llmpar_policy();
    mesh.dp_shard = job.ranks;
    llmpar_status st = llmpar_mesh_create(ctx, &mesh, &h.mesh);
    if (!st) st = llmpar_fsdp_create(h.mesh, units.data(), count, &desc, &h.fsdp);
    if (st) return st;
    take_parameters(h.fsdp, old_code::make_parameters(layers));
    llmpar_fsdp_policy(h.fsdp, &policy);
    policy.prefetch = 1;
    st = llmpar_schedule_create(&ctx->heap, units.data(), count, &policy, &h.schedule, &ctx->error);

    Optimizer optimizer;
    optimizer.momentum.resize(units.size());
    llmpar_optimizer table = llmpar_optimizer();
    table.state = &optimizer;
    table.update = Optimizer::update;
    std::vector<int32_t> counted(static_cast<std::size_t>(local), 0); // every sample counts
    for (int step = 0; step < old_code::kSteps && !st; step++) {
        llmpar_micro micro = llmpar_micro();
        llmpar_run run = llmpar_run();
        micro.batch = micro.leaves = local;
        micro.t = 1;
        micro.targets = counted.data();
        run.micro = &micro;
        run.tokens = local;
        run.optimizer = &table;
        for (int s = 0; s < local; s++) {
            int64_t index = static_cast<int64_t>(step) * kBatch + h.mesh->dp_rank * local + s;
            old_code::sample(index, &owners[0].points[static_cast<std::size_t>(s * old_code::kInputs)], &owners.back().targets[static_cast<std::size_t>(s)]);
        }
        st = llmpar_fsdp_run(h.fsdp, h.schedule->list, h.schedule->count, &run);
        if (!st && ctx->rank == 0) job.losses.push_back(run.loss);
    }
    llmpar_arena_usage usage;
    llmpar_arena_get_usage(llmpar_fsdp_arena(h.fsdp), &usage);
    if (ctx->rank == 0) job.parameters = usage.live[LLMPAR_TAG_PARAMETERS];
    return st;
}

llmpar_status rank_main(llmpar_ctx *ctx, void *user)
{
    try {
        return train_rank(ctx, *static_cast<Job *>(user));
    } catch (const std::exception &e) {
        return llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "%s", e.what());
    }
}

} // namespace with_fsdp

int main(int argc, char **)
{
    if (argc > 1) {
        std::fprintf(stderr, "08_embed_in_cpp has no options; what it shows stands at the top of examples/08_embed_in_cpp.cc\n");
        return 2;
    }
    const std::vector<double> before = old_code::train();
    with_fsdp::Job jobs[3];
    int failed = 0;
    std::printf("ranks   parameters of a rank   loss, first step   last step\n");
    std::printf("  old %16s            %.9f        %.9f\n", "", before.front(), before.back());
    for (int i = 0; i < 3; i++) {
        llmpar_launch_desc launch = llmpar_launch_desc();
        llmpar_error error;
        jobs[i].ranks = launch.ranks = 1 << i;
        if (llmpar_launch(&launch, with_fsdp::rank_main, &jobs[i], &error)) {
            std::fprintf(stderr, "08_embed_in_cpp: %s\n", error.text);
            return 1;
        }
        std::printf("%5d %16llu bytes      %.9f        %.9f\n", jobs[i].ranks, static_cast<unsigned long long>(jobs[i].parameters), jobs[i].losses.front(), jobs[i].losses.back());
        bool same = jobs[i].losses == jobs[0].losses;
        double worst = 0;
        for (std::size_t s = 0; s < before.size(); s++) worst = std::fmax(worst, std::fabs(jobs[i].losses[s] - before[s]) / before[s]);
        if (!same) std::printf("      the losses are NOT the bits of one rank\n");
        if (!(worst < 1e-3)) std::printf("      the losses are off the old loop's by %.3g\n", worst);
        failed += !same || !(worst < 1e-3);
    }
    if (!(before.back() < before.front() / 5)) failed++, std::printf("the network does NOT learn\n");
    if (!failed) std::printf("the old loop's losses (up to rounding), and the same bits on 1, 2 and 4 ranks\n");
    return failed != 0;
}
