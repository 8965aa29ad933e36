/* emulated_cuda: the runtime and the machine behind cuda_runtime.h and warp.h.

   Streams. What is enqueued waits in its stream's queue until somebody waits for something: then random entries at the heads of all queues are run, by whoever waits, until it is done; now and then an enqueue
   runs a few at once. So a missing wait for an event shows as a result that is too old (late) or too new (early). Host functions run on a thread of their own, as the driver's do, which also takes over when nobody has
   run anything for a while: a GPU does not stand still because the host looks elsewhere.

   Blocks run one after the other in random order; the threads of a block are fibers with stacks of their own, switched by a few lines of assembly. */
#include "warp.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define NO_ASAN __attribute__((no_sanitize_address))
#else
#define NO_ASAN
#endif

namespace {

enum { SHARED_LIMIT = 227 * 1024, SHARED_DEFAULT = 48 * 1024, FENCE = 256, THREADS = 1024, MULTIPROCESSORS = 4, DEVICES = 64 };
#if defined(__SANITIZE_ADDRESS__)
const size_t STACK = 512 * 1024;
#else
const size_t STACK = 128 * 1024;
#endif

struct Random {
    uint64_t state;
    uint64_t next()
    {
        uint64_t z = (state += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    uint64_t below(uint64_t n) { return (uint64_t)((unsigned __int128)next() * n >> 64); }
};

long long setting(const char *name, long long otherwise)
{
    const char *text = getenv(name);
    return text && text[0] ? atoll(text) : otherwise;
}

/* ---- the machine: fibers ---- */

enum State { READY, AT_BARRIER, IN_WARP, DONE };

struct Copy { unsigned char *to; const unsigned char *from; int bytes, size; unsigned group; };

struct Fiber {
    emulated_cuda_thread place;
    void *sp;
    void *fake; /* AddressSanitizer's, or ThreadSanitizer's */
    State state;
    unsigned index, group;
    std::vector<Copy> copies;
};

/* Lanes of a warp on their way into one operation. */
struct Meeting {
    const char *name;
    emulated_cuda_warp_run run;
    unsigned mask, arrived;
    void *lanes[32];
};

struct Warp { unsigned exists; std::vector<Meeting> meetings; };

extern "C" void emulated_cuda_switch(void **save, void *to);
#if defined(__x86_64__)
__asm__(".text\n.globl emulated_cuda_switch\n.type emulated_cuda_switch,@function\nemulated_cuda_switch:\n"
        "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\nmovq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
        "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n.size emulated_cuda_switch,.-emulated_cuda_switch\n");
const int SAVED = 6; /* registers below the return address */
#elif defined(__aarch64__)
__asm__(".text\n.globl emulated_cuda_switch\n.type emulated_cuda_switch,%function\nemulated_cuda_switch:\n"
        "sub sp, sp, #160\nstp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\nstp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
        "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\nmov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
        "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\nldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
        "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\nadd sp, sp, #160\nret\n.size emulated_cuda_switch,.-emulated_cuda_switch\n");
#else
#error "emulated_cuda: this processor's switch of stacks is missing"
#endif

void entry();

/* Runs the kernels of one OS thread. */
struct Machine {
    std::vector<Fiber *> fibers;
    unsigned char *shared;
    size_t shared_bytes;
    Random random;
    std::string kernel, caller;
    const std::function<void()> *run;
    unsigned threads, at_barrier, done, slow; /* slow - 1: a warp that goes on only where no other thread can; 0: none */
    std::vector<unsigned> ready;
    Warp warps[THREADS / 32];
    Fiber *now;
    void *main_sp, *main_fake; /* of the thread's own stack */
    const void *main_bottom;
    size_t main_size;

    Machine() : shared((unsigned char *)aligned_alloc(4096, ((size_t)SHARED_LIMIT + FENCE + 4095) / 4096 * 4096)), shared_bytes(0), run(NULL), now(NULL), main_bottom(NULL), main_size(0)
    {
        random.state = 0;
        for (Warp &warp : warps) warp.meetings.reserve(4);
    }
    ~Machine()
    {
        fence(SHARED_LIMIT + FENCE);
        for (Fiber *fiber : fibers) {
#if defined(__SANITIZE_ADDRESS__)
            __asan_unpoison_memory_region(fiber->place.stack, STACK);
#elif defined(__SANITIZE_THREAD__)
            __tsan_destroy_fiber(fiber->fake);
#endif
            munmap(fiber->place.stack - 4096, STACK + 4096);
            delete fiber;
        }
        free(shared);
    }
    void fence(size_t bytes)
    {
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(shared, SHARED_LIMIT + FENCE);
        __asan_poison_memory_region(shared + bytes, SHARED_LIMIT + FENCE - bytes);
#endif
        (void)bytes;
    }
    void more(unsigned count)
    {
        while (fibers.size() < count) {
            unsigned char *memory = (unsigned char *)mmap(NULL, STACK + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (memory == (unsigned char *)MAP_FAILED || mprotect(memory, 4096, PROT_NONE)) {
                fprintf(stderr, "emulated_cuda: no memory for the stack of a fiber\n");
                abort();
            }
            Fiber *fiber = new Fiber();
            fiber->place.stack = memory + 4096;
            fiber->place.stack_end = fiber->place.stack + STACK;
#if defined(__SANITIZE_THREAD__)
            fiber->fake = __tsan_create_fiber(0);
#endif
            fiber->index = (unsigned)fibers.size();
            fibers.push_back(fiber);
        }
    }
    NO_ASAN void switch_to(void **save, void **save_fake, Fiber *to)
    {
        now = to;
        emulated_cuda_now = to ? &to->place : NULL;
#if defined(__SANITIZE_ADDRESS__)
        if (to) __sanitizer_start_switch_fiber(save_fake, to->place.stack, STACK);
        else __sanitizer_start_switch_fiber(save_fake, main_bottom, main_size);
#elif defined(__SANITIZE_THREAD__)
        __tsan_switch_to_fiber(to ? to->fake : main_fake, 0);
        (void)save_fake;
#else
        (void)save_fake;
#endif
        emulated_cuda_switch(save, to ? to->sp : main_sp);
    }
    /* What a fiber does that cannot go on. */
    NO_ASAN void next(Fiber *from)
    {
        Fiber *to = NULL;
        if (!ready.empty()) {
            size_t k = random.below(ready.size());
            for (size_t tries = 1; slow && ready[k] / 32 == slow - 1 && tries < ready.size(); tries++) k = (k + 1) % ready.size();
            to = fibers[ready[k]];
            ready[k] = ready.back();
            ready.pop_back();
        } else if (done < threads) stuck();
        if (to == from) return;
        bool last = from->state == DONE;
        switch_to(&from->sp, last ? NULL : &from->fake, to);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(from->fake, NULL, NULL);
#endif
    }
    const char *thread_text(const Fiber *fiber, char text[64])
    {
        snprintf(text, 64, "thread (%u,%u,%u)", fiber->place.thread.x, fiber->place.thread.y, fiber->place.thread.z);
        return text;
    }
    [[noreturn]] void wrong(const Fiber *fiber, const char *what)
    {
        char text[64];
        fprintf(stderr, "emulated_cuda: kernel %s (launched in %s): block (%u,%u,%u), %s: %s\n", kernel.c_str(), caller.c_str(), fiber->place.block.x, fiber->place.block.y, fiber->place.block.z, thread_text(fiber, text), what);
        fflush(NULL);
        abort();
    }
    [[noreturn]] void stuck()
    {
        char text[512], who[64];
        const Fiber *first = NULL;
        for (unsigned w = 0; w * 32 < threads; w++)
            for (const Meeting &m : warps[w].meetings) {
                unsigned missing = m.mask & ~m.arrived, lane = (unsigned)__builtin_ctz(missing);
                const Fiber *absent = fibers[w * 32 + lane], *there = fibers[w * 32 + (unsigned)__builtin_ctz(m.arrived)];
                snprintf(text, sizeof text, "waits in %s for lanes 0x%x of its warp, of which 0x%x do not come: %s %s", m.name, m.mask, missing, thread_text(absent, who),
                         absent->state == DONE ? "has ended" : absent->state == AT_BARRIER ? "is at __syncthreads" : "is in another operation");
                wrong(there, text);
            }
        for (unsigned i = 0; i < threads; i++) if (fibers[i]->state == AT_BARRIER && !first) first = fibers[i];
        for (unsigned i = 0; i < threads; i++)
            if (fibers[i]->state == DONE && first) {
                snprintf(text, sizeof text, "waits at __syncthreads with %u of %u threads; %s has ended without it", at_barrier, threads, thread_text(fibers[i], who));
                wrong(first, text);
            }
        wrong(first ? first : fibers[0], "no thread of the block can go on");
    }
    void block(dim3 index, dim3 grid, dim3 size)
    {
        memset(shared, 0xff, shared_bytes);
#if !defined(__SANITIZE_ADDRESS__)
        memset(shared + shared_bytes, 0xa5, FENCE);
#endif
        at_barrier = done = 0;
        slow = threads > 32 && random.below(3) ? 1 + (unsigned)random.below((threads + 31) / 32) : 0;
        ready.resize(threads);
        for (unsigned i = 0; i < threads; i++) {
            Fiber *f = fibers[i];
            uintptr_t top = ((uintptr_t)f->place.stack + STACK - 64) / 16 * 16;
            f->place.thread = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
            f->place.block = index;
            f->place.block_dim = size;
            f->place.grid_dim = grid;
            f->place.shared = shared;
            f->state = READY;
            f->group = 0;
#if defined(__SANITIZE_ADDRESS__)
            f->fake = NULL;
#endif
            f->copies.clear();
            ready[i] = i;
#if defined(__x86_64__)
            void **frame = (void **)top;
            frame[0] = (void *)entry;
            frame[1] = NULL;
            for (int r = 1; r <= SAVED; r++) frame[-r] = NULL;
            f->sp = frame - SAVED;
#else
            uint64_t *frame = (uint64_t *)(top - 160);
            memset(frame, 0, 160);
            frame[11] = (uint64_t)(uintptr_t)entry;
            f->sp = frame;
#endif
        }
        for (unsigned w = 0; w * 32 < threads; w++) {
            warps[w].exists = threads - w * 32 >= 32 ? 0xffffffffu : (1u << (threads - w * 32)) - 1u;
            warps[w].meetings.clear();
        }
        start();
        if (emulated_cuda_watching) emulated_cuda_watching->met(0, threads);
#if !defined(__SANITIZE_ADDRESS__)
        for (int i = 0; i < FENCE; i++)
            if (shared[shared_bytes + (size_t)i] != 0xa5) {
                char text[96];
                snprintf(text, sizeof text, "somebody wrote %d bytes behind the %zu bytes of shared memory", i, shared_bytes);
                wrong(fibers[0], text);
            }
#endif
    }
    NO_ASAN void start()
    {
        size_t k = random.below(ready.size());
        Fiber *to = fibers[ready[k]];
        ready[k] = ready.back();
        ready.pop_back();
        switch_to(&main_sp, &main_fake, to);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(main_fake, NULL, NULL);
#endif
    }
    void grid(const std::string &name, const std::string &from, const void *function, const std::function<void()> &fn, dim3 grid, dim3 size, size_t bytes, uint64_t seed)
    {
        uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z, step, at;
        random.state = seed;
        kernel = name;
        caller = from;
        run = &fn;
        threads = size.x * size.y * size.z;
        shared_bytes = bytes;
        more(threads);
#if defined(__SANITIZE_THREAD__)
        main_fake = __tsan_get_current_fiber();
#endif
        fence(bytes);
        if (emulated_cuda_watching) emulated_cuda_watching->begin(threads, shared, bytes);
        for (step = 1 + random.below(blocks);; step++) { /* any step without a common factor goes through all of them */
            uint64_t a = step, b = blocks;
            while (b) { uint64_t r = a % b; a = b; b = r; }
            if (a == 1) break;
        }
        at = random.below(blocks);
        for (uint64_t i = 0; i < blocks; i++) {
            block(dim3((unsigned)(at % grid.x), (unsigned)(at / grid.x % grid.y), (unsigned)(at / grid.x / grid.y)), grid, size);
            at = (uint64_t)(((unsigned __int128)at + step) % blocks);
        }
        if (emulated_cuda_watching) emulated_cuda_watching->end(function);
        run = NULL;
    }
};

thread_local std::unique_ptr<Machine> machine_of_thread;
__thread Machine *machine_now;

Machine &machine()
{
    if (!machine_now) {
        machine_of_thread.reset(new Machine());
        machine_now = machine_of_thread.get();
    }
    return *machine_now;
}

NO_ASAN void entry()
{
    Machine *m = machine_now;
#if defined(__SANITIZE_ADDRESS__)
    const void *bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(NULL, &bottom, &size);
    if (m->ready.size() + 1 == m->threads) { /* the first of its block: it comes from the thread's own stack */
        m->main_bottom = bottom;
        m->main_size = size;
    }
#endif
    Fiber *f = m->now;
    (*m->run)();
    f->state = DONE;
    m->done++;
    m->next(f);
    abort();
}

} // namespace

__thread const emulated_cuda_thread *emulated_cuda_now;
const emulated_cuda_watch *emulated_cuda_watching;

/* "norm.cu:175" */
static int skip_line()
{
    const char *text = getenv("EMULATED_CUDA_SKIP"), *colon = text ? strrchr(text, ':') : NULL;
    return colon ? atoi(colon + 1) : 0;
}
int emulated_cuda_skip_line = skip_line();
bool emulated_cuda_skip_file(const char *file)
{
    const char *text = getenv("EMULATED_CUDA_SKIP"), *base = strrchr(file, '/');
    size_t length = (size_t)(strrchr(text, ':') - text);
    base = base ? base + 1 : file;
    return strlen(base) == length && memcmp(base, text, length) == 0;
}

void emulated_cuda_wrong(const char *format, ...)
{
    char text[512];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    if (!machine_now || !machine_now->now) {
        fprintf(stderr, "emulated_cuda: outside of a kernel: %s\n", text);
        abort();
    }
    machine_now->wrong(machine_now->now, text);
}

void emulated_cuda_barrier()
{
    Machine *m = machine_now;
    Fiber *f = m->now;
    f->state = AT_BARRIER;
    if (++m->at_barrier == m->threads) {
        m->at_barrier = 0;
        if (emulated_cuda_watching) emulated_cuda_watching->met(0, m->threads);
        for (unsigned i = 0; i < m->threads; i++) {
            m->fibers[i]->state = READY;
            if (i != f->index) m->ready.push_back(i);
        }
        if (m->random.next() & 1) { /* the last is not always the first to go on */
            m->ready.push_back(f->index);
            m->next(f);
        }
        return;
    }
    m->next(f);
}

void emulated_cuda_warp(const char *name, emulated_cuda_warp_run run, unsigned mask, void *lane)
{
    Machine *m = machine_now;
    Fiber *f = m->now;
    unsigned first = f->index / 32 * 32, own = 1u << f->index % 32;
    Warp &warp = m->warps[f->index / 32];
    Meeting *meeting = NULL;
    if (!(mask & own)) emulated_cuda_wrong("%s: its own lane is not in the mask 0x%x", name, mask);
    mask &= warp.exists;
    for (Meeting &other : warp.meetings) {
        if (!(other.mask & mask)) continue;
        if (other.mask != mask) emulated_cuda_wrong("%s with mask 0x%x while lanes 0x%x are in %s with mask 0x%x", name, mask, other.arrived, other.name, other.mask);
        if (other.run != run) emulated_cuda_wrong("%s while lanes 0x%x of its warp are in %s", name, other.arrived, other.name);
        meeting = &other;
    }
    if (!meeting) {
        warp.meetings.push_back(Meeting());
        meeting = &warp.meetings.back();
        meeting->name = name;
        meeting->run = run;
        meeting->mask = mask;
    }
    meeting->lanes[f->index % 32] = lane;
    meeting->arrived |= own;
    if (meeting->arrived != mask) {
        f->state = IN_WARP;
        m->next(f);
        return;
    }
    Meeting all = *meeting;
    *meeting = warp.meetings.back();
    warp.meetings.pop_back();
    if (emulated_cuda_watching && mask == warp.exists) emulated_cuda_watching->met(first, (unsigned)__builtin_popcount(mask));
    all.run(all.lanes, mask);
    for (unsigned rest = mask & ~own; rest; rest &= rest - 1) {
        unsigned i = first + (unsigned)__builtin_ctz(rest);
        m->fibers[i]->state = READY;
        m->ready.push_back(i);
    }
}

/* ---- copies from global to shared memory ---- */

static void shared_check(const char *name, const void *at, size_t bytes, size_t alignment)
{
    const Machine *m = machine_now;
    uintptr_t p = (uintptr_t)at, begin = (uintptr_t)m->shared;
    if (p < begin || p + bytes > begin + m->shared_bytes) emulated_cuda_wrong("%s: bytes [%lld, %lld) of the block's %zu bytes of shared memory", name, (long long)(p - begin), (long long)(p - begin + bytes), m->shared_bytes);
    if (p % alignment) emulated_cuda_wrong("%s: shared memory at %llu, which is not aligned to %zu", name, (unsigned long long)(p - begin), alignment);
}

void emulated_cuda_matrix_check(const char *name, const void *row)
{
    shared_check(name, row, 16, 16);
    if (emulated_cuda_watching) emulated_cuda_watching->matrix(__builtin_return_address(0), row);
}

static void deliver(const Copy &copy)
{
    memcpy(copy.to, copy.from, (size_t)copy.bytes);
    memset(copy.to + copy.bytes, 0, (size_t)(copy.size - copy.bytes));
}

void emulated_cuda_copy(void *shared, const void *global, int bytes, int size)
{
    Machine *m = machine_now;
    Copy copy = {(unsigned char *)shared, (const unsigned char *)global, bytes, size, m->now->group};
    shared_check("copy_async", shared, (size_t)size, (size_t)size);
    if ((uintptr_t)global % (unsigned)size) emulated_cuda_wrong("copy_async of %d bytes from %p, which is not aligned to them", size, global);
    if (bytes < 0 || bytes > size) emulated_cuda_wrong("copy_async of %d bytes, expected 0 to %d", bytes, size);
    if (emulated_cuda_watching) emulated_cuda_watching->copied(__builtin_return_address(0), shared, global, bytes, size);
    if (m->random.below(4) == 0) { /* at once */
        deliver(copy);
        return;
    }
    memset(shared, 0xff, (size_t)size);
    m->now->copies.push_back(copy);
}

void emulated_cuda_copy_commit() { machine_now->now->group++; }

void emulated_cuda_copy_wait(int groups)
{
    Machine *m = machine_now;
    Fiber *f = m->now;
    std::vector<Copy> &list = f->copies;
    size_t keep = 0;
    for (size_t i = list.size(); i > 1; i--) std::swap(list[i - 1], list[m->random.below(i)]);
    for (size_t i = 0; i < list.size(); i++) {
        if (list[i].group + (unsigned)groups < f->group || m->random.below(8) == 0) deliver(list[i]);
        else list[keep++] = list[i];
    }
    list.resize(keep);
}

/* ---- products ---- */

static float bf16_to_f32(uint16_t bits) { return __uint_as_float((uint32_t)bits << 16); }

float emulated_cuda_f16_to_f32(uint16_t bits)
{
    uint32_t sign = (uint32_t)(bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, mantissa = bits & 0x3ffu;
    if (exponent == 31) return __uint_as_float(mantissa ? sign | 0x7fc00000u | mantissa << 13 : sign | 0x7f800000u);
    if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
    float small = (float)mantissa * 5.9604644775390625e-8f; /* 2^-24 */
    return sign ? -small : small;
}

uint16_t emulated_cuda_f32_to_f16(float x)
{
    uint32_t u = __float_as_uint(x), sign = u >> 16 & 0x8000u, size = u & 0x7fffffffu;
    if (size > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (u >> 13 & 0x3ffu));
    if (size >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and more */
    if (size < 0x38800000u) { /* below 2^-14: multiples of 2^-24, which nearbyint rounds to even */
        return (uint16_t)(sign | (uint32_t)nearbyintf(__uint_as_float(size) * 16777216.0f));
    }
    size += 0xfffu + (size >> 13 & 1u);
    return (uint16_t)(sign | ((size - 0x38000000u) >> 13));
}

/* d[i][j] += a[i][k] b[k][j], k upwards. */
template <float (*Decode)(uint16_t)> static void mma(void **lanes)
{
    float a[16][16], b[16][8], d[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const emulated_cuda_mma *own = (const emulated_cuda_mma *)lanes[lane];
        int g = lane / 4, t = lane % 4;
        for (int r = 0; r < 4; r++)
            for (int half = 0; half < 2; half++) a[g + r % 2 * 8][t * 2 + r / 2 * 8 + half] = Decode((uint16_t)(own->a[r] >> 16 * half));
        for (int r = 0; r < 2; r++)
            for (int half = 0; half < 2; half++) b[t * 2 + r * 8 + half][g] = Decode((uint16_t)(own->b[r] >> 16 * half));
        for (int r = 0; r < 4; r++) d[g + r / 2 * 8][t * 2 + r % 2] = own->d[r];
    }
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
    for (int lane = 0; lane < 32; lane++) {
        const emulated_cuda_mma *own = (const emulated_cuda_mma *)lanes[lane];
        for (int r = 0; r < 4; r++) own->d[r] = d[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
    }
}
static void whole_warp(const char *name, unsigned mask)
{
    if (mask != 0xffffffffu) emulated_cuda_wrong("%s in a warp of %d lanes", name, __builtin_popcount(mask));
}
void emulated_cuda_mma_bf16_run(void **lanes, unsigned mask) { whole_warp("mma_bf16", mask); mma<bf16_to_f32>(lanes); }
void emulated_cuda_mma_f16_run(void **lanes, unsigned mask) { whole_warp("mma_f16", mask); mma<emulated_cuda_f16_to_f32>(lanes); }

static void ldmatrix(void **lanes, int trans)
{
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            uint16_t pair[2];
            for (int half = 0; half < 2; half++) {
                int row = lane / 4, column = lane % 4 * 2 + half;
                const void *line = ((const emulated_cuda_ldmatrix *)lanes[8 * i + (trans ? column : row)])->row;
                memcpy(&pair[half], (const unsigned char *)line + 2 * (trans ? row : column), 2);
            }
            ((emulated_cuda_ldmatrix *)lanes[lane])->out[i] = pair[0] | (uint32_t)pair[1] << 16;
        }
}
void emulated_cuda_ldmatrix_run(void **lanes, unsigned mask) { whole_warp("ldmatrix", mask); ldmatrix(lanes, 0); }
void emulated_cuda_ldmatrix_trans_run(void **lanes, unsigned mask) { whole_warp("ldmatrix.trans", mask); ldmatrix(lanes, 1); }

/* ---- the runtime: streams, events ---- */

#undef warpSize /* a member of cudaDeviceProp */

namespace {

struct Mark { bool done; };

enum Kind { RUN, HOST, RECORD, WAIT };
struct Entry {
    Kind kind;
    const char *what;
    std::function<void()> run;
    std::shared_ptr<Mark> mark;
    std::function<bool()> until = std::function<bool()>(); /* of a WAIT without a mark */
};
} // namespace

struct CUgraph_st { std::vector<Entry> entries; };
struct CUgraphExec_st { std::vector<Entry> entries; };
struct CUstream_st {
    int device;
    bool running;
    std::deque<Entry> queue;
    CUgraph_st *capture; /* what is being captured, or NULL */
    bool spoilt;         /* by something that cannot be captured */
};
struct CUevent_st {
    int device;
    std::shared_ptr<Mark> mark; /* of the last record */
};

namespace {

struct Memory { size_t bytes; int device; /* -1: the host's, pinned; -2: registered */ };

struct Engine {
    std::mutex lock;
    std::condition_variable moved; /* an entry is done, or new ones are there */
    std::set<cudaStream_t> streams;
    std::set<cudaEvent_t> events;
    std::set<cudaGraph_t> graphs;
    std::set<cudaGraphExec_t> executables;
    cudaStream_t legacy[DEVICES];
    std::map<uintptr_t, Memory> memory;
    std::map<const void *, int> shared_limits;
    size_t live[DEVICES], host_live, total;
    uint64_t steps, kernels;
    bool driver;
    int devices, capability, running;
    Random random;
    uint64_t seed;
    cudaError_t broken;
    int fail_launch, fail_kernel, fail_alloc, fail_capture;
    cudaError_t fail_launch_code, fail_kernel_code;

    Engine() : host_live(0), steps(0), kernels(0), driver(false), running(0), broken(cudaSuccess), fail_launch(0), fail_kernel(0), fail_alloc(0), fail_capture(0), fail_launch_code(cudaSuccess), fail_kernel_code(cudaSuccess)
    {
        memset(legacy, 0, sizeof legacy);
        memset(live, 0, sizeof live);
        seed = (uint64_t)setting("EMULATED_CUDA_SEED", 1);
        random.state = seed;
        devices = (int)setting("EMULATED_CUDA_DEVICES", setting("CUDA_VISIBLE_DEVICES", 0) < 0 ? -1 : 1);
        if (devices > DEVICES) devices = DEVICES;
        capability = (int)setting("EMULATED_CUDA_CAPABILITY", 90);
        total = (size_t)setting("EMULATED_CUDA_MEMORY", (long long)4 << 30);
    }
    /* Of a block, at most. */
    int shared_limit() const { return capability == 80 || capability == 87 ? 163 * 1024 : capability == 86 || capability == 89 ? 99 * 1024 : SHARED_LIMIT; }
    bool ready(cudaStream_t stream, bool host)
    {
        if (stream->running || stream->queue.empty()) return false;
        const Entry &head = stream->queue.front();
        if (head.kind == WAIT) return head.until ? head.until() : head.mark->done;
        return (head.kind == HOST) == host;
    }
    /* Runs one random entry that can be run; host: a host function. Under the lock. */
    bool step(std::unique_lock<std::mutex> &hold, bool host);
    void until(std::unique_lock<std::mutex> &hold, const std::function<bool()> &reached)
    {
        while (!reached()) {
            if (step(hold, false)) continue;
            if (reached()) break;
            moved.wait_for(hold, std::chrono::milliseconds(50));
        }
    }
    /* Into the queue, or into the graph that the stream captures. */
    cudaError_t add(std::unique_lock<std::mutex> &hold, cudaStream_t stream, Entry entry);
};

Engine &engine()
{
    static Engine *only = new Engine(); /* kept: its thread may outlive main */
    return *only;
}

__thread int current_device;
__thread cudaError_t last_error;
__thread bool in_host_function;

bool Engine::step(std::unique_lock<std::mutex> &hold, bool host)
{
    std::vector<cudaStream_t> able;
    for (cudaStream_t s : streams) if (ready(s, host)) able.push_back(s);
    if (able.empty()) return false;
    cudaStream_t stream = able[random.below(able.size())];
    Entry entry = std::move(stream->queue.front());
    stream->queue.pop_front();
    if (entry.kind == RUN || entry.kind == HOST) {
        stream->running = true;
        running++;
        hold.unlock();
        in_host_function = entry.kind == HOST;
        entry.run();
        in_host_function = false;
        hold.lock();
        stream->running = false;
        running--;
    } else if (entry.kind == RECORD) entry.mark->done = true;
    else if (entry.run) entry.run();
    steps++;
    moved.notify_all();
    return true;
}

void drive()
{
    Engine &e = engine();
    std::unique_lock<std::mutex> hold(e.lock);
    for (;;) {
        uint64_t before = e.steps;
        if (e.step(hold, true)) continue;
        if (e.moved.wait_for(hold, std::chrono::milliseconds(20)) == std::cv_status::timeout && e.steps == before && !e.running)
            while (e.step(hold, false) || e.step(hold, true)) {}
    }
}

__thread cudaStream_t capturing; /* by this thread */

/* What a thread must not do while it captures: the capture has failed then. */
cudaError_t spoil(cudaStream_t stream)
{
    if (!stream || !stream->capture) return cudaSuccess;
    stream->spoilt = true;
    return cudaErrorStreamCaptureUnsupported;
}

cudaError_t Engine::add(std::unique_lock<std::mutex> &hold, cudaStream_t stream, Entry entry)
{
    if (stream->capture) {
        if (entry.kind != RUN) return spoil(stream);
        if (stream->spoilt) return cudaErrorStreamCaptureInvalidated;
        stream->capture->entries.push_back(std::move(entry));
        return cudaSuccess;
    }
    if (!driver) {
        driver = true;
        std::thread(drive).detach();
    }
    stream->queue.push_back(std::move(entry));
    if (random.below(8) == 0)
        for (uint64_t n = 1 + random.below(4); n && step(hold, false); n--) {}
    moved.notify_all();
    return cudaSuccess;
}

size_t of_streams(Engine &e, int device)
{
    size_t n = 0;
    for (cudaStream_t s : e.streams) if (device < 0 || s->device == device) n += s->queue.size() + (s->running ? 1 : 0);
    return n;
}

cudaError_t failed(cudaError_t code)
{
    if (code) last_error = code;
    return code;
}

/* What every call begins with. */
cudaError_t begin(Engine &e)
{
    if (in_host_function) {
        fprintf(stderr, "emulated_cuda: a host function calls CUDA, which it must not\n");
        return cudaErrorNotPermitted;
    }
    if (e.devices == 0) return cudaErrorInsufficientDriver;
    if (e.devices < 0) return cudaErrorNoDevice;
    return e.broken;
}
#define BEGIN \
    Engine &e = engine(); \
    std::unique_lock<std::mutex> hold(e.lock); \
    { cudaError_t begun = begin(e); if (begun) return failed(begun); }

cudaError_t find(Engine &e, cudaStream_t *stream)
{
    if (!*stream) {
        if (!e.legacy[current_device]) {
            e.legacy[current_device] = new CUstream_st();
            e.legacy[current_device]->device = current_device;
            e.streams.insert(e.legacy[current_device]);
        }
        *stream = e.legacy[current_device];
    }
    return e.streams.count(*stream) ? cudaSuccess : cudaErrorInvalidResourceHandle;
}
#define FIND(stream) do { cudaError_t found = find(e, &(stream)); if (found) return failed(found); } while (0)

} // namespace

extern "C" {

int emulated_cuda(void) { return 1; }
void emulated_cuda_fail_launch(cudaError_t code, int calls) { Engine &e = engine(); std::unique_lock<std::mutex> hold(e.lock); e.fail_launch = calls; e.fail_launch_code = code; }
void emulated_cuda_fail_kernel(cudaError_t code, int calls)
{
    Engine &e = engine();
    std::unique_lock<std::mutex> hold(e.lock);
    e.fail_kernel = code ? calls : 0;
    e.fail_kernel_code = code;
    if (!code) e.broken = cudaSuccess;
    last_error = cudaSuccess;
}
void emulated_cuda_fail_alloc(int calls) { Engine &e = engine(); std::unique_lock<std::mutex> hold(e.lock); e.fail_alloc = calls; }
size_t emulated_cuda_live(void)
{
    Engine &e = engine();
    std::unique_lock<std::mutex> hold(e.lock);
    size_t n = e.host_live;
    for (size_t x : e.live) n += x;
    return n;
}
void emulated_cuda_fail_capture(int calls) { Engine &e = engine(); std::unique_lock<std::mutex> hold(e.lock); e.fail_capture = calls; }
size_t emulated_cuda_graphs(void) { Engine &e = engine(); std::unique_lock<std::mutex> hold(e.lock); return e.graphs.size() + e.executables.size(); }
size_t emulated_cuda_waiting(void) { Engine &e = engine(); std::unique_lock<std::mutex> hold(e.lock); return of_streams(e, -1); }

const char *cudaGetErrorName(cudaError_t code)
{
    switch ((int)code) {
#define CASE(name, value, text) case value: return #name;
    EMULATED_CUDA_ERRORS(CASE)
#undef CASE
    }
    return "unrecognized error code";
}
const char *cudaGetErrorString(cudaError_t code)
{
    switch ((int)code) {
#define CASE(name, value, text) case value: return text;
    EMULATED_CUDA_ERRORS(CASE)
#undef CASE
    }
    return "unrecognized error code";
}
cudaError_t cudaGetLastError(void)
{
    cudaError_t code = last_error;
    Engine &e = engine();
    std::unique_lock<std::mutex> hold(e.lock);
    last_error = cudaSuccess;
    return code ? code : e.broken;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }

/* ---- devices ---- */

cudaError_t cudaGetDeviceCount(int *count)
{
    *count = 0;
    BEGIN
    *count = e.devices;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device)
{
    BEGIN
    if (device < 0 || device >= e.devices) return failed(cudaErrorInvalidDevice);
    current_device = device;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *device) { BEGIN *device = current_device; return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *out, int device)
{
    BEGIN
    if (device < 0 || device >= e.devices) return failed(cudaErrorInvalidDevice);
    memset(out, 0, sizeof *out);
    snprintf(out->name, sizeof out->name, "Emulated");
    out->uuid.bytes[0] = (char)(1 + device);
    out->totalGlobalMem = e.total;
    out->sharedMemPerBlock = SHARED_DEFAULT;
    out->sharedMemPerBlockOptin = (size_t)e.shared_limit();
    out->sharedMemPerMultiprocessor = (size_t)e.shared_limit() + 1024;
    out->major = e.capability / 10;
    out->minor = e.capability % 10;
    out->multiProcessorCount = MULTIPROCESSORS;
    out->maxThreadsPerMultiProcessor = e.shared_limit() < 100 * 1024 ? 1536 : 2048;
    out->maxThreadsPerBlock = THREADS;
    out->l2CacheSize = 1 << 20;
    out->regsPerBlock = 65536;
    out->warpSize = 32;
    out->pciBusID = 1 + device;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device)
{
    cudaDeviceProp p;
    cudaError_t code = cudaGetDeviceProperties(&p, device);
    if (code) return code;
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)p.sharedMemPerBlock; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; return cudaSuccess;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)p.sharedMemPerMultiprocessor; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; return cudaSuccess;
    }
    return failed(cudaErrorInvalidValue);
}
cudaError_t cudaDeviceGetPCIBusId(char *out, int bytes, int device) { snprintf(out, (size_t)bytes, "0000:%02X:00.0", (unsigned)(1 + device) & 255u); return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void)
{
    BEGIN
    int device = current_device;
    e.until(hold, [&]() { return of_streams(e, device) == 0; });
    return failed(e.broken);
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { BEGIN *can = device != peer; return cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) { BEGIN (void)flags; return peer < 0 || peer >= e.devices || peer == current_device ? failed(cudaErrorInvalidDevice) : cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { BEGIN *least = 0; *greatest = -5; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = engine().devices ? CUDART_VERSION : 0; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) { BEGIN *total = e.total; *free_bytes = e.total - e.live[current_device]; return cudaSuccess; }

/* ---- memory ---- */

static cudaError_t take(void **out, size_t bytes, int device)
{
    *out = NULL;
    BEGIN
    if (spoil(capturing)) return failed(cudaErrorStreamCaptureUnsupported);
    if (device >= 0) device = current_device;
    if (!bytes) return cudaSuccess;
    if ((e.fail_alloc > 0 && --e.fail_alloc == 0) || (device >= 0 && bytes > e.total - e.live[device])) return failed(cudaErrorMemoryAllocation);
    void *memory = NULL;
    if (bytes >> 40 || posix_memalign(&memory, 256, bytes)) return failed(cudaErrorMemoryAllocation);
    memset(memory, 0xff, bytes);
    Memory m = {bytes, device};
    e.memory[(uintptr_t)memory] = m;
    if (device >= 0) e.live[device] += bytes;
    else e.host_live += bytes;
    *out = memory;
    return cudaSuccess;
}
static cudaError_t give(void *memory, bool host)
{
    BEGIN
    if (spoil(capturing)) return failed(cudaErrorStreamCaptureUnsupported);
    if (!memory) return cudaSuccess;
    std::map<uintptr_t, Memory>::iterator at = e.memory.find((uintptr_t)memory);
    if (at == e.memory.end() || (host ? at->second.device != -1 : at->second.device < 0)) return failed(cudaErrorInvalidValue);
    if (host) e.host_live -= at->second.bytes;
    else e.live[at->second.device] -= at->second.bytes;
    memset(memory, 0xff, at->second.bytes);
    e.memory.erase(at);
    free(memory);
    return cudaSuccess;
}
cudaError_t cudaMalloc(void **out, size_t bytes) { return take(out, bytes, 0); }
cudaError_t cudaMallocHost(void **out, size_t bytes) { return take(out, bytes, -1); }
cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned flags) { (void)flags; return take(out, bytes, -1); }
/* The real one waits for the device; here it does not, so that ours is seen to. */
cudaError_t cudaFree(void *memory) { return give(memory, false); }
cudaError_t cudaFreeHost(void *memory) { return give(memory, true); }
cudaError_t cudaHostRegister(void *memory, size_t bytes, unsigned flags)
{
    BEGIN
    Memory m = {bytes, -2};
    (void)flags;
    if (!memory || !bytes) return failed(cudaErrorInvalidValue);
    if (!e.memory.insert(std::make_pair((uintptr_t)memory, m)).second) return failed(cudaErrorHostMemoryAlreadyRegistered);
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *memory)
{
    BEGIN
    std::map<uintptr_t, Memory>::iterator at = e.memory.find((uintptr_t)memory);
    if (at == e.memory.end() || at->second.device != -2) return failed(cudaErrorInvalidValue);
    e.memory.erase(at);
    return cudaSuccess;
}

/* Is it in memory that cudaMalloc, cudaMallocHost or cudaHostRegister knows? */
static bool known(Engine &e, const void *memory, uintptr_t *begin = NULL, uintptr_t *end = NULL)
{
    std::map<uintptr_t, Memory>::iterator above = e.memory.upper_bound((uintptr_t)memory), at = above;
    uintptr_t from = 0, to = 0;
    if (at != e.memory.begin()) {
        --at;
        from = at->first;
        to = from + at->second.bytes;
    }
    bool in = (uintptr_t)memory < to;
    if (begin) *begin = in ? from : to;
    if (end) *end = in ? to : above == e.memory.end() ? UINTPTR_MAX : above->first;
    return in;
}
static cudaError_t enqueue(Kind kind, const char *what, const std::function<void()> &run, const std::shared_ptr<Mark> &mark, cudaStream_t stream)
{
    BEGIN
    FIND(stream);
    Entry entry = {kind, what, run, mark};
    return failed(e.add(hold, stream, entry));
}
cudaError_t cudaMemcpyAsync(void *out, const void *in, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    if ((int)kind < 0 || (int)kind > 4 || (bytes && (!out || !in))) return failed(cudaErrorInvalidValue);
    {
        Engine &e = engine();
        std::unique_lock<std::mutex> hold(e.lock);
        if (capturing && capturing == stream && (!known(e, out) || !known(e, in))) return failed(spoil(stream)); /* pageable host memory */
    }
    return enqueue(RUN, "cudaMemcpyAsync", [=]() { memmove(out, in, bytes); }, NULL, stream);
}
cudaError_t cudaMemcpy2DAsync(void *out, size_t out_pitch, const void *in, size_t in_pitch, size_t width, size_t height, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    if ((int)kind < 0 || (int)kind > 4 || width > out_pitch || width > in_pitch) return failed(cudaErrorInvalidValue);
    return enqueue(RUN, "cudaMemcpy2DAsync", [=]() { for (size_t i = 0; i < height; i++) memcpy((char *)out + i * out_pitch, (const char *)in + i * in_pitch, width); }, NULL, stream);
}
cudaError_t cudaMemcpy(void *out, const void *in, size_t bytes, enum cudaMemcpyKind kind)
{
    cudaError_t code = cudaMemcpyAsync(out, in, bytes, kind, NULL);
    return code ? code : cudaStreamSynchronize(NULL);
}
cudaError_t cudaMemsetAsync(void *out, int value, size_t bytes, cudaStream_t stream)
{
    if (bytes && !out) return failed(cudaErrorInvalidValue);
    return enqueue(RUN, "cudaMemsetAsync", [=]() { memset(out, value, bytes); }, NULL, stream);
}
cudaError_t cudaMemset(void *out, int value, size_t bytes) { return cudaMemsetAsync(out, value, bytes, NULL); }
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t fn, void *user) { return enqueue(HOST, "cudaLaunchHostFunc", [=]() { fn(user); }, NULL, stream); }

int emulated_cuda_await(cudaStream_t stream, int (*ready)(void *arg), void (*done)(void *arg), void *arg)
{
    BEGIN
    FIND(stream);
    Entry entry = {WAIT, "emulated_cuda_await", [=]() { done(arg); }, NULL, [=]() { return ready(arg) != 0; }};
    return (int)failed(e.add(hold, stream, entry));
}
void emulated_cuda_moved(void) { engine().moved.notify_all(); }

/* ---- streams and events ---- */

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int priority)
{
    BEGIN
    (void)priority;
    if (flags != cudaStreamNonBlocking) { /* the other kind waits for the stream 0, which nothing here models */
        fprintf(stderr, "emulated_cuda: a stream that waits for stream 0\n");
        return failed(cudaErrorNotSupported);
    }
    *out = new CUstream_st();
    (*out)->device = current_device;
    (*out)->running = false;
    e.streams.insert(*out);
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags) { return cudaStreamCreateWithPriority(out, flags, 0); }
cudaError_t cudaStreamCreate(cudaStream_t *out) { return cudaStreamCreateWithPriority(out, 0, 0); }
/* Ours is seen to have waited. */
cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    BEGIN
    if (!stream || !e.streams.count(stream)) return failed(cudaErrorInvalidResourceHandle);
    if (!stream->queue.empty() || stream->running) fprintf(stderr, "emulated_cuda: a stream with %zu entries is destroyed\n", stream->queue.size());
    e.until(hold, [&]() { return stream->queue.empty() && !stream->running; });
    e.streams.erase(stream);
    delete stream;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    BEGIN
    FIND(stream);
    if (spoil(stream)) return failed(cudaErrorStreamCaptureUnsupported);
    e.until(hold, [&]() { return stream->queue.empty() && !stream->running; });
    return failed(e.broken);
}
cudaError_t cudaStreamQuery(cudaStream_t stream)
{
    BEGIN
    FIND(stream);
    if (e.random.next() & 1) e.step(hold, false);
    return stream->queue.empty() && !stream->running ? e.broken : cudaErrorNotReady;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags)
{
    BEGIN
    (void)flags;
    FIND(stream);
    if (!e.events.count(event)) return failed(cudaErrorInvalidResourceHandle);
    if (!event->mark) return cudaSuccess;
    Entry entry = {WAIT, "cudaStreamWaitEvent", std::function<void()>(), event->mark, std::function<bool()>()};
    return failed(e.add(hold, stream, entry));
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode)
{
    BEGIN
    (void)mode;
    if (!stream || !e.streams.count(stream)) return failed(cudaErrorInvalidResourceHandle);
    if (stream->capture || capturing) return failed(cudaErrorStreamCaptureUnsupported);
    stream->capture = new CUgraph_st();
    stream->spoilt = false;
    capturing = stream;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out)
{
    *out = NULL;
    BEGIN
    if (!stream || !e.streams.count(stream) || !stream->capture || capturing != stream) return failed(cudaErrorInvalidResourceHandle);
    CUgraph_st *graph = stream->capture;
    stream->capture = NULL;
    capturing = NULL;
    if (stream->spoilt || (e.fail_capture > 0 && --e.fail_capture == 0)) {
        delete graph;
        return failed(cudaErrorStreamCaptureInvalidated);
    }
    e.graphs.insert(graph);
    *out = graph;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long flags)
{
    *out = NULL;
    BEGIN
    if (!e.graphs.count(graph) || flags) return failed(cudaErrorInvalidValue);
    *out = new CUgraphExec_st();
    (*out)->entries = graph->entries;
    e.executables.insert(*out);
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream)
{
    BEGIN
    FIND(stream);
    if (!e.executables.count(graph)) return failed(cudaErrorInvalidValue);
    if (e.fail_launch > 0 && --e.fail_launch == 0) return failed(e.fail_launch_code);
    std::vector<Entry> entries = graph->entries; /* it may be destroyed while they run */
    for (const Entry &entry : entries) {
        cudaError_t code = e.add(hold, stream, entry);
        if (code) return failed(code);
    }
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    BEGIN
    if (!e.graphs.erase(graph)) return failed(cudaErrorInvalidValue);
    delete graph;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph)
{
    BEGIN
    if (!e.executables.erase(graph)) return failed(cudaErrorInvalidValue);
    delete graph;
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags)
{
    BEGIN
    (void)flags;
    *out = new CUevent_st();
    (*out)->device = current_device;
    e.events.insert(*out);
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *out) { return cudaEventCreateWithFlags(out, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    BEGIN
    if (!e.events.erase(event)) return failed(cudaErrorInvalidResourceHandle);
    delete event;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    BEGIN
    FIND(stream);
    if (!e.events.count(event) || event->device != stream->device) return failed(cudaErrorInvalidResourceHandle);
    event->mark = std::make_shared<Mark>();
    Entry entry = {RECORD, "cudaEventRecord", std::function<void()>(), event->mark};
    return failed(e.add(hold, stream, entry));
}
cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    BEGIN
    if (!e.events.count(event)) return failed(cudaErrorInvalidResourceHandle);
    std::shared_ptr<Mark> mark = event->mark;
    if (mark) e.until(hold, [&]() { return mark->done; });
    return failed(e.broken);
}
cudaError_t cudaEventQuery(cudaEvent_t event)
{
    BEGIN
    if (!e.events.count(event)) return failed(cudaErrorInvalidResourceHandle);
    if (e.random.next() & 1) e.step(hold, false);
    return !event->mark || event->mark->done ? e.broken : cudaErrorNotReady;
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to)
{
    BEGIN
    *milliseconds = 1;
    return e.events.count(from) && e.events.count(to) ? cudaSuccess : failed(cudaErrorInvalidResourceHandle);
}

/* ---- kernels ---- */

cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute attribute, int value)
{
    BEGIN
    if (!kernel || value < 0) return failed(cudaErrorInvalidValue);
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value > e.shared_limit()) return failed(cudaErrorInvalidValue);
    e.shared_limits[kernel] = value;
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *out, const void *kernel)
{
    BEGIN
    memset(out, 0, sizeof *out);
    if (!kernel) return failed(cudaErrorInvalidDeviceFunction);
    if (setting("EMULATED_CUDA_NO_IMAGE", 0)) return failed(cudaErrorNoKernelImageForDevice);
    out->maxThreadsPerBlock = THREADS;
    return cudaSuccess;
}

} /* extern "C" */

bool emulated_cuda_range(const void *at, uintptr_t *begin, uintptr_t *end)
{
    Engine &e = engine();
    std::unique_lock<std::mutex> hold(e.lock);
    return known(e, at, begin, end);
}

/* The third of the arguments as written. */
static std::string kernel_name(const char *text)
{
    int depth = 0, at = 0;
    std::string name;
    for (; *text; text++) {
        if (strchr("(<[{", *text)) depth++;
        if (strchr(")>]}", *text)) depth--;
        if (*text == ',' && !depth) at++;
        else if (at == 2 && (*text != ' ' || !name.empty())) name += *text;
    }
    return name;
}

cudaError_t emulated_cuda_enqueue(const char *text, const char *caller, const void *kernel, const std::function<void()> &run, dim3 grid, dim3 block, size_t shared, cudaStream_t stream)
{
    BEGIN
    FIND(stream);
    if (stream->device != current_device) return failed(cudaErrorInvalidResourceHandle);
    if (e.fail_launch > 0 && --e.fail_launch == 0) return failed(e.fail_launch_code);
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535u || grid.z > 65535u) return failed(cudaErrorInvalidConfiguration);
    if (!block.x || !block.y || !block.z || block.z > 64u || (uint64_t)block.x * block.y * block.z > THREADS) return failed(cudaErrorInvalidConfiguration);
    std::map<const void *, int>::const_iterator limit = e.shared_limits.find(kernel);
    if (shared > (size_t)(limit == e.shared_limits.end() ? SHARED_DEFAULT : limit->second)) return failed(cudaErrorInvalidValue);
    bool fails = e.fail_kernel > 0 && --e.fail_kernel == 0;
    cudaError_t code = e.fail_kernel_code;
    uint64_t seed = e.seed * 0x9e3779b97f4a7c15u + ++e.kernels;
    std::string name = kernel_name(text), from = caller;
    Entry entry = {RUN, "kernel", [=]() {
        if (fails) {
            std::unique_lock<std::mutex> again(engine().lock);
            engine().broken = code;
        } else machine().grid(name, from, kernel, run, grid, block, shared, seed);
    }, NULL};
    return failed(e.add(hold, stream, entry));
}

cudaError_t emulated_cuda_enqueue_call(const char *what, const std::function<void()> &run, cudaStream_t stream) { return enqueue(RUN, what, run, NULL, stream); }
