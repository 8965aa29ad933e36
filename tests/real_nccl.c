/* The CUDA device and the NCCL communicator together: every collective against a plain definition, bit for bit, splits, streams that hand data to each other, and a training job with the bits of one rank.

     real_nccl                 one rank in this process
     real_nccl --processes 4   four processes, forked before any call of CUDA; on one GPU, each a machine of its own to NCCL (over the loopback: correctness, not speed)
     real_nccl --threads 4     four rank threads, a GPU each (or with the emulated device and the stand-in for NCCL)
     real_nccl --faults 3      three processes; rank 1 fails, is killed, is stopped, stays away, while the others' streams wait for it on two communicators: everybody ends, and says why

   Not a program of the suite: make build/cuda/real_nccl against the real library (tools/gpu_check), make test-nccl builds it against the stand-in. The last line is "N passed, N failed". */
#define _GNU_SOURCE 1
#include "collectives.h"
#include "cuda.h"
#include "llmpar_nccl.h"
#include "ports.h"
#include "train.h"

#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* Of the stand-in; absent with the real library. */
#include "fake_nccl.h"
extern int (*fake_nccl_await)(void *stream, int (*ready)(void *arg), void (*done)(void *arg), void *arg) __attribute__((weak));
extern void (*fake_nccl_moved)(void) __attribute__((weak));
extern fake_nccl_state fake_nccl __attribute__((weak));
int emulated_cuda_await(void *stream, int (*ready)(void *arg), void (*done)(void *arg), void *arg) __attribute__((weak));
void emulated_cuda_moved(void) __attribute__((weak));

typedef struct work { char directory[300]; size_t most; int checks, one_device, of, fault; /* of: ranks of the jobs that are run, or compared with; fault: 0 none, else of faults[] */ } work;
static const char *const faults[] = { "none", "fails", "killed", "stopped", "late" };
enum { FAULTS = sizeof faults / sizeof faults[0], LATE = FAULTS - 1 };
#define LATE_DEADLINE (emulated_cuda ? 3.0 : 10.0) /* which the start has to keep too */

/* ---- what one rank does ---- */

/* With one rank the wrappers call no collective: here the slots are, and NCCL with them. */
static void alone(llmpar_ctx *ctx)
{
    enum { N = 1000 };
    llmpar_comm *comm = ctx->comm;
    llmpar_device *device = ctx->device;
    llmpar_stream *stream = NULL;
    float host[2 * N], back[N], *x = NULL;
    CHECK_OK(device->stream_create(device, "alone", &stream));
    CHECK_OK(device->alloc(device, sizeof host, (void **)&x));
    for (int i = 0; i < 2 * N; i++) host[i] = (float)i;
    for (int how = 0; how < 6; how++) {
        llmpar_collective call = { .send = x, .recv = x + N, .count = how == 5 ? N / 20 : N, .blocks = how == 5 ? 20 : 1, .dtype = LLMPAR_F32, .tag = "alone" };
        CHECK_OK(device->copy(device, stream, x, host, sizeof host));
        if (how == 0) CHECK_OK(comm->all_gather(comm, stream, &call));
        if (how == 1 || how == 5) CHECK_OK(comm->reduce_scatter(comm, stream, &call));
        if (how == 2) CHECK_OK(comm->all_reduce(comm, stream, &call));
        if (how == 3) CHECK_OK(comm->broadcast(comm, stream, &call));
        if (how == 4) CHECK_OK(comm->all_to_all(comm, stream, &call));
        CHECK_OK(device->copy(device, stream, back, x + N, sizeof back));
        CHECK_OK(device->synchronize(device, stream));
        CHECK_BYTES(back, host, sizeof back);
    }
    CHECK_OK(comm->barrier(comm, stream, "alone"));
    CHECK_OK(device->synchronize(device, stream));
    device->free(device, x, sizeof host);
    device->stream_destroy(device, stream);
}

/* Rounds on two streams and two communicators without a wait of the host: x goes round, is summed and overwritten. */
static llmpar_status streams(llmpar_ctx *ctx)
{
    enum { N = 3000, ROUNDS = 10 };
    llmpar_device *device = ctx->device;
    llmpar_comm *pair = NULL;
    llmpar_stream *stream[2] = { NULL, NULL };
    llmpar_event *event[2] = { NULL, NULL };
    int64_t *x = NULL, *y = NULL, host[N], back[N];
    size_t bytes = N * sizeof *x;
    llmpar_status st = llmpar_comm_split(ctx->comm, ctx->rank / 2, 0, "pair", &pair);
    for (int i = 0; i < 2 && !st; i++) st = device->stream_create(device, i ? "gather" : "compute", &stream[i]);
    for (int i = 0; i < 2 && !st; i++) st = device->event_create(device, &event[i]);
    if (!st) st = device->alloc(device, bytes, (void **)&x);
    if (!st) st = device->alloc(device, bytes, (void **)&y);
    for (int i = 0; i < N; i++) host[i] = ctx->rank + 1 + i;
    if (!st) st = device->copy(device, stream[0], x, host, bytes);
    for (int round = 0; round < ROUNDS && !st; round++) {
        llmpar_collective call = { .send = x, .recv = y, .count = N, .dtype = LLMPAR_I64, .tag = "round" };
        st = llmpar_all_reduce(ctx->comm, stream[0], &call); /* y: the sum over all ranks */
        if (!st) st = device->event_record(device, stream[0], event[0]);
        if (!st) st = device->event_wait(device, stream[1], event[0]);
        call.send = call.recv = y;
        call.op = LLMPAR_MAX;
        if (!st && pair->ranks > 1) st = llmpar_all_reduce(pair, stream[1], &call); /* of equals */
        if (!st && round + 1 < ROUNDS) st = device->zero(device, stream[1], y, bytes);
        if (!st) st = device->event_record(device, stream[1], event[1]);
        if (!st) st = device->event_wait(device, stream[0], event[1]);
    }
    if (!st) st = device->copy(device, stream[0], back, y, bytes);
    for (int i = 0; i < 2; i++) {
        llmpar_status waited = stream[i] ? device->synchronize(device, stream[i]) : LLMPAR_OK;
        if (!st) st = waited;
    }
    for (int i = 0; i < N && !st; i++) {
        int64_t want = (int64_t)ctx->world * (ctx->world + 1) / 2 + (int64_t)i * ctx->world;
        if (back[i] == want) continue;
        TEST_FAIL("element %d: %lld, want %lld", i, (long long)back[i], (long long)want);
        break;
    }
    llmpar_comm_destroy(pair);
    device->free(device, x, bytes);
    device->free(device, y, bytes);
    for (int i = 0; i < 2; i++) {
        if (event[i]) device->event_destroy(device, event[i]);
        if (stream[i]) device->stream_destroy(device, stream[i]);
    }
    return st;
}

/* The training jobs that fit this world; their files go to DIRECTORY/NAME. Of one rank: the ones to compare with. */
static const struct { const char *name; llmpar_dtype dtype; int32_t shard, tp; } jobs[] = {
    { "f32 2 tp", LLMPAR_F32, 1, 2 }, { "bf16 2 dp", LLMPAR_BF16, 2, 1 }, { "f32 2 x 2", LLMPAR_F32, 2, 2 }, { "bf16 4 tp", LLMPAR_BF16, 1, 4 },
};
enum { JOBS = sizeof jobs / sizeof jobs[0] };

static llmpar_status train(llmpar_ctx *ctx, work *w)
{
    llmpar_status st = LLMPAR_OK;
    for (int j = 0; j < JOBS && !st; j++) {
        static train_result result[JOBS]; /* threads write what is theirs */
        llmpar_llama_config config = train_config(0);
        train_job job;
        memset(&job, 0, sizeof job);
        if (jobs[j].shard * jobs[j].tp != w->of) continue;
        job.config = &config;
        job.dp_shard = ctx->world > 1 ? jobs[j].shard : 1;
        job.tp = ctx->world > 1 ? jobs[j].tp : 1;
        job.zero = 3;
        job.prefetch = 1;
        job.dtype = jobs[j].dtype;
        job.batch = cuda_small() ? 4 : 16;
        job.seq_len = cuda_small() ? 8 : 24;
        job.sequence_user = &job.seq_len;
        job.accum = 1;
        job.steps = 2;
        job.keep_files = 1;
        job.result = &result[j];
        snprintf(job.directory, sizeof job.directory, "%.280s/%s", w->directory, jobs[j].name);
        mkdir(job.directory, 0777); /* may be there */
        st = train_rank(ctx, &job);
    }
    return st;
}

/* Rank 1 goes; what the others have enqueued waits for it, one communicator's behind another's. */
static llmpar_status fault(llmpar_ctx *ctx, const work *w)
{
    enum { N = 100 };
    llmpar_device *device = ctx->device;
    llmpar_comm *comm[2] = { ctx->comm, NULL };
    llmpar_stream *stream[2] = { NULL, NULL };
    float *x = NULL;
    llmpar_status st = llmpar_comm_split(ctx->comm, 0, 0, "others", &comm[1]);
    for (int i = 0; i < 2 && !st; i++) st = device->stream_create(device, "comm", &stream[i]);
    if (!st) st = device->alloc(device, N * sizeof *x, (void **)&x);
    if (!st) st = device->zero(device, stream[0], x, N * sizeof *x);
    for (int round = 0; round < 2; round++) { /* the first makes the connections */
        llmpar_collective call = { .send = x, .recv = x, .count = N, .dtype = LLMPAR_F32, .tag = round ? "waits" : "first" };
        for (int i = 0; i < 2 && round && !st && ctx->rank == 1; i++) {
            fflush(NULL);
            if (w->fault == 2) raise(SIGKILL);
            if (w->fault == 3) raise(SIGSTOP);
            test_sleep(w->fault == LATE ? LATE_DEADLINE + 4 : 0.3);
            st = w->fault == LATE ? LLMPAR_OK : llmpar_fail(ctx, LLMPAR_ERR_IO, "rank 1 has failed");
            break;
        }
        for (int i = 0; i < 6 && !st; i++) st = llmpar_all_reduce(comm[i % 2], stream[i % 2], &call);
        for (int i = 0; i < 2; i++) {
            llmpar_status waited = stream[i] ? device->synchronize(device, stream[i]) : LLMPAR_OK;
            if (!st) st = waited;
        }
    }
    if (st && ctx->rank == 1 && w->fault == 1) ctx->comm->abort(ctx->comm, &ctx->error); /* as launch does for it; the end of its communicators would wait for the others' */
    llmpar_comm_destroy(comm[1]);
    if (x) device->free(device, x, N * sizeof *x);
    for (int i = 0; i < 2; i++)
        if (stream[i]) device->stream_destroy(device, stream[i]);
    return st;
}

static llmpar_status rank(llmpar_ctx *ctx, void *user)
{
    work *w = (work *)user;
    llmpar_status st = LLMPAR_OK;
    double begin = test_clock(), checked, done;
    if (w->fault) return fault(ctx, w);
    if (ctx->world == 1) alone(ctx);
    if (w->checks) st = collectives_check(ctx->comm, w->most);
    for (int v = 0; v < 4 && w->checks && !st; v++) { /* several slices, and blocks that are packed */
        sample large = { v == 3 ? 101 : 20011, v == 3 ? 40 : v == 2 ? 3 : 1, v == 1 ? LLMPAR_I64 : LLMPAR_F32, LLMPAR_SUM, v == 1, NULL, 0 };
        if (!cuda_small() || v == 3) st = one_sample(ctx->comm, &large);
    }
    checked = test_clock();
    if (w->checks && !st) st = collectives_splits(ctx, NULL);
    if (w->checks && !st) st = streams(ctx);
    done = test_clock();
    if (!st) st = train(ctx, w);
    if (ctx->rank == 0) fprintf(stderr, "%d ranks: values %.1f s, splits and streams %.1f s, training %.1f s\n", (int)ctx->world, checked - begin, done - checked, test_clock() - done); /* where a GPU's time went */
    return st;
}

/* ---- launching ---- */

static void print_line(void *user, int r, llmpar_log_level level, const char *line)
{
    (void)user;
    if (level != LLMPAR_LOG_INFO) fprintf(stderr, "rank %d: %s\n", r, line);
}

static llmpar_status launch(llmpar_transport transport, int ranks, work *w)
{
    llmpar_backend backend;
    llmpar_error error;
    llmpar_nccl_desc nccl;
    memset(&nccl, 0, sizeof nccl);
    memset(&backend, 0, sizeof backend);
    nccl.one_device = w->one_device;
    nccl.deadline = w->fault == LATE ? LATE_DEADLINE : 50;
    if (w->fault) nccl.silence = 3;
    nccl.slice = 65536; /* several slices of what is 20,011 floats */
    if (&fake_nccl_await && &emulated_cuda_await) {
        fake_nccl_await = emulated_cuda_await;
        fake_nccl_moved = emulated_cuda_moved;
    }
    llmpar_cuda_backend(NULL, &backend);
    llmpar_nccl_backend(&nccl, &backend);
    llmpar_launch_desc desc = { .ranks = ranks, .transport = transport, .backend = &backend, .log = print_line, .threads = 1, .deadline = 50, .check = test_no_leak };
    double begin = test_clock();
    llmpar_status st = llmpar_launch(&desc, rank, w, &error);
    if (&fake_nccl_await) CHECK_INT(fake_nccl.misuse, 0);
    if (w->fault) {
        fprintf(stderr, "%s: after %.1f s: %s: rank %d: %s\n", faults[w->fault], test_clock() - begin, llmpar_status_string(st), (int)error.rank, error.text);
        CHECK(st != LLMPAR_OK && (error.rank == 1 || strstr(error.text, "rank 1")));
        return LLMPAR_OK;
    }
    if (st) TEST_FAIL("%d ranks: rank %d: %s: %s", ranks, (int)error.rank, llmpar_status_string(st), error.text);
    return st;
}

static void variable(const char *name, const char *format, int value)
{
    char text[64];
    snprintf(text, sizeof text, format, value);
    setenv(name, text, 1);
}

/* Forks; 1: all children ended well. No call of CUDA has been made here, nor is. */
static int processes(int ranks, work *w)
{
    pid_t child[64];
    int well = 1, port = port_free();
    for (int r = 0; r < ranks; r++) {
        fflush(NULL);
        child[r] = fork();
        if (child[r]) continue;
        if (w->fault) alarm(50); /* whoever hangs ends */
        variable("RANK", "%d", r);
        variable("WORLD_SIZE", "%d", ranks);
        variable("LOCAL_RANK", "%d", r);
        variable("LOCAL_WORLD_SIZE", "%d", ranks);
        setenv("MASTER_ADDR", "127.0.0.1", 1);
        variable("MASTER_PORT", "%d", port);
        if (w->one_device) {
            variable("NCCL_HOSTID", "r%d", r);
            setenv("NCCL_SOCKET_IFNAME", "lo", 1);
            setenv("NCCL_IB_DISABLE", "1", 1);
            setenv("NCCL_NET", "Socket", 1);
            setenv("NCCL_ALGO", "Ring", 1);
            setenv("NCCL_PROTO", "Simple", 1);
            setenv("NCCL_RAS_ENABLE", "0", 0); /* its port is one a machine */
            setenv("NCCL_DEBUG", "WARN", 0);   /* what it says of a failure is in the log */
        }
        llmpar_status st = launch(LLMPAR_TRANSPORT_ENVIRONMENT, ranks, w);
        fflush(NULL);
        _exit(st || test_failures ? 1 : 0);
    }
    for (int i = 0; i < ranks; i++) {
        int r = (i + 2) % ranks, status = 1; /* rank 1 last */
        if (w->fault > 1 && r == 1) kill(child[r], w->fault == LATE ? 0 : SIGKILL);
        if (w->fault > 1 && w->fault < LATE && r == 1 && child[r] > 0) {
            waitpid(child[r], &status, 0);
            continue;
        }
        if (child[r] < 0 || waitpid(child[r], &status, 0) != child[r] || status) {
            fprintf(stderr, "rank %d ended with %d\n", r, status);
            well = 0;
        }
    }
    return well;
}

/* ---- all of it ---- */

static int same_file(const char *a, const char *b)
{
    train_bytes x = train_read(a), y = train_read(b);
    int same = x.data && y.data && x.bytes == y.bytes && !memcmp(x.data, y.data, x.bytes);
    free(x.data);
    free(y.data);
    return same;
}

int main(int argc, char **argv)
{
    int ranks = 1, how = 0, passed = 0, failed = 0; /* how: 0 in this process, 1 processes, 2 threads */
    char root[] = "/tmp/llmpar-nccl-XXXXXX", command[80];
    work w, one;
    if (argc == 3 && !strcmp(argv[1], "--processes")) how = 1, ranks = atoi(argv[2]);
    else if (argc == 3 && !strcmp(argv[1], "--threads")) how = 2, ranks = atoi(argv[2]);
    else if (argc == 3 && !strcmp(argv[1], "--faults")) how = 3, ranks = atoi(argv[2]);
    else if (argc != 1) ranks = 0;
    if (ranks < (how == 3 ? 2 : 1) || ranks > 64 || !mkdtemp(root)) {
        fprintf(stderr, "usage: real_nccl [--processes N | --threads N | --faults N]\n");
        return 2;
    }
    memset(&w, 0, sizeof w);
    snprintf(w.directory, sizeof w.directory, "%s/ranks", root);
    mkdir(w.directory, 0777);
    w.checks = 1;
    w.of = ranks > 1 ? ranks : cuda_small() ? 0 : 2; /* one rank alone: that it runs */
    w.one_device = how == 1 || emulated_cuda != NULL;
    w.most = how == 1 && ranks > 2 && !emulated_cuda ? 1 : emulated_cuda != NULL || how == 1 ? 7 : 20011; /* processes that share a GPU take turns of milliseconds */
    one = w;
    snprintf(one.directory, sizeof one.directory, "%s/one", root);
    mkdir(one.directory, 0777);
    one.checks = 0;
    if (how == 3) {
        rmdir(w.directory);
        rmdir(one.directory);
        rmdir(root);
        w.one_device = 1;
        for (w.fault = 1; w.fault < FAULTS; w.fault++) {
            if (processes(ranks, &w)) passed++;
            else failed++, fprintf(stderr, "FAILED %s\n", faults[w.fault]);
        }
        printf("%d passed, %d failed\n", passed, failed);
        return failed != 0;
    }
    int before = test_failures;
    int well = how == 1 ? processes(ranks, &w) : !launch(LLMPAR_TRANSPORT_THREADS, ranks, &w) && test_failures == before;
    if (well) passed++;
    else failed++;
    if (ranks > 1) {
        before = test_failures;
        int reference = how == 1 ? processes(1, &one) : !launch(LLMPAR_TRANSPORT_THREADS, 1, &one) && test_failures == before;
        if (reference) passed++;
        else failed++;
        for (int j = 0; j < JOBS && well && reference; j++) {
            static const char *const files[] = { "first.safetensors", "last.safetensors", "model/model.safetensors" };
            if (jobs[j].shard * jobs[j].tp != ranks) continue;
            int same = 1;
            for (int f = 0; f < 3; f++) {
                char a[700], b[700];
                snprintf(a, sizeof a, "%s/%s/%s", w.directory, jobs[j].name, files[f]);
                snprintf(b, sizeof b, "%s/%s/%s", one.directory, jobs[j].name, files[f]);
                if (!same_file(a, b)) {
                    fprintf(stderr, "%s: %s is not that of one rank\n", jobs[j].name, files[f]);
                    same = 0;
                }
            }
            if (same) passed++;
            else failed++;
        }
    }
    snprintf(command, sizeof command, "rm -rf '%s'", root);
    if (system(command)) failed++;
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
