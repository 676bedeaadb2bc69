// How a block runs: its threads are fibers on one OS thread; a warp's lanes meet where CUDA makes them meet.
//
// A thread that never meets another costs a function call: one fiber runs such threads one after the other.
// The first thread that has to wait gives its fiber up, and the next thread begins on another one. A meeting
// point (a barrier, a shuffle, a tensor-core word) is: leave your operands in the warp's Exchange, switch to
// the next lane; whoever comes last does the work for all lanes, so that a warp costs one switch a lane.
// Lanes of a warp run one after the other, which keeps their 32 stacks in the cache.
//
// All of it is also a checker: each meeting has a word, a mask and a place in the source, which must agree;
// where nobody can go on, the block is stuck and report_stuck() says who waits for whom. Nothing can hang.
#pragma once
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <vector>
#include "switch.h"
#include "types.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Under -fsanitize=thread, which feeds race.cpp, the simulator's own code is not instrumented.
#define SIM_QUIET __attribute__((no_sanitize("thread")))

namespace sim {

using Where = std::source_location;

inline constexpr unsigned kMaxWarps = 32, kMaxBarriers = 16;
inline constexpr uint32_t kPoison =
    0xfff1fff1u;  // fresh memory: a NaN as float, as bf16 and as double; absurd as int

// A launched grid. `call` runs one thread: it calls the kernel with the arguments that `arguments` points to.
struct Launch {
    void (*call)(const void* arguments);
    const void* arguments;
    const void* kernel;  // its address, for its name
    dim3 grid, block;
    size_t shared_bytes;
    uint64_t number;  // of the launch, counted from 1
};

struct Fiber {
    Context context = nullptr;       // where it stopped
    unsigned char* stack = nullptr;  // lowest address
    size_t stack_bytes = 0;
    void* fake_stack = nullptr;  // AddressSanitizer's
    unsigned thread = 0;         // of the block, linear
    uint3 index{};               // threadIdx
};

// Lanes of one warp that have come to the same word, and those that are still to come.
struct Meeting {
    const char* word;
    uint32_t mask, arrived;
    Where where;
};

// What lanes hand to the lane that does the work, and get back. A lane owns its own places.
struct Exchange {
    uint64_t in[32], out[32];
    const void* row[32];
    int source[32];
    alignas(64) uint32_t matrix[4][32];  // ldmatrix
    alignas(64) float a[16][16];         // mma
    alignas(64) float b[16][8];
    alignas(64) float d[16][8];
};

struct Warp {
    uint32_t exists, unstarted, ready, exited;  // lanes; what is in none of the last three waits or runs
    uint32_t first_thread;
    int open;  // meetings under way
    Meeting meetings[32];
    Fiber* fiber[32];
    Exchange exchange;
};

// bar.sync: threads wait until `expected` have come.
struct Barrier {
    const char* word;
    unsigned expected, arrived;
    Where where;
    uint32_t waiting[kMaxWarps];
};

// cp.async of one thread: copies in the order of their issue, `groups` holds how many copies each closed
// group ends at.
struct AsyncCopies {
    struct Copy {
        void* to;
        const void* from;  // null: zeros
    };
    std::vector<Copy> copies;
    std::vector<size_t> group_ends;
    size_t landed = 0, groups_landed = 0;
    void clear() {
        copies.clear();
        group_ends.clear();
        landed = groups_landed = 0;
    }
};

// Warpgroup products of one thread: started, closed into a group, done at the wait. Until then the
// accumulators that the kernel holds are poison, and their values lie here.
struct WarpgroupProducts {
    struct Product {
        size_t sum;  // of `sums`
        uint32_t a[4];
        const unsigned char* left;  // the left operand's 64 rows, null where it is a
        const unsigned char* tile;
        int at;  // row, or column where transposed
        bool transposed;
        Where where;
    };
    struct Sum {
        float (*held)[4];  // the kernel's
        float values[8][4];
    };
    std::vector<Sum> sums;
    std::vector<Product> products;
    std::vector<size_t> group_ends;  // how many of `products` each closed group ends at
    bool fenced = false;             // since the last wait
    void clear() { *this = {}; }
};

// A barrier in shared memory (mbarrier; bulk.cpp), with the bulk copies that count at it.
struct MemoryBarrier {
    struct Copy {  // of 16 bytes
        void* to;
        const void* from;  // null: zeros
        Where where;
        unsigned thread;
        uint32_t clock;  // of the thread at the issue, for the race record
    };
    const void* address;
    unsigned expected, pending;  // arrivals of a phase, and those that the running one lacks
    int64_t bytes;               // announced for the running phase, and not come
    uint64_t phase;              // the running one; those before are complete
    unsigned thread;             // that initialised it
    bool fenced;                 // so that copies see it
    Where where, wait_where;
    uint32_t waiting[kMaxWarps];  // lanes
    std::vector<int64_t> waited;  // the last phase that each thread has waited for, -1: none
    std::vector<Copy> copies;
    std::vector<uint32_t> clocks, complete_clocks;  // what those know who have arrived; the race record's
};

// What one OS thread needs to run blocks; there is one for each core of the pool, and one for the caller.
struct Worker {
    const Launch* launch = nullptr;  // null while no kernel runs
    Warp* warp = nullptr;            // of the running thread
    unsigned lane = 0;
    Fiber* current = nullptr;
    bool shuffle = false;
    bool async_used = false;   // a thread of this block has issued a cp.async
    uint32_t ready_warps = 0;  // warps with a lane that is ready or unstarted
    unsigned threads = 0, live = 0;
    uint3 block{};
    uint64_t random = 0;
    uint64_t progress = 0;  // counts up while threads come and go, for the watchdog
    unsigned char* shared = nullptr;
    Fiber main;
    std::vector<Fiber*> free_fibers;
    Warp warps[kMaxWarps];
    Barrier barriers[kMaxBarriers];
    AsyncCopies async[kMaxWarps * 32];
    WarpgroupProducts products[kMaxWarps * 32];
    std::vector<MemoryBarrier> memory_barriers;
};
inline constinit thread_local Worker* worker = nullptr;

// ---- slow paths, fibers.cpp -------------------------------------------------------------------------------

// Ends the process with one line: kernel, block, thread, what is wrong, and where in the source.
[[noreturn]] void fail(Where where, const char* format, ...) __attribute__((format(printf, 2, 3)));

Meeting& join_meeting(const char* word, uint32_t mask,
                      Where where);         // checks, and finds or opens the meeting
void wake(uint32_t (&waiting)[kMaxWarps]);  // these lanes of the block can go on, and wait no more
void switch_to_next();                      // another warp, an unstarted lane, or the end
void finish_barrier(Barrier& barrier);
void fence();
Barrier& join_barrier(const char* word, int id, unsigned threads, Where where);

// The race record, race.cpp; does nothing unless the program was compiled with -fsanitize=thread.
extern bool race_on;
void race_warp_ordered(uint32_t mask);
void race_barrier_passed(const Barrier& barrier);
void race_read(const void* p, size_t bytes, unsigned lane, Where where);
void race_proxy_read(const void* p, size_t bytes, Where where);

// ---- switching --------------------------------------------------------------------------------------------

SIM_QUIET __attribute__((always_inline)) inline void jump(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
    switch_context(from.context, to.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

SIM_QUIET inline void resume(Worker& w, Warp& warp, unsigned lane) {
    Fiber& from = *w.current;
    Fiber& to = *warp.fiber[lane];
    w.warp = &warp;
    w.lane = lane;
    w.current = &to;
    threadIdx = to.index;
    if (&from != &to) jump(from, to);
}

// The running lane can't go on: another one does.
SIM_QUIET inline void wait() {
    Worker& w = *worker;
    Warp& warp = *w.warp;
    if (const uint32_t ready = warp.ready; ready && !w.shuffle) [[likely]] {
        warp.ready = ready & (ready - 1);
        resume(w, warp, __builtin_ctz(ready));
    } else {
        switch_to_next();
    }
}

// ---- meeting ----------------------------------------------------------------------------------------------

// The lanes of `mask` meet; the last one calls work(exchange) before any goes on.
template <class Work>
SIM_QUIET inline void meet(const char* word, uint32_t mask, Where where, Work work) {
    Worker& w = *worker;
    Warp& warp = *w.warp;
    const uint32_t bit = 1u << w.lane;
    Meeting* m = &warp.meetings[0];
    if (warp.open != 1 || m->word != word || m->mask != mask || m->where.line() != where.line() ||
        !(mask & bit)) [[unlikely]]
        m = &join_meeting(word, mask, where);
    m->arrived |= bit;
    if (m->arrived != mask) {
        wait();
        return;
    }
    *m = warp.meetings[--warp.open];
    work(warp.exchange);
    warp.ready |= mask & ~bit;
    if (w.shuffle) [[unlikely]] {
        warp.ready |= bit;
        wait();
    }
}

// `threads` threads of the block meet at barrier `id`.
SIM_QUIET inline void barrier(const char* word, int id, unsigned threads, Where where) {
    Worker& w = *worker;
    Barrier* b = &w.barriers[0];
    if (id != 0 || b->arrived == 0 || b->word != word || b->where.line() != where.line()) [[unlikely]]
        b = &join_barrier(word, id, threads, where);
    b->waiting[w.warp - w.warps] |= 1u << w.lane;
    if (++b->arrived == b->expected) finish_barrier(*b);
    wait();
}

// ---- helpers of the words ---------------------------------------------------------------------------------

// p .. p + bytes must be the block's shared memory, and p a multiple of bytes.
SIM_QUIET inline void check_shared(const void* p, size_t bytes, const char* word, Where where) {
    const Worker& w = *worker;
    const size_t offset = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(w.shared);
    if (offset + bytes > w.launch->shared_bytes || offset + bytes < bytes) [[unlikely]]
        fail(where, "%s: %p is not in the block's %zu bytes of shared memory (offset %lld)", word, p,
             w.launch->shared_bytes, static_cast<long long>(offset));
    if (offset % bytes) [[unlikely]]
        fail(where, "%s: shared memory at offset %zu, which is not a multiple of %zu", word, offset, bytes);
}

// cp.async of 16 bytes (words.cpp): issued, closed into a group, and landed until `newest` groups are left.
void async_issue(void* shared_dst, const void* global_src, Where where);
void async_commit();
void async_wait(size_t newest);

// Barriers in shared memory and bulk copies (bulk.cpp). land_bulk_copies: nobody can go on; the copies of a
// barrier that somebody waits at land, and true where there was one.
void memory_barrier_init(const void* address, unsigned arrivals, Where where);
void memory_barrier_fence();
void memory_barrier_arrive(const void* address, unsigned bytes, const char* word, Where where);
void memory_barrier_wait(const void* address, unsigned parity, Where where);
bool land_bulk_copies(Worker& w);
void bulk_issue(void* shared_dst, const void* global_src, unsigned bytes, const void* barrier, Where where);

// Starts the warpgroup product `held` = or += a, or the rows at `left`, times a tile (words.cpp); the wait
// does it.
void product_issue(float (&held)[8][4], const uint32_t* a, const unsigned char* left,
                   const unsigned char* tile, int at, bool transposed, bool add, Where where);

}  // namespace sim
