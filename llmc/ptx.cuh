// Every PTX instruction that a kernel uses, as a named function: the GPU's side.
//
// dev/sim/ptx.cuh has the same names with CPU bodies, so kernels include <ptx.cuh> and the include path
// decides. All words take generic pointers; the conversion to 32-bit shared addresses stays in here.
// dev/kernels/ptx.cu tests each word alone against the index formulas of the PTX ISA, on a GPU and in the
// simulator.
//
// Source: PTX ISA 8.x, the sections named at each word. All but the last section is sm_80 and up.
#pragma once
#include <cstdint>
#include <cuda.h>  // CUtensorMap
#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace ptx {

// The block's dynamic shared memory; kernels go through shared<T>() of launch.cuh. Aligned to 1024 bytes at
// the base of the window, which the 128-byte swizzles of cp.async tiles and TMA need.
__device__ inline unsigned char* dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
    return dynamic_shared_memory;
}

__device__ inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 2^x; relative error 2^-22 (CUDA documents 2 ulp for exp2f, which becomes this word), subnormal results
// flushed to zero. (ex2.approx.ftz.f32)
__device__ inline float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Asynchronous copy of 16 bytes from global to shared memory, both 16-byte aligned, past L1. (cp.async.cg)
// The bytes are there, for this thread, after the cp_async_wait that covers their group; for others after a
// barrier too.
__device__ inline void cp_async_16(void* shared_dst, const void* global_src) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared_dst)),
                 "l"(global_src)
                 : "memory");
}

// As cp_async_16; writes 16 zero bytes, and does not read the source, where valid is false.
__device__ inline void cp_async_16_zfill(void* shared_dst, const void* global_src, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared_dst)),
                 "l"(global_src), "r"(valid ? 16 : 0)
                 : "memory");
}

// Closes the group of this thread's copies since the last commit. (cp.async.commit_group)
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's newest groups are still under way. (cp.async.wait_group)
template <int N>
__device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8x8 matrices of 16-bit elements from shared memory; lane l gives the address of row l % 8 of matrix l
// / 8 (16 bytes, aligned). r[i] of lane l holds elements (l / 4, 2 (l % 4)) and the next of matrix i.
// (ldmatrix .x4)
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

// As ldmatrix_x4, each 8x8 matrix transposed: r[i] of lane l holds elements (2 (l % 4), l / 4) and (2 (l % 4)
// + 1, l / 4).
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

// d (16, 8) += a (16, 16) b (16, 8), bf16 operands, fp32 sums. With g = lane / 4, t = lane % 4: a[0..3] hold
// rows g, g + 8, g, g + 8 at columns 2t (+1), 2t, 2t + 8, 2t + 8; b0, b1 hold rows 2t (+1), 2t + 8 of column
// g; d[0..3] are (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1). (mma.sync.aligned.m16n8k16)
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to nearest even bf16, lo in the lower half. (cvt.rn.bf16x2.f32)
__device__ inline uint32_t pack_bf16(float lo, float hi) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
    return packed;
}

// x, as a value of its own to the compiler: what depends on it is computed where it stands, not kept in
// registers since an earlier use. For kernels that need every register.
__device__ inline int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// x of lane 0, which all lanes have: the compiler then keeps what depends on it in uniform registers, where
// it costs one instruction a warp at most and no vector register. (shfl.sync)
__device__ inline int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// A barrier of the first `threads` threads that name it, a multiple of 32; id 1 .. 15 (0 is __syncthreads).
// (bar.sync)
__device__ inline void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- sm_90a: barriers in shared memory, bulk copies ------------------------------------------------------
//
// Built for other architectures the words from here on trap, and sm_90 without the a is refused: there only
// the launch could tell.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "compile for sm_90a instead of sm_90 (make GPU_ARCH=90a): Hopper's tensor-core words exist only there"
#endif
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PTX_SM90A(...) asm volatile(__VA_ARGS__)
#else
#define PTX_SM90A(...) __trap()
#endif

// A barrier that counts in its place in shared memory: phase 0, 1, 2 ... is complete when `arrivals` threads
// have arrived and all bytes that were announced have come; then the next phase begins. (PTX ISA, "mbarrier")
using Mbarrier = uint64_t;

// Begins phase 0, by one thread. Other threads wait for it at a __syncthreads; copies want a
// fence_async_proxy.
__device__ inline void mbarrier_init(Mbarrier* barrier, unsigned arrivals) {
    PTX_SM90A("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
              : "memory");
}

// This thread arrives; what it did before is seen by those who wait. (mbarrier.arrive, release)
__device__ inline void mbarrier_arrive(Mbarrier* barrier) {
    PTX_SM90A("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// As mbarrier_arrive, and the phase waits for `bytes` bytes of copies too. (mbarrier.arrive.expect_tx)
__device__ inline void mbarrier_arrive_expect(Mbarrier* barrier, unsigned bytes) {
    PTX_SM90A("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
              "r"(bytes)
              : "memory");
}

// Waits until the phase of that parity is complete, the running one or the one before it: a thread may not be
// two phases behind. (mbarrier.try_wait.parity, acquire)
__device__ inline void mbarrier_wait(Mbarrier* barrier, unsigned parity) {
    PTX_SM90A(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; "
        "@!done bra again; }" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// Starts the copy of a box of a tensor of three dimensions to shared memory, by one thread: the box that
// `map` tells of, from (x, y, z) on, x the innermost; what lies outside the tensor becomes zeros. The bytes
// count at the barrier, all of the box. dst: a multiple of 128. (cp.async.bulk.tensor.3d, the tensor memory
// accelerator, TMA)
__device__ inline void bulk_load_box(void* shared_dst, const CUtensorMap& map, int x, int y, int z,
                                     Mbarrier* barrier) {
    PTX_SM90A(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(shared_dst)),
        "l"(&map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier))
        : "memory");
}

// The same for `bytes` bytes in a row; bytes and both addresses multiples of 16. (cp.async.bulk)
__device__ inline void bulk_load(void* shared_dst, const void* global_src, unsigned bytes,
                                 Mbarrier* barrier) {
    PTX_SM90A("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                  shared_address(shared_dst)),
              "l"(global_src), "r"(bytes), "r"(shared_address(barrier))
              : "memory");
}

// Ordinary writes of this thread to shared memory before it, a barrier's initialisation too, are seen by bulk
// copies and warpgroup products after it (and after a barrier, where other threads start them).
// (fence.proxy.async)
__device__ inline void fence_async_proxy() { PTX_SM90A("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- sm_90a: products of a warpgroup ---------------------------------------------------------------------
//
// Four consecutive warps, the first a multiple of 4, multiply together; warp w of them has rows 16 w .. 16 w
// + 15 of the result, laid out as in mma_m16n8k16, and of the left operand where that lies in registers. What
// is read from shared memory, the tensor core reads itself: tiles of 128-byte rows from a 1024-byte boundary
// on, whose row r keeps its 16-byte chunk c at place c ^ (r % 8) (PTX ISA, "128-Byte swizzling mode").
//
// Products are started, closed into groups by wgmma_commit, and done after the wgmma_wait that covers their
// group. Until then the kernel leaves the accumulators and the tiles alone; left operands in registers are
// values, which the compiler keeps as long as they are read.

// The 32 registers of d (64, 64) as operands %0 .. %31, and their names in the instruction.
#define PTX_OUT8(d, n)                                                                                \
    "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3]), "+f"(d[n + 1][0]), "+f"(d[n + 1][1]), \
        "+f"(d[n + 1][2]), "+f"(d[n + 1][3])
#define PTX_OUT(d) PTX_OUT8(d, 0), PTX_OUT8(d, 2), PTX_OUT8(d, 4), PTX_OUT8(d, 6)
#define PTX_OUT_NAMES                                                         \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#define PTX_WGMMA "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " PTX_OUT_NAMES

// Registers written before it may be operands of products after it. (wgmma.fence)
__device__ inline void wgmma_fence() { PTX_SM90A("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of the warpgroup's products since the last commit. (wgmma.commit_group)
__device__ inline void wgmma_commit() { PTX_SM90A("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most N of the newest groups are still under way. d stands for accumulators that are complete
// after it: none of their uses moves before it, which the compiler would do, since it takes a product for
// done when it is started. Where a wait completes several, each is named by a wait of its own.
// (wgmma.wait_group)
template <int N>
__device__ inline void wgmma_wait(float (&d)[8][4]) {
    PTX_SM90A("wgmma.wait_group.sync.aligned %32;" : PTX_OUT(d) : "n"(N) : "memory");
}

// The matrix descriptor of a tile's block that starts at byte `offset` of it: address / 16 in bits 0 .. 13,
// 1024 bytes from eight rows to the next eight in bits 32 .. 45, swizzle mode 1 (128 bytes) in bits 62 .. 63;
// the leading offset in bits 16 .. 29 isn't read, since no operand here is wider than a row of 128 bytes.
// (PTX ISA, "Matrix Descriptor Format") The offset is added last and in 64 bits, one instruction a product;
// 14 bits hold all addresses of a block, so nothing is carried.
__device__ inline uint64_t matrix_descriptor(const unsigned char* tile, int offset) {
    constexpr uint32_t kLeading = 1 << 16, kForm = 1024 >> 4 | 1 << 30;
    const uint32_t start = (shared_address(tile) >> 4) + kLeading;
    return (uint64_t{kForm} << 32 | start) + static_cast<uint64_t>(offset / 16);
}

// d (64, 64) = or, kAdd, += a (64, 16) times the transpose of the tile's block of 64 rows and 16 columns from
// `column` on. (wgmma.mma_async.m64n64k16, A in registers, B K-major)
template <bool kAdd>
__device__ inline void wgmma_transposed(float (&d)[8][4], const uint32_t (&a)[4], const unsigned char* tile,
                                        int column) {
    PTX_SM90A("{ .reg .pred add; setp.ne.b32 add, %37, 0; " PTX_WGMMA
              "{%32, %33, %34, %35}, %36, add, 1, 1, 0; }"
              : PTX_OUT(d)
              : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(matrix_descriptor(tile, 2 * column)),
                "n"(kAdd ? 1 : 0));
}

// d (64, 64) += a (64, 16) times the tile's 16 rows from `row` on, 64 columns. (the same, B MN-major)
__device__ inline void wgmma(float (&d)[8][4], const uint32_t (&a)[4], const unsigned char* tile, int row) {
    PTX_SM90A("{ .reg .pred add; setp.ne.b32 add, %37, 0; " PTX_WGMMA
              "{%32, %33, %34, %35}, %36, add, 1, 1, 1; }"
              : PTX_OUT(d)
              : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(matrix_descriptor(tile, 128 * row)), "n"(1));
}

// d (64, 64) = or, kAdd, += 16 columns from `column` on of the 64 rows at `left` times the transpose of those
// of the 64 rows at `right`. (the same, A in shared memory, A and B K-major)
template <bool kAdd>
__device__ inline void wgmma_tiles(float (&d)[8][4], const unsigned char* left, const unsigned char* right,
                                   int column) {
    PTX_SM90A("{ .reg .pred add; setp.ne.b32 add, %34, 0; " PTX_WGMMA "%32, %33, add, 1, 1, 0, 0; }"
              : PTX_OUT(d)
              : "l"(matrix_descriptor(left, 2 * column)), "l"(matrix_descriptor(right, 2 * column)),
                "n"(kAdd ? 1 : 0));
}
#undef PTX_WGMMA
#undef PTX_OUT_NAMES
#undef PTX_OUT
#undef PTX_OUT8
#undef PTX_SM90A

}  // namespace ptx
