// Causal self-attention, backward, by Hopper's warpgroup products (wgmma; Shah et al. 2024,
// "FlashAttention-3"). It computes what attention_backward.cuh computes, which explains it; here only the
// difference.
//
// The scheme is the split one: dQ by query blocks, then dK and dV by key blocks, each sum made by one block
// in one order. A block owns 128 queries or keys by two warpgroups of 64, 16 rows a warp, and walks the
// other side 64 at a time. A score tile's rows are the block's own, so that what a warpgroup computes is at
// once the left operand, in registers, of the next product; right operands always lie in shared memory:
//
//     by queries   S = Q K^T, dP = dO V^T         left in shared memory    dQ += dS K
//     by keys      S^T = K Q^T, dP^T = V dO^T     left in registers        dV += P^T dO, dK += dS^T Q
//
// By keys, where one block fills an SM's registers anyway, K and V stay in them: a left operand from shared
// memory costs as much of its bandwidth as the right one. By queries Q and dO don't fit beside a second
// block.
//
// A product is started and runs on while its warps do something else. In a step by keys:
//
//     tensor cores   S^T | dP^T      | dV             | dK
//     the warps          | P = 2^..  | dS = P o (..)  | wait     the other warpgroup fills the gaps
//
// Tiles come by cp.async into two stages as in the other kernels, one barrier a step. All products are done
// before it, since the next copies go where they read. The tensor cores read through the asynchronous proxy,
// so each thread fences its own copies before that barrier.
//
// NOT the default (kPreferWgmma in attention_tile.cuh): compiled without a spill and with nothing
// serialised, 122 and 232 registers, and run in the simulator, but not measured on a GPU. Computed cycles of
// an SM for 128 x 64 scores, mma.sync's walked and split schemes beside it:
//
//                       products     shared memory     2^x     issue
//     by queries             768               768     512     about 440
//     by keys               1024     at most   900     512     about 480
//     wgmma, both           1792              1668    1024     about 920
//     mma.sync walked       2060              2440     512
//     mma.sync split        2900              2300    1024
//
// So the bound falls from 2440 to 1792 cycles. For the 124M model with B = 64, T = 1024 on an H100 that is
// 430 us a layer for 580; at the 45% of the bound that others reach, 270 TFLOP/s for 200, and 2 to 4% of a
// step. What may be lost: by keys an SM has one block, and nothing runs while it loads its first tiles and
// stores its last, about 3,000 cycles of 15,000 at T = 1024. What would be next: walking heads here too,
// five products and 1280 cycles; with one block an SM the fp32 dQ of all is 35 MB at T = 1024 and stays in
// L2, where mma.sync's 69 MB don't.
//
// The simulator does a product at its wait and poisons the sums until then, so a forgotten wait, commit or
// wgmma_fence shows there, as does a tile that is loaded again too early. A forgotten fence_async_proxy, and
// whether the descriptors mean to the hardware what ptx.cuh says, only a GPU shows (dev/kernels/ptx.cu).
#pragma once
#include <cstddef>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <ptx.cuh>
#include "llmc/attention_forward_sm90.cuh"  // kWarpgroupThreads, pack_probabilities
#include "llmc/attention_gradient.cuh"
#include "llmc/attention_tile.cuh"
#include "llmc/launch.cuh"

namespace attention {

inline constexpr int kWarpgroupRows = 64;
inline constexpr int kWarpgroupStep =
    64;  // rows of the other side; 128 would double the registers of S and dP

using WarpgroupColumnSums = PartialColumnSums<kWarpgroupThreads / 32>;

// scores = left times the transpose of `right`, left 64 rows of a tile from `row` on, or in registers. Starts
// and commits the product.
template <int kRows>
__device__ inline void start_scores(float (&scores)[1][8][4], const Tile<kRows>& left, int row,
                                    const Tile<kWarpgroupStep>& right) {
    const unsigned char* rows = left.bytes + row * kRowBytes;
    ptx::wgmma_tiles<false>(scores[0], rows, right.bytes, 0);
#pragma unroll
    for (int k = 1; k < 4; k++) ptx::wgmma_tiles<true>(scores[0], rows, right.bytes, 16 * k);
    ptx::wgmma_commit();
}
__device__ inline void start_scores(float (&scores)[1][8][4], const uint32_t (&left)[4][4],
                                    const Tile<kWarpgroupStep>& right) {
    ptx::wgmma_transposed<false>(scores[0], left[0], right.bytes, 0);
#pragma unroll
    for (int k = 1; k < 4; k++) ptx::wgmma_transposed<true>(scores[0], left[k], right.bytes, 16 * k);
    ptx::wgmma_commit();
}

// sum += left times `right`. Starts and commits the product.
__device__ inline void start_sum(float (&sum)[1][8][4], const uint32_t (&left)[4][4],
                                 const Tile<kWarpgroupStep>& right) {
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) ptx::wgmma(sum[0], left[k], right.bytes, 16 * k);
    ptx::wgmma_commit();
}

// ---- by query blocks: dQ ----------------------------------------------------------------------------------

struct QueryBlockSm90Shared {  // 83 KB: two blocks an SM; every tile starts on a 1024-byte boundary
    Tile<kBlockRows> q, d_o;
    Tile<kWarpgroupStep> k[2], v[2];
    float2 stats[kBlockRows];
    WarpgroupColumnSums columns;
};

// Grid: the query blocks of a head, longest first, head by head. Writes row_stats too, for the kernel by key
// blocks.
__global__ void __launch_bounds__(kWarpgroupThreads, 2)
    attention_backward_queries_sm90_kernel(BackwardArguments a) {
    QueryBlockSm90Shared& s = shared<QueryBlockSm90Shared>();
    const int head = a.first_head + blockIdx.x / a.blocks(), block = a.blocks() - 1 - blockIdx.x % a.blocks();
    const int group_row = threadIdx.x / 128 * kWarpgroupRows, warp_row = threadIdx.x / 32 * 16;
    const int block_query = block * kBlockRows, warp_query = block_query + warp_row;
    const int group_last = block_query + group_row + kWarpgroupRows - 1;  // the warpgroup's last query
    const int end = block_query + kBlockRows < a.T ? block_query + kBlockRows : a.T;  // of the keys it sees
    const HeadRows<const bf16> keys = a.input(kKey, head), values = a.input(kValue, head);

    load_tile<kWarpgroupThreads>(s.q, a.input(kQuery, head), block_query, a.T);
    load_tile<kWarpgroupThreads>(s.d_o, plain_rows(a.dout, head, a.T, a.NH), block_query, a.T);
    load_tile<kWarpgroupThreads>(s.k[0], keys, 0, a.T);
    load_tile<kWarpgroupThreads>(s.v[0], values, 0, a.T);
    ptx::cp_async_commit();
    if (threadIdx.x < kBlockRows) {
        s.stats[threadIdx.x] = query_stats(a, head, block_query + threadIdx.x);
        a.stats_of(head)[block_query + threadIdx.x] = s.stats[threadIdx.x];
    }
    ptx::cp_async_wait<0>();
    ptx::fence_async_proxy();
    __syncthreads();
    const int lane = threadIdx.x % 32;
    const float2 stats[2] = {s.stats[warp_row + lane / 4], s.stats[warp_row + lane / 4 + 8]};

    float dq[1][8][4], p[1][8][4], ds[1][8][4];
    fill(dq, 0.0f);
    for (int key = 0, stage = 0; key < end; key += kWarpgroupStep, stage ^= 1) {
        if (key + kWarpgroupStep < end) {  // its stage was free at the last barrier
            load_tile<kWarpgroupThreads>(s.k[stage ^ 1], keys, key + kWarpgroupStep, a.T);
            load_tile<kWarpgroupThreads>(s.v[stage ^ 1], values, key + kWarpgroupStep, a.T);
            ptx::cp_async_commit();
        }
        if (key <= group_last) {
            ptx::wgmma_fence();
            start_scores(p, s.q, group_row, s.k[stage]);
            start_scores(ds, s.d_o, group_row, s.v[stage]);
            ptx::wgmma_wait<1>(p[0]);
            if (key + kWarpgroupStep > warp_query + 1) mask_future_keys(p, warp_query, key);
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    p[0][n][e] = ptx::ex2(fmaf(p[0][n][e], kScaleLog2, -stats[e / 2].x));
            ptx::wgmma_wait<0>(ds[0]);
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) ds[0][n][e] = (ds[0][n][e] - stats[e / 2].y) * p[0][n][e];
            uint32_t left[4][4];
            pack_probabilities(left, ds);
            start_sum(dq, left, s.k[stage]);
            ptx::wgmma_wait<0>(dq[0]);
        }
        ptx::cp_async_wait<0>();
        ptx::fence_async_proxy();
        __syncthreads();  // the next stage is complete, and this one is free
    }
    const float scale[1][2] = {{kScale, kScale}};
    store_rows(a.gradient(kQuery, head), warp_query, a.T, s.q, warp_row, dq, scale);
    store_column_sums(a.bias_row(kQuery, head, block), dq, kScale, s.columns);
}

// ---- by key blocks: dK and dV -----------------------------------------------------------------------------

struct KeyBlockSm90Shared {  // 83 KB; registers allow one block an SM
    Tile<kBlockRows> k, v;
    Tile<kWarpgroupStep> q[2], d_o[2];
    alignas(16) float2 stats[2][kWarpgroupStep];
    WarpgroupColumnSums columns;
};

// Starts the block's copies of 64 queries into a stage, and closes their group.
__device__ inline void load_query_step(KeyBlockSm90Shared& s, int stage, const BackwardArguments& a, int head,
                                       int query) {
    load_tile<kWarpgroupThreads>(s.q[stage], a.input(kQuery, head), query, a.T);
    load_tile<kWarpgroupThreads>(s.d_o[stage], plain_rows(a.dout, head, a.T, a.NH), query, a.T);
    if (threadIdx.x < kWarpgroupStep / 2)
        ptx::cp_async_16(&s.stats[stage][2 * threadIdx.x], a.stats_of(head) + query + 2 * threadIdx.x);
    ptx::cp_async_commit();
}

// S^T (keys, queries) -> P^T in place, and D of this lane's queries 8 n + 2 (lane % 4) and the next. On the
// diagonal, row and column 0 are the same position.
__device__ inline void probabilities_by_key(float (&p)[1][8][4], float (&dots)[8][2],
                                            const float2 (&stats)[kWarpgroupStep], bool on_diagonal) {
    const int lane = threadIdx.x % 32, key = threadIdx.x / 32 % 4 * 16 + lane / 4, query = lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const float4 pair = *reinterpret_cast<const float4*>(&stats[8 * n + query]);  // {L, D, L, D}
        dots[n][0] = pair.y, dots[n][1] = pair.w;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const bool future = on_diagonal && key + e / 2 * 8 > query + 8 * n + e % 2;
            p[0][n][e] =
                ptx::ex2(fmaf(future ? -INFINITY : p[0][n][e], kScaleLog2, e % 2 ? -pair.z : -pair.x));
        }
    }
}

// Grid: the key blocks of a head, longest first, head by head.
__global__ void __launch_bounds__(kWarpgroupThreads, 1)
    attention_backward_keys_sm90_kernel(BackwardArguments a) {
    KeyBlockSm90Shared& s = shared<KeyBlockSm90Shared>();
    const int head = a.first_head + blockIdx.x / a.blocks(), block = blockIdx.x % a.blocks();
    const int group = threadIdx.x / 128, warp_row = threadIdx.x / 32 * 16;
    const int block_key = block * kBlockRows;

    load_tile<kWarpgroupThreads>(s.k, a.input(kKey, head), block_key, a.T);
    load_tile<kWarpgroupThreads>(s.v, a.input(kValue, head), block_key, a.T);
    load_query_step(s, 0, a, head, block_key);
    ptx::cp_async_wait<0>();
    ptx::fence_async_proxy();
    __syncthreads();

    uint32_t k[4][4], v[4][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        ptx::ldmatrix_x4(k[i], block_down(s.k, warp_row, 16 * i));
        ptx::ldmatrix_x4(v[i], block_down(s.v, warp_row, 16 * i));
    }

    float dk[1][8][4], dv[1][8][4], p[1][8][4], ds[1][8][4];
    fill(dk, 0.0f);
    fill(dv, 0.0f);
    for (int past_diagonal = 0;; past_diagonal++) {  // warpgroup g's keys cross the diagonal in step g
        const int query = block_key + past_diagonal * kWarpgroupStep, stage = past_diagonal % 2;
        if (query >= a.T) break;
        if (query + kWarpgroupStep < a.T) load_query_step(s, stage ^ 1, a, head, query + kWarpgroupStep);
        if (past_diagonal >= group) {
            ptx::wgmma_fence();
            start_scores(p, k, s.q[stage]);
            start_scores(ds, v, s.d_o[stage]);
            ptx::wgmma_wait<1>(p[0]);
            float dots[8][2];
            probabilities_by_key(p, dots, s.stats[stage], past_diagonal == group);
            uint32_t left_p[4][4], left_ds[4][4];
            pack_probabilities(left_p, p);
            start_sum(dv, left_p, s.d_o[stage]);
            ptx::wgmma_wait<1>(ds[0]);
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) ds[0][n][e] = (ds[0][n][e] - dots[n][e % 2]) * p[0][n][e];
            pack_probabilities(left_ds, ds);
            start_sum(dk, left_ds, s.q[stage]);
            ptx::wgmma_wait<1>(dv[0]);
            ptx::wgmma_wait<0>(dk[0]);
        }
        ptx::cp_async_wait<0>();
        ptx::fence_async_proxy();
        __syncthreads();  // the next stage is complete, and this one is free
    }

    const float scale[1][2] = {{kScale, kScale}}, one[1][2] = {{1.0f, 1.0f}};
    store_rows(a.gradient(kKey, head), block_key + warp_row, a.T, s.k, warp_row, dk, scale);
    store_rows(a.gradient(kValue, head), block_key + warp_row, a.T, s.v, warp_row, dv, one);
    store_column_sums(a.bias_row(kKey, head, block), dk, kScale, s.columns);
    __syncthreads();
    store_column_sums(a.bias_row(kValue, head, block), dv, 1.0f, s.columns);
}

// All `heads` heads of the arguments, on a GPU of compute capability 9.0 and code for sm_90a: writes dqkv,
// row_stats and bias_partial, whose column sums are left to the caller.
inline void backward_sm90(const BackwardArguments& a, int heads, const Gpu& gpu) {
    const int64_t grid = static_cast<int64_t>(heads) * static_cast<int64_t>(ceil_div(a.T, kBlockRows));
    launch<QueryBlockSm90Shared>(attention_backward_queries_sm90_kernel, {grid, kWarpgroupThreads}, gpu, a);
    launch<KeyBlockSm90Shared>(attention_backward_keys_sm90_kernel, {grid, kWarpgroupThreads}, gpu, a);
}

}  // namespace attention
