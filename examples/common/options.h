/* options: what the example programs share on their command lines: checked numbers, one clear line on stderr, exit code 2 for
   a wrong command line and 1 for what went wrong later. */
#ifndef EXAMPLES_OPTIONS_H
#define EXAMPLES_OPTIONS_H

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Prints the line, returns 2. */
__attribute__((format(printf, 1, 2), unused)) static int option_error(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    vfprintf(stderr, format, list);
    va_end(list);
    fputc('\n', stderr);
    return 2;
}

/* A program that has done its work: 0, or 1 with the line printed, where what it has to say did not get to stdout. */
__attribute__((unused)) static int output_end(const char *program)
{
    int failed = fflush(stdout), number = errno; /* as long as it is that of this write */
    if (!failed && !ferror(stdout)) return 0;
    fprintf(stderr, "%s: cannot write to stdout%s%s\n", program, failed ? ": " : "", failed ? strerror(number) : "");
    return 1;
}

/* 0, or 2 with the line printed: value, expectation. */
__attribute__((unused)) static int option_long(const char *name, const char *text, long low, long high, long *out)
{
    char *end;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (end == text || *end || errno || value < low || value > high) return option_error("%s \"%s\": expected a whole number %ld .. %ld", name, text, low, high);
    *out = value;
    return 0;
}

__attribute__((unused)) static int option_seed(const char *name, const char *text, unsigned long *out)
{
    char *end;
    errno = 0;
    unsigned long value = strtoul(text, &end, 10);
    if (end == text || *end || errno || *text < '0' || *text > '9') return option_error("%s \"%s\": expected a whole number 0 .. 18446744073709551615", name, text);
    *out = value;
    return 0;
}

__attribute__((unused)) static int option_double(const char *name, const char *text, double low, double high, double *out)
{
    char *end;
    errno = 0;
    double value = strtod(text, &end);
    if (end == text || *end || errno || !(value >= low && value <= high)) return option_error("%s \"%s\": expected a number %g .. %g", name, text, low, high);
    *out = value;
    return 0;
}

/* One of `count` words; *out gets its index. */
__attribute__((unused)) static int option_word(const char *name, const char *text, const char *const *words, int count, int *out)
{
    char list[256] = "";
    for (int i = 0; i < count; i++) {
        if (!strcmp(text, words[i])) {
            *out = i;
            return 0;
        }
        snprintf(list + strlen(list), sizeof list - strlen(list), "%s%s", i ? ", " : "", words[i]);
    }
    return option_error("%s \"%s\": expected one of %s", name, text, list);
}

/* For programs without options: -1 to go on, else the exit code, with one line printed. */
__attribute__((unused)) static int option_none(int argc, char **argv, const char *program)
{
    if (argc < 2) return -1;
    if (strcmp(argv[1], "--help")) return option_error("%s \"%s\": expected no arguments, see --help", program, argv[1]);
    printf("usage: %s\nNo options; what it shows stands at the top of its source in examples/.\n", program);
    return 0;
}

/* mpirun with a program that knows nothing of MPI: each process would do the whole job, and all of them would write the same files. */
__attribute__((unused)) static int option_processes(const char *program)
{
#if !defined(LLMPAR_USE_MPI) && !defined(LLMPAR_USE_NCCL)
    static const char *const names[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        const char *size = getenv(names[i]);
        if (size && atoi(size) > 1) return option_error("%s: %s = %s, but this program was built without MPI: expected build/%s_mpi (make build/%s_mpi), or one process", program, names[i], size, program, program);
    }
#endif
    (void)program;
    return 0;
}

#ifdef LLMPAR_H
/* The root error is printed once, by main. Rank threads stay quiet, but for what each has to say when ranks disagree or one stays away. */
__attribute__((unused)) static void quiet_log(void *user, int rank, llmpar_log_level level, const char *line)
{
    (void)user;
    if (level == LLMPAR_LOG_WARNING && rank == 0) fprintf(stderr, "warning: %s\n", line);
    if (level == LLMPAR_LOG_ERROR) fprintf(stderr, "rank %d %s\n", rank, line);
}

/* Under mpirun every process comes here with the same error: one of them prints it. A process of another launcher prints what is its own too: it may have failed before the ranks met. */
__attribute__((unused)) static int prints_error(const llmpar_error *error)
{
    static const char *const names[] = {"OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK",
#ifdef LLMPAR_USE_NCCL
                                        "RANK",
#endif
    };
#ifdef LLMPAR_USE_NCCL
    if (getenv("RANK") && (error->rank < 0 || error->rank == atoi(getenv("RANK")))) return 1;
#else
    (void)error;
#endif
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (getenv(names[i]) && strcmp(getenv(names[i]), "0")) return 0;
    return 1;
}

/* "train_llama: rank 3 (dp_shard=1 tp=1): ..."; returns 1. */
__attribute__((unused)) static int print_error(const char *program, const llmpar_error *error)
{
    if (!prints_error(error)) {
        struct timespec moment = {0, 300000000};
        nanosleep(&moment, NULL); /* mpirun ends the job with the first process that exits with an error: the one that prints comes first */
        return 1;
    }
    if (error->rank >= 0 && error->where[0]) fprintf(stderr, "%s: rank %d (%s): %s\n", program, (int)error->rank, error->where, error->text);
    else fprintf(stderr, "%s: %s\n", program, error->text);
    return 1;
}
#endif

#endif
