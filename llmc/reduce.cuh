// Sums and maxima over a warp or a block, in a fixed order: the same bits every run.
#pragma once
#include <cuda_runtime.h>

inline constexpr int kWarpSize = 32;

// Every lane gets the result; all 32 lanes must come. The butterfly's tree is the same for every lane, so
// they agree bit for bit (addition and max commute).
template <class T>
__device__ inline T warp_sum(T x) {
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}
__device__ inline float warp_max(float x) {
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

// Sum of x over the block's kThreads threads, a multiple of 32; every thread gets it, and all must come.
// scratch is shared memory of 32 elements; it may be reused at once, since the function ends with a barrier.
template <int kThreads, class T>
__device__ inline T block_sum(T x, T (&scratch)[kWarpSize]) {
    static_assert(kThreads % kWarpSize == 0 && kThreads <= 1024);
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    x = warp_sum(x);
    if constexpr (kThreads == kWarpSize) return x;
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = warp_sum(lane < kThreads / kWarpSize ? scratch[lane] : T{0});
    __syncthreads();
    return x;
}
