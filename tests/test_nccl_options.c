/* The example programs' options for GPUs (examples/common/device.h), as a program with CUDA and NCCL has them: what they put into the launch desc. */
#define LLMPAR_USE_CUDA
#define LLMPAR_USE_NCCL
#include "llmpar.h"
#include "llmpar_cuda.h"
#define LLMPAR__NCCL_IMPLEMENTED /* it is linked */
#include "../examples/common/device.h"
#include "test.h"

static const llmpar_cuda_desc *cuda;
void llmpar_cuda_backend(const llmpar_cuda_desc *desc, llmpar_backend *out)
{
    cuda = desc;
    out->name = "cuda";
}

/* {option, word, option, word ..}; 0, or what the command line was refused with. */
static int launch_of(const char *const *words, device_settings *d, llmpar_launch_desc *launch)
{
    int bad = 0;
    memset(d, 0, sizeof *d);
    memset(launch, 0, sizeof *launch);
    for (; words[0] && !bad; words += 2) bad = device_option(words[0], words[1], d);
    if (!bad) bad = device_options_check(d, "options");
    cuda = NULL;
    if (!bad) device_launch(d, launch);
    return bad;
}

/* One option says for both the device and the communicator whether bits matter. */
TEST(fast_is_both)
{
    static const struct { const char *words[7]; int fast; } cases[] = {
        { { "device", "cuda", "comm", "nccl", NULL }, 0 },
        { { "device", "cuda", "comm", "nccl", "cuda-mode", "exact", NULL }, 0 },
        { { "device", "cuda", "comm", "nccl", "cuda-mode", "fast", NULL }, 1 },
        { { "cuda-mode", "fast", "comm", "nccl", "device", "cuda", NULL }, 1 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        device_settings d;
        llmpar_launch_desc launch;
        CHECK_INT(launch_of(cases[i].words, &d, &launch), 0);
        CHECK(launch.backend == &d.backend && launch.transport == LLMPAR_TRANSPORT_DEFAULT && cuda);
        if (!cuda) continue;
        CHECK_INT(cuda->mode, cases[i].fast ? LLMPAR_CUDA_FAST : LLMPAR_CUDA_EXACT);
        const llmpar_nccl_desc *nccl = (const llmpar_nccl_desc *)d.backend.comm_user, plain = { .fast = cases[i].fast };
        CHECK(d.backend.comm_create && nccl);
        if (nccl) CHECK_BYTES(nccl, &plain, sizeof plain); /* everything else is the default */
    }
}

TEST(ranks_of_a_launcher)
{
    static const char *const nccl[] = { "device", "cuda", "comm", "nccl", NULL }, *const threads[] = { "device", "cuda", NULL };
    device_settings d;
    llmpar_launch_desc launch;
    setenv("RANK", "0", 1);
    CHECK_INT(launch_of(nccl, &d, &launch), 0);
    CHECK_INT(launch.transport, LLMPAR_TRANSPORT_DEFAULT); /* half of it is somebody else's */
    setenv("WORLD_SIZE", "2", 1);
    CHECK_INT(launch_of(nccl, &d, &launch), 0);
    CHECK_INT(launch.transport, LLMPAR_TRANSPORT_ENVIRONMENT);
    CHECK_INT(launch_of(threads, &d, &launch), 0);
    CHECK_INT(launch.transport, LLMPAR_TRANSPORT_DEFAULT);
    CHECK(!d.backend.comm_create);
    unsetenv("RANK");
    unsetenv("WORLD_SIZE");
}

/* Of the job's failure the first rank speaks, and the one that failed; of what a process found out alone, that one. */
TEST(who_prints)
{
    static const struct { const char *rank; int32_t culprit; int prints; } cases[] = { { "0", 0, 1 }, { "0", 2, 1 }, { "1", 2, 0 }, { "2", 2, 1 }, { "1", -1, 1 }, { NULL, 2, 1 } };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        llmpar_error error;
        llmpar_error_clear(&error);
        error.rank = cases[i].culprit;
        if (cases[i].rank) setenv("RANK", cases[i].rank, 1);
        else unsetenv("RANK");
        CHECK_INT(prints_error(&error), cases[i].prints);
    }
}

TEST_LIST(T_(fast_is_both), T_(ranks_of_a_launcher), T_(who_prints))
