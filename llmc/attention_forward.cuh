// Causal self-attention, forward, head size 64. For each sequence and head, with queries Q, keys K, values V
// (T, 64):
//
//     S = Q K^T / 8, key j <= query i only     P = softmax(S) by rows     O = P V     L_i = log2 sum_j e^S_ij
//
// O (B, T, NH, 64) goes on to the projection; L (B, NH, T), in log2 units, is all that backward needs to make
// P again. S and P exist only in registers, 128 x 64 at a time (Dao et al. 2022, "FlashAttention"; Dao 2023,
// "FlashAttention-2").
//
// A block owns 128 queries of a head and walks the keys from the first to the diagonal, 64 at a time:
//
//            keys 0   64  128  192  256 ...
//     queries   0 [ m  | m ]               m: the tile crosses the diagonal and is masked, the others aren't;
//     queries 128 [    |    | m  | m ]     a warp skips tiles that lie after its last query.
//     queries 256 [    |    |    |    | m
//
// Q is read once, into registers. K and V tiles come by cp.async into two stages, the next one while this one
// is used: one barrier a tile.
//
// Softmax is the online one of attention_softmax.cuh. On Hopper attention_forward_sm90.cuh is a second way to
// the same result; kPreferWgmma in attention_tile.cuh chooses.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <ptx.cuh>
#include "llmc/attention_fp32.cuh"  // attention_forward_fp32_kernel
#include "llmc/attention_forward_sm90.cuh"
#include "llmc/attention_softmax.cuh"
#include "llmc/attention_tile.cuh"
#include "llmc/launch.cuh"

namespace attention {

inline constexpr int kQueries = kBlockRows;  // fewer would read K and V from L2 more often
inline constexpr int kKeys = 64;  // scores of 32 x 64 a warp are 64 registers a thread; 128 keys would spill

struct ForwardShared {  // 48 KB: two blocks an SM on every GPU from sm_80
    Tile<kQueries> q;   // at the end the rows of O on their way out
    struct {
        Tile<kKeys> k, v;
    } stage[2];
};

// Grid: the query blocks of a head, longest first, head by head, so that the blocks that run together share K
// and V in L2.
__global__ void __launch_bounds__(kThreads, 2)
    attention_forward_kernel(bf16* out, float* lse, const bf16* qkv, int T, int NH) {
    ForwardShared& s = shared<ForwardShared>();
    const int blocks = (T + kQueries - 1) / kQueries;
    const int head = blockIdx.x / blocks, block = blocks - 1 - blockIdx.x % blocks;
    const int warp_row = threadIdx.x / 32 * kWarpRows;
    const int block_query = block * kQueries, warp_query = block_query + warp_row;
    const int end =
        block_query + kQueries < T ? block_query + kQueries : T;  // of the keys that the block sees
    const HeadRows<const bf16> keys = packed_rows(qkv, kKey, head, T, NH),
                               values = packed_rows(qkv, kValue, head, T, NH);

    load_tile(s.q, packed_rows(qkv, kQuery, head, T, NH), block_query, T);
    load_tile(s.stage[0].k, keys, 0, T);
    load_tile(s.stage[0].v, values, 0, T);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    uint32_t q[4][2][4];
    load_warp_rows(q, s.q, warp_row);

    float o[2][8][4], reference[2][2], sum[2][2];
    fill(o, 0.0f);
#pragma unroll
    for (int i = 0; i < 4; i++) reference[i / 2][i % 2] = -INFINITY, sum[i / 2][i % 2] = 0.0f;

    for (int key = 0, stage = 0; key < end; key += kKeys, stage ^= 1) {
        if (key + kKeys < end) {  // its stage was free at the last barrier
            load_tile(s.stage[stage ^ 1].k, keys, key + kKeys, T);
            load_tile(s.stage[stage ^ 1].v, values, key + kKeys, T);
            ptx::cp_async_commit();
        }
        if (key < warp_query + kWarpRows) {
            float scores[2][kKeys / 8][4];
            fill(scores, 0.0f);
            multiply_transposed(scores, q, s.stage[stage].k, 0);
            if (key + kKeys > warp_query + 1) mask_future_keys(scores, warp_query, key);
            float correction[2][2];
            if (move_references(reference, correction, scores)) {
                rescale(sum, correction);
                rescale(o, correction);
            }
            probabilities(scores, sum, reference);
            multiply_accumulators(o, scores, s.stage[stage].v, 0);
        }
        ptx::cp_async_wait<0>();
        __syncthreads();  // the next stage is complete, and this one is free
    }

    float inverse[2][2];
    finish_softmax(inverse, lse + static_cast<size_t>(head) * T, warp_query, T, reference, sum);
    store_rows(plain_rows(out, head, T, NH), warp_query, T, s.q, warp_row, o, inverse);
}

// The two builds' versions of attention_forward below; the tests call every one.
inline void forward(bf16* out, float* lse, const bf16* qkv, int B, int T, int NH, Gpu& gpu,
                    Products products = Products::Preferred) {
    if (use_wgmma(products, gpu)) return forward_sm90(out, lse, qkv, B, T, NH, gpu);
    const int64_t blocks = ceil_div(T, kQueries) * B * NH;
    launch<ForwardShared>(attention_forward_kernel, {blocks, kThreads}, gpu, out, lse, qkv, T, NH);
}
inline void forward(float* out, float* lse, const float* qkv, int B, int T, int NH, Gpu& gpu,
                    Products = Products::Preferred) {
    const int64_t blocks = ceil_div(T, kRowThreads) * B * NH;
    launch(attention_forward_fp32_kernel, {blocks, kRowThreads}, gpu, out, lse, qkv, T, NH);
}

}  // namespace attention

// out = causal attention of qkv, lse = log2 of the softmax denominators of the scores in log2 units (see the
// head of the file; attention_backward wants both).
//   out (B, T, NH 64) and lse (B, NH, T) written, qkv (B, T, 3, NH, 64) read; no aliasing. Any B, T, NH >= 1
//   with fewer than 2^31 blocks of 128 queries. Async on gpu.stream, deterministic.
inline void attention_forward(floatX* out, float* lse, const floatX* qkv, int B, int T, int NH, Gpu& gpu) {
    attention::forward(out, lse, qkv, B, T, NH, gpu);
}
