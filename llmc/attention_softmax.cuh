// The online softmax of attention's forward kernels (Milakov and Gimelshein 2018): a running maximum and sum
// for each row of scores, sums and outputs rescaled when the maximum grows. Rows lie in accumulators as
// attention_tile.cuh says.
#pragma once
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <ptx.cuh>
#include "llmc/attention_tile.cuh"

namespace attention {

// Moves the rows' references to what `scores`, the next ones, ask for; `correction` is what turns sums of the
// old reference into sums of the new one. True, for the whole warp, where one moved: only then is there
// anything to rescale.
//
// A row's reference moves to its true maximum only when that has outgrown it by 2^8: P stays below 256, where
// bf16 and the fp32 sums are as good as below 1, and after the first tiles hardly a warp rescales
// (FlashAttention-4 does the same). Each row decides for itself, so that its bits don't depend on its
// neighbours. All is finite: the first tile holds key 0, which every query sees.
template <int kM, int kTiles>
__device__ inline bool move_references(float (&reference)[kM][2], float (&correction)[kM][2],
                                       const float (&scores)[kM][kTiles][4]) {
    constexpr float kGrowth = 8.0f;
    float next[kM][2];
    bool grew = false;
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float x = fmaxf(scores[m][0][2 * j], scores[m][0][2 * j + 1]);
#pragma unroll
            for (int n = 1; n < kTiles; n++)
                x = fmaxf(x, fmaxf(scores[m][n][2 * j], scores[m][n][2 * j + 1]));
            x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));  // the four lanes of a row
            x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
            x *= kScaleLog2;
            const bool grows = x > reference[m][j] + kGrowth;
            next[m][j] = grows ? x : reference[m][j];
            grew = grew || grows;
        }
    if (!__any_sync(0xffffffffu, grew)) return false;
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            correction[m][j] = ptx::ex2(reference[m][j] - next[m][j]);  // 2^-inf = 0 on the first tile
            reference[m][j] = next[m][j];
        }
    return true;
}

// sums of rows, in accumulators, to a new reference.
template <int kM>
__device__ inline void rescale(float (&o)[kM][8][4], const float (&correction)[kM][2]) {
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) o[m][n][e] *= correction[m][e / 2];
}
template <int kM>
__device__ inline void rescale(float (&sum)[kM][2], const float (&correction)[kM][2]) {
#pragma unroll
    for (int m = 0; m < kM; m++) sum[m][0] *= correction[m][0], sum[m][1] *= correction[m][1];
}

// Scores -> probabilities relative to 2^reference, in place; sum (this lane's share of the row sums) += them.
template <int kM, int kTiles>
__device__ inline void probabilities(float (&scores)[kM][kTiles][4], float (&sum)[kM][2],
                                     const float (&reference)[kM][2]) {
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
        for (int n = 0; n < kTiles; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                scores[m][n][e] = ptx::ex2(fmaf(scores[m][n][e], kScaleLog2, -reference[m][e / 2]));
                sum[m][e / 2] += scores[m][n][e];
            }
}

// inverse = 1 / the whole row sums, and L of the warp's rows, the first of them `query`, goes to lse (T).
template <int kM>
__device__ inline void finish_softmax(float (&inverse)[kM][2], float* lse, int query, int T,
                                      const float (&reference)[kM][2], const float (&sum)[kM][2]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float total = sum[m][j];
            total += __shfl_xor_sync(0xffffffffu, total, 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            inverse[m][j] = 1.0f / total;
            const int row = query + 16 * m + 8 * j + lane / 4;
            if (row < T && lane % 4 == 0) lse[row] = reference[m][j] + log2f(total);
        }
}

}  // namespace attention
