// Bias of a linear layer: adding it where cuBLASLt doesn't, and its gradient.
//
//     out[r, c] += bias[c]            dbias[c] = or += sum over r of dout[r, c]
//
// The gradient is a column sum in two stages: blocks add up slices of rows into scratch, then each column's
// slices are added in order. No atomics, so the same bits every run; who adds what depends on the shape
// alone, not on the GPU.
#pragma once
#include <algorithm>
#include <cuda_runtime.h>
#include "llmc/fatal.h"     // ceil_div
#include "llmc/gpu.cuh"     // floatX, Gpu, Write
#include "llmc/launch.cuh"  // launch, shared
#include "llmc/reduce.cuh"  // kWarpSize
#include "llmc/vec.cuh"     // x128

// ---- tiles -----------------------------------------------------------------------------------------------

inline constexpr int kBiasWarps = 8;  // of a block, each on rows of its own
inline constexpr int kBiasThreads = kBiasWarps * kWarpSize;
inline constexpr int kBiasColumns = kWarpSize * x128::size;  // of a block: 512 contiguous bytes a row
inline constexpr int kBiasUnroll = 4;                        // 16-byte loads in flight a thread
inline constexpr int64_t kBiasBlocks = 792;                  // 6 on each of 132 SMs, as many as fit: one wave
inline constexpr int kBiasFinishRows = 32;                   // threads on a column, second stage

// Slices of rows, a function of the shape alone. A slice has work for every warp of its block.
inline int64_t bias_backward_slices(int64_t rows, int64_t cols) {
    const int64_t wanted = std::max<int64_t>(1, kBiasBlocks / ceil_div(cols, kBiasColumns));
    return std::min(wanted, ceil_div(rows, kBiasWarps * kBiasUnroll));
}

// ---- kernels ---------------------------------------------------------------------------------------------

// One pack a thread. out (rows, cols), n = rows cols / x128::size packs.
__global__ void bias_forward_kernel(floatX* out, const floatX* bias, int64_t cols, int64_t n) {
    const int64_t pack = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (pack >= n) return;
    const int64_t at = pack * x128::size;
    x128 x = load128(out + at);
    const x128 b = load128(bias + at % cols);
    for (int i = 0; i < x128::size; i++) x.set(i, x[i] + b[i]);
    store128(out + at, x);
}

struct BiasBackwardShared {
    // The lane last, and 4 floats of padding: no bank conflict, writing by lanes or reading by columns.
    float sums[kBiasWarps][x128::size][kWarpSize + 4];
};

// partial (slices, cols) = sums of each slice's rows. Grid: (column tiles, slices).
__global__ void __launch_bounds__(kBiasThreads)
    bias_backward_partial_kernel(float* partial, const floatX* dout, int64_t rows, int64_t cols,
                                 int64_t slice_rows) {
    BiasBackwardShared& s = shared<BiasBackwardShared>();
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kBiasColumns + lane * x128::size;
    const int64_t begin = blockIdx.y * slice_rows, end = min(begin + slice_rows, rows);

    float sum[x128::size] = {};
    if (column < cols) {
        int64_t row = begin + warp;
        for (; row + (kBiasUnroll - 1) * kBiasWarps < end; row += kBiasUnroll * kBiasWarps) {
            x128 x[kBiasUnroll];
            for (int u = 0; u < kBiasUnroll; u++)
                x[u] = load128(dout + (row + u * kBiasWarps) * cols + column);
            for (int u = 0; u < kBiasUnroll; u++)
                for (int i = 0; i < x128::size; i++) sum[i] += x[u][i];
        }
        for (; row < end; row += kBiasWarps) {
            const x128 x = load128(dout + row * cols + column);
            for (int i = 0; i < x128::size; i++) sum[i] += x[i];
        }
    }
    for (int i = 0; i < x128::size; i++) s.sums[warp][i][lane] = sum[i];
    __syncthreads();
    // Thread t finishes column t of the tile: lane t / size, element t % size.
    if (threadIdx.x >= kBiasColumns) return;
    const int64_t own = static_cast<int64_t>(blockIdx.x) * kBiasColumns + threadIdx.x;
    float total = 0;
    for (int w = 0; w < kBiasWarps; w++)
        total += s.sums[w][threadIdx.x % x128::size][threadIdx.x / x128::size];
    if (own < cols) partial[blockIdx.y * cols + own] = total;
}

struct BiasFinishShared {
    float sums[kBiasFinishRows][kWarpSize];
};

// dbias (cols) = or += partial (slices, cols) summed over slices. A block has 32 columns; warp w adds slices
// w, w + 32 ..
__global__ void __launch_bounds__(kBiasFinishRows* kWarpSize)
    bias_backward_finish_kernel(float* dbias, const float* partial, int64_t slices, int64_t cols,
                                Write write) {
    BiasFinishShared& s = shared<BiasFinishShared>();
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
    float sum = 0;
    if (column < cols)
        for (int64_t slice = warp; slice < slices; slice += kBiasFinishRows)
            sum += partial[slice * cols + column];
    s.sums[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || column >= cols) return;
    float total = 0;
    for (int w = 0; w < kBiasFinishRows; w++) total += s.sums[w][lane];
    dbias[column] = write == Write::Add ? dbias[column] + total : total;
}

// ---- host ------------------------------------------------------------------------------------------------

// out (rows, cols) += bias (cols), rounded again. Requires cols % x128::size == 0. Async on gpu.stream,
// deterministic.
inline void bias_forward(floatX* out, const floatX* bias, int64_t rows, int64_t cols, Gpu& gpu) {
    constexpr int kThreads = 256;
    const int64_t packs = rows * cols / x128::size;
    launch(bias_forward_kernel, {ceil_div(packs, kThreads), kThreads}, gpu, out, bias, cols, packs);
}

// Elements of the scratch that bias_backward wants.
inline size_t bias_backward_scratch_floats(int64_t rows, int64_t cols) {
    return static_cast<size_t>(bias_backward_slices(rows, cols) * cols);
}

// dbias (cols) = or += partial (slices, cols) summed over the slices. Async on gpu.stream, deterministic.
inline void add_bias_slices(float* dbias, const float* partial, int64_t slices, int64_t cols, Write write,
                            Gpu& gpu) {
    launch<BiasFinishShared>(bias_backward_finish_kernel,
                             {ceil_div(cols, kWarpSize), kBiasFinishRows * kWarpSize}, gpu, dbias, partial,
                             slices, cols, write);
}

// dbias (cols) = or += column sums of dout (rows, cols), in fp32.
//   scratch: bias_backward_scratch_floats(rows, cols) floats, contents lost. Requires cols % x128::size == 0,
//   rows > 0. Async on gpu.stream, deterministic.
inline void bias_backward(float* dbias, float* scratch, const floatX* dout, int64_t rows, int64_t cols,
                          Write write, Gpu& gpu) {
    const int64_t slices = bias_backward_slices(rows, cols), slice_rows = ceil_div(rows, slices);
    const dim3 grid(static_cast<unsigned>(ceil_div(cols, kBiasColumns)), static_cast<unsigned>(slices));
    launch<BiasBackwardShared>(bias_backward_partial_kernel, {grid, dim3(kBiasThreads)}, gpu, scratch, dout,
                               rows, cols, slice_rows);
    add_bias_slices(dbias, scratch, slices, cols, write, gpu);
}
