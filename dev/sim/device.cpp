// The simulated GPU itself: settings, properties, errors, and what it accepts as a launch.
#include <unistd.h>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include "runtime.h"

namespace sim {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxBlock[3] = {1024, 1024, 64}, kMaxGrid[3] = {0x7fffffffu, 65535, 65535};

uint64_t number_from_environment(const char* name, uint64_t otherwise) {
    const char* text = getenv(name);
    if (!text || !*text) return otherwise;
    char* end;
    const unsigned long long value = strtoull(text, &end, 10);
    if (*end || *text == '-') stop("%s=%s: wants a whole number", name, text);
    return value;
}

Settings read_settings() {
    Settings s{};
    s.threads = static_cast<int>(
        number_from_environment("SIM_THREADS", std::max(1u, std::thread::hardware_concurrency())));
    s.arch = static_cast<int>(number_from_environment("SIM_ARCH", 90));
    s.memory_bytes = number_from_environment("SIM_MEMORY_BYTES", size_t{16} << 30);
    s.late = number_from_environment("SIM_LATE", 0) != 0;
    const char* seed = getenv("SIM_SHUFFLE");
    s.shuffle = seed && *seed;
    s.seed = number_from_environment("SIM_SHUFFLE", 0);
    s.timeout_s = static_cast<double>(number_from_environment("SIM_TIMEOUT_S", 120));
    if (s.threads < 1 || s.threads > 1024) stop("SIM_THREADS=%d: wants 1 to 1024", s.threads);
    if (s.arch != 80 && s.arch != 90) stop("SIM_ARCH=%d: wants 80 or 90", s.arch);
    return s;
}

thread_local cudaError_t last_error = cudaSuccess;

std::mutex opted_mutex;

// Kernels that were allowed more than 48 KiB of shared memory, and how much.
std::map<const void*, size_t>& opted_in() {
    static auto* sizes = new std::map<const void*, size_t>;
    return *sizes;
}

size_t shared_allowed(const void* kernel) {
    std::lock_guard lock(opted_mutex);
    const auto it = opted_in().find(kernel);
    return it == opted_in().end() ? kStaticSharedLimit : std::max(kStaticSharedLimit, it->second);
}

bool fits(dim3 size, const unsigned (&limit)[3]) {
    return size.x >= 1 && size.y >= 1 && size.z >= 1 && size.x <= limit[0] && size.y <= limit[1] &&
           size.z <= limit[2];
}

}  // namespace

const Settings& settings() {
    static const Settings s = read_settings();
    return s;
}

cudaError_t set_error(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*call)(const void*),
                   std::shared_ptr<const void> arguments) {
    const dim3 block = config.blockDim, grid = config.gridDim;
    if (!kernel) return set_error(cudaErrorInvalidDeviceFunction);
    if (!fits(block, kMaxBlock) || !fits(grid, kMaxGrid) || size_t{block.x} * block.y * block.z > kMaxThreads)
        return set_error(cudaErrorInvalidConfiguration);
    if (config.dynamicSmemBytes > shared_allowed(kernel)) return set_error(cudaErrorInvalidValue);
    const Launch l{call, arguments.get(), kernel, grid, block, config.dynamicSmemBytes, 0};
    return enqueue(config.stream, "kernel", [l, arguments = std::move(arguments)] {
        static std::atomic<uint64_t> launches{0};
        Launch now = l;
        now.number = ++launches;  // a graph's kernel is another launch each time
        run_grid(now);
    });
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (!kernel) return set_error(cudaErrorInvalidDeviceFunction);
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
    if (value < 0 || static_cast<size_t>(value) > shared_limit()) return set_error(cudaErrorInvalidValue);
    std::lock_guard lock(opted_mutex);
    opted_in()[kernel] = static_cast<size_t>(value);
    return cudaSuccess;
}

cudaError_t get_attributes(cudaFuncAttributes* attributes, const void* kernel) {
    *attributes = {};
    attributes->maxThreadsPerBlock = kMaxThreads;
    attributes->maxDynamicSharedSizeBytes = static_cast<int>(shared_allowed(kernel));
    return cudaSuccess;
}

// By threads, blocks and shared memory alone: there are no registers here.
cudaError_t occupancy(int* blocks, const void* kernel, int threads, size_t shared_bytes) {
    if (threads < 1 || threads > static_cast<int>(kMaxThreads)) return set_error(cudaErrorInvalidValue);
    cudaDeviceProp p;
    cudaGetDeviceProperties(&p, 0);
    *blocks =
        std::min(p.maxThreadsPerMultiProcessor / ((threads + 31) / 32 * 32), p.maxBlocksPerMultiProcessor);
    const size_t each = shared_bytes + p.reservedSharedMemPerBlock;
    *blocks = std::min(*blocks, static_cast<int>(p.sharedMemPerMultiprocessor / each));
    if (shared_bytes > shared_allowed(kernel)) *blocks = 0;
    return cudaSuccess;
}

}  // namespace sim

using namespace sim;

cudaError_t cudaFuncGetName(const char** mangled, const void* kernel) {
    *mangled = mangled_name(kernel);
    if (**mangled) return cudaSuccess;
    *mangled = nullptr;
    return set_error(cudaErrorInvalidDeviceFunction);
}

cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : set_error(cudaErrorInvalidDevice);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    if (device != 0) return set_error(cudaErrorInvalidDevice);
    *p = {};
    const bool ampere = settings().arch == 80;
    snprintf(p->name, sizeof(p->name), "CPU simulator, sm_%d", settings().arch);
    p->totalGlobalMem = settings().memory_bytes;
    p->sharedMemPerBlock = kStaticSharedLimit;
    p->sharedMemPerBlockOptin = shared_limit();
    p->sharedMemPerMultiprocessor = shared_limit() + 1024;
    p->reservedSharedMemPerBlock = 1024;
    p->major = settings().arch / 10;
    p->minor = 0;
    p->multiProcessorCount = 8;
    p->warpSize = 32;
    p->maxThreadsPerBlock = kMaxThreads;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    for (int i = 0; i < 3; i++)
        p->maxThreadsDim[i] = static_cast<int>(kMaxBlock[i]),
        p->maxGridSize[i] = static_cast<int>(kMaxGrid[i]);
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->l2CacheSize = (ampere ? 40 : 50) << 20;
    p->concurrentKernels = 1;
    p->asyncEngineCount = 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp p;
    if (const cudaError_t error = cudaGetDeviceProperties(&p, device)) return error;
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; return cudaSuccess;
        case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; return cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor: *value = p.major; return cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor: *value = p.minor; return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
            *value = static_cast<int>(p.sharedMemPerMultiprocessor);
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = static_cast<int>(p.sharedMemPerBlockOptin);
            return cudaSuccess;
    }
    return set_error(cudaErrorInvalidValue);
}

cudaError_t cudaDeviceReset() { return cudaDeviceSynchronize(); }

cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

namespace {
struct ErrorText {
    cudaError_t error;
    const char *name, *text;
};
#define SIM_ERROR(name, text) \
    { name, #name, text }
constexpr ErrorText kErrors[] = {
    SIM_ERROR(cudaSuccess, "no error"),
    SIM_ERROR(cudaErrorInvalidValue, "invalid argument"),
    SIM_ERROR(cudaErrorMemoryAllocation, "out of memory"),
    SIM_ERROR(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    SIM_ERROR(cudaErrorInvalidMemcpyDirection, "invalid copy direction for memcpy"),
    SIM_ERROR(cudaErrorInvalidDeviceFunction, "invalid device function"),
    SIM_ERROR(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    SIM_ERROR(cudaErrorInvalidDevice, "invalid device ordinal"),
    SIM_ERROR(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    SIM_ERROR(cudaErrorNotReady, "device not ready"),
    SIM_ERROR(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    SIM_ERROR(cudaErrorLaunchOutOfResources, "too many resources requested for launch"),
    SIM_ERROR(cudaErrorLaunchFailure, "unspecified launch failure"),
    SIM_ERROR(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"),
    SIM_ERROR(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture"),
    SIM_ERROR(cudaErrorStreamCaptureUnmatched, "capture was not ended in the same stream as it began"),
    SIM_ERROR(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"),
    SIM_ERROR(cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream"),
    SIM_ERROR(cudaErrorStreamCaptureImplicit,
              "operation would make the legacy stream depend on a capturing blocking stream"),
    SIM_ERROR(cudaErrorCapturedEvent,
              "operation not permitted on an event last recorded in a capturing stream"),
};
#undef SIM_ERROR
}  // namespace

const char* cudaGetErrorName(cudaError_t error) {
    for (const ErrorText& e : kErrors)
        if (e.error == error) return e.name;
    return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) {
    for (const ErrorText& e : kErrors)
        if (e.error == error) return e.text;
    return "unrecognized error code";
}
