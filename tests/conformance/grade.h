/* grade: what the two conformance suites share: each slot is tried in a child process of its own, its buffers lie between guard pages, and the parent says what became of it.

   A buffer's neighbourhood. Half of the cases put the buffer at the end of its zone, half at the beginning, so that both sides meet an inaccessible page; the other side is poison that must stay:

      inaccessible |  poison 0xff ...      | buffer | inaccessible          placement 0: a read or write beyond the end stops there
      inaccessible | buffer |      ... poison 0xff  | inaccessible          placement 1: the same before the beginning

   Outputs and scratch are full of poison, too: as a float it is a NaN, so what was never written, or was computed from memory outside, shows. An access to an inaccessible page ends the child with the name
   of the buffer; any other crash, and a slot that makes no progress, end it with the name of the case. Nothing is left to the next slot. */
#ifndef CONFORMANCE_GRADE_H
#define CONFORMANCE_GRADE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* REG_ERR: did the fault read or write? */
#endif

#include "llmpar.h"

#include <errno.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/prctl.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <ucontext.h>
#endif

enum { GRADE_RANKS = 8, GRADE_PLACES = 16, GRADE_ZONE = 1 << 21, GRADE_PAGE = 1 << 16 /* a multiple of any system's page */, GRADE_WINDOW = 4096 };

typedef enum grade_severity { GRADE_STATUS = 1, GRADE_VALUE = 2, GRADE_BOUNDS = 3 } grade_severity;

/* One buffer of the current case. */
typedef struct grade_place {
    char name[24];
    unsigned char *zone, *at; /* GRADE_ZONE bytes between guards; the buffer inside */
    size_t bytes, item;
} grade_place;

/* What a rank leaves for the parent, in memory that both see. */
typedef struct grade_rank {
    char who[64];            /* "rank 3 (tp=3)" */
    char failure[900];
    int severity;            /* 0: no failure */
    int places;
    grade_place place[GRADE_PLACES];
    uint64_t sent;           /* bytes this rank really handed to other slots in this case */
} grade_rank;

typedef struct grade_shared {
    char what[200];          /* the case that runs */
    uint64_t progress;       /* atomic: cases begun */
    uint64_t cases;          /* cases passed */
    int patched;             /* this slot is the student's */
    int fault;               /* a rank has run into a guard page, or crashed: its failure says so */
    int stop;                /* atomic: some rank has failed */
    int finished;            /* the child came to its end */
    double sent, formula;    /* bytes of all ranks and cases */
    char worst[400];         /* the case that sent most above the formula */
    double worst_ratio;
    int64_t arrived;         /* atomic, for the barrier's test */
    char note[200];          /* printed behind a slot that passed */
    grade_rank rank[GRADE_RANKS];
} grade_shared;

static grade_shared *grade;                          /* parent and child */
static unsigned char *grade_zones[GRADE_RANKS][GRADE_PLACES]; /* of this child */
static __thread int grade_me;                        /* rank of this thread */

__attribute__((format(printf, 2, 3))) static void grade_fail(grade_severity severity, const char *format, ...)
{
    grade_rank *r = &grade->rank[grade_me];
    va_list list;
    __atomic_store_n(&grade->stop, 1, __ATOMIC_SEQ_CST);
    if (r->severity >= (int)severity) return; /* the first of its kind stays */
    r->severity = (int)severity;
    va_start(list, format);
    vsnprintf(r->failure, sizeof r->failure, format, list);
    va_end(list);
}

/* ---- buffers ---- */

static inline void grade_places_begin(void) { grade->rank[grade_me].places = 0; }

/* `bytes` bytes of poison between guards; item = bytes of an element, for messages. name is copied. */
static inline void *grade_put(const char *name, size_t bytes, size_t item, int placement)
{
    grade_rank *r = &grade->rank[grade_me];
    if (r->places == GRADE_PLACES || bytes > GRADE_ZONE) { fprintf(stderr, "conformance: too many or too large buffers (%s)\n", name); abort(); }
    unsigned char **zone = &grade_zones[grade_me][r->places];
    if (!*zone) {
        unsigned char *memory = (unsigned char *)mmap(NULL, GRADE_ZONE + 2 * GRADE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == (unsigned char *)MAP_FAILED || mprotect(memory + GRADE_PAGE, GRADE_ZONE, PROT_READ | PROT_WRITE)) { perror("conformance: mmap"); abort(); }
        *zone = memory + GRADE_PAGE;
    }
    grade_place *p = &r->place[r->places++];
    snprintf(p->name, sizeof p->name, "%s", name);
    p->zone = *zone;
    p->bytes = bytes;
    p->item = item ? item : 1;
    p->at = placement ? *zone : *zone + (GRADE_ZONE - bytes);
    size_t window = GRADE_ZONE - bytes < GRADE_WINDOW ? GRADE_ZONE - bytes : GRADE_WINDOW;
    memset(placement ? p->at : p->at - window, 0xff, bytes + window);
    return p->at;
}

/* 1 if the poison beside every buffer of this rank is untouched; else the failure is kept. */
static inline int grade_check_places(void)
{
    grade_rank *r = &grade->rank[grade_me];
    for (int i = 0; i < r->places; i++) {
        const grade_place *p = &r->place[i];
        const unsigned char *low = p->at - GRADE_WINDOW < p->zone ? p->zone : p->at - GRADE_WINDOW, *end = p->at + p->bytes, *high = end + GRADE_WINDOW > p->zone + GRADE_ZONE ? p->zone + GRADE_ZONE : end + GRADE_WINDOW;
        for (const unsigned char *at = end; at < high; at++)
            if (*at != 0xff) { grade_fail(GRADE_BOUNDS, "wrote out of bounds: %s has %zu elements of %zu bytes, and element %zu was written", p->name, p->bytes / p->item, p->item, (size_t)(at - p->at) / p->item); return 0; }
        for (const unsigned char *at = p->at; at-- > low;)
            if (*at != 0xff) { grade_fail(GRADE_BOUNDS, "wrote out of bounds: element -%zu of %s, which has %zu elements of %zu bytes", ((size_t)(p->at - at) + p->item - 1) / p->item, p->name, p->bytes / p->item, p->item); return 0; }
    }
    return 1;
}

/* ---- device memory that the slot itself asks for: poisoned, guarded, counted ---- */

typedef struct grade_memory { llmpar_device *device; llmpar_status (*alloc)(llmpar_device *device, size_t bytes, void **out); void (*free)(llmpar_device *device, void *memory, size_t bytes); uint64_t live; } grade_memory;
static grade_memory grade_memories[GRADE_RANKS];

/* One rank, one device: the table that asks belongs to this thread. */
static inline llmpar_status grade_alloc(llmpar_device *device, size_t bytes, void **out)
{
    unsigned char *memory;
    *out = NULL;
    llmpar_status st = grade_memories[grade_me].alloc(device, bytes + 192, (void **)&memory);
    if (st) return st;
    memset(memory, 0xff, bytes + 192);
    memcpy(memory, &bytes, sizeof bytes);
    grade_memories[grade_me].live += bytes;
    *out = memory + 128;
    return LLMPAR_OK;
}

static inline void grade_free(llmpar_device *device, void *memory, size_t bytes)
{
    if (!memory) return;
    unsigned char *at = (unsigned char *)memory;
    size_t had;
    memcpy(&had, at - 128, sizeof had);
    if (had != bytes) grade_fail(GRADE_BOUNDS, "device memory of %zu bytes was given back as %zu bytes", had, bytes);
    for (size_t i = 0; i < 64; i++) {
        if (at[had + i] != 0xff) { grade_fail(GRADE_BOUNDS, "wrote out of bounds: byte %zu of its own device memory of %zu bytes", had + i, had); break; }
        if (at[-1 - (ptrdiff_t)i] != 0xff) { grade_fail(GRADE_BOUNDS, "wrote out of bounds: byte -%zu of its own device memory of %zu bytes", i + 1, had); break; }
    }
    grade_memories[grade_me].live -= had;
    grade_memories[grade_me].free(device, at - 128, had + 192);
}

static inline void grade_watch_memory(llmpar_device *device)
{
    grade_memory *m = &grade_memories[grade_me];
    m->device = device;
    m->alloc = device->alloc;
    m->free = device->free;
    m->live = 0;
    device->alloc = grade_alloc;
    device->free = grade_free;
}
static inline void grade_unwatch_memory(llmpar_device *device)
{
    device->alloc = grade_memories[grade_me].alloc;
    device->free = grade_memories[grade_me].free;
}

/* ---- crashes ---- */

/* Which buffer is nearest to an address in an inaccessible page. Runs on the thread that faulted; the process ends with it. */
static void grade_on_fault(int number, siginfo_t *info, void *context)
{
    const unsigned char *address = (const unsigned char *)info->si_addr;
    const char *verb = "accessed";
    const grade_rank *mine = &grade->rank[grade_me];
#if defined(__linux__) && defined(__x86_64__)
    if (number == SIGSEGV) verb = ((ucontext_t *)context)->uc_mcontext.gregs[REG_ERR] & 2 ? "wrote" : "read";
#else
    (void)context;
#endif
    int named = 0;
    for (int r = -1; r < GRADE_RANKS && !named && (number == SIGSEGV || number == SIGBUS); r++) {
        const grade_rank *owner = r < 0 ? mine : &grade->rank[r];
        for (int i = 0; i < owner->places && !named; i++) {
            const grade_place *p = &owner->place[i];
            if (address < p->zone - GRADE_PAGE || address >= p->zone + GRADE_ZONE + GRADE_PAGE) continue;
            ptrdiff_t offset = address - p->at, item = (ptrdiff_t)p->item;
            long element = (long)(offset >= 0 ? offset / item : -((-offset + item - 1) / item));
            named = 1;
            grade_fail(GRADE_BOUNDS, "%s out of bounds: element %ld of %s%s%s, which has %zu elements of %zu bytes", verb, element, p->name, owner == mine ? "" : " of ", owner == mine ? "" : owner->who, p->bytes / p->item, p->item);
        }
    }
    if (!named && (number == SIGSEGV || number == SIGBUS)) grade_fail(GRADE_BOUNDS, "crashed: %s %s address %p, which is in no buffer", number == SIGSEGV ? "segmentation fault," : "bus error,", verb, info->si_addr);
    else if (!named) grade_fail(GRADE_BOUNDS, "crashed: %s", strsignal(number));
    grade->fault = 1;
    _exit(99);
}

/* ---- one slot, in a child ---- */

static double grade_cpu_seconds(pid_t child)
{
    clockid_t clock;
    struct timespec t;
    if (clock_getcpuclockid(child, &clock) || clock_gettime(clock, &t)) return 0;
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}
static double grade_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* A case that burns this much processor time, or takes this long, hangs; each is a matter of milliseconds. */
#define GRADE_CPU_LIMIT 5.0
#define GRADE_WALL_LIMIT 60.0

/* Runs fn(arg) in a child and returns 1 if it passed. The text of a failure goes to `text`. */
static int grade_run(void (*fn)(void *arg), void *arg, char *text, size_t capacity)
{
    int end[2];
    memset(grade, 0, sizeof *grade);
    fflush(stdout);
    if (pipe(end)) { perror("conformance: pipe"); exit(2); }
    pid_t child = fork();
    if (child < 0) { perror("conformance: fork"); exit(2); }
    if (child == 0) {
#if defined(__linux__)
        prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0); /* no slot outlives its grader */
#endif
        struct sigaction action;
        memset(&action, 0, sizeof action);
        action.sa_sigaction = grade_on_fault;
        action.sa_flags = SA_SIGINFO | SA_NODEFER;
        sigemptyset(&action.sa_mask);
        static const int signals[] = { SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT };
        for (size_t i = 0; i < sizeof signals / sizeof signals[0]; i++) sigaction(signals[i], &action, NULL);
        close(end[0]); /* the other end closes when the process ends */
        fn(arg);
        grade->finished = 1;
        fflush(stdout);
        _exit(0);
    }
    close(end[1]);
    uint64_t seen = 0;
    double cpu = 0, wall = grade_seconds();
    int hung = 0, status = 0;
    for (;;) {
        struct pollfd fd = { end[0], POLLIN, 0 };
        int n = poll(&fd, 1, 200);
        if (n > 0 || (n < 0 && errno != EINTR)) break;
        uint64_t now = __atomic_load_n(&grade->progress, __ATOMIC_SEQ_CST);
        if (now != seen) {
            seen = now;
            cpu = grade_cpu_seconds(child);
            wall = grade_seconds();
        } else if (grade_cpu_seconds(child) - cpu > GRADE_CPU_LIMIT || grade_seconds() - wall > GRADE_WALL_LIMIT) {
            hung = 1;
            kill(child, SIGKILL);
            break;
        }
    }
    close(end[0]);
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {}
    const grade_rank *worst = NULL;
    for (int r = 0; r < GRADE_RANKS; r++)
        if (grade->rank[r].severity > (worst ? worst->severity : 0)) worst = &grade->rank[r];
    if (worst) snprintf(text, capacity, "%s%s%s%s%s", grade->what, grade->what[0] ? ": " : "", worst->who, worst->who[0] ? ": " : "", worst->failure);
    else if (hung) snprintf(text, capacity, "%s: hangs (no end after %g s of processor time or %g s)", grade->what, GRADE_CPU_LIMIT, GRADE_WALL_LIMIT);
    else if (WIFSIGNALED(status)) snprintf(text, capacity, "%s: crashed: %s", grade->what, strsignal(WTERMSIG(status)));
    else if (!grade->finished) snprintf(text, capacity, "%s: the process ended itself (exit code %d)", grade->what, WIFEXITED(status) ? WEXITSTATUS(status) : -1);
    else return 1;
    return 0;
}

static void grade_open(void)
{
    grade = (grade_shared *)mmap(NULL, sizeof *grade, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (grade == (grade_shared *)MAP_FAILED) { perror("conformance: mmap"); exit(2); }
}

/* ---- numbers ---- */

static inline uint64_t grade_hash(uint64_t x)
{
    x ^= x >> 31;
    x *= 0x9e3779b97f4a7c15u;
    x ^= x >> 29;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 32;
    return x;
}

/* "2.25", "-7", "nan" of one element. */
static inline void grade_text(char *text, size_t capacity, llmpar_dtype dtype, const void *at)
{
    union { float f; double d; uint16_t h; int32_t i; int64_t l; uint64_t u; uint8_t b; } v;
    memcpy(&v, at, llmpar_dtype_size(dtype));
    switch (dtype) {
    case LLMPAR_F32: snprintf(text, capacity, "%.9g", (double)v.f); break;
    case LLMPAR_F64: snprintf(text, capacity, "%.17g", v.d); break;
    case LLMPAR_BF16: snprintf(text, capacity, "%.5g", (double)llmpar_bf16_to_f32(v.h)); break;
    case LLMPAR_F16: snprintf(text, capacity, "%.5g", (double)llmpar_f16_to_f32(v.h)); break;
    case LLMPAR_I32: snprintf(text, capacity, "%ld", (long)v.i); break;
    case LLMPAR_I64: snprintf(text, capacity, "%lld", (long long)v.l); break;
    case LLMPAR_U64: snprintf(text, capacity, "%llu", (unsigned long long)v.u); break;
    default: snprintf(text, capacity, "%u", (unsigned)v.b); break;
    }
}

static inline int grade_is_poison(const void *at, size_t item)
{
    for (size_t i = 0; i < item; i++)
        if (((const unsigned char *)at)[i] != 0xff) return 0;
    return 1;
}

#endif
