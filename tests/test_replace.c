/* replace: a user puts own callbacks into a Llama's units before the recipe runs, and llmpar_llama_apply called twice. */
#include "test.h"

static int64_t calls;                                    /* of the replaced instruction, over all ranks */
static llmpar_status (*original)(llmpar_unit_call *call);

static llmpar_status counted(llmpar_unit_call *call)
{
    __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    return original(call);
}

static llmpar_status sequence(void *user, int64_t index, int32_t *tokens)
{
    (void)user;
    for (int i = 0; i <= 16; i++) tokens[i] = (int32_t)((index * 31 + i * 7) % 256);
    return LLMPAR_OK;
}

typedef struct job { int replace, other; double loss[3]; } job;

static llmpar_status train(llmpar_ctx *ctx, void *user)
{
    job *j = (job *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_llama *model = NULL;
    llmpar_trainer *trainer = NULL;
    llmpar_mesh_desc mesh_desc = { .dp_shard = 2, .tp = 2 };
    llmpar_llama_desc model_desc = { .preset = "tiny", .seed = 3 };
    llmpar_trainer_desc desc = { .sequence = sequence, .seq_len = 16, .batch = 4, .log_every = -1 };
    llmpar_llama_apply_desc apply = { .positions = 64, .sequence_parallel = j->other };
    llmpar_unit_op list[64];
    llmpar_status status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_llama_create(ctx, &model_desc, &model);
    if (!status && (j->replace || j->other)) status = llmpar_llama_apply(model, mesh->comm[LLMPAR_AXIS_TP], &apply);
    if (!status && j->replace) {
        llmpar_unit *unit = &llmpar_llama_units(model, NULL)[2]; /* layers.1 */
        CHECK(!strcmp(unit->name, "layers.1"));
        CHECK(unit->forward_count <= 64);
        memcpy(list, unit->forward, (size_t)unit->forward_count * sizeof *list);
        __atomic_store_n(&original, list[0].run, __ATOMIC_SEQ_CST);
        list[0].run = counted;
        unit->forward = list;
    }
    if (!status) status = llmpar_parallelize(mesh, model, &desc, &trainer);
    for (int i = 0; i < 3 && !status; i++) {
        llmpar_step step;
        status = llmpar_trainer_step(trainer, &step);
        if (!status && ctx->rank == 0) j->loss[i] = step.loss;
    }
    llmpar_trainer_destroy(trainer);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    return status;
}

TEST(a_replaced_callback_runs)
{
    llmpar_launch_desc launch = { .ranks = 4 };
    llmpar_error error;
    job plain, replaced;
    memset(&plain, 0, sizeof plain);
    memset(&replaced, 0, sizeof replaced);
    replaced.replace = 1;
    CHECK_OK(llmpar_launch(&launch, train, &plain, &error));
    CHECK_INT(calls, 0);
    CHECK_OK(llmpar_launch(&launch, train, &replaced, &error));
    CHECK_INT(calls, 4 * 3); /* once a rank and step */
    CHECK_BYTES(plain.loss, replaced.loss, sizeof plain.loss);
    CHECK(plain.loss[0] > 1);
}

TEST(another_apply_is_refused)
{
    llmpar_launch_desc launch = { .ranks = 4 };
    llmpar_error error;
    job other;
    memset(&other, 0, sizeof other);
    other.other = 1; /* sequence parallel by hand, not in the trainer's desc */
    CHECK_STATUS(llmpar_launch(&launch, train, &other, &error), LLMPAR_ERR_ARGUMENT);
    CHECK_TEXT(error.text, "sequence parallel 1");
    CHECK_TEXT(error.text, "got 8, 0");
}

TEST_LIST(T_(a_replaced_callback_runs), T_(another_apply_is_refused))
