// Causal self-attention, forward, by Hopper's warpgroup products (wgmma; Shah et al. 2024,
// "FlashAttention-3"). It computes what attention_forward.cuh computes, which explains it; here only the
// difference.
//
// A block owns 128 queries, but with two warpgroups of 64 rows, 16 a warp: the tensor cores read K and V from
// shared memory themselves, so that 16 rows a warp cost no more shared-memory traffic than 64, and a thread
// needs half the registers. Four warpgroups (two blocks) share an SM: while one is in its softmax, the others
// keep the tensor cores busy; no producer warps, no hand-over between warpgroups.
//
// A tile's iteration: start S = Q K^T, wait, softmax, start O += P V, wait. Letting O's product run on into
// the next iteration makes ptxas serialise all of them (C7515), and there are other warpgroups to run.
//
// Tiles come by cp.async as in the other kernel, not by TMA. A thread starts 4 copies a tile, about 24 of
// its 300 instructions with addresses and bounds, and a tile costs one barrier of the block. TMA would leave
// one thread with two instructions, and a warpgroup would wait for its tile (mbarrier) without waiting for
// the other. That lowers the issue bound below from 600 to about 550 cycles: at most 8% of this kernel, 0.3%
// of a step of the 124M model. It needs tensor maps from the driver (cuTensorMapEncodeTiled), a new one for
// each tensor and shape, and words for both in the simulator: worth it once a GPU has shown that issue is
// the bound.
//
// NOT the default (kPreferWgmma in attention_tile.cuh): compiled (106 registers, no spill, nothing
// serialised) and run in the simulator, not measured on a GPU. Computed cycles of an SM for a tile of 128 x
// 64, mma.sync's in brackets: products 512 (826), 2^x 512 (512), instruction issue 600 (640), shared memory
// 256 (512). So the bound falls from 826 to 600, and at T = 1024 one may hope for 265 to 300 TFLOP/s where
// mma.sync reaches 230: 1% of a step.
//
// The simulator does a product at its wait and poisons the sums until then, so a forgotten wait, commit or
// wgmma_fence shows there, as does a tile that is loaded again too early. A forgotten fence_async_proxy shows
// on a GPU only.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <ptx.cuh>
#include "llmc/attention_softmax.cuh"
#include "llmc/attention_tile.cuh"
#include "llmc/launch.cuh"

namespace attention {

inline constexpr int kWarpgroupThreads = 256;  // two warpgroups of 64 queries
inline constexpr int kWarpgroupKeys = 64;      // scores of 64 x 64 a warpgroup are 32 registers a thread

// 48 KB; every tile starts on a 1024-byte boundary, as the tensor core's swizzle wants.
struct ForwardSm90Shared {
    Tile<kBlockRows> q;
    struct {
        Tile<kWarpgroupKeys> k, v;
    } stage[2];
};
static_assert(sizeof(Tile<kBlockRows>) % 1024 == 0 && sizeof(Tile<kWarpgroupKeys>) % 1024 == 0);

// Probabilities as the left operands of the product with V, 16 keys each.
__device__ inline void pack_probabilities(uint32_t (&p)[4][4], const float (&scores)[1][8][4]) {
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            p[k][i] =
                ptx::pack_bf16(scores[0][2 * k + i / 2][i % 2 * 2], scores[0][2 * k + i / 2][i % 2 * 2 + 1]);
}

// Grid as attention_forward_kernel's.
__global__ void __launch_bounds__(kWarpgroupThreads, 2)
    attention_forward_sm90_kernel(bf16* out, float* lse, const bf16* qkv, int T, int NH) {
    ForwardSm90Shared& s = shared<ForwardSm90Shared>();
    const int blocks = (T + kBlockRows - 1) / kBlockRows;
    const int head = blockIdx.x / blocks, block = blocks - 1 - blockIdx.x % blocks;
    const int warp_row = threadIdx.x / 32 * 16;
    const int block_query = block * kBlockRows, warp_query = block_query + warp_row;
    const int group_last = block_query + threadIdx.x / 128 * 64 + 63;  // the warpgroup's last query
    const int end =
        block_query + kBlockRows < T ? block_query + kBlockRows : T;  // of the keys that the block sees
    const HeadRows<const bf16> keys = packed_rows(qkv, kKey, head, T, NH),
                               values = packed_rows(qkv, kValue, head, T, NH);

    load_tile<kWarpgroupThreads>(s.q, packed_rows(qkv, kQuery, head, T, NH), block_query, T);
    load_tile<kWarpgroupThreads>(s.stage[0].k, keys, 0, T);
    load_tile<kWarpgroupThreads>(s.stage[0].v, values, 0, T);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::fence_async_proxy();
    __syncthreads();
    uint32_t q[4][4], p[4][4];
#pragma unroll
    for (int k = 0; k < 4; k++) ptx::ldmatrix_x4(q[k], block_down(s.q, warp_row, 16 * k));

    float o[1][8][4], scores[1][8][4], sum[1][2] = {{0.0f, 0.0f}}, reference[1][2] = {{-INFINITY, -INFINITY}};
    fill(o, 0.0f);
    for (int key = 0, stage = 0; key < end; key += kWarpgroupKeys, stage ^= 1) {
        if (key + kWarpgroupKeys < end) {  // its stage was free at the last barrier
            load_tile<kWarpgroupThreads>(s.stage[stage ^ 1].k, keys, key + kWarpgroupKeys, T);
            load_tile<kWarpgroupThreads>(s.stage[stage ^ 1].v, values, key + kWarpgroupKeys, T);
            ptx::cp_async_commit();
        }
        if (key <= group_last) {
            ptx::wgmma_fence();
            ptx::wgmma_transposed<false>(scores[0], q[0], s.stage[stage].k.bytes, 0);
#pragma unroll
            for (int k = 1; k < 4; k++)
                ptx::wgmma_transposed<true>(scores[0], q[k], s.stage[stage].k.bytes, 16 * k);
            ptx::wgmma_commit();
            ptx::wgmma_wait_all(scores[0]);
            if (key + kWarpgroupKeys > warp_query + 1) mask_future_keys(scores, warp_query, key);
            softmax_step(scores, o, reference, sum);
            pack_probabilities(p, scores);
            ptx::wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; k++) ptx::wgmma(o[0], p[k], s.stage[stage].v.bytes, 16 * k);
            ptx::wgmma_commit();
            ptx::wgmma_wait_all(o[0]);
        }
        ptx::cp_async_wait<0>();
        ptx::fence_async_proxy();
        __syncthreads();  // the next stage is complete, and this one is free
    }

    float inverse[1][2];
    finish_softmax(inverse, lse + static_cast<size_t>(head) * T, warp_query, T, reference, sum);
    store_rows(plain_rows(out, head, T, NH), warp_query, T, s.q, warp_row, o, inverse);
}

// As attention_forward in the bf16 build, with the same contract, on a GPU of compute capability 9.0 and code
// for sm_90a.
inline void forward_sm90(bf16* out, float* lse, const bf16* qkv, int B, int T, int NH, Gpu& gpu) {
    const int64_t blocks = ceil_div(T, kBlockRows) * B * NH;
    launch<ForwardSm90Shared>(attention_forward_sm90_kernel, {blocks, kWarpgroupThreads}, gpu, out, lse, qkv,
                              T, NH);
}

}  // namespace attention
