// Test of each word of llmc/ptx.cuh, of the warp intrinsics and of the bf16 conversions, alone: against the
// index formulas and rounding rules of the PTX ISA (8.5), written here a second time from its text, not from
// the words. The same program runs on a GPU and in the simulator: a layout that is wrong in both a word and
// the kernels that use it would be green everywhere else.
#include <ptx.cuh>
#include "dev/kernels/harness.h"
#include "llmc/attention_ring.cuh"  // box_map

namespace {

constexpr int kLanes = 32;
constexpr unsigned kFull = 0xffffffffu;

float float_of(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
uint32_t bits_of(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

// ---- mma.m16n8k16 (9.7.13.4.8, "Matrix Fragments for mma.m16n8k16 with floating point type") --------------

__global__ void mma_kernel(float* d, const uint32_t* a, const uint32_t* b, const float* c) {
    const int lane = threadIdx.x;
    uint32_t ra[4];
    float rd[4];
    for (int i = 0; i < 4; i++) ra[i] = a[lane * 4 + i], rd[i] = c[lane * 4 + i];
    ptx::mma_m16n8k16(rd, ra, b[lane * 2], b[lane * 2 + 1]);
    for (int i = 0; i < 4; i++) d[lane * 4 + i] = rd[i];
}

struct Mma {
    float a[16][16], b[16][8], c[16][8];  // a and b hold bf16 values
};

// Element i of a lane's fragment, of the 8 of A, 4 of B, 4 of C and D.
int a_row(int lane, int i) { return (i < 2 || (i >= 4 && i < 6)) ? lane >> 2 : (lane >> 2) + 8; }
int a_column(int lane, int i) { return (lane % 4) * 2 + (i & 1) + (i < 4 ? 0 : 8); }
int b_row(int lane, int i) { return (lane % 4) * 2 + (i & 1) + (i < 2 ? 0 : 8); }
int b_column(int lane, int) { return lane >> 2; }
int c_row(int lane, int i) { return i < 2 ? lane >> 2 : (lane >> 2) + 8; }
int c_column(int lane, int i) { return (lane % 4) * 2 + (i & 1); }

// The upper half of a bf16 value's float; the element with the lower index lies in the lower half of a
// register.
uint32_t half_of(float f) { return bits_of(f) >> 16; }

void run_mma(Harness& h, const Mma& m, float (&d)[16][8]) {
    std::vector<uint32_t> a(kLanes * 4, 0), b(kLanes * 2, 0);
    std::vector<float> c(kLanes * 4);
    for (int lane = 0; lane < kLanes; lane++) {
        for (int i = 0; i < 8; i++)
            a[lane * 4 + i / 2] |= half_of(m.a[a_row(lane, i)][a_column(lane, i)]) << (16 * (i % 2));
        for (int i = 0; i < 4; i++)
            b[lane * 2 + i / 2] |= half_of(m.b[b_row(lane, i)][b_column(lane, i)]) << (16 * (i % 2));
        for (int i = 0; i < 4; i++) c[lane * 4 + i] = m.c[c_row(lane, i)][c_column(lane, i)];
    }
    auto da = h.to_device(a), db = h.to_device(b);
    auto dc = h.to_device(c);
    auto dd = h.poisoned<float>(kLanes * 4);
    launch(mma_kernel, {1, kLanes}, h.gpu, dd.get(), da.get(), db.get(), dc.get());
    const std::vector<float> out = h.to_host(dd.get(), kLanes * 4);
    for (int lane = 0; lane < kLanes; lane++)
        for (int i = 0; i < 4; i++) d[c_row(lane, i)][c_column(lane, i)] = out[lane * 4 + i];
}

double product(const Mma& m, int i, int j, double* absolute) {
    double sum = m.c[i][j];
    *absolute = std::fabs(sum);
    for (int k = 0; k < 16; k++) {
        const double p = static_cast<double>(m.a[i][k]) * m.b[k][j];
        sum += p;
        *absolute += std::fabs(p);
    }
    return sum;
}

void test_mma(Harness& h) {
    // Small integers: every sum is exact, and any two elements in each other's place show.
    Mma m;
    const std::vector<int> r = h.random_ints(16 * 16 + 16 * 8 * 2, 255);
    size_t at = 0;
    for (auto& row : m.a)
        for (float& x : row) x = static_cast<float>(r[at++] - 127);
    for (auto& row : m.b)
        for (float& x : row) x = static_cast<float>(r[at++] - 127);
    for (auto& row : m.c)
        for (float& x : row) x = static_cast<float>(r[at++] - 127);
    float d[16][8];
    double absolute;
    run_mma(h, m, d);
    bool exact = true;
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++) exact &= d[i][j] == product(m, i, j, &absolute);
    h.check("mma_m16n8k16: integers, exact", exact);

    // Any order of the 17 terms, each addition to at least 24 bits and rounded in any direction (9.7.13.4):
    // an error of at most 17 * 2^-23 of the sum of magnitudes.
    const std::vector<floatX> x = h.random<floatX>(16 * 16 + 16 * 8);
    const std::vector<float> y = h.random<float>(16 * 8);
    at = 0;
    for (auto& row : m.a)
        for (float& v : row) v = float_of(bits_of(static_cast<float>(x[at++])) & 0xffff0000u);
    for (auto& row : m.b)
        for (float& v : row) v = float_of(bits_of(static_cast<float>(x[at++])) & 0xffff0000u);
    at = 0;
    for (auto& row : m.c)
        for (float& v : row) v = y[at++];
    run_mma(h, m, d);
    std::vector<float> got;
    std::vector<double> want, bound;
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++) {
            got.push_back(d[i][j]);
            want.push_back(product(m, i, j, &absolute));
            bound.push_back(17 * 0x1p-23 * absolute);
        }
    h.compare("mma_m16n8k16: random", got, want, {}, bound);

    // Sums are fp32's: 2^20 + 1 needs 21 bits. Subnormal operands count. Infinities and NaN stay.
    m = {};
    m.c[3][5] = 0x1p20f, m.a[3][0] = 1, m.b[0][5] = 1;
    m.a[9][7] = 0x1p-130f, m.b[7][2] = 0x1p100f;  // the first is a subnormal bf16
    m.a[12][1] = INFINITY, m.b[1][6] = 1;
    run_mma(h, m, d);
    h.check("mma_m16n8k16: fp32 sum", d[3][5] == 0x1p20f + 1);
    h.check("mma_m16n8k16: subnormal operand", d[9][2] == 0x1p-30f);
    h.check("mma_m16n8k16: infinity, and infinity times zero", d[12][6] == INFINITY && std::isnan(d[12][0]));
}

// ---- ldmatrix (9.7.13.4.15) -------------------------------------------------------------------------------

struct RowsShared {
    alignas(16) uint16_t rows[kLanes][8];
};

// Row `place[l]` of shared memory is what lane l names: row l % 8 of matrix l / 8.
__global__ void ldmatrix_kernel(uint32_t* plain, uint32_t* transposed, const int* place) {
    RowsShared& s = shared<RowsShared>();
    const int lane = threadIdx.x;
    for (int e = 0; e < 8; e++) s.rows[place[lane]][e] = static_cast<uint16_t>(lane * 8 + e);
    __syncthreads();
    uint32_t r[4], t[4];
    ptx::ldmatrix_x4(r, s.rows[place[lane]]);
    ptx::ldmatrix_x4_trans(t, s.rows[place[lane]]);
    for (int i = 0; i < 4; i++) plain[lane * 4 + i] = r[i], transposed[lane * 4 + i] = t[i];
}

void test_ldmatrix(Harness& h) {
    std::vector<int> place(kLanes);
    for (int l = 0; l < kLanes; l++) place[l] = (l * 13 + 7) % kLanes;
    auto device_place = h.to_device(place);
    auto plain = h.poisoned<uint32_t>(kLanes * 4), transposed = h.poisoned<uint32_t>(kLanes * 4);
    launch<RowsShared>(ldmatrix_kernel, {1, kLanes}, h.gpu, plain.get(), transposed.get(),
                       device_place.get());
    const auto p = h.to_host(plain.get(), kLanes * 4), t = h.to_host(transposed.get(), kLanes * 4);
    auto element = [](int matrix, int row, int column) {
        return static_cast<uint32_t>((matrix * 8 + row) * 8 + column);
    };
    bool right = true, right_transposed = true;
    for (int lane = 0; lane < kLanes; lane++)
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4, column = 2 * (lane % 4);
            right &= p[lane * 4 + i] == (element(i, row, column) | element(i, row, column + 1) << 16);
            right_transposed &=
                t[lane * 4 + i] == (element(i, column, row) | element(i, column + 1, row) << 16);
        }
    h.check("ldmatrix_x4", right);
    h.check("ldmatrix_x4_trans", right_transposed);
}

// ---- warpgroup products, sm_90a (9.7.14: register fragments, 128-byte swizzling) --------------------------

constexpr int kGroup = 128, kTile = 64;  // threads; rows and columns of the tile in shared memory

struct TileShared {
    alignas(1024) unsigned char bytes[kTile * 128];
};

// d (64, 64) = a[0] times the transpose of tile[:, 16 .. 31], then += a[1] tile[32 .. 47, :], two groups.
__global__ void warpgroup_kernel(float* d, const uint32_t* a, const uint16_t* tile) {
    TileShared& s = shared<TileShared>();
    const int thread = threadIdx.x;
    for (int i = thread; i < kTile * kTile; i += kGroup) {
        int offset = i * 2;  // of the plain tile; bits 4 .. 6 are combined with bits 7 .. 9
        offset ^= (offset >> 7 & 7) << 4;
        memcpy(s.bytes + offset, tile + i, 2);
    }
    ptx::fence_async_proxy();
    __syncthreads();
    uint32_t ra[2][4];
    for (int i = 0; i < 8; i++) ra[i / 4][i % 4] = a[thread * 8 + i];
    float rd[8][4];
    ptx::wgmma_fence();
    ptx::wgmma_transposed<false>(rd, ra[0], s.bytes, 16);
    ptx::wgmma_transposed<true>(rd, ra[1], s.bytes, 0);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(rd);
    ptx::wgmma_fence();
    ptx::wgmma(rd, ra[1], s.bytes, 32);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(rd);
    for (int i = 0; i < 32; i++) d[thread * 32 + i] = rd[i / 4][i % 4];
}

// Small integers, so that every sum is exact.
void test_warpgroup(Harness& h) {
    const std::vector<int> r = h.random_ints(2 * kTile * 16 + kTile * kTile, 15);
    auto left = [&](int which, int row, int k) { return r[(which * kTile + row) * 16 + k] - 7; };
    auto right = [&](int row, int column) { return r[2 * kTile * 16 + row * kTile + column] - 7; };
    std::vector<uint32_t> a(kGroup * 8, 0);
    std::vector<uint16_t> tile(kTile * kTile);
    for (int thread = 0; thread < kGroup; thread++)
        for (int which = 0; which < 2; which++)
            for (int i = 0; i < 8; i++) {
                const int row = thread / 32 * 16 + a_row(thread % 32, i), k = a_column(thread % 32, i);
                a[thread * 8 + which * 4 + i / 2] |= half_of(static_cast<float>(left(which, row, k)))
                                                     << (16 * (i % 2));
            }
    for (int i = 0; i < kTile * kTile; i++)
        tile[i] = static_cast<uint16_t>(half_of(static_cast<float>(right(i / kTile, i % kTile))));
    auto device_a = h.to_device(a);
    auto device_tile = h.to_device(tile);
    auto device_d = h.poisoned<float>(kGroup * 32);
    launch<TileShared>(warpgroup_kernel, {1, kGroup}, h.gpu, device_d.get(), device_a.get(),
                       device_tile.get());
    const auto d = h.to_host(device_d.get(), kGroup * 32);
    bool exact = true;
    for (int thread = 0; thread < kGroup; thread++)
        for (int i = 0; i < 32; i++) {
            const int lane = thread % 32, row = thread / 32 * 16 + lane / 4 + (i % 4 < 2 ? 0 : 8);
            const int column = i / 4 * 8 + lane % 4 * 2 + (i & 1);
            int want = 0;
            for (int k = 0; k < 16; k++)
                want += left(0, row, k) * right(column, 16 + k) + left(1, row, k) * right(column, k) +
                        left(1, row, k) * right(32 + k, column);
            exact &= d[thread * 32 + i] == static_cast<float>(want);
        }
    h.check("wgmma, wgmma_transposed: integers, exact", exact);
}

struct TwoTilesShared {
    alignas(1024) unsigned char bytes[2][kTile * 128];
};

// Two products of rows that both lie in shared memory, in groups of their own: d[0] = left[:, 0 .. 15]
// right[:, 0 .. 15]^T + left[:, 48 .. 63] right[:, 48 .. 63]^T, read after a wait that leaves the other group
// under way; d[1] = right[:, 16 .. 31] left[:, 16 .. 31]^T, then += d[0]'s second term.
__global__ void warpgroup_tiles_kernel(float* d, const uint16_t* tiles) {
    TwoTilesShared& s = shared<TwoTilesShared>();
    const int thread = threadIdx.x;
    for (int i = thread; i < 2 * kTile * kTile; i += kGroup) {
        const int linear = i % (kTile * kTile) * 2;
        const int swizzled = linear ^ (linear >> 7 & 7) << 4;  // bits 4 .. 6 combined with bits 7 .. 9
        memcpy(s.bytes[i / (kTile * kTile)] + swizzled, tiles + i, 2);
    }
    ptx::fence_async_proxy();
    __syncthreads();
    const unsigned char *left = s.bytes[0], *right = s.bytes[1];
    float first[8][4], second[8][4];
    ptx::wgmma_fence();
    ptx::wgmma_tiles<false>(first, left, right, 0);
    ptx::wgmma_tiles<true>(first, left, right, 48);
    ptx::wgmma_commit();
    ptx::wgmma_tiles<false>(second, right, left, 16);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>(first);
    for (int i = 0; i < 32; i++) d[thread * 64 + i] = first[i / 4][i % 4];
    ptx::wgmma_fence();
    ptx::wgmma_tiles<true>(second, left, right, 48);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(second);
    for (int i = 0; i < 32; i++) d[thread * 64 + 32 + i] = second[i / 4][i % 4];
}

void test_warpgroup_tiles(Harness& h) {
    const std::vector<int> r = h.random_ints(2 * kTile * kTile, 15);
    auto element = [&](int tile, int row, int column) {
        return r[(tile * kTile + row) * kTile + column] - 7;
    };
    std::vector<uint16_t> tiles(r.size());
    for (size_t i = 0; i < r.size(); i++)
        tiles[i] = static_cast<uint16_t>(half_of(static_cast<float>(r[i] - 7)));
    auto device_tiles = h.to_device(tiles);
    auto device_d = h.poisoned<float>(kGroup * 64);
    launch<TwoTilesShared>(warpgroup_tiles_kernel, {1, kGroup}, h.gpu, device_d.get(), device_tiles.get());
    const auto d = h.to_host(device_d.get(), kGroup * 64);
    bool exact[2] = {true, true};
    for (int thread = 0; thread < kGroup; thread++)
        for (int i = 0; i < 32; i++) {
            const int lane = thread % 32, row = thread / 32 * 16 + lane / 4 + (i % 4 < 2 ? 0 : 8);
            const int column = i / 4 * 8 + lane % 4 * 2 + (i & 1);
            int term[3] = {};
            for (int k = 0; k < 16; k++) {
                term[0] += element(0, row, k) * element(1, column, k);
                term[1] += element(0, row, 48 + k) * element(1, column, 48 + k);
                term[2] += element(1, row, 16 + k) * element(0, column, 16 + k);
            }
            exact[0] &= d[thread * 64 + i] == static_cast<float>(term[0] + term[1]);
            exact[1] &= d[thread * 64 + 32 + i] == static_cast<float>(term[2] + term[1]);
        }
    h.check("wgmma_tiles, wgmma_wait<1>: integers, exact", exact[0]);
    h.check("wgmma_tiles, the group that ran on: integers, exact", exact[1]);
}

// ---- cp.async (9.7.8.22) ----------------------------------------------------------------------------------

struct CopyShared {
    alignas(16) uint32_t words[3][kLanes * 4];
};

// Three groups; after each wait, what must have landed by then is written out. Lanes of odd number zero-fill
// the last.
__global__ void cp_async_kernel(uint32_t* out, const uint32_t* in) {
    CopyShared& s = shared<CopyShared>();
    const int lane = threadIdx.x;
    for (int g = 0; g < 3; g++) {
        void* dst = &s.words[g][lane * 4];
        const uint32_t* src = in + (g * kLanes + lane) * 4;
        if (g < 2) ptx::cp_async_16(dst, src);
        else ptx::cp_async_16_zfill(dst, src, lane % 2 == 0);
        ptx::cp_async_commit();
    }
    auto write_out = [&](int g) {  // another lane's copy, so behind a barrier
        __syncthreads();
        for (int e = 0; e < 4; e++) out[(g * kLanes + lane) * 4 + e] = s.words[g][(lane ^ 3) * 4 + e];
    };
    ptx::cp_async_wait<2>();
    write_out(0);
    ptx::cp_async_wait<1>();
    write_out(1);
    ptx::cp_async_wait<0>();
    write_out(2);
}

void test_cp_async(Harness& h) {
    std::vector<uint32_t> in(3 * kLanes * 4);
    for (size_t i = 0; i < in.size(); i++) in[i] = static_cast<uint32_t>(i) * 2654435761u;
    auto device_in = h.to_device(in);
    auto device_out = h.poisoned<uint32_t>(in.size());
    launch<CopyShared>(cp_async_kernel, {1, kLanes}, h.gpu, device_out.get(), device_in.get());
    const auto out = h.to_host(device_out.get(), in.size());
    bool right[3] = {true, true, true};
    for (int i = 0; i < static_cast<int>(in.size()); i++) {
        const int g = i / (kLanes * 4), lane = i / 4 % kLanes, from = lane ^ 3;
        right[g] &= out[i] == (g == 2 && from % 2 ? 0 : in[(g * kLanes + from) * 4 + i % 4]);
    }
    h.check("cp_async_16, wait for the oldest of three groups", right[0]);
    h.check("cp_async_16, wait for the second", right[1]);
    h.check("cp_async_16_zfill, wait for all", right[2]);
}

// ---- shuffles (9.7.8.6: the pseudo-code of shfl.sync; CUDA passes c = (32 - width) << 8, with 0x1f but for

enum Mode { kUp, kDown, kXor, kIndex, kModes };

template <class T>
__global__ void shuffle_kernel(T* out, const T* in, int width) {
    const int lane = threadIdx.x;
    const T x = in[lane];
    for (int b = 0; b < 32; b++) {
        out[(kUp * 32 + b) * kLanes + lane] = __shfl_up_sync(kFull, x, b, width);
        out[(kDown * 32 + b) * kLanes + lane] = __shfl_down_sync(kFull, x, b, width);
        out[(kXor * 32 + b) * kLanes + lane] = __shfl_xor_sync(kFull, x, b, width);
        out[(kIndex * 32 + b) * kLanes + lane] = __shfl_sync(kFull, x, b, width);
    }
}

int shuffle_source(Mode mode, int lane, int b, int width) {
    const int segment_mask = 32 - width, c = mode == kUp ? 0 : 0x1f;
    const int max_lane = (lane & segment_mask) | (c & ~segment_mask & 0x1f), min_lane = lane & segment_mask;
    int j = 0;
    bool inside = false;
    switch (mode) {
        case kUp: j = lane - b, inside = j >= max_lane; break;
        case kDown: j = lane + b, inside = j <= max_lane; break;
        case kXor: j = lane ^ b, inside = j <= max_lane; break;
        default: j = min_lane | (b & ~segment_mask), inside = j <= max_lane; break;
    }
    return inside ? j : lane;
}

template <class T>
void test_shuffles(Harness& h, const char* type) {
    std::vector<T> in(kLanes);
    for (int l = 0; l < kLanes; l++) in[l] = static_cast<T>(1000003.0 * (l + 1));
    auto device_in = h.to_device(in);
    auto device_out = h.poisoned<T>(kModes * 32 * kLanes);
    for (int width = 32; width > 0; width /= 2) {
        launch(shuffle_kernel<T>, {1, kLanes}, h.gpu, device_out.get(), device_in.get(), width);
        const auto out = h.to_host(device_out.get(), device_out.size());
        bool right = true;
        for (int m = 0; m < kModes; m++)
            for (int b = 0; b < 32; b++)
                for (int l = 0; l < kLanes; l++)
                    right &= out[(m * 32 + b) * kLanes + l] ==
                             in[shuffle_source(static_cast<Mode>(m), l, b, width)];
        h.check(std::string("shuffles of ") + type + ", width " + std::to_string(width), right);
    }
}

// ---- votes and reductions (9.7.12.8 vote.sync, 9.7.12.11 redux.sync) --------------------------------------

__global__ void vote_kernel(unsigned* out, const unsigned* values, unsigned pattern) {
    const int lane = threadIdx.x;
    const unsigned v = values[lane];
    const bool predicate = pattern >> lane & 1;
    unsigned* mine = out + lane * 8;
    mine[0] = __ballot_sync(kFull, predicate);
    mine[1] = __any_sync(kFull, predicate);
    mine[2] = __all_sync(kFull, predicate);
    mine[3] = __reduce_add_sync(kFull, v);
    mine[4] = __reduce_max_sync(kFull, v);
    // Two halves under their own masks.
    if (lane < 16) {
        mine[5] = __ballot_sync(0x0000ffffu, predicate);
        mine[6] = __reduce_add_sync(0x0000ffffu, v);
        mine[7] = __all_sync(0x0000ffffu, predicate);
    } else {
        mine[5] = __ballot_sync(0xffff0000u, predicate);
        mine[6] = __reduce_add_sync(0xffff0000u, v);
        mine[7] = __all_sync(0xffff0000u, predicate);
    }
}

void test_votes(Harness& h) {
    std::vector<unsigned> values(kLanes);
    for (int l = 0; l < kLanes; l++) values[l] = 0x9e3779b9u * (l + 1);
    auto device_values = h.to_device(values);
    auto device_out = h.poisoned<unsigned>(kLanes * 8);
    for (const unsigned pattern : {0u, kFull, 0x80000001u, 0x0000ffffu, 0xa5a5a5a5u}) {
        launch(vote_kernel, {1, kLanes}, h.gpu, device_out.get(), device_values.get(), pattern);
        const auto out = h.to_host(device_out.get(), kLanes * 8);
        bool right = true;
        for (int l = 0; l < kLanes; l++) {
            const unsigned half = l < 16 ? 0x0000ffffu : 0xffff0000u;
            unsigned sum = 0, greatest = 0, half_sum = 0;
            for (int k = 0; k < kLanes; k++) {
                sum += values[k], greatest = std::max(greatest, values[k]);
                if (half >> k & 1) half_sum += values[k];
            }
            const unsigned want[8] = {pattern,  pattern != 0,   pattern == kFull, sum,
                                      greatest, pattern & half, half_sum,         (pattern & half) == half};
            right &= std::equal(want, want + 8, &out[l * 8]);
        }
        char name[64];
        snprintf(name, sizeof(name), "votes and reductions, predicates %08x", pattern);
        h.check(name, right);
    }
}

// ---- barriers (9.7.12.1 bar.sync; __syncwarp) -------------------------------------------------------------

struct MeetShared {
    int value[128];
};

// Pairs of warps pass values by a named barrier, lanes of a warp by __syncwarp, all by __syncthreads.
__global__ void meet_kernel(int* out) {
    MeetShared& s = shared<MeetShared>();
    const int t = threadIdx.x, pair = t / 64;
    s.value[t] = t;
    ptx::barrier_sync(1 + pair, 64);
    const int from_pair = s.value[t ^ 63];
    __syncthreads();
    s.value[t] = from_pair + 1000;
    __syncwarp();
    const int from_warp = s.value[t ^ 31];
    __syncthreads();
    s.value[t] = from_warp + 1000;
    __syncthreads();
    out[t] = ptx::opaque(s.value[127 - t]);
}

void test_barriers(Harness& h) {
    auto out = h.poisoned<int>(128);
    launch<MeetShared>(meet_kernel, {1, 128}, h.gpu, out.get());
    const auto host = h.to_host(out.get(), 128);
    bool right = true;
    for (int t = 0; t < 128; t++) right &= host[t] == (((127 - t) ^ 31) ^ 63) + 2000;
    h.check("barrier_sync, __syncwarp, __syncthreads", right);
}

// ---- sm_90: barriers in shared memory, bulk copies (9.7.13.15 mbarrier; 9.7.9.25 cp.async.bulk) ----------

struct PhasesShared {
    int value[64];
    ptx::Mbarrier filled, read;
};

// The first warp hands values to the second, round by round: `filled` counts its 32 lanes, `read` one lane of
// the other.
__global__ void phases_kernel(int* out, int rounds) {
    PhasesShared& s = shared<PhasesShared>();
    const int lane = threadIdx.x % 32;
    if (threadIdx.x == 0) ptx::mbarrier_init(&s.filled, 32), ptx::mbarrier_init(&s.read, 1);
    __syncthreads();
    for (int round = 0; round < rounds; round++) {
        if (threadIdx.x < 32) {
            if (round > 0) ptx::mbarrier_wait(&s.read, (round - 1) % 2);
            s.value[lane] = 100 * round + lane;
            ptx::mbarrier_arrive(&s.filled);
        } else {
            ptx::mbarrier_wait(&s.filled, round % 2);
            out[32 * round + lane] = s.value[31 - lane];
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive(&s.read);
        }
    }
}

void test_mbarrier(Harness& h) {
    constexpr int kRounds = 9;
    auto out = h.poisoned<int>(32 * kRounds);
    launch<PhasesShared>(phases_kernel, {1, 64}, h.gpu, out.get(), kRounds);
    const auto host = h.to_host(out.get(), 32 * kRounds);
    bool right = true;
    for (int i = 0; i < 32 * kRounds; i++) right &= host[i] == 100 * (i / 32) + 31 - i % 32;
    h.check("mbarrier: nine phases, arrivals of 32 and of 1", right);
}

struct BulkShared {
    alignas(1024) uint4 tile[2][512];  // two boxes of 64 rows of 128 bytes
    uint4 row[32];
    ptx::Mbarrier full;
};

// Two boxes of a tensor and 512 bytes of another, all counting at one barrier; what lies in shared memory
// then.
__global__ void bulk_kernel(uint4* out, const __grid_constant__ CUtensorMap map, const uint4* row, int x,
                            int y, int z) {
    BulkShared& s = shared<BulkShared>();
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&s.full, 2);
        ptx::fence_async_proxy();
        ptx::mbarrier_arrive_expect(&s.full, sizeof(s.tile) / 2);
        ptx::mbarrier_arrive_expect(&s.full, sizeof(s.tile) / 2 + sizeof(s.row));
        ptx::bulk_load_box(s.tile[0], map, x, y, z, &s.full);
        ptx::bulk_load_box(s.tile[1], map, x, y + 64, z, &s.full);
        ptx::bulk_load(s.row, row, sizeof(s.row), &s.full);
    }
    __syncthreads();
    ptx::mbarrier_wait(&s.full, 0);
    for (int i = threadIdx.x; i < 1024; i += blockDim.x) out[i] = s.tile[i / 512][i % 512];
    if (threadIdx.x < 32) out[1024 + threadIdx.x] = s.row[threadIdx.x];
}

void test_bulk_copies(Harness& h) {
    constexpr int kB = 3, kT = 100, kWidth = 192;
    std::vector<__nv_bfloat16> x(static_cast<size_t>(kB) * kT * kWidth);
    for (size_t i = 0; i < x.size(); i++) {
        const uint16_t bits = static_cast<uint16_t>(i + 1);  // any bits; none are zero before 65535
        memcpy(static_cast<void*>(&x[i]), &bits, 2);
    }
    auto device_x = h.to_device(x);
    const std::vector<int> row = h.random_ints(128, 1 << 20);
    auto device_row = h.to_device(row);
    auto device_out = h.poisoned<uint4>(1024 + 32);
    const CUtensorMap map = attention::box_map(device_x.get(), kB, kT, kWidth);
    struct Corner {
        int x, y, z;
    };
    for (const Corner c : {Corner{0, 0, 0}, Corner{128, 0, 1}, Corner{64, 36, 2}, Corner{64, 64, 0}}) {
        launch<BulkShared>(bulk_kernel, {1, 64}, h.gpu, device_out.get(), map,
                           reinterpret_cast<const uint4*>(device_row.get()), c.x, c.y, c.z);
        const auto out = h.to_host(device_out.get(), 1024 + 32);
        uint16_t got[2 * 64 * 64];
        memcpy(got, out.data(), sizeof(got));
        bool right = true, zeros = true;
        for (int r = 0; r < 128; r++)
            for (int e = 0; e < 64; e++) {
                // "128B swizzle": bits 4 .. 6 of a byte's address ^= bits 7 .. 9
                const int byte = r * 128 + e * 2, at = (byte ^ (byte >> 7 & 7) << 4) / 2;
                const int t = c.y + r;
                uint16_t want = 0;
                if (t < kT) memcpy(&want, &x[(static_cast<size_t>(c.z) * kT + t) * kWidth + c.x + e], 2);
                (t < kT ? right : zeros) &= got[at] == want;
            }
        char name[96];
        snprintf(name, sizeof(name), "bulk_load_box from (%d, %d, %d): the tensor's rows", c.x, c.y, c.z);
        h.check(name, right);
        snprintf(name, sizeof(name), "bulk_load_box from (%d, %d, %d): zeros beyond them", c.x, c.y, c.z);
        h.check(name, zeros);
        h.check("bulk_load of 512 bytes", memcmp(out.data() + 1024, row.data(), 512) == 0);
    }
}

__global__ void uniform_kernel(int* out) {
    out[threadIdx.x] = ptx::uniform(static_cast<int>(threadIdx.x) + 5);
}

void test_uniform(Harness& h) {
    auto out = h.poisoned<int>(64);
    launch(uniform_kernel, {1, 64}, h.gpu, out.get());
    const auto host = h.to_host(out.get(), 64);
    bool right = true;
    for (int i = 0; i < 64; i++) right &= host[i] == i / 32 * 32 + 5;
    h.check("uniform: lane 0's", right);
}

// ---- ex2.approx.ftz (9.7.3.21) ----------------------------------------------------------------------------

__global__ void ex2_kernel(float* out, const float* in, size_t n) {
    const size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (i < n) out[i] = ptx::ex2(in[i]);
}

void test_ex2(Harness& h) {
    std::vector<float> x;
    for (double v = -152; v < 128; v += 0.00390001) x.push_back(static_cast<float>(v));
    for (int e = -149; e < 7; e++) x.push_back(std::ldexp(1.0f, e)), x.push_back(-std::ldexp(1.5f, e));
    const size_t regular = x.size();
    for (const float v : {-0.0f, 0.0f, INFINITY, -INFINITY, NAN, 128.0f, -126.0f, -127.0f, 0x1p-140f})
        x.push_back(v);
    auto in = h.to_device(x);
    auto device_out = h.poisoned<float>(x.size());
    launch(ex2_kernel, {(x.size() + 255) / 256, 256}, h.gpu, device_out.get(), in.get(), x.size());
    const std::vector<float> out = h.to_host(device_out.get(), x.size());
    // Relative error at most 2^-22: CUDA documents 2 ulp for exp2f, which becomes this word. Subnormal
    // results are zero, so those within that error of 2^-126 may be either.
    std::vector<double> want, bound;
    for (size_t i = 0; i < regular; i++) {
        const double y = std::exp2(static_cast<double>(x[i]));
        const bool flushed = y < 0x1p-126 * (1 - 0x1p-22);
        want.push_back(flushed ? 0 : y);
        bound.push_back(flushed ? 0 : y < 0x1p-126 * (1 + 0x1p-22) ? 0x1p-126 : y * 0x1p-22);
    }
    h.compare("ex2: -152 to 128", std::vector<float>(out.begin(), out.begin() + regular), want, {}, bound);
    const float* special = &out[regular];
    h.check("ex2: zeros give 1, infinities and NaN as IEEE, overflow gives infinity, 2^-127 gives zero",
            special[0] == 1 && special[1] == 1 && special[2] == INFINITY && bits_of(special[3]) == 0 &&
                std::isnan(special[4]) && special[5] == INFINITY && special[6] == 0x1p-126f &&
                bits_of(special[7]) == 0 && special[8] == 1);
}

// ---- bf16 (5.2.3 and 9.7.9.21, cvt.rn.bf16.f32) -----------------------------------------------------------

__global__ void to_bf16_kernel(uint16_t* out, uint32_t* packed, const float* in, size_t n) {
    const size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const __nv_bfloat16 b = __float2bfloat16(in[i]), c = static_cast<__nv_bfloat16>(in[i]);
    memcpy(out + 2 * i, &b, 2);
    memcpy(out + 2 * i + 1, &c, 2);
    packed[i] = ptx::pack_bf16(in[i], in[n - 1 - i]);
}

__global__ void from_bf16_kernel(float* out, size_t n) {
    const size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const uint16_t bits = static_cast<uint16_t>(i);
    __nv_bfloat16 b;
    memcpy(&b, &bits, 2);
    out[2 * i] = __bfloat162float(b);
    out[2 * i + 1] = static_cast<float>(b);
}

// The nearest of the two bf16 around f by their distances, the even one where they are equal; a NaN is
// 0x7fff.
uint16_t nearest_bf16(float f) {
    const uint32_t bits = bits_of(f);
    if (std::isnan(f)) return 0x7fff;
    if (std::isinf(f)) return static_cast<uint16_t>(bits >> 16);
    const uint32_t down = bits >> 16, up = down + 1;  // in magnitude
    // Beyond the greatest finite value the next one would be 2^128.
    const double f_magnitude = std::fabs(static_cast<double>(f));
    const double below = std::fabs(static_cast<double>(float_of(down << 16)));
    const double above =
        (up & 0x7fff) == 0x7f80 ? 0x1p128 : std::fabs(static_cast<double>(float_of(up << 16)));
    const double to_below = f_magnitude - below, to_above = above - f_magnitude;
    if (to_below != to_above) return static_cast<uint16_t>(to_below < to_above ? down : up);
    return static_cast<uint16_t>(down % 2 == 0 ? down : up);
}

void test_bf16(Harness& h) {
    constexpr uint32_t kLow[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff};  // ties, and both sides of them
    std::vector<float> in;
    for (uint32_t high = 0; high < 0x10000; high++)
        for (const uint32_t low : kLow) in.push_back(float_of(high << 16 | low));
    const size_t n = in.size();
    auto device_in = h.to_device(in);
    auto rounded = h.poisoned<uint16_t>(2 * n);
    auto packed = h.poisoned<uint32_t>(n);
    launch(to_bf16_kernel, {(n + 255) / 256, 256}, h.gpu, rounded.get(), packed.get(), device_in.get(), n);
    const auto r = h.to_host(rounded.get(), 2 * n);
    const auto p = h.to_host(packed.get(), n);
    bool right = true, right_cast = true, right_pack = true;
    for (size_t i = 0; i < n; i++) {
        const uint32_t want = nearest_bf16(in[i]), other = nearest_bf16(in[n - 1 - i]);
        right &= r[2 * i] == want;
        right_cast &= r[2 * i + 1] == want;
        right_pack &= p[i] == (want | other << 16);
    }
    h.check("float to bf16: __float2bfloat16, around every bf16", right);
    h.check("float to bf16: cast, around every bf16", right_cast);
    h.check("pack_bf16, around every bf16", right_pack);

    auto widened = h.poisoned<float>(2 * 0x10000);
    launch(from_bf16_kernel, {256, 256}, h.gpu, widened.get(), size_t{0x10000});
    const auto w = h.to_host(widened.get(), 2 * 0x10000);
    bool exact = true;
    for (uint32_t i = 0; i < 0x10000; i++)
        for (const float f : {w[2 * i], w[2 * i + 1]})
            exact &= std::isnan(float_of(i << 16)) ? std::isnan(f) : bits_of(f) == i << 16;
    h.check("bf16 to float: every bf16", exact);
}

// ---- cached loads and stores, atomics, bits ---------------------------------------------------------------

__global__ void memory_kernel(int4* out, int* counters, const int4* in) {
    const int i = threadIdx.x;
    __stcs(out + i, __ldcs(in + i));
    const int4 a = __ldg(in + i);
    atomicAdd(counters, a.x % 7);
    atomicMax(counters + 1, a.x);
    atomicCAS(counters + 2, i, i + 1);  // only the thread that finds its own number adds: at least one does
    atomicExch(counters + 3, 5);
}

void test_memory(Harness& h) {
    std::vector<int4> in(128);
    for (int i = 0; i < 128; i++) in[i] = int4{i * 37 % 128, i, -i, i * i};
    auto device_in = h.to_device(in);
    auto device_out = h.poisoned<int4>(128);
    auto counters = h.to_device(std::vector<int>(4, 0));
    launch(memory_kernel, {1, 128}, h.gpu, device_out.get(), counters.get(), device_in.get());
    const auto out = h.to_host(device_out.get(), 128);
    const auto c = h.to_host(counters.get(), 4);
    h.check("__ldcs, __stcs of 16 bytes", memcmp(out.data(), in.data(), 128 * sizeof(int4)) == 0);
    int sum = 0;
    for (const int4& v : in) sum += v.x % 7;
    h.check("atomics", c[0] == sum && c[1] == 127 && c[2] >= 1 && c[2] <= 128 && c[3] == 5);
}

__global__ void alignment_kernel(int* out) {
    out[0] = reinterpret_cast<uintptr_t>(ptx::dynamic_shared()) % 128 == 0;
}

void test_alignment(Harness& h) {
    auto out = h.poisoned<int>(1);
    launch<MeetShared>(alignment_kernel, {1, 1}, h.gpu, out.get());
    h.check("dynamic_shared: aligned for the 128-byte swizzle", h.to_host(out.get(), 1)[0] == 1);
}

}  // namespace

int main(int argc, char** argv) {
    Harness h("ptx", argc, argv);
    if (!h.bench) {
        test_mma(h);
        test_ldmatrix(h);
        if (h.gpu.properties.major == 9) {
            test_warpgroup(h);
            test_warpgroup_tiles(h);
            test_mbarrier(h);
            test_bulk_copies(h);
        }
        test_uniform(h);
        test_cp_async(h);
        test_shuffles<int>(h, "int");
        test_shuffles<float>(h, "float");
        test_shuffles<double>(h, "double");
        test_votes(h);
        test_barriers(h);
        test_ex2(h);
        test_bf16(h);
        test_memory(h);
        test_alignment(h);
    }
    return h.finish();
}
