/* NULL for every object, desc and path of the chapters io to run is refused, and so is an empty path, and everything that destroys, closes or frees takes it: each call in a process of its own, so that a crash is one failure with its name.
   The list is held against the declarations in src/. */
#include "test.h"

#include <ctype.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

typedef struct rig {
    llmpar_ctx *ctx;
    llmpar_heap *heap;
    llmpar_mesh *mesh;
    llmpar_llama *model;
    llmpar_trainer *trainer;
    llmpar_fsdp *fsdp;
    llmpar_error error;
} rig;

static int list_nothing(void *user, const char *name) { (void)user; (void)name; return 0; }

/* Whether case `number` ends as it should; -1: there is none. Without `call`, *name alone. */
static int run_case(rig *r, int number, int call, const char **name)
{
    int at = 0;
    int32_t ids[8] = {0}, count = 0;
    uint64_t bytes = 0;
    size_t size = 0;
    int64_t step = 0;
    uint64_t calls = 0;
    char *text = NULL;
    char buffer[64];
    double loss = 0;
    llmpar_error *error = &r->error;
    llmpar_heap *heap = r->heap;
    llmpar_file file;
    llmpar_mapped mapped;
    llmpar_writer *writer = NULL;
    llmpar_safetensors *tensors = NULL;
    llmpar_safetensors_writer *tensors_writer = NULL;
    llmpar_safetensor tensor;
    llmpar_hf_files *files = NULL;
    llmpar_hf_writer *hf_writer = NULL;
    llmpar_hf_index index;
    llmpar_llama *model = NULL;
    llmpar_llama_config config = *llmpar_llama_get_config(r->model);
    llmpar_llama_apply_desc apply;
    llmpar_generate_desc generate;
    llmpar_generator *generator = NULL;
    llmpar_generator_desc generator_desc;
    memset(&generator_desc, 0, sizeof generator_desc);
    llmpar_trainer *trainer = NULL;
    llmpar_trainer_desc recipe;
    llmpar_checkpoint *checkpoint = NULL;
    llmpar_checkpoint_desc nowhere;
    memset(&nowhere, 0, sizeof nowhere);
    nowhere.directory = "";
    llmpar_checkpoint_info info;
    llmpar_tensor_file *tensor_file = NULL;
    llmpar_memory memory;
    llmpar_data data;
    memset(&tensor, 0, sizeof tensor);
    memset(&apply, 0, sizeof apply);
    memset(&generate, 0, sizeof generate);
    memset(&recipe, 0, sizeof recipe);
    memset(&info, 0, sizeof info);
    memset(&memory, 0, sizeof memory);
    llmpar_error_clear(error);
#define CASE(text, right) if (at++ == number) { *name = text; return call ? (right) : 1; }
#define REFUSED(function, ...) CASE(#function "(" #__VA_ARGS__ ")", function(__VA_ARGS__) == LLMPAR_ERR_ARGUMENT && (!error->status || (error->status == LLMPAR_ERR_ARGUMENT && error->text[0])))
#define TOLD(function, ...) CASE(#function "(" #__VA_ARGS__ ")", function(__VA_ARGS__) == LLMPAR_ERR_ARGUMENT && r->ctx->error.text[0]) /* a desc or path: the rank's error says so; of an object its maker did */
#define NOTHING(function, ...) CASE(#function "(" #__VA_ARGS__ ")", !function(__VA_ARGS__))
#define EMPTY(function, ...) CASE(#function "(" #__VA_ARGS__ "), an empty path", (calls = heap->calls, function(__VA_ARGS__) == LLMPAR_ERR_ARGUMENT) && heap->calls == calls && strstr(error->status ? error->text : r->ctx->error.text, "expected")) /* before anything is allocated */
#define TAKEN(function, ...) CASE(#function "(" #__VA_ARGS__ ")", (function(__VA_ARGS__), 1))

    /* io */
    REFUSED(llmpar_file_open, NULL, NULL, &file, error)
    REFUSED(llmpar_file_read, NULL, 0, buffer, 8, error)
    REFUSED(llmpar_file_load, NULL, NULL, "x", 100, &text, &size, error)
    REFUSED(llmpar_file_load, heap, NULL, NULL, 100, &text, &size, error)
    REFUSED(llmpar_file_map, NULL, &mapped, error)
    REFUSED(llmpar_writer_open, NULL, NULL, "x", &writer, error)
    REFUSED(llmpar_writer_open, heap, NULL, NULL, &writer, error)
    REFUSED(llmpar_writer_write, NULL, "x", 1, error)
    REFUSED(llmpar_writer_settle, NULL, error)
    REFUSED(llmpar_writer_commit, NULL, error)
    REFUSED(llmpar_directory_ensure, NULL, NULL, error)
    REFUSED(llmpar_directory_sync, NULL, NULL, error)
    REFUSED(llmpar_file_rename, NULL, NULL, "x", error)
    REFUSED(llmpar_file_rename, NULL, "x", NULL, error)
    REFUSED(llmpar_file_remove, NULL, NULL, error)
    REFUSED(llmpar_directory_list, NULL, NULL, list_nothing, NULL, error)
    REFUSED(llmpar_directory_list, NULL, ".", NULL, NULL, error)
    NOTHING(llmpar_file_kind, NULL, NULL)
    NOTHING(llmpar_is_directory, NULL)
    NOTHING(llmpar_is_file, NULL)
    EMPTY(llmpar_file_open, NULL, "", &file, error)
    EMPTY(llmpar_file_load, heap, NULL, "", 100, &text, &size, error)
    EMPTY(llmpar_file_map, "", &mapped, error)
    EMPTY(llmpar_writer_open, heap, NULL, "", &writer, error)
    EMPTY(llmpar_directory_ensure, NULL, "", error)
    EMPTY(llmpar_directory_sync, NULL, "", error)
    EMPTY(llmpar_file_rename, NULL, "", "x", error)
    EMPTY(llmpar_file_rename, NULL, "x", "", error)
    EMPTY(llmpar_file_remove, NULL, "", error)
    EMPTY(llmpar_directory_list, NULL, "", list_nothing, NULL, error)
    NOTHING(llmpar_file_kind, NULL, "")
    REFUSED(llmpar_safetensors_open, NULL, NULL, "x", &tensors, error)
    REFUSED(llmpar_safetensors_open, heap, NULL, NULL, &tensors, error)
    REFUSED(llmpar_safetensors_open_memory, NULL, "x", 1, "x", &tensors, error)
    REFUSED(llmpar_safetensors_open_memory, heap, NULL, 8, "x", &tensors, error)
    REFUSED(llmpar_safetensors_open_memory, heap, "x", 1, NULL, &tensors, error)
    REFUSED(llmpar_safetensors_read, NULL, &tensor, 0, 0, buffer, error)
    NOTHING(llmpar_safetensors_find, NULL, "x")
    REFUSED(llmpar_safetensors_check, NULL, "x", NULL, 0, error)
    REFUSED(llmpar_safetensors_check, heap, NULL, NULL, 0, error)
    REFUSED(llmpar_safetensors_check, heap, "x", NULL, 1, error)
    REFUSED(llmpar_safetensors_writer_open, NULL, NULL, "x", NULL, 0, &tensors_writer, error)
    REFUSED(llmpar_safetensors_writer_open, heap, NULL, NULL, NULL, 0, &tensors_writer, error)
    REFUSED(llmpar_safetensors_writer_open, heap, NULL, "x", NULL, 1, &tensors_writer, error)
    REFUSED(llmpar_safetensors_writer_write, NULL, "x", 1, error)
    REFUSED(llmpar_safetensors_writer_settle, NULL, error)
    REFUSED(llmpar_safetensors_writer_commit, NULL, error)
    EMPTY(llmpar_safetensors_open, heap, NULL, "", &tensors, error)
    EMPTY(llmpar_safetensors_check, heap, "", NULL, 0, error)
    EMPTY(llmpar_safetensors_writer_open, heap, NULL, "", NULL, 0, &tensors_writer, error)

    /* text */
    REFUSED(llmpar_data_init, NULL, &data, error)
    REFUSED(llmpar_data_sequence, NULL, 0, ids)
    REFUSED(llmpar_data_eval_sequence, NULL, 0, ids)

    /* model */
    CASE("llmpar_llama_preset(NULL, &config, error)", llmpar_llama_preset(NULL, &config, error) == LLMPAR_ERR_CONFIG)
    REFUSED(llmpar_llama_config_parse, NULL, "{}", 2, NULL, &config, error)
    REFUSED(llmpar_llama_config_parse, heap, NULL, 2, NULL, &config, error)
    REFUSED(llmpar_llama_config_check, NULL, error)
    NOTHING(llmpar_llama_config_write, NULL, buffer, sizeof buffer)
    NOTHING(llmpar_llama_param_count, NULL)
    NOTHING(llmpar_llama_flops_per_token, NULL, 8)
    REFUSED(llmpar_rope_tables, NULL, &config, 1, LLMPAR_F32, buffer, buffer, error)
    REFUSED(llmpar_rope_tables, heap, NULL, 1, LLMPAR_F32, buffer, buffer, error)
    REFUSED(llmpar_llama_create, NULL, NULL, &model)
    TOLD(llmpar_llama_create, r->ctx, NULL, &model)
    REFUSED(llmpar_llama_clone, NULL, r->model, &model)
    REFUSED(llmpar_llama_clone, r->ctx, NULL, &model)
    NOTHING(llmpar_llama_get_config, NULL)
    NOTHING(llmpar_llama_seed, NULL)
    NOTHING(llmpar_llama_tp, NULL)
    NOTHING(llmpar_llama_units, NULL, &count)
    NOTHING(llmpar_llama_units, NULL, NULL)
    REFUSED(llmpar_llama_apply, NULL, r->ctx->comm, &apply)
    REFUSED(llmpar_llama_apply, r->model, NULL, &apply)
    TOLD(llmpar_llama_apply, r->model, r->ctx->comm, NULL)
    REFUSED(llmpar_llama_logits, NULL, r->fsdp, ids, 1, (float *)(void *)buffer)
    REFUSED(llmpar_llama_logits, r->model, NULL, ids, 1, (float *)(void *)buffer)
    REFUSED(llmpar_llama_generate, NULL, r->fsdp, &generate, ids, &count)
    REFUSED(llmpar_llama_generate, r->model, NULL, &generate, ids, &count)
    TOLD(llmpar_llama_generate, r->model, r->fsdp, NULL, ids, &count)
    REFUSED(llmpar_generator_create, NULL, r->fsdp, &generator_desc, &generator)
    REFUSED(llmpar_generator_create, r->model, NULL, &generator_desc, &generator)
    TOLD(llmpar_generator_create, r->model, r->fsdp, NULL, &generator)
    REFUSED(llmpar_generator_run, NULL, &generate, 1, NULL, &count)
    REFUSED(llmpar_generator_begin, NULL, &generate, ids, &count, &count)
    REFUSED(llmpar_generator_step, NULL, &count)
    NOTHING(llmpar_generator_destroy, NULL)

    /* model_io */
    REFUSED(llmpar_hf_index_parse, NULL, "{}", 2, "x", &index, error)
    REFUSED(llmpar_hf_index_parse, heap, NULL, 2, "x", &index, error)
    REFUSED(llmpar_hf_index_parse, heap, "{}", 2, NULL, &index, error)
    REFUSED(llmpar_hf_files_open, NULL, NULL, "x", &files, error)
    REFUSED(llmpar_hf_files_open, heap, NULL, NULL, &files, error)
    NOTHING(llmpar_hf_files_find, NULL, "x", NULL)
    REFUSED(llmpar_hf_writer_open, NULL, NULL, "x", NULL, 0, 0, NULL, &hf_writer, error)
    REFUSED(llmpar_hf_writer_open, heap, NULL, NULL, NULL, 0, 0, NULL, &hf_writer, error)
    REFUSED(llmpar_hf_writer_open, heap, NULL, "x", NULL, 1, 0, NULL, &hf_writer, error)
    REFUSED(llmpar_hf_writer_write, NULL, "x", 1, error)
    REFUSED(llmpar_hf_writer_commit, NULL, error)
    REFUSED(llmpar_hf_config, NULL, "x", &config)
    TOLD(llmpar_hf_config, r->ctx, NULL, &config)
    REFUSED(llmpar_hf_load, NULL, "x")
    TOLD(llmpar_hf_load, r->fsdp, NULL)
    REFUSED(llmpar_hf_save, NULL, &config, "x", NULL)
    TOLD(llmpar_hf_save, r->fsdp, NULL, "x", NULL)
    TOLD(llmpar_hf_save, r->fsdp, &config, NULL, NULL)
    REFUSED(llmpar_tensor_file_open, NULL, "x", NULL, 0, &tensor_file)
    TOLD(llmpar_tensor_file_open, r->fsdp, NULL, NULL, 0, &tensor_file)
    REFUSED(llmpar_tensor_file_write, NULL, 0, buffer)
    REFUSED(llmpar_tensor_file_commit, NULL)
    REFUSED(llmpar_checkpoint_create, NULL, NULL, NULL, &checkpoint)
    TOLD(llmpar_checkpoint_create, r->fsdp, NULL, NULL, &checkpoint)
    REFUSED(llmpar_checkpoint_save, NULL, &info)
    REFUSED(llmpar_checkpoint_poll, NULL, 0)
    REFUSED(llmpar_checkpoint_newest, NULL, "x", 1, &step)
    TOLD(llmpar_checkpoint_newest, r->ctx, NULL, 1, &step)
    REFUSED(llmpar_checkpoint_load, NULL, NULL, "x", NULL, NULL, &info)
    TOLD(llmpar_checkpoint_load, r->fsdp, NULL, NULL, NULL, NULL, &info)
    EMPTY(llmpar_hf_files_open, heap, NULL, "", &files, error)
    EMPTY(llmpar_hf_writer_open, heap, NULL, "", NULL, 0, 0, NULL, &hf_writer, error)
    EMPTY(llmpar_hf_config, r->ctx, "", &config)
    EMPTY(llmpar_hf_load, r->fsdp, "")
    EMPTY(llmpar_hf_save, r->fsdp, &config, "", NULL)
    EMPTY(llmpar_tensor_file_open, r->fsdp, "", NULL, 0, &tensor_file)
    EMPTY(llmpar_checkpoint_create, r->fsdp, NULL, &nowhere, &checkpoint)
    EMPTY(llmpar_checkpoint_newest, r->ctx, "", 1, &step)
    EMPTY(llmpar_checkpoint_load, r->fsdp, NULL, "", NULL, NULL, &info)

    /* run */
    REFUSED(llmpar_launch, NULL, NULL, NULL, error)
    REFUSED(llmpar_plan_memory, NULL, r->model, &recipe, &memory, error)
    REFUSED(llmpar_plan_memory, r->mesh, NULL, &recipe, &memory, error)
    TOLD(llmpar_plan_memory, r->mesh, r->model, NULL, &memory, error)
    REFUSED(llmpar_trainer_desc_resolve, NULL, r->mesh, &config, error)
    REFUSED(llmpar_trainer_desc_resolve, &recipe, NULL, &config, error)
    REFUSED(llmpar_trainer_desc_resolve, &recipe, r->mesh, NULL, error)
    REFUSED(llmpar_parallelize, NULL, r->model, &recipe, &trainer)
    REFUSED(llmpar_parallelize, r->mesh, NULL, &recipe, &trainer)
    TOLD(llmpar_parallelize, r->mesh, r->model, NULL, &trainer)
    REFUSED(llmpar_trainer_step, NULL, NULL)
    NOTHING(llmpar_trainer_steps, NULL)
    REFUSED(llmpar_trainer_checkpoint, NULL)
    REFUSED(llmpar_trainer_finish, NULL)
    REFUSED(llmpar_trainer_eval, NULL, 0, &loss)
    REFUSED(llmpar_trainer_save_gradients, NULL, "x")
    TOLD(llmpar_trainer_save_gradients, r->trainer, NULL)
    EMPTY(llmpar_trainer_save_gradients, r->trainer, "")
    REFUSED(llmpar_trainer_save_trace, NULL)
    REFUSED(llmpar_memory_print, NULL, NULL, buffer, sizeof buffer)
    NOTHING(llmpar_trainer_fsdp, NULL)
    NOTHING(llmpar_trainer_schedule, NULL)
    REFUSED(llmpar_trainer_schedule_bytes, NULL, &bytes)
    NOTHING(llmpar_trainer_data, NULL)
    REFUSED(llmpar_load_hf, NULL, "x")
    TOLD(llmpar_load_hf, r->trainer, NULL)
    REFUSED(llmpar_save_hf, NULL, "x")
    TOLD(llmpar_save_hf, r->trainer, NULL)
    EMPTY(llmpar_load_hf, r->trainer, "")
    EMPTY(llmpar_save_hf, r->trainer, "")
#define EMPTY_FIELD(field) EMPTY(llmpar_trainer_desc_resolve, (memset(&recipe, 0, sizeof recipe), recipe.seq_len = 8, recipe.field = "", &recipe), r->mesh, &config, error)
    EMPTY_FIELD(data)
    EMPTY_FIELD(log)
    EMPTY_FIELD(trace)
    EMPTY_FIELD(checkpoint)
    EMPTY_FIELD(resume)

    /* every chapter: what destroys, closes or frees */
    TAKEN(llmpar_heap_free, heap, NULL)
    TAKEN(llmpar_json_destroy, heap, NULL)
    TAKEN(llmpar_device_host_free, r->ctx->device, heap, NULL, 0)
    TAKEN(llmpar_order_destroy, NULL)
    TAKEN(llmpar_comm_destroy, NULL)
    TAKEN(llmpar_record_destroy, NULL)
    TAKEN(llmpar_halving_free, heap, NULL)
    TAKEN(llmpar_arena_destroy, NULL)
    TAKEN(llmpar_arena_free, llmpar_fsdp_arena(r->fsdp), NULL)
    TAKEN(llmpar_arena_free_marked, llmpar_fsdp_arena(r->fsdp), NULL, 0, 0)
    TAKEN(llmpar_cpu_destroy, NULL)
    TAKEN(llmpar_threads_world_destroy, NULL)
    TAKEN(llmpar_sim_device_destroy, NULL)
    TAKEN(llmpar_mesh_destroy, NULL)
    TAKEN(llmpar_tp_destroy, NULL)
    TAKEN(llmpar_schedule_destroy, NULL)
    TAKEN(llmpar_trace_destroy, NULL)
    TAKEN(llmpar_fsdp_destroy, NULL)
    TAKEN(llmpar_optim_destroy, NULL)
    TAKEN(llmpar_file_close, NULL)
    TAKEN(llmpar_file_unmap, NULL)
    TAKEN(llmpar_writer_abandon, NULL)
    TAKEN(llmpar_safetensors_close, NULL)
    TAKEN(llmpar_safetensors_writer_abandon, NULL)
    TAKEN(llmpar_llama_destroy, NULL)
    TAKEN(llmpar_hf_index_free, heap, NULL)
    TAKEN(llmpar_hf_files_close, NULL)
    TAKEN(llmpar_hf_writer_abandon, NULL)
    TAKEN(llmpar_tensor_file_abandon, NULL)
    TAKEN(llmpar_checkpoint_destroy, NULL)
    TAKEN(llmpar_trainer_destroy, NULL)
    return -1;
}

static void run_all(rig *r)
{
    const char *name = NULL;
    int number = 0;
    for (; run_case(r, number, 0, &name) >= 0; number++) {
        int status = 0;
        fflush(NULL);
        pid_t child = fork();
        if (child == 0) {
            alarm(60);
            _exit(run_case(r, number, 1, &name) ? 0 : 3);
        }
        CHECK(child > 0 && waitpid(child, &status, 0) == child);
        if (WIFSIGNALED(status)) TEST_FAIL("%s: ended by signal %d", name, WTERMSIG(status));
        else if (WEXITSTATUS(status)) TEST_FAIL("%s: %s", name, WEXITSTATUS(status) == 3 ? "not refused, or without a text" : "failed");
    }
    printf("  %d calls\n", number);
}

static llmpar_status one_token(void *user, int64_t index, int32_t *tokens)
{
    (void)user;
    (void)index;
    memset(tokens, 0, 9 * sizeof *tokens);
    return LLMPAR_OK;
}

static llmpar_status one_rank(llmpar_ctx *ctx, void *user)
{
    rig r;
    llmpar_mesh_desc mesh;
    llmpar_llama_desc llama;
    llmpar_trainer_desc recipe;
    (void)user;
    memset(&r, 0, sizeof r);
    memset(&mesh, 0, sizeof mesh);
    memset(&llama, 0, sizeof llama);
    memset(&recipe, 0, sizeof recipe);
    llama.preset = "tiny";
    recipe.sequence = one_token;
    recipe.seq_len = 8;
    r.ctx = ctx;
    r.heap = &ctx->heap;
    llmpar_status status = llmpar_mesh_create(ctx, &mesh, &r.mesh);
    if (!status) status = llmpar_llama_create(ctx, &llama, &r.model);
    if (!status) status = llmpar_parallelize(r.mesh, r.model, &recipe, &r.trainer);
    r.fsdp = llmpar_trainer_fsdp(r.trainer);
    if (!status) run_all(&r);
    llmpar_trainer_destroy(r.trainer);
    llmpar_llama_destroy(r.model);
    llmpar_mesh_destroy(r.mesh);
    return status;
}

TEST(every_call)
{
    llmpar_launch_desc launch;
    llmpar_error error;
    memset(&launch, 0, sizeof launch);
    launch.ranks = 1;
    launch.threads = 1;
    launch.check = test_no_leak;
    if (llmpar_launch(&launch, one_rank, NULL, &error)) TEST_FAIL("launch: %s", error.text);
}

/* In the checked chapters, or destroying, and yet without a case: why. */
static const char *const exempt[][2] = {
    {"llmpar_writer_sum", "void"}, {"llmpar_safetensors_writer_sum", "void"}, {"llmpar_rope_inv_freq", "void"}, {"llmpar_trainer_memory", "void"},
    {"llmpar_mpi_world_destroy", "there with LLMPAR_USE_MPI alone"}, {"llmpar_cuda_destroy", "of a device's own header"},
};

static int destroys(const char *name)
{
    static const char *const ends[] = {"_destroy", "_close", "_free", "_free_marked", "_unmap", "_abandon"};
    for (size_t i = 0; i < sizeof ends / sizeof ends[0]; i++) {
        size_t length = strlen(name), end = strlen(ends[i]);
        if (length > end && !strcmp(name + length - end, ends[i])) return 1;
    }
    return 0;
}

static int has_case(rig *r, const char *name)
{
    const char *other = NULL;
    size_t length = strlen(name);
    for (int number = 0; run_case(r, number, 0, &other) >= 0; number++)
        if (!strncmp(other, name, length) && other[length] == '(') return 1;
    return 0;
}

/* A line of grep, "src/io/file.h:LLMPAR_API ... llmpar_file_open(const char *path, ..);": its function's name, "" if it takes no pointer. */
static void name_of(const char *line, char *name, size_t capacity)
{
    const char *end = strstr(line, "llmpar_"), *from = end;
    name[0] = 0;
    for (; end && end[0]; end = strstr(end + 1, "llmpar_")) { /* the first identifier with a parenthesis behind it: types have none */
        from = end;
        while (isalnum((unsigned char)*end) || *end == '_') end++;
        if (*end == '(') break;
    }
    if (end && *end == '(' && strchr(end, '*')) snprintf(name, capacity, "%.*s", (int)(end - from), from);
}

static llmpar_status list_rank(llmpar_ctx *ctx, void *user)
{
    static const char *const chapters[] = {"src/io/", "src/text/", "src/model/", "src/model_io/", "src/run/"};
    char line[2000], name[100];
    int functions = 0, listed = 0;
    rig r;
    llmpar_llama_desc llama;
    (void)user;
    memset(&r, 0, sizeof r);
    memset(&llama, 0, sizeof llama);
    llama.preset = "tiny";
    r.ctx = ctx;
    r.heap = &ctx->heap;
    llmpar_status status = llmpar_llama_create(ctx, &llama, &r.model);
    if (status) return status;
    FILE *declarations = popen("grep -HE '^LLMPAR_(_MPI_)?API ' src/*/*.h", "r");
    CHECK(declarations != NULL);
    while (declarations && fgets(line, sizeof line, declarations)) {
        int checked = 0, excused = 0;
        name_of(line, name, sizeof name);
        if (!name[0]) continue;
        functions++;
        for (size_t i = 0; i < sizeof chapters / sizeof chapters[0]; i++) checked |= !strncmp(line, chapters[i], strlen(chapters[i]));
        for (size_t i = 0; i < sizeof exempt / sizeof exempt[0]; i++) excused |= !strcmp(name, exempt[i][0]);
        if (!checked && !destroys(name)) continue;
        listed++;
        if (has_case(&r, name) == excused) TEST_FAIL("%s: %s", name, excused ? "exempt, and has a case" : "no case calls it with NULL, and no reason is given");
    }
    if (declarations) pclose(declarations);
    printf("  %d functions with pointers, %d of them have to take or refuse NULL\n", functions, listed);
    CHECK(functions > 290 && listed > 100);
    llmpar_llama_destroy(r.model);
    return status;
}

TEST(every_function_has_a_case)
{
    llmpar_launch_desc launch;
    llmpar_error error;
    memset(&launch, 0, sizeof launch);
    launch.ranks = 1;
    launch.threads = 1;
    if (llmpar_launch(&launch, list_rank, NULL, &error)) TEST_FAIL("launch: %s", error.text);
}

TEST_LIST(T_(every_call), T_(every_function_has_a_case))
