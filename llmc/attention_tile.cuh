// What the attention kernels of the bf16 build share: tiles of a head in shared memory, the operands of the
// tensor-core products, and the way back to global memory.
//
// The packed tensor qkv (B, T, 3, NH, 64) is used as the matmul leaves it. A row of a head is 64 bf16 = 128
// bytes = eight 16-byte chunks = each of the 32 banks once; consecutive rows of a head lie 3 NH 64 elements
// apart.
//
// A tile keeps row r's chunk c at place c ^ (r % 8) of row r. One swizzle serves all accesses, each without a
// bank conflict: cp.async writes a row's eight chunks; ldmatrix, transposed or not, reads one chunk of eight
// consecutive rows; accumulators write 4 bytes a lane into one chunk of eight rows. It is also what TMA calls
// SWIZZLE_128B.
//
//     place      0  1  2  3  4  5  6  7
//     row 0      0  1  2  3  4  5  6  7      chunk c holds elements 8 c .. 8 c + 7
//     row 1      1  0  3  2  5  4  7  6
//     row 2      2  3  0  1  6  7  4  5
//     ...
//     row 7      7  6  5  4  3  2  1  0
//
// Products are mma.m16n8k16: a warp owns 32 rows (two 16-row operands), since with 16 each fragment of the
// right operand read from shared memory would feed half as many products, and shared memory would be the
// bound. In an accumulator c[m][n][4] lane l = 4 g + t holds rows 16 m + g (elements 0, 1) and 16 m + g + 8
// (2, 3), columns 8 n + 2 t and the next.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <ptx.cuh>
#include "llmc/gpu.cuh"

namespace attention {

using bf16 = __nv_bfloat16;

inline constexpr int kHeadSize = 64;
inline constexpr float kScale = 0.125f;           // 1 / sqrt(64), exact
inline constexpr float kScaleLog2 = 0.18033688f;  // kScale log2(e): exp(kScale x) = 2^(kScaleLog2 x)

inline constexpr int kWarps = 4;  // two blocks an SM at up to 255 registers a thread
inline constexpr int kThreads = 32 * kWarps;
inline constexpr int kWarpRows = 32;                   // rows of a product that a warp owns
inline constexpr int kBlockRows = kWarps * kWarpRows;  // queries or keys that a block owns

// Which tensor-core products a launch uses: mma.sync runs from sm_80 on, wgmma on compute capability 9.0.
// Without a GPU to measure it on, wgmma isn't the default; this word makes it so on Hopper, forward and
// backward. A build that runs there has code for sm_90a: ptx.cuh refuses sm_90 without the a.
#ifdef ATTENTION_WGMMA  // make ATTENTION=mma_sync|wgmma
inline constexpr bool kPreferWgmma = ATTENTION_WGMMA;
#else
inline constexpr bool kPreferWgmma = false;
#endif
enum class Products { Preferred, MmaSync, Wgmma };
inline bool use_wgmma(Products products, const Gpu& gpu) {
    if (products != Products::Preferred) return products == Products::Wgmma;
    return kPreferWgmma && gpu.properties.major == 9;
}

enum Which { kQuery = 0, kKey = 1, kValue = 2 };

// The rows t = 0 .. T-1 of one head in a packed or plain tensor.
template <class E>
struct HeadRows {
    E* first;
    int stride;  // elements from row to row; an int, so that row() is one 32 x 32 -> 64-bit multiply
    __device__ E* row(int t) const { return first + static_cast<int64_t>(t) * stride; }
};

// Head `head` = b NH + h of a (B, T, 3, NH, 64) tensor, its queries, keys or values.
template <class E>
__device__ inline HeadRows<E> packed_rows(E* qkv, Which which, int head, int T, int NH) {
    const int width = NH * kHeadSize, b = head / NH, h = head % NH;
    return {qkv + (static_cast<int64_t>(b) * T * 3 + which) * width + h * kHeadSize, 3 * width};
}

// The same head of a (B, T, NH, 64) tensor.
template <class E>
__device__ inline HeadRows<E> plain_rows(E* x, int head, int T, int NH) {
    const int width = NH * kHeadSize, b = head / NH, h = head % NH;
    return {x + static_cast<int64_t>(b) * T * width + h * kHeadSize, width};
}

// kRows rows of a head, swizzled.
inline constexpr int kRowBytes = kHeadSize * sizeof(bf16), kChunkBytes = 16;
template <int kRows>
struct Tile {
    alignas(kRowBytes) unsigned char bytes[kRows * kRowBytes];

    __device__ unsigned char* chunk(int row, int index) {
        return bytes + row * kRowBytes + (index ^ row % 8) * kChunkBytes;
    }
};

// Starts the block's copies of rows first .. first + kRows - 1; rows from T on become zeros. Needs a commit.
template <int kBlockThreads = kThreads, int kRows>
__device__ inline void load_tile(Tile<kRows>& tile, HeadRows<const bf16> head, int first, int T) {
    static_assert(kRows * 8 % kBlockThreads == 0);
    const int thread = ptx::opaque(threadIdx.x), chunk = thread % 8, lead = thread / 8;
#pragma unroll
    for (int i = 0; i < kRows * 8 / kBlockThreads; i++) {
        const int row = lead + i * (kBlockThreads / 8);
        ptx::cp_async_16_zfill(tile.chunk(row, chunk), head.row(first + row) + chunk * 8, first + row < T);
    }
}

// A 16 x 16 block at (row, column) of a tile, multiples of 16, comes by one ldmatrix as four 8 x 8 matrices,
// down first or across first. An operand's registers must be neighbours, so that each operand has one order
// that needs no moves. Lane l gives the address of row l % 8 of matrix l / 8; row is added last, since it is
// mostly a constant of the instruction.
//
//     down  | r[0]  r[2] |      across  | r[0]  r[1] |
//           | r[1]  r[3] |              | r[2]  r[3] |
template <int kRows>
__device__ inline const unsigned char* block_down(Tile<kRows>& tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    return tile.chunk(lane % 16, column / 8 + lane / 16) + row * kRowBytes;
}
template <int kRows>
__device__ inline const unsigned char* block_across(Tile<kRows>& tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    return tile.chunk(lane % 8 + lane / 16 * 8, column / 8 + lane / 8 % 2) + row * kRowBytes;
}

// a = 32 rows of 16 columns as the left operand.
template <int kRows>
__device__ inline void load_left(uint32_t (&a)[2][4], Tile<kRows>& tile, int row, int column) {
    const unsigned char* block = block_down(tile, row, column);
    ptx::ldmatrix_x4(a[0], block);
    ptx::ldmatrix_x4(a[1], block + 16 * kRowBytes);
}
// a = the transpose of 16 rows of 32 columns as the left operand.
template <int kRows>
__device__ inline void load_left_transposed(uint32_t (&a)[2][4], Tile<kRows>& tile, int row, int column) {
    ptx::ldmatrix_x4_trans(a[0], block_across(tile, row, column));
    ptx::ldmatrix_x4_trans(a[1], block_across(tile, row, column + 16));
}
// b = a block as the right operand: b[0], b[1] are its columns 0 .. 7, b[2], b[3] its columns 8 .. 15.
template <int kRows>
__device__ inline void load_right(uint32_t (&b)[4], Tile<kRows>& tile, int row, int column) {
    ptx::ldmatrix_x4_trans(b, block_down(tile, row, column));
}
// b = a block's transpose as the right operand.
template <int kRows>
__device__ inline void load_right_transposed(uint32_t (&b)[4], Tile<kRows>& tile, int row, int column) {
    ptx::ldmatrix_x4(b, block_across(tile, row, column));
}

// A warp's 32 rows of a tile, from `row`, as the left operand of products over the head size: 32 registers.
template <int kRows>
__device__ inline void load_warp_rows(uint32_t (&a)[4][2][4], Tile<kRows>& tile, int row) {
#pragma unroll
    for (int k = 0; k < 4; k++) load_left(a[k], tile, row, 16 * k);
}

// c (32, 16) += a (32, 16) b (16, 16); columns 8 n .. 8 n + 15 of c, n even.
template <int kTiles>
__device__ inline void multiply(float (&c)[2][kTiles][4], int n, const uint32_t (&a)[2][4],
                                const uint32_t (&b)[4]) {
#pragma unroll
    for (int m = 0; m < 2; m++) {
        ptx::mma_m16n8k16(c[m][n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16(c[m][n + 1], a[m], b[2], b[3]);
    }
}

// c (32, 8 kTiles) += left (32, 64) times the transpose of rows right_row .. right_row + 8 kTiles - 1 of
// `right`.
template <int kTiles, int kRows>
__device__ inline void multiply_transposed(float (&c)[2][kTiles][4], const uint32_t (&left)[4][2][4],
                                           Tile<kRows>& right, int right_row) {
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {
            uint32_t b[4];
            load_right_transposed(b, right, right_row + 8 * n, 16 * k);
            multiply(c, n, left[k], b);
        }
}

// The same with the left operand, 32 rows from left_row, read from a tile: 8 registers at a time.
template <int kTiles, int kLeftRows, int kRightRows>
__device__ inline void multiply_transposed(float (&c)[2][kTiles][4], Tile<kLeftRows>& left, int left_row,
                                           Tile<kRightRows>& right, int right_row) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
        uint32_t a[2][4];
        load_left(a, left, left_row, 16 * k);
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {
            uint32_t b[4];
            load_right_transposed(b, right, right_row + 8 * n, 16 * k);
            multiply(c, n, a, b);
        }
    }
}

// c (32, 64) += left (32, 8 kTiles), rounded to bf16, times rows right_row .. right_row + 8 kTiles - 1 of
// `right`. The accumulators of a product have the layout of a left operand, so that probabilities never leave
// the registers.
template <int kTiles, int kRows>
__device__ inline void multiply_accumulators(float (&c)[2][8][4], const float (&left)[2][kTiles][4],
                                             Tile<kRows>& right, int right_row) {
#pragma unroll
    for (int k = 0; k < kTiles / 2; k++) {
        uint32_t a[2][4];
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[m][i] =
                    ptx::pack_bf16(left[m][2 * k + i / 2][i % 2 * 2], left[m][2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            uint32_t b[4];
            load_right(b, right, right_row + 16 * k, 8 * n);
            multiply(c, n, a, b);
        }
    }
}

template <int kM, int kTiles>
__device__ inline void fill(float (&c)[kM][kTiles][4], float value) {
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
        for (int n = 0; n < kTiles; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) c[m][n][e] = value;
}

// Scores (queries, keys) with the key after the query become -inf; first_query and first_key belong to row
// and column 0.
template <int kM, int kTiles>
__device__ inline void mask_future_keys(float (&scores)[kM][kTiles][4], int first_query, int first_key) {
    const int lane = threadIdx.x % 32, query = first_query + lane / 4, key = first_key + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
        for (int n = 0; n < kTiles; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (key + 8 * n + e % 2 > query + 16 * m + e / 2 * 8) scores[m][n][e] = -INFINITY;
}

// Writes the warp's rows first .. first + 16 kM - 1 of a head, those below T: the accumulators times
// factor[m][j], j = 0 for row g and 1 for row g + 8, rounded to bf16. They pass through as many rows of
// `staging` from `row` on, which must be the warp's own by then, so that global memory sees whole 128-byte
// rows.
template <int kM, int kRows>
__device__ inline void store_rows(HeadRows<bf16> head, int first, int T, Tile<kRows>& staging, int row,
                                  const float (&c)[kM][8][4], const float (&factor)[kM][2]) {
    const int lane = ptx::opaque(threadIdx.x % 32), g = lane / 4, t = lane % 4;
    __syncwarp();  // no lane reads the staging rows any more
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                *reinterpret_cast<uint32_t*>(staging.chunk(row + 16 * m + 8 * j + g, n) + 4 * t) =
                    ptx::pack_bf16(c[m][n][2 * j] * factor[m][j], c[m][n][2 * j + 1] * factor[m][j]);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4 * kM; i++) {
        const int r = 4 * i + lane / 8;
        if (first + r < T)
            *reinterpret_cast<uint4*>(head.row(first + r) + lane % 8 * 8) =
                *reinterpret_cast<const uint4*>(staging.chunk(row + r, lane % 8));
    }
}

}  // namespace attention
