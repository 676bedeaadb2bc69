// Causal self-attention, backward, by Hopper's warpgroup products (wgmma) and bulk copies (TMA; Shah et al.
// 2024, "FlashAttention-3"). It computes what attention_backward.cuh computes, which explains it; here only
// the difference.
//
// The scheme is the split one: dQ by query blocks, then dK and dV by key blocks, each sum made by one block
// in one order. A block owns 128 queries or keys by two warpgroups of 64, 16 rows a warp, and walks the other
// side 64 at a time, through the ring of attention_ring.cuh. A score tile's rows are the block's own, so that
// what a warpgroup computes is at once the left operand, in registers, of the next product; right operands
// always lie in shared memory:
//
//     by queries   S = Q K^T, dP = dO V^T         left in shared memory    dQ += dS K
//     by keys      S^T = K Q^T, dP^T = V dO^T     left in registers        dV += P^T dO, dK += dS^T Q
//
// By keys, where one block fills an SM's registers anyway, K and V stay in them: a left operand from shared
// memory costs as much of its bandwidth as the right one. By queries Q and dO don't fit beside a second
// block.
//
// A product is started and runs on while its warps do something else. By queries four warpgroups (two blocks)
// share an SM and fill each other's gaps. By keys there are two, so products run on into the next step, dV
// and dK of one beside S of the next, and the tensor cores always have one waiting:
//
//     tensor cores   S^T | dK of the step before | dP^T            | dV             | S^T of the next ...
//     the warps          | P = 2^..                                | dS = P o (..)  |
//
// NOT the default (kPreferWgmma in attention_tile.cuh): compiled without a spill and with nothing
// serialised, 122 and 248 registers, and run in the simulator, but not measured on a GPU. Computed cycles of
// an SM for 128 x 64 scores, mma.sync's walked and split schemes beside it:
//
//                       products     shared memory     2^x     issue
//     by queries             768               768     512       460
//     by keys               1024               710     512       490
//     wgmma, both           1792              1480    1024       950
//     mma.sync walked       2060              2440     512      1900
//     mma.sync split        2900              2300    1024      1850
//
// So the bound falls from 2440 to 1792 cycles. For the 124M model with B = 64, T = 1024 on an H100 that is
// 430 us a layer for 580; at the 45% of the bound that others reach, 270 TFLOP/s for 200, and 2 to 4% of a
// step. What may be lost: by keys an SM has one block, and nothing runs while it loads its first tiles and
// stores its last, about 3,000 cycles of 15,000 at T = 1024. What would be next: walking heads here too,
// five products and 1280 cycles; with one block an SM the fp32 dQ of all is 35 MB at T = 1024 and stays in
// L2, where mma.sync's 69 MB don't.
//
// The simulator does a product at its wait and poisons the sums until then, and a copy lands when nobody can
// go on without it: a forgotten wait, commit, fence or release shows there, as does a tile that is loaded
// again too early. Whether the descriptors mean to the hardware what ptx.cuh says, only a GPU shows
// (dev/kernels/ptx.cu).
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>  // true_type, false_type
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <ptx.cuh>
#include "llmc/attention_forward_sm90.cuh"  // kWarpgroupThreads, pack_probabilities
#include "llmc/attention_gradient.cuh"
#include "llmc/attention_tile.cuh"
#include "llmc/launch.cuh"

namespace attention {

inline constexpr int kWarpgroupRows = 64;  // of the block's own side

// The tensors that are read by boxes, as TMA wants them.
struct BackwardBoxes {
    CUtensorMap qkv, dout;
};

using WarpgroupColumnSums = PartialColumnSums<kWarpgroupThreads / 32>;

// scores = the warpgroup's 64 rows of a tile, from `row` on, times the transpose of `right`. Starts and
// commits the product.
template <int kRows>
__device__ inline void start_scores(float (&scores)[1][8][4], const Tile<kRows>& left, int row,
                                    const Tile<kWarpgroupKeys>& right) {
    const unsigned char* rows = left.bytes + row * kRowBytes;
    ptx::wgmma_tiles<false>(scores[0], rows, right.bytes, 0);
#pragma unroll
    for (int k = 1; k < 4; k++) ptx::wgmma_tiles<true>(scores[0], rows, right.bytes, 16 * k);
    ptx::wgmma_commit();
}

// ---- by query blocks: dQ ---------------------------------------------------------------------------------

struct QueryBlockSm90Shared {  // 98 KB: two blocks an SM; every tile starts on a 1024-byte boundary
    Tile<kBlockRows> q, d_o;
    union {
        Ring<KeyValueStage> ring;
        WarpgroupColumnSums columns;  // when all tiles have been read
    };
    float2 stats[kBlockRows];  // {L, D} of the block's queries
};

// Grid: the query blocks of a head, longest first, head by head. Writes row_stats too, for the kernel by key
// blocks.
__global__ void __launch_bounds__(kWarpgroupThreads, 2)
    attention_backward_queries_sm90_kernel(BackwardArguments a, const __grid_constant__ BackwardBoxes boxes) {
    QueryBlockSm90Shared& s = shared<QueryBlockSm90Shared>();
    const int head = a.first_head + blockIdx.x / a.blocks(), block = a.blocks() - 1 - blockIdx.x % a.blocks();
    const int group = ptx::uniform(threadIdx.x / 128), warp_row = threadIdx.x / 32 * 16;
    const int block_query = block * kBlockRows, warp_query = block_query + warp_row;
    const int tiles = (min(block_query + kBlockRows, a.T) + kWarpgroupKeys - 1) / kWarpgroupKeys;
    const int my_tiles = min(tiles, 2 * block + group + 1);  // that the warpgroup sees
    const HeadBoxes keys(boxes.qkv, kKey, head, a.NH), values(boxes.qkv, kValue, head, a.NH);

    const auto load = [&](int tile) { load_keys(s.ring, tile, keys, values); };
    if (threadIdx.x == 0) {
        s.ring.init(kWarpgroupThreads / 32);
        ptx::mbarrier_arrive_expect(&s.ring.rows, sizeof(s.q) + sizeof(s.d_o));
        HeadBoxes(boxes.qkv, kQuery, head, a.NH).load(s.q, block_query, &s.ring.rows);
        HeadBoxes(boxes.dout, 0, head, a.NH).load(s.d_o, block_query, &s.ring.rows);
        s.ring.load_first(tiles, load);
    }
    store_query_stats<kWarpgroupThreads>(a, head, block_query, kBlockRows, s.stats);
    __syncthreads();  // barriers and statistics are there
    const int lane = threadIdx.x % 32;
    const float2 stats[2] = {s.stats[warp_row + lane / 4], s.stats[warp_row + lane / 4 + 8]};
    ptx::mbarrier_wait(&s.ring.rows, 0);

    float dq[1][8][4], p[1][8][4], ds[1][8][4];
    fill(dq, 0.0f);
    for (int tile = 0; tile < my_tiles; tile++) {
        const int key = tile * kWarpgroupKeys;
        const KeyValueStage& stage = s.ring[tile];
        s.ring.wait(tile);
        ptx::wgmma_fence();
        start_scores(p, s.q, group * kWarpgroupRows, stage.k);
        start_scores(ds, s.d_o, group * kWarpgroupRows, stage.v);
        ptx::wgmma_wait<1>(p[0]);
        if (key + kWarpgroupKeys > warp_query + 1) mask_future_keys(p, warp_query, key);
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) p[0][n][e] = ptx::ex2(fmaf(p[0][n][e], kScaleLog2, -stats[e / 2].x));
        s.ring.load_ahead(tile, tiles, load);
        ptx::wgmma_wait<0>(ds[0]);
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) ds[0][n][e] = (ds[0][n][e] - stats[e / 2].y) * p[0][n][e];
        uint32_t left[4][4];
        pack_probabilities(left, ds);
        ptx::wgmma_fence();
        start_sum(dq, left, stage.k);
        ptx::wgmma_wait<0>(dq[0]);
        s.ring.release(tile);
    }
    ptx::barrier_sync(1 + group, 128);  // Q's rows are free: all products of the warpgroup have read them
    const float scale[1][2] = {{kScale, kScale}};
    store_rows(a.gradient(kQuery, head), warp_query, a.T, s.q, warp_row, dq, scale);
    __syncthreads();  // the ring is free
    store_column_sums(a.bias_row(kQuery, head, block), dq, kScale, s.columns);
}

// ---- by key blocks: dK and dV ----------------------------------------------------------------------------

struct QueryStage {
    Tile<kWarpgroupKeys> q, d_o;
    alignas(1024) float2 stats[kWarpgroupKeys];  // {L, D}; the next stage's tiles begin at 1024 bytes again
};

struct KeyBlockSm90Shared {  // 120 KB; registers allow one block an SM
    Tile<kBlockRows> k, v;
    Ring<QueryStage> ring;
    WarpgroupColumnSums columns;
};

// What a key block reads of the other side: the queries from its first key's position on, 64 a tile.
struct QueryTiles {
    HeadBoxes q, d_o;
    const float2* stats;  // of the head
    int first;            // query of tile 0

    // Starts the copies of a tile.
    __device__ void load(Ring<QueryStage>& ring, int tile) const {
        QueryStage& stage = ring[tile];
        const int query = first + tile * kWarpgroupKeys;
        constexpr unsigned kBytes = sizeof(stage.q) + sizeof(stage.d_o) + sizeof(stage.stats);
        ptx::Mbarrier* barrier = ring.begin_load(tile, kBytes);
        q.load(stage.q, query, barrier);
        d_o.load(stage.d_o, query, barrier);
        ptx::bulk_load(stage.stats, stats + query, sizeof(stage.stats), barrier);
    }
};

// Scores S^T (keys, queries) with the query before the key become -inf; row and column 0 are one position.
__device__ inline void mask_past_queries(float (&scores)[1][8][4]) {
    const int lane = threadIdx.x % 32, key = threadIdx.x / 32 % 4 * 16 + lane / 4, query = lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (key + e / 2 * 8 > query + 8 * n + e % 2) scores[0][n][e] = -INFINITY;
}

// L and D of this lane's queries, 8 n + 2 (lane % 4) and the next.
__device__ inline void load_stats(float (&logs)[8][2], float (&dots)[8][2],
                                  const float2 (&stats)[kWarpgroupKeys]) {
    const int query = threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const float4 pair = *reinterpret_cast<const float4*>(&stats[8 * n + query]);  // {L, D, L, D}
        logs[n][0] = pair.x, logs[n][1] = pair.z, dots[n][0] = pair.y, dots[n][1] = pair.w;
    }
}

// Grid: the key blocks of a head, longest first, head by head.
__global__ void __launch_bounds__(kWarpgroupThreads, 1)
    attention_backward_keys_sm90_kernel(BackwardArguments a, const __grid_constant__ BackwardBoxes boxes) {
    KeyBlockSm90Shared& s = shared<KeyBlockSm90Shared>();
    const int head = a.first_head + blockIdx.x / a.blocks(), block = blockIdx.x % a.blocks();
    const int group = ptx::uniform(threadIdx.x / 128), warp_row = threadIdx.x / 32 * 16;
    const int block_key = block * kBlockRows, tiles = (a.T - block_key + kWarpgroupKeys - 1) / kWarpgroupKeys;
    const QueryTiles queries{HeadBoxes(boxes.qkv, kQuery, head, a.NH), HeadBoxes(boxes.dout, 0, head, a.NH),
                             a.stats_of(head), block_key};

    const auto load = [&](int tile) { queries.load(s.ring, tile); };
    if (threadIdx.x == 0) {
        s.ring.init(kWarpgroupThreads / 32);
        ptx::mbarrier_arrive_expect(&s.ring.rows, sizeof(s.k) + sizeof(s.v));
        HeadBoxes(boxes.qkv, kKey, head, a.NH).load(s.k, block_key, &s.ring.rows);
        HeadBoxes(boxes.qkv, kValue, head, a.NH).load(s.v, block_key, &s.ring.rows);
        s.ring.load_first(tiles, load);
    }
    __syncthreads();  // the barriers are there
    ptx::mbarrier_wait(&s.ring.rows, 0);
    uint32_t k[4][4], v[4][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        ptx::ldmatrix_x4(k[i], block_down(s.k, warp_row, 16 * i));
        ptx::ldmatrix_x4(v[i], block_down(s.v, warp_row, 16 * i));
    }

    float dk[1][8][4], dv[1][8][4];
    uint32_t left_ds[4][4];  // of the step before
    fill(dk, 0.0f);
    fill(dv, 0.0f);
    // As in the picture above. The first step is on the diagonal and has none before it; compiled for itself,
    // since a product under a condition of the run would cost the others a fence each.
    const auto step = [&](int tile, auto first_step) {
        constexpr bool kFirst = decltype(first_step)::value;
        const QueryStage& stage = s.ring[tile];
        float p[1][8][4], ds[1][8][4], logs[8][2], dots[8][2];
        s.ring.wait(tile);
        ptx::wgmma_fence();
        start_scores(p, k, stage.q);
        if constexpr (!kFirst) start_sum(dk, left_ds, s.ring[tile - 1].q);
        start_scores(ds, v, stage.d_o);
        if constexpr (!kFirst) ptx::wgmma_wait<3>(dv[0]);  // left_p's registers are free for the statistics
        load_stats(logs, dots, stage.stats);
        ptx::wgmma_wait<kFirst ? 1 : 2>(p[0]);
        if constexpr (kFirst) mask_past_queries(p);
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) p[0][n][e] = ptx::ex2(fmaf(p[0][n][e], kScaleLog2, -logs[n][e % 2]));
        s.ring.load_ahead(tile, tiles, load);
        if constexpr (!kFirst) {
            ptx::wgmma_wait<1>(dk[0]);
            s.ring.release(tile - 1);
        }
        uint32_t left_p[4][4];
        pack_probabilities(left_p, p);
        ptx::wgmma_fence();
        start_sum(dv, left_p, stage.d_o);
        ptx::wgmma_wait<1>(ds[0]);
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) ds[0][n][e] = (ds[0][n][e] - dots[n][e % 2]) * p[0][n][e];
        pack_probabilities(left_ds, ds);
    };
    if (group == 1) {    // tile 0's queries come before all keys of this warpgroup
        s.ring.wait(0);  // all the same: a wait may not skip a phase
        s.ring.release(0);
    }
    if (group < tiles) {
        step(group, std::true_type{});
        for (int tile = group + 1; tile < tiles; tile++) step(tile, std::false_type{});
        ptx::wgmma_fence();
        start_sum(dk, left_ds, s.ring[tiles - 1].q);
        ptx::wgmma_wait<0>(dv[0]);
        ptx::wgmma_wait<0>(dk[0]);
    }

    const float scale[1][2] = {{kScale, kScale}}, one[1][2] = {{1.0f, 1.0f}};
    store_rows(a.gradient(kKey, head), block_key + warp_row, a.T, s.k, warp_row, dk, scale);
    store_rows(a.gradient(kValue, head), block_key + warp_row, a.T, s.v, warp_row, dv, one);
    store_column_sums(a.bias_row(kKey, head, block), dk, kScale, s.columns);
    __syncthreads();
    store_column_sums(a.bias_row(kValue, head, block), dv, 1.0f, s.columns);
}

// All B NH heads of the arguments, on a GPU of compute capability 9.0 and code for sm_90a: writes dqkv,
// row_stats and bias_partial, whose column sums are left to the caller.
inline void backward_sm90(const BackwardArguments& a, int B, const Gpu& gpu) {
    const int64_t grid = static_cast<int64_t>(B) * a.NH * static_cast<int64_t>(ceil_div(a.T, kBlockRows));
    const BackwardBoxes boxes{box_map(a.qkv, B, a.T, 3 * a.NH * kHeadSize),
                              box_map(a.dout, B, a.T, a.NH * kHeadSize)};
    launch<QueryBlockSm90Shared>(attention_backward_queries_sm90_kernel, {grid, kWarpgroupThreads}, gpu, a,
                                 boxes);
    launch<KeyBlockSm90Shared>(attention_backward_keys_sm90_kernel, {grid, kWarpgroupThreads}, gpu, a, boxes);
}

}  // namespace attention
