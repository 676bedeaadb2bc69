// Planted bugs: launches that a GPU refuses. llmc/launch.cuh names the kernel and the call site.
#include "planted.h"

namespace {

struct HugeShared {
    unsigned char bytes[228 * 1024];  // one KiB more than compute capability 9.0 gives a block
};
struct LargeShared {
    unsigned char bytes[200 * 1024];  // fits 9.0, not 8.0
};

__global__ void nothing_kernel(int) {}

cudaError_t launch_raw(size_t shared_bytes, Gpu& gpu) {
    cudaLaunchConfig_t config{};
    config.gridDim = 1;
    config.blockDim = 32;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = gpu.stream;
    return cudaLaunchKernelEx(&config, nothing_kernel, 0);
}

void too_many_threads(Gpu& gpu) {
    launch(nothing_kernel, {1, 1025}, gpu, 0);  // BUG too_many_threads
}
void too_many_threads_3d(Gpu& gpu) {
    launch(nothing_kernel, {dim3(1), dim3(32, 8, 8)}, gpu, 0);  // BUG too_many_threads_3d
}
void block_too_deep(Gpu& gpu) {
    launch(nothing_kernel, {dim3(1), dim3(1, 1, 65)}, gpu, 0);  // BUG block_too_deep
}
void grid_too_high(Gpu& gpu) {
    launch(nothing_kernel, {dim3(1, 65536), dim3(32)}, gpu, 0);  // BUG grid_too_high
}
void grid_too_wide(Gpu& gpu) {
    launch(nothing_kernel, {size_t{1} << 31, 32}, gpu, 0);  // BUG grid_too_wide
}
void empty_grid(Gpu& gpu) {
    launch(nothing_kernel, {dim3(0), dim3(32)}, gpu, 0);  // BUG empty_grid
}
void empty_block(Gpu& gpu) {
    launch(nothing_kernel, {1, 0}, gpu, 0);  // BUG empty_block
}
void huge_shared(Gpu& gpu) {
    launch<HugeShared>(nothing_kernel, {1, 32}, gpu, 0);  // BUG huge_shared
}
void large_shared(Gpu& gpu) {
    launch<LargeShared>(nothing_kernel, {1, 32}, gpu, 0);  // BUG large_shared
}
void no_opt_in(Gpu& gpu) {
    CUDA_CHECK(launch_raw(48 * 1024 + 1, gpu));  // BUG no_opt_in
}

}  // namespace

int main(int argc, char** argv) {
    const std::vector<Case> cases = {
        {"too_many_threads", "normal", "",
         "@too_many_threads: launch of .*nothing_kernel .*block \\(1025, 1, "
         "1\\).*cudaErrorInvalidConfiguration",
         too_many_threads},
        {"too_many_threads_3d", "normal", "",
         "@too_many_threads_3d: .*block \\(32, 8, 8\\).*cudaErrorInvalidConfiguration", too_many_threads_3d},
        {"block_too_deep", "normal", "", "@block_too_deep: .*cudaErrorInvalidConfiguration", block_too_deep},
        {"grid_too_high", "normal", "", "@grid_too_high: .*cudaErrorInvalidConfiguration", grid_too_high},
        {"grid_too_wide", "normal", "", "@grid_too_wide: .*2147483648 blocks", grid_too_wide},
        {"empty_grid", "normal", "", "@empty_grid: .*cudaErrorInvalidConfiguration", empty_grid},
        {"empty_block", "normal", "", "@empty_block: .*cudaErrorInvalidConfiguration", empty_block},
        {"huge_shared", "normal", "", "@huge_shared: .*233472 bytes of shared memory.*cudaErrorInvalidValue",
         huge_shared},
        {"large_shared", "normal", "SIM_ARCH=80",
         "@large_shared: .*204800 bytes of shared memory.*cudaErrorInvalidValue", large_shared},
        {"no_opt_in", "normal", "", "@no_opt_in: .*cudaErrorInvalidValue", no_opt_in},
    };
    return run_cases(cases, argc, argv);
}
