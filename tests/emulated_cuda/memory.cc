/* memory: counts how well kernels use memory, which their results do not show. Linked to a program whose kernels were compiled with -fsanitize=thread, and not to ThreadSanitizer: its calls before each access come here.

   Between two meetings of a warp (a barrier, a shuffle, a matrix product) each lane's accesses are listed; the n-th of each place in the code, of all lanes, are then taken for one access of the warp. Lanes that go ways of their own
   make smaller accesses of it, which is what the machine does too.
     global memory (what cudaMalloc knows)   sectors of 32 bytes that an access touches; the fewest that so many bytes need
     shared memory                           32 banks of 4 bytes. Lanes come all at once with 4 bytes each, in halves with 8, in quarters with 16 (so does ldmatrix: eight rows of 16 bytes a quarter); of these each takes as
                                             many turns as the busiest bank has different words. The fewest: one each
   The rest is the lanes' own: stack, arguments, constants.
   emulated_cuda_write writes the counts to a file, a line for each place in the code of each kernel; memory.sh makes the table. */
#include "memory.h"
#include "warp.h"

#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <vector>

namespace {

enum Kind { READ, WRITE, ATOMIC, COPY, MATRIX, KINDS };
const char *const kind_names[KINDS] = {"read", "write", "atomic", "copy", "ldmatrix"};

struct Touch { const void *pc; uintptr_t at; uint16_t size; uint8_t kind, shared; };
struct Place {
    const void *pc;
    int kind, shared;
    bool operator<(const Place &o) const { return pc != o.pc ? pc < o.pc : kind != o.kind ? kind < o.kind : shared < o.shared; }
};
typedef emulated_cuda_count Count;
struct Range { uintptr_t begin, end; bool known; };
typedef std::map<Place, Count> Counts;

std::mutex lock;
std::map<const void *, Counts> *all; /* by kernel */

struct Counter {
    std::vector<std::vector<Touch> > lanes;
    std::vector<Range> ranges; /* of addresses: memory, and gaps between */
    uintptr_t shared;
    size_t shared_bytes;
    Counts counts;

    bool global(uintptr_t at)
    {
        for (size_t i = 0; i < ranges.size(); i++)
            if (at >= ranges[i].begin && at < ranges[i].end) {
                if (i) std::swap(ranges[i], ranges[i / 2]);
                return ranges[i / 2].known;
            }
        Range range;
        range.known = emulated_cuda_range((const void *)at, &range.begin, &range.end);
        ranges.push_back(range);
        return range.known;
    }
    /* One access of a warp: by lanes lane[0 .. n), in their order. */
    void access(const Touch *const *touch, const int *lane, int n)
    {
        const Touch &first = *touch[0];
        Place place = {first.pc, first.kind, first.shared};
        Count &count = counts[place];
        count.accesses++;
        count.lanes += (uint64_t)n;
        for (int i = 0; i < n; i++) count.bytes += touch[i]->size;
        if (first.shared) {
            const int together = first.size <= 4 ? 32 : first.size <= 8 ? 16 : 8;
            for (int i = 0; i < n;) {
                std::vector<uintptr_t> words;
                int phase = lane[i] / together, busy[32] = {0}, most = 0;
                for (; i < n && lane[i] / together == phase; i++)
                    for (uintptr_t w = touch[i]->at / 4; w <= (touch[i]->at + touch[i]->size - 1) / 4; w++) words.push_back(w);
                std::sort(words.begin(), words.end());
                words.erase(std::unique(words.begin(), words.end()), words.end());
                for (uintptr_t w : words) most = std::max(most, ++busy[w % 32]);
                count.spent += (uint64_t)most;
                count.fewest++;
            }
            return;
        }
        std::pair<uintptr_t, uintptr_t> part[32]; /* begin, end */
        uintptr_t sector = 0, end = 0;
        uint64_t bytes = 0;
        for (int i = 0; i < n; i++) part[i] = std::make_pair(touch[i]->at, touch[i]->at + touch[i]->size);
        std::sort(part, part + n);
        for (int i = 0; i < n; i++) {
            uintptr_t from = std::max(part[i].first / 32, sector), to = (part[i].second + 31) / 32;
            if (to > from) count.spent += to - from;
            sector = std::max(sector, to);
            if (part[i].second > end) bytes += part[i].second - std::max(part[i].first, end);
            end = std::max(end, part[i].second);
        }
        count.fewest += (bytes + 31) / 32;
    }
    /* A warp has met: lanes [first, first + n). */
    void warp(size_t first, int n)
    {
        const Touch *touch[32];
        int lane[32];
        bool alike = true;
        std::vector<Touch> &lead = lanes[first];
        for (int i = 1; i < n && alike; i++) {
            const std::vector<Touch> &own = lanes[first + (size_t)i];
            alike = own.size() == lead.size();
            for (size_t k = 0; alike && k < own.size(); k++) alike = own[k].pc == lead[k].pc && own[k].kind == lead[k].kind && own[k].shared == lead[k].shared;
        }
        if (alike) {
            for (size_t k = 0; k < lead.size(); k++) {
                for (int i = 0; i < n; i++) {
                    touch[i] = &lanes[first + (size_t)i][k];
                    lane[i] = i;
                }
                access(touch, lane, n);
            }
        } else {
            struct Item { const Touch *touch; uint32_t turn; int lane; };
            std::vector<Item> items;
            for (int i = 0; i < n; i++) {
                std::map<Place, uint32_t> turns;
                for (const Touch &t : lanes[first + (size_t)i]) {
                    Place place = {t.pc, t.kind, t.shared};
                    Item item = {&t, turns[place]++, i};
                    items.push_back(item);
                }
            }
            std::sort(items.begin(), items.end(), [](const Item &a, const Item &b) {
                Place x = {a.touch->pc, a.touch->kind, a.touch->shared}, y = {b.touch->pc, b.touch->kind, b.touch->shared};
                return x < y || (!(y < x) && (a.turn != b.turn ? a.turn < b.turn : a.lane < b.lane));
            });
            for (size_t k = 0; k < items.size();) {
                int count = 0;
                for (size_t begin = k; k < items.size() && items[k].touch->pc == items[begin].touch->pc && items[k].touch->kind == items[begin].touch->kind && items[k].touch->shared == items[begin].touch->shared && items[k].turn == items[begin].turn; k++) {
                    touch[count] = items[k].touch;
                    lane[count++] = items[k].lane;
                }
                access(touch, lane, count);
            }
        }
        for (int i = 0; i < n; i++) lanes[first + (size_t)i].clear();
    }
};

thread_local Counter counter;

inline void touch(const void *pc, uintptr_t at, size_t size, Kind kind)
{
    const emulated_cuda_thread *now = emulated_cuda_now;
    if (!now || at - (uintptr_t)now->stack < (uintptr_t)(now->stack_end - now->stack) || at - (uintptr_t)now < sizeof *now || at == (uintptr_t)&emulated_cuda_now) return;
    Counter &c = counter;
    bool shared = at - c.shared < c.shared_bytes;
    if (!shared && !c.global(at)) return;
    std::vector<Touch> &own = c.lanes[now->thread.x + now->block_dim.x * (now->thread.y + now->block_dim.y * now->thread.z)];
    for (size_t done = 0; done < size; done += 16) { /* more than 16 bytes: one piece after the other */
        Touch t = {pc, at + done, (uint16_t)std::min(size - done, (size_t)16), (uint8_t)kind, shared};
        own.push_back(t);
    }
}

void begin(size_t threads, const void *shared, size_t bytes)
{
    counter.lanes.resize(std::max(counter.lanes.size(), threads));
    counter.ranges.clear();
    counter.shared = (uintptr_t)shared;
    counter.shared_bytes = bytes;
}
void met(unsigned first, unsigned count)
{
    for (unsigned i = 0; i < count; i += 32) counter.warp(first + i, (int)std::min(count - i, 32u));
}
void plus(Count &sum, const Count &more)
{
    sum.accesses += more.accesses;
    sum.lanes += more.lanes;
    sum.bytes += more.bytes;
    sum.spent += more.spent;
    sum.fewest += more.fewest;
}
void end(const void *kernel)
{
    std::unique_lock<std::mutex> hold(lock);
    Counts &total = (*all)[kernel];
    for (const Counts::value_type &one : counter.counts) plus(total[one.first], one.second);
    counter.counts.clear();
}
/* What the emulation does for a kernel. */
void copied(const void *pc, const void *shared, const void *global, int bytes, int size)
{
    touch(pc, (uintptr_t)shared, (size_t)size, COPY);
    if (bytes) touch(pc, (uintptr_t)global, (size_t)bytes, COPY);
}
void matrix(const void *pc, const void *row) { touch(pc, (uintptr_t)row, 16, MATRIX); }

const emulated_cuda_watch watch = {begin, met, end, copied, matrix};

} // namespace

extern "C" int emulated_cuda_write(const char *path)
{
    std::unique_lock<std::mutex> hold(lock);
    FILE *file = fopen(path, "w");
    if (!file) return 0;
    for (const std::pair<const void *const, Counts> &kernel : *all)
        for (const Counts::value_type &one : kernel.second) /* the call is the instruction before */
            fprintf(file, "%p %p %s %s %llu %llu %llu %llu %llu\n", kernel.first, (const void *)((const char *)one.first.pc - 1), one.first.shared ? "shared" : "global", kind_names[one.first.kind], (unsigned long long)one.second.accesses, (unsigned long long)one.second.lanes,
                    (unsigned long long)one.second.bytes, (unsigned long long)one.second.spent, (unsigned long long)one.second.fewest);
    return fclose(file) == 0;
}

static int start()
{
    all = new std::map<const void *, Counts>();
    emulated_cuda_watching = &watch;
    return 1;
}
static const int started = start();

extern "C" {

void emulated_cuda_forget(void)
{
    std::unique_lock<std::mutex> hold(lock);
    all->clear();
}
emulated_cuda_count emulated_cuda_counted(const void *kernel, int shared)
{
    std::unique_lock<std::mutex> hold(lock);
    emulated_cuda_count sum = {0, 0, 0, 0, 0};
    for (const Counts::value_type &one : (*all)[kernel]) if (one.first.shared == shared) plus(sum, one.second);
    return sum;
}

/* ---- the calls that -fsanitize=thread makes ---- */

void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void *, void *) {}
void __tsan_vptr_read(void *) {}
#define HERE __builtin_return_address(0)
#define ACCESS(size) \
    void __tsan_read##size(void *at) { touch(HERE, (uintptr_t)at, size, READ); } \
    void __tsan_write##size(void *at) { touch(HERE, (uintptr_t)at, size, WRITE); } \
    void __tsan_volatile_read##size(void *at) { touch(HERE, (uintptr_t)at, size, READ); } \
    void __tsan_volatile_write##size(void *at) { touch(HERE, (uintptr_t)at, size, WRITE); }
#define UNALIGNED(size) \
    void __tsan_unaligned_read##size(void *at) { touch(HERE, (uintptr_t)at, size, READ); } \
    void __tsan_unaligned_write##size(void *at) { touch(HERE, (uintptr_t)at, size, WRITE); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
UNALIGNED(2) UNALIGNED(4) UNALIGNED(8) UNALIGNED(16)
void __tsan_read_range(void *at, size_t size) { touch(HERE, (uintptr_t)at, size, READ); }
void __tsan_write_range(void *at, size_t size) { touch(HERE, (uintptr_t)at, size, WRITE); }

#define ATOMICS(bits, T) \
    T __tsan_atomic##bits##_load(const volatile T *at, int) { touch(HERE, (uintptr_t)at, bits / 8, READ); return __atomic_load_n(at, __ATOMIC_SEQ_CST); } \
    void __tsan_atomic##bits##_store(volatile T *at, T x, int) { touch(HERE, (uintptr_t)at, bits / 8, WRITE); __atomic_store_n(at, x, __ATOMIC_SEQ_CST); } \
    T __tsan_atomic##bits##_exchange(volatile T *at, T x, int) { touch(HERE, (uintptr_t)at, bits / 8, ATOMIC); return __atomic_exchange_n(at, x, __ATOMIC_SEQ_CST); } \
    T __tsan_atomic##bits##_fetch_add(volatile T *at, T x, int) { touch(HERE, (uintptr_t)at, bits / 8, ATOMIC); return __atomic_fetch_add(at, x, __ATOMIC_SEQ_CST); } \
    T __tsan_atomic##bits##_fetch_sub(volatile T *at, T x, int) { touch(HERE, (uintptr_t)at, bits / 8, ATOMIC); return __atomic_fetch_sub(at, x, __ATOMIC_SEQ_CST); } \
    T __tsan_atomic##bits##_fetch_or(volatile T *at, T x, int) { touch(HERE, (uintptr_t)at, bits / 8, ATOMIC); return __atomic_fetch_or(at, x, __ATOMIC_SEQ_CST); } \
    T __tsan_atomic##bits##_fetch_and(volatile T *at, T x, int) { touch(HERE, (uintptr_t)at, bits / 8, ATOMIC); return __atomic_fetch_and(at, x, __ATOMIC_SEQ_CST); } \
    int __tsan_atomic##bits##_compare_exchange_strong(volatile T *at, T *is, T x, int, int) { touch(HERE, (uintptr_t)at, bits / 8, ATOMIC); return __atomic_compare_exchange_n(at, is, x, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); } \
    int __tsan_atomic##bits##_compare_exchange_weak(volatile T *at, T *is, T x, int, int) { touch(HERE, (uintptr_t)at, bits / 8, ATOMIC); return __atomic_compare_exchange_n(at, is, x, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); }
ATOMICS(8, uint8_t)
ATOMICS(16, uint16_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}

}
