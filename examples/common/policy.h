/* policy: the options of a training step's policy, the same in every program that trains: each is written straight into the descriptors that llmpar_parallelize and llmpar_llama_create take. */
#ifndef EXAMPLES_POLICY_H
#define EXAMPLES_POLICY_H

#include "options.h"

/* For getopt_long: append to a program's own list, all with the value POLICY_OPTION. */
enum { POLICY_OPTION = 256 };
#define POLICY_OPTIONS \
    {"sp", 1, 0, POLICY_OPTION}, {"zero", 1, 0, POLICY_OPTION}, {"reshard", 1, 0, POLICY_OPTION}, {"prefetch", 1, 0, POLICY_OPTION}, {"no-sync", 1, 0, POLICY_OPTION}, {"accumulate", 1, 0, POLICY_OPTION}, \
    {"exact", 1, 0, POLICY_OPTION}, {"dtype", 1, 0, POLICY_OPTION}, {"reduce-dtype", 1, 0, POLICY_OPTION}, {"recompute", 1, 0, POLICY_OPTION}, {"freeze", 1, 0, POLICY_OPTION}, {"offload", 1, 0, POLICY_OPTION}, \
    {"offload-dir", 1, 0, POLICY_OPTION}, {"offload-update", 1, 0, POLICY_OPTION}, {"overlap", 1, 0, POLICY_OPTION}, {"memory-limit", 1, 0, POLICY_OPTION}, {"trace", 1, 0, POLICY_OPTION}, {"optimizer", 1, 0, POLICY_OPTION}, {"momentum", 1, 0, POLICY_OPTION}, \
    {"weight-decay", 1, 0, POLICY_OPTION}, {"clip", 1, 0, POLICY_OPTION}, {"schedule", 1, 0, POLICY_OPTION}, {"lr-min", 1, 0, POLICY_OPTION}, {"decay-steps", 1, 0, POLICY_OPTION}, {"loss-scale", 1, 0, POLICY_OPTION}, \
    {"wrap", 1, 0, POLICY_OPTION}, {"logits-bytes", 1, 0, POLICY_OPTION}

#define POLICY_USAGE \
    "optimizer\n" \
    "  --optimizer adamw|sgd|lomo|adalomo   lomo and adalomo update inside backward: no gradient outlives its unit (default adamw)\n" \
    "  --momentum X        of sgd, 0 .. 1 (default 0.9)\n" \
    "  --weight-decay X    decoupled, not on norms (default 0.1 for adamw, else 0)\n" \
    "  --clip X            largest global gradient norm, 0: off (default 1 for adamw and sgd; lomo then runs backward twice)\n" \
    "  --schedule cosine|constant|linear|wsd|wsd-sqrt|one-cycle   of the learning rate, over --steps (default cosine)\n" \
    "  --lr-min X          where the schedule ends (default a tenth of --lr)\n" \
    "  --decay-steps N     of wsd (default a tenth of --steps)\n" \
    "  --loss-scale X      first loss scale of f16, a power of two (default 65536)\n" \
    "policy (each is a schedule: see --print-schedule; those that keep the bits can be mixed freely)\n" \
    "  --zero 0|1|2|3      sharded over dp-shard: 0 nothing (DDP), 1 optimizer state, 2 and gradients, 3 and parameters (default)\n" \
    "  --reshard last|always|never|N   parameters are freed between forward and backward: all units' but the last (default),\n" \
    "                      all, none, or every Nth unit's\n" \
    "  --wrap half|N       what is gathered at once: half a block, or N blocks, 1 .. 8 (default 1)\n" \
    "  --prefetch N[,M]    units gathered ahead, 0 .. 4; M: in backward (default 0)\n" \
    "  --sp on|off         sequence parallel (default off)\n" \
    "  --no-sync on|off    keep gradients local until the last micro-batch (default off)\n" \
    "  --accumulate tree|chain   micro-batches are added as a balanced tree (default), or in sequence into one buffer\n" \
    "  --recompute none|selective|full|auto[,N]   what blocks compute again in backward instead of keeping it: nothing\n" \
    "                      (default), what is cheap, everything, or what --memory-limit asks for; N: every Nth block only\n" \
    "  --logits-bytes N[K|M|G]   logits held at once; more are computed in parts, with several sequences twice (default 256M)\n" \
    "  --offload LIST      optimizer, params, grads, activations, each =host or =file: kept outside the arena between uses\n" \
    "  --offload-dir DIR   of the files (default .), which are gone when the program is\n" \
    "  --offload-update device|host   where the optimizer works (default device); host: on the CPU, with optimizer, params and grads =host\n" \
    "  --freeze N          the first N units (embedding, blocks ..) are not trained\n" \
    "  --dtype f32|f64|bf16|f16   of parameters and activations (default f32); below f32: f32 master parameters and sums\n" \
    "  --reduce-dtype f32|bf16|f16   of gradients between ranks (default f32; below it bits depend on the mesh)\n" \
    "  --overlap on|off    collectives and files move on threads of their own during compute (default off)\n" \
    "  --memory-limit N[K|M|G]   bytes a rank may hold; a step that would take more is refused at once, with what would help\n" \
    "  --exact off|on|require   same bits on every mesh: not asked for, where possible (default), or refuse other meshes\n" \
    "  --trace FILE.json   timeline of all ranks' streams and memory, for Perfetto or chrome://tracing\n"

__attribute__((unused)) static int policy_bytes(const char *name, const char *text, uint64_t *out)
{
    static const char units[] = "KMG";
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    const char *unit = *end ? strchr(units, *end) : NULL;
    int shift = unit ? 10 * (int)(unit - units + 1) : 0;
    if (end == text || *text < '0' || *text > '9' || errno || (unit && end[1]) || (*end && !unit) || value == 0 || value > (UINT64_MAX >> shift) || value << shift > ((uint64_t)1 << 60))
        return option_error("%s \"%s\": expected bytes 1 .. 2^60, with K, M or G behind the number for 2^10, 2^20, 2^30", name, text);
    *out = (uint64_t)value << shift;
    return 0;
}

__attribute__((unused)) static int policy_offload(const char *text, llmpar_trainer_desc *d)
{
    static const char *const states[] = {"optimizer", "params", "grads", "activations"}, *const tiers[] = {"device", "host", "file"};
    for (const char *at = text; *at;) {
        size_t length = strcspn(at, ",");
        const char *equal = (const char *)memchr(at, '=', length);
        int state = LLMPAR_STATE_COUNT, tier = 3;
        for (int i = 0; equal && i < LLMPAR_STATE_COUNT; i++)
            if ((size_t)(equal - at) == strlen(states[i]) && !strncmp(at, states[i], strlen(states[i]))) state = i;
        for (int i = 0; equal && i < 3; i++)
            if ((size_t)(at + length - equal - 1) == strlen(tiers[i]) && !strncmp(equal + 1, tiers[i], strlen(tiers[i]))) tier = i;
        if (state == LLMPAR_STATE_COUNT || tier == 3)
            return option_error("--offload \"%s\": \"%.*s\": expected optimizer, params, grads or activations, with =device, =host or =file, separated by commas", text, (int)length, at);
        d->offload[state] = (llmpar_tier)tier;
        at += length + (at[length] == ',');
        if (!*at && at[-1] == ',') return option_error("--offload \"%s\": expected another state behind the comma", text);
    }
    return *text ? 0 : option_error("--offload \"\": expected a list like optimizer=file,activations=file");
}

/* The word before a comma, and the number behind it, if there is one. */
__attribute__((unused)) static int policy_word_and_number(const char *name, const char *text, const char *const *words, int count, long low, long high, int *word, long *number)
{
    char head[32];
    const char *comma = strchr(text, ',');
    snprintf(head, sizeof head, "%.*s", comma ? (int)(comma - text) : (int)sizeof head - 1, text);
    if (comma && option_long(name, comma + 1, low, high, number)) return 2;
    return option_word(name, head, words, count, word);
}

/* One option. 0, or 2 with the line printed. */
__attribute__((unused)) static int policy_option(const char *option, const char *text, llmpar_trainer_desc *d, llmpar_llama_desc *m)
{
    static const char *const on_off[] = {"off", "on"}, *const zero[] = {"0", "1", "2", "3"}, *const accumulate[] = {"tree", "chain"}, *const exact[] = {"off", "on", "require"}, *const dtypes[] = {"f32", "f64", "bf16", "f16"},
        *const reduce[] = {"f32", "bf16", "f16"}, *const recompute[] = {"none", "selective", "full", "auto"}, *const reshard[] = {"last", "always", "never"}, *const where[] = {"device", "host"};
    static const llmpar_dtype dtype[] = {LLMPAR_F32, LLMPAR_F64, LLMPAR_BF16, LLMPAR_F16}, reduce_dtype[] = {LLMPAR_F32, LLMPAR_BF16, LLMPAR_F16};
    char name[40];
    int word = 0, bad = 0;
    long number = 0, second;
    double value = 0;
    snprintf(name, sizeof name, "--%s", option);
    if (!strcmp(option, "sp")) {
        bad = option_word(name, text, on_off, 2, &word);
        d->sequence_parallel = word;
    } else if (!strcmp(option, "zero")) {
        bad = option_word(name, text, zero, 4, &word);
        d->zero = LLMPAR_ZERO_0 + word;
    } else if (!strcmp(option, "reshard")) {
        if (text[0] >= '0' && text[0] <= '9') {
            bad = option_long(name, text, 1, 1 << 20, &number);
            d->reshard = LLMPAR_RESHARD_EVERY;
            d->reshard_every = (int32_t)number;
        } else {
            bad = option_word(name, text, reshard, 3, &word);
            d->reshard = (llmpar_reshard)(LLMPAR_RESHARD_NOT_LAST + word);
        }
    } else if (!strcmp(option, "prefetch")) {
        char head[16];
        const char *comma = strchr(text, ',');
        snprintf(head, sizeof head, "%.*s", comma ? (int)(comma - text) : (int)sizeof head - 1, text);
        bad = option_long(name, head, 0, 4, &number);
        second = number;
        if (!bad && comma) bad = option_long(name, comma + 1, 0, 4, &second);
        d->prefetch = (int32_t)number;
        d->prefetch_backward = second ? (int32_t)second : -1;
    } else if (!strcmp(option, "no-sync")) {
        bad = option_word(name, text, on_off, 2, &word);
        d->no_sync = word;
    } else if (!strcmp(option, "accumulate")) {
        bad = option_word(name, text, accumulate, 2, &word);
        d->chain = word;
    } else if (!strcmp(option, "exact")) {
        bad = option_word(name, text, exact, 3, &word);
        d->exact = (llmpar_exact)(LLMPAR_EXACT_OFF + word);
    } else if (!strcmp(option, "dtype")) {
        bad = option_word(name, text, dtypes, 4, &word);
        d->dtype = dtype[word];
    } else if (!strcmp(option, "reduce-dtype")) {
        bad = option_word(name, text, reduce, 3, &word);
        d->reduce_dtype = reduce_dtype[word];
    } else if (!strcmp(option, "recompute")) {
        number = 1;
        bad = policy_word_and_number(name, text, recompute, 4, 1, 1 << 20, &word, &number);
        d->recompute = (llmpar_recompute)word;
        d->recompute_every = (int32_t)number;
    } else if (!strcmp(option, "offload-update")) {
        bad = option_word(name, text, where, 2, &word);
        d->offload_update = word ? LLMPAR_TIER_HOST : LLMPAR_TIER_DEVICE;
    } else if (!strcmp(option, "freeze")) {
        bad = option_long(name, text, 0, 1 << 20, &number);
        d->freeze = (int32_t)number;
    } else if (!strcmp(option, "offload")) {
        bad = policy_offload(text, d);
    } else if (!strcmp(option, "offload-dir")) {
        d->offload_dir = text;
    } else if (!strcmp(option, "overlap")) {
        bad = option_word(name, text, on_off, 2, &word);
        d->overlap = word;
    } else if (!strcmp(option, "memory-limit")) {
        bad = policy_bytes(name, text, &d->memory_limit);
    } else if (!strcmp(option, "trace")) {
        d->trace = text;
    } else if (!strcmp(option, "wrap")) {
        number = LLMPAR_WRAP_HALF;
        if (strcmp(text, "half")) bad = text[0] >= '0' && text[0] <= '9' ? option_long(name, text, 1, 8, &number) : option_error("--wrap \"%s\": expected half or a whole number 1 .. 8", text);
        m->wrap = (int32_t)number;
    } else if (!strcmp(option, "logits-bytes")) {
        uint64_t bytes = 0;
        bad = policy_bytes(name, text, &bytes);
        m->logits_bytes = (int64_t)bytes;
    } else if (!strcmp(option, "optimizer")) {
        llmpar_optim_kind kind;
        if (!llmpar_optim_parse(text, &kind)) return option_error("%s \"%s\": expected one of adamw, sgd, lomo, adalomo", name, text);
        d->optim.kind = kind;
    } else if (!strcmp(option, "schedule")) {
        llmpar_lr_kind kind;
        if (!llmpar_lr_parse(text, &kind)) return option_error("%s \"%s\": expected one of cosine, constant, linear, wsd, wsd-sqrt, one-cycle", name, text);
        d->lr_schedule = kind;
    } else if (!strcmp(option, "momentum")) {
        bad = option_double(name, text, 0, 0.9999999, &value);
        d->optim.momentum = value > 0 ? value : -1;
    } else if (!strcmp(option, "weight-decay")) {
        bad = option_double(name, text, 0, 1000, &value);
        d->optim.decay = value > 0 ? value : -1;
    } else if (!strcmp(option, "clip")) {
        bad = option_double(name, text, 0, 1e30, &value);
        d->optim.clip = value > 0 ? value : -1;
    } else if (!strcmp(option, "lr-min")) {
        bad = option_double(name, text, 1e-30, 1000, &d->lr_min);
    } else if (!strcmp(option, "decay-steps")) {
        bad = option_long(name, text, 1, 1000000000, &number);
        d->decay_steps = number;
    } else if (!strcmp(option, "loss-scale")) {
        bad = option_double(name, text, 1e-30, 1e30, &d->loss_scale.scale);
    } else {
        bad = option_error("%s: no such option", name);
    }
    return bad;
}

#endif
