// Causal self-attention, backward, head size 64. From dO and what forward left (Q, K, V, O, L; see
// attention_forward.cuh):
//
//     P_ij = 2^(S_ij log2 e - L_i)          D_i = sum_d dO_id O_id = sum_j P_ij dP_ij
//     dV = P^T dO        dP = dO V^T        dS = P o (dP - D)        dK = dS^T Q / 8        dQ = dS K / 8
//
// and the bias gradient of the projection that made Q, K and V: the column sums of dQ, dK, dV.
//
// Seven products of tiles, five of them different. A warp computes S and dP for 32 x 32 queries and keys at a
// time; P and dS stay in its registers. Every sum is made by one block in one order: no atomics, the same
// bits each run. Two schemes:
//
//   walked  A block takes a whole head and walks its key blocks, five products. It computes S^T and dP^T
//           (keys are rows), so that P^T and dS^T are left operands as they lie in registers, keeps dK and dV
//           of 128 keys in registers, and sends dS through shared memory for dQ += dS K. dQ is a sum over key
//           blocks: fp32, in the block's own scratch, each element always by the same thread. The first key
//           block assigns, the last (on the diagonal) converts and writes: no memset, no kernel before.
//
//                   queries 0  32  64  96 128 160 ...         steps of 32 queries, from the diagonal on
//       keys    0 [ warp 0  \   .   .   .   .   .             \  masked      .  whole
//       keys   32 [ warp 1      \   .   .   .   .             blank: skipped
//       keys   64 [ warp 2          \   .   .   .
//       keys   96 [ warp 3              \   .   .
//
//   split   Two kernels, seven products: dQ by query blocks (S, dP, dQ), then dK, dV by key blocks (S, dP,
//           dV, dK). No scratch but D, nothing crosses warps, and T / 128 times as many blocks.
//
// For 128 x 32 scores a Hopper SM, at mma.sync's 2540 FLOP and 128 bytes of shared memory a cycle, needs:
// walked 1030 cycles of products and 1220 of shared memory, split 1450 and 1150 (computed, not measured). So
// walking a head is cheaper by about 5 : 6, but heads come in whole waves of resident blocks:
// plan_walked_heads() walks the whole waves and splits the remainder, or everything when there are few heads.
//
// On Hopper attention_backward_sm90.cuh is another way to the same result; kPreferWgmma in attention_tile.cuh
// chooses. attention_gradient.cuh has what both share.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <ptx.cuh>
#include "llmc/attention_backward_sm90.cuh"
#include "llmc/attention_fp32.cuh"
#include "llmc/attention_gradient.cuh"
#include "llmc/attention_tile.cuh"
#include "llmc/launch.cuh"

namespace attention {

// Queries of a step by keys: S^T and dP^T of 32 x 32 a warp are 64 registers a thread beside the 128 of dK
// and dV; with 64 queries they would spill. Keys of a step by queries: the same beside the 64 of dQ and the
// 64 of Q and dO.
inline constexpr int kStepQueries = 32, kStepKeys = 32;
inline constexpr int kTileKeys = 64;  // keys that come by one cp.async group: two steps, half the barriers

using ColumnSums = PartialColumnSums<kWarps>;

// ---- by key blocks: dK, dV, and in the walked scheme dQ --------------------------------------------------

struct QueryStep {
    Tile<kStepQueries> q, d_o;
    alignas(16) float2 stats[kStepQueries];
};

// Where a head lies. It is kept in shared memory and read when something is loaded or stored: registers have
// no room.
struct HeadPlace {
    HeadRows<const bf16> q, k, v, d_o;
    HeadRows<bf16> dq, dk, dv;
    const float2* stats;
    float* bias_partial;
    int index;

    __device__ void set(const BackwardArguments& a, int head) {
        q = a.input(kQuery, head), k = a.input(kKey, head), v = a.input(kValue, head);
        d_o = plain_rows(a.dout, head, a.T, a.NH);
        dq = a.gradient(kQuery, head), dk = a.gradient(kKey, head), dv = a.gradient(kValue, head);
        stats = a.stats_of(head);
        bias_partial = a.bias_row(kQuery, head, 0);
        index = head;
    }
    __device__ float* bias_row(Which which, int block, int NH) const {
        return bias_partial + (static_cast<int64_t>(block) * 3 + which) * NH * kHeadSize;
    }
};

struct KeyBlockShared {  // 58 KB: two blocks an SM on A100 and H100
    Tile<kBlockRows> k, v;
    QueryStep step[2];
    ColumnSums columns;
    HeadPlace head;
};

struct WalkShared {  // 76 KB
    KeyBlockShared block;
    Tile<kBlockRows> ds;  // dS^T, a row a key: its first half for even steps, its second for odd ones
    float dq_columns[8][kHeadSize];
};

// Starts the block's copies of a step of 32 queries, and closes their group; beyond T the group is empty.
__device__ inline void load_step(QueryStep& s, const HeadPlace& head, int step, int T) {
    const int query = step * kStepQueries;
    if (query < T) {
        load_tile(s.q, head.q, query, T);
        load_tile(s.d_o, head.d_o, query, T);
        if (threadIdx.x < kStepQueries / 2)
            ptx::cp_async_16(&s.stats[2 * threadIdx.x], head.stats + query + 2 * threadIdx.x);
    }
    ptx::cp_async_commit();
}

// p = P^T and ds = dS^T of the warp's 32 keys (rows) and the step's 32 queries (columns). -D is where dP's
// sums start.
__device__ inline void gradients_by_key(float (&p)[2][4][4], float (&ds)[2][4][4], KeyBlockShared& s,
                                        QueryStep& step, int warp_row, bool on_diagonal) {
    const int lane = threadIdx.x % 32;
    const auto stats_of = [&](int n) {  // {L, D, L, D} of this lane's two queries in columns 8 n .. 8 n + 7
        return *reinterpret_cast<const float4*>(&step.stats[8 * n + lane % 4 * 2]);
    };
    fill(p, 0.0f);
    multiply_transposed(p, s.k, warp_row, step.q, 0);
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const float4 stats = stats_of(n);
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const bool future =
                    on_diagonal && 16 * m + e / 2 * 8 + lane / 4 > 8 * n + lane % 4 * 2 + e % 2;
                const float score = future ? -INFINITY : p[m][n][e];
                p[m][n][e] = ptx::ex2(fmaf(score, kScaleLog2, e % 2 ? -stats.z : -stats.x));
                ds[m][n][e] = e % 2 ? -stats.w : -stats.y;
            }
    }
    multiply_transposed(ds, s.v, warp_row, step.d_o, 0);
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) ds[m][n][e] *= p[m][n][e];
}

// Puts a warp's dS^T of a step, rounded, into its rows of the tile, from where all warps read it.
__device__ inline void store_ds(Tile<kBlockRows>& tile, const float (&ds)[2][4][4], int warp_row, int step) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int n = 0; n < 4; n++)
            *reinterpret_cast<uint32_t*>(tile.chunk(warp_row + 8 * i + lane / 4, step % 2 * 4 + n) +
                                         lane % 4 * 4) =
                ptx::pack_bf16(ds[i / 2][n][i % 2 * 2], ds[i / 2][n][i % 2 * 2 + 1]);
}

// The walked scheme's dQ of one step: 32 queries x the 16 columns of this warp, as dq[m][n][4].
struct StepDq {
    float dq[2][2][4];
    int thread;  // threadIdx.x by ptx::opaque: then no address of this phase takes a register in the others

    // What earlier key blocks have summed; this thread wrote it.
    __device__ void load(const float4* scratch, int step) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float4 v = scratch[(static_cast<size_t>(step) * 4 + i) * kThreads + thread];
            dq[i / 2][i % 2][0] = v.x, dq[i / 2][i % 2][1] = v.y, dq[i / 2][i % 2][2] = v.z,
                          dq[i / 2][i % 2][3] = v.w;
        }
    }
    __device__ void store(float4* scratch, int step) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* v = dq[i / 2][i % 2];
            scratch[(static_cast<size_t>(step) * 4 + i) * kThreads + thread] = float4{v[0], v[1], v[2], v[3]};
        }
    }
    // += dS K over the block's first `keys` keys.
    __device__ void add(Tile<kBlockRows>& ds, Tile<kBlockRows>& k, int step, int keys) {
        const int column = step % 2 * kStepQueries, warp_column = thread / 32 * 16;
#pragma unroll 2
        for (int key = 0; key < keys; key += 16) {
            uint32_t left[2][4], right[4];
            load_left_transposed(left, ds, key, column);
            load_right(right, k, key, warp_column);
            multiply(dq, 0, left, right);
        }
    }
    // The sums are complete: out they go, and into the column sums, which the block's first step starts.
    __device__ void finish(HeadRows<bf16> rows, int T, int step, float (&columns)[8][kHeadSize],
                           bool first) const {
        const int lane = thread % 32, g = lane / 4;
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int column = thread / 32 * 16 + 8 * n + lane % 4 * 2;
            float sum[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                sum[e] = (dq[0][n][e] + dq[0][n][e + 2]) + (dq[1][n][e] + dq[1][n][e + 2]);
                columns[g][column + e] = first ? sum[e] : columns[g][column + e] + sum[e];
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int query = step * kStepQueries + 8 * i + g;
                if (query < T)
                    *reinterpret_cast<uint32_t*>(rows.row(query) + column) = ptx::pack_bf16(
                        dq[i / 2][n][i % 2 * 2] * kScale, dq[i / 2][n][i % 2 * 2 + 1] * kScale);
            }
        }
    }
};

// dK, dV of one key block of the head at s.head and, kWalked, its share of dQ; walk and dq_scratch are null
// otherwise. One barrier a step: before it, each warp has used the step's Q and dO and written its dS, and
// the next step's have come; after it, the step after next is sent for, and dQ is summed.
template <bool kWalked>
__device__ inline void backward_key_block(const BackwardArguments& a, int block, KeyBlockShared& s,
                                          WalkShared* walk, float4* dq_scratch) {
    constexpr int kBlockSteps = kBlockRows / kStepQueries;
    const int warp = threadIdx.x / 32, warp_row = warp * kWarpRows;
    load_tile(s.k, s.head.k, block * kBlockRows, a.T);
    load_tile(s.v, s.head.v, block * kBlockRows, a.T);
    load_step(s.step[0], s.head, block * kBlockSteps, a.T);
    load_step(s.step[1], s.head, block * kBlockSteps + 1, a.T);
    ptx::cp_async_wait<1>();
    __syncthreads();

    float dk[2][8][4], dv[2][8][4];
    fill(dk, 0.0f);
    fill(dv, 0.0f);
    for (int past_diagonal = 0;; past_diagonal++) {  // warp w's keys cross the diagonal in step w
        const int step = block * kBlockSteps + past_diagonal;
        if (step * kStepQueries >= a.T) break;
        QueryStep& q = s.step[past_diagonal % 2];
        if (past_diagonal >= warp) {
            float p[2][4][4], ds[2][4][4];
            gradients_by_key(p, ds, s, q, warp_row, past_diagonal == warp);
            if constexpr (kWalked) store_ds(walk->ds, ds, warp_row, past_diagonal);
            multiply_accumulators(dv, p, q.d_o, 0);
            multiply_accumulators(dk, ds, q.q, 0);
        }
        ptx::cp_async_wait<0>();
        __syncthreads();
        load_step(q, s.head, step + 2, a.T);
        if constexpr (kWalked) {
            StepDq sum;
            sum.thread = ptx::opaque(threadIdx.x);
            fill(sum.dq, 0.0f);
            if (block > 0) sum.load(dq_scratch, step);
            const bool last = past_diagonal < kBlockSteps;  // of the key blocks that these queries see
            sum.add(walk->ds, s.k, step, last ? (past_diagonal + 1) * kStepQueries : kBlockRows);
            if (!last) sum.store(dq_scratch, step);
            if (last) sum.finish(s.head.dq, a.T, step, walk->dq_columns, past_diagonal == 0);
        }
    }

    const float scale[2][2] = {{kScale, kScale}, {kScale, kScale}}, one[2][2] = {{1.0f, 1.0f}, {1.0f, 1.0f}};
    // The barrier in it frees K and V, through whose places dK and dV go out.
    store_column_sums(s.head.bias_row(kKey, block, a.NH), dk, kScale, s.columns);
    if constexpr (kWalked)
        if (threadIdx.x < kHeadSize) {
            float sum = 0.0f;
            for (int g = 0; g < 8; g++) sum += walk->dq_columns[g][threadIdx.x];
            s.head.bias_row(kQuery, block, a.NH)[threadIdx.x] = sum * kScale;
        }
    store_rows(s.head.dk, block * kBlockRows + warp_row, a.T, s.k, warp_row, dk, scale);
    store_rows(s.head.dv, block * kBlockRows + warp_row, a.T, s.v, warp_row, dv, one);
    __syncthreads();
    store_column_sums(s.head.bias_row(kValue, block, a.NH), dv, 1.0f, s.columns);
}

// Grid: resident blocks, each walks the heads blockIdx.x, blockIdx.x + gridDim.x, ... below `heads`.
__global__ void __launch_bounds__(kThreads, 2)
    attention_backward_walk_kernel(BackwardArguments a, float4* dq_scratch, int heads) {
    WalkShared& s = shared<WalkShared>();
    const int rows = a.blocks() * kBlockRows;
    float4* scratch = dq_scratch + static_cast<size_t>(blockIdx.x) * rows * (kHeadSize / 4);
    int head = blockIdx.x;
    while (head < heads) {
        if (threadIdx.x == 0) s.block.head.set(a, head);
        store_query_stats<kThreads>(a, head, 0, rows, nullptr);
        for (int block = 0; block < a.blocks(); block++) {
            __syncthreads();  // head and statistics are there, and the last block's tiles are free
            backward_key_block<true>(a, block, s.block, &s, scratch);
        }
        head = s.block.head.index + gridDim.x;
        __syncthreads();
    }
}

// Grid: the key blocks of a head, longest first, head by head.
__global__ void __launch_bounds__(kThreads, 2) attention_backward_keys_kernel(BackwardArguments a) {
    const int head = a.first_head + blockIdx.x / a.blocks(), block = blockIdx.x % a.blocks();
    KeyBlockShared& s = shared<KeyBlockShared>();
    if (threadIdx.x == 0) s.head.set(a, head);
    __syncthreads();
    backward_key_block<false>(a, block, s, nullptr, nullptr);
}

// ---- by query blocks: dQ in the split scheme -------------------------------------------------------------

struct QueryBlockShared {  // 74 KB: two blocks an SM on A100 and H100
    Tile<kBlockRows> q, d_o;
    struct {
        Tile<kTileKeys> k, v;
    } stage[2];
    float2 stats[kBlockRows];
    ColumnSums columns;
};

// dq += the share of 32 keys of a tile, from row `row`, the first of them `key`.
template <int kRows>
__device__ inline void add_dq_by_query(float (&dq)[2][8][4], const uint32_t (&q)[4][2][4],
                                       const uint32_t (&d_o)[4][2][4], const float2 (&stats)[2][2],
                                       Tile<kRows>& k, Tile<kRows>& v, int row, int key, int warp_query) {
    float p[2][4][4], ds[2][4][4];
    fill(p, 0.0f);
    multiply_transposed(p, q, k, row);
    if (key + kStepKeys > warp_query + 1) mask_future_keys(p, warp_query, key);
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                p[m][n][e] = ptx::ex2(fmaf(p[m][n][e], kScaleLog2, -stats[m][e / 2].x));
                ds[m][n][e] = -stats[m][e / 2].y;
            }
    multiply_transposed(ds, d_o, v, row);
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) ds[m][n][e] *= p[m][n][e];
    multiply_accumulators(dq, ds, k, row);
}

// Grid: the query blocks of a head, longest first, head by head. Writes row_stats too, for the kernel by key
// blocks.
__global__ void __launch_bounds__(kThreads, 2) attention_backward_queries_kernel(BackwardArguments a) {
    QueryBlockShared& s = shared<QueryBlockShared>();
    const int head = a.first_head + blockIdx.x / a.blocks(), block = a.blocks() - 1 - blockIdx.x % a.blocks();
    const int warp_row = threadIdx.x / 32 * kWarpRows, lane = threadIdx.x % 32;
    const int block_query = block * kBlockRows, warp_query = block_query + warp_row;
    const int end = block_query + kBlockRows < a.T ? block_query + kBlockRows : a.T;  // of the keys it sees
    const HeadRows<const bf16> keys = a.input(kKey, head), values = a.input(kValue, head);

    load_tile(s.q, a.input(kQuery, head), block_query, a.T);
    load_tile(s.d_o, plain_rows(a.dout, head, a.T, a.NH), block_query, a.T);
    load_tile(s.stage[0].k, keys, 0, a.T);
    load_tile(s.stage[0].v, values, 0, a.T);
    ptx::cp_async_commit();
    store_query_stats<kThreads>(a, head, block_query, kBlockRows, s.stats);
    ptx::cp_async_wait<0>();
    __syncthreads();
    uint32_t q[4][2][4], d_o[4][2][4];
    load_warp_rows(q, s.q, warp_row);
    load_warp_rows(d_o, s.d_o, warp_row);
    const float2 stats[2][2] = {{s.stats[warp_row + lane / 4], s.stats[warp_row + lane / 4 + 8]},
                                {s.stats[warp_row + lane / 4 + 16], s.stats[warp_row + lane / 4 + 24]}};

    float dq[2][8][4];
    fill(dq, 0.0f);
    for (int key = 0, stage = 0; key < end; key += kTileKeys, stage ^= 1) {
        if (key + kTileKeys < end) {  // its stage was free at the last barrier
            load_tile(s.stage[stage ^ 1].k, keys, key + kTileKeys, a.T);
            load_tile(s.stage[stage ^ 1].v, values, key + kTileKeys, a.T);
            ptx::cp_async_commit();
        }
#pragma unroll 1
        for (int row = 0; row < kTileKeys; row += kStepKeys)
            if (key + row < warp_query + kWarpRows)
                add_dq_by_query(dq, q, d_o, stats, s.stage[stage].k, s.stage[stage].v, row, key + row,
                                warp_query);
        ptx::cp_async_wait<0>();
        __syncthreads();  // the next stage is complete, and this one is free
    }
    const float scale[2][2] = {{kScale, kScale}, {kScale, kScale}};
    store_rows(a.gradient(kQuery, head), warp_query, a.T, s.q, warp_row, dq, scale);
    store_column_sums(a.bias_row(kQuery, head, block), dq, kScale, s.columns);
}

// ---- bias ------------------------------------------------------------------------------------------------

// A warp reads 128 bytes of a row, eight warps eight rows at a time.
inline constexpr int kBiasColumns = 32, kBiasRows = 8;

struct BiasShared {
    float partial[kBiasRows][kBiasColumns];
};

// bias[c] = or += the sum over rows of partial (rows, width), width a multiple of 32. Grid: width / 32.
__global__ void __launch_bounds__(kBiasColumns* kBiasRows)
    attention_bias_kernel(float* bias, const float* partial, int rows, int width, Write write) {
    BiasShared& s = shared<BiasShared>();
    const int lane = threadIdx.x % kBiasColumns, first = threadIdx.x / kBiasColumns;
    const int column = blockIdx.x * kBiasColumns + lane;
    float sum = 0.0f;
#pragma unroll 4
    for (int row = first; row < rows; row += kBiasRows)
        sum += partial[static_cast<size_t>(row) * width + column];
    s.partial[first][lane] = sum;
    __syncthreads();
    if (first > 0) return;
    for (int i = 1; i < kBiasRows; i++) sum += s.partial[i][lane];
    bias[column] = write == Write::Add ? bias[column] + sum : sum;
}

// The fp32 build's partial sums: a block adds up kBlockRows rows of dqkv (B T, width). Grid: (row blocks,
// width / 32).
__global__ void __launch_bounds__(kBiasColumns)
    attention_bias_partial_fp32_kernel(float* partial, const float* dqkv, size_t rows, int width) {
    const int column = blockIdx.y * kBiasColumns + threadIdx.x;
    const size_t first = static_cast<size_t>(blockIdx.x) * kBlockRows;
    float sum = 0.0f;
    for (size_t row = first; row < first + kBlockRows && row < rows; row++) sum += dqkv[row * width + column];
    partial[static_cast<size_t>(blockIdx.x) * width + column] = sum;
}

// ---- host ------------------------------------------------------------------------------------------------

// How many of `heads` heads are walked by `resident` blocks; the others are split. A wave of walked heads
// takes 5 units however full it is; split, the same heads take 6 times the share of the wave that they fill.
inline int plan_walked_heads(int heads, int resident) {
    const int rest = heads % resident;
    return 6 * rest > 5 * resident ? heads : heads - rest;
}

// The parts of attention_backward's scratch, in floats.
struct BackwardScratch {
    size_t row_stats, bias_partial, dq;
    int resident;
    size_t floats() const { return row_stats + bias_partial + dq; }

    BackwardScratch(int B, int T, int NH, const Gpu& gpu) {
        const size_t heads = static_cast<size_t>(B) * NH, blocks = ceil_div(T, kBlockRows);
        resident = resident_blocks<WalkShared>(attention_backward_walk_kernel, kThreads, gpu);
        row_stats = heads * blocks * kBlockRows * 2;
        bias_partial = B * blocks * 3 * NH * kHeadSize;
        dq = (heads < static_cast<size_t>(resident) ? heads : resident) * blocks * kBlockRows * kHeadSize;
    }
};

// The two builds' versions of attention_backward below, for the tests: products and walked_heads, how many
// heads mma.sync walks; < 0 leaves it to plan_walked_heads().
inline void backward(bf16* dqkv, float* dqkv_bias, float* scratch, const bf16* dout, const bf16* out,
                     const bf16* qkv, const float* lse, int B, int T, int NH, Write write_bias, Gpu& gpu,
                     Products products = Products::Preferred, int walked_heads = -1) {
    const BackwardScratch plan(B, T, NH, gpu);
    const int heads = B * NH, blocks = static_cast<int>(ceil_div(T, kBlockRows)), width = 3 * NH * kHeadSize;
    float* dq = scratch;
    float* row_stats = dq + plan.dq;
    float* bias_partial = row_stats + plan.row_stats;
    BackwardArguments a{dqkv, bias_partial, reinterpret_cast<float2*>(row_stats), dout, out, qkv, lse, T, NH,
                        0};
    const bool wgmma = use_wgmma(products, gpu);
    const int walked = wgmma ? 0 : walked_heads < 0 ? plan_walked_heads(heads, plan.resident) : walked_heads;
    if (wgmma) backward_sm90(a, B, gpu);
    if (walked > 0) {
        const int grid = walked < plan.resident ? walked : plan.resident;
        launch<WalkShared>(attention_backward_walk_kernel, {grid, kThreads}, gpu, a,
                           reinterpret_cast<float4*>(dq), walked);
    }
    if (!wgmma && walked < heads) {
        const int64_t grid = static_cast<int64_t>(heads - walked) * blocks;
        a.first_head = walked;
        launch<QueryBlockShared>(attention_backward_queries_kernel, {grid, kThreads}, gpu, a);
        launch<KeyBlockShared>(attention_backward_keys_kernel, {grid, kThreads}, gpu, a);
    }
    launch<BiasShared>(attention_bias_kernel, {width / kBiasColumns, kBiasColumns * kBiasRows}, gpu,
                       dqkv_bias, bias_partial, B * blocks, width, write_bias);
}

inline void backward(float* dqkv, float* dqkv_bias, float* scratch, const float* dout, const float* out,
                     const float* qkv, const float* lse, int B, int T, int NH, Write write_bias, Gpu& gpu,
                     Products = Products::Preferred, int /*walked_heads*/ = -1) {
    const int width = 3 * NH * kHeadSize;
    const size_t rows = static_cast<size_t>(B) * T;
    const int64_t blocks = ceil_div(T, kRowThreads) * B * NH;
    const unsigned row_blocks = static_cast<unsigned>(ceil_div(rows, kBlockRows));
    float* row_dots = scratch;
    float* bias_partial = scratch + rows * NH;
    launch(attention_dq_fp32_kernel, {blocks, kRowThreads}, gpu, dqkv, row_dots, dout, out, qkv, lse, T, NH);
    launch(attention_dk_fp32_kernel, {blocks, kRowThreads}, gpu, dqkv, row_dots, dout, qkv, lse, T, NH);
    launch(attention_dv_fp32_kernel, {blocks, kRowThreads}, gpu, dqkv, dout, qkv, lse, T, NH);
    launch(attention_bias_partial_fp32_kernel, {dim3(row_blocks, width / kBiasColumns), dim3(kBiasColumns)},
           gpu, bias_partial, dqkv, rows, width);
    launch<BiasShared>(attention_bias_kernel, {width / kBiasColumns, kBiasColumns * kBiasRows}, gpu,
                       dqkv_bias, bias_partial, static_cast<int>(row_blocks), width, write_bias);
}

}  // namespace attention

// How many floats of scratch attention_backward wants for these shapes, in either precision.
inline size_t attention_backward_scratch_floats(int B, int T, int NH, const Gpu& gpu) {
    return attention::BackwardScratch(B, T, NH, gpu).floats();
}

// dqkv = the gradient of attention_forward's qkv; dqkv_bias = or += its column sums, taken before dqkv is
// rounded.
//   dqkv (B, T, 3, NH, 64) and dqkv_bias (3 NH 64) written, scratch (attention_backward_scratch_floats,
//   16-byte aligned) overwritten, dout and out (B, T, NH 64), qkv (B, T, 3, NH, 64) and lse (B, NH, T) read;
//   no aliasing. Any B, T, NH >= 1. Async on gpu.stream, deterministic.
inline void attention_backward(floatX* dqkv, float* dqkv_bias, float* scratch, const floatX* dout,
                               const floatX* out, const floatX* qkv, const float* lse, int B, int T, int NH,
                               Write write_bias, Gpu& gpu) {
    attention::backward(dqkv, dqkv_bias, scratch, dout, out, qkv, lse, B, T, NH, write_bias, gpu);
}
