#include "base/processors_internal.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif

LLMPAR__PRIVATE_DEF void llmpar__processors_allowed(llmpar__processors *out)
{
    memset(out, 0, sizeof *out);
#if defined(__linux__)
    if (syscall(SYS_sched_getaffinity, 0, sizeof out->mask, out->mask) < 0) memset(out->mask, 0, sizeof out->mask);
    for (int32_t i = 0; i < LLMPAR__PROCESSORS_WORDS; i++) out->count += __builtin_popcountll((unsigned long long)out->mask[i]);
#endif
    out->mask_known = out->count > 0;
    if (!out->count) {
        long online = sysconf(_SC_NPROCESSORS_ONLN);
        out->count = online < 1 ? 1 : online > 64 * LLMPAR__PROCESSORS_WORDS ? 64 * LLMPAR__PROCESSORS_WORDS : (int32_t)online;
    }
}

static int llmpar__processors_has(const llmpar__processors *set, long i) { return i >= 0 && i < 64 * LLMPAR__PROCESSORS_WORDS && (set->mask[i / 64] >> (i % 64) & 1); }

/* The beginning of a file, as text; "" if there is none. */
static void llmpar__processors_read(const char *path, char *out, size_t size)
{
    int file = open(path, O_RDONLY);
    ssize_t bytes = file < 0 ? 0 : read(file, out, size - 1);
    if (file >= 0) close(file);
    out[bytes > 0 ? bytes : 0] = 0;
}

/* A number at *text, which moves behind it; -1: there is none. */
static long llmpar__processors_number(const char **text)
{
    long value = -1;
    for (; **text >= '0' && **text <= '9' && value < 100000000; ++*text) value = (value < 0 ? 0 : value * 10) + (**text - '0');
    return value;
}

/* Is a processor with a smaller number in the set on the same core? The system's list of a core's processors is "0,4" or "0-1". */
static int llmpar__processors_second(const llmpar__processors *set, long processor)
{
    char path[96], text[200];
    const char *at = text;
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%ld/topology/thread_siblings_list", processor);
    llmpar__processors_read(path, text, sizeof text);
    while (*at >= '0' && *at <= '9') {
        long first = llmpar__processors_number(&at), last = first;
        if (*at == '-') {
            at++;
            last = llmpar__processors_number(&at);
        }
        for (; first <= last && first < processor; first++)
            if (llmpar__processors_has(set, first)) return 1;
        if (*at == ',') at++;
    }
    return 0;
}

LLMPAR__PRIVATE_DEF int32_t llmpar__processors_cores(const llmpar__processors *set, int32_t *order)
{
    int32_t cores = 0, seconds = 0;
    uint64_t second[LLMPAR__PROCESSORS_WORDS];
    memset(second, 0, sizeof second);
    for (long i = 0; i < 64 * LLMPAR__PROCESSORS_WORDS; i++) {
        if (!llmpar__processors_has(set, i)) continue;
        if (llmpar__processors_second(set, i)) second[i / 64] |= (uint64_t)1 << (i % 64);
        else {
            if (order) order[cores] = (int32_t)i;
            cores++;
        }
    }
    for (long i = 0; i < 64 * LLMPAR__PROCESSORS_WORDS && order; i++)
        if (second[i / 64] >> (i % 64) & 1) order[cores + seconds++] = (int32_t)i;
    return cores ? cores : set->count;
}

/* Processors that the control group's quota of time amounts to, rounded up; INT32_MAX: there is none. */
static int32_t llmpar__processors_quota(void)
{
    char text[64];
    const char *at = text;
    llmpar__processors_read("/sys/fs/cgroup/cpu.max", text, sizeof text); /* "150000 100000": one processor and a half; "max 100000": no quota */
    long quota = llmpar__processors_number(&at);
    if (quota <= 0 || *at++ != ' ') return INT32_MAX;
    long period = llmpar__processors_number(&at);
    return period > 0 ? (int32_t)((quota + period - 1) / period) : INT32_MAX;
}

LLMPAR__PRIVATE_DEF int32_t llmpar__processors_share(int32_t cores, int32_t users)
{
    int32_t quota = llmpar__processors_quota(), usable = quota < cores ? quota : cores;
    return usable < users ? 1 : usable / users;
}

LLMPAR__PRIVATE_DEF int llmpar__processors_stay(const llmpar__processors *set)
{
#if defined(__linux__)
    return syscall(SYS_sched_setaffinity, 0, sizeof set->mask, set->mask) == 0;
#else
    (void)set;
    return 0;
#endif
}

LLMPAR__PRIVATE_DEF int llmpar__processors_stay_on(int32_t processor)
{
    LLMPAR__ZEROED(llmpar__processors, one);
    one.mask[processor / 64] = (uint64_t)1 << (processor % 64);
    one.count = 1;
    return llmpar__processors_stay(&one);
}
