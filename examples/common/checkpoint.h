/* checkpoint: the options that save a run and go on with it, written straight into the descriptor that llmpar_parallelize takes. */
#ifndef EXAMPLES_CHECKPOINT_H
#define EXAMPLES_CHECKPOINT_H

#include "options.h"

/* For getopt_long: append to a program's own list, all with the value CHECKPOINT_OPTION. */
enum { CHECKPOINT_OPTION = 257 };
#define CHECKPOINT_OPTIONS \
    {"checkpoint", 1, 0, CHECKPOINT_OPTION}, {"checkpoint-every", 1, 0, CHECKPOINT_OPTION}, {"keep", 1, 0, CHECKPOINT_OPTION}, {"resume", 1, 0, CHECKPOINT_OPTION}, {"checkpoint-background", 1, 0, CHECKPOINT_OPTION}

#define CHECKPOINT_USAGE \
    "checkpoints (docs/checkpoints.md)\n" \
    "  --checkpoint DIR    save parameters, optimizer state and all else that a run needs to go on, exactly, in DIR/step-N\n" \
    "  --checkpoint-every N   steps between saves (default: one save, at the end)\n" \
    "  --keep K            keep the newest K, remove older ones (default: keep all)\n" \
    "  --checkpoint-background on|off   files are written while the next steps run (default off)\n" \
    "  --resume auto|step-N|DIR   go on from the newest whole checkpoint (auto: from the beginning where there is none yet),\n" \
    "                      from DIR's step-N of --checkpoint, or from another directory; on any mesh; --steps counts from 0 and\n" \
    "                      shapes the learning rate, as --lr, --warmup and --schedule do: say the same for the same run\n"

/* One option. 0, or 2 with the line printed. */
__attribute__((unused)) static int checkpoint_option(const char *option, const char *text, llmpar_trainer_desc *d)
{
    static const char *const on_off[] = {"off", "on"};
    char name[40];
    int word = 0, bad = 0;
    long number = 0;
    snprintf(name, sizeof name, "--%s", option);
    if (!strcmp(option, "checkpoint-every") || !strcmp(option, "keep")) {
        bad = option_long(name, text, 1, 1000000000, &number);
        if (!strcmp(option, "keep")) d->keep = (int32_t)number;
        else d->checkpoint_every = (int32_t)number;
    } else if (!strcmp(option, "checkpoint-background")) {
        bad = option_word(name, text, on_off, 2, &word);
        d->checkpoint_background = word;
    } else if (!text[0]) {
        bad = option_error("%s \"\": expected a %s", name, strcmp(option, "resume") ? "directory" : "word or directory");
    } else if (!strcmp(option, "resume")) {
        d->resume = text;
    } else {
        d->checkpoint = text;
    }
    return bad;
}

/* What belongs together. */
__attribute__((unused)) static int checkpoint_options_check(const llmpar_trainer_desc *d)
{
    if (d->checkpoint) return 0;
    if (d->checkpoint_every || d->keep || d->checkpoint_background) return option_error("--%s needs --checkpoint DIR", d->checkpoint_every ? "checkpoint-every" : d->keep ? "keep" : "checkpoint-background");
    if (d->resume && (!strcmp(d->resume, "auto") || !strncmp(d->resume, "step-", 5))) return option_error("--resume %s needs --checkpoint DIR: the directory that it is in", d->resume);
    return 0;
}

#endif
