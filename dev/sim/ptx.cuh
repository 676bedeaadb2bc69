// The words of llmc/ptx.cuh on the CPU: same names, same meaning, and each as late and as strict as the PTX
// ISA allows. A word that a warp executes as one is a meeting of its 32 lanes; the last lane to come does the
// work for all.
#pragma once
#include <cstdint>
#include <cstring>
#include "cuda.h"
#include "cuda_bf16.h"
#include "cuda_runtime.h"

namespace sim {
// In bulk.cpp; here, since only this header knows tensor maps.
void box_issue(void* shared_dst, const CUtensorMap& map, const int (&at)[3], const void* barrier,
               Where where);
}  // namespace sim

namespace ptx {

// The block's dynamic shared memory, poisoned for each block and exactly as long as the launch asked for.
inline unsigned char* dynamic_shared() { return sim::worker->shared; }

// 2^x; subnormal operands and results are zeros of their sign (ex2.approx.ftz.f32).
inline float ex2(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}

// ---- cp.async: the bytes come at the wait, not before -----------------------------------------------------

// Until the wait the destination holds poison, so that whoever reads too early sees it.
SIM_QUIET inline void cp_async_16(void* shared_dst, const void* global_src,
                                  sim::Where where = sim::Where::current()) {
    sim::async_issue(shared_dst, global_src, where);
}
SIM_QUIET inline void cp_async_16_zfill(void* shared_dst, const void* global_src, bool valid,
                                        sim::Where where = sim::Where::current()) {
    sim::async_issue(shared_dst, valid ? global_src : nullptr, where);
}
inline void cp_async_commit() { sim::async_commit(); }
template <int N>
inline void cp_async_wait() {
    sim::async_wait(N);
}

// ---- tensor-core words ------------------------------------------------------------------------------------

namespace detail {

using Halves = uint16_t __attribute__((vector_size(16)));  // a row of an 8x8 matrix

// Rows become columns: three rounds of interleaving row i with row i + 4.
SIM_QUIET inline void transpose(Halves (&m)[8]) {
    const Halves kLow = {0, 8, 1, 9, 2, 10, 3, 11}, kHigh = {4, 12, 5, 13, 6, 14, 7, 15};
    for (int round = 0; round < 3; round++) {
        Halves next[8];
        for (int i = 0; i < 4; i++) {
            next[2 * i] = __builtin_shuffle(m[i], m[i + 4], kLow);
            next[2 * i + 1] = __builtin_shuffle(m[i], m[i + 4], kHigh);
        }
        for (int i = 0; i < 8; i++) m[i] = next[i];
    }
}

// Row r of a matrix is the words of lanes 4 r .. 4 r + 3, so a result register is its matrix row after row.
template <bool kTranspose>
SIM_QUIET inline void ldmatrix(const char* word, uint32_t (&r)[4], const void* shared_row, sim::Where where) {
    const unsigned lane = sim::worker->lane;
    sim::Exchange& x = sim::worker->warp->exchange;
    sim::check_shared(shared_row, 16, word, where);
    x.row[lane] = shared_row;
    sim::meet(word, 0xffffffffu, where, [where](sim::Exchange& all) SIM_QUIET {
        if (sim::race_on) [[unlikely]]
            for (unsigned l = 0; l < 32; l++) sim::race_read(all.row[l], 16, l, where);
        for (int i = 0; i < 4; i++) {
            Halves m[8];
            for (int row = 0; row < 8; row++) memcpy(&m[row], all.row[8 * i + row], 16);
            if (kTranspose) transpose(m);
            memcpy(all.matrix[i], m, sizeof(m));
        }
    });
    for (int i = 0; i < 4; i++) r[i] = x.matrix[i][lane];
}

inline float low(uint32_t pair) { return std::bit_cast<float>(pair << 16); }
inline float high(uint32_t pair) { return std::bit_cast<float>(pair & 0xffff0000u); }

}  // namespace detail

SIM_QUIET inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row,
                                  sim::Where where = sim::Where::current()) {
    detail::ldmatrix<false>("ldmatrix_x4", r, shared_row, where);
}
SIM_QUIET inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row,
                                        sim::Where where = sim::Where::current()) {
    detail::ldmatrix<true>("ldmatrix_x4_trans", r, shared_row, where);
}

// Each lane spreads its fragments into whole matrices of floats (bf16 products are exact there), the last one
// multiplies.
SIM_QUIET inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                   sim::Where where = sim::Where::current()) {
    using namespace detail;
    const unsigned lane = sim::worker->lane, g = lane / 4, t = 2 * (lane % 4);
    sim::Exchange& x = sim::worker->warp->exchange;
    x.a[g][t] = low(a[0]), x.a[g][t + 1] = high(a[0]);
    x.a[g + 8][t] = low(a[1]), x.a[g + 8][t + 1] = high(a[1]);
    x.a[g][t + 8] = low(a[2]), x.a[g][t + 9] = high(a[2]);
    x.a[g + 8][t + 8] = low(a[3]), x.a[g + 8][t + 9] = high(a[3]);
    x.b[t][g] = low(b0), x.b[t + 1][g] = high(b0);
    x.b[t + 8][g] = low(b1), x.b[t + 9][g] = high(b1);
    memcpy(&x.d[g][t], &d[0], 8);
    memcpy(&x.d[g + 8][t], &d[2], 8);
    sim::meet("mma_m16n8k16", 0xffffffffu, where, [](sim::Exchange& all) {
        using Row = float __attribute__((vector_size(32)));
        constexpr int kRows = 8;  // at once, so that the multiply-adds of one row hide behind the others'
        for (int i = 0; i < 16; i += kRows) {
            Row sum[kRows];
            memcpy(sum, all.d[i], sizeof(sum));
            for (int k = 0; k < 16; k++) {
                Row b;
                memcpy(&b, all.b[k], 32);
                for (int r = 0; r < kRows; r++) sum[r] += all.a[i + r][k] * b;
            }
            memcpy(all.d[i], sum, sizeof(sum));
        }
    });
    memcpy(&d[0], &x.d[g][t], 8);
    memcpy(&d[2], &x.d[g + 8][t], 8);
}

// Two floats rounded to nearest even bf16, lo in the lower half (cvt.rn.bf16x2.f32).
inline uint32_t pack_bf16(float lo, float hi) {
    return sim::bf16_bits(lo) | uint32_t{sim::bf16_bits(hi)} << 16;
}

// x; on a GPU, hidden from the compiler's analysis.
inline int opaque(int x) { return x; }

// A barrier of the `threads` threads that name it, a multiple of 32; id 1 .. 15 (bar.sync).
SIM_QUIET inline void barrier_sync(int id, int threads, sim::Where where = sim::Where::current()) {
    sim::barrier("barrier_sync", id, static_cast<unsigned>(threads), where);
}

// x of lane 0.
SIM_QUIET inline int uniform(int x, sim::Where where = sim::Where::current()) {
    return __shfl_sync(0xffffffffu, x, 0, 32, where);
}

// ---- barriers in shared memory, bulk copies (sm_90) -------------------------------------------------------
//
// As late as CUDA allows, and checked: see bulk.cpp.

using Mbarrier = uint64_t;

SIM_QUIET inline void mbarrier_init(Mbarrier* barrier, unsigned arrivals,
                                    sim::Where where = sim::Where::current()) {
    sim::memory_barrier_init(barrier, arrivals, where);
}
SIM_QUIET inline void mbarrier_arrive(Mbarrier* barrier, sim::Where where = sim::Where::current()) {
    sim::memory_barrier_arrive(barrier, 0, "mbarrier_arrive", where);
}
SIM_QUIET inline void mbarrier_arrive_expect(Mbarrier* barrier, unsigned bytes,
                                             sim::Where where = sim::Where::current()) {
    sim::memory_barrier_arrive(barrier, bytes, "mbarrier_arrive_expect", where);
}
SIM_QUIET inline void mbarrier_wait(Mbarrier* barrier, unsigned parity,
                                    sim::Where where = sim::Where::current()) {
    sim::memory_barrier_wait(barrier, parity, where);
}
SIM_QUIET inline void bulk_load_box(void* shared_dst, const CUtensorMap& map, int x, int y, int z,
                                    Mbarrier* barrier, sim::Where where = sim::Where::current()) {
    sim::box_issue(shared_dst, map, {x, y, z}, barrier, where);
}
SIM_QUIET inline void bulk_load(void* shared_dst, const void* global_src, unsigned bytes, Mbarrier* barrier,
                                sim::Where where = sim::Where::current()) {
    sim::bulk_issue(shared_dst, global_src, bytes, barrier, where);
}
inline void fence_async_proxy() { sim::memory_barrier_fence(); }

// ---- products of a warpgroup (sm_90a) --------------------------------------------------------------------
//
// Started by wgmma and done by the wgmma_wait that covers their group: until then the accumulators are
// poison, and the tile is read at the wait, so that a missing commit or wait, and a tile that is filled again
// too early, show. A missing wgmma_fence is an error, and the race record sees a missing fence_async_proxy. A
// warp's rows of the result depend on its own rows of the left operand alone, so each warp does its part.

inline void wgmma_fence() { sim::worker->products[sim::worker->current->thread].fenced = true; }
inline void wgmma_commit() {
    sim::WarpgroupProducts& p = sim::worker->products[sim::worker->current->thread];
    p.group_ends.push_back(p.products.size());
}

namespace detail {

// Chunk `chunk` of row `row` of a swizzled tile of 128-byte rows.
template <class Byte>
inline Byte* swizzled_chunk(Byte* tile, int row, int chunk) {
    return tile + row * 128 + (chunk ^ row % 8) * 16;
}

// Elements (row, column) and (row', column') of such a tile, as a pair.
SIM_QUIET inline uint32_t swizzled_pair(const unsigned char* tile, int row, int column, int next_row,
                                        int next_column) {
    uint16_t low, high;
    memcpy(&low, swizzled_chunk(tile, row, column / 8) + column % 8 * 2, 2);
    memcpy(&high, swizzled_chunk(tile, next_row, next_column / 8) + next_column % 8 * 2, 2);
    return low | uint32_t{high} << 16;
}

// f(chunk) for this lane's share of the 16-byte chunks that a product reads: a block of the right tile, and
// of the left one all 64 rows, since nothing says that a warp's part of the product reads the warp's own rows
// alone.
template <class F>
SIM_QUIET inline void each_chunk(const unsigned char* left, const unsigned char* tile, int at,
                                 bool transposed, F f) {
    for (int i = sim::worker->lane; i < 128; i += 32) {
        const int row = i / 2, chunk = at / 8 + i % 2;
        f(transposed ? swizzled_chunk(tile, row, chunk) : swizzled_chunk(tile, at + i / 8, i % 8));
        if (left) f(swizzled_chunk(left, row, chunk));
    }
}

// Starts a product, which may read from now on: its operands must be there, and ordered before it.
SIM_QUIET inline void start_product(float (&d)[8][4], const uint32_t* a, const unsigned char* left,
                                    const unsigned char* tile, int at, bool transposed, bool add,
                                    sim::Where where) {
    sim::product_issue(d, a, left, tile, at, transposed, add, where);
    each_chunk(left, tile, at, transposed, [where](const unsigned char* chunk) SIM_QUIET {
        uint32_t word;
        memcpy(&word, chunk, 4);
        if (word == sim::kPoison)
            sim::fail(where, "a warpgroup product starts before its operand is there; a wait may be missing");
        if (sim::race_on) [[unlikely]]
            sim::race_proxy_read(chunk, 16, where);
    });
}

// 16 rows of the result of each warp, 8 columns at a time.
SIM_QUIET inline void warpgroup_product(float (&d)[8][4], sim::WarpgroupProducts::Product& p) {
    const int lane = sim::worker->lane, k = p.at + lane % 4 * 2;
    if (sim::race_on) [[unlikely]]  // it may have read until now
        each_chunk(p.left, p.tile, p.at, p.transposed,
                   [&p](const unsigned char* chunk) SIM_QUIET { sim::race_proxy_read(chunk, 16, p.where); });
    if (p.left) {
        const int row = sim::worker->current->thread / 32 % 4 * 16 + lane / 4;
        for (int i = 0; i < 4; i++) {
            const int r = row + i % 2 * 8, c = k + i / 2 * 8;
            p.a[i] = swizzled_pair(p.left, r, c, r, c + 1);
        }
    }
    for (int n = 0; n < 8; n++) {
        const int j = 8 * n + lane / 4;
        const uint32_t b0 =
            p.transposed ? swizzled_pair(p.tile, j, k, j, k + 1) : swizzled_pair(p.tile, k, j, k + 1, j);
        const uint32_t b1 = p.transposed ? swizzled_pair(p.tile, j, k + 8, j, k + 9)
                                         : swizzled_pair(p.tile, k + 8, j, k + 9, j);
        mma_m16n8k16(d[n], p.a, b0, b1, p.where);
    }
}

}  // namespace detail

// Does the products of all groups but the N newest, and gives the kernel those sums that wait for no other.
template <int N>
inline void wgmma_wait(float (&d)[8][4], sim::Where where = sim::Where::current()) {
    sim::WarpgroupProducts& p = sim::worker->products[sim::worker->current->thread];
    p.fenced = false;
    if (p.group_ends.size() > N) {
        const size_t groups = p.group_ends.size() - N, done = p.group_ends[groups - 1];
        for (size_t i = 0; i < done; i++)
            detail::warpgroup_product(p.sums[p.products[i].sum].values, p.products[i]);
        p.products.erase(p.products.begin(), p.products.begin() + static_cast<ptrdiff_t>(done));
        p.group_ends.erase(p.group_ends.begin(), p.group_ends.begin() + static_cast<ptrdiff_t>(groups));
        for (size_t& end : p.group_ends) end -= done;
        for (size_t s = 0; s < p.sums.size(); s++) {
            bool complete = p.sums[s].held != nullptr;
            for (const auto& product : p.products) complete = complete && product.sum != s;
            if (!complete) continue;
            memcpy(p.sums[s].held, p.sums[s].values, sizeof(d));
            p.sums[s].held = nullptr;
        }
        if (p.products.empty()) p.sums.clear();
    }
    for (const auto& sum : p.sums)
        if (sum.held == d && N > 0)
            sim::fail(where, "wgmma_wait<%d> names accumulators whose products it doesn't wait for", N);
}

template <bool kAdd>
inline void wgmma_transposed(float (&d)[8][4], const uint32_t (&a)[4], const unsigned char* tile, int column,
                             sim::Where where = sim::Where::current()) {
    detail::start_product(d, a, nullptr, tile, column, true, kAdd, where);
}

inline void wgmma(float (&d)[8][4], const uint32_t (&a)[4], const unsigned char* tile, int row,
                  sim::Where where = sim::Where::current()) {
    detail::start_product(d, a, nullptr, tile, row, false, true, where);
}

template <bool kAdd>
inline void wgmma_tiles(float (&d)[8][4], const unsigned char* left, const unsigned char* right, int column,
                        sim::Where where = sim::Where::current()) {
    detail::start_product(d, nullptr, left, right, column, true, kAdd, where);
}

}  // namespace ptx
