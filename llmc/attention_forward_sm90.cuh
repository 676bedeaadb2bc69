// Causal self-attention, forward, by Hopper's warpgroup products (wgmma) and bulk copies (TMA; Shah et al.
// 2024, "FlashAttention-3"). It computes what attention_forward.cuh computes, which explains it; here only
// the difference.
//
// A block owns 128 queries, but with two warpgroups of 64 rows, 16 a warp: the tensor cores read K and V from
// shared memory themselves, so that 16 rows a warp cost no more shared-memory traffic than 64, and a thread
// needs half the registers. Four warpgroups (two blocks) share an SM, each at its own pace: tiles come
// through the ring of attention_ring.cuh, and after the first barrier nothing makes the warpgroups wait for
// each other.
//
// Softmax runs beside products, one tile ahead of them:
//
//     tensor cores   S0 = Q K0^T |               | S1 = Q K1^T | O += P0 V0    | S2 = Q K2^T | O += P1 V1
//     the warps                  | P0 of S0      |             | P1 of S1      |             | P2 of S2
//
// P1 belongs to a later reference than O has by then, so O is rescaled (seldom: attention_softmax.cuh) when
// the product with P0 is done. Where the compiler sees nothing but registers between two waits it moves the
// second up to the first, and the overlap is gone; the branch in which thread 0 starts the next copies lies
// between them, which keeps it in its place, and dev/check_sass.py looks whether it stayed.
//
// NOT the default (kPreferWgmma in attention_tile.cuh): compiled (122 registers, no spill, nothing
// serialised) and run in the simulator, not measured on a GPU. Computed cycles of an SM for a tile of 128 x
// 64, mma.sync's in brackets: products 512 (826), 2^x 512 (512), instruction issue 460 (660), shared memory
// 384 (512). So the bound falls from 826 to 512, and at T = 1024 one may hope for 265 to 300 TFLOP/s where
// mma.sync reaches 230: 1% of a step. What would be next: blocks that stay and take one query block after
// another, so that the first loads and the last stores of a block are hidden by more than the SM's other one.
//
// The simulator does a product at its wait and poisons the sums until then, and a copy lands when nobody can
// go on without it: a forgotten wait, commit, fence or release shows there, as does a tile that is loaded
// again too early.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <ptx.cuh>
#include "llmc/attention_ring.cuh"
#include "llmc/attention_softmax.cuh"
#include "llmc/attention_tile.cuh"
#include "llmc/launch.cuh"

namespace attention {

inline constexpr int kWarpgroupThreads = 256;  // two warpgroups of 64 queries
inline constexpr int kWarpgroupKeys = 64;      // scores of 64 x 64 a warpgroup are 32 registers a thread

struct KeyValueStage {
    Tile<kWarpgroupKeys> k, v;
};

// 80 KB, two blocks an SM; every tile starts on a 1024-byte boundary, as the tensor core's swizzle wants.
struct ForwardSm90Shared {
    Tile<kBlockRows> q;
    Ring<KeyValueStage> ring;
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

// scores = the warpgroup's 64 rows times the transpose of `right`. Starts and commits the product.
__device__ inline void start_scores(float (&scores)[1][8][4], const uint32_t (&left)[4][4],
                                    const Tile<kWarpgroupKeys>& right) {
    ptx::wgmma_transposed<false>(scores[0], left[0], right.bytes, 0);
#pragma unroll
    for (int k = 1; k < 4; k++) ptx::wgmma_transposed<true>(scores[0], left[k], right.bytes, 16 * k);
    ptx::wgmma_commit();
}

// sum += left times `right`. Starts and commits the product.
__device__ inline void start_sum(float (&sum)[1][8][4], const uint32_t (&left)[4][4],
                                 const Tile<kWarpgroupKeys>& right) {
#pragma unroll
    for (int k = 0; k < 4; k++) ptx::wgmma(sum[0], left[k], right.bytes, 16 * k);
    ptx::wgmma_commit();
}

// Starts the copies of 64 keys and values.
__device__ inline void load_keys(Ring<KeyValueStage>& ring, int tile, const HeadBoxes& keys,
                                 const HeadBoxes& values) {
    ptx::Mbarrier* barrier = ring.begin_load(tile, sizeof(KeyValueStage));
    keys.load(ring[tile].k, tile * kWarpgroupKeys, barrier);
    values.load(ring[tile].v, tile * kWarpgroupKeys, barrier);
}

// Grid as attention_forward_kernel's.
__global__ void __launch_bounds__(kWarpgroupThreads, 2)
    attention_forward_sm90_kernel(bf16* out, float* lse, const __grid_constant__ CUtensorMap qkv, int T,
                                  int NH) {
    ForwardSm90Shared& s = shared<ForwardSm90Shared>();
    const int blocks = (T + kBlockRows - 1) / kBlockRows;
    const int head = blockIdx.x / blocks, block = blocks - 1 - blockIdx.x % blocks;
    const int block_query = block * kBlockRows, warp_row = threadIdx.x / 32 * 16;
    const int group = ptx::uniform(threadIdx.x / 128), warp_query = block_query + warp_row;
    const int end = min(block_query + kBlockRows, T);  // of the keys that the block sees
    const int tiles = (end + kWarpgroupKeys - 1) / kWarpgroupKeys;
    const int my_tiles = min(tiles, 2 * block + group + 1);  // that the warpgroup sees
    const HeadBoxes keys(qkv, kKey, head, NH), values(qkv, kValue, head, NH);

    const auto load = [&](int tile) { load_keys(s.ring, tile, keys, values); };
    if (threadIdx.x == 0) {
        s.ring.init(kWarpgroupThreads / 32);
        ptx::mbarrier_arrive_expect(&s.ring.rows, sizeof(s.q));
        HeadBoxes(qkv, kQuery, head, NH).load(s.q, block_query, &s.ring.rows);
        s.ring.load_first(tiles, load);
    }
    __syncthreads();  // the barriers are there
    uint32_t q[4][4], p[4][4];
    ptx::mbarrier_wait(&s.ring.rows, 0);
#pragma unroll
    for (int k = 0; k < 4; k++) ptx::ldmatrix_x4(q[k], block_down(s.q, warp_row, 16 * k));

    float o[1][8][4], scores[1][8][4], sum[1][2] = {{0.0f, 0.0f}}, reference[1][2] = {{-INFINITY, -INFINITY}};
    float correction[1][2];
    fill(o, 0.0f);
    s.ring.wait(0);
    ptx::wgmma_fence();
    start_scores(scores, q, s.ring[0].k);
    ptx::wgmma_wait<0>(scores[0]);
    if (kWarpgroupKeys > warp_query + 1) mask_future_keys(scores, warp_query, 0);
    move_references(reference, correction, scores);
    probabilities(scores, sum, reference);
    pack_probabilities(p, scores);
    for (int tile = 1; tile < my_tiles; tile++) {
        const int key = tile * kWarpgroupKeys;
        s.ring.wait(tile);
        ptx::wgmma_fence();
        start_scores(scores, q, s.ring[tile].k);
        start_sum(o, p, s.ring[tile - 1].v);
        ptx::wgmma_wait<1>(scores[0]);
        if (key + kWarpgroupKeys > warp_query + 1) mask_future_keys(scores, warp_query, key);
        const bool moved = move_references(reference, correction, scores);
        if (moved) rescale(sum, correction);
        probabilities(scores, sum, reference);
        s.ring.load_ahead(tile, tiles, load);
        ptx::wgmma_wait<0>(o[0]);  // stays below the exponentials because of its branch
        s.ring.release(tile - 1);
        if (moved) rescale(o, correction);
        pack_probabilities(p, scores);
    }
    ptx::wgmma_fence();
    start_sum(o, p, s.ring[my_tiles - 1].v);
    ptx::wgmma_wait<0>(o[0]);

    float inverse[1][2];
    finish_softmax(inverse, lse + static_cast<size_t>(head) * T, warp_query, T, reference, sum);
    store_rows(plain_rows(out, head, T, NH), warp_query, T, s.q, warp_row, o, inverse);
}

// As attention_forward in the bf16 build, with the same contract, on a GPU of compute capability 9.0 and code
// for sm_90a.
inline void forward_sm90(bf16* out, float* lse, const bf16* qkv, int B, int T, int NH, Gpu& gpu) {
    const int64_t blocks = ceil_div(T, kBlockRows) * B * NH;
    launch<ForwardSm90Shared>(attention_forward_sm90_kernel, {blocks, kWarpgroupThreads}, gpu, out, lse,
                              box_map(qkv, B, T, 3 * NH * kHeadSize), T, NH);
}

}  // namespace attention
