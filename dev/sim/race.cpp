// The race record. A program compiled with -fsanitize=thread calls __tsan_read4 and the like at each access;
// here, in place of ThreadSanitizer's runtime, stand our own, which know CUDA's rules instead of the host's:
//
//   - two accesses to the same bytes of shared or device memory by different threads of one launch, one of
//     them a write, not both atomic, must be ordered;
//   - __syncthreads and bar.sync order the threads that take part, __syncwarp the lanes of its mask;
//     shuffles, votes and tensor-core words order nothing;
//   - blocks are ordered by nothing but a __threadfence, then an atomic, in the one, and an atomic on the
//     same address in the other ("the last block adds up");
//   - launches are ordered here (streams are SIM_LATE's business).
//
// The order is kept as vector clocks: thread u knows of thread t's accesses up to clock k. An access is
// remembered as (launch, block, thread, clock, place), the last write and two readers for each cell; cells
// have 4 bytes, or fewer on pages where narrower accesses were seen. Two readers are enough in practice: they
// are kept from different warps. The record also names reads of memory that nothing has written, and host
// code that touches device memory.
//
// It runs in one OS thread. None of its own code is instrumented.
#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>
#include "runtime.h"

#if defined(__SANITIZE_THREAD__)
#error "the simulator's own files are compiled without -fsanitize=thread: they are what it calls"
#endif

namespace sim {

bool race_on = false;

namespace {

constexpr unsigned kMaxThreads = kMaxWarps * 32;
constexpr uintptr_t kPageBytes = 4096;
constexpr uint32_t kIsWhere = 0x80000000u;  // a site is an offset in the code; with this bit, a Where

struct Access {
    uint32_t launch = 0, block = 0;
    uint32_t clock : 20 = 0, thread : 10 = 0, atomic : 1 = 0;
    uint32_t by_proxy : 1 = 0;  // written by a bulk copy, through the asynchronous proxy
    uint32_t site = 0;
};

struct Cell {
    Access write, reader[2];
};

struct Page {
    int shift = 2;  // log2 of a cell's bytes
    std::vector<Cell> cells = std::vector<Cell>(kPageBytes >> 2);
    void refine(int to) {
        std::vector<Cell> finer(kPageBytes >> to);
        for (size_t i = 0; i < finer.size(); i++) finer[i] = cells[i >> (shift - to)];
        cells.swap(finer);
        shift = to;
    }
};

using Clocks = std::vector<uint32_t>;  // of the threads of one block

// What a thread had seen of its block when it passed a fence and then an atomic.
struct Release {
    uint32_t block;
    Clocks known;
};
struct Acquire {  // by `thread` at `clock`; whoever knows of that has it too
    unsigned thread;
    uint32_t clock;
    std::shared_ptr<const Release> release;
};

struct Pending {  // 16 bytes that a copy of `thread` will write
    unsigned thread;
    Where where;
};

struct Record {
    uint32_t launch = 0, block = 0;
    std::unordered_map<uintptr_t, Page> pages;
    std::unordered_map<uintptr_t, std::vector<std::shared_ptr<const Release>>>
        releases;                                    // of this launch, by address
    std::unordered_map<uintptr_t, Pending> pending;  // of this block
    std::vector<Acquire> acquires;                   // of this block
    std::vector<Where> places;
    // Clocks of the running block. What u knows of t is the greater of base[t], since the last barrier of
    // all, and extra[u][t], where extra_of[u] says that it is of this barrier's time.
    Clocks clock, base, fenced, proxy_fenced;
    std::vector<Clocks> extra = std::vector<Clocks>(kMaxThreads);
    std::vector<uint32_t> extra_of = std::vector<uint32_t>(kMaxThreads);
    uint32_t barrier_time = 0;

    uint32_t known(unsigned u, unsigned t) const {
        if (u == t) return clock[t];
        return extra_of[u] == barrier_time ? std::max(base[t], extra[u][t]) : base[t];
    }
    Clocks known(unsigned u) const {  // of all threads
        Clocks all(clock.size());
        for (unsigned t = 0; t < all.size(); t++) all[t] = known(u, t);
        return all;
    }
};

Record& record() {
    static Record* instance = new Record;
    return *instance;
}

uintptr_t code_base() {
    static const uintptr_t base = program_base();
    return base;
}

uint32_t site_of(Where where) {
    std::vector<Where>& places = record().places;
    for (size_t i = 0; i < places.size(); i++)
        if (places[i].line() == where.line() && strcmp(places[i].file_name(), where.file_name()) == 0)
            return kIsWhere | static_cast<uint32_t>(i);
    places.push_back(where);
    return kIsWhere | static_cast<uint32_t>(places.size() - 1);
}
uint32_t site_of(const void* return_address) {
    return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(return_address) - code_base());
}

std::string site_text(uint32_t site) {
    if (site & kIsWhere) {
        const Where& where = record().places[site & ~kIsWhere];
        return std::string(where.file_name()) + ":" + std::to_string(where.line());
    }
    const std::string line = source_line(reinterpret_cast<const void*>(code_base() + site));
    return line.empty() ? "an unknown line" : line;
}

std::string access_text(const Access& a, bool write) {
    const Launch& l = *worker->launch;
    char text[256];
    snprintf(text, sizeof(text), "thread (%u, %u, %u) of block (%u, %u, %u) %s%s at ", a.thread % l.block.x,
             a.thread / l.block.x % l.block.y, a.thread / l.block.x / l.block.y, a.block % l.grid.x,
             a.block / l.grid.x % l.grid.y, a.block / l.grid.x / l.grid.y, write ? "writes" : "reads",
             a.atomic ? " atomically" : "");
    return text + site_text(a.site);
}

[[noreturn]] void report_race(const Access& before, bool before_writes, const Access& now, bool now_writes,
                              const void* p) {
    stop("race in kernel %s on %s: %s, and %s, with nothing that orders them",
         kernel_name(worker->launch->kernel).c_str(), describe_address(p).c_str(),
         access_text(before, before_writes).c_str(), access_text(now, now_writes).c_str());
}

// Whether everything up to `before` has happened for thread `me` of the running block.
bool ordered(const Record& r, const Access& before, unsigned me) {
    if (before.launch != r.launch) return true;  // an earlier launch, or never
    if (before.block == r.block) return r.known(me, before.thread) >= before.clock;
    for (const Acquire& a : r.acquires)
        if (a.release->block == before.block && r.known(me, a.thread) >= a.clock &&
            a.release->known[before.thread] >= before.clock)
            return true;
    return false;
}

bool same_thread(const Access& a, const Access& b) {
    return a.launch == b.launch && a.block == b.block && a.thread == b.thread;
}
bool same_warp(const Access& a, const Access& b) {
    return a.block == b.block && a.thread / 32 == b.thread / 32;
}

// Of three readers keep two: not one that a kept one comes after, and not two of a warp where there is a
// third warp's.
void remember_reader(Record& r, Cell& cell, const Access& now) {
    for (Access& old : cell.reader)
        if (same_thread(old, now) || ordered(r, old, now.thread)) {
            old = now;
            return;
        }
    if (same_warp(cell.reader[0], cell.reader[1]) && !same_warp(cell.reader[0], now)) cell.reader[1] = now;
}

void touch_cell(Record& r, Cell& cell, const Access& now, bool write, const void* p) {
    if (cell.write.launch == r.launch && !same_thread(cell.write, now) &&
        !(cell.write.atomic && now.atomic) && !ordered(r, cell.write, now.thread))
        report_race(cell.write, true, now, write, p);
    if (!write) {
        remember_reader(r, cell, now);
        return;
    }
    for (const Access& reader : cell.reader)
        if (reader.launch == r.launch && !same_thread(reader, now) && !(reader.atomic && now.atomic) &&
            !ordered(r, reader, now.thread))
            report_race(reader, false, now, true, p);
    cell.write = now;
    cell.reader[0] = cell.reader[1] = {};
}

enum class Region { Shared, Device, Other };

Region region_of(const Worker& w, uintptr_t address) {
    if (address - reinterpret_cast<uintptr_t>(w.shared) < kSharedBytes) return Region::Shared;
    return in_arena(reinterpret_cast<const void*>(address)) ? Region::Device : Region::Other;
}

void check_pending(Record& r, uintptr_t address, size_t bytes, unsigned thread, uint32_t site, bool write) {
    for (uintptr_t at = address & ~uintptr_t{15}; at < address + bytes; at += 16) {
        const auto it = r.pending.find(at);
        if (it == r.pending.end()) continue;
        const Access now{r.launch, r.block, 0, thread, 0, 0, site};
        const Access copy{r.launch, r.block, 0, it->second.thread, 0, 0, site_of(it->second.where)};
        stop("kernel %s: %s; but a copy is still under way there: %s",
             kernel_name(worker->launch->kernel).c_str(), access_text(now, write).c_str(),
             access_text(copy, true).c_str());
    }
}

// The access `now` of the bytes at `address`.
void touch(Record& r, uintptr_t address, size_t bytes, bool write, const Access& now) {
    const int shift = bytes >= 4 && address % 4 == 0 ? 2 : bytes >= 2 && address % 2 == 0 ? 1 : 0;
    for (uintptr_t at = address; at < address + bytes;) {
        Page& page = r.pages[at / kPageBytes];
        if (shift < page.shift) page.refine(shift);
        const uintptr_t end = std::min(address + bytes, (at / kPageBytes + 1) * kPageBytes);
        for (; at < end; at += uintptr_t{1} << page.shift)
            touch_cell(r, page.cells[at % kPageBytes >> page.shift], now, write,
                       reinterpret_cast<const void*>(at));
        at = end;
    }
}

void touch(uintptr_t address, size_t bytes, bool write, bool atomic, unsigned thread, uint32_t site,
           Region region) {
    Record& r = record();
    if (region == Region::Shared && !r.pending.empty()) check_pending(r, address, bytes, thread, site, write);
    touch(r, address, bytes, write, Access{r.launch, r.block, r.clock[thread], thread, atomic, 0, site});
}

[[noreturn]] void report_host(uintptr_t address, bool write, const void* return_address) {
    stop("host code %s device memory at %s: %s", write ? "writes" : "reads",
         site_text(site_of(return_address)).c_str(),
         describe_address(reinterpret_cast<const void*>(address)).c_str());
}

bool is_poison(uintptr_t address, size_t bytes) {
    if (bytes < 2 || address % 2) return false;
    if (bytes == 2) {
        uint16_t half;
        memcpy(&half, reinterpret_cast<const void*>(address), 2);
        return half == (kPoison & 0xffff);
    }
    for (size_t i = 0; i + 4 <= bytes; i += 4) {
        uint32_t word;
        memcpy(&word, reinterpret_cast<const void*>(address + i), 4);
        if (word == kPoison) return true;
    }
    return false;
}

// An access of instrumented code.
void saw(const void* p, size_t bytes, bool write, bool atomic, const void* return_address) {
    const auto address = reinterpret_cast<uintptr_t>(p);
    if (!worker || !worker->launch) {
        bool inside;
        if (in_arena(p) && find_memory(p, bytes, &inside) == Memory::Device)
            report_host(address, write, return_address);
        return;
    }
    const Worker& w = *worker;
    const Region region = region_of(w, address);
    if (region == Region::Other) return;
    const uint32_t site = site_of(return_address);
    touch(address, bytes, write, atomic, w.current->thread, site, region);
    if (!write && is_poison(address, bytes))
        stop("%s: reads memory that nothing has written yet, at %s: %s; a barrier or a wait may be missing",
             thread_of(w).c_str(), site_text(site).c_str(), describe_address(p).c_str());
}

// `known` knows what `other` knows too.
void take_over(Clocks& known, const Clocks& other) {
    known.resize(std::max(known.size(), other.size()));
    for (size_t t = 0; t < other.size(); t++) known[t] = std::max(known[t], other[t]);
}

// The threads of `group` have met: each knows what all knew, and what comes now is later.
void join(Record& r, const std::vector<unsigned>& group) {
    const size_t n = r.clock.size();
    Clocks joined(n, 0);
    for (const unsigned u : group)
        if (r.extra_of[u] == r.barrier_time) take_over(joined, r.extra[u]);
    for (const unsigned u : group) joined[u] = std::max(joined[u], r.clock[u]);
    for (const unsigned u : group) {
        r.extra[u] = joined;
        r.extra_of[u] = r.barrier_time;
        r.clock[u]++;
    }
}

}  // namespace

// ---- what the simulator tells the record ------------------------------------------------------------------

void race_begin_launch(const Launch& launch) {
    Record& r = record();
    r.launch = static_cast<uint32_t>(launch.number);
    r.releases.clear();
}

void race_begin_block() {
    Record& r = record();
    const Worker& w = *worker;
    const dim3 grid = w.launch->grid;
    r.block = (w.block.z * grid.y + w.block.y) * grid.x + w.block.x;
    r.clock.assign(w.threads, 1);
    r.base.assign(w.threads, 0);
    r.fenced.assign(w.threads, 0);
    r.proxy_fenced.assign(w.threads, 0);
    r.barrier_time++;
    r.pending.clear();
    r.acquires.clear();
    const auto first = reinterpret_cast<uintptr_t>(w.shared) / kPageBytes;
    for (uintptr_t page = first;
         page * kPageBytes < reinterpret_cast<uintptr_t>(w.shared) + w.launch->shared_bytes; page++)
        r.pages.erase(page);  // another block's shared memory is other memory
}

void race_warp_ordered(uint32_t mask) {
    std::vector<unsigned> lanes;
    for (; mask; mask &= mask - 1) lanes.push_back(worker->warp->first_thread + __builtin_ctz(mask));
    join(record(), lanes);
}

void race_barrier_passed(const Barrier& b) {
    Record& r = record();
    if (b.expected == worker->threads) {
        r.base = r.clock;
        r.barrier_time++;
        for (uint32_t& c : r.clock) c++;
        return;
    }
    std::vector<unsigned> group;
    for (unsigned t = 0; t < worker->threads; t++)
        if (b.waiting[t / 32] >> t % 32 & 1) group.push_back(t);
    join(r, group);
}

void race_fence() {
    Record& r = record();
    const unsigned me = worker->current->thread;
    r.fenced[me] = r.clock[me]++;
}

void race_read(const void* p, size_t bytes, unsigned lane, Where where) {
    const auto address = reinterpret_cast<uintptr_t>(p);
    touch(address, bytes, false, false, worker->warp->first_thread + lane, site_of(where),
          region_of(*worker, address));
}

void race_touch(const void* p, size_t bytes, bool write, Where where) {
    const auto address = reinterpret_cast<uintptr_t>(p);
    touch(address, bytes, write, false, worker->current->thread, site_of(where), region_of(*worker, address));
}

namespace {

// The asynchronous proxy reads or writes bytes, in one page of shared memory: what ordinary stores wrote
// there before, their thread must have fenced since.
void check_proxy_fenced(Record& r, uintptr_t address, size_t bytes, const char* word, bool write,
                        Where where) {
    const Page& page = r.pages[address / kPageBytes];
    for (size_t i = 0; i < bytes; i += size_t{1} << page.shift) {
        const Access& w = page.cells[(address + i) % kPageBytes >> page.shift].write;
        if (w.launch != r.launch || w.by_proxy || r.proxy_fenced[w.thread] >= w.clock) continue;
        const Access now{r.launch, r.block, 0, worker->current->thread, 0, 0, site_of(where)};
        stop("kernel %s: %s, and %s, %s, without a fence_async_proxy between them",
             kernel_name(worker->launch->kernel).c_str(), access_text(w, true).c_str(), word,
             access_text(now, write).c_str());
    }
}

}  // namespace

uint32_t race_async_issue(void* to, const void* from, Where where, bool by_proxy) {
    Record& r = record();
    const unsigned me = worker->current->thread;
    const auto target = reinterpret_cast<uintptr_t>(to), source = reinterpret_cast<uintptr_t>(from);
    if (!r.pending.empty()) check_pending(r, target, 16, me, site_of(where), true);
    if (by_proxy) check_proxy_fenced(r, target, 16, "a bulk copy", true, where);
    touch(r, target, 16, true, Access{r.launch, r.block, r.clock[me], me, 0, by_proxy, site_of(where)});
    if (from && region_of(*worker, source) == Region::Device)
        touch(source, 16, false, false, me, site_of(where), Region::Device);
    r.pending.insert_or_assign(target, Pending{me, where});
    return r.clock[me];
}

void race_async_landed(void* to) {
    Record& r = record();
    const auto target = reinterpret_cast<uintptr_t>(to);
    const auto it = r.pending.find(target);
    if (it == r.pending.end()) return;
    const Pending pending = it->second;
    r.pending.erase(it);
    touch(target, 16, true, false, pending.thread, site_of(pending.where), Region::Shared);
}

void race_tick() { record().clock[worker->current->thread]++; }

void race_proxy_fence() {
    Record& r = record();
    const unsigned me = worker->current->thread;
    r.proxy_fenced[me] = r.clock[me]++;
}

void race_proxy_read(const void* p, size_t bytes, Where where) {
    race_touch(p, bytes, false, where);
    check_proxy_fenced(record(), reinterpret_cast<uintptr_t>(p), bytes, "a warpgroup product", false, where);
}

// Who waits for the phase will know what this thread knows.
void race_memory_barrier_arrive(MemoryBarrier& b) {
    Record& r = record();
    const unsigned me = worker->current->thread;
    take_over(b.clocks, r.known(me));
    r.clock[me]++;
}

void race_memory_barrier_passed(const MemoryBarrier& b) {
    Record& r = record();
    const unsigned me = worker->current->thread;
    if (r.extra_of[me] != r.barrier_time) {
        r.extra[me].assign(r.clock.size(), 0);
        r.extra_of[me] = r.barrier_time;
    }
    take_over(r.extra[me], b.complete_clocks);
}

// The bytes count as written at their issue, and whoever waits knows of that.
void race_bulk_landed(MemoryBarrier& b, void* to, unsigned thread, uint32_t clock) {
    record().pending.erase(reinterpret_cast<uintptr_t>(to));
    b.clocks.resize(record().clock.size());
    b.clocks[thread] = std::max(b.clocks[thread], clock);
}

namespace {

// An atomic takes over what fenced threads have released at this address, and releases what its own thread
// has fenced.
void synchronize_at(uintptr_t address) {
    Record& r = record();
    const unsigned me = worker->current->thread;
    auto& released = r.releases[address];
    for (const auto& release : released)
        if (release->block != r.block) r.acquires.push_back({me, r.clock[me], release});
    r.clock[me]++;
    if (!r.fenced[me]) return;
    auto release = std::make_shared<Release>(Release{r.block, r.known(me)});
    release->known[me] = r.fenced[me];
    released.push_back(std::move(release));
}

void saw_atomic(const volatile void* p, size_t bytes, bool write, const void* return_address) {
    const void* plain = const_cast<const void*>(p);
    saw(plain, bytes, write, true, return_address);
    if (worker && worker->launch && region_of(*worker, reinterpret_cast<uintptr_t>(p)) == Region::Device)
        synchronize_at(reinterpret_cast<uintptr_t>(p));
}

}  // namespace
}  // namespace sim

// ---- what -fsanitize=thread calls -------------------------------------------------------------------------

// clang-format off
extern "C" {

void __tsan_init() { sim::race_on = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define SIM_ACCESS(n)                                                                                  \
    void __tsan_read##n(void* p) { sim::saw(p, n, false, false, __builtin_return_address(0)); }        \
    void __tsan_write##n(void* p) { sim::saw(p, n, true, false, __builtin_return_address(0)); }        \
    void __tsan_unaligned_read##n(void* p) { sim::saw(p, n, false, false, __builtin_return_address(0)); } \
    void __tsan_unaligned_write##n(void* p) { sim::saw(p, n, true, false, __builtin_return_address(0)); }
SIM_ACCESS(1) SIM_ACCESS(2) SIM_ACCESS(4) SIM_ACCESS(8) SIM_ACCESS(16)
#undef SIM_ACCESS
void __tsan_read_range(void* p, size_t n) { sim::saw(p, n, false, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { sim::saw(p, n, true, false, __builtin_return_address(0)); }

#define SIM_ATOMIC_CHANGE(bits, T, name)                                                               \
    T __tsan_atomic##bits##_##name(volatile T* p, T v, int) {                                          \
        sim::saw_atomic(p, sizeof(T), true, __builtin_return_address(0));                              \
        return __atomic_##name(p, v, __ATOMIC_SEQ_CST);                                                \
    }
#define SIM_ATOMICS(bits, T)                                                                           \
    T __tsan_atomic##bits##_load(const volatile T* p, int) {                                           \
        sim::saw_atomic(p, sizeof(T), false, __builtin_return_address(0));                             \
        return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                   \
    }                                                                                                  \
    void __tsan_atomic##bits##_store(volatile T* p, T v, int) {                                        \
        sim::saw_atomic(p, sizeof(T), true, __builtin_return_address(0));                              \
        __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                      \
    }                                                                                                  \
    T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) {                                        \
        sim::saw_atomic(p, sizeof(T), true, __builtin_return_address(0));                              \
        return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                            \
    }                                                                                                  \
    SIM_ATOMIC_CHANGE(bits, T, fetch_add) SIM_ATOMIC_CHANGE(bits, T, fetch_sub)                        \
    SIM_ATOMIC_CHANGE(bits, T, fetch_and) SIM_ATOMIC_CHANGE(bits, T, fetch_or)                         \
    SIM_ATOMIC_CHANGE(bits, T, fetch_xor) SIM_ATOMIC_CHANGE(bits, T, fetch_nand)                       \
    int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* expected, T v, int, int) {     \
        sim::saw_atomic(p, sizeof(T), true, __builtin_return_address(0));                              \
        return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
    }                                                                                                  \
    int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* expected, T v, int, int) {       \
        sim::saw_atomic(p, sizeof(T), true, __builtin_return_address(0));                              \
        return __atomic_compare_exchange_n(p, expected, v, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);  \
    }                                                                                                  \
    T __tsan_atomic##bits##_compare_exchange_val(volatile T* p, T expected, T v, int, int) {           \
        sim::saw_atomic(p, sizeof(T), true, __builtin_return_address(0));                              \
        __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);       \
        return expected;                                                                               \
    }
SIM_ATOMICS(8, unsigned char) SIM_ATOMICS(16, unsigned short)
SIM_ATOMICS(32, unsigned) SIM_ATOMICS(64, unsigned long)
#undef SIM_ATOMICS
#undef SIM_ATOMIC_CHANGE
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}

}  // extern "C"
// clang-format on
