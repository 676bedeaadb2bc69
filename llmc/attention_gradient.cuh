// What the kernels of attention's backward share, by mma.sync and by wgmma: their arguments, the statistics
// of a query, and the column sums of gradients for the bias. attention_backward.cuh explains all of it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <ptx.cuh>
#include "llmc/attention_tile.cuh"
#include "llmc/vec.cuh"  // Pack128

namespace attention {

// What the kernels share: tensors, shapes, and scratch that they don't own.
struct BackwardArguments {
    bf16* dqkv;           // (B, T, 3, NH, 64)
    float* bias_partial;  // (B, key or query blocks, 3, NH, 64): column sums of each block's part of dqkv
    float2* row_stats;    // (B NH, T rounded up to 128): {L, D} of each query; 0 beyond T
    const bf16 *dout, *out, *qkv;
    const float* lse;
    int T, NH;
    int first_head;  // heads before it belong to another launch

    __device__ int blocks() const { return (T + kBlockRows - 1) / kBlockRows; }
    __device__ float2* stats_of(int head) const {
        return row_stats + static_cast<size_t>(head) * blocks() * kBlockRows;
    }
    __device__ HeadRows<bf16> gradient(Which which, int head) const {
        return packed_rows(dqkv, which, head, T, NH);
    }
    __device__ HeadRows<const bf16> input(Which which, int head) const {
        return packed_rows(qkv, which, head, T, NH);
    }
    __device__ float* bias_row(Which which, int head, int block) const {
        const size_t b = head / NH, h = head % NH;
        return bias_partial + (((b * blocks() + block) * 3 + which) * NH + h) * kHeadSize;
    }
};

// {L, D} of `count` queries of a head from `first` on go to row_stats and, where it isn't null, to `copy`;
// {0, 0} beyond T: there Q, dO are zeros too, so that P = 1, dS = 0, and nothing is added anywhere. The
// block's threads all come; count is a multiple of kBlockRows. Eight lanes a query, so that a warp reads
// whole rows, and of a block's rows each lane writes one. A branch or a store between the loads would make
// each wait for the last.
template <int kBlockThreads>
__device__ inline void store_query_stats(const BackwardArguments& a, int head, int first, int count,
                                         float2* copy) {
    const HeadRows<const bf16> out = plain_rows(a.out, head, a.T, a.NH),
                               dout = plain_rows(a.dout, head, a.T, a.NH);
    constexpr int kStep = kBlockThreads / 8, kRows = kBlockRows / kStep;  // rows of a lane at once: 8, or 4
    const int thread = ptx::opaque(threadIdx.x), chunk = thread % 8;
    const float* lse = a.lse + static_cast<size_t>(head) * a.T;
    for (int i = thread / 8; i < count; i += kBlockRows) {
        Pack128<bf16> x[kRows], y[kRows];
#pragma unroll
        for (int u = 0; u < kRows; u++) {
            const int query = min(first + i + u * kStep, a.T - 1);
            x[u] = load128(out.row(query) + chunk * Pack128<bf16>::size);
            y[u] = load128(dout.row(query) + chunk * Pack128<bf16>::size);
        }
        const int mine = i + chunk % kRows * kStep, query = first + mine;  // that this lane writes
        float2 stats{lse[min(query, a.T - 1)], 0.0f};
#pragma unroll
        for (int u = 0; u < kRows; u++) {
            float dot = 0.0f;
#pragma unroll
            for (int k = 0; k < Pack128<bf16>::size; k++) dot = fmaf(x[u][k], y[u][k], dot);
#pragma unroll
            for (int lanes = 1; lanes < 8; lanes *= 2) dot += __shfl_xor_sync(0xffffffffu, dot, lanes);
            if (chunk == u) stats.y = dot;
        }
        if (query >= a.T) stats = float2{0.0f, 0.0f};
        if (chunk < kRows) {
            a.stats_of(head)[query] = stats;
            if (copy) copy[mine] = stats;
        }
    }
}

// Partial sums by columns: 8 lanes x the block's warps; 8 words of padding let the eight lanes of a column
// write without a bank conflict.
template <int kBlockWarps>
using PartialColumnSums = float[kBlockWarps * 8][kHeadSize + 8];

// sums[c] = factor x the sum of column c of the accumulators of all warps. The block's threads all come;
// `partial` must be free, and is again after the next barrier.
template <int kM, int kPartialRows>
__device__ inline void store_column_sums(float* sums, const float (&c)[kM][8][4], float factor,
                                         float (&partial)[kPartialRows][kHeadSize + 8]) {
    const int thread = ptx::opaque(threadIdx.x), warp = thread / 32, lane = thread % 32;
#pragma unroll
    for (int n = 0; n < 8; n++) {
        float2 sum{c[0][n][0] + c[0][n][2], c[0][n][1] + c[0][n][3]};
#pragma unroll
        for (int m = 1; m < kM; m++) sum.x += c[m][n][0] + c[m][n][2], sum.y += c[m][n][1] + c[m][n][3];
        *reinterpret_cast<float2*>(&partial[warp * 8 + lane / 4][8 * n + lane % 4 * 2]) = sum;
    }
    __syncthreads();
    constexpr int kLanes = kPartialRows * 4 / kHeadSize;  // of the block's threads, for each column
    const int column = thread / kLanes;
    float sum = 0.0f;
#pragma unroll
    for (int i = thread % kLanes; i < kPartialRows; i += kLanes) sum += partial[i][column];
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (thread % kLanes == 0) sums[column] = sum * factor;
}

}  // namespace attention
