/* train_llama: trains a Llama on a mesh of ranks: threads, or MPI processes. The world is dp_replicate x dp_shard x tp; losses, gradients and the saved model are the same bits on every mesh.

   cc -O3 -I. examples/train_llama.c -o build/train_llama -lpthread -lm       (or: make build/train_llama)
   build/train_llama --model tiny --data input.txt --dp-shard 2 --tp 2 --seq-len 256 --batch 8 --steps 200 --save out --log train.jsonl
   mpicc -O3 -DLLMPAR_USE_MPI -I. examples/train_llama.c -o build/train_llama_mpi -lpthread -lm       (or: make build/train_llama_mpi)
   mpirun -n 4 build/train_llama_mpi --model tiny --data input.txt --dp-shard 2 --tp 2 --steps 200
   make build/train_llama_cuda && build/train_llama_cuda --device cuda --model 1b --dtype bf16 --data input.txt       (docs/gpu.md) */
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/checkpoint.h"
#include "common/device.h"
#include "common/options.h"
#include "common/policy.h"

typedef struct settings {
    const char *model, *data, *save, *log, *gradients, *record;
    long dp_replicate, dp_shard, tp, seq_len, batch, grad_accum, steps, threads, warmup, log_every;
    unsigned long seed;
    double lr, deadline;
    int print_schedule, print_memory, check, pin;
    llmpar_trainer_desc policy;
    llmpar_llama_desc shape;
    llmpar_hf_desc save_as;
    device_settings device;
} settings;

static void usage(void)
{
    puts("usage: train_llama --model NAME|DIR --data FILE [options]\n"
         "  --model NAME|DIR    tiny, 15m, 110m, 300m, 1b (new weights), or a Hugging Face directory (its weights)\n"
         "  --data FILE         text; its bytes are the tokens (the last 5 % are held out)\n"
         "mesh (the world is their product; ranks are threads, or under mpirun the processes of build/train_llama_mpi)\n"
         "  --dp-replicate N    copies of the sharded model (default 1)\n"
         "  --dp-shard N        ranks that share parameters, gradients and optimizer state (default 1)\n"
         "  --tp N              tensor-parallel ranks (default 1)\n"
         "  --threads N         workers inside a rank (default: the cores / the ranks of this machine; same bits)\n"
         "  --pin auto|on|off   does each thread stay on a processor of its own (default auto: where the threads fill the machine)\n"
         DEVICE_USAGE
         "  --cuda-graphs       units are replayed as CUDA graphs; with --cuda-mode fast, --tp 1, not f16\n"
         "training\n"
         "  --seq-len N         tokens a sequence (default 256)\n"
         "  --batch N           sequences a step, over all ranks (default: one a data rank and micro-batch)\n"
         "  --grad-accum N      micro-batches a step (default 1)\n"
         "  --steps N           in all, with those before a resume (default 100)\n"
         "  --lr X              peak of the learning rate (default 1e-3)\n"
         "  --warmup N          steps (default a tenth of --steps; one-cycle has none)\n"
         "  --seed N            of weights and data order (default 0)\n"
         POLICY_USAGE
         CHECKPOINT_USAGE
         "output\n"
         "  --save DIR          write a Hugging Face directory at the end\n"
         "  --save-shard BYTES  in files of at most so many bytes of tensors, and an index (K, M, G allowed; default: one file)\n"
         "  --save-dtype D      f32, f64, bf16, f16 (default: that of the master parameters)\n"
         "  --save-gradients FILE    write the last step's gradients as safetensors\n"
         "  --log FILE.jsonl    one JSON object a step\n"
         "  --log-every N       console line every N steps (default 10)\n"
         "  --print-schedule    print what a step does, one instruction a line with its bytes, and exit\n"
         "  --print-memory      print what a step would hold, without holding it, and exit\n"
         "faults\n"
         "  --deadline SECONDS  a collective waits so long for its peers, then says who is where (default 600; 0 for ever)\n"
         "  --check 0|1         do the ranks compare what they call before data moves? (default 1)\n"
         "  --record DIR        on an error write every rank's last collectives to DIR/llmpar_rank_N.json\n"
         "  --help");
}

/* What is computed, in units and in the model's own FLOPs: forward counts once, backward twice. */
static void print_passes(const llmpar_schedule *schedule)
{
    long forward = 0, again = 0, recompute = 0, backward = 0;
    for (int32_t i = 0; i < schedule->count; i++) {
        const llmpar_instruction *in = &schedule->list[i];
        if (in->op == LLMPAR_OP_FORWARD && in->again) again++;
        else if (in->op == LLMPAR_OP_FORWARD) forward++;
        if (in->op == LLMPAR_OP_BACKWARD && in->again) again += 2;
        else if (in->op == LLMPAR_OP_BACKWARD) backward++;
        if (in->op == LLMPAR_OP_RECOMPUTE) recompute++;
    }
    printf("# forward %ld, recomputed %ld, backward %ld units: %.2f x the FLOPs of one forward and backward (a backward counts as two forwards)\n", forward, recompute, backward, (double)(forward + again + recompute + 2 * backward) / (3.0 * (double)forward));
}

static llmpar_status print_schedule(llmpar_ctx *ctx, llmpar_trainer *trainer, llmpar_llama *model)
{
    const llmpar_schedule *schedule = llmpar_trainer_schedule(trainer);
    const llmpar_unit *units = llmpar_llama_units(model, NULL);
    if (ctx->rank) return LLMPAR_OK;
    uint64_t *each = (uint64_t *)malloc((size_t)schedule->count * sizeof *each);
    llmpar_status status = each ? llmpar_trainer_schedule_bytes(trainer, each) : llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "out of memory for the schedule's bytes");
    size_t length = status ? 0 : llmpar_schedule_print(schedule, units, each, NULL, 0) + 1;
    char *text = (char *)malloc(length + 1);
    if (!status && !text) status = llmpar_fail(ctx, LLMPAR_ERR_MEMORY, "out of memory for the schedule's text");
    if (!status) {
        llmpar_schedule_print(schedule, units, each, text, length);
        fputs(text, stdout);
        print_passes(schedule);
    }
    free(text);
    free(each);
    return status;
}

/* What was held, or what the plan says would be. */
static llmpar_status print_memory(llmpar_ctx *ctx, const llmpar_memory *memory)
{
    char text[2000];
    llmpar_status status = llmpar_memory_print(ctx, memory, text, sizeof text);
    if (!status && !ctx->rank) fputs(text, stdout);
    return status;
}

/* A directory that cannot be written is better found before training than after. */
static llmpar_status check_save(llmpar_ctx *ctx, const settings *s)
{
    llmpar_error error;
    llmpar_error_clear(&error);
    if (!s->save || ctx->rank) return LLMPAR_OK;
    int was_there = llmpar_is_directory(s->save);
    llmpar_status status = llmpar_directory_ensure(NULL, s->save, &error);
    if (!status && !was_there) rmdir(s->save); /* training may still fail, and then nothing was written */
    return status ? llmpar_fail(ctx, status, "--save: %s", error.text) : LLMPAR_OK;
}

static llmpar_status train(llmpar_ctx *ctx, void *user)
{
    const settings *s = (const settings *)user;
    llmpar_mesh *mesh = NULL;
    llmpar_llama *model = NULL;
    llmpar_trainer *trainer = NULL;
    llmpar_llama_config config;
    llmpar_mesh_desc mesh_desc;
    llmpar_llama_desc model_desc;
    llmpar_trainer_desc desc;
    memset(&mesh_desc, 0, sizeof mesh_desc);
    memset(&model_desc, 0, sizeof model_desc);
    memset(&desc, 0, sizeof desc);
    int from_directory = llmpar_is_directory(s->model);
    mesh_desc.dp_replicate = (int32_t)s->dp_replicate;
    mesh_desc.dp_shard = (int32_t)s->dp_shard;
    mesh_desc.tp = (int32_t)s->tp;
    model_desc = s->shape;
    model_desc.seed = s->seed;
    if (from_directory) model_desc.config = &config;
    else model_desc.preset = s->model;
    desc = s->policy;
    desc.data = s->data;
    desc.seq_len = s->seq_len;
    desc.batch = s->batch;
    desc.grad_accum = (int32_t)s->grad_accum;
    desc.lr = s->lr;
    desc.warmup = s->warmup;
    desc.total_steps = s->steps;
    desc.log = s->print_schedule ? NULL : s->log;
    if (s->print_schedule || s->print_memory) {
        desc.checkpoint = desc.resume = NULL;
        desc.checkpoint_every = desc.keep = desc.checkpoint_background = 0;
    }
    desc.log_every = (int32_t)s->log_every;
    llmpar_status status = from_directory ? llmpar_hf_config(ctx, s->model, &config) : LLMPAR_OK;
    if (!status && from_directory && config.vocab > 256 && !ctx->rank)
        fprintf(stderr, "warning: the text's bytes are the tokens, 0 .. 255, but %s has a vocabulary of %d: its own tokenizer is not read\n", s->model, (int)config.vocab);
    if (!status) status = llmpar_mesh_create(ctx, &mesh_desc, &mesh);
    if (!status) status = llmpar_llama_create(ctx, &model_desc, &model);
    llmpar_memory memory;
    if (!status && s->print_memory) {
        llmpar_error too_much;
        llmpar_error_clear(&too_much);
        if (desc.recompute != LLMPAR_RECOMPUTE_AUTO) desc.memory_limit = 0; /* to be printed, not refused */
        status = llmpar_plan_memory(mesh, model, &desc, &memory, &too_much);
        if (status == LLMPAR_ERR_MEMORY && too_much.text[0]) status = llmpar_fail(ctx, status, "%s", too_much.text);
        if (!status) status = print_memory(ctx, &memory);
    }
    if (!status && !s->print_memory) status = llmpar_parallelize(mesh, model, &desc, &trainer);
    if (!status && trainer && from_directory && !llmpar_trainer_steps(trainer)) status = llmpar_load_hf(trainer, s->model);
    if (!status && trainer && s->print_schedule) {
        status = print_schedule(ctx, trainer, model);
    } else if (trainer) {
        if (!status) status = check_save(ctx, s);
        long first = (long)llmpar_trainer_steps(trainer);
        if (!status && first > s->steps) status = llmpar_fail(ctx, LLMPAR_ERR_ARGUMENT, "--steps %ld: the checkpoint is of step %ld already", s->steps, first);
        for (long i = first; i < s->steps && !status; i++) {
            if (s->gradients && i + 1 == s->steps) status = llmpar_trainer_save_gradients(trainer, s->gradients);
            if (!status) status = llmpar_trainer_step(trainer, NULL);
        }
        if (!status && desc.checkpoint && !desc.checkpoint_every && first < s->steps) status = llmpar_trainer_checkpoint(trainer);
        if (!status) status = llmpar_trainer_finish(trainer);
        if (!status && s->save) status = llmpar_hf_save(llmpar_trainer_fsdp(trainer), llmpar_llama_get_config(model), s->save, &s->save_as);
        if (!status && desc.trace) status = llmpar_trainer_save_trace(trainer);
        llmpar_trainer_memory(trainer, &memory);
        if (!status && s->log_every > 0) status = print_memory(ctx, &memory);
        if (status == LLMPAR_ERR_MEMORY) { /* this rank's own; the others cannot be asked any more */
            char text[2000];
            llmpar_memory_print(NULL, &memory, text, sizeof text);
            fputs(text, stderr);
        }
    }
    llmpar_trainer_destroy(trainer);
    llmpar_llama_destroy(model);
    llmpar_mesh_destroy(mesh);
    return status;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"model", 1, 0, 'm'},  {"data", 1, 0, 'd'},  {"dp-replicate", 1, 0, 'r'}, {"dp-shard", 1, 0, 'f'}, {"tp", 1, 0, 't'},      {"threads", 1, 0, 'w'}, {"pin", 1, 0, 'N'}, {"seq-len", 1, 0, 'T'},
        {"batch", 1, 0, 'B'},  {"grad-accum", 1, 0, 'a'}, {"steps", 1, 0, 'n'},   {"lr", 1, 0, 'l'},       {"warmup", 1, 0, 'u'},  {"seed", 1, 0, 's'},
        POLICY_OPTIONS, CHECKPOINT_OPTIONS, DEVICE_OPTIONS, {"cuda-graphs", 0, 0, 'g'}, {"save", 1, 0, 'o'}, {"save-shard", 1, 0, 'S'}, {"save-dtype", 1, 0, 'E'}, {"save-gradients", 1, 0, 'G'}, {"log", 1, 0, 'j'},
        {"log-every", 1, 0, 'v'}, {"print-schedule", 0, 0, 'P'}, {"print-memory", 0, 0, 'M'}, {"deadline", 1, 0, 'D'}, {"check", 1, 0, 'C'}, {"record", 1, 0, 'R'}, {"help", 0, 0, 'h'}, {0, 0, 0, 0}};
    static const char *const check[] = {"0", "1"}, *const dtypes[] = {"f32", "f64", "bf16", "f16"}, *const pins[] = {"auto", "on", "off"};
    static const llmpar_dtype dtype[] = {LLMPAR_F32, LLMPAR_F64, LLMPAR_BF16, LLMPAR_F16};
    int word = 0;
    settings s;
    memset(&s, 0, sizeof s);
    s.dp_replicate = s.dp_shard = s.tp = s.grad_accum = 1;
    s.seq_len = 256;
    s.steps = 100;
    s.warmup = -1;
    s.log_every = 10;
    s.check = 1;
    s.deadline = 600;
    s.lr = 1e-3;
    int bad = 0, index = 0;
    for (int c; !bad && (c = getopt_long(argc, argv, "", options, &index)) != -1;) {
        switch (c) {
        case 'm': s.model = optarg; break;
        case 'd': s.data = optarg; break;
        case 'r': bad = option_long("--dp-replicate", optarg, 1, 4096, &s.dp_replicate); break;
        case 'f': bad = option_long("--dp-shard", optarg, 1, 4096, &s.dp_shard); break;
        case 't': bad = option_long("--tp", optarg, 1, 4096, &s.tp); break;
        case 'w': bad = option_long("--threads", optarg, 1, 256, &s.threads); break;
        case 'N': bad = option_word("--pin", optarg, pins, 3, &s.pin); break;
        case 'T': bad = option_long("--seq-len", optarg, 1, 1 << 24, &s.seq_len); break;
        case 'B': bad = option_long("--batch", optarg, 1, 1 << 30, &s.batch); break;
        case 'a': bad = option_long("--grad-accum", optarg, 1, 1 << 16, &s.grad_accum); break;
        case 'n': bad = option_long("--steps", optarg, 1, 1000000000, &s.steps); break;
        case 'l': bad = option_double("--lr", optarg, 1e-12, 1000, &s.lr); break;
        case 'u': bad = option_long("--warmup", optarg, 0, 1000000000, &s.warmup); break;
        case 's': bad = option_seed("--seed", optarg, &s.seed); break;
        case POLICY_OPTION: bad = policy_option(options[index].name, optarg, &s.policy, &s.shape); break;
        case CHECKPOINT_OPTION: bad = checkpoint_option(options[index].name, optarg, &s.policy); break;
        case DEVICE_OPTION: bad = device_option(options[index].name, optarg, &s.device); break;
        case 'g': s.policy.graphs = 1; break;
        case 'M': s.print_memory = 1; break;
        case 'o': s.save = optarg; break;
        case 'S': bad = policy_bytes("--save-shard", optarg, &s.save_as.max_file_bytes); break;
        case 'E': bad = option_word("--save-dtype", optarg, dtypes, 4, &word); s.save_as.dtype = dtype[word]; break;
        case 'G': s.gradients = optarg; break;
        case 'j': s.log = optarg; break;
        case 'v': bad = option_long("--log-every", optarg, 1, 1000000000, &s.log_every); break;
        case 'P': s.print_schedule = 1; break;
        case 'D': bad = option_double("--deadline", optarg, 0, 1e9, &s.deadline); break;
        case 'C': bad = option_word("--check", optarg, check, 2, &s.check); break;
        case 'R': s.record = optarg; break;
        case 'h': usage(); return 0;
        default: bad = 2; /* getopt_long has said what */
        }
    }
    if (!bad && optind < argc) bad = option_error("unexpected argument \"%s\", see --help", argv[optind]);
    if (!bad && !s.model) bad = option_error("--model is missing, see --help");
    if (!bad && !s.data) bad = option_error("--data is missing, see --help");
    if (!bad && s.gradients && !s.gradients[0]) bad = option_error("--save-gradients \"\": expected a file");
    if (!bad && (s.save_as.max_file_bytes || s.save_as.dtype) && !s.save) bad = option_error("--save-shard and --save-dtype say how to --save, which is missing, see --help");
    if (!bad) bad = checkpoint_options_check(&s.policy);
    if (!bad) bad = device_options_check(&s.device, "train_llama");
    if (!bad && s.policy.graphs && s.device.mode != 2) bad = option_error("--cuda-graphs: expected --device cuda --cuda-mode fast beside it");
    if (!bad && s.dp_replicate * s.dp_shard * s.tp > 4096) bad = option_error("dp-replicate %ld x dp-shard %ld x tp %ld = %ld ranks, expected at most 4096", s.dp_replicate, s.dp_shard, s.tp, s.dp_replicate * s.dp_shard * s.tp);
    if (!bad && !llmpar_is_directory(s.model)) {
        llmpar_llama_config preset;
        llmpar_error unknown;
        llmpar_error_clear(&unknown);
        if (llmpar_llama_preset(s.model, &preset, &unknown)) bad = option_error("--model: no directory of that name; %s", unknown.text);
    }
    if (!bad) bad = option_processes("train_llama");
    if (bad) return 2;
    if (s.warmup < 0) s.warmup = s.policy.lr_schedule == LLMPAR_LR_ONE_CYCLE ? 0 : s.steps / 10;
    llmpar_launch_desc launch;
    llmpar_error error;
    memset(&launch, 0, sizeof launch);
    launch.ranks = (int32_t)(s.dp_replicate * s.dp_shard * s.tp);
    launch.threads = (int32_t)s.threads;
    launch.pin = (llmpar_pin)s.pin;
    launch.deadline = s.deadline > 0 ? s.deadline : -1;
    launch.unchecked = !s.check;
    launch.record = s.record;
    launch.log = quiet_log;
    device_launch(&s.device, &launch);
    return llmpar_launch(&launch, train, &s, &error) ? print_error("train_llama", &error) : output_end("train_llama");
}
