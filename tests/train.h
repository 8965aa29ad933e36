/* train: a small training job on thread ranks, for the tests that compare meshes, delay devices and make ranks fail.

   Describe a train_job, call train_run, look at train_result: what every rank was told, and the files that rank 0 wrote. */
#ifndef TRAIN_H
#define TRAIN_H

#include "test.h"

#include <unistd.h>

enum { TRAIN_RANKS = 8, TRAIN_STEPS = 5, TRAIN_FILES = 3 };

typedef struct train_bytes { unsigned char *data; size_t bytes; } train_bytes;

typedef struct train_result {
    llmpar_status status;
    llmpar_error error;                         /* of the launch */
    int ranks, steps, on_mpi;
    llmpar_step step[TRAIN_RANKS][TRAIN_STEPS]; /* as told to each rank */
    llmpar_status rank_status[TRAIN_RANKS];     /* what each rank's own function ended with */
    uint64_t live[TRAIN_RANKS];                 /* bytes on a rank's heap after its clean-up */
    train_bytes file[TRAIN_FILES];              /* gradients of the first step, of the last, the saved model; with keep_files */
} train_result;

typedef struct train_job {
    const llmpar_llama_config *config;
    int32_t dp_replicate, dp_shard, tp;         /* 0: 1 */
    int32_t sp, zero, prefetch, accum, no_sync; /* zero: 0 .. 3 */
    int32_t threads, steps, canon, wrap;
    const char *cpu;
    const llmpar_backend *backend;              /* of the launch */
    llmpar_exact exact;
    llmpar_dtype dtype;
    int64_t batch, seq_len;
    uint64_t memory_limit;
    llmpar_trainer_desc policy;                 /* whatever else the recipe is told; the fields above are set on top of it */
    int keep_files, on_threads;                 /* on_threads: not on MPI processes */
    llmpar_sequence_fn sequence;                /* default train_sequence */
    void *sequence_user;
    /* Hooks, on the rank's thread: before anything else; when the trainer exists; when all is destroyed. NULL: none. */
    llmpar_status (*begin)(struct train_job *job, llmpar_ctx *ctx);
    llmpar_status (*ready)(struct train_job *job, llmpar_ctx *ctx, llmpar_llama *model, llmpar_trainer *trainer);
    llmpar_status (*before_step)(struct train_job *job, llmpar_ctx *ctx, llmpar_trainer *trainer, int step);
    llmpar_status (*finish)(struct train_job *job, llmpar_ctx *ctx, llmpar_trainer *trainer); /* behind the last step and save */
    llmpar_status (*failed)(struct train_job *job, llmpar_ctx *ctx, llmpar_trainer *trainer, llmpar_status status); /* before the clean-up of a failure; may look, must not talk */
    void (*end)(struct train_job *job, llmpar_ctx *ctx);
    void *user;
    const llmpar_allocator *allocator;
    double deadline;
    train_result *result;                       /* set by train_run */
    char directory[320];                        /* set by train_run */
} train_job;

static const char *const train_file_name[TRAIN_FILES] = {"first gradients", "last gradients", "model"};

/* Configurations; extents are chosen so that most meshes cut some of them unevenly. */
static inline llmpar_llama_config train_config(int tied)
{
    llmpar_llama_config c;
    memset(&c, 0, sizeof c);
    c.vocab = 509;
    c.hidden = 48;
    c.intermediate = tied ? 100 : 104;
    c.layers = tied ? 2 : 3;
    c.heads = 8;
    c.kv_heads = 4;
    c.head_dim = 8;
    c.max_positions = 64;
    c.rms_eps = 1e-5;
    c.rope_theta = 10000;
    c.tied = tied;
    c.bos_id = -1;
    c.init_std = 0.15;
    if (tied) {
        c.rope_scaling.kind = LLMPAR_ROPE_LLAMA3;
        c.rope_scaling.original_max_positions = 16;
        c.rope_scaling.factor = 4;
        c.rope_scaling.low_freq_factor = 1;
        c.rope_scaling.high_freq_factor = 4;
    }
    return c;
}

/* What most tests begin with: all sharded, two steps, files kept. */
static inline train_job train_job_of(const llmpar_llama_config *config, int32_t replicate, int32_t shard, int32_t tp)
{
    train_job job;
    memset(&job, 0, sizeof job);
    job.config = config;
    job.dp_replicate = replicate;
    job.dp_shard = shard;
    job.tp = tp;
    job.zero = 3;
    job.steps = 2;
    job.keep_files = 1;
    return job;
}

static inline uint64_t train_mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* Half of the tokens are from a handful of ids, so that embedding rows are hit often; every ninth target is not counted, and no target of
   every 16th sequence. user: NULL, or the number of tokens per sequence (int64_t); default 24. */
static inline llmpar_status train_sequence(void *user, int64_t index, int32_t *tokens)
{
    int64_t length = user ? *(const int64_t *)user : 24;
    for (int64_t i = 0; i <= length; i++) {
        uint64_t r = train_mix((uint64_t)index * 1000003u + (uint64_t)i);
        tokens[i] = (int32_t)(r & 1 ? (r >> 8) % 509 : 37 * ((r >> 8) % 11));
        if ((r >> 40) % 9 == 0 || (index % 16 == 5 && i > 0)) tokens[i] = -1;
    }
    return LLMPAR_OK;
}

/* For a hook: what the model says behind the prompt, ids[0 .. tokens) greedily, ids[tokens .. 2 tokens) sampled; each alone, and both at once, which is the same. */
static inline llmpar_status train_generate(llmpar_llama *model, llmpar_trainer *trainer, const int32_t *prompt, int32_t prompt_count, int32_t tokens, int32_t *ids)
{
    llmpar_fsdp *fsdp = llmpar_trainer_fsdp(trainer);
    llmpar_status status = LLMPAR_OK, end;
    llmpar_generator_desc together = {0, 2};
    llmpar_generator *generator = NULL;
    llmpar_generate_desc desc[2];
    int32_t count[2], *room = (int32_t *)calloc((size_t)tokens, 2 * sizeof *room), *at_once[2] = {room, room + tokens};
    memset(desc, 0, sizeof desc);
    for (int i = 0; i < 2 && !status; i++) {
        desc[i].prompt = prompt;
        desc[i].prompt_count = prompt_count;
        desc[i].tokens = tokens;
        desc[i].temperature = i;
        desc[i].top_p = 0.9;
        desc[i].seed = 3;
        status = llmpar_llama_generate(model, fsdp, &desc[i], ids + i * tokens, &count[i]);
        if (!status) CHECK_INT(count[i], tokens);
    }
    if (!status) status = llmpar_generator_create(model, fsdp, &together, &generator);
    if (!status) status = llmpar_generator_run(generator, desc, 2, at_once, count);
    if (!status) CHECK_BYTES(room, ids, 2 * (size_t)tokens * sizeof *ids);
    end = llmpar_generator_destroy(generator);
    free(room);
    return status ? status : end;
}

static inline train_bytes train_read(const char *path)
{
    train_bytes b = {NULL, 0};
    FILE *f = fopen(path, "rb");
    if (!f) return b;
    fseek(f, 0, SEEK_END);
    b.bytes = (size_t)ftell(f);
    rewind(f);
    b.data = (unsigned char *)malloc(b.bytes + 1);
    if (!b.data || fread(b.data, 1, b.bytes, f) != b.bytes) { free(b.data); b.data = NULL; b.bytes = 0; }
    fclose(f);
    return b;
}

static inline void train_result_free(train_result *r)
{
    for (int i = 0; i < TRAIN_FILES; i++) { free(r->file[i].data); r->file[i].data = NULL; }
}

static inline void train_path(const train_job *job, int file, char out[400])
{
    static const char *const name[TRAIN_FILES] = {"first.safetensors", "last.safetensors", "model/model.safetensors"};
    snprintf(out, 400, "%s/%s", job->directory, name[file]);
}

static inline llmpar_status train_steps(train_job *job, llmpar_ctx *ctx, llmpar_trainer *trainer)
{
    char path[400];
    llmpar_status status = LLMPAR_OK;
    for (int i = 0; i < job->steps && !status; i++) {
        if (job->before_step) status = job->before_step(job, ctx, trainer, i);
        if (!status && job->keep_files && (i == 0 || i + 1 == job->steps)) {
            train_path(job, i ? 1 : 0, path);
            status = llmpar_trainer_save_gradients(trainer, path);
        }
        if (!status) status = llmpar_trainer_step(trainer, &job->result->step[ctx->rank][i]);
    }
    if (!status && job->keep_files) {
        snprintf(path, sizeof path, "%s/model", job->directory);
        status = llmpar_save_hf(trainer, path);
    }
    return status;
}

static inline void train_quiet(void *user, int rank, llmpar_log_level level, const char *line) { (void)user; (void)rank; (void)level; (void)line; }
static inline void train_sink(void *user, llmpar_sink_kind kind, const char *line) { (void)user; (void)kind; (void)line; }

static inline llmpar_status train_rank(llmpar_ctx *ctx, void *user)
{
    train_job *job = (train_job *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_llama *model = NULL;
    llmpar_trainer *trainer = NULL;
    llmpar_mesh_desc mesh_desc;
    llmpar_llama_desc model_desc;
    llmpar_trainer_desc desc;
    memset(&mesh_desc, 0, sizeof mesh_desc);
    memset(&model_desc, 0, sizeof model_desc);
    desc = job->policy;
    mesh_desc.dp_replicate = job->dp_replicate;
    mesh_desc.dp_shard = job->dp_shard;
    mesh_desc.tp = job->tp;
    model_desc.config = job->config;
    model_desc.seed = 7;
    model_desc.wrap = job->wrap;
    desc.sequence = job->sequence ? job->sequence : train_sequence;
    desc.sequence_user = job->sequence_user;
    desc.seq_len = job->seq_len;
    desc.batch = job->batch;
    desc.grad_accum = job->accum;
    desc.no_sync = job->no_sync;
    desc.zero = LLMPAR_ZERO_0 + job->zero;
    desc.prefetch = job->prefetch;
    desc.offload_dir = job->directory[0] ? job->directory : NULL;
    desc.sequence_parallel = job->sp;
    desc.exact = job->exact;
    desc.canon = job->canon;
    desc.dtype = job->dtype;
    desc.lr = 1e-2;
    desc.warmup = 1;
    desc.total_steps = TRAIN_STEPS;
    desc.memory_limit = job->memory_limit;
    desc.log_every = -1;
    desc.sink = train_sink;
    llmpar_status status = job->begin ? job->begin(job, ctx) : LLMPAR_OK;
    if (!status) status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_llama_create(ctx, &model_desc, &model);
    if (!status) status = llmpar_parallelize(mesh, model, &desc, &trainer);
    if (!status && job->ready) status = job->ready(job, ctx, model, trainer);
    if (!status) status = train_steps(job, ctx, trainer);
    if (!status && job->finish) status = job->finish(job, ctx, trainer);
    if (status && job->failed) status = job->failed(job, ctx, trainer, status);
    llmpar_trainer_destroy(trainer);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    if (job->end) job->end(job, ctx);
    job->result->rank_status[ctx->rank] = status;
    return status;
}

static inline void train_check(const llmpar_ctx *ctx, void *user) { ((train_job *)user)->result->live[ctx->rank] = ctx->heap.live; }

/* Under mpirun: a job of as many ranks as there are processes runs on them, any other on rank threads of each. Local files of the former are rank 0's. */
static inline int train_on_mpi(const train_result *result) { return result->on_mpi; }

/* Runs the job; defaults: B = 16, T = 24, TRAIN_STEPS steps. The caller frees *result. */
static inline void train_run(train_job *job, train_result *result)
{
    llmpar_launch_desc launch;
    char path[400];
    memset(&launch, 0, sizeof launch);
    memset(result, 0, sizeof *result);
    if (!job->batch) job->batch = 16;
    if (!job->seq_len) job->seq_len = 24;
    if (!job->steps) job->steps = TRAIN_STEPS;
    if (!job->accum) job->accum = 1;
    job->result = result;
    result->steps = job->steps;
    result->ranks = (job->dp_replicate ? job->dp_replicate : 1) * (job->dp_shard ? job->dp_shard : 1) * (job->tp ? job->tp : 1);
    for (int r = 0; r < TRAIN_RANKS; r++) result->rank_status[r] = LLMPAR_STATUS_COUNT; /* did not return */
    if (job->keep_files) {
        const char *root = getenv("TMPDIR");
        snprintf(job->directory, sizeof job->directory, "%.200s/llmpar-train-XXXXXX", root && root[0] ? root : "/tmp");
        if (!mkdtemp(job->directory)) { TEST_FAIL("cannot make %s", job->directory); return; }
    }
#ifdef LLMPAR_USE_MPI
    result->on_mpi = !job->on_threads && result->ranks == test_world;
    launch.transport = train_on_mpi(result) ? LLMPAR_TRANSPORT_MPI : LLMPAR_TRANSPORT_THREADS;
    if (job->keep_files && train_on_mpi(result)) {
        if (test_rank) rmdir(job->directory);
        MPI_Bcast(job->directory, (int)sizeof job->directory, MPI_BYTE, 0, MPI_COMM_WORLD);
    }
#endif
    launch.ranks = result->ranks;
    launch.threads = job->threads;
    launch.cpu = job->cpu;
    launch.backend = job->backend;
    launch.deadline = job->deadline;
    launch.allocator = job->allocator;
    launch.log = train_quiet;
    launch.check = train_check;
    result->status = llmpar_launch(&launch, train_rank, job, &result->error);
    if (!job->keep_files || (train_on_mpi(result) && test_rank)) return;
    for (int i = 0; i < TRAIN_FILES; i++) {
        train_path(job, i, path);
        result->file[i] = train_read(path);
        unlink(path);
    }
    snprintf(path, sizeof path, "%s/model/config.json", job->directory);
    unlink(path);
    snprintf(path, sizeof path, "%s/model", job->directory);
    rmdir(path);
    rmdir(job->directory);
}

/* The first tensor element in which two files differ, as text. */
static inline void train_difference(const train_bytes *got, const train_bytes *want, char *text, size_t capacity)
{
    llmpar_heap heap;
    llmpar_error error;
    llmpar_safetensors *a = NULL, *b = NULL;
    llmpar_heap_init(&heap, NULL);
    llmpar_error_clear(&error);
    snprintf(text, capacity, "%zu bytes, expected %zu", got->bytes, want->bytes);
    if (!llmpar_safetensors_open_memory(&heap, got->data, got->bytes, "got", &a, &error) && !llmpar_safetensors_open_memory(&heap, want->data, want->bytes, "want", &b, &error)) {
        size_t used = 0, tensors = 0;
        for (int32_t i = 0; i < b->count; i++) {
            const llmpar_safetensor *w = &b->tensor[i], *g = llmpar_safetensors_find(a, w->name);
            size_t item = llmpar_dtype_size(w->dtype), different = 0, first = 0;
            if (!g || g->bytes != w->bytes) { if (!used) used = (size_t)snprintf(text, capacity, "%s is missing or has another size", w->name); continue; }
            for (size_t k = 0; k < w->bytes; k += item)
                if (memcmp(got->data + g->begin + k, want->data + w->begin + k, item) && !different++) first = k / item;
            if (!different) continue;
            tensors++;
            if (used) continue;
            double x = 0, y = 0;
            float xf, yf;
            if (item == 8) { memcpy(&x, got->data + g->begin + 8 * first, 8); memcpy(&y, want->data + w->begin + 8 * first, 8); }
            else { memcpy(&xf, got->data + g->begin + 4 * first, 4); memcpy(&yf, want->data + w->begin + 4 * first, 4); x = xf; y = yf; }
            used = (size_t)snprintf(text, capacity, "%s[%zu] = %.17g, expected %.17g; %zu of its %zu elements differ", w->name, first, x, y, different, w->bytes / item);
        }
        if (used < capacity && tensors) snprintf(text + used, capacity - used, "; %zu of %d tensors differ", tensors, (int)b->count);
    } else {
        snprintf(text, capacity, "no safetensors: %.600s", error.text);
    }
    llmpar_safetensors_close(a);
    llmpar_safetensors_close(b);
}

/* The same bytes in everything: losses, norms and counts on every rank, and the three files. 1: all equal. */
static inline int train_same(const char *name, const train_result *got, const train_result *want)
{
    char text[800];
    int before = test_failures;
    if (got->status) { TEST_FAIL("%s: rank %d: %s: %s", name, (int)got->error.rank, llmpar_status_string(got->status), got->error.text); return 0; }
    for (int r = 0; r < got->ranks; r++) {
        if (train_on_mpi(got) && r != test_rank) continue;
        if (got->live[r]) TEST_FAIL("%s: rank %d: %llu bytes left", name, r, (unsigned long long)got->live[r]);
        for (int i = 0; i < want->steps; i++) {
            const llmpar_step *g = &got->step[r][i], *w = &want->step[train_on_mpi(want) ? test_rank : 0][i];
            if (!memcmp(&g->loss, &w->loss, sizeof g->loss) && !memcmp(&g->grad_norm, &w->grad_norm, sizeof g->grad_norm) && g->tokens == w->tokens && g->step == w->step && g->skipped == w->skipped) continue;
            TEST_FAIL("%s: rank %d step %d: loss %.17g norm %.17g tokens %lld, expected loss %.17g norm %.17g tokens %lld", name, r, i + 1, g->loss, g->grad_norm, (long long)g->tokens, w->loss, w->grad_norm, (long long)w->tokens);
            r = got->ranks;
            break;
        }
    }
    for (int i = 0; i < TRAIN_FILES && !(train_on_mpi(got) && test_rank); i++) {
        if (!want->file[i].data || !got->file[i].data) { if (want->file[i].data || got->file[i].data) TEST_FAIL("%s: no %s", name, train_file_name[i]); continue; }
        if (got->file[i].bytes == want->file[i].bytes && !memcmp(got->file[i].data, want->file[i].data, want->file[i].bytes)) continue;
        train_difference(&got->file[i], &want->file[i], text, sizeof text);
        TEST_FAIL("%s: %s: %s", name, train_file_name[i], text);
    }
    return test_failures == before;
}

#endif
