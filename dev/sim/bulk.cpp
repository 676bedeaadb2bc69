// Barriers in shared memory (mbarrier) and the bulk copies that count at them, TMA's among them.
//
// A copy is remembered at its issue, where its destination becomes poison, and lands when somebody waits for
// its barrier and no thread of the block can go on without it: the latest moment that CUDA allows. So who
// reads without a wait of its own sees poison, even where another thread's wait would have brought the bytes;
// and who starts a copy into a tile that others still read gives them poison.
#include <cstring>
#include "cuda.h"
#include "runtime.h"

namespace sim {
namespace {

constexpr unsigned kPiece = 16;                        // bytes that move as one
constexpr unsigned kMostBytes = (1u << 20) - 1;        // that a phase can wait for
constexpr uint64_t kBarrierMark = 0x2172656972726162;  // what a barrier's eight bytes hold here

MemoryBarrier& find_barrier(const void* address, const char* word, Where where) {
    check_shared(address, sizeof(uint64_t), word, where);
    for (MemoryBarrier& b : worker->memory_barriers) {
        if (b.address != address) continue;
        uint64_t mark;
        memcpy(&mark, address, sizeof(mark));
        if (mark != kBarrierMark) fail(where, "%s: the barrier's eight bytes were written by somebody", word);
        if (race_on) race_touch(address, sizeof(uint64_t), false, where);
        return b;
    }
    fail(where, "%s: nobody has initialised the barrier at offset %zu", word,
         static_cast<size_t>(static_cast<const unsigned char*>(address) - worker->shared));
}

void complete_phase(MemoryBarrier& b) {
    if (race_on) b.complete_clocks = b.clocks;
    b.phase++;
    b.pending = b.expected;
    wake(b.waiting);
}

// The barrier's copies land, which ends its phase where all arrivals are there.
void land(MemoryBarrier& b) {
    for (const MemoryBarrier::Copy& c : b.copies) {
        if (race_on) race_bulk_landed(b, c.to, c.thread, c.clock);
        if (c.from) memcpy(c.to, c.from, kPiece);
        else memset(c.to, 0, kPiece);
        b.bytes -= kPiece;
    }
    if (b.bytes < 0)
        fail(b.copies.back().where,
             "bulk copies brought %lld bytes more than mbarrier_arrive_expect announced for the phase",
             static_cast<long long>(-b.bytes));
    b.copies.clear();
    if (b.pending == 0 && b.bytes == 0) complete_phase(b);
}

bool has_waiters(const MemoryBarrier& b) {
    for (const uint32_t lanes : b.waiting)
        if (lanes) return true;
    return false;
}

void issue_piece(MemoryBarrier& b, void* to, const void* from, Where where) {
    const unsigned thread = worker->current->thread;
#if defined(__SANITIZE_ADDRESS__)
    if (void* bad = from ? __asan_region_is_poisoned(const_cast<void*>(from), kPiece) : nullptr)
        fail(where, "a bulk copy reads %s", describe_address(bad).c_str());
#endif
    const uint32_t clock = race_on ? race_async_issue(to, from, where, true) : 0;
    poison(to, kPiece);
    b.copies.push_back({to, from, where, thread, clock});
}

MemoryBarrier& copy_barrier(const void* address, const char* word, Where where) {
    MemoryBarrier& b = find_barrier(address, word, where);
    if (!b.fenced)
        fail(where, "%s: the barrier was initialised without a fence_async_proxy after it (%s:%u)", word,
             b.where.file_name(), b.where.line());
    return b;
}

// What cuTensorMapEncodeTiled puts into a map.
struct TensorMap {
    uint64_t mark;
    const unsigned char* address;
    uint64_t shape[3], strides[2];  // elements; bytes
    uint32_t box[3];
};
constexpr uint64_t kMark = 0x70616d726f736e74;
constexpr uint64_t kElementBytes = 2, kSwizzleBytes = 128;
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

}  // namespace

void memory_barrier_init(const void* address, unsigned arrivals, Where where) {
    Worker& w = *worker;
    check_shared(address, sizeof(uint64_t), "mbarrier_init", where);
    if (arrivals == 0 || arrivals >= 1u << 20)
        fail(where, "mbarrier_init for %u arrivals; wants 1 to 2^20 - 1", arrivals);
    for (const MemoryBarrier& b : w.memory_barriers)
        if (b.address == address)
            fail(where, "mbarrier_init: the barrier was initialised before (%s:%u)", b.where.file_name(),
                 b.where.line());
    if (race_on) race_touch(address, sizeof(uint64_t), true, where);
    MemoryBarrier b{};
    b.address = address;
    b.expected = b.pending = arrivals;
    b.thread = w.current->thread;
    b.where = where;
    b.waited.assign(w.threads, -1);
    memcpy(const_cast<void*>(address), &kBarrierMark, sizeof(kBarrierMark));
    w.memory_barriers.push_back(b);
}

void memory_barrier_fence() {
    for (MemoryBarrier& b : worker->memory_barriers)
        if (b.thread == worker->current->thread) b.fenced = true;
    if (race_on) race_proxy_fence();
}

void memory_barrier_arrive(const void* address, unsigned bytes, const char* word, Where where) {
    MemoryBarrier& b = find_barrier(address, word, where);
    if (b.pending == 0)
        fail(where,
             "%s: all %u arrivals of the barrier's phase are there and its bytes are still to come: "
             "nobody has waited for them",
             word, b.expected);
    if (race_on) race_memory_barrier_arrive(b);
    b.bytes += bytes;
    if (bytes > kMostBytes || b.bytes > kMostBytes)
        fail(where, "%s: %lld bytes for one phase; a barrier counts to %u", word,
             static_cast<long long>(b.bytes), kMostBytes);
    if (--b.pending == 0 && b.bytes == 0 && b.copies.empty()) complete_phase(b);
}

void memory_barrier_wait(const void* address, unsigned parity, Where where) {
    Worker& w = *worker;
    if (parity > 1) fail(where, "mbarrier_wait for parity %u; wants 0 or 1", parity);
    MemoryBarrier& b = find_barrier(address, "mbarrier_wait", where);
    // Parity tells two phases apart: the running one, which is waited for, and the one before, which passes.
    const bool passes = b.phase % 2 != parity;
    const int64_t wanted = static_cast<int64_t>(b.phase) - passes;
    int64_t& waited = b.waited[w.current->thread];
    if (wanted != waited + 1)
        fail(where,
             "mbarrier_wait for parity %u: here that is phase %lld, and the last that this thread has waited "
             "for is %lld; who leaves one out or waits twice can't know which phase the parity stands for",
             parity, static_cast<long long>(wanted), static_cast<long long>(waited));
    waited = wanted;
    if (!passes) {
        b.waiting[w.warp - w.warps] |= 1u << w.lane;
        b.wait_where = where;
        wait();  // meanwhile the list of barriers may grow, and b move
    }
    if (race_on) race_memory_barrier_passed(find_barrier(address, "mbarrier_wait", where));
}

bool land_bulk_copies(Worker& w) {
    std::vector<MemoryBarrier*> candidates;
    for (MemoryBarrier& b : w.memory_barriers)
        if (!b.copies.empty() && has_waiters(b)) candidates.push_back(&b);
    if (candidates.empty()) return false;
    // Copies need not come in the order of their issue: the last barrier is first, or any.
    land(*candidates[w.shuffle ? next_random(w.random) % candidates.size() : candidates.size() - 1]);
    return true;
}

void bulk_issue(void* to, const void* from, unsigned bytes, const void* barrier, Where where) {
    check_shared(to, kPiece, "bulk_load", where);
    if (bytes == 0 || bytes % kPiece || reinterpret_cast<uintptr_t>(from) % kPiece)
        fail(where, "bulk_load of %u bytes from %p; wants multiples of 16, and some bytes", bytes, from);
    check_shared(static_cast<unsigned char*>(to) + bytes - kPiece, kPiece, "bulk_load", where);
    MemoryBarrier& b = copy_barrier(barrier, "bulk_load", where);
    for (unsigned i = 0; i < bytes; i += kPiece)
        issue_piece(b, static_cast<unsigned char*>(to) + i, static_cast<const unsigned char*>(from) + i,
                    where);
    if (race_on) race_tick();
}

void box_issue(void* to, const CUtensorMap& map, const int (&at)[3], const void* barrier, Where where) {
    TensorMap m;
    memcpy(&m, &map, sizeof(m));
    if (m.mark != kMark) fail(where, "bulk_load_box: no tensor map that cuTensorMapEncodeTiled made");
    check_shared(to, kSwizzleBytes, "bulk_load_box", where);
    const size_t row_bytes = m.box[0] * kElementBytes, box_bytes = row_bytes * m.box[1] * m.box[2];
    unsigned char* const first = static_cast<unsigned char*>(to);
    check_shared(first + box_bytes - kPiece, kPiece, "bulk_load_box", where);
    MemoryBarrier& b = copy_barrier(barrier, "bulk_load_box", where);
    for (size_t i = 0; i < box_bytes; i += kPiece) {  // rows of the box follow each other
        const int64_t index[3] = {at[0] + static_cast<int64_t>(i % row_bytes / kElementBytes),
                                  at[1] + static_cast<int64_t>(i / row_bytes % m.box[1]),
                                  at[2] + static_cast<int64_t>(i / row_bytes / m.box[1])};
        bool inside = true;
        for (int d = 0; d < 3; d++)
            inside = inside && index[d] >= 0 && index[d] < static_cast<int64_t>(m.shape[d]);
        const size_t step =
            inside ? index[0] * kElementBytes + index[1] * m.strides[0] + index[2] * m.strides[1] : 0;
        // The swizzle is one of addresses: bits 4 .. 6 ^= bits 7 .. 9.
        const size_t offset = first + i - worker->shared, swizzled = offset ^ (offset >> 7 & 7) << 4;
        issue_piece(b, worker->shared + swizzled, inside ? m.address + step : nullptr, where);
    }
    if (race_on) race_tick();
}

}  // namespace sim

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* shape, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
    using namespace sim;
    bool good = map && reinterpret_cast<uintptr_t>(map) % 64 == 0 && address &&
                reinterpret_cast<uintptr_t>(address) % 16 == 0 && rank == 3;
    good = good && type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
           swizzle == CU_TENSOR_MAP_SWIZZLE_128B && promotion == CU_TENSOR_MAP_L2_PROMOTION_L2_128B &&
           fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
    for (int d = 0; good && d < 3; d++)
        good = shape[d] >= 1 && shape[d] <= uint64_t{1} << 32 && box[d] >= 1 && box[d] <= 256 &&
               element_strides[d] == 1;
    for (int d = 0; good && d < 2; d++) good = strides[d] % 16 == 0 && strides[d] < uint64_t{1} << 40;
    // Pieces of 16 bytes must not straddle the tensor's edge, which is stricter than CUDA.
    good = good && box[0] * kElementBytes == kSwizzleBytes && shape[0] * kElementBytes % kPiece == 0;
    if (!good) return CUDA_ERROR_INVALID_VALUE;
    const TensorMap m{kMark,
                      static_cast<const unsigned char*>(address),
                      {shape[0], shape[1], shape[2]},
                      {strides[0], strides[1]},
                      {box[0], box[1], box[2]}};
    memcpy(map, &m, sizeof(m));
    return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long,
                                    cudaDriverEntryPointQueryResult* result) {
    const bool known = strcmp(name, "cuTensorMapEncodeTiled") == 0;
    *function = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
    *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
