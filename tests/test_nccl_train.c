/* Training over the NCCL communicator (on a stand-in for NCCL) gives the bits of training on rank threads: losses, gradients and the saved model, on meshes of several axes, with collectives beside the compute too. */
#include "nccl_rig.h"
#include "train.h"

static void both(train_job *given, const char *name)
{
    train_result want, got;
    llmpar_backend backend;
    train_job job = *given;
    job.threads = 1;
    job.on_threads = 1;
    train_run(&job, &want);
    if (want.status) TEST_FAIL("%s on threads: %s", name, want.error.text);
    rig_backend(NULL, &backend);
    fake_nccl_reset();
    job.backend = &backend;
    train_run(&job, &got);
    train_same(name, &got, &want);
    CHECK_INT(fake_nccl.mismatches, 0);
    CHECK_INT(fake_nccl.overlaps, 0);
    CHECK_INT(fake_nccl.comms, 0);
    CHECK_INT(fake_nccl.blocks, 0);
    train_result_free(&want);
    train_result_free(&got);
}

TEST(meshes)
{
    llmpar_llama_config config = train_config(0), tied = train_config(1);
    train_job job = train_job_of(&config, 1, 2, 2);
    job.prefetch = 1;
    both(&job, "2 x 2");
    job = train_job_of(&tied, 1, 1, 4);
    job.sp = 1;
    both(&job, "tp 4, sequence parallel");
    job = train_job_of(&config, 2, 2, 1);
    both(&job, "hsdp");
    job = train_job_of(&config, 1, 3, 1);
    job.batch = 6;
    job.exact = LLMPAR_EXACT_OFF;
    both(&job, "three ranks");
}

/* The streams have threads: on the GPU collectives wait for each other in the streams, not on the host. */
TEST(beside_the_compute)
{
    llmpar_llama_config config = train_config(0);
    train_job job = train_job_of(&config, 1, 2, 2);
    job.prefetch = 1;
    job.policy.overlap = 1;
    both(&job, "2 x 2, overlapped");
    job = train_job_of(&config, 2, 2, 1);
    job.policy.overlap = 1;
    both(&job, "hsdp, overlapped");
}

TEST_LIST(T_(meshes), T_(beside_the_compute))
