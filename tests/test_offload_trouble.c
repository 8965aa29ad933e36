/* What goes wrong where states are in host memory or files: the disk is full, a file is cut, a rank fails, memory ends at any allocation. An error that says what, the ranks end, nothing is left behind; and with
   more state than memory it trains with the same bits, or says so. */
#include "fsdp_net.h"
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

static char place[64]; /* of this process: other builds of this program may run beside */

static int entries(const char *directory)
{
    int count = 0;
    DIR *d = opendir(directory);
    for (struct dirent *e = d ? readdir(d) : NULL; e; e = readdir(d)) count += e->d_name[0] != '.';
    if (d) closedir(d);
    return d ? count : -1;
}

/* Descriptors of this process whose file was an offload file; cut != 0: they lose their contents. */
static int open_files(int cut)
{
    int count = 0;
    DIR *d = opendir("/proc/self/fd");
    for (struct dirent *e = d ? readdir(d) : NULL; e; e = readdir(d)) {
        char link[300], target[400];
        snprintf(link, sizeof link, "/proc/self/fd/%s", e->d_name);
        ssize_t n = readlink(link, target, sizeof target - 1);
        if (n < 0) continue;
        target[n] = 0;
        if (!strstr(target, "llmpar-offload")) continue;
        count++;
        if (cut && ftruncate(atoi(e->d_name), 0)) TEST_FAIL("%s: %s", link, strerror(errno));
    }
    if (d) closedir(d);
    return count;
}

static void limit_files(rlim_t bytes)
{
    struct rlimit limit;
    getrlimit(RLIMIT_FSIZE, &limit);
    limit.rlim_cur = bytes;
    if (setrlimit(RLIMIT_FSIZE, &limit)) TEST_FAIL("setrlimit: %s", strerror(errno));
}

static int trouble; /* 1: the disk takes nothing more, 2: the file loses its contents, 3: rank 1 fails in backward */
static llmpar_status in_trouble(const net_job *job, llmpar_fsdp *fsdp)
{
    net_optimizer state = { 0, 0, 0 };
    llmpar_optimizer table = { &state, net_optimizer_begin, net_optimizer_update };
    llmpar_mesh *mesh = llmpar_fsdp_mesh(fsdp);
    llmpar_schedule *schedule = NULL;
    net_device = mesh->ctx->device;
    CHECK_INT(entries(place), 0); /* while it is in use, too */
    if (open_files(0) < 1) TEST_FAIL("no file is open");
    llmpar_status status = net_schedule(job, fsdp, &schedule);
    for (int i = 0; i < 3 && !status; i++) {
        llmpar_run run;
        memset(&run, 0, sizeof run);
        run.optimizer = &table;
        if (i == 1 && !status) status = llmpar_comm_barrier(mesh->world, NULL, "all have stepped");
        if (i == 1 && mesh->ctx->rank == 0 && trouble == 1) limit_files(4096);
        if (i == 1 && mesh->ctx->rank == 0 && trouble == 2) open_files(1);
        if (i == 1 && mesh->ctx->rank == 0 && trouble == 3) net_fail = 2; /* between two barriers */
        if (i == 1 && !status) status = llmpar_comm_barrier(mesh->world, NULL, "now");
        if (!status) status = net_step(job, fsdp, i, schedule, &run);
    }
    CHECK(status != LLMPAR_OK);
    llmpar_schedule_destroy(schedule);
    return status;
}

TEST(files_in_trouble)
{
    llmpar_error error;
    mkdir("build", 0777);
    snprintf(place, sizeof place, "build/offload-XXXXXX");
    if (!mkdtemp(place)) { TEST_FAIL("cannot make %s", place); return; }
    signal(SIGXFSZ, SIG_IGN);
    for (int ranks = 1; ranks <= 2; ranks++) {
        struct rlimit old;
        net_job job = net_job_of(ranks - 1, LLMPAR_BF16);
        for (int s = 0; s < LLMPAR_STATE_COUNT; s++) job.fsdp.offload[s] = LLMPAR_TIER_FILE;
        job.fsdp.offload_dir = "build/there/is/no/such";
        CHECK_STATUS(net_launch(&job, &error), LLMPAR_ERR_IO);
        CHECK_TEXT(error.text, "offload: build/there/is/no/such/llmpar-offload-");
        CHECK_TEXT(error.text, "No such file or directory, expected a directory that files can be made in");
        job.fsdp.offload_dir = "Makefile";
        CHECK_STATUS(net_launch(&job, &error), LLMPAR_ERR_IO);
        CHECK_TEXT(error.text, "Not a directory, expected");
        job.fsdp.offload_dir = "/proc"; /* nobody may make files there */
        CHECK_STATUS(net_launch(&job, &error), LLMPAR_ERR_IO);
        CHECK_TEXT(error.text, "expected a directory that files can be made in");
        job.fsdp.offload_dir = place;
        for (job.lost_rank = ranks; job.lost_rank; job.lost_rank--) { /* one rank's trouble is everybody's */
            CHECK_STATUS(net_launch(&job, &error), LLMPAR_ERR_IO);
            CHECK_INT(error.rank, job.lost_rank - 1);
            CHECK_TEXT(error.text, "offload: there/is/no/such/llmpar-offload-");
            CHECK_INT(entries(place) + open_files(0), 0);
        }
        getrlimit(RLIMIT_FSIZE, &old);
        limit_files(8192);
        CHECK_STATUS(net_launch(&job, &error), LLMPAR_ERR_IO);
        limit_files(old.rlim_cur);
        CHECK_TEXT(error.text, " bytes: File too large");
        job.body = in_trouble;
        job.fsdp.overlap = ranks - 1;
        for (trouble = 1; trouble <= 3; trouble++) {
            if (trouble == 3 && ranks == 1) continue;
            for (int s = 2; s < LLMPAR_STATE_COUNT; s++) job.fsdp.offload[s] = trouble == 2 ? LLMPAR_TIER_DEVICE : LLMPAR_TIER_FILE; /* what is written first would hide the cut */
            CHECK_STATUS(net_launch(&job, &error), LLMPAR_ERR_IO);
            limit_files(old.rlim_cur);
            net_fail = 0;
            CHECK_TEXT(error.text, trouble == 1 ? "write of " : trouble == 2 ? "read of " : "planned failure");
            CHECK_TEXT(error.text, trouble == 1 ? "File too large" : trouble == 2 ? "the file ends before them" : "embed: ");
            CHECK_TEXT(error.text, trouble < 3 ? " bytes at " : "embed: ");
            CHECK_INT(entries(place), 0);
            CHECK_INT(open_files(0), 0);
        }
    }
    CHECK(!rmdir(place));
}

/* The n-th allocation fails, the first ones each, later ones ever further apart: an error, nothing leaked. */
static uint64_t fail_at, took;
static llmpar_status starved(llmpar_ctx *ctx, void *user)
{
    uint64_t begun = ctx->heap.calls;
    ctx->heap.fail_at = fail_at ? begun + fail_at : 0;
    llmpar_status status = net_rank(ctx, user);
    if (!fail_at && ctx->rank == 0) took = ctx->heap.calls - begun; /* the others take as many, or fewer */
    ctx->heap.fail_at = 0;
    return status;
}

TEST(no_memory)
{
    for (int kind = 0; kind < 2; kind++) {
        llmpar_error error;
        llmpar_launch_desc desc;
        net_job job = net_job_of(kind, LLMPAR_BF16);
        job.body = net_two_steps;
        job.fsdp.offload_dir = "build";
        for (int s = 0; s < LLMPAR_STATE_COUNT; s++) job.fsdp.offload[s] = s % 2 == kind ? LLMPAR_TIER_FILE : LLMPAR_TIER_HOST;
        memset(&desc, 0, sizeof desc);
        desc.ranks = kind + 1;
        desc.check = test_no_leak;
        fail_at = 0;
        CHECK_OK(llmpar_launch(&desc, starved, &job, &error));
        CHECK(took > 100);
        uint64_t all = took;
        for (fail_at = 1; fail_at <= all; fail_at += 1 + fail_at / (kind ? 10 : 25)) CHECK_STATUS(llmpar_launch(&desc, starved, &job, &error), LLMPAR_ERR_MEMORY);
    }
}

/* More state than memory: trains with the same bits where the state is elsewhere, and says so where not. */
TEST(memory_limit)
{
    llmpar_error error;
    net_job job = net_job_of(0, LLMPAR_BF16);
    memset(&net_reference, 0, sizeof net_reference);
    net_launch_ok(&job, "no limit");
    job.fsdp.memory_limit = 26500; /* 256 + 640 + 640 + 256 elements in flat buffers: parameters, master and optimizer state are 14 * 1792 = 25088 bytes, loss and norm 1728; offloaded, two units at a time are here */
    CHECK_STATUS(net_launch(&job, &error), LLMPAR_ERR_MEMORY);
    CHECK_TEXT(error.text, "over the limit");
    for (int s = 0; s < LLMPAR_STATE_COUNT; s++) job.fsdp.offload[s] = LLMPAR_TIER_FILE;
    job.recompute = 7;
    job.policy.micro_batches = 8;
    job.fsdp.offload_dir = "build";
    net_launch_ok(&job, "limited, everything in a file");
}

TEST_LIST(T_(files_in_trouble), T_(no_memory), T_(memory_limit))
