/* graphs: what is enqueued between region_begin and region_end is noted, and replayed as a CUDA graph where it is what it was before: one launch instead of one a kernel.

     noted bytes of a region:  | head, args, array | head, args, array | ..      head: which operation, how many bytes; array: what the struct points to (segments of a product, inputs of a sum)

   For every key the device keeps the bytes of the last time. The first time the operations are issued as they are; with the same bytes again they are issued under stream capture, and the graph is launched; from then on a
   region with these bytes is one cudaGraphLaunch. So a graph runs only where every argument of every operation is what was captured, and nothing needs to stay where it was for the results to be right: other addresses cost
   speed alone. A key whose bytes keep changing is issued as it is from then on.

   Noted are the operations of forward and backward. Whatever else reaches the stream (copies, events, host calls, collectives, optimizers, somebody who asks for its handle) ends the region early: what was noted is issued
   first, in order, and the rest as it comes. There are places for LLMPAR__CUDA_REGIONS keys; the one longest not used makes room for another. */
#include "cuda/cuda_internal.h"

#include <stddef.h>

#define LLMPAR__CUDA_REGIONS 2048u
#define LLMPAR__CUDA_REGION_PLACES 8u /* that a key may be at */
#define LLMPAR__CUDA_REGION_CHANGES 3 /* in a row, then a key is issued plainly */

/* Every member is compared, so there is no padding. */
typedef struct llmpar__cuda_note {
    llmpar_status (*issue)(llmpar_device *device, llmpar_stream *stream, const void *args, const void *array);
    uint64_t args, array; /* bytes behind the head, each padded to 16 */
} llmpar__cuda_note;

/* What is kept for a key. */
typedef struct llmpar__cuda_region {
    uint64_t key, turn;          /* turn: of its last use */
    llmpar__cuda_stream *stream; /* NULL: the place is free */
    unsigned char *bytes;        /* as noted the last time; NULL: issued plainly for good */
    size_t used;
    cudaGraphExec_t graph;       /* of these bytes; NULL: not captured yet */
    int32_t changes;             /* of the bytes, in a row */
} llmpar__cuda_region;

struct llmpar__cuda_regions {
    llmpar_stream *begun, *open; /* between begin and end; open: and not ended early */
    uint64_t key, turn;
    unsigned char *bytes;        /* noted so far */
    size_t used, capacity;
    llmpar_cuda_graph_counts counts;
    llmpar__cuda_region table[LLMPAR__CUDA_REGIONS];
};

static size_t llmpar__cuda_padded(size_t bytes) { return (bytes + 15) / 16 * 16; }

/* ---- noting ---- */

static int llmpar__cuda_notes(llmpar_device *device, llmpar_stream *stream)
{
    const llmpar__cuda_regions *regions = llmpar__cuda_of(device)->regions;
    return regions && stream && regions->open == stream;
}

static llmpar_status llmpar__cuda_noting(llmpar_device *device, llmpar_stream *stream, llmpar_status (*issue)(llmpar_device *, llmpar_stream *, const void *, const void *), const void *args, size_t args_bytes,
                                           size_t array_bytes, void **array)
{
    llmpar__cuda_regions *regions = llmpar__cuda_of(device)->regions;
    llmpar_heap *heap = llmpar__cuda_of(device)->heap;
    size_t body = llmpar__cuda_padded(sizeof(llmpar__cuda_note)), more = body + llmpar__cuda_padded(args_bytes) + llmpar__cuda_padded(array_bytes);
    llmpar__cuda_note head;
    llmpar_status status = llmpar__cuda_stuck(device, llmpar__cuda_stream_of(device, stream));
    if (status) return status;
    if (regions->used + more > regions->capacity) {
        size_t capacity = 2 * (regions->used + more) + 4096;
        unsigned char *bytes = (unsigned char *)llmpar_heap_alloc(heap, capacity, 1);
        if (!bytes) return llmpar__cuda_stick(device, stream, llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "device %s: no memory for the operations of a region", device->name));
        if (regions->used) memcpy(bytes, regions->bytes, regions->used);
        llmpar_heap_free(heap, regions->bytes);
        regions->bytes = bytes;
        regions->capacity = capacity;
    }
    unsigned char *at = regions->bytes + regions->used;
    memset(at, 0, more);
    memset(&head, 0, sizeof head);
    head.issue = issue;
    head.args = args_bytes;
    head.array = array_bytes;
    memcpy(at, &head, sizeof head);
    memcpy(at + body, args, args_bytes);
    *array = at + body + llmpar__cuda_padded(args_bytes);
    regions->used += more;
    return LLMPAR_OK;
}

/* Everything noted, on the stream. What fails sticks to it: the calls that noted it have returned. */
static llmpar_status llmpar__cuda_issue_noted(llmpar_device *device, llmpar_stream *stream)
{
    const llmpar__cuda_regions *regions = llmpar__cuda_of(device)->regions;
    llmpar_status status = LLMPAR_OK;
    for (size_t at = 0; at < regions->used && !status;) {
        llmpar__cuda_note head;
        const unsigned char *args = regions->bytes + at + llmpar__cuda_padded(sizeof head);
        memcpy(&head, regions->bytes + at, sizeof head);
        status = head.issue(device, stream, args, args + llmpar__cuda_padded((size_t)head.args));
        at += llmpar__cuda_padded(sizeof head) + llmpar__cuda_padded((size_t)head.args) + llmpar__cuda_padded((size_t)head.array);
    }
    return llmpar__cuda_stick(device, stream, status);
}

/* ---- graphs ---- */

/* The graph may still run. */
static void llmpar__cuda_region_drop(llmpar_device *device, llmpar__cuda_region *region)
{
    llmpar_heap *heap = llmpar__cuda_of(device)->heap;
    if (region->graph) {
        if (cudaStreamSynchronize(region->stream->handle) != cudaSuccess) (void)cudaGetLastError();
        if (cudaGraphExecDestroy(region->graph) != cudaSuccess) (void)cudaGetLastError();
        llmpar__cuda_of(device)->regions->counts.kept--;
    }
    llmpar_heap_free(heap, region->bytes);
    region->graph = NULL;
    region->bytes = NULL;
    region->used = 0;
}

/* The key's place: its own, or one that is free, or the one longest not used. */
static llmpar__cuda_region *llmpar__cuda_region_place(llmpar_device *device, llmpar__cuda_stream *stream, uint64_t key)
{
    llmpar__cuda_regions *regions = llmpar__cuda_of(device)->regions;
    llmpar__cuda_region *oldest = NULL;
    uint64_t hash = (key ^ (uint64_t)(uintptr_t)stream) * 0x9e3779b97f4a7c15u; /* Fibonacci hashing */
    hash ^= hash >> 32;
    for (uint32_t i = 0; i < LLMPAR__CUDA_REGION_PLACES; i++) {
        llmpar__cuda_region *place = &regions->table[(hash + i) % LLMPAR__CUDA_REGIONS];
        if (place->stream == stream && place->key == key) return place;
        if (!oldest || (oldest->stream && (!place->stream || place->turn < oldest->turn))) oldest = place;
    }
    llmpar__cuda_region_drop(device, oldest);
    oldest->key = key;
    oldest->stream = stream;
    oldest->changes = -1; /* the first bytes are no change */
    return oldest;
}

static llmpar_status llmpar__cuda_region_launch(llmpar_device *device, llmpar_stream *stream, llmpar__cuda_region *region)
{
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (status) return status;
    (void)cudaGraphLaunch(region->graph, llmpar__cuda_stream_of(device, stream)->handle);
    return llmpar__cuda_end(device, stream, "cudaGraphLaunch");
}

/* What was issued under a capture that fails has not run, and the stream has failed. Other threads of the process may do as they like meanwhile. */
static llmpar_status llmpar__cuda_region_capture(llmpar_device *device, llmpar_stream *stream, llmpar__cuda_region *region)
{
    cudaStream_t handle = llmpar__cuda_stream_of(device, stream)->handle;
    cudaGraph_t graph = NULL;
    cudaError_t code;
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (!status) status = llmpar__cuda_check(device, cudaStreamBeginCapture(handle, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    if (status) return llmpar__cuda_stick(device, stream, status);
    status = llmpar__cuda_issue_noted(device, stream);
    code = cudaStreamEndCapture(handle, &graph); /* in any case: it would go on */
    if (!status) status = llmpar__cuda_check(device, code, "cudaStreamEndCapture");
    if (!status) status = llmpar__cuda_check(device, cudaGraphInstantiate(&region->graph, graph, 0), "cudaGraphInstantiate");
    if (graph) (void)cudaGraphDestroy(graph);
    (void)cudaGetLastError();
    if (status) {
        region->graph = NULL;
        return llmpar__cuda_stick(device, stream, status);
    }
    llmpar__cuda_of(device)->regions->counts.kept++;
    return llmpar__cuda_region_launch(device, stream, region);
}

/* ---- the slots ---- */

static llmpar_status llmpar__cuda_region_begin(llmpar_device *device, llmpar_stream *stream, uint64_t key)
{
    llmpar__cuda *cuda = llmpar__cuda_of(device);
    llmpar_status status = llmpar__cuda_begin(device, stream);
    if (status) return status;
    if (!stream) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "region_begin: no stream, expected one");
    if (!cuda->regions) {
        cuda->regions = (llmpar__cuda_regions *)llmpar_heap_zalloc(cuda->heap, 1, sizeof *cuda->regions);
        if (!cuda->regions) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "device %s: no memory for regions", device->name);
    }
    if (cuda->regions->begun) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "region_begin: a region is open on stream %s, expected region_end before", llmpar__cuda_stream_of(device, cuda->regions->begun)->name);
    cuda->regions->begun = cuda->regions->open = stream;
    cuda->regions->key = key;
    cuda->regions->used = 0;
    return LLMPAR_OK;
}

/* Ends the region that is open, if one is: something comes that cannot be in it. */
static void llmpar__cuda_region_break(llmpar_device *device)
{
    llmpar__cuda_regions *regions = llmpar__cuda_of(device)->regions;
    llmpar_stream *stream = regions ? regions->open : NULL;
    if (!stream) return;
    regions->open = NULL; /* first: what is issued comes this way again */
    (void)llmpar__cuda_issue_noted(device, stream);
}

/* New bytes for a key: another graph, or after too many of them none. */
static llmpar_status llmpar__cuda_region_changed(llmpar_device *device, llmpar__cuda_region *region)
{
    const llmpar__cuda_regions *regions = llmpar__cuda_of(device)->regions;
    int32_t changes = region->changes + 1;
    llmpar__cuda_region_drop(device, region);
    region->changes = changes;
    if (changes >= LLMPAR__CUDA_REGION_CHANGES) return LLMPAR_OK;
    region->bytes = (unsigned char *)llmpar_heap_alloc(llmpar__cuda_of(device)->heap, regions->used + 1, 1);
    if (!region->bytes) return llmpar_error_set(device->error, LLMPAR_ERR_MEMORY, "device %s: no memory for the operations of a region", device->name);
    memcpy(region->bytes, regions->bytes, regions->used);
    region->used = regions->used;
    return LLMPAR_OK;
}

static llmpar_status llmpar__cuda_region_end(llmpar_device *device, llmpar_stream *stream)
{
    llmpar__cuda_regions *regions = llmpar__cuda_of(device)->regions;
    llmpar__cuda_region *region;
    llmpar_status status;
    if (!regions || !stream || regions->begun != stream) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "region_end: no region is open on this stream, expected region_begin before");
    int whole = regions->open == stream;
    regions->begun = regions->open = NULL;
    status = llmpar__cuda_begin(device, stream);
    if (status || (whole && !regions->used)) return status;
    if (!whole) {
        regions->counts.plain++;
        return LLMPAR_OK;
    }
    region = llmpar__cuda_region_place(device, llmpar__cuda_stream_of(device, stream), regions->key);
    region->turn = ++regions->turn;
    if (region->bytes && region->used == regions->used && !memcmp(region->bytes, regions->bytes, regions->used)) {
        region->changes = 0;
        if (region->graph) {
            regions->counts.replayed++;
            return llmpar__cuda_region_launch(device, stream, region);
        }
        regions->counts.captured++;
        return llmpar__cuda_region_capture(device, stream, region);
    }
    if (region->changes < LLMPAR__CUDA_REGION_CHANGES) status = llmpar__cuda_stick(device, stream, llmpar__cuda_region_changed(device, region));
    regions->counts.plain++;
    return status ? status : llmpar__cuda_issue_noted(device, stream);
}

/* stream NULL: of all streams, and the list itself. They are idle, or are waited for. */
static void llmpar__cuda_regions_forget(llmpar_device *device, llmpar__cuda_stream *stream)
{
    llmpar__cuda *cuda = llmpar__cuda_of(device);
    llmpar__cuda_regions *regions = cuda->regions;
    if (!regions) return;
    if (regions->begun && (!stream || llmpar__cuda_stream_of(device, regions->begun) == stream)) regions->begun = regions->open = NULL;
    for (uint32_t i = 0; i < LLMPAR__CUDA_REGIONS; i++) {
        llmpar__cuda_region *region = &regions->table[i];
        if (!region->stream || (stream && region->stream != stream)) continue;
        llmpar__cuda_region_drop(device, region);
        region->stream = NULL;
    }
    if (stream) return;
    llmpar_heap_free(cuda->heap, regions->bytes);
    llmpar_heap_free(cuda->heap, regions);
    cuda->regions = NULL;
}

LLMPAR_DEF void llmpar_cuda_graphs(llmpar_device *device, llmpar_cuda_graph_counts *out)
{
    const llmpar__cuda_regions *regions = llmpar__cuda_of(device)->regions;
    memset(out, 0, sizeof *out);
    if (regions) *out = regions->counts;
}

/* ---- operations that are noted ---- */

/* Where padding begins in a struct: behind a member of 4 bytes, up to a multiple of 8. What callers leave there is not to be compared. */
#define LLMPAR__CUDA_GAP(type, member) (offsetof(type, member) + sizeof(((type *)0)->member))
static void llmpar__cuda_gaps(void *args, const size_t *gaps, size_t count)
{
    for (size_t i = 0; i < count; i++) memset((unsigned char *)args + gaps[i], 0, (8 - gaps[i] % 8) % 8);
}

/* A struct without pointers to host memory, and its gaps. */
#define LLMPAR__CUDA_NOTED(name, type, ...) \
    static llmpar_status llmpar__cuda_issue_##name(llmpar_device *device, llmpar_stream *stream, const void *args, const void *array) \
    { \
        (void)array; \
        return llmpar__cuda_##name(device, stream, (const type *)args); \
    } \
    static llmpar_status llmpar__cuda_note_##name(llmpar_device *device, llmpar_stream *stream, const type *args) \
    { \
        const size_t gaps[] = { __VA_ARGS__ }; \
        type own; \
        void *array; \
        if (!llmpar__cuda_notes(device, stream)) return llmpar__cuda_##name(device, stream, args); \
        memcpy(&own, args, sizeof own); \
        llmpar__cuda_gaps(&own, gaps, sizeof gaps / sizeof *gaps); \
        return llmpar__cuda_noting(device, stream, llmpar__cuda_issue_##name, &own, sizeof own, 0, &array); \
    }
LLMPAR__CUDA_NOTED(rmsnorm, llmpar_rmsnorm_args, LLMPAR__CUDA_GAP(llmpar_rmsnorm_args, dtype))
LLMPAR__CUDA_NOTED(rmsnorm_backward, llmpar_rmsnorm_backward_args, LLMPAR__CUDA_GAP(llmpar_rmsnorm_backward_args, tokens.canon), LLMPAR__CUDA_GAP(llmpar_rmsnorm_backward_args, dtype))
LLMPAR__CUDA_NOTED(rope, llmpar_rope_args, LLMPAR__CUDA_GAP(llmpar_rope_args, inverse))
LLMPAR__CUDA_NOTED(attention, llmpar_attention_args, LLMPAR__CUDA_GAP(llmpar_attention_args, dtype))
LLMPAR__CUDA_NOTED(attention_backward, llmpar_attention_backward_args, LLMPAR__CUDA_GAP(llmpar_attention_backward_args, forward.dtype), LLMPAR__CUDA_GAP(llmpar_attention_backward_args, dkv_dtype))
LLMPAR__CUDA_NOTED(swiglu, llmpar_swiglu_args, LLMPAR__CUDA_GAP(llmpar_swiglu_args, dtype))
LLMPAR__CUDA_NOTED(swiglu_backward, llmpar_swiglu_backward_args, LLMPAR__CUDA_GAP(llmpar_swiglu_backward_args, dtype))
LLMPAR__CUDA_NOTED(embedding, llmpar_embedding_args, LLMPAR__CUDA_GAP(llmpar_embedding_args, dtype))
LLMPAR__CUDA_NOTED(embedding_backward, llmpar_embedding_backward_args, LLMPAR__CUDA_GAP(llmpar_embedding_backward_args, tokens.canon), LLMPAR__CUDA_GAP(llmpar_embedding_backward_args, dtype))
LLMPAR__CUDA_NOTED(xent_max, llmpar_xent_args, LLMPAR__CUDA_GAP(llmpar_xent_args, canon), LLMPAR__CUDA_GAP(llmpar_xent_args, dtype))
LLMPAR__CUDA_NOTED(xent_sum, llmpar_xent_args, LLMPAR__CUDA_GAP(llmpar_xent_args, canon), LLMPAR__CUDA_GAP(llmpar_xent_args, dtype))
LLMPAR__CUDA_NOTED(xent_loss, llmpar_xent_loss_args, LLMPAR__CUDA_GAP(llmpar_xent_loss_args, dtype))
LLMPAR__CUDA_NOTED(xent_backward, llmpar_xent_backward_args, LLMPAR__CUDA_GAP(llmpar_xent_backward_args, forward.canon), LLMPAR__CUDA_GAP(llmpar_xent_backward_args, forward.dtype), LLMPAR__CUDA_GAP(llmpar_xent_backward_args, scale))
LLMPAR__CUDA_NOTED(add, llmpar_add_args, LLMPAR__CUDA_GAP(llmpar_add_args, dtype))
LLMPAR__CUDA_NOTED(scale, llmpar_scale_args, LLMPAR__CUDA_GAP(llmpar_scale_args, dtype))
LLMPAR__CUDA_NOTED(cast, llmpar_cast_args, LLMPAR__CUDA_GAP(llmpar_cast_args, in_dtype), LLMPAR__CUDA_GAP(llmpar_cast_args, out_dtype))
LLMPAR__CUDA_NOTED(copy_rows, llmpar_copy_rows_args, LLMPAR__CUDA_GAP(llmpar_copy_rows_args, out))
#undef LLMPAR__CUDA_NOTED

/* What a list points to is copied, and the pointer to it left out: it differs from call to call. */
static llmpar_status llmpar__cuda_issue_gemm(llmpar_device *device, llmpar_stream *stream, const void *args, const void *array)
{
    llmpar_gemm_args own = *(const llmpar_gemm_args *)args;
    own.segments = (const llmpar_gemm_segment *)array;
    return llmpar__cuda_gemm(device, stream, &own);
}

static llmpar_status llmpar__cuda_note_gemm(llmpar_device *device, llmpar_stream *stream, const llmpar_gemm_args *args)
{
    llmpar_gemm_args own = *args;
    void *array;
    llmpar_status status;
    if (!llmpar__cuda_notes(device, stream) || args->segment_count < 0 || (args->segment_count && !args->segments)) return llmpar__cuda_gemm(device, stream, args); /* a wrong one is refused there */
    own.segments = NULL;
    status = llmpar__cuda_noting(device, stream, llmpar__cuda_issue_gemm, &own, sizeof own, (size_t)args->segment_count * sizeof *args->segments, &array);
    for (int32_t s = 0; s < args->segment_count && !status; s++) { /* member by member: so no padding is compared */
        llmpar_gemm_segment *to = (llmpar_gemm_segment *)array + s;
        const llmpar_gemm_segment *from = &args->segments[s];
        to->a = from->a;
        to->b = from->b;
        to->lda = from->lda;
        to->ldb = from->ldb;
        to->k = from->k;
        to->piece = from->piece;
        to->interleaved = from->interleaved;
        to->begin = from->begin;
    }
    return status;
}

#define LLMPAR__CUDA_NOTED(name) \
    static llmpar_status llmpar__cuda_issue_##name(llmpar_device *device, llmpar_stream *stream, const void *args, const void *array) \
    { \
        llmpar_tree_sum_args own = *(const llmpar_tree_sum_args *)args; \
        own.in = (const void *const *)array; \
        return llmpar__cuda_##name(device, stream, &own); \
    } \
    static llmpar_status llmpar__cuda_note_##name(llmpar_device *device, llmpar_stream *stream, const llmpar_tree_sum_args *args) \
    { \
        const size_t gaps[] = { LLMPAR__CUDA_GAP(llmpar_tree_sum_args, n), LLMPAR__CUDA_GAP(llmpar_tree_sum_args, dtype) }; \
        llmpar_tree_sum_args own = *args; \
        void *array; \
        llmpar_status status; \
        if (!llmpar__cuda_notes(device, stream) || args->n < 0 || (args->n && !args->in)) return llmpar__cuda_##name(device, stream, args); \
        own.in = NULL; \
        llmpar__cuda_gaps(&own, gaps, 2); \
        status = llmpar__cuda_noting(device, stream, llmpar__cuda_issue_##name, &own, sizeof own, (size_t)args->n * sizeof *args->in, &array); \
        if (!status && args->n) memcpy(array, args->in, (size_t)args->n * sizeof *args->in); \
        return status; \
    }
LLMPAR__CUDA_NOTED(tree_sum)
LLMPAR__CUDA_NOTED(max)
#undef LLMPAR__CUDA_NOTED

typedef struct llmpar__cuda_zero_args { void *out; size_t bytes; } llmpar__cuda_zero_args;
static llmpar_status llmpar__cuda_issue_zero(llmpar_device *device, llmpar_stream *stream, const void *args, const void *array)
{
    const llmpar__cuda_zero_args *own = (const llmpar__cuda_zero_args *)args;
    (void)array;
    return llmpar__cuda_zero(device, stream, own->out, own->bytes);
}
static llmpar_status llmpar__cuda_note_zero(llmpar_device *device, llmpar_stream *stream, void *out, size_t bytes)
{
    llmpar__cuda_zero_args own = { out, bytes };
    void *array;
    return llmpar__cuda_notes(device, stream) ? llmpar__cuda_noting(device, stream, llmpar__cuda_issue_zero, &own, sizeof own, 0, &array) : llmpar__cuda_zero(device, stream, out, bytes);
}

/* Over the slots that do it at once. */
static void llmpar__cuda_regions_fill(llmpar_device *d)
{
    d->region_begin = llmpar__cuda_region_begin;
    d->region_end = llmpar__cuda_region_end;
    d->zero = llmpar__cuda_note_zero;
    d->gemm = llmpar__cuda_note_gemm;
    d->rmsnorm = llmpar__cuda_note_rmsnorm;
    d->rmsnorm_backward = llmpar__cuda_note_rmsnorm_backward;
    d->rope = llmpar__cuda_note_rope;
    d->attention = llmpar__cuda_note_attention;
    d->attention_backward = llmpar__cuda_note_attention_backward;
    d->swiglu = llmpar__cuda_note_swiglu;
    d->swiglu_backward = llmpar__cuda_note_swiglu_backward;
    d->embedding = llmpar__cuda_note_embedding;
    d->embedding_backward = llmpar__cuda_note_embedding_backward;
    d->xent_max = llmpar__cuda_note_xent_max;
    d->xent_sum = llmpar__cuda_note_xent_sum;
    d->xent_loss = llmpar__cuda_note_xent_loss;
    d->xent_backward = llmpar__cuda_note_xent_backward;
    d->tree_sum = llmpar__cuda_note_tree_sum;
    d->max = llmpar__cuda_note_max;
    d->add = llmpar__cuda_note_add;
    d->scale = llmpar__cuda_note_scale;
    d->cast = llmpar__cuda_note_cast;
    d->copy_rows = llmpar__cuda_note_copy_rows;
}

#undef LLMPAR__CUDA_GAP
#undef LLMPAR__CUDA_REGIONS
#undef LLMPAR__CUDA_REGION_PLACES
#undef LLMPAR__CUDA_REGION_CHANGES
