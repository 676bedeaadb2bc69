// Device and pinned memory: poisoned when fresh, bounded, counted, and named when it is lost or freed twice.
#include <sys/mman.h>
#include <unistd.h>
#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>
#include "runtime.h"

namespace sim {
namespace {

constexpr size_t kAlignment = 256;  // as cudaMalloc's
constexpr size_t kPage = 4096;
constexpr unsigned char kGuard = 0xa5;

struct Allocation {
    size_t bytes;
    bool device;
    Where made, freed;  // the calls
    unsigned char* mapping;
    size_t mapped_bytes;
};

struct Heap {
    std::mutex mutex;
    std::map<uintptr_t, Allocation> live, freed;
    size_t device_bytes = 0;
};

Heap& heap() {
    static Heap* instance = new Heap;  // outlives every destructor that may still free something
    return *instance;
}

const char* kind_name(const Allocation& a) { return a.device ? "device" : "pinned host"; }
size_t rounded(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

std::string origin(const Allocation& a) {
    return std::string(kind_name(a)) + " memory of " + std::to_string(a.bytes) + " bytes, allocated at " +
           a.made.file_name() + ":" + std::to_string(a.made.line());
}

// Pages full of poison, as a file in memory: mapped as often as needed, copied when written, so that fresh
// memory costs neither time nor space until it is used.
constexpr size_t kPoisonedBytes = 2 << 20;
int poisoned_file() {
    static const int file = [] {
        const int f = memfd_create("poison", MFD_CLOEXEC);
        const std::vector<uint32_t> words(kPoisonedBytes / 4, kPoison);
        if (f < 0 || write(f, words.data(), kPoisonedBytes) != static_cast<ssize_t>(kPoisonedBytes))
            stop("no memory for the simulated device");
        return f;
    }();
    return file;
}

// Device and pinned memory comes from one range of addresses, each of which is used once in the life of the
// process: so a use after free is seen, and "is this the device's?" is a comparison.
constexpr size_t kArenaBytes = size_t{4} << 40;
struct Arena {
    unsigned char* begin = nullptr;
    size_t used = 0;
} arena;  // written under the heap's lock

unsigned char* reserve(size_t bytes) {
    if (!arena.begin) {
        void* p = mmap(nullptr, kArenaBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) stop("no address space for the simulated device: %s", strerror(errno));
        arena.begin = static_cast<unsigned char*>(p);
    }
    if (bytes > kArenaBytes - arena.used) return nullptr;
    arena.used += bytes;
    return arena.begin + arena.used - bytes;
}

// [poison | front | data | rest of its 256 bytes][page without access]: overruns hit the guard bytes or the
// last page.
bool map_poisoned(Allocation& a, unsigned char** data) {
    const size_t body = rounded(kAlignment + rounded(a.bytes, kAlignment), kPage);
    a.mapped_bytes = body + kPage;
    a.mapping = reserve(a.mapped_bytes);
    if (!a.mapping) return false;
    for (size_t at = 0; at < body; at += kPoisonedBytes) {
        const size_t part = std::min(kPoisonedBytes, body - at);
        if (mmap(a.mapping + at, part, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE,
                 poisoned_file(), 0) == MAP_FAILED)
            return false;
    }
    *data = a.mapping + body - rounded(a.bytes, kAlignment);
    memset(*data - kAlignment, kGuard, kAlignment);
    memset(*data + a.bytes, kGuard, rounded(a.bytes, kAlignment) - a.bytes);
    forbid(a.mapping, static_cast<size_t>(*data - a.mapping));
    forbid(*data + a.bytes, static_cast<size_t>(a.mapping + a.mapped_bytes - (*data + a.bytes)));
    return true;
}

cudaError_t allocate(void** p, size_t bytes, bool device, Where where) {
    *p = nullptr;
    if (is_capturing()) return set_error(cudaErrorStreamCaptureUnsupported);
    if (bytes == 0) return cudaSuccess;
    Heap& h = heap();
    std::lock_guard lock(h.mutex);
    const size_t charged = rounded(bytes, kAlignment);
    if (charged < bytes || (device && charged > settings().memory_bytes - h.device_bytes))
        return set_error(cudaErrorMemoryAllocation);
    Allocation a{bytes, device, where, {}, nullptr, 0};
    unsigned char* data;
    if (!map_poisoned(a, &data)) return set_error(cudaErrorMemoryAllocation);
    h.live.emplace(reinterpret_cast<uintptr_t>(data), a);
    if (device) h.device_bytes += charged;
    *p = data;
    return cudaSuccess;
}

// Something wrote beside the allocation.
void check_guards(uintptr_t key, const Allocation& a) {
#if !defined(__SANITIZE_ADDRESS__)  // which has reported it
    const auto* data = reinterpret_cast<const unsigned char*>(key);
    const size_t tail = rounded(a.bytes, kAlignment) - a.bytes;
    for (size_t i = 0; i < kAlignment; i++) {
        if (data[-1 - static_cast<ptrdiff_t>(i)] != kGuard)
            stop("byte -%zu of %s, was written (CHECK=memory finds the line)", i + 1, origin(a).c_str());
        if (i < tail && data[a.bytes + i] != kGuard)
            stop("byte %zu of %s, was written (CHECK=memory finds the line)", a.bytes + i, origin(a).c_str());
    }
#else
    (void)key, (void)a;
#endif
}

cudaError_t release(void* p, bool device, const char* call, Where where) {
    if (!p) return cudaSuccess;
    if (is_capturing()) return set_error(cudaErrorStreamCaptureUnsupported);
    run_all_streams();  // as CUDA's: freeing waits for the device
    Heap& h = heap();
    std::lock_guard lock(h.mutex);
    const auto key = reinterpret_cast<uintptr_t>(p);
    const auto it = h.live.find(key);
    if (it == h.live.end() || it->second.device != device) {
        if (const auto old = h.freed.find(key); it == h.live.end() && old != h.freed.end())
            fail(where, "%s(%p): freed already at %s:%u; it was %s", call, p, old->second.freed.file_name(),
                 old->second.freed.line(), origin(old->second).c_str());
        fail(where, "%s(%p): not the start of a piece of %s memory", call, p,
             device ? "device" : "pinned host");
    }
    Allocation& a = it->second;
    check_guards(key, a);
    if (device) h.device_bytes -= rounded(a.bytes, kAlignment);
    a.freed = where;
    forbid(a.mapping, a.mapped_bytes);
    mmap(a.mapping, a.mapped_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
         0);
    h.freed.emplace(key, a);
    h.live.erase(it);
    return cudaSuccess;
}

// At the end of a program that says it went well: nothing may be left over.
void report_leaks(int status, void*) {
    if (status != 0) return;
    const Heap& h = heap();
    size_t bytes = 0;
    for (const auto& [key, a] : h.live) {
        check_guards(key, a);
        bytes += a.bytes;
    }
    if (!h.live.empty())
        stop("%zu pieces of memory, %zu bytes, were not freed at exit; the first is %s", h.live.size(), bytes,
             origin(h.live.begin()->second).c_str());
}

// Registered before everything else, so that it comes after every destructor.
__attribute__((constructor(101))) void watch_exit() { on_exit(report_leaks, nullptr); }

}  // namespace

bool in_arena(const void* p) {
    return reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(arena.begin) < arena.used;
}

void poison(void* p, size_t bytes) {
    auto* out = static_cast<unsigned char*>(p);
    const uint64_t pattern = uint64_t{kPoison} << 32 | kPoison;
    size_t i = 0;
    for (; i + 8 <= bytes; i += 8) memcpy(out + i, &pattern, 8);
    memcpy(out + i, &pattern, bytes - i);
}

void forbid(void* p, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(p, bytes);
#else
    (void)p, (void)bytes;
#endif
}

void allow(void* p, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(p, bytes);
#else
    (void)p, (void)bytes;
#endif
}

std::string describe_address(const void* p) {
    const auto address = reinterpret_cast<uintptr_t>(p);
    char text[64];
    if (worker && worker->shared && worker->launch) {
        const size_t offset = address - reinterpret_cast<uintptr_t>(worker->shared),
                     bytes = worker->launch->shared_bytes;
        if (offset < kSharedBytes) {
            snprintf(text, sizeof(text), "byte %zu of the block's %zu of shared memory", offset, bytes);
            return text;
        }
    }
    Heap& h = heap();
    for (const auto* pieces : {&h.live, &h.freed}) {
        for (const auto& [key, a] : *pieces) {
            const auto begin = reinterpret_cast<uintptr_t>(a.mapping);
            if (address < begin || address >= begin + a.mapped_bytes) continue;
            snprintf(text, sizeof(text), "byte %lld of ", static_cast<long long>(address - key));
            std::string all = text + origin(a);
            if (pieces == &h.freed)
                all +=
                    ", freed at " + std::string(a.freed.file_name()) + ":" + std::to_string(a.freed.line());
            return all;
        }
    }
    return "memory that is not the device's";
}

Memory find_memory(const void* p, size_t bytes, bool* inside) {
    Heap& h = heap();
    std::lock_guard lock(h.mutex);
    const auto address = reinterpret_cast<uintptr_t>(p);
    *inside = true;
    auto it = h.live.upper_bound(address);
    if (it == h.live.begin()) return Memory::Pageable;
    --it;
    const size_t offset = address - it->first, size = it->second.bytes;
    if (offset >= size) return Memory::Pageable;
    *inside = bytes <= size - offset;
    return it->second.device ? Memory::Device : Memory::Pinned;
}

}  // namespace sim

using namespace sim;

cudaError_t cudaMalloc(void** p, size_t bytes, Where where) { return allocate(p, bytes, true, where); }
cudaError_t cudaFree(void* p, Where where) { return release(p, true, "cudaFree", where); }
cudaError_t cudaMallocHost(void** p, size_t bytes, Where where) { return allocate(p, bytes, false, where); }
cudaError_t cudaFreeHost(void* p, Where where) { return release(p, false, "cudaFreeHost", where); }

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
    Heap& h = heap();
    std::lock_guard lock(h.mutex);
    *total_bytes = settings().memory_bytes;
    *free_bytes = settings().memory_bytes - h.device_bytes;
    return cudaSuccess;
}

namespace {

// Whether the two ends of a copy are what `kind` says, and in bounds.
cudaError_t check_copy(const void* to, const void* from, size_t bytes, cudaMemcpyKind kind, Memory* to_memory,
                       Memory* from_memory) {
    bool to_inside, from_inside;
    *to_memory = find_memory(to, bytes, &to_inside);
    *from_memory = find_memory(from, bytes, &from_inside);
    if (!to_inside || !from_inside) return cudaErrorInvalidValue;
    if (kind == cudaMemcpyDefault) return cudaSuccess;
    const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    const bool right =
        (*to_memory == Memory::Device) == to_device && (*from_memory == Memory::Device) == from_device;
    return right ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    Memory to_memory, from_memory;
    if (bytes == 0) return cudaSuccess;
    if (const cudaError_t error = check_copy(to, from, bytes, kind, &to_memory, &from_memory))
        return set_error(error);
    cudaStreamCaptureStatus capture;
    if (const cudaError_t error = cudaStreamIsCapturing(stream, &capture)) return error;
    const bool pageable = to_memory == Memory::Pageable || from_memory == Memory::Pageable;
    if (pageable && capture != cudaStreamCaptureStatusNone)
        return set_error(cudaErrorStreamCaptureUnsupported);
    if (!pageable) return enqueue(stream, "copy", [=] { memmove(to, from, bytes); });
    // As CUDA does: pageable memory is read before the call returns, and has been written when it returns.
    if (from_memory == Memory::Pageable && to_memory == Memory::Device) {
        auto staged = std::make_shared<std::string>(static_cast<const char*>(from), bytes);
        return enqueue(stream, "copy", [=] { memcpy(to, staged->data(), staged->size()); });
    }
    if (const cudaError_t error = enqueue(stream, "copy", [=] { memmove(to, from, bytes); })) return error;
    return synchronize(stream);
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    if (is_capturing()) return set_error(cudaErrorStreamCaptureImplicit);
    if (const cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, nullptr)) return error;
    return synchronize(nullptr);
}

cudaError_t cudaMemsetAsync(void* p, int byte, size_t bytes, cudaStream_t stream) {
    bool inside;
    if (bytes == 0) return cudaSuccess;
    if (find_memory(p, bytes, &inside) != Memory::Device || !inside) return set_error(cudaErrorInvalidValue);
    return enqueue(stream, "memset", [=] { memset(p, byte, bytes); });
}

cudaError_t cudaMemset(void* p, int byte, size_t bytes) { return cudaMemsetAsync(p, byte, bytes, nullptr); }
