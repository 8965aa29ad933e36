/* The life of MPI around llmpar, case by case, each a run of its own under mpirun (tests/mpi.sh):
     own      llmpar_launch initialises and finalises MPI; before that a communicator of the caller is refused, and afterwards a second launch
     single   the caller initialised MPI without threads: workers and streams with threads are refused, one thread works
     abroad   MPI without threads, and launched on another thread than MPI was initialised on: refused
   Rank 0 prints the sum. */
#include "test.h"

#include <pthread.h>

static int calls;
static llmpar_status barrier(llmpar_ctx *ctx, void *user)
{
    (void)user;
    calls++;
    return llmpar_comm_barrier(ctx->comm, NULL, "life");
}
static llmpar_status barrier_on_a_stream(llmpar_ctx *ctx, void *user)
{
    llmpar_stream *stream = NULL;
    (void)user;
    llmpar_status st = ctx->device->stream_create(ctx->device, "gather", &stream);
    if (!st) st = llmpar_device_stream_thread(ctx->device, stream);
    if (!st) st = llmpar_comm_barrier(ctx->comm, stream, "life");
    llmpar_status waited = stream ? ctx->device->synchronize(ctx->device, stream) : LLMPAR_OK;
    if (stream) ctx->device->stream_destroy(ctx->device, stream);
    return st ? st : waited;
}
static void quiet(void *user, int rank, llmpar_log_level level, const char *line) { (void)user; (void)rank; (void)level; (void)line; }

static void own(void)
{
    llmpar_error error;
    llmpar_heap heap;
    llmpar_mpi_world *world = NULL;
    MPI_Comm comm = MPI_COMM_WORLD;
    llmpar_mpi_desc mpi = { .comm = &comm };
    llmpar_heap_init(&heap, NULL);
    llmpar_error_clear(&error);
    CHECK_STATUS(llmpar_mpi_world_create(&heap, &mpi, &world, &error), LLMPAR_ERR_CONFIG);
    CHECK_TEXT(error.text, "MPI is not initialised");
    llmpar_launch_desc with = { .mpi = &mpi, .log = quiet }, plain = { .log = quiet };
    CHECK_STATUS(llmpar_launch(&with, barrier, NULL, &error), LLMPAR_ERR_CONFIG);
    CHECK_TEXT(error.text, "MPI is not initialised");
    CHECK_INT(calls, 0);
    CHECK_OK(llmpar_launch(&plain, barrier, NULL, &error));
    CHECK_INT(calls, 1);
    int over = 0;
    MPI_Finalized(&over);
    CHECK(over);
    CHECK_STATUS(llmpar_launch(&plain, barrier, NULL, &error), LLMPAR_ERR_CONFIG);
    CHECK_TEXT(error.text, "already finalised");
    CHECK_STATUS(llmpar_launch(&with, barrier, NULL, &error), LLMPAR_ERR_CONFIG);
    plain.transport = LLMPAR_TRANSPORT_THREADS;
    plain.ranks = 2;
    CHECK_OK(llmpar_launch(&plain, barrier, NULL, &error));
}

static void single(void)
{
    llmpar_error error;
    int level;
    MPI_Init(NULL, NULL);
    MPI_Query_thread(&level);
    CHECK(level < MPI_THREAD_SERIALIZED);
    llmpar_launch_desc desc = { .threads = 2, .log = quiet };
    CHECK_STATUS(llmpar_launch(&desc, barrier, NULL, &error), LLMPAR_ERR_CONFIG);
    CHECK_TEXT(error.text, "threads = 2");
    CHECK_TEXT(error.text, "MPI_THREAD_SERIALIZED");
    CHECK_INT(calls, 0);
    desc.threads = 1;
    CHECK_OK(llmpar_launch(&desc, barrier, NULL, &error));
    CHECK_INT(calls, 1);
    int world;
    MPI_Comm_size(MPI_COMM_WORLD, &world);
    if (world == 1) return; /* no call of MPI then */
    CHECK_STATUS(llmpar_launch(&desc, barrier_on_a_stream, NULL, &error), LLMPAR_ERR_UNSUPPORTED);
    CHECK_TEXT(error.text, "less than MPI_THREAD_SERIALIZED");
}

static void *elsewhere(void *arg)
{
    (void)arg;
    llmpar_error error;
    llmpar_launch_desc desc = { .log = quiet };
    CHECK_STATUS(llmpar_launch(&desc, barrier, NULL, &error), LLMPAR_ERR_CONFIG);
    CHECK_TEXT(error.text, "another thread");
    return NULL;
}
static void abroad(void)
{
    pthread_t thread;
    MPI_Init(NULL, NULL);
    pthread_create(&thread, NULL, elsewhere, NULL);
    pthread_join(thread, NULL);
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "own";
    int rank = 0, failures = 0;
    if (!strcmp(what, "single")) single();
    else if (!strcmp(what, "abroad")) abroad();
    else own();
    const char *name = getenv("OMPI_COMM_WORLD_RANK") ? getenv("OMPI_COMM_WORLD_RANK") : getenv("PMI_RANK");
    rank = name ? atoi(name) : 0;
    failures = test_failures;
    if (strcmp(what, "own")) {
        MPI_Allreduce(MPI_IN_PLACE, &failures, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
        MPI_Finalize();
    }
    if (rank == 0) printf("%d passed, %d failed\n", !failures, failures != 0);
    return failures != 0;
}
