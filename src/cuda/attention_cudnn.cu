/* attention_cudnn: attention by cuDNN's graphs (desc.cudnn, mode FAST), in a program built with LLMPAR_USE_CUDNN and cudnn_frontend. Backward is asked for deterministic.

   One graph a form of call (sizes, strides, dtype, scale), built when its workspace is first asked for and kept. What cuDNN is not asked for here is refused by name, so that no model runs half on one and half on the other:
   f32, head_dim other than 64 and 128, packed documents, fewer queries than keys, and partial sums of dk and dv in f32. */
#include "cuda/attention_internal.h"

#ifdef LLMPAR_USE_CUDNN
#if defined(__CUDACC__)
#pragma nv_diagnostic push
#pragma nv_diag_suppress 128, 2810
#endif
#include <cudnn_frontend.h>
#if defined(__CUDACC__)
#pragma nv_diagnostic pop
#endif
#include <memory>
#include <new>
#include <string>
#include <unordered_map>
#include <vector>

typedef struct llmpar__cuda_cudnn_key {
    int64_t batch, t, stride, heads, kv_heads, head_dim, ldq, ldk, ldv, ldo, ld_dk, ld_dv;
    double scale;
    int64_t dtype, backward, statistics;
} llmpar__cuda_cudnn_key;

typedef struct llmpar__cuda_cudnn_graph {
    llmpar__cuda_cudnn_key key;
    std::shared_ptr<cudnn_frontend::graph::Graph> graph; /* empty: refused, with the reason */
    std::string reason;
    int64_t workspace;
} llmpar__cuda_cudnn_graph;

typedef struct llmpar__cuda_cudnn {
    cudnnHandle_t handle;
    std::vector<llmpar__cuda_cudnn_graph> graphs;
} llmpar__cuda_cudnn;

enum { LLMPAR__CUDNN_Q = 1, LLMPAR__CUDNN_K, LLMPAR__CUDNN_V, LLMPAR__CUDNN_O, LLMPAR__CUDNN_LSE, LLMPAR__CUDNN_DO, LLMPAR__CUDNN_DQ, LLMPAR__CUDNN_DK, LLMPAR__CUDNN_DV };

static llmpar_status llmpar__cuda_cudnn_create(llmpar_device *device)
{
    llmpar__cuda_cudnn *own = new (std::nothrow) llmpar__cuda_cudnn();
    cudnnStatus_t code;
    if (!own) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "cudnn: no memory for device %s", device->name);
    code = cudnnCreate(&own->handle);
    if (code != CUDNN_STATUS_SUCCESS) {
        delete own;
        return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "cudnn: device %s cannot be used: %s", device->name, cudnnGetErrorString(code));
    }
    llmpar__cuda_of(device)->attention = own;
    return LLMPAR_OK;
}

static void llmpar__cuda_cudnn_destroy(llmpar_device *device)
{
    llmpar__cuda_cudnn *own = (llmpar__cuda_cudnn *)llmpar__cuda_of(device)->attention;
    if (!own) return;
    own->graphs.clear();
    (void)cudnnDestroy(own->handle);
    delete own;
    llmpar__cuda_of(device)->attention = NULL;
}

/* [batch, heads, rows, e] in rows of ld elements. */
static cudnn_frontend::graph::Tensor_attributes llmpar__cuda_cudnn_tensor(int64_t uid, int64_t batch, int64_t heads, int64_t rows, int64_t stride, int64_t e, int64_t ld)
{
    return cudnn_frontend::graph::Tensor_attributes().set_uid(uid).set_dim({batch, heads, rows, e}).set_stride({stride * ld, e, ld, 1});
}
static void llmpar__cuda_cudnn_output(const std::shared_ptr<cudnn_frontend::graph::Tensor_attributes> &tensor, int64_t uid, int64_t batch, int64_t heads, int64_t rows, int64_t e, int64_t ld)
{
    tensor->set_output(true).set_uid(uid).set_dim({batch, heads, rows, e}).set_stride({rows * ld, e, ld, 1});
}

static void llmpar__cuda_cudnn_build(llmpar__cuda_cudnn *own, llmpar__cuda_cudnn_graph *g)
{
    namespace fe = cudnn_frontend;
    const llmpar__cuda_cudnn_key *k = &g->key;
    std::shared_ptr<fe::graph::Graph> graph = std::make_shared<fe::graph::Graph>();
    graph->set_io_data_type(k->dtype == LLMPAR_BF16 ? fe::DataType_t::BFLOAT16 : fe::DataType_t::HALF).set_intermediate_data_type(fe::DataType_t::FLOAT).set_compute_data_type(fe::DataType_t::FLOAT);
    auto q = graph->tensor(llmpar__cuda_cudnn_tensor(LLMPAR__CUDNN_Q, k->batch, k->heads, k->t, k->t, k->head_dim, k->ldq));
    auto keys = graph->tensor(llmpar__cuda_cudnn_tensor(LLMPAR__CUDNN_K, k->batch, k->kv_heads, k->t, k->stride, k->head_dim, k->ldk));
    auto values = graph->tensor(llmpar__cuda_cudnn_tensor(LLMPAR__CUDNN_V, k->batch, k->kv_heads, k->t, k->stride, k->head_dim, k->ldv));
    if (!k->backward) {
        auto options = fe::graph::SDPA_attributes().set_name("attention").set_generate_stats(k->statistics != 0).set_attn_scale((float)k->scale);
        options.set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT).set_diagonal_band_right_bound(0);
        auto made = graph->sdpa(q, keys, values, options);
        llmpar__cuda_cudnn_output(made[0], LLMPAR__CUDNN_O, k->batch, k->heads, k->t, k->head_dim, k->ldo);
        if (k->statistics) made[1]->set_output(true).set_uid(LLMPAR__CUDNN_LSE).set_data_type(fe::DataType_t::FLOAT).set_dim({k->batch, k->heads, k->t, 1}).set_stride({k->heads * k->t, k->t, 1, 1});
    } else {
        auto o = graph->tensor(llmpar__cuda_cudnn_tensor(LLMPAR__CUDNN_O, k->batch, k->heads, k->t, k->t, k->head_dim, k->ldo));
        auto dout = graph->tensor(llmpar__cuda_cudnn_tensor(LLMPAR__CUDNN_DO, k->batch, k->heads, k->t, k->t, k->head_dim, k->ldo));
        auto lse = graph->tensor(fe::graph::Tensor_attributes().set_uid(LLMPAR__CUDNN_LSE).set_data_type(fe::DataType_t::FLOAT).set_dim({k->batch, k->heads, k->t, 1}).set_stride({k->heads * k->t, k->t, 1, 1}));
        auto options = fe::graph::SDPA_backward_attributes().set_name("attention_backward").set_attn_scale((float)k->scale).set_deterministic_algorithm(true);
        options.set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT).set_diagonal_band_right_bound(0);
        auto made = graph->sdpa_backward(q, keys, values, o, dout, lse, options);
        llmpar__cuda_cudnn_output(made[0], LLMPAR__CUDNN_DQ, k->batch, k->heads, k->t, k->head_dim, k->ldq);
        llmpar__cuda_cudnn_output(made[1], LLMPAR__CUDNN_DK, k->batch, k->kv_heads, k->t, k->head_dim, k->ld_dk);
        llmpar__cuda_cudnn_output(made[2], LLMPAR__CUDNN_DV, k->batch, k->kv_heads, k->t, k->head_dim, k->ld_dv);
    }
    auto code = graph->build(own->handle, {fe::HeurMode_t::A});
    if (code.is_bad()) g->reason = code.get_message();
    else {
        g->graph = graph;
        g->workspace = graph->get_workspace_size();
    }
}

/* The form's graph, built if it is new; NULL with an error where cuDNN, or this file, does not take it. `error` NULL: none is wanted. */
static llmpar__cuda_cudnn_graph *llmpar__cuda_cudnn_find(llmpar_device *device, const char *what, const llmpar_attention_args *a, const llmpar_attention_backward_args *backward, llmpar_error *error)
{
    llmpar__cuda_cudnn *own = (llmpar__cuda_cudnn *)llmpar__cuda_of(device)->attention;
    llmpar__cuda_cudnn_graph made;
    const char *refused = a->dtype != LLMPAR_BF16 && a->dtype != LLMPAR_F16 ? "a dtype other than bf16 and f16" : a->head_dim != 64 && a->head_dim != 128 ? "a head_dim other than 64 and 128" : a->doc_start ? "packed documents" : a->tq != a->tk ? "fewer queries than keys"
        : backward && backward->dkv_dtype != LLMPAR_DTYPE_DEFAULT && backward->dkv_dtype != a->dtype ? "parts of dk and dv in f32 (ranks that share a kv head)" : NULL;
    if (refused) {
        (void)llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "%s: %s with cudnn on device %s: expected a device without cudnn", what, refused, device->name);
        return NULL;
    }
    memset(&made.key, 0, sizeof made.key);
    made.key.batch = a->batch; made.key.t = a->tk; made.key.stride = a->tk_stride; made.key.heads = a->heads; made.key.kv_heads = a->kv_heads; made.key.head_dim = a->head_dim;
    made.key.ldq = a->ldq; made.key.ldk = a->ldk; made.key.ldv = a->ldv; made.key.ldo = a->ldo;
    made.key.scale = a->scale;
    made.key.dtype = (int64_t)a->dtype;
    made.key.statistics = 1;
    if (backward) {
        made.key.backward = 1;
        made.key.ld_dk = backward->ld_dkv ? backward->ld_dkv : a->ldk;
        made.key.ld_dv = backward->ld_dkv ? backward->ld_dkv : a->ldv;
    }
    made.workspace = 0;
    try {
        size_t at = 0;
        while (at < own->graphs.size() && memcmp(&own->graphs[at].key, &made.key, sizeof made.key) != 0) at++;
        if (at == own->graphs.size()) {
            llmpar__cuda_cudnn_build(own, &made);
            own->graphs.push_back(made);
        }
        if (own->graphs[at].graph) return &own->graphs[at];
        (void)llmpar_error_set(error, LLMPAR_ERR_UNSUPPORTED, "%s: cudnn on device %s takes no such call: %.200s", what, device->name, own->graphs[at].reason.c_str());
    } catch (const std::exception &thrown) {
        (void)llmpar_error_set(error, LLMPAR_ERR_INTERNAL, "%s: cudnn on device %s: %.200s", what, device->name, thrown.what());
    }
    return NULL;
}

/* lse that nobody asked for is written behind cuDNN's own workspace: its attention that leaves none out is one graph less. */
static size_t llmpar__cuda_cudnn_bytes(const llmpar__cuda_cudnn_graph *g) { return ((size_t)g->workspace + 255) / 256 * 256 + (g->key.backward ? 0 : (size_t)(g->key.batch * g->key.heads * g->key.t) * sizeof(float)) + 255; }

static size_t llmpar__cuda_attention_cudnn_workspace(llmpar_device *device, const llmpar_attention_args *a, const llmpar_attention_backward_args *backward)
{
    llmpar__cuda_cudnn_graph *g;
    if (a->batch < 1 || a->tk < 1 || a->heads < 1 || a->kv_heads < 1 || a->heads % a->kv_heads || cudaSetDevice(llmpar__cuda_of(device)->index) != cudaSuccess) return 0;
    g = llmpar__cuda_cudnn_find(device, "attention", a, backward, NULL);
    return g ? llmpar__cuda_cudnn_bytes(g) : 0;
}

/* Behind the slot's llmpar__cuda_begin. */
static llmpar_status llmpar__cuda_attention_cudnn(llmpar_device *device, llmpar_stream *stream, const llmpar_attention_args *a, const llmpar_attention_backward_args *backward)
{
    const char *what = backward ? "attention_backward" : "attention";
    llmpar__cuda_cudnn *own = (llmpar__cuda_cudnn *)llmpar__cuda_of(device)->attention;
    llmpar_status status = llmpar__cuda_attention_check(device, what, a, 0, backward != NULL);
    llmpar__cuda_cudnn_graph *g;
    unsigned char *workspace;
    uintptr_t places;
    size_t need;
    if (status) return status;
    g = llmpar__cuda_cudnn_find(device, what, a, backward, device->error);
    if (!g) return device->error && device->error->status ? device->error->status : LLMPAR_ERR_UNSUPPORTED;
    need = llmpar__cuda_cudnn_bytes(g);
    if (!a->workspace || a->workspace_bytes < need) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "%s: workspace of %llu bytes, expected %llu", what, (unsigned long long)a->workspace_bytes, (unsigned long long)need);
    places = (uintptr_t)a->q | (uintptr_t)a->k | (uintptr_t)a->v | (uintptr_t)a->out | (uintptr_t)((a->ldq | a->ldk | a->ldv | a->ldo) * 2);
    if (backward) places |= (uintptr_t)backward->dout | (uintptr_t)backward->dq | (uintptr_t)backward->dk | (uintptr_t)backward->dv | (uintptr_t)((g->key.ld_dk | g->key.ld_dv) * 2);
    if (places & 15u) return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "%s: rows that do not start at multiples of 16 bytes with cudnn on device %s: expected a device without cudnn", what, device->name);
    workspace = (unsigned char *)(((uintptr_t)a->workspace + 255u) & ~(uintptr_t)255u);
    try {
        std::unordered_map<int64_t, void *> tensors;
        tensors[LLMPAR__CUDNN_Q] = (void *)(uintptr_t)a->q;
        tensors[LLMPAR__CUDNN_K] = (void *)(uintptr_t)a->k;
        tensors[LLMPAR__CUDNN_V] = (void *)(uintptr_t)a->v;
        tensors[LLMPAR__CUDNN_O] = a->out;
        tensors[LLMPAR__CUDNN_LSE] = a->lse ? a->lse : (void *)(workspace + ((size_t)g->workspace + 255) / 256 * 256);
        if (backward) {
            tensors[LLMPAR__CUDNN_DO] = (void *)(uintptr_t)backward->dout;
            tensors[LLMPAR__CUDNN_DQ] = backward->dq;
            tensors[LLMPAR__CUDNN_DK] = backward->dk;
            tensors[LLMPAR__CUDNN_DV] = backward->dv;
        }
        cudnnStatus_t code = cudnnSetStream(own->handle, llmpar__cuda_stream_of(device, stream)->handle);
        if (code != CUDNN_STATUS_SUCCESS) return llmpar_error_set(device->error, LLMPAR_ERR_INTERNAL, "%s: cudnn on device %s: %s", what, device->name, cudnnGetErrorString(code));
        auto done = g->graph->execute(own->handle, tensors, workspace);
        if (done.is_bad()) return llmpar_error_set(device->error, LLMPAR_ERR_INTERNAL, "%s: cudnn on device %s: %.200s", what, device->name, done.get_message().c_str());
    } catch (const std::exception &thrown) {
        return llmpar_error_set(device->error, LLMPAR_ERR_INTERNAL, "%s: cudnn on device %s: %.200s", what, device->name, thrown.what());
    }
    return llmpar__cuda_end(device, stream, what);
}
#endif
