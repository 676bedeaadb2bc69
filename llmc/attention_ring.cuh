// How Hopper's attention kernels load tiles: boxes of a tensor by TMA (the tensor memory accelerator), into a
// ring of stages.
//
// One thread starts a copy of a whole tile with one instruction; addresses, the swizzle and the zeros beyond
// T are the hardware's. The bytes count at a barrier in shared memory (mbarrier), so that a warpgroup waits
// for its tile without waiting for the other warpgroup, and nothing has to be fenced: tensor cores read
// through the same proxy that the copies write through.
//
// Tile i lies in stage i % 4. In the step of tile 4:
//
//     stage    0         1                2              3
//     tile     4         5                6, for 2       3
//              is read   has come, most   is sent for    may still be read by the other
//                        likely                          warpgroup, one step behind
//
// Thread 0 of the block sends for tiles beside its other work: no warp does nothing but load. In the step of
// tile i that is tile i + 2, into the stage of tile i - 2: it waits for the other warpgroup only where that
// is about a step behind, and a copy has a step's time to come.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cuda.h>  // CUtensorMap
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <ptx.cuh>
#include "llmc/attention_tile.cuh"
#include "llmc/gpu.cuh"

namespace attention {

inline constexpr int kBoxRows = 64;

// What TMA must know of x (B, T, width) in bf16 to copy boxes of 64 rows and 64 columns: its address, its
// shape, the swizzle of Tile. Boxes don't cross a sequence's end: rows from T on are zeros. Made on the host
// in about a microsecond and handed to kernels as a parameter. (CUDA driver API, cuTensorMapEncodeTiled, by
// the runtime's entry point: the program doesn't link with the driver, so that it starts where none is.)
inline CUtensorMap box_map(const bf16* x, int B, int T, int width) {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
        CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                    cudaEnableDefault, &result));
#else
        CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result));
#endif
        if (result != cudaDriverEntryPointSuccess)
            fatal(
                "the GPU's driver has no cuTensorMapEncodeTiled; a driver for CUDA 12.0 or newer is needed");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    const uint64_t rows = static_cast<uint64_t>(T), row_bytes = sizeof(bf16) * static_cast<uint64_t>(width);
    const cuuint64_t shape[] = {static_cast<uint64_t>(width), rows, static_cast<uint64_t>(B)};
    const cuuint64_t strides[] = {row_bytes, rows * row_bytes};
    const cuuint32_t box[] = {kHeadSize, kBoxRows, 1}, steps[] = {1, 1, 1};
    CUtensorMap map;
    const CUresult status =
        encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<bf16*>(x), shape, strides, box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS)
        fatal("cuTensorMapEncodeTiled failed with error %d for a tensor (%d, %d, %d) in bf16 at %p",
              static_cast<int>(status), B, T, width, static_cast<const void*>(x));
    return map;
}

// The rows of one head, as boxes: head `head` = b NH + h of a tensor (B, T, ..., NH, 64); `which` counts in
// units of NH heads.
struct HeadBoxes {
    const CUtensorMap& map;
    int column, b;
    __device__ HeadBoxes(const CUtensorMap& map_, int which, int head, int NH)
        : map(map_), column((which * NH + head % NH) * kHeadSize), b(head / NH) {}

    // Starts the copy of rows first .. first + kRows - 1, sizeof(tile) bytes that count at `barrier`. One
    // thread.
    template <int kRows>
    __device__ void load(Tile<kRows>& tile, int first, ptx::Mbarrier* barrier) const {
        static_assert(kRows % kBoxRows == 0);
#pragma unroll
        for (int row = 0; row < kRows; row += kBoxRows)
            ptx::bulk_load_box(tile.bytes + row * kRowBytes, map, column, first + row, b, barrier);
    }
};

// Stages of shared memory, and for each the barriers of its copies and of its readers.
template <class Stage>
struct Ring {
    static constexpr int kStages = 4;  // a power of two: a tile's stage and phase are bits of its number
    static constexpr int kAhead = 2;
    Stage stage[kStages];
    ptx::Mbarrier full[kStages], empty[kStages];
    ptx::Mbarrier rows;  // of what the block reads once: its own rows

    // One thread, before any other call and its own copies; `warps` release each tile.
    __device__ void init(int warps) {
#pragma unroll
        for (int i = 0; i < kStages; i++) {
            ptx::mbarrier_init(&full[i], 1);
            ptx::mbarrier_init(&empty[i], static_cast<unsigned>(warps));
        }
        ptx::mbarrier_init(&rows, 1);
        ptx::fence_async_proxy();
    }

    __device__ Stage& operator[](int tile) { return stage[slot(tile)]; }
    __device__ static unsigned slot(int tile) { return static_cast<unsigned>(tile) % kStages; }
    __device__ static unsigned parity(int tile) { return static_cast<unsigned>(tile) / kStages % 2; }

    // Announces the copies of a tile, which its stage is free for; returns the barrier that they name. The
    // thread that loads.
    __device__ ptx::Mbarrier* begin_load(int tile, unsigned bytes) {
        if (tile >= kStages) ptx::mbarrier_wait(&empty[slot(tile)], parity(tile - kStages));
        ptx::mbarrier_arrive_expect(&full[slot(tile)], bytes);
        return &full[slot(tile)];
    }
    // load(tile) by the thread that loads: for the first tiles of all `tiles`, before the first step, and in
    // the step of `tile`, where every thread comes, for tile + kAhead.
    template <class Load>
    __device__ static void load_first(int tiles, Load load) {
        for (int tile = 0; tile < min(tiles, kStages); tile++) load(tile);
    }
    template <class Load>
    __device__ static void load_ahead(int tile, int tiles, Load load) {
        if (threadIdx.x == 0 && tile + kAhead >= kStages && tile + kAhead < tiles) load(tile + kAhead);
    }
    // Every thread that reads the tile, before it does; tiles in their order, none left out.
    __device__ void wait(int tile) { ptx::mbarrier_wait(&full[slot(tile)], parity(tile)); }
    // Every warp, when its 32 threads have read the tile and their products with it are complete.
    __device__ void release(int tile) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&empty[slot(tile)]);
    }
};

}  // namespace attention
