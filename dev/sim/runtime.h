// What the simulator's own files share; kernels and programs don't see it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include "cuda_runtime.h"

namespace sim {

// Settings, read once from the environment.
struct Settings {
    int threads, arch;
    size_t memory_bytes;
    bool late, shuffle;
    uint64_t seed;
    double timeout_s;
};
const Settings& settings();

inline constexpr size_t kSharedBytes =
    256 * 1024;  // of a worker's shared memory; a block gets the first part

// The limits that differ between compute capabilities 8.0 and 9.0 (CUDA C++ Programming Guide, table of
// capabilities).
inline constexpr size_t kStaticSharedLimit = 48 * 1024;
inline size_t shared_limit() { return settings().arch == 80 ? 163 * 1024 : 227 * 1024; }

inline uint64_t next_random(uint64_t& state) {  // splitmix64 (Steele, Lea, Flood 2014)
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

// Remembers an error for cudaGetLastError, and returns it.
cudaError_t set_error(cudaError_t error);

// One line on standard error, then the end of the process with status 1; for what has no place in the source.
[[noreturn]] void stop(const char* format, ...) __attribute__((format(printf, 1, 2)));

// " in kernel NAME, block (..), thread (..)" of the calling thread, or empty outside a kernel.
std::string running_thread();
std::string thread_of(const Worker& w);

// ---- symbols.cpp ------------------------------------------------------------------------------------------

uintptr_t program_base();                        // where the program's code is loaded
const char* mangled_name(const void* function);  // "" where the program's symbol table doesn't have it
std::string kernel_name(const void* function);   // demangled, without parameters
// "file:line", with " from file:line" for each function it was inlined into, without dev/sim's own; by
// addr2line, or "".
std::string source_line(const void* return_address);

// ---- memory.cpp -------------------------------------------------------------------------------------------

enum class Memory { Pageable, Pinned, Device };
// Where p lies. For pinned and device memory all of p .. p + bytes must be in one allocation, else *inside is
// false.
Memory find_memory(const void* p, size_t bytes, bool* inside);
bool in_arena(const void* p);  // device or pinned memory, or once was
void poison(void* p, size_t bytes);
// For AddressSanitizer: nobody, or again anybody, may touch these bytes.
void forbid(void* p, size_t bytes);
void allow(void* p, size_t bytes);
std::string describe_address(
    const void* p);  // "byte 128 of device memory of 128 bytes, allocated at FILE:LINE"

// ---- stream.cpp -------------------------------------------------------------------------------------------

bool is_capturing();     // any stream
void run_all_streams();  // whatever is still to do
// Runs what comes before this point of the stream; the error where the stream captures.
cudaError_t synchronize(cudaStream_t stream);

// ---- grid.cpp ---------------------------------------------------------------------------------------------

void run_grid(const Launch& launch);                // all blocks, returns when they are done
void run_block(const Launch& launch, uint3 block);  // fibers.cpp; on the calling OS thread

// ---- faults.cpp -------------------------------------------------------------------------------------------

void watch(Worker& w);  // this OS thread's faults are named, and a kernel that makes no progress

// ---- race.cpp ---------------------------------------------------------------------------------------------

void race_begin_launch(const Launch& launch);
void race_begin_block();
void race_fence();
// A copy of 16 bytes; returns the thread's clock. `by_proxy`: through the asynchronous proxy, as bulk copies.
uint32_t race_async_issue(void* to, const void* from, Where where, bool by_proxy);
void race_async_landed(void* to);
void race_touch(const void* p, size_t bytes, bool write, Where where);  // by the running thread
void race_tick();  // what the running thread does from now on is later than what it did
void race_proxy_fence();
void race_memory_barrier_arrive(MemoryBarrier& b);
void race_memory_barrier_passed(const MemoryBarrier& b);
void race_bulk_landed(MemoryBarrier& b, void* to, unsigned thread, uint32_t clock);

}  // namespace sim
