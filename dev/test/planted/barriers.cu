// Planted bugs: barriers and warp words that not all come to. Each would hang a GPU, or be undefined on it.
#include "planted.h"

namespace {

constexpr unsigned kFull = 0xffffffffu;

__global__ void divergent_barrier_kernel(float* out) {
    if (threadIdx.x < 40) __syncthreads();  // BUG divergent_barrier
    out[threadIdx.x] = 1;
}

__global__ void return_before_barrier_kernel(float* out, int n) {
    if (static_cast<int>(threadIdx.x) >= n) return;
    out[threadIdx.x] = 1;
    __syncthreads();  // BUG return_before_barrier
    out[threadIdx.x] += 1;
}

__global__ void two_barriers_kernel(float* out) {
    if (threadIdx.x < 32) __syncthreads();
    else __syncthreads();  // BUG two_barriers
    out[threadIdx.x] = 1;
}

__global__ void trip_count_kernel(float* out) {
    for (unsigned i = 0; i < 1 + threadIdx.x / 32; i++) {
        out[threadIdx.x] = static_cast<float>(i);
        __syncthreads();  // BUG trip_count
    }
}

__global__ void half_warp_shuffle_kernel(float* out) {
    float x = static_cast<float>(threadIdx.x);
    if (threadIdx.x < 16) x += __shfl_xor_sync(kFull, x, 1);  // BUG half_warp_shuffle
    out[threadIdx.x] = x;
}

__global__ void outside_mask_kernel(float* out) {
    float x = static_cast<float>(threadIdx.x);
    x += __shfl_xor_sync(0x0000ffffu, x, 1);  // BUG outside_mask
    out[threadIdx.x] = x;
}

__global__ void reads_outside_mask_kernel(float* out) {
    float x = static_cast<float>(threadIdx.x);
    if (threadIdx.x < 16) x = __shfl_sync(0x0000ffffu, x, 20);  // BUG reads_outside_mask
    out[threadIdx.x] = x;
}

__global__ void returned_lane_kernel(float* out) {
    if (threadIdx.x == 31) return;
    float x = static_cast<float>(threadIdx.x);
    for (int offset = 16; offset > 0; offset /= 2)
        x += __shfl_xor_sync(kFull, x, offset);  // BUG returned_lane
    out[threadIdx.x] = x;
}

__global__ void two_words_kernel(float* out) {
    float x = 1;
    if (threadIdx.x % 2) x = __shfl_xor_sync(kFull, x, 2);
    else __syncwarp();  // BUG two_words
    out[threadIdx.x] = x;
}

__global__ void partial_mma_kernel(float* out) {
    float d[4] = {};
    const uint32_t a[4] = {};
    if (threadIdx.x % 32 != 7) ptx::mma_m16n8k16(d, a, 0, 0);  // BUG partial_mma
    out[threadIdx.x] = d[0];
}

__global__ void partial_warp_kernel(float* out) {
    out[threadIdx.x] = __shfl_xor_sync(kFull, 1.0f, 1);  // BUG partial_warp
}

__global__ void barrier_count_kernel(float* out) {
    if (threadIdx.x < 32) ptx::barrier_sync(1, 96);
    else ptx::barrier_sync(1, 64);  // BUG barrier_count
    out[threadIdx.x] = 1;
}

__global__ void barrier_too_few_kernel(float* out) {
    if (threadIdx.x < 32) ptx::barrier_sync(1, 64);  // BUG barrier_too_few
    out[threadIdx.x] = 1;
}

template <void (*kernel)(float*), unsigned threads>
void run(Gpu& gpu) {
    DeviceBuffer<float> out(threads);
    launch(kernel, {2, threads}, gpu, out.get());
    gpu.synchronize();
}

void run_return(Gpu& gpu) {
    DeviceBuffer<float> out(128);
    launch(return_before_barrier_kernel, {1, 128}, gpu, out.get(), 100);
    gpu.synchronize();
}

}  // namespace

int main(int argc, char** argv) {
    const std::vector<Case> cases = {
        {"divergent_barrier", "normal", "",
         "kernel .*divergent_barrier_kernel, block \\(0, 0, 0\\).*40 threads wait at __syncthreads for 64 "
         "threads \\(@divergent_barrier\\), "
         "the first is \\(0, 0, 0\\); 24 threads returned, the first is \\(40, 0, 0\\)",
         run<divergent_barrier_kernel, 64>},
        {"return_before_barrier", "normal", "",
         "return_before_barrier_kernel.*100 threads wait at __syncthreads.*@return_before_barrier.*28 "
         "threads returned",
         run_return},
        {"two_barriers", "normal", "",
         "two_barriers_kernel.*thread \\(32, 0, 0\\): __syncthreads, while 32 threads.*@two_barriers",
         run<two_barriers_kernel, 64>},
        {"trip_count", "normal", "",
         "trip_count_kernel.*32 threads wait at __syncthreads.*@trip_count.*32 threads returned",
         run<trip_count_kernel, 64>},
        {"half_warp_shuffle", "normal", "",
         "half_warp_shuffle_kernel.*16 threads wait at __shfl_xor_sync with mask ffffffff "
         "\\(@half_warp_shuffle\\).*16 threads returned",
         run<half_warp_shuffle_kernel, 32>},
        {"outside_mask", "normal", "",
         "outside_mask_kernel.*thread \\(16, 0, 0\\).*leaves out the lane.*@outside_mask",
         run<outside_mask_kernel, 32>},
        {"reads_outside_mask", "normal", "",
         "reads_outside_mask_kernel.*reads lane 20.*0000ffff leaves out.*@reads_outside_mask",
         run<reads_outside_mask_kernel, 32>},
        {"returned_lane", "normal", "",
         "returned_lane_kernel.*(31 threads wait|have returned).*@returned_lane",
         run<returned_lane_kernel, 32>},
        {"two_words", "normal", "", "two_words_kernel.*divergent code", run<two_words_kernel, 32>},
        {"partial_mma", "normal", "", "partial_mma_kernel.*mma_m16n8k16.*@partial_mma",
         run<partial_mma_kernel, 64>},
        {"partial_warp", "normal", "", "partial_warp_kernel.*the block has 48 threads.*@partial_warp",
         run<partial_warp_kernel, 48>},
        {"barrier_count", "normal", "",
         "barrier_count_kernel.*barrier_sync 1 for 64 threads, while others wait.*@barrier_count",
         run<barrier_count_kernel, 96>},
        {"barrier_too_few", "normal", "",
         "barrier_too_few_kernel.*32 threads wait at barrier_sync for 64.*@barrier_too_few",
         run<barrier_too_few_kernel, 96>},
    };
    return run_cases(cases, argc, argv);
}
