/* The NCCL communicator on a stand-in for NCCL: every collective against a plain definition, bit for bit, with 1 to 8 rank threads; splits, streams with threads of their own, ways to meet. */
#include "collectives.h"
#include "nccl_rig.h"

static llmpar_status values_here(llmpar_ctx *ctx, void *user) { return collectives_check(ctx->comm, *(size_t *)user); }

/* On communicators of every size, with the ranks turned round. */
static llmpar_status values_below(llmpar_ctx *ctx, void *user)
{
    llmpar_status st = LLMPAR_OK;
    for (int size = 1; size < ctx->world && !st; size++) {
        llmpar_comm *comm = NULL;
        st = llmpar_comm_split(ctx->comm, ctx->rank < size ? 0 : 1, -ctx->rank, "part", &comm);
        if (!st) CHECK_INT(comm->ranks, ctx->rank < size ? size : ctx->world - size);
        if (!st) st = collectives_check(comm, *(size_t *)user);
        llmpar_comm_destroy(comm);
    }
    return st;
}

/* Under a sanitizer not every number of ranks. */
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
enum { STEP = 3 }; /* 2 5 8 */
#else
enum { STEP = 1 };
#endif

static void run(int ranks, const llmpar_nccl_desc *desc, llmpar_rank_fn fn, void *user)
{
    llmpar_error error;
    fake_nccl_reset();
    if (rig_launch(ranks, desc, fn, user, &error)) TEST_FAIL("%d ranks: %s", ranks, error.text);
    CHECK_INT(fake_nccl.mismatches, 0);
}

TEST(values)
{
    for (int ranks = STEP > 1 ? 2 : 1; ranks <= 8; ranks += STEP) {
        size_t most = ranks < 5 ? 30000 : STEP > 1 ? 64 : 600;
        run(ranks, NULL, values_here, &most);
    }
}
TEST(values_in_parts)
{
    size_t most = 100;
    run(5, NULL, values_below, &most);
    if (STEP == 1) run(8, NULL, values_below, &most);
}
TEST(values_in_small_slices)
{
    for (int ranks = 2; ranks <= 8; ranks += STEP) {
        size_t most = STEP > 1 ? 64 : 600;
        llmpar_nccl_desc desc = { .slice = 200 };
        run(ranks, &desc, values_here, &most);
        desc.slice = 8 * (size_t)ranks; /* an element of each rank */
        most = 10;
        run(ranks, &desc, values_here, &most);
    }
}
TEST(splits)
{
    for (int ranks = 1; ranks <= 8; ranks++) run(ranks, NULL, collectives_splits, NULL);
}

TEST_LIST(T_(values), T_(values_in_parts), T_(values_in_small_slices), T_(splits))
