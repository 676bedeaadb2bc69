// The slow paths of fibers.h: starting and ending threads, choosing who goes on, and saying who is stuck.
#include "fibers.h"
#include <sys/mman.h>
#include <unistd.h>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include "runtime.h"

namespace sim {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 * 1024;  // its frames are several times larger
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
constexpr size_t kGuardBytes = 4096, kSharedAlignment = 1024, kCanaryBytes = 256;
constexpr unsigned char kCanary = 0xa5;

unsigned nth_bit(uint32_t mask, unsigned n) {
    while (n--) mask &= mask - 1;
    return __builtin_ctz(mask);
}

unsigned random_bit(uint32_t mask, uint64_t& state) {
    return nth_bit(mask, next_random(state) % __builtin_popcount(mask));
}

uint3 thread_index(unsigned thread, dim3 block) {
    if (block.y == 1 && block.z == 1) return {thread, 0, 0};
    return {thread % block.x, thread / block.x % block.y, thread / block.x / block.y};
}

void fiber_entry();

Fiber* new_fiber(Worker& w) {
    if (!w.free_fibers.empty()) {
        Fiber* f = w.free_fibers.back();
        w.free_fibers.pop_back();
        return f;
    }
    static std::atomic<unsigned> count{0};
    const size_t total = kGuardBytes + kStackBytes;
    void* memory =
        mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) stop("no memory for the stack of one more simulated thread");
    mprotect(memory, kGuardBytes, PROT_NONE);  // where the system has no more guards to give, there is none
    // Stacks that begin at the same offset of a page would share the same few cache sets: spread them over 64
    // lines.
    const size_t colour = count++ * 576 % 4096;
    auto* f = new Fiber;
    f->stack = static_cast<unsigned char*>(memory) + kGuardBytes;
    f->stack_bytes = kStackBytes - colour;
    f->context = make_context<fiber_entry>(f->stack, f->stack_bytes);
    return f;
}

// `lane` begins on fiber f, which is or will be the running one.
void start_lane(Worker& w, Warp& warp, unsigned lane, Fiber& f) {
    warp.unstarted &= ~(1u << lane);
    warp.fiber[lane] = &f;
    f.thread = warp.first_thread + lane;
    f.index = thread_index(f.thread, w.launch->block);
}

// Whose turn it is: a lane of this warp, else of another. False when none is ready.
bool choose_ready(Worker& w, Warp*& warp, unsigned& lane) {
    if (w.shuffle) {
        for (uint32_t rest = w.ready_warps; rest;) {
            const unsigned i = random_bit(rest, w.random);
            warp = &w.warps[i];
            if (const uint32_t lanes = warp->ready | warp->unstarted) {
                lane = random_bit(lanes, w.random);
                return true;
            }
            rest &= ~(1u << i);
            w.ready_warps &= ~(1u << i);
        }
        return false;
    }
    for (warp = w.warp;;) {
        if (warp) {
            if (const uint32_t lanes = warp->ready ? warp->ready : warp->unstarted) {
                lane = __builtin_ctz(lanes);
                return true;
            }
            w.ready_warps &= ~(1u << (warp - w.warps));
        }
        if (!w.ready_warps) return false;
        warp = &w.warps[__builtin_ctz(w.ready_warps)];
    }
}

// The same; where nobody is ready, bulk copies land that somebody waits for.
bool choose(Worker& w, Warp*& warp, unsigned& lane) {
    do {
        if (choose_ready(w, warp, lane)) return true;
    } while (land_bulk_copies(w));
    return false;
}

// Called by a thread that has returned: __syncwarp and the like don't wait for it.
void leave_meetings(Worker& w, Warp& warp, uint32_t bit) {
    (void)w;
    for (int i = 0; i < warp.open; i++) {
        Meeting& m = warp.meetings[i];
        if (!(m.mask & bit) || strcmp(m.word, "__syncwarp") != 0) continue;
        m.mask &= ~bit;
        if (m.arrived != m.mask) continue;
        if (race_on) race_warp_ordered(m.mask);
        warp.ready |= m.mask;
        m = warp.meetings[--warp.open];
        i--;
    }
}

// Runs threads of the block one after the other for as long as this fiber isn't needed by one that waits.
void run_threads() {
    for (;;) {
        Worker& w = *worker;
        w.launch->call(w.launch->arguments);
        Warp& warp = *w.warp;
        const uint32_t bit = 1u << w.lane;
        warp.exited |= bit;
        w.live--;
        w.progress++;
        if (warp.open) [[unlikely]]
            leave_meetings(w, warp, bit);
        Warp* next = &warp;
        unsigned lane = w.lane + 1;
        if (warp.ready || w.shuffle || lane == 32 || !(warp.unstarted >> lane & 1)) {
            if (!choose(w, next, lane)) return;
        }
        if (next->unstarted >> lane & 1) {  // on this fiber
            start_lane(w, *next, lane, *w.current);
            w.warp = next;
            w.lane = lane;
            threadIdx = w.current->index;
        } else {
            next->ready &= ~(1u << lane);
            w.free_fibers.push_back(w.current);
            resume(w, *next, lane);
        }
    }
}

void fiber_entry() {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (Fiber& main = worker->main; !main.stack_bytes) {  // a worker's first switch is from its own stack
        main.stack = static_cast<unsigned char*>(const_cast<void*>(bottom));
        main.stack_bytes = bytes;
    }
#endif
    for (;;) {
        run_threads();
        Worker& w = *worker;
        Fiber& self = *w.current;
        w.free_fibers.push_back(&self);
        w.current = &w.main;
        jump(self, w.main);
    }
}

std::string thread_text(const Worker& w, unsigned thread) {
    const uint3 t = thread_index(thread, w.launch->block);
    char text[64];
    snprintf(text, sizeof(text), "(%u, %u, %u)", t.x, t.y, t.z);
    return text;
}

std::string where_text(const Where& where) {
    return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

std::string block_text(const Worker& w) {
    char text[96];
    snprintf(text, sizeof(text), ", block (%u, %u, %u)", w.block.x, w.block.y, w.block.z);
    return "kernel " + kernel_name(w.launch->kernel) + text;
}

std::string group_text(const Worker& w, unsigned count, unsigned first_thread, const std::string& what) {
    return "; " + std::to_string(count) + (count == 1 ? " thread " : " threads ") + what + ", the first is " +
           thread_text(w, first_thread);
}

// Threads of the block remain, and none can go on: who waits where, and who is gone.
[[noreturn]] void report_stuck(const Worker& w) {
    std::string text;
    unsigned exited = 0, first_exited = 0;
    for (unsigned i = (w.threads + 31) / 32; i-- > 0;) {
        const Warp& warp = w.warps[i];
        exited += __builtin_popcount(warp.exited);
        if (warp.exited) first_exited = warp.first_thread + __builtin_ctz(warp.exited);
        for (int m = 0; m < warp.open; m++) {
            const Meeting& meeting = warp.meetings[m];
            char mask[32];
            snprintf(mask, sizeof(mask), " with mask %08x", meeting.mask);
            text += group_text(
                w, __builtin_popcount(meeting.arrived), warp.first_thread + __builtin_ctz(meeting.arrived),
                std::string("wait at ") + meeting.word + mask + " (" + where_text(meeting.where) + ")");
        }
    }
    for (const Barrier& b : w.barriers) {
        if (!b.arrived) continue;
        unsigned first = 0;
        while (!(b.waiting[first / 32] >> first % 32 & 1)) first++;
        text += group_text(w, b.arrived, first,
                           std::string("wait at ") + b.word + " for " + std::to_string(b.expected) +
                               " threads (" + where_text(b.where) + ")");
    }
    for (const MemoryBarrier& b : w.memory_barriers) {
        unsigned count = 0, first = 0;
        for (unsigned i = kMaxWarps; i-- > 0;) {
            count += __builtin_popcount(b.waiting[i]);
            if (b.waiting[i]) first = 32 * i + __builtin_ctz(b.waiting[i]);
        }
        if (!count) continue;
        text += group_text(w, count, first,
                           "wait at mbarrier_wait (" + where_text(b.wait_where) + ") for phase " +
                               std::to_string(b.phase) + ", which lacks " + std::to_string(b.pending) +
                               " of " + std::to_string(b.expected) + " arrivals and " +
                               std::to_string(b.bytes) + " bytes");
    }
    if (exited) text += group_text(w, exited, first_exited, "returned");
    stop("%s: the block is stuck: %s", block_text(w).c_str(), text.c_str() + 2);
}

void set_shared_size(Worker& w, size_t bytes) {
    if (!w.shared) {
        w.shared = static_cast<unsigned char*>(aligned_alloc(kSharedAlignment, kSharedBytes));
        if (!w.shared) stop("no memory for simulated shared memory");
    }
    allow(w.shared, kSharedBytes);
    poison(w.shared, bytes);
    memset(w.shared + bytes, kCanary, kCanaryBytes);
    forbid(w.shared + bytes, kSharedBytes - bytes);
}

void check_canary(const Worker& w) {
#if !defined(__SANITIZE_ADDRESS__)
    const unsigned char* end = w.shared + w.launch->shared_bytes;
    for (size_t i = 0; i < kCanaryBytes; i++)
        if (end[i] != kCanary)
            stop("%s: byte %zu of its %zu bytes of shared memory was written (CHECK=memory finds the line)",
                 block_text(w).c_str(), w.launch->shared_bytes + i, w.launch->shared_bytes);
#else
    (void)w;
#endif
}

}  // namespace

std::string thread_of(const Worker& w) {
    return block_text(w) + ", thread " + thread_text(w, w.current->thread);
}

std::string running_thread() { return worker && worker->launch ? thread_of(*worker) : ""; }

void stop(const char* format, ...) {
    char text[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    fflush(stdout);
    const std::string line = "simulator: " + std::string(text) + "\n";
    if (write(STDERR_FILENO, line.data(), line.size()) < 0) { /* nowhere left to say so */
    }
    _exit(1);
}

void fail(Where where, const char* format, ...) {
    char text[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    const std::string who = running_thread();
    stop("%s%s%s (%s)", who.c_str(), who.empty() ? "" : ": ", text, where_text(where).c_str());
}

Meeting& join_meeting(const char* word, uint32_t mask, Where where) {
    Worker& w = *worker;
    Warp& warp = *w.warp;
    const uint32_t bit = 1u << w.lane;
    if (!(mask & bit))
        fail(where, "%s with mask %08x, which leaves out the lane that calls it, %u", word, mask, w.lane);
    if (mask & ~warp.exists)
        fail(where,
             "%s needs the lanes of mask %08x, but the block has %u threads, so that this warp has lanes "
             "%08x only",
             word, mask, w.threads, warp.exists);
    if (mask & warp.exited)
        fail(where,
             "%s needs the lanes of mask %08x, but lanes %08x have returned, thread %s the first of them",
             word, mask, mask & warp.exited,
             thread_text(w, warp.first_thread + __builtin_ctz(mask & warp.exited)).c_str());
    for (int i = 0; i < warp.open; i++) {
        Meeting& m = warp.meetings[i];
        if (m.mask != mask) continue;
        if (strcmp(m.word, word) == 0 && m.where.line() == where.line()) return m;
        fail(where, "%s with mask %08x, while lanes %08x of that mask are at %s (%s): divergent code", word,
             mask, m.arrived, m.word, where_text(m.where).c_str());
    }
    Meeting& m = warp.meetings[warp.open++];
    m = {word, mask, 0, where};
    return m;
}

Barrier& join_barrier(const char* word, int id, unsigned threads, Where where) {
    Worker& w = *worker;
    if (id < 0 || id >= static_cast<int>(kMaxBarriers))
        fail(where, "%s: barrier %d; there are 0 to 15", word, id);
    if (threads == 0 || threads > w.threads || (id != 0 && threads % 32))
        fail(where, "%s: barrier of %u threads in a block of %u; wants a multiple of 32 up to that", word,
             threads, w.threads);
    Barrier& b = w.barriers[id];
    if (!b.arrived) {
        b.word = word;
        b.expected = threads;
        b.where = where;
        memset(b.waiting, 0, sizeof(b.waiting));
        return b;
    }
    if (b.expected != threads)
        fail(where, "%s %d for %u threads, while others wait there for %u (%s)", word, id, threads,
             b.expected, where_text(b.where).c_str());
    // __syncthreads must be reached by the whole block alike; bar.sync only by each warp alike.
    const bool alike = b.where.line() == where.line() && strcmp(b.word, word) == 0;
    if (!alike && (id == 0 || b.waiting[w.warp - w.warps]))
        fail(where, "%s, while %u threads wait at %s of %s: divergent code", word, b.arrived, b.word,
             where_text(b.where).c_str());
    return b;
}

void wake(uint32_t (&waiting)[kMaxWarps]) {
    Worker& w = *worker;
    w.progress++;
    for (unsigned i = 0; i < (w.threads + 31) / 32; i++) {
        if (!waiting[i]) continue;
        w.warps[i].ready |= waiting[i];
        w.ready_warps |= 1u << i;
        waiting[i] = 0;
    }
}

void finish_barrier(Barrier& b) {
    if (race_on) race_barrier_passed(b);
    b.arrived = 0;
    wake(b.waiting);
}

void fence() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (race_on) race_fence();
}

void switch_to_next() {
    Worker& w = *worker;
    Warp* warp;
    unsigned lane;
    if (!choose(w, warp, lane)) {
        if (w.live) report_stuck(w);
        Fiber& self = *w.current;
        w.current = &w.main;
        jump(self, w.main);
        return;
    }
    if (warp->unstarted >> lane & 1) start_lane(w, *warp, lane, *new_fiber(w));
    else warp->ready &= ~(1u << lane);
    resume(w, *warp, lane);
}

void run_block(const Launch& launch, uint3 block) {
    if (!worker) {
        worker = new Worker;
        watch(*worker);
    }
    Worker& w = *worker;
    w.launch = &launch;
    w.block = blockIdx = block;
    blockDim = launch.block;
    gridDim = launch.grid;
    w.threads = w.live = launch.block.x * launch.block.y * launch.block.z;
    w.shuffle = settings().shuffle;
    w.random = settings().seed ^ launch.number << 40 ^ (uint64_t{block.z} << 42) ^ (uint64_t{block.y} << 21) ^
               block.x;
    const unsigned warps = (w.threads + 31) / 32;
    for (unsigned i = 0; i < warps; i++) {
        Warp& warp = w.warps[i];
        const unsigned lanes = w.threads - 32 * i;
        warp.exists = warp.unstarted = lanes >= 32 ? 0xffffffffu : (1u << lanes) - 1;
        warp.ready = warp.exited = 0;
        warp.open = 0;
        warp.first_thread = 32 * i;
    }
    for (Barrier& b : w.barriers) b.arrived = 0;
    w.ready_warps = warps == 32 ? 0xffffffffu : (1u << warps) - 1;
    set_shared_size(w, launch.shared_bytes);
    if (race_on) race_begin_block();

    w.warp = nullptr;
    w.current = &w.main;
    switch_to_next();
    if (w.live) report_stuck(w);
    check_canary(w);
    for (const MemoryBarrier& b : w.memory_barriers)
        if (!b.copies.empty())
            stop(
                "%s: all threads have returned while a bulk copy is under way, which would write into the "
                "next "
                "block's shared memory (%s)",
                block_text(w).c_str(), where_text(b.copies[0].where).c_str());
    w.memory_barriers.clear();
    if (w.async_used) {  // copies that nobody waited for are nobody's
        for (unsigned i = 0; i < w.threads; i++) w.async[i].clear(), w.products[i].clear();
        w.async_used = false;
    }
    w.launch = nullptr;
    w.progress++;
}

}  // namespace sim
