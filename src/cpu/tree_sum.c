/* tree_sum: the balanced tree over whole buffers, to one place or to several at once.

   All of it waits for memory: of two operands and two results four streams of lines move, and a core has at most a dozen or two on their way. So the loop names every line some time before it is needed, the
   lines to be written too; without that the result lines are only asked for when the store is already there (a third slower for buffers beyond the cache). They come to the second-level cache: the first has
   fewer lines on their way, and no room for nine buffers that lie a power of two apart. Additions alone have the same bits in vectors of any width, so there is one level for all.

   Results that are larger than a cache, and are no operand too, go past it on AMD's processors: a line that is written whole need not be read first, which is a third of what an all-reduce would move (16 MB
   between two threads on Zen 4: 1.4 times as fast; in place, where the lines are there already, half as fast). Intel's keep their line buffers longer for such stores than a fetch does (Cascade Lake: as fast, or slower). */
#include "cpu/cpu_internal.h"

#include <string.h>

#define LLMPAR__TREE_LINE 64u
#define LLMPAR__TREE_AHEAD 512u /* bytes; 1,024 is the same, 4,096 slower: beyond the first-level cache's ways */
#define LLMPAR__TREE_STEP 65536u /* bytes of each operand a task */
#define LLMPAR__TREE_LARGE 8388608u /* bytes of all results of a call; at 4 MiB they are as fast through the cache, where the next reader finds them */
#if defined(__x86_64__) && !defined(LLMPAR_NO_SIMD)
#define LLMPAR__TREE_PAST(o, v) __asm__("movntps %1, %0" : "=m"(o) : "x"(v))
#define LLMPAR__TREE_PAST_PAYS() (__builtin_cpu_init(), __builtin_cpu_is("amd") != 0)
#define LLMPAR__TREE_FENCE() __asm__ __volatile__("sfence" : : : "memory") /* such stores are not ordered before the release that tells of them */
#else
#define LLMPAR__TREE_PAST(o, v) ((o) = (v))
#define LLMPAR__TREE_PAST_PAYS() 0
#define LLMPAR__TREE_FENCE() ((void)0)
#endif
/* One line s[4] to byte i of out[0 .. outs). */
#define LLMPAR__TREE_STORE(loose) \
    for (int32_t j = 0; j < outs; j++) { \
        loose *o = (loose *)(void *)((char *)out[j] + i); \
        if (past) for (int v = 0; v < 4; v++) LLMPAR__TREE_PAST(o[v], s[v]); \
        else for (int v = 0; v < 4; v++) o[v] = s[v]; \
    }
#define LLMPAR__TREE_AT(place, j) (*(const place *)(const void *)((const char *)in[j] + at))
#define LLMPAR__TREE_OF_2(place, j) (LLMPAR__TREE_AT(place, j) + LLMPAR__TREE_AT(place, (j) + 1)) /* of operands j and j + 1 */
#define LLMPAR__TREE_OF_4(place, j) (LLMPAR__TREE_OF_2(place, j) + LLMPAR__TREE_OF_2(place, (j) + 2))

typedef struct llmpar__tree_job {
    const void *const *in; /* [n] */
    void *const *out;      /* [outs] */
    int32_t n, outs;
    int past; /* the caches */
    size_t bytes;
} llmpar__tree_job;

#define LLMPAR__TREE(name) llmpar__tree_f32_##name
#define LLMPAR__TREE_ITEM float
#include "cpu/tree_sum.inc"
#define LLMPAR__TREE(name) llmpar__tree_f64_##name
#define LLMPAR__TREE_ITEM double
#include "cpu/tree_sum.inc"
#define LLMPAR__TREE(name) llmpar__tree_u64_##name /* and signed ones: overflow wraps */
#define LLMPAR__TREE_ITEM uint64_t
#include "cpu/tree_sum.inc"

/* One operand: a copy, of bytes. */
typedef uint64_t llmpar__tree_bytes __attribute__((vector_size(16), aligned(1), may_alias));

static void llmpar__tree_copy(void *arg, int64_t task, int32_t worker)
{
    const llmpar__tree_job *job = (const llmpar__tree_job *)arg;
    const char *in = (const char *)job->in[0];
    void *const *out = job->out;
    int32_t outs = job->outs;
    const int past = job->past;
    size_t i = (size_t)task * LLMPAR__TREE_STEP, end = job->bytes - i < LLMPAR__TREE_STEP ? job->bytes : i + LLMPAR__TREE_STEP;
    (void)worker;
    for (; i + LLMPAR__TREE_LINE <= end; i += LLMPAR__TREE_LINE) {
        const llmpar__tree_bytes *p = (const llmpar__tree_bytes *)(const void *)(in + i);
        if (i + LLMPAR__TREE_AHEAD < end) {
            __builtin_prefetch(in + i + LLMPAR__TREE_AHEAD, 0, 3);
            for (int32_t j = 0; j < outs && !past; j++) __builtin_prefetch((const char *)out[j] + i + LLMPAR__TREE_AHEAD, 1, 3);
        }
        llmpar__tree_u64_vector s[4] = { p[0], p[1], p[2], p[3] };
        LLMPAR__TREE_STORE(llmpar__tree_bytes)
    }
    if (past) LLMPAR__TREE_FENCE();
    for (int32_t j = 0; j < outs && i < end; j++) memmove((char *)out[j] + i, in + i, end - i);
}

/* `sums` is not for copies: an operand alone has to be of a type that has sums. */
static llmpar_status llmpar__tree_run(llmpar_device *device, const llmpar_tree_sum_to_args *args, int sums)
{
    void (*fn)(void *arg, int64_t task, int32_t worker);
    llmpar__tree_job job;
    if (args->n < 1) return llmpar_error_set(device->error, LLMPAR_ERR_ARGUMENT, "tree_sum: n = %d, expected at least 1", (int)args->n);
    if (args->dtype == LLMPAR_F32) fn = llmpar__tree_f32_task;
    else if (args->dtype == LLMPAR_F64) fn = llmpar__tree_f64_task;
    else if (args->dtype == LLMPAR_I64 || args->dtype == LLMPAR_U64) fn = llmpar__tree_u64_task;
    else if (args->n == 1 && !sums) fn = llmpar__tree_copy;
    else return llmpar_error_set(device->error, LLMPAR_ERR_UNSUPPORTED, "tree_sum: dtype %s, expected f32, f64, i64 or u64", llmpar_dtype_name(args->dtype));
    if (args->n == 1) fn = llmpar__tree_copy;
    job.in = args->in;
    job.out = args->out;
    job.n = args->n;
    job.outs = args->outs;
    job.bytes = args->count * llmpar_dtype_size(args->dtype);
    job.past = job.bytes >= LLMPAR__TREE_LARGE / (size_t)(args->outs > 0 ? args->outs : 1) && LLMPAR__TREE_PAST_PAYS();
    for (int32_t j = 0; j < args->outs; j++) {
        job.past &= (uintptr_t)args->out[j] % 16 == 0;
        for (int32_t i = 0; i < args->n; i++) job.past &= args->out[j] != args->in[i];
    }
    llmpar__pool_run((llmpar__cpu *)device->state, fn, &job, (int64_t)((job.bytes + LLMPAR__TREE_STEP - 1) / LLMPAR__TREE_STEP));
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_tree_sum_to(llmpar_device *device, const llmpar_tree_sum_to_args *args) { return llmpar__tree_run(device, args, 0); }

LLMPAR__PRIVATE_DEF llmpar_status llmpar__cpu_tree_sum(llmpar_device *device, llmpar_stream *stream, const llmpar_tree_sum_args *args)
{
    llmpar_tree_sum_to_args to;
    (void)stream;
    to.in = args->in;
    to.n = args->n;
    to.count = args->count;
    to.out = &args->out;
    to.outs = 1;
    to.dtype = args->dtype;
    return llmpar__tree_run(device, &to, 1);
}

#undef LLMPAR__TREE_LINE
#undef LLMPAR__TREE_AHEAD
#undef LLMPAR__TREE_STEP
#undef LLMPAR__TREE_LARGE
#undef LLMPAR__TREE_PAST
#undef LLMPAR__TREE_PAST_PAYS
#undef LLMPAR__TREE_FENCE
#undef LLMPAR__TREE_STORE
#undef LLMPAR__TREE_AT
#undef LLMPAR__TREE_OF_2
#undef LLMPAR__TREE_OF_4
