// The global norm of the gradient, and with it every decision of a training step: how much to clip, whether
// to apply.
//
//     G = sqrt(sum over all real elements of g^2),   c = (clip > 0 and G > clip) ? clip / G : 1
//
// The decisions stay on the device, in StepState: the norm writes it, the optimizer reads it, the host gets a
// copy one step late, so that the loop has no round trip. Squares are summed in double: no square of a finite
// float overflows or vanishes there, and the sum of 1.6e9 of them is right to 1.6e9 x 2^-53 < 2e-7 in the
// worst order. The order is fixed: a thread's elements, the block's threads, then the chunks.
#pragma once
#include <algorithm>  // min
#include <cfloat>     // FLT_MIN
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>
#include "llmc/fatal.h"
#include "llmc/gpu.cuh"
#include "llmc/launch.cuh"
#include "llmc/reduce.cuh"  // block_sum
#include "llmc/tensors.h"   // TensorBlock, Chunk
#include "llmc/vec.cuh"     // load128_streaming

// ---- the parameters as the multi-tensor kernels see them -------------------------------------------------

// Elements of a CUDA block of the norm, the statistics and the updates: 8 rounds of 256 threads x 16 bytes.
// Large enough that reading the chunk's record costs nothing, small enough that 124M are a dozen blocks a
// slot and the tail is short.
inline constexpr uint32_t kChunkElements = 8192;
inline constexpr int kChunkThreads = 256;

// What a kernel needs to know of a TensorBlock.
struct DeviceBlock {
    uint64_t n;            // real elements
    uint32_t first_chunk;  // its chunks lie side by side
    uint32_t num_chunks;
    uint32_t decay;  // 1: weight decay goes to it
    uint32_t unused;
};

// All real elements of an arena of parameters, in chunks, on the device. Made once; every optimizer and the
// norm read it.
struct DeviceTable {
    DeviceBuffer<Chunk> chunks;
    DeviceBuffer<DeviceBlock> blocks;

    // Blocks may lie anywhere in the arena (64-bit offsets that are multiples of 64), each with n > 0
    // elements. The last chunk of a block whose n is no multiple of 64 (GPT-2 has none) is rounded up, and
    // must hold zeros there.
    DeviceTable(const std::vector<TensorBlock>& host_blocks, const Gpu& gpu) {
        std::vector<Chunk> chunk_list;
        std::vector<DeviceBlock> block_list;
        for (size_t b = 0; b < host_blocks.size(); b++) {
            const TensorBlock& block = host_blocks[b];
            const uint64_t rounded = (block.n + 63) / 64 * 64;
            const size_t first = chunk_list.size();
            for (uint64_t begin = 0; begin < rounded; begin += kChunkElements)
                chunk_list.push_back(
                    {block.offset + begin,
                     static_cast<uint32_t>(std::min<uint64_t>(kChunkElements, rounded - begin)),
                     static_cast<uint32_t>(b)});
            block_list.push_back({block.n, static_cast<uint32_t>(first),
                                  static_cast<uint32_t>(chunk_list.size() - first), block.decay ? 1u : 0u,
                                  0u});
        }
        chunks = DeviceBuffer<Chunk>(chunk_list.size());
        blocks = DeviceBuffer<DeviceBlock>(block_list.size());
        copy_to_device(chunks.get(), chunk_list.data(), chunk_list.size(), gpu);
        copy_to_device(blocks.get(), block_list.data(), block_list.size(), gpu);
        gpu.synchronize();  // the lists above end here
    }
    size_t bytes() const { return chunks.bytes() + blocks.bytes(); }
};

// ---- the state of a step ---------------------------------------------------------------------------------

// Why a step changed nothing.
enum class Skip : uint32_t { None, Loss, GradientNorm, ZeroGradient };

// What the log calls it, in the `skip` record.
inline const char* skip_reason(Skip skip) {
    switch (skip) {
        case Skip::None: return "none";
        case Skip::Loss: return "the loss is not finite";
        case Skip::GradientNorm: return "the gradient norm is not finite, or too large to be clipped";
        case Skip::ZeroGradient: return "the whole first gradient is zero, so no gain can be measured";
    }
    return "unknown";
}

// One of these lives on the device for the whole run, zeroed at its start. A checkpoint keeps applied_updates
// and gains_ready; everything else is of the last step.
struct StepState {
    double grad_norm;          // G, unclipped
    uint64_t applied_updates;  // the optimizer counts, this step's included once its step() ran
    float loss;                // mean over the step's tokens, nats
    float clip_factor;         // c; 1 where the step is skipped
    Skip skip;                 // the norm decides; SGD-SaI may add ZeroGradient
    uint32_t gains_ready;      // SGD-SaI: 1 once the g-SNRs are measured; else stays 0

    __host__ __device__ bool apply() const { return skip == Skip::None; }
};
static_assert(std::is_trivially_copyable_v<StepState>);

// ---- kernels ---------------------------------------------------------------------------------------------

struct SumOfSquaresShared {
    double scratch[kWarpSize];
};

// partial[chunk] = sum of g^2 over the chunk. One CUDA block a chunk.
__global__ __launch_bounds__(kChunkThreads) void sum_of_squares_kernel(double* partial, const float* gradient,
                                                                       const Chunk* chunks) {
    SumOfSquaresShared& s = shared<SumOfSquaresShared>();
    const Chunk chunk = chunks[blockIdx.x];
    const float* g = gradient + chunk.begin;
    double sum = 0;
#pragma unroll 4
    for (uint32_t i = threadIdx.x * f128::size; i < chunk.count; i += kChunkThreads * f128::size) {
        const f128 pack = load128(g + i);  // not streaming: a small gradient stays in L2 for the update
        for (int k = 0; k < f128::size; k++) {
            const double x = static_cast<double>(pack[k]);
            sum += x * x;
        }
    }
    sum = block_sum<kChunkThreads>(sum, s.scratch);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

inline constexpr int kDecideThreads = 1024;  // one block reads the 190,000 partial sums of 1.5B parameters

// Sums the chunks' partial sums and writes the step's decisions. One CUDA block.
__global__ __launch_bounds__(kDecideThreads) void decide_step_kernel(StepState* state, const double* partial,
                                                                     const float* loss, size_t num_chunks,
                                                                     double clip) {
    SumOfSquaresShared& s = shared<SumOfSquaresShared>();
    double sum = 0;
#pragma unroll 4
    for (size_t i = threadIdx.x; i < num_chunks; i += kDecideThreads) sum += partial[i];
    sum = block_sum<kDecideThreads>(sum, s.scratch);
    if (threadIdx.x != 0) return;

    const double norm = sqrt(sum);
    const float step_loss = *loss;
    const float factor = clip > 0 && norm > clip ? static_cast<float>(clip / norm) : 1.0f;
    Skip skip = Skip::None;
    // A factor below the normal floats would scale with a large error, or with zero: such a norm counts as
    // not finite.
    if (!isfinite(norm) || !(factor >= FLT_MIN)) skip = Skip::GradientNorm;
    if (!isfinite(step_loss)) skip = Skip::Loss;
    state->grad_norm = norm;
    state->loss = step_loss;
    state->clip_factor = skip == Skip::None ? factor : 1.0f;
    state->skip = skip;
}

// ---- host ------------------------------------------------------------------------------------------------

// Writes the step's decisions into *state: grad_norm, loss, clip_factor and skip; applied_updates and
// gains_ready stay.
//   state (1) device; partial (table.chunks.size()) device scratch, written; gradient (Np) fp32, the whole
//   step's, read, not scaled; loss (1) device, the whole step's mean. clip: the largest norm, 0 for none.
// Async on gpu.stream, deterministic.
inline void grad_norm(StepState* state, double* partial, const float* gradient, const float* loss,
                      const DeviceTable& table, double clip, const Gpu& gpu) {
    launch<SumOfSquaresShared>(sum_of_squares_kernel, {table.chunks.size(), kChunkThreads}, gpu, partial,
                               gradient, table.chunks.get());
    launch<SumOfSquaresShared>(decide_step_kernel, {1, kDecideThreads}, gpu, state, partial, loss,
                               table.chunks.size(), clip);
}
