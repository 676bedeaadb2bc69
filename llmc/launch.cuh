// launch(): the only way a kernel is started. It takes the stream from Gpu, so that none can be forgotten,
// asks for the shared memory that the kernel's struct needs, checks the result, and names kernel and call
// site in the error.
//
//     struct RowSumShared { float partial[32]; };
//     __global__ void row_sum_kernel(float* out, const float* inp, int C) {
//         RowSumShared& s = shared<RowSumShared>(); ...
//     }
//     launch<RowSumShared>(row_sum_kernel, {rows, 256}, gpu, out, inp, C);
//
// Kernels with no shared memory leave the type out. Triple angle brackets and __shared__ are used nowhere
// else: so g++ parses every file for the simulator, which poisons, bounds and watches what shared<T>() hands
// out.
#pragma once
#include <cxxabi.h>  // demangled kernel names in errors
#include <cstdlib>
#include <string>
#include <string_view>
#include <type_traits>
#include <ptx.cuh>
#include "llmc/gpu.cuh"

// The block's shared memory as the kernel's own struct; uninitialised. T must be what launch<T>() was given.
template <class T>
__device__ inline T& shared() {
    static_assert(std::is_trivially_default_constructible_v<T>, "shared memory has no constructors");
    return *reinterpret_cast<T*>(ptx::dynamic_shared());
}

// Grid and block of a launch, and the place in the source that asks for it.
struct LaunchShape {
    dim3 grid, block;
    const char* file;
    int line;
    LaunchShape(dim3 grid_, dim3 block_, const char* file_ = __builtin_FILE(), int line_ = __builtin_LINE())
        : grid(grid_), block(block_), file(file_), line(line_) {}
    template <class Grid>
    requires std::is_integral_v<Grid>  // 64-bit counts are checked here, not truncated on the way to dim3
    LaunchShape(Grid grid_, unsigned block_, const char* file_ = __builtin_FILE(),
                int line_ = __builtin_LINE())
        : grid(static_cast<unsigned>(grid_)), block(block_), file(file_), line(line_) {
        if (grid_ <= 0 || static_cast<unsigned long long>(grid_) > 0x7fffffffull)
            fatal("%s:%d: a grid of %lld blocks was asked for; a launch takes 1 to 2^31 - 1", file, line,
                  static_cast<long long>(grid_));
    }
};

// The demangled name of a kernel, without its parameter list.
inline std::string kernel_name(const void* kernel) {
    const char* mangled = nullptr;
    if (cudaFuncGetName(&mangled, kernel) != cudaSuccess || !mangled) return "kernel";
    int status = 0;
    char* text = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
    std::string name = status == 0 ? text : mangled;
    std::free(text);
    constexpr std::string_view kAnonymous = "(anonymous namespace)::";
    for (size_t at = 0; (at = name.find(kAnonymous)) != std::string::npos;) name.erase(at, kAnonymous.size());
    if (name.starts_with("void ")) name.erase(0, 5);  // a template's name comes with its return type
    return name.substr(0, name.find('('));
}

// Starts `kernel` on gpu.stream with sizeof(Shared) bytes of shared memory (none for void). Asynchronous;
// arguments are converted to the kernel's parameter types. A launch that CUDA refuses is fatal, with the call
// site.
template <class Shared = void, class... Parameters, class... Arguments>
inline void launch(void (*kernel)(Parameters...), LaunchShape shape, const Gpu& gpu,
                   Arguments&&... arguments) {
    static_assert(sizeof...(Parameters) == sizeof...(Arguments),
                  "as many arguments as the kernel has parameters");
    constexpr size_t kStaticLimit = 48 * 1024;  // more than this must be opted into
    size_t shared_bytes = 0;
    if constexpr (!std::is_void_v<Shared>) shared_bytes = sizeof(Shared);
    const void* address = reinterpret_cast<const void*>(kernel);
    cudaError_t status = cudaSuccess;
    if (shared_bytes > kStaticLimit)
        status = cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shared_bytes));
    cudaLaunchConfig_t config{};
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = gpu.stream;
    if (status == cudaSuccess)
        status = cudaLaunchKernelEx(&config, kernel,
                                    static_cast<Parameters>(std::forward<Arguments>(arguments))...);
    if (status == cudaSuccess) return;
    fatal(
        "%s:%d: launch of %s with grid (%u, %u, %u), block (%u, %u, %u), %zu bytes of shared memory failed: "
        "%s (%s)",
        shape.file, shape.line, kernel_name(address).c_str(), shape.grid.x, shape.grid.y, shape.grid.z,
        shape.block.x, shape.block.y, shape.block.z, shared_bytes, cudaGetErrorName(status),
        cudaGetErrorString(status));
}

// How many blocks of `kernel` the whole GPU holds at once: the grid of a persistent kernel.
template <class Shared = void, class... Parameters>
inline int resident_blocks(void (*kernel)(Parameters...), int threads, const Gpu& gpu) {
    size_t shared_bytes = 0;
    if constexpr (!std::is_void_v<Shared>) shared_bytes = sizeof(Shared);
    if (shared_bytes > 48 * 1024)
        CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)));
    int per_sm = 0;
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads, shared_bytes));
    if (per_sm == 0)
        fatal("%s does not fit on an SM", kernel_name(reinterpret_cast<const void*>(kernel)).c_str());
    return per_sm * gpu.properties.multiProcessorCount;
}
