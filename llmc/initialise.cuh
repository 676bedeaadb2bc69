// GPT-2's initial weights: normal of deviation 0.02, the residual projections' 0.02 / sqrt(2 L), layernorm
// weights 1, biases 0 (Radford et al. 2019, section 2.3; the deviation is the released code's). Element i of
// tensor b is a pure function of (seed, b, i), so that neither the launch nor the number of ranks changes it.
#pragma once
#include <cmath>
#include "llmc/fatal.h"     // ceil_div
#include "llmc/gpu.cuh"     // floatX
#include "llmc/launch.cuh"  // launch
#include "llmc/random.cuh"  // philox, normal_pair
#include "llmc/tensors.h"   // TensorTable, Init

inline constexpr float kInitDeviation = 0.02f;
inline constexpr int kInitThreads = 256;
inline constexpr int kInitPerThread = 4;  // one Philox call yields four words, so four normals

// master (n) = deviation * normal, weights (n) = master rounded. One thread four elements; n is a multiple of
// 4.
__global__ void __launch_bounds__(kInitThreads)
    initialise_normal_kernel(floatX* weights, float* master, size_t n, float deviation, uint64_t seed,
                             uint64_t stream) {
    const size_t quad = static_cast<size_t>(blockIdx.x) * kInitThreads + threadIdx.x;
    if (quad * kInitPerThread >= n) return;
    const uint4 bits = philox(seed, stream, quad);
    const float2 a = normal_pair(bits.x, bits.y), b = normal_pair(bits.z, bits.w);
    const float x[kInitPerThread] = {a.x, a.y, b.x, b.y};
    for (int i = 0; i < kInitPerThread; i++) {
        const float value = deviation * x[i];
        weights[quad * kInitPerThread + i] = static_cast<floatX>(value);
        master[quad * kInitPerThread + i] = value;
    }
}

// master (n) = value, weights (n) = value.
__global__ void __launch_bounds__(kInitThreads)
    initialise_constant_kernel(floatX* weights, float* master, size_t n, float value) {
    const size_t quad = static_cast<size_t>(blockIdx.x) * kInitThreads + threadIdx.x;
    for (int i = 0; i < kInitPerThread; i++) {
        const size_t at = quad * kInitPerThread + i;
        if (at >= n) return;
        weights[at] = static_cast<floatX>(value);
        master[at] = value;
    }
}

// weights (n) = master (n) rounded to nearest.
__global__ void __launch_bounds__(kInitThreads)
    round_weights_kernel(floatX* weights, const float* master, size_t n) {
    const size_t quad = static_cast<size_t>(blockIdx.x) * kInitThreads + threadIdx.x;
    for (int i = 0; i < kInitPerThread; i++) {
        const size_t at = quad * kInitPerThread + i;
        if (at < n) weights[at] = static_cast<floatX>(master[at]);
    }
}

inline unsigned initialise_grid(size_t n) {
    return static_cast<unsigned>(ceil_div(n, kInitThreads * kInitPerThread));
}

// weights, master (Np) = the initial weights of `table`'s model; pads 0. In fp32 both may be one arena.
// Async.
inline void initialise(floatX* weights, float* master, const TensorTable& table, uint64_t seed, Gpu& gpu) {
    fill_zero(weights, table.padded_parameters(), gpu);
    fill_zero(master, table.padded_parameters(), gpu);
    const float residual = kInitDeviation / std::sqrt(2.0f * static_cast<float>(table.shape().layers));
    for (size_t b = 0; b < table.blocks().size(); b++) {
        const TensorBlock& block = table.blocks()[b];
        floatX* w = weights + block.offset;
        float* m = master + block.offset;
        const LaunchShape shape{initialise_grid(block.n), kInitThreads};
        if (block.init == Init::ones) launch(initialise_constant_kernel, shape, gpu, w, m, block.n, 1.0f);
        if (block.init == Init::normal || block.init == Init::residual)
            launch(initialise_normal_kernel, shape, gpu, w, m, block.n,
                   block.init == Init::normal ? kInitDeviation : residual, seed, b);
    }
}

// weights (n) = master (n) rounded to nearest. Async.
inline void round_weights(floatX* weights, const float* master, size_t n, Gpu& gpu) {
    launch(round_weights_kernel, {initialise_grid(n), kInitThreads}, gpu, weights, master, n);
}
